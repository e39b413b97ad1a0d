/*
 * V as the first dims of K (KVT_GROUP_V_IN_K): invalid configurations, append, reading back, memory
 * use, and comparison with a cache without the flag that gets the same keys, and their first dims
 * as values, in the same operations. Its K must be the same bit for bit, and where V is stored as K
 * is, so must its attention. The accuracy of attention is in test_attention.
 */
#include "support.h"

#include <math.h>

static kvt_group_config mla(uint32_t layers, uint32_t q_heads, uint32_t kv_heads, uint32_t k_dim,
                            uint32_t v_dim, kvt_type type, uint32_t flags)
{
    kvt_group_config g = group_of(layers, q_heads, kv_heads, k_dim, v_dim, type, type);
    g.flags = flags | KVT_GROUP_V_IN_K;
    return g;
}

static kvt_status create(const kvt_group_config *g, char *text, kvt_cache **cache)
{
    kvt_config c = kvt_config_init();
    c.groups = g;
    c.n_groups = 1;
    c.max_tokens = 200;
    c.error_text = text;
    c.error_text_bytes = 256;
    text[0] = '\0';
    return kvt_cache_create(&c, cache);
}

/* ---- configurations ---- */

static void configs(void **state)
{
    const uint32_t plain = KVT_GROUP_NO_ROTATION;
    const struct {
        uint32_t k_dim, v_dim;
        kvt_type k_type, v_type;
        uint32_t flags;
        const char *fault; /* NULL: valid */
    } all[] = {
        {576, 512, KVT_TYPE_I8, KVT_TYPE_I8, 0, NULL},
        {64, 64, KVT_TYPE_I8, KVT_TYPE_I8, 0, NULL},
        {80, 16, KVT_TYPE_I8, KVT_TYPE_I8, 0, NULL},
        {1024, 1024, KVT_TYPE_F32, KVT_TYPE_F32, 0, NULL},
        {1024, 8, KVT_TYPE_F16, KVT_TYPE_F16, 0, NULL},
        {24, 8, KVT_TYPE_I8, KVT_TYPE_I8, KVT_GROUP_NO_OFFSET, NULL},
        {64, 72, KVT_TYPE_F32, KVT_TYPE_F32, 0, "v_dim is above k_dim"},
        {64, 128, KVT_TYPE_I8, KVT_TYPE_I8, 0, "v_dim is above k_dim"},
        {64, 64, KVT_TYPE_F32, KVT_TYPE_F16, 0, "v_type is not k_type"},
        {64, 64, KVT_TYPE_I8, KVT_TYPE_F32, plain, "v_type is not k_type"},
        {576, 520, KVT_TYPE_I8, KVT_TYPE_I8, 0, "rotated together"},
        {64, 32, KVT_TYPE_I8, KVT_TYPE_I8, KVT_GROUP_NO_OFFSET, "rotated together"},
        {64, 32, KVT_TYPE_I8, KVT_TYPE_I8, plain, NULL}, /* no rotation: any */
        {64, 32, KVT_TYPE_F16, KVT_TYPE_F16, 0, NULL},
    };
    (void)state;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        kvt_group_config g = mla(1, 4, 1, all[i].k_dim, all[i].v_dim, all[i].k_type, all[i].flags);
        kvt_cache *cache = NULL;
        char text[256];
        kvt_status status;
        g.v_type = all[i].v_type;
        status = create(&g, text, &cache);
        if (status != (all[i].fault ? KVT_ERR_ARG : KVT_OK) ||
            (all[i].fault && (!strstr(text, all[i].fault) || !strstr(text, "V_IN_K"))))
            fail_msg("%zu: status %d, \"%s\"", i, (int)status, text);
        kvt_cache_destroy(cache);
    }
}

