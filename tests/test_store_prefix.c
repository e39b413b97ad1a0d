/*
 * Prefixes in a store: what is got is what was put, and only by who has the same prompt.
 */
#include "prefix_scene.h"

#include <stdio.h>
#include <unistd.h>

/* A sequence of a subject's that has been put as it grew. */
static kvt_seq *put_all(const subject *s, const kvt_store *store, kvt_prefix_result *result)
{
    kvt_seq *seq = seq_of(s);
    while (kvt_seq_length(seq) < MOST) {
        grow(s, seq, 40);
        expect_ok(s->cache, kvt_prefix_put(store, seq, NULL, result));
    }
    return seq;
}

static void round_trip(const subject *s, const char *name, size_t part_bytes, int places)
{
    memory_store m;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[MOST + 1];
    kvt_prefix_result put, got, probed;
    kvt_seq *seq, *to, *like;
    uint64_t expected = sealed_tokens(s, MOST);

    make_prompt(prompt, MOST + 1);
    seq = put_all(s, &store, &put);
    assert_int_equal(put.n_tokens, expected);
    m.part_bytes = part_bytes;
    m.places = places;
    to = seq_of(s);
    expect_ok(s->cache, kvt_prefix_probe(&store, to, prompt, MOST, NULL, &probed));
    expect_ok(s->cache, kvt_prefix_get(&store, to, prompt, MOST, NULL, &got));
    if (got.n_tokens != expected || probed.n_tokens != expected || got.n_refused)
        fail_msg("%s: %u tokens got, %u probed, of %u; %u refused", name, (unsigned)got.n_tokens,
                 (unsigned)probed.n_tokens, (unsigned)expected, (unsigned)got.n_refused);
    assert_int_equal(kvt_seq_length(to), expected);
    like = sequence_cut(s, expected);
    expect_equal(s, to, like, name, part_bytes);
    /* Both go on alike, and are put alike: there is nothing new. */
    grow(s, to, (size_t)(MOST - expected));
    grow(s, like, (size_t)(MOST - expected));
    expect_equal(s, to, like, name, part_bytes);
    expect_ok(s->cache, kvt_prefix_put(&store, to, NULL, &put));
    assert_int_equal(put.n_values, 0);
    assert_int_equal(put.n_tokens, expected);
    kvt_seq_destroy(like);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    memory_store_free(&m);
}

static void test_round_trips(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        static const size_t sizes[] = {0, 1000, 100000, 64};
        rng r = {i + 1};
        subject s;
        kvt_group_config groups[2] = {geometry_group(i), geometry_group((i + 5) % N_GEOMETRIES)};
        open_subject(&s, groups, i % 3 == 1 ? 2 : 1, &r);
        open_cache(&s, NULL);
        for (size_t j = 0; j < 8; j++)
            round_trip(&s, geometry_name(i), sizes[j / 2], (int)(j % 2));
        close_subject(&s);
    }
}

/* ---- prompts ---- */

static void test_prompts_that_leave(void **state)
{
    prefix_scene c;
    (void)state;
    prefix_open(&c, 0, TOKENS);
    for (size_t at = 0; at < TOKENS; at++) {
        const uint64_t expected = at < SEALED ? at / 64 * 64 : SEALED;
        c.prompt[at] ^= 1 << 20;
        assert_int_equal(prefix_get(&c, c.prompt, TOKENS, NULL), expected);
        c.prompt[at] ^= 1 << 20;
    }
    prefix_close(&c);
}

/* The last token is to be computed. */
static void test_lengths_of_prompts(void **state)
{
    prefix_scene c;
    (void)state;
    prefix_open(&c, 0, TOKENS);
    assert_int_equal(prefix_get(&c, NULL, 0, NULL), 0);
    for (uint64_t n = 0; n <= MOST; n++) {
        const uint64_t expected = n == 0 ? 0 : (n - 1) / 64 * 64;
        assert_int_equal(prefix_get(&c, c.prompt, n, NULL), expected < SEALED ? expected : SEALED);
    }
    prefix_close(&c);
}

