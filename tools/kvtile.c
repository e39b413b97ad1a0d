/*
 * kvtile: inspect and verify snapshots from the command line.
 *
 *   kvtile info [--quick] [--json] FILE...     what a snapshot holds, and what it costs
 *   kvtile verify [--json] FILE...             read all of it and check everything
 *
 * Exit codes, the largest of all files: 0 sound, 1 damaged or not a snapshot, 2 usage,
 * 3 cannot be read.
 */
#include <kvtile/kvtile.h>

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { SOUND = 0, DAMAGED = 1, USAGE = 2, UNREADABLE = 3 };

static const char help[] =
    "kvtile: look at snapshots of a kvtile cache\n"
    "\n"
    "  kvtile info [--quick] [--json] FILE...   what a snapshot holds and what it costs;\n"
    "                                           --quick reads and checks the header only\n"
    "  kvtile verify [--json] FILE...           read all of it and check everything\n"
    "  kvtile --help | --version\n"
    "\n"
    "--json writes one JSON object a file and line. \"--\" ends the options.\n"
    "Exit code, the largest of all files: 0 sound, 1 damaged or not a snapshot, 2 usage,\n"
    "3 cannot be read.\n";

typedef struct options {
    int verify; /* the command; else info */
    int quick, json;
} options;

static int exit_code(kvt_status status)
{
    switch (status) {
    case KVT_OK: return SOUND;
    case KVT_ERR_FORMAT:
    case KVT_ERR_CORRUPT: return DAMAGED;
    default: return UNREADABLE;
    }
}

static const char *type_name(kvt_type type)
{
    switch (type) {
    case KVT_TYPE_F32: return "f32";
    case KVT_TYPE_F16: return "f16";
    case KVT_TYPE_I8: return "i8";
    case KVT_TYPE_I4: return "i4";
    case KVT_TYPE_I5: return "i5";
    default: return "?";
    }
}

static int is_v_in_k(const kvt_snapshot_group *group)
{
    return (group->flags & KVT_GROUP_V_IN_K) != 0;
}

static int rotates_v(const kvt_snapshot_group *group) /* by itself: V in K is rotated as K is */
{
    return group->v_type >= KVT_TYPE_I8 && !is_v_in_k(group) &&
           !(group->flags & KVT_GROUP_NO_V_ROTATION);
}

static void print_hex(const uint8_t *bytes, uint32_t n)
{
    uint32_t i;
    for (i = 0; i < n; i++)
        printf("%02x", bytes[i]);
}

/* A tag as it is where that is plain text, else as hex digits. */
static void print_tag(const kvt_snapshot_info *info)
{
    uint32_t i;
    for (i = 0; i < info->tag_bytes; i++)
        if (info->tag[i] < 0x20 || info->tag[i] > 0x7e || info->tag[i] == '"') {
            print_hex(info->tag, info->tag_bytes);
            return;
        }
    printf("\"%.*s\"", (int)info->tag_bytes, (const char *)info->tag);
}

