/*
 * The tasks of a plan, and finish.
 *
 * A task is a stretch of all units' ranges (cut.c): it merges as it walks and stores what it has
 * whole. Of a unit that begins in one task and goes on in others, the first leaves its merged
 * result, the others one result for each range, and finish merges those. The ranges of a shared
 * prefix (prefix.c) are those of several items' rows: first the shared ones of all rows at once,
 * then each item's own, merged into its rows, in the same order as if it were alone.
 */
#include <math.h>

#include "src/attention/scratch.h"
#include "src/fpenv.h"

/* Set up a unit but for its item and rows, which are there, and lay its memory into the slice. */
static void set_unit(const kvt_attend_plan *plan, float *slice, kvt_unit *u)
{
    const kvt_attend_args *args = &plan->args_;
    const kvt_group *group = kvt_group_of(plan->cache_, args->layer);
    const kvt_layout *layout = kvt_scratch_layout(group);
    size_t group_rows = kvt_group_size(group);

    u->cache = plan->cache_;
    u->group = group;
    u->args = args;
    u->group_index = plan->cache_->layers[args->layer].group;
    u->layer_index = plan->cache_->layers[args->layer].index;
    u->n_tokens = kvt_seq_visible(u->item->seq, args->layer);
    u->least = kvt_unit_visible(u, 0);
    u->most = kvt_unit_visible(u, u->rows - 1);
    u->sight = kvt_sight_of(group, u->item, u->n_tokens, u->first_row / group_rows,
                            (u->first_row + u->rows - 1) / group_rows, u->most);
    u->scale = args->scale > 0.0f ? args->scale : 1.0f / sqrtf((float)group->config.k_dim);
    u->q = slice;
    u->scores = u->q + u->rows * layout->k_dims;
    u->alpha = u->scores + u->rows * KVT_TOKENS;
    u->add = u->alpha + kvt_small_floats(u->rows);
    u->packed = u->add + kvt_small_floats(u->rows);
    u->transposed = (unsigned char *)u->packed + kvt_packed_bytes(u->rows, layout->k_dims);
    u->offset = (float *)u->transposed + layout->transposed_bytes / sizeof(float);
    u->weights = u->offset + layout->v_dims;
}

/* Unit i of a plan, of an item for itself; the walk goes there. */
static void unit_at(const kvt_attend_plan *plan, kvt_walk *walk, size_t i, float *slice,
                    kvt_unit *u)
{
    size_t size = kvt_group_size(kvt_group_of(plan->cache_, plan->args_.layer)), chunks, rows;

    kvt_walk_to(walk, i);
    u->item = &plan->args_.items[walk->item];
    u->first_query = walk->query;
    chunks = kvt_item_chunks(u->item, size);
    i -= walk->unit;
    u->kv_head = i / chunks;
    u->first_row = i % chunks * kvt_chunk_rows(size);
    rows = (size_t)u->item->n_queries * size - u->first_row;
    u->rows = rows < kvt_chunk_rows(size) ? rows : kvt_chunk_rows(size);
    set_unit(plan, slice, u);
}

static kvt_part part_at(const kvt_unit *u, float *memory)
{
    size_t floats = u->rows * kvt_scratch_layout(u->group)->v_dims;
    return (kvt_part){memory, memory + floats, memory + floats + u->rows};
}

/* The total of a unit (0) and a range's result (1): they lie behind its working memory. */
static kvt_part result_at(const kvt_unit *u, float *slice, size_t j)
{
    const kvt_layout *layout = kvt_scratch_layout(u->group);
    return part_at(u,
                   slice + kvt_work_floats(layout, u->rows) + j * kvt_part_floats(layout, u->rows));
}

/* Where the working memory of task i begins: behind its mark. */
static float *slice_at(const kvt_attend_plan *plan, void *scratch, size_t i)
{
    return (float *)(void *)((unsigned char *)scratch + i * plan->slice_bytes_ + KVT_MARK_BYTES);
}

