/*
 * Snapshot files are written completely or not at all, whatever fails. Runs in a folder of its own
 * under the current one.
 */
#if defined(__linux__)
#define _GNU_SOURCE /* unshare */
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_support.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/mount.h>
#endif
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
    stream = saved(f.cache, f.seq, KVT_CODEC_AUTO);
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
        assert_int_equal(info.next_position, -1);
        assert_int_equal(info.tag_bytes, 0);
        assert_int_equal(info.n_checkpoints, 0);
        assert_int_equal(info.n_open_blocks, verify ? 2 : 0);
        assert_true(info.n_elements == (verify ? 2 * 2 * 2 * 100 * 64 : 0));
    }
    assert_int_equal(info.file_bytes, file.n);
    /* 100 tokens: 64 and 36 live ones of open codes and scales, one offset a block */
    assert_int_equal(info.native_bytes,
                     2 * 2 * (2 * (64 + 48) * 64 + 2 * 100 * 64 + 100 * 4 + 2 * 64 * 2));
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
    { /* cut in a section: of a file it is known before the section is read */
        size_t payload, at = section_payload(file.data, file.n, 5, 1, &payload);
        char want[64];
        spill(in_folder("bad"), file.data, at + payload / 2);
        expect(f.cache, KVT_ERR_CORRUPT, kvt_seq_load(f.seq, in_folder("bad"), NULL, NULL));
        (void)snprintf(want, sizeof want, "a section of %zu bytes, %zu are left", payload,
                       payload / 2);
        expect_said(&f, want);
    }
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
    { /* Paths of more bytes than the system takes; and with a temporary's name */
        static char longer[5000];
        size_t n = (size_t)snprintf(longer, sizeof longer, "%s/", folder);
        while (n < 4090)
            n += (size_t)snprintf(longer + n, sizeof longer - n, "./");
        longer[n - 1] = 'a';
        expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, longer, NULL));
        expect_said(&f, strerror(ENAMETOOLONG));
        memset(longer + n - 1, 'a', sizeof longer - n);
        expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, longer, NULL));
        expect_said(&f, strerror(ENAMETOOLONG));
        expect(f.cache, KVT_ERR_IO, kvt_seq_load(f.seq, longer, NULL, NULL));
        expect_said(&f, strerror(ENAMETOOLONG));
    }
    check(&f);
    assert_int_equal(count_entries(folder), 0);
    unmake(&f);
}

/*
 * No room: the limit on a file's size stands for a full disk. The old file stays, and so does this
 * process: the signal of that limit would end it.
 */
static void test_full_disk(void **state)
{
    fixture f = make(200);
    struct rlimit old, limit;
    bytes before, after;
    (void)state;

    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    before = slurp(in_folder("a"));
    model_append(&f.m, f.cache, f.seq, 10, 10);
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

/* In a child: leave with another status than 0, and say where. */
#define require(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            (void)fprintf(stderr, "child, line %d: %s\n", __LINE__, #condition);                   \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

static void expect_exit(pid_t child, int expected)
{
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != expected)
        fail_msg("the child has ended with wait status %#x", (unsigned)status);
}

static volatile sig_atomic_t handled;

static void handle(int number)
{
    (void)number;
    handled++;
}

static int is_pending(void)
{
    sigset_t set;
    return sigpending(&set) == 0 && sigismember(&set, SIGXFSZ) == 1;
}

/*
 * The signal of the limit on a file's size, whatever the process does with it: default, ignored,
 * handled, blocked, blocked and pending. Neither that nor what is pending changes, no handler is
 * called, and a save goes well once there is room.
 */
