/*
 * Attention against a double-precision reference: every type, dim and ratio, the options, and the
 * guarantee of the same bits for any number of threads and any batch.
 */
#include "support.h"

#include <math.h>
#include <stdio.h>

/* Results of one configuration: largest relative L2 over its heads. */
typedef struct errors {
    double logit;   /* largest magnitude */
    double all;     /* of the output against the exact attention, all heads together */
    double dequant; /* of double attention on the dequantized cache, against the same */
    double added;   /* of the output against that of double attention on the dequantized cache */
} errors;

typedef struct setup {
    kvt_group_config group;
    size_t n, step;
    double q_deviation;
    const char *isa;
    uint32_t flags;
    float shift; /* added to some dims of all keys, to be removed by an offset */
} setup;

static errors attend_once(const setup *s, uint64_t seed)
{
    rng r = {seed};
    const kvt_group_config *g = &s->group;
    kvt_cache *cache = cache_of(g, s->n, 1, s->isa);
    kvt_seq *seq = NULL;
    tokens t = tokens_make(&r, s->n, g);
    size_t ratio = g->n_q_heads / g->n_kv_heads, n_out = (size_t)g->n_q_heads * g->v_dim;
    float *q = rng_normals(&r, (size_t)g->n_q_heads * g->k_dim);
    float *out = malloc(n_out * sizeof *out), *lse = malloc(g->n_q_heads * sizeof *lse);
    double *exact = malloc(n_out * sizeof *exact), *stored = malloc(n_out * sizeof *stored);
    float *k = malloc(s->n * g->n_kv_heads * g->k_dim * sizeof *k);
    float *v = malloc(s->n * g->n_kv_heads * g->v_dim * sizeof *v);
    kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
    kvt_attend_item item = {.n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    double scale = 1.0 / (double)sqrtf((float)g->k_dim);
    double difference = 0, norm = 0, added = 0;
    double lse_bound = g->k_type < KVT_TYPE_I8 || (s->flags & KVT_ATTEND_F32)   ? 2e-5
                       : g->k_type == KVT_TYPE_I4 || s->flags & KVT_ATTEND_FAST ? 0.1
                                                                                : 4e-4;
    errors e = {0};

    for (size_t i = 0; i < (size_t)g->n_q_heads * g->k_dim; i++)
        q[i] *= (float)s->q_deviation;
    for (size_t i = 0; i < s->n * g->n_kv_heads; i++)
        for (size_t d = 0; d < g->k_dim; d += 13) {
            t.k[i * g->k_dim + d] += s->shift;
            if (g->flags & KVT_GROUP_V_IN_K && d < g->v_dim)
                t.v[i * g->v_dim + d] += s->shift;
        }
    expect_ok(cache, kvt_seq_create(cache, &seq));
    append_all(cache, seq, g, &t, 0, s->n, s->step);
    item.seq = seq;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.lse = lse;
    args.flags = s->flags;
    expect_ok(cache, kvt_attend(cache, &args));
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, s->n, &kt));
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_V, 0, s->n, &vt));
    for (size_t h = 0; h < g->n_q_heads; h++) {
        double true_lse =
            reference_row(q + h * g->k_dim, t.k, t.v, s->n, g->n_kv_heads, h / ratio, g->k_dim,
                          g->v_dim, scale, 0, NULL, NULL, 0, 0, -INFINITY, exact + h * g->v_dim);
        double stored_lse =
            reference_row(q + h * g->k_dim, k, v, s->n, g->n_kv_heads, h / ratio, g->k_dim,
                          g->v_dim, scale, 0, NULL, NULL, 0, 0, -INFINITY, stored + h * g->v_dim);
        assert_true(fabs((double)lse[h] - stored_lse) <
                    lse_bound * (1 + fabs(true_lse) + (double)s->shift));
        for (size_t i = 0; i < s->n; i++) {
            const float *row = t.k + (i * g->n_kv_heads + h / ratio) * g->k_dim;
            double logit = dot_f64(q + h * g->k_dim, row, g->k_dim) * scale;
            e.logit = fabs(logit) > e.logit ? fabs(logit) : e.logit;
        }
    }
    for (size_t i = 0; i < n_out; i++) {
        difference += (stored[i] - exact[i]) * (stored[i] - exact[i]);
        norm += exact[i] * exact[i];
        added += (out[i] - stored[i]) * (out[i] - stored[i]);
    }
    e.dequant = sqrt(difference / norm);
    e.added = sqrt(added / norm);
    e.all = relative_l2(out, exact, n_out);

    free(q), free(out), free(lse), free(exact), free(stored), free(k), free(v);
    tokens_free(&t);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return e;
}

static const uint32_t dims[] = {8, 48, 64, 80, 96, 128, 192, 256, 512, 576};
static const uint32_t heads[][2] = {{4, 4},  {4, 2}, {6, 2},  {8, 2},  {5, 1}, {12, 2},
                                    {14, 2}, {8, 1}, {16, 1}, {33, 1}, {71, 1}};
static const uint32_t lengths[] = {1,   2,   15,   16,   17,   63,   64,  65,
                                   127, 640, 1023, 1024, 1025, 3000, 8192};

/*
 * Bounds by type: f32 1e-6, f16 1e-3, i8 1.02 times the dequantized cache's own error. Integer
 * products may add 2% of that error, in fast mode 1.5 times. With V in K half a step of q's largest
 * element is added: an error of q shifts the weights along V and does not average out, as the
 * errors of the tokens do.
 */
static void check_errors(const setup *s, errors e, double factor)
{
    kvt_type worst = s->group.k_type > s->group.v_type ? s->group.k_type : s->group.v_type;
    int fast = (s->flags & KVT_ATTEND_FAST) != 0;
    /* With few tokens or dims either error can be small by chance, and logits vary more. */
    int few = s->n < 64 || s->group.k_dim < 64 || s->group.v_dim < 64;
    double one_digit = s->n < 1024 || s->group.k_dim < 128 || s->group.v_dim < 128 ? 4 : 1.5;
    double steps, added;
    /* Of 1,000 lots one at 8 dims has 1.1e-6 in every instruction set: a logit of 8 is alone. */
    if (worst == KVT_TYPE_F32 && s->group.k_dim < 16 && factor < 2)
        factor = 2;
    double bound = worst == KVT_TYPE_F32 ? 1e-6 * factor
                   : worst == KVT_TYPE_F16
                       ? 1e-3
                       : (fast ? 1 + one_digit : 1.02) * e.dequant + 1e-6 * factor;
    if (worst > KVT_TYPE_I8) {
        double most = s->flags & KVT_ATTEND_F32 ? 0 : few ? 0.6 : 0.3;
        bound = (1 + most) * e.dequant + 1e-6 * factor;
        if (!(e.all < bound) || !(e.added < most * e.dequant + 2e-6 * factor))
            fail_msg("isa %s types %d/%d dims %u/%u heads %u:%u n %zu flags %u: error %g, bound %g "
                     "(dequant %g); added %g",
                     s->isa, (int)s->group.k_type, (int)s->group.v_type, s->group.k_dim,
                     s->group.v_dim, s->group.n_q_heads, s->group.n_kv_heads, s->n,
                     (unsigned)s->flags, e.all, bound, e.dequant, e.added);
        return;
    }
    steps = s->group.flags & KVT_GROUP_V_IN_K ? (fast ? 120 : 16000) : INFINITY;
    added = 1e-6 * factor + (worst != KVT_TYPE_I8 || (s->flags & KVT_ATTEND_F32) ? 0
                             : fast ? one_digit * e.dequant + 2 / steps
                                    : (few ? 0.06 : 0.02) * e.dequant + 2 / steps);
    if (worst == KVT_TYPE_I8 && fast)
        bound += 2 / steps;
    if (!(e.all < bound) || !(e.added < added))
        fail_msg("isa %s types %d/%d dims %u/%u heads %u:%u n %zu flags %u: error %g, bound %g "
                 "(dequant %g); added %g, bound %g",
                 s->isa, (int)s->group.k_type, (int)s->group.v_type, s->group.k_dim, s->group.v_dim,
                 s->group.n_q_heads, s->group.n_kv_heads, s->n, (unsigned)s->flags, e.all, bound,
                 e.dequant, e.added, added);
}

