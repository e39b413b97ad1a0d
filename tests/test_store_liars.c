/*
 * Stores that do not do what they promise: parts out of order, values twice, sizes that are none.
 * What is got is sound, or nothing; nothing is written where it must not, nothing leaks.
 */
#include "store_scenes.h"

#include <stdio.h>

enum { TOKENS = 330, SEALED = 256, POINT = 200 };

typedef enum lie {
    HALVES,       /* none: in two parts */
    EMPTY_PARTS,  /* none: parts of no bytes between */
    LAST_FIRST,   /* the second half, then the first */
    GAP,          /* bytes in the middle are left out */
    OVERLAP,      /* the first half, and half of it again */
    SHORT,        /* the last byte does not come */
    LONG_PART,    /* one byte more than total says */
    TOTAL_GROWS,  /* total is another one in the second part */
    TWICE,        /* each value two times */
    AGAIN,        /* all values, and all of them again, backwards */
    FROM_START,   /* half of a value, then all of it */
    INTERLEAVED,  /* first halves of all values, then the second ones */
    WRONG_INDEX,  /* the next key's value */
    OUT_OF_RANGE, /* values of keys that there are not, before the others */
    NOTHING,      /* KVT_OK and no value */
    AFTER_STOP,   /* goes on whatever is answered */
    HUGE_TOTAL,   /* and a head that says so, too, resigned */
    HUGE_ENTRIES, /* with as many entries as fit into that */
    HUGE_BLOB,
    BAD_THEN_GOOD, /* a damaged value, then a sound one */
    GOOD_THEN_BAD,
    PLACE_ONLY, /* memory is taken, and not filled: the part comes from elsewhere */
    LIES
} lie;

typedef struct liar {
    memory_store m; /* the functions that do not lie have it as their user: the first member */
    lie lie;
    size_t n_given;
} liar;

typedef struct scene {
    ledger memory;
    subject s;
    liar l;
    memory_store sound;
    kvt_store store;
    kvt_seq *source, *to, *like[SEALED / 64 + 1], *point;
    int32_t prompt[TOKENS];
} scene;

typedef struct giving {
    const kvt_store_receiver *to;
    liar *l;
    int stopped;
} giving;

static int part(giving *g, size_t i, uint64_t total, uint64_t offset, const void *data, size_t n)
{
    int answer;
    if (g->stopped && g->l->lie != AFTER_STOP)
        return 1;
    answer = g->to->part(g->to->user, i, total, offset, data, n);
    g->l->n_given++;
    g->stopped |= answer == KVT_STORE_STOP;
    return answer != KVT_STORE_MORE && g->l->lie != AFTER_STOP;
}

static void give_halves(giving *g, size_t i, const unsigned char *data, size_t n)
{
    const size_t half = n / 2;
    if (!part(g, i, n, 0, data, half))
        (void)part(g, i, n, half, data + half, n - half);
}

/* A value that claims `more` bytes than there are, in one field, under a sound checksum. */
static void give_huge(giving *g, size_t i, const memory_value *v)
{
    const uint64_t total = g->l->lie == HUGE_BLOB ? (uint64_t)1 << 45 : (uint64_t)1 << 38;
    unsigned char *copy = malloc(v->bytes);
    assert_non_null(copy);
    memcpy(copy, v->data, v->bytes);
    put64(copy + VALUE_BYTES, total);
    if (g->l->lie == HUGE_ENTRIES)
        put32(copy + VALUE_N, 0xfffffff0);
    if (g->l->lie == HUGE_BLOB)
        put64(copy + VALUE_BLOB, total - map_value(v->data, v->bytes).blob);
    resum_value(copy, v->bytes);
    (void)part(g, i, total, 0, copy, v->bytes);
    free(copy);
}

