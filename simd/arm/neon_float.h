/*
 * The inner loops of the f32 products, scheduled for in-order cores by the statements of
 * neon_steps.h. Macros and constants without a prefix, so only one file can include it.
 *
 * In llvm-mca's model of the Cortex-A53 a product (latency 10 cycles, one issued a cycle) delays
 * what follows it: a load of four registers by 2 slots, a conversion (6 cycles, on a pipe of its
 * own) by 3, the branch by 8. So f32 is loaded 16 lanes at a time, one summand ahead; f16 and i8
 * are converted in groups as large as registers allow, and loaded after conversions; weights are
 * loaded and pointers incremented where a loop begins and ends. An accumulator is used again after
 * 12 or 16 products, or after 8 and two loads.
 *
 * Each load of 16 lanes of f32 takes 2 issue slots from the products, so r rows need at least
 * 4r + 2 slots a summand; f16 needs a slot for each conversion, 4r + 4.
 */
#ifndef KVT_NEON_FLOAT_H
#define KVT_NEON_FLOAT_H

#include "simd/arm/neon_steps.h"

enum { F32, F16, I8 };

/* A summand of 16 lanes in registers x..x+3, by lane e of the weights. */
#define MULTIPLY_4(s0, s1, s2, s3, x0, x1, x2, x3, w, e)                                           \
    __asm__ volatile("fmla %0.4s, %4.4s, %8.s[" #e "]\n\t"                                         \
                     "fmla %1.4s, %5.4s, %8.s[" #e "]\n\t"                                         \
                     "fmla %2.4s, %6.4s, %8.s[" #e "]\n\t"                                         \
                     "fmla %3.4s, %7.4s, %8.s[" #e "]"                                             \
                     : "+w"(KVT_R(s0)), "+w"(KVT_R(s1)), "+w"(KVT_R(s2)), "+w"(KVT_R(s3))          \
                     : "w"(KVT_R(x0)), "w"(KVT_R(x1)), "w"(KVT_R(x2)), "w"(KVT_R(x3)),             \
                       "w"(KVT_R(w)))
#define WIDEN(low, high, pair)                                                                     \
    __asm__ volatile("fcvtl %0.4s, %2.4h\n\tfcvtl2 %1.4s, %2.8h"                                   \
                     : "=&w"(KVT_R(low)), "=w"(KVT_R(high))                                        \
                     : "w"(KVT_R(pair)))

/* All rows of a block by a summand of 16 lanes. */
#define ROWS_3(x0, x1, x2, x3, w0, w1, w2, e)                                                      \
    MULTIPLY_4(0, 1, 2, 3, x0, x1, x2, x3, w0, e);                                                 \
    MULTIPLY_4(4, 5, 6, 7, x0, x1, x2, x3, w1, e);                                                 \
    MULTIPLY_4(8, 9, 10, 11, x0, x1, x2, x3, w2, e)
#define ROWS_4(x0, x1, x2, x3, w0, w1, w2, w3, e)                                                  \
    MULTIPLY_4(0, 1, 2, 3, x0, x1, x2, x3, w0, e);                                                 \
    MULTIPLY_4(4, 5, 6, 7, x0, x1, x2, x3, w1, e);                                                 \
    MULTIPLY_4(8, 9, 10, 11, x0, x1, x2, x3, w2, e);                                               \
    MULTIPLY_4(12, 13, 14, 15, x0, x1, x2, x3, w3, e)

