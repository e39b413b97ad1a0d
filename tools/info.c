/*
 * kvtile info and verify: what snapshots hold and cost, and whether they are sound.
 */
#include "tool.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int is_v_in_k(const kvt_snapshot_group *group)
{
    return (group->flags & KVT_GROUP_V_IN_K) != 0;
}

static int rotates_k(const kvt_snapshot_group *group)
{
    return group->k_type == KVT_TYPE_I8 && !(group->flags & KVT_GROUP_NO_ROTATION);
}

static int has_offset(const kvt_snapshot_group *group)
{
    return group->k_type >= KVT_TYPE_I8 && !(group->flags & KVT_GROUP_NO_OFFSET);
}

static int rotates_v(const kvt_snapshot_group *group) /* by itself: V in K is rotated as K is */
{
    return group->v_type >= KVT_TYPE_I8 && !is_v_in_k(group) &&
           !(group->flags & KVT_GROUP_NO_V_ROTATION);
}

static void print_json_group(const tool_source *s, uint32_t g)
{
    const kvt_snapshot_group *group = &s->info.groups[g];
    const char *comma = "";
    uint32_t layer;

    printf("%s{\"n_layers\":%" PRIu32 ",\"layers\":[", g ? "," : "", group->n_layers);
    for (layer = 0; layer < s->info.n_layers; layer++)
        if (s->info.layer_groups[layer] == g) {
            printf("%s%" PRIu32, comma, layer);
            comma = ",";
        }
    printf("],\"n_q_heads\":%" PRIu32 ",\"n_kv_heads\":%" PRIu32 ",\"k_dim\":%" PRIu32
           ",\"v_dim\":%" PRIu32 ",\"k_type\":\"%s\",\"v_type\":\"%s\",\"rotation\":",
           group->n_q_heads, group->n_kv_heads, group->k_dim, group->v_dim,
           tool_type_name(group->k_type), tool_type_name(group->v_type));
    json_bool(rotates_k(group));
    printf(",\"offset\":");
    json_bool(has_offset(group));
    printf(",\"v_rotation\":");
    json_bool(rotates_v(group));
    printf(",\"v_in_k\":");
    json_bool(is_v_in_k(group));
    printf(",\"rotation_seed\":\"%" PRIu64 "\",\"window_tokens\":%" PRIu32
           ",\"sink_tokens\":%" PRIu32 "}",
           group->rotation_seed, group->window_tokens, group->sink_tokens);
}

static void print_json(const tool_source *s, const tool_pieces *pieces, const tool_options *o)
{
    const kvt_snapshot_info *info = &s->info;
    uint32_t g;

    json_begin(s->path, KVT_OK);
    printf(",\"version\":%" PRIu32 ",\"n_tokens\":%" PRIu64 ",\"n_blocks\":%" PRIu64
           ",\"fingerprint\":",
           info->version, info->n_tokens, info->n_blocks);
    json_hex(info->fingerprint, info->fingerprint_bytes);
    printf(",\"tag\":");
    json_hex(info->tag, info->tag_bytes);
    printf(",\"next_position\":%" PRId32 ",\"groups\":[", info->next_position);
    for (g = 0; g < info->n_groups; g++)
        print_json_group(s, g);
    printf("],\"encrypted\":");
    json_bool((int)info->encrypted);
    printf(",\"depth\":%" PRIu32 ",\"parent_name\":", info->depth);
    json_string(info->parent_name);
    printf(",\"parent_id\":");
    json_hex(info->parent_id, info->depth ? sizeof info->parent_id : 0);
    printf(",\"inherited_tokens\":%" PRIu64, info->inherited_tokens);
    if (!o->quick) {
        size_t i;
        printf(",\"snapshot_id\":");
        json_hex(info->snapshot_id, sizeof info->snapshot_id);
        printf(",\"inherited_blocks\":%" PRIu64 ",\"native_blocks\":%" PRIu64 ",\"pieces\":[",
               info->inherited_blocks, info->native_blocks);
        for (i = 0; i < pieces->n; i++) {
            printf("%s{\"name\":", i ? "," : "");
            json_string(pieces->list[i].name);
            printf(",\"bytes\":%" PRIu64 "}", pieces->list[i].bytes);
        }
        printf("]");
        printf(",\"n_open_blocks\":%" PRIu64 ",\"n_checkpoints\":%" PRIu64, info->n_open_blocks,
               info->n_checkpoints);
        printf(",\"file_bytes\":%" PRIu64 ",\"stored_bytes\":%" PRIu64 ",\"native_bytes\":%" PRIu64
               ",\"n_elements\":%" PRIu64,
               info->file_bytes, info->stored_bytes, info->native_bytes, info->n_elements);
        if (info->n_elements && info->stored_bytes)
            printf(",\"ratio\":%.4f,\"bits_per_element\":%.4f",
                   (double)info->native_bytes / (double)info->stored_bytes,
                   8.0 * (double)info->stored_bytes / (double)info->n_elements);
    }
    printf("}\n");
}

/* The layers of each group, neighbours as FIRST-LAST; where there are several groups. */
static void print_layers(const tool_source *s)
{
    uint32_t g, layer, end;

    for (g = 0; g < s->info.n_groups && s->info.n_groups > 1; g++) {
        const char *comma = "";
        printf("  layers of %" PRIu32 "      ", g);
        for (layer = 0; layer < s->info.n_layers; layer = end) {
            for (end = layer; end < s->info.n_layers && s->info.layer_groups[end] == g; end++)
                continue;
            if (end > layer + 1)
                printf("%s%" PRIu32 "-%" PRIu32, comma, layer, end - 1);
            else if (end > layer)
                printf("%s%" PRIu32, comma, layer);
            comma = end > layer ? ", " : comma;
            end += end == layer;
        }
        printf("\n");
    }
}

