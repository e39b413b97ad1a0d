/*
 * The calls that the linker hands over, and what becomes of them.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "call_faults.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST_CALLS = 4096, MOST_FDS = 1024 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static call calls[MOST_CALLS];
static size_t n_calls;
static int armed, met, n_files;
static call_plan plan;
static call_kind planned_kind;
static struct {
    call_role role;
    int file;
} known[MOST_FDS];

int __wrap_open(const char *path, int flags, mode_t mode);
ssize_t __real_read(int fd, void *data, size_t n);
ssize_t __wrap_read(int fd, void *data, size_t n);
ssize_t __real_pread(int fd, void *data, size_t n, off_t at);
ssize_t __wrap_pread(int fd, void *data, size_t n, off_t at);
ssize_t __real_write(int fd, const void *data, size_t n);
ssize_t __wrap_write(int fd, const void *data, size_t n);
ssize_t __real_pwrite(int fd, const void *data, size_t n, off_t at);
ssize_t __wrap_pwrite(int fd, const void *data, size_t n, off_t at);
int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __real_close(int fd);
int __wrap_close(int fd);
int __real_rename(const char *from, const char *to);
int __wrap_rename(const char *from, const char *to);
int __real_unlink(const char *path);
int __wrap_unlink(const char *path);
int __real_ftruncate(int fd, off_t n);
int __wrap_ftruncate(int fd, off_t n);
int __real_fchmod(int fd, mode_t mode);
int __wrap_fchmod(int fd, mode_t mode);
int __real_fstat(int fd, struct stat *status);
int __wrap_fstat(int fd, struct stat *status);
int __real_stat(const char *path, struct stat *status);
int __wrap_stat(const char *path, struct stat *status);
int __real_lstat(const char *path, struct stat *status);
int __wrap_lstat(const char *path, struct stat *status);
int __real_openat(int folder, const char *path, int flags, ...);
int __wrap_openat(int folder, const char *path, int flags, mode_t mode);
int __real_renameat(int from_folder, const char *from, int to_folder, const char *to);
int __wrap_renameat(int from_folder, const char *from, int to_folder, const char *to);
int __real_unlinkat(int folder, const char *path, int flags);
int __wrap_unlinkat(int folder, const char *path, int flags);
int __real_fstatat(int folder, const char *path, struct stat *status, int flags);
int __wrap_fstatat(int folder, const char *path, struct stat *status, int flags);
int __real_mkdir(const char *path, mode_t mode);
int __wrap_mkdir(const char *path, mode_t mode);
int __real_mkdirat(int folder, const char *path, mode_t mode);
int __wrap_mkdirat(int folder, const char *path, mode_t mode);
int __real_futimens(int fd, const struct timespec times[2]);
int __wrap_futimens(int fd, const struct timespec times[2]);
int __real_flock(int fd, int operation);
int __wrap_flock(int fd, int operation);
int __real_fcntl(int fd, int command, long argument);
int __wrap_fcntl(int fd, int command, long argument);
ssize_t __real_getrandom(void *to, size_t n, unsigned flags);
ssize_t __wrap_getrandom(void *to, size_t n, unsigned flags);
void *__real_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t n);
int __wrap_munmap(void *at, size_t n);
DIR *__real_opendir(const char *path);
DIR *__wrap_opendir(const char *path);
DIR *__real_fdopendir(int fd);
DIR *__wrap_fdopendir(int fd);
struct dirent *__real_readdir(DIR *folder);
struct dirent *__wrap_readdir(DIR *folder);
char *__real_realpath(const char *path, char *to);
char *__wrap_realpath(const char *path, char *to);
void *__real_malloc(size_t n);
void *__wrap_malloc(size_t n);
void *__real_calloc(size_t n, size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__real_realloc(void *memory, size_t n);
void *__wrap_realloc(void *memory, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
void *__wrap_aligned_alloc(size_t alignment, size_t n);

/* ---- the plan ---- */

