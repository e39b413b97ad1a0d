/*
 * Scalar kernels: the reference. Plain loops in the order that docs/numerics.md specifies;
 * every other table is checked against this one, stored bytes bit for bit.
 *
 * The loops over the 16 tokens of a tile are innermost, so that a compiler can vectorize them
 * with whatever the baseline offers. Sums over dims are formed in chunks of 16 and then
 * added up: the rounding error of a chain grows with its length.
 */
#include <math.h>
#include <sleef.h>

#include "simd/kernels.h"
#include "simd/outliers.h"
#include "simd/scalar_4bit.h"

/* Most dims of a head: a row of one is an array. */
#define SEAL_DIMS 1024

/* ---- conversions ---- */

static int load_f32(const void *src, float *dst, size_t n)
{
    uint32_t bad = 0;
    memcpy(dst, src, n * sizeof *dst);
    for (size_t i = 0; i < n; i++)
        bad |= (kvt_f32_bits(dst[i]) & 0x7f800000u) == 0x7f800000u;
    return !bad;
}

static int load_f16(const void *src, float *dst, size_t n)
{
    const uint16_t *h = src;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        bad |= (h[i] & 0x7c00u) == 0x7c00u;
        dst[i] = kvt_f16_to_f32(h[i]);
    }
    return !bad;
}

static int load_bf16(const void *src, float *dst, size_t n)
{
    const uint16_t *h = src;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        bad |= (h[i] & 0x7f80u) == 0x7f80u;
        dst[i] = kvt_bf16_to_f32(h[i]);
    }
    return !bad;
}

static void store_f32(const float *src, void *dst, size_t n)
{
    memcpy(dst, src, n * sizeof *src);
}

static void store_f16(const float *src, void *dst, size_t n)
{
    uint16_t *h = dst;
    for (size_t i = 0; i < n; i++) {
        float x = src[i] > 65504.0f ? 65504.0f : src[i];
        h[i] = kvt_f32_to_f16(x < -65504.0f ? -65504.0f : x);
    }
}

static void store_bf16(const float *src, void *dst, size_t n)
{
    uint16_t *h = dst;
    for (size_t i = 0; i < n; i++)
        h[i] = kvt_f32_to_bf16(src[i]);
}

/* ---- rotation ---- */

/* Butterflies of distance 1, 2, 4, ... : (a, b) becomes (a + b, a - b). */
static void hadamard(float *x, size_t dims, size_t block)
{
    for (size_t h = 1; h < block; h *= 2)
        for (size_t i = 0; i < dims; i += 2 * h)
            for (size_t j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
}

static void rotate(const float *x, const float *sign, size_t dims, size_t block, float scale,
                   float *y)
{
    for (size_t i = 0; i < dims; i++)
        y[i] = x[i] * sign[i];
    hadamard(y, dims, block);
    for (size_t i = 0; i < dims; i++)
        y[i] *= scale;
}

static void unrotate(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    hadamard(x, dims, block);
    for (size_t i = 0; i < dims; i++)
        x[i] *= scale;
    for (size_t i = 0; i < dims; i++)
        x[i] *= sign[i];
}

/* ---- storing ---- */

/* The index functions of tile.h, chosen at compile time by the callers below. */
typedef size_t index_function(size_t token, size_t dim, size_t dims);

static inline int put_f32(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                          void *codes, size_t slot, index_function *index)
{
    float *out = codes;
    for (size_t i = 0; i < n; i++)
        for (size_t d = 0; d < dims; d++)
            out[index(slot + i, d, dims_p)] = x[i * ldx + d];
    return 1;
}

static inline int put_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                          void *codes, size_t slot, index_function *index)
{
    uint16_t *out = codes;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t d = 0; d < dims; d++) {
            uint16_t h = kvt_f32_to_f16(x[i * ldx + d]);
            bad |= (h & 0x7c00u) == 0x7c00u;
            out[index(slot + i, d, dims_p)] = h;
        }
    return !bad;
}

static inline void codes_of(const float *row, float factor, size_t dims, size_t dims_p,
                            int8_t *codes, size_t slot, index_function *index)
{
    for (size_t d = 0; d < dims; d++) {
        /* Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the low bits. */
        float rounded = row[d] * factor + 12582912.0f;
        codes[index(slot, d, dims_p)] = (int8_t)(int32_t)(kvt_f32_bits(rounded) - 0x4b400000u);
    }
}

