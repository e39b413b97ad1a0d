/*
 * One unit of an attend call: what plan.c plans, task.c runs and unit.c computes.
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

/* Rows of a chunk: whole queries, or a part of one query's group. */
static inline size_t kvt_chunk_rows(size_t group)
{
    return group < KVT_ROWS_MAX ? KVT_ROWS_MAX / group * group : KVT_ROWS_MAX;
}

/* Rows of a unit of this item at most. */
static inline size_t kvt_item_rows(const kvt_attend_item *item, size_t group)
{
    size_t chunk = kvt_chunk_rows(group);
    return item->n_queries < chunk / group + 1 && item->n_queries * group < chunk
               ? (size_t)item->n_queries * group
               : chunk;
}

static inline size_t kvt_item_chunks(const kvt_attend_item *item, size_t group)
{
    size_t chunk = kvt_chunk_rows(group);
    return (size_t)((item->n_queries * group + chunk - 1) / chunk);
}

/* ---- sight.c ---- */

/* What of a row (a block of 64 tokens) the rows of a unit see; causal rule and masks apart. */
typedef enum kvt_sees {
    KVT_SEES_NONE,
    KVT_SEES_SOME, /* some row does not see some token: scores are masked */
    KVT_SEES_ALL
} kvt_sees;

/*
 * What a sliding window leaves of a sequence for consecutive queries of an item. Rows of the block
 * table that may be in sight: 0 .. sink_rows - 1, then first_row .. end_row - 1. The ranges that
 * these are in are numbered 0 .. ranges - 1: those of the sinks, then those from first_range on.
 */
typedef struct kvt_sight {
    const kvt_seq *seq;
    int64_t behind;                          /* no query sees positions up to this one, */
    int64_t ahead;                           /* and every query those above this one; sinks apart */
    uint64_t sink_tokens, most;              /* most: what the causal rule leaves the last query */
    size_t sink_rows, first_row, end_row;    /* first_row is sink_rows or more */
    size_t sink_ranges, first_range, ranges; /* ranges: at least 1 */
} kvt_sight;

/* The position of a query of an item over n_tokens tokens: given, or its token's. */
int32_t kvt_query_position(const kvt_attend_item *item, uint64_t n_tokens, uint64_t query);
/* Of queries first to last of an item over n_tokens tokens, of which the last sees `most`. */
kvt_sight kvt_sight_of(const kvt_group *group, const kvt_attend_item *item, uint64_t n_tokens,
                       uint64_t first, uint64_t last, uint64_t most);
/* Of a row below end_row. */
kvt_sees kvt_sight_sees(const kvt_sight *sight, size_t row);
/* The first row from `row` on that is in sight; end_row: there is none. */
size_t kvt_sight_next(const kvt_sight *sight, size_t row);

/* KVT_RANGE_TOKENS' number of a range in sight. */
static inline size_t kvt_sight_range(const kvt_sight *sight, size_t range)
{
    return range < sight->sink_ranges ? range : range - sight->sink_ranges + sight->first_range;
}

