/*
 * Running tasks: the caller's parallel-for, else threads of the cache's own, else a loop.
 */
#ifndef KVT_PARALLEL_H
#define KVT_PARALLEL_H

#include <pthread.h>
#include <sys/types.h>

#include "src/status.h"

/*
 * Threads that wait for calls: see parallel.c. lock guards what no other comment claims. Calls of
 * several threads do not wait for each other: who finds `busy` taken runs its tasks alone.
 */
typedef struct kvt_pool {
    pthread_mutex_t busy; /* held by the thread whose call the pool runs */
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    pid_t process;      /* that has the threads: the child of a fork has none of them */
    uint32_t forks;     /* before its threads: a child may have the number of its parent */
    uint32_t n_workers; /* threads beside the caller's */
    uint32_t sleepers;  /* workers in wake */
    int kept_off;       /* CPU that workers are kept off, -1: none; guarded by busy */
    int open, stop;     /* tasks can be taken; workers are to end */
    /* The call; written while no thread is inside, next by those that are. */
    void (*task)(void *arg, size_t i);
    void *arg;
    size_t n, next;
    /* Atomic: written under lock, watched by who spins. */
    uint64_t calls;  /* that were opened */
    uint32_t inside; /* workers that work on the call */
    /* Atomic, without a lock: they decide about speed only. */
    uint32_t spinners;   /* workers that watch calls */
    uint32_t in_a_row;   /* calls since one that did not follow the one before it closely */
    uint64_t call_ended; /* nanoseconds */
    pthread_t threads[KVT_MAX_THREADS - 1];
    uint64_t mask[128]; /* CPUs that the creator could use, as sched_getaffinity gives them */
} kvt_pool;

typedef struct kvt_parallel {
    kvt_executor executor; /* run NULL: the pool, or inline; n_threads: the config's */
    uint32_t n_threads;    /* that there are, the caller's among them */
    kvt_pool pool;         /* n_workers 0: there is none */
} kvt_parallel;

/*
 * Set up an executor: the caller's (may be NULL), else a pool for n_threads > 1 where this process
 * may use more than one CPU, of no more threads than CPUs. cache: for the text of a failure.
 * *parallel stays where it is until kvt_parallel_destroy, and is zeroed before.
 */
kvt_status kvt_parallel_create(kvt_parallel *parallel, const kvt_cache *cache,
                               const kvt_executor *executor, uint32_t n_threads);
/* In the child of a fork the threads do not exist and the locks may be held: they are left. */
void kvt_parallel_destroy(kvt_parallel *parallel);
/*
 * How many threads a call is to be cut for that takes one thread about `nanoseconds`: 1 where
 * handing it over costs more than it saves. May differ from call to call.
 */
uint32_t kvt_parallel_threads(kvt_parallel *parallel, uint64_t nanoseconds);
/* task(arg, i) for each i < n; n_threads as kvt_parallel_threads has answered, 1: inline. */
void kvt_parallel_run(kvt_parallel *parallel, void (*task)(void *arg, size_t i), void *arg,
                      size_t n, uint32_t n_threads);
/* Whether n_threads > 1 works without an executor. */
int kvt_parallel_has_pool(void);

#endif /* KVT_PARALLEL_H */
