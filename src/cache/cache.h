/*
 * The cache and its sequences: the structures behind the public handles, and the functions that
 * the files of this folder offer. attention/ and snapshot/ read them; nothing here knows of those.
 *
 * Files, each of which may use those before it: geometry.c (layouts, rotation), blocks.c (blocks
 * and their free lists), mapping.c (blocks in a mapped file), cache.c (the handle), border.c (keys
 * of a step that crosses token 64), rows.c (a sequence's block table), reserve.c, checkpoint.c,
 * window.c (what is out of sight), turns.c (keys that have moved), stats.c, sequence.c (steps),
 * fork.c (sequences that share blocks), open.c (tokens into open blocks), seal.c (these into sealed
 * ones), reopen.c (and back), append.c, select.c (a commit of some of a step's tokens), remove.c
 * (tokens out of the middle), read.c and convert.c (blocks of other types). src/create.c makes a
 * cache.
 */
#ifndef KVT_CACHE_H
#define KVT_CACHE_H

#include <assert.h>
#include <stddef.h>

#include "simd/kernels.h"
#include "src/memory.h"
#include "src/parallel.h"

/* ---- geometry ---- */

/*
 * A block of a group is in one of four forms (docs/design.md, "Open and sealed blocks"). Sealed:
 * as the group's types say. Open: the sides that the group stores as i8, i4 or i5 are f16 rows in
 * the stored domain, each with a scale. Fine: sealed, with i8 on the sides that are i4 or i5, as
 * the first blocks of a sequence are. Reopened: open, with K's seed (reopen.c), where a truncate
 * has cut a sealed block of 4-bit K. Groups of f32 and f16 know the first only. The numbers are
 * the snapshot format's representations.
 */
enum { KVT_SEALED = 0, KVT_OPEN = 1, KVT_FINE = 2, KVT_REOPENED = 3, KVT_FORMS = 4 };

/* Whether blocks of a form hold f16 rows. */
static inline int kvt_is_open(uint32_t form)
{
    return form == KVT_OPEN || form == KVT_REOPENED;
}

/*
 * Whether a row of one form may be behind one of another (released: as sealed): sealed ones come
 * first, and all are sealed before one that is open again, since only the last row is ever cut. So
 * there is one of those at most. Files and stored values have to be so, too.
 */
static inline int kvt_form_follows(uint32_t before, uint32_t form)
{
    return !kvt_is_open(before) || form == KVT_OPEN;
}

/* Scales of open rows: of most of them, and a sign that says that a row is another (open.c). */
#define KVT_F16_ONE 0x3c00u
#define KVT_F16_MINUS 0x8000u

/* Whether a type is one that blocks are sealed for. */
static inline int kvt_is_sealed_type(kvt_type type)
{
    return type == KVT_TYPE_I8 || type == KVT_TYPE_I4 || type == KVT_TYPE_I5;
}

/* Whether a type has 4 or 5 bits, which the first blocks of a sequence have 8 of. */
static inline int kvt_is_coarse(kvt_type type)
{
    return type == KVT_TYPE_I4 || type == KVT_TYPE_I5;
}

/* How a side of a type is stored in a form. */
static inline kvt_type kvt_type_in(kvt_type type, uint32_t form)
{
    if (kvt_is_open(form) && kvt_is_sealed_type(type))
        return KVT_TYPE_F16;
    return form == KVT_FINE && kvt_is_coarse(type) ? KVT_TYPE_I8 : type;
}

/* Where a head's parts lie in its record, and the sizes up to a block. See simd/tile.h. */
typedef struct kvt_layout {
    kvt_type k_type, v_type;  /* of the codes in this form */
    size_t k_dims, v_dims;    /* padded to a multiple of 16 */
    size_t k_codes, k_scales; /* offsets into a head's record */
    size_t k_offset, k_seed;
    size_t v_scales, v_codes;
    size_t k_code_bytes, v_code_bytes;                   /* of the 64 tokens of a head */
    size_t k_scale_bytes, v_scale_bytes, k_offset_bytes; /* 0 where the side has none */
    size_t k_seed_bytes;
    size_t head_bytes;       /* record of a head: a multiple of 64 */
    size_t layer_bytes;      /* n_kv_heads records */
    size_t block_bytes;      /* n_layers layers */
    size_t transposed_bytes; /* V in K: a block's V of one head in the order of V; else 0 */
} kvt_layout;

/* A signed Hadamard transform of a side: docs/numerics.md, "Rotation". */
typedef struct kvt_rotation {
    float *signs; /* of kv head h at signs + h * stride, +-1 each; set at creation */
    size_t stride;
    size_t block;  /* dims transformed together: a power of two; 0: no rotation */
    float scale;   /* of K or V; a power of two, as the other, and their product is 1 / block */
    float inverse; /* of q, and of the way back */
} kvt_rotation;

typedef struct kvt_group {
    kvt_group_config config; /* its pointers are NULL: kvt_cache.layers, rope_frequencies */
    kvt_layout layouts[KVT_FORMS];
    uint32_t seals;   /* a side is i8, i4 or i5: blocks are open first */
    uint32_t offsets; /* K is, and has an offset */
    uint32_t reopens; /* K is i4: blocks that a truncate has cut are open again */
    size_t fine_rows; /* rows that are sealed as KVT_FINE */
    uint32_t v_in_k;  /* V is K's first dims: there are no V codes and scales */
    uint64_t residual_tokens;
    uint64_t window_tokens; /* UINT64_MAX: no window */
    uint64_t sink_tokens;
    kvt_rotation rotation_k, rotation_v; /* V in K: v's is k's */
    float *rope_frequencies;             /* [config.rope_dims / 2]; config's own pointer is NULL */
} kvt_group;

