/*
 * AVX2 + FMA + F16C kernels: sealing, that is the robust mean of a block of f16 tokens and their
 * codes and scales as i8.
 *
 * The bytes are scalar.c's: the same f32 operations in the same order, 8 tokens (K) or dims (V) at
 * a time. An element is code * scale with a power of two for a scale, so that the product is exact:
 * an FMA of code and scale rounds once, as the addition by itself does, and spares the
 * multiplication. Nothing else is fused. For V, without an offset, the product of the open scale
 * and the reciprocal of the sealed one is exact as well, and one multiplication an element remains.
 *
 * AVX-512 inherits these. On Zen 4, which halves 64-byte operations, a 64-byte conversion from f16
 * costs a third more than two of 32 bytes, and all of it a third (0.69, 0.47 and 0.57 us here,
 * 0.91, 0.63 and 0.85 there, for seal_k_i8, seal_v_i8 and mean_k_f16 of 128 dims).
 */
#include "avx2.h"

#include "simd/outliers.h"

#define TILES (KVT_TOKENS / KVT_TILE_TOKENS)
#define MAX_DIMS 1024

KVT_INLINE __m256 load_f16(const uint16_t *from)
{
    return _mm256_cvtph_ps(kvt_load_128(from));
}

/* ---- the mean ---- */

/* By half of a tile (tokens 0 .. 7 and 8 .. 15 of it), and by tile. */
typedef struct tokens {
    __m256 scale[2][TILES];
    __m256 kept[2][TILES]; /* all ones for tokens that count */
} tokens;

/* Sums over the tiles: lane j is the sum of tokens j, 16 + j, 32 + j, 48 + j of that half. */
KVT_INLINE __m256 sum_tiles(const uint16_t *from, size_t tile, const __m256 scale[TILES],
                            const __m256 *kept)
{
    __m256 sum = _mm256_setzero_ps();
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++) {
        __m256 x = load_f16(from + i * tile);
        if (kept)
            x = _mm256_and_ps(x, kept[i]);
        sum = i ? _mm256_fmadd_ps(x, scale[i], sum) : _mm256_mul_ps(x, scale[i]);
    }
    return sum;
}

