/*
 * Checkpoints in a store: another cache gets the deepest one that can be used, with its blob, and
 * goes on from it byte for byte as the source does that is truncated to it.
 */
#include "store_scenes.h"

#include <stdio.h>

enum { POINTS = 6 };
/* Multiples of 64 and not; in the first row, and far behind what a window releases. */
static const uint64_t lengths[POINTS] = {20, 64, 200, 384, 513, 641};

/* The blob of a checkpoint: its bytes depend on the length, which is 0 of the first one. */
static size_t make_blob(unsigned char *blob, uint64_t n_tokens)
{
    size_t n = n_tokens == lengths[0] ? 0 : (size_t)n_tokens * 37 % 5000;
    for (size_t i = 0; i < n; i++)
        blob[i] = (unsigned char)(i * 7 + n_tokens);
    return n;
}

static void mark(const subject *s, kvt_seq *seq)
{
    unsigned char blob[5000];
    size_t n = make_blob(blob, kvt_seq_length(seq));
    expect_ok(s->cache, kvt_seq_checkpoint(seq, blob, n));
}

/* A sequence with all checkpoints, put as it grew, in steps of 40 tokens but for those. */
static kvt_seq *source_of(const subject *s, const kvt_store *store, kvt_prefix_options *options)
{
    kvt_prefix_result result;
    kvt_seq *seq = seq_of(s);
    size_t next = 0;

    options->checkpoints = KVT_PREFIX_CHECKPOINT;
    while (kvt_seq_length(seq) < MOST) {
        uint64_t end = kvt_seq_length(seq) + 40;
        if (end > MOST)
            end = MOST;
        if (next < POINTS && lengths[next] <= end)
            end = lengths[next];
        grow(s, seq, (size_t)(end - kvt_seq_length(seq)));
        if (next < POINTS && lengths[next] == end) {
            mark(s, seq);
            next++;
        }
        expect_ok(s->cache, kvt_prefix_put(store, seq, options, &result));
    }
    return seq;
}

static void expect_blob(const subject *s, const kvt_seq *seq, uint64_t n_tokens)
{
    unsigned char blob[5000], got[5000];
    size_t n = make_blob(blob, n_tokens), n_got;
    expect_ok(s->cache, kvt_seq_checkpoint_read(seq, n_tokens, got, sizeof got, &n_got));
    assert_int_equal(n_got, n);
    if (n)
        assert_memory_equal(got, blob, n);
}

/*
 * A sequence in `s` at a checkpoint, with it alone, by another way: the source's own one is
 * truncated to it, saved, and its earlier checkpoints dropped.
 */
static kvt_seq *like_of(const subject *s, uint64_t n_tokens)
{
    kvt_seq *seq = seq_of(s);
    for (size_t i = 0; i < POINTS; i++)
        if (lengths[i] <= n_tokens) {
            while (kvt_seq_length(seq) < lengths[i])
                grow(s, seq,
                     lengths[i] - kvt_seq_length(seq) < 40
                         ? (size_t)(lengths[i] - kvt_seq_length(seq))
                         : 40);
            if (lengths[i] == n_tokens)
                mark(s, seq);
        }
    while (kvt_seq_length(seq) < MOST)
        grow(s, seq, MOST - kvt_seq_length(seq) < 40 ? (size_t)(MOST - kvt_seq_length(seq)) : 40);
    expect_ok(s->cache, kvt_seq_truncate(seq, n_tokens));
    return seq;
}

