/*
 * The loop of XXH3 over long inputs, which takes nearly all of a digest's time, with a copy of what
 * it reads: src/snapshot/digest.c has the rest, and says what XXH3 does.
 *
 * A kernel is given the eight accumulators at the beginning of a run of KVT_RUN_STRIPES stripes,
 * and takes n whole stripes from there; after each whole run the accumulators are scrambled.
 * Stripes lie at any address. to: at a multiple of 64 bytes, gets a copy of as many bytes from
 * `copy` on, past the caches where the processor can do that (a fence is the caller's to set); copy
 * is less than a stripe behind from. Or NULL.
 */
#ifndef KVT_STRIPES_H
#define KVT_STRIPES_H

#include <stddef.h>
#include <stdint.h>

#define KVT_STRIPE_BYTES 64
#define KVT_RUN_STRIPES 16
#define KVT_RUN_BYTES (KVT_RUN_STRIPES * KVT_STRIPE_BYTES)
/* Bytes of the secret; stripe i of a run takes 64 from 8 i on, a scramble the last 64. */
#define KVT_SECRET_BYTES 192
#define KVT_SCRAMBLE_PRIME 0x9e3779b1u

/*
 * How far ahead a kernel prefetches: the processor's own prefetch begins anew at each 4 KiB page.
 */
#define KVT_STRIPES_AHEAD 2048

typedef void kvt_stripes(uint64_t *accumulators, const unsigned char *secret,
                         const unsigned char *from, size_t n, const unsigned char *copy,
                         unsigned char *to);

kvt_stripes kvt_stripes_base; /* of every processor that the library is built for */
kvt_stripes kvt_stripes_avx2;

#endif /* KVT_STRIPES_H */
