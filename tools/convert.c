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
    uint64_t n_tokens; /* of the input */
    int saving;        /* the input is read */
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

/* Whether a layer of the group is asked for. */
static int is_chosen(const tool_options *o, const kvt_snapshot_info *info, uint32_t group)
{
    uint32_t layer;

    for (layer = 0; layer < info->n_layers; layer++)
        if (info->layer_groups[layer] == group && (!o->has_layers || o->layers[layer]))
            return 1;
    return 0;
}

/* Of the groups that have a layer of the output, in order. */
static void choose_types(request *r, const tool_options *o, const kvt_snapshot_info *info)
{
    uint32_t g, n = 0;

    if (!o->has_k_type && !o->has_v_type)
        return;
    for (g = 0; g < info->n_groups; g++) {
        const kvt_snapshot_group *group = &info->groups[g];
        if (!is_chosen(o, info, g))
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

static int on_save(void *saving, uint64_t done, uint64_t total)
{
    *(int *)saving = 1;
    return progress_step(NULL, total + done, 2 * total);
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
        tool_print_name(stdout, to);
        printf(": %" PRIu64 " tokens, %" PRIu64 " bytes\n", s.info.n_tokens,
               (uint64_t)found.st_size);
    }
    return SOUND;
}

/*
 * A window has released tokens that the range needs. Which ranges can be had shows in the loaded
 * sequence alone.
 */
static int refuse_range(const tool_options *o, const char *text)
{
    tool_source s;
    uint64_t from = 0, gone, there;
    uint32_t g;
    int code = source_load(&s, o->files[0], NULL, NULL, o);

    for (g = 0; code == SOUND && o->first && g < s.info.n_groups; g++)
        if (is_chosen(o, &s.info, g) && source_released(&s, g, &gone, &there) == KVT_OK &&
            there > from)
            from = there;
    if (code == SOUND && !o->first)
        for (from = s.info.n_tokens; from && kvt_seq_reachable(s.seq, from - 1) == from - 1;)
            from--;
    if (code == SOUND && from <= (o->first ? o->first : o->end)) /* it is not the range */
        code = tool_refuse(o, s.path, "%s", text);
    else if (code == SOUND && o->first)
        code = tool_refuse(o, s.path,
                           "a window has released tokens from %" PRIu64 " on (--tokens %" PRIu64
                           ": has those behind)",
                           o->first, from);
    else if (code == SOUND)
        code = tool_refuse(o, s.path,
                           "a window has released tokens that the first %" PRIu64
                           " need (--tokens :%" PRIu64 " or more can be had)",
                           o->end, from);
    source_release(&s);
    return code;
}

/*
 * Whether an error of a file is the output's. It ends with the file's name; where that is cut, and
 * the beginning could be of either, by what the save has done before its first progress.
 */
static int is_of_output(const tool_options *o, const request *r, kvt_status status,
                        const char *text)
{
    static const char *const calls[] = {"opening", "creating", "lstat", "following", "fchmod",
                                        "write",   "fsync",    "close", "rename"};
    int input = tool_names(text, o->files[0]), output = tool_names(text, o->files[1]);
    size_t i;

    if (output == 2 || input == 2)
        return output == 2;
    if (status == KVT_ERR_IO && r->saving)
        return 1;
    for (i = 0; output && input && i < sizeof calls / sizeof calls[0]; i++)
        if (strncmp(text, calls[i], strlen(calls[i])) == 0)
            return 1;
    return output && !input;
}

static int fail_convert(const tool_options *o, const request *r, kvt_status status, char *text)
{
    static const char in_place[] = ", or save with in_place"; /* advice that is the library's */
    const char *file = o->files[is_of_output(o, r, status, text)];
    char *at;

    (void)tool_cut_name(text, file);
    at = strstr(text, in_place);
    if (at)
        memmove(at, at + strlen(in_place), strlen(at + strlen(in_place)) + 1);
    if (!*text)
        return tool_fail(o, file, status, "%s", kvt_status_string(status));
    if (status == KVT_ERR_STATE && (o->first || o->end < r->n_tokens))
        return refuse_range(o, text);
    if (status == KVT_ERR_STATE || status == KVT_ERR_ARG)
        return tool_refuse(o, file, "%s", text);
    return tool_fail(o, file, status, "%s", text);
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
    code = output_apart(o, to, NULL); /* the library sees to the parents of the input */
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
    r.save.progress_user = &r.saving;
    choose_types(&r, o, &s.info);
    r.n_tokens = s.info.n_tokens;
    output_note_signals();
    progress_begin(o, from, "converting");
    status = kvt_snapshot_convert(from, &r.load, to, &r.save, text, sizeof text);
    if (status != KVT_OK)
        return fail_convert(o, &r, status, text);
    progress_end();
    return o->json || !o->quiet ? print(o, r.save.key) : SOUND;
}

int merge_run(const tool_options *o)
{
    return convert_run(o);
}
