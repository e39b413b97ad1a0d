/*
 * Checks of the kernels of attention, against double precision. Each bound counts roundings: k
 * roundings of terms whose magnitudes add up to m leave an error of at most k * 2^-24 * m (to
 * first order). Bounds are for the worst case; the mean error of a dot product, which is far
 * below, is checked beside it, so that a chain that is too long shows.
 */
#include "check.h"

#define SCALAR kvt_kernels_scalar

/* Underflow error of a sum of n terms: half of the least subnormal each. */
#define UNDERFLOW(n) (0x1p-149 * (double)(n))

/* Bound of the relative root mean square error of sums of N(0,1) data. */
#define RMS_BOUND 5e-7

typedef enum type { F32, F16, I8 } type;

static size_t element_bytes(type t)
{
    return t == F32 ? 4 : t == F16 ? 2 : 1;
}

/* One head's codes and scales: random in live slots, NaN patterns from n_tokens on. */
static void fill_block(check *c, type t, int is_k, size_t n_tokens, size_t dims, size_t dims_p,
                       unsigned char *codes, uint16_t *scales, double *values)
{
    memset(codes, 0, KVT_TOKENS * dims_p * element_bytes(t));
    for (size_t token = 0; token < KVT_TOKENS; token++) {
        /* 2^-10 to 2^5, so that exchanged scales are detected. */
        scales[token] = (uint16_t)(0x1400u + check_below(c, 0x3c00u));
        if (token >= n_tokens)
            scales[token] = (uint16_t)(0x7c01u + check_below(c, 0x300u));
        for (size_t d = 0; d < dims; d++) {
            size_t at = t == I8 ? (is_k ? kvt_k8_index : kvt_v8_index)(token, d, dims_p)
                                : (is_k ? kvt_kw_index : kvt_vw_index)(token, d, dims_p);
            unsigned char *code = codes + at * element_bytes(t);
            float x = check_normal(c);
            uint16_t h = kvt_f32_to_f16(x);
            signed char byte = (signed char)((int)check_below(c, 255) - 127);
            if (t == F32)
                memcpy(code, &x, 4);
            else if (t == F16)
                memcpy(code, &h, 2);
            else
                *code = (unsigned char)byte;
            if (token >= n_tokens)
                check_fill_nan(code, element_bytes(t));
            else
                values[token * dims_p + d] = t == F32 ? (double)x : (double)check_f16_value(h);
            if (token < n_tokens && t == I8)
                values[token * dims_p + d] = byte * (double)check_f16_value(scales[token]);
        }
    }
}

/* Token counts around every tile boundary, then all of them. */
static size_t token_count(check *c, size_t i)
{
    static const size_t counts[] = {64, 1, 15, 16, 17, 63, 48, 33, 31, 32, 47, 49};
    return i < sizeof counts / sizeof counts[0] ? counts[i] : 1 + check_below(c, KVT_TOKENS);
}

static double values[KVT_TOKENS * CHECK_MAX_DIMS];

/* ---- scores ---- */

typedef void qk_function(const float *, size_t, size_t, const void *, const uint16_t *, size_t,
                         size_t, const void *, float *);

/* Values of `next`: NULL, readable memory, or an address that cannot be read. */
static const void *next_of(check *c, const unsigned char *codes)
{
    switch (check_below(c, 3)) {
    case 0: return NULL;
    case 1: return codes;
    default: return (const void *)(uintptr_t)64;
    }
}

/* The same rows one by one, and among other rows: the same bits. */
static void check_qk_alone(check *c, qk_function *kernel, const float *q, size_t ldq, size_t rows,
                           const unsigned char *codes, const uint16_t *scales, size_t n_tokens,
                           size_t dims_p, const float *s)
{
    for (size_t first = 0, n; first < rows; first += n) {
        n = check_below(c, 2) ? 1 : 1 + check_below(c, rows - first);
        float *part = check_buffer(c, 3, n * KVT_TOKENS * 4, 64);
        float *q_part = check_buffer(c, 4, n * dims_p * 4, 64);
        for (size_t r = 0; r < n; r++)
            memcpy(q_part + r * dims_p, q + (first + r) * ldq, dims_p * 4);
        check_fill_nan(part, n * KVT_TOKENS * 4);
        kernel(q_part, dims_p, n, codes, scales, n_tokens, dims_p, NULL, part);
        for (size_t r = 0; r < n; r++)
            if (!check_same_bits(part + r * KVT_TOKENS, s + (first + r) * KVT_TOKENS, n_tokens))
                check_fail(c, "row %zu of %zu depends on the others: dims_p %zu, n_tokens %zu",
                           first + r, rows, dims_p, n_tokens);
    }
}

