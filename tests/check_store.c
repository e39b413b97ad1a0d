/*
 * Checks of the kernels whose result is specified to the bit: conversions, rotation, put, get,
 * mean. The reference is the scalar table; scalar itself is checked against the formats'
 * definitions in check_data.c, or by properties.
 */
#include "check.h"

#define SCALAR kvt_kernels_scalar

/* ---- load ---- */

typedef int load_function(const void *, float *, size_t);

/*
 * Elements of `element` bytes, half of the time with one that is not finite: all exponent bits
 * set, and perhaps one bit of the mantissa and the sign.
 */
static void check_load(check *c, load_function *kernel, load_function *scalar, size_t element,
                       uint32_t exponent_mask, unsigned mantissa_bits)
{
    static const float bench_src[128];
    static float bench_dst[128];
    CHECK_BENCH(c, 128 * (element + 4), kernel(bench_src, bench_dst, 128));
    for (size_t i = 0; i < check_rounds(c, 3000); i++) {
        size_t n = i < 200 ? i % 50 + 1 : check_dims(i);
        unsigned char *src = check_buffer(c, 0, n * element, element);
        float *dst = check_buffer(c, 1, n * sizeof *dst, sizeof *dst);
        float expected[CHECK_MAX_DIMS];
        int finite = 1, answer;
        for (size_t j = 0; j < n; j++) {
            uint32_t bits;
            do
                bits = (uint32_t)(check_random(c) >> 32) & (element == 2 ? 0xffffu : 0xffffffffu);
            while ((bits & exponent_mask) == exponent_mask);
            memcpy(src + j * element, &bits, element); /* little-endian: the low bytes */
        }
        if (check_below(c, 2)) {
            uint32_t bits = exponent_mask;
            if (check_below(c, 2))
                bits |= 1u << check_below(c, mantissa_bits);
            if (check_below(c, 2))
                bits |= element == 2 ? 0x8000u : 0x80000000u;
            memcpy(src + check_below(c, n) * element, &bits, element);
            finite = 0;
        }
        answer = kernel(src, dst, n);
        if (answer != finite)
            check_fail(c, "answers %d, n %zu", answer, n);
        if (!finite)
            continue;
        scalar(src, expected, n);
        if (!check_same_bits(dst, expected, n))
            check_fail(c, "differs from scalar, n %zu", n);
        for (size_t j = 0; j < n && element == 2; j++) {
            uint16_t h;
            memcpy(&h, src + j * 2, 2);
            if ((long double)dst[j] !=
                (exponent_mask == 0x7c00u ? check_f16_value(h) : check_bf16_value(h)))
                check_fail(c, "%#x becomes %a", h, (double)dst[j]);
        }
    }
    check_canaries(c);
}

/* Every finite value of a 16-bit type. */
static void check_load_all(check *c, load_function *kernel, uint32_t exponent_mask,
                           long double (*value)(uint16_t))
{
    for (uint32_t first = 0; first < 65536 && !c->bench; first += 16) {
        uint16_t h[16];
        float x[16];
        if ((first & exponent_mask) == exponent_mask)
            continue;
        for (uint32_t i = 0; i < 16; i++)
            h[i] = (uint16_t)(first + i);
        if (!kernel(h, x, 16))
            check_fail(c, "%#x .. %#x are said not to be finite", first, first + 15);
        for (uint32_t i = 0; i < 16; i++)
            if ((long double)x[i] != value(h[i]) || (signbit(x[i]) != 0) != h[i] >> 15)
                check_fail(c, "%#x becomes %a", h[i], (double)x[i]);
    }
}

void check_load_f32(check *c, load_function *kernel)
{
    check_load(c, kernel, SCALAR.load_f32, 4, 0x7f800000u, 23);
}

void check_load_f16(check *c, load_function *kernel)
{
    check_load_all(c, kernel, 0x7c00u, check_f16_value);
    check_load(c, kernel, SCALAR.load_f16, 2, 0x7c00u, 10);
}

void check_load_bf16(check *c, load_function *kernel)
{
    check_load_all(c, kernel, 0x7f80u, check_bf16_value);
    check_load(c, kernel, SCALAR.load_bf16, 2, 0x7f80u, 7);
}

/* ---- store ---- */

