/*
 * The directory store: what its files offer each other. directory.c has the calls of the store;
 * directory_files.c values and temporaries; directory_state.c the lock and the counts;
 * directory_scan.c what goes through all values: counting anew, eviction; directory_asked.c the
 * order of a prompt's values.
 *
 *   PATH/kvtile-store   counts and bound; whoever changes the files of values has it locked
 *   PATH/ab/abcd...     a value: its key in hexadecimal, in the folder of the key's first byte
 *   PATH/tmp/put-...    values that are being written, locked by who writes them
 *
 * All names are relative to the open folder PATH: that the process changes its directory, or
 * somebody moves PATH, has no influence. Other files are never touched.
 */
#ifndef KVT_STORE_DIRECTORY_H
#define KVT_STORE_DIRECTORY_H

#include "src/store/store.h"

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>

#define KVT_DIR_PIECE_BYTES ((size_t)256 << 10) /* that a receiver is given at once */
#define KVT_DIR_NAME_BYTES 80                   /* of any name below PATH */
#define KVT_DIR_QUESTIONS 256                   /* asked lately that are noted */
#define KVT_DIR_NOTES ((uint64_t)1 << 18)       /* of keys in them, but for one longer question */
#define KVT_DIR_STATE_NAME "kvtile-store"
#define KVT_DIR_TEMPORARIES "tmp"

/* A question that was asked, and its keys: see directory_asked.c. */
typedef struct kvt_dir_note {
    uint64_t name; /* the key's first bytes */
    uint64_t i;    /* 2 times its number; 1 more: it had a value */
} kvt_dir_note;

typedef struct kvt_dir_question {
    kvt_dir_note *notes; /* [n], ascending */
    size_t n;
    int64_t time; /* in nanoseconds */
    int held;     /* atomic: how many threads read it; -1: one replaces it */
} kvt_dir_question;

typedef struct kvt_dir {
    int fd;         /* of the folder */
    int reads_only; /* nothing in it can be changed */
    int syncs;      /* put waits for the disk */
    char *path;     /* for texts */
    /* The rest is atomic. */
    uint64_t max_bytes;        /* as it was read last */
    void *spare;               /* KVT_DIR_PIECE_BYTES for a get, or NULL */
    unsigned char synced[256]; /* this folder's entry in PATH has been synced, and the state's */
    uint64_t n_got, n_missed, n_put, n_evicted, n_failed, n_temporaries;
    uint64_t stopped_turn; /* of who has the lock and does not go on; that holds until then: */
    int64_t stopped_until;
    int64_t busy_until;        /* who has the lock goes on, and has had it for long */
    uint64_t n_notes, n_asked; /* notes that there are; questions that were noted */
    kvt_dir_question asked[KVT_DIR_QUESTIONS];
} kvt_dir;

/* Under the lock: the state file, and what it says. */
typedef struct kvt_dir_lock {
    int fd;
    int is_dirty; /* the file says that its counts may be wrong */
    uint64_t max_bytes, bytes, n_values;
    uint64_t boot;        /* the system's start in which it was opened last */
    uint64_t turn;        /* one more with each writing */
    int64_t told_seconds; /* when kvt_dir_progress wrote last */
} kvt_dir_lock;

/* ---- directory_files.c ---- */

/* The text: the call, why, the file below PATH ("" for PATH), PATH. KVT_ERR_FULL where the disk
   or a quota is full, else KVT_ERR_IO. */
kvt_status kvt_dir_fail(const kvt_dir *dir, kvt_store_error *error, const char *call, int number,
                        const char *name);

/* The file's name of a value. */
void kvt_dir_name(const kvt_store_key *key, char name[KVT_DIR_NAME_BYTES]);
/* Whether a file of the folder xx is a value's; then its key. */
int kvt_dir_key(const char *folder, const char *name, kvt_store_key *key);

/* As openat, close-on-exec and again after EINTR. */
int kvt_dir_openat(int folder, const char *name, int flags, mode_t mode);
int kvt_dir_sync(int fd);
/* The time that value i of a call gets: the first is the newest. */
struct timespec kvt_dir_stamp(struct timespec now, size_t i);
/* Set a file's time of use. It cannot fail: without it the value is evicted sooner. */
void kvt_dir_touch(int fd, struct timespec stamp);
void kvt_dir_touch_name(const kvt_dir *dir, const char *name, struct timespec stamp);

/*
 * Around writes, so that a passed limit on the size of files (RLIMIT_FSIZE) sends no signal: it
 * would end the process, or call a handler of the caller's. It is blocked in this thread meanwhile
 * and, since the kernel sends it to the thread that writes, taken back there; the process's
 * disposition stays. One that was pending before is the caller's and stays too. `answer`: of the
 * writes; unless it is 0 errno says why they failed, and stays.
 */
