/*
 * A block that a truncate has cut is open again, where its K has 4 bits.
 *
 * K's scales are by dims: they are those of the 64 tokens that the block had, and would clip what
 * comes in place of the ones that are gone. So the tokens that are left become open rows, and the
 * block is sealed anew with the others. That must not wear them down if it happens again and again:
 *
 *  - K's rows are the numbers that the codes stood for, rounded to f16, and the seed has each dim's
 *    scale and middle and the tokens' gains: a dim whose range still covers all rows keeps both,
 *    and the tokens their codes, and their gains in any case (seal.c, keep_grid). A dim whose range
 *    does not has its tokens rounded to a new grid.
 *  - V's rows are its codes' multiples of the scale, which f16 holds exactly, and it. 8 and 5
 *    bits are sealed to the same codes and scale, as one element is the largest multiple (a scale
 *    that is a subnormal f16 may come out one step less). For 4 bits, whose scale comes of a
 *    search, the scale is made negative: such a row is taken over.
 *
 * A block of the fine form stays sealed, as i8 does: what is appended is quantized at once.
 */
#include "src/cache/cache.h"
#include "src/fpenv.h"

typedef struct reopen_job {
    const kvt_seq *seq;
    const kvt_group *group;
    uint32_t group_index;
    size_t row, n_tokens;
    kvt_block *open;
} reopen_job;

static void reopen_k(const reopen_job *job, const kvt_record *from, size_t layer, size_t head,
                     const kvt_record *to)
{
    const kvt_kernels *kernels = &job->seq->cache->kernels;
    const kvt_group *group = job->group;
    const size_t dims = group->config.k_dim, dims_p = group->layouts[KVT_OPEN].k_dims;
    const uint8_t *gains = kvt_record_gains(from, dims_p);
    float x[KVT_MAX_DIM];

    if (job->row == 0) {
        memcpy(to->offset, from->offset, dims * sizeof *to->offset);
    } else { /* as all rows behind block 0 */
        const kvt_block *zero = kvt_seq_block(job->seq, 0, job->group_index);
        const kvt_record first = kvt_record_of(group, zero, KVT_SIDE_K, layer, head);
        memcpy(to->offset, first.offset, dims * sizeof *to->offset);
    }
    for (size_t t = 0; t < job->n_tokens; t++) {
        kvt_k4_get(kernels, from, t, dims, dims_p, x);
        kvt_open_put_back(kernels, group, x, dims, to, t);
    }
    memcpy(to->seed, from->scales, dims * sizeof *to->seed);
    memcpy(to->seed + dims_p, from->offset, dims * sizeof *to->seed);
    memcpy(kvt_seed_gains(to->seed, dims_p), gains, job->n_tokens);
}

/* The multiple of its scale that a code stands for: dims of one token. */
static void multiples(const kvt_kernels *kernels, kvt_type type, const void *codes, size_t t,
                      size_t dims, size_t dims_p, float *x)
{
    uint16_t ones[KVT_TOKENS];
    ones[t] = KVT_F16_ONE;
    (type == KVT_TYPE_I8   ? kernels->get_v_i8
     : type == KVT_TYPE_I4 ? kernels->get_v_i4
                           : kernels->get_v_i5)(codes, ones, t, dims, dims_p, x);
}

static void reopen_v(const reopen_job *job, const kvt_record *from, const kvt_record *to)
{
    const kvt_kernels *kernels = &job->seq->cache->kernels;
    const kvt_layout *layout = &job->group->layouts[KVT_OPEN];
    const size_t dims = job->group->config.v_dim, dims_p = layout->v_dims;
    const kvt_type type = job->group->config.v_type;
    float x[KVT_MAX_DIM];

    if (!kvt_is_sealed_type(type)) { /* tokens lie one behind the other */
        memcpy(to->codes, from->codes, layout->v_code_bytes / KVT_TOKENS * job->n_tokens);
        return;
    }
    for (size_t t = 0; t < job->n_tokens; t++) {
        multiples(kernels, type, from->codes, t, dims, dims_p, x);
        kernels->put_v_f16(x, dims, 1, dims, dims_p, to->codes, NULL, t);
        to->scales[t] = from->scales[t];
        if (type == KVT_TYPE_I4)
            to->scales[t] |= KVT_F16_MINUS;
    }
}

static void reopen_layer(void *arg, size_t layer)
{
    const reopen_job *job = arg;
    const kvt_block *sealed = kvt_seq_block(job->seq, job->row, job->group_index);
    kvt_fpenv saved = kvt_fpenv_enter();
    for (size_t head = 0; head < job->group->config.n_kv_heads; head++) {
        const kvt_record k = kvt_record_of(job->group, sealed, KVT_SIDE_K, layer, head);
        const kvt_record v = kvt_record_of(job->group, sealed, KVT_SIDE_V, layer, head);
        const kvt_record open_k = kvt_record_of(job->group, job->open, KVT_SIDE_K, layer, head);
        const kvt_record open_v = kvt_record_of(job->group, job->open, KVT_SIDE_V, layer, head);
        reopen_k(job, &k, layer, head, &open_k);
        reopen_v(job, &v, &open_v);
    }
    kvt_fpenv_leave(saved);
}

void kvt_reopen(const kvt_seq *seq, uint32_t g, size_t row, kvt_block *open)
{
    kvt_parallel *parallel = &seq->cache->parallel;
    const kvt_group *group = &seq->cache->groups[g];
    const kvt_group_config *config = &group->config;
    reopen_job job = {seq, group, g, row, (size_t)(seq->length - (uint64_t)row * KVT_TOKENS), open};
    uint64_t elements = (uint64_t)job.n_tokens * config->n_layers * config->n_kv_heads *
                        (config->k_dim + config->v_dim);
    assert(row + 1 == seq->n_rows && group->reopens);
    kvt_parallel_run(parallel, reopen_layer, &job, config->n_layers,
                     kvt_parallel_threads(parallel, elements)); /* about a nanosecond each */
}
