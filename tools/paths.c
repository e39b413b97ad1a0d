/*
 * Which files the arguments name: inputs that can be read more than once, and outputs that are
 * neither inputs nor each other. Files are compared by device and inode, so that links do not
 * matter; what outputs replace by their folders and names, since it gets an inode of its own.
 */
#include "tool.h"

#include <stdlib.h>
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

static void add_input(tool_inputs *inputs, const struct stat *s)
{
    inputs->files[inputs->n].device = (uint64_t)s->st_dev;
    inputs->files[inputs->n++].inode = (uint64_t)s->st_ino;
}

/* What cannot be read is left to the load, which reports it. */
void inputs_find(tool_inputs *inputs, const tool_options *o, const char *path)
{
    kvt_inspect_options options;
    kvt_snapshot_info info;
    struct stat found;
    char *file = output_beside(path, output_name(path)), *parent;

    inputs->n = 0;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.key = o->key_file ? o->key : NULL;
    while (file && stat(file, &found) == 0) {
        add_input(inputs, &found);
        memset(&info, 0, sizeof info);
        info.struct_size = sizeof info;
        if (inputs->n > KVT_MAX_DEPTH || !S_ISREG(found.st_mode) ||
            kvt_snapshot_inspect_with(file, &options, &info, NULL, 0) != KVT_OK || !info.depth)
            break;
        parent = output_beside(path, info.parent_name);
        free(file);
        file = parent;
    }
    free(file);
}

static int stat_output(const char *path, struct stat *found)
{
    return strcmp(path, "-") == 0 ? fstat(STDOUT_FILENO, found) : stat(path, found);
}

int output_apart(const tool_options *o, const char *path, const tool_inputs *inputs)
{
    struct stat found;
    uint32_t i;

    if (stat_output(path, &found) != 0 || !keeps_bytes(&found))
        return SOUND;
    for (i = 0; inputs && i < inputs->n; i++)
        if (inputs->files[i].device == (uint64_t)found.st_dev &&
            inputs->files[i].inode == (uint64_t)found.st_ino)
            return tool_refuse(o, path, "is %s: the output has to be another file",
                               i ? "a parent of the input" : "the input too");
    if (is_file(&found, o->key_file))
        return tool_refuse(o, path, "is the key file too: the output has to be another file");
    if (is_file(&found, o->new_key_file))
        return tool_refuse(o, path,
                           "is the file of the new key too: the output has to be another file");
    return SOUND;
}

static void note(uint64_t file[2], const struct stat *s)
{
    file[0] = (uint64_t)s->st_dev;
    file[1] = (uint64_t)s->st_ino;
}

void place_find(tool_place *place, const char *path)
{
    struct stat found;
    char *folder;
    int there = stat_output(path, &found) == 0;

    memset(place, 0, sizeof *place);
    place->path = path;
    if (there)
        note(place->file, &found);
    if (strcmp(path, "-") == 0 || (there && !S_ISREG(found.st_mode)))
        return;
    place->target = output_target(path);
    folder = place->target ? output_beside(place->target, ".") : NULL;
    if (folder && stat(folder, &found) == 0)
        note(place->folder, &found);
    free(folder);
}

/* Of names in folders that are not there nothing is known, nor can anything be written. */
int place_is_same(const tool_place *a, const tool_place *b)
{
    const uint64_t *x = a->file, *y = b->file;

    if (a->target && b->target) {
        x = a->folder;
        y = b->folder;
        if (strcmp(output_name(a->target), output_name(b->target)) != 0)
            return 0;
    }
    return (x[0] || x[1]) && x[0] == y[0] && x[1] == y[1];
}

void place_release(tool_place *place)
{
    free(place->target);
    place->target = NULL;
}
