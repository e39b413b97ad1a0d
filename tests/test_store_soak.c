/*
 * Many processes put and get prefixes on a Redis server that is killed and started again at random
 * moments, and on a cluster whose masters die: no number that is got is ever another than the one
 * that was put, and every failure is a status. KVT_TEST_FULL=1: 10,000 blocks each way.
 *
 * A client computes keys and values from a prompt's tokens, as a model would: so what a get gives
 * is held against the source itself, number by number.
 */
#define _DEFAULT_SOURCE
#include "redis_support.h"

#include <kvtile/store.h>

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CLIENTS = 8, PROMPTS = 24, COMMON = 192, ROWS = 12, MOST = ROWS * 64 + 70, DIM = 32 };

/* What the clients have done, in memory that they share. */
typedef struct tally {
    uint64_t put, got, failed, calls, refused;
    uint32_t stop, wrong;
    char why[256]; /* of the first that was wrong */
    uint64_t statuses[16];
} tally;

static void add(uint64_t *to, uint64_t n)
{
    __atomic_fetch_add(to, n, __ATOMIC_RELAXED);
}

static uint64_t seen(const uint64_t *of)
{
    return __atomic_load_n(of, __ATOMIC_RELAXED);
}

/* ---- a prompt's tokens, and what a model makes of them ---- */

static size_t make_prompt(uint32_t number, int32_t *prompt)
{
    size_t n = 64 * (4 + number % (ROWS - 3)) + 6 + number;
    for (size_t t = 0; t < n; t++)
        prompt[t] = t < COMMON ? (int32_t)t : (int32_t)(1000 + number * 1000 + t);
    return n;
}

/* Keys and values of a token depend on all tokens up to it. */
static void make_row(const int32_t *prompt, size_t t, uint32_t layer, float *k, float *v)
{
    rng r = {(uint64_t)prompt[t] << 20 ^ (uint64_t)prompt[t / 2] << 8 ^ layer};
    for (size_t i = 0; i < DIM; i++) {
        k[i] = (float)rng_normal(&r);
        v[i] = (float)rng_normal(&r);
    }
}

/* The rest of the prompt, behind what the sequence has. */
static void prefill(kvt_cache *cache, kvt_seq *seq, const int32_t *prompt, size_t n_prompt)
{
    static float k[MOST * DIM], v[MOST * DIM];
    const size_t first = (size_t)kvt_seq_length(seq), n = n_prompt - first;
    expect_ok(cache, kvt_seq_begin(seq, n, NULL));
    for (uint32_t layer = 0; layer < 2; layer++) {
        kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
        for (size_t t = first; t < n_prompt; t++)
            make_row(prompt, t, layer, k + (t - first) * DIM, v + (t - first) * DIM);
        expect_ok(cache, kvt_append(seq, layer, &k_view, &v_view));
    }
    expect_ok(cache, kvt_seq_commit(seq, prompt + first));
}

/* Whether the first n tokens have the same numbers in both. */
static int are_equal(kvt_cache *cache, const kvt_seq *a, const kvt_seq *b, size_t n)
{
    static float x[MOST * DIM], y[MOST * DIM];
    for (uint32_t layer = 0; layer < 2; layer++)
        for (int side = 0; side < 2; side++) {
            kvt_tensor to_x = kvt_tensor_f32(x), to_y = kvt_tensor_f32(y);
            expect_ok(cache, kvt_read(a, layer, (kvt_side)side, 0, n, &to_x));
            expect_ok(cache, kvt_read(b, layer, (kvt_side)side, 0, n, &to_y));
            if (memcmp(x, y, n * DIM * sizeof *x) != 0)
                return 0;
        }
    return 1;
}

/* ---- a client ---- */

static void say_wrong(tally *all, const char *what, uint32_t number, unsigned detail)
{
    if (__atomic_exchange_n(&all->wrong, 1u, __ATOMIC_SEQ_CST) == 0)
        (void)snprintf(all->why, sizeof all->why, "%s: prompt %u, %u", what, (unsigned)number,
                       detail);
}

/* A call's status: of a store that is down, slow or full, or of one that works. */
static void take_status(tally *all, kvt_cache *cache, kvt_status status, uint32_t number)
{
    add(&all->calls, 1);
    add(&all->statuses[status & 15], 1);
    if (status == KVT_OK)
        return;
    add(&all->failed, 1);
    if (status != KVT_ERR_IO) {
        char text[256] = "";
        (void)kvt_cache_error(cache, text, sizeof text);
        say_wrong(all, text, number, (unsigned)status);
    }
}

static kvt_store open_store(int port)
{
    kvt_store store;
    kvt_redis_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.port = (uint32_t)port;
    config.retry_ms = 1;
    config.timeout_ms = 500;
    config.call_timeout_ms = 3000;
    assert_int_equal(kvt_store_open_redis(&config, &store), KVT_OK);
    return store;
}

