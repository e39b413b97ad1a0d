/*
 * A stored value is another one: kvt_prefix_get takes it or refuses it, and does neither by halves.
 *
 * An input is 4 bytes of controls and what is done to one value of a store that is sound
 * otherwise: edits of 3 bytes each (offset, 2 bytes, and what the byte there becomes), or, as
 * CONTROL says, all of the value. Its checksums are then mended, so far as CONTROL does not say
 * that they stay.
 */
#include "fuzz.h"

#include <kvtile/store.h>
#include <xxhash.h>

enum {
    KINDS = 4,
    MOST = 20, /* values */
    TOKENS = 266,
    POINT = 230,
    HEAD = 4,
    /* control 0: */
    WHOLE = 1,      /* the rest is the value */
    CHECKPOINT = 2, /* of a checkpoint; else of the second row */
    PLACES = 4,
    KEEP_SUM = 8,
    KEEP_DIGESTS = 16,
    KEEP_HEAD = 32, /* key, size and number of tokens are the input's */
    /* 1: the kind; 2 and 3: bytes of a part, 0: all */
};

typedef struct value {
    kvt_store_key key;
    unsigned char *data;
    size_t n;
} value;

typedef struct shelf {
    kvt_cache *cache;
    kvt_seq *source, *to;
    value values[MOST];
    size_t n;
    uint32_t row_of[2]; /* the second row's value, and the checkpoint's */
    /* of an input: */
    size_t other, part_bytes;
    const unsigned char *data;
    size_t bytes;
    int places, removed;
} shelf;

static value *find(shelf *s, const kvt_store_key *key)
{
    for (size_t i = 0; i < s->n; i++)
        if (memcmp(&s->values[i].key, key, sizeof *key) == 0)
            return &s->values[i];
    return NULL;
}

static kvt_status on_put(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                         size_t n, size_t *n_put, kvt_store_error *error)
{
    shelf *s = user;
    (void)error;
    for (size_t i = 0; i < n; i++) {
        value *v = &s->values[s->n++];
        CHECK(s->n <= MOST);
        v->key = keys[i];
        v->data = malloc((size_t)values[i].bytes);
        CHECK(v->data);
        for (size_t part = 0; part < values[i].n_parts; part++) {
            memcpy(v->data + v->n, values[i].parts[part].data, values[i].parts[part].bytes);
            v->n += values[i].parts[part].bytes;
        }
    }
    *n_put = n;
    return KVT_OK;
}

static kvt_status on_get(void *user, const kvt_store_key *keys, size_t n,
                         const kvt_store_receiver *receiver, kvt_store_error *error)
{
    shelf *s = user;
    (void)error;
    for (size_t i = 0; i < n; i++) {
        const value *v = find(s, &keys[i]);
        const int other = v && s->bytes && v == &s->values[s->other];
        const unsigned char *data = other ? s->data : v ? v->data : NULL;
        const size_t all = other ? s->bytes : v ? v->n : 0;
        for (size_t at = 0, here; at < all; at += here) {
            void *to = NULL;
            here = s->part_bytes && s->part_bytes < all - at ? s->part_bytes : all - at;
            if (s->places)
                to = receiver->place(receiver->user, i, all, at, &here);
            if (to)
                memcpy(to, data + at, here);
            if (receiver->part(receiver->user, i, all, at, to ? to : data + at, here) !=
                KVT_STORE_MORE)
                break;
        }
    }
    return KVT_OK;
}

static kvt_status on_exists(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                            kvt_store_error *error)
{
    (void)error;
    for (size_t i = 0; i < n; i++)
        found[i] = find(user, &keys[i]) != NULL;
    return KVT_OK;
}

static kvt_status on_remove(void *user, const kvt_store_key *keys, size_t n, kvt_store_error *error)
{
    shelf *s = user;
    (void)error;
    CHECK(n == 1 && find(s, keys) == &s->values[s->other]);
    s->removed++;
    return KVT_OK;
}

static kvt_store store_of(shelf *s)
{
    kvt_store store;
    memset(&store, 0, sizeof store);
    store.struct_size = sizeof store;
    store.user = s;
    store.get = on_get;
    store.put = on_put;
    store.exists = on_exists;
    store.remove = on_remove;
    return store;
}

static void fill(shelf *s, uint32_t n, const kvt_group_config *group)
{
    static float values[TOKENS * 32];
    static int32_t ids[TOKENS];
    kvt_tensor rows = kvt_tensor_f32(values);
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        values[i] = (float)(i * 2654435761u % 4093) / 512.0f - 4.0f;
    for (int32_t i = 0; i < TOKENS; i++)
        ids[i] = i + (int32_t)kvt_seq_length(s->source);
    CHECK(kvt_seq_begin(s->source, n, NULL) == KVT_OK);
    for (uint32_t layer = 0; layer < group->n_layers; layer++)
        CHECK(kvt_append(s->source, layer, &rows, &rows) == KVT_OK);
    CHECK(kvt_seq_commit(s->source, ids) == KVT_OK);
}