/* Lanes 4, 2, 1 apart are added: element i is the sum of x[i]. */
KVT_INLINE __m256 fold(const __m256 x[8])
{
    __m256 y[4], a, b;
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) /* halves: x[i] | x[i + 4] */
        y[i] = _mm256_add_ps(_mm256_permute2f128_ps(x[i], x[i + 4], 0x20),
                             _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
    a = _mm256_add_ps(_mm256_shuffle_ps(y[0], y[1], 0x44), _mm256_shuffle_ps(y[0], y[1], 0xee));
    b = _mm256_add_ps(_mm256_shuffle_ps(y[2], y[3], 0x44), _mm256_shuffle_ps(y[2], y[3], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

/*
 * The mean of `count` tokens, those that t->kept says, or all. 8 dims fold together. One half of
 * the tiles after the other: the scales of both would leave too few registers for 8 sums.
 */
KVT_INLINE void mean_of_kept(const uint16_t *open, const tokens *t, int is_all, float count,
                             size_t dims_p, float *mean)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    for (size_t d = 0; d < dims_p; d += 8) {
        const uint16_t *from = open + d * KVT_TILE_TOKENS;
        __m256 sum[8];
        KVT_UNROLL
        for (size_t e = 0; e < 8; e++)
            sum[e] = sum_tiles(from + e * 16, tile, t->scale[0], is_all ? NULL : t->kept[0]);
        KVT_UNROLL
        for (size_t e = 0; e < 8; e++)
            sum[e] = _mm256_add_ps(sum[e], sum_tiles(from + e * 16 + 8, tile, t->scale[1],
                                                     is_all ? NULL : t->kept[1]));
        _mm256_storeu_ps(mean + d, _mm256_div_ps(fold(sum), _mm256_set1_ps(count)));
    }
}

/* Squared distances from the mean. The four tiles are four chains of additions. */
KVT_INLINE void distances_of(const uint16_t *open, const tokens *t, size_t dims_p,
                             const float *mean, float *distances)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    for (size_t half = 0; half < 2; half++) {
        __m256 dist[TILES];
        KVT_UNROLL
        for (size_t i = 0; i < TILES; i++)
            dist[i] = _mm256_setzero_ps();
        for (size_t d = 0; d < dims_p; d++) {
            const uint16_t *from = open + d * KVT_TILE_TOKENS + half * 8;
            const __m256 m = _mm256_broadcast_ss(mean + d);
            KVT_UNROLL
            for (size_t i = 0; i < TILES; i++) {
                __m256 away = _mm256_fmsub_ps(load_f16(from + i * tile), t->scale[half][i], m);
                dist[i] = _mm256_add_ps(dist[i], _mm256_mul_ps(away, away));
            }
        }
        KVT_UNROLL
        for (size_t i = 0; i < TILES; i++)
            _mm256_storeu_ps(distances + i * KVT_TILE_TOKENS + half * 8, dist[i]);
    }
}

void kvt_avx2_mean_k_f16(const void *open, const uint16_t *open_scales, size_t dims_p, float *mean)
{
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    float distances[KVT_TOKENS];
    uint64_t left_out;
    tokens t;

    for (size_t i = 0; i < TILES; i++)
        for (size_t half = 0; half < 2; half++)
            t.scale[half][i] = load_f16(open_scales + i * KVT_TILE_TOKENS + half * 8);
    mean_of_kept(open, &t, 1, KVT_TOKENS, dims_p, mean);
    distances_of(open, &t, dims_p, mean, distances);
    left_out = kvt_outliers(distances);
    if (left_out == 0)
        return;
    for (size_t i = 0; i < TILES; i++)
        for (size_t half = 0; half < 2; half++) {
            int32_t eight = (int32_t)(~left_out >> (i * KVT_TILE_TOKENS + half * 8) & 0xff);
            __m256i its = _mm256_and_si256(_mm256_set1_epi32(eight), bits);
            t.kept[half][i] = _mm256_castsi256_ps(_mm256_cmpeq_epi32(its, bits));
        }
    mean_of_kept(open, &t, 0, (float)(KVT_TOKENS - __builtin_popcountll(left_out)), dims_p, mean);
}

/* ---- codes ---- */

/* The scales of 8 tokens from their largest magnitudes: a 127th, rounded up to f16. */
KVT_INLINE __m128i scales_of(__m256 most)
{
    return _mm256_cvtps_ph(_mm256_div_ps(most, _mm256_set1_ps(127.0f)),
                           _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}

/* What codes are multiplied by: zero for a scale of zero. */
KVT_INLINE __m256 reciprocals_of(__m128i scales)
{
    __m256 x = _mm256_cvtph_ps(scales);
    __m256 is_zero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return _mm256_andnot_ps(is_zero, _mm256_div_ps(_mm256_set1_ps(1.0f), x));
}

/*
 * Codes of four registers of numbers: byte j of lane i is that of x[j]'s lane i. The default
 * rounding of the conversion is to nearest even; packing saturates, codes do not.
 */
KVT_INLINE __m256i codes_of(const __m256 x[4])
{
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0,
                                           4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
    __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2]), _mm256_cvtps_epi32(x[3]));
    return _mm256_shuffle_epi8(_mm256_packs_epi16(ab, cd), order);
}

/*
 * 8 tokens of a tile, which are the lanes: their magnitudes and codes need no other lane. The
 * numbers are kept between the two passes: that is less work than to convert twice.
 */
