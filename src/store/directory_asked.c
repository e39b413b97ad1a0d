/*
 * The directory store: which keys it was asked for lately.
 *
 * Of a prompt the end is to be evicted first, so a value that is nearer to the beginning has a
 * later time of use. But a prompt's values come in several calls: a long one's are put by and by,
 * those that came from another store one at a time, and those that are there already are not put
 * at all. What they have in common is the question before, exists, which has all keys in order. So
 * it gives each key its time, one microsecond before the one of the key before it: to the file, if
 * there is one; and it is noted here, for the gets that follow and the puts of what was not there.
 * (One in place of a value that was there is a use of its own.)
 *
 * Notes are in buckets by the key, and a bucket's oldest one makes room. One that is lost, as by
 * another thread's that has the same note in hand, costs the order alone: the value then gets the
 * time of its call. None is waited for, so that a child of fork does not wait for a thread that it
 * has not got.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "src/store/directory.h"

#include <string.h>

#define BUCKET 4u
/* A use after a question is one of its own; what a long put writes belongs to its question. */
#define LASTS_NANOSECONDS ((int64_t)60 * 1000000000)
#define PUT_LASTS_NANOSECONDS ((int64_t)3600 * 1000000000)

static kvt_dir_asked *bucket_of(kvt_dir *dir, const kvt_store_key *key, uint64_t *name)
{
    uint64_t at;
    memcpy(name, key->bytes, sizeof *name);
    memcpy(&at, key->bytes + sizeof *name, sizeof at);
    *name += *name == 0; /* 0: there is no note */
    return &dir->asked[at % (KVT_DIR_ASKED / BUCKET) * BUCKET];
}

static int hold(kvt_dir_asked *note)
{
    return __atomic_exchange_n(&note->held, 1, __ATOMIC_ACQUIRE) == 0;
}

static void let_go(kvt_dir_asked *note)
{
    __atomic_store_n(&note->held, 0, __ATOMIC_RELEASE);
}

static int64_t nanoseconds_of(struct timespec time)
{
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Its age's order. A time far in the future is from before the clock was set back: it would be the
   newest until then. (Other threads' questions may be a little later than `now`.) */
static int64_t order_of(const kvt_dir_asked *note, int64_t now)
{
    return note->time > now + LASTS_NANOSECONDS ? INT64_MIN : note->time;
}

void kvt_dir_ask(kvt_dir *dir, const kvt_store_key *key, struct timespec now, size_t i, int found)
{
    uint64_t name;
    kvt_dir_asked *bucket = bucket_of(dir, key, &name), *oldest = NULL;
    const int64_t time = nanoseconds_of(now);

    for (size_t n = 0; n < BUCKET; n++) {
        kvt_dir_asked *note = &bucket[n];
        if (!hold(note))
            continue;
        if (note->name != name && oldest && order_of(oldest, time) <= order_of(note, time)) {
            let_go(note);
            continue;
        }
        if (oldest)
            let_go(oldest);
        oldest = note;
        if (note->name == name)
            break;
    }
    if (!oldest)
        return;
    oldest->name = name;
    oldest->time = time;
    oldest->i = i;
    oldest->is_there = found;
    let_go(oldest);
}

kvt_dir_use kvt_dir_use_of(kvt_dir *dir, const kvt_store_key *key, struct timespec now, size_t i,
                           int is_put)
{
    uint64_t name;
    kvt_dir_asked *bucket = bucket_of(dir, key, &name);
    kvt_dir_use use = {kvt_dir_stamp(now, i), now, 0};
    const int64_t lasts = is_put ? PUT_LASTS_NANOSECONDS : LASTS_NANOSECONDS;

    for (size_t n = 0; n < BUCKET && !use.is_asked; n++) {
        kvt_dir_asked *note = &bucket[n];
        int64_t age;
        if (!hold(note))
            continue;
        age = nanoseconds_of(now) - note->time;
        if (note->name == name && age >= 0 && age < lasts && !(is_put && note->is_there)) {
            use.asked.tv_sec = (time_t)(note->time / 1000000000);
            use.asked.tv_nsec = (long)(note->time % 1000000000);
            use.time = kvt_dir_stamp(use.asked, note->i);
            use.is_asked = 1;
        }
        let_go(note);
    }
    return use;
}
