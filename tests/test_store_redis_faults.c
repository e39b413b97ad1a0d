/*
 * A store on Redis where something fails: servers that are not there, that die in the middle of a
 * pipeline, that are slow, that answer nonsense. Every call ends in its time with a status and a
 * text, and what one call has left unanswered is never taken for another's.
 */
#include "redis_fake.h"
#include "redis_support.h"
#include "redis_values.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#define SLACK 3.0 /* seconds that a busy machine may be late */

static redis_server server;

static kvt_redis_config config_of(int port)
{
    kvt_redis_config config = {.struct_size = sizeof config, .port = (uint32_t)port};
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

static void expect_text(const kvt_store_error *error, const char *text)
{
    if (!strstr(error->text, text))
        fail_msg("'%s' is not in '%s'", text, error->text);
    assert_null(strstr(error->text, "secret"));
}

static int no_entry(void *user, const kvt_store_entry *entry)
{
    (void)user;
    (void)entry;
    return 0;
}

/* Every function of the store fails, between two times in seconds. */
static void expect_failures(const kvt_store *store, const char *text, double at_least,
                            double at_most)
{
    kvt_store_key keys[20];
    uint8_t found[20];
    for (size_t i = 0; i < 20; i++)
        keys[i] = key_of(i);
    for (int call = 0; call < 6; call++) {
        kvt_store_error error = {""};
        kvt_store_stats stats;
        taken t = {0};
        size_t n_put = 99;
        double begin;
        (void)poll(NULL, 0, 5); /* retry_ms is over */
        begin = seconds_now();
        switch (call) {
        case 0:
            expect_call(KVT_ERR_IO, error, put_values(store, 0, 20, 100, 1, &n_put, &error));
            assert_int_equal(n_put, 0);
            break;
        case 1:
            expect_call(KVT_ERR_IO, error, get_values(store, 0, 20, &t, &error));
            assert_int_equal(t.n_whole, 0);
            free_taken(&t);
            break;
        case 2:
            expect_call(KVT_ERR_IO, error, store->exists(store->user, keys, 20, found, &error));
            break;
        case 3: expect_call(KVT_ERR_IO, error, store->remove(store->user, keys, 20, &error)); break;
        case 4: expect_call(KVT_ERR_IO, error, store->stats(store->user, &stats, &error)); break;
        case 5:
            expect_call(KVT_ERR_IO, error, store->list(store->user, no_entry, NULL, &error));
            break;
        }
        begin = seconds_now() - begin;
        if (begin < at_least || begin > at_most)
            fail_msg("call %d: %.3f s, not %.3f .. %.3f", call, begin, at_least, at_most);
        expect_text(&error, text);
    }
}

static void test_nobody(void **state)
{
    kvt_redis_config config = config_of(port_of_nobody());
    kvt_store store = open_with(&config);
    (void)state;
    expect_failures(&store, "refused", 0, SLACK);
    kvt_store_close(&store);
    config = (kvt_redis_config){
        .struct_size = sizeof config, .unix_path = "/tmp/kvt/no/such/socket", .retry_ms = 1};
    store = open_with(&config);
    expect_failures(&store, "No such file", 0, SLACK);
    kvt_store_close(&store);
}

/* Connections that are never accepted. */
static void test_nowhere(void **state)
{
    int sockets[4];
    kvt_redis_config config = config_of(port_of_nowhere(sockets));
    kvt_store store;
    (void)state;
    config.connect_timeout_ms = 200;
    store = open_with(&config);
    expect_failures(&store, "timed out", 0.19, 0.2 + SLACK);
    kvt_store_close(&store);
    config.connect_timeout_ms = 20000;
    config.call_timeout_ms = 200;
    store = open_with(&config);
    expect_failures(&store, "", 0.19, 0.2 + SLACK);
    kvt_store_close(&store);
    for (int i = 0; i < 4; i++)
        (void)close(sockets[i]);
}

/* A server that accepts and does not answer, or does not even read. */
static void test_deaf(void **state)
{
    kvt_store_error error;
    unsigned char *part = value_of(0, 1 << 20);
    kvt_store_part parts[32];
    kvt_store_value value = {parts, 32, 32 << 20};
    kvt_store_key key = key_of(0);
    (void)state;
    for (int kind = FAKE_DEAF; kind <= FAKE_SAYS; kind++) {
        fake f = {.kind = (fake_kind)kind, .text = ""};
        kvt_redis_config config;
        kvt_store store;
        size_t n_put = 9;
        double begin;

        fake_start(&f);
        config = config_of(f.port);
        config.timeout_ms = 100;
        store = open_with(&config);
        expect_failures(&store, "has not answered for 100 ms", 0.09, 0.1 + SLACK);
        /* More than the sockets' buffers take: one MiB, 32 times. */
        for (size_t p = 0; p < 32; p++)
            parts[p] = (kvt_store_part){part, 1 << 20};
        (void)poll(NULL, 0, 5);
        begin = seconds_now();
        expect_call(KVT_ERR_IO, error, store.put(store.user, &key, &value, 1, &n_put, &error));
        assert_in_range((seconds_now() - begin) * 1000, 90, 100 + 2000 * SLACK);
        assert_int_equal(n_put, 0);
        kvt_store_close(&store);
        config.password = "secret";
        store = open_with(&config);
        expect_failures(&store, "has not answered for 100 ms", 0.09, 0.1 + SLACK);
        kvt_store_close(&store);
        fake_stop(&f);
    }
    free(part);
}

/* A byte every now and then: the call as a whole is bounded. */
static void test_drip(void **state)
{
    static const char *const texts[] = {"", "-ERR ", "$1000000\r\n", "$1000000\r\nabc",
                                        "*2\r\n$1\r\n0\r\n*1\r\n$1000\r\n"};
    (void)state;
    for (size_t i = 0; i < 2 * sizeof texts / sizeof *texts; i++) {
        fake f = {.kind = FAKE_DRIPS, .text = texts[i / 2], .pause_ms = 20};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        taken t = {0};
        double begin;

        fake_start(&f);
        config = config_of(f.port);
        config.call_timeout_ms = 300;
        config.password = i & 1 ? "secret" : NULL;
        store = open_with(&config);
        begin = seconds_now();
        expect_call(KVT_ERR_IO, error, get_values(&store, 0, 3, &t, &error));
        begin = seconds_now() - begin;
        /* "x" is no beginning of a line, "*" none of a get's or AUTH's answer. */
        if (i >= 2 && i < 8 && !(i & 1)) {
            expect_text(&error, "longer than 300 ms");
            assert_in_range(begin * 1000, 290, 300 + 1000 * SLACK);
        }
        assert_in_range(begin * 1000, 0, 300 + 1000 * SLACK);
        assert_int_equal(t.n_whole, 0);
        free_taken(&t);
        (void)poll(NULL, 0, 5);
        begin = seconds_now();
        expect_call(KVT_ERR_IO, error, store.list(store.user, no_entry, NULL, &error));
        assert_in_range((seconds_now() - begin) * 1000, 0, 300 + 1000 * SLACK);
        kvt_store_close(&store);
        fake_stop(&f);
    }
}

/* An array without end, of strings that are each no longer than may be. */
static void test_large_reply(void **state)
{
    enum { STRINGS = 80, BYTES = 1 << 20 };
    static const char head[] = "*1000\r\n", string[] = "$1048576\r\n";
    size_t at = sizeof head - 1, room = at + STRINGS * (sizeof string + BYTES + 2);
    char *text = calloc(room, 1);
    fake f = {.kind = FAKE_SAYS, .text = text};
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    (void)state;

    assert_non_null(text);
    memcpy(text, head, at);
    for (int i = 0; i < STRINGS; i++) {
        memcpy(text + at, string, sizeof string - 1);
        memset(text + at + sizeof string - 1, 'x', BYTES);
        memcpy(text + at + sizeof string - 1 + BYTES, "\r\n", 2);
        at += sizeof string - 1 + BYTES + 2;
    }
    f.text_bytes = at;
    fake_start(&f);
    config = config_of(f.port);
    config.timeout_ms = 10000;
    store = open_with(&config);
    expect_call(KVT_ERR_IO, error, store.list(store.user, no_entry, NULL, &error));
    expect_text(&error, "memory");
    kvt_store_close(&store);
    fake_stop(&f);
    free(text);
}

/* Of values that have all come already no more are given when the time is over. */
static int takes_long(void *user, size_t i)
{
    (void)user;
    (void)i;
    (void)poll(NULL, 0, 2000);
    return KVT_STORE_MORE;
}

static void test_slow_receiver(void **state)
{
    kvt_redis_config config = config_of(server.port);
    kvt_store store;
    kvt_store_error error;
    taken t = {.on_value = takes_long};
    (void)state;
    config.call_timeout_ms = 5000;
    store = open_with(&config);
    redis_expect(&server, "+OK", "FLUSHALL");
    expect_call(KVT_OK, error, put_values(&store, 0, 10, 100, 1, NULL, &error));
    expect_call(KVT_ERR_IO, error, get_values(&store, 0, 10, &t, &error));
    expect_text(&error, "longer than 5000 ms");
    assert_in_range(t.n_whole, 1, 3);
    free_taken(&t);
    kvt_store_close(&store);
}

/* The time is over when all that was sent has been answered, and not all has been sent: the next
   call's commands are its own, and in its order. */
static int takes_too_long(void *user, size_t i)
{
    (void)user;
    (void)i;
    (void)poll(NULL, 0, 2100);
    return KVT_STORE_MORE;
}

static int is_in_order(void *user, size_t i)
{
    size_t *next = user;
    assert_int_equal(i, *next);
    ++*next;
    return KVT_STORE_MORE;
}

static void test_unsent(void **state)
{
    (void)state;
    redis_expect(&server, "+OK", "FLUSHALL");
    for (size_t n = 10; n > 0; n /= 10) { /* of the next call */
        kvt_redis_config config = config_of(server.port);
        kvt_store store = open_with(&config);
        kvt_store_error error;
        size_t next = 0;
        taken late = {.on_value = takes_too_long}, t = {.on_value = is_in_order, .user = &next};

        expect_call(KVT_OK, error, put_values(&store, 0, 10, 100, 1, NULL, &error));
        kvt_store_close(&store);
        config.pipeline = 1;
        config.call_timeout_ms = 2000;
        store = open_with(&config);
        expect_call(KVT_ERR_IO, error, get_values(&store, 0, 10, &late, &error));
        expect_text(&error, "longer than 2000 ms");
        assert_int_equal(late.n_whole, 1);
        free_taken(&late);
        expect_call(KVT_OK, error, get_values(&store, 0, n, &t, &error));
        assert_int_equal(next, n);
        free_taken(&t);
        kvt_store_close(&store);
    }
}

static void test_frozen(void **state)
{
    kvt_redis_config config = config_of(server.port);
    kvt_store store;
    kvt_store_error error;
    taken t = {0};
    double begin;
    (void)state;
    config.timeout_ms = 200;
    config.retry_ms = 400;
    store = open_with(&config);
    redis_expect(&server, "+OK", "FLUSHALL");
    expect_call(KVT_OK, error, put_values(&store, 0, 10, 100, 1, NULL, &error));
    redis_freeze(&server);
    begin = seconds_now();
    expect_call(KVT_ERR_IO, error, get_values(&store, 0, 5, &t, &error));
    expect_text(&error, "has not answered for 200 ms");
    assert_in_range((seconds_now() - begin) * 1000, 190, 200 + 1000 * SLACK);
    free_taken(&t);
    /* A server that has not answered is not tried at once. */
    begin = seconds_now();
    t = (taken){0};
    expect_call(KVT_ERR_IO, error, get_values(&store, 0, 5, &t, &error));
    expect_text(&error, "not tried again yet");
    assert_in_range((seconds_now() - begin) * 1000, 0, 190);
    free_taken(&t);
    redis_thaw(&server);
    (void)poll(NULL, 0, 450);
    /* Its late answers are another connection's. */
    expect_values(&store, 5, 5, 100, NULL);
    kvt_store_close(&store);
}

static void test_retry(void **state)
{
    redis_server one;
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    size_t n_put;
    double begin;
    (void)state;
    redis_start(&one, NULL);
    config = config_of(one.port);
    config.retry_ms = 3000;
    store = open_with(&config);
    /* The server is not needed for opening, and is connected to again after its restart. */
    for (int turn = 0; turn < 3; turn++) {
        expect_call(KVT_OK, error, put_values(&store, 0, 10, 100, 1, NULL, &error));
        expect_values(&store, 0, 10, 100, NULL);
        redis_kill(&one);
        redis_restart(&one);
    }
    redis_kill(&one);
    begin = seconds_now();
    expect_call(KVT_ERR_IO, error, put_values(&store, 0, 10, 100, 1, &n_put, &error));
    expect_text(&error, "refused");
    redis_restart(&one);
    if (seconds_now() - begin < 2.5) { /* machines are busy */
        expect_call(KVT_ERR_IO, error, put_values(&store, 0, 10, 100, 1, &n_put, &error));
        expect_text(&error, "not tried again yet");
        expect_text(&error, "refused");
    }
    while (seconds_now() - begin < 3.2)
        (void)poll(NULL, 0, 50);
    expect_call(KVT_OK, error, put_values(&store, 0, 10, 100, 1, &n_put, &error));
    expect_values(&store, 0, 10, 100, NULL);
    kvt_store_close(&store);
    redis_stop(&one);
}

/* The connection ends after each number of bytes that are answered. */
static void test_cuts(void **state)
{
    const size_t n = 6, bytes = 300;
    (void)state;
    redis_expect(&server, "+OK", "FLUSHALL");
    for (int reset = 0; reset < 2; reset++)
        for (size_t cut = 1; cut < n * 308; cut += cut < 330 ? 13 : 101) {
            fake f = {.kind = FAKE_PASSES, .target = server.port, .cut = cut, .reset = reset};
            kvt_redis_config config;
            kvt_store store;
            kvt_store_error error;
            taken t = {.places = (int)(cut & 1)};
            size_t n_put = 99;

            fake_start(&f);
            config = config_of(f.port);
            store = open_with(&config);
            if (cut < n * 5) {
                expect_call(KVT_ERR_IO, error, put_values(&store, 0, n, bytes, 1, &n_put, &error));
                if (reset) /* which may overtake what was answered */
                    assert_true(n_put <= cut / 5);
                else
                    assert_int_equal(n_put, cut / 5);
            }
            fake_stop(&f);
            kvt_store_close(&store);

            fake_start(&f);
            config.port = (uint32_t)f.port;
            config.pipeline = 1 + (uint32_t)(cut % 5);
            store = open_with(&config);
            redis_expect(&server, "+OK", "FLUSHALL");
            {
                kvt_redis_config direct = config_of(server.port);
                kvt_store other = open_with(&direct);
                expect_call(KVT_OK, error, put_values(&other, 0, n, bytes, 1, NULL, &error));
                kvt_store_close(&other);
            }
            expect_call(KVT_ERR_IO, error, get_values(&store, 0, n, &t, &error));
            assert_true(t.n_whole <= cut / 308 && (reset || t.n_whole == cut / 308));
            for (size_t i = 0; i < n; i++)
                (void)is_taken(&t, 0, i, bytes);
            free_taken(&t);
            /* The next call has a connection of its own. */
            expect_values(&store, 3, 3, bytes, NULL);
            assert_int_equal(atomic_load(&f.n_accepted), 2);
            kvt_store_close(&store);
            fake_stop(&f);
        }
}

/* Answers in pieces of few bytes. */
static void test_slices(void **state)
{
    static const size_t sizes[] = {0, 1, 2, 5, 30, 1000};
    (void)state;
    for (uint32_t slice = 1; slice <= 40; slice = slice * 3 + 1) {
        fake f = {.kind = FAKE_PASSES, .target = server.port, .slice = slice, .cut = SIZE_MAX};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        kvt_store_stats stats;

        fake_start(&f);
        config = config_of(f.port);
        config.ttl_seconds = 100;
        config.database = 1;
        store = open_with(&config);
        redis_expect(&server, "+OK", "FLUSHALL");
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            size_t n_put;
            expect_call(KVT_OK, error, put_values(&store, 10 * i, 5, sizes[i], 1, &n_put, &error));
            for (uint64_t odd = 0; odd < 2; odd++)
                expect_values(&store, 10 * i + odd, 7 - odd, sizes[i],
                              (const uint8_t[]){1, 1, 1, 1, !odd, 0, 0});
        }
        expect_call(KVT_OK, error, store.list(store.user, no_entry, NULL, &error));
        expect_call(KVT_OK, error, store.stats(store.user, &stats, &error));
        assert_int_equal(stats.n_values, 30);
        /* From Redis 7.2 on list and stats close theirs, which does not touch what it reads. */
        assert_in_range(atomic_load(&f.n_accepted), 1, 3);
        kvt_store_close(&store);
        fake_stop(&f);
    }
}

