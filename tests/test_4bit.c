/*
 * What only blocks of 4-bit K do: they are open again behind a cut. What is left of such a block
 * must not wear down, however often it is cut, filled and sealed; and all that moves, copies or
 * saves a sequence has to know both states of it. What is stored, by the bit: test_numerics.c.
 */
#include "subject.h"

#include <math.h>
#include <stdio.h>

static const kvt_type pairs[][2] = {{KVT_TYPE_I4, KVT_TYPE_I4},
                                    {KVT_TYPE_I4, KVT_TYPE_I5},
                                    {KVT_TYPE_I4, KVT_TYPE_I8},
                                    {KVT_TYPE_I4, KVT_TYPE_F16}};
enum { N_PAIRS = sizeof pairs / sizeof *pairs };

/* ---- what is left of a block ---- */

enum { DIM = 64, HEADS = 2, ROW = HEADS * DIM };

/* A sequence of up to 4 blocks and what it was fed with. */
typedef struct block_test {
    kvt_group_config g;
    kvt_cache *cache;
    kvt_seq *seq;
    tokens fed;
    float *k, *v; /* read back */
} block_test;

static void open_test(block_test *t, rng *r, const kvt_type *types, size_t n, const char *isa)
{
    memset(t, 0, sizeof *t);
    t->g = group_of(1, HEADS, HEADS, DIM, DIM, types[0], types[1]);
    t->g.fine_tokens = KVT_FINE_NONE;
    t->g.residual_tokens = KVT_RESIDUAL_NONE;
    t->cache = cache_of(&t->g, n + 64, 1, isa);
    t->seq = NULL;
    expect_ok(t->cache, kvt_seq_create(t->cache, &t->seq));
    t->fed = tokens_make(r, n, &t->g);
    t->k = malloc(n * ROW * sizeof *t->k);
    t->v = malloc(n * ROW * sizeof *t->v);
    assert_true(t->k && t->v);
}

static void close_test(block_test *t)
{
    kvt_seq_destroy(t->seq);
    kvt_cache_destroy(t->cache);
    tokens_free(&t->fed);
    free(t->k), free(t->v);
}

static void read_all(const block_test *t, float *k, float *v)
{
    kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
    expect_ok(t->cache, kvt_read(t->seq, 0, KVT_SIDE_K, 0, kvt_seq_length(t->seq), &kt));
    expect_ok(t->cache, kvt_read(t->seq, 0, KVT_SIDE_V, 0, kvt_seq_length(t->seq), &vt));
}

/* Up to n tokens: one step, or one by one. */
static void fill_up(block_test *t, size_t n, int one_by_one)
{
    size_t at = (size_t)kvt_seq_length(t->seq);
    append_all(t->cache, t->seq, &t->g, &t->fed, at, n - at, one_by_one ? 1 : n - at);
}

/*
 * Cut, open, full and sealed again, with keys that stay in the range that the block has had: in
 * all that the tokens before the cut are the same, but for the rounding of open K to f16.
 */
