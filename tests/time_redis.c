/*
 * How fast values come from a Redis server, against redis-benchmark on the same server, value size
 * and pipeline, each with one connection, in turns:
 *
 *   time_redis [turns [make_certificates.sh]]
 *
 * Prints medians in MiB/s and their ratio; with the receiver's memory (place) and without. With the
 * script also by TLS, and the ratio to the same without.
 */
#include "redis_support.h"
#include "redis_values.h"

#include <stdio.h>

#define PIPELINE 16
#define TURNS_MOST 99

static uint64_t got_bytes;

static int take(void *user, size_t i, uint64_t total, uint64_t offset, const void *data,
                size_t bytes)
{
    (void)user;
    (void)i;
    (void)total;
    (void)offset;
    (void)data;
    got_bytes += bytes;
    return KVT_STORE_MORE;
}

/* Memory that a receiver has for a value, as a sequence's blocks are: of each in turn. */
static void *place(void *user, size_t i, uint64_t total, uint64_t offset, size_t *bytes)
{
    (void)bytes;
    return (char *)user + (i % PIPELINE) * total + offset;
}

static double get_rate(const kvt_store *store, const kvt_store_key *keys, size_t n, size_t bytes,
                       void *memory)
{
    kvt_store_receiver receiver = {memory, take, memory ? place : NULL};
    kvt_store_error error;
    double begin = seconds_now();
    got_bytes = 0;
    expect_call(KVT_OK, error, store->get(store->user, keys, n, &receiver, &error));
    assert_int_equal(got_bytes, n * bytes);
    return (double)got_bytes / 1048576 / (seconds_now() - begin);
}

static double put_rate(const kvt_store *store, const kvt_store_key *keys, size_t n, size_t bytes,
                       const void *memory)
{
    kvt_store_part part = {memory, bytes};
    kvt_store_value *values = malloc(n * sizeof *values);
    kvt_store_error error;
    size_t n_put;
    double begin;
    assert_non_null(values);
    for (size_t i = 0; i < n; i++)
        values[i] = (kvt_store_value){&part, 1, bytes};
    begin = seconds_now();
    expect_call(KVT_OK, error, store->put(store->user, keys, values, n, &n_put, &error));
    begin = seconds_now() - begin;
    free(values);
    return (double)(n * bytes) / 1048576 / begin;
}

static double peer_rate(const redis_server *server, const char *test, size_t n, size_t bytes)
{
    char command[256], line[256];
    double rate = 0;
    FILE *f;
    (void)snprintf(command, sizeof command,
                   "redis-benchmark -p %d -t %s -c 1 -P %d -n %zu -d %zu --csv", server->port, test,
                   PIPELINE, n, bytes);
    f = popen(command, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f))
        if (line[0] == '"' && line[1] != 't')
            rate = strtod(strchr(line, ',') + 2, NULL);
    (void)pclose(f);
    assert_true(rate > 0);
    return rate * (double)bytes / 1048576;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t n)
{
    qsort(values, n, sizeof *values, compare);
    return values[n / 2];
}

/* The same server by TLS. */
static kvt_store open_by_tls(kvt_redis_config config, const redis_server *server)
{
    kvt_store store;
    config.port = (uint32_t)server->tls_port;
    config.tls = 1;
    config.tls_ca_file = redis_ca_file();
    assert_int_equal(kvt_store_open_redis(&config, &store), KVT_OK);
    return store;
}

int main(int argc, char **argv)
{
    static const size_t sizes[] = {4u << 20, 264u << 10, 64u << 10};
    size_t turns = argc > 1 ? strtoul(argv[1], NULL, 10) : 7;
    int by_tls = argc > 2;
    redis_server server;

    if (turns < 1 || turns > TURNS_MOST || !redis_begin(by_tls ? argv[2] : NULL))
        return 77;
    redis_start(&server, NULL);
    for (size_t s = 0; s < 3; s++) {
        size_t bytes = sizes[s], n = ((size_t)128 << 20) / bytes;
        kvt_redis_config config = {.struct_size = sizeof config,
                                   .port = (uint32_t)server.port,
                                   .pipeline = PIPELINE,
                                   .timeout_ms = 20000};
        kvt_store store, tls = {0};
        kvt_store_key *keys = malloc(n * sizeof *keys);
        unsigned char *memory = value_of(s, PIPELINE * bytes);
        double rates[8][TURNS_MOST] = {{0}};

        assert_non_null(keys);
        for (size_t i = 0; i < n; i++)
            keys[i] = key_of(0); /* as redis-benchmark does */
        assert_int_equal(kvt_store_open_redis(&config, &store), KVT_OK);
        (void)put_rate(&store, keys, 1, bytes, memory);
        if (by_tls)
            tls = open_by_tls(config, &server);
        (void)peer_rate(&server, "set", 16, bytes);
        for (size_t t = 0; t < turns; t++) {
            rates[0][t] = peer_rate(&server, "get", n, bytes);
            rates[1][t] = get_rate(&store, keys, n, bytes, NULL);
            rates[2][t] = get_rate(&store, keys, n, bytes, memory);
            rates[3][t] = peer_rate(&server, "set", n, bytes);
            rates[4][t] = put_rate(&store, keys, n, bytes, memory);
            if (!by_tls)
                continue;
            rates[5][t] = get_rate(&tls, keys, n, bytes, NULL);
            rates[6][t] = get_rate(&tls, keys, n, bytes, memory);
            rates[7][t] = put_rate(&tls, keys, n, bytes, memory);
        }
        for (size_t r = 0; r < 8; r++)
            rates[r][0] = median(rates[r], turns);
        printf("%7zu bytes: get %5.0f MiB/s, placed %5.0f, redis-benchmark %5.0f: %.2f, %.2f; "
               "put %5.0f, redis-benchmark %5.0f: %.2f\n",
               bytes, rates[1][0], rates[2][0], rates[0][0], rates[1][0] / rates[0][0],
               rates[2][0] / rates[0][0], rates[4][0], rates[3][0], rates[4][0] / rates[3][0]);
        if (by_tls)
            printf("  by TLS: get %5.0f MiB/s, placed %5.0f: %.2f, %.2f; put %5.0f: %.2f\n",
                   rates[5][0], rates[6][0], rates[5][0] / rates[1][0], rates[6][0] / rates[2][0],
                   rates[7][0], rates[7][0] / rates[4][0]);
        (void)fflush(stdout);
        kvt_store_close(&store);
        kvt_store_close(&tls);
        free(memory);
        free(keys);
    }
    redis_stop(&server);
    redis_end();
    return 0;
}
