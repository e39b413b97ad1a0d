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

/*
 * Tables by bins of 8 u, of which none has more than one bound: the number of bounds before a bin,
 * and the bound in it, or 127, which no u is above.
 */
#define KVT_V4_BEFORE_IN(x, a, b, c, d, e, f, g)                                                   \
    ((a) < (x)) + ((b) < (x)) + ((c) < (x)) + ((d) < (x)) + ((e) < (x)) + ((f) < (x)) + ((g) < (x))
#define KVT_V4_OR_BOUND(x, a) (a) / 8 == (x) / 8 ? (a)
#define KVT_V4_BOUND_IN(x, a, b, c, d, e, f, g)                                                    \
    KVT_V4_OR_BOUND(x, a)                                                                          \
        : KVT_V4_OR_BOUND(x, b)                                                                    \
        : KVT_V4_OR_BOUND(x, c)                                                                    \
        : KVT_V4_OR_BOUND(x, d)                                                                    \
        : KVT_V4_OR_BOUND(x, e) : KVT_V4_OR_BOUND(x, f) : KVT_V4_OR_BOUND(x, g) : 127
#define KVT_V4_PICK(m, a, b, c, d, e, f, g, h)                                                     \
    ((m) == 0   ? (a)                                                                              \
     : (m) == 1 ? (b)                                                                              \
     : (m) == 2 ? (c)                                                                              \
     : (m) == 3 ? (d)                                                                              \
     : (m) == 4 ? (e)                                                                              \
     : (m) == 5 ? (f)                                                                              \
     : (m) == 6 ? (g)                                                                              \
                : (h))
#define KVT_V4_PICK_OF(m, ...) KVT_V4_PICK(m, __VA_ARGS__)
#define KVT_V4_MAGNITUDE(m) KVT_V4_PICK_OF(m, KVT_V4_MAGNITUDES)
#define KVT_V4_BEFORE(x, ...) KVT_V4_BEFORE_IN(x, __VA_ARGS__)
#define KVT_V4_BOUND(x, ...) KVT_V4_BOUND_IN(x, __VA_ARGS__)
#define KVT_V4_BY_EIGHTS(f, ...)                                                                   \
    {                                                                                              \
        f(0, __VA_ARGS__), f(8, __VA_ARGS__), f(16, __VA_ARGS__), f(24, __VA_ARGS__),              \
            f(32, __VA_ARGS__), f(40, __VA_ARGS__), f(48, __VA_ARGS__), f(56, __VA_ARGS__),        \
            f(64, __VA_ARGS__), f(72, __VA_ARGS__), f(80, __VA_ARGS__), f(88, __VA_ARGS__),        \
            f(96, __VA_ARGS__), f(104, __VA_ARGS__), f(112, __VA_ARGS__), f(120, __VA_ARGS__)      \
    }

/* A row whose largest magnitude is below this is stored as zeros. */
#define KVT_V4_LEAST 0x1p-100f

#endif /* KVT_LEVELS_H */
