/*
 * NEON kernels (armv8-a): sealing of 4-bit K, and of 4- and 5-bit V: a block of f16 tokens becomes
 * codes. The bytes are scalar_4bit.c's, as neon_seal.c says it of i8: the same f32 operations in
 * the same order, with exact products (by powers of two) folded or fused.
 */
#include "simd/arm/neon_seal.h"

#include "simd/levels.h"

#define TILES (KVT_TOKENS / KVT_TILE_TOKENS)

/* ---- range of K ---- */

/*
 * Minimum and maximum of a dim over the 64 tokens, in 4 lanes each. Tokens that are left out are
 * replaced by token `in`, which is not.
 */
KVT_INLINE void range_of_dim(const uint16_t *from, size_t tile, const float32x4_t scale[16],
                             const uint32x4_t *kept, size_t in, float in_scale, float32x4_t *lo,
                             float32x4_t *hi)
{
    float32x4_t least[4], most[4], other = vdupq_n_f32(0.0f);
    if (kept)
        other = vdupq_n_f32(kvt_f16_to_f32(from[in / 16 * tile + in % 16]) * in_scale);
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++) {
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++) {
            float32x4_t x = vmulq_f32(kvt_load_f16x4(from + i * tile + 4 * j), scale[4 * i + j]);
            if (kept)
                x = vbslq_f32(kept[4 * i + j], x, other);
            least[j] = i ? vminq_f32(least[j], x) : x;
            most[j] = i ? vmaxq_f32(most[j], x) : x;
        }
    }
    *lo = vminq_f32(vminq_f32(least[0], least[1]), vminq_f32(least[2], least[3]));
    *hi = vmaxq_f32(vmaxq_f32(most[0], most[1]), vmaxq_f32(most[2], most[3]));
}

KVT_INLINE void range_of(const uint16_t *open, const float32x4_t scale[16], const uint32x4_t *kept,
                         size_t in, float in_scale, size_t dims_p, float *lo, float *hi)
{
    for (size_t d = 0; d < dims_p; d += 4) {
        float32x4_t least[4], most[4];
        KVT_UNROLL
        for (size_t e = 0; e < 4; e++)
            range_of_dim(open + (d + e) * KVT_TILE_TOKENS, dims_p * KVT_TILE_TOKENS, scale, kept,
                         in, in_scale, &least[e], &most[e]);
        vst1q_f32(lo + d,
                  vpminq_f32(vpminq_f32(least[0], least[1]), vpminq_f32(least[2], least[3])));
        vst1q_f32(hi + d, vpmaxq_f32(vpmaxq_f32(most[0], most[1]), vpmaxq_f32(most[2], most[3])));
    }
}

void kvt_neon_range_k_f16(const void *open, const uint16_t *open_scales, uint64_t left_out,
                          size_t dims_p, float *lo, float *hi)
{
    static const uint32_t bit[4] = {1, 2, 4, 8};
    const size_t in = ~left_out ? (size_t)__builtin_ctzll(~left_out) : 0;
    float32x4_t scale[16];
    uint32x4_t kept[16];
    for (size_t i = 0; i < 16; i++) {
        uint32_t four = (uint32_t)(~left_out >> (4 * i)) & 15u;
        scale[i] = kvt_load_f16x4(open_scales + 4 * i);
        kept[i] = vtstq_u32(vdupq_n_u32(four), vld1q_u32(bit));
    }
    if (left_out == 0)
        range_of(open, scale, NULL, 0, 0.0f, dims_p, lo, hi);
    else
        range_of(open, scale, kept, in, kvt_f16_to_f32(open_scales[in]), dims_p, lo, hi);
}

/* ---- K ---- */

/* Four dims of four tokens as bytes. */
KVT_INLINE uint8x16_t bytes_of(const float32x4_t x[4])
{
    return vqtbl1q_u8(kvt_codes_of(x), kvt_tokens_order());
}

/* gain_k's bytes of the squared norms and products of 4 tokens, as 32 bits. */
KVT_INLINE uint32x4_t gains_of(float32x4_t square, float32x4_t product)
{
    float32x4_t gain = vsubq_f32(vdivq_f32(square, product), vdupq_n_f32(1.0f));
    gain = vmulq_f32(gain, vdupq_n_f32(1.0f / KVT_K4_GAIN_STEP));
    gain = kvt_and_f32(gain, vcgtzq_f32(product));
    gain = vaddq_f32(gain, vdupq_n_f32(KVT_K4_GAIN_ONE));
    gain = vmaxq_f32(vminq_f32(gain, vdupq_n_f32(255.0f)), vdupq_n_f32(1.0f));
    return vcvtnq_u32_f32(gain);
}