/*
 * scale = absmax / 127 rounded up to f16, so that no code passes 127; codes to nearest even of
 * x times the f32 reciprocal of the scale. The reciprocal of the smallest f16 is 2^24, so it
 * cannot overflow; a scale of zero (absmax / 127 is zero in f32) stores zeros.
 */
static inline int put_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                         void *codes, uint16_t *scales, size_t slot, index_function *index)
{
    int good = 1;
    for (size_t i = 0; i < n; i++) {
        const float *row = x + i * ldx;
        uint32_t absmax = 0; /* as bits: ordered as the magnitudes are, NaNs above infinity */
        for (size_t d = 0; d < dims; d++) {
            uint32_t a = kvt_f32_bits(row[d]) & 0x7fffffffu;
            absmax = a > absmax ? a : absmax;
        }
        uint16_t scale = kvt_f32_to_f16_round(kvt_bits_f32(absmax) / 127.0f, 1);
        float reciprocal = scale ? 1.0f / kvt_f16_to_f32(scale) : 0.0f;
        if ((scale & 0x7c00u) == 0x7c00u) { /* also for an absmax that is not finite */
            good = 0;
            continue;
        }
        codes_of(row, reciprocal, dims, dims_p, codes, slot + i, index);
        scales[slot + i] = scale;
    }
    return good;
}

static int put_k_f32(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                     uint16_t *scales, size_t slot)
{
    (void)scales;
    return put_f32(x, ldx, n, dims, dims_p, codes, slot, kvt_kw_index);
}

static int put_k_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                     uint16_t *scales, size_t slot)
{
    (void)scales;
    return put_f16(x, ldx, n, dims, dims_p, codes, slot, kvt_kw_index);
}

static int put_k_open(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                      const uint16_t *offset, void *codes, size_t slot)
{
    uint16_t *out = codes;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t d = 0; d < dims; d++) {
            uint16_t y = kvt_f32_to_f16(x[i * ldx + d] - kvt_f16_to_f32(offset[d]));
            bad |= (y & 0x7c00u) == 0x7c00u;
            out[kvt_kw_index(slot + i, d, dims_p)] = y;
        }
    return !bad;
}

static int put_k_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                    uint16_t *scales, size_t slot)
{
    return put_i8(x, ldx, n, dims, dims_p, codes, scales, slot, kvt_k8_index);
}

static int put_v_f32(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                     uint16_t *scales, size_t slot)
{
    (void)scales;
    return put_f32(x, ldx, n, dims, dims_p, codes, slot, kvt_vw_index);
}

static int put_v_f16(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                     uint16_t *scales, size_t slot)
{
    (void)scales;
    return put_f16(x, ldx, n, dims, dims_p, codes, slot, kvt_vw_index);
}

static int put_v_i8(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p, void *codes,
                    uint16_t *scales, size_t slot)
{
    return put_i8(x, ldx, n, dims, dims_p, codes, scales, slot, kvt_v8_index);
}

/* ---- reading back ---- */

static void get_k_f32(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                      size_t dims_p, float *x)
{
    const float *in = codes;
    (void)scales;
    for (size_t d = 0; d < dims; d++)
        x[d] = in[kvt_kw_index(slot, d, dims_p)];
}

static void get_k_f16(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                      size_t dims_p, float *x)
{
    const uint16_t *in = codes;
    (void)scales;
    for (size_t d = 0; d < dims; d++)
        x[d] = kvt_f16_to_f32(in[kvt_kw_index(slot, d, dims_p)]);
}

static void get_k_i8(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                     size_t dims_p, float *x)
{
    const int8_t *in = codes;
    float scale = kvt_f16_to_f32(scales[slot]);
    for (size_t d = 0; d < dims; d++)
        x[d] = (float)in[kvt_k8_index(slot, d, dims_p)] * scale;
}

static void get_v_f32(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                      size_t dims_p, float *x)
{
    const float *in = codes;
    (void)scales;
    memcpy(x, in + kvt_vw_index(slot, 0, dims_p), dims * sizeof *x);
}

static void get_v_f16(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                      size_t dims_p, float *x)
{
    const uint16_t *in = codes;
    (void)scales;
    for (size_t d = 0; d < dims; d++)
        x[d] = kvt_f16_to_f32(in[kvt_vw_index(slot, d, dims_p)]);
}

