/*
 * Append: the pending step's keys and values into the blocks of one layer.
 *
 * One task is one kv head's K or V: it walks the step's tokens in ascending order, because the
 * offset of a block may be the mean of the block before it. Tokens pass through a small buffer
 * of f32 rows, at most a tile at a time. Nothing is visible before finish marks the layer, so a
 * value that cannot be stored leaves the sequence as it was: slots beyond the visible tokens
 * may hold anything. Where V is in K, every task is K's.
 */
#include "src/fpenv.h"
#include "src/cache/cache.h"
#include "src/tensor.h"

#define ROWS_FLOATS 8192 /* the buffer: 16 rows of 512 dims */

/*
 * Largest magnitude taken into i8. A scale reaches 65504 * 127 = 8319008; and below it no sum
 * of the rotation can overflow f32, whose infinities could cancel into NaN unseen.
 */
#define I8_INPUT_MAX 8.0e6f

typedef struct kvt_append_job {
    const kvt_kernels *kernels;
    const kvt_group *group;
    kvt_seq *seq;
    uint32_t group_index, layer_index;
    kvt_view views[2];        /* of K and V */
    uint16_t scale_within[2]; /* of K and V: see scale_within() */
} kvt_append_job;

static unsigned char *record_of(const kvt_append_job *job, size_t row, size_t head)
{
    return kvt_head_record(job->group, kvt_seq_block(job->seq, row, job->group_index),
                           job->layer_index, head);
}

/* ---- the caller's rows ---- */

/* Rows of f32, ldx floats apart. */
typedef struct kvt_rows_f32 {
    const float *x;
    size_t ldx;
} kvt_rows_f32;

/* Rows of f32 input need no copy. They may hold what is not finite. */
static int rows_in_place(const kvt_view *view, uint64_t token, size_t head, kvt_rows_f32 *rows)
{
    if (view->dtype != KVT_F32)
        return 0;
    rows->x = (const float *)(const void *)(view->data + (size_t)token * view->token_stride +
                                            head * view->head_stride);
    rows->ldx = view->token_stride / sizeof(float);
    return 1;
}

/* n rows into the buffer. 0: a value is not finite. */
static int load_rows(const kvt_append_job *job, const kvt_view *view, uint64_t token, size_t n,
                     size_t head, size_t dims, float *buffer)
{
    for (size_t i = 0; i < n; i++)
        if (!kvt_view_load(job->kernels, view, token + i, head, dims, buffer + i * dims))
            return 0;
    return 1;
}

/* Magnitudes compared as integers, which order alike. */
static int within(const float *x, size_t n, float bound)
{
    int32_t limit = (int32_t)kvt_f32_bits(bound), outside = 0;
    for (size_t i = 0; i < n; i++)
        outside |= (int32_t)(kvt_f32_bits(x[i]) & 0x7fffffffu) > limit;
    return !outside;
}

/* ---- the offset of a block: docs/numerics.md, "offset" ---- */

/*
 * mean[d] over n of the step's tokens from `first` on, added in ascending order. What cannot be
 * stored is not looked for: the append comes to these rows after, and fails.
 */
static void mean_of_input(const kvt_append_job *job, size_t head, uint64_t first, size_t n,
                          float *buffer, float *mean)
{
    const kvt_view *view = &job->views[KVT_SIDE_K];
    size_t dims = job->group->config.k_dim;
    kvt_rows_f32 rows;

    memset(mean, 0, dims * sizeof *mean);
    if (rows_in_place(view, first, head, &rows)) {
        job->kernels->add_rows(rows.x, rows.ldx, n, dims, mean);
    } else {
        for (size_t i = 0; i < n; i++) {
            load_rows(job, view, first + i, 1, head, dims, buffer);
            job->kernels->add_rows(buffer, dims, 1, dims, mean);
        }
    }
    for (size_t d = 0; d < dims; d++)
        mean[d] /= (float)n;
}