static void at_each(const subject *from, const subject *s, const char *name, size_t part_bytes,
                    int places)
{
    kvt_prefix_options put_options = prefix_options(), options = prefix_options();
    memory_store m;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[MOST + 1];
    kvt_seq *source = source_of(from, &store, &put_options), *to = seq_of(s);
    kvt_prefix_result got, probed;

    make_prompt(prompt, MOST + 1);
    m.part_bytes = part_bytes;
    m.places = places;
    options.checkpoints = KVT_PREFIX_CHECKPOINT;
    for (size_t i = 0; i < POINTS; i++) {
        /* The prompt's last token is not taken, so a checkpoint at its end is beyond it. */
        const uint64_t n_prompt = i + 1 < POINTS ? lengths[i + 1] : MOST;
        kvt_seq *like;
        size_t n;
        for (int given = 0; given < 2; given++) {
            options.checkpoint_tokens = given ? lengths : NULL;
            options.n_checkpoint_tokens = given ? POINTS : 0;
            expect_ok(s->cache, kvt_prefix_probe(&store, to, prompt, n_prompt, &options, &probed));
            expect_ok(s->cache, kvt_prefix_get(&store, to, prompt, n_prompt, &options, &got));
            if (got.n_tokens != lengths[i] || probed.n_tokens != lengths[i] || got.n_refused)
                fail_msg("%s: %u tokens got, %u probed, of %u; %u refused", name,
                         (unsigned)got.n_tokens, (unsigned)probed.n_tokens, (unsigned)lengths[i],
                         (unsigned)got.n_refused);
            if (!given)
                expect_ok(s->cache, kvt_seq_clear(to));
        }
        expect_blob(s, to, lengths[i]);
        expect_ok(s->cache, kvt_seq_checkpoints(to, NULL, 0, &n));
        assert_int_equal(n, 1);
        like = like_of(s, lengths[i]);
        expect_equal(s, to, like, name, i);
        /* Both go on alike, and back to the checkpoint. */
        grow(s, to, (size_t)(MOST - lengths[i]));
        grow(s, like, (size_t)(MOST - lengths[i]));
        expect_equal(s, to, like, name, 100 + i);
        expect_ok(s->cache, kvt_seq_truncate(to, lengths[i]));
        expect_ok(s->cache, kvt_seq_truncate(like, lengths[i]));
        expect_equal(s, to, like, name, 200 + i);
        kvt_seq_destroy(like);
        expect_ok(s->cache, kvt_seq_clear(to));
    }
    kvt_seq_destroy(source);
    kvt_seq_destroy(to);
    memory_store_free(&m);
}

static void test_round_trips(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        static const size_t sizes[] = {0, 1000, 100000, 64};
        rng r = {i + 1}, again = {i + 1};
        subject from, s;
        kvt_group_config groups[2] = {geometry_group(i), geometry_group((i + 5) % N_GEOMETRIES)};
        open_subject(&from, groups, i % 3 == 1 ? 2 : 1, &r);
        open_subject(&s, groups, i % 3 == 1 ? 2 : 1, &again);
        open_cache(&from, NULL);
        open_cache(&s, "scalar"); /* another machine's */
        for (size_t j = i % 2; j < (is_quick() ? 1 : 8); j += 3)
            at_each(&from, &s, geometry_name(i), sizes[j / 2], (int)(j % 2));
        close_subject(&from);
        close_subject(&s);
    }
}

/* ---- a source, once, for what follows ---- */

typedef struct scene {
    subject s;
    memory_store m;
    kvt_store store;
    kvt_seq *source, *to;
    kvt_prefix_options options;
    int32_t prompt[MOST + 1];
} scene;

static void open_scene(scene *c, size_t geometry)
{
    rng r = {9};
    kvt_group_config group = geometry_group(geometry);
    memset(c, 0, sizeof *c);
    open_subject(&c->s, &group, 1, &r);
    open_cache(&c->s, NULL);
    c->store = memory_store_open(&c->m);
    c->options = prefix_options();
    make_prompt(c->prompt, MOST + 1);
    c->source = source_of(&c->s, &c->store, &c->options);
    c->to = seq_of(&c->s);
}

static void close_scene(scene *c)
{
    kvt_seq_destroy(c->source);
    kvt_seq_destroy(c->to);
    memory_store_free(&c->m);
    close_subject(&c->s);
}

/* What a get gives, and a probe says; the sequence is cleared. */
static uint64_t get(scene *c, uint64_t n_prompt, kvt_prefix_result *got)
{
    kvt_prefix_result probed;
    expect_ok(c->s.cache,
              kvt_prefix_probe(&c->store, c->to, c->prompt, n_prompt, &c->options, &probed));
    expect_ok(c->s.cache, kvt_prefix_get(&c->store, c->to, c->prompt, n_prompt, &c->options, got));
    assert_int_equal(kvt_seq_length(c->to), got->n_tokens);
    if (got->n_refused == 0)
        assert_int_equal(probed.n_tokens, got->n_tokens);
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    return got->n_tokens;
}

