/*
 * Windows that release blocks, and checkpoints: outputs are those of a cache that keeps everything
 * and masks; memory does not grow; what can be truncated to is said and holds; a checkpoint is bit
 * for bit what the sequence was there.
 */
#include "subject.h"

#include <math.h>
#include <stdio.h>

/* ---- caches ---- */

/* Two groups, of which the first has a window. */
static void windowed_groups(kvt_group_config *g, uint32_t window, uint32_t sinks, kvt_type type)
{
    g[0] = group_of(1, 2, 1, 16, 16, type, type);
    g[1] = group_of(1, 2, 1, 16, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    g[0].window_tokens = window;
    g[0].sink_tokens = sinks;
}

/* Attention of the last query over one layer. seen: how many of the last tokens; 0: all. */
static void attend_layer(const subject *s, const kvt_seq *seq, uint32_t layer, const uint8_t *mask,
                         float *out)
{
    float q[32];
    kvt_attend_item item = {.seq = seq, .n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    for (size_t i = 0; i < 32; i++)
        q[i] = (float)(i % 7) * 0.1f - 0.3f;
    if (mask) {
        item.mask = mask;
        item.mask_tokens = kvt_seq_length(seq);
        item.mask_stride = (MOST + 7) / 8;
    }
    args.layer = layer;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    expect_ok(s->cache, kvt_attend(s->cache, &args));
}

/* One output of a sequence with a window equals that of one without, under a mask. */
static void expect_masked(const subject *w, const kvt_seq *seq, const subject *all,
                          const kvt_seq *whole)
{
    uint64_t n = kvt_seq_length(seq);
    uint8_t mask[(MOST + 7) / 8] = {0};
    float a[32], b[32];
    for (uint64_t t = 0; t < n; t++)
        if (n - 1 - t < w->groups[0].window_tokens || t < w->groups[0].sink_tokens)
            mask[t / 8] |= (uint8_t)(1u << t % 8);
    attend_layer(w, seq, 0, NULL, a);
    attend_layer(all, whole, 0, mask, b);
    assert_memory_equal(a, b, 2 * w->groups[0].v_dim * sizeof *a);
    attend_layer(w, seq, 1, NULL, a);
    attend_layer(all, whole, 1, NULL, b);
    assert_memory_equal(a, b, 2 * w->groups[1].v_dim * sizeof *a);
}

/* ---- windows ---- */

/*
 * Steps of all sizes, drafts that are taken back, at every length. The file is that of a sequence
 * that has had no drafts.
 */
static void outputs_are_those_of_a_mask(void **state)
{
    static const uint32_t windows[] = {1, 30, 64, 100, 200};
    static const uint32_t sinks[] = {0, 4, 64, 100, 0};
    rng r = {31};
    (void)state;
    for (size_t i = 0; i < 15; i++) {
        kvt_group_config g[2];
        subject w, all;
        kvt_seq *seq, *whole, *plain;
        windowed_groups(g, windows[i % 5], sinks[rng_below(&r, 5)],
                        i % 3 == 0   ? KVT_TYPE_F16
                        : i % 3 == 1 ? KVT_TYPE_I8
                                     : KVT_TYPE_F32);
        if (i % 4 == 1)
            g[0].residual_tokens = KVT_RESIDUAL_NONE;
        open_subject(&w, g, 2, &r);
        all = w;
        all.groups[0].window_tokens = all.groups[0].sink_tokens = 0;
        open_cache(&w, NULL);
        open_cache(&all, NULL);
        seq = seq_of(&w);
        whole = seq_of(&all);
        plain = seq_of(&w);
        while (kvt_seq_length(seq) < 640) {
            size_t n = 1 + rng_below(&r, rng_below(&r, 2) ? 3 : 70), drafts = rng_below(&r, 65);
            uint64_t length = kvt_seq_length(seq);
            n = length + n > 640 ? (size_t)(640 - length) : n;
            if (drafts && length) {
                step_of(&w, seq, MOST - 64, drafts);
                expect_ok(w.cache, kvt_seq_truncate(seq, length));
            }
            if (length)
                expect_equal(&w, seq, plain, "drafts and a window", (size_t)length);
            grow(&w, seq, n);
            grow(&w, plain, n);
            grow(&all, whole, n);
            expect_masked(&w, seq, &all, whole);
            expect_equal(&w, seq, plain, "behind drafts and a window", (size_t)length + n);
        }
        kvt_seq_destroy(plain);
        kvt_seq_destroy(seq);
        kvt_seq_destroy(whole);
        kvt_cache_destroy(all.cache);
        close_subject(&w);
    }
}

/* At 1,000,000 tokens as at 10,000, to the block; and no more than the forecast says. */
static void memory_does_not_grow(void **state)
{
    const uint64_t most = is_quick() ? 60032 : 1000000, early = 10048;
    static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_F16};
    rng r = {32};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        kvt_group_config g = group_of(1, 1, 1, 8, 8, types[i], types[i]);
        kvt_cache_stats stats = {.struct_size = sizeof stats};
        uint64_t blocks = 0, held = 0, forecast;
        tokens t;
        kvt_config config = kvt_config_init();
        kvt_cache *cache;
        kvt_seq *seq;
        g.window_tokens = 1000;
        g.sink_tokens = 4;
        t = tokens_make(&r, 64, &g);
        config.groups = &g;
        config.n_groups = 1;
        config.max_tokens = 1 << 20;
        expect_ok(NULL, kvt_cache_create(&config, &cache));
        expect_ok(cache, kvt_seq_create(cache, &seq));
        while (kvt_seq_length(seq) < most) {
            append_step(cache, seq, &g, &t, 0, 32);
            if (kvt_seq_length(seq) != early && kvt_seq_length(seq) != most / 64 * 64)
                continue;
            expect_ok(cache, kvt_cache_trim(cache));
            expect_ok(cache, kvt_cache_get_stats(cache, &stats));
            if (kvt_seq_length(seq) == early) {
                blocks = stats.blocks_used;
                held = stats.bytes;
            }
            expect_ok(NULL, kvt_memory_forecast(&config, 1, kvt_seq_length(seq), &forecast));
            assert_true(stats.bytes <= forecast);
            assert_true(forecast <= stats.bytes + 3 * (64 * 8 * 2 * 4 + 64)); /* three blocks */
        }
        /* The window, the 128 tokens that can be taken back, the open blocks, and the sinks. */
        assert_true(stats.blocks_used == blocks);
        assert_true(blocks <= (1000 + 128) / 64 + 1 + 2 + 1);
        /* Positions of all tokens stay. */
        assert_true(stats.bytes - held <= (kvt_seq_length(seq) - early) / 64 * (64 * 8 + 64 + 64));
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        tokens_free(&t);
    }
}

