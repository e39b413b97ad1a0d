/*
 * NEON (armv8-a): products of 4-bit K and of 4- and 5-bit V as integers: neon_4bit.h, and
 * product_four and product_five below. Codes and digits are signed bytes: `smull` and `smlal`
 * multiply 8 of them into sums of 16 bits, twice as many as i8's products of 16 bits.
 *
 * Overflow: a sum of 16 bits takes 4 products, of which the largest is 63 * 127 (a level of V) with
 * digits of 7 bits: 4 * 8001 < 2^15. `sadalp` then adds it to sums of 32 bits, of 1024 * 127 * 15 <
 * 2^21 (K) and 64 * 127 * 63 < 2^19 (V).
 */
#include "simd/arm/neon_4bit.h"
#include "simd/arm/neon_steps.h"

#define P_MOST 127
#define BIAS_V5 (-31) /* as KVT_DOT_BIAS_V5 */
#define ROWS_BLOCK 4

/* ---- K4 and V4 ---- */

/*
 * 16 summands at a time, two octets, ordered for in-order cores (neon_steps.h). The digits of a row
 * are four groups of 4 bytes, each in all lanes of a register (ld2r, ld4r). A register of codes by
 * one of digits is two sums of 16 bits: lanes 0 and 1 of a quad, and 2 and 3, each lane in two
 * halves that are added at the end.
 *
 * Registers: sums 0-7, sums of 16 bits (parts) 8-15, a mask of nibbles 30, levels 31; digits and
 * codes the others. High codes replace the bytes that hold both.
 */
#define DIGITS_4(a, b, c, d, from)                                                                 \
    __asm__ volatile("ld4r {%0.4s, %1.4s, %2.4s, %3.4s}, [%4]"                                     \
                     : "=w"(KVT_R(a)), "=w"(KVT_R(b)), "=w"(KVT_R(c)), "=w"(KVT_R(d))              \
                     : "r"(from)                                                                   \
                     : "memory")
#define DIGITS_NEXT_2(a, b, from)                                                                  \
    __asm__ volatile("ld2r {%0.4s, %1.4s}, [%2]\n\tadd %2, %2, #16"                                \
                     : "=w"(KVT_R(a)), "=w"(KVT_R(b)), "+r"(from)                                  \
                     :                                                                             \
                     : "memory")
#define DIGITS_NEXT_4(a, b, c, d, from)                                                            \
    DIGITS_4(a, b, c, d, from);                                                                    \
    KVT_ADVANCE(from, 16)
#define LOAD_AT(a, from, offset)                                                                   \
    __asm__ volatile("ldr %q0, [%1, %2]" : "=w"(KVT_R(a)) : "r"(from), "i"(offset) : "memory")
#define LOW_CODES(low, x)                                                                          \
    __asm__ volatile("and %0.16b, %1.16b, %2.16b"                                                  \
                     : "=w"(KVT_R(low))                                                            \
                     : "w"(KVT_R(x)), "w"(KVT_R(30)))
#define HIGH_CODES(x) __asm__ volatile("ushr %0.16b, %0.16b, #4" : "+w"(KVT_R(x)))
#define LEVELS(x)                                                                                  \
    do {                                                                                           \
        if (form == KVT_V4)                                                                        \
            __asm__ volatile("tbl %0.16b, {%1.16b}, %0.16b" : "+w"(KVT_R(x)) : "w"(KVT_R(31)));    \
    } while (0)
#define MULTIPLY(p0, p1, codes, by)                                                                \
    __asm__ volatile("smull %0.8h, %2.8b, %3.8b\n\tsmull2 %1.8h, %2.16b, %3.16b"                   \
                     : "=&w"(KVT_R(p0)), "=w"(KVT_R(p1))                                           \
                     : "w"(KVT_R(codes)), "w"(KVT_R(by)))
#define MULTIPLY_ADD(p0, p1, codes, by)                                                            \
    __asm__ volatile("smlal %0.8h, %2.8b, %3.8b\n\tsmlal2 %1.8h, %2.16b, %3.16b"                   \
                     : "+w"(KVT_R(p0)), "+w"(KVT_R(p1))                                            \
                     : "w"(KVT_R(codes)), "w"(KVT_R(by)))