typedef void store_function(const float *, void *, size_t);

void check_store_f32(check *c, store_function *kernel)
{
    static float x[128], y[128];
    CHECK_BENCH(c, 1024, kernel(x, y, 128));
    for (size_t n = 1; n < 600; n++) {
        float *src = check_buffer(c, 0, n * 4, 4);
        float *dst = check_buffer(c, 1, n * 4, 4);
        for (size_t i = 0; i < n; i++)
            src[i] = check_finite(c);
        kernel(src, dst, n);
        if (memcmp(src, dst, n * 4) != 0)
            check_fail(c, "differs, n %zu", n);
        check_canaries(c);
    }
}

static uint16_t saturated_f16(float x)
{
    uint16_t h = check_to_f16(x, 0);
    return (h & 0x7fffu) == 0x7c00u ? (uint16_t)(h - 1) : h;
}

static uint16_t saturated_bf16(float x)
{
    uint16_t h = check_to_bf16(x);
    return (h & 0x7fffu) == 0x7f80u ? (uint16_t)(h - 1) : h;
}

/* One value in all lanes and tails of the kernel, against the definition. */
static void check_store_16(check *c, store_function *kernel, const float *values, size_t n,
                           uint16_t (*expected)(float))
{
    float *src = check_buffer(c, 0, n * 4, 4);
    uint16_t *dst = check_buffer(c, 1, n * 2, 2);
    memcpy(src, values, n * 4);
    kernel(src, dst, n);
    for (size_t i = 0; i < n; i++)
        if (dst[i] != expected(values[i]))
            check_fail(c, "%a becomes %#x, not %#x", (double)values[i], dst[i],
                       expected(values[i]));
}

/* All values of the type, all ties between them, and the adjacent f32 of both; then at random. */
static void check_store_type(check *c, store_function *kernel, uint32_t infinity,
                             float (*value)(uint16_t), uint16_t (*expected)(float))
{
    float x[64];
    static uint16_t y[128];
    static float zeros[128];
    size_t n = 0;
    CHECK_BENCH(c, 128 * 6, kernel(zeros, y, 128));
    for (uint32_t h = 0; h < infinity; h++) {
        float low = value((uint16_t)h);
        float high = h + 1 < infinity ? value((uint16_t)(h + 1)) : 0.0f;
        float tie = low + (high - low) * 0.5f; /* exact: one more bit, and f32 has it */
        const float points[] = {low,
                                tie,
                                nextafterf(low, 1e38f),
                                nextafterf(tie, 0.0f),
                                nextafterf(tie, 1e38f),
                                nextafterf(high, 0.0f)};
        for (size_t i = 0; i < 6; i++) {
            x[n++] = check_below(c, 2) ? points[i] : -points[i];
            if (n == 61) { /* seven vectors and a tail */
                check_store_16(c, kernel, x, n, expected);
                n = 0;
            }
        }
    }
    for (size_t i = 0; i < check_rounds(c, 20000); i++) {
        n = 1 + check_below(c, 64);
        for (size_t j = 0; j < n; j++)
            x[j] = i % 2 ? check_finite(c) : ldexpf(check_normal(c), (int)check_below(c, 50) - 30);
        check_store_16(c, kernel, x, n, expected);
        if (i % 64 == 0)
            check_canaries(c);
    }
}

void check_store_f16(check *c, store_function *kernel)
{
    /* The conversion toward +infinity, which scales use, has no kernel of its own. */
    for (uint32_t h = 0; h < 0x7c00u && !c->bench; h++) {
        float low = kvt_f16_to_f32((uint16_t)h), high = kvt_f16_to_f32((uint16_t)(h + 1));
        const float points[] = {low, nextafterf(low, INFINITY), (low + high) * 0.5f,
                                nextafterf(high, 0.0f)};
        for (size_t i = 0; i < 4; i++)
            for (int up = 0; up < 2; up++)
                if (isfinite(points[i]) &&
                    (kvt_f32_to_f16_round(points[i], up) != check_to_f16(points[i], up) ||
                     kvt_f32_to_f16_round(-points[i], up) != check_to_f16(-points[i], up)))
                    check_fail(c, "tile.h: %a, up %d", (double)points[i], up);
    }
    for (size_t i = 0; i < check_rounds(c, 1000000) && !c->bench; i++) {
        float x = check_finite(c);
        if (kvt_f32_to_f16_round(x, 0) != check_to_f16(x, 0) ||
            kvt_f32_to_f16_round(x, 1) != check_to_f16(x, 1))
            check_fail(c, "tile.h: %a", (double)x);
    }
    check_store_type(c, kernel, 0x7c00u, kvt_f16_to_f32, saturated_f16);
}