static void test_max_tokens(void **state)
{
    static const uint64_t most[] = {1, 63, 64, 65, 130, 192, 200};
    prefix_scene c;
    (void)state;
    prefix_open(&c, 0, TOKENS);
    for (size_t i = 0; i < sizeof most / sizeof *most; i++) {
        kvt_config config = c.s.config;
        kvt_prefix_result got;
        kvt_cache *cache;
        kvt_seq *seq;
        config.max_tokens = most[i];
        expect_ok(NULL, kvt_cache_create(&config, &cache));
        expect_ok(cache, kvt_seq_create(cache, &seq));
        expect_ok(cache, kvt_prefix_get(&c.store, seq, c.prompt, MOST, NULL, &got));
        assert_int_equal(got.n_tokens, most[i] / 64 * 64);
        assert_int_equal(kvt_seq_length(seq), most[i] / 64 * 64);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    prefix_close(&c);
}

/* ---- what is put ---- */

/* However the tokens were cut into steps. */
static void test_cuts(void **state)
{
    (void)state;
    for (size_t geometry = 0; geometry < 7; geometry++) {
        static const size_t steps[] = {1, 7, 64, 100, 500};
        prefix_scene c;
        prefix_open(&c, geometry, 500);
        for (size_t i = is_quick() ? 2 : 0; i < 5; i++) {
            memory_store m;
            kvt_store store = memory_store_open(&m);
            kvt_seq *seq = seq_of(&c.s);
            while (kvt_seq_length(seq) < 500)
                grow(&c.s, seq,
                     500 - kvt_seq_length(seq) < steps[i] ? (size_t)(500 - kvt_seq_length(seq))
                                                          : steps[i]);
            expect_ok(c.s.cache, kvt_prefix_put(&store, seq, NULL, NULL));
            assert_int_equal(m.n, c.m.n);
            for (size_t j = 0; j < m.n; j++) {
                const memory_value *v = memory_store_find(&c.m, &m.values[j].key);
                assert_non_null(v);
                assert_int_equal(v->bytes, m.values[j].bytes);
                assert_memory_equal(v->data, m.values[j].data, v->bytes);
            }
            kvt_seq_destroy(seq);
            memory_store_free(&m);
        }
        prefix_close(&c);
    }
}

static void test_ids_missing(void **state)
{
    static const size_t at[] = {0, 63, 64, 130, 191, 192};
    (void)state;
    for (size_t i = 0; i < 6; i++) {
        int32_t ids[TOKENS];
        kvt_prefix_result put;
        prefix_scene c;
        prefix_open(&c, 0, 0);
        make_prompt(ids, TOKENS);
        ids[at[i]] = KVT_TOKEN_NONE;
        expect_ok(c.s.cache, kvt_seq_begin(c.source, TOKENS, NULL));
        append_layers(&c.s, c.source, 0);
        expect_ok(c.s.cache, kvt_seq_commit(c.source, ids));
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &put));
        assert_int_equal(put.n_tokens, at[i] / 64 * 64);
        assert_int_equal(put.n_values, at[i] / 64);
        assert_int_equal(c.m.n, at[i] / 64);
        prefix_close(&c);
    }
}

/* Tokens behind a removal are not put, whether their positions have moved or not. */
static void test_removals(void **state)
{
    (void)state;
    for (int kind = 0; kind < 4; kind++) { /* RoPE: not known; described; positions all equal */
        kvt_prefix_options options = prefix_options();
        kvt_group_config group = geometry_group(0);
        int32_t positions[MOST], ids[MOST];
        kvt_prefix_result put;
        memory_store m;
        kvt_store store = memory_store_open(&m);
        subject s;
        rng r = {4};
        kvt_seq *seq, *fork, *to;

        if (kind)
            group.rope_pairing = KVT_ROPE_NONE;
        open_subject(&s, &group, 1, &r);
        open_cache(&s, NULL);
        seq = seq_of(&s);
        for (int i = 0; i < MOST; i++)
            positions[i] = kind == 2 ? 5 : i;
        make_prompt(ids, MOST);
        expect_ok(s.cache, kvt_seq_begin(seq, 600, positions));
        append_layers(&s, seq, 0);
        expect_ok(s.cache, kvt_seq_commit(seq, ids));
        expect_ok(s.cache, kvt_seq_remove(seq, 128, 64));
        expect_ok(s.cache, kvt_seq_fork(seq, kvt_seq_length(seq), &fork));
        expect_ok(s.cache, kvt_prefix_put(&store, fork, NULL, &put));
        assert_int_equal(put.n_tokens, 128);
        assert_int_equal(m.n, 2);
        expect_ok(s.cache, kvt_seq_remove(fork, 256, 64)); /* another one behind it */
        expect_ok(s.cache, kvt_prefix_put(&store, fork, NULL, &put));
        assert_int_equal(put.n_tokens, 128);
        expect_ok(s.cache, kvt_seq_remove(fork, 64, 64)); /* and before */
        expect_ok(s.cache, kvt_prefix_put(&store, fork, NULL, &put));
        assert_int_equal(put.n_tokens, 64);
        kvt_seq_destroy(fork);
        /* Whoever has the positions that are left finds nothing that was computed otherwise. */
        to = seq_of(&s);
        memmove(ids + 128, ids + 192, (MOST - 192) * sizeof *ids);
        if (kind == 0)
            memmove(positions + 128, positions + 192, (MOST - 192) * sizeof *positions);
        options.positions = positions;
        expect_ok(s.cache, kvt_prefix_get(&store, to, ids, 400, &options, &put));
        assert_int_equal(put.n_tokens, 128);
        kvt_seq_destroy(to);
        /* Truncated to before it, the sequence has none of it, and goes on being put. */
        if (kind == 3) {
            expect_ok(s.cache, kvt_seq_fork(seq, 130, &fork));
            kvt_seq_destroy(seq);
            seq = fork;
            expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, &put));
            assert_int_equal(put.n_tokens, 128);
        }
        expect_ok(s.cache, kvt_seq_truncate(seq, 128));
        grow(&s, seq, 300);
        expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, &put));
        assert_int_equal(put.n_tokens, 320);
        expect_ok(s.cache, kvt_seq_remove(seq, 128, 64));
        expect_ok(s.cache, kvt_seq_clear(seq));
        grow(&s, seq, 500);
        expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, &put));
        assert_int_equal(put.n_tokens, 384);
        kvt_seq_destroy(seq);
        close_subject(&s);
        memory_store_free(&m);
    }
}

