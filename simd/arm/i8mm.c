/*
 * NEON with matrix products of int8 (armv8.2-a+i8mm): the near kernels of i8, and of 4 and 5 bits.
 *
 * `smmla` multiplies two rows of 8 bytes by two columns of 8, twice what `sdot` does. The rows are
 * two lanes of a tile's quad, the columns the high and the low digits of one row's codes (the
 * digits are dotprod.c's), so that one instruction does both digits of 8 summands for two lanes:
 *
 *     even: lanes 0 and 2    [ lane 0 . high   lane 0 . low   lane 2 . high   lane 2 . low ]
 *     odd:  lanes 1 and 3    likewise
 *
 * A lane's 8 summands are in two groups of 4, 64 bytes apart or more; a transpose joins them, once
 * for all rows of a block, and another at the end separates high from low. For 32 bytes of codes
 * and r rows that is 2 + 2r instructions where dotprod.c has 4r: the same for one row, 1.6 times
 * fewer for four, 1.8 for eight.
 *
 * Fast is inherited from dotprod.c: one digit by `sdot` is 2r instructions.
 *
 * Overflow: as in dotprod.c, a sum of digit products stays below 2^24, a total below 2^31.
 */
#include "simd/arm/dot.h"

#define Q_MOST_near 16383
#define P_MOST_near 32639
#define BYTES_near 2
#define SHARES_near 0

/* 8 summands at a time: their high digits, their low ones. */
KVT_INLINE void store_near(int16x8x2_t x, unsigned char *to)
{
    for (size_t i = 0; i < 2; i++) {
        /* (x + 128) >> 8 is what is left above the signed low digit. */
        int8x16_t both = vcombine_s8(vrshrn_n_s16(x.val[i], 8), vmovn_s16(x.val[i]));
        vst1q_u8(to + 16 * i, vreinterpretq_u8_s8(both));
    }
}

/* Sum i is of row i / quads and quad i % quads. */
KVT_INLINE void product_near(int side, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *weight, size_t ldw,
                             uintptr_t ahead, int32x4_t *total)
{
    int32x4_t even[16], odd[16];
    (void)side; /* signed digits serve both */
#define ZERO(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        even[i] = odd[i] = vdupq_n_s32(0);
    KVT_EACH_16(ZERO)
#undef ZERO
    for (size_t i = 0; i < n; i += 8) {
        int32x4_t a[8], b[8];
        int8x16_t x[8], y[8], w[8];
#define LOAD_CODES(v)                                                                              \
    if ((v) < quads) {                                                                             \
        a[v] = vreinterpretq_s32_s8(kvt_load_s8(codes + (v)*16));                                  \
        b[v] = vreinterpretq_s32_s8(kvt_load_s8(codes + step + (v)*16));                           \
    }
#define LOAD_WEIGHTS(r)                                                                            \
    if ((r) < rows)                                                                                \
        w[r] = kvt_load_s8(weight + (r)*ldw);
#define TRANSPOSE(v)                                                                               \
    if ((v) < quads) {                                                                             \
        x[v] = vreinterpretq_s8_s32(vtrn1q_s32(a[v], b[v]));                                       \
        y[v] = vreinterpretq_s8_s32(vtrn2q_s32(a[v], b[v]));                                       \
    }
#define EVEN(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        even[i] = vmmlaq_s32(even[i], x[(i) % quads], w[(i) / quads]);
#define ODD(i)                                                                                     \
    if ((i) < rows * quads)                                                                        \
        odd[i] = vmmlaq_s32(odd[i], y[(i) % quads], w[(i) / quads]);
        KVT_EACH_8(LOAD_CODES)
        KVT_EACH_8(LOAD_WEIGHTS)
        kvt_prefetch(codes, ahead);
        kvt_prefetch(codes + step, ahead);
        KVT_LOADED();
        KVT_EACH_8(TRANSPOSE)
        KVT_EACH_16(EVEN)
        KVT_EACH_16(ODD)
#undef LOAD_CODES
#undef LOAD_WEIGHTS
#undef TRANSPOSE
#undef EVEN
#undef ODD
        codes += 2 * step;
        weight += 16;
    }
#define ADD(i)                                                                                     \
    if ((i) < rows * quads)                                                                        \
        total[i] =                                                                                 \
            vaddq_s32(vshlq_n_s32(vtrn1q_s32(even[i], odd[i]), 8), vtrn2q_s32(even[i], odd[i]));
    KVT_EACH_16(ADD)
#undef ADD
}

KVT_I8_BLOCK(near, 1, 4)
KVT_I8_BLOCK(near, 2, 4)
KVT_I8_BLOCK(near, 3, 2)
KVT_I8_BLOCK(near, 4, 2)
KVT_I8_BLOCK(near, 5, 2)
KVT_I8_BLOCK(near, 6, 1)
KVT_I8_BLOCK(near, 7, 1)
KVT_I8_BLOCK(near, 8, 1)

