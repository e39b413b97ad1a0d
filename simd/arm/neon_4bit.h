/*
 * 4-bit K and 4- and 5-bit V as integer products, for the NEON instruction sets. neon_4bit.c,
 * dot.h (for dotprod.c and i8mm.c) and i8mm.c each define the inner product; the rest is here:
 * unpacking codes, rounding q and p to digits of a byte, the loops over tiles and blocks of rows,
 * applying the scales.
 *
 * K and V are one product, as those of neon_i8.h: 16 lanes, tokens of K or dims of V, four of which
 * are a quad. 64 bytes hold 8 summands of each lane, an octet, 4 bytes a lane: low nibbles are
 * summands 0 to 3, high ones 4 to 7. With digits for weights
 *
 *     total[row][lane] = sum over summands i of digit[row][i] * code(i, lane)
 *
 * What is multiplied is, by the form of the codes, with the value that it stands for in steps:
 *
 *     KVT_K4   the code, 0 .. 15                 2 * code - 15, in halves of a scale
 *     KVT_V4   its level, plus what a table adds  level
 *     KVT_V5   the code, 0 .. 31                 2 * code - 31
 *
 * The constants are taken out of a row's totals by `bias`, a multiple of the sum of its digits.
 *
 * A kind of product is, in the file that includes this one,
 *
 *   product_KIND  rows by quads totals of a form, from zero, over n summands (a multiple of 16).
 *                 Octets are `step` bytes apart, `fifth` (V5) holds the fifth bits of the first
 *                 octet's 16 lanes, step / 4 bytes from the next octet's, and `first` is the first
 *                 quad's place among its line's four. It prefetches the lines `ahead` of what it
 *                 reads.
 *   a kvt_store_digits, which lays out 16 digits as product_KIND reads them
 *
 * KVT_4BIT_BLOCK defines the blocks of rows. Integer sums are exact, so a row's result does not
 * depend on how rows are cut into blocks.
 */
#ifndef KVT_NEON_4BIT_H
#define KVT_NEON_4BIT_H

#include "simd/arm/neon_i8.h"
#include "simd/levels.h"

enum { KVT_K4, KVT_V4, KVT_V5 };

#define KVT_Q4_MOST 127

/* ---- codes ---- */

/* The levels of V plus `more`. */
KVT_INLINE uint8x16_t kvt_levels_plus(int8_t more)
{
    static const int8_t levels[16] = {KVT_V4_LEVELS};
    return vreinterpretq_u8_s8(vaddq_s8(vld1q_s8(levels), vdupq_n_s8(more)));
}

/* K4 and V4: summands 0 to 3 of four lanes, and 4 to 7. */
KVT_INLINE uint8x16_t kvt_low_codes(int form, uint8x16_t x, uint8x16_t levels)
{
    x = vandq_u8(x, vdupq_n_u8(15));
    return form == KVT_V4 ? vqtbl1q_u8(levels, x) : x;
}

KVT_INLINE uint8x16_t kvt_high_codes(int form, uint8x16_t x, uint8x16_t levels)
{
    x = vshrq_n_u8(x, 4);
    return form == KVT_V4 ? vqtbl1q_u8(levels, x) : x;
}

/*
 * V5: the two bytes of fifth bits of a quad, each for 8 lanes of bytes; add 8 for the other half.
 * They become all ones or zeros, which a shift merges with the nibbles.
 */
