/*
 * A raw save to a file with threads: what is collected is written while the next layers are hashed.
 * The file is the same as one thread writes, whichever thread does the write and in whatever order
 * the tasks run, and a failure of either loses nothing.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_options.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum { LAYERS = 40, TOKENS = 64 * 4 + 10 }; /* blocks of 2.7 MB: more than one write each */

typedef enum threads { ONE, POOL, FIRST_LAST, FIRST_ASIDE, HOWS } threads;

/* An executor, and what it has seen of the file. */
typedef struct executor {
    threads how;
    int fd;           /* -1: none */
    unsigned written; /* first tasks during which the file grew */
} executor;

typedef struct task {
    void (*run)(void *arg, size_t i);
    void *arg;
} task;

static off_t size_of(int fd)
{
    struct stat status;
    assert_int_equal(fstat(fd, &status), 0);
    return status.st_size;
}

static void *run_first(void *user)
{
    const task *t = user;
    t->run(t->arg, 0);
    return NULL;
}

/* The first task last, or in another thread beside the others; these from the last on. */
static void run_in_order(void *user, void (*run)(void *arg, size_t i), void *arg, size_t n)
{
    executor *x = user;
    task first = {run, arg};
    off_t before = x->fd >= 0 ? size_of(x->fd) : 0;
    pthread_t aside;
    if (x->how == FIRST_ASIDE)
        assert_int_equal(pthread_create(&aside, NULL, run_first, &first), 0);
    for (size_t i = n; i-- > 1;)
        run(arg, i);
    if (x->how == FIRST_ASIDE) {
        assert_int_equal(pthread_join(aside, NULL), 0);
    } else {
        if (x->fd >= 0)
            assert_true(size_of(x->fd) == before); /* no other task writes */
        run(arg, 0);
    }
    x->written += x->fd >= 0 && size_of(x->fd) > before;
}

/* A cache whose threads are as `how` has them. */
static kvt_cache *cache_with(const model *m, threads how, executor *x)
{
    kvt_group_config groups[2];
    kvt_config config = model_config(m, groups);
    kvt_cache *cache = NULL;
    config.n_threads = how == ONE ? 1 : how == POOL ? pool_threads(2) : 2;
    x->how = how;
    x->fd = -1;
    x->written = 0;
    if (how >= FIRST_LAST) {
        config.executor.run = run_in_order;
        config.executor.user = x;
        config.executor.n_threads = 2;
    }
    expect_ok(NULL, kvt_cache_create(&config, &cache));
    return cache;
}

static model large_model(void)
{
    return model_of(LAYERS, 4, 128, 128, KVT_TYPE_I8, KVT_TYPE_I8);
}

