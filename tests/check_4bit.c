/*
 * Checks of the kernels of 4- and 5-bit codes. Sealing, storing and reading are compared bit by bit
 * with a reference that follows docs/numerics.md element by element; products with double precision
 * over the values that the codes stand for, within bounds that count the roundings.
 */
#include "check.h"

#include "simd/levels.h"

#define MAX_DIMS CHECK_MAX_DIMS
/* Steps from 0 to the largest element that q, or weights, are rounded to, at least. */
#define STEPS CHECK_STEPS

typedef struct format {
    unsigned bits; /* 4 or 5 */
    int is_k;
} format;
static const format K4 = {4, 1}, V4 = {4, 0}, V5 = {5, 0};

static size_t code_bytes(format f, size_t dims_p)
{
    return KVT_TOKENS * dims_p * f.bits / 8;
}

static const int v4_levels[16] = {-63, -48, -37, -29, -22, -15, -9, -3,
                                  3,   9,   15,  22,  29,  37,  48, 63};

/* Where a code is, worked out from tile.h's head comment. */
static unsigned code_at(format f, const unsigned char *codes, size_t t, size_t d, size_t dims_p)
{
    size_t half = (f.is_k ? d : t) % 8 / 4, byte, fifth, bit;
    unsigned low;
    byte = f.is_k ? t / 16 * (dims_p * 8) + d / 8 * 64 + t % 16 * 4 + d % 4
                  : t / 8 * (dims_p * 4) + d * 4 + t % 4;
    low = half ? codes[byte] >> 4 : codes[byte] & 15u;
    if (f.bits == 4)
        return low;
    fifth = KVT_TOKENS / 2 * dims_p + (t / 8 * (dims_p / 16) + d / 16) * 16 + half * 8;
    bit = d % 16 * 4 + t % 4;
    return low + 16u * ((unsigned)codes[fifth + bit / 8] >> bit % 8 & 1u);
}

/* In units of the scale. */
static double value_of(format f, unsigned code)
{
    return f.is_k ? code - 7.5 : f.bits == 4 ? v4_levels[code] : 2.0 * code - 31.0;
}

static int32_t nearest(float x)
{
    return (int32_t)rintf(x);
}

/* ---- references of the codes ---- */

static unsigned above(int32_t u, const int *bounds)
{
    unsigned n = 0;
    for (size_t i = 0; i < 7; i++)
        n += u > bounds[i];
    return n;
}

/* A row of x * unit. */
static void row_v4(const float *row, float unit, size_t dims, unsigned *codes, uint16_t *scale)
{
    static const int bounds[3][7] = {
        {12, 24, 37, 51, 66, 85, 111}, {11, 22, 34, 46, 60, 78, 102}, {10, 20, 31, 42, 55, 71, 93}};
    float largest = 0.0f, most = -1.0f, step = 0.0f, reciprocal, x[MAX_DIMS];
    for (size_t d = 0; d < dims; d++) {
        x[d] = row[d] * unit;
        largest = fmaxf(largest, fabsf(x[d]));
    }
    *scale = 0;
    for (size_t k = 0; k < 3 && largest >= 0x1p-100f; k++) {
        int64_t product = 0, square = 0;
        float units = 126.0f / largest, gain;
        for (size_t d = 0; d < dims; d++) {
            int32_t u = nearest(fabsf(x[d]) * units);
            int level = v4_levels[8 + above(u, bounds[k])];
            product += u * level;
            square += level * level;
        }
        gain = (float)product * (float)product;
        gain /= (float)square;
        if (gain > most) {
            most = gain;
            step = (float)product / (float)square;
        }
    }
    if (largest >= 0x1p-100f) {
        *scale = check_to_f16(step * largest / 126.0f, 0);
        *scale = *scale == 0 ? 1 : *scale;
    }
    reciprocal = *scale ? 2.0f / (float)check_f16_value(*scale) : 0.0f;
    for (size_t d = 0; d < dims; d++) {
        unsigned m = above(nearest(fminf(fabsf(x[d]) * reciprocal, 127.0f)), bounds[0]);
        codes[d] = signbit(x[d]) ? 7 - m : 8 + m;
    }
}

static void row_v5(const float *x, float unit, size_t dims, unsigned *codes, uint16_t *scale)
{
    volatile float factor, multiple;
    float largest = 0.0f;
    for (size_t d = 0; d < dims; d++)
        largest = fmaxf(largest, fabsf(x[d] * unit));
    *scale = check_to_f16(largest / 31.0f, 1);
    factor = *scale ? 0.5f / (float)check_f16_value(*scale) : 0.0f;
    factor *= unit;
    for (size_t d = 0; d < dims; d++) {
        multiple = x[d] * factor;
        codes[d] = (unsigned)nearest(multiple + 15.5f);
    }
}

typedef enum unfused { FUSED, SQUARE_UNFUSED, PRODUCT_UNFUSED, UNFUSED_KINDS } unfused;

static float multiply_add(float a, float b, float c, int fused)
{
    volatile float product = a * b;
    return fused ? fmaf(a, b, c) : product + c;
}

