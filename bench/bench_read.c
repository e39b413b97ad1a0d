/*
 * Streaming-read bandwidth: the bandwidth of a loop that only reads, and so the bound of a decode
 * step, which reads every byte of the cache once.
 *
 * The memory comes from the cache's allocator in pieces of the size of its blocks, so both have the
 * same kind of pages. Every instruction set of the processor is tried (also those wider than the
 * kernels in use), with 1, 4 and 8 streams a thread, without prefetch and with prefetch at a near
 * and a far distance; the fastest loop is the one that is timed from then on. Hardware prefetchers
 * track a few streams, and the best number differs between processors.
 *
 * Each thread has its own share of the memory, and each stream its own share of that.
 */
#include "bench.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { STEP = 256, PIECE = 256 * 1024, MAX_STREAMS = 8 };

/* Reads bytes (a multiple of STEP) at each of the streams' pointers. The sum of what was read. */
typedef uint64_t read_loop(const unsigned char *const *p, size_t bytes);

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

/*
 * The body of all loops: 256 bytes from each stream an iteration, into one accumulator a stream.
 * streams and ahead are constants wherever it is inlined. A prefetch never faults, so it may run
 * past the end.
 */
#define READ_BODY(vector, zero, load, combine, width)                                              \
    vector sum[MAX_STREAMS];                                                                       \
    UNROLL for (int s = 0; s < streams; s++) sum[s] = zero;                                        \
    for (size_t i = 0; i < bytes; i += STEP) {                                                     \
        UNROLL for (int s = 0; s < streams; s++)                                                   \
        {                                                                                          \
            const unsigned char *q = p[s] + i;                                                     \
            if (ahead > 0) {                                                                       \
                __builtin_prefetch(q + ahead);                                                     \
                __builtin_prefetch(q + ahead + 64);                                                \
                __builtin_prefetch(q + ahead + 128);                                               \
                __builtin_prefetch(q + ahead + 192);                                               \
            }                                                                                      \
            UNROLL for (int j = 0; j < STEP; j += (width)*4)                                       \
            {                                                                                      \
                vector a = load(q + j), b = load(q + j + (width));                                 \
                vector c = load(q + j + 2 * (width)), d = load(q + j + 3 * (width));               \
                sum[s] = combine(sum[s], combine(combine(a, b), combine(c, d)));                   \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    for (int s = 1; s < streams; s++)                                                              \
        sum[0] = combine(sum[0], sum[s]);                                                          \
    uint64_t result;                                                                               \
    memcpy(&result, &sum[0], sizeof result);                                                       \
    return result;

#define READ_VARIANT(isa, attribute, streams, ahead)                                               \
    attribute static uint64_t read_##isa##_##streams##_##ahead(const unsigned char *const *p,      \
                                                               size_t bytes)                       \
    {                                                                                              \
        return read_##isa(p, bytes, streams, ahead);                                               \
    }
#define READ_VARIANTS(isa, attribute)                                                              \
    READ_VARIANT(isa, attribute, 1, 0)                                                             \
    READ_VARIANT(isa, attribute, 4, 0)                                                             \
    READ_VARIANT(isa, attribute, 8, 0)                                                             \
    READ_VARIANT(isa, attribute, 1, 1024)                                                          \
    READ_VARIANT(isa, attribute, 4, 1024)                                                          \
    READ_VARIANT(isa, attribute, 8, 1024)                                                          \
    READ_VARIANT(isa, attribute, 1, 4096)                                                          \
    READ_VARIANT(isa, attribute, 4, 4096)                                                          \
    READ_VARIANT(isa, attribute, 8, 4096)

#define NOTHING

#define LOAD_U64(p) (*(const uint64_t *)(const void *)(p))
#define OR_U64(a, b) ((a) | (b))
INLINE uint64_t read_plain(const unsigned char *const *p, size_t bytes, int streams, int ahead){
    READ_BODY(uint64_t, 0, LOAD_U64, OR_U64, 8)} READ_VARIANTS(plain, NOTHING)

#if defined(__x86_64__)
#define LOAD_SSE2(p) _mm_load_si128((const __m128i *)(const void *)(p))
    INLINE uint64_t read_sse2(const unsigned char *const *p, size_t bytes, int streams, int ahead){
        READ_BODY(__m128i, _mm_setzero_si128(), LOAD_SSE2, _mm_or_si128, 16)} READ_VARIANTS(sse2,
                                                                                            NOTHING)

#define TARGET_AVX2 __attribute__((target("avx2")))
#define LOAD_AVX2(p) _mm256_load_si256((const __m256i *)(const void *)(p))
        TARGET_AVX2 INLINE uint64_t
    read_avx2(const unsigned char *const *p, size_t bytes, int streams,
              int ahead){READ_BODY(__m256i, _mm256_setzero_si256(), LOAD_AVX2, _mm256_or_si256,
                                   32)} READ_VARIANTS(avx2, TARGET_AVX2)

#define TARGET_AVX512 __attribute__((target("avx512f")))
#define LOAD_AVX512(p) _mm512_load_si512((const void *)(p))
        TARGET_AVX512 INLINE uint64_t
    read_avx512(const unsigned char *const *p, size_t bytes, int streams,
                int ahead){READ_BODY(__m512i, _mm512_setzero_si512(), LOAD_AVX512, _mm512_or_si512,
                                     64)} READ_VARIANTS(avx512, TARGET_AVX512)
#elif defined(__aarch64__)
    INLINE uint64_t read_neon(const unsigned char *const *p, size_t bytes, int streams, int ahead){
        READ_BODY(uint8x16_t, vdupq_n_u8(0), vld1q_u8, vorrq_u8, 16)} READ_VARIANTS(neon, NOTHING)
#endif

        typedef struct read_variant {
    const char *isa;
    unsigned streams, ahead;
    read_loop *loop;
} read_variant;

#define VARIANT(isa, streams, ahead)                                                               \
    {                                                                                              \
#isa, streams, ahead, read_##isa##_##streams##_##ahead                                     \
    }
#define VARIANTS(isa)                                                                              \
    VARIANT(isa, 1, 0), VARIANT(isa, 4, 0), VARIANT(isa, 8, 0), VARIANT(isa, 1, 1024),             \
        VARIANT(isa, 4, 1024), VARIANT(isa, 8, 1024), VARIANT(isa, 1, 4096),                       \
        VARIANT(isa, 4, 4096), VARIANT(isa, 8, 4096)

static const read_variant variants[] = {
#if defined(__x86_64__)
    VARIANTS(avx512),
    VARIANTS(avx2),
    VARIANTS(sse2),
#elif defined(__aarch64__)
    VARIANTS(neon),
#endif
    VARIANTS(plain),
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

static bool runs_here(const read_variant *v)
{
#if defined(__x86_64__)
    if (!strcmp(v->isa, "avx512"))
        return __builtin_cpu_supports("avx512f") != 0;
    if (!strcmp(v->isa, "avx2"))
        return __builtin_cpu_supports("avx2") != 0;
    return strcmp(v->isa, "plain") != 0; /* SSE2 is always there */
#elif defined(__aarch64__)
    return strcmp(v->isa, "plain") != 0;
#else
    (void)v;
    return true;
#endif
}

struct bench_read {
    kvt_allocator memory;
    bench_team *team;
    unsigned char **chunks;
    size_t n_chunks, chunk_bytes;
    const unsigned char **pieces; /* in the order of the memory */
    size_t n_pieces, piece_bytes; /* n_pieces: a multiple of streams times threads */
    const read_variant *variant;
    char name[64];
};

static atomic_uint_fast64_t sink; /* keeps the loops from being optimized away */

static void read_share(void *arg, unsigned worker)
{
    bench_read *r = arg;
    size_t streams = r->variant->streams;
    size_t share = r->n_pieces / bench_team_threads(r->team), each = share / streams;
    const unsigned char *const *pieces = r->pieces + worker * share;
    uint64_t sum = 0;
    for (size_t i = 0; i < each; i++) {
        const unsigned char *p[MAX_STREAMS];
        for (size_t s = 0; s < streams; s++)
            p[s] = pieces[s * each + i];
        sum |= r->variant->loop(p, r->piece_bytes);
    }
    atomic_store_explicit(&sink, sum, memory_order_relaxed);
}

double bench_read_run(bench_read *r)
{
    double start = bench_seconds();
    bench_team_each(r->team, read_share, r);
    return bench_seconds() - start;
}

double bench_read_bytes(const bench_read *r)
{
    return (double)r->n_pieces * (double)r->piece_bytes;
}

const char *bench_read_loop(const bench_read *r)
{
    return r->name;
}

/* Three rounds over all loops; the loop with the least time. */
static void choose_loop(bench_read *r)
{
    double best = 1e300;
    const read_variant *chosen = NULL;
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < N_VARIANTS; i++) {
            if (!runs_here(&variants[i]))
                continue;
            r->variant = &variants[i];
            double t = bench_read_run(r);
            if (t < best) {
                best = t;
                chosen = &variants[i];
            }
        }
    }
    r->variant = chosen;
    if (!chosen)
        bench_fail(1, "no read loop runs here");
    snprintf(r->name, sizeof r->name, "%s, %u streams, prefetch %u", chosen->isa, chosen->streams,
             chosen->ahead);
}

bench_read *bench_read_create(bench_heap *heap, bench_team *team, size_t chunk_bytes,
                              uint64_t total_bytes)
{
    bench_read *r = bench_alloc(1, sizeof *r);
    size_t unit = (size_t)MAX_STREAMS * bench_team_threads(team);
    if (chunk_bytes < 16 * 1024)
        chunk_bytes = 16 * 1024;
    r->memory = bench_heap_hook(heap);
    r->team = team;
    r->chunk_bytes = chunk_bytes;

    /* As much data as a block of the cache has: 64 bytes less, for its header. */
    size_t usable = (chunk_bytes - 64) / STEP * STEP;
    size_t per_chunk = (usable + PIECE - 1) / PIECE;
    r->piece_bytes = usable / per_chunk / STEP * STEP;
    uint64_t want = (total_bytes + r->piece_bytes - 1) / r->piece_bytes;
    want = (want + unit - 1) / unit * unit;
    r->n_pieces = (size_t)want;
    r->n_chunks = (r->n_pieces + per_chunk - 1) / per_chunk;
    r->chunks = bench_alloc(r->n_chunks, sizeof *r->chunks);
    r->pieces = bench_alloc(r->n_pieces, sizeof *r->pieces);
    for (size_t i = 0; i < r->n_chunks; i++) {
        r->chunks[i] = r->memory.alloc(r->memory.user, chunk_bytes, 64);
        if (!r->chunks[i])
            bench_fail(1, "no memory to measure the read bandwidth");
        /* Untouched pages would all map to the zero page. */
        memset(r->chunks[i], 0x5a, chunk_bytes);
    }
    for (size_t i = 0; i < r->n_pieces; i++)
        r->pieces[i] = r->chunks[i / per_chunk] + i % per_chunk * r->piece_bytes;
    choose_loop(r);
    return r;
}

void bench_read_destroy(bench_read *r)
{
    if (!r)
        return;
    for (size_t i = 0; i < r->n_chunks; i++)
        r->memory.free(r->memory.user, r->chunks[i], r->chunk_bytes);
    free(r->chunks);
    free((void *)r->pieces);
    free(r);
}
