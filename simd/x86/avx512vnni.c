/*
 * AVX-512 VNNI kernels: the integer products of attention (vpdpbusd), and the table. The f32
 * products and softmax are in avx512_float.c.
 *
 * vpdpbusd adds four products of an unsigned and a signed byte to each of 16 int32 lanes. A lane
 * is a token (K) or a dim (V), its four bytes are dims or tokens: tile.h's layout is this
 * instruction's. Codes are signed; the other factor (q, p) is one or two digits of 8 bits:
 *
 *   K: sum q * code, q signed:   code + 128 is the unsigned byte (one XOR), q's digits are the
 *      signed ones, q = 256 * high + low. The sums begin at -128 * sum(digit) of the row.
 *   V: sum p * code, p >= 0:     p's digits are the unsigned bytes, the code is the signed one.
 *
 * From the simple form to the fast one:
 *  1. A vector of codes is loaded once for a block of rows; a row's digits of four dims (tokens)
 *     are one broadcast. There are rows x digits x vectors (of V) or chains (of K) accumulators,
 *     up to 28 of the 32 registers: two loads a cycle then keep up with one vpdpbusd a cycle.
 *  2. q is packed in the order in which a block broadcasts it, so that loads are sequential.
 *  3. p is rounded and split into digits by whole vectors.
 *
 * Overflow: a digit is at most 255 (p) or 128 (q), a code 127 or, with the XOR, 255: a sum over
 * 1024 dims stays below 2^26. The digits' sums are joined as high * 256 + low in int32: p up to
 * 65535 * 127 * 64 < 2^30; q up to Q_MAX * 127 * 512 < 2^31, or, of more dims, up to 14 bits.
 */
#include "simd/x86/prefetch.h"
#include "avx512_product.h"

/* Largest |q|: high is at most 127 then. And where 512 dims are passed: 16383 * 127 * 1024 < 2^31.
 */
#define Q_MAX 32639
#define Q_MAX_WIDE 16383
#define Q_MAX_FAST 127

/* Rows of a register block at most. */
#define ROWS_NEAR 7
#define ROWS_FAST 8
#define SUMS_MAX 32

static size_t rows_most(size_t digits)
{
    return digits == 2 ? ROWS_NEAR : ROWS_FAST;
}

/* ---- packed q ---- */

/*
 * For rows rounded up to 16: their scales (f32) and the initial values of their sums (int32: -128 *
 * sum of a digit, high and low), each [rows]; then, from digits_at on, the digits of each block as
 * [dims_p / 4][row of the block][digit][4].
 */
static size_t digits_at(size_t rows)
{
    return kvt_round_up(rows, 16) * 64;
}

KVT_INLINE const float *scales_of(const void *packed)
{
    return packed;
}

KVT_INLINE const int32_t *starts_of(const void *packed, size_t rows, size_t digit)
{
    return (const int32_t *)packed + kvt_round_up(rows, 16) * (1 + digit);
}

/* One row into its position in a block of `together` rows. */
static void pack_row(const float *q, size_t dims_p, size_t digits, int32_t most, size_t together,
                     unsigned char *to, float *scale, int32_t *starts, size_t ld_starts)
{
    __m512 largest = _mm512_set1_ps(KVT_LEAST), reciprocal;
    __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
    float max;
    for (size_t d = 0; d < dims_p; d += 16)
        largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_load_ps(q + d)));
    max = _mm512_reduce_max_ps(largest);
    *scale = max / (float)most;
    reciprocal = _mm512_set1_ps((float)most / max);
    for (size_t d = 0; d < dims_p; d += 16) {
        __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(q + d), reciprocal));
        /* The low digit is signed; where it is negative, the high one is larger by one. */
        __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24);
        __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(x, low), 8);
        unsigned char bytes[2][16];
        _mm_storeu_si128((__m128i *)(void *)bytes[0],
                         _mm512_cvtepi32_epi8(digits == 2 ? high : low));
        _mm_storeu_si128((__m128i *)(void *)bytes[1], _mm512_cvtepi32_epi8(low));
        high_sum = _mm512_add_epi32(high_sum, digits == 2 ? high : low);
        low_sum = _mm512_add_epi32(low_sum, low);
        for (size_t g = 0; g < 4; g++)
            for (size_t digit = 0; digit < digits; digit++)
                memcpy(to + (d / 4 + g) * together * digits * 4 + digit * 4, &bytes[digit][4 * g],
                       4);
    }
    starts[0] = -128 * _mm512_reduce_add_epi32(high_sum);
    starts[ld_starts] = -128 * _mm512_reduce_add_epi32(low_sum);
}