static void check_qk(check *c, qk_function *kernel, type t)
{
    if (c->bench) {
        float *q = check_buffer(c, 0, 4 * 128 * 4, 64), *s = check_buffer(c, 3, 1024, 64);
        unsigned char *codes = check_buffer(c, 1, 64 * 128 * 4, 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64);
        check_fill(c, q, 4 * 128, CHECK_NORMAL, 0);
        fill_block(c, t, 1, 64, 128, 128, codes, scales, values);
        CHECK_BENCH(c, 64 * 128 * element_bytes(t),
                    kernel(q, 128, 4, codes, scales, 64, 128, NULL, s));
    }
    for (size_t i = 0; i < check_rounds(c, 400); i++) {
        size_t dims = check_dims(check_below(c, CHECK_N_DIMS)), dims_p = kvt_round_up(dims, 16);
        size_t rows = i % KVT_ROWS_MAX + 1, n_tokens = token_count(c, i);
        size_t ldq = dims_p + 16 * check_below(c, 3);
        check_kind kind = i < check_rounds(c, 200) ? CHECK_NORMAL : (check_kind)(i % CHECK_KINDS);
        float *q = check_buffer(c, 0, ((rows - 1) * ldq + dims_p) * 4, 64);
        unsigned char *codes = check_buffer(c, 1, KVT_TOKENS * dims_p * element_bytes(t), 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64);
        float *s = check_buffer(c, 5, rows * KVT_TOKENS * 4, 64);
        double error = 0, norm = 0;

        fill_block(c, t, 1, n_tokens, dims, dims_p, codes, scales, values);
        check_fill(c, q, (rows - 1) * ldq + dims_p, kind, t == I8 ? 1e32f : 1e34f);
        for (size_t r = 0; r < rows; r++)
            memset(q + r * ldq + dims, 0, (dims_p - dims) * 4);
        check_fill_nan(s, rows * KVT_TOKENS * 4);
        kernel(q, ldq, rows, codes, t == I8 ? scales : NULL, n_tokens, dims_p, next_of(c, codes),
               s);
        for (size_t r = 0; r < rows; r++)
            for (size_t token = 0; token < n_tokens; token++) {
                double sum = 0, size = 0, x = s[r * KVT_TOKENS + token], bound;
                for (size_t d = 0; d < dims; d++) {
                    double term = q[r * ldq + d] * values[token * dims_p + d];
                    sum += term;
                    size += fabs(term);
                }
                /* A product and a sum a dim within a chunk (of at most 64), a sum a chunk (of at
                 * least 16), two products with the scale. */
                bound = (64 + 1 + (double)dims_p / 16 + 2) * CHECK_EPS * size +
                        UNDERFLOW(2 * dims_p) * (t == I8 ? 32 : 1);
                if (!(fabs(x - sum) <= bound))
                    check_fail(c, "%a, not %a: row %zu of %zu, token %zu of %zu, dims %zu, kind %d",
                               x, sum, r, rows, token, n_tokens, dims, (int)kind);
                error += (x - sum) * (x - sum);
                norm += sum * sum;
            }
        if (kind == CHECK_NORMAL && rows * n_tokens >= 64 && error > RMS_BOUND * RMS_BOUND * norm)
            check_fail(c, "mean error %g: dims %zu", sqrt(error / norm), dims);
        check_qk_alone(c, kernel, q, ldq, rows, codes, t == I8 ? scales : NULL, n_tokens, dims_p,
                       s);
        check_canaries(c);
    }
}

void check_qk_f32(check *c, qk_function *kernel)
{
    check_qk(c, kernel, F32);
}

void check_qk_f16(check *c, qk_function *kernel)
{
    check_qk(c, kernel, F16);
}

void check_qk_i8(check *c, qk_function *kernel)
{
    check_qk(c, kernel, I8);
}

/* ---- scores by integer dot products ---- */

/* The least number of steps from 0 to the largest element that q, or weights, are rounded to. */
#define STEPS_NEAR 16000
#define STEPS_NEAR_P 32000
#define STEPS_FAST CHECK_STEPS

typedef void pack_function(const float *, size_t, size_t, size_t, void *);
typedef void qk_packed_function(const void *, size_t, size_t, const void *, const uint16_t *,
                                size_t, size_t, const void *, float *);

static void check_packed_alone(check *c, pack_function *pack, qk_packed_function *kernel,
                               const float *q, size_t ldq, size_t rows, size_t begin,
                               const unsigned char *codes, const uint16_t *scales, size_t n_tokens,
                               size_t dims_p, const float *s)
{
    for (size_t first = begin, n; first < rows; first += n) {
        n = check_below(c, 2) ? 1 : 1 + check_below(c, rows - first);
        unsigned char *packed = check_buffer(c, 3, kvt_packed_bytes(n, dims_p), 64);
        float *part = check_buffer(c, 4, n * KVT_TOKENS * 4, 64);
        pack(q + first * ldq, ldq, n, dims_p, packed);
        kernel(packed, 0, n, codes, scales, n_tokens, dims_p, NULL, part);
        for (size_t r = 0; r < n; r++)
            if (!check_same_bits(part + r * KVT_TOKENS, s + (first + r) * KVT_TOKENS, n_tokens))
                check_fail(c, "row %zu of %zu depends on the others: dims_p %zu, n_tokens %zu",
                           first + r, rows, dims_p, n_tokens);
    }
}

