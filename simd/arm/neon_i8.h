/*
 * i8 as integer dot products, for the NEON instruction sets. neon_near.c, dotprod.c and i8mm.c each
 * define the inner product and the layout of its weights; the rest is here: rounding q and p,
 * the loops over tiles and blocks of rows, applying the scales.
 *
 * K and V are one product. K's 64 bytes of a group are [16 tokens][4 dims], V's [16 dims][4
 * tokens]: 16 lanes of 4 summands, four lanes (a quad) to a register. Weights are q's codes or p's:
 *
 *     total[row][lane] = sum over summands i of weight[row][i] * codes[i / 4][lane][i % 4]
 *
 * A kind of product (near, fast) is, in the file that includes this one,
 *
 *   product_KIND  rows by quads totals of a side, from zero, over n summands (a multiple of 16).
 *                 Groups of 4 summands are `step` bytes apart; it prefetches the lines `ahead` of
 *                 the first quad.
 *   store_KIND    16 codes in the layout that product_KIND reads, BYTES_KIND bytes for each
 *   Q_MOST_KIND, P_MOST_KIND  the largest codes
 *   SHARES_KIND   1 if product_KIND prefetches its share only: the lines of `quads` of every 4
 *                 groups, from the first on; 0 if it prefetches all lines
 *
 * and KVT_I8_KERNELS defines its three kernels. Integer sums are exact, so a row's result does not
 * depend on how rows are cut into blocks.
 */
#ifndef KVT_NEON_I8_H
#define KVT_NEON_I8_H

#include "simd/arm/neon.h"
#include "simd/dither.h"

/* Lower bound of a row's largest magnitude, so that its reciprocal is finite. */
#define KVT_LEAST 0x1p-100f
/* The header of a packed row: its scale, padded for alignment. */
#define KVT_ROW_HEAD 64

/* ---- rounding ---- */

/* 4 codes: x times reciprocal, plus what is at `plus` (NULL: nothing), to nearest even; a NaN (of
   logits beyond f32) becomes 0. */
KVT_INLINE int32x4_t kvt_code_4(const float *x, float reciprocal, const float *plus)
{
    float32x4_t steps = plus ? vfmaq_n_f32(vld1q_f32(plus), vld1q_f32(x), reciprocal)
                             : vmulq_n_f32(vld1q_f32(x), reciprocal);
    return vcvtnq_s32_f32(steps);
}

/* What is added to the weights of the slots from t on, of which the largest code is p_most. */
KVT_INLINE const float *kvt_plus(float p_most, size_t t)
{
    return p_most > 255 ? NULL : kvt_dither + t;
}

KVT_INLINE int16x8x2_t kvt_code_16(const float *x, float reciprocal, const float *plus)
{
    int32x4_t a = kvt_code_4(x, reciprocal, plus);
    int32x4_t b = kvt_code_4(x + 4, reciprocal, plus ? plus + 4 : NULL);
    int32x4_t c = kvt_code_4(x + 8, reciprocal, plus ? plus + 8 : NULL);
    int32x4_t d = kvt_code_4(x + 12, reciprocal, plus ? plus + 12 : NULL);
    int16x8x2_t codes = {{vmovn_high_s32(vmovn_s32(a), b), vmovn_high_s32(vmovn_s32(c), d)}};
    return codes;
}

/* The largest magnitude of n numbers (a multiple of 16), at least KVT_LEAST. */
KVT_INLINE float kvt_largest_magnitude(const float *x, size_t n)
{
    float32x4_t a = vdupq_n_f32(KVT_LEAST), b = a;
    for (size_t i = 0; i < n; i += 8) {
        a = vmaxq_f32(a, vabsq_f32(vld1q_f32(x + i)));
        b = vmaxq_f32(b, vabsq_f32(vld1q_f32(x + i + 4)));
    }
    return vmaxvq_f32(vmaxq_f32(a, b));
}

/* weight = p * scale, n of them (a multiple of 16); their largest, NaNs aside. */
KVT_INLINE float kvt_scale_weights(const float *p, const float *scale, size_t n, float *weight)
{
    float32x4_t a = vdupq_n_f32(KVT_LEAST), b = a;
    for (size_t t = 0; t < n; t += 8) {
        float32x4_t x = vmulq_f32(vld1q_f32(p + t), vld1q_f32(scale + t));
        float32x4_t y = vmulq_f32(vld1q_f32(p + t + 4), vld1q_f32(scale + t + 4));
        a = vmaxnmq_f32(a, x);
        b = vmaxnmq_f32(b, y);
        vst1q_f32(weight + t, x);
        vst1q_f32(weight + t + 4, y);
    }
    return vmaxnmvq_f32(vmaxnmq_f32(a, b));
}

/* ---- walking the tiles ---- */

/* What all blocks of a call share. */
typedef struct kvt_i8_qk {
    const unsigned char *packed, *codes;
    const float *scales; /* [64] */
    size_t dims_p;
    uintptr_t ahead;
    float *s;
} kvt_i8_qk;

