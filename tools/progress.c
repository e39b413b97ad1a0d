/*
 * How far a long command has come, on stderr.
 */
#include "tool.h"

#include <inttypes.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static struct {
    const char *file, *what; /* NULL: none is shown */
    const char *stopped;     /* what progress_stop has stopped, or NULL */
    int lines;               /* --progress: lines, from the beginning on; else one on a terminal */
    int shown;               /* the percentage that stands there, -1: none */
    double began, wrote;     /* seconds */
} now;

static double seconds(void)
{
    struct timespec t;

    if (clock_gettime(CLOCK_MONOTONIC, &t) != 0)
        return 0;
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void show(int percent)
{
    now.shown = percent;
    now.wrote = seconds();
    (void)fputs(now.lines ? "kvtile: " : "\rkvtile: ", stderr);
    tool_print_name(stderr, now.file);
    (void)fprintf(stderr, now.lines ? ": %s %d%%\n" : ": %s %d%%\033[K", now.what, percent);
    (void)fflush(stderr);
}

void progress_begin(const tool_options *o, const char *file, const char *what)
{
    progress_end();
    if (!o->progress && (o->quiet || !isatty(STDERR_FILENO)))
        return;
    now.file = file;
    now.what = what;
    now.stopped = NULL;
    now.lines = o->progress;
    now.shown = -1;
    now.began = now.wrote = seconds();
    if (now.lines)
        show(0);
}

int progress_step(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    if (now.what && total) {
        int percent = (int)(100.0 * (double)(done < total ? done : total) / (double)total);
        double time = seconds();
        if (percent != now.shown && (now.lines || time - now.began >= 1.0) &&
            time - now.wrote >= (now.lines ? 0.5 : 0.1))
            show(percent);
    }
    return output_interrupted();
}

void progress_end(void)
{
    if (now.what && now.lines && now.shown != 100)
        show(100);
    progress_stop();
}

void progress_stop(void)
{
    if (now.what && !now.lines && now.shown >= 0) {
        (void)fputs("\r\033[K", stderr);
        (void)fflush(stderr);
    }
    now.stopped = now.what;
    now.what = NULL;
}

void progress_resume(void)
{
    now.what = now.stopped;
}
