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

/* ---- checks of numbers: eight bytes at a time ---- */

#define LANES8(x) ((uint64_t)(x)*0x0101010101010101u)
#define LANES16(x) ((uint64_t)(x)*0x0001000100010001u)
#define LANES32(x) ((uint64_t)(x)*0x0000000100000001u)

/* Non-zero when a byte is 0x80. Exact: an addition that carries out of a lane marks its own. */
static inline uint64_t has_minus_128(uint64_t x)
{
    x ^= LANES8(0x80);
    return ~(((x & LANES8(0x7f)) + LANES8(0x7f)) | x) & LANES8(0x80);
}

/* Non-zero when an f16 is infinite or NaN: adding one to a full exponent carries. */
static inline uint64_t has_infinite16(uint64_t x)
{
    return ((x & LANES16(0x7c00)) + LANES16(0x0400)) & LANES16(0x8000);
}

static inline uint64_t has_infinite32(uint64_t x)
{
    return ((x & LANES32(0x7f800000)) + LANES32(0x00800000)) & LANES32(0x80000000);
}

static inline uint64_t has_negative16(uint64_t x)
{
    return x & LANES16(0x8000);
}

static inline uint64_t has_negative32(uint64_t x)
{
    return x & LANES32(0x80000000);
}

/*
 * A function that answers 1 when fault(eight bytes) is 0 all over; the last, shorter piece is
 * filled up with zeros. Made by a macro, since a pointer to fault would be called for each piece.
 */
#define ALL_SOUND(name, fault)                                                                     \
    static inline int name(const unsigned char *p, size_t bytes)                                   \
    {                                                                                              \
        uint64_t any = 0, x;                                                                       \
        size_t i;                                                                                  \
                                                                                                   \
        for (i = 0; i + 8 <= bytes; i += 8) {                                                      \
            memcpy(&x, p + i, 8);                                                                  \
            any |= fault(x);                                                                       \
        }                                                                                          \
        if (i < bytes) {                                                                           \
            x = 0;                                                                                 \
            memcpy(&x, p + i, bytes - i);                                                          \
            any |= fault(x);                                                                       \
        }                                                                                          \
        return any == 0;                                                                           \
    }

ALL_SOUND(kvt_snap_none_minus_128, has_minus_128)
ALL_SOUND(kvt_snap_all_finite16, has_infinite16)
ALL_SOUND(kvt_snap_all_finite32, has_infinite32)
ALL_SOUND(kvt_snap_none_negative16, has_negative16)
ALL_SOUND(kvt_snap_none_negative32, has_negative32)

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
