/*
 * A store on Redis by TLS: whom it trusts, what it says of those whom it does not, and connections
 * that fail. What a store does otherwise is tested by test_store_redis and test_store_cluster, by
 * TLS as well.
 *
 *   test_store_redis_tls make_certificates.sh
 */
#include "redis_fake.h"
#include "redis_support.h"
#include "redis_values.h"

#include <netinet/in.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define SLACK 3.0 /* seconds that a busy machine may be late */

static redis_server server;
static const char *folder; /* of certificates */

/* The path of a file in it; valid until the eighth call from now. */
static const char *file(const char *name)
{
    static char paths[8][128];
    static int turn;
    char *path = paths[turn = (turn + 1) % 8];
    (void)snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static kvt_redis_config config_of(int port)
{
    kvt_redis_config config = {.struct_size = sizeof config, .port = (uint32_t)port, .tls = 1};
    config.tls_ca_file = redis_ca_file();
    config.timeout_ms = config.connect_timeout_ms = 20000; /* machines are busy */
    config.retry_ms = 1;
    return config;
}

static kvt_store open_with(const kvt_redis_config *config)
{
    kvt_store store;
    kvt_redis_config told = *config;
    char text[256] = "";
    memset(&store, 0, sizeof store);
    told.error_text = text;
    told.error_text_bytes = sizeof text;
    if (kvt_store_open_redis(&told, &store) != KVT_OK)
        fail_msg("%s", text);
    return store;
}

static void expect_text(const char *text, const char *wanted)
{
    if (!strstr(text, wanted))
        fail_msg("'%s' is not in '%s'", wanted, text);
    assert_null(strstr(text, "secret"));
    assert_true(strlen(text) < KVT_STORE_ERROR_BYTES - 1); /* nothing was cut off */
}

/* ---- a call that fails, and one that does not ---- */

static void expect_empty(const kvt_store *store)
{
    kvt_group_config group = group_of(1, 2, 1, 32, 32, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache = cache_of(&group, 1024, 1, NULL);
    kvt_seq *seq;
    int32_t prompt[300] = {0};
    kvt_prefix_result result;
    kvt_status status;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    status = kvt_prefix_get(store, seq, prompt, 300, NULL, &result);
    assert_true(status == KVT_ERR_IO || status == KVT_ERR_UNSUPPORTED); /* without libsodium */
    assert_int_equal(kvt_seq_length(seq), 0);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* It fails, in a time, with a text; a sequence stays empty. */
static void expect_failure(const kvt_store *store, const char *text)
{
    kvt_store_error error;
    taken t = {0};
    size_t n_put = 99;
    double begin = seconds_now();
    (void)poll(NULL, 0, 5); /* retry_ms is over */
    expect_call(KVT_ERR_IO, error, get_values(store, 0, 5, &t, &error));
    assert_true(seconds_now() - begin < SLACK);
    expect_text(error.text, text);
    assert_int_equal(t.n_whole, 0);
    free_taken(&t);
    (void)poll(NULL, 0, 5);
    expect_call(KVT_ERR_IO, error, put_values(store, 0, 5, 100, 1, &n_put, &error));
    expect_text(error.text, text);
    assert_int_equal(n_put, 0);
    (void)poll(NULL, 0, 5);
    expect_empty(store);
    (void)poll(NULL, 0, 5);
}

static void expect_success(const kvt_store *store)
{
    kvt_store_error error;
    expect_call(KVT_OK, error, put_values(store, 0, 5, 100, 1, NULL, &error));
    expect_values(store, 0, 5, 100, NULL);
}

static void expect_failure_with(const kvt_redis_config *config, const char *text)
{
    kvt_store store = open_with(config);
    expect_failure(&store, text);
    kvt_store_close(&store);
}

static void expect_success_with(const kvt_redis_config *config)
{
    kvt_store store = open_with(config);
    expect_success(&store);
    kvt_store_close(&store);
}

/* ---- files ---- */

static void expect_refused(const kvt_redis_config *config, kvt_status status, const char *name,
                           const char *text)
{
    kvt_redis_config told = *config;
    char why[256] = "";
    kvt_store store, before;
    memset(&store, 7, sizeof store);
    before = store;
    assert_int_equal(kvt_store_open_redis(&told, &store), status);
    told.error_text = why;
    told.error_text_bytes = sizeof why;
    assert_int_equal(kvt_store_open_redis(&told, &store), status);
    assert_memory_equal(&store, &before, sizeof store);
    expect_text(why, name);
    expect_text(why, text);
}

static void test_files(void **state)
{
    static const char *const no_files[] = {"garbage", "empty", "server.key"};
    kvt_redis_config config = config_of(server.tls_port);
    (void)state;
    config.tls_ca_file = file("nothing");
    expect_refused(&config, KVT_ERR_IO, "tls_ca_file", "nothing: No such file");
    for (size_t i = 0; i < 3; i++) {
        config.tls_ca_file = file(no_files[i]);
        expect_refused(&config, KVT_ERR_ARG, "tls_ca_file", no_files[i]);
    }
    config = config_of(server.tls_port);
    config.tls_key_file = file("client.key");
    config.tls_cert_file = file("nothing");
    expect_refused(&config, KVT_ERR_IO, "tls_cert_file", "nothing: No such file");
    for (size_t i = 0; i < 3; i++) {
        config.tls_cert_file = file(no_files[i]);
        expect_refused(&config, KVT_ERR_ARG, "tls_cert_file", "it is no certificate in PEM");
    }
    config.tls_cert_file = file("client.crt");
    config.tls_key_file = file("nothing");
    expect_refused(&config, KVT_ERR_IO, "tls_key_file", "nothing: No such file");
    config.tls_key_file = file("client.crt");
    expect_refused(&config, KVT_ERR_ARG, "tls_key_file", "it is no private key in PEM");
    config.tls_key_file = file("server.key");
    expect_refused(&config, KVT_ERR_ARG, "tls_key_file", "it is not the key of tls_cert_file");
    config.tls_key_file = file("locked.key"); /* and the terminal is not read */
    expect_refused(&config, KVT_ERR_ARG, "tls_key_file", "it needs a password");
    /* Nothing of a process is used up, as OpenSSL's numbers of BIOs would be. */
    config = config_of(server.tls_port);
    for (int i = 0; i < 300; i++) {
        kvt_store store = open_with(&config);
        kvt_store_close(&store);
    }
    expect_success_with(&config);
}

/* ---- whom it trusts ---- */

static void show(const char *name)
{
    redis_expect(&server, "+OK", "CONFIG SET tls-cert-file %s/%s.crt tls-key-file %s/%s.key",
                 folder, name, folder, name);
    (void)redis_say(&server, "CLIENT KILL TYPE normal");
}

static void test_certificates(void **state)
{
    static const struct {
        const char *server, *ca, *host, *text;
    } cases[] = {
        {"server", "ca", "127.0.0.1", NULL},
        {"server", "ca", "localhost", NULL},
        {"server", "stranger", "127.0.0.1", "certificate verify failed: "},
        {"server", "stranger", "127.0.0.1", "not trusted"},
        {"server", "client", "127.0.0.1", "certificate verify failed: "},
        {"server", "server", "127.0.0.1", "certificate verify failed: "}, /* who is no CA */
        {"elsewhere", "ca", "localhost", "certificate verify failed: hostname mismatch"},
        {"elsewhere", "ca", "127.0.0.1", "certificate verify failed: IP address mismatch"},
        {"client", "ca", "localhost", "certificate verify failed: "}, /* not for servers */
        {"expired", "ca", "localhost", "certificate verify failed: certificate has expired"},
        {"alone", "ca", "localhost", "certificate verify failed: self-signed certificate"},
        {"alone", "alone", "localhost", NULL},
        {"ca", "ca", "localhost", "certificate verify failed: "},
    };
    kvt_redis_config config = config_of(server.tls_port);
    kvt_store kept = open_with(&config);
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char ca[32];
        (void)snprintf(ca, sizeof ca, "%s.crt", cases[i].ca);
        show(cases[i].server);
        config = config_of(server.tls_port);
        config.tls_ca_file = file(ca);
        config.host = cases[i].host;
        if (cases[i].text)
            expect_failure_with(&config, cases[i].text);
        else
            expect_success_with(&config);
        if (i % 4 == 0) { /* the same store finds the server again when it is right */
            show("elsewhere");
            expect_failure(&kept, "127.0.0.1");
            show("server");
            expect_success(&kept);
        }
    }
    kvt_store_close(&kept);
    show("server");
}

/* The system's own CAs, which OpenSSL lets this name stand for. */
static void test_system(void **state)
{
    kvt_redis_config config = config_of(server.tls_port);
    (void)state;
    config.tls_ca_file = NULL;
    assert_int_equal(setenv("SSL_CERT_FILE", file("stranger.crt"), 1), 0);
    expect_failure_with(&config, "certificate verify failed: ");
    assert_int_equal(setenv("SSL_CERT_FILE", file("ca.crt"), 1), 0);
    expect_success_with(&config);
    assert_int_equal(unsetenv("SSL_CERT_FILE"), 0);
    expect_failure_with(&config, "certificate verify failed: ");
}

static void test_client(void **state)
{
    static const char *const protocols[] = {"TLSv1.2", "TLSv1.3"};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        kvt_redis_config config = config_of(server.tls_port);
        kvt_store stranger, none;

        redis_expect(&server, "+OK", "CONFIG SET tls-protocols %s tls-auth-clients yes",
                     protocols[i]);
        none = open_with(&config);
        expect_failure(&none, "client certificate");
        config.tls_cert_file = file("unknown.crt");
        config.tls_key_file = file("unknown.key");
        stranger = open_with(&config);
        expect_failure(&stranger, "it refuses the client certificate");
        config.tls_cert_file = file("client.crt");
        config.tls_key_file = file("client.key");
        expect_success_with(&config);
        redis_expect(&server, "+OK", "CONFIG SET tls-auth-clients optional");
        expect_success_with(&config);
        expect_success(&none);
        expect_failure(&stranger, "it refuses the client certificate");
        redis_expect(&server, "+OK", "CONFIG SET tls-auth-clients no");
        expect_success(&stranger);
        kvt_store_close(&none);
        kvt_store_close(&stranger);
    }
    {
        kvt_redis_config config = config_of(server.tls_port);
        redis_expect(&server, "+OK", "CONFIG SET tls-protocols TLSv1.1");
        expect_failure_with(&config, "no TLS from 1.2 on");
        redis_expect(&server, "+OK", "CONFIG SET tls-protocols ''");
        redis_expect(&server, "+OK", "CONFIG SET tls-protocols 'TLSv1.2 TLSv1.3'");
        expect_success_with(&config);
    }
}

/* ---- who speaks no TLS ---- */

static void test_no_tls(void **state)
{
    static const char *const answers[] = {"-ERR unknown command\r\n", "HTTP/1.1 400 Bad\r\n\r\n"};
    kvt_redis_config config = config_of(server.port);
    double begin;
    (void)state;
    /* A Redis waits for the end of a line, or answers at once, as it happens. */
    config.connect_timeout_ms = 200;
    expect_failure_with(&config, "speak TLS on this port");
    for (size_t i = 0; i < 2; i++) {
        fake f = {.kind = FAKE_SAYS, .text = answers[i]};
        fake_start(&f);
        config = config_of(f.port);
        expect_failure_with(&config, "the server does not speak TLS on this port");
        fake_stop(&f);
    }
    {
        fake f = {.kind = FAKE_ENDS, .text = ""};
        fake_start(&f);
        config = config_of(f.port);
        expect_failure_with(&config, "closed the connection amid the TLS handshake");
        fake_stop(&f);
    }
    /* Nothing is answered: the time for connecting, and that of the call, are kept. */
    for (int kind = FAKE_DEAF; kind <= FAKE_SAYS; kind++) {
        fake f = {.kind = (fake_kind)kind, .text = ""};
        kvt_store store;
        kvt_store_error error;
        taken t = {0};
        fake_start(&f);
        config = config_of(f.port);
        config.connect_timeout_ms = kind == FAKE_DEAF ? 200 : 20000;
        config.call_timeout_ms = kind == FAKE_DEAF ? 20000 : 200;
        store = open_with(&config);
        begin = seconds_now();
        expect_call(KVT_ERR_IO, error, get_values(&store, 0, 1, &t, &error));
        begin = seconds_now() - begin;
        assert_true(begin > 0.19 && begin < 0.2 + SLACK);
        expect_text(error.text,
                    "no TLS handshake in time: does the server speak TLS on this port?");
        free_taken(&t);
        kvt_store_close(&store);
        fake_stop(&f);
    }
    /* The other way round. */
    config = config_of(server.tls_port);
    config.tls = 0;
    config.tls_ca_file = NULL;
    expect_failure_with(&config, "TLS");
    config.password = "secret";
    expect_failure_with(&config, "TLS");
}

/* A TLS server that is slow in the handshake: a byte now and then does not prolong it. */
static void test_slow_handshake(void **state)
{
    fake f = {.kind = FAKE_PASSES, .target = server.tls_port, .slice = 1, .pause_ms = 10};
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    taken t = {0};
    double begin;
    (void)state;
    f.cut = SIZE_MAX;
    fake_start(&f);
    config = config_of(f.port);
    config.connect_timeout_ms = 300;
    store = open_with(&config);
    begin = seconds_now();
    expect_call(KVT_ERR_IO, error, get_values(&store, 0, 1, &t, &error));
    begin = seconds_now() - begin;
    assert_true(begin > 0.29 && begin < 0.3 + SLACK);
    expect_text(error.text, "no TLS handshake in time");
    free_taken(&t);
    kvt_store_close(&store);
    fake_stop(&f);
}

/* ---- connections that end, and that are slow ---- */

/* After each number of bytes that the server has sent, in the handshake, in a record, between two;
   while it is sent more than the sockets hold. No signal is raised. */
static void test_cuts(void **state)
{
    const size_t n = 6, bytes = 300;
    size_t n_ends = 0, n_in_values = 0;
    (void)state;
    redis_expect(&server, "+OK", "FLUSHALL");
    for (int reset = 0; reset < 2; reset++)
        for (size_t cut = 1; cut < 4500; cut += cut < 40 ? 3 : 61) {
            fake f = {.kind = FAKE_PASSES, .target = server.tls_port, .cut = cut, .reset = reset};
            kvt_redis_config config;
            kvt_store store;
            kvt_store_error error = {""};
            taken t = {.places = (int)(cut & 1)};
            kvt_status status;
            size_t n_put = 99;

            fake_start(&f);
            config = config_of(f.port);
            store = open_with(&config);
            status = put_values(&store, 0, n, bytes, 1, &n_put, &error);
            assert_true(status == KVT_ERR_IO || (status == KVT_OK && n_put == n));
            assert_true(status == KVT_OK || strlen(error.text) > 20);
            (void)poll(NULL, 0, 2);
            if (status != KVT_OK) /* then the next one has a connection of its own */
                expect_call(KVT_OK, error, put_values(&store, 0, n, bytes, 1, &n_put, &error));
            fake_stop(&f);
            kvt_store_close(&store);

            fake_start(&f);
            config.port = (uint32_t)f.port;
            config.pipeline = 1 + (uint32_t)(cut % 5);
            store = open_with(&config);
            error.text[0] = 0;
            status = get_values(&store, 0, n, &t, &error);
            assert_true(status == KVT_ERR_IO || (status == KVT_OK && t.n_whole == n));
            assert_true(status == KVT_OK || strlen(error.text) > 20);
            n_ends += status != KVT_OK;
            n_in_values += status != KVT_OK && t.n_whole > 0;
            for (size_t i = 0; i < n; i++)
                (void)is_taken(&t, 0, i, bytes);
            free_taken(&t);
            (void)poll(NULL, 0, 2);
            if (status != KVT_OK)
                expect_values(&store, 0, n, bytes, NULL);
            kvt_store_close(&store);
            fake_stop(&f);
        }
    assert_true(n_ends > 60 && n_in_values > 10);
}

/* The server is gone while it is sent to. */
static void test_sending(void **state)
{
    int n_failed = 0;
    (void)state;
    for (int i = 0; i < 12; i++) {
        fake f = {.kind = FAKE_PASSES, .target = server.tls_port, .reset = i & 1};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;
        size_t n_put = 99;
        f.cut = 1000 + 100 * (size_t)i; /* of the handshake are about the first 1500 */
        fake_start(&f);
        config = config_of(f.port);
        store = open_with(&config);
        n_failed += put_values(&store, 0, 40, 1 << 20, 1, &n_put, &error) != KVT_OK;
        (void)poll(NULL, 0, 2);
        expect_success(&store);
        kvt_store_close(&store);
        fake_stop(&f);
    }
    assert_true(n_failed >= 6);
    redis_expect(&server, "+OK", "FLUSHALL");
}

/* In pieces of few bytes: SSL has most of a record, but not all. */
static void test_slices(void **state)
{
    static const size_t sizes[] = {0, 1, 2, 5, 30, 1000, 40000};
    (void)state;
    for (uint32_t slice = 1; slice <= 3000; slice = slice * 7 + 1) {
        fake f = {.kind = FAKE_PASSES, .target = server.tls_port, .slice = slice, .cut = SIZE_MAX};
        kvt_redis_config config;
        kvt_store store;
        kvt_store_error error;

        fake_start(&f);
        config = config_of(f.port);
        config.ttl_seconds = 100;
        config.database = 1;
        store = open_with(&config);
        redis_expect(&server, "+OK", "FLUSHALL");
        for (size_t i = slice < 8; i < sizeof sizes / sizeof *sizes - (slice < 50); i++) {
            expect_call(KVT_OK, error, put_values(&store, 10 * i, 5, sizes[i], 1, NULL, &error));
            for (size_t odd = 0; odd < 2; odd++)
                expect_values(&store, 10 * i + odd, 7 - odd, sizes[i],
                              (const uint8_t[]){1, 1, 1, 1, !odd, 0, 0});
        }
        assert_int_equal(atomic_load(&f.n_accepted), 1);
        kvt_store_close(&store);
        fake_stop(&f);
    }
}

/* A record that takes longer than timeout_ms, but bytes of it come all the time. */
static void test_slow_record(void **state)
{
    fake f = {.kind = FAKE_PASSES, .target = server.tls_port, .slice = 300, .pause_ms = 40};
    kvt_redis_config config = config_of(server.tls_port);
    kvt_store store = open_with(&config);
    kvt_store_error error;
    double begin;
    (void)state;
    expect_call(KVT_OK, error, put_values(&store, 0, 1, 8000, 1, NULL, &error));
    kvt_store_close(&store);
    f.cut = SIZE_MAX;
    fake_start(&f);
    config = config_of(f.port);
    config.timeout_ms = 700;
    store = open_with(&config);
    expect_values(&store, 1, 1, 8000, (const uint8_t[]){0}); /* the handshake is over */
    begin = seconds_now();
    expect_values(&store, 0, 1, 8000, NULL);
    assert_true(seconds_now() - begin > 1);
    kvt_store_close(&store);
    fake_stop(&f);
}

static void test_frozen(void **state)
{
    kvt_redis_config config = config_of(server.tls_port);
    kvt_store store;
    kvt_store_error error;
    taken t = {0};
    size_t n_put;
    double begin;
    (void)state;
    config.timeout_ms = 300;
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, 5, 100, 1, NULL, &error));
    redis_freeze(&server);
    begin = seconds_now();
    expect_call(KVT_ERR_IO, error, get_values(&store, 0, 5, &t, &error));
    expect_text(error.text, "has not answered for 300 ms");
    begin = seconds_now() - begin;
    assert_true(begin > 0.29 && begin < 0.3 + SLACK);
    free_taken(&t);
    redis_thaw(&server);
    (void)poll(NULL, 0, 10);
    expect_values(&store, 0, 5, 100, NULL);
    /* More than the sockets hold, of which a record waits to be sent. */
    redis_freeze(&server);
    begin = seconds_now();
    expect_call(KVT_ERR_IO, error, put_values(&store, 0, 30, 1 << 20, 3, &n_put, &error));
    begin = seconds_now() - begin;
    assert_true(begin > 0.29 && begin < 0.3 + SLACK);
    redis_thaw(&server);
    (void)poll(NULL, 0, 10);
    expect_call(KVT_OK, error, put_values(&store, 0, 30, 1 << 20, 3, &n_put, &error));
    expect_values(&store, 0, 30, 1 << 20, NULL);
    kvt_store_close(&store);
}

