/*
 * Prefixes in a store: what a value's key depends on, so that it is found by nothing else.
 */
#include "prefix_scene.h"

#include <stdio.h>

/* ---- positions ---- */

static void test_positions(void **state)
{
    int32_t positions[TOKENS], read[TOKENS];
    kvt_prefix_options options = prefix_options();
    prefix_scene c;
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        kvt_prefix_result got;
        prefix_open(&c, 0, 0);
        for (int i = 0; i < TOKENS; i++) /* with gaps; the same for several; descending */
            positions[i] = kind == 0 ? 3 * i + i % 5 : kind == 1 ? i / 9 : TOKENS - i;
        expect_ok(c.s.cache, kvt_seq_begin(c.source, TOKENS, positions));
        append_layers(&c.s, c.source, 0);
        expect_ok(c.s.cache, kvt_seq_commit(c.source, c.prompt));
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, NULL));
        assert_int_equal(prefix_get(&c, c.prompt, TOKENS, NULL), 0);
        options.positions = positions;
        assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), SEALED);
        expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, &options, &got));
        expect_ok(c.s.cache, kvt_seq_positions(c.to, 0, SEALED, read));
        assert_memory_equal(read, positions, SEALED * sizeof *read);
        expect_ok(c.s.cache, kvt_seq_token_ids(c.to, 0, SEALED, read));
        assert_memory_equal(read, c.prompt, SEALED * sizeof *read);
        expect_ok(c.s.cache, kvt_seq_clear(c.to));
        for (size_t at = 0; at < SEALED; at += 31) {
            positions[at]++;
            assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), at / 64 * 64);
            positions[at]--;
        }
        prefix_close(&c);
    }
}

/* ---- what keys are made of ---- */

static void test_extras(void **state)
{
    kvt_prefix_extra extras[3] = {{1, "image", 5}, {2, "adapter", 7}, {2, "other", 5}};
    kvt_prefix_options options = prefix_options(), put = prefix_options();
    prefix_scene c;
    (void)state;
    prefix_open(&c, 0, 0);
    grow(&c.s, c.source, TOKENS);
    put.extras = extras;
    put.n_extras = 2;
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &put, NULL));
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &put), SEALED);
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, NULL), 64);
    options.extras = extras;
    options.n_extras = 1;
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), 128);
    options.extras = extras + 1; /* the first one missing: the second one's block depends on it */
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), 64);
    options.extras = extras;
    options.n_extras = 2;
    extras[1].data = "adaptor";
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), 128);
    extras[1].data = "adapter";
    extras[1].bytes = 6;
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), 128);
    extras[1].bytes = 7;
    extras[0].block = 0;
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), 0);
    extras[0].block = 1;
    extras[1].block = UINT64_MAX;
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), 128);
    prefix_close(&c);
}

typedef struct name {
    const char *name_space, *salt, *tag, *fingerprint;
} name;

/* Each of them is another one, also where two of them side by side look the same. */
static void test_names(void **state)
{
    static const name names[] = {{"", "", "", ""},    {"ab", "c", "", ""}, {"a", "bc", "", ""},
                                 {"abc", "", "", ""}, {"", "abc", "", ""}, {"", "", "abc", ""},
                                 {"", "", "", "abc"}, {"", "ab", "c", ""}, {"", "", "ab", "c"},
                                 {"", "", "a", "bc"}, {"a", "b", "c", ""}, {"a", "", "b", "c"}};
    enum { N = sizeof names / sizeof *names };
    memory_store m;
    kvt_store store = memory_store_open(&m);
    kvt_group_config group = geometry_group(0);
    int32_t prompt[TOKENS];
    subject s;
    rng r = {1};

    (void)state;
    make_prompt(prompt, TOKENS);
    open_subject(&s, &group, 1, &r);
    open_cache(&s, NULL);
    for (int put = 0; put < 2; put++)
        for (size_t i = 0; i < N; i++) {
            kvt_prefix_options options = prefix_options();
            kvt_config config = s.config;
            kvt_prefix_result result;
            subject named = s;
            kvt_seq *seq;
            config.fingerprint = (const uint8_t *)names[i].fingerprint;
            config.fingerprint_bytes = strlen(names[i].fingerprint);
            expect_ok(NULL, kvt_cache_create(&config, &named.cache));
            seq = seq_of(&named);
            expect_ok(named.cache, kvt_seq_set_tag(seq, names[i].tag, strlen(names[i].tag)));
            options.name_space = names[i].name_space;
            options.name_space_bytes = strlen(names[i].name_space);
            options.salt = names[i].salt;
            options.salt_bytes = strlen(names[i].salt);
            expect_ok(named.cache, kvt_prefix_get(&store, seq, prompt, TOKENS, &options, &result));
            assert_int_equal(result.n_tokens, put ? SEALED : 0);
            assert_int_equal(result.n_refused, 0);
            if (!put) {
                grow(&named, seq, TOKENS);
                expect_ok(named.cache, kvt_prefix_put(&store, seq, &options, &result));
                assert_int_equal(result.n_values, 3);
                assert_int_equal(m.n, 3 * (i + 1));
            }
            kvt_seq_destroy(seq);
            kvt_cache_destroy(named.cache);
        }
    close_subject(&s);
    memory_store_free(&m);
}

