/*
 * AVX2 + FMA + F16C kernels: what append and reading back need. Conversions, the rotation, storing
 * into tiles, and the mean of a block.
 *
 * All of it gives the bytes that scalar.c gives, so each operation here is the same f32 operation
 * on the same operands in the same order, 8 at a time: a product and a sum stay two roundings, no
 * FMA. What may differ is only what cannot be told apart: a - b for a + (-b), a conversion to
 * integer (nearest even) for the addition of 1.5 * 2^23.
 *
 * Tiles are written in two ways. Decode appends one token, whose elements lie 64 bytes apart: a
 * vector quantizes, and then each element or group is a store of its own. Prefill fills a tile of
 * 16 tokens, which is transposed in registers and written in whole lines.
 */
#include "avx2.h"

/* ---- conversions ---- */

/*
 * Finite or not is a matter of the largest magnitude: as integers, infinities and NaNs are above
 * all numbers. The sign is masked off, so that a signed comparison does.
 */
KVT_INLINE int is_below_32(__m256i magnitudes, int32_t bound)
{
    __m256i above = _mm256_cmpgt_epi32(magnitudes, _mm256_set1_epi32(bound - 1));
    return _mm256_testz_si256(above, above);
}

KVT_INLINE int is_below_16(__m128i magnitudes, int16_t bound)
{
    __m128i above = _mm_cmpgt_epi16(magnitudes, _mm_set1_epi16((int16_t)(bound - 1)));
    return _mm_testz_si128(above, above);
}

/*
 * The loads test what they read in passing: append validates every element anyway, and a second
 * pass over it would cost as much as the conversion. Rows may begin at any element, and end right
 * before an inaccessible page: no access goes beyond n.
 */
int kvt_avx2_load_f32(const void *src, float *dst, size_t n)
{
    const unsigned char *from = src;
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i x = kvt_load_256(from + 4 * i);
        largest = _mm256_max_epi32(largest, _mm256_and_si256(x, mask));
        kvt_store_256(dst + i, x);
    }
    for (; i < n; i++) {
        memcpy(dst + i, from + 4 * i, sizeof *dst);
        bad |= (kvt_f32_bits(dst[i]) & 0x7f800000u) == 0x7f800000u;
    }
    return is_below_32(largest, 0x7f800000) & !bad;
}

int kvt_avx2_load_f16(const void *src, float *dst, size_t n)
{
    const uint16_t *from = src;
    const __m128i mask = _mm_set1_epi16(0x7fff);
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i x = kvt_load_128(from + i);
        largest = _mm_max_epi16(largest, _mm_and_si128(x, mask));
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(x));
    }
    for (; i < n; i++) {
        bad |= (from[i] & 0x7c00u) == 0x7c00u;
        dst[i] = kvt_f16_to_f32(from[i]);
    }
    return is_below_16(largest, 0x7c00) & !bad;
}

int kvt_avx2_load_bf16(const void *src, float *dst, size_t n)
{
    const uint16_t *from = src;
    const __m128i mask = _mm_set1_epi16(0x7fff);
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i x = kvt_load_128(from + i);
        largest = _mm_max_epi16(largest, _mm_and_si128(x, mask));
        kvt_store_256(dst + i, _mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    }
    for (; i < n; i++) {
        bad |= (from[i] & 0x7f80u) == 0x7f80u;
        dst[i] = kvt_bf16_to_f32(from[i]);
    }
    return is_below_16(largest, 0x7f80) & !bad;
}

/*
 * The hardware's conversion with the rounding in the instruction. It handles subnormal results
 * whatever MXCSR says of flushing, as tile.h does.
 */
