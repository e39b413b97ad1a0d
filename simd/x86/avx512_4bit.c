/*
 * AVX-512 kernels of 4-bit K, and of 4- and 5-bit V. The table is in avx512vnni.c.
 *
 * A line of 64 bytes holds 16 tokens (dims) by 8 dims (tokens): its low nibbles are four dims of
 * each 32-bit lane, its high ones the next four, as tile.h says. So a line is two vectors of bytes
 * for vpdpbusd (avx512vnni.c), which takes one unsigned and one signed factor:
 *
 *   K: codes 0 .. 15 are unsigned, digits of q * scales[d] are signed. A score is
 *      step * (sum digit * code - 7.5 * sum digit).
 *   V, 4 bits: weights are unsigned, a byte shuffle makes the code its level.
 *   V, 5 bits: code 0 .. 31 as it is, value 2 * code - 31; the 31 is taken off per row.
 *
 * q is rounded anew in each block, as the scales are by dims and blocks. From the simple form to
 * the fast one:
 *  1. Rows go in blocks: a line is unpacked once for all of them. Zen 5 forms two products a cycle
 *     and has two loads, so a broadcast of four digits also serves several tiles (K) or vectors
 *     (V). For one or two rows, whose products wait for memory, low and high nibbles have sums of
 *     their own, which hides the latency.
 *  2. The largest magnitudes of up to 8 rows are reduced and divided together.
 *
 *  3. A block of rows reads codes in another order than they are stored in, several tiles or some
 *     columns at a time, which the hardware's prefetch does not follow. With one row, whose
 *     products take less time than memory, what the prefetch of the block before has missed
 *     (prefetch.h says why it may) is prefetched once more in ascending order, before the row is
 *     rounded. From two rows on that costs more than it saves (Zen 4: 1 row .94 of the time, 2 and
 *     4 rows 1.04).
 *
 * Overflow: K 1024 * 127 * 15 < 2^21. V 64 * 255 * 63 < 2^20. Both are exact as f32, and so are
 * half-integers of that size. amx.c has other products, with the same digits and the same results,
 * bit for bit: there the number of rows decides which are used.
 */
#include "simd/levels.h"
#include "avx512_product.h"

/* Rows of a register block at most. */
#define ROWS_BLOCK KVT_FOLD_ROWS
#define SUMS_MAX 32

/* The loop below stays one: unrolled it is no faster, and has eight times the code. */
#if defined(__clang__)
#define ROLLED _Pragma("clang loop unroll(disable)")
#else
#define ROLLED _Pragma("GCC unroll 1")
#endif

/* So many rows are multiplied in less time than codes take from memory. */
#define ROWS_WAITING 1

/* Into L1, what this call reads itself. */
KVT_INLINE void prefetch_own(const void *codes, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)codes + i, _MM_HINT_T0);
}

/* ---- q ---- */

/* Rows of a register block as signed digits. */
typedef struct folded {
    /* One line more than the largest row has: rows do not compete for the same lines of L1. */
    _Alignas(64) unsigned char digits[ROWS_BLOCK][KVT_DIMS_MAX + 64];
    /* In units of step: score = step * (sum of products + bias). */
    _Alignas(64) float step[16], bias[16];
} folded;

KVT_INLINE void fold(size_t rows, const float *q, size_t ldq, const uint16_t *scales, size_t dims_p,
                     folded *to)
{
    __m512 step;
    __m512i sum;
    kvt_fold(rows, q, ldq, scales, dims_p, to->digits[0], sizeof to->digits[0], 64, &step, &sum);
    _mm512_store_ps(to->step, step);
    _mm512_store_ps(to->bias, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(-7.5f)));
}

/* ---- scores ---- */

typedef struct qk_call {
    const float *q;
    size_t ldq;
    const unsigned char *codes;
    const uint16_t *scales;
    size_t n_tokens, dims_p;
    float *s;
} qk_call;

/*
 * Scores of `rows` rows from `row` on, several tiles at a time, so that some of them may be dead.
 * rows, tiles and chains (2: low and high nibbles have their own sums) are constants of the
 * callers. All four tiles are read side by side, but prefetched in ascending order.
 */
