/*
 * The working memory of saves, loads and visits: outside the budget, foretold by
 * kvt_working_forecast, and gone when the call has returned.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_support.h"

#include <stdio.h>
#include <unistd.h>

#define FILE_BUFFER_BYTES ((uint64_t)512 << 10) /* KVT_SNAP_AHEAD_BYTES */

static char path[64];

/* In place of the C library's, which may take memory that no allocator of a cache knows of. */
static size_t sorts;
void qsort(void *items, size_t n, size_t size, int (*compare)(const void *a, const void *b))
{
    (void)items, (void)n, (void)size, (void)compare;
    sorts++;
}

static uint64_t forecast_of(const model *m, uint64_t n_sequences, uint64_t n_tokens)
{
    kvt_group_config groups[2];
    kvt_config config = model_config(m, groups);
    uint64_t answer = 0;
    expect_ok(NULL, kvt_memory_forecast(&config, n_sequences, n_tokens, &answer));
    return answer;
}

static uint64_t working_of(const model *m, uint64_t n_tokens)
{
    kvt_group_config groups[2];
    kvt_config config = model_config(m, groups);
    uint64_t answer = 0;
    expect_ok(NULL, kvt_working_forecast(&config, n_tokens, &answer));
    return answer;
}

static kvt_save_options codec_of(uint32_t codec)
{
    kvt_save_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = codec;
    options.no_fsync = 1;
    return options;
}

static int visit_nothing(void *user, const kvt_token_view *token)
{
    *(uint64_t *)user += token->index < UINT64_MAX;
    return 0;
}

/* Of K all but the last. */
static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_F16, KVT_TYPE_F32, KVT_TYPE_I4, KVT_TYPE_I5};

/* Geometries that make different parts the largest: streams, tables, zstd, the file's buffers. */
static model geometry(size_t i)
{
    model m;
    switch (i) {
    case 0: m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8); break;
    case 1: m = model_of(2, 32, 128, 128, KVT_TYPE_I8, KVT_TYPE_I8); break;
    case 2: m = model_of(1, 64, 256, 64, KVT_TYPE_F32, KVT_TYPE_F16); break;
    case 3: m = model_of(2, 8, 64, 128, KVT_TYPE_I8, KVT_TYPE_F16); break;
    case 4:
        m = model_of(2, 1, 576, 512, KVT_TYPE_I8, KVT_TYPE_I8);
        m.groups[0].flags = KVT_GROUP_V_IN_K;
        break;
    case 5: m = model_of(4, 2, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16); break;
    case 6: m = model_of(2, 8, 128, 64, KVT_TYPE_I4, KVT_TYPE_I5); break;
    case 7: m = model_of(1, 1, 24, 40, KVT_TYPE_I8, KVT_TYPE_I4); break;
    default: m = model_of_two(); break;
    }
    return m;
}
#define N_GEOMETRIES 9

/* ---- the budget ---- */

/* The budget is what the sequences need and not a byte more; they are full. */
static void test_full_budget(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++)
        for (uint32_t codec = KVT_CODEC_AUTO; codec <= KVT_CODEC_ZSTD; codec++) {
            model m = geometry(i);
            kvt_save_options options = codec_of(codec);
            bytes stream;
            kvt_reader reader;
            kvt_load_result result;
            kvt_cache *cache;
            kvt_seq *seq, *more = NULL;
            uint64_t hash, visits = 0;
            ledger l;

            ledger_init(&l);
            m.ledger = &l;
            m.max_tokens = 256;
            m.budget_bytes = forecast_of(&m, 1, 192);
            cache = model_cache(&m);
            seq = model_seq(cache);
            model_append(&m, cache, seq, 192, 64);
            assert_true(kvt_cache_memory_bytes(cache) == m.budget_bytes);
            hash = state_hash(&m, cache, seq);

            expect_ok(cache, kvt_seq_save(seq, path, &options));
            stream = saved(cache, seq, codec);
            expect_ok(cache, kvt_visit(seq, 0, 0, 192, visit_nothing, &visits, NULL));
            assert_int_equal(visits, 192);
            assert_true(kvt_cache_memory_bytes(cache) == m.budget_bytes);

            /* Blocks are held to the budget as before: there is none for a second copy. */
            expect(cache, KVT_ERR_BUDGET, kvt_seq_load(seq, path, NULL, NULL));
            assert_true(state_hash(&m, cache, seq) == hash);
            expect_ok(cache, kvt_seq_clear(seq));
            expect_ok(cache, kvt_seq_load(seq, path, NULL, &result));
            assert_int_equal(result.n_tokens, 192);
            assert_true(state_hash(&m, cache, seq) == hash);
            expect_ok(cache, kvt_seq_clear(seq));
            reader = bytes_reader(&stream);
            expect_ok(cache, kvt_seq_load_stream(seq, &reader, NULL, NULL));
            assert_true(state_hash(&m, cache, seq) == hash);
            bytes_free(&stream);

            /* What the calls have held does not count for those that follow. */
            if (m.groups[0].k_type < KVT_TYPE_I8) { /* which has an open block beside the budget */
                expect(cache, KVT_ERR_BUDGET, kvt_seq_begin(seq, 1, NULL));
                expect(cache, KVT_ERR_BUDGET, kvt_seq_create(cache, &more));
            }
            assert_true(kvt_cache_memory_bytes(cache) == m.budget_bytes);
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
            ledger_close(&l);
            assert_int_equal(unlink(path), 0);
        }
}

