/*
 * kvtile: a quantized, tiled key/value cache for transformers.
 *
 * A cache (kvt_cache) fixes the geometry, the storage types and the limits. Sequences
 * (kvt_seq) of a cache hold tokens. Tokens enter in steps: kvt_seq_begin reserves, kvt_append
 * stores one layer's keys and values, kvt_attend attends over all tokens of that layer
 * including the pending ones, kvt_seq_commit makes the step part of the sequence and
 * kvt_seq_abort drops it. A sequence can be saved to a file or a stream and taken up again.
 *
 * Rules that hold for every call:
 *  - It answers a kvt_status; results leave through out-pointers, written on success only.
 *  - A call that fails leaves the cache and its sequences as they were.
 *  - Nothing aborts, exits or prints. NULL where a pointer is required is KVT_ERR_ARG.
 *  - A text that names the cause of the last failure is kept on the cache: kvt_cache_error.
 *  - Threads: calls on different sequences of one cache may run at the same time. On one
 *    sequence only calls that take it as const may, unless a comment says otherwise.
 *  - With n_threads above 1 and no executor a cache has threads of its own. With the caller's they
 *    are at most as many as the CPUs that the creating thread may use at creation (affinity mask,
 *    and the control group's CPU quota rounded down); a later mask or quota is not seen. A call
 *    too short to gain by them (about 0.1 ms where it is alone) stays on the caller's thread.
 *    Between calls they sleep; they spin before, for 50 microseconds, only where calls
 *    follow each other within that time. They keep off the caller's CPU, block all signals
 *    but those of faults of their own (SIGBUS, SIGSEGV, ...), and serve one call of the cache at a
 *    time: another that comes meanwhile runs on its own thread.
 *    An engine with threads of its own has those run the tasks instead, by kvt_executor or by
 *    kvt_attend_plan and kvt_append_plan, so that no two sets of threads share the CPUs.
 *  - fork: in the child the caches of the parent work, on the caller's thread alone; no other
 *    thread may be inside a call on them at the fork. The child's own caches have threads.
 *  - The caller's floating-point rounding mode and flush-to-zero flags have no influence.
 *
 * What the stored bytes are is specified in docs/numerics.md, the file in docs/format.md.
 */
#ifndef KVTILE_KVTILE_H
#define KVTILE_KVTILE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header. */
#define KVT_VERSION_MAJOR 0
#define KVT_VERSION_MINOR 1
#define KVT_VERSION_PATCH 0

/* Before each function; define KVT_STATIC where the static library is linked. */
#if defined(KVT_STATIC)
#define KVT_API
#else
#define KVT_API __attribute__((visibility("default")))
#endif

/* Limits. A configuration beyond one of them is KVT_ERR_LIMIT. */
#define KVT_MAX_DIM 1024          /* k_dim and v_dim; both are multiples of 8 */
#define KVT_MAX_HEADS 1024        /* n_q_heads and n_kv_heads */
#define KVT_MAX_LAYERS 1024       /* layers of all groups together */
#define KVT_MAX_GROUPS 8          /* layer groups */
#define KVT_MAX_TOKENS 1073741824 /* tokens of one sequence, 2^30 */
#define KVT_MAX_FINGERPRINT 64    /* bytes */
#define KVT_MAX_TAG 256           /* bytes */
#define KVT_MAX_THREADS 256       /* of a cache */

#define KVT_BLOCK_TOKENS 64          /* the unit of allocation and of the snapshot */
#define KVT_RANGE_TOKENS 1024        /* the unit in which attention is merged: see kvt_attend */
#define KVT_RESIDUAL_TOKENS 64       /* the default of residual_tokens */
#define KVT_RESIDUAL_NONE UINT32_MAX /* residual_tokens: only the block being filled */
#define KVT_FINE_TOKENS 64           /* the default of fine_tokens */
#define KVT_FINE_NONE UINT32_MAX     /* fine_tokens: none */
#define KVT_SELECT_TOKENS 64         /* of a step that kvt_seq_commit_selected selects from */
#define KVT_TOKEN_NONE (-1)          /* the token id of a token that was committed without one */

/* ---- enums: values are pinned, they are part of the ABI and of the file format ---- */

/* What a call answers. */
typedef enum kvt_status {
    KVT_OK = 0,              /* done */
    KVT_ERR_ARG = 1,         /* an argument is NULL, out of range or contradicts another */
    KVT_ERR_STATE = 2,       /* the call does not fit the state: no step, a step pending, ... */
    KVT_ERR_VALUE = 3,       /* a number is not finite, or beyond what the type can store */
    KVT_ERR_MEMORY = 4,      /* the allocator returned NULL */
    KVT_ERR_BUDGET = 5,      /* the memory budget of the cache would be passed */
    KVT_ERR_FULL = 6,        /* max_tokens, or the memory to save to, would be passed */
    KVT_ERR_LIMIT = 7,       /* a size is beyond a KVT_MAX_ limit or overflows */
    KVT_ERR_UNSUPPORTED = 8, /* this build or this CPU cannot do it */
    KVT_ERR_IO = 9,          /* a file or stream could not be opened, read or written */
    KVT_ERR_FORMAT = 10,     /* not a kvtile snapshot, or of a version this build cannot read */
    KVT_ERR_CORRUPT = 11,    /* a snapshot is damaged: checksum, truncation, contradiction */
    KVT_ERR_MISMATCH = 12,   /* a sound snapshot of another model, geometry, type or key */
    KVT_ERR_CANCELLED = 13   /* the caller's progress or on_piece has ended the call */
} kvt_status;

/* How K or V is stored. Bits per element at 128 dims, scales and offsets included. */
typedef enum kvt_type {
    KVT_TYPE_F32 = 0, /* 32 */
    KVT_TYPE_F16 = 1, /* 16 */
    KVT_TYPE_I8 = 2,  /* K 8.375, V 8.125; the newest tokens f16: residual_tokens */
    KVT_TYPE_I4 = 3,  /* K 4.5625, V 4.125; likewise, and the first tokens i8: fine_tokens */
    KVT_TYPE_I5 = 4   /* V only: 5.125; likewise */
} kvt_type;

/* Element type of the caller's tensors. */
typedef enum kvt_dtype {
    KVT_F32 = 0, /* IEEE 754 binary32 */
    KVT_F16 = 1, /* IEEE 754 binary16 */
    KVT_BF16 = 2 /* the upper half of an f32 */
} kvt_dtype;

/* What kvt_read reads. */
typedef enum kvt_side {
    KVT_SIDE_K = 0, /* keys */
    KVT_SIDE_V = 1  /* values */
} kvt_side;

/* kvt_group_config.flags, recorded in snapshots. They concern sides stored as i8, i4 or i5. */
#define KVT_GROUP_NO_ROTATION                                                                      \
    1u /* do not rotate K (and q) by the signed Hadamard transform, as
                                      K of 4 bits never is: its scales are by dims */
#define KVT_GROUP_NO_OFFSET                                                                        \
    2u                             /* do not subtract a per-block offset vector from K; not with
                                      K of 4 bits, which has the middle of each dim's range */
#define KVT_GROUP_NO_V_ROTATION 8u /* do not rotate V (and the output back) likewise */
/*
 * V is the first v_dim dims of K and is not stored: multi-head latent attention (DeepSeek-V2,
 * arXiv 2405.04434: k_dim 576, v_dim 512, one kv head). kvt_append takes NULL for v; all else works
 * on V as if it had been appended. Asks for v_type == k_type, f32, f16 or i8, v_dim <= k_dim and,
 * where K is rotated, a v_dim that is a multiple of the largest power of two dividing k_dim.
 */
#define KVT_GROUP_V_IN_K 4u

/*
 * kvt_group_config.rope_pairing: which dims of q and K rotary position embedding turns together
 * (RoFormer, arXiv 2104.09864). Needed by kvt_seq_remove alone, to move tokens' positions.
 */
typedef enum kvt_rope {
    KVT_ROPE_UNKNOWN = 0,    /* not described: positions of stored keys cannot move */
    KVT_ROPE_HALVES = 1,     /* dim i with i + rope_dims / 2: GPT-NeoX, and transformers' Llama */
    KVT_ROPE_NEIGHBOURS = 2, /* dims 2i and 2i + 1: RoFormer, GPT-J, Meta's Llama */
    KVT_ROPE_NONE = 3        /* keys do not depend on positions: layers without RoPE */
} kvt_rope;

/* kvt_attend_args.flags */
#define KVT_ATTEND_CAUSAL 1u /* query i of n sees all tokens but the last n - 1 - i */
/*
 * How i8, i4 and i5 are multiplied; what is stored does not depend on it. At most one of the two:
 *
 *  (none)           near-exact: integer dot products, q and the softmax's weights rounded to
 *                   14 bits or more, 7 bits or more with i4 and i5. Adds less than 2% of i8's
 *                   own error, up to a quarter of that of i4 and i5, whose sum is 2 to 4%
 *                   larger (logits of unit deviation; where a few tokens of few blocks have
 *                   the weight, V of i4 and i5 is off by about 1% of the output, rarely 5%).
 *  KVT_ATTEND_F32   widen the codes and multiply as f32: the most exact, the slowest.
 *  KVT_ATTEND_FAST  7 bits or more: adds at most 1.5 times i8's error (128 dims, long
 *                   contexts; else V's part as that of i4 above); as the default where fewer bits
 *                   would save no time, and with i4, i5.
 *
 * docs/numerics.md has the bounds.
 */
#define KVT_ATTEND_F32 2u
#define KVT_ATTEND_FAST 4u

/* ---- types ---- */

/* A cache: geometry, types and limits, and the memory of its sequences. */
typedef struct kvt_cache kvt_cache;

/* A sequence of a cache's: its tokens, with their keys and values. */
typedef struct kvt_seq kvt_seq;

