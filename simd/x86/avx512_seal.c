/*
 * AVX-512 (F, BW, DQ, VL) kernels: sealing, that is the robust mean of a block of f16 tokens and
 * their codes and scales as i8.
 *
 * The bytes are scalar.c's: the same f32 operations in the same order, 16 tokens (K) or dims (V) at
 * a time. An element is code * scale with a power of two for a scale, so that the product is exact:
 * an FMA of code and scale rounds once, as the addition by itself does, and spares the
 * multiplication. Nothing else is fused. For V, without an offset, the scales' product of sealed
 * reciprocal and open scale is exact as well, and one multiplication remains.
 */
#include "avx512.h"

#include "simd/outliers.h"

#define TILES (KVT_TOKENS / KVT_TILE_TOKENS)

KVT_INLINE __m256i load_256(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

/* ---- the mean ---- */

/* Dims that are summed and folded together. */
#define MEAN_DIMS 4

/* A dim of each tile as numbers, without their scales; zero for tokens that are not kept. */
KVT_INLINE void load_dim(const uint16_t *from, size_t tile, const __mmask16 *kept, __m512 x[TILES])
{
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++)
        x[i] = kept ? _mm512_maskz_cvtph_ps(kept[i], load_256(from + i * tile))
                    : _mm512_cvtph_ps(load_256(from + i * tile));
}

/* Lane j: the sum of tokens j, 16 + j, 32 + j, 48 + j. */
KVT_INLINE __m512 sum_tiles(const __m512 x[TILES], const __m512 scale[TILES])
{
    __m512 sum = _mm512_mul_ps(x[0], scale[0]);
    KVT_UNROLL
    for (size_t i = 1; i < TILES; i++)
        sum = _mm512_fmadd_ps(x[i], scale[i], sum);
    return sum;
}

/* Lanes 8, 4, 2, 1 apart are added: every element of 128-bit lane k is the sum of x[k]. */
KVT_INLINE __m512 fold(const __m512 x[MEAN_DIMS])
{
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44),
                             _mm512_shuffle_f32x4(x[0], x[1], 0xee));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44),
                             _mm512_shuffle_f32x4(x[2], x[3], 0xee));
    a = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
    return _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
}

KVT_INLINE void store_means(float *to, __m512 means)
{
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, means)));
}

/* The mean of the tokens that are kept. */
static void mean_of_kept(const uint16_t *open, const __m512 scale[TILES], size_t dims_p,
                         uint64_t left_out, float *mean)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    const __m512 count = _mm512_set1_ps((float)(KVT_TOKENS - __builtin_popcountll(left_out)));
    __mmask16 kept[TILES];
    for (size_t i = 0; i < TILES; i++)
        kept[i] = (__mmask16)(~left_out >> i * KVT_TILE_TOKENS & 0xffffu);
    for (size_t d = 0; d < dims_p; d += MEAN_DIMS) {
        __m512 sum[MEAN_DIMS];
        KVT_UNROLL
        for (size_t e = 0; e < MEAN_DIMS; e++) {
            __m512 x[TILES];
            load_dim(open + (d + e) * KVT_TILE_TOKENS, tile, kept, x);
            sum[e] = sum_tiles(x, scale);
        }
        store_means(mean + d, _mm512_div_ps(fold(sum), count));
    }
}

/*
 * A dim's mean and its share of all distances are formed in one pass, from elements that are
 * converted once: the four tiles of MEAN_DIMS dims stay in registers while their sums are folded.
 */
