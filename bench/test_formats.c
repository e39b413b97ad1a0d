/*
 * The reference formats of fidelity, on normal numbers: each one's error is that of its kind, as
 * known from theory or measured once, so that a wrong scale, level, rotation or block stands out.
 *
 *   - relative error of K and of V within 3% of what it should be
 *   - where a format scales with its input, twice the input is twice the result
 *   - zeros stay zeros, and so does the mean of a constant channel where there is an offset
 *   - what the window keeps: f16 behind, q8_0 in front, the format in between
 */
#include "bench_formats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 1024, DIM = 128 };

static int failures;

static void check(bool good, const char *format, const char *what, double value)
{
    if (good)
        return;
    failures++;
    printf("%s: %s: %g\n", format, what, value);
}

static double relative(const float *x, const float *y, size_t n)
{
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)x[i] - (double)y[i];
        error += d * d;
        norm += (double)y[i] * (double)y[i];
    }
    return sqrt(error / norm);
}

/*
 * lm4-rot: the Lloyd-Max quantizer of 16 levels has a mean squared error of 0.0095 (Max 1960). The
 * others are from a simulation of their rounding on groups of 32, 64 and 128 normal numbers, in
 * another language; kvarn4's of groups of 64 and 128, which normal numbers' alike deviations allow.
 */
static const struct {
    const char *name;
    double k, v;
} expected[] = {
    {"f16", 0.000208, 0.000208},  {"q8_0", 0.00537, 0.00537},  {"q4_0", 0.0865, 0.0865},
    {"q4_0-rot", 0.0865, 0.0865}, {"lm4-rot", 0.0970, 0.0970}, {"turboquant4", 0.0955, 0.0998},
    {"exl3-4", 0.0883, 0.0883},   {"kivi4", 0.0897, 0.0782},   {"kvarn4", 0.0897, 0.0998}};

static void check_format(const bench_format *f, const float *x, float *y)
{
    size_t n = (size_t)TOKENS * DIM;
    for (int side = 0; side < 2; side++) {
        bool is_k = side == 0;
        size_t i = 0;
        while (i < sizeof expected / sizeof expected[0] && strcmp(expected[i].name, f->name) != 0)
            i++;
        check(i < sizeof expected / sizeof expected[0], f->name, "no expectation", 0.0);
        memcpy(y, x, n * sizeof *y);
        f->apply(y, TOKENS, DIM, is_k);
        double error = relative(y, x, n), want = is_k ? expected[i].k : expected[i].v;
        check(fabs(error / want - 1.0) < 0.03, f->name, is_k ? "error of K" : "error of V", error);
        double bits = f->bits(DIM, is_k);
        check(bits >= 4.0 && bits <= 16.0, f->name, "bits", bits);

        float *twice = bench_alloc(n, sizeof *twice);
        for (size_t j = 0; j < n; j++)
            twice[j] = 2.0f * x[j];
        f->apply(twice, TOKENS, DIM, is_k);
        double scaled = 0.0;
        for (size_t j = 0; j < n; j++)
            scaled = fmax(scaled, fabs((double)twice[j] - 2.0 * (double)y[j]));
        /* kvarn4's limits of scales are absolute */
        check(scaled < 1e-4 || !strcmp(f->name, "kvarn4"), f->name, "of twice the input", scaled);

        memset(twice, 0, n * sizeof *twice);
        f->apply(twice, TOKENS, DIM, is_k);
        double largest = 0.0;
        for (size_t j = 0; j < n; j++)
            largest = fmax(largest, fabs((double)twice[j]));
        check(largest < 1e-9, f->name, "of zeros", largest);
        free(twice);
    }
}

