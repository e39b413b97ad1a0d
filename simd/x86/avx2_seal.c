/*
 * AVX2 + FMA + F16C kernels: sealing, that is the robust mean of a block of f16 tokens and their
 * codes and scales as i8.
 *
 * The bytes are scalar.c's: the same f32 operations in the same order, 8 tokens (K) or dims (V) at
 * a time. An element is code * scale with a power of two for a scale, so that the product is exact:
 * an FMA of code and scale rounds once, as the addition by itself does, and spares the
 * multiplication. Nothing else is fused but what docs/numerics.md says is. For V, without an
 * offset, the product of the open scale and the reciprocal of the sealed one is exact as well, and
 * one multiplication an element remains.
 *
 * AVX-512 inherits these. On Zen 4, which halves 64-byte operations, a 64-byte conversion from f16
 * costs a third more than two of 32 bytes, and all of it a third (0.47 and 0.57 us here, 0.63 and
 * 0.85 there, for seal_v_i8 and mean_k_f16 of 128 dims). seal_k_i8 is a chain of operations, which
 * 64-byte registers do not shorten: 1.64 us here, 1.60 there.
 */
#include "avx2_seal.h"

#include "simd/outliers.h"

/* ---- the mean ---- */

KVT_DEFINE_FOLD(fold, _mm256_add_ps)

/* By half of a tile (tokens 0 .. 7 and 8 .. 15 of it), and by tile. */
typedef struct tokens {
    __m256 scale[2][KVT_TILES];
    __m256 kept[2][KVT_TILES]; /* all ones for tokens that count */
} tokens;

/* Sums over the tiles: lane j is the sum of tokens j, 16 + j, 32 + j, 48 + j of that half. */
KVT_INLINE __m256 sum_tiles(const uint16_t *from, size_t tile, const __m256 scale[KVT_TILES],
                            const __m256 *kept)
{
    __m256 sum = _mm256_setzero_ps();
    KVT_UNROLL
    for (size_t i = 0; i < KVT_TILES; i++) {
        __m256 x = kvt_load_f16(from + i * tile);
        if (kept)
            x = _mm256_and_ps(x, kept[i]);
        sum = i ? _mm256_fmadd_ps(x, scale[i], sum) : _mm256_mul_ps(x, scale[i]);
    }
    return sum;
}

/*
 * The mean of `count` tokens, those that t->kept says, or all. 8 dims fold together. One half of
 * the tiles after the other: the scales of both would leave too few registers for 8 sums.
 */
KVT_INLINE void mean_of_kept(const uint16_t *open, const tokens *t, int is_all, float count,
                             size_t dims_p, float *mean)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    for (size_t d = 0; d < dims_p; d += 8) {
        const uint16_t *from = open + d * KVT_TILE_TOKENS;
        __m256 sum[8];
        KVT_UNROLL
        for (size_t e = 0; e < 8; e++)
            sum[e] = sum_tiles(from + e * 16, tile, t->scale[0], is_all ? NULL : t->kept[0]);
        KVT_UNROLL
        for (size_t e = 0; e < 8; e++)
            sum[e] = _mm256_add_ps(sum[e], sum_tiles(from + e * 16 + 8, tile, t->scale[1],
                                                     is_all ? NULL : t->kept[1]));
        _mm256_storeu_ps(mean + d, _mm256_div_ps(fold(sum), _mm256_set1_ps(count)));
    }
}

/* Squared distances from the mean. The four tiles are four chains of additions. */
KVT_INLINE void distances_of(const uint16_t *open, const tokens *t, size_t dims_p,
                             const float *mean, float *distances)
{
    const size_t tile = dims_p * KVT_TILE_TOKENS;
    for (size_t half = 0; half < 2; half++) {
        __m256 dist[KVT_TILES];
        KVT_UNROLL
        for (size_t i = 0; i < KVT_TILES; i++)
            dist[i] = _mm256_setzero_ps();
        for (size_t d = 0; d < dims_p; d++) {
            const uint16_t *from = open + d * KVT_TILE_TOKENS + half * 8;
            const __m256 m = _mm256_broadcast_ss(mean + d);
            KVT_UNROLL
            for (size_t i = 0; i < KVT_TILES; i++) {
                __m256 away = _mm256_fmsub_ps(kvt_load_f16(from + i * tile), t->scale[half][i], m);
                dist[i] = _mm256_add_ps(dist[i], _mm256_mul_ps(away, away));
            }
        }
        KVT_UNROLL
        for (size_t i = 0; i < KVT_TILES; i++)
            _mm256_storeu_ps(distances + i * KVT_TILE_TOKENS + half * 8, dist[i]);
    }
}

