/*
 * AVX-VNNI: attention over i8 by integer dot products of 256 bits. The other kernels are inherited
 * from AVX2.
 *
 * vpdpbusd multiplies four unsigned bytes of each 32-bit lane with four signed ones and adds the
 * products to the lane: 32 products an instruction, and tile.h's layout needs no shuffle.
 *
 *   K  the code is made unsigned by adding 128 (flipping its top bit), a digit of q is signed; what
 *      128 adds, 128 times the sum of q, is subtracted at the end
 *   V  a digit of the weight is unsigned, the code signed
 *
 * Near: two digits of 8 bits. A block passes over its codes twice, with the high digits and then,
 * its accumulators shifted left by 8 bits, with the low ones. Against separate accumulators for
 * each digit that is the same number of multiplications, half of the registers and one addition
 * less. Fast: one digit, one pass.
 *
 * Blocks are those of avx2.c. A vpdpbusd has a latency of 4 or 5 cycles and two are issued a cycle,
 * so there are 8 independent accumulators or more where registers allow. Integer sums are exact, so
 * a result does not depend on the order or on the shape of a block.
 *
 * KVT_AVXVNNI_EVEX compiles the same source for AVX-512's encoding of the instruction, which the
 * checker runs on processors without the VEX one.
 */
#include "avx2_4bit.h"

#if defined(KVT_AVXVNNI_EVEX)
#define DPBUSD _mm256_dpbusd_epi32
#else
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif

/* The largest code of q, near: 1024 dims * 127 * 16383 < 2^31. Sums on the way to it may wrap. */
#define Q_MAX_NEAR 16383.0f
#define Q_MAX_FAST 127.0f
/* Of a weight: 64 tokens * 127 * 65535 < 2^30. */
#define P_MAX_NEAR 65535.0f
#define P_MAX_FAST 255.0f
/* Lower bound of a row's largest magnitude, so that its reciprocal is finite. */
#define LEAST 0x1p-100f

enum { K, V };
enum { FAST = 1, NEAR = 2 }; /* as many digits */

/* ---- the product ---- */

/* A group of 4 summands, the vectors v and v + 1, all rows. */
KVT_INLINE void multiply_pair(int side, size_t rows, size_t vectors, size_t v,
                              const unsigned char *codes, size_t pair_bytes,
                              const unsigned char *weight, size_t ldw, __m256i *sum)
{
    const __m256i flip = _mm256_set1_epi8(-128);
    const unsigned char *pair = codes + v / 2 * pair_bytes;
    __m256i a, b;
    if (v >= vectors)
        return;
    a = kvt_load_256(pair);
    b = kvt_load_256(pair + 32);
    if (side == K) {
        a = _mm256_xor_si256(a, flip);
        b = _mm256_xor_si256(b, flip);
    }
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        __m256i w = _mm256_castps_si256(                                                           \
            _mm256_broadcast_ss((const float *)(const void *)(weight + (r)*ldw)));                 \
        __m256i *to = &sum[(r)*vectors + v];                                                       \
        to[0] = side == K ? DPBUSD(to[0], a, w) : DPBUSD(to[0], w, a);                             \
        to[1] = side == K ? DPBUSD(to[1], b, w) : DPBUSD(to[1], w, b);                             \
        KVT_KEEP(to[0]);                                                                           \
        KVT_KEEP(to[1]);                                                                           \
    }
    KVT_EACH_ROW(MULTIPLY)
#undef MULTIPLY
    /* Else compilers hoist the weights of all pairs into registers, and spill them. */
    KVT_RELOAD();
}

/* What a product reads: pairs of vectors pair_bytes apart, n groups of summands step bytes apart.
 */
typedef struct operands {
    const unsigned char *codes;
    size_t pair_bytes, step, n;
    const unsigned char *weight; /* 4 n bytes of high digits, low_bytes later of low ones */
    size_t ldw, low_bytes;
} operands;