/* No V is stored: the figures of both kinds of cache differ by V's (open, in i8), exactly. */
static void what_it_takes(void **state)
{
    static const double expected[] = {576 * 4, 576 * 2, 576 + 2 + 576 * 2 / 64.0};
    (void)state;
    for (int type = 0; type < 3; type++) {
        kvt_group_config g = mla(2, 16, 1, 576, 512, (kvt_type)type, 0), twin = g;
        kvt_cache *cache, *other;
        kvt_seq *a = NULL, *b = NULL;
        size_t v_bytes = 512u * 64 * (type == 0 ? 4 : 2) + (type == 2 ? 128 : 0);
        twin.flags = 0;
        cache = cache_of(&g, 200, 1, NULL);
        other = cache_of(&twin, 200, 1, NULL);
        assert_true(kvt_cache_bytes_per_token(cache) == 2 * expected[type]);
        expect_ok(cache, kvt_seq_create(cache, &a));
        expect_ok(other, kvt_seq_create(other, &b));
        expect_ok(cache, kvt_seq_begin(a, 65, NULL));
        expect_ok(other, kvt_seq_begin(b, 65, NULL));
        assert_true(kvt_seq_memory_bytes(b) - kvt_seq_memory_bytes(a) == 2 * 2 * v_bytes);
        kvt_seq_destroy(a);
        kvt_seq_destroy(b);
        kvt_cache_destroy(cache);
        kvt_cache_destroy(other);
    }
}

/* ---- append ---- */

static void v_is_refused(void **state)
{
    /* Layers 0 and 2 have V in K, layer 1 has not. */
    const uint32_t even[] = {0, 2}, odd[] = {1};
    kvt_group_config g[2] = {mla(2, 6, 3, 80, 64, KVT_TYPE_I8, 0),
                             group_of(1, 6, 3, 80, 64, KVT_TYPE_I8, KVT_TYPE_I8)};
    kvt_config c = kvt_config_init();
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    kvt_append_plan plan, before;
    kvt_tensor k, v, nothing = kvt_tensor_f32(NULL);
    rng r = {4};
    tokens t = tokens_make(&r, 10, &g[0]);
    float saved;
    (void)state;
    g[0].layers = even;
    g[1].layers = odd;
    c.groups = g;
    c.n_groups = 2;
    c.max_tokens = 100;
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_begin(seq, 10, NULL));
    k = kvt_tensor_f32(t.k);
    v = kvt_tensor_f32(t.v);
    memset(&plan, 0x5a, sizeof plan);
    memset(&before, 0x5a, sizeof before);
    for (uint32_t layer = 0; layer < 3; layer += 2) {
        expect(cache, KVT_ERR_ARG, kvt_append(seq, layer, &k, &v));
        expect_error_text(cache, "v is not NULL", "v of a layer without V");
        expect(cache, KVT_ERR_ARG, kvt_append(seq, layer, &k, &nothing));
        expect(cache, KVT_ERR_ARG, kvt_append_plan_init(&plan, seq, layer, &k, &v));
        expect_error_text(cache, "v is not NULL", "v of a layer without V");
        expect(cache, KVT_ERR_ARG, kvt_append(seq, layer, NULL, NULL));
        expect_error_text(cache, "k is NULL", "no k");
    }
    assert_memory_equal(&plan, &before, sizeof plan);
    expect(cache, KVT_ERR_ARG, kvt_append(seq, 1, &k, NULL));
    expect_error_text(cache, "v is NULL", "no v where there is one");

    /* A task a head, all of them K's; a value that is rejected, then the same layer again. */
    expect_ok(cache, kvt_append_plan_init(&plan, seq, 0, &k, NULL));
    assert_int_equal(plan.n_tasks, 3);
    saved = t.k[5 * 3 * 80 + 2 * 80 + 7];
    t.k[5 * 3 * 80 + 2 * 80 + 7] = NAN;
    expect_ok(cache, kvt_append_task(&plan, 0));
    expect_ok(cache, kvt_append_task(&plan, 1));
    expect(cache, KVT_ERR_STATE, kvt_append_finish(&plan));
    expect(cache, KVT_ERR_ARG, kvt_append_task(&plan, 3));
    expect(cache, KVT_ERR_VALUE, kvt_append_task(&plan, 2));
    expect_error_text(cache, "kv head 2: a value of K", "NaN");
    expect(cache, KVT_ERR_VALUE, kvt_append_finish(&plan));
    expect(cache, KVT_ERR_VALUE, kvt_append(seq, 2, &k, NULL));
    t.k[5 * 3 * 80 + 2 * 80 + 7] = saved;
    expect_ok(cache, kvt_append_plan_init(&plan, seq, 0, &k, NULL));
    for (size_t i = 0; i < 3; i++)
        expect_ok(cache, kvt_append_task(&plan, i));
    expect_ok(cache, kvt_append_finish(&plan));
    expect_ok(cache, kvt_append(seq, 1, &k, &v));
    expect(cache, KVT_ERR_STATE, kvt_seq_commit(seq, NULL));
    expect_ok(cache, kvt_append(seq, 2, &k, NULL));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    tokens_free(&t);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* ---- reading back ---- */

