/*
 * XXH3-128 of more than 240 bytes, with a copy of them: most of what saving and loading does with a
 * layer's image. The sum and the copy read memory once, and the copy is written past the caches.
 *
 * Source: xxHash, https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 Algorithm (for
 * large inputs)". Stripes of 64 bytes are added to eight accumulators, each with the secret from
 * another place on; after a run of 16 the accumulators are scrambled. The last 64 bytes are a
 * stripe once more, and may overlap the one before. Then the accumulators are merged, for each half
 * of the digest with another part of the secret. (xxHash's own functions are compiled for the least
 * that a processor of the architecture has, and do not copy.)
 */
#include "simd/stripes.h"
#include "src/cpu.h"
#include "src/snapshot/format.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PRIME32_2 0x85ebca77u
#define PRIME32_3 0xc2b2ae3du
#define PRIME64_1 0x9e3779b185ebca87u
#define PRIME64_2 0xc2b2ae3d27d4eb4fu
#define PRIME64_3 0x165667b19e3779f9u
#define PRIME64_4 0x85ebca77c2b2ae63u
#define PRIME64_5 0x27d4eb2f165667c5u
#define PRIME_AVALANCHE 0x165667919e3779f9u

/* Where the last stripe, and the merges of both halves, take the secret from. */
#define LAST_STRIPE_SECRET (KVT_SECRET_BYTES - KVT_STRIPE_BYTES - 7)
#define LOW_SECRET 11
#define HIGH_SECRET (KVT_SECRET_BYTES - KVT_STRIPE_BYTES - 11)