static void one_prompt(tally *all, const kvt_store *store, kvt_cache *cache, uint32_t number)
{
    int32_t prompt[MOST];
    const size_t n = make_prompt(number, prompt);
    /* A new namespace now and then: else all is there soon, and nothing is put any more. */
    const uint64_t generation = seen(&all->put) / 100;
    kvt_prefix_options options;
    kvt_prefix_result result;
    kvt_seq *seq = NULL, *source = NULL;
    kvt_status status;

    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.name_space = &generation;
    options.name_space_bytes = sizeof generation;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    status = kvt_prefix_get(store, seq, prompt, n, &options, &result);
    take_status(all, cache, status, number);
    if (status == KVT_OK) {
        add(&all->refused, result.n_refused);
        if (kvt_seq_length(seq) != result.n_tokens || result.n_tokens % 64)
            say_wrong(all, "tokens", number, (unsigned)result.n_tokens);
        if (result.n_tokens) {
            /* The source, with one token more than the block that is sealed last. */
            expect_ok(cache, kvt_seq_create(cache, &source));
            prefill(cache, source, prompt, n);
            if (!are_equal(cache, seq, source, (size_t)result.n_tokens))
                say_wrong(all, "numbers", number, (unsigned)result.n_tokens);
            kvt_seq_destroy(source);
        }
        add(&all->got, result.n_values);
    } else if (!kvt_seq_is_empty(seq)) {
        say_wrong(all, "not empty after", number, (unsigned)status);
    }
    prefill(cache, seq, prompt, n);
    status = kvt_prefix_put(store, seq, &options, &result);
    take_status(all, cache, status, number);
    if (status == KVT_OK)
        add(&all->put, result.n_values);
    kvt_seq_destroy(seq);
}

static void client(tally *all, int port, unsigned number)
{
    kvt_group_config group = group_of(2, 1, 1, DIM, DIM, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache;
    kvt_store store;
    rng r = {number + 1};

    group.residual_tokens = KVT_RESIDUAL_NONE;
    cache = cache_of(&group, MOST, 1, NULL);
    store = open_store(port);
    while (!__atomic_load_n(&all->stop, __ATOMIC_RELAXED) &&
           !__atomic_load_n(&all->wrong, __ATOMIC_RELAXED))
        one_prompt(all, &store, cache, rng_below(&r, PROMPTS));
    kvt_store_close(&store);
    kvt_cache_destroy(cache);
}

/* ---- the runs ---- */

static void rest(unsigned ms)
{
    const struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    (void)nanosleep(&t, NULL);
}

static tally *start(pid_t *clients, int port)
{
    tally *all = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(all != MAP_FAILED);
    (void)fflush(NULL);
    for (unsigned i = 0; i < CLIENTS; i++) {
        clients[i] = fork();
        assert_true(clients[i] >= 0);
        if (clients[i] == 0) {
            client(all, port, i);
            _exit(0);
        }
    }
    return all;
}

static void end(tally *all, const pid_t *clients, const char *what, uint64_t blocks,
                unsigned events)
{
    int status;
    __atomic_store_n(&all->stop, 1u, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < CLIENTS; i++) {
        while (waitpid(clients[i], &status, 0) < 0 && errno == EINTR)
            ;
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            fail_msg("%s: client %u ended with %x", what, i, (unsigned)status);
    }
    if (all->wrong)
        fail_msg("%s: %s", what, all->why);
    (void)printf("%s: %llu blocks put, %llu got, %u times killed; %llu of %llu calls failed\n",
                 what, (unsigned long long)all->put, (unsigned long long)all->got, events,
                 (unsigned long long)all->failed, (unsigned long long)all->calls);
    assert_int_equal(all->refused, 0);
    assert_true(all->put >= blocks && all->got >= blocks);
    assert_true(all->failed > 0); /* else nothing was tried */
    (void)munmap(all, sizeof *all);
}

static uint64_t blocks_of(void)
{
    return is_full() ? 10000 : is_quick() ? 300 : 1500;
}

/* Whether there is more to do. */
static int goes_on(const tally *all, uint64_t blocks)
{
    return !__atomic_load_n(&all->wrong, __ATOMIC_RELAXED) &&
           (seen(&all->put) < blocks || seen(&all->got) < blocks);
}

static void test_server(void **state)
{
    redis_server server;
    pid_t clients[CLIENTS];
    rng r = {7};
    unsigned kills = 0;
    tally *all;
    const uint64_t blocks = blocks_of();

    (void)state;
    redis_start(&server, NULL);
    all = start(clients, server.port);
    while (goes_on(all, blocks) || kills < 5) {
        rest(50 + rng_below(&r, 400));
        redis_kill(&server);
        kills++;
        rest(rng_below(&r, 60));
        redis_restart(&server);
    }
    end(all, clients, "server", blocks, kills);
    redis_stop(&server);
}

static void test_cluster(void **state)
{
    redis_cluster cluster;
    pid_t clients[CLIENTS];
    unsigned kills = 0;
    tally *all;
    const uint64_t blocks = blocks_of();

    (void)state;
    memset(&cluster, 0, sizeof cluster);
    redis_cluster_start(&cluster, 3, 1, NULL);
    all = start(clients, cluster.nodes[1].port);
    for (int n = 0; n < 3 && goes_on(all, blocks); n += 2) {
        const uint64_t before = seen(&all->got);
        while (goes_on(all, blocks) && seen(&all->got) < before + blocks / 3)
            rest(20);
        redis_kill(&cluster.nodes[n]);
        kills++;
        rest(200);
        redis_cluster_failover(&cluster, n);
    }
    while (goes_on(all, blocks))
        rest(20);
    end(all, clients, "cluster", blocks, kills);
    redis_cluster_stop(&cluster);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_server),
        cmocka_unit_test(test_cluster),
    };
    if (!redis_is_there())
        return 77;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