static void release(void)
{
    for (size_t i = 0; i < n_calls; i++)
        free(calls[i].data);
    n_calls = 0;
}

void calls_arm(const call_plan *p)
{
    release();
    plan = *p;
    met = n_files = 0;
    planned_kind = CALL_KINDS;
    memset(known, 0, sizeof known);
    armed = 1;
}

void calls_disarm(void)
{
    armed = 0;
}

const call *calls_made(size_t *n)
{
    *n = n_calls;
    return calls;
}

int calls_met(void)
{
    return met;
}

const char *call_name(call_kind kind)
{
    static const char *const names[CALL_KINDS] = {
        "open",    "read",    "pread",     "write",    "pwrite",       "fsync",     "close",
        "rename",  "unlink",  "ftruncate", "fchmod",   "fstat",        "stat",      "lstat",
        "fstatat", "mkdir",   "futimens",  "flock",    "fcntl",        "getrandom", "mmap",
        "munmap",  "opendir", "readdir",   "realpath", "an allocation"};
    return names[kind];
}

static int counts(call_kind kind)
{
    return armed && (kind == CALL_ALLOC) == (plan.counts_memory != 0);
}

/* Note a call; its fate. */
static call_fate take(call_kind kind, int fd, const char *path, const char *other, int flags,
                      const void *data, size_t n)
{
    call_fate fate = FATE_NONE;
    int error = plan.error;
    call *c;

    if (!counts(kind))
        return FATE_NONE;
    (void)pthread_mutex_lock(&lock);
    if (n_calls == MOST_CALLS)
        abort();
    c = &calls[n_calls];
    memset(c, 0, sizeof *c);
    c->kind = kind;
    c->file = -1;
    c->flags = flags;
    c->n = n;
    if (fd >= 0 && fd < MOST_FDS) {
        c->role = known[fd].role;
        c->file = known[fd].file;
    }
    if (path) {
        const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
        (void)snprintf(c->path, sizeof c->path, "%s", path);
        if (kind == CALL_OPEN)
            c->role = flags & O_DIRECTORY                 ? ROLE_FOLDER
                      : (flags & O_CREAT)                 ? ROLE_OUT
                      : strncmp(name, ".kvtile-", 8) == 0 ? ROLE_STALE
                      : (flags & O_ACCMODE) == O_RDONLY   ? ROLE_READ
                                                          : ROLE_OUT;
        else if (kind == CALL_LSTAT && strncmp(name, ".kvtile-", 8) == 0)
            c->role = ROLE_STALE;
    }
    if (other)
        (void)snprintf(c->other, sizeof c->other, "%s", other);
    if (data && plan.records) {
        c->data = __real_malloc(n ? n : 1);
        if (!c->data)
            abort();
        memcpy(c->data, data, n);
    }
    if (plan.at >= 0 && n_calls == (size_t)plan.at) {
        fate = plan.fate;
        planned_kind = kind;
        met = 1;
    } else if (kind == planned_kind && plan.times > 1) {
        plan.times--;
        fate = plan.fate;
    } else if (plan.also >> kind & 1) {
        fate = FATE_FAIL;
        error = EIO;
    }
    n_calls++;
    if (fate == FATE_FAIL)
        errno = error;
    (void)pthread_mutex_unlock(&lock);
    if (fate == FATE_KILL_BEFORE)
        (void)raise(SIGKILL);
    return fate;
}

static void after(call_fate fate)
{
    if (fate == FATE_KILL_AFTER || fate == FATE_KILL_AMID)
        (void)raise(SIGKILL);
}

static void remember(int fd, call_role role, int file)
{
    if (armed && fd >= 0 && fd < MOST_FDS) {
        known[fd].role = role;
        known[fd].file = file;
    }
}

/* A part of n bytes. */
static size_t part_of(call_fate fate, size_t n)
{
    return n > 1 && (fate == FATE_SHORT || fate == FATE_KILL_AMID) ? (n + 1) / 2 : n;
}

