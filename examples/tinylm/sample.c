/* The next token: greedy, or from the most likely tokens that together reach top_p. */
#include "tinylm.h"

#include <math.h>
#include <stdlib.h>

/* splitmix64's finalizer over seed and position; tinylm.h (tl_sample) has the reason. */
static float coin(uint64_t seed, size_t position)
{
    uint64_t z = seed * UINT64_C(0x9E3779B97F4A7C15) + (uint64_t)position;
    for (int i = 0; i < 2; i++) {
        z += UINT64_C(0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
        z ^= z >> 31;
    }
    return (float)(z >> 40) * 0x1p-24f;
}

static int32_t most_likely(const float *p, size_t n)
{
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (p[i] > p[best])
            best = i;
    return (int32_t)best;
}

/* A heap of indices with the largest value on top: only the nucleus is ever sorted. */
static void sift(uint32_t *order, size_t n, size_t i, const float *p)
{
    uint32_t x = order[i];
    for (;;) {
        size_t k = 2 * i + 1;
        if (k >= n)
            break;
        if (k + 1 < n && (p[order[k + 1]] > p[order[k]] ||
                          (p[order[k + 1]] == p[order[k]] && order[k + 1] < order[k])))
            k++;
        if (p[order[k]] < p[x] || (p[order[k]] == p[x] && order[k] > x))
            break;
        order[i] = order[k];
        i = k;
    }
    order[i] = x;
}

int32_t tl_sample(const tl_sampler *s, float *logits, uint32_t *order, size_t n, size_t position)
{
    if (s->temperature <= 0)
        return most_likely(logits, n);
    float top = logits[most_likely(logits, n)], sum = 0;
    for (size_t i = 0; i < n; i++) {
        logits[i] = expf((logits[i] - top) / s->temperature);
        sum += logits[i];
        order[i] = (uint32_t)i;
    }
    for (size_t i = n / 2; i-- > 0;)
        sift(order, n, i, logits);
    float want = s->top_p * sum, mass = 0;
    size_t left = n;
    /* Move the nucleus to the end of `order`, the most likely last. */
    while (left > 0 && mass < want) {
        uint32_t x = order[0];
        order[0] = order[--left];
        order[left] = x;
        mass += logits[x];
        sift(order, left, 0, logits);
        if (left == 0)
            break;
    }
    float r = coin(s->seed, position) * mass;
    for (size_t i = n; i-- > left;) {
        r -= logits[order[i]];
        if (r < 0)
            return (int32_t)order[i];
    }
    return (int32_t)order[n - 1];
}
