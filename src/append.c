/*
 * Append: the pending step's keys and values into the blocks of one layer.
 *
 * One task is one kv head's K or V: it walks the step's tokens in ascending order, because the
 * offset of a block may be the mean of the block before it. Tokens pass through a small buffer
 * of f32 rows, at most a tile at a time. Nothing is visible before finish marks the layer, so a
 * value that cannot be stored leaves the sequence as it was: slots beyond the visible tokens
 * may hold anything. Where V is in K, every task is K's.
 */
#include "fpenv.h"
#include "internal.h"

#define ROWS_FLOATS 8192 /* the buffer: 16 rows of 512 dims */

/*
 * Largest magnitude taken into i8. A scale reaches 65504 * 127 = 8319008; and below it no sum
 * of the rotation can overflow f32, whose infinities could cancel into NaN unseen.
 */
#define I8_INPUT_MAX 8.0e6f

typedef struct kvt_append_job {
    const kvt_kernels *kernels;
    const kvt_group *group;
    const kvt_view *view;
    kvt_seq *seq;
    uint32_t group_index, layer_index;
    size_t head;
} kvt_append_job;

static unsigned char *record_of(const kvt_append_job *job, size_t row)
{
    return kvt_head_record(job->group, kvt_seq_block(job->seq, row, job->group_index),
                           job->layer_index, job->head);
}

/* Magnitudes compared as integers, which order alike and which every compiler vectorizes. */
static int within(const float *x, size_t n, float bound)
{
    int32_t limit = (int32_t)kvt_f32_bits(bound), outside = 0;
    for (size_t i = 0; i < n; i++)
        outside |= (int32_t)(kvt_f32_bits(x[i]) & 0x7fffffffu) > limit;
    return !outside;
}

/* ---- the offset of a block: docs/numerics.md, "offset" ---- */

/* mean[d] over n of the step's tokens from `first` on, added in ascending order. */
static int mean_of_input(const kvt_append_job *job, uint64_t first, size_t n, float *row,
                         float *mean)
{
    size_t dims = job->group->config.k_dim;
    memset(mean, 0, dims * sizeof *mean);
    for (size_t i = 0; i < n; i++) {
        if (!kvt_view_load(job->kernels, job->view, first + i, job->head, dims, row) ||
            !within(row, dims, I8_INPUT_MAX))
            return 0;
        for (size_t d = 0; d < dims; d++)
            mean[d] += row[d];
    }
    for (size_t d = 0; d < dims; d++)
        mean[d] /= (float)n;
    return 1;
}

/* mean[d] of a full block as attention sees it: dequantized, unrotated, with its own offset. */
static void mean_of_block(const kvt_append_job *job, size_t row, float *mean)
{
    const kvt_group *group = job->group;
    const unsigned char *record = record_of(job, row);
    const uint16_t *offset = (const uint16_t *)(const void *)(record + group->layout.k_offset);
    size_t dims = group->config.k_dim;

    job->kernels->mean_k_i8(record + group->layout.k_codes,
                            (const uint16_t *)(const void *)(record + group->layout.k_scales),
                            group->layout.k_dims, mean);
    if (group->rotates)
        job->kernels->unrotate(mean, group->signs + job->head * dims, dims, group->rotation_block,
                               group->rotation_scale_q);
    for (size_t d = 0; d < dims; d++)
        mean[d] += kvt_f16_to_f32(offset[d]);
}

/*
 * Write the offset of a block whose first token is token `first` of the step; n tokens of the
 * step go into the block. buffer: at least 2 * KVT_MAX_DIM floats.
 */
static int fix_offset(const kvt_append_job *job, size_t block_row, uint64_t first, size_t n,
                      float *buffer)
{
    size_t dims = job->group->config.k_dim;
    uint16_t *offset =
        (uint16_t *)(void *)(record_of(job, block_row) + job->group->layout.k_offset);
    float *mean = buffer + KVT_MAX_DIM;

    if (n == KVT_TOKENS || (block_row == 0 && n >= KVT_TILE_TOKENS)) {
        if (!mean_of_input(job, first, n, buffer, mean))
            return 0;
    } else if (block_row > 0) {
        mean_of_block(job, block_row - 1, mean);
    } else {
        memset(mean, 0, dims * sizeof *mean);
    }
    job->kernels->store_f16(mean, offset, dims); /* saturates at +-65504 */
    return 1;
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

/* Take K's row to the stored domain. mu: the block's offset. */
static void transform_k(const kvt_append_job *job, const float *mu, float *row)
{
    const kvt_group *group = job->group;
    size_t dims = group->config.k_dim;
    if (group->offsets)
        for (size_t d = 0; d < dims; d++)
            row[d] -= mu[d];
    if (group->rotates)
        job->kernels->rotate(row, group->signs + job->head * dims, dims, group->rotation_block,
                             group->rotation_scale_k);
}

/* All of the step's tokens of one head's K or V. 0: a value cannot be stored. */
static int append_head(const kvt_append_job *job, kvt_side side)
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
    float rows[ROWS_FLOATS], mu[KVT_MAX_DIM];

    for (uint64_t i = 0; i < job->seq->pending;) {
        uint64_t token = job->seq->length + i, left = job->seq->pending - i;
        size_t row = (size_t)(token / KVT_TOKENS), slot = (size_t)(token % KVT_TOKENS);
        unsigned char *record = record_of(job, row);
        size_t n = KVT_TILE_TOKENS - slot % KVT_TILE_TOKENS;

        if (has_offset && slot == 0 &&
            !fix_offset(job, row, i, left < KVT_TOKENS ? (size_t)left : KVT_TOKENS, rows))
            return 0;
        if (has_offset && (slot == 0 || i == 0))
            job->kernels->load_f16(record + layout->k_offset, mu, dims);
        n = n > left ? (size_t)left : n;
        n = n > rows_at_once ? rows_at_once : n;
        for (size_t j = 0; j < n; j++) {
            float *x = rows + j * dims;
            if (!kvt_view_load(job->kernels, job->view, i + j, job->head, dims, x))
                return 0;
            if (type == KVT_TYPE_I8 && !within(x, dims, I8_INPUT_MAX))
                return 0;
            if (side == KVT_SIDE_K)
                transform_k(job, mu, x);
        }
        if (!put(rows, dims, n, dims, dims_p, record + codes_at,
                 (uint16_t *)(void *)(record + scales_at), slot))
            return 0;
        i += n;
    }
    return 1;
}