/* Names that would look the same without their sizes, though others have them. */
static void test_names_like_sizes(void **state)
{
    static const char nothing[8], eight[8] = {8};
    kvt_prefix_options options = prefix_options();
    prefix_scene c;
    (void)state;
    prefix_open(&c, 0, 0);
    grow(&c.s, c.source, TOKENS);
    options.salt = nothing;
    options.salt_bytes = 8;
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &options, NULL));
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), SEALED);
    options.name_space = eight;
    options.name_space_bytes = 8;
    options.salt_bytes = 0;
    assert_int_equal(prefix_get(&c, c.prompt, TOKENS, &options), 0);
    prefix_close(&c);
}

static void other_geometry(size_t i, kvt_group_config *group)
{
    switch (i) {
    case 0: break;
    case 1: group->n_q_heads = 4; break;
    case 2: group->n_kv_heads = 2; break;
    case 3: group->k_dim = 32; break;
    case 4: group->v_dim = 32; break;
    case 5: group->k_type = KVT_TYPE_F16; break;
    case 6: group->v_type = KVT_TYPE_I4; break;
    case 7: group->flags = KVT_GROUP_NO_OFFSET; break;
    case 8: group->flags = KVT_GROUP_NO_V_ROTATION; break;
    case 9: group->rotation_seed = 43; break;
    case 10: group->window_tokens = 5000; break;
    case 11: group->window_tokens = 5001; break;
    case 12: group->window_tokens = 5000, group->sink_tokens = 4; break;
    default: group->n_layers = 1; break;
    }
}

static void test_geometries(void **state)
{
    enum { N = 14 };
    memory_store m;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[TOKENS];
    size_t before = 0;

    (void)state;
    make_prompt(prompt, TOKENS);
    for (size_t i = 0; i < N; i++) {
        kvt_group_config group = geometry_group(0);
        kvt_prefix_result result;
        subject s;
        rng r = {i};
        kvt_seq *seq;
        other_geometry(i, &group);
        open_subject(&s, &group, 1, &r);
        open_cache(&s, NULL);
        seq = seq_of(&s);
        expect_ok(s.cache, kvt_prefix_get(&store, seq, prompt, TOKENS, NULL, &result));
        if (result.n_tokens || result.n_refused)
            fail_msg("geometry %u: %u tokens", (unsigned)i, (unsigned)result.n_tokens);
        grow(&s, seq, TOKENS);
        expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, &result));
        assert_true(m.n >= before + 3);
        before = m.n;
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
    memory_store_free(&m);
}

/* The model's numbers of a group's layers are in its keys. */
static void test_layer_numbers(void **state)
{
    static const uint32_t numbers[3][4] = {{0, 1, 2, 3}, {2, 3, 0, 1}, {0, 2, 1, 3}};
    memory_store m;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[TOKENS];

    (void)state;
    make_prompt(prompt, TOKENS);
    for (size_t i = 0; i < 3; i++) {
        kvt_group_config groups[2] = {geometry_group(0), geometry_group(0)};
        kvt_prefix_result result;
        subject s;
        rng r = {1};
        kvt_seq *seq;
        groups[0].layers = &numbers[i][0];
        groups[1].layers = &numbers[i][2];
        open_subject(&s, groups, 2, &r);
        open_cache(&s, NULL);
        seq = seq_of(&s);
        expect_ok(s.cache, kvt_prefix_get(&store, seq, prompt, TOKENS, NULL, &result));
        /* Groups in another order are others, and are not taken for damaged. */
        assert_int_equal(result.n_tokens, 0);
        assert_int_equal(result.n_refused, 0);
        grow(&s, seq, TOKENS);
        expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, &result));
        assert_int_equal(result.n_values, 6);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
    memory_store_free(&m);
}