static void give(giving *g, size_t i, const memory_value *v, size_t n_keys)
{
    const size_t n = v->bytes, half = n / 2;
    const unsigned char *data = v->data;
    unsigned char *copy = calloc(1, n + 1);
    assert_non_null(copy);
    memcpy(copy, data, n);
    switch (g->l->lie) {
    case EMPTY_PARTS:
        for (size_t at = 0; at < n; at += 500) {
            if (part(g, i, n, at, data + at, 0) ||
                part(g, i, n, at, data + at, n - at < 500 ? n - at : 500))
                break;
        }
        break;
    case LAST_FIRST:
        (void)part(g, i, n, half, data + half, n - half);
        (void)part(g, i, n, 0, data, half);
        break;
    case GAP:
        (void)part(g, i, n, 0, data, half);
        (void)part(g, i, n, half + 1, data + half + 1, n - half - 1);
        break;
    case OVERLAP:
        (void)part(g, i, n, 0, data, half);
        (void)part(g, i, n, half / 2, data + half / 2, n - half / 2);
        break;
    case SHORT: (void)part(g, i, n, 0, data, n - 1); break;
    case LONG_PART: (void)part(g, i, n, 0, copy, n + 1); break;
    case TOTAL_GROWS:
        (void)part(g, i, n, 0, data, half);
        (void)part(g, i, n + 64, half, data + half, n - half);
        break;
    case TWICE:
        give_halves(g, i, data, n);
        give_halves(g, i, data, n);
        break;
    case FROM_START:
        (void)part(g, i, n, 0, data, half);
        give_halves(g, i, data, n);
        break;
    case OUT_OF_RANGE:
        (void)part(g, n_keys, n, 0, data, n);
        (void)part(g, SIZE_MAX, n, 0, data, n);
        (void)part(g, SIZE_MAX - 1, n, 0, data, n);
        give_halves(g, i, data, n);
        break;
    case AFTER_STOP:
        copy[half] ^= 1;
        give_halves(g, i, copy, n);
        give_halves(g, i, copy, n);
        break;
    case HUGE_TOTAL:
    case HUGE_ENTRIES:
    case HUGE_BLOB: give_huge(g, i, v); break;
    case BAD_THEN_GOOD:
    case GOOD_THEN_BAD:
        copy[n - 1] ^= 1;
        (void)part(g, i, n, 0, g->l->lie == BAD_THEN_GOOD ? copy : data, n);
        (void)part(g, i, n, 0, g->l->lie == BAD_THEN_GOOD ? data : copy, n);
        break;
    case PLACE_ONLY: {
        size_t at, room;
        for (at = 0; at < n; at += room) {
            room = n - at < 333 ? n - at : 333;
            (void)g->to->place(g->to->user, i, n, at, &room);
            assert_true(room > 0 && room <= 333);
            if (part(g, i, n, at, data + at, room))
                break;
        }
        break;
    }
    default: give_halves(g, i, data, n); break;
    }
    free(copy);
}

static kvt_status lie_get(void *user, const kvt_store_key *keys, size_t n,
                          const kvt_store_receiver *receiver, kvt_store_error *error)
{
    liar *l = user;
    giving g = {receiver, l, 0};
    (void)error;
    if (l->lie == NOTHING)
        return KVT_OK;
    if (l->lie == INTERLEAVED) {
        for (size_t half = 0; half < 2; half++)
            for (size_t i = 0; i < n; i++) {
                const memory_value *v = memory_store_find(&l->m, &keys[i]);
                if (v && half == 0)
                    (void)part(&g, i, v->bytes, 0, v->data, v->bytes / 2);
                else if (v)
                    (void)part(&g, i, v->bytes, v->bytes / 2, v->data + v->bytes / 2,
                               v->bytes - v->bytes / 2);
            }
        return KVT_OK;
    }
    for (size_t i = 0; i < n; i++) {
        const memory_value *v =
            memory_store_find(&l->m, &keys[l->lie == WRONG_INDEX ? (i + 1) % n : i]);
        if (v)
            give(&g, i, v, n);
    }
    for (size_t i = n; l->lie == AGAIN && i-- > 0;) {
        const memory_value *v = memory_store_find(&l->m, &keys[i]);
        if (v)
            give(&g, i, v, n);
    }
    return KVT_OK;
}

