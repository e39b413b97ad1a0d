/*
 * The directory store: its lock, and the counts that are kept under it.
 *
 * Whoever renames or removes files of values holds flock on PATH/kvtile-store, which has the bound
 * and what is in the directory. Each turn opens that file anew: a lock is that of an open file
 * description, so it excludes threads and stores of one process as well as processes. The end of
 * the turn drops it; where its process is killed before, the kernel does, with the last copy of the
 * descriptor. A child that was forked amid the turn has one until it ends or calls exec. (To close
 * it there would take a list of the process's locks and a handler of fork.)
 *
 * A process that ends amid a turn must not leave wrong counts. So before the first change the file
 * is marked dirty, and after the last one it gets the new counts without the mark. Who takes the
 * lock and finds the mark counts anew, by a scan. A value is renamed to its name only when there is
 * room for it, so at no point are there more bytes than the bound, but for temporaries, of which a
 * process has one for each thread that puts. Counts may also be wrong after a power cut: a file
 * system orders nothing without fsync. So the file has the number of the system's start, and an
 * opening under another one counts anew.
 *
 * flock has no time limit: the lock is tried in turn, with pauses. Who holds it may need long for a
 * scan, on a disk that is cold: every second it writes the file, with another number of the turn. A
 * process that waits gives up when that has not changed for WAIT_SECONDS (it was stopped), or after
 * WAIT_MOST_SECONDS in all. Having given up it keeps the number: later calls fail at once as long
 * as it is still that, for STOPPED_SECONDS; who goes on, counting a large store anew, is waited for
 * by them for no more than BUSY_SECONDS. A get does not need the lock.
 *
 * If the file is removed with all others (rm -r PATH/?*), it is made again by the next turn.
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
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define WAIT_SECONDS 10
#define WAIT_MOST_SECONDS 60
#define STOPPED_SECONDS 60
#define BUSY_SECONDS 2
#define PAUSE_NANOSECONDS 20000
#define PAUSE_MOST_NANOSECONDS 1000000
#define ATTEMPTS 100
#define VERSION 1

static const char magic[8] = {'K', 'V', 'T', 'S', 'T', 'O', 'R', 'E'};

/* The state file. What cannot be had again by counting has a sum of its own. */
typedef struct state_file {
    char magic[8];
    uint32_t version;
    uint32_t is_dirty;
    uint64_t max_bytes;
    uint64_t bound_sum; /* of max_bytes */
    uint64_t bytes, n_values, boot, turn;
    uint64_t sum; /* of all before */
} state_file;

/* FNV-1a, 64 bits. */
static uint64_t sum_of(const void *data, size_t bytes)
{
    const unsigned char *at = data;
    uint64_t sum = 0xcbf29ce484222325u;
    for (; bytes; bytes--)
        sum = (sum ^ *at++) * 0x100000001b3u;
    return sum;
}

static int64_t now_seconds(void)
{
    struct timespec now = {0, 0};
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec;
}

/* ---- the file ---- */

/* UNSURE: only the bound is known. DAMAGED: not even that. */
typedef enum reading { SOUND, UNSURE, FRESH, DAMAGED, NEWER, FOREIGN, FAILED } reading;

static reading read_file(int fd, state_file *file)
{
    static const state_file zero;
    size_t have = 0;
    ssize_t n = 1;

    memset(file, 0, sizeof *file);
    while (have < sizeof *file && n != 0) {
        n = pread(fd, (char *)file + have, sizeof *file - have, (off_t)have);
        if (n < 0 && errno != EINTR)
            return FAILED;
        have += n > 0 ? (size_t)n : 0;
    }
    /* Empty: its process has ended before it wrote. Zeros: a power cut. */
    if (memcmp(file, &zero, sizeof zero) == 0)
        return FRESH;
    if (memcmp(file->magic, magic, sizeof magic) != 0)
        return FOREIGN;
    if (file->version > VERSION)
        return NEWER;
    if (file->version != VERSION ||
        file->bound_sum != sum_of(&file->max_bytes, sizeof file->max_bytes))
        return DAMAGED;
    return have == sizeof *file && file->sum == sum_of(file, offsetof(state_file, sum)) ? SOUND
                                                                                        : UNSURE;
}

