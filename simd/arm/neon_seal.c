/*
 * NEON kernels (armv8-a): sealing, that is the robust mean of a block of f16 tokens and their codes
 * and scales as i8.
 *
 * The bytes are scalar.c's: the same f32 operations in the same order, 4 tokens (K) or dims (V) at
 * a time. An element is code * scale with a power of two for a scale, so that the product is exact:
 * an FMA of code and scale rounds once, as the addition by itself does, and spares the
 * multiplication. Nothing else is fused but what docs/numerics.md says is. For V, without an
 * offset, the product of the open scale and the reciprocal of the sealed one is exact as well, and
 * one multiplication an element remains.
 */
#include "simd/arm/neon_seal.h"

#include "simd/outliers.h"

#define TILES (KVT_TOKENS / KVT_TILE_TOKENS)
/* Floats that seal_k_i8 keeps: 32 tokens of up to 576 dims, 16 of 1152. */
#define BUFFER (32 * 576)

/* ---- the mean ---- */

/* By quarter of a tile, and by tile. */
typedef struct tokens {
    float32x4_t scale[4][TILES];
    uint32x4_t kept[4][TILES]; /* all ones for tokens that count */
} tokens;

/* Lane j: the sum of tokens j, 16 + j, 32 + j, 48 + j of that quarter of the tiles. */
KVT_INLINE float32x4_t sum_tiles(const uint16_t *from, size_t tile, const float32x4_t scale[TILES],
                                 const uint32x4_t *kept)
{
    float32x4_t sum = vdupq_n_f32(0.0f);
    KVT_UNROLL
    for (size_t i = 0; i < TILES; i++) {
        float32x4_t x = kvt_load_f16x4(from + i * tile);
        if (kept)
            x = kvt_and_f32(x, kept[i]);
        sum = i ? vfmaq_f32(sum, x, scale[i]) : vmulq_f32(x, scale[i]);
    }
    return sum;
}

/* A dim's lanes 8 and 4 apart are added. */
KVT_INLINE float32x4_t sum_of_dim(const uint16_t *from, size_t tile, const tokens *t, int is_all)
{
    float32x4_t sum[4];
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++)
        sum[j] = sum_tiles(from + 4 * j, tile, t->scale[j], is_all ? NULL : t->kept[j]);
    return vaddq_f32(vaddq_f32(sum[0], sum[2]), vaddq_f32(sum[1], sum[3]));
}

/* Folds the lanes of two dims 2 apart: a0 + a2, a1 + a3, b0 + b2, b1 + b3. */
KVT_INLINE float32x4_t fold_2(float32x4_t a, float32x4_t b)
{
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
                     vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
}

/* The mean of `count` tokens, those that t->kept says, or all. 4 dims fold together. */
KVT_INLINE void mean_of_kept(const uint16_t *open, const tokens *t, int is_all, float count,
                             size_t dims_p, float *mean)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    for (size_t d = 0; d < dims_p; d += 4) {
        const uint16_t *from = open + d * KVT_TILE_TOKENS;
        float32x4_t low =
            fold_2(sum_of_dim(from, tile, t, is_all), sum_of_dim(from + 16, tile, t, is_all));
        float32x4_t high =
            fold_2(sum_of_dim(from + 32, tile, t, is_all), sum_of_dim(from + 48, tile, t, is_all));
        float32x4_t sum = vaddq_f32(vuzp1q_f32(low, high), vuzp2q_f32(low, high));
        vst1q_f32(mean + d, vdivq_f32(sum, vdupq_n_f32(count)));
    }
}

/* Squared distances from the mean. Two quarters of the four tiles are eight chains of additions. */
KVT_INLINE void distances_of(const uint16_t *open, const tokens *t, size_t dims_p,
                             const float *mean, float *distances)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    for (size_t q = 0; q < 4; q += 2) {
        float32x4_t dist[2 * TILES];
        KVT_UNROLL
        for (size_t i = 0; i < 2 * TILES; i++)
            dist[i] = vdupq_n_f32(0.0f);
        for (size_t d = 0; d < dims_p; d++) {
            const uint16_t *from = open + d * KVT_TILE_TOKENS + q * 4;
            const float32x4_t minus = vdupq_n_f32(-mean[d]);
            KVT_UNROLL
            for (size_t i = 0; i < 2 * TILES; i++) {
                float32x4_t x = kvt_load_f16x4(from + i / 2 * tile + i % 2 * 4);
                float32x4_t away = vfmaq_f32(minus, x, t->scale[q + i % 2][i / 2]);
                dist[i] = vaddq_f32(dist[i], vmulq_f32(away, away));
            }
        }
        KVT_UNROLL
        for (size_t i = 0; i < 2 * TILES; i++)
            vst1q_f32(distances + i / 2 * KVT_TILE_TOKENS + (q + i % 2) * 4, dist[i]);
    }
}

