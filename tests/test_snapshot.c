/*
 * Snapshots: a loaded sequence equals the saved one bit for bit, also in all later operations.
 */
#include "snapshot_support.h"

static const size_t lengths[] = {0, 1, 15, 16, 17, 63, 64, 65, 200, 2047};
#define N_LENGTHS (sizeof lengths / sizeof lengths[0])

static size_t window_of(const kvt_group_config *group)
{
    return group->residual_tokens == KVT_RESIDUAL_NONE ? 0
           : group->residual_tokens == 0               ? KVT_RESIDUAL_TOKENS
                                                       : group->residual_tokens;
}

/* Whether tokens first .. n - 1 made a block old enough to be sealed. */
static int seals_between(const model *m, size_t first, size_t n)
{
    for (uint32_t g = 0; g < m->n_groups; g++) {
        const kvt_group_config *group = &m->groups[g];
        size_t window = window_of(group);
        if (group->k_type < KVT_TYPE_I8 && group->v_type < KVT_TYPE_I8)
            continue;
        for (size_t end = 64; end + window <= n; end += 64)
            if (end + window > first)
                return 1;
    }
    return 0;
}

static void same_bytes(kvt_cache *here, const kvt_seq *a, kvt_cache *there, const kvt_seq *b,
                       uint32_t codec)
{
    bytes first = saved(here, a, codec), second = saved(there, b, codec);
    assert_int_equal(first.n, second.n);
    assert_memory_equal(first.data, second.data, first.n);
    bytes_free(&first);
    bytes_free(&second);
}

/*
 * Save, load into another cache, compare; continue both; truncate both; compare again.
 *
 * A sealing that the last commit caused is taken back by the truncate where it was caused, and not
 * in what was loaded: there the two differ until they are as long as they were.
 */
static void round_trip(const model *m, size_t n, size_t step, uint32_t codec)
{
    kvt_cache *here = model_cache(m), *there = model_cache(m);
    kvt_seq *a = model_seq(here), *b = model_seq(there);
    kvt_load_result result = {99, 99, 99, 99, 99, {0}};
    bytes first;

    model_append(m, here, a, n, step);
    model_append(m, there, b, 70, 70); /* is to be replaced */
    first = saved(here, a, codec);
    expect_ok(there, load_bytes(b, first.data, first.n, &result));
    assert_int_equal(result.n_tokens, n);
    assert_int_equal(result.prefix_tokens, 0);
    assert_int_equal(result.reuse_tokens, 0);
    assert_int_equal(kvt_seq_length(b), n);
    assert_true(state_hash(m, here, a) == state_hash(m, there, b));
    bytes_free(&first);
    same_bytes(here, a, there, b, codec);

    if (n > 3) {
        size_t last = (n - 1) / step * step; /* where the last step began */
        expect_ok(here, kvt_seq_truncate(a, n - 3));
        expect_ok(there, kvt_seq_truncate(b, n - 3));
        assert_true((state_hash(m, here, a) == state_hash(m, there, b)) ==
                    !seals_between(m, last > n - 3 ? last : n - 3, n));
        model_append(m, here, a, 2, 2);
        model_append(m, there, b, 2, 2);
        assert_true((state_hash(m, here, a) == state_hash(m, there, b)) ==
                    !seals_between(m, n - 1, n));
        model_append(m, here, a, 1, 1);
        model_append(m, there, b, 1, 1);
        assert_true(state_hash(m, here, a) == state_hash(m, there, b));
        same_bytes(here, a, there, b, codec);
    }
    model_append(m, here, a, 75, 9);
    model_append(m, there, b, 75, 9);
    assert_true(state_hash(m, here, a) == state_hash(m, there, b));
    same_bytes(here, a, there, b, codec);
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
        if (lengths[i] > 200 && is_quick())
            continue;
        round_trip(&m, lengths[i], lengths[i] > 200 ? 100 : 5, KVT_CODEC_ZSTD);
        round_trip(&m, lengths[i], 200, KVT_CODEC_RAW);
    }
}

/* Of K beside a type of V: K has no 5 bits. */
static kvt_type k_type_of(int v_type)
{
    return (kvt_type)(v_type < KVT_TYPE_I4 ? v_type : KVT_TYPE_I4);
}

static void test_types(void **state)
{
    (void)state;
    for (int k = 0; k <= KVT_TYPE_I4; k++)
        for (int v = 0; v <= KVT_TYPE_I5; v++) {
            model m = model_of(2, 2, 80, 96, (kvt_type)k, (kvt_type)v);
            if (!is_quick() || (k + v) % 2 == 0)
                all_lengths(&m);
        }
}