KVT_INLINE __m128i to_f16(__m256 x)
{
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

void kvt_avx2_store_f16(const float *src, void *dst, size_t n)
{
    uint16_t *to = dst;
    const __m256 most = _mm256_set1_ps(65504.0f), least = _mm256_set1_ps(-65504.0f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(src + i);
        x = _mm256_max_ps(least, _mm256_min_ps(most, x)); /* this order lets a NaN through */
        kvt_store_128(to + i, to_f16(x));
    }
    for (; i < n; i++) {
        float x = src[i] > 65504.0f ? 65504.0f : src[i];
        to[i] = kvt_f32_to_f16(x < -65504.0f ? -65504.0f : x);
    }
}

/*
 * There is no instruction for bf16 here. Adding 0x7fff and the lowest kept bit carries into that
 * bit exactly when the dropped half rounds up: above the tie, or on it from an odd number. The
 * carry would turn some NaNs into infinity, so those keep their upper half, made quiet.
 */
void kvt_avx2_store_bf16(const float *src, void *dst, size_t n)
{
    uint16_t *to = dst;
    const __m256i half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1);
    const __m256i quiet = _mm256_set1_epi32(0x40);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(src + i);
        __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
        __m256i odd = _mm256_and_si256(high, one);
        __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(half, odd)), 16);
        __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        rounded =
            _mm256_blendv_epi8(rounded, _mm256_or_si256(high, quiet), _mm256_castps_si256(is_nan));
        kvt_store_128(to + i, _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                               _mm256_extracti128_si256(rounded, 1)));
    }
    for (; i < n; i++)
        to[i] = kvt_f32_to_bf16(src[i]);
}

/* ---- rows of the caller ---- */

void kvt_avx2_center(const float *x, const float *mu, size_t n, float *y)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(mu + i)));
    for (; i < n; i++)
        y[i] = x[i] - mu[i];
}

/* A sum is a chain of additions, 3 or 4 cycles each, two of which can start in one: 8 sums. */
void kvt_avx2_add_rows(const float *x, size_t ldx, size_t n, size_t dims, float *sum)
{
    size_t d = 0;
    for (; d + 64 <= dims; d += 64) {
        __m256 y[8];
        KVT_UNROLL
        for (size_t j = 0; j < 8; j++)
            y[j] = _mm256_loadu_ps(sum + d + 8 * j);
        for (size_t i = 0; i < n; i++) {
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                y[j] = _mm256_add_ps(y[j], _mm256_loadu_ps(x + i * ldx + d + 8 * j));
        }
        KVT_UNROLL
        for (size_t j = 0; j < 8; j++)
            _mm256_storeu_ps(sum + d + 8 * j, y[j]);
    }
    for (; d + 8 <= dims; d += 8) {
        __m256 y = _mm256_loadu_ps(sum + d);
        for (size_t i = 0; i < n; i++)
            y = _mm256_add_ps(y, _mm256_loadu_ps(x + i * ldx + d));
        _mm256_storeu_ps(sum + d, y);
    }
    for (; d < dims; d++)
        for (size_t i = 0; i < n; i++)
            sum[d] += x[i * ldx + d];
}

/* ---- rotation ---- */

/*
 * Butterflies 1, 2, 4 and 8 apart of 16 dims: (a, b) -> (a + b, a - b). Each step gathers the
 * first operands of all its butterflies in one register and the second ones in the other, which
 * leaves their results there. So a bit of the dim's number moves to the choice of register and
 * the one that was there takes a place in the lanes. In the end bit 3 is where it belongs, and
 * bits 1 and 2 have changed places.
 */
KVT_INLINE void hadamard_16(__m256 *x)
{
    __m256 a = x[0], b = x[1], even, odd;
    KVT_UNROLL
    for (size_t level = 0; level < 4; level++) {
        even = level == 2 ? _mm256_permute2f128_ps(a, b, 0x20) : _mm256_shuffle_ps(a, b, 0x88);
        odd = level == 2 ? _mm256_permute2f128_ps(a, b, 0x31) : _mm256_shuffle_ps(a, b, 0xdd);
        a = _mm256_add_ps(even, odd);
        b = _mm256_sub_ps(even, odd);
    }
    x[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
    x[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(b), 0xd8));
}