void check_store_bf16(check *c, store_function *kernel)
{
    check_store_type(c, kernel, 0x7f80u, kvt_bf16_to_f32, saturated_bf16);
}

/* ---- rotation ---- */

typedef void unrotate_function(float *, const float *, size_t, size_t, float);
typedef void rotate_function(const float *, const float *, size_t, size_t, float, float *);

/* Rows as append brings them: one does not wait for the other. */
static void unrotate_rows(unrotate_function *kernel, float *x, const float *sign, size_t dims)
{
    for (size_t i = 0; i < 16; i++)
        kernel(x + i * dims, sign, dims, dims, 0.125f);
}

static void check_rotation(check *c, unrotate_function *kernel, unrotate_function *scalar)
{
    static float bench_x[16 * 128], bench_sign[128];
    CHECK_BENCH(c, 16 * 128 * 8, unrotate_rows(kernel, bench_x, bench_sign, 128));
    for (size_t i = 0; i < check_rounds(c, 40) * CHECK_N_DIMS; i++) {
        size_t dims = check_dims(i);
        for (size_t block = 1; dims % block == 0; block *= 2) {
            float *x = check_buffer(c, 0, dims * 4, 4);
            float *sign = check_buffer(c, 1, dims * 4, 4);
            float expected[CHECK_MAX_DIMS];
            float scale = ldexpf(1.0f, -(int)check_below(c, 10));
            check_fill(c, x, dims, (check_kind)(i / CHECK_N_DIMS % CHECK_KINDS), 3e38f);
            for (size_t d = 0; d < dims; d++)
                sign[d] = check_below(c, 2) ? 1.0f : -1.0f;
            memcpy(expected, x, dims * 4);
            scalar(expected, sign, dims, block, scale);
            kernel(x, sign, dims, block, scale);
            if (!check_same_bits(x, expected, dims))
                check_fail(c, "differs, dims %zu, block %zu", dims, block);
            check_canaries(c);
        }
    }
}

static rotate_function *rotate_kernel;

/* In place, as unrotate is. */
static void rotate_row(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    rotate_kernel(x, sign, dims, block, scale, x);
}

static void rotate_row_scalar(float *x, const float *sign, size_t dims, size_t block, float scale)
{
    SCALAR.rotate(x, sign, dims, block, scale, x);
}

void check_rotate(check *c, rotate_function *kernel)
{
    rotate_kernel = kernel;
    check_rotation(c, rotate_row, rotate_row_scalar);
    /* Into another row; and what is not finite makes all of its block so. */
    for (size_t i = 0; i < check_rounds(c, 10) * CHECK_N_DIMS; i++) {
        size_t dims = check_dims(i);
        for (size_t block = 1; dims % block == 0; block *= 2) {
            float *x = check_buffer(c, 0, dims * 4, 4), *sign = check_buffer(c, 1, dims * 4, 4);
            float *y = check_buffer(c, 2, dims * 4, 4), kept[CHECK_MAX_DIMS];
            float expected[CHECK_MAX_DIMS];
            const float bad[] = {INFINITY, -INFINITY, NAN, -NAN};
            size_t first = dims; /* of the block that is not finite */
            for (size_t d = 0; d < dims; d++) {
                x[d] = check_below(c, 10) ? check_finite(c) : 1.0f;
                x[d] = fabsf(x[d]) > 1e30f ? 1.0f : x[d];
                sign[d] = check_below(c, 2) ? 1.0f : -1.0f;
            }
            if (check_below(c, 3) == 0) {
                first = check_below(c, dims);
                x[first] = bad[check_below(c, 4)];
                first = first / block * block;
            }
            memcpy(kept, x, dims * 4);
            SCALAR.rotate(x, sign, dims, block, 0.5f, expected);
            kernel(x, sign, dims, block, 0.5f, y);
            if (!check_same_bits(x, kept, dims))
                check_fail(c, "writes its input, dims %zu, block %zu", dims, block);
            for (size_t d = 0; d < dims; d++)
                if (first <= d && d < first + block ? isfinite(y[d]) || isfinite(expected[d])
                                                    : !check_same_bits(y + d, expected + d, 1))
                    check_fail(c, "dims %zu, block %zu, dim %zu: %a, not %a", dims, block, d,
                               (double)y[d], (double)expected[d]);
            check_canaries(c);
        }
    }
}