#define ADD_PARTS(s0, s1, p0, p1)                                                                  \
    __asm__ volatile("sadalp %0.4s, %2.8h\n\tsadalp %1.4s, %3.8h"                                  \
                     : "+w"(KVT_R(s0)), "+w"(KVT_R(s1))                                            \
                     : "w"(KVT_R(p0)), "w"(KVT_R(p1)))
#define ADD_4                                                                                      \
    ADD_PARTS(0, 1, 8, 9);                                                                         \
    ADD_PARTS(2, 3, 10, 11);                                                                       \
    ADD_PARTS(4, 5, 12, 13);                                                                       \
    ADD_PARTS(6, 7, 14, 15)

/* One row and four quads: digits 16-19, codes 20-23, low ones 24-27; then the other octet's. */
#define ROW_1(multiply, a, b, c, d, by)                                                            \
    multiply(8, 9, a, by);                                                                         \
    multiply(10, 11, b, by);                                                                       \
    multiply(12, 13, c, by);                                                                       \
    multiply(14, 15, d, by)
#define LEVELS_4(a, b, c, d)                                                                       \
    LEVELS(a);                                                                                     \
    LEVELS(b);                                                                                     \
    LEVELS(c);                                                                                     \
    LEVELS(d)
#define UNPACK_4(a, b, c, d, w, x, y, z)                                                           \
    LOW_CODES(a, w);                                                                               \
    LOW_CODES(b, x);                                                                               \
    LOW_CODES(c, y);                                                                               \
    LOW_CODES(d, z);                                                                               \
    HIGH_CODES(w);                                                                                 \
    HIGH_CODES(x);                                                                                 \
    HIGH_CODES(y);                                                                                 \
    HIGH_CODES(z);                                                                                 \
    LEVELS_4(a, b, c, d);                                                                          \
    LEVELS_4(w, x, y, z)
#define PRODUCT_1                                                                                  \
    KVT_COUNT(n, 16);                                                                              \
    KVT_ADVANCE(before, 16);                                                                       \
    LOAD_AT(20, codes, 0);                                                                         \
    LOAD_AT(21, codes, 16);                                                                        \
    LOAD_AT(22, codes, 32);                                                                        \
    LOAD_AT(23, codes, 48);                                                                        \
    KVT_PREFETCH(codes, ahead);                                                                    \
    DIGITS_4(16, 17, 18, 19, before);                                                              \
    UNPACK_4(24, 25, 26, 27, 20, 21, 22, 23);                                                      \
    ROW_1(MULTIPLY, 24, 25, 26, 27, 16);                                                           \
    KVT_LOAD_4(24, 25, 26, 27, octet_1);                                                           \
    ROW_1(MULTIPLY_ADD, 20, 21, 22, 23, 17);                                                       \
    UNPACK_4(20, 21, 22, 23, 24, 25, 26, 27);                                                      \
    ROW_1(MULTIPLY_ADD, 20, 21, 22, 23, 18);                                                       \
    ROW_1(MULTIPLY_ADD, 24, 25, 26, 27, 19);                                                       \
    ADD_4;                                                                                         \
    KVT_PREFETCH_STEP(octet_1, ahead, step_2);                                                     \
    KVT_STEP(codes, step_2)

/* Two rows and two quads: digits 16-23, codes 24-27, low ones 28 and 29. */
#define ROW_OF_2(multiply, p0, p1, p2, p3, a, b, by)                                               \
    multiply(p0, p1, a, by);                                                                       \
    multiply(p2, p3, b, by)
#define ROWS_2(multiply, a, b, by, other)                                                          \
    ROW_OF_2(multiply, 8, 9, 10, 11, a, b, by);                                                    \
    ROW_OF_2(multiply, 12, 13, 14, 15, a, b, other)
