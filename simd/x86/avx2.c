/*
 * AVX2 + FMA + F16C kernels: the products of attention in f32, and the table, where they meet those
 * of the other files: avx2_i8.c and avx2_4bit.c (integer products), avx2_softmax.c (between the
 * products), avx2_rows.c, avx2_append.c, avx2_seal.c, avx2_seal_4bit.c, avx2_transpose.c.
 *
 * QK and PV are the same loop. QK sums over dims and has a token in each lane; PV sums over tokens
 * and has a dim in each lane; the tiles are laid out so that a vector load yields 8 lanes of one
 * summand either way:
 *
 *     for each summand i:  for each vector v:  for each row r:
 *         sum[r][v] += weight[r][i] * lanes(i, v)
 *
 * From the simple form to the fast one:
 *  1. Blocks of up to 6 rows share the loads and the conversion of lanes(i, v), which cost more
 *     than the FMA. 6 rows by 2 vectors are 12 accumulators; with 2 vectors of lanes, a weight and
 *     a constant they take all 16 registers.
 *  2. An FMA has a latency of 4 cycles and two are issued a cycle, so 8 independent accumulators
 *     hide the latency: blocks of fewer rows take more vectors, one row 8 of them (all 64 tokens,
 *     or 64 dims, at once).
 *  3. More than 6 rows are cut into blocks of equal size (7 = 4 + 3), as a block of one row would
 *     pay the whole conversion for a single FMA.
 *
 * A lane adds its summands in ascending order whatever the shape of the block, so a row's result
 * does not depend on the other rows of the call. Chains of additions are short: 64 tokens, or 64
 * dims and then the sum of these chunks. The rounding error of a chain of n grows as
 * sqrt(n / 3) * 2^-25 of the sum: 1.4e-7 for 64.
 *
 * Slots beyond n_tokens may hold NaN patterns. They either stay in the lanes of those tokens (QK),
 * or are not loaded (PV).
 */
#include "avx2_product.h"

/* Dims of a chunk: summed from zero, then added to the score. */
#define CHUNK_DIMS 64

enum { F32, F16, I8 };

/* ---- the product ---- */

/*
 * Element e of each lane's four codes, times 2^24. The byte goes to the top of its lane, where
 * its sign is the lane's sign: one shift (e = 0), one mask (e = 3) or both; shifting back down
 * would be one more. Codes have 7 bits, so the conversion is exact.
 */
KVT_INLINE __m256 code_lanes(__m256i lanes, int e)
{
    if (e < 3)
        lanes = _mm256_slli_epi32(lanes, 24 - 8 * e);
    if (e > 0)
        lanes = _mm256_and_si256(lanes, _mm256_set1_epi32((int)0xff000000u));
    return _mm256_cvtepi32_ps(lanes);
}
#define CODE_UNIT 0x1p-24f

/* Bytes of 8 lanes, and summands in them. */
KVT_INLINE size_t lane_bytes(int type)
{
    return type == F16 ? 16 : 32;
}

KVT_INLINE size_t lane_summands(int type)
{
    return type == I8 ? 4 : 1;
}

KVT_INLINE size_t element_bytes(int type)
{
    return lane_bytes(type) / 8 / lane_summands(type);
}

KVT_INLINE __m256 load_lanes(int type, const unsigned char *from, int e)
{
    if (type == F32)
        return _mm256_castsi256_ps(kvt_load_256(from));
    if (type == F16)
        return _mm256_cvtph_ps(kvt_load_128(from));
    return code_lanes(kvt_load_256(from), e);
}

