/*
 * Checksums of snapshots: XXH64 for damage, XXH3-128 for the identity of a block.
 *
 * Source: xxHash, https://github.com/Cyan4973/xxHash; both are specified there. The streaming
 * state lives in the caller's memory, so that nothing here allocates: that needs the complete
 * type, which xxhash.h shows to static users only. Of what is long the digest is made by digest.c.
 */
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "src/snapshot/format.h"

_Static_assert(sizeof(XXH64_state_t) <= sizeof((kvt_snap_summer *)0)->state, "too small");
_Static_assert(sizeof(XXH3_state_t) <= sizeof(kvt_snap_digester), "kvt_snap_digester is too small");
_Static_assert(sizeof(XXH128_canonical_t) == KVT_SNAP_ID_BYTES, "a digest has 16 bytes");

uint64_t kvt_snap_sum(const void *data, size_t bytes)
{
    return XXH64(data, bytes, 0);
}

static void sum_init(uint64_t *memory)
{
    XXH64_state_t state;
    memset(&state, 0, sizeof state);
    (void)XXH64_reset(&state, 0);
    memcpy(memory, &state, sizeof state);
}

void kvt_snap_summer_init(kvt_snap_summer *summer)
{
    sum_init(summer->state);
    kvt_snap_digester_init(&summer->digester);
}

void kvt_snap_summer_add(kvt_snap_summer *summer, const void *data, size_t bytes)
{
    XXH64_state_t state;
    if (!bytes)
        return;
    memcpy(&state, summer->state, sizeof state);
    (void)XXH64_update(&state, data, bytes);
    memcpy(summer->state, &state, sizeof state);
    kvt_snap_digester_add(&summer->digester, data, bytes);
}

uint64_t kvt_snap_summer_sum(const kvt_snap_summer *summer)
{
    XXH64_state_t state;
    memcpy(&state, summer->state, sizeof state);
    return XXH64_digest(&state);
}

void kvt_snap_summer_digest(const kvt_snap_summer *summer, unsigned char *digest)
{
    kvt_snap_digester_end(&summer->digester, digest);
}

static void put_digest(XXH128_hash_t hash, unsigned char *digest)
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, hash);
    memcpy(digest, &canonical, sizeof canonical);
}

void kvt_snap_digest_short(const void *data, size_t bytes, unsigned char *digest)
{
    put_digest(XXH3_128bits(data, bytes), digest);
}

void kvt_snap_digester_init(kvt_snap_digester *digester)
{
    XXH3_state_t state;
    memset(&state, 0, sizeof state);
    (void)XXH3_128bits_reset(&state);
    memcpy(digester->state, &state, sizeof state);
}

void kvt_snap_digester_add(kvt_snap_digester *digester, const void *data, size_t bytes)
{
    XXH3_state_t state; /* at a multiple of 64 bytes */
    memcpy(&state, digester->state, sizeof state);
    (void)XXH3_128bits_update(&state, data, bytes);
    memcpy(digester->state, &state, sizeof state);
}

void kvt_snap_digester_end(const kvt_snap_digester *digester, unsigned char *digest)
{
    XXH3_state_t state;
    memcpy(&state, digester->state, sizeof state);
    put_digest(XXH3_128bits_digest(&state), digest);
}