void check_unrotate(check *c, unrotate_function *kernel)
{
    check_rotation(c, kernel, SCALAR.unrotate);
    /* The two are inverses, and rotate is the transform: its norm grows by sqrt(block). */
    for (size_t i = 0; i < check_rounds(c, 10) * CHECK_N_DIMS && !c->bench; i++) {
        size_t dims = check_dims(i), block = dims & (~dims + 1);
        float x[CHECK_MAX_DIMS], y[CHECK_MAX_DIMS], sign[CHECK_MAX_DIMS];
        double before = 0, after = 0, error = 0;
        check_fill(c, x, dims, CHECK_NORMAL, 0);
        for (size_t d = 0; d < dims; d++)
            sign[d] = check_below(c, 2) ? 1.0f : -1.0f;
        memcpy(y, x, sizeof x);
        SCALAR.rotate(y, sign, dims, block, 1.0f, y);
        for (size_t d = 0; d < dims; d++) {
            before += (double)x[d] * x[d];
            after += (double)y[d] * y[d] / (double)block;
        }
        kernel(y, sign, dims, block, 1.0f / (float)block);
        for (size_t d = 0; d < dims; d++)
            error += ((double)y[d] - x[d]) * ((double)y[d] - x[d]);
        if (fabs(after / before - 1) > 1e-5 || error > 1e-12 * before)
            check_fail(c, "no inverse, dims %zu", dims);
    }
}

/* ---- put and get ---- */

typedef int put_function(const float *, size_t, size_t, size_t, size_t, void *, uint16_t *, size_t);
typedef void get_function(const void *, const uint16_t *, size_t, size_t, size_t, float *);

/* A side and a type: the index of an element, and the largest value that can be stored. */
typedef struct storage {
    size_t (*index)(size_t token, size_t dim, size_t dims);
    size_t element;
    float limit; /* a value that just fits; 1.01 of it does not */
} storage;

static const storage k_f32 = {kvt_kw_index, 4, 3e38f}, v_f32 = {kvt_vw_index, 4, 3e38f};
static const storage k_f16 = {kvt_kw_index, 2, 65519.0f}, v_f16 = {kvt_vw_index, 2, 65519.0f};
static const storage k_i8 = {kvt_k8_index, 1, 127 * 65504.0f};
static const storage v_i8 = {kvt_v8_index, 1, 127 * 65504.0f};

/* Random codes of a valid block: padding zero, all elements finite. */
static void fill_codes(check *c, const storage *s, unsigned char *codes, size_t dims, size_t dims_p)
{
    memset(codes, 0, KVT_TOKENS * dims_p * s->element);
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; d < dims; d++) {
            unsigned char *at = codes + s->index(t, d, dims_p) * s->element;
            float x = check_finite(c);
            uint16_t h = check_finite_f16(c);
            if (s->element == 4)
                memcpy(at, &x, 4);
            else
                memcpy(at, &h, s->element);
        }
}

/* The rows stored in `codes` must be x: exactly, rounded, or within half a code. */
static void check_stored(check *c, const storage *s, const float *x, size_t ldx, size_t n,
                         size_t dims, size_t dims_p, const unsigned char *codes,
                         const uint16_t *scales, size_t slot)
{
    for (size_t i = 0; i < n; i++)
        for (size_t d = 0; d < dims; d++) {
            const unsigned char *at = codes + s->index(slot + i, d, dims_p) * s->element;
            float value = x[i * ldx + d], back;
            uint16_t half;
            int good;
            if (s->element == 4) {
                memcpy(&back, at, 4);
                good = check_same_bits(&back, &value, 1);
            } else if (s->element == 2) {
                memcpy(&half, at, 2);
                good = half == check_to_f16(value, 0);
            } else {
                /* Two roundings of x / scale, up to 127.5, before the one to an integer. */
                double scale = (double)check_f16_value(scales[slot + i]);
                signed char code = (signed char)*at;
                good = code >= -127 &&
                       fabs((double)value - code * scale) <= scale * (0.5 + 127.5 * 3 * CHECK_EPS);
            }
            if (!good) {
                check_fail(c, "token %zu of %zu, dim %zu of %zu, slot %zu: %a", i, n, d, dims, slot,
                           (double)value);
                return;
            }
        }
}