/* Rows whose form is the same are shared by caches that differ in fine_tokens. */
static void test_fine_tokens(void **state)
{
    static const uint32_t fine[] = {64, KVT_FINE_NONE, 128, 640, 64};
    (void)state;
    for (size_t i = 1; i < 5; i++) {
        kvt_prefix_result result;
        prefix_scene c;
        subject s;
        rng r = {3 + 7};
        kvt_group_config group = geometry_group(2);
        kvt_seq *seq;
        prefix_open(&c, 2, 0);
        kvt_seq_destroy(c.source);
        kvt_seq_destroy(c.to);
        close_subject(&c.s);
        group.fine_tokens = fine[i - 1];
        open_subject(&c.s, &group, 1, &r);
        open_cache(&c.s, NULL);
        c.source = sequence_of(&c.s, TOKENS);
        c.to = seq_of(&c.s);
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, NULL));
        group.fine_tokens = fine[i];
        s = c.s;
        s.groups[0].fine_tokens = fine[i];
        open_cache(&s, NULL);
        seq = sequence_of(&s, TOKENS);
        expect_ok(s.cache, kvt_prefix_put(&c.store, seq, NULL, &result));
        /* Rows 0, 1, 2: fine as far as the one and as the other says. */
        {
            size_t same = 0;
            for (uint32_t row = 0; row < 3; row++) {
                uint32_t a = fine[i - 1] == KVT_FINE_NONE ? 0 : fine[i - 1] / 64;
                uint32_t b = fine[i] == KVT_FINE_NONE ? 0 : fine[i] / 64;
                same += (row < a) == (row < b);
            }
            assert_int_equal(result.n_values, 3 - same);
            assert_int_equal(result.n_tokens, SEALED);
        }
        kvt_seq_destroy(seq);
        kvt_cache_destroy(s.cache);
        prefix_close(&c);
    }
}

/* The residual window changes no sealed block: all are shared, byte for byte. */
static void test_residual_tokens(void **state)
{
    static const uint32_t residuals[] = {64, KVT_RESIDUAL_NONE, 200};
    (void)state;
    for (size_t geometry = 0; geometry < 4; geometry++) {
        kvt_prefix_result result;
        memory_store first;
        (void)memory_store_open(&first);
        for (size_t i = 0; i < 3; i++) {
            kvt_group_config group = geometry_group(geometry);
            memory_store m;
            kvt_store store = memory_store_open(&m);
            subject s;
            rng r = {geometry + 1};
            kvt_seq *seq;
            group.residual_tokens = residuals[i];
            open_subject(&s, &group, 1, &r);
            open_cache(&s, NULL);
            seq = sequence_of(&s, 500);
            expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, &result));
            assert_int_equal(result.n_tokens, i == 0 ? 384 : i == 1 ? 448 : 256);
            if (i == 0)
                memory_store_copy(&m, &first);
            for (size_t j = 0; j < m.n; j++) {
                const memory_value *v = memory_store_find(&first, &m.values[j].key);
                if (!v) {
                    assert_true(get64(m.values[j].data + VALUE_TOKENS) > 384);
                    continue;
                }
                assert_int_equal(v->bytes, m.values[j].bytes);
                assert_memory_equal(v->data, m.values[j].data, v->bytes);
            }
            kvt_seq_destroy(seq);
            close_subject(&s);
            memory_store_free(&m);
        }
        memory_store_free(&first);
    }
}

/* How much of a sequence is put, into a store of its own. */
static uint64_t count_put(const kvt_cache *cache, const kvt_seq *seq)
{
    memory_store m;
    kvt_store store = memory_store_open(&m);
    kvt_prefix_result put;

    expect_ok(cache, kvt_prefix_put(&store, seq, NULL, &put));
    memory_store_free(&m);
    return put.n_tokens;
}

/* A new sequence of what another cache, or the same one, saves. */
static kvt_seq *moved_to(const subject *to, const kvt_cache *from, const kvt_seq *seq,
                         kvt_save_options save, kvt_load_options load)
{
    unsigned char *data;
    uint64_t bound;
    size_t n;
    kvt_seq *made = seq_of(to);

    save.struct_size = sizeof save;
    load.struct_size = sizeof load;
    expect_ok(from, kvt_seq_save_bound(seq, &bound, &save));
    data = malloc((size_t)bound);
    assert_non_null(data);
    expect_ok(from, kvt_seq_save_memory(seq, data, (size_t)bound, &n, &save));
    expect_ok(to->cache, kvt_seq_load_memory(made, data, n, &load, NULL));
    free(data);
    return made;
}

/*
 * Loaded from a cache with other fine_tokens rows are in a form that this one would not have sealed
 * them in: they are not put, nor a checkpoint of them, and the length that is said is what a get
 * restores.
 */