/* Butterflies of whole registers, `apart` of them apart. */
KVT_INLINE void butterflies(__m256 *x, size_t n, size_t apart)
{
    KVT_UNROLL
    for (size_t i = 0; i < 8; i++)
        if (i < n && !(i & apart)) {
            __m256 a = x[i], b = x[i + apart];
            x[i] = _mm256_add_ps(a, b);
            x[i + apart] = _mm256_sub_ps(a, b);
        }
}

/*
 * One pass over memory: `vectors` registers, `stride` dims apart, take all butterflies between
 * them, and in the first pass, where they are adjacent, those within them. Level by level, so the
 * operations and their order are those of a pass for each. The first pass applies `before`, the
 * last one scale and `after`: factors by dim, or NULL.
 */
KVT_INLINE void hadamard_pass(float *x, size_t vectors, size_t stride, const float *before,
                              int is_first, int is_last, float scale, const float *after)
{
    __m256 y[8];
    KVT_UNROLL
    for (size_t i = 0; i < 8 && i < vectors; i++) {
        y[i] = _mm256_loadu_ps(x + i * stride);
        if (before)
            y[i] = _mm256_mul_ps(y[i], _mm256_loadu_ps(before + i * stride));
    }
    if (is_first) {
        hadamard_16(y);
        if (vectors > 2)
            hadamard_16(y + 2);
        if (vectors > 4) {
            hadamard_16(y + 4);
            hadamard_16(y + 6);
        }
    } else {
        butterflies(y, vectors, 1);
    }
    if (vectors > 2)
        butterflies(y, vectors, 2);
    if (vectors > 4)
        butterflies(y, vectors, 4);
    KVT_UNROLL
    for (size_t i = 0; i < 8 && i < vectors; i++) {
        if (is_last)
            y[i] = _mm256_mul_ps(y[i], _mm256_set1_ps(scale));
        if (is_last && after)
            y[i] = _mm256_mul_ps(y[i], _mm256_loadu_ps(after + i * stride));
        _mm256_storeu_ps(x + i * stride, y[i]);
    }
}

/* The pass over all dims that takes a block from `from` dims transformed to `to`. */
KVT_INLINE void hadamard_dims(float *x, size_t dims, size_t from, size_t vectors, int is_last,
                              float scale, const float *after)
{
    for (size_t i = 0; i < dims; i += vectors * from)
        for (size_t j = i; j < i + from; j += 8)
            hadamard_pass(x + j, vectors, from, NULL, 0, is_last, scale, after ? after + j : NULL);
}

/* before and after: factors by dim, or NULL. Blocks below 16 dims are plain loops. */
KVT_INLINE void transform(float *x, const float *before, size_t dims, size_t block, float scale,
                          const float *after)
{
    size_t done = block < 64 ? block : 64;

    if (block < 16) {
        for (size_t i = 0; before && i < dims; i++)
            x[i] *= before[i];
        for (size_t h = 1; h < block; h *= 2)
            for (size_t i = 0; i < dims; i++)
                if (!(i & h)) {
                    float a = x[i], b = x[i + h];
                    x[i] = a + b;
                    x[i + h] = a - b;
                }
        for (size_t i = 0; i < dims; i++)
            x[i] = after ? x[i] * scale * after[i] : x[i] * scale;
        return;
    }
    for (size_t i = 0; i < dims; i += done) {
        const float *signs = before ? before + i : NULL, *to_signs = after ? after + i : NULL;
        if (block == 16)
            hadamard_pass(x + i, 2, 8, signs, 1, 1, scale, to_signs);
        else if (block == 32)
            hadamard_pass(x + i, 4, 8, signs, 1, 1, scale, to_signs);
        else if (block == 64)
            hadamard_pass(x + i, 8, 8, signs, 1, 1, scale, to_signs);
        else
            hadamard_pass(x + i, 8, 8, signs, 1, 0, scale, to_signs);
    }
    for (; done * 8 < block; done *= 4)
        hadamard_dims(x, dims, done, 4, 0, scale, after);
    if (done * 8 == block)
        hadamard_dims(x, dims, done, 8, 1, scale, after);
    else if (done * 4 == block)
        hadamard_dims(x, dims, done, 4, 1, scale, after);
    else if (done * 2 == block)
        hadamard_dims(x, dims, done, 2, 1, scale, after);
}

