/*
 * Running tasks: the caller's parallel-for, else pthreadpool, else a loop. The only file that
 * names pthreadpool.
 */
#include "src/parallel.h"

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

kvt_status kvt_parallel_create(kvt_parallel *parallel, const kvt_cache *cache,
                               const kvt_executor *executor, uint32_t n_threads)
{
    (void)cache;
    parallel->pool = NULL;
    if (executor) {
        parallel->executor = *executor;
        parallel->executor.n_threads = n_threads;
        return KVT_OK;
    }
    parallel->executor = (kvt_executor){NULL, NULL, n_threads};
#ifdef KVT_HAVE_PTHREADPOOL
    if (n_threads > 1) {
        parallel->pool = pthreadpool_create(n_threads);
        if (!parallel->pool)
            return kvt_fail(cache, KVT_ERR_MEMORY, "pthreadpool made no pool of %u threads",
                            n_threads);
        parallel->executor.user = parallel->pool;
        parallel->executor.run = run_on_pool;
    }
#endif
    return KVT_OK;
}

void kvt_parallel_destroy(kvt_parallel *parallel)
{
#ifdef KVT_HAVE_PTHREADPOOL
    if (parallel->pool)
        pthreadpool_destroy((pthreadpool_t)parallel->pool);
#endif
    parallel->pool = NULL;
}

void kvt_parallel_run(kvt_parallel *parallel, void (*task)(void *arg, size_t i), void *arg,
                      size_t n)
{
    if (n > 1 && parallel->executor.run && parallel->executor.n_threads > 1) {
        parallel->executor.run(parallel->executor.user, task, arg, n);
        return;
    }
    for (size_t i = 0; i < n; i++)
        task(arg, i);
}
