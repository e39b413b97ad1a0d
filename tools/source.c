/*
 * A snapshot in a cache made for it: the geometry, types and windows are the file's.
 */
#include "tool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int take_piece(void *user, const kvt_snapshot_piece *piece)
{
    tool_pieces *pieces = user;
    tool_piece *list;

    if (!pieces)
        return 0;
    if (pieces->n == pieces->room) {
        size_t room = pieces->room ? 2 * pieces->room : 8;
        list = realloc(pieces->list, room * sizeof *list);
        if (!list)
            return 1;
        pieces->list = list;
        pieces->room = room;
    }
    list = &pieces->list[pieces->n++];
    (void)snprintf(list->name, sizeof list->name, "%s", piece->name);
    list->bytes = piece->bytes;
    return 0;
}

int source_describe(tool_source *s, const char *path, int verify, tool_pieces *pieces,
                    const tool_options *o)
{
    char text[TOOL_TEXT] = "";
    kvt_inspect_options options;
    kvt_status status;

    memset(s, 0, sizeof *s);
    memset(&options, 0, sizeof options);
    s->path = path;
    s->info.struct_size = sizeof s->info;
    options.struct_size = sizeof options;
    options.verify = verify != 0;
    options.key = o->key_file ? o->key : NULL;
    options.on_piece = take_piece;
    options.piece_user = pieces;
    options.progress = progress_step;
    if (verify)
        progress_begin(o, path, "reading");
    status = kvt_snapshot_inspect_with(path, &options, &s->info, text, sizeof text);
    if (status != KVT_OK)
        return tool_fail(o, path, status, "%s", *text ? text : kvt_status_string(status));
    if (verify)
        progress_end();
    return SOUND;
}

static kvt_status create(tool_source *s, char *text, size_t text_bytes)
{
    kvt_group_config groups[KVT_MAX_GROUPS];
    uint32_t layers[KVT_MAX_LAYERS], g, i, n = 0;
    kvt_config config = kvt_config_init();

    for (g = 0; g < s->info.n_groups; g++) {
        const kvt_snapshot_group *from = &s->info.groups[g];
        kvt_group_config *to = &groups[g];
        *to = kvt_group_config_init();
        to->n_layers = from->n_layers;
        to->n_q_heads = from->n_q_heads;
        to->n_kv_heads = from->n_kv_heads;
        to->k_dim = from->k_dim;
        to->v_dim = from->v_dim;
        to->k_type = from->k_type;
        to->v_type = from->v_type;
        to->flags = from->flags;
        to->rotation_seed = from->rotation_seed;
        to->window_tokens = from->window_tokens;
        to->sink_tokens = from->sink_tokens;
        to->rope_pairing = KVT_ROPE_NONE; /* keys that have moved are taken as they are */
        to->layers = layers + n;
        for (i = 0; i < s->info.n_layers; i++)
            if (s->info.layer_groups[i] == g)
                layers[n++] = i;
    }
    config.groups = groups;
    config.n_groups = s->info.n_groups;
    config.max_tokens = s->info.n_tokens ? s->info.n_tokens : 1;
    config.fingerprint = s->info.fingerprint;
    config.fingerprint_bytes = s->info.fingerprint_bytes;
    config.error_text = text;
    config.error_text_bytes = text_bytes;
    return kvt_cache_create(&config, &s->cache);
}

int source_load(tool_source *s, const char *path, tool_on_piece on_piece, void *user,
                const tool_options *o)
{
    char text[TOOL_TEXT] = "";
    kvt_load_options options;
    kvt_status status;
    int code = source_describe(s, path, 0, NULL, o);

    if (code != SOUND)
        return code;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.progress = progress_step;
    options.key = o->key_file ? o->key : NULL;
    options.on_piece = on_piece;
    options.piece_user = user;
    progress_begin(o, path, "reading");
    status = create(s, text, sizeof text);
    if (status == KVT_OK)
        status = kvt_seq_create(s->cache, &s->seq);
    if (status == KVT_OK)
        status = kvt_seq_set_tag(s->seq, s->info.tag, s->info.tag_bytes);
    if (status == KVT_OK)
        status = kvt_seq_load(s->seq, path, &options, NULL);
    if (status == KVT_OK) {
        progress_end();
        return SOUND;
    }
    if (status == KVT_ERR_CANCELLED && !output_interrupted()) /* by on_piece */
        return tool_fail(o, path, KVT_ERR_MEMORY, "no memory for its pieces");
    if (!*text && s->cache)
        (void)kvt_cache_error(s->cache, text, sizeof text);
    return tool_fail(o, path, status, "%s", *text ? text : kvt_status_string(status));
}

void source_release(tool_source *s)
{
    kvt_seq_destroy(s->seq);
    kvt_cache_destroy(s->cache);
    s->seq = NULL;
    s->cache = NULL;
}

uint32_t source_heads(const tool_source *s, uint32_t layer)
{
    return s->info.groups[s->info.layer_groups[layer]].n_kv_heads;
}

uint32_t source_dims(const tool_source *s, uint32_t layer, kvt_side side)
{
    const kvt_snapshot_group *group = &s->info.groups[s->info.layer_groups[layer]];
    return side == KVT_SIDE_K ? group->k_dim : group->v_dim;
}

kvt_status source_released(const tool_source *s, uint32_t group, uint64_t *first, uint64_t *end)
{
    const kvt_snapshot_group *of = &s->info.groups[group];
    uint64_t n = kvt_seq_length(s->seq), at;
    kvt_status status = KVT_OK;
    kvt_tensor row;
    float *values;
    uint32_t layer = 0;

    *first = *end = 0;
    if (of->window_tokens == 0)
        return KVT_OK;
    while (s->info.layer_groups[layer] != group)
        layer++;
    values = malloc((size_t)of->n_kv_heads * of->k_dim * sizeof *values);
    if (!values)
        return KVT_ERR_MEMORY;
    row = kvt_tensor_f32(values);
    for (at = 0; at < n; at += KVT_BLOCK_TOKENS) {
        status = kvt_read(s->seq, layer, KVT_SIDE_K, at, 1, &row);
        if (status != KVT_OK && status != KVT_ERR_STATE)
            break;
        if (status == KVT_ERR_STATE) {
            if (*first == *end)
                *first = at;
            *end = at + KVT_BLOCK_TOKENS;
        }
        status = KVT_OK;
    }
    free(values);
    return status;
}