static void check_packed(check *c, pack_function *pack, qk_packed_function *kernel, double steps)
{
    if (!pack || !kernel) {
        check_fail(c, "the table has one of pack_q and qk, but not the other");
        return;
    }
    if (c->bench) {
        float *q = check_buffer(c, 0, 4 * 128 * 4, 64), *s = check_buffer(c, 3, 1024, 64);
        unsigned char *codes = check_buffer(c, 1, 64 * 128, 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64);
        unsigned char *packed = check_buffer(c, 4, kvt_packed_bytes(4, 128), 64);
        check_fill(c, q, 4 * 128, CHECK_NORMAL, 0);
        fill_block(c, I8, 1, 64, 128, 128, codes, scales, values);
        pack(q, 128, 4, 128, packed);
        if (strstr(c->kernel, "pack"))
            CHECK_BENCH(c, 4 * 128 * 4, pack(q, 128, 4, 128, packed));
        CHECK_BENCH(c, 64 * 128, kernel(packed, 0, 4, codes, scales, 64, 128, NULL, s));
    }
    for (size_t i = 0; i < check_rounds(c, 400); i++) {
        size_t dims = check_dims(check_below(c, CHECK_N_DIMS)), dims_p = kvt_round_up(dims, 16);
        size_t rows = i % KVT_ROWS_MAX + 1, n_tokens = token_count(c, i);
        size_t first = i % 3 ? 0 : check_below(c, rows), ldq = dims_p + 16 * check_below(c, 3);
        check_kind kind = i < check_rounds(c, 200) ? CHECK_NORMAL : (check_kind)(i % CHECK_KINDS);
        float *q = check_buffer(c, 0, ((rows - 1) * ldq + dims_p) * 4, 64);
        unsigned char *codes = check_buffer(c, 1, KVT_TOKENS * dims_p, 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64);
        float *s = check_buffer(c, 5, rows * KVT_TOKENS * 4, 64);
        unsigned char *packed = check_buffer(c, 6, kvt_packed_bytes(rows, dims_p), 64);
        double error = 0, norm = 0;

        fill_block(c, I8, 1, n_tokens, dims, dims_p, codes, scales, values);
        check_fill(c, q, (rows - 1) * ldq + dims_p, kind, 1e30f);
        if (i % 10 == 9) /* every element at the limit: the sums are the largest there are */
            for (size_t j = 0; j < (rows - 1) * ldq + dims_p; j++)
                q[j] = q[j] < 0 ? -3.0f : 3.0f;
        if (i % 20 == 19)
            memset(codes, 127, KVT_TOKENS * dims_p);
        if (i % 20 == 19)
            for (size_t j = 0; j < n_tokens * dims_p; j++)
                values[j] =
                    j % dims_p < dims ? 127 * (double)check_f16_value(scales[j / dims_p]) : 0;
        for (size_t r = 0; r < rows; r++)
            memset(q + r * ldq + dims, 0, (dims_p - dims) * 4);
        check_fill_nan(s, rows * KVT_TOKENS * 4);
        check_fill_nan(packed, kvt_packed_bytes(rows, dims_p));
        pack(q, ldq, rows, dims_p, packed);
        kernel(packed, first, rows, codes, scales, n_tokens, dims_p, next_of(c, codes), s);
        for (size_t r = first; r < rows; r++) {
            double largest = 0x1p-100;
            for (size_t d = 0; d < dims; d++)
                largest =
                    fabs((double)q[r * ldq + d]) > largest ? fabs((double)q[r * ldq + d]) : largest;
            for (size_t token = 0; token < n_tokens; token++) {
                double sum = 0, size = 0, keys = 0, x = s[r * KVT_TOKENS + token], bound;
                for (size_t d = 0; d < dims; d++) {
                    double term = q[r * ldq + d] * values[token * dims_p + d];
                    sum += term;
                    size += fabs(term);
                    keys += fabs(values[token * dims_p + d]);
                }
                /* Half a step an element; a conversion and four products; where two digits are
                 * added up as f32, two of the conversions. */
                bound = 0.501 * largest / steps * keys + 8 * CHECK_EPS * (size + largest * keys) +
                        UNDERFLOW(4) * 32;
                if (!(fabs(x - sum) <= bound))
                    check_fail(c, "%a, not %a: row %zu of %zu, token %zu of %zu, dims %zu, kind %d",
                               x, sum, r, rows, token, n_tokens, dims, (int)kind);
                error += (x - sum) * (x - sum);
                norm += sum * sum;
            }
        }
        /* In normal data the largest element is some 3 to 5 times the typical one; with scales of
         * different size few tokens dominate. */
        if (kind == CHECK_NORMAL && i % 10 != 9 && (rows - first) * n_tokens >= 64 &&
            error > norm * (4 / steps) * (4 / steps))
            check_fail(c, "mean error %g: dims %zu", sqrt(error / norm), dims);
        check_packed_alone(c, pack, kernel, q, ldq, rows, first, codes, scales, n_tokens, dims_p,
                           s);
        check_canaries(c);
    }
}

void check_pack_q_near(check *c, pack_function *kernel)
{
    check_packed(c, kernel, c->table->qk_i8_near, STEPS_NEAR);
}

void check_pack_q_fast(check *c, pack_function *kernel)
{
    check_packed(c, kernel, c->table->qk_i8_fast, STEPS_FAST);
}

void check_qk_i8_near(check *c, qk_packed_function *kernel)
{
    check_packed(c, c->table->pack_q_near, kernel, STEPS_NEAR);
}

void check_qk_i8_fast(check *c, qk_packed_function *kernel)
{
    check_packed(c, c->table->pack_q_fast, kernel, STEPS_FAST);
}

/* ---- weighted sums ---- */

