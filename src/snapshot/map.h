/*
 * Blocks of a sequence that lie in a mapped file.
 */
#ifndef KVT_SNAPSHOT_MAP_H
#define KVT_SNAPSHOT_MAP_H

#include "src/snapshot/format.h"

/* The mappings that one load makes: one a file of the chain. */
typedef struct kvt_snap_maps {
    kvt_mapping *mappings[KVT_MAX_DEPTH + 1];
    size_t n;
    int lazy; /* blocks are verified at first use */
} kvt_snap_maps;

/*
 * The block of a file whose images and digests are there, as a block of the cache with one
 * reference. The mapping takes the file's memory over.
 */
kvt_status kvt_snap_map_block(kvt_snap_maps *maps, kvt_cache *cache, kvt_snap_mapped *file,
                              uint64_t n_blocks, uint32_t group, uint32_t form, uint32_t tokens,
                              const unsigned char *images, const unsigned char *digests,
                              kvt_block **block);
/* Of blocks that are still in use, each once. */
uint64_t kvt_snap_maps_bytes(const kvt_snap_maps *maps);
/* The load is over: what no block lies in goes. */
void kvt_snap_maps_release(kvt_snap_maps *maps);

#endif /* KVT_SNAPSHOT_MAP_H */
