/*
 * Blocks of one type as blocks of another (src/cache/convert.c). For all pairs of types, forms and
 * numbers of tokens a converted block is held against the block of a real cache of the target's
 * types, to which the rows that kvt_read gives of the source were appended. Internal headers:
 * blocks are looked at as they lie in memory.
 */
#include "support.h"

#include <math.h>
#include <stdio.h>

#include "src/cache/cache.h"
#include "src/dispatch.h"

/* ---- sources: a block, in row 1, and the rows that are read of it ---- */

typedef enum state { OPEN, WHOLE, CUT, FINE, FINE_CUT, REOPENED, N_STATES } state;

typedef struct source {
    kvt_group_config g;
    kvt_cache *cache;
    kvt_seq *seq;
    const kvt_block *block;
    const kvt_group *group;
    uint32_t n, flags; /* flags: of the geometry; K of i4 has an offset in any case */
    tokens rows;       /* 64 + n, as read */
} source;

/* Normal rows, some with the large means that keys have, and some with outliers. */
static tokens make_rows(rng *r, const kvt_group_config *g, size_t n, int kind)
{
    tokens t = tokens_make(r, n, g);
    const size_t k_row = t.kv_heads * t.k_dim, v_row = t.kv_heads * t.v_dim;
    for (size_t i = 0; i < n * k_row && kind == 1; i++)
        t.k[i] += (i % k_row % 7 == 3) * 300.0f - (float)(i % k_row % 5);
    for (size_t i = 0; i < k_row && kind == 2; i++) { /* one that is block 1's first, too */
        t.k[64 * k_row + i] *= 30.0f;
        if (n > 70)
            t.k[70 * k_row + i] *= 200.0f;
    }
    for (size_t i = 0; i < v_row && kind == 2; i++)
        t.v[64 * v_row + i] *= 1e-4f;
    for (size_t i = 0; i < n * t.kv_heads && g->flags & KVT_GROUP_V_IN_K; i++)
        memcpy(t.v + i * t.v_dim, t.k + i * t.k_dim, t.v_dim * sizeof *t.v);
    return t;
}

static tokens read_rows(const kvt_cache *cache, const kvt_seq *seq, const kvt_group_config *g)
{
    const size_t n = (size_t)kvt_seq_length(seq);
    tokens t = {n, g->n_kv_heads, g->k_dim, g->v_dim, NULL, NULL};
    kvt_tensor k, v;
    t.k = malloc(n * t.kv_heads * t.k_dim * sizeof *t.k);
    t.v = malloc(n * t.kv_heads * t.v_dim * sizeof *t.v);
    assert_true(t.k && t.v);
    k = kvt_tensor_f32(t.k), v = kvt_tensor_f32(t.v);
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, n, &k));
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_V, 0, n, &v));
    return t;
}

/* Cut so that no truncate takes a sealing back. */
static void cut(kvt_cache *cache, kvt_seq *seq, size_t n)
{
    expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
    expect_ok(cache, kvt_seq_abort(seq));
    expect_ok(cache, kvt_seq_truncate(seq, n));
}

static int is_sealing(const kvt_group_config *g)
{
    return kvt_is_sealed_type(g->k_type) || kvt_is_sealed_type(g->v_type);
}

static int has_coarse(const kvt_group_config *g)
{
    return kvt_is_coarse(g->k_type) || kvt_is_coarse(g->v_type);
}

