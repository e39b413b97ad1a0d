/*
 * AVX2 kernels of attention over i8 by integer dot products. The table that names them is in
 * avx2.c.
 *
 * vpmaddwd multiplies pairs of int16 and adds the two products: 16 products an instruction where
 * an f32 FMA has 8, at the same throughput. Codes are bytes, four summands to a 32-bit lane, and
 * are widened in their lanes: bytes 0 and 2 by a left and an arithmetic right shift, bytes 1 and 3
 * by a right shift. Weights (a row's packed q, or its rounded p) are stored as int16 in that order,
 * 0 2 1 3, and a pair of them is broadcast:
 *
 *     for each group of 4 summands:  for each half h of it:
 *         for each vector v:  for each row r:
 *             sum[r][v] += vpmaddwd(widened(codes(v), h), weights(r, h))
 *
 * From the simple form to the fast one:
 *  1. Blocks of up to 6 rows by 2 vectors share the widening. 12 accumulators, 2 vectors of codes,
 *     a pair of weights and a product take all 16 registers. The codes are loaded again for the
 *     second half, as no register is free for them.
 *  2. One or two rows keep the weights in registers instead and pass over 4 vectors, which widens
 *     each vector once and halves the broadcasts.
 *  3. More than 6 rows are cut into blocks of equal size: 7 = 4 + 3.
 *
 * Integer sums are exact, so a result does not depend on the order or on the shape of a block.
 *
 * Fewer bits are not faster. vpmaddubsw multiplies bytes without widening, but only one of its
 * operands is signed, and its sums of two products saturate at int16. QK would need a vpsignb for
 * each row and vector, and was slower; PV with 7-bit weights was a fifth faster in cache, no faster
 * from memory, and its error is as large as V's quantization error. So fast uses these kernels too.
 */
#include "avx2_product.h"

/* The largest code of a packed q: 1024 dims * 127 * 16383 < 2^31. */
#define Q_MAX 16383.0f
/* Of a weight: 64 tokens * 127 * 32767 < 2^28. */
#define P_MAX 32767.0f
/* Lower bound of a row's largest magnitude, so that its reciprocal is finite. */
#define LEAST 0x1p-100f

/* ---- the product ---- */

/* Bytes 0 and 2 of each lane (half 0), or 1 and 3, as int16. */
KVT_INLINE __m256i widen(__m256i codes, int half)
{
    if (half == 0)
        codes = _mm256_slli_epi16(codes, 8);
    return _mm256_srai_epi16(codes, 8);
}

/* A row of weights is its pairs of int16 as int32, two to four summands. */
#define WEIGHTS_OF_GROUP 2

#define EACH_VECTOR(X) X(0) X(1) X(2) X(3)

/* Half a group of summands, two vectors, all rows. */
KVT_INLINE void multiply_half(size_t rows, int half, const unsigned char *pair,
                              const int32_t *weight, size_t ldw, __m256i *sum)
{
    __m256i a = widen(kvt_load_256(pair), half), b = widen(kvt_load_256(pair + 32), half);
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        __m256i w = _mm256_set1_epi32(weight[(r)*ldw + (size_t)half]);                             \
        sum[(r)*2] = _mm256_add_epi32(sum[(r)*2], _mm256_madd_epi16(a, w));                        \
        sum[(r)*2 + 1] = _mm256_add_epi32(sum[(r)*2 + 1], _mm256_madd_epi16(b, w));                \
        KVT_KEEP(sum[(r)*2]);                                                                      \
        KVT_KEEP(sum[(r)*2 + 1]);                                                                  \
    }
    KVT_EACH_ROW(MULTIPLY)
#undef MULTIPLY
    KVT_RELOAD();
}

