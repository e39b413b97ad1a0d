/*
 * The cache and its sequences: the structures behind the public handles, and the functions that
 * the files of this folder offer. attention/ and snapshot/ read them; nothing here knows of those.
 *
 * Files, each of which may use those before it: geometry.c (layouts, rotation), blocks.c (blocks
 * and their free lists), cache.c (the handle), sequence.c (block table, steps), append.c and
 * read.c. src/create.c makes a cache.
 */
#ifndef KVT_CACHE_H
#define KVT_CACHE_H

#include <assert.h>
#include <stddef.h>

#include "simd/kernels.h"
#include "src/memory.h"
#include "src/parallel.h"

/* ---- geometry ---- */

/* Where a head's parts lie in its record, and the sizes up to a block. See simd/tile.h. */
typedef struct kvt_layout {
    size_t k_dims, v_dims;    /* padded to a multiple of 16 */
    size_t k_codes, k_scales; /* offsets into a head's record */
    size_t k_offset;
    size_t v_scales, v_codes;
    size_t k_code_bytes, v_code_bytes;                   /* of the 64 tokens of a head */
    size_t k_scale_bytes, v_scale_bytes, k_offset_bytes; /* 0 where the type has none */
    size_t head_bytes;                                   /* record of a head: a multiple of 64 */
    size_t layer_bytes;                                  /* n_kv_heads records */
    size_t block_bytes;                                  /* n_layers layers */
    size_t transposed_bytes; /* V in K: of a block's V of one head, turned for a product; else 0 */
} kvt_layout;

typedef struct kvt_group {
    kvt_group_config config; /* config.layers is NULL: see kvt_cache.layers */
    kvt_layout layout;
    uint32_t rotates;       /* K is i8 and rotated */
    uint32_t offsets;       /* K is i8 and has an offset */
    uint32_t v_in_k;        /* V is K's first dims: there are no V codes and scales */
    size_t rotation_block;  /* dims rotated together: largest power of two dividing k_dim */
    float rotation_scale_k; /* powers of two; their product is 1 / rotation_block */
    float rotation_scale_q;
    float *signs; /* [n_kv_heads][k_dim] +-1; NULL without rotation */
} kvt_group;

/* A layer's group and its place in the group's blocks. */
typedef struct kvt_layer {
    uint32_t group;
    uint32_t index;
} kvt_layer;

/* ---- blocks ---- */

/*
 * 64 tokens of one class. Class g < n_groups: keys and values of group g, data[block_bytes].
 * Class n_groups: positions and token ids of the 64 tokens (kvt_meta).
 * The header and the data are one allocation; data begins at a multiple of 64 bytes.
 */
typedef struct kvt_block {
    unsigned char *data;
    struct kvt_block *next; /* in a free list */
    uint64_t is_new;        /* has never been in a free list */
    uint64_t reserved[5];
} kvt_block;

typedef struct kvt_meta {
    int32_t positions[KVT_TOKENS];
    int32_t token_ids[KVT_TOKENS];
} kvt_meta;

#define KVT_MAX_CLASSES (KVT_MAX_GROUPS + 1)

/* ---- cache ---- */

struct kvt_cache {
    kvt_heap heap;        /* the first member: see memory.h */
    pthread_mutex_t lock; /* guards references, n_plans and the free lists; held shortly */
    uint64_t references;  /* the handle and the sequences */
    uint64_t n_plans;     /* ids given to attend plans */

    uint64_t max_tokens;
    size_t max_rows; /* blocks of max_tokens */
    uint32_t n_groups, n_layers;
    uint32_t n_classes; /* n_groups + 1 */
    kvt_group groups[KVT_MAX_GROUPS];
    kvt_layer *layers;                   /* [n_layers] */
    size_t class_bytes[KVT_MAX_CLASSES]; /* of a block's data */
    kvt_block *free_blocks[KVT_MAX_CLASSES];
    size_t n_free_blocks[KVT_MAX_CLASSES];

    kvt_kernels kernels;
    kvt_parallel parallel;
    pthread_mutex_t scratch_lock; /* held through a one-call attend */
    void *scratch;                /* [scratch_bytes] of the one-call attend */
    size_t scratch_bytes;