/*
 * A view of the caller's memory, [n_tokens][n_heads][dims], dims contiguous.
 *
 * token_stride, head_stride: bytes from one token, or head, to the next; 0 stands for the
 * dense layout (head_stride = dims * element size, token_stride = n_heads * head_stride).
 * Both are multiples of the element size, as is data. Token-major, head-major and views into
 * fused QKV buffers are fine: the smaller stride has to clear a row, the larger one a whole run
 * of the smaller. Inputs are never written.
 */
typedef struct kvt_tensor {
    void *data;      /* of the first token's first head */
    kvt_dtype dtype; /* of the elements */
    int64_t token_stride;
    int64_t head_stride;
} kvt_tensor;

/*
 * The caller's memory. alloc returns `bytes` bytes at a multiple of `alignment` (a power of
 * two), or NULL; free takes back what alloc returned, with the same size. Both may be called
 * from any thread that calls into the cache or runs tasks of it, several at once. Copied at
 * creation. alloc == NULL: the C library; on
 * Linux from 2 MiB on pages of the system's, huge ones where it has them (they make reading a long
 * context 1.1 to 1.2 times as fast: madvise large blocks likewise in an allocator of your own).
 */
typedef struct kvt_allocator {
    void *user; /* the first argument of both */
    void *(*alloc)(void *user, size_t bytes, size_t alignment);
    void (*free)(void *user, void *memory, size_t bytes);
} kvt_allocator;

/*
 * The caller's parallel-for: run calls task(arg, i) once for each i < n_tasks, from any
 * threads in any order, and returns when all are done. It may be called from several threads at
 * once, and while inside must not run other calls on the same cache (a thread that waits for
 * its tasks by stealing unrelated ones could come back to a lock that it holds). n_threads is how
 * many it has; no result depends on it. Copied at creation.
 */
typedef struct kvt_executor {
    void *user; /* the first argument of run */
    void (*run)(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n_tasks);
    uint32_t n_threads;
} kvt_executor;

/*
 * A layer group: layers that share geometry and storage types. Most models have one.
 * Make one with kvt_group_config_init.
 */
typedef struct kvt_group_config {
    size_t struct_size;     /* sizeof(kvt_group_config) */
    uint32_t n_layers;      /* of this group */
    uint32_t n_q_heads;     /* a multiple of n_kv_heads (MHA, GQA, MQA) */
    uint32_t n_kv_heads;    /* heads of K and V */
    uint32_t k_dim;         /* head dims of q and K: a multiple of 8, 8 to KVT_MAX_DIM */
    uint32_t v_dim;         /* head dims of V and of the output, likewise */
    kvt_type k_type;        /* how K is stored */
    kvt_type v_type;        /* how V is stored */
    uint32_t flags;         /* KVT_GROUP_ */
    const uint32_t *layers; /* [n_layers] the model's numbers of these layers, ascending; NULL:
                               the n_layers numbers after those of the groups before */
    uint64_t rotation_seed; /* seed of the rotations' signs; 0 is a seed like any other */
    /*
     * The residual window: how many of the newest tokens are held as f16, whatever i8, i4 or i5
     * sides the group has, until the block of 64 tokens that they are in is sealed, that is turned
     * into these types.
     * A block is sealed by the commit after which all its tokens are older than that; so with the
     * block being filled, residual_tokens to residual_tokens + 63 tokens are f16. 0: KVT_RESIDUAL_
     * TOKENS; KVT_RESIDUAL_NONE: only the block being filled. What a sealed block holds does not
     * depend on it.
     */
    uint32_t residual_tokens;
    /*
     * The sliding window of the group's layers: a query at position p sees a token at position x
     * only where p - x < window_tokens: its own position and the window_tokens - 1 before it, and
     * those after it as far as the causal rule or a mask allows, which hold as without a window.
     * By positions, whatever they are, not by indices. 0: no window. Attention reads only blocks of
     * 64 tokens that have a token in sight. What is stored does not depend on it.
     *
     * A commit releases the blocks of the group that no query can see whose position is at least
     * that of the next token, or was it up to 128 tokens before: the group's memory does not grow
     * with the length. (Snapshots keep what 64 tokens before may see.) Such tokens of the group can
     * no longer be read or attended over, and kvt_seq_truncate says how far back a sequence can go.
     * A step of n tokens has n more until its commit. Released blocks are kept for the next steps
     * (kvt_cache_trim).
     *
     * Source: Longformer (arXiv 2004.05150); Mistral 7B (arXiv 2310.06825), whose sliding_window
     * it is.
     */
    uint32_t window_tokens;
    /*
     * Attention sinks: the first sink_tokens tokens of a sequence, by index, are seen from beyond
     * the window too. Needs a window. Source: StreamingLLM (arXiv 2309.17453).
     */
    uint32_t sink_tokens;
    /*
     * How the group's keys depend on their positions, for kvt_seq_remove: dims rope_first_dim ..
     * rope_first_dim + rope_dims - 1 of q and K are turned by position * inverse frequency radians,
     * pair i of them by rope_inverse_frequencies[i] (as the model has them in the end: with NTK,
     * YaRN or Llama 3's scaling in them). All groups of a cache are described, or none.
     */
    kvt_rope rope_pairing;
    uint32_t rope_first_dim;               /* the first dim that is turned */
    uint32_t rope_dims;                    /* even; 0 where the pairing is UNKNOWN or NONE */
    const float *rope_inverse_frequencies; /* [rope_dims / 2], copied */
    /*
     * The first fine_tokens tokens of a sequence, rounded up to whole blocks of 64, are sealed as
     * i8 on the sides whose type is i4 or i5: attention sinks are among them, and much of a model's
     * attention is on them. 0: KVT_FINE_TOKENS; KVT_FINE_NONE: none. At most KVT_MAX_TOKENS. A
     * snapshot has the blocks as they are: one of a cache with another fine_tokens can be loaded.
     */
    uint32_t fine_tokens;
    uint32_t reserved; /* 0 */
} kvt_group_config;

/* Make one with kvt_config_init, then set groups, n_groups and max_tokens. */
typedef struct kvt_config {
    size_t struct_size;             /* sizeof(kvt_config) */
    const kvt_group_config *groups; /* [n_groups] of groups[0].struct_size each, copied; together
                                       they number the layers 0 .. n-1, each once */
    uint32_t n_groups;              /* 1 to KVT_MAX_GROUPS */
    uint32_t n_threads;  /* threads of one-call attend and append, the caller's included; 0: the
                            executor's, or 1. Above 1 needs an executor, or a build with a pool
                            (KVTILE_POOL). How many run: see "Rules", above */
    uint64_t max_tokens; /* of one sequence, 1 to KVT_MAX_TOKENS */
    uint64_t memory_budget_bytes; /* of what the cache keeps: itself, sequences, blocks; 0: no
                                     bound. What a save, load or visit holds for itself while it
                                     runs is not held against it: kvt_working_forecast */
    const void *fingerprint;      /* identifies the model's weights, e.g. a hash; in snapshots;
                                     loading one with another fingerprint is refused */
    size_t fingerprint_bytes;     /* 0 to KVT_MAX_FINGERPRINT, copied */
    kvt_allocator allocator;      /* alloc NULL: the C library */
    kvt_executor executor;        /* run NULL: threads of the cache's own, or inline */
    /*
     * A name from kvt_isa_name to force; NULL: the widest. Where that is "amx", creation gets the
     * process the permission that Linux wants for AMX's tile registers (ARCH_REQ_XCOMP_PERM). It is
     * for all threads and cannot be given back: from then on sigaltstack refuses, with ENOMEM, what
     * is smaller than getauxval(AT_MINSIGSTKSZ), about 12 KB (SIGSTKSZ was 8 KB). Where a thread
     * has such a stack already, Linux refuses the permission: "amx" is KVT_ERR_UNSUPPORTED then,
     * and NULL the widest but it. With another name, "avx512vnni" say, nothing is asked for.
     */
    const char *isa;
    char *error_text;        /* where creation and forecast say why they failed; may be NULL */
    size_t error_text_bytes; /* room there, the terminating zero included */
} kvt_config;

/* All zero but struct_size: the defaults, where there are any. */
static inline kvt_group_config kvt_group_config_init(void)
{
    kvt_group_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = sizeof c;
    return c;
}

/* Likewise: one thread, the C library's memory, no bound on it. */
static inline kvt_config kvt_config_init(void)
{
    kvt_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = sizeof c;
    return c;
}

/* A dense tensor of f32. */
static inline kvt_tensor kvt_tensor_f32(const float *data)
{
    kvt_tensor t;
    memset(&t, 0, sizeof t);
    memcpy(&t.data, &data, sizeof data); /* without a cast, which warns in C++ */
    t.dtype = KVT_F32;
    return t;
}

/*
 * Two groups out of one: the first n_first and last n_last layers, which many models need finer
 * than the others, with types of their own.
 *
 * group: all layers, with the types of those between. k_type, v_type: of the first and last ones.
 * groups: [2] groups[0] gets the layers between, groups[1] the first and last ones; all else is
 * copied. Where one of the two would have no layer, *n_groups is 1 and groups[0] the other one.
 * layers: [group->n_layers], the caller's, and not group->layers; the groups point into it until
 * kvt_cache_create has copied it.
 *
 * KVT_ERR_ARG: NULL, a wrong struct_size, no layers. n_first and n_last may be too many: then all
 * layers are first or last ones. Types are checked by kvt_cache_create. Safe at any time.
 */
KVT_API kvt_status kvt_group_split_ends(const kvt_group_config *group, uint32_t n_first,
                                        uint32_t n_last, kvt_type k_type, kvt_type v_type,
                                        kvt_group_config groups[2], uint32_t *n_groups,
                                        uint32_t *layers);

/* ---- library ---- */

/* One sentence for a status; for a number that is no status, a sentence that says so. */
KVT_API const char *kvt_status_string(kvt_status status);

/* "0.1.0": the library that runs. */
KVT_API const char *kvt_version(void);

/*
 * Names of the instruction sets that this build has kernels for and this CPU runs, narrowest
 * first; NULL from the end of the list on. Index 0 is "scalar". Changes nothing: see
 * kvt_config.isa about "amx".
 */