/* A group of summands, `vectors` vectors, one or two rows. */
KVT_INLINE void multiply_few(size_t rows, size_t vectors, const unsigned char *codes,
                             size_t pair_bytes, const int32_t *weight, size_t ldw, __m256i *sum)
{
    const size_t second = rows > 1 ? ldw : 0;
    __m256i w00 = _mm256_set1_epi32(weight[0]), w01 = _mm256_set1_epi32(weight[1]);
    __m256i w10 = _mm256_set1_epi32(weight[second]), w11 = _mm256_set1_epi32(weight[second + 1]);
#define MULTIPLY(v)                                                                                \
    if ((v) < vectors) {                                                                           \
        __m256i x = kvt_load_256(codes + (v) / 2 * pair_bytes + (v) % 2 * 32);                     \
        __m256i a = widen(x, 0), b = widen(x, 1);                                                  \
        sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(a, w00));                              \
        sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(b, w01));                              \
        KVT_KEEP(sum[v]);                                                                          \
        if (rows > 1) {                                                                            \
            __m256i *to = &sum[vectors + (v)];                                                     \
            *to = _mm256_add_epi32(*to, _mm256_madd_epi16(a, w10));                                \
            *to = _mm256_add_epi32(*to, _mm256_madd_epi16(b, w11));                                \
            KVT_KEEP(*to);                                                                         \
        }                                                                                          \
    }
    EACH_VECTOR(MULTIPLY)
#undef MULTIPLY
    KVT_RELOAD();
}

/*
 * All sums of a block over n groups of 4 summands, from zero: sum[r * vectors + v], in registers
 * (avx2_product.h has the reason for the macros). Pairs of vectors are pair_bytes apart; a group is
 * step bytes after the last.
 */
KVT_INLINE void product(size_t rows, size_t vectors, const unsigned char *codes, size_t pair_bytes,
                        size_t step, size_t n, const int32_t *weight, size_t ldw,
                        kvt_prefetch_state prefetch, __m256i *sum)
{
    const int32_t *end = weight + n * WEIGHTS_OF_GROUP;
#define ZERO(i) sum[i] = _mm256_setzero_si256();
    KVT_EACH_SUM(ZERO)
#undef ZERO
    do { /* n >= 1 */
        kvt_prefetch_bytes(&prefetch, codes, pair_bytes, vectors * 32);
        if (rows <= 2) {
            multiply_few(rows, vectors, codes, pair_bytes, weight, ldw, sum);
        } else {
            multiply_half(rows, 0, codes, weight, ldw, sum);
            multiply_half(rows, 1, codes, weight, ldw, sum);
        }
        codes += step;
        weight += WEIGHTS_OF_GROUP;
    } while (weight < end);
}

/* Vectors multiplied and added for each line of codes and row. */
#define WORK 8

/* Vectors of a block, 8 tokens or dims each. */
#define VECTORS_1 4
#define VECTORS_2 4
#define VECTORS_3 2
#define VECTORS_4 2
#define VECTORS_5 2
#define VECTORS_6 2

/* ---- rounding to integers ---- */

/* 16 numbers as int16, each four of them in the order 0 2 1 3. */
KVT_INLINE __m256i round_16(const float *from, const float *factors, __m256 reciprocal)
{
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + 8);
    __m256i x;
    if (factors) {
        a = _mm256_mul_ps(a, _mm256_loadu_ps(factors));
        b = _mm256_mul_ps(b, _mm256_loadu_ps(factors + 8));
    }
    x = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(a, reciprocal)),
                           _mm256_cvtps_epi32(_mm256_mul_ps(b, reciprocal)));
    /* The halves of a and b alternate. */
    return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(x, 0xd8), order);
}

/* A packed row: its scale, and from byte 64 on its codes. */
void kvt_avx2_pack_q_near(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (size_t r = 0; r < rows; r++, q += ldq) {
        unsigned char *row = (unsigned char *)packed + r * kvt_packed_row_bytes(dims_p);
        __m256 maxima = _mm256_set1_ps(LEAST), reciprocal;
        float largest, scale;
        for (size_t d = 0; d < dims_p; d += 8)
            maxima = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(q + d), magnitude), maxima);
        largest = kvt_max_lanes(maxima);
        scale = largest / Q_MAX;
        reciprocal = _mm256_set1_ps(Q_MAX / largest);
        memcpy(row, &scale, sizeof scale);
        for (size_t d = 0; d < dims_p; d += 16)
            kvt_store_256(row + 64 + 2 * d, round_16(q + d, NULL, reciprocal));
    }
}

/* The weights of all rows for the tokens of a block, in the product's order. */
typedef struct weights {
    _Alignas(32) int32_t codes[KVT_ROWS_MAX * KVT_TOKENS / 2];
    float scale[KVT_ROWS_MAX];
} weights;

