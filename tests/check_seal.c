/*
 * Checks of the kernels that seal a block: the mean of its keys without outliers, and the codes and
 * scales that take the place of f16. All are specified to the bit. The references are plain
 * loops here: the mean as it is defined, with a sort; for scales and for V's codes scalar's put_,
 * which check_store.c holds to the format, on rows of f32; for K's codes docs/numerics.md, "Sealed
 * rows", and what this rounding is for: the error of a row along itself.
 */
#include "check.h"

#include <stdlib.h>

#define SCALAR kvt_kernels_scalar
#define MAX_DIMS 1024
#define N_DIMS 9

static size_t padded_dims(size_t index)
{
    static const size_t dims[N_DIMS] = {16, 32, 48, 64, 80, 128, 256, 576, 1024};
    return dims[index % N_DIMS];
}

/* ---- open blocks ---- */

typedef enum open_kind {
    OPEN_NORMAL,
    OPEN_SMALL,     /* 2^-10 */
    OPEN_LARGE,     /* up to the largest f16 */
    OPEN_SUBNORMAL, /* of f16 */
    OPEN_EQUAL,     /* all rows are one */
    OPEN_ZERO,
    OPEN_STEP, /* multiples of one row of integers, mean 0: no rounding, distances at the bound */
    OPEN_KINDS
} open_kind;

/* As those of V in a block that is open again: any scale that is not negative. */
static void fill_any_scales(check *c, uint16_t *scales)
{
    for (size_t t = 0; t < KVT_TOKENS; t++)
        if (check_below(c, 4))
            scales[t] = (uint16_t)check_below(c, check_below(c, 2) ? 0x400u : 0x4000u);
}

/* Scales of 1, or one power of two for all, or another for each token. */
static void fill_scales(check *c, uint16_t *scales, open_kind kind)
{
    size_t how = kind == OPEN_STEP ? 0 : check_below(c, 4);
    int all = (int)check_below(c, 40) - 24;
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        int exponent = how < 2 ? 0 : how == 2 ? all : (int)check_below(c, 40) - 24;
        scales[t] = check_to_f16(ldexpf(1.0f, exponent), 0);
    }
}

static float element(check *c, open_kind kind)
{
    float normal = check_normal(c);
    switch (kind) {
    case OPEN_SMALL: return normal * 0x1p-10f;
    case OPEN_LARGE: return check_below(c, 4) ? normal * 0x1p13f : copysignf(65504.0f, normal);
    case OPEN_SUBNORMAL: return normal * 0x1p-20f;
    case OPEN_ZERO: return normal < 0 ? -0.0f : 0.0f;
    case OPEN_STEP: return rintf(normal * 4.0f);
    default: return normal;
    }
}

/* f16 beyond its range: the caller of a kernel has scaled it down. */
static uint16_t code_of(float x)
{
    return check_to_f16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x, 0);
}

/*
 * A block of 64 rows of `dims` dims as it stands before it is sealed, padding zero: element
 * (t, d) in index's order. Some rows may be far from the others: by a factor of 100, or by 3 to 5,
 * which is near the bound of 4.
 */
