/*
 * NEON kernels (armv8-a) on rows of f32, before they are stored into tiles: conversions and the
 * rotation.
 *
 * Results are scalar.c's bit for bit: each operation is the same f32 operation on the same operands
 * in the same order, 4 at a time. A product and a sum stay two roundings.
 */
#include "simd/arm/neon.h"

/* ---- conversions ---- */

/*
 * All elements are finite if the largest magnitude is: as integers, infinities and NaNs compare
 * above all finite numbers. The loads do this test as well: append validates every element, and a
 * second pass would cost as much as the conversion. Rows may begin at any element and may end at an
 * inaccessible page: no access goes beyond n.
 */
int kvt_neon_load_f32(const void *src, float *dst, size_t n)
{
    const unsigned char *from = src;
    uint32x4_t largest = vdupq_n_u32(0);
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        uint32x4_t x = vreinterpretq_u32_u8(vld1q_u8(from + 4 * i));
        largest = vmaxq_u32(largest, vandq_u32(x, vdupq_n_u32(KVT_MAGNITUDE)));
        vst1q_f32(dst + i, vreinterpretq_f32_u32(x));
    }
    for (; i < n; i++) {
        memcpy(dst + i, from + 4 * i, sizeof *dst);
        bad |= (kvt_f32_bits(dst[i]) & 0x7f800000u) == 0x7f800000u;
    }
    return (vmaxvq_u32(largest) < 0x7f800000u) & !bad;
}

int kvt_neon_load_f16(const void *src, float *dst, size_t n)
{
    const uint16_t *from = src;
    uint16x8_t largest = vdupq_n_u16(0);
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint16x8_t x = vld1q_u16(from + i);
        largest = vmaxq_u16(largest, vandq_u16(x, vdupq_n_u16(0x7fff)));
        vst1q_f32(dst + i, vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(x))));
        vst1q_f32(dst + i + 4, vcvt_high_f32_f16(vreinterpretq_f16_u16(x)));
    }
    for (; i < n; i++) {
        bad |= (from[i] & 0x7c00u) == 0x7c00u;
        dst[i] = kvt_f16_to_f32(from[i]);
    }
    return (vmaxvq_u16(largest) < 0x7c00u) & !bad;
}

int kvt_neon_load_bf16(const void *src, float *dst, size_t n)
{
    const uint16_t *from = src;
    uint16x8_t largest = vdupq_n_u16(0);
    uint32_t bad = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint16x8_t x = vld1q_u16(from + i);
        largest = vmaxq_u16(largest, vandq_u16(x, vdupq_n_u16(0x7fff)));
        vst1q_f32(dst + i, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)));
        vst1q_f32(dst + i + 4, vreinterpretq_f32_u32(vshll_high_n_u16(x, 16)));
    }
    for (; i < n; i++) {
        bad |= (from[i] & 0x7f80u) == 0x7f80u;
        dst[i] = kvt_bf16_to_f32(from[i]);
    }
    return (vmaxvq_u16(largest) < 0x7f80u) & !bad;
}

void kvt_neon_store_f16(const float *src, void *dst, size_t n)
{
    uint16_t *to = dst;
    const float32x4_t most = vdupq_n_f32(65504.0f), least = vdupq_n_f32(-65504.0f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        float32x4_t x = vmaxq_f32(least, vminq_f32(most, vld1q_f32(src + i)));
        float32x4_t y = vmaxq_f32(least, vminq_f32(most, vld1q_f32(src + i + 4)));
        vst1q_u16(to + i, kvt_to_f16(x, y));
    }
    for (; i < n; i++) {
        float x = src[i] > 65504.0f ? 65504.0f : src[i];
        to[i] = kvt_f32_to_f16(x < -65504.0f ? -65504.0f : x);
    }
}

/*
 * Adding 0x7fff plus the lowest kept bit carries into the kept half exactly where nearest-even
 * rounds up: above the tie, or at the tie if the kept half is odd. For some NaNs the carry would
 * give infinity, so a NaN keeps its upper half with the quiet bit set.
 */
KVT_INLINE uint32x4_t to_bf16(float32x4_t x)
{
    uint32x4_t bits, high, odd, rounded;
    x = vmaxq_f32(vminq_f32(x, vdupq_n_f32(KVT_BF16_MAX)), vdupq_n_f32(-KVT_BF16_MAX));
    bits = vreinterpretq_u32_f32(x);
    high = vshrq_n_u32(bits, 16);
    odd = vandq_u32(high, vdupq_n_u32(1));
    rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(vdupq_n_u32(0x7fff), odd)), 16);
    return vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(high, vdupq_n_u32(0x40)));
}

