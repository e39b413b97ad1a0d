/*
 * NEON (armv8-a): products of 4-bit K and of 4- and 5-bit V as integers: neon_4bit.h, and
 * product_near below. Codes and digits are signed bytes: `smull` and `smlal` multiply 8 of them
 * into sums of 16 bits, two lanes of four summands; twice as many as i8's products of 16 bits.
 *
 * Overflow: a sum of 16 bits takes 4 products, of which the largest is 63 * 127 (a level of V) with
 * digits of 7 bits: 4 * 8001 < 2^15. `sadalp` then adds it to sums of 32 bits, of 1024 * 127 * 15 <
 * 2^21 (K) and 64 * 127 * 63 < 2^19 (V).
 */
#include "simd/arm/neon_4bit.h"

#define P_MOST 127
#define ROWS_BLOCK 4

/* The digits of an octet: two groups of 4 bytes, each in all lanes of a register. */
typedef struct octet_digits {
    int8x16_t low, high;
} octet_digits;

KVT_INLINE octet_digits load_digits(const unsigned char *from)
{
    int32x4x2_t both = vld2q_dup_s32((const int32_t *)(const void *)from);
    octet_digits digits = {vreinterpretq_s8_s32(both.val[0]), vreinterpretq_s8_s32(both.val[1])};
    return digits;
}

/* Products of a quad by a group of digits: lanes 0 and 1 (second 0) or 2 and 3 (second 1). */
KVT_INLINE int16x8_t multiply(int second, int8x16_t codes, int8x16_t digits)
{
    return second ? vmull_high_s8(codes, digits)
                  : vmull_s8(vget_low_s8(codes), vget_low_s8(digits));
}

KVT_INLINE int16x8_t multiply_add(int second, int16x8_t sum, int8x16_t codes, int8x16_t digits)
{
    return second ? vmlal_high_s8(sum, codes, digits)
                  : vmlal_s8(sum, vget_low_s8(codes), vget_low_s8(digits));
}

/*
 * 16 summands at a time, two octets. Sum i is of row i / 2 / quads and quad i / 2 % quads, its
 * lanes 0 and 1 or 2 and 3, each as two sums that are added at the end.
 */
#define IS_SUM(i) ((i) < 2 * rows * quads)
#define ROW(i) ((i) / 2 / quads)
#define QUAD(i) ((i) / 2 % quads)

KVT_INLINE void product_near(int form, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *fifth, size_t first,
                             const unsigned char *weight, size_t ldw, uintptr_t ahead,
                             int32x4_t *total)
{
    const uint8x16_t levels = kvt_levels_plus(0);
    uint8x16_t of_quad[8];
    int32x4_t sum[16];
#define ZERO(i)                                                                                    \
    if (IS_SUM(i))                                                                                 \
        sum[i] = vdupq_n_s32(0);
#define OF_QUAD(v)                                                                                 \
    if ((v) < quads)                                                                               \
        of_quad[v] = kvt_fifth_of_quad(first + (v));
    KVT_EACH_16(ZERO)
    KVT_EACH_8(OF_QUAD)
#undef ZERO
#undef OF_QUAD
    for (size_t i = 0; i < n; i += 16) {
        uint8x16_t x[8], bits = vdupq_n_u8(0), swapped = bits;
        int8x16_t low[8], high[8];
        octet_digits w[8];
        int16x8_t part[16];
#define LOAD_CODES(v)                                                                              \
    if ((v) < quads)                                                                               \
        x[v] = vld1q_u8(codes + (v)*16);
#define LOAD_DIGITS(r)                                                                             \
    if ((r) < rows)                                                                                \
        w[r] = load_digits(weight + (r)*ldw + i + 8 * octet);
#define UNPACK(v)                                                                                  \
    if ((v) < quads) {                                                                             \
        low[v] = vreinterpretq_s8_u8(form == KVT_V5 ? kvt_low_codes_5(x[v], bits, of_quad[v])      \
                                                    : kvt_low_codes(form, x[v], levels));          \
        high[v] = vreinterpretq_s8_u8(form == KVT_V5 ? kvt_high_codes_5(x[v], swapped, of_quad[v]) \
                                                     : kvt_high_codes(form, x[v], levels));        \
    }
#define LOW(i)                                                                                     \
    if (IS_SUM(i))                                                                                 \
        part[i] = octet ? multiply_add((i) % 2, part[i], low[QUAD(i)], w[ROW(i)].low)              \
                        : multiply((i) % 2, low[QUAD(i)], w[ROW(i)].low);
#define HIGH(i)                                                                                    \
    if (IS_SUM(i))                                                                                 \
        part[i] = multiply_add((i) % 2, part[i], high[QUAD(i)], w[ROW(i)].high);
        KVT_UNROLL
        for (size_t octet = 0; octet < 2; octet++) {
            KVT_EACH_8(LOAD_CODES)
            KVT_EACH_8(LOAD_DIGITS)
            if (form == KVT_V5) {
                bits = vld1q_u8(fifth);
                swapped = vextq_u8(bits, bits, 8);
                fifth += step / 4;
            }
            kvt_prefetch(codes, ahead);
            KVT_LOADED();
            KVT_EACH_8(UNPACK)
            KVT_EACH_16(LOW)
            KVT_EACH_16(HIGH)
            codes += step;
        }
#define ADD(i)                                                                                     \
    if (IS_SUM(i))                                                                                 \
        sum[i] = vpadalq_s16(sum[i], part[i]);
        KVT_EACH_16(ADD)
#undef LOAD_CODES
#undef LOAD_DIGITS
#undef UNPACK
#undef LOW
#undef HIGH
#undef ADD
    }
#define TOTAL(i)                                                                                   \
    if ((i) < rows * quads)                                                                        \
        total[i] = vpaddq_s32(sum[2 * (i)], sum[2 * (i) + 1]);
    KVT_EACH_8(TOTAL)
#undef TOTAL
}

KVT_4BIT_BLOCK(near, 1, 4, 4, 2)
KVT_4BIT_BLOCK(near, 2, 2, 2, 2)
KVT_4BIT_BLOCK(near, 3, 1, 1, 1)
KVT_4BIT_BLOCK(near, 4, 1, 1, 1)

#define BLOCKS(product)                                                                            \
    {                                                                                              \
        NULL, product##_1, product##_2, product##_3, product##_4                                   \
    }

void kvt_neon_qk_i4_near(const float *q, size_t ldq, size_t rows, const void *codes,
                         const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                         float *s)
{
    static kvt_4bit_block *const blocks[] = BLOCKS(qk_i4);
    kvt_qk_i4(q, ldq, rows, codes, scales, n_tokens, dims_p, next, s, blocks, ROWS_BLOCK, 1,
              kvt_store_row_digits);
}

void kvt_neon_pv_i4_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                         float *acc, size_t ldacc)
{
    static kvt_4bit_block *const blocks[] = BLOCKS(pv_i4);
    kvt_pv_4bit(p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc, P_MOST, 0,
                blocks, ROWS_BLOCK, 1, kvt_store_row_digits);
}

void kvt_neon_pv_i5_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                         float *acc, size_t ldacc)
{
    static kvt_4bit_block *const blocks[] = BLOCKS(pv_i5);
    kvt_pv_4bit(p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc, P_MOST, -31,
                blocks, ROWS_BLOCK, 1, kvt_store_row_digits);
}
