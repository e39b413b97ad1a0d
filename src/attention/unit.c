/*
 * The arithmetic of attention over one unit's rows: scores, softmax and weighted sum block by
 * block, a softmax of its own for each range, the merge of two, and the last division.
 */
#include "src/attention/attention.h"

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

/* Of the row's query; where several items share a prefix, of the item that the query is of. */
static int32_t position_of(const kvt_unit *u, size_t row)
{
    const kvt_attend_item *item = u->item;
    uint64_t query = query_of(u, row), n_tokens = u->n_tokens;
    while (query >= item->n_queries) {
        query -= item->n_queries;
        item++;
        n_tokens = kvt_seq_visible(item->seq, u->args->layer);
    }
    return kvt_query_position(item, n_tokens, query);
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

/* The window, for a row that sees n tokens of a block. */
static void mask_window(const kvt_unit *u, size_t row, size_t block_row, size_t n, float *scores)
{
    const int32_t *positions = kvt_seq_meta(u->item->seq, block_row)->positions;
    int64_t behind = (int64_t)position_of(u, row) - (int64_t)u->group->window_tokens;
    uint64_t first_token = (uint64_t)block_row * KVT_TOKENS, sinks = u->group->sink_tokens;
    for (size_t t = sinks > first_token ? (size_t)(sinks - first_token) : 0; t < n; t++)
        scores[t] = positions[t] <= behind ? -INFINITY : scores[t];
}

/* Whether K is multiplied as integers, and V. */
static int is_integer(const kvt_unit *u, kvt_type type)
{
    return kvt_is_sealed_type(type) && !(u->args->flags & KVT_ATTEND_F32);
}

static int is_fast(const kvt_unit *u)
{
    return (u->args->flags & KVT_ATTEND_FAST) != 0;
}

static int is_finite_row(const float *x, size_t n)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++)
        bad |= (kvt_f32_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
    return !bad;
}

/*
 * Turn q as RoPE would by `shift` positions (src/cache/remove.c): pairs (a, b) of dims by the
 * cosine c and sine s of their angles become (a c - b s, a s + b c).
 */
static void turn_row(const kvt_unit *u, float *q)
{
    const kvt_group_config *config = &u->group->config;
    size_t pairs = config->rope_dims / 2;
    size_t apart = config->rope_pairing == KVT_ROPE_HALVES ? pairs : 1;
    size_t step = config->rope_pairing == KVT_ROPE_HALVES ? 1 : 2;
    const float *c, *s;
    if (pairs == 0)
        return;
    c = kvt_turn_of(u->item->seq->turns, u->group_index, u->shift);
    s = c + pairs;
    q += config->rope_first_dim;
    for (size_t i = 0; i < pairs; i++, q += step) {
        float a = q[0], b = q[apart];
        q[0] = a * c[i] - b * s[i];
        q[apart] = a * s[i] + b * c[i];
    }
}

/* Whether blocks of the group can have K as i8: fine ones too, which a snapshot may bring. */
static int has_k_i8(const kvt_group *group)
{
    return group->layouts[KVT_FINE].k_type == KVT_TYPE_I8;
}

/* q for keys that have moved by u->shift. */
static kvt_outcome load_rows(const kvt_unit *u)
{
    const kvt_kernels *k = &u->cache->kernels;
    size_t dims = u->group->config.k_dim, dims_p = u->group->layouts[KVT_SEALED].k_dims;
    const kvt_rotation *rotation = &u->group->rotation_k;
    for (size_t r = 0; r < u->rows; r++) {
        float *q = u->q + r * dims_p;
        if (!kvt_view_load(k, u->view, u->first_query + query_of(u, r), head_of(u, r), dims, q))
            return KVT_UNIT_BAD_QUERY;
        memset(q + dims, 0, (dims_p - dims) * sizeof *q);
        if (u->shift)
            turn_row(u, q);
        if (rotation->block)
            k->rotate(q, rotation->signs + u->kv_head * rotation->stride, dims, rotation->block,
                      rotation->inverse, q);
        if ((u->shift || rotation->block) && !is_finite_row(q, dims))
            return KVT_UNIT_OVERFLOWED;
    }
    if (is_integer(u, u->group->config.k_type) && has_k_i8(u->group))
        (is_fast(u) ? k->pack_q_fast : k->pack_q_near)(u->q, dims_p, u->rows, dims_p, u->packed);
    return KVT_UNIT_DONE;
}

