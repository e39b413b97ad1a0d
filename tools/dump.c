/*
 * kvtile dump: the tokens of a snapshot as text or JSON; its tokens, keys and values as arrays in
 * files. Keys and values are read from a loaded sequence, a megabyte at a time.
 */
#include "tool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PART_BYTES 1048576u /* of an array that are read at a time */
#define PART_TOKENS 16384u  /* of ids and positions */

enum { IDS, POSITIONS, KEY_POSITIONS, N_INTS, ROWS = N_INTS };

/* An array to write: of ints, or one side of a layer. */
typedef struct item {
    tool_array array;
    int kind; /* IDS .. KEY_POSITIONS, ROWS */
    uint32_t layer;
    kvt_side side;
} item;

typedef struct dump {
    const tool_options *o;
    tool_source s;
    uint64_t first, n; /* tokens */
    int moved;         /* keys were computed for other positions */
    item *items;       /* [n_items] */
    size_t n_items;
    tool_inputs inputs;
    void *part;           /* memory of a part of an array */
    uint64_t done, total; /* bytes of all outputs */
} dump;

static kvt_status ints(const dump *d, int kind, uint64_t first, uint64_t n, int32_t *to)
{
    return kind == IDS         ? kvt_seq_token_ids(d->s.seq, first, n, to)
           : kind == POSITIONS ? kvt_seq_positions(d->s.seq, first, n, to)
                               : kvt_seq_key_positions(d->s.seq, first, n, to);
}

static int fail_read(const dump *d, kvt_status status)
{
    char text[TOOL_TEXT] = "";

    (void)kvt_cache_error(d->s.cache, text, sizeof text);
    return tool_fail(d->o, d->s.path, status, "%s", *text ? text : kvt_status_string(status));
}

/* ---- what there is to write ---- */

static void add_ints(dump *d, int kind, const char *name)
{
    item *i = &d->items[d->n_items++];

    i->kind = kind;
    (void)snprintf(i->array.name, sizeof i->array.name, "%s", name);
    (void)snprintf(i->array.dtype, sizeof i->array.dtype, "I32");
    i->array.n_dims = 1;
    i->array.shape[0] = d->n;
}

static void add_rows(dump *d, uint32_t layer, kvt_side side)
{
    item *i = &d->items[d->n_items++];

    i->kind = ROWS;
    i->layer = layer;
    i->side = side;
    (void)snprintf(i->array.name, sizeof i->array.name, "layers.%" PRIu32 ".%c", layer,
                   side == KVT_SIDE_K ? 'k' : 'v');
    (void)snprintf(i->array.dtype, sizeof i->array.dtype, "%s",
                   d->o->dtype == KVT_F32   ? "F32"
                   : d->o->dtype == KVT_F16 ? "F16"
                                            : "BF16");
    i->array.n_dims = 3;
    i->array.shape[0] = d->n;
    i->array.shape[1] = source_heads(&d->s, layer);
    i->array.shape[2] = source_dims(&d->s, layer, side);
}

static int list_items(dump *d)
{
    uint32_t layer;
    int side;

    d->items = calloc(N_INTS + 2 * (size_t)d->s.info.n_layers, sizeof *d->items);
    d->part = malloc(sizeof(int32_t) * KVT_MAX_HEADS * KVT_MAX_DIM); /* a token at least */
    if (!d->items || !d->part)
        return tool_fail(d->o, d->s.path, KVT_ERR_MEMORY, "no memory");
    add_ints(d, IDS, "token_ids");
    add_ints(d, POSITIONS, "positions");
    if (d->moved)
        add_ints(d, KEY_POSITIONS, "key_positions");
    for (layer = 0; layer < d->s.info.n_layers; layer++)
        for (side = 0; side < 2; side++)
            if ((!d->o->has_layers || d->o->layers[layer]) &&
                (!d->o->has_side || (int)d->o->side == side))
                add_rows(d, layer, (kvt_side)side);
    return SOUND;
}