/* Sums 0-15, summands 16-23, weights 24-31. */
#define F32_4                                                                                      \
    KVT_LOAD_4(16, 17, 18, 19, at_0);                                                              \
    KVT_LOAD_NEXT_2(24, 25, weight_0);                                                             \
    KVT_LOAD_NEXT_2(26, 27, weight_1);                                                             \
    KVT_LOAD_NEXT_2(28, 29, weight_2);                                                             \
    KVT_LOAD_NEXT_2(30, 31, weight_3);                                                             \
    KVT_COUNT(left, 8);                                                                            \
    KVT_LOAD_4(20, 21, 22, 23, at_1);                                                              \
    ROWS_4(16, 17, 18, 19, 24, 26, 28, 30, 0);                                                     \
    KVT_LOAD_4(16, 17, 18, 19, at_2);                                                              \
    ROWS_4(20, 21, 22, 23, 24, 26, 28, 30, 1);                                                     \
    KVT_LOAD_4(20, 21, 22, 23, at_3);                                                              \
    ROWS_4(16, 17, 18, 19, 24, 26, 28, 30, 2);                                                     \
    KVT_LOAD_4(16, 17, 18, 19, at_4);                                                              \
    ROWS_4(20, 21, 22, 23, 24, 26, 28, 30, 3);                                                     \
    KVT_LOAD_4(20, 21, 22, 23, at_5);                                                              \
    ROWS_4(16, 17, 18, 19, 25, 27, 29, 31, 0);                                                     \
    KVT_LOAD_4(16, 17, 18, 19, at_6);                                                              \
    ROWS_4(20, 21, 22, 23, 25, 27, 29, 31, 1);                                                     \
    KVT_LOAD_4(20, 21, 22, 23, at_7);                                                              \
    ROWS_4(16, 17, 18, 19, 25, 27, 29, 31, 2);                                                     \
    ROWS_4(20, 21, 22, 23, 25, 27, 29, 31, 3)

#define F32_3                                                                                      \
    KVT_LOAD_4(16, 17, 18, 19, at_0);                                                              \
    KVT_LOAD_NEXT_2(24, 25, weight_0);                                                             \
    KVT_LOAD_NEXT_2(26, 27, weight_1);                                                             \
    KVT_LOAD_NEXT_2(28, 29, weight_2);                                                             \
    KVT_COUNT(left, 8);                                                                            \
    KVT_LOAD_4(20, 21, 22, 23, at_1);                                                              \
    ROWS_3(16, 17, 18, 19, 24, 26, 28, 0);                                                         \
    KVT_LOAD_4(16, 17, 18, 19, at_2);                                                              \
    ROWS_3(20, 21, 22, 23, 24, 26, 28, 1);                                                         \
    KVT_LOAD_4(20, 21, 22, 23, at_3);                                                              \
    ROWS_3(16, 17, 18, 19, 24, 26, 28, 2);                                                         \
    KVT_LOAD_4(16, 17, 18, 19, at_4);                                                              \
    ROWS_3(20, 21, 22, 23, 24, 26, 28, 3);                                                         \
    KVT_LOAD_4(20, 21, 22, 23, at_5);                                                              \
    ROWS_3(16, 17, 18, 19, 25, 27, 29, 0);                                                         \
    KVT_LOAD_4(16, 17, 18, 19, at_6);                                                              \
    ROWS_3(20, 21, 22, 23, 25, 27, 29, 1);                                                         \
    KVT_LOAD_4(20, 21, 22, 23, at_7);                                                              \
    ROWS_3(16, 17, 18, 19, 25, 27, 29, 2);                                                         \
    ROWS_3(20, 21, 22, 23, 25, 27, 29, 3)

/* Two rows by 32 lanes: the first 16 with sums 0-3 and 8-11, the others with 4-7 and 12-15. */
#define FIRST_2(x0, x1, x2, x3, e)                                                                 \
    MULTIPLY_4(0, 1, 2, 3, x0, x1, x2, x3, 24, e);                                                 \
    MULTIPLY_4(8, 9, 10, 11, x0, x1, x2, x3, 25, e)
#define OTHER_2(x0, x1, x2, x3, e)                                                                 \
    MULTIPLY_4(4, 5, 6, 7, x0, x1, x2, x3, 24, e);                                                 \
    MULTIPLY_4(12, 13, 14, 15, x0, x1, x2, x3, 25, e)
