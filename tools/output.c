/*
 * Files that appear whole or not at all, and signals meanwhile.
 *
 * A temporary beside the file gets the contents, is synced, and then takes the name: by link(),
 * which never replaces a file, or with --force by rename(). With --force a symbolic link is
 * followed, as the library's saves do: the file that it leads to is replaced, the link stays. What
 * is replaced leaves its permissions, group and ACL to the new file.
 *
 * Signals that end a program are noted, for the command to remove its temporary and to end by them.
 * A second one of a kind ends it at once, and leaves the temporary; so do SIGKILL and a fault of
 * the program. Of SIGPIPE there is more than one: who has closed stdout or stderr reads nothing,
 * errors included, so that none is printed then. A signal that is ignored stays so.
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
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/xattr.h>
#endif

#define TEMPORARIES 100 /* names that are tried when others exist */

static volatile sig_atomic_t noted;
static int stdout_failed; /* and that has been reported */

static void on_signal(int number)
{
    if (number != SIGPIPE || !noted)
        noted = number;
}

void output_note_signals(void)
{
    static const int numbers[] = {SIGINT,  SIGTERM, SIGHUP,  SIGQUIT, SIGPIPE,
                                  SIGALRM, SIGUSR1, SIGUSR2, SIGXCPU};
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
        /* not SA_RESTART: a blocked write ends */
        action.sa_flags = numbers[i] == SIGPIPE ? 0 : (int)SA_RESETHAND;
        if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            (void)sigaction(numbers[i], &action, NULL);
    }
}

int output_interrupted(void)
{
    return noted != 0;
}

int output_is_unread(void)
{
    return noted == SIGPIPE;
}

void output_end_interrupted(void)
{
    if (noted) {
        progress_stop();
        (void)signal((int)noted, SIG_DFL);
        (void)raise((int)noted);
    }
}

