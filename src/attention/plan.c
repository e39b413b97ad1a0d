/*
 * Attention over the cache, in place: the plan, its tasks, and the call that does it all.
 *
 * For each range of KVT_RANGE_TOKENS tokens a unit (attention.h) runs an online softmax over the
 * range's blocks from scratch; the ranges are merged in ascending order. That order, and nothing
 * else, fixes the bits. A task is a stretch of all units' ranges (cut.c): it merges as it walks and
 * stores what it has whole. Of a unit that begins in one task and goes on in others, the first
 * leaves its merged result, the others one result for each range, and finish merges those.
 */
#include <math.h>

#include "src/attention/attention.h"
#include "src/fpenv.h"

/* kv heads that are walked together at most, and their rows. */
#define BUNDLE_MAX 8

/* ---- geometry of a call ---- */

static const kvt_group *group_of(const kvt_cache *cache, uint32_t layer)
{
    return &cache->groups[cache->layers[layer].group];
}

/* ---- scratch of a task ---- */

/* The form whose scratch serves both: they differ in a transposed block of V alone. */
static const kvt_layout *scratch_layout(const kvt_group *group)
{
    return &group->layouts[group->seals ? KVT_OPEN : KVT_SEALED];
}

/* A slice begins with its plan's id once its task has run: finish looks for it. */
#define MARK_BYTES 64

static size_t part_floats(const kvt_layout *layout, size_t rows)
{
    return kvt_round_up(rows * layout->v_dims + 2 * rows, 16);
}

/* Working memory of a unit, each part at a multiple of 64 bytes: see kvt_unit. */
static size_t small_floats(size_t rows)
{
    return kvt_round_up(rows, 16);
}

/* What V in K needs beside it. */
static size_t transposed_floats(const kvt_layout *layout, size_t rows)
{
    if (!layout->transposed_bytes)
        return 0;
    return layout->transposed_bytes / sizeof(float) +
           (layout->k_offset_bytes ? layout->v_dims + small_floats(rows) : 0);
}

static size_t work_floats(const kvt_layout *layout, size_t rows)
{
    return rows * layout->k_dims + rows * KVT_TOKENS + 2 * small_floats(rows) +
           kvt_packed_bytes(rows, layout->k_dims) / sizeof(float) + transposed_floats(layout, rows);
}

/* ---- plan ---- */

/* Floats of scratch of a unit that is walked whole: the total so far, and the range's result. */
static size_t whole_floats(const kvt_layout *layout, size_t rows)
{
    return work_floats(layout, rows) + 2 * part_floats(layout, rows);
}

/* Bytes of scratch of a task: for each unit of a bundle also the results of some ranges. */
static size_t slice_bytes(const kvt_layout *layout, size_t rows, size_t bundle, size_t tail)
{
    return MARK_BYTES +
           sizeof(float) * bundle * (whole_floats(layout, rows) + tail * part_floats(layout, rows));
}

/* Tasks a thread: enough to even out what threads, and the estimate of work, differ in. */
#define TASKS_A_THREAD 6

/*
 * How many kv heads are walked together: with one or two rows a head, reading in the order of
 * memory is worth more (one row: 15%) than what the heads take from each other in the first-level
 * cache; from four rows on it is not. piece: work of what of a unit cannot be cut; a bundle's is
 * no more than `share`. A divisor of the number of heads, so that a bundle does not cross items.
 */
static size_t bundle_of(const kvt_group *group, const kvt_work *work, uint64_t piece,
                        uint64_t share)
{
    size_t bundle = BUNDLE_MAX / work->rows;
    if (!work->one_chunk || work->rows > 2)
        return 1;
    while (bundle > 1 && (group->config.n_kv_heads % bundle || bundle * piece > share))
        bundle--;
    return bundle;
}

static void set_tasks(kvt_attend_plan *plan, const kvt_work *work, size_t n_tasks)
{
    size_t most = work->ranges / plan->bundle_;
    plan->n_tasks = n_tasks < most ? n_tasks : most;
}

static void set_slices(kvt_attend_plan *plan, const kvt_group *group, const kvt_work *work,
                       size_t tail)
{
    plan->slice_bytes_ = slice_bytes(scratch_layout(group), work->rows, plan->bundle_, tail);
    plan->scratch_bytes = plan->n_tasks * plan->slice_bytes_;
}

