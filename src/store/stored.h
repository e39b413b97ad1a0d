/*
 * Prefixes of sequences as keys and values of a store: what block_keys.c, value.c, stored.c, put.c
 * and get.c offer each other. Keys and values are specified in docs/format.md, "Stored values".
 */
#ifndef KVT_STORE_STORED_H
#define KVT_STORE_STORED_H

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

/* ---- block_keys.c: keys ---- */

/* The hash of a prefix, row by row (64 tokens), and what keys of its blocks are made of besides. */
typedef struct kvt_stored_chain {
    const kvt_cache *cache;
    const kvt_prefix_extra *extras; /* [n_extras], those of the rows that are left */
    size_t n_extras;
    uint64_t row; /* rows in the hash */
    unsigned char hash[KVT_STORE_KEY_BYTES];
    unsigned char geometry[KVT_MAX_GROUPS][KVT_STORE_KEY_BYTES];
} kvt_stored_chain;

void kvt_stored_chain_begin(kvt_stored_chain *chain, const kvt_seq *seq,
                            const kvt_prefix_options *options);
/* Stand behind the first `rows` rows, whose hash is known. */
void kvt_stored_chain_seek(kvt_stored_chain *chain, const kvt_prefix_options *options,
                           uint64_t rows, const unsigned char *hash);
/* One row more: ids[64], positions[64]. */
void kvt_stored_chain_add(kvt_stored_chain *chain, const int32_t *ids, const int32_t *positions);
/* The key of a group's block of the row that was added last. */
void kvt_stored_chain_key(const kvt_stored_chain *chain, uint32_t group, kvt_store_key *key);
/* The key of a checkpoint n tokens (0 to 63) behind the rows that were added. */
void kvt_stored_chain_checkpoint(const kvt_stored_chain *chain, const int32_t *ids,
                                 const int32_t *positions, size_t n, kvt_store_key *key);

/* ---- value.c ---- */

#define KVT_VALUE_VERSION 1u
#define KVT_VALUE_MAGIC "\x89KVB\r\n\x1a\n" /* 8 bytes */
#define KVT_VALUE_FIXED_BYTES 80            /* of the head, before the entries */
#define KVT_VALUE_ENTRY_BYTES 32
#define KVT_VALUE_CHECKPOINT 1u /* flag */

/* The head of a value: what it says before its digests. */
typedef struct kvt_value_head {
    uint32_t flags, n_entries;
    kvt_store_key key;
    uint64_t bytes; /* of the value */
    uint64_t n_tokens;
    uint64_t blob_bytes;
    int32_t next_position;
} kvt_value_head;

/* A block in a value. */
typedef struct kvt_value_entry {
    uint64_t row;
    uint32_t group, form, tokens, n_layers;
    uint64_t layer_bytes; /* of an image */
} kvt_value_entry;

/* Bytes of the head: entries, digests, checksum and padding included. n_layers: of all entries. */
uint64_t kvt_value_head_bytes(const kvt_value_head *head, uint64_t n_layers);
/* Where the digests are: of the layers in order, then of the blob, where the value is a
   checkpoint's. */
static inline uint64_t kvt_value_digests_at(const kvt_value_head *head)
{
    return KVT_VALUE_FIXED_BYTES + (uint64_t)head->n_entries * KVT_VALUE_ENTRY_BYTES;
}
/* Write all but the digests, which are there, and then the checksum of all. */
void kvt_value_put_fixed(const kvt_value_head *head, unsigned char *to);
void kvt_value_put_entry(const kvt_value_head *head, uint32_t i, const kvt_value_entry *entry,
                         unsigned char *to);
void kvt_value_put_sum(const kvt_value_head *head, uint64_t n_layers, unsigned char *to);
/*
 * Read a head's parts and check what can be without a cache: NULL, or why it is none. total: bytes
 * of the value as the store has it.
 */
const char *kvt_value_get_fixed(const unsigned char *from, uint64_t total, kvt_value_head *head);
/* The entries before i are there, and were sound. */
const char *kvt_value_get_entry(const kvt_value_head *head, uint32_t i, const unsigned char *from,
                                kvt_value_entry *entry);