KVT_INLINE void qk_block(size_t rows, size_t tiles, size_t chains, const qk_call *call, size_t row,
                         uintptr_t prefetch)
{
    const size_t tile_bytes = call->dims_p * 8;
    folded q;
    fold(rows, call->q + row * call->ldq, call->ldq, call->scales, call->dims_p, &q);
    for (size_t t = 0; t < call->n_tokens; t += tiles * KVT_TILE_TOKENS) {
        const unsigned char *codes = call->codes + t / KVT_TILE_TOKENS * tile_bytes;
        __m512i sum[SUMS_MAX];
        KVT_UNROLL
        for (size_t i = 0; i < rows * tiles * chains; i++)
            sum[i] = _mm512_setzero_si512();
        for (size_t d = 0; d < call->dims_p; d += 8) {
            __m512i half[4][2];
            KVT_UNROLL
            for (size_t j = 0; j < tiles; j++) {
                const unsigned char *line = codes + j * tile_bytes;
                kvt_unpack_nibbles(_mm512_load_si512(line), half[j]);
                _mm_prefetch((const char *)prefetch, _MM_HINT_T1);
                prefetch += 64;
            }
            KVT_UNROLL
            for (size_t r = 0; r < rows; r++) {
                __m512i w = kvt_broadcast(q.digits[r] + d);
                KVT_UNROLL
                for (size_t j = 0; j < tiles; j++) {
                    __m512i *at = &sum[(r * tiles + j) * chains];
                    *at = kvt_dot(*at, half[j][0], w);
                }
                w = kvt_broadcast(q.digits[r] + d + 4);
                KVT_UNROLL
                for (size_t j = 0; j < tiles; j++) {
                    __m512i *at = &sum[(r * tiles + j) * chains + chains - 1];
                    *at = kvt_dot(*at, half[j][1], w);
                }
            }
            codes += 64;
        }
        KVT_UNROLL
        for (size_t i = 0; i < rows * tiles; i++) {
            const size_t r = i / tiles;
            float *s = call->s + (row + r) * KVT_TOKENS + t + i % tiles * KVT_TILE_TOKENS;
            __m512i x = sum[i * chains];
            if (chains == 2)
                x = _mm512_add_epi32(x, sum[i * chains + 1]);
            _mm512_store_ps(
                s, _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(q.bias[r])),
                                 _mm512_set1_ps(q.step[r])));
        }
    }
}

#define QK_BLOCK(rows, tiles, chains)                                                              \
    static __attribute__((noinline)) void qk_##rows(const qk_call *call, size_t row,               \
                                                    uintptr_t prefetch)                            \
    {                                                                                              \
        qk_block(rows, tiles, chains, call, row, prefetch);                                        \
    }
QK_BLOCK(1, 4, 2)
QK_BLOCK(2, 4, 2)
QK_BLOCK(3, 4, 1)
QK_BLOCK(4, 4, 1)
QK_BLOCK(5, 2, 1)
QK_BLOCK(6, 2, 1)
QK_BLOCK(7, 2, 1)
QK_BLOCK(8, 2, 1)

void kvt_avx512_qk_i4_near(const float *q, size_t ldq, size_t rows, const void *codes,
                           const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                           float *s)
{
    static void (*const blocks[])(const qk_call *, size_t, uintptr_t) = {
        NULL, qk_1, qk_2, qk_3, qk_4, qk_5, qk_6, qk_7, qk_8};
    const qk_call call = {q, ldq, codes, scales, n_tokens, dims_p, s};
    uintptr_t prefetch = (uintptr_t)(next ? next : codes);
    if (rows <= ROWS_WAITING)
        prefetch_own(codes, dims_p * (KVT_TOKENS / 2));
    for (size_t row = 0, n; row < rows; row += n) {
        n = kvt_rows_of_block(rows - row, ROWS_BLOCK);
        blocks[n](&call, row, prefetch);
        prefetch = (uintptr_t)codes; /* once; later blocks prefetch lines that hit L1 */
    }
}

/* ---- weighted sums ---- */

typedef struct pv_call {
    const float *p;
    const __m512 *scale;
    const unsigned char *codes;
    size_t dims_p;
    const float *alpha;
    float *acc;
    size_t ldacc;
} pv_call;

/* Weights of a register block: a sum is step * (sum of products + bias). */
typedef struct weights {
    kvt_pv_row rows[ROWS_BLOCK];
    _Alignas(64) float step[16], bias[16];
} weights;

/*
 * The value of 5 bits is twice the code less 31: its step is twice the weights' unit, and the sum
 * of the weights times 15.5 comes off.
 */