static void fill_open(check *c, uint16_t *open, size_t dims, size_t dims_p, open_kind kind,
                      size_t (*index)(size_t, size_t, size_t))
{
    static const size_t outliers[] = {0, 0, 1, 2, 5, 16, 31, 32, 33, 40};
    const size_t n_far = outliers[check_below(c, sizeof outliers / sizeof outliers[0])];
    const int near_bound = check_below(c, 2) != 0, aligned = check_below(c, 2) != 0;
    static float row[MAX_DIMS], base[MAX_DIMS];
    float factor[KVT_TOKENS];

    memset(open, 0, KVT_TOKENS * dims_p * sizeof *open);
    for (size_t d = 0; d < dims; d++) {
        row[d] = element(c, kind);
        base[d] = aligned ? element(c, kind) : 0.0f;
    }
    for (size_t t = 0; t < KVT_TOKENS; t++)
        factor[t] = check_below(c, 40) == 0 ? 0.0f : 1.0f; /* a row of zeros now and then */
    for (size_t i = 0; i < n_far; i++)
        factor[check_below(c, KVT_TOKENS)] =
            near_bound ? 3.0f + 0x1p-10f * (float)check_below(c, 2049) : 100.0f;
    if (kind == OPEN_STEP) {
        /* Tokens 14 and 15 are just at the bound; the least distance is the median, or zero. */
        float sum = 0.0f;
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            factor[t] = t / 2 == 7 ? 4.0f : t / 2 == 3 && near_bound ? 0.0f : t % 2 ? -1.0f : 1.0f;
            sum += factor[t];
        }
        for (size_t t = KVT_TOKENS - 2; sum > 0.0f; t -= 2) {
            factor[t] = -1.0f;
            sum -= 2.0f;
        }
    }
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < dims; d++) {
            float x = element(c, kind) * factor[t] + base[d];
            if (kind == OPEN_EQUAL)
                x = row[d];
            if (kind == OPEN_STEP)
                x = row[d] * factor[t];
            if (kind == OPEN_STEP && aligned && d == 0 && t / 2 == 7) /* beyond the bound */
                x += copysignf(1.0f, x);
            open[index(t, d, dims_p)] = code_of(x);
        }
}

static float open_value(const uint16_t *open, const uint16_t *scales, size_t t, size_t d,
                        size_t dims_p, size_t (*index)(size_t, size_t, size_t))
{
    return kvt_f16_to_f32(open[index(t, d, dims_p)]) * kvt_f16_to_f32(scales[t]);
}

/* For the bench: a block of 128 dims. */
static uint16_t *bench_open(check *c, size_t slot, size_t (*index)(size_t, size_t, size_t))
{
    uint16_t *open = check_buffer(c, slot, KVT_TOKENS * 128 * 2, 64);
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < 128; d++)
            open[index(t, d, 128)] = code_of(check_normal(c));
    return open;
}

static uint16_t *bench_scales(check *c, size_t slot)
{
    uint16_t *scales = check_buffer(c, slot, KVT_TOKENS * 2, 64);
    for (size_t t = 0; t < KVT_TOKENS; t++)
        scales[t] = 0x3c00u;
    return scales;
}

/* ---- the mean ---- */

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void mean_of(const float *x, size_t dims_p, const int *is_kept, float *mean)
{
    size_t count = 0;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        count += is_kept[t] != 0;
    for (size_t d = 0; d < dims_p; d++) {
        float lane[16] = {0};
        for (size_t j = 0; j < 16; j++)
            for (size_t t = j; t < KVT_TOKENS; t += 16) {
                float y = is_kept[t] ? x[t * dims_p + d] : 0.0f;
                lane[j] = t == j ? y : lane[j] + y;
            }
        for (size_t h = 8; h; h /= 2)
            for (size_t j = 0; j < h; j++)
                lane[j] += lane[j + h];
        mean[d] = lane[0] / (float)count;
    }
}

/* Returns how many tokens are left out. */
static size_t robust_mean(const float *x, size_t dims_p, float *mean)
{
    float dist[KVT_TOKENS], sorted[KVT_TOKENS];
    int is_kept[KVT_TOKENS];
    size_t left_out = 0;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        is_kept[t] = 1;
    mean_of(x, dims_p, is_kept, mean);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        dist[t] = 0.0f;
        for (size_t d = 0; d < dims_p; d++) {
            float away = x[t * dims_p + d] - mean[d];
            float square = away * away;
            dist[t] += square;
        }
    }
    memcpy(sorted, dist, sizeof sorted);
    qsort(sorted, KVT_TOKENS, sizeof *sorted, compare_floats);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        is_kept[t] = !(dist[t] > 16.0f * sorted[31]);
        left_out += !is_kept[t];
    }
    if (left_out)
        mean_of(x, dims_p, is_kept, mean);
    return left_out;
}

typedef void mean_function(const void *, const uint16_t *, size_t, float *);

