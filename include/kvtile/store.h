/*
 * kvtile/store.h: prefixes of prompts in a store that processes and machines share.
 *
 * A prompt's keys and values depend on its tokens alone. So blocks of 64 tokens are put into a
 * store under a key that is a hash of all tokens up to the block's end (SHA-256, chained from block
 * to block) and of all that the numbers depend on besides: the model's fingerprint, the sequence's
 * tag, the group's geometry and types, a namespace, a salt. Whoever has the same prompt finds the
 * blocks under the same keys, in whichever process or machine they were computed.
 *
 *   kvt_store store;
 *   kvt_store_open_directory(&config, &store);          or kvt_store_open_redis, or your own
 *   kvt_prefix_get(&store, seq, prompt, n, NULL, &got);  the longest prefix, into an empty sequence
 *   ... compute prompt[got.n_tokens] .. prompt[n - 1] ...
 *   kvt_prefix_put(&store, seq, NULL, NULL);             what the store has not got yet
 *
 * A value is verified before anything of it is used: it carries its key and digests of all its
 * bytes. One that is damaged, or was put under another's key, is never taken: it is removed, and
 * the prefix ends before it. A store that fails costs a status and a recompute.
 *
 * What stored values are is specified in docs/format.md, "Stored values".
 */
#ifndef KVTILE_STORE_H
#define KVTILE_STORE_H

#include "kvtile.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- what a store is ---- */

#define KVT_STORE_KEY_BYTES 32    /* a SHA-256 */
#define KVT_STORE_ERROR_BYTES 256 /* of a text, the terminating zero included */

/* The name of a value. Keys are uniformly distributed: any of their bytes can choose a shard. */
typedef struct kvt_store_key {
    uint8_t bytes[KVT_STORE_KEY_BYTES];
} kvt_store_key;

/* Why a call has failed, for people. */
typedef struct kvt_store_error {
    char text[KVT_STORE_ERROR_BYTES]; /* ends with a zero */
} kvt_store_error;

/* Bytes of a value that is put. */
typedef struct kvt_store_part {
    const void *data; /* [bytes] */
    size_t bytes;     /* there */
} kvt_store_part;

/* A value that is put: its parts, one after the other. */
typedef struct kvt_store_value {
    const kvt_store_part *parts; /* [n_parts] */
    size_t n_parts;              /* there */
    uint64_t bytes;              /* of all parts */
} kvt_store_value;

#define KVT_STORE_MORE 0 /* go on */
#define KVT_STORE_SKIP 1 /* no more of this copy of the value */
#define KVT_STORE_STOP 2 /* no more at all: the call ends with KVT_OK */

/*
 * Who takes the values that a get finds. Both are called on the thread of the get, without a lock
 * that a call of the store would need.
 */
typedef struct kvt_store_receiver {
    void *user; /* the first argument of both */
    /*
     * Bytes offset .. offset + bytes - 1 of value i of `total` bytes in all. The parts of a value
     * come in order, from offset 0, without a gap, and one value after the other; the values in any
     * order. Returns KVT_STORE_. A value of which not all parts have come was not found. One that
     * has not come in whole, or was answered by KVT_STORE_SKIP, may come again from offset 0, where
     * a store has another copy.
     */
    int (*part)(void *user, size_t i, uint64_t total, uint64_t offset, const void *data,
                size_t bytes);
    /*
     * Memory of the receiver's for bytes of value i from `offset` on, the next that part would be
     * given. *bytes, 1 at least: how many are wanted at most; then how many there is room for.
     * A store that fills it calls part with this address as data. NULL: there is none; part is
     * given memory of the store's, and may say that the value is to be skipped. Stores need not
     * call it.
     */
    void *(*place)(void *user, size_t i, uint64_t total, uint64_t offset, size_t *bytes);
} kvt_store_receiver;

/* A value that is in a store: see kvt_store.list. */
typedef struct kvt_store_entry {
    kvt_store_key key;    /* of the value */
    uint64_t bytes;       /* of it; UINT64_MAX: unknown */
    int64_t used_seconds; /* since it was used last: put, got or (directory) found; -1: unknown */
    int64_t left_seconds; /* until it expires; -1: it does not, or that is unknown */
} kvt_store_entry;

