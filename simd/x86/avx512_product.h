/*
 * What the integer products of AVX-512 VNNI share: vpdpbusd, and the weights of V as digits.
 * avx512vnni.c has the 8-bit products, avx512_4bit.c those of 4 and 5 bits.
 */
#ifndef KVT_AVX512_PRODUCT_H
#define KVT_AVX512_PRODUCT_H

#include "simd/dither.h"
#include "avx512.h"

/* Lower bound of a row's largest magnitude, so that its reciprocal is finite. */
#define KVT_LEAST 0x1p-100f

/*
 * sum += the four products of each lane. Inline assembly, because for the intrinsic gcc 12 copies
 * the accumulator to another register and back, and then spills.
 */
KVT_INLINE __m512i kvt_dot(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
    return sum;
}

/* Four bytes of memory in each lane. */
KVT_INLINE __m512i kvt_broadcast(const unsigned char *four)
{
    int32_t x;
    memcpy(&x, four, sizeof x);
    return _mm512_set1_epi32(x);
}

/* ---- 4 and 5 bits ---- */

/* The low nibbles, and the high ones, as bytes. */
KVT_INLINE void kvt_unpack_nibbles(__m512i line, __m512i half[2])
{
    half[0] = _mm512_and_si512(line, _mm512_set1_epi8(15));
    half[1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), _mm512_set1_epi8(15));
}

/* fifth: a bit for each byte of half[0], then of half[1]. */
KVT_INLINE void kvt_add_fifths(const unsigned char *fifth, __m512i half[2])
{
    uint64_t masks[2];
    memcpy(masks, fifth, sizeof masks);
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++)
        half[i] = _mm512_mask_add_epi8(half[i], masks[i], half[i], _mm512_set1_epi8(16));
}

/* ---- reductions ---- */

enum { KVT_SUM, KVT_MAX, KVT_MIN_PS, KVT_MAX_PS }; /* the first two of int32 */

KVT_INLINE __m512i kvt_join(int how, __m512i a, __m512i b)
{
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    if (how == KVT_SUM)
        return _mm512_add_epi32(a, b);
    if (how == KVT_MAX)
        return _mm512_max_epi32(a, b);
    return _mm512_castps_si512(how == KVT_MIN_PS ? _mm512_min_ps(x, y) : _mm512_max_ps(x, y));
}

/* n registers, 8 or 16: lane i of the result joins all lanes of x[i]. */
KVT_INLINE __m512i kvt_reduce(int how, size_t n, const __m512i *x)
{
    __m512i y[8], z[4], w[2];
    KVT_UNROLL
    for (size_t i = 0; i < n / 2; i++)
        y[i] = kvt_join(how, _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]),
                        _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
    KVT_UNROLL
    for (size_t i = 0; i < n / 4; i++) /* lanes of 4 x */
        z[i] = kvt_join(how, _mm512_unpacklo_epi64(y[2 * i], y[2 * i + 1]),
                        _mm512_unpackhi_epi64(y[2 * i], y[2 * i + 1]));
    KVT_UNROLL
    for (size_t i = 0; i < n / 8; i++) /* two lanes of each z */
        w[i] = kvt_join(how, _mm512_shuffle_i32x4(z[2 * i], z[2 * i + 1], 0x44),
                        _mm512_shuffle_i32x4(z[2 * i], z[2 * i + 1], 0xee));
    return kvt_join(how, _mm512_shuffle_i32x4(w[0], w[n / 16], 0x88),
                    _mm512_shuffle_i32x4(w[0], w[n / 16], 0xdd));
}

/* ---- weights ---- */

/* Undoes the order that two levels of packs in 128-bit lanes leave: 4 vectors in turn. */
KVT_INLINE __m512i kvt_in_order(__m512i packed)
{
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
}

/* A row's rounded weights: 16 groups of 4 tokens, [digit][4] each. */
typedef struct kvt_pv_row {
    unsigned char digits[2 * KVT_TOKENS];
} kvt_pv_row;

/* The weights p * scale of a row; scale: kvt_load_scales. Returns the largest in 16 lanes. */
KVT_INLINE __m512 kvt_weigh(const float *p, const __m512 scale[4], __m512 w[4])
{
    KVT_UNROLL
    for (size_t v = 0; v < 4; v++)
        w[v] = _mm512_mul_ps(_mm512_load_ps(p + 16 * v), scale[v]);
    return _mm512_max_ps(_mm512_max_ps(w[0], w[1]), _mm512_max_ps(w[2], w[3]));
}

/* The largest digits, or two digits, are 255 and 65535. */
KVT_INLINE float kvt_weight_most(size_t digits)
{
    return digits == 2 ? 65535 : 255;
}

/* Weights as integer multiples of 1 / reciprocal: the most over the row's largest. One digit is
   dithered. */
