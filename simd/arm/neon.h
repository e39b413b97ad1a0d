/*
 * What the NEON files share: compiler attributes, loads, the size of blocks of rows, and the
 * prototypes of the kernels that the table in neon.c lists.
 */
#ifndef KVT_NEON_H
#define KVT_NEON_H

#include <arm_neon.h>

#include "simd/kernels.h"

#define KVT_INLINE static inline __attribute__((always_inline))

/*
 * A block of rows, compiled as a function of its own. Instrumentation must not insert calls into
 * it: the statements of neon_steps.h keep values in registers that a call clobbers, and a fuzzer's
 * coverage instrumentation calls at every branch.
 */
#if defined(__clang__)
#define KVT_BLOCK_OF_ROWS                                                                          \
    static __attribute__((noinline, no_instrument_function, no_sanitize("coverage")))
#elif defined(__GNUC__) && __GNUC__ >= 12
#define KVT_BLOCK_OF_ROWS                                                                          \
    static __attribute__((noinline, no_instrument_function, no_sanitize_coverage))
#else
#define KVT_BLOCK_OF_ROWS static __attribute__((noinline, no_instrument_function))
#endif

/* The side of a product: weights of K (q) may be negative, those of V (p) not. */
enum { KVT_K, KVT_V };

/* The loop below has a small constant count and must not stay a loop: its arrays are registers. */
#if defined(__clang__)
#define KVT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVT_UNROLL _Pragma("GCC unroll 16")
#endif

/*
 * The accumulators of a block of rows are arrays that live in registers only: these macros make
 * every index a constant. (With loops, clang 14 keeps such arrays in memory.)
 */
#define KVT_EACH_8(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define KVT_EACH_16(X) KVT_EACH_8(X) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
/*
 * A compiler barrier for loads. A block loads its operands and then multiplies: compilers would
 * hoist loads until registers run out, or sink them to their use, where in-order cores stall.
 */
#define KVT_LOADED() __asm__ volatile("" ::: "memory")

/* Unaligned loads of bytes, without a cast at each use. */
KVT_INLINE int8x16_t kvt_load_s8(const unsigned char *from)
{
    return vreinterpretq_s8_u8(vld1q_u8(from));
}

/* Four f16. armv8-a has the conversions, though no arithmetic on f16. */
KVT_INLINE float32x4_t kvt_load_f16x4(const uint16_t *from)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
}

/* All of an f32 but its sign. */
#define KVT_MAGNITUDE 0x7fffffffu

/* 8 elements to f16, to nearest even, infinity beyond it. */
KVT_INLINE uint16x8_t kvt_to_f16(float32x4_t low, float32x4_t high)
{
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high));
}

/* Prefetch the line `ahead` bytes from here: it is in the block that the next product reads. */
KVT_INLINE void kvt_prefetch(const void *here, uintptr_t ahead)
{
    __builtin_prefetch((const void *)((uintptr_t)here + ahead));
}

/*
 * `ahead` for a call whose codes are at `codes`. Zero prefetches the line that is being read, which
 * costs an issue slot and no memory traffic: it is used by later passes over lines whose successors
 * have been prefetched already.
 */
KVT_INLINE uintptr_t kvt_ahead(const void *codes, const void *next)
{
    return next ? (uintptr_t)next - (uintptr_t)codes : 0;
}

/* Rows of the next block when `left` remain: blocks of equal size, none above `most`. */
KVT_INLINE size_t kvt_rows_of_block(size_t left, size_t most)
{
    size_t blocks = (left + most - 1) / most;
    return (left + blocks - 1) / blocks;
}

/* All ones in the lanes i with first + i < n. */
KVT_INLINE uint32x4_t kvt_lanes_below(size_t first, size_t n)
{
    static const uint32_t index[4] = {0, 1, 2, 3};
    uint32x4_t lanes = vaddq_u32(vld1q_u32(index), vdupq_n_u32((uint32_t)first));
    return vcltq_u32(lanes, vdupq_n_u32((uint32_t)n));
}

/* x where the mask is set, else zero. */
KVT_INLINE float32x4_t kvt_and_f32(float32x4_t x, uint32x4_t mask)
{
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), mask));
}

/*
 * The scales of V's tokens as f32, zero from n_tokens on: there the stored scale may be a NaN, and
 * 0 * NaN is NaN. Writes up to the next multiple of 16.
 */
KVT_INLINE void kvt_live_scales(const uint16_t *scales, size_t n_tokens, float *out)
{
    for (size_t t = 0; t < kvt_round_up(n_tokens, 16); t += 4)
        vst1q_f32(out + t, kvt_and_f32(kvt_load_f16x4(scales + t), kvt_lanes_below(t, n_tokens)));
}

/* clang-format off */
/* The entries of the table that neon_rows.c and neon_append.c define. */
#define KVT_NEON_APPEND_LIST(X)                                                                    \
    X(load_f32) X(load_f16) X(load_bf16) X(store_f16) X(store_bf16) X(rotate) X(unrotate)          \
    X(put_k_f32) X(put_k_f16) X(put_k_open) X(put_k_i8) X(put_v_f16) X(put_v_i8)                                 \
    X(get_k_i8) X(get_v_f16) X(get_v_i8)
/* Those of neon_seal.c. */
#define KVT_NEON_SEAL_LIST(X) X(mean_k_f16) X(seal_k_i8) X(seal_v_i8)
/* Those of neon_seal_4bit.c. */
#define KVT_NEON_SEAL_4BIT_LIST(X) X(range_k_f16) X(seal_k_i4) X(seal_v_i4) X(seal_v_i5)
/* And those of neon_near.c, neon_4bit.c and neon_softmax.c. */
#define KVT_NEON_NEAR_LIST(X) X(pack_q_near) X(qk_i8_near) X(pv_i8_near)
#define KVT_NEON_4BIT_LIST(X) X(qk_i4_near) X(pv_i4_near) X(pv_i5_near) X(gain_k)
#define KVT_NEON_SOFTMAX_LIST(X) X(dots_f16) X(logits) X(alibi) X(softmax) X(merge) X(finish)
/* clang-format on */

/*
 * Prototypes of the whole list, also of kernels that have no NEON definition: naming one of those
 * in the table fails at link time.
 */
#define KVT_KERNEL_PROTOTYPE(result, name, parameters) result kvt_neon_##name parameters;
KVT_KERNEL_LIST(KVT_KERNEL_PROTOTYPE)
#undef KVT_KERNEL_PROTOTYPE

#endif /* KVT_NEON_H */
