/*
 * AVX2 + FMA + F16C kernels: sealing a block of f16 tokens as 4-bit K and as 4- or 5-bit V.
 *
 * The bytes are scalar_4bit.c's. As in avx2_seal.c, an element is code * scale with a power of two
 * for a scale, so that products with either may be joined or fused where that saves one; nothing
 * else is fused but what docs/numerics.md says is. AVX-512 inherits these.
 *
 * V is rounded to bytes at once, 32 dims a register, in an order that spares permutations: by
 * fours, lane 0 has dims 0, 8, 16 and 24 of the 32, lane 1 dims 4, 12, 20 and 28. Interleaving four
 * tokens then yields the codes of 8 consecutive dims a register.
 */
#include "avx2_seal.h"

#include <math.h>

#include "simd/levels.h"

KVT_DEFINE_FOLD(fold_sum, _mm256_add_ps)
KVT_DEFINE_FOLD(fold_least, _mm256_min_ps)
KVT_DEFINE_FOLD(fold_most, _mm256_max_ps)

/* ---- rows of V as bytes ---- */

/* The elements of 32 dims; where n is 16 the last 16 are zero. */
typedef struct four_vectors {
    __m256 of[4];
} four_vectors;

KVT_INLINE four_vectors load_32(const uint16_t *from, size_t n)
{
    four_vectors x;
    x.of[0] = kvt_load_f16(from);
    x.of[1] = kvt_load_f16(from + 8);
    x.of[2] = n == 16 ? _mm256_setzero_ps() : kvt_load_f16(from + 16);
    x.of[3] = n == 16 ? _mm256_setzero_ps() : kvt_load_f16(from + 24);
    return x;
}

/* Round(x * factor), the default rounding to nearest even, saturated at int8. */
KVT_INLINE __m256i round_32(four_vectors x, __m256 factor)
{
#define ROUND(i) _mm256_cvtps_epi32(_mm256_mul_ps(x.of[i], factor))
    return _mm256_packs_epi16(_mm256_packs_epi32(ROUND(0), ROUND(1)),
                              _mm256_packs_epi32(ROUND(2), ROUND(3)));
#undef ROUND
}

/* Bytes below zero where the element has its sign bit, else not. */
KVT_INLINE __m256i signs_of_32(const uint16_t *from, size_t n)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    __m256i x = kvt_load_256(from);
    __m256i y = n == 16 ? _mm256_setzero_si256() : kvt_load_256(from + 16);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(x, y), order);
}

/* Bytes of four tokens, 32 dims, by dims: x[i] becomes dims 8 i to 8 i + 7. */
KVT_INLINE void interleave(__m256i x[4])
{
    __m256i a = _mm256_unpacklo_epi8(x[0], x[1]), b = _mm256_unpackhi_epi8(x[0], x[1]);
    __m256i c = _mm256_unpacklo_epi8(x[2], x[3]), d = _mm256_unpackhi_epi8(x[2], x[3]);
    x[0] = _mm256_unpacklo_epi16(a, c);
    x[1] = _mm256_unpackhi_epi16(a, c);
    x[2] = _mm256_unpacklo_epi16(b, d);
    x[3] = _mm256_unpackhi_epi16(b, d);
}

/* As much of `next` as 8 tokens and 32 dims are. */
KVT_INLINE void prefetch_octet(const uint16_t *next)
{
    for (size_t i = 0; i < 8; i++)
        _mm_prefetch((const char *)(next + i * 32), _MM_HINT_T1);
}

/* ---- 4-bit V ---- */

/*
 * The index of a magnitude u (levels.h) by a bin of 8, of which none has more than one bound: the
 * index of u is what belongs to its bin, or to the next one where u is above the bin's bound.
 */
typedef struct table {
    int8_t bound[16]; /* 127: none */
    uint8_t of_bin[16];
} table;

/* The levels of the three sets of bounds; the codes of the first set for negative elements. */
#define LEVEL(x, ...) KVT_V4_MAGNITUDE(KVT_V4_BEFORE(x, __VA_ARGS__))
#define CODE(x, ...) 7 - (KVT_V4_BEFORE(x, __VA_ARGS__))
#define TABLE(f, ...)                                                                              \
    {                                                                                              \
        KVT_V4_BY_EIGHTS(KVT_V4_BOUND, __VA_ARGS__), KVT_V4_BY_EIGHTS(f, __VA_ARGS__)              \
    }