KVT_INLINE void kvt_put_weights(size_t digits, const __m512 w[4], __m512 reciprocal,
                                kvt_pv_row *row)
{
    /* Bytes of two groups of 4 words: high, low, high, low. */
    const __m512i split =
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    __m512i x[4];
    KVT_UNROLL
    for (size_t v = 0; v < 4; v++)
        x[v] = _mm512_cvtps_epi32(
            digits == 2 ? _mm512_mul_ps(w[v], reciprocal)
                        : _mm512_fmadd_ps(w[v], reciprocal, _mm512_load_ps(kvt_dither + 16 * v)));
    /* A product that rounds to just above the most saturates. */
    x[0] = _mm512_packus_epi32(x[0], x[1]);
    x[1] = _mm512_packus_epi32(x[2], x[3]);
    if (digits == 2) {
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        KVT_UNROLL
        for (size_t v = 0; v < 2; v++)
            _mm512_storeu_si512(row->digits + 64 * v,
                                _mm512_permutexvar_epi64(order, _mm512_shuffle_epi8(x[v], split)));
    } else {
        _mm512_storeu_si512(row->digits, kvt_in_order(_mm512_packus_epi16(x[0], x[1])));
    }
}

/* The scales of V's tokens, zero beyond n_tokens. */
KVT_INLINE void kvt_load_scales(const uint16_t *scales, size_t n_tokens, __m512 *scale)
{
    KVT_UNROLL
    for (size_t v = 0; v < 4; v++) {
        __mmask16 alive = kvt_lanes_below(16 * v, n_tokens);
        scale[v] = _mm512_maskz_mov_ps(alive, kvt_load_f16(scales + 16 * v));
    }
}

/* ---- q of 4-bit K ---- */

/* Most rows of one call, and the largest digit. */
#define KVT_FOLD_ROWS 8
#define KVT_FOLD_MAX 127

/* Digits of up to 64 dims of rows: n vectors of products, zeros from there on. */
KVT_INLINE void kvt_fold_64(size_t rows, const float *q, size_t ldq, const uint16_t *scales,
                            size_t n, const float *reciprocals, unsigned char *digits,
                            size_t row_bytes, __m512i *sum)
{
    __m512 scale[4];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        scale[i] = i < n ? kvt_load_f16(scales + 16 * i) : _mm512_setzero_ps();
    KVT_UNROLL
    for (size_t r = 0; r < rows; r++) {
        const __m512 reciprocal = _mm512_set1_ps(reciprocals[r]);
        __m512i x[4], y;
        KVT_UNROLL
        for (size_t i = 0; i < 4; i++)
            x[i] = i < n ? _mm512_cvtps_epi32(_mm512_mul_ps(
                               _mm512_mul_ps(_mm512_load_ps(q + r * ldq + 16 * i), scale[i]),
                               reciprocal))
                         : _mm512_setzero_si512();
        y = kvt_in_order(
            _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])));
        _mm512_store_si512(digits + r * row_bytes, y);
        sum[r] = kvt_dot(sum[r], _mm512_set1_epi8(1), y);
    }
}

/*
 * Rows of q[d] * scales[d] as digits, multiples of a row's step: its largest magnitude over
 * KVT_FOLD_MAX. Rows are row_bytes apart, and every 64 dims of a row chunk_bytes. Lane r of step
 * and sum: row r's step, and the sum of its digits. rows is a constant of the callers.
 */
KVT_INLINE void kvt_fold(size_t rows, const float *q, size_t ldq, const uint16_t *scales,
                         size_t dims_p, unsigned char *digits, size_t row_bytes, size_t chunk_bytes,
                         __m512 *step, __m512i *sum)
{
    _Alignas(64) float reciprocals[16];
    __m512i most[KVT_FOLD_ROWS], sums[KVT_FOLD_ROWS];
    __m512 largest;
    size_t d = 0;
    KVT_UNROLL
    for (size_t r = 0; r < KVT_FOLD_ROWS; r++) {
        most[r] = _mm512_castps_si512(_mm512_set1_ps(KVT_LEAST));
        sums[r] = _mm512_setzero_si512();
    }
    for (; d < dims_p; d += 16) {
        const __m512 scale = kvt_load_f16(scales + d);
        KVT_UNROLL
        for (size_t r = 0; r < rows; r++) {
            __m512 x = _mm512_abs_ps(_mm512_mul_ps(_mm512_load_ps(q + r * ldq + d), scale));
            most[r] = _mm512_max_epi32(most[r], _mm512_castps_si512(x)); /* they order as bits */
        }
    }
    largest = _mm512_castsi512_ps(kvt_reduce(KVT_MAX, KVT_FOLD_ROWS, most));
    _mm512_store_ps(reciprocals, _mm512_div_ps(_mm512_set1_ps(KVT_FOLD_MAX), largest));
    for (d = 0; d + 64 <= dims_p; d += 64, digits += chunk_bytes)
        kvt_fold_64(rows, q + d, ldq, scales + d, 4, reciprocals, digits, row_bytes, sums);
    if (d < dims_p)
        kvt_fold_64(rows, q + d, ldq, scales + d, (dims_p - d) / 16, reciprocals, digits, row_bytes,
                    sums);
    /* Plus 0, or a NaN: then digits are of no use, and what they would make of a score either. */
    largest = _mm512_fmadd_ps(largest, _mm512_setzero_ps(), largest);
    *step = _mm512_div_ps(largest, _mm512_set1_ps(KVT_FOLD_MAX));
    *sum = kvt_reduce(KVT_SUM, KVT_FOLD_ROWS, sums);
}

#endif /* KVT_AVX512_PRODUCT_H */