/* ---- blocks that were cut ---- */

/* A sequence of n tokens whose sealings are final, truncated to `cut`. */
static kvt_seq *cut_seq(const model *m, kvt_cache *cache, size_t n, size_t cut)
{
    kvt_seq *seq = model_seq(cache);
    model_append(m, cache, seq, n, n);
    model_append(m, cache, seq, 1, 1);
    expect_ok(cache, kvt_seq_truncate(seq, cut));
    return seq;
}

/*
 * A sequence that was truncated inside a sealed block: what is loaded of it, there and after each
 * step behind, goes on as it does. K of 4 bits is opened again with the first of them, and sealed
 * anew with the last.
 */
static void cut_trip(const model *m, size_t cut)
{
    const size_t row_end = cut / 64 * 64 + 64, steps[] = {1, (row_end - cut) / 2, row_end, 40};
    kvt_cache *here = model_cache(m), *there = model_cache(m);
    kvt_seq *a = cut_seq(m, here, row_end + 5, cut), *loaded[5];
    size_t n = 0;

    for (size_t step = 0; step < 5; step++) {
        bytes file = saved(here, a, step % 2 ? KVT_CODEC_ZSTD : KVT_CODEC_RAW);
        loaded[n] = model_seq(there);
        expect_ok(there, load_bytes(loaded[n++], file.data, file.n, NULL));
        bytes_free(&file);
        for (size_t i = 0; i < n; i++) {
            same_bytes(here, a, there, loaded[i], KVT_CODEC_RAW);
            assert_true(state_hash(m, here, a) == state_hash(m, there, loaded[i]));
        }
        if (step == 4)
            break;
        if (steps[step])
            model_append(m, here, a, steps[step], 9);
        for (size_t i = 0; i < n && steps[step]; i++)
            model_append(m, there, loaded[i], steps[step], 9);
    }
    while (n-- > 0)
        kvt_seq_destroy(loaded[n]);
    kvt_seq_destroy(a);
    kvt_cache_destroy(here);
    kvt_cache_destroy(there);
}

static void test_cut_blocks(void **state)
{
    static const uint32_t fine[] = {0, KVT_FINE_NONE};
    (void)state;
    for (int k = 0; k <= KVT_TYPE_I4; k++)
        for (int v = 0; v <= KVT_TYPE_I5; v++)
            for (size_t i = 0; i < 2; i++) {
                model m = model_of(1, 2, 24, 40, (kvt_type)k, (kvt_type)v);
                if (k < KVT_TYPE_I4 && v < KVT_TYPE_I4)
                    continue;
                m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
                m.groups[0].fine_tokens = fine[i];
                for (size_t cut = 1; cut < 192; cut += is_quick() ? 31 : is_full() ? 1 : 2)
                    if (cut % 64)
                        cut_trip(&m, cut);
            }
}

/*
 * A snapshot says which blocks are fine; a cache that has others takes them as they are, and goes
 * on in its own way: what is appended is the same as in a sequence with its own blocks.
 */
static void test_other_fine_tokens(void **state)
{
    static const uint32_t fine[] = {KVT_FINE_NONE, 0, 130, 1000};
    static const kvt_type types[][2] = {{KVT_TYPE_I4, KVT_TYPE_I4}, {KVT_TYPE_I8, KVT_TYPE_I5}};
    static const size_t cuts[] = {0, 40, 100, 170};
    (void)state;
    for (size_t from = 0; from < 4; from++)
        for (size_t to = 0; to < 8; to++)
            for (size_t cut = is_quick() ? 1 : 0; cut < 4; cut += is_quick() ? 2 : 1) {
                model m = model_of(1, 2, 24, 40, types[to / 4][0], types[to / 4][1]), other;
                kvt_cache *here, *there;
                kvt_seq *a, *b, *c;
                bytes file;
                m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
                other = m;
                m.groups[0].fine_tokens = fine[from];
                other.groups[0].fine_tokens = fine[to % 4];
                here = model_cache(&m);
                there = model_cache(&other);
                a = cut_seq(&m, here, 200, cuts[cut] ? cuts[cut] : 201);
                b = model_seq(there);
                file = saved(here, a, KVT_CODEC_RAW);
                expect_ok(there, load_bytes(b, file.data, file.n, NULL));
                bytes_free(&file);
                assert_true(state_hash(&m, here, a) == state_hash(&other, there, b));
                same_bytes(here, a, there, b, KVT_CODEC_ZSTD);
                model_append(&other, there, b, 200, 13);
                c = model_seq(there);
                file = saved(there, b, KVT_CODEC_RAW);
                expect_ok(there, load_bytes(c, file.data, file.n, NULL));
                bytes_free(&file);
                assert_true(state_hash(&other, there, c) == state_hash(&other, there, b));
                model_append(&other, there, b, 30, 30);
                model_append(&other, there, c, 30, 13);
                same_bytes(there, b, there, c, KVT_CODEC_RAW);
                kvt_seq_destroy(a);
                kvt_seq_destroy(b);
                kvt_seq_destroy(c);
                kvt_cache_destroy(here);
                kvt_cache_destroy(there);
            }
}

