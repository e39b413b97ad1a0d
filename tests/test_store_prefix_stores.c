/*
 * Prefixes through directories and through two stores as one: what is evicted, and which of two
 * copies is taken.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "prefix_scene.h"
#include "store_values.h"

#include <stdio.h>
#include <unistd.h>

static char path[64];

/* The bound of a directory that has room for n values as the one that is there, and for no more. */
static uint64_t room_for(const prefix_scene *c, uint64_t n)
{
    return n * c->m.values[0].bytes + c->m.values[0].bytes / 2;
}

/* What there is of the prompt. */
static uint64_t probed(const prefix_scene *c, const kvt_store *store,
                       const kvt_prefix_options *options)
{
    kvt_prefix_result found;
    expect_ok(c->s.cache, kvt_prefix_probe(store, c->to, c->prompt, MOST, options, &found));
    return found.n_tokens;
}

/* ---- order ---- */

/* Put a sequence as it grows, under another namespace. */
static void put_growing(const prefix_scene *c, const kvt_store *store, const char *name)
{
    kvt_prefix_options options = prefix_options();
    kvt_seq *seq = seq_of(&c->s);

    options.name_space = name;
    options.name_space_bytes = 1;
    while (kvt_seq_length(seq) < MOST) {
        grow(&c->s, seq, 40);
        expect_ok(c->s.cache, kvt_prefix_put(store, seq, &options, NULL));
    }
    kvt_seq_destroy(seq);
}

/* Of prompts that are put by and by, or come from far, the end is evicted first. */
static void test_order(void **state)
{
    enum { ROWS = (MOST - 64) / 64 }; /* that a sequence of MOST tokens has put */
    (void)state;
    for (int by_tiers = 0; by_tiers < 2; by_tiers++) {
        kvt_prefix_options a = prefix_options(), b = prefix_options();
        kvt_store store, far_store, tiers;
        kvt_prefix_result got;
        memory_store m;
        prefix_scene c;

        a.name_space = "a";
        b.name_space = "b";
        a.name_space_bytes = b.name_space_bytes = 1;
        prefix_open(&c, 0, TOKENS);
        store_ok(folder_open(path, room_for(&c, ROWS + 4), &store));
        if (by_tiers) {
            far_store = memory_store_open(&m);
            put_growing(&c, &far_store, "a");
            store_ok(kvt_store_open_tiers(&store, &far_store, &tiers));
            expect_ok(c.s.cache, kvt_prefix_get(&tiers, c.to, c.prompt, MOST, &a, &got));
            assert_int_equal(got.n_tokens, ROWS * 64);
            expect_ok(c.s.cache, kvt_seq_clear(c.to));
        } else {
            put_growing(&c, &store, "a");
        }
        assert_int_equal(probed(&c, &store, &a), ROWS * 64);
        put_growing(&c, &store, "b"); /* 4 of them have room */
        assert_int_equal(probed(&c, &store, &b), ROWS * 64);
        assert_int_equal(probed(&c, &store, &a), 4 * 64);
        if (by_tiers) {
            kvt_store_close(&tiers); /* and `store` */
            memory_store_free(&m);
        } else {
            kvt_store_close(&store);
        }
        folder_remove(path);
        prefix_close(&c);
    }
}

/* A store without room for a prompt: a put says so, and its beginning is there. */
static void test_too_small(void **state)
{
    (void)state;
    for (int growing = 0; growing < 2; growing++) {
        kvt_seq *seq;
        kvt_store store;
        prefix_scene c;
        prefix_open(&c, 0, TOKENS);
        store_ok(folder_open(path, room_for(&c, 5), &store));
        seq = sequence_of(&c.s, growing ? 300 : MOST);
        if (growing)
            expect_ok(c.s.cache, kvt_prefix_put(&store, seq, NULL, NULL));
        if (growing)
            grow(&c.s, seq, MOST - 300);
        expect(c.s.cache, KVT_ERR_FULL, kvt_prefix_put(&store, seq, NULL, NULL));
        assert_int_equal(probed(&c, &store, NULL), 5 * 64);
        kvt_seq_destroy(seq);
        kvt_store_close(&store);
        folder_remove(path);
        prefix_close(&c);
    }
}

/* ---- copies ---- */

