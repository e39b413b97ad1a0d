/*
 * Open and sealed blocks: that what is stored depends on the tokens alone (docs/numerics.md, "open
 * and sealed blocks"), not on how appends were cut, nor on drafts that came and went; what the
 * residual window holds; what a truncate takes back; outliers; and kvt_seq_reserve.
 */
#include "subject.h"

#include <math.h>
#include <stdio.h>

/* ---- cuts ---- */

/* 0: all at once; 1: one, then the rest; else steps of that size; above 1000: at random. */
static void grow_by(const subject *s, kvt_seq *seq, size_t n, size_t cut)
{
    rng r = {cut};
    while (kvt_seq_length(seq) < n) {
        size_t left = n - (size_t)kvt_seq_length(seq), step = cut;
        if (cut == 0)
            step = left;
        else if (cut == 1000)
            step = kvt_seq_length(seq) ? left : 1;
        else if (cut > 1000)
            step = 1 + rng_below(&r, rng_below(&r, 3) ? 20 : 200);
        grow(s, seq, step < left ? step : left);
    }
}

static void check_cuts(const kvt_group_config *groups, uint32_t n_groups, size_t n, rng *r,
                       size_t random_cuts)
{
    static const size_t fixed[] = {1000, 1, 15, 16, 64, 100};
    uint64_t first_file = 0;
    subject s;
    open_subject(&s, groups, n_groups, r);
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++) {
        kvt_seq *whole;
        uint64_t file;
        open_cache(&s, kvt_isa_name(isa));
        whole = seq_of(&s);
        grow_by(&s, whole, n, 0);
        file = file_hash(&s, whole);
        if (isa == 0)
            first_file = file;
        if (file != first_file)
            fail_msg("%s stores other bytes than scalar", kvt_isa_name(isa));
        for (size_t i = 0; i < 6 + random_cuts; i++) {
            size_t cut = i < 6 ? fixed[i] : 1001 + rng_below(r, 1000000);
            kvt_seq *seq = seq_of(&s);
            if (isa > 0 && i % 3 != isa % 3)
                cut = 1001 + rng_below(r, 1000000);
            grow_by(&s, seq, n, cut);
            expect_equal(&s, whole, seq, "cut", cut);
            kvt_seq_destroy(seq);
        }
        kvt_seq_destroy(whole);
        kvt_cache_destroy(s.cache);
        s.cache = NULL;
    }
    close_subject(&s);
}

/* All types and dims, two groups, V in K, every instruction set: 200 cuts and more. */
static void stored_bytes_do_not_depend_on_cuts(void **state)
{
    static const uint32_t dims[] = {8, 24, 40, 64, 80, 128, 192, 576};
    static const uint32_t residuals[] = {0, 0, KVT_RESIDUAL_NONE, 1, 63, 100, 400};
    rng r = {77};
    (void)state;
    for (int k_type = 0; k_type < 3; k_type++)
        for (int v_type = 0; v_type < 3; v_type++)
            for (size_t round = 0; round < (is_quick() ? 1 : 4); round++) {
                kvt_group_config g[2];
                uint32_t n_groups = 1 + (round == 1);
                for (uint32_t i = 0; i < n_groups; i++) {
                    uint32_t k_dim = dims[rng_below(&r, 8)], v_dim = dims[rng_below(&r, 8)];
                    g[i] = group_of(1 + i, 2, 1 + rng_below(&r, 2), k_dim, v_dim, (kvt_type)k_type,
                                    (kvt_type)v_type);
                    g[i].residual_tokens = residuals[rng_below(&r, 7)];
                    g[i].rotation_seed = rng_next(&r);
                    if (rng_below(&r, 4) == 0)
                        g[i].flags = rng_below(&r, 4) | (rng_below(&r, 2) ? 8 : 0);
                    if (k_type == v_type && round == 2) {
                        g[i].flags |= KVT_GROUP_V_IN_K;
                        g[i].v_dim = k_dim == 576 ? 512 : k_dim;
                    }
                }
                check_cuts(g, n_groups, 130 + rng_below(&r, 500), &r,
                           quick_level() == 2 ? 1
                           : is_quick()       ? 2
                                              : 6);
            }
}

