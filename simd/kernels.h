/*
 * The kernel list and table.
 *
 * KVT_KERNEL_LIST is the one list: the table, the overlay (dispatch.c), the checker
 * (tests/check_kernels.c) and the kernel bench expand it. X(result, name, parameters).
 * A NULL entry of an ISA's table inherits from the table below it; scalar has them all.
 *
 * Kernels never allocate, validate, lock or fail. They run in the default floating-point
 * environment (to nearest, no flush to zero), which the callers in src/ set.
 *
 * Rules that the checker holds them to:
 *  - put_*, get_*, mean_*, seal_*, center, rotate, unrotate, load_*, store_*,
 *    transpose_*: the bytes of scalar. docs/numerics.md specifies them.
 *  - qk_*, pv_*, dots_*, logits, alibi, softmax, add_scaled, merge, finish: within a bound of
 *    scalar.
 *  - In qk_*, pv_*, softmax and add_scaled the result of a row depends on nothing but that row: not
 *    on how many rows there are, nor on their order. (So a query's result does not depend on its
 *    batch.)
 *
 * i8 is multiplied in one of three ways (docs/numerics.md, "Attention"):
 *   qk_i8, pv_i8            f32: codes are widened and multiplied as f32
 *   qk_i8_near, pv_i8_near  integer dot products, q rounded to 14 bits and a sign or more, p to
 *                           15 bits or more
 *   qk_i8_fast, pv_i8_fast  the same with 7 bits and a sign (q), 7 bits (p), or more where that
 *                           costs nothing
 * 4 and 5 bits are multiplied as f32 (qk_i4, pv_i4, pv_i5) or with rows rounded to 7 bits and a
 * sign (q), 7 bits or more (p): qk_i4_near, pv_i4_near, pv_i5_near. The scales of 4-bit K, one a
 * dim, are folded into q, so that it is rounded anew for each block.
 *
 * q is packed for the integer i8 ones once a work unit. The packed layout is private to a table,
 * so a table defines both a pack_q_ and its qk_, or neither.
 *
 * Parameters that recur:
 *   dims       head dims; dims_p: padded to a multiple of 16
 *   codes      a head's codes of one block, 64-byte aligned, laid out as tile.h says
 *   scales     [64] f16, the head's scales of that side; unused (NULL) for f32 and f16
 *   slot       a token's place in its block, 0 .. 63
 *   n_tokens   live tokens of the block, 1 .. 64; the slots beyond them are dead and may hold NaN
 *   rows       query rows of one kv head (queries times group), >= 1
 *   next       what the next call of this kernel will read, in place of codes: as many bytes are to
 *              be prefetched, spread over the call. A hint; NULL or beyond the end is fine.
 */
#ifndef KVT_KERNELS_H
#define KVT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "simd/tile.h"

/* Most rows that one qk_ or pv_ call is given. */
#define KVT_ROWS_MAX 32
/* Most dims of a head: KVT_MAX_DIM of the public header. */
#define KVT_DIMS_MAX 1024

/* seal_k_i8: least squared norm, in steps, and largest share of a code that is taken out of it. */
#define KVT_SHAPE_NORM 16129.0f
#define KVT_SHAPE_MAX 0x1.f8p-9f /* times 127: 0.488 */

/*
 * Room for a packed row of q: two bytes a dim, for instruction sets that take dims in groups of up
 * to 64, and 64 bytes of what belongs to the row (scale, sums). Rows are packed in groups of up to
 * 16, so there is room for whole groups.
 */
static inline size_t kvt_packed_row_bytes(size_t dims_p)
{
    return 2 * kvt_round_up(dims_p, 64) + 64;
}

static inline size_t kvt_packed_bytes(size_t rows, size_t dims_p)
{
    return kvt_round_up(rows, 16) * kvt_packed_row_bytes(dims_p);
}