/* ---- the calls ---- */

int __wrap_openat(int folder, const char *path, int flags, mode_t mode)
{
    call_fate fate = take(CALL_OPEN, -1, path, NULL, flags, NULL, 0);
    int fd;
    if (fate == FATE_FAIL)
        return -1;
    fd = __real_openat(folder, path, flags, mode);
    if (counts(CALL_OPEN)) {
        calls[n_calls - 1].file = n_files;
        remember(fd, calls[n_calls - 1].role, n_files++);
    }
    after(fate);
    return fd;
}

int __wrap_open(const char *path, int flags, mode_t mode)
{
    return __wrap_openat(AT_FDCWD, path, flags, mode);
}

ssize_t __wrap_read(int fd, void *data, size_t n)
{
    call_fate fate = take(CALL_READ, fd, NULL, NULL, 0, NULL, n);
    ssize_t done;
    if (fate == FATE_FAIL || fate == FATE_END)
        return fate == FATE_FAIL ? -1 : 0;
    done = __real_read(fd, data, part_of(fate, n));
    after(fate);
    return done;
}

ssize_t __wrap_pread(int fd, void *data, size_t n, off_t at)
{
    call_fate fate = take(CALL_PREAD, fd, NULL, NULL, 0, NULL, n);
    ssize_t done;
    if (fate == FATE_FAIL || fate == FATE_END)
        return fate == FATE_FAIL ? -1 : 0;
    done = __real_pread(fd, data, part_of(fate, n), at);
    after(fate);
    return done;
}

ssize_t __wrap_write(int fd, const void *data, size_t n)
{
    call_fate fate = take(CALL_WRITE, fd, NULL, NULL, 0, data, n);
    ssize_t done;
    if (fate == FATE_FAIL || fate == FATE_END)
        return fate == FATE_FAIL ? -1 : 0;
    done = __real_write(fd, data, part_of(fate, n));
    after(fate);
    return done;
}

ssize_t __wrap_pwrite(int fd, const void *data, size_t n, off_t at)
{
    call_fate fate = take(CALL_PWRITE, fd, NULL, NULL, 0, data, n);
    ssize_t done;
    if (fate == FATE_FAIL || fate == FATE_END)
        return fate == FATE_FAIL ? -1 : 0;
    done = __real_pwrite(fd, data, part_of(fate, n), at);
    after(fate);
    return done;
}

/* One write of all parts; where it is short it ends amid one of them. */
ssize_t __wrap_writev(int fd, const struct iovec *parts, int n);
ssize_t __wrap_writev(int fd, const struct iovec *parts, int n)
{
    size_t bytes = 0;
    unsigned char *all, *at;
    ssize_t done;
    int error;

    for (int i = 0; i < n; i++)
        bytes += parts[i].iov_len;
    at = all = __real_malloc(bytes ? bytes : 1);
    if (!all)
        abort();
    for (int i = 0; i < n; at += parts[i++].iov_len)
        memcpy(at, parts[i].iov_base, parts[i].iov_len);
    done = __wrap_write(fd, all, bytes);
    error = errno;
    free(all);
    errno = error;
    return done;
}

/* A call that answers 0 or -1. */
#define PLAIN(kind, call)                                                                          \
    int answer;                                                                                    \
    if (fate == FATE_FAIL)                                                                         \
        return -1;                                                                                 \
    answer = fate == FATE_PRETEND ? 0 : call;                                                      \
    after(fate);                                                                                   \
    return answer

int __wrap_fsync(int fd)
{
    call_fate fate = take(CALL_FSYNC, fd, NULL, NULL, 0, NULL, 0);
    PLAIN(CALL_FSYNC, __real_fsync(fd));
}

int __wrap_close(int fd)
{
    call_fate fate = take(CALL_CLOSE, fd, NULL, NULL, 0, NULL, 0);
    int error = errno, answer = __real_close(fd);
    remember(fd, ROLE_NONE, -1);
    after(fate);
    if (fate == FATE_FAIL)
        errno = error;
    return fate == FATE_FAIL ? -1 : answer;
}