/* The first token behind the sinks that the windowed layer still has. */
static uint64_t first_kept(const subject *s, const kvt_seq *seq, uint64_t sinks)
{
    float x[16];
    kvt_tensor out = kvt_tensor_f32(x);
    while (sinks < kvt_seq_length(seq) && kvt_read(seq, 0, KVT_SIDE_K, sinks, 1, &out) != KVT_OK)
        sinks++;
    (void)s;
    return sinks;
}

/*
 * The forecast of a length is what a sequence takes that has had it in one step, at every length
 * where nothing has been released; then it is no less.
 */
static void the_forecast_is_exact(void **state)
{
    rng r = {39};
    (void)state;
    for (int i = 0; i < 6; i++) {
        kvt_group_config g[2];
        size_t released = 0, sinks = i % 2 ? 128 : i < 4 ? 64 : 0; /* whole blocks, or block 0 */
        subject s;
        windowed_groups(g, i % 3 ? 100 : 1, i % 2 ? 70 : 0, i < 4 ? KVT_TYPE_I8 : KVT_TYPE_F16);
        g[0].residual_tokens = i == 1 ? KVT_RESIDUAL_NONE : 0;
        open_subject(&s, g, 2, &r);
        open_cache(&s, NULL);
        for (size_t n = 1; n<460; n += n> 60 && n < 330 ? 1 : 13) {
            kvt_seq *seq = seq_of(&s);
            uint64_t forecast, held;
            grow(&s, seq, n);
            expect_ok(s.cache, kvt_cache_trim(s.cache));
            expect_ok(NULL, kvt_memory_forecast(&s.config, 1, n, &forecast));
            held = kvt_cache_memory_bytes(s.cache);
            if (n > sinks && first_kept(&s, seq, sinks) > sinks)
                released++;
            if (released ? held > forecast : held != forecast)
                fail_msg("case %d, %zu tokens: %llu bytes, forecast %llu", i, n,
                         (unsigned long long)held, (unsigned long long)forecast);
            kvt_seq_destroy(seq);
        }
        assert_true(released > 0);
        close_subject(&s);
    }
}

/* A sequence of n tokens in steps of `step`, under a budget. */
static kvt_status grow_within(subject *s, uint64_t budget, size_t n, size_t step)
{
    kvt_status status = KVT_OK;
    kvt_seq *seq = NULL;
    s->config.memory_budget_bytes = budget;
    status = kvt_cache_create(&s->config, &s->cache);
    if (status == KVT_OK)
        status = kvt_seq_create(s->cache, &seq);
    for (size_t at = 0; status == KVT_OK && at < n; at += step) {
        step = step < n - at ? step : n - at;
        status = kvt_seq_begin(seq, step, NULL);
        if (status != KVT_OK)
            break;
        append_layers(s, seq, at);
        expect_ok(s->cache, kvt_seq_commit(seq, NULL));
    }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(s->cache);
    s->cache = NULL;
    return status;
}

/*
 * With a budget of what is forecast a sequence gets to its length in steps of one token, and of
 * more with a forecast for a window that is larger by as much; of what has no open blocks with no
 * byte less, once something is released.
 */