typedef struct visit {
    const float *k; /* [tokens][kv heads][k_dim], as kvt_read has them */
    const kvt_group_config *g;
    uint64_t seen;
} visit;

static int check_visit(void *user, const kvt_token_view *token)
{
    visit *x = user;
    size_t heads = x->g->n_kv_heads, k_dim = x->g->k_dim, v_dim = x->g->v_dim;
    const float *k = x->k + token->index * heads * k_dim;
    assert_memory_equal(token->k, k, heads * k_dim * sizeof *k);
    for (size_t h = 0; h < heads; h++)
        assert_memory_equal(token->v + h * v_dim, k + h * k_dim, v_dim * sizeof *k);
    x->seen++;
    return 0;
}

/* V reads as K's first dims, in every dtype, pending tokens included. */
static void v_reads_as_k(void **state)
{
    enum { N = 100, HEADS = 2 };
    const uint32_t dims[][2] = {{80, 64}, {72, 72}, {48, 16}, {576, 512}};
    (void)state;
    for (int type = 0; type < 3; type++)
        for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
            for (uint32_t flags = 0; flags < (type == 2 ? 4 : 1); flags++) {
                size_t k_dim = dims[i][0], v_dim = dims[i][1];
                kvt_group_config g =
                    mla(1, HEADS, HEADS, dims[i][0], dims[i][1], (kvt_type)type, flags);
                kvt_cache *cache = cache_of(&g, N, 1, NULL);
                kvt_seq *seq = NULL;
                rng r = {9};
                tokens t = tokens_make(&r, N, &g);
                kvt_tensor pending = kvt_tensor_f32(t.k + (size_t)(N - 10) * HEADS * k_dim);
                float *k = malloc(N * HEADS * k_dim * 4), *v = malloc(N * HEADS * v_dim * 4);
                kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
                visit seen = {k, &g, 0};
                assert_non_null(k);
                assert_non_null(v);
                expect_ok(cache, kvt_seq_create(cache, &seq));
                append_all(cache, seq, &g, &t, 0, N - 10, 33);
                expect_ok(cache, kvt_seq_begin(seq, 10, NULL));
                expect_ok(cache, kvt_append(seq, 0, &pending, NULL));
                for (int dtype = KVT_F32; dtype <= KVT_BF16; dtype++) {
                    size_t element = dtype == KVT_F32 ? 4 : 2;
                    kt.dtype = vt.dtype = (kvt_dtype)dtype;
                    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, N, &kt));
                    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_V, 0, N, &vt));
                    for (size_t row = 0; row < N * HEADS; row++)
                        assert_memory_equal((char *)v + row * v_dim * element,
                                            (char *)k + row * k_dim * element, v_dim * element);
                }
                kt.dtype = KVT_F32;
                expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, N, &kt));
                if (type == 0)
                    assert_memory_equal(k, t.k, N * HEADS * k_dim * 4);
                expect_ok(cache, kvt_visit(seq, 0, 0, N, check_visit, &seen, NULL));
                assert_true(seen.seen == N);
                free(k);
                free(v);
                tokens_free(&t);
                kvt_seq_destroy(seq);
                kvt_cache_destroy(cache);
            }
}