/* The range of tokens, and whether the layers and their rows are there. */
static int check_range(dump *d)
{
    const tool_options *o = d->o;
    uint64_t length = d->s.info.n_tokens, end = o->end == UINT64_MAX ? length : o->end;
    uint32_t layer, g;

    if (end > length || o->first > end)
        return tool_refuse(o, d->s.path, "it has %" PRIu64 " tokens, not %" PRIu64 ":%" PRIu64,
                           length, o->first, end);
    d->first = o->first;
    d->n = end - o->first;
    for (layer = d->s.info.n_layers; layer < KVT_MAX_LAYERS; layer++)
        if (o->layers[layer])
            return tool_refuse(o, d->s.path,
                               "it has %" PRIu32 " layers, and none of number %" PRIu32,
                               d->s.info.n_layers, layer);
    for (g = 0; g < d->s.info.n_groups && (o->npy || o->output || o->safetensors); g++) {
        uint64_t gone, there;
        kvt_status status = source_released(&d->s, g, &gone, &there);
        if (status != KVT_OK)
            return fail_read(d, status);
        if (gone == there || end <= gone || o->first >= there || d->n == 0)
            continue;
        for (layer = 0; layer < d->s.info.n_layers; layer++)
            if (d->s.info.layer_groups[layer] == g && (!o->has_layers || o->layers[layer]))
                return tool_refuse(o, d->s.path,
                                   "layer %" PRIu32 " has no tokens %" PRIu64 " to %" PRIu64
                                   ": its window has released them (--tokens %" PRIu64
                                   ": has those behind)",
                                   layer, gone, there - 1, there);
    }
    return SOUND;
}

static int find_moved(dump *d)
{
    int32_t *a = malloc(2 * sizeof *a * PART_TOKENS);
    uint64_t at, n;
    kvt_status status = a ? KVT_OK : KVT_ERR_MEMORY;

    for (at = 0; at < d->n && status == KVT_OK && !d->moved; at += n) {
        n = d->n - at < PART_TOKENS ? d->n - at : PART_TOKENS;
        status = ints(d, POSITIONS, d->first + at, n, a);
        if (status == KVT_OK)
            status = ints(d, KEY_POSITIONS, d->first + at, n, a + PART_TOKENS);
        if (status == KVT_OK)
            d->moved = memcmp(a, a + PART_TOKENS, (size_t)n * sizeof *a) != 0;
    }
    free(a);
    return status == KVT_OK ? SOUND : fail_read(d, status);
}

/* ---- files ---- */

static int fail_write(const dump *d, const tool_output *out)
{
    return tool_fail(d->o, out->path, KVT_ERR_IO, "%s", out->text);
}

static int write_item(dump *d, const item *i, tool_output *out)
{
    uint64_t bytes, step, at, n;
    kvt_tensor to;

    if (d->n == 0)
        return SOUND;
    bytes = array_bytes(&i->array) / d->n;
    step = PART_BYTES / bytes;
    if (i->kind != ROWS && step > PART_TOKENS)
        step = PART_TOKENS;
    step = step >= KVT_BLOCK_TOKENS ? step / KVT_BLOCK_TOKENS * KVT_BLOCK_TOKENS : step ? step : 1;
    memset(&to, 0, sizeof to);
    to.data = d->part;
    to.dtype = d->o->dtype;
    for (at = 0; at < d->n; at += n) {
        kvt_status status;
        n = d->n - at < step ? d->n - at : step;
        status = i->kind == ROWS ? kvt_read(d->s.seq, i->layer, i->side, d->first + at, n, &to)
                                 : ints(d, i->kind, d->first + at, n, d->part);
        if (status != KVT_OK) {
            output_discard(out);
            return fail_read(d, status);
        }
        if (output_write(out, d->part, (size_t)(n * bytes)) != 0)
            return fail_write(d, out);
        d->done += n * bytes;
        (void)progress_step(NULL, d->done, d->total);
    }
    return SOUND;
}

static int write_npy(dump *d, const item *i, const char *path)
{
    char header[NPY_HEADER];
    tool_output out;
    size_t n = npy_header(header, &i->array);
    int code;

    if (output_open(&out, path, d->o->force) != 0 || output_write(&out, header, n) != 0)
        return fail_write(d, &out);
    code = write_item(d, i, &out);
    if (code == SOUND && output_commit(&out) != 0)
        return fail_write(d, &out);
    return code;
}

/* FOLDER/NAME.npy, from malloc. */
static char *npy_path(const dump *d, const item *i)
{
    size_t room = strlen(d->o->npy) + sizeof i->array.name + 8;
    char *path = malloc(room);

    if (path)
        (void)snprintf(path, room, "%s/%s.npy", d->o->npy, i->array.name);
    return path;
}

