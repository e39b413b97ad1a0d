/*
 * Tokens taken out of the middle: what is left is attended over at its new positions, exactly,
 * however often it has moved; nobody else notices; and what cannot be done is refused.
 */
#include "subject.h"

#include <fenv.h>
#include <math.h>
#include <stdio.h>

enum { PAIRS_MOST = 64 };

/* ---- RoPE in double ---- */

static void fill_frequencies(float *frequencies, uint32_t dims)
{
    for (uint32_t i = 0; i < dims / 2; i++)
        frequencies[i] = (float)pow(10000.0, -2.0 * i / dims);
}

/* Turn x[k_dim] by `by` positions, as the group's RoPE is described. */
static void turn(const kvt_group_config *g, const float *frequencies, double by, double *x)
{
    for (uint32_t i = 0; i < g->rope_dims / 2; i++) {
        size_t a = g->rope_first_dim + (g->rope_pairing == KVT_ROPE_HALVES ? i : 2 * (size_t)i);
        size_t b = a + (g->rope_pairing == KVT_ROPE_HALVES ? g->rope_dims / 2 : 1);
        double angle = by * (double)frequencies[i], c = cos(angle), s = sin(angle);
        double xa = x[a] * c - x[b] * s, xb = x[a] * s + x[b] * c;
        x[a] = xa;
        x[b] = xb;
    }
}

/* ---- a conversation ---- */

/* What the test knows of each token: its key and value as stored, and where they stood. */
typedef struct record {
    float *k, *v; /* [kv_heads][dim] as kvt_read gave them */
    int32_t stored_at, position;
} record;

typedef struct conversation {
    kvt_group_config g;
    float frequencies[PAIRS_MOST];
    kvt_cache *cache;
    kvt_seq *seq;
    record *records; /* [most] */
    size_t n, most;
    float bias; /* of dim 9 of all keys: beyond what a gain of 4-bit K multiplies */
    rng r;
} conversation;

static void open_conversation(conversation *c, const kvt_group_config *g, size_t most,
                              uint64_t seed)
{
    memset(c, 0, sizeof *c);
    c->g = *g;
    c->most = most;
    c->r.state = seed;
    fill_frequencies(c->frequencies, g->rope_dims ? g->rope_dims : 2);
    if (g->rope_dims)
        c->g.rope_inverse_frequencies = c->frequencies;
    c->cache = cache_of(&c->g, most, 1, NULL);
    expect_ok(c->cache, kvt_seq_create(c->cache, &c->seq));
    c->records = calloc(most, sizeof *c->records);
}

static void close_conversation(conversation *c)
{
    kvt_seq_destroy(c->seq);
    kvt_cache_destroy(c->cache);
    for (size_t i = 0; i < c->n; i++) {
        free(c->records[i].k);
        free(c->records[i].v);
    }
    free(c->records);
}

/* Read back what is stored: sealing changes it. */
static void read_records(conversation *c)
{
    for (size_t i = 0; i < c->n; i++) {
        kvt_tensor k = kvt_tensor_f32(c->records[i].k), v = kvt_tensor_f32(c->records[i].v);
        expect_ok(c->cache, kvt_read(c->seq, 0, KVT_SIDE_K, i, 1, &k));
        expect_ok(c->cache, kvt_read(c->seq, 0, KVT_SIDE_V, i, 1, &v));
    }
}

static void say(conversation *c, size_t n)
{
    size_t k_width = (size_t)c->g.n_kv_heads * c->g.k_dim;
    size_t v_width = (size_t)c->g.n_kv_heads * c->g.v_dim;
    float *k = rng_normals(&c->r, n * k_width), *v = rng_normals(&c->r, n * v_width);
    kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
    int32_t next = kvt_seq_next_position(c->seq);
    for (size_t i = 0; i < n * k_width; i++)
        k[i] += (float)(i % c->g.k_dim % 5) + (i % c->g.k_dim == 9 ? c->bias : 0); /* a bias */
    expect_ok(c->cache, kvt_seq_begin(c->seq, n, NULL));
    expect_ok(c->cache, kvt_append(c->seq, 0, &kt, c->g.flags & KVT_GROUP_V_IN_K ? NULL : &vt));
    expect_ok(c->cache, kvt_seq_commit(c->seq, NULL));
    for (size_t i = 0; i < n; i++) {
        record *t = &c->records[c->n++];
        t->k = malloc(k_width * sizeof *t->k);
        t->v = malloc(v_width * sizeof *t->v);
        t->stored_at = t->position = next + (int32_t)i;
    }
    free(k);
    free(v);
}

/* The same in the test's list. */
static void forget(conversation *c, size_t first, size_t n)
{
    int32_t delta = c->g.rope_pairing != KVT_ROPE_UNKNOWN
                        ? c->records[first + n].position - c->records[first].position
                        : 0;
    for (size_t i = first; i < first + n; i++) {
        free(c->records[i].k);
        free(c->records[i].v);
    }
    memmove(c->records + first, c->records + first + n, (c->n - first - n) * sizeof *c->records);
    c->n -= n;
    for (size_t i = first; i < c->n; i++)
        c->records[i].position -= delta;
}

static void take_out(conversation *c, size_t first, size_t n)
{
    int32_t *positions;
    expect_ok(c->cache, kvt_seq_remove(c->seq, first, n));
    forget(c, first, n);
    assert_true(kvt_seq_length(c->seq) == c->n);
    positions = malloc(c->n * sizeof *positions);
    expect_ok(c->cache, kvt_seq_positions(c->seq, 0, c->n, positions));
    for (size_t i = 0; i < c->n; i++)
        assert_int_equal(positions[i], c->records[i].position);
    free(positions);
    assert_int_equal(kvt_seq_next_position(c->seq), c->records[c->n - 1].position + 1);
}

