/*
 * Stored values that are damaged, another's, or contradict themselves under sound checksums: none
 * is taken, each is counted and removed, what is got is a shorter prefix exactly, and a put mends
 * the store. And stores that do not do what they promise.
 */
#include "store_scenes.h"

#include <stdio.h>

enum {
    TOKENS = 266,   /* of the source */
    ROWS = 4,       /* that it has put at most: of types that are not sealed; of others 3 */
    EARLIER = 128,  /* tokens of a checkpoint */
    DEEPEST = 230,  /* and of another one: one row of it is open and full, and one is not full */
    SLACK = 1 << 14 /* bytes of memory that a get of a damaged value may have more than another */
};

typedef struct kind {
    const char *name;
    kvt_type k_type, v_type;
    uint32_t k_dim, v_dim, flags;
} kind;

static const kind kinds[] = {
    {"i8", KVT_TYPE_I8, KVT_TYPE_I8, 16, 16, 0},
    {"i8, padded", KVT_TYPE_I8, KVT_TYPE_I8, 8, 24, 0},
    {"i4, i5", KVT_TYPE_I4, KVT_TYPE_I5, 16, 16, 0},
    {"i4, padded", KVT_TYPE_I4, KVT_TYPE_I4, 24, 8, 0},
    {"f16, f32", KVT_TYPE_F16, KVT_TYPE_F32, 16, 8, 0},
    {"f32, i8", KVT_TYPE_F32, KVT_TYPE_I8, 8, 16, 0},
    {"V in K", KVT_TYPE_I8, KVT_TYPE_I8, 48, 32, KVT_GROUP_V_IN_K},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

/* A source, what it has put, and a sequence that gets it. */
typedef struct scene {
    const char *name;
    ledger memory;
    subject s;
    memory_store m, sound; /* sound: as it was put */
    kvt_store store;
    kvt_seq *source, *to;
    kvt_seq *like[ROWS + 1]; /* what a get of so many rows is; of checkpoints: 0 and 1, EARLIER's */
    int32_t prompt[TOKENS];
    kvt_prefix_options options;
    uint64_t lengths[2];
    size_t rows;       /* that were put */
    size_t peak;       /* bytes of memory that a get of all takes */
    size_t n;          /* values tried */
    uint64_t appended; /* hash of a sequence that was not got */
} scene;

/* How the store gives its values. */
static void set_mode(scene *c, size_t mode)
{
    static const size_t parts[] = {0, 7, 4096, 1};
    c->m.part_bytes = parts[mode / 2 % 4];
    c->m.places = (int)(mode % 2);
}

static void get(scene *c, kvt_prefix_result *got)
{
    c->memory.peak_bytes = c->memory.live_bytes;
    expect_ok(c->s.cache, kvt_prefix_get(&c->store, c->to, c->prompt, TOKENS, &c->options, got));
}

static void open_scene(scene *c, size_t k, int checkpoints)
{
    const kind *of = &kinds[k];
    kvt_group_config group = group_of(2, 2, 1, of->k_dim, of->v_dim, of->k_type, of->v_type);
    rng r = {k + 1};
    kvt_prefix_result result;
    size_t live;

    memset(c, 0, sizeof *c);
    c->name = of->name;
    group.flags = of->flags;
    ledger_init(&c->memory);
    open_subject(&c->s, &group, 1, &r);
    c->s.ledger = &c->memory;
    open_cache(&c->s, NULL);
    c->store = memory_store_open(&c->m);
    (void)memory_store_open(&c->sound);
    c->options = prefix_options();
    make_prompt(c->prompt, TOKENS);
    c->rows = (size_t)sealed_tokens(&c->s, TOKENS) / 64;
    c->source = sequence_of(&c->s, EARLIER);
    if (checkpoints) {
        c->options.checkpoints = KVT_PREFIX_CHECKPOINT;
        c->lengths[0] = EARLIER;
        c->lengths[1] = DEEPEST;
        expect_ok(c->s.cache, kvt_seq_checkpoint(c->source, NULL, 0));
        c->like[1] = sequence_of(&c->s, EARLIER);
        expect_ok(c->s.cache, kvt_seq_checkpoint(c->like[1], NULL, 0));
        grow(&c->s, c->source, DEEPEST - EARLIER);
        expect_ok(c->s.cache, kvt_seq_checkpoint(c->source, "the state of some layers", 24));
    }
    grow(&c->s, c->source, TOKENS - (size_t)kvt_seq_length(c->source));
    expect_ok(c->s.cache, kvt_prefix_put(&c->store, c->source, &c->options, &result));
    memory_store_copy(&c->m, &c->sound);
    c->options.checkpoint_tokens = checkpoints ? c->lengths : NULL; /* so that it is quick */
    c->options.n_checkpoint_tokens = checkpoints ? 2 : 0;
    for (size_t row = 0; row <= c->rows && !checkpoints; row++)
        c->like[row] = sequence_cut(&c->s, row * 64);
    c->to = seq_of(&c->s);
    grow(&c->s, c->to, TOKENS);
    c->appended = file_hash(&c->s, c->to);
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    for (size_t i = 0; i < 2; i++) { /* the second time free blocks are there */
        for (size_t mode = 0; mode < 8; mode++) {
            set_mode(c, mode);
            live = c->memory.live_bytes;
            get(c, &result);
            assert_int_equal(result.n_tokens, checkpoints ? DEEPEST : c->rows * 64);
            assert_int_equal(result.n_refused, 0);
            if (c->memory.peak_bytes - live > c->peak)
                c->peak = c->memory.peak_bytes - live;
            expect_ok(c->s.cache, kvt_seq_clear(c->to));
        }
    }
}

static size_t n_tried; /* of all scenes */

static void close_scene(scene *c)
{
    n_tried += c->n;
    for (size_t row = 0; row <= ROWS; row++)
        kvt_seq_destroy(c->like[row]);
    kvt_seq_destroy(c->source);
    kvt_seq_destroy(c->to);
    memory_store_free(&c->m);
    memory_store_free(&c->sound);
    close_subject(&c->s);
    ledger_close(&c->memory);
}

/* What is left of the prefix without a value, in tokens. */
static uint64_t left_without(const scene *c, const memory_value *sound)
{
    return c->options.checkpoints ? EARLIER : get64(sound->data + VALUE_TOKENS) - 64;
}

/* What the store lacks. */
static void put_again(scene *c, kvt_prefix_result *put)
{
    kvt_prefix_options options = prefix_options();
    options.checkpoints = c->options.checkpoints;
    expect_ok(c->s.cache, kvt_prefix_put(&c->store, c->source, &options, put));
}

/* The value of a key is not sound: a get finds it out, and ends before it. */
static void expect_refused(scene *c, const memory_value *sound, const char *what, size_t detail)
{
    const uint64_t left = left_without(c, sound);
    const size_t live = c->memory.live_bytes;
    kvt_prefix_result got;

    set_mode(c, c->n++);
    get(c, &got);
    if (got.n_tokens != left || got.n_refused != 1 || kvt_seq_length(c->to) != left)
        fail_msg("%s: %s (%zu): %u tokens got, %u in the sequence, not %u; %u refused", c->name,
                 what, detail, (unsigned)got.n_tokens, (unsigned)kvt_seq_length(c->to),
                 (unsigned)left, (unsigned)got.n_refused);
    if (memory_store_find(&c->m, &sound->key))
        fail_msg("%s: %s (%zu): it is still there", c->name, what, detail);
    if (c->memory.peak_bytes > live && c->memory.peak_bytes - live > c->peak + SLACK)
        fail_msg("%s: %s (%zu): %zu bytes of memory, %zu of a sound value", c->name, what, detail,
                 c->memory.peak_bytes - live, c->peak);
    if (c->n % 97 == 1) { /* the rest is slower */
        kvt_prefix_result put;
        const memory_value *mended;
        expect_equal(&c->s, c->to, c->like[c->options.checkpoints ? 1 : left / 64], what, detail);
        put_again(c, &put);
        mended = memory_store_find(&c->m, &sound->key);
        assert_int_equal(put.n_values, 1);
        assert_non_null(mended);
        assert_int_equal(mended->bytes, sound->bytes);
        assert_memory_equal(mended->data, sound->data, sound->bytes);
    }
    (void)memory_store_set(&c->m, &sound->key, sound->data, sound->bytes);
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    if (c->n % 3 == 0) { /* what was refused is in no block that is used again */
        grow(&c->s, c->to, TOKENS);
        if (file_hash(&c->s, c->to) != c->appended)
            fail_msg("%s: %s (%zu): it is in a block that was appended", c->name, what, detail);
        expect_ok(c->s.cache, kvt_seq_clear(c->to));
    }
}

/* The values that a test damages: of all rows; of checkpoints the deepest. */
static size_t pick(scene *c, const memory_value **values)
{
    size_t n = 0;
    if (c->options.checkpoints)
        values[n++] = find_value(&c->sound, 1, DEEPEST, 0);
    else
        for (size_t row = 0; row < c->rows; row++)
            values[n++] = find_value(&c->sound, 0, (row + 1) * 64, 0);
    return n;
}

/* ---- bytes ---- */

static void change_bytes(size_t k, int checkpoints)
{
    const memory_value *values[ROWS] = {NULL};
    const int full = is_full();
    /* 7 and 15: with each bit of a byte in turn */
    const size_t step = full ? 1 : is_quick() ? 37 : checkpoints ? 15 : k == 0 ? 1 : 7;
    scene c;
    size_t n;

    open_scene(&c, k, checkpoints);
    n = pick(&c, values);
    for (size_t i = 0; i < n; i++) {
        const memory_value *v = values[i];
        const size_t head = map_value(v->data, v->bytes).head;
        for (size_t at = 0; at < v->bytes; at += step) {
            /* One value (with KVT_TEST_FULL all) has all bits changed, and each byte of its head
               to all others. */
            const int all = full || (i == n / 2 && k == 0 && !is_quick());
            for (unsigned x = 1; x < 256; x++) {
                if (!(all ? at < head || (x & (x - 1)) == 0 : x == 1u << at % 8))
                    continue;
                memory_store_find(&c.m, &v->key)->data[at] ^= (unsigned char)x;
                expect_refused(&c, v, "a byte was changed", at);
            }
        }
    }
    close_scene(&c);
}

static void test_bytes_of_blocks(void **state)
{
    (void)state;
    for (size_t k = 0; k < KINDS; k++)
        change_bytes(k, 0);
}

static void test_bytes_of_checkpoints(void **state)
{
    (void)state;
    for (size_t k = 0; k < KINDS; k += k == 0 ? 2 : 3)
        change_bytes(k, 1);
}

static void change_lengths(size_t k, int checkpoints)
{
    const memory_value *values[ROWS] = {NULL};
    const size_t step = is_quick() ? 41 : is_full() ? 1 : 5;
    unsigned char *longer;
    scene c;
    size_t n;

    open_scene(&c, k, checkpoints);
    n = pick(&c, values);
    for (size_t i = 0; i < n; i++) {
        const memory_value *v = values[i];
        for (size_t kept = 0; kept < v->bytes; kept += i == 0 ? step : 13 * step) {
            unsigned char *cut = malloc(kept + 1);
            assert_non_null(cut);
            memcpy(cut, v->data, kept);
            (void)memory_store_set(&c.m, &v->key, cut, kept);
            expect_refused(&c, v, "it was cut", kept);
            if (kept >= VALUE_ENTRIES && kept % 3 == 0) { /* and says so itself */
                put64(cut + VALUE_BYTES, kept);
                resign_value(cut, kept);
                (void)memory_store_set(&c.m, &v->key, cut, kept);
                expect_refused(&c, v, "it was cut, and says so", kept);
            }
            free(cut);
        }
        longer = calloc(1, v->bytes + 64);
        assert_non_null(longer);
        memcpy(longer, v->data, v->bytes);
        for (size_t more = 1; more <= 64; more += 9) {
            put64(longer + VALUE_BYTES, v->bytes);
            resign_value(longer, v->bytes + more);
            (void)memory_store_set(&c.m, &v->key, longer, v->bytes + more);
            expect_refused(&c, v, "bytes behind it", more);
            put64(longer + VALUE_BYTES, v->bytes + more);
            resign_value(longer, v->bytes + more);
            (void)memory_store_set(&c.m, &v->key, longer, v->bytes + more);
            expect_refused(&c, v, "bytes behind it, which it counts", more);
        }
        free(longer);
    }
    close_scene(&c);
}

static void test_lengths(void **state)
{
    (void)state;
    for (size_t k = 0; k < KINDS; k += 2) {
        change_lengths(k, 0);
        change_lengths(k, 1);
    }
}

/* ---- the values of others ---- */

static void test_swapped(void **state)
{
    (void)state;
    for (size_t k = 0; k < KINDS; k++) {
        scene c;
        open_scene(&c, k, 0);
        for (size_t i = 0; i < c.sound.n; i++)
            for (size_t j = 0; j < c.sound.n; j++) {
                const memory_value *v = &c.sound.values[i], *other = &c.sound.values[j];
                memory_value *put;
                if (i == j)
                    continue;
                put = memory_store_set(&c.m, &v->key, other->data, other->bytes);
                expect_refused(&c, v, "another row's value", i * 100 + j);
                put = memory_store_set(&c.m, &v->key, other->data, other->bytes);
                memcpy(put->data + VALUE_KEY, &v->key, sizeof v->key);
                resign_value(put->data, put->bytes);
                expect_refused(&c, v, "another row's value with this key in it", i * 100 + j);
            }
        close_scene(&c);
    }
    for (size_t i = 0; i < 2; i++) { /* a block's for a checkpoint's, and the reverse */
        scene c;
        const memory_value *v, *other;
        open_scene(&c, 0, 1);
        v = find_value(&c.sound, 1, DEEPEST, 0);
        for (size_t j = 0; j < c.sound.n; j++) {
            other = &c.sound.values[j];
            if (other == v)
                continue;
            memory_value *put = memory_store_set(&c.m, &v->key, other->data, other->bytes);
            if (i) {
                memcpy(put->data + VALUE_KEY, &v->key, sizeof v->key);
                put64(put->data + VALUE_TOKENS, DEEPEST);
                resign_value(put->data, put->bytes);
            }
            expect_refused(&c, v, "another value for a checkpoint's", j);
        }
        close_scene(&c);
    }
}

/* Values that a sequence of another kind, with the same tokens, has put. */
static void test_foreign(void **state)
{
    static scene scenes[KINDS];
    (void)state;
    for (size_t k = 0; k < KINDS; k++)
        open_scene(&scenes[k], k, 0);
    for (size_t k = 0; k < KINDS; k++)
        for (size_t other = 0; other < KINDS; other++) {
            scene *c = &scenes[k], *from = &scenes[other];
            for (size_t row = 0; k != other && row < c->rows && row < from->rows; row++) {
                const memory_value *v = find_value(&c->sound, 0, (row + 1) * 64, 0);
                const memory_value *f = find_value(&from->sound, 0, (row + 1) * 64, 0);
                memory_value *put = memory_store_set(&c->m, &v->key, f->data, f->bytes);
                expect_refused(c, v, "a value of another type", other);
                put = memory_store_set(&c->m, &v->key, f->data, f->bytes);
                memcpy(put->data + VALUE_KEY, &v->key, sizeof v->key);
                resign_value(put->data, put->bytes);
                expect_refused(c, v, "a value of another type with this key in it", other);
            }
        }
    for (size_t k = 0; k < KINDS; k++)
        close_scene(&scenes[k]);
}

/* The same model, types and tokens for another name space, salt, tag, ... */
static void test_other_users(void **state)
{
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        kvt_prefix_options options = prefix_options();
        memory_store others;
        kvt_store store = memory_store_open(&others);
        scene c;

        open_scene(&c, 0, 0);
        if (i == 0) {
            options.name_space = "others";
            options.name_space_bytes = 6;
        } else if (i == 1) {
            options.salt = "secret";
            options.salt_bytes = 6;
        } else if (i == 2) {
            kvt_seq_destroy(c.source);
            c.source = seq_of(&c.s);
            expect_ok(c.s.cache, kvt_seq_set_tag(c.source, "tag", 3));
            grow(&c.s, c.source, TOKENS);
        } else {
            static const kvt_prefix_extra extra = {0, "image", 5};
            options.extras = &extra;
            options.n_extras = 1;
        }
        expect_ok(c.s.cache, kvt_prefix_put(&store, c.source, &options, NULL));
        if (i == 2) {
            kvt_seq_destroy(c.source);
            c.source = sequence_of(&c.s, TOKENS);
        }
        for (size_t row = 0; row < c.rows; row++) {
            const memory_value *v = find_value(&c.sound, 0, (row + 1) * 64, 0);
            const memory_value *f = find_value(&others, 0, (row + 1) * 64, 0);
            assert_memory_not_equal(&v->key, &f->key, sizeof v->key);
            (void)memory_store_set(&c.m, &v->key, f->data, f->bytes);
            expect_refused(&c, v, "the same tokens' value under another key", i);
        }
        memory_store_free(&others);
        close_scene(&c);
    }
}

