/*
 * What the tests of stores share: keys and values made of numbers, receivers that collect, and what
 * is in a folder, seen without the store.
 */
#ifndef KVT_TEST_STORE_VALUES_H
#define KVT_TEST_STORE_VALUES_H

#include "support.h"

#include <kvtile/store.h>

/* The key of a number. They are in four folders, so that a scan has few calls to fail or die in. */
kvt_store_key key_of(uint64_t number);
/* The value of a number in one of its versions: with a sum over itself and its key. At least 24
   bytes, else bytes that have no sum. */
void value_fill(uint64_t number, uint64_t version, unsigned char *to, size_t bytes);
/* Whether a value is whole, and of this key; *version (may be NULL) which one. */
int value_is_sound(const kvt_store_key *key, const unsigned char *data, size_t bytes,
                   uint64_t *version);

/* Put and get one value; get answers its bytes, -1: there is none. */
kvt_status put_value(kvt_store *s, uint64_t number, uint64_t version, size_t bytes);
/* -1: there is none; -2: it is not what was put; else its version. */
int64_t get_version(kvt_store *s, uint64_t number);
int has_value(kvt_store *s, uint64_t number);
/* The last text that a store has set through these. */
extern kvt_store_error store_error;
#define store_ok(call) expect_store(KVT_OK, call, __FILE__ ":" TEXT(__LINE__) ": " #call)
#define store_is(status, call) expect_store(status, call, __FILE__ ":" TEXT(__LINE__) ": " #call)
void expect_store(kvt_status expected, kvt_status got, const char *where);

/* A receiver that keeps what comes. */
typedef struct got_value {
    unsigned char *data;
    uint64_t total, have;
    size_t n_parts, n_begun;
    int is_wrong; /* the parts were not in order */
} got_value;

typedef struct collector {
    got_value *values; /* [n] */
    size_t n;
    int places;       /* 1: its own memory; 2: likewise, but NULL for every other part */
    size_t most;      /* bytes of a place; 0: as many as are wanted */
    size_t stop_part; /* the part, of all, that is answered by `answer`; SIZE_MAX: none */
    int answer;
    size_t n_all, n_placed, largest; /* parts; those in its memory; bytes */
    void (*on_part)(void *user);     /* before it answers; NULL: nothing */
    void *user;
} collector;

void collector_make(collector *c, size_t n);
void collector_free(collector *c);
kvt_store_receiver collector_receiver(collector *c);
kvt_status collector_get(kvt_store *s, collector *c, const kvt_store_key *keys, size_t n);

/* What is in the folder of a directory store. */
typedef struct folder_state {
    uint64_t n_values, bytes, n_temporaries, temporary_bytes, n_unsound, n_other;
} folder_state;

folder_state folder_look(const char *path);
void folder_remove(const char *path);
kvt_status folder_open(const char *path, uint64_t max_bytes, kvt_store *s);
/* The file of a number's value. */
void folder_file(const char *path, uint64_t number, char *to, size_t room);
/* The store says of itself what is in its folder. */
void folder_agrees(const char *path, kvt_store *s);
int count_descriptors(void);

#endif