/* Blocks that lack leave the checkpoints before them. */
static void test_missing_blocks(void **state)
{
    (void)state;
    for (size_t geometry = 0; geometry < 8; geometry += 7) {
        kvt_prefix_result got;
        scene c;
        open_scene(&c, geometry);
        assert_int_equal(get(&c, MOST, &got), 641);
        /* At 641 tokens rows 0 .. 8 are sealed; in sight of 150 tokens are those from 5 on. */
        for (uint64_t row = 10; row-- > 0;) {
            uint64_t expected = 641;
            memory_store lacks;
            kvt_store store = memory_store_open(&lacks);
            memory_store_copy(&c.m, &lacks);
            memory_store_drop(&lacks, find_value(&lacks, 0, (row + 1) * 64, 0));
            for (size_t i = POINTS; i-- > 0;) {
                const uint64_t sealed = lengths[i] > 64 ? (lengths[i] - 64) / 64 : 0;
                /* Of a window of 150 tokens the rows that 64 tokens before may see, and row 0. */
                uint64_t first = 0;
                if (geometry == 7 && lengths[i] > 64 + 150) {
                    first = (lengths[i] - 64 - 150 + 1) / 64;
                    if (first > (lengths[i] - 128) / 64)
                        first = (lengths[i] - 128) / 64;
                }
                if (row >= sealed || (row < first && row > 0)) {
                    expected = lengths[i];
                    break;
                }
                expected = 0;
            }
            expect_ok(c.s.cache, kvt_prefix_get(&store, c.to, c.prompt, MOST, &c.options, &got));
            if (got.n_tokens != expected)
                fail_msg("%s: without row %u: %u tokens, not %u", geometry_name(geometry),
                         (unsigned)row, (unsigned)got.n_tokens, (unsigned)expected);
            expect_ok(c.s.cache, kvt_seq_clear(c.to));
            memory_store_free(&lacks);
        }
        close_scene(&c);
    }
}

/* A block that is there but damaged is as one that lacks; what was got for it is given up. */
static void test_damaged_blocks(void **state)
{
    kvt_prefix_result got;
    memory_value *v;
    scene c;
    (void)state;
    open_scene(&c, 2);
    v = find_value(&c.m, 0, 9 * 64, 0);
    v->data[v->bytes - 1] ^= 1;
    assert_int_equal(get(&c, MOST, &got), 513);
    assert_int_equal(got.n_refused, 1);
    v = find_value(&c.m, 1, 513, 0);
    v->data[v->bytes - 1] ^= 1;
    v = find_value(&c.m, 1, 384, 0);
    v->data[VALUE_KEY] ^= 1;
    assert_int_equal(get(&c, MOST, &got), 200);
    assert_int_equal(got.n_refused, 2);
    assert_int_equal(get(&c, MOST, &got), 200);
    assert_int_equal(got.n_refused, 0);
    expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &c.options, &got));
    assert_int_equal(got.n_values, 3);
    assert_int_equal(got.n_checkpoints, 2);
    assert_int_equal(get(&c, MOST, &got), 641);
    close_scene(&c);
}

static void test_chosen_lengths(void **state)
{
    static const uint64_t chosen[] = {0, 1, 64, 199, 200, 201, 384, 5000000};
    kvt_prefix_result got;
    scene c;
    (void)state;
    open_scene(&c, 0);
    c.options.checkpoint_tokens = chosen;
    for (size_t n = 1; n <= 8; n++) {
        static const uint64_t expected[] = {0, 0, 64, 64, 200, 200, 384, 384};
        c.options.n_checkpoint_tokens = n;
        assert_int_equal(get(&c, MOST, &got), expected[n - 1]);
    }
    assert_int_equal(get(&c, 384, &got), 200); /* the last token is to be computed */
    assert_int_equal(get(&c, 385, &got), 384);
    c.options.n_checkpoint_tokens = 0; /* none at all */
    assert_int_equal(get(&c, MOST, &got), 0);
    close_scene(&c);
}