#define UNPACK_2(a, b, x, y)                                                                       \
    LOW_CODES(a, x);                                                                               \
    LOW_CODES(b, y);                                                                               \
    HIGH_CODES(x);                                                                                 \
    HIGH_CODES(y)
#define PRODUCT_2                                                                                  \
    LOAD_AT(24, codes, 0);                                                                         \
    LOAD_AT(25, codes, 16);                                                                        \
    KVT_PREFETCH(codes, ahead);                                                                    \
    DIGITS_4(16, 17, 18, 19, weight);                                                              \
    UNPACK_2(28, 29, 24, 25);                                                                      \
    DIGITS_4(20, 21, 22, 23, weight_1);                                                            \
    LEVELS_4(28, 29, 24, 25);                                                                      \
    KVT_LOAD_2(26, 27, octet_1);                                                                   \
    ROWS_2(MULTIPLY, 28, 29, 16, 20);                                                              \
    UNPACK_2(28, 29, 26, 27);                                                                      \
    ROW_OF_2(MULTIPLY_ADD, 8, 9, 10, 11, 24, 25, 17);                                              \
    LEVELS_4(28, 29, 26, 27);                                                                      \
    ROW_OF_2(MULTIPLY_ADD, 12, 13, 14, 15, 24, 25, 21);                                            \
    ROWS_2(MULTIPLY_ADD, 28, 29, 18, 22);                                                          \
    ROWS_2(MULTIPLY_ADD, 26, 27, 19, 23);                                                          \
    ADD_4;                                                                                         \
    KVT_PREFETCH_STEP(octet_1, ahead, step_2);                                                     \
    KVT_COUNT(n, 16);                                                                              \
    KVT_STEP(codes, step_2);                                                                       \
    KVT_ADVANCE(weight, 16);                                                                       \
    KVT_ADVANCE(weight_1, 16)

/* Three rows and a quad: digits 16-27, codes 28 and 29, low ones 14 and 15. */
#define ROWS_3(multiply, codes, w0, w1, w2)                                                        \
    multiply(8, 9, codes, w0);                                                                     \
    multiply(10, 11, codes, w1);                                                                   \
    multiply(12, 13, codes, w2)
#define PRODUCT_3                                                                                  \
    KVT_LOAD_AT(28, codes, zero);                                                                  \
    KVT_LOAD_AT(29, codes, step);                                                                  \
    KVT_STEP(codes, step_2);                                                                       \
    KVT_COUNT(n, 16);                                                                              \
    DIGITS_NEXT_4(16, 17, 18, 19, weight);                                                         \
    UNPACK_2(14, 15, 28, 29);                                                                      \
    DIGITS_NEXT_4(20, 21, 22, 23, weight_1);                                                       \
    LEVELS_4(14, 15, 28, 29);                                                                      \
    DIGITS_NEXT_4(24, 25, 26, 27, weight_2);                                                       \
    ROWS_3(MULTIPLY, 14, 16, 20, 24);                                                              \
    ROWS_3(MULTIPLY_ADD, 28, 17, 21, 25);                                                          \
    ROWS_3(MULTIPLY_ADD, 15, 18, 22, 26);                                                          \
    ROWS_3(MULTIPLY_ADD, 29, 19, 23, 27);                                                          \
    ADD_PARTS(0, 1, 8, 9);                                                                         \
    ADD_PARTS(2, 3, 10, 11);                                                                       \
    ADD_PARTS(4, 5, 12, 13);                                                                       \
    KVT_PREFETCH(codes, behind)

/* Four rows and a quad: digits of one octet 16-23, codes 28 and 29, low ones 24 and 25. */
#define ROWS_4(multiply, codes, w0, w1, w2, w3)                                                    \
    ROWS_3(multiply, codes, w0, w1, w2);                                                           \
    multiply(14, 15, codes, w3)
