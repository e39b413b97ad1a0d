/*
 * Memory: the caller's allocator, counted against the budget. What is allocated comes zeroed.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS, madvise */
#endif
#include <stdlib.h>

#include "simd/tile.h"
#include "src/memory.h"

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

/*
 * The system has room for so many mappings, 65530 by default, and others of the process need some.
 * (Large memory of malloc is mapped, too, but each next to the last one, as one mapping.)
 */
#define MOST_MAPPINGS 4096u
static uint32_t n_mappings; /* there are, of all caches */

static int is_large(const kvt_allocator *allocator, size_t bytes)
{
    return !allocator->alloc && bytes >= HUGE_PAGE;
}

/* Large memory that is not a mapping of ours does not begin where one does: see from_heap. */
static int is_mapped(const kvt_allocator *allocator, const void *memory, size_t bytes)
{
    return is_large(allocator, bytes) && (uintptr_t)memory % HUGE_PAGE == 0;
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
    if (__atomic_add_fetch(&n_mappings, 1, __ATOMIC_RELAXED) <= MOST_MAPPINGS)
        memory = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      -1, 0);
    else
        memory = MAP_FAILED;
    if (memory == MAP_FAILED) {
        __atomic_sub_fetch(&n_mappings, 1, __ATOMIC_RELAXED);
        return NULL;
    }
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
    __atomic_sub_fetch(&n_mappings, 1, __ATOMIC_RELAXED);
}

/* What is no mapping, for memory that could be one. */
static void *from_heap(size_t bytes)
{
    void *memory = aligned_alloc(ALIGNMENT, bytes), *other = NULL;
    if (memory && (uintptr_t)memory % HUGE_PAGE == 0) {
        other = memory;
        memory = aligned_alloc(ALIGNMENT, bytes);
        if (memory && (uintptr_t)memory % HUGE_PAGE == 0) {
            free(memory);
            memory = NULL;
        }
    }
    free(other);
    return memory;
}
#else
static int is_large(const kvt_allocator *allocator, size_t bytes)
{
    (void)allocator, (void)bytes;
    return 0;
}

static int is_mapped(const kvt_allocator *allocator, const void *memory, size_t bytes)
{
    (void)allocator, (void)memory, (void)bytes;
    return 0;
}

static void *from_heap(size_t bytes)
{
    (void)bytes;
    return NULL;
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
    else if (is_mapped(allocator, memory, bytes))
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
    if (is_large(allocator, bytes)) {
        memory = map(bytes);
        if (memory) /* comes zeroed, as its pages are touched */
            return memory;
        memory = from_heap(bytes);
    } else if (allocator->alloc)
        memory = allocator->alloc(allocator->user, bytes, ALIGNMENT);
    else
        memory = aligned_alloc(ALIGNMENT, bytes);
    if (memory)
        memset(memory, 0, bytes);
    return memory;
}

/* A cache begins with its heap. */
static kvt_heap *heap_of(kvt_cache *cache)
{
    return (kvt_heap *)(void *)cache;
}

/* With the lock held. Exempt memory may be announced before it is allocated. */
static int is_within_budget(const kvt_heap *heap, uint64_t bytes)
{
    return bytes <= heap->exempt_bytes || bytes - heap->exempt_bytes <= heap->budget_bytes;
}

static void uncount(kvt_heap *heap, size_t bytes, int is_working)
{
    uint64_t counted = kvt_round_up(bytes, ALIGNMENT);
    pthread_mutex_lock(&heap->lock);
    heap->bytes -= counted;
    heap->exempt_bytes -= is_working ? counted : 0;
    pthread_mutex_unlock(&heap->lock);
}

static kvt_status allocate(kvt_cache *cache, size_t bytes, int is_working, const char *what,
                           void **memory)
{
    kvt_heap *heap = heap_of(cache);
    const kvt_cache *where = what ? cache : NULL; /* of the text of a failure */
    uint64_t counted, total;
    int fits;

    if (bytes > SIZE_MAX - ALIGNMENT)
        return kvt_fail(where, KVT_ERR_LIMIT, "the size of %s overflows", what);
    counted = kvt_round_up(bytes, ALIGNMENT);

    /* Counted before it is allocated, so that threads cannot pass the budget together. */
    pthread_mutex_lock(&heap->lock);
    fits = !kvt_add_overflows(heap->bytes, counted, &total) &&
           (is_working || is_within_budget(heap, total));
    if (fits) {
        heap->bytes = total;
        heap->exempt_bytes += is_working ? counted : 0;
    }
    pthread_mutex_unlock(&heap->lock);
    if (!fits)
        return kvt_fail(where, KVT_ERR_BUDGET,
                        "%llu bytes for %s would pass the memory budget of %llu",
                        (unsigned long long)counted, what, (unsigned long long)heap->budget_bytes);

    *memory = kvt_mem_raw_alloc(&heap->allocator, bytes);
    if (*memory)
        return KVT_OK;
    uncount(heap, bytes, is_working);
    return kvt_fail(where, KVT_ERR_MEMORY, "the allocator has no %llu bytes for %s",
                    (unsigned long long)counted, what);
}

static void give_back(kvt_cache *cache, void *memory, size_t bytes, int is_working)
{
    if (!memory)
        return;
    kvt_mem_raw_free(&heap_of(cache)->allocator, memory, bytes);
    uncount(heap_of(cache), bytes, is_working);
}

kvt_status kvt_mem_alloc(kvt_cache *cache, size_t bytes, const char *what, void **memory)
{
    return allocate(cache, bytes, 0, what, memory);
}

void kvt_mem_free(kvt_cache *cache, void *memory, size_t bytes)
{
    give_back(cache, memory, bytes, 0);
}

kvt_status kvt_mem_alloc_working(kvt_cache *cache, size_t bytes, const char *what, void **memory)
{
    return allocate(cache, bytes, 1, what, memory);
}

void kvt_mem_free_working(kvt_cache *cache, void *memory, size_t bytes)
{
    give_back(cache, memory, bytes, 1);
}

void kvt_mem_exempt(kvt_cache *cache, uint64_t more, uint64_t less)
{
    kvt_heap *heap = heap_of(cache);
    pthread_mutex_lock(&heap->lock);
    heap->exempt_bytes += more;
    heap->exempt_bytes -= less;
    pthread_mutex_unlock(&heap->lock);
}

int kvt_mem_exempt_less(kvt_cache *cache, uint64_t less)
{
    kvt_heap *heap = heap_of(cache);
    int fits;
    pthread_mutex_lock(&heap->lock);
    heap->exempt_bytes -= less;
    fits = is_within_budget(heap, heap->bytes);
    heap->exempt_bytes += fits ? 0 : less;
    pthread_mutex_unlock(&heap->lock);
    return fits;
}

kvt_status kvt_mem_over_budget(kvt_cache *cache)
{
    return kvt_fail(cache, KVT_ERR_BUDGET, "the memory budget of %llu would be passed",
                    (unsigned long long)heap_of(cache)->budget_bytes);
}

int kvt_mem_fits(kvt_cache *cache)
{
    kvt_heap *heap = heap_of(cache);
    int fits;
    pthread_mutex_lock(&heap->lock);
    fits = is_within_budget(heap, heap->bytes);
    pthread_mutex_unlock(&heap->lock);
    return fits;
}

uint64_t kvt_mem_bytes(const kvt_cache *cache)
{
    kvt_heap *heap = heap_of((kvt_cache *)(uintptr_t)cache);
    uint64_t bytes;
    pthread_mutex_lock(&heap->lock);
    bytes = heap->bytes;
    pthread_mutex_unlock(&heap->lock);
    return bytes;
}
