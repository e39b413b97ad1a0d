/*
 * Output files, and signals meanwhile, as kvtile's (tools/output.c): a temporary beside the file
 * takes its name at the end. Measurements do not look at signals; what lies between them does.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 /* realpath */
#endif
#include "bench_files.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEMPORARIES = 100, OPEN = 4, AT_END = 16 };

/* ---- the end ---- */

static void (*at_end[AT_END])(void);
static size_t n_at_end;
static volatile sig_atomic_t noted;

static void on_signal(int number)
{
    if (number != SIGPIPE || !noted)
        noted = number;
}

static void clean_up(void)
{
    for (size_t i = n_at_end; i-- > 0;)
        at_end[i]();
}

static void note_signals(void)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGXCPU};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        struct sigaction action, before;
        memset(&action, 0, sizeof action);
        sigemptyset(&action.sa_mask);
        action.sa_handler = on_signal;
        /* not SA_RESTART: what waits for another process ends */
        action.sa_flags = numbers[i] == SIGPIPE ? 0 : (int)SA_RESETHAND;
        if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(numbers[i], &action, NULL);
    }
}

void bench_at_end(void (*clean)(void))
{
    for (size_t i = 0; i < n_at_end; i++)
        if (at_end[i] == clean)
            return;
    if (n_at_end == AT_END)
        bench_fail(1, "more than %d things to clean up", AT_END);
    if (n_at_end == 0) {
        atexit(clean_up);
        note_signals();
    }
    at_end[n_at_end++] = clean;
}

bool bench_interrupted(void)
{
    return noted != 0;
}

void bench_end_interrupted(void)
{
    int number = (int)noted;
    if (!number)
        return;
    clean_up();
    signal(number, SIG_DFL);
    raise(number);
}

/* ---- files ---- */

static char *temporaries[OPEN]; /* to be removed */

static void remove_temporaries(void)
{
    for (size_t i = 0; i < OPEN; i++) {
        if (temporaries[i])
            unlink(temporaries[i]);
        temporaries[i] = NULL;
    }
}

bool bench_file_is(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* What is replaced: the name, or what a link of that name leads to; NULL with errno. */
static char *target_of(const char *path)
{
    struct stat found;
    if (lstat(path, &found) == 0 && S_ISLNK(found.st_mode))
        return realpath(path, NULL);
    char *copy = bench_alloc(strlen(path) + 1, 1);
    strcpy(copy, path);
    return copy;
}

/* A new file beside the target: a descriptor, or -1 with errno. */
static int make_temporary(const char *target, mode_t mode, char **name)
{
    size_t room = strlen(target) + 16;
    int fd = -1;
    *name = bench_alloc(room, 1);
    for (int i = 1; i <= TEMPORARIES; i++) {
        if (i == 1)
            snprintf(*name, room, "%s.part", target);
        else
            snprintf(*name, room, "%s.part-%d", target, i);
        fd = open(*name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
        if (fd >= 0 || errno != EEXIST)
            break;
    }
    return fd;
}

/* Group and permissions of what is replaced; where the group is another one, it gets no more than
   everybody has. 0, or -1 with errno. */
static int keep_access(int fd, const struct stat *old)
{
    mode_t mode = old->st_mode & 0777;
    struct stat made;
    if ((fstat(fd, &made) != 0 || made.st_gid != old->st_gid) &&
        fchown(fd, (uid_t)-1, old->st_gid) != 0)
        mode &= ~(mode_t)070 | (mode & 07) << 3;
    if (fchmod(fd, mode) == 0)
        return 0;
    return errno == EPERM && fstat(fd, &made) == 0 && !(made.st_mode & 0777 & ~mode) ? 0 : -1;
}

void bench_file_check(const char *flag, const char *path, const char *const *inputs,
                      size_t n_inputs)
{
    struct stat found;
    bool there = stat(path, &found) == 0;
    for (size_t i = 0; i < n_inputs; i++)
        if (inputs[i] && there && bench_file_is(path, inputs[i]))
            bench_fail(2, "%s: %s is the input %s too: the output has to be another file", flag,
                       path, inputs[i]);
    if (there && S_ISDIR(found.st_mode))
        bench_fail(2, "%s: %s is a folder", flag, path);
    if (there && access(path, W_OK) != 0)
        bench_fail(2, "%s: %s: %s", flag, path, strerror(errno));
    if (there && !S_ISREG(found.st_mode))
        return;
    char *target = target_of(path), *name = NULL;
    int fd = target ? make_temporary(target, 0600, &name) : -1, error = errno;
    if (fd >= 0) {
        close(fd);
        unlink(name);
    }
    free(name);
    free(target);
    if (fd < 0)
        bench_fail(2, "%s: %s: %s", flag, path, strerror(error));
}

void bench_file_create(bench_file *f, const char *path)
{
    struct stat found;
    memset(f, 0, sizeof *f);
    f->path = path;
    if (stat(path, &found) == 0 && !S_ISREG(found.st_mode)) {
        f->file = fopen(path, "wb");
        if (!f->file)
            bench_fail(1, "%s: %s", path, strerror(errno));
        return;
    }
    f->target = target_of(path);
    bool replaces = f->target && stat(f->target, &found) == 0;
    int fd = f->target
                 ? make_temporary(f->target, replaces ? found.st_mode & 0700 : 0666, &f->temporary)
                 : -1;
    if (fd < 0)
        bench_fail(1, "%s: %s", path, strerror(errno));
    size_t i = 0;
    while (i < OPEN && temporaries[i])
        i++;
    if (i < OPEN)
        temporaries[i] = f->temporary;
    bench_at_end(remove_temporaries);
    if (i == OPEN || (replaces && keep_access(fd, &found) != 0) || !(f->file = fdopen(fd, "wb")))
        bench_fail(1, "%s: %s", path, strerror(errno));
}

static void forget(bench_file *f)
{
    for (size_t i = 0; i < OPEN; i++)
        if (f->temporary && temporaries[i] == f->temporary)
            temporaries[i] = NULL;
}

void bench_file_commit(bench_file *f)
{
    errno = 0;
    bool failed = fflush(f->file) != 0 || ferror(f->file) != 0;
    failed = failed || (f->temporary && fsync(fileno(f->file)) != 0);
    failed = fclose(f->file) != 0 || failed;
    bench_end_interrupted();
    failed = failed || (f->temporary && rename(f->temporary, f->target) != 0);
    if (failed)
        bench_fail(1, "%s: cannot be written: %s", f->path, strerror(errno));
    forget(f);
    free(f->temporary);
    free(f->target);
    memset(f, 0, sizeof *f);
}

const char *bench_file_keep(bench_file *f)
{
    fclose(f->file);
    forget(f);
    return f->temporary ? f->temporary : f->path;
}
