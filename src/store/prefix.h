/*
 * Prefixes of sequences as keys and values of a store: what chain.c, value.c, prefix.c, put.c and
 * get.c offer each other.
 */
#ifndef KVT_STORE_PREFIX_H
#define KVT_STORE_PREFIX_H

#include "src/snapshot/format.h"
#include "src/store/store.h"

/* ---- sha256.c ---- */

/* Whether the library was built with a library that has it. */
int kvt_store_has_sha256(void);
typedef struct kvt_store_sha256 {
    uint64_t state[16];
} kvt_store_sha256;
void kvt_store_sha256_begin(kvt_store_sha256 *hash);
void kvt_store_sha256_add(kvt_store_sha256 *hash, const void *data, size_t bytes);
void kvt_store_sha256_end(kvt_store_sha256 *hash, unsigned char *digest);

#endif /* KVT_STORE_PREFIX_H */
