/*
 * The directory store: what goes through all values.
 *
 * Eviction is by a scan of all names, sizes and times of use, under the lock; there is no list of
 * them in memory, which would have to be the same in all processes. A scan costs as much as the
 * store has values (about 1.5 us each where the kernel has their inodes in memory). So it evicts
 * 1/32 of the bound at least, and costs a put of a full store as much as 32 values take in the
 * scan, however many there are. What it evicts is in a heap of the values seen so far that were
 * used the longest time ago, with the newest of them on top, which is replaced when an older one
 * comes.
 *
 * A get does not need the lock, so a value may be used between the scan and its removal: it is
 * looked at once more, and stays if its time has changed.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "src/store/directory.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCHES 32       /* of the bound, that a scan evicts one of */
#define SCANS 4          /* of one eviction, at most */
#define CLOCK_SECONDS 60 /* by which clocks of machines may differ */

/* ---- a scan ---- */

typedef struct scan {
    kvt_dir *dir;
    kvt_dir_lock *lock;
    int (*on_value)(void *user, const kvt_store_key *key, const struct stat *status);
    void *user;
    int ended;
    kvt_store_error *error;
} scan;

/* The entries of a folder; NULL: it has failed, or with KVT_OK there is no such folder. */
static DIR *open_stream(const scan *s, const char *name, kvt_status *status)
{
    int fd = kvt_dir_openat(s->dir->fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0), number;
    DIR *stream = fd < 0 ? NULL : fdopendir(fd);

    *status = KVT_OK;
    number = errno;
    if (stream || (fd < 0 && (number == ENOENT || number == ENOTDIR || number == ELOOP)))
        return stream;
    if (fd >= 0)
        (void)close(fd);
    *status = kvt_dir_fail(s->dir, s->error, fd < 0 ? "open" : "fdopendir", number, name);
    return NULL;
}

static kvt_status close_stream(const scan *s, DIR *stream, const char *name, int number)
{
    (void)closedir(stream);
    return number ? kvt_dir_fail(s->dir, s->error, "readdir", number, name) : KVT_OK;
}