void kvt_avx2_rotate(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    transform(x, sign, dims, block, scale, NULL);
}

void kvt_avx2_unrotate(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    transform(x, NULL, dims, block, scale, sign);
}

/* ---- storing 32 and 16 bits ---- */

/*
 * K's f32 and f16 tiles are the transpose of the rows: [dim][16 tokens]. Only a full tile (or half
 * of one, for f16) is worth a transpose; fewer tokens are scattered one element at a time, as
 * each lies in a line of its own.
 */
int kvt_avx2_put_k_f32(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    float *to = (float *)codes + kvt_kw_index(slot, 0, dims_p);
    size_t d = 0;
    (void)scales;
    if (n == KVT_TILE_TOKENS)
        for (; d + 8 <= dims; d += 8)
            for (size_t i = 0; i < KVT_TILE_TOKENS; i += 8) {
                __m256i y[8];
                KVT_UNROLL
                for (size_t j = 0; j < 8; j++)
                    y[j] = kvt_load_256(x + (i + j) * ldx + d);
                kvt_transpose_8x8(y);
                KVT_UNROLL
                for (size_t j = 0; j < 8; j++)
                    kvt_store_256(to + (d + j) * 16 + i, y[j]);
            }
    for (; d < dims; d++)
        for (size_t i = 0; i < n; i++)
            to[d * 16 + i] = x[i * ldx + d];
    return 1;
}

/* 8 elements to f16, their magnitudes collected: one is infinite where a value did not fit. */
KVT_INLINE __m128i to_f16_checked(const float *x, __m128i *largest)
{
    __m128i y = to_f16(_mm256_loadu_ps(x));
    *largest = _mm_max_epi16(*largest, _mm_and_si128(y, _mm_set1_epi16(0x7fff)));
    return y;
}

int kvt_avx2_put_k_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    uint16_t *to = (uint16_t *)codes + kvt_kw_index(slot, 0, dims_p);
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    size_t d = 0;
    (void)scales;
    for (; d + 8 <= dims; d += 8) {
        size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            __m128i y[8];
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                y[j] = to_f16_checked(x + (i + j) * ldx + d, &largest);
            kvt_transpose_8x8_16(y);
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                kvt_store_128(to + (d + j) * 16 + i, y[j]);
        }
        for (; i < n; i++) {
            uint16_t y[8];
            kvt_store_128(y, to_f16_checked(x + i * ldx + d, &largest));
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                to[(d + j) * 16 + i] = y[j];
        }
    }
    for (; d < dims; d++)
        for (size_t i = 0; i < n; i++) {
            uint16_t y = kvt_f32_to_f16(x[i * ldx + d]);
            bad |= (y & 0x7c00u) == 0x7c00u;
            to[d * 16 + i] = y;
        }
    return is_below_16(largest, 0x7c00) & !bad;
}

int kvt_avx2_put_v_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    (void)scales;
    for (size_t i = 0; i < n; i++) {
        uint16_t *to = (uint16_t *)codes + kvt_vw_index(slot + i, 0, dims_p);
        size_t d = 0;
        for (; d + 8 <= dims; d += 8)
            kvt_store_128(to + d, to_f16_checked(x + i * ldx + d, &largest));
        for (; d < dims; d++) {
            to[d] = kvt_f32_to_f16(x[i * ldx + d]);
            bad |= (to[d] & 0x7c00u) == 0x7c00u;
        }
    }
    return is_below_16(largest, 0x7c00) & !bad;
}

