/*
 * Which tokens of a block are left out of its mean: those whose squared distance from the plain
 * mean is more than 16 times the median of all. Shared by the mean_k_f16 of every instruction set,
 * as part of what it specifies; no intrinsics, compilers vectorize the loops.
 */
#ifndef KVT_OUTLIERS_H
#define KVT_OUTLIERS_H

#include <stdint.h>

#include "simd/tile.h"

/*
 * Bit t is set when dist[t] > 16 * median (a product in f32), the median being the 32nd smallest
 * (index 31) of the 64. dist: squared distances, finite, none negative (nor -0).
 *
 * From the definition to the fast form:
 *  1. No sort: rounding keeps order, so 16 * dist[u] orders as dist[u] does, and dist[t] is above
 *     the product with the 32nd smallest exactly when it is above 32 products or more.
 *  2. That takes 64 comparisons, and only for a t with dist[t] > 16 * the least of all: any
 *     other is above no product. In a block without outliers there is no such t, which the
 *     largest tells.
 * A t among the 32 smallest is above at most 31 products: no more than 32 tokens are left out.
 */
static inline uint64_t kvt_outliers(const float dist[KVT_TOKENS])
{
    float product[KVT_TOKENS], bound;
    uint64_t result = 0;
    /* As bits: numbers that are not negative order as integers, which compilers vectorize. */
    uint32_t least = kvt_f32_bits(dist[0]), largest = least;

    for (size_t t = 0; t < KVT_TOKENS; t++) {
        uint32_t bits = kvt_f32_bits(dist[t]);
        least = bits < least ? bits : least;
        largest = bits > largest ? bits : largest;
    }
    bound = 16.0f * kvt_bits_f32(least);
    if (kvt_bits_f32(largest) <= bound)
        return 0;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        product[t] = 16.0f * dist[t];
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        int32_t below = 0;
        if (dist[t] <= bound)
            continue;
        for (size_t u = 0; u < KVT_TOKENS; u++)
            below += product[u] < dist[t];
        result |= (uint64_t)(below >= KVT_TOKENS / 2) << t;
    }
    return result;
}

#endif /* KVT_OUTLIERS_H */
