/*
 * Snapshots: what was saved comes back, bit for bit, and goes on as if nothing had happened.
 */
#include "snapshot_support.h"

static const size_t lengths[] = {0, 1, 15, 16, 17, 63, 64, 65, 200, 2047};
#define N_LENGTHS (sizeof lengths / sizeof lengths[0])

/* Save, load into another cache, compare; continue both; truncate both; compare again. */
static void round_trip(const model *m, size_t n, size_t step, uint32_t codec)
{
    kvt_cache *here = model_cache(m), *there = model_cache(m);
    kvt_seq *a = model_seq(here), *b = model_seq(there);
    kvt_load_result result = {99, 99, 99};
    bytes first, second;

    model_append(m, here, a, n, step);
    model_append(m, there, b, 70, 70); /* is to be replaced */
    first = saved(here, a, codec);
    expect_ok(there, load_bytes(b, first.data, first.n, &result));
    assert_int_equal(result.n_tokens, n);
    assert_int_equal(result.prefix_tokens, 0);
    assert_int_equal(result.reuse_tokens, 0);
    assert_int_equal(kvt_seq_length(b), n);
    assert_true(state_hash(m, here, a) == state_hash(m, there, b));
    second = saved(there, b, codec);
    assert_int_equal(first.n, second.n);
    assert_memory_equal(first.data, second.data, first.n);
    bytes_free(&first);
    bytes_free(&second);

    if (n > 3) {
        expect_ok(here, kvt_seq_truncate(a, n - 3));
        expect_ok(there, kvt_seq_truncate(b, n - 3));
        assert_true(state_hash(m, here, a) == state_hash(m, there, b));
    }
    model_append(m, here, a, 75, 9);
    model_append(m, there, b, 75, 9);
    assert_true(state_hash(m, here, a) == state_hash(m, there, b));
    first = saved(here, a, codec);
    second = saved(there, b, codec);
    assert_int_equal(first.n, second.n);
    assert_memory_equal(first.data, second.data, first.n);
    bytes_free(&first);
    bytes_free(&second);
    kvt_seq_destroy(a);
    kvt_seq_destroy(b);
    kvt_cache_destroy(here);
    kvt_cache_destroy(there);
}

static void all_lengths(const model *given)
{
    model m = *given;
    m.max_tokens = 2304;
    for (size_t i = 0; i < N_LENGTHS; i++) {
        if (lengths[i] > 200 && getenv("KVT_TEST_QUICK"))
            continue;
        round_trip(&m, lengths[i], lengths[i] > 200 ? 100 : 5, KVT_CODEC_ZSTD);
        round_trip(&m, lengths[i], 200, KVT_CODEC_RAW);
    }
}

static void test_types(void **state)
{
    (void)state;
    for (int k = 0; k <= KVT_TYPE_I8; k++)
        for (int v = 0; v <= KVT_TYPE_I8; v++) {
            model m = model_of(2, 2, 80, 96, (kvt_type)k, (kvt_type)v);
            all_lengths(&m);
        }
}

static void test_switches(void **state)
{
    (void)state;
    for (uint32_t flags = 1; flags <= 3; flags++) {
        model m = model_of(2, 2, 64, 48, KVT_TYPE_I8, KVT_TYPE_I8);
        m.groups[0].flags = flags;
        all_lengths(&m);
    }
}

static void test_groups(void **state)
{
    model m = model_of_two();
    (void)state;
    all_lengths(&m);
}

static void test_dims(void **state)
{
    static const uint32_t dims[][2] = {{8, 8}, {24, 40}, {128, 128}, {576, 512}};
    (void)state;
    for (size_t i = 0; i < sizeof dims / sizeof dims[0]; i++)
        for (int type = 0; type <= KVT_TYPE_I8; type++) {
            model m = model_of(1, 1, dims[i][0], dims[i][1], (kvt_type)type, (kvt_type)type);
            round_trip(&m, 65, 20, KVT_CODEC_ZSTD);
            round_trip(&m, 3, 1, KVT_CODEC_RAW);
        }
}