kvt_outcome kvt_unit_load(kvt_unit *u, const kvt_view *view)
{
    u->view = view;
    u->shift = 0;
    u->unsound = 0;
    return load_rows(u);
}

static void turn_to(kvt_unit *u, int32_t shift)
{
    if (u->shift == shift)
        return;
    u->shift = shift;
    u->unsound |= load_rows(u) != KVT_UNIT_DONE;
}

/* The shift of a row's first n keys; KVT_SHIFT_MIXED: they differ. */
static int32_t shift_of(const kvt_meta *meta, size_t n)
{
    if (meta->shift != KVT_SHIFT_MIXED)
        return meta->shift;
    for (size_t t = 1; t < n; t++)
        if (meta->shifts[t] != meta->shifts[0])
            return KVT_SHIFT_MIXED;
    return meta->shifts[0];
}

/*
 * A product prefetches, while it computes, what the same product reads of the head's next block
 * (kernels.h, "next"): the hardware's own prefetch stops at every page and starts late. One side of
 * a block is too short a time for memory: prefetching V while K is multiplied took 1.3 times as
 * long where there is one row and codes have 4 bits.
 */

/* A head's record of one block, and the layout of the block's form. */
typedef struct head_block {
    const kvt_layout *layout;
    const unsigned char *record;
} head_block;

static head_block head_block_of(const kvt_unit *u, size_t block_row)
{
    const kvt_block *block = kvt_seq_block(u->item->seq, block_row, u->group_index);
    return (head_block){kvt_block_layout(u->group, block),
                        kvt_head_record(u->group, block, u->layer_index, u->kv_head)};
}

static const uint16_t *halves(const unsigned char *memory)
{
    return (const uint16_t *)(const void *)memory;
}

/*
 * The scales of n tokens of an open side, negative where a row of K has no offset (of V the sign
 * has no meaning here); NULL where all are 1, as they are but for a few rows, and where the side
 * has none.
 */
static const uint16_t *open_scales(const head_block *b, kvt_type type, size_t scale_bytes,
                                   size_t scales_at, size_t n)
{
    const uint16_t *scales = halves(b->record + scales_at);
    uint32_t differs = 0;
    if (type != KVT_TYPE_F16 || !scale_bytes)
        return NULL;
    for (size_t t = 0; t < n; t++)
        differs |= scales[t] ^ 0x3c00u;
    return differs ? scales : NULL;
}

/* x[r * 64 + t] *= scales[t] for the rows from `from` on and t < n. */
static void scale_tokens(const kvt_unit *u, size_t from, const uint16_t *scales, size_t n)
{
    for (size_t t = 0; t < n; t++) {
        float scale = kvt_f16_to_f32(scales[t] & 0x7fffu);
        for (size_t r = from; r < u->rows; r++)
            u->scores[r * KVT_TOKENS + t] *= scale;
    }
}

/* x[r * 64 + t] -= add[r] where token t has no offset: what is added to all scores of a row. */
static void take_offset(const kvt_unit *u, size_t from, const uint16_t *scales, size_t n)
{
    for (size_t t = 0; t < n; t++)
        for (size_t r = from; scales[t] >> 15 && r < u->rows; r++)
            u->scores[r * KVT_TOKENS + t] -= u->add[r];
}

/* 4-bit K some of whose middles the gains do not multiply: the parts of its scales and offset. */
typedef struct k4_parts {
    uint16_t scales[KVT_MAX_DIM];                   /* without their signs */
    uint16_t along[KVT_MAX_DIM], rest[KVT_MAX_DIM]; /* of the offset */
} k4_parts;

static void split_k4(const uint16_t *scales, const uint16_t *offset, size_t dims, k4_parts *parts)
{
    for (size_t d = 0; d < dims; d++) {
        const uint16_t marked = scales[d] & 0x8000u ? 0xffffu : 0;
        parts->scales[d] = scales[d] & 0x7fffu;
        parts->along[d] = offset[d] & (uint16_t)~marked;
        parts->rest[d] = offset[d] & marked;
    }
}

/*
 * Scores of 4-bit K, with the gains and what they multiply of the offset; the rest of it is left in
 * u->add. seldom: the memory is needed where scales are marked (simd/tile.h).
 */
