/*
 * AVX-512 kernels that seal a block as 4-bit K, or as 4- or 5-bit V. The table is in avx512vnni.c.
 *
 * The bytes are scalar_4bit.c's; docs/numerics.md has the order of operations. The scale of an open
 * row is a power of two, so x = number * scale is exact and an FMA of it rounds once. For V, which
 * has no offset, the scale goes into the factor that x is multiplied by.
 *
 * K: a lane is a token, all 64 side by side. From one dim of a token to the next it is ten
 * operations, each of which needs the one before, some 26 cycles (Zen 5); four registers of tokens
 * hide half of that.
 *
 * V, 4 bits: three sets of bounds are tried for each row. From the simple form to the fast one:
 *  1. Magnitudes u are bytes, 64 a register; their products with levels are vpdpbusd.
 *  2. Bounds are more than 8 apart, so among the 8 values with the same u / 8 there is one at most:
 *     a shuffle by u / 8 looks it up, another one the number of bounds before it. One comparison
 *     takes the place of seven.
 *  3. Four registers of 16 numbers are packed without regard to 128-bit lanes: lane i of the
 *     result has dims 4i to 4i + 3 of each. Interleaving the bytes of four tokens yields the
 *     order of tile.h.
 *  4. The sums of 16 rows are reduced together, and so their scales are one vector.
 *
 * Overflow: 1024 * 126 * 63 < 2^23.
 */
#include <math.h>

#include "simd/levels.h"
#include "avx512_product.h"

#define TILES (KVT_TOKENS / KVT_TILE_TOKENS)

KVT_INLINE __m512 reciprocals_of(__m512 scale, float numerator)
{
    const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    return _mm512_maskz_div_ps(some, _mm512_set1_ps(numerator), scale);
}

/* ---- K ---- */

void kvt_avx512_range_k_f16(const void *open, const uint16_t *open_scales, uint64_t left_out,
                            size_t dims_p, float *lo, float *hi)
{
    const uint16_t *from = open;
    __mmask16 counts[TILES];
    __m512 scale[TILES];
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++) {
        scale[i] = kvt_load_f16(open_scales + 16 * i);
        counts[i] = (__mmask16)(~left_out >> 16 * i);
    }
    for (size_t d = 0; d < dims_p; d += 16) {
        __m512i least[16], most[16];
        for (size_t j = 0; j < 16; j++) {
            __m512 a = _mm512_set1_ps(INFINITY), b = _mm512_set1_ps(-INFINITY);
            KVT_UNROLL
            for (size_t i = 0; i < TILES; i++) {
                __m512 x = kvt_load_f16(from + kvt_kw_index(16 * i, d + j, dims_p));
                x = _mm512_mul_ps(x, scale[i]);
                a = _mm512_mask_min_ps(a, counts[i], a, x);
                b = _mm512_mask_max_ps(b, counts[i], b, x);
            }
            least[j] = _mm512_castps_si512(a);
            most[j] = _mm512_castps_si512(b);
        }
        _mm512_storeu_si512(lo + d, kvt_reduce(KVT_MIN_PS, 16, least));
        _mm512_storeu_si512(hi + d, kvt_reduce(KVT_MAX_PS, 16, most));
    }
}

/* A dim of 16 tokens: w = x + delta. */
KVT_INLINE __m512 load_k(const uint16_t *from, __m512 scale, float delta)
{
    return _mm512_fmadd_ps(kvt_load_f16(from), scale, _mm512_set1_ps(delta));
}

/* gain_k's byte of the squared norms and products of 16 tokens. */
KVT_INLINE __m128i gains_of(__m512 square, __m512 product)
{
    const __mmask16 positive = _mm512_cmp_ps_mask(product, _mm512_setzero_ps(), _CMP_GT_OQ);
    __m512 gain = _mm512_sub_ps(_mm512_div_ps(square, product), _mm512_set1_ps(1.0f));
    gain = _mm512_maskz_mul_ps(positive, gain, _mm512_set1_ps(1.0f / KVT_K4_GAIN_STEP));
    gain = _mm512_add_ps(gain, _mm512_set1_ps(KVT_K4_GAIN_ONE));
    gain = _mm512_max_ps(_mm512_min_ps(gain, _mm512_set1_ps(255.0f)), _mm512_set1_ps(1.0f));
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(gain));
}

