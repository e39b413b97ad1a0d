/*
 * The system calls of a save, in order, and each of them failing in turn: the old file or the new
 * one, whole, and nothing else. The calls are taken by the linker (--wrap), so this links the
 * static library. Runs in a folder of its own under the current one.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_support.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <sys/xattr.h>
#endif
#include <sys/uio.h>
#include <unistd.h>

static char folder[64], file_a[80];

/* ---- the calls ---- */

/*
 * One letter a call, writes in a row once:
 *   d open the folder   o open the file    k lock it   D a second descriptor of it
 *   t empty it          w write            f sync it   c close it
 *   r rename            F sync the folder  e close it  l close the second descriptor   u unlink
 *   m permissions       g group            x ACL
 * other letters never stand for calls.
 */
static char calls[256];
static size_t n_calls;
static int armed;            /* record and fail */
static char kind_of[1024];   /* of a descriptor: 'f' file, 'd' folder, 'l' second, 'r' reading */
static char names[128][300]; /* of the temporaries that were opened */
static int n_names;

/* The calls of this letter fail with this error: `skip` go well, then `times` fail. */
static char fail_call;
static int fail_error, fail_skip, fail_times;
/* Writes give fewer bytes; the temporary vanishes before it is locked. */
static int short_writes, steal;

static int take(char letter)
{
    if (n_calls + 1 < sizeof calls && !(letter == 'w' && n_calls && calls[n_calls - 1] == 'w'))
        calls[n_calls++] = letter;
    calls[n_calls] = '\0';
    if (letter != fail_call || fail_times == 0)
        return 0;
    if (fail_skip > 0) {
        fail_skip--;
        return 0;
    }
    fail_times--;
    errno = fail_error;
    return 1;
}

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, mode_t mode);
ssize_t __real_write(int fd, const void *data, size_t n_bytes);
ssize_t __wrap_write(int fd, const void *data, size_t n_bytes);
ssize_t __real_read(int fd, void *data, size_t n_bytes);
ssize_t __wrap_read(int fd, void *data, size_t n_bytes);
ssize_t __real_pread(int fd, void *data, size_t n_bytes, off_t at);
ssize_t __wrap_pread(int fd, void *data, size_t n_bytes, off_t at);
int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __real_close(int fd);
int __wrap_close(int fd);
int __real_rename(const char *from, const char *to);
int __wrap_rename(const char *from, const char *to);
int __real_unlink(const char *path);
int __wrap_unlink(const char *path);
int __real_ftruncate(int fd, off_t n_bytes);
int __wrap_ftruncate(int fd, off_t n_bytes);
int __real_fchmod(int fd, mode_t mode);
int __wrap_fchmod(int fd, mode_t mode);
int __real_fchown(int fd, uid_t owner, gid_t group);
int __wrap_fchown(int fd, uid_t owner, gid_t group);
int __real_fsetxattr(int fd, const char *name, const void *value, size_t n_bytes, int flags);
int __wrap_fsetxattr(int fd, const char *name, const void *value, size_t n_bytes, int flags);
int __real_flock(int fd, int operation);
int __wrap_flock(int fd, int operation);
int __real_fcntl(int fd, int command, long argument);
int __wrap_fcntl(int fd, int command, long argument);
ssize_t __real_getrandom(void *to, size_t n_bytes, unsigned flags);
ssize_t __wrap_getrandom(void *to, size_t n_bytes, unsigned flags);

int __wrap_open(const char *path, int flags, mode_t mode)
{
    char letter = flags & O_DIRECTORY ? 'd' : (flags & O_ACCMODE) == O_RDONLY ? 'r' : 'f';
    int fd;
    if (armed && take(letter == 'f' ? 'o' : letter))
        return -1;
    fd = __real_open(path, flags, mode);
    if (armed && fd >= 0 && (size_t)fd < sizeof kind_of)
        kind_of[fd] = letter;
    if (armed && letter == 'f' && n_names < 128)
        (void)snprintf(names[n_names++], sizeof names[0], "%s", path);
    return fd;
}

ssize_t __wrap_write(int fd, const void *data, size_t n_bytes)
{
    if (armed && take('w'))
        return fail_error ? -1 : 0;
    return __real_write(fd, data, armed && short_writes && n_bytes > 3 ? n_bytes / 3 : n_bytes);
}