/* V in K: no V goes into the file, and the rest as always. */
static void test_v_in_k(void **state)
{
    (void)state;
    for (int type = 0; type <= KVT_TYPE_I8; type++)
        for (uint32_t flags = 0; flags < (type == KVT_TYPE_I8 ? 4 : 1); flags++) {
            model m = model_of(2, 2, 80, 64, (kvt_type)type, (kvt_type)type), plain = m;
            kvt_cache *caches[2];
            kvt_seq *seqs[2];
            bytes files[2];
            const size_t elements[] = {67 * 64 * 4, 67 * 64 * 2, 68 * 64 + 67 * 2};
            size_t v_bytes = 2 * 2 * elements[type]; /* layers, heads */
            m.groups[0].flags = flags | KVT_GROUP_V_IN_K;
            plain.groups[0].flags = flags;
            all_lengths(&m);
            for (int i = 0; i < 2; i++) {
                caches[i] = model_cache(i ? &plain : &m);
                seqs[i] = model_seq(caches[i]);
                model_append(i ? &plain : &m, caches[i], seqs[i], 67, 67);
                files[i] = saved(caches[i], seqs[i], KVT_CODEC_RAW);
            }
            /* And an entry in each table of streams, of 2 layers and 2 blocks; all padded to 8. */
            assert_in_range(files[1].n - files[0].n, v_bytes + 4 * 24 - 4 * 8,
                            v_bytes + 4 * 24 + 4 * 8);
            for (int i = 0; i < 2; i++) {
                bytes_free(&files[i]);
                kvt_seq_destroy(seqs[i]);
                kvt_cache_destroy(caches[i]);
            }
        }
    model m = model_of(1, 1, 576, 512, KVT_TYPE_I8, KVT_TYPE_I8);
    m.groups[0].flags = KVT_GROUP_V_IN_K;
    round_trip(&m, 200, 30, KVT_CODEC_ZSTD);
    m = model_of_two(); /* beside a group with its own V */
    m.groups[0].v_dim = 80;
    m.groups[0].flags = KVT_GROUP_V_IN_K;
    round_trip(&m, 130, 30, KVT_CODEC_RAW);
    round_trip(&m, 130, 30, KVT_CODEC_ZSTD);
}

/* Sections of ids hold 16384 tokens: more than one of them, and a block of staging per 64. */
static void test_long(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    (void)state;
    m.max_tokens = 40000;
    round_trip(&m, 16384, 5000, KVT_CODEC_ZSTD);
    round_trip(&m, 33001, 5000, KVT_CODEC_ZSTD);
}

static void test_small_reads(void **state)
{
    model m = model_of_two();
    kvt_cache *cache = model_cache(&m);
    kvt_seq *a = model_seq(cache), *b = model_seq(cache);
    bytes file;
    (void)state;
    model_append(&m, cache, a, 130, 50);
    file = saved(cache, a, KVT_CODEC_ZSTD);
    for (size_t most = 1; most < 100; most += 13) {
        kvt_reader reader = bytes_reader(&file);
        file.at = 0;
        file.most = most;
        expect_ok(cache, kvt_seq_load_stream(b, &reader, NULL, NULL));
        assert_true(state_hash(&m, cache, a) == state_hash(&m, cache, b));
    }
    bytes_free(&file);
    kvt_seq_destroy(a);
    kvt_seq_destroy(b);
    kvt_cache_destroy(cache);
}