/* Killed between two calls, and in one. */
static void test_killed(void **state)
{
    redis_server one;
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    (void)state;
    redis_start(&one, NULL);
    config = config_of(one.tls_port);
    store = open_with(&config);
    for (int turn = 0; turn < 3; turn++) {
        expect_success(&store);
        redis_kill(&one);
        if (turn)
            expect_failure(&store, "refused");
        redis_restart(&one);
        (void)poll(NULL, 0, 5);
    }
    expect_call(KVT_OK, error, put_values(&store, 0, 30, 1 << 20, 1, NULL, &error));
    expect_values(&store, 0, 30, 1 << 20, NULL);
    kvt_store_close(&store);
    redis_stop(&one);
}

/* A cluster's nodes are who the cluster says that they are, whoever was connected to first. */
static void test_cluster(void **state)
{
    redis_cluster cluster;
    kvt_redis_config config;
    kvt_store store;
    kvt_store_error error;
    size_t n_put;
    (void)state;
    redis_cluster_start(&cluster, 2, 0, NULL);
    config = config_of(cluster.nodes[0].tls_port);
    config.host = "localhost";
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, 50, 100, 1, NULL, &error));
    kvt_store_close(&store);
    for (int i = 0; i < 2; i++) {
        redis_expect(&cluster.nodes[i], "+OK",
                     "CONFIG SET tls-cert-file %s/named.crt tls-key-file %s/named.key", folder,
                     folder);
        (void)redis_say(&cluster.nodes[i], "CLIENT KILL TYPE normal");
    }
    store = open_with(&config);
    expect_call(KVT_ERR_IO, error, put_values(&store, 0, 50, 100, 1, &n_put, &error));
    expect_text(error.text, "certificate verify failed: IP address mismatch");
    kvt_store_close(&store);
    for (int i = 0; i < 2; i++)
        redis_expect(&cluster.nodes[i], "+OK",
                     "CONFIG SET cluster-announce-hostname localhost "
                     "cluster-preferred-endpoint-type hostname");
    for (int i = 0; i < 2; i++) /* until the other one knows it */
        for (int turn = 0; turn < 500; turn++) {
            if (!strstr(redis_say(&cluster.nodes[i], "CLUSTER SLOTS"), "\r\n?"))
                break;
            (void)poll(NULL, 0, 20);
        }
    store = open_with(&config);
    expect_call(KVT_OK, error, put_values(&store, 0, 50, 100, 1, &n_put, &error));
    expect_values(&store, 0, 50, 100, NULL);
    kvt_store_close(&store);
    redis_cluster_stop(&cluster);
}

