/*
 * Append: the pending step's keys and values into the blocks of one layer.
 *
 * One task is one kv head's K or V: it walks the rows (blocks) of the step in ascending order. A
 * row of an i8 side is first rounded to what an open block holds, f16 in the stored domain less an
 * offset; a row that becomes old with this step is sealed (seal.c) once its tokens are there, and
 * one that is old as soon as it comes goes through a temporary open record straight into the
 * sealed block. Nothing is visible before finish marks the layer, so a value that cannot be stored
 * leaves the sequence as it was: slots beyond the visible tokens may hold anything. Where V is in
 * K, every task is K's.
 */
#include "src/cache/cache.h"
#include "src/fpenv.h"
#include "src/tensor.h"

#define ROWS_FLOATS 8192 /* the buffer of f32 rows: 16 rows of 512 dims */
/* Rows prefetched ahead of the one rotated: few, as rows whole pages apart share 8 ways of L1. */
#define ROWS_AHEAD 2

typedef struct kvt_append_job {
    const kvt_kernels *kernels;
    const kvt_group *group;
    kvt_seq *seq;
    uint32_t group_index, layer_index;
    kvt_view views[2]; /* of K and V */
} kvt_append_job;

/* What one task works on. */
typedef struct append_side {
    const kvt_append_job *job;
    kvt_side side;
    size_t head;
    kvt_type type; /* that the group stores */
    size_t dims, dims_p;
    size_t rows_at_once; /* that the buffer has room for */
    const kvt_rotation *rotation;
    const float *signs; /* of the head; NULL: not rotated */
    int has_offset;
    float *border; /* where rows of block 1 are kept: border.c; NULL: they are not */
} append_side;

static append_side side_of(const kvt_append_job *job, kvt_side side, size_t head)
{
    const kvt_group *group = job->group;
    const kvt_layout *layout = &group->layouts[KVT_SEALED];
    int is_k = side == KVT_SIDE_K;
    append_side s = {job,
                     side,
                     head,
                     is_k ? group->config.k_type : group->config.v_type,
                     is_k ? group->config.k_dim : group->config.v_dim,
                     is_k ? layout->k_dims : layout->v_dims,
                     0,
                     is_k ? &group->rotation_k : &group->rotation_v,
                     NULL,
                     is_k && group->offsets,
                     NULL};
    if (s.has_offset)
        s.border = kvt_border_keys(job->seq, job->group_index, job->layer_index, head);
    s.rows_at_once =
        ROWS_FLOATS / s.dims < KVT_TILE_TOKENS ? ROWS_FLOATS / s.dims : KVT_TILE_TOKENS;
    if (s.rotation->block)
        s.signs = s.rotation->signs + head * s.rotation->stride;
    return s;
}

static kvt_record record_of(const append_side *s, const kvt_block *block)
{
    return kvt_record_of(s->job->group, block, s->side, s->job->layer_index, s->head);
}

static kvt_block *block_of(const append_side *s, size_t row)
{
    return kvt_seq_block(s->job->seq, row, s->job->group_index);
}