/* A checkpoint of the empty sequence stays, with its blob: a get is what comes behind it. */
static void test_at_zero(void **state)
{
    (void)state;
    for (int checkpoints = 0; checkpoints < 2; checkpoints++) {
        uint64_t at[2] = {9, 9};
        kvt_prefix_result got;
        char blob[16];
        size_t n;
        scene c;
        open_scene(&c, 2);
        c.options.checkpoints = (uint32_t)checkpoints;
        expect_ok(c.s.cache, kvt_seq_set_next_position(c.to, 3));
        expect_ok(c.s.cache, kvt_seq_checkpoint(c.to, "the beginning", 13));
        expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, MOST, &c.options, &got));
        assert_true(got.n_tokens > 600);
        expect_ok(c.s.cache, kvt_seq_checkpoints(c.to, at, 2, &n));
        assert_int_equal(n, 1 + checkpoints);
        assert_true(at[0] == 0 && (!checkpoints || at[1] == got.n_tokens));
        expect_ok(c.s.cache, kvt_seq_checkpoint_read(c.to, 0, blob, sizeof blob, &n));
        assert_true(n == 13 && memcmp(blob, "the beginning", n) == 0);
        grow(&c.s, c.to, 30);
        expect_ok(c.s.cache, kvt_seq_truncate(c.to, 0));
        assert_int_equal(kvt_seq_next_position(c.to), 3);
        expect_ok(c.s.cache, kvt_seq_checkpoints(c.to, at, 2, &n));
        assert_int_equal(n, 1);
        close_scene(&c);
    }
}

/* Only with the option: neither are checkpoints put nor asked for without. */
static void test_without_checkpoints(void **state)
{
    kvt_prefix_options plain = prefix_options();
    memory_store m;
    kvt_store store = memory_store_open(&m);
    kvt_prefix_result got;
    size_t n = 9;
    scene c;
    (void)state;
    open_scene(&c, 0);
    expect_ok(c.s.cache, kvt_prefix_put(&store, c.source, &plain, &got));
    assert_int_equal(got.n_checkpoints, 0);
    assert_int_equal(got.n_values, 10);
    expect_ok(c.s.cache, kvt_prefix_put(&store, c.source, &c.options, &got));
    assert_int_equal(got.n_checkpoints, POINTS);
    assert_int_equal(got.n_values, POINTS);
    assert_int_equal(got.n_tokens, 640);
    expect_ok(c.s.cache, kvt_prefix_get(&store, c.to, c.prompt, MOST, &plain, &got));
    assert_int_equal(got.n_tokens, 640);
    expect_ok(c.s.cache, kvt_seq_checkpoints(c.to, NULL, 0, &n));
    assert_int_equal(n, 0);
    /* options.n_tokens bounds checkpoints, too. */
    memory_store_free(&m);
    store = memory_store_open(&m);
    c.options.n_tokens = 383;
    expect_ok(c.s.cache, kvt_prefix_put(&store, c.source, &c.options, &got));
    assert_int_equal(got.n_tokens, 320);
    assert_int_equal(got.n_checkpoints, 3);
    memory_store_free(&m);
    close_scene(&c);
}

/* Other tokens behind the last full row, other positions there, an extra there: other keys. */
static void test_tail_is_in_the_key(void **state)
{
    int32_t positions[MOST];
    kvt_prefix_extra extra = {3, "x", 1};
    kvt_prefix_result got;
    scene c;
    (void)state;
    open_scene(&c, 0);
    assert_int_equal(get(&c, 300, &got), 200);
    for (size_t i = 0; i < MOST; i++)
        positions[i] = (int32_t)i;
    c.options.positions = positions;
    assert_int_equal(get(&c, 300, &got), 200);
    positions[200]++;
    assert_int_equal(get(&c, 300, &got), 200);
    positions[199]++;
    assert_int_equal(get(&c, 300, &got), 64);
    c.options.positions = NULL;
    c.prompt[200] = 7;
    assert_int_equal(get(&c, 300, &got), 200);
    c.prompt[199] = 7;
    assert_int_equal(get(&c, 300, &got), 64);
    make_prompt(c.prompt, MOST);
    c.options.extras = &extra;
    c.options.n_extras = 1;
    assert_int_equal(get(&c, 300, &got), 64);
    extra.block = 4;
    assert_int_equal(get(&c, 300, &got), 200);
    assert_int_equal(get(&c, 450, &got), 200);
    close_scene(&c);
}