typedef struct kvt_i8_pv {
    const unsigned char *weight; /* [rows][64 * 2] */
    const float *weight_scale;   /* [rows] */
    const unsigned char *codes;
    size_t n_tokens; /* a multiple of 16; the weights in excess are zero */
    size_t dims_p;
    uintptr_t ahead;
    const float *alpha;
    float *acc;
    size_t ldacc;
} kvt_i8_pv;

#define KVT_WEIGHT_BYTES (2 * KVT_TOKENS)

/* Scores of one row and quad. */
KVT_INLINE void kvt_i8_score(const kvt_i8_qk *call, size_t row, size_t token, int32x4_t total)
{
    float32x4_t scale = vld1q_f32(call->scales + token);
    float row_scale;
    memcpy(&row_scale, call->packed + row * kvt_packed_row_bytes(call->dims_p), sizeof row_scale);
    vst1q_f32(call->s + row * KVT_TOKENS + token,
              vmulq_f32(vcvtq_f32_s32(total), vmulq_n_f32(scale, row_scale)));
}

/* acc = acc * alpha + total * scale of one row and quad. */
KVT_INLINE void kvt_i8_add(const kvt_i8_pv *call, size_t row, size_t dim, int32x4_t total)
{
    float *acc = call->acc + row * call->ldacc + dim;
    float32x4_t x = vmulq_n_f32(vcvtq_f32_s32(total), call->weight_scale[row]);
    vst1q_f32(acc, vfmaq_n_f32(x, vld1q_f32(acc), call->alpha[row]));
}

/*
 * `ahead` for the block of 4 * quads lanes from `lane` on. A line is 16 lanes, so several blocks
 * read each line: either the first block of a line prefetches all lines and the others none (zero,
 * see kvt_ahead), or, with shares, each prefetches its share, offset by one group from the block
 * before.
 */
KVT_INLINE uintptr_t kvt_i8_ahead(int shares, size_t quads, size_t lane, size_t step,
                                  uintptr_t ahead)
{
    size_t block = lane % 16 / (4 * quads);
    if (block == 0)
        return ahead;
    return shares && ahead ? ahead + block * step : 0;
}

/*
 * The kernels of a kind for blocks of `rows` rows and 4 * `quads` lanes. A line of 16 lanes is
 * prefetched while its quads are multiplied, by the first block of rows only.
 */