/* The first part is a write of its own: what a system that takes fewer bytes does. */
ssize_t __wrap_writev(int fd, const struct iovec *parts, int n);
ssize_t __wrap_writev(int fd, const struct iovec *parts, int n)
{
    (void)n;
    return __wrap_write(fd, parts->iov_base, parts->iov_len);
}

ssize_t __wrap_read(int fd, void *data, size_t n_bytes)
{
    if (armed && take('R'))
        return -1;
    return __real_read(fd, data, n_bytes);
}

/* Of regular files. */
ssize_t __wrap_pread(int fd, void *data, size_t n_bytes, off_t at)
{
    if (armed && take('R'))
        return -1;
    return __real_pread(fd, data, n_bytes, at);
}

int __wrap_fsync(int fd)
{
    if (armed && take(kind_of[fd] == 'd' ? 'F' : 'f'))
        return -1;
    return __real_fsync(fd);
}

int __wrap_close(int fd)
{
    char kind = kind_of[fd];
    int answer = __real_close(fd);
    if (armed && take(kind == 'd' ? 'e' : kind == 'l' ? 'l' : kind == 'r' ? 'x' : 'c'))
        return -1;
    return answer;
}

int __wrap_rename(const char *from, const char *to)
{
    return armed && take('r') ? -1 : __real_rename(from, to);
}

int __wrap_unlink(const char *path)
{
    return armed && take('u') ? -1 : __real_unlink(path);
}

int __wrap_ftruncate(int fd, off_t n_bytes)
{
    return armed && take('t') ? -1 : __real_ftruncate(fd, n_bytes);
}

int __wrap_fchmod(int fd, mode_t mode)
{
    return armed && take('m') ? -1 : __real_fchmod(fd, mode);
}

int __wrap_fchown(int fd, uid_t owner, gid_t group)
{
    return armed && take('g') ? -1 : __real_fchown(fd, owner, group);
}

int __wrap_fsetxattr(int fd, const char *name, const void *value, size_t n_bytes, int flags)
{
    return armed && take('x') ? -1 : __real_fsetxattr(fd, name, value, n_bytes, flags);
}

int __wrap_flock(int fd, int operation)
{
    if (armed && take('k'))
        return -1;
    if (armed && steal-- > 0)
        assert_int_equal(__real_unlink(names[n_names - 1]), 0);
    return __real_flock(fd, operation);
}

int __wrap_fcntl(int fd, int command, long argument)
{
    int answer;
    if (!armed || command != F_DUPFD_CLOEXEC)
        return __real_fcntl(fd, command, argument);
    if (take('D'))
        return -1;
    answer = __real_fcntl(fd, command, argument);
    if (answer >= 0)
        kind_of[answer] = 'l';
    return answer;
}

ssize_t __wrap_getrandom(void *to, size_t n_bytes, unsigned flags)
{
    if (armed && fail_call == 'g') {
        errno = fail_error;
        return -1;
    }
    return __real_getrandom(to, n_bytes, flags);
}

/* ---- a save under watch ---- */

static model m;
static kvt_cache *cache;
static kvt_seq *first, *second; /* of 40 and of 300 tokens */
static uint64_t first_hash, second_hash;

static void no_fault(void)
{
    fail_call = '-';
    fail_error = fail_skip = fail_times = short_writes = steal = 0;
}

static void fault(char call, int error, int skip, int times)
{
    no_fault();
    fail_call = call;
    fail_error = error;
    fail_skip = skip;
    fail_times = times;
}

static kvt_status save(const kvt_seq *seq, uint32_t no_fsync, uint32_t in_place)
{
    kvt_save_options options;
    kvt_status status;

    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.no_fsync = no_fsync;
    options.in_place = in_place;
    n_calls = 0;
    n_names = 0;
    calls[0] = '\0';
    armed = 1;
    status = kvt_seq_save(seq, file_a, &options);
    armed = 0;
    return status;
}

static void expect_calls(const char *expected)
{
    if (strcmp(calls, expected) != 0)
        fail_msg("calls %s, not %s", calls, expected);
}