/* Relative L2 distance of attention's output from that in double at the tokens' new positions. */
static double error_of(conversation *c, uint32_t flags, size_t n_queries)
{
    const kvt_group_config *g = &c->g;
    size_t group = g->n_q_heads / g->n_kv_heads, n_out = n_queries * g->n_q_heads * g->v_dim;
    float *q = rng_normals(&c->r, n_queries * g->n_q_heads * g->k_dim);
    float *out = malloc(n_out * sizeof *out);
    double *expected = malloc(n_out * sizeof *expected), *row = malloc(g->v_dim * sizeof *row);
    float *moved = malloc(c->n * g->n_kv_heads * g->k_dim * sizeof *moved);
    kvt_attend_item item = {.seq = c->seq, .n_queries = n_queries};
    kvt_attend_args args = kvt_attend_args_init();
    double error;

    read_records(c);
    for (size_t i = 0; i < c->n; i++)
        for (size_t h = 0; h < g->n_kv_heads; h++) {
            double x[1024];
            for (size_t d = 0; d < g->k_dim; d++)
                x[d] = (double)c->records[i].k[h * g->k_dim + d];
            turn(g, c->frequencies,
                 (double)c->records[i].position - (double)c->records[i].stored_at, x);
            for (size_t d = 0; d < g->k_dim; d++)
                moved[(i * g->n_kv_heads + h) * g->k_dim + d] = (float)x[d];
        }
    args.items = &item;
    args.n_items = 1;
    args.flags = flags | KVT_ATTEND_CAUSAL;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    expect_ok(c->cache, kvt_attend(c->cache, &args));
    {
        float *values = malloc(c->n * g->n_kv_heads * g->v_dim * sizeof *values);
        for (size_t i = 0; i < c->n; i++)
            memcpy(values + i * g->n_kv_heads * g->v_dim, c->records[i].v,
                   g->n_kv_heads * g->v_dim * sizeof *values);
        for (size_t i = 0; i < n_queries; i++)
            for (size_t h = 0; h < g->n_q_heads; h++) {
                reference_row(q + (i * g->n_q_heads + h) * g->k_dim, moved, values,
                              c->n - (n_queries - 1 - i), g->n_kv_heads, h / group, g->k_dim,
                              g->v_dim, 1 / sqrt((double)g->k_dim), 0, NULL, NULL, 0, 0, -INFINITY,
                              row);
                memcpy(expected + (i * g->n_q_heads + h) * g->v_dim, row, g->v_dim * sizeof *row);
            }
        free(values);
    }
    error = relative_l2(out, expected, n_out);
    free(q), free(out), free(expected), free(row), free(moved);
    return error;
}

static kvt_group_config roped(uint32_t q_heads, uint32_t kv_heads, uint32_t k_dim, kvt_type type,
                              kvt_rope pairing, uint32_t first_dim, uint32_t dims)
{
    kvt_group_config g = group_of(1, q_heads, kv_heads, k_dim, k_dim, type, type);
    g.rope_pairing = pairing;
    g.rope_first_dim = first_dim;
    g.rope_dims = dims;
    return g;
}

/* ---- tests ---- */

/* The bar: 512 of 8192 tokens. */
static void outputs_are_those_at_the_new_positions(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4};
    size_t n = is_quick() ? 1024 : 8192;
    double worst = 0;
    (void)state;
    for (int i = 0; i < 8; i++) {
        kvt_group_config g =
            roped(2, 1, 64, types[i % 4], i < 4 ? KVT_ROPE_HALVES : KVT_ROPE_NEIGHBOURS, 0, 64);
        conversation c;
        double error;
        open_conversation(&c, &g, n, (uint64_t)i + 1);
        c.bias = types[i % 4] == KVT_TYPE_I4 ? 30 : 0;
        say(&c, n - 7);
        take_out(&c, 64, 512);
        error = error_of(&c, KVT_ATTEND_F32, 3);
        worst = error > worst ? error : worst;
        say(&c, 40); /* behind keys that have moved, in their block too */
        error = error_of(&c, KVT_ATTEND_F32, 45);
        worst = error > worst ? error : worst;
        say(&c, 200); /* that block is sealed */
        error = error_of(&c, KVT_ATTEND_F32, 3);
        worst = error > worst ? error : worst;
        /* Near-exact adds what it always does. */
        assert_true(error_of(&c, 0, 3) < (types[i % 4] == KVT_TYPE_I4 ? 2e-2 : 1e-3));
        assert_true(error_of(&c, KVT_ATTEND_FAST, 3) < 2e-2);
        close_conversation(&c);
    }
    printf("512 of %zu tokens taken out: relative L2 %.2g at most\n", n, worst);
    assert_true(worst < 1e-5);
}

/* A conversation that forgets its oldest turns a thousand times. */
static void a_thousand_shifts_are_as_one(void **state)
{
    const int shifts = is_quick() ? 60 : 1000;
    double first = 0, last = 0;
    (void)state;
    for (int i = 0; i < 2; i++) {
        kvt_group_config g =
            roped(2, 1, 32, i ? KVT_TYPE_I8 : KVT_TYPE_F32, KVT_ROPE_HALVES, 0, 32);
        conversation c;
        open_conversation(&c, &g, 2048, 77);
        say(&c, 600);
        for (int j = 1; j <= shifts; j++) {
            double error;
            if (c.n > 1024)
                take_out(&c, 64, 64 * (1 + rng_below(&c.r, 4)));
            else
                take_out(&c, 64, 64);
            say(&c, 10 + rng_below(&c.r, 120)); /* more than 64 on average */
            if (j != 1 && j != shifts && j % 97)
                continue;
            error = error_of(&c, KVT_ATTEND_F32, 2);
            assert_true(error < 1e-5);
            *(j == 1 ? &first : &last) = error;
        }
        close_conversation(&c);
    }
    printf("after one shift %.2g, after %d %.2g\n", first, shifts, last);
}

/* Part of the dims, several kv heads, V in K, and no rotation at all. */
static void rope_of_all_shapes(void **state)
{
    (void)state;
    for (int i = 0; i < 12; i++) {
        kvt_group_config g = i % 4 == 0   ? roped(4, 2, 40, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 16)
                             : i % 4 == 1 ? roped(4, 2, 48, KVT_TYPE_I8, KVT_ROPE_NEIGHBOURS, 8, 32)
                             : i % 4 == 2
                                 ? roped(8, 1, 96, KVT_TYPE_I8, KVT_ROPE_NEIGHBOURS, 64, 32)
                                 : roped(2, 1, 16, KVT_TYPE_F16, KVT_ROPE_NONE, 0, 0);
        conversation c;
        if (i % 4 == 2) {
            g.flags |= KVT_GROUP_V_IN_K;
            g.v_dim = 64;
        }
        open_conversation(&c, &g, 1500, 100 + (uint64_t)i);
        say(&c, 500 + (size_t)i * 3);
        take_out(&c, i % 3 ? 64 : 0, 128);
        say(&c, 70);
        take_out(&c, 128, 64);
        say(&c, 20);
        if (!(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5))
            fail_msg("shape %d: %g", i, error_of(&c, KVT_ATTEND_F32, 2));
        close_conversation(&c);
    }
}

