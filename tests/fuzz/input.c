/*
 * Inputs taken apart, and caches for them: of the geometry that the file's header says, as far as
 * it is small, so that a file of any geometry can be loaded.
 */
#include "fuzz.h"

#include <stdio.h>

enum { PLACES = 24, MOST_TOKENS = 40000, FILLED = 70 };

void input_open(input *in, const uint8_t *data, size_t size)
{
    size_t n, at, i;
    memset(in, 0, sizeof *in);
    in->n = 1;
    in->files[0] = data;
    in->bytes[0] = size;
    if (size < FUZZ_HEAD || data[0] != 'F')
        return;
    n = data[1] < 1 ? 1 : data[1] < FUZZ_FILES ? data[1] : FUZZ_FILES;
    at = FUZZ_HEAD + 4 * n;
    if (at > size)
        return;
    memcpy(in->controls, data + 2, FUZZ_CONTROLS);
    in->n = n;
    for (i = 0; i < n; i++) {
        size_t bytes = load32(data + FUZZ_HEAD + 4 * i);
        if (bytes > size - at || i + 1 == n)
            bytes = size - at;
        in->files[i] = data + at;
        in->bytes[i] = bytes;
        at += bytes;
    }
}

/* ---- memory ---- */

static void *meter_alloc(void *user, size_t bytes, size_t alignment)
{
    meter *m = user;
    void *memory = NULL;
    if (m->countdown && --m->countdown == 0)
        return NULL;
    if (posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment, bytes))
        return NULL;
    m->live += bytes;
    if (m->live > m->peak)
        m->peak = m->live;
    return memory;
}

static void meter_free(void *user, void *memory, size_t bytes)
{
    meter *m = user;
    m->live -= bytes;
    free(memory);
}

static void run_inline(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n_tasks)
{
    (void)user;
    while (n_tasks-- > 0)
        task(arg, n_tasks);
}

/* ---- caches ---- */

static uint64_t mix(uint64_t hash, const void *data, size_t n)
{
    const unsigned char *p = data;
    while (n--)
        hash = (hash ^ *p++) * 1099511628211u;
    return hash;
}

/* The groups of a header, where there are such; else of a cache that no file is of. */
static void take_groups(place *p, const unsigned char *header, size_t bytes, unsigned layers)
{
    size_t n = bytes >= 64 ? load32(header + 32) : 0, all = 0, g, i, at, elements = 0;
    uint32_t number = 0, old = 0, taken[64], n_taken = 0;
    int sound = n >= 1 && n <= KVT_MAX_GROUPS && 64 + 48 * n <= bytes;

    for (g = 0; sound && g < n; g++) {
        const unsigned char *from = header + 64 + 48 * g;
        kvt_group_config *group = &p->groups[g];
        *group = kvt_group_config_init();
        group->n_layers = load32(from);
        group->n_q_heads = load32(from + 4);
        group->n_kv_heads = load32(from + 8);
        group->k_dim = load32(from + 12);
        group->v_dim = load32(from + 16);
        group->k_type = (kvt_type)(load32(from + 20) % 5);
        group->v_type = (kvt_type)(load32(from + 24) % 5);
        group->flags = load32(from + 28);
        group->rotation_seed = load64(from + 32);
        group->window_tokens = load32(from + 40);
        group->sink_tokens = load32(from + 44);
        sound = group->n_layers <= 8 && group->n_q_heads <= 16 && group->n_kv_heads <= 8 &&
                group->k_dim <= 256 && group->v_dim <= 256;
        elements += (size_t)group->n_layers * group->n_kv_heads * (group->k_dim + group->v_dim);
        all += group->n_layers;
    }
    at = 64 + 48 * n;
    sound = sound && all && all <= 32 && elements <= 4096 && at + 4 * all <= bytes;
    for (i = 0; sound && i < all; i++) {
        taken[i] = load32(header + at + 4 * i);
        sound = taken[i] < all;
    }
    if (!sound) {
        p->groups[0] = kvt_group_config_init();
        p->groups[0].n_layers = p->groups[0].n_q_heads = p->groups[0].n_kv_heads = 1;
        p->groups[0].k_dim = p->groups[0].v_dim = 8;
        p->groups[0].k_type = p->groups[0].v_type = KVT_TYPE_I8;
        p->config.n_groups = 1;
        return;
    }
    /* Those of the layers that are chosen, as 0, 1, ... */
    for (g = 0, i = 0, n_taken = 0; g < n; g++) {
        kvt_group_config group = p->groups[g];
        uint32_t first = n_taken;
        for (old = 0; old < group.n_layers; old++, i++) {
            uint32_t layer = taken[i], below = 0;
            if (layers && !(layers >> layer % 8 & 1))
                continue;
            for (uint32_t other = 0; other < layer; other++)
                below += !layers || (layers >> other % 8 & 1);
            p->layers[n_taken++] = below;
        }
        group.layers = p->layers + first;
        group.n_layers = n_taken - first;
        if (group.n_layers)
            p->groups[number++] = group;
    }
    p->config.n_groups = number;
}