static int write_all(int fd, const state_file *file)
{
    size_t done = 0;

    while (done < sizeof *file) {
        ssize_t n = pwrite(fd, (const char *)file + done, sizeof *file - done, (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0)
            errno = EIO;
        if (n <= 0)
            return -1;
        done += (size_t)n;
    }
    return 0;
}

static int write_file(kvt_dir_lock *lock, int is_dirty)
{
    kvt_dir_limit limit;
    state_file file;
    int answer;

    memset(&file, 0, sizeof file);
    memcpy(file.magic, magic, sizeof magic);
    file.version = VERSION;
    file.is_dirty = (uint32_t)is_dirty;
    file.max_bytes = lock->max_bytes;
    file.bound_sum = sum_of(&file.max_bytes, sizeof file.max_bytes);
    file.bytes = lock->bytes;
    file.n_values = lock->n_values;
    file.boot = lock->boot;
    file.turn = ++lock->turn;
    file.sum = sum_of(&file, offsetof(state_file, sum));
    kvt_dir_limit_enter(&limit);
    answer = write_all(lock->fd, &file);
    kvt_dir_limit_leave(&limit, answer);
    if (answer)
        return -1;
    lock->is_dirty = is_dirty;
    return 0;
}

/* ---- the lock ---- */

static void let_go(kvt_dir_lock *lock)
{
    (void)flock(lock->fd, LOCK_UN); /* also where a fork meanwhile has copied the descriptor */
    (void)close(lock->fd);
    lock->fd = -1;
}

/* Whether who has the lock is known to have stopped in a turn. */
static int has_stopped(const kvt_dir *dir, uint64_t turn, int64_t now)
{
    return now < __atomic_load_n(&dir->stopped_until, __ATOMIC_RELAXED) &&
           turn == __atomic_load_n(&dir->stopped_turn, __ATOMIC_RELAXED);
}

static void note_stopped(kvt_dir *dir, uint64_t turn, int64_t until)
{
    __atomic_store_n(&dir->stopped_turn, turn, __ATOMIC_RELAXED);
    __atomic_store_n(&dir->stopped_until, until, __ATOMIC_RELAXED);
}

/* 0, or an error number; ETIMEDOUT. */
static int wait_for(kvt_dir *dir, int fd)
{
    int64_t start = now_seconds(), last = start;
    struct timespec pause = {0, PAUSE_NANOSECONDS};
    uint64_t turn = 0;

    for (;;) {
        int64_t now;
        if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
            note_stopped(dir, 0, INT64_MIN);
            __atomic_store_n(&dir->busy_until, INT64_MIN, __ATOMIC_RELAXED);
            return 0;
        }
        if (errno != EWOULDBLOCK && errno != EINTR)
            return errno;
        now = now_seconds();
        if (pause.tv_nsec >= PAUSE_MOST_NANOSECONDS) {
            state_file file;
            (void)read_file(fd, &file);
            last = file.turn != turn ? now : last;
            turn = file.turn;
            if (has_stopped(dir, turn, now))
                return ETIMEDOUT;
            if (now - last >= WAIT_SECONDS)
                note_stopped(dir, turn, now + STOPPED_SECONDS);
        }
        if (now - start >= WAIT_MOST_SECONDS)
            __atomic_store_n(&dir->busy_until, now + STOPPED_SECONDS, __ATOMIC_RELAXED);
        if (now - last >= WAIT_SECONDS || now - start >= WAIT_MOST_SECONDS ||
            (now - start >= BUSY_SECONDS &&
             now < __atomic_load_n(&dir->busy_until, __ATOMIC_RELAXED)))
            return ETIMEDOUT;
        (void)nanosleep(&pause, NULL);
        pause.tv_nsec =
            pause.tv_nsec * 2 < PAUSE_MOST_NANOSECONDS ? pause.tv_nsec * 2 : PAUSE_MOST_NANOSECONDS;
    }
}

