/*
 * Snapshots in other types: blocks on their way to or from a file, and whole files.
 */
#include "src/snapshot/convert.h"

#include <stdio.h>
#include <stdlib.h>

kvt_status kvt_snap_target_make(const kvt_snap_context *context, const kvt_group *of,
                                const kvt_snapshot_group *group, kvt_group *made, float **signs)
{
    kvt_group_config config = of->config;
    const char *fault = kvt_snap_group_fault(group);
    void *memory;
    kvt_status status;

    if (fault)
        return kvt_snap_fail(context, KVT_ERR_ARG, "convert: the group cannot have these types: %s",
                             fault);
    config.k_type = group->k_type;
    config.v_type = group->v_type;
    if (kvt_group_is_too_wide(&config))
        return kvt_snap_fail(context, KVT_ERR_LIMIT, "convert: a block would be too wide");
    kvt_group_make(&config, made);
    if (!kvt_group_signs_bytes(made))
        return KVT_OK;
    status = kvt_snap_alloc(context, kvt_group_signs_bytes(made), "a rotation's signs", &memory);
    if (status != KVT_OK)
        return status;
    *signs = memory;
    kvt_group_fill_signs(made, *signs);
    return KVT_OK;
}

void kvt_snap_target_release(const kvt_snap_context *context, kvt_group *made, float *signs)
{
    if (signs)
        kvt_snap_free(context, signs, kvt_group_signs_bytes(made));
}

kvt_status kvt_convert_image(const kvt_snap_context *context, const kvt_group *group, uint32_t form,
                             const unsigned char *from, uint32_t tokens, const kvt_group *to_group,
                             uint32_t to_form, unsigned char *to, kvt_snap_buffer *scratch)
{
    kvt_status status =
        kvt_snap_reserve(context, scratch, 0, kvt_convert_bytes(group, to_group), "a conversion");

    if (status != KVT_OK)
        return status;
    status = kvt_convert_layer(&context->cache->kernels, group, form, from, tokens, to_group,
                               to_form, to, scratch->data);
    return status == KVT_ERR_VALUE
               ? kvt_snap_fail(context, status,
                               "convert: a value is beyond what the type can store")
               : status;
}

/* ---- whole files ---- */

#define CONVERT_THREADS 4u /* no more than there are CPUs run */

/* Pieces of the file that is read, as they come. */
typedef struct pieces {
    kvt_snapshot_piece *list;
    size_t n, room, from_file;
    int failed;
    const kvt_load_options *options;
} pieces;

static int take_piece(void *user, const kvt_snapshot_piece *piece)
{
    pieces *p = user;
    size_t name = strlen(piece->name) + 1;
    char *copy;

    if (p->options->on_piece && p->options->on_piece(p->options->piece_user, piece))
        return 1;
    if (p->n == p->room) {
        size_t room = p->room ? 2 * p->room : 8;
        kvt_snapshot_piece *list = realloc(p->list, room * sizeof *list);
        if (!list) {
            p->failed = 1;
            return 1;
        }
        p->list = list;
        p->room = room;
    }
    copy = malloc(name + piece->bytes); /* name and data in one */
    if (!copy) {
        p->failed = 1;
        return 1;
    }
    memcpy(copy, piece->name, name);
    if (piece->bytes)
        memcpy(copy + name, piece->data, piece->bytes);
    p->list[p->n].name = copy;
    p->list[p->n].data = copy + name;
    p->list[p->n++].bytes = piece->bytes;
    p->from_file = p->n;
    return 0;
}

static void release_pieces(pieces *p)
{
    size_t i;
    for (i = 0; i < p->from_file; i++)
        free((void *)(uintptr_t)p->list[i].name);
    free(p->list);
}

/* Its data is still behind its name, in the same memory. */
static int is_from_file(const kvt_snapshot_piece *piece)
{
    return piece->data == piece->name + strlen(piece->name) + 1;
}