/* Codes of a row of w = x + delta, and its gain. */
static unsigned row_k4(const float *w, const float *along, const uint16_t *scales, size_t dims,
                       unfused wrong, unsigned *codes)
{
    float square = 0.0f, product = 0.0f, gain = 0.0f;
    for (size_t d = 0; d < dims; d++) {
        float scale = (float)check_f16_value(scales[d]), key = w[d] + along[d];
        float v = scales[d] ? w[d] * (1.0f / scale) : 0.0f;
        codes[d] = (unsigned)nearest(fminf(fmaxf(v, -7.5f), 7.5f) + 7.5f);
        square = multiply_add(key, key, square, wrong != SQUARE_UNFUSED);
        product = multiply_add(((float)codes[d] - 7.5f) * scale + along[d], key, product,
                               wrong != PRODUCT_UNFUSED);
    }
    if (product > 0.0f)
        gain = (square / product - 1.0f) * 1024.0f;
    return (unsigned)nearest(fminf(fmaxf(gain + 128.0f, 1.0f), 255.0f));
}

/* ---- open blocks ---- */

static float open_at(int is_k, const uint16_t *open, const uint16_t *scales, size_t t, size_t d,
                     size_t dims_p)
{
    size_t at = is_k ? kvt_kw_index(t, d, dims_p) : kvt_vw_index(t, d, dims_p);
    return (float)check_f16_value(open[at]) * (float)check_f16_value(scales[t]);
}

/*
 * Rows of many sizes, zeros of both signs among them, and rows of one magnitude, which have the
 * largest sums; `wide` ones have scales other than 1.
 */
static void fill_open(check *c, int is_k, size_t dims, size_t dims_p, int wide, uint16_t *open,
                      uint16_t *scales)
{
    memset(open, 0, KVT_TOKENS * dims_p * 2);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        float size = ldexpf(1.0f, wide ? (int)check_below(c, 30) - 22 : 0);
        size_t zero = check_below(c, 12);
        scales[t] =
            wide && check_below(c, 2) ? (uint16_t)(0x3c00u + 0x400u * check_below(c, 5)) : 0x3c00u;
        for (size_t d = 0; d < dims; d++) {
            float x = check_normal(c) * size;
            x = zero == 0        ? copysignf(0.0f, x)
                : zero == 1 && d ? x * 0.01f
                : zero == 2      ? copysignf(size, x)
                                 : x;
            open[is_k ? kvt_kw_index(t, d, dims_p) : kvt_vw_index(t, d, dims_p)] =
                check_to_f16(x, 0);
        }
    }
}

static size_t some_dims(check *c, size_t i, size_t *dims_p)
{
    size_t dims = check_dims(i) - (check_below(c, 4) == 0 && check_dims(i) > 8 ? 8 : 0);
    *dims_p = kvt_round_up(dims, 16);
    return dims;
}

#define BENCH_DIMS 128

/* ---- sealing ---- */

typedef void seal_v_function(const void *, const uint16_t *, size_t, const void *, void *,
                             uint16_t *);
typedef void row_function(const float *, float, size_t, unsigned *, uint16_t *);

static void check_row_v(check *c, format f, const float *x, float unit, size_t dims, size_t dims_p,
                        size_t t, const unsigned char *codes, const uint16_t *scales)
{
    unsigned expected[MAX_DIMS];
    uint16_t scale;
    (f.bits == 4 ? row_v4 : row_v5)(x, unit, dims, expected, &scale);
    if (scale != scales[t])
        check_fail(c, "token %zu: scale %04x, not %04x; dims %zu", t, scales[t], scale, dims);
    for (size_t d = 0; d < dims; d++)
        if (code_at(f, codes, t, d, dims_p) != expected[d]) {
            check_fail(c, "token %zu, dim %zu of %zu: code %u, not %u, of %a with scale %04x", t, d,
                       dims, code_at(f, codes, t, d, dims_p), expected[d], (double)x[d], scale);
            return;
        }
}

static void check_seal_v(check *c, seal_v_function *kernel, format f)
{
    size_t bench_p = BENCH_DIMS;
    if (c->bench) {
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * bench_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 64);
        unsigned char *codes = check_buffer(c, 2, code_bytes(f, bench_p), 64);
        uint16_t *scales = check_buffer(c, 3, KVT_TOKENS * 2, 64);
        fill_open(c, 0, bench_p, bench_p, 0, open, open_scales);
        CHECK_BENCH(c, KVT_TOKENS * bench_p * 2,
                    kernel(open, open_scales, bench_p, NULL, codes, scales));
    }
    for (size_t i = 0; i < check_rounds(c, 300); i++) {
        size_t dims_p, dims = some_dims(c, i, &dims_p);
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
        unsigned char *codes = check_buffer(c, 2, code_bytes(f, dims_p), 64);
        uint16_t *scales = check_buffer(c, 3, KVT_TOKENS * 2, 2);
        float x[MAX_DIMS];
        fill_open(c, 0, dims, dims_p, i % 2, open, open_scales);
        for (size_t t = 0; f.bits == 5 && i % 4 == 1 && t < KVT_TOKENS; t++) /* open again */
            if (check_below(c, 4))
                open_scales[t] = (uint16_t)check_below(c, check_below(c, 2) ? 0x400u : 0x4000u);
        check_fill_nan(codes, code_bytes(f, dims_p));
        check_fill_nan(scales, KVT_TOKENS * 2);
        kernel(open, open_scales, dims_p, i % 3 ? NULL : codes, codes, scales);
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            for (size_t d = 0; d < dims_p; d++)
                x[d] = (float)check_f16_value(open[kvt_vw_index(t, d, dims_p)]);
            check_row_v(c, f, x, (float)check_f16_value(open_scales[t]), dims_p, dims_p, t, codes,
                        scales);
        }
        check_canaries(c);
    }
}