/* The state file, open and locked; it is still the one of that name. */
static kvt_status open_locked(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error)
{
    int flags =
        (dir->reads_only ? O_RDONLY : O_RDWR | O_CREAT) | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;
    int attempt, number;
    struct stat status;

    for (attempt = 0; attempt < ATTEMPTS; attempt++) {
        lock->fd = kvt_dir_openat(dir->fd, KVT_DIR_STATE_NAME, flags, 0600);
        if (lock->fd < 0)
            return kvt_dir_fail(dir, error, "open", errno, KVT_DIR_STATE_NAME);
        number = wait_for(dir, lock->fd);
        if (number) {
            (void)close(lock->fd);
            return number != ETIMEDOUT
                       ? kvt_dir_fail(dir, error, "flock", number, KVT_DIR_STATE_NAME)
                       : kvt_store_fail(
                             error, KVT_ERR_IO,
                             "another process has the store locked, and has not released it: %s",
                             dir->path);
        }
        if (fstat(lock->fd, &status) != 0) {
            number = errno;
            let_go(lock);
            return kvt_dir_fail(dir, error, "fstat", number, KVT_DIR_STATE_NAME);
        }
        if (status.st_nlink > 0)
            return KVT_OK;
        let_go(lock); /* it has been removed meanwhile */
    }
    return kvt_store_fail(error, KVT_ERR_IO, "the file " KVT_DIR_STATE_NAME " does not stay: %s",
                          dir->path);
}

/* What the file says is the lock's; whether counts may be wrong. */
static kvt_status read_state(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error)
{
    state_file file;
    reading what = read_file(lock->fd, &file);

    if (what == FAILED)
        return kvt_dir_fail(dir, error, "read", errno, KVT_DIR_STATE_NAME);
    if (what == FOREIGN)
        return kvt_store_fail(error, KVT_ERR_FORMAT,
                              "the file " KVT_DIR_STATE_NAME " is another program's: %s",
                              dir->path);
    if (what == NEWER)
        return kvt_store_fail(error, KVT_ERR_FORMAT,
                              "the store has version %u, this library knows %u: %s",
                              (unsigned)file.version, (unsigned)VERSION, dir->path);
    lock->turn = file.turn;
    lock->is_dirty = what != SOUND || file.is_dirty;
    if (what == SOUND) {
        lock->bytes = file.bytes;
        lock->n_values = file.n_values;
        lock->boot = file.boot;
    }
    if (what == SOUND || what == UNSURE) {
        lock->max_bytes = file.max_bytes;
        __atomic_store_n(&dir->max_bytes, file.max_bytes, __ATOMIC_RELAXED);
        return KVT_OK;
    }
    /* Its entry is new, too. */
    for (size_t i = 0; what == FRESH && i < sizeof dir->synced; i++)
        __atomic_store_n(&dir->synced[i], 0, __ATOMIC_RELAXED);
    lock->max_bytes = __atomic_load_n(&dir->max_bytes, __ATOMIC_RELAXED);
    return what == FRESH || lock->max_bytes
               ? KVT_OK
               : kvt_store_fail(error, KVT_ERR_FORMAT,
                                "the file " KVT_DIR_STATE_NAME " is damaged (open the store with "
                                "max_bytes set to make it anew): %s",
                                dir->path);
}

kvt_status kvt_dir_lock_take(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error)
{
    kvt_status status;

    memset(lock, 0, sizeof *lock);
    status = open_locked(dir, lock, error);
    if (status != KVT_OK)
        return status;
    status = read_state(dir, lock, error);
    lock->told_seconds = now_seconds();
    if (status == KVT_OK && lock->is_dirty) {
        if (dir->reads_only) /* it changes nothing, and cannot say that it goes on */
            (void)flock(lock->fd, LOCK_UN);
        status = kvt_dir_recount(dir, lock, error);
    }
    if (status != KVT_OK)
        let_go(lock); /* and the file stays as it is */
    return status;
}

kvt_status kvt_dir_lock_change(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error)
{
    if (dir->reads_only)
        return kvt_store_fail(error, KVT_ERR_IO, "there is no permission to change the store: %s",
                              dir->path);
    return lock->is_dirty || write_file(lock, 1) == 0
               ? KVT_OK
               : kvt_dir_fail(dir, error, "write", errno, KVT_DIR_STATE_NAME);
}

void kvt_dir_lock_drop(kvt_dir *dir, kvt_dir_lock *lock)
{
    if (lock->is_dirty && !dir->reads_only)
        (void)write_file(lock, 0); /* else it stays dirty, and the next one counts */
    let_go(lock);
}

void kvt_dir_progress(kvt_dir *dir, kvt_dir_lock *lock)
{
    int64_t now = now_seconds();

    if (dir->reads_only || now == lock->told_seconds)
        return;
    lock->told_seconds = now;
    (void)write_file(lock, 1);
}

/* ---- opening ---- */