/*
 * The caller's come behind, in place of those of the same name: a second one of that name comes
 * behind all, and the save refuses it.
 */
static kvt_status add_pieces(pieces *p, const kvt_save_options *o)
{
    kvt_snapshot_piece *list;
    size_t i, j;

    if (!o->n_pieces)
        return KVT_OK;
    if (!o->pieces || o->n_pieces > SIZE_MAX / sizeof *list - p->n)
        return KVT_ERR_ARG;
    list = realloc(p->list, (p->n + o->n_pieces) * sizeof *list);
    if (!list)
        return KVT_ERR_MEMORY;
    p->list = list;
    for (i = 0; i < o->n_pieces; i++) {
        for (j = 0; j < p->from_file && o->pieces[i].name; j++)
            if (is_from_file(&list[j]) && strcmp(list[j].name, o->pieces[i].name) == 0) {
                list[j].data = o->pieces[i].data;
                list[j].bytes = o->pieces[i].bytes;
                break;
            }
        if (j == p->from_file || !o->pieces[i].name)
            list[p->n++] = o->pieces[i];
    }
    return KVT_OK;
}

/*
 * A cache for what the file holds: of some of its layers, if the options say so. keeps: also what
 * windows have left out of sight, which the save releases by residual_tokens.
 */
static kvt_status make_cache(const kvt_snapshot_info *info, const kvt_load_options *o, int keeps,
                             uint32_t n_threads, char *text, size_t text_bytes, kvt_cache **cache)
{
    kvt_group_config groups[KVT_MAX_GROUPS];
    uint32_t *layers = malloc(info->n_layers * sizeof *layers), g, i, n = 0, made = 0;
    kvt_config config = kvt_config_init();
    kvt_status status;

    if (!layers)
        return KVT_ERR_MEMORY;
    for (g = 0; g < info->n_groups; g++) {
        const kvt_snapshot_group *group = &info->groups[g];
        kvt_group_config *to = &groups[made];
        uint32_t first = n, n_layers = o->layers ? o->n_layers : info->n_layers;
        *to = kvt_group_config_init();
        for (i = 0; i < n_layers; i++) {
            uint32_t layer = o->layers ? o->layers[i] : i;
            if (layer < info->n_layers && info->layer_groups[layer] == g)
                layers[n++] = i;
        }
        if (n == first)
            continue;
        to->n_layers = n - first;
        to->layers = layers + first;
        to->n_q_heads = group->n_q_heads;
        to->n_kv_heads = group->n_kv_heads;
        to->k_dim = group->k_dim;
        to->v_dim = group->v_dim;
        to->k_type = group->k_type;
        to->v_type = group->v_type;
        to->flags = group->flags;
        to->rotation_seed = group->rotation_seed;
        to->window_tokens = group->window_tokens;
        to->sink_tokens = group->sink_tokens;
        if (keeps && to->window_tokens)
            to->residual_tokens = KVT_MAX_TOKENS;
        to->rope_pairing = KVT_ROPE_NONE; /* keys that have moved are taken along as they are */
        made++;
    }
    config.groups = groups;
    config.n_groups = made;
    config.max_tokens = info->n_tokens ? info->n_tokens : 1;
    config.fingerprint = info->fingerprint_bytes ? info->fingerprint : NULL;
    config.fingerprint_bytes = info->fingerprint_bytes;
    config.n_threads = n_threads;
    config.error_text = text;
    config.error_text_bytes = text_bytes;
    status = made ? kvt_cache_create(&config, cache) : KVT_ERR_ARG;
    free(layers);
    return status;
}

/* Whether a file of so many bytes can have the tokens and blocks that its header claims. */
static int fits(const kvt_snapshot_info *info, uint64_t bytes)
{
    uint64_t chunks = (info->n_tokens - info->inherited_tokens) / KVT_SNAP_CHUNK_TOKENS;

    return info->n_blocks * KVT_SNAP_ENTRY_BYTES +
               2 * chunks * (KVT_SNAP_SECTION_BYTES + KVT_SNAP_NOTE_BYTES) <=
           bytes;
}

