/*
 * src/attention/sight.c and cut.c: which blocks a window leaves in sight, that attention touches no
 * other, and that tasks have equal shares of what is in sight. Sees the library's own structures.
 */
#include "support.h"

#include <stdio.h>

#include "src/attention/attention.h"

/*
 * n tokens at these positions in steps of `step`, every third of which is taken back once. The
 * window is put in force behind, so that no commit releases a block.
 */
static kvt_seq *sequence(kvt_cache *cache, const int32_t *positions, size_t n, size_t step)
{
    kvt_group *group = &cache->groups[0];
    uint64_t window = group->window_tokens;
    size_t floats = step * group->config.n_kv_heads * (size_t)group->config.k_dim;
    float *rows = malloc(floats * sizeof *rows);
    kvt_tensor t = kvt_tensor_f32(rows);
    kvt_seq *seq = NULL;
    rng r = {n};
    for (size_t i = 0; i < floats; i++)
        rows[i] = (float)rng_normal(&r);
    group->window_tokens = UINT64_MAX;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    for (size_t i = 0, j = 0; i < n; i += step, j++)
        for (int again = j % 3 == 2; again >= 0; again--) {
            size_t count = n - i < step ? n - i : step;
            expect_ok(cache, kvt_seq_begin(seq, count, again ? NULL : positions + i));
            expect_ok(cache, kvt_append(seq, 0, &t, &t));
            expect_ok(cache, kvt_seq_commit(seq, NULL));
            if (again)
                expect_ok(cache, kvt_seq_truncate(seq, i));
        }
    group->window_tokens = window;
    free(rows);
    return seq;
}

static void fill_positions(rng *r, int how, size_t n, int32_t *positions)
{
    for (size_t i = 0; i < n; i++)
        positions[i] = how == 0   ? (int32_t)i
                       : how == 1 ? (int32_t)rng_below(r, (uint32_t)n)
                       : how == 2 ? (int32_t)(n - i)
                       : how == 3 ? (int32_t)(i / 100 % 3 * 1000 + i % 100)
                       : how == 4 ? (int32_t)(i * 9)
                                  : (i == n / 2 ? 1 << 24 : (int32_t)(i / 9));
}

/* Every row's verdict, the walk and the ranges against what the tokens say. */
static void check_sight(const kvt_group *group, const kvt_attend_item *item, uint64_t n,
                        uint64_t first, uint64_t last, uint64_t most, int bounds_exact)
{
    kvt_sight sight = kvt_sight_of(group, item, n, first, last, most);
    size_t rows = kvt_rows(most), seen_ranges = 0, next = 0;
    uint8_t range_seen[256] = {0};
    assert_int_equal(sight.end_row, rows);
    for (size_t row = 0; row < rows; row++) {
        size_t seen = 0, all = 0;
        kvt_sees sees = kvt_sight_sees(&sight, row);
        for (uint64_t t = (uint64_t)row * 64; t < most && t / 64 == row; t++)
            for (uint64_t query = first; query <= last; query++, all++) {
                int64_t distance = (int64_t)kvt_query_position(item, n, query) -
                                   kvt_seq_meta(item->seq, row)->positions[t % 64];
                seen += t < group->config.sink_tokens || group->config.window_tokens == 0 ||
                        distance < (int64_t)group->config.window_tokens;
            }
        assert_true(seen == 0 || sees != KVT_SEES_NONE);
        assert_true(seen == all || sees != KVT_SEES_ALL);
        if (bounds_exact && row + 1 < rows && row >= sight.sink_rows) {
            assert_true(sees != KVT_SEES_NONE || seen == 0);
            assert_true(seen > 0 || sees == KVT_SEES_NONE);
            assert_true(seen < all || sees == KVT_SEES_ALL);
        }
        if (sees == KVT_SEES_NONE)
            continue;
        assert_int_equal(kvt_sight_next(&sight, next), row);
        next = row + 1;
        range_seen[row / 16] = 1;
        assert_true(row < sight.sink_rows || row >= sight.first_row);
    }
    assert_int_equal(kvt_sight_next(&sight, next), rows);
    for (size_t range = 0; range < sight.ranges; range++) {
        size_t number = kvt_sight_range(&sight, range);
        assert_true(range == 0 || number > kvt_sight_range(&sight, range - 1));
        seen_ranges += range_seen[number];
        /* Sight begins and ends with a range that has something in it. */
        if (bounds_exact && (range == sight.sink_ranges || range == 0) && next > 0)
            assert_true(range_seen[number] || sight.first_row % 16);
    }
    for (size_t number = 0; number < 256; number++)
        seen_ranges -= range_seen[number];
    assert_int_equal(seen_ranges, 0); /* all of them are there */
}

