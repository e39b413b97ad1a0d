/*
 * NEON kernels (armv8-a): storing into tiles and reading back.
 *
 * Results are scalar.c's bit for bit: each operation is the same f32 operation on the same operands
 * in the same order, 4 at a time, and a product and a sum stay two roundings. Only exact identities
 * are used, such as fcvtns (nearest even) for the addition of 1.5 * 2^23.
 *
 * Tiles are written in two ways. Decode appends one token, whose elements are 64 bytes apart in a
 * tile: it is quantized by vectors and scattered, one store for each element or group of four.
 * Prefill fills a tile of 16 tokens, which is transposed in registers, 4 or 8 tokens at a time.
 */
#include "simd/arm/neon.h"

/* ---- transposes ---- */

/*
 * Rows of four 4-byte elements: x[i] becomes column i. The type is integer, but the permutations
 * are the same for f32, and four i8 codes are moved as one element.
 */
KVT_INLINE void transpose_4x4(uint32x4_t x[4])
{
    uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(x[0], x[1]));
    uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32(x[0], x[1]));
    uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(x[2], x[3]));
    uint64x2_t d = vreinterpretq_u64_u32(vtrn2q_u32(x[2], x[3]));
    x[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    x[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    x[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    x[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

/* Rows of eight 2-byte elements: x[i] becomes column i. Pairs of rows, then two 4x4 of pairs. */
KVT_INLINE void transpose_8x8(uint16x8_t x[8])
{
    uint32x4_t even[4], odd[4];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        even[i] = vreinterpretq_u32_u16(vtrn1q_u16(x[2 * i], x[2 * i + 1]));
        odd[i] = vreinterpretq_u32_u16(vtrn2q_u16(x[2 * i], x[2 * i + 1]));
    }
    transpose_4x4(even);
    transpose_4x4(odd);
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        x[2 * i] = vreinterpretq_u16_u32(even[i]);
        x[2 * i + 1] = vreinterpretq_u16_u32(odd[i]);
    }
}

/* ---- storing 32 and 16 bits ---- */

/*
 * K's f32 and f16 tiles are the transpose of the rows: [dim][16 tokens]. Tokens that do not fill a
 * square are scattered one element at a time, as each element is in another line.
 */
int kvt_neon_put_k_f32(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    float *to = (float *)codes + kvt_kw_index(slot, 0, dims_p);
    size_t d = 0;
    (void)scales;
    for (; d + 4 <= dims; d += 4) {
        size_t i = 0;
        for (; i + 4 <= n; i += 4) {
            uint32x4_t y[4];
            KVT_UNROLL
            for (size_t j = 0; j < 4; j++)
                y[j] = vreinterpretq_u32_f32(vld1q_f32(x + (i + j) * ldx + d));
            transpose_4x4(y);
            KVT_UNROLL
            for (size_t j = 0; j < 4; j++)
                vst1q_f32(to + (d + j) * 16 + i, vreinterpretq_f32_u32(y[j]));
        }
        for (; i < n; i++)
            for (size_t j = 0; j < 4; j++)
                to[(d + j) * 16 + i] = x[i * ldx + d + j];
    }
    for (; d < dims; d++)
        for (size_t i = 0; i < n; i++)
            to[d * 16 + i] = x[i * ldx + d];
    return 1;
}

/* 8 elements to f16. largest: maximum of the magnitudes so far, infinity after an overflow. */
KVT_INLINE uint16x8_t to_f16_largest(float32x4_t low, float32x4_t high, uint16x8_t *largest)
{
    uint16x8_t y = kvt_to_f16(low, high);
    *largest = vmaxq_u16(*largest, vandq_u16(y, vdupq_n_u16(0x7fff)));
    return y;
}

KVT_INLINE uint16x8_t to_f16_checked(const float *x, uint16x8_t *largest)
{
    return to_f16_largest(vld1q_f32(x), vld1q_f32(x + 4), largest);
}

/* offset: f16, is subtracted; or NULL. */
KVT_INLINE int put_k(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                     const uint16_t *offset, void *codes, size_t slot)
{
    uint16_t *to = (uint16_t *)codes + kvt_kw_index(slot, 0, dims_p);
    uint16x8_t largest = vdupq_n_u16(0);
    uint32_t bad = 0;
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        const float32x4_t low = offset ? kvt_load_f16x4(offset + d) : vdupq_n_f32(0);
        const float32x4_t high = offset ? kvt_load_f16x4(offset + d + 4) : vdupq_n_f32(0);
        size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            uint16x8_t y[8];
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++) {
                const float *at = x + (i + j) * ldx + d;
                y[j] = offset ? to_f16_largest(vsubq_f32(vld1q_f32(at), low),
                                               vsubq_f32(vld1q_f32(at + 4), high), &largest)
                              : to_f16_checked(at, &largest);
            }
            transpose_8x8(y);
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                vst1q_u16(to + (d + j) * 16 + i, y[j]);
        }
        for (; i < n; i++) {
            uint16_t y[8];
            const float *at = x + i * ldx + d;
            vst1q_u16(y, offset ? to_f16_largest(vsubq_f32(vld1q_f32(at), low),
                                                 vsubq_f32(vld1q_f32(at + 4), high), &largest)
                                : to_f16_checked(at, &largest));
            for (size_t j = 0; j < 8; j++)
                to[(d + j) * 16 + i] = y[j];
        }
    }
    for (; d < dims; d++)
        for (size_t i = 0; i < n; i++) {
            float z = x[i * ldx + d];
            uint16_t y = kvt_f32_to_f16(offset ? z - kvt_f16_to_f32(offset[d]) : z);
            bad |= (y & 0x7c00u) == 0x7c00u;
            to[d * 16 + i] = y;
        }
    return (vmaxvq_u16(largest) < 0x7c00u) & !bad;
}

