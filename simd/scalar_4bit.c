/*
 * Scalar kernels of 4-bit K and of 4- and 5-bit V: the reference, in the order that
 * docs/numerics.md specifies.
 *
 * 4-bit K has a scale and a middle for each dim of a block, a gain for each token, codes of 0 to
 * 15: k = gain * (middle + scale * (code - 7.5)). For a product the scale goes into q, whose
 * product with the middles is added once a block as with an i8 block's offset, and the gain
 * multiplies the score (src/attention/unit.c), so that a code is multiplied as it is. Counting
 * codes from 7.5, not from 0, is what makes one digit of q enough: an error of q is multiplied by
 * the spread of the codes, not by their size.
 */
#include <math.h>

#include "simd/dither.h"
#include "simd/levels.h"
#include "simd/scalar_4bit.h"

#define LEAST 0x1p-100f /* lower bound of a row's largest magnitude, for its reciprocal */
#define Q_MAX 127
#define P_MAX 255

/* To nearest, ties to even, for |x| < 2^22. */
static int32_t round_even(float x)
{
    return (int32_t)((x + 0x1.8p23f) - 0x1.8p23f);
}

static float reciprocal_of(uint16_t scale, float numerator)
{
    return scale ? numerator / kvt_f16_to_f32(scale) : 0.0f;
}

static float largest_of(const float *x, size_t n)
{
    uint32_t largest = 0; /* as bits: NaNs above infinity */
    for (size_t d = 0; d < n; d++) {
        uint32_t a = kvt_f32_bits(x[d]) & 0x7fffffffu;
        largest = a > largest ? a : largest;
    }
    return kvt_bits_f32(largest);
}

/* ---- codes ---- */

static const int8_t levels[16] = {KVT_V4_LEVELS};

static unsigned k4_code(const void *codes, size_t token, size_t dim, size_t dims_p)
{
    const uint8_t *in = codes;
    return (unsigned)in[kvt_k4_index(token, dim, dims_p)] >> kvt_k4_shift(dim) & 15u;
}

static unsigned v4_code(const void *codes, size_t token, size_t dim, size_t dims_p)
{
    const uint8_t *in = codes;
    return (unsigned)in[kvt_v4_index(token, dim, dims_p)] >> kvt_v4_shift(token) & 15u;
}

static unsigned v5_code(const void *codes, size_t token, size_t dim, size_t dims_p)
{
    const uint8_t *in = codes;
    unsigned fifth =
        (unsigned)in[kvt_v5_index(token, dim, dims_p)] >> kvt_v5_shift(token, dim) & 1u;
    return v4_code(codes, token, dim, dims_p) | fifth << 4;
}

/* As a multiple of the token's scale. */
static int32_t v4_value(const void *codes, size_t token, size_t dim, size_t dims_p)
{
    return levels[v4_code(codes, token, dim, dims_p)];
}

static int32_t v5_value(const void *codes, size_t token, size_t dim, size_t dims_p)
{
    return 2 * (int32_t)v5_code(codes, token, dim, dims_p) - 31;
}

/* ---- rows of V ---- */

static const uint8_t bounds[KVT_V4_CANDIDATES][KVT_V4_BOUNDS] = {
    {KVT_V4_BOUNDS_0}, {KVT_V4_BOUNDS_1}, {KVT_V4_BOUNDS_2}};

static unsigned magnitude_index(int32_t u, const uint8_t *bound)
{
    unsigned m = 0;
    for (size_t i = 0; i < KVT_V4_BOUNDS; i++)
        m += u > bound[i];
    return m;
}

/*
 * The scale of a row: of three that are proportional to its largest magnitude the one whose levels,
 * multiplied by the factor that then fits best, leave the least error. That factor is x.l / l.l,
 * and what it takes away of x.x is (x.l)^2 / l.l. Both sums are of integers.
 */