/* Slots of tokens that a block does not hold may hold anything. */
static void garble(const source *s, kvt_side side, const kvt_record *record)
{
    const kvt_layout *layout = kvt_block_layout(s->group, s->block);
    const int is_k = side == KVT_SIDE_K;
    const kvt_type type = is_k ? layout->k_type : layout->v_type;
    const size_t dims_p = is_k ? layout->k_dims : layout->v_dims;
    uint8_t *codes = record->codes;
    for (size_t t = s->n; t < KVT_TOKENS; t++) {
        for (size_t d = 0; d < dims_p; d++) {
            const size_t wide = is_k ? kvt_kw_index(t, d, dims_p) : kvt_vw_index(t, d, dims_p);
            if (type == KVT_TYPE_F32)
                memset(codes + 4 * wide, 0xff, 4);
            else if (type == KVT_TYPE_F16)
                memset(codes + 2 * wide, 0xff, 2);
            else if (type == KVT_TYPE_I8)
                codes[is_k ? kvt_k8_index(t, d, dims_p) : kvt_v8_index(t, d, dims_p)] = 0x80;
            else
                kvt_put_bits(codes +
                                 (is_k ? kvt_k4_index(t, d, dims_p) : kvt_v4_index(t, d, dims_p)),
                             is_k ? kvt_k4_shift(d) : kvt_v4_shift(t), 15, 9);
            if (type == KVT_TYPE_I5)
                kvt_put_bits(codes + kvt_v5_index(t, d, dims_p), kvt_v5_shift(t, d), 1, 1);
        }
        if (is_k && type == KVT_TYPE_I4)
            kvt_record_gains(record, dims_p)[t] = 77;
        else if (record->scales)
            record->scales[t] = 0x7e00;
        if (record->seed)
            kvt_seed_gains(record->seed, dims_p)[t] = 77;
    }
}

static uint32_t flags_for(uint32_t flags, kvt_type k_type)
{
    return k_type == KVT_TYPE_I4 ? flags & ~(uint32_t)KVT_GROUP_NO_OFFSET : flags;
}

/* 0: there is no such block. */
static int source_open(source *s, rng *r, const kvt_group_config *g, state of, uint32_t n, int kind)
{
    static const uint32_t forms[] = {KVT_OPEN, KVT_SEALED, KVT_SEALED,
                                     KVT_FINE, KVT_FINE,   KVT_REOPENED};
    tokens fed;
    memset(s, 0, sizeof *s);
    if (((of == WHOLE || of == FINE) && n < 64) || ((of == CUT || of == FINE_CUT) && n == 64) ||
        (!is_sealing(g) && of != WHOLE && of != CUT) ||
        ((of == FINE || of == FINE_CUT) && !has_coarse(g)) ||
        (of == REOPENED && (g->k_type != KVT_TYPE_I4 || n < 2)))
        return 0;
    s->g = *g;
    s->n = n;
    s->flags = g->flags;
    s->g.flags = flags_for(g->flags, g->k_type);
    s->g.residual_tokens = of == OPEN || of == REOPENED ? 1 : KVT_RESIDUAL_NONE;
    s->g.fine_tokens = of == FINE || of == FINE_CUT ? 128 : KVT_FINE_NONE;
    s->cache = cache_of(&s->g, 256, 1, NULL);
    expect_ok(s->cache, kvt_seq_create(s->cache, &s->seq));
    fed = make_rows(r, &s->g, 192, kind);
    if (of == OPEN) {
        append_step(s->cache, s->seq, &s->g, &fed, 0, 64 + n);
    } else if (of == REOPENED) {
        append_step(s->cache, s->seq, &s->g, &fed, 0, 192);
        cut(s->cache, s->seq, 64 + n / 2);
        append_step(s->cache, s->seq, &s->g, &fed, 64 + n / 2, n - n / 2);
    } else {
        append_step(s->cache, s->seq, &s->g, &fed, 0, 128);
        if (n < 64)
            cut(s->cache, s->seq, 64 + n);
    }
    tokens_free(&fed);
    s->group = &s->cache->groups[0];
    s->block = kvt_seq_block(s->seq, 1, 0);
    assert_int_equal(s->block->form, is_sealing(g) ? forms[of] : (uint32_t)KVT_SEALED);
    s->rows = read_rows(s->cache, s->seq, &s->g);
    for (size_t head = 0; head < g->n_kv_heads; head++)
        for (int side = KVT_SIDE_K; side <= (s->group->v_in_k ? KVT_SIDE_K : KVT_SIDE_V); side++) {
            const kvt_record record = kvt_record_of(s->group, s->block, (kvt_side)side, 0, head);
            garble(s, (kvt_side)side, &record);
        }
    return 1;
}

static void source_close(source *s)
{
    tokens_free(&s->rows);
    kvt_seq_destroy(s->seq);
    kvt_cache_destroy(s->cache);
}