static size_t check_mean(check *c, mean_function *kernel, const uint16_t *open,
                         const uint16_t *scales, size_t dims_p, const char *what)
{
    static float x[KVT_TOKENS * MAX_DIMS], expected[MAX_DIMS];
    float *mean = check_buffer(c, 2, dims_p * 4, 4);
    size_t left_out;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < dims_p; d++)
            x[t * dims_p + d] = open_value(open, scales, t, d, dims_p, kvt_kw_index);
    left_out = robust_mean(x, dims_p, expected);
    if (!kernel)
        return left_out;
    check_fill_nan(mean, dims_p * 4);
    kernel(open, scales, dims_p, mean);
    if (!check_same_bits(mean, expected, dims_p))
        check_fail(c, "differs: dims_p %zu, %s, %zu left out", dims_p, what, left_out);
    check_canaries(c);
    return left_out;
}

/*
 * A token whose distance is within a rounding of the bound, so that distances that are rounded
 * otherwise show. Three of its elements, in dims that are zero in the other tokens, are bisected
 * one after the other between 0 (it is kept) and 1000 (it is left out): a step of f16 is 2^-10 of
 * an element, so each comes closer than the one before by about 2^9.
 */
static void check_mean_at_bound(check *c, mean_function *kernel)
{
    size_t dims_p = 16 + 16 * check_below(c, 8);
    uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
    uint16_t *scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
    size_t token = check_below(c, KVT_TOKENS);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        scales[t] = 0x3c00u;
        for (size_t d = 0; d < dims_p; d++)
            open[kvt_kw_index(t, d, dims_p)] = d < 3 ? 0 : code_of(check_normal(c) + 1.0f);
    }
    for (size_t d = 0; d < 3; d++) {
        uint16_t *at = open + kvt_kw_index(token, d, dims_p);
        unsigned low = 0, high = code_of(1000.0f);
        while (high - low > 1) {
            unsigned middle = (low + high) / 2;
            *at = (uint16_t)middle;
            if (check_mean(c, NULL, open, scales, dims_p, ""))
                high = middle;
            else
                low = middle;
        }
        for (unsigned side = 2; side-- > 0;) {
            *at = (uint16_t)(low + side);
            check_mean(c, kernel, open, scales, dims_p, "at the bound");
        }
    }
}

void check_mean_k_f16(check *c, mean_function *kernel)
{
    size_t without = 0, with = 0, most = 0;
    if (c->bench) {
        uint16_t *open = bench_open(c, 0, kvt_kw_index), *scales = bench_scales(c, 1);
        float *mean = check_buffer(c, 2, 512, 4);
        CHECK_BENCH(c, 64 * 128 * 2, kernel(open, scales, 128, mean));
    }
    /* A block with 31 outliers or more is a matter of some hundred. */
    for (size_t i = 0; i < 12 * N_DIMS * OPEN_KINDS &&
                       (i < check_rounds(c, 12) * N_DIMS * OPEN_KINDS || most < 31);
         i++) {
        static const char *const names[OPEN_KINDS] = {"normal", "small", "large", "subnormal",
                                                      "equal",  "zero",  "step"};
        size_t dims_p = padded_dims(i), dims = dims_p - check_below(c, 2) * 8, left_out;
        open_kind kind = (open_kind)(i / N_DIMS % OPEN_KINDS);
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
        uint16_t *scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
        fill_open(c, open, dims, dims_p, kind, kvt_kw_index);
        fill_scales(c, scales, kind);
        left_out = check_mean(c, kernel, open, scales, dims_p, names[kind]);
        without += left_out == 0;
        with += left_out != 0;
        most = left_out > most ? left_out : most;
    }
    if (!without || !with || most < 31)
        check_fail(c, "the data is not varied: %zu without outliers, %zu with, up to %zu", without,
                   with, most);
    for (size_t i = 0; i < check_rounds(c, 30); i++)
        check_mean_at_bound(c, kernel);
}

/* ---- codes and scales ---- */

typedef int put_function(const float *, size_t, size_t, size_t, size_t, void *, uint16_t *, size_t);