KVT_API const char *kvt_isa_name(uint32_t index);

/* ---- cache ---- */

/*
 * Create a cache. Everything in config is copied.
 *
 * KVT_OK               *cache is set; release it with kvt_cache_destroy
 * KVT_ERR_ARG          NULL, a wrong struct_size, a zero where a number is needed, a dim that is
 *                      no multiple of 8, heads that do not divide, unknown type or flag, a V
 *                      that cannot be a part of K, or dims of it that RoPE turns, sinks without a
 *                      window, layers numbered twice or not at all
 * KVT_ERR_LIMIT        beyond a KVT_MAX_ limit, or a size overflows
 * KVT_ERR_VALUE        one of rope_inverse_frequencies is not finite
 * KVT_ERR_UNSUPPORTED  isa is not in kvt_isa_name's list, or it is "amx" and the system does not
 *                      permit it; n_threads > 1 without a pool
 * KVT_ERR_MEMORY, KVT_ERR_BUDGET
 */
KVT_API kvt_status kvt_cache_create(const kvt_config *config, kvt_cache **cache);

/*
 * Release a cache. NULL is fine. Sequences that still exist stay usable and keep the memory;
 * it is freed with the last of them. Until then kvt_cache_error may still be called, nothing else.
 */
KVT_API void kvt_cache_destroy(kvt_cache *cache);

/*
 * Copy the text of the last failure on this cache or one of its sequences into buffer, cut to
 * buffer_bytes - 1 and terminated. "" when nothing has failed. KVT_ERR_ARG: NULL or no room.
 * Safe at any time; with several threads it is the last failure of any of them.
 */
KVT_API kvt_status kvt_cache_error(const kvt_cache *cache, char *buffer, size_t buffer_bytes);

/* The name of the kernels in use, as in kvt_isa_name; NULL for NULL. */
KVT_API const char *kvt_cache_isa(const kvt_cache *cache);

/*
 * Bytes that the cache holds from its allocator now: all of them, its own structures, free
 * blocks kept for reuse, its sequences and the working memory of saves, loads and visits that run
 * included. 0 for NULL. (The stacks of its threads are the system's, and so is what the C library
 * takes to read a folder.) Safe at any time.
 */
KVT_API uint64_t kvt_cache_memory_bytes(const kvt_cache *cache);

/*
 * What a cache's blocks are used for. A block is 64 tokens of one group's keys and values. Those
 * that lie in a mapped snapshot (KVT_MAP_) count nowhere. Set struct_size to
 * sizeof(kvt_cache_stats) before the call.
 */
typedef struct kvt_cache_stats {
    size_t struct_size;
    uint64_t bytes;           /* as kvt_cache_memory_bytes */
    uint64_t blocks_free;     /* kept by the cache for reuse: kvt_cache_trim gives them back */
    uint64_t blocks_reserved; /* kept by sequences for steps to come: kvt_seq_reserve */
    uint64_t blocks_used;     /* that hold tokens of a sequence, each counted once */
    uint64_t blocks_shared; /* of blocks_used: with several references, of sequences (kvt_seq_fork)
                                 or their checkpoints */
    uint64_t
        blocks_sealed; /* of blocks_used: i8, i4 or i5, where groups have open blocks as well */
    /* The same in bytes, with the blocks of positions and token ids that belong to them: */
    uint64_t bytes_free;     /* of blocks_free */
    uint64_t bytes_reserved; /* of blocks_reserved */
    uint64_t bytes_used;     /* of blocks_used */
    uint64_t bytes_shared;   /* of blocks_shared */
    uint64_t reserved[8];    /* 0 */
} kvt_cache_stats;

/*
 * Exact when no other thread is inside a call on the cache. KVT_ERR_ARG: NULL, a struct_size that
 * is not this version's. Safe at any time.
 */
KVT_API kvt_status kvt_cache_get_stats(const kvt_cache *cache, kvt_cache_stats *stats);

/*
 * What kvt_cache_memory_bytes would answer for a cache of this config with n_sequences
 * sequences of n_tokens tokens each; exact where each had them in one step, and no window has
 * released any. In other steps they take as much, or an open block less for each group and
 * sequence, where n_tokens is no multiple of KVT_BLOCK_TOKENS. A cache with this as its budget can
 * hold them, whatever the steps; but of a group with a window, which may have more before n_tokens
 * than it has there, it is the most on the way in steps of one token, with positions 0, 1, 2, ...
 * For steps of up to m tokens, which have m more until their commit, give this call a window_tokens
 * that is m above the larger of the group's window_tokens and residual_tokens. Checkpoints come on
 * top: they keep what a window would release.
 *
 * Not held against the budget are open blocks (f16) that have their sealed form beside them:
 * those that a pending step seals, and after the commit those whose sealing a truncate may take
 * back, until the next begin. For each sequence and group with an i8, i4 or i5 side that is at most
 * residual_tokens / 64 + 3 open blocks while a step is pending (until a sequence loaded from a
 * snapshot of a larger window has sealed what is beyond its own, of that window), else one; an open
 * block has 16 bits an element. Nor are the keys that a pending step at token 64 holds
 * (kvt_seq_begin). Those of a sequence with a reserve (kvt_seq_reserve) are held against it; so are
 * open blocks that a fork or a checkpoint shares, and, when that is gone, until the next step or
 * truncate of the sequence.
 *
 * KVT_ERR_ARG, KVT_ERR_LIMIT, KVT_ERR_VALUE, KVT_ERR_UNSUPPORTED as kvt_cache_create; KVT_ERR_LIMIT
 * also when n_tokens is above max_tokens or the sum overflows. The cache's own part includes the
 * scratch of one-call attention, which grows with n_threads and (up to 2^20, or to about the window
 * of a group that has one) with max_tokens.
 */
KVT_API kvt_status kvt_memory_forecast(const kvt_config *config, uint64_t n_sequences,
                                       uint64_t n_tokens, uint64_t *bytes);

/*
 * The most that one kvt_seq_save (zstd_level up to 1) or one kvt_seq_load of a sequence of up to
 * n_tokens tokens holds for itself while it runs: buffers, tables, zstd. From the allocator,
 * counted in kvt_cache_memory_bytes, given back before the call returns, and not held against the
 * budget, so that a sequence can be put away just when the budget is used up. It comes on top: once
 * for each such call that runs at the same time. The blocks that a load fills are not in it; they
 * are held against the budget. kvt_visit takes less. Levels of zstd above 1 take more, level 19 up
 * to 83 MiB. Each of the cache's threads (n_threads, or the executor's) has buffers of its own.
 *
 * An upper bound, at most about twice what is used from 64 tokens on, for sequences without
 * checkpoints. With them a save takes up to 100 bytes more for each of the sequence's blocks and
 * 200 for each that only checkpoints have, and 12 for each that a checkpoint has other than the
 * sequence; a load up to 150 for each that only checkpoints have, and up to twice the largest blob.
 * The parents of a delta take 300 KiB together, 80 KiB each and 180 bytes for each of their blocks;
 * a key 0.5 MiB for the file and for each of its parents, and with several threads 3 MiB more for
 * each of up to 4 (twice the segments of a file that another program has made with larger ones); a
 * mapped snapshot 100 bytes and a byte a layer for each block, as long as it is mapped; pieces and
 * conversions come besides. A load of some of a file's layers (kvt_load_options.layers) verifies
 * all of them: it takes what it would into a cache of all. Errors as kvt_memory_forecast.
 */
KVT_API kvt_status kvt_working_forecast(const kvt_config *config, uint64_t n_tokens,
                                        uint64_t *bytes);

/*
 * Bytes of codes, scales and offsets that one token adds to the cache, over all layers and
 * heads, without padding and bookkeeping: the figure to compare formats by. Offsets count
 * 1/64. 0 for NULL.
 */
KVT_API double kvt_cache_bytes_per_token(const kvt_cache *cache);

/*
 * Give blocks that no sequence uses back to the allocator (truncate and clear keep them).
 * KVT_ERR_ARG: NULL.
 */
KVT_API kvt_status kvt_cache_trim(kvt_cache *cache);

/* ---- sequences ---- */

/*
 * Add an empty sequence. Allocates its block table: 8 * (2 * n_groups + 1) bytes for each 64
 * of max_tokens. KVT_ERR_ARG, KVT_ERR_MEMORY, KVT_ERR_BUDGET. Safe at any time.
 */
KVT_API kvt_status kvt_seq_create(kvt_cache *cache, kvt_seq **seq);

/*
 * Take blocks ahead of time, so that the sequence can grow to n_tokens without an allocation,
 * whatever its steps. From then on the blocks of its own that it gives up (truncate, clear,
 * sealing) stay with it until it is destroyed, and are held against the budget, all of them; so is
 * the memory for keys that kvt_seq_begin tells of, for 63 tokens, where n_tokens is above 64.
 *
 * A load and a kvt_prefix_get use what is reserved, and what they replace is reserved then.
 *
 * Reserve again after a fork or a kvt_seq_checkpoint, which share blocks that a step then copies;
 * after a truncate or a clear that gives up blocks that are shared or mapped; after a
 * kvt_seq_remove that moves tokens into the first fine_tokens, or takes out such as a window had
 * released before the reserve; and after a clear, or a truncate to what lies in the sinks of a
 * group with a window, where the window had released blocks before the reserve, which does not
 * take these again.
 *
 * KVT_ERR_ARG    NULL
 * KVT_ERR_STATE  a step is pending
 * KVT_ERR_FULL   n_tokens is above max_tokens
 * KVT_ERR_MEMORY, KVT_ERR_BUDGET: nothing is taken
 */
KVT_API kvt_status kvt_seq_reserve(kvt_seq *seq, uint64_t n_tokens);

