/*
 * NEON (armv8-a): the products of attention as f32, and the table, which also lists the kernels of
 * neon_near.c and neon_4bit.c (integer products), neon_softmax.c, neon_rows.c, neon_append.c,
 * neon_seal.c and neon_seal_4bit.c.
 *
 * As f32, QK and PV are the same loop, as in avx2.c. QK sums over dims and has a token in each
 * lane, PV sums over tokens and has a dim in each lane:
 *
 *     for each summand i:  for each vector v:  for each row r:
 *         sum[r][v] += weight[r][i] * lanes(i, v)
 *
 * From the simple form to the fast one:
 *  1. Blocks of up to 4 rows share the loads and conversions of lanes(i, v). 4 rows by 4 vectors
 *     are 16 accumulators; with the weights of 4 summands for each row and the vectors of a summand
 *     they take 24 of the 32 registers, and conversions a few more.
 *  2. `fmla` takes its weight from any lane of a register, so that a load of weights serves 4
 *     summands and nothing is broadcast.
 *  3. The vectors of a summand are loaded right before its multiplications, by a barrier: compilers
 *     would load all four summands first and spill.
 *  4. fmla has a latency of 4 cycles (Cortex-A76) or up to 10 (A53), and two or one are issued a
 *     cycle: one row takes 8 vectors, and so do two of f32 or f16.
 *  5. Blocks with 4 vectors (8 where point 4 has 8) run in loops scheduled by hand for in-order
 *     cores (neon_float.h). The remaining summands, and narrower blocks, are scheduled by the
 *     compiler.
 *
 * A lane adds its summands in ascending order whatever the shape of the block, so a row's result
 * does not depend on the other rows of the call. Chains of additions have at most 64 summands;
 * avx2.c has the rounding error of that.
 */
#include "simd/arm/neon_4bit.h"
#include "simd/arm/neon_float.h"

/* ---- the product as f32 ---- */

/* Rows of a block, vectors of four lanes that it has at most, dims that make a chunk of a score. */
#define ROWS_BLOCK 4
#define VECTORS_MAX 8
#define CHUNK_DIMS 64

/* Bytes of a vector's lanes, and summands in them. */
KVT_INLINE size_t lane_bytes(int type)
{
    return type == F16 ? 8 : 16;
}

KVT_INLINE size_t lane_summands(int type)
{
    return type == I8 ? 4 : 1;
}

/*
 * Element e of each lane's four codes: shifted to the top byte of the lane, where its sign is the
 * lane's, and converted as a fixed-point number with 24 fraction bits.
 */
KVT_INLINE float32x4_t code_lanes(const unsigned char *from, int e)
{
    const int32x4_t top = vdupq_n_s32((int32_t)0xff000000);
    int32x4_t lanes = vreinterpretq_s32_u8(vld1q_u8(from));
    if (e == 0)
        lanes = vshlq_n_s32(lanes, 24);
    else if (e == 1)
        lanes = vandq_s32(vshlq_n_s32(lanes, 16), top);
    else if (e == 2)
        lanes = vandq_s32(vshlq_n_s32(lanes, 8), top);
    else
        lanes = vandq_s32(lanes, top);
    return vcvtq_n_f32_s32(lanes, 24);
}

/* Vector v of summand e; four of them (K's tiles, V's 16 dims) are `group` bytes from the next. */
KVT_INLINE float32x4_t load_lanes(int type, const unsigned char *codes, size_t step, size_t group,
                                  size_t v, int e)
{
    const unsigned char *from = codes + v / 4 * group;
    if (type == I8)
        return code_lanes(from + v % 4 * 16, e);
    from += (size_t)e * step;
    if (type == F32)
        return vreinterpretq_f32_u8(vld1q_u8(from + v % 4 * 16));
    /* Two vectors of f16 are one load: the compiler merges the loads of v and v + 1. */
    float16x8_t pair = vreinterpretq_f16_u8(vld1q_u8(from + v % 4 / 2 * 16));
    return v % 2 ? vcvt_high_f32_f16(pair) : vcvt_f32_f16(vget_low_f16(pair));
}