/* ---- a server of our own ---- */

typedef enum scene {
    SCENE_TICKET, /* between two calls: a session ticket */
    SCENE_UPDATE, /* new keys, and the client has to make new ones too */
    SCENE_DATA,   /* an answer to nothing */
    SCENE_CLOSE   /* the end of TLS, but not of the connection */
} scene;

typedef struct peer {
    scene scene;
    SSL_CTX *context;
    int listener, port;
    atomic_int n_accepted, stop;
    pthread_t thread;
} peer;

/* Answers that there is no such value, until the client closes. */
static void serve_one(const peer *p, SSL *ssl)
{
    char bytes[4096];
    if (SSL_accept(ssl) != 1)
        return;
    for (int turn = 0; SSL_read(ssl, bytes, sizeof bytes) > 0; turn++) {
        if (SSL_write(ssl, "$-1\r\n", 5) != 5)
            return;
        if (turn > 0)
            continue;
        (void)poll(NULL, 0, 50); /* the client has taken the answer */
        if (p->scene == SCENE_UPDATE) {
            (void)SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED);
            (void)SSL_do_handshake(ssl);
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
        } else if (p->scene == SCENE_TICKET) {
            (void)SSL_new_session_ticket(ssl);
            (void)SSL_do_handshake(ssl);
#endif
        } else if (p->scene == SCENE_DATA) {
            (void)SSL_write(ssl, "$-1\r\n", 5);
        } else if (p->scene == SCENE_CLOSE) {
            (void)SSL_shutdown(ssl);
        }
    }
}