/* A JSON string. Bytes that are no valid UTF-8 (file names may be anything) become U+FFFD. */
static void print_json_string(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;

    putchar('"');
    while (*p) {
        unsigned n = 0, i;
        if (*p == '"' || *p == '\\') {
            printf("\\%c", *p++);
            continue;
        }
        if (*p < 0x20 || *p == 0x7f) {
            printf("\\u%04x", *p++);
            continue;
        }
        if (*p < 0x80) {
            putchar(*p++);
            continue;
        }
        if (*p >= 0xc2 && *p <= 0xdf)
            n = 1;
        else if (*p >= 0xe0 && *p <= 0xef)
            n = 2;
        else if (*p >= 0xf0 && *p <= 0xf4)
            n = 3;
        for (i = 1; i <= n && (p[i] & 0xc0) == 0x80; i++)
            continue;
        /* overlong forms, surrogates and code points beyond U+10FFFF: by the second byte */
        if (n == 0 || i <= n || (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ||
            (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f)) {
            printf("\\ufffd");
            p++;
            continue;
        }
        (void)fwrite(p, 1, n + 1, stdout);
        p += n + 1;
    }
    putchar('"');
}

static void print_json(const char *path, const options *o, kvt_status status,
                       const kvt_snapshot_info *info, const char *text)
{
    uint32_t g;

    printf("{\"file\":");
    print_json_string(path);
    printf(",\"status\":%d,\"ok\":%s", (int)status, status == KVT_OK ? "true" : "false");
    if (status != KVT_OK) {
        printf(",\"error\":");
        print_json_string(text);
        printf("}\n");
        return;
    }
    printf(",\"version\":%" PRIu32 ",\"n_tokens\":%" PRIu64 ",\"n_blocks\":%" PRIu64
           ",\"fingerprint\":\"",
           info->version, info->n_tokens, info->n_blocks);
    print_hex(info->fingerprint, info->fingerprint_bytes);
    printf("\",\"tag\":\"");
    print_hex(info->tag, info->tag_bytes);
    printf("\",\"next_position\":%" PRId32 ",\"groups\":[", info->next_position);
    for (g = 0; g < info->n_groups; g++) {
        const kvt_snapshot_group *group = &info->groups[g];
        printf("%s{\"n_layers\":%" PRIu32 ",\"n_q_heads\":%" PRIu32 ",\"n_kv_heads\":%" PRIu32
               ",\"k_dim\":%" PRIu32 ",\"v_dim\":%" PRIu32 ",\"k_type\":\"%s\",\"v_type\":\"%s\""
               ",\"rotation\":%s,\"offset\":%s,\"v_rotation\":%s,\"v_in_k\":%s,\"rotation_seed\":"
               "\"%" PRIu64 "\",\"window_tokens\":%" PRIu32 ",\"sink_tokens\":%" PRIu32 "}",
               g ? "," : "", group->n_layers, group->n_q_heads, group->n_kv_heads, group->k_dim,
               group->v_dim, type_name(group->k_type), type_name(group->v_type),
               group->k_type == KVT_TYPE_I8 && !(group->flags & KVT_GROUP_NO_ROTATION) ? "true"
                                                                                       : "false",
               group->k_type >= KVT_TYPE_I8 && !(group->flags & KVT_GROUP_NO_OFFSET) ? "true"
                                                                                     : "false",
               rotates_v(group) ? "true" : "false", is_v_in_k(group) ? "true" : "false",
               group->rotation_seed, group->window_tokens, group->sink_tokens);
    }
    printf("]");
    if (!o->quick) {
        printf(",\"n_open_blocks\":%" PRIu64 ",\"n_checkpoints\":%" PRIu64, info->n_open_blocks,
               info->n_checkpoints);
        printf(",\"file_bytes\":%" PRIu64 ",\"stored_bytes\":%" PRIu64 ",\"native_bytes\":%" PRIu64,
               info->file_bytes, info->stored_bytes, info->native_bytes);
        if (info->n_tokens)
            printf(",\"ratio\":%.4f,\"bits_per_element\":%.4f",
                   (double)info->native_bytes / (double)info->stored_bytes,
                   8.0 * (double)info->stored_bytes / (double)info->n_elements);
    }
    printf("}\n");
}

static void print_table(const char *path, const options *o, const kvt_snapshot_info *info)
{
    uint32_t g;

    printf("%s\n", path);
    printf("  format version   %" PRIu32 "\n", info->version);
    printf("  fingerprint      ");
    if (info->fingerprint_bytes)
        print_hex(info->fingerprint, info->fingerprint_bytes);
    else
        printf("none");
    if (info->tag_bytes) {
        printf("\n  tag              ");
        print_tag(info);
    }
    printf("\n  tokens           %" PRIu64 " in %" PRIu64 " blocks", info->n_tokens,
           info->n_blocks);
    if (!o->quick)
        printf(", %" PRIu64 " of them open", info->n_open_blocks);
    if (info->next_position >= 0)
        printf("\n  next position    %" PRId32, info->next_position);
    if (!o->quick && info->n_checkpoints)
        printf("\n  checkpoints      %" PRIu64, info->n_checkpoints);
    printf("\n  group  layers  q heads  kv heads  k dim  v dim  K    V     K is                  V "
           "is      window\n");
    for (g = 0; g < info->n_groups; g++) {
        const kvt_snapshot_group *group = &info->groups[g];
        const char *how = "as it is";
        if (group->k_type == KVT_TYPE_I8) {
            static const char *const hows[] = {"rotated, with offset", "with offset", "rotated",
                                               "as it is"};
            how = hows[group->flags & (KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET)];
        } else if (group->k_type == KVT_TYPE_I4) {
            how = "with offset";
        }
        printf("  %5" PRIu32 "  %6" PRIu32 "  %7" PRIu32 "  %8" PRIu32 "  %5" PRIu32 "  %5" PRIu32
               "  %-3s  %-4s  %-20s  %-8s",
               g, group->n_layers, group->n_q_heads, group->n_kv_heads, group->k_dim, group->v_dim,
               type_name(group->k_type), is_v_in_k(group) ? "in K" : type_name(group->v_type), how,
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
    if (o->quick)
        return;
    printf("  file             %" PRIu64 " bytes\n", info->file_bytes);
    printf("  keys and values  %" PRIu64 " bytes, stored in %" PRIu64 "\n", info->native_bytes,
           info->stored_bytes);
    if (info->n_tokens) {
        printf("  compression      %.3f to 1\n",
               (double)info->native_bytes / (double)info->stored_bytes);
        printf("  bits per element %.3f as stored, %.3f in the cache\n",
               8.0 * (double)info->stored_bytes / (double)info->n_elements,
               8.0 * (double)info->native_bytes / (double)info->n_elements);
    }
}

static int show(const char *path, const options *o)
{
    kvt_snapshot_info info;
    char text[256] = "";
    kvt_status status;

    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    status = kvt_snapshot_inspect(path, !o->quick, &info, text, sizeof text);
    if (status != KVT_OK && !*text)
        (void)snprintf(text, sizeof text, "%s", kvt_status_string(status));
    if (o->json)
        print_json(path, o, status, &info, text);
    else if (status != KVT_OK)
        fprintf(stderr, "kvtile: %s: %s\n", path, text);
    else if (o->verify)
        printf("%s: sound, %" PRIu64 " tokens, %" PRIu64 " bytes\n", path, info.n_tokens,
               info.file_bytes);
    else
        print_table(path, o, &info);
    return exit_code(status);
}

static int usage(const char *what, const char *argument)
{
    fprintf(stderr, "kvtile: %s%s\nTry kvtile --help.\n", what, argument);
    return USAGE;
}

int main(int argc, char **argv)
{
    options o = {0, 0, 0};
    int i, worst = SOUND, files = 0, ended = 0;

    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--") == 0)
            break;
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            (void)fputs(help, stdout);
            return fflush(stdout) == 0 ? SOUND : UNREADABLE;
        }
        if (strcmp(argv[i], "--version") == 0) {
            printf("kvtile %s\n", kvt_version());
            return fflush(stdout) == 0 ? SOUND : UNREADABLE;
        }
    }
    if (argc < 2)
        return usage("no command", "");
    o.verify = strcmp(argv[1], "verify") == 0;
    if (!o.verify && strcmp(argv[1], "info") != 0)
        return usage("unknown command ", argv[1]);
    for (i = 2; i < argc; i++) { /* options may be anywhere before "--" */
        if (strcmp(argv[i], "--") == 0)
            break;
        if (strcmp(argv[i], "--json") == 0)
            o.json = 1;
        else if (strcmp(argv[i], "--quick") == 0 && !o.verify)
            o.quick = 1;
        else if (argv[i][0] == '-')
            return usage("unknown option ", argv[i]);
    }
    for (i = 2; i < argc; i++) {
        int code;
        if (!ended && strcmp(argv[i], "--") == 0) {
            ended = 1;
            continue;
        }
        if (!ended && argv[i][0] == '-')
            continue;
        files++;
        code = show(argv[i], &o);
        if (code > worst)
            worst = code;
    }
    if (!files)
        return usage("no file", "");
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "kvtile: cannot write to the standard output\n");
        return UNREADABLE;
    }
    return worst;
}
