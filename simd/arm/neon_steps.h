/*
 * Instructions of inner loops as volatile asm, whose order compilers keep, for in-order cores.
 *
 * Such a core issues instructions in program order and, in llvm-mca's model of the Cortex-A53, also
 * retires their results in order: an instruction whose result would be ready before that of an
 * earlier one is delayed. Latencies in cycles: a load of one register 4, of two 5, of four 7; an
 * integer addition 3; a branch 1; an integer product or a widening 6; an f32 product 10. So after
 * an integer product a load of one register costs one issue slot and a load of several none; after
 * an f32 product a load of four registers costs 2 slots, of one 5. Pointer increments are free
 * after loads and at the end of a loop, where the branch is delayed anyway.
 *
 * Compilers reorder intrinsics but not these statements. Their operands are registers by number,
 * since ld1 of two and four registers takes consecutive ones, and the compiler inserts no copies.
 *
 * Such a register keeps its value between statements only if no function is called, and calls can
 * be inserted by the compiler: sanitizers call at every access to memory. So accumulators begin
 * with KVT_ZERO and end with KVT_TAKE, both barriers for memory accesses, and between them are only
 * these statements and integer arithmetic.
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
 * Its value at the end, in an ordinary variable. (A copy and a barrier, not one statement with a
 * matching constraint: clang 14 ignores that for variables bound to a register.)
 */
#define KVT_TAKEN(n) kvt_taken##n
#define KVT_TAKE(n)                                                                                \
    uint8x16_t KVT_TAKEN(n) = KVT_R(n);                                                            \
    __asm__ volatile("" : "+w"(KVT_TAKEN(n)) : : "memory");
#define KVT_EACH_16_TO_29(X)                                                                       \
    X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29)
#define KVT_EACH_FROM_16(X) KVT_EACH_16_TO_29(X) X(30) X(31)

/* Loads of consecutive registers. */
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
/* A load of one register at an offset; of one or two with a pointer increment. */
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
/*
 * kvt_prefetch with the address in the instruction, where some compilers form the sum by a separate
 * one; and the same followed by a pointer increment.
 */
#define KVT_PREFETCH(pointer, ahead)                                                               \
    __asm__ volatile("prfm pldl1keep, [%0, %1]" : : "r"(pointer), "r"(ahead) : "memory")
#define KVT_PREFETCH_STEP(pointer, ahead, bytes)                                                   \
    __asm__ volatile("prfm pldl1keep, [%0, %1]\n\tadd %0, %0, %2"                                  \
                     : "+r"(pointer)                                                               \
                     : "r"(ahead), "r"(bytes)                                                      \
                     : "memory")
#define KVT_ADVANCE(pointer, n)                                                                    \
    __asm__ volatile("add %0, %0, %1" : "+r"(pointer) : "i"(n) : "memory")
#define KVT_COUNT(left, n) __asm__ volatile("sub %0, %0, %1" : "+r"(left) : "i"(n) : "memory")

#endif /* KVT_NEON_STEPS_H */
