/*
 * AVX2: stripes of XXH3, four accumulators in a register. See simd/stripes.h.
 *
 * AVX-512 was tried. On a Zen 4 it makes no difference; on a Xeon with AMX it is half as fast again
 * from the second level cache (54 and 34 GB/s), slower from memory (10 and 14), and behind a read()
 * of a file, where most of what is hashed comes from, as fast.
 */
#include "avx2.h"
#include "simd/stripes.h"

static inline __m256i scramble_stripes(__m256i sum, const unsigned char *secret)
{
    const __m256i prime = _mm256_set1_epi32((int)KVT_SCRAMBLE_PRIME);
    __m256i x =
        _mm256_xor_si256(_mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47)), kvt_load_256(secret));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
}

static inline __m256i add_stripe(__m256i sum, __m256i data, const unsigned char *secret)
{
    __m256i key = _mm256_xor_si256(data, kvt_load_256(secret));
    __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    __m256i other = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(product, _mm256_add_epi64(sum, other));
}

void kvt_stripes_avx2(uint64_t *accumulators, const unsigned char *secret,
                      const unsigned char *from, size_t n, const unsigned char *copy,
                      unsigned char *to)
{
    const unsigned char *last = secret + KVT_SECRET_BYTES - KVT_STRIPE_BYTES;
    __m256i a = kvt_load_256(accumulators), b = kvt_load_256(accumulators + 4);
    size_t i;

    for (i = 0; i < n; i++, from += KVT_STRIPE_BYTES) {
        const unsigned char *key = secret + i % KVT_RUN_STRIPES * 8;
        _mm_prefetch((const char *)from + KVT_STRIPES_AHEAD, _MM_HINT_T0);
        a = add_stripe(a, kvt_load_256(from), key);
        b = add_stripe(b, kvt_load_256(from + 32), key + 32);
        if (to) {
            const unsigned char *line = copy + i * KVT_STRIPE_BYTES;
            __m256i *to_line = (__m256i *)(void *)(to + i * KVT_STRIPE_BYTES);
            _mm256_stream_si256(to_line, kvt_load_256(line));
            _mm256_stream_si256(to_line + 1, kvt_load_256(line + 32));
        }
        if (i % KVT_RUN_STRIPES == KVT_RUN_STRIPES - 1) {
            a = scramble_stripes(a, last);
            b = scramble_stripes(b, last + 32);
        }
    }
    kvt_store_256(accumulators, a);
    kvt_store_256(accumulators + 4, b);
}
