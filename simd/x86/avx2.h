/*
 * What the AVX2 files share: the compiler's dialect, transposes, and the kernels of the other files
 * that the table in avx2.c names.
 */
#ifndef KVT_AVX2_H
#define KVT_AVX2_H

#include <immintrin.h>

#include "simd/kernels.h"

#define KVT_INLINE static inline __attribute__((always_inline))

/* The loop below has a small constant count and must not stay a loop: its arrays are registers. */
#if defined(__clang__)
#define KVT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVT_UNROLL _Pragma("GCC unroll 16")
#endif

/* Forces loads to be repeated from here on, where keeping their values in registers would spill. */
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

/* ---- f16 and finite numbers ---- */

/*
 * All elements are finite if the largest magnitude is: as integers, infinities and NaNs compare
 * above all finite numbers. The sign is masked off, so that a signed comparison is correct.
 */
KVT_INLINE int kvt_is_below_32(__m256i magnitudes, int32_t bound)
{
    __m256i above = _mm256_cmpgt_epi32(magnitudes, _mm256_set1_epi32(bound - 1));
    return _mm256_testz_si256(above, above);
}

KVT_INLINE int kvt_is_below_16(__m128i magnitudes, int16_t bound)
{
    __m128i above = _mm_cmpgt_epi16(magnitudes, _mm_set1_epi16((int16_t)(bound - 1)));
    return _mm_testz_si128(above, above);
}

/*
 * The hardware's conversion with the rounding mode in the instruction. It produces subnormal
 * results whatever MXCSR's flush bits are, as tile.h does.
 */
KVT_INLINE __m128i kvt_to_f16(__m256 x)
{
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* ---- transposes ---- */

/*
 * Rows of eight 4-byte elements: x[i] becomes column i. The type is integer, but the shuffles are
 * the same for f32, and four i8 codes are moved as one element.
 */
KVT_INLINE void kvt_transpose_8x8(__m256i x[8])
{
    __m256i y[8];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        y[2 * i] = _mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    __m256i z[8] = {
        _mm256_unpacklo_epi64(y[0], y[2]), _mm256_unpackhi_epi64(y[0], y[2]),
        _mm256_unpacklo_epi64(y[1], y[3]), _mm256_unpackhi_epi64(y[1], y[3]),
        _mm256_unpacklo_epi64(y[4], y[6]), _mm256_unpackhi_epi64(y[4], y[6]),
        _mm256_unpacklo_epi64(y[5], y[7]), _mm256_unpackhi_epi64(y[5], y[7]),
    };
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        x[i] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x20);
        x[i + 4] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x31);
    }
}

/* Rows of eight 2-byte elements: x[i] becomes column i. */
KVT_INLINE void kvt_transpose_8x8_16(__m128i x[8])
{
    __m128i y[8], z[8];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        y[i] = _mm_unpacklo_epi16(x[i], x[i + 4]);
        y[i + 4] = _mm_unpackhi_epi16(x[i], x[i + 4]);
    }
    /* Each step interleaves rows that are half of the rest apart. */
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++) {
        z[i] = _mm_unpacklo_epi16(y[i], y[i + 2]);
        z[i + 2] = _mm_unpackhi_epi16(y[i], y[i + 2]);
        z[i + 4] = _mm_unpacklo_epi16(y[i + 4], y[i + 6]);
        z[i + 6] = _mm_unpackhi_epi16(y[i + 4], y[i + 6]);
    }
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        x[2 * i] = _mm_unpacklo_epi16(z[2 * i], z[2 * i + 1]);
        x[2 * i + 1] = _mm_unpackhi_epi16(z[2 * i], z[2 * i + 1]);
    }
}

/* clang-format off */
/* The entries of the table that avx2_rows.c and avx2_append.c define. */
#define KVT_AVX2_APPEND_LIST(X)                                                                    \
    X(load_f32) X(load_f16) X(load_bf16) X(store_f16) X(store_bf16) X(rotate) X(unrotate)          \
    X(put_k_f32) X(put_k_f16) X(put_k_open) X(put_k_i8) X(put_v_f16) X(put_v_i8)                                 \
    X(get_k_i8) X(get_v_f16) X(get_v_i8) X(center)
/* Those of avx2_seal.c and avx2_seal_4bit.c. */
#define KVT_AVX2_SEAL_LIST(X)                                                                      \
    X(mean_k_f16) X(seal_k_i8) X(seal_v_i8)                                                        \
    X(range_k_f16) X(seal_k_i4) X(seal_v_i4) X(seal_v_i5)
/* And those of avx2_i8.c, avx2_4bit.c, avx2_softmax.c and avx2_transpose.c. */
#define KVT_AVX2_SOFTMAX_LIST(X) X(dots_f16) X(logits) X(alibi) X(softmax) X(merge) X(finish)
#define KVT_AVX2_I8_LIST(X) X(pack_q_near) X(qk_i8_near) X(pv_i8_near)
#define KVT_AVX2_4BIT_LIST(X)                                                                      \
    X(qk_i4) X(pv_i4) X(pv_i5) X(qk_i4_near) X(pv_i4_near) X(pv_i5_near)         \
    X(gain_k)
#define KVT_AVX2_TRANSPOSE_LIST(X) X(transpose_f32) X(transpose_f16) X(transpose_i8) X(add_scaled)
/* clang-format on */

/*
 * Prototypes of the whole list, also of kernels that have no AVX2 definition: naming one of those
 * in the table fails at link time.
 */
#define KVT_KERNEL_PROTOTYPE(result, name, parameters) result kvt_avx2_##name parameters;
KVT_KERNEL_LIST(KVT_KERNEL_PROTOTYPE)
#undef KVT_KERNEL_PROTOTYPE

#endif /* KVT_AVX2_H */
