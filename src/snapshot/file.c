/*
 * Files: whole or not at all.
 *
 * Writing goes to a temporary in the folder of the target (the same file system, so that rename is
 * atomic); then fsync, rename over the target, fsync of the folder. A process that dies in between
 * leaves the temporary behind and the target as it was. A symbolic link is followed: the file that
 * it points to is replaced, the link stays. A target that is no regular file (a device, a folder)
 * is refused, since rename would put a file in its place. The permissions of a replaced file are
 * kept.
 *
 * The temporary is named .kvtile-<XXH64 of the target's name>-<random number>.tmp, opened with
 * O_EXCL, and locked (flock) from its creation until it is renamed or removed. The kernel drops the
 * lock when its process ends, however that ends, so one beside the target that can be locked has
 * no writer, whatever process ids say (they are no guide: in containers most are 1). A save removes
 * those of its own target. Between open and flock a temporary looks as if it had no writer: who
 * makes one checks after flock that it is still there, and makes another if not. Where a file
 * system has no locks none is removed.
 *
 * A file that is a mount point cannot be renamed over (EBUSY). Only where the caller wants it the
 * target is written in place, which is not atomic.
 *
 * Reading goes through a buffer, which a caller's stream must not have: nothing behind a
 * snapshot's end is taken from a stream.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* flock, getrandom */
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 /* realpath */
#endif

#include "src/snapshot/format.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/random.h>
#include <sys/xattr.h>
#endif

#define LARGE_BYTES ((size_t)1 << 16) /* is read past the buffer */
#define SMALL_BYTES ((size_t)1 << 12)
#define WRITE_PARTS 64               /* of one call: POSIX has 16 at least, Linux 1024 */
#define TEMPORARIES 100              /* names that are tried when others exist */
#define PART_BYTES ((size_t)1 << 30) /* of one system call: some refuse more than 2 GiB */

static void file_init(kvt_snap_file *file, const kvt_snap_context *context)
{
    memset(file, 0, sizeof *file);
    file->context = context;
    file->fd = -1;
    file->folder = -1;
    file->lock = -1;
}

/* advice: what to do about it, or "". Before the path, which may be cut. */
static kvt_status io_fail_with(const kvt_snap_context *context, const char *call, int error,
                               const char *advice, const char *path)
{
    return kvt_snap_fail(context, KVT_ERR_IO, "%s failed: %s%s: %s", call, strerror(error), advice,
                         path);
}

static kvt_status io_fail(const kvt_snap_context *context, const char *call, int error,
                          const char *path)
{
    return io_fail_with(context, call, error, "", path);
}

static int open_again(const char *path, int flags, mode_t mode)
{
    int fd;
    do
        fd = open(path, flags | O_CLOEXEC, mode);
    while (fd < 0 && errno == EINTR);
    return fd;
}

kvt_status kvt_snap_file_failure(const kvt_snap_file *file, const char *path)
{
    int is_mount = file->call && file->error == EBUSY && strcmp(file->call, "rename") == 0;
    int part = __atomic_load_n(&file->part_error, __ATOMIC_RELAXED);

    if (!file->call && part)
        return io_fail(file->context, "read", part, path);
    return !file->call
               ? KVT_OK
               : io_fail_with(file->context, file->call, file->error,
                              is_mount ? " (the file is a mount point, which cannot be "
                                         "replaced: mount its folder, or save with in_place)"
                                       : "",
                              path);
}

static void failed(kvt_snap_file *file, const char *call)
{
    file->error = errno;
    file->call = call;
}

/* ---- paths ---- */

size_t kvt_snap_folder_bytes(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash - path) + 1 : 0;
}

/* A path: 1 there is such a file, 0 there is none, -1 nobody knows. */
static int look(const kvt_snap_context *context, const char *path, struct stat *status)
{
    if (stat(path, status) == 0)
        return 1;
    if (errno == ENOENT || errno == ENOTDIR)
        return 0;
    (void)io_fail(context, "stat", errno, path);
    return -1;
}

int kvt_snap_path_in(const char *folder, const char *name, char *path)
{
    const char *slash = *folder && folder[strlen(folder) - 1] != '/' ? "/" : "";
    int n = snprintf(path, KVT_SNAP_PATH_BYTES, "%s%s%s", folder, slash, name);

    return n >= 0 && n < KVT_SNAP_PATH_BYTES;
}

