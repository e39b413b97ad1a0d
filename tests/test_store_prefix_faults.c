/*
 * Stored prefixes where a call of the store or an allocation fails, and arguments that are none: a
 * clear status and text, nothing changed, nothing leaked; and kvt_value_check.
 */
#include "store_scenes.h"

#include <stdio.h>

enum { TOKENS = 330, POINT = 200 };

typedef struct scene {
    ledger memory;
    subject s;
    memory_store m, sound;
    kvt_store store;
    kvt_seq *source, *to;
    kvt_prefix_options options;
    int32_t prompt[TOKENS];
    int is_marked; /* `to` has a checkpoint at 0, and a next position */
} scene;

static void open_scene(scene *c, size_t geometry, int checkpoints, uint64_t budget)
{
    kvt_group_config groups[2] = {geometry_group(geometry), geometry_group(3)};
    rng r = {geometry + 1};

    memset(c, 0, sizeof *c);
    ledger_init(&c->memory);
    open_subject(&c->s, groups, 2, &r);
    c->s.ledger = &c->memory;
    c->s.budget = budget;
    open_cache(&c->s, NULL);
    c->store = memory_store_open(&c->m);
    (void)memory_store_open(&c->sound);
    c->options = prefix_options();
    c->options.checkpoints = checkpoints ? KVT_PREFIX_CHECKPOINT : KVT_PREFIX_BLOCKS;
    make_prompt(c->prompt, TOKENS);
    c->source = sequence_of(&c->s, POINT);
    expect_ok(c->s.cache, kvt_seq_checkpoint(c->source, "some state", 10));
    grow(&c->s, c->source, TOKENS - POINT);
    expect_ok(c->s.cache, kvt_prefix_put(&c->store, c->source, &c->options, NULL));
    memory_store_copy(&c->m, &c->sound);
    c->to = seq_of(&c->s);
    expect_ok(c->s.cache, kvt_seq_set_tag(c->to, NULL, 0));
}

static void close_scene(scene *c)
{
    kvt_seq_destroy(c->source);
    kvt_seq_destroy(c->to);
    memory_store_free(&c->m);
    memory_store_free(&c->sound);
    close_subject(&c->s);
    ledger_close(&c->memory);
}

typedef enum call { GET, PROBE, PUT, CALLS } call;
static const char *const names[CALLS] = {"kvt_prefix_get", "kvt_prefix_probe", "kvt_prefix_put"};

static kvt_status make_call(scene *c, call which, kvt_prefix_result *result)
{
    switch (which) {
    case GET: return kvt_prefix_get(&c->store, c->to, c->prompt, TOKENS, &c->options, result);
    case PROBE: return kvt_prefix_probe(&c->store, c->to, c->prompt, TOKENS, &c->options, result);
    default: return kvt_prefix_put(&c->store, c->source, &c->options, result);
    }
}

/* Before a call: a put has something to put. */
static void prepare(scene *c, call which)
{
    while (which == PUT && c->m.n)
        memory_store_drop(&c->m, &c->m.values[0]);
    if (which != PUT && c->m.n != c->sound.n)
        memory_store_copy(&c->sound, &c->m);
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    c->is_marked = which == GET;
    if (c->is_marked) {
        expect_ok(c->s.cache, kvt_seq_set_next_position(c->to, 7));
        expect_ok(c->s.cache, kvt_seq_checkpoint(c->to, "at 0", 4));
    }
}

/* A call has failed: nothing has changed, and the result was not written. */
static void expect_unchanged(scene *c, const kvt_prefix_result *result, uint64_t source)
{
    kvt_prefix_result untouched;
    char blob[4];
    size_t n;
    memset(&untouched, 0x5a, sizeof untouched);
    assert_memory_equal(result, &untouched, sizeof untouched);
    assert_int_equal(kvt_seq_length(c->to), 0);
    assert_int_equal(kvt_seq_next_position(c->to), c->is_marked ? 7 : 0);
    expect_ok(c->s.cache, kvt_seq_checkpoints(c->to, NULL, 0, &n));
    assert_int_equal(n, c->is_marked);
    if (n)
        expect_ok(c->s.cache, kvt_seq_checkpoint_read(c->to, 0, blob, sizeof blob, &n));
    assert_int_equal(file_hash(&c->s, c->source), source);
    /* What was put is sound. */
    for (size_t i = 0; i < c->m.n; i++) {
        const memory_value *v = memory_store_find(&c->sound, &c->m.values[i].key);
        assert_non_null(v);
        assert_int_equal(v->bytes, c->m.values[i].bytes);
        assert_memory_equal(v->data, c->m.values[i].data, v->bytes);
    }
}