static void make_views(const kvt_attend_plan *plan, kvt_view *q, kvt_view *out)
{
    const kvt_group_config *config = &kvt_group_of(plan->cache_, plan->args_.layer)->config;
    uint64_t n = 0;
    for (size_t i = 0; i < plan->args_.n_items; i++)
        n += plan->args_.items[i].n_queries;
    kvt_view_make(plan->cache_, &plan->args_.q, "q", n, config->n_q_heads, config->k_dim, q);
    kvt_view_make(plan->cache_, &plan->args_.out, "out", n, config->n_q_heads, config->v_dim, out);
}

/* Floats of a slice that are one unit's of a bundle. */
static size_t unit_floats(const kvt_attend_plan *plan)
{
    return (plan->slice_bytes_ - KVT_MARK_BYTES) / sizeof(float) / plan->bundle_;
}

/*
 * Where a task leaves the result of its j-th range of a unit that an earlier task began: from the
 * end of the unit's part of the slice on, where no later unit of the task, though it have more
 * rows, comes.
 */
static kvt_part tail_at(const kvt_attend_plan *plan, const kvt_unit *u, float *slice, size_t j)
{
    size_t floats = kvt_part_floats(kvt_scratch_layout(u->group), u->rows);
    return part_at(u, slice + unit_floats(plan) - (j + 1) * floats);
}

/* Ranges from.range to end of a bundle; what an earlier task began is left for finish. */
static kvt_outcome run_bundle(const kvt_attend_plan *plan, kvt_walk *walk, float *slice,
                              kvt_cut from, size_t end, const kvt_view *q, const kvt_view *out)
{
    kvt_unit units[KVT_BUNDLE_MAX];
    kvt_part totals[KVT_BUNDLE_MAX], parts[KVT_BUNDLE_MAX];
    size_t n = plan->bundle_, ranges, i = 0;
    kvt_outcome what;

    do {
        float *own = slice + i * unit_floats(plan);
        unit_at(plan, walk, from.unit + i, own, &units[i]);
        totals[i] = result_at(&units[i], own, 0);
        parts[i] = result_at(&units[i], own, 1);
        what = kvt_unit_load(&units[i], q);
        if (what != KVT_UNIT_DONE)
            return what;
    } while (++i < n);
    ranges = units[0].sight.ranges;
    if (from.range > 0) {
        for (size_t range = from.range; range < ranges && range < end; range++) {
            for (i = 0; i < n; i++)
                parts[i] =
                    tail_at(plan, &units[i], slice + i * unit_floats(plan), range - from.range);
            what = kvt_units_range(units, n, range, parts);
            if (what != KVT_UNIT_DONE)
                return what;
        }
        return KVT_UNIT_DONE;
    }
    what = kvt_units_range(units, n, 0, totals);
    for (size_t range = 1; what == KVT_UNIT_DONE && range < ranges && range < end; range++) {
        what = kvt_units_range(units, n, range, parts);
        for (i = 0; what == KVT_UNIT_DONE && i < n; i++)
            kvt_unit_merge(&units[i], totals[i], parts[i]);
    }
    if (what != KVT_UNIT_DONE)
        return what;
    if (end < ranges)
        return KVT_UNIT_DONE;
    for (i = 0; i < n; i++)
        if (!kvt_unit_store(&units[i], totals[i], out))
            return KVT_UNIT_OVERFLOWED;
    return KVT_UNIT_DONE;
}

/* ---- shared prefixes ---- */

/* A unit of items with a shared prefix. */
typedef struct shared_unit {
    const kvt_attend_plan *plan;
    const kvt_walk *walk; /* which is there */
    float *slice;
    size_t kv_head;
    kvt_unit all; /* the rows of all items, over the ranges that they share */
    kvt_unit own; /* those of one item, over its own; its memory is that of all */
    size_t item;  /* which one; n_items: none */
    size_t row;   /* its first in all */
} shared_unit;

