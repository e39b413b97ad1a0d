/*
 * AVX-512 (F, BW, DQ, VL) kernels of append and reading back: conversions, the rotation, and
 * storing into tiles. Only kernels that beat AVX2 also on processors that split 512-bit operations
 * into two (Zen 4).
 *
 * The bytes are scalar.c's, as avx2_rows.c explains; tiles are written by single tokens or by all
 * 16, as avx2_append.c explains. Here 16 tokens or dims are one register, a line of every tile, and
 * tails of rows are loaded under a mask: masked-off lanes are not accessed.
 */
#include "avx512.h"

KVT_INLINE __m256i load_256(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

KVT_INLINE void store_256(void *to, __m256i x)
{
    _mm256_storeu_si256((__m256i *)to, x);
}

/* ---- conversions ---- */

/* The larger magnitudes, as integers: infinities and NaNs compare above all finite numbers. */
KVT_INLINE __m512i largest_of(__m512i largest, __m512i x)
{
    return _mm512_max_epi32(largest, _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)));
}

KVT_INLINE __m256i largest_of_16(__m256i largest, __m256i x)
{
    return _mm256_max_epi16(largest, _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)));
}

KVT_INLINE int is_below_16(__m256i magnitudes, int16_t bound)
{
    return _mm256_cmpge_epi16_mask(magnitudes, _mm256_set1_epi16(bound)) == 0;
}

/* Rows may begin at any element and may end at an inaccessible page. */
int kvt_avx512_load_f32(const void *src, float *dst, size_t n)
{
    const unsigned char *from = src;
    __m512i largest = _mm512_setzero_si512();
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512i x = _mm512_loadu_si512(from + 4 * i);
        largest = largest_of(largest, x);
        _mm512_storeu_si512(dst + i, x);
    }
    if (i < n) {
        __m512i x = _mm512_maskz_loadu_epi32(kvt_lanes_below(0, n - i), from + 4 * i);
        largest = largest_of(largest, x);
        _mm512_mask_storeu_epi32(dst + i, kvt_lanes_below(0, n - i), x);
    }
    return _mm512_cmpge_epi32_mask(largest, _mm512_set1_epi32(0x7f800000)) == 0;
}

KVT_INLINE __m512 widen(__m256i x, int is_bf16)
{
    return is_bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))
                   : _mm512_cvtph_ps(x);
}

KVT_INLINE int load_16(const uint16_t *from, float *dst, size_t n, int is_bf16)
{
    __m256i largest = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256i x = load_256(from + i);
        largest = largest_of_16(largest, x);
        _mm512_storeu_ps(dst + i, widen(x, is_bf16));
    }
    if (i < n) {
        __m256i x = _mm256_maskz_loadu_epi16(kvt_lanes_below(0, n - i), from + i);
        largest = largest_of_16(largest, x);
        _mm512_mask_storeu_ps(dst + i, kvt_lanes_below(0, n - i), widen(x, is_bf16));
    }
    return is_below_16(largest, is_bf16 ? 0x7f80 : 0x7c00);
}

int kvt_avx512_load_f16(const void *src, float *dst, size_t n)
{
    return load_16(src, dst, n, 0);
}

int kvt_avx512_load_bf16(const void *src, float *dst, size_t n)
{
    return load_16(src, dst, n, 1);
}

