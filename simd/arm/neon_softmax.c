/*
 * NEON (armv8-a): logits, softmax, merge and the final division. The table that lists these kernels
 * is in neon.c. Softmax has an exp of its own (exp.h); else exp, tanh and log are SLEEF's.
 */
#include <math.h>
#include <sleef.h>

#include "simd/arm/neon.h"
#include "simd/exp.h"

static float dot_f16(const float *a, const uint16_t *b, size_t n)
{
    float32x4_t even = vdupq_n_f32(0.0f), odd = even;
    for (size_t i = 0; i < n; i += 8) {
        even = vfmaq_f32(even, vld1q_f32(a + i), kvt_load_f16x4(b + i));
        odd = vfmaq_f32(odd, vld1q_f32(a + i + 4), kvt_load_f16x4(b + i + 4));
    }
    return vaddvq_f32(vaddq_f32(even, odd));
}

void kvt_neon_dots_f16(const float *q, size_t ldq, size_t rows, const uint16_t *b, size_t n,
                       float *out)
{
    for (size_t r = 0; r < rows; r++)
        out[r] = dot_f16(q + r * ldq, b, n);
}

/* The tail's lanes are computed with whatever s holds there: up to 63 it may be written. */
void kvt_neon_logits(float *s, size_t n, float add, float scale, float softcap)
{
    const float32x4_t adds = vdupq_n_f32(add), cap = vdupq_n_f32(softcap);
    for (size_t t = 0; t < n; t += 4)
        vst1q_f32(s + t, vmulq_n_f32(vaddq_f32(vld1q_f32(s + t), adds), scale));
    for (size_t t = 0; softcap > 0.0f && t < n; t += 4) {
        float32x4_t x = Sleef_tanhf4_u10advsimd(vdivq_f32(vld1q_f32(s + t), cap));
        vst1q_f32(s + t, vmulq_f32(cap, x));
    }
}

/* Positions end at n: the last ones are not loaded as a vector. Positions are >= 0: the difference
 * fits. */
void kvt_neon_alibi(float *s, size_t n, const int32_t *positions, int32_t position, float slope)
{
    const int32x4_t here = vdupq_n_s32(position);
    const float32x4_t slopes = vdupq_n_f32(slope);
    size_t t = 0;
    for (; t + 4 <= n; t += 4) {
        float32x4_t distance = vcvtq_f32_s32(vabdq_s32(here, vld1q_s32(positions + t)));
        vst1q_f32(s + t, vfmsq_f32(vld1q_f32(s + t), slopes, distance));
    }
    for (; t < n; t++) {
        int32_t distance = position - positions[t];
        s[t] = fmaf(-slope, (float)(distance < 0 ? -distance : distance), s[t]);
    }
}

#define EACH(result)                                                                               \
    KVT_UNROLL                                                                                     \
    for (size_t i = 0; i < 4; i++)                                                                 \
    result

/*
 * exp of 4 vectors of x <= 0 (exp.h), step by step: they hide each other's latencies. fmla
 * overwrites the summand, so by Horner's rule each constant would first be copied: 12 instructions
 * a vector, and 10 in this order.
 */
