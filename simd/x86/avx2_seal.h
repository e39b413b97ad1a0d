/*
 * What AVX2's sealing files share (avx2_seal.c, avx2_seal_4bit.c): open rows, scales, and folds.
 */
#ifndef KVT_AVX2_SEAL_H
#define KVT_AVX2_SEAL_H

#include "avx2.h"

#define KVT_TILES (KVT_TOKENS / KVT_TILE_TOKENS)
/* Floats that sealing K keeps: 64 tokens of up to 288 dims, 32 of 576, 16 of 1152. */
#define KVT_SEAL_BUFFER (32 * 576)

KVT_INLINE __m256 kvt_load_f16(const uint16_t *from)
{
    return _mm256_cvtph_ps(kvt_load_128(from));
}

/* Lanes 4, 2, 1 apart are combined: element i is the sum, or the extremum, of x[i]. */
#define KVT_DEFINE_FOLD(name, op)                                                                  \
    KVT_INLINE __m256 name(const __m256 x[8])                                                      \
    {                                                                                              \
        __m256 y[4], a, b;                                                                         \
        KVT_UNROLL                                                                                 \
        for (size_t i = 0; i < 4; i++) /* halves: x[i] | x[i + 4] */                               \
            y[i] = op(_mm256_permute2f128_ps(x[i], x[i + 4], 0x20),                                \
                      _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));                               \
        a = op(_mm256_shuffle_ps(y[0], y[1], 0x44), _mm256_shuffle_ps(y[0], y[1], 0xee));          \
        b = op(_mm256_shuffle_ps(y[2], y[3], 0x44), _mm256_shuffle_ps(y[2], y[3], 0xee));          \
        return op(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));                   \
    }

/* The kept tokens of 8: all ones in their lanes. left_out: a bit a token. */
KVT_INLINE __m256 kvt_kept_lanes(uint64_t left_out)
{
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i its = _mm256_and_si256(_mm256_set1_epi32((int32_t)(~left_out & 0xff)), bits);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(its, bits));
}

/* What codes are multiplied by, the numerator over the scale: zero for a scale of zero. */
KVT_INLINE __m256 kvt_reciprocals_of(__m128i scales, float numerator)
{
    __m256 x = _mm256_cvtph_ps(scales);
    __m256 is_zero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return _mm256_andnot_ps(is_zero, _mm256_div_ps(_mm256_set1_ps(numerator), x));
}

/* The scales of 8 tokens from their largest magnitudes: a part of them, rounded up to f16. */
KVT_INLINE __m128i kvt_scales_of(__m256 most, float parts)
{
    return _mm256_cvtps_ph(_mm256_div_ps(most, _mm256_set1_ps(parts)),
                           _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}

/*
 * x within +-bound. Floats are compared as integers, signed for the upper bound, which leaves
 * negative numbers as they are, and unsigned for the lower one, which leaves positive ones: of a
 * float minimum, Zen 4 forms half as many a cycle, on the ports of the multiplications.
 */
KVT_INLINE __m256 kvt_at_most(__m256 x, float bound)
{
    const __m256i most = _mm256_castps_si256(_mm256_set1_ps(bound));
    return _mm256_castsi256_ps(_mm256_min_epi32(_mm256_castps_si256(x), most));
}

KVT_INLINE __m256 kvt_at_least_minus(__m256 x, float bound)
{
    const __m256i least = _mm256_castps_si256(_mm256_set1_ps(-bound));
    return _mm256_castsi256_ps(_mm256_min_epu32(_mm256_castps_si256(x), least));
}

/*
 * The largest magnitudes of 4 rows of f16, in lanes 0 .. 3 and again in 4 .. 7, which are still to
 * be compared. As integers, magnitudes order as the numbers do.
 */
KVT_INLINE __m128i kvt_most_of_4_rows(const uint16_t *from, size_t dims_p)
{
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i most[4];
    __m128i x[4];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        most[i] = _mm256_setzero_si256();
    for (size_t d = 0; d < dims_p; d += 16) {
        KVT_UNROLL
        for (size_t i = 0; i < 4; i++)
            most[i] = _mm256_max_epi16(
                most[i], _mm256_and_si256(kvt_load_256(from + i * dims_p + d), magnitude));
    }
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        x[i] = _mm_max_epi16(_mm256_castsi256_si128(most[i]), _mm256_extracti128_si256(most[i], 1));
    /* Each step interleaves two registers and halves what is left of a row. */
    x[0] = _mm_max_epi16(_mm_unpacklo_epi16(x[0], x[1]), _mm_unpackhi_epi16(x[0], x[1]));
    x[2] = _mm_max_epi16(_mm_unpacklo_epi16(x[2], x[3]), _mm_unpackhi_epi16(x[2], x[3]));
    return _mm_max_epi16(_mm_unpacklo_epi32(x[0], x[2]), _mm_unpackhi_epi32(x[0], x[2]));
}

KVT_INLINE __m128i kvt_most_of_8_rows(const uint16_t *from, size_t dims_p)
{
    __m128i a = kvt_most_of_4_rows(from, dims_p), b = kvt_most_of_4_rows(from + 4 * dims_p, dims_p);
    return _mm_max_epi16(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
}

#endif /* KVT_AVX2_SEAL_H */