/* Two stores as one: a damaged copy in near is replaced by far's, which stays. */
static void test_damaged_near(void **state)
{
    enum { FAR_IS_SOUND, FAR_FAILS, FAR_IS_DAMAGED, FAR_LACKS, CASES };
    static const uint64_t expected[] = {SEALED, 0, 64, 64};
    (void)state;
    for (int what = FAR_IS_SOUND; what < CASES; what++)
        for (size_t at = 0; at < 3; at++) {
            memory_store far_memory;
            kvt_store far_store = memory_store_open(&far_memory), tiers;
            kvt_prefix_result got = {0};
            memory_value *v, *far_value;
            kvt_status status;
            prefix_scene c;

            prefix_open(&c, 0, TOKENS);
            memory_store_copy(&c.m, &far_memory);
            v = find_value(&c.m, 0, 128, 0);
            far_value = find_value(&far_memory, 0, 128, 0);
            /* Known at the first byte, amid the images, with the last one. */
            v->data[at == 0 ? 0 : at == 1 ? v->bytes / 2 : v->bytes - 1] ^= 1;
            if (what == FAR_FAILS)
                far_memory.fail_at = 1; /* exists, get */
            if (what == FAR_IS_DAMAGED)
                far_value->data[far_value->bytes - 1] ^= 1;
            if (what == FAR_LACKS)
                memory_store_drop(&far_memory, far_value);
            assert_int_equal(kvt_store_open_tiers(&c.store, &far_store, &tiers), KVT_OK);
            status = kvt_prefix_get(&tiers, c.to, c.prompt, TOKENS, NULL, &got);
            assert_int_equal(status, what == FAR_FAILS ? KVT_ERR_IO : KVT_OK);
            assert_int_equal(kvt_seq_length(c.to), expected[what]);
            assert_int_equal(got.n_refused, what == FAR_IS_DAMAGED || what == FAR_LACKS);
            /* A value goes where each copy of it is known to be bad, and no other does. */
            assert_int_equal(c.m.n, what == FAR_IS_DAMAGED || what == FAR_LACKS ? 2 : 3);
            assert_int_equal(far_memory.n, what == FAR_IS_DAMAGED || what == FAR_LACKS ? 2 : 3);
            if (what == FAR_IS_SOUND) { /* near has been mended */
                expect_ok(c.s.cache, kvt_seq_clear(c.to));
                assert_int_equal(prefix_get(&c, c.prompt, TOKENS, NULL), SEALED);
            }
            kvt_store_close(&tiers);
            memory_store_free(&far_memory);
            prefix_close(&c);
        }
}

/* ---- threads ---- */

/* An executor that notes that it runs, and a far that is asked only while it does not. */
static int runs, n_runs, n_far;

static void run_in_order(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    (void)user;
    runs = 1;
    n_runs++;
    for (size_t i = 0; i < n; i++)
        task(arg, i);
    runs = 0;
}

static kvt_status (*get_of_memory)(void *user, const kvt_store_key *keys, size_t n,
                                   const kvt_store_receiver *receiver, kvt_store_error *error);

static kvt_status get_far(void *user, const kvt_store_key *keys, size_t n,
                          const kvt_store_receiver *receiver, kvt_store_error *error)
{
    assert_false(runs);
    n_far++;
    return get_of_memory(user, keys, n, receiver, error);
}

/* What is near is got by the cache's threads, which do not wait for far: others need them. */
static void test_threads_of_near(void **state)
{
    static const uint64_t near_has[] = {0, 1, 0x2a5, 0x3ff}; /* bits of the rows */
    (void)state;
    for (size_t i = 0; i < sizeof near_has / sizeof *near_has; i++)
        for (int damaged = 0; damaged < 2; damaged++) {
            kvt_config config;
            kvt_cache *cache;
            subject reader;
            kvt_seq *to, *like;
            kvt_prefix_result got;
            kvt_store far_store, tiers;
            kvt_store_stats stats;
            kvt_store_error error;
            memory_store m;
            prefix_scene c;

            prefix_open(&c, 0, MOST);
            far_store = memory_store_open(&m);
            memory_store_copy(&c.m, &m);
            assert_int_equal(m.n, 10);
            for (uint64_t row = 0; row < 10; row++) {
                memory_value *v = find_value(&c.m, 0, 64 * (row + 1), 0);
                if (near_has[i] >> row & 1)
                    v->data[v->bytes - 1] ^= damaged && row % 2;
                else
                    memory_store_drop(&c.m, v);
            }
            get_of_memory = far_store.get;
            far_store.get = get_far;
            c.store.n_at_once = 3;
            assert_int_equal(kvt_store_open_tiers(&c.store, &far_store, &tiers), KVT_OK);
            config = c.s.config;
            config.n_threads = 0;
            config.executor = (kvt_executor){NULL, run_in_order, 4};
            expect_ok(NULL, kvt_cache_create(&config, &cache));
            expect_ok(cache, kvt_seq_create(cache, &to));
            n_runs = n_far = 0;
            expect_ok(cache, kvt_prefix_get(&tiers, to, c.prompt, MOST, NULL, &got));
            assert_true(n_runs > 0);
            assert_int_equal(n_far, near_has[i] != 0x3ff || damaged);
            assert_int_equal(got.n_tokens, 640);
            assert_int_equal(got.n_values, 10);
            assert_int_equal(got.n_refused, 0);
            assert_int_equal(c.m.n, 10);
            store_ok(tiers.stats(tiers.user, &stats, &error));
            assert_int_equal(stats.n_got, 10);
            assert_true(stats.n_failed == 0);
            like = sequence_cut(&c.s, 640);
            reader = c.s;
            reader.cache = cache;
            assert_int_equal(file_hash(&reader, to), file_hash(&c.s, like));
            kvt_seq_destroy(like);
            kvt_seq_destroy(to);
            kvt_cache_destroy(cache);
            kvt_store_close(&tiers);
            memory_store_free(&m);
            prefix_close(&c);
        }
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(path, sizeof path, "test_store_prefix_stores-%ld", (long)getpid());
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_too_small),
        cmocka_unit_test(test_damaged_near),
        cmocka_unit_test(test_threads_of_near),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