/* ---- comparing records ---- */

static unsigned char *record_memory(const kvt_group *group, uint32_t form, unsigned char *layer,
                                    size_t head)
{
    return layer + head * group->layouts[form].head_bytes;
}

/* The bits of an element's code. */
static uint32_t code_at(kvt_side side, kvt_type type, const void *codes, size_t t, size_t d,
                        size_t dims_p)
{
    const int is_k = side == KVT_SIDE_K;
    const uint8_t *bytes = codes;
    const size_t wide = is_k ? kvt_kw_index(t, d, dims_p) : kvt_vw_index(t, d, dims_p);
    uint32_t code;
    switch (type) {
    case KVT_TYPE_F32: return ((const uint32_t *)codes)[wide];
    case KVT_TYPE_F16: return ((const uint16_t *)codes)[wide];
    case KVT_TYPE_I8: return bytes[is_k ? kvt_k8_index(t, d, dims_p) : kvt_v8_index(t, d, dims_p)];
    default:
        code = is_k ? (uint32_t)bytes[kvt_k4_index(t, d, dims_p)] >> kvt_k4_shift(d)
                    : (uint32_t)bytes[kvt_v4_index(t, d, dims_p)] >> kvt_v4_shift(t);
        code &= 15;
        if (type == KVT_TYPE_I5)
            code |= ((uint32_t)bytes[kvt_v5_index(t, d, dims_p)] >> kvt_v5_shift(t, d) & 1u) << 4;
        return code;
    }
}

/* Where a side of two records of the same layout differs, or NULL. What is not there is zero. */
static const char *differs(const kvt_group *group, uint32_t form, kvt_side side, size_t n,
                           const kvt_record *got, const kvt_record *want)
{
    const kvt_layout *layout = &group->layouts[form];
    const int is_k = side == KVT_SIDE_K;
    const kvt_type type = is_k ? layout->k_type : layout->v_type;
    const size_t dims = is_k ? group->config.k_dim : group->config.v_dim;
    const size_t dims_p = is_k ? layout->k_dims : layout->v_dims;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < dims_p; d++) {
            const uint32_t code = code_at(side, type, got->codes, t, d, dims_p);
            if (t >= n || d >= dims ? code != 0
                                    : code != code_at(side, type, want->codes, t, d, dims_p))
                return "codes";
        }
    if (got->offset && memcmp(got->offset, want->offset, layout->k_offset_bytes) != 0)
        return "offset";
    if (is_k && type == KVT_TYPE_I4) {
        const uint8_t *a = kvt_record_gains(got, dims_p), *b = kvt_record_gains(want, dims_p);
        if (memcmp(got->scales, want->scales, kvt_k4_scales(dims_p) * 2) != 0)
            return "scales of dims";
        for (size_t t = 0; t < KVT_TOKENS; t++)
            if (a[t] != (t < n ? b[t] : 0))
                return "gains";
    } else {
        for (size_t t = 0; got->scales && t < KVT_TOKENS; t++)
            if (got->scales[t] != (t < n ? want->scales[t] : 0))
                return "scales";
    }
    if (got->seed && memcmp(got->seed, want->seed, 2 * dims_p * sizeof *got->seed) != 0)
        return "seed";
    for (size_t t = 0; got->seed && t < KVT_TOKENS; t++)
        if (kvt_seed_gains(got->seed, dims_p)[t] !=
            (t < n ? kvt_seed_gains(want->seed, dims_p)[t] : 0))
            return "seed's gains";
    return NULL;
}

/* ---- a real cache of the target's types ---- */

/* Whether a side's bytes mean the same in both groups, in these forms. */
static int is_copy(const source *s, const kvt_group *to, uint32_t to_form, kvt_side side)
{
    const int is_k = side == KVT_SIDE_K;
    const uint32_t form = s->block->form;
    const kvt_type a = is_k ? s->g.k_type : s->g.v_type;
    const kvt_type b = is_k ? to->config.k_type : to->config.v_type;
    if (!kvt_is_sealed_type(a) || !kvt_is_sealed_type(b))
        return a == b;
    if (kvt_is_open(form) || kvt_is_open(to_form))
        return a == b && form == to_form;
    return kvt_type_in(a, form) == kvt_type_in(b, to_form) &&
           (!is_k || a == b ||
            ((s->g.flags & KVT_GROUP_NO_ROTATION) && s->group->offsets == to->offsets));
}