static void a_budget_of_the_forecast_suffices(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_F32, KVT_TYPE_I8, KVT_TYPE_I4};
    static const uint32_t windows[] = {1, 20, 66, 100, 64};
    static const uint32_t residuals[] = {0, KVT_RESIDUAL_NONE, 100};
    static const size_t steps[] = {1, 7, 64, 130};
    rng r = {45};
    (void)state;
    for (size_t i = 0; i < (is_quick() ? 15 : 45); i++) {
        const uint32_t window = windows[i % 5], sinks = i % 7 ? 0 : 70, residual = residuals[i % 3];
        kvt_group_config g[2];
        subject s;
        windowed_groups(g, window, sinks, types[i / 3 % 3]);
        g[0].residual_tokens = residual;
        g[0].fine_tokens = i % 2 ? 0 : 200;
        open_subject(&s, g, 1 + i / 15 % 2, &r);
        open_cache(&s, NULL);
        kvt_cache_destroy(s.cache);
        for (size_t n = 100 + i % 9; n < 650; n += 60 + i % 13) {
            uint64_t forecast;
            for (size_t j = 0; j < 4; j++) {
                uint32_t least = residual == 0 ? 64 : residual == KVT_RESIDUAL_NONE ? 0 : residual;
                s.groups[0].window_tokens =
                    steps[j] == 1 ? window : (window > least ? window : least) + (uint32_t)steps[j];
                expect_ok(NULL, kvt_memory_forecast(&s.config, 1, n, &forecast));
                s.groups[0].window_tokens = window;
                if (grow_within(&s, forecast, n, steps[j]) != KVT_OK)
                    fail_msg("case %zu: %zu tokens in steps of %zu", i, n, steps[j]);
                if (steps[j] == 1 && s.n_groups == 1 && types[i / 3 % 3] == KVT_TYPE_F32 && n > 420)
                    assert_true(grow_within(&s, forecast - 1, n, 1) == KVT_ERR_BUDGET);
            }
        }
        close_subject(&s);
    }
}

/*
 * A reserve does not take again what a window has released before it. A sequence that begins anew
 * then reserves once more, and gets to its length in any steps.
 */
static void a_reserve_leaves_released_blocks(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4};
    rng r = {46};
    (void)state;
    for (size_t i = 0; i < 12; i++) {
        kvt_group_config g[2];
        const size_t anew = i % 2 ? 30 : 0;
        kvt_seq *seq, *fresh;
        ledger memory;
        subject s;
        size_t calls;
        windowed_groups(g, 16, anew ? 37 : 0, types[i / 2 % 3]);
        open_subject(&s, g, 1, &r);
        ledger_init(&memory);
        s.ledger = &memory;
        open_cache(&s, NULL);
        seq = seq_of(&s);
        grow(&s, seq, 640);
        fresh = seq_of(&s);
        expect_ok(s.cache, kvt_seq_reserve(fresh, 650));
        expect_ok(s.cache, kvt_seq_reserve(seq, 650));
        assert_true(kvt_seq_memory_bytes(seq) + 3 * 64 * 16 <= kvt_seq_memory_bytes(fresh));
        kvt_seq_destroy(fresh);
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        calls = memory.calls;
        grow(&s, seq, 10);
        assert_true(memory.calls == calls);
        if (anew)
            expect_ok(s.cache, kvt_seq_truncate(seq, anew));
        else
            expect_ok(s.cache, kvt_seq_clear(seq));
        expect_ok(s.cache, kvt_seq_reserve(seq, 650));
        calls = memory.calls;
        for (size_t n = anew, step; n < 650; n += step) {
            step = i < 6 ? 650 - anew : 1 + rng_below(&r, 150);
            step = step < 650 - n ? step : 650 - n;
            grow(&s, seq, step);
        }
        assert_true(memory.calls == calls);
        kvt_seq_destroy(seq);
        close_subject(&s);
        ledger_close(&memory);
    }
}

