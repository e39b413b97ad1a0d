/*
 * Whether codes of a snapshot are what append could have stored: of a layer's image, which is read
 * at the speed of memory. src/snapshot/lanes.h has the same for every processor.
 *
 * 1 when all are sound: i8 none of -128, f16 and f32 finite. bytes: a multiple of 64.
 */
#ifndef KVT_SOUND_H
#define KVT_SOUND_H

#include <stddef.h>

int kvt_sound_i8_avx2(const unsigned char *codes, size_t bytes);
int kvt_sound_f16_avx2(const unsigned char *codes, size_t bytes);
int kvt_sound_f32_avx2(const unsigned char *codes, size_t bytes);

#endif /* KVT_SOUND_H */