/* One pass over the codes. */
KVT_INLINE void pass(int side, size_t rows, size_t vectors, const operands *o,
                     const unsigned char *weight, kvt_prefetch_state *prefetch, __m256i *sum)
{
    const unsigned char *codes = o->codes, *end = weight + 4 * o->n;
    do { /* n >= 1 */
        if (prefetch)
            kvt_prefetch_bytes(prefetch, codes, o->pair_bytes, vectors * 32);
        multiply_pair(side, rows, vectors, 0, codes, o->pair_bytes, weight, o->ldw, sum);
        multiply_pair(side, rows, vectors, 2, codes, o->pair_bytes, weight, o->ldw, sum);
        multiply_pair(side, rows, vectors, 4, codes, o->pair_bytes, weight, o->ldw, sum);
        multiply_pair(side, rows, vectors, 6, codes, o->pair_bytes, weight, o->ldw, sum);
        codes += o->step;
        weight += 4;
    } while (weight < end);
}

/* All sums of a block, from zero. */
KVT_INLINE void product(int side, int digits, size_t rows, size_t vectors, const operands *o,
                        kvt_prefetch_state prefetch, __m256i *sum)
{
#define ZERO(i) sum[i] = _mm256_setzero_si256();
    KVT_EACH_SUM(ZERO)
#undef ZERO
    pass(side, rows, vectors, o, o->weight, &prefetch, sum);
    if (digits == NEAR) {
#define SHIFT(i) sum[i] = _mm256_slli_epi32(sum[i], 8);
        KVT_EACH_SUM(SHIFT)
#undef SHIFT
        pass(side, rows, vectors, o, o->weight + o->low_bytes, NULL, sum);
    }
}

/* Vectors of a block, 8 tokens or dims each. */
#define VECTORS_1 8
#define VECTORS_2 4
#define VECTORS_3 4
#define VECTORS_4 2
#define VECTORS_5 2
#define VECTORS_6 2
#define EACH_BLOCK(X, form) X(form, 1) X(form, 2) X(form, 3) X(form, 4) X(form, 5) X(form, 6)

/* ---- rounding to digits ---- */

/* The lower bytes of 16 int16, saturated as signed or as unsigned. */
KVT_INLINE __m128i bytes_of(__m256i x, int is_signed)
{
    x = is_signed ? _mm256_packs_epi16(x, x) : _mm256_packus_epi16(x, x);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(x, 0xd8));
}

/* 8 and 8 int32 to 16 int16 in order. */
KVT_INLINE __m256i join(__m256i a, __m256i b)
{
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

/* What precedes a packed row's digits. */
typedef struct row_head {
    float scale;
    int32_t bias; /* -128 times the sum of its codes, to be added modulo 2^32 */
} row_head;

KVT_INLINE void pack_q(int digits, const float *q, size_t ldq, size_t rows, size_t dims_p,
                       void *packed)
{
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m256i ones = _mm256_set1_epi16(1);
    const float limit = digits == NEAR ? Q_MAX_NEAR : Q_MAX_FAST;
    for (size_t r = 0; r < rows; r++, q += ldq) {
        unsigned char *row = (unsigned char *)packed + r * kvt_packed_row_bytes(dims_p);
        unsigned char *high = row + 64, *low = high + dims_p;
        __m256 maxima = _mm256_set1_ps(LEAST), reciprocal;
        __m256i total = _mm256_setzero_si256();
        row_head head = {0.0f, 0};
        int32_t lanes[8];
        float largest;
        for (size_t d = 0; d < dims_p; d += 8)
            maxima = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(q + d), magnitude), maxima);
        largest = kvt_max_lanes(maxima);
        reciprocal = _mm256_set1_ps(limit / largest);
        for (size_t d = 0; d < dims_p; d += 16) {
            __m256 a = _mm256_mul_ps(_mm256_loadu_ps(q + d), reciprocal);
            __m256 b = _mm256_mul_ps(_mm256_loadu_ps(q + d + 8), reciprocal);
            __m256i x = join(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)), digit = x;
            total = _mm256_add_epi32(total, _mm256_madd_epi16(x, ones));
            if (digits == NEAR) {
                /* The low digit is the low byte as a signed number; the high one is -64 to 64. */
                digit = _mm256_srai_epi16(_mm256_add_epi16(x, _mm256_set1_epi16(128)), 8);
                x = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
                kvt_store_128(low + d, bytes_of(x, 1));
            }
            kvt_store_128(high + d, bytes_of(digit, 1));
        }
        kvt_store_256(lanes, total);
        for (size_t i = 0; i < 8; i++)
            head.bias -= 128 * lanes[i]; /* 1024 dims * 128 * 16383 < 2^31 */
        head.scale = largest / limit;
        memcpy(row, &head, sizeof head);
    }
}