/*
 * Choose how many tasks there are, and in which units they may begin and end. Room for the results
 * of ranges grows with the units that are cut: where it passes the limit, fewer and longer ones
 * are, in the end none. work_, units_ and args_ are set.
 */
static void size_plan(kvt_attend_plan *plan, const kvt_group *group, const kvt_work *work,
                      size_t n_threads, size_t limit)
{
    uint64_t share = n_threads > 1 ? work->sum / (TASKS_A_THREAD * n_threads) : UINT64_MAX;
    size_t most;

    plan->bundle_ = bundle_of(group, work, work->piece, share);
    /* Units up to 1/4 of a task stay whole, then those up to a task. */
    for (uint64_t part = n_threads > 1 ? 4 : 0; part > 0; part = part == 4)
        for (size_t tasks = TASKS_A_THREAD; tasks >= 2; tasks--) {
            set_tasks(plan, work, tasks * n_threads);
            plan->split_ = work->sum / plan->n_tasks / part;
            set_slices(plan, group, work, kvt_cut_longest_tail(plan));
            if (plan->scratch_bytes <= limit)
                return;
        }
    plan->split_ = UINT64_MAX;
    plan->bundle_ = bundle_of(group, work, work->longest, share);
    if (slice_bytes(scratch_layout(group), work->rows, plan->bundle_, 0) > limit)
        plan->bundle_ = 1;
    set_tasks(plan, work, n_threads > 1 ? TASKS_A_THREAD * n_threads : 1);
    set_slices(plan, group, work, 0);
    if (plan->n_tasks > work->units / plan->bundle_) {
        plan->n_tasks = work->units / plan->bundle_;
        set_slices(plan, group, work, 0);
    }
    most = limit / plan->slice_bytes_; /* at least 1: see kvt_attend_scratch_bytes */
    if (plan->n_tasks > most) {
        plan->n_tasks = most;
        set_slices(plan, group, work, 0);
    }
}

/*
 * Enough for two tasks a thread that walk chunks of KVT_ROWS_MAX rows (more tasks where chunks are
 * smaller), and for one query of all heads, bundled or cut at ranges, of max_tokens but no
 * more than a million: beyond, sequences are cut into fewer tasks, or not.
 */
#define SPLIT_TOKENS ((uint64_t)1 << 20)

size_t kvt_attend_scratch_bytes(const kvt_group *groups, uint32_t n_groups, uint64_t max_tokens,
                                uint32_t n_threads)
{
    size_t most = 0;
    for (uint32_t g = 0; g < n_groups; g++) {
        const kvt_group *group = &groups[g];
        size_t bytes = (n_threads > 1 ? 2 * (size_t)n_threads : 1) *
                       slice_bytes(scratch_layout(group), KVT_ROWS_MAX, 1, 0);
        kvt_work work =
            kvt_work_one_query(group, max_tokens < SPLIT_TOKENS ? max_tokens : SPLIT_TOKENS);
        size_t tasks = n_threads > 1 ? TASKS_A_THREAD * (size_t)n_threads : 1, tail = 0;
        uint64_t share = n_threads > 1 ? work.sum / tasks : UINT64_MAX;
        kvt_attend_plan one_query = {.bundle_ = bundle_of(group, &work, work.piece, share)};
        set_tasks(&one_query, &work, tasks);
        if (n_threads > 1) { /* an end is moved by half a range at most */
            size_t all = work.ranges / work.units - 1;
            tail = (size_t)(work.sum / one_query.n_tasks / (work.piece * one_query.bundle_)) + 1;
            tail = tail < all ? tail : all;
        }
        set_slices(&one_query, group, &work, tail);
        bytes = one_query.scratch_bytes > bytes ? one_query.scratch_bytes : bytes;
        most = bytes > most ? bytes : most;
    }
    return most;
}

/*
 * About how long one thread takes: picoseconds for a row's token (its softmax), for reading an
 * element of K or V, and for multiplying it for a row. Measured with i8 on AVX-512 VNNI; where
 * kernels are slower, calls that take longer by as much stay on one thread.
 */
#define PICOSECONDS_TOKEN 3000
#define PICOSECONDS_READ 8
#define PICOSECONDS_ROW 4