/* Two snapshots in one stream: each load stops right behind its own. */
static void test_stream_position(void **state)
{
    model m = model_of(1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_F16);
    kvt_cache *cache = model_cache(&m);
    kvt_seq *seq = model_seq(cache);
    bytes file = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&file);
    kvt_reader reader = bytes_reader(&file);
    size_t first;
    (void)state;

    model_append(&m, cache, seq, 70, 70);
    expect_ok(cache, kvt_seq_save_stream(seq, &writer, NULL));
    first = file.n;
    expect_ok(cache, kvt_seq_truncate(seq, 17));
    expect_ok(cache, kvt_seq_save_stream(seq, &writer, NULL));
    expect_ok(cache, kvt_seq_load_stream(seq, &reader, NULL, NULL));
    assert_int_equal(kvt_seq_length(seq), 70);
    assert_int_equal(file.at, first);
    expect_ok(cache, kvt_seq_load_stream(seq, &reader, NULL, NULL));
    assert_int_equal(kvt_seq_length(seq), 17);
    assert_int_equal(file.at, file.n);
    bytes_free(&file);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* The same tokens in a cache with another history: the same bytes. None of the history shows. */
static void test_determinism(void **state)
{
    (void)state;
    for (int type = 0; type <= KVT_TYPE_I8; type++)
        for (size_t n = 1; n < 70; n += 11) {
            model m = model_of(2, 2, 40, 24, (kvt_type)type, (kvt_type)type);
            kvt_cache *fresh = model_cache(&m), *used = model_cache(&m);
            kvt_seq *a = model_seq(fresh), *b = model_seq(used);
            bytes x, y;

            model_append(&m, used, b, 300, 77);
            x = saved(used, b, KVT_CODEC_ZSTD); /* also another history of the compressor */
            bytes_free(&x);
            expect_ok(used, kvt_seq_clear(b));
            model_append(&m, fresh, a, n, 10);
            model_append(&m, used, b, n, 10);
            for (uint32_t codec = 0; codec < 2; codec++) {
                x = saved(fresh, a, codec);
                y = saved(used, b, codec);
                assert_int_equal(x.n, y.n);
                assert_memory_equal(x.data, y.data, x.n);
                bytes_free(&x);
                bytes_free(&y);
            }
            kvt_seq_destroy(a);
            kvt_seq_destroy(b);
            kvt_cache_destroy(fresh);
            kvt_cache_destroy(used);
        }
}

/* Truncated tokens, too, leave nothing behind: f32 keys of one known value are searched for. */
static void test_no_leak(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_F32, KVT_TYPE_F32);
    kvt_cache *cache = model_cache(&m);
    kvt_seq *seq = model_seq(cache);
    float secret[8 * 8];
    kvt_tensor t = kvt_tensor_f32(secret);
    bytes file;
    (void)state;

    for (size_t i = 0; i < sizeof secret / sizeof *secret; i++)
        secret[i] = 1234.5f;
    model_append(&m, cache, seq, 3, 3);
    expect_ok(cache, kvt_seq_begin(seq, 8, NULL));
    expect_ok(cache, kvt_append(seq, 0, &t, &t));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    file = saved(cache, seq, KVT_CODEC_RAW);
    for (int round = 0, found; round < 2; round++) {
        found = 0;
        for (size_t i = 0; i + 4 <= file.n; i++)
            found |= memcmp(file.data + i, secret, 4) == 0;
        assert_int_equal(found, round == 0); /* the search works */
        bytes_free(&file);
        expect_ok(cache, kvt_seq_truncate(seq, 3));
        file = saved(cache, seq, KVT_CODEC_RAW);
    }
    bytes_free(&file);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