typedef struct kvt_dir_limit {
    sigset_t before;
    int was_pending;
} kvt_dir_limit;

void kvt_dir_limit_enter(kvt_dir_limit *limit);
void kvt_dir_limit_leave(const kvt_dir_limit *limit, int answer);

/* A value that is being written. */
typedef struct kvt_dir_temporary {
    int lock; /* a descriptor that keeps it locked; -1: there is none */
    char name[KVT_DIR_NAME_BYTES];
} kvt_dir_temporary;

kvt_status kvt_dir_write(kvt_dir *dir, const kvt_store_value *value, struct timespec stamp,
                         kvt_dir_temporary *temporary, kvt_store_error *error);
/* Make it the value of a name, or remove it. The lock of the state is held for the former. */
kvt_status kvt_dir_commit(kvt_dir *dir, kvt_dir_temporary *temporary, const char *name,
                          kvt_store_error *error);
void kvt_dir_discard(kvt_dir *dir, kvt_dir_temporary *temporary);
/* Make the entry of a value last: KVT_ERR_IO if the disk fails. */
kvt_status kvt_dir_sync_entry(kvt_dir *dir, const kvt_store_key *key, kvt_store_error *error);
/* Remove the temporaries of processes that have died. */
void kvt_dir_sweep(kvt_dir *dir);

static inline int kvt_dir_is_later(struct timespec a, struct timespec b)
{
    return a.tv_sec != b.tv_sec ? a.tv_sec > b.tv_sec : a.tv_nsec > b.tv_nsec;
}

/* ---- directory_asked.c ---- */

/* When a value is used. */
typedef struct kvt_dir_use {
    struct timespec time;
    /* The question that had its key. What has a time from behind `time` up to this one is nearer to
       the beginning of the same prompt. */
    struct timespec asked;
    int is_asked; /* 0: there was none, or long ago */
} kvt_dir_use;

/* Note a question of now, and which of its keys have a value. */
void kvt_dir_ask(kvt_dir *dir, const kvt_store_key *keys, size_t n, const uint8_t *found,
                 struct timespec now);
void kvt_dir_asked_free(kvt_dir *dir);
/* The use of key i of a get, or a put: of the question, if it was asked for lately; else of the
   call. */
kvt_dir_use kvt_dir_use_of(kvt_dir *dir, const kvt_store_key *key, struct timespec now, size_t i,
                           int is_put);

/* ---- directory_state.c ---- */

/*
 * Make the state of a directory that has none, check the one it has, and set the bound: max_bytes 0
 * leaves it.
 */
kvt_status kvt_dir_state_open(kvt_dir *dir, uint64_t max_bytes, kvt_store_error *error);

/*
 * Wait for the lock; its state is right then: where the process before has not come to its end, all
 * is counted anew. Where dir->reads_only the lock is let go for that, as nothing will be changed.
 */
kvt_status kvt_dir_lock_take(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error);
/* To be called before files of values change: from then on the counts are not relied on. */
kvt_status kvt_dir_lock_change(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error);
/* Write the counts, if files have changed, and let the lock go. */
void kvt_dir_lock_drop(kvt_dir *dir, kvt_dir_lock *lock);
/* Between the parts of long work, for those who wait: see directory_state.c. */
void kvt_dir_progress(kvt_dir *dir, kvt_dir_lock *lock);

/* ---- directory_scan.c ---- */

/* Call on_value for each value until it returns non-zero. lock may be NULL. */
kvt_status kvt_dir_scan(kvt_dir *dir, kvt_dir_lock *lock,
                        int (*on_value)(void *user, const kvt_store_key *key,
                                        const struct stat *status),
                        void *user, kvt_store_error *error);
/* Count the values anew; dead temporaries are removed. */
kvt_status kvt_dir_recount(kvt_dir *dir, kvt_dir_lock *lock, kvt_store_error *error);
/*
 * Evict the values that were used the longest time ago until lock->bytes <= limit; none of the n
 * keys, and none that is nearer to the beginning of the prompt than what `use` (may be NULL) is of.
 * KVT_ERR_FULL: there are not enough others. KVT_ERR_IO: there are, but they cannot be removed.
 */
kvt_status kvt_dir_evict(kvt_dir *dir, kvt_dir_lock *lock, uint64_t limit,
                         const kvt_store_key *keys, size_t n, const kvt_dir_use *use,
                         kvt_store_error *error);

#endif /* KVT_STORE_DIRECTORY_H */
