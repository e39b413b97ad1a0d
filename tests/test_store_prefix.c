/*
 * Prefixes in a store: what is got is what was put, and only by who has the same prompt.
 */
#include "store_scenes.h"

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

/* ---- scenes of one source ---- */

typedef struct scene {
    subject s;
    memory_store m;
    kvt_store store;
    kvt_seq *source, *to;
    int32_t prompt[MOST + 1];
} scene;

enum { TOKENS = 300, SEALED = 192 }; /* of the source, and of them what is put */

static void open_scene(scene *c, size_t geometry, uint64_t n)
{
    kvt_group_config group = geometry_group(geometry);
    rng r = {geometry + 7};

    memset(c, 0, sizeof *c);
    open_subject(&c->s, &group, 1, &r);
    open_cache(&c->s, NULL);
    c->store = memory_store_open(&c->m);
    make_prompt(c->prompt, MOST + 1);
    c->source = sequence_of(&c->s, n);
    c->to = seq_of(&c->s);
    if (n)
        expect_ok(c->s.cache, kvt_prefix_put(&c->store, c->source, NULL, NULL));
}

static void close_scene(scene *c)
{
    kvt_seq_destroy(c->source);
    kvt_seq_destroy(c->to);
    memory_store_free(&c->m);
    close_subject(&c->s);
}

/* What a get gives, which is what a probe says; the sequence is cleared. */
static uint64_t get(scene *c, const int32_t *prompt, uint64_t n, const kvt_prefix_options *options)
{
    kvt_prefix_result probed, got;
    const size_t gets = c->m.n_gets;
    expect_ok(c->s.cache, kvt_prefix_probe(&c->store, c->to, prompt, n, options, &probed));
    assert_int_equal(c->m.n_gets, gets);
    expect_ok(c->s.cache, kvt_prefix_get(&c->store, c->to, prompt, n, options, &got));
    assert_int_equal(probed.n_tokens, got.n_tokens);
    assert_int_equal(probed.n_values + probed.n_bytes + probed.n_refused, 0);
    assert_int_equal(got.n_refused, 0);
    assert_int_equal(kvt_seq_length(c->to), got.n_tokens);
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    return got.n_tokens;
}

/* ---- prompts ---- */

static void test_prompts_that_leave(void **state)
{
    scene c;
    (void)state;
    open_scene(&c, 0, TOKENS);
    for (size_t at = 0; at < TOKENS; at++) {
        const uint64_t expected = at < SEALED ? at / 64 * 64 : SEALED;
        c.prompt[at] ^= 1 << 20;
        assert_int_equal(get(&c, c.prompt, TOKENS, NULL), expected);
        c.prompt[at] ^= 1 << 20;
    }
    close_scene(&c);
}

/* The last token is to be computed. */
static void test_lengths_of_prompts(void **state)
{
    scene c;
    (void)state;
    open_scene(&c, 0, TOKENS);
    assert_int_equal(get(&c, NULL, 0, NULL), 0);
    for (uint64_t n = 0; n <= MOST; n++) {
        const uint64_t expected = n == 0 ? 0 : (n - 1) / 64 * 64;
        assert_int_equal(get(&c, c.prompt, n, NULL), expected < SEALED ? expected : SEALED);
    }
    close_scene(&c);
}

static void test_max_tokens(void **state)
{
    static const uint64_t most[] = {1, 63, 64, 65, 130, 192, 200};
    scene c;
    (void)state;
    open_scene(&c, 0, TOKENS);
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
    close_scene(&c);
}

/* ---- positions ---- */