static void test_size_limit(void **state)
{
    (void)state;
    for (int in_place = 0; in_place < 2; in_place++)
        for (int how = 0; how < 5; how++) {
            pid_t child = fork();
            assert_true(child >= 0);
            if (child == 0) {
                fixture f = make(300);
                struct rlimit limit, old;
                struct sigaction action, after;
                sigset_t set, mask;
                kvt_save_options options;

                memset(&options, 0, sizeof options);
                options.struct_size = sizeof options;
                options.in_place = (uint32_t)in_place;
                memset(&action, 0, sizeof action);
                action.sa_handler = how == 1 ? SIG_IGN : how == 2 ? handle : SIG_DFL;
                require(sigaction(SIGXFSZ, &action, NULL) == 0);
                (void)sigemptyset(&set);
                (void)sigaddset(&set, SIGXFSZ);
                if (how >= 3)
                    require(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
                if (how == 4)
                    require(raise(SIGXFSZ) == 0);
                require(getrlimit(RLIMIT_FSIZE, &old) == 0);
                limit = old;
                limit.rlim_cur = 20000;
                require(setrlimit(RLIMIT_FSIZE, &limit) == 0);
                for (int again = 0; again < 2; again++) {
                    char text[256];
                    require(kvt_seq_save(f.seq, in_folder("a"), &options) == KVT_ERR_IO);
                    require(kvt_cache_error(f.cache, text, sizeof text) == KVT_OK);
                    require(strstr(text, "write failed"));
                    require(strstr(text, strerror(EFBIG)));
                }
                require(setrlimit(RLIMIT_FSIZE, &old) == 0);
                require(count_entries(folder) == 0);
                require(handled == 0);
                require(is_pending() == (how == 4));
                require(sigaction(SIGXFSZ, NULL, &after) == 0);
                require(after.sa_handler == action.sa_handler);
                require(sigprocmask(SIG_BLOCK, NULL, &mask) == 0);
                require(sigismember(&mask, SIGXFSZ) == (how >= 3));
                require(kvt_seq_save(f.seq, in_folder("a"), &options) == KVT_OK);
                require(kvt_seq_load(f.seq, in_folder("a"), NULL, NULL) == KVT_OK);
                unmake(&f);
                require(unlink(in_folder("a")) == 0);
                _exit(0);
            }
            expect_exit(child, 0);
        }
}

/* ---- temporaries of others ---- */

static int count_temporaries(void)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    int n = 0;
    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL)
        n += strncmp(entry->d_name, ".kvtile-", 8) == 0;
    (void)closedir(dir);
    return n;
}

/*
 * An allocator that does something in the middle of a save: at the first allocation that finds
 * its temporary there.
 */
typedef struct interruption {
    void (*act)(void *user);
    void *user;
    int armed;
} interruption;

static void *interrupted_alloc(void *user, size_t n, size_t alignment)
{
    interruption *i = user;
    if (i->armed && count_temporaries() == i->armed) {
        i->armed = 0;
        i->act(i->user);
    }
    return aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
}

static void interrupted_free(void *user, void *memory, size_t n)
{
    (void)user, (void)n;
    free(memory);
}

static fixture make_interrupted(size_t n, interruption *i)
{
    fixture f;
    kvt_group_config groups[2];
    kvt_config config;

    f.m = model_of(2, 2, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    config = model_config(&f.m, groups);
    config.allocator.user = i;
    config.allocator.alloc = interrupted_alloc;
    config.allocator.free = interrupted_free;
    f.cache = NULL;
    expect_ok(NULL, kvt_cache_create(&config, &f.cache));
    f.seq = model_seq(f.cache);
    model_append(&f.m, f.cache, f.seq, n, 64);
    f.hash = state_hash(&f.m, f.cache, f.seq);
    return f;
}

static void die(void *user)
{
    (void)user;
    (void)raise(SIGKILL);
}

/* A process dies in a save of a file, when there are so many temporaries. */
static void die_in_save(const char *name, int temporaries)
{
    int status;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        interruption i = {die, NULL, 0};
        fixture f = make_interrupted(100, &i);
        i.armed = temporaries;
        (void)kvt_seq_save(f.seq, in_folder(name), NULL);
        _exit(1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(count_temporaries(), temporaries);
}

/* The next save of that file removes what it has left. */
static void test_stale(void **state)
{
    static const char *const others[] = {
        ".kvtile-1-0.tmp", ".kvtile-0123456789abcdef-0123456789abcdef.tmp", ".kvtile-.tmp",
        ".kvtile-0123456789abcdef-0123456789abcdef.txt", "a.tmp"};
    fixture f = make(60);
    (void)state;

    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    die_in_save("b", 1);
    die_in_save("b", 1); /* in place of the first */
    die_in_save("a", 2);
    expect_ok(f.cache, kvt_seq_load(f.seq, in_folder("a"), NULL, NULL));
    check(&f);
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    assert_int_equal(count_temporaries(), 1); /* that of b is not its own */
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("b"), NULL));
    assert_int_equal(count_temporaries(), 0);
    die_in_save("b", 1);
    { /* through a link: the name is that of the file */
        assert_int_equal(symlink("b", in_folder("link")), 0);
        expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("link"), NULL));
        assert_int_equal(count_temporaries(), 0);
        assert_int_equal(unlink(in_folder("link")), 0);
    }
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        spill(in_folder(others[i]), "", 0);
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        assert_int_equal(unlink(in_folder(others[i])), 0);
    assert_int_equal(count_entries(folder), 2);
    assert_int_equal(unlink(in_folder("a")), 0);
    assert_int_equal(unlink(in_folder("b")), 0);
    unmake(&f);
}