/* What a store has: see kvt_store.stats. The counters are of this process, since it was opened. */
typedef struct kvt_store_stats {
    uint64_t n_values;    /* in the store; UINT64_MAX: unknown, here and below */
    uint64_t bytes;       /* of them */
    uint64_t max_bytes;   /* its bound; 0: none */
    uint64_t n_got;       /* values found by get */
    uint64_t n_missed;    /* keys that get or exists did not find */
    uint64_t n_put;       /* values put */
    uint64_t n_evicted;   /* values removed to keep the bound */
    uint64_t n_failed;    /* calls that failed */
    uint64_t reserved[8]; /* 0 */
} kvt_store_stats;

/*
 * A store: functions over keys and values, which know nothing of kvtile. Zero the struct, set
 * struct_size, user and the functions; get, put, exists and remove are needed, the others may be
 * NULL.
 *
 * Each is called by any thread, several at once. A failure is answered as a kvt_status other than
 * KVT_OK with error->text set (error is never NULL), within a time that the store bounds:
 * KVT_ERR_IO, KVT_ERR_MEMORY, KVT_ERR_FULL (no room for a value), KVT_ERR_UNSUPPORTED.
 */
typedef struct kvt_store {
    size_t struct_size; /* sizeof(kvt_store) */
    void *user;         /* the first argument of all */
    /* The values of keys[n] to the receiver, as far as they are there. */
    kvt_status (*get)(void *user, const kvt_store_key *keys, size_t n,
                      const kvt_store_receiver *receiver, kvt_store_error *error);
    /*
     * Put n values, in place of those that are there. Each appears whole or not at all. *n_put: how
     * many of the first ones are there now, also where the call fails.
     */
    kvt_status (*put)(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                      size_t n, size_t *n_put, kvt_store_error *error);
    /* found[i] 1: there is a value for keys[i]; else 0. */
    kvt_status (*exists)(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                         kvt_store_error *error);
    /* Remove those that are there. */
    kvt_status (*remove)(void *user, const kvt_store_key *keys, size_t n, kvt_store_error *error);
    /* Each value in turn, until on_entry returns non-zero. Values put meanwhile may be missed. */
    kvt_status (*list)(void *user, int (*on_entry)(void *entry_user, const kvt_store_entry *entry),
                       void *entry_user, kvt_store_error *error);
    /* What it has and has done: all fields are written. */
    kvt_status (*stats)(void *user, kvt_store_stats *stats, kvt_store_error *error);
    /*
     * Bring the store into order: leftovers of processes that have died are removed, what is in it
     * is counted anew, its bound is kept.
     */
    kvt_status (*collect)(void *user, kvt_store_error *error);
    /* Free what user is. No other call is running, and none comes after. */
    void (*close)(void *user);
    /*
     * Gets that gain by running at once, on threads of the cache's, each for some of the keys; 0
     * stands for 1.
     */
    size_t n_at_once;
    void *reserved[3]; /* NULL */
} kvt_store;

/* Close a store, if it has a close, and zero the struct. NULL and a zeroed struct are fine. */
KVT_API void kvt_store_close(kvt_store *store);

/* ---- the stores that there are ---- */

/* A directory: zero the struct but for struct_size and path for the defaults. */
typedef struct kvt_directory_config {
    size_t struct_size; /* sizeof(kvt_directory_config) */
    const char *path;   /* of the directory; it is made, but not the one that it is in */
    uint64_t max_bytes; /* of all values; 0: no bound, or the one that the directory has already.
                           The last process that opens it with another one changes it for all */
    uint32_t sync;      /* 1: put waits for the disk. Without it a power cut may lose or damage
                           values that were put shortly before; damaged ones are never taken */
    uint32_t reserved;  /* 0 */
    char *error_text;   /* where a failure is told; may be NULL */
    size_t error_text_bytes; /* room there, the terminating zero included */
} kvt_directory_config;