static void rows_in_sight(void **state)
{
    enum { MOST = 5000 };
    int32_t *positions = malloc(MOST * sizeof *positions), q_positions[40];
    rng r = {5};
    (void)state;
    for (int trial = 0; trial < 300; trial++) {
        kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
        size_t n = 1 + rng_below(&r, MOST - 1), n_q = 1 + rng_below(&r, n < 40 ? (uint32_t)n : 40);
        int how = trial % 6;
        kvt_cache *cache;
        kvt_attend_item item = {.n_queries = n_q};
        uint64_t first = rng_below(&r, (uint32_t)n_q);
        uint64_t last = first + rng_below(&r, (uint32_t)(n_q - first));
        g.window_tokens = trial % 10 == 9 ? 0 : 1 + rng_below(&r, rng_below(&r, 2) ? 200 : 6000);
        g.sink_tokens = g.window_tokens && rng_below(&r, 2) ? rng_below(&r, 1500) : 0;
        cache = cache_of(&g, MOST, 1, NULL);
        fill_positions(&r, how, n, positions);
        for (size_t i = 0; i < n_q; i++)
            q_positions[i] = (int32_t)rng_below(&r, 2 * MOST);
        item.seq = sequence(cache, positions, n, 1 + rng_below(&r, 1000));
        for (int own = 0; own < 2; own++) {
            item.query_positions = own ? q_positions : NULL;
            check_sight(&cache->groups[0], &item, n, first, last, n, 1);
            check_sight(&cache->groups[0], &item, n, first, last, n - (n_q - 1 - last), 1);
        }
        if (!rng_below(&r, 3)) { /* the bounds may cover tokens that were cut off */
            n = n_q + rng_below(&r, (uint32_t)(n - n_q + 1));
            expect_ok(cache, kvt_seq_truncate((kvt_seq *)(uintptr_t)item.seq, n));
            item.query_positions = NULL;
            check_sight(&cache->groups[0], &item, n, first, last, n, 0);
        }
        kvt_seq_destroy((kvt_seq *)(uintptr_t)item.seq);
        kvt_cache_destroy(cache);
    }
    free(positions);
}

/* Attention over a sequence whose blocks out of sight have been taken from its table. */
static void blocks_out_of_sight_are_not_touched(void **state)
{
    enum { N = 6000 };
    static const size_t queries[] = {1, 1, 5, 200, 1500};
    int32_t *positions = malloc(N * sizeof *positions);
    rng r = {6};
    (void)state;
    for (int how = 0; how < 6; how++)
        for (int trial = 0; trial < 10; trial++) {
            size_t n_q = queries[trial % 5], heads = trial % 2 ? 1 : 4, n_left_out = 0;
            kvt_group_config g = group_of(1, 4, (uint32_t)heads, 32, 32, KVT_TYPE_I8, KVT_TYPE_I8);
            kvt_cache *cache;
            kvt_seq *seq;
            kvt_attend_item item = {.n_queries = n_q};
            kvt_attend_args args = kvt_attend_args_init();
            float *q = rng_normals(&r, n_q * 4 * 32), *out[2];
            kvt_block *taken[N / 64 + 1] = {0};
            kvt_sight sight;
            g.window_tokens = 1 + rng_below(&r, 1500);
            g.sink_tokens = trial % 3 ? 0 : 1 + rng_below(&r, 100);
            cache = cache_of(&g, N, 1, NULL);
            fill_positions(&r, how, N, positions);
            item.seq = seq = sequence(cache, positions, N, 2000);
            args.items = &item;
            args.n_items = 1;
            args.flags = how % 2 && trial % 4 ? 0 : KVT_ATTEND_CAUSAL;
            args.q = kvt_tensor_f32(q);
            sight = kvt_sight_of(&cache->groups[0], &item, N, 0, n_q - 1, N);
            for (int without = 0; without < 2; without++) {
                for (size_t row = 0; without && row < kvt_rows(N); row++)
                    if (kvt_sight_sees(&sight, row) == KVT_SEES_NONE) {
                        taken[row] = *kvt_seq_entry(seq, row, 0);
                        *kvt_seq_entry(seq, row, 0) = NULL;
                        n_left_out++;
                    }
                out[without] = calloc(n_q * 4 * 32, sizeof(float));
                args.out = kvt_tensor_f32(out[without]);
                if (trial < 5) {
                    expect_ok(cache, kvt_attend(cache, &args));
                } else {
                    kvt_attend_plan plan;
                    void *scratch;
                    args.n_threads = 4;
                    expect_ok(cache, kvt_attend_plan_init(&plan, cache, &args));
                    scratch = aligned_alloc(64, (plan.scratch_bytes + 63) / 64 * 64);
                    for (size_t i = 0; i < plan.n_tasks; i++)
                        expect_ok(cache, kvt_attend_task(&plan, scratch, i));
                    expect_ok(cache, kvt_attend_finish(&plan, scratch));
                    free(scratch);
                }
            }
            assert_true(how != 0 || n_left_out >= (N - 1500 - 1500 - 100) / 64 - 3);
            assert_memory_equal(out[0], out[1], n_q * 4 * 32 * sizeof(float));
            for (size_t row = 0; row < kvt_rows(N); row++)
                if (taken[row])
                    *kvt_seq_entry(seq, row, 0) = taken[row];
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
            free(q), free(out[0]), free(out[1]);
        }
    free(positions);
}