/* ---- nonsense ---- */

static char long_line[20001], hosts[2][400]; /* MOVED to one of 255 characters, and of 256 */

static const struct {
    const char *answer; /* to a get of one value */
    const char *text;   /* of the error; NULL: the get succeeds, but a second one does not */
} nonsense[] = {
    {"HTTP/1.1 400 Bad Request\r\n\r\n", "protocol"},
    {"\r\n", "protocol"},
    {"\n", "protocol"},
    {"$5\r\nhelloXX", "protocol"},
    {"$0\r\nXX", "protocol"},
    {"$-\r\n", "protocol"},
    {"$5x\r\nhello\r\n", "protocol"},
    {"$99999999999999999999\r\n", "protocol"},
    {"*1000000000\r\n", "protocol"},
    {"*0\r\n", "type"},
    {"*1\r\n:1\r\n", "type"},
    {"%1\r\n:1\r\n:1\r\n", "type"},
    {":5\r\n", "type"},
    {"+OK\r\n", "type"},
    {"-\r\n", "answers"},
    {"-ERR \001\002\377\r\n", "ERR ???"},
    {long_line, "protocol"},
    {"-LOADING Redis is loading the dataset in memory\r\n", "LOADING"},
    {"-MISCONF x\r\n", "MISCONF"},
    {"-MASTERDOWN x\r\n", "MASTERDOWN"},
    {"-BUSY x\r\n", "BUSY"},
    {"-NOPERM x\r\n", "NOPERM"},
    {"-CLUSTERDOWN Hash slot not served\r\n", "CLUSTERDOWN"},
    {"-TRYAGAIN x\r\n", "TRYAGAIN"},
    {"-DENIED Redis is running in protected mode\r\n", "DENIED"},
    {"-MOVED\r\n", "MOVED"},
    {"-MOVED 5\r\n", "MOVED"},
    {"-MOVED 99999 127.0.0.1:7000\r\n", "MOVED"},
    {"-MOVED 5 127.0.0.1:0\r\n", "MOVED"},
    {"-MOVED 5 127.0.0.1:70000\r\n", "MOVED"},
    {"-ASK x 127.0.0.1:7000\r\n", "ASK"},
    {hosts[0], "redirects"}, /* it is followed, as far as it goes */
    {hosts[1], "MOVED"},
    {"$3\r\nabc\r\n$3\r\nabc\r\n", "was not asked"},
    {"$-1\r\n+OK\r\n", "was not asked"},
    {"$-1\r\n+OK", "was not asked"},
};