/* ---- contradictions under sound checksums ---- */

typedef struct lie {
    size_t at, size;
    uint64_t value;
} lie;

/* Set a field to a value that it has not; 0: it has. */
static int tell(memory_value *v, size_t at, size_t size, uint64_t value)
{
    unsigned char before[8];
    memcpy(before, v->data + at, 8);
    if (size == 8)
        put64(v->data + at, value);
    else
        put32(v->data + at, (uint32_t)value);
    return memcmp(before, v->data + at, 8) != 0;
}

static void test_contradictions(void **state)
{
    static const uint64_t numbers[] = {0,           1,
                                       2,           3,
                                       4,           8,
                                       9,           15,
                                       24,          32,
                                       38,          63,
                                       64,          65,
                                       100,         127,
                                       128,         129,
                                       192,         193,
                                       256,         1000,
                                       1024,        1025,
                                       4096,        65536,
                                       0x7fffffffu, 0x80000000u,
                                       0xfffffffe,  0xffffffff,
                                       1ull << 32,  1ull << 40,
                                       1ull << 63,  UINT64_MAX - 63,
                                       UINT64_MAX};
    static const lie fields[] = {
        {VALUE_VERSION, 4, 0},
        {VALUE_FLAGS, 4, 0},
        {VALUE_BYTES, 8, 0},
        {VALUE_TOKENS, 8, 0},
        {VALUE_BLOB, 8, 0},
        {VALUE_N, 4, 0},
        {VALUE_ENTRIES + ENTRY_ROW, 8, 0},
        {VALUE_ENTRIES + ENTRY_GROUP, 4, 0},
        {VALUE_ENTRIES + ENTRY_FORM, 4, 0},
        {VALUE_ENTRIES + ENTRY_TOKENS, 4, 0},
        {VALUE_ENTRIES + ENTRY_LAYERS, 4, 0},
        {VALUE_ENTRIES + ENTRY_IMAGE, 8, 0},
    };
    (void)state;
    for (size_t k = 0; k < 2 * KINDS; k++) {
        const memory_value *values[ROWS] = {NULL};
        scene c;
        size_t n;
        open_scene(&c, k / 2, (int)(k % 2));
        n = pick(&c, values);
        for (size_t i = 0; i < n; i++)
            for (size_t f = 0; f < sizeof fields / sizeof *fields; f++)
                for (size_t j = 0; j < 3 * sizeof numbers / sizeof *numbers;
                     j += i == n / 2 && k < 2 && !is_quick() ? 1 : 5) {
                    const memory_value *v = values[i];
                    memory_value *put = memory_store_set(&c.m, &v->key, v->data, v->bytes);
                    const lie *l = &fields[f];
                    uint64_t is = l->size == 8 ? get64(v->data + l->at) : get32(v->data + l->at);
                    uint64_t x = numbers[j / 3];
                    x = j % 3 == 0 ? x : j % 3 == 1 ? is + x : is - x;
                    if (!tell(put, l->at, l->size, x))
                        continue;
                    resign_value(put->data, put->bytes);
                    expect_refused(&c, v, "a field was changed", f * 1000 + j);
                }
        close_scene(&c);
    }
}