static void expect_said(const char *part)
{
    char text[256];
    expect_ok(cache, kvt_cache_error(cache, text, sizeof text));
    if (!strstr(text, part))
        fail_msg("\"%s\" does not say \"%s\"", text, part);
}

static int open_files(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) != -1;
    return n;
}

/* The folder holds the file alone, and it is this one; 0: nothing at all. */
static void expect_file(uint64_t hash)
{
    kvt_seq *seq;
    assert_int_equal(count_entries(folder), hash != 0);
    if (!hash)
        return;
    seq = model_seq(cache);
    expect_ok(cache, kvt_seq_load(seq, file_a, NULL, NULL));
    assert_true(state_hash(&m, cache, seq) == hash);
    kvt_seq_destroy(seq);
}

/* Before a trial: the file of `first`, or none. */
static void begin_with(int old)
{
    (void)unlink(file_a);
    no_fault();
    if (old)
        expect_ok(cache, kvt_seq_save(first, file_a, NULL));
    expect_file(old ? first_hash : 0);
}

/* ---- the tests ---- */

static void test_order(void **state)
{
    (void)state;
    begin_with(0);
    expect_ok(cache, save(second, 0, 0));
    expect_calls("dokDwfcrFel");
    begin_with(1);
    expect_ok(cache, save(second, 0, 0)); /* m: it has the permissions of the old one */
    expect_calls("dokDmwfcrFel");
    expect_file(second_hash);
    begin_with(1);
    expect_ok(cache, save(second, 1, 0));
    expect_calls("okDmwcrl");
    expect_file(second_hash);
    begin_with(1);
    expect_ok(cache, save(second, 0, 1));
    expect_calls("otwfc");
    expect_file(second_hash);
    begin_with(1);
    expect_ok(cache, save(second, 1, 1));
    expect_calls("otwc");
    begin_with(0);
    expect_ok(cache, save(second, 0, 1));
    expect_calls("dowfcFe");
    expect_file(second_hash);
    /* A longer file in place: nothing of it stays. */
    expect_ok(cache, save(first, 0, 1));
    expect_file(first_hash);
}

static const int errors[] = {EIO, ENOSPC, EDQUOT};
#define N_ERRORS (sizeof errors / sizeof errors[0])

static void test_each_call_fails(void **state)
{
    static const struct {
        char call;
        const char *said;
        int new_file; /* 1: in place already */
    } cases[] = {{'d', "opening its folder failed", 0},
                 {'o', "creating a file in its folder failed", 0},
                 {'D', "fcntl failed", 0},
                 {'m', "fchmod failed", 0},
                 {'w', "write failed", 0},
                 {'f', "fsync failed", 0},
                 {'c', "close failed", 0},
                 {'r', "rename failed", 0},
                 {'F', "fsync of the folder failed", 1}};
    int before = open_files();
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (size_t e = 0; e < N_ERRORS; e++)
            for (int old = 0; old < 2; old++) {
                if (cases[i].call == 'm' && !old)
                    continue;
                begin_with(old);
                fault(cases[i].call, errors[e], 0, 1);
                expect(cache, KVT_ERR_IO, save(second, 0, 0));
                assert_int_equal(fail_times, 0);
                expect_said(cases[i].said);
                expect_said(strerror(errors[e]));
                expect_said(file_a);
                expect_file(cases[i].new_file ? second_hash : old ? first_hash : 0);
                assert_int_equal(open_files(), before);
                expect_ok(cache, save(second, 0, 0)); /* and then it goes well */
                expect_file(second_hash);
            }
}

static mode_t mode_of(const char *path)
{
    struct stat status;
    assert_int_equal(stat(path, &status), 0);
    return status.st_mode & 0777;
}

/* What replaces a file keeps its group; where it cannot, another group gets no more than others. */
static void test_group(void **state)
{
    const gid_t other = getegid() + 12345;
    struct stat status;
    (void)state;

    begin_with(1);
    if (chown(file_a, (uid_t)-1, other) != 0)
        skip(); /* for root, and who is in several groups */
    assert_int_equal(chmod(file_a, 0664), 0);
    expect_ok(cache, save(second, 1, 0));
    assert_int_equal(stat(file_a, &status), 0);
    assert_int_equal(status.st_gid, other);
    assert_int_equal(mode_of(file_a), 0664);
    fault('g', EPERM, 0, 1);
    expect_ok(cache, save(second, 1, 0));
    assert_int_equal(fail_times, 0);
    assert_int_equal(stat(file_a, &status), 0);
    assert_int_equal(status.st_gid, getegid());
    assert_int_equal(mode_of(file_a), 0644);
}

