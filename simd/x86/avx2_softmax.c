/*
 * AVX2 + FMA + F16C: logits, softmax, merge and the final division. The table that lists these
 * kernels is in avx2.c. exp, tanh and log are SLEEF's.
 *
 * A call into SLEEF clobbers all vector registers, and an exponential is a dependency chain of some
 * 60 cycles, four of which a core could overlap: so the loops over calls carry no value from one
 * iteration to the next, and sums are formed in a pass of their own.
 */
#include <math.h>
#include <sleef.h>

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

/*
 * Reduce 8 vectors to one, lane i from vector i: 21 instructions, where 8 single reductions take
 * 48. A row's sum is formed in the same order whatever the other rows are.
 */
#define FOLD_8(name, fold)                                                                         \
    KVT_INLINE __m256 name(const float *x)                                                         \
    {                                                                                              \
        __m256 y[4];                                                                               \
        KVT_UNROLL                                                                                 \
        for (size_t i = 0; i < 4; i++) {                                                           \
            __m256 a = _mm256_load_ps(x + i * 16), b = _mm256_load_ps(x + i * 16 + 8);             \
            y[i] = fold(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));                       \
        }                                                                                          \
        KVT_UNROLL                                                                                 \
        for (size_t i = 0; i < 4; i += 2) {                                                        \
            __m256d a = _mm256_castps_pd(y[i]), b = _mm256_castps_pd(y[i + 1]);                    \
            y[i] = fold(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),                                \
                        _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));                               \
        }                                                                                          \
        return fold(_mm256_permute2f128_ps(y[0], y[2], 0x20),                                      \
                    _mm256_permute2f128_ps(y[0], y[2], 0x31));                                     \
    }
FOLD_8(fold_max, _mm256_max_ps)
FOLD_8(fold_sum, _mm256_add_ps)

/* Maxima of the raw scores in 8 lanes: add and scale (> 0) are monotonic, also after rounding. */
KVT_INLINE __m256 maxima_of(const float *s, size_t n)
{
    __m256 maxima = _mm256_set1_ps(-INFINITY);
    size_t t = 0;
    /* vmaxps returns its second operand where the first is a NaN (of logits beyond f32). */
    for (; t + 8 <= n; t += 8)
        maxima = _mm256_max_ps(_mm256_loadu_ps(s + t), maxima);
    if (t < n) {
        __m256 x = _mm256_blendv_ps(maxima, _mm256_loadu_ps(s + t), kvt_lanes_below(t, n));
        maxima = _mm256_max_ps(x, maxima);
    }
    return maxima;
}

/* s = exp((s + add) * scale - shift), zero from n to 63. */
KVT_INLINE void exponentials(float *s, size_t n, float add, float scale, float shift)
{
    const __m256 adds = _mm256_set1_ps(add), scales = _mm256_set1_ps(scale);
    const __m256 shifts = _mm256_set1_ps(shift);
    size_t t = 0;
    for (; t < n; t += 8) {
        __m256 x = _mm256_mul_ps(_mm256_add_ps(_mm256_loadu_ps(s + t), adds), scales);
        _mm256_storeu_ps(s + t, Sleef_expf8_u10avx2(_mm256_sub_ps(x, shifts)));
    }
    if (n % 8)
        _mm256_storeu_ps(s + t - 8,
                         _mm256_and_ps(_mm256_loadu_ps(s + t - 8), kvt_lanes_below(t - 8, n)));
    for (; t < KVT_TOKENS; t += 8)
        _mm256_storeu_ps(s + t, _mm256_setzero_ps());
}

/* Stores the first n lanes one by one; vmaskmovps stores are microcoded on some processors. */
KVT_INLINE void store_first(float *to, size_t n, __m256 x)
{
    _Alignas(32) float lanes[8];
    if (n == 8) {
        _mm256_storeu_ps(to, x);
        return;
    }
    _mm256_store_ps(lanes, x);
    for (size_t i = 0; i < n; i++)
        to[i] = lanes[i];
}

/*
 * Up to 8 rows, a lane of m, l and alpha each. Separate passes over all rows, none of which keeps a
 * vector across a call, so that consecutive calls are independent and overlap.
 */
static void softmax_rows(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                         float *l, float *alpha)
{
    const __m256 lowest = _mm256_set1_ps(-INFINITY), one = _mm256_set1_ps(1.0f);
    const __m256i alive = _mm256_castps_si256(kvt_lanes_below(0, rows));
    _Alignas(32) float lanes[64], shift[8], old[8], now[8];
    __m256 maxima, sums, shifts, factor = one;

    for (size_t r = 0; r < 8; r++) /* lanes of rows beyond `rows` are never stored */
        _mm256_store_ps(lanes + r * 8, r < rows ? maxima_of(s + r * KVT_TOKENS, n) : lowest);
    maxima = fold_max(lanes);
    if (add)
        maxima = _mm256_add_ps(maxima, _mm256_maskload_ps(add, alive));
    maxima = _mm256_mul_ps(maxima, _mm256_set1_ps(scale));
    _mm256_store_ps(old, _mm256_maskload_ps(m, alive));
    maxima = _mm256_max_ps(maxima, _mm256_load_ps(old));
    /* All masked so far: -inf - -inf would be NaN; with a shift of 0 every exp(-inf) is 0. */
    shifts = _mm256_andnot_ps(_mm256_cmp_ps(maxima, lowest, _CMP_EQ_OQ), maxima);
    _mm256_store_ps(shift, shifts);
    _mm256_store_ps(now, maxima);
    store_first(m, rows, maxima);

    for (size_t r = 0; r < rows; r++)
        exponentials(s + r * KVT_TOKENS, n, add ? add[r] : 0.0f, scale, shift[r]);

    /* Most blocks do not raise any maximum; then the factor is exp(0) = 1 without a call. */
    maxima = _mm256_load_ps(now);
    if (_mm256_movemask_ps(_mm256_cmp_ps(maxima, _mm256_load_ps(old), _CMP_NEQ_UQ)))
        factor = Sleef_expf8_u10avx2(_mm256_sub_ps(_mm256_load_ps(old), _mm256_load_ps(shift)));
    maxima = _mm256_load_ps(now);
    factor = _mm256_blendv_ps(factor, one, _mm256_cmp_ps(maxima, lowest, _CMP_EQ_OQ));
    for (size_t r = 0; r < rows; r++) {
        const float *p = s + r * KVT_TOKENS;
        __m256 a = _mm256_add_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
        __m256 b = _mm256_add_ps(_mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24));
        __m256 c = _mm256_add_ps(_mm256_loadu_ps(p + 32), _mm256_loadu_ps(p + 40));
        __m256 d = _mm256_add_ps(_mm256_loadu_ps(p + 48), _mm256_loadu_ps(p + 56));
        _mm256_store_ps(lanes + r * 8, _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
    }
    sums = fold_sum(lanes);
    sums = _mm256_add_ps(_mm256_mul_ps(_mm256_maskload_ps(l, alive), factor), sums);
    store_first(l, rows, sums);
    store_first(alpha, rows, factor);
}

void kvt_avx2_softmax(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                      float *l, float *alpha)
{
    for (size_t r = 0; r < rows; r += 8)
        softmax_rows(s + r * KVT_TOKENS, rows - r < 8 ? rows - r : 8, n, add ? add + r : NULL,
                     scale, m + r, l + r, alpha + r);
}

void kvt_avx2_merge(float *acc, float *m, float *l, const float *acc2, float m2, float l2,
                    size_t dims_p)
{
    float maximum = *m > m2 ? *m : m2, a, b;
    if (m2 == -INFINITY)
        return;
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