/* ---- storing 8 bits ---- */

/*
 * The scales of four rows, and their reciprocals, from the largest magnitudes. The hardware rounds
 * upward as tile.h does, subnormals and all.
 */
KVT_INLINE __m128i scales_of(__m128i most, __m128 *reciprocals)
{
    __m128 quotients = _mm_div_ps(_mm_castsi128_ps(most), _mm_set1_ps(127.0f));
    __m128i scales = _mm_cvtps_ph(quotients, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    __m128 x = _mm_cvtph_ps(scales), zero = _mm_setzero_ps();
    *reciprocals = _mm_andnot_ps(_mm_cmpeq_ps(x, zero), _mm_div_ps(_mm_set1_ps(1.0f), x));
    return scales;
}

/*
 * Magnitudes are compared as integers: they order as the numbers do, and a NaN, above all, becomes
 * a scale that is refused.
 */
KVT_INLINE __m256i largest_of(__m256i largest, const float *x)
{
    return _mm256_max_epi32(largest,
                            _mm256_and_si256(kvt_load_256(x), _mm256_set1_epi32(0x7fffffff)));
}

/* The scales of four rows into `scales`. They are returned too. */
KVT_INLINE __m128i scale_rows_4(const float *x, size_t ldx, size_t dims, uint16_t *scales,
                                float *reciprocals)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, e = a, ab, ce;
    __m128i most, result;
    __m128 inverse;
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        a = largest_of(a, x + d);
        b = largest_of(b, x + ldx + d);
        c = largest_of(c, x + 2 * ldx + d);
        e = largest_of(e, x + 3 * ldx + d);
    }
    ab = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    ce = _mm256_max_epi32(_mm256_unpacklo_epi32(c, e), _mm256_unpackhi_epi32(c, e));
    ab = _mm256_max_epi32(_mm256_unpacklo_epi64(ab, ce), _mm256_unpackhi_epi64(ab, ce));
    most = _mm_max_epi32(_mm256_castsi256_si128(ab), _mm256_extracti128_si256(ab, 1));
    for (; d < dims; d++) {
        __m128 y = _mm_setr_ps(x[d], x[ldx + d], x[2 * ldx + d], x[3 * ldx + d]);
        most = _mm_max_epi32(most, _mm_and_si128(_mm_castps_si128(y), _mm_set1_epi32(0x7fffffff)));
    }
    result = scales_of(most, &inverse);
    _mm_storel_epi64((__m128i *)(void *)scales, result);
    _mm_storeu_ps(reciprocals, inverse);
    return result;
}

KVT_INLINE __m128i scale_row(const float *x, size_t dims, uint16_t *scale, float *reciprocal)
{
    __m256i largest = _mm256_setzero_si256();
    __m128i most, result;
    __m128 inverse;
    size_t d = 0;
    for (; d + 8 <= dims; d += 8)
        largest = largest_of(largest, x + d);
    most = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    for (; d < dims; d++)
        most = _mm_max_epi32(most, _mm_set1_epi32((int32_t)(kvt_f32_bits(x[d]) & 0x7fffffffu)));
    result = scales_of(most, &inverse);
    *scale = (uint16_t)_mm_extract_epi16(result, 0);
    _mm_store_ss(reciprocal, inverse);
    return result;
}

/* The scales of n rows. 0: one is beyond f16. */
KVT_INLINE int scale_rows(const float *x, size_t ldx, size_t n, size_t dims, uint16_t *scales,
                          float *reciprocals)
{
    __m128i largest = _mm_setzero_si128();
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        largest = _mm_max_epi16(largest,
                                scale_rows_4(x + i * ldx, ldx, dims, scales + i, reciprocals + i));
    for (; i < n; i++)
        largest = _mm_max_epi16(largest, scale_row(x + i * ldx, dims, scales + i, reciprocals + i));
    return is_below_16(largest, 0x7c00);
}

