/*
 * AVX2 kernels of attention over 4-bit K and 4- and 5-bit V, by integer dot products and in f32.
 * avx2_4bit.h has what the integer ones share with AVX-VNNI's. The table is in avx2.c.
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds pairs of products to int16: 32 products
 * an instruction, twice vpmaddwd's, which i8 needs (avx2_i8.c). Its sums are collected in int16 as
 * long as they fit, and then widened by a vpmaddwd with ones:
 *
 *   K       2 * 15 * 127 a pair: 8 of them (32 dims) stay below 30480
 *   V       digits of p up to 127 by levels up to 63, 2 * 127 * 63 a pair: 2 of them (8 tokens, the
 *           low and the high nibbles of a register) stay below 32004
 *   5-bit V digits up to 255 by codes from -16 to 15, 2 * 255 * 16 a pair: 4 of them (16 tokens),
 *           32640
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

/* 8 tokens of one row, as pairs in int16. */
KVT_INLINE __m256i multiply_8(__m256i w0, __m256i w1, const __m256i bytes[2])
{
    return _mm256_add_epi16(_mm256_maddubs_epi16(w0, bytes[0]), _mm256_maddubs_epi16(w1, bytes[1]));
}

/*
 * `octets` times 8 tokens, all rows, the vectors v and, where KVT_PAIRS_V4, v + 1, which share a
 * row's weights. 5 bits: two octets fit int16.
 */
KVT_INLINE void multiply_v(int format, size_t octets, size_t rows, size_t vectors, size_t v,
                           const unsigned char *codes, const unsigned char *bits,
                           const kvt_operands *o, const int32_t *weight, __m256i *sum)
{
    const __m256i ones = _mm256_set1_epi16(1);
    const int pair = KVT_PAIRS_V4(rows);
    __m256i bytes[2][4];
    if (v >= vectors)
        return;
    KVT_UNROLL
    for (size_t i = 0; i < octets * 2; i++) {
        const unsigned char *at = codes + i / 2 * o->step + v * 32;
        const unsigned char *its = bits + i / 2 * o->bits_step + v / 2 * 16 + v % 2 * 4;
        bytes[0][i] = kvt_v4_bytes(format, kvt_load_256(at), i % 2, its);
        if (pair)
            bytes[1][i] = kvt_v4_bytes(format, kvt_load_256(at + 32), i % 2, its + 4);
    }
#define MULTIPLY(r)                                                                                \
    if ((r) < rows) {                                                                              \
        const int32_t *its = weight + (r)*o->ldw;                                                  \
        __m256i *to = &sum[(r)*vectors + v];                                                       \
        __m256i x = multiply_8(four_of(its), four_of(its + 1), bytes[0]), y = ones;                \
        if (pair)                                                                                  \
            y = multiply_8(four_of(its), four_of(its + 1), bytes[1]);                              \
        if (octets == 2) {                                                                         \
            x = _mm256_add_epi16(x, multiply_8(four_of(its + 2), four_of(its + 3), bytes[0] + 2)); \
            if (pair)                                                                              \
                y = _mm256_add_epi16(                                                              \
                    y, multiply_8(four_of(its + 2), four_of(its + 3), bytes[1] + 2));              \
        }                                                                                          \
        to[0] = _mm256_add_epi32(to[0], _mm256_madd_epi16(x, ones));                               \
        KVT_KEEP(to[0]);                                                                           \
        if (pair) {                                                                                \
            to[1] = _mm256_add_epi32(to[1], _mm256_madd_epi16(y, ones));                           \
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
    const size_t octets = format == KVT_V5 ? 2 : 1;
    const unsigned char *codes = o->codes, *bits = o->bits;
    const int32_t *weight = o->weight, *end = weight + 2 * o->n;
#define ZERO(i) sum[i] = _mm256_setzero_si256();
    KVT_EACH_SUM_V4(ZERO)
#undef ZERO
    do { /* n >= 1 */
        kvt_prefetch_bytes(&prefetch, codes, 64, vectors * 32);
        if (octets == 2)
            kvt_prefetch_bytes(&prefetch, codes + o->step, 64, vectors * 32);
        multiply_v(format, octets, rows, vectors, 0, codes, bits, o, weight, sum);
        if (!KVT_PAIRS_V4(rows))
            multiply_v(format, octets, rows, vectors, 1, codes, bits, o, weight, sum);
        multiply_v(format, octets, rows, vectors, 2, codes, bits, o, weight, sum);
        if (!KVT_PAIRS_V4(rows))
            multiply_v(format, octets, rows, vectors, 3, codes, bits, o, weight, sum);
        codes += octets * o->step;
        bits += octets * o->bits_step;
        weight += octets * 2;
    } while (weight < end);
}

KVT_QK4_KERNEL(, kvt_avx2_qk_i4_near)
KVT_PV4_KERNEL(, kvt_avx2_pv_i4_near, KVT_V4, 8, 127.0f)
KVT_PV4_KERNEL(, kvt_avx2_pv_i5_near, KVT_V5, 8, 255.0f)

/* ---- f32 ---- */

/*
 * In f32 the codes become those of i8, once for all rows, and are multiplied by its kernels: K's as
 * 2 * code - 15 with scales of a half, as the scales of its dims are in q.
 */
typedef struct unpacked {
    _Alignas(64) unsigned char codes[KVT_TOKENS * KVT_DIMS_MAX];
} unpacked;

/* A line of codes that is read now is one of `next`'s to be prefetched. */
KVT_INLINE void prefetch_at(const void *next, size_t offset)
{
    if (next)
        _mm_prefetch((const char *)next + offset, _MM_HINT_T1);
}

static void unpack_k4(const unsigned char *codes, size_t dims_p, const void *next, unpacked *to)
{
    const __m256i odd = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15));
    for (size_t i = 0; i < KVT_TOKENS * dims_p / 2; i += 64) {
        __m256i a = kvt_load_256(codes + i), b = kvt_load_256(codes + i + 32);
        prefetch_at(next, i);
        kvt_store_256(to->codes + 2 * i, _mm256_shuffle_epi8(odd, kvt_nibbles(a, 0)));
        kvt_store_256(to->codes + 2 * i + 32, _mm256_shuffle_epi8(odd, kvt_nibbles(b, 0)));
        kvt_store_256(to->codes + 2 * i + 64, _mm256_shuffle_epi8(odd, kvt_nibbles(a, 1)));
        kvt_store_256(to->codes + 2 * i + 96, _mm256_shuffle_epi8(odd, kvt_nibbles(b, 1)));
    }
}

