/*
 * The directory store, one process: values of all sizes through all kinds of receivers, the bound
 * and what it evicts, the counts. What else may be in a directory, and several processes, are in
 * test_store_shared.c. Runs in a folder of its own under the current one.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "store_values.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIECE ((size_t)256 << 10) /* that a get gives at once */

static char path[64];

static kvt_store open_store(uint64_t max_bytes)
{
    kvt_store s;
    store_ok(folder_open(path, max_bytes, &s));
    return s;
}

/* Close, and remove what is there. */
static void end_store(kvt_store *s)
{
    folder_agrees(path, s);
    assert_int_equal(folder_look(path).n_temporaries, 0);
    kvt_store_close(s);
    folder_remove(path);
}

static kvt_store_stats stats_of(kvt_store *s)
{
    kvt_store_stats stats;
    store_ok(s->stats(s->user, &stats, &store_error));
    return stats;
}

/* ---- opening ---- */

static void test_arguments(void **state)
{
    kvt_directory_config good, config;
    char text[64] = "", file[96];
    kvt_store s, before;
    (void)state;

    memset(&good, 0, sizeof good);
    good.struct_size = sizeof good;
    good.path = path;
    good.error_text = text;
    good.error_text_bytes = sizeof text;
    memset(&s, 0x55, sizeof s);
    before = s;
    assert_int_equal(kvt_store_open_directory(NULL, &s), KVT_ERR_ARG);
    assert_int_equal(kvt_store_open_directory(&good, NULL), KVT_ERR_ARG);
    config = good;
    config.struct_size--;
    assert_int_equal(kvt_store_open_directory(&config, &s), KVT_ERR_ARG);
    config = good;
    config.path = NULL;
    assert_int_equal(kvt_store_open_directory(&config, &s), KVT_ERR_ARG);
    config.path = "";
    assert_int_equal(kvt_store_open_directory(&config, &s), KVT_ERR_ARG);
    config = good;
    config.sync = 2;
    assert_int_equal(kvt_store_open_directory(&config, &s), KVT_ERR_ARG);
    config = good;
    config.reserved = 1;
    assert_int_equal(kvt_store_open_directory(&config, &s), KVT_ERR_ARG);
    assert_int_equal(access(path, F_OK), -1); /* not made */
    config = good;
    (void)snprintf(file, sizeof file, "%s/not/there", path);
    config.path = file; /* only its last part is made */
    assert_int_equal(kvt_store_open_directory(&config, &s), KVT_ERR_IO);
    assert_non_null(strstr(text, "mkdir failed: No such file"));
    config.error_text = NULL;
    assert_int_equal(kvt_store_open_directory(&config, &s), KVT_ERR_IO);
    assert_int_equal(close(open(path, O_WRONLY | O_CREAT, 0600)), 0); /* a file */
    assert_int_equal(kvt_store_open_directory(&good, &s), KVT_ERR_IO);
    assert_int_equal(unlink(path), 0);
    assert_memory_equal(&s, &before, sizeof s);
}

/* ---- values ---- */

/* A value of many parts, some of them empty, and more than one writev takes. */
static kvt_status put_parts(kvt_store *s, uint64_t number, size_t bytes, size_t n_parts, rng *r)
{
    kvt_store_part *parts = calloc(n_parts, sizeof *parts);
    unsigned char *data = malloc(bytes + 1);
    kvt_store_key key = key_of(number);
    kvt_store_value value = {parts, n_parts, bytes};
    size_t at = 0, n_put;
    kvt_status status;

    value_fill(number, 1, data, bytes);
    for (size_t i = 0; i < n_parts; i++) {
        size_t left = bytes - at;
        parts[i].bytes = i + 1 == n_parts ? left : rng_below(r, (uint32_t)(left / 8 + 2));
        parts[i].bytes = parts[i].bytes > left ? left : parts[i].bytes;
        parts[i].data = parts[i].bytes || i % 2 ? data + at : NULL;
        at += parts[i].bytes;
    }
    status = s->put(s->user, &key, &value, 1, &n_put, &store_error);
    free(parts);
    free(data);
    return status;
}