static bytes save_fd(const kvt_cache *cache, const kvt_seq *seq, const kvt_save_options *options,
                     executor *x)
{
    bytes b;
    int fd = open(in_folder("fd"), O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    x->fd = fd;
    x->written = 0;
    expect_ok(cache, kvt_seq_save_fd(seq, fd, options));
    x->fd = -1;
    assert_int_equal(close(fd), 0);
    b = slurp(in_folder("fd"));
    return b;
}

static void expect_file(const char *name, const bytes *expected)
{
    bytes b = slurp(in_folder(name));
    assert_true(b.n == expected->n && memcmp(b.data, expected->data, b.n) == 0);
    bytes_free(&b);
}

/* Whole and as a delta. The last block is open, and has an image that is made. */
static void same_bytes(void **state)
{
    model m = large_model();
    kvt_save_options o = saves(KVT_CODEC_RAW), delta = o;
    bytes whole = {NULL, 0, 0, 0, -1, 0}, more = whole;
    char base[400];
    (void)state;
    (void)snprintf(base, sizeof base, "%s", in_folder("base"));
    delta.parent = base;
    for (threads how = ONE; how < HOWS; how++) {
        executor x;
        kvt_cache *cache = cache_with(&m, how, &x);
        kvt_seq *seq = model_seq(cache);
        bytes a, b;
        model_append(&m, cache, seq, 64, 64);
        if (how == ONE)
            expect_ok(cache, kvt_seq_save(seq, base, &o));
        model_append(&m, cache, seq, TOKENS - 64, 70);
        a = save_fd(cache, seq, &o, &x);
        if (how == ONE) {
            whole = a;
            assert_true(whole.n > (size_t)10 << 20);
        } else {
            assert_true(a.n == whole.n && memcmp(a.data, whole.data, a.n) == 0);
            bytes_free(&a);
        }
        assert_true(how < FIRST_LAST ? x.written == 0 : x.written >= 4);
        b = save_fd(cache, seq, &delta, &x);
        if (how == ONE) {
            more = b;
            assert_true(more.n < whole.n);
        } else {
            assert_true(b.n == more.n && memcmp(b.data, more.data, b.n) == 0);
            bytes_free(&b);
        }
        expect_ok(cache, kvt_seq_save(seq, in_folder("whole"), &o));
        expect_file("whole", &whole);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    bytes_free(&whole);
    bytes_free(&more);
}

/* No room, from each megabyte on: the old file stays, and the text is the same. */
static void full_disk(void **state)
{
    model m = large_model();
    kvt_save_options o = saves(KVT_CODEC_RAW);
    struct rlimit old, limit;
    (void)state;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    for (threads how = ONE; how < HOWS; how++) {
        executor x;
        kvt_cache *cache = cache_with(&m, how, &x);
        kvt_seq *seq = model_seq(cache);
        bytes good;
        int entries;
        model_append(&m, cache, seq, TOKENS, 70);
        expect_ok(cache, kvt_seq_save(seq, in_folder("a"), &o));
        good = slurp(in_folder("a"));
        entries = count_entries(folder);
        for (size_t at = 0; at < good.n; at += is_quick() ? (size_t)4000037 : (size_t)1000003) {
            kvt_status status;
            limit = old;
            limit.rlim_cur = at;
            assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
            status = kvt_seq_save(seq, in_folder("a"), &o);
            assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
            expect(cache, KVT_ERR_IO, status);
            expect_error_text(cache, "write failed", "no room");
            expect_error_text(cache, strerror(EFBIG), "no room");
            assert_int_equal(count_entries(folder), entries);
        }
        expect_file("a", &good);
        bytes_free(&good);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
}

/* A damaged layer shows while what comes before it is written. No room before it comes first. */
static void damaged_layer(void **state)
{
    model m = large_model();
    kvt_save_options o = saves(KVT_CODEC_RAW);
    (void)state;
    for (threads how = ONE; how < HOWS; how++) {
        executor x;
        kvt_cache *cache = cache_with(&m, how, &x);
        kvt_seq *seq = model_seq(cache), *mapped = model_seq(cache);
        kvt_load_options lazy = loads();
        struct rlimit old, limit;
        bytes file;
        kvt_status status;
        lazy.map = KVT_MAP_LAZY;
        model_append(&m, cache, seq, TOKENS, 70);
        expect_ok(cache, kvt_seq_save(seq, in_folder("a"), &o));
        file = slurp(in_folder("a"));
        file.data[file.n - ((size_t)6 << 20)] ^= 1; /* in a layer of one of the last full blocks */
        spill(in_folder("bent"), file.data, file.n);
        expect_ok(cache, kvt_seq_load(mapped, in_folder("bent"), &lazy, NULL));
        expect(cache, KVT_ERR_CORRUPT, kvt_seq_save(mapped, in_folder("a"), &o));
        expect_error_text(cache, "its bytes do not make its digest", "a damaged layer");
        assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
        limit = old;
        limit.rlim_cur = 3000000;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        status = kvt_seq_save(mapped, in_folder("a"), &o);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        expect(cache, KVT_ERR_IO, status);
        file.data[file.n - ((size_t)6 << 20)] ^= 1;
        expect_file("a", &file);
        bytes_free(&file);
        kvt_seq_destroy(mapped);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_bytes),
        cmocka_unit_test(full_disk),
        cmocka_unit_test(damaged_layer),
    };
    RUN_IN_FOLDER(tests);
}