#define F32_2                                                                                      \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_NEXT(25, weight_1);                                                                   \
    KVT_LOAD_4(16, 17, 18, 19, at_0);                                                              \
    KVT_COUNT(left, 4);                                                                            \
    KVT_LOAD_4(20, 21, 22, 23, beside_0);                                                          \
    FIRST_2(16, 17, 18, 19, 0);                                                                    \
    KVT_LOAD_4(16, 17, 18, 19, at_1);                                                              \
    OTHER_2(20, 21, 22, 23, 0);                                                                    \
    KVT_LOAD_4(20, 21, 22, 23, beside_1);                                                          \
    FIRST_2(16, 17, 18, 19, 1);                                                                    \
    KVT_LOAD_4(16, 17, 18, 19, at_2);                                                              \
    OTHER_2(20, 21, 22, 23, 1);                                                                    \
    KVT_LOAD_4(20, 21, 22, 23, beside_2);                                                          \
    FIRST_2(16, 17, 18, 19, 2);                                                                    \
    KVT_LOAD_4(16, 17, 18, 19, at_3);                                                              \
    OTHER_2(20, 21, 22, 23, 2);                                                                    \
    KVT_LOAD_4(20, 21, 22, 23, beside_3);                                                          \
    FIRST_2(16, 17, 18, 19, 3);                                                                    \
    OTHER_2(20, 21, 22, 23, 3)

/* One row by 32 lanes: sums 0-7, each 16 lanes loaded a summand ahead. */
#define F32_1                                                                                      \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_4(8, 9, 10, 11, at_0);                                                                \
    KVT_COUNT(left, 4);                                                                            \
    KVT_LOAD_4(12, 13, 14, 15, beside_0);                                                          \
    KVT_LOAD_4(16, 17, 18, 19, at_1);                                                              \
    MULTIPLY_4(0, 1, 2, 3, 8, 9, 10, 11, 24, 0);                                                   \
    KVT_LOAD_4(20, 21, 22, 23, beside_1);                                                          \
    MULTIPLY_4(4, 5, 6, 7, 12, 13, 14, 15, 24, 0);                                                 \
    KVT_LOAD_4(8, 9, 10, 11, at_2);                                                                \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 1);                                                 \
    KVT_LOAD_4(12, 13, 14, 15, beside_2);                                                          \
    MULTIPLY_4(4, 5, 6, 7, 20, 21, 22, 23, 24, 1);                                                 \
    KVT_LOAD_4(16, 17, 18, 19, at_3);                                                              \
    MULTIPLY_4(0, 1, 2, 3, 8, 9, 10, 11, 24, 2);                                                   \
    KVT_LOAD_4(20, 21, 22, 23, beside_3);                                                          \
    MULTIPLY_4(4, 5, 6, 7, 12, 13, 14, 15, 24, 2);                                                 \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 3);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 20, 21, 22, 23, 24, 3)

/* f16, two summands at a time: as loaded 28-31, widened 16-23, weights 24-27. */
#define F16_4                                                                                      \
    KVT_LOAD_2(28, 29, at_0);                                                                      \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_NEXT(25, weight_1);                                                                   \
    KVT_LOAD_NEXT(26, weight_2);                                                                   \
    KVT_LOAD_NEXT(27, weight_3);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    WIDEN(16, 17, 28);                                                                             \
    KVT_LOAD_2(30, 31, at_1);                                                                      \
    WIDEN(18, 19, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_2);                                                                      \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    KVT_LOAD_2(30, 31, at_3);                                                                      \
    ROWS_4(16, 17, 18, 19, 24, 25, 26, 27, 0);                                                     \
    ROWS_4(20, 21, 22, 23, 24, 25, 26, 27, 1);                                                     \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    ROWS_4(16, 17, 18, 19, 24, 25, 26, 27, 2);                                                     \
    ROWS_4(20, 21, 22, 23, 24, 25, 26, 27, 3)

#define F16_3                                                                                      \
    KVT_LOAD_2(28, 29, at_0);                                                                      \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_NEXT(25, weight_1);                                                                   \
    KVT_LOAD_NEXT(26, weight_2);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    WIDEN(16, 17, 28);                                                                             \
    KVT_LOAD_2(30, 31, at_1);                                                                      \
    WIDEN(18, 19, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_2);                                                                      \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    KVT_LOAD_2(30, 31, at_3);                                                                      \
    ROWS_3(16, 17, 18, 19, 24, 25, 26, 0);                                                         \
    ROWS_3(20, 21, 22, 23, 24, 25, 26, 1);                                                         \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    ROWS_3(16, 17, 18, 19, 24, 25, 26, 2);                                                         \
    ROWS_3(20, 21, 22, 23, 24, 25, 26, 3)