static void test_positions(void **state)
{
    int32_t positions[TOKENS], read[TOKENS];
    kvt_prefix_options options = prefix_options();
    scene c;
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        kvt_prefix_result got;
        open_scene(&c, 0, 0);
        for (int i = 0; i < TOKENS; i++) /* with gaps; the same for several; descending */
            positions[i] = kind == 0 ? 3 * i + i % 5 : kind == 1 ? i / 9 : TOKENS - i;
        expect_ok(c.s.cache, kvt_seq_begin(c.source, TOKENS, positions));
        append_layers(&c.s, c.source, 0);
        expect_ok(c.s.cache, kvt_seq_commit(c.source, c.prompt));
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, NULL));
        assert_int_equal(get(&c, c.prompt, TOKENS, NULL), 0);
        options.positions = positions;
        assert_int_equal(get(&c, c.prompt, TOKENS, &options), SEALED);
        expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, &options, &got));
        expect_ok(c.s.cache, kvt_seq_positions(c.to, 0, SEALED, read));
        assert_memory_equal(read, positions, SEALED * sizeof *read);
        expect_ok(c.s.cache, kvt_seq_token_ids(c.to, 0, SEALED, read));
        assert_memory_equal(read, c.prompt, SEALED * sizeof *read);
        expect_ok(c.s.cache, kvt_seq_clear(c.to));
        for (size_t at = 0; at < SEALED; at += 31) {
            positions[at]++;
            assert_int_equal(get(&c, c.prompt, TOKENS, &options), at / 64 * 64);
            positions[at]--;
        }
        close_scene(&c);
    }
}

/* ---- what keys are made of ---- */

static void test_extras(void **state)
{
    kvt_prefix_extra extras[3] = {{1, "image", 5}, {2, "adapter", 7}, {2, "other", 5}};
    kvt_prefix_options options = prefix_options(), put = prefix_options();
    scene c;
    (void)state;
    open_scene(&c, 0, 0);
    grow(&c.s, c.source, TOKENS);
    put.extras = extras;
    put.n_extras = 2;
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &put, NULL));
    assert_int_equal(get(&c, c.prompt, TOKENS, &put), SEALED);
    assert_int_equal(get(&c, c.prompt, TOKENS, NULL), 64);
    options.extras = extras;
    options.n_extras = 1;
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), 128);
    options.extras = extras + 1; /* the first one missing: the second one's block depends on it */
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), 64);
    options.extras = extras;
    options.n_extras = 2;
    extras[1].data = "adaptor";
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), 128);
    extras[1].data = "adapter";
    extras[1].bytes = 6;
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), 128);
    extras[1].bytes = 7;
    extras[0].block = 0;
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), 0);
    extras[0].block = 1;
    extras[1].block = UINT64_MAX;
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), 128);
    close_scene(&c);
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
    scene c;
    (void)state;
    open_scene(&c, 0, 0);
    grow(&c.s, c.source, TOKENS);
    options.salt = nothing;
    options.salt_bytes = 8;
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &options, NULL));
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), SEALED);
    options.name_space = eight;
    options.name_space_bytes = 8;
    options.salt_bytes = 0;
    assert_int_equal(get(&c, c.prompt, TOKENS, &options), 0);
    close_scene(&c);
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
        scene c;
        subject s;
        rng r = {3 + 7};
        kvt_group_config group = geometry_group(2);
        kvt_seq *seq;
        open_scene(&c, 2, 0);
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
        close_scene(&c);
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

/* ---- what is put ---- */

/* However the tokens were cut into steps. */
static void test_cuts(void **state)
{
    (void)state;
    for (size_t geometry = 0; geometry < 7; geometry++) {
        static const size_t steps[] = {1, 7, 64, 100, 500};
        scene c;
        open_scene(&c, geometry, 500);
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
        close_scene(&c);
    }
}

