/*
 * Snapshot files are written completely or not at all, whatever fails. Runs in a folder of its own
 * under the current one.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_support.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char folder[64];

static const char *in_folder(const char *name)
{
    static char path[2][512];
    static int turn;
    turn ^= 1;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static int count_entries(const char *path)
{
    DIR *dir = opendir(path);
    int n = 0;
    assert_non_null(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n - 2;
}

static bytes slurp(const char *path)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    FILE *f = fopen(path, "rb");
    int c;
    assert_non_null(f);
    b.data = malloc((size_t)1 << 22);
    assert_non_null(b.data);
    b.n = fread(b.data, 1, (size_t)1 << 22, f);
    c = fgetc(f);
    assert_int_equal(c, EOF);
    (void)fclose(f);
    return b;
}

static void spill(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

typedef struct fixture {
    model m;
    kvt_cache *cache;
    kvt_seq *seq;
    uint64_t hash;
} fixture;

static fixture make(size_t n)
{
    fixture f;
    f.m = model_of(2, 2, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    f.cache = model_cache(&f.m);
    f.seq = model_seq(f.cache);
    model_append(&f.m, f.cache, f.seq, n, 64);
    f.hash = state_hash(&f.m, f.cache, f.seq);
    return f;
}

static void check(const fixture *f)
{
    assert_true(state_hash(&f->m, f->cache, f->seq) == f->hash);
}

static void unmake(fixture *f)
{
    kvt_seq_destroy(f->seq);
    kvt_cache_destroy(f->cache);
}

static void expect_said(const fixture *f, const char *part)
{
    char text[256];
    expect_ok(f->cache, kvt_cache_error(f->cache, text, sizeof text));
    if (!strstr(text, part))
        fail_msg("\"%s\" does not say \"%s\"", text, part);
}

static void test_file(void **state)
{
    fixture f = make(100);
    kvt_seq *other = model_seq(f.cache);
    kvt_load_result result;
    kvt_snapshot_info info;
    bytes file, stream;
    char text[256];
    struct stat status;
    (void)state;

    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    expect_ok(f.cache, kvt_seq_load(other, in_folder("a"), NULL, &result));
    assert_int_equal(result.n_tokens, 100);
    assert_true(state_hash(&f.m, f.cache, other) == f.hash);
    file = slurp(in_folder("a"));
    stream = saved(f.cache, f.seq, KVT_CODEC_ZSTD);
    assert_int_equal(file.n, stream.n);
    assert_memory_equal(file.data, stream.data, file.n);
    assert_int_equal(count_entries(folder), 1); /* no temporary is left */

    memset(&info, 0, sizeof info);
    assert_int_equal(kvt_snapshot_inspect(in_folder("a"), 1, &info, text, sizeof text),
                     KVT_ERR_ARG); /* struct_size */
    for (int verify = 0; verify < 2; verify++) {
        info.struct_size = sizeof info;
        assert_int_equal(kvt_snapshot_inspect(in_folder("a"), verify, &info, text, sizeof text),
                         KVT_OK);
        assert_int_equal(info.version, 1);
        assert_int_equal(info.n_tokens, 100);
        assert_int_equal(info.n_blocks, 2);
        assert_int_equal(info.n_groups, 1);
        assert_int_equal(info.groups[0].k_dim, 64);
        assert_int_equal(info.groups[0].n_q_heads, 4);
        assert_int_equal(info.groups[0].rotation_seed, 42);
        assert_int_equal(info.fingerprint_bytes, 10);
        assert_memory_equal(info.fingerprint, "test model", 10);
    }
    assert_int_equal(info.file_bytes, file.n);
    /* 100 tokens: 64 and 36 live ones of codes and scales, one offset a block */
    assert_int_equal(info.native_bytes, 2 * 2 * ((64 + 48) * 64 + 100 * 64 + 100 * 4 + 2 * 64 * 2));
    assert_true(info.stored_bytes < info.native_bytes && info.stored_bytes > 10000);

    file.data[file.n / 2] ^= 1;
    spill(in_folder("bad"), file.data, file.n);
    assert_int_equal(kvt_snapshot_inspect(in_folder("bad"), 1, &info, text, sizeof text),
                     KVT_ERR_CORRUPT);
    assert_non_null(strstr(text, "offset"));
    assert_int_equal(kvt_snapshot_inspect(in_folder("bad"), 0, &info, text, sizeof text), KVT_OK);
    file.data[file.n / 2] ^= 1;
    file.data[file.n] = 'x'; /* bytes after the end */
    spill(in_folder("bad"), file.data, file.n + 1);
    expect(f.cache, KVT_ERR_CORRUPT, kvt_seq_load(f.seq, in_folder("bad"), NULL, NULL));
    assert_int_equal(kvt_snapshot_inspect(in_folder("bad"), 1, &info, text, sizeof text),
                     KVT_ERR_CORRUPT);
    spill(in_folder("bad"), file.data, 0);
    expect(f.cache, KVT_ERR_CORRUPT, kvt_seq_load(f.seq, in_folder("bad"), NULL, NULL));
    spill(in_folder("bad"), "no snapshot at all", 18);
    expect(f.cache, KVT_ERR_FORMAT, kvt_seq_load(f.seq, in_folder("bad"), NULL, NULL));
    check(&f);
    bytes_free(&file);
    bytes_free(&stream);
    assert_int_equal(unlink(in_folder("bad")), 0);

    /* Replacing keeps the permissions; a symbolic link is followed, not replaced. */
    assert_int_equal(chmod(in_folder("a"), 0640), 0);
    assert_int_equal(symlink("a", in_folder("link")), 0);
    expect_ok(f.cache, kvt_seq_truncate(f.seq, 50));
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("link"), NULL));
    assert_int_equal(lstat(in_folder("link"), &status), 0);
    assert_true(S_ISLNK(status.st_mode));
    assert_int_equal(lstat(in_folder("a"), &status), 0);
    assert_true(S_ISREG(status.st_mode));
    assert_int_equal(status.st_mode & 0777, 0640);
    expect_ok(f.cache, kvt_seq_load(other, in_folder("a"), NULL, &result));
    assert_int_equal(result.n_tokens, 50);
    assert_int_equal(unlink(in_folder("link")), 0);
    assert_int_equal(unlink(in_folder("a")), 0);

    {
        mode_t mask = umask(027);
        expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("new"), NULL));
        (void)umask(mask);
        assert_int_equal(stat(in_folder("new"), &status), 0);
        assert_int_equal(status.st_mode & 0777, 0640);
        assert_int_equal(unlink(in_folder("new")), 0);
    }
    kvt_seq_destroy(other);
    unmake(&f);
}