/* A tile: four registers of tokens side by side, as a dim of a token is two chains of FMA. */
KVT_INLINE void seal_k(const uint16_t *open, const uint16_t *open_scales, const float *delta,
                       const float *along, const float *scale, const float *reciprocal,
                       size_t dims_p, uint8_t *codes, uint8_t *gains)
{
    float32x4_t row_scale[4], square[4], product[4];
    uint32x4_t gain[4];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        row_scale[i] = kvt_load_f16x4(open_scales + 4 * i);
        square[i] = product[i] = vdupq_n_f32(0.0f);
    }
    for (size_t d = 0; d < dims_p; d += 8) {
        uint8x16_t half[2][4];
        for (size_t h = 0; h < 2; h++) {
            float32x4_t code[4][4]; /* by tokens, dims */
            KVT_UNROLL
            for (size_t e = 0; e < 4; e++) {
                const size_t at = d + 4 * h + e;
                const float32x4_t middle = vdupq_n_f32(along[at]);
                KVT_UNROLL
                for (size_t i = 0; i < 4; i++) {
                    float32x4_t w = kvt_open_plus(open + at * 16 + 4 * i, row_scale[i], delta + at);
                    float32x4_t key = vaddq_f32(w, middle);
                    float32x4_t x = vaddq_f32(vmulq_n_f32(w, reciprocal[at]), vdupq_n_f32(7.5f));
                    x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(0.0f)), vdupq_n_f32(15.0f));
                    x = vrndnq_f32(x);
                    code[i][e] = x;
                    square[i] = vfmaq_f32(square[i], key, key);
                    /* A code times a scale is exact. */
                    x = vfmaq_n_f32(middle, vsubq_f32(x, vdupq_n_f32(7.5f)), scale[at]);
                    product[i] = vfmaq_f32(product[i], x, key);
                }
            }
            KVT_UNROLL
            for (size_t i = 0; i < 4; i++)
                half[h][i] = bytes_of(code[i]);
        }
        KVT_UNROLL
        for (size_t i = 0; i < 4; i++)
            vst1q_u8(codes + kvt_k4_index(i * 4, d, dims_p), vsliq_n_u8(half[0][i], half[1][i], 4));
    }
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        gain[i] = gains_of(square[i], product[i]);
    vst1q_u8(gains, vcombine_u8(vmovn_u16(vcombine_u16(vmovn_u32(gain[0]), vmovn_u32(gain[1]))),
                                vmovn_u16(vcombine_u16(vmovn_u32(gain[2]), vmovn_u32(gain[3])))));
}

void kvt_neon_seal_k_i4(const void *open, const uint16_t *open_scales, const float *delta,
                        const float *along, const uint16_t *scales, size_t dims_p, const void *next,
                        void *codes, uint8_t *gains)
{
    const uint16_t *from = open;
    uint8_t *to = codes;
    float scale[KVT_DIMS_MAX], reciprocal[KVT_DIMS_MAX];
    (void)next;
    for (size_t d = 0; d < dims_p; d += 4) {
        float32x4_t x = kvt_load_f16x4(scales + d);
        vst1q_f32(scale + d, x);
        vst1q_f32(reciprocal + d, kvt_and_f32(vdivq_f32(vdupq_n_f32(1.0f), x), vcgtzq_f32(x)));
    }
    for (size_t t = 0; t < KVT_TOKENS; t += KVT_TILE_TOKENS)
        seal_k(from + t * dims_p, open_scales + t, delta, along, scale, reciprocal, dims_p,
               to + t * dims_p / 2, gains + t);
}

/* ---- V ---- */

/*
 * The magnitude index of u, that is the number of bounds below it, by its upper bits: no two bounds
 * share a bucket of 8. `below` counts those of the buckets before, `bound` is the bucket's own, or
 * what is never exceeded.
 */
typedef struct magnitudes {
    uint8x16_t below, bound;
} magnitudes;

KVT_INLINE magnitudes magnitudes_of(const uint8_t bounds[KVT_V4_BOUNDS])
{
    uint8_t below[16], bound[16];
    magnitudes result;
    for (unsigned b = 0; b < 16; b++) {
        below[b] = 0;
        bound[b] = 255;
        for (size_t i = 0; i < KVT_V4_BOUNDS; i++) {
            below[b] = (uint8_t)(below[b] + (bounds[i] / 8u < b));
            bound[b] = bounds[i] / 8u == b ? bounds[i] : bound[b];
        }
    }
    result.below = vld1q_u8(below);
    result.bound = vld1q_u8(bound);
    return result;
}