static void test_prefix(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache = model_cache(&m);
    kvt_seq *seq = model_seq(cache);
    int32_t ids[100], prompt[150];
    kvt_load_options options;
    kvt_load_result result;
    bytes file;
    (void)state;

    model_append(&m, cache, seq, 100, 100);
    expect_ok(cache, kvt_seq_token_ids(seq, 0, 100, ids));
    assert_int_equal(ids[3], KVT_TOKEN_NONE); /* so far the prefix goes at most */
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.prompt = prompt;
    file = saved(cache, seq, KVT_CODEC_ZSTD);
    memcpy(prompt, ids, sizeof ids);
    for (int same = 0; same < 5; same++) {
        for (uint64_t n = 0; n < 6; n++) {
            kvt_reader reader = bytes_reader(&file);
            uint64_t want = (uint64_t)same < n ? (uint64_t)same : n;
            file.at = 0;
            memcpy(prompt, ids, sizeof ids);
            prompt[same] = 5555;
            options.n_prompt = n;
            expect_ok(cache, kvt_seq_load_stream(seq, &reader, &options, &result));
            want = want < 3 ? want : 3;
            assert_int_equal(result.prefix_tokens, want);
            assert_int_equal(result.reuse_tokens, n && want == n ? n - 1 : want);
            assert_int_equal(result.n_tokens, 100);
        }
    }
    bytes_free(&file);
    expect_ok(cache, kvt_seq_clear(seq)); /* ids without gaps, across blocks */
    for (int i = 0; i < 90; i++) {
        float x[8] = {1, 2, 3};
        kvt_tensor t = kvt_tensor_f32(x);
        expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
        expect_ok(cache, kvt_append(seq, 0, &t, &t));
        expect_ok(cache, kvt_seq_commit(seq, &i));
    }
    for (int i = 0; i < 150; i++)
        prompt[i] = i < 77 ? i : i + 1;
    options.n_prompt = 150;
    file = saved(cache, seq, KVT_CODEC_ZSTD);
    {
        kvt_reader reader = bytes_reader(&file);
        expect_ok(cache, kvt_seq_load_stream(seq, &reader, &options, &result));
    }
    assert_int_equal(result.prefix_tokens, 77);
    assert_int_equal(result.reuse_tokens, 77);
    /* The recipe leaves at least one token to compute, whichever of the two is longer. */
    for (int i = 0; i < 150; i++)
        prompt[i] = i;
    for (uint64_t n = 0; n <= 150; n++) {
        kvt_reader reader = bytes_reader(&file);
        uint64_t all = n < 90 ? n : 90;
        file.at = 0;
        options.n_prompt = n;
        options.prompt = n ? prompt : NULL;
        expect_ok(cache, kvt_seq_load_stream(seq, &reader, &options, &result));
        assert_int_equal(result.n_tokens, 90);
        assert_int_equal(result.prefix_tokens, all);
        assert_int_equal(result.reuse_tokens, n == 0 ? 0 : n <= 90 ? n - 1 : 90);
        expect_ok(cache, kvt_seq_truncate(seq, result.reuse_tokens));
        assert_true(n == 0 || kvt_seq_length(seq) < n);
    }
    {
        kvt_reader reader = bytes_reader(&file);
        file.at = 0;
        expect_ok(cache, kvt_seq_load_stream(seq, &reader, NULL, &result));
        assert_true(result.prefix_tokens == 0 && result.reuse_tokens == 0);
    }
    bytes_free(&file);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

static void test_levels(void **state)
{
    model m = model_of_two();
    kvt_cache *cache = model_cache(&m);
    kvt_seq *a = model_seq(cache), *b = model_seq(cache);
    kvt_save_options options;
    (void)state;

    model_append(&m, cache, a, 150, 50);
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    for (options.zstd_level = -7; options.zstd_level <= 19; options.zstd_level += 13) {
        bytes file = {NULL, 0, 0, 0, -1, 0};
        kvt_writer writer = bytes_writer(&file);
        expect_ok(cache, kvt_seq_save_stream(a, &writer, &options));
        expect_ok(cache, load_bytes(b, file.data, file.n, NULL));
        assert_true(state_hash(&m, cache, a) == state_hash(&m, cache, b));
        bytes_free(&file);
    }
    kvt_seq_destroy(a);
    kvt_seq_destroy(b);
    kvt_cache_destroy(cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_types),       cmocka_unit_test(test_switches),
        cmocka_unit_test(test_groups),      cmocka_unit_test(test_dims),
        cmocka_unit_test(test_v_in_k),      cmocka_unit_test(test_long),
        cmocka_unit_test(test_small_reads), cmocka_unit_test(test_stream_position),
        cmocka_unit_test(test_determinism), cmocka_unit_test(test_no_leak),
        cmocka_unit_test(test_prefix),      cmocka_unit_test(test_levels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
