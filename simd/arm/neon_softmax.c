/*
 * NEON (armv8-a): logits, softmax, merge and the final division. The table that lists these kernels
 * is in neon.c. exp, tanh and log are SLEEF's.
 */
#include <math.h>
#include <sleef.h>

#include "simd/arm/neon.h"

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

static float softmax_row(float *s, size_t n, float add, float scale, float *m, float *l)
{
    const float32x4_t lowest = vdupq_n_f32(-INFINITY), adds = vdupq_n_f32(add);
    float32x4_t maxima = vdupq_n_f32(*m), sum = vdupq_n_f32(0.0f);
    float maximum, alpha;

    for (size_t t = 0; t < n; t += 4) {
        float32x4_t x = vmulq_n_f32(vaddq_f32(vld1q_f32(s + t), adds), scale);
        /* Lanes beyond n become -inf: neutral for the maximum, and exp gives zero. */
        if (n - t < 4)
            x = vbslq_f32(kvt_lanes_below(t, n), x, lowest);
        maxima = vmaxnmq_f32(maxima, x);
        vst1q_f32(s + t, x);
    }
    maximum = vmaxnmvq_f32(maxima);
    if (maximum == -INFINITY) { /* all masked so far: -inf - -inf would be NaN */
        memset(s, 0, KVT_TOKENS * sizeof *s);
        return 1.0f;
    }
    maxima = vdupq_n_f32(maximum);
    for (size_t t = 0; t < n; t += 4) {
        float32x4_t p = Sleef_expf4_u10advsimd(vsubq_f32(vld1q_f32(s + t), maxima));
        sum = vaddq_f32(sum, p);
        vst1q_f32(s + t, p);
    }
    for (size_t t = kvt_round_up(n, 4); t < KVT_TOKENS; t += 4)
        vst1q_f32(s + t, vdupq_n_f32(0.0f));
    /* Most blocks do not raise the maximum; then the factor is exp(0) = 1 without a call. */
    alpha = *m == maximum ? 1.0f : Sleef_expf_u10(*m - maximum);
    *l = *l * alpha + vaddvq_f32(sum);
    *m = maximum;
    return alpha;
}

void kvt_neon_softmax(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                      float *l, float *alpha)
{
    for (size_t r = 0; r < rows; r++)
        alpha[r] = softmax_row(s + r * KVT_TOKENS, n, add ? add[r] : 0.0f, scale, &m[r], &l[r]);
}

void kvt_neon_merge(float *acc, float *m, float *l, const float *acc2, float m2, float l2,
                    size_t dims_p)
{
    float maximum = *m > m2 ? *m : m2, a, b;
    if (m2 == -INFINITY)
        return;
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