static void get_v_i8(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                     size_t dims_p, float *x)
{
    const int8_t *in = codes;
    float scale = kvt_f16_to_f32(scales[slot]);
    for (size_t d = 0; d < dims; d++)
        x[d] = (float)in[kvt_v8_index(slot, d, dims_p)] * scale;
}

/* ---- sealing ---- */

static void load_scales(const uint16_t *scales, float *out)
{
    for (size_t t = 0; t < KVT_TOKENS; t++)
        out[t] = kvt_f16_to_f32(scales[t]);
}

/*
 * Lane j adds tokens j, 16 + j, 32 + j, 48 + j, zero in place of the tokens left out; then lanes
 * are folded 8, 4, 2, 1 apart: the order in which a vector of tokens adds up.
 */
static void mean_of_kept(const uint16_t *open, const float *scale, size_t dims_p, uint64_t left_out,
                         float kept, float *mean)
{
    for (size_t d = 0; d < dims_p; d++) {
        float x[KVT_TOKENS], lane[KVT_TILE_TOKENS];
        for (size_t t = 0; t < KVT_TOKENS; t++)
            x[t] = left_out >> t & 1 ? 0.0f
                                     : kvt_f16_to_f32(open[kvt_kw_index(t, d, dims_p)]) * scale[t];
        for (size_t j = 0; j < KVT_TILE_TOKENS; j++)
            lane[j] = ((x[j] + x[16 + j]) + x[32 + j]) + x[48 + j];
        for (size_t h = KVT_TILE_TOKENS / 2; h > 0; h /= 2)
            for (size_t j = 0; j < h; j++)
                lane[j] += lane[j + h];
        mean[d] = lane[0] / kept;
    }
}

static void mean_k_f16(const void *open, const uint16_t *open_scales, size_t dims_p, float *mean)
{
    const uint16_t *in = open;
    float scale[KVT_TOKENS], dist[KVT_TOKENS] = {0}, kept = 0;
    uint64_t left_out;

    load_scales(open_scales, scale);
    mean_of_kept(in, scale, dims_p, 0, KVT_TOKENS, mean);
    for (size_t d = 0; d < dims_p; d++)
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            float x = kvt_f16_to_f32(in[kvt_kw_index(t, d, dims_p)]) * scale[t];
            dist[t] += (x - mean[d]) * (x - mean[d]);
        }
    left_out = kvt_outliers(dist);
    if (left_out == 0)
        return;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        kept += left_out >> t & 1 ? 0.0f : 1.0f;
    mean_of_kept(in, scale, dims_p, left_out, kept, mean);
}

/*
 * Codes of a row whose scale is known, rounded so that the error along the row itself cancels: the
 * projection of the errors so far onto the row is taken out of the elements to come, each by its
 * share of the row's squared norm times 8 (a decay of the projection, as of a first-order
 * filter), but by no more than 0.49 of a step. docs/numerics.md, "Sealed rows", says why.
 */
static void shaped_codes(const float *w, uint16_t scale, size_t dims_p, int8_t *codes, size_t token)
{
    const float reciprocal = scale ? 1.0f / kvt_f16_to_f32(scale) : 0.0f;
    float norm = 0.0f, projection = 0.0f, gain;
    for (size_t d = 0; d < dims_p; d++) {
        float v = w[d] * reciprocal;
        norm = fmaf(v, v, norm);
    }
    norm *= 0.125f;
    gain = 1.0f / (norm > KVT_SHAPE_NORM ? norm : KVT_SHAPE_NORM);
    for (size_t d = 0; d < dims_p; d++) {
        float v = w[d] * reciprocal, part = projection * gain, rounded;
        part = part > KVT_SHAPE_MAX ? KVT_SHAPE_MAX : part;
        part = part < -KVT_SHAPE_MAX ? -KVT_SHAPE_MAX : part;
        rounded = fmaf(-v, part, v) + 12582912.0f;
        codes[kvt_k8_index(token, d, dims_p)] =
            (int8_t)(int32_t)(kvt_f32_bits(rounded) - 0x4b400000u);
        projection = fmaf((rounded - 12582912.0f) - v, v, projection);
    }
}

