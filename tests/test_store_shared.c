/*
 * A directory store and others: handles, threads and processes at once; what else may be in its
 * directory; directories that are none; leftovers; a limit on the size of files. Runs in a folder
 * of its own under the current one.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* flock */
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "store_values.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char path[64];

static kvt_store open_store(uint64_t max_bytes)
{
    kvt_store s;
    store_ok(folder_open(path, max_bytes, &s));
    return s;
}

static void end_store(kvt_store *s)
{
    folder_agrees(path, s);
    kvt_store_close(s);
    folder_remove(path);
}

static kvt_store_stats stats_of(kvt_store *s)
{
    kvt_store_stats stats;
    store_ok(s->stats(s->user, &stats, &store_error));
    return stats;
}

static const char *in_folder(const char *name)
{
    static char file[256];
    (void)snprintf(file, sizeof file, "%s/%s", path, name);
    return file;
}

static void spill(const char *name, const void *data, size_t n)
{
    FILE *f = fopen(in_folder(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static size_t slurp(const char *name, unsigned char *to, size_t room)
{
    FILE *f = fopen(in_folder(name), "rb");
    size_t n;
    assert_non_null(f);
    n = fread(to, 1, room, f);
    (void)fclose(f);
    return n;
}

/* ---- several at once ---- */

enum { NUMBERS = 48, MOST_BYTES = 9000, BOUND = 100000 };

/* Random calls; the number of the first that went wrong, or 0. It must not use cmocka. */
static int work(kvt_store *s, uint64_t seed, size_t n_calls)
{
    static const kvt_store_receiver nothing;
    kvt_store_error error;
    rng r = {seed * 2 + 1};
    unsigned char *data = malloc(MOST_BYTES);
    (void)nothing;

    for (size_t call = 1; call <= n_calls; call++) {
        uint64_t number = rng_below(&r, NUMBERS);
        kvt_store_key key = key_of(number);
        uint32_t what = rng_below(&r, 11);
        kvt_status status = KVT_OK;
        if (what < 5) {
            size_t bytes = 24 + rng_below(&r, MOST_BYTES - 24), n_put;
            kvt_store_part part = {data, bytes};
            kvt_store_value value = {&part, 1, bytes};
            value_fill(number, rng_next(&r), data, bytes);
            status = s->put(s->user, &key, &value, 1, &n_put, &error);
        } else if (what < 8) {
            collector c;
            kvt_store_receiver receiver;
            collector_make(&c, 1);
            receiver = collector_receiver(&c);
            status = s->get(s->user, &key, 1, &receiver, &error);
            if (c.values[0].n_begun &&
                (c.values[0].have != c.values[0].total ||
                 !value_is_sound(&key, c.values[0].data, (size_t)c.values[0].total, NULL)))
                status = KVT_ERR_CORRUPT;
            collector_free(&c);
        } else if (what < 9) {
            status = s->remove(s->user, &key, 1, &error);
        } else if (what < 10) {
            kvt_store_stats stats;
            status = s->stats(s->user, &stats, &error);
            if (status == KVT_OK && stats.bytes > BOUND)
                status = KVT_ERR_LIMIT;
        } else { /* so many questions that the oldest notes make room */
            kvt_store_key keys[8];
            uint8_t found[8];
            for (size_t i = 0; i < 8; i++)
                keys[i] = key_of((number + i) % NUMBERS);
            for (size_t i = 0; i < 12 && status == KVT_OK; i++)
                status = s->exists(s->user, keys, 2 + i % 7, found, &error);
        }
        if (status != KVT_OK) {
            free(data);
            (void)fprintf(stderr, "status %d: %s\n", (int)status, error.text);
            return (int)call;
        }
    }
    free(data);
    return 0;
}

typedef struct worker {
    pthread_t thread;
    kvt_store *s;
    uint64_t seed;
    int went_wrong;
} worker;

static void *run_worker(void *user)
{
    worker *w = user;
    w->went_wrong = work(w->s, w->seed, is_quick() ? 100 : 400);
    return NULL;
}

/* Threads of one handle and of another one. */
static void test_threads(void **state)
{
    kvt_store one = open_store(BOUND), other = open_store(0);
    worker w[4];
    (void)state;

    for (size_t i = 0; i < 4; i++) {
        w[i].s = i < 2 ? &one : &other;
        w[i].seed = i;
        assert_int_equal(pthread_create(&w[i].thread, NULL, run_worker, &w[i]), 0);
    }
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(pthread_join(w[i].thread, NULL), 0);
        assert_int_equal(w[i].went_wrong, 0);
    }
    assert_true(stats_of(&one).n_evicted > 0);
    assert_true(stats_of(&one).bytes <= BOUND);
    assert_int_equal(folder_look(path).n_temporaries, 0);
    kvt_store_close(&other);
    end_store(&one);
}

static void wait_for(pid_t *children, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        int status;
        assert_int_equal(waitpid(children[i], &status, 0), children[i]);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

/* Processes, with handles of their own and with one that a fork has copied. */
static void test_processes(void **state)
{
    (void)state;
    for (int inherits = 0; inherits < 2; inherits++) {
        kvt_store s = open_store(BOUND);
        pid_t children[4];
        for (size_t i = 0; i < 4; i++) {
            children[i] = fork();
            assert_true(children[i] >= 0);
            if (children[i] == 0) {
                kvt_store own = s;
                if (!inherits && folder_open(path, 0, &own) != KVT_OK)
                    _exit(1);
                _exit(work(&own, 10 + i, is_quick() ? 100 : 400) != 0);
            }
        }
        assert_int_equal(work(&s, 9, 50), 0);
        wait_for(children, 4);
        assert_true(stats_of(&s).bytes <= BOUND);
        assert_int_equal(folder_look(path).n_temporaries, 0);
        end_store(&s);
    }
}

/* Many open a directory that is not there yet. */
static void test_first(void **state)
{
    (void)state;
    for (size_t round = 0; round < 5; round++) {
        pid_t children[6];
        kvt_store s;
        for (size_t i = 0; i < 6; i++) {
            children[i] = fork();
            assert_true(children[i] >= 0);
            if (children[i] == 0)
                _exit(folder_open(path, 0, &s) != KVT_OK || put_value(&s, i, i, 100) != KVT_OK);
        }
        wait_for(children, 6);
        s = open_store(0);
        assert_int_equal(stats_of(&s).n_values, 6);
        end_store(&s);
    }
}

/* ---- directories that are none ---- */

static void test_foreign(void **state)
{
    unsigned char file[72], changed[72];
    kvt_store s;
    (void)state;

    assert_int_equal(mkdir(path, 0700), 0); /* empty: is taken */
    s = open_store(0);
    kvt_store_close(&s);
    folder_remove(path);
    assert_int_equal(mkdir(path, 0700), 0);
    spill("a file", "x", 1);
    store_is(KVT_ERR_FORMAT, folder_open(path, 0, &s));
    assert_non_null(strstr(store_error.text, "not empty, and no store"));
    assert_int_equal(access(in_folder("kvtile-store"), F_OK), -1);
    assert_int_equal(unlink(in_folder("a file")), 0);
    spill("kvtile-store", "a text of another program, as long as the state is, or even longer", 66);
    store_is(KVT_ERR_FORMAT, folder_open(path, 0, &s));
    assert_non_null(strstr(store_error.text, "another program's"));
    assert_int_equal(unlink(in_folder("kvtile-store")), 0);
    assert_int_equal(mkdir(in_folder("kvtile-store"), 0700), 0);
    store_is(KVT_ERR_FORMAT, folder_open(path, 0, &s));
    assert_int_equal(rmdir(in_folder("kvtile-store")), 0);
    assert_int_equal(symlink("/dev/null", in_folder("kvtile-store")), 0);
    store_is(KVT_ERR_FORMAT, folder_open(path, 0, &s));
    assert_int_equal(unlink(in_folder("kvtile-store")), 0);
    assert_int_equal(mkfifo(in_folder("kvtile-store"), 0600), 0);
    store_is(KVT_ERR_FORMAT, folder_open(path, 0, &s));
    assert_int_equal(unlink(in_folder("kvtile-store")), 0);
    /* A newer version, at the opening and of a store that is open. */
    s = open_store(5000);
    store_ok(put_value(&s, 1, 1, 100));
    assert_int_equal(slurp("kvtile-store", file, sizeof file), 72);
    memcpy(changed, file, 72);
    changed[8] = 2;
    spill("kvtile-store", changed, 72);
    kvt_store other;
    store_is(KVT_ERR_FORMAT, folder_open(path, 0, &other));
    assert_non_null(strstr(store_error.text, "version 2"));
    assert_true(put_value(&s, 2, 1, 100) != KVT_OK);
    assert_int_equal(get_version(&s, 1), 1);
    assert_true(slurp("kvtile-store", file, sizeof file) == 72 && memcmp(file, changed, 72) == 0);
    assert_int_equal(folder_look(path).n_temporaries, 0);
    kvt_store_close(&s);
    folder_remove(path);
}

/* Counts of before the system's last start are not believed: a power cut may have lost values. */
static void test_another_start(void **state)
{
    kvt_store s = open_store(0);
    (void)state;
    for (uint64_t i = 0; i < 5; i++)
        store_ok(put_value(&s, i, 1, 900));
    kvt_store_close(&s);
    for (int other_start = 0; other_start < 2; other_start++) {
        unsigned char file[72];
        uint64_t sum = 0xcbf29ce484222325u;
        assert_int_equal(slurp("kvtile-store", file, sizeof file), 72);
        file[33] ^= 1; /* of the bytes */
        file[48] ^= (unsigned char)other_start;
        for (size_t i = 0; i < 64; i++)
            sum = (sum ^ file[i]) * 0x100000001b3u;
        memcpy(file + 64, &sum, 8);
        spill("kvtile-store", file, sizeof file);
        s = open_store(0);
        if (other_start) {
            folder_agrees(path, &s);
        } else { /* believed, until it is collected */
            assert_true(stats_of(&s).bytes != folder_look(path).bytes);
            store_ok(s.collect(s.user, &store_error));
            folder_agrees(path, &s);
        }
        kvt_store_close(&s);
    }
    s = open_store(0);
    end_store(&s);
}

/* Each byte of the state file is changed, and it is cut: counts are made anew, or it is refused. */
static void test_damaged(void **state)
{
    unsigned char file[72], changed[72];
    kvt_store s = open_store(5000), other;
    kvt_store_key key = key_of(9);
    (void)state;

    for (uint64_t i = 0; i < 5; i++)
        store_ok(put_value(&s, i, 1, 900));
    assert_int_equal(slurp("kvtile-store", file, sizeof file), 72);
    for (size_t at = 0; at < 72; at++) {
        int is_bound = at >= 16 && at < 32; /* and its sum */
        kvt_status status;
        memcpy(changed, file, 72);
        changed[at] ^= 1;
        spill("kvtile-store", changed, 72);
        status = folder_open(path, 0, &other);
        assert_int_equal(status, at < 12 || is_bound ? KVT_ERR_FORMAT : KVT_OK);
        if (status == KVT_OK) {
            folder_agrees(path, &other);
            kvt_store_close(&other);
        } else {
            assert_non_null(strstr(store_error.text, at < 8               ? "another program's"
                                                     : at < 12 && at != 8 ? "version"
                                                                          : "is damaged"));
        }
        if (at < 12)
            continue;
        spill("kvtile-store", changed, 72);
        if (at % 2) { /* one that is open knows the bound */
            store_ok(put_value(&s, 9, 1, 900));
        } else {
            store_ok(folder_open(path, 5000, &other));
            kvt_store_close(&other);
        }
        assert_int_equal(stats_of(&s).max_bytes, 5000);
        folder_agrees(path, &s);
        store_ok(s.remove(s.user, &key, 1, &store_error));
    }
    for (size_t n = 1; n < 72; n += 9) {
        kvt_status status;
        spill("kvtile-store", file, n);
        status = folder_open(path, 0, &other);
        assert_int_equal(status, n < 32 ? KVT_ERR_FORMAT : KVT_OK);
        if (status == KVT_OK)
            kvt_store_close(&other);
        if (n < 8)
            continue;
        spill("kvtile-store", file, n);
        store_ok(folder_open(path, 5000, &other));
        folder_agrees(path, &other);
        kvt_store_close(&other);
    }
    /* Empty or zeros: as if it were new. */
    memset(changed, 0, sizeof changed);
    for (size_t n = 0; n <= 72; n += 36) {
        spill("kvtile-store", changed, n);
        folder_agrees(path, &s);
        assert_int_equal(stats_of(&s).max_bytes, 5000);
    }
    spill("kvtile-store", changed, 0);
    store_ok(folder_open(path, 0, &other));
    folder_agrees(path, &other);
    assert_int_equal(stats_of(&other).max_bytes, 0);
    kvt_store_close(&other);
    end_store(&s);
}

/* All is removed from outside: the store goes on with an empty directory. */
static void test_removed(void **state)
{
    char file[256];
    kvt_store s = open_store(5000);
    (void)state;

    for (uint64_t i = 0; i < 5; i++)
        store_ok(put_value(&s, i, 1, 900));
    folder_file(path, 3, file, sizeof file); /* one: counted until it is noticed */
    assert_int_equal(unlink(file), 0);
    assert_int_equal(stats_of(&s).n_values, 5);
    store_ok(put_value(&s, 5, 1, 1400)); /* there is room, which the scan sees */
    assert_int_equal(stats_of(&s).n_evicted, 0);
    folder_agrees(path, &s);
    assert_int_equal(unlink(file), -1);
    assert_int_equal(unlink(in_folder("kvtile-store")), 0);
    folder_agrees(path, &s);
    assert_int_equal(stats_of(&s).max_bytes, 5000);
    folder_remove(path);
    assert_int_equal(get_version(&s, 1), -1);
    store_is(KVT_ERR_IO, put_value(&s, 1, 1, 100)); /* the directory itself */
    kvt_store_close(&s);
    /* Its contents alone, with the folders. */
    s = open_store(5000);
    store_ok(put_value(&s, 1, 1, 100));
    assert_int_equal(unlink(in_folder("kvtile-store")), 0);
    assert_int_equal(rmdir(in_folder("tmp")), 0);
    folder_file(path, 1, file, sizeof file);
    assert_int_equal(unlink(file), 0);
    *strrchr(file, '/') = 0;
    assert_int_equal(rmdir(file), 0);
    store_ok(put_value(&s, 1, 2, 200));
    assert_int_equal(get_version(&s, 1), 2);
    assert_int_equal(stats_of(&s).max_bytes, 5000);
    end_store(&s);
}

/* Files of others in the directory stay, whatever is done; they are no values and count nothing. */
static void test_others_files(void **state)
{
    char name[160], key_name[65], folder[3] = "00";
    kvt_store s = open_store(3000);
    kvt_store_key keys[3] = {key_of(1), key_of(2), key_of(3)};
    uint8_t found[3];
    (void)state;

    for (size_t i = 0; i < 32; i++)
        (void)snprintf(key_name + 2 * i, 3, "%02x", keys[0].bytes[i]);
    folder[0] = key_name[0];
    folder[1] = key_name[1];
    spill("README", "x", 1);
    (void)mkdir(in_folder("zz"), 0700);
    (void)mkdir(in_folder("tmp"), 0700);
    (void)mkdir(in_folder(folder), 0700);
    spill("tmp/put-", "x", 1);
    spill("tmp/put-00000000000000000", "x", 1);
    spill("tmp/PUT-0000000000000000", "x", 1);
    (void)snprintf(name, sizeof name, "zz/%s", key_name); /* in the wrong folder */
    spill(name, "x", 1);
    (void)snprintf(name, sizeof name, "%s/%s~", folder, key_name);
    spill(name, "x", 1);
    (void)snprintf(name, sizeof name, "%s/%.63sG", folder, key_name);
    spill(name, "x", 1);
    (void)snprintf(name, sizeof name, "%s/%.63sA", folder, key_name); /* no lower case */
    spill(name, "x", 1);
    (void)snprintf(name, sizeof name, "%s/%s", folder, key_name); /* a value's name, no file */
    assert_int_equal(mkdir(in_folder(name), 0700), 0);
    store_ok(s.exists(s.user, keys, 3, found, &store_error));
    assert_true(!found[0] && !found[1] && !found[2]);
    assert_int_equal(get_version(&s, 1), -1);
    store_ok(s.remove(s.user, keys, 3, &store_error));
    store_is(KVT_ERR_IO, put_value(&s, 1, 1, 1000));
    assert_non_null(strstr(store_error.text, "rename failed"));
    for (uint64_t i = 2; i < 9; i++)
        store_ok(put_value(&s, i, 1, 1000));
    store_ok(s.collect(s.user, &store_error));
    assert_int_equal(stats_of(&s).n_values, 3);
    assert_int_equal(stats_of(&s).bytes, 3000);
    assert_int_equal(rmdir(in_folder(name)), 0);
    assert_int_equal(symlink("README", in_folder(name)), 0); /* not followed, and replaced */
    assert_int_equal(get_version(&s, 1), -1);
    store_ok(put_value(&s, 1, 1, 1000));
    assert_int_equal(get_version(&s, 1), 1);
    assert_int_equal(access(in_folder("README"), F_OK), 0);
    (void)snprintf(name, sizeof name, "zz/%s", key_name);
    assert_int_equal(access(in_folder(name), F_OK), 0);
    assert_int_equal(access(in_folder("tmp/put-00000000000000000"), F_OK), 0);
    assert_int_equal(access(in_folder("tmp/PUT-0000000000000000"), F_OK), 0);
    kvt_store_close(&s);
    folder_remove(path);
}

/* ---- what is left behind ---- */

static void test_temporaries(void **state)
{
    static const char dead[] = "tmp/put-0123456789abcdef", living[] = "tmp/put-fedcba9876543210";
    kvt_store s = open_store(3000), other;
    int fd;
    (void)state;

    for (int how = 0; how < 4; how++) {
        store_ok(put_value(&s, 1, 1, 1000));
        spill(dead, "xyz", 3);
        spill(living, "xyz", 3);
        fd = open(in_folder(living), O_RDWR);
        assert_int_equal(flock(fd, LOCK_EX), 0);
        if (how == 0) {
            store_ok(s.collect(s.user, &store_error));
        } else if (how == 1) {
            other = open_store(0);
            kvt_store_close(&other);
        } else if (how == 2) { /* evicting */
            for (uint64_t i = 2; i < 7; i++)
                store_ok(put_value(&s, i, 1, 1000));
        } else { /* counting anew */
            assert_int_equal(unlink(in_folder("kvtile-store")), 0);
            (void)stats_of(&s);
        }
        assert_int_equal(access(in_folder(dead), F_OK), -1);
        assert_int_equal(access(in_folder(living), F_OK), 0);
        (void)close(fd);
        store_ok(s.collect(s.user, &store_error));
        assert_int_equal(folder_look(path).n_temporaries, 0);
    }
    end_store(&s);
}

/* A limit on files ends a put without a signal: the old value stays. So does one that is less than
   the state file. */
static void test_file_limit(void **state)
{
    kvt_store s = open_store(0);
    kvt_store_key key = key_of(1);
    pid_t child;
    (void)state;

    store_ok(put_value(&s, 1, 1, 1000));
    for (rlim_t bytes = 0; bytes < 72; bytes += 50) {
        child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            struct rlimit limit = {bytes, bytes};
            (void)signal(SIGXFSZ, SIG_DFL);
            if (setrlimit(RLIMIT_FSIZE, &limit) != 0)
                _exit(2);
            if (s.remove(s.user, &key, 1, &store_error) != KVT_ERR_IO ||
                !strstr(store_error.text, "write failed: File too large"))
                _exit(3);
            /* What was written of the state says that counts are unsure: so they may be. */
            if (put_value(&s, 2, 2, 40) != (bytes ? KVT_OK : KVT_ERR_IO))
                _exit(4);
            _exit(get_version(&s, 1) == 1 ? 0 : 5);
        }
        wait_for(&child, 1);
        folder_agrees(path, &s);
        assert_int_equal(stats_of(&s).n_values, bytes ? 2 : 1);
    }
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct rlimit limit = {50000, 50000};
        kvt_status status;
        (void)signal(SIGXFSZ, SIG_DFL);
        if (setrlimit(RLIMIT_FSIZE, &limit) != 0)
            _exit(2);
        status = put_value(&s, 1, 2, 100000);
        if (status != KVT_ERR_IO || !strstr(store_error.text, "write failed: File too large"))
            _exit(3);
        _exit(put_value(&s, 2, 2, 40000) == KVT_OK && get_version(&s, 1) == 1 ? 0 : 4);
    }
    wait_for(&child, 1);
    assert_int_equal(get_version(&s, 1), 1);
    assert_int_equal(get_version(&s, 2), 2);
    assert_int_equal(folder_look(path).n_temporaries, 0);
    end_store(&s);
}

/* ---- without permission ---- */

/* As another user, who may read; or as this one, if it is not root. 0: all as it should be. */
static int use_read_only(void)
{
    kvt_store_key key = key_of(1);
    kvt_store_stats stats;
    uint8_t found = 0;
    kvt_store s;

    if (geteuid() == 0 && setuid(65534) != 0)
        return 1;
    if (folder_open(path, 99, &s) != KVT_OK)
        return 2;
    if (get_version(&s, 1) != 1)
        return 3;
    if (s.exists(s.user, &key, 1, &found, &store_error) != KVT_OK || !found)
        return 4;
    if (s.stats(s.user, &stats, &store_error) != KVT_OK || stats.n_values != 1 ||
        stats.max_bytes != 5000)
        return 5;
    if (put_value(&s, 2, 1, 100) != KVT_ERR_IO)
        return 6;
    if (s.remove(s.user, &key, 1, &store_error) != KVT_ERR_IO ||
        !strstr(store_error.text, "no permission"))
        return 7;
    if (s.collect(s.user, &store_error) != KVT_ERR_IO)
        return 8;
    kvt_store_close(&s);
    return 0;
}

static void test_read_only(void **state)
{
    kvt_store s = open_store(5000);
    char file[256];
    pid_t child;
    int status;
    (void)state;

    store_ok(put_value(&s, 1, 1, 1000));
    folder_file(path, 1, file, sizeof file);
    assert_int_equal(chmod(file, 0444), 0);
    *strrchr(file, '/') = 0;
    assert_int_equal(chmod(file, 0555), 0);
    assert_int_equal(chmod(in_folder("kvtile-store"), 0444), 0);
    assert_int_equal(chmod(in_folder("tmp"), 0555), 0);
    assert_int_equal(chmod(path, 0555), 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0)
        _exit(use_read_only());
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(chmod(path, 0700), 0);
    assert_int_equal(chmod(file, 0700), 0);
    assert_int_equal(chmod(in_folder("tmp"), 0700), 0);
    assert_int_equal(chmod(in_folder("kvtile-store"), 0600), 0);
    end_store(&s);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(path, sizeof path, "test_store_shared-%ld", (long)getpid());
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads),       cmocka_unit_test(test_processes),
        cmocka_unit_test(test_first),         cmocka_unit_test(test_foreign),
        cmocka_unit_test(test_another_start), cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_removed),       cmocka_unit_test(test_others_files),
        cmocka_unit_test(test_temporaries),   cmocka_unit_test(test_file_limit),
        cmocka_unit_test(test_read_only),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