/* Positions that go back make others move up: not beyond the largest one; nothing has changed. */
static void positions_end(void **state)
{
    kvt_group_config g = group_of(1, 2, 1, 32, 32, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_cache *cache;
    float k[64 * 32] = {0};
    kvt_tensor t = kvt_tensor_f32(k);
    (void)state;
    g.rope_pairing = KVT_ROPE_NONE;
    cache = cache_of(&g, 200, 1, NULL);
    for (int by_next = 0; by_next < 2; by_next++) {
        kvt_seq *seq = NULL;
        int32_t positions[64], got[129];
        expect_ok(cache, kvt_seq_create(cache, &seq));
        for (int step = 0; step < 3; step++) {
            const size_t n = step == 2 ? 1 : 64;
            for (int i = 0; i < 64; i++)
                positions[i] = step == 0 ? 1000 + i : step == 1 ? i : by_next ? 64 : INT32_MAX;
            expect_ok(cache, kvt_seq_begin(seq, n, positions));
            expect_ok(cache, kvt_append(seq, 0, &t, &t));
            expect_ok(cache, kvt_seq_commit(seq, NULL));
        }
        if (by_next)
            expect_ok(cache, kvt_seq_set_next_position(seq, INT32_MAX));
        expect(cache, KVT_ERR_STATE, kvt_seq_remove(seq, 0, 64));
        expect_error_text(cache, by_next ? "the next position" : "token 128 would move", "an end");
        expect_ok(cache, kvt_seq_positions(seq, 0, 129, got));
        assert_int_equal(got[0], 1000);
        assert_int_equal(got[64], 0);
        assert_int_equal(got[128], by_next ? 64 : INT32_MAX);
        kvt_seq_destroy(seq);
    }
    kvt_cache_destroy(cache);
}

/* Without a description positions stay, with a gap. */
static void positions_stay_without_a_description(void **state)
{
    kvt_group_config g = group_of(1, 2, 1, 32, 32, KVT_TYPE_I8, KVT_TYPE_I8);
    conversation c;
    (void)state;
    open_conversation(&c, &g, 1000, 5);
    say(&c, 500);
    take_out(&c, 128, 64);
    say(&c, 3);
    assert_int_equal(kvt_seq_next_position(c.seq), 503);
    assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
    close_conversation(&c);
}

/*
 * Single tokens among the open ones, and anywhere where nothing is sealed: the file is that of a
 * sequence that has never had them.
 */
static void single_tokens_leave_no_trace(void **state)
{
    rng r = {41};
    (void)state;
    for (int i = 0; i < (is_quick() ? 40 : 400); i++) {
        static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_F16, KVT_TYPE_F32, KVT_TYPE_I8};
        kvt_group_config g[2];
        size_t n = 70 + rng_below(&r, 300), first, gone, open;
        kvt_seq *seq, *copy = NULL, *straight;
        subject s;
        g[0] = group_of(2, 2, 1 + rng_below(&r, 2), 16, 24, types[i % 4], types[i / 4 % 4]);
        g[1] = group_of(1, 2, 1, 40, 8, KVT_TYPE_F16, KVT_TYPE_F16);
        if (rng_below(&r, 3) == 0 && g[0].k_type == g[0].v_type) {
            g[0].flags |= KVT_GROUP_V_IN_K;
            g[0].v_dim = 16;
        }
        open = g[0].k_type == KVT_TYPE_I8 || g[0].v_type == KVT_TYPE_I8
                   ? (n > 64 ? (n - 64) / 64 * 64 : 0)
                   : 0;
        if (open == 0 && g[0].k_type == KVT_TYPE_I8)
            open = 64, n = n < 200 ? 127 : n; /* rows 0 and 1 have other offsets */
        first = open + rng_below(&r, (uint32_t)(n - 1 - open));
        gone = 1 + rng_below(&r, (uint32_t)(n - 1 - first));
        if (open && n >= 128 && gone > n % 64) /* at the shorter length less would be sealed */
            gone = n % 64;
        if (gone == 0)
            continue;
        open_subject(&s, g, 2, &r);
        open_cache(&s, NULL);
        seq = seq_of(&s);
        while (kvt_seq_length(seq) < n) { /* in steps, so that nothing younger is sealed */
            size_t step = 1 + rng_below(&r, 20), left = n - (size_t)kvt_seq_length(seq);
            grow(&s, seq, step < left ? step : left);
        }
        if (rng_below(&r, 2))
            expect_ok(s.cache, kvt_seq_fork(seq, n, &copy));
        expect_ok(s.cache, kvt_seq_remove(seq, first, gone));
        straight = seq_of(&s);
        if (first)
            grow(&s, straight, first);
        expect_ok(s.cache, kvt_seq_set_next_position(straight, (int32_t)(first + gone)));
        step_of(&s, straight, first + gone, n - first - gone);
        expect_equal(&s, seq, straight, "single tokens", (size_t)i);
        step_of(&s, seq, n, 90);
        step_of(&s, straight, n, 90);
        expect_equal(&s, seq, straight, "single tokens, and more", (size_t)i);
        kvt_seq_destroy(straight);
        if (copy) {
            straight = seq_of(&s);
            grow(&s, straight, n);
            expect_equal(&s, copy, straight, "a fork of it", (size_t)i);
            kvt_seq_destroy(copy);
            kvt_seq_destroy(straight);
        }
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* The same with positions that move: keys of one block by different shifts. */
static void single_tokens_move(void **state)
{
    (void)state;
    for (int i = 0; i < 30; i++) {
        kvt_group_config g = roped(4, 2, 32, i % 3 ? KVT_TYPE_I8 : KVT_TYPE_F16,
                                   i % 2 ? KVT_ROPE_HALVES : KVT_ROPE_NEIGHBOURS, 0, 32);
        conversation c;
        open_conversation(&c, &g, 1500, 300 + (uint64_t)i);
        say(&c, 300 + 11 * (size_t)i);
        for (int j = 0; j < 5; j++) {
            size_t open = c.n - 64 - rng_below(&c.r, 1);
            size_t first = open + rng_below(&c.r, 50), n = 1 + rng_below(&c.r, 10);
            take_out(&c, first, n);
            assert_true(error_of(&c, KVT_ATTEND_F32, 3) < 1e-5);
            assert_true(error_of(&c, 0, 1) < 1e-3);
            say(&c, 1 + rng_below(&c.r, 30));
            if (j == 2)
                take_out(&c, 64, 64);
            assert_true(error_of(&c, KVT_ATTEND_F32, 3) < 1e-5);
        }
        say(&c, 200); /* what was moved singly is sealed now */
        assert_true(error_of(&c, KVT_ATTEND_F32, 3) < 1e-5);
        close_conversation(&c);
    }
}

/* Positions move by what they stood apart, and a next position with them. */
static void gaps_are_closed(void **state)
{
    kvt_group_config g = roped(1, 1, 16, KVT_TYPE_F32, KVT_ROPE_HALVES, 0, 16);
    int32_t got[4];
    conversation c;
    (void)state;
    open_conversation(&c, &g, 1000, 6);
    say(&c, 64);
    expect_ok(c.cache, kvt_seq_set_next_position(c.seq, 1000));
    say(&c, 64);
    expect_ok(c.cache, kvt_seq_set_next_position(c.seq, 3000));
    say(&c, 64);
    expect_ok(c.cache, kvt_seq_set_next_position(c.seq, 9000));
    expect_ok(c.cache, kvt_seq_remove(c.seq, 64, 64));
    forget(&c, 64, 64);
    expect_ok(c.cache, kvt_seq_positions(c.seq, 63, 2, got));
    assert_true(got[0] == 63 && got[1] == 1000);
    assert_int_equal(kvt_seq_next_position(c.seq), 7000);
    assert_true(error_of(&c, KVT_ATTEND_F32, 1) < 1e-5);
    close_conversation(&c);
}

/* The last tokens: a truncate. All of them: an empty sequence. */
static void the_end_is_a_truncate(void **state)
{
    kvt_group_config g = roped(1, 1, 16, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 16);
    conversation c;
    (void)state;
    open_conversation(&c, &g, 1000, 7);
    say(&c, 300);
    expect_ok(c.cache, kvt_seq_remove(c.seq, 290, 10));
    assert_true(kvt_seq_length(c.seq) == 290);
    expect_ok(c.cache, kvt_seq_remove(c.seq, 0, 290));
    assert_true(kvt_seq_length(c.seq) == 0 && kvt_seq_next_position(c.seq) == 0);
    close_conversation(&c);
}

static uint64_t outputs_hash(const conversation *c, const kvt_seq *seq)
{
    float q[64], out[64];
    kvt_attend_item item = {.seq = seq, .n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    for (size_t i = 0; i < 64; i++)
        q[i] = (float)(i % 9) * 0.1f;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    expect_ok(c->cache, kvt_attend(c->cache, &args));
    return mix(kvt_seq_length(seq), out, c->g.n_q_heads * c->g.v_dim * sizeof *out);
}

/* Forks keep what they share; a fork of a sequence that has moved goes on like it. */
static void forks_do_not_notice(void **state)
{
    (void)state;
    for (int i = 0; i < 8; i++) {
        kvt_group_config g =
            roped(2, 1, 32, i % 2 ? KVT_TYPE_I8 : KVT_TYPE_F16, KVT_ROPE_NEIGHBOURS, 0, 32);
        conversation c;
        kvt_seq *copy = NULL, *late = NULL;
        int32_t positions[600];
        uint64_t before, after;
        open_conversation(&c, &g, 1500, 200 + (uint64_t)i);
        say(&c, 450 + (size_t)i * 10);
        expect_ok(c.cache, kvt_seq_fork(c.seq, c.n, &copy));
        before = outputs_hash(&c, copy);
        take_out(&c, 64, 192);
        assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
        assert_true(outputs_hash(&c, copy) == before);
        expect_ok(c.cache, kvt_seq_positions(copy, 0, 450, positions));
        for (int32_t j = 0; j < 450; j++)
            assert_int_equal(positions[j], j);
        after = outputs_hash(&c, c.seq);
        expect_ok(c.cache, kvt_seq_fork(c.seq, c.n, &late));
        assert_true(outputs_hash(&c, late) == after);
        say(&c, 90);
        take_out(&c, 64, 64);
        assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
        assert_true(outputs_hash(&c, copy) == before);
        assert_true(outputs_hash(&c, late) == after);
        kvt_seq_destroy(copy);
        assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
        assert_true(outputs_hash(&c, late) == after);
        kvt_seq_destroy(late);
        close_conversation(&c);
    }
}

static void free_last(conversation *c)
{
    c->n--;
    free(c->records[c->n].k);
    free(c->records[c->n].v);
}

static void drop_last(conversation *c, size_t n)
{
    expect_ok(c->cache, kvt_seq_truncate(c->seq, c->n - n));
    while (n-- > 0)
        free_last(c);
}

/* Drafts behind moved keys leave no trace; a clear leaves none of the shifts. */
static void drafts_leave_no_trace(void **state)
{
    kvt_group_config g = roped(2, 1, 32, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 32);
    conversation c;
    uint64_t before, empty;
    (void)state;
    open_conversation(&c, &g, 1500, 9);
    empty = kvt_seq_memory_bytes(c.seq);
    say(&c, 480);
    take_out(&c, 64, 128);
    before = outputs_hash(&c, c.seq);
    say(&c, 20);
    drop_last(&c, 20);
    assert_true(outputs_hash(&c, c.seq) == before);
    for (int i = 0; i < 8; i++) { /* where the drafts seal a block, too */
        say(&c, 10);
        before = outputs_hash(&c, c.seq);
        say(&c, 64);
        drop_last(&c, 64);
        assert_true(outputs_hash(&c, c.seq) == before);
        if (i % 3 == 0)
            take_out(&c, 64, 64);
        before = outputs_hash(&c, c.seq);
        say(&c, 64);
        drop_last(&c, 64);
        assert_true(outputs_hash(&c, c.seq) == before);
    }
    say(&c, 200);
    assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
    expect_ok(c.cache, kvt_seq_clear(c.seq));
    assert_true(kvt_seq_memory_bytes(c.seq) == empty);
    while (c.n > 0)
        free_last(&c);
    say(&c, 300); /* in blocks that have had shifts */
    take_out(&c, 64, 64);
    assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
    close_conversation(&c);
}

/* What has moved is saved and loaded, and goes on; a cache that could not turn q refuses it. */
static void moved_keys_are_saved(void **state)
{
    (void)state;
    for (int i = 0; i < 6; i++) {
        kvt_group_config g =
            roped(2, 1, 32, i % 2 ? KVT_TYPE_I8 : KVT_TYPE_F16, KVT_ROPE_NEIGHBOURS, 0, 32);
        kvt_load_result result;
        int32_t *positions;
        kvt_cache *other;
        kvt_seq *loaded = NULL, *refused = NULL, *first;
        conversation c;
        bytes file, again;
        open_conversation(&c, &g, 1500, 400 + (uint64_t)i);
        say(&c, 450 + (size_t)i * 10);
        take_out(&c, 64, 192);
        if (i < 4)
            say(&c, 30);
        if (i == 3)
            take_out(&c, c.n - 20, 5);
        file = saved(c.cache, c.seq, i % 3 ? KVT_CODEC_ZSTD : KVT_CODEC_RAW);
        expect_ok(c.cache, kvt_seq_create(c.cache, &loaded));
        expect_ok(c.cache, load_bytes(loaded, file.data, file.n, &result));
        assert_true(result.n_tokens == c.n);
        again = saved(c.cache, loaded, i % 3 ? KVT_CODEC_ZSTD : KVT_CODEC_RAW);
        assert_true(again.n == file.n && memcmp(again.data, file.data, file.n) == 0);
        assert_true(outputs_hash(&c, loaded) == outputs_hash(&c, c.seq));
        positions = malloc(c.n * sizeof *positions);
        expect_ok(c.cache, kvt_seq_key_positions(loaded, 0, c.n, positions));
        for (size_t j = 0; j < c.n; j++)
            assert_int_equal(positions[j], c.records[j].stored_at);
        free(positions);
        first = c.seq;
        c.seq = loaded;
        say(&c, 150);
        assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
        take_out(&c, 64, 64);
        assert_true(error_of(&c, KVT_ATTEND_F32, 2) < 1e-5);
        kvt_seq_destroy(first);
        g.rope_pairing = KVT_ROPE_UNKNOWN;
        g.rope_dims = 0;
        other = cache_of(&g, 1500, 1, NULL);
        expect_ok(other, kvt_seq_create(other, &refused));
        expect(other, KVT_ERR_MISMATCH, load_bytes(refused, file.data, file.n, NULL));
        expect_error_text(other, "moved", "load");
        kvt_seq_destroy(refused);
        kvt_cache_destroy(other);
        for (size_t at = 0; at < file.n; at += 1 + file.n / 400) { /* damaged: refused */
            file.data[at] ^= 0x40;
            assert_true(load_bytes(c.seq, file.data, file.n, NULL) != KVT_OK);
            file.data[at] ^= 0x40;
        }
        assert_true(error_of(&c, KVT_ATTEND_F32, 1) < 1e-5);
        bytes_free(&file);
        bytes_free(&again);
        close_conversation(&c);
    }
}

/* What q is turned by does not depend on the rounding that the caller has set. */
static void rounding_is_not_the_callers(void **state)
{
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    kvt_group_config g = roped(2, 1, 32, KVT_TYPE_F16, KVT_ROPE_HALVES, 0, 32);
    uint64_t plain = 0;
    conversation c;
    bytes file;
    (void)state;
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        kvt_seq *loaded = NULL;
        open_conversation(&c, &g, 1500, 500);
        say(&c, 512);
        fesetround(modes[i]);
        expect_ok(c.cache, kvt_seq_remove(c.seq, 64, 128));
        assert_int_equal(fegetround(), modes[i]);
        fesetround(FE_TONEAREST);
        if (i == 0)
            plain = outputs_hash(&c, c.seq);
        assert_true(outputs_hash(&c, c.seq) == plain);
        file = saved(c.cache, c.seq, KVT_CODEC_RAW);
        expect_ok(c.cache, kvt_seq_create(c.cache, &loaded));
        fesetround(modes[i]);
        expect_ok(c.cache, load_bytes(loaded, file.data, file.n, NULL));
        fesetround(FE_TONEAREST);
        assert_true(outputs_hash(&c, loaded) == plain);
        kvt_seq_destroy(loaded);
        bytes_free(&file);
        close_conversation(&c);
    }
}

/* ---- open blocks whose offsets differ ---- */

/* Largest difference of a side's tokens `a` on and `b` on, n of them, of all layers. */
static float difference(const subject *s, const float *const *all, const kvt_seq *seq,
                        kvt_side side, size_t a, size_t b, size_t n)
{
    float worst = 0;
    uint32_t layer = 0;
    for (uint32_t g = 0; g < s->n_groups; g++) {
        const size_t width =
            s->groups[g].n_kv_heads * (side ? s->groups[g].v_dim : s->groups[g].k_dim);
        float *now = malloc((n + 1) * width * sizeof *now);
        for (uint32_t l = 0; l < s->groups[g].n_layers; l++, layer++) {
            kvt_tensor out = kvt_tensor_f32(now);
            expect_ok(s->cache, kvt_read(seq, layer, side, b, n, &out));
            for (size_t i = 0; i < n * width; i++)
                worst = fmaxf(worst, fabsf(now[i] - all[2 * layer + side][a * width + i]));
        }
        free(now);
    }
    return worst;
}

/* All that a sequence's layers read: [2 * layers] arrays. */
static void read_all(const subject *s, const kvt_seq *seq, float **all)
{
    const size_t n = (size_t)kvt_seq_length(seq);
    uint32_t layer = 0;
    for (uint32_t g = 0; g < s->n_groups; g++)
        for (uint32_t l = 0; l < s->groups[g].n_layers; l++, layer++)
            for (uint32_t side = 0; side < 2; side++) {
                const size_t dims = side ? s->groups[g].v_dim : s->groups[g].k_dim;
                kvt_tensor out;
                all[2 * layer + side] = malloc(n * s->groups[g].n_kv_heads * dims * sizeof(float));
                out = kvt_tensor_f32(all[2 * layer + side]);
                expect_ok(s->cache, kvt_read(seq, layer, (kvt_side)side, 0, n, &out));
            }
}

/*
 * Take tokens out of a loaded sequence: V stays as it is, K but for the rounding of rows that come
 * into a block with another offset. Forks do not notice, and what comes of it is sound.
 */
static void take_out_of(const subject *s, kvt_seq *seq, size_t first, size_t gone, float bound)
{
    const size_t n = (size_t)kvt_seq_length(seq);
    float *all[8] = {NULL}, worst;
    kvt_seq *copy = NULL, *again;
    uint64_t before;
    read_all(s, seq, all);
    expect_ok(s->cache, kvt_seq_fork(seq, n, &copy));
    before = file_hash(s, copy);
    expect_ok(s->cache, kvt_seq_remove(seq, first, gone));
    for (int side = 0; side < 2; side++) {
        const float *const *was = (const float *const *)all;
        assert_true(difference(s, was, seq, (kvt_side)side, 0, 0, first) == 0);
        worst = difference(s, was, seq, (kvt_side)side, first + gone, first, n - first - gone);
        if (worst > (side ? 0 : bound))
            fail_msg("side %d: %g after a removal of %zu + %zu of %zu", side, (double)worst, first,
                     gone, n);
    }
    assert_true(file_hash(s, copy) == before);
    kvt_seq_destroy(copy);
    again = reloaded(s, seq);
    expect_equal(s, again, seq, "saved and loaded", n);
    step_of(s, again, n, 150); /* what was moved is sealed */
    (void)attend_hash(s, again);
    kvt_seq_destroy(again);
    for (size_t i = 0; i < 8; i++)
        free(all[i]);
}

/* Keys drift from block to block, as offsets do then. */
static void drift(subject *s)
{
    for (uint32_t g = 0; g < s->n_groups; g++) {
        const size_t row = s->t[g].kv_heads * s->t[g].k_dim;
        for (size_t i = 0; i < MOST * row; i++)
            s->t[g].k[i] += i % 5 == 0 ? 40.0f * (float)(i / row / 64) : 0;
    }
}

/*
 * A load that makes i8 or i4 of f32 and f16 gives each open block an offset of its own (that the
 * groups' V is sealed keeps the blocks open): single tokens move from one to the other.
 */
static void converted_keys_move(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_I4};
    rng r = {61};
    (void)state;
    for (int i = 0; i < 24; i++) {
        kvt_load_options options = {.struct_size = sizeof options, .convert = 1};
        kvt_group_config g[2];
        kvt_seq *seq;
        subject from, s;
        bytes file;
        g[0] = group_of(2, 2, 1 + rng_below(&r, 2), 24, 16, i & 1 ? KVT_TYPE_F32 : KVT_TYPE_F16,
                        i & 2 ? KVT_TYPE_I8 : KVT_TYPE_I5);
        g[1] = group_of(1, 2, 1, 40, 8, KVT_TYPE_F16, KVT_TYPE_F16);
        g[0].residual_tokens = 250;
        g[0].flags = i & 4 ? KVT_GROUP_NO_ROTATION : 0;
        open_subject(&from, g, 2, &r);
        drift(&from);
        open_cache(&from, NULL);
        seq = seq_of(&from);
        grow(&from, seq, 300 + rng_below(&r, 40));
        file = saved(from.cache, seq, KVT_CODEC_RAW);
        kvt_seq_destroy(seq);
        s = from;
        s.groups[0].k_type = types[i / 8 % 2];
        s.groups[0].fine_tokens = i & 1 ? 0 : KVT_FINE_NONE;
        open_cache(&s, NULL);
        seq = seq_of(&s);
        expect_ok(s.cache, kvt_seq_load_memory(seq, file.data, file.n, &options, NULL));
        for (int j = 0; j < 3; j++) {
            const size_t n = (size_t)kvt_seq_length(seq);
            const size_t first = 64 + rng_below(&r, (uint32_t)n - 70);
            /* Of rows below 1024: half a last place of f16. */
            take_out_of(&s, seq, first, 1 + rng_below(&r, (uint32_t)(n - first) / 3), 0.3f);
        }
        bytes_free(&file);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(from.cache);
        close_subject(&s);
    }
}

/* Where the offset of a block's first layer and head is in its image, of k_dim dims. */
static unsigned char *offset_in(bytes *f, unsigned block, size_t k_dim)
{
    size_t size, at = section_payload(f->data, f->n, 13, block, &size);
    const size_t dims = (k_dim + 15) / 16 * 16;
    at += (size_t)get64(f->data + at - 16); /* padding */
    return f->data + at + 64 * dims * 2 + 128;
}

/*
 * Any offsets are sound: of a file in which the last open block's are other ones. With i4 also of
 * one whose first open block is open again.
 */
static void other_offsets_move(void **state)
{
    rng r = {62};
    (void)state;
    for (int i = 0; i < 24; i++) {
        const int again = i % 3 == 2;
        kvt_group_config g = group_of(1, 1, 1, 24, 16, i % 3 ? KVT_TYPE_I4 : KVT_TYPE_I8,
                                      i & 1 ? KVT_TYPE_I8 : KVT_TYPE_I4);
        const size_t n = 192 + 60;
        unsigned char *at;
        kvt_seq *seq;
        subject s;
        bytes file;
        g.flags = i & 4 ? KVT_GROUP_NO_ROTATION : 0;
        g.residual_tokens = again ? 64 : 128;
        g.fine_tokens = KVT_FINE_NONE;
        open_subject(&s, &g, 1, &r);
        open_cache(&s, NULL);
        seq = seq_of(&s);
        if (again) { /* block 2 */
            grow(&s, seq, 330);
            grow(&s, seq, 1);
            expect_ok(s.cache, kvt_seq_truncate(seq, 150));
        }
        while (kvt_seq_length(seq) < n)
            grow(&s, seq, 1);
        file = saved(s.cache, seq, KVT_CODEC_RAW);
        assert_int_equal(get32(file.data + section_payload(file.data, file.n, 3, 0, (size_t[]){0}) +
                               32 * 2 + 28),
                         again ? 3 : 1);
        at = offset_in(&file, 3, 24);
        for (size_t d = 0; d < 24; d++) {
            at[2 * d] = (unsigned char)rng_below(&r, 256);
            at[2 * d + 1] = (unsigned char)(0x40 + rng_below(&r, 0x10)); /* 2 to 32 */
        }
        for (size_t t = 0; t < n % 64; t += 4) /* K's scales: this one has no offset */
            at[2 * t + 1 - 128] |= 0x80;
        resign(file.data, file.n);
        expect_ok(s.cache, load_bytes(seq, file.data, file.n, NULL));
        take_out_of(&s, seq, 128 + rng_below(&r, 30) * (i % 4 > 0), 1 + rng_below(&r, 90), 0.3f);
        bytes_free(&file);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* A key that the other block's offset would make too large: nothing changes. */
static void keys_too_far_apart_stay(void **state)
{
    kvt_load_options options = {.struct_size = sizeof options, .convert = 1};
    kvt_group_config g = group_of(2, 2, 1, 16, 16, KVT_TYPE_F32, KVT_TYPE_I4);
    rng r = {63};
    kvt_seq *seq;
    subject from, s;
    uint64_t before, memory;
    bytes file;
    (void)state;
    g.residual_tokens = 250;
    g.flags = KVT_GROUP_NO_ROTATION;
    open_subject(&from, &g, 1, &r);
    for (size_t i = 0; i < (size_t)MOST * 16; i++)
        from.t[0].k[i] += i / 16 < 128 ? 200000.0f : -200000.0f;
    open_cache(&from, NULL);
    seq = seq_of(&from);
    grow(&from, seq, 200);
    file = saved(from.cache, seq, KVT_CODEC_RAW);
    kvt_seq_destroy(seq);
    s = from;
    s.groups[0].k_type = KVT_TYPE_I4;
    open_cache(&s, NULL);
    seq = seq_of(&s);
    expect_ok(s.cache, kvt_seq_load_memory(seq, file.data, file.n, &options, NULL));
    before = file_hash(&s, seq);
    memory = kvt_seq_memory_bytes(seq);
    expect(s.cache, KVT_ERR_UNSUPPORTED, kvt_seq_remove(seq, 100, 50));
    expect_error_text(s.cache, "offset", "remove");
    assert_true(file_hash(&s, seq) == before && kvt_seq_memory_bytes(seq) == memory);
    take_out_of(&s, seq, 130, 20, 0); /* within a block: as they are */
    expect_ok(s.cache, kvt_seq_remove(seq, 64, 64));
    bytes_free(&file);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(from.cache);
    close_subject(&s);
}

/* Without block 0 the offsets of later keys go on, so that drafts can be selected from. */
static void selections_without_block_0(void **state)
{
    rng r = {51};
    (void)state;
    for (size_t n = 190; n < 330; n += 7) {
        kvt_group_config g = group_of(2, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
        uint64_t odd[20];
        kvt_seq *selected, *plain;
        subject s;
        open_subject(&s, &g, 1, &r);
        open_cache(&s, NULL);
        selected = seq_of(&s);
        plain = seq_of(&s);
        for (int i = 0; i < 2; i++) {
            kvt_seq *seq = i ? selected : plain;
            grow(&s, seq, n);
            expect_ok(s.cache, kvt_seq_remove(seq, 0, 64));
        }
        expect_ok(s.cache, kvt_seq_begin(selected, 40, NULL));
        append_layers(&s, selected, 400);
        for (size_t i = 0; i < 20; i++)
            odd[i] = 2 * i + 1;
        expect_ok(s.cache, kvt_seq_commit_selected(selected, odd, 20, NULL));
        for (size_t i = 0; i < 20; i++) {
            int32_t position = (int32_t)(n + odd[i]);
            expect_ok(s.cache, kvt_seq_begin(plain, 1, &position));
            append_layers(&s, plain, 400 + (size_t)odd[i]);
            expect_ok(s.cache, kvt_seq_commit(plain, NULL));
        }
        expect_equal(&s, selected, plain, "a selection without block 0", n);
        kvt_seq_destroy(selected);
        kvt_seq_destroy(plain);
        close_subject(&s);
    }
}

/*
 * Nor does what is stored without block 0 depend on how steps are cut, though they seal the blocks
 * that have its offset.
 */
static void steps_without_block_0(void **state)
{
    static const size_t lengths[] = {128, 150, 256, 301};
    rng r = {52};
    (void)state;
    for (size_t i = 0; i < 16; i++) {
        const size_t n = lengths[i % 4], more = i < 8 ? 300 : 150;
        kvt_type k_type = i / 4 % 2 ? KVT_TYPE_I4 : KVT_TYPE_I8;
        kvt_group_config g = group_of(2, 2, 1, 16, 16, k_type, KVT_TYPE_I8);
        kvt_seq *one, *ones, *some, *load;
        subject s;
        if (i >= 8)
            g.residual_tokens = 100;
        open_subject(&s, &g, 1, &r);
        open_cache(&s, NULL);
        one = seq_of(&s);
        grow(&s, one, n);
        expect_ok(s.cache, kvt_seq_remove(one, 0, 64));
        expect_ok(s.cache, kvt_seq_fork(one, n - 64, &ones));
        expect_ok(s.cache, kvt_seq_fork(one, n - 64, &some));
        load = reloaded(&s, one);
        step_of(&s, one, n, more);
        for (size_t at = 0; at < more; at++)
            step_of(&s, ones, n + at, 1);
        for (size_t at = 0, step; at < more; at += step) {
            step = 1 + rng_below(&r, 200);
            step = step < more - at ? step : more - at;
            step_of(&s, some, n + at, step);
        }
        step_of(&s, load, n, more);
        expect_equal(&s, one, ones, "one step, and steps of one token", n);
        expect_equal(&s, some, ones, "steps of many tokens, and of one", n);
        expect_equal(&s, load, ones, "behind a load", n);
        kvt_seq_destroy(one);
        kvt_seq_destroy(ones);
        kvt_seq_destroy(some);
        kvt_seq_destroy(load);
        close_subject(&s);
    }
}

/* Checkpoints before stay, those behind go. */
static void checkpoints_behind_are_dropped(void **state)
{
    kvt_group_config g = roped(2, 1, 32, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 32);
    uint64_t at[8], before;
    conversation c;
    size_t n;
    (void)state;
    open_conversation(&c, &g, 1500, 10);
    say(&c, 100);
    expect_ok(c.cache, kvt_seq_checkpoint(c.seq, "a", 1));
    before = outputs_hash(&c, c.seq);
    say(&c, 50);
    expect_ok(c.cache, kvt_seq_checkpoint(c.seq, "in what is taken out", 20));
    say(&c, 250);
    expect_ok(c.cache, kvt_seq_checkpoint(c.seq, "b", 1));
    say(&c, 100);
    take_out(&c, 128, 64);
    expect_ok(c.cache, kvt_seq_checkpoints(c.seq, at, 8, &n));
    assert_true(n == 1 && at[0] == 100);
    expect_ok(c.cache, kvt_seq_truncate(c.seq, 100));
    assert_true(outputs_hash(&c, c.seq) == before);
    while (c.n > 100)
        free_last(&c);
    close_conversation(&c);
}

/* Windows: what they have released cannot come into sight again; else they move like all. */
static void windows_and_removals(void **state)
{
    kvt_group_config g = roped(2, 1, 32, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 32);
    conversation c;
    (void)state;
    g.window_tokens = 100;
    g.sink_tokens = 64;
    open_conversation(&c, &g, 3000, 11);
    for (size_t i = 0; i < 12; i++)
        say(&c, 100);
    /* Of the window itself: tokens that are gone would be in it. */
    expect(c.cache, KVT_ERR_STATE, kvt_seq_remove(c.seq, 1024, 128));
    expect_error_text(c.cache, "would come into", "remove");
    expect(c.cache, KVT_ERR_STATE, kvt_seq_remove(c.seq, 0, 64));
    /* Of what is released, far behind: positions move up, outputs stay. */
    expect_ok(c.cache, kvt_seq_remove(c.seq, 64, 512));
    assert_true(kvt_seq_length(c.seq) == 688);
    assert_int_equal(kvt_seq_next_position(c.seq), 688);
    outputs_hash(&c, c.seq);
    expect_ok(c.cache, kvt_seq_truncate(c.seq, 640));
    outputs_hash(&c, c.seq);
    close_conversation(&c);
}

static void what_cannot_be_done_is_refused(void **state)
{
    kvt_group_config g = roped(2, 1, 32, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 32);
    kvt_config config = kvt_config_init();
    kvt_group_config two[2];
    float bad[2] = {1, INFINITY};
    kvt_cache *cache = NULL;
    conversation c;
    uint64_t before;
    (void)state;
    g.residual_tokens = KVT_RESIDUAL_NONE;
    open_conversation(&c, &g, 1500, 12);
    say(&c, 500);
    before = outputs_hash(&c, c.seq);
    assert_true(kvt_seq_remove(NULL, 0, 64) == KVT_ERR_ARG);
    expect(c.cache, KVT_ERR_ARG, kvt_seq_remove(c.seq, 0, 0));
    expect(c.cache, KVT_ERR_ARG, kvt_seq_remove(c.seq, 501, 1));
    expect(c.cache, KVT_ERR_ARG, kvt_seq_remove(c.seq, 64, 437));
    expect(c.cache, KVT_ERR_UNSUPPORTED, kvt_seq_remove(c.seq, 64, 63));
    expect(c.cache, KVT_ERR_UNSUPPORTED, kvt_seq_remove(c.seq, 65, 64));
    expect(c.cache, KVT_ERR_UNSUPPORTED, kvt_seq_remove(c.seq, 0, 64));
    expect(c.cache, KVT_ERR_UNSUPPORTED, kvt_seq_remove(c.seq, 440, 20)); /* 448 are sealed */
    expect_ok(c.cache, kvt_seq_begin(c.seq, 1, NULL));
    expect(c.cache, KVT_ERR_STATE, kvt_seq_remove(c.seq, 64, 64));
    expect_ok(c.cache, kvt_seq_abort(c.seq));
    assert_true(outputs_hash(&c, c.seq) == before);
    close_conversation(&c);
    g.residual_tokens = 0;
    open_conversation(&c, &g, 1500, 12);
    say(&c, 100); /* both blocks open, with offsets of their own */
    expect(c.cache, KVT_ERR_UNSUPPORTED, kvt_seq_remove(c.seq, 10, 5));
    expect_error_text(c.cache, "block 0", "remove");
    close_conversation(&c);

    config.groups = two;
    config.n_groups = 1;
    config.max_tokens = 100;
    two[0] = two[1] = roped(2, 1, 32, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 4);
    two[0].rope_inverse_frequencies = two[1].rope_inverse_frequencies = bad;
    expect(NULL, KVT_ERR_VALUE, kvt_cache_create(&config, &cache));
    bad[1] = 0;
    two[0].rope_dims = 3;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    two[0].rope_dims = 4;
    two[0].rope_first_dim = 30;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    two[0].rope_first_dim = 28;
    two[0].rope_pairing = (kvt_rope)4;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    two[0].rope_pairing = KVT_ROPE_NONE;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    two[0].rope_pairing = KVT_ROPE_HALVES;
    two[0].rope_inverse_frequencies = NULL;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    two[0].rope_inverse_frequencies = bad;
    two[0].flags = KVT_GROUP_V_IN_K;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    two[0].flags = 0;
    config.n_groups = 2;
    two[1] = group_of(1, 1, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F16);
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    two[1].rope_pairing = KVT_ROPE_NONE;
    expect_ok(NULL, kvt_cache_create(&config, &cache));
    kvt_cache_destroy(cache);
}

static void failing_allocations_change_nothing(void **state)
{
    kvt_group_config g = roped(2, 1, 32, KVT_TYPE_I8, KVT_ROPE_HALVES, 0, 32);
    kvt_config config = kvt_config_init();
    kvt_seq *copy = NULL;
    uint64_t forecast;
    ledger memory;
    conversation c;
    (void)state;
    open_conversation(&c, &g, 1500, 13);
    kvt_seq_destroy(c.seq);
    kvt_cache_destroy(c.cache);
    ledger_init(&memory);
    config.groups = &c.g;
    config.n_groups = 1;
    config.max_tokens = 1500;
    config.allocator = ledger_allocator(&memory);
    expect_ok(NULL, kvt_cache_create(&config, &c.cache));
    expect_ok(c.cache, kvt_seq_create(c.cache, &c.seq));
    say(&c, 300);
    expect_ok(NULL, kvt_memory_forecast(&config, 1, 300, &forecast));
    assert_true(forecast == memory.live_bytes);
    for (int round = 0; round < 2; round++) {
        uint64_t before = outputs_hash(&c, c.seq);
        expect_ok(c.cache, kvt_seq_fork(c.seq, c.n, &copy)); /* positions have to be copied */
        expect_ok(c.cache, kvt_cache_trim(c.cache));
        for (long fail = 0;; fail++) {
            kvt_status status;
            memory.countdown = fail;
            status = kvt_seq_remove(c.seq, 64, 64);
            memory.countdown = -1;
            if (status == KVT_OK)
                break;
            assert_true(status == KVT_ERR_MEMORY);
            assert_true(outputs_hash(&c, c.seq) == before);
            assert_true(outputs_hash(&c, copy) == before);
            expect_ok(c.cache, kvt_cache_trim(c.cache));
        }
        forget(&c, 64, 64);
        assert_true(outputs_hash(&c, copy) == before);
        assert_true(error_of(&c, KVT_ATTEND_F32, 1) < 1e-5);
        assert_true(kvt_cache_memory_bytes(c.cache) == memory.live_bytes);
        kvt_seq_destroy(copy);
        say(&c, 30);
    }
    close_conversation(&c);
    ledger_close(&memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(outputs_are_those_at_the_new_positions),
        cmocka_unit_test(a_thousand_shifts_are_as_one),
        cmocka_unit_test(rope_of_all_shapes),
        cmocka_unit_test(positions_stay_without_a_description),
        cmocka_unit_test(positions_end),
        cmocka_unit_test(single_tokens_leave_no_trace),
        cmocka_unit_test(single_tokens_move),
        cmocka_unit_test(gaps_are_closed),
        cmocka_unit_test(the_end_is_a_truncate),
        cmocka_unit_test(forks_do_not_notice),
        cmocka_unit_test(drafts_leave_no_trace),
        cmocka_unit_test(moved_keys_are_saved),
        cmocka_unit_test(rounding_is_not_the_callers),
        cmocka_unit_test(converted_keys_move),
        cmocka_unit_test(other_offsets_move),
        cmocka_unit_test(keys_too_far_apart_stay),
        cmocka_unit_test(selections_without_block_0),
        cmocka_unit_test(steps_without_block_0),
        cmocka_unit_test(checkpoints_behind_are_dropped),
        cmocka_unit_test(windows_and_removals),
        cmocka_unit_test(what_cannot_be_done_is_refused),
        cmocka_unit_test(failing_allocations_change_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
