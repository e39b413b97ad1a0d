/*
 * store: a prefix got out of a store, beside what its bytes cost without kvtile.
 *
 *   directory  kvt_prefix_get into recycled blocks, beside open, read and close of the same files
 *              into as much memory, which has been written to; and into one buffer again and again
 *   redis      beside `redis-benchmark -t get` with values of the same size, as many commands in
 *              flight, one connection, on the same server. The server is --redis's, or one that is
 *              started here where redis-server is found
 *
 * Values of --layers, or of 2 and 32 layers: 264 KiB and 4.1 MiB of i8. Each get verifies every
 * byte, and the sequence that it makes is compared with the one that was put before anything is
 * timed.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* nftw */
#endif
#include "bench_files.h"
#include "bench_snap.h"

#include <kvtile/store.h>

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif
#include <time.h>
#include <unistd.h>

enum { MOST_VALUES = 4096 };

typedef struct subject {
    const bench_options *o;
    bench_snap s;
    kvt_store store;
    kvt_seq *to;
    int32_t *prompt; /* [n_prompt] */
    uint64_t n_prompt, got_tokens;
    double bytes; /* of all values */
    size_t n_values, value_bytes;
    char folder[600];
    char *names[MOST_VALUES]; /* of the values' files */
    kvt_store_key keys[MOST_VALUES];
    unsigned char *memory; /* [memory_bytes], for plain reads */
    size_t memory_bytes;
    int to_one_buffer;
    const char *host;
    uint32_t port;
} subject;

static const char key_prefix[] = "kvt-bench:";

/* What is still there if the program ends in the middle. */
static pid_t running_server;
static char folder_in_use[600];

static void require(kvt_status status, const subject *b, const char *what)
{
    bench_require(status, b->s.cache, what);
}

/* ---- what is timed ---- */

static double run_get(void *user)
{
    subject *b = user;
    kvt_prefix_result got;
    require(kvt_seq_clear(b->to), b, "kvt_seq_clear");
    double start = bench_snap_start();
    require(kvt_prefix_get(&b->store, b->to, b->prompt, b->n_prompt, NULL, &got), b,
            "kvt_prefix_get");
    double seconds = bench_snap_stop(start);
    if (got.n_tokens != b->got_tokens)
        bench_fail(1, "store: %llu tokens were got, not %llu", (unsigned long long)got.n_tokens,
                   (unsigned long long)b->got_tokens);
    return seconds;
}

static double run_read(void *user)
{
    subject *b = user;
    double start = bench_snap_start();
    size_t at = 0;
    for (size_t i = 0; i < b->n_values; i++) {
        int fd = open(b->names[i], O_RDONLY);
        ssize_t n = fd < 0 ? -1 : read(fd, b->memory + at, b->value_bytes);
        if (n != (ssize_t)b->value_bytes || close(fd) != 0)
            bench_fail(1, "store: %s cannot be read", b->names[i]);
        at += b->to_one_buffer ? 0 : b->value_bytes;
    }
    return bench_snap_stop(start);
}

/* ---- the sequence and its values ---- */

/* The names of the directory's files. */
static int on_entry(void *user, const kvt_store_entry *entry)
{
    subject *b = user;
    static const char digits[] = "0123456789abcdef";
    char hex[2 * KVT_STORE_KEY_BYTES + 1];
    size_t room = strlen(b->folder) + sizeof hex + 8;
    if (b->n_values == MOST_VALUES)
        bench_fail(2, "store: --bytes: more than %d values", MOST_VALUES);
    for (size_t i = 0; i < KVT_STORE_KEY_BYTES; i++) {
        hex[2 * i] = digits[entry->key.bytes[i] >> 4];
        hex[2 * i + 1] = digits[entry->key.bytes[i] & 15];
    }
    hex[2 * KVT_STORE_KEY_BYTES] = 0;
    b->names[b->n_values] = bench_alloc(room, 1);
    snprintf(b->names[b->n_values++], room, "%s/%.2s/%s", b->folder, hex, hex);
    b->value_bytes = (size_t)entry->bytes;
    return 0;
}