/* The open rows' offset, as docs/numerics.md, "Conversion between types", has it. */
static void offset_of(const source *s, const kvt_group *to, size_t head, uint16_t *offset)
{
    const kvt_kernels *k = &s->cache->kernels;
    const kvt_rotation *a = &s->group->rotation_k, *b = &to->rotation_k;
    const size_t dims = s->g.k_dim, heads = s->g.n_kv_heads;
    float x[KVT_MAX_DIM], row[KVT_MAX_DIM];
    memset(x, 0, sizeof x);
    if (s->group->offsets) {
        const kvt_record from = kvt_record_of(s->group, s->block, KVT_SIDE_K, 0, head);
        if (a->block == b->block) {
            memcpy(offset, from.offset, dims * sizeof *offset);
            return;
        }
        for (size_t d = 0; d < dims; d++)
            x[d] = kvt_f16_to_f32(from.offset[d]);
        if (a->block)
            k->unrotate(x, a->signs + head * dims, dims, a->block, a->inverse);
        if (b->block)
            k->rotate(x, b->signs + head * dims, dims, b->block, b->scale, x);
    } else {
        for (size_t t = 64; t < 64 + s->n; t++) {
            memcpy(row, s->rows.k + (t * heads + head) * dims, dims * sizeof *row);
            if (b->block)
                k->rotate(row, b->signs + head * dims, dims, b->block, b->scale, row);
            for (size_t d = 0; d < dims; d++)
                x[d] += row[d];
        }
        for (size_t d = 0; d < dims; d++)
            x[d] /= (float)s->n;
    }
    for (size_t d = 0; d < dims; d++)
        offset[d] = kvt_f32_to_f16(x[d]);
}

/* Row 0 of a target cache, sealed, with the offsets that the open rows of row 1 are to have. */
static void put_row_0(const source *s, kvt_cache *cache, kvt_seq *seq, const kvt_group_config *g)
{
    const kvt_group *to = &cache->groups[0];
    append_step(cache, seq, g, &s->rows, 0, 64);
    if (!is_sealing(g))
        return;
    if (g->residual_tokens == 1) { /* it takes another token to be sealed */
        append_step(cache, seq, g, &s->rows, 64, 1);
        cut(cache, seq, 64);
    }
    assert_false(kvt_is_open(kvt_seq_block(seq, 0, 0)->form));
    for (size_t head = 0; to->offsets && head < g->n_kv_heads; head++)
        offset_of(s, to, head,
                  kvt_record_of(to, kvt_seq_block(seq, 0, 0), KVT_SIDE_K, 0, head).offset);
}

static size_t n_converted;

/* ---- conversions ---- */

static unsigned char *convert(const source *s, const kvt_kernels *kernels, const kvt_group *to,
                              uint32_t to_form, kvt_status expected)
{
    const size_t bytes = to->layouts[to_form].layer_bytes;
    const size_t scratch_bytes = kvt_convert_bytes(s->group, to);
    unsigned char *layer = aligned_alloc(64, kvt_round_up(bytes + 64, 64));
    unsigned char *scratch = malloc(scratch_bytes + 4 + 16);
    assert_true(layer && scratch);
    memset(layer, 0xa5, bytes + 64);
    memset(scratch, 0xa5, scratch_bytes + 4 + 16);
    assert_int_equal(kvt_convert_layer(kernels, s->group, s->block->form, s->block->data, s->n, to,
                                       to_form, layer, scratch + 4),
                     expected);
    for (size_t i = 0; i < 16; i++)
        assert_true(scratch[scratch_bytes + 4 + i] == 0xa5 && layer[bytes + i] == 0xa5);
    free(scratch);
    n_converted++;
    return layer;
}