/* With all entries read: that the sizes add up; and with the whole head there, its checksum. */
const char *kvt_value_check_sizes(const kvt_value_head *head, uint64_t n_layers,
                                  uint64_t image_bytes);
const char *kvt_value_check_sum(const kvt_value_head *head, uint64_t n_layers,
                                const unsigned char *from);

/* ---- stored.c: what put, get and probe share ---- */

/* The rows of a prefix: their keys, and which of them there are values for. */
typedef struct kvt_stored {
    kvt_snap_context context;
    kvt_cache *cache;
    const kvt_seq *seq;
    kvt_seq *takes; /* the same, of a get: its reserved blocks are used */
    const kvt_store *store;
    const char *call; /* its name, for texts */
    kvt_prefix_options options;
    kvt_store_error error;
    const int32_t *prompt; /* NULL: the sequence's own tokens */
    uint64_t n_tokens;     /* that may be used */
    size_t n_rows;         /* full ones of them */
    kvt_stored_chain chain;
    kvt_snap_buffer keys;   /* kvt_store_key [n_rows][n_groups] */
    kvt_snap_buffer hashes; /* [n_rows + 1][KVT_STORE_KEY_BYTES]: of the first rows */
    kvt_snap_buffer found;  /* uint8_t [n_rows][n_groups] */
    kvt_snap_buffer reach;  /* int32_t [n_rows]: the highest position up to a row's end */
    kvt_snap_buffer fits;   /* uint8_t [n_rows + 1], of kvt_stored_longest */
} kvt_stored;

/* Check the arguments and copy the options. */
kvt_status kvt_stored_admit(kvt_stored *p, const char *call, const kvt_store *store,
                            const kvt_seq *seq, const kvt_prefix_options *options);
/* The keys of the first n_tokens tokens' full rows. prompt NULL: of the sequence. */
kvt_status kvt_stored_make_keys(kvt_stored *p, const int32_t *prompt, uint64_t n_tokens);
void kvt_stored_release(kvt_stored *p);
static inline kvt_store_key *kvt_stored_keys(const kvt_stored *p)
{
    return (kvt_store_key *)(void *)p->keys.data;
}
static inline size_t kvt_stored_at(const kvt_stored *p, size_t row, uint32_t group)
{
    return row * p->cache->n_groups + group;
}
/* A token's position; ids and positions of tokens from row * 64 on, n of them (up to 64). */
int32_t kvt_stored_position(const kvt_stored *p, uint64_t token);
void kvt_stored_tokens(const kvt_stored *p, size_t row, size_t n, int32_t *ids, int32_t *positions);
/* A failure of the store: its text, after the call's name, is the cache's. error: p's or
   another. */
kvt_status kvt_stored_store_failed(const kvt_stored *p, kvt_status status, kvt_store_error *error);
/* Which of the rows' blocks are in the store. */
kvt_status kvt_stored_find(kvt_stored *p);
/* The first row behind the sinks that a group with a window needs at a length; else 0. */
size_t kvt_stored_first(const kvt_stored *p, uint32_t group, uint64_t n_tokens);
/* Whether a group needs a row at a length, given that first row. */
static inline int kvt_stored_needs(const kvt_stored *p, uint32_t group, size_t first, size_t row)
{
    return row >= first || row < kvt_sink_rows(&p->cache->groups[group]);
}
/* The most rows of which all is found that a sequence of them needs. */
size_t kvt_stored_longest(kvt_stored *p);
/* What get and probe begin with: the prompt is checked, and its keys are made. */
kvt_status kvt_stored_begin(kvt_stored *p, const int32_t *prompt, uint64_t n_prompt);

/* ---- stored_checkpoints.c ---- */