static void fill(subject *b)
{
    kvt_prefix_result put, got;
    size_t n, m, room, room2;
    require(kvt_prefix_put(&b->store, b->s.seq, NULL, &put), b, "kvt_prefix_put");
    b->got_tokens = put.n_tokens;
    b->bytes = (double)put.n_bytes;
    b->value_bytes = (size_t)(put.n_bytes / put.n_values);
    require(kvt_prefix_get(&b->store, b->to, b->prompt, b->n_prompt, NULL, &got), b,
            "kvt_prefix_get");
    /* The one that was put, cut to the same length after its sealed blocks have become final. */
    require(kvt_seq_begin(b->s.seq, 1, NULL), b, "kvt_seq_begin");
    require(kvt_seq_abort(b->s.seq), b, "kvt_seq_abort");
    require(kvt_seq_truncate(b->s.seq, got.n_tokens), b, "kvt_seq_truncate");
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_RAW);
    bench_snap other = b->s;
    other.seq = b->to;
    unsigned char *expected = bench_snap_image(&b->s, &options, &n, &room);
    unsigned char *image = bench_snap_image(&other, &options, &m, &room2);
    if (got.n_tokens != put.n_tokens || n != m || memcmp(expected, image, n) != 0)
        bench_fail(1, "store: what was got is not what was put");
    bench_snap_free(expected, room);
    bench_snap_free(image, room2);
}

static void open_subject(subject *b, const bench_options *o, uint32_t layers, uint32_t threads)
{
    bench_options with = *o;
    memset(b, 0, sizeof *b);
    b->o = o;
    with.layers = layers;
    uint64_t bytes = o->bytes / (layers > 2 ? 2 : 8);
    uint64_t n = bench_snap_tokens(&with, KVT_TYPE_I8, bytes) + 128;
    bench_snap_open(&b->s, &with, KVT_TYPE_I8, threads, n + 64, 0);
    bench_snap_fill(&b->s, n);
    require(kvt_seq_create(b->s.cache, &b->to), b, "kvt_seq_create");
    b->n_prompt = n;
    b->prompt = bench_alloc((size_t)n, sizeof *b->prompt);
    require(kvt_seq_token_ids(b->s.seq, 0, n, b->prompt), b, "kvt_seq_token_ids");
}

static void close_subject(subject *b)
{
    kvt_store_close(&b->store);
    kvt_seq_destroy(b->to);
    bench_snap_close(&b->s);
    free(b->prompt);
    for (size_t i = 0; i < b->n_values; i++)
        free(b->names[i]);
}

/* ---- directory ---- */

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st, (void)type, (void)at;
    return remove(path);
}