int kvt_neon_put_k_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    (void)scales;
    return put_k(x, ldx, n, dims, dims_p, NULL, codes, slot);
}

int kvt_neon_put_k_open(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                        const uint16_t *offset, void *codes, size_t slot)
{
    return put_k(x, ldx, n, dims, dims_p, offset, codes, slot);
}

int kvt_neon_put_v_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                       void *codes, uint16_t *scales, size_t slot)
{
    uint16x8_t largest = vdupq_n_u16(0);
    uint32_t bad = 0;
    (void)scales;
    for (size_t i = 0; i < n; i++) {
        uint16_t *to = (uint16_t *)codes + kvt_vw_index(slot + i, 0, dims_p);
        size_t d = 0;
        for (; d + 8 <= dims; d += 8)
            vst1q_u16(to + d, to_f16_checked(x + i * ldx + d, &largest));
        for (; d < dims; d++) {
            to[d] = kvt_f32_to_f16(x[i * ldx + d]);
            bad |= (to[d] & 0x7c00u) == 0x7c00u;
        }
    }
    return (vmaxvq_u16(largest) < 0x7c00u) & !bad;
}

/* ---- storing 8 bits ---- */

/*
 * The scale of a row, and its reciprocal. 0 when the scale is beyond f16. Two scalar divisions and
 * the rounding of tile.h are cheap beside the row's elements, and identical to scalar.c's.
 * Magnitudes are compared as integers, which have the order of the floats; a NaN compares above
 * infinity and is rejected.
 */
KVT_INLINE int scale_of(const float *row, size_t dims, uint16_t *scale, float *reciprocal)
{
    uint32x4_t a = vdupq_n_u32(0), b = a;
    uint32_t most;
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        a = vmaxq_u32(a, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(row + d))));
        b = vmaxq_u32(b, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(row + d + 4))));
    }
    most = vmaxvq_u32(vmaxq_u32(a, b));
    for (; d < dims; d++) {
        uint32_t bits = kvt_f32_bits(row[d]) & KVT_MAGNITUDE;
        most = bits > most ? bits : most;
    }
    *scale = kvt_f32_to_f16_round(kvt_bits_f32(most) / 127.0f, 1);
    *reciprocal = *scale ? 1.0f / kvt_f16_to_f32(*scale) : 0.0f;
    return (*scale & 0x7c00u) != 0x7c00u;
}

/* All scales are computed first, so that a rejected row leaves the tile unchanged. */
KVT_INLINE int scales_of(const float *x, size_t ldx, size_t n, size_t dims, uint16_t *scales,
                         float *reciprocal)
{
    int good = 1;
    for (size_t i = 0; i < n; i++)
        good &= scale_of(x + i * ldx, dims, scales + i, reciprocal + i);
    return good;
}

