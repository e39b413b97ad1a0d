/*
 * Keys and values for tests of a store, and a receiver that checks what it is given. Key and value
 * of number i are the same everywhere. All functions assert.
 */
#ifndef KVT_TEST_REDIS_VALUES_H
#define KVT_TEST_REDIS_VALUES_H

#include "support.h"

#include <kvtile/store.h>

/* Print the text of a status that is not the expected one. */
#define expect_call(expected, error, call)                                                         \
    do {                                                                                           \
        kvt_status got_ = call;                                                                    \
        if (got_ != (expected))                                                                    \
            print_error("%s: status %d, %s\n", #call, (int)got_, (error).text);                    \
        assert_int_equal(got_, expected);                                                          \
    } while (0)

kvt_store_key key_of(uint64_t number);
/* `bytes` bytes, malloc'ed. */
unsigned char *value_of(uint64_t number, size_t bytes);

/* Values first .. first + n - 1, each of `bytes` bytes in `parts` parts. */
kvt_status put_values(const kvt_store *store, uint64_t first, size_t n, size_t bytes, size_t parts,
                      size_t *n_put, kvt_store_error *error);

/* What a get has given. Zero it, set what is wanted. */
typedef struct taken {
    int places;        /* it has memory of its own, */
    size_t place_most; /* no more than so much at once; 0: all */
    size_t skip_at;    /* after so many bytes of each value the rest is skipped; 0: none */
    size_t stop_after; /* so many whole values; 0: never */
    int (*on_value)(void *user, size_t i); /* called when all of a value is there; or NULL */
    void *user;
    /* results, of the n values asked for: */
    size_t n, n_whole, n_parts, n_placed;
    unsigned char **data;
    uint64_t *total, *have;
    uint8_t *whole;
    size_t current; /* which is being given; SIZE_MAX: none */
} taken;

kvt_status get_values(const kvt_store *store, uint64_t first, size_t n, taken *t,
                      kvt_store_error *error);
/* Whether value i is whole, and then of the right bytes. */
int is_taken(const taken *t, uint64_t first, size_t i, size_t bytes);
void free_taken(taken *t);

/* Get and check that just those of n values are there that are in `there` (NULL: all). */
void expect_values(const kvt_store *store, uint64_t first, size_t n, size_t bytes,
                   const uint8_t *there);

double seconds_now(void);

#endif /* KVT_TEST_REDIS_VALUES_H */