void kvt_neon_mean_k_f16(const void *open, const uint16_t *open_scales, size_t dims_p, float *mean)
{
    static const uint32_t bit[4] = {1, 2, 4, 8};
    const uint32x4_t bits = vld1q_u32(bit);
    float distances[KVT_TOKENS];
    uint64_t left_out;
    tokens t;

    for (size_t i = 0; i < TILES; i++)
        for (size_t j = 0; j < 4; j++)
            t.scale[j][i] = kvt_load_f16x4(open_scales + i * KVT_TILE_TOKENS + j * 4);
    mean_of_kept(open, &t, 1, KVT_TOKENS, dims_p, mean);
    distances_of(open, &t, dims_p, mean, distances);
    left_out = kvt_outliers(distances);
    if (left_out == 0)
        return;
    for (size_t i = 0; i < TILES; i++)
        for (size_t j = 0; j < 4; j++) {
            uint32_t four = (uint32_t)(~left_out >> (i * KVT_TILE_TOKENS + j * 4)) & 15u;
            t.kept[j][i] = vtstq_u32(vdupq_n_u32(four), bits);
        }
    mean_of_kept(open, &t, 0, (float)(KVT_TOKENS - __builtin_popcountll(left_out)), dims_p, mean);
}

/* ---- codes ---- */

/*
 * A scale is a 127th of the largest magnitude, rounded up by tile.h's function: one a token. The
 * reciprocals are what codes are multiplied by, zero for a scale of zero.
 */
KVT_INLINE void scales_of(const float *most, size_t n, uint16_t *scales, float *reciprocals)
{
    for (size_t i = 0; i < n; i++) {
        scales[i] = kvt_f32_to_f16_round(most[i] / 127.0f, 1);
        reciprocals[i] = scales[i] ? 1.0f / kvt_f16_to_f32(scales[i]) : 0.0f;
    }
}

/*
 * K's tokens are the lanes, 4 a register: no operation needs another lane. w of a tile goes to a
 * buffer, four registers a dim, `stride` floats from one dim to the next.
 */
KVT_INLINE void widen_tile(const uint16_t *from, const uint16_t *open_scales, const float *delta,
                           size_t dims_p, size_t stride, float *w, uint16_t *scales,
                           float *reciprocals)
{
    float most[KVT_TILE_TOKENS];
    float32x4_t scale[4], largest[4];
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++) {
        scale[j] = kvt_load_f16x4(open_scales + 4 * j);
        largest[j] = vdupq_n_f32(0.0f);
    }
    for (size_t d = 0; d < dims_p; d++) {
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++) {
            float32x4_t x =
                kvt_open_plus(from + d * 16 + 4 * j, scale[j], delta ? delta + d : NULL);
            vst1q_f32(w + d * stride + 4 * j, x);
            largest[j] = vmaxq_f32(largest[j], vabsq_f32(x));
        }
    }
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++)
        vst1q_f32(most + 4 * j, largest[j]);
    scales_of(most, KVT_TILE_TOKENS, scales, reciprocals);
}

/* w of a tile becomes v = w * reciprocal, and its squared norm gives the tokens' gains. */
KVT_INLINE void normalize(size_t dims_p, size_t stride, const float *reciprocals, float *v,
                          float *gain)
{
    float32x4_t r[4], norm[4];
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++) {
        r[j] = vld1q_f32(reciprocals + 4 * j);
        norm[j] = vdupq_n_f32(0.0f);
    }
    for (size_t d = 0; d < dims_p; d++) {
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++) {
            float32x4_t x = vmulq_f32(vld1q_f32(v + d * stride + 4 * j), r[j]);
            vst1q_f32(v + d * stride + 4 * j, x);
            norm[j] = vfmaq_f32(norm[j], x, x);
        }
    }
    KVT_UNROLL
    for (size_t j = 0; j < 4; j++) {
        float32x4_t part =
            vmaxq_f32(vmulq_f32(norm[j], vdupq_n_f32(0.125f)), vdupq_n_f32(KVT_SHAPE_NORM));
        vst1q_f32(gain + 4 * j, vdivq_f32(vdupq_n_f32(1.0f), part));
    }
}

/* A dim of four registers, each operation for all of them before the next. v becomes the codes. */
KVT_INLINE void shape_four(float *v, const float32x4_t *gain, float32x4_t *projection)
{
    const float32x4_t most = vdupq_n_f32(KVT_SHAPE_MAX), least = vdupq_n_f32(-KVT_SHAPE_MAX);
    float32x4_t x[4], y[4];
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        x[i] = vld1q_f32(v + 4 * i);
        y[i] = vmulq_f32(projection[i], gain[i]);
    }
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        y[i] = vminq_f32(y[i], most);
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        y[i] = vmaxq_f32(y[i], least);
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        y[i] = vfmsq_f32(x[i], x[i], y[i]);
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        y[i] = vrndnq_f32(y[i]);
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++) {
        vst1q_f32(v + 4 * i, y[i]);
        y[i] = vsubq_f32(y[i], x[i]);
    }
    KVT_UNROLL
    for (size_t i = 0; i < 4; i++)
        projection[i] = vfmaq_f32(projection[i], y[i], x[i]);
}