static float v4_scale(const float *x, size_t dims, float largest)
{
    const float units = KVT_V4_UNITS / largest;
    float most = -1.0f, step = 0.0f;
    for (size_t k = 0; k < KVT_V4_CANDIDATES; k++) {
        int32_t product = 0, square = 0;
        float gain;
        for (size_t d = 0; d < dims; d++) {
            int32_t u = round_even(fabsf(x[d]) * units);
            int32_t level = levels[8 + magnitude_index(u, bounds[k])];
            product += u * level; /* 1024 * 126 * 63 < 2^23 */
            square += level * level;
        }
        gain = (float)product * (float)product / (float)square;
        if (gain > most) {
            most = gain;
            step = (float)product / (float)square;
        }
    }
    return step * largest / KVT_V4_UNITS;
}

/* One token; 0: its scale does not fit f16. dims: those that count, a multiple of 8. */
static int put_row_v_i4(const float *x, size_t dims, size_t dims_p, void *codes, uint16_t *scales,
                        size_t token)
{
    const float largest = largest_of(x, dims);
    uint16_t scale = 0;
    float reciprocal;
    if (!(largest < INFINITY))
        return 0;
    if (largest >= KVT_V4_LEAST) {
        scale = kvt_f32_to_f16(v4_scale(x, dims, largest));
        scale = scale ? scale : 1;
    }
    if (scale >= 0x7c00u)
        return 0;
    reciprocal = reciprocal_of(scale, 2.0f);
    for (size_t d = 0; d < dims; d++) {
        float half_levels = fabsf(x[d]) * reciprocal;
        int32_t u = half_levels < 127.0f ? round_even(half_levels) : 127;
        unsigned m = magnitude_index(u, bounds[0]);
        unsigned code = kvt_f32_bits(x[d]) >> 31 ? 7 - m : 8 + m;
        kvt_put_bits((uint8_t *)codes + kvt_v4_index(token, d, dims_p), kvt_v4_shift(token), 15u,
                     code);
    }
    scales[token] = scale;
    return 1;
}

/*
 * 32 levels, the odd numbers from -31 to 31, of a row of x * unit; scale = absmax / 31 rounded up,
 * as i8's is.
 */
static int put_row_v_i5(const float *x, float unit, size_t dims, size_t dims_p, void *codes,
                        uint16_t *scales, size_t token)
{
    const uint16_t scale = kvt_f32_to_f16_round(largest_of(x, dims) * unit / 31.0f, 1);
    const float factor = unit * reciprocal_of(scale, 0.5f);
    if ((scale & 0x7c00u) == 0x7c00u)
        return 0;
    for (size_t d = 0; d < dims; d++) {
        unsigned code = (unsigned)round_even(x[d] * factor + 15.5f);
        kvt_put_bits((uint8_t *)codes + kvt_v4_index(token, d, dims_p), kvt_v4_shift(token), 15u,
                     code & 15u);
        kvt_put_bits((uint8_t *)codes + kvt_v5_index(token, d, dims_p), kvt_v5_shift(token, d), 1u,
                     code >> 4);
    }
    scales[token] = scale;
    return 1;
}

int kvt_scalar_put_v_i4(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                        void *codes, uint16_t *scales, size_t slot)
{
    int good = 1;
    for (size_t i = 0; i < n; i++)
        good &= put_row_v_i4(x + i * ldx, dims, dims_p, codes, scales, slot + i);
    return good;
}

int kvt_scalar_put_v_i5(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                        void *codes, uint16_t *scales, size_t slot)
{
    int good = 1;
    for (size_t i = 0; i < n; i++)
        good &= put_row_v_i5(x + i * ldx, 1.0f, dims, dims_p, codes, scales, slot + i);
    return good;
}

/* Token t of an open block as f32, times scale. */
static void load_open_v(const uint16_t *open, float scale, size_t t, size_t dims_p, float *x)
{
    for (size_t d = 0; d < dims_p; d++)
        x[d] = kvt_f16_to_f32(open[kvt_vw_index(t, d, dims_p)]) * scale;
}