/* Calls of others while a save holds its working memory: they have the whole budget, no more. */
typedef struct meanwhile {
    kvt_cache *cache;
    kvt_seq *second, *third;
    uint64_t kept, most;
    kvt_status created, refused;
} meanwhile;

static int write_meanwhile(void *user, const void *data, size_t n)
{
    meanwhile *w = user;
    (void)data, (void)n;
    if (!w->second) {
        w->most = kvt_cache_memory_bytes(w->cache);
        w->created = kvt_seq_create(w->cache, &w->second);
        w->refused = kvt_seq_create(w->cache, &w->third);
    }
    return 0;
}

static int visit_meanwhile(void *user, const kvt_token_view *token)
{
    return write_meanwhile(user, token, 0);
}

static void test_others_meanwhile(void **state)
{
    (void)state;
    for (int visits = 0; visits < 2; visits++) {
        model m = model_of(2, 8, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16);
        meanwhile w = {NULL, NULL, NULL, 0, 0, KVT_ERR_ARG, KVT_ERR_ARG};
        kvt_writer writer = {&w, write_meanwhile};
        kvt_seq *seq;

        m.budget_bytes = forecast_of(&m, 1, 192) + forecast_of(&m, 1, 0) - forecast_of(&m, 0, 0);
        w.cache = model_cache(&m);
        seq = model_seq(w.cache);
        model_append(&m, w.cache, seq, 192, 64);
        w.kept = kvt_cache_memory_bytes(w.cache);
        if (visits)
            expect_ok(w.cache, kvt_visit(seq, 0, 0, 10, visit_meanwhile, &w, NULL));
        else
            expect_ok(w.cache, kvt_seq_save_stream(seq, &writer, NULL));
        expect_ok(w.cache, w.created);
        assert_int_equal(w.refused, KVT_ERR_BUDGET);
        assert_true(w.most > w.kept); /* counted while it lasts */
        assert_true(kvt_cache_memory_bytes(w.cache) == m.budget_bytes);
        kvt_seq_destroy(seq);
        kvt_seq_destroy(w.second);
        kvt_cache_destroy(w.cache);
    }
}