/*
 * Make a sequence of the first n_tokens committed tokens of another one: many conversations on one
 * prompt, beams, a draft that may be dropped. No keys and values are copied: both have the same
 * blocks, which the memory budget counts once, and go their own ways from there. Of a block that is
 * not full, the first step of either makes a copy (its begin, of the filled part), while it is
 * shared: all but one, or all of them where they begin at the same time. The copy is as the other
 * would be after a truncate to n_tokens; it keeps the cache alive as any sequence, and either is
 * destroyed before the other.
 *
 * A pending step stays with seq alone; of a block that is not full, which it adds to, the copy gets
 * its own at once, or a checkpoint's that is there. What seq has reserved (kvt_seq_reserve)
 * suffices no more where blocks are shared: reserve again.
 *
 * KVT_ERR_ARG    NULL, n_tokens above the length
 * KVT_ERR_STATE  a window has released what n_tokens tokens need: kvt_seq_reachable
 * KVT_ERR_MEMORY, KVT_ERR_BUDGET
 */
KVT_API kvt_status kvt_seq_fork(kvt_seq *seq, uint64_t n_tokens, kvt_seq **copy);

/*
 * Release a sequence, a pending step included; blocks that no other sequence has go to the cache.
 * NULL is fine.
 */
KVT_API void kvt_seq_destroy(kvt_seq *seq);

/* Tokens committed. 0 for NULL, as the other counts below. */
KVT_API uint64_t kvt_seq_length(const kvt_seq *seq);

/* 1 when no token is committed (or seq is NULL), else 0. */
KVT_API int kvt_seq_is_empty(const kvt_seq *seq);

/* Tokens of the pending step; 0 when there is none. */
KVT_API uint64_t kvt_seq_pending(const kvt_seq *seq);

/*
 * The RoPE position of the next token: what kvt_seq_set_next_position has said, else the last
 * committed token's position + 1, or 0 when there is none. INT32_MAX where that would pass it.
 */
KVT_API int32_t kvt_seq_next_position(const kvt_seq *seq);

/*
 * Set it: where positions do not count tokens, as behind an image in M-RoPE (Qwen2-VL, arXiv
 * 2409.12191), whose patches share positions. Holds for the next begin without positions; a commit,
 * a truncate that takes tokens away, and clear end it. A fork at the full length has it too.
 *
 * KVT_ERR_ARG    NULL, a negative position
 * KVT_ERR_STATE  a step is pending
 */
KVT_API kvt_status kvt_seq_set_next_position(kvt_seq *seq, int32_t position);

/*
 * Bytes that say what, besides the model's weights (kvt_config.fingerprint) and the tokens, the
 * keys and values depend on: a LoRA adapter, a template, a tenant's salt. Forks have the tag of
 * their source. Sequences of different tags may be in one attend call. An empty sequence has none
 * (0 bytes) until it is set; kvt_seq_clear keeps it.
 *
 * KVT_ERR_ARG    NULL
 * KVT_ERR_LIMIT  bytes is above KVT_MAX_TAG
 * KVT_ERR_STATE  the sequence has tokens, or a step is pending: they were computed under its tag
 */
KVT_API kvt_status kvt_seq_set_tag(kvt_seq *seq, const void *tag, size_t bytes);

/*
 * Copy the tag: *bytes is its size, and up to `room` bytes of it are in buffer (which may be NULL
 * where room is 0). KVT_ERR_ARG: NULL.
 */
KVT_API kvt_status kvt_seq_tag(const kvt_seq *seq, void *buffer, size_t room, size_t *bytes);

/*
 * Length that the sequence can reach at least in steps of one token without allocating: with its
 * own blocks, reserved ones included, and the cache's free blocks (which are there for any sequence
 * of it). At most max_tokens.
 */
KVT_API uint64_t kvt_seq_capacity(const kvt_seq *seq);

/* max_tokens of the config. */
KVT_API uint64_t kvt_seq_max_tokens(const kvt_seq *seq);

/*
 * Bytes of this sequence: its blocks, table and checkpoints, what q is turned by for keys that
 * kvt_seq_remove has moved, and the keys that a pending step holds (see kvt_seq_begin). What it
 * shares with others counts in full, blocks of a mapped snapshot not at all.
 */
KVT_API uint64_t kvt_seq_memory_bytes(const kvt_seq *seq);

/* As kvt_seq_memory_bytes counts. Set struct_size to sizeof(kvt_seq_stats) before the call. */
typedef struct kvt_seq_stats {
    size_t struct_size;
    uint64_t own_bytes;    /* that only this sequence has, checkpoints included: they go with it */
    uint64_t shared_bytes; /* of blocks and checkpoints that other sequences have as well */
    uint64_t reserved[4];  /* 0 */
} kvt_seq_stats;

/* KVT_ERR_ARG: NULL, a struct_size that is not this version's. */
KVT_API kvt_status kvt_seq_get_stats(const kvt_seq *seq, kvt_seq_stats *stats);

/*
 * Token ids, or positions, of tokens first .. first + n - 1. ids without a value are
 * KVT_TOKEN_NONE. Committed tokens only. KVT_ERR_ARG: NULL, or a range beyond the length.
 */
KVT_API kvt_status kvt_seq_token_ids(const kvt_seq *seq, uint64_t first, uint64_t n,
                                     int32_t *token_ids);
KVT_API kvt_status kvt_seq_positions(const kvt_seq *seq, uint64_t first, uint64_t n,
                                     int32_t *positions);

/*
 * The positions at which the keys were computed, which kvt_read gives them for: those of
 * kvt_seq_positions but where kvt_seq_remove has moved them since. Errors likewise.
 */
KVT_API kvt_status kvt_seq_key_positions(const kvt_seq *seq, uint64_t first, uint64_t n,
                                         int32_t *positions);

/*
 * Forget all tokens, a pending step and all checkpoints, also one at 0 (which kvt_seq_truncate to 0
 * keeps); the blocks stay with the cache for reuse.
 * KVT_ERR_ARG: NULL.
 */
KVT_API kvt_status kvt_seq_clear(kvt_seq *seq);

/*
 * Shorten the sequence to its first n_tokens (speculative rollback). Never allocates.
 *
 * Up to 64 tokens of the last step, taken back before the next begin, leave no trace: the sequence
 * is as if it had never had them, bit for bit. (But a position that kvt_seq_set_next_position had
 * set for the step is gone, what a window has released at the greater length stays so, see
 * kvt_seq_reachable, and a block that an earlier truncate has cut and the step has opened again,
 * see below, stays open.) Farther back, blocks that are sealed stay so, which
 * shows in the tokens that become part of the residual window again; up to residual_tokens back the
 * sequence is the same again once it has its old length, unless kvt_seq_remove has taken block 0
 * out (docs/numerics.md, "Open rows"). A cut inside a sealed block leaves what is before it
 * untouched, and what is appended there is sealed at once; but a block with K of 4 bits, unless K
 * is i8 there (fine_tokens), is open from the next begin on, and sealed again when it is full.
 *
 * To a checkpoint (kvt_seq_checkpoint) however far back the sequence is exactly what it was there;
 * at its own length too, where a step that was aborted may have opened a block of 4-bit K again:
 * there the next position alone stays. Checkpoints behind n_tokens are dropped.
 *
 * KVT_ERR_ARG    NULL, or n_tokens above the length
 * KVT_ERR_STATE  a step is pending, or a window has released what n_tokens tokens need; the text
 *                says what can be reached: kvt_seq_reachable
 */
KVT_API kvt_status kvt_seq_truncate(kvt_seq *seq, uint64_t n_tokens);

/*
 * The largest number of tokens, at most n_tokens, to which the sequence can be truncated: n_tokens
 * (or the length), but where windows have released blocks what is still there, which is the newest
 * 128 tokens and more (64 after a load; fewer by the tokens that a truncate has taken back, until
 * as many have come again, so 64 after 64 drafts; and by those that kvt_seq_remove has taken out
 * of them), or the nearest checkpoint before. 0 and the length are always possible.
 */
KVT_API uint64_t kvt_seq_reachable(const kvt_seq *seq, uint64_t n_tokens);

/*
 * Take tokens first .. first + n - 1 out of a sequence, whose later tokens move up: a conversation
 * that outlives its context loses its oldest turns. n and first are multiples of 64, or the
 * tokens lie behind all that is sealed: among the newest residual_tokens to residual_tokens + 63.
 *
 * Where the groups' RoPE is described (kvt_group_config.rope_pairing), the later tokens' positions
 * move too, by what the first of them stood behind the first one taken out, so that no gap is left.
 * No stored key changes: attention turns q by as much as a key has moved, which is exact however
 * often it moves. Without a description positions stay as they are, with a gap. (Open blocks that a
 * load has converted, or a file has, may store their keys less different offsets: a single token
 * that comes from one into another is rounded to f16 once more.)
 *
 * Checkpoints behind `first` are dropped. Blocks that are shared stay as they are for the others.
 * Taking out the last tokens is kvt_seq_truncate.
 *
 * KVT_ERR_ARG          NULL, n 0, tokens beyond the length
 * KVT_ERR_STATE        a step is pending; or a position would leave 0 .. INT32_MAX (positions that
 *                      do not ascend); or tokens before `first`, which a window has released,
 *                      would come into sight; or the sinks of a group that has released tokens
 * KVT_ERR_UNSUPPORTED  neither whole blocks nor among the open ones; or block 0 of a group
 *                      whose keys have an offset (i8, i4), with KVT_RESIDUAL_NONE; or single
 *                      tokens of block 0 of one, where there are more than 64 tokens; or a key
 *                      would be too large less the offset of the block that it comes into
 * KVT_ERR_CORRUPT      what has to be copied lies in a mapped snapshot that is damaged there
 * KVT_ERR_MEMORY, KVT_ERR_BUDGET
 *
 * Source: the shift of StreamingLLM's cache (arXiv 2309.17453), by rotating q instead of K.
 */
KVT_API kvt_status kvt_seq_remove(kvt_seq *seq, uint64_t first, uint64_t n);

/* ---- checkpoints ---- */