#define F16_2                                                                                      \
    KVT_LOAD_2(28, 29, at_0);                                                                      \
    KVT_LOAD_2(30, 31, beside_0);                                                                  \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_NEXT(25, weight_1);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_1);                                                                      \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    KVT_LOAD_2(30, 31, beside_1);                                                                  \
    FIRST_2(16, 17, 18, 19, 0);                                                                    \
    OTHER_2(20, 21, 22, 23, 0);                                                                    \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_2);                                                                      \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    KVT_LOAD_2(30, 31, beside_2);                                                                  \
    FIRST_2(16, 17, 18, 19, 1);                                                                    \
    OTHER_2(20, 21, 22, 23, 1);                                                                    \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_3);                                                                      \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    KVT_LOAD_2(30, 31, beside_3);                                                                  \
    FIRST_2(16, 17, 18, 19, 2);                                                                    \
    OTHER_2(20, 21, 22, 23, 2);                                                                    \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    FIRST_2(16, 17, 18, 19, 3);                                                                    \
    OTHER_2(20, 21, 22, 23, 3)

#define F16_1                                                                                      \
    KVT_LOAD_2(28, 29, at_0);                                                                      \
    KVT_LOAD_2(30, 31, beside_0);                                                                  \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    WIDEN(8, 9, 28);                                                                               \
    WIDEN(10, 11, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_1);                                                                      \
    WIDEN(12, 13, 30);                                                                             \
    WIDEN(14, 15, 31);                                                                             \
    KVT_LOAD_2(30, 31, beside_1);                                                                  \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_2);                                                                      \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    KVT_LOAD_2(30, 31, beside_2);                                                                  \
    MULTIPLY_4(0, 1, 2, 3, 8, 9, 10, 11, 24, 0);                                                   \
    MULTIPLY_4(4, 5, 6, 7, 12, 13, 14, 15, 24, 0);                                                 \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 1);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 20, 21, 22, 23, 24, 1);                                                 \
    WIDEN(8, 9, 28);                                                                               \
    WIDEN(10, 11, 29);                                                                             \
    KVT_LOAD_2(28, 29, at_3);                                                                      \
    WIDEN(12, 13, 30);                                                                             \
    WIDEN(14, 15, 31);                                                                             \
    KVT_LOAD_2(30, 31, beside_3);                                                                  \
    WIDEN(16, 17, 28);                                                                             \
    WIDEN(18, 19, 29);                                                                             \
    WIDEN(20, 21, 30);                                                                             \
    WIDEN(22, 23, 31);                                                                             \
    MULTIPLY_4(0, 1, 2, 3, 8, 9, 10, 11, 24, 2);                                                   \
    MULTIPLY_4(4, 5, 6, 7, 12, 13, 14, 15, 24, 2);                                                 \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 3);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 20, 21, 22, 23, 24, 3)

/*
 * Codes as f32: element e of each lane's four is shifted to the top byte, the bytes below it are
 * cleared (after element 1's shift that is one byte), and the lane is converted as a fixed-point
 * number with 24 fraction bits.
 */
#define SHIFT_4(x0, x1, x2, x3, from0, from1, from2, from3, bits)                                  \
    __asm__ volatile("shl %0.4s, %4.4s, #" #bits "\n\tshl %1.4s, %5.4s, #" #bits                   \
                     "\n\tshl %2.4s, %6.4s, #" #bits "\n\tshl %3.4s, %7.4s, #" #bits               \
                     : "=w"(KVT_R(x0)), "=w"(KVT_R(x1)), "=w"(KVT_R(x2)), "=w"(KVT_R(x3))          \
                     : "w"(KVT_R(from0)), "w"(KVT_R(from1)), "w"(KVT_R(from2)), "w"(KVT_R(from3)))