/* The key of a checkpoint at n_tokens tokens. */
void kvt_stored_checkpoint_key(kvt_stored *p, uint64_t n_tokens, kvt_store_key *key);
/* The checkpoints of a prompt that are in the store, from the deepest on. */
#define KVT_STORED_AT_ONCE 1024u
typedef struct kvt_stored_search {
    kvt_stored *p;
    uint64_t lengths[KVT_STORED_AT_ONCE]; /* [n] those that were looked for last */
    uint8_t found[KVT_STORED_AT_ONCE];    /* [n] */
    kvt_snap_buffer keys;                 /* kvt_store_key [n] */
    size_t n, i;                          /* from i on they have not been told yet */
    uint64_t left;                        /* lengths that were not looked for yet */
    int has_rows;                         /* the rows have been looked for */
} kvt_stored_search;
kvt_status kvt_stored_search_begin(kvt_stored_search *s, kvt_stored *p);
/* The next one's length, 0: there is none; and its key. The first one has the rows looked for. */
kvt_status kvt_stored_search_next(kvt_stored_search *s, uint64_t *n_tokens, kvt_store_key *key);
void kvt_stored_search_end(kvt_stored_search *s);
/* Whether of the first sealed[g] rows of each group all are found that a checkpoint needs. */
int kvt_stored_has_rows(const kvt_stored *p, uint64_t n_tokens, const size_t *sealed);
/* The same of those rows that this cache has sealed at that length. */
int kvt_stored_has_own_rows(const kvt_stored *p, uint64_t n_tokens);

/* ---- receive.c: values as they come ---- */

/* What a value is to be. */
typedef struct kvt_stored_want {
    uint64_t n_tokens; /* of a checkpoint, or to the block's end */
    size_t row;
    uint32_t group; /* UINT32_MAX: a checkpoint's value */
} kvt_stored_want;

/* A value that has come whole and is verified. */
typedef struct kvt_stored_got {
    kvt_value_head head;
    const kvt_value_entry *entries; /* [head.n_entries] */
    kvt_block **blocks;             /* [head.n_entries] with one reference each, which are given */
    const unsigned char *blob;      /* [head.blob_bytes] */
    size_t sealed[KVT_MAX_GROUPS];  /* of a checkpoint: rows before those of the value */
} kvt_stored_got;

typedef struct kvt_stored_receiver {
    kvt_stored *p;
    const kvt_stored_want *wants; /* [n_wants], as the keys of the get */
    const kvt_store_key *keys;    /* [n_wants] */
    size_t n_wants;
    kvt_store_get *get_near; /* get that by it, and remove nothing; NULL: all by the store's get */
    uint8_t *refused;        /* [n_wants] 1: the copy that came last is damaged, or another's */
    uint8_t *taken;          /* [n_wants] 1: it has come */
    /* Take the blocks of a value over. */
    kvt_status (*on_value)(void *user, size_t i, const kvt_stored_got *got);
    void *user;
    kvt_status status; /* that ended the get, other than the store's, which error is of */
    kvt_store_error error;
    uint64_t n_values, n_bytes;
    /* receive.c's: */
    size_t current; /* the value that is coming; SIZE_MAX: none */
    uint64_t total, offset;
    uint32_t stage;
    kvt_snap_buffer head, entries, blocks, blob;
    size_t have, need; /* bytes of the head, or of the blob */
    kvt_stored_got got;
    uint64_t n_layers, image_bytes;
    uint32_t entry, layer; /* whose image is coming */
    size_t layer_have;     /* bytes of it that have come */
    size_t digest;         /* of the head's digests: the next one's number */
} kvt_stored_receiver;

/* wants, keys, refused and taken stay the caller's. */
void kvt_stored_receiver_begin(kvt_stored_receiver *r, kvt_stored *p, const kvt_stored_want *wants,
                               const kvt_store_key *keys, size_t n, uint8_t *refused,
                               uint8_t *taken);
/*
 * Get all wanted values; on KVT_OK those that were refused have been removed from the store. A
 * checkpoint is wanted alone, and read to the end only where the rows before its value are found.
 * Several receivers may do so at once. A status of the store's leaves r->status KVT_OK, and its
 * text in r->error.
 */
kvt_status kvt_stored_receive(kvt_stored_receiver *r);
void kvt_stored_receiver_end(kvt_stored_receiver *r);

#endif /* KVT_STORE_STORED_H */