/* ---- the product ---- */

/* Summand e of the vectors, and its products. */
#define LOAD_VECTOR(v, e)                                                                          \
    if ((v) < vectors)                                                                             \
        x[v] = load_lanes(type, codes, step, group, v, e);
#define LOAD_SUMMAND(e)                                                                            \
    LOAD_VECTOR(0, e)                                                                              \
    LOAD_VECTOR(1, e)                                                                              \
    LOAD_VECTOR(2, e)                                                                              \
    LOAD_VECTOR(3, e)                                                                              \
    LOAD_VECTOR(4, e)                                                                              \
    LOAD_VECTOR(5, e)                                                                              \
    LOAD_VECTOR(6, e)                                                                              \
    LOAD_VECTOR(7, e)                                                                              \
    if (type != I8 || (e) == 0) {                                                                  \
        kvt_prefetch(codes + (e)*step, ahead);                                                     \
        if (vectors > 4)                                                                           \
            kvt_prefetch(codes + (e)*step + group, ahead);                                         \
    }                                                                                              \
    KVT_LOADED();
#define MULTIPLY(i, e)                                                                             \
    if ((i) < rows * vectors)                                                                      \
        sum[i] = vfmaq_laneq_f32(sum[i], x[(i) % vectors], w[(i) / vectors], e);

/*
 * All sums of a block over n summands, from zero. The summands of one element (F32, F16) or of one
 * group of codes (I8) are `step` bytes after the last. n is a multiple of 4 for I8.
 */
KVT_INLINE void product(int type, int side, size_t rows, size_t vectors, const unsigned char *codes,
                        size_t group, size_t step, size_t n, const float *weight, size_t ldw,
                        uintptr_t ahead, float32x4_t *sum)
{
    size_t i = 0;
    if (vectors == (rows == 1 || (rows == 2 && type != I8) ? 8 : 4)) {
        i = kvt_product_in_order(type, side, rows, vectors, codes, group, step, n, weight, ldw,
                                 ahead, sum);
        codes += i / lane_summands(type) * step;
    } else {
#define ZERO(i)                                                                                    \
    if ((i) < rows * vectors)                                                                      \
        sum[i] = vdupq_n_f32(0.0f);
        KVT_EACH_16(ZERO)
#undef ZERO
    }
    for (; i + 4 <= n; i += 4) {
        float32x4_t w[ROWS_BLOCK], x[VECTORS_MAX];
#define LOAD(r)                                                                                    \
    if ((r) < rows)                                                                                \
        w[r] = vld1q_f32(weight + (r)*ldw + i);
        LOAD(0)
        LOAD(1)
        LOAD(2)
        LOAD(3)
#undef LOAD
#define MULTIPLY_0(i) MULTIPLY(i, 0)
#define MULTIPLY_1(i) MULTIPLY(i, 1)
#define MULTIPLY_2(i) MULTIPLY(i, 2)
#define MULTIPLY_3(i) MULTIPLY(i, 3)
        LOAD_SUMMAND(0)
        KVT_EACH_16(MULTIPLY_0)
        LOAD_SUMMAND(1)
        KVT_EACH_16(MULTIPLY_1)
        LOAD_SUMMAND(2)
        KVT_EACH_16(MULTIPLY_2)
        LOAD_SUMMAND(3)
        KVT_EACH_16(MULTIPLY_3)
        codes += 4 / lane_summands(type) * step;
    }
    /* The last n % 4 tokens of V one by one: slots beyond them may hold NaN. */
    for (; type != I8 && i < n; i++) {
        float32x4_t w[ROWS_BLOCK], x[VECTORS_MAX];
#define LOAD(r)                                                                                    \
    if ((r) < rows)                                                                                \
        w[r] = vld1q_dup_f32(weight + (r)*ldw + i);
        LOAD(0)
        LOAD(1)
        LOAD(2)
        LOAD(3)
#undef LOAD
        LOAD_SUMMAND(0)
        KVT_EACH_16(MULTIPLY_0)
        codes += step;
    }
}
#undef MULTIPLY
#undef MULTIPLY_0
#undef MULTIPLY_1
#undef MULTIPLY_2
#undef MULTIPLY_3
#undef LOAD_VECTOR
#undef LOAD_SUMMAND

