/*
 * Files: whole or not at all.
 *
 * Writing goes to a temporary in the folder of the target (the same file system, so that rename is
 * atomic), named .kvtile-<process>-<number>.tmp and opened with O_EXCL; then fsync, rename over the
 * target, fsync of the folder. A process that dies in between leaves the temporary behind and
 * the target as it was. A symbolic link is followed: the file that it points to is replaced, the
 * link stays. A target that is no regular file (a device, a folder) is refused, since rename
 * would put a file in its place. The permissions of a replaced file are kept.
 *
 * Reading goes through a buffer, which a caller's stream must not have: nothing behind a
 * snapshot's end is taken from a stream.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 /* realpath */
#endif

#include "src/snapshot/format.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef PATH_MAX
#define PATH_MAX 4096
#endif

#define TEMPORARIES 1000             /* numbers that are tried when others exist */
#define PART_BYTES ((size_t)1 << 30) /* of one system call: some refuse more than 2 GiB */

static void file_init(kvt_snap_file *file, const kvt_snap_context *context)
{
    memset(file, 0, sizeof *file);
    file->context = context;
    file->fd = -1;
    file->folder = -1;
}

static kvt_status io_fail(const kvt_snap_context *context, const char *call, int error,
                          const char *path)
{
    return kvt_snap_fail(context, KVT_ERR_IO, "%s failed: %s: %s", call, strerror(error), path);
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
    return file->call ? io_fail(file->context, file->call, file->error, path) : KVT_OK;
}

static void failed(kvt_snap_file *file, const char *call)
{
    file->error = errno;
    file->call = call;
}

/* ---- reading ---- */

/* One read; -1 with the failure noted. */
static int64_t read_once(kvt_snap_file *file, void *to, size_t bytes)
{
    ssize_t n;
    do
        n = read(file->fd, to, bytes < PART_BYTES ? bytes : PART_BYTES);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        failed(file, "read");
    return n;
}

static int64_t file_read(void *user, void *data, size_t bytes)
{
    kvt_snap_file *file = user;

    if (file->begin == file->end) {
        int64_t n;
        if (bytes >= KVT_SNAP_AHEAD_BYTES)
            return read_once(file, data, bytes);
        n = read_once(file, file->ahead.data, KVT_SNAP_AHEAD_BYTES);
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

kvt_status kvt_snap_file_open(const kvt_snap_context *context, const char *path,
                              kvt_snap_file *file, kvt_reader *reader)
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
    reader->user = file;
    reader->read = file_read;
    return kvt_snap_reserve(context, &file->ahead, 0, KVT_SNAP_AHEAD_BYTES, "a file's buffer");
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

static int file_write(void *user, const void *data, size_t bytes)
{
    kvt_snap_file *file = user;
    const unsigned char *at = data;

    while (bytes) {
        ssize_t n = write(file->fd, at, bytes < PART_BYTES ? bytes : PART_BYTES);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            if (n == 0)
                errno = EIO; /* no progress and no reason */
            failed(file, "write");
            return -1;
        }
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

/* The file that is to be replaced or made: path, or what the link at path points to. */
static kvt_status set_target(kvt_snap_file *file, const char *path)
{
    char resolved[PATH_MAX];
    const char *target = path;
    struct stat status;
    kvt_status answer;
    size_t n;

    if (lstat(path, &status) == 0 && S_ISLNK(status.st_mode)) {
        if (!realpath(path, resolved))
            return io_fail(file->context, "following the link", errno, path);
        target = resolved;
    }
    n = strlen(target) + 1;
    answer = kvt_snap_reserve(file->context, &file->target, 0, n, "a file's name");
    if (answer == KVT_OK)
        memcpy(file->target.data, target, n);
    return answer;
}

/* Make the temporary beside the target. */
static kvt_status make_temporary(kvt_snap_file *file, const char *path, mode_t mode)
{
    const char *target = (const char *)file->target.data, *slash = strrchr(target, '/');
    size_t folder = slash ? (size_t)(slash - target) + 1 : 0, room = folder + 64;
    char *name;
    int number;
    kvt_status answer =
        kvt_snap_reserve(file->context, &file->temporary, 0, room, "a file's temporary name");

    if (answer != KVT_OK)
        return answer;
    name = (char *)file->temporary.data;
    memcpy(name, target, folder);
    memcpy(name + folder, ".", 2);
    file->folder =
        open_again(name, O_RDONLY | O_DIRECTORY, 0); /* may fail: then it is not synced */
    for (number = 0; number < TEMPORARIES; number++) {
        (void)snprintf(name + folder, room - folder, ".kvtile-%ld-%d.tmp", (long)getpid(), number);
        file->fd = open_again(name, O_WRONLY | O_CREAT | O_EXCL, mode);
        if (file->fd >= 0) {
            file->exists = 1;
            return KVT_OK;
        }
        if (errno != EEXIST)
            break;
    }
    return io_fail(file->context, "creating a file in its folder", errno, path);
}

kvt_status kvt_snap_file_create(const kvt_snap_context *context, const char *path,
                                kvt_snap_file *file, kvt_writer *writer)
{
    struct stat status;
    kvt_status answer;
    int replaces;

    file_init(file, context);
    answer = set_target(file, path);
    if (answer != KVT_OK)
        return answer;
    replaces = stat((const char *)file->target.data, &status) == 0;
    if (replaces && !S_ISREG(status.st_mode)) {
        if (S_ISDIR(status.st_mode))
            return io_fail(context, "open", EISDIR, path);
        return kvt_snap_fail(context, KVT_ERR_IO,
                             "not a regular file, which a save would replace: %s", path);
    }
    /* Never wider than what it replaces, not even for a moment; fchmod undoes the umask. */
    answer = make_temporary(file, path, replaces ? status.st_mode & 0777 : 0666);
    if (answer == KVT_OK && replaces && fchmod(file->fd, status.st_mode & 0777) != 0)
        answer = io_fail(context, "fchmod", errno, path);
    writer->user = file;
    writer->write = file_write;
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

kvt_status kvt_snap_file_commit(kvt_snap_file *file, int no_fsync)
{
    int fd = file->fd;

    if (!no_fsync && sync_again(fd) != 0) {
        failed(file, "fsync");
        return KVT_ERR_IO;
    }
    file->fd = -1;
    if (close(fd) != 0 && errno != EINTR) { /* network file systems report here */
        failed(file, "close");
        return KVT_ERR_IO;
    }
    if (rename((const char *)file->temporary.data, (const char *)file->target.data) != 0) {
        failed(file, "rename");
        return KVT_ERR_IO;
    }
    file->exists = 0;
    /* The new file is in place and sound. Some file systems cannot sync a folder: EINVAL. */
    if (!no_fsync && file->folder >= 0 && sync_again(file->folder) != 0 && errno == EIO) {
        failed(file, "fsync of the folder");
        return KVT_ERR_IO;
    }
    return KVT_OK;
}

void kvt_snap_file_close(kvt_snap_file *file)
{
    if (file->fd >= 0)
        (void)close(file->fd);
    if (file->folder >= 0)
        (void)close(file->folder);
    if (file->exists)
        (void)unlink((const char *)file->temporary.data);
    kvt_snap_release(file->context, &file->target);
    kvt_snap_release(file->context, &file->temporary);
    kvt_snap_release(file->context, &file->ahead);
    file->fd = file->folder = -1;
    file->exists = 0;
}