static void shared_at(const kvt_attend_plan *plan, kvt_walk *walk, size_t i, float *slice,
                      shared_unit *s)
{
    kvt_unit *u = &s->all;
    kvt_walk_to(walk, i);
    *s = (shared_unit){.plan = plan, .walk = walk, .slice = slice, .kv_head = i - walk->unit};
    s->item = walk->prefix.n_items;
    u->item = &plan->args_.items[walk->item];
    u->first_query = walk->query;
    u->kv_head = s->kv_head;
    u->rows = walk->prefix.rows;
    set_unit(plan, slice, u);
    u->least = u->most = (uint64_t)walk->prefix.shared * KVT_RANGE_TOKENS;
    u->sight = kvt_sight_of(u->group, u->item, u->n_tokens, 0, 0, u->most);
}

static void own_at(shared_unit *s, size_t item)
{
    size_t size = kvt_group_size(s->all.group);
    kvt_unit *u = &s->own;
    *u = (kvt_unit){.first_query = s->walk->query, .kv_head = s->kv_head};
    u->item = &s->plan->args_.items[s->walk->item];
    s->row = 0;
    for (s->item = 0; s->item < item; s->item++, u->item++) {
        s->row += (size_t)u->item->n_queries * size;
        u->first_query += (size_t)u->item->n_queries;
    }
    u->rows = (size_t)u->item->n_queries * size;
    set_unit(s->plan, s->slice, u);
}

/* The unit of a step, and its rows of a result of all. */
static kvt_unit *step_unit(shared_unit *s, kvt_step step, kvt_part *part)
{
    size_t dims = kvt_scratch_layout(s->all.group)->v_dims;
    if (step.item == s->walk->prefix.n_items)
        return &s->all;
    if (step.item != s->item)
        own_at(s, step.item);
    *part = (kvt_part){part->acc + s->row * dims, part->m + s->row, part->l + s->row};
    return &s->own;
}

/* Store the items whose last step is among from .. to - 1: their results are whole. */
static kvt_outcome store_whole(shared_unit *s, size_t from, size_t to, kvt_part total,
                               const kvt_view *out)
{
    for (size_t i = 0; i < s->walk->prefix.n_items; i++) {
        kvt_part part = total;
        size_t end = s->walk->prefix.ends[i];
        if (end > from && end <= to &&
            !kvt_unit_store(step_unit(s, (kvt_step){i, 0}, &part), part, out))
            return KVT_UNIT_OVERFLOWED;
    }
    return KVT_UNIT_DONE;
}

/* As run_bundle: steps from.range .. end - 1. */
static kvt_outcome run_shared(const kvt_attend_plan *plan, kvt_walk *walk, float *slice,
                              kvt_cut from, size_t end, const kvt_view *q, const kvt_view *out)
{
    const kvt_unit *loaded = NULL;
    size_t loaded_item = 0, base;
    shared_unit s;
    kvt_part total;

    shared_at(plan, walk, from.unit, slice, &s);
    end = end < kvt_prefix_steps(&walk->prefix) ? end : kvt_prefix_steps(&walk->prefix);
    base = kvt_prefix_base(&walk->prefix, from.range, end);
    total = result_at(&s.all, slice, 0);
    for (size_t i = from.range; i < end; i++) {
        kvt_step step = kvt_prefix_step(&walk->prefix, i);
        kvt_part into = total, part = result_at(&s.all, slice, 1);
        kvt_unit *u;
        kvt_outcome what;
        if (from.range > 0)
            part = tail_at(plan, &s.all, slice, step.range - base);
        else if (i == 0)
            part = total;
        u = step_unit(&s, step, &part);
        if (u != loaded || step.item != loaded_item) {
            what = kvt_unit_load(u, q);
            if (what != KVT_UNIT_DONE)
                return what;
            loaded = u;
            loaded_item = step.item;
        }
        what = kvt_units_range(u, 1, step.range, &part);
        if (what != KVT_UNIT_DONE)
            return what;
        if (from.range == 0 && i > 0)
            kvt_unit_merge(step_unit(&s, step, &into), into, part);
    }
    return from.range > 0 ? KVT_UNIT_DONE : store_whole(&s, 0, end, total, out);
}

