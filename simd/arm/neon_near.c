/*
 * NEON (armv8-a): i8 as integers. Codes are multiplied by weights of 16 bits: neon_i8.h, and
 * product_near below. Fast is the same. (8-bit products with 16-bit sums of two would halve the
 * multiplications, but leave 7 bits for p, whose error is above the bound of fast mode.)
 */
#include "simd/arm/neon_i8.h"
#include "simd/arm/neon_steps.h"

#define Q_MOST_near 16383
#define P_MOST_near 32767
#define BYTES_near 2
#define SHARES_near 1

KVT_INLINE void store_near(int16x8x2_t x, unsigned char *to)
{
    vst1q_u8(to, vreinterpretq_u8_s16(x.val[0]));
    vst1q_u8(to + 16, vreinterpretq_u8_s16(x.val[1]));
}

/*
 * 16 summands at a time: four groups, of 4 summands each. A register of a group is 4 summands of
 * each of 4 lanes; widened to 16 bits it is two of them, each of which holds two lanes:
 *
 *     low:   A0 A1 A2 A3  B0 B1 B2 B3        high:  C0 C1 C2 C3  D0 D1 D2 D3
 *
 * With a group's 4 weights in both halves of a register (as ld2r and ld4r load them), smlal
 * multiplies A and C, smlal2 B and D, into four sums of each lane that are added at the end. The
 * cost of a row is its multiplications, 4 products each; that of a block two widenings for every 16
 * bytes. (A transpose of two groups would use a load of weights for twice as many summands, but
 * costs every block two more instructions for 32 bytes.)
 *
 * The order is for in-order cores (neon_steps.h): registers are loaded by two and four while others
 * are multiplied; pointers are incremented after loads; there are at least 12 accumulators.
 *
 * Overflow: the four sums of a lane together are at most 1024 * 127 * 16383 < 2^31 for q, and
 * 64 * 127 * 32767 < 2^28 for p. Lanes beyond n_tokens may wrap.
 */

/* Weights of one group to a register; a pointer increment is free after a load. */
#define WEIGHTS_2(a, b, from)                                                                      \
    __asm__ volatile("ld2r {%0.2d, %1.2d}, [%2]\n\tadd %2, %2, #32"                                \
                     : "=w"(KVT_R(a)), "=w"(KVT_R(b)), "+r"(from)                                  \
                     :                                                                             \
                     : "memory")
#define WEIGHTS_4(a, b, c, d, from)                                                                \
    __asm__ volatile("ld4r {%0.2d, %1.2d, %2.2d, %3.2d}, [%4]\n\tadd %4, %4, #32"                  \
                     : "=w"(KVT_R(a)), "=w"(KVT_R(b)), "=w"(KVT_R(c)), "=w"(KVT_R(d)), "+r"(from)  \
                     :                                                                             \
                     : "memory")
#define WIDEN(low, high, codes)                                                                    \
    __asm__ volatile("sxtl %0.8h, %2.8b\n\tsxtl2 %1.8h, %2.16b"                                    \
                     : "=&w"(KVT_R(low)), "=w"(KVT_R(high))                                        \
                     : "w"(KVT_R(codes)))
/* Sums of one row and quad, by one group. */
#define MULTIPLY(s0, s1, s2, s3, low, high, by)                                                    \
    __asm__ volatile("smlal %0.4s, %4.4h, %6.4h\n\t"                                               \
                     "smlal2 %1.4s, %4.8h, %6.8h\n\t"                                              \
                     "smlal %2.4s, %5.4h, %6.4h\n\t"                                               \
                     "smlal2 %3.4s, %5.8h, %6.8h"                                                  \
                     : "+w"(KVT_R(s0)), "+w"(KVT_R(s1)), "+w"(KVT_R(s2)), "+w"(KVT_R(s3))          \
                     : "w"(KVT_R(low)), "w"(KVT_R(high)), "w"(KVT_R(by)))

/* 16 summands of a row and four quads: sums 0-15, weights 16-19, widened 20-27, codes 28-31. */
#define WIDEN_4                                                                                    \
    WIDEN(20, 21, 28);                                                                             \
    WIDEN(22, 23, 29);                                                                             \
    WIDEN(24, 25, 30);                                                                             \
    WIDEN(26, 27, 31)
#define MULTIPLY_4(w)                                                                              \
    MULTIPLY(0, 1, 2, 3, 20, 21, w);                                                               \
    MULTIPLY(4, 5, 6, 7, 22, 23, w);                                                               \
    MULTIPLY(8, 9, 10, 11, 24, 25, w);                                                             \
    MULTIPLY(12, 13, 14, 15, 26, 27, w)
