/*
 * A Redis server as a store: what each function does, on servers of its own.
 *
 *   test_store_redis [make_certificates.sh]    by TLS, where that is given
 */
#include "redis_support.h"
#include "redis_values.h"

#include <stdio.h>

#ifdef KVT_TEST_REDIS

static redis_server server; /* for all tests that need nothing special; emptied before each */

static kvt_redis_config config_of(const redis_server *s)
{
    kvt_redis_config config = {.struct_size = sizeof config, .port = (uint32_t)redis_port(s)};
    config.tls = redis_ca_file() != NULL;
    config.tls_ca_file = redis_ca_file();
    config.timeout_ms = config.connect_timeout_ms = 20000; /* machines are busy */
    return config;
}

static kvt_store open_with(const kvt_redis_config *config)
{
    kvt_store store;
    memset(&store, 0, sizeof store);
    assert_int_equal(kvt_store_open_redis(config, &store), KVT_OK);
    assert_int_equal(store.struct_size, sizeof store);
    return store;
}

static kvt_store open_store(const redis_server *s)
{
    kvt_redis_config config = config_of(s);
    return open_with(&config);
}

/* The name on the server of the key of a number. */
static const char *name_of(const char *prefix, uint64_t number)
{
    static char name[256];
    kvt_store_key key = key_of(number);
    int n = snprintf(name, sizeof name, "%s", prefix);
    for (size_t i = 0; i < sizeof key.bytes; i++)
        n += snprintf(name + n, sizeof name - (size_t)n, "%02x", key.bytes[i]);
    return name;
}

static int empty(void **state)
{
    (void)state;
    redis_expect(&server, "+OK", "FLUSHALL");
    redis_expect(&server, "+OK", "CONFIG RESETSTAT");
    return 0;
}

static void test_sizes(void **state)
{
    static const size_t sizes[] = {0,     1,      2,      7,      8191,   32766,         32768,
                                   65536, 262143, 262144, 262145, 270336, (4u << 20) + 3};
    kvt_store store = open_store(&server);
    kvt_store_error error;
    (void)state;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t places = 0; places < 3; places++) {
            uint64_t first = 1000 * i + 100 * places;
            size_t n = sizes[i] > 300000 ? 3 : 20, n_put = 0;
            taken t = {.places = places > 0, .place_most = places == 2 ? 5000 : 0};
            expect_call(KVT_OK, error,
                        put_values(&store, first, n, sizes[i], 1 + i % 5, &n_put, &error));
            assert_int_equal(n_put, n);
            expect_call(KVT_OK, error, get_values(&store, first, n, &t, &error));
            for (size_t v = 0; v < n; v++)
                assert_true(is_taken(&t, first, v, sizes[i]));
            if (places && sizes[i])
                assert_int_equal(t.n_placed, t.n_parts);
            else
                assert_int_equal(t.n_placed, 0);
            free_taken(&t);
        }
    kvt_store_close(&store);
}

/* A value that says that it has more or less than its parts: these count. */
static void test_wrong_sum(void **state)
{
    static const char data[] = "0123456789";
    kvt_store_part parts[2] = {{data, 4}, {data + 4, 6}};
    kvt_store store = open_store(&server);
    kvt_store_error error;
    (void)state;
    for (uint64_t bytes = 0; bytes < 20; bytes += 7) {
        kvt_store_value values[2] = {{parts, 2, bytes}, {parts, 1, bytes}};
        kvt_store_key keys[2] = {key_of(1), key_of(2)};
        size_t n_put = 0;
        expect_call(KVT_OK, error, store.put(store.user, keys, values, 2, &n_put, &error));
        assert_int_equal(n_put, 2);
        redis_expect(&server, data, "GET %s", name_of("kvt:", 1));
        redis_expect(&server, "0123", "GET %s", name_of("kvt:", 2));
    }
    kvt_store_close(&store);
}