static kvt_outcome merge_shared(const kvt_attend_plan *plan, kvt_walk *walk, float *slice,
                                float *other, kvt_cut from, size_t end, const kvt_view *out)
{
    shared_unit s;
    kvt_part total;
    size_t base;

    shared_at(plan, walk, from.unit, slice, &s);
    base = kvt_prefix_base(&walk->prefix, from.range, end);
    total = result_at(&s.all, slice, 0);
    for (size_t i = from.range; i < end; i++) {
        kvt_step step = kvt_prefix_step(&walk->prefix, i);
        kvt_part into = total, part = tail_at(plan, &s.all, other, step.range - base);
        step_unit(&s, step, &part);
        kvt_unit_merge(step_unit(&s, step, &into), into, part);
    }
    return store_whole(&s, from.range, end, total, out);
}

/* ---- tasks ---- */

static kvt_outcome run_unit(const kvt_attend_plan *plan, kvt_walk *walk, float *slice, kvt_cut from,
                            size_t end, const kvt_view *q, const kvt_view *out)
{
    kvt_walk_to(walk, from.unit);
    return (walk->prefix.shared ? run_shared : run_bundle)(plan, walk, slice, from, end, q, out);
}

static kvt_outcome run_cut(const kvt_attend_plan *plan, kvt_walk *walk, float *slice, kvt_cut from,
                           kvt_cut to, const kvt_view *q, const kvt_view *out)
{
    kvt_outcome what = KVT_UNIT_DONE;
    while (what == KVT_UNIT_DONE && from.unit < to.unit) {
        what = run_unit(plan, walk, slice, from, SIZE_MAX, q, out);
        from = (kvt_cut){from.unit + plan->bundle_, 0, 0};
    }
    if (what == KVT_UNIT_DONE && from.unit == to.unit && from.range < to.range)
        what = run_unit(plan, walk, slice, from, to.range, q, out);
    return what;
}

/* Merge what a task has of a bundle that task `head` began; the last of them stores it. */
static kvt_outcome merge_tail(const kvt_attend_plan *plan, kvt_walk *walk, unsigned char *scratch,
                              size_t head, size_t task, kvt_cut from, kvt_cut to,
                              const kvt_view *out)
{
    size_t n = kvt_cut_tail(from, to);
    kvt_walk_to(walk, from.unit);
    if (walk->prefix.shared)
        return merge_shared(plan, walk, slice_at(plan, scratch, head),
                            slice_at(plan, scratch, task), from, from.range + n, out);
    for (size_t i = 0; i < plan->bundle_; i++) {
        float *slice = slice_at(plan, scratch, head) + i * unit_floats(plan);
        float *other = slice_at(plan, scratch, task) + i * unit_floats(plan);
        kvt_part total;
        kvt_unit u;
        unit_at(plan, walk, from.unit + i, slice, &u);
        total = result_at(&u, slice, 0);
        for (size_t j = 0; j < n; j++)
            kvt_unit_merge(&u, total, tail_at(plan, &u, other, j));
        if (from.range + n == from.ranges && !kvt_unit_store(&u, total, out))
            return KVT_UNIT_OVERFLOWED;
    }
    return KVT_UNIT_DONE;
}

static kvt_status check_plan(const kvt_attend_plan *plan, const void *scratch, const char *call)
{
    if (!plan || !plan->cache_)
        return KVT_ERR_ARG;
    if (!scratch || (uintptr_t)scratch % 64)
        return kvt_fail(plan->cache_, KVT_ERR_ARG, "%s: scratch is NULL or not at a multiple of 64",
                        call);
    return KVT_OK;
}