/* A layer's group and its place in the group's blocks. */
typedef struct kvt_layer {
    uint32_t group;
    uint32_t index;
} kvt_layer;

/* ---- blocks ---- */

#define KVT_BLOCK_ID_BYTES 16

/*
 * 64 tokens of one class. Class g < n_groups: sealed keys and values of group g. Class n_groups:
 * positions and token ids of the 64 tokens (kvt_meta). Class n_groups + 1 + g: open keys and values
 * of group g; class 2 * n_groups + 1 + g: fine ones; class 3 * n_groups + 1 + g: reopened ones.
 * The header and the data are one allocation; data begins at a multiple of 64 bytes. Of a block of
 * a mapping (kvt_mapping) the header is the mapping's; the data lies in the file, and is never
 * written.
 */
typedef struct kvt_block {
    _Alignas(64) unsigned char *data; /* 64 bytes in all where pointers are shorter, too */
    /*
     * Open: the sealed form of its 64 tokens, if a sequence has one in force; sealed: the open
     * block that it is the sealed form of. Neither is a reference. Guarded by the cache's lock.
     */
    struct kvt_block *twin;
    union {
        struct kvt_block *next; /* in a list of free or spare blocks: id_tokens is 0 there */
        unsigned char id[KVT_BLOCK_ID_BYTES]; /* see kvt_block_id; under the cache's lock */
    };
    struct kvt_mapping *mapping; /* NULL: the data follows; never changed */
    union {
        uint64_t visit;         /* see seen */
        struct kvt_block *lent; /* the next one: kvt_rows_lend; no other sequence has it */
    };
    uint32_t id_tokens;   /* tokens that the id is of; 0: it is not known */
    uint32_t references;  /* of block tables and checkpoints; 0 in a free list */
    uint32_t seen;        /* of them, by kvt_seq_get_stats; visit, too, under the cache's lock */
    uint16_t class_index; /* below KVT_MAX_CLASSES */
    uint8_t form;         /* KVT_SEALED, ... */
    uint8_t flags;        /* KVT_BLOCK_, for an undo of its kvt_block_get */
} kvt_block;

#define KVT_BLOCK_IS_NEW 1u       /* it has never been in a free list */
#define KVT_BLOCK_IS_READ_INTO 2u /* since it was got, bytes that are not verified */

_Static_assert(sizeof(kvt_block) == 64, "a block's data begins at a multiple of 64 bytes");

/*
 * Positions and token ids of a row's tokens, and bounds, by which attention with a window leaves
 * rows out. The bounds are exact where all 64 tokens are there; after a truncate or an abort those
 * of the last row may cover tokens that are no longer there.
 */
typedef struct kvt_meta {
    int32_t positions[KVT_TOKENS];
    int32_t token_ids[KVT_TOKENS];
    int32_t lowest, highest; /* of the row's positions */
    int32_t reach;           /* the highest position in this row and those before it */
    /*
     * By how much the positions were higher when the keys were computed (kvt_seq_remove): of all
     * tokens, or KVT_SHIFT_MIXED.
     */
    int32_t shift;
    int32_t shifts[KVT_TOKENS]; /* by token; only where the groups' RoPE is described */
} kvt_meta;

#define KVT_SHIFT_MIXED INT32_MIN

static inline int32_t kvt_shift_at(const kvt_meta *meta, size_t slot)
{
    return meta->shift == KVT_SHIFT_MIXED ? meta->shifts[slot] : meta->shift;
}

/*
 * Whether a block with the caller's reference is the caller's alone, to be written or used again.
 * With the cache's lock held.
 */
static inline int kvt_block_is_own_locked(const kvt_block *block)
{
    return block->references == 1 && !block->mapping;
}

#define KVT_MAX_CLASSES (KVT_FORMS * KVT_MAX_GROUPS + 1)

/* ---- cache ---- */

struct kvt_cache {
    kvt_heap heap;        /* the first member: see memory.h */
    pthread_mutex_t lock; /* guards references (also of blocks, and their twins), the free lists
                             and the numbers of blocks; held shortly */
    uint64_t references;  /* the handle and the sequences */
    uint64_t n_visits;    /* calls of kvt_seq_get_stats */