KVT_INLINE __m256i to_f16(__m512 x)
{
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* The rounding of avx2_rows.c's store_bf16. */
KVT_INLINE __m256i to_bf16(__m512 x)
{
    __m512i bits, high, odd, sum, rounded;
    x = _mm512_max_ps(_mm512_set1_ps(-KVT_BF16_MAX),
                      _mm512_min_ps(_mm512_set1_ps(KVT_BF16_MAX), x));
    bits = _mm512_castps_si512(x);
    high = _mm512_srli_epi32(bits, 16);
    odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    sum = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    rounded =
        _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                             high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(rounded);
}

void kvt_avx512_store_bf16(const float *src, void *dst, size_t n)
{
    uint16_t *to = dst;
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        store_256(to + i, to_bf16(_mm512_loadu_ps(src + i)));
    if (i < n)
        _mm256_mask_storeu_epi16(
            to + i, kvt_lanes_below(0, n - i),
            to_bf16(_mm512_maskz_loadu_ps(kvt_lanes_below(0, n - i), src + i)));
}

/* ---- rotation ---- */

/* Butterflies 1, 2, 4 and 8 apart, in a register: as hadamard_8 of avx2_rows.c. */
KVT_INLINE __m512 hadamard_16(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f), minus_one = _mm512_set1_ps(-1.0f);
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xaaaa, one, minus_one),
                        _mm512_permute_ps(x, 0xb1));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xcccc, one, minus_one),
                        _mm512_permute_ps(x, 0x4e));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xf0f0, one, minus_one),
                        _mm512_shuffle_f32x4(x, x, 0xb1));
    return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xff00, one, minus_one),
                           _mm512_shuffle_f32x4(x, x, 0x4e));
}

/* Butterflies of whole registers, `apart` of them apart. */
KVT_INLINE void butterflies(__m512 *x, size_t n, size_t apart)
{
    KVT_UNROLL
    for (size_t i = 0; i < 8; i++)
        if (i < n && !(i & apart)) {
            __m512 a = x[i], b = x[i + apart];
            x[i] = _mm512_add_ps(a, b);
            x[i + apart] = _mm512_sub_ps(a, b);
        }
}

/* One pass over memory, as hadamard_pass of avx2_rows.c. */
KVT_INLINE void hadamard_pass(const float *from, float *x, size_t vectors, size_t stride,
                              const float *before, int is_first, int is_last, float scale,
                              const float *after)
{
    __m512 y[8];
    KVT_UNROLL
    for (size_t i = 0; i < 8 && i < vectors; i++) {
        y[i] = _mm512_loadu_ps(from + i * stride);
        if (before)
            y[i] = _mm512_mul_ps(y[i], _mm512_loadu_ps(before + i * stride));
    }
    if (is_first) {
        KVT_UNROLL
        for (size_t i = 0; i < 8 && i < vectors; i++)
            y[i] = hadamard_16(y[i]);
    }
    butterflies(y, vectors, 1);
    if (vectors > 2)
        butterflies(y, vectors, 2);
    if (vectors > 4)
        butterflies(y, vectors, 4);
    KVT_UNROLL
    for (size_t i = 0; i < 8 && i < vectors; i++) {
        if (is_last)
            y[i] = _mm512_mul_ps(y[i], _mm512_set1_ps(scale));
        if (is_last && after)
            y[i] = _mm512_mul_ps(y[i], _mm512_loadu_ps(after + i * stride));
        _mm512_storeu_ps(x + i * stride, y[i]);
    }
}

/* Blocks below 32 dims are inside one register: the difference is formed in its own lane. */
KVT_INLINE void transform_small(const float *from, float *x, const float *before, size_t dims,
                                size_t block, float scale, const float *after)
{
    for (size_t i = 0; i < dims; i += 16) {
        const __mmask16 alive = kvt_lanes_below(0, dims - i);
        __m512 y = _mm512_maskz_loadu_ps(alive, from + i), z;
        if (before)
            y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(alive, before + i));
        if (block > 1) {
            z = _mm512_permute_ps(y, 0xb1);
            y = _mm512_mask_sub_ps(_mm512_add_ps(y, z), 0xaaaa, z, y);
        }
        if (block > 2) {
            z = _mm512_permute_ps(y, 0x4e);
            y = _mm512_mask_sub_ps(_mm512_add_ps(y, z), 0xcccc, z, y);
        }
        if (block > 4) {
            z = _mm512_shuffle_f32x4(y, y, 0xb1);
            y = _mm512_mask_sub_ps(_mm512_add_ps(y, z), 0xf0f0, z, y);
        }
        if (block > 8) {
            z = _mm512_shuffle_f32x4(y, y, 0x4e);
            y = _mm512_mask_sub_ps(_mm512_add_ps(y, z), 0xff00, z, y);
        }
        y = _mm512_mul_ps(y, _mm512_set1_ps(scale));
        if (after)
            y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(alive, after + i));
        _mm512_mask_storeu_ps(x + i, alive, y);
    }
}