/* The call again, without a fault, does all of it. */
static void expect_works(scene *c, call which)
{
    kvt_prefix_result result;
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    expect_ok(c->s.cache, make_call(c, which, &result));
    assert_int_equal(result.n_tokens, c->options.checkpoints && which != PUT ? POINT : 256);
    if (which == PUT)
        assert_int_equal(c->m.n, c->sound.n);
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    expect_ok(c->s.cache, kvt_cache_trim(c->s.cache));
}

static void test_calls_fail(void **state)
{
    static const kvt_status failures[] = {KVT_ERR_IO, KVT_ERR_FULL, KVT_ERR_MEMORY,
                                          KVT_ERR_UNSUPPORTED};
    (void)state;
    for (int checkpoints = 0; checkpoints < 2; checkpoints++) {
        scene c;
        uint64_t source;
        open_scene(&c, 1, checkpoints, 0);
        source = file_hash(&c.s, c.source);
        for (call which = GET; which < CALLS; which++) {
            long n = 0;
            for (;; n++) {
                kvt_prefix_result result;
                kvt_status status;
                size_t live;
                memset(&result, 0x5a, sizeof result);
                prepare(&c, which);
                expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
                live = c.memory.live_bytes;
                c.m.n_calls = 0;
                c.m.fail_at = n;
                c.m.failure = failures[n % 4];
                status = make_call(&c, which, &result);
                c.m.fail_at = -1;
                if (status == KVT_OK)
                    break;
                assert_int_equal(status, failures[n % 4]);
                expect_error_text(c.s.cache, names[which], "the call");
                expect_error_text(c.s.cache, "was made to fail", "the store's text");
                expect_unchanged(&c, &result, source);
                expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
                assert_int_equal(c.memory.live_bytes, live);
                expect_works(&c, which);
            }
            assert_int_equal(n, which == GET     ? 2 + 2 * checkpoints
                                : which == PROBE ? 1 + checkpoints
                                                 : 2 + 2 * checkpoints);
        }
        close_scene(&c);
    }
}

static void test_parts_fail(void **state)
{
    (void)state;
    for (int checkpoints = 0; checkpoints < 2; checkpoints++) {
        static const size_t sizes[] = {0, 700, 4096};
        scene c;
        uint64_t source;
        open_scene(&c, 2, checkpoints, 0);
        source = file_hash(&c.s, c.source);
        for (size_t mode = 0; mode < 6; mode++) {
            long n = 0;
            c.m.part_bytes = sizes[mode / 2];
            c.m.places = (int)(mode % 2);
            for (;; n += is_quick() ? 11 : 1) {
                kvt_prefix_result result;
                kvt_status status;
                size_t live;
                memset(&result, 0x5a, sizeof result);
                prepare(&c, GET);
                expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
                live = c.memory.live_bytes;
                c.m.n_parts = 0;
                c.m.fail_part = n;
                c.m.failure = KVT_ERR_IO;
                status = make_call(&c, GET, &result);
                c.m.fail_part = -1;
                if (status == KVT_OK)
                    break;
                assert_int_equal(status, KVT_ERR_IO);
                expect_error_text(c.s.cache, "kvt_prefix_get", "the call");
                expect_error_text(c.s.cache, "half way", "the store's text");
                if (n % 10 == 0)
                    expect_unchanged(&c, &result, source);
                assert_int_equal(kvt_seq_length(c.to), 0);
                expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
                assert_int_equal(c.memory.live_bytes, live);
            }
            assert_true(n > 3);
            expect_works(&c, GET);
        }
        close_scene(&c);
    }
}

/* A store without a text of its own. */
static kvt_status mute(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                       kvt_store_error *error)
{
    (void)user;
    (void)keys;
    (void)n;
    (void)found;
    memset(error->text, 'x', user ? sizeof error->text : 0); /* and one without an end */
    return KVT_ERR_IO;
}

static void test_texts(void **state)
{
    kvt_prefix_result result;
    scene c;
    (void)state;
    open_scene(&c, 0, 0, 0);
    c.store.exists = mute;
    c.store.user = NULL;
    expect(c.s.cache, KVT_ERR_IO, make_call(&c, PROBE, &result));
    expect_error_text(c.s.cache, "kvt_prefix_probe: the store has failed", "no text");
    c.store.user = &c;
    expect(c.s.cache, KVT_ERR_IO, make_call(&c, PUT, &result));
    expect_error_text(c.s.cache, "kvt_prefix_put: xxxx", "a text without an end");
    close_scene(&c);
}