/* u is at most 127, bucket is u / 8. */
KVT_INLINE uint8x16_t index_of(const magnitudes *m, uint8x16_t u, uint8x16_t bucket)
{
    /* A comparison that holds is -1. */
    return vsubq_u8(vqtbl1q_u8(m->below, bucket), vcgtq_u8(u, vqtbl1q_u8(m->bound, bucket)));
}

/* round(|x| * factor) of 16 elements, saturated at 255. */
KVT_INLINE uint8x16_t magnitudes_16(const uint16_t *from, float factor)
{
    uint16x8_t y[2];
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++) {
        float16x8_t x =
            vreinterpretq_f16_u16(vandq_u16(vld1q_u16(from + 8 * i), vdupq_n_u16(0x7fff)));
        uint32x4_t a = vcvtnq_u32_f32(vmulq_n_f32(vcvt_f32_f16(vget_low_f16(x)), factor));
        uint32x4_t b = vcvtnq_u32_f32(vmulq_n_f32(vcvt_high_f32_f16(x), factor));
        y[i] = vqmovn_high_u32(vqmovn_u32(a), b);
    }
    return vqmovn_high_u16(vqmovn_u16(y[0]), y[1]);
}

/*
 * Sums of level * u and level * level of a row for the three sets of bounds. Sums of 16 bits take 8
 * products: 8 * 63 * 126 < 2^16.
 */
KVT_INLINE void sums_of_levels(const uint16_t *row, size_t dims_p, float factor,
                               const magnitudes sets[KVT_V4_CANDIDATES], uint8x16_t levels,
                               int32_t *products, int32_t *squares)
{
    uint32x4_t product[KVT_V4_CANDIDATES], square[KVT_V4_CANDIDATES];
    KVT_UNROLL
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++)
        product[k] = square[k] = vdupq_n_u32(0);
    for (size_t d0 = 0, end; d0 < dims_p; d0 = end) {
        uint16x8_t p[KVT_V4_CANDIDATES], s[KVT_V4_CANDIDATES];
        end = d0 + 64 < dims_p ? d0 + 64 : dims_p; /* 4 times 16, of which halves share a sum */
        KVT_UNROLL
        for (size_t k = 0; k < KVT_V4_CANDIDATES; k++)
            p[k] = s[k] = vdupq_n_u16(0);
        for (size_t d = d0; d < end; d += 16) {
            uint8x16_t u = magnitudes_16(row + d, factor), bucket = vshrq_n_u8(u, 3);
            KVT_UNROLL
            for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
                uint8x16_t level = vqtbl1q_u8(levels, index_of(&sets[k], u, bucket));
                p[k] = vmlal_u8(p[k], vget_low_u8(level), vget_low_u8(u));
                p[k] = vmlal_high_u8(p[k], level, u);
                s[k] = vmlal_u8(s[k], vget_low_u8(level), vget_low_u8(level));
                s[k] = vmlal_high_u8(s[k], level, level);
            }
        }
        KVT_UNROLL
        for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
            product[k] = vpadalq_u16(product[k], p[k]);
            square[k] = vpadalq_u16(square[k], s[k]);
        }
    }
    KVT_UNROLL
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
        products[k] = (int32_t)vaddvq_u32(product[k]);
        squares[k] = (int32_t)vaddvq_u32(square[k]);
    }
}

/* The scale of a row whose largest magnitude is `largest`, by scalar_4bit.c's search. */
KVT_INLINE uint16_t scale_of_row(const uint16_t *row, float open_scale, float largest,
                                 size_t dims_p, const magnitudes sets[KVT_V4_CANDIDATES],
                                 uint8x16_t levels)
{
    int32_t products[KVT_V4_CANDIDATES], squares[KVT_V4_CANDIDATES];
    float most = -1.0f, step = 0.0f;
    uint16_t scale;
    if (!(largest >= KVT_V4_LEAST))
        return 0;
    sums_of_levels(row, dims_p, KVT_V4_UNITS / largest * open_scale, sets, levels, products,
                   squares);
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
        float product = (float)products[k], square = (float)squares[k];
        float gain = product * product / square;
        if (gain > most) {
            most = gain;
            step = product / square;
        }
    }
    scale = kvt_f32_to_f16(step * largest / KVT_V4_UNITS);
    return scale ? scale : 1;
}

/* Codes of 16 elements: the magnitude's index, counted down from 7 where the sign is set. */
KVT_INLINE uint8x16_t codes_v4(const uint16_t *from, float factor, const magnitudes *m)
{
    uint8x16_t u = vminq_u8(magnitudes_16(from, factor), vdupq_n_u8(127));
    uint8x16_t code = vorrq_u8(index_of(m, u, vshrq_n_u8(u, 3)), vdupq_n_u8(8));
    uint8x16_t upper =
        vuzp2q_u8(vreinterpretq_u8_u16(vld1q_u16(from)), vreinterpretq_u8_u16(vld1q_u16(from + 8)));
    uint8x16_t sign = vcltzq_s8(vreinterpretq_s8_u8(upper));
    return veorq_u8(code, vandq_u8(sign, vdupq_n_u8(15)));
}