/* The next position of a block's value is none; of a checkpoint's it may be any. */
static void test_next_position(void **state)
{
    (void)state;
    for (int checkpoints = 0; checkpoints < 2; checkpoints++) {
        static const uint32_t positions[] = {0, 5, 0x7fffffff, 0x80000000, 0xfffffffe};
        const memory_value *values[ROWS] = {NULL}, *v;
        scene c;
        open_scene(&c, 0, checkpoints);
        (void)pick(&c, values);
        v = values[0];
        for (size_t i = 0; i < sizeof positions / sizeof *positions; i++) {
            memory_value *put = memory_store_set(&c.m, &v->key, v->data, v->bytes);
            kvt_prefix_result got;
            assert_true(tell(put, VALUE_POSITION, 4, positions[i]));
            resign_value(put->data, put->bytes);
            if (!checkpoints || positions[i] > 0x7fffffff) {
                expect_refused(&c, v, "a next position", i);
                continue;
            }
            get(&c, &got);
            assert_int_equal(got.n_tokens, DEEPEST);
            assert_int_equal(kvt_seq_next_position(c.to), (int32_t)positions[i]);
            expect_ok(c.s.cache, kvt_seq_clear(c.to));
        }
        close_scene(&c);
    }
}

/* A value of some of another one's entries, in any order: sizes, digests and sum are sound. */
static memory_value *rebuild(memory_store *m, const memory_value *v, const size_t *entries,
                             size_t n)
{
    const value_map map = map_value(v->data, v->bytes);
    const uint64_t blob = get64(v->data + VALUE_BLOB);
    size_t bytes_all, at;
    unsigned char *made = calloc(1, v->bytes * 4 + n * 1000);
    memory_value *put;

    assert_non_null(made);
    memcpy(made, v->data, VALUE_ENTRIES);
    put32(made + VALUE_N, (uint32_t)n);
    for (size_t i = 0; i < n; i++)
        memcpy(made + VALUE_ENTRIES + i * ENTRY_BYTES,
               v->data + VALUE_ENTRIES + entries[i] * ENTRY_BYTES, ENTRY_BYTES);
    at = map_value(made, v->bytes * 4).head;
    for (size_t i = 0; i < n; i++) {
        size_t from = map.head, size = 0;
        for (size_t j = 0; j <= entries[i]; j++) {
            const unsigned char *entry = v->data + VALUE_ENTRIES + j * ENTRY_BYTES;
            from += size;
            size = get32(entry + ENTRY_LAYERS) * (size_t)get64(entry + ENTRY_IMAGE);
        }
        memcpy(made + at, v->data + from, size);
        at += size;
    }
    memcpy(made + at, v->data + map.blob, (size_t)blob);
    bytes_all = at + (size_t)blob;
    put64(made + VALUE_BYTES, bytes_all);
    resign_value(made, bytes_all);
    put = memory_store_set(m, &v->key, made, bytes_all);
    free(made);
    return put;
}