/* Whether a query at `position` has a token in its window or among the sinks. */
static inline int kvt_in_window(const kvt_group *group, int32_t position, uint64_t token,
                                int32_t token_position)
{
    return token < group->sink_tokens || group->window_tokens == UINT64_MAX ||
           (int64_t)position - token_position < (int64_t)group->window_tokens;
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
    kvt_sight sight;
    float scale;
    const kvt_view *view; /* the caller's q */
    int32_t shift;        /* q is turned for keys that have moved by so much */
    int unsound;          /* turning q left the range of f32 */
    float *q, *scores;    /* [rows][k_dims] in the stored domain, [rows][64] */
    float *alpha, *add;   /* [rows] each */
    void *packed;         /* q as the integer kernels take it */
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
kvt_outcome kvt_unit_load(kvt_unit *u, const kvt_view *q);
/*
 * A softmax of its own over the tokens of one range, for a bundle of units: consecutive kv heads
 * for the same queries of the same item. A block is walked head by head, in the order of memory.
 * range: of those in sight. KVT_UNIT_OVERFLOWED: turning q for keys that have moved left the range
 * of f32, and outs are unspecified.
 */
kvt_outcome kvt_units_range(kvt_unit *units, size_t n_units, size_t range, const kvt_part *outs);
/* Merge the result of a later range into that of the earlier ones. */
void kvt_unit_merge(const kvt_unit *u, kvt_part into, kvt_part from);
/* Divide, add the sinks, and hand the rows to the caller. 0: a row has left the range of f32. */
int kvt_unit_store(const kvt_unit *u, kvt_part result, const kvt_view *out);

/* ---- prefix.c ---- */

/*
 * Consecutive items whose tables begin with the same blocks. The first `shared` ranges they attend
 * over together: a unit for each kv head, whose rows are those of all of them, one item's after the
 * other's. Then come each item's own ranges, item by item. All of these ranges are the unit's
 * steps, in this order. shared 0: an item for itself.
 */
typedef struct kvt_prefix {
    size_t shared, n_items, rows;
    size_t ends[KVT_ROWS_MAX]; /* of each item: its last step, and one more */
} kvt_prefix;

/* A step: a range of an item of the prefix, or (n_items) of all of them. */
typedef struct kvt_step {
    size_t item, range;
} kvt_step;

/* Whether two neighbours among the items share a range. */
int kvt_prefix_exists(const kvt_cache *cache, const kvt_attend_args *args);
/* That begins with this item. */
void kvt_prefix_find(const kvt_cache *cache, const kvt_attend_args *args, size_t first,
                     kvt_prefix *prefix);
kvt_step kvt_prefix_step(const kvt_prefix *prefix, size_t step);
static inline size_t kvt_prefix_steps(const kvt_prefix *prefix)
{
    return prefix->ends[prefix->n_items - 1];
}
/*
 * Room for the results of steps from .. to - 1, in parts of all rows: an item's own ranges lie in
 * its rows, so that range r of any item is in part r - base.
 */
size_t kvt_prefix_base(const kvt_prefix *prefix, size_t from, size_t to);
size_t kvt_prefix_slots(const kvt_prefix *prefix, size_t from, size_t to);

/* Goes through the items of a call, those with a shared prefix at once. */
typedef struct kvt_walk {
    const kvt_cache *cache;
    const kvt_attend_args *args;
    int shares;               /* prefixes are looked for */
    size_t item, unit, query; /* where it is: the first of each */
    size_t units;             /* how many are there */
    kvt_prefix prefix;        /* shared 0: nothing else of it is set */
} kvt_walk;

void kvt_walk_begin(kvt_walk *walk, const kvt_cache *cache, const kvt_attend_args *args,
                    int shares);
void kvt_walk_next(kvt_walk *walk);
/* Forward to where a unit is. */
static inline void kvt_walk_to(kvt_walk *walk, size_t unit)
{
    while (unit >= walk->unit + walk->units)
        kvt_walk_next(walk);
}

/* ---- cut.c ---- */

/* What a call has to do. Work is in tokens times rows, about. */
typedef struct kvt_work {
    size_t rows;      /* of the largest unit */
    size_t units;     /* (item, kv head, chunk) */
    size_t ranges;    /* of all units, or some more */
    uint64_t sum;     /* work of all units */
    uint64_t longest; /* of one unit, at most */
    uint64_t piece;   /* of one range, at most */
    int one_chunk;    /* every item's rows of a kv head are one unit, of this item alone */
} kvt_work;

/* kvt_attend_plan.flags_ */
#define KVT_PLAN_SHARES 1u   /* shared prefixes are attended over together */
#define KVT_PLAN_FINISHED 2u /* finish has merged what tasks have left */

/* 0: more work than can be counted. shares: shared prefixes are attended over together. */
int kvt_work_measure(const kvt_cache *cache, const kvt_attend_args *args, int shares,
                     kvt_work *work);
/* The same for one query of all heads over n_tokens tokens. */
kvt_work kvt_work_one_query(const kvt_group *group, uint64_t n_tokens);
/* Tokens of an item that a unit reads, on average over its chunks. */
uint64_t kvt_work_tokens(const kvt_cache *cache, const kvt_attend_args *args, size_t item);

/*
 * Where a task begins: a unit, the first of a bundle, and a range of it, of those in sight (of a
 * shared prefix: a step). ranges: how many the unit has; 0 for a range 0 that is an earlier unit's
 * end.
 */
typedef struct kvt_cut {
    size_t unit, range, ranges;
} kvt_cut;

/* Finds cuts of a plan in ascending order. */
typedef struct kvt_cutter {
    const kvt_attend_plan *plan;
    kvt_walk walk; /* where the last cut was found */
    uint64_t work; /* of the items before */
} kvt_cutter;

void kvt_cutter_begin(kvt_cutter *cutter, const kvt_attend_plan *plan);
/* Where task i begins, and task i - 1 ends; i up to n_tasks. */
kvt_cut kvt_cutter_next(kvt_cutter *cutter, size_t i);
/* Ranges that a task has of a unit which an earlier task began: finish merges them. */
size_t kvt_cut_tail(kvt_cut from, kvt_cut to);
/* The most parts that a task leaves for finish: one for each range, or as kvt_prefix_slots says. */
size_t kvt_cut_longest_tail(const kvt_attend_plan *plan);

/* ---- check.c ---- */

/* Whether a call can be planned: the errors of kvt_attend, with their texts. */
kvt_status kvt_attend_check(const kvt_cache *cache, const kvt_attend_args *args);

/* ---- plan.c ---- */

/* Scratch that the one-call attend of a cache of this geometry keeps. */
size_t kvt_attend_scratch_bytes(const kvt_group *groups, uint32_t n_groups, uint64_t max_tokens,
                                uint32_t n_threads);

#endif /* KVT_ATTENTION_H */