/* A constant of 100 in a channel of K costs formats with an offset a channel next to nothing. */
static void check_offset(const char *name, const float *x, float *y)
{
    const bench_format *f = bench_format_find(name);
    size_t n = (size_t)TOKENS * DIM;
    memcpy(y, x, n * sizeof *y);
    for (size_t t = 0; t < TOKENS; t++)
        y[t * DIM + 5] += 100.0f;
    float *with = bench_alloc(n, sizeof *with);
    memcpy(with, y, n * sizeof *y);
    f->apply(with, TOKENS, DIM, true);
    double error = 0.0;
    for (size_t i = 0; i < n; i++)
        error += pow((double)with[i] - (double)y[i], 2.0) / (double)n;
    check(sqrt(error) < 0.12, name, "error with an offset", sqrt(error));
    free(with);
}

/* One element that is not zero: rotated, all have the same magnitude, and both signs. */
static void check_rotation(const char *name, double low, double high)
{
    float x[DIM] = {0}, y[DIM];
    for (size_t i = 37; i < DIM; i += 37) {
        memset(x, 0, sizeof x);
        x[i] = 3.0f;
        memcpy(y, x, sizeof y);
        bench_format_find(name)->apply(y, 1, DIM, true);
        double error = relative(y, x, DIM);
        check(error >= low && error <= high, name, "error of one element", error);
    }
}

static void check_window(const bench_format *f, const float *x, float *y)
{
    static const size_t lengths[] = {1, 63, 64, 127, 128, 191, 192, 300};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        size_t n = lengths[i], sealed = bench_format_sealed(f, true, n);
        size_t plain = bench_format_sealed(f, false, n);
        check(sealed == (n < 128 ? 0 : (n - 64) / 64 * 64), f->name, "sealed", (double)sealed);
        check(plain == (f->blocks ? n / 64 * 64 : n), f->name, "sealed at once", (double)plain);
        memcpy(y, x, n * DIM * sizeof *y);
        bench_format_final(f, true, y, n, DIM, true);
        double back = relative(y + sealed * DIM, x + sealed * DIM, (n - sealed) * DIM);
        check(back > 0.0 && back < 3e-4, f->name, "error in the window", back);
        if (sealed >= 64) {
            double front = relative(y, x, 64 * (size_t)DIM);
            check(fabs(front / 0.00537 - 1.0) < 0.05, f->name, "error of the first block", front);
        }
        if (sealed > 64) {
            float *middle = bench_alloc((sealed - 64) * DIM, sizeof *middle);
            memcpy(middle, x + 64 * DIM, (sealed - 64) * DIM * sizeof *middle);
            f->apply(middle, sealed - 64, DIM, true);
            check(!memcmp(middle, y + 64 * DIM, (sealed - 64) * DIM * sizeof *middle), f->name,
                  "not the format between", 0.0);
            free(middle);
        }
    }
}

int main(void)
{
    bench_random random;
    float *x = bench_alloc((size_t)TOKENS * DIM, sizeof *x);
    float *y = bench_alloc((size_t)TOKENS * DIM, sizeof *y);
    bench_random_seed(&random, 1);
    bench_random_fill(&random, x, (size_t)TOKENS * DIM);
    for (size_t i = 0; i < bench_n_formats; i++) {
        check_format(&bench_formats[i], x, y);
        check_window(&bench_formats[i], x, y);
    }
    check_offset("kivi4", x, y);
    check_offset("kvarn4", x, y);
    check_rotation("turboquant4", 0.0, 1e-3);
    check_rotation("lm4-rot", 0.0572, 0.0584); /* the level nearest to 1 is 0.9424 */
    check_rotation("q4_0-rot", 0.05, 0.12);    /* +8 becomes 7 */
    check_rotation("q4_0", 0.0, 1e-3);
    /* 64 tokens of 8 bits, 64 of 4, 64 of 16 */
    double bits = bench_bits_at(4.0, 8.0, 64, 128, 192);
    check(fabs(bits - 28.0 / 3.0) < 1e-12, "bits", "at a length", bits);
    free(y);
    free(x);
    if (failures == 0)
        printf("the formats are as expected\n");
    return failures != 0;
}
