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
 * A question's notes are an array, sorted by the key, and kept or dropped as a whole: some of a
 * prompt's values with its time, and some, nearer to the end, with the later one of their put would
 * evict its beginning. The questions are a ring, whose oldest ones make room. One of a single key
 * has no order to keep, and is not noted. That a question is lost, as without memory, costs the
 * order alone: a value then gets the time of its call. Nobody waits for another thread, so that a
 * child of fork does not wait for one that it has not got: what is held is passed over.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "src/store/directory.h"

#include <stdlib.h>
#include <string.h>

/* A use after a question is one of its own; what a long put writes belongs to its question. */
#define LASTS_NANOSECONDS ((int64_t)60 * 1000000000)
#define PUT_LASTS_NANOSECONDS ((int64_t)3600 * 1000000000)

/* ---- who has a question in hand: n readers, or -1 who replaces it ---- */

static int hold(kvt_dir_question *question)
{
    int n = __atomic_load_n(&question->held, __ATOMIC_RELAXED);
    while (n >= 0)
        if (__atomic_compare_exchange_n(&question->held, &n, n + 1, 0, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED))
            return 1;
    return 0;
}

static void let_go(kvt_dir_question *question)
{
    __atomic_fetch_sub(&question->held, 1, __ATOMIC_RELEASE);
}

/* Replace a question. 0: it is held. */
static int replace(kvt_dir *dir, kvt_dir_question *question, kvt_dir_note *notes, size_t n,
                   int64_t time)
{
    kvt_dir_note *old;
    int none = 0;

    if (!__atomic_compare_exchange_n(&question->held, &none, -1, 0, __ATOMIC_ACQUIRE,
                                     __ATOMIC_RELAXED))
        return 0;
    old = question->notes;
    __atomic_fetch_add(&dir->n_notes, (uint64_t)n - question->n, __ATOMIC_RELAXED);
    question->notes = notes;
    question->n = n;
    question->time = time;
    __atomic_store_n(&question->held, 0, __ATOMIC_RELEASE);
    free(old);
    return 1;
}

/* ---- notes ---- */

static uint64_t name_of(const kvt_store_key *key)
{
    uint64_t name;
    memcpy(&name, key->bytes, sizeof name);
    return name;
}

static int compare(const void *a, const void *b)
{
    const kvt_dir_note *x = a, *y = b;
    if (x->name != y->name)
        return x->name < y->name ? -1 : 1;
    return x->i < y->i ? -1 : x->i > y->i;
}

/* The first note of a key; NULL: there is none. */
static const kvt_dir_note *find(const kvt_dir_question *question, uint64_t name)
{
    size_t low = 0, high = question->n;

    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (question->notes[middle].name < name)
            low = middle + 1;
        else
            high = middle;
    }
    return low < question->n && question->notes[low].name == name ? &question->notes[low] : NULL;
}

static int64_t nanoseconds_of(struct timespec time)
{
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* ---- questions ---- */

void kvt_dir_ask(kvt_dir *dir, const kvt_store_key *keys, size_t n, const uint8_t *found,
                 struct timespec now)
{
    kvt_dir_note *notes =
        n > 1 && n <= SIZE_MAX / 2 / sizeof *notes ? malloc(n * sizeof *notes) : NULL;
    uint64_t at = 0;
    size_t i;
    int is_placed = 0;

    if (!notes)
        return;
    for (i = 0; i < n; i++) {
        notes[i].name = name_of(&keys[i]);
        notes[i].i = 2 * (uint64_t)i + (found[i] != 0);
    }
    qsort(notes, n, sizeof *notes, compare);
    for (i = 0; i < KVT_DIR_QUESTIONS && !is_placed; i++) {
        at = __atomic_fetch_add(&dir->n_asked, 1, __ATOMIC_RELAXED);
        is_placed =
            replace(dir, &dir->asked[at % KVT_DIR_QUESTIONS], notes, n, nanoseconds_of(now));
    }
    if (!is_placed)
        free(notes);
    for (i = 1; i < KVT_DIR_QUESTIONS; i++) { /* the oldest ones; not this one, however long */
        if (__atomic_load_n(&dir->n_notes, __ATOMIC_RELAXED) <= KVT_DIR_NOTES)
            break;
        (void)replace(dir, &dir->asked[(at + i) % KVT_DIR_QUESTIONS], NULL, 0, 0);
    }
}

void kvt_dir_asked_free(kvt_dir *dir)
{
    for (size_t i = 0; i < KVT_DIR_QUESTIONS; i++)
        free(dir->asked[i].notes);
}

kvt_dir_use kvt_dir_use_of(kvt_dir *dir, const kvt_store_key *key, struct timespec now, size_t i,
                           int is_put)
{
    const uint64_t name = name_of(key), end = __atomic_load_n(&dir->n_asked, __ATOMIC_RELAXED);
    const int64_t lasts = is_put ? PUT_LASTS_NANOSECONDS : LASTS_NANOSECONDS;
    kvt_dir_use use = {kvt_dir_stamp(now, i), now, 0};
    int is_found = 0;

    /* The newest one that has the key counts. A time in the future is of before the clock was set
       back. */
    for (uint64_t back = 1; back <= KVT_DIR_QUESTIONS && back <= end && !is_found; back++) {
        kvt_dir_question *question = &dir->asked[(end - back) % KVT_DIR_QUESTIONS];
        const kvt_dir_note *note;
        int64_t age;
        if (!hold(question))
            continue;
        age = nanoseconds_of(now) - question->time;
        note = age >= 0 ? find(question, name) : NULL;
        is_found = note != NULL;
        if (note && age < lasts && !(is_put && note->i % 2)) {
            use.asked.tv_sec = (time_t)(question->time / 1000000000);
            use.asked.tv_nsec = (long)(question->time % 1000000000);
            use.time = kvt_dir_stamp(use.asked, (size_t)(note->i / 2));
            use.is_asked = 1;
        }
        let_go(question);
    }
    return use;
}
