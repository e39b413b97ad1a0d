/*
 * A store on a Redis cluster: keys on all nodes, slots that move, masters that die.
 *
 *   test_store_cluster [make_certificates.sh]    by TLS, where that is given
 */
#include "redis_support.h"
#include "redis_values.h"

#include <poll.h>
#include <stdio.h>

#define N 200 /* values: on each of three nodes some */

static redis_cluster cluster;

static kvt_redis_config config_of(int node)
{
    kvt_redis_config config = {.struct_size = sizeof config,
                               .port = (uint32_t)redis_port(&cluster.nodes[node])};
    config.tls = redis_ca_file() != NULL;
    config.tls_ca_file = redis_ca_file();
    config.timeout_ms = config.connect_timeout_ms = 20000; /* machines are busy */
    config.retry_ms = 1;
    return config;
}

static kvt_store open_with(const kvt_redis_config *config)
{
    kvt_store store;
    memset(&store, 0, sizeof store);
    assert_int_equal(kvt_store_open_redis(config, &store), KVT_OK);
    return store;
}

static kvt_store open_store(int node)
{
    kvt_redis_config config = config_of(node);
    return open_with(&config);
}

static const char *name_of(const char *prefix, uint64_t number)
{
    static char name[256];
    kvt_store_key key = key_of(number);
    int n = snprintf(name, sizeof name, "%s", prefix);
    for (size_t i = 0; i < sizeof key.bytes; i++)
        n += snprintf(name + n, sizeof name - (size_t)n, "%02x", key.bytes[i]);
    return name;
}

static int slot_of(const char *prefix, uint64_t number)
{
    return atoi(redis_say(&cluster.nodes[0], "CLUSTER KEYSLOT %s", name_of(prefix, number)) + 1);
}

/* A number whose key is in a slot that the node had at first. */
static uint64_t number_at(int node, uint64_t from)
{
    while (slot_of("kvt:", from) * 3 / 16384 != node)
        from++;
    return from;
}

/* How often a node has done a command since the last reset. */
static long calls_of(int node, const char *command)
{
    char name[64];
    const char *line;
    (void)snprintf(name, sizeof name, "cmdstat_%s:calls=", command);
    line = strstr(redis_say(&cluster.nodes[node], "INFO commandstats"), name);
    return line ? strtol(line + strlen(name), NULL, 10) : 0;
}

static long redirects_of(int node, const char *code)
{
    char name[64];
    const char *line;
    (void)snprintf(name, sizeof name, "errorstat_%s:count=", code);
    line = strstr(redis_say(&cluster.nodes[node], "INFO errorstats"), name);
    return line ? strtol(line + strlen(name), NULL, 10) : 0;
}

static int empty(void **state)
{
    (void)state;
    for (int i = 0; i < cluster.n_masters; i++) {
        redis_expect(&cluster.nodes[i], "+OK", "FLUSHALL");
        redis_expect(&cluster.nodes[i], "+OK", "CONFIG RESETSTAT");
    }
    return 0;
}

static int count_entry(void *user, const kvt_store_entry *entry)
{
    size_t *n = user;
    assert_int_equal(entry->bytes, 5000);
    ++*n;
    return 0;
}

static void test_all_nodes(void **state)
{
    kvt_store store = open_store(1);
    kvt_store_error error;
    kvt_store_stats stats;
    kvt_store_key keys[N];
    uint8_t found[N], there[N] = {0};
    size_t n_put = 0, n_listed = 0;
    (void)state;

    /* Before anything else: the map is not known. */
    expect_call(KVT_OK, error, store.list(store.user, count_entry, &n_listed, &error));
    assert_int_equal(n_listed, 0);
    expect_call(KVT_OK, error, put_values(&store, 0, N, 5000, 2, &n_put, &error));
    assert_int_equal(n_put, N);
    for (int i = 0; i < 3; i++)
        assert_in_range(atoi(redis_say(&cluster.nodes[i], "DBSIZE") + 1), N / 6, N / 2);
    expect_values(&store, 0, N, 5000, NULL);
    expect_values(&store, 1, N - 1, 5000, NULL);
    for (size_t i = 0; i < N; i++)
        keys[i] = key_of(i);
    expect_call(KVT_OK, error, store.remove(store.user, keys, N / 2, &error));
    memset(there + N / 2, 1, N / 2);
    expect_call(KVT_OK, error, store.exists(store.user, keys, N, found, &error));
    assert_memory_equal(found, there, N);
    expect_values(&store, 0, N, 5000, there);
    expect_call(KVT_OK, error, store.list(store.user, count_entry, &n_listed, &error));
    assert_int_equal(n_listed, N / 2);
    expect_call(KVT_OK, error, store.stats(store.user, &stats, &error));
    assert_int_equal(stats.n_values, N / 2);
    kvt_store_close(&store);
}

