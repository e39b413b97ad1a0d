/*
 * Memory of a cache: the caller's allocator, counted against the budget.
 */
#ifndef KVT_MEMORY_H
#define KVT_MEMORY_H

#include "src/status.h"

/* The first member of struct kvt_cache, so that a cache is known here by its heap alone. */
typedef struct kvt_heap {
    kvt_report report;
    pthread_mutex_t lock; /* guards bytes and exempt_bytes */
    kvt_allocator allocator;
    uint64_t bytes;        /* allocated now */
    uint64_t exempt_bytes; /* of bytes: not held against the budget */
    uint64_t budget_bytes; /* UINT64_MAX: none */
} kvt_heap;

/*
 * Memory of the cache's allocator at a multiple of 64, zeroed. KVT_ERR_MEMORY or
 * KVT_ERR_BUDGET with the text set ("what" names the purpose; NULL: no text), else *memory is set.
 */
kvt_status kvt_mem_alloc(kvt_cache *cache, size_t bytes, const char *what, void **memory);
/* Give it back, with the same size; NULL is fine. */
void kvt_mem_free(kvt_cache *cache, void *memory, size_t bytes);

/*
 * The same for what one call (save, load, visit) holds only while it runs: counted in
 * kvt_mem_bytes, but not against the budget, neither by this call nor by others meanwhile. So a
 * sequence can be saved when the budget is used up. Never KVT_ERR_BUDGET.
 */
kvt_status kvt_mem_alloc_working(kvt_cache *cache, size_t bytes, const char *what, void **memory);
void kvt_mem_free_working(kvt_cache *cache, void *memory, size_t bytes);

/* The same without a cache: neither counted nor bounded. NULL: out of memory. */
void *kvt_mem_raw_alloc(const kvt_allocator *allocator, size_t bytes);
void kvt_mem_raw_free(const kvt_allocator *allocator, void *memory, size_t bytes);

/*
 * `more` bytes more, and `less` bytes less, of what is allocated are not held against the budget:
 * memory that is kept for a short time beside what takes its place.
 */
void kvt_mem_exempt(kvt_cache *cache, uint64_t more, uint64_t less);
/* `less` bytes less where it all fits then, at once for other threads; 0: nothing has changed. */
int kvt_mem_exempt_less(kvt_cache *cache, uint64_t less);

/* Whether no more is held than the budget admits. */
int kvt_mem_fits(kvt_cache *cache);
/* KVT_ERR_BUDGET, with the text set. */
kvt_status kvt_mem_over_budget(kvt_cache *cache);

/* Bytes allocated now. */
uint64_t kvt_mem_bytes(const kvt_cache *cache);

#endif /* KVT_MEMORY_H */
