/*
 * Running tasks: the caller's parallel-for, else a thread pool, else a loop.
 */
#ifndef KVT_PARALLEL_H
#define KVT_PARALLEL_H

#include "src/status.h"

typedef struct kvt_parallel {
    kvt_executor executor; /* run NULL: inline */
    void *pool;            /* the thread pool that executor.user refers to, or NULL */
} kvt_parallel;

/*
 * Set up an executor: the caller's (may be NULL), else a pool for n_threads > 1. cache: for the
 * text of a failure.
 */
kvt_status kvt_parallel_create(kvt_parallel *parallel, const kvt_cache *cache,
                               const kvt_executor *executor, uint32_t n_threads);
void kvt_parallel_destroy(kvt_parallel *parallel);
/* task(arg, i) for each i < n, on the executor or inline. */
void kvt_parallel_run(kvt_parallel *parallel, void (*task)(void *arg, size_t i), void *arg,
                      size_t n);
/* Whether n_threads > 1 works without an executor. */
int kvt_parallel_has_pool(void);

#endif /* KVT_PARALLEL_H */
