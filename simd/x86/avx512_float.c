/*
 * AVX-512 kernels of attention that work in f32: the products of f32 and f16 (and of i8 in f32
 * mode), logits, softmax and merge. The table is in avx512vnni.c.
 *
 * The products are one loop, as in avx2.c with 16 lanes for 8:
 *
 *     for each summand i:  for each vector v:  for each row r:
 *         sum[r][v] += weight[r][i] * lanes(i, v)
 *
 * K: a summand is a dim, a lane a token. V: a summand is a token, a lane a dim. A block of rows
 * shares the loads and conversions of lanes(i, v); up to 24 accumulators leave 8 registers for
 * lanes and a weight. At least one FMA is issued a cycle with a latency of 4, so 4 accumulators
 * suffice to hide it. A lane adds its summands in ascending order, in chains of 64, whatever the
 * shape of the block: a row's result does not depend on the other rows of the call.
 */
#include <math.h>
#include <sleef.h>

#include "simd/exp.h"
#include "simd/x86/prefetch.h"
#include "avx512.h"

/*
 * Rows of a register block, and its accumulators. For f16, 7 and 8 rows are 3 to 8% faster as
 * blocks of 4 + 3 and 4 + 4 than as one block, which has half the vectors.
 */
#define ROWS_BLOCK 8
#define ROWS_BLOCK_F16 6
#define SUMS_MAX 24
/* Dims of a chunk: summed from zero, then added to the score. */
#define CHUNK_DIMS 64

enum { F32, F16, I8 };

/* ---- the product ---- */

/*
 * Element e of each lane's four codes, times 2^24. The byte goes to the top of its lane, where
 * its sign is the lane's sign. Codes have 7 bits, so the conversion is exact.
 */
KVT_INLINE __m512 code_lanes(__m512i lanes, size_t e)
{
    if (e < 3)
        lanes = _mm512_slli_epi32(lanes, (unsigned)(24 - 8 * e));
    if (e > 0)
        lanes = _mm512_and_si512(lanes, _mm512_set1_epi32((int)0xff000000u));
    return _mm512_cvtepi32_ps(lanes);
}
#define CODE_UNIT 0x1p-24f

/* Bytes of 16 lanes, and summands in them. */
KVT_INLINE size_t lane_bytes(int type)
{
    return type == F16 ? 32 : 64;
}

KVT_INLINE size_t lane_summands(int type)
{
    return type == I8 ? 4 : 1;
}

KVT_INLINE __m512 load_lanes(int type, const unsigned char *from, size_t e)
{
    if (type == F32)
        return _mm512_loadu_ps(from);
    if (type == F16)
        return kvt_load_f16((const void *)from);
    return code_lanes(_mm512_loadu_si512(from), e);
}

/* Lines of memory: at + v * vector_bytes, and step further with each summand (group of 4 codes). */
typedef struct lines {
    uintptr_t at;
    size_t vector_bytes, step;
} lines;

/*
 * The two prefetch streams of a product (prefetch.h). next: the next product's memory in ascending
 * order, whatever the order of this product, which trains the hardware prefetcher. again: the
 * second prefetch, half a product before the read: at first this product's own codes of its second
 * half, from summand `wrap` on the lines that `next` passed `back` bytes before.
 */
typedef struct prefetch_lines {
    lines next, again;
    size_t wrap, back;
} prefetch_lines;

/*
 * All sums of a block over n summands, from zero: sum[r * vectors + v]. Vectors are vector_bytes
 * apart, summands (groups of 4 codes) step bytes.
 */