static void test_truncate(void **state)
{
    kvt_prefix_result put;
    prefix_scene c;
    kvt_seq *like;
    (void)state;
    prefix_open(&c, 0, 500);
    assert_int_equal(c.m.n, 6);
    expect_ok(c.s.cache, kvt_seq_truncate(c.source, 256));
    step_of(&c.s, c.source, 300, 300); /* other tokens */
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &put));
    assert_int_equal(put.n_values, 3);
    assert_int_equal(put.n_tokens, 448);
    assert_int_equal(c.m.n, 9);
    assert_int_equal(prefix_get(&c, c.prompt, MOST, NULL),
                     384); /* the first ones are still there */
    for (int32_t i = 0; i < 300; i++)
        c.prompt[256 + i] = 300 + i;
    assert_int_equal(prefix_get(&c, c.prompt, 556, NULL), 448);
    /* A fork, and what it shares. */
    expect_ok(c.s.cache, kvt_seq_fork(c.source, 300, &like));
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, like, NULL, &put));
    assert_int_equal(put.n_values, 0);
    assert_int_equal(put.n_tokens, 256);
    step_of(&c.s, like, 400, 200);
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, like, NULL, &put));
    assert_int_equal(put.n_values, 2);
    kvt_seq_destroy(like);
    prefix_close(&c);
}

static void test_n_tokens(void **state)
{
    (void)state;
    for (uint64_t n = 1; n < 520; n += 21) {
        kvt_prefix_options options = prefix_options();
        kvt_prefix_result put;
        prefix_scene c;
        prefix_open(&c, 0, 0);
        grow(&c.s, c.source, 500);
        options.n_tokens = n;
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &options, &put));
        assert_int_equal(put.n_tokens, n < 384 ? n / 64 * 64 : 384);
        assert_int_equal(put.n_values, put.n_tokens / 64);
        assert_int_equal(c.m.n, put.n_tokens / 64);
        prefix_close(&c);
    }
}

/* The first values of a put that fails stay, and are sound; the next one puts the others. */
static void test_put_half_way(void **state)
{
    (void)state;
    for (long most = 0; most < 6; most++) {
        kvt_prefix_result put;
        prefix_scene c;
        prefix_open(&c, 1, 0);
        grow(&c.s, c.source, 500);
        c.m.put_at_most = most;
        c.m.failure = KVT_ERR_FULL;
        expect(c.s.cache, KVT_ERR_FULL, kvt_prefix_put(&c.store, c.source, NULL, &put));
        expect_error_text(c.s.cache, "kvt_prefix_put: the put was made to fail half way", "text");
        assert_int_equal(c.m.n, most);
        assert_int_equal(prefix_get(&c, c.prompt, MOST, NULL), most * 64);
        c.m.put_at_most = -1;
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &put));
        assert_int_equal(put.n_values, 6 - most);
        assert_int_equal(put.n_tokens, 384);
        assert_int_equal(prefix_get(&c, c.prompt, MOST, NULL), 384);
        prefix_close(&c);
    }
}