static void test_bad_paths(void **state)
{
    fixture f = make(20);
    kvt_snapshot_info info;
    char text[256];
    (void)state;

    info.struct_size = sizeof info;
    expect(f.cache, KVT_ERR_IO, kvt_seq_load(f.seq, in_folder("missing"), NULL, NULL));
    expect_said(&f, "missing");
    expect_said(&f, strerror(ENOENT));
    assert_int_equal(kvt_snapshot_inspect(in_folder("missing"), 0, &info, text, sizeof text),
                     KVT_ERR_IO);
    assert_non_null(strstr(text, strerror(ENOENT)));
    expect(f.cache, KVT_ERR_IO, kvt_seq_load(f.seq, folder, NULL, NULL));
    expect_said(&f, strerror(EISDIR));
    expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, folder, NULL));
    expect_said(&f, strerror(EISDIR));
    expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, in_folder("no/such/folder"), NULL));
    expect_said(&f, strerror(ENOENT));
    /* A pipe in place of a device, which a failing test would replace. */
    assert_int_equal(mkfifo(in_folder("pipe"), 0600), 0);
    expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, in_folder("pipe"), NULL));
    expect_said(&f, "not a regular file");
    assert_int_equal(unlink(in_folder("pipe")), 0);
    assert_int_equal(symlink("nowhere", in_folder("dangling")), 0);
    expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, in_folder("dangling"), NULL));
    assert_int_equal(unlink(in_folder("dangling")), 0);
    if (geteuid() != 0) { /* root writes anywhere */
        assert_int_equal(chmod(folder, 0500), 0);
        expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, in_folder("x"), NULL));
        expect_said(&f, strerror(EACCES));
        assert_int_equal(chmod(folder, 0700), 0);
    }
    check(&f);
    assert_int_equal(count_entries(folder), 0);
    unmake(&f);
}

/* A limit on the file size in place of a full disk. The old file is kept. */
static void test_full_disk(void **state)
{
    fixture f = make(200);
    struct rlimit old, limit;
    bytes before, after;
    (void)state;

    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    before = slurp(in_folder("a"));
    model_append(&f.m, f.cache, f.seq, 10, 10);
    (void)signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    for (size_t at = 0; at < before.n; at += before.n / 7) {
        kvt_status status;
        limit = old;
        limit.rlim_cur = at;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        status = kvt_seq_save(f.seq, in_folder("a"), NULL);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        expect(f.cache, KVT_ERR_IO, status);
        expect_said(&f, strerror(EFBIG));
        expect_said(&f, "write");
        assert_int_equal(count_entries(folder), 1);
        after = slurp(in_folder("a"));
        assert_int_equal(after.n, before.n);
        assert_memory_equal(after.data, before.data, after.n);
        bytes_free(&after);
    }
    bytes_free(&before);
    assert_int_equal(unlink(in_folder("a")), 0);
    unmake(&f);
}

static int full_write(void *user, const void *data, size_t n)
{
    return write(*(int *)user, data, n) == (ssize_t)n ? 0 : errno;
}