void kvt_avx512_mean_k_f16(const void *open, const uint16_t *open_scales, size_t dims_p,
                           float *mean)
{
    const uint16_t *from = open;
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    __m512 scale[TILES], dist[TILES];
    float distances[KVT_TOKENS];
    uint64_t left_out;

    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++) {
        scale[i] = _mm512_cvtph_ps(load_256(open_scales + i * KVT_TILE_TOKENS));
        dist[i] = _mm512_setzero_ps();
    }
    for (size_t d = 0; d < dims_p; d += MEAN_DIMS) {
        __m512 x[MEAN_DIMS][TILES], sum[MEAN_DIMS], means;
        KVT_UNROLL
        for (size_t e = 0; e < MEAN_DIMS; e++) {
            load_dim(from + (d + e) * KVT_TILE_TOKENS, tile, NULL, x[e]);
            sum[e] = sum_tiles(x[e], scale);
        }
        means = _mm512_mul_ps(fold(sum), _mm512_set1_ps(1.0f / KVT_TOKENS));
        store_means(mean + d, means);
#define ADD_DISTANCES(e)                                                                           \
    {                                                                                              \
        const __m512 m = _mm512_shuffle_f32x4(means, means, 0x55 * e);                             \
        KVT_UNROLL                                                                                 \
        for (size_t i = 0; i < TILES; i++) {                                                       \
            __m512 away = _mm512_fmsub_ps(x[e][i], scale[i], m);                                   \
            dist[i] = _mm512_add_ps(dist[i], _mm512_mul_ps(away, away));                           \
        }                                                                                          \
    }
        ADD_DISTANCES(0)
        ADD_DISTANCES(1)
        ADD_DISTANCES(2)
        ADD_DISTANCES(3)
#undef ADD_DISTANCES
    }
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++)
        _mm512_storeu_ps(distances + i * KVT_TILE_TOKENS, dist[i]);
    left_out = kvt_outliers(distances);
    if (left_out)
        mean_of_kept(from, scale, dims_p, left_out, mean);
}

/* ---- codes ---- */

/*
 * Codes of four registers of numbers: byte j of lane i is that of x[j]'s lane i. The default
 * rounding of the conversion is to nearest even; packing saturates, codes do not.
 */
KVT_INLINE __m512i codes_of(const __m512 x[4])
{
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0]), _mm512_cvtps_epi32(x[1]));
    __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2]), _mm512_cvtps_epi32(x[3]));
    return _mm512_shuffle_epi8(_mm512_packs_epi16(ab, cd), order);
}

/* w of 16 tokens: a dim of K with its offset. */
KVT_INLINE __m512 open_plus(const uint16_t *from, __m512 scale, const float *delta, size_t d)
{
    __m512 x = _mm512_cvtph_ps(load_256(from + d * KVT_TILE_TOKENS));
    return delta ? _mm512_fmadd_ps(x, scale, _mm512_set1_ps(delta[d])) : _mm512_mul_ps(x, scale);
}

/* The tokens of a tile are the lanes: their magnitudes, scales and codes need no other lane. */
KVT_INLINE void seal_tile(const uint16_t *from, const uint16_t *open_scales, const float *delta,
                          size_t dims_p, uint8_t *to, uint16_t *scales)
{
    const __m512 scale = _mm512_cvtph_ps(load_256(open_scales));
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512 quotients, sealed, reciprocals;
    __m256i rounded;

    for (size_t d = 0; d < dims_p; d += 4) {
        KVT_UNROLL
        for (size_t e = 0; e < 4; e++) {
            __m512i w = _mm512_castps_si512(open_plus(from, scale, delta, d + e));
            most[e % 2] = _mm512_max_epi32(most[e % 2], _mm512_and_si512(w, magnitude));
        }
    }
    quotients = _mm512_div_ps(_mm512_castsi512_ps(_mm512_max_epi32(most[0], most[1])),
                              _mm512_set1_ps(127.0f));
    rounded = _mm512_cvtps_ph(quotients, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    sealed = _mm512_cvtph_ps(rounded);
    reciprocals = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(sealed, _mm512_setzero_ps(), _CMP_NEQ_UQ),
                                      _mm512_set1_ps(1.0f), sealed);
    _mm256_storeu_si256((__m256i *)(void *)scales, rounded);
    for (size_t d = 0; d < dims_p; d += 4) {
        __m512 x[4];
        KVT_UNROLL
        for (size_t e = 0; e < 4; e++)
            x[e] = _mm512_mul_ps(open_plus(from, scale, delta, d + e), reciprocals);
        _mm512_storeu_si512(to + d * KVT_TILE_TOKENS, codes_of(x));
    }
}