static void scores_k4(const kvt_unit *u, size_t from, const head_block *b, size_t n,
                      const void *next, k4_parts *parts)
{
    const kvt_kernels *k = &u->cache->kernels;
    const size_t dims = b->layout->k_dims, rows = u->rows - from;
    const uint16_t *scales = halves(b->record + b->layout->k_scales);
    const uint16_t *offset = halves(b->record + b->layout->k_offset);
    const uint8_t *gains = kvt_k4_gains(scales, dims);
    const float *q = u->q + from * dims;
    float *s = u->scores + from * KVT_TOKENS, *add = u->add + from;

    if (parts)
        split_k4(scales, offset, dims, parts);
    (u->args->flags & KVT_ATTEND_F32 ? k->qk_i4 : k->qk_i4_near)(
        q, dims, rows, b->record + b->layout->k_codes, parts ? parts->scales : scales, n, dims,
        next, s);
    k->dots_f16(q, dims, rows, parts ? parts->along : offset, dims, add);
    k->gain_k(s, rows, gains, add);
    if (parts)
        k->dots_f16(q, dims, rows, parts->rest, dims, add);
    else
        memset(add, 0, rows * sizeof *add);
}

#if defined(__GNUC__)
__attribute__((noinline)) /* its memory on the stack is needed seldom */
#endif
static void
scores_k4_in_parts(const kvt_unit *u, size_t from, const head_block *b, size_t n, const void *next)
{
    k4_parts parts;
    scores_k4(u, from, b, n, next, &parts);
}

static int is_marked(const head_block *b)
{
    const uint16_t *scales = halves(b->record + b->layout->k_scales);
    uint16_t any = 0;
    for (size_t d = 0; d < b->layout->k_dims; d++)
        any |= scales[d];
    return any >> 15;
}

/* Scores of the rows from `from` on. */
static void scores_of(const kvt_unit *u, size_t from, const head_block *b, size_t n,
                      const void *next)
{
    const kvt_kernels *k = &u->cache->kernels;
    const kvt_layout *layout = b->layout;
    kvt_type type = layout->k_type;
    const void *codes = b->record + layout->k_codes;
    const uint16_t *scales = halves(b->record + layout->k_scales);

    if (type == KVT_TYPE_I4) {
        if (is_marked(b))
            scores_k4_in_parts(u, from, b, n, next);
        else
            scores_k4(u, from, b, n, next, NULL);
        return;
    }
    if (is_integer(u, type)) {
        (is_fast(u) ? k->qk_i8_fast : k->qk_i8_near)(u->packed, from, u->rows, codes, scales, n,
                                                     layout->k_dims, next, u->scores);
        return;
    }
    (type == KVT_TYPE_F32   ? k->qk_f32
     : type == KVT_TYPE_F16 ? k->qk_f16
                            : k->qk_i8)(u->q + from * layout->k_dims, layout->k_dims,
                                        u->rows - from, codes, scales, n, layout->k_dims, next,
                                        u->scores + from * KVT_TOKENS);
    scales = open_scales(b, type, layout->k_scale_bytes, layout->k_scales, n);
    if (scales)
        scale_tokens(u, from, scales, n);
}

/* Sum of a row's weights: 16 lanes, so that a compiler can vectorize it, in a fixed order. */
static float sum_of(const float *p)
{
    float lane[16];
    memcpy(lane, p, sizeof lane);
    for (size_t t = 16; t < KVT_TOKENS; t += 16)
        for (size_t i = 0; i < 16; i++)
            lane[i] += p[t + i];
    for (size_t h = 8; h > 0; h /= 2)
        for (size_t i = 0; i < h; i++)
            lane[i] += lane[i + h];
    return lane[0];
}

/* V in K: a block's codes in the order that the weighted sum takes, in the unit's own memory. */
static void transpose_values(const kvt_unit *u, const head_block *b)
{
    const kvt_kernels *k = &u->cache->kernels;
    const kvt_layout *layout = b->layout;
    (layout->k_type == KVT_TYPE_F32   ? k->transpose_f32
     : layout->k_type == KVT_TYPE_F16 ? k->transpose_f16
                                      : k->transpose_i8)(
        b->record + layout->k_codes, layout->k_dims, layout->v_dims, u->transposed);
}

/*
 * V in K with an offset: sum_t p[t] * (x[t] + offset) is what pv has summed up and the offset times
 * the row's weights, which u->weights has.
 */