/* The tag of a file's sequence section. */
static void take_tag(place *p, const unsigned char *file, size_t n)
{
    size_t at = n >= 64 ? load32(file + 12) : n;
    while (at < n && n - at >= 40) {
        uint64_t bytes = load64(file + at + 8);
        if (load32(file + at) == 8) {
            size_t tag = load32(file + at + 36);
            if (tag <= KVT_MAX_TAG && tag <= n - at - 40) {
                memcpy(p->tag, file + at + 40, tag);
                p->tag_bytes = tag;
            }
            return;
        }
        if (bytes > n - at - 32)
            return;
        at += 32 + (size_t)bytes;
    }
}

static void place_close(place *p)
{
    kvt_seq_destroy(p->seq);
    kvt_seq_destroy(p->other);
    kvt_cache_destroy(p->cache);
    free(p->before);
    CHECK(p->meter.live == 0);
    memset(p, 0, sizeof *p);
}

static float value_of(uint32_t token, uint32_t i)
{
    uint32_t x = (token * 7919u + i * 31u) * 2654435761u;
    return ((float)(x >> 20) - 2048.0f) / 512.0f;
}

void place_append(place *p, kvt_seq *seq, uint32_t n)
{
    static float values[16 * 8 * 256];
    static const int32_t ids[16] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3};
    const uint32_t step = 16;
    for (uint32_t first = 0; first < n; first += step) {
        uint32_t here = n - first < step ? n - first : step;
        kvt_tensor rows = kvt_tensor_f32(values);
        if (kvt_seq_begin(seq, here, NULL) != KVT_OK)
            return;
        for (uint32_t g = 0; g < p->config.n_groups; g++) {
            const kvt_group_config *group = &p->groups[g];
            const int in_k = (group->flags & KVT_GROUP_V_IN_K) != 0;
            uint32_t most = group->k_dim > group->v_dim ? group->k_dim : group->v_dim;
            for (uint32_t i = 0; i < here * group->n_kv_heads * most; i++)
                values[i] = value_of(first, i);
            for (uint32_t i = 0; i < group->n_layers; i++)
                if (kvt_append(seq, group->layers ? group->layers[i] : i, &rows,
                               in_k ? NULL : &rows) != KVT_OK) {
                    (void)kvt_seq_abort(seq);
                    return;
                }
        }
        if (kvt_seq_commit(seq, ids) != KVT_OK) {
            (void)kvt_seq_abort(seq);
            return;
        }
    }
}

void place_reset(place *p)
{
    p->meter.countdown = 0;
    (void)kvt_seq_clear(p->seq);
    (void)kvt_seq_clear(p->other);
    /* A load has failed where the tag was another: it stays. */
    place_append(p, p->seq, FILLED / 2);
    (void)kvt_seq_checkpoint(p->seq, "state", 5);
    place_append(p, p->seq, FILLED / 2);
}

