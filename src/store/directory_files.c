/*
 * The directory store: names, and the writing of values.
 *
 * A value is written to a temporary in PATH/tmp, and renamed to its name: whole or absent. The
 * temporary is opened with O_EXCL and locked (flock) until it has been renamed or removed. The
 * kernel drops that lock when the process ends, however it ends: a temporary that can be locked has
 * no writer, and a sweep removes it. Between open and flock a new one looks as if it had no writer:
 * who makes one checks after flock that it is still there, and makes another if not. All
 * temporaries are in one folder, not beside the values, so that a sweep need not go through these:
 * each opening of a store makes one.
 *
 * src/snapshot/file.c does the same for a file that a caller names; it has more to heed (links,
 * permissions of what is replaced), and nothing but the method in common.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* flock */
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "src/store/directory.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/uio.h>
#include <unistd.h>

#define WRITE_PARTS 64                /* of one call: POSIX has 16 at least, Linux 1024 */
#define WRITE_BYTES ((size_t)1 << 30) /* likewise: some systems refuse more than 2 GiB */
#define ATTEMPTS 100                  /* names that are tried where others exist */
#define TEMPORARY_PREFIX "put-"
#define TEMPORARY_DIGITS 16

kvt_status kvt_dir_fail(const kvt_dir *dir, kvt_store_error *error, const char *call, int number,
                        const char *name)
{
    int is_full = number == ENOSPC || number == EDQUOT;
    return kvt_store_fail(error, is_full ? KVT_ERR_FULL : KVT_ERR_IO, "%s failed: %s: %s%sin %s",
                          call, strerror(number), name, *name ? " " : "", dir->path);
}

/* ---- names ---- */