/*
 * A file's header, which its size does not contradict. It is read more than once, and so is no
 * pipe.
 */
static kvt_status look_at(const kvt_snap_context *context, const char *path,
                          const kvt_inspect_options *options, kvt_snapshot_info *info)
{
    uint64_t bytes;
    kvt_status status = kvt_snap_file_size(context, path, &bytes);

    if (status == KVT_OK)
        status = kvt_snapshot_inspect_with(path, options, info, context->text, context->text_bytes);
    if (status == KVT_OK && !fits(info, bytes))
        status = kvt_snap_fail(
            context, KVT_ERR_CORRUPT,
            "snapshot damaged: %llu bytes cannot hold the %llu tokens and %llu blocks of its "
            "header: %s",
            (unsigned long long)bytes, (unsigned long long)info->n_tokens,
            (unsigned long long)info->n_blocks, path);
    return status;
}

/* A parent's header; what is wrong with it is said with its name, as by a load. */
static kvt_status look_at_parent(const kvt_snap_context *context, const char *path,
                                 const kvt_inspect_options *options, kvt_snapshot_info *info)
{
    char text[200];
    kvt_status status = look_at(context, path, options, info);

    if (status == KVT_OK || status == KVT_ERR_IO || !context->text || !context->text_bytes)
        return status;
    (void)snprintf(text, sizeof text, "%s", context->text);
    return kvt_snap_fail(context, status, "in the parent %.47s, %s",
                         path + kvt_snap_folder_bytes(path), text);
}

/* The parents of a delta: none is the file that is to be written, which they would be lost with. */
static kvt_status look_at_parents(const kvt_snap_context *context, const char *from, const char *to,
                                  const kvt_inspect_options *options, const kvt_snapshot_info *info)
{
    char folder[KVT_SNAP_PATH_BYTES], path[KVT_SNAP_PATH_BYTES];
    size_t n = kvt_snap_folder_bytes(from);
    kvt_snapshot_info *parent;
    kvt_status status = KVT_OK;
    uint32_t left = info->depth;

    if (!left)
        return KVT_OK;
    parent = malloc(sizeof *parent);
    if (!parent)
        return kvt_snap_fail(context, KVT_ERR_MEMORY, "no memory for a snapshot's header");
    *parent = *info;
    if (n < sizeof folder) { /* it has been opened, so it is */
        memcpy(folder, from, n);
        folder[n] = '\0';
    }
    for (; status == KVT_OK && left && parent->depth; left--) {
        int same;
        if (!kvt_snap_path_in(options->folder ? options->folder : folder, parent->parent_name,
                              path))
            status = kvt_snap_fail(context, KVT_ERR_IO, "a parent's path is too long: %s",
                                   parent->parent_name);
        else if ((same = kvt_snap_same_file(context, path, to)) != 0)
            status = same < 0
                         ? KVT_ERR_IO
                         : kvt_snap_fail(context, KVT_ERR_ARG,
                                         "convert: the output is a parent of the file: %s", to);
        else
            status = look_at_parent(context, path, options, parent);
    }
    free(parent);
    return status;
}

static kvt_status convert_with(kvt_cache *cache, const char *from, const kvt_load_options *load,
                               const char *to, const kvt_save_options *save,
                               const kvt_snapshot_info *info)
{
    kvt_load_options reads = *load;
    kvt_save_options writes = *save;
    pieces p;
    kvt_seq *seq = NULL;
    kvt_status status, added;

    memset(&p, 0, sizeof p);
    p.options = load;
    reads.on_piece = take_piece;
    reads.piece_user = &p;
    status = kvt_seq_create(cache, &seq);
    if (status == KVT_OK && info->tag_bytes)
        status = kvt_seq_set_tag(seq, info->tag, info->tag_bytes);
    if (status == KVT_OK)
        status = kvt_seq_load(seq, from, &reads, NULL);
    if (p.failed)
        status = kvt_fail(cache, KVT_ERR_MEMORY, "no memory for a snapshot's pieces");
    if (status == KVT_OK) {
        added = add_pieces(&p, save);
        if (added != KVT_OK)
            status = kvt_fail(cache, added, "%s",
                              added == KVT_ERR_ARG
                                  ? "save options: pieces is NULL, or n_pieces is too large"
                                  : "no memory for a snapshot's pieces");
    }
    writes.pieces = p.list;
    writes.n_pieces = p.n;
    if (status == KVT_OK)
        status = kvt_seq_save(seq, to, &writes);
    release_pieces(&p);
    kvt_seq_destroy(seq);
    return status;
}