static void check_pair(const source *s, kvt_type k_type, kvt_type v_type, uint32_t fine)
{
    kvt_group_config g = s->g;
    kvt_cache *cache;
    kvt_seq *seq = NULL;
    const kvt_group *to;
    const kvt_block *block;
    const int same = k_type == s->g.k_type && v_type == s->g.v_type;
    uint32_t to_form, built;
    unsigned char *got;

    g.k_type = k_type, g.v_type = v_type, g.fine_tokens = fine;
    g.flags = flags_for(s->flags, k_type);
    g.residual_tokens = s->n == 64 && kvt_is_open(s->block->form) ? 1 : KVT_RESIDUAL_NONE;
    cache = cache_of(&g, 256, 1, NULL);
    to = &cache->groups[0];
    to_form = kvt_convert_form(s->group, s->block->form, to, 1, s->n);
    got = convert(s, &cache->kernels, to, to_form, KVT_OK);
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++) {
        kvt_kernels kernels;
        unsigned char *again;
        assert_true(kvt_dispatch(kvt_isa_name(isa), 1, &kernels));
        again = convert(s, &kernels, to, to_form, KVT_OK);
        if (memcmp(got, again, to->layouts[to_form].layer_bytes) != 0)
            fail_msg("%s makes other bytes", kvt_isa_name(isa));
        free(again);
    }
    expect_ok(cache, kvt_seq_create(cache, &seq));
    put_row_0(s, cache, seq, &g);
    append_step(cache, seq, &g, &s->rows, 64, s->n);
    block = kvt_seq_block(seq, 1, 0);
    built = block->form;
    /* An append has open blocks where a block of the same types stays sealed, or open again. */
    if (!same && to_form != KVT_REOPENED)
        assert_int_equal(built, to_form);
    for (size_t head = 0; head < g.n_kv_heads; head++)
        for (int side = KVT_SIDE_K; side <= (to->v_in_k ? KVT_SIDE_K : KVT_SIDE_V); side++) {
            const kvt_record a =
                kvt_record_at(to, to_form, (kvt_side)side, record_memory(to, to_form, got, head));
            const int copy = is_copy(s, to, to_form, (kvt_side)side);
            const kvt_record b = copy ? kvt_record_of(s->group, s->block, (kvt_side)side, 0, head)
                                      : kvt_record_of(to, block, (kvt_side)side, 0, head);
            const char *what;
            assert_true(copy || built == to_form || side == KVT_SIDE_V);
            what = differs(to, to_form, (kvt_side)side, s->n, &a, &b);
            if (what)
                fail_msg("%d %d -> %d %d, form %u -> %u, dims %u %u, %u tokens, head %zu, %c: "
                         "other %s",
                         (int)s->g.k_type, (int)s->g.v_type, (int)k_type, (int)v_type,
                         s->block->form, to_form, g.k_dim, g.v_dim, s->n, head, "KV"[side], what);
        }
    free(got);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

static const kvt_type k_types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4};
static const kvt_type v_types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4,
                                   KVT_TYPE_I5};
enum { N_K = 4, N_V = 5, N_COUNTS = 6 };
static const uint32_t counts[N_COUNTS] = {1, 5, 16, 33, 63, 64};

/* All targets of one source. */
static void check_targets(const source *s)
{
    for (size_t i = 0; i < N_K * N_V; i++) {
        kvt_group_config to = s->g;
        to.k_type = k_types[i / N_V], to.v_type = v_types[i % N_V];
        if (s->g.flags & KVT_GROUP_V_IN_K && (to.k_type != to.v_type || to.k_type == KVT_TYPE_I4))
            continue;
        check_pair(s, to.k_type, to.v_type, KVT_FINE_NONE);
        if (has_coarse(&to))
            check_pair(s, to.k_type, to.v_type, 128);
    }
}