/* Codes of 8 dims in 32-bit lanes. The default rounding of the conversion is to nearest even. */
KVT_INLINE __m256i code_8(const float *x, __m256 reciprocal)
{
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), reciprocal));
}

/* Codes of 32 dims as bytes, in order. Packing saturates, but codes are within +-127. */
KVT_INLINE __m256i code_32(const float *x, __m256 reciprocal)
{
    __m256i ab = _mm256_packs_epi32(code_8(x, reciprocal), code_8(x + 8, reciprocal));
    __m256i cd = _mm256_packs_epi32(code_8(x + 16, reciprocal), code_8(x + 24, reciprocal));
    /* Packs work in 128-bit halves: groups of four dims come out as 0 2 4 6 | 1 3 5 7. */
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* One code, as scalar.c forms it: for dims that are no multiple of a vector. */
KVT_INLINE uint8_t code_1(float x, float reciprocal)
{
    return (uint8_t)(kvt_f32_bits(x * reciprocal + 12582912.0f) - 0x4b400000u);
}

/* Dims d .. dims - 1 of one token into its column of a K tile: four dims are 4 bytes. */
KVT_INLINE void put_column(const float *x, size_t d, size_t dims, float reciprocal, uint8_t *to)
{
    const __m256 reciprocals = _mm256_set1_ps(reciprocal);
    for (; d + 32 <= dims; d += 32) {
        uint32_t groups[8];
        kvt_store_256(groups, code_32(x + d, reciprocals));
        KVT_UNROLL
        for (size_t j = 0; j < 8; j++)
            memcpy(to + (d / 4 + j) * 64, groups + j, 4);
    }
    for (; d < dims; d++)
        to[d / 4 * 64 + d % 4] = code_1(x[d], reciprocal);
}

/*
 * All scales first: a row that is refused leaves the tile alone. The full tile is done in squares
 * of 8 tokens by 32 dims; the dims that are left (of 48 or 80, say), and all dims of fewer tokens,
 * go column by column.
 */
int kvt_avx2_put_k_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                      uint16_t *scales, size_t slot)
{
    uint8_t *to = (uint8_t *)codes + kvt_k8_index(slot, 0, dims_p);
    float reciprocal[KVT_TILE_TOKENS];
    size_t d = 0;

    if (!scale_rows(x, ldx, n, dims, scales + slot, reciprocal))
        return 0;
    /* 8 tokens by 32 dims are 8 x 8 groups of four dims. */
    if (n == KVT_TILE_TOKENS)
        for (; d + 32 <= dims; d += 32)
            for (size_t i = 0; i < KVT_TILE_TOKENS; i += 8) {
                __m256i y[8];
                KVT_UNROLL
                for (size_t j = 0; j < 8; j++)
                    y[j] = code_32(x + (i + j) * ldx + d, _mm256_set1_ps(reciprocal[i + j]));
                kvt_transpose_8x8(y);
                KVT_UNROLL
                for (size_t j = 0; j < 8; j++)
                    kvt_store_256(to + (d / 4 + j) * 64 + i * 4, y[j]);
            }
    for (size_t i = 0; i < n; i++)
        put_column(x + i * ldx, d, dims, reciprocal[i], to + i * 4);
    return 1;
}

/*
 * V's tile has four tokens in a 4-byte lane. Four tokens at once fill the lanes; a lone one is
 * put into its byte of them, the other bytes written back as they were.
 */
KVT_INLINE size_t put_lanes_4(const float *x, size_t ldx, size_t dims, const float *reciprocal,
                              uint8_t *to)
{
    /* The packs leave 4 dims of each token in each half; the order makes it 4 tokens a dim. */
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0,
                                           4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        __m256i y[4];
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++)
            y[j] = code_8(x + j * ldx + d, _mm256_set1_ps(reciprocal[j]));
        __m256i bytes =
            _mm256_packs_epi16(_mm256_packs_epi32(y[0], y[1]), _mm256_packs_epi32(y[2], y[3]));
        kvt_store_256(to + d * 4, _mm256_shuffle_epi8(bytes, order));
    }
    return d;
}