/* Summand e of a group, for the vectors v and v + 1 that a pair of loads yields. */
KVT_INLINE void multiply(int type, size_t rows, size_t vectors, size_t v, int e,
                         const unsigned char *pair, const float *weight, size_t ldw, __m256 *sum)
{
    __m256 a = load_lanes(type, pair, e);
    __m256 b = load_lanes(type, pair + lane_bytes(type), e);
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        __m256 w = _mm256_broadcast_ss(weight + (r)*ldw + e);                                      \
        sum[(r)*vectors + v] = _mm256_fmadd_ps(w, a, sum[(r)*vectors + v]);                        \
        sum[(r)*vectors + v + 1] = _mm256_fmadd_ps(w, b, sum[(r)*vectors + v + 1]);                \
    }
    KVT_EACH_ROW(MULTIPLY)
#undef MULTIPLY
}

KVT_INLINE void multiply_pair(int type, size_t rows, size_t vectors, size_t v,
                              const unsigned char *codes, size_t pair_bytes, const float *weight,
                              size_t ldw, __m256 *sum)
{
    const unsigned char *pair = codes + v / 2 * pair_bytes;
    if (v >= vectors)
        return;
    /* Else compilers hoist the weights of all pairs into registers, and spill them. */
    KVT_RELOAD();
    multiply(type, rows, vectors, v, 0, pair, weight, ldw, sum);
    if (type == I8) {
        multiply(type, rows, vectors, v, 1, pair, weight, ldw, sum);
        multiply(type, rows, vectors, v, 2, pair, weight, ldw, sum);
        multiply(type, rows, vectors, v, 3, pair, weight, ldw, sum);
    }
}

/*
 * All sums of a block over n summands, from zero. Pairs of vectors are pair_bytes apart; a group
 * of summands (4 codes, or 1 element) is step bytes after the last.
 */
KVT_INLINE void product(int type, size_t rows, size_t vectors, const unsigned char *codes,
                        size_t pair_bytes, size_t step, size_t n, const float *weight, size_t ldw,
                        kvt_prefetch_state *prefetch, __m256 *sum)
{
#define ZERO(i) sum[i] = _mm256_setzero_ps();
    KVT_EACH_SUM(ZERO)
#undef ZERO
    for (size_t i = 0; i < n; i += lane_summands(type)) {
        const float *w = weight + i;
        kvt_prefetch_bytes(prefetch, codes, pair_bytes, vectors * lane_bytes(type));
        multiply_pair(type, rows, vectors, 0, codes, pair_bytes, w, ldw, sum);
        multiply_pair(type, rows, vectors, 2, codes, pair_bytes, w, ldw, sum);
        multiply_pair(type, rows, vectors, 4, codes, pair_bytes, w, ldw, sum);
        multiply_pair(type, rows, vectors, 6, codes, pair_bytes, w, ldw, sum);
        codes += step;
    }
}

/* Vectors multiplied for each line of codes. */
KVT_INLINE size_t work_of(int type, size_t rows)
{
    return rows * (64 / lane_bytes(type)) * lane_summands(type);
}

/* ---- scores ---- */

/* What all blocks of one call share. */
typedef struct qk_call {
    const float *q;
    size_t ldq;
    const unsigned char *codes;
    const uint16_t *scales;
    size_t dims_p;
    kvt_sides sides;
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
    const __m256 unit = _mm256_set1_ps(CODE_UNIT);
    __m256 a = _mm256_loadu_ps(s), b = _mm256_loadu_ps(s + 8);
    /* x - x is NaN for infinity and NaN, else zero. */
    __m256 zero_a = _mm256_sub_ps(a, a), zero_b = _mm256_sub_ps(b, b);
    int large = _mm256_movemask_ps(_mm256_cmp_ps(zero_a, zero_a, _CMP_UNORD_Q)) |
                _mm256_movemask_ps(_mm256_cmp_ps(zero_b, zero_b, _CMP_UNORD_Q)) << 8;
    __m256 scale_a = _mm256_cvtph_ps(kvt_load_128(call->scales + token));
    __m256 scale_b = _mm256_cvtph_ps(kvt_load_128(call->scales + token + 8));
    _mm256_storeu_ps(s, _mm256_mul_ps(a, _mm256_mul_ps(scale_a, unit)));
    _mm256_storeu_ps(s + 8, _mm256_mul_ps(b, _mm256_mul_ps(scale_b, unit)));
    if (large)
        qk_large(q, (const signed char *)tile, call->scales + token, call->dims_p, (unsigned)large,
                 s);
}

