/*
 * Files: paths, reading, writing. How a file is replaced is in replace.c.
 *
 * Reading goes through a buffer, which a caller's stream must not have: nothing behind a
 * snapshot's end is taken from a stream.
 */
#include "src/snapshot/file.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LARGE_BYTES ((size_t)1 << 16) /* is read past the buffer */
#define SMALL_BYTES ((size_t)1 << 12)
#define WRITE_PARTS 64               /* of one call: POSIX has 16 at least, Linux 1024 */
#define PART_BYTES ((size_t)1 << 30) /* of one system call: some refuse more than 2 GiB */

void kvt_snap_file_init(kvt_snap_file *file, const kvt_snap_context *context)
{
    memset(file, 0, sizeof *file);
    file->context = context;
    file->fd = -1;
    file->folder = -1;
    file->lock = -1;
}

kvt_status kvt_snap_io_fail_with(const kvt_snap_context *context, const char *call, int error,
                                 const char *advice, const char *path)
{
    return kvt_snap_fail(context, KVT_ERR_IO, "%s failed: %s%s: %s", call, strerror(error), advice,
                         path);
}

kvt_status kvt_snap_io_fail(const kvt_snap_context *context, const char *call, int error,
                            const char *path)
{
    return kvt_snap_io_fail_with(context, call, error, "", path);
}

int kvt_snap_open_again(const char *path, int flags, mode_t mode)
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
        return kvt_snap_io_fail(file->context, "read", part, path);
    return !file->call
               ? KVT_OK
               : kvt_snap_io_fail_with(file->context, file->call, file->error,
                                       is_mount
                                           ? " (the file is a mount point, which cannot be "
                                             "replaced: mount its folder, or save with in_place)"
                                           : "",
                                       path);
}

void kvt_snap_file_failed(kvt_snap_file *file, const char *call)
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
    (void)kvt_snap_io_fail(context, "stat", errno, path);
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
        (void)kvt_snap_io_fail(file->context, "fstat", errno, path ? path : "the file descriptor");
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
        kvt_snap_file_failed(file, "read");
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

    kvt_snap_file_init(file, context);
    file->fd = kvt_snap_open_again(path, O_RDONLY, 0);
    if (file->fd < 0)
        return kvt_snap_io_fail(context, "open", errno, path);
    if (fstat(file->fd, &status) != 0)
        return kvt_snap_io_fail(context, "fstat", errno, path);
    if (S_ISDIR(status.st_mode))
        return kvt_snap_io_fail(context, "open", EISDIR, path);
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

    kvt_snap_file_init(file, context);
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
        kvt_snap_file_failed(file, "pread");
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
        return kvt_snap_io_fail(file->context, "mmap", errno, path);
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
            kvt_snap_file_failed(file, "ftruncate");
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
                kvt_snap_file_failed(file, "write");
                return -1;
            }
            advance(&at, &here, (size_t)done);
        }
    }
    return 0;
}

int kvt_snap_file_write(void *user, const void *data, size_t bytes)
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
    kvt_snap_file_init(file, context);
    file->fd = fd;
    file->is_callers = 1;
    file->bytes = UINT64_MAX;
    if (writer) {
        writer->user = file;
        writer->write = kvt_snap_file_write;
    }
    if (reader) { /* without a buffer: nothing behind the end is to be taken */
        reader->user = file;
        reader->read = fd_read;
    }
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
