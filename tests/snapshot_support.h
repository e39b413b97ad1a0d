/*
 * What the tests of snapshots share: caches of any geometry, filled with numbers that depend on
 * (layer, token) alone, snapshots in memory, and functions that recompute the checksums of a
 * modified snapshot (snapshot_sign.c). Includes the public header and xxHash.
 */
#ifndef KVT_TEST_SNAPSHOT_SUPPORT_H
#define KVT_TEST_SNAPSHOT_SUPPORT_H

#include "support.h"

/* An allocator that counts, and fails when its countdown reaches zero. */
typedef struct counter {
    size_t live;    /* allocations not freed */
    long countdown; /* < 0: never fails */
} counter;

typedef struct model {
    kvt_group_config groups[2];
    uint32_t layers[2][40];
    uint32_t n_groups;
    uint64_t max_tokens;
    const char *fingerprint;
    counter *counter;      /* NULL: the ledger */
    ledger *ledger;        /* NULL: the C library */
    uint64_t budget_bytes; /* 0: none */
    uint32_t n_threads;    /* 0: one */
} model;

/* The config of a model; its groups are in groups[2]. */
kvt_config model_config(const model *m, kvt_group_config *groups);

/* One group of `layers` layers, numbered from 0. */
model model_of(uint32_t layers, uint32_t kv_heads, uint32_t k_dim, uint32_t v_dim, kvt_type k_type,
               kvt_type v_type);
/* Two groups whose layers alternate. */
model model_of_two(void);
kvt_cache *model_cache(const model *m);
kvt_seq *model_seq(kvt_cache *cache);
/* Append tokens length .. length + n - 1 in steps of `step` (the last one shorter). */
void model_append(const model *m, kvt_cache *cache, kvt_seq *seq, size_t n, size_t step);

/* A growing memory file: writer and reader. */
typedef struct bytes {
    unsigned char *data;
    size_t n, room, at;
    long fail_at; /* the write call that fails, < 0: none */
    size_t most;  /* most bytes that one read returns, 0: all */
} bytes;

kvt_writer bytes_writer(bytes *b);
kvt_reader bytes_reader(bytes *b);
void bytes_free(bytes *b);
/* Save; fails the test on an error. */
bytes saved(const kvt_cache *cache, const kvt_seq *seq, uint32_t codec);
/* Load from n bytes at data. */
kvt_status load_bytes(kvt_seq *seq, const unsigned char *data, size_t n, kvt_load_result *result);

/* Everything that can be read of a sequence, also by attention, as one hash. */
uint64_t state_hash(const model *m, kvt_cache *cache, const kvt_seq *seq);

/*
 * Recompute all checksums, digests and ids of a snapshot, as docs/format.md has them. Digests of
 * streams with a filter or codec stay those that the file has; so do a layer's of a geometry that
 * there is not.
 */
void resign(unsigned char *data, size_t n);
/* The same without the ids and digests of blocks, layers, token ids, positions and shifts. */
void resign_sums(unsigned char *data, size_t n);
/* The checksums only: no digest, no id. */
void resum(unsigned char *data, size_t n);
/*
 * Clear what says of a raw snapshot that nothing of it has a key in a store, as a removal makes it
 * say (flag 2 of the header), for comparisons with what never had the tokens.
 */
void give_keys(bytes *f);
/* Write index and end anew, for sections that were put in or taken out; resigns. */
void reindex(bytes *f);
/* Put a section in at an offset: n bytes of payload, then the room for its checksum. Reindexes. */
void add_section(bytes *f, size_t at, uint32_t type, uint32_t flags, uint64_t value,
                 const void *payload, size_t n);
/* Replace `gone` bytes at an offset by n others. */
void replace_bytes(bytes *f, size_t at, size_t gone, const void *data, size_t n);
/* Put all blocks into native sections, or into layer sections of raw streams without filter; the
 * streams of layer sections have to be such already. Resigns. */
void relay(bytes *f, int native);
/* Claim so many blocks, and their table's size; the table begins with the sum of an empty one. */
void claim_blocks(unsigned char *data, size_t n, uint64_t n_blocks);
/* Offset of the payload of the i-th section of a type; its size in *payload. */
size_t section_payload(const unsigned char *data, size_t n, uint32_t type, unsigned i,
                       size_t *payload);

void put32(unsigned char *p, uint32_t x);
void put64(unsigned char *p, uint64_t x);
uint32_t get32(const unsigned char *p);
uint64_t get64(const unsigned char *p);

#endif