    unsigned char fingerprint[KVT_MAX_FINGERPRINT];
    size_t fingerprint_bytes;
};

_Static_assert(offsetof(struct kvt_cache, heap) == 0, "memory.c and status.c take it so");

/* ---- sequence ---- */

/*
 * Row r of the table holds tokens 64 r .. 64 r + 63, one block a class. Rows 0 .. n_rows - 1 have
 * all their blocks, the others none. n_rows covers length + pending.
 */
struct kvt_seq {
    kvt_cache *cache;
    uint64_t length;     /* committed tokens */
    uint64_t pending;    /* tokens of the pending step, 0: none */
    uint64_t step;       /* number of begins: tells plans of an earlier step */
    uint32_t n_appended; /* layers that have the pending tokens */
    uint8_t *appended;   /* [n_layers] */
    size_t n_rows;
    kvt_block **table; /* [max_rows][n_classes] */
};

static inline kvt_block *kvt_seq_block(const kvt_seq *seq, size_t row, uint32_t class_index)
{
    assert(row < seq->n_rows && class_index < seq->cache->n_classes);
    return seq->table[row * seq->cache->n_classes + class_index];
}

static inline kvt_meta *kvt_seq_meta(const kvt_seq *seq, size_t row)
{
    return (kvt_meta *)(void *)kvt_seq_block(seq, row, seq->cache->n_groups)->data;
}

/* A head's record: see simd/tile.h. */
static inline unsigned char *kvt_head_record(const kvt_group *group, const kvt_block *block,
                                             size_t layer_index, size_t kv_head)
{
    assert(layer_index < group->config.n_layers && kv_head < group->config.n_kv_heads);
    return block->data + layer_index * group->layout.layer_bytes +
           kv_head * group->layout.head_bytes;
}

/* Rows (blocks) that n tokens need. */
static inline size_t kvt_rows(uint64_t n_tokens)
{
    return (size_t)((n_tokens + KVT_TOKENS - 1) / KVT_TOKENS);
}

/* ---- geometry.c ---- */

/* Largest power of two that divides dims: how many are rotated together. */
size_t kvt_rotation_block(size_t dims);
/* Why V cannot be K's first dims though the flags say so; NULL when it can, or need not. */
const char *kvt_v_in_k_fault(uint32_t flags, uint32_t k_dim, uint32_t v_dim, kvt_type k_type,
                             kvt_type v_type);
size_t kvt_element_bytes(kvt_type type);
/* Layout and transforms of a group whose config has been checked. signs is left NULL. */
void kvt_group_make(const kvt_group_config *config, kvt_group *group);
/* The rotation's signs: bytes, and their values once group->signs has the memory. */
size_t kvt_group_signs_bytes(const kvt_group *group);
void kvt_group_fill_signs(const kvt_group *group);

/* ---- blocks.c ---- */

kvt_status kvt_block_get(kvt_cache *cache, uint32_t class_index, kvt_block **block);
/* To the free list. */
void kvt_block_put(kvt_cache *cache, uint32_t class_index, kvt_block *block);
/* Undo a kvt_block_get: to where it came from, the free list or the allocator. */
void kvt_block_undo(kvt_cache *cache, uint32_t class_index, kvt_block *block);
/* Free every block in the free lists. */
void kvt_blocks_trim(kvt_cache *cache);

/* ---- cache.c ---- */

/* Drop one reference; the last one frees the cache. */
void kvt_cache_release(kvt_cache *cache);
/* Free a cache, complete or not, and all that it holds. */
void kvt_cache_free(kvt_cache *cache);

/* ---- sequence.c ---- */

/* Bytes of an empty sequence. Uses the geometry only. */
uint64_t kvt_seq_own_bytes(const kvt_cache *cache);

/* Reserve table rows up to n_rows: all of them, or none and an error. */
kvt_status kvt_seq_grow(kvt_seq *seq, size_t n_rows);
/* Give back the rows from n_rows on. */
void kvt_seq_shrink(kvt_seq *seq, size_t n_rows);
/* Tokens that a layer holds: the pending ones count where the layer has them. */
uint64_t kvt_seq_visible(const kvt_seq *seq, uint32_t layer);

#endif /* KVT_CACHE_H */
