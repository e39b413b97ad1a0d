/*
 * NEON (armv8-a): i8 as integers. Codes are multiplied by weights of 16 bits: neon_i8.h, and
 * product_near below. Fast is the same. (Products of bytes, two of them added up in 16 bits, would
 * take half of the multiplications, but leave p 7 bits, which adds more to the error than fast mode
 * may.)
 */
#include "neon_i8.h"

#define Q_MOST_near 16383
#define P_MOST_near 32767
#define BYTES_near 2
#define GROUPS_ASKED_near 1

KVT_INLINE void store_near(int16x8x2_t x, unsigned char *to)
{
    vst1q_u8(to, vreinterpretq_u8_s16(x.val[0]));
    vst1q_u8(to + 16, vreinterpretq_u8_s16(x.val[1]));
}

/*
 * 8 summands at a time. Two groups of a quad hold 4 summands of each of 4 lanes; a transpose (trn,
 * cheaper than zip on the Cortex-A57 and A72) brings the 8 of a lane together:
 *
 *     a = A0 A1 A2 A3,  b = B0 B1 B2 B3:   A0 B0 A2 B2,  A1 B1 A3 B3
 *
 * which are widened to 16 bits, lane by lane, and multiplied by the 8 weights as they lie, with
 * four sums for each lane that are folded at the end. What is paid for a row is the
 * multiplications: smlal and smlal2, 4 products each. What is paid for a block is a transpose and
 * two widenings for every 16 bytes.
 *
 * A unit is 8 summands of a quad. An iteration takes two of them at least, where registers allow:
 * all loads, all transposes, all widenings, then the multiplications, so that an in-order core has
 * other work while one waits. Compilers keep that order only when told (KVT_KEEP), pointers too are
 * moved among the loads. Weights of four rows and two units do not fit: the second unit's are
 * loaded between the two. Of two groups one is asked for here, the other by the block of the lanes
 * that follow (GROUPS_ASKED_near).
 *
 * Overflow: the four sums of a lane together are at most 1024 * 127 * 16383 < 2^31 for q, and
 * 64 * 127 * 32767 < 2^28 for p. Dead lanes may wrap.
 */
typedef struct quad8 {
    int16x8_t of[4]; /* 8 summands of each lane */
} quad8;

KVT_INLINE quad8 widen(int32x4_t a, int32x4_t b)
{
    int8x16_t even = vreinterpretq_s8_s32(a), odd = vreinterpretq_s8_s32(b);
    quad8 q = {{vmovl_s8(vget_low_s8(even)), vmovl_s8(vget_low_s8(odd)), vmovl_high_s8(even),
                vmovl_high_s8(odd)}};
    return q;
}

KVT_INLINE int16x8_t load_weights(const unsigned char *weight)
{
    return vreinterpretq_s16_u8(vld1q_u8(weight));
}

KVT_INLINE int32x4_t load_group(const unsigned char *codes)
{
    return vreinterpretq_s32_u8(vld1q_u8(codes));
}