#define CLEAR_4(x0, x1, x2, x3)                                                                    \
    __asm__ volatile("bic %0.4s, #255, lsl #16\n\tbic %1.4s, #255, lsl #16\n\t"                    \
                     "bic %2.4s, #255, lsl #16\n\tbic %3.4s, #255, lsl #16"                        \
                     : "+w"(KVT_R(x0)), "+w"(KVT_R(x1)), "+w"(KVT_R(x2)), "+w"(KVT_R(x3)))
#define TOP(mask) __asm__ volatile("movi %0.4s, #255, lsl #24" : "=w"(KVT_R(mask)))
#define TOP_4(x0, x1, x2, x3, mask)                                                                \
    __asm__ volatile("and %0.16b, %0.16b, %4.16b\n\tand %1.16b, %1.16b, %4.16b\n\t"                \
                     "and %2.16b, %2.16b, %4.16b\n\tand %3.16b, %3.16b, %4.16b"                    \
                     : "+w"(KVT_R(x0)), "+w"(KVT_R(x1)), "+w"(KVT_R(x2)), "+w"(KVT_R(x3))          \
                     : "w"(KVT_R(mask)))
#define CONVERT_4(x0, x1, x2, x3)                                                                  \
    __asm__ volatile("scvtf %0.4s, %0.4s, #24\n\tscvtf %1.4s, %1.4s, #24\n\t"                      \
                     "scvtf %2.4s, %2.4s, #24\n\tscvtf %3.4s, %3.4s, #24"                          \
                     : "+w"(KVT_R(x0)), "+w"(KVT_R(x1)), "+w"(KVT_R(x2)), "+w"(KVT_R(x3)))

/* i8, a group of four summands: codes 28-31, two elements 16-23, weights 24-27. */
#define I8_4                                                                                       \
    KVT_LOAD_4(28, 29, 30, 31, at_0);                                                              \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_NEXT(25, weight_1);                                                                   \
    KVT_LOAD_NEXT(26, weight_2);                                                                   \
    KVT_LOAD_NEXT(27, weight_3);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    SHIFT_4(20, 21, 22, 23, 28, 29, 30, 31, 16);                                                   \
    SHIFT_4(16, 17, 18, 19, 28, 29, 30, 31, 24);                                                   \
    CLEAR_4(20, 21, 22, 23);                                                                       \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    CONVERT_4(20, 21, 22, 23);                                                                     \
    ROWS_4(16, 17, 18, 19, 24, 25, 26, 27, 0);                                                     \
    ROWS_4(20, 21, 22, 23, 24, 25, 26, 27, 1);                                                     \
    SHIFT_4(16, 17, 18, 19, 28, 29, 30, 31, 8);                                                    \
    TOP(20);                                                                                       \
    TOP_4(28, 29, 30, 31, 20);                                                                     \
    TOP_4(16, 17, 18, 19, 20);                                                                     \
    CONVERT_4(28, 29, 30, 31);                                                                     \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    ROWS_4(16, 17, 18, 19, 24, 25, 26, 27, 2);                                                     \
    ROWS_4(28, 29, 30, 31, 24, 25, 26, 27, 3)

#define I8_3                                                                                       \
    KVT_LOAD_4(28, 29, 30, 31, at_0);                                                              \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_NEXT(25, weight_1);                                                                   \
    KVT_LOAD_NEXT(26, weight_2);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    SHIFT_4(20, 21, 22, 23, 28, 29, 30, 31, 16);                                                   \
    SHIFT_4(16, 17, 18, 19, 28, 29, 30, 31, 24);                                                   \
    CLEAR_4(20, 21, 22, 23);                                                                       \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    CONVERT_4(20, 21, 22, 23);                                                                     \
    ROWS_3(16, 17, 18, 19, 24, 25, 26, 0);                                                         \
    ROWS_3(20, 21, 22, 23, 24, 25, 26, 1);                                                         \
    SHIFT_4(16, 17, 18, 19, 28, 29, 30, 31, 8);                                                    \
    TOP(20);                                                                                       \
    TOP_4(28, 29, 30, 31, 20);                                                                     \
    TOP_4(16, 17, 18, 19, 20);                                                                     \
    CONVERT_4(28, 29, 30, 31);                                                                     \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    ROWS_3(16, 17, 18, 19, 24, 25, 26, 2);                                                         \
    ROWS_3(28, 29, 30, 31, 24, 25, 26, 3)