void kvt_avx2_mean_k_f16(const void *open, const uint16_t *open_scales, size_t dims_p, float *mean)
{
    float distances[KVT_TOKENS];
    uint64_t left_out;
    tokens t;

    for (size_t i = 0; i < KVT_TILES; i++)
        for (size_t half = 0; half < 2; half++)
            t.scale[half][i] = kvt_load_f16(open_scales + i * KVT_TILE_TOKENS + half * 8);
    mean_of_kept(open, &t, 1, KVT_TOKENS, dims_p, mean);
    distances_of(open, &t, dims_p, mean, distances);
    left_out = kvt_outliers(distances);
    if (left_out == 0)
        return;
    for (size_t i = 0; i < KVT_TILES; i++)
        for (size_t half = 0; half < 2; half++)
            t.kept[half][i] = kvt_kept_lanes(left_out >> (i * KVT_TILE_TOKENS + half * 8));
    mean_of_kept(open, &t, 0, (float)(KVT_TOKENS - __builtin_popcountll(left_out)), dims_p, mean);
}

/* ---- codes ---- */

/*
 * Codes of four registers of numbers: byte j of lane i is that of x[j]'s lane i. The default
 * rounding of the conversion is to nearest even; packing saturates, codes do not.
 */
KVT_INLINE __m256i codes_of(const __m256 x[4])
{
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0,
                                           4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
    __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2]), _mm256_cvtps_epi32(x[3]));
    return _mm256_shuffle_epi8(_mm256_packs_epi16(ab, cd), order);
}

/*
 * K's tokens are the lanes, 8 a register: no operation needs another lane. w of a tile goes to a
 * buffer, two registers a dim, `stride` floats from one dim to the next.
 */
KVT_INLINE void widen_tile(const uint16_t *from, const uint16_t *open_scales, const float *delta,
                           size_t dims_p, size_t stride, float *w, uint16_t *scales,
                           __m256 reciprocals[2])
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256 scale[2];
    __m256i most[2];
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++) {
        scale[i] = kvt_load_f16(open_scales + 8 * i);
        most[i] = _mm256_setzero_si256();
    }
    for (size_t d = 0; d < dims_p; d++) {
        KVT_UNROLL
        for (size_t i = 0; i < 2; i++) {
            __m256 x = kvt_load_f16(from + d * 16 + 8 * i);
            x = delta ? _mm256_fmadd_ps(x, scale[i], _mm256_broadcast_ss(delta + d))
                      : _mm256_mul_ps(x, scale[i]);
            _mm256_store_ps(w + d * stride + 8 * i, x);
            most[i] =
                _mm256_max_epi32(most[i], _mm256_and_si256(_mm256_castps_si256(x), magnitude));
        }
    }
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++) {
        __m128i rounded = kvt_scales_of(_mm256_castsi256_ps(most[i]), 127.0f);
        kvt_store_128(scales + 8 * i, rounded);
        reciprocals[i] = kvt_reciprocals_of(rounded, 1.0f);
    }
}

