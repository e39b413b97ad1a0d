/*
 * The AMX instructions that amx.c uses: macros over the intrinsics, because tile numbers have to be
 * literals.
 *
 * gcc 12's intrinsics declare that ldtilecfg reads 8 bytes (a pointer's size, not 64), and that
 * tileloadd reads no memory, so the compiler may delay or drop stores to these operands.
 * KVT_TILE_WRITTEN is a compiler barrier before the read; it emits no instruction.
 */
#ifndef KVT_AMX_TILE_H
#define KVT_AMX_TILE_H

#include <immintrin.h>
#include <stdint.h>

/* What ldtilecfg reads. Palette 1: 8 tiles of up to 16 rows of 64 bytes. */
typedef struct kvt_tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} kvt_tile_config;

_Static_assert(sizeof(kvt_tile_config) == 64, "ldtilecfg reads 64 bytes");

#define KVT_TILE_WRITTEN(at) __asm__ volatile("" : : "r"(at) : "memory")

#define KVT_TILE_CONFIGURE(config)                                                                 \
    do {                                                                                           \
        KVT_TILE_WRITTEN(config);                                                                  \
        _tile_loadconfig(config);                                                                  \
    } while (0)
#define KVT_TILE_RELEASE() _tile_release()
#define KVT_TILE_ZERO(tile) _tile_zero(tile)
/* Rows `stride` bytes apart. */
#define KVT_TILE_LOAD(tile, from, stride)                                                          \
    do {                                                                                           \
        KVT_TILE_WRITTEN(from);                                                                    \
        _tile_loadd(tile, from, stride);                                                           \
    } while (0)
#define KVT_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
/* sum[m][n] += a[m][4k .. 4k + 3] . b[k][4n .. 4n + 3] in int32; b signed, a signed or not. */
#define KVT_TILE_DOT_SIGNED(sum, a, b) _tile_dpbssd(sum, a, b)
#define KVT_TILE_DOT_UNSIGNED(sum, a, b) _tile_dpbusd(sum, a, b)

#endif /* KVT_AMX_TILE_H */