static void test_fine_tokens_loaded(void **state)
{
    static const uint32_t fine[][2] = {{KVT_FINE_NONE, 64}, {64, KVT_FINE_NONE}, {64, 192}};
    (void)state;
    for (size_t i = 0; i < 6; i++) {
        const kvt_save_options save = {0};
        const kvt_load_options load = {0};
        kvt_prefix_options options = prefix_options();
        kvt_prefix_result result;
        kvt_group_config group = geometry_group(2);
        const int own = i >= 3; /* the loading cache has put the prompt's by itself before */
        size_t n_same = 0, n_first = 0;
        prefix_scene c;
        rng r = {3 + 7}, again = {3 + 7};
        subject s;
        kvt_seq *seq, *mine;

        prefix_open(&c, 2, 0);
        kvt_seq_destroy(c.source);
        kvt_seq_destroy(c.to);
        close_subject(&c.s);
        group.fine_tokens = fine[i % 3][0];
        open_subject(&c.s, &group, 1, &r);
        open_cache(&c.s, NULL);
        c.source = sequence_of(&c.s, TOKENS);
        expect_ok(c.s.cache, kvt_seq_checkpoint(c.source, "blob", 4));
        group.fine_tokens = fine[i % 3][1];
        open_subject(&s, &group, 1, &again);
        open_cache(&s, NULL);
        c.to = seq_of(&s);
        seq = moved_to(&s, c.s.cache, c.source, save, load);
        mine = sequence_of(&s, TOKENS);
        if (own)
            expect_ok(s.cache, kvt_prefix_put(&c.store, mine, NULL, NULL));
        for (uint32_t row = 0; row < SEALED / 64; row++) {
            const uint32_t a = fine[i % 3][0] == KVT_FINE_NONE ? 0 : fine[i % 3][0] / 64;
            const uint32_t b = fine[i % 3][1] == KVT_FINE_NONE ? 0 : fine[i % 3][1] / 64;
            n_same += (row < a) == (row < b);
            n_first += n_same == row + 1;
        }
        options.checkpoints = KVT_PREFIX_CHECKPOINT;
        for (size_t round = 0; round < 2; round++) {
            expect_ok(s.cache, kvt_prefix_put(&c.store, seq, &options, &result));
            assert_int_equal(result.n_values, own || round ? 0 : n_same);
            assert_int_equal(result.n_tokens, own ? SEALED : n_first * 64);
            assert_int_equal(result.n_checkpoints, 0);
            expect_ok(s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, NULL, &result));
            assert_int_equal(result.n_tokens, own ? SEALED : n_first * 64);
            assert_int_equal(result.n_refused, 0);
            expect_ok(s.cache, kvt_seq_clear(c.to));
        }
        kvt_seq_destroy(mine);
        kvt_seq_destroy(seq);
        kvt_seq_destroy(c.to);
        c.to = seq_of(&c.s);
        close_subject(&s);
        prefix_close(&c);
    }
}

/*
 * What other numbers lie under than this cache's own has no keys: converted by the load, or by the
 * save, from whichever side; cut off from its beginning. Nor have what goes on from there, forks
 * and what is saved again.
 */
