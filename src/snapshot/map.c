/*
 * Blocks of a sequence that lie in a mapped file: src/cache/mapping.c has the blocks, this file has
 * what they are verified by.
 *
 * A layer that is met for the first time is held against its digest in the file, which was verified
 * when the file was opened, and its values are checked as those of any file: what the cache then
 * trusts is the same as after a load into memory. The file stays mapped until the last block that
 * lies in it is gone.
 */
#include "src/snapshot/map.h"

/* What is known of a block. */
typedef struct origin {
    const unsigned char *digests; /* of its layers, in the file */
    uint32_t tokens;
} origin;

typedef struct mapped_file {
    kvt_snap_mapped mapped;
    uint64_t n_blocks, used;
    origin origins[]; /* [n_blocks] */
} mapped_file;

static size_t file_bytes(uint64_t n_blocks)
{
    return sizeof(mapped_file) + (size_t)n_blocks * sizeof(origin);
}

static kvt_status verify(kvt_mapping *mapping, const kvt_block *block, uint32_t layer_index)
{
    const mapped_file *file = mapping->user;
    const origin *from = &file->origins[kvt_mapping_index(mapping, block)];
    const kvt_group *group = kvt_group_of_block(mapping->cache, block);
    const unsigned char *image = kvt_head_record(group, block, layer_index, 0);
    unsigned char digest[KVT_SNAP_ID_BYTES];
    const char *fault = NULL;

    kvt_snap_digest(image, group->layouts[block->form].layer_bytes, digest);
    if (memcmp(digest, from->digests + layer_index * (size_t)KVT_SNAP_ID_BYTES, sizeof digest) != 0)
        fault = "its bytes do not make its digest";
    else
        fault = kvt_snap_image_check(group, block->form, from->tokens, image);
    if (!fault)
        return KVT_OK;
    return kvt_fail(mapping->cache, KVT_ERR_CORRUPT,
                    "mapped snapshot damaged at offset %llu, layer %u of a block: %s",
                    (unsigned long long)(image - file->mapped.memory), (unsigned)layer_index,
                    fault);
}

static void close_file(kvt_mapping *mapping)
{
    mapped_file *file = mapping->user;
    kvt_snap_unmap(&file->mapped);
    kvt_mem_free_working(mapping->cache, file, file_bytes(file->n_blocks));
}

/* The mapping takes the file over. */
static kvt_status add_file(kvt_snap_maps *maps, kvt_cache *cache, kvt_snap_mapped *mapped,
                           uint64_t n_blocks)
{
    kvt_mapping *mapping;
    mapped_file *file;
    void *memory;
    kvt_status status;

    if (n_blocks > SIZE_MAX / sizeof(origin) / 2)
        return kvt_fail(cache, KVT_ERR_LIMIT, "a mapped snapshot has too many blocks");
    status = kvt_mem_alloc_working(cache, file_bytes(n_blocks), "a mapped snapshot", &memory);
    if (status != KVT_OK)
        return status;
    status = kvt_mapping_create(cache, (size_t)n_blocks, &mapping);
    if (status != KVT_OK) {
        kvt_mem_free_working(cache, memory, file_bytes(n_blocks));
        return status;
    }
    file = memory;
    file->mapped = *mapped;
    file->n_blocks = n_blocks;
    file->used = 0;
    mapping->user = file;
    mapping->verify = verify;
    mapping->close = close_file;
    mapped->owner = mapping;
    maps->mappings[maps->n++] = mapping;
    return KVT_OK;
}

kvt_status kvt_snap_map_block(kvt_snap_maps *maps, kvt_cache *cache, kvt_snap_mapped *file,
                              uint64_t n_blocks, uint32_t group, uint32_t form, uint32_t tokens,
                              const unsigned char *images, const unsigned char *digests,
                              kvt_block **block)
{
    uint32_t class_index = kvt_class_of(cache, group, form);
    kvt_mapping *mapping;
    mapped_file *of;
    kvt_status status;

    if (!file->owner) {
        status = add_file(maps, cache, file, n_blocks);
        if (status != KVT_OK)
            return status;
    }
    mapping = file->owner;
    of = mapping->user;
    if (of->used == of->n_blocks) /* not reached: n_blocks counts all that come */
        return kvt_fail(cache, KVT_ERR_CORRUPT, "a mapped snapshot has more blocks than it says");
    of->origins[of->used].digests = digests;
    of->origins[of->used].tokens = tokens;
    *block = kvt_mapping_block(mapping, (size_t)of->used, class_index, images, !maps->lazy);
    of->used++;
    return KVT_OK;
}

uint64_t kvt_snap_maps_bytes(const kvt_snap_maps *maps)
{
    uint64_t bytes = 0;
    size_t i;
    for (i = 0; i < maps->n; i++)
        bytes += kvt_mapping_used_bytes(maps->mappings[i]);
    return bytes;
}

void kvt_snap_maps_release(kvt_snap_maps *maps)
{
    while (maps->n)
        kvt_mapping_put(maps->mappings[--maps->n]);
}