/* Calls that run out of memory on the way leave the budget as it was, too. */
static void test_failures(void **state)
{
    model m = model_of(2, 8, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_cache *cache;
    kvt_seq *seq;
    ledger l;
    (void)state;

    ledger_init(&l);
    m.ledger = &l;
    m.budget_bytes = forecast_of(&m, 1, 128);
    cache = model_cache(&m);
    seq = model_seq(cache);
    model_append(&m, cache, seq, 128, 64);
    for (long n = 0;; n++) {
        kvt_seq *more = NULL;
        kvt_status status;
        l.countdown = n;
        status = kvt_seq_save(seq, path, NULL);
        l.countdown = -1;
        expect(cache, KVT_ERR_BUDGET, kvt_seq_create(cache, &more));
        expect(cache, KVT_ERR_BUDGET, kvt_seq_begin(seq, 1, NULL));
        assert_true(kvt_cache_memory_bytes(cache) == m.budget_bytes);
        if (status == KVT_OK)
            break;
        expect(cache, KVT_ERR_MEMORY, status);
    }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    ledger_close(&l);
    assert_int_equal(unlink(path), 0);
}

/*
 * A section that says it is large, in a stream that ends: memory grows with what has arrived. What
 * is native is read into its block, whose size is the geometry's.
 */
static void test_cut_section(void **state)
{
    (void)state;
    for (int native = 0; native < 2; native++) {
        model m = geometry(2); /* a layer of 4.5 MiB */
        kvt_cache *cache;
        kvt_seq *seq;
        bytes file;
        size_t at, payload, before, block;
        ledger l;

        ledger_init(&l);
        m.ledger = &l;
        cache = model_cache(&m);
        seq = model_seq(cache);
        model_append(&m, cache, seq, 64, 64);
        file = saved(cache, seq, native ? KVT_CODEC_RAW : KVT_CODEC_ZSTD);
        at = section_payload(file.data, file.n, native ? 13 : 5, 0, &payload);
        assert_true(payload > 3000000);
        block = native ? payload + 100000 : 0;
        before = l.live_bytes;
        for (size_t have = 0; have < payload; have += have < 1000000 ? 999999 : 1500000) {
            l.peak_bytes = before;
            expect(cache, KVT_ERR_CORRUPT, load_bytes(seq, file.data, at + have, NULL));
            /* at most twice what the buffer has had to be, and what is small */
            assert_true(l.peak_bytes - before < 3 * have + block + ((size_t)1 << 20) + 200000);
        }
        bytes_free(&file);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        ledger_close(&l);
    }
}

/* ---- the forecast ---- */

/* Most bytes beyond what is kept that a save, or a load into an empty sequence, has held. */
static uint64_t peak_of(const model *m, uint64_t n, uint32_t codec)
{
    kvt_save_options options = codec_of(codec);
    kvt_cache *cache = model_cache(m);
    kvt_seq *seq = model_seq(cache);
    uint64_t most = 0, visits = 0;
    size_t before;

    model_append(m, cache, seq, (size_t)n, 2048);
    before = m->ledger->live_bytes;
    assert_true(before == kvt_cache_memory_bytes(cache));
    m->ledger->peak_bytes = before;
    expect_ok(cache, kvt_seq_save(seq, path, &options));
    most = m->ledger->peak_bytes - before;
    m->ledger->peak_bytes = before;
    expect_ok(cache, kvt_visit(seq, 0, 0, n, visit_nothing, &visits, NULL));
    assert_true(m->ledger->peak_bytes - before <= most);
    expect_ok(cache, kvt_seq_clear(seq));
    m->ledger->peak_bytes = before;
    expect_ok(cache, kvt_seq_load(seq, path, NULL, NULL)); /* the blocks are there already */
    if (m->ledger->peak_bytes - before > most)
        most = m->ledger->peak_bytes - before;
    assert_int_equal(m->ledger->live_bytes, before);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    assert_int_equal(unlink(path), 0);
    return most;
}

static void test_forecast(void **state)
{
    static const uint64_t lengths[] = {0, 1, 64, 65, 300, 17000, 140000};
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        uint64_t before = 0;
        for (size_t j = 0; j < sizeof lengths / sizeof lengths[0]; j++) {
            model m = geometry(i);
            uint64_t n = lengths[j], peak = 0, forecast;
            ledger l;

            if (n > 300 && (i > 0 || is_quick())) /* long: the geometry of the least bytes */
                break;
            ledger_init(&l);
            m.ledger = &l;
            m.max_tokens = 150000;
            for (uint32_t codec = KVT_CODEC_AUTO; codec <= KVT_CODEC_ZSTD; codec++) {
                uint64_t one = peak_of(&m, n, codec);
                peak = one > peak ? one : peak;
            }
            ledger_close(&l);
            forecast = working_of(&m, n);
            if (getenv("KVT_TEST_VERBOSE"))
                printf("geometry %zu, %llu tokens: peak %llu, forecast %llu\n", i,
                       (unsigned long long)n, (unsigned long long)peak,
                       (unsigned long long)forecast);
            /* A file's buffer is foretold whole; a small file takes as much as it has bytes. */
            if (peak > forecast || (n >= 64 && forecast > 2 * peak + FILE_BUFFER_BYTES))
                fail_msg("geometry %zu, %llu tokens: %llu bytes foretold, %llu used", i,
                         (unsigned long long)n, (unsigned long long)forecast,
                         (unsigned long long)peak);
            assert_true(forecast >= before); /* "up to n_tokens" */
            before = forecast;
        }
    }
}

