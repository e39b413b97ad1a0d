/*
 * The arithmetic of attention over one unit's rows: scores, softmax and weighted sum block by
 * block, a softmax of its own for each range, the merge of two, and the last division.
 */
#include "attend_unit.h"

#include <math.h>

/* Query and head of a row of the unit. */
static uint64_t query_of(const kvt_unit *u, size_t row)
{
    return (u->first_row + row) / kvt_group_size(u->group);
}

static size_t head_of(const kvt_unit *u, size_t row)
{
    size_t group = kvt_group_size(u->group);
    return u->kv_head * group + (u->first_row + row) % group;
}

uint64_t kvt_unit_visible(const kvt_unit *u, size_t row)
{
    if ((u->args->flags & KVT_ATTEND_CAUSAL) && !u->item->mask)
        return u->n_tokens - (u->item->n_queries - 1 - query_of(u, row));
    return u->n_tokens;
}

static int32_t position_of(const kvt_unit *u, uint64_t query)
{
    uint64_t token;
    if (u->item->query_positions)
        return u->item->query_positions[query];
    token = u->n_tokens - u->item->n_queries + query;
    return kvt_seq_meta(u->item->seq, (size_t)(token / KVT_TOKENS))->positions[token % KVT_TOKENS];
}

static void mask_scores(const kvt_unit *u, size_t row, uint64_t first_token, size_t n,
                        float *scores)
{
    const kvt_attend_item *item = u->item;
    const uint8_t *bits = item->mask + query_of(u, row) * item->mask_stride;
    uint64_t begin = u->n_tokens - item->mask_tokens;
    for (size_t t = begin > first_token ? (size_t)(begin - first_token) : 0; t < n; t++) {
        uint64_t bit = first_token + t - begin;
        if (!(bits[bit / 8] >> bit % 8 & 1))
            scores[t] = -INFINITY;
    }
}

int kvt_unit_load(const kvt_unit *u, const kvt_view *view)
{
    const kvt_kernels *k = &u->cache->kernels;
    size_t dims = u->group->config.k_dim, dims_p = u->group->layout.k_dims;
    for (size_t r = 0; r < u->rows; r++) {
        float *q = u->q + r * dims_p, *stored = u->q_stored + r * dims_p;
        if (!kvt_view_load(k, view, u->first_query + query_of(u, r), head_of(u, r), dims, q))
            return 0;
        memset(q + dims, 0, (dims_p - dims) * sizeof *q);
        memcpy(stored, q, dims_p * sizeof *q);
        if (u->group->rotates)
            k->rotate(stored, u->group->signs + u->kv_head * dims, dims, u->group->rotation_block,
                      u->group->rotation_scale_q);
    }
    return 1;
}

typedef void qk_function(const float *q, size_t ldq, size_t rows, const void *codes,
                         const uint16_t *scales, size_t n_tokens, size_t dims_p, float *s);
typedef void pv_function(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                         size_t n_tokens, size_t dims_p, const float *alpha, float *acc,
                         size_t ldacc);

static qk_function *qk_of(const kvt_kernels *k, kvt_type type)
{
    return type == KVT_TYPE_F32 ? k->qk_f32 : type == KVT_TYPE_F16 ? k->qk_f16 : k->qk_i8;
}

static pv_function *pv_of(const kvt_kernels *k, kvt_type type)
{
    return type == KVT_TYPE_F32 ? k->pv_f32 : type == KVT_TYPE_F16 ? k->pv_f16 : k->pv_i8;
}

/*
 * Ask for memory that is needed soon, into the second-level cache. A head's codes are a run of a
 * few pages in each block; the hardware's own prefetch stops at every page and starts late. For
 * i8, whose kernels compute long enough to cover it, this gave 3 to 18% (AVX2, 32k tokens, Zen 4);
 * f16 and f32 lost up to 12% by it and go without.
 */
static void prefetch(const unsigned char *memory, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(memory + i, 0, 2);
}

/*
 * One block: scores, softmax, weighted sum. Rows see ever more tokens in ascending order, so
 * those that see anything of the block are the last ones.
 */
