/*
 * AVX2 kernels for a V that is the first dims of K: K's tiles transposed into V's layout, and the
 * offset's part of the weighted sum.
 *
 * A vector of K holds one dim (or four) of many tokens, a vector of V one token (or four) of many
 * dims. PV is written for V's layout, and a transposed block is used by up to 32 rows of queries:
 * each element is copied once and multiplied up to 32 times. So a whole block is transposed into a
 * buffer that stays in L1 or L2, at a few percent of the time of the products that read it (with
 * one row it would cost as much as the product).
 *
 * All loads end inside K's dims: v_dims_p is a multiple of 16, as dims_p is.
 */
#include "avx2.h"

/* 8 tokens by 8 dims at a time. A token's dims lie 4 * v_dims_p bytes from the next token's. */
void kvt_avx2_transpose_f32(const void *codes, size_t dims_p, size_t v_dims_p, void *out)
{
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const float *from = (const float *)codes + kvt_kw_index(t, 0, dims_p);
        float *to = (float *)out + kvt_vw_index(t, 0, v_dims_p);
        for (size_t d = 0; d < v_dims_p; d += 8) {
            __m256i x[8];
            KVT_UNROLL
            for (size_t i = 0; i < 8; i++)
                x[i] = kvt_load_256(from + (d + i) * KVT_TILE_TOKENS);
            kvt_transpose_8x8(x);
            KVT_UNROLL
            for (size_t i = 0; i < 8; i++)
                kvt_store_256(to + i * v_dims_p + d, x[i]);
        }
    }
}

void kvt_avx2_transpose_f16(const void *codes, size_t dims_p, size_t v_dims_p, void *out)
{
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const uint16_t *from = (const uint16_t *)codes + kvt_kw_index(t, 0, dims_p);
        uint16_t *to = (uint16_t *)out + kvt_vw_index(t, 0, v_dims_p);
        for (size_t d = 0; d < v_dims_p; d += 8) {
            __m128i x[8];
            KVT_UNROLL
            for (size_t i = 0; i < 8; i++)
                x[i] = kvt_load_128(from + (d + i) * KVT_TILE_TOKENS);
            kvt_transpose_8x8_16(x);
            KVT_UNROLL
            for (size_t i = 0; i < 8; i++)
                kvt_store_128(to + i * v_dims_p + d, x[i]);
        }
    }
}

/*
 * 16 bytes of K are 4 tokens by 4 dims, 16 bytes of V the same 4 dims by 4 tokens: one byte shuffle
 * transposes them. The adjacent 16 bytes are the next 4 tokens in K but the next 4 dims in V, which
 * a load into the upper half takes from K's next line. 16 dims at a time read four whole lines of K
 * and write one line of each of the tile's four groups of tokens.
 */
void kvt_avx2_transpose_i8(const void *codes, size_t dims_p, size_t v_dims_p, void *out)
{
    const __m256i transpose = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (size_t tile = 0; tile < KVT_TOKENS; tile += KVT_TILE_TOKENS)
        for (size_t d = 0; d < v_dims_p; d += 16) {
            const uint8_t *from = (const uint8_t *)codes + kvt_k8_index(tile, d, dims_p);
            uint8_t *to = (uint8_t *)out + kvt_v8_index(tile, d, v_dims_p);
            KVT_UNROLL
            for (size_t t = 0; t < 4; t++) /* groups of 4 tokens */
                KVT_UNROLL
            for (size_t i = 0; i < 2; i++) { /* 8 dims */
                const uint8_t *k = from + i * 128 + t * 16;
                __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(kvt_load_128(k)),
                                                    kvt_load_128(k + 64), 1);
                kvt_store_256(to + t * 4 * v_dims_p + i * 32, _mm256_shuffle_epi8(x, transpose));
            }
        }
}

/* One FMA an element: bound by the stores to acc, so there is nothing to block for. */
void kvt_avx2_add_scaled(float *acc, size_t ldacc, size_t rows, const float *coefficients,
                         const float *x, size_t n)
{
    for (size_t r = 0; r < rows; r++) {
        const __m256 factor = _mm256_broadcast_ss(coefficients + r);
        float *to = acc + r * ldacc;
        for (size_t i = 0; i < n; i += 16) {
            __m256 low = _mm256_fmadd_ps(factor, _mm256_loadu_ps(x + i), _mm256_loadu_ps(to + i));
            __m256 high =
                _mm256_fmadd_ps(factor, _mm256_loadu_ps(x + i + 8), _mm256_loadu_ps(to + i + 8));
            _mm256_storeu_ps(to + i, low);
            _mm256_storeu_ps(to + i + 8, high);
        }
    }
}