/* A receiver ends a get while other nodes have been sent a part of their commands. */
static void test_stopped(void **state)
{
    kvt_redis_config config = config_of(0);
    kvt_store store;
    kvt_store_error error;
    (void)state;

    config.pipeline = 1;
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, N, 100, 1, NULL, &error));
    for (size_t n = 1; n < 20; n++) {
        taken t = {.stop_after = n};
        expect_call(KVT_OK, error, get_values(&store, 0, N, &t, &error));
        assert_int_equal(t.n_whole, n);
        free_taken(&t);
        expect_values(&store, n, 3, 100, NULL);
    }
    kvt_store_close(&store);
}

/* The first call finds the nodes by their redirections; then there are none. */
static void test_slots(void **state)
{
    static const char *const prefixes[] = {"kvt:", "{tag}:", "x{a}{b}", "{}y", "{open", "}{z}", ""};
    (void)state;
    for (size_t p = 0; p < sizeof prefixes / sizeof *prefixes; p++) {
        kvt_redis_config config = config_of(0);
        kvt_store store;
        kvt_store_error error;
        long redirects = 0, on_first = 0;

        (void)empty(NULL);
        config.prefix = prefixes[p];
        store = open_with(&config);
        expect_call(KVT_OK, error, put_values(&store, 0, N, 10, 1, NULL, &error));
        for (int i = 0; i < 3; i++)
            redirects += redirects_of(i, "MOVED");
        for (uint64_t i = 0; i < N; i++)
            on_first += slot_of(prefixes[p], i) * 3 / 16384 == 0;
        assert_int_equal(redirects, N - on_first);
        expect_values(&store, 0, N, 10, NULL);
        expect_values(&store, 1, N - 1, 10, NULL);
        for (int i = 0; i < 3; i++)
            redirects -= redirects_of(i, "MOVED");
        assert_int_equal(redirects, 0);
        kvt_store_close(&store);
    }
}

static void test_moved(void **state)
{
    kvt_store store = open_store(0), second = open_store(2);
    kvt_store_error error;
    uint64_t number = number_at(0, 5000);
    int slot = slot_of("kvt:", number);
    (void)state;

    expect_call(KVT_OK, error, put_values(&store, 0, N, 100, 1, NULL, &error));
    expect_call(KVT_OK, error, put_values(&store, number, 1, 100, 1, NULL, &error));
    expect_values(&second, 0, N, 100, NULL);
    for (int turn = 0; turn < 4; turn++) {
        int from = turn % 3, to = (turn + 1) % 3;
        redis_cluster_move(&cluster, slot, from, to);
        assert_int_equal(calls_of(to, "asking"), 0);
        expect_values(&store, number, 1, 100, NULL);
        assert_int_equal(redirects_of(from, "MOVED") > 0, 1);
        (void)empty(NULL); /* figures, and the values */
        expect_values(&store, number, 1, 100, (const uint8_t[]){0});
        for (int i = 0; i < 3; i++)
            assert_int_equal(redirects_of(i, "MOVED"), 0);
        /* A store that has the old map writes to the new node. */
        expect_call(KVT_OK, error, put_values(&second, number, 1, 100, 1, NULL, &error));
        expect_values(&store, number, 1, 100, NULL);
        redis_expect(&cluster.nodes[to], ":100", "STRLEN %s", name_of("kvt:", number));
    }
    redis_cluster_move(&cluster, slot, 1, 0);
    kvt_store_close(&store);
    kvt_store_close(&second);
}