void kvt_avx512_seal_k_i4(const void *open, const uint16_t *open_scales, const float *delta,
                          const float *along, const uint16_t *scales, size_t dims_p,
                          const void *next, void *codes, uint8_t *gains)
{
    const uint16_t *from = open;
    const uintptr_t ahead = (uintptr_t)(next ? next : open);
    _Alignas(64) float step[KVT_DIMS_MAX], reciprocal[KVT_DIMS_MAX];
    __m512 scale[TILES], square[TILES], product[TILES];
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++) {
        scale[i] = kvt_load_f16(open_scales + 16 * i);
        square[i] = product[i] = _mm512_setzero_ps();
    }
    for (size_t d = 0; d < dims_p; d += 16) {
        __m512 x = kvt_load_f16(scales + d);
        _mm512_store_ps(step + d, x);
        _mm512_store_ps(reciprocal + d, reciprocals_of(x, 1.0f));
    }
    for (size_t d = 0; d < dims_p; d += 8) {
        /* The codes of two dims and, times 16, of those 4 dims later: 16 bits, exact as f32. */
        __m512 word[2][TILES];
        KVT_UNROLL
        for (size_t e = 0; e < 8; e++) {
            static const float place[4] = {1.0f, 256.0f, 16.0f, 4096.0f};
            const __m512 by = _mm512_set1_ps(place[e % 2 + e / 4 * 2]);
            const __m512 middle = _mm512_set1_ps(along[d + e]);
            __m512 *to = word[e % 4 / 2];
            _mm_prefetch((const char *)(ahead + (d + e) * 128), _MM_HINT_T1);
            _mm_prefetch((const char *)(ahead + (d + e) * 128 + 64), _MM_HINT_T1);
            KVT_UNROLL
            for (size_t i = 0; i < TILES; i++) {
                __m512 w =
                    load_k(from + kvt_kw_index(16 * i, d + e, dims_p), scale[i], delta[d + e]);
                __m512 key = _mm512_add_ps(w, middle), x;
                x = _mm512_mul_ps(w, _mm512_set1_ps(reciprocal[d + e]));
                /* Rounding keeps order: clamping before or after the addition is the same. */
                x = _mm512_add_ps(x, _mm512_set1_ps(7.5f));
                x = _mm512_max_ps(x, _mm512_setzero_ps());
                x = _mm512_min_ps(x, _mm512_set1_ps(15.0f));
                x = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                to[i] = e % 4 % 2 || e >= 4 ? _mm512_fmadd_ps(x, by, to[i]) : x;
                square[i] = _mm512_fmadd_ps(key, key, square[i]);
                /* A code times a scale is exact, so that this rounds as two operations do. */
                x = _mm512_fmadd_ps(_mm512_sub_ps(x, _mm512_set1_ps(7.5f)),
                                    _mm512_set1_ps(step[d + e]), middle);
                product[i] = _mm512_fmadd_ps(x, key, product[i]);
            }
        }
        KVT_UNROLL
        for (size_t i = 0; i < TILES; i++)
            _mm512_storeu_si512(
                (uint8_t *)codes + kvt_k4_index(16 * i, d, dims_p),
                _mm512_or_si512(_mm512_cvtps_epi32(word[0][i]),
                                _mm512_slli_epi32(_mm512_cvtps_epi32(word[1][i]), 16)));
    }
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++)
        _mm_storeu_si128((__m128i *)(void *)(gains + 16 * i), gains_of(square[i], product[i]));
}

/* ---- V ---- */

/* Four registers of 16 dims, each as bytes 4i to 4i + 3 of its lane: see the head comment. */
KVT_INLINE __m512i pack(const __m512i x[4])
{
    return _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
}

/* n registers of a row. */
KVT_INLINE void load_v(const uint16_t *from, size_t n, __m512 x[4])
{
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        x[i] = i < n ? kvt_load_f16(from + 16 * i) : _mm512_setzero_ps();
}

KVT_INLINE __m512i round_4(const __m512 x[4], __m512 factor)
{
    __m512i y[4];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        y[i] = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], factor));
    return pack(y);
}