/* Codes of 4 dims in 32-bit lanes, to nearest even. */
KVT_INLINE int32x4_t code_4(const float *x, float reciprocal)
{
    return vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), reciprocal));
}

/* Codes of 16 dims as bytes, in order. Codes are within +-127: narrowing loses nothing. */
KVT_INLINE uint8x16_t code_16(const float *x, float reciprocal)
{
    int16x8_t a = vmovn_high_s32(vmovn_s32(code_4(x, reciprocal)), code_4(x + 4, reciprocal));
    int16x8_t b = vmovn_high_s32(vmovn_s32(code_4(x + 8, reciprocal)), code_4(x + 12, reciprocal));
    return vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(a), b));
}

/* One code, as scalar.c forms it: for dims that are no multiple of a vector. */
KVT_INLINE uint8_t code_1(float x, float reciprocal)
{
    return (uint8_t)(kvt_f32_bits(x * reciprocal + 12582912.0f) - 0x4b400000u);
}

/* Dims d .. dims - 1 of one token into its column of a K tile: four dims are 4 bytes. */
KVT_INLINE void put_column(const float *x, size_t d, size_t dims, float reciprocal, uint8_t *to)
{
    for (; d + 16 <= dims; d += 16) {
        uint32_t groups[4];
        vst1q_u32(groups, vreinterpretq_u32_u8(code_16(x + d, reciprocal)));
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++)
            memcpy(to + (d / 4 + j) * 64, groups + j, 4);
    }
    for (; d < dims; d++)
        to[d / 4 * 64 + d % 4] = code_1(x[d], reciprocal);
}

/*
 * Four tokens by 16 dims are 4 x 4 groups of four dims. The remaining dims (of 24 or 40, say), and
 * the remaining tokens, are stored column by column.
 */
int kvt_neon_put_k_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                      uint16_t *scales, size_t slot)
{
    uint8_t *to = (uint8_t *)codes + kvt_k8_index(slot, 0, dims_p);
    float reciprocal[KVT_TILE_TOKENS];
    size_t i = 0;

    if (!scales_of(x, ldx, n, dims, scales + slot, reciprocal))
        return 0;
    for (; i + 4 <= n; i += 4) {
        size_t d = 0;
        for (; d + 16 <= dims; d += 16) {
            uint32x4_t y[4];
            KVT_UNROLL
            for (size_t j = 0; j < 4; j++)
                y[j] = vreinterpretq_u32_u8(code_16(x + (i + j) * ldx + d, reciprocal[i + j]));
            transpose_4x4(y);
            KVT_UNROLL
            for (size_t j = 0; j < 4; j++)
                vst1q_u8(to + (d / 4 + j) * 64 + i * 4, vreinterpretq_u8_u32(y[j]));
        }
        for (size_t j = i; j < i + 4; j++)
            put_column(x + j * ldx, d, dims, reciprocal[j], to + j * 4);
    }
    for (; i < n; i++)
        put_column(x + i * ldx, 0, dims, reciprocal[i], to + i * 4);
    return 1;
}

/*
 * V's tile has four tokens in a 4-byte lane. Four tokens at once are interleaved by the store; a
 * single one is merged into its byte of the lanes by read-modify-write.
 */
KVT_INLINE size_t put_lanes_4(const float *x, size_t ldx, size_t dims, const float *reciprocal,
                              uint8_t *to)
{
    size_t d = 0;
    for (; d + 16 <= dims; d += 16) {
        uint8x16x4_t y = {{code_16(x + d, reciprocal[0]), code_16(x + ldx + d, reciprocal[1]),
                           code_16(x + 2 * ldx + d, reciprocal[2]),
                           code_16(x + 3 * ldx + d, reciprocal[3])}};
        vst4q_u8(to + d * 4, y);
    }
    return d;
}

/*
 * Rewriting the other tokens' bytes is no race: all tokens of a tile belong to one head, and a head
 * is appended to by one task at a time.
 */
