/*
 * Running tasks: the caller's parallel-for, else the cache's own threads, else a loop.
 *
 * Tasks are taken one by one from a counter, by the caller too. When none is left the caller closes
 * the call and waits for the workers that are inside, not for those that have not come: a
 * worker whose CPU is busy with something else costs a call nothing unless it has a task in hand.
 *
 * A sleeping worker takes tens of microseconds to come. So short calls run inline, unless workers
 * are awake; and a worker stays awake (spins) after a call, for a bounded time and only
 * while calls follow each other closely. There are no more threads than CPUs that this process may
 * use: threads that share a CPU win nothing. Schedulers that wake a thread on the CPU of the one
 * that wakes it, or that fill one CPU before the next, would make them share it all the same: a
 * worker may run on every CPU that its creator could but the one where the caller is.
 *
 * (pthreadpool offers neither: its workers spin for 1,000,000 pauses, some 20 ms, or not at all,
 * every call waits for every worker to have come, and its threads are not fewer than asked for.)
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* pthread_setaffinity_np, sched_getcpu */
#endif
#include "src/parallel.h"

#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "src/cpu_count.h"

int kvt_parallel_has_pool(void)
{
#ifdef KVT_HAVE_POOL
    return 1;
#else
    return 0;
#endif
}

#ifdef KVT_HAVE_POOL

#if defined(__linux__) && !defined(__ANDROID__) /* which has it from API 36 on */
#define HAS_AFFINITY
#endif

/* One thread's time from which waking threads pays. */
#define COLD_NANOSECONDS 150000u
/* And from which it does where they are awake, or where IN_A_ROW calls have followed closely. */
#define HOT_NANOSECONDS 8000u
#define IN_A_ROW 8
/* How long a worker, or the caller at the end, spins before it sleeps; a gap that is close. */
#define SPIN_NANOSECONDS 50000u

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void pause_shortly(void)
{
    for (int i = 0; i < 16; i++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb");
#endif
    }
}

static void take_tasks(kvt_pool *pool)
{
    size_t i;
    while ((i = __atomic_fetch_add(&pool->next, 1, __ATOMIC_RELAXED)) < pool->n)
        pool->task(pool->arg, i);
}

/* ---- workers ---- */

static void spin_for_call(kvt_pool *pool, uint64_t seen)
{
    uint64_t end = now() + SPIN_NANOSECONDS;
    __atomic_add_fetch(&pool->spinners, 1, __ATOMIC_RELAXED);
    while (__atomic_load_n(&pool->calls, __ATOMIC_RELAXED) == seen && now() < end)
        pause_shortly();
    __atomic_sub_fetch(&pool->spinners, 1, __ATOMIC_RELAXED);
}

/*
 * How often this process, and those that it was forked from, have become another: a child has its
 * parent's number where it is the first one of a namespace of its own, or where that has ended.
 */
static uint32_t n_forks;

static void count_fork(void)
{
    __atomic_fetch_add(&n_forks, 1, __ATOMIC_RELAXED);
}

static void watch_forks(void)
{
    (void)pthread_atfork(NULL, NULL, count_fork); /* without memory for it the number has to do */
}

static int has_its_threads(const kvt_pool *pool)
{
    return pool->n_workers > 0 && pool->process == getpid() &&
           pool->forks == __atomic_load_n(&n_forks, __ATOMIC_RELAXED);
}