/* All of them; or only looks whether they may be written. */
static int each_npy(dump *d, int only_check)
{
    char text[TOOL_TEXT];
    size_t i;
    int code = SOUND;

    for (i = 0; i < d->n_items && code == SOUND; i++) {
        char *path = npy_path(d, &d->items[i]);
        if (!path)
            return tool_fail(d->o, d->o->npy, KVT_ERR_MEMORY, "no memory");
        if (only_check)
            code = output_apart(d->o, path, &d->inputs);
        if (!only_check)
            code = write_npy(d, &d->items[i], path);
        else if (code == SOUND && output_check(path, d->o->force, text, sizeof text) != 0)
            code = tool_fail(d->o, path, KVT_ERR_IO, "%s", text);
        free(path);
    }
    return code;
}

static int compare_places(const tool_options *o, const tool_place *places, size_t n)
{
    size_t i, j;

    for (i = 1; i < n; i++)
        for (j = 0; j < i; j++) {
            if (!place_is_same(&places[i], &places[j]))
                continue;
            return o->json && j == 0
                       ? tool_refuse(o, places[i].path,
                                     "is the standard output, which --json writes to")
                       : tool_refuse(o, places[i].path, "is the output %s too", places[j].path);
        }
    return SOUND;
}

/* No two outputs are one file; nor is one stdout, with --json. Of arrays those that are listed. */
static int each_apart(dump *d)
{
    const tool_options *o = d->o;
    size_t room = d->n_items + 3, n = 0, i;
    tool_place *places = calloc(room, sizeof *places);
    char **paths = calloc(room, sizeof *paths);
    int code = places && paths ? SOUND : tool_fail(o, d->s.path, KVT_ERR_MEMORY, "no memory");

    if (code == SOUND && o->json)
        place_find(&places[n++], "-");
    if (code == SOUND && o->output)
        place_find(&places[n++], o->output);
    if (code == SOUND && o->safetensors)
        place_find(&places[n++], o->safetensors);
    for (i = 0; code == SOUND && o->npy && i < d->n_items; i++) {
        paths[i] = npy_path(d, &d->items[i]);
        if (paths[i])
            place_find(&places[n++], paths[i]);
        else
            code = tool_fail(o, o->npy, KVT_ERR_MEMORY, "no memory");
    }
    if (code == SOUND)
        code = compare_places(o, places, n);
    for (i = 0; i < n; i++)
        place_release(&places[i]);
    for (i = 0; paths && i < d->n_items; i++)
        free(paths[i]);
    free(paths);
    free(places);
    return code;
}

static void hex(char *to, const uint8_t *bytes, uint32_t n)
{
    uint32_t i;

    *to = '\0';
    for (i = 0; i < n; i++)
        (void)snprintf(to + 2 * i, 3, "%02x", bytes[i]);
}

static int write_safetensors(dump *d)
{
    char metadata[2 * (KVT_MAX_TAG + KVT_MAX_FINGERPRINT) + 256];
    char tag[2 * KVT_MAX_TAG + 1], fingerprint[2 * KVT_MAX_FINGERPRINT + 1];
    tool_array *arrays = calloc(d->n_items, sizeof *arrays);
    char *header = NULL;
    tool_output out;
    size_t i, bytes = 0;
    int code = SOUND;

    hex(tag, d->s.info.tag, d->s.info.tag_bytes);
    hex(fingerprint, d->s.info.fingerprint, d->s.info.fingerprint_bytes);
    (void)snprintf(metadata, sizeof metadata,
                   "{\"fingerprint\":\"%s\",\"first_token\":\"%" PRIu64
                   "\",\"kvtile_version\":\"%s\",\"next_position\":\"%" PRId32 "\",\"tag\":\"%s\"}",
                   fingerprint, d->first, kvt_version(), kvt_seq_next_position(d->s.seq), tag);
    for (i = 0; arrays && i < d->n_items; i++)
        arrays[i] = d->items[i].array;
    if (arrays)
        header = safetensors_header(arrays, d->n_items, metadata, &bytes);
    free(arrays);
    if (!header)
        return tool_fail(d->o, d->o->safetensors, KVT_ERR_MEMORY, "no memory");
    if (output_open(&out, d->o->safetensors, d->o->force) != 0 ||
        output_write(&out, header, bytes) != 0)
        code = fail_write(d, &out);
    free(header);
    for (i = 0; i < d->n_items && code == SOUND; i++)
        code = write_item(d, &d->items[i], &out);
    if (code == SOUND && output_commit(&out) != 0)
        return fail_write(d, &out);
    return code;
}

