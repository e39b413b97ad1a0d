/*
 * NEON with dot products (armv8.2-a+dotprod): the integer kernels of i8, and of 4 and 5 bits, which
 * are dot.h's.
 *
 * `sdot` adds to each 32-bit lane the dot product of its four bytes and four bytes of weights,
 * which may be any 32-bit lane of a register ("by element"). A register of a tile is four lanes of
 * four summands, so no shuffle is needed, and one 16-byte load of weights serves 16 summands.
 *
 * Near: a code of q or p is two signed digits, 256 * high + low with low in -128 .. 127, each a
 * dot product of its own. P_MOST is the largest code that has such digits: 127 * 256 + 127.
 * Fast: one digit. p is not negative, so its digit can have 8 unsigned bits; then V has to be
 * unsigned as well (`udot`), which flipping its top bit does. That adds 128 to each code, so 128
 * times the sum of the weights is subtracted from each total. This costs one instruction for every
 * 16 bytes and halves p's rounding error, which with 7 bits would exceed V's quantization error.
 *
 * Shapes. A Cortex-A76 issues two sdot a cycle and can accumulate into the same register after two
 * cycles, so 4 accumulators hide the latency; it loads two registers a cycle. Codes are loaded once
 * for all rows of a block, weights once for all quads of it:
 *
 *     near, of 8 summands:  2 * quads + rows loads for 4 * rows * quads products
 *     registers:            2 * rows * quads sums, 2 * quads codes, rows weights: up to 29
 *
 * One row takes all quads of a tile; 6, 7 and 8 rows one quad, where there are still three products
 * a load.
 *
 * Overflow. Codes are at most 128 in magnitude (127 but for slots beyond n_tokens, whose sums are
 * ignored), so a sum of digit products grows by at most 2^14 a summand: 2^24 for 1024 dims. The
 * total 256 * high + low is at most 1024 * 127 * 16383 < 2^31 for q, and 64 * 127 * 32639 < 2^28
 * for p.
 */
#include "simd/arm/dot.h"

#define Q_MOST_near 16383
#define P_MOST_near 32639
#define BYTES_near 2
#define SHARES_near 0
#define Q_MOST_fast 127
#define P_MOST_fast 255
#define BYTES_fast 1
#define SHARES_fast 0

/* ---- two digits ---- */

/* 4 summands at a time: their high digits, their low ones. */
KVT_INLINE void store_near(int16x8x2_t x, unsigned char *to)
{
    for (size_t i = 0; i < 2; i++) {
        /* (x + 128) >> 8 is what is left above the signed low digit. */
        int32x2_t high = vreinterpret_s32_s8(vrshrn_n_s16(x.val[i], 8));
        int32x2_t low = vreinterpret_s32_s8(vmovn_s16(x.val[i]));
        int32x4_t both = vcombine_s32(vzip1_s32(high, low), vzip2_s32(high, low));
        vst1q_u8(to + 16 * i, vreinterpretq_u8_s32(both));
    }
}

/*
 * Sum i is of row i / quads and quad i % quads. Of 8 summands a[] and b[] are the two groups of
 * each quad, w[] the rows' digits: high of a, low of a, high of b, low of b. This order maximizes
 * the distance between two uses of an accumulator.
 */
#define MULTIPLY(i, sum, codes_of, digits)                                                         \
    if ((i) < rows * quads)                                                                        \
        sum[i] = vdotq_laneq_s32(sum[i], codes_of[(i) % quads], w[(i) / quads], digits);