/* What kvt_value_check says of a value. */
static void expect_checked(const void *data, size_t n, kvt_status expected, const char *what,
                           size_t detail)
{
    kvt_value_info info = {.struct_size = sizeof info};
    char text[200] = "";
    const kvt_status status = kvt_value_check(NULL, data, n, &info, text, sizeof text);
    if (status != expected)
        fail_msg("%s (%zu): %d, not %d: %s", what, detail, (int)status, (int)expected, text);
}

/* A checkpoint whose rows are not those of its length. */
static void test_rows_of_checkpoints(void **state)
{
    static const struct {
        size_t n, entries[6];
    } lists[] = {{0, {0}},
                 {1, {0}},
                 {1, {1}},
                 {2, {1, 0}},
                 {2, {1, 1}},
                 {2, {0, 0}},
                 {3, {0, 0, 1}},
                 {3, {0, 1, 1}},
                 {3, {1, 0, 1}},
                 {4, {0, 1, 0, 1}},
                 {5, {0, 0, 0, 0, 1}}};
    (void)state;
    for (size_t k = 0; k < KINDS; k++) {
        const memory_value *v;
        kvt_prefix_result got;
        scene c;
        size_t n, first;
        open_scene(&c, k, 1);
        v = find_value(&c.sound, 1, DEEPEST, 0);
        n = get32(v->data + VALUE_N);
        /* Types that are not sealed have the last row alone. */
        assert_int_equal(n, kinds[k].k_type < KVT_TYPE_I8 && kinds[k].v_type < KVT_TYPE_I8 ? 1 : 2);
        for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
            int same = lists[i].n == n;
            size_t most = 0;
            for (size_t j = 0; j < lists[i].n; j++) {
                same &= lists[i].entries[j] == j;
                most = lists[i].entries[j] > most ? lists[i].entries[j] : most;
            }
            if (most >= n)
                continue;
            (void)rebuild(&c.m, v, lists[i].entries, lists[i].n);
            if (!same && !(n == 2 && lists[i].n == 1 && lists[i].entries[0] == 1)) {
                expect_refused(&c, v, "other rows", i);
                continue;
            }
            /*
             * Without its open full row the value is one of a cache with a smaller residual window;
             * the store has that row sealed.
             */
            get(&c, &got);
            assert_int_equal(got.n_tokens, DEEPEST);
            assert_int_equal(got.n_refused, 0);
            expect_ok(c.s.cache, kvt_seq_clear(c.to));
        }
        /* Rows of a length that is not the checkpoint's, and more tokens in the last one. */
        first = VALUE_ENTRIES + (n - 1) * ENTRY_BYTES;
        for (uint32_t x = 0; x < 70; x++) {
            memory_value *put = memory_store_set(&c.m, &v->key, v->data, v->bytes);
            if (x != DEEPEST % 64) {
                put32(put->data + first + ENTRY_TOKENS, x);
                resign_value(put->data, put->bytes);
                expect_refused(&c, v, "other tokens of its last row", x);
            }
        }
        close_scene(&c);
    }
}