KVT_INLINE void exponentials(float32x4_t *x)
{
    const float32x4_t magic = vdupq_n_f32(KVT_EXP_MAGIC);
    float32x4_t t[4], p[4], square[4];
    EACH(x[i] = vmaxq_f32(x[i], vdupq_n_f32(KVT_EXP_LEAST))); /* a NaN stays one */
    EACH(t[i] = vfmaq_f32(magic, x[i], vdupq_n_f32(KVT_EXP_LOG2E)));
    EACH(p[i] = vsubq_f32(t[i], magic));
    EACH(x[i] = vfmsq_f32(x[i], p[i], vdupq_n_f32(KVT_EXP_LN2)));
    EACH(square[i] = vmulq_f32(x[i], x[i]));
#define HORNER(c) EACH(p[i] = vfmaq_f32(vdupq_n_f32(c), p[i], x[i]))
    EACH(p[i] = vdupq_n_f32(KVT_EXP_C6));
    HORNER(KVT_EXP_C5);
    {
        float32x4_t low[4];
        EACH(low[i] = vfmaq_f32(vdupq_n_f32(KVT_EXP_C3), x[i], vdupq_n_f32(KVT_EXP_C4)));
        EACH(p[i] = vfmaq_f32(low[i], p[i], square[i]));
    }
    HORNER(KVT_EXP_C2);
#undef HORNER
    EACH(p[i] = vfmaq_f32(x[i], p[i], square[i]));
    EACH(p[i] = vaddq_f32(p[i], vdupq_n_f32(1.0f)));
    EACH(t[i] = vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(t[i]), 23)));
    EACH(x[i] = vmulq_f32(p[i], t[i]));
}

/* 1 to 4 floats. */
KVT_INLINE float32x4_t load_floats(const float *from, size_t n)
{
    float32x4_t x = vdupq_n_f32(0.0f);
    if (n == 4)
        return vld1q_f32(from);
    x = vld1q_lane_f32(from, x, 0);
    if (n > 1)
        x = vld1q_lane_f32(from + 1, x, 1);
    if (n > 2)
        x = vld1q_lane_f32(from + 2, x, 2);
    return x;
}

KVT_INLINE void store_floats(float *to, size_t n, float32x4_t x)
{
    if (n == 4) {
        vst1q_f32(to, x);
        return;
    }
    vst1q_lane_f32(to, x, 0);
    if (n > 1)
        vst1q_lane_f32(to + 1, x, 1);
    if (n > 2)
        vst1q_lane_f32(to + 2, x, 2);
}

/* Makes a row's scores from n < 64 on -inf: neutral for the maximum, and exp gives zero. */
static void __attribute__((noinline)) mask_dead(float *row, size_t n)
{
    const float32x4_t lowest = vdupq_n_f32(-INFINITY);
    size_t t = n / 4 * 4;
    vst1q_f32(row + t, vbslq_f32(kvt_lanes_below(t, n), vld1q_f32(row + t), lowest));
    while ((t += 4) < KVT_TOKENS)
        vst1q_f32(row + t, lowest);
}

/*
 * Maxima of the raw scores in 4 lanes: add and scale (> 0) are monotonic, also after rounding.
 * fmaxnm leaves out NaNs (of logits beyond f32).
 */
KVT_INLINE float32x4_t maxima_of(const float *row)
{
    float32x4_t x[4];
    EACH(x[i] = vld1q_f32(row + 4 * i));
    for (size_t t = 16; t < KVT_TOKENS; t += 16)
        EACH(x[i] = vmaxnmq_f32(x[i], vld1q_f32(row + t + 4 * i)));
    return vmaxnmq_f32(vmaxnmq_f32(x[0], x[1]), vmaxnmq_f32(x[2], x[3]));
}

/* A row's s = exp((s + add) * scale - shift); returns the sums of its vectors. */
KVT_INLINE float32x4_t weights_of(float *row, float add, float scale, float shift)
{
    const float32x4_t adds = vdupq_n_f32(add), shifts = vdupq_n_f32(shift);
    float32x4_t sums = vdupq_n_f32(0.0f);
    for (size_t t = 0; t < KVT_TOKENS; t += 16) {
        float32x4_t p[4];
        EACH(p[i] = vmulq_n_f32(vaddq_f32(vld1q_f32(row + t + 4 * i), adds), scale));
        EACH(p[i] = vsubq_f32(p[i], shifts));
        exponentials(p);
        EACH(vst1q_f32(row + t + 4 * i, p[i]));
        sums = vaddq_f32(sums, vaddq_f32(vaddq_f32(p[0], p[1]), vaddq_f32(p[2], p[3])));
    }
    return sums;
}
#undef EACH