/* More lengths than are looked for at once, and a checkpoint far from the prompt's end. */
static void test_many_lengths(void **state)
{
    rng r = {2};
    kvt_group_config group = group_of(1, 1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_prefix_options options = prefix_options();
    enum { LONG = 3000 };
    uint64_t all[LONG];
    int32_t *prompt = malloc(LONG * sizeof *prompt);
    subject s;
    memory_store m;
    kvt_store store = memory_store_open(&m);
    kvt_seq *source, *to;
    kvt_prefix_result got;

    (void)state;
    assert_non_null(prompt);
    open_subject(&s, &group, 1, &r);
    kvt_config config = kvt_config_init();
    config.groups = s.groups;
    config.n_groups = 1;
    config.max_tokens = LONG;
    config.n_threads = pool_threads(1);
    expect_ok(NULL, kvt_cache_create(&config, &s.cache));
    make_prompt(prompt, LONG);
    for (size_t i = 0; i < LONG; i++)
        all[i] = i + 1;
    source = sequence_of(&s, 150);
    expect_ok(s.cache, kvt_seq_checkpoint(source, "a", 1));
    grow(&s, source, 200);
    options.checkpoints = KVT_PREFIX_CHECKPOINT;
    expect_ok(s.cache, kvt_prefix_put(&store, source, &options, NULL));
    to = seq_of(&s);
    for (int given = 0; given < 2; given++) {
        m.n_exists = 0;
        options.checkpoint_tokens = given ? all : NULL;
        options.n_checkpoint_tokens = given ? LONG : 0;
        expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, LONG, &options, &got));
        assert_int_equal(got.n_tokens, 150);
        /* 1024 lengths, 1024, and the rest; then the blocks: of the last question a store may keep
           the order */
        assert_int_equal(m.n_exists, 3 + 1);
        assert_int_equal(m.n_asked, (LONG - 1) / 64);
        expect_ok(s.cache, kvt_seq_clear(to));
    }
    memory_store_drop(&m, find_value(&m, 1, 150, 0)); /* none in all of them */
    m.n_exists = 0;
    expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, LONG, &options, &got));
    assert_int_equal(got.n_tokens, 0);
    assert_int_equal(m.n_exists, 3);
    kvt_seq_destroy(source);
    kvt_seq_destroy(to);
    memory_store_free(&m);
    close_subject(&s);
    free(prompt);
}

/* Of a window the one that was cut may have released more. */
static void expect_same(const subject *s, const kvt_seq *a, const kvt_seq *b, const char *what)
{
    if (s->groups[0].window_tokens)
        assert_int_equal(attend_hash(s, a), attend_hash(s, b));
    else
        expect_equal(s, a, b, what, 0);
}

/*
 * Checkpoints behind a truncate: the last row is a sealed block that was cut, or, of 4-bit keys, is
 * open again. Caches whose fine_tokens differ do not take them for damaged.
 */