/* Every `step`-th source of all there are. */
static void check_geometry(uint32_t k_dim, uint32_t v_dim, uint32_t heads, uint32_t flags,
                           size_t step, rng *r)
{
    size_t nth = 0, at = 0;
    step *= is_quick() ? 11 : 1;
    for (size_t i = 0; i < N_K * N_V; i++)
        for (int of = 0; of < N_STATES; of++)
            for (size_t n = 0; n < N_COUNTS; n++) {
                kvt_group_config g =
                    group_of(1, heads, heads, k_dim, v_dim, k_types[i / N_V], v_types[i % N_V]);
                source s;
                g.flags = flags;
                if ((flags & KVT_GROUP_V_IN_K &&
                     (g.k_type != g.v_type || g.k_type == KVT_TYPE_I4)) ||
                    (flags & KVT_GROUP_NO_OFFSET && g.k_type == KVT_TYPE_I4) || at++ % step != 0 ||
                    !source_open(&s, r, &g, (state)of, counts[n], (int)(nth % 3)))
                    continue;
                nth++;
                check_targets(&s);
                source_close(&s);
            }
}

static void equal_to_an_append(void **unused)
{
    rng r = {71};
    (void)unused;
    check_geometry(8, 40, 1, 0, is_full() ? 1 : 3, &r);
    check_geometry(40, 8, 3, 0, 5, &r);
    check_geometry(128, 64, 1, 0, 5, &r);
    check_geometry(64, 128, 3, 0, 11, &r);
    assert_true(n_converted > 1000);
}

static void flags(void **unused)
{
    rng r = {72};
    (void)unused;
    check_geometry(40, 16, 2, KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_V_ROTATION, 5, &r);
    check_geometry(24, 16, 2, KVT_GROUP_NO_OFFSET, 5, &r);
    check_geometry(16, 8, 1, KVT_GROUP_NO_OFFSET | KVT_GROUP_NO_ROTATION, 5, &r);
    check_geometry(48, 32, 2, KVT_GROUP_V_IN_K, 1, &r);
    check_geometry(40, 24, 1, KVT_GROUP_V_IN_K | KVT_GROUP_NO_OFFSET, 1, &r);
}

/* Which form: sealed rows come first, and only the last one may lack tokens. */
static void forms(void **unused)
{
    enum { A = KVT_SEALED, O = KVT_OPEN, F = KVT_FINE, R = KVT_REOPENED };
    static const struct {
        kvt_type from[2];
        uint32_t form;
        kvt_type to[2];
        uint32_t row, tokens, expected;
    } rows[] = {
        {{KVT_TYPE_I8, KVT_TYPE_I8}, A, {KVT_TYPE_I4, KVT_TYPE_I4}, 0, 64, F},
        {{KVT_TYPE_I8, KVT_TYPE_I8}, A, {KVT_TYPE_I4, KVT_TYPE_I4}, 1, 64, A},
        {{KVT_TYPE_I8, KVT_TYPE_I8}, A, {KVT_TYPE_I4, KVT_TYPE_I4}, 0, 63, O},
        {{KVT_TYPE_I8, KVT_TYPE_I8}, O, {KVT_TYPE_I4, KVT_TYPE_I4}, 0, 64, O},
        {{KVT_TYPE_I8, KVT_TYPE_I8}, A, {KVT_TYPE_I8, KVT_TYPE_I8}, 0, 63, A},
        {{KVT_TYPE_I8, KVT_TYPE_I8}, A, {KVT_TYPE_I8, KVT_TYPE_I4}, 5, 63, O},
        {{KVT_TYPE_I4, KVT_TYPE_I4}, F, {KVT_TYPE_I8, KVT_TYPE_I8}, 0, 64, A},
        {{KVT_TYPE_I4, KVT_TYPE_I4}, F, {KVT_TYPE_I4, KVT_TYPE_I4}, 5, 64, F},
        {{KVT_TYPE_I4, KVT_TYPE_I4}, F, {KVT_TYPE_I4, KVT_TYPE_I5}, 5, 64, A},
        {{KVT_TYPE_I4, KVT_TYPE_I4}, F, {KVT_TYPE_I4, KVT_TYPE_I5}, 0, 64, F},
        {{KVT_TYPE_I4, KVT_TYPE_I4}, R, {KVT_TYPE_I4, KVT_TYPE_I5}, 1, 64, R},
        {{KVT_TYPE_I4, KVT_TYPE_I4}, R, {KVT_TYPE_I8, KVT_TYPE_I4}, 1, 9, O},
        {{KVT_TYPE_I4, KVT_TYPE_I4}, R, {KVT_TYPE_F16, KVT_TYPE_F16}, 1, 9, A},
        {{KVT_TYPE_I4, KVT_TYPE_I8}, O, {KVT_TYPE_F32, KVT_TYPE_F16}, 1, 64, A},
        {{KVT_TYPE_F16, KVT_TYPE_F16}, A, {KVT_TYPE_I8, KVT_TYPE_I8}, 1, 64, A},
        {{KVT_TYPE_F16, KVT_TYPE_F16}, A, {KVT_TYPE_I8, KVT_TYPE_I8}, 1, 63, O},
        {{KVT_TYPE_F16, KVT_TYPE_F16}, A, {KVT_TYPE_F16, KVT_TYPE_I5}, 0, 64, F},
        {{KVT_TYPE_F16, KVT_TYPE_F16}, A, {KVT_TYPE_F32, KVT_TYPE_F16}, 0, 1, A},
    };
    (void)unused;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        kvt_group_config g = group_of(1, 1, 1, 16, 16, rows[i].from[0], rows[i].from[1]);
        kvt_group from, to;
        kvt_group_make(&g, &from);
        g.k_type = rows[i].to[0], g.v_type = rows[i].to[1];
        kvt_group_make(&g, &to);
        if (kvt_convert_form(&from, rows[i].form, &to, rows[i].row, rows[i].tokens) !=
            rows[i].expected)
            fail_msg("case %zu", i);
    }
}