/* Values of many sizes and holes in one call; what is there is found, and nothing else. */
static void test_holes(void **state)
{
    kvt_store store = open_store(&server);
    kvt_store_error error;
    kvt_store_key keys[200];
    uint8_t there[200], found[200];
    size_t n_put;
    (void)state;

    for (size_t i = 0; i < 200; i++) {
        keys[i] = key_of(i);
        there[i] = i % 7 < 4;
        if (there[i])
            expect_call(KVT_OK, error, put_values(&store, i, 1, 3000, 2, &n_put, &error));
    }
    memset(found, 9, sizeof found);
    expect_call(KVT_OK, error, store.exists(store.user, keys, 200, found, &error));
    assert_memory_equal(found, there, 200);
    expect_values(&store, 0, 200, 3000, there);
    /* Put in place of what is there; remove what is and what is not. */
    expect_call(KVT_OK, error, put_values(&store, 0, 4, 10, 1, &n_put, &error));
    expect_values(&store, 0, 4, 10, NULL);
    expect_call(KVT_OK, error, store.remove(store.user, keys, 60, &error));
    memset(there, 0, 60);
    expect_call(KVT_OK, error, store.exists(store.user, keys, 200, found, &error));
    assert_memory_equal(found, there, 200);
    expect_values(&store, 0, 200, 3000, there);
    /* None at all. */
    expect_call(KVT_OK, error, store.exists(store.user, keys, 0, found, &error));
    expect_call(KVT_OK, error, store.remove(store.user, keys, 0, &error));
    expect_call(KVT_OK, error, store.put(store.user, keys, NULL, 0, &n_put, &error));
    assert_int_equal(n_put, 0);
    kvt_store_close(&store);
    assert_null(store.get);
}

/* More is in flight, both ways, than the sockets' buffers hold. */
static void test_pipelines(void **state)
{
    static const uint32_t pipelines[] = {1, 2, 16, 300};
    kvt_store_error error;
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        kvt_redis_config config = config_of(&server);
        kvt_store store;
        size_t n_put;
        config.pipeline = pipelines[i];
        config.ttl_seconds = 100;
        store = open_with(&config);
        expect_call(KVT_OK, error, put_values(&store, 0, 60, 300000, 1, &n_put, &error));
        expect_values(&store, 0, 60, 300000, NULL);
        expect_values(&store, 1, 59, 300000, NULL);
        kvt_store_close(&store);
    }
}

static void test_skip_and_stop(void **state)
{
    kvt_store store = open_store(&server);
    kvt_store_error error;
    (void)state;
    expect_call(KVT_OK, error, put_values(&store, 0, 20, 700000, 1, NULL, &error));
    for (int places = 0; places < 2; places++) {
        taken t = {.places = places, .place_most = 100000, .skip_at = 300000};
        expect_call(KVT_OK, error, get_values(&store, 0, 20, &t, &error));
        assert_int_equal(t.n_whole, 0);
        for (size_t i = 0; i < 20; i++)
            assert_in_range(t.have[i], 300000, 699999);
        free_taken(&t);
        t = (taken){.places = places, .stop_after = 5};
        expect_call(KVT_OK, error, get_values(&store, 0, 20, &t, &error));
        assert_int_equal(t.n_whole, 5);
        for (size_t i = 0; i < 5; i++)
            assert_true(is_taken(&t, 0, i, 700000));
        free_taken(&t);
        /* What was under way is not taken for the next call's. */
        expect_values(&store, 3, 2, 700000, NULL);
    }
    expect_call(KVT_OK, error, put_values(&store, 50, 1, 0, 1, NULL, &error));
    {
        taken t = {.stop_after = 1};
        expect_call(KVT_OK, error, get_values(&store, 50, 1, &t, &error));
        free_taken(&t);
    }
    kvt_store_close(&store);
}

static int use_store(void *user, size_t i)
{
    kvt_store *store = user;
    kvt_store_error error;
    kvt_store_key key = key_of(i);
    uint8_t found;
    expect_call(KVT_OK, error, store->remove(store->user, &key, 1, &error));
    expect_call(KVT_OK, error, store->exists(store->user, &key, 1, &found, &error));
    assert_int_equal(found, 0);
    expect_values(store, 1000, 1, 50, NULL);
    return 0;
}