KVT_INLINE void round_rows(size_t bits, size_t rows, const float *p, const __m512 *scale,
                           weights *to)
{
    const float most = kvt_weight_most(1);
    _Alignas(64) float reciprocals[16];
    __m512i x[ROWS_BLOCK];
    __m512 w[4], largest, unit;
    KVT_UNROLL
    for (size_t r = 0; r < ROWS_BLOCK; r++) {
        /* vmaxps returns its second operand for a NaN (of logits beyond f32); its digits are 0. */
        x[r] = _mm512_castps_si512(_mm512_set1_ps(KVT_LEAST));
        if (r < rows)
            x[r] = _mm512_castps_si512(
                _mm512_max_ps(kvt_weigh(p + r * KVT_TOKENS, scale, w), _mm512_set1_ps(KVT_LEAST)));
    }
    largest = _mm512_castsi512_ps(kvt_reduce(KVT_MAX, ROWS_BLOCK, x));
    _mm512_store_ps(reciprocals, _mm512_div_ps(_mm512_set1_ps(most), largest));
    KVT_UNROLL
    for (size_t r = 0; r < rows; r++) {
        kvt_weigh(p + r * KVT_TOKENS, scale, w);
        kvt_put_weights(1, w, _mm512_set1_ps(reciprocals[r]), &to->rows[r]);
    }
    unit = _mm512_div_ps(largest, _mm512_set1_ps(most));
    _mm512_store_ps(to->step, bits == 5 ? _mm512_add_ps(unit, unit) : unit);
    if (bits == 5) {
        KVT_UNROLL
        for (size_t r = 0; r < ROWS_BLOCK; r++)
            x[r] = r < rows ? kvt_dot(_mm512_setzero_si512(),
                                      _mm512_loadu_si512(to->rows[r].digits), _mm512_set1_epi8(1))
                            : _mm512_setzero_si512();
        _mm512_store_ps(to->bias,
                        _mm512_mul_ps(_mm512_cvtepi32_ps(kvt_reduce(KVT_SUM, ROWS_BLOCK, x)),
                                      _mm512_set1_ps(-15.5f)));
    }
}

/* A line as signed bytes: levels of 4 bits, codes of 5. */
KVT_INLINE void values_of(size_t bits, __m512i line, const unsigned char *fifth, __m512i half[2])
{
    kvt_unpack_nibbles(line, half);
    if (bits == 5) {
        kvt_add_fifths(fifth, half);
    } else {
        const __m512i levels = _mm512_broadcast_i32x4(_mm_setr_epi8(KVT_V4_LEVELS));
        half[0] = _mm512_shuffle_epi8(levels, half[0]);
        half[1] = _mm512_shuffle_epi8(levels, half[1]);
    }
}

/* 16 * vectors dims from `dim` on of `rows` rows from `row` on. */
KVT_INLINE void pv_columns(size_t bits, size_t rows, size_t vectors, const pv_call *call,
                           const weights *rounded, size_t row, size_t dim, uintptr_t prefetch)
{
    const unsigned char *codes = call->codes + dim * 4;
    const unsigned char *fifths =
        bits == 5 ? call->codes + kvt_v5_index(0, dim, call->dims_p) : codes;
    const unsigned char *p = rounded->rows[0].digits;
    const size_t step = call->dims_p * 4;
    const uintptr_t to_next = prefetch - (uintptr_t)call->codes;
    __m512i sum[SUMS_MAX];
    KVT_UNROLL
    for (size_t i = 0; i < rows * vectors; i++)
        sum[i] = _mm512_setzero_si512();
    ROLLED
    for (size_t g = 0; g < KVT_TOKENS / 8; g++) {
        __m512i half[8][2];
        KVT_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            const unsigned char *line = codes + v * 64;
            values_of(bits, _mm512_load_si512(line), fifths + v * 16, half[v]);
            _mm_prefetch((const char *)((uintptr_t)line + to_next), _MM_HINT_T1);
        }
        if (bits == 5) {
            KVT_UNROLL
            for (size_t v = 0; v < vectors; v += 4)
                _mm_prefetch((const char *)((uintptr_t)fifths + v * 16 + to_next), _MM_HINT_T1);
        }
        KVT_UNROLL
        for (size_t r = 0; r < rows; r++) {
            __m512i w = kvt_broadcast(p + r * sizeof(kvt_pv_row));
            KVT_UNROLL
            for (size_t v = 0; v < vectors; v++)
                sum[r * vectors + v] = kvt_dot(sum[r * vectors + v], w, half[v][0]);
            w = kvt_broadcast(p + r * sizeof(kvt_pv_row) + 4);
            KVT_UNROLL
            for (size_t v = 0; v < vectors; v++)
                sum[r * vectors + v] = kvt_dot(sum[r * vectors + v], w, half[v][1]);
        }
        p += 8;
        codes += step;
        fifths += call->dims_p;
    }
    KVT_UNROLL
    for (size_t r = 0; r < rows; r++) {
        const __m512 alpha = _mm512_set1_ps(call->alpha[row + r]);
        const __m512 unit = _mm512_set1_ps(rounded->step[r]);
        float *acc = call->acc + (row + r) * call->ldacc + dim;
        KVT_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            __m512 x = _mm512_cvtepi32_ps(sum[r * vectors + v]);
            if (bits == 5)
                x = _mm512_add_ps(x, _mm512_set1_ps(rounded->bias[r]));
            _mm512_storeu_ps(
                acc + 16 * v,
                _mm512_fmadd_ps(x, unit, _mm512_mul_ps(_mm512_loadu_ps(acc + 16 * v), alpha)));
        }
    }
}