static void test_switches(void **state)
{
    (void)state;
    for (uint32_t flags = 1; flags <= 11; flags++) {
        model m = model_of(2, 2, 64, 48, KVT_TYPE_I8, KVT_TYPE_I8);
        m.groups[0].flags = flags;
        if (!(flags & KVT_GROUP_V_IN_K))
            all_lengths(&m);
    }
}

/* Windows of any size, and groups that differ in it. */
static void test_windows(void **state)
{
    static const uint32_t windows[] = {KVT_RESIDUAL_NONE, 1, 100, 136, 1000};
    (void)state;
    for (size_t i = 0; i < 2 * sizeof windows / sizeof windows[0]; i++) {
        model m = model_of_two();
        if (i % 2) {
            m.groups[0].k_type = KVT_TYPE_I4;
            m.groups[0].v_type = KVT_TYPE_I5;
        }
        m.groups[0].residual_tokens = windows[i / 2];
        m.groups[1].v_type = KVT_TYPE_I8;
        /* With no window a block whose sealing is not taken back is filled up otherwise. */
        if (windows[i / 2] >= 3 && windows[i / 2] != KVT_RESIDUAL_NONE)
            all_lengths(&m);
        for (size_t n = 61; n <= 201; n += 70)
            round_trip(&m, n, 40, KVT_CODEC_ZSTD);
    }
}

/*
 * A snapshot says which blocks are open; a cache with another window takes them as they are and
 * goes on in its own way. What is sealed in the end is the same.
 */
static void test_other_window(void **state)
{
    static const uint32_t windows[] = {KVT_RESIDUAL_NONE, 0, 100, 300};
    (void)state;
    for (size_t from = 0; from < 4; from++)
        for (size_t to = 0; to < 4; to++)
            for (size_t n = 60; n < 360; n += is_quick() ? 141 : 47) {
                model m = model_of(2, 2, 80, 48, KVT_TYPE_I8, KVT_TYPE_I8), other = m;
                kvt_cache *here, *there, *fresh;
                kvt_seq *a, *b, *c;
                bytes file;
                m.max_tokens = other.max_tokens = 1024;
                m.groups[0].residual_tokens = windows[from];
                other.groups[0].residual_tokens = windows[to];
                here = model_cache(&m);
                there = model_cache(&other);
                fresh = model_cache(&other);
                a = model_seq(here);
                b = model_seq(there);
                c = model_seq(fresh);
                model_append(&m, here, a, n, n);
                file = saved(here, a, KVT_CODEC_ZSTD);
                expect_ok(there, load_bytes(b, file.data, file.n, NULL));
                bytes_free(&file);
                assert_true(state_hash(&m, here, a) == state_hash(&m, there, b));
                same_bytes(here, a, there, b, KVT_CODEC_RAW);
                model_append(&other, fresh, c, n, n);
                model_append(&other, there, b, 1, 1);
                model_append(&other, fresh, c, 1, 1);
                if (from >= to) /* what is due is sealed at once */
                    same_bytes(there, b, fresh, c, KVT_CODEC_RAW);
                model_append(&other, there, b, 399, 7);
                model_append(&other, fresh, c, 399, 7);
                assert_true(state_hash(&other, there, b) == state_hash(&other, fresh, c));
                same_bytes(there, b, fresh, c, KVT_CODEC_RAW);
                kvt_seq_destroy(a);
                kvt_seq_destroy(b);
                kvt_seq_destroy(c);
                kvt_cache_destroy(here);
                kvt_cache_destroy(there);
                kvt_cache_destroy(fresh);
            }
}