/* Two rows by 16 lanes have room for all four elements. */
#define I8_2                                                                                       \
    KVT_LOAD_4(28, 29, 30, 31, at_0);                                                              \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_LOAD_NEXT(25, weight_1);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    SHIFT_4(12, 13, 14, 15, 28, 29, 30, 31, 16);                                                   \
    SHIFT_4(8, 9, 10, 11, 28, 29, 30, 31, 24);                                                     \
    CLEAR_4(12, 13, 14, 15);                                                                       \
    CONVERT_4(8, 9, 10, 11);                                                                       \
    CONVERT_4(12, 13, 14, 15);                                                                     \
    SHIFT_4(16, 17, 18, 19, 28, 29, 30, 31, 8);                                                    \
    TOP_4(28, 29, 30, 31, 26);                                                                     \
    TOP_4(16, 17, 18, 19, 26);                                                                     \
    CONVERT_4(28, 29, 30, 31);                                                                     \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    MULTIPLY_4(0, 1, 2, 3, 8, 9, 10, 11, 24, 0);                                                   \
    MULTIPLY_4(4, 5, 6, 7, 8, 9, 10, 11, 25, 0);                                                   \
    MULTIPLY_4(0, 1, 2, 3, 12, 13, 14, 15, 24, 1);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 12, 13, 14, 15, 25, 1);                                                 \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 2);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 16, 17, 18, 19, 25, 2);                                                 \
    MULTIPLY_4(0, 1, 2, 3, 28, 29, 30, 31, 24, 3);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 28, 29, 30, 31, 25, 3)

/* One row by 32 lanes: codes 8-15, an element 16-23. */
#define I8_1                                                                                       \
    KVT_LOAD_4(8, 9, 10, 11, at_0);                                                                \
    KVT_LOAD_4(12, 13, 14, 15, beside_0);                                                          \
    KVT_LOAD_NEXT(24, weight_0);                                                                   \
    KVT_COUNT(left, 4);                                                                            \
    SHIFT_4(16, 17, 18, 19, 8, 9, 10, 11, 24);                                                     \
    SHIFT_4(20, 21, 22, 23, 12, 13, 14, 15, 24);                                                   \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    CONVERT_4(20, 21, 22, 23);                                                                     \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 0);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 20, 21, 22, 23, 24, 0);                                                 \
    SHIFT_4(16, 17, 18, 19, 8, 9, 10, 11, 16);                                                     \
    SHIFT_4(20, 21, 22, 23, 12, 13, 14, 15, 16);                                                   \
    CLEAR_4(16, 17, 18, 19);                                                                       \
    CLEAR_4(20, 21, 22, 23);                                                                       \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    CONVERT_4(20, 21, 22, 23);                                                                     \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 1);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 20, 21, 22, 23, 24, 1);                                                 \
    SHIFT_4(16, 17, 18, 19, 8, 9, 10, 11, 8);                                                      \
    SHIFT_4(20, 21, 22, 23, 12, 13, 14, 15, 8);                                                    \
    TOP_4(16, 17, 18, 19, 25);                                                                     \
    TOP_4(20, 21, 22, 23, 25);                                                                     \
    CONVERT_4(16, 17, 18, 19);                                                                     \
    CONVERT_4(20, 21, 22, 23);                                                                     \
    MULTIPLY_4(0, 1, 2, 3, 16, 17, 18, 19, 24, 2);                                                 \
    MULTIPLY_4(4, 5, 6, 7, 20, 21, 22, 23, 24, 2);                                                 \
    TOP_4(8, 9, 10, 11, 25);                                                                       \
    TOP_4(12, 13, 14, 15, 25);                                                                     \
    CONVERT_4(8, 9, 10, 11);                                                                       \
    CONVERT_4(12, 13, 14, 15);                                                                     \
    MULTIPLY_4(0, 1, 2, 3, 8, 9, 10, 11, 24, 3);                                                   \
    MULTIPLY_4(4, 5, 6, 7, 12, 13, 14, 15, 24, 3)