static kvt_status report(const kvt_attend_plan *plan, kvt_outcome what)
{
    if (what == KVT_UNIT_DONE)
        return KVT_OK;
    return kvt_fail(plan->cache_, KVT_ERR_VALUE, "kvt_attend: layer %u: %s", plan->args_.layer,
                    what == KVT_UNIT_BAD_QUERY ? "q is not finite"
                                               : "a logit or a sum is beyond the range of f32");
}

kvt_status kvt_attend_task(kvt_attend_plan *plan, void *scratch, size_t i)
{
    kvt_status status = check_plan(plan, scratch, "kvt_attend_task");
    kvt_view q, out;
    kvt_cutter cutter;
    kvt_walk walk;
    kvt_cut from, to;
    kvt_fpenv saved;
    kvt_outcome what;

    if (status != KVT_OK)
        return status;
    if (i >= plan->n_tasks)
        return kvt_fail(plan->cache_, KVT_ERR_ARG, "kvt_attend_task: task %zu of %zu", i,
                        plan->n_tasks);
    make_views(plan, &q, &out);
    kvt_cutter_begin(&cutter, plan);
    from = kvt_cutter_next(&cutter, i);
    walk = cutter.walk;
    to = kvt_cutter_next(&cutter, i + 1);
    saved = kvt_fpenv_enter();
    what = run_cut(plan, &walk, slice_at(plan, scratch, i), from, to, &q, &out);
    kvt_fpenv_leave(saved);
    if (what != KVT_UNIT_DONE)
        __atomic_store_n(&plan->status_, KVT_ERR_VALUE, __ATOMIC_RELAXED);
    memcpy((unsigned char *)scratch + i * plan->slice_bytes_, &plan->id_, sizeof plan->id_);
    return report(plan, what);
}

kvt_status kvt_attend_finish(kvt_attend_plan *plan, void *scratch)
{
    kvt_status status = check_plan(plan, scratch, "kvt_attend_finish");
    kvt_outcome what = KVT_UNIT_DONE;
    kvt_cutter cutter;
    kvt_walk walk;
    kvt_cut from, to;
    kvt_fpenv saved;
    kvt_view q, out;
    size_t head = 0;

    if (status != KVT_OK)
        return status;
    if (plan->status_ != KVT_OK) /* some tasks may not have run, then */
        return (kvt_status)plan->status_;
    if (plan->flags_ & KVT_PLAN_FINISHED)
        return kvt_fail(plan->cache_, KVT_ERR_STATE,
                        "kvt_attend_finish: this plan has been finished already");
    for (size_t i = 0; i < plan->n_tasks; i++)
        if (memcmp((unsigned char *)scratch + i * plan->slice_bytes_, &plan->id_,
                   sizeof plan->id_) != 0)
            return kvt_fail(plan->cache_, KVT_ERR_STATE,
                            "kvt_attend_finish: task %zu of %zu has not run with this scratch", i,
                            plan->n_tasks);
    plan->flags_ |= KVT_PLAN_FINISHED;
    if (plan->split_ == UINT64_MAX)
        return KVT_OK;
    make_views(plan, &q, &out);
    kvt_cutter_begin(&cutter, plan);
    walk = cutter.walk;
    from = kvt_cutter_next(&cutter, 0);
    saved = kvt_fpenv_enter();
    for (size_t i = 0; i < plan->n_tasks && what == KVT_UNIT_DONE; i++, from = to) {
        to = kvt_cutter_next(&cutter, i + 1);
        if (from.range > 0)
            what = merge_tail(plan, &walk, scratch, head, i, from, to, &out);
        if (from.unit != to.unit || from.range == 0)
            head = i; /* a unit that the next task ends in begins here */
    }
    kvt_fpenv_leave(saved);
    if (what != KVT_UNIT_DONE)
        plan->status_ = KVT_ERR_VALUE;
    return report(plan, what);
}