static void test_values(void **state)
{
    static const size_t sizes[] = {0,         1,     23,        24,        4096,
                                   PIECE - 1, PIECE, PIECE + 1, 4 * PIECE, 5 * PIECE + 12345};
    enum { N = sizeof sizes / sizeof sizes[0] };
    kvt_store s = open_store(0);
    kvt_store_key keys[N + 1];
    rng r = {3};
    uint64_t bytes = 0;
    (void)state;

    for (size_t i = 0; i < N; i++) {
        if (i % 2)
            store_ok(put_value(&s, i, 1, sizes[i]));
        else
            store_ok(put_parts(&s, i, sizes[i], i % 4 ? 3 : 200, &r));
        keys[i < 4 ? i : i + 1] = key_of(i);
        bytes += sizes[i];
    }
    keys[4] = key_of(1000); /* is not there */
    for (int places = 0; places < 3; places++)
        for (size_t most = 0; most < 3; most++) {
            collector c;
            collector_make(&c, N + 1);
            c.places = places;
            c.most = most == 2 ? 77777 : most * PIECE;
            store_ok(collector_get(&s, &c, keys, N + 1));
            for (size_t i = 0; i < N + 1; i++) {
                size_t number = i > 4 ? i - 1 : i;
                unsigned char *want = malloc(sizes[number % N] + 1);
                const got_value *v = &c.values[i];
                assert_int_equal(v->n_begun, i != 4);
                if (i != 4) {
                    value_fill(number, 1, want, sizes[number]);
                    assert_true(v->have == sizes[number] && v->total == v->have && !v->is_wrong);
                    if (v->have)
                        assert_memory_equal(v->data, want, v->have);
                }
                free(want);
            }
            assert_true(c.largest <= PIECE);
            assert_true(places != 1 || c.n_placed + 1 >= c.n_all);
            assert_true(places == 0 || c.n_placed > 3);
            assert_true(places == 2 || most != 0 || c.n_all < 22);
            collector_free(&c);
        }
    assert_int_equal(stats_of(&s).n_got, 9 * N);
    assert_int_equal(stats_of(&s).n_missed, 9);
    assert_int_equal(stats_of(&s).n_put, N);
    assert_int_equal(stats_of(&s).n_values, N);
    assert_int_equal(stats_of(&s).bytes, bytes);
    assert_int_equal(stats_of(&s).max_bytes, 0);
    assert_int_equal(stats_of(&s).n_failed, 0);
    for (size_t i = 0; i < N; i++) /* their sums are none: too small */
        if (sizes[i] < 24) {
            kvt_store_key key = key_of(i);
            store_ok(s.remove(s.user, &key, 1, &store_error));
        }
    end_store(&s);
}

/* Receivers that do not want all. */
static void test_answers(void **state)
{
    kvt_store s = open_store(0);
    kvt_store_key keys[4];
    (void)state;

    for (size_t i = 0; i < 4; i++) {
        keys[i] = key_of(i);
        store_ok(put_value(&s, i, 0, 3 * PIECE));
    }
    for (size_t stop = 0; stop < 12; stop++)
        for (int answer = KVT_STORE_SKIP; answer <= KVT_STORE_STOP; answer++) {
            size_t value = stop / 3, parts = stop % 3 + 1;
            uint64_t got = stats_of(&s).n_got, missed = stats_of(&s).n_missed;
            collector c;
            collector_make(&c, 4);
            c.stop_part = stop;
            c.answer = answer;
            store_ok(collector_get(&s, &c, keys, 4));
            for (size_t i = 0; i < 4; i++)
                assert_int_equal(c.values[i].n_parts, i == value ? parts
                                                      : i > value && answer == KVT_STORE_STOP ? 0
                                                                                              : 3);
            got = stats_of(&s).n_got - got;
            assert_int_equal(got, (answer == KVT_STORE_STOP ? value : 3) + (parts == 3));
            assert_int_equal(stats_of(&s).n_missed, missed);
            collector_free(&c);
        }
    end_store(&s);
}

static void test_replace_remove(void **state)
{
    kvt_store s = open_store(0);
    kvt_store_key keys[3] = {key_of(1), key_of(2), key_of(3)};
    uint8_t found[3] = {9, 9, 9};
    (void)state;

    store_ok(put_value(&s, 1, 1, 1000));
    store_ok(put_value(&s, 3, 1, 500));
    assert_int_equal(get_version(&s, 1), 1);
    store_ok(put_value(&s, 1, 2, 3000)); /* larger, smaller, the same */
    assert_int_equal(get_version(&s, 1), 2);
    assert_int_equal(stats_of(&s).bytes, 3500);
    store_ok(put_value(&s, 1, 3, 100));
    store_ok(put_value(&s, 1, 4, 100));
    assert_int_equal(get_version(&s, 1), 4);
    assert_int_equal(stats_of(&s).bytes, 600);
    assert_int_equal(stats_of(&s).n_values, 2);
    store_ok(s.exists(s.user, keys, 3, found, &store_error));
    assert_true(found[0] == 1 && found[1] == 0 && found[2] == 1);
    assert_int_equal(stats_of(&s).n_missed, 1);
    store_ok(s.remove(s.user, keys, 2, &store_error));
    assert_true(!has_value(&s, 1) && has_value(&s, 3));
    assert_int_equal(get_version(&s, 1), -1);
    assert_int_equal(stats_of(&s).bytes, 500);
    store_ok(s.remove(s.user, keys, 3, &store_error));
    assert_int_equal(stats_of(&s).n_values, 0);
    store_ok(s.remove(s.user, keys, 0, &store_error));
    store_ok(s.exists(s.user, keys, 0, found, &store_error));
    end_store(&s);
}