KVT_INLINE void pack(const float *q, size_t ldq, size_t rows, size_t dims_p, size_t digits,
                     int32_t most, void *packed)
{
    unsigned char *to = (unsigned char *)packed + digits_at(rows);
    size_t ld = kvt_round_up(rows, 16);
    for (size_t row = 0, n; row < rows; row += n) {
        n = kvt_rows_of_block(rows - row, rows_most(digits));
        for (size_t r = 0; r < n; r++)
            pack_row(q + (row + r) * ldq, dims_p, digits, most, n, to + r * digits * 4,
                     (float *)packed + row + r, (int32_t *)packed + ld + row + r, ld);
        to += n * dims_p * digits;
    }
}

static void pack_q_near(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    pack(q, ldq, rows, dims_p, 2, dims_p <= 512 ? Q_MAX : Q_MAX_WIDE, packed);
}

static void pack_q_fast(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    pack(q, ldq, rows, dims_p, 1, Q_MAX_FAST, packed);
}

/* ---- scores ---- */

typedef struct qk_call {
    const void *packed;
    size_t rows; /* of packed */
    const unsigned char *codes;
    const uint16_t *scales;
    size_t n_tokens, dims_p;
    float *s;
} qk_call;

/*
 * Scores of `rows` rows from `row` on, tile by tile, and only then the scales: codes are read in
 * ascending order, and no product waits for the scales, which follow them in memory. A sum is
 * formed in `chains` independent accumulators, so that few rows also hide the latency. digits, rows
 * and chains are constants of the callers, so that the accumulators are registers. prefetch: the
 * memory to prefetch (prefetch.h), as many bytes as are read.
 */
KVT_INLINE void qk_block(size_t digits, size_t rows, size_t chains, const qk_call *call, size_t row,
                         const unsigned char *weights, uintptr_t prefetch)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    const unsigned char *codes = call->codes;
    const size_t half = call->dims_p * KVT_TOKENS / 2;

    for (size_t t = 0; t < call->n_tokens; t += KVT_TILE_TOKENS) {
        const unsigned char *w = weights;
        __m512i sum[SUMS_MAX];
        uintptr_t again = t < KVT_TOKENS / 2 ? (uintptr_t)codes + half : prefetch - half;
        KVT_UNROLL
        for (size_t i = 0; i < rows * digits; i++) {
            const int32_t *starts = starts_of(call->packed, call->rows, i % digits);
            sum[i * chains] = _mm512_set1_epi32(starts[row + i / digits]);
            KVT_UNROLL
            for (size_t c = 1; c < chains; c++)
                sum[i * chains + c] = _mm512_setzero_si512();
        }
        for (size_t d = 0; d < call->dims_p; d += 4 * chains) {
            KVT_UNROLL
            for (size_t c = 0; c < chains; c++) {
                __m512i k = _mm512_xor_si512(_mm512_load_si512(codes), flip);
                kvt_prefetch_line(rows * digits, codes, prefetch, again);
                KVT_UNROLL
                for (size_t i = 0; i < rows * digits; i++)
                    sum[i * chains + c] = kvt_dot(sum[i * chains + c], k, kvt_broadcast(w + 4 * i));
                codes += 64;
                prefetch += 64;
                again += 64;
                w += rows * digits * 4;
            }
        }
        KVT_UNROLL
        for (size_t i = 0; i < rows * digits; i++) {
            KVT_UNROLL
            for (size_t c = 1; c < chains; c++)
                sum[i * chains] = _mm512_add_epi32(sum[i * chains], sum[i * chains + c]);
        }
        KVT_UNROLL
        for (size_t r = 0; r < rows; r++) {
            __m512i x = sum[r * digits * chains];
            if (digits == 2)
                x = _mm512_add_epi32(_mm512_slli_epi32(x, 8), sum[(r * digits + 1) * chains]);
            _mm512_store_si512(call->s + (row + r) * KVT_TOKENS + t, x);
        }
    }
    for (size_t t = 0; t < call->n_tokens; t += KVT_TILE_TOKENS) {
        __m512 scale = kvt_load_f16(call->scales + t);
        KVT_UNROLL
        for (size_t r = 0; r < rows; r++) {
            float *s = call->s + (row + r) * KVT_TOKENS + t;
            __m512 x = _mm512_cvtepi32_ps(_mm512_load_si512(s));
            __m512 q_scale = _mm512_set1_ps(scales_of(call->packed)[row + r]);
            _mm512_store_ps(s, _mm512_mul_ps(x, _mm512_mul_ps(scale, q_scale)));
        }
    }
}

#define QK_BLOCK(digits, rows, chains)                                                             \
    static __attribute__((noinline)) void qk_##digits##_##rows(                                    \
        const qk_call *call, size_t row, const unsigned char *weights, uintptr_t prefetch)         \
    {                                                                                              \
        qk_block(digits, rows, chains, call, row, weights, prefetch);                              \
    }