static void fill_lines(void)
{
    for (size_t i = 0; i < 2; i++) {
        memset(hosts[i], 'a', sizeof hosts[i]);
        memcpy(hosts[i], "-MOVED 5 ", 9);
        memcpy(hosts[i] + 9 + 255 + i, ":7000\r\n", 8);
    }
    memset(long_line, 'y', sizeof long_line - 1);
    long_line[0] = '+';
}

static void test_nonsense(void **state)
{
    (void)state;
    fill_lines();
    for (size_t i = 0; i < sizeof nonsense / sizeof *nonsense; i++) {
        fake f = {.kind = FAKE_SAYS, .text = nonsense[i].answer};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        kvt_store_key key = key_of(0);

        fake_start(&f);
        config = config_of(f.port);
        config.call_timeout_ms = 5000;
        store = open_with(&config);
        for (int turn = 0; turn < 2; turn++) {
            taken t = {.places = turn};
            (void)poll(NULL, 0, 5);
            error.text[0] = 0;
            if (get_values(&store, 0, 1, &t, &error) != KVT_ERR_IO)
                fail_msg("answer %zu: no failure", i);
            expect_text(&error, nonsense[i].text);
            free_taken(&t);
        }
        (void)poll(NULL, 0, 5);
        if (store.remove(store.user, &key, 1, &error) == KVT_OK)
            assert_memory_equal(nonsense[i].answer, ":5", 2);
        kvt_store_close(&store);
        fake_stop(&f);
    }
}