#define PRODUCT_4                                                                                  \
    KVT_LOAD_AT(28, codes, zero);                                                                  \
    KVT_LOAD_AT(29, codes, step);                                                                  \
    KVT_STEP(codes, step_2);                                                                       \
    KVT_COUNT(n, 16);                                                                              \
    DIGITS_NEXT_2(16, 17, weight);                                                                 \
    UNPACK_2(24, 25, 28, 29);                                                                      \
    DIGITS_NEXT_2(18, 19, weight_1);                                                               \
    DIGITS_NEXT_2(20, 21, weight_2);                                                               \
    LEVELS_4(24, 25, 28, 29);                                                                      \
    DIGITS_NEXT_2(22, 23, weight_3);                                                               \
    ROWS_4(MULTIPLY, 24, 16, 18, 20, 22);                                                          \
    ROWS_4(MULTIPLY_ADD, 28, 17, 19, 21, 23);                                                      \
    DIGITS_NEXT_2(16, 17, half);                                                                   \
    DIGITS_NEXT_2(18, 19, half_1);                                                                 \
    DIGITS_NEXT_2(20, 21, half_2);                                                                 \
    DIGITS_NEXT_2(22, 23, half_3);                                                                 \
    ROWS_4(MULTIPLY_ADD, 25, 16, 18, 20, 22);                                                      \
    ROWS_4(MULTIPLY_ADD, 29, 17, 19, 21, 23);                                                      \
    ADD_4;                                                                                         \
    KVT_PREFETCH(codes, behind)

KVT_INLINE void product_four(int form, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *weight, size_t ldw,
                             uintptr_t ahead, int32x4_t *total)
{
    const unsigned char *octet_1 = codes + step;
    const unsigned char *weight_1 = weight + ldw, *weight_2 = weight_1 + ldw;
    const unsigned char *weight_3 = weight_2 + ldw;
    const unsigned char *half = weight + 8, *half_1 = half + ldw, *half_2 = half_1 + ldw;
    const unsigned char *half_3 = half_2 + ldw;
    const uint8x16_t levels = kvt_levels_plus(0);
    uintptr_t before = (uintptr_t)weight - 16; /* incremented at the start, where that is free */
    size_t zero = 0, step_2 = 2 * step;
    uintptr_t behind = ahead - step_2; /* codes was incremented before its prefetch */
    __asm__("" : "+r"(zero), "+r"(step), "+r"(step_2));
    KVT_EACH_16(KVT_ZERO)
    KVT_REGISTER(30)
    KVT_REGISTER(31)
    __asm__ volatile("movi %0.16b, #15" : "=w"(KVT_R(30)) : : "memory");
    __asm__ volatile("mov %0.16b, %1.16b" : "=w"(KVT_R(31)) : "w"(levels) : "memory");
    while (n > 0) {
        KVT_EACH_16_TO_29(KVT_REGISTER)
        if (rows == 1) {
            PRODUCT_1;
        } else if (rows == 2) {
            PRODUCT_2;
        } else if (rows == 3) {
            PRODUCT_3;
        } else {
            PRODUCT_4;
        }
    }
    KVT_EACH_8(KVT_TAKE)
#define FOLD(i, a, b)                                                                              \
    if ((i) < rows * quads)                                                                        \
        total[i] =                                                                                 \
            vpaddq_s32(vreinterpretq_s32_u8(KVT_TAKEN(a)), vreinterpretq_s32_u8(KVT_TAKEN(b)));
    FOLD(0, 0, 1)
    FOLD(1, 2, 3)
    FOLD(2, 4, 5)
    FOLD(3, 6, 7)
#undef FOLD
}

/* ---- V5 ---- */

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
KVT_INLINE int16x8_t multiply(int second, uint8x16_t codes, int8x16_t digits)
{
    int8x16_t x = vreinterpretq_s8_u8(codes);
    return second ? vmull_high_s8(x, digits) : vmull_s8(vget_low_s8(x), vget_low_s8(digits));
}

KVT_INLINE int16x8_t multiply_add(int second, int16x8_t sum, uint8x16_t codes, int8x16_t digits)
{
    int8x16_t x = vreinterpretq_s8_u8(codes);
    return second ? vmlal_high_s8(sum, x, digits)
                  : vmlal_s8(sum, vget_low_s8(x), vget_low_s8(digits));
}