/*
 * Open a directory as a store: one file a value, for any number of processes on one machine at
 * once. Each may be killed at any point; if it had forked a child amid a call of another thread's,
 * the call's lock is the child's too, and puts and openings fail until that ends or calls exec.
 * With a bound the values that were used the longest time ago are removed for new ones. exists uses
 * what it finds, too. Of the keys that one exists had (within a minute before a get, an hour before
 * a put, and one of the last 256 with several keys, 262144 in all), or without one those of one get
 * or put, the first ones' values are removed last, and none for the value of a later one: where
 * that has no room, put is KVT_ERR_FULL. So of a prompt that is longer than the bound the beginning
 * is put.
 *
 * KVT_ERR_IO           it cannot be made, opened or locked, or it is no directory
 * KVT_ERR_FORMAT       it is another program's, or of a newer version
 * KVT_ERR_UNSUPPORTED  the system has no POSIX files
 * KVT_ERR_ARG, KVT_ERR_MEMORY
 */
KVT_API kvt_status kvt_store_open_directory(const kvt_directory_config *config, kvt_store *store);

/* A Redis or Valkey server or cluster: zero the struct but for struct_size for the defaults. */
typedef struct kvt_redis_config {
    size_t struct_size;    /* sizeof(kvt_redis_config) */
    const char *host;      /* NULL: 127.0.0.1; of a cluster any of its nodes */
    const char *unix_path; /* of a socket, in place of host and port; or NULL */
    uint32_t port;         /* 0: 6379 */
    uint32_t database;     /* SELECT; 0 on a cluster */
    const char *username;  /* AUTH (Redis 6 on); NULL: the default user */
    const char *password;  /* AUTH; NULL: none */
    uint32_t tls;          /* 1: by TLS, 1.2 or newer; not with unix_path. 0: as it is */
    uint32_t ttl_seconds;  /* a value expires so long after it was put, got or asked for (exists,
                              kvt_prefix_put and _probe) last; 0: never */
    uint32_t connect_timeout_ms; /* 0: 500. TLS's handshake included, but not the lookup of a
                                    host's name, which the system bounds: use an address */
    uint32_t timeout_ms;         /* without a byte coming or going; 0: 1000 */
    uint32_t call_timeout_ms;    /* of one call of the store's functions as a whole, of which a
                                    kvt_prefix_get makes several; 0: 30000 */
    uint32_t retry_ms;  /* after a node could not be reached calls fail at once so long; 0: 1000 */
    uint32_t pipeline;  /* commands sent before the first one's answer is there; 0: 16 */
    uint32_t reserved;  /* 0 */
    const char *prefix; /* of the keys on the server; NULL: "kvt:" */
    /* Files in PEM, read by the opening; with tls alone: */
    const char *tls_ca_file;   /* certificates that are trusted; NULL: the system's */
    const char *tls_cert_file; /* the client's, for a server that wants one (tls-auth-clients), with
                                  the CAs below a root; NULL: none */
    const char *tls_key_file;  /* its private key, without a password; with tls_cert_file */
    char *error_text;          /* where a failure is told; may be NULL */
    size_t error_text_bytes;   /* room there, the terminating zero included */
} kvt_redis_config;

/*
 * Open a store on a Redis or Valkey server or cluster: one string a value. Redirections of a
 * cluster (MOVED, ASK) are followed; one that has had 1024 addresses in a store's life needs a
 * store opened anew. The server is not needed for the opening: a call that needs it connects, and
 * connects again after a failure. Calls of several threads run side by side, each on connections of
 * its own, which are kept for later calls. After a fork the child opens its own store.
 *
 * By TLS a server is sent nothing before its certificate was verified: that a trusted CA has
 * signed it, that it holds today, and that it is for the host that was connected to, which is
 * `host`, or what the cluster names a node, by name or by address. Nothing turns that off. A server
 * that does not pass, or refuses the client's certificate, is a call's KVT_ERR_IO with a text that
 * says why.
 *
 * KVT_ERR_UNSUPPORTED  the library was built without hiredis; or tls is 1, and it was built without
 *                      OpenSSL (CMake's KVTILE_TLS)
 * KVT_ERR_IO           a file for TLS cannot be read
 * KVT_ERR_ARG          one has no certificate or key, or the key is another certificate's; tls with
 *                      unix_path; a file for TLS without tls
 * KVT_ERR_MEMORY
 */
KVT_API kvt_status kvt_store_open_redis(const kvt_redis_config *config, kvt_store *store);