/* Elements on the ties between codes, and an absmax on the edge between two scales. */
static void fill_ties(check *c, float *x, size_t dims)
{
    int exponent = (int)check_below(c, 30) - 15;
    for (size_t d = 0; d < dims; d++)
        x[d] = ldexpf((float)check_below(c, 252) - 125.5f, exponent);
    x[check_below(c, dims)] = ldexpf(127.0f, exponent);
    if (check_below(c, 2)) {
        /* Up to the largest scale; just above it the row is rejected. */
        float most = 127.0f * kvt_f16_to_f32((uint16_t)(1 + check_below(c, 0x7bfe)));
        size_t side = check_below(c, 3);
        x[check_below(c, dims)] = side ? nextafterf(most, side == 1 ? 0.0f : 1e38f) : most;
    }
}

static void check_put(check *c, put_function *kernel, put_function *scalar, const storage *s)
{
    static unsigned char expected[KVT_TOKENS * CHECK_MAX_DIMS * 4];
    const size_t rounds = 100 * 16;
    if (c->bench) {
        float *x = check_buffer(c, 0, 16 * 128 * 4, 4);
        unsigned char *codes = check_buffer(c, 1, 64 * 128 * 4, 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64);
        check_fill(c, x, 16 * 128, CHECK_NORMAL, 0);
        CHECK_BENCH(c, 16 * 128 * (4 + s->element), kernel(x, 128, 16, 128, 128, codes, scales, 0));
    }
    for (size_t i = 0; i < rounds; i++) {
        size_t dims = check_dims(check_below(c, CHECK_N_DIMS)), dims_p = kvt_round_up(dims, 16);
        size_t n = i % 16 + 1, ldx = dims + check_below(c, 20);
        size_t slot = check_below(c, 4) * 16 + check_below(c, 17 - n);
        size_t bytes = KVT_TOKENS * dims_p * s->element;
        float *x = check_buffer(c, 0, ((n - 1) * ldx + dims) * 4, 4);
        unsigned char *codes = check_buffer(c, 1, bytes, 64);
        uint16_t *scales = check_buffer(c, 2, 128, 64), expected_scales[KVT_TOKENS];
        check_kind kind = (check_kind)(i / 16 % CHECK_KINDS);
        size_t bad_token = n;
        int answer, expected_answer;

        check_fill(c, x, (n - 1) * ldx + dims, kind, s->limit);
        for (size_t t = 0; t < n && s->element == 1 && i % 2; t++)
            fill_ties(c, x + t * ldx, dims);
        if (s->element == 2) /* SPREAD leaves f16 */
            for (size_t j = 0; j < (n - 1) * ldx + dims; j++)
                x[j] = fabsf(x[j]) > 65519.0f ? 1.0f : x[j];
        if (s->element < 4 && check_below(c, 4) == 0) {
            const float beyond[] = {s->limit * 1.01f, -s->limit * 1.01f, INFINITY, 3e38f};
            bad_token = check_below(c, n);
            x[bad_token * ldx + check_below(c, dims)] = beyond[check_below(c, 4)];
        }
        fill_codes(c, s, codes, dims, dims_p);
        for (size_t t = 0; t < KVT_TOKENS; t++)
            scales[t] = (uint16_t)check_random(c);
        memcpy(expected, codes, bytes);
        memcpy(expected_scales, scales, sizeof expected_scales);

        answer = kernel(x, ldx, n, dims, dims_p, codes, s->element == 1 ? scales : NULL, slot);
        expected_answer = scalar(x, ldx, n, dims, dims_p, expected,
                                 s->element == 1 ? expected_scales : NULL, slot);
        if (answer != (bad_token == n) || answer != expected_answer)
            check_fail(c, "answers %d, scalar %d: dims %zu, slot %zu, n %zu", answer,
                       expected_answer, dims, slot, n);
        if (!answer) { /* the slots themselves are unspecified: copy them */
            for (size_t t = slot; t < slot + n; t++) {
                expected_scales[t] = scales[t];
                for (size_t d = 0; d < dims; d++) {
                    size_t at = s->index(t, d, dims_p) * s->element;
                    memcpy(expected + at, codes + at, s->element);
                }
            }
        } else {
            check_stored(c, s, x, ldx, n, dims, dims_p, codes, scales, slot);
        }
        if (memcmp(codes, expected, bytes) != 0 ||
            memcmp(scales, expected_scales, sizeof expected_scales) != 0)
            check_fail(c, "differs from scalar: dims %zu, slot %zu, n %zu, kind %d", dims, slot, n,
                       (int)kind);
        check_canaries(c);
    }
}