static uint64_t estimate_nanoseconds(const kvt_cache *cache, const kvt_attend_args *args)
{
    const kvt_group *group = group_of(cache, args->layer);
    const kvt_layout *layout = scratch_layout(group);
    double picoseconds = 0, dims = (double)(layout->k_dims + layout->v_dims);
    for (size_t i = 0; i < args->n_items; i++) {
        const kvt_attend_item *item = &args->items[i];
        double tokens = (double)kvt_work_tokens(cache, args, i);
        double rows = (double)item->n_queries * (double)kvt_group_size(group);
        double reads = (double)kvt_item_chunks(item, kvt_group_size(group));
        picoseconds += tokens * (rows * PICOSECONDS_TOKEN +
                                 dims * (reads * PICOSECONDS_READ + rows * PICOSECONDS_ROW));
    }
    picoseconds *= group->config.n_kv_heads;
    return picoseconds < 1e15 ? (uint64_t)(picoseconds / 1000) : (uint64_t)1e12;
}

/* scratch_limit: SIZE_MAX for none, else the one-call form's, which decides about threads. */
static kvt_status make_plan(kvt_attend_plan *plan, kvt_cache *cache, const kvt_attend_args *args_in,
                            size_t scratch_limit)
{
    kvt_attend_args args;
    const kvt_group *group;
    kvt_work work;
    size_t n_threads;
    kvt_status status;

    if (!cache)
        return KVT_ERR_ARG;
    if (!plan || !args_in || !kvt_copy_struct(&args, args_in, sizeof args))
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_attend: plan or args is NULL, or struct_size is not this version's");
    status = kvt_attend_check(cache, &args);
    if (status != KVT_OK)
        return status;
    group = group_of(cache, args.layer);
    if (!kvt_work_measure(cache, &args, &work))
        return kvt_fail(cache, KVT_ERR_LIMIT, "kvt_attend: the work overflows");

    plan->cache_ = cache;
    plan->args_ = args;
    plan->units_ = work.units;
    plan->work_ = work.sum;
    plan->status_ = KVT_OK;
    plan->flags_ = 0;
    memset(plan->reserved_, 0, sizeof plan->reserved_);
    pthread_mutex_lock(&cache->lock);
    plan->id_ = ++cache->n_plans;
    pthread_mutex_unlock(&cache->lock);
    if (scratch_limit != SIZE_MAX)
        plan->args_.n_threads =
            kvt_parallel_threads(&cache->parallel, estimate_nanoseconds(cache, &args));
    else if (args.n_threads == 0)
        plan->args_.n_threads = cache->parallel.executor.n_threads;
    n_threads = plan->args_.n_threads;
    n_threads = n_threads < KVT_MAX_THREADS ? n_threads : KVT_MAX_THREADS;
    size_plan(plan, group, &work, n_threads, scratch_limit);
    return KVT_OK;
}

kvt_status kvt_attend_plan_init(kvt_attend_plan *plan, kvt_cache *cache,
                                const kvt_attend_args *args)
{
    kvt_attend_plan made;
    kvt_status status = make_plan(plan ? &made : NULL, cache, args, SIZE_MAX);
    if (status == KVT_OK)
        *plan = made;
    return status;
}

/* ---- tasks ---- */

/* Find unit i of a plan and lay its working memory into the slice. */
static void unit_at(const kvt_attend_plan *plan, size_t i, float *slice, kvt_unit *u)
{
    const kvt_attend_args *args = &plan->args_;
    const kvt_group *group = group_of(plan->cache_, args->layer);
    size_t heads = group->config.n_kv_heads, group_rows = kvt_group_size(group), chunks, all_rows;
    const kvt_attend_item *item = args->items;
    const kvt_layout *layout = scratch_layout(group);

    u->first_query = 0;
    while (i >= (chunks = kvt_item_chunks(item, group_rows)) * heads) {
        i -= chunks * heads;
        u->first_query += (size_t)item->n_queries;
        item++;
    }
    u->cache = plan->cache_;
    u->group = group;
    u->args = args;
    u->item = item;
    u->group_index = plan->cache_->layers[args->layer].group;
    u->layer_index = plan->cache_->layers[args->layer].index;
    u->kv_head = i / chunks;
    u->first_row = i % chunks * kvt_chunk_rows(group_rows);
    all_rows = (size_t)item->n_queries * group_rows;
    u->rows = all_rows - u->first_row;
    if (u->rows > kvt_chunk_rows(group_rows))
        u->rows = kvt_chunk_rows(group_rows);
    u->n_tokens = kvt_seq_visible(item->seq, args->layer);
    u->least = kvt_unit_visible(u, 0);
    u->most = kvt_unit_visible(u, u->rows - 1);
    u->sight = kvt_sight_of(group, item, u->n_tokens, u->first_row / group_rows,
                            (u->first_row + u->rows - 1) / group_rows, u->most);
    u->scale = args->scale > 0.0f ? args->scale : 1.0f / sqrtf((float)group->config.k_dim);
    u->q = slice;
    u->scores = u->q + u->rows * layout->k_dims;
    u->alpha = u->scores + u->rows * KVT_TOKENS;
    u->add = u->alpha + small_floats(u->rows);
    u->packed = u->add + small_floats(u->rows);
    u->transposed = (unsigned char *)u->packed + kvt_packed_bytes(u->rows, layout->k_dims);
    u->offset = (float *)u->transposed + layout->transposed_bytes / sizeof(float);
    u->weights = u->offset + layout->v_dims;
}