/* 8 * vectors tokens from `token` on, of the rows from `row` on. */
KVT_INLINE void qk_block(int type, size_t rows, size_t vectors, const qk_call *call, size_t row,
                         size_t token)
{
    const size_t step = 2 * lane_bytes(type);
    const size_t tile_bytes = call->dims_p / lane_summands(type) * step;
    const unsigned char *tile = call->codes + token / KVT_TILE_TOKENS * tile_bytes;
    const float *q = call->q + row * call->ldq;
    float *s = call->s + row * KVT_TOKENS + token;
    kvt_prefetch_state prefetch = kvt_prefetch_begin(
        &call->sides, row, token * call->dims_p * element_bytes(type), work_of(type, rows));
    __m256 sum[KVT_SUMS_MAX];

    for (size_t d = 0; d < call->dims_p; d += CHUNK_DIMS) {
        size_t n = call->dims_p - d < CHUNK_DIMS ? call->dims_p - d : CHUNK_DIMS;
        product(type, rows, vectors, tile + d / lane_summands(type) * step, tile_bytes, step, n,
                q + d, call->ldq, &prefetch, sum);
#define ADD(i)                                                                                     \
    if ((i) < rows * vectors) {                                                                    \
        float *to = s + (i) / vectors * KVT_TOKENS + (i) % vectors * 8;                            \
        _mm256_storeu_ps(to, d ? _mm256_add_ps(_mm256_loadu_ps(to), sum[i]) : sum[i]);             \
    }
        KVT_EACH_SUM(ADD)
#undef ADD
    }
    if (type == I8)
        for (size_t r = 0; r < rows; r++)
            for (size_t v = 0; v < vectors; v += 2)
                qk_scale(call, q + r * call->ldq, tile + v / 2 * tile_bytes, token + v * 8,
                         s + r * KVT_TOKENS + v * 8);
}

#define QK_BLOCK(type, rows, vectors)                                                              \
    static __attribute__((noinline)) void qk_##type##_##rows(const qk_call *call, size_t row,      \
                                                             size_t token, size_t end)             \
    {                                                                                              \
        for (; token < end; token += 8 * vectors)                                                  \
            qk_block(type, rows, vectors, call, row, token);                                       \
    }

/*
 * Loop order: spans of tokens outside, blocks of rows inside, so that K is read from memory once
 * and the span stays in L1. A span is a multiple of every block's width: 32 tokens (64 for one
 * row). The last one may extend beyond n_tokens; those scores are ignored.
 */