/*
 * Row `from` into x, which may be the same. before and after: factors by dim, or NULL. Blocks of
 * 128 dims are 8 registers: one pass.
 */
KVT_INLINE void transform(const float *from, float *x, const float *before, size_t dims,
                          size_t block, float scale, const float *after)
{
    size_t done = block < 128 ? block : 128;

    if (block < 32) {
        transform_small(from, x, before, dims, block, scale, after);
        return;
    }
    for (size_t i = 0; i < dims; i += done) {
        const float *signs = before ? before + i : NULL, *to_signs = after ? after + i : NULL;
        if (block == 32)
            hadamard_pass(from + i, x + i, 2, 16, signs, 1, 1, scale, to_signs);
        else if (block == 64)
            hadamard_pass(from + i, x + i, 4, 16, signs, 1, 1, scale, to_signs);
        else if (block == 128)
            hadamard_pass(from + i, x + i, 8, 16, signs, 1, 1, scale, to_signs);
        else
            hadamard_pass(from + i, x + i, 8, 16, signs, 1, 0, scale, to_signs);
    }
    for (; done < block; done *= 2)
        for (size_t i = 0; i < dims; i += 2 * done)
            for (size_t j = i; j < i + done; j += 16)
                hadamard_pass(x + j, x + j, 2, done, NULL, 0, 2 * done == block, scale,
                              after ? after + j : NULL);
}

void kvt_avx512_rotate(const float *x, const float *sign, size_t dims, size_t block, float scale,
                       float *y)
{
    transform(x, y, sign, dims, block, scale, NULL);
}

void kvt_avx512_unrotate(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    transform(x, x, NULL, dims, block, scale, sign);
}

/* ---- transposes ---- */

