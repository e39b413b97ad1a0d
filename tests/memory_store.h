/*
 * A store in memory, for tests: it can cut what it gives into parts of any size, use the receiver's
 * memory or not, fail at any call, and have its values looked at and changed.
 */
#ifndef KVT_TEST_MEMORY_STORE_H
#define KVT_TEST_MEMORY_STORE_H

#include "support.h"

#include <kvtile/store.h>

typedef struct memory_value {
    kvt_store_key key;
    unsigned char *data;
    size_t bytes;
} memory_value;

typedef struct memory_store {
    memory_value *values; /* [n] */
    size_t n, room;
    size_t part_bytes; /* most bytes of a part; 0: whole values */
    int places;        /* use the receiver's memory where it gives some */
    int backwards;     /* give the values in reverse order */
    long fail_at;      /* the call, of all four, that fails; < 0: none */
    long fail_part;    /* the part of a get at which it fails; < 0: none */
    long put_at_most;  /* values of a put, which then fails; < 0: all */
    kvt_status failure;
    size_t n_calls, n_gets, n_puts, n_exists, n_removes, n_parts;
    size_t n_asked; /* keys of the last exists */
} memory_store;

/* An empty store that does not fail, behind the functions of a kvt_store. */
kvt_store memory_store_open(memory_store *m);
void memory_store_free(memory_store *m);
/* The value of a key, or NULL. */
memory_value *memory_store_find(memory_store *m, const kvt_store_key *key);
void memory_store_drop(memory_store *m, memory_value *value);
/* A copy of some bytes as the value of a key, in place of one that is there. */
memory_value *memory_store_set(memory_store *m, const kvt_store_key *key, const void *data,
                               size_t n);
/* A copy of the values, into a store that has been opened. */
void memory_store_copy(const memory_store *from, memory_store *to);

#endif