/*
 * Writing the neighbours back is no race: all tokens of a tile are one head's, and a head is
 * appended to by one task. Their bytes, alive or dead, stay what they are.
 */
KVT_INLINE size_t put_lanes_1(const float *x, size_t dims, float reciprocal, size_t byte,
                              uint8_t *to)
{
    const __m256 reciprocals = _mm256_set1_ps(reciprocal);
    const __m128i shift = _mm_cvtsi32_si128((int)byte * 8);
    const __m256i mask = _mm256_sll_epi32(_mm256_set1_epi32(0xff), shift);
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        __m256i code = _mm256_and_si256(_mm256_sll_epi32(code_8(x + d, reciprocals), shift), mask);
        __m256i others = _mm256_andnot_si256(mask, kvt_load_256(to + d * 4));
        kvt_store_256(to + d * 4, _mm256_or_si256(code, others));
    }
    return d;
}

/*
 * Four rows at a time are scaled and stored before the next: rows lie where the caller has them,
 * perhaps a power of two apart, where 16 of them would drive each other out of a cache's sets.
 */
int kvt_avx2_put_v_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                      uint16_t *scales, size_t slot)
{
    for (size_t i = 0, count; i < n; i += count) {
        size_t byte = (slot + i) % 4, d;
        uint8_t *to = (uint8_t *)codes + kvt_v8_index(slot + i - byte, 0, dims_p);
        const float *row = x + i * ldx;
        float reciprocal[4];
        count = byte == 0 && n - i >= 4 ? 4 : 1;
        if (!scale_rows(row, ldx, count, dims, scales + slot + i, reciprocal))
            return 0;
        if (count == 4)
            d = put_lanes_4(row, ldx, dims, reciprocal, to);
        else
            d = put_lanes_1(row, dims, reciprocal[0], byte, to);
        for (; d < dims; d++)
            for (size_t j = 0; j < count; j++)
                to[d * 4 + byte + j] = code_1(row[j * ldx + d], reciprocal[j]);
    }
    return 1;
}

/* ---- reading back ---- */

/* One token of K: two groups of four codes, 64 bytes apart, are 8 dims. */
void kvt_avx2_get_k_i8(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                       size_t dims_p, float *x)
{
    const int8_t *from = (const int8_t *)codes + kvt_k8_index(slot, 0, dims_p);
    const float scale = kvt_f16_to_f32(scales[slot]);
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        int32_t low, high;
        memcpy(&low, from + d * 16, 4);
        memcpy(&high, from + d * 16 + 64, 4);
        __m128i bytes = _mm_insert_epi32(_mm_cvtsi32_si128(low), high, 1);
        __m256 y = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        _mm256_storeu_ps(x + d, _mm256_mul_ps(y, _mm256_set1_ps(scale)));
    }
    for (; d < dims; d++)
        x[d] = (float)from[d / 4 * 64 + d % 4] * scale;
}

void kvt_avx2_get_v_f16(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                        size_t dims_p, float *x)
{
    const uint16_t *from = (const uint16_t *)codes + kvt_vw_index(slot, 0, dims_p);
    size_t d = 0;
    (void)scales;
    for (; d + 8 <= dims; d += 8)
        _mm256_storeu_ps(x + d, _mm256_cvtph_ps(kvt_load_128(from + d)));
    for (; d < dims; d++)
        x[d] = kvt_f16_to_f32(from[d]);
}

/*
 * One token of V: its byte of each lane is brought to the top and back down with its sign. The
 * product with the scale is exact (7 by 11 bits), so that scalar and vector cannot round apart.
 */