/*
 * Codes of n (4 or 8) registers of tokens. From one dim of a token to the next it is seven
 * operations, each of which needs the one before: 20 cycles or more. So the registers go side by
 * side; 16 of them, the whole block, would leave none for their gains.
 */
KVT_INLINE void shape(size_t n, size_t dims_p, float *v, const float *gains, uint8_t *codes)
{
    const uint8x16_t order = kvt_tokens_order();
    float32x4_t projection[8], gain[8];
    KVT_UNROLL
    for (size_t i = 0; i < n; i++) {
        projection[i] = vdupq_n_f32(0.0f);
        gain[i] = vld1q_f32(gains + 4 * i);
    }
    for (size_t d = 0; d < dims_p; d += 4) {
        float *four = v + d * n * 4;
        for (size_t e = 0; e < 4; e++) { /* unrolled, GCC 12 spills */
            KVT_UNROLL
            for (size_t i = 0; i < n; i += 4)
                shape_four(four + (e * n + i) * 4, gain + i, projection + i);
        }
        KVT_UNROLL
        for (size_t i = 0; i < n; i++) {
            const float32x4_t x[4] = {vld1q_f32(four + i * 4), vld1q_f32(four + (n + i) * 4),
                                      vld1q_f32(four + (2 * n + i) * 4),
                                      vld1q_f32(four + (3 * n + i) * 4)};
            vst1q_u8(codes + kvt_k8_index(i * 4, d, dims_p), vqtbl1q_u8(kvt_codes_of(x), order));
        }
    }
}

KVT_INLINE void seal_k(size_t n, const uint16_t *open, const uint16_t *open_scales,
                       const float *delta, size_t dims_p, float *v, uint8_t *codes,
                       uint16_t *scales)
{
    float reciprocals[KVT_TILE_TOKENS], gains[32];
    for (size_t i = 0; i < n; i += 4) {
        const uint16_t *from = open + i * 4 * dims_p;
        float *to = v + i * 4;
        if (delta)
            widen_tile(from, open_scales + i * 4, delta, dims_p, n * 4, to, scales + i * 4,
                       reciprocals);
        else
            widen_tile(from, open_scales + i * 4, NULL, dims_p, n * 4, to, scales + i * 4,
                       reciprocals);
        normalize(dims_p, n * 4, reciprocals, to, gains + i * 4);
    }
    shape(n, dims_p, v, gains, codes);
}

void kvt_neon_seal_k_i8(const void *open, const uint16_t *open_scales, const float *delta,
                        size_t dims_p, const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *from = open;
    uint8_t *to = codes;
    _Alignas(64) float v[BUFFER];
    (void)next;
    if (dims_p * 32 <= BUFFER)
        for (size_t t = 0; t < KVT_TOKENS; t += 32)
            seal_k(8, from + t * dims_p, open_scales + t, delta, dims_p, v, to + t * dims_p,
                   scales + t);
    else
        for (size_t t = 0; t < KVT_TOKENS; t += 16)
            seal_k(4, from + t * dims_p, open_scales + t, delta, dims_p, v, to + t * dims_p,
                   scales + t);
}

/* Codes are formed 4 tokens by 16 dims at a time: the store interleaves the tokens. */
void kvt_neon_seal_v_i8(const void *open, const uint16_t *open_scales, size_t dims_p,
                        const void *next, void *codes, uint16_t *scales)
{
    (void)next;
    for (size_t t = 0; t < KVT_TOKENS; t += 4) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + t * dims_p;
        float most[4], factor[4];
        for (size_t j = 0; j < 4; j++)
            most[j] = kvt_f16_to_f32(kvt_most_of_row(from + j * dims_p, dims_p)) *
                      kvt_f16_to_f32(open_scales[t + j]);
        scales_of(most, 4, scales + t, factor);
        for (size_t j = 0; j < 4; j++)
            factor[j] *= kvt_f16_to_f32(open_scales[t + j]);
        for (size_t d = 0; d < dims_p; d += 16) {
            uint8x16x4_t y;
            KVT_UNROLL
            for (size_t j = 0; j < 4; j++) {
                const uint16_t *at = from + j * dims_p + d;
                float32x4_t x[4];
                KVT_UNROLL
                for (size_t e = 0; e < 4; e++)
                    x[e] = vmulq_n_f32(kvt_load_f16x4(at + 4 * e), factor[j]);
                y.val[j] = kvt_codes_of(x);
            }
            vst4q_u8(to + d * 4, y);
        }
    }
}