KVT_INLINE void product(int type, size_t rows, size_t vectors, const unsigned char *codes,
                        size_t vector_bytes, size_t step, size_t n, const float *weight, size_t ldw,
                        prefetch_lines prefetch, __m512 *sum)
{
    const size_t cycles = rows * (64 / lane_bytes(type)) * lane_summands(type);
    KVT_UNROLL
    for (size_t i = 0; i < rows * vectors; i++)
        sum[i] = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += lane_summands(type)) {
        if (i == prefetch.wrap) {
            prefetch.again = prefetch.next;
            prefetch.again.at -= prefetch.back;
        }
        KVT_UNROLL
        for (size_t v = 0; v < vectors; v++) /* each line once: it holds two vectors of f16 */
            if (type != F16 || (step > vector_bytes ? v : i) % 2 == 0)
                kvt_prefetch_line(cycles, codes + v * vector_bytes,
                                  prefetch.next.at + v * prefetch.next.vector_bytes,
                                  prefetch.again.at + v * prefetch.again.vector_bytes);
        KVT_UNROLL
        for (size_t e = 0; e < lane_summands(type); e++) {
            __m512 lanes[8];
            KVT_UNROLL
            for (size_t v = 0; v < vectors; v++)
                lanes[v] = load_lanes(type, codes + v * vector_bytes, e);
            KVT_UNROLL
            for (size_t r = 0; r < rows; r++) {
                __m512 w = _mm512_set1_ps(weight[r * ldw + i + e]);
                KVT_UNROLL
                for (size_t v = 0; v < vectors; v++)
                    sum[r * vectors + v] = _mm512_fmadd_ps(w, lanes[v], sum[r * vectors + v]);
            }
        }
        codes += step;
        prefetch.next.at += prefetch.next.step;
        prefetch.again.at += prefetch.again.step;
    }
}

/* ---- scores ---- */

/* What all blocks of one call share. */
typedef struct qk_call {
    const float *q;
    size_t ldq;
    const unsigned char *codes;
    const uint16_t *scales;
    size_t n_tokens, dims_p;
    float *s;
} qk_call;

/*
 * Codes are scaled by 2^24, so a sum above 2^104 overflows f32, where unscaled codes would reach
 * 2^128. Such a score is legal input and must not become infinity, which softmax would make NaN:
 * the lanes that overflowed are recomputed in double. Only those, so that the bytes of slots beyond
 * n_tokens cannot change the result of a live token.
 */
static __attribute__((cold, noinline)) void qk_large(const float *q, const signed char *tile,
                                                     const uint16_t *scales, size_t dims_p,
                                                     unsigned lanes, float *s)
{
    for (size_t t = 0; t < KVT_TILE_TOKENS; t++) {
        double total = 0.0;
        if (!(lanes >> t & 1u))
            continue;
        for (size_t d = 0; d < dims_p; d++)
            total += (double)q[d] * tile[d / 4 * 64 + t * 4 + d % 4];
        s[t] = (float)(total * (double)kvt_f16_to_f32(scales[t]));
    }
}

/* Apply the scales to the sums of one row and tile. */
KVT_INLINE void qk_scale(const qk_call *call, const float *q, const unsigned char *tile,
                         size_t token, float *s)
{
    __m512 x = _mm512_load_ps(s);
    /* x - x is NaN for infinity and NaN, else zero. */
    __m512 zero = _mm512_sub_ps(x, x);
    unsigned large = _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q);
    __m512 scale = kvt_load_f16(call->scales + token);
    _mm512_store_ps(s, _mm512_mul_ps(x, _mm512_mul_ps(scale, _mm512_set1_ps(CODE_UNIT))));
    if (large)
        qk_large(q, (const signed char *)tile, call->scales + token, call->dims_p, large, s);
}

KVT_INLINE void qk_block(int type, size_t rows, size_t vectors, const qk_call *call, size_t row,
                         uintptr_t next)
{
    const size_t step = lane_bytes(type);
    const size_t tile_bytes = call->dims_p / lane_summands(type) * step;
    const float *q = call->q + row * call->ldq;

    for (size_t t = 0; t < call->n_tokens; t += vectors * KVT_TILE_TOKENS) {
        const size_t first_tile = t / KVT_TILE_TOKENS;
        const unsigned char *tile = call->codes + first_tile * tile_bytes;
        float *s = call->s + row * KVT_TOKENS + t;
        for (size_t d = 0; d < call->dims_p; d += CHUNK_DIMS) {
            size_t n = call->dims_p - d < CHUNK_DIMS ? call->dims_p - d : CHUNK_DIMS;
            size_t at = d / lane_summands(type) * step;
            lines from = {next + first_tile * tile_bytes + at * vectors, 64, step * vectors};
            prefetch_lines prefetch = {
                from, {(uintptr_t)tile + at + tile_bytes / 2, tile_bytes, step}, n, 0};
            __m512 sum[SUMS_MAX];
            if (d >= call->dims_p / 2) {
                prefetch.again = from;
                prefetch.again.at -= tile_bytes / 2 * vectors;
            }
            product(type, rows, vectors, tile + at, tile_bytes, step, n, q + d, call->ldq, prefetch,
                    sum);
            KVT_UNROLL
            for (size_t i = 0; i < rows * vectors; i++) {
                float *to = s + i / vectors * KVT_TOKENS + i % vectors * 16;
                _mm512_store_ps(to, d ? _mm512_add_ps(_mm512_load_ps(to), sum[i]) : sum[i]);
            }
        }
        if (type == I8)
            for (size_t r = 0; r < rows; r++)
                for (size_t v = 0; v < vectors; v++)
                    qk_scale(call, q + r * call->ldq, tile + v * tile_bytes, t + v * 16,
                             s + r * KVT_TOKENS + v * 16);
    }
}