void kvt_avx512_seal_k_i8(const void *open, const uint16_t *open_scales, const float *delta,
                          size_t dims_p, void *codes, uint16_t *scales)
{
    for (size_t t = 0; t < KVT_TOKENS; t += KVT_TILE_TOKENS) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + t * dims_p;
        if (delta)
            seal_tile(from, open_scales + t, delta, dims_p, to, scales + t);
        else
            seal_tile(from, open_scales + t, NULL, dims_p, to, scales + t);
    }
}

/* The largest magnitude of each of 8 rows of f16. As integers, they order as the numbers do. */
KVT_INLINE __m128i most_of_rows(const uint16_t *from, size_t dims_p)
{
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i most[8];
    __m128i x[8];
    KVT_UNROLL
    for (size_t i = 0; i < 8; i++)
        most[i] = _mm256_setzero_si256();
    for (size_t d = 0; d < dims_p; d += 16) {
        KVT_UNROLL
        for (size_t i = 0; i < 8; i++)
            most[i] = _mm256_max_epi16(
                most[i], _mm256_and_si256(load_256(from + i * dims_p + d), magnitude));
    }
    KVT_UNROLL
    for (size_t i = 0; i < 8; i++)
        x[i] = _mm_max_epi16(_mm256_castsi256_si128(most[i]), _mm256_extracti128_si256(most[i], 1));
    /* Pairs, fours, all 8 rows: each step interleaves two registers and halves what is left. */
    KVT_UNROLL
    for (size_t i = 0; i < 8; i += 2)
        x[i] =
            _mm_max_epi16(_mm_unpacklo_epi16(x[i], x[i + 1]), _mm_unpackhi_epi16(x[i], x[i + 1]));
    x[0] = _mm_max_epi16(_mm_unpacklo_epi32(x[0], x[2]), _mm_unpackhi_epi32(x[0], x[2]));
    x[4] = _mm_max_epi16(_mm_unpacklo_epi32(x[4], x[6]), _mm_unpackhi_epi32(x[4], x[6]));
    return _mm_max_epi16(_mm_unpacklo_epi64(x[0], x[4]), _mm_unpackhi_epi64(x[0], x[4]));
}

/* 8 tokens at a time: their scales in one register, then the codes of 4 tokens by 16 dims. */
void kvt_avx512_seal_v_i8(const void *open, const uint16_t *open_scales, size_t dims_p, void *codes,
                          uint16_t *scales)
{
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + t * dims_p;
        const __m256 scale =
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(open_scales + t)));
        const __m256 most = _mm256_mul_ps(_mm256_cvtph_ps(most_of_rows(from, dims_p)), scale);
        const __m128i rounded = _mm256_cvtps_ph(_mm256_div_ps(most, _mm256_set1_ps(127.0f)),
                                                _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        const __m256 sealed = _mm256_cvtph_ps(rounded);
        float factor[8];
        _mm256_storeu_ps(
            factor,
            _mm256_mul_ps(scale, _mm256_maskz_div_ps(
                                     _mm256_cmp_ps_mask(sealed, _mm256_setzero_ps(), _CMP_NEQ_UQ),
                                     _mm256_set1_ps(1.0f), sealed)));
        _mm_storeu_si128((__m128i *)(void *)(scales + t), rounded);
        for (size_t i = 0; i < 8; i += 4)
            for (size_t d = 0; d < dims_p; d += 16) {
                __m512 x[4];
                KVT_UNROLL
                for (size_t j = 0; j < 4; j++)
                    x[j] = _mm512_mul_ps(_mm512_cvtph_ps(load_256(from + (i + j) * dims_p + d)),
                                         _mm512_set1_ps(factor[i + j]));
                _mm512_storeu_si512(to + i * dims_p + d * 4, codes_of(x));
            }
    }
}