static kvt_part part_at(const kvt_unit *u, float *memory)
{
    size_t floats = u->rows * scratch_layout(u->group)->v_dims;
    return (kvt_part){memory, memory + floats, memory + floats + u->rows};
}

/* The total of a unit (0) and a range's result (1): they lie behind its working memory. */
static kvt_part result_at(const kvt_unit *u, float *slice, size_t j)
{
    const kvt_layout *layout = scratch_layout(u->group);
    return part_at(u, slice + work_floats(layout, u->rows) + j * part_floats(layout, u->rows));
}

/* Where the working memory of task i begins: behind its mark. */
static float *slice_at(const kvt_attend_plan *plan, void *scratch, size_t i)
{
    return (float *)(void *)((unsigned char *)scratch + i * plan->slice_bytes_ + MARK_BYTES);
}

static void make_views(const kvt_attend_plan *plan, kvt_view *q, kvt_view *out)
{
    const kvt_group_config *config = &group_of(plan->cache_, plan->args_.layer)->config;
    uint64_t n = 0;
    for (size_t i = 0; i < plan->args_.n_items; i++)
        n += plan->args_.items[i].n_queries;
    kvt_view_make(plan->cache_, &plan->args_.q, "q", n, config->n_q_heads, config->k_dim, q);
    kvt_view_make(plan->cache_, &plan->args_.out, "out", n, config->n_q_heads, config->v_dim, out);
}

/* Floats of a slice that are one unit's of a bundle. */
static size_t unit_floats(const kvt_attend_plan *plan)
{
    return (plan->slice_bytes_ - MARK_BYTES) / sizeof(float) / plan->bundle_;
}

/*
 * Where a task leaves the result of its j-th range of a unit that an earlier task began: from the
 * end of the unit's part of the slice on, where no later unit of the task, though it have more
 * rows, comes.
 */
static kvt_part tail_at(const kvt_attend_plan *plan, const kvt_unit *u, float *slice, size_t j)
{
    size_t floats = part_floats(scratch_layout(u->group), u->rows);
    return part_at(u, slice + unit_floats(plan) - (j + 1) * floats);
}

/* Ranges from.range to end of a bundle; what an earlier task began is left for finish. */
static kvt_outcome run_bundle(const kvt_attend_plan *plan, float *slice, kvt_cut from, size_t end,
                              const kvt_view *q, const kvt_view *out)
{
    kvt_unit units[BUNDLE_MAX];
    kvt_part totals[BUNDLE_MAX], parts[BUNDLE_MAX];
    size_t n = plan->bundle_, ranges, i = 0;

    do {
        float *own = slice + i * unit_floats(plan);
        kvt_outcome loaded;
        unit_at(plan, from.unit + i, own, &units[i]);
        totals[i] = result_at(&units[i], own, 0);
        parts[i] = result_at(&units[i], own, 1);
        loaded = kvt_unit_load(&units[i], q);
        if (loaded != KVT_UNIT_DONE)
            return loaded;
    } while (++i < n);
    ranges = units[0].sight.ranges;
    if (from.range > 0) {
        for (size_t range = from.range; range < ranges && range < end; range++) {
            for (i = 0; i < n; i++)
                parts[i] =
                    tail_at(plan, &units[i], slice + i * unit_floats(plan), range - from.range);
            kvt_units_range(units, n, range, parts);
        }
        return KVT_UNIT_DONE;
    }
    kvt_units_range(units, n, 0, totals);
    for (size_t range = 1; range < ranges && range < end; range++) {
        kvt_units_range(units, n, range, parts);
        for (i = 0; i < n; i++)
            kvt_unit_merge(&units[i], totals[i], parts[i]);
    }
    if (end < ranges)
        return KVT_UNIT_DONE;
    for (i = 0; i < n; i++)
        if (!kvt_unit_store(&units[i], totals[i], out))
            return KVT_UNIT_OVERFLOWED;
    return KVT_UNIT_DONE;
}