/* The largest magnitudes of 16 rows of numbers, without their scales. */
KVT_INLINE __m512 largest_of_16_rows(const uint16_t *from, size_t dims_p)
{
    __m512i most[16];
    for (size_t t = 0; t < 16; t++) { /* as integers, magnitudes order as the numbers do */
        __m512i x = _mm512_setzero_si512();
        for (size_t d = 0; d < dims_p; d += 32) {
            const __mmask32 alive = dims_p - d < 32 ? 0xffffu : 0xffffffffu;
            __m512i y = _mm512_maskz_loadu_epi16(alive, from + t * dims_p + d);
            x = _mm512_max_epu16(x, _mm512_slli_epi16(y, 1));
        }
        most[t] = _mm512_max_epi32(_mm512_srli_epi32(x, 16),
                                   _mm512_and_si512(x, _mm512_set1_epi32(0xffff)));
    }
    return _mm512_cvtph_ps(
        _mm512_cvtepi32_epi16(_mm512_srli_epi32(kvt_reduce(KVT_MAX, 16, most), 1)));
}

/* By u / 8: levels.h. */
static const int8_t before[KVT_V4_CANDIDATES][16] = {
    KVT_V4_BY_EIGHTS(KVT_V4_BEFORE, KVT_V4_BOUNDS_0),
    KVT_V4_BY_EIGHTS(KVT_V4_BEFORE, KVT_V4_BOUNDS_1),
    KVT_V4_BY_EIGHTS(KVT_V4_BEFORE, KVT_V4_BOUNDS_2)};
static const int8_t bound[KVT_V4_CANDIDATES][16] = {
    KVT_V4_BY_EIGHTS(KVT_V4_BOUND, KVT_V4_BOUNDS_0),
    KVT_V4_BY_EIGHTS(KVT_V4_BOUND, KVT_V4_BOUNDS_1),
    KVT_V4_BY_EIGHTS(KVT_V4_BOUND, KVT_V4_BOUNDS_2)};
static const int8_t magnitudes[16] = {KVT_V4_MAGNITUDES};

KVT_INLINE __m512i table(const int8_t *of_16)
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)of_16));
}

KVT_INLINE __m512i eighths(__m512i u)
{
    return _mm512_and_si512(_mm512_srli_epi16(u, 3), _mm512_set1_epi8(15));
}

/* The magnitude indices of u, 0 .. 127. */
KVT_INLINE __m512i indices_of(size_t candidate, __m512i u, __m512i u_8)
{
    const __m512i m = _mm512_shuffle_epi8(table(before[candidate]), u_8);
    const __m512i limit = _mm512_shuffle_epi8(table(bound[candidate]), u_8);
    return _mm512_mask_add_epi8(m, _mm512_cmpgt_epi8_mask(u, limit), m, _mm512_set1_epi8(1));
}

/* What u adds to the candidates' sums: u.l and l.l. n: registers that u is of. */
KVT_INLINE void add_sums(const uint16_t *from, size_t n, __m512 factor,
                         __m512i sum[KVT_V4_CANDIDATES][2])
{
    static const __mmask16 of[5] = {0, 0x1111, 0x3333, 0x7777, 0xffff};
    __m512 x[4];
    __m512i u, u_8;
    load_v(from, n, x);
    u = _mm512_abs_epi8(round_4(x, factor));
    u_8 = eighths(u);
    KVT_UNROLL
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
        __m512i level = _mm512_shuffle_epi8(table(magnitudes), indices_of(k, u, u_8));
        if (n < 4)
            level = _mm512_maskz_mov_epi32(of[n], level);
        sum[k][0] = kvt_dot(sum[k][0], u, level);
        sum[k][1] = kvt_dot(sum[k][1], level, level);
    }
}