static void *serve(void *user)
{
    peer *p = user;
    sigset_t signals;
    (void)sigemptyset(&signals);
    (void)sigaddset(&signals, SIGPIPE);
    (void)pthread_sigmask(SIG_BLOCK, &signals, NULL); /* of this thread, not of the store's */
    while (!atomic_load(&p->stop)) {
        int fd = accept(p->listener, NULL, NULL);
        SSL *ssl;
        if (fd < 0 || atomic_load(&p->stop)) {
            (void)close(fd);
            break;
        }
        (void)atomic_fetch_add(&p->n_accepted, 1);
        ssl = SSL_new(p->context);
        if (ssl && SSL_set_fd(ssl, fd) == 1)
            serve_one(p, ssl);
        SSL_free(ssl);
        (void)close(fd);
    }
    return NULL;
}

static void peer_start(peer *p)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t bytes = sizeof address;
    p->context = SSL_CTX_new(TLS_server_method());
    assert_non_null(p->context);
    assert_int_equal(SSL_CTX_use_certificate_file(p->context, file("server.crt"), SSL_FILETYPE_PEM),
                     1);
    assert_int_equal(SSL_CTX_use_PrivateKey_file(p->context, file("server.key"), SSL_FILETYPE_PEM),
                     1);
    (void)SSL_CTX_set_num_tickets(p->context, 0);
    p->listener = socket(AF_INET, SOCK_STREAM, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(bind(p->listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(getsockname(p->listener, (struct sockaddr *)&address, &bytes), 0);
    assert_int_equal(listen(p->listener, 16), 0);
    p->port = ntohs(address.sin_port);
    atomic_store(&p->n_accepted, 0);
    atomic_store(&p->stop, 0);
    assert_int_equal(pthread_create(&p->thread, NULL, serve, p), 0);
}

static void peer_stop(peer *p)
{
    atomic_store(&p->stop, 1);
    (void)shutdown(p->listener, SHUT_RDWR);
    assert_int_equal(pthread_join(p->thread, NULL), 0);
    (void)close(p->listener);
    SSL_CTX_free(p->context);
}

/* Messages of TLS's own do not cost a connection; what else comes between two calls does. */
static void test_between_calls(void **state)
{
    (void)state;
    for (scene s = SCENE_TICKET; s <= SCENE_CLOSE; s++) {
        peer p = {.scene = s};
        kvt_redis_config config;
        kvt_store store;
        peer_start(&p);
        config = config_of(p.port);
        store = open_with(&config);
        for (int turn = 0; turn < 4; turn++) {
            expect_values(&store, 0, 1, 10, (const uint8_t[]){0});
            (void)poll(NULL, 0, 200);
        }
        if (s <= SCENE_UPDATE)
            assert_int_equal(atomic_load(&p.n_accepted), 1);
        else
            assert_true(atomic_load(&p.n_accepted) >= 4);
        kvt_store_close(&store);
        peer_stop(&p);
    }
}

/* An error of the caller's own use of OpenSSL, which stays in the thread's queue. */
static int spoil(void *user, size_t i)
{
    (void)user;
    (void)i;
    assert_null(SSL_CTX_new(NULL));
    return 0;
}

/* It is no failure of the store's; and of the store's none is left there. */
static void test_queue(void **state)
{
    kvt_redis_config config = config_of(server.tls_port);
    kvt_store store = open_with(&config);
    kvt_store_error error;
    taken t = {.on_value = spoil};
    (void)state;
    (void)spoil(NULL, 0);
    expect_call(KVT_OK, error, put_values(&store, 0, 20, 100000, 1, NULL, &error));
    (void)spoil(NULL, 0);
    expect_call(KVT_OK, error, get_values(&store, 0, 20, &t, &error));
    assert_int_equal(t.n_whole, 20);
    free_taken(&t);
    kvt_store_close(&store);
    config.port = (uint32_t)server.port;
    config.connect_timeout_ms = 100;
    expect_failure_with(&config, "TLS");
    assert_int_equal(ERR_peek_error(), 0);
    config = config_of(server.tls_port);
    config.tls_ca_file = file("stranger.crt");
    expect_failure_with(&config, "not trusted");
    assert_int_equal(ERR_peek_error(), 0);
    config.tls_ca_file = file("garbage");
    expect_refused(&config, KVT_ERR_ARG, "tls_ca_file", "no certificate");
    assert_int_equal(ERR_peek_error(), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_files),         cmocka_unit_test(test_certificates),
        cmocka_unit_test(test_system),        cmocka_unit_test(test_client),
        cmocka_unit_test(test_no_tls),        cmocka_unit_test(test_slow_handshake),
        cmocka_unit_test(test_cuts),          cmocka_unit_test(test_sending),
        cmocka_unit_test(test_slices),        cmocka_unit_test(test_slow_record),
        cmocka_unit_test(test_frozen),        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_between_calls), cmocka_unit_test(test_queue),
        cmocka_unit_test(test_cluster),
    };
    int failed;
    if (argc != 2 || !redis_begin(argv[1]))
        return 77;
    folder = redis_certificates();
    (void)signal(SIGPIPE, SIG_DFL);
    redis_start(&server, NULL);
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    redis_stop(&server);
    redis_end();
    return failed;
}