/* Every length that kvt_seq_reachable names can be truncated to, and no other. */
static void what_can_be_reached_is_said(void **state)
{
    rng r = {33};
    (void)state;
    for (size_t i = 0; i < 6; i++) {
        kvt_group_config g[2];
        subject w, all;
        kvt_seq *seq, *whole;
        uint64_t deepest;
        float x[64 * 16];
        kvt_tensor out = kvt_tensor_f32(x);
        windowed_groups(g, 100, i % 2 ? 70 : 0, i % 3 ? KVT_TYPE_I8 : KVT_TYPE_F16);
        open_subject(&w, g, 2, &r);
        all = w;
        all.groups[0].window_tokens = all.groups[0].sink_tokens = 0;
        open_cache(&w, NULL);
        open_cache(&all, NULL);
        seq = seq_of(&w);
        whole = seq_of(&all);
        while (kvt_seq_length(seq) < 600 + i) {
            grow(&w, seq, 1);
            grow(&all, whole, 1);
        }
        deepest = 600 + i;
        while (kvt_seq_reachable(seq, deepest - 1) == deepest - 1)
            deepest--;
        /* The next query, at position n, sees what is above n - window. */
        assert_true(deepest == first_kept(&w, seq, i % 2 ? 128 : 64) + 100 - 1);
        assert_true(deepest <= 600 + i - 64 && deepest >= 600 + i - 64 - 128);
        for (uint64_t n = 0; n <= 600 + i; n++) {
            uint64_t reachable = kvt_seq_reachable(seq, n);
            kvt_seq *copy = NULL;
            assert_true(reachable <= n);
            if (reachable == n) {
                expect_ok(w.cache, kvt_seq_fork(seq, n, &copy));
                kvt_seq_destroy(copy);
                continue;
            }
            expect(w.cache, KVT_ERR_STATE, kvt_seq_fork(seq, n, &copy));
            expect(w.cache, KVT_ERR_STATE, kvt_seq_truncate(seq, n));
            expect_error_text(w.cache, "can be reached is", "truncate");
            assert_true(kvt_seq_length(seq) == 600 + i);
            assert_true(n < deepest);
            assert_true(reachable <= kvt_seq_reachable(seq, n + 1));
        }
        assert_true(kvt_seq_reachable(seq, UINT64_MAX) == 600 + i);
        assert_true(kvt_seq_reachable(NULL, 1) == 0);
        /* Sinks are whole rows: as long as nothing behind them is needed. */
        assert_true(kvt_seq_reachable(seq, 300) == (i % 2 ? 128u : i % 3 ? 64u : 0u));
        expect(w.cache, KVT_ERR_STATE, kvt_read(seq, 0, KVT_SIDE_K, 200, 3, &out));
        expect_ok(w.cache, kvt_read(seq, 1, KVT_SIDE_K, 200, 3, &out));
        expect_ok(w.cache, kvt_read(seq, 0, KVT_SIDE_K, 600 - 100, 64, &out));
        expect_ok(w.cache, kvt_seq_truncate(seq, deepest));
        expect_ok(all.cache, kvt_seq_truncate(whole, deepest));
        while (kvt_seq_length(seq) < 700) {
            size_t n = 1 + rng_below(&r, 30);
            n = n < 700 - kvt_seq_length(seq) ? n : (size_t)(700 - kvt_seq_length(seq));
            if (kvt_seq_length(seq) > 600 + i)
                expect_masked(&w, seq, &all, whole);
            grow(&w, seq, n);
            grow(&all, whole, n);
        }
        expect_masked(&w, seq, &all, whole);
        if (i % 2) {
            expect_ok(w.cache, kvt_seq_truncate(seq, 100)); /* within the sinks */
            expect_ok(all.cache, kvt_seq_truncate(whole, 100));
            expect_masked(&w, seq, &all, whole);
            for (int step = 0; step < 5; step++) {
                grow(&w, seq, 90);
                grow(&all, whole, 90);
                expect_masked(&w, seq, &all, whole);
            }
        }
        kvt_seq_destroy(seq);
        kvt_seq_destroy(whole);
        kvt_cache_destroy(all.cache);
        close_subject(&w);
    }
}

/* A query farther back than what is there is refused, not answered with less. */
static void a_query_before_the_window_is_refused(void **state)
{
    rng r = {34};
    kvt_group_config g[2];
    float q[32 * 200], out[32 * 200];
    kvt_attend_item item = {0};
    kvt_attend_args args = kvt_attend_args_init();
    int32_t position;
    subject w;
    (void)state;
    memset(q, 0, sizeof q);
    windowed_groups(g, 100, 0, KVT_TYPE_I8);
    open_subject(&w, g, 2, &r);
    open_cache(&w, NULL);
    item.seq = seq_of(&w);
    for (size_t i = 0; i < 600; i++)
        grow(&w, (kvt_seq *)(uintptr_t)item.seq, 1);
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.flags = KVT_ATTEND_CAUSAL;
    item.n_queries = 64;
    expect_ok(w.cache, kvt_attend(w.cache, &args));
    item.n_queries = 200;
    expect(w.cache, KVT_ERR_STATE, kvt_attend(w.cache, &args));
    expect_error_text(w.cache, "released", "attend");
    args.layer = 1;
    expect_ok(w.cache, kvt_attend(w.cache, &args));
    args.layer = 0;
    item.n_queries = 1;
    item.query_positions = &position;
    position = 300;
    expect(w.cache, KVT_ERR_STATE, kvt_attend(w.cache, &args));
    position = (int32_t)first_kept(&w, item.seq, 64) + 99; /* sees what is above position - 100 */
    expect_ok(w.cache, kvt_attend(w.cache, &args));
    position--;
    expect(w.cache, KVT_ERR_STATE, kvt_attend(w.cache, &args));
    position = 10000; /* sees nothing */
    expect_ok(w.cache, kvt_attend(w.cache, &args));
    kvt_seq_destroy((kvt_seq *)(uintptr_t)item.seq);
    close_subject(&w);
}

/* ---- checkpoints ---- */

/*
 * A sequence of a model with a window goes on behind its checkpoint, in steps, with drafts and
 * forks, and comes back: bit for bit the one that has never gone on, whatever follows.
 */