void kvt_neon_store_bf16(const float *src, void *dst, size_t n)
{
    uint16_t *to = dst;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint16x4_t low = vmovn_u32(to_bf16(vld1q_f32(src + i)));
        vst1q_u16(to + i, vmovn_high_u32(low, to_bf16(vld1q_f32(src + i + 4))));
    }
    for (; i < n; i++)
        to[i] = kvt_f32_to_bf16(src[i]);
}

/* ---- rotation ---- */

/*
 * Butterflies 1, 2 and 4 apart of 8 elements. Each step separates first and second operands (uzp);
 * after three steps the elements are in order again:
 *
 *     0 1 2 3 | 4 5 6 7 -> 0 2 4 6 | 1 3 5 7 -> 0 4 1 5 | 2 6 3 7 -> 0 1 2 3 | 4 5 6 7
 */
KVT_INLINE void hadamard_8(float32x4_t *x, float32x4_t *y)
{
    KVT_UNROLL
    for (int i = 0; i < 3; i++) {
        float32x4_t a = vuzp1q_f32(*x, *y), b = vuzp2q_f32(*x, *y);
        *x = vaddq_f32(a, b);
        *y = vsubq_f32(a, b);
    }
}

/*
 * Butterflies h and 2 h apart (h >= 8) in one pass over memory: two levels on four registers, one
 * after the other. The operations and their order are those of two passes, with half of the loads
 * and stores.
 */
KVT_INLINE void hadamard_pass_4(float *x, size_t dims, size_t h)
{
    for (size_t i = 0; i < dims; i += 4 * h)
        for (size_t j = i; j < i + h; j += 4) {
            float32x4_t a = vld1q_f32(x + j), b = vld1q_f32(x + j + h);
            float32x4_t c = vld1q_f32(x + j + 2 * h), d = vld1q_f32(x + j + 3 * h);
            float32x4_t ab = vaddq_f32(a, b), a_b = vsubq_f32(a, b);
            float32x4_t cd = vaddq_f32(c, d), c_d = vsubq_f32(c, d);
            vst1q_f32(x + j, vaddq_f32(ab, cd));
            vst1q_f32(x + j + h, vaddq_f32(a_b, c_d));
            vst1q_f32(x + j + 2 * h, vsubq_f32(ab, cd));
            vst1q_f32(x + j + 3 * h, vsubq_f32(a_b, c_d));
        }
}

KVT_INLINE void hadamard_pass_2(float *x, size_t dims, size_t h)
{
    for (size_t i = 0; i < dims; i += 2 * h)
        for (size_t j = i; j < i + h; j += 4) {
            float32x4_t a = vld1q_f32(x + j), b = vld1q_f32(x + j + h);
            vst1q_f32(x + j, vaddq_f32(a, b));
            vst1q_f32(x + j + h, vsubq_f32(a, b));
        }
}

/*
 * Row `from` into x, which may be the same. before and after: factors by dim, or NULL. Blocks below
 * 8 dims are plain loops.
 */
KVT_INLINE void transform(const float *from, float *x, const float *before, size_t dims,
                          size_t block, float scale, const float *after)
{
    size_t h = 8;
    if (block < 8) {
        for (size_t i = 0; i < dims; i++)
            x[i] = before ? from[i] * before[i] : from[i];
        for (h = 1; h < block; h *= 2)
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
    for (size_t i = 0; i < dims; i += 8) {
        float32x4_t a = vld1q_f32(from + i), b = vld1q_f32(from + i + 4);
        if (before) {
            a = vmulq_f32(a, vld1q_f32(before + i));
            b = vmulq_f32(b, vld1q_f32(before + i + 4));
        }
        hadamard_8(&a, &b);
        vst1q_f32(x + i, a);
        vst1q_f32(x + i + 4, b);
    }
    for (; 4 * h <= block; h *= 4)
        hadamard_pass_4(x, dims, h);
    if (2 * h <= block)
        hadamard_pass_2(x, dims, h);
    for (size_t i = 0; i < dims; i += 4) {
        float32x4_t y = vmulq_n_f32(vld1q_f32(x + i), scale);
        if (after)
            y = vmulq_f32(y, vld1q_f32(after + i));
        vst1q_f32(x + i, y);
    }
}

void kvt_neon_rotate(const float *x, const float *sign, size_t dims, size_t block, float scale,
                     float *y)
{
    transform(x, y, sign, dims, block, scale, NULL);
}

void kvt_neon_unrotate(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    transform(x, x, NULL, dims, block, scale, sign);
}
