/*
 * AVX2 + FMA + F16C kernels on rows of f32, before they are stored into tiles: conversions, the
 * offset, the rotation.
 *
 * Results are scalar.c's bit for bit: each operation is the same f32 operation on the same operands
 * in the same order, 8 at a time. A product and a sum stay two roundings, no FMA. Only exact
 * identities are used, such as a - b for a + (-b).
 */
#include "avx2.h"

/* ---- conversions ---- */

/*
 * The loads also test for infinity and NaN: append validates every element, and a second pass
 * would cost as much as the conversion. Rows may begin at any element and may end at an
 * inaccessible page: no access goes beyond n.
 */
int kvt_avx2_load_f32(const void *src, float *dst, size_t n)
{
    const unsigned char *from = src;
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i x = kvt_load_256(from + 4 * i);
        largest = _mm256_max_epi32(largest, _mm256_and_si256(x, mask));
        kvt_store_256(dst + i, x);
    }
    for (; i < n; i++) {
        memcpy(dst + i, from + 4 * i, sizeof *dst);
        bad |= (kvt_f32_bits(dst[i]) & 0x7f800000u) == 0x7f800000u;
    }
    return kvt_is_below_32(largest, 0x7f800000) & !bad;
}

int kvt_avx2_load_f16(const void *src, float *dst, size_t n)
{
    const uint16_t *from = src;
    const __m128i mask = _mm_set1_epi16(0x7fff);
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i x = kvt_load_128(from + i);
        largest = _mm_max_epi16(largest, _mm_and_si128(x, mask));
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(x));
    }
    for (; i < n; i++) {
        bad |= (from[i] & 0x7c00u) == 0x7c00u;
        dst[i] = kvt_f16_to_f32(from[i]);
    }
    return kvt_is_below_16(largest, 0x7c00) & !bad;
}

int kvt_avx2_load_bf16(const void *src, float *dst, size_t n)
{
    const uint16_t *from = src;
    const __m128i mask = _mm_set1_epi16(0x7fff);
    __m128i largest = _mm_setzero_si128();
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i x = kvt_load_128(from + i);
        largest = _mm_max_epi16(largest, _mm_and_si128(x, mask));
        kvt_store_256(dst + i, _mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    }
    for (; i < n; i++) {
        bad |= (from[i] & 0x7f80u) == 0x7f80u;
        dst[i] = kvt_bf16_to_f32(from[i]);
    }
    return kvt_is_below_16(largest, 0x7f80) & !bad;
}

void kvt_avx2_store_f16(const float *src, void *dst, size_t n)
{
    uint16_t *to = dst;
    const __m256 most = _mm256_set1_ps(65504.0f), least = _mm256_set1_ps(-65504.0f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(src + i);
        x = _mm256_max_ps(least, _mm256_min_ps(most, x)); /* this operand order keeps a NaN */
        kvt_store_128(to + i, kvt_to_f16(x));
    }
    for (; i < n; i++) {
        float x = src[i] > 65504.0f ? 65504.0f : src[i];
        to[i] = kvt_f32_to_f16(x < -65504.0f ? -65504.0f : x);
    }
}

/*
 * AVX2 has no conversion to bf16. Adding 0x7fff plus the lowest kept bit carries into the kept half
 * exactly where nearest-even rounds up: above the tie, or at the tie if the kept half is odd. For
 * some NaNs the carry would give infinity, so a NaN keeps its upper half with the quiet bit set.
 */
void kvt_avx2_store_bf16(const float *src, void *dst, size_t n)
{
    uint16_t *to = dst;
    const __m256i half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1);
    const __m256i quiet = _mm256_set1_epi32(0x40);
    const __m256 most = _mm256_set1_ps(KVT_BF16_MAX), least = _mm256_set1_ps(-KVT_BF16_MAX);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(src + i)));
        __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
        __m256i odd = _mm256_and_si256(high, one);
        __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(half, odd)), 16);
        __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        rounded =
            _mm256_blendv_epi8(rounded, _mm256_or_si256(high, quiet), _mm256_castps_si256(is_nan));
        kvt_store_128(to + i, _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                               _mm256_extracti128_si256(rounded, 1)));
    }
    for (; i < n; i++)
        to[i] = kvt_f32_to_bf16(src[i]);
}

/* ---- rows of the caller ---- */

void kvt_avx2_center(const float *x, const float *mu, size_t n, float *y)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(mu + i)));
    for (; i < n; i++)
        y[i] = x[i] - mu[i];
}

/* ---- rotation ---- */

/*
 * Butterflies 1, 2 and 4 apart, in a register: each lane takes its partner's number and adds its
 * own to it, negated where it is the second: (a, b) -> (a + b, a - b). As an FMA with 1 or -1,
 * whose product is exact, so that it rounds as the addition does; it leaves the adders to the
 * butterflies between registers, and there is no order to restore.
 */