static void every_type_dim_ratio_and_length(void **state)
{
    const kvt_type types[][2] = {
        {KVT_TYPE_F32, KVT_TYPE_F32}, {KVT_TYPE_F16, KVT_TYPE_F16}, {KVT_TYPE_I8, KVT_TYPE_I8},
        {KVT_TYPE_I8, KVT_TYPE_F16},  {KVT_TYPE_F32, KVT_TYPE_I8},  {KVT_TYPE_I4, KVT_TYPE_I4},
        {KVT_TYPE_I4, KVT_TYPE_I5},   {KVT_TYPE_I8, KVT_TYPE_I4},   {KVT_TYPE_I4, KVT_TYPE_F32}};
    double worst[3] = {0}, added[3] = {0}, few_bits[3] = {0};
    static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    int n_run = 0, n_left_out = 0;
    rng r = {7};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t type = 0; type < sizeof types / sizeof *types; type++)
            for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
                for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
                    size_t h = rng_below(&r, sizeof heads / sizeof *heads);
                    setup s = {0};
                    errors e;
                    size_t work = lengths[l] * dims[d] * heads[h][0];
                    if (type > 4 && lengths[l] < 128 && rng_below(&r, 4)) {
                        n_left_out++; /* nothing is sealed yet */
                        continue;
                    }
                    /* The reference is slow: long contexts of wide heads one in twelve, and none
                     * where everything is slow (sanitizers). */
                    if (quick_level()
                            ? work > 200000 || rng_below(&r, 12 * (uint32_t)quick_level() - 6)
                            : work > 4000000 && rng_below(&r, is_full() ? 4 : 12)) {
                        n_left_out++;
                        continue;
                    }
                    n_run++;
                    s.group = group_of(1, heads[h][0], heads[h][1], dims[d], dims[d],
                                       types[type][0], types[type][1]);
                    if (dims[d] == 576 && rng_below(&r, 2))
                        s.group.v_dim = 512;
                    s.n = lengths[l];
                    s.step = 1 + rng_below(&r, 300);
                    s.q_deviation = 1;
                    s.isa = kvt_isa_name(isa);
                    size_t mode = n_run % 4 > 2 ? 0 : (size_t)n_run % 4;
                    s.flags = modes[mode];
                    e = attend_once(&s, rng_next(&r));
                    check_errors(&s, e, 1);
                    if (type == 2 && s.n > 1 && e.added / e.dequant > added[mode])
                        added[mode] = e.added / e.dequant;
                    if (type > 4 && s.n > 1 && e.added / e.dequant > few_bits[mode])
                        few_bits[mode] = e.added / e.dequant;
                    if (type < 2 && e.all > worst[type])
                        worst[type] = e.all;
                    if (type == 2 && s.n > 1 && mode < 2 && e.all / e.dequant > worst[2])
                        worst[2] = e.all / e.dequant;
                }
    printf("%d combinations, %d left out\n", n_run, n_left_out);
    printf("largest relative L2: f32 %.2g, f16 %.2g; i8 at most %.4f of the dequantized cache's\n",
           worst[0], worst[1], worst[2]);
    printf("added to i8's own error, at most: near-exact %.4f, f32 %.2g, fast %.2f of it\n",
           added[0], added[1], added[2]);
    printf("to that of 4 and 5 bits: near-exact %.4f, f32 %.2g, fast %.2f of it\n", few_bits[0],
           few_bits[1], few_bits[2]);
}

static void every_ratio(void **state)
{
    rng r = {8};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
            for (int type = 0; type < 3; type++) {
                if (quick_level() == 2 && (h + isa) % 3 != (size_t)type)
                    continue;
                setup s = {
                    group_of(1, heads[h][0], heads[h][1], 64, 64, (kvt_type)type, (kvt_type)type),
                    1100,
                    200,
                    1,
                    kvt_isa_name(isa),
                    0,
                    0};
                check_errors(&s, attend_once(&s, rng_next(&r)), 1);
            }
}

/* Logits up to L: the bound grows to (1 + L) times. */
static void large_logits(void **state)
{
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (double deviation = 3; deviation < 100; deviation *= 3) {
            setup s = {group_of(1, 8, 2, 128, 128, KVT_TYPE_F32, KVT_TYPE_F32),
                       quick_level() == 2 ? 500 : 2000,
                       2000,
                       deviation,
                       kvt_isa_name(isa),
                       0,
                       0};
            errors e = attend_once(&s, (uint64_t)deviation);
            check_errors(&s, e, 1 + e.logit);
        }
}

/*
 * V in K: decoding with many query heads on one kv head. Against the input, and against double on
 * what kvt_read gives, of which V is a part of K bit for bit.
 */
static void v_in_k(void **state)
{
    static const uint32_t shapes[][4] = {/* k_dim, v_dim, query heads, kv heads */
                                         {576, 512, 16, 1}, {576, 512, 128, 1}, {576, 512, 33, 1},
                                         {80, 64, 12, 2},   {128, 128, 8, 1},   {24, 8, 5, 5},
                                         {64, 64, 3, 3}};
    static const size_t counts[] = {1, 17, 64, 65, 700, 1025, 2100};
    static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    double worst[3] = {0}, added[3] = {0};
    rng r = {77};
    int n_run = 0;
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int type = 0; type < 3; type++)
            for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++)
                for (size_t count = 0; count < sizeof counts / sizeof *counts; count++)
                    for (uint32_t flags = 0; flags < (type == KVT_TYPE_I8 ? 4 : 1); flags++) {
                        setup s = {0};
                        errors e;
                        size_t mode = (size_t)n_run++ % 3;
                        size_t work = counts[count] * shapes[shape][0] * shapes[shape][2];
                        if (work > (quick_level() ? 100000 : 20000000) ||
                            (work > 1000000 && rng_below(&r, 4)))
                            continue;
                        s.group = group_of(1, shapes[shape][2], shapes[shape][3], shapes[shape][0],
                                           shapes[shape][1], (kvt_type)type, (kvt_type)type);
                        s.group.flags = flags | KVT_GROUP_V_IN_K;
                        s.n = counts[count];
                        s.step = 1 + rng_below(&r, 300);
                        s.q_deviation = 1;
                        s.isa = kvt_isa_name(isa);
                        s.flags = modes[mode];
                        s.shift = n_run / 3 % 2 ? 12 : 0;
                        e = attend_once(&s, rng_next(&r));
                        check_errors(&s, e, s.shift > 0 ? 1 + e.logit : 1);
                        if (type < 2 && e.all > worst[type])
                            worst[type] = e.all;
                        if (type == 2 && s.n > 1 && mode < 2 && e.all / e.dequant > worst[2])
                            worst[2] = e.all / e.dequant;
                        if (type == 2 && s.n > 1 && e.added / e.dequant > added[mode])
                            added[mode] = e.added / e.dequant;
                    }
    printf("largest relative L2: f32 %.2g, f16 %.2g; i8 at most %.4f of the dequantized cache's\n",
           worst[0], worst[1], worst[2]);
    printf("added to i8's own error, at most: near-exact %.4f, f32 %.2g, fast %.2f of it\n",
           added[0], added[1], added[2]);
}

/* ---- storages ---- */

/* Of both sides: f32, f16, i8; then 4 and 5 bits. */
enum { F32_STORAGE, F16_STORAGE, I8_STORAGE, N_STORAGES = 6 };

static kvt_type k_type_of(int storage)
{
    return storage <= I8_STORAGE ? (kvt_type)storage : storage == 5 ? KVT_TYPE_I8 : KVT_TYPE_I4;
}

static kvt_type v_type_of(int storage)
{
    return storage <= I8_STORAGE ? (kvt_type)storage : storage == 4 ? KVT_TYPE_I5 : KVT_TYPE_I4;
}

/* ---- options ---- */

typedef struct options {
    int causal, mask, softcap, alibi, sink, own_positions, v_in_k;
} options;