void kvt_scalar_seal_v_i4(const void *open, const uint16_t *open_scales, size_t dims_p,
                          const void *next, void *codes, uint16_t *scales)
{
    float x[KVT_DIMS_MAX];
    (void)next;
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        load_open_v(open, kvt_f16_to_f32(open_scales[t]), t, dims_p, x);
        (void)put_row_v_i4(x, dims_p, dims_p, codes, scales, t);
    }
}

void kvt_scalar_seal_v_i5(const void *open, const uint16_t *open_scales, size_t dims_p,
                          const void *next, void *codes, uint16_t *scales)
{
    float x[KVT_DIMS_MAX];
    (void)next;
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        load_open_v(open, 1.0f, t, dims_p, x);
        (void)put_row_v_i5(x, kvt_f16_to_f32(open_scales[t]), dims_p, dims_p, codes, scales, t);
    }
}

void kvt_scalar_get_v_i4(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                         size_t dims_p, float *x)
{
    const float scale = kvt_f16_to_f32(scales[slot]);
    for (size_t d = 0; d < dims; d++)
        x[d] = (float)v4_value(codes, slot, d, dims_p) * scale;
}

void kvt_scalar_get_v_i5(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                         size_t dims_p, float *x)
{
    const float scale = kvt_f16_to_f32(scales[slot]);
    for (size_t d = 0; d < dims; d++)
        x[d] = (float)v5_value(codes, slot, d, dims_p) * scale;
}

/* ---- a block of K ---- */

void kvt_scalar_range_k_f16(const void *open, const uint16_t *open_scales, uint64_t left_out,
                            size_t dims_p, float *lo, float *hi)
{
    const uint16_t *in = open;
    for (size_t d = 0; d < dims_p; d++) {
        lo[d] = INFINITY;
        hi[d] = -INFINITY;
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            float x =
                kvt_f16_to_f32(in[kvt_kw_index(t, d, dims_p)]) * kvt_f16_to_f32(open_scales[t]);
            if (left_out >> t & 1)
                continue;
            lo[d] = x < lo[d] ? x : lo[d];
            hi[d] = x > hi[d] ? x : hi[d];
        }
    }
}

/*
 * What rounding leaves along the key itself is what a query that gives the token much weight sees
 * of it. The gain takes it away.
 */
void kvt_scalar_seal_k_i4(const void *open, const uint16_t *open_scales, const float *delta,
                          const float *along, const uint16_t *scales, size_t dims_p,
                          const void *next, void *codes, uint8_t *gains)
{
    const uint16_t *in = open;
    float scale[KVT_DIMS_MAX], reciprocal[KVT_DIMS_MAX];
    (void)next;
    for (size_t d = 0; d < dims_p; d++) {
        scale[d] = kvt_f16_to_f32(scales[d]);
        reciprocal[d] = reciprocal_of(scales[d], 1.0f);
    }
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        const float row_scale = kvt_f16_to_f32(open_scales[t]);
        float square = 0.0f, product = 0.0f, gain = 0.0f;
        for (size_t d = 0; d < dims_p; d++) {
            float w = kvt_f16_to_f32(in[kvt_kw_index(t, d, dims_p)]) * row_scale + delta[d];
            float v = w * reciprocal[d], key = w + along[d], code;
            v = v > 7.5f ? 7.5f : v;
            v = v < -7.5f ? -7.5f : v;
            code = (float)round_even(v + 7.5f);
            kvt_put_bits((uint8_t *)codes + kvt_k4_index(t, d, dims_p), kvt_k4_shift(d), 15u,
                         (unsigned)code);
            square = fmaf(key, key, square);
            product = fmaf((code - 7.5f) * scale[d] + along[d], key, product);
        }
        if (product > 0.0f)
            gain = (square / product - 1.0f) * (1.0f / KVT_K4_GAIN_STEP);
        gain += KVT_K4_GAIN_ONE;
        gain = gain > 255.0f ? 255.0f : gain;
        gains[t] = (uint8_t)round_even(gain < 1.0f ? 1.0f : gain);
    }
}

