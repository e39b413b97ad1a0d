/*
 * Helpers of sealing that neon_seal.c (i8) and neon_seal_4bit.c share.
 */
#ifndef KVT_NEON_SEAL_H
#define KVT_NEON_SEAL_H

#include "simd/arm/neon.h"

/* Codes of four registers of numbers: byte 4 * j + i is that of x[j]'s lane i. */
KVT_INLINE uint8x16_t kvt_codes_of(const float32x4_t x[4])
{
    int16x8_t ab = vmovn_high_s32(vmovn_s32(vcvtnq_s32_f32(x[0])), vcvtnq_s32_f32(x[1]));
    int16x8_t cd = vmovn_high_s32(vmovn_s32(vcvtnq_s32_f32(x[2])), vcvtnq_s32_f32(x[3]));
    return vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(ab), cd));
}

/* The order of kvt_codes_of's bytes (four dims of four tokens) that puts a token's together. */
KVT_INLINE uint8x16_t kvt_tokens_order(void)
{
    static const uint8_t index[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return vld1q_u8(index);
}

/* 4 tokens of a dim with its offset. */
KVT_INLINE float32x4_t kvt_open_plus(const uint16_t *from, float32x4_t scale, const float *delta)
{
    float32x4_t x = kvt_load_f16x4(from);
    return delta ? vfmaq_f32(vld1q_dup_f32(delta), x, scale) : vmulq_f32(x, scale);
}

/* The largest magnitude of a row of f16. As integers, they order as the numbers do. */
KVT_INLINE uint16_t kvt_most_of_row(const uint16_t *row, size_t dims_p)
{
    const uint16x8_t magnitude = vdupq_n_u16(0x7fff);
    uint16x8_t a = vdupq_n_u16(0), b = a;
    for (size_t d = 0; d < dims_p; d += 16) {
        a = vmaxq_u16(a, vandq_u16(vld1q_u16(row + d), magnitude));
        b = vmaxq_u16(b, vandq_u16(vld1q_u16(row + d + 8), magnitude));
    }
    return vmaxvq_u16(vmaxq_u16(a, b));
}

#endif /* KVT_NEON_SEAL_H */