static void test_behind_a_cut(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++)
        for (int grown = 0; grown < 2; grown++) {
            rng r = {i + 3}, again = {i + 3};
            kvt_group_config group = geometry_group(i);
            kvt_prefix_options options = prefix_options();
            int32_t prompt[MOST];
            memory_store m;
            kvt_store store = memory_store_open(&m);
            kvt_prefix_result got;
            subject s, other;
            kvt_seq *seq, *to;
            const uint64_t n = grown ? 580 : 570;

            if (grown && group.window_tokens)
                continue; /* what it has released by the cut would not be in the store */
            open_subject(&s, &group, 1, &r);
            open_cache(&s, NULL);
            make_prompt(prompt, MOST);
            options.checkpoints = KVT_PREFIX_CHECKPOINT;
            seq = seq_of(&s);
            while (kvt_seq_length(seq) < MOST) {
                grow(&s, seq, 40);
                /* What is put behind the cut has numbers that were rounded twice: not the same. */
                if (!grown)
                    expect_ok(s.cache, kvt_prefix_put(&store, seq, NULL, NULL));
            }
            expect_ok(s.cache, kvt_seq_begin(seq, 1, NULL) == KVT_OK ? kvt_seq_abort(seq) : KVT_OK);
            expect_ok(s.cache, kvt_seq_truncate(seq, 570));
            if (grown)
                grow(&s, seq, 10);
            expect_ok(s.cache, kvt_seq_checkpoint(seq, "blob", 4));
            expect_ok(s.cache, kvt_prefix_put(&store, seq, &options, &got));
            assert_int_equal(got.n_checkpoints, 1);
            to = seq_of(&s);
            expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, MOST, &options, &got));
            if (got.n_tokens != n)
                fail_msg("%s: %u tokens of %u", geometry_name(i), (unsigned)got.n_tokens,
                         (unsigned)n);
            expect_same(&s, to, seq, geometry_name(i));
            grow(&s, to, MOST - (size_t)n);
            grow(&s, seq, MOST - (size_t)n);
            expect_same(&s, to, seq, geometry_name(i));
            kvt_seq_destroy(to);
            group.fine_tokens = 640;
            open_subject(&other, &group, 1, &again);
            open_cache(&other, NULL);
            to = seq_of(&other);
            while (kvt_seq_length(to) < MOST) { /* blocks of it are there, too */
                grow(&other, to, 40);
                expect_ok(other.cache, kvt_prefix_put(&store, to, NULL, NULL));
            }
            expect_ok(other.cache, kvt_seq_clear(to));
            expect_ok(other.cache, kvt_prefix_get(&store, to, prompt, MOST, &options, &got));
            assert_int_equal(got.n_refused, 0);
            /* 4 and 5 bits: the cut row has another form. */
            assert_int_equal(got.n_tokens, group.k_type == KVT_TYPE_I4 ? 0 : n);
            kvt_seq_destroy(to);
            kvt_seq_destroy(seq);
            close_subject(&other);
            close_subject(&s);
            memory_store_free(&m);
        }
}

static uint32_t residual_of(uint32_t config)
{
    return config == KVT_RESIDUAL_NONE ? 0 : config ? config : KVT_RESIDUAL_TOKENS;
}

/* A cache with another residual window gets what is complete for it, and goes on soundly. */
static void test_other_residual_window(void **state)
{
    static const uint32_t residuals[] = {0, KVT_RESIDUAL_NONE, 200};
    (void)state;
    for (size_t i = 0; i < 9; i++) {
        rng r = {11}, again = {11};
        kvt_group_config group = geometry_group(0);
        kvt_prefix_options options = prefix_options();
        int32_t prompt[MOST];
        memory_store m;
        kvt_store store = memory_store_open(&m);
        kvt_prefix_result got;
        subject from, s;
        kvt_seq *source, *to, *like;

        group.residual_tokens = residuals[i / 3];
        open_subject(&from, &group, 1, &r);
        open_cache(&from, NULL);
        group.residual_tokens = residuals[i % 3];
        open_subject(&s, &group, 1, &again);
        open_cache(&s, NULL);
        make_prompt(prompt, MOST);
        source = source_of(&from, &store, &options);
        to = seq_of(&s);
        expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, MOST, &options, &got));
        assert_int_equal(got.n_refused, 0);
        /* A larger window of the source's has left more of its rows in the checkpoint. */
        assert_int_equal(got.n_tokens, lengths[5]);
        expect_blob(&s, to, got.n_tokens);
        /* Sealed blocks do not depend on the window; the larger one has fewer of them. */
        like = sequence_of(&s, got.n_tokens);
        mark(&s, like);
        grow(&s, to, MOST - (size_t)got.n_tokens);
        grow(&s, like, MOST - (size_t)got.n_tokens);
        expect_ok(s.cache, kvt_seq_checkpoint_drop(to, got.n_tokens));
        expect_ok(s.cache, kvt_seq_checkpoint_drop(like, got.n_tokens));
        if (residual_of(residuals[i % 3]) <= residual_of(residuals[i / 3]))
            expect_equal(&s, to, like, "another residual window", i);
        else
            assert_int_not_equal(attend_hash(&s, to), 0);
        kvt_seq_destroy(like);
        kvt_seq_destroy(source);
        kvt_seq_destroy(to);
        close_subject(&from);
        close_subject(&s);
        memory_store_free(&m);
    }
}

