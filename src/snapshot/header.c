/*
 * The header of a snapshot: from a cache, to and from bytes, and compared with a cache.
 *
 * A header is taken in two reads, since a stream cannot be read ahead: the fixed part says how
 * long the rest is. Nothing in it is believed before the checksum holds, except the counts,
 * which are held to the format's limits first, so that the second read is a few kilobytes at most.
 */
#include "src/snapshot/format.h"

#include <stdio.h>

static size_t round_up8(size_t n)
{
    return kvt_round_up(n, 8);
}

void kvt_snap_header_make(const kvt_cache *cache, uint64_t n_tokens, kvt_snap_header *header)
{
    uint32_t g, layer, n = 0;

    memset(header, 0, sizeof *header);
    header->n_tokens = n_tokens;
    header->n_groups = cache->n_groups;
    header->n_layers = cache->n_layers;
    header->n_blocks = (uint64_t)kvt_rows(n_tokens) * cache->n_groups;
    for (g = 0; g < cache->n_groups; g++) {
        const kvt_group_config *config = &cache->groups[g].config;
        kvt_snapshot_group *group = &header->groups[g];
        group->n_layers = config->n_layers;
        group->n_q_heads = config->n_q_heads;
        group->n_kv_heads = config->n_kv_heads;
        group->k_dim = config->k_dim;
        group->v_dim = config->v_dim;
        group->k_type = config->k_type;
        group->v_type = config->v_type;
        group->flags = config->flags;
        group->rotation_seed = config->rotation_seed;
        group->window_tokens = config->window_tokens;
        group->sink_tokens = config->sink_tokens;
        for (layer = 0; cache->layers && layer < cache->n_layers; layer++)
            if (cache->layers[layer].group == g)
                header->layers[n++] = layer;
    }
    header->fingerprint_bytes = (uint32_t)cache->fingerprint_bytes;
    memcpy(header->fingerprint, cache->fingerprint, cache->fingerprint_bytes);
}

size_t kvt_snap_header_bytes(const kvt_snap_header *header)
{
    return KVT_SNAP_FIXED_BYTES + header->n_groups * (size_t)KVT_SNAP_GROUP_BYTES +
           round_up8(header->n_layers * (size_t)4) + round_up8(header->fingerprint_bytes) +
           KVT_SNAP_SUM_BYTES;
}

void kvt_snap_header_put(const kvt_snap_header *header, unsigned char *to)
{
    size_t bytes = kvt_snap_header_bytes(header);
    unsigned char *p = to + KVT_SNAP_FIXED_BYTES;
    uint32_t g, i;

    memset(to, 0, bytes);
    memcpy(to, KVT_SNAP_MAGIC, KVT_SNAP_MAGIC_BYTES);
    kvt_put32(to + 8, KVT_SNAP_VERSION);
    kvt_put32(to + 12, (uint32_t)bytes);
    kvt_put32(to + 16, KVT_BLOCK_TOKENS);
    kvt_put32(to + 20, KVT_TILE_TOKENS);
    kvt_put64(to + 24, header->n_tokens);
    kvt_put32(to + 32, header->n_groups);
    kvt_put32(to + 36, header->n_layers);
    kvt_put32(to + 40, header->fingerprint_bytes);
    kvt_put32(to + 44, header->flags);
    kvt_put64(to + 48, header->n_blocks);
    kvt_put64(to + 56, kvt_snap_layer_bytes(header));
    for (g = 0; g < header->n_groups; g++, p += KVT_SNAP_GROUP_BYTES) {
        const kvt_snapshot_group *group = &header->groups[g];
        kvt_put32(p, group->n_layers);
        kvt_put32(p + 4, group->n_q_heads);
        kvt_put32(p + 8, group->n_kv_heads);
        kvt_put32(p + 12, group->k_dim);
        kvt_put32(p + 16, group->v_dim);
        kvt_put32(p + 20, (uint32_t)group->k_type);
        kvt_put32(p + 24, (uint32_t)group->v_type);
        kvt_put32(p + 28, group->flags);
        kvt_put64(p + 32, group->rotation_seed);
        kvt_put32(p + 40, group->window_tokens);
        kvt_put32(p + 44, group->sink_tokens);
    }
    for (i = 0; i < header->n_layers; i++)
        kvt_put32(p + i * (size_t)4, header->layers[i]);
    p += round_up8(header->n_layers * (size_t)4);
    memcpy(p, header->fingerprint, header->fingerprint_bytes);
    kvt_put64(to + bytes - KVT_SNAP_SUM_BYTES, kvt_snap_sum(to, bytes - KVT_SNAP_SUM_BYTES));
}

