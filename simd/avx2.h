/*
 * What the two AVX2 files share: the compiler's dialect, sums over a register, and the kernels of
 * avx2_append.c that the table in avx2.c names. Included by these two files only.
 */
#ifndef KVT_AVX2_H
#define KVT_AVX2_H

#include <immintrin.h>

#include "kernels.h"

#define KVT_INLINE static inline __attribute__((always_inline))

/* The loop below has a small constant count and must not stay a loop: its arrays are registers. */
#if defined(__clang__)
#define KVT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVT_UNROLL _Pragma("GCC unroll 16")
#endif

/* What memory holds is to be loaded again, not kept in a register that is not there. */
#define KVT_RELOAD() __asm__ volatile("" ::: "memory")

/* Unaligned access to typed arrays, without a cast at each use. */
KVT_INLINE __m256i kvt_load_256(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

KVT_INLINE __m128i kvt_load_128(const void *from)
{
    return _mm_loadu_si128((const __m128i *)from);
}

KVT_INLINE void kvt_store_256(void *to, __m256i x)
{
    _mm256_storeu_si256((__m256i *)to, x);
}

KVT_INLINE void kvt_store_128(void *to, __m128i x)
{
    _mm_storeu_si128((__m128i *)to, x);
}

/* clang-format off */
/* The entries of the table that avx2_append.c defines. */
#define KVT_AVX2_APPEND_LIST(X)                                                                    \
    X(load_f32) X(load_f16) X(load_bf16) X(store_f16) X(store_bf16) X(rotate) X(unrotate)          \
    X(put_k_f32) X(put_k_f16) X(put_k_i8) X(put_v_f16) X(put_v_i8)                                 \
    X(get_k_i8) X(get_v_f16) X(get_v_i8) X(mean_k_i8)
/* clang-format on */

/* Their prototypes, and those of kernels that nobody defines: a name is checked by its use. */
#define KVT_KERNEL_PROTOTYPE(result, name, parameters) result kvt_avx2_##name parameters;
KVT_KERNEL_LIST(KVT_KERNEL_PROTOTYPE)
#undef KVT_KERNEL_PROTOTYPE

#endif /* KVT_AVX2_H */
