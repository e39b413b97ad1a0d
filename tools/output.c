/*
 * Files that appear whole or not at all, and signals meanwhile.
 *
 * A temporary beside the file gets the contents, is synced, and then takes the name: by link(),
 * which never replaces a file, or with --force by rename(). With --force a symbolic link is
 * followed, as the library's saves do: the file that it leads to is replaced, the link stays.
 * SIGINT, SIGTERM and SIGHUP are noted, for the command to remove its temporary and to end by them;
 * a second one ends it at once.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 /* realpath */
#endif

#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static volatile sig_atomic_t noted;

static void on_signal(int number)
{
    noted = number;
}

void output_note_signals(void)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    static int is_set;
    struct sigaction action, before;
    size_t i;

    if (is_set)
        return;
    is_set = 1;
#ifdef SIGXFSZ
    (void)signal(SIGXFSZ, SIG_IGN); /* a passed limit on the size of files is an error of write() */
#endif
    for (i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        memset(&action, 0, sizeof action);
        (void)sigemptyset(&action.sa_mask);
        action.sa_handler = on_signal;
        action.sa_flags = (int)SA_RESETHAND; /* not SA_RESTART: a blocked write ends */
        if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            (void)sigaction(numbers[i], &action, NULL);
    }
}

int output_interrupted(void)
{
    return noted != 0;
}

void output_end_interrupted(void)
{
    if (noted) {
        progress_stop();
        (void)raise((int)noted); /* its action is the default again */
    }
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static int
fail(tool_output *out, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    (void)vsnprintf(out->text, sizeof out->text, format, arguments);
    va_end(arguments);
    return -1;
}

int output_check(const char *path, int force, char *text, size_t text_bytes)
{
    struct stat found;

    if (force || strcmp(path, "-") == 0 || lstat(path, &found) != 0)
        return 0;
    /* A link is followed: it may lead to a device. */
    if (S_ISLNK(found.st_mode) && stat(path, &found) == 0 && !S_ISREG(found.st_mode) &&
        !S_ISDIR(found.st_mode))
        return 0;
    if (!S_ISREG(found.st_mode) && !S_ISLNK(found.st_mode) && !S_ISDIR(found.st_mode))
        return 0;
    (void)snprintf(text, text_bytes, "%s",
                   S_ISDIR(found.st_mode) ? "is a folder"
                                          : "is there already (--force replaces it)");
    return -1;
}

static size_t folder_bytes(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash - path) + 1 : 0;
}

/* A name in the folder of path, so that it can be renamed to it; from malloc. */
static char *beside(const char *path, const char *name)
{
    size_t folder = folder_bytes(path);
    char *text = malloc(folder + strlen(name) + 1);

    if (text) {
        memcpy(text, path, folder);
        memcpy(text + folder, name, strlen(name) + 1);
    }
    return text;
}

/* As a new file's mode would be, or as that of the file that is replaced. */
static void set_mode(int fd, const char *path)
{
    struct stat found;
    mode_t mask = umask(0);

    (void)umask(mask);
    (void)fchmod(fd, stat(path, &found) == 0 && S_ISREG(found.st_mode)
                         ? found.st_mode & (mode_t)0777
                         : (mode_t)0666 & ~mask);
}

static int init(tool_output *out, const char *path, int force)
{
    memset(out, 0, sizeof *out);
    out->path = path;
    out->force = force;
    if (output_check(path, force, out->text, sizeof out->text) != 0)
        return -1;
    output_note_signals();
    return 0;
}

/* The file that the temporary replaces. */
static int find_target(tool_output *out)
{
    struct stat found;

    if (lstat(out->path, &found) == 0 && S_ISLNK(found.st_mode)) {
        out->target = realpath(out->path, NULL);
        return out->target ? 0 : fail(out, "the link cannot be followed: %s", strerror(errno));
    }
    out->target = beside(out->path, out->path + folder_bytes(out->path));
    return out->target ? 0 : fail(out, "no memory");
}

static void forget(tool_output *out)
{
    free(out->temporary);
    free(out->target);
    out->temporary = out->target = NULL;
}

int output_open(tool_output *out, const char *path, int force)
{
    struct stat found;
    int fd;

    if (init(out, path, force) != 0)
        return -1;
    if (strcmp(path, "-") == 0) {
        out->file = stdout;
        return 0;
    }
    if (stat(path, &found) == 0 && !S_ISREG(found.st_mode)) {
        out->file = fopen(path, "wb");
        return out->file ? 0 : fail(out, "cannot be opened: %s", strerror(errno));
    }
    if (find_target(out) != 0)
        return -1;
    out->temporary = beside(out->target, ".kvtile-XXXXXX");
    fd = out->temporary ? mkstemp(out->temporary) : -1;
    if (fd < 0) {
        (void)fail(out, "cannot be created: %s", strerror(errno));
        forget(out);
        return -1;
    }
    set_mode(fd, out->target);
    out->file = fdopen(fd, "wb");
    if (!out->file) {
        (void)close(fd);
        output_discard(out);
        return fail(out, "no memory");
    }
    return 0;
}

int output_write(tool_output *out, const void *data, size_t bytes)
{
    if (noted || (bytes && fwrite(data, 1, bytes, out->file) != bytes)) {
        int code = errno;
        output_discard(out);
        return noted ? fail(out, "interrupted")
                     : fail(out, "cannot be written: %s", strerror(code));
    }
    return 0;
}

/* The temporary gets the name; without --force no file loses it. */
static int take_name(const tool_output *out)
{
    struct stat found;

    if (!out->force) {
        if (link(out->temporary, out->target) == 0)
            return unlink(out->temporary);
        if (errno == EEXIST)
            return -1;
        /* No hard links here, as on FAT: */
        if (lstat(out->target, &found) == 0) {
            errno = EEXIST;
            return -1;
        }
    }
    return rename(out->temporary, out->target);
}

/* So that the name outlasts a crash. A folder that cannot be read cannot be synced. */
static int sync_folder(const tool_output *out)
{
    char *folder = beside(out->target, ".");
    int fd = folder ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    int failed = fd >= 0 && fsync(fd) != 0 && (errno == EIO || errno == ENOSPC), code = errno;

    if (fd >= 0)
        (void)close(fd);
    free(folder);
    errno = code;
    return failed ? -1 : 0;
}

int output_commit(tool_output *out)
{
    int failed = fflush(out->file) != 0 || ferror(out->file) != 0;
    int code = errno;

    if (out->temporary && !failed) {
        failed = fsync(fileno(out->file)) != 0;
        code = errno;
    }
    if (out->file != stdout && fclose(out->file) != 0 && !failed) {
        failed = 1;
        code = errno;
    }
    out->file = NULL;
    if (!failed && out->temporary && !noted) {
        failed = take_name(out) != 0;
        code = errno;
    }
    if (failed || (noted && out->temporary)) {
        output_discard(out);
        return noted            ? fail(out, "interrupted")
               : code == EEXIST ? fail(out, "has appeared meanwhile (--force replaces it)")
                                : fail(out, "cannot be written: %s", strerror(code));
    }
    failed = out->temporary && sync_folder(out) != 0;
    code = errno;
    forget(out);
    return failed ? fail(out, "its folder cannot be synced: %s", strerror(code)) : 0;
}

void output_discard(tool_output *out)
{
    if (out->file && out->file != stdout)
        (void)fclose(out->file);
    out->file = NULL;
    if (out->temporary)
        (void)unlink(out->temporary);
    forget(out);
}
