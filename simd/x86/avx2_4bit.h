/*
 * What products of 256-bit vectors over 4-bit K and 4- and 5-bit V share (avx2_4bit.c, avxvnni.c):
 * rows as digits of one byte, unpacked codes, and the blocks around a product. How bytes are
 * multiplied is the file's own: it defines kvt_product_k4 and kvt_product_v4.
 *
 * 32 bytes of codes are 8 tokens by 8 dims (K) or 8 dims by 8 tokens (V): the low nibbles are the
 * first four summands of each 32-bit lane, the high ones the other four. A mask, or a shift and a
 * mask, makes bytes of them; those of V become levels by a shuffle, or the fifth bits are added.
 *
 *   K  the code as it is, 0 to 15, times signed digits of q: a score is
 *      step * (2 * sum(digit * code) - 15 * sum(digit))
 *   V  unsigned digits of p times the level, within +-63; of 5 bits times code - 16, -16 to 15,
 *      where the code stands for 2 * (code - 16) + 1
 *
 * Integer sums are exact, so a result does not depend on the order or on the shape of a block.
 */
#ifndef KVT_AVX2_4BIT_H
#define KVT_AVX2_4BIT_H

#include "avx2_product.h"
#include "simd/dither.h"
#include "simd/levels.h"

/* Lower bound of a row's largest magnitude, so that its reciprocal is finite. */
#define KVT_LEAST 0x1p-100f
#define KVT_Q4_MAX 127.0f

enum { KVT_V4, KVT_V5 };

/* ---- rows as digits ---- */

/*
 * 32 numbers as bytes. They leave the packs by fours: 0 2 4 6 of them, then 1 3 5 7. x: within
 * int8 after rounding, or a NaN, which becomes -128.
 */
KVT_INLINE __m256i kvt_round_32(__m256 a, __m256 b, __m256 c, __m256 d)
{
    return _mm256_packs_epi16(_mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)),
                              _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d)));
}

/*
 * The digits of q. Four dims are an int32. Of 32 dims the first four of each eight come first, and
 * then the second ones, as kvt_round_32 leaves them.
 */
typedef struct kvt_digits_q {
    _Alignas(32) int32_t fours[KVT_ROWS_MAX * KVT_DIMS_MAX / 4];
    float step[KVT_ROWS_MAX];
    int32_t bias[KVT_ROWS_MAX]; /* -15 times the sum of the digits */
} kvt_digits_q;

KVT_INLINE size_t kvt_digits_ldw(size_t dims_p)
{
    return kvt_round_up(dims_p, 32) / 4;
}

/* Rows that are folded together, so that the latencies of one overlap those of the others. */
#define KVT_FOLD_ROWS 4
#define KVT_EACH_FOLD(X) X(0) X(1) X(2) X(3)