void check_seal_v_i4(check *c, seal_v_function *kernel)
{
    check_seal_v(c, kernel, V4);
}

void check_seal_v_i5(check *c, seal_v_function *kernel)
{
    check_seal_v(c, kernel, V5);
}

void check_range_k_f16(check *c, void (*kernel)(const void *, const uint16_t *, uint64_t, size_t,
                                                float *, float *))
{
    size_t bench_p = BENCH_DIMS;
    if (c->bench) {
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * bench_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 64);
        float *lo = check_buffer(c, 2, bench_p * 4, 64), *hi = check_buffer(c, 3, bench_p * 4, 64);
        fill_open(c, 1, bench_p, bench_p, 0, open, open_scales);
        CHECK_BENCH(c, KVT_TOKENS * bench_p * 2, kernel(open, open_scales, 0, bench_p, lo, hi));
    }
    for (size_t i = 0; i < check_rounds(c, 300); i++) {
        size_t dims_p, dims = some_dims(c, i, &dims_p);
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
        float *lo = check_buffer(c, 2, dims_p * 4, 4), *hi = check_buffer(c, 3, dims_p * 4, 4);
        uint64_t left_out = i % 4 ? 0 : check_random(c) & check_random(c);
        if (i % 16 == 4)
            left_out = ~((uint64_t)1 << check_below(c, 64));
        fill_open(c, 1, dims, dims_p, i % 2, open, open_scales);
        check_fill_nan(lo, dims_p * 4);
        check_fill_nan(hi, dims_p * 4);
        kernel(open, open_scales, left_out, dims_p, lo, hi);
        for (size_t d = 0; d < dims_p; d++) {
            float least = INFINITY, most = -INFINITY;
            for (size_t t = 0; t < KVT_TOKENS; t++) {
                float x = open_at(1, open, open_scales, t, d, dims_p);
                least = left_out >> t & 1 ? least : fminf(least, x);
                most = left_out >> t & 1 ? most : fmaxf(most, x);
            }
            if (!(lo[d] == least && hi[d] == most))
                check_fail(c, "dim %zu of %zu: %a to %a, not %a to %a; left out %llx", d, dims_p,
                           (double)lo[d], (double)hi[d], (double)least, (double)most,
                           (unsigned long long)left_out);
        }
        check_canaries(c);
    }
}

typedef void seal_k_function(const void *, const uint16_t *, const float *, const float *,
                             const uint16_t *, size_t, const void *, void *, uint8_t *);

/* Scales and offsets that the open block's range asks for. */
static void choose_k(const uint16_t *open, const uint16_t *open_scales, size_t dims_p,
                     uint16_t *scales, float *delta)
{
    for (size_t d = 0; d < dims_p; d++) {
        float lo = INFINITY, hi = -INFINITY, middle;
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            lo = fminf(lo, open_at(1, open, open_scales, t, d, dims_p));
            hi = fmaxf(hi, open_at(1, open, open_scales, t, d, dims_p));
        }
        middle = (float)check_f16_value(check_to_f16(0.5f * (lo + hi), 0));
        scales[d] = check_to_f16(fmaxf(hi - middle, middle - lo) / 7.5f, 1);
        delta[d] = -middle;
    }
}

/* gains_differ: by what is not fused, tokens whose gain would be another one. */
static void check_sealed_k(check *c, const uint16_t *open, const uint16_t *open_scales,
                           const float *delta, const float *along, const uint16_t *scales,
                           size_t dims_p, const unsigned char *codes, const uint8_t *gains,
                           size_t *gains_differ)
{
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        unsigned expected[MAX_DIMS], gain;
        float w[MAX_DIMS];
        for (size_t d = 0; d < dims_p; d++)
            w[d] = open_at(1, open, open_scales, t, d, dims_p) + delta[d];
        gain = row_k4(w, along, scales, dims_p, FUSED, expected);
        if (gain != gains[t])
            check_fail(c, "token %zu: gain %u, not %u; dims_p %zu", t, gains[t], gain, dims_p);
        for (size_t d = 0; d < dims_p; d++)
            if (code_at(K4, codes, t, d, dims_p) != expected[d]) {
                check_fail(c, "token %zu, dim %zu of %zu: code %u, not %u, of %a with scale %04x",
                           t, d, dims_p, code_at(K4, codes, t, d, dims_p), expected[d],
                           (double)w[d], scales[d]);
                break;
            }
        for (int wrong = SQUARE_UNFUSED; wrong < UNFUSED_KINDS; wrong++)
            gains_differ[wrong] +=
                row_k4(w, along, scales, dims_p, (unfused)wrong, expected) != gain;
    }
}