KVT_INLINE size_t put_lanes_1(const float *x, size_t dims, float reciprocal, size_t byte,
                              uint8_t *to)
{
    const int32x4_t shift = vdupq_n_s32((int32_t)byte * 8);
    const uint32x4_t mask = vshlq_u32(vdupq_n_u32(0xff), shift);
    size_t d = 0;
    for (; d + 4 <= dims; d += 4) {
        uint32x4_t code = vshlq_u32(vreinterpretq_u32_s32(code_4(x + d, reciprocal)), shift);
        uint32x4_t old = vreinterpretq_u32_u8(vld1q_u8(to + d * 4));
        vst1q_u8(to + d * 4, vreinterpretq_u8_u32(vbslq_u32(mask, code, old)));
    }
    return d;
}

int kvt_neon_put_v_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                      uint16_t *scales, size_t slot)
{
    float reciprocal[KVT_TILE_TOKENS];

    if (!scales_of(x, ldx, n, dims, scales + slot, reciprocal))
        return 0;
    for (size_t i = 0, count; i < n; i += count) {
        size_t byte = (slot + i) % 4, d;
        uint8_t *to = (uint8_t *)codes + kvt_v8_index(slot + i - byte, 0, dims_p);
        count = byte == 0 && n - i >= 4 ? 4 : 1;
        if (count == 4)
            d = put_lanes_4(x + i * ldx, ldx, dims, reciprocal + i, to);
        else
            d = put_lanes_1(x + i * ldx, dims, reciprocal[i], byte, to);
        for (; d < dims; d++)
            for (size_t j = 0; j < count; j++)
                to[d * 4 + byte + j] = code_1(x[(i + j) * ldx + d], reciprocal[i + j]);
    }
    return 1;
}

/* ---- reading back ---- */

/* One token of K: two groups of four codes, 64 bytes apart, are 8 dims. */
void kvt_neon_get_k_i8(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                       size_t dims_p, float *x)
{
    const int8_t *from = (const int8_t *)codes + kvt_k8_index(slot, 0, dims_p);
    const float scale = kvt_f16_to_f32(scales[slot]);
    size_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        uint32_t groups[2];
        memcpy(&groups[0], from + d * 16, 4);
        memcpy(&groups[1], from + d * 16 + 64, 4);
        int16x8_t y = vmovl_s8(vreinterpret_s8_u32(vld1_u32(groups)));
        vst1q_f32(x + d, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(y))), scale));
        vst1q_f32(x + d + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(y)), scale));
    }
    for (; d < dims; d++)
        x[d] = (float)from[d / 4 * 64 + d % 4] * scale;
}

void kvt_neon_get_v_f16(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                        size_t dims_p, float *x)
{
    const uint16_t *from = (const uint16_t *)codes + kvt_vw_index(slot, 0, dims_p);
    size_t d = 0;
    (void)scales;
    for (; d + 4 <= dims; d += 4)
        vst1q_f32(x + d, kvt_load_f16x4(from + d));
    for (; d < dims; d++)
        x[d] = kvt_f16_to_f32(from[d]);
}

/*
 * One byte of each lane: shifted to the top byte of the lane, where its sign is the lane's, and
 * converted as a fixed-point number with 24 fraction bits.
 */
KVT_INLINE float32x4_t code_of_lanes(const int8_t *from, int32x4_t to_top)
{
    const int32x4_t top = vdupq_n_s32((int32_t)0xff000000);
    int32x4_t lanes = vreinterpretq_s32_s8(vld1q_s8(from));
    return vcvtq_n_f32_s32(vandq_s32(vshlq_s32(lanes, to_top), top), 24);
}

/*
 * One token of V: its byte of each lane. The product with the scale is exact (7 by 11 bits), so
 * there is no rounding to match.
 */
void kvt_neon_get_v_i8(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                       size_t dims_p, float *x)
{
    const int8_t *from = (const int8_t *)codes + kvt_v8_index(slot / 4 * 4, 0, dims_p);
    const float scale = kvt_f16_to_f32(scales[slot]);
    const int32x4_t to_top = vdupq_n_s32((int32_t)(24 - slot % 4 * 8));
    size_t d = 0;
    for (; d + 4 <= dims; d += 4)
        vst1q_f32(x + d, vmulq_n_f32(code_of_lanes(from + d * 4, to_top), scale));
    for (; d < dims; d++)
        x[d] = (float)from[d * 4 + slot % 4] * scale;
}
