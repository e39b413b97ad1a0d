/*
 * Checksums of snapshots: XXH64 for damage, XXH3-128 for the identity of a block.
 *
 * Source: xxHash, https://github.com/Cyan4973/xxHash; both are specified there. The streaming
 * state lives in the caller's memory, so that nothing here allocates: that needs the complete
 * type, which xxhash.h shows to static users only.
 */
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "src/snapshot/format.h"

_Static_assert(sizeof(XXH64_state_t) <= sizeof ((kvt_snap_summer *)0)->state, "too small");
_Static_assert(sizeof(XXH3_state_t) <= sizeof ((kvt_snap_summer *)0)->digest_state, "too small");
_Static_assert(sizeof(XXH128_canonical_t) == KVT_SNAP_ID_BYTES, "a digest has 16 bytes");

uint64_t kvt_snap_sum(const void *data, size_t bytes)
{
    return XXH64(data, bytes, 0);
}

/* The states are aligned as they have to be: a summer is, and so is its first member. */
static XXH3_state_t *digest_state(const kvt_snap_summer *summer)
{
    return (XXH3_state_t *)(uintptr_t)summer->digest_state;
}

void kvt_snap_summer_init(kvt_snap_summer *summer)
{
    XXH64_state_t state;
    memset(&state, 0, sizeof state);
    (void)XXH64_reset(&state, 0);
    memcpy(summer->state, &state, sizeof state);
    memset(summer->digest_state, 0, sizeof summer->digest_state);
    (void)XXH3_128bits_reset(digest_state(summer));
}

void kvt_snap_summer_add(kvt_snap_summer *summer, const void *data, size_t bytes)
{
    XXH64_state_t state;
    if (!bytes)
        return;
    memcpy(&state, summer->state, sizeof state);
    (void)XXH64_update(&state, data, bytes);
    memcpy(summer->state, &state, sizeof state);
    (void)XXH3_128bits_update(digest_state(summer), data, bytes);
}

uint64_t kvt_snap_summer_sum(const kvt_snap_summer *summer)
{
    XXH64_state_t state;
    memcpy(&state, summer->state, sizeof state);
    return XXH64_digest(&state);
}

void kvt_snap_summer_digest(const kvt_snap_summer *summer, unsigned char *digest)
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(digest_state(summer)));
    memcpy(digest, &canonical, sizeof canonical);
}

void kvt_snap_digest(const void *data, size_t bytes, unsigned char *digest)
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, bytes));
    memcpy(digest, &canonical, sizeof canonical);
}