static const table level_tables[KVT_V4_CANDIDATES] = {
    TABLE(LEVEL, KVT_V4_BOUNDS_0), TABLE(LEVEL, KVT_V4_BOUNDS_1), TABLE(LEVEL, KVT_V4_BOUNDS_2)};
static const table code_table = TABLE(CODE, KVT_V4_BOUNDS_0);

/* u: 0 to 127. */
KVT_INLINE __m256i bin_of(__m256i u)
{
    return _mm256_and_si256(_mm256_srli_epi16(u, 3), _mm256_set1_epi8(15));
}

KVT_INLINE __m256i look_up(const table *t, __m256i u, __m256i bin)
{
    const __m256i bound = _mm256_broadcastsi128_si256(kvt_load_128(t->bound));
    const __m256i of_bin = _mm256_broadcastsi128_si256(kvt_load_128(t->of_bin));
    __m256i is_above = _mm256_cmpgt_epi8(u, _mm256_shuffle_epi8(bound, bin));
    return _mm256_shuffle_epi8(of_bin, _mm256_sub_epi8(bin, is_above));
}

/* Of 8 rows: sums of u * level and of level * level, by candidates, in f32: exact. */
typedef struct row_sums {
    __m256 product[KVT_V4_CANDIDATES][8], square[KVT_V4_CANDIDATES][8];
} row_sums;

/* Dims are summed 64 at a time. */
#define SUM_DIMS 64

KVT_INLINE void sum_row(const uint16_t *from, size_t dims_p, __m256 units, size_t row,
                        row_sums *out)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i product[KVT_V4_CANDIDATES], square[KVT_V4_CANDIDATES];
    uint16_t rest[SUM_DIMS];
    KVT_UNROLL
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++)
        product[k] = square[k] = _mm256_setzero_si256();
    for (size_t d = 0; d < dims_p; d += SUM_DIMS) {
        const uint16_t *at = from + d;
        __m256i u, w, bin_u, bin_w;
        if (d + SUM_DIMS > dims_p) {
            memset(rest, 0, sizeof rest);
            memcpy(rest, at, (dims_p - d) * sizeof *at);
            at = rest;
        }
        u = _mm256_abs_epi8(round_32(load_32(at, 32), units));
        w = _mm256_abs_epi8(round_32(load_32(at + 32, 32), units));
        bin_u = bin_of(u);
        bin_w = bin_of(w);
        KVT_UNROLL
        for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
            __m256i a = look_up(&level_tables[k], u, bin_u);
            __m256i b = look_up(&level_tables[k], w, bin_w);
            /* Of four products of at most 126 * 63: below 2^15. */
            __m256i x = _mm256_add_epi16(_mm256_maddubs_epi16(u, a), _mm256_maddubs_epi16(w, b));
            __m256i y = _mm256_add_epi16(_mm256_maddubs_epi16(a, a), _mm256_maddubs_epi16(b, b));
            product[k] = _mm256_add_epi32(product[k], _mm256_madd_epi16(x, ones));
            square[k] = _mm256_add_epi32(square[k], _mm256_madd_epi16(y, ones));
        }
    }
    KVT_UNROLL
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
        out->product[k][row] = _mm256_cvtepi32_ps(product[k]);
        out->square[k][row] = _mm256_cvtepi32_ps(square[k]);
    }
}

/* The scales of 8 rows (scalar_4bit.c, v4_scale). absent: dims of zeros beyond the row's. */
KVT_INLINE __m128i v4_scales_of(const row_sums *sums, float absent, __m256 largest)
{
    const __m256 is_zero = _mm256_cmp_ps(largest, _mm256_set1_ps(KVT_V4_LEAST), _CMP_LT_OQ);
    __m256 most = _mm256_set1_ps(-1.0f), step = _mm256_setzero_ps();
    __m128i scale;
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
        /* A zero counts as the smallest level, 3. */
        __m256 square = _mm256_sub_ps(fold_sum(sums->square[k]), _mm256_set1_ps(9.0f * absent));
        __m256 product = fold_sum(sums->product[k]);
        __m256 gain = _mm256_div_ps(_mm256_mul_ps(product, product), square);
        __m256 better = _mm256_cmp_ps(gain, most, _CMP_GT_OQ);
        most = _mm256_blendv_ps(most, gain, better);
        step = _mm256_blendv_ps(step, _mm256_div_ps(product, square), better);
    }
    step = _mm256_div_ps(_mm256_mul_ps(step, largest), _mm256_set1_ps(KVT_V4_UNITS));
    scale = _mm_max_epu16(kvt_to_f16(step), _mm_set1_epi16(1));
    return _mm_andnot_si128(
        _mm_packs_epi32(_mm256_castsi256_si128(_mm256_castps_si256(is_zero)),
                        _mm256_extracti128_si256(_mm256_castps_si256(is_zero), 1)),
        scale);
}