KVT_INLINE __m256 hadamard_8(__m256 x)
{
    const __m256 apart_1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const __m256 apart_2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 apart_4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    x = _mm256_fmadd_ps(x, apart_1, _mm256_permute_ps(x, 0xb1));
    x = _mm256_fmadd_ps(x, apart_2, _mm256_permute_ps(x, 0x4e));
    return _mm256_fmadd_ps(x, apart_4, _mm256_permute2f128_ps(x, x, 0x01));
}

/* Butterflies of whole registers, `apart` of them apart. */
KVT_INLINE void butterflies(__m256 *x, size_t n, size_t apart)
{
    KVT_UNROLL
    for (size_t i = 0; i < 8; i++)
        if (i < n && !(i & apart)) {
            __m256 a = x[i], b = x[i + apart];
            x[i] = _mm256_add_ps(a, b);
            x[i + apart] = _mm256_sub_ps(a, b);
        }
}

/*
 * One pass over memory does all butterflies between `vectors` registers that are `stride` dims
 * apart, and in the first pass, where the registers are adjacent, also those within them. It goes
 * level by level, so the operations and their order are those of one pass a level. The first pass
 * applies `before`, the last one scale and `after`: factors by dim, or NULL.
 */
KVT_INLINE void hadamard_pass(const float *from, float *x, size_t vectors, size_t stride,
                              const float *before, int is_first, int is_last, float scale,
                              const float *after)
{
    __m256 y[8];
    KVT_UNROLL
    for (size_t i = 0; i < 8 && i < vectors; i++) {
        y[i] = _mm256_loadu_ps(from + i * stride);
        if (before)
            y[i] = _mm256_mul_ps(y[i], _mm256_loadu_ps(before + i * stride));
    }
    if (is_first) {
        KVT_UNROLL
        for (size_t i = 0; i < 8 && i < vectors; i++)
            y[i] = hadamard_8(y[i]);
    }
    butterflies(y, vectors, 1);
    if (vectors > 2)
        butterflies(y, vectors, 2);
    if (vectors > 4)
        butterflies(y, vectors, 4);
    KVT_UNROLL
    for (size_t i = 0; i < 8 && i < vectors; i++) {
        if (is_last)
            y[i] = _mm256_mul_ps(y[i], _mm256_set1_ps(scale));
        if (is_last && after)
            y[i] = _mm256_mul_ps(y[i], _mm256_loadu_ps(after + i * stride));
        _mm256_storeu_ps(x + i * stride, y[i]);
    }
}

/* A pass over all dims: from transformed sub-blocks of `from` dims to ones of vectors * from. */
KVT_INLINE void hadamard_dims(float *x, size_t dims, size_t from, size_t vectors, int is_last,
                              float scale, const float *after)
{
    for (size_t i = 0; i < dims; i += vectors * from)
        for (size_t j = i; j < i + from; j += 8)
            hadamard_pass(x + j, x + j, vectors, from, NULL, 0, is_last, scale,
                          after ? after + j : NULL);
}

/*
 * Row `from` into x, which may be the same. before and after: factors by dim, or NULL. Blocks below
 * 16 dims are plain loops.
 */
KVT_INLINE void transform(const float *from, float *x, const float *before, size_t dims,
                          size_t block, float scale, const float *after)
{
    size_t done = block < 64 ? block : 64;

    if (block < 16) {
        for (size_t i = 0; i < dims; i++)
            x[i] = before ? from[i] * before[i] : from[i];
        for (size_t h = 1; h < block; h *= 2)
            for (size_t i = 0; i < dims; i++)
                if (!(i & h)) {
                    float a = x[i], b = x[i + h];
                    x[i] = a + b;
                    x[i + h] = a - b;
                }
        for (size_t i = 0; i < dims; i++)
            x[i] = after ? x[i] * scale * after[i] : x[i] * scale;
        return;
    }
    for (size_t i = 0; i < dims; i += done) {
        const float *signs = before ? before + i : NULL, *to_signs = after ? after + i : NULL;
        if (block == 16)
            hadamard_pass(from + i, x + i, 2, 8, signs, 1, 1, scale, to_signs);
        else if (block == 32)
            hadamard_pass(from + i, x + i, 4, 8, signs, 1, 1, scale, to_signs);
        else if (block == 64)
            hadamard_pass(from + i, x + i, 8, 8, signs, 1, 1, scale, to_signs);
        else
            hadamard_pass(from + i, x + i, 8, 8, signs, 1, 0, scale, to_signs);
    }
    for (; done * 8 < block; done *= 4)
        hadamard_dims(x, dims, done, 4, 0, scale, after);
    if (done * 8 == block)
        hadamard_dims(x, dims, done, 8, 1, scale, after);
    else if (done * 4 == block)
        hadamard_dims(x, dims, done, 4, 1, scale, after);
    else if (done * 2 == block)
        hadamard_dims(x, dims, done, 2, 1, scale, after);
}

void kvt_avx2_rotate(const float *x, const float *sign, size_t dims, size_t block, float scale,
                     float *y)
{
    transform(x, y, sign, dims, block, scale, NULL);
}

void kvt_avx2_unrotate(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    transform(x, x, NULL, dims, block, scale, sign);
}