void kvt_avx2_qk_i4(const float *q, size_t ldq, size_t rows, const void *codes,
                    const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                    float *s)
{
    _Alignas(64) float folded[KVT_ROWS_BLOCK * KVT_DIMS_MAX], factors[KVT_DIMS_MAX];
    uint16_t halves[KVT_TOKENS];
    unpacked k;
    unpack_k4(codes, dims_p, next, &k);
    for (size_t t = 0; t < KVT_TOKENS; t++)
        halves[t] = 0x3800;
    for (size_t d = 0; d < dims_p; d += 8)
        _mm256_store_ps(factors + d, _mm256_cvtph_ps(kvt_load_128(scales + d)));
    for (size_t row = 0, n; row < rows; row += n) {
        n = kvt_rows_of_block(rows - row);
        for (size_t r = 0; r < n; r++)
            for (size_t d = 0; d < dims_p; d += 8)
                _mm256_store_ps(folded + r * dims_p + d,
                                _mm256_mul_ps(_mm256_loadu_ps(q + (row + r) * ldq + d),
                                              _mm256_load_ps(factors + d)));
        kvt_avx2_qk_i8(folded, dims_p, n, k.codes, halves, n_tokens, dims_p, NULL,
                       s + row * KVT_TOKENS);
    }
}

KVT_INLINE void unpack_v4(int format, const unsigned char *codes, size_t n_tokens, size_t dims_p,
                          const void *next, unpacked *to)
{
    for (size_t t = 0; t < n_tokens; t += 8) {
        const unsigned char *from = codes + kvt_v4_index(t, 0, dims_p);
        for (size_t d = 0; d < dims_p; d += 8) {
            const unsigned char *bits = codes + kvt_v5_index(t, d, dims_p);
            __m256i x = kvt_load_256(from + d * 4);
            __m256i low = kvt_v4_bytes(format, x, 0, bits), high = kvt_v4_bytes(format, x, 1, bits);
            if (format == KVT_V5) { /* 2 * (code - 16) + 1 */
                low = _mm256_add_epi8(_mm256_add_epi8(low, low), _mm256_set1_epi8(1));
                high = _mm256_add_epi8(_mm256_add_epi8(high, high), _mm256_set1_epi8(1));
            }
            if (d % 16 == 0)
                prefetch_at(next, (t * dims_p / 2 + d * 4) * (format == KVT_V5 ? 5 : 4) / 4);
            kvt_store_256(to->codes + kvt_v8_index(t, d, dims_p), low);
            kvt_store_256(to->codes + kvt_v8_index(t + 4, d, dims_p), high);
        }
    }
}

#define PV_KERNEL(name, format)                                                                    \
    void name(const float *p, size_t rows, const void *codes, const uint16_t *scales,              \
              size_t n_tokens, size_t dims_p, const float *alpha, const void *next, float *acc,    \
              size_t ldacc)                                                                        \
    {                                                                                              \
        unpacked v;                                                                                \
        unpack_v4(format, codes, n_tokens, dims_p, next, &v);                                      \
        kvt_avx2_pv_i8(p, rows, v.codes, scales, n_tokens, dims_p, alpha, NULL, acc, ldacc);       \
    }
PV_KERNEL(kvt_avx2_pv_i4, KVT_V4)
PV_KERNEL(kvt_avx2_pv_i5, KVT_V5)

void kvt_avx2_gain_k(float *s, size_t rows, const uint8_t *gains, const float *add)
{
    __m256 gain[KVT_TOKENS / 8];
    for (size_t i = 0; i < KVT_TOKENS / 8; i++) {
        __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(gains + 8 * i)));
        x = _mm256_sub_epi32(x, _mm256_set1_epi32(KVT_K4_GAIN_ONE));
        gain[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(KVT_K4_GAIN_STEP),
                                  _mm256_set1_ps(1.0f)); /* exact */
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < KVT_TOKENS / 8; i++) {
            float *at = s + r * KVT_TOKENS + 8 * i;
            __m256 x = _mm256_add_ps(_mm256_load_ps(at), _mm256_broadcast_ss(add + r));
            _mm256_store_ps(at, _mm256_mul_ps(x, gain[i]));
        }
}