/* ---- scores as f32 ---- */

/* What all blocks of one call share. */
typedef struct qk_call {
    const float *q;
    size_t ldq;
    const unsigned char *codes;
    const float *scales; /* [64], I8 only */
    size_t dims_p;
    float *s;
} qk_call;

/* 4 * vectors tokens from `token` on, of the rows from `row` on. */
KVT_INLINE void qk_block(int type, size_t rows, size_t vectors, const qk_call *call, size_t row,
                         size_t token, uintptr_t ahead)
{
    const size_t step = 4 * lane_bytes(type);
    const size_t tile_bytes = call->dims_p / lane_summands(type) * step;
    const unsigned char *tile = call->codes + token / KVT_TILE_TOKENS * tile_bytes;
    float *s = call->s + row * KVT_TOKENS + token;

    for (size_t d = 0; d < call->dims_p; d += CHUNK_DIMS) {
        size_t n = call->dims_p - d < CHUNK_DIMS ? call->dims_p - d : CHUNK_DIMS;
        int last = d + n == call->dims_p;
        float32x4_t sum[16];
        product(type, KVT_K, rows, vectors, tile + d / lane_summands(type) * step, tile_bytes, step,
                n, call->q + row * call->ldq + d, call->ldq, ahead, sum);
#define ADD(i)                                                                                     \
    if ((i) < rows * vectors) {                                                                    \
        float *to = s + (i) / vectors * KVT_TOKENS + (i) % vectors * 4;                            \
        float32x4_t x = d ? vaddq_f32(vld1q_f32(to), sum[i]) : sum[i];                             \
        if (type == I8 && last)                                                                    \
            x = vmulq_f32(x, vld1q_f32(call->scales + token + (i) % vectors * 4));                 \
        vst1q_f32(to, x);                                                                          \
    }
        KVT_EACH_16(ADD)
#undef ADD
    }
}

#define QK_BLOCK(type, rows, vectors)                                                              \
    KVT_BLOCK_OF_ROWS void qk_##type##_##rows(const qk_call *call, size_t row, size_t token,       \
                                              size_t end, uintptr_t ahead)                         \
    {                                                                                              \
        for (; token < end; token += 4 * (vectors))                                                \
            qk_block(type, rows, vectors, call, row, token, ahead);                                \
    }

/*
 * Loop order: spans of tokens outside, blocks of rows inside, so that K is read from memory once. A
 * span is a multiple of every block's width. The last one may extend beyond n_tokens; those scores
 * are ignored.
 */