static void open_scene(scene *c)
{
    kvt_group_config group = geometry_group(3);
    rng r = {8};
    kvt_prefix_options options = prefix_options();

    memset(c, 0, sizeof *c);
    ledger_init(&c->memory);
    open_subject(&c->s, &group, 1, &r);
    c->s.ledger = &c->memory;
    open_cache(&c->s, NULL);
    c->store = memory_store_open(&c->l.m);
    (void)memory_store_open(&c->sound);
    c->store.user = &c->l;
    c->store.get = lie_get;
    make_prompt(c->prompt, TOKENS);
    c->source = sequence_of(&c->s, POINT);
    expect_ok(c->s.cache, kvt_seq_checkpoint(c->source, "some state of layers", 20));
    expect_ok(c->s.cache, kvt_seq_fork(c->source, POINT, &c->point));
    grow(&c->s, c->source, TOKENS - POINT);
    options.checkpoints = KVT_PREFIX_CHECKPOINT;
    expect_ok(c->s.cache, kvt_prefix_put(&c->store, c->source, &options, NULL));
    memory_store_copy(&c->l.m, &c->sound);
    c->to = seq_of(&c->s);
    for (size_t row = 0; row <= SEALED / 64; row++)
        c->like[row] = sequence_cut(&c->s, row * 64);
}

static void close_scene(scene *c)
{
    for (size_t row = 0; row <= SEALED / 64; row++)
        kvt_seq_destroy(c->like[row]);
    kvt_seq_destroy(c->point);
    kvt_seq_destroy(c->source);
    kvt_seq_destroy(c->to);
    memory_store_free(&c->l.m);
    memory_store_free(&c->sound);
    close_subject(&c->s);
    ledger_close(&c->memory);
}

/* What is got all the same, and how many values are found to be bad. */
static int takes_all(lie what)
{
    return what == HALVES || what == EMPTY_PARTS || what == TWICE || what == AGAIN ||
           what == FROM_START || what == OUT_OF_RANGE || what == BAD_THEN_GOOD ||
           what == GOOD_THEN_BAD || what == PLACE_ONLY;
}

static int is_bad(lie what)
{
    return what == WRONG_INDEX || what == AFTER_STOP || what == HUGE_TOTAL || what == HUGE_ENTRIES;
}

static void test_lies(void **state)
{
    scene c;
    size_t peak = 0;
    (void)state;
    open_scene(&c);
    for (int checkpoints = 0; checkpoints < 2; checkpoints++)
        for (lie what = HALVES; what < LIES; what++) {
            kvt_prefix_options options = prefix_options();
            kvt_prefix_result got;
            uint64_t expected = takes_all(what) ? checkpoints ? POINT : SEALED : 0;
            size_t live;
            options.checkpoints = (uint32_t)checkpoints;
            c.l.lie = what;
            expect_ok(c.s.cache, kvt_cache_trim(c.s.cache));
            c.memory.peak_bytes = live = c.memory.live_bytes;
            expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, &options, &got));
            if (what == AFTER_STOP && !checkpoints)
                assert_true(c.l.n_given > 4);
            if (got.n_tokens != expected || kvt_seq_length(c.to) != expected)
                fail_msg("lie %d: %u tokens, not %u", (int)what, (unsigned)got.n_tokens,
                         (unsigned)expected);
            if ((got.n_refused != 0) != (is_bad(what) || (what == HUGE_BLOB && !checkpoints)))
                fail_msg("lie %d: %u refused", (int)what, (unsigned)got.n_refused);
            assert_int_equal(got.n_values, !expected ? got.n_values : checkpoints ? 3 : 4);
            expect_equal(&c.s, c.to, expected && checkpoints ? c.point : c.like[expected / 64],
                         "a lie", what);
            if (what == HALVES)
                peak = c.memory.peak_bytes - live > peak ? c.memory.peak_bytes - live : peak;
            else if (c.memory.peak_bytes - live > peak + (3 << 20)) /* a blob grows by 1 MiB */
                fail_msg("lie %d: %zu bytes of memory", (int)what, c.memory.peak_bytes - live);
            expect_ok(c.s.cache, kvt_seq_clear(c.to));
            memory_store_copy(&c.sound, &c.l.m);
        }
    close_scene(&c);
}