#define PRODUCT_1                                                                                  \
    KVT_LOAD_4(28, 29, 30, 31, codes);                                                             \
    WEIGHTS_4(16, 17, 18, 19, weight);                                                             \
    KVT_STEP(codes, step_4);                                                                       \
    KVT_COUNT(n, 16);                                                                              \
    WIDEN_4;                                                                                       \
    KVT_LOAD_4(28, 29, 30, 31, group_1);                                                           \
    MULTIPLY_4(16);                                                                                \
    WIDEN_4;                                                                                       \
    KVT_LOAD_4(28, 29, 30, 31, group_2);                                                           \
    MULTIPLY_4(17);                                                                                \
    WIDEN_4;                                                                                       \
    KVT_LOAD_4(28, 29, 30, 31, group_3);                                                           \
    MULTIPLY_4(18);                                                                                \
    WIDEN_4;                                                                                       \
    MULTIPLY_4(19)

/* Two rows and two quads; as above, weights are of two groups at once. */
#define MULTIPLY_2X2(w, v, a, b, c, d)                                                             \
    MULTIPLY(0, 1, 2, 3, a, b, w);                                                                 \
    MULTIPLY(4, 5, 6, 7, c, d, w);                                                                 \
    MULTIPLY(8, 9, 10, 11, a, b, v);                                                               \
    MULTIPLY(12, 13, 14, 15, c, d, v)
#define PRODUCT_2                                                                                  \
    KVT_LOAD_2(28, 29, codes);                                                                     \
    KVT_STEP(codes, step_4);                                                                       \
    KVT_LOAD_2(30, 31, group_1);                                                                   \
    KVT_STEP(group_1, step_4);                                                                     \
    WEIGHTS_2(16, 17, weight);                                                                     \
    WEIGHTS_2(18, 19, weight_1);                                                                   \
    KVT_COUNT(n, 16);                                                                              \
    WIDEN(20, 21, 28);                                                                             \
    WIDEN(22, 23, 29);                                                                             \
    KVT_LOAD_2(28, 29, group_2);                                                                   \
    WIDEN(24, 25, 30);                                                                             \
    WIDEN(26, 27, 31);                                                                             \
    KVT_LOAD_2(30, 31, group_3);                                                                   \
    MULTIPLY_2X2(16, 18, 20, 21, 22, 23);                                                          \
    MULTIPLY_2X2(17, 19, 24, 25, 26, 27);                                                          \
    WEIGHTS_2(16, 17, half);                                                                       \
    WEIGHTS_2(18, 19, half_1);                                                                     \
    WIDEN_4;                                                                                       \
    MULTIPLY_2X2(16, 18, 20, 21, 22, 23);                                                          \
    MULTIPLY_2X2(17, 19, 24, 25, 26, 27)

/* Three rows and a quad: sums 0-11, widened 12-15, weights 16-27. */
#define MULTIPLY_3(a, b, w0, w1, w2)                                                               \
    MULTIPLY(0, 1, 2, 3, a, b, w0);                                                                \
    MULTIPLY(4, 5, 6, 7, a, b, w1);                                                                \
    MULTIPLY(8, 9, 10, 11, a, b, w2)
#define PRODUCT_3                                                                                  \
    KVT_LOAD_AT(28, codes, zero);                                                                  \
    KVT_LOAD_AT(29, codes, step);                                                                  \
    KVT_COUNT(n, 16);                                                                              \
    KVT_LOAD_AT(30, codes, step_2);                                                                \
    KVT_LOAD_AT(31, codes, step_3);                                                                \
    KVT_STEP(codes, step_4);                                                                       \
    WEIGHTS_4(16, 17, 18, 19, weight);                                                             \
    WIDEN(12, 13, 28);                                                                             \
    WEIGHTS_4(20, 21, 22, 23, weight_1);                                                           \
    WIDEN(14, 15, 29);                                                                             \
    WEIGHTS_4(24, 25, 26, 27, weight_2);                                                           \
    MULTIPLY_3(12, 13, 16, 20, 24);                                                                \
    WIDEN(12, 13, 30);                                                                             \
    MULTIPLY_3(14, 15, 17, 21, 25);                                                                \
    WIDEN(14, 15, 31);                                                                             \
    MULTIPLY_3(12, 13, 18, 22, 26);                                                                \
    MULTIPLY_3(14, 15, 19, 23, 27)

/* Four rows and a quad: sums 0-15, weights 16-23 (of two groups at once), widened 24-27. */
#define MULTIPLY_4X1(a, b, w0, w1, w2, w3)                                                         \
    MULTIPLY(0, 1, 2, 3, a, b, w0);                                                                \
    MULTIPLY(4, 5, 6, 7, a, b, w1);                                                                \
    MULTIPLY(8, 9, 10, 11, a, b, w2);                                                              \
    MULTIPLY(12, 13, 14, 15, a, b, w3)
