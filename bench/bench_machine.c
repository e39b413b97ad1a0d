/*
 * The machine: its name, the size of its last-level cache, memory through an allocator hook, and a
 * team of threads pinned to processors.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* affinity */
#endif
#include "bench.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include "kvt_bench_commit.h" /* made at build time; defines KVT_BENCH_COMMIT */

const char *bench_commit(void)
{
    return KVT_BENCH_COMMIT;
}

const char *bench_compiler(void)
{
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

const char *bench_cpu_name(void)
{
    static char name[80];
    if (name[0])
        return name;
    strcpy(name, "unknown");
    FILE *f = fopen("/proc/cpuinfo", "r");
    if (!f)
        return name;
    char line[512];
    while (fgets(line, sizeof line, f)) {
        char *value = strchr(line, ':');
        if (!value || (strncmp(line, "model name", 10) != 0 && strncmp(line, "CPU part", 8) != 0))
            continue;
        value += 1 + strspn(value + 1, " \t");
        value[strcspn(value, "\n")] = 0;
        snprintf(name, sizeof name, "%s%.60s", line[0] == 'C' ? "ARM part " : "", value);
        break;
    }
    fclose(f);
    return name;
}

/* The first line of a file of the first processor's cache i. */
static bool read_cache_file(int i, const char *name, char *line, int line_bytes)
{
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", i, name);
    FILE *f = fopen(path, "r");
    if (!f)
        return false;
    bool sound = fgets(line, line_bytes, f) != NULL;
    fclose(f);
    return sound;
}

uint64_t bench_cache_bytes(int level)
{
    char text[32];
    for (int i = 0; i < 8 && read_cache_file(i, "level", text, sizeof text); i++) {
        if (atoi(text) != level || !read_cache_file(i, "type", text, sizeof text) ||
            text[0] == 'I') /* Instruction */
            continue;
        if (read_cache_file(i, "size", text, sizeof text))
            return (uint64_t)strtoull(text, NULL, 10) * 1024; /* "32768K" */
    }
    return 0;
}

/*
 * sysfs before sysconf: glibc's sysconf multiplies the size by a processor count that is wrong in
 * virtual machines.
 */
uint64_t bench_llc_bytes(void)
{
    uint64_t largest = 0;
    for (int level = 1; level <= 4; level++)
        if (bench_cache_bytes(level) > largest)
            largest = bench_cache_bytes(level);
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (largest == 0) {
        long n = sysconf(_SC_LEVEL3_CACHE_SIZE);
        if (n > 0)
            largest = (uint64_t)n;
    }
#endif
    return largest ? largest : UINT64_C(32) << 20;
}

bool bench_has_pool(void)
{
#if defined(KVT_BENCH_POOL)
    return true;
#else
    return false;
#endif
}

unsigned bench_processors(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return (unsigned)CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (unsigned)n : 1;
}

uint64_t bench_preemptions(void)
{
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0)
        return 0;
    return (uint64_t)usage.ru_nivcsw;
}

uint64_t bench_available_bytes(void)
{
    FILE *f = fopen("/proc/meminfo", "r");
    if (!f)
        return UINT64_MAX;
    char line[256];
    unsigned long long kib = 0;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            break;
    fclose(f);
    return kib ? (uint64_t)kib * 1024 : UINT64_MAX;
}

/* ---- memory ---- */

static void *heap_alloc(void *user, size_t bytes, size_t alignment)
{
    bench_heap *heap = user;
    void *p;
    if (alignment < sizeof(void *))
        alignment = sizeof(void *);
    /* As the library's default allocator does: huge pages for megabytes, where available. */
    if (bytes >= BENCH_HUGE_PAGE)
        alignment = BENCH_HUGE_PAGE;
    if (posix_memalign(&p, alignment, bytes ? bytes : 1) != 0)
        return NULL;
#if defined(MADV_HUGEPAGE)
    if (bytes >= BENCH_HUGE_PAGE)
        (void)madvise(p, bytes, MADV_HUGEPAGE);
#endif
    heap->n_allocations++;
    size_t i = 0, capacity = sizeof heap->sizes / sizeof heap->sizes[0];
    while (i < heap->n_sizes && heap->sizes[i].bytes != bytes)
        i++;
    if (i < heap->n_sizes) {
        heap->sizes[i].count++;
    } else if (i < capacity) {
        heap->sizes[i].bytes = bytes;
        heap->sizes[i].count = 1;
        heap->n_sizes++;
    }
    return p;
}

static void heap_free(void *user, void *memory, size_t bytes)
{
    (void)user;
    (void)bytes;
    free(memory);
}

/* The lists are not locked: caches are created and filled from one thread. */
kvt_allocator bench_heap_hook(bench_heap *heap)
{
    kvt_allocator a = {heap, heap_alloc, heap_free};
    return a;
}

size_t bench_heap_main_size(const bench_heap *heap)
{
    size_t best = 0, most = 0;
    for (size_t i = 0; i < heap->n_sizes; i++) {
        if (heap->sizes[i].bytes * heap->sizes[i].count > most) {
            most = heap->sizes[i].bytes * heap->sizes[i].count;
            best = heap->sizes[i].bytes;
        }
    }
    return best;
}

/* ---- threads ---- */