typedef struct listed {
    size_t n, most;
    uint64_t numbers; /* bits */
    int64_t used;     /* the largest */
    int is_wrong;
} listed;

static int on_entry(void *user, const kvt_store_entry *entry)
{
    listed *l = user;
    for (uint64_t i = 0; i < 40; i++) {
        kvt_store_key key = key_of(i);
        if (memcmp(&key, &entry->key, sizeof key) != 0)
            continue;
        l->is_wrong |= (l->numbers >> i & 1) != 0 || entry->bytes != 100 + i;
        l->numbers |= (uint64_t)1 << i;
    }
    l->is_wrong |= entry->left_seconds != -1 || entry->used_seconds < 0;
    l->used = entry->used_seconds > l->used ? entry->used_seconds : l->used;
    return ++l->n == l->most;
}

static void test_list(void **state)
{
    kvt_store s = open_store(0);
    listed l = {0, 0, 0, 0, 0};
    struct timespec old[2] = {{1000000, 0}, {1000000, 0}};
    char file[256];
    (void)state;

    store_ok(s.list(s.user, on_entry, &l, &store_error));
    assert_int_equal(l.n, 0);
    for (uint64_t i = 0; i < 40; i++)
        store_ok(put_value(&s, i, 0, 100 + (size_t)i));
    store_ok(s.list(s.user, on_entry, &l, &store_error));
    assert_true(l.n == 40 && l.numbers == ((uint64_t)1 << 40) - 1 && !l.is_wrong && l.used < 60);
    folder_file(path, 7, file, sizeof file);
    assert_int_equal(utimensat(AT_FDCWD, file, old, 0), 0);
    memset(&l, 0, sizeof l);
    store_ok(s.list(s.user, on_entry, &l, &store_error));
    assert_true(l.used > 1000000000 && !l.is_wrong);
    memset(&l, 0, sizeof l);
    l.most = 5;
    store_ok(s.list(s.user, on_entry, &l, &store_error));
    assert_int_equal(l.n, 5);
    end_store(&s);
}

/* Somebody cuts a file short: before the get, and amid it. */
static void cut(void *user)
{
    assert_int_equal(truncate(user, (off_t)PIECE), 0);
}

static void test_cut_short(void **state)
{
    kvt_store s = open_store(0);
    kvt_store_key key = key_of(1);
    char file[256];
    (void)state;

    folder_file(path, 1, file, sizeof file);
    for (int places = 0; places < 2; places++) {
        uint64_t missed = stats_of(&s).n_missed;
        collector c;
        store_ok(put_value(&s, 1, 1, 4 * PIECE));
        collector_make(&c, 1);
        c.places = places;
        c.on_part = cut;
        c.user = file;
        store_ok(collector_get(&s, &c, &key, 1));
        assert_true(c.values[0].have == PIECE && c.values[0].total == 4 * PIECE);
        assert_int_equal(stats_of(&s).n_missed, missed + 1);
        collector_free(&c);
        assert_int_equal(get_version(&s, 1), -2); /* a shorter value, which its sum tells */
    }
    assert_int_equal(unlink(file), 0);
    store_ok(s.collect(s.user, &store_error));
    end_store(&s);
}

/* ---- the bound ---- */

/* Those of numbers 0 .. n - 1 that are there, as bits. The store is not asked: that is a use. */
static uint64_t present(kvt_store *s, uint64_t n)
{
    uint64_t bits = 0;
    (void)s;
    for (uint64_t i = 0; i < n; i++) {
        char file[256];
        folder_file(path, i, file, sizeof file);
        bits |= (uint64_t)(access(file, F_OK) == 0) << i;
    }
    return bits;
}

/*
 * The order of use: a model that keeps the same bound, and random puts and gets of one key or
 * several, of which the first is the newest.
 */
