/*
 * Memory: the caller's allocator, counted against the budget, and the free lists of blocks.
 *
 * A block is zeroed when it is new. That costs one pass over memory whose pages must be touched
 * anyway, keeps the padding of tiles zero for good, and never shows the heap's old bytes. A
 * recycled block keeps its bytes: everything that reads a block masks by the sequence's length.
 */
#include <stdlib.h>

#include "internal.h"

#define ALIGNMENT 64

static void *raw_alloc(const kvt_allocator *allocator, size_t bytes)
{
    if (allocator->alloc)
        return allocator->alloc(allocator->user, bytes, ALIGNMENT);
    return aligned_alloc(ALIGNMENT, bytes);
}

void kvt_mem_raw_free(const kvt_allocator *allocator, void *memory, size_t bytes)
{
    if (allocator->alloc)
        allocator->free(allocator->user, memory, kvt_round_up(bytes, ALIGNMENT));
    else
        free(memory);
}

void *kvt_mem_raw_alloc(const kvt_allocator *allocator, size_t bytes)
{
    void *memory;
    if (bytes > SIZE_MAX - ALIGNMENT)
        return NULL;
    bytes = kvt_round_up(bytes, ALIGNMENT);
    memory = raw_alloc(allocator, bytes);
    if (memory)
        memset(memory, 0, bytes);
    return memory;
}

kvt_status kvt_mem_alloc(kvt_cache *cache, size_t bytes, const char *what, void **memory)
{
    uint64_t counted, total;
    int fits;

    if (bytes > SIZE_MAX - ALIGNMENT)
        return kvt_fail(cache, KVT_ERR_LIMIT, "the size of %s overflows", what);
    counted = kvt_round_up(bytes, ALIGNMENT);

    /* Counted before it is allocated, so that threads cannot pass the budget together. */
    pthread_mutex_lock(&cache->lock);
    fits = !kvt_add_overflows(cache->memory_bytes, counted, &total) &&
           total <= cache->memory_budget_bytes;
    if (fits)
        cache->memory_bytes = total;
    pthread_mutex_unlock(&cache->lock);
    if (!fits)
        return kvt_fail(
            cache, KVT_ERR_BUDGET, "%llu bytes for %s would pass the memory budget of %llu",
            (unsigned long long)counted, what, (unsigned long long)cache->memory_budget_bytes);

    *memory = kvt_mem_raw_alloc(&cache->allocator, bytes);
    if (*memory)
        return KVT_OK;
    pthread_mutex_lock(&cache->lock);
    cache->memory_bytes -= counted;
    pthread_mutex_unlock(&cache->lock);
    return kvt_fail(cache, KVT_ERR_MEMORY, "the allocator has no %llu bytes for %s",
                    (unsigned long long)counted, what);
}

void kvt_mem_free(kvt_cache *cache, void *memory, size_t bytes)
{
    if (!memory)
        return;
    kvt_mem_raw_free(&cache->allocator, memory, bytes);
    pthread_mutex_lock(&cache->lock);
    cache->memory_bytes -= kvt_round_up(bytes, ALIGNMENT);
    pthread_mutex_unlock(&cache->lock);
}

kvt_status kvt_block_get(kvt_cache *cache, uint32_t class_index, kvt_block **block)
{
    kvt_block *found;
    void *memory;
    kvt_status status;

    pthread_mutex_lock(&cache->lock);
    found = cache->free_blocks[class_index];
    if (found) {
        cache->free_blocks[class_index] = found->next;
        cache->n_free_blocks[class_index]--;
    }
    pthread_mutex_unlock(&cache->lock);
    if (!found) {
        status = kvt_mem_alloc(cache, sizeof *found + cache->class_bytes[class_index],
                               "a block of 64 tokens", &memory);
        if (status != KVT_OK)
            return status;
        found = memory;
        found->data = (unsigned char *)memory + sizeof *found;
        found->is_new = 1;
    }
    found->next = NULL;
    *block = found;
    return KVT_OK;
}

void kvt_block_put(kvt_cache *cache, uint32_t class_index, kvt_block *block)
{
    pthread_mutex_lock(&cache->lock);
    block->is_new = 0;
    block->next = cache->free_blocks[class_index];
    cache->free_blocks[class_index] = block;
    cache->n_free_blocks[class_index]++;
    pthread_mutex_unlock(&cache->lock);
}

void kvt_block_undo(kvt_cache *cache, uint32_t class_index, kvt_block *block)
{
    if (block->is_new)
        kvt_mem_free(cache, block, sizeof *block + cache->class_bytes[class_index]);
    else
        kvt_block_put(cache, class_index, block);
}

void kvt_blocks_trim(kvt_cache *cache)
{
    for (uint32_t c = 0; c < cache->n_classes; c++) {
        kvt_block *block;
        pthread_mutex_lock(&cache->lock);
        block = cache->free_blocks[c];
        cache->free_blocks[c] = NULL;
        cache->n_free_blocks[c] = 0;
        pthread_mutex_unlock(&cache->lock);
        while (block) {
            kvt_block *next = block->next;
            kvt_mem_free(cache, block, sizeof *block + cache->class_bytes[c]);
            block = next;
        }
    }
}

kvt_status kvt_cache_trim(kvt_cache *cache)
{
    if (!cache)
        return KVT_ERR_ARG;
    kvt_blocks_trim(cache);
    return KVT_OK;
}