/* Names that a process with this id could have taken, by the thousand, are in nobody's way. */
static void test_taken_names(void **state)
{
    fixture f = make(20);
    char name[64];
    (void)state;
    for (int i = 0; i < 2000; i++) {
        (void)snprintf(name, sizeof name, ".kvtile-%ld-%d.tmp", (long)getpid(), i);
        spill(in_folder(name), "", 0);
    }
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    for (int i = 0; i < 2000; i++) {
        (void)snprintf(name, sizeof name, ".kvtile-%ld-%d.tmp", (long)getpid(), i);
        assert_int_equal(unlink(in_folder(name)), 0);
    }
    assert_int_equal(unlink(in_folder("a")), 0);
    assert_int_equal(count_entries(folder), 0);
    unmake(&f);
}

static void save_again(void *user)
{
    fixture *f = user;
    expect_ok(f->cache, kvt_seq_save(f->seq, in_folder("a"), NULL));
    assert_int_equal(count_temporaries(), 1); /* that of the save around this one */
}

/* Two saves of a file at once in one process: the later rename wins, both are whole. */
static void test_live_here(void **state)
{
    fixture inner = make(60);
    interruption i = {save_again, &inner, 0};
    fixture outer = make_interrupted(100, &i);
    (void)state;

    i.armed = 1;
    expect_ok(outer.cache, kvt_seq_save(outer.seq, in_folder("a"), NULL));
    assert_int_equal(i.armed, 0);
    assert_int_equal(count_entries(folder), 1);
    expect_ok(outer.cache, kvt_seq_load(outer.seq, in_folder("a"), NULL, NULL));
    check(&outer);
    assert_int_equal(unlink(in_folder("a")), 0);
    unmake(&inner);
    unmake(&outer);
}

static void wait_for_parent(void *user)
{
    int *pipes = user; /* to the parent, from the parent */
    char byte = 'x';
    require(write(pipes[0], &byte, 1) == 1);
    require(read(pipes[1], &byte, 1) == 1);
}

/* The same with another process, which has another process id's view where the system lets it. */
static void test_live_elsewhere(void **state)
{
    fixture f = make(60);
    int up[2], down[2];
    char byte = 0;
    pid_t child;
    (void)state;

    assert_true(pipe(up) == 0 && pipe(down) == 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        int pipes[2] = {up[1], down[0]};
        interruption i = {wait_for_parent, pipes, 0};
        fixture g;
        require(close(up[0]) == 0 && close(down[1]) == 0); /* it ends when the parent does */
#if defined(__linux__)
        if (unshare(CLONE_NEWPID) == 0) { /* for the next child: it has id 1 */
            int status;
            pid_t inner = fork();
            require(inner >= 0);
            if (inner > 0) {
                require(close(up[1]) == 0 && close(down[0]) == 0);
                require(waitpid(inner, &status, 0) == inner);
                _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 2);
            }
        }
#endif
        g = make_interrupted(100, &i);
        i.armed = 1;
        require(kvt_seq_save(g.seq, in_folder("a"), NULL) == KVT_OK);
        require(i.armed == 0);
        unmake(&g);
        _exit(0);
    }
    assert_true(close(up[1]) == 0 && close(down[0]) == 0);
    assert_int_equal(read(up[0], &byte, 1), 1);
    assert_int_equal(count_temporaries(), 1);
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    assert_int_equal(count_temporaries(), 1);
    expect_ok(f.cache, kvt_seq_load(f.seq, in_folder("a"), NULL, NULL));
    check(&f);
    assert_int_equal(write(down[1], &byte, 1), 1);
    expect_exit(child, 0);
    assert_int_equal(count_entries(folder), 1);
    expect_ok(f.cache, kvt_seq_load(f.seq, in_folder("a"), NULL, NULL));
    assert_int_equal(kvt_seq_length(f.seq), 100);
    (void)close(up[0]);
    (void)close(down[1]);
    assert_int_equal(unlink(in_folder("a")), 0);
    unmake(&f);
}

/* ---- in place ---- */

static kvt_save_options in_place(void)
{
    kvt_save_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.in_place = 1;
    return options;
}