/* clang-format off */
#define KVT_KERNELS_WIDE(X)                                                                        \
    /* n elements of the caller's dtype (aligned to the element only) to f32; 1 when all are */    \
    /* finite, else 0 with dst unspecified. */                                                     \
    X(int, load_f32, (const void *src, float *dst, size_t n))                                      \
    X(int, load_f16, (const void *src, float *dst, size_t n))                                      \
    X(int, load_bf16, (const void *src, float *dst, size_t n))                                     \
    /* The reverse, to nearest even; f16 and bf16 saturate. */                                     \
    X(void, store_f32, (const float *src, void *dst, size_t n))                                    \
    X(void, store_f16, (const float *src, void *dst, size_t n))                                    \
    X(void, store_bf16, (const float *src, void *dst, size_t n))                                   \
    /* y[i] = x[i] * sign[i] (+-1); fast Walsh-Hadamard transform of each `block` dims (a power */ \
    /* of two that divides dims); y[i] *= scale (a power of two). Order: docs/numerics.md. y may
       */ \
    /* be x. */                                                                                    \
    X(void, rotate, (const float *x, const float *sign, size_t dims, size_t block, float scale,    \
                     float *y))                                                                    \
    /* The inverse for scale = 1 / (rotate's scale * block): transform, scale, signs. */           \
    X(void, unrotate, (float *x, const float *sign, size_t dims, size_t block, float scale))       \
    /* Store tokens slot .. slot + n - 1, all of one tile (slot % 16 + n <= 16), from rows of */   \
    /* f32 x[i * ldx]. 1 when stored, 0 when a value does not fit the type (f16: beyond 65504 */   \
    /* after rounding; i8: the scale would be beyond f16) with the slots unspecified. A tile has
       */ \
    /* one writer at a time: lanes of 4 tokens may be rewritten whole. */                          \
    X(int, put_k_f32, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,           \
                       void *codes, uint16_t *scales, size_t slot))                                \
    X(int, put_k_f16, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,           \
                       void *codes, uint16_t *scales, size_t slot))                                \
    X(int, put_k_i8, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,            \
                      void *codes, uint16_t *scales, size_t slot))                                 \
    X(int, put_v_f32, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,           \
                       void *codes, uint16_t *scales, size_t slot))                                \
    X(int, put_v_f16, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,           \
                       void *codes, uint16_t *scales, size_t slot))                                \
    X(int, put_v_i8, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,            \
                      void *codes, uint16_t *scales, size_t slot))                                 \
    /* As put_k_f16, of x[i * ldx + d] - offset[d] (f16, finite): K's rows of an open block. */    \
    X(int, put_k_open, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,          \
                        const uint16_t *offset, void *codes, size_t slot))                         \
    /* One token back as f32: code * scale, in the stored domain. */                               \
    X(void, get_k_f32, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,       \
                        size_t dims_p, float *x))                                                  \
    X(void, get_k_f16, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,       \
                        size_t dims_p, float *x))                                                  \
    X(void, get_k_i8, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,        \
                       size_t dims_p, float *x))                                                   \
    X(void, get_v_f32, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,       \
                        size_t dims_p, float *x))                                                  \
    X(void, get_v_f16, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,       \
                        size_t dims_p, float *x))                                                  \
    X(void, get_v_i8, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,        \
                       size_t dims_p, float *x))                                                   \
    /* Sealing: a full block whose tokens are f16 becomes i8. open: its 64 tokens as put_k_f16 or
       */ \
    /* put_v_f16 lay them out, zero in the padding, 64-byte aligned; open_scales: [64] f16, */     \
    /* positive powers of two, for V any that are not negative (blocks that are open again). An */ \
    /* element is x = code * scale, which f32 holds exactly. */                                    \
    /* The mean of K's tokens without outliers, mean[dims_p]: sums in lanes of tokens 16 apart, */ \
    /* folded; left out are the tokens whose squared distance from the plain mean is more than */  \
    /* 16 times the median (outliers.h). scalar.c has the order. */                                \
    X(void, mean_k_f16, (const void *open, const uint16_t *open_scales, size_t dims_p,             \
                         float *mean))                                                             \
    /* Codes and scales of all 64 tokens of x + delta[d] (K; delta [dims_p], zero in the */        \
    /* padding; NULL: nothing is added) or x (V). Scales as put_i8's, which must fit f16. V's */   \
    /* codes are code * (scale * reciprocal), the factor rounded, to nearest even, which are */    \
    /* put_v_i8's where scales are powers of two; K's are rounded so that a row's error along */   \
    /* itself cancels. codes must not overlap open. */                                             \
    X(void, seal_k_i8, (const void *open, const uint16_t *open_scales, const float *delta,         \
                        size_t dims_p, const void *next, void *codes, uint16_t *scales))           \
    X(void, seal_v_i8, (const void *open, const uint16_t *open_scales, size_t dims_p,              \
                        const void *next, void *codes, uint16_t *scales))                          \
    /* y[i] = x[i] - mu[i]; y may be x. */                                                         \
    X(void, center, (const float *x, const float *mu, size_t n, float *y))                         \
    /* s[r * 64 + t] = sum_d q[r * ldq + d] * K[t][d] for r < rows and t < n_tokens. q is */       \
    /* zero in the padding. s beyond n_tokens is unspecified. q, s 64-byte aligned, ldq a */       \
    /* multiple of 16. */                                                                          \
    X(void, qk_f32, (const float *q, size_t ldq, size_t rows, const void *codes,                   \
                     const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,     \
                     float *s))                                                                    \
    X(void, qk_f16, (const float *q, size_t ldq, size_t rows, const void *codes,                   \
                     const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,     \
                     float *s))                                                                    \
    X(void, qk_i8, (const float *q, size_t ldq, size_t rows, const void *codes,                    \
                    const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,      \
                    float *s))                                                                     \
    /* Pack rows of q (as above) into packed, 64-byte aligned, kvt_packed_bytes(rows, */           \
    /* dims_p). A row is rounded to multiples of its largest magnitude (but at least */            \
    /* 2^-100) over 16000 or more (fast: 120). */                                                  \
    X(void, pack_q_near, (const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed))   \
    X(void, pack_q_fast, (const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed))   \
    /* As qk_i8, for the packed rows first .. rows - 1; s of the rows before is */                 \
    /* unspecified. */                                                                             \
    X(void, qk_i8_near, (const void *packed, size_t first, size_t rows, const void *codes,         \
                         const uint16_t *scales, size_t n_tokens, size_t dims_p,                   \
                         const void *next, float *s))                                              \
    X(void, qk_i8_fast, (const void *packed, size_t first, size_t rows, const void *codes,         \
                         const uint16_t *scales, size_t n_tokens, size_t dims_p,                   \
                         const void *next, float *s))                                              \
    /* acc[r * ldacc + d] = acc * alpha[r] + sum_t p[r * 64 + t] * V[t][d]; the sum over */        \
    /* the block is formed from zero and then added (error grows with blocks, not with */          \
    /* tokens). p is zero from n_tokens to 63. Dead slots are not read as numbers: they may */     \
    /* be NaN. */                                                                                  \
    X(void, pv_f32, (const float *p, size_t rows, const void *codes, const uint16_t *scales,       \
                     size_t n_tokens, size_t dims_p, const float *alpha, const void *next,         \
                     float *acc, size_t ldacc))                                                    \
    X(void, pv_f16, (const float *p, size_t rows, const void *codes, const uint16_t *scales,       \
                     size_t n_tokens, size_t dims_p, const float *alpha, const void *next,         \
                     float *acc, size_t ldacc))                                                    \
    X(void, pv_i8, (const float *p, size_t rows, const void *codes, const uint16_t *scales,        \
                    size_t n_tokens, size_t dims_p, const float *alpha, const void *next,          \
                    float *acc, size_t ldacc))                                                     \
    /* As pv_i8, p * scale of a row rounded to multiples of its largest in the block over */       \
    /* 32000 or more (fast: 120, up to 255 dithered: dither.h). p is finite, >= 0 and at most 1. */ \
    X(void, pv_i8_near, (const float *p, size_t rows, const void *codes, const uint16_t *scales,   \
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,     \
                         float *acc, size_t ldacc))                                                \
    X(void, pv_i8_fast, (const float *p, size_t rows, const void *codes, const uint16_t *scales,   \
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,     \
                         float *acc, size_t ldacc))                                                \
    /* out[r] = sum q[r * ldq + i] * b[i], b f16: q.mu of a block's offset. n a multiple of */     \
    /* 8. */                                                                                       \
    X(void, dots_f16, (const float *q, size_t ldq, size_t rows, const uint16_t *b, size_t n,       \
                       float *out))                                                                \
    /* s[t] = cap((s[t] + add) * scale) for t < n; cap(x) = softcap * tanh(x / softcap), or */     \
    /* x for softcap 0. s beyond n (to 63) may be written. */                                      \
    X(void, logits, (float *s, size_t n, float add, float scale, float softcap))                   \
    /* s[t] -= slope * |position - positions[t]| for t < n, as above. */                           \
    X(void, alibi, (float *s, size_t n, const int32_t *positions, int32_t position, float slope))  \
    /* One block of online softmax, n tokens visible to all rows. In: logits (s[r * 64 + */        \
    /* t] + add[r]) * scale for t < n (-inf: masked; add NULL: zero), m[r] the running */          \
    /* maximum (-inf at first), l[r] the running sum. Out: s = exp(logit - new m), 0 from n */     \
    /* to 63, m, l updated; alpha[r] = exp(old m - new m), the factor for the accumulators */      \
    /* (1 when the block and all before it are masked). s 64-byte aligned. A NaN among the */      \
    /* logits makes l one, also where it leaves no maximum; so does merge with m2 -inf. */         \
    X(void, softmax, (float *s, size_t rows, size_t n, const float *add, float scale, float *m,    \
                      float *l, float *alpha))                                                     \
    /* V as the first dims of K: out = K's dims 0 .. v_dims_p - 1 of all 64 slots in V's order */  \
    /* (tile.h). codes and out 64-byte aligned, v_dims_p <= dims_p, both multiples of 16. Dead */  \
    /* slots are copied as they are. */                                                            \
    X(void, transpose_f32, (const void *codes, size_t dims_p, size_t v_dims_p, void *out))         \
    X(void, transpose_f16, (const void *codes, size_t dims_p, size_t v_dims_p, void *out))         \
    X(void, transpose_i8, (const void *codes, size_t dims_p, size_t v_dims_p, void *out))          \
    /* acc[r * ldacc + i] += coefficients[r] * x[i] for i < n, a multiple of 16. */                \
    X(void, add_scaled, (float *acc, size_t ldacc, size_t rows, const float *coefficients,         \
                         const float *x, size_t n))                                                \
    /* Merge a second softmax (m2, l2, acc2[dims_p]) into (m, l, acc). */                          \
    X(void, merge, (float *acc, float *m, float *l, const float *acc2, float m2, float l2,         \
                    size_t dims_p))                                                                \
    /* acc /= l with the sink's exp(sink - m) in the denominator (sink -inf: none); zeros where */ \
    /* nothing is visible. Returns the log-sum-exp, sink included. */                              \
    X(float, finish, (float *acc, size_t dims_p, float m, float l, float sink))