static void test_order(void **state)
{
    enum { NUMBERS = 40, ROOM = 20, BYTES = 1000 };
    kvt_store s = open_store(ROOM * BYTES);
    uint64_t order[NUMBERS], evicted = 0; /* the oldest first */
    size_t n = 0;
    rng r = {5};
    (void)state;

    for (size_t step = 0; step < 600; step++) {
        uint64_t numbers[4];
        size_t n_keys = 1 + rng_below(&r, 4), is_put = rng_below(&r, 2), i, at;
        kvt_store_key keys[4];
        for (i = 0; i < n_keys; i++) {
            do {
                numbers[i] = rng_below(&r, NUMBERS);
                for (at = 0; at < i && numbers[at] != numbers[i]; at++)
                    ;
            } while (at < i);
            keys[i] = key_of(numbers[i]);
        }
        if (is_put) {
            unsigned char data[4][BYTES];
            kvt_store_part parts[4];
            kvt_store_value values[4];
            size_t n_put;
            for (i = 0; i < n_keys; i++) {
                value_fill(numbers[i], step, data[i], BYTES);
                parts[i].data = data[i];
                parts[i].bytes = BYTES;
                values[i].parts = &parts[i];
                values[i].n_parts = 1;
                values[i].bytes = BYTES;
            }
            store_ok(s.put(s.user, keys, values, n_keys, &n_put, &store_error));
            assert_int_equal(n_put, n_keys);
        } else {
            collector c;
            collector_make(&c, n_keys);
            store_ok(collector_get(&s, &c, keys, n_keys));
            collector_free(&c);
        }
        /* The model: remove what is used, evict for each new one, append in reverse. */
        size_t used = 0, keep[4];
        for (i = 0; i < n_keys; i++) {
            for (at = 0; at < n && order[at] != numbers[i]; at++)
                ;
            keep[i] = at < n || is_put;
            if (at == n && is_put && n + used == ROOM) { /* not what this call uses */
                size_t k, victim;
                for (victim = 0; victim < n; victim++) {
                    for (k = 0; k < i && numbers[k] != order[victim]; k++)
                        ;
                    if (k == i)
                        break;
                }
                memmove(order + victim, order + victim + 1, (n - victim - 1) * sizeof *order);
                n--;
                evicted++;
            } else if (at < n) {
                memmove(order + at, order + at + 1, (n - at - 1) * sizeof *order);
                n--;
            }
            used += keep[i];
        }
        for (i = n_keys; i-- > 0;)
            if (keep[i])
                order[n++] = numbers[i];
        uint64_t bits = 0;
        for (at = 0; at < n; at++)
            bits |= (uint64_t)1 << order[at];
        if (present(&s, NUMBERS) != bits)
            fail_msg("step %zu: %llx instead of %llx", step,
                     (unsigned long long)present(&s, NUMBERS), (unsigned long long)bits);
    }
    assert_true(evicted > 50);
    assert_int_equal(stats_of(&s).n_evicted, evicted);
    assert_int_equal(stats_of(&s).n_failed, 0);
    end_store(&s);
}

static void test_bound(void **state)
{
    kvt_store s = open_store(10000);
    kvt_store_key key = key_of(1);
    (void)state;

    for (uint64_t i = 0; i < 10; i++)
        store_ok(put_value(&s, i, 0, 1000));
    assert_int_equal(present(&s, 11), 0x3ff);
    store_ok(put_value(&s, 9, 1, 1000)); /* the same size: nothing is evicted */
    assert_int_equal(stats_of(&s).n_evicted, 0);
    store_ok(put_value(&s, 0, 1, 1500)); /* 500 more: the oldest other one, 1 */
    assert_int_equal(present(&s, 11), 0x3fd);
    assert_int_equal(stats_of(&s).bytes, 9500);
    store_ok(put_value(&s, 10, 1, 500));
    assert_int_equal(stats_of(&s).bytes, 10000);
    store_ok(put_value(&s, 11, 1, 1));
    assert_int_equal(present(&s, 12), 0xff9); /* 2 */
    store_is(KVT_ERR_FULL, put_value(&s, 3, 9, 10001));
    assert_non_null(
        strstr(store_error.text, "10001 bytes is more than the store's bound of 10000"));
    assert_int_equal(get_version(&s, 3), 0); /* the old one stays */
    store_ok(put_value(&s, 3, 2, 10000));    /* all the others go */
    assert_int_equal(present(&s, 12), 1 << 3);
    assert_int_equal(get_version(&s, 3), 2);
    store_ok(put_value(&s, 1, 3, 10));
    assert_int_equal(present(&s, 12), 1 << 1);
    store_ok(s.remove(s.user, &key, 1, &store_error));
    assert_int_equal(stats_of(&s).n_failed, 1);
    end_store(&s);
}