/* Multiplication and addition of K's rounding that a kernel could fuse or not. */
typedef enum unfused {
    NONE_UNFUSED,
    NORM_UNFUSED,
    VALUE_UNFUSED,
    SUM_UNFUSED,
    UNFUSED_KINDS
} unfused;

static float fma_or_not(float a, float b, float c, int is_fused)
{
    float product = a * b;
    return is_fused ? fmaf(a, b, c) : product + c;
}

/*
 * K's codes of a row, by the formulas of docs/numerics.md. w * reciprocal has a magnitude of at
 * most 127 and an ulp of it, as the scale is rounded up. `wrong`: one of the FMAs is left out.
 */
static void code_row(const float *w, uint16_t scale, size_t dims_p, unfused wrong,
                     signed char *codes)
{
    const float most = 0x1.f8p-9f;
    const float reciprocal = scale ? 1.0f / kvt_f16_to_f32(scale) : 0.0f;
    float n = 0.0f, p = 0.0f, gain, v[MAX_DIMS];
    for (size_t d = 0; d < dims_p; d++) {
        v[d] = w[d] * reciprocal;
        n = fma_or_not(v[d], v[d], n, wrong != NORM_UNFUSED);
    }
    gain = 1.0f / fmaxf(n / 8.0f, 16129.0f);
    for (size_t d = 0; d < dims_p; d++) {
        float q = fminf(fmaxf(p * gain, -most), most);
        float code = rintf(fma_or_not(-v[d], q, v[d], wrong != VALUE_UNFUSED));
        p = fma_or_not(code - v[d], v[d], p, wrong != SUM_UNFUSED);
        codes[d] = (signed char)code;
    }
}

/* Rows of w, whose scales are those of scalar's put_. The padding is zero. */
static void check_scales(check *c, put_function *put, const float *w, size_t dims_p,
                         unsigned char *plain, const uint16_t *scales, int kind)
{
    uint16_t expected[KVT_TOKENS];
    for (size_t t = 0; t < KVT_TOKENS; t += 16)
        if (!put(w + t * dims_p, dims_p, 16, dims_p, dims_p, plain, expected, t))
            check_fail(c, "the data is beyond f16 scales");
    if (memcmp(scales, expected, sizeof expected) != 0)
        check_fail(c, "scales differ: dims_p %zu, kind %d", dims_p, kind);
}

static void check_sealed_v(check *c, const float *w, size_t dims_p, const unsigned char *codes,
                           const uint16_t *scales, int kind, const uint16_t *open,
                           const uint16_t *open_scales)
{
    static unsigned char plain[KVT_TOKENS * MAX_DIMS];
    int powers = 1;
    check_scales(c, SCALAR.put_v_i8, w, dims_p, plain, scales, kind);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        const float had = kvt_f16_to_f32(open_scales[t]), scale = kvt_f16_to_f32(scales[t]);
        volatile float reciprocal = scales[t] ? 1.0f / scale : 0.0f, factor = had * reciprocal;
        int exponent;
        powers &= had > 0.0f && frexpf(had, &exponent) == 0.5f;
        for (size_t d = 0; d < dims_p; d++) {
            const float x = kvt_f16_to_f32(open[kvt_vw_index(t, d, dims_p)]);
            volatile float multiple = x * factor;
            const int expected = (int)rintf(multiple);
            const int code = ((const signed char *)codes)[kvt_v8_index(t, d, dims_p)];
            if (code != expected) {
                check_fail(c, "token %zu, dim %zu of %zu, kind %d: code %d, not %d, scales %a, %a",
                           t, d, dims_p, kind, code, expected, (double)had, (double)scale);
                return;
            }
        }
    }
    if (powers && memcmp(codes, plain, KVT_TOKENS * dims_p) != 0)
        check_fail(c, "codes differ: dims_p %zu, kind %d", dims_p, kind);
    check_canaries(c);
}

/* Errors in steps: along the rows, and in all directions, with codes of K and with plain ones. */
typedef struct row_errors {
    double along, total, plain_along, plain_total;
} row_errors;