/* ---- shares of work ---- */

/* Tokens that chunk c of a causal or other call over n tokens, positions by index, reads. */
static double chunk_tokens(const kvt_group *group, size_t n, size_t n_q, size_t queries, size_t c,
                           int causal)
{
    size_t first = n - n_q + c * queries, last = n - n_q + (c + 1) * queries - 1;
    size_t begin = first + 1 > group->window_tokens ? first + 1 - (size_t)group->window_tokens : 0;
    size_t end = causal && last < n - 1 ? last + 1 : n;
    size_t sinks = begin < group->sink_tokens ? begin : (size_t)group->sink_tokens;
    return (double)(end - begin + sinks);
}

static void tasks_have_equal_shares(void **state)
{
    enum { N = 24000, THREADS = 4 };
    int32_t *positions = malloc(N * sizeof *positions);
    float *q = calloc(N * 4, 16 * sizeof *q);
    (void)state;
    for (size_t i = 0; i < N; i++)
        positions[i] = (int32_t)i;
    for (int trial = 0; trial < 16; trial++) {
        kvt_group_config g = group_of(1, 4, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F16);
        size_t n_q = trial & 1 ? N : N / 3, queries = 8, chunks;
        int causal = trial >> 1 & 1;
        kvt_cache *cache;
        kvt_attend_item item = {.n_queries = n_q};
        kvt_attend_args args = kvt_attend_args_init();
        kvt_attend_plan plan;
        kvt_cutter cutter;
        kvt_cut from, to;
        double sum = 0, worst = 0, *work;
        g.window_tokens = trial >> 2 & 1 ? 1000 : 5000;
        g.sink_tokens = trial >> 3 & 1 ? 300 : 0;
        cache = cache_of(&g, N, 1, NULL);
        item.seq = sequence(cache, positions, N, N);
        args.items = &item;
        args.n_items = 1;
        args.flags = causal ? KVT_ATTEND_CAUSAL : 0;
        args.q = kvt_tensor_f32(q);
        args.out = kvt_tensor_f32(q); /* never run */
        args.n_threads = THREADS;
        expect_ok(cache, kvt_attend_plan_init(&plan, cache, &args));
        chunks = plan.units_;
        assert_int_equal(chunks, (n_q + queries - 1) / queries);
        work = malloc(chunks * sizeof *work);
        for (size_t c = 0; c < chunks; c++)
            sum += work[c] = chunk_tokens(&cache->groups[0], N, n_q, queries, c, causal);
        kvt_cutter_begin(&cutter, &plan);
        from = kvt_cutter_next(&cutter, 0);
        for (size_t i = 0; i < plan.n_tasks; i++, from = to) {
            double share = 0;
            to = kvt_cutter_next(&cutter, i + 1);
            assert_true(to.unit >= from.unit && to.unit <= chunks);
            for (size_t c = from.unit; c < to.unit; c++)
                share += work[c];
            worst = share > worst ? share : worst;
        }
        assert_int_equal(to.unit, chunks);
        if (!(worst < 1.1 * sum / (double)plan.n_tasks))
            fail_msg("trial %d: a task has %g times its share", trial,
                     worst / (sum / (double)plan.n_tasks));
        /* What the estimate of time goes by. */
        assert_true((double)kvt_work_tokens(cache, &args, 0) < 1.1 * sum / (double)chunks + 64);
        assert_true((double)kvt_work_tokens(cache, &args, 0) > 0.9 * sum / (double)chunks - 64);
        free(work);
        kvt_seq_destroy((kvt_seq *)(uintptr_t)item.seq);
        kvt_cache_destroy(cache);
    }
    free(positions), free(q);
}

