/*
 * Scenes of stored prefixes: see store_scenes.h.
 */
#include "store_scenes.h"

#include <xxhash.h>

/* ---- geometries ---- */

typedef struct geometry {
    const char *name;
    kvt_type k_type, v_type;
    uint32_t k_dim, v_dim, flags, window, sinks, residual;
} geometry;

static const geometry geometries[N_GEOMETRIES] = {
    {"i8", KVT_TYPE_I8, KVT_TYPE_I8, 64, 64, 0, 0, 0, 0},
    {"i8, padded dims", KVT_TYPE_I8, KVT_TYPE_I8, 24, 40, 0, 0, 0, 0},
    {"i4", KVT_TYPE_I4, KVT_TYPE_I4, 64, 64, 0, 0, 0, 0},
    {"i4, i5, padded dims", KVT_TYPE_I4, KVT_TYPE_I5, 24, 40, 0, 0, 0, 0},
    {"f16", KVT_TYPE_F16, KVT_TYPE_F16, 32, 32, 0, 0, 0, 0},
    {"f32, i8", KVT_TYPE_F32, KVT_TYPE_I8, 16, 32, 0, 0, 0, 0},
    {"V in K", KVT_TYPE_I8, KVT_TYPE_I8, 96, 64, KVT_GROUP_V_IN_K, 0, 0, 0},
    {"window", KVT_TYPE_I8, KVT_TYPE_I8, 32, 32, 0, 150, 0, 0},
    {"window, sinks", KVT_TYPE_I4, KVT_TYPE_I4, 32, 32, 0, 100, 70, 0},
    {"window, f16", KVT_TYPE_F16, KVT_TYPE_F32, 32, 32, 0, 100, 0, 0},
    {"residual window", KVT_TYPE_I8, KVT_TYPE_I8, 32, 32, 0, 0, 0, 200},
    {"no residual window", KVT_TYPE_I4, KVT_TYPE_I4, 32, 32, 0, 0, 0, KVT_RESIDUAL_NONE},
};

const char *geometry_name(size_t i)
{
    return geometries[i].name;
}

kvt_group_config geometry_group(size_t i)
{
    const geometry *g = &geometries[i];
    kvt_group_config group = group_of(2, 2, 1, g->k_dim, g->v_dim, g->k_type, g->v_type);
    group.flags = g->flags;
    group.window_tokens = g->window;
    group.sink_tokens = g->sinks;
    group.residual_tokens = g->residual;
    return group;
}

/* ---- prompts and sequences ---- */

void make_prompt(int32_t *prompt, size_t n)
{
    for (size_t i = 0; i < n; i++)
        prompt[i] = (int32_t)i;
}

uint64_t sealed_tokens(const subject *s, uint64_t n)
{
    uint64_t least = n / 64 * 64;
    for (uint32_t g = 0; g < s->n_groups; g++) {
        const kvt_group_config *c = &s->groups[g];
        uint64_t residual = c->residual_tokens == 0                   ? KVT_RESIDUAL_TOKENS
                            : c->residual_tokens == KVT_RESIDUAL_NONE ? 0
                                                                      : c->residual_tokens;
        int seals = c->k_type >= KVT_TYPE_I8 || c->v_type >= KVT_TYPE_I8;
        uint64_t sealed = !seals ? least : n > residual ? (n - residual) / 64 * 64 : 0;
        least = sealed < least ? sealed : least;
    }
    return least;
}

kvt_seq *sequence_of(const subject *s, uint64_t n)
{
    kvt_seq *seq = seq_of(s);
    while (kvt_seq_length(seq) < n)
        grow(s, seq, n - kvt_seq_length(seq) < 40 ? (size_t)(n - kvt_seq_length(seq)) : 40);
    return seq;
}

kvt_seq *sequence_cut(const subject *s, uint64_t n)
{
    kvt_seq *seq = seq_of(s);
    grow(s, seq, MOST - 1);
    expect_ok(s->cache, kvt_seq_begin(seq, 1, NULL)); /* no truncate takes a sealing back now */
    expect_ok(s->cache, kvt_seq_abort(seq));
    expect_ok(s->cache, kvt_seq_truncate(seq, n));
    return seq;
}

kvt_prefix_options prefix_options(void)
{
    kvt_prefix_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    return options;
}

/* ---- values ---- */

value_map map_value(const unsigned char *data, size_t n)
{
    value_map map;

    memset(&map, 0, sizeof map);
    assert_true(n >= VALUE_ENTRIES);
    map.n_entries = get32(data + VALUE_N);
    map.digests = VALUE_ENTRIES + map.n_entries * ENTRY_BYTES;
    if (map.digests > n) {
        map.n_entries = 0;
        return map;
    }
    for (size_t i = 0; i < map.n_entries; i++)
        map.n_layers += get32(data + VALUE_ENTRIES + i * ENTRY_BYTES + ENTRY_LAYERS);
    map.sum = map.digests + (map.n_layers + (get32(data + VALUE_FLAGS) & 1)) * 16;
    map.head = (map.sum + 8 + 63) / 64 * 64;
    map.blob = map.head;
    for (size_t i = 0; i < map.n_entries; i++) {
        const unsigned char *entry = data + VALUE_ENTRIES + i * ENTRY_BYTES;
        map.blob += get32(entry + ENTRY_LAYERS) * (size_t)get64(entry + ENTRY_IMAGE);
    }
    return map;
}

void resum_value(unsigned char *data, size_t n)
{
    value_map map = map_value(data, n);
    if (map.n_layers < n && map.sum && map.sum + 8 <= n)
        put64(data + map.sum, XXH64(data, map.sum, 0));
}

static void put_digest(unsigned char *data, size_t room, size_t digest, size_t at, uint64_t image)
{
    XXH128_canonical_t canonical;
    if (digest + 16 > room || at > room || image > room - at)
        return;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data + at, (size_t)image));
    memcpy(data + digest, canonical.digest, 16);
}

void resign_value(unsigned char *data, size_t n)
{
    value_map map = map_value(data, n);
    size_t at = map.head, digest = map.digests;

    for (size_t i = 0; i < map.n_entries && map.n_layers < n; i++) {
        const unsigned char *entry = data + VALUE_ENTRIES + i * ENTRY_BYTES;
        const uint64_t image = get64(entry + ENTRY_IMAGE);
        for (uint32_t layer = 0; layer < get32(entry + ENTRY_LAYERS); layer++) {
            put_digest(data, n, digest, at, image);
            at += (size_t)image;
            digest += 16;
        }
    }
    if (get32(data + VALUE_FLAGS) & 1)
        put_digest(data, n, digest, at, get64(data + VALUE_BLOB));
    resum_value(data, n);
}

memory_value *find_value(memory_store *m, int checkpoint, uint64_t n_tokens, uint32_t group)
{
    for (size_t i = 0; i < m->n; i++) {
        const unsigned char *data = m->values[i].data;
        if (get64(data + VALUE_TOKENS) == n_tokens &&
            (int)get32(data + VALUE_FLAGS) == checkpoint &&
            (checkpoint || get32(data + VALUE_ENTRIES + ENTRY_GROUP) == group))
            return &m->values[i];
    }
    fail_msg("there is no value of %u tokens", (unsigned)n_tokens);
    return NULL;
}