static void remove_folder(void)
{
    if (*folder_in_use)
        nftw(folder_in_use, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
    *folder_in_use = 0;
}

static void directory(const bench_options *o, uint32_t layers, uint32_t threads)
{
    subject b;
    char text[256] = "", name[64];
    kvt_store_error error;
    kvt_directory_config config;
    open_subject(&b, o, layers, threads);
    snprintf(b.folder, sizeof b.folder, "%s/kvt-bench-store-%ld", o->dir, (long)getpid());
    memcpy(folder_in_use, b.folder, sizeof b.folder);
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.path = b.folder;
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    kvt_status status = kvt_store_open_directory(&config, &b.store);
    if (status != KVT_OK)
        bench_fail(1, "store: %s: %s", kvt_status_string(status), text);
    fill(&b);
    status = b.store.list(b.store.user, on_entry, &b, &error);
    if (status != KVT_OK)
        bench_fail(1, "store: %s: %s", kvt_status_string(status), error.text);
    b.memory_bytes = b.n_values * b.value_bytes;
    b.memory = bench_snap_memory(b.memory_bytes, true);
    snprintf(name, sizeof name, "get, %zu KiB", b.value_bytes / 1024);
    const char *rivals[] = {"read() into memory", "read() into one buffer"};
    const char *rivals_of_one[] = {"read() by one thread", "one thread, one buffer"};
    const char **rival = threads > 1 ? rivals_of_one : rivals;
    bench_figure figure = {"direct.", name, "of read", 0.8, true, rival[0], NULL};
    bench_snap_pairs(o, &b.s, &figure, run_get, run_read, &b, b.bytes);
    b.to_one_buffer = 1;
    figure.bar = NAN;
    figure.rival = rival[1];
    bench_snap_pairs(o, &b.s, &figure, run_get, run_read, &b, b.bytes);
    remove_folder();
    bench_snap_free(b.memory, b.memory_bytes);
    close_subject(&b);
}

/* ---- redis ---- */

/* The first line of what a program prints that begins with `begin`; 0: there is none. */
static int output_of(const char *command, const char *begin, char *line, size_t room)
{
    int found = 0;
    char next[512];
    FILE *in = popen(command, "r");
    if (!in)
        return 0;
    while (fgets(next, sizeof next, in))
        if (!found && !strncmp(next, begin, strlen(begin))) {
            snprintf(line, room, "%s", next);
            found = 1;
        }
    return pclose(in) == 0 && found;
}

static int benchmark(const subject *b, const char *test, uint64_t n, double *per_second)
{
    char command[512], line[512];
    snprintf(command, sizeof command,
             "redis-benchmark -h %s -p %u -t %s -n %llu -d %zu -P %llu -c 1 --csv 2>/dev/null",
             b->host, (unsigned)b->port, test, (unsigned long long)n, b->value_bytes,
             (unsigned long long)b->o->pipeline);
    if (!output_of(command, !strcmp(test, "get") ? "\"GET\"" : "\"SET\"", line, sizeof line))
        return 0;
    return sscanf(line + 7, "%lf", per_second) == 1;
}

static double run_benchmark(void *user)
{
    subject *b = user;
    double per_second;
    uint64_t n = (uint64_t)(b->bytes / (double)b->value_bytes + 0.5);
    n = n < 2 * b->o->pipeline ? 2 * b->o->pipeline : n;
    bench_snap_elsewhere();
    if (!benchmark(b, "get", n, &per_second))
        bench_fail(1, "store: redis-benchmark failed");
    return b->bytes / (double)b->value_bytes / per_second;
}

static void stop_server(void)
{
    int status;
    if (!running_server)
        return;
    kill(running_server, SIGTERM);
    while (waitpid(running_server, &status, 0) < 0 && errno == EINTR)
        ;
    running_server = 0;
}

static int take_key(void *user, const kvt_store_entry *entry)
{
    subject *b = user;
    if (b->n_values == MOST_VALUES)
        return 1;
    b->keys[b->n_values++] = entry->key;
    return 0;
}

/* What is under the bench's prefix: the server may not be its own. */
static void remove_values(subject *b)
{
    kvt_store_error error;
    kvt_status status;
    do {
        b->n_values = 0;
        status = b->store.list(b->store.user, take_key, b, &error);
        if (status == KVT_OK && b->n_values > 0)
            status = b->store.remove(b->store.user, b->keys, b->n_values, &error);
        if (status != KVT_OK)
            bench_fail(1, "store: %s: %s", kvt_status_string(status), error.text);
    } while (b->n_values > 0);
}

/* Start redis-server; 0: it cannot be. */
static int start_server(subject *b)
{
    char port[16], folder[600];
    char *argv[] = {
        "redis-server", "--port", port,    "--bind",       "127.0.0.1",   "--save", "",
        "--appendonly", "no",     "--dir", (char *)folder, "--daemonize", "no",     "--loglevel",
        "warning",      NULL};
    b->port = 20000 + (uint32_t)getpid() % 20000;
    b->host = "127.0.0.1";
    snprintf(port, sizeof port, "%u", (unsigned)b->port);
    snprintf(folder, sizeof folder, "%s", b->o->dir);
    int ends[2], reason = 0;
    if (pipe(ends) != 0)
        return 0;
    fcntl(ends[1], F_SETFD, FD_CLOEXEC);
    pid_t parent = getpid(), child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, STDOUT_FILENO);
        dup2(null, STDERR_FILENO);
#if defined(__linux__)
        prctl(PR_SET_PDEATHSIG, SIGTERM); /* nor does it outlast a SIGKILL of the bench */
#endif
        if (getppid() == parent)
            execvp(argv[0], argv);
        reason = errno;
        _exit(write(ends[1], &reason, sizeof reason) > 0 ? 127 : 126);
    }
    close(ends[1]);
    while (child > 0 && read(ends[0], &reason, sizeof reason) < 0 && errno == EINTR)
        ;
    close(ends[0]);
    running_server = child > 0 ? child : 0;
    if (reason)
        stop_server();
    return running_server != 0;
}