/* ---- the twin ---- */

static void attend(kvt_cache *cache, const kvt_seq *seq, const float *q, size_t n_q, uint32_t flags,
                   float *out, float *lse)
{
    kvt_attend_item item = {.seq = seq, .n_queries = n_q};
    kvt_attend_args args = kvt_attend_args_init();
    args.flags = flags | (n_q > 1 ? KVT_ATTEND_CAUSAL : 0);
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.lse = lse;
    expect_ok(cache, kvt_attend(cache, &args));
}

/* Both caches through the same operations. same: V is stored as K is, so attention is the same. */
static void live(const kvt_group_config *g, const char *isa, int same, uint64_t seed)
{
    enum { MAX = 300 };
    const size_t operations = is_quick() ? 10 : 40;
    kvt_group_config plain = *g;
    kvt_cache *caches[2];
    kvt_seq *seqs[2] = {NULL, NULL};
    rng r = {seed};
    tokens t = tokens_make(&r, MAX, g);
    size_t k_row = (size_t)g->n_kv_heads * g->k_dim, v_row = (size_t)g->n_kv_heads * g->v_dim;
    size_t n_out = (size_t)8 * g->n_q_heads * g->v_dim, n_lse = (size_t)8 * g->n_q_heads;
    float *q = rng_normals(&r, (size_t)8 * g->n_q_heads * g->k_dim);
    float *x[2] = {malloc(MAX * k_row * 4), malloc(MAX * k_row * 4)};
    float *out[2] = {malloc(n_out * 4), malloc(n_out * 4)};
    float *lse[2] = {malloc(n_lse * 4), malloc(n_lse * 4)};
    uint32_t attended = 0;

    plain.flags &= ~KVT_GROUP_V_IN_K;
    plain.flags |= KVT_GROUP_NO_V_ROTATION; /* as K, where it is not rotated */
    for (int i = 0; i < 2; i++) {
        assert_non_null(x[i]);
        assert_non_null(out[i]);
        assert_non_null(lse[i]);
        caches[i] = cache_of(i ? &plain : g, MAX, 1, isa);
        expect_ok(caches[i], kvt_seq_create(caches[i], &seqs[i]));
    }
    for (size_t operation = 0; operation < operations; operation++) {
        size_t length = (size_t)kvt_seq_length(seqs[0]), n = 1 + rng_below(&r, 90), kept, n_q;
        uint32_t flags = (const uint32_t[]){0, KVT_ATTEND_F32, KVT_ATTEND_FAST}[operation % 3];
        n = length + n > MAX ? MAX - length : n;
        kept = rng_below(&r, (uint32_t)length + 1);
        switch (rng_below(&r, 6)) {
        case 0:
            for (int i = 0; i < 2; i++)
                expect_ok(caches[i], kvt_seq_truncate(seqs[i], kept));
            break;
        case 1: /* an aborted step leaves other bytes in dead slots */
            for (int i = 0; i < 2 && n; i++) {
                kvt_tensor k = kvt_tensor_f32(t.k + (MAX - n) * k_row);
                kvt_tensor v = kvt_tensor_f32(t.v + (MAX - n) * v_row);
                expect_ok(caches[i], kvt_seq_begin(seqs[i], n, NULL));
                expect_ok(caches[i], kvt_append(seqs[i], 0, &k, i ? &v : NULL));
                expect_ok(caches[i], kvt_seq_abort(seqs[i]));
            }
            break;
        default:
            for (int i = 0; i < 2 && n; i++)
                append_step(caches[i], seqs[i], i ? &plain : g, &t, length, n);
        }
        length = (size_t)kvt_seq_length(seqs[0]);
        for (int i = 0; i < 2; i++) {
            kvt_tensor view = kvt_tensor_f32(x[i]);
            expect_ok(caches[i], kvt_read(seqs[i], 0, KVT_SIDE_K, 0, length, &view));
        }
        assert_memory_equal(x[0], x[1], length * k_row * 4);
        n_q = length < 8 ? length : 1 + rng_below(&r, 8);
        if (!n_q)
            continue;
        for (int i = 0; i < 2; i++)
            attend(caches[i], seqs[i], q, n_q, flags, out[i], lse[i]);
        assert_memory_equal(lse[0], lse[1], n_q * g->n_q_heads * 4);
        if (same && memcmp(out[0], out[1], n_q * g->n_q_heads * g->v_dim * 4) != 0)
            fail_msg("isa %s type %d dims %u/%u flags %u: attention differs from the twin's", isa,
                     (int)g->k_type, g->k_dim, g->v_dim, (unsigned)g->flags);
        attended++;
    }
    assert_true(attended > 3);
    for (int i = 0; i < 2; i++) {
        free(x[i]);
        free(out[i]);
        free(lse[i]);
        kvt_seq_destroy(seqs[i]);
        kvt_cache_destroy(caches[i]);
    }
    free(q);
    tokens_free(&t);
}