void kvt_avx2_get_v_i8(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                       size_t dims_p, float *x)
{
    const int8_t *from = (const int8_t *)codes + kvt_v8_index(slot / 4 * 4, 0, dims_p);
    const float scale = kvt_f16_to_f32(scales[slot]);
    const __m128i to_top = _mm_cvtsi32_si128((int)(24 - slot % 4 * 8));
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        __m256i y = _mm256_srai_epi32(_mm256_sll_epi32(kvt_load_256(from + d * 4), to_top), 24);
        _mm256_storeu_ps(x + d, _mm256_mul_ps(_mm256_cvtepi32_ps(y), _mm256_set1_ps(scale)));
    }
    for (; d < dims; d++)
        x[d] = (float)from[d * 4 + slot % 4] * scale;
}

/* ---- the mean of a block ---- */

/*
 * Sums of one dim over the tiles, with lane j + 8 already added to lane j, for scales times 2^-24:
 * a code is taken at the top of its 4-byte lane, times 2^24, which saves shifting it down and
 * changes no bit of the product. The first tile is taken as it is, not added to zero: that would
 * lose the sign of a negative zero, and with it a bit.
 */
KVT_INLINE __m256 code_at_top(const int8_t *from, int e)
{
    __m256i y = kvt_load_256(from);
    if (e < 3)
        y = _mm256_slli_epi32(y, 24 - 8 * e);
    if (e > 0)
        y = _mm256_and_si256(y, _mm256_set1_epi32((int)0xff000000u));
    return _mm256_cvtepi32_ps(y);
}

KVT_INLINE __m256 sum_of_dim(const int8_t *group, size_t tile_bytes, const __m256 *scale, int e)
{
    __m256 low = _mm256_setzero_ps(), high = low;
    KVT_UNROLL
    for (size_t tile = 0; tile < KVT_TOKENS / KVT_TILE_TOKENS; tile++) {
        const int8_t *from = group + tile * tile_bytes;
        __m256 x = _mm256_mul_ps(code_at_top(from, e), scale[2 * tile]);
        __m256 y = _mm256_mul_ps(code_at_top(from + 32, e), scale[2 * tile + 1]);
        low = tile ? _mm256_add_ps(low, x) : x;
        high = tile ? _mm256_add_ps(high, y) : y;
    }
    return _mm256_add_ps(low, high);
}

/* Lane j adds its token of each tile, then lanes fold 8, 4, 2, 1 apart; 8 dims fold together. */
void kvt_avx2_mean_k_i8(const void *codes, const uint16_t *scales, size_t dims_p, float *mean)
{
    const int8_t *from = codes;
    const size_t tile_bytes = dims_p * KVT_TILE_TOKENS;
    __m256 scale[KVT_TOKENS / 8];

    for (size_t i = 0; i < KVT_TOKENS / 8; i++)
        scale[i] =
            _mm256_mul_ps(_mm256_cvtph_ps(kvt_load_128(scales + 8 * i)), _mm256_set1_ps(0x1p-24f));
    for (size_t d = 0; d < dims_p; d += 8) {
        __m256 x[8], y[4], a, b;
        KVT_UNROLL
        for (int e = 0; e < 8; e++)
            x[e] = sum_of_dim(from + (d / 4 + (size_t)e / 4) * 64, tile_bytes, scale, e % 4);
        KVT_UNROLL
        for (size_t i = 0; i < 4; i++) /* halves: dims i | i + 4 */
            y[i] = _mm256_add_ps(_mm256_permute2f128_ps(x[i], x[i + 4], 0x20),
                                 _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
        a = _mm256_add_ps(_mm256_shuffle_ps(y[0], y[1], 0x44), _mm256_shuffle_ps(y[0], y[1], 0xee));
        b = _mm256_add_ps(_mm256_shuffle_ps(y[2], y[3], 0x44), _mm256_shuffle_ps(y[2], y[3], 0xee));
        a = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
        _mm256_storeu_ps(mean + d, _mm256_mul_ps(a, _mm256_set1_ps(1.0f / KVT_TOKENS)));
    }
}