/* Rows of 16 4-byte elements: x[i] becomes column i. */
KVT_INLINE void transpose_16x16(__m512i x[16])
{
    __m512i y[16];
    /* Squares of 4 by 4: lane k of y[4 * i + j] is column 4 * k + j of rows 4 * i .. 4 * i + 3. */
    KVT_UNROLL
    for (size_t i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        __m512i b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
        __m512i d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c);
        y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d);
        y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    /* Lanes as elements: 4 by 4 again. */
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(y[j], y[4 + j], 0x88);
        __m512i b = _mm512_shuffle_i32x4(y[j], y[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x88);
        __m512i d = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xdd);
        x[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        x[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        x[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* Rows of 16 2-byte elements: x[i] becomes column i. */
KVT_INLINE void transpose_16x16_16(__m256i x[16])
{
    __m256i y[16];
    /* Each step interleaves rows that are half of the rest apart: in 128-bit lanes, 8 by 8. */
    KVT_UNROLL
    for (size_t i = 0; i < 16; i += 8) {
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++) {
            y[i + j] = _mm256_unpacklo_epi16(x[i + j], x[i + j + 4]);
            y[i + j + 4] = _mm256_unpackhi_epi16(x[i + j], x[i + j + 4]);
        }
        KVT_UNROLL
        for (size_t j = 0; j < 8; j += 4)
            for (size_t k = 0; k < 2; k++) {
                x[i + j + k] = _mm256_unpacklo_epi16(y[i + j + k], y[i + j + k + 2]);
                x[i + j + k + 2] = _mm256_unpackhi_epi16(y[i + j + k], y[i + j + k + 2]);
            }
        KVT_UNROLL
        for (size_t j = 0; j < 8; j += 2) {
            y[i + j] = _mm256_unpacklo_epi16(x[i + j], x[i + j + 1]);
            y[i + j + 1] = _mm256_unpackhi_epi16(x[i + j], x[i + j + 1]);
        }
    }
    KVT_UNROLL
    for (size_t j = 0; j < 8; j++) {
        x[j] = _mm256_permute2x128_si256(y[j], y[8 + j], 0x20);
        x[8 + j] = _mm256_permute2x128_si256(y[j], y[8 + j], 0x31);
    }
}

/* ---- storing 16 bits ---- */

/* Up to 16 elements to f16. largest: maximum of the magnitudes so far, infinity on overflow. */
KVT_INLINE __m256i to_f16_checked(__m512 x, __m256i *largest)
{
    __m256i y = to_f16(x);
    *largest = largest_of_16(*largest, y);
    return y;
}

/* offset: f16, is subtracted; or NULL. */
KVT_INLINE int put_k(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                     const uint16_t *offset, void *codes, size_t slot)
{
    uint16_t *to = (uint16_t *)codes + kvt_kw_index(slot, 0, dims_p);
    __m256i largest = _mm256_setzero_si256();
    size_t d = 0;
    if (n == KVT_TILE_TOKENS)
        for (; d + 16 <= dims; d += 16) {
            const __m512 less =
                offset ? _mm512_cvtph_ps(load_256(offset + d)) : _mm512_setzero_ps();
            __m256i y[16];
            KVT_UNROLL
            for (size_t j = 0; j < 16; j++) {
                __m512 z = _mm512_loadu_ps(x + j * ldx + d);
                y[j] = to_f16_checked(offset ? _mm512_sub_ps(z, less) : z, &largest);
            }
            transpose_16x16_16(y);
            KVT_UNROLL
            for (size_t j = 0; j < 16; j++)
                store_256(to + (d + j) * 16, y[j]);
        }
    for (; d < dims; d += 16) {
        const size_t left = dims - d < 16 ? dims - d : 16;
        const __mmask16 alive = kvt_lanes_below(0, left);
        const __m512 less = offset ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(alive, offset + d))
                                   : _mm512_setzero_ps();
        for (size_t i = 0; i < n; i++) {
            __m512 z = _mm512_maskz_loadu_ps(alive, x + i * ldx + d);
            uint16_t y[16];
            store_256(y, to_f16_checked(offset ? _mm512_sub_ps(z, less) : z, &largest));
            if (left == 16) {
                KVT_UNROLL
                for (size_t j = 0; j < 16; j++)
                    to[(d + j) * 16 + i] = y[j];
                continue;
            }
            for (size_t j = 0; j < left; j++)
                to[(d + j) * 16 + i] = y[j];
        }
    }
    return is_below_16(largest, 0x7c00);
}

int kvt_avx512_put_k_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                         void *codes, uint16_t *scales, size_t slot)
{
    (void)scales;
    return put_k(x, ldx, n, dims, dims_p, NULL, codes, slot);
}

int kvt_avx512_put_k_open(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                          const uint16_t *offset, void *codes, size_t slot)
{
    return put_k(x, ldx, n, dims, dims_p, offset, codes, slot);
}

int kvt_avx512_put_v_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                         void *codes, uint16_t *scales, size_t slot)
{
    __m256i largest = _mm256_setzero_si256();
    (void)scales;
    for (size_t i = 0; i < n; i++) {
        uint16_t *to = (uint16_t *)codes + kvt_vw_index(slot + i, 0, dims_p);
        const float *row = x + i * ldx;
        size_t d = 0;
        for (; d + 16 <= dims; d += 16)
            store_256(to + d, to_f16_checked(_mm512_loadu_ps(row + d), &largest));
        if (d < dims)
            _mm256_mask_storeu_epi16(
                to + d, kvt_lanes_below(0, dims - d),
                to_f16_checked(_mm512_maskz_loadu_ps(kvt_lanes_below(0, dims - d), row + d),
                               &largest));
    }
    return is_below_16(largest, 0x7c00);
}

/* ---- storing 8 bits ---- */

/* Up to 16 dims of a row; those beyond `left` are zero. */
KVT_INLINE __m512i load_row(const float *x, size_t left)
{
    return left >= 16 ? _mm512_loadu_si512(x)
                      : _mm512_maskz_loadu_epi32(kvt_lanes_below(0, left), x);
}