void kvt_dir_name(const kvt_store_key *key, char name[KVT_DIR_NAME_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    char *at = name + 3;
    size_t i;

    for (i = 0; i < KVT_STORE_KEY_BYTES; i++) {
        *at++ = digits[key->bytes[i] >> 4];
        *at++ = digits[key->bytes[i] & 15];
    }
    *at = 0;
    name[0] = name[3];
    name[1] = name[4];
    name[2] = '/';
}

static int digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int kvt_dir_key(const char *folder, const char *name, kvt_store_key *key)
{
    size_t i;

    if (strlen(name) != 2 * KVT_STORE_KEY_BYTES || memcmp(folder, name, 2) != 0)
        return 0;
    for (i = 0; i < KVT_STORE_KEY_BYTES; i++) {
        int high = digit(name[2 * i]), low = digit(name[2 * i + 1]);
        if (high < 0 || low < 0)
            return 0;
        key->bytes[i] = (uint8_t)(high << 4 | low);
    }
    return 1;
}

static int is_temporary(const char *name)
{
    size_t prefix = strlen(TEMPORARY_PREFIX), i;

    if (strlen(name) != prefix + TEMPORARY_DIGITS || strncmp(name, TEMPORARY_PREFIX, prefix) != 0)
        return 0;
    for (i = prefix; i < prefix + TEMPORARY_DIGITS; i++)
        if (digit(name[i]) < 0)
            return 0;
    return 1;
}

/* ---- calls ---- */

int kvt_dir_openat(int folder, const char *name, int flags, mode_t mode)
{
    int fd;
    do
        fd = openat(folder, name, flags | O_CLOEXEC, mode);
    while (fd < 0 && errno == EINTR);
    return fd;
}

static int sync_again(int fd)
{
    int answer;
    do
        answer = fsync(fd);
    while (answer != 0 && errno == EINTR);
    return answer;
}

/* Of a folder: some file systems cannot, and say so in one of these ways. */
int kvt_dir_sync(int fd)
{
    int answer = sync_again(fd);
    return answer != 0 &&
                   (errno == EINVAL || errno == EBADF || errno == ENOSYS || errno == EOPNOTSUPP)
               ? 0
               : answer;
}

struct timespec kvt_dir_stamp(struct timespec now, size_t i)
{
    int64_t microseconds = i < (size_t)1 << 30 ? (int64_t)i : (int64_t)1 << 30;
    int64_t nanoseconds = (int64_t)now.tv_nsec - microseconds % 1000000 * 1000;

    now.tv_sec -= (time_t)(microseconds / 1000000);
    if (nanoseconds < 0) {
        nanoseconds += 1000000000;
        now.tv_sec--;
    }
    now.tv_nsec = (long)nanoseconds;
    return now;
}

void kvt_dir_touch(int fd, struct timespec stamp)
{
    struct timespec times[2];
    times[0] = times[1] = stamp;
    (void)futimens(fd, times);
}

void kvt_dir_touch_name(const kvt_dir *dir, const char *name, struct timespec stamp)
{
    struct timespec times[2];
    times[0] = times[1] = stamp;
    (void)utimensat(dir->fd, name, times, AT_SYMLINK_NOFOLLOW);
}

/* ---- writing ---- */

static int lock_again(int fd)
{
    int answer;
    do
        answer = flock(fd, LOCK_EX | LOCK_NB);
    while (answer != 0 && errno == EINTR);
    return answer;
}

/*
 * Lock a new temporary. 0: a sweep has taken it for one without a writer, and removes it; -1: errno
 * says why it cannot be locked, and a sweep would remove it sooner or later.
 */
static int claim(int fd)
{
    struct stat status;
    if (lock_again(fd) != 0)
        return errno == EWOULDBLOCK ? 0 : -1;
    return fstat(fd, &status) != 0 || status.st_nlink > 0;
}

/* A name that no other call has: O_EXCL sees to what is left. */
static void name_temporary(kvt_dir *dir, char name[KVT_DIR_NAME_BYTES])
{
    struct timespec now = {0, 0};
    uint64_t number = __atomic_fetch_add(&dir->n_temporaries, 1, __ATOMIC_RELAXED);

    (void)clock_gettime(CLOCK_REALTIME, &now);
    number ^= (uint64_t)now.tv_nsec << 34 ^ (uint64_t)now.tv_sec << 20 ^ (uint64_t)getpid() << 8;
    (void)snprintf(name, KVT_DIR_NAME_BYTES, KVT_DIR_TEMPORARIES "/" TEMPORARY_PREFIX "%016llx",
                   (unsigned long long)(number * 0x9e3779b97f4a7c15u));
}

/* The descriptor to write to; -1: errno says why not, *call at which call. */
static int make_temporary(kvt_dir *dir, kvt_dir_temporary *temporary, const char **call)
{
    int attempt, fd, number, claimed;

    for (attempt = 0; attempt < ATTEMPTS; attempt++) {
        name_temporary(dir, temporary->name);
        *call = "open";
        fd = kvt_dir_openat(dir->fd, temporary->name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW,
                            0600);
        if (fd < 0 && errno == ENOENT) {
            *call = "mkdir";
            if (mkdirat(dir->fd, KVT_DIR_TEMPORARIES, 0700) != 0 && errno != EEXIST)
                return -1;
            continue;
        }
        if (fd < 0 && errno == EEXIST)
            continue;
        if (fd < 0)
            return -1;
        claimed = claim(fd);
        if (claimed > 0) { /* a second descriptor keeps the lock: the first is closed before the
                              rename */
            *call = "fcntl";
            temporary->lock = fcntl(fd, F_DUPFD_CLOEXEC, 0);
            if (temporary->lock >= 0)
                return fd;
        } else {
            *call = "flock";
        }
        number = errno;
        (void)unlinkat(dir->fd, temporary->name, 0);
        (void)close(fd);
        errno = claimed ? number : EEXIST;
        if (claimed)
            return -1;
    }
    return -1;
}

/* Take n bytes from the front of the parts. */
static void advance(struct iovec **parts, size_t *n_parts, size_t n)
{
    while (*n_parts && n >= (*parts)->iov_len) {
        n -= (*parts)->iov_len;
        (*parts)++;
        (*n_parts)--;
    }
    if (n) {
        (*parts)->iov_base = (char *)(*parts)->iov_base + n;
        (*parts)->iov_len -= n;
    }
}

/* Of the parts from *i and the byte *offset in it on, as many as one call takes. */
static size_t gather(const kvt_store_value *value, size_t *i, size_t *offset, struct iovec *to)
{
    size_t n = 0, room = WRITE_BYTES;

    while (*i < value->n_parts && n < WRITE_PARTS && room) {
        const kvt_store_part *part = &value->parts[*i];
        size_t bytes = part->bytes - *offset < room ? part->bytes - *offset : room;
        if (bytes) {
            to[n].iov_base = (char *)(uintptr_t)part->data + *offset;
            to[n++].iov_len = bytes;
        }
        room -= bytes;
        *offset += bytes;
        if (*offset == part->bytes) {
            (*i)++;
            *offset = 0;
        }
    }
    return n;
}

static int write_parts(int fd, const kvt_store_value *value)
{
    struct iovec parts[WRITE_PARTS], *at;
    size_t i = 0, offset = 0, n;

    while ((n = gather(value, &i, &offset, parts)) > 0)
        for (at = parts; n;) {
            ssize_t done = writev(fd, at, (int)n);
            if (done < 0 && errno == EINTR)
                continue;
            if (done == 0)
                errno = EIO; /* no progress and no reason */
            if (done <= 0)
                return -1;
            advance(&at, &n, (size_t)done);
        }
    return 0;
}

void kvt_dir_limit_enter(kvt_dir_limit *limit)
{
    sigset_t passed, pending;

    (void)sigemptyset(&passed);
    (void)sigaddset(&passed, SIGXFSZ);
    (void)pthread_sigmask(SIG_BLOCK, &passed, &limit->before);
    limit->was_pending = sigismember(&limit->before, SIGXFSZ) == 1 && sigpending(&pending) == 0 &&
                         sigismember(&pending, SIGXFSZ) == 1;
}

void kvt_dir_limit_leave(const kvt_dir_limit *limit, int answer)
{
    static const struct timespec no_time = {0, 0};
    sigset_t passed;
    int error = errno;

    (void)sigemptyset(&passed);
    (void)sigaddset(&passed, SIGXFSZ);
    if (answer && error == EFBIG && !limit->was_pending)
        while (sigtimedwait(&passed, NULL, &no_time) < 0 && errno == EINTR)
            ;
    (void)pthread_sigmask(SIG_SETMASK, &limit->before, NULL);
    errno = error;
}

kvt_status kvt_dir_write(kvt_dir *dir, const kvt_store_value *value, struct timespec stamp,
                         kvt_dir_temporary *temporary, kvt_store_error *error)
{
    const char *call;
    kvt_dir_limit limit;
    int fd, answer, number = 0;

    temporary->lock = -1;
    fd = make_temporary(dir, temporary, &call);
    if (fd < 0)
        return kvt_dir_fail(dir, error, call, errno, temporary->name);
    call = "write";
    kvt_dir_limit_enter(&limit);
    answer = write_parts(fd, value);
    kvt_dir_limit_leave(&limit, answer);
    if (answer)
        number = errno;
    if (!number) {
        kvt_dir_touch(fd, stamp);
        call = "fsync";
        if (dir->syncs && sync_again(fd) != 0)
            number = errno;
    }
    if (number)
        (void)close(fd);
    else if (close(fd) != 0 && errno != EINTR) { /* network file systems report here */
        call = "close";
        number = errno;
    }
    if (!number)
        return KVT_OK;
    kvt_dir_discard(dir, temporary);
    return kvt_dir_fail(dir, error, call, number, temporary->name);
}

void kvt_dir_discard(kvt_dir *dir, kvt_dir_temporary *temporary)
{
    if (temporary->lock < 0)
        return;
    (void)unlinkat(dir->fd, temporary->name, 0);
    (void)close(temporary->lock); /* only now: it is nobody's until then */
    temporary->lock = -1;
}

kvt_status kvt_dir_commit(kvt_dir *dir, kvt_dir_temporary *temporary, const char *name,
                          kvt_store_error *error)
{
    int answer = renameat(dir->fd, temporary->name, dir->fd, name);

    if (answer != 0 && errno == ENOENT) { /* the first value of its folder, if need be again */
        char folder[3] = {name[0], name[1], 0};
        __atomic_store_n(&dir->synced[digit(name[0]) << 4 | digit(name[1])], 0, __ATOMIC_RELAXED);
        if (mkdirat(dir->fd, folder, 0700) != 0 && errno != EEXIST)
            return kvt_dir_fail(dir, error, "mkdir", errno, folder);
        answer = renameat(dir->fd, temporary->name, dir->fd, name);
    }
    if (answer != 0)
        return kvt_dir_fail(dir, error, "rename", errno, name);
    (void)close(temporary->lock);
    temporary->lock = -1;
    return KVT_OK;
}

kvt_status kvt_dir_sync_entry(kvt_dir *dir, const kvt_store_key *key, kvt_store_error *error)
{
    unsigned char *synced = &dir->synced[key->bytes[0]];
    char folder[KVT_DIR_NAME_BYTES];
    int fd, number;

    kvt_dir_name(key, folder);
    folder[2] = 0;
    fd = kvt_dir_openat(dir->fd, folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
    if (fd < 0)
        return kvt_dir_fail(dir, error, "open", errno, folder);
    number = kvt_dir_sync(fd) != 0 ? errno : 0;
    (void)close(fd);
    if (!number && !__atomic_load_n(synced, __ATOMIC_RELAXED)) {
        number = kvt_dir_sync(dir->fd) != 0 ? errno : 0;
        if (!number)
            __atomic_store_n(synced, 1, __ATOMIC_RELAXED);
    }
    return number ? kvt_dir_fail(dir, error, "fsync of the folder", number, folder) : KVT_OK;
}

/* ---- what others have left ---- */

static void remove_if_dead(int folder, const char *name)
{
    int flags = O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, fd;
    struct stat status;

    if (fstatat(folder, name, &status, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(status.st_mode))
        return;
    fd = kvt_dir_openat(folder, name, O_RDWR | flags, 0); /* NFS locks only what can be written */
    if (fd < 0)
        return;
    if (lock_again(fd) == 0)
        (void)unlinkat(folder, name, 0);
    (void)close(fd);
}

void kvt_dir_sweep(kvt_dir *dir)
{
    int fd = kvt_dir_openat(dir->fd, KVT_DIR_TEMPORARIES, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
    DIR *stream = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;

    if (!stream) {
        if (fd >= 0)
            (void)close(fd);
        return;
    }
    while ((entry = readdir(stream)) != NULL)
        if (is_temporary(entry->d_name))
            remove_if_dead(fd, entry->d_name);
    (void)closedir(stream);
}
