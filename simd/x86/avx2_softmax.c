/*
 * AVX2 + FMA + F16C: logits, softmax, merge and the final division. The table that lists these
 * kernels is in avx2.c. Softmax has an exp of its own (exp.h); else exp, tanh and log are SLEEF's.
 */
#include <math.h>
#include <sleef.h>

#include "simd/exp.h"
#include "avx2_product.h"

/* b is converted once for up to 4 rows; a row's two accumulators do not depend on their number. */
KVT_INLINE void dots_of(size_t rows, const float *q, size_t ldq, const uint16_t *b, size_t n,
                        float *out)
{
    __m256 even[4], odd[4];
    size_t i = 0;
#define EACH_DOT(X) X(0) X(1) X(2) X(3)
#define ZERO(r) even[r] = odd[r] = _mm256_setzero_ps();
    EACH_DOT(ZERO)
#undef ZERO
#define DOT(sum, r, at)                                                                            \
    if ((r) < rows)                                                                                \
        sum[r] = _mm256_fmadd_ps(_mm256_loadu_ps(q + (r)*ldq + (at)), x, sum[r]);
    for (; i + 16 <= n; i += 16) {
        __m256 x = _mm256_cvtph_ps(kvt_load_128(b + i));
#define EVEN(r) DOT(even, r, i)
        EACH_DOT(EVEN)
        x = _mm256_cvtph_ps(kvt_load_128(b + i + 8));
#define ODD(r) DOT(odd, r, i + 8)
        EACH_DOT(ODD)
    }
    if (i < n) {
        __m256 x = _mm256_cvtph_ps(kvt_load_128(b + i));
        EACH_DOT(EVEN)
    }
#undef EVEN
#undef ODD
#undef DOT
#define STORE(r)                                                                                   \
    if ((r) < rows)                                                                                \
        out[r] = kvt_sum_lanes(_mm256_add_ps(even[r], odd[r]));
    EACH_DOT(STORE)
#undef STORE
#undef EACH_DOT
}

void kvt_avx2_dots_f16(const float *q, size_t ldq, size_t rows, const uint16_t *b, size_t n,
                       float *out)
{
    size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        dots_of(4, q + r * ldq, ldq, b, n, out + r);
    for (; r < rows; r++)
        dots_of(1, q + r * ldq, ldq, b, n, out + r);
}

/* The tail's lanes are computed with whatever s holds there: up to 63 it may be written. */
void kvt_avx2_logits(float *s, size_t n, float add, float scale, float softcap)
{
    const __m256 adds = _mm256_set1_ps(add), scales = _mm256_set1_ps(scale);
    const __m256 cap = _mm256_set1_ps(softcap);
    for (size_t t = 0; t < n; t += 8) {
        __m256 x = _mm256_mul_ps(_mm256_add_ps(_mm256_loadu_ps(s + t), adds), scales);
        if (softcap > 0.0f)
            x = _mm256_mul_ps(cap, Sleef_tanhf8_u10avx2(_mm256_div_ps(x, cap)));
        _mm256_storeu_ps(s + t, x);
    }
}

/* Positions end at n, so the tail's are loaded under a mask. */
void kvt_avx2_alibi(float *s, size_t n, const int32_t *positions, int32_t position, float slope)
{
    const __m256i here = _mm256_set1_epi32(position);
    const __m256 slopes = _mm256_set1_ps(slope);
    for (size_t t = 0; t < n; t += 8) {
        __m256i alive = _mm256_castps_si256(kvt_lanes_below(t, n));
        __m256i there = _mm256_maskload_epi32(positions + t, alive);
        /* Positions are >= 0: the difference fits. */
        __m256 distance = _mm256_cvtepi32_ps(_mm256_abs_epi32(_mm256_sub_epi32(here, there)));
        _mm256_storeu_ps(s + t, _mm256_fnmadd_ps(slopes, distance, _mm256_loadu_ps(s + t)));
    }
}

/* ---- softmax ---- */

#define EACH(result)                                                                               \
    KVT_UNROLL                                                                                     \
    for (size_t i = 0; i < 4; i++)                                                                 \
    result