/* K and V of 4 and 5 bits: levels.h, docs/numerics.md. */
#define KVT_KERNELS_4BIT(X)                                                                        \
    /* V of 4 and 5 bits: as put_v_i8, with the levels and the search of levels.h, or 32 */        \
    /* equally spaced ones. */                                                                     \
    X(int, put_v_i4, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,            \
                      void *codes, uint16_t *scales, size_t slot))                                 \
    X(int, put_v_i5, (const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,            \
                      void *codes, uint16_t *scales, size_t slot))                                 \
    /* 4-bit K: (code - 7.5) * scales[d] (>= 0), without gain and offset. */                       \
    X(void, get_k_i4, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,        \
                       size_t dims_p, float *x))                                                   \
    X(void, get_v_i4, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,        \
                       size_t dims_p, float *x))                                                   \
    X(void, get_v_i5, (const void *codes, const uint16_t *scales, size_t slot, size_t dims,        \
                       size_t dims_p, float *x))                                                   \
    /* 4-bit K. The range of each dim over the tokens that are not left out (a bit a token; at */  \
    /* least one is in): lo, hi [dims_p]. A zero may have either sign. */                          \
    X(void, range_k_f16, (const void *open, const uint16_t *open_scales, uint64_t left_out,        \
                          size_t dims_p, float *lo, float *hi))                                    \
    /* Codes round((x + delta[d]) * reciprocal of scales[d] + 7.5), which are 0 to 15; and a */    \
    /* token's gain, for which k = x + delta + along and what stands for it, gain * ((code - */    \
    /* 7.5) * scale + along), have the same product with k. scales: [dims_p] f16, >= 0. */         \
    X(void, seal_k_i4, (const void *open, const uint16_t *open_scales, const float *delta,         \
                        const float *along, const uint16_t *scales, size_t dims_p,                 \
                        const void *next, void *codes, uint8_t *gains))                            \
    /* Codes and scales of put_v_i4, put_v_i5 for all 64 tokens and dims_p dims; i5's factor as */ \
    /* seal_v_i8's. i4's of rows whose scale is no power of two are not used. */                   \
    X(void, seal_v_i4, (const void *open, const uint16_t *open_scales, size_t dims_p,              \
                        const void *next, void *codes, uint16_t *scales))                          \
    X(void, seal_v_i5, (const void *open, const uint16_t *open_scales, size_t dims_p,              \
                        const void *next, void *codes, uint16_t *scales))                          \
    /* 4-bit K, as get_k_i4 gives it: scales are by dims. _near: a row of q[d] * scales[d] is */   \
    /* rounded to multiples of its largest magnitude (but at least 2^-100) over 120 or more. */    \
    /* A row with a product beyond f32 gets NaNs. */                                               \
    X(void, qk_i4, (const float *q, size_t ldq, size_t rows, const void *codes,                    \
                    const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,      \
                    float *s))                                                                     \
    X(void, qk_i4_near, (const float *q, size_t ldq, size_t rows, const void *codes,               \
                         const uint16_t *scales, size_t n_tokens, size_t dims_p,                   \
                         const void *next, float *s))                                              \
    /* s[r * 64 + t] = (s + add[r]) * gain of token t, for all 64. */                              \
    X(void, gain_k, (float *s, size_t rows, const uint8_t *gains, const float *add))               \
    /* V of 4 and 5 bits. _near: p * scale rounded, dithered (dither.h), to multiples of its */    \
    /* largest over 120 to 255. */                                                                 \
    X(void, pv_i4, (const float *p, size_t rows, const void *codes, const uint16_t *scales,        \
                    size_t n_tokens, size_t dims_p, const float *alpha, const void *next,          \
                    float *acc, size_t ldacc))                                                     \
    X(void, pv_i4_near, (const float *p, size_t rows, const void *codes, const uint16_t *scales,   \
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,     \
                         float *acc, size_t ldacc))                                                \
    X(void, pv_i5, (const float *p, size_t rows, const void *codes, const uint16_t *scales,        \
                    size_t n_tokens, size_t dims_p, const float *alpha, const void *next,          \
                    float *acc, size_t ldacc))                                                     \
    X(void, pv_i5_near, (const float *p, size_t rows, const void *codes, const uint16_t *scales,   \
                         size_t n_tokens, size_t dims_p, const float *alpha, const void *next,     \
                         float *acc, size_t ldacc))

