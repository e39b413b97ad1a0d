/*
 * Running tasks: the caller's parallel-for, else pthreadpool, else a loop. The only file that
 * names pthreadpool.
 */
#include "src/cache/cache.h"

#ifdef KVT_HAVE_PTHREADPOOL
#include <pthreadpool.h>

/* pthreadpool serializes calls from several threads by itself. */
static void run_on_pool(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n_tasks)
{
    pthreadpool_parallelize_1d((pthreadpool_t)user, task, arg, n_tasks, 0);
}
#endif

int kvt_parallel_has_pool(void)
{
#ifdef KVT_HAVE_PTHREADPOOL
    return 1;
#else
    return 0;
#endif
}

kvt_status kvt_parallel_create(kvt_cache *cache, const kvt_executor *executor, uint32_t n_threads)
{
    if (executor) {
        cache->executor = *executor;
        cache->executor.n_threads = n_threads;
        return KVT_OK;
    }
    cache->executor = (kvt_executor){NULL, NULL, n_threads};
#ifdef KVT_HAVE_PTHREADPOOL
    if (n_threads > 1) {
        cache->pool = pthreadpool_create(n_threads);
        if (!cache->pool)
            return kvt_fail(cache, KVT_ERR_MEMORY, "pthreadpool made no pool of %u threads",
                            n_threads);
        cache->executor.user = cache->pool;
        cache->executor.run = run_on_pool;
    }
#endif
    return KVT_OK;
}

void kvt_parallel_destroy(kvt_cache *cache)
{
#ifdef KVT_HAVE_PTHREADPOOL
    if (cache->pool)
        pthreadpool_destroy((pthreadpool_t)cache->pool);
#endif
    cache->pool = NULL;
}

void kvt_parallel_run(kvt_cache *cache, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    if (n > 1 && cache->executor.run && cache->executor.n_threads > 1) {
        cache->executor.run(cache->executor.user, task, arg, n);
        return;
    }
    for (size_t i = 0; i < n; i++)
        task(arg, i);
}