static void *worker(void *user)
{
    kvt_pool *pool = user;
    uint64_t seen = 0;
    int may_spin = 0;

    pthread_mutex_lock(&pool->lock);
    while (!pool->stop) {
        if (pool->open && seen != pool->calls) {
            seen = pool->calls;
            __atomic_store_n(&pool->inside, pool->inside + 1, __ATOMIC_RELAXED);
            pthread_mutex_unlock(&pool->lock);
            take_tasks(pool);
            pthread_mutex_lock(&pool->lock);
            __atomic_store_n(&pool->inside, pool->inside - 1, __ATOMIC_RELEASE);
            if (pool->inside == 0)
                pthread_cond_signal(&pool->done);
            may_spin = __atomic_load_n(&pool->in_a_row, __ATOMIC_RELAXED) > 0;
        } else if (may_spin) {
            may_spin = 0;
            seen = pool->calls;
            pthread_mutex_unlock(&pool->lock);
            spin_for_call(pool, seen);
            pthread_mutex_lock(&pool->lock);
        } else {
            pool->sleepers++;
            pthread_cond_wait(&pool->wake, &pool->lock);
            pool->sleepers--;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void stop_workers(kvt_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stop = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->n_workers; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->busy);
    pool->n_workers = 0;
}

/* A thread with room for what tasks take (kvtile.h): musl gives 128 KiB if it is not asked. */
#define STACK_BYTES ((size_t)1 << 20)

static int create_worker(pthread_t *thread, kvt_pool *pool)
{
    pthread_attr_t attributes;
    size_t bytes = 0;
    int fault = pthread_attr_init(&attributes);
    if (fault)
        return fault;
    fault = pthread_attr_getstacksize(&attributes, &bytes);
    if (!fault && bytes < STACK_BYTES)
        fault = pthread_attr_setstacksize(&attributes, STACK_BYTES);
    if (!fault)
        fault = pthread_create(thread, &attributes, worker, pool);
    pthread_attr_destroy(&attributes);
    return fault;
}

static kvt_status start_workers(kvt_pool *pool, const kvt_cache *cache, uint32_t n)
{
    /* Of what a thread does itself: blocked, they end the process whatever handler there is. */
    static const int own[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};
    static pthread_once_t watched = PTHREAD_ONCE_INIT;
    sigset_t others, before;
    int fault = 0;

    (void)pthread_once(&watched, watch_forks);
    pthread_mutex_init(&pool->busy, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->process = getpid();
    pool->forks = __atomic_load_n(&n_forks, __ATOMIC_RELAXED);
    pool->kept_off = -1;
#ifdef HAS_AFFINITY
    _Static_assert(sizeof pool->mask == KVT_CPU_SETS * sizeof(cpu_set_t), "of one mask");
    if (sched_getaffinity(0, sizeof pool->mask, (cpu_set_t *)(void *)pool->mask) != 0)
        memset(pool->mask, 0, sizeof pool->mask); /* then workers stay as they are */
#endif
    sigfillset(&others); /* signals of the process are for threads of the caller */
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        sigdelset(&others, own[i]);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    for (uint32_t i = 0; i < n && !fault; i++) {
        fault = create_worker(&pool->threads[i], pool);
        if (!fault)
            pool->n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!fault)
        return KVT_OK;
    stop_workers(pool);
    return kvt_fail(cache, KVT_ERR_MEMORY, "the system made no pool of %u threads", n + 1);
}

/* ---- the caller ---- */

/* Before workers are woken: keep them off the CPU of this thread. */
static void keep_off(kvt_pool *pool)
{
#ifdef HAS_AFFINITY
    int cpu = sched_getcpu();
    cpu_set_t set[KVT_CPU_SETS];
    if (cpu < 0 || cpu == pool->kept_off)
        return;
    memcpy(set, pool->mask, sizeof set);
    CPU_CLR_S((size_t)cpu, sizeof set, set);
    if (CPU_COUNT_S(sizeof set, set) == 0)
        return;
    for (uint32_t i = 0; i < pool->n_workers; i++)
        pthread_setaffinity_np(pool->threads[i], sizeof set, set);
    pool->kept_off = cpu;
#else
    (void)pool;
#endif
}

/* Wait for the workers inside; lock is held. */
static void wait_for_workers(kvt_pool *pool)
{
    uint64_t end;
    if (pool->inside == 0)
        return;
    pthread_mutex_unlock(&pool->lock);
    end = now() + SPIN_NANOSECONDS;
    while (__atomic_load_n(&pool->inside, __ATOMIC_ACQUIRE) > 0 && now() < end)
        pause_shortly();
    pthread_mutex_lock(&pool->lock);
    while (pool->inside > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
}

static void run_on_pool(kvt_pool *pool, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    size_t wake;

    if (__atomic_load_n(&pool->spinners, __ATOMIC_RELAXED) == 0)
        keep_off(pool);
    pthread_mutex_lock(&pool->lock);
    pool->task = task;
    pool->arg = arg;
    pool->n = n;
    __atomic_store_n(&pool->next, 0, __ATOMIC_RELAXED);
    pool->open = 1;
    __atomic_store_n(&pool->calls, pool->calls + 1, __ATOMIC_RELAXED);
    wake = pool->sleepers < n - 1 ? pool->sleepers : n - 1;
    pthread_mutex_unlock(&pool->lock);
    for (size_t i = 0; i < wake; i++)
        pthread_cond_signal(&pool->wake);
    take_tasks(pool);
    pthread_mutex_lock(&pool->lock);
    pool->open = 0;
    wait_for_workers(pool);
    pthread_mutex_unlock(&pool->lock);
}

#endif /* KVT_HAVE_POOL */

uint32_t kvt_parallel_threads(kvt_parallel *parallel, uint64_t nanoseconds)
{
    if (parallel->executor.run)
        return parallel->executor.n_threads;
#ifdef KVT_HAVE_POOL
    kvt_pool *pool = &parallel->pool;
    uint32_t in_a_row;
    if (!has_its_threads(pool))
        return 1;
    in_a_row = __atomic_load_n(&pool->in_a_row, __ATOMIC_RELAXED);
    if (now() - __atomic_load_n(&pool->call_ended, __ATOMIC_RELAXED) > SPIN_NANOSECONDS)
        in_a_row = 0;
    else if (in_a_row < IN_A_ROW)
        in_a_row++;
    __atomic_store_n(&pool->in_a_row, in_a_row, __ATOMIC_RELAXED);
    if (nanoseconds >= COLD_NANOSECONDS)
        return pool->n_workers + 1;
    if (nanoseconds >= HOT_NANOSECONDS &&
        (in_a_row >= IN_A_ROW || __atomic_load_n(&pool->spinners, __ATOMIC_RELAXED) > 0))
        return pool->n_workers + 1;
#else
    (void)nanoseconds;
#endif
    return 1;
}

void kvt_parallel_run(kvt_parallel *parallel, void (*task)(void *arg, size_t i), void *arg,
                      size_t n, uint32_t n_threads)
{
    if (n > 1 && n_threads > 1 && parallel->executor.run) {
        parallel->executor.run(parallel->executor.user, task, arg, n);
        return;
    }
#ifdef KVT_HAVE_POOL
    kvt_pool *pool = &parallel->pool;
    if (n > 1 && n_threads > 1 && pthread_mutex_trylock(&pool->busy) == 0) {
        run_on_pool(pool, task, arg, n);
        pthread_mutex_unlock(&pool->busy);
        n = 0;
    }
#endif
    for (size_t i = 0; i < n; i++)
        task(arg, i);
#ifdef KVT_HAVE_POOL
    if (pool->n_workers > 0)
        __atomic_store_n(&pool->call_ended, now(), __ATOMIC_RELAXED);
#endif
}

kvt_status kvt_parallel_create(kvt_parallel *parallel, const kvt_cache *cache,
                               const kvt_executor *executor, uint32_t n_threads)
{
    parallel->executor = executor ? *executor : (kvt_executor){NULL, NULL, 0};
    parallel->executor.n_threads = n_threads;
    parallel->n_threads = executor ? n_threads : 1;
#ifdef KVT_HAVE_POOL
    if (!executor && n_threads > 1) {
        uint32_t usable = kvt_usable_cpus();
        n_threads = n_threads < usable ? n_threads : usable;
        if (n_threads > 1) {
            parallel->n_threads = n_threads;
            return start_workers(&parallel->pool, cache, n_threads - 1);
        }
    }
#else
    (void)cache;
#endif
    return KVT_OK;
}

void kvt_parallel_destroy(kvt_parallel *parallel)
{
#ifdef KVT_HAVE_POOL
    if (has_its_threads(&parallel->pool))
        stop_workers(&parallel->pool);
#else
    (void)parallel;
#endif
}
