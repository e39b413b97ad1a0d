/*
 * What products of 256-bit vectors share (avx2.c, avx2_i8.c, avxvnni.c): register blocking,
 * prefetch, horizontal reductions and tail masks.
 */
#ifndef KVT_AVX2_PRODUCT_H
#define KVT_AVX2_PRODUCT_H

#include "simd/x86/prefetch.h"
#include "avx2.h"

/* ---- blocks ---- */

/*
 * Register blocking: rows by vectors of 8 lanes. The accumulators of a block are
 * sum[r * vectors + v], an array that lives in registers only: rows and vectors are constants of
 * the outermost callers, and these two macros make every index a constant. (With loops, clang 14
 * keeps the array in memory and stores each FMA's result.) 12 accumulators, 2 vectors of codes, a
 * weight, and a constant or a product take all 16 registers.
 */
#define KVT_ROWS_BLOCK 6
#define KVT_SUMS_MAX 12
#define KVT_EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define KVT_EACH_SUM(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

/* Rows of the next block when `left` remain: blocks of equal size, none above the limit. */
KVT_INLINE size_t kvt_rows_of_block(size_t left)
{
    size_t blocks = (left + KVT_ROWS_BLOCK - 1) / KVT_ROWS_BLOCK;
    return (left + blocks - 1) / blocks;
}

/*
 * An optimization barrier on one register: x is computed before what follows, and stays in place.
 * Without it compilers reorder the integer additions (which is exact): they form all products first
 * and spill them before adding; or gcc 12 copies each accumulator once an iteration and spills the
 * copies.
 */
#define KVT_KEEP(x) __asm__("" : "+x"(x))

/* ---- prefetch ---- */

/*
 * Prefetch of `next` (kernels.h, prefetch.h), as many bytes as are read, in ascending order
 * whatever the order of the product: ascending accesses train the hardware prefetcher, which keeps
 * more lines in flight than a core has fill buffers (1.4 to 1.7 times the bandwidth of prefetching
 * in the product's order). Only the first block of rows that passes over the codes prefetches; in
 * the others the step is 0 and the prefetch hits the cache.
 */
typedef struct kvt_prefetch_state {
    uintptr_t at, again;
    size_t step; /* 1 or 0, times what is read */
    size_t cycles;
} kvt_prefetch_state;

/* What the blocks of rows of one product prefetch. */
typedef struct kvt_sides {
    const void *next, *codes; /* as much as is read, and what is read: side_bytes */
    size_t side_bytes;
} kvt_sides;

/*
 * The state for a block of rows from `row` on whose first codes are `offset` bytes from the start.
 * work: vector multiplications for each line; two are issued a cycle.
 */
KVT_INLINE kvt_prefetch_state kvt_prefetch_begin(const kvt_sides *sides, size_t row, size_t offset,
                                                 size_t work)
{
    const size_t half = sides->side_bytes / 2;
    kvt_prefetch_state prefetch = {(uintptr_t)sides->codes, (uintptr_t)sides->codes, 0, work / 2};
    if (sides->next && row == 0) {
        prefetch.at = (uintptr_t)sides->next + offset;
        prefetch.again = offset < half ? prefetch.again + half + offset : prefetch.at - half;
        prefetch.step = 1;
    }
    return prefetch;
}

/* codes: what is read now, lines line_bytes apart. */
KVT_INLINE void kvt_prefetch_bytes(kvt_prefetch_state *prefetch, const unsigned char *codes,
                                   size_t line_bytes, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        kvt_prefetch_line(prefetch->cycles, codes + i / 64 * line_bytes,
                          prefetch->at + prefetch->step * i, prefetch->again + prefetch->step * i);
    prefetch->at += prefetch->step * bytes;
    prefetch->again += prefetch->step * bytes;
}

/* ---- folds and masks ---- */

/* Pairwise reduction: lanes 4, 2, 1 apart. */
KVT_INLINE float kvt_sum_lanes(__m256 x)
{
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

KVT_INLINE float kvt_max_lanes(__m256 x)
{
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

/* All ones in the lanes i with first + i < n. */
KVT_INLINE __m256 kvt_lanes_below(size_t first, size_t n)
{
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)n - (int)first), index));
}

#endif /* KVT_AVX2_PRODUCT_H */