#define QK_BLOCK(type, rows, vectors)                                                              \
    static __attribute__((noinline)) void qk_##type##_##rows(const qk_call *call, size_t row,      \
                                                             uintptr_t next)                       \
    {                                                                                              \
        qk_block(type, rows, vectors, call, row, next);                                            \
    }

/* Blocks of rows outside, all tokens inside: the codes of a block of tokens fit L2. */
#define QK_KERNEL(type, name, most, ...)                                                           \
    QK_BLOCK(type, 1, 4)                                                                           \
    QK_BLOCK(type, 2, 4)                                                                           \
    QK_BLOCK(type, 3, 4)                                                                           \
    QK_BLOCK(type, 4, 4)                                                                           \
    QK_BLOCK(type, 5, 4)                                                                           \
    QK_BLOCK(type, 6, 4)                                                                           \
    void kvt_avx512_##name(const float *q, size_t ldq, size_t rows, const void *codes,             \
                           const uint16_t *scales, size_t n_tokens, size_t dims_p,                 \
                           const void *next, float *s)                                             \
    {                                                                                              \
        static void (*const blocks[])(const qk_call *, size_t, uintptr_t) = {                      \
            NULL,          qk_##type##_1, qk_##type##_2, qk_##type##_3,                            \
            qk_##type##_4, qk_##type##_5, qk_##type##_6, __VA_ARGS__};                             \
        const qk_call call = {q, ldq, codes, scales, n_tokens, dims_p, s};                         \
        uintptr_t prefetch = (uintptr_t)(next ? next : codes);                                     \
        for (size_t row = 0, n; row < rows; row += n) {                                            \
            n = kvt_rows_of_block(rows - row, most);                                               \
            blocks[n](&call, row, prefetch);                                                       \
            prefetch = (uintptr_t)codes; /* once; later blocks prefetch lines that are cached */   \
        }                                                                                          \
    }

QK_BLOCK(F32, 7, 2)
QK_BLOCK(F32, 8, 2)
QK_BLOCK(I8, 7, 2)
QK_BLOCK(I8, 8, 2)
QK_KERNEL(F32, qk_f32, ROWS_BLOCK, qk_F32_7, qk_F32_8)
QK_KERNEL(F16, qk_f16, ROWS_BLOCK_F16, NULL)
QK_KERNEL(I8, qk_i8, ROWS_BLOCK, qk_I8_7, qk_I8_8)

/* ---- weighted sums ---- */

typedef struct pv_call {
    const float *weight; /* [rows][64] */
    const unsigned char *codes;
    size_t n_tokens; /* I8: rounded up to 4, the weights in excess are zero */
    size_t dims_p;
    const float *alpha;
    float *acc;
    size_t ldacc;
} pv_call;

KVT_INLINE void pv_columns(int type, size_t rows, size_t vectors, const pv_call *call, size_t row,
                           size_t dim, uintptr_t next)
{
    const size_t bytes = lane_bytes(type), step = call->dims_p / 16 * bytes;
    const size_t wrap = KVT_TOKENS / 2, summands = KVT_TOKENS / lane_summands(type);
    const unsigned char *codes = call->codes + dim / 16 * bytes;
    const prefetch_lines prefetch = {{next + dim / 16 * bytes * summands, bytes, bytes * vectors},
                                     {(uintptr_t)codes + step * summands / 2, bytes, step},
                                     wrap,
                                     bytes * vectors * summands / 2};
    __m512 sum[SUMS_MAX];
    product(type, rows, vectors, codes, bytes, step, call->n_tokens,
            call->weight + row * KVT_TOKENS, KVT_TOKENS, prefetch, sum);
    KVT_UNROLL
    for (size_t i = 0; i < rows * vectors; i++) {
        float *to = call->acc + (row + i / vectors) * call->ldacc + dim + i % vectors * 16;
        __m512 alpha = _mm512_set1_ps(call->alpha[row + i / vectors]);
        __m512 x = type == I8 ? _mm512_mul_ps(sum[i], _mm512_set1_ps(CODE_UNIT)) : sum[i];
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), alpha, x));
    }
}