static void check_pv_alone(check *c, check_pv_function *kernel, const float *p, size_t rows,
                           const unsigned char *codes, const uint16_t *scales, size_t n_tokens,
                           size_t dims_p, const float *alpha, const float *before, const float *acc,
                           size_t ldacc)
{
    for (size_t first = 0, n; first < rows; first += n) {
        n = check_below(c, 2) ? 1 : 1 + check_below(c, rows - first);
        float *part = check_buffer(c, 6, n * dims_p * 4, 4);
        for (size_t r = 0; r < n; r++)
            memcpy(part + r * dims_p, before + (first + r) * ldacc, dims_p * 4);
        kernel(p + first * KVT_TOKENS, n, codes, scales, n_tokens, dims_p, alpha + first, NULL,
               part, dims_p);
        for (size_t r = 0; r < n; r++)
            if (!check_same_bits(part + r * dims_p, acc + (first + r) * ldacc, dims_p))
                check_fail(c, "row %zu of %zu depends on the others: dims_p %zu, n_tokens %zu",
                           first + r, rows, dims_p, n_tokens);
    }
}

/* steps: p may be rounded to 1 / steps of the row's largest weight; 0: not rounded. */
static void check_pv(check *c, check_pv_function *kernel, type t, double steps)
{
    static float before[KVT_ROWS_MAX * (CHECK_MAX_DIMS + 32)];
    if (c->bench) {
        float *p = check_buffer(c, 0, 1024, 64), *acc = check_buffer(c, 3, 2048, 64);
        unsigned char *codes = check_buffer(c, 1, 64 * 128 * 4, 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64);
        const float alpha[4] = {0};
        check_fill(c, p, 256, CHECK_NORMAL, 0);
        memset(acc, 0, 2048);
        fill_block(c, t, 0, 64, 128, 128, codes, scales, values);
        CHECK_BENCH(c, 64 * 128 * element_bytes(t),
                    kernel(p, 4, codes, scales, 64, 128, alpha, NULL, acc, 128));
    }
    for (size_t i = 0; i < check_rounds(c, 400); i++) {
        size_t dims = check_dims(check_below(c, CHECK_N_DIMS)), dims_p = kvt_round_up(dims, 16);
        size_t rows = i % KVT_ROWS_MAX + 1, n_tokens = token_count(c, i);
        size_t ldacc = dims_p + check_below(c, 33), n_acc = (rows - 1) * ldacc + dims_p;
        float *p = check_buffer(c, 0, rows * KVT_TOKENS * 4, 64);
        unsigned char *codes = check_buffer(c, 1, KVT_TOKENS * dims_p * element_bytes(t), 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64);
        float *alpha = check_buffer(c, 4, rows * 4, 4), *acc = check_buffer(c, 5, n_acc * 4, 4);
        double error = 0, norm = 0, rms;

        double scale_of[KVT_TOKENS];
        fill_block(c, t, 0, n_tokens, dims, dims_p, codes, scales, values);
        for (size_t token = 0; token < n_tokens; token++)
            scale_of[token] = t == I8 ? (double)check_f16_value(scales[token]) : 1;
        for (size_t r = 0; r < rows; r++) {
            alpha[r] = i % 3 ? (float)check_below(c, 1025) / 1024.0f : i % 2 ? 1.0f : 0.0f;
            for (size_t token = 0; token < KVT_TOKENS; token++) {
                /* As the softmax leaves them: 0 to 1, many tiny ones. */
                float x = expf(-fabsf(check_normal(c)) * (i % 5 ? 2.0f : 40.0f));
                p[r * KVT_TOKENS + token] = token < n_tokens ? x : 0.0f;
            }
        }
        check_fill(c, acc, n_acc, i % 7 ? CHECK_NORMAL : CHECK_SPREAD, 0);
        memcpy(before, acc, n_acc * 4);
        kernel(p, rows, codes, t == I8 ? scales : NULL, n_tokens, dims_p, alpha, next_of(c, codes),
               acc, ldacc);
        for (size_t r = 0; r < rows; r++)
            for (size_t d = 0; d < ldacc && r * ldacc + d < n_acc; d++) {
                size_t at = r * ldacc + d;
                double sum = 0, size = 0, old = (double)before[at] * alpha[r], bound;
                double largest = 0, codes_size = 0;
                if (d >= dims) {
                    /* Padding dims are sums of zeros; the gaps between rows must not be written. */
                    float expected = d < dims_p ? before[at] * alpha[r] : before[at];
                    if (acc[at] != expected)
                        check_fail(c, "dim %zu of %zu (%zu) is %a", d, dims, dims_p,
                                   (double)acc[at]);
                    continue;
                }
                for (size_t token = 0; token < n_tokens; token++) {
                    double term = p[r * KVT_TOKENS + token] * values[token * dims_p + d];
                    double scale = scale_of[token];
                    double weight = p[r * KVT_TOKENS + token] * scale;
                    sum += term;
                    size += fabs(term);
                    largest = weight > largest ? weight : largest;
                    codes_size += fabs(values[token * dims_p + d]) / scale;
                }
                /* 64 sums, a product each, two more for the scale; then a product, a sum. */
                bound = (64 + 1 + 2 + 1) * CHECK_EPS * size + 2 * CHECK_EPS * fabs(old) +
                        UNDERFLOW(3 * KVT_TOKENS) * (t == I8 ? 128 : 4);
                /* Half a step a weight, or one dithered; p below 2^-100 may become zero. */
                if (steps > 0)
                    bound += codes_size * (steps > CHECK_STEPS ? 0.501 : CHECK_OFF) *
                             ((largest + 0x1p-100) / steps);
                if (!(fabs(acc[at] - (old + sum)) <= bound))
                    check_fail(c, "%a, not %a: row %zu of %zu, dim %zu of %zu, n_tokens %zu",
                               (double)acc[at], old + sum, r, rows, d, dims, n_tokens);
                error += (acc[at] - (old + sum)) * (acc[at] - (old + sum));
                norm += (old + sum) * (old + sum);
            }
        rms = steps > 0 ? 4 / steps : RMS_BOUND;
        if (rows * dims >= 64 && error > rms * rms * norm)
            check_fail(c, "mean error %g: n_tokens %zu", sqrt(error / norm), n_tokens);
        check_pv_alone(c, kernel, p, rows, codes, t == I8 ? scales : NULL, n_tokens, dims_p, alpha,
                       before, acc, ldacc);
        check_canaries(c);
    }
}