/* A user who may do all but ASKING: that is said. */
static void expect_not_permitted(uint64_t number)
{
    kvt_redis_config config = config_of(0);
    kvt_store store;
    kvt_store_error error;
    taken t = {0};

    for (int i = 0; i < 3; i++) {
        const char *said =
            redis_say(&cluster.nodes[i], "ACL SETUSER lesser on >password ~* +@all -asking");
        if (strncmp(said, "-ERR unknown", 12) == 0) /* before Redis 6 */
            return;
        assert_string_equal(said, "+OK");
    }
    config.username = "lesser";
    config.password = "password";
    store = open_with(&config);
    expect_call(KVT_ERR_IO, error, get_values(&store, number, 1, &t, &error));
    assert_non_null(strstr(error.text, "does not permit this to the user (NOPERM): ASKING"));
    free_taken(&t);
    kvt_store_close(&store);
    for (int i = 0; i < 3; i++) /* the figures are of others */
        redis_expect(&cluster.nodes[i], ":1", "ACL DELUSER lesser");
}

/* A slot whose keys are partly here and partly there. */
static void test_ask(void **state)
{
    kvt_redis_config config = config_of(0);
    kvt_store store;
    kvt_store_error error;
    kvt_store_key key;
    uint8_t found;
    uint64_t number = number_at(1, 9000);
    int slot = slot_of("kvt:", number);
    (void)state;

    config.ttl_seconds = 1000;
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, N, 100, 1, NULL, &error));
    expect_call(KVT_OK, error, put_values(&store, number, 1, 100, 1, NULL, &error));
    redis_cluster_begin_move(&cluster, slot, 1, 2);
    expect_values(&store, number, 1, 100, NULL); /* it is still here */
    assert_int_equal(calls_of(2, "asking"), 0);
    redis_cluster_move_keys(&cluster, slot, 1, 2);
    expect_values(&store, 0, N, 100, NULL);
    expect_values(&store, number, 1, 100, NULL);
    expect_values(&store, number, 1, 100, NULL); /* ASK holds for one command: once more */
    assert_int_equal(redirects_of(1, "ASK") >= 2, 1);
    assert_int_equal(redirects_of(2, "MOVED"), 0);
    expect_not_permitted(number);
    /* Put, looked for and removed there too. */
    expect_call(KVT_OK, error, put_values(&store, number, 1, 200, 1, NULL, &error));
    expect_values(&store, number, 1, 200, NULL);
    key = key_of(number);
    expect_call(KVT_OK, error, store.exists(store.user, &key, 1, &found, &error));
    assert_int_equal(found, 1);
    expect_call(KVT_OK, error, store.remove(store.user, &key, 1, &error));
    expect_values(&store, number, 1, 200, (const uint8_t[]){0});
    expect_call(KVT_OK, error, put_values(&store, number, 1, 300, 1, NULL, &error));
    redis_cluster_move(&cluster, slot, 1, 2);
    expect_values(&store, number, 1, 300, NULL);
    redis_cluster_move(&cluster, slot, 2, 1);
    kvt_store_close(&store);
}

/* A master dies: its values are not to be had, and that is said in time; the others are. Then its
   replica takes over. */
/* Until a replica has all that its master has. (WAIT is about the writes of its own connection.) */
static void wait_for_replica(int master, int replica)
{
    for (int turn = 0; turn < 500; turn++) {
        char keys[32];
        (void)snprintf(keys, sizeof keys, "%s", redis_say(&cluster.nodes[master], "DBSIZE"));
        if (strcmp(keys, redis_say(&cluster.nodes[replica], "DBSIZE")) == 0)
            return;
        (void)poll(NULL, 0, 20);
    }
    fail_msg("the replica lags behind");
}