QK_BLOCK(2, 1, 4)
QK_BLOCK(2, 2, 4)
QK_BLOCK(2, 3, 4)
QK_BLOCK(2, 4, 2)
QK_BLOCK(2, 5, 2)
QK_BLOCK(2, 6, 2)
QK_BLOCK(2, 7, 2)
QK_BLOCK(1, 1, 4)
QK_BLOCK(1, 2, 4)
QK_BLOCK(1, 3, 4)
QK_BLOCK(1, 4, 4)
QK_BLOCK(1, 5, 4)
QK_BLOCK(1, 6, 4)
QK_BLOCK(1, 7, 2)
QK_BLOCK(1, 8, 2)

typedef void qk_block_function(const qk_call *, size_t, const unsigned char *, uintptr_t);

/* Blocks of rows that begin at or after `first`; the one that contains it, whole. */
KVT_INLINE void qk_rows(size_t digits, qk_block_function *const *blocks, const qk_call *call,
                        size_t first, const void *next)
{
    const unsigned char *weights = (const unsigned char *)call->packed + digits_at(call->rows);
    uintptr_t prefetch = (uintptr_t)(next ? next : call->codes);
    for (size_t row = 0, n; row < call->rows; row += n) {
        n = kvt_rows_of_block(call->rows - row, rows_most(digits));
        if (row + n > first) {
            blocks[n](call, row, weights, prefetch);
            prefetch = (uintptr_t)call->codes; /* once; later blocks prefetch lines that hit L1 */
        }
        weights += n * call->dims_p * digits;
    }
}

static void qk_i8_near(const void *packed, size_t first, size_t rows, const void *codes,
                       const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                       float *s)
{
    static qk_block_function *const blocks[] = {NULL,   qk_2_1, qk_2_2, qk_2_3,
                                                qk_2_4, qk_2_5, qk_2_6, qk_2_7};
    const qk_call call = {packed, rows, codes, scales, n_tokens, dims_p, s};
    qk_rows(2, blocks, &call, first, next);
}

static void qk_i8_fast(const void *packed, size_t first, size_t rows, const void *codes,
                       const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                       float *s)
{
    static qk_block_function *const blocks[] = {NULL,   qk_1_1, qk_1_2, qk_1_3, qk_1_4,
                                                qk_1_5, qk_1_6, qk_1_7, qk_1_8};
    const qk_call call = {packed, rows, codes, scales, n_tokens, dims_p, s};
    qk_rows(1, blocks, &call, first, next);
}

/* ---- weighted sums ---- */

/* The weights of one row as integer multiples of the result. */
KVT_INLINE float round_weights(size_t digits, const float *p, const __m512 *scale, kvt_pv_row *row)
{
    const float most = kvt_weight_most(digits);
    __m512 w[4];
    float largest = _mm512_reduce_max_ps(kvt_weigh(p, scale, w));
    largest = largest > KVT_LEAST ? largest : KVT_LEAST;
    kvt_put_weights(digits, w, _mm512_set1_ps(most / largest), row);
    return largest / most;
}

typedef struct pv_call {
    const kvt_pv_row *rows;
    const float *steps; /* of the rows */
    const unsigned char *codes;
    size_t dims_p;
    const float *alpha;
    float *acc;
    size_t ldacc;
} pv_call;

/* 16 * vectors dims from `dim` on of `rows` rows from `row` on. */
KVT_INLINE void pv_columns(size_t digits, size_t rows, size_t vectors, const pv_call *call,
                           size_t row, size_t dim, uintptr_t prefetch)
{
    const unsigned char *codes = call->codes + dim * 4;
    const unsigned char *weights = call->rows[row].digits;
    const size_t step = call->dims_p * 4, half = call->dims_p * KVT_TOKENS / 2;
    uintptr_t again = (uintptr_t)codes + half;
    __m512i sum[SUMS_MAX];
    KVT_UNROLL
    for (size_t i = 0; i < rows * digits * vectors; i++)
        sum[i] = _mm512_setzero_si512();
    prefetch += dim * 4;
    for (size_t g = 0; g < KVT_TOKENS / 4; g++) {
        __m512i value[8];
        if (g == KVT_TOKENS / 8)
            again = prefetch - half;
        KVT_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            value[v] = _mm512_load_si512(codes + v * 64);
            kvt_prefetch_line(rows * digits, codes + v * 64, prefetch + v * 64, again + v * 64);
        }
        KVT_UNROLL
        for (size_t i = 0; i < rows * digits; i++) {
            __m512i p = kvt_broadcast(weights + i / digits * sizeof(kvt_pv_row) + i % digits * 4);
            KVT_UNROLL
            for (size_t v = 0; v < vectors; v++)
                sum[i * vectors + v] = kvt_dot(sum[i * vectors + v], p, value[v]);
        }
        weights += digits * 4;
        codes += step;
        prefetch += step;
        again += step;
    }
    KVT_UNROLL
    for (size_t r = 0; r < rows; r++) {
        __m512 alpha = _mm512_set1_ps(call->alpha[row + r]);
        __m512 unit = _mm512_set1_ps(call->steps[row + r]);
        float *acc = call->acc + (row + r) * call->ldacc + dim;
        KVT_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            __m512i x = sum[r * digits * vectors + v];
            if (digits == 2)
                x = _mm512_add_epi32(_mm512_slli_epi32(x, 8), sum[(r * digits + 1) * vectors + v]);
            _mm512_storeu_ps(acc + 16 * v,
                             _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), unit,
                                             _mm512_mul_ps(_mm512_loadu_ps(acc + 16 * v), alpha)));
        }
    }
}