static int all_differ(const size_t *differ)
{
    for (size_t wrong = SQUARE_UNFUSED; wrong < UNFUSED_KINDS; wrong++)
        if (differ[wrong] == 0)
            return 0;
    return 1;
}

void check_seal_k_i4(check *c, seal_k_function *kernel)
{
    size_t bench_p = BENCH_DIMS, differ[UNFUSED_KINDS] = {0};
    if (c->bench) {
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * bench_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 64);
        float *delta = check_buffer(c, 2, bench_p * 4, 64);
        float *along = check_buffer(c, 5, bench_p * 4, 64);
        uint16_t *scales = check_buffer(c, 3, bench_p * 2, 64);
        unsigned char *codes = check_buffer(c, 4, code_bytes(K4, bench_p), 64);
        uint8_t *gains = check_buffer(c, 6, KVT_TOKENS, 64);
        fill_open(c, 1, bench_p, bench_p, 0, open, open_scales);
        choose_k(open, open_scales, bench_p, scales, delta);
        memset(along, 0, bench_p * 4);
        CHECK_BENCH(c, KVT_TOKENS * bench_p * 2,
                    kernel(open, open_scales, delta, along, scales, bench_p, NULL, codes, gains));
    }
    /* The rarest of what has to be seen takes hundreds of blocks, or thousands. */
    for (size_t i = 0; i < 20000 && (i < check_rounds(c, 2000) || !all_differ(differ)); i++) {
        size_t dims_p, dims = some_dims(c, i, &dims_p);
        uint16_t *open = check_buffer(c, 0, KVT_TOKENS * dims_p * 2, 64);
        uint16_t *open_scales = check_buffer(c, 1, KVT_TOKENS * 2, 2);
        float *delta = check_buffer(c, 2, dims_p * 4, 4);
        float *along = check_buffer(c, 5, dims_p * 4, 4);
        uint16_t *scales = check_buffer(c, 3, dims_p * 2, 2);
        unsigned char *codes = check_buffer(c, 4, code_bytes(K4, dims_p), 64);
        uint8_t *gains = check_buffer(c, 6, KVT_TOKENS, 1);
        fill_open(c, 1, dims, dims_p, i % 2, open, open_scales);
        choose_k(open, open_scales, dims_p, scales, delta);
        for (size_t d = 0; i % 5 == 4 && d < dims; d++) /* a range that was kept, or is zero */
            if (check_below(c, 3) == 0)
                delta[d] += (float)check_f16_value(scales[d]) * (check_below(c, 2) ? 0.25f : 3.0f);
        memset(along, 0, dims_p * 4);
        for (size_t d = 0; d < dims; d++) /* none, some, or larger than the row */
            along[d] = i % 3 == 0   ? 0.0f
                       : i % 3 == 1 ? check_normal(c) * (float)check_f16_value(scales[d])
                                    : check_normal(c) * (float)check_f16_value(scales[d]) * 30.0f;
        check_fill_nan(codes, code_bytes(K4, dims_p));
        check_fill_nan(gains, KVT_TOKENS);
        kernel(open, open_scales, delta, along, scales, dims_p, i % 3 ? NULL : codes, codes, gains);
        check_sealed_k(c, open, open_scales, delta, along, scales, dims_p, codes, gains, differ);
        check_canaries(c);
    }
    for (size_t wrong = SQUARE_UNFUSED; wrong < UNFUSED_KINDS; wrong++)
        if (differ[wrong] == 0)
            check_fail(c, "no row shows whether FMA %zu is one", wrong);
}

void check_gain_k(check *c, void (*kernel)(float *, size_t, const uint8_t *, const float *))
{
    if (c->bench) {
        float *s = check_buffer(c, 0, 4 * KVT_TOKENS * 4, 64), *add = check_buffer(c, 2, 16, 4);
        uint8_t *gains = check_buffer(c, 1, KVT_TOKENS, 64);
        memset(s, 0, 4 * KVT_TOKENS * 4);
        memset(add, 0, 16);
        memset(gains, 128, KVT_TOKENS);
        CHECK_BENCH(c, 4 * KVT_TOKENS * 4, kernel(s, 4, gains, add));
    }
    for (size_t i = 0; i < check_rounds(c, 1000); i++) {
        size_t rows = 1 + i % KVT_ROWS_MAX;
        float *s = check_buffer(c, 0, rows * KVT_TOKENS * 4, 64);
        float *before = check_buffer(c, 3, rows * KVT_TOKENS * 4, 64);
        float *add = check_buffer(c, 2, rows * 4, 4);
        uint8_t *gains = check_buffer(c, 1, KVT_TOKENS, 1);
        check_fill(c, s, rows * KVT_TOKENS, (check_kind)(i % CHECK_KINDS), 1e30f);
        check_fill(c, add, rows, (check_kind)(i / CHECK_KINDS % CHECK_KINDS), 1e30f);
        for (size_t t = 0; t < KVT_TOKENS; t++)
            gains[t] = (uint8_t)check_below(c, 256);
        memcpy(before, s, rows * KVT_TOKENS * 4);
        kernel(s, rows, gains, add);
        for (size_t r = 0; r < rows; r++)
            for (size_t t = 0; t < KVT_TOKENS; t++) {
                float sum = before[r * KVT_TOKENS + t] + add[r];
                float expected = sum * (1.0f + ((float)gains[t] - 128.0f) / 1024.0f);
                if (memcmp(&s[r * KVT_TOKENS + t], &expected, 4) != 0)
                    check_fail(c, "%a, not %a: row %zu, token %zu", (double)s[r * KVT_TOKENS + t],
                               (double)expected, r, t);
            }
        check_canaries(c);
    }
}

