/*
 * Stores: what the files of this folder offer each other, those of prefixes apart (stored.h).
 * directory.c, redis.c and tiers.c know keys and values as bytes.
 */
#ifndef KVT_STORE_STORE_H
#define KVT_STORE_STORE_H

#include <kvtile/store.h>

#if defined(__GNUC__)
#define KVT_STORE_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define KVT_STORE_PRINTF(text, first)
#endif

/* Whether a caller's store is of our size and has what is needed. */
int kvt_store_is_whole(const kvt_store *store);

typedef kvt_status kvt_store_get(void *user, const kvt_store_key *keys, size_t n,
                                 const kvt_store_receiver *receiver, kvt_store_error *error);
/* Of two stores as one: a get of near alone, which never fails. NULL: it is another store. */
kvt_store_get *kvt_store_get_near(const kvt_store *store);

/* Set the text and return status. */
kvt_status kvt_store_fail(kvt_store_error *error, kvt_status status, const char *format, ...)
    KVT_STORE_PRINTF(3, 4);
/* The same of an opening, whose text may be NULL. */
kvt_status kvt_store_fail_open(char *text, size_t text_bytes, kvt_status status, const char *format,
                               ...) KVT_STORE_PRINTF(4, 5);

#endif /* KVT_STORE_STORE_H */