/*
 * A window keeps the first row of 4-bit keys, which is in i8, and not that of f16. What was
 * converted has it in the checkpoint, and loses nothing when the window releases it.
 */
static void checkpoint_of_other_sinks(uint64_t n, uint64_t more)
{
    model m = model_of(2, 2, 16, 16, KVT_TYPE_I4, KVT_TYPE_I4), other;
    kvt_load_options convert = {.struct_size = sizeof convert, .convert = 1};
    kvt_cache *here, *there;
    kvt_seq *a, *b, *c;
    bytes file;
    m.max_tokens = 2048;
    m.groups[0].window_tokens = 2;
    m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    other = m;
    other.groups[0].k_type = other.groups[0].v_type = KVT_TYPE_F16;
    here = model_cache(&m);
    there = model_cache(&other);
    a = model_seq(here);
    b = model_seq(there);
    c = model_seq(there);
    model_append(&m, here, a, n, n);
    expect_ok(here, kvt_seq_checkpoint(a, "here", 4));
    model_append(&m, here, a, more, more);
    file = saved(here, a, KVT_CODEC_RAW);
    expect_ok(there, kvt_seq_load_memory(b, file.data, file.n, &convert, NULL));
    expect_ok(there, kvt_seq_load_memory(c, file.data, file.n, &convert, NULL));
    bytes_free(&file);
    model_append(&other, there, b, 600, 60); /* releases the first rows */
    expect_ok(there, kvt_seq_truncate(b, n));
    expect_ok(there, kvt_seq_truncate(c, n)); /* of which none has been */
    same_bytes(there, b, there, c, KVT_CODEC_RAW);
    model_append(&other, there, b, 30, 30);
    model_append(&other, there, c, 30, 30);
    same_bytes(there, b, there, c, KVT_CODEC_RAW);
    kvt_seq_destroy(a);
    kvt_seq_destroy(b);
    kvt_seq_destroy(c);
    kvt_cache_destroy(here);
    kvt_cache_destroy(there);
}

static void test_checkpoint_of_other_sinks(void **state)
{
    (void)state;
    for (uint64_t n = 66; n < 130; n += 9) /* and nothing is released yet */
        for (uint64_t more = 1; more < 40; more += 20)
            checkpoint_of_other_sinks(n, more);
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
        for (int type = 0; type <= KVT_TYPE_I5; type++) {
            model m = model_of(1, 1, dims[i][0], dims[i][1], k_type_of(type), (kvt_type)type);
            round_trip(&m, 65, 20, KVT_CODEC_ZSTD);
            round_trip(&m, 201, 40, KVT_CODEC_ZSTD);
            round_trip(&m, 3, 1, KVT_CODEC_RAW);
        }
}

