/*
 * What the tests share: random numbers, creation of caches, and attention in double. Includes the
 * public header only.
 */
#ifndef KVT_TEST_SUPPORT_H
#define KVT_TEST_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <pthread.h>

#include <cmocka.h>
#include <kvtile/kvtile.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define HAS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) ||                         \
    __has_feature(memory_sanitizer)
#define HAS_SANITIZER 1
#endif
#endif

/* xorshift-multiply generator; the same numbers everywhere. */
typedef struct rng {
    uint64_t state;
} rng;

uint64_t rng_next(rng *r);
uint32_t rng_below(rng *r, uint32_t n);
/* One number of N(0, 1), by Box and Muller: what the golden files are made of. */
double rng_normal(rng *r);
/* n numbers of N(0, 1), malloc'ed; others than rng_normal's, and several times as fast. */
float *rng_normals(rng *r, size_t n);

/* Assert a status; on another one print the cache's error text. */
void expect_status(const kvt_cache *cache, kvt_status expected, kvt_status got, const char *where);
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define expect(cache, expected, call)                                                              \
    expect_status(cache, expected, call, __FILE__ ":" TEXT(__LINE__) ": " #call)
#define expect_ok(cache, call) expect(cache, KVT_OK, call)

/* One group, the rest with config_init's defaults. The group is static, valid until the next call.
 */
kvt_group_config group_of(uint32_t layers, uint32_t q_heads, uint32_t kv_heads, uint32_t k_dim,
                          uint32_t v_dim, kvt_type k_type, kvt_type v_type);
kvt_cache *cache_of(const kvt_group_config *group, uint64_t max_tokens, uint32_t n_threads,
                    const char *isa);

/* n_threads for a config without an executor: 1 where the library has no pool (KVTILE_POOL). */
uint32_t pool_threads(uint32_t n_threads);

/* Keys and values of a test, [tokens][kv_heads][dim]; v is a copy out of k where V is in K. */
typedef struct tokens {
    size_t n, kv_heads, k_dim, v_dim;
    float *k, *v;
} tokens;

tokens tokens_make(rng *r, size_t n, const kvt_group_config *group);
void tokens_free(tokens *t);
/* Append tokens first .. first + n - 1 to every layer as one step. */
void append_step(kvt_cache *cache, kvt_seq *seq, const kvt_group_config *group, const tokens *t,
                 size_t first, size_t n);
/* Append tokens first .. first + n - 1 in steps of `step` tokens. */
void append_all(kvt_cache *cache, kvt_seq *seq, const kvt_group_config *group, const tokens *t,
                size_t first, size_t n, size_t step);

double dot_f64(const float *a, const float *b, size_t n);

/*
 * Attention of one row in double: out[v_dim], returns the lse. Token t of n is visible if sees[t]
 * (NULL: all are). positions NULL: no ALiBi. sink -INFINITY: none.
 */
double reference_row(const float *q, const float *k, const float *v, size_t n, size_t kv_heads,
                     size_t kv_head, size_t k_dim, size_t v_dim, double scale, double softcap,
                     const unsigned char *sees, const int32_t *positions, int32_t position,
                     double slope, double sink, double *out);

/* Relative L2 distance of a from b. */
double relative_l2(const float *a, const double *b, size_t n);

/*
 * An allocator that counts bytes and blocks in use, calls, and frees with a wrong size. Memory is
 * filled with 0xff (NaNs), alignments other than 64 fail, and failures can be injected.
 * Thread-safe.
 */
typedef struct ledger {
    pthread_mutex_t lock;
    size_t live_bytes, live, calls;
    size_t peak_bytes; /* the most alive at once; set it down to live_bytes to begin anew */
    size_t most_bytes; /* a request beyond this fails; 0: no bound */
    long countdown;    /* calls that still succeed; negative: all */
    size_t mistakes;   /* frees with another size, alignments other than 64 */
} ledger;

void ledger_init(ledger *l);
/* Assert that all memory was freed, with the right sizes. */
void ledger_close(ledger *l);
kvt_allocator ledger_allocator(ledger *l);

/*
 * KVT_TEST_QUICK: smaller counts. 1 for sanitizers, 2 for what is slower still: valgrind and QEMU;
 * 0 where it is not set.
 */
int quick_level(void);
int is_quick(void); /* at either level */
/* 1 when KVT_TEST_FULL is set: all of what is else a sample, for minutes. */
int is_full(void);

/* The entries of a folder, hidden ones included. */
int count_entries(const char *folder);

/* Assert that the cache's error text contains a fragment. */
void expect_error_text(const kvt_cache *cache, const char *fragment, const char *where);

/* The state of a sequence as one hash: tokens, positions, every K and V of every layer. */
uint64_t seq_hash(const kvt_seq *seq, const kvt_group_config *group);

#endif