static void the_twin(void **state)
{
    const uint32_t plain = KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET;
    uint64_t seed = 1;
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++) {
        const char *name = kvt_isa_name(isa);
        for (int type = 0; type < 2; type++) {
            kvt_group_config g = mla(1, 16, 1, 576, 512, (kvt_type)type, 0);
            live(&g, name, 1, seed++);
            g = mla(1, 4, 2, 24, 8, (kvt_type)type, 0);
            live(&g, name, 1, seed++);
        }
        /*
         * i8: as long as blocks are open, V equals K if it is all of K and has no offset. Sealed,
         * its codes are rounded in another way.
         */
        kvt_group_config g = mla(1, 40, 1, 72, 72, KVT_TYPE_I8, plain);
        g.residual_tokens = 1000;
        live(&g, name, 1, seed++);
        g.residual_tokens = 0;
        live(&g, name, 0, seed++);
        for (uint32_t flags = 0; flags < 4; flags++) {
            g = mla(1, 6, 2, 80, 64, KVT_TYPE_I8, flags);
            live(&g, name, 0, seed++);
        }
    }
}

/* ---- prefill ---- */

/*
 * Causal queries over their own tokens, in every mode, against double over kvt_read's values; and
 * the last queries alone: the same bits, whatever other rows share the transposed block.
 */
static void prefill(void **state)
{
    enum { N = 70, HEADS = 16, K = 576, V = 512, LAST = 3 };
    static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    static const double bounds[] = {4e-4, 2e-5, 0.05};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int type = 0; type < 3; type++) {
            kvt_group_config g = mla(1, HEADS, 1, K, V, (kvt_type)type, 0);
            kvt_cache *cache = cache_of(&g, N, 1, kvt_isa_name(isa));
            kvt_seq *seq = NULL;
            rng r = {21};
            tokens t = tokens_make(&r, N, &g);
            float *q = rng_normals(&r, (size_t)N * HEADS * K), lse[N * HEADS];
            float *k = malloc((size_t)N * K * sizeof *k);
            float *out = malloc((size_t)N * HEADS * V * sizeof *out);
            float *alone = malloc((size_t)LAST * HEADS * V * sizeof *alone);
            kvt_tensor view = kvt_tensor_f32(k);
            double expected[V];
            assert_non_null(k);
            assert_non_null(out);
            assert_non_null(alone);
            for (size_t i = 0; i < (size_t)N * K; i++)
                t.k[i] += i % K % 11 == 0 ? 5.0f : 0.0f;
            expect_ok(cache, kvt_seq_create(cache, &seq));
            append_step(cache, seq, &g, &t, 0, N);
            expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, N, &view));
            for (size_t mode = 0; mode < 3; mode++) {
                double worst = 0;
                attend(cache, seq, q, N, modes[mode], out, lse);
                for (size_t row = 0; row < N * HEADS; row += is_quick() ? 37 : 5) {
                    float v[N * V];
                    double error;
                    for (size_t i = 0; i < N; i++)
                        memcpy(v + i * V, k + i * K, V * sizeof *v);
                    reference_row(q + row * K, k, v, row / HEADS + 1, 1, 0, K, V,
                                  1 / (double)sqrtf(K), 0, NULL, NULL, 0, 0, -INFINITY, expected);
                    error = relative_l2(out + row * V, expected, V);
                    worst = error > worst ? error : worst;
                }
                if (!(worst < (type == KVT_TYPE_I8 ? bounds[mode] : bounds[1])))
                    fail_msg("isa %s type %d mode %zu: error %g", kvt_isa_name(isa), type, mode,
                             worst);
                attend(cache, seq, q + (size_t)(N - LAST) * HEADS * K, LAST, modes[mode], alone,
                       lse);
                assert_memory_equal(alone, out + (size_t)(N - LAST) * HEADS * V,
                                    (size_t)LAST * HEADS * V * sizeof *alone);
            }
            free(q);
            free(k);
            free(out);
            free(alone);
            tokens_free(&t);
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