/* Wait until it answers. */
static void await_server(const subject *b)
{
    kvt_store_key key;
    kvt_store_error error;
    uint8_t found;
    struct timespec moment = {0, 20000000};
    memset(&key, 0, sizeof key);
    for (int i = 0;; i++) {
        bench_end_interrupted();
        kvt_status status = b->store.exists(b->store.user, &key, 1, &found, &error);
        if (status == KVT_OK)
            return;
        if (i == 250)
            bench_fail(1, "store: %s: %s", kvt_status_string(status), error.text);
        nanosleep(&moment, NULL);
    }
}

static void redis(const bench_options *o, uint32_t layers)
{
    subject b;
    char text[256] = "", name[64];
    double unused;
    kvt_redis_config config;
    bench_figure figure = {"redis", name, "of its GETs", 0.7, true, "redis-benchmark -t get", NULL};
    snprintf(name, sizeof name, "get, %u layers", (unsigned)layers);
    open_subject(&b, o, layers, 1);
    if (o->redis) {
        b.host = o->redis;
        b.port = o->redis_port;
    } else if (!start_server(&b)) {
        figure.note = "redis-server was not found";
        bench_snap_missing(o, &figure);
        close_subject(&b);
        return;
    }
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.host = b.host;
    config.port = b.port;
    config.prefix = key_prefix;
    config.pipeline = (uint32_t)o->pipeline;
    config.retry_ms = 1;
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    kvt_status status = kvt_store_open_redis(&config, &b.store);
    if (status != KVT_OK && o->redis)
        bench_fail(1, "store: --redis: %s: %s", kvt_status_string(status), text);
    if (status != KVT_OK) {
        stop_server();
        figure.note = text;
        bench_snap_missing(o, &figure);
        close_subject(&b);
        return;
    }
    await_server(&b);
    fill(&b);
    if (!benchmark(&b, "set", 1, &unused)) {
        figure.note = "redis-benchmark was not found, or failed";
        bench_snap_missing(o, &figure);
    } else {
        snprintf(name, sizeof name, "get, %zu KiB, %llu in flight", b.value_bytes / 1024,
                 (unsigned long long)o->pipeline);
        bench_snap_pairs(o, &b.s, &figure, run_get, run_benchmark, &b, b.bytes);
    }
    remove_values(&b);
    stop_server();
    close_subject(&b);
}

int bench_store(const bench_options *o)
{
    static const uint32_t layers[] = {2, 32};
    size_t n = o->layers || o->quick ? 1 : 2;
    bench_at_end(stop_server);
    bench_at_end(remove_folder);
    bench_snap_begin(o, "store_bars", "store: figures with bars");
    for (size_t i = 0; i < n && o->parts & BENCH_PART_DIRECTORY; i++)
        for (size_t t = 0; t < o->n_threads; t++)
            directory(o, o->layers ? (uint32_t)o->layers : layers[i], o->threads[t]);
    for (size_t i = 0; i < n && o->parts & BENCH_PART_REDIS; i++)
        redis(o, o->layers ? (uint32_t)o->layers : layers[i]);
    return bench_snap_end(o, "Values are in the page cache, or in the server's memory.");
}