/*
 * Mark the length that the sequence has now as one that it can be truncated to, or forked at,
 * exactly: as if nothing had come behind, whatever a window has released and whatever has been
 * sealed since. blob: `bytes` bytes of the caller's, copied, that stay with it: the state of
 * recurrent layers (which cannot be truncated), a sampler's, the position in an image. One that is
 * there already is replaced. Forks have the checkpoints of their source up to their own length.
 *
 * It has references to the blocks that a step would change or a window release: for each group the
 * window's, and the one to three open blocks. No keys and values are copied but for the block that
 * is not full, by the next begin.
 *
 * KVT_ERR_ARG    NULL
 * KVT_ERR_STATE  a step is pending
 * KVT_ERR_LIMIT  bytes overflows
 * KVT_ERR_MEMORY, KVT_ERR_BUDGET: an earlier checkpoint of this length stays
 */
KVT_API kvt_status kvt_seq_checkpoint(kvt_seq *seq, const void *blob, size_t bytes);

/*
 * The lengths at which there are checkpoints, ascending: *n of them, the first `room` in tokens
 * (which may be NULL where room is 0). KVT_ERR_ARG: NULL.
 */
KVT_API kvt_status kvt_seq_checkpoints(const kvt_seq *seq, uint64_t *tokens, size_t room,
                                       size_t *n);

/*
 * Copy the blob of the checkpoint at n_tokens: *bytes is its size, and up to `room` bytes of it are
 * in buffer (which may be NULL where room is 0). KVT_ERR_ARG: NULL, no checkpoint there.
 */
KVT_API kvt_status kvt_seq_checkpoint_read(const kvt_seq *seq, uint64_t n_tokens, void *buffer,
                                           size_t room, size_t *bytes);

/* Drop the checkpoint at n_tokens. KVT_ERR_ARG: NULL, no checkpoint there. */
KVT_API kvt_status kvt_seq_checkpoint_drop(kvt_seq *seq, uint64_t n_tokens);

/* ---- steps ---- */

/*
 * Begin a step of n_tokens tokens: reserve room for them in every layer. The only call of a
 * step that allocates.
 *
 * positions: [n_tokens], or NULL: they count on from kvt_seq_next_position. >= 0. Copied.
 *
 * What is committed stays as it is for attention and reading back until the commit, but for a block
 * that begin opens again: one with K of 4 bits that a truncate has cut (kvt_seq_truncate). Its keys
 * are f16 of what they were from then on, and after an abort, too.
 *
 * A step of up to KVT_SELECT_TOKENS tokens that begins at token 1 to 63 of the sequence and goes on
 * beyond token 63 also takes memory for the keys of its tokens from 64 on, in groups whose K
 * has an offset (i8, i4): 4 * k_dim bytes for each kv head, layer and such token, of which there
 * are at most 63. It is for kvt_seq_commit_selected, is given back when the step ends, and is not
 * held against the budget.
 *
 * KVT_ERR_ARG     NULL, n_tokens 0, a negative position, or one that would pass INT32_MAX
 * KVT_ERR_STATE   a step is pending already
 * KVT_ERR_FULL    length + n_tokens is above max_tokens
 * KVT_ERR_CORRUPT  what the step seals or copies lies in a mapped snapshot (KVT_MAP_LAZY), which is
 *                  damaged there
 * KVT_ERR_MEMORY, KVT_ERR_BUDGET
 */
KVT_API kvt_status kvt_seq_begin(kvt_seq *seq, uint64_t n_tokens, const int32_t *positions);

/*
 * Append the pending step's keys and values to one layer of a sequence.
 *
 * k: [n_tokens][n_kv_heads][k_dim], keys after RoPE
 * v: [n_tokens][n_kv_heads][v_dim], NULL for a group with KVT_GROUP_V_IN_K
 * Both f32, f16 or bf16, any token and head stride; copied. n_tokens is the step's.
 *
 * KVT_OK          all tokens appended; attend on this layer sees them
 * KVT_ERR_STATE   no step is pending, or this layer has its tokens already
 * KVT_ERR_ARG     no such layer, a NULL pointer, a v where V is in K, an unknown dtype, strides
 *                 that overlap
 * KVT_ERR_VALUE   a value is not finite, or beyond f16 for f16 storage, or a row has an
 *                 element that its side cannot take: of i8 beyond 8e6, of i4 and i5 V beyond 2e6,
 *                 after the rotation; of i4 K beyond 2.4e5, less the offset. Magnitudes up to
 *                 240,000 never have it in i8, in i4 and i5 up to 60,000. The layer can be
 *                 appended again
 * On any error the sequence is unchanged.
 *
 * What is stored depends on the tokens' K and V alone, not on the steps they come in. Tokens of
 * i8, i4 and i5 sides are f16 first; the append of a later step turns blocks that have become old
 * into these types (residual_tokens). Tasks use up to 250 KiB of stack, and up to 360 KiB where a
 * head has more than 256 dims (as optimized by gcc 12 and clang 14).
 */
KVT_API kvt_status kvt_append(kvt_seq *seq, uint32_t layer, const kvt_tensor *k,
                              const kvt_tensor *v);

/*
 * The same in parts, for an engine whose threads already run together. Plan, then call the
 * task for every i < n_tasks, from any threads in any order, then finish; k and v are read
 * by the tasks. The errors are kvt_append's; KVT_ERR_VALUE comes from finish (a task that
 * meets one returns it as well). Fields with a trailing underscore are the library's.
 */
typedef struct kvt_append_plan {
    size_t n_tasks;
    kvt_seq *seq_;
    kvt_tensor k_, v_;
    uint64_t step_;
    uint32_t layer_;
    int32_t status_;
    uint64_t done_[KVT_MAX_HEADS * 2 / 64]; /* a bit a task */
    uint64_t reserved_[4];
} kvt_append_plan;

/* Errors: those of kvt_append but KVT_ERR_VALUE. */
KVT_API kvt_status kvt_append_plan_init(kvt_append_plan *plan, kvt_seq *seq, uint32_t layer,
                                        const kvt_tensor *k, const kvt_tensor *v);
/*
 * Task i. KVT_ERR_ARG: NULL, i not below n_tasks. KVT_ERR_STATE: the plan's step has ended.
 * KVT_ERR_VALUE: see kvt_append; the plan has failed then, the layer can be appended with another.
 */
KVT_API kvt_status kvt_append_task(kvt_append_plan *plan, size_t i);
/*
 * KVT_ERR_STATE: not every task has run, or the plan's step has ended. KVT_ERR_VALUE: a task has
 * answered it, also if others have not run.
 */
KVT_API kvt_status kvt_append_finish(kvt_append_plan *plan);

/*
 * Make the pending tokens part of the sequence.
 *
 * token_ids: [n_tokens] of the step, >= 0 or KVT_TOKEN_NONE; NULL: all KVT_TOKEN_NONE.
 *
 * KVT_ERR_STATE  no step is pending, or a layer was not appended: the error text names it, and
 *                the step stays pending
 * KVT_ERR_ARG    NULL, a token id below -1
 */
KVT_API kvt_status kvt_seq_commit(kvt_seq *seq, const int32_t *token_ids);

/*
 * Make some of the pending tokens part of the sequence, in order, and drop the others: the accepted
 * path of a draft tree, of which all nodes were one step (attended with kvt_attend_item.mask). The
 * sequence is then, bit for bit, as if the step had had these tokens alone, with their positions.
 * Never allocates; moves the tokens behind the first one that is left out, and no others.
 *
 * indices: [n] of the step's tokens, from 0 on, strictly ascending
 * n: 0: as kvt_seq_abort. All of the step's: as kvt_seq_commit
 * token_ids: [n] of the selected tokens, >= 0 or KVT_TOKEN_NONE; NULL: all KVT_TOKEN_NONE
 *
 * KVT_ERR_STATE  no step is pending, or a layer was not appended: the error text names it
 * KVT_ERR_STATE  not all tokens are selected of a step of more than KVT_SELECT_TOKENS tokens, and a
 *                group has an i8, i4 or i5 side: a long step is sealed as it comes
 * KVT_ERR_ARG    NULL, an index that is not ascending or not below the step's tokens, a token id
 *                below -1; the step's first token is left out where the sequence is empty and a
 *                group's K has an offset
 * KVT_ERR_VALUE  a selected token behind token 64 of the sequence, the step began before that, and
 *                its key has an element beyond 7.9e6 after its rotation, 1.7e5 of i4 (kvt_append)
 * On any error the step stays pending.
 *
 * Source: tree verification, SpecInfer (Miao et al. 2023, arXiv 2305.09781) and Medusa (Cai et al.
 * 2024, arXiv 2401.10774).
 */
KVT_API kvt_status kvt_seq_commit_selected(kvt_seq *seq, const uint64_t *indices, uint64_t n,
                                           const int32_t *token_ids);

/*
 * Drop the pending step, if there is one. Never fails but for NULL. Keeps the blocks. One that its
 * begin has opened again stays open (kvt_seq_begin).
 */
KVT_API kvt_status kvt_seq_abort(kvt_seq *seq);

/* ---- attention ---- */

/*
 * One sequence's share of an attend call. Zero the struct, then set what is needed.
 */
typedef struct kvt_attend_item {
    const kvt_seq *seq;             /* of the cache that attends */
    uint64_t n_queries;             /* >= 1 */
    const int32_t *query_positions; /* [n_queries] for ALiBi and the group's window; NULL: those
                                       of the last n_queries tokens (which must then exist) */
    const uint8_t *mask;  /* [n_queries][mask_stride]: bit j of query i, (row[j / 8] >> j % 8) & 1,
                             says whether it sees the j-th of the last mask_tokens tokens; all
                             earlier ones it sees. Replaces the causal rule, not the group's
                             window. NULL: no mask */
    size_t mask_stride;   /* bytes, at least mask_tokens / 8 rounded up */
    uint64_t mask_tokens; /* at most the tokens that the layer holds */
    uint64_t reserved[2]; /* 0 */
} kvt_attend_item;