/*
 * The scales of four rows, and their reciprocals, from the largest magnitudes. vcvtps2ph rounds
 * toward +infinity as kvt_f32_to_f16_round does, subnormal results included. A row that is not
 * finite yields a scale that is not finite, and is rejected.
 */
KVT_INLINE __m128i scales_of(__m128i most, __m128 *reciprocals)
{
    __m128 quotients = _mm_div_ps(_mm_castsi128_ps(most), _mm_set1_ps(127.0f));
    __m128i scales = _mm_cvtps_ph(quotients, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    __m128 x = _mm_cvtph_ps(scales);
    __mmask8 some = _mm_cmp_ps_mask(x, _mm_setzero_ps(), _CMP_NEQ_UQ);
    *reciprocals = _mm_maskz_div_ps(some, _mm_set1_ps(1.0f), x);
    return scales;
}

KVT_INLINE __m128i max_lanes(__m512i x)
{
    __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

KVT_INLINE __m128i scale_rows_4(const float *x, size_t ldx, size_t dims, uint16_t *scales,
                                float *reciprocals)
{
    __m512i a = _mm512_setzero_si512(), b = a, c = a, e = a;
    __m128i result;
    __m128 inverse;
    size_t d = 0;
    for (; d + 16 <= dims; d += 16) {
        a = largest_of(a, load_row(x + d, 16));
        b = largest_of(b, load_row(x + ldx + d, 16));
        c = largest_of(c, load_row(x + 2 * ldx + d, 16));
        e = largest_of(e, load_row(x + 3 * ldx + d, 16));
    }
    if (d < dims) {
        a = largest_of(a, load_row(x + d, dims - d));
        b = largest_of(b, load_row(x + ldx + d, dims - d));
        c = largest_of(c, load_row(x + 2 * ldx + d, dims - d));
        e = largest_of(e, load_row(x + 3 * ldx + d, dims - d));
    }
    a = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    c = _mm512_max_epi32(_mm512_unpacklo_epi32(c, e), _mm512_unpackhi_epi32(c, e));
    a = _mm512_max_epi32(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
    result = scales_of(max_lanes(a), &inverse);
    _mm_storel_epi64((__m128i *)(void *)scales, result);
    _mm_storeu_ps(reciprocals, inverse);
    return result;
}

KVT_INLINE __m128i scale_row(const float *x, size_t dims, uint16_t *scale, float *reciprocal)
{
    __m512i largest = _mm512_setzero_si512();
    __m128i most, result;
    __m128 inverse;
    size_t d = 0;
    for (; d + 16 <= dims; d += 16)
        largest = largest_of(largest, load_row(x + d, 16));
    if (d < dims)
        largest = largest_of(largest, load_row(x + d, dims - d));
    most = max_lanes(largest);
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
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
    return _mm_cmpge_epi16_mask(largest, _mm_set1_epi16(0x7c00)) == 0;
}

/* Codes of 16 dims in 32-bit lanes. The default rounding of the conversion is to nearest even. */
KVT_INLINE __m512i code_16(const float *x, size_t left, __m512 reciprocal)
{
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(load_row(x, left)), reciprocal));
}

/* Four registers of codes as bytes: lane k is lane k of each. Packing saturates, codes do not. */
KVT_INLINE __m512i pack(__m512i a, __m512i b, __m512i c, __m512i d)
{
    return _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}

/* Codes of 64 dims: groups of four in the order 0 4 8 12 | 1 5 9 13 | 2 ... */
KVT_INLINE __m512i code_64(const float *x, size_t left, __m512 reciprocal)
{
    __m512i zero = _mm512_setzero_si512();
    return pack(code_16(x, left, reciprocal),
                left > 16 ? code_16(x + 16, left - 16, reciprocal) : zero,
                left > 32 ? code_16(x + 32, left - 32, reciprocal) : zero,
                left > 48 ? code_16(x + 48, left - 48, reciprocal) : zero);
}

/* The place of a group of four dims in the order of code_64, and the other way around. */
KVT_INLINE size_t group_at(size_t i)
{
    return i / 4 + i % 4 * 4;
}

KVT_INLINE void put_square(const float *x, size_t ldx, size_t left, const float *reciprocal,
                           uint8_t *to)
{
    __m512i y[16];
    KVT_UNROLL
    for (size_t j = 0; j < 16; j++)
        y[j] = code_64(x + j * ldx, left, _mm512_set1_ps(reciprocal[j]));
    transpose_16x16(y);
    KVT_UNROLL
    for (size_t j = 0; j < 16; j++)
        if (group_at(j) * 4 < left)
            _mm512_storeu_si512(to + group_at(j) * 64, y[j]);
}

KVT_INLINE void put_column(const float *x, size_t left, float reciprocal, uint8_t *to)
{
    uint32_t groups[16];
    _mm512_storeu_si512(groups, code_64(x, left, _mm512_set1_ps(reciprocal)));
    KVT_UNROLL
    for (size_t j = 0; j < 16; j++)
        if (j * 4 < left)
            memcpy(to + j * 64, groups + group_at(j), 4);
}

/*
 * All scales are computed first, so that a rejected row leaves the tile unchanged. A full tile is
 * done in squares of 16 tokens by 64 dims, which are 16 by 16 groups of four dims; fewer tokens are
 * stored column by column, four dims (4 bytes of a line) at a time.
 */
int kvt_avx512_put_k_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                        void *codes, uint16_t *scales, size_t slot)
{
    uint8_t *to = (uint8_t *)codes + kvt_k8_index(slot, 0, dims_p);
    float reciprocal[KVT_TILE_TOKENS];
    size_t d = 0;

    if (!scale_rows(x, ldx, n, dims, scales + slot, reciprocal))
        return 0;
    if (n == KVT_TILE_TOKENS) {
        for (; d + 64 <= dims; d += 64)
            put_square(x + d, ldx, 64, reciprocal, to + d * 16);
        if (d < dims)
            put_square(x + d, ldx, dims - d, reciprocal, to + d * 16);
        return 1;
    }
    for (size_t i = 0; i < n; i++) {
        for (d = 0; d + 64 <= dims; d += 64)
            put_column(x + i * ldx + d, 64, reciprocal[i], to + d * 16 + i * 4);
        if (d < dims)
            put_column(x + i * ldx + d, dims - d, reciprocal[i], to + d * 16 + i * 4);
    }
    return 1;
}