/* Much in one call: what it has put itself is not evicted for the rest of it. */
static void test_long_put(void **state)
{
    enum { N = 12, BYTES = 1000 };
    kvt_store s = open_store(10 * BYTES);
    static unsigned char data[N][BYTES];
    kvt_store_part parts[N];
    kvt_store_value values[N];
    kvt_store_key keys[N];
    size_t n_put = 0;
    (void)state;

    for (uint64_t i = 20; i < 30; i++)
        store_ok(put_value(&s, i, 0, BYTES));
    for (size_t i = 0; i < N; i++) {
        keys[i] = key_of(i);
        value_fill(i, 0, data[i], BYTES);
        parts[i].data = data[i];
        values[i].bytes = parts[i].bytes = BYTES;
        values[i].parts = &parts[i];
        values[i].n_parts = 1;
    }
    store_is(KVT_ERR_FULL, s.put(s.user, keys, values, N, &n_put, &store_error));
    assert_int_equal(n_put, 10);
    assert_int_equal(present(&s, 30), 0x3ff);
    store_ok(s.put(s.user, keys + 2, values + 2, 10, &n_put, &store_error));
    assert_int_equal(n_put, 10);
    assert_int_equal(present(&s, 30), 0xffc);
    end_store(&s);
}

/* Ask for numbers first .. first + n - 1, as for a prompt of theirs; bits: those that are there. */
static uint64_t ask(kvt_store *s, uint64_t first, size_t n)
{
    kvt_store_key keys[32] = {{{0}}};
    uint8_t found[32];
    uint64_t bits = 0;

    for (size_t i = 0; i < n; i++)
        keys[i] = key_of(first + i);
    store_ok(s->exists(s->user, keys, n, found, &store_error));
    for (size_t i = 0; i < n; i++)
        bits |= (uint64_t)found[i] << i;
    return bits;
}

/* A prompt's values in several puts, a part of them each, or from its end on: of a store that has
   no room for all, the end is put in vain. */
static void test_prompt_in_parts(void **state)
{
    (void)state;
    for (int backwards = 0; backwards < 2; backwards++) {
        kvt_store s = open_store(10 * 1000);
        size_t n_full = 0;
        for (uint64_t i = 20; i < 30; i++)
            store_ok(put_value(&s, i, 0, 1000));
        assert_int_equal(ask(&s, 0, 12), 0);
        for (uint64_t i = 0; i < 12; i++) {
            kvt_status status = put_value(&s, backwards ? 11 - i : i, 0, 1000);
            assert_true(status == KVT_OK || status == KVT_ERR_FULL);
            n_full += status != KVT_OK;
        }
        assert_int_equal(n_full, backwards ? 0 : 2);
        assert_int_equal(present(&s, 30), 0x3ff);
        end_store(&s);
    }
}

/* Another prompt's values, which has not been there. */
static void put_prompt(kvt_store *s, uint64_t first, uint64_t n)
{
    assert_int_equal(ask(s, first, (size_t)n), 0);
    for (uint64_t i = first; i < first + n; i++)
        store_ok(put_value(s, i, 0, 1000));
}

/* A prompt that is put as it grows, and looked for each time: its end is evicted first. So it is
   when it has been got in whichever order, or only looked for, which is a use of it. */
static void test_prompt_by_and_by(void **state)
{
    kvt_store s = open_store(10 * 1000);
    (void)state;

    for (uint64_t i = 0; i < 10; i += 2) {
        assert_int_equal(ask(&s, 0, 10), ((uint64_t)1 << i) - 1);
        store_ok(put_value(&s, i, 0, 1000));
        store_ok(put_value(&s, i + 1, 0, 1000));
    }
    put_prompt(&s, 10, 4);
    assert_int_equal(present(&s, 14), 0x3c3f);
    assert_int_equal(ask(&s, 0, 10), 0x3f);
    put_prompt(&s, 14, 4);
    assert_int_equal(present(&s, 18), 0x3c03f);
    for (uint64_t i = 0; i < 6; i++)
        assert_int_equal(get_version(&s, i), 0);
    put_prompt(&s, 18, 4);
    assert_int_equal(present(&s, 22), 0x3fc003);
    store_ok(put_value(&s, 1, 0, 1000)); /* in place of one that is there: as of now */
    put_prompt(&s, 22, 6);
    assert_int_equal(present(&s, 28), 0xfdc0002);
    end_store(&s);
}