static void add_offset(const kvt_unit *u, size_t from, const head_block *b, float *acc)
{
    const kvt_kernels *k = &u->cache->kernels;
    size_t dims = u->group->config.v_dim, dims_p = b->layout->v_dims;

    (void)k->load_f16(b->record + b->layout->k_offset, u->offset, dims); /* finite as stored */
    memset(u->offset + dims, 0, (dims_p - dims) * sizeof *u->offset);
    k->add_scaled(acc + from * dims_p, dims_p, u->rows - from, u->weights + from, u->offset,
                  dims_p);
}

typedef void pv_function(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                         float *acc, size_t ldacc);

static pv_function *pv_of(const kvt_unit *u, kvt_type type)
{
    const kvt_kernels *k = &u->cache->kernels;
    const int integer = is_integer(u, type);
    switch (type) {
    case KVT_TYPE_F32: return k->pv_f32;
    case KVT_TYPE_F16: return k->pv_f16;
    case KVT_TYPE_I4: return integer ? k->pv_i4_near : k->pv_i4;
    case KVT_TYPE_I5: return integer ? k->pv_i5_near : k->pv_i5;
    default: return !integer ? k->pv_i8 : is_fast(u) ? k->pv_i8_fast : k->pv_i8_near;
    }
}

/* acc = acc * alpha + scores * V for the rows from `from` on. The scores may be changed. */
static void accumulate_values(const kvt_unit *u, size_t from, const head_block *b, size_t n,
                              const void *next, float *acc)
{
    const kvt_group *group = u->group;
    const kvt_layout *layout = b->layout;
    kvt_type type = group->v_in_k ? layout->k_type : layout->v_type;
    const void *codes = group->v_in_k ? u->transposed : b->record + layout->v_codes;
    size_t scales_at = group->v_in_k ? layout->k_scales : layout->v_scales;
    int adds = group->v_in_k && group->offsets, bare = 0;
    const uint16_t *scales = open_scales(
        b, type, group->v_in_k ? layout->k_scale_bytes : layout->v_scale_bytes, scales_at, n);

    if (group->v_in_k)
        transpose_values(u, b);
    for (size_t t = 0; adds && scales && t < n; t++)
        bare |= scales[t] >> 15; /* without an offset */
    for (size_t r = from; adds && r < u->rows; r++) {
        const float *p = u->scores + r * KVT_TOKENS;
        float with_offset[KVT_TOKENS];
        if (bare) { /* left out, not subtracted: an offset may be far larger than the output */
            for (size_t t = 0; t < KVT_TOKENS; t++)
                with_offset[t] = t < n && scales[t] >> 15 ? 0.0f : p[t];
            p = with_offset;
        }
        u->weights[r] = sum_of(p);
    }
    if (scales)
        scale_tokens(u, from, scales, n);
    pv_of(u, type)(u->scores + from * KVT_TOKENS, u->rows - from, codes,
                   halves(b->record + scales_at), n, layout->v_dims, u->alpha + from, next,
                   acc + from * layout->v_dims, layout->v_dims);
    if (adds)
        add_offset(u, from, b, acc);
}

/* What softmax does not do: soft-cap, ALiBi and masks, for one row that sees n tokens. */
static void adjust_logits(const kvt_unit *u, size_t row, size_t block_row, size_t n, kvt_sees sees)
{
    const kvt_kernels *k = &u->cache->kernels;
    const kvt_attend_args *args = u->args;
    float *s = u->scores + row * KVT_TOKENS;
    k->logits(s, n, u->add[row], u->scale, args->softcap);
    if (args->alibi_slopes)
        k->alibi(s, n, kvt_seq_meta(u->item->seq, block_row)->positions, position_of(u, row),
                 args->alibi_slopes[head_of(u, row)]);
    if (u->item->mask)
        mask_scores(u, row, (uint64_t)block_row * KVT_TOKENS, n, s);
    if (sees == KVT_SEES_SOME)
        mask_window(u, row, block_row, n, s);
}

/* Tokens that a row sees of the n of a block. */
static size_t row_tokens(const kvt_unit *u, size_t row, uint64_t first_token, size_t n)
{
    uint64_t sees;
    if (u->least >= first_token + n)
        return n;
    sees = kvt_unit_visible(u, row) - first_token;
    return sees < n ? (size_t)sees : n;
}