/* A get uses what the sequence has reserved, and no other blocks: none adds to it. */
static void test_reserved(void **state)
{
    uint64_t n_refused = 0;
    (void)state;
    for (size_t geometry = 0; geometry < N_GEOMETRIES; geometry++) {
        uint64_t reserved, whole = 0;
        kvt_cache_stats stats;
        prefix_scene c;
        prefix_open(&c, geometry, TOKENS);
        expect_ok(c.s.cache, kvt_seq_reserve(c.to, MOST));
        expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
        reserved = kvt_cache_memory_bytes(c.s.cache);
        for (int i = 0; i < 6; i++) {
            memory_value *v = &c.m.values[c.m.n - 1];
            kvt_prefix_result got;
            if (i % 2) /* one that is refused */
                v->data[v->bytes - 1] ^= 1;
            expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, NULL, &got));
            whole = i ? whole : got.n_tokens;
            assert_true(i % 2 ? got.n_tokens <= whole : got.n_tokens == whole);
            n_refused += got.n_refused;
            memset(&stats, 0, sizeof stats);
            stats.struct_size = sizeof stats;
            expect_ok(c.s.cache, kvt_cache_get_stats(c.s.cache, &stats));
            assert_true(stats.blocks_free == 0); /* nor were there more meanwhile */
            expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
            assert_true(kvt_cache_memory_bytes(c.s.cache) == reserved);
            expect_ok(c.s.cache, kvt_seq_clear(c.to));
            if (i % 2)
                expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, NULL));
        }
        prefix_close(&c);
    }
    assert_true(n_refused > 2 * N_GEOMETRIES);
}

/* Of one put 64 MiB at most. */
static void test_large_batches(void **state)
{
    enum { ROWS = 32 }; /* of 2 MiB and a head each: the last one is too much */
    kvt_group_config group = group_of(4, 1, 1, 1024, 1024, KVT_TYPE_F32, KVT_TYPE_F32);
    rng r = {17};
    tokens t = tokens_make(&r, 64, &group);
    memory_store m;
    kvt_store store = memory_store_open(&m);
    kvt_cache *cache = cache_of(&group, (uint64_t)(ROWS + 1) * 64, 1, NULL);
    kvt_prefix_result put;
    kvt_seq *seq;
    (void)state;

    expect_ok(cache, kvt_seq_create(cache, &seq));
    for (uint64_t rows = 1; rows <= ROWS; rows++) {
        append_step(cache, seq, &group, &t, 0, 64);
        if (rows < ROWS - 1)
            continue;
        memory_store_free(&m);
        store = memory_store_open(&m);
        expect_ok(cache, kvt_prefix_put(&store, seq, NULL, &put));
        assert_int_equal(put.n_values, rows);
        assert_true(rows == ROWS ? put.n_bytes > (64u << 20) : put.n_bytes <= (64u << 20));
        assert_int_equal(m.n_puts, rows == ROWS ? 2 : 1);
    }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    memory_store_free(&m);
    tokens_free(&t);
}

/* More values than are put at once. */
static void test_batches(void **state)
{
    kvt_prefix_result put, got;
    rng r = {3};
    kvt_group_config groups[2] = {group_of(2, 2, 1, 8, 24, KVT_TYPE_I4, KVT_TYPE_I5),
                                  group_of(1, 2, 1, 24, 8, KVT_TYPE_I4, KVT_TYPE_I4)};
    enum { LONG = 2600 };
    int32_t *prompt = malloc(LONG * sizeof *prompt);
    kvt_config config = kvt_config_init();
    memory_store m;
    kvt_store store = memory_store_open(&m);
    kvt_seq *seq, *to;
    subject s;

    (void)state;
    assert_non_null(prompt);
    open_subject(&s, groups, 2, &r);
    config.groups = s.groups;
    config.n_groups = 2;
    config.max_tokens = LONG;
    config.n_threads = pool_threads(1);
    expect_ok(NULL, kvt_cache_create(&config, &s.cache));
    seq = seq_of(&s);
    for (size_t i = 0; i < LONG; i++)
        prompt[i] = (int32_t)(i % 650);
    for (size_t i = 0; i < LONG / 650; i++)
        step_of(&s, seq, 0, i + 1 < LONG / 650 ? 650 : 640);
    expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, &put));
    assert_int_equal(put.n_values, 2 * 39);
    assert_int_equal(put.n_tokens, 39 * 64);
    assert_int_equal(m.n_puts, 2);
    to = seq_of(&s);
    expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, LONG, NULL, &got));
    assert_int_equal(got.n_tokens, 39 * 64);
    assert_int_equal(got.n_values, put.n_values);
    assert_int_equal(got.n_bytes, put.n_bytes);
    assert_int_equal(got.n_refused, 0);
    expect_ok(s.cache, kvt_seq_begin(seq, 1, NULL)); /* sealed for good */
    expect_ok(s.cache, kvt_seq_abort(seq));
    expect_ok(s.cache, kvt_seq_truncate(seq, 39 * 64));
    expect_equal(&s, to, seq, "batches", 0);
    kvt_seq_destroy(seq);
    kvt_seq_destroy(to);
    close_subject(&s);
    memory_store_free(&m);
    free(prompt);
}