/* Of rows of x * unit. */
static uint16_t scale_of(const float *w, size_t n, float unit)
{
    uint32_t absmax = 0;
    for (size_t d = 0; d < n; d++) {
        uint32_t a = kvt_f32_bits(w[d]) & 0x7fffffffu;
        absmax = a > absmax ? a : absmax;
    }
    return kvt_f32_to_f16_round(kvt_bits_f32(absmax) * unit / 127.0f, 1);
}

/* Token by token as f32. That all scales fit is the caller's promise. */
static void seal_k_i8(const void *open, const uint16_t *open_scales, const float *delta,
                      size_t dims_p, const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *in = open;
    float scale[KVT_TOKENS], row[SEAL_DIMS];
    (void)next;
    load_scales(open_scales, scale);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        for (size_t d = 0; d < dims_p; d++) {
            row[d] = kvt_f16_to_f32(in[kvt_kw_index(t, d, dims_p)]) * scale[t];
            if (delta)
                row[d] += delta[d];
        }
        scales[t] = scale_of(row, dims_p, 1.0f);
        shaped_codes(row, scales[t], dims_p, codes, t);
    }
}

static void seal_v_i8(const void *open, const uint16_t *open_scales, size_t dims_p,
                      const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *in = open;
    float scale[KVT_TOKENS], row[SEAL_DIMS];
    (void)next;
    load_scales(open_scales, scale);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        float factor;
        for (size_t d = 0; d < dims_p; d++)
            row[d] = kvt_f16_to_f32(in[kvt_vw_index(t, d, dims_p)]);
        scales[t] = scale_of(row, dims_p, scale[t]);
        factor = scales[t] ? scale[t] * (1.0f / kvt_f16_to_f32(scales[t])) : 0.0f;
        codes_of(row, factor, dims_p, dims_p, codes, t, kvt_v8_index);
    }
}

/* ---- rows of the caller ---- */

static void center(const float *x, const float *mu, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] - mu[i];
}

/* ---- scores ---- */

/* One tile: total[t] = sum_d q[d] * K[t][d], the K element converted by the callers' macro. */
#define DOT_TILE(ELEMENT)                                                                          \
    for (size_t d0 = 0; d0 < dims_p; d0 += 16) {                                                   \
        float chunk[KVT_TILE_TOKENS] = {0};                                                        \
        for (size_t d = d0; d < d0 + 16; d++)                                                      \
            for (size_t t = 0; t < KVT_TILE_TOKENS; t++)                                           \
                chunk[t] += row[d] * (ELEMENT);                                                    \
        for (size_t t = 0; t < KVT_TILE_TOKENS; t++)                                               \
            total[t] += chunk[t];                                                                  \
    }

static void qk_f32(const float *q, size_t ldq, size_t rows, const void *codes,
                   const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                   float *s)
{
    (void)scales;
    (void)next;
    for (size_t t0 = 0; t0 < n_tokens; t0 += KVT_TILE_TOKENS) {
        const float *tile = (const float *)codes + t0 * dims_p;
        for (size_t r = 0; r < rows; r++) {
            const float *row = q + r * ldq;
            float total[KVT_TILE_TOKENS] = {0};
            DOT_TILE(tile[d * 16 + t])
            memcpy(s + r * KVT_TOKENS + t0, total, sizeof total);
        }
    }
}

static void qk_f16(const float *q, size_t ldq, size_t rows, const void *codes,
                   const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                   float *s)
{
    (void)scales;
    (void)next;
    for (size_t t0 = 0; t0 < n_tokens; t0 += KVT_TILE_TOKENS) {
        const uint16_t *tile = (const uint16_t *)codes + t0 * dims_p;
        for (size_t r = 0; r < rows; r++) {
            const float *row = q + r * ldq;
            float total[KVT_TILE_TOKENS] = {0};
            DOT_TILE(kvt_f16_to_f32(tile[d * 16 + t]))
            memcpy(s + r * KVT_TOKENS + t0, total, sizeof total);
        }
    }
}

static void qk_i8(const float *q, size_t ldq, size_t rows, const void *codes,
                  const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                  float *s)
{
    (void)next;
    for (size_t t0 = 0; t0 < n_tokens; t0 += KVT_TILE_TOKENS) {
        const int8_t *tile = (const int8_t *)codes + t0 * dims_p;
        for (size_t r = 0; r < rows; r++) {
            const float *row = q + r * ldq;
            float total[KVT_TILE_TOKENS] = {0};
            DOT_TILE((float)tile[d / 4 * 64 + t * 4 + d % 4])
            for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
                s[r * KVT_TOKENS + t0 + t] = total[t] * kvt_f16_to_f32(scales[t0 + t]);
        }
    }
}

