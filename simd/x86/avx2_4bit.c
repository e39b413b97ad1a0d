/*
 * AVX2 kernels of attention over 4-bit K and 4- and 5-bit V by integer dot products. avx2_4bit.h
 * has what they share with AVX-VNNI's.
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds pairs of products to int16: 32 products
 * an instruction, twice vpmaddwd's, which i8 needs (avx2_i8.c). Its sums are collected in int16 as
 * long as they fit, and then widened by a vpmaddwd with ones:
 *
 *   K       2 * 15 * 127 a pair: 8 of them (32 dims) stay below 30480
 *   V       digits of p up to 127 by levels up to 63, 2 * 127 * 63 a pair: 2 of them (8 tokens, the
 *           low and the high nibbles of a register) stay below 32004
 *   5-bit V digits up to 255 by codes up to 31, 2 * 255 * 31 a pair: likewise, 31620
 */
#include "avx2_4bit.h"

#define EACH_VECTOR(X) X(0) X(1) X(2) X(3)

KVT_INLINE __m256i four_of(const int32_t *weight)
{
    return _mm256_set1_epi32(*weight);
}

/* ---- scores ---- */

/* 8 dims, two vectors, all rows: one half of the nibbles. */
KVT_INLINE void multiply_half(size_t rows, int half, const unsigned char *pair,
                              const int32_t *weight, size_t ldw, __m256i *sum)
{
    __m256i a = kvt_nibbles(kvt_load_256(pair), half);
    __m256i b = kvt_nibbles(kvt_load_256(pair + 32), half);
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        __m256i w = four_of(weight + (r)*ldw);                                                     \
        sum[(r)*2] = _mm256_add_epi16(sum[(r)*2], _mm256_maddubs_epi16(a, w));                     \
        sum[(r)*2 + 1] = _mm256_add_epi16(sum[(r)*2 + 1], _mm256_maddubs_epi16(b, w));             \
        KVT_KEEP(sum[(r)*2]);                                                                      \
        KVT_KEEP(sum[(r)*2 + 1]);                                                                  \
    }
    KVT_EACH_ROW(MULTIPLY)
#undef MULTIPLY
    KVT_RELOAD();
}

/* The same of both halves, `vectors` vectors, one or two rows. */
KVT_INLINE void multiply_few(size_t rows, size_t vectors, const unsigned char *codes,
                             size_t pair_bytes, const int32_t *weight, size_t ldw, __m256i *sum)
{
    const size_t second = rows > 1 ? ldw : 0;
    __m256i w00 = four_of(weight), w01 = four_of(weight + 4);
    __m256i w10 = four_of(weight + second), w11 = four_of(weight + second + 4);
#define MULTIPLY(v)                                                                                \
    if ((v) < vectors) {                                                                           \
        __m256i x = kvt_load_256(codes + (v) / 2 * pair_bytes + (v) % 2 * 32);                     \
        __m256i a = kvt_nibbles(x, 0), b = kvt_nibbles(x, 1);                                      \
        sum[v] = _mm256_add_epi16(sum[v], _mm256_maddubs_epi16(a, w00));                           \
        sum[v] = _mm256_add_epi16(sum[v], _mm256_maddubs_epi16(b, w01));                           \
        KVT_KEEP(sum[v]);                                                                          \
        if (rows > 1) {                                                                            \
            __m256i *to = &sum[vectors + (v)];                                                     \
            *to = _mm256_add_epi16(*to, _mm256_maddubs_epi16(a, w10));                             \
            *to = _mm256_add_epi16(*to, _mm256_maddubs_epi16(b, w11));                             \
            KVT_KEEP(*to);                                                                         \
        }                                                                                          \
    }
    EACH_VECTOR(MULTIPLY)
#undef MULTIPLY
    KVT_RELOAD();
}