/* ---- mapped snapshots ---- */

static void test_mapped(void **state)
{
    char path[] = "/tmp/test_store_prefix_XXXXXX";
    const int file = mkstemp(path);
    (void)state;
    if (file < 0)
        skip();
    (void)close(file);
    for (int damaged = 0; damaged < 2; damaged++) {
        kvt_load_options options;
        kvt_prefix_result put;
        memory_store m;
        kvt_store store = memory_store_open(&m);
        kvt_save_options save;
        FILE *f;
        prefix_scene c;
        prefix_open(&c, 0, 500);
        memset(&save, 0, sizeof save);
        save.struct_size = sizeof save;
        save.codec = KVT_CODEC_RAW;
        expect_ok(c.s.cache, kvt_seq_save(c.source, path, &save));
        if (damaged) { /* the last byte of the third row's block: found in the file */
            const memory_value *v = find_value(&c.m, 0, 192, 0);
            const value_map map = map_value(v->data, v->bytes);
            unsigned char *data = malloc(1 << 22);
            size_t n, at;
            assert_non_null(data);
            f = fopen(path, "rb+");
            assert_non_null(f);
            n = fread(data, 1, 1 << 22, f);
            for (at = 0; at + 200 < n && memcmp(data + at, v->data + map.head, 200) != 0; at++)
                ;
            assert_true(at + 200 < n);
            assert_int_equal(fseek(f, (long)at + 20, SEEK_SET), 0);
            assert_int_not_equal(fputc(data[at + 20] ^ 1, f), EOF);
            assert_int_equal(fclose(f), 0);
            free(data);
        }
        memset(&options, 0, sizeof options);
        options.struct_size = sizeof options;
        options.map = KVT_MAP_LAZY;
        expect_ok(c.s.cache, kvt_seq_load(c.to, path, &options, NULL));
        memset(&put, 0x5a, sizeof put);
        if (damaged) {
            expect(c.s.cache, KVT_ERR_CORRUPT, kvt_prefix_put(&store, c.to, NULL, &put));
            assert_int_equal(put.n_tokens, 0x5a5a5a5a5a5a5a5au);
        } else {
            expect_ok(c.s.cache, kvt_prefix_put(&store, c.to, NULL, &put));
            assert_int_equal(put.n_tokens, 384);
            assert_int_equal(m.n, c.m.n);
        }
        for (size_t i = 0; i < m.n; i++) {
            const memory_value *v = memory_store_find(&c.m, &m.values[i].key);
            assert_non_null(v);
            assert_int_equal(v->bytes, m.values[i].bytes);
            assert_memory_equal(v->data, m.values[i].data, v->bytes);
        }
        memory_store_free(&m);
        prefix_close(&c);
    }
    (void)remove(path);
}

/* ---- windows ---- */

