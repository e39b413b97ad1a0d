/*
 * The baseline that i8 is compared with: ggml's q8_0 from its public description. 32 values share a
 * scale, which is their largest magnitude over 127 and is stored as f16; a code is the value times
 * the reciprocal of the scale (before its rounding to f16), rounded to nearest with halves away
 * from zero. 34 bytes for 32 values: 8.5 bits each.
 */
#include "bench.h"

#include <math.h>

void bench_q8_0_round_trip(const float *x, float *y, size_t n)
{
    for (size_t i = 0; i < n; i += 32) {
        size_t count = n - i < 32 ? n - i : 32;
        float largest = 0.0f;
        for (size_t j = 0; j < count; j++)
            largest = fmaxf(largest, fabsf(x[i + j]));
        float scale = largest / 127.0f;
        float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        float stored = bench_from_f16(bench_to_f16(scale));
        for (size_t j = 0; j < count; j++)
            y[i + j] = stored * roundf(x[i + j] * inverse);
    }
}