/*
 * Two stores as one: `near` before `far`, as a directory before a server. What near lacks comes
 * from far, and is put into near on the way; so does a value whose copy in near the receiver leaves
 * (KVT_STORE_SKIP), as kvt_prefix_get does with a damaged one. Puts and removals go to both. The
 * failure of one does not hide what the other has: exists then tells of that one alone, and a put
 * is done where one of both has taken all; such failures are in n_failed. A get fails where far has
 * failed and near has not got all that is asked for. A remove, list or collect fails where one of
 * both has. What far could not take while it was down it is not given later, as long as near has
 * it.
 * A list has near's values, then far's: those that both have come twice. Statistics are far's, but
 * n_got, n_missed, n_put and n_failed of both as one.
 *
 * Both stores are copied, and closed with the store made, which takes them over on KVT_OK.
 *
 * KVT_ERR_ARG     NULL; a store without its functions; both are one store that has a close, or
 *                 copies of one
 * KVT_ERR_MEMORY
 */
KVT_API kvt_status kvt_store_open_tiers(const kvt_store *near_store, const kvt_store *far_store,
                                        kvt_store *store);

/* ---- prefixes ---- */

/* Bytes that a block's numbers depend on besides its tokens: an image's hash, an adapter. */
typedef struct kvt_prefix_extra {
    uint64_t block;   /* its number: tokens 64 * block and on. Later blocks depend on it, too */
    const void *data; /* [bytes] */
    size_t bytes;     /* there */
} kvt_prefix_extra;

#define KVT_PREFIX_BLOCKS 0u     /* whole blocks */
#define KVT_PREFIX_CHECKPOINT 1u /* the sequence ends at a checkpoint, which travels too */

/* Zero the struct but for struct_size for the defaults. A put and a get have to agree on the first
   two and on the extras. */
typedef struct kvt_prefix_options {
    size_t struct_size;      /* sizeof(kvt_prefix_options) */
    const void *name_space;  /* [name_space_bytes]: whose prefixes these are; or NULL. Caches of
                                different parts of a model (layers, heads) need one each: keys
                                have the geometry, which may be the same */
    size_t name_space_bytes; /* 0 where name_space is NULL */
    const void *salt; /* [salt_bytes]: with a secret one keys cannot be guessed from tokens by those
                         who can look into the store but do not have it; or NULL */
    size_t salt_bytes;              /* 0 where salt is NULL */
    const kvt_prefix_extra *extras; /* [n_extras], ascending by block, or NULL */
    size_t n_extras;                /* 0 where extras is NULL */
    const int32_t
        *positions;       /* get, probe: [n_prompt] of the prompt's tokens; NULL: 0, 1, 2, ... */
    uint64_t n_tokens;    /* put: no more than the first so many; 0: all. Else 0 */
    uint32_t checkpoints; /* KVT_PREFIX_. put: checkpoints are put, too. get, probe: only where
                                 there is one */
    uint32_t reserved;    /* 0 */
    const uint64_t *checkpoint_tokens; /* get, probe: [n_checkpoint_tokens], ascending: lengths at
                                          which a checkpoint may be; NULL: any. With a
                                          pointer and none of them there is none */
    size_t n_checkpoint_tokens;        /* 0 where checkpoint_tokens is NULL */
} kvt_prefix_options;

/* What a call found or did. */
typedef struct kvt_prefix_result {
    uint64_t n_tokens;  /* put: of the sequence's first so many all that is needed is in the store
                              now, but for what others, or values of this call that are nearer
                              to the end or of a checkpoint, have evicted meanwhile. get:
                              restored. probe: that a get would restore */
    uint64_t n_values;  /* put: written; get: read */
    uint64_t n_bytes;   /* of these */
    uint64_t n_refused; /* get: damaged, or another's, and removed */
    uint64_t n_checkpoints; /* put: written */
    uint64_t reserved[3];   /* 0 */
} kvt_prefix_result;