#define QK_SPAN 32
#define QK_KERNEL(type)                                                                            \
    QK_BLOCK(type, 1, 8)                                                                           \
    QK_BLOCK(type, 2, (type) == I8 ? 4 : 8)                                                        \
    QK_BLOCK(type, 3, 4)                                                                           \
    QK_BLOCK(type, 4, 4)                                                                           \
    static void qk_rows_##type(const qk_call *call, size_t rows, size_t n_tokens,                  \
                               const void *next)                                                   \
    {                                                                                              \
        static void (*const blocks[])(const qk_call *, size_t, size_t, size_t, uintptr_t) = {      \
            NULL, qk_##type##_1, qk_##type##_2, qk_##type##_3, qk_##type##_4};                     \
        for (size_t token = 0; token < n_tokens; token += QK_SPAN) {                               \
            size_t left = n_tokens - token, end = token + (left < QK_SPAN ? left : QK_SPAN);       \
            for (size_t row = 0, n; row < rows; row += n) {                                        \
                n = kvt_rows_of_block(rows - row, ROWS_BLOCK);                                     \
                blocks[n](call, row, token, end, row ? 0 : kvt_ahead(call->codes, next));          \
            }                                                                                      \
        }                                                                                          \
    }

QK_KERNEL(F32)
QK_KERNEL(F16)
QK_KERNEL(I8)

static void qk_f32(const float *q, size_t ldq, size_t rows, const void *codes,
                   const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                   float *s)
{
    const qk_call call = {q, ldq, codes, NULL, dims_p, s};
    (void)scales;
    qk_rows_F32(&call, rows, n_tokens, next);
}

static void qk_f16(const float *q, size_t ldq, size_t rows, const void *codes,
                   const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                   float *s)
{
    const qk_call call = {q, ldq, codes, NULL, dims_p, s};
    (void)scales;
    qk_rows_F16(&call, rows, n_tokens, next);
}

static void qk_i8(const float *q, size_t ldq, size_t rows, const void *codes,
                  const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                  float *s)
{
    float scale[KVT_TOKENS];
    const qk_call call = {q, ldq, codes, scale, dims_p, s};
    for (size_t t = 0; t < KVT_TOKENS; t += 4)
        vst1q_f32(scale + t, kvt_load_f16x4(scales + t));
    qk_rows_I8(&call, rows, n_tokens, next);
}

/* ---- weighted sums as f32 ---- */

typedef struct pv_call {
    const float *weight; /* [rows][64] */
    const unsigned char *codes;
    size_t n_tokens; /* I8: a multiple of 4, the weights in excess are zero */
    size_t dims_p;
    const float *alpha;
    float *acc;
    size_t ldacc;
} pv_call;

/* 4 * vectors dims from `dim` on, of the rows from `row` on. */
KVT_INLINE void pv_block(int type, size_t rows, size_t vectors, const pv_call *call, size_t row,
                         size_t dim, uintptr_t ahead)
{
    float32x4_t sum[16];
    product(type, KVT_V, rows, vectors, call->codes + dim / 4 * lane_bytes(type),
            4 * lane_bytes(type), call->dims_p / 4 * lane_bytes(type), call->n_tokens,
            call->weight + row * KVT_TOKENS, KVT_TOKENS, ahead, sum);
#define ADD(i)                                                                                     \
    if ((i) < rows * vectors) {                                                                    \
        float *to = call->acc + (row + (i) / vectors) * call->ldacc + dim + (i) % vectors * 4;     \
        vst1q_f32(to, vfmaq_n_f32(sum[i], vld1q_f32(to), call->alpha[row + (i) / vectors]));       \
    }
    KVT_EACH_16(ADD)
#undef ADD
}

/* As many dims as the wide block divides, the rest 16 at a time. */
#define PV_BLOCK(type, rows, vectors)                                                              \
    KVT_BLOCK_OF_ROWS void pv_##type##_##rows(const pv_call *call, size_t row, size_t dim,         \
                                              size_t end, uintptr_t ahead)                         \
    {                                                                                              \
        for (; dim + 4 * (vectors) <= end; dim += 4 * (vectors))                                   \
            pv_block(type, rows, vectors, call, row, dim, ahead);                                  \
        for (; (vectors) > 4 && dim < end; dim += 16)                                              \
            pv_block(type, rows, 4, call, row, dim, ahead);                                        \
    }