void check_pv_f32(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, F32, 0);
}

void check_pv_f16(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, F16, 0);
}

void check_pv_i8(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, I8, 0);
}

void check_pv_i8_near(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, I8, STEPS_NEAR_P);
}

void check_pv_i8_fast(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, I8, STEPS_FAST);
    check_one_digit(c, kernel, KVT_TOKENS * 32, 100, 100);
}

/* ---- the offset's part of a score ---- */

void check_dots_f16(check *c, void (*kernel)(const float *, size_t, size_t, const uint16_t *,
                                             size_t, float *))
{
    static float bench_a[4 * 128], bench_out[4];
    static uint16_t bench_b[128];
    CHECK_BENCH(c, 4 * 128 * 6, kernel(bench_a, 128, 4, bench_b, 128, bench_out));
    for (size_t i = 0; i < check_rounds(c, 1500); i++) {
        size_t n = i % 2 ? 8 + 8 * check_below(c, 72) : kvt_round_up(check_dims(i / 2), 16);
        size_t rows = 1 + i % 9, ldq = n + 8 * check_below(c, 3);
        float *a = check_buffer(c, 0, ((rows - 1) * ldq + n) * 4, 4);
        uint16_t *b = check_buffer(c, 1, n * 2, 2);
        float *out = check_buffer(c, 2, rows * 4, 4);
        check_fill(c, a, (rows - 1) * ldq + n, (check_kind)(i / 2 % CHECK_KINDS), 1e30f);
        for (size_t j = 0; j < n; j++)
            b[j] = check_finite_f16(c);
        kernel(a, ldq, rows, b, n, out);
        for (size_t r = 0; r < rows; r++) {
            double sum = 0, size = 0;
            float alone;
            for (size_t j = 0; j < n; j++) {
                sum += a[r * ldq + j] * (double)check_f16_value(b[j]);
                size += fabs(a[r * ldq + j] * (double)check_f16_value(b[j]));
            }
            /* At most 8 in a chunk and the chunks, or n / 16 in a lane and the folds. */
            if (!(fabs(out[r] - sum) <= (10 + (double)n / 8) * CHECK_EPS * size + UNDERFLOW(2 * n)))
                check_fail(c, "n %zu: %a, not %a", n, (double)out[r], sum);
            kernel(a + r * ldq, ldq, 1, b, n, &alone);
            if (!check_same_bits(&alone, out + r, 1))
                check_fail(c, "row %zu of %zu depends on the others: n %zu", r, rows, n);
        }
        check_canaries(c);
    }
}

/* ---- logits ---- */

void check_logits(check *c, void (*kernel)(float *, size_t, float, float, float))
{
    static float bench_s[KVT_TOKENS];
    CHECK_BENCH(c, 512, kernel(bench_s, 64, 0.5f, 0.125f, 0.0f));
    for (size_t i = 0; i < check_rounds(c, 4000); i++) {
        size_t n = i % KVT_TOKENS + 1;
        float *s = check_buffer(c, 0, KVT_TOKENS * 4, 4), in[KVT_TOKENS];
        float add = i % 3 ? check_normal(c) * 10 : 0.0f, scale = fabsf(check_normal(c)) + 0.01f;
        float cap = i % 2 ? 0.0f : 1.0f + 50.0f * fabsf(check_normal(c));
        check_fill_nan(s, KVT_TOKENS * 4);
        check_fill(c, s, n, (check_kind)(i / 4 % CHECK_KINDS), 1e30f);
        memcpy(in, s, sizeof in);
        kernel(s, n, add, scale, cap);
        for (size_t t = 0; t < n; t++) {
            double x = ((double)in[t] + add) * scale;
            double bound = 3 * CHECK_EPS * (fabs((double)in[t]) + fabs((double)add)) * scale;
            if (cap > 0) {
                /* tanh's slope is at most 1 and its value at most its argument; SLEEF's ulp is
                 * two half ones, a division and two products are another three. */
                double size = fabs(x) < cap ? fabs(x) : cap;
                x = cap * tanh(x / cap);
                bound = (bound < 2 * cap ? bound : 2 * cap) + 6 * CHECK_EPS * size;
            }
            if (!(fabs(s[t] - x) <= bound + UNDERFLOW(4) * (1 + scale + cap)))
                check_fail(c, "%a, not %a: n %zu, cap %g", (double)s[t], x, n, (double)cap);
        }
        check_canaries(c);
    }
}