KVT_INLINE void product_near(int side, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *weight, size_t ldw,
                             uintptr_t ahead, int32x4_t *total)
{
    (void)side; /* signed digits serve both */
    /* Unrolled by two where that is faster: it halves the pointer increments, but some shapes
     * spill. */
    const size_t halves = rows < 3 || rows == 5 ? 1 : 2;
    int32x4_t high[16], low[16];
#define ZERO(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        high[i] = low[i] = vdupq_n_s32(0);
    KVT_EACH_16(ZERO)
#undef ZERO
    for (size_t i = 0; i < n; i += 8 * halves) {
        int8x16_t a[8], b[8], w[8];
#define LOAD_CODES(v)                                                                              \
    if ((v) < quads) {                                                                             \
        a[v] = kvt_load_s8(codes + (v)*16);                                                        \
        b[v] = kvt_load_s8(codes + step + (v)*16);                                                 \
    }
#define LOAD_WEIGHTS(r)                                                                            \
    if ((r) < rows)                                                                                \
        w[r] = kvt_load_s8(weight + (r)*ldw + half * 16);
        KVT_UNROLL
        for (size_t half = 0; half < halves; half++) {
            KVT_EACH_8(LOAD_CODES)
            KVT_EACH_8(LOAD_WEIGHTS)
#undef LOAD_CODES
#undef LOAD_WEIGHTS
            kvt_prefetch(codes, ahead);
            kvt_prefetch(codes + step, ahead);
            KVT_LOADED();
#define HIGH_A(i) MULTIPLY(i, high, a, 0)
#define LOW_A(i) MULTIPLY(i, low, a, 1)
#define HIGH_B(i) MULTIPLY(i, high, b, 2)
#define LOW_B(i) MULTIPLY(i, low, b, 3)
            KVT_EACH_16(HIGH_A)
            KVT_EACH_16(LOW_A)
            KVT_EACH_16(HIGH_B)
            KVT_EACH_16(LOW_B)
#undef HIGH_A
#undef LOW_A
#undef HIGH_B
#undef LOW_B
            codes += 2 * step;
        }
        weight += 16 * halves;
    }
#define ADD(i)                                                                                     \
    if ((i) < rows * quads)                                                                        \
        total[i] = vaddq_s32(vshlq_n_s32(high[i], 8), low[i]);
    KVT_EACH_16(ADD)
#undef ADD
}

KVT_I8_BLOCK(near, 1, 4)
KVT_I8_BLOCK(near, 2, 4)
KVT_I8_BLOCK(near, 3, 2)
KVT_I8_BLOCK(near, 4, 2)
KVT_I8_BLOCK(near, 5, 2)
KVT_I8_BLOCK(near, 6, 1)
KVT_I8_BLOCK(near, 7, 1)
KVT_I8_BLOCK(near, 8, 1)

/* ---- one digit ---- */

KVT_INLINE void store_fast(int16x8x2_t x, unsigned char *to)
{
    int8x16_t bytes = vcombine_s8(vmovn_s16(x.val[0]), vmovn_s16(x.val[1]));
    vst1q_u8(to, vreinterpretq_u8_s8(bytes));
}

KVT_INLINE uint32_t sum_of_bytes(const unsigned char *x, size_t n)
{
    uint32x4_t sum = vdupq_n_u32(0);
    for (size_t i = 0; i < n; i += 16)
        sum = vdotq_u32(sum, vld1q_u8(x + i), vdupq_n_u8(1));
    return vaddvq_u32(sum);
}

/*
 * 16 summands are four groups, whose codes are loaded for all of them at once, or for two where
 * registers are short: x[] is [group][quad].
 */
#define MULTIPLY_GROUP(i, first, g)                                                                \
    if ((i) < rows * quads)                                                                        \
        sum[i] = kvt_dot(side, sum[i], x[((g) - (first)) * quads + (i) % quads], w[(i) / quads], g);