/* Of geometry 8: a window of 100 tokens, and sinks of 70, which are two rows. */
static void test_windows(void **state)
{
    kvt_prefix_result got;
    prefix_scene c;
    (void)state;
    prefix_open(&c, 8, 0);
    while (kvt_seq_length(c.source) < MOST) {
        grow(&c.s, c.source, 40);
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &got));
    }
    assert_int_equal(got.n_tokens, 640);
    for (uint64_t row = 0; row < 10; row++) {
        memory_store lacks;
        kvt_store store = memory_store_open(&lacks);
        uint64_t expected = 640;
        memory_store_copy(&c.m, &lacks);
        memory_store_drop(&lacks, find_value(&lacks, 0, (row + 1) * 64, 0));
        /*
         * A query at n - 64 sees positions above n - 164, which at 640 tokens is row 7; and row r
         * is needed at lengths up to 64 r + 164 + 63.
         */
        if (row < 2 || row >= 7)
            expected = row * 64;
        expect_ok(c.s.cache, kvt_prefix_get(&store, c.to, c.prompt, MOST, NULL, &got));
        if (got.n_tokens != expected)
            fail_msg("without row %u: %u tokens, not %u", (unsigned)row, (unsigned)got.n_tokens,
                     (unsigned)expected);
        /* It is as if the others had never been there. */
        assert_int_equal(kvt_seq_reachable(c.to, got.n_tokens), got.n_tokens);
        if (got.n_tokens > 64)
            assert_int_not_equal(kvt_seq_reachable(c.to, got.n_tokens - 64), 0);
        if (got.n_tokens)
            assert_int_not_equal(attend_hash(&c.s, c.to), 0);
        grow(&c.s, c.to, (size_t)(MOST - got.n_tokens));
        expect_ok(c.s.cache, kvt_seq_clear(c.to));
        memory_store_free(&lacks);
    }
    { /* damage far behind, and what is then needed besides lacks: the longest that is complete */
        memory_store m;
        kvt_store store = memory_store_open(&m);
        memory_value *v;
        memory_store_copy(&c.m, &m);
        v = find_value(&m, 0, 640, 0);
        v->data[v->bytes - 1] ^= 1;
        memory_store_drop(&m, find_value(&m, 0, 7 * 64, 0));
        expect_ok(c.s.cache, kvt_prefix_get(&store, c.to, c.prompt, MOST, NULL, &got));
        assert_int_equal(got.n_refused, 1);
        assert_int_equal(got.n_tokens, 384);
        memory_store_free(&m);
    }
    prefix_close(&c);
}

/*
 * Positions that go back: a shorter prefix can need fewer rows than were got for a longer one; the
 * others are given up without leaving a gap.
 */
static void test_windows_and_positions_that_go_back(void **state)
{
    kvt_prefix_options options = prefix_options();
    int32_t positions[MOST];
    kvt_prefix_result got;
    memory_value *v;
    bytes file;
    prefix_scene c;
    (void)state;
    prefix_open(&c, 9, 0); /* f16, a window of 100 */
    for (int32_t i = 0; i < MOST; i++)
        positions[i] = i < 576 ? i : i - 400;
    expect_ok(c.s.cache, kvt_seq_begin(c.source, 640, positions));
    append_layers(&c.s, c.source, 0);
    expect_ok(c.s.cache, kvt_seq_commit(c.source, c.prompt));
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &got));
    { /* what the window has released: from one that has not gone so far */
        kvt_seq *seq = seq_of(&c.s);
        for (size_t n = 0; n < 576; n += 64) {
            grow(&c.s, seq, 64);
            expect_ok(c.s.cache, kvt_prefix_put(&c.store, seq, NULL, NULL));
        }
        kvt_seq_destroy(seq);
    }
    options.positions = positions;
    expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, 641, &options, &got));
    assert_int_equal(got.n_tokens, 640);
    expect_ok(c.s.cache, kvt_seq_clear(c.to));
    v = find_value(&c.m, 0, 640, 0);
    v->data[v->bytes - 1] ^= 1;
    v = find_value(&c.m, 0, 4 * 64, 0);
    v->data[v->bytes - 1] ^= 1;
    expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, 641, &options, &got));
    assert_int_equal(got.n_tokens, 576);
    assert_int_equal(got.n_refused, 2);
    file = saved(c.s.cache, c.to, KVT_CODEC_RAW); /* rows with a gap could not be saved */
    expect_ok(c.s.cache, kvt_seq_clear(c.to));
    expect_ok(c.s.cache, load_bytes(c.to, file.data, file.n, NULL));
    bytes_free(&file);
    prefix_close(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_prompts_that_leave),
        cmocka_unit_test(test_lengths_of_prompts),
        cmocka_unit_test(test_max_tokens),
        cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_ids_missing),
        cmocka_unit_test(test_removals),
        cmocka_unit_test(test_truncate),
        cmocka_unit_test(test_n_tokens),
        cmocka_unit_test(test_put_half_way),
        cmocka_unit_test(test_batches),
        cmocka_unit_test(test_large_batches),
        cmocka_unit_test(test_reserved),
        cmocka_unit_test(test_mapped),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_windows_and_positions_that_go_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