/* ---- weighted sums ---- */

static void pv_f32(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                   size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                   size_t ldacc)
{
    const float *v = codes;
    (void)scales;
    (void)next;
    for (size_t r = 0; r < rows; r++)
        for (size_t d0 = 0; d0 < dims_p; d0 += 16) {
            float sum[16] = {0};
            for (size_t t = 0; t < n_tokens; t++)
                for (size_t d = 0; d < 16; d++)
                    sum[d] += p[r * KVT_TOKENS + t] * v[t * dims_p + d0 + d];
            for (size_t d = 0; d < 16; d++)
                acc[r * ldacc + d0 + d] = acc[r * ldacc + d0 + d] * alpha[r] + sum[d];
        }
}

static void pv_f16(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                   size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                   size_t ldacc)
{
    const uint16_t *v = codes;
    (void)scales;
    (void)next;
    for (size_t r = 0; r < rows; r++)
        for (size_t d0 = 0; d0 < dims_p; d0 += 16) {
            float sum[16] = {0};
            for (size_t t = 0; t < n_tokens; t++)
                for (size_t d = 0; d < 16; d++)
                    sum[d] += p[r * KVT_TOKENS + t] * kvt_f16_to_f32(v[t * dims_p + d0 + d]);
            for (size_t d = 0; d < 16; d++)
                acc[r * ldacc + d0 + d] = acc[r * ldacc + d0 + d] * alpha[r] + sum[d];
        }
}

static void pv_i8(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                  size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                  size_t ldacc)
{
    const int8_t *v = codes;
    (void)next;
    for (size_t r = 0; r < rows; r++) {
        float weight[KVT_TOKENS];
        for (size_t t = 0; t < n_tokens; t++)
            weight[t] = p[r * KVT_TOKENS + t] * kvt_f16_to_f32(scales[t]);
        for (size_t d0 = 0; d0 < dims_p; d0 += 16) {
            float sum[16] = {0};
            for (size_t t = 0; t < n_tokens; t++) {
                const int8_t *lane = v + t / 4 * dims_p * 4 + d0 * 4 + t % 4;
                for (size_t d = 0; d < 16; d++)
                    sum[d] += weight[t] * (float)lane[d * 4];
            }
            for (size_t d = 0; d < 16; d++)
                acc[r * ldacc + d0 + d] = acc[r * ldacc + d0 + d] * alpha[r] + sum[d];
        }
    }
}

static void dots_f16(const float *q, size_t ldq, size_t rows, const uint16_t *b, size_t n,
                     float *out)
{
    for (size_t r = 0; r < rows; r++) {
        float total = 0.0f;
        for (size_t i = 0; i < n; i += 8) {
            float chunk = 0.0f;
            for (size_t j = i; j < i + 8; j++)
                chunk += q[r * ldq + j] * kvt_f16_to_f32(b[j]);
            total += chunk;
        }
        out[r] = total;
    }
}

/* ---- i8 as integer dot products ---- */

/* The largest code of a packed q and of a weight: 15 bits, so that 1024 dims fit an int32. */
#define Q_MAX 16383
#define P_MAX 65535
/* Lower bound of a row's largest magnitude, so that its reciprocal is finite. */
#define Q_LEAST 0x1p-100f

/* To nearest, ties to even, for |x| < 2^22. */
static int32_t round_even(float x)
{
    return (int32_t)((x + 0x1.8p23f) - 0x1.8p23f);
}

/* A packed row: its scale, and from byte 64 on its codes as int16. */
static void pack_q_near(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    for (size_t r = 0; r < rows; r++) {
        unsigned char *row = (unsigned char *)packed + r * kvt_packed_row_bytes(dims_p);
        int16_t *codes = (int16_t *)(void *)(row + 64);
        float largest = Q_LEAST, scale, reciprocal;
        for (size_t d = 0; d < dims_p; d++)
            largest = fabsf(q[r * ldq + d]) > largest ? fabsf(q[r * ldq + d]) : largest;
        scale = largest / Q_MAX;
        reciprocal = Q_MAX / largest;
        for (size_t d = 0; d < dims_p; d++)
            codes[d] = (int16_t)round_even(q[r * ldq + d] * reciprocal);
        memcpy(row, &scale, sizeof scale);
    }
}