/* What is added to a block's scores for its offset: u->add, and what of it not all tokens have. */
static void add_offsets(const kvt_unit *u, size_t from, const head_block *b, size_t n)
{
    const kvt_layout *layout = b->layout;
    const uint16_t *scales =
        open_scales(b, layout->k_type, layout->k_scale_bytes, layout->k_scales, n);
    if (layout->k_type == KVT_TYPE_I4) /* scores_k4 has done it */
        return;
    u->cache->kernels.dots_f16(u->q + from * layout->k_dims, layout->k_dims, u->rows - from,
                               halves(b->record + layout->k_offset), layout->k_dims, u->add + from);
    if (scales)
        take_offset(u, from, scales, n);
}

/*
 * Scores of a block whose keys have moved by different shifts: those of each shift are computed for
 * all of its keys, with the offset in them, and taken for the ones that have it.
 */
#if defined(__GNUC__)
__attribute__((noinline)) /* its memory on the stack is needed seldom */
#endif
static void
mixed_scores(kvt_unit *u, size_t from, const head_block *b, size_t n, const kvt_meta *meta,
             const void *next)
{
    float mixed[KVT_ROWS_MAX * KVT_TOKENS];
    uint64_t left = n < 64 ? ((uint64_t)1 << n) - 1 : UINT64_MAX;
    while (left) {
        int32_t shift = meta->shifts[__builtin_ctzll(left)];
        turn_to(u, shift);
        scores_of(u, from, b, n, next);
        if (u->group->offsets)
            add_offsets(u, from, b, n);
        for (size_t t = 0; t < n; t++) {
            if (meta->shifts[t] != shift)
                continue;
            left &= ~((uint64_t)1 << t);
            for (size_t r = from; r < u->rows; r++)
                mixed[r * KVT_TOKENS + t] =
                    u->scores[r * KVT_TOKENS + t] + (u->group->offsets ? u->add[r] : 0.0f);
        }
        next = NULL;
    }
    for (size_t r = from; r < u->rows; r++)
        memcpy(u->scores + r * KVT_TOKENS, mixed + r * KVT_TOKENS, n * sizeof *mixed);
}

/*
 * Scores of a block's keys, q turned for those that have moved. 1: the offset is in them, which it
 * is not otherwise.
 */
static int block_scores(kvt_unit *u, size_t from, size_t block_row, const head_block *b, size_t n,
                        const void *next)
{
    const kvt_seq *seq = u->item->seq;
    if (seq->turns) {
        const kvt_meta *meta = kvt_seq_meta(seq, block_row);
        int32_t shift = shift_of(meta, n);
        if (shift == KVT_SHIFT_MIXED) {
            mixed_scores(u, from, b, n, meta, next);
            return 1;
        }
        turn_to(u, shift);
    }
    scores_of(u, from, b, n, next);
    return 0;
}

/*
 * Online softmax of the rows from `from` on, n being what the last row sees of the block. mixed:
 * the scores have their offset in them.
 */
static void softmax_rows(const kvt_unit *u, size_t from, size_t block_row, size_t n,
                         const head_block *b, kvt_sees sees, int mixed, kvt_part out)
{
    const kvt_kernels *k = &u->cache->kernels;
    uint64_t first_token = (uint64_t)block_row * KVT_TOKENS;
    int adjusts =
        u->args->softcap > 0.0f || u->args->alibi_slopes || u->item->mask || sees == KVT_SEES_SOME;
    int adds = u->group->offsets && !mixed;

    if (adds)
        add_offsets(u, from, b, n);
    else if (adjusts)
        memset(u->add, 0, u->rows * sizeof *u->add);
    /* Runs of rows that see the same number of tokens: a query's, or all of them. */
    for (size_t r = from, end; r < u->rows; r = end) {
        size_t n_row = row_tokens(u, r, first_token, n);
        end = u->least >= first_token + n ? u->rows : r + 1;
        while (end < u->rows && row_tokens(u, end, first_token, n) == n_row)
            end++;
        if (adjusts)
            for (size_t i = r; i < end; i++)
                adjust_logits(u, i, block_row, n_row, sees);
        k->softmax(u->scores + r * KVT_TOKENS, end - r, n_row, adds && !adjusts ? u->add + r : NULL,
                   adjusts ? 1.0f : u->scale, out.m + r, out.l + r, u->alpha + r);
    }
}

static void prefetch_lines(const unsigned char *record, size_t from, size_t to)
{
    for (; from < to; from += 64)
        __builtin_prefetch(record + from, 0, 2);
}