static void pack_q_near(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    pack_q(NEAR, q, ldq, rows, dims_p, packed);
}

static void pack_q_fast(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    pack_q(FAST, q, ldq, rows, dims_p, packed);
}

/* The weights of all rows of a block of tokens. */
typedef struct weights {
    _Alignas(32) unsigned char digits[KVT_ROWS_MAX * 2 * KVT_TOKENS]; /* a row: high, low */
    float scale[KVT_ROWS_MAX];
} weights;

/*
 * A token's scale is multiplied into its weight, once a row instead of once a dim. Beyond n_tokens
 * p is zero, but the scale may be a NaN, so it is masked. A weight that is NaN (logits beyond f32)
 * never becomes the maximum, and its conversion saturates.
 */
KVT_INLINE void round_weights(int digits, const float *p, size_t rows, const uint16_t *scales,
                              size_t n_tokens, weights *w)
{
    const float limit = digits == NEAR ? P_MAX_NEAR : P_MAX_FAST;
    const __m256i low_byte = _mm256_set1_epi32(255);
    const __m256 none = _mm256_setzero_ps();
    const size_t n = kvt_round_up(n_tokens, 16);
    float factors[KVT_TOKENS];
    for (size_t t = 0; t < n; t += 8) {
        __m256 x = _mm256_cvtph_ps(kvt_load_128(scales + t));
        _mm256_storeu_ps(factors + t, _mm256_and_ps(x, kvt_lanes_below(t, n_tokens)));
    }
    for (size_t r = 0; r < rows; r++, p += KVT_TOKENS) {
        unsigned char *high = w->digits + r * 2 * KVT_TOKENS, *low = high + KVT_TOKENS;
        __m256 maxima = _mm256_set1_ps(LEAST), reciprocal;
        float largest;
        for (size_t t = 0; t < n; t += 8) {
            __m256 x = _mm256_mul_ps(_mm256_loadu_ps(p + t), _mm256_loadu_ps(factors + t));
            maxima = _mm256_max_ps(x, maxima);
        }
        largest = kvt_max_lanes(maxima);
        reciprocal = _mm256_set1_ps(limit / largest);
        w->scale[r] = largest / limit;
        for (size_t t = 0; t < n; t += 16) {
            __m256 x = _mm256_mul_ps(_mm256_loadu_ps(p + t), _mm256_loadu_ps(factors + t));
            __m256 y = _mm256_mul_ps(_mm256_loadu_ps(p + t + 8), _mm256_loadu_ps(factors + t + 8));
            __m256 first = digits == FAST ? _mm256_load_ps(kvt_dither + t) : none;
            __m256 second = digits == FAST ? _mm256_load_ps(kvt_dither + t + 8) : none;
            __m256i a = _mm256_cvtps_epi32(_mm256_fmadd_ps(x, reciprocal, first));
            __m256i b = _mm256_cvtps_epi32(_mm256_fmadd_ps(y, reciprocal, second));
            if (digits == NEAR) {
                __m256i digit = join(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
                kvt_store_128(low + t, bytes_of(digit, 0));
                a = _mm256_srli_epi32(a, 8);
                b = _mm256_srli_epi32(b, 8);
            }
            kvt_store_128(high + t, bytes_of(join(a, b), 0));
        }
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
KVT_INLINE void qk_block(int digits, size_t rows, size_t vectors, const qk_call *call, size_t row,
                         size_t token)
{
    const size_t row_bytes = kvt_packed_row_bytes(call->dims_p);
    const size_t tile_bytes = call->dims_p * KVT_TILE_TOKENS;
    const unsigned char *packed = call->packed + row * row_bytes;
    const unsigned char *tile = call->codes + token / KVT_TILE_TOKENS * tile_bytes;
    const operands o = {tile,        tile_bytes, 64,          call->dims_p / 4,
                        packed + 64, row_bytes,  call->dims_p};
    float *s = call->s + row * KVT_TOKENS + token;
    __m256i sum[KVT_SUMS_MAX];

    product(K, digits, rows, vectors, &o,
            kvt_prefetch_begin(&call->sides, row, token * call->dims_p, 2 * rows * (size_t)digits),
            sum);
#define STORE(i)                                                                                   \
    if ((i) < rows * vectors) {                                                                    \
        size_t t = (i) % vectors * 8;                                                              \
        const float *head = (const float *)(const void *)(packed + (i) / vectors * row_bytes);     \
        __m256i bias = _mm256_castps_si256(_mm256_broadcast_ss(head + 1));                         \
        __m256 scale = _mm256_cvtph_ps(kvt_load_128(call->scales + token + t));                    \
        scale = _mm256_mul_ps(_mm256_broadcast_ss(head), scale);                                   \
        _mm256_storeu_ps(                                                                          \
            s + (i) / vectors * KVT_TOKENS + t,                                                    \
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum[i], bias)), scale));             \
    }
    KVT_EACH_SUM(STORE)
#undef STORE
}