/* The codes of 32 dims of a row. */
KVT_INLINE __m256i v4_codes_of(const uint16_t *from, size_t n, __m256 factor)
{
    __m256i u =
        _mm256_min_epu8(_mm256_abs_epi8(round_32(load_32(from, n), factor)), _mm256_set1_epi8(127));
    __m256i negative = look_up(&code_table, u, bin_of(u));
    /* The code of the opposite sign is 15 less it; a shuffle by a byte below zero yields zero. */
    return _mm256_xor_si256(negative,
                            _mm256_shuffle_epi8(_mm256_set1_epi8(15), signs_of_32(from, n)));
}

/* 8 tokens, 32 dims, n of them. */
KVT_INLINE void put_v4_octet(const uint16_t *from, size_t dims_p, size_t n, const float *factors,
                             uint8_t *to)
{
    __m256i x[4];
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++) {
        __m256i low = v4_codes_of(from + j * dims_p, n, _mm256_broadcast_ss(factors + j));
        __m256i high =
            v4_codes_of(from + (j + 4) * dims_p, n, _mm256_broadcast_ss(factors + j + 4));
        x[j] = _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
    }
    interleave(x);
    KVT_UNROLL
    for (size_t i = 0; i < n / 8; i++)
        kvt_store_256(to + i * 32, x[i]);
}

void kvt_avx2_seal_v_i4(const void *open, const uint16_t *open_scales, size_t dims_p,
                        const void *next, void *codes, uint16_t *scales)
{
    const float absent = (float)(kvt_round_up(dims_p, SUM_DIMS) - dims_p);
    const uint16_t *ahead = next ? next : open;
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + kvt_v4_index(t, 0, dims_p);
        const __m256 scale = kvt_load_f16(open_scales + t);
        const __m256 largest =
            _mm256_mul_ps(_mm256_cvtph_ps(kvt_most_of_8_rows(from, dims_p)), scale);
        const __m256 units =
            _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(KVT_V4_UNITS), largest),
                          _mm256_cmp_ps(largest, _mm256_set1_ps(KVT_V4_LEAST), _CMP_GE_OQ));
        float factors[8];
        row_sums sums;
        __m128i sealed;
        size_t d = 0;
        _mm256_storeu_ps(factors, _mm256_mul_ps(units, scale));
        for (size_t j = 0; j < 8; j++)
            sum_row(from + j * dims_p, dims_p, _mm256_broadcast_ss(factors + j), j, &sums);
        sealed = v4_scales_of(&sums, absent, largest);
        kvt_store_128(scales + t, sealed);
        _mm256_storeu_ps(factors, _mm256_mul_ps(kvt_reciprocals_of(sealed, 2.0f), scale));
        for (; d + 32 <= dims_p; d += 32) {
            prefetch_octet(ahead + t * dims_p + d * 8);
            put_v4_octet(from + d, dims_p, 32, factors, to + d * 4);
        }
        if (d < dims_p)
            put_v4_octet(from + d, dims_p, 16, factors, to + d * 4);
    }
}

/* ---- 5-bit V ---- */

/* The codes of 32 dims of a row. */
KVT_INLINE __m256i v5_codes_of(const uint16_t *from, size_t n, __m256 factor)
{
    const four_vectors x = load_32(from, n);
#define ROUND(i)                                                                                   \
    _mm256_cvtps_epi32(_mm256_add_ps(_mm256_mul_ps(x.of[i], factor), _mm256_set1_ps(15.5f)))
    return _mm256_packs_epi16(_mm256_packs_epi32(ROUND(0), ROUND(1)),
                              _mm256_packs_epi32(ROUND(2), ROUND(3)));
#undef ROUND
}

/* Half an octet: its codes, interleaved, and the fifth bits of n of 32 dims. */
KVT_INLINE void v5_half(const uint16_t *from, size_t dims_p, size_t n, const float *factors,
                        __m256i x[4], uint8_t *bits)
{
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++)
        x[j] = v5_codes_of(from + j * dims_p, n, _mm256_broadcast_ss(factors + j));
    interleave(x);
    KVT_UNROLL
    for (size_t i = 0; i < n / 8; i++) {
        int32_t fifth = _mm256_movemask_epi8(_mm256_slli_epi16(x[i], 3));
        memcpy(bits + i / 2 * 16 + i % 2 * 4, &fifth, sizeof fifth);
    }
}

