/*
 * What the AVX-512 files share: the compiler's dialect, and the kernels of the other files that
 * the table in avx512vnni.c names. Included by these files only.
 */
#ifndef KVT_AVX512_H
#define KVT_AVX512_H

#include <immintrin.h>

#include "simd/kernels.h"

#define KVT_INLINE static inline __attribute__((always_inline))

/* The loop below has a small constant count and must not stay a loop: its arrays are registers. */
#if defined(__clang__)
#define KVT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVT_UNROLL _Pragma("GCC unroll 16")
#endif

KVT_INLINE __m512 kvt_load_f16(const uint16_t *from)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)from));
}

/* clang-format off */
/* The entries of the table that avx512_append.c defines. */
#define KVT_AVX512_APPEND_LIST(X)                                                                  \
    X(load_f32) X(load_f16) X(load_bf16) X(store_bf16) X(rotate) X(unrotate)                       \
    X(put_k_f16) X(put_k_open) X(put_k_i8) X(put_v_f16) X(get_v_f16) X(get_v_i8)
/* Those of avx512_4bit.c, avx512_4bit_float.c and avx512_4bit_seal.c. */
#define KVT_AVX512_4BIT_LIST(X)                                                                    \
    X(qk_i4_near) X(pv_i4_near) X(pv_i5_near) X(qk_i4) X(pv_i4) X(pv_i5)                           \
    X(range_k_f16) X(seal_k_i4) X(seal_v_i4) X(seal_v_i5) X(gain_k)
/* And those that avx512_float.c defines. */
#define KVT_AVX512_FLOAT_LIST(X)                                                                   \
    X(qk_f32) X(qk_f16) X(qk_i8) X(pv_f32) X(pv_f16) X(pv_i8)                                      \
    X(dots_f16) X(logits) X(softmax) X(merge) X(finish)
/* clang-format on */

/*
 * Prototypes of the whole list, also of kernels that have no AVX-512 definition: naming one of
 * those in the table fails at link time.
 */
#define KVT_KERNEL_PROTOTYPE(result, name, parameters) result kvt_avx512_##name parameters;
KVT_KERNEL_LIST(KVT_KERNEL_PROTOTYPE)
#undef KVT_KERNEL_PROTOTYPE

/* Rows of the next block when `left` remain: blocks of equal size, none above `most`. */
KVT_INLINE size_t kvt_rows_of_block(size_t left, size_t most)
{
    size_t blocks = (left + most - 1) / most;
    return (left + blocks - 1) / blocks;
}

/* The lanes i with first + i < n. */
KVT_INLINE __mmask16 kvt_lanes_below(size_t first, size_t n)
{
    unsigned lanes = n >= first + 16 ? 0xffffu : n <= first ? 0u : (1u << (n - first)) - 1u;
    return (__mmask16)lanes;
}

#endif /* KVT_AVX512_H */