static int place_open(place *p, const input *in)
{
    static const float frequencies[4] = {1.0f, 0.25f, 0.0625f, 0.015625f};
    static const uint32_t residuals[4] = {0, KVT_RESIDUAL_NONE, 100, 300};
    const unsigned char *header = in->files[0];
    const unsigned cache = in->controls[CONTROL_CACHE], types = in->controls[CONTROL_TYPES];
    const size_t n = in->bytes[0];
    uint64_t tokens = n >= 64 ? load64(header + 24) : 0;
    size_t fingerprint = n >= 64 ? load32(header + 40) : 0, at, layers = 0;
    blob state;

    p->config = kvt_config_init();
    take_groups(p, header, n, in->controls[CONTROL_LAYERS]);
    if (!p->config.n_groups)
        return 0;
    for (uint32_t g = 0; g < p->config.n_groups; g++) {
        kvt_group_config *group = &p->groups[g];
        group->residual_tokens = residuals[cache & 3];
        group->fine_tokens = cache & 4 ? KVT_FINE_NONE : 0;
        if (types) { /* another type where the group can have it */
            kvt_group_config as_is = *group;
            kvt_config config = kvt_config_init();
            uint64_t bytes;
            group->k_type = (kvt_type)(types % 4);
            group->v_type = (kvt_type)(types / 4 % 5);
            if (group->flags & KVT_GROUP_V_IN_K)
                group->v_type = group->k_type;
            config.groups = group;
            config.n_groups = 1;
            config.max_tokens = 64;
            as_is.layers = group->layers;
            group->layers = NULL;
            if (kvt_memory_forecast(&config, 1, 1, &bytes) != KVT_OK)
                *group = as_is;
            group->layers = as_is.layers;
        }
        if (!(cache & 32) && n >= 64) {
            group->rope_pairing = KVT_ROPE_NEIGHBOURS;
            group->rope_dims = 8; /* not those of V that is in K */
            group->rope_first_dim = group->flags & KVT_GROUP_V_IN_K ? group->v_dim : 0;
            if (group->rope_first_dim + 8 > group->k_dim)
                group->rope_pairing = KVT_ROPE_NONE, group->rope_dims = group->rope_first_dim = 0;
            group->rope_inverse_frequencies = group->rope_dims ? frequencies : NULL;
        }
    }
    p->config.groups = p->groups;
    p->config.n_threads = cache & 8 ? 3 : 0;
    p->config.executor.run = cache & 8 ? run_inline : NULL;
    p->config.executor.n_threads = cache & 8 ? 3 : 0;
    tokens = tokens > MOST_TOKENS ? MOST_TOKENS : tokens;
    p->config.max_tokens = cache & 64 ? FILLED : tokens + 512;
    for (uint32_t g = 0; n >= 64 && g < load32(header + 32) && 112 + 48 * (size_t)g <= n; g++)
        layers += load32(header + 64 + 48 * g);
    if (fingerprint && fingerprint <= KVT_MAX_FINGERPRINT && layers < 256) {
        at = 64 + 48 * (size_t)load32(header + 32) + (4 * layers + 7) / 8 * 8;
        if (load32(header + 32) <= KVT_MAX_GROUPS && at + fingerprint <= n) {
            p->config.fingerprint = header + at;
            p->config.fingerprint_bytes = fingerprint;
        }
    }
    if (cache & 16) {
        uint64_t bytes;
        if (kvt_memory_forecast(&p->config, 2, 130, &bytes) != KVT_OK)
            return 0;
        p->config.memory_budget_bytes = bytes;
    }
    p->config.allocator.user = &p->meter;
    p->config.allocator.alloc = meter_alloc;
    p->config.allocator.free = meter_free;
    if (kvt_cache_create(&p->config, &p->cache) != KVT_OK)
        return 0;
    p->config.fingerprint = NULL; /* of the input's */
    p->config.fingerprint_bytes = 0;
    CHECK(kvt_seq_create(p->cache, &p->seq) == KVT_OK);
    CHECK(kvt_seq_create(p->cache, &p->other) == KVT_OK);
    if (!(cache & 128))
        take_tag(p, header, n);
    CHECK(kvt_seq_set_tag(p->seq, p->tag, p->tag_bytes) == KVT_OK);
    CHECK(kvt_seq_set_tag(p->other, p->tag, p->tag_bytes) == KVT_OK);
    place_reset(p);
    state = state_of(p->seq);
    CHECK(state.data);
    p->before = state.data;
    p->n_before = state.n;
    return 1;
}

static uint64_t key_of(const input *in)
{
    const size_t n = in->bytes[0];
    size_t header = n >= 64 ? load32(in->files[0] + 12) : 0;
    place tag;
    uint64_t key = mix(14695981039346656037u, in->controls, 0);
    key = mix(key, &in->controls[CONTROL_CACHE], 3);
    memset(&tag, 0, sizeof tag);
    take_tag(&tag, in->files[0], n);
    key = mix(key, tag.tag, tag.tag_bytes);
    if (header > 72 && header <= n && header < 8192) {
        key = mix(key, in->files[0] + 24, 24); /* without the number of blocks */
        key = mix(key, in->files[0] + 64, header - 72);
    }
    return key | 1;
}

place *place_of(const input *in)
{
    static place places[PLACES];
    static unsigned next;
    uint64_t key = key_of(in);
    place *p;

    for (unsigned i = 0; i < PLACES; i++)
        if (places[i].key == key)
            return &places[i];
    p = &places[next++ % PLACES];
    if (p->cache)
        place_close(p);
    if (!place_open(p, in)) { /* then one that is of none */
        input none = *in;
        if (p->cache)
            place_close(p);
        none.bytes[0] = 0;
        memset(none.controls, 0, sizeof none.controls);
        memset(p, 0, sizeof *p);
        CHECK(place_open(p, &none));
    }
    p->key = key;
    return p;
}