/*
 * A token's scale is multiplied into its weight, once a row instead of once a dim. Beyond n_tokens
 * p is zero, but the scale may be a NaN, so it is masked. A weight that is NaN (logits beyond f32)
 * never becomes the maximum, and its conversion saturates within int16.
 */
KVT_INLINE void round_weights(const float *p, size_t rows, const uint16_t *scales, size_t n_tokens,
                              weights *w)
{
    const size_t n = kvt_round_up(n_tokens, 16);
    float factors[KVT_TOKENS];
    for (size_t t = 0; t < n; t += 8) {
        __m256 x = _mm256_cvtph_ps(kvt_load_128(scales + t));
        _mm256_storeu_ps(factors + t, _mm256_and_ps(x, kvt_lanes_below(t, n_tokens)));
    }
    for (size_t r = 0; r < rows; r++, p += KVT_TOKENS) {
        __m256 maxima = _mm256_set1_ps(LEAST), reciprocal;
        float largest;
        for (size_t t = 0; t < n; t += 8) {
            __m256 x = _mm256_mul_ps(_mm256_loadu_ps(p + t), _mm256_loadu_ps(factors + t));
            maxima = _mm256_max_ps(x, maxima);
        }
        largest = kvt_max_lanes(maxima);
        reciprocal = _mm256_set1_ps(P_MAX / largest);
        w->scale[r] = largest / P_MAX;
        for (size_t t = 0; t < n; t += 16)
            kvt_store_256(w->codes + (r * KVT_TOKENS + t) / 2,
                          round_16(p + t, factors + t, reciprocal));
    }
}

/* ---- scores ---- */

/* What all blocks of one call share. */
typedef struct qk_call {
    const unsigned char *packed; /* the first row */
    const unsigned char *codes;
    const uint16_t *scales;
    size_t dims_p;
    kvt_sides sides;
    float *s;
} qk_call;

/* 8 * vectors tokens from `token` on, of the rows from `row` on. */
KVT_INLINE void qk_block(size_t rows, size_t vectors, const qk_call *call, size_t row, size_t token)
{
    const size_t row_bytes = kvt_packed_row_bytes(call->dims_p);
    const size_t tile_bytes = call->dims_p * KVT_TILE_TOKENS;
    const unsigned char *packed = call->packed + row * row_bytes;
    const unsigned char *tile = call->codes + token / KVT_TILE_TOKENS * tile_bytes;
    float *s = call->s + row * KVT_TOKENS + token;
    __m256 scale[4];
    __m256i sum[KVT_SUMS_MAX];

    product(rows, vectors, tile, tile_bytes, 64, call->dims_p / 4,
            (const int32_t *)(const void *)(packed + 64), row_bytes / sizeof(int32_t),
            kvt_prefetch_begin(&call->sides, row, token * call->dims_p, WORK * rows), sum);
#define SCALE(v)                                                                                   \
    if ((v) < vectors)                                                                             \
        scale[v] = _mm256_cvtph_ps(kvt_load_128(call->scales + token + (v)*8));
    EACH_VECTOR(SCALE)
#undef SCALE
#define STORE(i)                                                                                   \
    if ((i) < rows * vectors) {                                                                    \
        __m256 q_scale = _mm256_broadcast_ss(                                                      \
            (const float *)(const void *)(packed + (i) / vectors * row_bytes));                    \
        _mm256_storeu_ps(s + (i) / vectors * KVT_TOKENS + (i) % vectors * 8,                       \
                         _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i]),                                 \
                                       _mm256_mul_ps(q_scale, scale[(i) % vectors])));             \
    }
    KVT_EACH_SUM(STORE)
#undef STORE
}