/*
 * The same, left to the compiler. Sum i is of row i / 2 / quads and quad i / 2 % quads, its lanes 0
 * and 1 or 2 and 3.
 */
#define IS_SUM(i) ((i) < 2 * rows * quads)
#define ROW(i) ((i) / 2 / quads)
#define QUAD(i) ((i) / 2 % quads)

KVT_INLINE void product_five(size_t rows, size_t quads, const unsigned char *codes, size_t step,
                             size_t n, const unsigned char *fifth, size_t first,
                             const unsigned char *weight, size_t ldw, uintptr_t ahead,
                             int32x4_t *total)
{
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
        uint8x16_t x[8], y[8], bits, swapped;
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
        y[v] = kvt_low_codes_5(x[v], bits, of_quad[v]);                                            \
        x[v] = kvt_high_codes_5(x[v], swapped, of_quad[v]);                                        \
    }
#define LOW(i)                                                                                     \
    if (IS_SUM(i))                                                                                 \
        part[i] = octet ? multiply_add((i) % 2, part[i], y[QUAD(i)], w[ROW(i)].low)                \
                        : multiply((i) % 2, y[QUAD(i)], w[ROW(i)].low);
#define HIGH(i)                                                                                    \
    if (IS_SUM(i))                                                                                 \
        part[i] = multiply_add((i) % 2, part[i], x[QUAD(i)], w[ROW(i)].high);
        KVT_UNROLL
        for (size_t octet = 0; octet < 2; octet++) {
            KVT_EACH_8(LOAD_CODES)
            KVT_EACH_8(LOAD_DIGITS)
            bits = vld1q_u8(fifth);
            kvt_prefetch(codes, ahead);
            KVT_LOADED();
            swapped = vextq_u8(bits, bits, 8);
            KVT_EACH_8(UNPACK)
            KVT_EACH_16(LOW)
            KVT_EACH_16(HIGH)
            codes += step;
            fifth += step / 4;
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

/* ---- the kernels ---- */

KVT_INLINE void product_4bit(int form, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *fifth, size_t first,
                             const unsigned char *weight, size_t ldw, uintptr_t ahead,
                             int32x4_t *total)
{
    if (form == KVT_V5)
        product_five(rows, quads, codes, step, n, fifth, first, weight, ldw, ahead, total);
    else
        product_four(form, rows, quads, codes, step, n, weight, ldw, ahead, total);
}

KVT_4BIT_BLOCK(4bit, 1, 4, 4, 2)
KVT_4BIT_BLOCK(4bit, 2, 2, 2, 2)
KVT_4BIT_BLOCK(4bit, 3, 1, 1, 1)
KVT_4BIT_BLOCK(4bit, 4, 1, 1, 1)

#define BLOCKS(product)                                                                            \
    {                                                                                              \
        NULL, product##_1, product##_2, product##_3, product##_4                                   \
    }

KVT_4BIT_KERNELS(, kvt_neon_, P_MOST, 0, BIAS_V5, ROWS_BLOCK, 1, kvt_store_row_digits)

void kvt_neon_gain_k(float *s, size_t rows, const uint8_t *gains, const float *add)
{
    float gain[KVT_TOKENS];
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        int16x8_t x = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(gains + t)));
        x = vsubq_s16(x, vdupq_n_s16(KVT_K4_GAIN_ONE));
        for (size_t h = 0; h < 2; h++) { /* exact */
            int32x4_t y = vmovl_s16(h ? vget_high_s16(x) : vget_low_s16(x));
            vst1q_f32(gain + t + 4 * h,
                      vfmaq_n_f32(vdupq_n_f32(1.0f), vcvtq_f32_s32(y), KVT_K4_GAIN_STEP));
        }
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t t = 0; t < KVT_TOKENS; t += 4) {
            float *at = s + r * KVT_TOKENS + t;
            float32x4_t x = vaddq_f32(vld1q_f32(at), vdupq_n_f32(add[r]));
            vst1q_f32(at, vmulq_f32(x, vld1q_f32(gain + t)));
        }
}