#define KVT_KERNEL_LIST(X) KVT_KERNELS_WIDE(X) KVT_KERNELS_4BIT(X)
/* clang-format on */

typedef struct kvt_kernels {
    const char *isa;
#define KVT_KERNEL_MEMBER(result, name, parameters) result(*name) parameters;
    KVT_KERNEL_LIST(KVT_KERNEL_MEMBER)
#undef KVT_KERNEL_MEMBER
} kvt_kernels;

/*
 * One table an ISA; only src/dispatch.c and the checker name them. KVT_HAVE_NAME is defined for
 * those in this build: an ISA that the compiler cannot target is left out.
 */
extern const kvt_kernels kvt_kernels_scalar;
#if defined(KVT_HAVE_AVX2)
extern const kvt_kernels kvt_kernels_avx2;
#endif
#if defined(KVT_HAVE_AVXVNNI)
extern const kvt_kernels kvt_kernels_avxvnni;
#endif
#if defined(KVT_HAVE_AVX512VNNI)
extern const kvt_kernels kvt_kernels_avx512vnni;
#endif
#if defined(KVT_HAVE_AMX)
extern const kvt_kernels kvt_kernels_amx;
#endif
#if defined(KVT_HAVE_NEON)
extern const kvt_kernels kvt_kernels_neon;
#endif
#if defined(KVT_HAVE_DOTPROD)
extern const kvt_kernels kvt_kernels_dotprod;
#endif
#if defined(KVT_HAVE_I8MM)
extern const kvt_kernels kvt_kernels_i8mm;
#endif

#endif /* KVT_KERNELS_H */