/* ---- storing and reading single tokens ---- */

typedef int put_function(const float *, size_t, size_t, size_t, size_t, void *, uint16_t *, size_t);

static void check_put_v(check *c, put_function *kernel, format f)
{
    if (c->bench) {
        float *x = check_buffer(c, 0, 16 * BENCH_DIMS * 4, 64);
        unsigned char *codes = check_buffer(c, 1, code_bytes(f, BENCH_DIMS), 64);
        uint16_t *scales = check_buffer(c, 2, KVT_TOKENS * 2, 64);
        check_fill(c, x, 16 * BENCH_DIMS, CHECK_NORMAL, 0);
        CHECK_BENCH(c, 16 * BENCH_DIMS * 4,
                    kernel(x, BENCH_DIMS, 16, BENCH_DIMS, BENCH_DIMS, codes, scales, 0));
    }
    for (size_t i = 0; i < check_rounds(c, 600); i++) {
        size_t dims_p, dims = some_dims(c, i, &dims_p);
        size_t slot = check_below(c, KVT_TOKENS), n = 1 + check_below(c, 16 - slot % 16);
        size_t ldx = dims + check_below(c, 3);
        float *x = check_buffer(c, 0, ((n - 1) * ldx + dims) * 4, 4);
        unsigned char *codes = check_buffer(c, 1, code_bytes(f, dims_p), 64);
        unsigned char *before = check_buffer(c, 2, code_bytes(f, dims_p), 64);
        uint16_t *scales = check_buffer(c, 3, KVT_TOKENS * 2, 2);
        check_kind kind = (check_kind)(i % CHECK_KINDS);
        for (size_t j = 0; j < code_bytes(f, dims_p); j++)
            codes[j] = (unsigned char)check_random(c);
        memcpy(before, codes, code_bytes(f, dims_p));
        check_fill_nan(scales, KVT_TOKENS * 2);
        check_fill(c, x, (n - 1) * ldx + dims, kind, 1.0e6f);
        for (size_t j = 0; kind == CHECK_SPREAD && j < (n - 1) * ldx + dims; j++)
            x[j] *= 0.125f; /* 31 * 65504 is the largest that fits */
        if (!kernel(x, ldx, n, dims, dims_p, codes, scales, slot)) {
            check_fail(c, "refused numbers that fit: kind %d", (int)kind);
            continue;
        }
        for (size_t t = 0; t < KVT_TOKENS; t++) {
            if (t >= slot && t < slot + n) {
                check_row_v(c, f, x + (t - slot) * ldx, 1.0f, dims, dims_p, t, codes, scales);
                continue;
            }
            for (size_t d = 0; d < dims_p; d++)
                if (code_at(f, codes, t, d, dims_p) != code_at(f, before, t, d, dims_p))
                    check_fail(c, "wrote token %zu beside %zu + %zu", t, slot, n);
            if (scales[t] != 0xffffu)
                check_fail(c, "wrote the scale of token %zu beside %zu + %zu", t, slot, n);
        }
        x[check_below(c, dims)] = i % 2 ? NAN : i % 4 ? INFINITY : 1.0e7f;
        if (kernel(x, ldx, n, dims, dims_p, codes, scales, slot))
            check_fail(c, "took a number that does not fit");
        check_canaries(c);
    }
}

void check_put_v_i4(check *c, put_function *kernel)
{
    check_put_v(c, kernel, V4);
}

void check_put_v_i5(check *c, put_function *kernel)
{
    check_put_v(c, kernel, V5);
}

/* Random codes and scales; of K scales are by dims. NaNs as scales of dead tokens. */
static void fill_codes(check *c, format f, size_t n_tokens, size_t dims, size_t dims_p,
                       unsigned char *codes, uint16_t *scales, double *values)
{
    size_t n_scales = f.is_k ? dims_p : KVT_TOKENS;
    for (size_t j = 0; j < code_bytes(f, dims_p); j++)
        codes[j] = (unsigned char)check_random(c);
    for (size_t j = 0; j < n_scales; j++) { /* 2^-10 to 2^5 */
        scales[j] = (uint16_t)(0x1400u + check_below(c, 0x3c00u));
        if (f.is_k && j >= dims)
            scales[j] = 0;
        if (!f.is_k && j >= n_tokens)
            scales[j] = (uint16_t)(0x7c01u + check_below(c, 0x300u));
    }
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t d = 0; d < dims_p; d++)
            values[t * dims_p + d] = value_of(f, code_at(f, codes, t, d, dims_p)) *
                                     (double)check_f16_value(scales[f.is_k ? d : t]);
}

static double values[KVT_TOKENS * MAX_DIMS];