/* The nibbles of 8 tokens and 16 dims; the shift replaces what is above them. */
KVT_INLINE void store_nibbles(const uint8x16_t c[8], uint8_t *to)
{
    uint8x16x4_t y;
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++)
        y.val[j] = vsliq_n_u8(c[j], c[j + 4], 4);
    vst4q_u8(to, y);
}

void kvt_neon_seal_v_i4(const void *open, const uint16_t *open_scales, size_t dims_p,
                        const void *next, void *codes, uint16_t *scales)
{
    static const uint8_t bounds[KVT_V4_CANDIDATES][KVT_V4_BOUNDS] = {
        {KVT_V4_BOUNDS_0}, {KVT_V4_BOUNDS_1}, {KVT_V4_BOUNDS_2}};
    static const uint8_t magnitude[16] = {KVT_V4_MAGNITUDES};
    const uint8x16_t levels = vld1q_u8(magnitude);
    const magnitudes sets[KVT_V4_CANDIDATES] = {magnitudes_of(bounds[0]), magnitudes_of(bounds[1]),
                                                magnitudes_of(bounds[2])};
    (void)next;
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + t / 8 * dims_p * 4;
        float factor[8];
        for (size_t j = 0; j < 8; j++) {
            const uint16_t *row = from + j * dims_p;
            float open_scale = kvt_f16_to_f32(open_scales[t + j]);
            float largest = kvt_f16_to_f32(kvt_most_of_row(row, dims_p)) * open_scale;
            uint16_t scale = scale_of_row(row, open_scale, largest, dims_p, sets, levels);
            scales[t + j] = scale;
            factor[j] = scale ? 2.0f / kvt_f16_to_f32(scale) * open_scale : 0.0f;
        }
        for (size_t d = 0; d < dims_p; d += 16) {
            uint8x16_t c[8];
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                c[j] = codes_v4(from + j * dims_p + d, factor[j], &sets[0]);
            store_nibbles(c, to + d * 4);
        }
    }
}

/* round(x * factor + 15.5) of 16 elements. */
KVT_INLINE uint8x16_t codes_v5(const uint16_t *from, float factor)
{
    float32x4_t x[4];
    KVT_UNROLL
    for (size_t e = 0; e < 4; e++)
        x[e] = vaddq_f32(vmulq_n_f32(kvt_load_f16x4(from + 4 * e), factor), vdupq_n_f32(15.5f));
    return kvt_codes_of(x);
}

/* Fifth bits of four tokens and 16 dims: bit 4 * dim + token. */
KVT_INLINE uint8x8_t fifth_bits(const uint8x16_t c[4])
{
    uint8x16_t four = vshrq_n_u8(c[0], 4);
    uint16x8_t pair;
    four = vsliq_n_u8(four, vshrq_n_u8(c[1], 4), 1);
    four = vsliq_n_u8(four, vshrq_n_u8(c[2], 4), 2);
    four = vsliq_n_u8(four, vshrq_n_u8(c[3], 4), 3);
    pair = vreinterpretq_u16_u8(four);
    return vmovn_u16(vorrq_u16(pair, vshrq_n_u16(pair, 4)));
}

void kvt_neon_seal_v_i5(const void *open, const uint16_t *open_scales, size_t dims_p,
                        const void *next, void *codes, uint16_t *scales)
{
    uint8_t *fifth = (uint8_t *)codes + dims_p * (KVT_TOKENS / 2);
    (void)next;
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + t / 8 * dims_p * 4;
        float factor[8];
        for (size_t j = 0; j < 8; j++) {
            float open_scale = kvt_f16_to_f32(open_scales[t + j]);
            float largest = kvt_f16_to_f32(kvt_most_of_row(from + j * dims_p, dims_p)) * open_scale;
            uint16_t scale = kvt_f32_to_f16_round(largest / 31.0f, 1);
            scales[t + j] = scale;
            factor[j] = scale ? 0.5f / kvt_f16_to_f32(scale) * open_scale : 0.0f;
        }
        for (size_t d = 0; d < dims_p; d += 16, fifth += 16) {
            uint8x16_t c[8];
            KVT_UNROLL
            for (size_t j = 0; j < 8; j++)
                c[j] = codes_v5(from + j * dims_p + d, factor[j]);
            store_nibbles(c, to + d * 4);
            vst1_u8(fifth, fifth_bits(c));
            vst1_u8(fifth + 8, fifth_bits(c + 4));
        }
    }
}