/* All of its functions against all of it: no crash, no hang. */
static void test_all_nonsense(void **state)
{
    static const char *const more[] = {
        "*2\r\n$1\r\n0\r\n*1\r\n$-1\r\n",
        "*2\r\n:1\r\n:2\r\n",
        "*1\r\n*3\r\n:0\r\n:99999\r\n*2\r\n$1\r\na\r\n:1\r\n",
        "*1\r\n*3\r\n:5\r\n:1\r\n*2\r\n$1\r\na\r\n:1\r\n",
        "*1\r\n*3\r\n:0\r\n:1\r\n*2\r\n:1\r\n:1\r\n",
        "*1\r\n*3\r\n:0\r\n:1\r\n*2\r\n$1\r\na\r\n:0\r\n",
        "*1\r\n*3\r\n:0\r\n:1\r\n*0\r\n",
        "*1\r\n*0\r\n",
        "*0\r\n",
        "*-1\r\n",
        "*1000000000\r\n",
        "*2\r\n*1000000000\r\n",
        "*2000000000\r\n:1\r\n",
        "-ERR cluster support disabled\r\n*0\r\n*0\r\n*2\r\n$1\r\n0\r\n*1\r\n*0\r\n",
        "-ERR cluster support "
        "disabled\r\n*0\r\n*2\r\n$40\r\n0123456789012345678901234567890123456789"
        "\r\n*0\r\n",
        "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n",
        "-ERR cluster support disabled\r\n:3\r\n$5\r\nhello\r\n-ERR x\r\n:1\r\n:2\r\n",
    };
    size_t n = sizeof nonsense / sizeof *nonsense, m = sizeof more / sizeof *more;
    (void)state;
    fill_lines();
    for (size_t i = 0; i < n + m; i++)
        for (int call = 0; call < 5; call++) {
            fake f = {.kind = FAKE_ENDS, .text = i < n ? nonsense[i].answer : more[i - n]};
            kvt_redis_config config;
            kvt_store store;
            kvt_store_error error = {""};
            kvt_store_stats stats;
            kvt_store_key key = key_of(0);
            uint8_t found;
            taken t = {0};
            double begin = seconds_now();

            fake_start(&f);
            config = config_of(f.port);
            config.call_timeout_ms = 5000;
            config.password = call == 0 ? "secret" : NULL;
            store = open_with(&config);
            switch (call) {
            case 0:
            case 1:
                (void)get_values(&store, 0, 1, &t, &error);
                free_taken(&t);
                break;
            case 2: (void)store.exists(store.user, &key, 1, &found, &error); break;
            case 3: (void)store.stats(store.user, &stats, &error); break;
            case 4: (void)store.list(store.user, no_entry, NULL, &error); break;
            }
            assert_true(seconds_now() - begin < 5 + SLACK);
            assert_null(strstr(error.text, "secret"));
            kvt_store_close(&store);
            fake_stop(&f);
        }
}