typedef void get_function(const void *, const uint16_t *, size_t, size_t, size_t, float *);

static void check_get(check *c, get_function *kernel, format f)
{
    if (c->bench) {
        unsigned char *codes = check_buffer(c, 0, code_bytes(f, BENCH_DIMS), 64);
        uint16_t *scales = check_buffer(c, 1, BENCH_DIMS * 2, 64);
        float *x = check_buffer(c, 2, BENCH_DIMS * 4, 64);
        fill_codes(c, f, KVT_TOKENS, BENCH_DIMS, BENCH_DIMS, codes, scales, values);
        CHECK_BENCH(c, BENCH_DIMS * 4, kernel(codes, scales, 17, BENCH_DIMS, BENCH_DIMS, x));
    }
    for (size_t i = 0; i < check_rounds(c, 600); i++) {
        size_t dims_p, dims = some_dims(c, i, &dims_p), slot = check_below(c, KVT_TOKENS);
        unsigned char *codes = check_buffer(c, 0, code_bytes(f, dims_p), 64);
        uint16_t *scales = check_buffer(c, 1, (f.is_k ? dims_p : KVT_TOKENS) * 2, 2);
        float *x = check_buffer(c, 2, dims * 4, 4);
        fill_codes(c, f, KVT_TOKENS, dims, dims_p, codes, scales, values);
        kernel(codes, scales, slot, dims, dims_p, x);
        for (size_t d = 0; d < dims; d++)
            if ((double)x[d] != values[slot * dims_p + d])
                check_fail(c, "token %zu, dim %zu of %zu: %a, not %a", slot, d, dims, (double)x[d],
                           values[slot * dims_p + d]);
        check_canaries(c);
    }
}

void check_get_k_i4(check *c, get_function *kernel)
{
    check_get(c, kernel, K4);
}

void check_get_v_i4(check *c, get_function *kernel)
{
    check_get(c, kernel, V4);
}

void check_get_v_i5(check *c, get_function *kernel)
{
    check_get(c, kernel, V5);
}

/* ---- products ---- */

static size_t token_count(check *c, size_t i)
{
    static const size_t counts[] = {64, 1, 15, 16, 17, 63, 7, 8, 9, 33, 31, 32, 47, 49};
    return i < sizeof counts / sizeof counts[0] ? counts[i] : 1 + check_below(c, KVT_TOKENS);
}

static const void *next_of(check *c, const unsigned char *codes)
{
    switch (check_below(c, 3)) {
    case 0: return NULL;
    case 1: return codes;
    default: return (const void *)(uintptr_t)64;
    }
}

typedef void qk_function(const float *, size_t, size_t, const void *, const uint16_t *, size_t,
                         size_t, const void *, float *);