/* The same as put_k_f16 of rows less the offset. */
void check_put_k_open(check *c, int (*kernel)(const float *, size_t, size_t, size_t, size_t,
                                              const uint16_t *, void *, size_t))
{
    static unsigned char expected[KVT_TOKENS * CHECK_MAX_DIMS * 2];
    if (c->bench) {
        float *x = check_buffer(c, 0, 16 * 128 * 4, 4);
        unsigned char *codes = check_buffer(c, 1, 64 * 128 * 2, 64);
        uint16_t *offset = check_buffer(c, 2, 256, 64);
        check_fill(c, x, 16 * 128, CHECK_NORMAL, 0);
        memset(offset, 0, 256);
        CHECK_BENCH(c, 16 * 128 * 6, kernel(x, 128, 16, 128, 128, offset, codes, 0));
    }
    for (size_t i = 0; i < 100 * 16; i++) {
        size_t dims = check_dims(check_below(c, CHECK_N_DIMS)), dims_p = kvt_round_up(dims, 16);
        size_t n = i % 16 + 1, ldx = dims + check_below(c, 20);
        size_t slot = check_below(c, 4) * 16 + check_below(c, 17 - n);
        size_t bytes = KVT_TOKENS * dims_p * 2, rows = (n - 1) * ldx + dims;
        float *x = check_buffer(c, 0, rows * 4, 4), z[CHECK_MAX_DIMS];
        unsigned char *codes = check_buffer(c, 1, bytes, 64);
        uint16_t *offset = check_buffer(c, 2, dims * 2, 2);
        int answer, expected_answer = 1;

        for (size_t d = 0; d < dims; d++)
            offset[d] = check_finite_f16(c);
        check_fill(c, x, rows, CHECK_NORMAL, 0);
        for (size_t j = 0; j < rows; j++) /* rounded before the offset they would differ */
            x[j] = check_below(c, 2) ? x[j] + kvt_f16_to_f32(offset[j % ldx % dims]) : x[j];
        if (check_below(c, 4) == 0)
            x[check_below(c, n) * ldx + check_below(c, dims)] = check_below(c, 2) ? NAN : 140000.0f;
        fill_codes(c, &k_f16, codes, dims, dims_p);
        memcpy(expected, codes, bytes);
        answer = kernel(x, ldx, n, dims, dims_p, offset, codes, slot);
        for (size_t t = 0; t < n; t++) {
            for (size_t d = 0; d < dims; d++)
                z[d] = x[t * ldx + d] - kvt_f16_to_f32(offset[d]);
            expected_answer &= SCALAR.put_k_f16(z, dims, 1, dims, dims_p, expected, NULL, slot + t);
        }
        if (answer != expected_answer)
            check_fail(c, "answers %d: dims %zu, slot %zu, n %zu", answer, dims, slot, n);
        for (size_t t = slot; !answer && t < slot + n; t++) /* the slots are unspecified */
            for (size_t d = 0; d < dims; d++) {
                size_t at = kvt_kw_index(t, d, dims_p) * 2;
                memcpy(expected + at, codes + at, 2);
            }
        if (memcmp(codes, expected, bytes) != 0)
            check_fail(c, "differs: dims %zu, slot %zu, n %zu", dims, slot, n);
        check_canaries(c);
    }
}