/* A number of the system's start; 0: unknown. */
static uint64_t boot_number(void)
{
    char text[64];
    int fd = kvt_dir_openat(AT_FDCWD, "/proc/sys/kernel/random/boot_id", O_RDONLY, 0);
    ssize_t n;

    if (fd < 0)
        return 0;
    do
        n = read(fd, text, sizeof text);
    while (n < 0 && errno == EINTR);
    (void)close(fd);
    return n > 0 ? sum_of(text, (size_t)n) : 0;
}

/* 1: there is nothing in the directory; 0: there is; -1: errno says why nobody knows. */
static int is_empty(const kvt_dir *dir)
{
    int fd = kvt_dir_openat(dir->fd, ".", O_RDONLY | O_DIRECTORY, 0), empty = 1, number;
    DIR *stream = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;

    if (!stream) {
        number = errno;
        if (fd >= 0)
            (void)close(fd);
        errno = number;
        return -1;
    }
    errno = 0;
    while (empty > 0 && (entry = readdir(stream)) != NULL)
        empty = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
    number = errno;
    (void)closedir(stream);
    errno = number;
    return number ? -1 : empty;
}

/*
 * Whether there is a state file, or a new one may be made; whether it can be written. It is made by
 * the first turn.
 */
static kvt_status look(kvt_dir *dir, kvt_store_error *error)
{
    int flags = O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, attempt, fd = -1, empty, number = 0;
    struct stat status;

    for (attempt = 0; attempt < 2; attempt++) {
        fd = kvt_dir_openat(dir->fd, KVT_DIR_STATE_NAME, O_RDWR | flags, 0);
        if (fd < 0 && (errno == EACCES || errno == EROFS || errno == EPERM)) {
            dir->reads_only = 1;
            fd = kvt_dir_openat(dir->fd, KVT_DIR_STATE_NAME, O_RDONLY | flags, 0);
        }
        number = fd < 0 ? errno : 0;
        if (number != ENOENT)
            break;
        empty = is_empty(dir);
        if (empty < 0)
            return kvt_dir_fail(dir, error, "readdir", errno, "");
        if (empty)
            return KVT_OK;
        /* Not empty: another process may have made it meanwhile. */
    }
    if (number == ENOENT || number == ELOOP || number == EISDIR || number == ENXIO)
        return kvt_store_fail(error, KVT_ERR_FORMAT, "the directory is not empty, and no store: %s",
                              dir->path);
    if (fd < 0)
        return kvt_dir_fail(dir, error, "open", number, KVT_DIR_STATE_NAME);
    attempt = fstat(fd, &status) == 0 && !S_ISREG(status.st_mode);
    (void)close(fd);
    return attempt ? kvt_store_fail(error, KVT_ERR_FORMAT,
                                    KVT_DIR_STATE_NAME " is not a regular file: %s", dir->path)
                   : KVT_OK;
}

kvt_status kvt_dir_state_open(kvt_dir *dir, uint64_t max_bytes, kvt_store_error *error)
{
    kvt_status status = look(dir, error);
    uint64_t boot = boot_number();
    kvt_dir_lock lock;

    if (status != KVT_OK)
        return status;
    dir->max_bytes = max_bytes; /* of a new one */
    status = kvt_dir_lock_take(dir, &lock, error);
    if (status != KVT_OK || dir->reads_only) {
        if (status == KVT_OK)
            kvt_dir_lock_drop(dir, &lock);
        return status;
    }
    if (lock.boot != boot || (max_bytes && lock.max_bytes != max_bytes)) {
        status = kvt_dir_lock_change(dir, &lock, error);
        if (status == KVT_OK && lock.boot != boot)
            status = kvt_dir_recount(dir, &lock, error);
        if (status != KVT_OK) {
            let_go(&lock);
            return status;
        }
        lock.boot = boot;
        lock.max_bytes = max_bytes ? max_bytes : lock.max_bytes;
        __atomic_store_n(&dir->max_bytes, lock.max_bytes, __ATOMIC_RELAXED);
        if (dir->syncs && write_file(&lock, 1) == 0) /* the bound is to outlast a power cut */
            (void)kvt_dir_sync(lock.fd);
    }
    if (lock.max_bytes && lock.bytes > lock.max_bytes) {
        kvt_store_error ignored; /* a put will do it, or say why not */
        (void)kvt_dir_evict(dir, &lock, lock.max_bytes, NULL, 0, NULL, &ignored);
    }
    kvt_dir_lock_drop(dir, &lock);
    kvt_dir_sweep(dir);
    return KVT_OK;
}
