/*
 * A file under its name, whole or not at all.
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
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* flock, getrandom */
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 /* realpath */
#endif

#include "src/snapshot/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/random.h>
#include <sys/xattr.h>
#endif

#define TEMPORARIES 100 /* names that are tried when others exist */

/* The file that is to be replaced or made: path, or what the link at path points to. */
static kvt_status set_target(kvt_snap_file *file, const char *path)
{
    struct stat status;

    if (strlen(path) >= sizeof file->target)
        return kvt_snap_io_fail(file->context, "open", ENAMETOOLONG, path);
    memcpy(file->target, path, strlen(path) + 1);
    if (lstat(path, &status) != 0) /* what cannot be seen may be a link */
        return errno == ENOENT ? KVT_OK : kvt_snap_io_fail(file->context, "lstat", errno, path);
    if (S_ISLNK(status.st_mode) && !realpath(path, file->target))
        return kvt_snap_io_fail(file->context, "following the link", errno, path);
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
    file->folder = kvt_snap_open_again(name, O_RDONLY | O_DIRECTORY, 0);
    if (file->folder < 0 && errno != EACCES)
        return kvt_snap_io_fail(file->context, "opening its folder", errno, path);
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
        return kvt_snap_io_fail(file->context, "creating a file in its folder", ENAMETOOLONG, path);
    memcpy(file->temporary, file->target, folder);
    make_key(file, key);
    for (attempt = 0; attempt < TEMPORARIES; attempt++) {
        (void)snprintf(name, NAME_BYTES + 1, "%s%016llx.tmp", key,
                       (unsigned long long)random_number(attempt));
        file->fd = kvt_snap_open_again(file->temporary, O_WRONLY | O_CREAT | O_EXCL, mode);
        if (file->fd < 0 && errno != EEXIST)
            break;
        if (file->fd < 0)
            continue;
        file->exists = 1;
        if (claim(file->fd)) {
            /* A second descriptor keeps the lock: the first is closed before the rename. */
            file->lock = fcntl(file->fd, F_DUPFD_CLOEXEC, 0);
            return file->lock < 0 ? kvt_snap_io_fail(file->context, "fcntl", errno, path) : KVT_OK;
        }
        (void)close(file->fd);
        (void)unlink(file->temporary);
        file->fd = -1;
        file->exists = 0;
        errno = EEXIST;
    }
    return kvt_snap_io_fail_with(file->context, "creating a file in its folder", errno,
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
    fd = kvt_snap_open_again(name, O_RDWR | flags, 0); /* NFS locks only what can be written */
    if (fd < 0 && errno == EACCES)
        fd = kvt_snap_open_again(name, O_RDONLY | flags, 0);
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
    file->fd = kvt_snap_open_again(file->target, flags, 0666);
    if (file->fd < 0)
        return kvt_snap_io_fail(file->context, "open", errno, path);
    file->exists = !replaces;
    file->truncates = replaces;
    memcpy(file->temporary, file->target, sizeof file->temporary);
    if (fstat(file->fd, &status) != 0)
        return kvt_snap_io_fail(file->context, "fstat", errno, path);
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
    return kvt_snap_io_fail(file->context, "fchmod", errno, path);
}

kvt_status kvt_snap_file_create(const kvt_snap_context *context, const char *path,
                                const kvt_save_options *options, kvt_snap_file *file,
                                kvt_writer *writer)
{
    struct stat status;
    kvt_status answer;
    int replaces;

    kvt_snap_file_init(file, context);
    writer->user = file;
    writer->write = kvt_snap_file_write;
    file->syncs = !options->no_fsync;
    answer = set_target(file, path);
    if (answer != KVT_OK)
        return answer;
    replaces = stat(file->target, &status) == 0;
    if (!replaces && errno != ENOENT) /* a file may be there whose permissions are to be kept */
        return kvt_snap_io_fail(context, "stat", errno, path);
    if (replaces && !S_ISREG(status.st_mode)) {
        if (S_ISDIR(status.st_mode))
            return kvt_snap_io_fail(context, "open", EISDIR, path);
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
        kvt_snap_file_failed(file, "fsync");
        return KVT_ERR_IO;
    }
    file->fd = -1;
    if (close(fd) != 0 && errno != EINTR) { /* network file systems report here */
        kvt_snap_file_failed(file, "close");
        return KVT_ERR_IO;
    }
    if (!file->in_place && rename(file->temporary, file->target) != 0) {
        kvt_snap_file_failed(file, "rename");
        return KVT_ERR_IO;
    }
    file->exists = 0;
    /* The new file is in place and sound. */
    if (file->folder >= 0 && sync_again(file->folder) != 0 && !is_no_sync(errno)) {
        kvt_snap_file_failed(file, "fsync of the folder");
        return KVT_ERR_IO;
    }
    return KVT_OK;
}