#define PRODUCT_4                                                                                  \
    KVT_LOAD_AT(28, codes, zero);                                                                  \
    KVT_LOAD_AT(29, codes, step);                                                                  \
    KVT_COUNT(n, 16);                                                                              \
    KVT_LOAD_AT(30, codes, step_2);                                                                \
    KVT_LOAD_AT(31, codes, step_3);                                                                \
    KVT_STEP(codes, step_4);                                                                       \
    WEIGHTS_2(16, 17, weight);                                                                     \
    WEIGHTS_2(18, 19, weight_1);                                                                   \
    WEIGHTS_2(20, 21, weight_2);                                                                   \
    WEIGHTS_2(22, 23, weight_3);                                                                   \
    WIDEN(24, 25, 28);                                                                             \
    WIDEN(26, 27, 29);                                                                             \
    MULTIPLY_4X1(24, 25, 16, 18, 20, 22);                                                          \
    WIDEN(24, 25, 30);                                                                             \
    MULTIPLY_4X1(26, 27, 17, 19, 21, 23);                                                          \
    WEIGHTS_2(16, 17, half);                                                                       \
    WEIGHTS_2(18, 19, half_1);                                                                     \
    WEIGHTS_2(20, 21, half_2);                                                                     \
    WEIGHTS_2(22, 23, half_3);                                                                     \
    WIDEN(26, 27, 31);                                                                             \
    MULTIPLY_4X1(24, 25, 16, 18, 20, 22);                                                          \
    MULTIPLY_4X1(26, 27, 17, 19, 21, 23)

KVT_INLINE void product_near(int side, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *weight, size_t ldw,
                             uintptr_t ahead, int32x4_t *total)
{
    (void)side;
    const unsigned char *group_1 = codes + step, *group_2 = codes + 2 * step;
    const unsigned char *group_3 = codes + 3 * step;
    const unsigned char *weight_1 = weight + ldw, *weight_2 = weight_1 + ldw;
    const unsigned char *weight_3 = weight_2 + ldw;
    const unsigned char *half = weight + 16, *half_1 = half + ldw, *half_2 = half_1 + ldw;
    const unsigned char *half_3 = half_2 + ldw;
    size_t zero = 0, step_2 = 2 * step, step_3 = 3 * step, step_4 = 4 * step;
    uintptr_t behind = ahead - step_4; /* codes was incremented before its prefetch */
    /* Keep all of them in registers: recomputing them for an address would cost issue slots. */
    __asm__("" : "+r"(zero), "+r"(step), "+r"(step_2), "+r"(step_3), "+r"(step_4));
    KVT_EACH_16(KVT_ZERO)
    while (n > 0) {
        KVT_EACH_FROM_16(KVT_REGISTER)
        if (rows == 1) {
            PRODUCT_1;
            KVT_PREFETCH_STEP(group_1, ahead, step_4);
            KVT_PREFETCH_STEP(group_2, ahead, step_4);
            KVT_PREFETCH_STEP(group_3, ahead, step_4);
            KVT_PREFETCH(codes, behind);
        } else if (rows == 2) {
            PRODUCT_2;
            KVT_PREFETCH_STEP(group_2, ahead, step_4);
            KVT_PREFETCH(codes, behind);
            KVT_STEP(group_3, step_4);
        } else if (rows == 3) {
            PRODUCT_3;
            KVT_PREFETCH(codes, behind);
        } else {
            PRODUCT_4;
            KVT_PREFETCH(codes, behind);
        }
    }
    KVT_EACH_16(KVT_TAKE)
#define FOLD(i, a, b, c, d)                                                                        \
    if ((i) < rows * quads)                                                                        \
        total[i] = vpaddq_s32(                                                                     \
            vpaddq_s32(vreinterpretq_s32_u8(KVT_TAKEN(a)), vreinterpretq_s32_u8(KVT_TAKEN(b))),    \
            vpaddq_s32(vreinterpretq_s32_u8(KVT_TAKEN(c)), vreinterpretq_s32_u8(KVT_TAKEN(d))));
    FOLD(0, 0, 1, 2, 3)
    FOLD(1, 4, 5, 6, 7)
    FOLD(2, 8, 9, 10, 11)
    FOLD(3, 12, 13, 14, 15)
#undef FOLD
}

KVT_I8_BLOCK(near, 1, 4)
KVT_I8_BLOCK(near, 2, 2)
KVT_I8_BLOCK(near, 3, 1)
KVT_I8_BLOCK(near, 4, 1)

#define BLOCKS(product)                                                                            \
    {                                                                                              \
        NULL, product##_1, product##_2, product##_3, product##_4                                   \
    }
KVT_I8_KERNELS(, kvt_neon_, near, 4, BLOCKS(qk_near), BLOCKS(pv_near))
#undef BLOCKS