static void test_failover(void **state)
{
    kvt_redis_config config = config_of(1); /* which is the one that dies */
    kvt_store store;
    kvt_store_error error;
    uint64_t lost = number_at(1, 20000), kept = number_at(2, 20000);
    taken t = {0};
    size_t n_put = 99;
    double begin;
    (void)state;

    config.connect_timeout_ms = config.timeout_ms = 500;
    config.call_timeout_ms = 4000;
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, N, 100, 1, NULL, &error));
    wait_for_replica(1, 4);
    redis_kill(&cluster.nodes[1]);
    for (int turn = 0; turn < 3; turn++) {
        begin = seconds_now();
        t = (taken){0};
        expect_call(KVT_ERR_IO, error, get_values(&store, 0, N, &t, &error));
        assert_true(seconds_now() - begin < 5);
        assert_true(strlen(error.text) > 10);
        assert_true(t.n_whole < N);
        for (size_t i = 0; i < N; i++)
            (void)is_taken(&t, 0, i, 100);
        if (turn == 0 && strstr(error.text, "refused")) /* the cluster has not seen it yet */
            assert_true(t.n_whole > N / 2);
        free_taken(&t);
        begin = seconds_now();
        expect_call(KVT_ERR_IO, error, put_values(&store, lost, 1, 100, 1, &n_put, &error));
        assert_int_equal(n_put, 0);
        assert_true(seconds_now() - begin < 5);
    }
    redis_cluster_failover(&cluster, 1);
    expect_values(&store, 0, N, 100, NULL);
    expect_call(KVT_OK, error, put_values(&store, lost, 1, 100, 1, NULL, &error));
    expect_call(KVT_OK, error, put_values(&store, kept, 1, 100, 1, NULL, &error));
    expect_values(&store, lost, 1, 100, NULL);
    redis_expect(&cluster.nodes[4], ":100", "STRLEN %s", name_of("kvt:", lost));
    /* The old master comes back as a replica. */
    redis_restart(&cluster.nodes[1]);
    redis_cluster_wait(&cluster);
    expect_values(&store, 0, N, 100, NULL);
    kvt_store_close(&store);
    /* And a store that knows the replica alone. */
    store = open_store(1);
    expect_values(&store, 0, N, 100, NULL);
    expect_call(KVT_OK, error, put_values(&store, lost, 1, 200, 1, NULL, &error));
    expect_values(&store, lost, 1, 200, NULL);
    kvt_store_close(&store);
}

/* A node that does not answer, and none at all. */
static void test_frozen(void **state)
{
    kvt_redis_config config = config_of(0);
    kvt_store store;
    kvt_store_error error;
    uint64_t here = number_at(0, 30000);
    taken t = {0};
    double begin;
    (void)state;

    config.timeout_ms = 300;
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, N, 100, 1, NULL, &error));
    expect_call(KVT_OK, error, put_values(&store, here, 1, 100, 1, NULL, &error));
    redis_freeze(&cluster.nodes[2]);
    begin = seconds_now();
    expect_call(KVT_ERR_IO, error, get_values(&store, 0, N, &t, &error));
    assert_true(seconds_now() - begin < 4);
    assert_true(t.n_whole > N / 2);
    free_taken(&t);
    redis_thaw(&cluster.nodes[2]);
    redis_cluster_wait(&cluster);
    (void)poll(NULL, 0, 10);
    expect_values(&store, 0, N, 100, NULL);
    for (int i = 0; i < cluster.n_nodes; i++)
        redis_kill(&cluster.nodes[i]);
    begin = seconds_now();
    t = (taken){0};
    expect_call(KVT_ERR_IO, error, get_values(&store, 0, N, &t, &error));
    assert_true(seconds_now() - begin < 4);
    assert_non_null(strstr(error.text, "refused"));
    free_taken(&t);
    kvt_store_close(&store);
}

static void test_database(void **state)
{
    kvt_redis_config config = config_of(0);
    kvt_store store;
    kvt_store_error error;
    (void)state;
    config.database = 1;
    store = open_with(&config);
    expect_call(KVT_ERR_IO, error, put_values(&store, 0, 1, 10, 1, NULL, &error));
    assert_non_null(strstr(error.text, "SELECT is not allowed in cluster mode"));
    kvt_store_close(&store);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_all_nodes, empty),
        cmocka_unit_test_setup(test_stopped, empty),
        cmocka_unit_test(test_slots),
        cmocka_unit_test_setup(test_moved, empty),
        cmocka_unit_test_setup(test_ask, empty),
        cmocka_unit_test(test_database),
        cmocka_unit_test_setup(test_failover, empty),
        cmocka_unit_test(test_frozen),
    };
    int failed;
    if (!redis_begin(argc > 1 ? argv[1] : NULL))
        return 77;
    redis_cluster_start(&cluster, 3, 1, NULL);
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    redis_cluster_stop(&cluster);
    redis_end();
    return failed;
}