static void qk_i8_near(const void *packed, size_t first, size_t rows, const void *codes,
                       const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                       float *s)
{
    (void)next;
    for (size_t t0 = 0; t0 < n_tokens; t0 += KVT_TILE_TOKENS) {
        const int8_t *tile = (const int8_t *)codes + t0 * dims_p;
        for (size_t r = first; r < rows; r++) {
            const unsigned char *row =
                (const unsigned char *)packed + r * kvt_packed_row_bytes(dims_p);
            const int16_t *q = (const int16_t *)(const void *)(row + 64);
            int32_t total[KVT_TILE_TOKENS] = {0}; /* 1024 * 127 * 16383 < 2^31 */
            float scale;
            memcpy(&scale, row, sizeof scale);
            for (size_t d = 0; d < dims_p; d += 4)
                for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
                    for (size_t e = 0; e < 4; e++)
                        total[t] += q[d + e] * tile[d * 16 + t * 4 + e];
            for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
                s[r * KVT_TOKENS + t0 + t] =
                    (float)total[t] * (scale * kvt_f16_to_f32(scales[t0 + t]));
        }
    }
}

static void pv_i8_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    const int8_t *v = codes;
    (void)next;
    for (size_t r = 0; r < rows; r++) {
        float weight[KVT_TOKENS], largest = Q_LEAST, scale, reciprocal;
        int32_t w[KVT_TOKENS];
        for (size_t t = 0; t < n_tokens; t++) {
            weight[t] = p[r * KVT_TOKENS + t] * kvt_f16_to_f32(scales[t]);
            largest = weight[t] > largest ? weight[t] : largest;
        }
        scale = largest / P_MAX;
        reciprocal = P_MAX / largest;
        for (size_t t = 0; t < n_tokens; t++) /* a NaN (of logits beyond f32) becomes 0 */
            w[t] = weight[t] > 0.0f ? round_even(weight[t] * reciprocal) : 0;
        for (size_t d0 = 0; d0 < dims_p; d0 += 16) {
            int32_t sum[16] = {0}; /* 64 * 127 * 65535 < 2^30 */
            for (size_t t = 0; t < n_tokens; t++) {
                const int8_t *lane = v + t / 4 * dims_p * 4 + d0 * 4 + t % 4;
                for (size_t d = 0; d < 16; d++)
                    sum[d] += w[t] * lane[d * 4];
            }
            for (size_t d = 0; d < 16; d++)
                acc[r * ldacc + d0 + d] =
                    acc[r * ldacc + d0 + d] * alpha[r] + (float)sum[d] * scale;
        }
    }
}

/* int32 arithmetic costs the same with fewer bits, so fast is near. */

static void pack_q_fast(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    pack_q_near(q, ldq, rows, dims_p, packed);
}

static void qk_i8_fast(const void *packed, size_t first, size_t rows, const void *codes,
                       const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                       float *s)
{
    qk_i8_near(packed, first, rows, codes, scales, n_tokens, dims_p, next, s);
}

static void pv_i8_fast(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    pv_i8_near(p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

/* ---- V as the first dims of K ---- */

static void transpose_f32(const void *codes, size_t dims_p, size_t v_dims_p, void *out)
{
    const uint32_t *k = codes;
    uint32_t *v = out;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < v_dims_p; d++)
            v[kvt_vw_index(t, d, v_dims_p)] = k[kvt_kw_index(t, d, dims_p)];
}

static void transpose_f16(const void *codes, size_t dims_p, size_t v_dims_p, void *out)
{
    const uint16_t *k = codes;
    uint16_t *v = out;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < v_dims_p; d++)
            v[kvt_vw_index(t, d, v_dims_p)] = k[kvt_kw_index(t, d, dims_p)];
}