KVT_INLINE uint8x16_t kvt_fifth_of_quad(size_t quad)
{
    static const uint8_t two[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    return vaddq_u8(vld1q_u8(two), vdupq_n_u8((uint8_t)(2 * quad)));
}

KVT_INLINE uint8x16_t kvt_fifth_mask(uint8x16_t fifth, uint8x16_t of_quad)
{
    const uint8x16_t bits = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    return vtstq_u8(vqtbl1q_u8(fifth, of_quad), bits);
}

KVT_INLINE uint8x16_t kvt_low_codes_5(uint8x16_t x, uint8x16_t fifth, uint8x16_t of_quad)
{
    x = vsliq_n_u8(x, kvt_fifth_mask(fifth, of_quad), 4);
    return vandq_u8(x, vdupq_n_u8(31));
}

/* `swapped`: the halves of the fifth bits, so that of_quad is that of the low codes. */
KVT_INLINE uint8x16_t kvt_high_codes_5(uint8x16_t x, uint8x16_t swapped, uint8x16_t of_quad)
{
    x = vsriq_n_u8(kvt_fifth_mask(swapped, of_quad), x, 4);
    return vandq_u8(x, vdupq_n_u8(31));
}

/* ---- digits ---- */

/* 16 digits of `row`, one of `rows`, from summand i on, to a row of ld bytes. */
typedef void kvt_store_digits(uint8x16_t digits, unsigned char *to, size_t ld, size_t row,
                              size_t rows, size_t i);

/* Rows one after the other. */
KVT_INLINE void kvt_store_row_digits(uint8x16_t digits, unsigned char *to, size_t ld, size_t row,
                                     size_t rows, size_t i)
{
    (void)rows;
    vst1q_u8(to + row * ld + i, digits);
}

/* x times reciprocal, plus what is at `plus` (NULL: nothing), to nearest even, of which a byte is
   kept; a NaN becomes 0. */
KVT_INLINE uint8x16_t kvt_digits_16(const float *x, float reciprocal, const float *plus)
{
    int32x4_t a = kvt_code_4(x, reciprocal, plus);
    int32x4_t b = kvt_code_4(x + 4, reciprocal, plus ? plus + 4 : NULL);
    int32x4_t c = kvt_code_4(x + 8, reciprocal, plus ? plus + 8 : NULL);
    int32x4_t d = kvt_code_4(x + 12, reciprocal, plus ? plus + 12 : NULL);
    uint16x8_t ab = vuzp1q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
    uint16x8_t cd = vuzp1q_u16(vreinterpretq_u16_s32(c), vreinterpretq_u16_s32(d));
    return vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd));
}

/* The digits of n summands (a multiple of 16); their sum. Those of K are signed, those of V
   dithered. */
KVT_INLINE int32_t kvt_store_digits_of(int side, const float *x, float reciprocal, size_t n,
                                       unsigned char *to, size_t ld, size_t row, size_t rows,
                                       kvt_store_digits *store)
{
    int32x4_t sum = vdupq_n_s32(0);
    for (size_t i = 0; i < n; i += 16) {
        uint8x16_t digits = kvt_digits_16(x + i, reciprocal, side == KVT_K ? NULL : kvt_dither + i);
        sum = vpadalq_s16(sum, side == KVT_K ? vpaddlq_s8(vreinterpretq_s8_u8(digits))
                                             : vreinterpretq_s16_u16(vpaddlq_u8(digits)));
        store(digits, to, ld, row, rows, i);
    }
    return vaddvq_s32(sum);
}

/*
 * folded[row] = q * scale of n rows (1 or 4), and their largest magnitudes. Rows side by side share
 * the scales, and the latency of one row's maximum and division is that of all.
 */