/* ---- 4 and 5 bits ---- */

/*
 * One digit, so that the columns are two rows' digits of 8 summands of a lane:
 *
 *     [ row 0 . lane 0   row 0 . lane 1   row 1 . lane 0   row 1 . lane 1 ]
 *
 * The 8 summands are those of one nibble of two octets, 4 each: zips of the octets' registers join
 * them while they are still nibbles, so that one zip serves 32 codes. (V5: its codes, as the fifth
 * bits are spread in the octets' order.) For 32 codes and r rows that is 1 + r instructions and the
 * unpacking, where dot.h has 2 * r; one row is dot.h's. Levels and digits are dot.h's as well.
 */
#define PAIRS_MOST 4

/* Digits of a pair of rows, 16 summands: low nibbles' of both rows, then high nibbles'. */
KVT_INLINE void store_pair_digits(uint8x16_t digits, unsigned char *to, size_t ld, size_t row,
                                  size_t rows, size_t i)
{
    uint32x4_t x = vreinterpretq_u32_u8(digits);
    uint8x8_t low = vreinterpret_u8_u32(vget_low_u32(vuzp1q_u32(x, x)));
    uint8x8_t high = vreinterpret_u8_u32(vget_low_u32(vuzp2q_u32(x, x)));
    if (rows == 1) {
        kvt_store_row_digits(digits, to, ld, row, rows, i);
        return;
    }
    to += row / 2 * 2 * ld + 2 * i;
    vst1_u8(to + row % 2 * 8, low);
    vst1_u8(to + row % 2 * 8 + 16, high);
    if (row % 2 == 0 && row + 1 == rows) { /* no second row: its products are not used */
        vst1_u8(to + 8, low);
        vst1_u8(to + 24, high);
    }
}

KVT_INLINE int32x4_t multiply_pair(int form, int32x4_t sum, uint8x16_t digits, uint8x16_t codes)
{
    if (form == KVT_K4)
        return vmmlaq_s32(sum, vreinterpretq_s8_u8(digits), vreinterpretq_s8_u8(codes));
    return vreinterpretq_s32_u32(vmmlaq_u32(vreinterpretq_u32_s32(sum), digits, codes));
}

KVT_INLINE uint8x16_t zip(int second, uint8x16_t a, uint8x16_t b)
{
    uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
    return vreinterpretq_u8_u32(second ? vzip2q_u32(x, y) : vzip1q_u32(x, y));
}