void check_alibi(check *c, void (*kernel)(float *, size_t, const int32_t *, int32_t, float))
{
    static float bench_s[KVT_TOKENS];
    static int32_t bench_positions[KVT_TOKENS];
    CHECK_BENCH(c, 768, kernel(bench_s, 64, bench_positions, 5, 0.125f));
    for (size_t i = 0; i < check_rounds(c, 4000); i++) {
        size_t n = i % KVT_TOKENS + 1;
        float *s = check_buffer(c, 0, KVT_TOKENS * 4, 4), in[KVT_TOKENS];
        int32_t *positions = check_buffer(c, 1, n * 4, 4);
        size_t limit = i % 2 ? 2147483647u : 4096;
        int32_t position = (int32_t)check_below(c, limit);
        float slope = (float)check_below(c, 257) / 256.0f;
        check_fill_nan(s, KVT_TOKENS * 4);
        check_fill(c, s, n, CHECK_NORMAL, 0);
        for (size_t t = 0; t < n; t++)
            positions[t] = (int32_t)check_below(c, limit);
        if (i % 5 == 0)
            s[check_below(c, n)] = -INFINITY;
        memcpy(in, s, sizeof in);
        kernel(s, n, positions, position, slope);
        for (size_t t = 0; t < n; t++) {
            double far = slope * fabs((double)position - positions[t]);
            /* The distance to f32, the product, the difference. */
            double bound = 3 * CHECK_EPS * (fabs((double)in[t]) + far);
            if (isinf(in[t]) ? s[t] != in[t] : !(fabs(s[t] - (in[t] - far)) <= bound))
                check_fail(c, "%a, not %a: n %zu", (double)s[t], in[t] - far, n);
        }
        check_canaries(c);
    }
}

/* ---- softmax ---- */

/* exp of an f32, by SLEEF (1 ulp) or simd/exp.h; below the normal numbers it may be zero. */
static double exp_exact_bound(double x)
{
    return exp(x) * (1.5 + fabs(x) / 20) * CHECK_EPS + (x < -87.33 ? 0x1p-126 : 0);
}

/* exp of a rounded difference. */
static double exp_bound(double x)
{
    return exp_exact_bound(x) + exp(x) * (1 + fabs(x)) * CHECK_EPS;
}

typedef void softmax_function(float *, size_t, size_t, const float *, float, float *, float *,
                              float *);

static void check_softmax_row(check *c, const float *in, const float *s, size_t n, float add,
                              float scale, float old_m, float old_l, float m, float l, float alpha)
{
    double maximum = old_m, sum = 0, sum_bound = 0, factor = 1;
    float logit[KVT_TOKENS];
    for (size_t t = 0; t < n; t++) {
        logit[t] = (in[t] + add) * scale; /* both roundings are specified */
        maximum = logit[t] > maximum ? logit[t] : maximum;
    }
    if (!(m == maximum))
        check_fail(c, "maximum %a, not %a: n %zu", (double)m, maximum, n);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        double x = t < n && isfinite(maximum) ? exp(logit[t] - maximum) : 0;
        double bound = x > 0 ? exp_bound(logit[t] - maximum) : 0;
        if (!(fabs(s[t] - x) <= bound))
            check_fail(c, "%a, not %a: token %zu of %zu", (double)s[t], x, t, n);
        sum += x;
        sum_bound += bound + 64 * CHECK_EPS * x;
    }
    if (isfinite(maximum) && maximum != old_m)
        factor = exp(old_m - maximum);
    if (!(fabs(alpha - factor) <= (factor > 0 ? exp_bound(isinf(old_m) ? 0 : old_m - maximum) : 0)))
        check_fail(c, "factor %a, not %a: n %zu", (double)alpha, factor, n);
    if (!(fabs(l - (old_l * factor + sum)) <=
          sum_bound + 2 * CHECK_EPS * (old_l * factor + sum) +
              (factor > 0 && factor < 1 ? old_l * exp_bound(old_m - maximum) : 0)))
        check_fail(c, "sum %a, not %a: n %zu", (double)l, old_l * factor + sum, n);
}

/* Weights of logits 0 down to -200, against a maximum of 0: differences are exact. */
static void check_exponentials(check *c, softmax_function *kernel)
{
    uint32_t bits = 0x80000000u; /* -0 */
    while (bits < 0xc3480000u) { /* -200 */
        float *s = check_buffer(c, 0, KVT_TOKENS * 4, 64), in[KVT_TOKENS];
        float m = 0, l = 0, alpha = -1;
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            memcpy(in + t, &bits, 4);
            bits += 1 + (uint32_t)check_below(c, 2000);
        }
        memcpy(s, in, sizeof in);
        kernel(s, 1, KVT_TOKENS, NULL, 1.0f, &m, &l, &alpha);
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            double x = exp(in[t]);
            if (!(fabs(s[t] - x) <= exp_exact_bound(in[t])))
                check_fail(c, "exp(%a) %a, not %a", (double)in[t], (double)s[t], x);
            if (!(s[t] >= 0 && s[t] <= 1) || (in[t] < -104 && s[t] != 0) ||
                (in[t] == 0 && s[t] != 1))
                check_fail(c, "exp(%a) %a", (double)in[t], (double)s[t]);
        }
        if (!(m == 0 && alpha == 1))
            check_fail(c, "maximum %a, factor %a", (double)m, (double)alpha);
        check_canaries(c);
    }
}

/*
 * A logit that is a NaN or infinite must not get lost: the row's sum is a NaN. Nor may a row of
 * nothing but NaNs, which has no maximum, be taken for a masked one.
 */