static void survivors_stay(void **state)
{
    enum { N = 192 };
    rng r = {31};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t types = 0; types < N_PAIRS; types++)
            for (size_t block = 0; block < 3; block++) {
                block_test t;
                float *k = malloc(N * ROW * sizeof *k), *v = malloc(N * ROW * sizeof *v);
                float *had = malloc(64 * ROW * sizeof *had);
                const size_t first = 64 * block, n = first + 64;
                assert_true(k && v && had);
                open_test(&t, &r, pairs[types], N, kvt_isa_name(isa));
                for (size_t i = 0; i < N * ROW; i++)
                    t.fed.k[i] += (float)(i % 9) * (i % 9 == 4 ? 20.0f : 1.0f);
                memcpy(had, t.fed.k + first * ROW, 64 * ROW * sizeof *had);
                fill_up(&t, n, 0);
                read_all(&t, k, v);
                for (int cycle = 0; cycle < (is_quick() ? 20 : 200); cycle++) {
                    size_t cut = first + 1 + rng_below(&r, 63);
                    expect_ok(t.cache, kvt_seq_begin(t.seq, 1, NULL)); /* nothing is taken back */
                    expect_ok(t.cache, kvt_seq_abort(t.seq));
                    expect_ok(t.cache, kvt_seq_truncate(t.seq, cut));
                    read_all(&t, t.k, t.v);
                    assert_memory_equal(t.k, k, cut * ROW * sizeof *k);
                    assert_memory_equal(t.v, v, cut * ROW * sizeof *v);
                    if (cycle % 3 == 0) { /* a step that comes to nothing */
                        expect_ok(t.cache, kvt_seq_begin(t.seq, 1, NULL));
                        expect_ok(t.cache, kvt_seq_abort(t.seq));
                    }
                    for (size_t i = cut * ROW; i < n * ROW; i++) {
                        t.fed.k[i] = had[rng_below(&r, 64) * ROW + i % ROW];
                        t.fed.v[i] = (float)rng_normal(&r);
                    }
                    if (cut < n - 1) {
                        fill_up(&t, n - 1, cycle & 1);
                        read_all(&t, t.k, t.v);
                        for (size_t i = 0; i < cut * ROW; i++) {
                            /* The key is f16 behind an offset that is below 200. */
                            float most = ldexpf(fabsf(k[i]) + 200, -11);
                            if (i < first * ROW ? t.k[i] != k[i] : !(fabsf(t.k[i] - k[i]) <= most))
                                fail_msg("K %zu: open %a, sealed %a", i, (double)t.k[i],
                                         (double)k[i]);
                        }
                        for (size_t i = 0; i < cut * ROW; i++)
                            if (t.v[i] != v[i])
                                fail_msg("V %zu: open %a, sealed %a", i, (double)t.v[i],
                                         (double)v[i]);
                    }
                    fill_up(&t, n, 0);
                    read_all(&t, t.k, t.v);
                    if (memcmp(t.k, k, cut * ROW * sizeof *k) != 0 ||
                        memcmp(t.v, v, cut * ROW * sizeof *v) != 0)
                        fail_msg("isa %s types %d %d block %zu cycle %d cut %zu: not the same %s",
                                 t.cache ? kvt_cache_isa(t.cache) : "", (int)t.g.k_type,
                                 (int)t.g.v_type, block, cycle, cut,
                                 memcmp(t.k, k, cut * ROW * sizeof *k) ? "K" : "V");
                    memcpy(k, t.k, n * ROW * sizeof *k);
                    memcpy(v, t.v, n * ROW * sizeof *v);
                }
                close_test(&t);
                free(k), free(v), free(had);
            }
}

static double error_of(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sqrt(sum / (double)n);
}

/* What is left after many cuts, each filled with other tokens, is as near to what it was. */
static void no_wear(void **state)
{
    enum { N = 128, STAYS = 8, CYCLES = 200 };
    rng r = {32};
    (void)state;
    for (size_t types = 0; types < N_PAIRS; types++)
        for (int kind = 0; kind < 2; kind++) {
            block_test t;
            double first[2] = {0}, last[2] = {0};
            open_test(&t, &r, pairs[types], N, NULL);
            for (size_t i = 0; kind == 1 && i < N * ROW; i++)
                t.fed.k[i] += i % DIM % 7 == 3 ? 30.0f : 0.0f;
            fill_up(&t, N, 0);
            for (int cycle = 0; cycle < CYCLES; cycle++) {
                size_t cut = N - 64 + STAYS + rng_below(&r, 64 - STAYS);
                expect_ok(t.cache, kvt_seq_begin(t.seq, 1, NULL));
                expect_ok(t.cache, kvt_seq_abort(t.seq));
                expect_ok(t.cache, kvt_seq_truncate(t.seq, cut));
                for (size_t i = cut * ROW; i < N * ROW; i++) {
                    t.fed.k[i] =
                        (float)rng_normal(&r) + (kind == 1 && i % DIM % 7 == 3 ? 30.0f : 0.0f);
                    t.fed.v[i] = (float)rng_normal(&r);
                }
                fill_up(&t, N, cycle % 5 == 4);
                read_all(&t, t.k, t.v);
                for (int side = 0; side < 2; side++) {
                    double e = error_of((side ? t.v : t.k) + (N - 64) * ROW,
                                        (side ? t.fed.v : t.fed.k) + (N - 64) * ROW, STAYS * ROW);
                    *(cycle ? &last[side] : &first[side]) = e;
                }
            }
            printf("types %d/%d kind %d: error of K %.4f, then %.4f; of V %.4f, then %.4f\n",
                   (int)pairs[types][0], (int)pairs[types][1], kind, first[0], last[0], first[1],
                   last[1]);
            if (!(last[0] <= 1.5 * first[0]) || !(last[1] <= 1.5 * first[1]))
                fail_msg("worn down");
            close_test(&t);
        }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(survivors_stay),
        cmocka_unit_test(no_wear),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("4bit", tests, NULL, NULL);
}