#if defined(__linux__)
/* An ACL of one named user besides; its mask is what the group's bits are. */
static void put_acl_entry(unsigned char *to, unsigned tag, unsigned rights, uint32_t id)
{
    put32(to, tag | rights << 16);
    put32(to + 4, id);
}

static void test_acl(void **state)
{
    static const char name[] = "system.posix_acl_access", by_default[] = "system.posix_acl_default";
    unsigned char acl[44], found[64];
    (void)state;

    put32(acl, 2);
    put_acl_entry(acl + 4, 1, 6, UINT32_MAX);
    put_acl_entry(acl + 12, 2, 6, 12345);
    put_acl_entry(acl + 20, 4, 0, UINT32_MAX);
    put_acl_entry(acl + 28, 16, 6, UINT32_MAX);
    put_acl_entry(acl + 36, 32, 0, UINT32_MAX);
    begin_with(1);
    assert_int_equal(chmod(file_a, 0600), 0);
    if (setxattr(file_a, name, acl, sizeof acl, 0) != 0)
        skip(); /* not on this file system */
    assert_int_equal(mode_of(file_a), 0660);
    expect_ok(cache, save(second, 1, 0));
    assert_int_equal(getxattr(file_a, name, found, sizeof found), sizeof acl);
    assert_memory_equal(found, acl, sizeof acl);
    fault('x', EPERM, 0, 1);
    expect_ok(cache, save(second, 1, 0));
    assert_int_equal(fail_times, 0);
    assert_int_equal(getxattr(file_a, name, found, sizeof found), -1);
    assert_int_equal(mode_of(file_a), 0600);
    /* One that the folder gives to new files is not that of the old one. */
    assert_int_equal(setxattr(folder, by_default, acl, sizeof acl, 0), 0);
    expect_ok(cache, save(second, 1, 0));
    assert_int_equal(getxattr(file_a, name, found, sizeof found), -1);
    assert_int_equal(mode_of(file_a), 0600);
    assert_int_equal(removexattr(folder, by_default), 0);
}
#endif

static void test_each_write_fails(void **state)
{
    int n;
    (void)state;
    for (n = 0;; n++) {
        kvt_status status;
        begin_with(1);
        fault('w', ENOSPC, n, 1);
        status = save(second, 0, 0);
        if (status == KVT_OK)
            break;
        expect(cache, KVT_ERR_IO, status);
        assert_null(strchr(calls, 'f'));
        assert_null(strchr(calls, 'r'));
        expect_file(first_hash);
        fault('w', 0, n, 1); /* no progress and no reason */
        expect(cache, KVT_ERR_IO, save(second, 0, 0));
        expect_said(strerror(EIO));
        expect_file(first_hash);
    }
    assert_true(n > 2);
    begin_with(1);
    short_writes = 1;
    expect_ok(cache, save(second, 0, 0));
    expect_file(second_hash);
}

static void test_interrupted(void **state)
{
    static const char each[] = "dokmwfcF";
    (void)state;
    for (size_t i = 0; i < sizeof each - 1; i++)
        for (int times = 1; times < 4; times += 2) {
            if (each[i] == 'c' && times > 1) /* it is closed the first time */
                continue;
            begin_with(1);
            fault(each[i], EINTR, 0, times);
            if (each[i] == 'm') { /* which no system interrupts */
                expect(cache, KVT_ERR_IO, save(second, 0, 0));
                continue;
            }
            expect_ok(cache, save(second, 0, 0));
            assert_int_equal(fail_times, 0);
            expect_file(second_hash);
        }
    begin_with(1);
    fault('t', EINTR, 0, 2);
    expect_ok(cache, save(second, 0, 1));
    expect_file(second_hash);
}