static void add_errors(const float *w, double scale, size_t dims_p, const signed char *codes,
                       size_t token, double *along, double *total)
{
    double product = 0.0, norm = 0.0;
    for (size_t d = 0; d < dims_p; d++) {
        double v = w[d] / scale, error = codes[kvt_k8_index(token, d, dims_p)] - v;
        product += error * v;
        norm += v * v;
        *total += error * error;
    }
    *along += norm > 0.0 ? product * product / norm : 0.0;
}

static void check_sealed_k(check *c, const float *w, size_t dims_p, const unsigned char *codes,
                           const uint16_t *scales, int kind, row_errors *errors)
{
    static unsigned char plain[KVT_TOKENS * MAX_DIMS];
    const signed char *of_plain = (const signed char *)plain, *of = (const signed char *)codes;
    check_scales(c, SCALAR.put_k_i8, w, dims_p, plain, scales, kind);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        const double scale = scales[t] ? (double)kvt_f16_to_f32(scales[t]) : 1.0;
        const float *row = w + t * dims_p;
        signed char expected[MAX_DIMS];
        code_row(row, scales[t], dims_p, NONE_UNFUSED, expected);
        for (size_t d = 0; d < dims_p; d++) {
            signed char code = of[kvt_k8_index(t, d, dims_p)];
            if (code != expected[d]) {
                check_fail(c, "codes differ: dims_p %zu, kind %d, token %zu, dim %zu: %d for %d",
                           dims_p, kind, t, d, code, expected[d]);
                break;
            }
            if (code == -128 || (scales[t] && fabs(code - row[d] / scale) > 1.0)) {
                check_fail(c, "beyond a step: dims_p %zu, kind %d, token %zu, dim %zu: %d for %.9g",
                           dims_p, kind, t, d, code, row[d] / scale);
                break;
            }
        }
        if (errors) {
            add_errors(row, scale, dims_p, of, t, &errors->along, &errors->total);
            add_errors(row, scale, dims_p, of_plain, t, &errors->plain_along, &errors->plain_total);
        }
    }
    check_canaries(c);
}

/* Fills w; values whose scale would be beyond f16 become smaller, in the block as well. */
static void rows_of(uint16_t *open, const uint16_t *scales, const float *delta, size_t dims_p,
                    size_t (*index)(size_t, size_t, size_t), float *w)
{
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < dims_p; d++) {
            float *to = w + t * dims_p + d;
            for (;;) {
                *to = open_value(open, scales, t, d, dims_p, index);
                if (delta)
                    *to += delta[d];
                if (fabsf(*to) <= 127.0f * 65504.0f)
                    break;
                open[index(t, d, dims_p)] = (uint16_t)(open[index(t, d, dims_p)] - 0x400u);
            }
        }
}

/* An offset that is zero, exactly minus a row, or of any size. Zero in the padding. */
static void fill_delta(check *c, float *delta, const uint16_t *open, const uint16_t *scales,
                       size_t dims, size_t dims_p)
{
    const size_t how = check_below(c, 3), token = check_below(c, KVT_TOKENS);
    const int exponent = (int)check_below(c, 30) - 20;
    for (size_t d = 0; d < dims_p; d++) {
        float x = open_value(open, scales, token, d, dims_p, kvt_kw_index);
        delta[d] = d >= dims  ? 0.0f
                   : how == 0 ? ldexpf(check_normal(c), exponent)
                   : how == 1 ? -fminf(fmaxf(x, -0x1p21f), 0x1p21f)
                              : check_normal(c);
    }
}

typedef void seal_k_function(const void *, const uint16_t *, const float *, size_t, const void *,
                             void *, uint16_t *);

/* Rows in units of the largest element / 127. */
typedef enum row_kind {
    ROW_DOMINANT,    /* one element of 127, the others below 1 */
    ROW_EQUAL,       /* all elements are one */
    ROW_ALTERNATING, /* the same with alternating signs */
    ROW_NEAR_HALF,   /* .49 or .51 of a step off, of one sign, and one element of 127 */
    ROW_HALF,        /* ties, and one element of 127: not a step is taken if P is zero */
    ROW_LARGE,       /* all near 127, of which the correction takes most */
    ROW_ZERO,
    ROW_KINDS
} row_kind;