KVT_INLINE void product_near(int side, size_t rows, size_t quads, const unsigned char *codes,
                             size_t step, size_t n, const unsigned char *weight, size_t ldw,
                             uintptr_t ahead, int32x4_t *total)
{
    (void)side;
    const size_t halves = rows == 2 || rows == 5 ? 1 : 2, units = quads * halves;
    const size_t at_once = rows < 4 ? halves : 1; /* halves whose weights fit in registers */
    int32x4_t sum[24];                            /* [row][quad][lane] */
#define ZERO(i)                                                                                    \
    if ((i) < 4 * rows * quads)                                                                    \
        sum[i] = vdupq_n_s32(0);
    KVT_EACH_16(ZERO)
    ZERO(16)
    ZERO(17)
    ZERO(18)
    ZERO(19)
#undef ZERO
#define LOAD_WEIGHTS(r, half)                                                                      \
    if ((r) < rows)                                                                                \
        w[(r) + ((half) < at_once ? (half)*rows : 0)] = load_weights(weight + (r)*ldw + (half)*16);
#define LOAD_GROUPS(u)                                                                             \
    if ((u) < units) {                                                                             \
        const unsigned char *from = codes + (u) / quads * 2 * step + (u) % quads * 16;             \
        a[u] = load_group(from);                                                                   \
        b[u] = load_group(from + step);                                                            \
    }
#define TRANSPOSE(u)                                                                               \
    if ((u) < units) {                                                                             \
        int32x4_t even = vtrn1q_s32(a[u], b[u]);                                                   \
        b[u] = vtrn2q_s32(a[u], b[u]);                                                             \
        a[u] = even;                                                                               \
        KVT_KEEP(a[u], b[u]);                                                                      \
    }
#define WIDEN(u)                                                                                   \
    if ((u) < units) {                                                                             \
        x[u] = widen(a[u], b[u]);                                                                  \
        KVT_KEEP_4(x[u].of);                                                                       \
    }
#define MULTIPLY(u, r, lane, part)                                                                 \
    if ((r) < rows && (u) < units) {                                                               \
        int32x4_t *to = &sum[4 * ((r)*quads + (u) % quads) + (lane)];                              \
        *to = MULTIPLY_##part(*to, x[u].of[lane], w[(r) + (u) / quads % at_once * rows]);          \
    }
#define MULTIPLY_low(to, x, w) vmlal_s16(to, vget_low_s16(x), vget_low_s16(w))
#define MULTIPLY_high(to, x, w) vmlal_high_s16(to, x, w)
#define LANES(u, r, part)                                                                          \
    MULTIPLY(u, r, 0, part) MULTIPLY(u, r, 1, part) MULTIPLY(u, r, 2, part) MULTIPLY(u, r, 3, part)
#define ROWS(u, part)                                                                              \
    LANES(u, 0, part)                                                                              \
    LANES(u, 1, part) LANES(u, 2, part) LANES(u, 3, part) LANES(u, 4, part)
    for (size_t left = n; left > 0;) {
        int32x4_t a[4], b[4];
        quad8 x[4];
        int16x8_t w[8];
#define LOAD_0(r) LOAD_WEIGHTS(r, 0)
#define LOAD_1(r) LOAD_WEIGHTS(r, 1)
        LOAD_GROUPS(0)
        LOAD_GROUPS(1)
        LOAD_GROUPS(2)
        LOAD_GROUPS(3)
        KVT_EACH_8(LOAD_0)
        if (at_once == 2) {
            KVT_EACH_8(LOAD_1)
        }
        kvt_ask(codes, ahead);
        if (halves == 2)
            kvt_ask(codes + 2 * step, ahead);
        codes += 2 * halves * step;
        weight += at_once * 16;
        left -= 8 * halves;
        __asm__ volatile("" ::"r"(codes), "r"(weight), "r"(left) : "memory");
        TRANSPOSE(0)
        TRANSPOSE(1)
        TRANSPOSE(2)
        TRANSPOSE(3)
        WIDEN(0)
        WIDEN(1)
        ROWS(0, low)
        if (quads == 2) {
            ROWS(1, low)
        }
        ROWS(0, high)
        if (quads == 2) {
            ROWS(1, high)
        }
        if (halves > at_once) {
            KVT_KEEP_4(&sum[4 * rows - 4]);
            weight -= 16;
            KVT_EACH_8(LOAD_1)
            weight += 32;
            __asm__ volatile("" ::"r"(weight) : "memory");
        }
        WIDEN(2)
        WIDEN(3)
        if (quads == 1) {
            ROWS(1, low)
            ROWS(1, high)
        }
        ROWS(2, low)
        ROWS(3, low)
        ROWS(2, high)
        ROWS(3, high)
#undef LOAD_0
#undef LOAD_1
    }
#undef LOAD_WEIGHTS
#undef LOAD_GROUPS
#undef TRANSPOSE
#undef WIDEN
#undef MULTIPLY
#undef MULTIPLY_low
#undef MULTIPLY_high
#undef LANES
#undef ROWS
#define FOLD(i)                                                                                    \
    if ((i) < rows * quads)                                                                        \
        total[i] = vpaddq_s32(vpaddq_s32(sum[4 * (i)], sum[4 * (i) + 1]),                          \
                              vpaddq_s32(sum[4 * (i) + 2], sum[4 * (i) + 3]));
    FOLD(0)
    FOLD(1)
    FOLD(2)
    FOLD(3)
    FOLD(4)
#undef FOLD
}

KVT_I8_BLOCK(near, 1, 2)
KVT_I8_BLOCK(near, 2, 2)
KVT_I8_BLOCK(near, 3, 1)
KVT_I8_BLOCK(near, 4, 1)
KVT_I8_BLOCK(near, 5, 1)

#define BLOCKS(product)                                                                            \
    {                                                                                              \
        NULL, product##_1, product##_2, product##_3, product##_4, product##_5                      \
    }
KVT_I8_KERNELS(, kvt_neon_, near, 5, BLOCKS(qk_near), BLOCKS(pv_near))
#undef BLOCKS
