/*
 * A snapshot in a cache made for it: the geometry, types and windows are the file's.
 */
#include "tool.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/*
 * Which group each layer is of, from the file's header (docs/format.md, "Header"), which
 * kvt_snapshot_inspect has found sound: the layers' numbers stand behind the groups, those of
 * group 0 first.
 */
static int read_layers(tool_source *s)
{
    FILE *file = fopen(s->path, "rb");
    int bad = !file || fseek(file, 64 + 48 * (long)s->info.n_groups, SEEK_SET) != 0;
    uint32_t g, i;

    for (g = 0; g < s->info.n_groups; g++)
        for (i = 0; i < s->info.groups[g].n_layers && !bad; i++) {
            uint32_t layer;
            bad = fread(&layer, sizeof layer, 1, file) != 1 || layer >= s->n_layers;
            if (!bad)
                s->group_of[layer] = (uint8_t)g;
        }
    if (file)
        (void)fclose(file);
    return bad;
}

int source_describe(tool_source *s, const char *path, const tool_options *o)
{
    char text[TOOL_TEXT] = "";
    kvt_status status;
    uint32_t g;

    memset(s, 0, sizeof *s);
    s->path = path;
    s->info.struct_size = sizeof s->info;
    status = kvt_snapshot_inspect(path, 0, &s->info, text, sizeof text);
    if (status != KVT_OK)
        return tool_fail(o, path, status, "%s", *text ? text : kvt_status_string(status));
    for (g = 0; g < s->info.n_groups; g++)
        s->n_layers += s->info.groups[g].n_layers;
    if (s->info.n_groups > 1 && read_layers(s))
        return tool_fail(o, path, KVT_ERR_IO, "the header cannot be read again");
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
        for (i = 0; i < s->n_layers; i++)
            if (s->group_of[i] == g)
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

int source_load(tool_source *s, const char *path, const tool_options *o)
{
    char text[TOOL_TEXT] = "";
    kvt_load_options options;
    kvt_status status;
    int code = source_describe(s, path, o);

    if (code != SOUND)
        return code;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.progress = progress_step;
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
    return s->info.groups[s->group_of[layer]].n_kv_heads;
}

uint32_t source_dims(const tool_source *s, uint32_t layer, kvt_side side)
{
    const kvt_snapshot_group *group = &s->info.groups[s->group_of[layer]];
    return side == KVT_SIDE_K ? group->k_dim : group->v_dim;
}

kvt_status source_released(const tool_source *s, uint32_t group, uint64_t *first, uint64_t *end)
{
    const kvt_snapshot_group *of = &s->info.groups[group];
    uint64_t n = s->info.n_tokens, at;
    kvt_status status = KVT_OK;
    kvt_tensor row;
    float *values;
    uint32_t layer = 0;

    *first = *end = 0;
    if (of->window_tokens == 0)
        return KVT_OK;
    while (s->group_of[layer] != group)
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