static void check_not_finite(check *c, softmax_function *kernel)
{
    for (size_t i = 0; i < KVT_TOKENS * 8; i++) {
        size_t rows = i % 5 + 1, row = check_below(c, rows), at = i % KVT_TOKENS;
        size_t n = at + 1 + check_below(c, KVT_TOKENS - at);
        float *s = check_buffer(c, 0, rows * KVT_TOKENS * 4, 64);
        float m[5], l[5], alpha[5];
        int first = i % 2, all = i >= KVT_TOKENS * 6;
        check_fill(c, s, rows * KVT_TOKENS, CHECK_NORMAL, 0);
        for (size_t r = 0; r < rows; r++) {
            m[r] = first ? -INFINITY : 0;
            l[r] = first ? 0 : 1;
        }
        if (i % 3)
            s[row * KVT_TOKENS + at] = i % 3 == 1 ? INFINITY : -NAN;
        else /* another payload than that of arithmetic */
            check_fill_nan(s + row * KVT_TOKENS + at, 4);
        for (size_t t = 0; all && t < n; t++)
            s[row * KVT_TOKENS + t] = i % 3 && t % 2 ? -INFINITY : NAN;
        kernel(s, rows, n, NULL, 1.0f, m, l, alpha);
        for (size_t r = 0; r < rows; r++)
            if (isnan(l[r]) != (r == row))
                check_fail(c, "sum %a of row %zu; not finite: token %zu of %zu of row %zu",
                           (double)l[r], r, at, n, row);
        check_canaries(c);
    }
}

void check_softmax(check *c, softmax_function *kernel)
{
    if (c->bench) {
        float *s = check_buffer(c, 0, 4 * KVT_TOKENS * 4, 64);
        float m[4] = {0}, l[4] = {0}, alpha[4];
        memset(s, 0, 4 * KVT_TOKENS * 4);
        CHECK_BENCH(c, 4 * 512, kernel(s, 4, 64, NULL, 0.125f, m, l, alpha));
    }
    check_exponentials(c, kernel);
    check_not_finite(c, kernel);
    for (size_t i = 0; i < check_rounds(c, 8000); i++) {
        size_t n = i % KVT_TOKENS + 1, rows = i % 11 ? 1 + check_below(c, 9) : KVT_ROWS_MAX;
        float *s = check_buffer(c, 0, rows * KVT_TOKENS * 4, 64);
        float in[KVT_ROWS_MAX * KVT_TOKENS];
        float *add = check_buffer(c, 1, rows * 4, 4), *m = check_buffer(c, 2, rows * 4, 4);
        float *l = check_buffer(c, 3, rows * 4, 4), *alpha = check_buffer(c, 4, rows * 4, 4);
        float old_m[KVT_ROWS_MAX], old_l[KVT_ROWS_MAX];
        float spread = i % 4 ? 3.0f : 100.0f,
              scale = i % 6 ? 0.1f + (float)check_below(c, 9) : 1.0f;
        check_fill_nan(s, rows * KVT_TOKENS * 4);
        for (size_t r = 0; r < rows; r++) {
            size_t kind = i + 13 * r; /* rows differ: some masked, some new */
            add[r] = kind % 6 ? check_normal(c) : 0.0f;
            m[r] = old_m[r] = kind % 3 == 0 ? -INFINITY : check_normal(c) * 3;
            l[r] = old_l[r] = kind % 3 == 0 ? 0.0f : 1.0f + fabsf(check_normal(c)) * 100;
            for (size_t t = 0; t < n; t++) {
                float x = check_normal(c) * spread;
                if (kind % 5 == 0 && check_below(c, 3) == 0)
                    x = -INFINITY;
                if (kind % 7 == 0)
                    x = kind % 2 ? -INFINITY : 0.0f;
                s[r * KVT_TOKENS + t] = x;
            }
        }
        memcpy(in, s, rows * KVT_TOKENS * 4);
        kernel(s, rows, n, i % 5 ? add : NULL, scale, m, l, alpha);
        for (size_t r = 0; r < rows; r++) {
            float *alone = check_buffer(c, 5, KVT_TOKENS * 4, 64);
            float alone_m = old_m[r], alone_l = old_l[r], alone_alpha;
            check_softmax_row(c, in + r * KVT_TOKENS, s + r * KVT_TOKENS, n, i % 5 ? add[r] : 0.0f,
                              scale, old_m[r], old_l[r], m[r], l[r], alpha[r]);
            memcpy(alone, in + r * KVT_TOKENS, KVT_TOKENS * 4);
            kernel(alone, 1, n, i % 5 ? add + r : NULL, scale, &alone_m, &alone_l, &alone_alpha);
            if (!check_same_bits(alone, s + r * KVT_TOKENS, KVT_TOKENS) ||
                !check_same_bits(&alone_m, m + r, 1) || !check_same_bits(&alone_l, l + r, 1) ||
                !check_same_bits(&alone_alpha, alpha + r, 1))
                check_fail(c, "row %zu of %zu depends on the others: n %zu", r, rows, n);
        }
        check_canaries(c);
    }
}

