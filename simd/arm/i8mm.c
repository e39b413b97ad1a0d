/*
 * NEON with matrix products of int8 (armv8.2-a+i8mm): the near kernels of i8.
 *
 * `smmla` multiplies two rows of 8 bytes by two columns of 8, twice what `sdot` does. The rows are
 * two lanes of a tile's quad, the columns the high and the low digits of one row's codes (the
 * digits are dotprod.c's), so that one instruction does both digits of 8 summands for two lanes:
 *
 *     even: lanes 0 and 2    [ lane 0 . high   lane 0 . low   lane 2 . high   lane 2 . low ]
 *     odd:  lanes 1 and 3    likewise
 *
 * A lane's 8 summands are in two groups of 4, 64 bytes apart or more; a transpose joins them, once
 * for all rows of a block, and another at the end separates high from low. For 32 bytes of codes
 * and r rows that is 2 + 2r instructions where dotprod.c has 4r: the same for one row, 1.6 times
 * fewer for four, 1.8 for eight.
 *
 * Fast is inherited from dotprod.c: one digit by `sdot` is 2r instructions.
 *
 * Overflow: as in dotprod.c, a sum of digit products stays below 2^24, a total below 2^31.
 */
#include "simd/arm/neon_i8.h"

#define Q_MOST_near 16383
#define P_MOST_near 32639
#define BYTES_near 2
#define SHARES_near 0

/* 8 summands at a time: their high digits, their low ones. */
KVT_INLINE void store_near(int16x8x2_t x, unsigned char *to)
{
    for (size_t i = 0; i < 2; i++) {
        /* (x + 128) >> 8 is what is left above the signed low digit. */
        int8x16_t both = vcombine_s8(vrshrn_n_s16(x.val[i], 8), vmovn_s16(x.val[i]));
        vst1q_u8(to + 16 * i, vreinterpretq_u8_s8(both));
    }
}

/* Sum i is of row i / quads and quad i % quads. */
KVT_INLINE void product_near(int side, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *weight, size_t ldw,
                             uintptr_t ahead, int32x4_t *total)
{
    int32x4_t even[16], odd[16];
    (void)side; /* signed digits serve both */
#define ZERO(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        even[i] = odd[i] = vdupq_n_s32(0);
    KVT_EACH_16(ZERO)
#undef ZERO
    for (size_t i = 0; i < n; i += 8) {
        int32x4_t a[8], b[8];
        int8x16_t x[8], y[8], w[8];
#define LOAD_CODES(v)                                                                              \
    if ((v) < quads) {                                                                             \
        a[v] = vreinterpretq_s32_s8(kvt_load_s8(codes + (v)*16));                                  \
        b[v] = vreinterpretq_s32_s8(kvt_load_s8(codes + step + (v)*16));                           \
    }
#define LOAD_WEIGHTS(r)                                                                            \
    if ((r) < rows)                                                                                \
        w[r] = kvt_load_s8(weight + (r)*ldw);
#define TRANSPOSE(v)                                                                               \
    if ((v) < quads) {                                                                             \
        x[v] = vreinterpretq_s8_s32(vtrn1q_s32(a[v], b[v]));                                       \
        y[v] = vreinterpretq_s8_s32(vtrn2q_s32(a[v], b[v]));                                       \
    }
#define EVEN(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        even[i] = vmmlaq_s32(even[i], x[(i) % quads], w[(i) / quads]);
#define ODD(i)                                                                                     \
    if ((i) < rows * quads)                                                                        \
        odd[i] = vmmlaq_s32(odd[i], y[(i) % quads], w[(i) / quads]);
        KVT_EACH_8(LOAD_CODES)
        KVT_EACH_8(LOAD_WEIGHTS)
        kvt_prefetch(codes, ahead);
        kvt_prefetch(codes + step, ahead);
        KVT_LOADED();
        KVT_EACH_8(TRANSPOSE)
        KVT_EACH_16(EVEN)
        KVT_EACH_16(ODD)
#undef LOAD_CODES
#undef LOAD_WEIGHTS
#undef TRANSPOSE
#undef EVEN
#undef ODD
        codes += 2 * step;
        weight += 16;
    }
#define ADD(i)                                                                                     \
    if ((i) < rows * quads)                                                                        \
        total[i] =                                                                                 \
            vaddq_s32(vshlq_n_s32(vtrn1q_s32(even[i], odd[i]), 8), vtrn2q_s32(even[i], odd[i]));
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

#define BLOCKS(product)                                                                            \
    {                                                                                              \
        NULL, product##_1, product##_2, product##_3, product##_4, product##_5, product##_6,        \
            product##_7, product##_8                                                               \
    }
KVT_I8_KERNELS(static, , near, 8, BLOCKS(qk_near), BLOCKS(pv_near))

const kvt_kernels kvt_kernels_i8mm = {
    .isa = "i8mm",
    .pack_q_near = pack_q_near,
    .qk_i8_near = qk_i8_near,
    .pv_i8_near = pv_i8_near,
};