/* ---- nothing visible, and the edge of f32 ---- */

/* +0, not -0, also after the inverse rotation. */
static void nothing_visible(void **state)
{
    kvt_group_config g = mla(1, 2, 1, 64, 64, KVT_TYPE_I8, 0);
    kvt_cache *cache = cache_of(&g, 64, 1, NULL);
    kvt_seq *seq = NULL;
    float q[128], out[128], lse[2], zeros[128] = {0};
    (void)state;
    for (int i = 0; i < 128; i++)
        q[i] = out[i] = 1;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    attend(cache, seq, q, 1, 0, out, lse);
    assert_memory_equal(out, zeros, sizeof out);
    assert_true(lse[0] == -INFINITY && lse[1] == -INFINITY);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* The largest keys that i8 stores: sums and the inverse rotation must not overflow f32. */
static void large_values(void **state)
{
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (uint32_t flags = 0; flags < 4; flags++) {
            enum { N = 130, DIM = 64 };
            kvt_group_config g = mla(1, 2, 1, DIM, DIM, KVT_TYPE_I8, flags);
            kvt_cache *cache = cache_of(&g, N, 1, kvt_isa_name(isa));
            kvt_seq *seq = NULL;
            rng r = {flags};
            tokens t = tokens_make(&r, N, &g);
            float *q = rng_normals(&r, 2 * DIM), out[2 * DIM], lse[2], k[N * DIM];
            double expected[DIM];
            kvt_tensor view = kvt_tensor_f32(k);
            for (size_t i = 0; i < N * DIM; i++)
                t.k[i] = t.k[i] < 0 ? -1e5f : 1e5f;
            for (size_t i = 0; i < 2 * DIM; i++)
                q[i] *= 1e-6f;
            expect_ok(cache, kvt_seq_create(cache, &seq));
            append_all(cache, seq, &g, &t, 0, N, 70);
            attend(cache, seq, q, 1, KVT_ATTEND_F32, out, lse);
            expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, N, &view));
            for (size_t h = 0; h < 2; h++) {
                reference_row(q + h * DIM, k, k, N, 1, 0, DIM, DIM, 0.125, 0, NULL, NULL, 0, 0,
                              -INFINITY, expected);
                assert_true(relative_l2(out + h * DIM, expected, DIM) < 1e-5);
            }
            free(q);
            tokens_free(&t);
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(configs),      cmocka_unit_test(what_it_takes),
        cmocka_unit_test(v_is_refused), cmocka_unit_test(v_reads_as_k),
        cmocka_unit_test(the_twin),     cmocka_unit_test(nothing_visible),
        cmocka_unit_test(prefill),      cmocka_unit_test(large_values),
    };
    return cmocka_run_group_tests_name("v_in_k", tests, NULL, NULL);
}