static void test_ids_missing(void **state)
{
    static const size_t at[] = {0, 63, 64, 130, 191, 192};
    (void)state;
    for (size_t i = 0; i < 6; i++) {
        int32_t ids[TOKENS];
        kvt_prefix_result put;
        scene c;
        open_scene(&c, 0, 0);
        make_prompt(ids, TOKENS);
        ids[at[i]] = KVT_TOKEN_NONE;
        expect_ok(c.s.cache, kvt_seq_begin(c.source, TOKENS, NULL));
        append_layers(&c.s, c.source, 0);
        expect_ok(c.s.cache, kvt_seq_commit(c.source, ids));
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &put));
        assert_int_equal(put.n_tokens, at[i] / 64 * 64);
        assert_int_equal(put.n_values, at[i] / 64);
        assert_int_equal(c.m.n, at[i] / 64);
        close_scene(&c);
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
    scene c;
    kvt_seq *like;
    (void)state;
    open_scene(&c, 0, 500);
    assert_int_equal(c.m.n, 6);
    expect_ok(c.s.cache, kvt_seq_truncate(c.source, 256));
    step_of(&c.s, c.source, 300, 300); /* other tokens */
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &put));
    assert_int_equal(put.n_values, 3);
    assert_int_equal(put.n_tokens, 448);
    assert_int_equal(c.m.n, 9);
    assert_int_equal(get(&c, c.prompt, MOST, NULL), 384); /* the first ones are still there */
    for (int32_t i = 0; i < 300; i++)
        c.prompt[256 + i] = 300 + i;
    assert_int_equal(get(&c, c.prompt, 556, NULL), 448);
    /* A fork, and what it shares. */
    expect_ok(c.s.cache, kvt_seq_fork(c.source, 300, &like));
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, like, NULL, &put));
    assert_int_equal(put.n_values, 0);
    assert_int_equal(put.n_tokens, 256);
    step_of(&c.s, like, 400, 200);
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, like, NULL, &put));
    assert_int_equal(put.n_values, 2);
    kvt_seq_destroy(like);
    close_scene(&c);
}

static void test_n_tokens(void **state)
{
    (void)state;
    for (uint64_t n = 1; n < 520; n += 21) {
        kvt_prefix_options options = prefix_options();
        kvt_prefix_result put;
        scene c;
        open_scene(&c, 0, 0);
        grow(&c.s, c.source, 500);
        options.n_tokens = n;
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &options, &put));
        assert_int_equal(put.n_tokens, n < 384 ? n / 64 * 64 : 384);
        assert_int_equal(put.n_values, put.n_tokens / 64);
        assert_int_equal(c.m.n, put.n_tokens / 64);
        close_scene(&c);
    }
}

/* The first values of a put that fails stay, and are sound; the next one puts the others. */
static void test_put_half_way(void **state)
{
    (void)state;
    for (long most = 0; most < 6; most++) {
        kvt_prefix_result put;
        scene c;
        open_scene(&c, 1, 0);
        grow(&c.s, c.source, 500);
        c.m.put_at_most = most;
        c.m.failure = KVT_ERR_FULL;
        expect(c.s.cache, KVT_ERR_FULL, kvt_prefix_put(&c.store, c.source, NULL, &put));
        expect_error_text(c.s.cache, "kvt_prefix_put: the put was made to fail half way", "text");
        assert_int_equal(c.m.n, most);
        assert_int_equal(get(&c, c.prompt, MOST, NULL), most * 64);
        c.m.put_at_most = -1;
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &put));
        assert_int_equal(put.n_values, 6 - most);
        assert_int_equal(put.n_tokens, 384);
        assert_int_equal(get(&c, c.prompt, MOST, NULL), 384);
        close_scene(&c);
    }
}

/* More values than are put at once, and more bytes. */
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
        scene c;
        open_scene(&c, 0, 500);
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
        close_scene(&c);
    }
    (void)remove(path);
}

/* ---- windows ---- */

/* Of geometry 8: a window of 100 tokens, and sinks of 70, which are two rows. */
static void test_windows(void **state)
{
    kvt_prefix_result got;
    scene c;
    (void)state;
    open_scene(&c, 8, 0);
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
    close_scene(&c);
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
    scene c;
    (void)state;
    open_scene(&c, 9, 0); /* f16, a window of 100 */
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
    close_scene(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_prompts_that_leave),
        cmocka_unit_test(test_lengths_of_prompts),
        cmocka_unit_test(test_max_tokens),
        cmocka_unit_test(test_positions),
        cmocka_unit_test(test_extras),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_names_like_sizes),
        cmocka_unit_test(test_geometries),
        cmocka_unit_test(test_layer_numbers),
        cmocka_unit_test(test_fine_tokens),
        cmocka_unit_test(test_residual_tokens),
        cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_ids_missing),
        cmocka_unit_test(test_removals),
        cmocka_unit_test(test_truncate),
        cmocka_unit_test(test_n_tokens),
        cmocka_unit_test(test_put_half_way),
        cmocka_unit_test(test_batches),
        cmocka_unit_test(test_mapped),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_windows_and_positions_that_go_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