/* Many keys, from some number on, asked for at once. */
static void ask_many(kvt_store *s, uint64_t first, size_t n)
{
    kvt_store_key *keys = calloc(n, sizeof *keys);
    uint8_t *found = calloc(n, 1);

    assert_true(keys && found);
    for (size_t i = 0; i < n; i++)
        keys[i] = key_of(first + i);
    store_ok(s->exists(s->user, keys, n, found, &store_error));
    free(keys);
    free(found);
}

/* Put numbers first .. first + n - 1 in one call: how many were put. */
static size_t put_many(kvt_store *s, uint64_t first, size_t n)
{
    enum { MOST = 64, BYTES = 24 };
    unsigned char data[MOST][BYTES];
    kvt_store_key keys[MOST];
    kvt_store_part parts[MOST];
    kvt_store_value values[MOST];
    size_t n_put = 0;
    kvt_status status;

    assert_true(n <= MOST);
    for (size_t i = 0; i < n; i++) {
        keys[i] = key_of(first + i);
        value_fill(first + i, 0, data[i], BYTES);
        parts[i].data = data[i];
        parts[i].bytes = BYTES;
        values[i].parts = &parts[i];
        values[i].n_parts = 1;
        values[i].bytes = BYTES;
    }
    status = s->put(s->user, keys, values, n, &n_put, &store_error);
    assert_true(status == (n_put == n ? KVT_OK : KVT_ERR_FULL));
    return n_put;
}

/*
 * A prompt of more keys than the store has room for, put by and by, while others ask for theirs: of
 * it the beginning is there, and nothing else. Then again with one of more keys than are noted of
 * all questions together.
 */
static void test_long_prompt(void **state)
{
    enum { ROOM = 1500, OTHER = 1000000, BYTES = 24 };
    static const size_t prompts[] = {8192, ((size_t)1 << 18) + 100};
    (void)state;
    for (size_t k = 0; k < (is_quick() ? 1 : 2); k++) {
        kvt_store s = open_store((uint64_t)ROOM * BYTES);
        size_t done = 0, here = 64;
        for (uint64_t i = 0; i < 256; i += 64)
            assert_int_equal(put_many(&s, OTHER + i, 64), 64);
        ask_many(&s, 0, prompts[k]);
        for (uint64_t i = 0; i < 100 && k == 0; i++) /* of one key, of a few, of many */
            ask_many(&s, 2 * OTHER + i, i % 3 == 0 ? 1 : i % 3 == 1 ? 20 : 1000);
        while (here == 64) {
            here = put_many(&s, done, 64);
            done += here;
        }
        assert_int_equal(done, ROOM);
        for (uint64_t i = 0; i < ROOM; i++) {
            char file[256];
            folder_file(path, i, file, sizeof file);
            assert_int_equal(access(file, F_OK), 0);
        }
        assert_int_equal(stats_of(&s).n_values, ROOM);
        end_store(&s);
    }
}

/* A scan evicts 1/32 of the bound, and no more. */
static void test_batch(void **state)
{
    kvt_store s = open_store(128 * 100);
    (void)state;

    for (uint64_t i = 0; i < 128; i++)
        store_ok(put_value(&s, i, 0, 100));
    assert_int_equal(stats_of(&s).n_evicted, 0);
    store_ok(put_value(&s, 128, 0, 100));
    assert_int_equal(stats_of(&s).n_evicted, 4);
    assert_int_equal(present(&s, 8), 0xf0);
    for (uint64_t i = 129; i < 132; i++)
        store_ok(put_value(&s, i, 0, 100));
    assert_int_equal(stats_of(&s).n_evicted, 4);
    store_ok(put_value(&s, 132, 0, 100));
    assert_int_equal(stats_of(&s).n_evicted, 8);
    end_store(&s);
}