/* A receiver may use the store: no lock is held, no connection is shared. */
static void test_calls_in_a_get(void **state)
{
    kvt_store store = open_store(&server);
    kvt_store_error error;
    taken t = {.on_value = use_store, .user = &store};
    (void)state;
    expect_call(KVT_OK, error, put_values(&store, 1000, 1, 50, 1, NULL, &error));
    expect_call(KVT_OK, error, put_values(&store, 0, 30, 5000, 1, NULL, &error));
    expect_call(KVT_OK, error, get_values(&store, 0, 30, &t, &error));
    assert_int_equal(t.n_whole, 30);
    for (size_t i = 0; i < 30; i++)
        assert_true(is_taken(&t, 0, i, 5000));
    free_taken(&t);
    kvt_store_close(&store);
}

static void test_names(void **state)
{
    kvt_redis_config config = config_of(&server);
    kvt_store store = open_with(&config), other;
    kvt_store_error error;
    (void)state;
    expect_call(KVT_OK, error, put_values(&store, 5, 1, 33, 1, NULL, &error));
    redis_expect(&server, ":33", "STRLEN %s", name_of("kvt:", 5));
    redis_expect(&server, ":-1", "TTL %s", name_of("kvt:", 5));
    /* Another prefix, another database: other values. By the socket. */
    config = (kvt_redis_config){.struct_size = sizeof config, .unix_path = server.socket};
    config.prefix = "a*[b]{c}?:";
    config.database = 3;
    other = open_with(&config);
    expect_values(&other, 5, 1, 33, (const uint8_t[]){0});
    expect_call(KVT_OK, error, put_values(&other, 5, 1, 44, 1, NULL, &error));
    expect_values(&store, 5, 1, 33, NULL);
    redis_expect(&server, "+OK", "SWAPDB 0 3");
    redis_expect(&server, ":44", "STRLEN %s", name_of("a*[b]{c}?:", 5));
    kvt_store_close(&store);
    kvt_store_close(&other);
}

/* Of a time in seconds that is just being counted down. */
static void expect_about(int64_t wanted, const char *answer)
{
    long long got = strtoll(answer + 1, NULL, 10);
    assert_int_equal(answer[0], ':');
    assert_in_range(got, wanted - 10, wanted);
}

static void test_ttl(void **state)
{
    kvt_redis_config config = config_of(&server);
    kvt_store store;
    kvt_store_error error;
    uint8_t found;
    kvt_store_key key = key_of(7);
    (void)state;
    config.ttl_seconds = 500;
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 7, 2, 100, 1, NULL, &error));
    expect_about(500, redis_say(&server, "TTL %s", name_of("kvt:", 7)));
    redis_expect(&server, ":1", "EXPIRE %s 50", name_of("kvt:", 7));
    redis_expect(&server, ":1", "EXPIRE %s 50", name_of("kvt:", 8));
    /* A question renews it, and a get. */
    expect_call(KVT_OK, error, store.exists(store.user, &key, 1, &found, &error));
    assert_int_equal(found, 1);
    expect_about(500, redis_say(&server, "TTL %s", name_of("kvt:", 7)));
    redis_expect(&server, ":1", "EXPIRE %s 50", name_of("kvt:", 7));
    expect_values(&store, 6, 2, 100, (const uint8_t[]){0, 1});
    expect_about(500, redis_say(&server, "TTL %s", name_of("kvt:", 7)));
    expect_about(50, redis_say(&server, "TTL %s", name_of("kvt:", 8)));
    redis_expect(&server, ":0", "EXISTS %s", name_of("kvt:", 6));
    kvt_store_close(&store);
}

static void test_types(void **state)
{
    kvt_store store = open_store(&server);
    kvt_store_error error;
    kvt_store_key keys[3] = {key_of(0), key_of(1), key_of(2)};
    (void)state;
    expect_call(KVT_OK, error, put_values(&store, 0, 3, 100, 1, NULL, &error));
    expect_call(KVT_OK, error, store.remove(store.user, keys + 1, 1, &error));
    redis_expect(&server, ":2", "RPUSH %s a b", name_of("kvt:", 1));
    expect_values(&store, 0, 3, 100, (const uint8_t[]){1, 0, 1});
    expect_call(KVT_OK, error, put_values(&store, 1, 1, 100, 1, NULL, &error));
    expect_values(&store, 0, 3, 100, NULL);
    kvt_store_close(&store);
}