#define QK_KERNEL(type, linkage, name)                                                             \
    QK_BLOCK(type, 1, 8)                                                                           \
    QK_BLOCK(type, 2, 4)                                                                           \
    QK_BLOCK(type, 3, 4)                                                                           \
    QK_BLOCK(type, 4, 2)                                                                           \
    QK_BLOCK(type, 5, 2)                                                                           \
    QK_BLOCK(type, 6, 2)                                                                           \
    linkage void name(const float *q, size_t ldq, size_t rows, const void *codes,                  \
                      const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,    \
                      float *s)                                                                    \
    {                                                                                              \
        static void (*const blocks[])(const qk_call *, size_t, size_t, size_t) = {                 \
            NULL,          qk_##type##_1, qk_##type##_2, qk_##type##_3,                            \
            qk_##type##_4, qk_##type##_5, qk_##type##_6};                                          \
        const size_t bytes = KVT_TOKENS * dims_p * element_bytes(type);                            \
        const qk_call call = {q, ldq, codes, scales, dims_p, {next, codes, bytes}, s};             \
        const size_t span = rows == 1 ? KVT_TOKENS : 32;                                           \
        for (size_t token = 0; token < n_tokens; token += span) {                                  \
            size_t left = n_tokens - token, end = token + (left < span ? left : span);             \
            for (size_t row = 0, n; row < rows; row += n) {                                        \
                n = kvt_rows_of_block(rows - row);                                                 \
                blocks[n](&call, row, token, end);                                                 \
            }                                                                                      \
        }                                                                                          \
    }

QK_KERNEL(F32, static, qk_f32)
QK_KERNEL(F16, static, qk_f16)
QK_KERNEL(I8, , kvt_avx2_qk_i8)

/* ---- weighted sums ---- */

typedef struct pv_call {
    const float *weight; /* [rows][64] */
    const unsigned char *codes;
    size_t n_tokens; /* I8: rounded up to 4, the weights in excess are zero */
    size_t dims_p;
    const float *alpha;
    kvt_sides sides;
    float *acc;
    size_t ldacc;
} pv_call;

/* 8 * vectors dims from `dim` on, of the rows from `row` on. */
KVT_INLINE void pv_block(int type, size_t rows, size_t vectors, const pv_call *call, size_t row,
                         size_t dim)
{
    kvt_prefetch_state prefetch = kvt_prefetch_begin(
        &call->sides, row, dim * KVT_TOKENS * element_bytes(type), work_of(type, rows));
    __m256 sum[KVT_SUMS_MAX];
    product(type, rows, vectors, call->codes + dim / 8 * lane_bytes(type), 2 * lane_bytes(type),
            call->dims_p / 8 * lane_bytes(type), call->n_tokens, call->weight + row * KVT_TOKENS,
            KVT_TOKENS, &prefetch, sum);
#define ADD(i)                                                                                     \
    if ((i) < rows * vectors) {                                                                    \
        float *to = call->acc + (row + (i) / vectors) * call->ldacc + dim + (i) % vectors * 8;     \
        __m256 x = type == I8 ? _mm256_mul_ps(sum[i], _mm256_set1_ps(CODE_UNIT)) : sum[i];         \
        __m256 alpha = _mm256_broadcast_ss(call->alpha + row + (i) / vectors);                     \
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_loadu_ps(to), alpha, x));                      \
    }
    KVT_EACH_SUM(ADD)
#undef ADD
}

/* As many dims as the wide block divides, the rest 16 at a time. */
#define PV_BLOCK(type, rows, vectors)                                                              \
    static __attribute__((noinline)) void pv_##type##_##rows(const pv_call *call, size_t row,      \
                                                             size_t dim, size_t end)               \
    {                                                                                              \
        for (; dim + 8 * vectors <= end; dim += 8 * vectors)                                       \
            pv_block(type, rows, vectors, call, row, dim);                                         \
        for (; vectors > 2 && dim < end; dim += 16)                                                \
            pv_block(type, rows, 2, call, row, dim);                                               \
    }