/* The bound changes; times of use lie in the future. */
static void test_bound_changes(void **state)
{
    kvt_store s = open_store(0), other;
    struct timespec future[2];
    char file[256];
    (void)state;

    for (uint64_t i = 0; i < 10; i++)
        store_ok(put_value(&s, i, 0, 1000));
    other = open_store(4500); /* keeps the newest 4 */
    assert_int_equal(present(&s, 10), 0x3c0);
    assert_int_equal(stats_of(&s).max_bytes, 4500);
    store_ok(put_value(&s, 0, 0, 1000)); /* the first one knows it, too */
    assert_int_equal(present(&s, 10), 0x381);
    store_is(KVT_ERR_FULL, put_value(&s, 0, 0, 5000));
    kvt_store_close(&other);
    other = open_store(0); /* leaves it */
    assert_int_equal(stats_of(&other).max_bytes, 4500);
    store_ok(put_value(&other, 1, 0, 1000));
    kvt_store_close(&other);
    other = open_store(6000);
    store_ok(put_value(&s, 30, 0, 5500)); /* a larger one, too */
    assert_int_equal(present(&s, 31), (uint64_t)1 << 30);
    store_is(KVT_ERR_FULL, put_value(&s, 30, 0, 6001));
    assert_int_equal(stats_of(&s).max_bytes, 6000);
    {
        kvt_store_key key = key_of(30);
        store_ok(s.remove(s.user, &key, 1, &store_error));
    }
    store_ok(put_value(&s, 8, 0, 1000));
    store_ok(put_value(&s, 9, 0, 1000));
    kvt_store_close(&other);
    for (uint64_t i = 0; i < 4; i++) {
        store_ok(put_value(&s, i, 0, 1000));
        folder_file(path, i, file, sizeof file);
        future[0].tv_sec = future[1].tv_sec = (time_t)4000000000 - (time_t)i;
        future[0].tv_nsec = future[1].tv_nsec = 0;
        assert_int_equal(utimensat(AT_FDCWD, file, future, 0), 0);
    }
    for (uint64_t i = 20; i < 23; i++)
        store_ok(put_value(&s, i, 0, 1000)); /* those of the future go first */
    assert_int_equal(present(&s, 23), 0x700000 | 1 << 0 | 1 << 8 | 1 << 9);
    end_store(&s);
}

/* The largest bound is none. */
static void test_largest_bound(void **state)
{
    kvt_store s = open_store(UINT64_MAX);
    (void)state;

    for (uint64_t i = 0; i < 6; i++)
        store_ok(put_value(&s, i, 0, 1000));
    store_ok(put_value(&s, 0, 1, 500));
    assert_int_equal(present(&s, 6), 0x3f);
    assert_int_equal(stats_of(&s).n_evicted, 0);
    end_store(&s);
}

/* A bound that another process has lowered, and this one does not know yet. */
static void test_bound_of_another(void **state)
{
    kvt_store s = open_store(0), other;
    (void)state;
    for (uint64_t i = 0; i < 4; i++)
        store_ok(put_value(&s, i, 0, 1000));
    other = open_store(4500);
    kvt_store_close(&other);
    store_is(KVT_ERR_FULL, put_value(&s, 9, 0, 5000));
    assert_non_null(strstr(store_error.text, "bound has become 4500"));
    assert_int_equal(folder_look(path).n_temporaries, 0);
    assert_int_equal(present(&s, 10), 0xf);
    store_ok(put_value(&s, 9, 0, 4000));
    assert_true(folder_look(path).bytes <= 4500);
    end_store(&s);
}

/* What another program has put there counts when it is collected, and the bound holds then. */
static void test_collect_keeps_the_bound(void **state)
{
    unsigned char data[1000];
    kvt_store s = open_store(3000);
    char file[256];
    FILE *f;
    (void)state;
    for (uint64_t i = 0; i < 3; i++)
        store_ok(put_value(&s, i, 0, 1000));
    folder_file(path, 3, file, sizeof file);
    value_fill(3, 0, data, sizeof data);
    f = fopen(file, "wb");
    if (!f) { /* its folder is not there yet */
        *strrchr(file, '/') = 0;
        assert_int_equal(mkdir(file, 0700), 0);
        folder_file(path, 3, file, sizeof file);
        f = fopen(file, "wb");
    }
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, sizeof data, f), sizeof data);
    assert_int_equal(fclose(f), 0);
    assert_int_equal(folder_look(path).bytes, 4000);
    store_ok(s.collect(s.user, &store_error));
    assert_int_equal(folder_look(path).bytes, 3000);
    assert_int_equal(stats_of(&s).n_evicted, 1);
    assert_int_equal(stats_of(&s).bytes, 3000);
    end_store(&s);
}