static const unsigned char default_secret[KVT_SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* ---- stripes ---- */

#if defined(__SSE2__)

static inline __m128i load_128(const void *from)
{
    return _mm_loadu_si128((const __m128i *)from);
}

static inline __m128i scrambled(__m128i sum, const unsigned char *secret)
{
    const __m128i prime = _mm_set1_epi32((int)KVT_SCRAMBLE_PRIME);
    __m128i x = _mm_xor_si128(_mm_xor_si128(sum, _mm_srli_epi64(sum, 47)), load_128(secret));
    __m128i high = _mm_mul_epu32(_mm_srli_epi64(x, 32), prime);
    return _mm_add_epi64(_mm_mul_epu32(x, prime), _mm_slli_epi64(high, 32));
}

static inline __m128i with_stripe(__m128i sum, __m128i data, const unsigned char *secret)
{
    __m128i key = _mm_xor_si128(data, load_128(secret));
    __m128i product = _mm_mul_epu32(key, _mm_srli_epi64(key, 32));
    __m128i other = _mm_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm_add_epi64(product, _mm_add_epi64(sum, other));
}

void kvt_stripes_base(uint64_t *accumulators, const unsigned char *secret,
                      const unsigned char *from, size_t n, const unsigned char *copy,
                      unsigned char *to)
{
    __m128i sums[4];
    size_t i, j;

    for (j = 0; j < 4; j++)
        sums[j] = load_128(accumulators + 2 * j);
    for (i = 0; i < n; i++, from += KVT_STRIPE_BYTES) {
        const unsigned char *key = secret + i % KVT_RUN_STRIPES * 8;
        _mm_prefetch((const char *)from + KVT_STRIPES_AHEAD, _MM_HINT_T0);
        for (j = 0; j < 4; j++)
            sums[j] = with_stripe(sums[j], load_128(from + 16 * j), key + 16 * j);
        for (j = i * KVT_STRIPE_BYTES; to && j < (i + 1) * KVT_STRIPE_BYTES; j += 16)
            _mm_stream_si128((__m128i *)(void *)(to + j), load_128(copy + j));
        if (i % KVT_RUN_STRIPES < KVT_RUN_STRIPES - 1)
            continue;
        for (j = 0; j < 4; j++)
            sums[j] = scrambled(sums[j], secret + KVT_SECRET_BYTES - KVT_STRIPE_BYTES + 16 * j);
    }
    for (j = 0; j < 4; j++)
        _mm_storeu_si128((__m128i *)(void *)(accumulators + 2 * j), sums[j]);
}

/* Copies past the caches come before what is written later. */
static void fence(void)
{
    _mm_sfence();
}

#else

#if defined(__ARM_NEON)

static inline uint64x2_t load_128(const unsigned char *from)
{
    return vreinterpretq_u64_u8(vld1q_u8(from));
}

static inline uint64x2_t scrambled(uint64x2_t sum, const unsigned char *secret)
{
    const uint32x2_t prime = vdup_n_u32(KVT_SCRAMBLE_PRIME);
    uint64x2_t x = veorq_u64(veorq_u64(sum, vshrq_n_u64(sum, 47)), load_128(secret));
    uint64x2_t high = vshlq_n_u64(vmull_u32(vshrn_n_u64(x, 32), prime), 32);
    return vmlal_u32(high, vmovn_u64(x), prime);
}

static inline uint64x2_t with_stripe(uint64x2_t sum, uint64x2_t data, const unsigned char *secret)
{
    uint64x2_t key = veorq_u64(data, load_128(secret));
    sum = vaddq_u64(sum, vextq_u64(data, data, 1));
    return vmlal_u32(sum, vmovn_u64(key), vshrn_n_u64(key, 32));
}

static void add_stripes(uint64_t *accumulators, const unsigned char *secret,
                        const unsigned char *from, size_t n)
{
    uint64x2_t sums[4];
    size_t i, j;

    for (j = 0; j < 4; j++)
        sums[j] = vld1q_u64(accumulators + 2 * j);
    for (i = 0; i < n; i++, from += KVT_STRIPE_BYTES) {
        for (j = 0; j < 4; j++)
            sums[j] = with_stripe(sums[j], load_128(from + 16 * j),
                                  secret + i % KVT_RUN_STRIPES * 8 + 16 * j);
        if (i % KVT_RUN_STRIPES < KVT_RUN_STRIPES - 1)
            continue;
        for (j = 0; j < 4; j++)
            sums[j] = scrambled(sums[j], secret + KVT_SECRET_BYTES - KVT_STRIPE_BYTES + 16 * j);
    }
    for (j = 0; j < 4; j++)
        vst1q_u64(accumulators + 2 * j, sums[j]);
}

#else

static void add_stripes(uint64_t *accumulators, const unsigned char *secret,
                        const unsigned char *from, size_t n)
{
    const unsigned char *last = secret + KVT_SECRET_BYTES - KVT_STRIPE_BYTES;
    size_t i, j;

    for (i = 0; i < n; i++, from += KVT_STRIPE_BYTES) {
        for (j = 0; j < 8; j++) {
            uint64_t data = kvt_get64(from + 8 * j);
            uint64_t key = data ^ kvt_get64(secret + (i % KVT_RUN_STRIPES + j) * 8);
            accumulators[j ^ 1] += data;
            accumulators[j] += (key & 0xffffffffu) * (key >> 32);
        }
        for (j = 0; i % KVT_RUN_STRIPES == KVT_RUN_STRIPES - 1 && j < 8; j++) {
            uint64_t x = accumulators[j];
            accumulators[j] = (x ^ x >> 47 ^ kvt_get64(last + 8 * j)) * KVT_SCRAMBLE_PRIME;
        }
    }
}

#endif

/* A run at a time: what is copied is in the first level cache then. */
void kvt_stripes_base(uint64_t *accumulators, const unsigned char *secret,
                      const unsigned char *from, size_t n, const unsigned char *copy,
                      unsigned char *to)
{
    size_t i, step;
    for (i = 0; i < n; i += step) {
        step = n - i < KVT_RUN_STRIPES ? n - i : KVT_RUN_STRIPES;
        add_stripes(accumulators, secret, from + i * KVT_STRIPE_BYTES, step);
        if (to)
            memcpy(to + i * KVT_STRIPE_BYTES, copy + i * KVT_STRIPE_BYTES, step * KVT_STRIPE_BYTES);
    }
}

static void fence(void)
{
}

#endif

static kvt_stripes *stripes_here(void)
{
#if defined(KVT_HAVE_AVX2)
    if (kvt_cpu_knows_avx2())
        return kvt_stripes_avx2;
#endif
    return kvt_stripes_base;
}

/* ---- the end ---- */

/* The halves of the 128-bit product, one on the other. */
static uint64_t folded_product(uint64_t a, uint64_t b)
{
    uint64_t low = (a & 0xffffffffu) * (b & 0xffffffffu), high = (a >> 32) * (b >> 32);
    uint64_t cross = (a >> 32) * (b & 0xffffffffu) + (low >> 32); /* below 2^64 */
    uint64_t other = (a & 0xffffffffu) * (b >> 32) + (cross & 0xffffffffu);
    high += (cross >> 32) + (other >> 32);
    return high ^ (other << 32 | (low & 0xffffffffu));
}

static uint64_t merged(const uint64_t *accumulators, const unsigned char *secret, uint64_t sum)
{
    size_t i;
    for (i = 0; i < 8; i += 2)
        sum += folded_product(accumulators[i] ^ kvt_get64(secret + 8 * i),
                              accumulators[i + 1] ^ kvt_get64(secret + 8 * i + 8));
    sum = (sum ^ sum >> 37) * PRIME_AVALANCHE;
    return sum ^ sum >> 32;
}

static void put_big_endian(uint64_t x, unsigned char *to)
{
    size_t i;
    for (i = 0; i < 8; i++)
        to[i] = (unsigned char)(x >> (56 - 8 * i));
}

static void finish(uint64_t *accumulators, const unsigned char *from, size_t bytes,
                   unsigned char *digest)
{
    const unsigned char *last = from + bytes - KVT_STRIPE_BYTES;
    size_t j;

    for (j = 0; j < 8; j++) {
        uint64_t data = kvt_get64(last + 8 * j);
        uint64_t key = data ^ kvt_get64(default_secret + LAST_STRIPE_SECRET + 8 * j);
        accumulators[j ^ 1] += data;
        accumulators[j] += (key & 0xffffffffu) * (key >> 32);
    }
    put_big_endian(merged(accumulators, default_secret + HIGH_SECRET, ~(bytes * PRIME64_2)),
                   digest);
    put_big_endian(merged(accumulators, default_secret + LOW_SECRET, bytes * PRIME64_1),
                   digest + 8);
}

/* ---- a digest by parts ---- */

/* Copied past the caches from so many bytes on; what is less is in the first level cache. */
#define PAST_CACHES_BYTES 16384

void kvt_snap_copier_begin(kvt_snap_copier *c, kvt_stripes *stripes, unsigned char *to,
                           const unsigned char *from, size_t bytes)
{
    static const uint64_t first[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                      PRIME64_4, PRIME32_2, PRIME64_5, KVT_SCRAMBLE_PRIME};
    memcpy(c->accumulators, first, sizeof first);
    c->stripes = stripes ? stripes : stripes_here();
    c->from = from;
    c->to = to;
    c->bytes = bytes;
    c->done = c->copied = 0;
    c->past_caches = 0;
    if (to && bytes >= PAST_CACHES_BYTES) {
        c->past_caches = 1;
        c->copied = (size_t)(0 - (uintptr_t)to) % KVT_STRIPE_BYTES; /* where a line begins */
        memcpy(to, from, c->copied);
    }
}

/* Stripes up to `end`: a multiple of a run, or the last ones. */
static void take(kvt_snap_copier *c, size_t end, int copies)
{
    size_t n = (end - c->done) / KVT_STRIPE_BYTES;
    c->stripes(c->accumulators, default_secret, c->from + c->done, n, c->from + c->copied,
               copies ? c->to + c->copied : NULL);
    c->done = end;
    if (copies)
        c->copied += n * KVT_STRIPE_BYTES;
}

void kvt_snap_copier_reach(kvt_snap_copier *c, size_t end)
{
    size_t last = (c->bytes - 1) / KVT_STRIPE_BYTES * KVT_STRIPE_BYTES;
    size_t runs = (c->bytes - KVT_STRIPE_BYTES) / KVT_RUN_BYTES * KVT_RUN_BYTES;

    end = kvt_round_up(end, KVT_RUN_BYTES); /* a kernel begins with a run */
    if (c->past_caches && c->done < runs)   /* what is copied ends up to a stripe behind them */
        take(c, end < runs ? end : runs, 1);
    end = end < last ? end : last;
    if (c->done < end)
        take(c, end, 0);
}

void kvt_snap_copier_end(kvt_snap_copier *c, unsigned char *digest)
{
    kvt_snap_copier_reach(c, c->bytes);
    if (c->past_caches)
        fence();
    if (c->to)
        memcpy(c->to + c->copied, c->from + c->copied, c->bytes - c->copied);
    finish(c->accumulators, c->from, c->bytes, digest);
}

static void digest_long(unsigned char *to, const unsigned char *from, size_t bytes,
                        unsigned char *digest)
{
    kvt_snap_copier copier;
    kvt_snap_copier_begin(&copier, NULL, to, from, bytes);
    kvt_snap_copier_end(&copier, digest);
}

void kvt_snap_digest(const void *data, size_t bytes, unsigned char *digest)
{
    if (bytes <= KVT_SNAP_SHORT_BYTES)
        kvt_snap_digest_short(data, bytes, digest);
    else
        digest_long(NULL, data, bytes, digest);
}

void kvt_snap_copy_digest(void *to, const void *from, size_t bytes, unsigned char *digest)
{
    if (bytes > KVT_SNAP_SHORT_BYTES) {
        digest_long(to, from, bytes, digest);
        return;
    }
    if (bytes > 0)
        memcpy(to, from, bytes);
    kvt_snap_digest_short(from, bytes, digest);
}