static kvt_status scan_folder(scan *s, const char *folder)
{
    struct dirent *entry;
    kvt_status failed;
    DIR *stream = open_stream(s, folder, &failed);

    if (!stream)
        return failed;
    for (errno = 0; !s->ended && (entry = readdir(stream)) != NULL; errno = 0) {
        struct stat status;
        kvt_store_key key;
        if (!kvt_dir_key(folder, entry->d_name, &key))
            continue;
        if (fstatat(dirfd(stream), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) {
            if (errno == ENOENT) /* removed meanwhile */
                continue;
            failed = kvt_dir_fail(s->dir, s->error, "fstatat", errno, entry->d_name);
            (void)closedir(stream); /* and the entry with it */
            return failed;
        }
        if (S_ISREG(status.st_mode))
            s->ended = s->on_value(s->user, &key, &status) != 0;
        if (s->lock) /* a folder may take long: a cold disk has a seek for each value */
            kvt_dir_progress(s->dir, s->lock);
    }
    return close_stream(s, stream, folder, s->ended ? 0 : errno);
}

kvt_status kvt_dir_scan(kvt_dir *dir, kvt_dir_lock *lock,
                        int (*on_value)(void *user, const kvt_store_key *key,
                                        const struct stat *status),
                        void *user, kvt_store_error *error)
{
    scan s = {dir, lock, on_value, user, 0, error};
    kvt_status status;
    struct dirent *entry;
    int number;
    DIR *stream = open_stream(&s, ".", &status);

    if (!stream) /* "." is there as long as dir->fd is open */
        return status;
    while (!s.ended && status == KVT_OK && (errno = 0, entry = readdir(stream)) != NULL) {
        const char *name = entry->d_name;
        if (strlen(name) != 2 || strspn(name, "0123456789abcdef") != 2)
            continue;
        status = scan_folder(&s, name);
    }
    number = s.ended || status != KVT_OK ? 0 : errno;
    if (status != KVT_OK) {
        (void)closedir(stream);
        return status;
    }
    return close_stream(&s, stream, "", number);
}

/* ---- counting ---- */

typedef struct count {
    uint64_t bytes, n_values;
} count;

static int count_value(void *user, const kvt_store_key *key, const struct stat *status)
{
    count *c = user;
    (void)key;
    c->bytes += (uint64_t)status->st_size;
    c->n_values++;
    return 0;
}

kvt_status kvt_dir_recount(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error)
{
    count all = {0, 0};
    kvt_status status;

    if (!dir->reads_only)
        kvt_dir_sweep(dir);
    status = kvt_dir_scan(dir, lock, count_value, &all, error);
    if (status == KVT_OK) {
        lock->bytes = all.bytes;
        lock->n_values = all.n_values;
    }
    return status;
}

/* ---- eviction ---- */

typedef struct old_value {
    struct timespec used;
    int is_future; /* so it says */
    uint64_t bytes;
    kvt_store_key key;
} old_value;

typedef struct eviction {
    count all;
    const kvt_store_key *keys; /* [n_keys]: not these */
    size_t n_keys;
    const kvt_dir_use *use; /* nor the beginning of its prompt; or NULL */
    int64_t latest;         /* second that is not in the future */
    uint64_t wanted;        /* bytes to evict */
    old_value *values;      /* the heap */
    size_t n, room;
    uint64_t bytes; /* of them */
    int out_of_memory;
} eviction;

/*
 * Below 0: a was used before b. A time in the future is of a clock that was wrong: nobody knows
 * when such a value was used, and it would outlast all others.
 */
static int compare(const old_value *a, const old_value *b)
{
    if (a->is_future != b->is_future)
        return a->is_future ? -1 : 1;
    if (a->used.tv_sec != b->used.tv_sec)
        return a->used.tv_sec < b->used.tv_sec ? -1 : 1;
    if (a->used.tv_nsec != b->used.tv_nsec)
        return a->used.tv_nsec < b->used.tv_nsec ? -1 : 1;
    return memcmp(a->key.bytes, b->key.bytes, sizeof a->key.bytes);
}

static int compare_to_sort(const void *a, const void *b)
{
    return compare(a, b);
}

static void push(eviction *e, const old_value *value)
{
    size_t at = e->n++;

    while (at > 0 && compare(&e->values[(at - 1) / 2], value) < 0) {
        e->values[at] = e->values[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    e->values[at] = *value;
    e->bytes += value->bytes;
}

/* Take the newest away. */
static void pop(eviction *e)
{
    const old_value *last = &e->values[e->n - 1];
    size_t at = 0, below;

    e->bytes -= e->values[0].bytes;
    e->n--;
    while ((below = 2 * at + 1) < e->n) {
        if (below + 1 < e->n && compare(&e->values[below], &e->values[below + 1]) < 0)
            below++;
        if (compare(&e->values[below], last) <= 0)
            break;
        e->values[at] = e->values[below];
        at = below;
    }
    e->values[at] = *last;
}

static int is_kept(const eviction *e, const kvt_store_key *key, struct timespec used)
{
    size_t i;
    if (e->use && e->use->is_asked && kvt_dir_is_later(used, e->use->time) &&
        !kvt_dir_is_later(used, e->use->asked))
        return 1;
    for (i = 0; i < e->n_keys; i++)
        if (memcmp(&e->keys[i], key, sizeof *key) == 0)
            return 1;
    return 0;
}

static int consider(void *user, const kvt_store_key *key, const struct stat *status)
{
    eviction *e = user;
    old_value value;

    (void)count_value(&e->all, key, status);
    memset(&value, 0, sizeof value);
    value.used = status->st_mtim;
    value.is_future = (int64_t)status->st_mtim.tv_sec > e->latest;
    value.bytes = (uint64_t)status->st_size;
    value.key = *key;
    if (e->bytes >= e->wanted && (e->n == 0 || compare(&value, &e->values[0]) >= 0))
        return 0;
    if (is_kept(e, key, value.used))
        return 0;
    if (e->n == e->room) {
        size_t room = e->room ? 2 * e->room : 64;
        old_value *values =
            room > SIZE_MAX / sizeof *values ? NULL : realloc(e->values, room * sizeof *values);
        if (!values) {
            e->out_of_memory = 1;
            return 1;
        }
        e->values = values;
        e->room = room;
    }
    push(e, &value);
    while (e->n && e->bytes - e->values[0].bytes >= e->wanted)
        pop(e);
    return 0;
}

/* Whether a value is as it was in the scan. */
static int is_unused(const kvt_dir *dir, const char *name, const old_value *value)
{
    struct stat status;
    return fstatat(dir->fd, name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
           status.st_mtim.tv_sec == value->used.tv_sec &&
           status.st_mtim.tv_nsec == value->used.tv_nsec;
}

/* Remove what has been chosen, the oldest first. The number of the last error, or 0. */
static int remove_chosen(kvt_dir *dir, kvt_dir_lock *lock, eviction *e, int looks_again)
{
    int number = 0;
    size_t i;

    if (e->n)
        qsort(e->values, e->n, sizeof *e->values, compare_to_sort);
    for (i = 0; i < e->n; i++) {
        char name[KVT_DIR_NAME_BYTES];
        kvt_dir_name(&e->values[i].key, name);
        if (looks_again && !is_unused(dir, name, &e->values[i]))
            continue;
        if (unlinkat(dir->fd, name, 0) != 0) {
            number = errno;
            continue;
        }
        lock->bytes -= e->values[i].bytes;
        lock->n_values--;
        __atomic_fetch_add(&dir->n_evicted, 1, __ATOMIC_RELAXED);
        kvt_dir_progress(dir, lock);
    }
    return number;
}

kvt_status kvt_dir_evict(kvt_dir *dir, kvt_dir_lock *lock, uint64_t limit,
                         const kvt_store_key *keys, size_t n, const kvt_dir_use *use,
                         kvt_store_error *error)
{
    uint64_t batch = lock->max_bytes / BATCHES;
    kvt_status status = kvt_dir_lock_change(dir, lock, error);
    int scans, number = 0, is_over = 0;

    for (scans = 0; status == KVT_OK && lock->bytes > limit && scans < SCANS && !is_over; scans++) {
        eviction e;
        memset(&e, 0, sizeof e);
        e.keys = keys;
        e.n_keys = n;
        e.use = use;
        e.latest = (int64_t)time(NULL) + CLOCK_SECONDS;
        e.wanted = lock->bytes - limit > batch ? lock->bytes - limit : batch;
        kvt_dir_sweep(dir);
        status = kvt_dir_scan(dir, lock, consider, &e, error);
        if (status == KVT_OK && e.out_of_memory)
            status = kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the values to evict: %s",
                                    dir->path);
        if (status == KVT_OK) {
            lock->bytes = e.all.bytes; /* as it is, whatever was noted */
            lock->n_values = e.all.n_values;
            if (lock->bytes > limit)
                number = remove_chosen(dir, lock, &e, scans + 1 < SCANS);
            is_over = e.n == 0; /* another scan would choose none either */
        }
        free(e.values);
    }
    if (status != KVT_OK || lock->bytes <= limit)
        return status;
    return number ? kvt_dir_fail(dir, error, "unlink of a value", number, "")
                  : kvt_store_fail(error, KVT_ERR_FULL,
                                   "the store's bound of %llu bytes has no room for the value: %s",
                                   (unsigned long long)lock->max_bytes, dir->path);
}
