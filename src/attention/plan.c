/*
 * Attention over the cache, in place: the plan, and the call that does it all.
 *
 * For each range of KVT_RANGE_TOKENS tokens a unit (attention.h) runs an online softmax over the
 * range's blocks from scratch; the ranges are merged in ascending order. That order, and nothing
 * else, fixes the bits. A plan decides how many tasks there are, where they may begin and end
 * (cut.c), and how much scratch they have; task.c runs them.
 */
#include "src/attention/scratch.h"
#include "src/fpenv.h"

/* ---- plan ---- */

/* Floats of scratch of a unit that is walked whole: the total so far, and the range's result. */
static size_t whole_floats(const kvt_layout *layout, size_t rows)
{
    return kvt_work_floats(layout, rows) + 2 * kvt_part_floats(layout, rows);
}

/* Sizes of scratch are cut off here: only where pointers have 32 bits is it ever reached. */
#define MOST_BYTES (SIZE_MAX / 64)

/* Bytes of scratch of a task: for each unit of a bundle also the results of some ranges. */
static size_t slice_bytes(const kvt_layout *layout, size_t rows, size_t bundle, size_t tail)
{
    uint64_t bytes = KVT_MARK_BYTES + sizeof(float) * bundle *
                                          (whole_floats(layout, rows) +
                                           (uint64_t)tail * kvt_part_floats(layout, rows));
    return bytes < MOST_BYTES ? (size_t)bytes : MOST_BYTES;
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
    size_t bundle = KVT_BUNDLE_MAX / work->rows;
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
    plan->slice_bytes_ = slice_bytes(kvt_scratch_layout(group), work->rows, plan->bundle_, tail);
    plan->scratch_bytes = plan->n_tasks <= MOST_BYTES / plan->slice_bytes_
                              ? plan->n_tasks * plan->slice_bytes_
                              : MOST_BYTES;
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

    limit = limit < MOST_BYTES ? limit : MOST_BYTES - 1; /* what was cut off does not fit */
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
    if (slice_bytes(kvt_scratch_layout(group), work->rows, plan->bundle_, 0) > limit)
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
                       slice_bytes(kvt_scratch_layout(group), KVT_ROWS_MAX, 1, 0);
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
        if (one_query.scratch_bytes > bytes)
            bytes = one_query.scratch_bytes < MOST_BYTES ? one_query.scratch_bytes : MOST_BYTES - 1;
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
    const kvt_group *group = kvt_group_of(cache, args->layer);
    const kvt_layout *layout = kvt_scratch_layout(group);
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

/*
 * The one-call form decides about threads by the time that the call takes: nanoseconds, else 0.
 */
static void fit_plan(kvt_attend_plan *plan, const kvt_work *work, uint64_t nanoseconds,
                     size_t scratch_limit)
{
    kvt_cache *cache = plan->cache_;
    size_t n_threads;

    plan->units_ = work->units;
    plan->work_ = work->sum;
    if (scratch_limit != SIZE_MAX)
        plan->args_.n_threads = kvt_parallel_threads(&cache->parallel, nanoseconds);
    else if (plan->args_.n_threads == 0)
        plan->args_.n_threads = cache->parallel.executor.n_threads;
    n_threads = plan->args_.n_threads;
    n_threads = n_threads < KVT_MAX_THREADS ? n_threads : KVT_MAX_THREADS;
    size_plan(plan, kvt_group_of(cache, plan->args_.layer), work, n_threads, scratch_limit);
}

/* About the work until the last task has ended: the pieces that are not cut come at its end. */
static double work_to_the_end(const kvt_attend_plan *plan, const kvt_work *work)
{
    size_t threads = plan->args_.n_threads < plan->n_tasks ? plan->args_.n_threads : plan->n_tasks;
    size_t rounds = (plan->n_tasks + threads - 1) / threads;
    uint64_t piece = plan->split_ == UINT64_MAX ? work->longest : work->piece;
    double task = (double)work->sum / (double)plan->n_tasks;
    return (double)rounds * task + (threads > 1 ? (double)piece * (double)plan->bundle_ : 0);
}

/*
 * Attending over shared prefixes together saves reading. It costs the order of memory in which kv
 * heads of one item are walked (bundle_of), and in the one-call form, whose scratch is for few rows
 * a task, it may leave fewer tasks. So it has to save this part of the work. With seven rows an
 * item, where arithmetic is the slower side, it would save as much by the estimate, and in truth
 * takes as long (0.98 to 1.04 of the time with i8 on AVX-512 VNNI).
 */
#define SAVES (1.0 / 6)

static void share_prefixes(kvt_attend_plan *plan, const kvt_work *work, uint64_t nanoseconds,
                           size_t scratch_limit)
{
    kvt_attend_plan together = *plan;
    kvt_work less;

    if (!kvt_prefix_exists(plan->cache_, &plan->args_) ||
        !kvt_work_measure(plan->cache_, &plan->args_, 1, &less))
        return;
    together.flags_ |= KVT_PLAN_SHARES;
    nanoseconds = (uint64_t)((double)nanoseconds * ((double)less.sum / (double)work->sum));
    fit_plan(&together, &less, nanoseconds, scratch_limit);
    if (work_to_the_end(&together, &less) <= (1 - SAVES) * work_to_the_end(plan, work))
        *plan = together;
}

static void choose_plan(kvt_attend_plan *plan, const kvt_work *work, size_t scratch_limit)
{
    uint64_t nanoseconds =
        scratch_limit != SIZE_MAX ? estimate_nanoseconds(plan->cache_, &plan->args_) : 0;

    fit_plan(plan, work, nanoseconds, scratch_limit);
    if (plan->args_.n_items > 1)
        share_prefixes(plan, work, nanoseconds, scratch_limit);
}

/*
 * The ids of plans: of all caches, as a scratch may be used with several. A count times an odd
 * number (2^64 over the golden ratio): what else a scratch holds, as small integers, is none.
 */
static uint64_t last_plan;
#define ID_FACTOR UINT64_C(0x9E3779B97F4A7C15)

/* scratch_limit: SIZE_MAX for none, else the one-call form's, which decides about threads. */
static kvt_status make_plan(kvt_attend_plan *plan, kvt_cache *cache, const kvt_attend_args *args_in,
                            size_t scratch_limit)
{
    kvt_attend_args args;
    kvt_work work;
    kvt_status status;
    kvt_fpenv saved;

    if (!cache)
        return KVT_ERR_ARG;
    if (!plan || !args_in || !kvt_copy_struct(&args, args_in, sizeof args))
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_attend: plan or args is NULL, or struct_size is not this version's");
    status = kvt_attend_check(cache, &args);
    for (size_t i = 0; status == KVT_OK && i < args.n_items; i++)
        status = kvt_seq_verify_layer(args.items[i].seq, args.layer);
    if (status != KVT_OK)
        return status;
    saved = kvt_fpenv_enter(); /* estimates are doubles */
    if (!kvt_work_measure(cache, &args, 0, &work)) {
        kvt_fpenv_leave(saved);
        return kvt_fail(cache, KVT_ERR_LIMIT, "kvt_attend: the work overflows");
    }
    plan->cache_ = cache;
    plan->args_ = args;
    plan->status_ = KVT_OK;
    plan->flags_ = 0;
    memset(plan->reserved_, 0, sizeof plan->reserved_);
    plan->id_ = __atomic_add_fetch(&last_plan, ID_FACTOR, __ATOMIC_RELAXED);
    choose_plan(plan, &work, scratch_limit);
    kvt_fpenv_leave(saved);
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