/* exp of 4 vectors of x <= 0 (exp.h), step by step: they hide each other's latencies. */
KVT_INLINE void exponentials(__m256 *x)
{
    const __m256 magic = _mm256_set1_ps(KVT_EXP_MAGIC);
    __m256 t[4], p[4];
    /* vmaxps returns its second operand where that is a NaN. */
    EACH(x[i] = _mm256_max_ps(_mm256_set1_ps(KVT_EXP_LEAST), x[i]));
    EACH(t[i] = _mm256_fmadd_ps(x[i], _mm256_set1_ps(KVT_EXP_LOG2E), magic));
    EACH(p[i] = _mm256_sub_ps(t[i], magic));
    EACH(x[i] = _mm256_fnmadd_ps(p[i], _mm256_set1_ps(KVT_EXP_LN2), x[i]));
    EACH(p[i] = _mm256_set1_ps(KVT_EXP_C6));
#define HORNER(c) EACH(p[i] = _mm256_fmadd_ps(p[i], x[i], _mm256_set1_ps(c)))
    HORNER(KVT_EXP_C5);
    HORNER(KVT_EXP_C4);
    HORNER(KVT_EXP_C3);
    HORNER(KVT_EXP_C2);
    HORNER(1.0f);
    HORNER(1.0f);
#undef HORNER
    EACH(t[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t[i]), 23)));
    EACH(x[i] = _mm256_mul_ps(p[i], t[i]));
}

/*
 * Reduce 4 vectors to one, lane i from vector i: 11 instructions, where 4 single reductions take
 * 24. A row is reduced in the same order whatever the other rows are.
 */
#define FOLD_4(name, fold)                                                                         \
    KVT_INLINE __m128 name(const __m256 *x)                                                        \
    {                                                                                              \
        __m256d a = _mm256_castps_pd(                                                              \
            _mm256_##fold(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1])));        \
        __m256d b = _mm256_castps_pd(                                                              \
            _mm256_##fold(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3])));        \
        __m256 y = _mm256_##fold(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),                       \
                                 _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));                      \
        return _mm_##fold(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));                 \
    }
FOLD_4(fold_max, max_ps)
FOLD_4(fold_sum, add_ps)

/* 1 to 4 floats. vmaskmovps stores are microcoded on some processors. */
KVT_INLINE __m128 load_floats(const float *from, size_t n)
{
    if (n == 1)
        return _mm_load_ss(from);
    if (n == 4)
        return _mm_loadu_ps(from);
    return _mm_movelh_ps(_mm_castsi128_ps(_mm_loadl_epi64((const void *)from)),
                         n == 3 ? _mm_load_ss(from + 2) : _mm_setzero_ps());
}

KVT_INLINE void store_floats(float *to, size_t n, __m128 x)
{
    if (n == 4)
        _mm_storeu_ps(to, x);
    else if (n == 1)
        _mm_store_ss(to, x);
    else
        _mm_storel_pi((void *)to, x);
    if (n == 3)
        _mm_store_ss(to + 2, _mm_movehl_ps(x, x));
}

/* Makes a row's scores from n < 64 on -inf: neutral for the maximum, and exp gives zero. */
KVT_INLINE void mask_dead(float *row, size_t n)
{
    const __m256 lowest = _mm256_set1_ps(-INFINITY);
    size_t t = n / 8 * 8;
    __m256 x = _mm256_load_ps(row + t);
    _mm256_store_ps(row + t, _mm256_blendv_ps(lowest, x, kvt_lanes_below(t, n)));
    while ((t += 8) < KVT_TOKENS)
        _mm256_store_ps(row + t, lowest);
}

/* Maxima of the raw scores in 8 lanes: add and scale (> 0) are monotonic, also after rounding. */
KVT_INLINE __m256 maxima_of(const float *row)
{
    __m256 even = _mm256_set1_ps(-INFINITY), odd = even;
    /* vmaxps returns its second operand where the first is a NaN (of logits beyond f32). */
    KVT_UNROLL
    for (size_t t = 0; t < KVT_TOKENS; t += 16) {
        even = _mm256_max_ps(_mm256_load_ps(row + t), even);
        odd = _mm256_max_ps(_mm256_load_ps(row + t + 8), odd);
    }
    return _mm256_max_ps(even, odd);
}

/* A row's s = exp((s + add) * scale - shift); returns the sums of its vectors. */
KVT_INLINE __m256 weights_of(float *row, float add, __m256 scales, float shift)
{
    const __m256 adds = _mm256_set1_ps(add), shifts = _mm256_set1_ps(shift);
    __m256 sums[2];
    KVT_UNROLL
    for (size_t half = 0; half < 2; half++) {
        float *at = row + 32 * half;
        __m256 p[4];
        EACH(p[i] = _mm256_mul_ps(_mm256_add_ps(_mm256_load_ps(at + 8 * i), adds), scales));
        EACH(p[i] = _mm256_sub_ps(p[i], shifts));
        exponentials(p);
        EACH(_mm256_store_ps(at + 8 * i, p[i]));
        sums[half] = _mm256_add_ps(_mm256_add_ps(p[0], p[1]), _mm256_add_ps(p[2], p[3]));
    }
    return _mm256_add_ps(sums[0], sums[1]);
}
#undef EACH