/* ---- drafts ---- */

/*
 * Two sequences get the same steps, the second one drafts in between, which are committed, or
 * aborted, and truncated away before the next begin. At the end a truncate by up to W tokens, and
 * the same tokens again: from the old length on the file is that of the sequence that stayed.
 */
static void run_drafts(uint64_t seed)
{
    static const uint32_t residuals[] = {0, 0, 0, 64, 80, 200};
    static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_I8, KVT_TYPE_I8, KVT_TYPE_F16};
    rng r = {seed};
    kvt_group_config g = group_of(2, 2, 1, 16, 8, types[rng_below(&r, 4)], KVT_TYPE_I8);
    size_t n = 100 + rng_below(&r, 400), w, back, old;
    kvt_seq *plain, *drafted;
    subject s;

    g.residual_tokens = residuals[rng_below(&r, 6)];
    w = g.residual_tokens ? g.residual_tokens : 64;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    plain = seq_of(&s);
    drafted = seq_of(&s);
    while (kvt_seq_length(plain) < n) {
        size_t length = (size_t)kvt_seq_length(plain), left = n - length;
        size_t step = 1 + rng_below(&r, rng_below(&r, 4) ? 3 : 150), drafts;
        step = step < left ? step : left;
        drafts = 1 + rng_below(&r, 64);
        if (rng_below(&r, 3) == 0) /* up to a block's border, and one beyond */
            drafts = 64 - length % 64 + rng_below(&r, 2);
        drafts = drafts > 64 ? 64 : drafts;
        if (rng_below(&r, 2)) {
            step_of(&s, drafted, MOST - 64, drafts);
            if (rng_below(&r, 4) == 0 && drafts > 1) /* in two parts */
                expect_ok(s.cache, kvt_seq_truncate(drafted, length + drafts / 2));
            expect_ok(s.cache, kvt_seq_truncate(drafted, length));
            expect_equal(&s, plain, drafted, "drafts", (size_t)seed);
        } else if (rng_below(&r, 3) == 0) {
            expect_ok(s.cache, kvt_seq_begin(drafted, drafts, NULL));
            append_layers(&s, drafted, MOST - 64);
            expect_ok(s.cache, kvt_seq_abort(drafted));
            expect_equal(&s, plain, drafted, "an abort", (size_t)seed);
        }
        grow(&s, plain, step);
        grow(&s, drafted, step);
        expect_equal(&s, plain, drafted, "going on", (size_t)seed);
    }
    old = n;
    back = 1 + rng_below(&r, (uint32_t)w);
    back = back < n ? back : n;
    expect_ok(s.cache, kvt_seq_truncate(drafted, n - back));
    while (kvt_seq_length(drafted) < n + 70) {
        size_t step = 1 + rng_below(&r, 30), length = (size_t)kvt_seq_length(drafted);
        grow(&s, drafted, length < old && length + step > old ? old - length : step);
        while (kvt_seq_length(plain) < kvt_seq_length(drafted))
            grow(&s, plain, 1);
        if (kvt_seq_length(drafted) >= old)
            expect_equal(&s, plain, drafted, "a truncate by up to W", (size_t)seed);
    }
    kvt_seq_destroy(plain);
    kvt_seq_destroy(drafted);
    close_subject(&s);
}

/* The most that a truncate takes back, at every place of a block. */
static void drafts_of_64_tokens(void **state)
{
    rng r = {5};
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    for (size_t n = 64; n < 200; n++) {
        kvt_seq *plain = seq_of(&s), *drafted = seq_of(&s);
        grow(&s, plain, n);
        grow(&s, drafted, n);
        step_of(&s, drafted, MOST - 64, 64);
        expect_ok(s.cache, kvt_seq_truncate(drafted, n));
        expect_equal(&s, plain, drafted, "64 drafts", n);
        kvt_seq_destroy(plain);
        kvt_seq_destroy(drafted);
    }
    close_subject(&s);
}