/* mean[d] of a full block as attention sees it: dequantized, unrotated, with its own offset. */
static void mean_of_block(const kvt_append_job *job, size_t head, size_t row, float *mean)
{
    const kvt_group *group = job->group;
    const unsigned char *record = record_of(job, row, head);
    const uint16_t *offset = (const uint16_t *)(const void *)(record + group->layout.k_offset);
    size_t dims = group->config.k_dim;

    job->kernels->mean_k_i8(record + group->layout.k_codes,
                            (const uint16_t *)(const void *)(record + group->layout.k_scales),
                            group->layout.k_dims, mean);
    if (group->rotates)
        job->kernels->unrotate(mean, group->signs + head * dims, dims, group->rotation_block,
                               group->rotation_scale_q);
    for (size_t d = 0; d < dims; d++)
        mean[d] += kvt_f16_to_f32(offset[d]);
}

/*
 * Write the offset of a block whose first token is token `first` of the step; n tokens of the
 * step go into the block. buffer: at least 2 * KVT_MAX_DIM floats.
 */
static void fix_offset(const kvt_append_job *job, size_t head, size_t block_row, uint64_t first,
                       size_t n, float *buffer)
{
    size_t dims = job->group->config.k_dim;
    unsigned char *record = record_of(job, block_row, head);
    float *mean = buffer + KVT_MAX_DIM;

    if (n == KVT_TOKENS || (block_row == 0 && n >= KVT_TILE_TOKENS))
        mean_of_input(job, head, first, n, buffer, mean);
    else if (block_row > 0)
        mean_of_block(job, head, block_row - 1, mean);
    else
        memset(mean, 0, dims * sizeof *mean);
    /* Saturates at +-65504. */
    job->kernels->store_f16(mean, record + job->group->layout.k_offset, dims);
}

/* ---- the tasks ---- */

typedef int put_function(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                         void *codes, uint16_t *scales, size_t slot);

static put_function *put_of(const kvt_kernels *k, kvt_side side, kvt_type type)
{
    if (side == KVT_SIDE_K)
        return type == KVT_TYPE_F32   ? k->put_k_f32
               : type == KVT_TYPE_F16 ? k->put_k_f16
                                      : k->put_k_i8;
    return type == KVT_TYPE_F32 ? k->put_v_f32 : type == KVT_TYPE_F16 ? k->put_v_f16 : k->put_v_i8;
}

/*
 * Up to this scale (as f16 bits, which order alike) an i8 row's input was within I8_INPUT_MAX,
 * which saves a pass that compares it all. Of V, |x| <= 127 * scale. Of K, no element of a
 * rotated row is larger than the row's norm, which is that of the result over
 * sqrt(block) * rotation_scale_k, which is at most 127 * scale / rotation_scale_k; and an
 * offset is at most 65504. The hundredth less is for roundings.
 */
static uint16_t scale_within(const kvt_group *group, kvt_side side)
{
    float most = 0.99f * I8_INPUT_MAX;
    if (side == KVT_SIDE_K && group->offsets)
        most -= 65504.0f;
    if (side == KVT_SIDE_K && group->rotates)
        most *= group->rotation_scale_k;
    return kvt_f32_to_f16(most / 127.0f);
}

/*
 * The step's tokens from i on, up to the end of a tile or of the buffer, are `n` rows of the
 * caller's or, in the buffer, as the type stores them. 0: a value is not finite; where this is
 * not seen here, put does: it refuses what becomes no finite f16 or scale.
 */
static int take_rows(const kvt_append_job *job, kvt_side side, size_t head, uint64_t i, size_t n,
                     const float *mu, float *buffer, kvt_rows_f32 *rows)
{
    const kvt_group *group = job->group;
    kvt_type type = side == KVT_SIDE_K ? group->config.k_type : group->config.v_type;
    size_t dims = side == KVT_SIDE_K ? group->config.k_dim : group->config.v_dim;
    int centers = side == KVT_SIDE_K && group->offsets;
    int rotates = side == KVT_SIDE_K && group->rotates;

    if (type == KVT_TYPE_F32 || (rotates && !centers) ||
        !rows_in_place(&job->views[side], i, head, rows)) {
        if (!load_rows(job, &job->views[side], i, n, head, dims, buffer))
            return 0;
        rows->x = buffer;
        rows->ldx = dims;
    }
    for (size_t j = 0; centers && j < n; j++)
        job->kernels->center(rows->x + j * rows->ldx, mu, dims, buffer + j * dims);
    for (size_t j = 0; rotates && j < n; j++)
        job->kernels->rotate(buffer + j * dims, group->signs + head * dims, dims,
                             group->rotation_block, group->rotation_scale_k);
    if (centers) {
        rows->x = buffer;
        rows->ldx = dims;
    }
    return 1;
}