KVT_INLINE void product_fast(int side, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *weight, size_t ldw,
                             uintptr_t ahead, int32x4_t *total)
{
    const size_t at_once = rows * quads + rows + 4 * quads <= 29 ? 4 : 2;
    uint32x4_t sum[16];
#define ZERO(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        sum[i] = vdupq_n_u32(0);
    KVT_EACH_16(ZERO)
#undef ZERO
    for (size_t i = 0; i < n; i += 16) {
        uint8x16_t x[16], w[8];
#define LOAD_CODES(i)                                                                              \
    if ((i) < at_once * quads)                                                                     \
        x[i] = vld1q_u8(codes + (i) / quads * step + (i) % quads * 16);
#define LOAD_WEIGHTS(r)                                                                            \
    if ((r) < rows)                                                                                \
        w[r] = vld1q_u8(weight + (r)*ldw + i);
#define MAKE_UNSIGNED(i)                                                                           \
    if (side == KVT_V && (i) < at_once * quads)                                                    \
        x[i] = veorq_u8(x[i], vdupq_n_u8(0x80));
        KVT_EACH_16(LOAD_CODES)
        KVT_EACH_8(LOAD_WEIGHTS)
        kvt_prefetch(codes, ahead);
        kvt_prefetch(codes + step, ahead);
        KVT_LOADED();
        KVT_EACH_16(MAKE_UNSIGNED)
#define GROUP_0(i) MULTIPLY_GROUP(i, 0, 0)
#define GROUP_1(i) MULTIPLY_GROUP(i, 0, 1)
        KVT_EACH_16(GROUP_0)
        KVT_EACH_16(GROUP_1)
        codes += 2 * step;
        kvt_prefetch(codes, ahead);
        kvt_prefetch(codes + step, ahead);
        if (at_once == 2) {
            KVT_EACH_16(LOAD_CODES)
            KVT_LOADED();
            KVT_EACH_16(MAKE_UNSIGNED)
        }
#define GROUP_2(i) MULTIPLY_GROUP(i, 4 - at_once, 2)
#define GROUP_3(i) MULTIPLY_GROUP(i, 4 - at_once, 3)
        KVT_EACH_16(GROUP_2)
        KVT_EACH_16(GROUP_3)
#undef GROUP_0
#undef GROUP_1
#undef GROUP_2
#undef GROUP_3
#undef LOAD_CODES
#undef LOAD_WEIGHTS
#undef MAKE_UNSIGNED
        codes += 2 * step;
    }
    uint32_t excess[8] = {0};
    for (size_t r = 0; side == KVT_V && r < rows; r++)
        excess[r] = 128 * sum_of_bytes(weight + r * ldw, n);
#define TOTAL(i)                                                                                   \
    if ((i) < rows * quads)                                                                        \
        total[i] = vreinterpretq_s32_u32(vsubq_u32(sum[i], vdupq_n_u32(excess[(i) / quads])));
    KVT_EACH_16(TOTAL)
#undef TOTAL
}
#undef MULTIPLY_GROUP

KVT_I8_BLOCK(fast, 1, 4)
KVT_I8_BLOCK(fast, 2, 4)
KVT_I8_BLOCK(fast, 3, 4)
KVT_I8_BLOCK(fast, 4, 4)
KVT_I8_BLOCK(fast, 5, 2)
KVT_I8_BLOCK(fast, 6, 2)
KVT_I8_BLOCK(fast, 7, 2)
KVT_I8_BLOCK(fast, 8, 2)

/* ---- 4 and 5 bits ---- */

KVT_4BIT_BLOCK(dot, 1, 4, 4, 2)
KVT_4BIT_BLOCK(dot, 2, 4, 4, 2)
KVT_4BIT_BLOCK(dot, 3, 4, 4, 2)
KVT_4BIT_BLOCK(dot, 4, 4, 4, 2)
KVT_4BIT_BLOCK(dot, 5, 2, 2, 2)
KVT_4BIT_BLOCK(dot, 6, 2, 2, 2)
KVT_4BIT_BLOCK(dot, 7, 2, 2, 2)
KVT_4BIT_BLOCK(dot, 8, 2, 2, 2)

/* ---- the kernels ---- */

#define BLOCKS(product)                                                                            \
    {                                                                                              \
        NULL, product##_1, product##_2, product##_3, product##_4, product##_5, product##_6,        \
            product##_7, product##_8                                                               \
    }
KVT_I8_KERNELS(static, , near, 8, BLOCKS(qk_near), BLOCKS(pv_near))
KVT_I8_KERNELS(static, , fast, 8, BLOCKS(qk_fast), BLOCKS(pv_fast))

KVT_4BIT_KERNELS(static, , KVT_DOT_P_MOST, KVT_DOT_BIAS_V4, KVT_DOT_BIAS_V5, 8, 1,
                 kvt_store_row_digits)

const kvt_kernels kvt_kernels_dotprod = {
    .isa = "dotprod",
    .pack_q_near = pack_q_near,
    .pack_q_fast = pack_q_fast,
    .qk_i8_near = qk_i8_near,
    .qk_i8_fast = qk_i8_fast,
    .pv_i8_near = pv_i8_near,
    .pv_i8_fast = pv_i8_fast,
    .qk_i4_near = qk_i4_near,
    .pv_i4_near = pv_i4_near,
    .pv_i5_near = pv_i5_near,
};