/*
 * One block: scores, softmax, weighted sum. Rows see ever more tokens in ascending order, so
 * those that see anything of the block are the last ones. next: the head's block that is read
 * after this one; NULL: nothing is to be prefetched. sees: what the window shows of the block, at
 * least some.
 */
static void attend_block(kvt_unit *u, size_t block_row, kvt_sees sees, const head_block *next,
                         kvt_part out)
{
    const head_block b = head_block_of(u, block_row);
    const unsigned char *next_k = next ? next->record + next->layout->k_codes : NULL;
    const unsigned char *next_v = next ? next->record + next->layout->v_codes : NULL;
    uint64_t first_token = (uint64_t)block_row * KVT_TOKENS;
    uint64_t last = u->most - first_token;
    size_t n = last < KVT_TOKENS ? (size_t)last : KVT_TOKENS;
    size_t from = 0;
    int mixed;

    if (u->least <= first_token)
        while (kvt_unit_visible(u, from) <= first_token)
            from++;
    mixed = block_scores(u, from, block_row, &b, n, next_k);
    if (next) /* scales and offset, which the next scores read first */
        prefetch_lines(next->record, next->layout->k_scales, next->layout->v_codes);
    softmax_rows(u, from, block_row, n, &b, sees, mixed, out);
    accumulate_values(u, from, &b, n, u->group->v_in_k ? NULL : next_v, out.acc);
}

/*
 * A block's address is found through the sequence's table and a record of the block, which the
 * stream of codes has driven out of the caches since they were read last. With a window, a block is
 * there for certain only where its bounds say that it is in sight; they are prefetched before.
 */
static void prefetch_block(const kvt_unit *u, size_t block_row)
{
    const kvt_seq *seq = u->item->seq;
    size_t end = u->group->window_tokens == UINT64_MAX ? seq->n_rows : u->sight.end_row;
    if (seq->turns && block_row + 6 < seq->n_rows) { /* the bounds have the shift beside them */
        __builtin_prefetch(kvt_seq_block(seq, block_row + 6, seq->cache->n_groups));
        __builtin_prefetch(&kvt_seq_meta(seq, block_row + 4)->shift);
    }
    if (block_row + 8 < end)
        __builtin_prefetch(&seq->table[(block_row + 8) * seq->cache->n_columns]);
    if (block_row + 2 >= end)
        return;
    if (u->group->window_tokens == UINT64_MAX) {
        __builtin_prefetch(kvt_seq_block(seq, block_row + 2, u->group_index));
        return;
    }
    if (block_row + 6 < end)
        __builtin_prefetch(kvt_seq_block(seq, block_row + 6, seq->cache->n_groups));
    if (block_row + 4 < end)
        __builtin_prefetch(&kvt_seq_meta(seq, block_row + 4)->lowest);
    if (kvt_sight_sees(&u->sight, block_row + 2) != KVT_SEES_NONE)
        __builtin_prefetch(kvt_seq_block(seq, block_row + 2, u->group_index));
}

/* The row whose block a unit reads after that of `row`, in this range or later; SIZE_MAX: none. */
static size_t row_after(const kvt_unit *u, size_t row)
{
    size_t next = row + 1;
    if (u->group->window_tokens == UINT64_MAX)
        return next < u->item->seq->n_rows ? next : SIZE_MAX;
    next = kvt_sight_next(&u->sight, next);
    return next < u->sight.end_row ? next : SIZE_MAX;
}

kvt_outcome kvt_units_range(kvt_unit *units, size_t n_units, size_t range, const kvt_part *outs)
{
    const kvt_unit *u = &units[0];
    const size_t rows_a_range = KVT_RANGE_TOKENS / KVT_TOKENS;
    size_t begin = kvt_sight_range(&u->sight, range) * rows_a_range;
    size_t end = u->sight.end_row;

    for (size_t i = 0; i < n_units; i++) {
        memset(outs[i].acc, 0,
               u->rows * u->group->layouts[KVT_SEALED].v_dims * sizeof *outs[i].acc);
        for (size_t r = 0; r < u->rows; r++) {
            outs[i].m[r] = -INFINITY;
            outs[i].l[r] = 0.0f;
        }
    }
    if (end > begin + rows_a_range)
        end = begin + rows_a_range;
    for (size_t row = kvt_sight_next(&u->sight, begin), after; row < end; row = after) {
        kvt_sees sees = u->sight.ahead < 0 ? KVT_SEES_ALL : kvt_sight_sees(&u->sight, row);
        after = row_after(u, row);
        prefetch_block(u, row);
        for (size_t i = 0; i < n_units; i++) {
            head_block next;
            int has_next = 1;
            if (i + 1 < n_units)
                next = head_block_of(&units[i + 1], row);
            else if (after != SIZE_MAX)
                next = head_block_of(&units[0], after);
            else
                has_next = 0;
            attend_block(&units[i], row, sees, has_next ? &next : NULL, outs[i]);
            if (units[i].unsound)
                return KVT_UNIT_OVERFLOWED;
        }
    }
    return KVT_UNIT_DONE;
}

