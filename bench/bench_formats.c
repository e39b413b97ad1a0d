/*
 * Reference formats for keys and values: each takes one head's K or V to the format and back.
 *
 *   f16, q8_0       16 bits; ggml's 8.5 (bench_rival.c)
 *   q4_0            ggml's: 32 elements share an f16 scale, the element of the largest magnitude
 *                   over -8, so that it is exact and codes are -8 .. 7
 *   q4_0-rot        the same behind a rotation of the head, as llama.cpp stores it since 2026
 *   lm4-rot         rotated rows, an f16 scale a row from its root mean square, and the 16 levels
 *                   that are optimal for normal numbers (Lloyd-Max): TurboQuant's first stage
 *   turboquant4     as vLLM has it (turboquant_4bit_nc): such K, its length restored; V in 16
 *                   uniform levels between each row's least and largest element, not rotated
 *   exl3-4          as exllamav3's cache: 32 elements are rotated together, divided by their
 *                   largest magnitude (f16), and rounded to the midpoints of 16 equal parts of
 *                   -1 .. 1
 *   kivi4           KIVI: K in 16 levels between the least and the largest of a channel's 64
 *                   tokens, V likewise of 32 channels of a token
 *   kvarn4          KVarN: a block of 64 tokens is rotated, and its channels and tokens are divided
 *                   in turn by their deviations until they are alike; then as kivi4, V's range
 *                   being the whole row's
 *
 * Where a head's dims are no multiple of 32 the last group of a row is shorter.
 *
 * A rotation is signs, then a Hadamard transform of each run of the largest power of two that
 * divides dim. It is undone here, which changes no score and no output.
 */
#include "bench_formats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the library's ---- */

/* K, V, and how many of the first tokens are i8 where a side has fewer bits: a line a pair. */
const bench_type_pair bench_type_pairs[] = {
    {KVT_TYPE_F16, KVT_TYPE_F16, 0}, {KVT_TYPE_I8, KVT_TYPE_I8, 0},  {KVT_TYPE_I8, KVT_TYPE_I5, 64},
    {KVT_TYPE_I8, KVT_TYPE_I4, 64},  {KVT_TYPE_I4, KVT_TYPE_I8, 64}, {KVT_TYPE_I4, KVT_TYPE_I5, 64},
    {KVT_TYPE_I4, KVT_TYPE_I4, 64},
};
const size_t bench_n_type_pairs = sizeof bench_type_pairs / sizeof bench_type_pairs[0];

/* ---- parts ---- */

enum { GROUP = 32 };

static float stored(float x)
{
    return bench_from_f16(bench_to_f16(fminf(fmaxf(x, -65504.0f), 65504.0f)));
}

void bench_f16_round_trip(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = stored(x[i]);
}