/* Columns of dims outside, rows inside: a column of V stays in L1. */
#define PV_KERNEL(type)                                                                            \
    PV_BLOCK(type, 1, 8)                                                                           \
    PV_BLOCK(type, 2, (type) == I8 ? 4 : 8)                                                        \
    PV_BLOCK(type, 3, 4)                                                                           \
    PV_BLOCK(type, 4, 4)                                                                           \
    static void pv_rows_##type(const pv_call *call, size_t rows, const void *next)                 \
    {                                                                                              \
        static void (*const blocks[])(const pv_call *, size_t, size_t, size_t, uintptr_t) = {      \
            NULL, pv_##type##_1, pv_##type##_2, pv_##type##_3, pv_##type##_4};                     \
        const size_t span = rows <= ROWS_BLOCK ? call->dims_p : 16;                                \
        for (size_t dim = 0; dim < call->dims_p; dim += span)                                      \
            for (size_t row = 0, n; row < rows; row += n) {                                        \
                n = kvt_rows_of_block(rows - row, ROWS_BLOCK);                                     \
                blocks[n](call, row, dim, dim + span, row ? 0 : kvt_ahead(call->codes, next));     \
            }                                                                                      \
    }

PV_KERNEL(F32)
PV_KERNEL(F16)
PV_KERNEL(I8)

static void pv_f32(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                   size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                   size_t ldacc)
{
    const pv_call call = {p, codes, n_tokens, dims_p, alpha, acc, ldacc};
    (void)scales;
    pv_rows_F32(&call, rows, next);
}

static void pv_f16(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                   size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                   size_t ldacc)
{
    const pv_call call = {p, codes, n_tokens, dims_p, alpha, acc, ldacc};
    (void)scales;
    pv_rows_F16(&call, rows, next);
}

/* A token's scale is multiplied into its weight, once a row instead of once a dim. */
static void pv_i8(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                  size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                  size_t ldacc)
{
    float weight[KVT_ROWS_MAX * KVT_TOKENS], scale[KVT_TOKENS];
    const pv_call call = {weight, codes, kvt_round_up(n_tokens, 4), dims_p, alpha, acc, ldacc};
    kvt_live_scales(scales, n_tokens, scale);
    for (size_t r = 0; r < rows; r++)
        for (size_t t = 0; t < n_tokens; t += 4)
            vst1q_f32(weight + r * KVT_TOKENS + t,
                      vmulq_f32(vld1q_f32(p + r * KVT_TOKENS + t), vld1q_f32(scale + t)));
    pv_rows_I8(&call, rows, next);
}

/* ---- 4 and 5 bits as f32 ---- */

/*
 * Codes are unpacked to the values that they stand for, in steps, in i8's order, and multiplied as
 * i8: an octet's low nibbles are a group of 4 summands, its high ones the next. What is unpacked at
 * a time are the tokens of a span of K, 16 dims of V.
 */

/* 64 bytes of an octet to two groups of 64 bytes. `fifth`: those of its 16 lanes, for V5. */
KVT_INLINE void unpack_octet(int form, const unsigned char *from, const unsigned char *fifth,
                             uintptr_t ahead, unsigned char *to)
{
    const uint8x16_t levels = kvt_levels_plus(0);
    const uint8x16_t least = vdupq_n_u8(form == KVT_K4 ? 15 : 31);
    kvt_prefetch(from, ahead);
    for (size_t quad = 0; quad < 4; quad++) {
        uint8x16_t x = vld1q_u8(from + quad * 16), low, high;
        if (form == KVT_V5) {
            uint8x16_t bits = vld1q_u8(fifth), of_quad = kvt_fifth_of_quad(quad);
            low = kvt_low_codes_5(x, bits, of_quad);
            high = kvt_high_codes_5(x, vextq_u8(bits, bits, 8), of_quad);
        } else {
            low = kvt_low_codes(form, x, levels);
            high = kvt_high_codes(form, x, levels);
        }
        if (form != KVT_V4) { /* 2 * code - 15 or - 31 */
            low = vsubq_u8(vshlq_n_u8(low, 1), least);
            high = vsubq_u8(vshlq_n_u8(high, 1), least);
        }
        vst1q_u8(to + quad * 16, low);
        vst1q_u8(to + 64 + quad * 16, high);
    }
}

/* Of K the scales are in q, and a step is half a scale. */
static void qk_i4(const float *q, size_t ldq, size_t rows, const void *codes,
                  const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                  float *s)
{
    unsigned char unpacked[QK_SPAN * KVT_DIMS_MAX] __attribute__((aligned(64)));
    float scaled[ROWS_BLOCK * KVT_DIMS_MAX], half[KVT_TOKENS];
    for (size_t t = 0; t < KVT_TOKENS; t++)
        half[t] = 0.5f;
    for (size_t row = 0, n; row < rows; row += n) {
        const uintptr_t ahead = row ? 0 : kvt_ahead(codes, next);
        n = kvt_rows_of_block(rows - row, ROWS_BLOCK);
        for (size_t d = 0; d < dims_p; d += 4) {
            float32x4_t scale = kvt_load_f16x4(scales + d);
            for (size_t r = 0; r < n; r++)
                vst1q_f32(scaled + r * dims_p + d,
                          vmulq_f32(vld1q_f32(q + (row + r) * ldq + d), scale));
        }
        for (size_t token = 0; token < n_tokens; token += QK_SPAN) {
            const unsigned char *from =
                (const unsigned char *)codes + kvt_k4_index(token, 0, dims_p);
            const size_t left = n_tokens - token < QK_SPAN ? n_tokens - token : QK_SPAN;
            const qk_call call = {scaled, dims_p, unpacked,
                                  half,   dims_p, s + row * KVT_TOKENS + token};
            for (size_t i = 0; i < QK_SPAN * dims_p / 2; i += 64)
                unpack_octet(KVT_K4, from + i, NULL, ahead, unpacked + 2 * i);
            qk_rows_I8(&call, n, left, NULL);
        }
    }
}

KVT_INLINE void pv_4bit(int form, const float *p, size_t rows, const void *codes,
                        const uint16_t *scales, size_t n_tokens, size_t dims_p, const float *alpha,
                        const void *next, float *acc, size_t ldacc)
{
    const unsigned char *from = codes, *fifth = from + dims_p * (KVT_TOKENS / 2);
    const uintptr_t ahead = kvt_ahead(codes, next);
    unsigned char unpacked[KVT_TOKENS * 16] __attribute__((aligned(64)));
    float weight[KVT_ROWS_MAX * KVT_TOKENS], scale[KVT_TOKENS];
    kvt_live_scales(scales, n_tokens, scale);
    for (size_t r = 0; r < rows; r++)
        (void)kvt_scale_weights(p + r * KVT_TOKENS, scale, kvt_round_up(n_tokens, 16),
                                weight + r * KVT_TOKENS);
    for (size_t dim = 0; dim < dims_p; dim += 16) {
        const pv_call call = {weight,    unpacked, kvt_round_up(n_tokens, 4), 16, alpha,
                              acc + dim, ldacc};
        for (size_t octet = 0; octet < kvt_round_up(n_tokens, 8) / 8; octet++)
            unpack_octet(form, from + (octet * dims_p + dim) * 4, fifth + octet * dims_p + dim,
                         ahead, unpacked + octet * 128);
        pv_rows_I8(&call, rows, NULL);
    }
}

static void pv_i4(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                  size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                  size_t ldacc)
{
    pv_4bit(KVT_V4, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

static void pv_i5(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                  size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,
                  size_t ldacc)
{
    pv_4bit(KVT_V5, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

/* Missing entries are inherited from scalar: plain copies, which the compiler vectorizes. */
/* clang-format off */
const kvt_kernels kvt_kernels_neon = {
    .isa = "neon",
#define ENTRY(name) .name = kvt_neon_##name,
    KVT_NEON_APPEND_LIST(ENTRY)
    KVT_NEON_SEAL_LIST(ENTRY)
    KVT_NEON_SEAL_4BIT_LIST(ENTRY)
    KVT_NEON_NEAR_LIST(ENTRY)
    KVT_NEON_4BIT_LIST(ENTRY)
    KVT_NEON_SOFTMAX_LIST(ENTRY)
#undef ENTRY
    .pack_q_fast = kvt_neon_pack_q_near,
    .qk_i8_fast = kvt_neon_qk_i8_near,
    .pv_i8_fast = kvt_neon_pv_i8_near,
    .qk_f32 = qk_f32,
    .qk_f16 = qk_f16,
    .qk_i8 = qk_i8,
    .pv_f32 = pv_f32,
    .pv_f16 = pv_f16,
    .pv_i8 = pv_i8,
    .qk_i4 = qk_i4,
    .pv_i4 = pv_i4,
    .pv_i5 = pv_i5,
};
/* clang-format on */
