/*
 * Working memory of a task, of which a plan knows the size and a task the places.
 *
 * A slice of a plan's scratch is a mark, then for each unit of a bundle: the unit's working memory
 * (kvt_unit), its total, the result of a range, and from the end on the results of ranges that
 * finish merges.
 */
#ifndef KVT_ATTENTION_SCRATCH_H
#define KVT_ATTENTION_SCRATCH_H

#include "src/attention/attention.h"

/* kv heads that are walked together at most, and their rows. */
#define KVT_BUNDLE_MAX 8

/* A slice begins with its plan's id once its task has run: finish looks for it. */
#define KVT_MARK_BYTES 64

static inline const kvt_group *kvt_group_of(const kvt_cache *cache, uint32_t layer)
{
    return &cache->groups[cache->layers[layer].group];
}

/* The form whose scratch serves both: they differ in a transposed block of V alone. */
static inline const kvt_layout *kvt_scratch_layout(const kvt_group *group)
{
    return &group->layouts[group->seals ? KVT_OPEN : KVT_SEALED];
}

/* Floats of a kvt_part. */
static inline size_t kvt_part_floats(const kvt_layout *layout, size_t rows)
{
    return kvt_round_up(rows * layout->v_dims + 2 * rows, 16);
}

/* Working memory of a unit, each part at a multiple of 64 bytes: see kvt_unit. */
static inline size_t kvt_small_floats(size_t rows)
{
    return kvt_round_up(rows, 16);
}

/* What V in K needs beside it. */
static inline size_t kvt_transposed_floats(const kvt_layout *layout, size_t rows)
{
    if (!layout->transposed_bytes)
        return 0;
    return layout->transposed_bytes / sizeof(float) +
           (layout->k_offset_bytes ? layout->v_dims + kvt_small_floats(rows) : 0);
}

static inline size_t kvt_work_floats(const kvt_layout *layout, size_t rows)
{
    return rows * layout->k_dims + rows * KVT_TOKENS + 2 * kvt_small_floats(rows) +
           kvt_packed_bytes(rows, layout->k_dims) / sizeof(float) +
           kvt_transposed_floats(layout, rows);
}

#endif /* KVT_ATTENTION_SCRATCH_H */
