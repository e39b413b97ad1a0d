/*
 * Memory: the caller's allocator, counted against the budget, and the free lists of blocks.
 *
 * A block is zeroed when it is new. That costs at most one pass over memory whose pages must be
 * touched anyway, keeps the padding of tiles zero for good, and never shows the heap's old bytes. A
 * recycled block keeps its bytes: everything that reads a block masks by the sequence's length.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS, madvise */
#endif
#include <stdlib.h>

#include "src/cache/cache.h"

#define ALIGNMENT 64

/*
 * Blocks of most models are megabytes, of which attention reads a little of each: huge pages spare
 * it the look-ups of addresses, where the system has them to give. The library's own allocator
 * maps memory from this size on itself: aligned to huge pages, not a page beyond its size, and
 * given back to the system when it is freed. (A malloc asked for such an alignment leaves up to
 * 2 MiB before each block, which a system that is free with huge pages may fill with one.)
 *
 * Not under AddressSanitizer, which knows no bounds and no leaks of mapped memory.
 */
#define HUGE_PAGE ((size_t)2 << 20)

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADDRESS_SANITIZER
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define ADDRESS_SANITIZER
#endif

#if defined(__linux__) && !defined(ADDRESS_SANITIZER)
#include <sys/mman.h>
#include <unistd.h>

static int is_mapped(const kvt_allocator *allocator, size_t bytes)
{
    return !allocator->alloc && bytes >= HUGE_PAGE;
}

static size_t map_bytes(size_t bytes)
{
    return kvt_round_up(bytes, (size_t)sysconf(_SC_PAGESIZE));
}

static void *map(size_t bytes)
{
    size_t before, after;
    unsigned char *memory;
    if (bytes > SIZE_MAX / 2)
        return NULL;
    bytes = map_bytes(bytes);
    memory =
        mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    before = (size_t)(-(uintptr_t)memory % HUGE_PAGE);
    after = HUGE_PAGE - before;
    if (before)
        munmap(memory, before);
    memory += before;
    if (after)
        munmap(memory + bytes, after);
#if defined(MADV_HUGEPAGE)
    (void)madvise(memory, bytes, MADV_HUGEPAGE); /* else plain pages */
#endif
    return memory;
}

static void unmap(void *memory, size_t bytes)
{
    munmap(memory, map_bytes(bytes));
}
#else
static int is_mapped(const kvt_allocator *allocator, size_t bytes)
{
    (void)allocator, (void)bytes;
    return 0;
}

static void *map(size_t bytes)
{
    (void)bytes;
    return NULL;
}

static void unmap(void *memory, size_t bytes)
{
    (void)memory, (void)bytes;
}
#endif

void kvt_mem_raw_free(const kvt_allocator *allocator, void *memory, size_t bytes)
{
    bytes = kvt_round_up(bytes, ALIGNMENT);
    if (allocator->alloc)
        allocator->free(allocator->user, memory, bytes);
    else if (is_mapped(allocator, bytes))
        unmap(memory, bytes);
    else
        free(memory);
}

void *kvt_mem_raw_alloc(const kvt_allocator *allocator, size_t bytes)
{
    void *memory;
    if (bytes > SIZE_MAX - ALIGNMENT)
        return NULL;
    bytes = kvt_round_up(bytes, ALIGNMENT);
    if (is_mapped(allocator, bytes)) /* comes zeroed, as its pages are touched */
        return map(bytes);
    if (allocator->alloc)
        memory = allocator->alloc(allocator->user, bytes, ALIGNMENT);
    else
        memory = aligned_alloc(ALIGNMENT, bytes);
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
