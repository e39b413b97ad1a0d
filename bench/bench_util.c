/*
 * Errors, memory, time, random numbers, number formats and statistics.
 */
#include "bench_files.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void bench_fail(int exit_code, const char *format, ...)
{
    va_list args;
    bench_end_interrupted(); /* a child that the signal has ended too is no failure */
    fflush(stdout);
    fputs("kvt-bench: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(exit_code);
}

void bench_require(kvt_status status, const kvt_cache *cache, const char *what)
{
    char text[256] = "";
    if (status == KVT_OK)
        return;
    if (cache)
        kvt_cache_error(cache, text, sizeof text);
    bench_fail(1, "%s: %s%s%s", what, kvt_status_string(status), text[0] ? ": " : "", text);
}

void *bench_alloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size);
    if (!p)
        bench_fail(1, "no memory for %zu times %zu bytes", count, size);
    return p;
}

size_t bench_utf8(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t n = *p < 0x80 ? 1 : *p < 0xc2 ? 0 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : *p < 0xf5 ? 4 : 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    /* overlong forms, surrogates and code points beyond U+10FFFF: by the second byte */
    if ((*p == 0xe0 && p[1] < 0xa0) || (*p == 0xed && p[1] > 0x9f) || (*p == 0xf0 && p[1] < 0x90) ||
        (*p == 0xf4 && p[1] > 0x8f))
        return 0;
    return n;
}

double bench_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- random numbers: xoshiro256**, seeded by splitmix64 (Blackman and Vigna) ---- */

void bench_random_seed(bench_random *r, uint64_t seed)
{
    for (int i = 0; i < 4; i++) {
        uint64_t z = seed += UINT64_C(0x9e3779b97f4a7c15);
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        r->state[i] = z ^ z >> 31;
    }
    r->has_spare = false;
}

static uint64_t rotate_left(uint64_t x, int n)
{
    return x << n | x >> (64 - n);
}

uint64_t bench_random_bits(bench_random *r)
{
    uint64_t *s = r->state;
    uint64_t result = rotate_left(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

static double uniform(bench_random *r) /* (0, 1] */
{
    return ((double)(bench_random_bits(r) >> 11) + 1.0) * 0x1p-53;
}

double bench_random_normal(bench_random *r)
{
    if (r->has_spare) {
        r->has_spare = false;
        return r->spare;
    }
    double radius = sqrt(-2.0 * log(uniform(r))), angle = 6.283185307179586 * uniform(r);
    r->spare = radius * sin(angle);
    r->has_spare = true;
    return radius * cos(angle);
}

void bench_random_fill(bench_random *r, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)bench_random_normal(r);
}

/* ---- number formats ---- */

uint16_t bench_to_f16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    float magnitude = fabsf(x);
    if (!(magnitude < 65520.0f))
        return (uint16_t)(sign | (magnitude != magnitude ? 0x7e00u : 0x7c00u));
    if (magnitude < 0x1p-14f) /* subnormal: a multiple of 2^-24, which scaling makes an integer */
        return (uint16_t)(sign | (uint16_t)nearbyintf(magnitude * 0x1p24f));
    memcpy(&bits, &magnitude, sizeof bits);
    bits += 0xfffu + (bits >> 13 & 1u); /* to nearest even; the carry may reach the exponent */
    return (uint16_t)(sign | (uint16_t)((bits >> 13) - (112u << 10)));
}

float bench_from_f16(uint16_t h)
{
    int exponent = h >> 10 & 31;
    float mantissa = (float)(h & 1023);
    float x;
    if (exponent == 31)
        x = h & 1023 ? NAN : INFINITY;
    else
        x = exponent ? ldexpf(mantissa + 1024.0f, exponent - 25) : ldexpf(mantissa, -24);
    return h & 0x8000 ? -x : x;
}

uint16_t bench_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* ---- statistics ---- */

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(const double *sorted, size_t n, double q)
{
    double at = q * (double)(n - 1);
    size_t i = (size_t)at;
    double rest = at - (double)i;
    return i + 1 < n ? sorted[i] * (1.0 - rest) + sorted[i + 1] * rest : sorted[n - 1];
}

bench_stats bench_stats_of(const double *x, size_t n)
{
    bench_stats s = {NAN, NAN, NAN, NAN, NAN, NAN};
    if (n == 0)
        return s;
    double *sorted = bench_alloc(n, sizeof *sorted);
    memcpy(sorted, x, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, compare);
    s.min = sorted[0];
    s.p10 = quantile(sorted, n, 0.1);
    s.p25 = quantile(sorted, n, 0.25);
    s.median = quantile(sorted, n, 0.5);
    s.p75 = quantile(sorted, n, 0.75);
    s.p90 = quantile(sorted, n, 0.9);
    free(sorted);
    return s;
}

double bench_median(const double *x, size_t n)
{
    return bench_stats_of(x, n).median;
}