/* As many dims as the wide block divides, then narrower blocks, down to 16 dims. */
#define PV_BLOCK(bits, rows, vectors)                                                              \
    static __attribute__((noinline)) void pv_##bits##_##rows(const pv_call *call, size_t row,      \
                                                             uintptr_t prefetch)                   \
    {                                                                                              \
        size_t dim = 0;                                                                            \
        weights w;                                                                                 \
        round_rows(bits, rows, call->p + row * KVT_TOKENS, call->scale, &w);                       \
        for (; dim + 16 * vectors <= call->dims_p; dim += 16 * vectors)                            \
            pv_columns(bits, rows, vectors, call, &w, row, dim, prefetch);                         \
        for (; vectors > 4 && dim + 64 <= call->dims_p; dim += 64)                                 \
            pv_columns(bits, rows, 4, call, &w, row, dim, prefetch);                               \
        for (; vectors > 2 && dim + 32 <= call->dims_p; dim += 32)                                 \
            pv_columns(bits, rows, 2, call, &w, row, dim, prefetch);                               \
        for (; dim < call->dims_p; dim += 16)                                                      \
            pv_columns(bits, rows, 1, call, &w, row, dim, prefetch);                               \
    }

#define PV_KERNEL(bits)                                                                            \
    PV_BLOCK(bits, 1, 8)                                                                           \
    PV_BLOCK(bits, 2, 8)                                                                           \
    PV_BLOCK(bits, 3, 4)                                                                           \
    PV_BLOCK(bits, 4, 4)                                                                           \
    PV_BLOCK(bits, 5, 2)                                                                           \
    PV_BLOCK(bits, 6, 2)                                                                           \
    PV_BLOCK(bits, 7, 2)                                                                           \
    PV_BLOCK(bits, 8, 2)                                                                           \
    void kvt_avx512_pv_i##bits##_near(                                                             \
        const float *p, size_t rows, const void *codes, const uint16_t *scales, size_t n_tokens,   \
        size_t dims_p, const float *alpha, const void *next, float *acc, size_t ldacc)             \
    {                                                                                              \
        static void (*const blocks[])(const pv_call *, size_t, uintptr_t) = {                      \
            NULL,          pv_##bits##_1, pv_##bits##_2, pv_##bits##_3, pv_##bits##_4,             \
            pv_##bits##_5, pv_##bits##_6, pv_##bits##_7, pv_##bits##_8};                           \
        uintptr_t prefetch = (uintptr_t)(next ? next : codes);                                     \
        __m512 scale[4];                                                                           \
        const pv_call call = {p, scale, codes, dims_p, alpha, acc, ldacc};                         \
        if (rows <= ROWS_WAITING)                                                                  \
            prefetch_own(codes, dims_p *(KVT_TOKENS * bits / 8));                                  \
        kvt_load_scales(scales, n_tokens, scale);                                                  \
        for (size_t row = 0, n; row < rows; row += n) {                                            \
            n = kvt_rows_of_block(rows - row, ROWS_BLOCK);                                         \
            blocks[n](&call, row, prefetch);                                                       \
            prefetch = (uintptr_t)codes;                                                           \
        }                                                                                          \
    }
PV_KERNEL(4)
PV_KERNEL(5)

void kvt_avx512_gain_k(float *s, size_t rows, const uint8_t *gains, const float *add)
{
    __m512 gain[KVT_TOKENS / 16];
    KVT_UNROLL
    for (size_t i = 0; i < KVT_TOKENS / 16; i++) {
        __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(gains + 16 * i)));
        x = _mm512_sub_epi32(x, _mm512_set1_epi32(KVT_K4_GAIN_ONE));
        gain[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(KVT_K4_GAIN_STEP),
                                  _mm512_set1_ps(1.0f)); /* exact */
    }
    for (size_t r = 0; r < rows; r++) {
        KVT_UNROLL
        for (size_t i = 0; i < KVT_TOKENS / 16; i++) {
            float *at = s + r * KVT_TOKENS + 16 * i;
            __m512 x = _mm512_add_ps(_mm512_load_ps(at), _mm512_set1_ps(add[r]));
            _mm512_store_ps(at, _mm512_mul_ps(x, gain[i]));
        }
    }
}