static void fill_row(check *c, float *row, size_t dims, row_kind kind)
{
    const size_t large = check_below(c, dims);
    const float value = check_normal(c) * 10.0f, sign = copysignf(1.0f, value);
    const float whole = (float)check_below(c, 8), part = check_below(c, 2) ? 0.49f : 0.51f;
    for (size_t d = 0; d < dims; d++) {
        float x = check_normal(c);
        switch (kind) {
        case ROW_DOMINANT:
            row[d] = d == large ? 127.0f : fmaxf(fminf(x * 0.3f, 1.0f), -1.0f);
            break;
        case ROW_EQUAL: row[d] = value; break;
        case ROW_ALTERNATING: row[d] = d % 2 ? value : -value; break;
        case ROW_NEAR_HALF: row[d] = d == large ? 127.0f : sign * (whole + part); break;
        case ROW_HALF:
            row[d] = d == large ? 127.0f : copysignf((float)check_below(c, 100) + 0.5f, x);
            break;
        case ROW_LARGE: row[d] = copysignf(126.0f + (float)check_below(c, 17) / 16.0f, sign); break;
        default: row[d] = 0.0f; break;
        }
    }
}

/* Rows of all these kinds. `exponent`: of the open scales; at 2^-24 a step is 2^-24, subnormal. */
static void check_special_rows(check *c, seal_k_function *kernel, size_t dims_p, int exponent)
{
    static float w[KVT_TOKENS * MAX_DIMS];
    size_t dims = dims_p - check_below(c, 2) * 8;
    uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
    uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
    unsigned char *codes = check_buffer(c, 3, KVT_TOKENS * dims_p, 64);
    uint16_t *scales = check_buffer(c, 4, KVT_TOKENS * 2, 2);
    memset(open, 0, KVT_TOKENS * dims_p * 2);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        /* Below 1 the largest element is fewer than 127 steps of a subnormal scale. */
        float row[MAX_DIMS],
            factor = exponent < -20 ? 1.0f / (float)(1 + check_below(c, 64)) : 1.0f;
        fill_row(c, row, dims, (row_kind)check_below(c, ROW_KINDS));
        for (size_t d = 0; d < dims; d++)
            open[kvt_kw_index(t, d, dims_p)] = code_of(row[d] * factor);
        open_scales[t] = check_to_f16(ldexpf(1.0f, exponent), 0);
    }
    rows_of(open, open_scales, NULL, dims_p, kvt_kw_index, w);
    check_fill_nan(codes, KVT_TOKENS * dims_p);
    check_fill_nan(scales, KVT_TOKENS * 2);
    kernel(open, open_scales, NULL, dims_p, NULL, codes, scales);
    check_sealed_k(c, w, dims_p, codes, scales, 100, NULL);
}

/*
 * Rows whose codes differ if an FMA is left out, searched for: random elements, and a last one that
 * the correction takes to just about a half. They come from the offset, as the numbers of 11 bits
 * that a block holds are multiplied without rounding. All rows of the block are the same.
 */
