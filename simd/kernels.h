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
 *  - put_*, mean_*, rotate, unrotate, load_*, store_*: the same bytes as scalar. docs/numerics.md
 *    specifies them.
 *  - qk_*, pv_*, dot_*, logits, alibi, softmax, merge, finish: within a bound of scalar.
 *  - In qk_* and pv_* the result of a row depends on nothing but that row: not on how many rows
 *    there are, nor on their order. (So a query's result does not depend on its batch.)
 *
 * Parameters that recur:
 *   dims       head dims; dims_p: padded to a multiple of 16
 *   codes      a head's codes of one block, 64-byte aligned, laid out as tile.h says
 *   scales     [64] f16, the head's scales of that side; unused (NULL) for f32 and f16
 *   slot       a token's place in its block, 0 .. 63
 *   n_tokens   how many tokens of the block are alive, 1 .. 64
 *   rows       query rows of one kv head (queries times group), >= 1
 */
#ifndef KVT_KERNELS_H
#define KVT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "tile.h"

/* Most rows that one qk_ or pv_ call is given. */
#define KVT_ROWS_MAX 32

/* clang-format off */
#define KVT_KERNEL_LIST(X)                                                                         \
    /* n elements of the caller's dtype (aligned to the element only) to f32; 1 when all are */    \
    /* finite, else 0 with dst unspecified. */                                                     \
    X(int, load_f32, (const void *src, float *dst, size_t n))                                      \
    X(int, load_f16, (const void *src, float *dst, size_t n))                                      \
    X(int, load_bf16, (const void *src, float *dst, size_t n))                                     \
    /* The reverse, to nearest even; f16 saturates at +-65504. */                                  \
    X(void, store_f32, (const float *src, void *dst, size_t n))                                    \
    X(void, store_f16, (const float *src, void *dst, size_t n))                                    \
    X(void, store_bf16, (const float *src, void *dst, size_t n))                                   \
    /* x[i] *= sign[i] (+-1); fast Walsh-Hadamard transform of each `block` dims (a power of */    \
    /* two that divides dims); x[i] *= scale (a power of two). Order: docs/numerics.md. */         \
    X(void, rotate, (float *x, const float *sign, size_t dims, size_t block, float scale))         \
    /* The inverse for scale = 1 / (rotate's scale * block): transform, scale, signs. */           \
    X(void, unrotate, (float *x, const float *sign, size_t dims, size_t block, float scale))       \
    /* Store tokens slot .. slot + n - 1, all of one tile (slot % 16 + n <= 16), from rows of */   \
    /* f32 x[i * ldx]. 1 when stored, 0 when a value does not fit the type (f16: beyond 65504 */   \
    /* after rounding; i8: the scale would be beyond f16) with the slots unspecified. A tile has */\
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
    /* Mean over the 64 tokens of a full block of the dequantized K, stored domain: mean[dims_p]. */ \
    X(void, mean_k_i8, (const void *codes, const uint16_t *scales, size_t dims_p, float *mean))    \
    /* s[r * 64 + t] = sum_d q[r * ldq + d] * K[t][d] for r < rows and t < n_tokens. q is zero in */ \
    /* the padding. s beyond n_tokens is unspecified. q, s 64-byte aligned, ldq a multiple of 16. */ \
    X(void, qk_f32, (const float *q, size_t ldq, size_t rows, const void *codes,                   \
                     const uint16_t *scales, size_t n_tokens, size_t dims_p, float *s))            \
    X(void, qk_f16, (const float *q, size_t ldq, size_t rows, const void *codes,                   \
                     const uint16_t *scales, size_t n_tokens, size_t dims_p, float *s))            \
    X(void, qk_i8, (const float *q, size_t ldq, size_t rows, const void *codes,                    \
                    const uint16_t *scales, size_t n_tokens, size_t dims_p, float *s))             \
    /* acc[r * ldacc + d] = acc * alpha[r] + sum_t p[r * 64 + t] * V[t][d]; the sum over the */    \
    /* block is formed from zero and then added (error grows with blocks, not with tokens). p is */ \
    /* zero from n_tokens to 63. Dead slots are not read as numbers: they may be NaN. */           \
    X(void, pv_f32, (const float *p, size_t rows, const void *codes, const uint16_t *scales,       \
                     size_t n_tokens, size_t dims_p, const float *alpha, float *acc, size_t ldacc)) \
    X(void, pv_f16, (const float *p, size_t rows, const void *codes, const uint16_t *scales,       \
                     size_t n_tokens, size_t dims_p, const float *alpha, float *acc, size_t ldacc)) \
    X(void, pv_i8, (const float *p, size_t rows, const void *codes, const uint16_t *scales,        \
                    size_t n_tokens, size_t dims_p, const float *alpha, float *acc, size_t ldacc)) \
    /* sum a[i] * b[i], b f16: q.mu of a block's offset. n a multiple of 8. */                     \
    X(float, dot_f16, (const float *a, const uint16_t *b, size_t n))                               \
    /* s[t] = cap((s[t] + add) * scale) for t < n; cap(x) = softcap * tanh(x / softcap), or x */   \
    /* for softcap 0. s beyond n (to 63) may be written. */                                        \
    X(void, logits, (float *s, size_t n, float add, float scale, float softcap))                   \
    /* s[t] -= slope * |position - positions[t]| for t < n, as above. */                           \
    X(void, alibi, (float *s, size_t n, const int32_t *positions, int32_t position, float slope))  \
    /* One block of online softmax. In: s[0 .. n-1] logits (-inf: masked), *m the running maximum */ \
    /* (-inf at first), *l the running sum. Out: s[t] = exp(logit - new m), 0 from n to 63, *m, *l */ \
    /* updated. Returns exp(old m - new m), the factor for the accumulators (1 when the block and */ \
    /* all before it are masked). */                                                               \
    X(float, softmax, (float *s, size_t n, float *m, float *l))                                    \
    /* Merge a second softmax (m2, l2, acc2[dims_p]) into (m, l, acc). */                          \
    X(void, merge, (float *acc, float *m, float *l, const float *acc2, float m2, float l2,         \
                    size_t dims_p))                                                                \
    /* acc /= l with the sink's exp(sink - m) in the denominator (sink -inf: none); zeros where */ \
    /* nothing is visible. Returns the log-sum-exp, sink included. */                              \
    X(float, finish, (float *acc, size_t dims_p, float m, float l, float sink))
/* clang-format on */

typedef struct kvt_kernels {
    const char *isa;
#define KVT_KERNEL_MEMBER(result, name, parameters) result(*name) parameters;
    KVT_KERNEL_LIST(KVT_KERNEL_MEMBER)
#undef KVT_KERNEL_MEMBER
} kvt_kernels;

/* One table an ISA; only src/dispatch.c and the checker name them. */
extern const kvt_kernels kvt_kernels_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const kvt_kernels kvt_kernels_avx2;
#endif

#endif /* KVT_KERNELS_H */