kvt_status kvt_append_task(kvt_append_plan *plan, size_t i)
{
    kvt_append_job job;
    kvt_view view;
    kvt_side side;
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
    job.kernels = &cache->kernels;
    job.group_index = cache->layers[plan->layer_].group;
    job.layer_index = cache->layers[plan->layer_].index;
    job.group = &cache->groups[job.group_index];
    job.seq = plan->seq_;
    side = i % 2 && !job.group->v_in_k ? KVT_SIDE_V : KVT_SIDE_K;
    job.head = job.group->v_in_k ? i : i / 2;
    job.view = &view;
    /* Cheap, and keeps the plan free of anything but the caller's own arguments. */
    kvt_view_make(cache, side == KVT_SIDE_K ? &plan->k_ : &plan->v_, "k or v", plan->seq_->pending,
                  job.group->config.n_kv_heads,
                  side == KVT_SIDE_K ? job.group->config.k_dim : job.group->config.v_dim, &view);

    saved = kvt_fpenv_enter();
    stored = append_head(&job, side);
    kvt_fpenv_leave(saved);
    if (!stored) {
        __atomic_store_n(&plan->status_, KVT_ERR_VALUE, __ATOMIC_RELAXED);
        kvt_fail(cache, KVT_ERR_VALUE,
                 "layer %u, kv head %zu: a value of %s is not finite or "
                 "beyond its type",
                 plan->layer_, job.head, side == KVT_SIDE_K ? "K" : "V");
    }
    __atomic_fetch_or(&plan->done_[i / 64], (uint64_t)1 << i % 64, __ATOMIC_RELEASE);
    return stored ? KVT_OK : KVT_ERR_VALUE;
}

/* ---- plan, finish, and both in one ---- */

kvt_status kvt_append_plan_init(kvt_append_plan *plan, kvt_seq *seq, uint32_t layer,
                                const kvt_tensor *k, const kvt_tensor *v)
{
    const kvt_group *group;
    const kvt_group_config *config;
    kvt_view view;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!plan)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_append: plan is NULL");
    if (layer >= seq->cache->n_layers)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_append: layer %u of %u", layer,
                        seq->cache->n_layers);
    if (!seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_append: no step is pending");
    if (seq->appended[layer])
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_append: layer %u has its tokens already",
                        layer);
    group = &seq->cache->groups[seq->cache->layers[layer].group];
    config = &group->config;
    if (group->v_in_k && v)
        return kvt_fail(seq->cache, KVT_ERR_ARG,
                        "kvt_append: v is not NULL, but V of layer %u is the first dims of K",
                        layer);
    status =
        kvt_view_make(seq->cache, k, "k", seq->pending, config->n_kv_heads, config->k_dim, &view);
    if (status == KVT_OK && !group->v_in_k)
        status = kvt_view_make(seq->cache, v, "v", seq->pending, config->n_kv_heads, config->v_dim,
                               &view);
    if (status != KVT_OK)
        return status;
    memset(plan, 0, sizeof *plan);
    plan->n_tasks = (size_t)config->n_kv_heads * (group->v_in_k ? 1 : 2);
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
    seq->appended[plan->layer_] = 1;
    seq->n_appended++;
    return KVT_OK;
}

static void run_task(void *plan, size_t i)
{
    kvt_append_task(plan, i);
}

/* Below this many elements a hand-over to threads costs more than it saves. */
#define PARALLEL_FROM 32768

kvt_status kvt_append(kvt_seq *seq, uint32_t layer, const kvt_tensor *k, const kvt_tensor *v)
{
    const kvt_group_config *config;
    kvt_append_plan plan;
    kvt_status status = kvt_append_plan_init(&plan, seq, layer, k, v);
    if (status != KVT_OK)
        return status;
    config = &seq->cache->groups[seq->cache->layers[layer].group].config;
    if (seq->pending * config->n_kv_heads * (config->k_dim + (v ? config->v_dim : 0)) <
        PARALLEL_FROM) {
        for (size_t i = 0; i < plan.n_tasks; i++)
            run_task(&plan, i);
    } else {
        kvt_parallel_run(seq->cache, run_task, &plan, plan.n_tasks);
    }
    return kvt_append_finish(&plan);
}