/*
 * What to attend. Make one with kvt_attend_args_init.
 *
 * out[i][h] = sum over visible tokens t of softmax(logit)[t] * V[t], where
 * logit[t] = cap(scale * dot(q[i][h], K[t])) - alibi_slopes[h] * |query position - position(t)|
 * and cap(x) = softcap * tanh(x / softcap). Visible are the tokens that the causal rule or the mask
 * shows and that are in the group's window or among its sinks (kvt_group_config).
 */
typedef struct kvt_attend_args {
    size_t struct_size; /* sizeof(kvt_attend_args) */
    uint32_t layer;     /* the model's number of it */
    uint32_t flags;     /* KVT_ATTEND_ */
    /*
     * [n_items] sequences of one cache. Keys and values that consecutive items share (forks, and
     * forks of forks: kvt_seq_fork) are read once for all of them, where that saves time: in whole
     * ranges of KVT_RANGE_TOKENS tokens from token 0 on, and by as many items at once as have 32
     * query rows a kv head together (n_queries * n_q_heads / n_kv_heads each). Not for items with a
     * mask, in groups with a window, and of tokens that kvt_seq_remove has moved after the fork.
     * Forks should stand next to each other; no result depends on it.
     */
    const kvt_attend_item *items;
    size_t n_items; /* >= 1 */
    kvt_tensor q;   /* [n][n_q_heads][k_dim], n: the items' n_queries, one after the other */
    kvt_tensor out; /* [n][n_q_heads][v_dim], f16 and bf16 saturated; may not overlap q */
    float *lse;     /* [n][n_q_heads] natural log of the softmax's denominator, sink included:
                       where nothing is visible the sink, -inf without one; may be NULL */
    float scale;    /* finite, 2^-96 or more; 0 stands for 1 / sqrt(k_dim) */
    float softcap;  /* > 0 and finite; 0: none */
    const float *sink_logits;  /* [n_q_heads] an extra logit without a value (finite); NULL: none */
    const float *alibi_slopes; /* [n_q_heads] 0 to 1e28; NULL: none. The bias
                                  slope * distance of the nearest token that a query sees is at
                                  most 4096: beyond, f32 would lose the logits */
    uint32_t n_threads;        /* for kvt_attend_plan_init: how many threads will run tasks;
                                  0: as the config's. No result depends on it */
} kvt_attend_args;

/* All zero but struct_size: layer 0, near-exact, not causal, the scale 1 / sqrt(k_dim). */
static inline kvt_attend_args kvt_attend_args_init(void)
{
    kvt_attend_args a;
    memset(&a, 0, sizeof a);
    a.struct_size = sizeof a;
    return a;
}

/*
 * Attend n_queries queries of each item over its tokens of one layer: the committed ones, and
 * the pending ones where the layer has them.
 *
 * A query that sees no token gets zeros. The result is the same, bit for bit, for any number
 * of threads, alone or in a batch: each (sequence, kv head) is cut into ranges of
 * KVT_RANGE_TOKENS tokens, each a softmax of its own, merged in ascending order. Softmax and
 * sums are f32, products as KVT_ATTEND_ says. Never allocates; several threads may attend over one
 * sequence, but one-call attends of a cache take turns: plans do not. Tasks use up to 25 KiB of
 * stack, up to 120 KiB with K or V of 4 or 5 bits.
 *
 * KVT_OK         out (and lse) written
 * KVT_ERR_ARG    NULL, no such layer, sequences of different caches, n_queries 0 or above
 *                KVT_MAX_TOKENS, a stride that overlaps, causal with more queries than tokens, a
 *                mask beyond the tokens, a mask_stride too small for it, one or mask_tokens without
 *                a mask, ALiBi or a window without positions for the queries, a negative position,
 *                an unknown flag or dtype, both flags of how to multiply, reserved not 0, an lse
 *                that is not aligned
 * KVT_ERR_LIMIT  the queries times the tokens are more than can be counted
 * KVT_ERR_STATE  a query's position is so far back that its window has tokens which have been
 *                released: see kvt_group_config.window_tokens
 * KVT_ERR_CORRUPT  a block of the layer lies in a mapped snapshot (KVT_MAP_LAZY) and is damaged;
 *                  out is not written
 * KVT_ERR_VALUE  q, scale, softcap, a sink or a slope is not finite, too small or negative where
 *                it may not be; a query is too far from all tokens for its slopes (see
 *                alibi_slopes); or logits or sums leave the range of f32; out is then unspecified
 *
 * Source: softmax in ranges, Milakov and Gimelshein 2018 (arXiv 1805.02867) and Rabe and Staats
 * 2021 (arXiv 2112.05682); sink logits, Xiao et al. 2023 (arXiv 2309.17453); ALiBi, Press et al.
 * 2021 (arXiv 2108.12409).
 */
KVT_API kvt_status kvt_attend(kvt_cache *cache, const kvt_attend_args *args);

/*
 * The same in parts: plan, provide scratch_bytes of memory at a multiple of 64, call the task for
 * every i < n_tasks from any threads in any order, and when all have run finish. args is copied,
 * what it points to must stay, and the sequences must not change in between. A plan is for one run:
 * it is finished once, and fails when a task has failed. It holds no memory: it can be dropped at
 * any time. Fields with a trailing underscore are the library's.
 */
typedef struct kvt_attend_plan {
    size_t n_tasks;
    size_t scratch_bytes;
    kvt_cache *cache_;
    kvt_attend_args args_;
    size_t units_;       /* (item or items with a shared prefix, kv head, chunk of rows) */
    size_t slice_bytes_; /* scratch of one task */
    uint64_t work_;      /* of all tasks: tokens times rows, about */
    uint64_t split_;     /* units of more work than this may be cut at ranges */
    uint64_t id_;        /* marks the slices that its tasks have filled */
    int32_t status_;
    uint32_t flags_;
    size_t bundle_; /* units that a task walks together */
    uint64_t reserved_[2];
} kvt_attend_plan;

/* Errors: those of kvt_attend; KVT_ERR_VALUE of a result comes from the task and finish. */
KVT_API kvt_status kvt_attend_plan_init(kvt_attend_plan *plan, kvt_cache *cache,
                                        const kvt_attend_args *args);
/* Task i; all have the same scratch. KVT_ERR_ARG: NULL, scratch not aligned, i not below n_tasks */
KVT_API kvt_status kvt_attend_task(kvt_attend_plan *plan, void *scratch, size_t i);
/*
 * KVT_ERR_VALUE: see kvt_attend; also if a task answered it and others have not run. KVT_ERR_STATE:
 * not every task has run with this scratch; the plan has been finished.
 */
KVT_API kvt_status kvt_attend_finish(kvt_attend_plan *plan, void *scratch);

/* ---- reading back ---- */

/*
 * K or V of tokens first .. first + n - 1 of one layer, dequantized, rotation and offset undone;
 * keys as they were appended, for the positions of kvt_seq_key_positions. Sees pending tokens where
 * the layer has them. V that is in K is K's first v_dim dims.
 *
 * out: [n][n_kv_heads][k_dim or v_dim], f32, f16 or bf16 (both saturated), any strides.
 *
 * KVT_ERR_ARG    NULL, no such layer or side, a range beyond the tokens, strides that overlap
 * KVT_ERR_STATE  the window of the layer's group has released some of the tokens
 * KVT_ERR_CORRUPT  some lie in a mapped snapshot (KVT_MAP_LAZY), which is damaged there
 */
KVT_API kvt_status kvt_read(const kvt_seq *seq, uint32_t layer, kvt_side side, uint64_t first,
                            uint64_t n, const kvt_tensor *out);

/* What kvt_visit shows of a token. The pointers are valid during the call only. */
typedef struct kvt_token_view {
    uint64_t index;   /* in the sequence */
    int32_t position; /* its RoPE position */
    int32_t token_id; /* KVT_TOKEN_NONE where unknown, and for pending tokens */
    const float *k;   /* [n_kv_heads][k_dim] */
    const float *v;   /* [n_kv_heads][v_dim] */
} kvt_token_view;

/*
 * Call visitor(user, token) for tokens first .. first + n - 1 of one layer in ascending order,
 * until it returns non-zero. stopped_at (may be NULL): the index at which it did, or first + n.
 * The visitor may read the sequence but not change it.
 *
 * KVT_ERR_ARG, KVT_ERR_STATE, KVT_ERR_CORRUPT: as kvt_read. KVT_ERR_MEMORY: no room for one token
 * as f32.
 */
KVT_API kvt_status kvt_visit(const kvt_seq *seq, uint32_t layer, uint64_t first, uint64_t n,
                             int (*visitor)(void *user, const kvt_token_view *token), void *user,
                             uint64_t *stopped_at);

/* ---- snapshots (docs/format.md) ---- */

/*
 * A byte stream of the caller. write returns 0 when all bytes were taken; read fills up to
 * `bytes` and returns how many, 0 at the end of the stream, or a negative number on an error.
 *
 * These, on_piece and progress below are called on the thread of the call, without a lock: they may
 * use the cache, but not change the sequence that is saved or loaded.
 */
typedef struct kvt_writer {
    void *user;                                               /* the first argument of write */
    int (*write)(void *user, const void *data, size_t bytes); /* 0: all bytes were taken */
} kvt_writer;

/* The same for loading: see kvt_writer. */
typedef struct kvt_reader {
    void *user;                                            /* the first argument of read */
    int64_t (*read)(void *user, void *data, size_t bytes); /* bytes read, 0: end, negative: error */
} kvt_reader;

/* Bytes of the caller that travel with a snapshot under a name of their own. */
typedef struct kvt_snapshot_piece {
    const char *name; /* 1 to KVT_MAX_NAME bytes and a terminating 0; no two the same */
    const void *data; /* [bytes] */
    size_t bytes;     /* of data */
} kvt_snapshot_piece;

/*
 * How far a save or load has come: done of total bytes of keys and values. Called between parts, at
 * most about every 64 MiB. Not 0: the call ends with KVT_ERR_CANCELLED; a sequence, and a file that
 * is not written in place, are as they were.
 */
typedef int (*kvt_progress)(void *user, uint64_t done, uint64_t total);