static void check_return(uint64_t seed, size_t at, size_t more)
{
    rng r = {seed};
    kvt_group_config g[2];
    kvt_seq *seq, *stayed, *loaded, *copy = NULL;
    subject s;
    windowed_groups(g, 1 + rng_below(&r, 150), rng_below(&r, 2) * rng_below(&r, 100),
                    rng_below(&r, 3) ? KVT_TYPE_I8 : KVT_TYPE_F16);
    g[0].residual_tokens = rng_below(&r, 2) ? 0 : KVT_RESIDUAL_NONE;
    open_subject(&s, g, 2, &r);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    stayed = seq_of(&s);
    while (kvt_seq_length(seq) < at) {
        size_t n = 1 + rng_below(&r, 60), left = at - (size_t)kvt_seq_length(seq);
        n = n < left ? n : left;
        grow(&s, seq, n);
        grow(&s, stayed, n);
    }
    if (rng_below(&r, 2)) /* at the length that drafts were taken back to */
        for (int i = 0; i < 2; i++) {
            step_of(&s, i ? seq : stayed, MOST - 64, 40);
            expect_ok(s.cache, kvt_seq_truncate(i ? seq : stayed, at));
        }
    expect_ok(s.cache, kvt_seq_set_next_position(seq, (int32_t)at + 5));
    expect_ok(s.cache, kvt_seq_set_next_position(stayed, (int32_t)at + 5));
    expect_equal(&s, seq, stayed, "before a checkpoint", at);
    expect_ok(s.cache, kvt_seq_checkpoint(seq, "state", 5));
    expect_ok(s.cache, kvt_seq_checkpoint(stayed, "state", 5)); /* files have it */
    expect_equal(&s, seq, stayed, "a checkpoint", at);
    for (int round = 0; round < 2; round++) {
        size_t end = at + more;
        while (kvt_seq_length(seq) < end) {
            size_t n = 1 + rng_below(&r, 60), left = end - (size_t)kvt_seq_length(seq);
            step_of(&s, seq, MOST - 80, n < left ? n : left);
        }
        loaded = reloaded(&s, seq);
        expect_equal(&s, loaded, seq, "loaded, behind a checkpoint", at);
        expect_ok(s.cache, kvt_seq_truncate(loaded, at));
        assert_true(kvt_seq_next_position(loaded) == (int32_t)at + 5);
        expect_equal(&s, loaded, stayed, "loaded, then back at a checkpoint", at);
        if (round == 0) {
            kvt_seq_destroy(seq);
            seq = loaded;
        } else {
            grow(&s, loaded, 70);
            kvt_seq_destroy(loaded);
        }
        if (rng_below(&r, 2)) {
            end = (size_t)kvt_seq_length(seq);
            expect_ok(s.cache, kvt_seq_fork(seq, round ? at : end, &copy));
            if (round == 0)
                expect_ok(s.cache, kvt_seq_truncate(copy, at));
            expect_equal(&s, copy, stayed, "a fork at a checkpoint", at);
            assert_true(kvt_seq_next_position(copy) == (int32_t)at + 5);
            grow(&s, copy, 3);
            kvt_seq_destroy(copy);
        }
        expect_ok(s.cache, kvt_seq_truncate(seq, at));
        assert_true(kvt_seq_next_position(seq) == (int32_t)at + 5);
        expect_equal(&s, seq, stayed, "back at a checkpoint", at);
    }
    while (kvt_seq_length(seq) + 80 < MOST - 80 && kvt_seq_length(seq) < at + 300) {
        size_t n = 1 + rng_below(&r, 40);
        grow(&s, seq, n);
        grow(&s, stayed, n);
        expect_equal(&s, seq, stayed, "behind a checkpoint", at);
    }
    kvt_seq_destroy(stayed);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

static void a_checkpoint_is_what_was_there(void **state)
{
    rng r = {35};
    (void)state;
    for (uint64_t i = 0; i < (is_quick() ? 20 : 150); i++)
        check_return(i + 1, 1 + rng_below(&r, i % 2 ? 250 : 130), 1 + rng_below(&r, 300));
}

/* At the size of a real context: window 1024, a checkpoint at 8192, 4096 tokens more. */
static void back_over_4096_tokens(void **state)
{
    kvt_group_config g[2];
    kvt_config config = kvt_config_init();
    kvt_seq *seqs[2];
    uint64_t hashes[2];
    tokens t[2];
    rng r = {42};
    subject s;
    (void)state;
    windowed_groups(g, 1024, 4, KVT_TYPE_I8);
    memset(&s, 0, sizeof s);
    memcpy(s.groups, g, sizeof g);
    s.n_groups = 2;
    for (int i = 0; i < 2; i++)
        t[i] = tokens_make(&r, 512, &g[i]);
    config.groups = g;
    config.n_groups = 2;
    config.max_tokens = 16384;
    expect_ok(NULL, kvt_cache_create(&config, &s.cache));
    for (int i = 0; i < 2; i++) {
        uint64_t ends[4] = {8192, 8192 + 4096, 8192 + 700, 0};
        seqs[i] = seq_of(&s);
        for (int part = 0; part < 3; part++) {
            if (part == 1 && i == 0)
                continue; /* stays */
            while (kvt_seq_length(seqs[i]) < ends[part]) {
                size_t at = (size_t)(kvt_seq_length(seqs[i]) * (uint64_t)(part == 1 ? 3 : 1) % 400);
                expect_ok(s.cache, kvt_seq_begin(seqs[i], 100 + 12 * (part == 2), NULL));
                for (uint32_t layer = 0; layer < 2; layer++) {
                    const tokens *of = &t[layer];
                    kvt_tensor k = kvt_tensor_f32(of->k + at * of->k_dim);
                    kvt_tensor v = kvt_tensor_f32(of->v + at * of->v_dim);
                    expect_ok(s.cache, kvt_append(seqs[i], layer, &k, &v));
                }
                expect_ok(s.cache, kvt_seq_commit(seqs[i], NULL));
                if (part < 2 && kvt_seq_length(seqs[i]) > ends[part])
                    expect_ok(s.cache, kvt_seq_truncate(seqs[i], ends[part]));
            }
            if (part == 0)
                expect_ok(s.cache, kvt_seq_checkpoint(seqs[i], "8192", 4));
            if (part == 1)
                expect_ok(s.cache, kvt_seq_truncate(seqs[i], 8192));
            if (part != 1)
                hashes[i] = attend_hash(&s, seqs[i]);
            if (i == 1 && part == 1)
                assert_true(kvt_seq_length(seqs[1]) == 8192);
        }
    }
    assert_true(kvt_seq_length(seqs[0]) == kvt_seq_length(seqs[1]));
    assert_true(hashes[0] == hashes[1] && file_hash(&s, seqs[0]) == file_hash(&s, seqs[1]));
    for (int i = 0; i < 2; i++) {
        expect_ok(s.cache, kvt_seq_truncate(seqs[i], 8192)); /* once more */
        hashes[i] = attend_hash(&s, seqs[i]) ^ file_hash(&s, seqs[i]);
        tokens_free(&t[i]);
    }
    assert_true(hashes[0] == hashes[1]);
    kvt_seq_destroy(seqs[0]);
    kvt_seq_destroy(seqs[1]);
    kvt_cache_destroy(s.cache);
}

static size_t list(const subject *s, const kvt_seq *seq, uint64_t *at)
{
    size_t n = 0, all = 0;
    expect_ok(s->cache, kvt_seq_checkpoints(seq, NULL, 0, &all));
    expect_ok(s->cache, kvt_seq_checkpoints(seq, at, 16, &n));
    assert_true(n == all);
    return n;
}

static void checkpoints_are_listed_read_and_dropped(void **state)
{
    rng r = {36};
    kvt_group_config g[2];
    uint64_t at[16], before;
    char blob[32];
    kvt_seq *seq, *copy;
    size_t n;
    ledger memory;
    subject s;
    (void)state;
    ledger_init(&memory);
    windowed_groups(g, 60, 0, KVT_TYPE_I8);
    open_subject(&s, g, 2, &r);
    s.ledger = &memory;
    open_cache(&s, NULL);
    seq = seq_of(&s);
    assert_true(list(&s, seq, at) == 0);
    expect_ok(s.cache, kvt_seq_checkpoint(seq, NULL, 0)); /* the empty sequence */
    for (int i = 1; i <= 5; i++) {
        grow(&s, seq, 90);
        blob[0] = (char)i;
        expect_ok(s.cache, kvt_seq_checkpoint(seq, blob, (size_t)i));
    }
    assert_true(list(&s, seq, at) == 6 && at[0] == 0 && at[1] == 90 && at[5] == 450);
    assert_true(kvt_seq_reachable(seq, 300) == 270);
    assert_true(kvt_seq_reachable(seq, 270) == 270);
    assert_true(kvt_seq_reachable(seq, 269) == 180);
    expect(s.cache, KVT_ERR_STATE, kvt_seq_truncate(seq, 300));
    expect_error_text(s.cache, "270", "truncate");
    blob[0] = 77;
    expect_ok(s.cache, kvt_seq_checkpoint(seq, blob, 7)); /* in place of the last */
    assert_true(list(&s, seq, at) == 6);
    expect_ok(s.cache, kvt_seq_checkpoint_read(seq, 450, NULL, 0, &n));
    assert_true(n == 7);
    memset(blob, 0, sizeof blob);
    expect_ok(s.cache, kvt_seq_checkpoint_read(seq, 450, blob, sizeof blob, &n));
    assert_true(n == 7 && blob[0] == 77);
    expect_ok(s.cache, kvt_seq_checkpoint_read(seq, 0, blob, sizeof blob, &n));
    assert_true(n == 0);
    copy = NULL;
    expect_ok(s.cache, kvt_seq_fork(seq, 270, &copy));
    assert_true(list(&s, copy, at) == 4 && at[3] == 270);
    expect_ok(s.cache, kvt_seq_checkpoint_read(copy, 270, blob, sizeof blob, &n));
    assert_true(n == 3 && blob[0] == 3);
    expect_ok(s.cache, kvt_seq_checkpoint_drop(seq, 270));
    assert_true(list(&s, seq, at) == 5 && list(&s, copy, at) == 4);
    assert_true(kvt_seq_reachable(seq, 300) == 180);
    expect_ok(s.cache, kvt_seq_truncate(seq, 360));
    assert_true(list(&s, seq, at) == 4 && at[3] == 360);
    expect_ok(s.cache, kvt_seq_truncate(seq, 90));
    assert_true(list(&s, seq, at) == 2);
    expect_ok(s.cache, kvt_seq_clear(seq));
    assert_true(list(&s, seq, at) == 0);
    before = kvt_seq_memory_bytes(seq);
    expect_ok(s.cache, kvt_seq_checkpoint(seq, blob, 20));
    assert_true(kvt_seq_memory_bytes(seq) > before);
    expect_ok(s.cache, kvt_seq_checkpoint_drop(seq, 0));
    assert_true(kvt_seq_memory_bytes(seq) == before);
    kvt_seq_destroy(seq);
    assert_true(kvt_cache_memory_bytes(s.cache) == memory.live_bytes);
    kvt_seq_destroy(copy);
    close_subject(&s);
    ledger_close(&memory);
}

/* Bytes are counted once, however many checkpoints have a block. */
static void figures_count_what_is_pinned(void **state)
{
    rng r = {37};
    kvt_group_config g[2];
    kvt_cache_stats stats = {.struct_size = sizeof stats};
    kvt_seq_stats seq_stats = {.struct_size = sizeof seq_stats};
    kvt_seq *seq, *copy = NULL;
    uint64_t empty;
    subject s;
    (void)state;
    windowed_groups(g, 100, 0, KVT_TYPE_I8);
    open_subject(&s, g, 2, &r);
    open_cache(&s, NULL);
    empty = kvt_cache_memory_bytes(s.cache);
    seq = seq_of(&s);
    for (int i = 0; i < 6; i++) {
        grow(&s, seq, 100);
        expect_ok(s.cache, kvt_seq_checkpoint(seq, &r, sizeof r));
    }
    expect_ok(s.cache, kvt_cache_trim(s.cache));
    expect_ok(s.cache, kvt_seq_get_stats(seq, &seq_stats));
    expect_ok(s.cache, kvt_cache_get_stats(s.cache, &stats));
    assert_true(seq_stats.shared_bytes == 0);
    assert_true(seq_stats.own_bytes == stats.bytes - empty);
    expect_ok(s.cache, kvt_seq_fork(seq, 600, &copy));
    expect_ok(s.cache, kvt_cache_get_stats(s.cache, &stats));
    expect_ok(s.cache, kvt_seq_get_stats(seq, &seq_stats));
    assert_true(2 * seq_stats.own_bytes + seq_stats.shared_bytes == stats.bytes - empty);
    kvt_seq_destroy(copy);
    expect_ok(s.cache, kvt_seq_get_stats(seq, &seq_stats));
    assert_true(seq_stats.shared_bytes == 0);
    /* Without the checkpoints it is what it was without them. */
    while (kvt_seq_length(seq) < 601)
        grow(&s, seq, 1);
    for (uint64_t at = 100; at <= 600; at += 100)
        expect_ok(s.cache, kvt_seq_checkpoint_drop(seq, at));
    expect_ok(s.cache, kvt_cache_trim(s.cache));
    copy = seq_of(&s);
    grow(&s, copy, 601);
    expect_ok(s.cache, kvt_cache_trim(s.cache));
    assert_true(kvt_seq_memory_bytes(seq) <= kvt_seq_memory_bytes(copy));
    kvt_seq_destroy(seq);
    kvt_seq_destroy(copy);
    close_subject(&s);
}

static void errors_change_nothing(void **state)
{
    rng r = {38};
    kvt_group_config g[2];
    uint64_t at[16];
    size_t n;
    kvt_seq *seq;
    char blob[8] = "seven b";
    ledger memory;
    subject s;
    (void)state;
    ledger_init(&memory);
    windowed_groups(g, 60, 0, KVT_TYPE_I8);
    open_subject(&s, g, 2, &r);
    s.ledger = &memory;
    open_cache(&s, NULL);
    seq = seq_of(&s);
    grow(&s, seq, 200);
    assert_true(kvt_seq_checkpoint(NULL, NULL, 0) == KVT_ERR_ARG);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_checkpoint(seq, NULL, 1));
    expect(s.cache, KVT_ERR_LIMIT, kvt_seq_checkpoint(seq, blob, SIZE_MAX - 8));
    expect_ok(s.cache, kvt_seq_begin(seq, 1, NULL));
    expect(s.cache, KVT_ERR_STATE, kvt_seq_checkpoint(seq, blob, 1));
    expect_ok(s.cache, kvt_seq_abort(seq));
    assert_true(kvt_seq_checkpoints(NULL, at, 1, &n) == KVT_ERR_ARG);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_checkpoints(seq, NULL, 1, &n));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_checkpoints(seq, at, 1, NULL));
    assert_true(kvt_seq_checkpoint_read(NULL, 1, blob, 1, &n) == KVT_ERR_ARG);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_checkpoint_read(seq, 200, blob, 1, &n));
    expect_error_text(s.cache, "no checkpoint at 200", "read");
    expect(s.cache, KVT_ERR_ARG, kvt_seq_checkpoint_read(seq, 200, NULL, 1, &n));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_checkpoint_drop(seq, 200));
    assert_true(kvt_seq_checkpoint_drop(NULL, 0) == KVT_ERR_ARG);
    assert_true(list(&s, seq, at) == 0);
    for (int round = 0; round < 12; round++) {
        uint64_t before = file_hash(&s, seq), held = kvt_seq_memory_bytes(seq);
        size_t live = memory.live_bytes;
        for (long fail = 0;; fail++) {
            kvt_status status;
            memory.countdown = fail;
            status = kvt_seq_checkpoint(seq, blob, sizeof blob);
            memory.countdown = -1;
            if (status == KVT_OK)
                break;
            assert_true(status == KVT_ERR_MEMORY);
            assert_true(list(&s, seq, at) == (size_t)round);
            assert_true(memory.live_bytes <= live);
            assert_true(kvt_seq_memory_bytes(seq) == held);
            assert_true(file_hash(&s, seq) == before);
        }
        grow(&s, seq, 20);
    }
    kvt_seq_destroy(seq);
    close_subject(&s);
    ledger_close(&memory);
}