/* As many dims as the wide block divides, then narrower blocks, down to 16 dims. */
#define PV_BLOCK(digits, rows, vectors)                                                            \
    static __attribute__((noinline)) void pv_##digits##_##rows(const pv_call *call, size_t row,    \
                                                               uintptr_t prefetch)                 \
    {                                                                                              \
        size_t dim = 0;                                                                            \
        for (; dim + 16 * vectors <= call->dims_p; dim += 16 * vectors)                            \
            pv_columns(digits, rows, vectors, call, row, dim, prefetch);                           \
        for (; vectors > 4 && dim + 64 <= call->dims_p; dim += 64)                                 \
            pv_columns(digits, rows, 4, call, row, dim, prefetch);                                 \
        for (; vectors > 2 && dim + 32 <= call->dims_p; dim += 32)                                 \
            pv_columns(digits, rows, 2, call, row, dim, prefetch);                                 \
        for (; vectors > 1 && dim < call->dims_p; dim += 16)                                       \
            pv_columns(digits, rows, 1, call, row, dim, prefetch);                                 \
    }
PV_BLOCK(2, 1, 8)
PV_BLOCK(2, 2, 4)
PV_BLOCK(2, 3, 4)
PV_BLOCK(2, 4, 2)
PV_BLOCK(2, 5, 2)
PV_BLOCK(2, 6, 2)
PV_BLOCK(2, 7, 2)
PV_BLOCK(1, 1, 8)
PV_BLOCK(1, 2, 8)
PV_BLOCK(1, 3, 4)
PV_BLOCK(1, 4, 4)
PV_BLOCK(1, 5, 4)
PV_BLOCK(1, 6, 4)
PV_BLOCK(1, 7, 2)
PV_BLOCK(1, 8, 2)

typedef void pv_block_function(const pv_call *, size_t, uintptr_t);

KVT_INLINE void pv(size_t digits, pv_block_function *const *blocks, const float *p, size_t rows,
                   const unsigned char *codes, const uint16_t *scales, size_t n_tokens,
                   size_t dims_p, const float *alpha, const void *next, float *acc, size_t ldacc)
{
    uintptr_t prefetch = (uintptr_t)(next ? next : codes);
    kvt_pv_row weights[KVT_ROWS_MAX];
    float steps[KVT_ROWS_MAX];
    const pv_call call = {weights, steps, codes, dims_p, alpha, acc, ldacc};
    __m512 scale[4];
    kvt_load_scales(scales, n_tokens, scale);
    for (size_t r = 0; r < rows; r++)
        steps[r] = round_weights(digits, p + r * KVT_TOKENS, scale, &weights[r]);
    for (size_t row = 0, n; row < rows; row += n) {
        n = kvt_rows_of_block(rows - row, rows_most(digits));
        blocks[n](&call, row, prefetch);
        prefetch = (uintptr_t)codes;
    }
}

static void pv_i8_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    static pv_block_function *const blocks[] = {NULL,   pv_2_1, pv_2_2, pv_2_3,
                                                pv_2_4, pv_2_5, pv_2_6, pv_2_7};
    pv(2, blocks, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

static void pv_i8_fast(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    static pv_block_function *const blocks[] = {NULL,   pv_1_1, pv_1_2, pv_1_3, pv_1_4,
                                                pv_1_5, pv_1_6, pv_1_7, pv_1_8};
    pv(1, blocks, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

/* clang-format off */
const kvt_kernels kvt_kernels_avx512vnni = {
    .isa = "avx512vnni",
#define ENTRY(name) .name = kvt_avx512_##name,
    KVT_AVX512_FLOAT_LIST(ENTRY)
    KVT_AVX512_APPEND_LIST(ENTRY)
    KVT_AVX512_4BIT_LIST(ENTRY)
#undef ENTRY
    .pack_q_near = pack_q_near,
    .pack_q_fast = pack_q_fast,
    .qk_i8_near = qk_i8_near,
    .qk_i8_fast = qk_i8_fast,
    .pv_i8_near = pv_i8_near,
    .pv_i8_fast = pv_i8_fast,
};
/* clang-format on */
