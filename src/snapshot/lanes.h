/*
 * Where tokens and dims lie in the codes of a layer, and checks of its numbers: what its native
 * streams (streams.c) and its image (image.c) have in common.
 */
#ifndef KVT_SNAPSHOT_LANES_H
#define KVT_SNAPSHOT_LANES_H

#include "src/snapshot/format.h"

/* Tokens whose codes lie together. */
static inline size_t kvt_snap_v_lanes(kvt_type type)
{
    return kvt_is_coarse(type) ? 8 : type == KVT_TYPE_I8 ? 4 : 1;
}

/* Bytes of the fifth bits of one head. */
static inline size_t kvt_snap_fifth_bytes(kvt_type type, size_t tokens, size_t dims)
{
    return type == KVT_TYPE_I5 ? kvt_round_up(tokens, 8) / 8 * (kvt_round_up(dims, 16) / 16) * 16
                               : 0;
}

/* Bytes of a tile's K and of a run of V's tokens that lie together, for `dims` dims. */
static inline size_t kvt_snap_k_tile_bytes(kvt_type type, size_t dims)
{
    return dims * KVT_TILE_TOKENS * kvt_type_bits(type) / 8;
}

static inline size_t kvt_snap_v_run_bytes(kvt_type type, size_t dims)
{
    return kvt_is_coarse(type) ? dims * 4 : dims * kvt_snap_v_lanes(type) * kvt_element_bytes(type);
}

/* Words of V's tokens that lie together: the bits of those below `live`, which is not all. */
static inline uint32_t kvt_snap_live_bits(uint32_t bits, size_t live)
{
    uint32_t mask = 0;
    size_t t;
    if (bits == 8)
        return ((uint32_t)1 << 8 * live) - 1;
    for (t = 0; t < live; t++)
        mask |= (uint32_t)15 << (t % 4 * 8 + t / 4 * 4);
    return mask;
}

/*
 * The same for eight bytes of fifth bits, of half a run of 8 tokens and 16 dims: `live` tokens of
 * the run, `dims` dims from this one on.
 */
static inline uint64_t kvt_snap_live_fifths(size_t live, size_t half, size_t dims)
{
    size_t n = live > half * 4 ? live - half * 4 : 0;
    uint64_t mask = ((uint64_t)1 << (n < 4 ? n : 4)) - 1;
    mask *= 0x1111111111111111u;
    return dims < 16 ? mask & (((uint64_t)1 << 4 * dims) - 1) : mask;
}

/*
 * ---- checks of numbers ----
 *
 * 1 when all are sound. They are reductions that a compiler turns into a few vector instructions,
 * SSE2's too: hence the least byte in place of a comparison, and 16 bits with a sign.
 */

static inline int kvt_snap_none_minus_128(const unsigned char *p, size_t bytes)
{
    unsigned char least = 255;
    size_t i;
    for (i = 0; i < bytes; i++) {
        unsigned char x = p[i] ^ 0x80;
        least = x < least ? x : least;
    }
    return least > 0;
}

static inline int kvt_snap_all_finite16(const unsigned char *p, size_t bytes)
{
    int16_t most = 0, x;
    size_t i;
    for (i = 0; i < bytes; i += sizeof x) {
        memcpy(&x, p + i, sizeof x);
        x &= 0x7fff;
        most = x > most ? x : most;
    }
    return most < 0x7c00;
}

/* Adding one to a full exponent carries into the sign. */
static inline int kvt_snap_all_finite32(const unsigned char *p, size_t bytes)
{
    uint32_t any = 0;
    size_t i;
    for (i = 0; i < bytes; i += 4)
        any |= (kvt_get32(p + i) & 0x7f800000u) + 0x00800000u;
    return !(any >> 31);
}

static inline int kvt_snap_none_negative16(const unsigned char *p, size_t bytes)
{
    uint16_t any = 0, x;
    size_t i;
    for (i = 0; i < bytes; i += sizeof x) {
        memcpy(&x, p + i, sizeof x);
        any |= x;
    }
    return !(any >> 15);
}

static inline int kvt_snap_none_negative32(const unsigned char *p, size_t bytes)
{
    uint32_t any = 0;
    size_t i;
    for (i = 0; i < bytes; i += 4)
        any |= kvt_get32(p + i);
    return !(any >> 31);
}

/* 1 when the magnitudes of all f16 are powers of two from 1 to 2^15: scales of an open block. */
static inline int kvt_snap_all_powers16(const unsigned char *p, size_t bytes)
{
    uint32_t bad = 0;
    size_t i;

    for (i = 0; i < bytes; i += 2) {
        uint32_t x = p[i] | (uint32_t)p[i + 1] << 8;
        x &= 0x7fffu;
        bad |= (x & 0x3ffu) | (x - 0x3c00u > 15u * 0x400u);
    }
    return !bad;
}

#endif /* KVT_SNAPSHOT_LANES_H */