/*
 * Of a checkpoint whose rows lack no more than the head is read: the value says which they are.
 * That is no damage. A probe goes by this cache's own window.
 */
static void test_rows_of_another_window(void **state)
{
    enum { POINT = 641 };
    static const uint64_t point[] = {POINT};
    const uint32_t residuals[] = {KVT_RESIDUAL_NONE, 320};
    (void)state;
    for (size_t i = 0; i < 2; i++) { /* the source's is the larger one, or the smaller one */
        rng r = {12}, again = {12};
        kvt_group_config group = geometry_group(0);
        kvt_prefix_options put_options = prefix_options(), options = prefix_options();
        int32_t prompt[MOST];
        memory_store m;
        kvt_store store = memory_store_open(&m);
        kvt_prefix_result got, probed;
        subject from, s;
        kvt_seq *source, *to;
        const memory_value *v;

        group.residual_tokens = residuals[1 - i];
        open_subject(&from, &group, 1, &r);
        open_cache(&from, NULL);
        group.residual_tokens = residuals[i];
        open_subject(&s, &group, 1, &again);
        open_cache(&s, NULL);
        make_prompt(prompt, MOST);
        source = sequence_of(&from, POINT);
        expect_ok(from.cache, kvt_seq_checkpoint(source, "blob", 4));
        put_options.checkpoints = options.checkpoints = KVT_PREFIX_CHECKPOINT;
        expect_ok(from.cache, kvt_prefix_put(&store, source, &put_options, NULL));
        options.checkpoint_tokens = point;
        options.n_checkpoint_tokens = 1;
        to = seq_of(&s);
        expect_ok(s.cache, kvt_prefix_probe(&store, to, prompt, MOST, &options, &probed));
        expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, MOST, &options, &got));
        assert_int_equal(got.n_tokens, POINT);
        assert_int_equal(probed.n_tokens, i == 0 ? 0 : POINT);
        expect_ok(s.cache, kvt_seq_clear(to));
        /* The last row that is sealed in the source: 320 tokens and more before the end. */
        memory_store_drop(&m, find_value(&m, 0, i == 0 ? 320 : 640, 0));
        m.places = 1;
        m.n_parts = 0;
        expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, MOST, &options, &got));
        assert_int_equal(got.n_tokens + got.n_refused + got.n_values, 0);
        v = find_value(&m, 1, POINT, 0);
        assert_true(m.n_parts >= 3 && m.n_parts <= 4); /* of its head */
        assert_true(get32(v->data + VALUE_N) == (i == 0 ? 6 : 1));
        expect_ok(s.cache, kvt_prefix_probe(&store, to, prompt, MOST, &options, &probed));
        assert_int_equal(probed.n_tokens, i == 0 ? 0 : POINT);
        kvt_seq_destroy(source);
        kvt_seq_destroy(to);
        close_subject(&from);
        close_subject(&s);
        memory_store_free(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_missing_blocks),
        cmocka_unit_test(test_damaged_blocks),
        cmocka_unit_test(test_chosen_lengths),
        cmocka_unit_test(test_at_zero),
        cmocka_unit_test(test_without_checkpoints),
        cmocka_unit_test(test_tail_is_in_the_key),
        cmocka_unit_test(test_many_lengths),
        cmocka_unit_test(test_behind_a_cut),
        cmocka_unit_test(test_other_residual_window),
        cmocka_unit_test(test_rows_of_another_window),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