/* All of the step's tokens of one head's K or V. 0: a value cannot be stored. */
static int append_head(const kvt_append_job *job, kvt_side side, size_t head)
{
    const kvt_layout *layout = &job->group->layout;
    const kvt_group_config *config = &job->group->config;
    kvt_type type = side == KVT_SIDE_K ? config->k_type : config->v_type;
    size_t dims = side == KVT_SIDE_K ? config->k_dim : config->v_dim;
    size_t dims_p = side == KVT_SIDE_K ? layout->k_dims : layout->v_dims;
    size_t codes_at = side == KVT_SIDE_K ? layout->k_codes : layout->v_codes;
    size_t scales_at = side == KVT_SIDE_K ? layout->k_scales : layout->v_scales;
    size_t rows_at_once =
        ROWS_FLOATS / dims < KVT_TILE_TOKENS ? ROWS_FLOATS / dims : KVT_TILE_TOKENS;
    put_function *put = put_of(job->kernels, side, type);
    int has_offset = side == KVT_SIDE_K && job->group->offsets;
    float buffer[ROWS_FLOATS], mu[KVT_MAX_DIM];

    for (uint64_t i = 0; i < job->seq->pending;) {
        uint64_t token = job->seq->length + i, left = job->seq->pending - i;
        size_t row = (size_t)(token / KVT_TOKENS), slot = (size_t)(token % KVT_TOKENS);
        unsigned char *record = record_of(job, row, head);
        uint16_t *scales = (uint16_t *)(void *)(record + scales_at);
        size_t n = KVT_TILE_TOKENS - slot % KVT_TILE_TOKENS;
        kvt_rows_f32 rows;

        if (has_offset && slot == 0)
            fix_offset(job, head, row, i, left < KVT_TOKENS ? (size_t)left : KVT_TOKENS, buffer);
        if (has_offset && (slot == 0 || i == 0))
            job->kernels->load_f16(record + layout->k_offset, mu, dims);
        n = n > left ? (size_t)left : n;
        n = n > rows_at_once ? rows_at_once : n;
        if (!take_rows(job, side, head, i, n, mu, buffer, &rows) ||
            !put(rows.x, rows.ldx, n, dims, dims_p, record + codes_at, scales, slot))
            return 0;
        for (size_t j = 0; type == KVT_TYPE_I8 && j < n; j++)
            if (scales[slot + j] > job->scale_within[side] &&
                (!load_rows(job, &job->views[side], i + j, 1, head, dims, buffer) ||
                 !within(buffer, dims, I8_INPUT_MAX)))
                return 0;
        i += n;
    }
    return 1;
}

/* What the tasks of a layer share, but for the views. */
static void job_make(kvt_seq *seq, uint32_t layer, kvt_append_job *job)
{
    kvt_cache *cache = seq->cache;
    job->kernels = &cache->kernels;
    job->group_index = cache->layers[layer].group;
    job->layer_index = cache->layers[layer].index;
    job->group = &cache->groups[job->group_index];
    job->seq = seq;
    job->scale_within[KVT_SIDE_K] = scale_within(job->group, KVT_SIDE_K);
    job->scale_within[KVT_SIDE_V] = scale_within(job->group, KVT_SIDE_V);
}

/* The view of K or V, which checks it. */
static kvt_status job_view(kvt_append_job *job, kvt_side side, const kvt_tensor *tensor)
{
    const kvt_group_config *config = &job->group->config;
    return kvt_view_make(job->seq->cache, tensor, side == KVT_SIDE_K ? "k" : "v", job->seq->pending,
                         config->n_kv_heads, side == KVT_SIDE_K ? config->k_dim : config->v_dim,
                         &job->views[side]);
}