kvt_status kvt_snap_header_begin(const kvt_snap_context *context, const char *name,
                                 const unsigned char *from, kvt_snap_header *header, size_t *bytes)
{
    memset(header, 0, sizeof *header);
    if (memcmp(from, KVT_SNAP_MAGIC, KVT_SNAP_MAGIC_BYTES) != 0)
        return kvt_snap_fail(context, KVT_ERR_FORMAT, "%snot a kvtile snapshot", name);
    if (kvt_get32(from + 8) != KVT_SNAP_VERSION)
        return kvt_snap_fail(context, KVT_ERR_FORMAT,
                             "%ssnapshot of format version %u, this build reads version %u", name,
                             (unsigned)kvt_get32(from + 8), KVT_SNAP_VERSION);
    header->n_tokens = kvt_get64(from + 24);
    header->n_groups = kvt_get32(from + 32);
    header->n_layers = kvt_get32(from + 36);
    header->fingerprint_bytes = kvt_get32(from + 40);
    header->n_blocks = kvt_get64(from + 48);
    if (header->n_tokens > KVT_MAX_TOKENS || header->n_groups < 1 ||
        header->n_groups > KVT_MAX_GROUPS || header->n_layers < 1 ||
        header->n_layers > KVT_MAX_LAYERS || header->fingerprint_bytes > KVT_MAX_FINGERPRINT)
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: a count of the header is beyond the limits",
                             name);
    *bytes = kvt_snap_header_bytes(header);
    if (kvt_get32(from + 12) != *bytes)
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: the header's size is %u, its counts make %zu",
                             name, (unsigned)kvt_get32(from + 12), *bytes);
    return KVT_OK;
}

#define GROUP_FLAGS                                                                                \
    (KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET | KVT_GROUP_V_IN_K | KVT_GROUP_NO_V_ROTATION)

const char *kvt_snap_group_fault(const kvt_snapshot_group *group)
{
    if (group->n_layers < 1 || group->n_layers > KVT_MAX_LAYERS)
        return "n_layers";
    if (group->n_q_heads < 1 || group->n_q_heads > KVT_MAX_HEADS)
        return "n_q_heads";
    if (group->n_kv_heads < 1 || group->n_kv_heads > KVT_MAX_HEADS ||
        group->n_q_heads % group->n_kv_heads)
        return "n_kv_heads";
    if (group->k_dim < 8 || group->k_dim > KVT_MAX_DIM || group->k_dim % 8)
        return "k_dim";
    if (group->v_dim < 8 || group->v_dim > KVT_MAX_DIM || group->v_dim % 8)
        return "v_dim";
    if ((uint32_t)group->k_type > KVT_TYPE_I4)
        return "k_type";
    if ((uint32_t)group->v_type > KVT_TYPE_I5)
        return "v_type";
    if (group->k_type == KVT_TYPE_I4 && (group->flags & KVT_GROUP_NO_OFFSET))
        return "flags";
    if (group->flags & ~GROUP_FLAGS)
        return "flags";
    if (group->sink_tokens && !group->window_tokens)
        return "sink_tokens";
    return kvt_v_in_k_fault(group->flags, group->k_dim, group->v_dim, group->k_type, group->v_type);
}

/* The groups' layer numbers: ascending in a group, together 0 .. n_layers - 1, each once. */
static int layers_sound(const kvt_snap_header *header)
{
    uint8_t seen[KVT_MAX_LAYERS] = {0};
    uint32_t g, i, n = 0;

    for (g = 0; g < header->n_groups; g++) {
        if (header->groups[g].n_layers > header->n_layers - n)
            return 0;
        for (i = 0; i < header->groups[g].n_layers; i++, n++) {
            uint32_t layer = header->layers[n];
            if (layer >= header->n_layers || seen[layer] ||
                (i > 0 && layer <= header->layers[n - 1]))
                return 0;
            seen[layer] = 1;
        }
    }
    return n == header->n_layers;
}

uint64_t kvt_snap_sink_rows(const kvt_snapshot_group *group)
{
    uint64_t rows = ((uint64_t)group->sink_tokens + KVT_TOKENS - 1) / KVT_TOKENS;
    if (!group->window_tokens)
        return 0;
    return rows == 0 && kvt_is_sealed_type(group->k_type) && !(group->flags & KVT_GROUP_NO_OFFSET)
               ? 1
               : rows;
}