/* Lane i: the largest lane of x[i], as integers, which order as magnitudes do. */
KVT_INLINE __m128i kvt_largest_of_4(const __m256i x[4])
{
    __m256i a =
        _mm256_max_epi32(_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
    __m256i b =
        _mm256_max_epi32(_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
    a = _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    return _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

/* Lane i: the sum of the lanes of x[i]. */
KVT_INLINE __m128i kvt_sum_of_4(const __m256i x[4])
{
    __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

/* q times the scales of its dims, rounded: up to four rows from `row` on. */
KVT_INLINE void kvt_fold_rows(size_t rows, const float *q, size_t ldq, size_t row,
                              const uint16_t *scales, size_t dims_p, float *folded,
                              kvt_digits_q *out)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    const __m256i least = _mm256_castps_si256(_mm256_set1_ps(KVT_LEAST));
    const __m256 zero = _mm256_setzero_ps();
    __m256i most[KVT_FOLD_ROWS] = {least, least, least, least};
    __m256i total[KVT_FOLD_ROWS] = {0};
    float reciprocals[KVT_FOLD_ROWS];
    __m128 largest;
    for (size_t d = 0; d < dims_p; d += 8) {
        const __m256 scale = _mm256_cvtph_ps(kvt_load_128(scales + d));
#define FOLD(r)                                                                                    \
    if ((r) < rows) {                                                                              \
        __m256 x = _mm256_mul_ps(scale, _mm256_loadu_ps(q + (row + (r)) * ldq + d));               \
        _mm256_store_ps(folded + (r)*dims_p + d, x);                                               \
        most[r] = _mm256_max_epi32(most[r], _mm256_and_si256(_mm256_castps_si256(x), magnitude));  \
    }
        KVT_EACH_FOLD(FOLD)
#undef FOLD
    }
    largest = _mm_castsi128_ps(kvt_largest_of_4(most));
    _mm_storeu_ps(reciprocals, _mm_div_ps(_mm_set1_ps(KVT_Q4_MAX), largest));
    /* Plus 0, or a NaN: then digits are of no use, and what they would make of a score either. */
    largest = _mm_fmadd_ps(largest, _mm_setzero_ps(), largest);
    _mm_storeu_ps(out->step + row, _mm_div_ps(largest, _mm_set1_ps(2.0f * KVT_Q4_MAX)));
#define ROUND(r)                                                                                   \
    if ((r) < rows) {                                                                              \
        const __m256 reciprocal = _mm256_broadcast_ss(reciprocals + (r));                          \
        const float *from = folded + (r)*dims_p;                                                   \
        unsigned char *to = (unsigned char *)(out->fours + (row + (r)) * kvt_digits_ldw(dims_p));  \
        for (size_t d = 0; d < dims_p; d += 32) {                                                  \
            const __m256 a = _mm256_mul_ps(_mm256_load_ps(from + d), reciprocal);                  \
            const __m256 b = _mm256_mul_ps(_mm256_load_ps(from + d + 8), reciprocal);              \
            __m256 x = zero, y = zero;                                                             \
            __m256i digits;                                                                        \
            if (d + 16 < dims_p) {                                                                 \
                x = _mm256_mul_ps(_mm256_load_ps(from + d + 16), reciprocal);                      \
                y = _mm256_mul_ps(_mm256_load_ps(from + d + 24), reciprocal);                      \
            }                                                                                      \
            digits = kvt_round_32(a, b, x, y);                                                     \
            kvt_store_256(to + d, digits);                                                         \
            /* Pairs, 32 times: within +-8128. */                                                  \
            total[r] =                                                                             \
                _mm256_add_epi16(total[r], _mm256_maddubs_epi16(_mm256_set1_epi8(1), digits));     \
        }                                                                                          \
        total[r] = _mm256_madd_epi16(total[r], _mm256_set1_epi16(-15));                            \
    }
    KVT_EACH_FOLD(ROUND)
#undef ROUND
    kvt_store_128(out->bias + row, kvt_sum_of_4(total));
}

KVT_INLINE void kvt_fold_q(const float *q, size_t ldq, size_t rows, const uint16_t *scales,
                           size_t dims_p, kvt_digits_q *out)
{
    _Alignas(32) float folded[KVT_FOLD_ROWS * KVT_DIMS_MAX];
    size_t row = 0;
    for (; row + 4 <= rows; row += 4)
        kvt_fold_rows(4, q, ldq, row, scales, dims_p, folded, out);
    switch (rows - row) {
    case 3: kvt_fold_rows(3, q, ldq, row, scales, dims_p, folded, out); break;
    case 2: kvt_fold_rows(2, q, ldq, row, scales, dims_p, folded, out); break;
    case 1: kvt_fold_rows(1, q, ldq, row, scales, dims_p, folded, out); break;
    default: break;
    }
}

/* The digits of p times scale, in the order of the tokens. */
typedef struct kvt_digits_p {
    _Alignas(32) int32_t fours[KVT_ROWS_MAX * KVT_TOKENS / 4];
    float step[KVT_ROWS_MAX];
    int32_t bias[KVT_ROWS_MAX]; /* 5 bits: the sum of the digits */
} kvt_digits_p;

/*
 * A weight that is NaN never becomes the maximum, and becomes zero by saturation: of logits beyond
 * f32, and beyond n_tokens, where p is zero and the scale may be a NaN. limit: the largest digit,
 * at most 255.
 */
KVT_INLINE void kvt_round_p(int format, float limit, const float *p, size_t rows,
                            const uint16_t *scales, size_t n_tokens, kvt_digits_p *out)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const size_t n = kvt_round_up(n_tokens, 32);
    _Alignas(32) float factors[KVT_TOKENS];
    for (size_t t = 0; t < n; t += 8)
        _mm256_store_ps(factors + t, _mm256_cvtph_ps(kvt_load_128(scales + t)));
    for (size_t r = 0; r < rows; r++, p += KVT_TOKENS) {
        __m256 maxima = _mm256_set1_ps(KVT_LEAST), reciprocal;
        __m256i total = _mm256_setzero_si256();
        float largest;
#define WEIGHT(i) _mm256_mul_ps(_mm256_loadu_ps(p + t + (i)), _mm256_load_ps(factors + t + (i)))
        for (size_t t = 0; t < n; t += 8)
            maxima = _mm256_max_ps(WEIGHT(0), maxima);
        largest = kvt_max_lanes(maxima);
        reciprocal = _mm256_set1_ps(limit / largest);
        out->step[r] = largest / limit;
#define ROUND(i)                                                                                   \
    _mm256_cvtps_epi32(_mm256_fmadd_ps(WEIGHT(i), reciprocal, _mm256_load_ps(kvt_dither + t + (i))))
        for (size_t t = 0; t < n; t += 32) {
            __m256i x = _mm256_packus_epi16(_mm256_packs_epi32(ROUND(0), ROUND(8)),
                                            _mm256_packs_epi32(ROUND(16), ROUND(24)));
            kvt_store_256(out->fours + (r * KVT_TOKENS + t) / 4,
                          _mm256_permutevar8x32_epi32(x, order));
            if (format == KVT_V5)
                total = _mm256_add_epi64(total, _mm256_sad_epu8(x, _mm256_setzero_si256()));
        }
#undef ROUND
#undef WEIGHT
        if (format == KVT_V5) {
            int32_t lanes[8];
            kvt_store_256(lanes, total);
            out->bias[r] = lanes[0] + lanes[2] + lanes[4] + lanes[6];
        }
    }
}

/* ---- codes ---- */

KVT_INLINE __m256i kvt_nibbles(__m256i codes, int half)
{
    if (half)
        codes = _mm256_srli_epi16(codes, 4);
    return _mm256_and_si256(codes, _mm256_set1_epi8(15));
}

/* Where bit i is zero, byte i is all ones, else zero. */
KVT_INLINE __m256i kvt_bytes_without(const unsigned char *bits)
{
    const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                          2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201u);
    int32_t x;
    memcpy(&x, bits, sizeof x);
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(x), byte), bit),
                             _mm256_setzero_si256());
}