/* One unit that is cut at ranges: the tokens in sight of each task, sinks and edges counted. */
static void ranges_are_shared_out(void **state)
{
    enum { N = 40000 };
    int32_t *positions = malloc(N * sizeof *positions);
    float q[4 * 16] = {0};
    (void)state;
    for (size_t i = 0; i < N; i++)
        positions[i] = (int32_t)i;
    for (int trial = 0; trial < 12; trial++) {
        kvt_group_config g = group_of(1, 4, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F16);
        kvt_cache *cache;
        kvt_attend_item item = {.n_queries = 1};
        kvt_attend_args args = kvt_attend_args_init();
        kvt_attend_plan plan;
        kvt_cutter cutter;
        kvt_sight sight;
        kvt_cut from, to;
        size_t sum = 0, worst = 0, share;
        g.window_tokens = 12000 + 700 * (uint32_t)trial;
        g.sink_tokens = (const uint32_t[]){0, 4, 5000}[trial % 3];
        cache = cache_of(&g, N, 1, NULL);
        item.seq = sequence(cache, positions, N, N);
        args.items = &item;
        args.n_items = 1;
        args.q = args.out = kvt_tensor_f32(q);
        args.n_threads = 2 + (uint32_t)trial % 2;
        expect_ok(cache, kvt_attend_plan_init(&plan, cache, &args));
        sight = kvt_sight_of(&cache->groups[0], &item, N, 0, 0, N);
        kvt_cutter_begin(&cutter, &plan);
        from = kvt_cutter_next(&cutter, 0);
        for (size_t i = 0; i < plan.n_tasks; i++, from = to) {
            size_t end;
            to = kvt_cutter_next(&cutter, i + 1);
            end = to.unit > 0 ? sight.ranges : to.range;
            share = 0;
            for (size_t range = from.range; from.unit == 0 && range < end; range++)
                for (size_t row = kvt_sight_range(&sight, range) * 16, j = 0; j < 16; j++)
                    share +=
                        row + j < sight.end_row && kvt_sight_sees(&sight, row + j) != KVT_SEES_NONE;
            sum += share;
            worst = share > worst ? share : worst;
        }
        assert_in_range(sum, g.window_tokens / 64, (g.window_tokens + g.sink_tokens) / 64 + 3);
        share = sum / plan.n_tasks;
        if (worst > share + 16)
            fail_msg("trial %d: a task has %zu rows of %zu in %zu tasks", trial, worst, sum,
                     plan.n_tasks);
        kvt_seq_destroy((kvt_seq *)(uintptr_t)item.seq);
        kvt_cache_destroy(cache);
    }
    free(positions);
}

/* One query over many tokens is cut like one over its window, and needs the same scratch. */
static void one_query_costs_its_window(void **state)
{
    enum { LONG = 40000, WINDOW = 4096 };
    static const size_t counts[] = {WINDOW, LONG};
    int32_t *positions = malloc(LONG * sizeof *positions);
    float q[8 * 16] = {0};
    size_t scratch[2];
    kvt_attend_plan plans[2];
    (void)state;
    for (size_t i = 0; i < LONG; i++)
        positions[i] = (int32_t)i;
    for (size_t i = 0; i < 2; i++) {
        kvt_group_config g = group_of(1, 8, 2, 16, 16, KVT_TYPE_F16, KVT_TYPE_F16);
        kvt_cache *cache;
        kvt_attend_item item = {.n_queries = 1};
        kvt_attend_args args = kvt_attend_args_init();
        g.window_tokens = WINDOW;
        cache = cache_of(&g, LONG, 1, NULL);
        item.seq = sequence(cache, positions, counts[i], counts[i]);
        args.items = &item;
        args.n_items = 1;
        args.q = args.out = kvt_tensor_f32(q);
        args.n_threads = 4;
        expect_ok(cache, kvt_attend_plan_init(&plans[i], cache, &args));
        scratch[i] = kvt_attend_scratch_bytes(cache->groups, 1, i ? 1 << 20 : 3 * WINDOW, 4);
        kvt_seq_destroy((kvt_seq *)(uintptr_t)item.seq);
        kvt_cache_destroy(cache);
    }
    assert_true(plans[1].work_ >= plans[0].work_);
    assert_true((double)plans[1].work_ < 1.02 * (double)plans[0].work_);
    assert_true(plans[1].n_tasks <= plans[0].n_tasks + 2);
    assert_int_equal(scratch[0], scratch[1]);
    free(positions);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_in_sight),
        cmocka_unit_test(blocks_out_of_sight_are_not_touched),
        cmocka_unit_test(tasks_have_equal_shares),
        cmocka_unit_test(ranges_are_shared_out),
        cmocka_unit_test(one_query_costs_its_window),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
