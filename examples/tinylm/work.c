/*
 * A parallel-for over a fixed set of threads.
 *
 * A run is published by a new generation number; every thread, the caller too, then takes task
 * numbers from one counter under the lock until none is left, and the last to finish wakes the
 * caller. Tasks here are slices of matrix products and of attention, some tens of microseconds
 * each, so the cost of one lock per task is negligible. It may be called from several threads at
 * once, as kvt_executor asks for: while one has the threads, another runs its tasks itself.
 */
#include "tinylm.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct tl_work {
    pthread_mutex_t busy; /* a run has all threads; another caller meanwhile its own alone */
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    uint64_t generation;
    void (*task)(void *arg, size_t i);
    void *arg;
    size_t next, n, running;
    bool quit;
    unsigned n_threads; /* the caller's included */
    unsigned n_started;
    pthread_t threads[];
};

int tl_fail(tl_error *err, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
    }
    return -1;
}

/* Take tasks until none is left. The lock is held on entry and on return. */
static void drain(tl_work *w)
{
    w->running++;
    while (w->next < w->n) {
        size_t i = w->next++;
        pthread_mutex_unlock(&w->lock);
        w->task(w->arg, i);
        pthread_mutex_lock(&w->lock);
    }
    if (--w->running == 0)
        pthread_cond_signal(&w->done);
}

static void *thread_main(void *arg)
{
    tl_work *w = arg;
    uint64_t seen = 0;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (w->generation == seen && !w->quit)
            pthread_cond_wait(&w->start, &w->lock);
        if (w->quit)
            break;
        seen = w->generation;
        drain(w);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

tl_work *tl_work_create(unsigned n_threads)
{
    if (n_threads == 0)
        n_threads = 1;
    tl_work *w = calloc(1, sizeof *w + (n_threads - 1) * sizeof w->threads[0]);
    if (!w)
        return NULL;
    w->n_threads = n_threads;
    pthread_mutex_init(&w->busy, NULL);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->start, NULL);
    pthread_cond_init(&w->done, NULL);
    while (w->n_started < n_threads - 1) {
        if (pthread_create(&w->threads[w->n_started], NULL, thread_main, w)) {
            tl_work_destroy(w);
            return NULL;
        }
        w->n_started++;
    }
    return w;
}

void tl_work_destroy(tl_work *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->quit = true;
    pthread_cond_broadcast(&w->start);
    pthread_mutex_unlock(&w->lock);
    for (unsigned i = 0; i < w->n_started; i++)
        pthread_join(w->threads[i], NULL);
    pthread_cond_destroy(&w->done);
    pthread_cond_destroy(&w->start);
    pthread_mutex_destroy(&w->lock);
    pthread_mutex_destroy(&w->busy);
    free(w);
}

unsigned tl_work_threads(const tl_work *w)
{
    return w->n_threads;
}

void tl_work_run(tl_work *w, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    if (w->n_threads == 1 || n < 2 || pthread_mutex_trylock(&w->busy) != 0) {
        for (size_t i = 0; i < n; i++)
            task(arg, i);
        return;
    }
    pthread_mutex_lock(&w->lock);
    w->task = task;
    w->arg = arg;
    w->next = 0;
    w->n = n;
    w->generation++;
    pthread_cond_broadcast(&w->start);
    drain(w);
    while (w->running > 0)
        pthread_cond_wait(&w->done, &w->lock);
    pthread_mutex_unlock(&w->lock);
    pthread_mutex_unlock(&w->busy);
}