static void check_fused(check *c, seal_k_function *kernel)
{
    enum { DIMS = 64 };
    static float w[KVT_TOKENS * DIMS];
    size_t found[UNFUSED_KINDS] = {0};
    for (size_t tries = 0; tries < 60000; tries++) {
        const unfused wrong = (unfused)(1 + tries % (UNFUSED_KINDS - 1));
        /* The norm counts where it is large, and P where q is not clamped. */
        const float size = wrong == NORM_UNFUSED ? 60.0f : 20.0f;
        float row[DIMS], n = 0.0f, p = 0.0f, gain, q;
        signed char codes[DIMS], others[DIMS];
        if (found[wrong] == 3)
            continue;
        for (size_t d = 0; d < DIMS - 1; d++)
            row[d] = fminf(fmaxf(check_normal(c) * size, -127.0f), 127.0f);
        row[check_below(c, DIMS - 1)] = 127.0f; /* the scale is 1 */
        for (size_t d = 0; d < DIMS - 1; d++)
            n = fmaf(row[d], row[d], n);
        row[DIMS - 1] = (float)check_below(c, 100) + 0.5f;
        gain = 1.0f / fmaxf(fmaf(row[DIMS - 1], row[DIMS - 1], n) / 8.0f, 16129.0f);
        for (size_t d = 0; d < DIMS - 1; d++) {
            q = fminf(fmaxf(p * gain, -0x1.f8p-9f), 0x1.f8p-9f);
            p = fmaf(rintf(fmaf(-row[d], q, row[d])) - row[d], row[d], p);
        }
        q = fminf(fmaxf(p * gain, -0x1.f8p-9f), 0x1.f8p-9f);
        row[DIMS - 1] /= 1.0f - q;
        for (size_t i = 0; i < 4; i++)
            row[DIMS - 1] = nextafterf(row[DIMS - 1], 0.0f);
        for (size_t i = 0; i < 9; i++, row[DIMS - 1] = nextafterf(row[DIMS - 1], 1000.0f)) {
            uint16_t *open, *open_scales, *scales;
            unsigned char *sealed;
            code_row(row, 0x3c00u, DIMS, NONE_UNFUSED, codes);
            code_row(row, 0x3c00u, DIMS, wrong, others);
            if (memcmp(codes, others, DIMS) == 0)
                continue;
            found[wrong]++;
            open = check_buffer(c, 0, KVT_TOKENS * DIMS * 2, 64);
            open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
            sealed = check_buffer(c, 3, KVT_TOKENS * DIMS, 64);
            scales = check_buffer(c, 4, KVT_TOKENS * 2, 2);
            memset(open, 0, KVT_TOKENS * DIMS * 2);
            for (size_t t = 0; t < KVT_TOKENS; t++)
                open_scales[t] = 0x3c00u;
            rows_of(open, open_scales, row, DIMS, kvt_kw_index, w);
            kernel(open, open_scales, row, DIMS, NULL, sealed, scales);
            check_sealed_k(c, w, DIMS, sealed, scales, 300 + (int)wrong, NULL);
            break;
        }
    }
    for (size_t i = 1; i < UNFUSED_KINDS; i++)
        if (found[i] == 0)
            check_fail(c, "no row shows whether FMA %zu is one", i);
}

/*
 * What the rounding is for: over random rows the error along a row is less than a third of plain
 * rounding's (rms), and the error in all directions hardly more.
 */
static void check_projections(check *c, seal_k_function *kernel, size_t dims_p)
{
    static float w[KVT_TOKENS * MAX_DIMS];
    row_errors errors = {0};
    for (size_t i = 0; i < check_rounds(c, 100); i++) {
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
        unsigned char *codes = check_buffer(c, 3, KVT_TOKENS * dims_p, 64);
        uint16_t *scales = check_buffer(c, 4, KVT_TOKENS * 2, 2);
        for (size_t j = 0; j < KVT_TOKENS * dims_p; j++)
            open[j] = code_of(check_normal(c));
        for (size_t t = 0; t < KVT_TOKENS; t++)
            open_scales[t] = 0x3c00u;
        rows_of(open, open_scales, NULL, dims_p, kvt_kw_index, w);
        kernel(open, open_scales, NULL, dims_p, NULL, codes, scales);
        check_sealed_k(c, w, dims_p, codes, scales, 200, &errors);
    }
    if (!(errors.along * 9.0 <= errors.plain_along))
        check_fail(c, "dims_p %zu: errors along the rows are %.3g of plain rounding's (rms)",
                   dims_p, sqrt(errors.along / errors.plain_along));
    if (!(errors.total <= 1.15 * errors.plain_total))
        check_fail(c, "dims_p %zu: squared errors are %.3g of plain rounding's", dims_p,
                   errors.total / errors.plain_total);
}