/* As many dims as the wide block divides, then narrower blocks, down to 16 dims. */
#define PV_BLOCK(type, rows, vectors)                                                              \
    static __attribute__((noinline)) void pv_##type##_##rows(const pv_call *call, size_t row,      \
                                                             uintptr_t prefetch)                   \
    {                                                                                              \
        size_t dim = 0;                                                                            \
        for (; dim + 16 * vectors <= call->dims_p; dim += 16 * vectors)                            \
            pv_columns(type, rows, vectors, call, row, dim, prefetch);                             \
        for (; vectors > 4 && dim + 64 <= call->dims_p; dim += 64)                                 \
            pv_columns(type, rows, 4, call, row, dim, prefetch);                                   \
        for (; vectors > 2 && dim + 32 <= call->dims_p; dim += 32)                                 \
            pv_columns(type, rows, 2, call, row, dim, prefetch);                                   \
        for (; dim < call->dims_p; dim += 16)                                                      \
            pv_columns(type, rows, 1, call, row, dim, prefetch);                                   \
    }

#define PV_KERNEL(type, name, most, ...)                                                           \
    PV_BLOCK(type, 1, 8)                                                                           \
    PV_BLOCK(type, 2, 8)                                                                           \
    PV_BLOCK(type, 3, 4)                                                                           \
    PV_BLOCK(type, 4, 4)                                                                           \
    PV_BLOCK(type, 5, 4)                                                                           \
    PV_BLOCK(type, 6, 4)                                                                           \
    static void name(const pv_call *call, size_t rows, const void *next)                           \
    {                                                                                              \
        static void (*const blocks[])(const pv_call *, size_t, uintptr_t) = {                      \
            NULL,          pv_##type##_1, pv_##type##_2, pv_##type##_3,                            \
            pv_##type##_4, pv_##type##_5, pv_##type##_6, __VA_ARGS__};                             \
        uintptr_t prefetch = (uintptr_t)(next ? next : call->codes);                               \
        for (size_t row = 0, n; row < rows; row += n) {                                            \
            n = kvt_rows_of_block(rows - row, most);                                               \
            blocks[n](call, row, prefetch);                                                        \
            prefetch = (uintptr_t)call->codes;                                                     \
        }                                                                                          \
    }

PV_BLOCK(F32, 7, 2)
PV_BLOCK(F32, 8, 2)
PV_BLOCK(I8, 7, 2)
PV_BLOCK(I8, 8, 2)
PV_KERNEL(F32, pv_rows_f32, ROWS_BLOCK, pv_F32_7, pv_F32_8)
PV_KERNEL(F16, pv_rows_f16, ROWS_BLOCK_F16, NULL)
PV_KERNEL(I8, pv_rows_i8, ROWS_BLOCK, pv_I8_7, pv_I8_8)

void kvt_avx512_pv_f32(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    const pv_call call = {p, codes, n_tokens, dims_p, alpha, acc, ldacc};
    (void)scales;
    pv_rows_f32(&call, rows, next);
}

void kvt_avx512_pv_f16(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    const pv_call call = {p, codes, n_tokens, dims_p, alpha, acc, ldacc};
    (void)scales;
    pv_rows_f16(&call, rows, next);
}

/*
 * A token's scale is multiplied into its weight, once a row instead of once a dim. Beyond n_tokens
 * p is zero, but the scale may be a NaN, so it is masked. No overflow: p * scale * 127 * 2^24 is
 * below 2^48 for p <= 1.
 */
void kvt_avx512_pv_i8(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                      size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                      float *acc, size_t ldacc)
{
    float weight[KVT_ROWS_MAX * KVT_TOKENS];
    const pv_call call = {weight, codes, kvt_round_up(n_tokens, 4), dims_p, alpha, acc, ldacc};

    for (size_t t = 0; t < n_tokens; t += 16) {
        __m512 scale = _mm512_maskz_cvtph_ps(kvt_lanes_below(t, n_tokens),
                                             _mm256_loadu_si256((const void *)(scales + t)));
        for (size_t r = 0; r < rows; r++)
            _mm512_storeu_ps(weight + r * KVT_TOKENS + t,
                             _mm512_mul_ps(_mm512_loadu_ps(p + r * KVT_TOKENS + t), scale));
    }
    pv_rows_i8(&call, rows, next);
}

/* ---- the small kernels between the products ---- */

/* Up to 4 rows share the conversions. Two accumulators a row, of even and odd vectors. */
KVT_INLINE void dots_block(const float *q, size_t ldq, size_t rows, const uint16_t *b, size_t n,
                           float *out)
{
    __m512 even[4], odd[4];
    size_t i = 0;
    KVT_UNROLL
    for (size_t r = 0; r < rows; r++)
        even[r] = odd[r] = _mm512_setzero_ps();
    for (; i + 32 <= n; i += 32) {
        __m512 x = kvt_load_f16(b + i);
        __m512 y = kvt_load_f16(b + i + 16);
        KVT_UNROLL
        for (size_t r = 0; r < rows; r++) {
            even[r] = _mm512_fmadd_ps(_mm512_loadu_ps(q + r * ldq + i), x, even[r]);
            odd[r] = _mm512_fmadd_ps(_mm512_loadu_ps(q + r * ldq + i + 16), y, odd[r]);
        }
    }
    for (; i < n; i += 16) {
        __mmask16 mask = kvt_lanes_below(i, n);
        __m512 x = _mm512_maskz_cvtph_ps(mask, _mm256_maskz_loadu_epi16(mask, b + i));
        KVT_UNROLL
        for (size_t r = 0; r < rows; r++)
            even[r] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, q + r * ldq + i), x, even[r]);
    }
    KVT_UNROLL
    for (size_t r = 0; r < rows; r++)
        out[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
}

