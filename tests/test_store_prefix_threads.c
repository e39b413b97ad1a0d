/*
 * Prefixes got by several threads of the cache at once, from a directory: no more of them than the
 * store takes, the numbers and the counts of one thread, damaged values in between.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "store_scenes.h"
#include "store_values.h"

#include <stdatomic.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static char path[64];

/* A directory whose gets are counted while they run. */
static struct watched {
    kvt_store store;
    atomic_int running, most, n;
} watched;

static kvt_status watched_get(void *user, const kvt_store_key *keys, size_t n,
                              const kvt_store_receiver *receiver, kvt_store_error *error)
{
    int now = atomic_fetch_add(&watched.running, 1) + 1, most = atomic_load(&watched.most);
    kvt_status status;

    atomic_fetch_add(&watched.n, 1);
    while (now > most && !atomic_compare_exchange_weak(&watched.most, &most, now))
        ;
    (void)nanosleep(&(struct timespec){0, 20000000}, NULL); /* the others begin meanwhile */
    status = watched.store.get(user, keys, n, receiver, error);
    atomic_fetch_sub(&watched.running, 1);
    return status;
}

enum { ROWS = 40, MANY = ROWS * 64 + 64 };

/* Blocks of some hundred KiB. */
static kvt_cache *cache_with(uint32_t n_threads, const kvt_group_config *g)
{
    return cache_of(g, MANY, pool_threads(n_threads), NULL);
}

typedef struct keys_of {
    kvt_store_key keys[ROWS + 1];
    size_t n;
} keys_of;

static int take_key(void *user, const kvt_store_entry *entry)
{
    keys_of *k = user;
    assert_true(k->n < ROWS + 1);
    k->keys[k->n++] = entry->key;
    return 0;
}

/* Put a value again with a byte in the middle changed. */
static void flip(const kvt_store_key *key)
{
    kvt_store *store = &watched.store;
    collector c;
    kvt_store_part part;
    kvt_store_value value = {&part, 1, 0};
    size_t n_put;
    collector_make(&c, 1);
    store_ok(collector_get(store, &c, key, 1));
    part.data = c.values[0].data;
    part.bytes = value.bytes = c.values[0].total;
    c.values[0].data[value.bytes / 2] ^= 1;
    store_ok(store->put(store->user, key, &value, 1, &n_put, &store_error));
    collector_free(&c);
}

static void test_gets(void **state)
{
    kvt_group_config g = group_of(8, 8, 8, 72, 72, KVT_TYPE_I8, KVT_TYPE_I8);
    rng r = {5};
    tokens t = tokens_make(&r, MANY, &g);
    static int32_t prompt[MANY + 1];
    uint64_t expected = 0, cut = 0;
    keys_of all = {.n = 0};
    kvt_store store;
    (void)state;

    for (int i = 0; i <= MANY; i++)
        prompt[i] = i * 3 + 1; /* as append_step has them */
    store_ok(folder_open(path, 0, &watched.store));
    store = watched.store;
    store.get = watched_get;
    for (uint32_t turn = 0; turn < 4; turn++) {
        static const uint32_t threads[] = {1, 4, 4, 4};
        static const size_t at_once[] = {8, 8, 2, 1};
        kvt_cache *cache = cache_with(threads[turn], &g);
        kvt_prefix_result got;
        kvt_seq *seq = NULL;
        store.n_at_once = at_once[turn];
        expect_ok(cache, kvt_seq_create(cache, &seq));
        if (turn == 0) {
            append_step(cache, seq, &g, &t, 0, MANY);
            expect_ok(cache, kvt_prefix_put(&store, seq, NULL, &got));
            assert_int_equal(got.n_values, ROWS);
            expect_ok(cache, kvt_seq_clear(seq));
        }
        if (turn == 0)
            store_ok(watched.store.list(watched.store.user, take_key, &all, &store_error));
        assert_int_equal(all.n, ROWS);
        atomic_store(&watched.most, 0);
        atomic_store(&watched.n, 0);
        expect_ok(cache, kvt_prefix_get(&store, seq, prompt, MANY, NULL, &got));
        assert_int_equal(got.n_tokens, ROWS * 64);
        assert_int_equal(got.n_values, ROWS);
        assert_int_equal(got.n_refused, 0);
        if (turn == 0)
            expected = seq_hash(seq, &g);
        assert_true(seq_hash(seq, &g) == expected);
        printf("%u threads, %zu at once: %d gets, at most %d at a time\n", (unsigned)threads[turn],
               at_once[turn], atomic_load(&watched.n), atomic_load(&watched.most));
        assert_true(atomic_load(&watched.most) <= (int)at_once[turn]);
        assert_true(threads[turn] > 1 || atomic_load(&watched.most) == 1);

        /* A damaged value: the prefix ends before it, and nothing else is lost. */
        expect_ok(cache, kvt_seq_clear(seq));
        flip(&all.keys[ROWS / 2]);
        expect_ok(cache, kvt_prefix_get(&store, seq, prompt, MANY, NULL, &got));
        assert_int_equal(got.n_refused, 1);
        cut = turn == 0 ? got.n_tokens : cut;
        assert_int_equal(got.n_tokens, cut);
        assert_true(cut < ROWS * 64);
        expect_ok(cache, kvt_seq_clear(seq));
        append_step(cache, seq, &g, &t, 0, MANY);
        expect_ok(cache, kvt_prefix_put(&store, seq, NULL, &got));
        assert_int_equal(got.n_values, 1);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    kvt_store_close(&watched.store);
    folder_remove(path);
    tokens_free(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gets),
    };
    (void)snprintf(path, sizeof path, "test_store_prefix_threads-%ld", (long)getpid());
    return cmocka_run_group_tests(tests, NULL, NULL);
}