kvt_status kvt_snapshot_convert(const char *from, const kvt_load_options *from_options,
                                const char *to, const kvt_save_options *to_options,
                                char *error_text, size_t error_text_bytes)
{
    kvt_snap_context context;
    kvt_inspect_options looks;
    kvt_load_options load;
    kvt_save_options save;
    kvt_snapshot_info *info;
    kvt_cache *cache = NULL;
    kvt_status status;
    uint32_t i;

    memset(&context, 0, sizeof context);
    memset(&looks, 0, sizeof looks);
    memset(&load, 0, sizeof load);
    memset(&save, 0, sizeof save);
    context.text = error_text;
    context.text_bytes = error_text_bytes;
    if (error_text && error_text_bytes)
        error_text[0] = '\0';
    load.struct_size = sizeof load;
    save.struct_size = sizeof save;
    if (!from || !*from || !to || !*to)
        return kvt_snap_fail(&context, KVT_ERR_ARG, "convert: no path");
    if ((from_options && !kvt_copy_struct(&load, from_options, sizeof load)) ||
        (to_options && !kvt_copy_struct(&save, to_options, sizeof save)))
        return kvt_snap_fail(&context, KVT_ERR_ARG, "convert options: unknown struct_size");
    if (save.convert && !save.n_types)
        return kvt_snap_fail(&context, KVT_ERR_ARG, "convert options: types, and n_types is 0");
    if (load.prompt || load.n_prompt || load.reuse || load.map || load.convert)
        return kvt_snap_fail(&context, KVT_ERR_ARG,
                             "convert options: prompt, reuse, map or convert of the load");
    for (i = 1; load.layers && i < load.n_layers; i++)
        if (load.layers[i] <= load.layers[i - 1])
            return kvt_snap_fail(&context, KVT_ERR_ARG, "convert options: layers do not ascend");
    info = malloc(sizeof *info);
    if (!info)
        return kvt_snap_fail(&context, KVT_ERR_MEMORY, "no memory for a snapshot's header");
    info->struct_size = sizeof *info;
    looks.struct_size = sizeof looks;
    looks.folder = load.folder;
    looks.key = load.key;
    status = look_at(&context, from, &looks, info);
    if (status == KVT_OK)
        status = look_at_parents(&context, from, to, &looks, info);
    if (status == KVT_OK) {
        const uint32_t most = kvt_parallel_has_pool() ? CONVERT_THREADS : 1;
        status = make_cache(info, &load, !save.n_types, most, error_text, error_text_bytes, &cache);
        if (status == KVT_ERR_MEMORY && most > 1) { /* or the system has no threads left */
            if (error_text && error_text_bytes)
                error_text[0] = '\0';
            status =
                make_cache(info, &load, !save.n_types, 1, error_text, error_text_bytes, &cache);
        }
    }
    if (status == KVT_OK) {
        status = convert_with(cache, from, &load, to, &save, info);
        if (status != KVT_OK && error_text && error_text_bytes)
            (void)kvt_cache_error(cache, error_text, error_text_bytes);
    } else if (error_text && error_text_bytes && !error_text[0]) {
        (void)kvt_snap_fail(&context, status, "convert: no layer of these is there, or no memory");
    }
    kvt_cache_destroy(cache);
    free(info);
    return status;
}