/* A password is never told, even where the server repeats it. */
static void test_secret(void **state)
{
    static const char *const answers[] = {
        "-ERR unknown command `AUTH`, with args beginning with: `secret`, \r\n",
        "-secret\r\n",
        "+OK\r\n-ERR unknown command `secret`\r\n",
        ":5\r\n",
        "+OK\r\n",
    };
    (void)state;
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        fake f = {.kind = FAKE_SAYS, .text = answers[i], .then = "-ERR it was secret\r\n"};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        taken t = {0};
        fake_start(&f);
        config = config_of(f.port);
        config.password = "secret";
        store = open_with(&config);
        expect_call(KVT_ERR_IO, error, get_values(&store, 0, 1, &t, &error));
        assert_true(strlen(error.text) > 20);
        assert_null(strstr(error.text, "secret"));
        free_taken(&t);
        kvt_store_close(&store);
        fake_stop(&f);
    }
}

/* A server that closes while it is sent to: no signal, and what it has said is told. */
static void test_closing(void **state)
{
    static const char *const answers[] = {"", "-ERR Protocol error: invalid bulk length\r\n"};
    unsigned char *part = value_of(0, 1 << 20);
    kvt_store_part parts[32];
    kvt_store_value value = {parts, 32, 32 << 20};
    kvt_store_key key = key_of(0);
    char path[96];
    (void)state;
    for (size_t p = 0; p < 32; p++)
        parts[p] = (kvt_store_part){part, 1 << 20};
    (void)snprintf(path, sizeof path, "%s/fake", server.folder);
    for (size_t i = 0; i < 4; i++) {
        /* A Unix socket is known to be closed at once. */
        fake f = {.kind = FAKE_ENDS, .text = answers[i & 1], .path = i & 2 ? path : NULL};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        size_t n_put = 9;

        fake_start(&f);
        config = config_of(f.port);
        config.unix_path = f.path;
        store = open_with(&config);
        expect_call(i & 1 ? KVT_ERR_FULL : KVT_ERR_IO, error,
                    store.put(store.user, &key, &value, 1, &n_put, &error));
        assert_int_equal(n_put, 0);
        kvt_store_close(&store);
        fake_stop(&f);
    }
    free(part);
}