/*
 * Half an octet of tokens as bytes: levels, or codes of 5 bits less 16, which are the nibble with
 * ones above it where the fifth bit is zero. bits: those of these 8 dims.
 */
KVT_INLINE __m256i kvt_v4_bytes(int format, __m256i codes, int half, const unsigned char *bits)
{
    const __m256i levels = _mm256_setr_epi8(KVT_V4_LEVELS, KVT_V4_LEVELS);
    __m256i above;
    if (format == KVT_V4)
        return _mm256_shuffle_epi8(levels, kvt_nibbles(codes, half));
    above = kvt_bytes_without(bits + half * 8);
    return _mm256_or_si256(kvt_nibbles(codes, half),
                           _mm256_andnot_si256(_mm256_set1_epi8(15), above));
}

/* ---- the product ---- */

/*
 * What a product reads: pairs of vectors pair_bytes apart, n groups of 8 summands step bytes apart.
 * Of 5 bits, `bits` are those of the first 16 dims, bits_step bytes from one group to the next.
 */
typedef struct kvt_operands {
    const unsigned char *codes;
    size_t pair_bytes, step, n;
    const int32_t *weight;
    size_t ldw;
    const unsigned char *bits;
    size_t bits_step;
} kvt_operands;

/* All sums of a block, from zero: sum[r * vectors + v]. */
KVT_INLINE void kvt_product_k4(size_t rows, size_t vectors, const kvt_operands *o,
                               kvt_prefetch_state prefetch, __m256i *sum);
KVT_INLINE void kvt_product_v4(int format, size_t rows, size_t vectors, const kvt_operands *o,
                               kvt_prefetch_state prefetch, __m256i *sum);

/* Vectors of a block of so many rows, 8 tokens (K, up to 6 rows) or dims (V, up to 8) each. */
#define KVT_VECTORS_K4(rows) ((rows) <= 2 ? 4 : 2)
#define KVT_VECTORS_V4(rows) ((rows) <= 2 ? 4 : (rows) <= 4 ? 2 : 1)
/* Pairs of V's vectors share the load of a weight; one or two rows keep theirs in registers. */
#define KVT_PAIRS_V4(rows) ((rows) == 3 || (rows) == 4)
#define KVT_EACH_ROW_V4(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define KVT_EACH_SUM_V4(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

/*
 * Lines are prefetched twice whatever the rows: a product is short, and a line that was dropped
 * would not be there in time. That the prefetch waits for codes is no gain.
 */
#define KVT_WORK_4BIT ((size_t)2 * KVT_PREFETCH_TWICE)

/* ---- scores ---- */

/* What all blocks of one call share. */
typedef struct kvt_qk4_call {
    const kvt_digits_q *q;
    const unsigned char *codes;
    size_t dims_p;
    kvt_sides sides;
    float *s;
} kvt_qk4_call;