void kvt_scalar_get_k_i4(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                         size_t dims_p, float *x)
{
    for (size_t d = 0; d < dims; d++)
        x[d] = ((float)k4_code(codes, slot, d, dims_p) - 7.5f) * kvt_f16_to_f32(scales[d]);
}

/* ---- scores ---- */

/* A tile of codes as bytes, [dim][16 tokens]: what loops over tokens vectorize on. */
static void unpack_k4(const void *codes, size_t tile, size_t dims_p, int8_t *out)
{
    const uint8_t *in = (const uint8_t *)codes + tile * dims_p * 8;
    for (size_t d = 0; d < dims_p; d++)
        for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
            out[d * KVT_TILE_TOKENS + t] =
                (int8_t)(in[d / 8 * 64 + t * 4 + d % 4] >> kvt_k4_shift(d) & 15);
}

void kvt_scalar_qk_i4(const float *q, size_t ldq, size_t rows, const void *codes,
                      const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                      float *s)
{
    float scale[KVT_DIMS_MAX];
    int8_t tile[KVT_DIMS_MAX * KVT_TILE_TOKENS];
    (void)next;
    for (size_t d = 0; d < dims_p; d++)
        scale[d] = kvt_f16_to_f32(scales[d]);
    for (size_t t0 = 0; t0 < n_tokens; t0 += KVT_TILE_TOKENS) {
        unpack_k4(codes, t0 / KVT_TILE_TOKENS, dims_p, tile);
        for (size_t r = 0; r < rows; r++) {
            float total[KVT_TILE_TOKENS] = {0};
            for (size_t d0 = 0; d0 < dims_p; d0 += 16) {
                float chunk[KVT_TILE_TOKENS] = {0};
                for (size_t d = d0; d < d0 + 16; d++)
                    for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
                        chunk[t] += q[r * ldq + d] * scale[d] * ((float)tile[d * 16 + t] - 7.5f);
                for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
                    total[t] += chunk[t];
            }
            memcpy(s + r * KVT_TOKENS + t0, total, sizeof total);
        }
    }
}

void kvt_scalar_qk_i4_near(const float *q, size_t ldq, size_t rows, const void *codes,
                           const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                           float *s)
{
    float scale[KVT_DIMS_MAX], folded[KVT_DIMS_MAX], step[KVT_ROWS_MAX];
    int8_t tile[KVT_DIMS_MAX * KVT_TILE_TOKENS], digits[KVT_ROWS_MAX][KVT_DIMS_MAX];
    int32_t sums[KVT_ROWS_MAX];
    (void)next;
    for (size_t d = 0; d < dims_p; d++)
        scale[d] = kvt_f16_to_f32(scales[d]);
    for (size_t r = 0; r < rows; r++) {
        float largest, reciprocal;
        for (size_t d = 0; d < dims_p; d++)
            folded[d] = q[r * ldq + d] * scale[d];
        largest = largest_of(folded, dims_p);
        largest = largest > LEAST ? largest : LEAST;
        reciprocal = Q_MAX / largest;
        sums[r] = 0;
        for (size_t d = 0; d < dims_p; d++) { /* infinity * 0 is a NaN, which is no integer */
            digits[r][d] = reciprocal > 0.0f ? (int8_t)round_even(folded[d] * reciprocal) : 0;
            sums[r] += digits[r][d];
        }
        step[r] = reciprocal > 0.0f ? largest / (2 * Q_MAX) : NAN;
    }
    for (size_t t0 = 0; t0 < n_tokens; t0 += KVT_TILE_TOKENS) {
        unpack_k4(codes, t0 / KVT_TILE_TOKENS, dims_p, tile);
        for (size_t r = 0; r < rows; r++) {
            int32_t total[KVT_TILE_TOKENS] = {0}; /* 1024 * 127 * 15 < 2^21 */
            for (size_t d = 0; d < dims_p; d++)
                for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
                    total[t] += digits[r][d] * tile[d * 16 + t];
            for (size_t t = 0; t < KVT_TILE_TOKENS; t++)
                s[r * KVT_TOKENS + t0 + t] = (float)(2 * total[t] - 15 * sums[r]) * step[r];
        }
    }
}