KVT_INLINE void kvt_fold_q(size_t n, const float *q, size_t ldq, const float *scale, size_t dims_p,
                           float *folded, float *largest)
{
    float32x4_t most[8];
    KVT_UNROLL
    for (size_t r = 0; r < 2 * n; r++)
        most[r] = vdupq_n_f32(KVT_LEAST);
    for (size_t d = 0; d < dims_p; d += 8) {
        float32x4_t a = vld1q_f32(scale + d), b = vld1q_f32(scale + d + 4);
        KVT_UNROLL
        for (size_t r = 0; r < n; r++) {
            float32x4_t x = vmulq_f32(vld1q_f32(q + r * ldq + d), a);
            float32x4_t y = vmulq_f32(vld1q_f32(q + r * ldq + d + 4), b);
            vst1q_f32(folded + r * dims_p + d, x);
            vst1q_f32(folded + r * dims_p + d + 4, y);
            most[2 * r] = vmaxq_f32(most[2 * r], vabsq_f32(x));
            most[2 * r + 1] = vmaxq_f32(most[2 * r + 1], vabsq_f32(y));
        }
    }
    if (n == 4)
        vst1q_f32(largest,
                  vpmaxq_f32(vpmaxq_f32(vmaxq_f32(most[0], most[1]), vmaxq_f32(most[2], most[3])),
                             vpmaxq_f32(vmaxq_f32(most[4], most[5]), vmaxq_f32(most[6], most[7]))));
    else
        largest[0] = vmaxvq_f32(vmaxq_f32(most[0], most[1]));
}

/* ---- walking the tiles ---- */

/* What all blocks of a call share. */
typedef struct kvt_4bit_call {
    const unsigned char *weight; /* [rows][ldw] digits */
    size_t ldw;
    const float *step;   /* [rows]: what a unit of the totals is worth */
    const int32_t *bias; /* [rows] */
    const unsigned char *codes;
    size_t n; /* summands: padded dims of K; tokens of V, a multiple of 16, digits in excess zero */
    size_t dims_p;
    const float *alpha; /* V */
    float *out;         /* scores, or acc */
    size_t ldout;
} kvt_4bit_call;

typedef void kvt_4bit_block(const kvt_4bit_call *call, size_t row, size_t lane, size_t end,
                            uintptr_t ahead);

KVT_INLINE float32x4_t kvt_4bit_total(const kvt_4bit_call *call, int twice, size_t row,
                                      int32x4_t total)
{
    total = twice ? vshlq_n_s32(total, 1) : total;
    return vmulq_n_f32(vcvtq_f32_s32(vaddq_s32(total, vdupq_n_s32(call->bias[row]))),
                       call->step[row]);
}

/* Scores of one row and quad. */
KVT_INLINE void kvt_4bit_score(const kvt_4bit_call *call, size_t row, size_t token, int32x4_t total)
{
    vst1q_f32(call->out + row * KVT_TOKENS + token, kvt_4bit_total(call, 1, row, total));
}

/* acc = acc * alpha + total of one row and quad. */
KVT_INLINE void kvt_4bit_accumulate(const kvt_4bit_call *call, size_t row, size_t dim,
                                    float32x4_t total)
{
    float *acc = call->out + row * call->ldout + dim;
    vst1q_f32(acc, vfmaq_n_f32(total, vld1q_f32(acc), call->alpha[row]));
}

KVT_INLINE void kvt_4bit_add_i4(const kvt_4bit_call *call, size_t row, size_t dim, int32x4_t total)
{
    kvt_4bit_accumulate(call, row, dim, kvt_4bit_total(call, 0, row, total));
}

KVT_INLINE void kvt_4bit_add_i5(const kvt_4bit_call *call, size_t row, size_t dim, int32x4_t total)
{
    kvt_4bit_accumulate(call, row, dim, kvt_4bit_total(call, 1, row, total));
}

/*
 * The blocks of a kind for `rows` rows and 4 * `quads` lanes (K4; V4 and V5 have theirs). The first
 * block of rows prefetches, the first quads of a line all of it.
 */
#define KVT_4BIT_BLOCK(kind, rows, quads, quads_v4, quads_v5)                                      \
    KVT_BLOCK_OF_ROWS void qk_i4_##rows(const kvt_4bit_call *call, size_t row, size_t token,       \
                                        size_t end, uintptr_t ahead)                               \
    {                                                                                              \
        for (; token < end; token += 4 * (quads)) {                                                \
            int32x4_t total[16];                                                                   \
            product_##kind(KVT_K4, rows, quads,                                                    \
                           call->codes + kvt_k4_index(token, 0, call->dims_p), 64, call->n, NULL,  \
                           0, call->weight + row * call->ldw, call->ldw,                           \
                           kvt_i8_ahead(0, quads, token, 64, ahead), total);                       \
            KVT_I8_TOTALS(kvt_4bit_score, rows, quads, token)                                      \
        }                                                                                          \
    }                                                                                              \
    KVT_4BIT_BLOCK_OF_V(kind, i4, KVT_V4, rows, quads_v4)                                          \
    KVT_4BIT_BLOCK_OF_V(kind, i5, KVT_V5, rows, quads_v5)