/* A server without UNLINK. */
static void test_del(void **state)
{
    redis_server old;
    kvt_store store;
    kvt_store_error error;
    kvt_store_key keys[30];
    (void)state;
    redis_start(&old, "--rename-command UNLINK ''");
    store = open_store(&old);
    for (size_t i = 0; i < 30; i++)
        keys[i] = key_of(i);
    for (int turn = 0; turn < 2; turn++) {
        expect_call(KVT_OK, error, put_values(&store, 0, 30, 100, 1, NULL, &error));
        expect_call(KVT_OK, error, store.remove(store.user, keys, 30, &error));
        redis_expect(&old, ":0", "DBSIZE");
    }
    assert_non_null(strstr(redis_say(&old, "INFO commandstats"), "cmdstat_del:calls=60,"));
    kvt_store_close(&store);
    redis_stop(&old);
}

/* ---- list and figures ---- */

typedef struct listed {
    size_t n, most;
    uint8_t seen[3000];
    uint64_t bytes;
    int64_t left;
} listed;

static int on_entry(void *user, const kvt_store_entry *entry)
{
    listed *l = user;
    size_t i = 0;
    kvt_store_key key;
    do
        key = key_of(i++);
    while (i < 3000 && memcmp(&key, &entry->key, sizeof key) != 0);
    assert_memory_equal(&key, &entry->key, sizeof key);
    assert_int_equal(entry->bytes, l->bytes);
    assert_in_range(entry->used_seconds, 0, 60);
    if (l->left < 0)
        assert_int_equal(entry->left_seconds, -1);
    else
        assert_in_range(entry->left_seconds, l->left - 60, l->left);
    l->n += !l->seen[i - 1];
    l->seen[i - 1] = 1;
    return l->most && l->n >= l->most;
}

static void test_list(void **state)
{
    static const char *const prefixes[] = {"kvt:", "a*[b]\\^{c}?:", ""};
    kvt_store_error error;
    (void)state;
    for (size_t p = 0; p < 3; p++) {
        kvt_redis_config config = config_of(&server);
        kvt_store store;
        kvt_store_stats stats;
        listed l = {.bytes = 77, .left = p == 1 ? 900 : -1};

        redis_expect(&server, "+OK", "FLUSHALL");
        config.prefix = prefixes[p];
        config.ttl_seconds = p == 1 ? 900 : 0;
        store = open_with(&config);
        expect_call(KVT_OK, error, store.list(store.user, on_entry, &l, &error));
        assert_int_equal(l.n, 0);
        expect_call(KVT_OK, error, store.stats(store.user, &stats, &error));
        assert_int_equal(stats.n_values, 0);
        assert_int_equal(stats.bytes, 0);
        expect_call(KVT_OK, error, put_values(&store, 0, 2000, 77, 1, NULL, &error));
        /* Others' keys: of another prefix, of too few digits, of other digits, of another type. */
        redis_expect(&server, "+OK", "SET other 1");
        redis_expect(&server, "+OK", "SET %s1234 1", *prefixes[p] ? "kvt:" : "");
        redis_expect(&server, "+OK", "SET kvt:%064d%s 1", 0, "f");
        redis_expect(&server, "+OK", "SET kvt:%063d%s 1", 0, "F");
        if (p == 0)
            redis_expect(&server, ":1", "RPUSH %s 1", name_of("kvt:", 2500));
        expect_call(KVT_OK, error, store.list(store.user, on_entry, &l, &error));
        assert_int_equal(l.n, 2000);
        expect_call(KVT_OK, error, store.stats(store.user, &stats, &error));
        assert_int_equal(stats.n_values, p == 0 ? 2001 : 2000);
        assert_int_equal(stats.bytes, UINT64_MAX);
        assert_int_equal(stats.max_bytes, 0);
        memset(&l.seen, 0, sizeof l.seen);
        l.n = 0;
        l.most = 10;
        expect_call(KVT_OK, error, store.list(store.user, on_entry, &l, &error));
        assert_int_equal(l.n, 10);
        kvt_store_close(&store);
    }
}