void check_seal_k_i8(check *c, seal_k_function *kernel)
{
    static float w[KVT_TOKENS * MAX_DIMS];
    if (c->bench) {
        uint16_t *open = bench_open(c, 0, kvt_kw_index), *open_scales = bench_scales(c, 1);
        float *delta = check_buffer(c, 2, 512, 4);
        unsigned char *codes = check_buffer(c, 3, KVT_TOKENS * 128, 64);
        uint16_t *scales = check_buffer(c, 4, KVT_TOKENS * 2, 64);
        check_fill(c, delta, 128, CHECK_NORMAL, 0);
        CHECK_BENCH(c, 64 * 128 * 3, kernel(open, open_scales, delta, 128, NULL, codes, scales));
    }
    for (size_t i = 0; i < check_rounds(c, 12) * N_DIMS * OPEN_KINDS; i++) {
        size_t dims_p = padded_dims(i), dims = dims_p - check_below(c, 2) * 8;
        open_kind kind = (open_kind)(i / N_DIMS % OPEN_KINDS);
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
        float *delta = check_below(c, 4) ? check_buffer(c, 2, dims_p * 4, 4) : NULL;
        unsigned char *codes = check_buffer(c, 3, KVT_TOKENS * dims_p, 64);
        uint16_t *scales = check_buffer(c, 4, KVT_TOKENS * 2, 2);
        fill_open(c, open, dims, dims_p, kind, kvt_kw_index);
        fill_scales(c, open_scales, kind);
        if (delta)
            fill_delta(c, delta, open, open_scales, dims, dims_p);
        rows_of(open, open_scales, delta, dims_p, kvt_kw_index, w);
        check_fill_nan(codes, KVT_TOKENS * dims_p);
        check_fill_nan(scales, KVT_TOKENS * 2);
        kernel(open, open_scales, delta, dims_p, i % 2 ? codes : NULL, codes, scales);
        check_sealed_k(c, w, dims_p, codes, scales, (int)kind, NULL);
    }
    for (size_t i = 0; i < check_rounds(c, 8) * N_DIMS; i++) {
        check_special_rows(c, kernel, padded_dims(i), 0);
        check_special_rows(c, kernel, padded_dims(i), -24);
    }
    check_fused(c, kernel);
    check_projections(c, kernel, 64);
    check_projections(c, kernel, 128);
}

void check_seal_v_i8(check *c, void (*kernel)(const void *, const uint16_t *, size_t, const void *,
                                              void *, uint16_t *))
{
    static float w[KVT_TOKENS * MAX_DIMS];
    if (c->bench) {
        uint16_t *open = bench_open(c, 0, kvt_vw_index), *open_scales = bench_scales(c, 1);
        unsigned char *codes = check_buffer(c, 3, KVT_TOKENS * 128, 64);
        uint16_t *scales = check_buffer(c, 4, KVT_TOKENS * 2, 64);
        CHECK_BENCH(c, 64 * 128 * 3, kernel(open, open_scales, 128, NULL, codes, scales));
    }
    for (size_t i = 0; i < check_rounds(c, 12) * N_DIMS * OPEN_KINDS; i++) {
        size_t dims_p = padded_dims(i), dims = dims_p - check_below(c, 2) * 8;
        open_kind kind = (open_kind)(i / N_DIMS % OPEN_KINDS);
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
        unsigned char *codes = check_buffer(c, 3, KVT_TOKENS * dims_p, 64);
        uint16_t *scales = check_buffer(c, 4, KVT_TOKENS * 2, 2);
        fill_open(c, open, dims, dims_p, kind, kvt_vw_index);
        fill_scales(c, open_scales, kind);
        if (i % 3 == 0 && kind != OPEN_LARGE)
            fill_any_scales(c, open_scales);
        rows_of(open, open_scales, NULL, dims_p, kvt_vw_index, w);
        check_fill_nan(codes, KVT_TOKENS * dims_p);
        check_fill_nan(scales, KVT_TOKENS * 2);
        kernel(open, open_scales, dims_p, i % 2 ? codes : NULL, codes, scales);
        check_sealed_v(c, w, dims_p, codes, scales, (int)kind, open, open_scales);
    }
}