static void check_options(options o, const char *isa, int storage, size_t n, size_t pending,
                          size_t n_q, uint64_t seed)
{
    rng r = {seed};
    kvt_group_config g = group_of(2, 6, 2, 80, 48, k_type_of(storage), v_type_of(storage));
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    tokens t;
    float *q = rng_normals(&r, n_q * 6 * 80), *out = malloc(n_q * 6 * 48 * sizeof *out);
    float lse[6 * 300], slopes[6], sinks[6];
    int32_t *positions = malloc(n * sizeof *positions),
            *q_positions = malloc(n_q * sizeof(int32_t));
    float *k = malloc(n * 2 * 80 * sizeof *k), *v = malloc(n * 2 * 48 * sizeof *v);
    unsigned char *sees = malloc(n);
    size_t mask_tokens = pending ? pending : n / 2, stride = mask_tokens / 8 + 3;
    uint8_t *mask = malloc(n_q * stride);
    kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
    kvt_attend_item item = {.n_queries = n_q};
    kvt_attend_args args = kvt_attend_args_init();
    double expected[48];

    assert_true(n_q <= 300);
    g.flags = o.v_in_k ? KVT_GROUP_V_IN_K : 0;
    t = tokens_make(&r, n, &g);
    cache = cache_of(&g, n, 1, isa);
    expect_ok(cache, kvt_seq_create(cache, &seq));
    for (size_t i = 0; i < n; i++)
        positions[i] = (int32_t)(i * 2 + 5);
    for (size_t i = 0; i < n_q; i++)
        q_positions[i] = (int32_t)rng_below(&r, (uint32_t)n * 2);
    for (size_t first = 0; first < n;) {
        size_t count = first < n - pending ? n - pending : pending;
        kvt_tensor ka = kvt_tensor_f32(t.k + first * 2 * 80),
                   va = kvt_tensor_f32(t.v + first * 2 * 48);
        expect_ok(cache, kvt_seq_begin(seq, count, positions + first));
        expect_ok(cache, kvt_append(seq, 0, &ka, o.v_in_k ? NULL : &va));
        expect_ok(cache, kvt_append(seq, 1, &ka, o.v_in_k ? NULL : &va));
        first += count;
        if (first <= n - pending)
            expect_ok(cache, kvt_seq_commit(seq, NULL));
    }
    for (size_t i = 0; i < n_q * stride; i++)
        mask[i] = (uint8_t)rng_next(&r);
    for (int h = 0; h < 6; h++) {
        slopes[h] = 0.05f * (float)(h + 1);
        sinks[h] = (float)rng_normal(&r) + 2;
    }
    item.seq = seq;
    if (o.mask) {
        item.mask = mask;
        item.mask_stride = stride;
        item.mask_tokens = mask_tokens;
    }
    if (o.own_positions)
        item.query_positions = q_positions;
    args.layer = 1;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.lse = lse;
    args.scale = 0.2f;
    args.flags = o.causal ? KVT_ATTEND_CAUSAL : 0;
    args.softcap = o.softcap ? 1.5f : 0;
    args.alibi_slopes = o.alibi ? slopes : NULL;
    args.sink_logits = o.sink ? sinks : NULL;
    expect_ok(cache, kvt_attend(cache, &args));
    expect_ok(cache, kvt_read(seq, 1, KVT_SIDE_K, 0, n, &kt));
    expect_ok(cache, kvt_read(seq, 1, KVT_SIDE_V, 0, n, &vt));

    for (size_t i = 0; i < n_q; i++)
        for (size_t h = 0; h < 6; h++) {
            double expected_lse, error;
            int32_t position = o.own_positions ? q_positions[i]
                               : n_q <= n      ? positions[n - n_q + i]
                                               : 0;
            for (size_t j = 0; j < n; j++) {
                sees[j] = 1;
                if (o.mask && j >= n - mask_tokens) {
                    size_t bit = j - (n - mask_tokens);
                    sees[j] = mask[i * stride + bit / 8] >> bit % 8 & 1;
                } else if (o.causal && !o.mask) {
                    sees[j] = j <= n - n_q + i;
                }
            }
            expected_lse =
                reference_row(q + (i * 6 + h) * 80, k, v, n, 2, h / 3, 80, 48, (double)args.scale,
                              (double)args.softcap, sees, o.alibi ? positions : NULL, position,
                              (double)slopes[h], o.sink ? (double)sinks[h] : -INFINITY, expected);
            error = relative_l2(out + (i * 6 + h) * 48, expected, 48);
            if (!(error < (storage < I8_STORAGE ? 2e-5 : storage == I8_STORAGE ? 4e-4 : 6e-2)))
                fail_msg("isa %s type %d n %zu pending %zu n_q %zu causal %d mask %d cap %d alibi "
                         "%d sink %d v in k %d: query %zu head %zu: error %g",
                         isa, storage, n, pending, n_q, o.causal, o.mask, o.softcap, o.alibi,
                         o.sink, o.v_in_k, i, h, error);
            assert_true(expected_lse == (double)lse[i * 6 + h] ||
                        fabs(expected_lse - (double)lse[i * 6 + h]) < (storage < I8_STORAGE ? 1e-5
                                                                       : storage == I8_STORAGE
                                                                           ? 4e-4
                                                                           : 4e-2));
        }
    free(q), free(out), free(positions), free(q_positions), free(k), free(v), free(sees);
    free(mask);
    tokens_free(&t);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

static void options_against_the_reference(void **state)
{
    const size_t shapes[][3] = {{1, 0, 1},   {1, 1, 1},    {20, 5, 5},   {130, 64, 64},
                                {200, 0, 3}, {65, 1, 1},   {64, 64, 64}, {1100, 40, 40},
                                {90, 0, 90}, {300, 7, 150}};
    rng r = {99};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++)
            for (int bits = quick_level() || is_full() ? 0 : (int)isa % 3; bits < 32;
                 bits += quick_level() ? 11 * quick_level()
                         : is_full()   ? 1
                                       : 3) {
                options o = {bits & 1,
                             bits >> 1 & 1,
                             bits >> 2 & 1,
                             bits >> 3 & 1,
                             bits >> 4 & 1,
                             (int)rng_below(&r, 2),
                             0};
                check_options(o, kvt_isa_name(isa), (int)rng_below(&r, N_STORAGES),
                              shapes[shape][0], shapes[shape][1], shapes[shape][2], rng_next(&r));
                o.v_in_k = 1;
                if (bits % 4 == (int)(shape % 4))
                    check_options(o, kvt_isa_name(isa), (int)rng_below(&r, 3), shapes[shape][0],
                                  shapes[shape][1], shapes[shape][2], rng_next(&r));
            }
    /* More queries than tokens, not causal. */
    check_options((options){0}, NULL, I8_STORAGE, 3, 0, 9, 5);
}