/* A sum that is a NaN is one after the merge: also where no logit was larger than -inf. */
static void check_merge_not_finite(check *c, void (*kernel)(float *, float *, float *,
                                                            const float *, float, float, size_t))
{
    for (int i = 0; i < 16; i++) {
        float *acc = check_buffer(c, 0, 16 * 4, 4), *acc2 = check_buffer(c, 1, 16 * 4, 4);
        int second = i & 1;
        float m = i & 2 ? -INFINITY : 1, m2 = i & 4 ? -INFINITY : 2;
        float l = second ? (float)!(i & 2) : NAN, l2 = second ? NAN : (float)!(i & 4);
        if (i & 8)
            l = l2 = NAN;
        check_fill(c, acc, 16, CHECK_NORMAL, 0);
        check_fill(c, acc2, 16, CHECK_NORMAL, 0);
        kernel(acc, &m, &l, acc2, m2, l2, 16);
        if (!isnan(l))
            check_fail(c, "case %d: a sum that is a NaN became %a", i, (double)l);
        check_canaries(c);
    }
}

void check_merge(check *c,
                 void (*kernel)(float *, float *, float *, const float *, float, float, size_t))
{
    static float bench_a[128], bench_b[128], bench_m, bench_l;
    CHECK_BENCH(c, 1536, kernel(bench_a, &bench_m, &bench_l, bench_b, 0.0f, 0.0f, 128));
    check_merge_not_finite(c, kernel);
    for (size_t i = 0; i < check_rounds(c, 2000); i++) {
        size_t n = kvt_round_up(check_dims(i), 16);
        float *acc = check_buffer(c, 0, n * 4, 4), *acc2 = check_buffer(c, 1, n * 4, 4);
        float in[CHECK_MAX_DIMS];
        /* Empty: the state after a range of tokens that are all masked. */
        int empty = i / 10 % 4 == 1 || i / 10 % 4 == 3, empty2 = i / 10 % 4 >= 2;
        float m = empty ? -INFINITY : check_normal(c) * 9, l = empty ? 0 : 1 + check_normal(c) / 9;
        float m2 = empty2 ? -INFINITY : check_normal(c) * 9;
        float l2 = empty2 ? 0 : 1 + check_normal(c) / 9;
        double old_m = m, old_l = l, maximum = m > m2 ? m : m2, a, b;
        check_fill(c, acc, n, empty ? CHECK_ZERO : CHECK_NORMAL, 0);
        check_fill(c, acc2, n, empty2 ? CHECK_ZERO : CHECK_NORMAL, 0);
        memcpy(in, acc, n * 4);
        a = empty && empty2 ? 1 : exp(old_m - maximum);
        b = empty2 ? 0 : exp(m2 - maximum);
        kernel(acc, &m, &l, acc2, m2, l2, n);
        if (!(m == maximum))
            check_fail(c, "maximum %a, not %a", (double)m, maximum);
        /* The error of a and b, which is below (3 + 100) roundings, and two operations. */
        if (!(fabs(l - (old_l * a + l2 * b)) <= 105 * CHECK_EPS * (old_l * a + l2 * b)))
            check_fail(c, "sum %a", (double)l);
        for (size_t d = 0; d < n; d++)
            if (!(fabs(acc[d] - (in[d] * a + acc2[d] * b)) <=
                  105 * CHECK_EPS * (fabs(in[d] * a) + fabs(acc2[d] * b)) + 0x1p-126))
                check_fail(c, "dim %zu of %zu: %a", d, n, (double)acc[d]);
        check_canaries(c);
    }
}

void check_finish(check *c, float (*kernel)(float *, size_t, float, float, float))
{
    static float bench_a[128];
    volatile float sink = 0;
    (void)sink;
    CHECK_BENCH(c, 1024, sink += kernel(bench_a, 128, 0.0f, 1.0f, -INFINITY));
    for (size_t i = 0; i < check_rounds(c, 2000); i++) {
        size_t n = kvt_round_up(check_dims(i), 16);
        float *acc = check_buffer(c, 0, n * 4, 4), in[CHECK_MAX_DIMS];
        int empty = i / 10 % 5 == 0, no_sink = i / 10 % 2 == 0;
        float m = empty ? -INFINITY : check_normal(c) * 9;
        float l = empty ? 0 : 1 + fabsf(check_normal(c)) * 1000;
        float sink_logit = no_sink ? -INFINITY : check_normal(c) * 9, lse;
        double maximum = m > sink_logit ? m : sink_logit, a, denominator, expected;
        check_fill(c, acc, n, empty ? CHECK_ZERO : CHECK_NORMAL, 0);
        memcpy(in, acc, n * 4);
        a = empty ? 0 : exp(m - maximum);
        denominator = empty ? 1 : l * a + (no_sink ? 0 : exp(sink_logit - maximum));
        expected = empty ? (double)sink_logit : maximum + log(denominator);
        lse = kernel(acc, n, m, l, sink_logit);
        /* Exponentials as in merge; the logarithm's error is the relative one of its argument. */
        if (isinf(expected) ? lse != expected
                            : !(fabs(lse - expected) <= CHECK_EPS * (110 + 2 * fabs(expected))))
            check_fail(c, "log-sum-exp %a, not %a", (double)lse, expected);
        for (size_t d = 0; d < n; d++)
            if (!(fabs(acc[d] - in[d] * a / denominator) <=
                  215 * CHECK_EPS * fabs(in[d] * a / denominator) + 0x1p-126))
                check_fail(c, "dim %zu of %zu: %a", d, n, (double)acc[d]);
        check_canaries(c);
    }
}
