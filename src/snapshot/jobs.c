/*
 * Layers of a block that are coded side by side: their buffers, and the threads of the cache.
 *
 * As many layers as there are jobs are in memory at once, whatever the length of a sequence; they
 * are written, or have been read, in the order of the file. So neither the file's bytes nor an
 * error's status depends on the threads, nor what the error of a load says. (What that of a save
 * says may be of another layer of the same block.)
 */
#include "src/snapshot/format.h"

#define JOBS_A_THREAD 2u    /* so that one that is late does not hold up all */
#define JOBS_ROOM 32u       /* of those that take no buffers, where there is more than one */
#define NANOSECONDS_A_KB 80 /* that a thread takes at least: hashing */

size_t kvt_snap_jobs_count(const kvt_cache *cache, uint32_t layers)
{
    uint32_t threads = cache ? cache->parallel.n_threads : 1;
    size_t n = threads > 1 ? (size_t)threads * JOBS_A_THREAD : 1;
    return n < layers ? n : layers ? layers : 1;
}

static uint32_t most_layers(const kvt_snap_header *header)
{
    uint32_t layers = 0, g;

    for (g = 0; g < header->n_groups; g++)
        if (header->groups[g].n_layers > layers)
            layers = header->groups[g].n_layers;
    return layers;
}

size_t kvt_snap_jobs_room(const kvt_snap_header *header, size_t n)
{
    size_t room = n > 1 ? most_layers(header) : 0;

    if (room > JOBS_ROOM)
        room = JOBS_ROOM;
    return room > n ? room : n;
}

kvt_status kvt_snap_jobs_make(kvt_snap_jobs *jobs, const kvt_snap_context *context,
                              const kvt_snap_header *header)
{
    size_t n = kvt_snap_jobs_count(context->cache, most_layers(header)), room, i;
    void *memory;
    kvt_status status;

    memset(jobs, 0, sizeof *jobs);
    jobs->context = context;
    room = kvt_snap_jobs_room(header, n);
    status = kvt_snap_alloc(context, room * sizeof *jobs->jobs, "a snapshot's layers", &memory);
    if (status != KVT_OK)
        return status;
    jobs->jobs = memory;
    jobs->n = n;
    jobs->room = room;
    memset(jobs->jobs, 0, room * sizeof *jobs->jobs);
    for (i = 0; i < room; i++)
        kvt_snap_codec_init(&jobs->jobs[i].codec, context);
    return KVT_OK;
}

void kvt_snap_jobs_release(kvt_snap_jobs *jobs)
{
    size_t i;

    for (i = 0; i < jobs->room; i++) {
        kvt_snap_job *job = &jobs->jobs[i];
        kvt_snap_codec_release(&job->codec);
        kvt_snap_release(jobs->context, &job->section);
        kvt_snap_release(jobs->context, &job->native);
        kvt_snap_release(jobs->context, &job->image);
        kvt_snap_release(jobs->context, &job->scratch);
    }
    if (jobs->jobs)
        kvt_snap_free(jobs->context, jobs->jobs, jobs->room * sizeof *jobs->jobs);
    jobs->jobs = NULL;
    jobs->n = jobs->room = 0;
}

void kvt_snap_jobs_run(kvt_snap_jobs *jobs, void (*task)(void *arg, size_t i), void *arg, size_t n,
                       size_t bytes)
{
    kvt_cache *cache = jobs->context->cache;
    size_t i;

    if (cache && n > 1) {
        uint64_t nanoseconds = (uint64_t)n * bytes / 1024 * NANOSECONDS_A_KB;
        kvt_parallel_run(&cache->parallel, task, arg, n,
                         kvt_parallel_threads(&cache->parallel, nanoseconds));
        return;
    }
    for (i = 0; i < n; i++)
        task(arg, i);
}
