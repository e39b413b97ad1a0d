/*
 * Checks of the kernels for a V that is the first dims of K: the transposed codes, element by
 * element by tile.h's index functions, and the offset's part of a weighted sum.
 */
#include "check.h"

typedef void transpose_function(const void *, size_t, size_t, void *);

/* K's and V's dims: those of DeepSeek-style models, V as wide as K, and padded ones. */
static void transpose_dims(check *c, size_t i, size_t *dims_p, size_t *v_dims_p)
{
    *dims_p = kvt_round_up(check_dims(i), 16);
    *v_dims_p = i % 3 ? 16 * (1 + check_below(c, *dims_p / 16)) : *dims_p;
    if (i % 7 == 0) {
        *dims_p = 576;
        *v_dims_p = 512;
    }
}

static void check_transpose(check *c, transpose_function *kernel, size_t element)
{
    if (c->bench) {
        unsigned char *codes = check_buffer(c, 0, 64 * 576 * element, 64);
        unsigned char *out = check_buffer(c, 1, 64 * 512 * element, 64);
        memset(codes, 1, 64 * 576 * element);
        CHECK_BENCH(c, 2 * 64 * 512 * element, kernel(codes, 576, 512, out));
    }
    for (size_t i = 0; i < 300; i++) {
        size_t dims_p, v_dims_p, n, wrong = 0;
        unsigned char *codes, *out;
        transpose_dims(c, i, &dims_p, &v_dims_p);
        n = KVT_TOKENS * dims_p * element;
        codes = check_buffer(c, 0, n, 64);
        out = check_buffer(c, 1, KVT_TOKENS * v_dims_p * element, 64);
        /* Any bytes: dead slots are copied as they are, also NaN patterns. */
        for (size_t j = 0; j < n; j += 8) {
            uint64_t x = check_random(c);
            memcpy(codes + j, &x, 8);
        }
        memset(out, 0xa5, KVT_TOKENS * v_dims_p * element);
        kernel(codes, dims_p, v_dims_p, out);
        for (size_t t = 0; t < KVT_TOKENS; t++)
            for (size_t d = 0; d < v_dims_p; d++) {
                size_t from =
                    element == 1 ? kvt_k8_index(t, d, dims_p) : kvt_kw_index(t, d, dims_p);
                size_t to =
                    element == 1 ? kvt_v8_index(t, d, v_dims_p) : kvt_vw_index(t, d, v_dims_p);
                wrong += memcmp(codes + from * element, out + to * element, element) != 0;
            }
        if (wrong)
            check_fail(c, "%zu elements are wrong: dims_p %zu, v_dims_p %zu", wrong, dims_p,
                       v_dims_p);
        check_canaries(c);
    }
}

void check_transpose_f32(check *c, transpose_function *kernel)
{
    check_transpose(c, kernel, 4);
}

void check_transpose_f16(check *c, transpose_function *kernel)
{
    check_transpose(c, kernel, 2);
}

void check_transpose_i8(check *c, transpose_function *kernel)
{
    check_transpose(c, kernel, 1);
}

void check_add_scaled(check *c,
                      void (*kernel)(float *, size_t, size_t, const float *, const float *, size_t))
{
    static float bench_acc[16 * 512], bench_x[512], bench_coefficients[16];
    CHECK_BENCH(c, 16 * 512 * 8, kernel(bench_acc, 512, 16, bench_coefficients, bench_x, 512));
    for (size_t i = 0; i < 1000; i++) {
        size_t n = kvt_round_up(check_dims(i), 16), rows = 1 + i % KVT_ROWS_MAX;
        size_t ldacc = n + 16 * check_below(c, 2), all = (rows - 1) * ldacc + n;
        float *acc = check_buffer(c, 0, all * 4, 64), *x = check_buffer(c, 1, n * 4, 64);
        float *coefficients = check_buffer(c, 2, rows * 4, 4);
        float *before = check_buffer(c, 3, all * 4, 64), *alone = check_buffer(c, 4, n * 4, 64);
        check_kind kind = (check_kind)(i / 3 % CHECK_KINDS);
        check_fill(c, acc, all, kind, 1e30f);
        check_fill(c, x, n, kind, 1e15f);
        for (size_t r = 0; r < rows; r++) /* sums of weights: 0 to 64 */
            coefficients[r] = i % 5 ? fabsf(check_normal(c)) * 16 : 0.0f;
        memcpy(before, acc, all * 4);
        kernel(acc, ldacc, rows, coefficients, x, n);
        for (size_t r = 0; r < rows; r++) {
            for (size_t d = 0; d < n; d++) {
                double old = before[r * ldacc + d], term = (double)coefficients[r] * x[d];
                /* A product and a sum, or both at once. */
                double bound = 2 * CHECK_EPS * (fabs(old) + 2 * fabs(term)) + 0x1p-148;
                if (!(fabs(acc[r * ldacc + d] - (old + term)) <= bound))
                    check_fail(c, "%a, not %a: row %zu of %zu, dim %zu of %zu",
                               (double)acc[r * ldacc + d], old + term, r, rows, d, n);
            }
            memcpy(alone, before + r * ldacc, n * 4);
            kernel(alone, n, 1, coefficients + r, x, n);
            if (!check_same_bits(alone, acc + r * ldacc, n))
                check_fail(c, "row %zu of %zu depends on the others: n %zu", r, rows, n);
            if (r + 1 < rows &&
                !check_same_bits(acc + r * ldacc + n, before + r * ldacc + n, ldacc - n))
                check_fail(c, "wrote between the rows: n %zu", n);
        }
        check_canaries(c);
    }
}