/* What the target cannot hold is refused, in the last head and token too. */
static void values(void **unused)
{
    enum { HEADS = 3, DIM = 16 };
    static const struct {
        kvt_type from, to;
        float k, v; /* the largest */
        kvt_status expected;
    } rows[] = {
        {KVT_TYPE_F32, KVT_TYPE_F16, 65519.0f, 1.0f, KVT_OK},
        {KVT_TYPE_F32, KVT_TYPE_F16, 65520.0f, 1.0f, KVT_ERR_VALUE},
        {KVT_TYPE_F32, KVT_TYPE_F16, 1.0f, -65520.0f, KVT_ERR_VALUE},
        {KVT_TYPE_F32, KVT_TYPE_I8, 7.9e6f, 7.9e6f, KVT_OK},
        {KVT_TYPE_F32, KVT_TYPE_I8, 9e6f, 1.0f, KVT_ERR_VALUE},
        {KVT_TYPE_F32, KVT_TYPE_I8, 1.0f, 3e38f, KVT_ERR_VALUE},
        {KVT_TYPE_I8, KVT_TYPE_F16, 7e4f, 1.0f, KVT_ERR_VALUE},
        {KVT_TYPE_I8, KVT_TYPE_F32, 7e6f, 7e6f, KVT_OK},
        {KVT_TYPE_I8, KVT_TYPE_I4, 2.3e5f, 1.9e6f, KVT_OK},
        {KVT_TYPE_I8, KVT_TYPE_I4, 6e5f, 1.0f, KVT_ERR_VALUE},
        {KVT_TYPE_I8, KVT_TYPE_I4, 1.0f, 3e6f, KVT_ERR_VALUE},
        {KVT_TYPE_I4, KVT_TYPE_F16, 1.0f, 1.9e6f, KVT_ERR_VALUE},
        {KVT_TYPE_I4, KVT_TYPE_I8, 2.3e5f, 1.9e6f, KVT_OK},
    };
    (void)unused;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int open = 0; open < 2; open++) {
            kvt_group_config g = group_of(1, HEADS, HEADS, DIM, DIM, rows[i].from, rows[i].from);
            source s = {0};
            kvt_cache *to;
            rng r = {5};
            tokens fed;
            g.flags = KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_V_ROTATION;
            g.residual_tokens = open ? 64 : KVT_RESIDUAL_NONE;
            g.fine_tokens = KVT_FINE_NONE;
            fed = tokens_make(&r, 64, &g);
            fed.k[64 * HEADS * DIM - 1] = rows[i].k;
            fed.v[64 * HEADS * DIM - 1] = rows[i].v;
            s.g = g;
            s.cache = cache_of(&g, 64, 1, NULL);
            expect_ok(s.cache, kvt_seq_create(s.cache, &s.seq));
            append_step(s.cache, s.seq, &g, &fed, 0, 64);
            s.n = 64;
            s.group = &s.cache->groups[0];
            s.block = kvt_seq_block(s.seq, 0, 0);
            g.k_type = g.v_type = rows[i].to;
            to = cache_of(&g, 64, 1, NULL);
            free(convert(&s, &to->kernels, &to->groups[0],
                         kvt_convert_form(s.group, s.block->form, &to->groups[0], 0, 64),
                         rows[i].expected));
            tokens_free(&fed);
            kvt_cache_destroy(to);
            source_close(&s);
        }
}

