/*
 * The levels of 4-bit V: Lloyd-Max levels of a normal distribution (Max 1960, Lloyd 1982) as
 * integers within +-63, so that the sum of two products with a weight of 8 bits fits 16 bits. A
 * code is the index of its level, 0 .. 15, ascending: a value is level * scale.
 *
 * docs/numerics.md specifies how a row gets its codes; the constants here are its numbers.
 */
#ifndef KVT_LEVELS_H
#define KVT_LEVELS_H

#include <stdint.h>

#define KVT_V4_LEVELS -63, -48, -37, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 37, 48, 63
/* The upper half: level of magnitude index m, 0 .. 7. */
#define KVT_V4_MAGNITUDES 3, 9, 15, 22, 29, 37, 48, 63

/*
 * Magnitudes are compared as integers u of half a level: m is the number of bounds below u, which
 * are the middles between levels. The scale of a row is sought from three sets of bounds, those of
 * a scale of absmax / 63 times 1, .92 and .84, for u = round(|x| * 126 / absmax).
 */
#define KVT_V4_BOUNDS 7
#define KVT_V4_CANDIDATES 3
#define KVT_V4_BOUNDS_0 12, 24, 37, 51, 66, 85, 111
#define KVT_V4_BOUNDS_1 11, 22, 34, 46, 60, 78, 102
#define KVT_V4_BOUNDS_2 10, 20, 31, 42, 55, 71, 93
#define KVT_V4_UNITS 126.0f
/* A row whose largest magnitude is below this is stored as zeros. */
#define KVT_V4_LEAST 0x1p-100f

#endif /* KVT_LEVELS_H */