/* Damaged values, and no remove: they are not taken, and the get goes on. */
static void test_remove_fails(void **state)
{
    kvt_prefix_result got;
    memory_value *v;
    scene c;
    (void)state;
    open_scene(&c, 0, 0, 0);
    v = find_value(&c.m, 0, 128, 0);
    v->data[300] ^= 4;
    c.m.n_calls = 0;
    c.m.fail_at = 2; /* exists, get, remove */
    expect_ok(c.s.cache, make_call(&c, GET, &got));
    assert_int_equal(got.n_tokens, 64);
    assert_int_equal(got.n_refused, 1);
    assert_int_equal(c.m.n_removes, 1);
    assert_non_null(memory_store_find(&c.m, &find_value(&c.sound, 0, 128, 0)->key));
    close_scene(&c);
}

static void test_allocations_fail(void **state)
{
    static const size_t geometries[] = {1, 8};
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        scene c;
        uint64_t source;
        open_scene(&c, geometries[i / 2], (int)(i % 2), 0);
        source = file_hash(&c.s, c.source);
        for (call which = GET; which < CALLS; which++) {
            long n = 0;
            for (;; n++) {
                kvt_prefix_result result;
                kvt_status status;
                size_t live;
                memset(&result, 0x5a, sizeof result);
                prepare(&c, which);
                expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
                live = c.memory.live_bytes;
                c.memory.countdown = n;
                status = make_call(&c, which, &result);
                c.memory.countdown = -1;
                if (status == KVT_OK)
                    break;
                assert_int_equal(status, KVT_ERR_MEMORY);
                expect_error_text(c.s.cache, "the allocator has no ", "the text");
                expect_unchanged(&c, &result, source);
                expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
                assert_int_equal(c.memory.live_bytes, live);
                if (n % 5 == 0)
                    expect_works(&c, which);
            }
            assert_true(n > 4);
            expect_works(&c, which);
        }
        close_scene(&c);
    }
}

/* Working memory is given back, and is not held against the budget; blocks are. */
static void test_memory(void **state)
{
    (void)state;
    for (int checkpoints = 0; checkpoints < 2; checkpoints++) {
        kvt_prefix_result result;
        uint64_t before, with, budget;
        scene c;
        open_scene(&c, 0, checkpoints, 0);
        expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
        before = c.memory.live_bytes;
        expect_ok(c.s.cache, make_call(&c, PROBE, &result));
        prepare(&c, PUT);
        expect_ok(c.s.cache, make_call(&c, PUT, &result));
        assert_int_equal(c.memory.live_bytes, before);
        expect_ok(c.s.cache, make_call(&c, GET, &result));
        with = c.memory.live_bytes;
        assert_true(with > before);
        close_scene(&c);
        /* A budget of just that is enough, and of a few blocks less is not. */
        for (int less = 0; less < 2; less++) {
            budget = with - (less ? 3 * (with - before) / 4 : 0);
            open_scene(&c, 0, checkpoints, budget);
            expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
            before = c.memory.live_bytes;
            prepare(&c, PUT);
            expect_ok(c.s.cache, make_call(&c, PUT, &result));
            if (less) {
                expect(c.s.cache, KVT_ERR_BUDGET, make_call(&c, GET, &result));
                assert_int_equal(kvt_seq_length(c.to), 0);
                expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
                assert_int_equal(c.memory.live_bytes, before);
            } else {
                expect_ok(c.s.cache, make_call(&c, GET, &result));
            }
            close_scene(&c);
        }
    }
}

/* ---- arguments ---- */