void kvt_scalar_gain_k(float *s, size_t rows, const uint8_t *gains, const float *add)
{
    float gain[KVT_TOKENS];
    for (size_t t = 0; t < KVT_TOKENS; t++)
        gain[t] = kvt_k4_gain(gains[t]);
    for (size_t r = 0; r < rows; r++)
        for (size_t t = 0; t < KVT_TOKENS; t++)
            s[r * KVT_TOKENS + t] = (s[r * KVT_TOKENS + t] + add[r]) * gain[t];
}

/* ---- weighted sums ---- */

typedef int32_t value_function(const void *codes, size_t token, size_t dim, size_t dims_p);

static inline void pv_f32(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                          size_t n_tokens, size_t dims_p, const float *alpha, float *acc,
                          size_t ldacc, value_function *value)
{
    for (size_t r = 0; r < rows; r++) {
        float weight[KVT_TOKENS];
        for (size_t t = 0; t < n_tokens; t++)
            weight[t] = p[r * KVT_TOKENS + t] * kvt_f16_to_f32(scales[t]);
        for (size_t d = 0; d < dims_p; d++) {
            float sum = 0.0f;
            for (size_t t = 0; t < n_tokens; t++)
                sum += weight[t] * (float)value(codes, t, d, dims_p);
            acc[r * ldacc + d] = acc[r * ldacc + d] * alpha[r] + sum;
        }
    }
}

static inline void pv_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                           size_t n_tokens, size_t dims_p, const float *alpha, float *acc,
                           size_t ldacc, value_function *value)
{
    for (size_t r = 0; r < rows; r++) {
        float weight[KVT_TOKENS], largest = LEAST, scale, reciprocal;
        int32_t w[KVT_TOKENS];
        for (size_t t = 0; t < n_tokens; t++) {
            weight[t] = p[r * KVT_TOKENS + t] * kvt_f16_to_f32(scales[t]);
            largest = weight[t] > largest ? weight[t] : largest;
        }
        scale = largest / P_MAX;
        reciprocal = P_MAX / largest;
        for (size_t t = 0; t < n_tokens; t++) /* a NaN (of logits beyond f32) becomes 0 */
            w[t] = weight[t] > 0.0f ? round_even(weight[t] * reciprocal + kvt_dither[t]) : 0;
        for (size_t d = 0; d < dims_p; d++) {
            int32_t sum = 0; /* 64 * 255 * 63 < 2^20 */
            for (size_t t = 0; t < n_tokens; t++)
                sum += w[t] * value(codes, t, d, dims_p);
            acc[r * ldacc + d] = acc[r * ldacc + d] * alpha[r] + (float)sum * scale;
        }
    }
}

#define PV(name, sums, value)                                                                      \
    void kvt_scalar_##name(const float *p, size_t rows, const void *codes, const uint16_t *scales, \
                           size_t n_tokens, size_t dims_p, const float *alpha, const void *next,   \
                           float *acc, size_t ldacc)                                               \
    {                                                                                              \
        (void)next;                                                                                \
        sums(p, rows, codes, scales, n_tokens, dims_p, alpha, acc, ldacc, value);                  \
    }
PV(pv_i4, pv_f32, v4_value)
PV(pv_i4_near, pv_near, v4_value)
PV(pv_i5, pv_f32, v5_value)
PV(pv_i5_near, pv_near, v5_value)