#define KVT_I8_BLOCK(kind, rows, quads)                                                            \
    KVT_BLOCK_OF_ROWS void qk_##kind##_##rows(const kvt_i8_qk *call, size_t row, size_t token,     \
                                              size_t end, uintptr_t ahead)                         \
    {                                                                                              \
        const size_t row_bytes = kvt_packed_row_bytes(call->dims_p);                               \
        for (; token < end; token += 4 * (quads)) {                                                \
            int32x4_t total[16];                                                                   \
            product_##kind(KVT_K, rows, quads, call->codes + kvt_k8_index(token, 0, call->dims_p), \
                           64, call->dims_p, call->packed + row * row_bytes + KVT_ROW_HEAD,        \
                           row_bytes, kvt_i8_ahead(SHARES_##kind, quads, token, 64, ahead),        \
                           total);                                                                 \
            KVT_I8_TOTALS(kvt_i8_score, rows, quads, token)                                        \
        }                                                                                          \
    }                                                                                              \
    KVT_BLOCK_OF_ROWS void pv_##kind##_##rows(const kvt_i8_pv *call, size_t row, size_t dim,       \
                                              size_t end, uintptr_t ahead)                         \
    {                                                                                              \
        for (; dim < end; dim += 4 * (quads)) {                                                    \
            int32x4_t total[16];                                                                   \
            product_##kind(                                                                        \
                KVT_V, rows, quads, call->codes + dim * 4, call->dims_p * 4, call->n_tokens,       \
                call->weight + row * KVT_WEIGHT_BYTES, KVT_WEIGHT_BYTES,                           \
                kvt_i8_ahead(SHARES_##kind, quads, dim, call->dims_p * 4, ahead), total);          \
            KVT_I8_TOTALS(kvt_i8_add, rows, quads, dim)                                            \
        }                                                                                          \
    }

#define KVT_I8_TOTAL(i, call_of, rows, quads, lane)                                                \
    if ((i) < (rows) * (quads))                                                                    \
        call_of(call, row + (i) / (quads), (lane) + (i) % (quads)*4, total[i]);
#define KVT_I8_TOTALS(call_of, rows, quads, lane)                                                  \
    KVT_I8_TOTAL(0, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(1, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(2, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(3, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(4, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(5, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(6, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(7, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(8, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(9, call_of, rows, quads, lane)                                                    \
    KVT_I8_TOTAL(10, call_of, rows, quads, lane)                                                   \
    KVT_I8_TOTAL(11, call_of, rows, quads, lane)                                                   \
    KVT_I8_TOTAL(12, call_of, rows, quads, lane)                                                   \
    KVT_I8_TOTAL(13, call_of, rows, quads, lane)                                                   \
    KVT_I8_TOTAL(14, call_of, rows, quads, lane)                                                   \
    KVT_I8_TOTAL(15, call_of, rows, quads, lane)

/*
 * The kernels of a kind, of that linkage and prefix, from blocks of up to `most` rows that were
 * defined by KVT_I8_BLOCK; QK_BLOCKS and PV_BLOCKS are the tables of these blocks, by rows. Tiles
 * (columns of 16 dims) outside, rows inside: a tile is read from memory once.
 */
#define KVT_I8_KERNELS(linkage, prefix, kind, most, QK_BLOCKS, PV_BLOCKS)                          \
    linkage void prefix##pack_q_##kind(const float *q, size_t ldq, size_t rows, size_t dims_p,     \
                                       void *packed)                                               \
    {                                                                                              \
        for (size_t r = 0; r < rows; r++) {                                                        \
            unsigned char *row = (unsigned char *)packed + r * kvt_packed_row_bytes(dims_p);       \
            float largest = kvt_largest_magnitude(q + r * ldq, dims_p);                            \
            float scale = largest / Q_MOST_##kind, reciprocal = Q_MOST_##kind / largest;           \
            memcpy(row, &scale, sizeof scale);                                                     \
            for (size_t d = 0; d < dims_p; d += 16)                                                \
                store_##kind(kvt_code_16(q + r * ldq + d, reciprocal, NULL),                       \
                             row + KVT_ROW_HEAD + d * BYTES_##kind);                               \
        }                                                                                          \
    }                                                                                              \
    linkage void prefix##qk_i8_##kind(const void *packed, size_t first, size_t rows,               \
                                      const void *codes, const uint16_t *scales, size_t n_tokens,  \
                                      size_t dims_p, const void *next, float *s)                   \
    {                                                                                              \
        static void (*const blocks[])(const kvt_i8_qk *, size_t, size_t, size_t, uintptr_t) =      \
            QK_BLOCKS;                                                                             \
        float scale[KVT_TOKENS];                                                                   \
        const kvt_i8_qk call = {packed, codes, scale, dims_p, kvt_ahead(codes, next), s};          \
        for (size_t t = 0; t < kvt_round_up(n_tokens, 16); t += 4)                                 \
            vst1q_f32(scale + t, kvt_load_f16x4(scales + t));                                      \
        for (size_t token = 0; token < n_tokens; token += KVT_TILE_TOKENS) {                       \
            size_t left = n_tokens - token;                                                        \
            size_t end = token + (left < KVT_TILE_TOKENS ? left : KVT_TILE_TOKENS);                \
            for (size_t row = first, n; row < rows; row += n) {                                    \
                n = kvt_rows_of_block(rows - row, most);                                           \
                blocks[n](&call, row, token, end, row == first ? call.ahead : 0);                  \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    linkage void prefix##pv_i8_##kind(                                                             \
        const float *p, size_t rows, const void *codes, const uint16_t *scales, size_t n_tokens,   \
        size_t dims_p, const float *alpha, const void *next, float *acc, size_t ldacc)             \
    {                                                                                              \
        static void (*const blocks[])(const kvt_i8_pv *, size_t, size_t, size_t, uintptr_t) =      \
            PV_BLOCKS;                                                                             \
        unsigned char weight[KVT_ROWS_MAX * KVT_WEIGHT_BYTES] __attribute__((aligned(64)));        \
        float weight_scale[KVT_ROWS_MAX], scale[KVT_TOKENS], x[KVT_TOKENS];                        \
        const size_t n = kvt_round_up(n_tokens, 16);                                               \
        const size_t span = rows <= (most) ? dims_p : 16;                                          \
        const kvt_i8_pv call = {weight, weight_scale, codes, n, dims_p, kvt_ahead(codes, next),    \
                                alpha,  acc,          ldacc};                                      \
        kvt_live_scales(scales, n_tokens, scale);                                                  \
        for (size_t r = 0; r < rows; r++) {                                                        \
            float largest = kvt_scale_weights(p + r * KVT_TOKENS, scale, n, x);                    \
            float reciprocal = P_MOST_##kind / largest;                                            \
            weight_scale[r] = largest / P_MOST_##kind;                                             \
            for (size_t t = 0; t < n; t += 16)                                                     \
                store_##kind(kvt_code_16(x + t, reciprocal, kvt_plus(P_MOST_##kind, t)),           \
                             weight + r * KVT_WEIGHT_BYTES + t * BYTES_##kind);                    \
        }                                                                                          \
        for (size_t dim = 0; dim < dims_p; dim += span)                                            \
            for (size_t row = 0, count; row < rows; row += count) {                                \
                count = kvt_rows_of_block(rows - row, most);                                       \
                blocks[count](&call, row, dim, dim + span, row ? 0 : call.ahead);                  \
            }                                                                                      \
    }

#endif /* KVT_NEON_I8_H */