void kvt_avx512_dots_f16(const float *q, size_t ldq, size_t rows, const uint16_t *b, size_t n,
                         float *out)
{
    for (; rows >= 4; rows -= 4, q += 4 * ldq, out += 4)
        dots_block(q, ldq, 4, b, n, out);
    for (; rows > 0; rows--, q += ldq, out++)
        dots_block(q, ldq, 1, b, n, out);
}

/* The tail's lanes are computed with whatever s holds there: up to 63 it may be written. */
void kvt_avx512_logits(float *s, size_t n, float add, float scale, float softcap)
{
    const __m512 adds = _mm512_set1_ps(add), scales = _mm512_set1_ps(scale);
    for (size_t t = 0; t < n; t += 16)
        _mm512_storeu_ps(s + t, _mm512_mul_ps(_mm512_add_ps(_mm512_loadu_ps(s + t), adds), scales));
    if (softcap > 0.0f) {
        const __m512 cap = _mm512_set1_ps(softcap);
        for (size_t t = 0; t < n; t += 16) {
            __m512 x = _mm512_div_ps(_mm512_loadu_ps(s + t), cap);
            _mm512_storeu_ps(s + t, _mm512_mul_ps(cap, Sleef_tanhf16_u10avx512f(x)));
        }
    }
}

/* ---- softmax ---- */

#define EACH(result)                                                                               \
    KVT_UNROLL                                                                                     \
    for (size_t i = 0; i < count; i++)                                                             \
    result