static void test_in_place_fails(void **state)
{
    static const char each[] = "otwfc";
    int before = open_files();
    (void)state;
    for (int old = 0; old < 2; old++)
        for (size_t i = 0; i < sizeof each - 1; i++) {
            if (each[i] == 't' && !old)
                continue;
            begin_with(old);
            fault(each[i], EIO, each[i] == 'w' ? 1 : 0, 1);
            expect(cache, KVT_ERR_IO, save(second, 0, 1));
            expect_said(strerror(EIO));
            assert_int_equal(open_files(), before);
            if (!old) {
                expect_file(0); /* a new one is removed */
            } else if (each[i] == 'o' || each[i] == 't') {
                expect_file(first_hash); /* nothing has been written */
            } else if (each[i] == 'w') {
                kvt_seq *seq = model_seq(cache);
                expect(cache, KVT_ERR_CORRUPT, kvt_seq_load(seq, file_a, NULL, NULL));
                kvt_seq_destroy(seq);
            } else {
                expect_file(second_hash);
            }
        }
}

/* What a mount point answers, and a folder that cannot be written: the text says what to do. */
static void test_advice(void **state)
{
    (void)state;
    begin_with(1);
    fault('r', EBUSY, 0, 1);
    expect(cache, KVT_ERR_IO, save(second, 0, 0));
    expect_said("rename failed");
    expect_said(strerror(EBUSY));
    expect_said("mount its folder, or save with in_place");
    expect_file(first_hash);
    for (size_t i = 0; i < 3; i++) {
        static const int without[] = {EACCES, EROFS, EPERM};
        begin_with(1);
        fault('o', without[i], 0, 1);
        expect(cache, KVT_ERR_IO, save(second, 0, 0));
        expect_said("save with in_place");
        begin_with(0);
        fault('o', without[i], 0, 1);
        expect(cache, KVT_ERR_IO, save(second, 0, 0));
        expect_said(strerror(without[i]));
    }
    begin_with(1);
    fault('w', EBUSY, 0, 1);
    expect(cache, KVT_ERR_IO, save(second, 0, 0));
    expect_said("write failed: ");
}

/* A folder that cannot be read or synced is left to the system. */
static void test_folder(void **state)
{
    static const int no_sync[] = {EINVAL, EBADF, ENOSYS, EOPNOTSUPP};
    (void)state;
    begin_with(1);
    fault('d', EACCES, 0, 1);
    expect_ok(cache, save(second, 0, 0));
    expect_calls("dokDmwfcrl");
    expect_file(second_hash);
    for (size_t i = 0; i < 4; i++) {
        begin_with(1);
        fault('F', no_sync[i], 0, 1);
        expect_ok(cache, save(second, 0, 0));
        assert_int_equal(fail_times, 0);
        expect_file(second_hash);
    }
    begin_with(1);
    fault('F', EMFILE, 0, 1);
    expect(cache, KVT_ERR_IO, save(second, 0, 0));
}

/* Names: new ones each time, also without the system's random numbers; others are avoided. */
static void test_names(void **state)
{
    char once[300];
    int before = open_files();
    (void)state;
    for (int random = 0; random < 2; random++) {
        begin_with(1);
        if (!random)
            fault('g', ENOSYS, 0, 0);
        expect_ok(cache, save(second, 0, 0));
        assert_int_equal(n_names, 1);
        (void)snprintf(once, sizeof once, "%s", names[0]);
        expect_ok(cache, save(second, 0, 0));
        assert_int_equal(n_names, 1);
        assert_string_not_equal(once, names[0]);
        once[strlen(once) - 20] = names[0][strlen(names[0]) - 20] = '\0';
        assert_string_equal(once, names[0]); /* up to the number */
    }
    begin_with(1);
    fault('o', EEXIST, 0, 3);
    expect_ok(cache, save(second, 0, 0));
    expect_calls("dooookDmwfcrFel");
    expect_file(second_hash);
    begin_with(1);
    fault('o', EEXIST, 0, 1000000);
    expect(cache, KVT_ERR_IO, save(second, 0, 0));
    assert_int_equal(1000000 - fail_times, 100);
    expect_file(first_hash);
    assert_int_equal(open_files(), before);
}

