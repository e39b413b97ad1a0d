/*
 * What fidelity compares: pairs of the library's storage types, and reference formats, which are
 * the present program's own implementations of what others store.
 */
#ifndef BENCH_FORMATS_H
#define BENCH_FORMATS_H

#include "bench.h"

/* ---- the library's ---- */

typedef struct bench_type_pair {
    kvt_type k, v;
    uint32_t
        fine_tokens; /* the first tokens, which are i8 although a side has fewer bits; else 0 */
} bench_type_pair;

extern const bench_type_pair bench_type_pairs[];
extern const size_t bench_n_type_pairs;

/* ---- the references ---- */

/*
 * apply: one head's K or V, [n][dim], to the format and back, in place. Formats with `blocks` share
 * something over 64 tokens: n is a multiple of 64 and x begins with a block.
 * bits: an element, with scales and offsets.
 */
typedef struct bench_format {
    const char *name;
    bool blocks;
    void (*apply)(float *x, size_t n, size_t dim, bool is_k);
    double (*bits)(size_t dim, bool is_k);
} bench_format;

extern const bench_format bench_formats[];
extern const size_t bench_n_formats;

/* The format of this name, or NULL. */
const bench_format *bench_format_find(const char *name);

/*
 * With a window the newest 64 to 127 tokens are f16 and the first 64 are q8_0, as the library keeps
 * them (residual_tokens 64). Without one a row is quantized at once; a format with `blocks` keeps
 * the block that is being filled as f16.
 */
enum { BENCH_BLOCK = 64 };

/* How many of n tokens, from the first on, are quantized. */
size_t bench_format_sealed(const bench_format *f, bool window, size_t n);

/* The quantized form of all tokens that are quantized sooner or later, in x; of the others f16. */
void bench_format_final(const bench_format *f, bool window, float *x, size_t n, size_t dim,
                        bool is_k);

/* To f16 and back; saturated. */
void bench_f16_round_trip(float *x, size_t n);

/* Bits an element of n tokens: `fine` of fine_bits, the rest of `sealed` of `bits`, f16 behind. */
double bench_bits_at(double bits, double fine_bits, size_t fine, size_t sealed, size_t n);

#endif