/* The scales of 16 rows, and the factors of their numbers that give half levels. */
KVT_INLINE __m512 scales_v4(const uint16_t *from, const uint16_t *open_scales, size_t dims_p,
                            uintptr_t next, uint16_t *scales)
{
    const __m512 open = kvt_load_f16(open_scales);
    const __m512 largest = _mm512_mul_ps(largest_of_16_rows(from, dims_p), open);
    const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(KVT_V4_LEAST), _CMP_GE_OQ);
    const __m512 units = _mm512_set1_ps(KVT_V4_UNITS);
    __m512i sums[KVT_V4_CANDIDATES][2][16];
    __m512 most = _mm512_set1_ps(-1.0f), step = _mm512_setzero_ps(), scale;
    __m256i rounded;
    _Alignas(64) float factors[16];
    _mm512_store_ps(factors, _mm512_mul_ps(open, _mm512_maskz_div_ps(some, units, largest)));
    for (size_t t = 0; t < 16; t++) {
        const __m512 factor = _mm512_set1_ps(factors[t]);
        __m512i sum[KVT_V4_CANDIDATES][2];
        size_t d = 0;
        KVT_UNROLL
        for (size_t k = 0; k < KVT_V4_CANDIDATES; k++)
            sum[k][0] = sum[k][1] = _mm512_setzero_si512();
        for (; d + 64 <= dims_p; d += 64) {
            add_sums(from + t * dims_p + d, 4, factor, sum);
            _mm_prefetch((const char *)(next + (t * dims_p + d) * 2), _MM_HINT_T1);
            _mm_prefetch((const char *)(next + (t * dims_p + d) * 2 + 64), _MM_HINT_T1);
        }
        if (d < dims_p)
            add_sums(from + t * dims_p + d, (dims_p - d) / 16, factor, sum);
        KVT_UNROLL
        for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
            sums[k][0][t] = sum[k][0];
            sums[k][1][t] = sum[k][1];
        }
    }
    KVT_UNROLL
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
        const __m512 product = _mm512_cvtepi32_ps(kvt_reduce(KVT_SUM, 16, sums[k][0]));
        const __m512 square = _mm512_cvtepi32_ps(kvt_reduce(KVT_SUM, 16, sums[k][1]));
        const __m512 gain = _mm512_div_ps(_mm512_mul_ps(product, product), square);
        const __mmask16 more = _mm512_cmp_ps_mask(gain, most, _CMP_GT_OQ);
        most = _mm512_mask_mov_ps(most, more, gain);
        step = _mm512_mask_div_ps(step, more, product, square);
    }
    scale = _mm512_maskz_div_ps(some, _mm512_mul_ps(step, largest), units);
    rounded = _mm512_cvtps_ph(scale, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    rounded = _mm256_mask_max_epu16(rounded, some, rounded, _mm256_set1_epi16(1));
    _mm256_storeu_si256((__m256i *)(void *)scales, rounded);
    return _mm512_mul_ps(open, reciprocals_of(_mm512_cvtph_ps(rounded), 2.0f));
}

/* Codes of up to 64 dims of a row, in the order of pack(). */
KVT_INLINE __m512i codes_v4(const uint16_t *from, size_t n, __m512 factor)
{
    __m512 x[4];
    __m512i u, m, sign[4];
    load_v(from, n, x);
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        sign[i] = _mm512_castps_si512(x[i]); /* a zero's, too: packing saturates and keeps it */
    u = _mm512_min_epu8(_mm512_abs_epi8(round_4(x, factor)), _mm512_set1_epi8(127));
    m = indices_of(0, u, eighths(u));
    m = _mm512_add_epi8(m, _mm512_set1_epi8(8));
    return _mm512_mask_sub_epi8(m, _mm512_movepi8_mask(pack(sign)), _mm512_set1_epi8(15), m);
}

KVT_INLINE __m512i codes_v5(const uint16_t *from, size_t n, __m512 factor)
{
    __m512 x[4];
    __m512i y[4];
    load_v(from, n, x);
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        y[i] =
            _mm512_cvtps_epi32(_mm512_add_ps(_mm512_mul_ps(x[i], factor), _mm512_set1_ps(15.5f)));
    return pack(y);
}

/* Four tokens' codes become lines: byte t of lane i of line[v] is token t, dim 16v + i. */
KVT_INLINE void interleave(const __m512i x[4], __m512i line[4])
{
    const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
    line[0] = _mm512_unpacklo_epi16(a, c);
    line[1] = _mm512_unpackhi_epi16(a, c);
    line[2] = _mm512_unpacklo_epi16(b, d);
    line[3] = _mm512_unpackhi_epi16(b, d);
}