/* Sum i is of pair i / 2 / quads and quad i / 2 % quads, its lanes 0 and 1 or 2 and 3. */
#define IS_SUM(i) ((i) < 2 * pairs * quads)
KVT_INLINE void product_pairs(int form, size_t rows, size_t quads, const unsigned char *codes,
                              size_t step, size_t n, const unsigned char *fifth, size_t first,
                              const unsigned char *weight, size_t ldw, uintptr_t ahead,
                              int32x4_t *total)
{
    const size_t pairs = (rows + 1) / 2;
    const uint8x16_t levels = kvt_levels_plus(KVT_DOT_LEVEL);
    uint8x16_t of_quad[4];
    int32x4_t sum[16];
#define ZERO(i)                                                                                    \
    if (IS_SUM(i))                                                                                 \
        sum[i] = vdupq_n_s32(0);
#define OF_QUAD(v)                                                                                 \
    if ((v) < quads)                                                                               \
        of_quad[v] = kvt_fifth_of_quad(first + (v));
    KVT_EACH_16(ZERO)
    OF_QUAD(0)
    OF_QUAD(1)
    OF_QUAD(2)
    OF_QUAD(3)
#undef ZERO
#undef OF_QUAD
    for (size_t i = 0; i < n; i += 16) {
        const unsigned char *other = codes + step;
        uint8x16_t x[4], y[4], low[8], high[8], w[PAIRS_MOST], v[PAIRS_MOST];
#define LOAD_DIGITS(r)                                                                             \
    if ((r) < pairs) {                                                                             \
        w[r] = vld1q_u8(weight + (r)*2 * ldw + 2 * i);                                             \
        v[r] = vld1q_u8(weight + (r)*2 * ldw + 2 * i + 16);                                        \
    }
#define LOAD_CODES(v)                                                                              \
    if ((v) < quads) {                                                                             \
        x[v] = vld1q_u8(codes + (v)*16);                                                           \
        y[v] = vld1q_u8(other + (v)*16);                                                           \
    }
/* Registers 2 * quad and 2 * quad + 1: its first two lanes, and the others. */
#define UNPACK(i)                                                                                  \
    if ((i) < 2 * quads && form != KVT_V5) {                                                       \
        uint8x16_t both = zip((i) % 2, x[(i) / 2], y[(i) / 2]);                                    \
        low[i] = kvt_low_codes(form, both, levels);                                                \
        high[i] = kvt_high_codes(form, both, levels);                                              \
    }
#define UNPACK_5(v)                                                                                \
    if ((v) < quads && form == KVT_V5) {                                                           \
        uint8x16_t a = kvt_low_codes_5(x[v], bits[0], of_quad[v]);                                 \
        uint8x16_t b = kvt_low_codes_5(y[v], bits[1], of_quad[v]);                                 \
        uint8x16_t c = kvt_high_codes_5(x[v], swapped[0], of_quad[v]);                             \
        uint8x16_t d = kvt_high_codes_5(y[v], swapped[1], of_quad[v]);                             \
        low[2 * (v)] = zip(0, a, b);                                                               \
        low[2 * (v) + 1] = zip(1, a, b);                                                           \
        high[2 * (v)] = zip(0, c, d);                                                              \
        high[2 * (v) + 1] = zip(1, c, d);                                                          \
    }
#define LOW(i)                                                                                     \
    if (IS_SUM(i))                                                                                 \
        sum[i] = multiply_pair(form, sum[i], w[(i) / 2 / quads], low[(i) % (2 * quads)]);
#define HIGH(i)                                                                                    \
    if (IS_SUM(i))                                                                                 \
        sum[i] = multiply_pair(form, sum[i], v[(i) / 2 / quads], high[(i) % (2 * quads)]);
        LOAD_CODES(0)
        LOAD_CODES(1)
        LOAD_CODES(2)
        LOAD_CODES(3)
        LOAD_DIGITS(0)
        LOAD_DIGITS(1)
        LOAD_DIGITS(2)
        LOAD_DIGITS(3)
        kvt_prefetch(codes, ahead);
        kvt_prefetch(other, ahead);
        KVT_LOADED();
        if (form == KVT_V5) {
            uint8x16_t bits[2] = {vld1q_u8(fifth), vld1q_u8(fifth + step / 4)};
            uint8x16_t swapped[2] = {vextq_u8(bits[0], bits[0], 8), vextq_u8(bits[1], bits[1], 8)};
            UNPACK_5(0)
            UNPACK_5(1)
            UNPACK_5(2)
            UNPACK_5(3)
            fifth += step / 2;
        }
        KVT_EACH_8(UNPACK)
        KVT_EACH_16(LOW)
        KVT_EACH_16(HIGH)
        codes += 2 * step;
#undef LOAD_CODES
#undef LOAD_DIGITS
#undef UNPACK
#undef UNPACK_5
#undef LOW
#undef HIGH
    }
#define TOTAL(i)                                                                                   \
    if ((i) < rows * quads) {                                                                      \
        const size_t s = ((i) / quads / 2 * quads + (i) % quads) * 2;                              \
        int64x2_t a = vreinterpretq_s64_s32(sum[s]), b = vreinterpretq_s64_s32(sum[s + 1]);        \
        total[i] = vreinterpretq_s32_s64((i) / quads % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));   \
    }
    KVT_EACH_16(TOTAL)
#undef TOTAL
}
#undef IS_SUM

KVT_4BIT_BLOCK(dot, 1, 4, 4, 2)
KVT_4BIT_BLOCK(pairs, 2, 4, 4, 2)
KVT_4BIT_BLOCK(pairs, 3, 4, 2, 2)
KVT_4BIT_BLOCK(pairs, 4, 4, 2, 2)
KVT_4BIT_BLOCK(pairs, 5, 2, 2, 2)
KVT_4BIT_BLOCK(pairs, 6, 2, 2, 2)
KVT_4BIT_BLOCK(pairs, 7, 2, 2, 1)
KVT_4BIT_BLOCK(pairs, 8, 2, 2, 1)

/* ---- the kernels ---- */

#define BLOCKS(product)                                                                            \
    {                                                                                              \
        NULL, product##_1, product##_2, product##_3, product##_4, product##_5, product##_6,        \
            product##_7, product##_8                                                               \
    }
KVT_I8_KERNELS(static, , near, 8, BLOCKS(qk_near), BLOCKS(pv_near))

KVT_4BIT_KERNELS(static, , KVT_DOT_P_MOST, KVT_DOT_BIAS_V4, KVT_DOT_BIAS_V5, 8, 2,
                 store_pair_digits)

const kvt_kernels kvt_kernels_i8mm = {
    .isa = "i8mm",
    .pack_q_near = pack_q_near,
    .qk_i8_near = qk_i8_near,
    .pv_i8_near = pv_i8_near,
    .qk_i4_near = qk_i4_near,
    .pv_i4_near = pv_i4_near,
    .pv_i5_near = pv_i5_near,
};