/* A fifo under a value's name is not waited for; a time of use in the future ends with a use. */
static void test_odd_files(void **state)
{
    kvt_store s = open_store(4000);
    kvt_store_key key = key_of(0);
    struct timespec future[2] = {{4000000000, 0}, {4000000000, 0}};
    char file[256];
    uint8_t found = 9;
    (void)state;
    store_ok(put_value(&s, 0, 0, 1000));
    folder_file(path, 0, file, sizeof file);
    store_ok(s.remove(s.user, &key, 1, &store_error));
    assert_int_equal(mkfifo(file, 0600), 0);
    store_ok(s.exists(s.user, &key, 1, &found, &store_error));
    assert_int_equal(found, 0);
    assert_int_equal(get_version(&s, 0), -1);
    store_ok(s.remove(s.user, &key, 1, &store_error));
    assert_int_equal(access(file, F_OK), 0);
    assert_int_equal(unlink(file), 0);
    for (uint64_t i = 0; i < 4; i++)
        store_ok(put_value(&s, i, 0, 1000));
    for (uint64_t i = 0; i < 4; i++) {
        folder_file(path, i, file, sizeof file);
        assert_int_equal(utimensat(AT_FDCWD, file, future, 0), 0);
    }
    assert_int_equal(get_version(&s, 2), 0);
    for (uint64_t i = 10; i < 13; i++)
        store_ok(put_value(&s, i, 0, 1000));
    assert_int_equal(present(&s, 13), 1 << 2 | 7 << 10);
    end_store(&s);
}

/* ---- names and modes ---- */

static void all_close_on_exec(void *user)
{
    int *n = user;
    for (int fd = 3; fd < 64; fd++)
        *n += fcntl(fd, F_GETFD) == 0;
}

static void test_private(void **state)
{
    kvt_store_key key = key_of(1);
    char file[256], moved[96], here[512];
    int inherited = 0, before, n = 0;
    struct stat status;
    mode_t mask = umask(0);
    kvt_store s;
    collector c;
    (void)state;

    all_close_on_exec(&before); /* of the test's surroundings */
    before = 0;
    all_close_on_exec(&before);
    n = count_descriptors();
    s = open_store(0);
    store_ok(put_value(&s, 1, 1, 1000));
    (void)umask(mask);
    folder_file(path, 1, file, sizeof file);
    assert_int_equal(stat(file, &status), 0);
    assert_int_equal(status.st_mode & 07777, 0600);
    *strrchr(file, '/') = 0;
    assert_int_equal(stat(file, &status), 0);
    assert_int_equal(status.st_mode & 07777, 0700);
    assert_int_equal(stat(path, &status), 0);
    assert_int_equal(status.st_mode & 07777, 0700);
    (void)snprintf(file, sizeof file, "%s/kvtile-store", path);
    assert_int_equal(stat(file, &status), 0);
    assert_int_equal(status.st_mode & 07777, 0600);
    (void)snprintf(file, sizeof file, "%s/tmp", path);
    assert_int_equal(stat(file, &status), 0);
    assert_int_equal(status.st_mode & 07777, 0700);
    collector_make(&c, 1);
    c.on_part = all_close_on_exec;
    c.user = &inherited;
    store_ok(collector_get(&s, &c, &key, 1));
    collector_free(&c);
    assert_int_equal(inherited, before);
    assert_int_equal(count_descriptors(), n + 1);
    /* Neither of these matters to a store that is open. */
    (void)snprintf(moved, sizeof moved, "%s-moved", path);
    assert_non_null(getcwd(here, sizeof here));
    assert_int_equal(rename(path, moved), 0);
    assert_int_equal(chdir("/"), 0);
    store_ok(put_value(&s, 2, 5, 1000));
    assert_int_equal(get_version(&s, 1), 1);
    assert_int_equal(get_version(&s, 2), 5);
    assert_int_equal(chdir(here), 0);
    assert_int_equal(rename(moved, path), 0);
    end_store(&s);
    assert_int_equal(count_descriptors(), n);
}

static void test_sync(void **state)
{
    kvt_directory_config config;
    kvt_store s;
    (void)state;

    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.path = path;
    config.sync = 1;
    store_ok(kvt_store_open_directory(&config, &s));
    for (uint64_t i = 0; i < 3; i++)
        store_ok(put_value(&s, i, 0, 1000));
    assert_int_equal(present(&s, 4), 7);
    end_store(&s);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(path, sizeof path, "test_store_directory-%ld", (long)getpid());
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_answers),
        cmocka_unit_test(test_replace_remove),
        cmocka_unit_test(test_list),
        cmocka_unit_test(test_cut_short),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_bound),
        cmocka_unit_test(test_long_put),
        cmocka_unit_test(test_prompt_in_parts),
        cmocka_unit_test(test_prompt_by_and_by),
        cmocka_unit_test(test_long_prompt),
        cmocka_unit_test(test_batch),
        cmocka_unit_test(test_bound_changes),
        cmocka_unit_test(test_largest_bound),
        cmocka_unit_test(test_bound_of_another),
        cmocka_unit_test(test_collect_keeps_the_bound),
        cmocka_unit_test(test_odd_files),
        cmocka_unit_test(test_private),
        cmocka_unit_test(test_sync),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