/* The sums of 32 dims fit int16; those of all dims are kept in memory. */
KVT_INLINE void kvt_product_k4(size_t rows, size_t vectors, const kvt_operands *o,
                               kvt_prefetch_state prefetch, __m256i *sum)
{
    const __m256i ones = _mm256_set1_epi16(1);
    const unsigned char *codes = o->codes;
    const int32_t *weight = o->weight;
#define ZERO(i) sum[i] = _mm256_setzero_si256();
    KVT_EACH_SUM(ZERO)
#undef ZERO
    for (size_t left = o->n, n; left; left -= n, weight += 4) {
        const int32_t *end;
        __m256i part[KVT_SUMS_MAX];
        n = left < 4 ? left : 4;
        end = weight + n;
#define ZERO(i) part[i] = _mm256_setzero_si256();
        KVT_EACH_SUM(ZERO)
#undef ZERO
        do {
            kvt_prefetch_bytes(&prefetch, codes, o->pair_bytes, vectors * 32);
            if (rows <= 2) {
                multiply_few(rows, vectors, codes, o->pair_bytes, weight, o->ldw, part);
            } else {
                multiply_half(rows, 0, codes, weight, o->ldw, part);
                multiply_half(rows, 1, codes, weight + 4, o->ldw, part);
            }
            codes += o->step;
        } while (++weight < end);
#define WIDEN(i)                                                                                   \
    if ((i) < rows * vectors)                                                                      \
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(part[i], ones));
        KVT_EACH_SUM(WIDEN)
#undef WIDEN
    }
}

/* ---- weighted sums ---- */

/* 8 tokens, the vectors v and v + 1, all rows. */
KVT_INLINE void multiply_v(int format, size_t rows, size_t vectors, size_t v,
                           const unsigned char *codes, size_t pair_bytes, const int32_t *weight,
                           size_t ldw, const unsigned char *bits, __m256i *sum)
{
    const __m256i ones = _mm256_set1_epi16(1);
    const unsigned char *pair = codes + v / 2 * pair_bytes, *its = bits + v / 2 * 16;
    __m256i a0, a1, b0, b1;
    if (v >= vectors)
        return;
    a0 = kvt_v4_bytes(format, kvt_load_256(pair), 0, its);
    a1 = kvt_v4_bytes(format, kvt_load_256(pair), 1, its);
    b0 = kvt_v4_bytes(format, kvt_load_256(pair + 32), 0, its + 4);
    b1 = kvt_v4_bytes(format, kvt_load_256(pair + 32), 1, its + 4);
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        __m256i w0 = four_of(weight + (r)*ldw), w1 = four_of(weight + (r)*ldw + 1);                \
        __m256i *to = &sum[(r)*vectors + v];                                                       \
        __m256i x = _mm256_add_epi16(_mm256_maddubs_epi16(w0, a0), _mm256_maddubs_epi16(w1, a1));  \
        __m256i y = _mm256_add_epi16(_mm256_maddubs_epi16(w0, b0), _mm256_maddubs_epi16(w1, b1));  \
        to[0] = _mm256_add_epi32(to[0], _mm256_madd_epi16(x, ones));                               \
        to[1] = _mm256_add_epi32(to[1], _mm256_madd_epi16(y, ones));                               \
        KVT_KEEP(to[0]);                                                                           \
        KVT_KEEP(to[1]);                                                                           \
    }
    KVT_EACH_ROW(MULTIPLY)
#undef MULTIPLY
    KVT_RELOAD();
}

KVT_INLINE void kvt_product_v4(int format, size_t rows, size_t vectors, const kvt_operands *o,
                               kvt_prefetch_state prefetch, __m256i *sum)
{
    const unsigned char *codes = o->codes, *bits = o->bits;
    const int32_t *weight = o->weight, *end = weight + 2 * o->n;
#define ZERO(i) sum[i] = _mm256_setzero_si256();
    KVT_EACH_SUM(ZERO)
#undef ZERO
    do { /* n >= 1 */
        kvt_prefetch_bytes(&prefetch, codes, o->pair_bytes, vectors * 32);
        multiply_v(format, rows, vectors, 0, codes, o->pair_bytes, weight, o->ldw, bits, sum);
        multiply_v(format, rows, vectors, 2, codes, o->pair_bytes, weight, o->ldw, bits, sum);
        codes += o->step;
        bits += o->bits_step;
        weight += 2;
    } while (weight < end);
}

KVT_QK4_KERNEL(kvt_avx2_qk_i4_near, 8)
KVT_PV4_KERNEL(kvt_avx2_pv_i4_near, KVT_V4, 12, 127.0f)
KVT_PV4_KERNEL(kvt_avx2_pv_i5_near, KVT_V5, 12, 255.0f)