static kvt_outcome run_cut(const kvt_attend_plan *plan, float *slice, kvt_cut from, kvt_cut to,
                           const kvt_view *q, const kvt_view *out)
{
    kvt_outcome what = KVT_UNIT_DONE;
    while (what == KVT_UNIT_DONE && from.unit < to.unit) {
        what = run_bundle(plan, slice, from, SIZE_MAX, q, out);
        from = (kvt_cut){from.unit + plan->bundle_, 0, 0};
    }
    if (what == KVT_UNIT_DONE && from.unit == to.unit && from.range < to.range)
        what = run_bundle(plan, slice, from, to.range, q, out);
    return what;
}

/* Merge what a task has of a bundle that task `head` began; the last of them stores it. */
static kvt_outcome merge_tail(const kvt_attend_plan *plan, unsigned char *scratch, size_t head,
                              size_t task, kvt_cut from, kvt_cut to, const kvt_view *out)
{
    size_t n = kvt_cut_tail(from, to);
    for (size_t i = 0; i < plan->bundle_; i++) {
        float *slice = slice_at(plan, scratch, head) + i * unit_floats(plan);
        float *other = slice_at(plan, scratch, task) + i * unit_floats(plan);
        kvt_part total;
        kvt_unit u;
        unit_at(plan, from.unit + i, slice, &u);
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
    kvt_cut from, to;
    kvt_fpenv saved;
    kvt_outcome what;

    if (status != KVT_OK)
        return status;
    if (i >= plan->n_tasks)
        return kvt_fail(plan->cache_, KVT_ERR_ARG, "kvt_attend_task: task %zu of %zu", i,
                        plan->n_tasks);
    make_views(plan, &q, &out);
    cutter = kvt_cutter_begin(plan);
    from = kvt_cutter_next(&cutter, i);
    to = kvt_cutter_next(&cutter, i + 1);
    saved = kvt_fpenv_enter();
    what = run_cut(plan, slice_at(plan, scratch, i), from, to, &q, &out);
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
    kvt_cut from, to;
    kvt_fpenv saved;
    kvt_view q, out;
    size_t head = 0;

    if (status != KVT_OK)
        return status;
    for (size_t i = 0; i < plan->n_tasks; i++)
        if (memcmp((unsigned char *)scratch + i * plan->slice_bytes_, &plan->id_,
                   sizeof plan->id_) != 0)
            return kvt_fail(plan->cache_, KVT_ERR_STATE,
                            "kvt_attend_finish: task %zu of %zu has not run with this scratch", i,
                            plan->n_tasks);
    if (plan->status_ != KVT_OK)
        return (kvt_status)plan->status_;
    if (plan->split_ == UINT64_MAX)
        return KVT_OK;
    make_views(plan, &q, &out);
    cutter = kvt_cutter_begin(plan);
    from = kvt_cutter_next(&cutter, 0);
    saved = kvt_fpenv_enter();
    for (size_t i = 0; i < plan->n_tasks && what == KVT_UNIT_DONE; i++, from = to) {
        to = kvt_cutter_next(&cutter, i + 1);
        if (from.range > 0)
            what = merge_tail(plan, scratch, head, i, from, to, &out);
        if (from.unit != to.unit || from.range == 0)
            head = i; /* a unit that the next task ends in begins here */
    }
    kvt_fpenv_leave(saved);
    return report(plan, what);
}

/* ---- all in one ---- */

static void run_task(void *arg, size_t i)
{
    kvt_attend_plan *plan = arg;
    kvt_attend_task(plan, plan->cache_->scratch, i);
}

kvt_status kvt_attend(kvt_cache *cache, const kvt_attend_args *args)
{
    kvt_attend_plan plan;
    kvt_status status;

    if (!cache)
        return KVT_ERR_ARG;
    status = make_plan(&plan, cache, args, cache->scratch_bytes);
    if (status != KVT_OK)
        return status;
    pthread_mutex_lock(&cache->scratch_lock);
    kvt_parallel_run(&cache->parallel, run_task, &plan, plan.n_tasks, plan.args_.n_threads);
    status = kvt_attend_finish(&plan, cache->scratch);
    pthread_mutex_unlock(&cache->scratch_lock);
    return status;
}