/*
 * Put the sealed blocks of a sequence's prefix, as far as the store has not got them. A block is
 * put when it is full, sealed (kvt_group_config.residual_tokens: the newest 64 to 127 tokens are
 * not) and all its tokens were committed with ids. Tokens behind a removal (kvt_seq_remove) are not
 * put, as what they are depends on more than the tokens before them; nor is anything of a sequence
 * that was loaded into other types, or from a snapshot that was saved in others than it had, or
 * from a later token on, or with a removal that has moved no position; nor is a block of a snapshot
 * that this cache would have sealed otherwise (of other fine_tokens), or a checkpoint with one. A
 * window's group is put as far as its blocks are still there: put after each step of a long
 * prefill.
 *
 * options and result may be NULL. The sequence may be used by other calls that take it as const.
 *
 * KVT_ERR_STATE        a step is pending
 * KVT_ERR_ARG          NULL; a store without its functions; options that contradict
 * KVT_ERR_UNSUPPORTED  the library was built without libsodium
 * KVT_ERR_IO, KVT_ERR_FULL, ...  the store's; what has been put by then stays and is sound
 * KVT_ERR_CORRUPT      a block lies in a mapped snapshot (KVT_MAP_LAZY), which is damaged there
 * KVT_ERR_MEMORY
 */
KVT_API kvt_status kvt_prefix_put(const kvt_store *store, const kvt_seq *seq,
                                  const kvt_prefix_options *options, kvt_prefix_result *result);

/*
 * Restore the longest prefix of a prompt that the store has into an empty sequence: whole blocks of
 * 64 tokens, sealed, with positions and ids; at most n_prompt - 1 tokens, since the last token has
 * to be computed for its logits. With KVT_PREFIX_CHECKPOINT the longest one that ends at a
 * checkpoint, as a model with recurrent layers needs it: its blob is read by
 * kvt_seq_checkpoint_read. None at all is KVT_OK with n_tokens 0.
 *
 * Everything is read and verified before the sequence changes: on any error it is empty as before.
 * A checkpoint at 0 stays.
 * The sequence's tag is part of the keys: kvt_seq_set_tag before.
 *
 * KVT_ERR_STATE        the sequence is not empty, or a step is pending
 * KVT_ERR_ARG          NULL; a store without its functions; options that contradict; a token id
 *                      below 0
 * KVT_ERR_UNSUPPORTED  the library was built without libsodium
 * KVT_ERR_IO, ...      the store's: compute the prompt instead
 * KVT_ERR_CORRUPT      values are sound each, but not together: a window's blocks lack
 * KVT_ERR_LIMIT        a prompt, or a stored checkpoint, is too large for the address space
 * KVT_ERR_MEMORY, KVT_ERR_BUDGET
 */
KVT_API kvt_status kvt_prefix_get(const kvt_store *store, kvt_seq *seq, const int32_t *prompt,
                                  uint64_t n_prompt, const kvt_prefix_options *options,
                                  kvt_prefix_result *result);

/*
 * How much kvt_prefix_get would restore, without reading values: the store is asked which keys it
 * has. The sequence says of which cache and tag; its tokens have no influence. Which blocks a
 * checkpoint has in its own value only that tells: here it counts where all are there that this
 * cache seals at its length. By one put with other residual_tokens a get may restore more, or less.
 * Errors as kvt_prefix_get.
 */
KVT_API kvt_status kvt_prefix_probe(const kvt_store *store, const kvt_seq *seq,
                                    const int32_t *prompt, uint64_t n_prompt,
                                    const kvt_prefix_options *options, kvt_prefix_result *result);

/* What a value tells of itself. */
typedef struct kvt_value_info {
    size_t struct_size;    /* set to sizeof(kvt_value_info) before the call */
    uint32_t version;      /* of the format */
    uint32_t checkpoint;   /* 1: of a checkpoint */
    uint64_t n_tokens;     /* from the prompt's beginning up to its end */
    uint32_t n_blocks;     /* of keys and values */
    uint32_t reserved;     /* 0 */
    uint64_t blob_bytes;   /* of a checkpoint */
    uint64_t reserved2[4]; /* 0 */
} kvt_value_info;

/*
 * Check a value as a store has it, without a cache: that it is one, is that of the key (may be
 * NULL) and that all its digests hold. error_text (may be NULL) says why not.
 *
 * KVT_ERR_FORMAT, KVT_ERR_CORRUPT, KVT_ERR_MISMATCH (of another key), KVT_ERR_ARG
 */
KVT_API kvt_status kvt_value_check(const kvt_store_key *key, const void *data, size_t bytes,
                                   kvt_value_info *info, char *error_text, size_t error_text_bytes);

#ifdef __cplusplus
}
#endif

#endif /* KVTILE_STORE_H */