/*
 * The last row of a checkpoint, behind an open one, is open again: no sequence comes to that. All
 * is sound but for this; the seeds are zeros.
 */
static void test_open_again(void **state)
{
    enum { BEFORE = 64 * 16 * 2 + 128 + 64, SEED = 2 * 64 + 64, BEHIND = 128 + 64 * 16 * 2 };
    const size_t k = 2, heads = 1, layers = 2; /* i4, i5 of 16 dims */
    const memory_value *v;
    unsigned char *made, *at;
    size_t from, n;
    scene c;
    (void)state;
    open_scene(&c, k, 1);
    v = find_value(&c.sound, 1, DEEPEST, 0);
    assert_int_equal(get32(v->data + VALUE_N), 2);
    assert_int_equal(get64(v->data + VALUE_ENTRIES + ENTRY_BYTES + ENTRY_IMAGE),
                     heads * (BEFORE + BEHIND));
    n = v->bytes + layers * heads * SEED;
    made = calloc(1, n);
    assert_non_null(made);
    from = map_value(v->data, v->bytes).head + layers * heads * (BEFORE + BEHIND);
    memcpy(made, v->data, from);
    at = made + from;
    for (size_t i = 0; i < layers * heads; i++) {
        memcpy(at, v->data + from, BEFORE);
        memcpy(at + BEFORE + SEED, v->data + from + BEFORE, BEHIND);
        at += BEFORE + SEED + BEHIND;
        from += BEFORE + BEHIND;
    }
    memcpy(at, v->data + from, v->bytes - from); /* the blob */
    put64(made + VALUE_BYTES, n);
    put32(made + VALUE_ENTRIES + ENTRY_BYTES + ENTRY_FORM, 3);
    put64(made + VALUE_ENTRIES + ENTRY_BYTES + ENTRY_IMAGE, heads * (BEFORE + SEED + BEHIND));
    resign_value(made, n);
    (void)memory_store_set(&c.m, &v->key, made, n);
    expect_checked(made, n, KVT_ERR_CORRUPT, "open again behind an open one", 0);
    expect_refused(&c, v, "open again behind an open one", 0);
    free(made);
    close_scene(&c);
}