static void test_in_place(void **state)
{
    fixture f = make(100);
    kvt_save_options options = in_place();
    struct stat before, after;
    bytes file, stream;
    (void)state;

    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), &options));
    assert_int_equal(chmod(in_folder("a"), 0604), 0);
    assert_int_equal(link(in_folder("a"), in_folder("b")), 0);
    assert_int_equal(symlink("b", in_folder("link")), 0);
    assert_int_equal(stat(in_folder("a"), &before), 0);
    expect_ok(f.cache, kvt_seq_truncate(f.seq, 50));
    f.hash = state_hash(&f.m, f.cache, f.seq);
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("link"), &options));
    assert_int_equal(stat(in_folder("a"), &after), 0);
    assert_true(before.st_ino == after.st_ino && after.st_nlink == 2);
    assert_int_equal(after.st_mode & 0777, 0604);
    file = slurp(in_folder("a"));
    stream = saved(f.cache, f.seq, KVT_CODEC_AUTO);
    assert_int_equal(file.n, stream.n);
    assert_memory_equal(file.data, stream.data, file.n);
    bytes_free(&file);
    bytes_free(&stream);
    assert_int_equal(unlink(in_folder("a")), 0);
    assert_int_equal(unlink(in_folder("b")), 0);
    assert_int_equal(unlink(in_folder("link")), 0);

    expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, folder, &options));
    expect_said(&f, strerror(EISDIR));
    assert_int_equal(mkfifo(in_folder("pipe"), 0600), 0);
    expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, in_folder("pipe"), &options));
    expect_said(&f, "not a regular file");
    assert_int_equal(unlink(in_folder("pipe")), 0);
    expect(f.cache, KVT_ERR_IO, kvt_seq_save(f.seq, in_folder("no/folder"), &options));
    expect_said(&f, strerror(ENOENT));
    check(&f);
    assert_int_equal(count_entries(folder), 0);
    unmake(&f);
}

/* Out of memory before the first byte: the old contents are still there. */
static void test_in_place_memory(void **state)
{
    counter c = {0, -1};
    model m = model_of(1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_F16);
    kvt_save_options options = in_place();
    kvt_cache *cache;
    kvt_seq *seq;
    (void)state;

    m.counter = &c;
    cache = model_cache(&m);
    seq = model_seq(cache);
    model_append(&m, cache, seq, 70, 70);
    expect_ok(cache, kvt_seq_save(seq, in_folder("a"), &options));
    for (long n = 0;; n++) {
        kvt_status status;
        c.countdown = n;
        status = kvt_seq_save(seq, in_folder("a"), &options);
        c.countdown = -1;
        if (status == KVT_OK)
            break;
        expect(cache, KVT_ERR_MEMORY, status);
        expect_ok(cache, kvt_seq_load(seq, in_folder("a"), NULL, NULL));
        assert_int_equal(kvt_seq_length(seq), 70);
    }
    assert_int_equal(unlink(in_folder("a")), 0);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    assert_int_equal(c.live, 0);
}

/* A file that is mounted by itself, as containers have it. */
static void test_mounted_file(void **state)
{
    pid_t child;
    int status = 77 << 8;
    (void)state;
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
#if defined(__linux__)
        fixture f = make(100);
        kvt_save_options options = in_place();
        char text[256];

        require(kvt_seq_save(f.seq, in_folder("a"), NULL) == KVT_OK);
        require(kvt_seq_save(f.seq, in_folder("outside"), NULL) == KVT_OK);
        if ((unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) ||
            mount("none", "/", "none", MS_REC | MS_PRIVATE, NULL) != 0 ||
            mount(in_folder("outside"), in_folder("a"), "none", MS_BIND, NULL) != 0)
            _exit(77);
        require(kvt_seq_truncate(f.seq, 50) == KVT_OK);
        require(kvt_seq_save(f.seq, in_folder("a"), NULL) == KVT_ERR_IO);
        require(kvt_cache_error(f.cache, text, sizeof text) == KVT_OK);
        require(strstr(text, strerror(EBUSY)));
        require(strstr(text, "in_place"));
        require(count_temporaries() == 0);
        require(kvt_seq_load(f.seq, in_folder("a"), NULL, NULL) == KVT_OK);
        require(kvt_seq_length(f.seq) == 100);
        require(kvt_seq_truncate(f.seq, 50) == KVT_OK);
        require(kvt_seq_save(f.seq, in_folder("a"), &options) == KVT_OK);
        require(kvt_seq_load(f.seq, in_folder("outside"), NULL, NULL) == KVT_OK);
        require(kvt_seq_length(f.seq) == 50);
        unmake(&f);
        _exit(0);
#else
        _exit(77);
#endif
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    (void)unlink(in_folder("a"));
    (void)unlink(in_folder("outside"));
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) {
        print_message("no mounts for this user\n");
        skip();
    }
    assert_int_equal(WEXITSTATUS(status), 0);
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
    expect_ok(f.cache, kvt_seq_save(f.seq, in_folder("a"), NULL));
    assert_int_equal(count_entries(folder), 1); /* and what the killed have left is gone */
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
        cmocka_unit_test(test_file),
        cmocka_unit_test(test_bad_paths),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_dev_full),
        cmocka_unit_test(test_descriptors),
        cmocka_unit_test(test_allocations),
        cmocka_unit_test(test_size_limit),
        cmocka_unit_test(test_stale),
        cmocka_unit_test(test_taken_names),
        cmocka_unit_test(test_live_here),
        cmocka_unit_test(test_live_elsewhere),
        cmocka_unit_test(test_in_place),
        cmocka_unit_test(test_in_place_memory),
        cmocka_unit_test(test_mounted_file),
        cmocka_unit_test(test_kill),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
