/*
 * Steps of inner loops in an order that compilers keep, for cores that issue in order.
 *
 * Such a core does what comes next or waits, and its results come in order as well: by llvm-mca's
 * Cortex-A53 what would be ready before the result of an earlier instruction waits. A load of one
 * register takes 4 cycles, of two 5, of four 7, an addition 3, a branch 1; a product of integers or
 * a widening 6, a product of f32 10. So behind an integer product a load of one register costs a
 * slot and one of several none; behind one of f32 a load of four registers costs 2, of one 5.
 * Pointers step for nothing behind loads and at the end of a loop, where the branch waits anyway.
 *
 * Compilers undo the order of intrinsics. These statements they keep, and their operands are
 * registers by number: loads of two and four want neighbours, and no copy finds its way between.
 *
 * From one statement to the next such a register keeps its value only if nobody is called, and who
 * calls need not be the source: sanitizers do at every access to memory. So sums begin with
 * KVT_ZERO and end with KVT_TAKE, which no access passes, and nothing but these statements and
 * arithmetic of integers stands between.
 */
#ifndef KVT_NEON_STEPS_H
#define KVT_NEON_STEPS_H

#include "simd/arm/neon.h"

/* Vector register n as a variable. */
#define KVT_R(n) kvt_r##n
#define KVT_REGISTER(n) register uint8x16_t KVT_R(n) __asm__("v" #n);
#define KVT_ZERO(n)                                                                                \
    KVT_REGISTER(n)                                                                                \
    __asm__ volatile("movi %0.2d, #0" : "=w"(KVT_R(n)) : : "memory");
/*
 * Its value at the end, in a variable like any other. (Not as one statement that ties the two:
 * clang 14 forgets the tie where a register has a number.)
 */
#define KVT_TAKEN(n) kvt_taken##n
#define KVT_TAKE(n)                                                                                \
    uint8x16_t KVT_TAKEN(n) = KVT_R(n);                                                            \
    __asm__ volatile("" : "+w"(KVT_TAKEN(n)) : : "memory");
#define KVT_EACH_FROM_16(X)                                                                        \
    X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)

/* Loads of neighbours. */
#define KVT_LOAD_2(a, b, from)                                                                     \
    __asm__ volatile("ld1 {%0.16b, %1.16b}, [%2]"                                                  \
                     : "=w"(KVT_R(a)), "=w"(KVT_R(b))                                              \
                     : "r"(from)                                                                   \
                     : "memory")
#define KVT_LOAD_4(a, b, c, d, from)                                                               \
    __asm__ volatile("ld1 {%0.16b, %1.16b, %2.16b, %3.16b}, [%4]"                                  \
                     : "=w"(KVT_R(a)), "=w"(KVT_R(b)), "=w"(KVT_R(c)), "=w"(KVT_R(d))              \
                     : "r"(from)                                                                   \
                     : "memory")
/* One register, one or two by a pointer that steps on. */
#define KVT_LOAD_AT(a, from, offset)                                                               \
    __asm__ volatile("ldr %q0, [%1, %2]" : "=w"(KVT_R(a)) : "r"(from), "r"(offset) : "memory")
#define KVT_LOAD_NEXT(a, from)                                                                     \
    __asm__ volatile("ldr %q0, [%1]\n\tadd %1, %1, #16" : "=w"(KVT_R(a)), "+r"(from) : : "memory")
#define KVT_LOAD_NEXT_2(a, b, from)                                                                \
    __asm__ volatile("ldp %q0, %q1, [%2]\n\tadd %2, %2, #32"                                       \
                     : "=w"(KVT_R(a)), "=w"(KVT_R(b)), "+r"(from)                                  \
                     :                                                                             \
                     : "memory")
#define KVT_STEP(pointer, bytes)                                                                   \
    __asm__ volatile("add %0, %0, %1" : "+r"(pointer) : "r"(bytes) : "memory")
/* kvt_prefetch, whose sum some compilers make before it, and a step behind it. */
#define KVT_ASK(pointer, ahead)                                                                    \
    __asm__ volatile("prfm pldl1keep, [%0, %1]" : : "r"(pointer), "r"(ahead) : "memory")
#define KVT_PREFETCH_STEP(pointer, ahead, bytes)                                                   \
    __asm__ volatile("prfm pldl1keep, [%0, %1]\n\tadd %0, %0, %2"                                  \
                     : "+r"(pointer)                                                               \
                     : "r"(ahead), "r"(bytes)                                                      \
                     : "memory")
#define KVT_COUNT(left, n) __asm__ volatile("sub %0, %0, %1" : "+r"(left) : "i"(n) : "memory")

#endif /* KVT_NEON_STEPS_H */
