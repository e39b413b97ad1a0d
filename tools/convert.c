/*
 * kvtile convert and merge: a snapshot, with its parents, into one other file. The work is
 * kvt_snapshot_convert's.
 */
#include "tool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* What is asked for, and the arrays that its pointers lead to. */
typedef struct request {
    kvt_load_options load;
    kvt_save_options save;
    uint32_t layers[KVT_MAX_LAYERS];
    kvt_type k_types[KVT_MAX_GROUPS], v_types[KVT_MAX_GROUPS];
} request;

static void choose_layers(request *r, const tool_options *o)
{
    uint32_t layer;

    for (layer = 0; layer < KVT_MAX_LAYERS; layer++)
        if (o->layers[layer])
            r->layers[r->load.n_layers++] = layer;
    r->load.layers = r->load.n_layers ? r->layers : NULL;
}

/* Of the groups that have a layer of the output, in order. */
static void choose_types(request *r, const tool_options *o, const kvt_snapshot_info *info)
{
    uint32_t g, layer, n = 0;

    if (!o->has_k_type && !o->has_v_type)
        return;
    for (g = 0; g < info->n_groups; g++) {
        const kvt_snapshot_group *group = &info->groups[g];
        for (layer = 0; layer < info->n_layers; layer++)
            if (info->layer_groups[layer] == g && (!r->load.layers || o->layers[layer]))
                break;
        if (layer == info->n_layers)
            continue;
        r->k_types[n] = o->has_k_type ? o->k_type : group->k_type;
        r->v_types[n] = group->flags & KVT_GROUP_V_IN_K ? r->k_types[n] /* it is a part of K */
                        : o->has_v_type                 ? o->v_type
                                                        : group->v_type;
        n++;
    }
    r->save.convert = 1;
    r->save.n_types = n;
    r->save.k_types = r->k_types;
    r->save.v_types = r->v_types;
}

/* SOUND, or reported. */
static int check(const tool_options *o, const kvt_snapshot_info *info)
{
    uint64_t end = o->end == UINT64_MAX ? info->n_tokens : o->end;
    uint32_t layer;

    if (end > info->n_tokens || o->first > end || (o->first == end && info->n_tokens))
        return tool_refuse(
            o, o->files[0], "it has %" PRIu64 " tokens, not %" PRIu64 ":%" PRIu64 "%s",
            info->n_tokens, o->first, end, o->first == end ? ", which are none" : "");
    if (o->first % KVT_BLOCK_TOKENS)
        return tool_refuse(o, o->files[0], "--tokens begins at a multiple of %d, not at %" PRIu64,
                           KVT_BLOCK_TOKENS, o->first);
    for (layer = info->n_layers; layer < KVT_MAX_LAYERS; layer++)
        if (o->layers[layer])
            return tool_refuse(o, o->files[0],
                               "it has %" PRIu32 " layers, and none of number %" PRIu32,
                               info->n_layers, layer);
    return SOUND;
}

/* Reading and writing are half of the work each. */
static int on_load(void *user, uint64_t done, uint64_t total)
{
    return progress_step(user, done, 2 * total);
}

static int on_save(void *user, uint64_t done, uint64_t total)
{
    return progress_step(user, total + done, 2 * total);
}

/* The output's figures; it has the key. */
static int print(const tool_options *o, const unsigned char *key)
{
    const char *to = o->files[1];
    tool_options looks = *o;
    struct stat found;
    tool_source s;
    int code;

    looks.key_file = key ? to : NULL;
    if (key)
        memcpy(looks.key, key, sizeof looks.key);
    code = source_describe(&s, to, 0, NULL, &looks);
    key_forget(looks.key);
    key_forget(looks.new_key);
    if (code != SOUND)
        return code;
    if (stat(to, &found) != 0)
        return tool_fail(o, to, KVT_ERR_IO, "%s", strerror(errno));
    if (o->json) {
        json_begin(o->files[0], KVT_OK);
        printf(",\"output\":");
        json_string(to);
        printf(",\"n_tokens\":%" PRIu64 ",\"file_bytes\":%" PRIu64 "}\n", s.info.n_tokens,
               (uint64_t)found.st_size);
    } else {
        printf("%s: %" PRIu64 " tokens, %" PRIu64 " bytes\n", to, s.info.n_tokens,
               (uint64_t)found.st_size);
    }
    return SOUND;
}

int convert_run(const tool_options *o)
{
    const char *from = o->files[0], *to = o->files[1];
    char text[TOOL_TEXT] = "";
    request r;
    tool_source s;
    kvt_status status;
    int code;

    memset(&r, 0, sizeof r);
    code = output_apart(o, to, NULL);
    if (code == SOUND && output_check(to, o->force, text, sizeof text) != 0)
        code = tool_fail(o, to, KVT_ERR_IO, "%s", text);
    if (code == SOUND)
        code = input_check(o, from);
    if (code == SOUND)
        code = source_describe(&s, from, 0, NULL, o);
    if (code == SOUND)
        code = check(o, &s.info);
    if (code != SOUND)
        return code;
    r.load.struct_size = sizeof r.load;
    r.load.key = o->key_file ? o->key : NULL;
    r.load.progress = on_load;
    choose_layers(&r, o);
    r.save.struct_size = sizeof r.save;
    r.save.codec = o->codec;
    r.save.zstd_level = o->level;
    r.save.first_token = o->first;
    r.save.n_tokens = o->end == UINT64_MAX ? 0 : o->end - o->first;
    r.save.key = o->new_key_file ? o->new_key : o->decrypt ? NULL : r.load.key;
    r.save.progress = on_save;
    choose_types(&r, o, &s.info);
    output_note_signals();
    progress_begin(o, from, "converting");
    status = kvt_snapshot_convert(from, &r.load, to, &r.save, text, sizeof text);
    if (status != KVT_OK)
        return tool_fail(o, status == KVT_ERR_IO && strstr(text, to) ? to : from, status, "%s",
                         *text ? text : kvt_status_string(status));
    progress_end();
    return o->json || !o->quiet ? print(o, r.save.key) : SOUND;
}

int merge_run(const tool_options *o)
{
    return convert_run(o);
}