/* 8 * vectors tokens from `token` on, of the rows from `row` on. */
KVT_INLINE void kvt_qk4_block(size_t rows, size_t vectors, const kvt_qk4_call *call, size_t row,
                              size_t token)
{
    const size_t ldw = kvt_digits_ldw(call->dims_p), tile_bytes = call->dims_p * 8;
    const kvt_operands o = {call->codes + token / KVT_TILE_TOKENS * tile_bytes,
                            tile_bytes,
                            64,
                            call->dims_p / 8,
                            call->q->fours + row * ldw,
                            ldw,
                            NULL,
                            0};
    float *s = call->s + row * KVT_TOKENS + token;
    __m256i sum[KVT_SUMS_MAX];
    kvt_product_k4(rows, vectors, &o,
                   kvt_prefetch_begin(&call->sides, row, token * call->dims_p / 2, KVT_WORK_4BIT),
                   sum);
#define STORE(i)                                                                                   \
    if ((i) < rows * vectors) {                                                                    \
        __m256i bias = _mm256_set1_epi32(call->q->bias[row + (i) / vectors]);                      \
        __m256i x = _mm256_add_epi32(_mm256_add_epi32(sum[i], sum[i]), bias);                      \
        _mm256_storeu_ps(s + (i) / vectors * KVT_TOKENS + (i) % vectors * 8,                       \
                         _mm256_mul_ps(_mm256_cvtepi32_ps(x),                                      \
                                       _mm256_broadcast_ss(call->q->step + row + (i) / vectors))); \
    }
    KVT_EACH_SUM(STORE)
#undef STORE
}

#define KVT_QK4_ROWS(rows)                                                                         \
    static __attribute__((noinline)) void qk4_##rows(const kvt_qk4_call *call, size_t row,         \
                                                     size_t token, size_t end)                     \
    {                                                                                              \
        for (; token < end; token += 8 * KVT_VECTORS_K4(rows))                                     \
            kvt_qk4_block(rows, KVT_VECTORS_K4(rows), call, row, token);                           \
    }

/* 32 tokens (the widest block) outside, rows inside: the codes stay in L1. */
#define KVT_QK4_KERNEL(linkage, name)                                                              \
    KVT_QK4_ROWS(1)                                                                                \
    KVT_QK4_ROWS(2)                                                                                \
    KVT_QK4_ROWS(3)                                                                                \
    KVT_QK4_ROWS(4)                                                                                \
    KVT_QK4_ROWS(5)                                                                                \
    KVT_QK4_ROWS(6)                                                                                \
    linkage void name(const float *q, size_t ldq, size_t rows, const void *codes,                  \
                      const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,    \
                      float *s)                                                                    \
    {                                                                                              \
        static void (*const blocks[])(const kvt_qk4_call *, size_t, size_t,                        \
                                      size_t) = {NULL, qk4_1, qk4_2, qk4_3, qk4_4, qk4_5, qk4_6};  \
        kvt_digits_q digits;                                                                       \
        const kvt_qk4_call call = {&digits, codes, dims_p, {next, codes, 32 * dims_p}, s};         \
        /* next: K's scales and offset, V's scales, and then as many codes as K's */               \
        kvt_fold_q(q, ldq, rows, scales, dims_p, &digits);                                         \
        for (size_t token = 0; token < n_tokens; token += 32) {                                    \
            size_t left = n_tokens - token, end = token + (left < 32 ? left : 32);                 \
            for (size_t row = 0, n; row < rows; row += n) {                                        \
                n = kvt_rows_of_block(rows - row);                                                 \
                blocks[n](&call, row, token, end);                                                 \
            }                                                                                      \
        }                                                                                          \
    }

/* ---- weighted sums ---- */

typedef struct kvt_pv4_call {
    const kvt_digits_p *p;
    const unsigned char *codes;
    size_t n_tokens, dims_p;
    const float *alpha;
    kvt_sides sides;
    float *acc;
    size_t ldacc;
} kvt_pv4_call;