/* 8 tokens, 32 dims, n of them. */
KVT_INLINE void put_v5_octet(const uint16_t *from, size_t dims_p, size_t n, const float *factors,
                             uint8_t *to, uint8_t *bits)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[4], high[4];
    v5_half(from, dims_p, n, factors, low, bits);
    v5_half(from + 4 * dims_p, dims_p, n, factors + 4, high, bits + 8);
    KVT_UNROLL
    for (size_t i = 0; i < n / 8; i++)
        kvt_store_256(to + i * 32,
                      _mm256_or_si256(_mm256_and_si256(low[i], nibble),
                                      _mm256_andnot_si256(nibble, _mm256_slli_epi16(high[i], 4))));
}

void kvt_avx2_seal_v_i5(const void *open, const uint16_t *open_scales, size_t dims_p,
                        const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *ahead = next ? next : open;
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + kvt_v4_index(t, 0, dims_p);
        uint8_t *bits = (uint8_t *)codes + kvt_v5_index(t, 0, dims_p);
        const __m256 scale = kvt_load_f16(open_scales + t);
        const __m256 largest =
            _mm256_mul_ps(_mm256_cvtph_ps(kvt_most_of_8_rows(from, dims_p)), scale);
        const __m128i sealed = kvt_scales_of(largest, 31.0f);
        float factors[8];
        size_t d = 0;
        kvt_store_128(scales + t, sealed);
        _mm256_storeu_ps(factors, _mm256_mul_ps(kvt_reciprocals_of(sealed, 0.5f), scale));
        for (; d + 32 <= dims_p; d += 32) {
            prefetch_octet(ahead + t * dims_p + d * 8);
            put_v5_octet(from + d, dims_p, 32, factors, to + d * 4, bits + d);
        }
        if (d < dims_p)
            put_v5_octet(from + d, dims_p, 16, factors, to + d * 4, bits + d);
    }
}

/* ---- the range of K ---- */

/* 8 dims fold together. left_out: NULL, or all ones in the lanes of the tokens that are. */
KVT_INLINE void range_of(const uint16_t *open, const __m256 *scale, const __m256 *left_out,
                         size_t dims_p, float *lo, float *hi)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    for (size_t d = 0; d < dims_p; d += 8) {
        __m256 least[8], most[8];
        for (size_t e = 0; e < 8; e++) {
            __m256 a = _mm256_set1_ps(INFINITY), b = _mm256_set1_ps(-INFINITY);
            KVT_UNROLL
            for (size_t i = 0; i < 8; i++) {
                __m256 x = kvt_load_f16(open + i / 2 * tile + (d + e) * 16 + i % 2 * 8);
                x = _mm256_mul_ps(x, scale[i]);
                if (left_out) /* a NaN, which yields the second operand */
                    x = _mm256_or_ps(x, left_out[i]);
                a = _mm256_min_ps(x, a);
                b = _mm256_max_ps(x, b);
            }
            least[e] = a;
            most[e] = b;
        }
        _mm256_storeu_ps(lo + d, fold_least(least));
        _mm256_storeu_ps(hi + d, fold_most(most));
    }
}

void kvt_avx2_range_k_f16(const void *open, const uint16_t *open_scales, uint64_t left_out,
                          size_t dims_p, float *lo, float *hi)
{
    __m256 scale[8], out[8];
    for (size_t i = 0; i < 8; i++) {
        scale[i] = kvt_load_f16(open_scales + i * 8);
        out[i] = kvt_kept_lanes(~left_out >> (i * 8));
    }
    if (left_out)
        range_of(open, scale, out, dims_p, lo, hi);
    else
        range_of(open, scale, NULL, dims_p, lo, hi);
}

/* ---- 4-bit K ---- */

/* What the dims of a block have: f32. */
typedef struct k4_dims {
    float scale[KVT_DIMS_MAX], reciprocal[KVT_DIMS_MAX];
} k4_dims;