static void test_no_store(void **state)
{
    kvt_prefix_result result;
    scene c;
    (void)state;
    open_scene(&c, 0, 0, 0);
    assert_int_equal(kvt_prefix_put(&c.store, NULL, NULL, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_prefix_get(&c.store, NULL, c.prompt, TOKENS, NULL, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_prefix_probe(&c.store, NULL, c.prompt, TOKENS, NULL, &result),
                     KVT_ERR_ARG);
    for (call which = GET; which < CALLS; which++)
        for (int i = 0; i < 6; i++) {
            const kvt_store whole = c.store;
            kvt_status status;
            if (i == 0)
                c.store.struct_size--;
            else if (i == 1)
                c.store.get = NULL;
            else if (i == 2)
                c.store.put = NULL;
            else if (i == 3)
                c.store.exists = NULL;
            else if (i == 4)
                c.store.remove = NULL;
            memset(&result, 0x5a, sizeof result);
            if (i < 5)
                status = make_call(&c, which, &result);
            else
                status = which == PUT ? kvt_prefix_put(NULL, c.source, NULL, &result)
                         : which == GET
                             ? kvt_prefix_get(NULL, c.to, c.prompt, TOKENS, NULL, &result)
                             : kvt_prefix_probe(NULL, c.to, c.prompt, TOKENS, NULL, &result);
            assert_int_equal(status, KVT_ERR_ARG);
            expect_error_text(c.s.cache, names[which], "the call");
            expect_error_text(c.s.cache, "no store, or one without", "the text");
            assert_int_equal(result.n_tokens, 0x5a5a5a5a5a5a5a5au);
            c.store = whole;
        }
    close_scene(&c);
}

static void test_options(void **state)
{
    static const kvt_prefix_extra no_data = {0, NULL, 1}, equal[2] = {{4, "", 0}, {4, "", 0}};
    static const kvt_prefix_extra falling[2] = {{4, "a", 1}, {3, "b", 1}};
    static const uint64_t lengths[3] = {5, 5, 4};
    static const int32_t positions[TOKENS] = {0, -1};
    static const struct {
        const char *text;
        int put, get; /* refused by */
    } cases[] = {
        {"struct_size", 1, 1},
        {"name_space is NULL", 1, 1},
        {"salt is NULL", 1, 1},
        {"extras is NULL", 1, 1},
        {"the data of an extra is NULL", 1, 1},
        {"blocks do not ascend", 1, 1},
        {"blocks do not ascend", 1, 1},
        {"checkpoints is out of range", 1, 1},
        {"checkpoint_tokens is NULL", 1, 1},
        {"checkpoint_tokens without checkpoints", 1, 1},
        {"checkpoint_tokens do not ascend", 1, 1},
        {"checkpoint_tokens do not ascend", 1, 1},
        {"checkpoint_tokens are those of the sequence", 1, 0},
        {"positions are those of the sequence", 1, 0},
        {"n_tokens is for kvt_prefix_put", 0, 1},
        {"reserved is not 0", 1, 1},
        {"a position is below 0", 0, 1},
    };
    scene c;
    (void)state;
    open_scene(&c, 0, 0, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (call which = GET; which < CALLS; which++) {
            kvt_prefix_options *o = &c.options;
            kvt_prefix_result result;
            kvt_status status;
            if (!(which == PUT ? cases[i].put : cases[i].get))
                continue;
            *o = prefix_options();
            switch (i) {
            case 0: o->struct_size--; break;
            case 1: o->name_space_bytes = 1; break;
            case 2: o->salt_bytes = 1; break;
            case 3: o->n_extras = 1; break;
            case 4: o->extras = &no_data, o->n_extras = 1; break;
            case 5: o->extras = equal, o->n_extras = 2; break;
            case 6: o->extras = falling, o->n_extras = 2; break;
            case 7: o->checkpoints = 2; break;
            case 8: o->checkpoints = 1, o->n_checkpoint_tokens = 1; break;
            case 9: o->checkpoint_tokens = lengths, o->n_checkpoint_tokens = 1; break;
            case 10:
                o->checkpoints = 1, o->checkpoint_tokens = lengths, o->n_checkpoint_tokens = 2;
                break;
            case 11:
                o->checkpoints = 1, o->checkpoint_tokens = lengths + 1, o->n_checkpoint_tokens = 2;
                break;
            case 12:
                o->checkpoints = 1, o->checkpoint_tokens = lengths, o->n_checkpoint_tokens = 1;
                break;
            case 13: o->positions = positions; break;
            case 14: o->n_tokens = 1; break;
            case 15: o->reserved = 1; break;
            default: o->positions = positions; break;
            }
            status = make_call(&c, which, &result);
            if (status != KVT_ERR_ARG)
                fail_msg("%s: %s: %d", names[which], cases[i].text, (int)status);
            expect_error_text(c.s.cache, names[which], "the call");
            expect_error_text(c.s.cache, cases[i].text, "the text");
        }
    assert_int_equal(c.m.n_gets + c.m.n_removes, 0);
    close_scene(&c);
}

static void test_prompts(void **state)
{
    kvt_prefix_result result;
    scene c;
    (void)state;
    open_scene(&c, 0, 0, 0);
    expect(c.s.cache, KVT_ERR_ARG, kvt_prefix_get(&c.store, c.to, NULL, 1, NULL, NULL));
    expect_error_text(c.s.cache, "prompt is NULL", "NULL");
    expect(c.s.cache, KVT_ERR_ARG, kvt_prefix_probe(&c.store, c.to, NULL, 1, NULL, &result));
    expect(c.s.cache, KVT_ERR_ARG, kvt_prefix_probe(&c.store, c.to, c.prompt, TOKENS, NULL, NULL));
    expect_error_text(c.s.cache, "result is NULL", "NULL");
    c.prompt[TOKENS - 1] = KVT_TOKEN_NONE;
    for (call which = GET; which <= PROBE; which++) {
        expect(c.s.cache, KVT_ERR_ARG, make_call(&c, which, &result));
        expect_error_text(c.s.cache, "a token id of the prompt is below 0", "an id");
    }
    c.prompt[TOKENS - 1] = 1;
    /* result NULL is fine for the other two. */
    expect_ok(c.s.cache, make_call(&c, GET, NULL));
    expect_ok(c.s.cache, make_call(&c, PUT, NULL));
    close_scene(&c);
}

static void test_states(void **state)
{
    kvt_prefix_result result;
    scene c;
    (void)state;
    open_scene(&c, 0, 0, 0);
    expect_ok(c.s.cache, kvt_seq_begin(c.source, 1, NULL));
    expect(c.s.cache, KVT_ERR_STATE, make_call(&c, PUT, &result));
    expect_error_text(c.s.cache, "kvt_prefix_put: a step is pending", "put");
    expect_ok(c.s.cache, kvt_seq_abort(c.source));
    expect_ok(c.s.cache, kvt_seq_begin(c.to, 1, NULL));
    expect(c.s.cache, KVT_ERR_STATE, make_call(&c, GET, &result));
    expect_error_text(c.s.cache, "kvt_prefix_get: a step is pending", "get");
    expect_ok(c.s.cache, make_call(&c, PROBE, &result));
    expect_ok(c.s.cache, kvt_seq_abort(c.to));
    grow(&c.s, c.to, 3);
    expect(c.s.cache, KVT_ERR_STATE, make_call(&c, GET, &result));
    expect_error_text(c.s.cache, "the sequence is not empty", "get");
    expect_ok(c.s.cache, make_call(&c, PROBE, &result));
    assert_int_equal(result.n_tokens, 256);
    assert_int_equal(kvt_seq_length(c.to), 3);
    close_scene(&c);
}

/* ---- kvt_value_check ---- */

static void told_of(const kvt_store_key *key, const void *data, size_t n, kvt_status expected,
                    const char *fragment)
{
    kvt_value_info info = {.struct_size = sizeof info, .n_tokens = 77};
    char text[200] = "none";
    kvt_status status = kvt_value_check(key, data, n, &info, text, sizeof text);
    if (status != expected || !strstr(text, fragment))
        fail_msg("%s: %d, not %d: %s", fragment, (int)status, (int)expected, text);
    if (expected != KVT_OK)
        assert_int_equal(info.n_tokens, 77);
    assert_int_equal(kvt_value_check(key, data, n, &info, NULL, 0), expected);
}

static void test_value_check(void **state)
{
    scene c;
    (void)state;
    open_scene(&c, 1, 1, 0);
    for (int checkpoint = 0; checkpoint < 2; checkpoint++) {
        const memory_value *v = find_value(&c.sound, checkpoint, checkpoint ? POINT : 128, 0);
        const value_map map = map_value(v->data, v->bytes);
        kvt_value_info info = {.struct_size = sizeof info};
        kvt_store_key other = v->key;
        unsigned char *copy = malloc(v->bytes + 1);

        static const struct {
            size_t at;
            uint32_t value;
            const char *text;
        } fields[] = {
            {VALUE_FLAGS, 2, "flags"},
            {VALUE_BYTES, 64, "as long as it says"},
            {VALUE_TOKENS, 0, "number of tokens"},
            {VALUE_BLOB, 0x7fffffff, NULL},
            {VALUE_N, 0x10000000, NULL},
            {VALUE_POSITION, 0xfffffffe, NULL},
            {VALUE_ENTRIES + ENTRY_ROW, 4, "of other tokens"},
            {VALUE_ENTRIES + ENTRY_TOKENS, 63, "of other tokens"},
            {VALUE_ENTRIES + ENTRY_GROUP, KVT_MAX_GROUPS, "of no group, form or layer"},
            {VALUE_ENTRIES + ENTRY_FORM, 4, "of no group, form or layer"},
            {VALUE_ENTRIES + ENTRY_LAYERS, 0, "of no group, form or layer"},
            {VALUE_ENTRIES + ENTRY_LAYERS, KVT_MAX_LAYERS + 1, "of no group, form or layer"},
            {VALUE_ENTRIES + ENTRY_IMAGE, 0, "of another size"},
            {VALUE_ENTRIES + ENTRY_IMAGE, 63, "of another size"},
            {VALUE_ENTRIES + ENTRY_IMAGE, 0x40000000, "of another size"},
            {VALUE_ENTRIES + ENTRY_IMAGE, 64, "do not make its size"},
        };
        assert_non_null(copy);
        assert_int_equal(kvt_value_check(&v->key, v->data, v->bytes, &info, NULL, 0), KVT_OK);
        assert_int_equal(info.struct_size, sizeof info);
        assert_int_equal(info.version, 1);
        assert_int_equal(info.checkpoint, checkpoint);
        assert_int_equal(info.n_tokens, checkpoint ? POINT : 128);
        assert_int_equal(info.n_blocks, map.n_entries);
        assert_int_equal(info.blob_bytes, checkpoint ? 10 : 0);
        told_of(NULL, v->data, v->bytes, KVT_OK, "none");
        other.bytes[31] ^= 1;
        told_of(&other, v->data, v->bytes, KVT_ERR_MISMATCH, "under another key");
        told_of(NULL, NULL, 5, KVT_ERR_ARG, "NULL");
        info.struct_size--;
        assert_int_equal(kvt_value_check(NULL, v->data, v->bytes, &info, NULL, 0), KVT_ERR_ARG);
        assert_int_equal(kvt_value_check(NULL, v->data, v->bytes, NULL, NULL, 0), KVT_ERR_ARG);
        for (size_t n = 0; n < v->bytes; n += n < 400 ? 1 : 97) {
            unsigned char *cut = malloc(n ? n : 1); /* so that no byte behind it is read unseen */
            assert_non_null(cut);
            memcpy(cut, v->data, n);
            told_of(NULL, cut, n, n < VALUE_ENTRIES ? KVT_ERR_FORMAT : KVT_ERR_CORRUPT,
                    n < VALUE_ENTRIES ? "shorter than any" : "as long as it says");
            if (n >= VALUE_ENTRIES) {
                put64(cut + VALUE_BYTES, n);
                resign_value(cut, n);
                told_of(NULL, cut, n, KVT_ERR_CORRUPT, "");
            }
            free(cut);
        }
        for (size_t at = 0; at < v->bytes; at += is_quick() ? 31 : 1) {
            memcpy(copy, v->data, v->bytes);
            copy[at] ^= (unsigned char)(1 << at % 8);
            told_of(&v->key, copy, v->bytes, at < 12 ? KVT_ERR_FORMAT : KVT_ERR_CORRUPT,
                    at < 8                       ? "no value of kvtile's"
                    : at < 12                    ? "version"
                    : at >= map.blob             ? "blob is wrong"
                    : at >= map.head             ? "a layer's digest is wrong"
                    : at >= map.sum + 8          ? "padding is not zero"
                    : at >= map.digests          ? "head's checksum is wrong"
                    : at >= VALUE_KEY && at < 48 ? "head's checksum is wrong"
                                                 : "a stored value: ");
        }
        for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
            memcpy(copy, v->data, v->bytes);
            put32(copy + fields[i].at, fields[i].value);
            resign_value(copy, v->bytes);
            told_of(NULL, copy, v->bytes, KVT_ERR_CORRUPT,
                    fields[i].text ? fields[i].text : "a stored value: ");
        }
        free(copy);
    }
    close_scene(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_calls_fail),  cmocka_unit_test(test_parts_fail),
        cmocka_unit_test(test_texts),       cmocka_unit_test(test_remove_fails),
        cmocka_unit_test(test_memory),      cmocka_unit_test(test_allocations_fail),
        cmocka_unit_test(test_no_store),    cmocka_unit_test(test_options),
        cmocka_unit_test(test_prompts),     cmocka_unit_test(test_states),
        cmocka_unit_test(test_value_check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