static void check_get(check *c, get_function *kernel, get_function *scalar, const storage *s)
{
    if (c->bench) {
        unsigned char *codes = check_buffer(c, 0, 64 * 128 * s->element, 64);
        uint16_t *scales = check_buffer(c, 1, 128, 64);
        float *x = check_buffer(c, 2, 512, 4);
        memset(scales, 0, 128);
        CHECK_BENCH(c, 128 * (4 + s->element), kernel(codes, scales, 5, 128, 128, x));
    }
    for (size_t i = 0; i < check_rounds(c, 10) * CHECK_N_DIMS; i++) {
        size_t dims = check_dims(i), dims_p = kvt_round_up(dims, 16);
        unsigned char *codes = check_buffer(c, 0, KVT_TOKENS * dims_p * s->element, 64);
        uint16_t *scales = check_buffer(c, 1, 128, 64);
        fill_codes(c, s, codes, dims, dims_p);
        for (size_t t = 0; t < KVT_TOKENS; t++)
            scales[t] = check_finite_f16(c);
        for (size_t slot = 0; slot < KVT_TOKENS; slot++) {
            float *x = check_buffer(c, 2, dims * 4, 4);
            float expected[CHECK_MAX_DIMS];
            kernel(codes, s->element == 1 ? scales : NULL, slot, dims, dims_p, x);
            scalar(codes, s->element == 1 ? scales : NULL, slot, dims, dims_p, expected);
            if (!check_same_bits(x, expected, dims))
                check_fail(c, "differs from scalar: dims %zu, slot %zu", dims, slot);
            for (size_t d = 0; d < dims; d++) {
                const unsigned char *at = codes + s->index(slot, d, dims_p) * s->element;
                uint16_t half = 0;
                long double value = x[d];
                if (s->element == 1)
                    value = (float)((signed char)*at * check_f16_value(scales[slot]));
                else if (s->element == 2)
                    memcpy(&half, at, 2), value = check_f16_value(half);
                else
                    memcpy(expected, at, 4), value = expected[0];
                if ((long double)x[d] != value)
                    check_fail(c, "dims %zu, slot %zu, dim %zu: %a", dims, slot, d, (double)x[d]);
            }
        }
        check_canaries(c);
    }
}

#define CHECK_STORAGE(side, type)                                                                  \
    void check_put_##side##_##type(check *c, put_function *kernel)                                 \
    {                                                                                              \
        check_put(c, kernel, SCALAR.put_##side##_##type, &side##_##type);                          \
    }                                                                                              \
    void check_get_##side##_##type(check *c, get_function *kernel)                                 \
    {                                                                                              \
        check_get(c, kernel, SCALAR.get_##side##_##type, &side##_##type);                          \
    }

CHECK_STORAGE(k, f32)
CHECK_STORAGE(k, f16)
CHECK_STORAGE(k, i8)
CHECK_STORAGE(v, f32)
CHECK_STORAGE(v, f16)
CHECK_STORAGE(v, i8)

/* ---- rows of the caller ---- */

void check_center(check *c, void (*kernel)(const float *, const float *, size_t, float *))
{
    static const float bench_x[128], bench_mu[128];
    static float bench_y[128];
    CHECK_BENCH(c, 128 * 12, kernel(bench_x, bench_mu, 128, bench_y));
    for (size_t i = 0; i < check_rounds(c, 2000); i++) {
        size_t n = i < 200 ? i % 50 + 1 : check_dims(i);
        float *x = check_buffer(c, 0, n * 4, 4), *mu = check_buffer(c, 1, n * 4, 4);
        float *y = i % 2 ? x : check_buffer(c, 2, n * 4, 4), expected[CHECK_MAX_DIMS];
        for (size_t j = 0; j < n; j++) {
            x[j] = check_finite(c);
            mu[j] = check_below(c, 4) ? kvt_f16_to_f32(check_finite_f16(c)) : x[j];
        }
        for (size_t j = 0; j < n; j++)
            expected[j] = x[j] - mu[j];
        kernel(x, mu, n, y);
        if (!check_same_bits(y, expected, n))
            check_fail(c, "differs, n %zu", n);
        check_canaries(c);
    }
}