/* Both layouts keep 4 tokens by 4 dims in 16 consecutive bytes, each the other's transpose. */
static void transpose_i8(const void *codes, size_t dims_p, size_t v_dims_p, void *out)
{
    for (size_t t = 0; t < KVT_TOKENS; t += 4)
        for (size_t d = 0; d < v_dims_p; d += 4) {
            const uint8_t *k = (const uint8_t *)codes + kvt_k8_index(t, d, dims_p);
            uint8_t *v = (uint8_t *)out + kvt_v8_index(t, d, v_dims_p);
            for (size_t i = 0; i < 4; i++)
                for (size_t j = 0; j < 4; j++)
                    v[j * 4 + i] = k[i * 4 + j];
        }
}

static void add_scaled(float *acc, size_t ldacc, size_t rows, const float *coefficients,
                       const float *x, size_t n)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < n; i++)
            acc[r * ldacc + i] += coefficients[r] * x[i];
}

/* ---- softmax ---- */

static void logits(float *s, size_t n, float add, float scale, float softcap)
{
    for (size_t t = 0; t < n; t++)
        s[t] = (s[t] + add) * scale;
    if (softcap > 0.0f)
        for (size_t t = 0; t < n; t++)
            s[t] = softcap * Sleef_tanhf_u10(s[t] / softcap);
}

static void alibi(float *s, size_t n, const int32_t *positions, int32_t position, float slope)
{
    for (size_t t = 0; t < n; t++) {
        /* Positions are >= 0: the difference fits. */
        int32_t distance = position - positions[t];
        s[t] -= slope * (float)(distance < 0 ? -distance : distance);
    }
}

/* One row; returns its alpha. */
static float softmax_row(float *s, size_t n, float add, float scale, float *m, float *l)
{
    float maximum = *m, sum = 0.0f, alpha;
    for (size_t t = 0; t < n; t++) {
        s[t] = (s[t] + add) * scale;
        maximum = s[t] > maximum ? s[t] : maximum;
    }
    for (size_t t = n; t < KVT_TOKENS; t++)
        s[t] = 0.0f;
    if (maximum == -INFINITY) { /* all masked so far: -inf minus -inf would be NaN */
        for (size_t t = 0; t < n; t++)
            *l = isnan(s[t]) ? NAN : *l; /* not masked, but beyond f32 */
        memset(s, 0, n * sizeof *s);
        return 1.0f;
    }
    for (size_t t = 0; t < n; t++) {
        s[t] = Sleef_expf_u10(s[t] - maximum);
        sum += s[t];
    }
    alpha = Sleef_expf_u10(*m - maximum);
    *l = *l * alpha + sum;
    *m = maximum;
    return alpha;
}

static void softmax(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                    float *l, float *alpha)
{
    for (size_t r = 0; r < rows; r++)
        alpha[r] = softmax_row(s + r * KVT_TOKENS, n, add ? add[r] : 0.0f, scale, &m[r], &l[r]);
}

static void merge(float *acc, float *m, float *l, const float *acc2, float m2, float l2,
                  size_t dims_p)
{
    float maximum = *m > m2 ? *m : m2, a, b;
    if (m2 == -INFINITY) {
        *l += l2; /* 0, or a NaN: all visible logits are beyond f32 */
        return;
    }
    a = Sleef_expf_u10(*m - maximum);
    b = Sleef_expf_u10(m2 - maximum);
    for (size_t d = 0; d < dims_p; d++)
        acc[d] = acc[d] * a + acc2[d] * b;
    *l = *l * a + l2 * b;
    *m = maximum;
}

static float finish(float *acc, size_t dims_p, float m, float l, float sink)
{
    float maximum = m > sink ? m : sink, a, denominator;
    if (m == -INFINITY) { /* nothing visible */
        for (size_t d = 0; d < dims_p; d++)
            acc[d] = 0.0f;
        return sink;
    }
    a = Sleef_expf_u10(m - maximum);
    denominator = l * a + Sleef_expf_u10(sink - maximum); /* exp(-inf) is 0 */
    for (size_t d = 0; d < dims_p; d++)
        acc[d] = acc[d] * a / denominator;
    return maximum + Sleef_logf_u10(denominator);
}

const kvt_kernels kvt_kernels_scalar = {.isa = "scalar",
#define ENTRY(result, name, parameters) .name = name,
                                        KVT_KERNELS_WIDE(ENTRY)
#undef ENTRY
#define ENTRY(result, name, parameters) .name = kvt_scalar_##name,
                                            KVT_KERNELS_4BIT(ENTRY)
#undef ENTRY
};