int kvt_snap_same_file(const kvt_snap_context *context, const char *a, const char *b)
{
    struct stat one, other;
    int there = look(context, a, &one);

    if (there > 0)
        there = look(context, b, &other);
    return there > 0 ? one.st_dev == other.st_dev && one.st_ino == other.st_ino : there;
}

int kvt_snap_file_is(const kvt_snap_file *file, const char *path, int fd)
{
    struct stat own, other;
    int there = path ? look(file->context, path, &other) : 1;

    if (there <= 0)
        return there;
    if ((!path && fstat(fd, &other) != 0) || fstat(file->fd, &own) != 0) {
        (void)io_fail(file->context, "fstat", errno, path ? path : "the file descriptor");
        return -1;
    }
    return own.st_dev == other.st_dev && own.st_ino == other.st_ino;
}

kvt_status kvt_snap_file_size(const kvt_snap_context *context, const char *path, uint64_t *bytes)
{
    struct stat status;
    int there = look(context, path, &status);

    *bytes = there > 0 ? (uint64_t)status.st_size : 0;
    if (there < 0)
        return KVT_ERR_IO;
    return there && !S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)
               ? kvt_snap_fail(context, KVT_ERR_IO,
                               "not a regular file, which can be read more than once: %s", path)
               : KVT_OK;
}

int kvt_snap_same_folder(const kvt_snap_context *context, const char *a, const char *b)
{
    char one[KVT_SNAP_PATH_BYTES + 1], other[KVT_SNAP_PATH_BYTES + 1];
    size_t n = kvt_snap_folder_bytes(a), m = kvt_snap_folder_bytes(b);

    if (n >= sizeof one - 1 || m >= sizeof other - 1)
        return 0;
    memcpy(one, a, n);
    memcpy(one + n, ".", 2);
    memcpy(other, b, m);
    memcpy(other + m, ".", 2);
    return kvt_snap_same_file(context, one, other);
}

/*
 * A descriptor of the caller's that does not block is waited for. (A socket that blocks says EAGAIN
 * when its own time limit has passed.)
 */
static int waits(const kvt_snap_file *file, short events)
{
    struct pollfd poller = {file->fd, events, 0};
    int flags;

    if (errno != EAGAIN || !file->is_callers)
        return 0;
    flags = fcntl(file->fd, F_GETFL);
    if (flags >= 0 && (flags & O_NONBLOCK)) {
        if (poll(&poller, 1, -1) >= 0 ? !(poller.revents & POLLNVAL) : errno == EINTR)
            return 1;
    }
    errno = EAGAIN;
    return 0;
}

/* ---- reading ---- */

/*
 * One read; -1 with the failure noted. A regular file is read by places: parts of it may be, too.
 */
static int64_t read_once(kvt_snap_file *file, void *to, size_t bytes)
{
    ssize_t n;
    bytes = bytes < PART_BYTES ? bytes : PART_BYTES;
    do
        n = file->bytes == UINT64_MAX ? read(file->fd, to, bytes)
                                      : pread(file->fd, to, bytes, (off_t)file->position);
    while (n < 0 && (errno == EINTR || waits(file, POLLIN)));
    if (n < 0)
        failed(file, "read");
    else
        file->position += (uint64_t)n;
    return n;
}