static kvt_status refuse_value(const kvt_append_job *job, uint32_t layer, kvt_side side,
                               size_t head)
{
    return kvt_fail(job->seq->cache, KVT_ERR_VALUE,
                    "layer %u, kv head %zu: a value of %s is not finite or "
                    "beyond its type",
                    layer, head, side == KVT_SIDE_K ? "K" : "V");
}

kvt_status kvt_append_task(kvt_append_plan *plan, size_t i)
{
    kvt_append_job job;
    kvt_side side;
    size_t head;
    kvt_cache *cache;
    kvt_fpenv saved;
    int stored;

    if (!plan || !plan->seq_)
        return KVT_ERR_ARG;
    cache = plan->seq_->cache;
    if (i >= plan->n_tasks)
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_append_task: task %zu of %zu", i, plan->n_tasks);
    if (plan->step_ != plan->seq_->step || !plan->seq_->pending ||
        plan->seq_->appended[plan->layer_])
        return kvt_fail(cache, KVT_ERR_STATE, "kvt_append_task: the plan is of an earlier step");
    job_make(plan->seq_, plan->layer_, &job);
    side = i % 2 && !job.group->v_in_k ? KVT_SIDE_V : KVT_SIDE_K;
    head = job.group->v_in_k ? i : i / 2;
    /* Cheap, and keeps the plan free of anything but the caller's own arguments. */
    job_view(&job, side, side == KVT_SIDE_K ? &plan->k_ : &plan->v_);

    saved = kvt_fpenv_enter();
    stored = append_head(&job, side, head);
    kvt_fpenv_leave(saved);
    if (!stored) {
        __atomic_store_n(&plan->status_, KVT_ERR_VALUE, __ATOMIC_RELAXED);
        refuse_value(&job, plan->layer_, side, head);
    }
    __atomic_fetch_or(&plan->done_[i / 64], (uint64_t)1 << i % 64, __ATOMIC_RELEASE);
    return stored ? KVT_OK : KVT_ERR_VALUE;
}

/* ---- plan, finish, and both in one ---- */

/* What kvt_append and its plan refuse before anything is written. */
static kvt_status check_append(kvt_seq *seq, uint32_t layer, const kvt_tensor *k,
                               const kvt_tensor *v, kvt_append_job *job)
{
    kvt_status status;
    if (layer >= seq->cache->n_layers)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_append: layer %u of %u", layer,
                        seq->cache->n_layers);
    if (!seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_append: no step is pending");
    if (seq->appended[layer])
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_append: layer %u has its tokens already",
                        layer);
    job_make(seq, layer, job);
    if (job->group->v_in_k && v)
        return kvt_fail(seq->cache, KVT_ERR_ARG,
                        "kvt_append: v is not NULL, but V of layer %u is the first dims of K",
                        layer);
    status = job_view(job, KVT_SIDE_K, k);
    if (status == KVT_OK && !job->group->v_in_k)
        status = job_view(job, KVT_SIDE_V, v);
    return status;
}

static void mark_appended(kvt_seq *seq, uint32_t layer)
{
    seq->appended[layer] = 1;
    seq->n_appended++;
}

kvt_status kvt_append_plan_init(kvt_append_plan *plan, kvt_seq *seq, uint32_t layer,
                                const kvt_tensor *k, const kvt_tensor *v)
{
    kvt_append_job job;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!plan)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_append: plan is NULL");
    status = check_append(seq, layer, k, v, &job);
    if (status != KVT_OK)
        return status;
    memset(plan, 0, sizeof *plan);
    plan->n_tasks = (size_t)job.group->config.n_kv_heads * (job.group->v_in_k ? 1 : 2);
    plan->seq_ = seq;
    plan->k_ = *k;
    if (v)
        plan->v_ = *v;
    plan->step_ = seq->step;
    plan->layer_ = layer;
    return KVT_OK;
}