static void test_stats(void **state)
{
    kvt_store store = open_store(&server);
    kvt_store_error error;
    kvt_store_stats stats;
    kvt_store_key keys[3] = {key_of(0), key_of(1), key_of(9)};
    uint8_t found[3];
    (void)state;
    redis_expect(&server, "+OK", "CONFIG SET maxmemory 123456789");
    expect_call(KVT_OK, error, put_values(&store, 0, 2, 10, 1, NULL, &error));
    expect_values(&store, 0, 5, 10, (const uint8_t[]){1, 1, 0, 0, 0});
    expect_call(KVT_OK, error, store.exists(store.user, keys, 3, found, &error));
    expect_call(KVT_OK, error, store.stats(store.user, &stats, &error));
    assert_int_equal(stats.max_bytes, 123456789);
    assert_int_equal(stats.n_values, 2);
    assert_int_equal(stats.n_put, 2);
    assert_int_equal(stats.n_got, 2);
    assert_int_equal(stats.n_missed, 4);
    assert_int_equal(stats.n_failed, 0);
    /* Too many to be counted. */
    redis_expect(&server, "+OK", "DEBUG POPULATE 20000");
    expect_call(KVT_OK, error, store.stats(store.user, &stats, &error));
    assert_int_equal(stats.n_values, UINT64_MAX);
    redis_expect(&server, "+OK", "CONFIG SET maxmemory 0");
    kvt_store_close(&store);
}

/* ---- refusals ---- */

static void expect_refusal(const kvt_store *store, kvt_status status, const char *text)
{
    kvt_store_error error;
    taken t = {0};
    size_t n_put = 99;
    expect_call(status, error, put_values(store, 0, 5, 100, 1, &n_put, &error));
    assert_int_equal(n_put, 0);
    if (!strstr(error.text, text))
        fail_msg("'%s' is not in '%s'", text, error.text);
    assert_null(strstr(error.text, "secret"));
    expect_call(status, error, get_values(store, 0, 5, &t, &error));
    assert_int_equal(t.n_whole, 0);
    assert_null(strstr(error.text, "secret"));
    free_taken(&t);
}

static void test_passwords(void **state)
{
    redis_server closed;
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    (void)state;
    redis_start(&closed, "--requirepass secret1 --enable-debug-command yes");
    config = config_of(&closed);
    store = open_with(&config);
    expect_refusal(&store, KVT_ERR_IO, "NOAUTH");
    kvt_store_close(&store);

    config.password = "secret2";
    store = open_with(&config);
    expect_refusal(&store, KVT_ERR_IO, "WRONGPASS");
    kvt_store_close(&store);

    config.password = "secret1";
    config.database = 2;
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, 5, 100, 1, NULL, &error));
    expect_values(&store, 0, 5, 100, NULL);
    kvt_store_close(&store);

    config.username = "default";
    store = open_with(&config);
    expect_values(&store, 0, 5, 100, NULL);
    kvt_store_close(&store);
    config.username = "nobody";
    store = open_with(&config);
    expect_refusal(&store, KVT_ERR_IO, "WRONGPASS");
    kvt_store_close(&store);

    config.username = NULL;
    config.database = 99;
    store = open_with(&config);
    expect_refusal(&store, KVT_ERR_IO, "DB index is out of range");
    kvt_store_close(&store);
    redis_stop(&closed);
}