/* The folder that a new folder is in. */
static int sync_made(const char *folder)
{
    size_t n = strlen(folder);
    char *path = output_beside(folder, output_name(folder));
    int failed, code;

    while (path && n > 1 && path[n - 1] == '/')
        path[--n] = '\0';
    failed = path ? output_sync_folder(path) : 0;
    code = errno;
    free(path);
    errno = code;
    return failed;
}

static int write_files(dump *d)
{
    const tool_options *o = d->o;
    const item *last = &d->items[d->n_items - 1];
    const char *paths[2];
    char text[TOOL_TEXT];
    int i, made = 0, code = SOUND;

    if (o->output && (last->kind != ROWS || d->n_items < 2 || (last - 1)->kind == ROWS))
        return tool_refuse(o, d->s.path, "--output takes one side of one layer: --layer, --side");
    paths[0] = o->output;
    paths[1] = o->safetensors;
    for (i = 0; i < 2; i++)
        if (paths[i] && output_check(paths[i], o->force, text, sizeof text) != 0)
            return tool_fail(o, paths[i], KVT_ERR_IO, "%s", text);
    if (o->npy) {
        made = mkdir(o->npy, 0777) == 0;
        if (!made && errno != EEXIST)
            return tool_fail(o, o->npy, KVT_ERR_IO, "cannot be created: %s", strerror(errno));
        if (made && sync_made(o->npy) != 0)
            code = tool_fail(o, o->npy, KVT_ERR_IO, "its folder cannot be synced: %s",
                             strerror(errno));
        if (code == SOUND)
            code = each_npy(d, 1);
        if (code == SOUND)
            code = each_apart(d);
        if (code != SOUND && made)
            (void)rmdir(o->npy);
        if (code != SOUND)
            return code;
    }
    for (i = 0; i < (int)d->n_items; i++)
        d->total += array_bytes(&d->items[i].array) * (uint64_t)(!!o->npy + !!o->safetensors);
    if (o->output)
        d->total += array_bytes(&last->array);
    progress_begin(o, d->s.path, "writing");
    if (o->npy)
        code = each_npy(d, 0);
    if (code == SOUND && o->output)
        code = write_npy(d, last, o->output);
    if (code == SOUND && o->safetensors)
        code = write_safetensors(d);
    if (code == SOUND)
        progress_end();
    else if (made)
        (void)rmdir(o->npy); /* where there is no array in it yet */
    return code;
}

/* ---- stdout ---- */

/* Print them, or only see that they can be read. */
static int json_ints(const dump *d, int kind, const char *name, int only_check)
{
    uint64_t at, n, i;
    int32_t *part = d->part;

    if (!only_check)
        printf(",\"%s\":[", name);
    for (at = 0; at < d->n; at += n) {
        n = d->n - at < PART_TOKENS ? d->n - at : PART_TOKENS;
        if (ints(d, kind, d->first + at, n, part) != KVT_OK)
            return -1;
        for (i = 0; i < n && !only_check; i++)
            printf("%s%" PRId32, at + i ? "," : "", part[i]);
    }
    if (!only_check)
        printf("]");
    return 0;
}

static int json_all_ints(const dump *d, int only_check)
{
    static const char *const names[N_INTS] = {"token_ids", "positions", "key_positions"};
    int kind, failed = 0;

    for (kind = 0; kind < N_INTS && !failed; kind++)
        failed = json_ints(d, kind, names[kind], only_check);
    return failed;
}

/* What is printed besides: read before the object begins, which an error is none of. */
typedef struct facts {
    uint64_t *checkpoints; /* [n], from malloc */
    size_t n;
    uint64_t released[KVT_MAX_GROUPS][2]; /* first, end */
} facts;

static int read_facts(const dump *d, facts *f)
{
    uint32_t g;

    memset(f, 0, sizeof *f);
    if (kvt_seq_checkpoints(d->s.seq, NULL, 0, &f->n) != KVT_OK)
        return -1;
    f->checkpoints = calloc(f->n ? f->n : 1, sizeof *f->checkpoints);
    if (!f->checkpoints || kvt_seq_checkpoints(d->s.seq, f->checkpoints, f->n, &f->n) != KVT_OK)
        return -1;
    for (g = 0; g < d->s.info.n_groups; g++)
        if (source_released(&d->s, g, &f->released[g][0], &f->released[g][1]) != KVT_OK)
            return -1;
    return 0;
}