/* exists that lies: of what is not there, with other numbers than 0 and 1, or with none. */
static kvt_status all_exist(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                            kvt_store_error *error)
{
    (void)user;
    (void)keys;
    (void)error;
    memset(found, 0xaa, n);
    return KVT_OK;
}

static kvt_status says_nothing(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                               kvt_store_error *error)
{
    (void)user;
    (void)keys;
    (void)n;
    (void)found;
    (void)error;
    return KVT_OK;
}

static void test_exists(void **state)
{
    scene c;
    (void)state;
    open_scene(&c);
    for (int checkpoints = 0; checkpoints < 2; checkpoints++) {
        kvt_prefix_options options = prefix_options();
        kvt_prefix_result got;
        options.checkpoints = (uint32_t)checkpoints;
        c.store.exists = all_exist;
        expect_ok(c.s.cache, kvt_prefix_probe(&c.store, c.to, c.prompt, TOKENS, &options, &got));
        assert_int_equal(got.n_tokens, checkpoints ? TOKENS - 1 : 320);
        expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, &options, &got));
        assert_int_equal(got.n_tokens, checkpoints ? POINT : SEALED);
        expect_equal(&c.s, c.to, checkpoints ? c.point : c.like[4], "exists", 0);
        expect_ok(c.s.cache, kvt_seq_clear(c.to));
        while (c.l.m.n)
            memory_store_drop(&c.l.m, &c.l.m.values[0]);
        expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, &options, &got));
        assert_int_equal(got.n_tokens, 0);
        memory_store_copy(&c.sound, &c.l.m);
        c.store.exists = says_nothing;
        expect_ok(c.s.cache, kvt_prefix_get(&c.store, c.to, c.prompt, TOKENS, &options, &got));
        assert_int_equal(got.n_tokens, 0);
    }
    close_scene(&c);
}

/* put that says it has put less, or more, than there is. */
static size_t claimed;
static kvt_status puts_less(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                            size_t n, size_t *n_put, kvt_store_error *error)
{
    (void)user;
    (void)keys;
    (void)values;
    (void)n;
    (void)error;
    *n_put = claimed;
    return KVT_OK;
}

static void test_put(void **state)
{
    kvt_prefix_result put;
    scene c;
    (void)state;
    open_scene(&c);
    while (c.l.m.n)
        memory_store_drop(&c.l.m, &c.l.m.values[0]);
    c.store.put = puts_less;
    for (claimed = 0; claimed < 10; claimed++) {
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, NULL, &put));
        assert_int_equal(put.n_values, claimed < 4 ? claimed : 4);
        assert_int_equal(put.n_tokens, put.n_values * 64);
    }
    /* A checkpoint that was not written does not count. */
    expect_ok(c.s.cache, kvt_seq_checkpoint(c.source, "x", 1));
    for (claimed = 0; claimed < 2; claimed++) {
        kvt_prefix_options options = {.struct_size = sizeof options};
        options.checkpoints = KVT_PREFIX_CHECKPOINT;
        options.n_tokens = kvt_seq_length(c.source);
        expect_ok(c.s.cache, kvt_prefix_put(&c.store, c.source, &options, &put));
        assert_int_equal(put.n_checkpoints, claimed ? 2 : 0);
    }
    close_scene(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lies),
        cmocka_unit_test(test_exists),
        cmocka_unit_test(test_put),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
