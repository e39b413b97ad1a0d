/*
 * AVX2: whether codes are sound. See simd/sound.h.
 *
 * The least code, and the largest magnitude as an integer: one comparison at the end.
 */
#include "avx2.h"
#include "simd/sound.h"

int kvt_sound_i8_avx2(const unsigned char *codes, size_t bytes)
{
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t i = 0; i < bytes; i += 64) {
        a = _mm256_min_epi8(a, kvt_load_256(codes + i));
        b = _mm256_min_epi8(b, kvt_load_256(codes + i + 32));
    }
    a = _mm256_cmpeq_epi8(_mm256_min_epi8(a, b), _mm256_set1_epi8(-128));
    return _mm256_testz_si256(a, a);
}

int kvt_sound_f16_avx2(const unsigned char *codes, size_t bytes)
{
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t i = 0; i < bytes; i += 64) {
        a = _mm256_max_epi16(a, _mm256_and_si256(magnitude, kvt_load_256(codes + i)));
        b = _mm256_max_epi16(b, _mm256_and_si256(magnitude, kvt_load_256(codes + i + 32)));
    }
    a = _mm256_cmpgt_epi16(_mm256_max_epi16(a, b), _mm256_set1_epi16(0x7bff));
    return _mm256_testz_si256(a, a);
}

int kvt_sound_f32_avx2(const unsigned char *codes, size_t bytes)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t i = 0; i < bytes; i += 64) {
        a = _mm256_max_epi32(a, _mm256_and_si256(magnitude, kvt_load_256(codes + i)));
        b = _mm256_max_epi32(b, _mm256_and_si256(magnitude, kvt_load_256(codes + i + 32)));
    }
    a = _mm256_cmpgt_epi32(_mm256_max_epi32(a, b), _mm256_set1_epi32(0x7f7fffff));
    return _mm256_testz_si256(a, a);
}
