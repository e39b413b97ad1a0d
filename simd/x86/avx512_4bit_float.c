/*
 * AVX-512 kernels of 4-bit K, and of 4- and 5-bit V, in f32. The table is in avx512vnni.c.
 *
 * A permutation of 16 floats takes the low four bits of each 32-bit lane for its index, whatever is
 * above them: a shift and a permutation make 16 codes the numbers that they stand for. 5-bit V has
 * the fifth bits put above the nibbles first, bytes of their own, and permutes 32 floats. The rest
 * is as in avx512_float.c: accumulators of rows by vectors, sums in chains of 64. There are up to
 * 16 of them: with more, the lines, which stay for eight summands, do not fit the registers.
 */
#include "simd/levels.h"
#include "avx512_product.h"

#define ROWS_BLOCK 4
#define VECTORS 4
#define SUMS_MAX (ROWS_BLOCK * VECTORS)
/* Dims of a chunk: summed from zero, then added to the score. */
#define CHUNK_DIMS 64

enum { K4, V4, V5 };

/* What codes 0 .. 15 (and 16 .. 31) stand for, in units of the scale. */
KVT_INLINE __m512 numbers_of(int type, int upper)
{
    const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (type == K4)
        return _mm512_sub_ps(steps, _mm512_set1_ps(7.5f));
    if (type == V4)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_setr_epi8(KVT_V4_LEVELS)));
    return _mm512_sub_ps(_mm512_add_ps(steps, steps), _mm512_set1_ps(upper ? -1.0f : 31.0f));
}

/* Summand e, 0 .. 7, of each lane. half: of V5, the codes of summands 0 .. 3, and 4 .. 7. */
KVT_INLINE __m512 lanes_of(int type, __m512i line, const __m512i half[2], size_t e)
{
    if (type == V5)
        return _mm512_permutex2var_ps(numbers_of(type, 0),
                                      _mm512_srli_epi32(half[e / 4], (unsigned)(e % 4 * 8)),
                                      numbers_of(type, 1));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, (unsigned)(e % 4 * 8 + e / 4 * 4)),
                                 numbers_of(type, 0));
}

/*
 * All sums of a block over n summands, from zero: sum[r * vectors + v]. Vectors are vector_bytes
 * apart, groups of 8 summands step bytes; V5's fifth bits are 16 and fifth_step bytes apart. next:
 * what to prefetch, vectors and groups as far apart as the codes'.
 */
KVT_INLINE void product(int type, size_t rows, size_t vectors, const unsigned char *codes,
                        size_t vector_bytes, size_t step, const unsigned char *fifth,
                        size_t fifth_step, size_t n, const float *weight, size_t ldw,
                        uintptr_t next, __m512 *sum)
{
    KVT_UNROLL
    for (size_t i = 0; i < rows * vectors; i++)
        sum[i] = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 8) {
        __m512i line[VECTORS], half[VECTORS][2];
        KVT_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            line[v] = _mm512_loadu_si512(codes + v * vector_bytes);
            if (type == V5) {
                kvt_unpack_nibbles(line[v], half[v]);
                kvt_add_fifths(fifth + v * 16, half[v]);
            }
            _mm_prefetch((const char *)(next + v * vector_bytes), _MM_HINT_T1);
        }
        KVT_UNROLL
        for (size_t e = 0; e < 8; e++) {
            __m512 lanes[VECTORS];
            KVT_UNROLL
            for (size_t v = 0; v < vectors; v++)
                lanes[v] = lanes_of(type, line[v], half[v], e);
            KVT_UNROLL
            for (size_t r = 0; r < rows; r++) {
                const __m512 w = _mm512_set1_ps(weight[r * ldw + i + e]);
                KVT_UNROLL
                for (size_t v = 0; v < vectors; v++)
                    sum[r * vectors + v] = _mm512_fmadd_ps(w, lanes[v], sum[r * vectors + v]);
            }
        }
        codes += step;
        next += step;
        fifth += fifth_step;
    }
}

/* ---- scores ---- */

typedef struct qk_call {
    const float *q;
    size_t ldq;
    const unsigned char *codes;
    const uint16_t *scales;
    size_t dims_p;
    float *s;
} qk_call;

/* Scores of all four tiles. */
KVT_INLINE void qk_block(size_t rows, const qk_call *call, size_t row, uintptr_t next)
{
    const size_t tile_bytes = call->dims_p * 8;
    for (size_t d = 0; d < call->dims_p; d += CHUNK_DIMS) {
        const size_t n = call->dims_p - d < CHUNK_DIMS ? call->dims_p - d : CHUNK_DIMS;
        _Alignas(64) float folded[ROWS_BLOCK * CHUNK_DIMS];
        __m512 sum[SUMS_MAX];
        for (size_t i = 0; i < n; i += 16) {
            const __m512 scale = kvt_load_f16(call->scales + d + i);
            KVT_UNROLL
            for (size_t r = 0; r < rows; r++)
                _mm512_store_ps(
                    folded + r * CHUNK_DIMS + i,
                    _mm512_mul_ps(_mm512_loadu_ps(call->q + (row + r) * call->ldq + d + i), scale));
        }
        product(K4, rows, VECTORS, call->codes + d * 8, tile_bytes, 64, NULL, 0, n, folded,
                CHUNK_DIMS, next + d * 8, sum);
        KVT_UNROLL
        for (size_t i = 0; i < rows * VECTORS; i++) {
            float *to = call->s + (row + i / VECTORS) * KVT_TOKENS + i % VECTORS * 16;
            _mm512_store_ps(to, d ? _mm512_add_ps(_mm512_load_ps(to), sum[i]) : sum[i]);
        }
    }
}