/* ---- reading back ---- */

void kvt_avx512_get_v_f16(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                          size_t dims_p, float *x)
{
    const uint16_t *from = (const uint16_t *)codes + kvt_vw_index(slot, 0, dims_p);
    size_t d = 0;
    (void)scales;
    for (; d + 16 <= dims; d += 16)
        _mm512_storeu_ps(x + d, _mm512_cvtph_ps(load_256(from + d)));
    if (d < dims) /* rows of a tile are padded to dims_p, so whole vectors can be read */
        _mm512_mask_storeu_ps(x + d, kvt_lanes_below(0, dims - d),
                              _mm512_cvtph_ps(load_256(from + d)));
}

/*
 * One token of V: its byte of each lane is shifted to the top and back down with sign extension.
 * The product with the scale is exact (7 by 11 bits), so there is no rounding to match.
 */
void kvt_avx512_get_v_i8(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                         size_t dims_p, float *x)
{
    const int8_t *from = (const int8_t *)codes + kvt_v8_index(slot / 4 * 4, 0, dims_p);
    const __m512 scale = _mm512_set1_ps(kvt_f16_to_f32(scales[slot]));
    const __m128i to_top = _mm_cvtsi32_si128((int)(24 - slot % 4 * 8));
    for (size_t d = 0; d < dims; d += 16) {
        __m512i y = _mm512_sll_epi32(_mm512_loadu_si512(from + d * 4), to_top);
        __m512 z = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(y, 24)), scale);
        if (dims - d >= 16)
            _mm512_storeu_ps(x + d, z);
        else
            _mm512_mask_storeu_ps(x + d, kvt_lanes_below(0, dims - d), z);
    }
}