static void test_dev_full(void **state)
{
    fixture f = make(20);
    int fd = open("/dev/full", O_WRONLY);
    kvt_writer writer = {&fd, full_write};
    struct stat status;
    (void)state;
    if (fd >= 0 && fstat(fd, &status) == 0 && S_ISCHR(status.st_mode)) {
        expect(f.cache, KVT_ERR_IO, kvt_seq_save_stream(f.seq, &writer, NULL));
        (void)close(fd);
    }
    check(&f);
    unmake(&f);
}

static int open_files(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) != -1;
    return n;
}

static void test_descriptors(void **state)
{
    fixture f = make(20);
    int before = open_files();
    kvt_snapshot_info info;
    (void)state;

    info.struct_size = sizeof info;
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    expect_ok(f.cache, kvt_seq_load(f.seq, in_folder("a"), NULL, NULL));
    spill(in_folder("b"), "KVT", 3);
    assert_int_equal(kvt_seq_load(f.seq, in_folder("b"), NULL, NULL), KVT_ERR_CORRUPT);
    assert_int_equal(kvt_seq_load(f.seq, folder, NULL, NULL), KVT_ERR_IO);
    assert_int_equal(kvt_seq_save(f.seq, folder, NULL), KVT_ERR_IO);
    assert_int_equal(kvt_snapshot_inspect(in_folder("a"), 0, &info, NULL, 0), KVT_OK);
    assert_int_equal(kvt_snapshot_inspect(in_folder("b"), 1, &info, NULL, 0), KVT_ERR_CORRUPT);
    assert_int_equal(open_files(), before);
    assert_int_equal(unlink(in_folder("a")), 0);
    assert_int_equal(unlink(in_folder("b")), 0);
    unmake(&f);
}

/* Allocations of the file code fail in turn; no file is left, no descriptor, no memory. */
static void test_allocations(void **state)
{
    (void)state;
    for (int loads = 0; loads < 2; loads++) {
        counter c = {0, -1};
        model m = model_of(1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_F16);
        kvt_cache *cache;
        kvt_seq *seq;
        int before = open_files();
        uint64_t hash;

        m.counter = &c;
        cache = model_cache(&m);
        seq = model_seq(cache);
        model_append(&m, cache, seq, 70, 70);
        hash = state_hash(&m, cache, seq);
        if (loads)
            expect_ok(cache, kvt_seq_save(seq, in_folder("a"), NULL));
        for (long n = 0;; n++) {
            kvt_status status;
            expect_ok(cache, kvt_cache_trim(cache));
            c.countdown = n;
            status = loads ? kvt_seq_load(seq, in_folder("a"), NULL, NULL)
                           : kvt_seq_save(seq, in_folder("a"), NULL);
            c.countdown = -1;
            assert_true(state_hash(&m, cache, seq) == hash);
            assert_int_equal(open_files(), before);
            if (status == KVT_OK)
                break;
            expect(cache, KVT_ERR_MEMORY, status);
            assert_int_equal(count_entries(folder), loads);
        }
        assert_int_equal(unlink(in_folder("a")), 0);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        assert_int_equal(c.live, 0);
    }
}

/* A process is killed while it saves, repeatedly: the file is always complete. */
static void test_kill(void **state)
{
    fixture f = make(500);
    int finished = 0, killed = 0;
    kvt_load_result result;
    (void)state;

    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    for (int round = 0; round < 60; round++) {
        struct timespec pause = {0, 20000L * (round + 1)};
        int status;
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            for (uint64_t n = kvt_seq_length(f.seq); n > 0; n--)
                if (kvt_seq_truncate(f.seq, n) != KVT_OK ||
                    kvt_seq_save(f.seq, in_folder("a"), NULL) != KVT_OK)
                    _exit(1);
            _exit(0);
        }
        (void)nanosleep(&pause, NULL);
        (void)kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        killed += WIFSIGNALED(status);
        finished += WIFEXITED(status) && WEXITSTATUS(status) == 1;
        expect_ok(f.cache, kvt_seq_load(f.seq, in_folder("a"), NULL, &result));
        assert_true(result.n_tokens > 0 && result.n_tokens <= 500);
        assert_int_equal(kvt_seq_length(f.seq), result.n_tokens);
        if (result.n_tokens < 100) { /* begin again with a long one */
            expect_ok(f.cache, kvt_seq_clear(f.seq));
            model_append(&f.m, f.cache, f.seq, 500, 64);
        }
    }
    assert_int_equal(finished, 0);
    assert_true(killed > 0);
    unmake(&f);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(folder, sizeof folder, "test_snapshot_files-%ld", (long)getpid());
    return mkdir(folder, 0700);
}

static int teardown(void **state)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    (void)state;
    while (dir && (entry = readdir(dir)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            (void)unlink(in_folder(entry->d_name));
    if (dir)
        (void)closedir(dir);
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_file),        cmocka_unit_test(test_bad_paths),
        cmocka_unit_test(test_full_disk),   cmocka_unit_test(test_dev_full),
        cmocka_unit_test(test_descriptors), cmocka_unit_test(test_allocations),
        cmocka_unit_test(test_kill),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