/* exp of `count` vectors of x <= 0 (exp.h), step by step: a constant count, up to 4. */
KVT_INLINE void exponentials(__m512 *x, size_t count)
{
    const __m512 magic = _mm512_set1_ps(KVT_EXP_MAGIC);
    __m512 t[4], p[4];
    /* vmaxps returns its second operand where that is a NaN. */
    EACH(x[i] = _mm512_max_ps(_mm512_set1_ps(KVT_EXP_LEAST), x[i]));
    EACH(t[i] = _mm512_fmadd_ps(x[i], _mm512_set1_ps(KVT_EXP_LOG2E), magic));
    EACH(p[i] = _mm512_sub_ps(t[i], magic));
    EACH(x[i] = _mm512_fnmadd_ps(p[i], _mm512_set1_ps(KVT_EXP_LN2), x[i]));
    EACH(p[i] = _mm512_set1_ps(KVT_EXP_C6));
#define HORNER(c) EACH(p[i] = _mm512_fmadd_ps(p[i], x[i], _mm512_set1_ps(c)))
    HORNER(KVT_EXP_C5);
    HORNER(KVT_EXP_C4);
    HORNER(KVT_EXP_C3);
    HORNER(KVT_EXP_C2);
    HORNER(1.0f);
    HORNER(1.0f);
#undef HORNER
    EACH(t[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t[i]), 23)));
    EACH(x[i] = _mm512_mul_ps(p[i], t[i]));
}

/*
 * Reduce 4 vectors to one, lane i from vector i: 13 instructions, where 4 single reductions take
 * 32. A row is reduced in the same order whatever the other rows are.
 */
#define FOLD_4(name, fold)                                                                         \
    KVT_INLINE __m128 name(const __m512 *x)                                                        \
    {                                                                                              \
        __m512d a = _mm512_castps_pd(                                                              \
            _mm512_##fold(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));        \
        __m512d b = _mm512_castps_pd(                                                              \
            _mm512_##fold(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));        \
        __m512 y = _mm512_##fold(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),                       \
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));                      \
        __m256 z = _mm256_##fold(_mm512_castps512_ps256(y), _mm512_extractf32x8_ps(y, 1));         \
        return _mm_##fold(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1));                 \
    }
FOLD_4(fold_max, max_ps)
FOLD_4(fold_sum, add_ps)

/* 1 to 4 floats. Masked stores are slow on some processors, and no load is forwarded from them. */
KVT_INLINE __m128 load_floats(const float *from, size_t n)
{
    if (n == 1)
        return _mm_load_ss(from);
    if (n == 4)
        return _mm_loadu_ps(from);
    return _mm_movelh_ps(_mm_castsi128_ps(_mm_loadl_epi64((const void *)from)),
                         n == 3 ? _mm_load_ss(from + 2) : _mm_setzero_ps());
}

KVT_INLINE void store_floats(float *to, size_t n, __m128 x)
{
    if (n == 4)
        _mm_storeu_ps(to, x);
    else if (n == 1)
        _mm_store_ss(to, x);
    else
        _mm_storel_pi((void *)to, x);
    if (n == 3)
        _mm_store_ss(to + 2, _mm_movehl_ps(x, x));
}

/*
 * 1 to 4 rows, a constant number: a lane of m, l and alpha each. What comes before a row's
 * exponentials, and after them, is a chain of some 20 dependent instructions, so the rows share it.
 */