/*
 * Any byte of an image may be another one under sound digests: what is taken then is what a
 * snapshot may hold, too.
 */
static void test_images(void **state)
{
    const size_t step = is_quick() ? 101 : 7;
    (void)state;
    for (size_t k = 0; k < 2 * KINDS; k++) {
        const memory_value *values[ROWS] = {NULL}, *v;
        size_t refused = 0, taken = 0, head;
        scene c;
        open_scene(&c, k / 2, (int)(k % 2));
        v = values[pick(&c, values) / 2];
        head = map_value(v->data, v->bytes).head;
        for (size_t at = head; at + 2 < v->bytes; at += step) {
            memory_value *put = memory_store_set(&c.m, &v->key, v->data, v->bytes);
            kvt_prefix_result got;
            bytes file;
            kvt_seq *loaded;
            put->data[at + 1] = 0x7e; /* a NaN of f16 */
            if (at % 2)
                put->data[at] = 0x80; /* -128 of i8 */
            if (memcmp(put->data, v->data, v->bytes) == 0)
                continue;
            resign_value(put->data, put->bytes);
            set_mode(&c, c.n++);
            get(&c, &got);
            assert_true(got.n_refused <= 1);
            if (got.n_refused) {
                refused++;
                assert_int_equal(got.n_tokens, left_without(&c, v));
                assert_null(memory_store_find(&c.m, &v->key));
            } else if (taken++ % 16 == 0) {
                assert_int_equal(got.n_tokens, k % 2 ? DEEPEST : c.rows * 64);
                file = saved(c.s.cache, c.to, KVT_CODEC_RAW);
                loaded = seq_of(&c.s);
                expect_ok(c.s.cache, load_bytes(loaded, file.data, file.n, NULL));
                (void)attend_hash(&c.s, c.to);
                kvt_seq_destroy(loaded);
                bytes_free(&file);
            }
            expect_ok(c.s.cache, kvt_seq_clear(c.to));
        }
        if (!refused || !taken)
            fail_msg("%s: %zu refused, %zu taken", c.name, refused, taken);
        if (kinds[k / 2].k_type == KVT_TYPE_I8 && k % 2 == 0) { /* a code of -128 */
            memory_store_set(&c.m, &v->key, v->data, v->bytes)->data[head] = 0x80;
            resign_value(memory_store_find(&c.m, &v->key)->data, v->bytes);
            expect_refused(&c, v, "-128", 0);
        }
        close_scene(&c);
    }
}

