/*
 * The layout of a head's 64 tokens, and the number formats in it.
 *
 * A block holds KVT_BLOCK_TOKENS tokens of every layer and kv head of a group as four tiles of
 * KVT_TILE_TOKENS. The order inside a tile lets one vector load feed 16 tokens (K) or 16 dims
 * (V), so that no kernel needs a horizontal sum or a second copy:
 *
 *   K, 8-bit   [tile][dim / 4][16 tokens][4 dims]
 *   K, 16/32   [tile][dim][16 tokens]
 *   K, 4-bit   [tile][dim / 8][16 tokens][4 bytes]: low nibbles dims 0 to 3, high ones 4 to 7
 *   V, 8-bit   [token / 4][dim][4 tokens]
 *   V, 16/32   [token][dim]
 *   V, 4-bit   [token / 8][dim][4 bytes]: low nibbles tokens 0 to 3, high ones tokens 4 to 7
 *   V, 5-bit   as 4-bit, then the fifth bits, [token / 8][dim / 16][2 halves][8 bytes]: bit
 *              dim % 16 * 4 + token % 4 of half token % 8 / 4
 *
 * dim runs to the dims padded to a multiple of 16. Padding is zero from the allocation on and
 * never written, except that of 4- and 5-bit codes, which may hold anything; slots of tokens that a
 * sequence does not hold (any more) may hold anything, kernels mask by count.
 *
 * A head's record is: K codes | K scales | K offset | K seed | V scales | V codes. Scales are f16,
 * one a token for 8-bit sides, and for 4- and 5-bit V; for 4-bit K one a padded dim (rounded up to
 * 64 bytes), and then the gains, a byte a token. The offset (f16, one a padded dim) exists where
 * the group subtracts one; of 4-bit K it is the middle of each dim's range. The seed exists in
 * blocks of 4-bit K that are open again only: src/cache/reopen.c. A V that is the first dims of K
 * has no parts of its own. Every part begins at a multiple of 64 bytes.
 */
#ifndef KVT_TILE_H
#define KVT_TILE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KVT_TILE_TOKENS 16
#define KVT_TOKENS 64 /* tokens of a block: KVT_BLOCK_TOKENS of the public header */