#define KVT_KEY_BYTES 32  /* of a key for encrypted snapshots */
#define KVT_MAX_NAME 64   /* bytes of a piece's name */
#define KVT_MAX_DEPTH 256 /* of a chain of deltas */

/* Zero the struct but for struct_size for the defaults. */
typedef struct kvt_save_options {
    size_t struct_size;   /* sizeof(kvt_save_options) */
    uint32_t codec;       /* KVT_CODEC_ */
    uint32_t no_fsync;    /* 1: do not wait for the disk (kvt_seq_save only) */
    int32_t zstd_level;   /* 0 stands for 1, and 6 for small streams; else -7 to 19 */
    uint32_t in_place;    /* 1: write over the file itself (kvt_seq_save only), see there */
    uint64_t first_token; /* save the tokens from this one on; a multiple of KVT_BLOCK_TOKENS. From
                               a later one than 0 checkpoints are left out */
    uint64_t n_tokens;    /* so many; 0: all to the end. Checkpoints behind are left out, and a next
                               position that was set, where the last token is */
    const uint32_t *layers;  /* [n_layers] of the model's, ascending: the file has these alone, as
                               layers 0, 1, ...; NULL: all */
    uint32_t n_layers;       /* 0 where layers is NULL */
    uint32_t convert;        /* 1: keys and values are stored as k_types and v_types */
    uint32_t n_types;        /* 1: one for all groups; else one for each group of the cache, and 0
                                stands for so many (not for kvt_snapshot_convert) */
    uint32_t reserved;       /* 0 */
    const kvt_type *k_types; /* [n_types]; NULL: as they are */
    const kvt_type *v_types; /* the same for values */
    const char *parent; /* path of a snapshot in the folder of the file that is saved (where that is
                           a link, of the link): a delta is saved, which has only what that one
                           lacks; NULL: all */
    const kvt_snapshot_piece *pieces; /* [n_pieces], or NULL */
    size_t n_pieces;                  /* 0 where pieces is NULL */
    const unsigned char *key; /* [KVT_KEY_BYTES]: encrypt; the parent's key too. NULL: do not */
    kvt_progress progress;    /* NULL: none */
    void *progress_user;      /* its first argument */
} kvt_save_options;

#define KVT_CODEC_AUTO 0u /* each stream zstd where a sample says that it saves 2%, else raw */
#define KVT_CODEC_RAW 1u  /* as it lies in memory: the fastest, and can be mapped */
#define KVT_CODEC_ZSTD 2u /* each stream zstd where it saves at least 2%, else raw */

/*
 * Save a sequence: tokens, keys and values, its tag, its next position where that is set, and its
 * checkpoints, with what they need that it has no more. The file appears under its name whole or
 * not at all: it is written beside it, synced and renamed over it. options NULL: the defaults.
 * Temporaries that saves of the same file have left in the folder because their process died are
 * removed (docs/format.md, "Files"). A relative path is looked up at each step of that: the current
 * folder may not change until the call returns, by progress or another thread. Else it is
 * KVT_ERR_IO, and the temporary may stay until the next save of the file.
 *
 * parent: ids, positions and blocks that the parent, or its own parent, has are not written again.
 * So a save after each turn writes about what the turn has added. The parent has to stay where it
 * is, unchanged, until the chain is folded (kvt_snapshot_convert, `kvtile merge`): a save over a
 * file of its own chain is KVT_ERR_ARG.
 *
 * convert: from the values as read back, a type for each group (say i8 saved as i4). The cache is
 * not changed. Such a file loads into a cache of those types, or with kvt_load_options.convert.
 *
 * Several threads of the cache (n_threads, executor) code at once, and one of them writes to a file
 * or descriptor meanwhile; a kvt_writer is called by the caller's thread alone, as are all
 * callbacks. The bytes do not depend on it.
 *
 * in_place: for a file that cannot be renamed over, as one that is mounted by itself into a
 * container, or whose folder cannot be written. The file is emptied and written anew, then synced.
 * That is not atomic: a crash or a failure on the way leaves a part of the new file, which loading
 * refuses, and the old one is lost; keep other readers and writers of the file away meanwhile. Not
 * for a file that is mapped (KVT_MAP_), by this sequence or another.
 *
 * No signal reaches the caller: a passed limit on the size of files (ulimit -f) is KVT_ERR_IO.
 *
 * KVT_ERR_STATE     a step is pending; a window has released tokens that the range needs
 * KVT_ERR_IO        the text names the file, the call and the system's reason; the old file is in
 *                   place (the new one, where only the sync of the folder has failed)
 * KVT_ERR_LIMIT     2^32 - 1 blocks or more; the chain would pass KVT_MAX_DEPTH
 * KVT_ERR_MISMATCH  the parent is of another model or geometry, or encrypted with another key
 * KVT_ERR_CORRUPT   the parent is damaged, or what is mapped is
 * KVT_ERR_FORMAT    the parent is no snapshot
 * KVT_ERR_VALUE     convert: a value is beyond what the type can store
 * KVT_ERR_UNSUPPORTED  a key, and the library was built without libsodium
 * KVT_ERR_CANCELLED    progress said so
 * KVT_ERR_ARG, KVT_ERR_MEMORY
 */
KVT_API kvt_status kvt_seq_save(const kvt_seq *seq, const char *path,
                                const kvt_save_options *options);
/*
 * The same to a stream, front to back. A parent is named by its whole path here. Whether the stream
 * ends in a file of the chain cannot be told: see to it that it does not.
 */
KVT_API kvt_status kvt_seq_save_stream(const kvt_seq *seq, const kvt_writer *writer,
                                       const kvt_save_options *options);
/*
 * The same to a file descriptor, from where it stands (a pipe, a socket, a file): neither synced
 * nor closed; waited for where it does not block. in_place and no_fsync do not count. A parent is
 * named by its whole path here too; the descriptor of a file of the chain is KVT_ERR_ARG. SIGPIPE
 * is the caller's to ignore; then a closed pipe is KVT_ERR_IO.
 */
KVT_API kvt_status kvt_seq_save_fd(const kvt_seq *seq, int fd, const kvt_save_options *options);
/*
 * The same to memory: to: [room] bytes; *bytes: how many were written. KVT_ERR_FULL: there is no
 * room; what `to` holds is unspecified then. kvt_seq_save_bound tells how much suffices.
 */
KVT_API kvt_status kvt_seq_save_memory(const kvt_seq *seq, void *to, size_t room, size_t *bytes,
                                       const kvt_save_options *options);
/*
 * The most bytes that a save with these options writes now. With KVT_CODEC_RAW and neither parent
 * nor checkpoints it is exact.
 * KVT_ERR_STATE, KVT_ERR_ARG, KVT_ERR_MEMORY: as kvt_seq_save. A parent is not opened.
 */
KVT_API kvt_status kvt_seq_save_bound(const kvt_seq *seq, uint64_t *bytes,
                                      const kvt_save_options *options);

/* Zero the struct but for struct_size for the defaults. */
typedef struct kvt_load_options {
    size_t struct_size;     /* sizeof(kvt_load_options) */
    const int32_t *prompt;  /* [n_prompt] the whole prompt's token ids, from token 0 on, or NULL */
    uint64_t n_prompt;      /* 0 where prompt is NULL */
    uint32_t reuse;         /* KVT_REUSE_: how much of the snapshot is restored */
    uint32_t map;           /* KVT_MAP_ (kvt_seq_load only) */
    uint32_t convert;       /* 1: a snapshot of other types is converted to the cache's */
    uint32_t n_layers;      /* 0 where layers is NULL */
    const uint32_t *layers; /* [n_layers of the cache], ascending: which layers of the file its
                               layers 0, 1, ... are; NULL: the file has the same ones. The others
                               are verified, too; where they are of a group of which none is wanted
                               they may have up to 64 times the bytes of those that are, or 4 MiB
                               for 64 tokens (KVT_ERR_LIMIT) */
    const char *folder;     /* where a delta's parents are; NULL: the folder of the file */
    const unsigned char *key; /* [KVT_KEY_BYTES] of an encrypted snapshot, and of its parents */
    /* Each of the caller's pieces in turn (bytes of one are there during the call), or NULL. They
       are verified; the rest of the snapshot may still turn out damaged. Not 0: cancel. */
    int (*on_piece)(void *user, const kvt_snapshot_piece *piece);
    void *piece_user;      /* its first argument */
    kvt_progress progress; /* NULL: none */
    void *progress_user;   /* its first argument */
} kvt_load_options;

#define KVT_REUSE_ALL 0u        /* all of it; result tells what fits the prompt */
#define KVT_REUSE_PREFIX 1u     /* the sequence ends at reuse_tokens */
#define KVT_REUSE_CHECKPOINT 2u /* the sequence ends at checkpoint_tokens; empty where none is */

#define KVT_MAP_NONE 0u /* all is read into memory */
#define KVT_MAP_VERIFY                                                                             \
    1u                  /* blocks saved with KVT_CODEC_RAW are used where they lie in the file; it
                             is verified as a whole at once */
#define KVT_MAP_LAZY 2u /* the same; each layer of a block is verified at its first use */

/*
 * How to go on with a prompt: truncate to reuse_tokens, then compute prompt[reuse_tokens] ..
 * prompt[n_prompt - 1]. That is never nothing: a cache holds keys and values, not logits, and the
 * next token is chosen by the logits of the prompt's last token, so that token has to be computed
 * even where the snapshot has it.
 *
 * A model with recurrent layers, whose state is in the checkpoints' blobs, goes on from
 * checkpoint_tokens instead: truncate to it, take the state from kvt_seq_checkpoint_read, compute
 * the prompt from there on. Where there is none, clear and begin anew.
 */