uint32_t kvt_snap_own_entry(const kvt_snap_runs *runs, uint64_t row, uint32_t group)
{
    uint64_t before = 0;
    uint32_t g;

    for (g = 0; g < runs->n_groups; g++) {
        before += row >= runs->first[g]  ? row - (runs->first[g] - runs->sinks[g])
                  : row < runs->sinks[g] ? row
                                         : runs->sinks[g];
        before += g < group && kvt_snap_has_row(runs, row, g);
    }
    return (uint32_t)before;
}

/* Blocks that a group of a sequence of so many rows has at least. */
static uint64_t least_blocks(const kvt_snapshot_group *group, uint64_t rows)
{
    uint64_t sinks = kvt_snap_sink_rows(group) + 1; /* and the last row */
    return group->window_tokens && sinks < rows ? sinks : rows;
}

static int all_zero(const unsigned char *p, size_t bytes)
{
    unsigned char any = 0;
    size_t i;
    for (i = 0; i < bytes; i++)
        any |= p[i];
    return any == 0;
}

kvt_status kvt_snap_header_get(const kvt_snap_context *context, const char *name,
                               const unsigned char *from, size_t bytes, kvt_snap_header *header)
{
    const unsigned char *p = from + KVT_SNAP_FIXED_BYTES;
    size_t layers = round_up8(header->n_layers * (size_t)4);
    size_t fingerprint = round_up8(header->fingerprint_bytes);
    uint64_t least = 0;
    uint32_t g, i;

    if (!kvt_snap_same_sum(kvt_get64(from + bytes - KVT_SNAP_SUM_BYTES),
                           kvt_snap_sum(from, bytes - KVT_SNAP_SUM_BYTES)))
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: checksum of the header, offset 0 to %zu", name,
                             bytes);
    header->flags = kvt_get32(from + 44);
    if (header->flags & ~(KVT_SNAP_MOVED | KVT_SNAP_UNKEYED))
        return kvt_snap_fail(context, KVT_ERR_FORMAT,
                             "%ssnapshot with header flags 0x%x, which this build does not know",
                             name, (unsigned)header->flags);
    if ((header->flags & KVT_SNAP_UNKEYED) && !header->n_tokens)
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: flags of tokens, without a token", name);
    if (kvt_get32(from + 16) != KVT_BLOCK_TOKENS || kvt_get32(from + 20) != KVT_TILE_TOKENS)
        return kvt_snap_fail(context, KVT_ERR_FORMAT,
                             "%ssnapshot of blocks of %u and tiles of %u tokens, this build has %u "
                             "and %u",
                             name, (unsigned)kvt_get32(from + 16), (unsigned)kvt_get32(from + 20),
                             (unsigned)KVT_BLOCK_TOKENS, (unsigned)KVT_TILE_TOKENS);
    for (g = 0; g < header->n_groups; g++, p += KVT_SNAP_GROUP_BYTES) {
        kvt_snapshot_group *group = &header->groups[g];
        const char *fault;
        uint32_t k_type = kvt_get32(p + 20), v_type = kvt_get32(p + 24);

        group->n_layers = kvt_get32(p);
        group->n_q_heads = kvt_get32(p + 4);
        group->n_kv_heads = kvt_get32(p + 8);
        group->k_dim = kvt_get32(p + 12);
        group->v_dim = kvt_get32(p + 16);
        group->flags = kvt_get32(p + 28);
        group->rotation_seed = kvt_get64(p + 32);
        /* Before the conversion: a number that is no enumerator has no place in the enum. */
        if (k_type > KVT_TYPE_I5 || v_type > KVT_TYPE_I5)
            return kvt_snap_fail(
                context, KVT_ERR_FORMAT,
                "%ssnapshot of a storage type that this build does not know (group "
                "%u: K %u, V %u)",
                name, (unsigned)g, (unsigned)k_type, (unsigned)v_type);
        group->k_type = (kvt_type)k_type;
        group->v_type = (kvt_type)v_type;
        group->window_tokens = kvt_get32(p + 40);
        group->sink_tokens = kvt_get32(p + 44);
        if (group->flags & ~GROUP_FLAGS)
            return kvt_snap_fail(context, KVT_ERR_FORMAT,
                                 "%ssnapshot with flags 0x%x of group %u, which this build does "
                                 "not know",
                                 name, (unsigned)group->flags, (unsigned)g);
        fault = kvt_snap_group_fault(group);
        if (fault)
            return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                                 "%ssnapshot damaged: the header's group %u: %s", name, (unsigned)g,
                                 fault);
        least += least_blocks(group, kvt_rows(header->n_tokens));
    }
    if (header->n_blocks < least || header->n_blocks >= KVT_SNAP_ABSENT)
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: the header's number of blocks", name);
    for (i = 0; i < header->n_layers; i++)
        header->layers[i] = kvt_get32(p + i * (size_t)4);
    if (!layers_sound(header) ||
        !all_zero(p + header->n_layers * (size_t)4, layers - header->n_layers * (size_t)4))
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: the header's layer numbers", name);
    p += layers;
    memcpy(header->fingerprint, p, header->fingerprint_bytes);
    if (!all_zero(p + header->fingerprint_bytes, fingerprint - header->fingerprint_bytes))
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: padding of the header's fingerprint", name);
    if (kvt_get64(from + 56) != kvt_snap_layer_bytes(header))
        return kvt_snap_fail(context, KVT_ERR_CORRUPT,
                             "%ssnapshot damaged: the header's largest layer", name);
    return KVT_OK;
}