/* What comes between two calls is no answer to the second one. */
static void test_late_answer(void **state)
{
    fake f = {.kind = FAKE_DRIPS, .text = "$-1\r\n", .pause_ms = 50};
    kvt_redis_config config;
    kvt_store store;
    (void)state;
    fake_start(&f);
    config = config_of(f.port);
    store = open_with(&config);
    for (int i = 1; i < 4; i++) {
        expect_values(&store, 0, 1, 10, (const uint8_t[]){0});
        assert_int_equal(atomic_load(&f.n_accepted), i);
        (void)poll(NULL, 0, 200);
    }
    kvt_store_close(&store);
    fake_stop(&f);
}

/* MOVED is followed although the first node's map is an old one, by which the slots are still the
   second node's; that one has no map, and the third one has all. */
static void test_old_map(void **state)
{
    char texts[4][128];
    fake nodes[3] = {{.kind = FAKE_SAYS, .text = texts[0], .then = texts[1]},
                     {.kind = FAKE_SAYS, .text = texts[2]},
                     {.kind = FAKE_SAYS, .text = texts[3], .then = ":1\r\n"}};
    static const char map[] = "*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n";
    static const char moved[] = "-MOVED 1 127.0.0.1:%d\r\n";
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    kvt_store_key key = key_of(0);
    uint8_t found = 0;
    (void)state;

    for (int i = 0; i < 3; i++)
        fake_start(&nodes[i]); /* which speaks when it is spoken to */
    (void)snprintf(texts[0], sizeof texts[0], moved, nodes[1].port);
    (void)snprintf(texts[1], sizeof texts[1], map, nodes[1].port);
    (void)snprintf(texts[2], sizeof texts[2], moved, nodes[2].port);
    (void)snprintf(texts[3], sizeof texts[3], map, nodes[2].port);
    config = config_of(nodes[0].port);
    store = open_with(&config);
    expect_call(KVT_OK, error, store.exists(store.user, &key, 1, &found, &error));
    assert_int_equal(found, 1);
    kvt_store_close(&store);
    for (int i = 0; i < 3; i++)
        fake_stop(&nodes[i]);
}