/* gain_k's bytes of the squared norms and products of 8 tokens. */
KVT_INLINE void put_gains(__m256 square, __m256 product, uint8_t *to)
{
    __m256 gain = _mm256_sub_ps(_mm256_div_ps(square, product), _mm256_set1_ps(1.0f));
    __m256i x;
    gain = _mm256_mul_ps(gain, _mm256_set1_ps(1.0f / KVT_K4_GAIN_STEP));
    gain = _mm256_and_ps(gain, _mm256_cmp_ps(product, _mm256_setzero_ps(), _CMP_GT_OQ));
    gain = _mm256_add_ps(gain, _mm256_set1_ps(KVT_K4_GAIN_ONE));
    gain = _mm256_max_ps(_mm256_min_ps(gain, _mm256_set1_ps(255.0f)), _mm256_set1_ps(1.0f));
    x = _mm256_cvtps_epi32(gain);
    x = _mm256_packus_epi16(_mm256_packus_epi32(x, x), x);
    x = _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
    _mm_storel_epi64((__m128i *)(void *)to, _mm256_castsi256_si128(x));
}

#define K4_VECTORS 4 /* of 8 tokens, side by side: a dim of a token is two chains of FMA */

/* 32 tokens. */
KVT_INLINE void seal_k4(const uint16_t *open, const uint16_t *open_scales, const float *delta,
                        const float *along, const k4_dims *dims, size_t dims_p,
                        const uint16_t *next, uint8_t *codes, uint8_t *gains)
{
    __m256 scale[K4_VECTORS], square[K4_VECTORS], product[K4_VECTORS];
    KVT_UNROLL
    for (size_t i = 0; i < K4_VECTORS; i++) {
        scale[i] = kvt_load_f16(open_scales + 8 * i);
        square[i] = product[i] = _mm256_setzero_ps();
    }
    for (size_t d = 0; d < dims_p; d += 8) {
        __m256i word[K4_VECTORS];
        KVT_UNROLL
        for (size_t i = 0; i < K4_VECTORS; i++)
            word[i] = _mm256_setzero_si256();
        for (size_t e = 0; e < 8; e++) {
            const __m128i place = _mm_cvtsi32_si128((int)(e % 4 * 8 + e / 4 * 4));
            const __m256 middle = _mm256_broadcast_ss(along + d + e);
            _mm_prefetch((const char *)(next + (d + e) * 32), _MM_HINT_T1);
            KVT_UNROLL
            for (size_t i = 0; i < K4_VECTORS; i++) {
                const uint16_t *from =
                    open + i / 2 * 16 * dims_p + (d + e) * KVT_TILE_TOKENS + i % 2 * 8;
                /* An element times its scale is exact. */
                __m256 w = _mm256_fmadd_ps(kvt_load_f16(from), scale[i],
                                           _mm256_broadcast_ss(delta + d + e));
                __m256 key = _mm256_add_ps(w, middle);
                __m256 x = _mm256_mul_ps(w, _mm256_broadcast_ss(dims->reciprocal + d + e));
                __m256i code;
                x = _mm256_add_ps(x, _mm256_set1_ps(7.5f));
                x = _mm256_min_ps(_mm256_max_ps(x, _mm256_setzero_ps()), _mm256_set1_ps(15.0f));
                code = _mm256_cvtps_epi32(x);
                word[i] = _mm256_or_si256(word[i], _mm256_sll_epi32(code, place));
                square[i] = _mm256_fmadd_ps(key, key, square[i]);
                x = _mm256_sub_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(7.5f));
                /* So is a code times a scale. */
                x = _mm256_fmadd_ps(x, _mm256_broadcast_ss(dims->scale + d + e), middle);
                product[i] = _mm256_fmadd_ps(x, key, product[i]);
            }
        }
        KVT_UNROLL
        for (size_t i = 0; i < K4_VECTORS; i++)
            kvt_store_256(codes + kvt_k4_index(8 * i, d, dims_p), word[i]);
    }
    KVT_UNROLL
    for (size_t i = 0; i < K4_VECTORS; i++)
        put_gains(square[i], product[i], gains + 8 * i);
}

void kvt_avx2_seal_k_i4(const void *open, const uint16_t *open_scales, const float *delta,
                        const float *along, const uint16_t *scales, size_t dims_p, const void *next,
                        void *codes, uint8_t *gains)
{
    const uint16_t *from = open, *ahead = next ? next : open;
    uint8_t *to = codes;
    k4_dims dims;
    for (size_t d = 0; d < dims_p; d += 8) {
        _mm256_storeu_ps(dims.scale + d, kvt_load_f16(scales + d));
        _mm256_storeu_ps(dims.reciprocal + d, kvt_reciprocals_of(kvt_load_128(scales + d), 1.0f));
    }
    for (size_t t = 0; t < KVT_TOKENS; t += 32)
        seal_k4(from + t * dims_p, open_scales + t, delta, along, &dims, dims_p, ahead + t * dims_p,
                to + t * dims_p / 2, gains + t);
}