/* n lines of 8 tokens, 16 dims each. fifth: where their fifth bits go. */
KVT_INLINE void put_lines(size_t bits, const uint16_t *from, size_t dims_p, size_t n,
                          const float *factors, unsigned char *to, unsigned char *fifth)
{
    __m512i x[8], low[4], high[4];
    KVT_UNROLL
    for (size_t t = 0; t < 8; t++) {
        const __m512 factor = _mm512_set1_ps(factors[t]);
        x[t] = bits == 5 ? codes_v5(from + t * dims_p, n, factor)
                         : codes_v4(from + t * dims_p, n, factor);
    }
    if (bits == 4) { /* four of nibbles instead of eight of codes */
        KVT_UNROLL
        for (size_t t = 0; t < 4; t++)
            x[t] = _mm512_or_si512(x[t], _mm512_slli_epi16(x[t + 4], 4));
        interleave(x, low);
    } else {
        interleave(x, low);
        interleave(x + 4, high);
    }
    KVT_UNROLL
    for (size_t v = 0; v < 4; v++) {
        if (v >= n)
            break;
        if (bits == 5) {
            const uint64_t masks[2] = {_mm512_test_epi8_mask(low[v], _mm512_set1_epi8(16)),
                                       _mm512_test_epi8_mask(high[v], _mm512_set1_epi8(16))};
            memcpy(fifth + 16 * v, masks, 16);
            low[v] = _mm512_and_si512(low[v], _mm512_set1_epi8(15));
            high[v] = _mm512_and_si512(high[v], _mm512_set1_epi8(15));
            low[v] = _mm512_or_si512(low[v], _mm512_slli_epi16(high[v], 4));
        }
        _mm512_storeu_si512(to + 64 * v, low[v]);
    }
}

/* Lines of 16 tokens. */
KVT_INLINE void put_tokens(size_t bits, const uint16_t *from, size_t t, size_t dims_p,
                           __m512 factor, uint8_t *codes)
{
    _Alignas(64) float factors[16];
    _mm512_store_ps(factors, factor);
    for (size_t i = 0; i < 16; i += 8) {
        uint8_t *to = codes + kvt_v4_index(t + i, 0, dims_p);
        uint8_t *fifth = codes + kvt_v5_index(t + i, 0, dims_p);
        size_t d = 0;
        for (; d + 64 <= dims_p; d += 64)
            put_lines(bits, from + (t + i) * dims_p + d, dims_p, 4, factors + i, to + 4 * d,
                      fifth + d);
        if (d < dims_p)
            put_lines(bits, from + (t + i) * dims_p + d, dims_p, (dims_p - d) / 16, factors + i,
                      to + 4 * d, fifth + d);
    }
}

void kvt_avx512_seal_v_i4(const void *open, const uint16_t *open_scales, size_t dims_p,
                          const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *from = open;
    const uintptr_t ahead = (uintptr_t)(next ? next : open);
    for (size_t t = 0; t < KVT_TOKENS; t += 16) {
        __m512 factor = scales_v4(from + t * dims_p, open_scales + t, dims_p,
                                  ahead + t * dims_p * 2, scales + t);
        put_tokens(4, from, t, dims_p, factor, codes);
    }
}

void kvt_avx512_seal_v_i5(const void *open, const uint16_t *open_scales, size_t dims_p,
                          const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *from = open;
    const uintptr_t ahead = (uintptr_t)(next ? next : open);
    for (size_t t = 0; t < KVT_TOKENS; t += 16) {
        const __m512 scale = kvt_load_f16(open_scales + t);
        const __m512 largest = _mm512_mul_ps(largest_of_16_rows(from + t * dims_p, dims_p), scale);
        const __m256i rounded = _mm512_cvtps_ph(_mm512_div_ps(largest, _mm512_set1_ps(31.0f)),
                                                _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        for (size_t d = 0; d < dims_p * 32; d += 64)
            _mm_prefetch((const char *)(ahead + t * dims_p * 2 + d), _MM_HINT_T1);
        _mm256_storeu_si256((__m256i *)(void *)(scales + t), rounded);
        put_tokens(5, from, t, dims_p,
                   _mm512_mul_ps(scale, reciprocals_of(_mm512_cvtph_ps(rounded), 0.5f)), codes);
    }
}