int output_stdout_failed(void)
{
    return stdout_failed;
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

const char *output_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

char *output_beside(const char *path, const char *name)
{
    size_t folder = (size_t)(output_name(path) - path);
    char *text = malloc(folder + strlen(name) + 1);

    if (text) {
        memcpy(text, path, folder);
        memcpy(text + folder, name, strlen(name) + 1);
    }
    return text;
}

/* Make the temporary beside the target: a descriptor, or -1. */
static int make_temporary(tool_output *out, mode_t mode)
{
    char name[32];
    struct timespec now = {0, 0};
    unsigned long mixed;
    int attempt, fd = -1;

    for (attempt = 0; attempt < TEMPORARIES; attempt++) {
        (void)clock_gettime(CLOCK_REALTIME, &now);
        mixed = (unsigned long)now.tv_sec * 1000003u + (unsigned long)now.tv_nsec +
                (unsigned long)attempt;
        (void)snprintf(name, sizeof name, ".kvtile-%06lx%08lx", (unsigned long)getpid() & 0xffffff,
                       mixed & 0xffffffff);
        free(out->temporary);
        out->temporary = output_beside(out->target, name);
        fd = out->temporary ? open(out->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode)
                            : -1;
        if (fd >= 0 || !out->temporary || errno != EEXIST)
            break;
    }
    return fd;
}

#if defined(__linux__)
/* The temporary has the list of access rights (ACL) of the file that it replaces: 1. */
static int keep_acl(int fd, const char *target)
{
    static const char name[] = "system.posix_acl_access";
    char acl[1024];
    ssize_t n = getxattr(target, name, acl, sizeof acl);

    if (n > 0)
        return fsetxattr(fd, name, acl, (size_t)n, 0) == 0;
    if (n < 0 && errno == ERANGE)
        return 0;
    /* It has none; nor is the new file to have one that the folder gives to new files. */
    return fgetxattr(fd, name, NULL, 0) <= 0 || fremovexattr(fd, name) == 0;
}
#else
static int keep_acl(int fd, const char *target)
{
    (void)fd;
    (void)target;
    return 1;
}
#endif

/*
 * As the library's saves do: group, ACL and permissions of the file that is replaced, before there
 * is anything to read. Where the group or the ACL cannot be kept, the group is another one, and
 * gets no more than everybody has. 0, or -1 with errno.
 */
static int keep_access(int fd, const char *target, const struct stat *old)
{
    mode_t mode = old->st_mode & 0777;
    struct stat made;
    int kept;

    kept = (fstat(fd, &made) == 0 && made.st_gid == old->st_gid) ||
           fchown(fd, (uid_t)-1, old->st_gid) == 0;
    kept = keep_acl(fd, target) && kept;
    if (!kept)
        mode &= ~(mode_t)070 | (mode & 07) << 3;
    if (fchmod(fd, mode) == 0)
        return 0;
    /* Some file systems have one owner and one mode for all files, and let nobody change them. */
    return errno == EPERM && fstat(fd, &made) == 0 && !(made.st_mode & 0777 & ~mode) ? 0 : -1;
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

char *output_target(const char *path)
{
    struct stat found;

    if (lstat(path, &found) == 0 && S_ISLNK(found.st_mode))
        return realpath(path, NULL);
    return output_beside(path, output_name(path));
}

/*
 * Whether the file may not be replaced by this user, in a folder as /tmp: before the work, since
 * the rename is its end.
 */
static int is_of_another(const char *path)
{
    struct stat found, in;
    char *target = output_target(path), *folder = target ? output_beside(target, ".") : NULL;
    int is = geteuid() != 0 && folder && lstat(target, &found) == 0 && S_ISREG(found.st_mode) &&
             stat(folder, &in) == 0 && (in.st_mode & S_ISVTX) && found.st_uid != geteuid() &&
             in.st_uid != geteuid();

    free(folder);
    free(target);
    return is;
}

int output_check(const char *path, int force, char *text, size_t text_bytes)
{
    struct stat found;

    if (strcmp(path, "-") == 0 || lstat(path, &found) != 0)
        return 0;
    if (force && is_of_another(path)) {
        (void)snprintf(text, text_bytes,
                       "is another user's, in a folder where each may replace only his own");
        return -1;
    }
    if (force)
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

static void forget(tool_output *out)
{
    free(out->temporary);
    free(out->target);
    out->temporary = out->target = NULL;
}

int output_open(tool_output *out, const char *path, int force)
{
    struct stat found;
    int fd, replaces;

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
    out->target = output_target(path);
    if (!out->target)
        return fail(out, "the link cannot be followed: %s", strerror(errno));
    replaces = stat(out->target, &found) == 0;
    fd = make_temporary(out, replaces ? found.st_mode & 0700 : 0666);
    if (fd < 0) {
        (void)fail(out, "cannot be created: %s", strerror(errno));
        forget(out);
        return -1;
    }
    if (replaces && keep_access(fd, out->target, &found) != 0)
        (void)fail(out, "its permissions cannot be set: %s", strerror(errno));
    else if ((out->file = fdopen(fd, "wb")) == NULL)
        (void)fail(out, "no memory");
    if (out->file)
        return 0;
    (void)close(fd);
    output_discard(out);
    return -1;
}

int output_write(tool_output *out, const void *data, size_t bytes)
{
    if (noted || (bytes && fwrite(data, 1, bytes, out->file) != bytes)) {
        int code = errno;
        stdout_failed |= out->file == stdout;
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
        if (link(out->temporary, out->target) == 0) {
            (void)unlink(out->temporary); /* the output is there, also where its other name stays */
            return 0;
        }
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

int output_sync_folder(const char *path)
{
    char *folder = output_beside(path, ".");
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
    struct stat found;

    if (!failed &&
        (out->temporary || (fstat(fileno(out->file), &found) == 0 && S_ISBLK(found.st_mode)))) {
        failed = fsync(fileno(out->file)) != 0;
        code = errno;
    }
    if (out->file != stdout && fclose(out->file) != 0 && !failed) {
        failed = 1;
        code = errno;
    }
    stdout_failed |= failed && out->file == stdout;
    out->file = NULL;
    if (!failed && out->temporary) {
        failed = noted || take_name(out) != 0; /* a later signal finds the output in place */
        code = errno;
    }
    if (failed) {
        output_discard(out);
        return noted            ? fail(out, "interrupted")
               : code == EEXIST ? fail(out, "has appeared meanwhile (--force replaces it)")
                                : fail(out, "cannot be written: %s", strerror(code));
    }
    failed = out->temporary && output_sync_folder(out->target) != 0;
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