static void test_full(void **state)
{
    redis_server small;
    kvt_store store;
    kvt_store_error error;
    size_t n_put = 99, n_there = 0;
    kvt_store_key keys[100];
    uint8_t found[100];
    (void)state;
    redis_start(&small, "--maxmemory 20mb --maxmemory-policy noeviction");
    store = open_store(&small);
    expect_call(KVT_ERR_FULL, error, put_values(&store, 0, 100, 1 << 20, 1, &n_put, &error));
    assert_non_null(strstr(error.text, "OOM"));
    for (size_t i = 0; i < 100; i++)
        keys[i] = key_of(i);
    expect_call(KVT_OK, error, store.exists(store.user, keys, 100, found, &error));
    while (n_there < 100 && found[n_there])
        n_there++;
    assert_in_range(n_put, 5, 20);
    assert_int_equal(n_put, n_there);
    expect_values(&store, 0, n_put, 1 << 20, NULL);
    /* The connection was kept. */
    assert_non_null(strstr(redis_say(&small, "CLIENT LIST TYPE normal"), "cmd=get"));
    expect_call(KVT_OK, error, store.remove(store.user, keys, 100, &error));
    expect_call(KVT_OK, error, put_values(&store, 0, 5, 1 << 20, 1, &n_put, &error));
    assert_int_equal(n_put, 5);
    kvt_store_close(&store);
    redis_stop(&small);
}

static void test_too_large(void **state)
{
    kvt_store store = open_store(&server);
    kvt_store_error error;
    size_t n_put = 99;
    (void)state;
    redis_expect(&server, "+OK", "CONFIG SET proto-max-bulk-len 1mb");
    expect_call(KVT_OK, error, put_values(&store, 0, 2, 1 << 20, 1, &n_put, &error));
    expect_call(KVT_ERR_FULL, error, put_values(&store, 5, 3, 9 << 20, 1, &n_put, &error));
    assert_int_equal(n_put, 0);
    assert_non_null(strstr(error.text, "larger"));
    expect_values(&store, 0, 2, 1 << 20, NULL);
    redis_expect(&server, "+OK", "CONFIG SET proto-max-bulk-len 512mb");
    expect_call(KVT_OK, error, put_values(&store, 5, 3, 9 << 20, 1, &n_put, &error));
    kvt_store_close(&store);
}

static void test_replica(void **state)
{
    redis_server replica;
    kvt_store store;
    kvt_store_error error;
    size_t n_put = 99;
    char options[64];
    (void)state;
    (void)snprintf(options, sizeof options, "--replicaof 127.0.0.1 %d", redis_port(&server));
    redis_start(&replica, options);
    store = open_store(&replica);
    expect_call(KVT_ERR_IO, error, put_values(&store, 0, 30, 100, 1, &n_put, &error));
    assert_int_equal(n_put, 0);
    assert_non_null(strstr(error.text, "READONLY"));
    kvt_store_close(&store);
    redis_stop(&replica);
}

static void test_arguments(void **state)
{
    kvt_redis_config good = {.struct_size = sizeof good, .port = (uint32_t)server.port}, bad;
    kvt_store store, before;
    char text[256], longer[300];
    (void)state;
    memset(&store, 7, sizeof store);
    before = store;
    memset(longer, 'x', sizeof longer);
    longer[sizeof longer - 1] = 0;
    assert_int_equal(kvt_store_open_redis(NULL, &store), KVT_ERR_ARG);
    assert_int_equal(kvt_store_open_redis(&good, NULL), KVT_ERR_ARG);
#define REJECT(status, change)                                                                     \
    bad = good;                                                                                    \
    bad.error_text = text;                                                                         \
    bad.error_text_bytes = sizeof text;                                                            \
    text[0] = 0;                                                                                   \
    bad.change;                                                                                    \
    assert_int_equal(kvt_store_open_redis(&bad, &store), status);                                  \
    assert_memory_equal(&store, &before, sizeof store);                                            \
    assert_true(bad.struct_size != sizeof bad || text[0]);                                         \
    bad.error_text = NULL;                                                                         \
    assert_int_equal(kvt_store_open_redis(&bad, &store), status)
    REJECT(KVT_ERR_ARG, struct_size = 8);
    REJECT(KVT_ERR_ARG, port = 65536);
    REJECT(KVT_ERR_ARG, username = "me");
    REJECT(KVT_ERR_ARG, tls = 2);
    REJECT(KVT_ERR_ARG, reserved = 1);
    REJECT(KVT_ERR_ARG, pipeline = 65537);
    REJECT(KVT_ERR_ARG, unix_path = longer);
    REJECT(KVT_ERR_ARG, tls_ca_file = "ca");
    REJECT(KVT_ERR_ARG, tls_cert_file = bad.tls_key_file = "file");
    good.tls = 1;
    REJECT(KVT_ERR_ARG, unix_path = "socket");
    REJECT(KVT_ERR_ARG, tls_cert_file = "file");
    REJECT(KVT_ERR_ARG, tls_key_file = "file");
#ifndef KVT_TEST_TLS
    REJECT(KVT_ERR_UNSUPPORTED, tls = 1);
    assert_non_null(strstr(text, "KVTILE_TLS"));
    assert_non_null(strstr(text, "stunnel"));
#endif
}