#define QK_BLOCK(rows)                                                                             \
    static                                                                                         \
        __attribute__((noinline)) void qk_##rows(const qk_call *call, size_t row, uintptr_t next)  \
    {                                                                                              \
        qk_block(rows, call, row, next);                                                           \
    }
QK_BLOCK(1)
QK_BLOCK(2)
QK_BLOCK(3)
QK_BLOCK(4)

void kvt_avx512_qk_i4(const float *q, size_t ldq, size_t rows, const void *codes,
                      const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                      float *s)
{
    static void (*const blocks[])(const qk_call *, size_t, uintptr_t) = {NULL, qk_1, qk_2, qk_3,
                                                                         qk_4};
    const qk_call call = {q, ldq, codes, scales, dims_p, s};
    uintptr_t prefetch = (uintptr_t)(next ? next : codes);
    (void)n_tokens;
    for (size_t row = 0, n; row < rows; row += n) {
        n = kvt_rows_of_block(rows - row, ROWS_BLOCK);
        blocks[n](&call, row, prefetch);
        prefetch = (uintptr_t)codes; /* once; later blocks prefetch lines that are cached */
    }
}

/* ---- weighted sums ---- */

typedef struct pv_call {
    const float *weight; /* [rows][64] */
    const unsigned char *codes;
    size_t n_tokens, dims_p; /* tokens in excess, to a multiple of 8, have weights of zero */
    const float *alpha;
    float *acc;
    size_t ldacc;
} pv_call;

KVT_INLINE void pv_columns(int type, size_t rows, size_t vectors, const pv_call *call, size_t row,
                           size_t dim, uintptr_t next)
{
    const unsigned char *fifth =
        type == V5 ? call->codes + kvt_v5_index(0, dim, call->dims_p) : call->codes;
    __m512 sum[SUMS_MAX];
    product(type, rows, vectors, call->codes + dim * 4, 64, call->dims_p * 4, fifth, call->dims_p,
            call->n_tokens, call->weight + row * KVT_TOKENS, KVT_TOKENS, next + dim * 4, sum);
    KVT_UNROLL
    for (size_t i = 0; i < rows * vectors; i++) {
        float *to = call->acc + (row + i / vectors) * call->ldacc + dim + i % vectors * 16;
        const __m512 alpha = _mm512_set1_ps(call->alpha[row + i / vectors]);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), alpha, sum[i]));
    }
}

#define PV_BLOCK(type, rows)                                                                       \
    static __attribute__((noinline)) void pv_##type##_##rows(const pv_call *call, size_t row,      \
                                                             uintptr_t next)                       \
    {                                                                                              \
        size_t dim = 0;                                                                            \
        for (; dim + 16 * VECTORS <= call->dims_p; dim += 16 * VECTORS)                            \
            pv_columns(type, rows, VECTORS, call, row, dim, next);                                 \
        for (; dim < call->dims_p; dim += 16)                                                      \
            pv_columns(type, rows, 1, call, row, dim, next);                                       \
    }

/* A token's scale goes into its weight; beyond n_tokens it may be a NaN, and is masked. */
#define PV_KERNEL(type, name)                                                                      \
    PV_BLOCK(type, 1)                                                                              \
    PV_BLOCK(type, 2)                                                                              \
    PV_BLOCK(type, 3)                                                                              \
    PV_BLOCK(type, 4)                                                                              \
    void kvt_avx512_##name(const float *p, size_t rows, const void *codes, const uint16_t *scales, \
                           size_t n_tokens, size_t dims_p, const float *alpha, const void *next,   \
                           float *acc, size_t ldacc)                                               \
    {                                                                                              \
        static void (*const blocks[])(const pv_call *, size_t, uintptr_t) = {                      \
            NULL, pv_##type##_1, pv_##type##_2, pv_##type##_3, pv_##type##_4};                     \
        _Alignas(64) float weight[KVT_ROWS_MAX * KVT_TOKENS];                                      \
        const pv_call call = {weight, codes, n_tokens, dims_p, alpha, acc, ldacc};                 \
        uintptr_t prefetch = (uintptr_t)(next ? next : codes);                                     \
        __m512 scale[4];                                                                           \
        kvt_load_scales(scales, n_tokens, scale);                                                  \
        for (size_t r = 0; r < rows; r++) {                                                        \
            __m512 w[4];                                                                           \
            kvt_weigh(p + r * KVT_TOKENS, scale, w);                                               \
            KVT_UNROLL                                                                             \
            for (size_t v = 0; v < 4; v++)                                                         \
                _mm512_store_ps(weight + r * KVT_TOKENS + 16 * v, w[v]);                           \
        }                                                                                          \
        for (size_t row = 0, n; row < rows; row += n) {                                            \
            n = kvt_rows_of_block(rows - row, ROWS_BLOCK);                                         \
            blocks[n](&call, row, prefetch);                                                       \
            prefetch = (uintptr_t)codes;                                                           \
        }                                                                                          \
    }
PV_KERNEL(V4, pv_i4)
PV_KERNEL(V5, pv_i5)
