/*
 * What the files of src/ share: the structures behind the public handles and the functions
 * that one file offers the others. Nothing here is exported.
 *
 * Arrows point down: snapshot_*.c -> sequence.c, pool.c -> status.c; attend.c, append.c ->
 * sequence.c, parallel.c, the kernel table. The lock of a cache guards its counters, free lists
 * and error text, and is held for short, allocation-free moments only.
 */
#ifndef KVT_INTERNAL_H
#define KVT_INTERNAL_H

#include <kvtile/kvtile.h>

#include <assert.h>
#include <pthread.h>

#include "simd/kernels.h"

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
    pthread_mutex_t lock;
    kvt_allocator allocator;
    uint64_t memory_bytes;        /* allocated now; guarded by lock */
    uint64_t memory_budget_bytes; /* UINT64_MAX: none */
    uint64_t references;          /* the handle and the sequences; guarded by lock */
    char error[256];              /* guarded by lock */
    uint64_t n_plans;             /* ids given to attend plans; guarded by lock */

    uint64_t max_tokens;
    size_t max_rows; /* blocks of max_tokens */
    uint32_t n_groups, n_layers;
    uint32_t n_classes; /* n_groups + 1 */
    kvt_group groups[KVT_MAX_GROUPS];
    kvt_layer *layers;                       /* [n_layers] */
    size_t class_bytes[KVT_MAX_CLASSES];     /* of a block's data */
    kvt_block *free_blocks[KVT_MAX_CLASSES]; /* guarded by lock, as their number */
    size_t n_free_blocks[KVT_MAX_CLASSES];

    kvt_kernels kernels;
    kvt_executor executor;        /* run NULL: inline */
    void *pool;                   /* pthreadpool_t that executor.user refers to, or NULL */
    pthread_mutex_t scratch_lock; /* held through a one-call attend */
    void *scratch;                /* [scratch_bytes] of the one-call attend */
    size_t scratch_bytes;

    unsigned char fingerprint[KVT_MAX_FINGERPRINT];
    size_t fingerprint_bytes;
};

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

/* ---- status.c ---- */

/* Keep a text on the cache (which may be NULL) and return status. Takes the lock. */
kvt_status kvt_fail(const kvt_cache *cache, kvt_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* 1 when a * b, or a + b, overflows; else 0 and *result. */
static inline int kvt_mul_overflows(uint64_t a, uint64_t b, uint64_t *result)
{
    return __builtin_mul_overflow(a, b, result);
}

static inline int kvt_add_overflows(uint64_t a, uint64_t b, uint64_t *result)
{
    return __builtin_add_overflow(a, b, result);
}

/* Copy a public struct whose first member is struct_size. 0 when its size is not one we know. */
static inline int kvt_copy_struct(void *to, const void *from, size_t bytes)
{
    size_t struct_size;
    memcpy(&struct_size, from, sizeof struct_size);
    if (struct_size != bytes)
        return 0;
    memcpy(to, from, bytes);
    return 1;
}

/* ---- pool.c: memory, counted against the budget ---- */

/*
 * Memory of the cache's allocator at a multiple of 64, zeroed. KVT_ERR_MEMORY or
 * KVT_ERR_BUDGET with the text set ("what" names the purpose), else *memory is set.
 */
kvt_status kvt_mem_alloc(kvt_cache *cache, size_t bytes, const char *what, void **memory);
/* Give it back, with the same size; NULL is fine. */
void kvt_mem_free(kvt_cache *cache, void *memory, size_t bytes);

/* The same without a cache: neither counted nor bounded. NULL: out of memory. */
void *kvt_mem_raw_alloc(const kvt_allocator *allocator, size_t bytes);
void kvt_mem_raw_free(const kvt_allocator *allocator, void *memory, size_t bytes);

/* One block of a class, from the free list or new. A recycled block holds old bytes. */
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
/* Largest power of two that divides dims: how many are rotated together. */
size_t kvt_rotation_block(size_t dims);
/* Why V cannot be K's first dims though the flags say so; NULL when it can, or need not. */
const char *kvt_v_in_k_fault(uint32_t flags, uint32_t k_dim, uint32_t v_dim, kvt_type k_type,
                             kvt_type v_type);

/* ---- sequence.c ---- */

/* Bytes of an empty sequence. Uses the geometry only. */
uint64_t kvt_seq_own_bytes(const kvt_cache *cache);

/* Reserve table rows up to n_rows: all of them, or none and an error. */
kvt_status kvt_seq_grow(kvt_seq *seq, size_t n_rows);
/* Give back the rows from n_rows on. */
void kvt_seq_shrink(kvt_seq *seq, size_t n_rows);
/* Tokens that a layer holds: the pending ones count where the layer has them. */
uint64_t kvt_seq_visible(const kvt_seq *seq, uint32_t layer);

/* ---- tensor.c: the caller's memory ---- */

/* A validated view with the strides filled in. */
typedef struct kvt_view {
    unsigned char *data;
    kvt_dtype dtype;
    size_t token_stride, head_stride;
} kvt_view;

/*
 * Check a tensor of [n_tokens][n_heads][dims] and fill in its strides. "name" is for the text.
 * KVT_ERR_ARG: NULL, unknown dtype, misaligned, strides negative, overlapping or overflowing.
 */
kvt_status kvt_view_make(const kvt_cache *cache, const kvt_tensor *tensor, const char *name,
                         uint64_t n_tokens, size_t n_heads, size_t dims, kvt_view *view);

/* Row (token, head) of a view to f32; 0 when an element is not finite. And back. */
int kvt_view_load(const kvt_kernels *kernels, const kvt_view *view, uint64_t token, size_t head,
                  size_t dims, float *row);
void kvt_view_store(const kvt_kernels *kernels, const kvt_view *view, uint64_t token, size_t head,
                    size_t dims, const float *row);

/* ---- parallel.c ---- */

/* Set up cache->executor: the caller's (may be NULL), else a pool for n_threads > 1. */
kvt_status kvt_parallel_create(kvt_cache *cache, const kvt_executor *executor, uint32_t n_threads);
void kvt_parallel_destroy(kvt_cache *cache);
/* task(arg, i) for each i < n, on the cache's executor or inline. */
void kvt_parallel_run(kvt_cache *cache, void (*task)(void *arg, size_t i), void *arg, size_t n);
/* Whether n_threads > 1 works without an executor. */
int kvt_parallel_has_pool(void);

/* ---- attend.c ---- */

/* Scratch that the one-call attend of a cache of this geometry keeps. */
size_t kvt_attend_scratch_bytes(const kvt_group *groups, uint32_t n_groups, uint64_t max_tokens,
                                uint32_t n_threads);

/* ---- dispatch.c, cpu.c ---- */

/* Fill the table for a name of kvt_isa_name (NULL: the widest); 0 when there is none here. */
int kvt_dispatch(const char *isa, kvt_kernels *kernels);

/* Whether this CPU has what a table needs, with the registers saved by the system. */
#if defined(__x86_64__)
int kvt_cpu_has_avx2(void);       /* AVX2, FMA and F16C */
int kvt_cpu_has_avxvnni(void);    /* and AVX-VNNI */
int kvt_cpu_has_avx512vnni(void); /* AVX-512 F, BW, DQ, VL and VNNI */
int kvt_cpu_has_amx(void);        /* and AMX int8, which this process may use from now on */
#elif defined(__aarch64__)
int kvt_cpu_has_dotprod(void);
int kvt_cpu_has_i8mm(void);
#endif

#endif /* KVT_INTERNAL_H */