/* 8 * vectors dims from `dim` on, of the rows from `row` on. */
KVT_INLINE void kvt_pv4_block(int format, size_t rows, size_t vectors, const kvt_pv4_call *call,
                              size_t row, size_t dim)
{
    const kvt_operands o = {call->codes + dim * 4,
                            64,
                            call->dims_p * 4,
                            (call->n_tokens + 15) / 16 * 2,
                            call->p->fours + row * KVT_TOKENS / 4,
                            KVT_TOKENS / 4,
                            call->codes + kvt_v5_index(0, dim, call->dims_p),
                            call->dims_p};
    float *acc = call->acc + row * call->ldacc + dim;
    __m256i sum[KVT_SUMS_MAX];
    kvt_product_v4(format, rows, vectors, &o,
                   kvt_prefetch_begin(&call->sides, row, dim * KVT_TOKENS / 2, KVT_WORK_4BIT), sum);
    if (format == KVT_V5 && row == 0 && call->sides.next)
        for (size_t i = 0; i < vectors; i++) /* the fifth bits, a line for 8 dims */
            _mm_prefetch((const char *)call->sides.next + call->sides.side_bytes + dim * 8 + i * 64,
                         _MM_HINT_T1);
#define ADD(i)                                                                                     \
    if ((i) < rows * vectors) {                                                                    \
        const size_t r = row + (i) / vectors;                                                      \
        float *to = acc + (i) / vectors * call->ldacc + (i) % vectors * 8;                         \
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(to), _mm256_broadcast_ss(call->alpha + r));       \
        __m256i total = sum[i];                                                                    \
        if (format == KVT_V5)                                                                      \
            total = _mm256_add_epi32(_mm256_add_epi32(total, total),                               \
                                     _mm256_set1_epi32(call->p->bias[r]));                         \
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total),                            \
                                             _mm256_broadcast_ss(call->p->step + r), x));          \
    }
    KVT_EACH_SUM_V4(ADD)
#undef ADD
}

/* As many dims as the wide block divides, the rest 16 at a time. */
#define KVT_PV4_ROWS(format, rows)                                                                 \
    static __attribute__((noinline)) void pv4_##format##_##rows(                                   \
        const kvt_pv4_call *call, size_t row, size_t dim, size_t end)                              \
    {                                                                                              \
        for (; dim + 8 * KVT_VECTORS_V4(rows) <= end; dim += 8 * KVT_VECTORS_V4(rows))             \
            kvt_pv4_block(format, rows, KVT_VECTORS_V4(rows), call, row, dim);                     \
        for (; KVT_VECTORS_V4(rows) > 2 && dim < end; dim += 16)                                   \
            kvt_pv4_block(format, rows, 2, call, row, dim);                                        \
    }

/*
 * 128 dims of all tokens, 4 or 5 KiB, outside, rows inside: the codes stay in L1. most: rows of a
 * block, up to 8: the more share an unpacked vector, the more loads of weights. limit: see
 * kvt_round_p.
 */
#define KVT_PV4_KERNEL(linkage, name, format, most, limit)                                         \
    KVT_PV4_ROWS(format, 1)                                                                        \
    KVT_PV4_ROWS(format, 2)                                                                        \
    KVT_PV4_ROWS(format, 3)                                                                        \
    KVT_PV4_ROWS(format, 4)                                                                        \
    KVT_PV4_ROWS(format, 5)                                                                        \
    KVT_PV4_ROWS(format, 6)                                                                        \
    KVT_PV4_ROWS(format, 7)                                                                        \
    KVT_PV4_ROWS(format, 8)                                                                        \
    linkage void name(const float *p, size_t rows, const void *codes, const uint16_t *scales,      \
                      size_t n_tokens, size_t dims_p, const float *alpha, const void *next,        \
                      float *acc, size_t ldacc)                                                    \
    {                                                                                              \
        static void (*const blocks[])(const kvt_pv4_call *, size_t, size_t,                        \
                                      size_t) = {NULL,                                             \
                                                 pv4_##format##_1,                                 \
                                                 pv4_##format##_2,                                 \
                                                 pv4_##format##_3,                                 \
                                                 pv4_##format##_4,                                 \
                                                 pv4_##format##_5,                                 \
                                                 pv4_##format##_6,                                 \
                                                 pv4_##format##_7,                                 \
                                                 pv4_##format##_8};                                \
        kvt_digits_p digits;                                                                       \
        const kvt_sides sides = {next, codes, 32 * dims_p};                                        \
        const kvt_pv4_call call = {&digits, codes, n_tokens, dims_p, alpha, sides, acc, ldacc};    \
        kvt_round_p(format, limit, p, rows, scales, n_tokens, &digits);                            \
        for (size_t dim = 0; dim < dims_p; dim += 128) {                                           \
            size_t left = dims_p - dim, end = dim + (left < 128 ? left : 128);                     \
            for (size_t row = 0, n; row < rows; row += n) {                                        \
                size_t cuts = (rows - row + (most)-1) / (most);                                    \
                n = (rows - row + cuts - 1) / cuts;                                                \
                blocks[n](&call, row, dim, end);                                                   \
            }                                                                                      \
        }                                                                                          \
    }

#endif /* KVT_AVX2_4BIT_H */