static void nothing_visible(void **state)
{
    kvt_group_config g = group_of(1, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache = cache_of(&g, 64, 1, NULL);
    kvt_seq *seq = NULL;
    float q[32], out[32], lse[2], sinks[2] = {0.5f, -3};
    kvt_attend_item item = {.n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    (void)state;
    for (int i = 0; i < 32; i++)
        q[i] = out[i] = 1;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    item.seq = seq;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.lse = lse;
    expect_ok(cache, kvt_attend(cache, &args));
    for (int i = 0; i < 32; i++)
        assert_true(out[i] == 0);
    assert_true(lse[0] == -INFINITY && lse[1] == -INFINITY);
    args.sink_logits = sinks;
    expect_ok(cache, kvt_attend(cache, &args));
    assert_true(out[5] == 0 && lse[0] == sinks[0] && lse[1] == sinks[1]);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* A plan for n_threads, its tasks run here, and finish, whose status is returned. */
static kvt_status attend_in_tasks(kvt_cache *cache, const kvt_attend_args *args, uint32_t n_threads)
{
    kvt_attend_args with = *args;
    kvt_attend_plan plan;
    kvt_status status;
    void *scratch;
    with.n_threads = n_threads;
    expect_ok(cache, kvt_attend_plan_init(&plan, cache, &with));
    scratch = aligned_alloc(64, (plan.scratch_bytes + 63) / 64 * 64);
    assert_non_null(scratch);
    for (size_t i = 0; i < plan.n_tasks; i++)
        (void)kvt_attend_task(&plan, scratch, i);
    status = kvt_attend_finish(&plan, scratch);
    expect(cache, status == KVT_OK ? KVT_ERR_STATE : status, kvt_attend_finish(&plan, scratch));
    free(scratch);
    return status;
}

/* Finite input whose result is not finite: an error, not NaN and not the result of no tokens. */
static void overflow_is_refused(void **state)
{
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int what = 0; what < 6; what++) {
            kvt_group_config g = group_of(1, 2, 1, 16, 16, KVT_TYPE_F32, KVT_TYPE_F32);
            kvt_cache *cache = cache_of(&g, 64, 1, kvt_isa_name(isa));
            kvt_seq *seq = NULL;
            float k[3][16], v[3][16], q[2][16], out[2][16], slopes[2] = {0.5f, 0.25f};
            kvt_tensor kt = kvt_tensor_f32(k[0]), vt = kvt_tensor_f32(v[0]);
            kvt_attend_item item = {.n_queries = 1};
            kvt_attend_args args = kvt_attend_args_init();
            for (int d = 0; d < 16; d++)
                for (int i = 0; i < 3; i++) {
                    k[i][d] = what == 1 ? 1e20f : what == 2 && d % 2 ? -1e20f : 1;
                    v[i][d] = what == 3 ? 3e38f : 1;
                    q[i % 2][d] = what == 1 || what == 2 ? 1e20f : 1;
                }
            if (what == 2) /* each product is infinite; kernels that fuse get -inf, others NaN */
                for (int d = 0; d < 16; d++)
                    k[0][d] = k[1][d] = k[2][d] = d % 2 ? -1e30f : 1e30f;
            expect_ok(cache, kvt_seq_create(cache, &seq));
            expect_ok(cache, kvt_seq_begin(seq, 3, NULL));
            expect_ok(cache, kvt_append(seq, 0, &kt, &vt));
            item.seq = seq;
            args.items = &item;
            args.n_items = 1;
            args.q = kvt_tensor_f32(q[0]);
            args.out = kvt_tensor_f32(out[0]);
            args.alibi_slopes = slopes;
            if (what == 4)
                args.scale = 3e38f;
            if (what == 5)
                slopes[1] = 3e38f;
            expect(cache, what ? KVT_ERR_VALUE : KVT_OK, kvt_attend(cache, &args));
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

/*
 * Logits that are all NaN, of a block, of a range wherever it stands, or of all tokens, are not
 * taken for those of masked tokens. Sums of dims 0 to 63 are infinity, of the others -infinity.
 */
static void overflow_of_a_whole_range_is_refused(void **state)
{
    enum { N = 2200, DIM = 128 };
    static const size_t bad[][2] = {
        {0, 64},      {64, 128}, {1024, 1088}, {2112, 2176}, {2176, N}, {0, 1024},
        {1024, 2048}, {2048, N}, {0, 2048},    {1024, N},    {0, N},    {1500, 1501},
    };
    static float k[N][DIM], v[N][8];
    static uint8_t mask[(N + 7) / 8];
    kvt_tensor kt = kvt_tensor_f32(k[0]), vt = kvt_tensor_f32(v[0]);
    (void)state;
    memset(mask, 0xff, sizeof mask);
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            kvt_group_config g = group_of(1, 1, 1, DIM, 8, KVT_TYPE_F32, KVT_TYPE_F32);
            kvt_cache *cache = cache_of(&g, N, 1, kvt_isa_name(isa));
            kvt_seq *seq = NULL;
            float q[DIM], out[8], lse, sink = 1;
            kvt_attend_item item = {.n_queries = 1};
            kvt_attend_args args = kvt_attend_args_init();
            for (size_t t = 0; t < N; t++)
                for (size_t d = 0; d < DIM; d++) {
                    float x = t >= bad[i][0] && t < bad[i][1] ? 1e20f : 1e-20f;
                    k[t][d] = x > 1 && d >= 64 ? -x : x;
                    q[d] = 1e20f;
                    v[t][d % 8] = 1;
                }
            expect_ok(cache, kvt_seq_create(cache, &seq));
            expect_ok(cache, kvt_seq_begin(seq, N, NULL));
            expect_ok(cache, kvt_append(seq, 0, &kt, &vt));
            item.seq = seq;
            args.items = &item;
            args.n_items = 1;
            args.q = kvt_tensor_f32(q);
            args.out = kvt_tensor_f32(out);
            args.lse = &lse;
            for (int kind = 0; kind < 6; kind++) { /* with a mask, with a sink, cut into tasks */
                item.mask = kind % 2 ? mask : NULL;
                item.mask_stride = kind % 2 ? sizeof mask : 0;
                item.mask_tokens = kind % 2 ? N : 0;
                args.sink_logits = kind / 2 == 1 ? &sink : NULL;
                expect(cache, KVT_ERR_VALUE,
                       kind / 2 == 2 ? attend_in_tasks(cache, &args, 3) : kvt_attend(cache, &args));
            }
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

/*
 * Logits that are all -infinity are not those of masked tokens where a mask, or a mask and a
 * window, shows one of the tokens. Where none is shown, there are zeros.
 */
static void overflow_under_a_mask_is_refused(void **state)
{
    enum { N = 150, DIM = 8, WINDOW = 40 };
    typedef struct shown_bits {
        uint64_t mask_tokens;
        int bit;             /* the one that is set; -1: none */
        int seen, in_window; /* whether a token is seen, without and with a window */
    } shown_bits;
    static const shown_bits cases[] = {
        {N, 0, 1, 0},     {N, 7, 1, 0},  {N, 64, 1, 0},      {N, 109, 1, 0},     {N, 110, 1, 1},
        {N, N - 1, 1, 1}, {N, -1, 0, 0}, {N, N, 0, 0},       {N - 1, -1, 1, 0},  {20, -1, 1, 1},
        {40, -1, 1, 0},   {0, -1, 1, 1}, {N - 6, 143, 1, 1}, {N - 6, 144, 1, 0},
    };
    static float k[N][DIM], v[N][DIM];
    kvt_tensor kt = kvt_tensor_f32(k[0]), vt = kvt_tensor_f32(v[0]);
    (void)state;
    for (size_t t = 0; t < N; t++)
        for (size_t d = 0; d < DIM; d++)
            k[t][d] = v[t][d] = 1;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int window = 0; window < 2; window++) {
            kvt_group_config g = group_of(1, 2, 1, DIM, DIM, KVT_TYPE_F32, KVT_TYPE_F32);
            kvt_cache *cache;
            kvt_seq *seq = NULL;
            float q[3 * 2 * DIM], out[3 * 2 * DIM], lse[3 * 2];
            kvt_attend_item item = {.n_queries = 3};
            kvt_attend_args args = kvt_attend_args_init();
            int32_t positions[3] = {N - 1, N - 1, N - 1};
            g.window_tokens = window ? WINDOW : 0;
            cache = cache_of(&g, N, 1, kvt_isa_name(isa));
            expect_ok(cache, kvt_seq_create(cache, &seq));
            expect_ok(cache, kvt_seq_begin(seq, N, NULL));
            expect_ok(cache, kvt_append(seq, 0, &kt, &vt));
            for (size_t j = 0; j < sizeof q / sizeof *q; j++)
                q[j] = -10;
            item.seq = seq;
            item.query_positions = positions;
            args.items = &item;
            args.n_items = 1;
            args.q = kvt_tensor_f32(q);
            args.out = kvt_tensor_f32(out);
            args.lse = lse;
            for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
                uint8_t mask[3][24] = {{0}}; /* of the second query; the bits behind them are set */
                int seen = window ? cases[i].in_window : cases[i].seen;
                uint64_t n = cases[i].mask_tokens;
                item.mask = mask[0];
                item.mask_stride = sizeof mask[0];
                item.mask_tokens = n;
                for (size_t row = 0; row < 3; row++)
                    for (uint64_t bit = n; bit < 192; bit++)
                        mask[row][bit / 8] |= (uint8_t)(1 << bit % 8);
                if (cases[i].bit >= 0)
                    mask[1][cases[i].bit / 8] |= (uint8_t)(1 << cases[i].bit % 8);
                args.scale = 3e38f;
                if (n < N) { /* the other queries see what the mask does not reach */
                    item.n_queries = 1;
                    item.mask = mask[1];
                } else {
                    item.n_queries = 3;
                }
                expect(cache, seen ? KVT_ERR_VALUE : KVT_OK, kvt_attend(cache, &args));
                for (size_t j = 0; !seen && j < (size_t)item.n_queries * 2 * DIM; j++)
                    assert_true(out[j] == 0 && lse[j / DIM] == -INFINITY);
                args.scale = 0.1f;
                expect_ok(cache, kvt_attend(cache, &args));
            }
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

/*
 * q that leaves f32 as it is turned for keys that have moved, in a range behind the first, where
 * their scores would be NaN (0), or -infinity (1), which masked tokens have.
 */
static void overflow_of_a_turned_query_is_refused(void **state)
{
    enum { N = 2112, DIM = 8 };
    static const float frequency = 0.7853981634f / 64;   /* 64 positions: an eighth of a turn */
    static const uint64_t firsts[] = {1024, 1500, 1984}; /* a range, some of one, its last block */
    static float k[N][DIM], v[N][DIM];
    kvt_tensor kt = kvt_tensor_f32(k[0]), vt = kvt_tensor_f32(v[0]);
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t i = 0; i < 2 * sizeof firsts / sizeof *firsts; i++) {
            const uint64_t first = firsts[i / 2];
            kvt_group_config g = group_of(1, 1, 1, DIM, DIM, KVT_TYPE_F32, KVT_TYPE_F32);
            kvt_cache *cache;
            kvt_seq *seq = NULL;
            float q[DIM] = {3e38f, 3e38f}, out[DIM], lse;
            kvt_attend_item item = {.n_queries = 1};
            kvt_attend_args args = kvt_attend_args_init();
            g.rope_pairing = KVT_ROPE_HALVES;
            g.rope_dims = 2;
            g.rope_inverse_frequencies = &frequency;
            cache = cache_of(&g, N, 1, kvt_isa_name(isa));
            for (size_t t = 0; t < N; t++)
                for (size_t d = 0; d < DIM; d++) {
                    k[t][d] = i % 2 && d < 2 ? -1e-36f : 0;
                    v[t][d] = t < first + 64 ? 1 : 7;
                }
            expect_ok(cache, kvt_seq_create(cache, &seq));
            expect_ok(cache, kvt_seq_begin(seq, N, NULL));
            expect_ok(cache, kvt_append(seq, 0, &kt, &vt));
            expect_ok(cache, kvt_seq_commit(seq, NULL));
            item.seq = seq;
            args.items = &item;
            args.n_items = 1;
            args.q = kvt_tensor_f32(q);
            args.out = kvt_tensor_f32(out);
            args.lse = &lse;
            expect_ok(cache, kvt_attend(cache, &args));
            expect_ok(cache, kvt_seq_remove(seq, first, 64));
            expect(cache, KVT_ERR_VALUE, kvt_attend(cache, &args));
            expect(cache, KVT_ERR_VALUE, attend_in_tasks(cache, &args, 3));
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

/* The bytes in slots of truncated tokens change no bit of a result, even near f32's range. */
static void dead_tokens_change_nothing(void **state)
{
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int type = 0; type < 6; type++) /* from 3 on with V in K */
            for (int trial = 0; trial < 100; trial += quick_level() ? 19 : 1) {
                /* Small queries, then those around which i8's scores leave f32. */
                int power = trial < 10 ? trial * 9 : 88 + trial % 10;
                rng r = {(uint64_t)trial};
                kvt_group_config g =
                    group_of(1, 7, 1, 64, 64, (kvt_type)(type % 3), (kvt_type)(type % 3));
                kvt_cache *cache;
                tokens t;
                float *q, out[2][7 * 64], lse[2][7];
                g.flags = type < 3 ? 0 : KVT_GROUP_V_IN_K;
                cache = cache_of(&g, 64, 1, kvt_isa_name(isa));
                t = tokens_make(&r, 32, &g);
                q = rng_normals(&r, 7 * 64);
                for (size_t i = 0; i < 7 * 64; i++)
                    q[i] = ldexpf(q[i], power);
                for (int dead = 0; dead < 2; dead++) {
                    kvt_seq *seq = NULL;
                    kvt_attend_item item = {.n_queries = 1};
                    kvt_attend_args args = kvt_attend_args_init();
                    expect_ok(cache, kvt_seq_create(cache, &seq));
                    append_step(cache, seq, &g, &t, 0, 2);
                    if (dead) {
                        append_step(cache, seq, &g, &t, 2, 30);
                        expect_ok(cache, kvt_seq_truncate(seq, 2));
                    }
                    item.seq = seq;
                    args.items = &item;
                    args.n_items = 1;
                    args.q = kvt_tensor_f32(q);
                    args.out = kvt_tensor_f32(out[dead]);
                    args.lse = lse[dead];
                    expect_ok(cache, kvt_attend(cache, &args));
                    kvt_seq_destroy(seq);
                    expect_ok(cache, kvt_cache_trim(cache)); /* the next one gets zeroed memory */
                }
                assert_memory_equal(out[0], out[1], sizeof out[0]);
                assert_memory_equal(lse[0], lse[1], sizeof lse[0]);
                free(q);
                tokens_free(&t);
                kvt_cache_destroy(cache);
            }
}

/*
 * Tokens that a query does not see change no bit of its result, however large their keys and values
 * are: no step of rounding, maximum or sum. They are masked, or come later. Through the offset of a
 * block (what is stored of K) they do matter: so there is none where they share a block with
 * others (same_block), or they have a block of their own.
 */
static void unseen_tokens_change_nothing(void **state)
{
    enum { N = 192, HEADS = 4, DIM = 64, QUERIES = 3 };
    static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int bits = 0; bits < 64; bits += quick_level() ? 7 : 1)
            for (int type = 0; type < N_STORAGES; type++)
                for (int mode = 0; mode < (type >= I8_STORAGE ? 3 : 1);
                     mode += quick_level() == 2 ? 2 : 1) {
                    int masked = bits & 1, softcap = bits >> 1 & 1, same_block = bits >> 2 & 1;
                    int alibi = bits >> 3 & 1, sink = bits >> 4 & 1, v_in_k = bits >> 5 & 1;
                    kvt_group_config g =
                        group_of(1, 2 * HEADS, HEADS, DIM, DIM, k_type_of(type), v_type_of(type));
                    float *out[2], lse[2][QUERIES * 2 * HEADS], slopes[2 * HEADS], sinks[2 * HEADS];
                    rng r = {(uint64_t)bits + 1};
                    tokens t;
                    float *q = rng_normals(&r, QUERIES * 2 * HEADS * DIM);
                    uint8_t mask[QUERIES][N / 8];
                    kvt_cache *cache;
                    if (type > I8_STORAGE && (v_in_k || (same_block && type < 5))) {
                        free(q); /* K of 4 bits has an offset, and is not V */
                        continue;
                    }
                    g.fine_tokens = KVT_FINE_NONE;
                    g.flags =
                        (same_block ? KVT_GROUP_NO_OFFSET : 0) | (v_in_k ? KVT_GROUP_V_IN_K : 0);
                    cache = cache_of(&g, N + QUERIES, 1, kvt_isa_name(isa));
                    t = tokens_make(&r, N + QUERIES, &g);
                    memset(mask, 0xff, sizeof mask);
                    for (int h = 0; h < 2 * HEADS; h++) {
                        slopes[h] = 0.03f * (float)h;
                        sinks[h] = 1;
                    }
                    for (int loud = 0; loud < 2; loud++) {
                        kvt_seq *seq = NULL;
                        kvt_attend_item item = {.n_queries = QUERIES};
                        kvt_attend_args args = kvt_attend_args_init();
                        /* Causal: query j sees all but the last QUERIES - 1 - j tokens, and the
                         * first one's result is compared. */
                        size_t n = masked ? N : same_block ? 68 : 64 + QUERIES - 1;
                        for (size_t i = 0; i < n; i++) {
                            int hidden = !masked      ? i > n - QUERIES
                                         : same_block ? i % 5 == 2
                                                      : i / 64 == 1;
                            if (!hidden)
                                continue;
                            for (size_t j = 0; j < QUERIES; j++)
                                mask[j][i / 8] &= (uint8_t) ~(1u << i % 8);
                            for (size_t d = 0; d < HEADS * DIM; d++) {
                                float sign = (i + d) % 3 ? 1.0f : -1.0f;
                                t.k[i * HEADS * DIM + d] = loud ? 6e4f * sign : 0.5f * sign;
                                t.v[i * HEADS * DIM + d] = loud ? 6e4f : 0.5f * sign;
                                if (v_in_k)
                                    t.v[i * HEADS * DIM + d] = t.k[i * HEADS * DIM + d];
                            }
                        }
                        out[loud] = malloc(QUERIES * 2 * HEADS * DIM * sizeof(float));
                        expect_ok(cache, kvt_seq_create(cache, &seq));
                        append_step(cache, seq, &g, &t, 0, n);
                        item.seq = seq;
                        if (masked) {
                            item.mask = mask[0];
                            item.mask_stride = N / 8;
                            item.mask_tokens = N;
                        }
                        args.items = &item;
                        args.n_items = 1;
                        args.flags = modes[mode] | (masked ? 0 : KVT_ATTEND_CAUSAL);
                        args.q = kvt_tensor_f32(q);
                        args.out = kvt_tensor_f32(out[loud]);
                        args.lse = lse[loud];
                        args.softcap = softcap ? 20 : 0;
                        args.alibi_slopes = alibi ? slopes : NULL;
                        args.sink_logits = sink ? sinks : NULL;
                        expect_ok(cache, kvt_attend(cache, &args));
                        kvt_seq_destroy(seq);
                        expect_ok(cache, kvt_cache_trim(cache));
                    }
                    {
                        size_t rows = (masked ? QUERIES : 1) * 2 * HEADS;
                        if ((memcmp(out[0], out[1], rows * DIM * sizeof(float)) != 0 ||
                             memcmp(lse[0], lse[1], rows * sizeof(float)) != 0))
                            fail_msg("isa %s type %d mode %d: masked %d softcap %d same block %d "
                                     "alibi %d sink %d v in k %d: unseen tokens matter",
                                     kvt_isa_name(isa), type, mode, masked, softcap, same_block,
                                     alibi, sink, v_in_k);
                    }
                    free(out[0]), free(out[1]), free(q);
                    tokens_free(&t);
                    kvt_cache_destroy(cache);
                }
}

/*
 * ALiBi of a query far behind all that it sees: right up to the border where f32 would lose the
 * logits, refused beyond. Tokens that are near but not seen do not help.
 */
static void alibi_from_far(void **state)
{
    enum { N = 70, DIM = 16, FAR = 8192 }; /* 8192 * 0.5 is the largest bias */
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int hidden = 0; hidden < 3; hidden++) { /* 1: later tokens are near; 2: masked ones */
            kvt_group_config g = group_of(1, 2, 1, DIM, DIM, KVT_TYPE_F32, KVT_TYPE_F32);
            kvt_cache *cache = cache_of(&g, N, 1, kvt_isa_name(isa));
            kvt_seq *seq = NULL;
            rng r = {4};
            tokens t = tokens_make(&r, N, &g);
            float *q = rng_normals(&r, 2 * 2 * DIM), out[2 * 2 * DIM];
            float slopes[2] = {0.001f, 0.5f};
            int32_t positions[N], query_positions[2];
            uint8_t mask[2][2] = {{0xff, 0x7f}, {0xff, 0xff}};
            size_t seen = hidden ? N - 1 : N;
            kvt_tensor k = kvt_tensor_f32(t.k), v = kvt_tensor_f32(t.v);
            kvt_attend_item item = {.n_queries = 2, .query_positions = query_positions};
            kvt_attend_args args = kvt_attend_args_init();
            for (int i = 0; i < N; i++)
                positions[i] = 3 * i;
            if (hidden)
                positions[N - 1] = positions[N - 2] + FAR + 1;
            expect_ok(cache, kvt_seq_create(cache, &seq));
            expect_ok(cache, kvt_seq_begin(seq, N, positions));
            expect_ok(cache, kvt_append(seq, 0, &k, &v));
            expect_ok(cache, kvt_seq_commit(seq, NULL));
            item.seq = seq;
            if (hidden == 2) {
                item.mask = mask[0];
                item.mask_stride = 2;
                item.mask_tokens = 16;
            }
            args.items = &item;
            args.n_items = 1;
            args.flags = hidden == 1 ? KVT_ATTEND_CAUSAL : 0;
            args.q = kvt_tensor_f32(q);
            args.out = kvt_tensor_f32(out);
            args.alibi_slopes = slopes;
            for (int beyond = 0; beyond < 3; beyond++) {
                double expected[DIM];
                query_positions[0] = beyond == 2 ? INT32_MAX : positions[seen - 1] + FAR + beyond;
                query_positions[1] = positions[N - 1];
                expect(cache, beyond ? KVT_ERR_VALUE : KVT_OK, kvt_attend(cache, &args));
                if (beyond) {
                    expect_error_text(cache, "ALiBi", "from far");
                    continue;
                }
                for (size_t h = 0; h < 2; h++) {
                    reference_row(q + h * DIM, t.k, t.v, seen, 1, 0, DIM, DIM, 0.25, 0, NULL,
                                  positions, query_positions[0], (double)slopes[h], -INFINITY,
                                  expected);
                    assert_true(relative_l2(out + h * DIM, expected, DIM) < 3e-4);
                }
            }
            slopes[0] = -0.0f; /* is not negative */
            query_positions[0] = positions[seen - 1];
            expect_ok(cache, kvt_attend(cache, &args));
            free(q);
            tokens_free(&t);
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

/* A sink whose logit is far above all others takes all the weight, and nothing overflows. */
static void a_sink_above_all(void **state)
{
    enum { N = 70, DIM = 16 };
    static const float sinks_of[] = {-300, 0, 40, 90, 120, 1000, 1e30f};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int type = 0; type < 3; type++)
            for (size_t i = 0; i < sizeof sinks_of / sizeof *sinks_of; i++) {
                kvt_group_config g = group_of(1, 2, 1, DIM, DIM, (kvt_type)type, (kvt_type)type);
                kvt_cache *cache = cache_of(&g, N, 1, kvt_isa_name(isa));
                kvt_seq *seq = NULL;
                rng r = {4};
                tokens t = tokens_make(&r, N, &g);
                float *q = rng_normals(&r, 2 * DIM), out[2 * DIM], lse[2], plain[2 * DIM],
                      plain_lse[2];
                float sinks[2] = {sinks_of[i], -20};
                kvt_attend_item item = {.n_queries = 1};
                kvt_attend_args args = kvt_attend_args_init();
                expect_ok(cache, kvt_seq_create(cache, &seq));
                append_step(cache, seq, &g, &t, 0, N);
                item.seq = seq;
                args.items = &item;
                args.n_items = 1;
                args.q = kvt_tensor_f32(q);
                args.out = kvt_tensor_f32(plain);
                args.lse = plain_lse;
                expect_ok(cache, kvt_attend(cache, &args));
                args.out = kvt_tensor_f32(out);
                args.lse = lse;
                args.sink_logits = sinks;
                expect_ok(cache, kvt_attend(cache, &args));
                {
                    double a = (double)plain_lse[0], b = (double)sinks[0], top = a > b ? a : b;
                    double expected = top + log(exp(a - top) + exp(b - top));
                    assert_true(fabs((double)lse[0] - expected) <= 1e-5 * (1 + fabs(expected)));
                    for (int d = 0; d < DIM; d++) {
                        double share = (double)plain[d] * exp(a - expected);
                        assert_true(fabs((double)out[d] - share) <= 2e-5 * fabs(share) + 1e-37);
                    }
                }
                free(q);
                tokens_free(&t);
                kvt_seq_destroy(seq);
                kvt_cache_destroy(cache);
            }
}

/* ---- the same bits ---- */

/* Runs tasks on the caller's thread, last first. */
static void run_backwards(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    size_t *calls = user;
    *calls += 1;
    while (n-- > 0)
        task(arg, n);
}

static void same_bits_for_threads_batches_and_plans(void **state)
{
    enum { N_SEQS = 3, HEADS = 12, DIM = 64 };
    const size_t lengths_of[N_SEQS] = {5000, 130, 1024};
    const size_t queries_of[N_SEQS] = {1, 40, 3};
    (void)state;
    for (int type = 0; type <= N_STORAGES; type++) { /* the last: i8 with V in K */
        int storage = type < N_STORAGES ? type : I8_STORAGE;
        kvt_group_config g =
            group_of(1, HEADS, 2, DIM, DIM, k_type_of(storage), v_type_of(storage));
        if (quick_level() == 2 && type % 2)
            continue;
        float *reference[N_SEQS], *q[N_SEQS];
        g.flags = type < N_STORAGES ? 0 : KVT_GROUP_V_IN_K;
        for (int threads = 0; threads < 5; threads++) {
            if (quick_level() == 2 && threads && threads - 1 != type / 2 % 4)
                continue;
            rng r = {123};
            kvt_config config = kvt_config_init();
            size_t calls = 0, n_queries = 0;
            kvt_cache *cache = NULL;
            kvt_seq *seqs[N_SEQS];
            kvt_attend_item items[N_SEQS];
            kvt_attend_args args = kvt_attend_args_init();
            kvt_attend_plan plan;
            float *all_q, *all_out;
            void *scratch;

            config.groups = &g;
            config.n_groups = 1;
            config.max_tokens = 5000;
            if (threads) { /* 1, 3, 16, 64 threads: from whole units to one range a task */
                const uint32_t counts[] = {1, 3, 16, 64};
                config.executor = (kvt_executor){&calls, run_backwards, counts[threads - 1]};
            }
            expect_ok(NULL, kvt_cache_create(&config, &cache));
            memset(items, 0, sizeof items);
            args.items = items;
            args.flags = KVT_ATTEND_CAUSAL;
            for (int i = 0; i < N_SEQS; i++) {
                tokens t = tokens_make(&r, lengths_of[i], &g);
                float *one_q = rng_normals(&r, queries_of[i] * HEADS * DIM);
                float *one = malloc(queries_of[i] * HEADS * DIM * sizeof *one);
                expect_ok(cache, kvt_seq_create(cache, &seqs[i]));
                append_all(cache, seqs[i], &g, &t, 0, t.n, 700);
                items[0] = (kvt_attend_item){.seq = seqs[i], .n_queries = queries_of[i]};
                args.n_items = 1;
                args.q = kvt_tensor_f32(one_q);
                args.out = kvt_tensor_f32(one);
                expect_ok(cache, kvt_attend(cache, &args));
                if (threads == 0) {
                    reference[i] = one;
                    q[i] = one_q;
                } else {
                    assert_memory_equal(one, reference[i],
                                        queries_of[i] * HEADS * DIM * sizeof *one);
                    free(one);
                    free(one_q);
                }
                tokens_free(&t);
                n_queries += queries_of[i];
            }
            if (threads)
                assert_true(calls > 0 || threads == 1);

            /* All in one batch, and by a plan whose tasks run in a scrambled order. */
            all_q = malloc(n_queries * HEADS * DIM * sizeof *all_q);
            all_out = malloc(n_queries * HEADS * DIM * sizeof *all_out);
            for (size_t i = 0, at = 0; i < N_SEQS; at += queries_of[i++]) {
                memcpy(all_q + at * HEADS * DIM, q[i], queries_of[i] * HEADS * DIM * sizeof *all_q);
                items[i] = (kvt_attend_item){.seq = seqs[i], .n_queries = queries_of[i]};
            }
            args.n_items = N_SEQS;
            args.q = kvt_tensor_f32(all_q);
            args.out = kvt_tensor_f32(all_out);
            for (int planned = 0; planned < 4; planned++) {
                memset(all_out, 0xff, n_queries * HEADS * DIM * sizeof *all_out);
                if (!planned) {
                    expect_ok(cache, kvt_attend(cache, &args));
                } else {
                    args.n_threads = planned == 1 ? 1 : planned == 2 ? 7 : 200;
                    expect_ok(cache, kvt_attend_plan_init(&plan, cache, &args));
                    scratch = aligned_alloc(64, plan.scratch_bytes);
                    assert_non_null(scratch);
                    memset(scratch, 0, plan.scratch_bytes);
                    for (size_t i = plan.n_tasks; i-- > 0;) {
                        expect(cache, KVT_ERR_STATE, kvt_attend_finish(&plan, scratch));
                        expect_ok(cache, kvt_attend_task(&plan, scratch, i));
                    }
                    expect_ok(cache, kvt_attend_finish(&plan, scratch));
                    expect(cache, KVT_ERR_STATE, kvt_attend_finish(&plan, scratch));
                    free(scratch);
                }
                for (size_t i = 0, at = 0; i < N_SEQS; at += queries_of[i++])
                    assert_memory_equal(all_out + at * HEADS * DIM, reference[i],
                                        queries_of[i] * HEADS * DIM * sizeof *all_out);
            }
            args.n_threads = 0;
            free(all_q);
            free(all_out);
            for (int i = 0; i < N_SEQS; i++)
                kvt_seq_destroy(seqs[i]);
            kvt_cache_destroy(cache);
        }
        for (int i = 0; i < N_SEQS; i++) {
            free(reference[i]);
            free(q[i]);
        }
    }
}

/* By plan, in scratch with a guard behind it. */
static void attend_by_plan(kvt_cache *cache, kvt_attend_args *args, uint32_t n_threads)
{
    kvt_attend_plan plan;
    unsigned char *scratch;
    args->n_threads = n_threads;
    expect_ok(cache, kvt_attend_plan_init(&plan, cache, args));
    scratch = aligned_alloc(64, plan.scratch_bytes + 64);
    assert_non_null(scratch);
    memset(scratch, 0xff, plan.scratch_bytes + 64);
    for (size_t i = plan.n_tasks; i-- > 0;)
        expect_ok(cache, kvt_attend_task(&plan, scratch, i));
    expect_ok(cache, kvt_attend_finish(&plan, scratch));
    for (size_t i = 0; i < 64; i++)
        assert_int_equal(scratch[plan.scratch_bytes + i], 0xff);
    free(scratch);
    args->n_threads = 0;
}

/* Batches of any lengths and numbers of queries, cut for any number of threads: the same bits. */
static void random_batches(void **state)
{
    enum { SEQS = 8, ITEMS = 12, DIM = 16 };
    static const uint32_t shapes[][2] = {{8, 8}, {4, 4}, {6, 3}, {12, 2}, {40, 1}, {71, 1}};
    static const size_t lengths_of[SEQS] = {1, 60, 100, 1024, 1500, 2048, 4000, 9000};
    rng r = {2024};
    (void)state;
    for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++)
        for (int round = 0; round < (quick_level() ? 3 - quick_level() : 12); round++) {
            uint32_t n_threads = 2 + rng_below(&r, 12), n_heads = shapes[shape][0];
            int type = (int)rng_below(&r, N_STORAGES);
            kvt_group_config g =
                group_of(1, n_heads, shapes[shape][1], DIM, DIM, k_type_of(type), v_type_of(type));
            size_t calls = 0, n_items = 1 + rng_below(&r, ITEMS), n_queries = 0, n_out;
            kvt_config config = kvt_config_init();
            kvt_attend_args args = kvt_attend_args_init();
            kvt_attend_item items[ITEMS];
            kvt_seq *seqs[SEQS];
            kvt_cache *cache = NULL;
            float *q, *out, *expected;
            tokens t;
            config.groups = &g;
            config.n_groups = 1;
            config.max_tokens = 9000;
            config.executor = (kvt_executor){&calls, run_backwards, n_threads};
            expect_ok(NULL, kvt_cache_create(&config, &cache));
            t = tokens_make(&r, 9000, &g);
            for (int i = 0; i < SEQS; i++) {
                expect_ok(cache, kvt_seq_create(cache, &seqs[i]));
                append_step(cache, seqs[i], &g, &t, 0, lengths_of[i]);
            }
            memset(items, 0, sizeof items);
            args.flags = rng_below(&r, 2) ? KVT_ATTEND_CAUSAL : 0;
            for (size_t i = 0; i < n_items; i++) {
                size_t s = rng_below(&r, SEQS), most = lengths_of[s] < 70 ? lengths_of[s] : 70;
                items[i].seq = seqs[s];
                items[i].n_queries = round % 3 == 0 ? 1 : 1 + rng_below(&r, (uint32_t)most);
                n_queries += (size_t)items[i].n_queries;
            }
            n_out = n_queries * n_heads * DIM;
            q = rng_normals(&r, n_out);
            out = malloc(n_out * sizeof *out);
            expected = malloc(n_out * sizeof *expected);
            assert_true(out && expected);
            args.items = items;
            args.n_items = n_items;
            args.q = kvt_tensor_f32(q);
            args.out = kvt_tensor_f32(expected);
            attend_by_plan(cache, &args, 1);
            args.out = kvt_tensor_f32(out);
            for (uint32_t threads = 0; threads < 60; threads = threads * 2 + 1 + rng_below(&r, 3)) {
                memset(out, 0xff, n_out * sizeof *out);
                if (threads)
                    attend_by_plan(cache, &args, threads);
                else
                    expect_ok(cache, kvt_attend(cache, &args));
                if (memcmp(out, expected, n_out * sizeof *out) != 0)
                    fail_msg("heads %u:%u type %d round %d: %u threads: other bits", n_heads,
                             shapes[shape][1], type, round, threads);
            }
            free(q), free(out), free(expected);
            tokens_free(&t);
            for (int i = 0; i < SEQS; i++)
                kvt_seq_destroy(seqs[i]);
            kvt_cache_destroy(cache);
        }
}

/* ---- the caller's layouts and formats ---- */

static uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)(u >> 16);
}

static float from_bf16(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Head-major bf16 K and V, q inside a fused QKV buffer, bf16 out. */
static void strides_and_dtypes(void **state)
{
    enum { N = 100, KV = 2, Q = 4, D = 24 };
    kvt_group_config g = group_of(1, Q, KV, D, D, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache = cache_of(&g, N, 1, NULL);
    kvt_seq *plain = NULL, *strided = NULL;
    static uint16_t k[KV][N + 3][D + 5], v[KV][N + 3][D + 5], fused[2][Q + 2 * KV][D],
        out16[2][Q][D];
    float q[2][Q][D], out[2][Q][D];
    rng r = {3};
    tokens t = tokens_make(&r, N, &g);
    kvt_tensor kt = {k, KVT_BF16, (D + 5) * 2, (N + 3) * (D + 5) * 2}, vt = kt;
    kvt_attend_item item = {.n_queries = 2};
    kvt_attend_args args = kvt_attend_args_init();
    (void)state;

    vt.data = v;
    for (int i = 0; i < N; i++)
        for (int h = 0; h < KV; h++)
            for (int d = 0; d < D; d++) {
                size_t at = (size_t)((i * KV + h) * D + d);
                k[h][i][d] = to_bf16(t.k[at]);
                v[h][i][d] = to_bf16(t.v[at]);
                t.k[at] = from_bf16(k[h][i][d]);
                t.v[at] = from_bf16(v[h][i][d]);
            }
    for (int i = 0; i < 2; i++)
        for (int h = 0; h < Q; h++)
            for (int d = 0; d < D; d++) {
                fused[i][h][d] = to_bf16((float)rng_normal(&r));
                q[i][h][d] = from_bf16(fused[i][h][d]);
            }
    expect_ok(cache, kvt_seq_create(cache, &plain));
    expect_ok(cache, kvt_seq_create(cache, &strided));
    append_step(cache, plain, &g, &t, 0, N);
    expect_ok(cache, kvt_seq_begin(strided, N, NULL));
    expect_ok(cache, kvt_append(strided, 0, &kt, &vt));
    expect_ok(cache, kvt_seq_commit(strided, NULL));

    args.items = &item;
    args.n_items = 1;
    args.flags = KVT_ATTEND_CAUSAL;
    item.seq = plain;
    args.q = kvt_tensor_f32(&q[0][0][0]);
    args.out = kvt_tensor_f32(&out[0][0][0]);
    expect_ok(cache, kvt_attend(cache, &args));
    item.seq = strided;
    args.q = (kvt_tensor){fused, KVT_BF16, (Q + 2 * KV) * D * 2, 0};
    args.out = (kvt_tensor){out16, KVT_BF16, 0, 0};
    expect_ok(cache, kvt_attend(cache, &args));
    for (int i = 0; i < 2; i++)
        for (int h = 0; h < Q; h++)
            for (int d = 0; d < D; d++)
                assert_true(fabsf(from_bf16(out16[i][h][d]) - out[i][h][d]) <=
                            fabsf(out[i][h][d]) / 256);
    tokens_free(&t);
    kvt_seq_destroy(plain);
    kvt_seq_destroy(strided);
    kvt_cache_destroy(cache);
}

/* The newest token alone is so large that its open row has a scale other than 1. */
static void only_the_last_token_has_a_scale(void **state)
{
    kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    (void)state;
    for (size_t n = 1; n < 70; n++) {
        rng r = {n};
        kvt_cache *cache = cache_of(&g, 100, 1, NULL);
        kvt_seq *seq = NULL;
        tokens t = tokens_make(&r, n, &g);
        float *q = rng_normals(&r, 16), out[16];
        double expected[16];
        kvt_attend_item item = {.n_queries = 1};
        kvt_attend_args args = kvt_attend_args_init();
        for (size_t d = 0; d < 16; d++) {
            t.k[(n - 1) * 16 + d] *= 2e5f;
            t.v[(n - 1) * 16 + d] *= 2e5f;
            q[d] *= 1e-5f;
        }
        expect_ok(cache, kvt_seq_create(cache, &seq));
        append_step(cache, seq, &g, &t, 0, n);
        item.seq = seq;
        args.items = &item;
        args.n_items = 1;
        args.q = kvt_tensor_f32(q);
        args.out = kvt_tensor_f32(out);
        expect_ok(cache, kvt_attend(cache, &args));
        reference_row(q, t.k, t.v, n, 1, 0, 16, 16, 0.25, 0, NULL, NULL, 0, 0, -INFINITY, expected);
        if (!(relative_l2(out, expected, 16) < 0.02))
            fail_msg("%zu tokens: error %g", n, relative_l2(out, expected, 16));
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        tokens_free(&t);
        free(q);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_dim_ratio_and_length),
        cmocka_unit_test(every_ratio),
        cmocka_unit_test(large_logits),
        cmocka_unit_test(v_in_k),
        cmocka_unit_test(options_against_the_reference),
        cmocka_unit_test(nothing_visible),
        cmocka_unit_test(overflow_is_refused),
        cmocka_unit_test(overflow_of_a_whole_range_is_refused),
        cmocka_unit_test(overflow_under_a_mask_is_refused),
        cmocka_unit_test(overflow_of_a_turned_query_is_refused),
        cmocka_unit_test(dead_tokens_change_nothing),
        cmocka_unit_test(unseen_tokens_change_nothing),
        cmocka_unit_test(a_sink_above_all),
        cmocka_unit_test(alibi_from_far),
        cmocka_unit_test(same_bits_for_threads_batches_and_plans),
        cmocka_unit_test(random_batches),
        cmocka_unit_test(strides_and_dtypes),
        cmocka_unit_test(only_the_last_token_has_a_scale),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("attention", tests, NULL, NULL);
}