/* ---- comparison ---- */

static kvt_status differs(const kvt_cache *cache, uint32_t group, const char *field,
                          uint64_t stored, uint64_t here)
{
    return kvt_fail(cache, KVT_ERR_MISMATCH,
                    "snapshot of another model: %s of group %u is %llu, the cache's is %llu", field,
                    (unsigned)group, (unsigned long long)stored, (unsigned long long)here);
}

static const char *type_name(kvt_type type)
{
    static const char *const names[] = {"f32", "f16", "i8", "i4", "i5"};
    return names[type];
}

/* The first bytes of a fingerprint as hex digits. */
static void hex(const uint8_t *bytes, size_t n, char *text, size_t text_bytes)
{
    static const char digits[] = "0123456789abcdef";
    size_t i, shown = n < (text_bytes - 1) / 2 ? n : (text_bytes - 1) / 2;

    for (i = 0; i < shown; i++) {
        text[2 * i] = digits[bytes[i] >> 4];
        text[2 * i + 1] = digits[bytes[i] & 15];
    }
    text[2 * shown] = '\0';
}

kvt_status kvt_snap_group_match(const kvt_cache *cache, const kvt_snap_header *header, uint32_t g,
                                uint32_t of, uint32_t converts)
{
    const kvt_snapshot_group *group = &header->groups[g];
    const kvt_group_config *config = &cache->groups[of].config;

#define KVT_SNAP_COMPARE(field)                                                                    \
    do {                                                                                           \
        if (group->field != config->field)                                                         \
            return differs(cache, g, #field, group->field, config->field);                         \
    } while (0)
    KVT_SNAP_COMPARE(n_q_heads);
    KVT_SNAP_COMPARE(n_kv_heads);
    KVT_SNAP_COMPARE(k_dim);
    KVT_SNAP_COMPARE(v_dim);
    if (!converts && (group->k_type != config->k_type || group->v_type != config->v_type))
        return kvt_fail(cache, KVT_ERR_MISMATCH,
                        "snapshot of other storage: k_type, v_type of group %u are %s, %s, the "
                        "cache's are %s, %s",
                        (unsigned)g, type_name(group->k_type), type_name(group->v_type),
                        type_name(config->k_type), type_name(config->v_type));
    KVT_SNAP_COMPARE(flags);
    KVT_SNAP_COMPARE(rotation_seed);
    KVT_SNAP_COMPARE(window_tokens);
    KVT_SNAP_COMPARE(sink_tokens);
    return KVT_OK;
}

kvt_status kvt_snap_header_match_model(const kvt_cache *cache, const kvt_snap_header *header)
{
    if ((header->flags & KVT_SNAP_MOVED) && !cache->moves)
        return kvt_fail(cache, KVT_ERR_MISMATCH,
                        "snapshot of keys that have moved: RoPE of the cache's groups is not "
                        "described");
    if (header->fingerprint_bytes != cache->fingerprint_bytes ||
        memcmp(header->fingerprint, cache->fingerprint, cache->fingerprint_bytes) != 0) {
        char stored[33], here[33];
        hex(header->fingerprint, header->fingerprint_bytes, stored, sizeof stored);
        hex(cache->fingerprint, cache->fingerprint_bytes, here, sizeof here);
        return kvt_fail(cache, KVT_ERR_MISMATCH,
                        "snapshot of another model: its fingerprint is %s (%u bytes), the cache's "
                        "is %s (%u bytes)",
                        stored, (unsigned)header->fingerprint_bytes, here,
                        (unsigned)cache->fingerprint_bytes);
    }
    if (header->n_tokens > cache->max_tokens)
        return kvt_fail(
            cache, KVT_ERR_FULL, "the snapshot has %llu tokens, max_tokens of the cache is %llu",
            (unsigned long long)header->n_tokens, (unsigned long long)cache->max_tokens);
    return KVT_OK;
}

kvt_status kvt_snap_header_match(const kvt_cache *cache, const kvt_snap_header *header,
                                 uint32_t converts)
{
    uint32_t g, i, n = 0;

    if (header->n_groups != cache->n_groups)
        return kvt_fail(cache, KVT_ERR_MISMATCH,
                        "snapshot of another model: n_groups is %u, the cache's is %u",
                        (unsigned)header->n_groups, (unsigned)cache->n_groups);
    for (g = 0; g < header->n_groups; g++) {
        const kvt_snapshot_group *group = &header->groups[g];
        const kvt_group_config *config = &cache->groups[g].config;
        KVT_SNAP_COMPARE(n_layers);
    }
    /* So the file has as many layers as the cache: its numbers, which are below that, are here. */
    for (g = 0; g < header->n_groups; g++) {
        const kvt_snapshot_group *group = &header->groups[g];
        kvt_status status = kvt_snap_group_match(cache, header, g, g, converts);
        if (status != KVT_OK)
            return status;
        for (i = 0; i < group->n_layers; i++, n++) {
            const kvt_layer *layer = &cache->layers[header->layers[n]];
            /* Both ascend, and are as many: where all are of the group, they are the same ones. */
            if (layer->group != g)
                return kvt_fail(cache, KVT_ERR_MISMATCH,
                                "snapshot of another model: layer %u is in group %u, in the cache "
                                "it is in group %u",
                                (unsigned)header->layers[n], (unsigned)g, (unsigned)layer->group);
        }
    }
#undef KVT_SNAP_COMPARE
    return kvt_snap_header_match_model(cache, header);
}

/* ---- geometry, and the identity of a file ---- */

void kvt_snap_group_make(const kvt_snapshot_group *group, kvt_group *made)
{
    kvt_group_config config;

    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.n_layers = group->n_layers;
    config.n_q_heads = group->n_q_heads;
    config.n_kv_heads = group->n_kv_heads;
    config.k_dim = group->k_dim;
    config.v_dim = group->v_dim;
    config.k_type = group->k_type;
    config.v_type = group->v_type;
    config.flags = group->flags;
    config.rotation_seed = group->rotation_seed;
    config.window_tokens = group->window_tokens;
    config.sink_tokens = group->sink_tokens;
    kvt_group_make(&config, made);
}

size_t kvt_snap_group_image_bytes(const kvt_snapshot_group *group)
{
    size_t most = 0;
    uint32_t form;
    kvt_group made;

    kvt_snap_group_make(group, &made);
    for (form = 0; form < KVT_FORMS; form++)
        if (kvt_snap_has_form(group, form) && made.layouts[form].layer_bytes > most)
            most = made.layouts[form].layer_bytes;
    return most;
}

size_t kvt_snap_image_bytes(const kvt_snap_header *header)
{
    size_t most = 0;
    uint32_t g;

    for (g = 0; g < header->n_groups; g++) {
        size_t bytes = kvt_snap_group_image_bytes(&header->groups[g]);
        most = bytes > most ? bytes : most;
    }
    return most;
}

void kvt_snap_make_id(const unsigned char *header, size_t header_bytes, const unsigned char *index,
                      size_t index_bytes, unsigned char *id)
{
    kvt_snap_digester digester;
    size_t at;

    kvt_snap_digester_init(&digester);
    kvt_snap_digester_add(&digester, header, header_bytes);
    for (at = 0; at < index_bytes; at += KVT_SNAP_NOTE_BYTES) {
        unsigned char piece[4 + 8 + KVT_SNAP_ID_BYTES];
        memcpy(piece, index + at, 4);
        memcpy(piece + 4, index + at + 8, 8);
        memcpy(piece + 12, index + at + 32, KVT_SNAP_ID_BYTES);
        kvt_snap_digester_add(&digester, piece, sizeof piece);
    }
    kvt_snap_digester_end(&digester, id);
}