/* Columns of dims outside, rows inside: a column of V stays in L1. */
#define PV_KERNEL(type, name)                                                                      \
    PV_BLOCK(type, 1, 8)                                                                           \
    PV_BLOCK(type, 2, 4)                                                                           \
    PV_BLOCK(type, 3, 4)                                                                           \
    PV_BLOCK(type, 4, 2)                                                                           \
    PV_BLOCK(type, 5, 2)                                                                           \
    PV_BLOCK(type, 6, 2)                                                                           \
    static void name(const pv_call *call, size_t rows)                                             \
    {                                                                                              \
        static void (*const blocks[])(const pv_call *, size_t, size_t, size_t) = {                 \
            NULL,          pv_##type##_1, pv_##type##_2, pv_##type##_3,                            \
            pv_##type##_4, pv_##type##_5, pv_##type##_6};                                          \
        const size_t span = rows <= KVT_ROWS_BLOCK ? call->dims_p : 32;                            \
        for (size_t dim = 0; dim < call->dims_p; dim += span) {                                    \
            size_t left = call->dims_p - dim, end = dim + (left < span ? left : span);             \
            for (size_t row = 0, n; row < rows; row += n) {                                        \
                n = kvt_rows_of_block(rows - row);                                                 \
                blocks[n](call, row, dim, end);                                                    \
            }                                                                                      \
        }                                                                                          \
    }

PV_KERNEL(F32, pv_rows_f32)
PV_KERNEL(F16, pv_rows_f16)
PV_KERNEL(I8, pv_rows_i8)

static void pv_f32(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                   size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                   size_t ldacc)
{
    const kvt_sides sides = {next, codes, KVT_TOKENS * dims_p * element_bytes(F32)};
    const pv_call call = {p, codes, n_tokens, dims_p, alpha, sides, acc, ldacc};
    (void)scales;
    pv_rows_f32(&call, rows);
}

static void pv_f16(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                   size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                   size_t ldacc)
{
    const kvt_sides sides = {next, codes, KVT_TOKENS * dims_p * element_bytes(F16)};
    const pv_call call = {p, codes, n_tokens, dims_p, alpha, sides, acc, ldacc};
    (void)scales;
    pv_rows_f16(&call, rows);
}

/*
 * A token's scale is multiplied into its weight, once a row instead of once a dim. Beyond n_tokens
 * p is zero, but the scale may be a NaN, so the product is masked. No overflow: p * scale * 127 *
 * 2^24 is below 2^48 for p <= 1.
 */
void kvt_avx2_pv_i8(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                    size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                    float *acc, size_t ldacc)
{
    float weight[KVT_ROWS_MAX * KVT_TOKENS];
    const kvt_sides sides = {next, codes, KVT_TOKENS * dims_p};
    const pv_call call = {weight, codes, kvt_round_up(n_tokens, 4), dims_p, alpha, sides,
                          acc,    ldacc};
    for (size_t t = 0; t < n_tokens; t += 8) {
        __m256 scale = _mm256_cvtph_ps(kvt_load_128(scales + t));
        __m256 alive = kvt_lanes_below(t, n_tokens);
        for (size_t r = 0; r < rows; r++) {
            __m256 x = _mm256_mul_ps(_mm256_loadu_ps(p + r * KVT_TOKENS + t), scale);
            _mm256_storeu_ps(weight + r * KVT_TOKENS + t, _mm256_and_ps(x, alive));
        }
    }
    pv_rows_i8(&call, rows);
}

/* Missing entries are inherited from scalar: plain copies, which the compiler vectorizes. */
/* clang-format off */
const kvt_kernels kvt_kernels_avx2 = {
    .isa = "avx2",
#define ENTRY(name) .name = kvt_avx2_##name,
    KVT_AVX2_APPEND_LIST(ENTRY)
    KVT_AVX2_SEAL_LIST(ENTRY)
    KVT_AVX2_I8_LIST(ENTRY)
    KVT_AVX2_4BIT_LIST(ENTRY)
    KVT_AVX2_SOFTMAX_LIST(ENTRY)
    KVT_AVX2_TRANSPOSE_LIST(ENTRY)
#undef ENTRY
    .qk_f32 = qk_f32,
    .qk_f16 = qk_f16,
    .qk_i8 = kvt_avx2_qk_i8,
    /* Fast is near: fewer bits are not faster (avx2_i8.c). */
    .pack_q_fast = kvt_avx2_pack_q_near,
    .qk_i8_fast = kvt_avx2_qk_i8_near,
    .pv_i8_fast = kvt_avx2_pv_i8_near,
    .pv_f32 = pv_f32,
    .pv_f16 = pv_f16,
    .pv_i8 = kvt_avx2_pv_i8,
};
/* clang-format on */