#define KVT_4BIT_BLOCK_OF_V(kind, type, form, rows, quads)                                         \
    KVT_BLOCK_OF_ROWS void pv_##type##_##rows(const kvt_4bit_call *call, size_t row, size_t dim,   \
                                              size_t end, uintptr_t ahead)                         \
    {                                                                                              \
        const unsigned char *fifth = call->codes + call->dims_p * (KVT_TOKENS / 2);                \
        for (; dim < end; dim += 4 * (quads)) {                                                    \
            int32x4_t total[16];                                                                   \
            product_##kind(form, rows, quads, call->codes + dim * 4, call->dims_p * 4, call->n,    \
                           fifth + dim / 16 * 16, dim % 16 / 4, call->weight + row * call->ldw,    \
                           call->ldw, kvt_i8_ahead(0, quads, dim, call->dims_p * 4, ahead),        \
                           total);                                                                 \
            KVT_I8_TOTALS(kvt_4bit_add_##type, rows, quads, dim)                                   \
        }                                                                                          \
    }

/* Rows of the next block: kvt_rows_of_block, but all blocks except the last are of whole units. */
KVT_INLINE size_t kvt_units_of_block(size_t left, size_t most, size_t unit)
{
    size_t n = kvt_round_up(kvt_rows_of_block(left, most), unit);
    return n < left ? n : left;
}

/*
 * The kernels of a kind: its blocks by rows, of up to `most` rows, which is a multiple of `unit`,
 * the rows whose digits are stored together. Tiles (columns of 16 dims) outside, rows inside: a
 * tile is read from memory once.
 */
KVT_INLINE void kvt_qk_i4(const float *q, size_t ldq, size_t rows, const void *codes,
                          const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                          float *s, kvt_4bit_block *const *blocks, size_t most, size_t unit,
                          kvt_store_digits *store)
{
    unsigned char digits[KVT_ROWS_MAX * KVT_DIMS_MAX] __attribute__((aligned(64)));
    float scale[KVT_DIMS_MAX], folded[4 * KVT_DIMS_MAX], step[KVT_ROWS_MAX];
    int32_t bias[KVT_ROWS_MAX];
    const uintptr_t ahead = kvt_ahead(codes, next);
    const kvt_4bit_call call = {.weight = digits,
                                .ldw = dims_p,
                                .step = step,
                                .bias = bias,
                                .codes = codes,
                                .n = dims_p,
                                .dims_p = dims_p,
                                .out = s};
    for (size_t d = 0; d < dims_p; d += 4)
        vst1q_f32(scale + d, kvt_load_f16x4(scales + d));
    for (size_t row = 0, n; row < rows; row += n) {
        float largest[4];
        n = rows - row < 4 ? 1 : 4;
        if (n == 4)
            kvt_fold_q(4, q + row * ldq, ldq, scale, dims_p, folded, largest);
        else
            kvt_fold_q(1, q + row * ldq, ldq, scale, dims_p, folded, largest);
        for (size_t r = 0; r < n; r++) {
            step[row + r] = largest[r] / (2 * KVT_Q4_MOST);
            bias[row + r] =
                -15 * kvt_store_digits_of(KVT_K, folded + r * dims_p, KVT_Q4_MOST / largest[r],
                                          dims_p, digits, dims_p, row + r, rows, store);
        }
    }
    for (size_t token = 0; token < n_tokens; token += KVT_TILE_TOKENS) {
        size_t left = n_tokens - token;
        size_t end = token + (left < KVT_TILE_TOKENS ? left : KVT_TILE_TOKENS);
        for (size_t row = 0, n; row < rows; row += n) {
            n = kvt_units_of_block(rows - row, most, unit);
            blocks[n](&call, row, token, end, row ? 0 : ahead);
        }
    }
}