/*
 * All sums of a block, from zero, over as many of n summands as the loops above do, 4 or 8 at a
 * time. Returns how many were done.
 */
KVT_INLINE size_t kvt_product_in_order(int type, int side, size_t rows, size_t vectors,
                                       const unsigned char *codes, size_t group, size_t step,
                                       size_t n, const float *weight, size_t ldw, uintptr_t ahead,
                                       float32x4_t *sum)
{
    const size_t at_once = type == F32 && vectors == 4 ? 8 : 4, whole = n / at_once * at_once;
    const size_t stride = type == I8 ? step : at_once * step;
    const unsigned char *at_0 = codes, *at_1 = at_0 + step, *at_2 = at_1 + step;
    const unsigned char *at_3 = at_2 + step, *at_4 = at_3 + step, *at_5 = at_4 + step;
    const unsigned char *at_6 = at_5 + step, *at_7 = at_6 + step;
    const unsigned char *beside_0 = codes + group, *beside_1 = beside_0 + step;
    const unsigned char *beside_2 = beside_1 + step, *beside_3 = beside_2 + step;
    const float *weight_0 = weight, *weight_1 = weight_0 + ldw, *weight_2 = weight_1 + ldw;
    const float *weight_3 = weight_2 + ldw;
    KVT_EACH_16(KVT_ZERO)
    KVT_EACH_FROM_16(KVT_REGISTER)
    if (type == I8 && rows == 1)
        TOP(25);
    if (type == I8 && rows == 2)
        TOP(26);
    for (size_t left = whole; left > 0;) {
        if (type == I8 && rows == 1) {
            I8_1;
        } else if (type == I8 && rows == 2) {
            I8_2;
        } else if (type == I8 && rows == 3) {
            I8_3;
        } else if (type == I8) {
            I8_4;
        } else if (type == F32 && rows == 1) {
            F32_1;
        } else if (type == F32 && rows == 2) {
            F32_2;
        } else if (type == F32 && rows == 3) {
            F32_3;
        } else if (type == F32) {
            F32_4;
        } else if (rows == 1) {
            F16_1;
        } else if (rows == 2) {
            F16_2;
        } else if (rows == 3) {
            F16_3;
        } else {
            F16_4;
        }
        /* A line is 16 lanes of f32 or of a group; of f16 two summands (K) or 32 lanes (V). */
        const int both = type != F16 || side == KVT_K, odd = type != F16 || side == KVT_V;
#define NEXT(at, is_used, is_prefetched)                                                           \
    if ((is_used) && (is_prefetched))                                                              \
        KVT_PREFETCH_STEP(at, ahead, stride);                                                      \
    else if (is_used)                                                                              \
        KVT_STEP(at, stride);
        NEXT(at_0, 1, 1)
        NEXT(at_1, type != I8, odd)
        NEXT(at_2, type != I8, 1)
        NEXT(at_3, type != I8, odd)
        NEXT(at_4, at_once == 8, 1)
        NEXT(at_5, at_once == 8, 1)
        NEXT(at_6, at_once == 8, 1)
        NEXT(at_7, at_once == 8, 1)
        NEXT(beside_0, vectors == 8, both)
        NEXT(beside_1, type != I8 && vectors == 8, both && odd)
        NEXT(beside_2, type != I8 && vectors == 8, both)
        NEXT(beside_3, type != I8 && vectors == 8, both && odd)
#undef NEXT
    }
    KVT_EACH_16(KVT_TAKE)
#define SUM(i)                                                                                     \
    if ((i) < rows * vectors)                                                                      \
        sum[i] = vreinterpretq_f32_u8(KVT_TAKEN(i));
    KVT_EACH_16(SUM)
#undef SUM
    return whole;
}

#endif /* KVT_NEON_FLOAT_H */
