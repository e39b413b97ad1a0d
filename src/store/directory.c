/*
 * A directory as a store: one file a value. See directory.h for what lies where, directory_state.c
 * for what a process that is killed may leave.
 *
 * A get reads files that nobody changes: values are replaced by rename, so an open file stays what
 * it was. It is read, not mapped: where somebody does cut a file short, a read ends early and the
 * value was not found; a page of a mapping would end the process (SIGBUS).
 *
 * The time of use is the file's mtime, set to the nanosecond by put, get and exists. Of one call's
 * keys each gets a time one microsecond before the one of the key before it, so that of a prefix
 * the end is evicted first: a beginning is of use without the end, an end is not without the
 * beginning. What a get or put has was asked for before, where it is a prompt's: see
 * directory_asked.c.
 *
 * A value without bytes is delivered by one call of part, with 0 bytes.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "src/store/directory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define READERS 16 /* gets at once that are worth it, for disks that serve several */
#define READ_FLAGS (O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY)

static void add(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static uint64_t counted(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static kvt_status finish(kvt_dir *dir, kvt_status status)
{
    if (status != KVT_OK)
        add(&dir->n_failed, 1);
    return status;
}

static struct timespec time_now(void)
{
    struct timespec now = {0, 0};
    (void)clock_gettime(CLOCK_REALTIME, &now);
    return now;
}

/* There is no such file, or what is there is none of ours. */
static int is_missing(int number)
{
    return number == ENOENT || number == ENOTDIR || number == ELOOP || number == ENXIO;
}

/* ---- removal ---- */

static kvt_status remove_under_lock(kvt_dir *dir, kvt_dir_lock *lock, const kvt_store_key *keys,
                                    size_t n, kvt_store_error *error)
{
    kvt_status status = KVT_OK;
    size_t i;

    for (i = 0; i < n && status == KVT_OK; i++) {
        char name[KVT_DIR_NAME_BYTES];
        struct stat file;
        kvt_dir_name(&keys[i], name);
        if (fstatat(dir->fd, name, &file, AT_SYMLINK_NOFOLLOW) != 0) {
            if (!is_missing(errno))
                status = kvt_dir_fail(dir, error, "fstatat", errno, name);
            continue;
        }
        if (!S_ISREG(file.st_mode))
            continue;
        status = kvt_dir_lock_change(dir, lock, error);
        if (status == KVT_OK && unlinkat(dir->fd, name, 0) != 0)
            status = kvt_dir_fail(dir, error, "unlink", errno, name);
        if (status == KVT_OK) {
            uint64_t bytes = (uint64_t)file.st_size;
            lock->bytes -= bytes < lock->bytes ? bytes : lock->bytes;
            lock->n_values -= lock->n_values > 0;
            kvt_dir_progress(dir, lock);
        }
    }
    return status;
}

/* What a bad sector reads as, or a checksum of the file system's that does not match. */
static int is_damage(int number)
{
    int damage = number == EIO || number == EBADMSG;
#ifdef EUCLEAN
    damage = damage || number == EUCLEAN;
#endif
    return damage;
}

/* 1: it is there no more. Where it cannot be removed either, it is the disk that has failed. */
static int drop_damaged(kvt_dir *dir, const kvt_store_key *key)
{
    kvt_store_error unused;
    kvt_dir_lock lock;
    kvt_status status = kvt_dir_lock_take(dir, &lock, &unused);

    if (status != KVT_OK)
        return 0;
    status = remove_under_lock(dir, &lock, key, 1, &unused);
    kvt_dir_lock_drop(dir, &lock);
    return status == KVT_OK;
}

/* ---- get ---- */

typedef struct getting {
    kvt_dir *dir;
    const kvt_store_receiver *receiver;
    void *buffer; /* KVT_DIR_PIECE_BYTES, or NULL as long as it is not needed */
    int answer;   /* the receiver's last */
    kvt_store_error *error;
} getting;

/* As many bytes as there are, up to the file's end; -1: errno says why not. */
static int64_t read_piece(int fd, void *to, size_t bytes)
{
    size_t done = 0;

    while (done < bytes) {
        ssize_t n = read(fd, (char *)to + done, bytes - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        if (n == 0)
            break;
        done += (size_t)n;
    }
    return (int64_t)done;
}

/* Where the next bytes go, and how many; NULL: no memory. */
static void *place_for(getting *g, size_t i, uint64_t total, uint64_t offset, size_t *bytes)
{
    size_t most =
        total - offset < KVT_DIR_PIECE_BYTES ? (size_t)(total - offset) : KVT_DIR_PIECE_BYTES;

    if (g->receiver->place) {
        void *place;
        *bytes = most;
        place = g->receiver->place(g->receiver->user, i, total, offset, bytes);
        if (place && *bytes) {
            *bytes = *bytes < most ? *bytes : most;
            return place;
        }
    }
    *bytes = most;
    if (!g->buffer)
        g->buffer = __atomic_exchange_n(&g->dir->spare, NULL, __ATOMIC_ACQUIRE);
    if (!g->buffer)
        g->buffer = malloc(KVT_DIR_PIECE_BYTES);
    return g->buffer;
}

/* A file to the receiver. *whole: all of it; *damaged: the disk cannot read it. */
static kvt_status read_value(getting *g, size_t i, int fd, uint64_t total, int *whole, int *damaged,
                             const char *name)
{
    uint64_t offset = 0;

    g->answer = KVT_STORE_MORE;
    if (total == 0)
        g->answer = g->receiver->part(g->receiver->user, i, 0, 0, "", 0);
    while (offset < total && g->answer == KVT_STORE_MORE) {
        size_t bytes;
        void *to = place_for(g, i, total, offset, &bytes);
        int64_t n = to ? read_piece(fd, to, bytes) : 0;
        if (!to)
            return kvt_store_fail(g->error, KVT_ERR_MEMORY, "no memory to read a value: %s in %s",
                                  name, g->dir->path);
        if (n < 0) {
            int number = errno;
            *damaged = is_damage(number);
            return kvt_dir_fail(g->dir, g->error, "read", number, name);
        }
        if ((size_t)n < bytes) /* it has been cut short */
            return KVT_OK;
        g->answer = g->receiver->part(g->receiver->user, i, total, offset, to, bytes);
        offset += bytes;
    }
    *whole = offset == total;
    return KVT_OK;
}

/* A time of use that a file has already, as from exists, or a later one, is not set back. */
static void touch_used(int fd, const struct stat *file, struct timespec time, struct timespec now)
{
    if (kvt_dir_is_later(time, file->st_mtim) || kvt_dir_is_later(file->st_mtim, now))
        kvt_dir_touch(fd, time);
}

static kvt_status get_one(getting *g, const kvt_store_key *key, size_t i, struct timespec now)
{
    char name[KVT_DIR_NAME_BYTES];
    kvt_status status = KVT_OK;
    struct stat file;
    int fd, number, whole = 0, damaged = 0, is_file = 1;

    g->answer = KVT_STORE_MORE;
    kvt_dir_name(key, name);
    fd = kvt_dir_openat(g->dir->fd, name, READ_FLAGS, 0);
    if (fd < 0) {
        number = errno;
        add(&g->dir->n_missed, 1);
        return is_missing(number) ? KVT_OK : kvt_dir_fail(g->dir, g->error, "open", number, name);
    }
    if (fstat(fd, &file) != 0)
        status = kvt_dir_fail(g->dir, g->error, "fstat", errno, name);
    else
        is_file = S_ISREG(file.st_mode);
    if (status == KVT_OK && is_file)
        status = read_value(g, i, fd, (uint64_t)file.st_size, &whole, &damaged, name);
    if (whole)
        touch_used(fd, &file, kvt_dir_use_of(g->dir, key, now, i, 0).time, now);
    (void)close(fd);
    if (damaged && drop_damaged(g->dir, key))
        status = KVT_OK; /* not found: a put finds no file there, and mends it */
    if (whole)
        add(&g->dir->n_got, 1);
    else if (g->answer == KVT_STORE_MORE) /* else the receiver has left it */
        add(&g->dir->n_missed, 1);
    return status;
}

static kvt_status get(void *user, const kvt_store_key *keys, size_t n,
                      const kvt_store_receiver *receiver, kvt_store_error *error)
{
    getting g = {user, receiver, NULL, KVT_STORE_MORE, error};
    struct timespec now = time_now();
    kvt_status status = KVT_OK;
    size_t i;

    for (i = 0; i < n && status == KVT_OK; i++) {
        status = get_one(&g, &keys[i], i, now);
        if (g.answer != KVT_STORE_MORE && g.answer != KVT_STORE_SKIP)
            break;
    }
    if (g.buffer) /* for the next get; the one that another has left meanwhile is freed */
        free(__atomic_exchange_n(&g.dir->spare, g.buffer, __ATOMIC_ACQ_REL));
    return finish(g.dir, status);
}

/* ---- put ---- */

/* Under the lock: make room, and rename. keys[i] is put, the ones before it were. */
static kvt_status put_written(kvt_dir *dir, kvt_dir_lock *lock, kvt_dir_temporary *temporary,
                              const kvt_store_key *keys, size_t i, uint64_t bytes,
                              const kvt_dir_use *use, kvt_store_error *error)
{
    char name[KVT_DIR_NAME_BYTES];
    uint64_t old_bytes = 0, max = lock->max_bytes, room;
    kvt_status status = kvt_dir_lock_change(dir, lock, error);
    struct stat old;
    int replaces;

    if (status != KVT_OK)
        return status;
    kvt_dir_name(&keys[i], name);
    replaces = fstatat(dir->fd, name, &old, AT_SYMLINK_NOFOLLOW) == 0;
    if (!replaces && errno != ENOENT)
        return kvt_dir_fail(dir, error, "fstatat", errno, name);
    replaces = replaces && S_ISREG(old.st_mode);
    if (replaces)
        old_bytes = (uint64_t)old.st_size;
    if (max && bytes > max) /* since the bound has become less */
        return kvt_store_fail(error, KVT_ERR_FULL, "the store's bound has become %llu bytes: %s",
                              (unsigned long long)max, dir->path);
    room = max ? max - bytes : UINT64_MAX; /* for the others, and the old one */
    room = old_bytes > UINT64_MAX - room ? UINT64_MAX : room + old_bytes;
    if (lock->bytes > room)
        status = kvt_dir_evict(dir, lock, room, keys, i + 1, use, error);
    if (status == KVT_OK)
        status = kvt_dir_commit(dir, temporary, name, error);
    if (status == KVT_OK) {
        lock->bytes = lock->bytes - (old_bytes < lock->bytes ? old_bytes : lock->bytes) + bytes;
        lock->n_values += !replaces;
    }
    return status;
}

/* A value that has no room whatever is evicted is not written at all. The bound that this process
   knows may be an old one: one that it is too large for is read again. */
static kvt_status check_size(kvt_dir *dir, uint64_t bytes, kvt_store_error *error)
{
    uint64_t max = __atomic_load_n(&dir->max_bytes, __ATOMIC_RELAXED);
    kvt_dir_lock lock;
    kvt_status status;

    if (!max || bytes <= max)
        return KVT_OK;
    status = kvt_dir_lock_take(dir, &lock, error);
    if (status != KVT_OK)
        return status;
    kvt_dir_lock_drop(dir, &lock);
    max = lock.max_bytes;
    return !max || bytes <= max
               ? KVT_OK
               : kvt_store_fail(error, KVT_ERR_FULL,
                                "a value of %llu bytes is more than the store's bound of %llu: %s",
                                (unsigned long long)bytes, (unsigned long long)max, dir->path);
}

static kvt_status put_one(kvt_dir *dir, const kvt_store_key *keys, const kvt_store_value *value,
                          size_t i, struct timespec now, int *is_there, kvt_store_error *error)
{
    const kvt_dir_use use = kvt_dir_use_of(dir, &keys[i], now, i, 1);
    uint64_t bytes = 0;
    kvt_dir_temporary temporary;
    kvt_dir_lock lock;
    kvt_status status;
    size_t part;

    *is_there = 0;
    for (part = 0; part < value->n_parts; part++) /* what will be in the file */
        bytes += value->parts[part].bytes;
    status = check_size(dir, bytes, error);
    if (status != KVT_OK)
        return status;
    status = kvt_dir_write(dir, value, use.time, &temporary, error);
    if (status != KVT_OK)
        return status;
    status = kvt_dir_lock_take(dir, &lock, error);
    if (status == KVT_OK) {
        status = put_written(dir, &lock, &temporary, keys, i, bytes, &use, error);
        kvt_dir_lock_drop(dir, &lock);
    }
    if (status != KVT_OK) {
        kvt_dir_discard(dir, &temporary);
        return status;
    }
    *is_there = 1;
    add(&dir->n_put, 1);
    return dir->syncs ? kvt_dir_sync_entry(dir, &keys[i], error) : KVT_OK;
}

static kvt_status put(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                      size_t n, size_t *n_put, kvt_store_error *error)
{
    kvt_dir *dir = user;
    struct timespec now = time_now();
    kvt_status status = KVT_OK;
    size_t i;

    *n_put = 0;
    for (i = 0; i < n && status == KVT_OK; i++) {
        int is_there;
        status = put_one(dir, keys, &values[i], i, now, &is_there, error);
        *n_put += (size_t)is_there;
    }
    return finish(dir, status);
}

/* ---- the others ---- */

static kvt_status exists(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                         kvt_store_error *error)
{
    kvt_dir *dir = user;
    struct timespec now = time_now();
    size_t i;

    for (i = 0; i < n; i++) {
        char name[KVT_DIR_NAME_BYTES];
        struct stat status;
        kvt_dir_name(&keys[i], name);
        found[i] = 0;
        if (fstatat(dir->fd, name, &status, AT_SYMLINK_NOFOLLOW) == 0)
            found[i] = S_ISREG(status.st_mode);
        else if (!is_missing(errno))
            return finish(dir, kvt_dir_fail(dir, error, "fstatat", errno, name));
        if (found[i])
            kvt_dir_touch_name(dir, name, kvt_dir_stamp(now, i));
        else
            add(&dir->n_missed, 1);
    }
    kvt_dir_ask(dir, keys, n, found, now);
    return KVT_OK;
}

static kvt_status remove_values(void *user, const kvt_store_key *keys, size_t n,
                                kvt_store_error *error)
{
    kvt_dir *dir = user;
    kvt_dir_lock lock;
    kvt_status status = kvt_dir_lock_take(dir, &lock, error);

    if (status == KVT_OK) {
        status = remove_under_lock(dir, &lock, keys, n, error);
        kvt_dir_lock_drop(dir, &lock);
    }
    return finish(dir, status);
}

typedef struct listing {
    int (*on_entry)(void *entry_user, const kvt_store_entry *entry);
    void *entry_user;
    int64_t now;
} listing;

static int list_value(void *user, const kvt_store_key *key, const struct stat *status)
{
    listing *l = user;
    kvt_store_entry entry;

    memset(&entry, 0, sizeof entry);
    entry.key = *key;
    entry.bytes = (uint64_t)status->st_size;
    entry.used_seconds =
        l->now > (int64_t)status->st_mtim.tv_sec ? l->now - (int64_t)status->st_mtim.tv_sec : 0;
    entry.left_seconds = -1;
    return l->on_entry(l->entry_user, &entry);
}

static kvt_status list(void *user, int (*on_entry)(void *entry_user, const kvt_store_entry *entry),
                       void *entry_user, kvt_store_error *error)
{
    listing l = {on_entry, entry_user, (int64_t)time_now().tv_sec};
    return finish(user, kvt_dir_scan(user, NULL, list_value, &l, error));
}

static kvt_status stats(void *user, kvt_store_stats *to, kvt_store_error *error)
{
    kvt_dir *dir = user;
    kvt_dir_lock lock;
    kvt_status status = kvt_dir_lock_take(dir, &lock, error);

    if (status != KVT_OK)
        return finish(dir, status);
    kvt_dir_lock_drop(dir, &lock);
    memset(to, 0, sizeof *to);
    to->n_values = lock.n_values;
    to->bytes = lock.bytes;
    to->max_bytes = lock.max_bytes;
    to->n_got = counted(&dir->n_got);
    to->n_missed = counted(&dir->n_missed);
    to->n_put = counted(&dir->n_put);
    to->n_evicted = counted(&dir->n_evicted);
    to->n_failed = counted(&dir->n_failed);
    return KVT_OK;
}

static kvt_status collect(void *user, kvt_store_error *error)
{
    kvt_dir *dir = user;
    kvt_dir_lock lock;
    kvt_status status = kvt_dir_lock_take(dir, &lock, error);

    if (status != KVT_OK)
        return finish(dir, status);
    status = kvt_dir_lock_change(dir, &lock, error);
    if (status == KVT_OK)
        status = kvt_dir_recount(dir, &lock, error);
    if (status == KVT_OK && lock.max_bytes && lock.bytes > lock.max_bytes)
        status = kvt_dir_evict(dir, &lock, lock.max_bytes, NULL, 0, NULL, error);
    kvt_dir_lock_drop(dir, &lock);
    return finish(dir, status);
}

static void close_directory(void *user)
{
    kvt_dir *dir = user;
    if (dir->fd >= 0)
        (void)close(dir->fd);
    kvt_dir_asked_free(dir);
    free(dir->spare);
    free(dir->path);
    free(dir);
}

/* ---- opening ---- */

/* Open PATH, or make it. */
static kvt_status open_folder(kvt_dir *dir, kvt_store_error *error)
{
    int parent;

    dir->fd = kvt_dir_openat(AT_FDCWD, dir->path, O_RDONLY | O_DIRECTORY, 0);
    if (dir->fd < 0 && errno == ENOENT) {
        if (mkdir(dir->path, 0700) != 0 && errno != EEXIST)
            return kvt_dir_fail(dir, error, "mkdir", errno, "");
        dir->fd = kvt_dir_openat(AT_FDCWD, dir->path, O_RDONLY | O_DIRECTORY, 0);
    }
    if (dir->fd < 0)
        return kvt_dir_fail(dir, error, "open", errno, "");
    if (dir->syncs) { /* who has made PATH may have had no sync */
        parent = kvt_dir_openat(dir->fd, "..", O_RDONLY | O_DIRECTORY, 0);
        if (parent >= 0) { /* one that cannot be read is left to the system */
            (void)kvt_dir_sync(parent);
            (void)close(parent);
        }
    }
    return KVT_OK;
}

static kvt_status open_directory(const kvt_directory_config *config, kvt_store *store,
                                 kvt_store_error *error)
{
    size_t bytes = strlen(config->path) + 1;
    kvt_dir *dir = calloc(1, sizeof *dir);
    kvt_status status;

    if (dir) {
        dir->fd = -1;
        dir->syncs = config->sync != 0;
        dir->path = malloc(bytes);
    }
    if (!dir || !dir->path) {
        free(dir);
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the store");
    }
    memcpy(dir->path, config->path, bytes);
    status = open_folder(dir, error);
    if (status == KVT_OK)
        status = kvt_dir_state_open(dir, config->max_bytes, error);
    if (status != KVT_OK) {
        close_directory(dir);
        return status;
    }
    memset(store, 0, sizeof *store);
    store->struct_size = sizeof *store;
    store->user = dir;
    store->get = get;
    store->put = put;
    store->exists = exists;
    store->remove = remove_values;
    store->list = list;
    store->stats = stats;
    store->collect = collect;
    store->close = close_directory;
    store->n_at_once = READERS;
    return KVT_OK;
}

kvt_status kvt_store_open_directory(const kvt_directory_config *config, kvt_store *store)
{
    kvt_store_error error;
    kvt_status status;

    if (!config || config->struct_size != sizeof *config || !store)
        return KVT_ERR_ARG;
    if (!config->path || !*config->path || config->sync > 1 || config->reserved)
        return kvt_store_fail_open(config->error_text, config->error_text_bytes, KVT_ERR_ARG,
                                   "no path, or sync is not 0 or 1, or reserved is not 0");
    status = open_directory(config, store, &error);
    if (status == KVT_ERR_FULL) /* no room for the state file */
        status = KVT_ERR_IO;
    return status == KVT_OK ? status
                            : kvt_store_fail_open(config->error_text, config->error_text_bytes,
                                                  status, "%s", error.text);
}