KVT_INLINE void softmax_rows(float *s, size_t rows, const __mmask16 *alive, const float *add,
                             float scale, float *m, float *l, float *alpha)
{
    const __m512 scales = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-INFINITY);
    const __m128 adds = add ? load_floats(add, rows) : _mm_setzero_ps(), old = load_floats(m, rows);
    const size_t count = 4; /* vectors of a row */
    _Alignas(16) float added[4], shift[4];
    __m512 x[4], factors;
    __m128 maxima, shifts, factor;
    __mmask8 visible;

    /* Maxima of the raw scores: add and scale (> 0) are monotonic, also after rounding. */
    KVT_UNROLL
    for (size_t r = 0; r < 4; r++) {
        const float *row = s + r * KVT_TOKENS;
        x[r] = lowest; /* lanes of rows beyond `rows` are never stored */
        if (r < rows)
            EACH(x[r] = _mm512_mask_max_ps(x[r], alive[i], x[r], _mm512_load_ps(row + 16 * i)));
    }
    maxima = _mm_mul_ps(_mm_add_ps(fold_max(x), adds), _mm_set1_ps(scale));
    maxima = _mm_max_ps(maxima, old);
    store_floats(m, rows, maxima);
    /* All masked so far: -inf - -inf would be NaN; with a shift of 0 every exp(-inf) is 0. */
    visible = _mm_cmp_ps_mask(maxima, _mm512_castps512_ps128(lowest), _CMP_NEQ_UQ);
    shifts = _mm_maskz_mov_ps(visible, maxima);
    _mm_store_ps(shift, shifts);
    _mm_store_ps(added, adds);

    KVT_UNROLL
    for (size_t r = 0; r < 4; r++) {
        float *row = s + r * KVT_TOKENS;
        __m512 p[4];
        x[r] = _mm512_setzero_ps();
        if (r >= rows)
            continue;
        EACH(p[i] = _mm512_add_ps(_mm512_load_ps(row + 16 * i), _mm512_set1_ps(added[r])));
        EACH(p[i] = _mm512_sub_ps(_mm512_mul_ps(p[i], scales), _mm512_set1_ps(shift[r])));
        exponentials(p, 4);
        /* Dead vectors too: one length for all is faster. */
        EACH(p[i] = _mm512_maskz_mov_ps(alive[i], p[i]));
        EACH(_mm512_store_ps(row + 16 * i, p[i]));
        x[r] = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
    }

    /* gcc has _mm512_zextps128_ps512 from 10 on only. */
    factors = _mm512_insertf32x4(_mm512_setzero_ps(), _mm_sub_ps(old, shifts), 0);
    exponentials(&factors, 1);
    factor = _mm_mask_mov_ps(_mm_set1_ps(1.0f), visible, _mm512_castps512_ps128(factors));
    store_floats(alpha, rows, factor);
    factor = _mm_mul_ps(load_floats(l, rows), factor);
    store_floats(l, rows, _mm_add_ps(factor, fold_sum(x)));
}
#undef EACH

void kvt_avx512_softmax(float *s, size_t rows, size_t n, const float *add, float scale, float *m,
                        float *l, float *alpha)
{
    __mmask16 alive[4];
    size_t r = 0;
    KVT_UNROLL
    for (size_t v = 0; v < 4; v++)
        alive[v] = kvt_lanes_below(16 * v, n);
#define ROWS(count)                                                                                \
    softmax_rows(s + r * KVT_TOKENS, count, alive, add ? add + r : NULL, scale, m + r, l + r,      \
                 alpha + r)
    for (; r + 4 <= rows; r += 4)
        ROWS(4);
    switch (rows - r) {
    case 3: ROWS(3); break;
    case 2: ROWS(2); break;
    case 1: ROWS(1); break;
    default: break;
    }
#undef ROWS
}

void kvt_avx512_merge(float *acc, float *m, float *l, const float *acc2, float m2, float l2,
                      size_t dims_p)
{
    float maximum = *m > m2 ? *m : m2, a, b;
    if (m2 == -INFINITY) {
        *l += l2; /* 0, or a NaN: all visible logits are beyond f32 */
        return;
    }
    a = Sleef_expf_u10(*m - maximum);
    b = Sleef_expf_u10(m2 - maximum);
    for (size_t d = 0; d < dims_p; d += 16) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(acc2 + d), _mm512_set1_ps(b));
        _mm512_storeu_ps(acc + d, _mm512_fmadd_ps(_mm512_loadu_ps(acc + d), _mm512_set1_ps(a), x));
    }
    *l = *l * a + l2 * b;
    *m = maximum;
}

float kvt_avx512_finish(float *acc, size_t dims_p, float m, float l, float sink)
{
    float maximum = m > sink ? m : sink, a, denominator;
    __m512 factor;
    if (m == -INFINITY) { /* nothing visible */
        for (size_t d = 0; d < dims_p; d += 16)
            _mm512_storeu_ps(acc + d, _mm512_setzero_ps());
        return sink;
    }
    a = Sleef_expf_u10(m - maximum);
    denominator = l * a + Sleef_expf_u10(sink - maximum); /* exp(-inf) is 0 */
    /* At most 1 / l, and l is at least 1: its largest term is exp(0). */
    factor = _mm512_set1_ps(a / denominator);
    for (size_t d = 0; d < dims_p; d += 16)
        _mm512_storeu_ps(acc + d, _mm512_mul_ps(_mm512_loadu_ps(acc + d), factor));
    return maximum + Sleef_logf_u10(denominator);
}