/* Of f16 keys with all dims no two bytes can be a NaN's. */
static void test_not_finite(void **state)
{
    const memory_value *v;
    scene c;
    size_t head;
    (void)state;
    open_scene(&c, 4, 0);
    v = find_value(&c.sound, 0, 128, 0);
    head = map_value(v->data, v->bytes).head;
    for (size_t at = head; at < head + 64 * 16 * 2; at += 2) {
        memory_value *put = memory_store_set(&c.m, &v->key, v->data, v->bytes);
        put->data[at] = (unsigned char)at;
        put->data[at + 1] = at % 4 ? 0x7c : 0xff;
        resign_value(put->data, put->bytes);
        expect_refused(&c, v, "a value that is not finite", at);
    }
    close_scene(&c);
}

/* Of two groups, where a value of one is put for the other. */
static void test_groups(void **state)
{
    rng r = {5};
    kvt_group_config groups[2] = {group_of(2, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8),
                                  group_of(2, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8)};
    subject s;
    memory_store m, sound;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[TOKENS];
    kvt_seq *source, *to;
    kvt_prefix_result got;

    (void)state;
    groups[1].rotation_seed = 7;
    open_subject(&s, groups, 2, &r);
    open_cache(&s, NULL);
    make_prompt(prompt, TOKENS);
    source = sequence_of(&s, TOKENS);
    to = seq_of(&s);
    (void)memory_store_open(&sound);
    expect_ok(s.cache, kvt_prefix_put(&store, source, NULL, NULL));
    memory_store_copy(&m, &sound);
    for (uint32_t g = 0; g < 2; g++)
        for (int mended = 0; mended < 2; mended++) {
            const memory_value *v = find_value(&sound, 0, 192, g);
            const memory_value *other = find_value(&sound, 0, 192, 1 - g);
            memory_value *put = memory_store_set(&m, &v->key, other->data, other->bytes);
            if (mended) {
                memcpy(put->data + VALUE_KEY, &v->key, sizeof v->key);
                resign_value(put->data, put->bytes);
            }
            expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, TOKENS, NULL, &got));
            assert_int_equal(got.n_tokens, 128);
            assert_int_equal(got.n_refused, 1);
            assert_null(memory_store_find(&m, &v->key));
            expect_ok(s.cache, kvt_seq_clear(to));
            (void)memory_store_set(&m, &v->key, v->data, v->bytes);
        }
    kvt_seq_destroy(source);
    kvt_seq_destroy(to);
    memory_store_free(&m);
    memory_store_free(&sound);
    close_subject(&s);
}

/* Block's values that a head alone shows to be none. */
static void test_heads_of_blocks(void **state)
{
    static const struct {
        uint32_t n_tokens, row, tokens, form;
        kvt_status status;
    } heads[] = {
        {128, 1, 64, 0, KVT_OK},          {128, 1, 64, 2, KVT_OK},
        {64, 0, 64, 0, KVT_OK},           {128, 0, 64, 0, KVT_ERR_CORRUPT},
        {65, 0, 64, 0, KVT_ERR_CORRUPT},  {65, 1, 1, 0, KVT_ERR_CORRUPT},
        {127, 1, 63, 0, KVT_ERR_CORRUPT}, {63, 0, 63, 0, KVT_ERR_CORRUPT},
        {128, 1, 64, 1, KVT_ERR_CORRUPT}, {128, 1, 64, 3, KVT_ERR_CORRUPT},
    };
    memory_value *v;
    scene c;
    (void)state;
    open_scene(&c, 0, 0);
    v = find_value(&c.m, 0, 128, 0);
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        put64(v->data + VALUE_TOKENS, heads[i].n_tokens);
        put64(v->data + VALUE_ENTRIES + ENTRY_ROW, heads[i].row);
        put32(v->data + VALUE_ENTRIES + ENTRY_TOKENS, heads[i].tokens);
        put32(v->data + VALUE_ENTRIES + ENTRY_FORM, heads[i].form);
        resign_value(v->data, v->bytes);
        expect_checked(v->data, v->bytes, heads[i].status, "a block's head", i);
    }
    close_scene(&c);
}