KVT_INLINE void seal_k_8(const uint16_t *from, __m256 scale, const float *delta, size_t dims_p,
                         uint8_t *to, uint16_t *scales)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    _Alignas(32) float w[MAX_DIMS * 8];
    __m256i most[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256 reciprocals;
    __m128i rounded;

    for (size_t d = 0; d < dims_p; d += 4) {
        KVT_UNROLL
        for (size_t e = 0; e < 4; e++) {
            __m256 x = load_f16(from + (d + e) * 16);
            x = delta ? _mm256_fmadd_ps(x, scale, _mm256_broadcast_ss(delta + d + e))
                      : _mm256_mul_ps(x, scale);
            _mm256_store_ps(w + (d + e) * 8, x);
            most[e % 2] =
                _mm256_max_epi32(most[e % 2], _mm256_and_si256(_mm256_castps_si256(x), magnitude));
        }
    }
    rounded = scales_of(_mm256_castsi256_ps(_mm256_max_epi32(most[0], most[1])));
    reciprocals = reciprocals_of(rounded);
    kvt_store_128(scales, rounded);
    for (size_t d = 0; d < dims_p; d += 4) {
        __m256 x[4];
        KVT_UNROLL
        for (size_t e = 0; e < 4; e++)
            x[e] = _mm256_mul_ps(_mm256_load_ps(w + (d + e) * 8), reciprocals);
        kvt_store_256(to + d * 16, codes_of(x));
    }
}

KVT_INLINE void seal_k(const uint16_t *open, const uint16_t *open_scales, const float *delta,
                       size_t dims_p, uint8_t *codes, uint16_t *scales)
{
    for (size_t t = 0; t < KVT_TOKENS; t += 8)
        seal_k_8(open + kvt_kw_index(t, 0, dims_p), load_f16(open_scales + t), delta, dims_p,
                 codes + kvt_k8_index(t, 0, dims_p), scales + t);
}

void kvt_avx2_seal_k_i8(const void *open, const uint16_t *open_scales, const float *delta,
                        size_t dims_p, void *codes, uint16_t *scales)
{
    if (delta)
        seal_k(open, open_scales, delta, dims_p, codes, scales);
    else
        seal_k(open, open_scales, NULL, dims_p, codes, scales);
}

/*
 * The largest magnitudes of 4 rows of f16, in lanes 0 .. 3 and again in 4 .. 7, which are still to
 * be compared. As integers, magnitudes order as the numbers do.
 */
KVT_INLINE __m128i most_of_4_rows(const uint16_t *from, size_t dims_p)
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

KVT_INLINE __m128i most_of_8_rows(const uint16_t *from, size_t dims_p)
{
    __m128i a = most_of_4_rows(from, dims_p), b = most_of_4_rows(from + 4 * dims_p, dims_p);
    return _mm_max_epi16(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
}

/*
 * All scales before the codes: a scale is two divisions and two conversions after the last element,
 * a latency that those of other tokens hide. Codes are formed 4 tokens by 8 dims at a time.
 */
void kvt_avx2_seal_v_i8(const void *open, const uint16_t *open_scales, size_t dims_p, void *codes,
                        uint16_t *scales)
{
    uint16_t most[KVT_TOKENS];
    float factors[KVT_TOKENS];
    for (size_t t = 0; t < KVT_TOKENS; t += 8)
        kvt_store_128(most + t, most_of_8_rows((const uint16_t *)open + t * dims_p, dims_p));
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        __m256 scale = load_f16(open_scales + t);
        __m128i rounded = scales_of(_mm256_mul_ps(load_f16(most + t), scale));
        kvt_store_128(scales + t, rounded);
        _mm256_storeu_ps(factors + t, _mm256_mul_ps(scale, reciprocals_of(rounded)));
    }
    for (size_t t = 0; t < KVT_TOKENS; t += 4) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + t * dims_p;
        __m256 factor[4];
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++)
            factor[j] = _mm256_broadcast_ss(factors + t + j);
        for (size_t d = 0; d < dims_p; d += 8) {
            __m256 x[4];
            KVT_UNROLL
            for (size_t j = 0; j < 4; j++)
                x[j] = _mm256_mul_ps(load_f16(from + j * dims_p + d), factor[j]);
            kvt_store_256(to + d * 4, codes_of(x));
        }
    }
}