/*
 * An open block that is kept for a truncate is not held against the budget, nor is it when a
 * checkpoint that would share it gets no memory for the list.
 */
static void a_refused_checkpoint_keeps_the_exemption(void **state)
{
    rng r = {47};
    kvt_group_config g = group_of(1, 1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    ledger memory;
    subject s;
    (void)state;
    ledger_init(&memory);
    open_subject(&s, &g, 1, &r);
    s.ledger = &memory;
    for (int bounded = 0; bounded < 2; bounded++) {
        kvt_seq *seq;
        open_cache(&s, NULL);
        seq = seq_of(&s);
        for (size_t i = 0; i < 192; i++) { /* the last step has sealed tokens 64 .. 127 */
            grow(&s, seq, 1);
            if (i < 8)
                expect_ok(s.cache, kvt_seq_checkpoint(seq, NULL, 0));
        }
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        s.budget = kvt_cache_memory_bytes(s.cache) + 10000; /* and the open block */
        if (bounded) {
            const size_t room = room_of(&s);
            memory.countdown = 1;
            expect(s.cache, KVT_ERR_MEMORY, kvt_seq_checkpoint(seq, NULL, 0));
            memory.countdown = -1;
            expect_error_text(s.cache, "list of checkpoints", "refused");
            assert_true(room_of(&s) == room);
            expect_ok(s.cache, kvt_seq_checkpoint(seq, NULL, 0));
            assert_true(room_of(&s) < room);
        }
        kvt_seq_destroy(seq);
        kvt_cache_destroy(s.cache);
    }
    s.cache = NULL;
    close_subject(&s);
    ledger_close(&memory);
}

/* An open block that is kept for a truncate counts from the checkpoint on, which may be refused. */
static void a_pinned_open_block_is_not_exempt(void **state)
{
    rng r = {40};
    uint64_t most = 0;
    (void)state;
    for (int less = -1; less < 2; less++) {
        kvt_group_config g = group_of(2, 1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
        kvt_seq *seq;
        subject s;
        open_subject(&s, &g, 1, &r);
        s.budget = less < 0 ? 0 : most - (uint64_t)less;
        open_cache(&s, NULL);
        seq = seq_of(&s);
        for (size_t i = 0; i < 192; i++) /* the last step has sealed tokens 64 .. 127 */
            grow(&s, seq, 1);
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        expect(s.cache, less > 0 ? KVT_ERR_BUDGET : KVT_OK, kvt_seq_checkpoint(seq, &r, 8));
        most = less < 0 ? kvt_cache_memory_bytes(s.cache) : most;
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(outputs_are_those_of_a_mask),
        cmocka_unit_test(memory_does_not_grow),
        cmocka_unit_test(the_forecast_is_exact),
        cmocka_unit_test(a_budget_of_the_forecast_suffices),
        cmocka_unit_test(a_reserve_leaves_released_blocks),
        cmocka_unit_test(what_can_be_reached_is_said),
        cmocka_unit_test(a_query_before_the_window_is_refused),
        cmocka_unit_test(a_checkpoint_is_what_was_there),
        cmocka_unit_test(back_over_4096_tokens),
        cmocka_unit_test(checkpoints_are_listed_read_and_dropped),
        cmocka_unit_test(figures_count_what_is_pinned),
        cmocka_unit_test(a_pinned_open_block_is_not_exempt),
        cmocka_unit_test(a_refused_checkpoint_keeps_the_exemption),
        cmocka_unit_test(errors_change_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