static void print_json_files(const dump *d)
{
    const tool_options *o = d->o;
    const char *comma = "";
    size_t i;

    for (i = 0; o->npy && i < d->n_items; i++) {
        printf("%s\"", comma);
        json_text(o->npy);
        printf("/%s.npy\"", d->items[i].array.name);
        comma = ",";
    }
    for (i = 0; i < 2; i++) {
        const char *path = i ? o->safetensors : o->output;
        if (!path)
            continue;
        printf("%s", comma);
        json_string(path);
        comma = ",";
    }
}

static int print_json(const dump *d, int with_ints)
{
    facts f;
    int failed = read_facts(d, &f) != 0 || (with_ints && json_all_ints(d, 1) != 0), any = 0;
    uint32_t g;
    size_t i;

    if (!failed) {
        json_begin(d->s.path, KVT_OK);
        printf(",\"n_tokens\":%" PRIu64 ",\"first\":%" PRIu64 ",\"end\":%" PRIu64
               ",\"next_position\":%" PRId32 ",\"checkpoints\":[",
               d->s.info.n_tokens, d->first, d->first + d->n, kvt_seq_next_position(d->s.seq));
        for (i = 0; i < f.n; i++)
            printf("%s%" PRIu64, i ? "," : "", f.checkpoints[i]);
        printf("],\"released\":[");
        for (g = 0; g < d->s.info.n_groups; g++)
            if (f.released[g][0] != f.released[g][1])
                printf("%s{\"group\":%" PRIu32 ",\"first\":%" PRIu64 ",\"end\":%" PRIu64 "}",
                       any++ ? "," : "", g, f.released[g][0], f.released[g][1]);
        printf("],\"files\":[");
        print_json_files(d);
        printf("]");
        if (with_ints)
            (void)json_all_ints(d, 0);
        printf("}\n");
    }
    free(f.checkpoints);
    return failed;
}

static int print_table(const dump *d)
{
    int32_t *part[N_INTS];
    uint64_t at, n, i;
    int kind;

    for (kind = 0; kind < N_INTS; kind++)
        part[kind] = (int32_t *)d->part + (size_t)kind * PART_TOKENS;
    printf("index\tposition\ttoken_id%s\n", d->moved ? "\tkey_position" : "");
    for (at = 0; at < d->n; at += n) {
        n = d->n - at < PART_TOKENS ? d->n - at : PART_TOKENS;
        for (kind = 0; kind < N_INTS; kind++)
            if (ints(d, kind, d->first + at, n, part[kind]) != KVT_OK)
                return -1;
        for (i = 0; i < n; i++) {
            printf("%" PRIu64 "\t%" PRId32 "\t%" PRId32, d->first + at + i, part[POSITIONS][i],
                   part[IDS][i]);
            if (d->moved)
                printf("\t%" PRId32, part[KEY_POSITIONS][i]);
            printf("\n");
        }
    }
    return 0;
}

int dump_run(const tool_options *o)
{
    int files = o->npy || o->output || o->safetensors, failed = 0, code;
    dump d;

    memset(&d, 0, sizeof d);
    d.o = o;
    d.s.path = o->files[0];
    code = input_check(o, o->files[0]);
    if (code == SOUND && files)
        inputs_find(&d.inputs, o, o->files[0]);
    if (code == SOUND && o->output)
        code = output_apart(o, o->output, &d.inputs);
    if (code == SOUND && o->safetensors)
        code = output_apart(o, o->safetensors, &d.inputs);
    if (code == SOUND && files)
        code = each_apart(&d); /* before the work, as far as it is known */
    if (code != SOUND)
        return code;
    code = source_load(&d.s, o->files[0], NULL, NULL, o);
    if (code == SOUND)
        code = check_range(&d);
    if (code == SOUND)
        code = find_moved(&d);
    if (code == SOUND)
        code = list_items(&d);
    if (code == SOUND && files)
        code = write_files(&d);
    if (code == SOUND && o->json)
        failed = print_json(&d, !files);
    else if (code == SOUND && !files && !o->quiet)
        failed = print_table(&d);
    if (failed)
        code = fail_read(&d, KVT_ERR_MEMORY);
    source_release(&d.s);
    free(d.items);
    free(d.part);
    return code;
}