int __wrap_rename(const char *from, const char *to)
{
    call_fate fate = take(CALL_RENAME, -1, from, to, 0, NULL, 0);
    PLAIN(CALL_RENAME, __real_rename(from, to));
}

int __wrap_unlink(const char *path)
{
    call_fate fate = take(CALL_UNLINK, -1, path, NULL, 0, NULL, 0);
    PLAIN(CALL_UNLINK, __real_unlink(path));
}

int __wrap_renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    call_fate fate = take(CALL_RENAME, -1, from, to, 0, NULL, 0);
    PLAIN(CALL_RENAME, __real_renameat(from_folder, from, to_folder, to));
}

int __wrap_unlinkat(int folder, const char *path, int flags)
{
    call_fate fate = take(CALL_UNLINK, -1, path, NULL, flags, NULL, 0);
    PLAIN(CALL_UNLINK, __real_unlinkat(folder, path, flags));
}

int __wrap_fstatat(int folder, const char *path, struct stat *status, int flags)
{
    call_fate fate = take(CALL_FSTATAT, -1, path, NULL, flags, NULL, 0);
    PLAIN(CALL_FSTATAT, __real_fstatat(folder, path, status, flags));
}

int __wrap_mkdir(const char *path, mode_t mode)
{
    call_fate fate = take(CALL_MKDIR, -1, path, NULL, 0, NULL, 0);
    PLAIN(CALL_MKDIR, __real_mkdir(path, mode));
}

int __wrap_mkdirat(int folder, const char *path, mode_t mode)
{
    call_fate fate = take(CALL_MKDIR, -1, path, NULL, 0, NULL, 0);
    PLAIN(CALL_MKDIR, __real_mkdirat(folder, path, mode));
}

int __wrap_futimens(int fd, const struct timespec times[2])
{
    call_fate fate = take(CALL_FUTIMENS, fd, NULL, NULL, 0, NULL, 0);
    PLAIN(CALL_FUTIMENS, __real_futimens(fd, times));
}

int __wrap_ftruncate(int fd, off_t n)
{
    call_fate fate = take(CALL_FTRUNCATE, fd, NULL, NULL, 0, NULL, (size_t)n);
    PLAIN(CALL_FTRUNCATE, __real_ftruncate(fd, n));
}

int __wrap_fchmod(int fd, mode_t mode)
{
    call_fate fate = take(CALL_FCHMOD, fd, NULL, NULL, 0, NULL, 0);
    PLAIN(CALL_FCHMOD, __real_fchmod(fd, mode));
}

int __wrap_fstat(int fd, struct stat *status)
{
    call_fate fate = take(CALL_FSTAT, fd, NULL, NULL, 0, NULL, 0);
    PLAIN(CALL_FSTAT, __real_fstat(fd, status));
}

int __wrap_stat(const char *path, struct stat *status)
{
    call_fate fate = take(CALL_STAT, -1, path, NULL, 0, NULL, 0);
    PLAIN(CALL_STAT, __real_stat(path, status));
}

int __wrap_lstat(const char *path, struct stat *status)
{
    call_fate fate = take(CALL_LSTAT, -1, path, NULL, 0, NULL, 0);
    PLAIN(CALL_LSTAT, __real_lstat(path, status));
}

int __wrap_flock(int fd, int operation)
{
    call_fate fate = take(CALL_FLOCK, fd, NULL, NULL, operation, NULL, 0);
    PLAIN(CALL_FLOCK, __real_flock(fd, operation));
}

int __wrap_fcntl(int fd, int command, long argument)
{
    call_fate fate;
    int answer;
    if (command != F_DUPFD_CLOEXEC)
        return __real_fcntl(fd, command, argument);
    fate = take(CALL_FCNTL, fd, NULL, NULL, 0, NULL, 0);
    if (fate == FATE_FAIL)
        return -1;
    answer = __real_fcntl(fd, command, argument);
    remember(answer, ROLE_LOCK, -1);
    after(fate);
    return answer;
}