#define QK_BLOCK(rows)                                                                             \
    static __attribute__((noinline)) void qk_##rows(const qk_call *call, size_t row, size_t token, \
                                                    size_t end)                                    \
    {                                                                                              \
        for (; token < end; token += 8 * VECTORS_##rows)                                           \
            qk_block(rows, VECTORS_##rows, call, row, token);                                      \
    }
QK_BLOCK(1)
QK_BLOCK(2)
QK_BLOCK(3)
QK_BLOCK(4)
QK_BLOCK(5)
QK_BLOCK(6)

/* 32 tokens (the widest block) outside, rows inside: the codes stay in L1. */
void kvt_avx2_qk_i8_near(const void *packed, size_t first, size_t rows, const void *codes,
                         const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                         float *s)
{
    static void (*const blocks[])(const qk_call *, size_t, size_t,
                                  size_t) = {NULL, qk_1, qk_2, qk_3, qk_4, qk_5, qk_6};
    const qk_call call = {(const unsigned char *)packed + first * kvt_packed_row_bytes(dims_p),
                          codes,
                          scales,
                          dims_p,
                          {next, codes, KVT_TOKENS * dims_p},
                          s + first * KVT_TOKENS};
    for (size_t token = 0; token < n_tokens; token += 32) {
        size_t left = n_tokens - token, end = token + (left < 32 ? left : 32);
        for (size_t row = 0, n; row < rows - first; row += n) {
            n = kvt_rows_of_block(rows - first - row);
            blocks[n](&call, row, token, end);
        }
    }
}

/* ---- weighted sums ---- */

typedef struct pv_call {
    const weights *w;
    const unsigned char *codes;
    size_t n_tokens, dims_p;
    const float *alpha;
    kvt_sides sides;
    float *acc;
    size_t ldacc;
} pv_call;

/* 8 * vectors dims from `dim` on, of the rows from `row` on. */
KVT_INLINE void pv_block(size_t rows, size_t vectors, const pv_call *call, size_t row, size_t dim)
{
    const size_t ldw = KVT_TOKENS / 4 * WEIGHTS_OF_GROUP;
    const int32_t *weight = call->w->codes + row * ldw;
    float *acc = call->acc + row * call->ldacc + dim;
    __m256i sum[KVT_SUMS_MAX];

    product(rows, vectors, call->codes + dim * 4, 64, call->dims_p * 4, (call->n_tokens + 3) / 4,
            weight, ldw, kvt_prefetch_begin(&call->sides, row, dim * KVT_TOKENS, WORK * rows), sum);
#define ADD(i)                                                                                     \
    if ((i) < rows * vectors) {                                                                    \
        float *to = acc + (i) / vectors * call->ldacc + (i) % vectors * 8;                         \
        __m256 alpha = _mm256_broadcast_ss(call->alpha + row + (i) / vectors);                     \
        __m256 scale = _mm256_broadcast_ss(call->w->scale + row + (i) / vectors);                  \
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(to), alpha);                                      \
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i]), scale, x));               \
    }
    KVT_EACH_SUM(ADD)
#undef ADD
}

/* As many dims as the wide block divides, the rest 16 at a time. */
#define PV_BLOCK(rows)                                                                             \
    static __attribute__((noinline)) void pv_##rows(const pv_call *call, size_t row, size_t dim,   \
                                                    size_t end)                                    \
    {                                                                                              \
        for (; dim + 8 * VECTORS_##rows <= end; dim += 8 * VECTORS_##rows)                         \
            pv_block(rows, VECTORS_##rows, call, row, dim);                                        \
        for (; VECTORS_##rows > 2 && dim < end; dim += 16)                                         \
            pv_block(rows, 2, call, row, dim);                                                     \
    }
PV_BLOCK(1)
PV_BLOCK(2)
PV_BLOCK(3)
PV_BLOCK(4)
PV_BLOCK(5)
PV_BLOCK(6)

/* 128 dims of all tokens, 8 KiB, outside, rows inside: the codes stay in L1. */
void kvt_avx2_pv_i8_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                         float *acc, size_t ldacc)
{
    static void (*const blocks[])(const pv_call *, size_t, size_t,
                                  size_t) = {NULL, pv_1, pv_2, pv_3, pv_4, pv_5, pv_6};
    weights w;
    const kvt_sides sides = {next, codes, KVT_TOKENS * dims_p};
    const pv_call call = {&w, codes, n_tokens, dims_p, alpha, sides, acc, ldacc};
    round_weights(p, rows, scales, n_tokens, &w);
    for (size_t dim = 0; dim < dims_p; dim += 128) {
        size_t left = dims_p - dim, end = dim + (left < 128 ? left : 128);
        for (size_t row = 0, n; row < rows; row += n) {
            n = kvt_rows_of_block(rows - row);
            blocks[n](&call, row, dim, end);
        }
    }
}