/*
 * 1 to 4 rows, a lane of m, l and alpha each. What comes before a row's exponentials, and after
 * them, is a chain of some 20 dependent instructions, so the rows share it.
 */
static void softmax_rows(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                         float *l, float *alpha)
{
    const __m128 lowest = _mm_set1_ps(-INFINITY);
    const __m128 adds = add ? load_floats(add, rows) : _mm_setzero_ps(), old = load_floats(m, rows);
    _Alignas(16) float added[4], shift[4];
    __m256 x[4], factors[4];
    __m128 maxima, masked, factor;

    for (size_t r = 0; n < KVT_TOKENS && r < rows; r++)
        mask_dead(s + r * KVT_TOKENS, n);
    for (size_t r = 0; r < 4; r++) /* lanes of rows beyond `rows` are never stored */
        x[r] = r < rows ? maxima_of(s + r * KVT_TOKENS) : _mm256_setzero_ps();
    maxima = _mm_mul_ps(_mm_add_ps(fold_max(x), adds), _mm_set1_ps(scale));
    maxima = _mm_max_ps(maxima, old);
    store_floats(m, rows, maxima);
    /* All masked so far: -inf - -inf would be NaN; with a shift of 0 every exp(-inf) is 0. */
    masked = _mm_cmpeq_ps(maxima, lowest);
    maxima = _mm_andnot_ps(masked, maxima);
    _mm_store_ps(shift, maxima);
    _mm_store_ps(added, adds);

    for (size_t r = 0; r < rows; r++)
        x[r] = weights_of(s + r * KVT_TOKENS, added[r], _mm256_set1_ps(scale), shift[r]);

    factors[0] = _mm256_castps128_ps256(_mm_sub_ps(old, maxima));
    factors[1] = factors[2] = factors[3] = factors[0];
    exponentials(factors);
    factor = _mm_blendv_ps(_mm256_castps256_ps128(factors[0]), _mm_set1_ps(1.0f), masked);
    store_floats(alpha, rows, factor);
    factor = _mm_mul_ps(load_floats(l, rows), factor);
    store_floats(l, rows, _mm_add_ps(factor, fold_sum(x)));
}

void kvt_avx2_softmax(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                      float *l, float *alpha)
{
    for (size_t r = 0; r < rows; r += 4)
        softmax_rows(s + r * KVT_TOKENS, rows - r < 4 ? rows - r : 4, n, add ? add + r : NULL,
                     scale, m + r, l + r, alpha + r);
}

void kvt_avx2_merge(float *acc, float *m, float *l, const float *acc2, float m2, float l2,
                    size_t dims_p)
{
    float maximum = *m > m2 ? *m : m2, a, b;
    if (m2 == -INFINITY) {
        *l += l2; /* 0, or a NaN: all visible logits are beyond f32 */
        return;
    }
    a = Sleef_expf_u10(*m - maximum);
    b = Sleef_expf_u10(m2 - maximum);
    for (size_t d = 0; d < dims_p; d += 8) {
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(acc2 + d), _mm256_set1_ps(b));
        _mm256_storeu_ps(acc + d, _mm256_fmadd_ps(_mm256_loadu_ps(acc + d), _mm256_set1_ps(a), x));
    }
    *l = *l * a + l2 * b;
    *m = maximum;
}

float kvt_avx2_finish(float *acc, size_t dims_p, float m, float l, float sink)
{
    float maximum = m > sink ? m : sink, a, denominator;
    __m256 factor;
    if (m == -INFINITY) { /* nothing visible */
        for (size_t d = 0; d < dims_p; d += 8)
            _mm256_storeu_ps(acc + d, _mm256_setzero_ps());
        return sink;
    }
    a = Sleef_expf_u10(m - maximum);
    denominator = l * a + Sleef_expf_u10(sink - maximum); /* exp(-inf) is 0 */
    /* At most 1 / l, and l is at least 1: its largest term is exp(0). */
    factor = _mm256_set1_ps(a / denominator);
    for (size_t d = 0; d < dims_p; d += 8)
        _mm256_storeu_ps(acc + d, _mm256_mul_ps(_mm256_loadu_ps(acc + d), factor));
    return maximum + Sleef_logf_u10(denominator);
}