/* A name that is resolved; a server on one of its addresses only. */
static void test_host(void **state)
{
    kvt_redis_config config = config_of(&server);
    kvt_store store;
    kvt_store_error error;
    (void)state;
    config.host = "localhost";
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, 5, 100, 1, NULL, &error));
    kvt_store_close(&store);
    config.host = "no.such.host.invalid";
    store = open_with(&config);
    expect_refusal(&store, KVT_ERR_IO, "no.such.host.invalid");
    kvt_store_close(&store);
}

/* ---- threads ---- */

typedef struct worker {
    const kvt_store *store;
    uint64_t first;
} worker;

static void *work(void *user)
{
    worker *w = user;
    kvt_store_error error;
    for (int turn = 0; turn < 10; turn++) {
        kvt_store_key key = key_of(w->first);
        expect_call(KVT_OK, error, put_values(w->store, w->first, 20, 20000, 2, NULL, &error));
        expect_values(w->store, w->first, 20, 20000, NULL);
        expect_call(KVT_OK, error, w->store->remove(w->store->user, &key, 1, &error));
    }
    return NULL;
}

static void test_threads(void **state)
{
    kvt_store store = open_store(&server);
    kvt_store_error error;
    kvt_store_stats stats;
    pthread_t threads[4];
    worker workers[4];
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        workers[i] = (worker){&store, 1000 * i};
        assert_int_equal(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    for (size_t i = 0; i < 4; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    expect_call(KVT_OK, error, store.stats(store.user, &stats, &error));
    assert_int_equal(stats.n_put, 800);
    assert_int_equal(stats.n_got, 800);
    assert_int_equal(stats.n_failed, 0);
    kvt_store_close(&store);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_sizes, empty),
        cmocka_unit_test_setup(test_wrong_sum, empty),
        cmocka_unit_test_setup(test_holes, empty),
        cmocka_unit_test_setup(test_pipelines, empty),
        cmocka_unit_test_setup(test_skip_and_stop, empty),
        cmocka_unit_test_setup(test_calls_in_a_get, empty),
        cmocka_unit_test_setup(test_names, empty),
        cmocka_unit_test_setup(test_ttl, empty),
        cmocka_unit_test_setup(test_types, empty),
        cmocka_unit_test(test_del),
        cmocka_unit_test_setup(test_list, empty),
        cmocka_unit_test_setup(test_stats, empty),
        cmocka_unit_test(test_passwords),
        cmocka_unit_test(test_full),
        cmocka_unit_test_setup(test_too_large, empty),
        cmocka_unit_test_setup(test_replica, empty),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test_setup(test_host, empty),
        cmocka_unit_test_setup(test_threads, empty),
    };
    int failed;
    if (!redis_begin(argc > 1 ? argv[1] : NULL))
        return 77;
    redis_start(&server, "--enable-debug-command yes");
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    redis_stop(&server);
    redis_end();
    return failed;
}

#else

static void test_none(void **state)
{
    char text[128] = "";
    kvt_redis_config config = {
        .struct_size = sizeof config, .error_text = text, .error_text_bytes = sizeof text};
    kvt_store store;
    (void)state;
    assert_int_equal(kvt_store_open_redis(&config, &store), KVT_ERR_UNSUPPORTED);
    assert_non_null(strstr(text, "hiredis"));
    assert_int_equal(kvt_store_open_redis(NULL, &store), KVT_ERR_ARG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_none)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#endif