static void drafts_leave_no_trace(void **state)
{
    const uint64_t runs = is_quick() ? 30 : 1000;
    (void)state;
    for (uint64_t seed = 1; seed <= runs; seed++)
        run_drafts(seed);
}

/* ---- what is f16, and what is i8 ---- */

static double error_of(const float *x, const float *y, size_t n)
{
    double error = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        error += (double)(x[i] - y[i]) * (double)(x[i] - y[i]);
        all += (double)y[i] * (double)y[i];
    }
    return sqrt(error / all);
}

/*
 * After every commit the tokens from 64 * floor((n - W) / 64) on are as exact as f16, those before
 * as i8.
 */
static void the_newest_tokens_are_f16(void **state)
{
    static const uint32_t residuals[] = {0, KVT_RESIDUAL_NONE, 1, 63, 65, 128, 300};
    (void)state;
    for (size_t w = 0; w < 7; w++)
        for (size_t step = 1; step < 200; step += 66) {
            rng r = {w};
            kvt_group_config g = group_of(1, 1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
            uint64_t window = residuals[w] == 0 ? 64 : w == 1 ? 0 : residuals[w];
            subject s;
            kvt_seq *seq;
            static float x[2][MOST * 64];
            g.residual_tokens = residuals[w];
            open_subject(&s, &g, 1, &r);
            open_cache(&s, NULL);
            seq = seq_of(&s);
            while (kvt_seq_length(seq) + step <= MOST) {
                size_t n, sealed;
                kvt_tensor k = kvt_tensor_f32(x[0]), v = kvt_tensor_f32(x[1]);
                grow(&s, seq, step);
                n = (size_t)kvt_seq_length(seq);
                sealed = n > window ? (n - (size_t)window) / 64 * 64 : 0;
                expect_ok(s.cache, kvt_read(seq, 0, KVT_SIDE_K, 0, n, &k));
                expect_ok(s.cache, kvt_read(seq, 0, KVT_SIDE_V, 0, n, &v));
                for (size_t t = 0; t < n; t++) {
                    double ek = error_of(x[0] + t * 64, s.t[0].k + t * 64, 64);
                    double ev = error_of(x[1] + t * 64, s.t[0].v + t * 64, 64);
                    if (t < sealed ? ek > 0.02 || ev > 0.02 || ev < 0.001
                                   : ek > 0.001 || ev > 0.0005)
                        fail_msg("window %u, step %zu: token %zu of %zu, %zu sealed: %g %g",
                                 (unsigned)window, step, t, n, sealed, ek, ev);
                }
            }
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* A truncate into a sealed block: what is left does not change, whatever comes behind it. */
static void survivors_never_change(void **state)
{
    (void)state;
    for (size_t keep = 1; keep < 300; keep += 7) {
        static float before[2][MOST * 16], after[2][MOST * 16];
        rng r = {keep};
        kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
        subject s;
        kvt_seq *seq;
        open_subject(&s, &g, 1, &r);
        open_cache(&s, NULL);
        seq = seq_of(&s);
        grow(&s, seq, 500);
        expect_ok(s.cache, kvt_seq_truncate(seq, keep));
        for (int side = 0; side < 2; side++) {
            kvt_tensor out = kvt_tensor_f32(before[side]);
            expect_ok(s.cache, kvt_read(seq, 0, (kvt_side)side, 0, keep, &out));
        }
        for (size_t i = 0; i < 12; i++)
            step_of(&s, seq, 500, 1 + i * 3);
        for (int side = 0; side < 2; side++) {
            kvt_tensor out = kvt_tensor_f32(after[side]);
            expect_ok(s.cache, kvt_read(seq, 0, (kvt_side)side, 0, kvt_seq_length(seq), &out));
            assert_memory_equal(before[side], after[side], keep * 16 * sizeof(float));
            for (size_t i = 0, at = keep; i < 12; at += 1 + i * 3, i++) /* and these are there */
                for (size_t j = 0; j < 1 + i * 3; j++) {
                    const float *fed = (side ? s.t[0].v : s.t[0].k) + (500 + j) * 16;
                    if (error_of(after[side] + (at + j) * 16, fed, 16) > 0.1)
                        fail_msg("keep %zu: token %zu is not there", keep, at + j);
                }
        }
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* ---- outliers ---- */

/* Mean error of K over a block's tokens but those that are left out. */
static double block_error(const float *k, size_t dim, const unsigned char *skip)
{
    kvt_group_config g = group_of(1, 1, 1, (uint32_t)dim, (uint32_t)dim, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache;
    kvt_seq *seq = NULL;
    kvt_tensor kt = kvt_tensor_f32(k), out;
    float *back = malloc(64 * dim * sizeof *back);
    double sum = 0;
    g.residual_tokens = KVT_RESIDUAL_NONE;
    cache = cache_of(&g, 64, 1, NULL);
    out = kvt_tensor_f32(back);
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_begin(seq, 64, NULL));
    expect_ok(cache, kvt_append(seq, 0, &kt, &kt));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, 64, &out));
    for (size_t t = 0; t < 64; t++)
        for (size_t d = 0; !skip[t] && d < dim; d++) {
            double e = (double)back[t * dim + d] - (double)k[t * dim + d];
            sum += e * e;
        }
    free(back);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return sqrt(sum);
}

/* Keys 100 times larger than the others: those stay as exact as they are without them. */
static void outliers_do_not_harm_the_others(void **state)
{
    static const size_t dims[] = {8, 64, 128};
    (void)state;
    for (size_t i = 0; i < 3; i++)
        for (size_t at = 0; at < 64; at += 21)
            for (size_t more = 0; more < 3; more++)
                for (int bias = 0; bias < 2; bias++) {
                    rng r = {i * 100 + at};
                    size_t dim = dims[i];
                    float *k = rng_normals(&r, 64 * dim);
                    unsigned char skip[64] = {0};
                    double without, with;
                    for (size_t j = 0; j < 64 * dim; j++)
                        k[j] += bias ? (float)(j % dim % 5) * 3 : 0;
                    for (size_t j = 0; j <= more * 3; j++)
                        skip[(at + j * 5) % 64] = 1;
                    without = block_error(k, dim, skip);
                    for (size_t j = 0; j < 64 * dim; j++)
                        if (skip[j / dim])
                            k[j] *= 100;
                    with = block_error(k, dim, skip);
                    if (with > 1.2 * without)
                        fail_msg("dim %zu, outlier at %zu, %zu more: error %g, without %g", dim, at,
                                 more * 3, with, without);
                    free(k);
                }
}

/* ---- reserve ---- */

/* No allocation in steps of any size up to what is reserved, sealing included. */
static void a_reserve_suffices(void **state)
{
    static const uint32_t residuals[] = {0, KVT_RESIDUAL_NONE, 1, 2, 63, 65, 66, 128};
    (void)state;
    for (uint64_t seed = 0; seed < (is_quick() ? 20 : 300); seed++) {
        rng r = {seed};
        kvt_group_config g[2] = {group_of(1, 1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8),
                                 group_of(1, 1, 1, 8, 16, KVT_TYPE_F32, KVT_TYPE_F16)};
        ledger memory;
        subject s;
        kvt_seq *seq;
        uint64_t held, length;
        size_t calls;
        g[0].residual_tokens = residuals[rng_below(&r, 8)];
        open_subject(&s, g, 2, &r);
        ledger_init(&memory);
        s.config = kvt_config_init();
        s.config.groups = s.groups;
        s.config.n_groups = 2;
        s.config.max_tokens = MOST;
        s.config.allocator = ledger_allocator(&memory);
        expect_ok(NULL, kvt_cache_create(&s.config, &s.cache));
        seq = seq_of(&s);
        if (rng_below(&r, 2))
            grow(&s, seq, 1 + rng_below(&r, 200));
        length = kvt_seq_length(seq) + rng_below(&r, (uint32_t)(650 - kvt_seq_length(seq)));
        expect_ok(s.cache, kvt_seq_reserve(seq, length));
        calls = memory.calls;
        held = kvt_seq_memory_bytes(seq);
        assert_true(kvt_cache_memory_bytes(s.cache) == memory.live_bytes);
        for (int round = 0; round < 2; round++) {
            while (kvt_seq_length(seq) < length) {
                size_t left = (size_t)(length - kvt_seq_length(seq));
                size_t step = 1 + rng_below(&r, rng_below(&r, 2) ? 4 : 300);
                grow(&s, seq, step < left ? step : left);
                if (rng_below(&r, 4) == 0)
                    expect_ok(s.cache,
                              kvt_seq_truncate(
                                  seq, kvt_seq_length(seq) -
                                           rng_below(&r, (uint32_t)(step < left ? step : left))));
                if (rng_below(&r, 4) == 0 && kvt_seq_length(seq) < length) {
                    expect_ok(s.cache, kvt_seq_begin(seq, 1, NULL));
                    expect_ok(s.cache, kvt_seq_abort(seq));
                }
                if (memory.calls != calls)
                    fail_msg("seed %u: an allocation at %u of %u tokens", (unsigned)seed,
                             (unsigned)kvt_seq_length(seq), (unsigned)length);
            }
            expect_ok(s.cache, round ? kvt_seq_truncate(seq, 0) : kvt_seq_clear(seq));
        }
        assert_true(kvt_seq_memory_bytes(seq) == held);
        expect_ok(s.cache, kvt_cache_trim(s.cache)); /* takes no reserved block */
        assert_true(kvt_seq_memory_bytes(seq) == held && memory.calls == calls);
        kvt_seq_destroy(seq);
        close_subject(&s);
        ledger_close(&memory);
    }
}

/* Likewise with the open blocks of any two steps: old ones, to be sealed, and new ones. */
static void a_reserve_suffices_for_any_two_steps(void **state)
{
    static const uint32_t residuals[] = {1, 2, 3, 62, 63, 64, 65, 66, 127, 128, 129, 130};
    (void)state;
    for (size_t i = 0; i < sizeof residuals / sizeof *residuals; i++) {
        rng r = {i};
        kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
        ledger memory;
        subject s;
        kvt_seq *seq;
        size_t calls;
        g.residual_tokens = residuals[i];
        open_subject(&s, &g, 1, &r);
        ledger_init(&memory);
        s.config = kvt_config_init();
        s.config.groups = s.groups;
        s.config.n_groups = 1;
        s.config.max_tokens = MOST;
        s.config.allocator = ledger_allocator(&memory);
        expect_ok(NULL, kvt_cache_create(&s.config, &s.cache));
        seq = seq_of(&s);
        expect_ok(s.cache, kvt_seq_reserve(seq, MOST));
        calls = memory.calls;
        for (size_t first = 1; first <= 200; first += quick_level() == 2 ? 5 : 1) {
            grow(&s, seq, first);
            for (size_t n = 1; n <= 300; n++) {
                expect_ok(s.cache, kvt_seq_begin(seq, n, NULL));
                if (memory.calls != calls)
                    fail_msg("window %u: an allocation at %u + %u tokens", residuals[i],
                             (unsigned)first, (unsigned)n);
                expect_ok(s.cache, kvt_seq_abort(seq));
            }
            expect_ok(s.cache, kvt_seq_clear(seq));
        }
        kvt_seq_destroy(seq);
        close_subject(&s);
        ledger_close(&memory);
    }
}

static void reserve_refuses(void **state)
{
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_config c = kvt_config_init();
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    ledger memory;
    uint64_t before;
    (void)state;
    ledger_init(&memory);
    c.groups = &g;
    c.n_groups = 1;
    c.max_tokens = 1000;
    c.allocator = ledger_allocator(&memory);
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    assert_int_equal(kvt_seq_reserve(NULL, 1), KVT_ERR_ARG);
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect(cache, KVT_ERR_FULL, kvt_seq_reserve(seq, 1001));
    expect_error_text(cache, "1001", "beyond max_tokens");
    expect_ok(cache, kvt_seq_begin(seq, 5, NULL));
    expect(cache, KVT_ERR_STATE, kvt_seq_reserve(seq, 10));
    expect_ok(cache, kvt_seq_abort(seq));
    before = kvt_cache_memory_bytes(cache);
    for (long left = 0; left < 20; left++) {
        memory.countdown = left;
        expect(cache, KVT_ERR_MEMORY, kvt_seq_reserve(seq, 1000));
        memory.countdown = -1;
        assert_true(kvt_seq_memory_bytes(seq) <= before);
    }
    expect_ok(cache, kvt_seq_reserve(seq, 1000));
    assert_true(kvt_seq_capacity(seq) == 1000);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    ledger_close(&memory);
}

/*
 * K of 4 bits at the limit of what it takes, its range one-sided: the middle's and the scale's
 * rounding put codes beyond the limit. Opened again, such rows stay what they were.
 */
static void large_rows_are_opened_again(void **state)
{
    enum { N = 100 };
    (void)state;
    for (int i = 0; i < 20; i++) {
        kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_I4, KVT_TYPE_I4);
        float x[2][N * 8], most = 0.0f;
        rng r = {30};
        kvt_seq *seq, *loaded;
        subject s;
        g.residual_tokens = KVT_RESIDUAL_NONE;
        g.fine_tokens = KVT_FINE_NONE;
        open_subject(&s, &g, 1, &r);
        for (size_t t = 0; t < 200; t++) /* block 0 has an offset of 0 */
            for (size_t d = 0; d < 8; d++) {
                const float low = -2.4e5f * (0.5f + 0.01f * (float)i + 0.003f * (float)d);
                const uint32_t u = rng_below(&r, 1000);
                s.t[0].k[t * 8 + d] = t == 0       ? 0.0f
                                      : t < 64     ? (t % 2 ? 1e5f : -1e5f)
                                      : t % 7 == 3 ? 2.4e5f
                                      : t % 7 == 5 ? low
                                                   : low + (2.4e5f - low) * (float)u / 1000.0f;
            }
        open_cache(&s, NULL);
        seq = seq_of(&s);
        grow(&s, seq, 150);
        grow(&s, seq, 1);
        expect_ok(s.cache, kvt_seq_truncate(seq, N));
        for (int again = 0; again < 2; again++) {
            kvt_tensor view = kvt_tensor_f32(x[again]);
            expect_ok(s.cache, kvt_read(seq, 0, KVT_SIDE_K, 0, N, &view));
            if (again == 0)
                grow(&s, seq, 1);
        }
        for (size_t at = 0; at < sizeof x[0] / sizeof *x[0]; at++) { /* f16 */
            assert_true(fabsf(x[1][at] - x[0][at]) <= 0x1p-11f * fabsf(x[0][at]) + 64.0f);
            most = fmaxf(most, fabsf(x[0][at]));
        }
        if (i < 8)
            assert_true(most > 2.4e5f);
        loaded = reloaded(&s, seq);
        expect_equal(&s, loaded, seq, "large rows", (size_t)i);
        kvt_seq_destroy(loaded);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* ---- the stack ---- */

#if !defined(HAS_SANITIZER)
enum { STACK_BYTES = 1 << 20, STACK_PAINT = 0xab, STACK_TOKENS = 260 };

typedef struct stack_job {
    kvt_seq *seq; /* NULL: nothing is appended */
    kvt_tensor k, v;
    kvt_status status;
} stack_job;

static void *append_on_stack(void *arg)
{
    stack_job *job = arg;
    if (job->seq)
        job->status = kvt_append(job->seq, 0, &job->k, &job->v);
    return NULL;
}

/* Bytes of a painted stack that a thread has written. */
static size_t stack_of(stack_job *job)
{
    unsigned char *stack = aligned_alloc(65536, STACK_BYTES);
    size_t i = 0;
    pthread_attr_t attr;
    pthread_t thread;
    assert_non_null(stack);
    memset(stack, STACK_PAINT, STACK_BYTES);
    assert_int_equal(pthread_attr_init(&attr), 0);
    assert_int_equal(pthread_attr_setstack(&attr, stack, STACK_BYTES), 0);
    assert_int_equal(pthread_create(&thread, &attr, append_on_stack, job), 0);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attr);
    while (i < STACK_BYTES && stack[i] == STACK_PAINT)
        i++;
    free(stack);
    return STACK_BYTES - i;
}

/* Of the append of one step and of short ones, where keys of both bases are in a block. */
static void check_stack(const kvt_group_config *g, const char *isa, size_t most)
{
    size_t n = (size_t)STACK_TOKENS * g->k_dim, empty;
    rng r = {70};
    float *k = rng_normals(&r, n), *v = rng_normals(&r, n);
    for (size_t i = 0; i < n; i++) /* the first key of a row is an outlier, and others are */
        k[i] *= i / g->k_dim % 9 == 0 ? 1000.0f : 1.0f;
    for (size_t step = 65; step <= STACK_TOKENS; step += STACK_TOKENS - 65) {
        kvt_cache *cache = cache_of(g, STACK_TOKENS, 1, isa);
        kvt_seq *seq = NULL;
        stack_job job = {NULL, {0}, {0}, KVT_OK};
        empty = stack_of(&job);
        expect_ok(cache, kvt_seq_create(cache, &seq));
        for (size_t at = 0; at + step <= STACK_TOKENS; at += step) {
            size_t used;
            job = (stack_job){seq, kvt_tensor_f32(k + at * g->k_dim),
                              kvt_tensor_f32(v + at * g->v_dim), KVT_OK};
            expect_ok(cache, kvt_seq_begin(seq, step, NULL));
            used = stack_of(&job) - empty;
            expect_ok(cache, job.status);
            expect_ok(cache, kvt_seq_commit(seq, NULL));
            if (used > most)
                fail_msg(
                    "%s, %u dims, K of type %d, a step of %zu: %zu bytes of stack, at most %zu",
                    isa, (unsigned)g->k_dim, (int)g->k_type, step, used, most);
        }
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    free(k);
    free(v);
}
#endif

/* What kvt_append says of its stack. */
static void the_stack_is_bounded(void **state)
{
    (void)state;
#if defined(HAS_SANITIZER) || !defined(__OPTIMIZE__)
    skip();
#else
    if (quick_level() == 2) /* valgrind's and QEMU's own */
        skip();
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (uint32_t dims = 256; dims <= 1024; dims *= 2)
            for (int i = 0; i < 4; i++) {
                kvt_type type = i / 2 ? KVT_TYPE_I4 : KVT_TYPE_I8;
                kvt_group_config g = group_of(1, 1, 1, dims, dims, type, type);
                g.residual_tokens = KVT_RESIDUAL_NONE;
                g.fine_tokens = i % 2 ? KVT_FINE_NONE : 0;
                check_stack(&g, kvt_isa_name(isa), (dims > 256 ? 360u : 250u) << 10);
            }
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stored_bytes_do_not_depend_on_cuts),
        cmocka_unit_test(drafts_leave_no_trace),
        cmocka_unit_test(drafts_of_64_tokens),
        cmocka_unit_test(the_newest_tokens_are_f16),
        cmocka_unit_test(survivors_never_change),
        cmocka_unit_test(outliers_do_not_harm_the_others),
        cmocka_unit_test(large_rows_are_opened_again),
        cmocka_unit_test(a_reserve_suffices),
        cmocka_unit_test(a_reserve_suffices_for_any_two_steps),
        cmocka_unit_test(reserve_refuses),
        cmocka_unit_test(the_stack_is_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