/* V in K: the file holds no V; the rest is the same. */
static void test_v_in_k(void **state)
{
    (void)state;
    for (int type = 0; type <= KVT_TYPE_I8; type++)
        for (uint32_t flags = 0; flags < (type == KVT_TYPE_I8 ? 8 : 1); flags++) {
            model m = model_of(2, 2, 80, 64, (kvt_type)type, (kvt_type)type), plain = m;
            uint32_t seals = flags / 4; /* a sealed block and an open one, or two open ones */
            kvt_cache *caches[2];
            kvt_seq *seqs[2];
            bytes files[2];
            const size_t elements[] = {67 * 64 * 4, 67 * 64 * 2,
                                       (seals ? 64 + 3 * 2 : 67 * 2) * 64 + 67 * 2};
            size_t v_bytes = 2 * 2 * elements[type]; /* layers, heads */
            m.groups[0].flags = flags % 4 | KVT_GROUP_V_IN_K;
            plain.groups[0].flags = flags % 4;
            if (seals)
                m.groups[0].residual_tokens = plain.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
            else
                all_lengths(&m);
            for (int i = 0; i < 2; i++) {
                caches[i] = model_cache(i ? &plain : &m);
                seqs[i] = model_seq(caches[i]);
                model_append(i ? &plain : &m, caches[i], seqs[i], 67, 67);
                files[i] = saved(caches[i], seqs[i], KVT_CODEC_RAW);
                relay(&files[i], 0);
            }
            /* And an entry in each table of streams for 2 layers and 2 blocks, padded to 8. */
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

/* Two snapshots in one stream: each load reads exactly its own bytes. */
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

/* The same tokens in a cache with another history give the same bytes. */
static void test_determinism(void **state)
{
    (void)state;
    for (int type = 0; type <= KVT_TYPE_I5; type++)
        for (size_t n = 1; n < 210; n += n < 67 ? 11 : 66) {
            model m = model_of(2, 2, 40, 24, k_type_of(type), (kvt_type)type);
            kvt_cache *fresh = model_cache(&m), *used = model_cache(&m);
            kvt_seq *a = model_seq(fresh), *b = model_seq(used);
            bytes x, y;

            model_append(&m, used, b, 300, 77);
            x = saved(used, b, KVT_CODEC_ZSTD); /* also another history of the compressor */
            bytes_free(&x);
            expect_ok(used, kvt_seq_clear(b));
            model_append(&m, fresh, a, n, 10);
            model_append(&m, used, b, n, 10);
            for (uint32_t codec = KVT_CODEC_AUTO; codec <= KVT_CODEC_ZSTD; codec++) {
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

/* How appends were cut does not show, not in any byte. */
static void test_cuts(void **state)
{
    static const size_t steps[] = {330, 1, 7, 64, 129};
    (void)state;
    for (int k = 0; k <= KVT_TYPE_I4; k++)
        for (int v = 0; v <= KVT_TYPE_I5; v++) {
            model m = model_of(1, 2, 24, 40, (kvt_type)k, (kvt_type)v);
            kvt_cache *whole = model_cache(&m);
            kvt_seq *seq = model_seq(whole);
            model_append(&m, whole, seq, 330, 330);
            for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
                kvt_cache *cut = model_cache(&m);
                kvt_seq *other = model_seq(cut);
                model_append(&m, cut, other, 330, steps[i]);
                same_bytes(whole, seq, cut, other, KVT_CODEC_RAW);
                kvt_seq_destroy(other);
                kvt_cache_destroy(cut);
            }
            kvt_seq_destroy(seq);
            kvt_cache_destroy(whole);
        }
}

/* Truncated tokens, too, leave nothing behind: elements of one known value are searched for. */
static void test_no_leak(void **state)
{
    (void)state;
    for (int type = 0; type <= KVT_TYPE_I5; type++) {
        model m = model_of(1, 1, 8, 8, k_type_of(type), (kvt_type)type);
        static const unsigned char f16[4] = {0xd2, 0x64, 0xd2, 0x64}; /* 1234 twice */
        kvt_cache *cache;
        kvt_seq *seq;
        float secret[8 * 8];
        kvt_tensor t = kvt_tensor_f32(secret);
        bytes file;

        m.groups[0].flags = type == KVT_TYPE_I8 ? KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET |
                                                      KVT_GROUP_NO_V_ROTATION
                            : type > KVT_TYPE_I8 ? KVT_GROUP_NO_V_ROTATION
                                                 : 0;
        cache = model_cache(&m);
        seq = model_seq(cache);
        for (size_t i = 0; i < sizeof secret / sizeof *secret; i++)
            secret[i] = 1234.0f;
        model_append(&m, cache, seq, 3, 3);
        expect_ok(cache, kvt_seq_begin(seq, 8, NULL));
        expect_ok(cache, kvt_append(seq, 0, &t, &t));
        expect_ok(cache, kvt_seq_commit(seq, NULL));
        file = saved(cache, seq, KVT_CODEC_RAW);
        for (int round = 0, found; round < 2; round++) {
            found = 0;
            for (size_t i = 0; i + 4 <= file.n; i++)
                found |=
                    memcmp(file.data + i,
                           type == KVT_TYPE_F32 ? (const void *)secret : (const void *)f16, 4) == 0;
            assert_int_equal(found, round == 0); /* the search works */
            bytes_free(&file);
            expect_ok(cache, kvt_seq_truncate(seq, 3));
            file = saved(cache, seq, KVT_CODEC_RAW);
        }
        bytes_free(&file);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
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
    assert_int_equal(ids[3], KVT_TOKEN_NONE); /* upper bound of the common prefix */
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
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_cut_blocks),
        cmocka_unit_test(test_other_fine_tokens),
        cmocka_unit_test(test_switches),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_other_window),
        cmocka_unit_test(test_checkpoint_of_other_sinks),
        cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_dims),
        cmocka_unit_test(test_v_in_k),
        cmocka_unit_test(test_long),
        cmocka_unit_test(test_small_reads),
        cmocka_unit_test(test_stream_position),
        cmocka_unit_test(test_determinism),
        cmocka_unit_test(test_no_leak),
        cmocka_unit_test(test_prefix),
        cmocka_unit_test(test_levels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