typedef void qk_rows(const qk_call *call, size_t row, size_t token, size_t end);

#define QK_BLOCK(form, rows)                                                                       \
    static __attribute__((noinline)) void qk_##form##_##rows(const qk_call *call, size_t row,      \
                                                             size_t token, size_t end)             \
    {                                                                                              \
        for (; token < end; token += 8 * VECTORS_##rows)                                           \
            qk_block(form, rows, VECTORS_##rows, call, row, token);                                \
    }
EACH_BLOCK(QK_BLOCK, NEAR)
EACH_BLOCK(QK_BLOCK, FAST)

/* Spans of tokens outside, rows inside: the codes of a span stay in L1. */
KVT_INLINE void qk(qk_rows *const *blocks, const qk_call *call, size_t rows, size_t n_tokens)
{
    const size_t span = rows == 1 ? KVT_TOKENS : 32;
    for (size_t token = 0; token < n_tokens; token += span) {
        size_t left = n_tokens - token, end = token + (left < span ? left : span);
        for (size_t row = 0, n; row < rows; row += n) {
            n = kvt_rows_of_block(rows - row);
            blocks[n](call, row, token, end);
        }
    }
}

#define QK_KERNEL(form, name)                                                                      \
    static void name(const void *packed, size_t first, size_t rows, const void *codes,             \
                     const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,     \
                     float *s)                                                                     \
    {                                                                                              \
        static qk_rows *const blocks[] = {NULL,          qk_##form##_1, qk_##form##_2,             \
                                          qk_##form##_3, qk_##form##_4, qk_##form##_5,             \
                                          qk_##form##_6};                                          \
        const unsigned char *row = packed;                                                         \
        const qk_call call = {row + first * kvt_packed_row_bytes(dims_p),                          \
                              codes,                                                               \
                              scales,                                                              \
                              dims_p,                                                              \
                              {next, codes, KVT_TOKENS * dims_p},                                  \
                              s + first * KVT_TOKENS};                                             \
        qk(blocks, &call, rows - first, n_tokens);                                                 \
    }
QK_KERNEL(NEAR, qk_i8_near)
QK_KERNEL(FAST, qk_i8_fast)

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
KVT_INLINE void pv_block(int digits, size_t rows, size_t vectors, const pv_call *call, size_t row,
                         size_t dim)
{
    const operands o = {call->codes + dim * 4,
                        64,
                        call->dims_p * 4,
                        (call->n_tokens + 3) / 4,
                        call->w->digits + row * 2 * KVT_TOKENS,
                        2 * KVT_TOKENS,
                        KVT_TOKENS};
    float *acc = call->acc + row * call->ldacc + dim;
    __m256i sum[KVT_SUMS_MAX];

    product(V, digits, rows, vectors, &o,
            kvt_prefetch_begin(&call->sides, row, dim * KVT_TOKENS, 2 * rows * (size_t)digits),
            sum);
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

typedef void pv_rows(const pv_call *call, size_t row, size_t dim, size_t end);

/* As many dims as the wide block divides, the rest 16 at a time. */
#define PV_BLOCK(form, rows)                                                                       \
    static __attribute__((noinline)) void pv_##form##_##rows(const pv_call *call, size_t row,      \
                                                             size_t dim, size_t end)               \
    {                                                                                              \
        for (; dim + 8 * VECTORS_##rows <= end; dim += 8 * VECTORS_##rows)                         \
            pv_block(form, rows, VECTORS_##rows, call, row, dim);                                  \
        for (; VECTORS_##rows > 2 && dim < end; dim += 16)                                         \
            pv_block(form, rows, 2, call, row, dim);                                               \
    }
EACH_BLOCK(PV_BLOCK, NEAR)
EACH_BLOCK(PV_BLOCK, FAST)

/* 128 dims, 8 KiB, outside, rows inside: the codes stay in L1. */
KVT_INLINE void pv(pv_rows *const *blocks, const pv_call *call, size_t rows)
{
    for (size_t dim = 0; dim < call->dims_p; dim += 128) {
        size_t left = call->dims_p - dim, end = dim + (left < 128 ? left : 128);
        for (size_t row = 0, n; row < rows; row += n) {
            n = kvt_rows_of_block(rows - row);
            blocks[n](call, row, dim, end);
        }
    }
}

#define PV_KERNEL(form, name)                                                                      \
    static void name(const float *p, size_t rows, const void *codes, const uint16_t *scales,       \
                     size_t n_tokens, size_t dims_p, const float *alpha, const void *next,         \
                     float *acc, size_t ldacc)                                                     \
    {                                                                                              \
        static pv_rows *const blocks[] = {NULL,          pv_##form##_1, pv_##form##_2,             \
                                          pv_##form##_3, pv_##form##_4, pv_##form##_5,             \
                                          pv_##form##_6};                                          \
        weights w;                                                                                 \
        const kvt_sides sides = {next, codes, KVT_TOKENS * dims_p};                                \
        const pv_call call = {&w, codes, n_tokens, dims_p, alpha, sides, acc, ldacc};              \
        round_weights(form, p, rows, scales, n_tokens, &w);                                        \
        pv(blocks, &call, rows);                                                                   \
    }
PV_KERNEL(NEAR, pv_i8_near)
PV_KERNEL(FAST, pv_i8_fast)

/* ---- 4 and 5 bits ---- */

/* 4 dims, a pair of vectors, all rows: one half of the nibbles. */
KVT_INLINE void multiply_k4(size_t rows, size_t vectors, size_t v, int half,
                            const unsigned char *codes, size_t pair_bytes, const int32_t *weight,
                            size_t ldw, __m256i *sum)
{
    const unsigned char *pair = codes + v / 2 * pair_bytes;
    __m256i a, b;
    if (v >= vectors)
        return;
    a = kvt_nibbles(kvt_load_256(pair), half);
    b = kvt_nibbles(kvt_load_256(pair + 32), half);
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        __m256i w = _mm256_set1_epi32(weight[(r)*ldw]);                                            \
        __m256i *to = &sum[(r)*vectors + v];                                                       \
        to[0] = DPBUSD(to[0], a, w);                                                               \
        to[1] = DPBUSD(to[1], b, w);                                                               \
        KVT_KEEP(to[0]);                                                                           \
        KVT_KEEP(to[1]);                                                                           \
    }
    KVT_EACH_ROW(MULTIPLY)
#undef MULTIPLY
    KVT_RELOAD();
}

KVT_INLINE void kvt_product_k4(size_t rows, size_t vectors, const kvt_operands *o,
                               kvt_prefetch_state prefetch, __m256i *sum)
{
    const unsigned char *codes = o->codes;
    const int32_t *weight = o->weight;
#define ZERO(i) sum[i] = _mm256_setzero_si256();
    KVT_EACH_SUM(ZERO)
#undef ZERO
    for (size_t i = 0; i < o->n; i++) {
        kvt_prefetch_bytes(&prefetch, codes, o->pair_bytes, vectors * 32);
        for (int half = 0; half < 2; half++) {
            const int32_t *w = weight + i / 4 * 8 + i % 4 + (half ? 4 : 0);
            multiply_k4(rows, vectors, 0, half, codes, o->pair_bytes, w, o->ldw, sum);
            multiply_k4(rows, vectors, 2, half, codes, o->pair_bytes, w, o->ldw, sum);
        }
        codes += o->step;
    }
}

/* 8 tokens, all rows, the vectors v and, where KVT_PAIRS_V4, v + 1. */
KVT_INLINE void multiply_v4(int format, size_t rows, size_t vectors, size_t v,
                            const unsigned char *codes, const unsigned char *bits,
                            const int32_t *weight, size_t ldw, __m256i *sum)
{
    const int pair = KVT_PAIRS_V4(rows);
    __m256i a0, a1, b0, b1;
    if (v >= vectors)
        return;
    codes += v * 32;
    bits += v / 2 * 16 + v % 2 * 4;
    b0 = a0 = kvt_v4_bytes(format, kvt_load_256(codes), 0, bits);
    b1 = a1 = kvt_v4_bytes(format, kvt_load_256(codes), 1, bits);
    if (pair) {
        b0 = kvt_v4_bytes(format, kvt_load_256(codes + 32), 0, bits + 4);
        b1 = kvt_v4_bytes(format, kvt_load_256(codes + 32), 1, bits + 4);
    }
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        __m256i w0 = _mm256_set1_epi32(weight[(r)*ldw]);                                           \
        __m256i w1 = _mm256_set1_epi32(weight[(r)*ldw + 1]);                                       \
        __m256i *to = &sum[(r)*vectors + v];                                                       \
        to[0] = DPBUSD(DPBUSD(to[0], w0, a0), w1, a1);                                             \
        KVT_KEEP(to[0]);                                                                           \
        if (pair) {                                                                                \
            to[1] = DPBUSD(DPBUSD(to[1], w0, b0), w1, b1);                                         \
            KVT_KEEP(to[1]);                                                                       \
        }                                                                                          \
    }
    KVT_EACH_ROW_V4(MULTIPLY)
#undef MULTIPLY
    if (rows > 2)
        KVT_RELOAD();
}

KVT_INLINE void kvt_product_v4(int format, size_t rows, size_t vectors, const kvt_operands *o,
                               kvt_prefetch_state prefetch, __m256i *sum)
{
    const unsigned char *codes = o->codes, *bits = o->bits;
    const int32_t *weight = o->weight, *end = weight + 2 * o->n;
#define ZERO(i) sum[i] = _mm256_setzero_si256();
    KVT_EACH_SUM_V4(ZERO)
#undef ZERO
    do { /* n >= 1 */
        kvt_prefetch_bytes(&prefetch, codes, 64, vectors * 32);
        multiply_v4(format, rows, vectors, 0, codes, bits, weight, o->ldw, sum);
        if (!KVT_PAIRS_V4(rows))
            multiply_v4(format, rows, vectors, 1, codes, bits, weight, o->ldw, sum);
        multiply_v4(format, rows, vectors, 2, codes, bits, weight, o->ldw, sum);
        if (!KVT_PAIRS_V4(rows))
            multiply_v4(format, rows, vectors, 3, codes, bits, weight, o->ldw, sum);
        codes += o->step;
        bits += o->bits_step;
        weight += 2;
    } while (weight < end);
}

KVT_QK4_KERNEL(static, qk_i4_near)
KVT_PV4_KERNEL(static, pv_i4_near, KVT_V4, 4, 255.0f)
KVT_PV4_KERNEL(static, pv_i5_near, KVT_V5, 8, 255.0f)

#if defined(KVT_AVXVNNI_EVEX)
const kvt_kernels kvt_kernels_avxvnni_evex = {
    .isa = "avxvnni_evex",
#else
const kvt_kernels kvt_kernels_avxvnni = {
    .isa = "avxvnni",
#endif
    .pack_q_near = pack_q_near,
    .pack_q_fast = pack_q_fast,
    .qk_i8_near = qk_i8_near,
    .qk_i8_fast = qk_i8_fast,
    .pv_i8_near = pv_i8_near,
    .pv_i8_fast = pv_i8_fast,
    .qk_i4_near = qk_i4_near,
    .pv_i4_near = pv_i4_near,
    .pv_i5_near = pv_i5_near,
};