static shelf *shelf_of(unsigned kind)
{
    static const kvt_type types[KINDS][2] = {{KVT_TYPE_I8, KVT_TYPE_I8},
                                             {KVT_TYPE_I4, KVT_TYPE_I5},
                                             {KVT_TYPE_F16, KVT_TYPE_F32},
                                             {KVT_TYPE_I8, KVT_TYPE_I4}};
    static shelf shelves[KINDS];
    shelf *s = &shelves[kind];
    kvt_store store = store_of(s);
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    kvt_prefix_options options;

    if (s->cache)
        return s;
    group.n_layers = 2;
    group.n_q_heads = group.n_kv_heads = 1;
    group.k_dim = group.v_dim = kind == 3 ? 24 : 16;
    group.k_type = types[kind][0];
    group.v_type = types[kind][1];
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = TOKENS;
    CHECK(kvt_cache_create(&config, &s->cache) == KVT_OK);
    CHECK(kvt_seq_create(s->cache, &s->source) == KVT_OK);
    CHECK(kvt_seq_create(s->cache, &s->to) == KVT_OK);
    fill(s, POINT, &group);
    CHECK(kvt_seq_checkpoint(s->source, "a state", 7) == KVT_OK);
    fill(s, TOKENS - POINT, &group);
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.checkpoints = KVT_PREFIX_CHECKPOINT;
    CHECK(kvt_prefix_put(&store, s->source, &options, NULL) == KVT_OK);
    for (uint32_t i = 0; i < s->n; i++) {
        if (load32(s->values[i].data + 12))
            s->row_of[1] = i;
        else if (load32(s->values[i].data + 56) == 128)
            s->row_of[0] = i;
    }
    return s;
}

/* Key, size and number of tokens; digests, as far as they lie in it; the checksum. */
static void mend(const shelf *s, unsigned char *data, size_t n, unsigned control)
{
    uint64_t layers = 0, digest, end, at;
    uint32_t entries;
    if (n < 80)
        return;
    if (!(control & KEEP_HEAD)) {
        const value *v = &s->values[s->other];
        memcpy(data, v->data, 12);
        memcpy(data + 16, &v->key, sizeof v->key);
        store64(data + 48, n);
        memcpy(data + 56, v->data + 56, 8);
    }
    entries = load32(data + 76);
    digest = 80 + 32 * (uint64_t)entries;
    if (digest > n)
        return;
    for (uint32_t i = 0; i < entries; i++)
        layers += load32(data + 80 + 32 * (size_t)i + 20);
    end = digest + 16 * (layers + (load32(data + 12) & 1));
    if (end + 8 > n)
        return;
    at = (end + 8 + 63) / 64 * 64;
    for (uint32_t i = 0; i < entries && !(control & KEEP_DIGESTS); i++)
        for (uint32_t layer = 0; layer < load32(data + 80 + 32 * (size_t)i + 20); layer++) {
            const uint64_t bytes = load64(data + 80 + 32 * (size_t)i + 24);
            XXH128_canonical_t canonical;
            if (at > n || bytes > n - at)
                break;
            XXH128_canonicalFromHash(&canonical, XXH3_128bits(data + at, (size_t)bytes));
            memcpy(data + digest, &canonical, 16);
            digest += 16;
            at += bytes;
        }
    if (!(control & KEEP_DIGESTS) && load32(data + 12) & 1 && at <= n &&
        load64(data + 64) <= n - at) {
        XXH128_canonical_t canonical;
        XXH128_canonicalFromHash(&canonical, XXH3_128bits(data + at, (size_t)load64(data + 64)));
        memcpy(data + digest, &canonical, 16);
    }
    if (!(control & KEEP_SUM))
        store64(data + end, XXH64(data, (size_t)end, 0));
}

int fuzz_store(const uint8_t *data, size_t size)
{
    static int32_t prompt[TOKENS];
    const uint64_t length = POINT;
    kvt_prefix_options options;
    kvt_prefix_result got;
    kvt_store store;
    unsigned char *made;
    uint64_t all;
    shelf *s;

    if (size <= HEAD || size > 1 << 16)
        return 0;
    s = shelf_of(data[1] % KINDS);
    store = store_of(s);
    s->other = s->row_of[data[0] & CHECKPOINT ? 1 : 0];
    s->places = (data[0] & PLACES) != 0;
    s->part_bytes = data[2] + 256u * data[3];
    s->bytes = data[0] & WHOLE ? size - HEAD : s->values[s->other].n;
    made = malloc(s->bytes);
    CHECK(made);
    memcpy(made, data[0] & WHOLE ? data + HEAD : s->values[s->other].data, s->bytes);
    for (size_t at = HEAD; !(data[0] & WHOLE) && at + 3 <= size; at += 3)
        made[(data[at] + 256u * data[at + 1]) % s->bytes] = data[at + 2];
    mend(s, made, s->bytes, data[0]);
    s->data = made;
    s->removed = 0;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    if (data[0] & CHECKPOINT) {
        options.checkpoints = KVT_PREFIX_CHECKPOINT;
        options.checkpoint_tokens = &length;
        options.n_checkpoint_tokens = 1;
    }
    for (int32_t i = 0; i < TOKENS; i++)
        prompt[i] = i;
    all = data[0] & CHECKPOINT ? POINT : data[1] % KINDS == 2 ? 256 : 192;
    CHECK(kvt_prefix_get(&store, s->to, prompt, TOKENS, &options, &got) == KVT_OK);
    CHECK(got.n_refused <= 1 && s->removed == (int)got.n_refused);
    CHECK(kvt_seq_length(s->to) == got.n_tokens);
    if (got.n_refused) {
        CHECK(got.n_tokens == (data[0] & CHECKPOINT ? 0 : 64));
    } else { /* what is taken is what a snapshot may hold, too */
        blob state;
        CHECK(got.n_tokens == all);
        state = state_of(s->to);
        CHECK(state.data);
        CHECK(kvt_seq_load_memory(s->to, state.data, state.n, NULL, NULL) == KVT_OK);
        free(state.data);
    }
    CHECK(kvt_seq_clear(s->to) == KVT_OK);
    free(made);
    s->bytes = 0;
    return 0;
}