/* Squared distance of a converted block's rows of a side from others, [64][heads][dims]. */
static double distance(const source *s, const kvt_group *to, uint32_t form, kvt_side side,
                       unsigned char *layer, const float *rows)
{
    const size_t dims = side == KVT_SIDE_K ? s->g.k_dim : s->g.v_dim, heads = s->g.n_kv_heads;
    double sum = 0;
    float x[KVT_MAX_DIM];
    for (size_t head = 0; head < heads; head++) {
        const kvt_record record =
            kvt_record_at(to, form, side, record_memory(to, form, layer, head));
        for (size_t t = 0; t < s->n; t++) {
            kvt_record_read(&s->cache->kernels, to, form, side, head, &record, t, x);
            for (size_t d = 0; d < dims; d++) {
                double e = (double)x[d] - (double)rows[(t * heads + head) * dims + d];
                sum += e * e;
            }
        }
    }
    return sum;
}

/*
 * 4 bits by way of 8 are as near to the rows as 4 bits of the rows themselves, but for the little
 * that 8 bits are off; with the source's offset in place of block 0's, too.
 */
static void quality(void **unused)
{
    rng r = {9};
    (void)unused;
    for (int kind = 0; kind < 3; kind++) {
        kvt_group_config g = group_of(1, 2, 2, 128, 128, KVT_TYPE_I8, KVT_TYPE_I8);
        source s = {0};
        kvt_cache *to;
        kvt_seq *seq = NULL;
        tokens fed;
        unsigned char *got;
        double by_i8[2], direct[2];
        g.residual_tokens = KVT_RESIDUAL_NONE;
        g.fine_tokens = KVT_FINE_NONE;
        fed = make_rows(&r, &g, 128, kind);
        s.g = g;
        s.n = 64;
        s.cache = cache_of(&g, 128, 1, NULL);
        expect_ok(s.cache, kvt_seq_create(s.cache, &s.seq));
        append_step(s.cache, s.seq, &g, &fed, 0, 128);
        s.group = &s.cache->groups[0];
        s.block = kvt_seq_block(s.seq, 1, 0);
        g.k_type = g.v_type = KVT_TYPE_I4;
        to = cache_of(&g, 128, 1, NULL);
        expect_ok(to, kvt_seq_create(to, &seq));
        append_step(to, seq, &g, &fed, 0, 128);
        got = convert(&s, &to->kernels, &to->groups[0], KVT_SEALED, KVT_OK);
        for (int side = 0; side < 2; side++) {
            const float *rows = (side ? fed.v : fed.k) + (size_t)64 * 2 * 128;
            by_i8[side] =
                distance(&s, &to->groups[0], KVT_SEALED, side ? KVT_SIDE_V : KVT_SIDE_K, got, rows);
            direct[side] = distance(&s, &to->groups[0], KVT_SEALED, side ? KVT_SIDE_V : KVT_SIDE_K,
                                    kvt_seq_block(seq, 1, 0)->data, rows);
            print_message("%c, rows of kind %d: squared error by way of i8 %.4f of direct i4's\n",
                          "KV"[side], kind, by_i8[side] / direct[side]);
            assert_true(by_i8[side] < 1.05 * direct[side]);
        }
        free(got);
        tokens_free(&fed);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(to);
        source_close(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equal_to_an_append),
        cmocka_unit_test(flags),
        cmocka_unit_test(forms),
        cmocka_unit_test(values),
        cmocka_unit_test(quality),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
