/*
 * The cache's handle: release, and questions about it.
 */
#include "src/cache/cache.h"

/* Give back everything but the cache itself, then the cache. */
void kvt_cache_free(kvt_cache *cache)
{
    kvt_allocator allocator = cache->heap.allocator;
    kvt_parallel_destroy(&cache->parallel);
    kvt_blocks_trim(cache);
    kvt_mem_free(cache, cache->scratch, cache->scratch_bytes);
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const kvt_group *group = &cache->groups[g];
        float *signs = group->rotation_k.signs ? group->rotation_k.signs : group->rotation_v.signs;
        kvt_mem_free(cache, signs, kvt_group_signs_bytes(group));
        kvt_mem_free(cache, group->rope_frequencies, kvt_group_rope_bytes(group));
    }
    kvt_mem_free(cache, cache->layers, cache->n_layers * sizeof *cache->layers);
    pthread_mutex_destroy(&cache->scratch_lock);
    pthread_mutex_destroy(&cache->lock);
    pthread_mutex_destroy(&cache->heap.lock);
    pthread_mutex_destroy(&cache->heap.report.lock);
    kvt_mem_raw_free(&allocator, cache, sizeof *cache);
}

void kvt_cache_release(kvt_cache *cache)
{
    uint64_t left;
    pthread_mutex_lock(&cache->lock);
    left = --cache->references;
    pthread_mutex_unlock(&cache->lock);
    if (left == 0)
        kvt_cache_free(cache);
}

void kvt_cache_destroy(kvt_cache *cache)
{
    if (cache)
        kvt_cache_release(cache);
}

/* ---- questions ---- */

const char *kvt_cache_isa(const kvt_cache *cache)
{
    return cache ? cache->kernels.isa : NULL;
}

uint64_t kvt_cache_memory_bytes(const kvt_cache *cache)
{
    return cache ? kvt_mem_bytes(cache) : 0;
}

kvt_status kvt_cache_get_stats(const kvt_cache *cache_in, kvt_cache_stats *stats)
{
    kvt_cache *cache = (kvt_cache *)(uintptr_t)cache_in; /* its lock alone is changed */
    kvt_cache_stats found;
    if (!cache)
        return KVT_ERR_ARG;
    if (!stats || stats->struct_size != sizeof found)
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_cache_get_stats: stats is NULL, or struct_size is not this version's");
    memset(&found, 0, sizeof found);
    found.struct_size = sizeof found;
    pthread_mutex_lock(&cache->lock);
    for (uint32_t c = 0; c < cache->n_classes; c++) {
        uint64_t bytes = kvt_block_bytes(cache, c);
        uint64_t spare = __atomic_load_n(&cache->n_spare_blocks[c], __ATOMIC_RELAXED);
        uint64_t used = cache->n_used_blocks[c] - spare;
        found.bytes_free += cache->n_free_blocks[c] * bytes;
        found.bytes_reserved += spare * bytes;
        found.bytes_used += used * bytes;
        found.bytes_shared += cache->n_shared_blocks[c] * bytes;
        if (c == cache->n_groups) /* positions and token ids */
            continue;
        found.blocks_free += cache->n_free_blocks[c];
        found.blocks_reserved += spare;
        found.blocks_used += used;
        found.blocks_shared += cache->n_shared_blocks[c];
        if (c < cache->n_groups ? cache->groups[c].seals != 0
                                : (c - 1) / cache->n_groups == KVT_FINE)
            found.blocks_sealed += used;
    }
    pthread_mutex_unlock(&cache->lock);
    found.bytes = kvt_mem_bytes(cache);
    *stats = found;
    return KVT_OK;
}

double kvt_cache_bytes_per_token(const kvt_cache *cache)
{
    double bytes = 0;
    if (!cache)
        return 0;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const kvt_group *group = &cache->groups[g];
        const kvt_group_config *config = &group->config;
        const kvt_layout *layout = &group->layouts[KVT_SEALED];
        size_t k_scale_bytes = config->k_type == KVT_TYPE_I4
                                   ? config->k_dim * sizeof(uint16_t) + KVT_TOKENS
                                   : layout->k_scale_bytes;
        double head = (double)(config->k_dim * kvt_type_bits(config->k_type)) / 8 +
                      (double)(k_scale_bytes + layout->v_scale_bytes) / KVT_TOKENS;
        if (!group->v_in_k)
            head += (double)(config->v_dim * kvt_type_bits(config->v_type)) / 8;
        if (group->offsets)
            head += (double)(config->k_dim * sizeof(uint16_t)) / KVT_TOKENS;
        bytes += head * config->n_kv_heads * config->n_layers;
    }
    return bytes;
}
