/*
 * Which files the arguments name: inputs that can be read more than once, and outputs that are no
 * inputs. Files are compared by device and inode, so that links do not matter.
 */
#include "tool.h"

#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What is lost when an output is written to it; a terminal or a pipe may be both. */
static int keeps_bytes(const struct stat *s)
{
    return S_ISREG(s->st_mode) || S_ISBLK(s->st_mode);
}

static int is_file(const struct stat *output, const char *path)
{
    struct stat found;

    return path && stat(path, &found) == 0 && found.st_dev == output->st_dev &&
           found.st_ino == output->st_ino;
}

int input_check(const tool_options *o, const char *path)
{
    struct stat found;

    if (stat(path, &found) == 0 && !S_ISREG(found.st_mode) && !S_ISDIR(found.st_mode))
        return tool_fail(o, path, KVT_ERR_IO, "not a regular file: it is read more than once");
    return SOUND; /* or missing, which the library reports */
}

int output_apart(const tool_options *o, const char *path, const char *input)
{
    struct stat found;
    int failed = strcmp(path, "-") == 0 ? fstat(STDOUT_FILENO, &found) : stat(path, &found);

    if (failed != 0 || !keeps_bytes(&found))
        return SOUND;
    if (is_file(&found, input))
        return tool_refuse(o, path, "is the input too: the output has to be another file");
    if (is_file(&found, o->key_file))
        return tool_refuse(o, path, "is the key file too: the output has to be another file");
    if (is_file(&found, o->new_key_file))
        return tool_refuse(o, path,
                           "is the file of the new key too: the output has to be another file");
    return SOUND;
}