/* Several threads: each has layers of its own in work. (More than there are CPUs take no more than
   these: the forecast is of a machine that has them.) */
static void test_forecast_of_threads(void **state)
{
    uint64_t last = 0;
    (void)state;
    for (uint32_t n_threads = 1; n_threads <= 32; n_threads *= 2) {
        model m = model_of(40, 2, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
        uint64_t forecast, peak = 0;
        ledger l;
        if (pool_threads(n_threads) != n_threads)
            break;
        ledger_init(&l);
        m.ledger = &l;
        m.n_threads = n_threads;
        for (uint32_t codec = KVT_CODEC_AUTO; codec <= KVT_CODEC_ZSTD; codec++) {
            uint64_t one = peak_of(&m, 300, codec);
            peak = one > peak ? one : peak;
        }
        ledger_close(&l);
        forecast = working_of(&m, 300);
        if (getenv("KVT_TEST_VERBOSE"))
            printf("%u threads: peak %llu, forecast %llu\n", n_threads, (unsigned long long)peak,
                   (unsigned long long)forecast);
        if (peak > forecast || (peak > last && forecast > 2 * peak + FILE_BUFFER_BYTES))
            fail_msg("%u threads: %llu bytes foretold, %llu used", n_threads,
                     (unsigned long long)forecast, (unsigned long long)peak);
        last = peak;
    }
}

/*
 * Layers of a group that is left out are verified: a load of the others takes up to what it would
 * in a cache of all, and refuses such as are far larger than those that are wanted.
 */
static void test_layers_left_out(void **state)
{
    static const struct {
        uint32_t heads, dim; /* of the group that is left out: a layer of 0.5 KiB times both */
        uint32_t wanted_dim; /* of the other: 0.25 KiB times it */
        kvt_status status;
    } cases[] = {
        {16, 512, 8, KVT_OK},          {33, 256, 8, KVT_ERR_LIMIT},   {17, 512, 8, KVT_ERR_LIMIT},
        {17, 512, 272, KVT_OK},        {16, 544, 256, KVT_ERR_LIMIT}, {9, 1024, 256, KVT_ERR_LIMIT},
        {256, 1024, 8, KVT_ERR_LIMIT},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        static const uint32_t last[] = {1};
        model both = model_of(1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16), m;
        kvt_load_options o;
        kvt_cache *cache;
        kvt_seq *seq;
        size_t before;
        uint64_t hash;
        bytes file;
        ledger l;

        both.groups[0].n_q_heads = both.groups[0].n_kv_heads = cases[i].heads;
        both.groups[0].k_dim = both.groups[0].v_dim = cases[i].dim;
        both.groups[0].k_type = both.groups[0].v_type = KVT_TYPE_F32;
        both.groups[1] =
            model_of(1, 1, cases[i].wanted_dim, cases[i].wanted_dim, KVT_TYPE_F16, KVT_TYPE_F16)
                .groups[0];
        both.layers[1][0] = 1;
        both.n_groups = 2;
        cache = model_cache(&both);
        seq = model_seq(cache);
        model_append(&both, cache, seq, 1, 1);
        file = saved(cache, seq, KVT_CODEC_ZSTD);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);

        ledger_init(&l);
        m = model_of(1, 1, cases[i].wanted_dim, cases[i].wanted_dim, KVT_TYPE_F16, KVT_TYPE_F16);
        m.ledger = &l;
        cache = model_cache(&m);
        seq = model_seq(cache);
        model_append(&m, cache, seq, 3, 3);
        hash = state_hash(&m, cache, seq);
        memset(&o, 0, sizeof o);
        o.struct_size = sizeof o;
        o.layers = last;
        o.n_layers = 1;
        before = l.peak_bytes = l.live_bytes;
        expect(cache, cases[i].status, kvt_seq_load_memory(seq, file.data, file.n, &o, NULL));
        assert_true(l.peak_bytes - before < 20000 + forecast_of(&m, 0, 1) + working_of(&both, 1));
        if (cases[i].status != KVT_OK) {
            assert_true(l.peak_bytes - before < 100000);
            assert_true(state_hash(&m, cache, seq) == hash);
            expect_error_text(cache, "a layer of group 0", "a layer that is too large");
        }
        bytes_free(&file);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        ledger_close(&l);
    }
}