/* The sealed form that this step makes of an open row, or NULL. */
static kvt_block *sealed_of(const append_side *s, size_t row)
{
    const kvt_seq *seq = s->job->seq;
    if (!kvt_is_open(block_of(s, row)->form))
        return NULL;
    return kvt_seq_block(seq, row, kvt_beside(seq->cache, s->job->group_index));
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

/* The step's tokens i .. i + n - 1 into the buffer. 0: a value is not finite. */
static int load_rows(const append_side *s, uint64_t i, size_t n, float *buffer)
{
    for (size_t j = 0; j < n; j++)
        if (!kvt_view_load(s->job->kernels, &s->job->views[s->side], i + j, s->head, s->dims,
                           buffer + j * s->dims))
            return 0;
    return 1;
}

/*
 * Prefetch the step's i-th token, if there is one. A token's rows of all heads lie between two of
 * a head, often whole pages, which hardware prefetchers do not cross.
 */
static void prefetch_row(const append_side *s, uint64_t i)
{
    const kvt_view *view = &s->job->views[s->side];
    const size_t bytes = s->dims * (view->dtype == KVT_F32 ? 4 : 2);
    const unsigned char *row = view->data + (size_t)i * view->token_stride;
    if (i >= s->job->seq->pending)
        return;
    for (size_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(row + s->head * view->head_stride + at);
}

/*
 * The same in the stored domain. Rows of f32 are rotated as they are: what is not finite makes all
 * of its block so, which no put takes.
 */
static int load_rotated(const append_side *s, uint64_t i, size_t n, float *buffer)
{
    const kvt_kernels *kernels = s->job->kernels;
    const kvt_view *view = &s->job->views[s->side];
    if (!s->signs)
        return load_rows(s, i, n, buffer);
    for (size_t j = 0; j < n; j++) {
        float *row = buffer + j * s->dims;
        kvt_rows_f32 rows = {row, s->dims};
        prefetch_row(s, i + j + ROWS_AHEAD);
        if (!rows_in_place(view, i + j, s->head, &rows) &&
            !kvt_view_load(kernels, view, i + j, s->head, s->dims, row))
            return 0;
        kernels->rotate(rows.x, s->signs, s->dims, s->rotation->block, s->rotation->scale, row);
    }
    return 1;
}

/* ---- rows into records ---- */

/*
 * The block that a new row behind block 1 takes its offset from: the one before, as long as it is
 * open. Where the step seals that as it comes, the last block that was open when it began, which
 * is what single tokens would have handed on; or block 0, sealed before or by this step. Without a
 * residual window single tokens find the block before sealed: it is always block 0.
 *
 * All of these have the same offset, that of block 0 once it is sealed, unless kvt_seq_remove has
 * taken that one out: then open blocks go on with its offset, which no sealed block has. So does
 * the last block of a snapshot that begins behind block 0, or was converted.
 */
static const kvt_block *base_block(const append_side *s, size_t row)
{
    const size_t n_before = kvt_rows(s->job->seq->length);
    const kvt_block *block = block_of(s, row - 1);
    const int hands_on = s->job->group->residual_tokens > 0;
    if (hands_on && kvt_is_open(block->form))
        return block;
    if (hands_on && n_before > 1 && kvt_is_open(block_of(s, n_before - 1)->form))
        return block_of(s, n_before - 1);
    block = sealed_of(s, 0);
    return block ? block : block_of(s, 0);
}

/*
 * The offset of an open record whose slot 0 is written: in block 0 the first key, in block 1 the
 * mean of block 0, in later ones the same.
 */
static void base_offset(const append_side *s, size_t row, const float *first, uint16_t *offset)
{
    const kvt_append_job *job = s->job;
    const kvt_block *block;
    kvt_record record;

    if (row == 0) {
        job->kernels->store_f16(first, offset, s->dims); /* saturates at +-65504 */
        return;
    }
    if (row == 1) {
        block = sealed_of(s, 0); /* by this step, before this row */
        block = block ? block : block_of(s, 0);
    } else {
        block = base_block(s, row);
    }
    record = record_of(s, block);
    if (row == 1 && kvt_is_open(block->form))
        kvt_seal_offset(job->kernels, job->group, kvt_sealed_form(job->group, 0), &record, offset);
    else
        memcpy(offset, record.offset, s->dims_p * sizeof *offset);
}

/* Tokens of an i8 side into an open record, from slot `slot` on. 0: a value cannot be stored. */
static int put_open(const append_side *s, size_t row, uint64_t i, size_t n, const kvt_record *to,
                    size_t slot)
{
    const kvt_kernels *kernels = s->job->kernels;
    float buffer[ROWS_FLOATS];

    for (size_t end = slot + n; slot < end;) {
        size_t part = KVT_TILE_TOKENS - slot % KVT_TILE_TOKENS;
        part = part < end - slot ? part : end - slot;
        part = part < s->rows_at_once ? part : s->rows_at_once;
        if (!load_rotated(s, i, part, buffer))
            return 0;
        if (s->border && row > 0)
            memcpy(s->border + slot * s->dims, buffer, part * s->dims * sizeof *buffer);
        if (s->has_offset && slot == 0)
            base_offset(s, row, buffer, to->offset);
        if (!kvt_open_put(kernels, s->job->group, s->side, buffer, part, s->dims, to, slot))
            return 0;
        slot += part;
        i += part;
    }
    return 1;
}

/*
 * Tokens of an i8 side into a sealed record: what was truncated is filled up. They pass through a
 * tile of an open record, as all others do, so that a token is the same whether it comes into the
 * sealed block or is moved there from an open one (select.c). Block 0 is sealed, as all before.
 */
static int put_sealed(const append_side *s, uint32_t form, uint64_t i, size_t n,
                      const kvt_record *to, size_t slot)
{
    const kvt_kernels *kernels = s->job->kernels;
    const kvt_group *group = s->job->group;
    _Alignas(64) uint16_t codes[KVT_TILE_TOKENS * KVT_MAX_DIM], scales[KVT_TILE_TOKENS];
    /* Without offsets a window may have released block 0. */
    const kvt_record open = {codes, scales,
                             s->has_offset ? record_of(s, block_of(s, 0)).offset : NULL, NULL};
    float buffer[ROWS_FLOATS];

    if (s->dims != s->dims_p) /* the padding */
        memset(codes, 0, KVT_TILE_TOKENS * s->dims_p * sizeof *codes);
    for (size_t end = slot + n; slot < end;) {
        size_t in_tile = slot % KVT_TILE_TOKENS, part = KVT_TILE_TOKENS - in_tile;
        part = part < end - slot ? part : end - slot;
        part = part < s->rows_at_once ? part : s->rows_at_once;
        if (!load_rotated(s, i, part, buffer) ||
            !kvt_open_put(kernels, group, s->side, buffer, part, s->dims, &open, in_tile))
            return 0;
        kvt_sealed_put(kernels, group, s->side, form, &open, in_tile, part, buffer, to, slot);
        slot += part;
        i += part;
    }
    return 1;
}

typedef int put_function(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                         void *codes, uint16_t *scales, size_t slot);

/* Tokens of an f32 or f16 side, which is the same in both forms. */
static int put_plain(const append_side *s, uint64_t i, size_t n, const kvt_record *to, size_t slot)
{
    const kvt_kernels *k = s->job->kernels;
    int is_f32 = s->type == KVT_TYPE_F32;
    put_function *put = s->side == KVT_SIDE_K ? (is_f32 ? k->put_k_f32 : k->put_k_f16)
                                              : (is_f32 ? k->put_v_f32 : k->put_v_f16);
    float buffer[ROWS_FLOATS];

    for (size_t end = slot + n; slot < end;) {
        size_t part = KVT_TILE_TOKENS - slot % KVT_TILE_TOKENS;
        kvt_rows_f32 rows = {buffer, s->dims};
        part = part < end - slot ? part : end - slot;
        part = part < s->rows_at_once ? part : s->rows_at_once;
        /* f16's put refuses what is not finite, f32's takes it */
        if ((is_f32 || !rows_in_place(&s->job->views[s->side], i, s->head, &rows)) &&
            !load_rows(s, i, part, buffer))
            return 0;
        if (!put(rows.x, rows.ldx, part, s->dims, s->dims_p, to->codes, NULL, slot))
            return 0;
        slot += part;
        i += part;
    }
    return 1;
}

/*
 * All 64 tokens of a row of an i8 side through a temporary open record into a sealed one. The
 * padding of the dims has to be zero.
 */
static int put_direct_by(const append_side *s, size_t row, uint64_t i, const kvt_record *sealed,
                         uint16_t *codes)
{
    _Alignas(64) uint16_t scales[KVT_TOKENS], offset[KVT_MAX_DIM];
    kvt_record open = {codes, scales, s->has_offset ? offset : NULL, NULL};

    if (s->dims != s->dims_p) {
        memset(codes, 0, s->dims_p * KVT_TOKENS * sizeof *codes);
        memset(offset, 0, s->dims_p * sizeof *offset);
    }
    if (!put_open(s, row, i, KVT_TOKENS, &open, 0))
        return 0;
    kvt_seal(s->job->kernels, s->job->group, s->side, kvt_sealed_form(s->job->group, row), &open,
             NULL, sealed);
    return 1;
}

#if defined(__GNUC__)
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE
#endif

/* Two sizes, so that only what needs 128 KiB of stack has them. */
#define DIRECT_DIMS 256

static NOINLINE int put_direct_small(const append_side *s, size_t row, uint64_t i,
                                     const kvt_record *sealed)
{
    _Alignas(64) uint16_t codes[DIRECT_DIMS * KVT_TOKENS];
    return put_direct_by(s, row, i, sealed, codes);
}

static NOINLINE int put_direct_large(const append_side *s, size_t row, uint64_t i,
                                     const kvt_record *sealed)
{
    _Alignas(64) uint16_t codes[KVT_MAX_DIM * KVT_TOKENS];
    return put_direct_by(s, row, i, sealed, codes);
}

/* ---- the tasks ---- */

/* n tokens of the step, from its i-th on, into one row from `slot` on. */
static int append_row(const append_side *s, size_t row, size_t slot, uint64_t i, size_t n)
{
    const kvt_seq_group *state = &s->job->seq->groups[s->job->group_index];
    const kvt_block *block = block_of(s, row);
    kvt_record record = record_of(s, block);

    if (!kvt_is_sealed_type(s->type))
        return put_plain(s, i, n, &record, slot);
    if (kvt_is_open(block->form))
        return put_open(s, row, i, n, &record, slot);
    if (row < state->n_sealed)
        return put_sealed(s, block->form, i, n, &record, slot);
    assert(slot == 0 && n == KVT_TOKENS);
    return (s->dims_p <= DIRECT_DIMS ? put_direct_small : put_direct_large)(s, row, i, &record);
}

/* The codes that follow a side's in a block: those of the head's V, or of the next head's K. */
static const void *after(const append_side *s, const kvt_block *block)
{
    const kvt_group *group = s->job->group;
    const kvt_layout *layout = kvt_block_layout(group, block);
    const int is_v = s->side == KVT_SIDE_K && !group->v_in_k;
    const size_t head = is_v ? s->head : s->head + 1;
    if (head == group->config.n_kv_heads)
        return NULL;
    return kvt_head_record(group, block, s->job->layer_index, head) +
           (is_v ? layout->v_codes : layout->k_codes);
}

/* Seal a row that has both forms. */
static void seal_row(const append_side *s, size_t row)
{
    const kvt_block *block = block_of(s, row), *to = sealed_of(s, row);
    kvt_record open, sealed;
    if (!to || to->twin) /* was sealed as it came, or by another sequence that has the block */
        return;
    open = record_of(s, block);
    sealed = record_of(s, to);
    kvt_seal(s->job->kernels, s->job->group, s->side, to->form, &open, after(s, block), &sealed);
}

/* All of the step's tokens of one head's K or V. 0: a value cannot be stored. */
static int append_head(const kvt_append_job *job, kvt_side side, size_t head)
{
    const kvt_seq *seq = job->seq;
    const kvt_seq_group *state = &seq->groups[job->group_index];
    append_side s = side_of(job, side, head);
    size_t row = state->n_sealed;

    /* What is sealed in ascending order, each row when its tokens are there: offsets of later
     * rows come from block 0. */
    for (; row < state->seal_end && (row + 1) * (uint64_t)KVT_TOKENS <= seq->length; row++)
        seal_row(&s, row);
    for (uint64_t i = 0; i < seq->pending;) {
        uint64_t token = seq->length + i, left = seq->pending - i;
        size_t slot = (size_t)(token % KVT_TOKENS), n = KVT_TOKENS - slot;
        row = (size_t)(token / KVT_TOKENS);
        n = n < left ? n : (size_t)left;
        if (!append_row(&s, row, slot, i, n))
            return 0;
        if (row >= state->n_sealed && row < state->seal_end && slot + n == KVT_TOKENS)
            seal_row(&s, row);
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

/* Bit i % 8 of it is task i's. Bytes: atomic on every machine, wherever the plan lies. */
static unsigned char *done_byte(kvt_append_plan *plan, size_t i)
{
    return (unsigned char *)plan->done_ + i / 8;
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
    __atomic_fetch_or(done_byte(plan, i), (unsigned char)(1u << i % 8), __ATOMIC_RELEASE);
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
    if (__atomic_load_n(&plan->status_, __ATOMIC_RELAXED) != KVT_OK)
        return KVT_ERR_VALUE; /* some tasks may not have run, then */
    for (size_t i = 0; i < plan->n_tasks; i++)
        if (!(__atomic_load_n(done_byte(plan, i), __ATOMIC_ACQUIRE) >> i % 8 & 1))
            return kvt_fail(seq->cache, KVT_ERR_STATE,
                            "kvt_append_finish: task %zu of %zu has not run", i, plan->n_tasks);
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
 * Prefetch the lines that the first of the step's tokens will be written to: a lone key has one of
 * its own for each 2 or 4 bytes, far more than its values fill.
 */
static void prefetch_token(const kvt_append_job *job, size_t head)
{
    uint64_t token = job->seq->length;
    const kvt_block *block =
        kvt_seq_block(job->seq, (size_t)(token / KVT_TOKENS), job->group_index);
    const kvt_layout *layout = kvt_block_layout(job->group, block);
    size_t slot = (size_t)(token % KVT_TOKENS), tile = slot / KVT_TILE_TOKENS;
    const unsigned char *record = kvt_head_record(job->group, block, job->layer_index, head);
    size_t k_bytes = layout->k_code_bytes / (KVT_TOKENS / KVT_TILE_TOKENS);
    size_t v_bytes = layout->v_code_bytes / KVT_TOKENS;
    const unsigned char *k = record + layout->k_codes + tile * k_bytes;
    const unsigned char *v = record + layout->v_codes;
    if (layout->v_type == KVT_TYPE_I8) { /* four tokens lie together */
        v_bytes *= 4;
        slot /= 4;
    }
    for (size_t at = 0; at < k_bytes; at += 64)
        __builtin_prefetch(k + at, 1);
    for (size_t at = 0; at < v_bytes; at += 64)
        __builtin_prefetch(v + slot * v_bytes + at, 1);
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
            prefetch_token(job, head + 1);
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
    const kvt_seq_group *state;
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
    state = &seq->groups[job.group_index];
    elements = (seq->pending + (state->seal_end - state->n_sealed) * (uint64_t)KVT_TOKENS) *
               config->n_kv_heads * (config->k_dim + (v ? config->v_dim : 0));
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
