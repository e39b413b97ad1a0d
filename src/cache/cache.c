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

double kvt_cache_bytes_per_token(const kvt_cache *cache)
{
    double bytes = 0;
    if (!cache)
        return 0;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const kvt_group *group = &cache->groups[g];
        const kvt_group_config *config = &group->config;
        const kvt_layout *layout = &group->layouts[KVT_SEALED];
        double head = (double)(config->k_dim * kvt_element_bytes(config->k_type)) +
                      (double)(layout->k_scale_bytes + layout->v_scale_bytes) / KVT_TOKENS;
        if (!group->v_in_k)
            head += (double)(config->v_dim * kvt_element_bytes(config->v_type));
        if (group->offsets)
            head += (double)(config->k_dim * sizeof(uint16_t)) / KVT_TOKENS;
        bytes += head * config->n_kv_heads * config->n_layers;
    }
    return bytes;
}