/* Appends n tokens of zeros, with ids and positions that a codec makes smaller. */
static void append_zeros(kvt_cache *cache, kvt_seq *seq, size_t n, rng *r)
{
    float *zeros = calloc(n * 8, sizeof *zeros);
    int32_t *ids = calloc(n, sizeof *ids), *positions = calloc(n, sizeof *positions);
    kvt_tensor view = kvt_tensor_f32(zeros);

    assert_true(zeros && ids && positions);
    for (size_t i = 0; i < n; i++) {
        ids[i] = (int32_t)rng_below(r, 1 << 20);
        positions[i] = (int32_t)rng_below(r, 1 << 20);
    }
    expect_ok(cache, kvt_seq_begin(seq, n, positions));
    expect_ok(cache, kvt_append(seq, 0, &view, &view));
    expect_ok(cache, kvt_seq_commit(seq, ids));
    free(zeros);
    free(ids);
    free(positions);
}

/* What the parents of a delta add: buffers for one of them, and little for each. */
static void test_parents(void **state)
{
    enum { MOST_PARENTS = 24, LONG = 16384 };
    char names[MOST_PARENTS + 1][90];
    (void)state;
    for (size_t n_parents = 1; n_parents <= MOST_PARENTS; n_parents += MOST_PARENTS - 1) {
        model m = model_of(1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
        kvt_save_options o = codec_of(KVT_CODEC_ZSTD);
        uint64_t blocks = 0, bound;
        rng r = {17};
        kvt_cache *cache;
        kvt_seq *seq, *to;
        size_t before;
        ledger l;

        ledger_init(&l);
        m.ledger = &l;
        m.max_tokens = 20000;
        cache = model_cache(&m);
        seq = model_seq(cache);
        to = model_seq(cache);
        for (size_t i = 0; i <= n_parents; i++) {
            (void)snprintf(names[i], sizeof names[i], "%s.%zu", path, i);
            if (i < n_parents) /* each has a section of which its child inherits 64 tokens */
                append_zeros(cache, seq, LONG, &r);
            blocks += kvt_seq_length(seq) / 64;
            expect_ok(cache, kvt_seq_save(seq, names[i], &o));
            o.parent = names[i];
            expect_ok(cache, kvt_seq_truncate(seq, 64 * (i + 1) < 64 * n_parents ? 64 * (i + 1)
                                                                                 : 64 * n_parents));
        }
        expect_ok(cache, kvt_seq_load(to, names[n_parents], NULL, NULL));
        assert_int_equal(kvt_seq_length(to), 64 * n_parents);
        expect_ok(cache, kvt_seq_clear(to));
        before = l.peak_bytes = l.live_bytes;
        expect_ok(cache, kvt_seq_load(to, names[n_parents], NULL, NULL));
        bound = working_of(&m, 64 * n_parents) + 1024 * (300 + 80 * n_parents) + 120 * blocks;
        if (l.peak_bytes - before > bound)
            fail_msg("%zu parents: %llu bytes foretold, %zu used", n_parents,
                     (unsigned long long)bound, l.peak_bytes - before);
        for (size_t i = 0; i <= n_parents; i++)
            assert_int_equal(unlink(names[i]), 0);
        kvt_seq_destroy(to);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        ledger_close(&l);
    }
}

/* Nothing is sorted in memory that is not counted: names of pieces, the blocks of a parent. */
static void test_sorts(void **state)
{
    static const kvt_snapshot_piece pieces[] = {{"c", "", 0}, {"a", "", 0}, {"b", "", 0}};
    model m = geometry(0);
    kvt_save_options o = codec_of(KVT_CODEC_RAW);
    char delta[80];
    kvt_cache *cache = model_cache(&m);
    kvt_seq *seq = model_seq(cache), *to = model_seq(cache);
    (void)state;
    (void)snprintf(delta, sizeof delta, "%s.delta", path);
    model_append(&m, cache, seq, 200, 64);
    sorts = 0;
    o.pieces = pieces;
    o.n_pieces = 3;
    expect_ok(cache, kvt_seq_save(seq, path, &o));
    o.parent = path;
    expect_ok(cache, kvt_seq_save(seq, delta, &o));
    expect_ok(cache, kvt_seq_load(to, delta, NULL, NULL));
    assert_int_equal(sorts, 0);
    assert_true(state_hash(&m, cache, to) == state_hash(&m, cache, seq));
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(unlink(delta), 0);
}

/* Types and head counts at random, few tokens: the bound holds for any of them. */
static void test_forecast_random(void **state)
{
    rng r = {7};
    (void)state;
    for (int round = 0; round < (is_quick() ? 10 : 150); round++) {
        model m =
            model_of(1 + rng_below(&r, 3), 1 + rng_below(&r, 40), 8 * (1 + rng_below(&r, 32)),
                     8 * (1 + rng_below(&r, 32)), types[rng_below(&r, 4)], types[rng_below(&r, 5)]);
        uint64_t n = 1 + rng_below(&r, 130), peak, forecast;
        ledger l;

        ledger_init(&l);
        m.ledger = &l;
        peak = peak_of(&m, n, round % 2 ? KVT_CODEC_RAW : KVT_CODEC_ZSTD);
        forecast = working_of(&m, n);
        if (peak > forecast)
            fail_msg("round %d: %llu bytes foretold, %llu used", round,
                     (unsigned long long)forecast, (unsigned long long)peak);
        ledger_close(&l);
    }
}

static void test_forecast_arguments(void **state)
{
    model m = model_of_two();
    kvt_group_config groups[2];
    kvt_config config = model_config(&m, groups);
    uint64_t answer = 77;
    char text[256] = "";
    (void)state;

    config.error_text = text;
    config.error_text_bytes = sizeof text;
    expect(NULL, KVT_ERR_ARG, kvt_working_forecast(NULL, 1, &answer));
    expect(NULL, KVT_ERR_ARG, kvt_working_forecast(&config, 1, NULL));
    expect(NULL, KVT_ERR_LIMIT, kvt_working_forecast(&config, m.max_tokens + 1, &answer));
    assert_non_null(strstr(text, "max_tokens"));
    config.n_groups = 0;
    expect(NULL, KVT_ERR_ARG, kvt_working_forecast(&config, 1, &answer));
    config.struct_size = 1;
    expect(NULL, KVT_ERR_ARG, kvt_working_forecast(&config, 1, &answer));
    assert_int_equal(answer, 77);

    /* The largest configuration there is does not overflow. */
    config = model_config(&m, groups);
    config.n_groups = 1;
    groups[0] = group_of(KVT_MAX_LAYERS, KVT_MAX_HEADS, KVT_MAX_HEADS, KVT_MAX_DIM, KVT_MAX_DIM,
                         KVT_TYPE_F32, KVT_TYPE_F32);
    config.max_tokens = KVT_MAX_TOKENS;
    expect_ok(NULL, kvt_working_forecast(&config, KVT_MAX_TOKENS, &answer));
    assert_true(answer > (uint64_t)1 << 30 && answer < (uint64_t)1 << 33);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_budget),     cmocka_unit_test(test_others_meanwhile),
        cmocka_unit_test(test_failures),        cmocka_unit_test(test_cut_section),
        cmocka_unit_test(test_forecast),        cmocka_unit_test(test_forecast_of_threads),
        cmocka_unit_test(test_forecast_random), cmocka_unit_test(test_forecast_arguments),
        cmocka_unit_test(test_sorts),           cmocka_unit_test(test_layers_left_out),
        cmocka_unit_test(test_parents),
    };
    (void)snprintf(path, sizeof path, "test_snapshot_working-%ld.kvt", (long)getpid());
    return cmocka_run_group_tests(tests, NULL, NULL);
}