static void print_group(uint32_t g, const kvt_snapshot_group *group)
{
    static const char *const hows[2][2] = {{"as it is", "with offset"},
                                           {"rotated", "rotated, with offset"}};

    printf("  %5" PRIu32 "  %6" PRIu32 "  %7" PRIu32 "  %8" PRIu32 "  %5" PRIu32 "  %5" PRIu32
           "  %-3s  %-4s  %-20s  %-8s",
           g, group->n_layers, group->n_q_heads, group->n_kv_heads, group->k_dim, group->v_dim,
           tool_type_name(group->k_type), is_v_in_k(group) ? "in K" : tool_type_name(group->v_type),
           hows[rotates_k(group)][has_offset(group)],
           is_v_in_k(group)   ? "K's"
           : rotates_v(group) ? "rotated"
                              : "as it is");
    if (group->window_tokens)
        printf("  %" PRIu32 " tokens", group->window_tokens);
    else
        printf("  none");
    if (group->sink_tokens)
        printf(", %" PRIu32 " sinks", group->sink_tokens);
    printf("\n");
}

static void print_parent(const kvt_snapshot_info *info, const tool_options *o)
{
    if (!info->depth)
        return;
    printf("  parent           ");
    tool_print_tag((const uint8_t *)info->parent_name, (uint32_t)strlen(info->parent_name));
    printf(", ");
    tool_print_hex(info->parent_id, sizeof info->parent_id);
    printf("\n  inherited        %" PRIu64 " tokens", info->inherited_tokens);
    if (!o->quick)
        printf(", %" PRIu64 " blocks", info->inherited_blocks);
    printf("; parents: %" PRIu32 "\n", info->depth);
}

static void print_table(const tool_source *s, const tool_pieces *pieces, const tool_options *o)
{
    const kvt_snapshot_info *info = &s->info;
    uint32_t g;
    size_t i;

    tool_print_name(stdout, s->path);
    printf("\n");
    printf("  format version   %" PRIu32 "%s\n", info->version,
           info->encrypted ? ", encrypted" : "");
    if (!o->quick) {
        printf("  snapshot id      ");
        tool_print_hex(info->snapshot_id, sizeof info->snapshot_id);
        printf("\n");
    }
    print_parent(info, o);
    printf("  fingerprint      ");
    if (info->fingerprint_bytes)
        tool_print_hex(info->fingerprint, info->fingerprint_bytes);
    else
        printf("none");
    if (info->tag_bytes) {
        printf("\n  tag              ");
        tool_print_tag(info->tag, info->tag_bytes);
    }
    printf("\n  tokens           %" PRIu64 " in %" PRIu64 " blocks", info->n_tokens,
           info->n_blocks);
    if (!o->quick)
        printf(", %" PRIu64 " of them open", info->n_open_blocks);
    if (!o->quick && info->native_blocks)
        printf(", %" PRIu64 " can be mapped", info->native_blocks);
    if (info->next_position >= 0)
        printf("\n  next position    %" PRId32, info->next_position);
    if (!o->quick && info->n_checkpoints)
        printf("\n  checkpoints      %" PRIu64, info->n_checkpoints);
    printf("\n  group  layers  q heads  kv heads  k dim  v dim  K    V     K is                  V "
           "is      window\n");
    for (g = 0; g < info->n_groups; g++)
        print_group(g, &info->groups[g]);
    print_layers(s);
    if (o->quick)
        return;
    for (i = 0; i < pieces->n; i++) {
        printf("  piece            %" PRIu64 " bytes: ", pieces->list[i].bytes);
        tool_print_tag((const uint8_t *)pieces->list[i].name,
                       (uint32_t)strlen(pieces->list[i].name));
        printf("\n");
    }
    printf("  file             %" PRIu64 " bytes\n", info->file_bytes);
    printf("  keys and values  %" PRIu64 " bytes, stored in %" PRIu64 "\n", info->native_bytes,
           info->stored_bytes);
    if (info->n_elements && info->stored_bytes) {
        printf("  compression      %.3f to 1\n",
               (double)info->native_bytes / (double)info->stored_bytes);
        printf("  bits per element %.3f as stored, %.3f in the cache\n",
               8.0 * (double)info->stored_bytes / (double)info->n_elements,
               8.0 * (double)info->native_bytes / (double)info->n_elements);
    }
}

static int show(const char *path, const tool_options *o, int only_verify)
{
    tool_pieces pieces = {NULL, 0, 0};
    tool_source s;
    int code = source_describe(&s, path, !o->quick, &pieces, o);

    if (code == SOUND && o->json) {
        print_json(&s, &pieces, o);
    } else if (code == SOUND && !o->quiet && only_verify) {
        tool_print_name(stdout, path);
        printf(": sound, %" PRIu64 " tokens, %" PRIu64 " bytes\n", s.info.n_tokens,
               s.info.file_bytes);
    } else if (code == SOUND && !o->quiet) {
        print_table(&s, &pieces, o);
    }
    free(pieces.list);
    return code;
}

static int each(const tool_options *o, int only_verify)
{
    int i, code, worst = SOUND;

    for (i = 0; i < o->n_files; i++) {
        code = show(o->files[i], o, only_verify);
        if (code > worst)
            worst = code;
    }
    return worst;
}

int info_run(const tool_options *o)
{
    return each(o, 0);
}

int verify_run(const tool_options *o)
{
    return each(o, 1);
}