size_t kvt_snap_file_part(void *user, uint64_t offset, void *to, size_t bytes)
{
    kvt_snap_file *file = user;
    size_t done = 0;

    while (done < bytes) {
        size_t part = bytes - done < PART_BYTES ? bytes - done : PART_BYTES;
        ssize_t n = pread(file->fd, (char *)to + done, part, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            __atomic_store_n(&file->part_error, errno, __ATOMIC_RELAXED);
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    return done;
}

void kvt_snap_file_skip(void *user, uint64_t bytes)
{
    kvt_snap_file *file = user;
    size_t have = file->end - file->begin;

    if (bytes <= have) {
        file->begin += (size_t)bytes;
        return;
    }
    file->position += bytes - have;
    file->begin = file->end = 0;
    file->large = 1;
}

static int64_t fd_read(void *user, void *data, size_t bytes)
{
    return read_once(user, data, bytes);
}

/*
 * Through the buffer, but for what is large: that is read to where it goes, and what little is
 * between such parts without reading far ahead into the next one.
 */
static int64_t file_read(void *user, void *data, size_t bytes)
{
    kvt_snap_file *file = user;

    if (file->begin == file->end) {
        int64_t n;
        if (bytes >= LARGE_BYTES) {
            file->large = 1;
            return read_once(file, data, bytes);
        }
        n = read_once(file, file->ahead.data, file->large ? SMALL_BYTES : file->ahead.bytes);
        file->large = 0;
        if (n <= 0)
            return n;
        file->begin = 0;
        file->end = (size_t)n;
    }
    if (bytes > file->end - file->begin)
        bytes = file->end - file->begin;
    memcpy(data, file->ahead.data + file->begin, bytes);
    file->begin += bytes;
    return (int64_t)bytes;
}

const unsigned char *kvt_snap_file_view(void *user, size_t bytes)
{
    kvt_snap_file *file = user;
    size_t have = file->end - file->begin;

    if (bytes > file->ahead.bytes)
        return NULL;
    if (have < bytes) {
        if (have)
            memmove(file->ahead.data, file->ahead.data + file->begin, have);
        file->begin = 0;
        file->end = have;
    }
    while (file->end < file->begin + bytes) {
        int64_t n = read_once(file, file->ahead.data + file->end, file->ahead.bytes - file->end);
        if (n <= 0)
            return NULL; /* a read says so, too */
        file->end += (size_t)n;
    }
    file->begin += bytes;
    return file->ahead.data + file->begin - bytes;
}

static kvt_status open_to_read(const kvt_snap_context *context, const char *path,
                               kvt_snap_file *file)
{
    struct stat status;

    file_init(file, context);
    file->fd = open_again(path, O_RDONLY, 0);
    if (file->fd < 0)
        return io_fail(context, "open", errno, path);
    if (fstat(file->fd, &status) != 0)
        return io_fail(context, "fstat", errno, path);
    if (S_ISDIR(status.st_mode))
        return io_fail(context, "open", EISDIR, path);
    file->bytes = S_ISREG(status.st_mode) ? (uint64_t)status.st_size : UINT64_MAX;
    return KVT_OK;
}

kvt_status kvt_snap_file_open(const kvt_snap_context *context, const char *path,
                              kvt_snap_file *file, kvt_reader *reader)
{
    kvt_status status = open_to_read(context, path, file);
    size_t bytes;

    reader->user = file;
    reader->read = file_read;
    if (status != KVT_OK)
        return status;
    /* No more than a small file has: its pages are most of what such a load costs. */
    bytes = file->bytes < KVT_SNAP_AHEAD_BYTES ? (size_t)file->bytes : KVT_SNAP_AHEAD_BYTES;
    return kvt_snap_reserve(context, &file->ahead, 0, bytes < SMALL_BYTES ? SMALL_BYTES : bytes,
                            "a file's buffer");
}

kvt_status kvt_snap_file_open_named(const kvt_snap_context *context, const char *path,
                                    kvt_snap_file *file)
{
    struct stat named;
    int there = look(context, path, &named);
    kvt_status status;

    file_init(file, context);
    if (there < 0)
        return KVT_ERR_IO;
    /* Before it is opened: that would wait for the other end of a pipe. */
    status = there && !S_ISREG(named.st_mode) ? KVT_OK : open_to_read(context, path, file);
    return status == KVT_OK && (file->fd < 0 || file->bytes == UINT64_MAX)
               ? kvt_snap_fail(context, KVT_ERR_IO, "the parent is not a regular file: %s", path)
               : status;
}

int64_t kvt_snap_file_read_at(kvt_snap_file *file, uint64_t offset, void *to, size_t bytes)
{
    ssize_t n;
    do
        n = pread(file->fd, to, bytes < PART_BYTES ? bytes : PART_BYTES, (off_t)offset);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        failed(file, "pread");
    return n;
}

kvt_status kvt_snap_file_map(kvt_snap_file *file, const char *path, kvt_snap_mapped *mapped)
{
    void *memory;

    memset(mapped, 0, sizeof *mapped);
    if (file->bytes == UINT64_MAX)
        return kvt_snap_fail(file->context, KVT_ERR_UNSUPPORTED,
                             "not a regular file, which could be mapped: %s", path);
    if (file->bytes == 0)
        return kvt_snap_fail(file->context, KVT_ERR_CORRUPT, "snapshot damaged: it is empty: %s",
                             path);
    if (file->bytes > SIZE_MAX / 2)
        return kvt_snap_fail(file->context, KVT_ERR_LIMIT,
                             "a file of %llu bytes is more than this machine can address: %s",
                             (unsigned long long)file->bytes, path);
    memory = mmap(NULL, (size_t)file->bytes, PROT_READ, MAP_SHARED, file->fd, 0);
    if (memory == MAP_FAILED && errno == ENODEV)
        return kvt_snap_fail(file->context, KVT_ERR_UNSUPPORTED,
                             "its file system cannot map it: %s", path);
    if (memory == MAP_FAILED)
        return io_fail(file->context, "mmap", errno, path);
    mapped->memory = memory;
    mapped->bytes = (size_t)file->bytes;
    return KVT_OK;
}

void kvt_snap_unmap(const kvt_snap_mapped *mapped)
{
    if (mapped->memory)
        (void)munmap((void *)(uintptr_t)mapped->memory, mapped->bytes);
}

kvt_status kvt_snap_file_expect_end(kvt_snap_file *file, const char *path)
{
    unsigned char byte;
    int64_t n = file_read(file, &byte, 1);

    if (n < 0)
        return kvt_snap_file_failure(file, path);
    if (n > 0)
        return kvt_snap_fail(file->context, KVT_ERR_CORRUPT,
                             "snapshot damaged: there are bytes after its end: %s", path);
    return KVT_OK;
}

/* ---- writing ---- */

/*
 * writev, without the signal that a passed limit on the size of files (RLIMIT_FSIZE) sends: it
 * would end the process, or call a handler of the caller's. It is blocked in this thread meanwhile
 * and, since the kernel sends it to the thread that writes, taken back there; the process's
 * disposition stays. One that was pending before is the caller's and stays too.
 */
static ssize_t write_unsignalled(int fd, const struct iovec *parts, size_t n_parts)
{
    static const struct timespec no_time = {0, 0};
    sigset_t limit, before, pending;
    int was_pending = 0, error;
    ssize_t n;

    (void)sigemptyset(&limit);
    (void)sigaddset(&limit, SIGXFSZ);
    (void)pthread_sigmask(SIG_BLOCK, &limit, &before);
    if (sigismember(&before, SIGXFSZ) == 1 && sigpending(&pending) == 0)
        was_pending = sigismember(&pending, SIGXFSZ) == 1;
    n = writev(fd, parts, (int)n_parts);
    error = errno;
    if (n < 0 && error == EFBIG && !was_pending)
        while (sigtimedwait(&limit, NULL, &no_time) < 0 && errno == EINTR)
            ;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return n;
}

/* In place: the old contents stay until there is something to write. */
static int empty_first(kvt_snap_file *file)
{
    while (file->truncates) {
        if (ftruncate(file->fd, 0) == 0) {
            file->truncates = 0;
        } else if (errno != EINTR) {
            failed(file, "ftruncate");
            return -1;
        }
    }
    return 0;
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

int kvt_snap_file_write_parts(void *user, const kvt_snap_part *parts, size_t n_parts)
{
    kvt_snap_file *file = user;
    struct iovec left[WRITE_PARTS], *at;
    size_t i, n;

    if (empty_first(file))
        return -1;
    for (; n_parts; n_parts -= n, parts += n) {
        size_t here = n = n_parts < WRITE_PARTS ? n_parts : WRITE_PARTS;
        for (i = 0; i < n; i++) {
            left[i].iov_base = (void *)(uintptr_t)parts[i].data;
            left[i].iov_len = parts[i].bytes;
        }
        at = left;
        while (here) {
            ssize_t done = write_unsignalled(file->fd, at, here);
            if (done < 0 && (errno == EINTR || waits(file, POLLOUT)))
                continue;
            if (done <= 0) {
                if (done == 0)
                    errno = EIO; /* no progress and no reason */
                failed(file, "write");
                return -1;
            }
            advance(&at, &here, (size_t)done);
        }
    }
    return 0;
}

static int file_write(void *user, const void *data, size_t bytes)
{
    const unsigned char *at = data;

    while (bytes) {
        kvt_snap_part part = {at, bytes < PART_BYTES ? bytes : PART_BYTES};
        if (kvt_snap_file_write_parts(user, &part, 1))
            return -1;
        at += part.bytes;
        bytes -= part.bytes;
    }
    return 0;
}

void kvt_snap_file_of_fd(const kvt_snap_context *context, int fd, kvt_snap_file *file,
                         kvt_writer *writer, kvt_reader *reader)
{
    file_init(file, context);
    file->fd = fd;
    file->is_callers = 1;
    file->bytes = UINT64_MAX;
    if (writer) {
        writer->user = file;
        writer->write = file_write;
    }
    if (reader) { /* without a buffer: nothing behind the end is to be taken */
        reader->user = file;
        reader->read = fd_read;
    }
}

/* The file that is to be replaced or made: path, or what the link at path points to. */
static kvt_status set_target(kvt_snap_file *file, const char *path)
{
    struct stat status;

    if (strlen(path) >= sizeof file->target)
        return io_fail(file->context, "open", ENAMETOOLONG, path);
    memcpy(file->target, path, strlen(path) + 1);
    if (lstat(path, &status) != 0) /* what cannot be seen may be a link */
        return errno == ENOENT ? KVT_OK : io_fail(file->context, "lstat", errno, path);
    if (S_ISLNK(status.st_mode) && !realpath(path, file->target))
        return io_fail(file->context, "following the link", errno, path);
    return KVT_OK;
}

static size_t folder_bytes(const kvt_snap_file *file)
{
    return kvt_snap_folder_bytes(file->target);
}

/*
 * Open the target's folder, to sync it in the end. A folder that can be written but not read
 * cannot be synced: then it is left to the system.
 */
static kvt_status open_folder(kvt_snap_file *file, const char *path)
{
    size_t n = folder_bytes(file);
    char name[KVT_SNAP_PATH_BYTES + 1];

    memcpy(name, file->target, n);
    memcpy(name + n, ".", 2);
    file->folder = open_again(name, O_RDONLY | O_DIRECTORY, 0);
    if (file->folder < 0 && errno != EACCES)
        return io_fail(file->context, "opening its folder", errno, path);
    return KVT_OK;
}

/* Nobody can foretell it, and no two callers get the same: O_EXCL sees to what is left of that. */
static uint64_t random_number(int attempt)
{
    struct {
        uint64_t random;
        struct timespec now;
        const void *place; /* differs from thread to thread */
        long process, attempt;
    } seed;

    memset(&seed, 0, sizeof seed);
#if defined(__linux__)
    if (getrandom(&seed.random, sizeof seed.random, GRND_NONBLOCK) == (ssize_t)sizeof seed.random)
        return seed.random;
#endif
    (void)clock_gettime(CLOCK_REALTIME, &seed.now);
    seed.place = &seed;
    seed.process = (long)getpid();
    seed.attempt = attempt;
    return kvt_snap_sum(&seed, sizeof seed);
}

#define KEY_FORMAT ".kvtile-%016llx-"
#define KEY_BYTES 25 /* of a temporary's name: the part that names the target */
#define NAME_BYTES (KEY_BYTES + 20)

static void make_key(const kvt_snap_file *file, char *key)
{
    const char *name = file->target + folder_bytes(file);
    (void)snprintf(key, KEY_BYTES + 1, KEY_FORMAT,
                   (unsigned long long)kvt_snap_sum(name, strlen(name)));
}

static int lock_again(int fd)
{
    int answer;
    do
        answer = flock(fd, LOCK_EX | LOCK_NB);
    while (answer != 0 && errno == EINTR);
    return answer;
}

/* Lock a new temporary. 0: another save has taken it for one without a writer and removes it. */
static int claim(int fd)
{
    struct stat status;
    if (lock_again(fd) != 0 && errno == EWOULDBLOCK)
        return 0; /* other errors: no locks here, and only what can be locked is removed */
    return fstat(fd, &status) != 0 || status.st_nlink > 0;
}

/* Make the temporary beside the target. */
static kvt_status make_temporary(kvt_snap_file *file, const char *path, mode_t mode, int replaces)
{
    size_t folder = folder_bytes(file);
    char *name = file->temporary + folder, key[KEY_BYTES + 1];
    int attempt;

    if (folder + NAME_BYTES >= sizeof file->temporary)
        return io_fail(file->context, "creating a file in its folder", ENAMETOOLONG, path);
    memcpy(file->temporary, file->target, folder);
    make_key(file, key);
    for (attempt = 0; attempt < TEMPORARIES; attempt++) {
        (void)snprintf(name, NAME_BYTES + 1, "%s%016llx.tmp", key,
                       (unsigned long long)random_number(attempt));
        file->fd = open_again(file->temporary, O_WRONLY | O_CREAT | O_EXCL, mode);
        if (file->fd < 0 && errno != EEXIST)
            break;
        if (file->fd < 0)
            continue;
        file->exists = 1;
        if (claim(file->fd)) {
            /* A second descriptor keeps the lock: the first is closed before the rename. */
            file->lock = fcntl(file->fd, F_DUPFD_CLOEXEC, 0);
            return file->lock < 0 ? io_fail(file->context, "fcntl", errno, path) : KVT_OK;
        }
        (void)close(file->fd);
        (void)unlink(file->temporary);
        file->fd = -1;
        file->exists = 0;
        errno = EEXIST;
    }
    return io_fail_with(file->context, "creating a file in its folder", errno,
                        replaces && (errno == EACCES || errno == EROFS || errno == EPERM)
                            ? " (make the folder writable, or save with in_place)"
                            : "",
                        path);
}

/* Remove a temporary if no process has it locked. */
static void remove_if_stale(const char *name)
{
    int flags = O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, fd;
    struct stat status;

    if (lstat(name, &status) != 0 || !S_ISREG(status.st_mode))
        return;
    fd = open_again(name, O_RDWR | flags, 0); /* NFS locks only what can be written */
    if (fd < 0 && errno == EACCES)
        fd = open_again(name, O_RDONLY | flags, 0);
    if (fd < 0)
        return;
    if (lock_again(fd) == 0)
        (void)unlink(name);
    (void)close(fd);
}

/* The temporaries of this target whose writers have died. What cannot be seen or removed stays. */
static void remove_stale(const kvt_snap_file *file)
{
    size_t folder = folder_bytes(file);
    char name[KVT_SNAP_PATH_BYTES], key[KEY_BYTES + 1];
    struct dirent *entry;
    DIR *dir;

    memcpy(name, file->target, folder);
    memcpy(name + folder, ".", 2);
    dir = opendir(name);
    if (!dir)
        return;
    make_key(file, key);
    while ((entry = readdir(dir)) != NULL) {
        const char *end = entry->d_name + NAME_BYTES - 4;
        if (strlen(entry->d_name) == NAME_BYTES && memcmp(entry->d_name, key, KEY_BYTES) == 0 &&
            strcmp(end, ".tmp") == 0) {
            memcpy(name + folder, entry->d_name, NAME_BYTES + 1);
            if (strcmp(name, file->temporary) != 0)
                remove_if_stale(name);
        }
    }
    (void)closedir(dir);
}

/* Open the target itself. A new one is removed again if the save fails. */
static kvt_status open_in_place(kvt_snap_file *file, const char *path, int replaces)
{
    int flags = O_WRONLY | O_NONBLOCK | O_NOCTTY;
    struct stat status;

    file->in_place = 1;
    if (!replaces)
        flags |= O_CREAT | O_EXCL;
    file->fd = open_again(file->target, flags, 0666);
    if (file->fd < 0)
        return io_fail(file->context, "open", errno, path);
    file->exists = !replaces;
    file->truncates = replaces;
    memcpy(file->temporary, file->target, sizeof file->temporary);
    if (fstat(file->fd, &status) != 0)
        return io_fail(file->context, "fstat", errno, path);
    if (!S_ISREG(status.st_mode)) /* it has been exchanged meanwhile */
        return kvt_snap_fail(file->context, KVT_ERR_IO, "not a regular file: %s", path);
    return KVT_OK;
}

#if defined(__linux__)
/* The file that is replaced has the same list of access rights (ACL) as the new one: 1. */
static int keep_acl(const kvt_snap_file *file)
{
    static const char name[] = "system.posix_acl_access";
    char acl[1024];
    ssize_t n = getxattr(file->target, name, acl, sizeof acl);

    if (n > 0)
        return fsetxattr(file->fd, name, acl, (size_t)n, 0) == 0;
    if (n < 0 && errno == ERANGE)
        return 0;
    /* It has none; nor is the new file to have one that the folder gives to new files. */
    return fgetxattr(file->fd, name, NULL, 0) <= 0 || fremovexattr(file->fd, name) == 0;
}
#else
static int keep_acl(const kvt_snap_file *file)
{
    (void)file;
    return 1;
}
#endif

/*
 * A new file is its writer's alone until it has the group, the ACL and the permissions of the one
 * that it replaces. Where the group or the ACL cannot be kept, its group is another one, and gets
 * no more than everybody has.
 */
static kvt_status keep_access(const kvt_snap_file *file, const struct stat *old, const char *path)
{
    mode_t mode = old->st_mode & 0777;
    struct stat made;
    int kept;

    kept = (fstat(file->fd, &made) == 0 && made.st_gid == old->st_gid) ||
           fchown(file->fd, (uid_t)-1, old->st_gid) == 0;
    kept = keep_acl(file) && kept;
    if (!kept)
        mode &= ~(mode_t)070 | (mode & 07) << 3;
    if (fchmod(file->fd, mode) == 0)
        return KVT_OK;
    /* Some file systems have one owner and one mode for all files, and let nobody change them. */
    if (errno == EPERM && fstat(file->fd, &made) == 0 && !(made.st_mode & 0777 & ~mode))
        return KVT_OK;
    return io_fail(file->context, "fchmod", errno, path);
}

kvt_status kvt_snap_file_create(const kvt_snap_context *context, const char *path,
                                const kvt_save_options *options, kvt_snap_file *file,
                                kvt_writer *writer)
{
    struct stat status;
    kvt_status answer;
    int replaces;

    file_init(file, context);
    writer->user = file;
    writer->write = file_write;
    file->syncs = !options->no_fsync;
    answer = set_target(file, path);
    if (answer != KVT_OK)
        return answer;
    replaces = stat(file->target, &status) == 0;
    if (!replaces && errno != ENOENT) /* a file may be there whose permissions are to be kept */
        return io_fail(context, "stat", errno, path);
    if (replaces && !S_ISREG(status.st_mode)) {
        if (S_ISDIR(status.st_mode))
            return io_fail(context, "open", EISDIR, path);
        return kvt_snap_fail(context, KVT_ERR_IO,
                             "not a regular file, which a save would replace: %s", path);
    }
    if (file->syncs && !(options->in_place && replaces)) /* else its entries stay as they are */
        answer = open_folder(file, path);
    if (answer == KVT_OK && options->in_place)
        return open_in_place(file, path, replaces);
    if (answer == KVT_OK)
        answer = make_temporary(file, path, replaces ? status.st_mode & 0700 : 0666, replaces);
    if (answer == KVT_OK && replaces)
        answer = keep_access(file, &status, path);
    if (answer == KVT_OK)
        remove_stale(file); /* before the writing: they may take the room that it needs */
    return answer;
}

static int sync_again(int fd)
{
    int answer;
    do
        answer = fsync(fd);
    while (answer != 0 && errno == EINTR);
    return answer;
}

/* Some file systems cannot sync a folder, and say so in one of these ways. */
static int is_no_sync(int error)
{
    return error == EINVAL || error == EBADF || error == ENOSYS || error == EOPNOTSUPP;
}

kvt_status kvt_snap_file_commit(kvt_snap_file *file)
{
    int fd = file->fd;

    if (file->syncs && sync_again(fd) != 0) {
        failed(file, "fsync");
        return KVT_ERR_IO;
    }
    file->fd = -1;
    if (close(fd) != 0 && errno != EINTR) { /* network file systems report here */
        failed(file, "close");
        return KVT_ERR_IO;
    }
    if (!file->in_place && rename(file->temporary, file->target) != 0) {
        failed(file, "rename");
        return KVT_ERR_IO;
    }
    file->exists = 0;
    /* The new file is in place and sound. */
    if (file->folder >= 0 && sync_again(file->folder) != 0 && !is_no_sync(errno)) {
        failed(file, "fsync of the folder");
        return KVT_ERR_IO;
    }
    return KVT_OK;
}

void kvt_snap_file_close(kvt_snap_file *file)
{
    if (file->fd >= 0 && !file->is_callers)
        (void)close(file->fd);
    if (file->folder >= 0)
        (void)close(file->folder);
    if (file->exists)
        (void)unlink(file->temporary);
    if (file->lock >= 0) /* only now: no save may take the temporary for one without a writer */
        (void)close(file->lock);
    kvt_snap_release(file->context, &file->ahead);
    file->fd = file->folder = file->lock = -1;
    file->exists = 0;
}