void kvt_unit_merge(const kvt_unit *u, kvt_part into, kvt_part from)
{
    size_t dims = u->group->layouts[KVT_SEALED].v_dims;
    for (size_t r = 0; r < u->rows; r++)
        u->cache->kernels.merge(into.acc + r * dims, &into.m[r], &into.l[r], from.acc + r * dims,
                                from.m[r], from.l[r], dims);
}

/* What finish and the unit know of a row. */
typedef struct unit_row {
    float m, lse;
    int may_see; /* a token is visible */
} unit_row;

/* Whether the item's mask shows a row at least one token. */
static int mask_shows_any(const kvt_unit *u, size_t row)
{
    const kvt_attend_item *item = u->item;
    const uint8_t *bits = item->mask + query_of(u, row) * item->mask_stride;
    uint64_t n = item->mask_tokens;
    if (n < u->n_tokens)
        return 1;
    for (uint64_t i = 0; i < n / 8; i++)
        if (bits[i])
            return 1;
    return n % 8 && (bits[n / 8] & ((1u << n % 8) - 1));
}

static int mask_shows(const kvt_unit *u, size_t row, uint64_t token)
{
    const kvt_attend_item *item = u->item;
    uint64_t begin = u->n_tokens - item->mask_tokens;
    if (!item->mask || token < begin)
        return 1;
    token -= begin;
    return item->mask[query_of(u, row) * item->mask_stride + token / 8] >> token % 8 & 1;
}

/* Whether a row sees a token: a mask may leave none, and a window. */
static int sees_any(const kvt_unit *u, size_t row)
{
    uint64_t n = kvt_unit_visible(u, row);
    const kvt_sight *sight = &u->sight;
    if (u->group->window_tokens == UINT64_MAX)
        return u->item->mask ? mask_shows_any(u, row) : n > 0;
    for (size_t r = kvt_sight_next(sight, 0); r < kvt_rows(n); r = kvt_sight_next(sight, r + 1))
        for (uint64_t t = (uint64_t)r * KVT_TOKENS; t < n && t / KVT_TOKENS == r; t++)
            if (mask_shows(u, row, t) &&
                kvt_in_window(u->group, position_of(u, row), t,
                              kvt_seq_meta(sight->seq, r)->positions[t % KVT_TOKENS]))
                return 1;
    return 0;
}

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
        return !bad && !row->may_see;
    return !bad && isfinite(row->lse);
}

int kvt_unit_store(const kvt_unit *u, kvt_part result, const kvt_view *out)
{
    const kvt_kernels *k = &u->cache->kernels;
    size_t dims = u->group->layouts[KVT_SEALED].v_dims, heads = u->group->config.n_q_heads;
    const kvt_rotation *rotation = &u->group->rotation_v;
    int sound = 1;
    for (size_t r = 0; r < u->rows; r++) {
        size_t head = head_of(u, r);
        uint64_t query = u->first_query + query_of(u, r);
        float *acc = result.acc + r * dims;
        float sink = u->args->sink_logits ? u->args->sink_logits[head] : -INFINITY;
        float lse = k->finish(acc, dims, result.m[r], result.l[r], sink);
        unit_row row = {result.m[r], lse, 0};
        if (row.m == -INFINITY)
            row.may_see = sees_any(u, r);
        /* Where nothing is visible the zeros stay zeros, none of them negative. */
        if (rotation->block && row.m != -INFINITY)
            k->unrotate(acc, rotation->signs + u->kv_head * rotation->stride,
                        u->group->config.v_dim, rotation->block, rotation->inverse);
        sound &= is_sound(&row, acc, u->group->config.v_dim);
        kvt_view_store(k, out, query, head, u->group->config.v_dim, acc);
        if (u->args->lse)
            u->args->lse[query * heads + head] = lse;
    }
    return sound;
}