/* w becomes v = w * reciprocal, and its squared norm gives the tokens' gains. */
KVT_INLINE void normalize(size_t n, size_t dims_p, const __m256 *reciprocals, float *v,
                          __m256 *gain)
{
    __m256 norm[8];
    KVT_UNROLL
    for (size_t i = 0; i < n; i++)
        norm[i] = _mm256_setzero_ps();
    for (size_t d = 0; d < dims_p; d++) {
        KVT_UNROLL
        for (size_t i = 0; i < n; i++) {
            float *at = v + (d * n + i) * 8;
            __m256 x = _mm256_mul_ps(_mm256_load_ps(at), reciprocals[i]);
            _mm256_store_ps(at, x);
            norm[i] = _mm256_fmadd_ps(x, x, norm[i]);
        }
    }
    KVT_UNROLL
    for (size_t i = 0; i < n; i++)
        gain[i] = _mm256_div_ps(_mm256_set1_ps(1.0f),
                                _mm256_max_ps(_mm256_mul_ps(norm[i], _mm256_set1_ps(0.125f)),
                                              _mm256_set1_ps(KVT_SHAPE_NORM)));
}

/* Rounded numbers of four dims, of up to 8 registers of tokens. */
typedef struct four_dims {
    _Alignas(32) float of[4][8][8];
} four_dims;

/* A dim of a pair of registers, each operation for both before the next. */
KVT_INLINE void shape_pair(const float *v, const __m256 *gain, __m256 *projection,
                           float (*rounded)[8])
{
    __m256 x[2];
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++)
        x[i] = _mm256_mul_ps(projection[i], gain[i]);
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++)
        x[i] = kvt_at_most(x[i], KVT_SHAPE_MAX);
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++)
        x[i] = kvt_at_least_minus(x[i], KVT_SHAPE_MAX);
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++)
        x[i] = _mm256_fnmadd_ps(_mm256_load_ps(v + i * 8), x[i], _mm256_load_ps(v + i * 8));
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++) {
        x[i] = _mm256_round_ps(x[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_store_ps(rounded[i], x[i]);
    }
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++)
        x[i] = _mm256_sub_ps(x[i], _mm256_load_ps(v + i * 8));
    KVT_UNROLL
    for (size_t i = 0; i < 2; i++)
        projection[i] = _mm256_fmadd_ps(x[i], _mm256_load_ps(v + i * 8), projection[i]);
}

/* Codes of register i, dims d .. d + 3. */
KVT_INLINE void store_codes(const four_dims *rounded, size_t i, size_t d, size_t dims_p,
                            uint8_t *codes)
{
    const __m256 x[4] = {_mm256_load_ps(rounded->of[0][i]), _mm256_load_ps(rounded->of[1][i]),
                         _mm256_load_ps(rounded->of[2][i]), _mm256_load_ps(rounded->of[3][i])};
    kvt_store_256(codes + kvt_k8_index(i * 8, d, dims_p), codes_of(x));
}

/*
 * Codes of n registers of tokens. From one dim of a token to the next it is seven operations, each
 * of which needs the one before: 19 cycles (Zen 4). So all registers go side by side. The codes of
 * four dims are packed during the next four: all at once would keep the next step from its ports.
 * Of `next` as many bytes are prefetched as the tokens have in the open record, one line at a time:
 * the chains leave the memory idle.
 */
KVT_INLINE void shape(size_t n, size_t dims_p, const float *v, const __m256 *gain,
                      const uint16_t *next, uint8_t *codes)
{
    __m256 projection[8];
    four_dims rounded[2];
    KVT_UNROLL
    for (size_t i = 0; i < n; i++)
        projection[i] = _mm256_setzero_ps();
    for (size_t d = 0; d < dims_p; d += 4) {
        four_dims *now = &rounded[d / 4 % 2], *before = &rounded[1 - d / 4 % 2];
        KVT_UNROLL
        for (size_t e = 0; e < 4; e++) {
            KVT_UNROLL
            for (size_t i = 0; i < n; i += 2) {
                shape_pair(v + ((d + e) * n + i) * 8, gain + i, projection + i, now->of[e] + i);
                if ((e * n + i) % 4 == 0) /* n times in four dims */
                    _mm_prefetch((const char *)(next + d * n * 8 + (e * n + i) * 8), _MM_HINT_T1);
                if (d && (e * n + i) % 4 == 2)
                    store_codes(before, (e * n + i) / 4, d - 4, dims_p, codes);
            }
        }
    }
    KVT_UNROLL
    for (size_t i = 0; i < n; i++)
        store_codes(&rounded[(dims_p / 4 - 1) % 2], i, dims_p - 4, dims_p, codes);
}

