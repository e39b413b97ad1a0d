/*
 * Dot products of bytes (armv8.2-a+dotprod): what dotprod.c and i8mm.c share, the products of 4-bit
 * K and of 4- and 5-bit V by one digit.
 *
 * `sdot` and `udot` add to each 32-bit lane the dot product of its four bytes and four bytes of
 * weights, which may be any 32-bit lane of a register ("by element"). Half of an octet of a quad is
 * four lanes of four summands, so a row costs one instruction for 16 codes, and one 16-byte load of
 * digits serves two octets. What a block of rows shares is the unpacking, two instructions for 32
 * codes of K, four of V.
 *
 * p's digits have 8 bits, so that V's levels have to be unsigned: KVT_DOT_LEVEL is added to them.
 *
 * Overflow: at most 1024 * 127 * 15 < 2^21 (K), 64 * 255 * 126 < 2^21 (V).
 */
#ifndef KVT_DOT_H
#define KVT_DOT_H

#include "simd/arm/neon_4bit.h"

#define KVT_DOT_P_MOST 255
#define KVT_DOT_LEVEL 63
/* The value of a code of V is this much less than what is multiplied. */
#define KVT_DOT_BIAS_V4 (-KVT_DOT_LEVEL)
#define KVT_DOT_BIAS_V5 (-31)

/* Of bytes that are both signed (K), or neither (V). */
KVT_INLINE uint32x4_t kvt_dot(int side, uint32x4_t sum, uint8x16_t x, uint8x16_t w, int group)
{
#define DOT(g)                                                                                     \
    if (group == (g)) {                                                                            \
        if (side == KVT_V)                                                                         \
            return vdotq_laneq_u32(sum, x, w, g);                                                  \
        return vreinterpretq_u32_s32(vdotq_laneq_s32(                                              \
            vreinterpretq_s32_u32(sum), vreinterpretq_s8_u8(x), vreinterpretq_s8_u8(w), g));       \
    }
    DOT(0)
    DOT(1)
    DOT(2)
    DOT(3)
#undef DOT
    return sum;
}

/*
 * 16 summands at a time, two octets, unpacked one by one. Sum i is of row i / quads and quad i %
 * quads.
 */
KVT_INLINE void product_dot(int form, size_t rows, size_t quads, const unsigned char *codes,
                            size_t step, size_t n, const unsigned char *fifth, size_t first,
                            const unsigned char *weight, size_t ldw, uintptr_t ahead,
                            int32x4_t *total)
{
    const int side = form == KVT_K4 ? KVT_K : KVT_V;
    const uint8x16_t levels = kvt_levels_plus(KVT_DOT_LEVEL);
    uint8x16_t of_quad[8];
    uint32x4_t sum[16];
#define ZERO(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        sum[i] = vdupq_n_u32(0);
#define OF_QUAD(v)                                                                                 \
    if ((v) < quads)                                                                               \
        of_quad[v] = kvt_fifth_of_quad(first + (v));
    KVT_EACH_16(ZERO)
    KVT_EACH_8(OF_QUAD)
#undef ZERO
#undef OF_QUAD
    for (size_t i = 0; i < n; i += 16) {
        uint8x16_t x[8], y[8], w[8], bits = vdupq_n_u8(0), swapped = bits;
#define LOAD_DIGITS(r)                                                                             \
    if ((r) < rows)                                                                                \
        w[r] = vld1q_u8(weight + (r)*ldw + i);
#define LOAD_CODES(v)                                                                              \
    if ((v) < quads)                                                                               \
        x[v] = vld1q_u8(codes + (v)*16);
#define UNPACK_LOW(v)                                                                              \
    if ((v) < quads)                                                                               \
        y[v] = form == KVT_V5 ? kvt_low_codes_5(x[v], bits, of_quad[v])                            \
                              : kvt_low_codes(form, x[v], levels);
#define UNPACK_HIGH(v)                                                                             \
    if ((v) < quads)                                                                               \
        x[v] = form == KVT_V5 ? kvt_high_codes_5(x[v], swapped, of_quad[v])                        \
                              : kvt_high_codes(form, x[v], levels);
#define LOW(i)                                                                                     \
    if ((i) < rows * quads)                                                                        \
        sum[i] = kvt_dot(side, sum[i], y[(i) % quads], w[(i) / quads], 2 * octet);
#define HIGH(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        sum[i] = kvt_dot(side, sum[i], x[(i) % quads], w[(i) / quads], 2 * octet + 1);
        KVT_EACH_8(LOAD_DIGITS)
        KVT_UNROLL
        for (int octet = 0; octet < 2; octet++) {
            KVT_EACH_8(LOAD_CODES)
            if (form == KVT_V5) {
                bits = vld1q_u8(fifth);
                swapped = vextq_u8(bits, bits, 8);
                fifth += step / 4;
            }
            kvt_prefetch(codes, ahead);
            KVT_LOADED();
            KVT_EACH_8(UNPACK_LOW)
            KVT_EACH_16(LOW)
            KVT_EACH_8(UNPACK_HIGH)
            KVT_EACH_16(HIGH)
            codes += step;
        }
#undef LOAD_DIGITS
#undef LOAD_CODES
#undef UNPACK_LOW
#undef UNPACK_HIGH
#undef LOW
#undef HIGH
    }
#define TOTAL(i)                                                                                   \
    if ((i) < rows * quads)                                                                        \
        total[i] = vreinterpretq_s32_u32(sum[i]);
    KVT_EACH_16(TOTAL)
#undef TOTAL
}

#endif /* KVT_DOT_H */