static void attend_block(const kvt_unit *u, size_t block_row, kvt_part out)
{
    const kvt_kernels *k = &u->cache->kernels;
    const kvt_layout *layout = &u->group->layout;
    const kvt_attend_args *args = u->args;
    const kvt_block *block = kvt_seq_block(u->item->seq, block_row, u->group_index);
    const unsigned char *record = kvt_head_record(u->group, block, u->layer_index, u->kv_head);
    const uint16_t *offset = (const uint16_t *)(const void *)(record + layout->k_offset);
    uint64_t first_token = (uint64_t)block_row * KVT_TOKENS;
    uint64_t last = kvt_unit_visible(u, u->rows - 1) - first_token;
    size_t n = last < KVT_TOKENS ? (size_t)last : KVT_TOKENS;
    size_t from = 0;

    while (kvt_unit_visible(u, from) <= first_token)
        from++;
    if (u->group->config.v_type == KVT_TYPE_I8)
        prefetch(record + layout->v_scales, layout->v_scale_bytes + layout->v_code_bytes);
    qk_of(k, u->group->config.k_type)(u->q_stored + from * layout->k_dims, layout->k_dims,
                                      u->rows - from, record + layout->k_codes,
                                      (const uint16_t *)(const void *)(record + layout->k_scales),
                                      n, layout->k_dims, u->scores + from * KVT_TOKENS);

    for (size_t r = from; r < u->rows; r++) {
        float *s = u->scores + r * KVT_TOKENS;
        uint64_t sees = kvt_unit_visible(u, r) - first_token;
        size_t n_row = sees < n ? (size_t)sees : n;
        float add = u->group->offsets
                        ? k->dot_f16(u->q + r * layout->k_dims, offset, layout->k_dims)
                        : 0.0f;
        k->logits(s, n_row, add, u->scale, args->softcap);
        if (args->alibi_slopes)
            k->alibi(s, n_row, kvt_seq_meta(u->item->seq, block_row)->positions,
                     position_of(u, query_of(u, r)), args->alibi_slopes[head_of(u, r)]);
        if (u->item->mask)
            mask_scores(u, r, first_token, n_row, s);
        u->alpha[r] = k->softmax(s, n_row, &out.m[r], &out.l[r]);
    }
    if (u->group->config.k_type == KVT_TYPE_I8 && block_row + 1 < u->item->seq->n_rows)
        prefetch(kvt_head_record(u->group,
                                 kvt_seq_block(u->item->seq, block_row + 1, u->group_index),
                                 u->layer_index, u->kv_head),
                 layout->v_scales);
    pv_of(k, u->group->config.v_type)(
        u->scores + from * KVT_TOKENS, u->rows - from, record + layout->v_codes,
        (const uint16_t *)(const void *)(record + layout->v_scales), n, layout->v_dims,
        u->alpha + from, out.acc + from * layout->v_dims, layout->v_dims);
}

void kvt_unit_range(const kvt_unit *u, size_t range, kvt_part out)
{
    const size_t rows_a_range = KVT_RANGE_TOKENS / KVT_TOKENS;
    uint64_t visible = kvt_unit_visible(u, u->rows - 1);
    size_t end = kvt_rows(visible);

    memset(out.acc, 0, u->rows * u->group->layout.v_dims * sizeof *out.acc);
    for (size_t r = 0; r < u->rows; r++) {
        out.m[r] = -INFINITY;
        out.l[r] = 0.0f;
    }
    if (end > (range + 1) * rows_a_range)
        end = (range + 1) * rows_a_range;
    for (size_t row = range * rows_a_range; row < end; row++)
        attend_block(u, row, out);
}

void kvt_unit_merge(const kvt_unit *u, kvt_part into, kvt_part from)
{
    size_t dims = u->group->layout.v_dims;
    for (size_t r = 0; r < u->rows; r++)
        u->cache->kernels.merge(into.acc + r * dims, &into.m[r], &into.l[r], from.acc + r * dims,
                                from.m[r], from.l[r], dims);
}

/* What finish and the unit know of a row. */
typedef struct unit_row {
    float m, lse;
    uint64_t visible;
    int masked;
} unit_row;

/*
 * Whether a row's result can be trusted. Overflow in a logit leaves infinity or NaN in the
 * log-sum-exp, or -inf as the maximum though tokens are visible; overflow in a sum of V, in acc.
 */
static int is_sound(const unit_row *row, const float *acc, size_t dims)
{
    uint32_t bad = 0;
    for (size_t d = 0; d < dims; d++)
        bad |= (kvt_f32_bits(acc[d]) & 0x7f800000u) == 0x7f800000u;
    if (row->m == -INFINITY)
        return !bad && (row->masked || row->visible == 0);
    return !bad && isfinite(row->lse);
}

int kvt_unit_store(const kvt_unit *u, kvt_part result, const kvt_view *out)
{
    const kvt_kernels *k = &u->cache->kernels;
    size_t dims = u->group->layout.v_dims, heads = u->group->config.n_q_heads;
    int sound = 1;
    for (size_t r = 0; r < u->rows; r++) {
        size_t head = head_of(u, r);
        uint64_t query = u->first_query + query_of(u, r);
        float *acc = result.acc + r * dims;
        float sink = u->args->sink_logits ? u->args->sink_logits[head] : -INFINITY;
        float lse = k->finish(acc, dims, result.m[r], result.l[r], sink);
        unit_row row = {result.m[r], lse, kvt_unit_visible(u, r), u->item->mask != NULL};
        sound &= is_sound(&row, acc, u->group->config.v_dim);
        kvt_view_store(k, out, query, head, u->group->config.v_dim, acc);
        if (u->args->lse)
            u->args->lse[query * heads + head] = lse;
    }
    return sound;
}
