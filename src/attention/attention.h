/*
 * One unit of an attend call: what plan.c plans, and unit.c computes.
 *
 * The rows of one (item, kv head) are its queries times the heads of the group: row r is query
 * r / group, head r % group. They are cut into chunks of at most KVT_ROWS_MAX rows, whole
 * queries where a group fits; a unit is (item, kv head, chunk). K and V are read once a unit.
 * A decode step has few rows a unit: then several kv heads are walked together (a bundle).
 */
#ifndef KVT_ATTENTION_H
#define KVT_ATTENTION_H

#include "src/cache/cache.h"
#include "src/tensor.h"

/* Query heads of a kv head. */
static inline size_t kvt_group_size(const kvt_group *group)
{
    return group->config.n_q_heads / group->config.n_kv_heads;
}

/* Result of a range, or of all: accumulators, maxima and sums of a unit's rows. */
typedef struct kvt_part {
    float *acc; /* [rows][v_dims] */
    float *m, *l;
} kvt_part;

typedef struct kvt_unit {
    const kvt_cache *cache;
    const kvt_group *group;
    const kvt_attend_args *args;
    const kvt_attend_item *item;
    size_t first_query; /* of the item in q and out */
    size_t layer_index;
    uint32_t group_index;
    size_t kv_head;
    size_t first_row, rows;
    uint64_t n_tokens;    /* that the layer holds */
    uint64_t least, most; /* tokens that its first row and its last row see */
    float scale;
    float *q, *scores;  /* [rows][k_dims] in the stored domain, [rows][64] */
    float *alpha, *add; /* [rows] each */
    void *packed;       /* q as the integer kernels take it */
    /* V in K only: a block's V, its offset in the stored domain, and the rows' sums of weights */
    void *transposed;
    float *offset; /* [v_dims] */
    float *weights;
} kvt_unit;

/* What became of a unit. */
typedef enum kvt_outcome {
    KVT_UNIT_DONE,
    KVT_UNIT_BAD_QUERY, /* q is not finite */
    KVT_UNIT_OVERFLOWED /* something computed from it is not */
} kvt_outcome;

/* Tokens from the first on that a row sees; a mask takes some of them out again. */
uint64_t kvt_unit_visible(const kvt_unit *u, size_t row);
/* q of the unit's rows, in the stored domain, and packed for integer products. */
kvt_outcome kvt_unit_load(const kvt_unit *u, const kvt_view *q);
/*
 * A softmax of its own over the tokens of one range, for a bundle of units: consecutive kv heads
 * for the same queries of the same item. A block is walked head by head, in the order of memory.
 */
void kvt_units_range(const kvt_unit *units, size_t n_units, size_t range, const kvt_part *outs);
/* Merge the result of a later range into that of the earlier ones. */
void kvt_unit_merge(const kvt_unit *u, kvt_part into, kvt_part from);
/* Divide, add the sinks, and hand the rows to the caller. 0: a row has left the range of f32. */
int kvt_unit_store(const kvt_unit *u, kvt_part result, const kvt_view *out);

/* ---- plan.c ---- */

/* Scratch that the one-call attend of a cache of this geometry keeps. */
size_t kvt_attend_scratch_bytes(const kvt_group *groups, uint32_t n_groups, uint64_t max_tokens,
                                uint32_t n_threads);

#endif /* KVT_ATTENTION_H */