ssize_t __wrap_getrandom(void *to, size_t n, unsigned flags)
{
    call_fate fate = take(CALL_GETRANDOM, -1, NULL, NULL, 0, NULL, n);
    ssize_t answer;
    if (fate == FATE_FAIL)
        return -1;
    answer = __real_getrandom(to, n, flags);
    after(fate);
    return answer;
}

void *__wrap_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    call_fate fate = take(CALL_MMAP, fd, NULL, NULL, flags, NULL, n);
    void *answer;
    if (fate == FATE_FAIL)
        return MAP_FAILED;
    answer = __real_mmap(at, n, protection, flags, fd, offset);
    after(fate);
    return answer;
}

int __wrap_munmap(void *at, size_t n)
{
    call_fate fate = take(CALL_MUNMAP, -1, NULL, NULL, 0, NULL, n);
    int answer = __real_munmap(at, n);
    after(fate);
    return fate == FATE_FAIL ? -1 : answer;
}

DIR *__wrap_opendir(const char *path)
{
    call_fate fate = take(CALL_OPENDIR, -1, path, NULL, 0, NULL, 0);
    DIR *answer;
    if (fate == FATE_FAIL)
        return NULL;
    answer = __real_opendir(path);
    after(fate);
    return answer;
}

DIR *__wrap_fdopendir(int fd)
{
    call_fate fate = take(CALL_OPENDIR, fd, NULL, NULL, 0, NULL, 0);
    DIR *answer;
    if (fate == FATE_FAIL)
        return NULL;
    answer = __real_fdopendir(fd);
    after(fate);
    return answer;
}

struct dirent *__wrap_readdir(DIR *folder)
{
    call_fate fate = take(CALL_READDIR, -1, NULL, NULL, 0, NULL, 0);
    struct dirent *answer;
    if (fate == FATE_FAIL)
        return NULL;
    answer = __real_readdir(folder);
    after(fate);
    return answer;
}

char *__wrap_realpath(const char *path, char *to)
{
    call_fate fate = take(CALL_REALPATH, -1, path, NULL, 0, NULL, 0);
    char *answer;
    if (fate == FATE_FAIL)
        return NULL;
    answer = __real_realpath(path, to);
    after(fate);
    return answer;
}

/* ---- memory ---- */

void *__wrap_malloc(size_t n)
{
    return take(CALL_ALLOC, -1, NULL, NULL, 0, NULL, n) == FATE_FAIL ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    return take(CALL_ALLOC, -1, NULL, NULL, 0, NULL, n * bytes) == FATE_FAIL
               ? NULL
               : __real_calloc(n, bytes);
}

void *__wrap_realloc(void *memory, size_t n)
{
    return take(CALL_ALLOC, -1, NULL, NULL, 0, NULL, n) == FATE_FAIL ? NULL
                                                                     : __real_realloc(memory, n);
}

void *__wrap_aligned_alloc(size_t alignment, size_t n)
{
    return take(CALL_ALLOC, -1, NULL, NULL, 0, NULL, n) == FATE_FAIL
               ? NULL
               : __real_aligned_alloc(alignment, n);
}

void *calls_alloc(void *live, size_t bytes, size_t alignment)
{
    void *memory;
    if (take(CALL_ALLOC, -1, NULL, NULL, 0, NULL, bytes) == FATE_FAIL)
        return NULL;
    memory = __real_aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (memory)
        __atomic_fetch_add((long *)live, 1, __ATOMIC_RELAXED);
    return memory;
}

void calls_free(void *live, void *memory, size_t bytes)
{
    (void)bytes;
    if (memory)
        __atomic_fetch_sub((long *)live, 1, __ATOMIC_RELAXED);
    free(memory);
}