kvt_status kvt_append_finish(kvt_append_plan *plan)
{
    kvt_seq *seq;
    if (!plan || !plan->seq_)
        return KVT_ERR_ARG;
    seq = plan->seq_;
    if (plan->step_ != seq->step || !seq->pending || seq->appended[plan->layer_])
        return kvt_fail(seq->cache, KVT_ERR_STATE,
                        "kvt_append_finish: the plan is of an earlier "
                        "step");
    for (size_t i = 0; i < plan->n_tasks; i++)
        if (!(__atomic_load_n(&plan->done_[i / 64], __ATOMIC_ACQUIRE) >> i % 64 & 1))
            return kvt_fail(seq->cache, KVT_ERR_STATE,
                            "kvt_append_finish: task %zu of %zu has not run", i, plan->n_tasks);
    if (plan->status_ != KVT_OK)
        return (kvt_status)plan->status_;
    mark_appended(seq, plan->layer_);
    return KVT_OK;
}

static void run_task(void *plan, size_t i)
{
    kvt_append_task(plan, i);
}

/* Below this many elements a hand-over to threads costs more than it saves. */
#define PARALLEL_FROM 32768

/*
 * Ask for the lines that the first of the step's tokens will be written to: a lone key has one of
 * its own for each 4 bytes, far more than its values fill.
 */
static void prefetch_tokens(const kvt_append_job *job, size_t head)
{
    const kvt_layout *layout = &job->group->layout;
    uint64_t token = job->seq->length;
    size_t slot = (size_t)(token % KVT_TOKENS), tile = slot / KVT_TILE_TOKENS;
    const unsigned char *record = record_of(job, (size_t)(token / KVT_TOKENS), head);
    size_t k_bytes = layout->k_code_bytes / (KVT_TOKENS / KVT_TILE_TOKENS);
    const unsigned char *k = record + layout->k_codes + tile * k_bytes;
    const unsigned char *v = record + layout->v_codes + slot / 4 * (layout->v_code_bytes / 16);
    for (size_t at = 0; at < k_bytes; at += 64)
        __builtin_prefetch(k + at, 1);
    for (size_t at = 0; at < layout->v_code_bytes / 16; at += 64)
        __builtin_prefetch(v + at, 1);
    __builtin_prefetch(record + layout->k_scales, 1);
    __builtin_prefetch(record + layout->v_scales, 1);
    for (size_t at = 0; at < layout->k_offset_bytes; at += 64)
        __builtin_prefetch(record + layout->k_offset + at);
}

/* A token or a few: what belongs to a task, not to a value, is done once for all heads. */
static kvt_status append_inline(const kvt_append_job *job, uint32_t layer)
{
    size_t head = 0, n_heads = job->group->config.n_kv_heads;
    kvt_side side = KVT_SIDE_K;
    kvt_fpenv saved = kvt_fpenv_enter();
    for (; head < n_heads; head++) {
        if (head + 1 < n_heads)
            prefetch_tokens(job, head + 1);
        side = KVT_SIDE_K;
        if (!append_head(job, side, head))
            break;
        side = KVT_SIDE_V;
        if (!job->group->v_in_k && !append_head(job, side, head))
            break;
    }
    kvt_fpenv_leave(saved);
    if (head < n_heads)
        return refuse_value(job, layer, side, head);
    mark_appended(job->seq, layer);
    return KVT_OK;
}

kvt_status kvt_append(kvt_seq *seq, uint32_t layer, const kvt_tensor *k, const kvt_tensor *v)
{
    const kvt_group_config *config;
    kvt_append_plan plan;
    kvt_append_job job;
    kvt_status status;
    uint64_t elements;
    uint32_t n_threads = 1;

    if (!seq)
        return KVT_ERR_ARG;
    status = check_append(seq, layer, k, v, &job);
    if (status != KVT_OK)
        return status;
    config = &job.group->config;
    elements = seq->pending * config->n_kv_heads * (config->k_dim + (v ? config->v_dim : 0));
    if (elements >= PARALLEL_FROM) /* about a nanosecond an element */
        n_threads = kvt_parallel_threads(&seq->cache->parallel, elements);
    if (n_threads == 1)
        return append_inline(&job, layer);
    status = kvt_append_plan_init(&plan, seq, layer, k, v);
    if (status != KVT_OK)
        return status;
    kvt_parallel_run(&seq->cache->parallel, run_task, &plan, plan.n_tasks, n_threads);
    return kvt_append_finish(&plan);
}