static void check_qk(check *c, qk_function *kernel, int near)
{
    if (c->bench) {
        float *q = check_buffer(c, 0, 4 * BENCH_DIMS * 4, 64), *s = check_buffer(c, 3, 1024, 64);
        unsigned char *codes = check_buffer(c, 1, code_bytes(K4, BENCH_DIMS), 64);
        uint16_t *scales = check_buffer(c, 2, BENCH_DIMS * 2, 64);
        check_fill(c, q, 4 * BENCH_DIMS, CHECK_NORMAL, 0);
        fill_codes(c, K4, KVT_TOKENS, BENCH_DIMS, BENCH_DIMS, codes, scales, values);
        CHECK_BENCH(c, code_bytes(K4, BENCH_DIMS),
                    kernel(q, BENCH_DIMS, 4, codes, scales, 64, BENCH_DIMS, NULL, s));
    }
    for (size_t i = 0; i < check_rounds(c, 400); i++) {
        size_t dims_p, dims = some_dims(c, check_below(c, CHECK_N_DIMS), &dims_p);
        size_t rows = i % KVT_ROWS_MAX + 1, n_tokens = token_count(c, i);
        size_t ldq = dims_p + 16 * check_below(c, 3);
        check_kind kind = i < check_rounds(c, 200) ? CHECK_NORMAL : (check_kind)(i % CHECK_KINDS);
        float *q = check_buffer(c, 0, ((rows - 1) * ldq + dims_p) * 4, 64);
        unsigned char *codes = check_buffer(c, 1, code_bytes(K4, dims_p), 64);
        uint16_t *scales = check_buffer(c, 2, dims_p * 2, 64);
        float *s = check_buffer(c, 5, rows * KVT_TOKENS * 4, 64);

        fill_codes(c, K4, n_tokens, dims, dims_p, codes, scales, values);
        check_fill(c, q, (rows - 1) * ldq + dims_p, kind, 1e30f);
        if (i % 20 == 19) { /* the largest sums there are */
            memset(codes, 0xff, code_bytes(K4, dims_p));
            for (size_t j = 0; j < (rows - 1) * ldq + dims_p; j++)
                q[j] = 3.0f / (float)check_f16_value(scales[0]);
            for (size_t d = 0; d < dims; d++)
                scales[d] = scales[0];
            for (size_t j = 0; j < n_tokens * dims_p; j++)
                values[j] = j % dims_p < dims ? 7.5 * (double)check_f16_value(scales[0]) : 0;
        }
        for (size_t r = 0; r < rows; r++)
            memset(q + r * ldq + dims, 0, (dims_p - dims) * 4);
        check_fill_nan(s, rows * KVT_TOKENS * 4);
        kernel(q, ldq, rows, codes, scales, n_tokens, dims_p, next_of(c, codes), s);
        for (size_t r = 0; r < rows; r++) {
            double largest = 0x1p-100;
            for (size_t d = 0; d < dims; d++)
                largest = fmax(largest, fabs(q[r * ldq + d] * (double)check_f16_value(scales[d])));
            for (size_t t = 0; t < n_tokens; t++) {
                double sum = 0, size = 0, spread = 0, x = s[r * KVT_TOKENS + t], bound;
                for (size_t d = 0; d < dims; d++) {
                    double term = q[r * ldq + d] * values[t * dims_p + d];
                    sum += term;
                    size += fabs(term);
                    spread += fabs(value_of(K4, code_at(K4, codes, t, d, dims_p)));
                }
                /* Products, sums in chunks; half a step of q an element, and its roundings. */
                bound = (64 + 2 + (double)dims_p / 16 + 4) * CHECK_EPS * size + 0x1p-140;
                if (near)
                    bound = 0.5001 * largest / STEPS * spread + 16 * CHECK_EPS * size + 0x1p-140;
                if (!(fabs(x - sum) <= bound))
                    check_fail(c,
                               "%a, not %a (bound %g): row %zu of %zu, token %zu of %zu, dims %zu",
                               x, sum, bound, r, rows, t, n_tokens, dims);
            }
        }
        for (size_t first = 0, n; first < rows; first += n) { /* alone, and among others */
            n = check_below(c, 2) ? 1 : 1 + check_below(c, rows - first);
            float *part = check_buffer(c, 3, n * KVT_TOKENS * 4, 64);
            float *copy = check_buffer(c, 4, n * dims_p * 4, 64);
            for (size_t r = 0; r < n; r++)
                memcpy(copy + r * dims_p, q + (first + r) * ldq, dims_p * 4);
            kernel(copy, dims_p, n, codes, scales, n_tokens, dims_p, NULL, part);
            for (size_t r = 0; r < n; r++)
                if (!check_same_bits(part + r * KVT_TOKENS, s + (first + r) * KVT_TOKENS, n_tokens))
                    check_fail(c, "row %zu of %zu depends on the others: dims_p %zu, n_tokens %zu",
                               first + r, rows, dims_p, n_tokens);
        }
        check_canaries(c);
    }
}

void check_qk_i4(check *c, qk_function *kernel)
{
    check_qk(c, kernel, 0);
}

/* q[d] * scales[d] beyond f32: all scores of the row are NaN, and those of no other row. */
static void check_qk_not_finite(check *c, qk_function *kernel)
{
    for (size_t i = 0; i < 200; i++) {
        size_t dims_p, dims = some_dims(c, check_below(c, CHECK_N_DIMS), &dims_p);
        size_t rows = i % KVT_ROWS_MAX + 1, bad = check_below(c, rows),
               n_tokens = token_count(c, i);
        float *q = check_buffer(c, 0, rows * dims_p * 4, 64);
        unsigned char *codes = check_buffer(c, 1, code_bytes(K4, dims_p), 64);
        uint16_t *scales = check_buffer(c, 2, dims_p * 2, 64);
        float *s = check_buffer(c, 5, rows * KVT_TOKENS * 4, 64);
        fill_codes(c, K4, n_tokens, dims, dims_p, codes, scales, values);
        check_fill(c, q, rows * dims_p, CHECK_NORMAL, 0);
        for (size_t r = 0; r < rows; r++)
            memset(q + r * dims_p + dims, 0, (dims_p - dims) * 4);
        for (size_t j = 0; j < 1 + i % 3; j++) {
            size_t d = check_below(c, dims);
            scales[d] = 0x5640; /* 100 */
            q[bad * dims_p + d] = i % 2 ? -1e38f : 3e38f;
        }
        kernel(q, dims_p, rows, codes, scales, n_tokens, dims_p, next_of(c, codes), s);
        for (size_t r = 0; r < rows; r++)
            for (size_t t = 0; t < n_tokens; t++)
                if (isnan(s[r * KVT_TOKENS + t]) != (r == bad))
                    check_fail(c, "%a: row %zu of %zu, not finite: row %zu, token %zu of %zu",
                               (double)s[r * KVT_TOKENS + t], r, rows, bad, t, n_tokens);
        check_canaries(c);
    }
}

void check_qk_i4_near(check *c, qk_function *kernel)
{
    check_qk(c, kernel, 1);
    check_qk_not_finite(c, kernel);
}