KVT_INLINE void seal_k(size_t n, const uint16_t *open, const uint16_t *open_scales,
                       const float *delta, size_t dims_p, const uint16_t *next, float *v,
                       uint8_t *codes, uint16_t *scales)
{
    __m256 reciprocals[8], gain[8];
    for (size_t i = 0; i < n; i += 2) {
        const uint16_t *from = open + i * 8 * dims_p;
        if (delta)
            widen_tile(from, open_scales + i * 8, delta, dims_p, n * 8, v + i * 8, scales + i * 8,
                       reciprocals + i);
        else
            widen_tile(from, open_scales + i * 8, NULL, dims_p, n * 8, v + i * 8, scales + i * 8,
                       reciprocals + i);
    }
    normalize(n, dims_p, reciprocals, v, gain);
    shape(n, dims_p, v, gain, next, codes);
}

/* As many tokens at a time as the buffer has room for. */
void kvt_avx2_seal_k_i8(const void *open, const uint16_t *open_scales, const float *delta,
                        size_t dims_p, const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *from = open, *ahead = next ? next : open;
    uint8_t *to = codes;
    _Alignas(64) float v[KVT_SEAL_BUFFER];
    if (dims_p * 64 <= KVT_SEAL_BUFFER)
        seal_k(8, from, open_scales, delta, dims_p, ahead, v, to, scales);
    else if (dims_p * 32 <= KVT_SEAL_BUFFER)
        for (size_t t = 0; t < KVT_TOKENS; t += 32)
            seal_k(4, from + t * dims_p, open_scales + t, delta, dims_p, ahead + t * dims_p, v,
                   to + t * dims_p, scales + t);
    else
        for (size_t t = 0; t < KVT_TOKENS; t += 16)
            seal_k(2, from + t * dims_p, open_scales + t, delta, dims_p, ahead + t * dims_p, v,
                   to + t * dims_p, scales + t);
}

/*
 * All scales before the codes: a scale is two divisions and two conversions after the last element,
 * a latency that those of other tokens hide. Codes are formed 4 tokens by 8 dims at a time.
 */
void kvt_avx2_seal_v_i8(const void *open, const uint16_t *open_scales, size_t dims_p,
                        const void *next, void *codes, uint16_t *scales)
{
    const uint16_t *ahead = next ? next : open;
    uint16_t most[KVT_TOKENS];
    float factors[KVT_TOKENS];
    for (size_t t = 0; t < KVT_TOKENS; t += 8)
        kvt_store_128(most + t, kvt_most_of_8_rows((const uint16_t *)open + t * dims_p, dims_p));
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        __m256 scale = kvt_load_f16(open_scales + t);
        __m128i rounded = kvt_scales_of(_mm256_mul_ps(kvt_load_f16(most + t), scale), 127.0f);
        kvt_store_128(scales + t, rounded);
        _mm256_storeu_ps(factors + t, _mm256_mul_ps(scale, kvt_reciprocals_of(rounded, 1.0f)));
    }
    for (size_t t = 0; t < KVT_TOKENS; t += 4) {
        const uint16_t *from = (const uint16_t *)open + t * dims_p;
        uint8_t *to = (uint8_t *)codes + t * dims_p;
        __m256 factor[4];
        KVT_UNROLL
        for (size_t j = 0; j < 4; j++)
            factor[j] = _mm256_broadcast_ss(factors + t + j);
        for (size_t d = 0; d < dims_p; d += 8) {
            __m256 x[4];
            KVT_UNROLL
            for (size_t j = 0; j < 4; j++)
                x[j] = _mm256_mul_ps(kvt_load_f16(from + j * dims_p + d), factor[j]);
            _mm_prefetch((const char *)(ahead + t * dims_p + d * 4), _MM_HINT_T1);
            kvt_store_256(to + d * 4, codes_of(x));
        }
    }
}