/*
 * A job is published by a new generation number. Workers spin on it for a while before they sleep,
 * so that calls in close succession avoid the wake-up latency; with more threads than processors
 * they sleep at once.
 */
struct bench_team {
    unsigned n, n_started;
    bool pinned;
    int spins;
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    atomic_uint generation, running;
    atomic_bool quit;
    void (*job)(void *arg, unsigned worker);
    void *arg;
    void (*task)(void *arg, size_t i); /* of the executor's run */
    void *task_arg;
    size_t n_tasks;
    atomic_size_t next;
    struct bench_worker {
        bench_team *team;
        pthread_t thread;
        unsigned index;
    } * workers;
#if defined(__linux__)
    cpu_set_t before; /* the caller's processors */
#endif
};

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* The worker-th processor that this process may use. */
static bool pin(const bench_team *team, unsigned worker)
{
#if defined(__linux__)
    unsigned seen = 0;
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &team->before) || seen++ != worker)
            continue;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        return pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0;
    }
#else
    (void)team;
    (void)worker;
#endif
    return false;
}

static void *work(void *arg)
{
    struct bench_worker *w = arg;
    bench_team *team = w->team;
    unsigned seen = 0;
    pin(team, w->index);
    for (;;) {
        for (int i = 0; i < team->spins && atomic_load(&team->generation) == seen; i++)
            pause_briefly();
        if (atomic_load(&team->generation) == seen) {
            pthread_mutex_lock(&team->lock);
            while (atomic_load(&team->generation) == seen)
                pthread_cond_wait(&team->start, &team->lock);
            pthread_mutex_unlock(&team->lock);
        }
        seen = atomic_load(&team->generation);
        if (atomic_load(&team->quit))
            return NULL;
        team->job(team->arg, w->index);
        if (atomic_fetch_sub(&team->running, 1) == 1) {
            pthread_mutex_lock(&team->lock);
            pthread_cond_signal(&team->done);
            pthread_mutex_unlock(&team->lock);
        }
    }
}

static void announce(bench_team *team)
{
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->generation, 1);
    pthread_cond_broadcast(&team->start);
    pthread_mutex_unlock(&team->lock);
}

bench_team *bench_team_create(unsigned n_threads)
{
    bench_team *team = bench_alloc(1, sizeof *team);
    team->n = n_threads;
    team->workers = bench_alloc(n_threads, sizeof *team->workers);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->start, NULL);
    pthread_cond_init(&team->done, NULL);
    team->spins = sysconf(_SC_NPROCESSORS_ONLN) >= (long)n_threads ? 20000 : 0;
#if defined(__linux__)
    CPU_ZERO(&team->before);
    if (sched_getaffinity(0, sizeof team->before, &team->before) == 0) {
        if (CPU_COUNT(&team->before) >= (int)n_threads)
            team->pinned = pin(team, 0);
        else
            team->spins = 0;
    }
#endif
    for (unsigned i = 1; i < n_threads; i++) {
        team->workers[i].team = team;
        team->workers[i].index = i;
        if (pthread_create(&team->workers[i].thread, NULL, work, &team->workers[i]) != 0)
            bench_fail(1, "cannot start thread %u", i);
        team->n_started++;
    }
    return team;
}

void bench_team_destroy(bench_team *team)
{
    if (!team)
        return;
    atomic_store(&team->quit, true);
    announce(team);
    for (unsigned i = 1; i <= team->n_started; i++)
        pthread_join(team->workers[i].thread, NULL);
#if defined(__linux__)
    if (team->pinned)
        sched_setaffinity(0, sizeof team->before, &team->before);
#endif
    pthread_cond_destroy(&team->start);
    pthread_cond_destroy(&team->done);
    pthread_mutex_destroy(&team->lock);
    free(team->workers);
    free(team);
}

unsigned bench_team_threads(const bench_team *team)
{
    return team->n;
}

bool bench_team_pinned(const bench_team *team)
{
    return team->pinned;
}

void bench_team_each(bench_team *team, void (*job)(void *arg, unsigned worker), void *arg)
{
    if (team->n == 1) {
        job(arg, 0);
        return;
    }
    team->job = job;
    team->arg = arg;
    atomic_store(&team->running, team->n - 1);
    announce(team);
    job(arg, 0);
    for (int i = 0; i < team->spins && atomic_load(&team->running) > 0; i++)
        pause_briefly();
    if (atomic_load(&team->running) > 0) {
        pthread_mutex_lock(&team->lock);
        while (atomic_load(&team->running) > 0)
            pthread_cond_wait(&team->done, &team->lock);
        pthread_mutex_unlock(&team->lock);
    }
}

static void draw_tasks(void *arg, unsigned worker)
{
    bench_team *team = arg;
    (void)worker;
    for (;;) {
        size_t i = atomic_fetch_add(&team->next, 1);
        if (i >= team->n_tasks)
            return;
        team->task(team->task_arg, i);
    }
}

static void executor_run(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n_tasks)
{
    bench_team *team = user;
    team->task = task;
    team->task_arg = arg;
    team->n_tasks = n_tasks;
    atomic_store(&team->next, 0);
    if (n_tasks == 1)
        task(arg, 0);
    else
        bench_team_each(team, draw_tasks, team);
}

kvt_executor bench_team_executor(bench_team *team)
{
    kvt_executor e = {team, executor_run, team->n};
    return e;
}
