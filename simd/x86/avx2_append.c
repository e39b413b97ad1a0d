/*
 * AVX2 + FMA + F16C kernels: storing into tiles and reading back. The steps
 * before (conversion, rotation, offset) are in avx2_rows.c. Results are scalar.c's bit for bit:
 * only exact identities are used, such as cvtps2dq (nearest even) for the addition of 1.5 * 2^23.
 *
 * Tiles are written in two ways. Decode appends one token, whose elements are 64 bytes apart in a
 * tile: it is quantized by vectors and scattered, one store for each element or group of four.
 * Prefill fills a tile of 16 tokens, which is transposed in registers and written in whole lines.
 */
#include "avx2.h"

/* ---- storing 32 and 16 bits ---- */

/*
 * K's f32 and f16 tiles are the transpose of the rows: [dim][16 tokens]. A full tile (or half of
 * one, for f16) is transposed in registers; fewer tokens are scattered one element at a time, as
 * each element is in another line.
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

/* 8 elements to f16. largest: maximum of the magnitudes so far, infinity after an overflow. */
KVT_INLINE __m128i to_f16_largest(__m256 x, __m128i *largest)
{
    __m128i y = kvt_to_f16(x);
    *largest = _mm_max_epi16(*largest, _mm_and_si128(y, _mm_set1_epi16(0x7fff)));
    return y;
}

KVT_INLINE __m128i to_f16_checked(const float *x, __m128i *largest)
{
    return to_f16_largest(_mm256_loadu_ps(x), largest);
}

/* offset: f16, is subtracted; or NULL. */
KVT_INLINE int put_k(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                     const uint16_t *offset, void *codes, size_t slot)
{
    uint16_t *to = (uint16_t *)codes + kvt_kw_index(slot, 0, dims_p);
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        const __m256 less =
            offset ? _mm256_cvtph_ps(kvt_load_128(offset + d)) : _mm256_setzero_ps();
        size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            __m128i y[8];
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++) {
                __m256 z = _mm256_loadu_ps(x + (i + j) * ldx + d);
                y[j] = to_f16_largest(offset ? _mm256_sub_ps(z, less) : z, &largest);
            }
            kvt_transpose_8x8_16(y);
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                kvt_store_128(to + (d + j) * 16 + i, y[j]);
        }
        for (; i < n; i++) {
            uint16_t y[8];
            __m256 z = _mm256_loadu_ps(x + i * ldx + d);
            kvt_store_128(y, to_f16_largest(offset ? _mm256_sub_ps(z, less) : z, &largest));
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                to[(d + j) * 16 + i] = y[j];
        }
    }
    for (; d < dims; d++)
        for (size_t i = 0; i < n; i++) {
            float z = x[i * ldx + d];
            uint16_t y = kvt_f32_to_f16(offset ? z - kvt_f16_to_f32(offset[d]) : z);
            bad |= (y & 0x7c00u) == 0x7c00u;
            to[d * 16 + i] = y;
        }
    return kvt_is_below_16(largest, 0x7c00) & !bad;
}

int kvt_avx2_put_k_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    (void)scales;
    return put_k(x, ldx, n, dims, dims_p, NULL, codes, slot);
}

int kvt_avx2_put_k_open(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                        const uint16_t *offset, void *codes, size_t slot)
{
    return put_k(x, ldx, n, dims, dims_p, offset, codes, slot);
}

int kvt_avx2_put_v_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    __m256i largest_16 = _mm256_setzero_si256();
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    (void)scales;
    for (size_t i = 0; i < n; i++) {
        uint16_t *to = (uint16_t *)codes + kvt_vw_index(slot + i, 0, dims_p);
        size_t d = 0;
        for (; d + 16 <= dims; d += 16) {
            __m128i low = kvt_to_f16(_mm256_loadu_ps(x + i * ldx + d));
            __m128i high = kvt_to_f16(_mm256_loadu_ps(x + i * ldx + d + 8));
            __m256i y = _mm256_set_m128i(high, low);
            largest_16 =
                _mm256_max_epi16(largest_16, _mm256_and_si256(y, _mm256_set1_epi16(0x7fff)));
            kvt_store_256(to + d, y);
        }
        for (; d + 8 <= dims; d += 8)
            kvt_store_128(to + d, to_f16_checked(x + i * ldx + d, &largest));
        for (; d < dims; d++) {
            to[d] = kvt_f32_to_f16(x[i * ldx + d]);
            bad |= (to[d] & 0x7c00u) == 0x7c00u;
        }
    }
    largest = _mm_max_epi16(largest, _mm_max_epi16(_mm256_castsi256_si128(largest_16),
                                                   _mm256_extracti128_si256(largest_16, 1)));
    return kvt_is_below_16(largest, 0x7c00) & !bad;
}

/* ---- storing 8 bits ---- */

/*
 * The scales of four rows, and their reciprocals, from the largest magnitudes. vcvtps2ph rounds
 * toward +infinity as kvt_f32_to_f16_round does, subnormal results included.
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
 * Magnitudes are compared as integers, which have the order of the floats. A NaN compares above
 * infinity and yields a scale that is not finite, so the row is rejected.
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
    return kvt_is_below_16(largest, 0x7c00);
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
 * All scales are computed first, so that a rejected row leaves the tile unchanged. A full tile is
 * done in squares of 8 tokens by 32 dims; the remaining dims (of 48 or 80, say), and all dims of
 * fewer tokens, are stored column by column.
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
 * V's tile has four tokens in a 4-byte lane. Four tokens at once fill whole lanes; a single one is
 * merged into its byte of the lanes by read-modify-write.
 */
KVT_INLINE size_t put_lanes_4(const float *x, size_t ldx, size_t dims, const float *reciprocal,
                              uint8_t *to)
{
    /* The packs leave 4 dims of each token in each 128-bit half; the shuffle interleaves tokens. */
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
 * Rewriting the other tokens' bytes is no race: all tokens of a tile belong to one head, and a head
 * is appended to by one task at a time.
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
 * Four rows at a time are scaled and stored before the next: the caller's rows may be a power of
 * two apart, where 16 of them exceed the associativity of L1 and evict each other.
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
 * One token of V: its byte of each lane is shifted to the top and back down with sign extension.
 * The product with the scale is exact (7 by 11 bits), so there is no rounding to match.
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