static void check_pv(check *c, check_pv_function *kernel, format f, int near)
{
    if (c->bench) {
        float *p = check_buffer(c, 0, 4 * KVT_TOKENS * 4, 64);
        float *acc = check_buffer(c, 3, 4 * BENCH_DIMS * 4, 64);
        unsigned char *codes = check_buffer(c, 1, code_bytes(f, BENCH_DIMS), 64);
        uint16_t *scales = check_buffer(c, 2, KVT_TOKENS * 2, 64);
        static const float alpha[4] = {1, 1, 0.5f, 1};
        for (size_t j = 0; j < 4 * KVT_TOKENS; j++)
            p[j] = (float)check_below(c, 1000) / 1000.0f;
        fill_codes(c, f, KVT_TOKENS, BENCH_DIMS, BENCH_DIMS, codes, scales, values);
        memset(acc, 0, 4 * BENCH_DIMS * 4);
        CHECK_BENCH(c, code_bytes(f, BENCH_DIMS),
                    kernel(p, 4, codes, scales, 64, BENCH_DIMS, alpha, NULL, acc, BENCH_DIMS));
    }
    for (size_t i = 0; i < check_rounds(c, 400); i++) {
        size_t dims_p, dims = some_dims(c, check_below(c, CHECK_N_DIMS), &dims_p);
        size_t rows = i % KVT_ROWS_MAX + 1, n_tokens = token_count(c, i);
        size_t ldacc = dims_p + 16 * check_below(c, 2);
        float *p = check_buffer(c, 0, rows * KVT_TOKENS * 4, 64);
        unsigned char *codes = check_buffer(c, 1, code_bytes(f, dims_p), 64);
        uint16_t *scales = check_buffer(c, 2, KVT_TOKENS * 2, 64);
        float *acc = check_buffer(c, 5, ((rows - 1) * ldacc + dims_p) * 4, 64);
        float *before = check_buffer(c, 6, ((rows - 1) * ldacc + dims_p) * 4, 64);
        float *alpha = check_buffer(c, 7, rows * 4, 4);

        fill_codes(c, f, n_tokens, dims, dims_p, codes, scales, values);
        check_fill(c, acc, (rows - 1) * ldacc + dims_p, CHECK_NORMAL, 0);
        memcpy(before, acc, ((rows - 1) * ldacc + dims_p) * 4);
        memset(p, 0, rows * KVT_TOKENS * 4);
        for (size_t r = 0; r < rows; r++) {
            alpha[r] = check_below(c, 3) ? 1.0f : (float)check_below(c, 100) / 100.0f;
            for (size_t t = 0; t < n_tokens; t++) {
                float x = (float)check_below(c, 4096) / 4096.0f;
                p[r * KVT_TOKENS + t] = i % 4 == 0   ? expf(-24.0f * x)
                                        : i % 4 == 1 ? 1.0f
                                        : i % 7 == 0 ? 0.0f
                                        : i % 9 == 0 ? x * 0x1p-130f
                                                     : x;
            }
        }
        kernel(p, rows, codes, scales, n_tokens, dims_p, alpha, next_of(c, codes), acc, ldacc);
        for (size_t r = 0; r < rows; r++) {
            double largest = 0x1p-100;
            for (size_t t = 0; t < n_tokens; t++)
                largest = fmax(largest, p[r * KVT_TOKENS + t] * (double)check_f16_value(scales[t]));
            for (size_t d = 0; d < dims_p; d++) {
                double old = (double)before[r * ldacc + d] * alpha[r], sum = 0, size = 0;
                double spread = 0, x = acc[r * ldacc + d], bound;
                for (size_t t = 0; t < n_tokens; t++) {
                    double term = p[r * KVT_TOKENS + t] * values[t * dims_p + d];
                    sum += term;
                    size += fabs(term);
                    spread += fabs(value_of(f, code_at(f, codes, t, d, dims_p)));
                }
                bound = (KVT_TOKENS + 6) * CHECK_EPS * (size + fabs(old)) + 0x1p-140;
                if (near)
                    bound = CHECK_OFF * largest / STEPS * spread +
                            16 * CHECK_EPS * (size + fabs(old)) + 0x1p-140;
                if (!(fabs(x - (old + sum)) <= bound))
                    check_fail(c,
                               "%a, not %a (bound %g): row %zu of %zu, dim %zu of %zu, tokens %zu",
                               x, old + sum, bound, r, rows, d, dims_p, n_tokens);
            }
        }
        for (size_t r = 0; r < rows; r++) { /* alone */
            float *alone = check_buffer(c, 3, dims_p * 4, 64);
            float *weights = check_buffer(c, 4, KVT_TOKENS * 4, 64);
            memcpy(alone, before + r * ldacc, dims_p * 4);
            memcpy(weights, p + r * KVT_TOKENS, KVT_TOKENS * 4);
            kernel(weights, 1, codes, scales, n_tokens, dims_p, alpha + r, NULL, alone, dims_p);
            if (!check_same_bits(alone, acc + r * ldacc, dims_p))
                check_fail(c, "row %zu of %zu depends on the others: dims_p %zu, n_tokens %zu", r,
                           rows, dims_p, n_tokens);
        }
        check_canaries(c);
    }
}

void check_pv_i4(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, V4, 0);
}

void check_pv_i4_near(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, V4, 1);
    check_one_digit(c, kernel, code_bytes(V4, 32), 0xff, 63);
}

void check_pv_i5(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, V5, 0);
}

void check_pv_i5_near(check *c, check_pv_function *kernel)
{
    check_pv(c, kernel, V5, 1);
    check_one_digit(c, kernel, code_bytes(V5, 32), 0xff, 31);
}