    uint64_t max_tokens;
    size_t max_rows; /* blocks of max_tokens */
    uint32_t n_groups, n_layers;
    uint32_t moves;     /* the groups' RoPE is described: positions can move */
    uint32_t n_classes; /* KVT_FORMS * n_groups + 1: of blocks */
    uint32_t n_columns; /* 2 * n_groups + 1: of a block table */
    kvt_group groups[KVT_MAX_GROUPS];
    kvt_layer *layers;                   /* [n_layers] */
    size_t class_bytes[KVT_MAX_CLASSES]; /* of a block's data */
    kvt_block *free_blocks[KVT_MAX_CLASSES];
    size_t n_free_blocks[KVT_MAX_CLASSES];
    size_t n_used_blocks[KVT_MAX_CLASSES];   /* that sequences have, spare ones included, but none
                                                of a mapping, here and below */
    size_t n_shared_blocks[KVT_MAX_CLASSES]; /* of these: with several references */
    size_t n_spare_blocks[KVT_MAX_CLASSES];  /* of n_used_blocks; atomic */
    struct kvt_mapping *unused_mappings;     /* to be closed: see kvt_block_unlock */

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
 * The forms of a sequence's blocks of one group that seals. Rows (blocks of 64 tokens) in order:
 *
 *   0 .. n_final - 1           sealed, for good
 *   n_final .. n_sealed - 1    sealed; the open form is kept beside, until the next begin
 *   n_sealed .. seal_end - 1   a step is pending that seals them: open, with the sealed form
 *                              beside, or, where no truncate to come can need it, sealed at once
 *   from seal_end on           open
 *
 * A row is sealed by the step with which all its tokens become older than the last
 * residual_tokens. What a sequence shows therefore depends on its length alone, not on the steps
 * that led there. The open form of the last 64 tokens' worth of such rows is kept until the next
 * begin: a truncate before it takes the sealing back.
 */
typedef struct kvt_seq_group {
    size_t n_final, n_sealed, seal_end;
    /*
     * With a window: rows kvt_sink_rows .. first - 1 have no block of the group, because no query
     * to come can see them. Any other group, or nothing released: 0.
     */
    size_t first;
} kvt_seq_group;

/* Rows that a window leaves: those of the sinks, and row 0, whose offset later rows take. */
static inline size_t kvt_sink_rows(const kvt_group *group)
{
    uint64_t rows = (group->sink_tokens + KVT_TOKENS - 1) / KVT_TOKENS;
    return rows == 0 && group->offsets ? 1 : (size_t)rows;
}

static inline int kvt_has_window(const kvt_group *group)
{
    return group->window_tokens != UINT64_MAX;
}

/* How many rows are full of tokens older than the last `residual` of n_tokens. */
static inline size_t kvt_rows_older(uint64_t n_tokens, uint64_t residual)
{
    return n_tokens > residual ? (size_t)((n_tokens - residual) / KVT_TOKENS) : 0;
}

/* Tokens that a truncate may take back without a trace, if it comes before the next begin. */
#define KVT_DRAFT_TOKENS 64
/* Tokens that a truncate may take back where a window releases blocks: see window.c. */
#define KVT_WINDOW_SLACK (2 * KVT_DRAFT_TOKENS)

/*
 * A sequence as it was when it had n_tokens tokens, as far as its table may have lost it since:
 * checkpoint.c. Never changed once made; forks share it.
 */
typedef struct kvt_checkpoint kvt_checkpoint;

/*
 * What q is turned by for the shifts that keys of a sequence have: cosines and sines of shift times
 * the groups' inverse frequencies. Made by kvt_seq_remove.
 */
typedef struct kvt_turns {
    size_t bytes; /* of this structure and all behind it */
    size_t n;
    size_t at[KVT_MAX_GROUPS];     /* in floats[], of a group's first turn */
    size_t stride[KVT_MAX_GROUPS]; /* from one turn to the next: rope_dims, cosines before sines */
    int32_t *shifts;               /* [n], ascending */
    float *floats;
} kvt_turns;

/*
 * Row r of the table holds tokens 64 r .. 64 r + 63. It has a column for each class of blocks:
 * column g is what is in force of group g, sealed or open; column n_groups the positions; column
 * n_groups + 1 + g the other form of group g's block, where it is kept beside (kvt_seq_group), else
 * NULL. Rows 0 .. n_rows - 1 have their blocks in force, but for those that a window has released
 * (kvt_seq_group.first); the others have none. n_rows covers length + pending.
 *
 * Each entry is a reference to its block. A block with one reference belongs to the sequence; one
 * with more, or of a mapping, is never written: begin copies the row that it writes into (fork.c).
 */
struct kvt_seq {
    kvt_cache *cache;
    uint64_t length;     /* committed tokens */
    uint64_t pending;    /* tokens of the pending step, 0: none */
    uint64_t step;       /* number of begins: tells plans of an earlier step */
    uint32_t n_appended; /* layers that have the pending tokens */
    uint32_t reserves;   /* kvt_seq_reserve was called: blocks stay with the sequence */
    uint8_t *appended;   /* [n_layers] */
    size_t n_rows;
    kvt_block **table; /* [max_rows][n_columns] */
    kvt_seq_group groups[KVT_MAX_GROUPS];
    kvt_block *spare[KVT_MAX_CLASSES]; /* reserved, and not in use */
    size_t n_spare[KVT_MAX_CLASSES];
    kvt_block *lent;              /* those of them that a load or a get uses: see kvt_rows_lend */
    uint64_t exempt_bytes;        /* of its open blocks: see account() */
    kvt_turns *turns;             /* NULL: no key has moved */
    kvt_checkpoint **checkpoints; /* [checkpoint_room], n_checkpoints of them, by tokens */
    size_t n_checkpoints, checkpoint_room;
    int32_t next_position; /* of the next token where the caller has set it, else -1 */
    /*
     * Numbers from this token on depend on more than the tokens before them, their positions and
     * the cache's types, so that kvt_prefix_put has no keys for them: kvt_seq_remove has taken out
     * tokens before them, or they were converted, or cut off from their beginning. UINT64_MAX:
     * none.
     */
    uint64_t unkeyed_from;
    uint32_t tag_bytes;
    unsigned char tag[KVT_MAX_TAG];
    float *border; /* [border_bytes] see border.c; NULL: none */
    size_t border_bytes;
    uint32_t n_border;       /* tokens of the pending step whose keys are there */
    uint32_t border_counted; /* of a reserve: held against the budget, and stays */
    uint32_t has_mapped;     /* the table or a checkpoint may have blocks of a mapping */
    uint8_t verified[KVT_MAX_LAYERS / 8]; /* a bit a layer: all such blocks in force are; atomic */
};

static inline kvt_block **kvt_seq_entry(const kvt_seq *seq, size_t row, uint32_t column)
{
    assert(column < seq->cache->n_columns);
    return &seq->table[row * seq->cache->n_columns + column];
}

static inline kvt_block *kvt_seq_block(const kvt_seq *seq, size_t row, uint32_t column)
{
    assert(row < seq->n_rows);
    return *kvt_seq_entry(seq, row, column);
}

static inline kvt_meta *kvt_seq_meta(const kvt_seq *seq, size_t row)
{
    return (kvt_meta *)(void *)kvt_seq_block(seq, row, seq->cache->n_groups)->data;
}

/* The column of the form that a row has beside the one in force. */
static inline uint32_t kvt_beside(const kvt_cache *cache, uint32_t group)
{
    return cache->n_groups + 1 + group;
}

/* Tokens of a row, the pending ones included. */
static inline size_t kvt_row_tokens(const kvt_seq *seq, size_t row)
{
    uint64_t n = seq->length + seq->pending - (uint64_t)row * KVT_TOKENS;
    return n < KVT_TOKENS ? (size_t)n : KVT_TOKENS;
}

/* The layout of a group's block. */
static inline const kvt_layout *kvt_block_layout(const kvt_group *group, const kvt_block *block)
{
    return &group->layouts[block->form];
}

/* A head's record: see simd/tile.h. */
static inline unsigned char *kvt_head_record(const kvt_group *group, const kvt_block *block,
                                             size_t layer_index, size_t kv_head)
{
    const kvt_layout *layout = kvt_block_layout(group, block);
    assert(layer_index < group->config.n_layers && kv_head < group->config.n_kv_heads);
    return block->data + layer_index * layout->layer_bytes + kv_head * layout->head_bytes;
}

/* A block's class. */
static inline uint32_t kvt_class_of(const kvt_cache *cache, uint32_t column, uint32_t form)
{
    return form == KVT_SEALED ? column : form * cache->n_groups + 1 + column;
}

/* The form of a row that is sealed. */
static inline uint32_t kvt_sealed_form(const kvt_group *group, size_t row)
{
    return row < group->fine_rows ? KVT_FINE : KVT_SEALED;
}

/* The group of a block, which is none of positions. */
static inline const kvt_group *kvt_group_of_block(const kvt_cache *cache, const kvt_block *block)
{
    uint32_t c = block->class_index;
    return &cache->groups[c < cache->n_groups ? c : (c - 1) % cache->n_groups];
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
/* Of f32 and f16; 1 of all others. */
size_t kvt_element_bytes(kvt_type type);
/* Bits of an element's code. */
size_t kvt_type_bits(kvt_type type);
/* Rows of a group that are sealed as KVT_FINE, of its config. */
size_t kvt_fine_rows(kvt_type k_type, kvt_type v_type, uint32_t fine_tokens);
/* Whether a block of it passes what pointers can address. Of a config that has been checked. */
int kvt_group_is_too_wide(const kvt_group_config *config);
/* Layout and transforms of a group whose config has been checked and that is not too wide. signs is
   left NULL. */
void kvt_group_make(const kvt_group_config *config, kvt_group *group);
/* Bytes of rope_frequencies. */
size_t kvt_group_rope_bytes(const kvt_group *group);
/* The rotations' signs: bytes, and their values, given the memory. */
size_t kvt_group_signs_bytes(const kvt_group *group);
void kvt_group_fill_signs(kvt_group *group, float *signs);

/* ---- blocks.c ---- */

/* Bytes of one block of a class, its header included. */
size_t kvt_block_bytes(const kvt_cache *cache, uint32_t class_index);
/*
 * One block of a class with one reference, from the free list or new. A recycled block holds old
 * bytes. Where the budget or the allocator refuses, the free blocks of all classes are given back
 * and it is tried once more.
 */
kvt_status kvt_block_get(kvt_cache *cache, uint32_t class_index, kvt_block **block);
/* Drop a reference; the last one puts the block into the free list. NULL is fine. */
void kvt_block_put(kvt_cache *cache, kvt_block *block);
/* Drop a reference; the last one gives the memory back to the allocator. NULL is fine. */
void kvt_block_free(kvt_cache *cache, kvt_block *block);
/* Undo a kvt_block_get: to where it came from, the free list or the allocator. NULL is fine. */
void kvt_block_undo(kvt_cache *cache, kvt_block *block);
/*
 * Bytes that are not verified yet will be read into a block that was got: an undo clears it. A
 * block in a free list has zeros where it never holds a number, as snapshots have.
 */
static inline void kvt_block_will_be_read(kvt_block *block)
{
    block->flags |= KVT_BLOCK_IS_READ_INTO;
}

/* With the cache's lock held: one more reference; one less (kvt_block_put): unlock as below. */
void kvt_block_refer_locked(kvt_cache *cache, kvt_block *block);
void kvt_block_put_locked(kvt_cache *cache, kvt_block *block);
/* Give up the cache's lock; then close the mappings that have lost their last block under it. */
void kvt_block_unlock(kvt_cache *cache);
/*
 * With the cache's lock held: a block is about to be written. It is its twin's form no longer, and
 * its id is not known.
 */
void kvt_block_part_locked(kvt_block *block);
/* Whether a block has no reference but the caller's, which then nobody else can change. */
int kvt_block_is_own(kvt_cache *cache, const kvt_block *block);

/*
 * A block's id (docs/format.md, "Blocks") names its contents with a number of tokens. It is a hash
 * of all its bytes, so a block keeps it once it has been computed, until one of them may change.
 *
 * 1: it is known for so many tokens.
 */
int kvt_block_id(kvt_cache *cache, const kvt_block *block, uint32_t tokens, unsigned char *id);
/*
 * Keep it. tokens: 1 to 64. The block is in force in a table, or in a checkpoint, and nobody writes
 * into these tokens meanwhile. One id is kept: the one for another number of tokens is lost.
 */
void kvt_block_set_id(kvt_cache *cache, kvt_block *block, uint32_t tokens, const unsigned char *id);

/* Memory of the cache; where there is none, once more without free blocks. */
kvt_status kvt_block_memory(kvt_cache *cache, size_t bytes, const char *what, void **memory);
/* The first n_tokens tokens of a block, of all layers, into a block of the same class. */
void kvt_block_copy(kvt_cache *cache, const kvt_block *from, size_t n_tokens, kvt_block *to);
/* Free every block in the free lists. */
void kvt_blocks_trim(kvt_cache *cache);

/* ---- mapping.c: blocks whose data lies in a mapped file ---- */

/*
 * The data of its blocks is read only, and is trusted only once it has been verified: a layer of a
 * block at a time, when a call is about to read it. What the caller of kvt_mapping_create sets:
 */
typedef struct kvt_mapping {
    kvt_cache *cache;
    /*
     * KVT_OK, or KVT_ERR_CORRUPT where the bytes of a layer of the block are not what they were,
     * with the cache's error text set. Called by any thread, also for the same layer at once;
     * without the cache's lock.
     */
    kvt_status (*verify)(struct kvt_mapping *mapping, const kvt_block *block, uint32_t layer_index);
    /* All blocks are gone, and the references: called once, without a lock. May be NULL. */
    void (*close)(struct kvt_mapping *mapping);
    void *user;
    /* What mapping.c has: */
    struct kvt_mapping *next; /* in a list of those to be closed */
    uint64_t references;      /* the creator's, and the blocks in use; under the cache's lock */
    size_t bytes;             /* of this structure and all behind it */
    size_t n_blocks, layers;  /* layers: of a block, at most */
    kvt_block *blocks;        /* [n_blocks] */
    uint8_t *states;          /* [n_blocks][layers], atomic */
} kvt_mapping;

/*
 * A mapping with room for n_blocks blocks, and one reference. Its memory is counted, but not held
 * against the budget. KVT_ERR_MEMORY, KVT_ERR_LIMIT.
 */
kvt_status kvt_mapping_create(kvt_cache *cache, size_t n_blocks, kvt_mapping **made);
/*
 * Make block i, once, with one reference, which kvt_block_put drops. data: at a multiple of 64,
 * there until `close`. verified: all layers are.
 */
kvt_block *kvt_mapping_block(kvt_mapping *mapping, size_t i, uint32_t class_index,
                             const unsigned char *data, int verified);
/* The number of one of its blocks. */
static inline size_t kvt_mapping_index(const kvt_mapping *mapping, const kvt_block *block)
{
    return (size_t)(block - mapping->blocks);
}
/* Of its blocks in use. */
uint64_t kvt_mapping_used_bytes(const kvt_mapping *mapping);
/* Drop the creator's reference. The mapping stays for as long as one of its blocks is in use. */
void kvt_mapping_put(kvt_mapping *mapping);
/* With the cache's lock held: one reference less, the creator's or that of a block in use. */
void kvt_mapping_drop_locked(kvt_mapping *mapping);

/* A layer of a block, if it is one of a mapping: as `verify`. A layer is verified once. */
kvt_status kvt_block_verify(const kvt_block *block, uint32_t layer_index);
/* Of all layers of a group: the blocks in force in rows from .. to - 1. */
kvt_status kvt_seq_verify_rows(const kvt_seq *seq, uint32_t g, size_t from, size_t to);
/* Of one layer: the blocks in force in rows from .. to - 1; in all rows. */
kvt_status kvt_seq_verify_some(const kvt_seq *seq, uint32_t layer, size_t from, size_t to);
kvt_status kvt_seq_verify_layer(const kvt_seq *seq, uint32_t layer);
/*
 * Blocks came into force that are another table's or a checkpoint's. (An open block that is beside
 * its sealed form was verified by the begin of the step that sealed it.)
 */
void kvt_seq_unverified(kvt_seq *seq);

/* ---- cache.c ---- */

/* Drop one reference; the last one frees the cache. */
void kvt_cache_release(kvt_cache *cache);
/* Free a cache, complete or not, and all that it holds. */
void kvt_cache_free(kvt_cache *cache);

/* ---- border.c: keys of a step that fills block 0 and goes on ---- */

/* Before a step of n_tokens tokens: memory for its keys from token 64 on, where it needs some. */
kvt_status kvt_border_begin(kvt_seq *seq, uint64_t n_tokens);
/* The step has ended, or has not begun. */
void kvt_border_end(kvt_seq *seq);
/* Memory for any step beyond token 64, which stays; held against the budget. Between steps. */
kvt_status kvt_border_reserve(kvt_seq *seq);
/* Give the memory up. */
void kvt_border_release(kvt_seq *seq);
/* The pending step's keys of a layer and head from token 64 on: [n_border][k_dim]; NULL: none. */
float *kvt_border_keys(const kvt_seq *seq, uint32_t group, size_t layer_index, size_t kv_head);

/* ---- rows.c: the rows of a sequence's block table ---- */

/*
 * Blocks for a step of n_tokens tokens: rows for them, and sealed blocks for those that become old
 * with it. All of them, or none and an error: KVT_ERR_MEMORY, KVT_ERR_BUDGET.
 */
kvt_status kvt_rows_begin(kvt_seq *seq, uint64_t n_tokens);
/* Fewer of the step's tokens are committed, to n_tokens: what it seals beyond that is given up. */
void kvt_rows_seal_less(kvt_seq *seq, uint64_t n_tokens);
/* The step has been committed, and seq->length says so: what it has sealed is in force. */
void kvt_rows_commit(kvt_seq *seq);
/* Before a truncate to n_tokens: blocks that would not be sealed at that length are open again. */
void kvt_rows_revert(kvt_seq *seq, uint64_t n_tokens);
/* Give back the rows from n_rows on, and what a pending step was to seal. */
void kvt_rows_shrink(kvt_seq *seq, size_t n_rows);
/*
 * The states of the groups of a table that has only blocks in force, of n_rows rows: what is sealed
 * is so for good, and a group with a window begins behind the sinks where it has blocks.
 */
void kvt_rows_state(kvt_seq *seq);
/*
 * Give up all that the sequence has, and take what another one has, which is no handle: length,
 * table (copied), states, checkpoints, next position.
 */
void kvt_rows_replace(kvt_seq *seq, const kvt_seq *with);
/*
 * A block for what is to replace the sequence's contents: of those that it has reserved, else as
 * kvt_block_get, and undone by kvt_block_undo. While it is lent the sequence keeps a reference.
 * Several threads of one call may take some.
 */
kvt_status kvt_rows_lend(kvt_seq *seq, uint32_t class_index, kvt_block **block);
/*
 * When all is placed or undone: what is not in use is a spare one again. is_replaced: the contents
 * are new ones; then the sequence has no more blocks in all than before.
 */
void kvt_rows_settle(kvt_seq *seq, int is_replaced);
/*
 * An empty sequence gets the first n_tokens committed tokens of another one, all its blocks shared;
 * kvt_rows_charge has to follow.
 */
void kvt_rows_share(const kvt_seq *from, uint64_t n_tokens, kvt_seq *to);
/*
 * The blocks in force of each column's rows from[column] .. on become the sequence's own, with all
 * their tokens; from: [n_groups + 1], n_rows: none. On an error of memory none does.
 */
kvt_status kvt_rows_own(kvt_seq *seq, const size_t *from);
/* Take rows from .. to - 1 out of the table; those behind move up. Tokens and bounds are not. */
void kvt_rows_cut(kvt_seq *seq, size_t from, size_t to);
/* Give back the blocks of a group in rows from .. to - 1, which are sealed for good. */
void kvt_rows_drop(kvt_seq *seq, uint32_t g, size_t from, size_t to);
/*
 * The sequence becomes what the checkpoint has kept; the tokens before that are there. At its own
 * length too: a step that was aborted may have opened the last row again, and has ended the time in
 * which a sealing can be taken back. The next position is the caller's to set.
 */
void kvt_rows_restore(kvt_seq *seq, const kvt_checkpoint *checkpoint);
/* Hold open blocks that are no longer the sequence's alone against the budget: KVT_ERR_BUDGET. */
kvt_status kvt_rows_charge(kvt_seq *seq);
/* Copy the blocks of the last row, where it is not full, that are shared. KVT_ERR_ of memory. */
kvt_status kvt_rows_own_last(kvt_seq *seq);
/* Give up all blocks, reserved ones included. */
void kvt_rows_release(kvt_seq *seq);

/* ---- window.c ---- */

/* Whether all that a sequence of its first n_tokens tokens needs is in its table. */
int kvt_window_reaches(const kvt_seq *seq, uint64_t n_tokens);
/* The same of group g alone. */
int kvt_window_group_reaches(const kvt_seq *seq, uint32_t g, uint64_t n_tokens);
/*
 * Whether a sequence that is loaded, or a checkpoint of it, of n_tokens tokens may lack what it
 * does. It may have gone on at positions farther back than those that windows were released for.
 */
int kvt_window_suffices(const kvt_seq *seq, uint64_t n_tokens);
/* The lowest position of a query of a sequence of n_tokens - slack to n_tokens tokens. */
int64_t kvt_lowest_query(const kvt_seq *seq, uint64_t n_tokens, uint64_t slack);
/*
 * kvt_seq_group.first of a group that has been in this state at n_tokens tokens, if only what is in
 * sight for n_tokens - slack tokens and more is to be there: at least state->first.
 */
size_t kvt_window_first(const kvt_seq *seq, uint32_t g, const kvt_seq_group *state,
                        uint64_t n_tokens, uint64_t slack);
/* Give back what no query to come can see, nor one after a truncate by KVT_WINDOW_SLACK. */
void kvt_window_release(kvt_seq *seq);
/*
 * The length at which a sequence with the positions 0, 1, 2, ... releases the first row of a group
 * behind the sinks: a step of one token to it still has all rows. UINT64_MAX without a window.
 */
uint64_t kvt_window_full(const kvt_group *group);

/* ---- checkpoint.c ---- */

struct kvt_checkpoint {
    uint64_t references; /* of sequences; under the cache's lock */
    uint64_t n_tokens;
    size_t bytes; /* of this structure, blocks and blob included */
    size_t blob_bytes;
    size_t n_blocks;
    int32_t next_position;
    kvt_seq_group groups[KVT_MAX_GROUPS];
    size_t from[KVT_MAX_GROUPS + 1]; /* by column: rows from here on are kept */
    /*
     * By columns: of rows from[c] .. kvt_rows(n_tokens) - 1 the blocks in force, then (groups only)
     * those beside. Then the blob.
     */
    kvt_block *blocks[];
};

/*
 * Memory for a checkpoint of n_tokens tokens with one reference, that keeps the rows from[column]
 * and those behind; it has no blocks yet, and no blob. KVT_ERR_LIMIT: its size overflows.
 */
kvt_status kvt_checkpoint_new(kvt_cache *cache, uint64_t n_tokens, const size_t *from,
                              uint64_t blob_bytes, kvt_checkpoint **made);
/* Drop a reference; the last one frees it. NULL is fine. */
void kvt_checkpoint_put(kvt_cache *cache, kvt_checkpoint *checkpoint);
/* The blocks of a column in a checkpoint: in force, and as many beside behind them. */
static inline kvt_block **kvt_checkpoint_blocks(kvt_checkpoint *checkpoint, uint32_t column)
{
    size_t at = 0;
    for (uint32_t c = 0; c < column; c++)
        at += 2 * (kvt_rows(checkpoint->n_tokens) - checkpoint->from[c]);
    return checkpoint->blocks + at;
}

/* Its blob. */
unsigned char *kvt_checkpoint_blob(kvt_checkpoint *checkpoint);
/* Room for one more in a sequence's list. */
kvt_status kvt_checkpoints_make_room(kvt_seq *seq);
/* The checkpoint at n_tokens, or NULL. */
const kvt_checkpoint *kvt_checkpoint_at(const kvt_seq *seq, uint64_t n_tokens);
/* Drop those at n_tokens tokens and behind. */
void kvt_checkpoints_drop_from(kvt_seq *seq, uint64_t n_tokens);
/* The last checkpoint at n_tokens tokens or before, or NULL. */
const kvt_checkpoint *kvt_checkpoint_before(const kvt_seq *seq, uint64_t n_tokens);
/* A new sequence gets those of another one up to n_tokens. */
kvt_status kvt_checkpoints_share(const kvt_seq *from, uint64_t n_tokens, kvt_seq *to);

/* ---- select.c ---- */

/*
 * Keys and values of tokens first + gap .. length - 1 move up by `gap`. All rows from first's on
 * are open, or of groups that do not seal, and the sequence's own.
 */
void kvt_rows_move_up(kvt_seq *seq, uint64_t first, uint64_t gap);
/*
 * Whether they can, before it: KVT_ERR_UNSUPPORTED where a key would be too large in a block with
 * another offset. The blocks need not be the sequence's own; mapped ones are verified.
 */
kvt_status kvt_rows_check_move_up(const kvt_seq *seq, uint64_t first, uint64_t gap);

/* ---- turns.c ---- */

/* The turn of a shift, for a group: [rope_dims / 2] cosines, then the sines. */
const float *kvt_turn_of(const kvt_turns *turns, uint32_t group, int32_t shift);
/*
 * Turns for all shifts that a sequence's keys have once those of tokens from `moved` on are delta
 * more, or some besides. NULL where there are none.
 */
kvt_status kvt_turns_make(const kvt_seq *seq, uint64_t moved, int32_t delta, kvt_turns **made);
/* Whether a key of tokens first .. first + n_tokens - 1 has moved. */
int kvt_turns_needed(const kvt_seq *seq, uint64_t first, uint64_t n_tokens);
kvt_status kvt_turns_copy(kvt_cache *cache, const kvt_turns *turns, kvt_turns **copy);
void kvt_turns_free(kvt_cache *cache, kvt_turns *turns);

/* ---- sequence.c ---- */

/* Bytes of an empty sequence. Uses the geometry only. */
uint64_t kvt_seq_own_bytes(const kvt_cache *cache);

/* Tokens that a layer holds: the pending ones count where the layer has them. */
uint64_t kvt_seq_visible(const kvt_seq *seq, uint32_t layer);

/* Set the bounds of a row of n tokens (1 to 64). before: the row before it; NULL for row 0. */
void kvt_meta_bound(kvt_meta *meta, size_t n, const kvt_meta *before);
/* The first n tokens of the pending step are committed, and their bounds are set. */
void kvt_seq_end_step(kvt_seq *seq, uint64_t n);
/* KVT_OK where a step is pending that all layers have; else KVT_ERR_STATE. */
kvt_status kvt_seq_check_appended(const kvt_seq *seq, const char *call);

/* ---- open.c ---- */

/* One side of a head's record of one form, or memory laid out like it. */
typedef struct kvt_record {
    void *codes;
    uint16_t *scales; /* NULL where the side has none */
    uint16_t *offset; /* of K; NULL where the group has none */
    uint16_t *seed;   /* of K in a reopened block, else NULL: see reopen.c */
} kvt_record;

/*
 * A seed: scales [dims_p], middles [dims_p], and the gains of the 64 tokens, 0 of those that have
 * not been 4-bit codes before.
 */
static inline uint8_t *kvt_seed_gains(uint16_t *seed, size_t dims_p)
{
    return (uint8_t *)(seed + 2 * dims_p);
}

/* Token t of a sealed record of 4-bit K: x[dims], with its gain and the middles. */
void kvt_k4_get(const kvt_kernels *kernels, const kvt_record *record, size_t t, size_t dims,
                size_t dims_p, float *x);

/* The gains of a sealed record of 4-bit K. */
static inline uint8_t *kvt_record_gains(const kvt_record *record, size_t dims_p)
{
    return (uint8_t *)(record->scales + kvt_k4_scales(dims_p));
}

/*
 * Middles of 4-bit K that are a part of what the gain multiplies: those of a bias that is large
 * beside the dim's own range would make the gain that of the bias.
 */
#define KVT_K4_ALONG 32.0f /* steps */

/* Of the memory of a head's record in a form. */
kvt_record kvt_record_at(const kvt_group *group, uint32_t form, kvt_side side,
                         unsigned char *memory);
/* Of a block, layer and head. */
kvt_record kvt_record_of(const kvt_group *group, const kvt_block *block, kvt_side side,
                         size_t layer_index, size_t kv_head);

/*
 * The largest magnitude in the stored domain that a side takes, by its type: scales fit f16. Of K
 * it is without the offset.
 */
#define KVT_I8_MAX 8.0e6f
#define KVT_K4_MAX 2.4e5f
#define KVT_V4_MAX 2.0e6f /* of 5 bits too */
static inline float kvt_largest(kvt_side side, kvt_type type)
{
    return !kvt_is_coarse(type) ? KVT_I8_MAX : side == KVT_SIDE_K ? KVT_K4_MAX : KVT_V4_MAX;
}

/*
 * The largest magnitude, code times scale, in a row of an open record in a form, whatever stored
 * it. A side is `type`; scale is the row's, and gain its gain in the seed of K.
 *
 * kvt_open_put: kvt_largest, as the f16 of it over its power of two is not above it. Other rows are
 * in blocks that are open again only (reopen.c): K's with a gain, below 12 * 65504 whatever the
 * sealed scales were, and V's, the largest code times a scale that may be any f16. Of those of 4
 * bits, whose scale is negative, that is the row's own scale.
 */
#define KVT_K4_BACK_MAX (12 * 65504.0f)
static inline float kvt_open_largest(kvt_side side, kvt_type type, uint32_t form, uint16_t scale,
                                     uint8_t gain)
{
    if (form != KVT_REOPENED)
        return kvt_largest(side, type);
    if (side == KVT_SIDE_K)
        return gain ? KVT_K4_BACK_MAX : kvt_largest(side, type);
    switch (type) {
    case KVT_TYPE_I4:
        return scale & KVT_F16_MINUS ? 63 * kvt_f16_to_f32(scale & (uint16_t)~KVT_F16_MINUS)
                                     : kvt_largest(side, type);
    case KVT_TYPE_I5: return 31 * 65504.0f;
    default: return 127 * 65504.0f;
    }
}

/*
 * Rows x[i * dims] of a side that is stored as i8, i4 or i5, in the stored domain, into slots slot
 * .. slot + n - 1 (one tile) of an open record. The rows may be changed. 0: a magnitude is above
 * kvt_largest or not a number.
 */
int kvt_open_put(const kvt_kernels *kernels, const kvt_group *group, kvt_side side, float *x,
                 size_t n, size_t dims, const kvt_record *to, size_t slot);
/*
 * A row of K that has been 4-bit codes. Its magnitudes may be above kvt_largest, by what the middle
 * and the scale were rounded by, and in a file that no kvtile wrote more: see kvt_open_largest.
 */
void kvt_open_put_back(const kvt_kernels *kernels, const kvt_group *group, float *x, size_t dims,
                       const kvt_record *to, size_t slot);

/* ---- seal.c ---- */

/*
 * One side of a full open record into one of a sealed form, KVT_SEALED or KVT_FINE. next: codes of
 * the open record that is to be sealed next, to be prefetched, or NULL.
 */
void kvt_seal(const kvt_kernels *kernels, const kvt_group *group, kvt_side side, uint32_t form,
              const kvt_record *open, const void *next, const kvt_record *sealed);

/*
 * Tokens from .. from + n - 1 (one tile) of an open record of a side that is stored as i8 into
 * slots slot .. slot + n - 1 (one tile) of a sealed one that has its offset already: tokens that go
 * into a sealed block which was truncated. form: KVT_SEALED or KVT_FINE; K is not i4. x: room for n
 * rows.
 */
void kvt_sealed_put(const kvt_kernels *kernels, const kvt_group *group, kvt_side side,
                    uint32_t form, const kvt_record *open, size_t from, size_t n, float *x,
                    const kvt_record *sealed, size_t slot);

/* The offset that an open record of K would have in a sealed form: f16, k_dims of them. */
void kvt_seal_offset(const kvt_kernels *kernels, const kvt_group *group, uint32_t form,
                     const kvt_record *record, uint16_t *offset);

/* ---- reopen.c ---- */

/*
 * The tokens of a row that a truncate has cut, whose block is sealed with K of 4 bits, into an open
 * block: the same numbers, K's but for the rounding to f16.
 */
void kvt_reopen(const kvt_seq *seq, uint32_t g, size_t row, kvt_block *open);

/* ---- read.c ---- */

/*
 * The token in a slot of a record of one form, as kvt_read gives it in f32: x[dims of the side].
 * V in K: side is K.
 */
void kvt_record_read(const kvt_kernels *kernels, const kvt_group *group, uint32_t form,
                     kvt_side side, size_t head, const kvt_record *record, size_t slot, float *x);

/* ---- convert.c ---- */

/*
 * Blocks of one group as those of another one with other types. Both have the same heads, dims,
 * seed and flags, but for KVT_GROUP_NO_OFFSET where K is i4 in one of them.
 *
 * The form that a block of `tokens` tokens of row `row` has in the other group. In a sequence or
 * checkpoint whose sealed rows come before the open ones they do so in these forms, too.
 */
uint32_t kvt_convert_form(const kvt_group *from_group, uint32_t form, const kvt_group *to_group,
                          size_t row, uint32_t tokens);
/* Bytes of the scratch memory that a conversion needs, of any alignment. */
size_t kvt_convert_bytes(const kvt_group *from_group, const kvt_group *to_group);
/*
 * One layer of a block: `from` has it in `form` of from_group (layer_bytes of that layout), `to`
 * gets it in to_form, which kvt_convert_form gives, of to_group. Both at multiples of 64 bytes, and
 * apart. All of `to` is written, with zeros for tokens and dims that are not there. Depends on
 * nothing but these bytes; the same on every instruction set.
 *
 * KVT_ERR_VALUE: a value is beyond what the other type can store; `to` is unspecified.
 */
kvt_status kvt_convert_layer(const kvt_kernels *kernels, const kvt_group *from_group, uint32_t form,
                             const unsigned char *from, uint32_t tokens, const kvt_group *to_group,
                             uint32_t to_form, unsigned char *to, void *scratch);

#endif /* KVT_CACHE_H */