/* A cluster that sends from node to node without end. */
static void test_redirects(void **state)
{
    static const char *const answers[] = {"-ASK 1 127.0.0.1:%d\r\n", "-MOVED 1 127.0.0.1:%d\r\n"};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        char text[128], asked[160];
        fake f = {.kind = FAKE_SAYS, .text = text};
        fake to = {.kind = FAKE_SAYS, .text = i ? text : asked}; /* to ASKING and what follows */
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        kvt_store_key key = key_of(0);
        uint8_t found;
        double begin = seconds_now();
        fake_start(&f);
        fake_start(&to);
        (void)snprintf(text, sizeof text, answers[i], to.port);
        (void)snprintf(asked, sizeof asked, "+OK\r\n%s", text);
        config = config_of(f.port);
        store = open_with(&config);
        expect_call(KVT_ERR_IO, error, store.exists(store.user, &key, 1, &found, &error));
        expect_text(&error, "redirects without end");
        assert_true(seconds_now() - begin < 5 + SLACK);
        kvt_store_close(&store);
        fake_stop(&f);
        fake_stop(&to);
    }
}

/* More addresses than a store keeps: none is written behind the others, and the first go on. */
static void test_many_addresses(void **state)
{
    enum { N = 1100 };
    char *map = malloc(N * 64), moved[64];
    fake nodes[2] = {{.kind = FAKE_SAYS, .text = moved},
                     {.kind = FAKE_SAYS, .text = map, .then = ":1\r\n"}};
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    kvt_store_key key = key_of(0);
    uint8_t found = 0;
    size_t at;
    (void)state;
    assert_non_null(map);
    fake_start(&nodes[0]);
    fake_start(&nodes[1]);
    (void)snprintf(moved, sizeof moved, "-MOVED 1 127.0.0.1:%d\r\n", nodes[1].port);
    at = (size_t)sprintf(map, "*1\r\n*%d\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n",
                         N + 3, nodes[1].port);
    for (int i = 0; i < N; i++)
        at += (size_t)sprintf(map + at, "*2\r\n$11\r\n127.77.7.77\r\n:%d\r\n", 1 + i);
    config = config_of(nodes[0].port);
    config.call_timeout_ms = 20000;
    store = open_with(&config);
    (void)store.exists(store.user, &key, 1, &found, &error); /* which learns them */
    expect_call(KVT_OK, error, store.exists(store.user, &key, 1, &found, &error));
    assert_int_equal(found, 1);
    kvt_store_close(&store);
    fake_stop(&nodes[0]);
    fake_stop(&nodes[1]);
    free(map);
}