typedef struct kvt_load_result {
    uint64_t n_tokens;      /* restored */
    uint64_t prefix_tokens; /* how many of the snapshot's equal the beginning of options.prompt */
    uint64_t reuse_tokens;  /* the deepest length that kvt_seq_truncate can reach at or before the
                               smaller of prefix_tokens and n_prompt - 1, which it is but where
                               windows have released blocks, or the load has ended the sequence
                               before (KVT_REUSE_CHECKPOINT); 0 without a prompt */
    uint64_t checkpoint_tokens; /* the last checkpoint at or before that smaller one, which is 0
                                   without a prompt; UINT64_MAX: none */
    uint64_t mapped_bytes;      /* of blocks that lie in the file */
    uint64_t reserved[3];       /* 0 */
} kvt_load_result;

/*
 * Replace the contents of a sequence by a snapshot, also its checkpoints and next position.
 * Everything is read and verified into new blocks before the sequence changes: on any error it is
 * as it was. Needs blocks for both meanwhile, within the budget; clear first where that is too
 * much. The sequence's tag has to be the snapshot's: kvt_seq_set_tag, on an empty sequence, before
 * the load. What was saved goes on bit for bit, but that sealings which the last commit before the
 * save (or a checkpoint) caused are not taken back any more by a truncate, as if another begin had
 * come. options and result may be NULL.
 *
 * With options.reuse the snapshot is taken up whole where a group has a window, and then cut; else
 * blocks behind the first token that is not reused are not taken up at all.
 *
 * A delta is loaded with the chain of its parents, each found by its name and held against the id
 * that its child has noted.
 *
 * map: the file's pages are the cache's memory, shared with all processes that map it and not held
 * against the budget; what is appended or changed is copied first. Blocks of other types (convert),
 * and all of a file that has more layers than the cache, are read into memory. The file, and its
 * parents, must not be changed from the call on, during the load too, until none of their blocks is
 * used any more (a save that replaces one is fine: it makes a new file); where one is cut short the
 * process gets SIGBUS. With KVT_MAP_LAZY kvt_attend, kvt_read, kvt_visit, kvt_seq_begin,
 * kvt_seq_remove, kvt_prefix_put and saves answer KVT_ERR_CORRUPT, with their output unwritten,
 * when they meet a damaged layer of a block; but of a save to a stream, a descriptor, memory or in
 * place some has been written then. A save meets those that it writes: a delta only names a block
 * whose id its parent has.
 *
 * KVT_ERR_STATE     a step is pending
 * KVT_ERR_IO        cannot be opened or read; a parent is missing, or no regular file
 * KVT_ERR_FORMAT    not a snapshot, or of a newer version
 * KVT_ERR_CORRUPT   damaged or cut; the text says what and where
 * KVT_ERR_MISMATCH  of another fingerprint, geometry, types, windows or tag, or with keys that have
 *                   moved while the cache's groups have no RoPE described; the text names it. A
 *                   parent that is another file than the one that the delta was saved for. A wrong
 *                   key, or none, or one for a file that is not encrypted
 * KVT_ERR_FULL      longer than max_tokens, also where reuse would take up less
 * KVT_ERR_LIMIT     options.layers: those that are left out are too large beside the others
 * KVT_ERR_VALUE     convert: a value is beyond what the cache's type can store
 * KVT_ERR_UNSUPPORTED  encrypted, and the library was built without libsodium; map with a key, or
 *                      where files cannot be mapped
 * KVT_ERR_CANCELLED    progress or on_piece said so
 * KVT_ERR_ARG, KVT_ERR_MEMORY, KVT_ERR_BUDGET
 */
KVT_API kvt_status kvt_seq_load(kvt_seq *seq, const char *path, const kvt_load_options *options,
                                kvt_load_result *result);
/* The same from a stream; nothing behind the snapshot is read. A delta needs options.folder. */
KVT_API kvt_status kvt_seq_load_stream(kvt_seq *seq, const kvt_reader *reader,
                                       const kvt_load_options *options, kvt_load_result *result);
/* The same from a file descriptor, from where it stands: not closed; waited for as by a save. */
KVT_API kvt_status kvt_seq_load_fd(kvt_seq *seq, int fd, const kvt_load_options *options,
                                   kvt_load_result *result);
/* The same from memory: data: [bytes], which the snapshot fills. */
KVT_API kvt_status kvt_seq_load_memory(kvt_seq *seq, const void *data, size_t bytes,
                                       const kvt_load_options *options, kvt_load_result *result);

/* Geometry of a group as a snapshot records it; fields as in kvt_group_config. */
typedef struct kvt_snapshot_group {
    uint32_t n_layers, n_q_heads, n_kv_heads, k_dim, v_dim;
    kvt_type k_type, v_type;
    uint32_t flags;
    uint64_t rotation_seed;
    uint32_t window_tokens, sink_tokens;
    uint64_t reserved[3]; /* 0 */
} kvt_snapshot_group;

/* What kvt_snapshot_inspect tells of a snapshot. */
typedef struct kvt_snapshot_info {
    size_t struct_size; /* set to sizeof(kvt_snapshot_info) before the call */
    uint32_t version;   /* of the format */
    uint32_t n_groups;  /* of layers */
    kvt_snapshot_group groups[KVT_MAX_GROUPS]; /* [n_groups] */
    uint8_t fingerprint[KVT_MAX_FINGERPRINT];  /* kvt_config.fingerprint */
    uint32_t fingerprint_bytes;                /* its size */
    int32_t next_position;    /* as kvt_seq_set_next_position has set it; -1: not set */
    uint8_t tag[KVT_MAX_TAG]; /* kvt_seq_set_tag */
    uint32_t tag_bytes;       /* its size */
    uint32_t reserved;        /* 0 */
    uint64_t n_tokens;        /* of the sequence */
    uint64_t n_blocks;        /* of all groups, those that only checkpoints have included */
    uint64_t n_open_blocks;  /* of them: f16, where the group has i8, i4, i5; with verify, else 0 */
    uint64_t n_checkpoints;  /* with verify, else 0 */
    uint64_t file_bytes;     /* read of the file, encrypted or not; with verify all of them */
    uint64_t stored_bytes;   /* of the blocks' streams as stored, those that a delta's parents have
                                included; with verify, else 0 */
    uint64_t native_bytes;   /* of the same streams decoded; with verify, else 0 */
    uint64_t n_elements;     /* of K and V in them; with verify, else 0 */
    uint8_t snapshot_id[16]; /* names what is in the file, however it is coded (a delta and what
                                it is folded to have two); with verify, else 0 */
    uint8_t parent_id[16];   /* of a delta: the parent's snapshot id */
    char parent_name[256];   /* of a delta: the parent's file name; else "" */
    uint32_t depth;          /* parents of the chain; 0: the file is no delta */
    uint32_t encrypted;      /* 1: it is */
    uint64_t inherited_tokens;            /* whose ids and positions the parent has */
    uint64_t inherited_blocks;            /* of n_blocks; with verify, else 0 */
    uint64_t native_blocks;               /* of n_blocks: that can be mapped; with verify, else 0 */
    uint64_t n_pieces;                    /* the caller's; with verify, else 0 */
    uint64_t reserved2[8];                /* 0 */
    uint32_t n_layers;                    /* of all groups */
    uint8_t layer_groups[KVT_MAX_LAYERS]; /* [n_layers] of the model's layers: their groups */
} kvt_snapshot_info;

/* Zero the struct but for struct_size for the defaults. */
typedef struct kvt_inspect_options {
    size_t struct_size;       /* sizeof(kvt_inspect_options) */
    uint32_t verify;          /* 1: read the whole file, and what it takes of its parents */
    uint32_t reserved;        /* 0 */
    const char *folder;       /* as in kvt_load_options, as all below */
    const unsigned char *key; /* NULL: it is not encrypted */
    int (*on_piece)(void *user, const kvt_snapshot_piece *piece); /* with verify */
    void *piece_user;                                             /* its first argument */
    kvt_progress progress;                                        /* NULL: none */
    void *progress_user;                                          /* its first argument */
} kvt_inspect_options;

/*
 * Describe a snapshot without a cache. verify 0: the header, and the tag and next position behind
 * it, are read and checked. verify 1: the whole file is read and every checksum, count and stream
 * is checked, as loading would, which checks only one thing more: that a window's blocks suffice.
 *
 * error_text (may be NULL): says why on failure. Errors as kvt_seq_load; KVT_ERR_MISMATCH: a wrong
 * key, or none where one is needed, or a parent that is another file than it was.
 */
KVT_API kvt_status kvt_snapshot_inspect(const char *path, int verify, kvt_snapshot_info *info,
                                        char *error_text, size_t error_text_bytes);
/* The same with options. */
KVT_API kvt_status kvt_snapshot_inspect_with(const char *path, const kvt_inspect_options *options,
                                             kvt_snapshot_info *info, char *error_text,
                                             size_t error_text_bytes);

/*
 * Read a snapshot, with its parents, and save it anew: with another codec or other types, some of
 * its tokens or layers, encrypted or not, as one file in place of a chain. Its pieces, tag and
 * checkpoints go along; to_options->pieces come besides, in place of those of the same name.
 * Memory: about that of the sequence. With other types it is loaded into a cache with the default
 * residual_tokens: of a group with a window, blocks that are out of sight, and that a larger number
 * has kept, are dropped then.
 *
 * from_options (may be NULL): folder, key, on_piece, progress and layers as for a load, the layers
 *     being n_layers of the file's; all others have to be 0
 * to_options (may be NULL): as for kvt_seq_save, of the groups that are left where
 *     from_options->layers are chosen; with types n_types is 1 or their number
 * error_text (may be NULL): says why on failure. Errors as kvt_seq_load and kvt_seq_save. `to` may
 * be `from`, but none of its parents (KVT_ERR_ARG); `from` has to be a regular file (KVT_ERR_IO).
 * Deltas that were saved for a `from` which is `to` can be loaded no more, but where it is no delta
 * itself and only its codec changes.
 */
KVT_API kvt_status kvt_snapshot_convert(const char *from, const kvt_load_options *from_options,
                                        const char *to, const kvt_save_options *to_options,
                                        char *error_text, size_t error_text_bytes);

#ifdef __cplusplus
}
#endif

#endif /* KVTILE_KVTILE_H */