/*
 * Of a checkpoint of two groups, with two open rows each, any of its blocks in any order: it is one
 * with the groups ascending and all rows from some one on to the last. A get and a check without a
 * cache agree in that, but for how many groups there are.
 */
static void test_order_of_checkpoints(void **state)
{
    enum { N = 4, LONGEST = 5 };
    rng r = {6};
    kvt_group_config groups[2] = {group_of(2, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8),
                                  group_of(2, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8)};
    static const uint64_t point[] = {DEEPEST};
    kvt_prefix_options put_options = prefix_options(), options = prefix_options();
    subject s;
    memory_store m, sound;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[TOKENS];
    kvt_seq *source, *to;
    kvt_prefix_result got;
    const memory_value *v;
    unsigned char *copy;
    size_t n_sound = 0;

    (void)state;
    open_subject(&s, groups, 2, &r);
    open_cache(&s, NULL);
    make_prompt(prompt, TOKENS);
    put_options.checkpoints = options.checkpoints = KVT_PREFIX_CHECKPOINT;
    options.checkpoint_tokens = point;
    options.n_checkpoint_tokens = 1;
    source = sequence_of(&s, DEEPEST);
    expect_ok(s.cache, kvt_seq_checkpoint(source, "blob", 4));
    grow(&s, source, TOKENS - DEEPEST);
    to = seq_of(&s);
    (void)memory_store_open(&sound);
    expect_ok(s.cache, kvt_prefix_put(&store, source, &put_options, NULL));
    memory_store_copy(&m, &sound);
    v = find_value(&sound, 1, DEEPEST, 0);
    assert_int_equal(get32(v->data + VALUE_N), N);
    for (size_t n = 0, lists = 1; n <= LONGEST; n++, lists *= N)
        for (size_t i = 0; i < lists; i++) {
            size_t entries[LONGEST] = {0}, x = i, at = 0;
            memory_value *put;
            int is_sound, checks;
            for (size_t j = 0; j < n; j++, x /= N)
                entries[j] = x % N;
            at += at < n && entries[at] == 0;
            is_sound = at < n && entries[at++] == 1;
            checks = is_sound && at == n; /* of a cache of one group */
            at += at < n && entries[at] == 2;
            is_sound &= at < n && entries[at] == 3 && at + 1 == n;
            n_sound += (size_t)is_sound;
            put = rebuild(&m, v, entries, n);
            expect_checked(put->data, put->bytes, is_sound || checks ? KVT_OK : KVT_ERR_CORRUPT,
                           "blocks of a checkpoint", n * 10000 + i);
            expect_ok(s.cache, kvt_prefix_get(&store, to, prompt, TOKENS, &options, &got));
            if (got.n_refused != !is_sound || got.n_tokens != (is_sound ? DEEPEST : 0))
                fail_msg("%zu blocks, %zu: %u tokens, %u refused", n, i, (unsigned)got.n_tokens,
                         (unsigned)got.n_refused);
            expect_ok(s.cache, kvt_seq_clear(to));
        }
    assert_int_equal(n_sound, 4);
    copy = malloc(v->bytes);
    assert_non_null(copy);
    for (uint32_t a = 0; a < 4; a++) /* forms, which images without a cache may be of */
        for (uint32_t b = 0; b < 4; b++) {
            memcpy(copy, v->data, v->bytes);
            put32(copy + VALUE_ENTRIES + ENTRY_FORM, a);
            put32(copy + VALUE_ENTRIES + ENTRY_BYTES + ENTRY_FORM, b);
            resign_value(copy, v->bytes);
            expect_checked(copy, v->bytes, a % 2 == 0 || b == 1 ? KVT_OK : KVT_ERR_CORRUPT,
                           "forms of a checkpoint", a * 10 + b);
        }
    free(copy);
    kvt_seq_destroy(source);
    kvt_seq_destroy(to);
    memory_store_free(&m);
    memory_store_free(&sound);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes_of_blocks),
        cmocka_unit_test(test_bytes_of_checkpoints),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_swapped),
        cmocka_unit_test(test_foreign),
        cmocka_unit_test(test_other_users),
        cmocka_unit_test(test_contradictions),
        cmocka_unit_test(test_next_position),
        cmocka_unit_test(test_rows_of_checkpoints),
        cmocka_unit_test(test_open_again),
        cmocka_unit_test(test_heads_of_blocks),
        cmocka_unit_test(test_order_of_checkpoints),
        cmocka_unit_test(test_images),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_groups),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    print_message("%zu values that are damaged, another's or contradict themselves\n", n_tried);
    return failed;
}