/* 1 to 4 rows, a lane of m, l and alpha each: they share all but their exponentials. */
static void softmax_rows(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                         float *l, float *alpha)
{
    const float32x4_t lowest = vdupq_n_f32(-INFINITY), old = load_floats(m, rows);
    const float32x4_t adds = add ? load_floats(add, rows) : vdupq_n_f32(0.0f);
    float added[4], shift[4];
    float32x4_t x[4], factors[4], maxima, factor, sums;
    uint32x4_t masked;

    for (size_t r = 0; n < KVT_TOKENS && r < rows; r++)
        mask_dead(s + r * KVT_TOKENS, n);
    for (size_t r = 0; r < 4; r++) /* lanes of rows beyond `rows` are never stored */
        x[r] = r < rows ? maxima_of(s + r * KVT_TOKENS) : vdupq_n_f32(0.0f);
    maxima = vpmaxnmq_f32(vpmaxnmq_f32(x[0], x[1]), vpmaxnmq_f32(x[2], x[3]));
    maxima = vmaxnmq_f32(vmulq_n_f32(vaddq_f32(maxima, adds), scale), old);
    store_floats(m, rows, maxima);
    /* All masked so far: -inf - -inf would be NaN; with a shift of 0 every exp(-inf) is 0. */
    masked = vceqq_f32(maxima, lowest);
    maxima = vbslq_f32(masked, vdupq_n_f32(0.0f), maxima);
    vst1q_f32(shift, maxima);
    vst1q_f32(added, adds);

    for (size_t r = 0; r < rows; r++)
        x[r] = weights_of(s + r * KVT_TOKENS, added[r], scale, shift[r]);

    factors[0] = vsubq_f32(old, maxima);
    factors[1] = factors[2] = factors[3] = factors[0];
    exponentials(factors);
    factor = vbslq_f32(masked, vdupq_n_f32(1.0f), factors[0]);
    store_floats(alpha, rows, factor);
    sums = vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
    store_floats(l, rows, vaddq_f32(vmulq_f32(load_floats(l, rows), factor), sums));
}

void kvt_neon_softmax(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                      float *l, float *alpha)
{
    for (size_t r = 0; r < rows; r += 4)
        softmax_rows(s + r * KVT_TOKENS, rows - r < 4 ? rows - r : 4, n, add ? add + r : NULL,
                     scale, m + r, l + r, alpha + r);
}

void kvt_neon_merge(float *acc, float *m, float *l, const float *acc2, float m2, float l2,
                    size_t dims_p)
{
    float maximum = *m > m2 ? *m : m2, a, b;
    if (m2 == -INFINITY) {
        *l += l2; /* 0, or a NaN: all visible logits are beyond f32 */
        return;
    }
    a = Sleef_expf_u10(*m - maximum);
    b = Sleef_expf_u10(m2 - maximum);
    for (size_t d = 0; d < dims_p; d += 4)
        vst1q_f32(acc + d, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(acc2 + d), b), vld1q_f32(acc + d), a));
    *l = *l * a + l2 * b;
    *m = maximum;
}

float kvt_neon_finish(float *acc, size_t dims_p, float m, float l, float sink)
{
    float maximum = m > sink ? m : sink, a, denominator, factor;
    if (m == -INFINITY) { /* nothing visible */
        memset(acc, 0, dims_p * sizeof *acc);
        return sink;
    }
    a = Sleef_expf_u10(m - maximum);
    denominator = l * a + Sleef_expf_u10(sink - maximum); /* exp(-inf) is 0 */
    /* At most 1 / l, and l is at least 1: its largest term is exp(0). */
    factor = a / denominator;
    for (size_t d = 0; d < dims_p; d += 4)
        vst1q_f32(acc + d, vmulq_n_f32(vld1q_f32(acc + d), factor));
    return maximum + Sleef_logf_u10(denominator);
}