/* Another save takes the temporary for one without a writer before it is locked. */
static void test_lost_race(void **state)
{
    int before = open_files();
    (void)state;
    for (int n = 1; n < 4; n++) {
        begin_with(1);
        fault('k', EWOULDBLOCK, 0, n); /* that one holds the lock */
        expect_ok(cache, save(second, 0, 0));
        assert_int_equal(n_names, n + 1);
        expect_file(second_hash);
        begin_with(1);
        steal = n; /* that one has removed it */
        expect_ok(cache, save(second, 0, 0));
        assert_int_equal(n_names, n + 1);
        expect_file(second_hash);
    }
    begin_with(1);
    fault('k', EWOULDBLOCK, 0, 1000000);
    expect(cache, KVT_ERR_IO, save(second, 0, 0));
    expect_file(first_hash);
    assert_int_equal(open_files(), before);
    /* No locks here: it is written all the same. */
    begin_with(1);
    fault('k', ENOLCK, 0, 1000000);
    expect_ok(cache, save(second, 0, 0));
    expect_file(second_hash);
}

/* What cannot be locked, for whatever reason, is not removed. */
static void test_no_locks(void **state)
{
    char stale[300];
    FILE *f;
    (void)state;
    begin_with(1);
    expect_ok(cache, save(second, 0, 0));
    (void)snprintf(stale, sizeof stale, "%s", names[0]); /* free again */
    f = fopen(stale, "wb");
    assert_non_null(f);
    assert_int_equal(fclose(f), 0);
    fault('k', ENOLCK, 0, 1000000);
    expect_ok(cache, save(second, 0, 0));
    assert_int_equal(count_entries(folder), 2);
    fault('k', EWOULDBLOCK, 1, 1000000);
    expect_ok(cache, save(second, 0, 0));
    assert_int_equal(count_entries(folder), 2);
    fault('o', EPERM, 1, 1); /* cannot be opened */
    expect_ok(cache, save(second, 0, 0));
    assert_int_equal(count_entries(folder), 2);
    fault('o', EACCES, 1, 1); /* can be read */
    expect_ok(cache, save(second, 0, 0));
    assert_int_equal(count_entries(folder), 1);
}

static void test_reading(void **state)
{
    kvt_seq *seq = model_seq(cache);
    (void)state;
    begin_with(1);
    for (size_t e = 0; e < N_ERRORS; e++) {
        fault('R', errors[e], 0, 1);
        armed = 1;
        expect(cache, KVT_ERR_IO, kvt_seq_load(seq, file_a, NULL, NULL));
        armed = 0;
        expect_said("read failed");
        expect_said(strerror(errors[e]));
    }
    fault('R', EINTR, 0, 3);
    armed = 1;
    expect_ok(cache, kvt_seq_load(seq, file_a, NULL, NULL));
    armed = 0;
    assert_int_equal(fail_times, 0);
    kvt_seq_destroy(seq);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(folder, sizeof folder, "test_snapshot_calls-%ld", (long)getpid());
    (void)snprintf(file_a, sizeof file_a, "%s/a", folder);
    m = model_of(2, 8, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    cache = model_cache(&m);
    first = model_seq(cache);
    second = model_seq(cache);
    model_append(&m, cache, first, 40, 40);
    model_append(&m, cache, second, 300, 300);
    first_hash = state_hash(&m, cache, first);
    second_hash = state_hash(&m, cache, second);
    return mkdir(folder, 0700);
}

static int teardown(void **state)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    char path[400];
    (void)state;
    while (dir && (entry = readdir(dir)) != NULL) {
        (void)snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (entry->d_name[0] != '.' || strlen(entry->d_name) > 2)
            (void)unlink(path);
    }
    if (dir)
        (void)closedir(dir);
    kvt_seq_destroy(first);
    kvt_seq_destroy(second);
    kvt_cache_destroy(cache);
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_each_call_fails),
        cmocka_unit_test(test_group),
#if defined(__linux__)
        cmocka_unit_test(test_acl),
#endif
        cmocka_unit_test(test_each_write_fails),
        cmocka_unit_test(test_interrupted),
        cmocka_unit_test(test_in_place_fails),
        cmocka_unit_test(test_advice),
        cmocka_unit_test(test_folder),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_lost_race),
        cmocka_unit_test(test_no_locks),
        cmocka_unit_test(test_reading),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