static void test_converted(void **state)
{
    enum { BY_NOTHING, BY_LOAD, BY_SAVE_OF_K, BY_SAVE_OF_V, BY_CUT, BY_TYPES_THAT_ARE, WAYS };
    const kvt_type f16 = KVT_TYPE_F16, i8 = KVT_TYPE_I8;
    (void)state;
    for (int way = 0; way < WAYS; way++) {
        kvt_save_options save = {.convert = way == BY_SAVE_OF_K || way == BY_SAVE_OF_V ||
                                            way == BY_TYPES_THAT_ARE,
                                 .first_token = way == BY_CUT ? 64 : 0};
        kvt_load_options load = {.convert = way == BY_LOAD || way == BY_NOTHING};
        const int is_own = way == BY_NOTHING || way == BY_TYPES_THAT_ARE;
        const kvt_save_options save_all = {0};
        const kvt_load_options load_all = {0};
        prefix_scene c;
        subject other;
        kvt_seq *seq, *again, *fork;

        prefix_open(&c, 0, TOKENS);
        other = c.s;
        if (save.convert) {
            save.n_types = 1;
            save.k_types = way == BY_SAVE_OF_K ? &f16 : way == BY_TYPES_THAT_ARE ? &i8 : NULL;
            save.v_types = way == BY_SAVE_OF_V ? &f16 : NULL;
        }
        if (way == BY_LOAD || way == BY_SAVE_OF_K)
            other.groups[0].k_type = f16;
        if (way == BY_LOAD || way == BY_SAVE_OF_V)
            other.groups[0].v_type = f16;
        open_cache(&other, NULL);
        seq = moved_to(&other, c.s.cache, c.source, save, load);
        assert_int_equal(count_put(other.cache, seq), is_own ? SEALED : 0);
        again = moved_to(&other, other.cache, seq, save_all, load_all);
        assert_int_equal(count_put(other.cache, again), is_own ? SEALED : 0);
        grow(&other, again, 128);
        assert_int_equal(count_put(other.cache, again) != 0, is_own);
        expect_ok(other.cache, kvt_seq_fork(again, 200, &fork));
        assert_int_equal(count_put(other.cache, fork) != 0, is_own);
        kvt_seq_destroy(fork);
        /* Loaded anew as it is, it does not become its own; empty, it does. */
        kvt_seq_destroy(again);
        again = moved_to(&other, other.cache, seq, save_all, load_all);
        expect_ok(other.cache, kvt_seq_truncate(again, 100));
        assert_int_equal(count_put(other.cache, again) != 0, is_own);
        expect_ok(other.cache, kvt_seq_truncate(again, 0));
        grow(&other, again, TOKENS);
        assert_int_not_equal(count_put(other.cache, again), 0);
        kvt_seq_destroy(again);
        expect_ok(other.cache, kvt_seq_fork(seq, 0, &again));
        grow(&other, again, TOKENS);
        assert_int_not_equal(count_put(other.cache, again), 0);
        kvt_seq_destroy(again);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(other.cache);
        prefix_close(&c);
    }
}

/* A file of nothing makes nothing of what comes. */
static void test_converted_empty(void **state)
{
    const kvt_type f16 = KVT_TYPE_F16;
    const kvt_save_options save = {.convert = 1, .n_types = 1, .k_types = &f16, .v_types = &f16};
    const kvt_save_options save_all = {0};
    const kvt_load_options load = {.convert = 1};
    prefix_scene c;
    kvt_seq *seq;
    (void)state;
    prefix_open(&c, 0, 0);
    seq = moved_to(&c.s, c.s.cache, c.source, save, load);
    grow(&c.s, seq, TOKENS);
    assert_int_equal(count_put(c.s.cache, seq), SEALED);
    kvt_seq_destroy(seq);
    seq = moved_to(&c.s, c.s.cache, c.source, save_all, load);
    grow(&c.s, seq, TOKENS);
    assert_int_equal(count_put(c.s.cache, seq), SEALED);
    kvt_seq_destroy(seq);
    prefix_close(&c);
}

/*
 * A snapshot tells of removals: by the positions of keys, where they have moved, so that what is
 * before stays what it was; else nothing of it is put. Not of those that are cut away again.
 */
static void test_removed_and_saved(void **state)
{
    (void)state;
    for (int moves = 0; moves < 2; moves++)
        for (int cut = 0; cut < 3; cut++) { /* by nothing, a truncate, a save of less */
            const kvt_save_options save = {.n_tokens = cut == 2 ? 100 : 0};
            const kvt_load_options load = {0};
            kvt_group_config group = geometry_group(0);
            subject s;
            rng r = {4};
            kvt_seq *seq, *loaded;

            if (moves)
                group.rope_pairing = KVT_ROPE_NONE;
            open_subject(&s, &group, 1, &r);
            open_cache(&s, NULL);
            seq = sequence_of(&s, 500);
            expect_ok(s.cache, kvt_seq_remove(seq, 128, 64));
            if (cut == 1)
                expect_ok(s.cache, kvt_seq_truncate(seq, 128));
            loaded = moved_to(&s, s.cache, seq, save, load);
            assert_int_equal(count_put(s.cache, loaded), cut == 1   ? 128
                                                         : cut == 2 ? 64
                                                         : moves    ? 128
                                                                    : 0);
            if (cut == 2) {
                grow(&s, loaded, 200);
                assert_int_equal(count_put(s.cache, loaded), 192);
            }
            kvt_seq_destroy(loaded);
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_positions),       cmocka_unit_test(test_extras),
        cmocka_unit_test(test_names),           cmocka_unit_test(test_names_like_sizes),
        cmocka_unit_test(test_geometries),      cmocka_unit_test(test_layer_numbers),
        cmocka_unit_test(test_fine_tokens),     cmocka_unit_test(test_fine_tokens_loaded),
        cmocka_unit_test(test_residual_tokens), cmocka_unit_test(test_converted),
        cmocka_unit_test(test_converted_empty), cmocka_unit_test(test_removed_and_saved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