static inline size_t kvt_round_up(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

/* Element index of (token, dim) in a head's codes; dims is the padded count. */
static inline size_t kvt_k8_index(size_t token, size_t dim, size_t dims)
{
    return token / 16 * dims * 16 + dim / 4 * 64 + token % 16 * 4 + dim % 4;
}

static inline size_t kvt_v8_index(size_t token, size_t dim, size_t dims)
{
    return token / 4 * dims * 4 + dim * 4 + token % 4;
}

static inline size_t kvt_kw_index(size_t token, size_t dim, size_t dims)
{
    return token / 16 * dims * 16 + dim * 16 + token % 16;
}

static inline size_t kvt_vw_index(size_t token, size_t dim, size_t dims)
{
    return token * dims + dim;
}

/* Byte of (token, dim) in 4-bit codes; its nibble is the high one where the _shift is 4. */
static inline size_t kvt_k4_index(size_t token, size_t dim, size_t dims)
{
    return token / 16 * dims * 8 + dim / 8 * 64 + token % 16 * 4 + dim % 4;
}

static inline unsigned kvt_k4_shift(size_t dim)
{
    return (unsigned)(dim & 4);
}

static inline size_t kvt_v4_index(size_t token, size_t dim, size_t dims)
{
    return token / 8 * dims * 4 + dim * 4 + token % 4;
}

static inline unsigned kvt_v4_shift(size_t token)
{
    return (unsigned)(token & 4);
}

/* Byte and bit of the fifth bit of (token, dim) in 5-bit V, whose nibbles come first. */
static inline size_t kvt_v5_index(size_t token, size_t dim, size_t dims)
{
    return dims * KVT_TOKENS / 2 + (token / 8 * (dims / 16) + dim / 16) * 16 + token % 8 / 4 * 8 +
           dim % 16 / 2;
}

static inline unsigned kvt_v5_shift(size_t token, size_t dim)
{
    return (unsigned)(dim % 2 * 4 + token % 4);
}

/*
 * 4-bit K: k = gain * ((code - 7.5) * |scale| + middle), the gain being the token's; where the
 * scale is negative the middle is added without it.
 */
static inline size_t kvt_k4_scales(size_t dims) /* elements of f16 before the gains */
{
    return kvt_round_up(dims, 32);
}

static inline const uint8_t *kvt_k4_gains(const uint16_t *scales, size_t dims)
{
    return (const uint8_t *)(scales + kvt_k4_scales(dims));
}

#define KVT_K4_GAIN_ONE 128
#define KVT_K4_GAIN_STEP 0x1p-10f

static inline float kvt_k4_gain(uint8_t gain)
{
    return 1.0f + (float)(gain - KVT_K4_GAIN_ONE) * KVT_K4_GAIN_STEP;
}

static inline void kvt_put_bits(uint8_t *byte, unsigned shift, unsigned mask, unsigned code)
{
    *byte = (uint8_t)((*byte & ~(mask << shift)) | code << shift);
}

static inline uint32_t kvt_f32_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float kvt_bits_f32(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* f16 to f32: exact for every input. Integer work only: no rounding mode, no flush to zero. */
static inline float kvt_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 31u;
    uint32_t mantissa = h & 1023u;
    if (exponent == 31)
        return kvt_bits_f32(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {
        if (mantissa == 0)
            return kvt_bits_f32(sign);
        do { /* normalize: every f16 subnormal is a normal f32 */
            mantissa <<= 1;
            exponent--;
        } while (!(mantissa & 1024u));
        mantissa &= 1023u;
        exponent++;
    }
    return kvt_bits_f32(sign | (exponent + 112u) << 23 | mantissa << 13);
}

/*
 * f32 to f16. up 0: to nearest, ties to even. up 1: toward +infinity. What is beyond the finite
 * range becomes infinity (toward +infinity: -65504 for negative input), and so does a NaN when
 * rounding up, which no scale may be; to nearest it stays a NaN.
 */
static inline uint16_t kvt_f32_to_f16_round(float x, int up)
{
    uint32_t bits = kvt_f32_bits(x);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t shift = 13, value, rest, half, result;

    if (magnitude > 0x7f800000u && !up)
        return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) /* 2^16 and above */
        return (uint16_t)(sign | (up && sign ? 0x7bffu : 0x7c00u));
    if (magnitude < 0x38800000u) { /* below 2^-14: subnormal, a multiple of 2^-24 */
        uint32_t exponent = magnitude >> 23;
        if (exponent == 0) { /* an f32 subnormal is below 2^-126 */
            value = 0;
            rest = magnitude;
            half = 0xffffffffu;
            goto round;
        }
        shift = 126u - exponent; /* 14 at 2^-15 */
        if (shift > 31)
            shift = 31; /* value is 0, and the rest below half: rounding only */
        magnitude = (magnitude & 0x7fffffu) | 0x800000u;
        value = magnitude >> shift;
    } else {
        magnitude -= 112u << 23;
        value = magnitude >> 13;
    }
    rest = magnitude & ((1u << shift) - 1u);
    half = 1u << (shift - 1u);
round:
    result = value;
    if (up)
        result += !sign && rest != 0;
    else
        result += rest > half || (rest == half && (value & 1u));
    return (uint16_t)(sign | result);
}

static inline uint16_t kvt_f32_to_f16(float x)
{
    return kvt_f32_to_f16_round(x, 0);
}

static inline float kvt_bf16_to_f32(uint16_t h)
{
    return kvt_bits_f32((uint32_t)h << 16);
}

#define KVT_BF16_MAX 0x1.fep127f /* the largest bf16 */

/* f32 to bf16, to nearest, ties to even, saturated; NaN stays NaN. */
static inline uint16_t kvt_f32_to_bf16(float x)
{
    uint32_t bits = kvt_f32_bits(x > KVT_BF16_MAX    ? KVT_BF16_MAX
                                 : x < -KVT_BF16_MAX ? -KVT_BF16_MAX
                                                     : x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif /* KVT_TILE_H */