/* A server that has been demoted: the next call looks for who has its name now. */
static void test_demoted(void **state)
{
    static const char *const answers[] = {"-READONLY You can't write\r\n",
                                          "-MASTERDOWN Link is down\r\n", "-ERR other\r\n"};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        fake f = {.kind = FAKE_SAYS, .text = answers[i]};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        size_t n_put;
        fake_start(&f);
        config = config_of(f.port);
        store = open_with(&config);
        for (int turn = 0; turn < 2; turn++) {
            expect_call(KVT_ERR_IO, error, put_values(&store, 0, 1, 100, 1, &n_put, &error));
            (void)poll(NULL, 0, 5);
        }
        assert_int_equal(atomic_load(&f.n_accepted), i < 2 ? 2 : 1);
        kvt_store_close(&store);
        fake_stop(&f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_redirects),     cmocka_unit_test(test_many_addresses),
        cmocka_unit_test(test_demoted),       cmocka_unit_test(test_nobody),
        cmocka_unit_test(test_nowhere),       cmocka_unit_test(test_deaf),
        cmocka_unit_test(test_drip),          cmocka_unit_test(test_large_reply),
        cmocka_unit_test(test_slow_receiver), cmocka_unit_test(test_frozen),
        cmocka_unit_test(test_retry),         cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_slices),        cmocka_unit_test(test_nonsense),
        cmocka_unit_test(test_all_nonsense),  cmocka_unit_test(test_secret),
        cmocka_unit_test(test_late_answer),   cmocka_unit_test(test_closing),
        cmocka_unit_test(test_unsent),        cmocka_unit_test(test_old_map),
    };
    int failed;
    if (!redis_begin(NULL))
        return 77;
    (void)signal(SIGPIPE, SIG_DFL);
    redis_start(&server, NULL);
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    redis_stop(&server);
    return failed;
}