/* Orthonormal and its own inverse. n is a power of two. */
static void hadamard(float *x, size_t n)
{
    float scale = 1.0f / sqrtf((float)n);
    for (size_t h = 1; h < n; h *= 2) {
        for (size_t i = 0; i < n; i += 2 * h) {
            for (size_t j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
    for (size_t i = 0; i < n; i++)
        x[i] *= scale;
}

static size_t power_of_two_in(size_t n)
{
    return n & (~n + 1);
}

static void change_signs(float *x, size_t dim)
{
    for (size_t d = 0; d < dim; d++) {
        uint64_t z = (d + 1) * UINT64_C(0x9e3779b97f4a7c15);
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        if ((z ^ z >> 31) & 1)
            x[d] = -x[d];
    }
}

static void rotate(float *x, size_t n, size_t dim)
{
    size_t run = power_of_two_in(dim);
    for (size_t t = 0; t < n; t++) {
        change_signs(x + t * dim, dim);
        for (size_t d = 0; d < dim; d += run)
            hadamard(x + t * dim + d, run);
    }
}

static void rotate_back(float *x, size_t n, size_t dim)
{
    size_t run = power_of_two_in(dim);
    for (size_t t = 0; t < n; t++) {
        for (size_t d = 0; d < dim; d += run)
            hadamard(x + t * dim + d, run);
        change_signs(x + t * dim, dim);
    }
}

/* n elements, `stride` apart, to 16 levels between least and largest; step and least are f16. */
static void uniform16(float *x, size_t n, size_t stride)
{
    float least = x[0], largest = x[0];
    for (size_t i = 1; i < n; i++) {
        least = fminf(least, x[i * stride]);
        largest = fmaxf(largest, x[i * stride]);
    }
    float step = stored((largest - least) / 15.0f), zero = stored(least);
    for (size_t i = 0; i < n; i++) {
        float code = step > 0.0f ? rintf((x[i * stride] - zero) / step) : 0.0f;
        x[i * stride] = fminf(fmaxf(code, 0.0f), 15.0f) * step + zero;
    }
}

/* ---- rows ---- */

static void apply_f16(float *x, size_t n, size_t dim, bool is_k)
{
    (void)is_k;
    bench_f16_round_trip(x, n * dim);
}

static void apply_q8_0(float *x, size_t n, size_t dim, bool is_k)
{
    (void)is_k;
    for (size_t t = 0; t < n; t++)
        bench_q8_0_round_trip(x + t * dim, x + t * dim, dim);
}

static void apply_q4_0(float *x, size_t n, size_t dim, bool is_k)
{
    (void)is_k;
    for (size_t t = 0; t < n; t++) {
        for (size_t d = 0; d < dim; d += GROUP) {
            size_t count = dim - d < GROUP ? dim - d : GROUP;
            float *row = x + t * dim + d, largest = 0.0f;
            for (size_t j = 0; j < count; j++)
                largest = fabsf(row[j]) > fabsf(largest) ? row[j] : largest;
            float scale = largest / -8.0f, inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
            float kept = stored(scale);
            for (size_t j = 0; j < count; j++)
                row[j] = (fminf(15.0f, floorf(row[j] * inverse + 8.5f)) - 8.0f) * kept;
        }
    }
}

static void apply_q4_0_rotated(float *x, size_t n, size_t dim, bool is_k)
{
    rotate(x, n, dim);
    apply_q4_0(x, n, dim, is_k);
    rotate_back(x, n, dim);
}

/* The positive half of the levels, and the element's nearest. Source: Max 1960, table I. */
static float nearest_level(float x)
{
    static const float levels[8] = {0.1284f, 0.3881f, 0.6568f, 0.9424f,
                                    1.2562f, 1.6181f, 2.0690f, 2.7326f};
    size_t i = 0;
    while (i < 7 && fabsf(x) > 0.5f * (levels[i] + levels[i + 1]))
        i++;
    return copysignf(levels[i], x);
}

/* Rotated rows, each as f16(its root mean square) times levels; `exact_length` scales the levels
   so that the row's length is right. */
static void lloyd_max(float *x, size_t n, size_t dim, bool exact_length)
{
    rotate(x, n, dim);
    for (size_t t = 0; t < n; t++) {
        float *row = x + t * dim, squares = 0.0f, after = 0.0f;
        for (size_t d = 0; d < dim; d++)
            squares += row[d] * row[d];
        float rms = sqrtf(squares / (float)dim), inverse = rms > 0.0f ? 1.0f / rms : 0.0f;
        for (size_t d = 0; d < dim; d++) {
            row[d] = nearest_level(row[d] * inverse);
            after += row[d] * row[d];
        }
        float scale = stored(rms);
        if (exact_length)
            scale *= sqrtf((float)dim / after);
        for (size_t d = 0; d < dim; d++)
            row[d] *= scale;
    }
    rotate_back(x, n, dim);
}

static void apply_lm4(float *x, size_t n, size_t dim, bool is_k)
{
    (void)is_k;
    lloyd_max(x, n, dim, false);
}

static void apply_turboquant4(float *x, size_t n, size_t dim, bool is_k)
{
    if (is_k)
        lloyd_max(x, n, dim, true);
    else
        for (size_t t = 0; t < n; t++)
            uniform16(x + t * dim, dim, 1);
}

static void apply_exl3(float *x, size_t n, size_t dim, bool is_k)
{
    (void)is_k;
    for (size_t t = 0; t < n; t++) {
        for (size_t d = 0, count; d < dim; d += count) {
            count = dim - d < GROUP ? power_of_two_in(dim - d) : GROUP;
            float *group = x + t * dim + d, largest = 1e-10f;
            hadamard(group, count);
            for (size_t j = 0; j < count; j++)
                largest = fmaxf(largest, fabsf(group[j]));
            float inverse = 1.0f / largest, kept = stored(largest);
            for (size_t j = 0; j < count; j++) {
                float code = floorf(group[j] * inverse * 8.0f + 8.0f);
                group[j] = (fminf(fmaxf(code, 0.0f), 15.0f) - 7.5f) / 8.0f * kept;
            }
            hadamard(group, count);
        }
    }
}

/* ---- blocks ---- */

static void apply_kivi4(float *x, size_t n, size_t dim, bool is_k)
{
    for (size_t t = 0; is_k && t < n; t += BENCH_BLOCK)
        for (size_t d = 0; d < dim; d++)
            uniform16(x + t * dim + d, BENCH_BLOCK, dim);
    for (size_t t = 0; !is_k && t < n; t++)
        for (size_t d = 0; d < dim; d += GROUP)
            uniform16(x + t * dim + d, dim - d < GROUP ? dim - d : GROUP, 1);
}

/* Deviation of n elements around their mean, within the published code's limits. */
static double deviation(const double *x, size_t n, size_t stride)
{
    double mean = 0.0, squares = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += x[i * stride] / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (x[i * stride] - mean) * (x[i * stride] - mean);
    return fmin(fmax(sqrt(squares / (double)(n - 1)), 1e-3), 1e3);
}

/* How unlike the deviations are: the largest over the least, of channels and of tokens. */
static double imbalance(const double *x, size_t dim)
{
    double low = INFINITY, high = 0.0, sum;
    for (size_t d = 0; d < dim; d++) {
        double s = deviation(x + d, BENCH_BLOCK, dim);
        low = fmin(low, s);
        high = fmax(high, s);
    }
    sum = high / low;
    low = INFINITY, high = 0.0;
    for (size_t t = 0; t < BENCH_BLOCK; t++) {
        double s = deviation(x + t * dim, dim, 1);
        low = fmin(low, s);
        high = fmax(high, s);
    }
    return sum + high / low;
}

/* The published code's limits of a scale, e^-0.3 and e^10. Lower ones change little. */
static double limited(double scale)
{
    return fmin(fmax(scale, 0.74081822068171788), 22026.465794806718);
}

/* 16 rounds of tokens and channels (K; V the other way round), the best of which counts. */
static void apply_kvarn4(float *x, size_t n, size_t dim, bool is_k)
{
    enum { ROUNDS = 16 };
    size_t size = BENCH_BLOCK * dim;
    double *y = bench_alloc(size, sizeof *y), *channel = bench_alloc(2 * dim, sizeof *channel);
    double *best_channel = channel + dim, token[BENCH_BLOCK], best_token[BENCH_BLOCK];
    rotate(x, n, dim);
    for (float *block = x; block < x + n * dim; block += size) {
        double best = INFINITY;
        for (size_t d = 0; d < dim; d++)
            channel[d] = 1.0;
        for (size_t t = 0; t < BENCH_BLOCK; t++)
            token[t] = 1.0;
        for (size_t i = 0; i < size; i++)
            y[i] = (double)block[i];
        for (int round = 0; round <= ROUNDS; round++) {
            double now = imbalance(y, dim);
            if (now <= best) {
                best = now;
                memcpy(best_channel, channel, dim * sizeof *channel);
                memcpy(best_token, token, sizeof token);
            }
            for (int half = 0; half < 2; half++) {
                bool of_tokens = (half == 0) == is_k;
                for (size_t t = 0; of_tokens && t < BENCH_BLOCK; t++)
                    token[t] = limited(token[t] * deviation(y + t * dim, dim, 1));
                for (size_t d = 0; !of_tokens && d < dim; d++)
                    channel[d] = limited(channel[d] * deviation(y + d, BENCH_BLOCK, dim));
                for (size_t i = 0; i < size; i++)
                    y[i] = (double)block[i] / token[i / dim] / channel[i % dim];
            }
        }
        /* What 16 levels are made of has one of the two scales in its own step. */
        for (size_t i = 0; i < size; i++) {
            double other = is_k ? best_token[i / dim] : best_channel[i % dim];
            block[i] = (float)((double)block[i] / other);
        }
        for (size_t d = 0; is_k && d < dim; d++)
            uniform16(block + d, BENCH_BLOCK, dim);
        for (size_t t = 0; !is_k && t < BENCH_BLOCK; t++)
            uniform16(block + t * dim, dim, 1);
        for (size_t i = 0; i < size; i++)
            block[i] *= stored((float)(is_k ? best_token[i / dim] : best_channel[i % dim]));
    }
    rotate_back(x, n, dim);
    free(channel);
    free(y);
}

/* ---- bits ---- */

/* Scales of 16 bits, one in each 32 elements. A shorter last group has one too. */
static double group_scales(size_t dim)
{
    return 16.0 * (double)((dim + GROUP - 1) / GROUP) / (double)dim;
}

static double bits_f16(size_t dim, bool is_k)
{
    (void)dim, (void)is_k;
    return 16.0;
}
static double bits_q8_0(size_t dim, bool is_k)
{
    (void)is_k;
    return 8.0 + group_scales(dim);
}
static double bits_q4_0(size_t dim, bool is_k)
{
    (void)is_k;
    return 4.0 + group_scales(dim);
}
static double bits_lm4(size_t dim, bool is_k)
{
    (void)is_k;
    return 4.0 + 16.0 / (double)dim;
}
static double bits_turboquant4(size_t dim, bool is_k)
{
    return 4.0 + (is_k ? 16.0 : 32.0) / (double)dim;
}
static double bits_kivi4(size_t dim, bool is_k)
{
    return 4.0 + (is_k ? 32.0 / BENCH_BLOCK : 2.0 * group_scales(dim));
}
static double bits_kvarn4(size_t dim, bool is_k)
{
    return 4.0 + (is_k ? 32.0 / BENCH_BLOCK + 16.0 / (double)dim
                       : 32.0 / (double)dim + 16.0 / BENCH_BLOCK);
}

/* ---- the table ---- */

const bench_format bench_formats[] = {
    {"f16", false, apply_f16, bits_f16},
    {"q8_0", false, apply_q8_0, bits_q8_0},
    {"q4_0", false, apply_q4_0, bits_q4_0},
    {"q4_0-rot", false, apply_q4_0_rotated, bits_q4_0},
    {"lm4-rot", false, apply_lm4, bits_lm4},
    {"turboquant4", false, apply_turboquant4, bits_turboquant4},
    {"exl3-4", false, apply_exl3, bits_q4_0},
    {"kivi4", true, apply_kivi4, bits_kivi4},
    {"kvarn4", true, apply_kvarn4, bits_kvarn4},
};
const size_t bench_n_formats = sizeof bench_formats / sizeof bench_formats[0];

const bench_format *bench_format_find(const char *name)
{
    for (size_t i = 0; i < bench_n_formats; i++)
        if (!strcmp(bench_formats[i].name, name))
            return &bench_formats[i];
    return NULL;
}

size_t bench_format_sealed(const bench_format *f, bool window, size_t n)
{
    if (window)
        n = n < BENCH_BLOCK ? 0 : n - BENCH_BLOCK;
    return window || f->blocks ? n / BENCH_BLOCK * BENCH_BLOCK : n;
}

void bench_format_final(const bench_format *f, bool window, float *x, size_t n, size_t dim,
                        bool is_k)
{
    size_t fine = 0, sealed = bench_format_sealed(f, window, n);
    if (window && sealed >= BENCH_BLOCK) {
        fine = BENCH_BLOCK;
        apply_q8_0(x, fine, dim, is_k);
    }
    f->apply(x + fine * dim, sealed - fine, dim, is_k);
    bench_f16_round_trip(x + sealed * dim, (n - sealed) * dim);
}

double bench_bits_at(double bits, double fine_bits, size_t fine, size_t sealed, size_t n)
{
    double first = (double)(fine < sealed ? fine : sealed);
    return (first * fine_bits + ((double)sealed - first) * bits + (double)(n - sealed) * 16.0) /
           (double)n;
}