/* p_most: the largest digit. bias: what corrects a total, for each unit of the digits' sum. */
KVT_INLINE void kvt_pv_4bit(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                            size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                            float *acc, size_t ldacc, float p_most, int32_t of_sum,
                            kvt_4bit_block *const *blocks, size_t most, size_t unit,
                            kvt_store_digits *store)
{
    unsigned char digits[KVT_ROWS_MAX * KVT_TOKENS] __attribute__((aligned(64)));
    float step[KVT_ROWS_MAX], scale[KVT_TOKENS], x[KVT_TOKENS];
    int32_t bias[KVT_ROWS_MAX];
    const size_t n = kvt_round_up(n_tokens, 16), span = rows <= most ? dims_p : 16;
    const uintptr_t ahead = kvt_ahead(codes, next);
    const kvt_4bit_call call = {.weight = digits,
                                .ldw = KVT_TOKENS,
                                .step = step,
                                .bias = bias,
                                .codes = codes,
                                .n = n,
                                .dims_p = dims_p,
                                .alpha = alpha,
                                .out = acc,
                                .ldout = ldacc};
    kvt_live_scales(scales, n_tokens, scale);
    for (size_t r = 0; r < rows; r++) {
        float largest = kvt_scale_weights(p + r * KVT_TOKENS, scale, n, x);
        step[r] = largest / p_most;
        bias[r] = of_sum * kvt_store_digits_of(KVT_V, x, p_most / largest, n, digits, KVT_TOKENS, r,
                                               rows, store);
    }
    for (size_t dim = 0; dim < dims_p; dim += span)
        for (size_t row = 0, count; row < rows; row += count) {
            count = kvt_units_of_block(rows - row, most, unit);
            blocks[count](&call, row, dim, dim + span, row ? 0 : ahead);
        }
}

/*
 * The three kernels of an instruction set, of that linkage and prefix; bias_v4 and bias_v5: what
 * corrects V's totals. BLOCKS(product) is the including file's table of blocks, by rows.
 */
#define KVT_4BIT_KERNELS(linkage, prefix, p_most, bias_v4, bias_v5, most, unit, store)             \
    linkage void prefix##qk_i4_near(const float *q, size_t ldq, size_t rows, const void *codes,    \
                                    const uint16_t *scales, size_t n_tokens, size_t dims_p,        \
                                    const void *next, float *s)                                    \
    {                                                                                              \
        static kvt_4bit_block *const blocks[] = BLOCKS(qk_i4);                                     \
        kvt_qk_i4(q, ldq, rows, codes, scales, n_tokens, dims_p, next, s, blocks, most, unit,      \
                  store);                                                                          \
    }                                                                                              \
    KVT_4BIT_PV(linkage, prefix##pv_i4_near, p_most, bias_v4, BLOCKS(pv_i4), most, unit, store)    \
    KVT_4BIT_PV(linkage, prefix##pv_i5_near, p_most, bias_v5, BLOCKS(pv_i5), most, unit, store)

#define KVT_4BIT_PV(linkage, name, p_most, bias, table, most, unit, store)                         \
    linkage void name(const float *p, size_t rows, const void *codes, const uint16_t *scales,      \
                      size_t n_tokens, size_t dims_p, const float *alpha, const void *next,        \
                      float *acc, size_t ldacc)                                                    \
    {                                                                                              \
        static kvt_4bit_block *const blocks[] = table;                                             \
        kvt_pv_4bit(p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc, p_most,     \
                    bias, blocks, most, unit, store);                                              \
    }

#endif /* KVT_NEON_4BIT_H */
