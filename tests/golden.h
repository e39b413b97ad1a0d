/*
 * The contents of the golden snapshots. Shared by the program that made them, the test that loads
 * them, and the program that dumps one for tests/read_snapshot.py.
 */
#ifndef KVT_TEST_GOLDEN_H
#define KVT_TEST_GOLDEN_H

#include <kvtile/kvtile.h>

#include <stdlib.h>
#include <string.h>

#define GOLDEN_COUNT 25
#define GOLDEN_MOST 512 /* tokens */
#define GOLDEN_LAYERS 3
#define GOLDEN_POINTS 4

typedef struct golden {
    const char *name;
    kvt_type k_type, v_type;
    uint32_t flags, n_groups; /* 2: a second group holds layer 1 */
    uint32_t kv_heads, k_dim, v_dim;
    uint32_t residual;                     /* of the first group; the second's is 100 */
    uint32_t step, peak, cut_at, n_tokens; /* to peak in steps, truncated, in steps to n_tokens */
    /* 1: open rows with scales above 1, and K of a token in 70 far away; 2: see golden_sink. */
    uint32_t large;
    uint32_t window, sinks;         /* of the first group */
    uint32_t points[GOLDEN_POINTS]; /* checkpoints with a blob; 0: none */
    const char *tag;
    int32_t next;       /* position; 0: not set */
    uint32_t removed;   /* so many tokens from the 64th on, at the end; 20 come behind */
    uint32_t cut_point; /* 1: a checkpoint where it was truncated to */
    uint32_t codec;     /* KVT_CODEC_; KVT_CODEC_RAW: a piece is saved, too */
    const char *parent; /* the file of which this is a delta, or NULL */
} golden;

/* The piece. */
#define GOLDEN_PIECE "note"
#define GOLDEN_PIECE_TEXT "of the caller"

/* The last fields; plain: neither window, checkpoints, tag nor next position. */
#define GOLDEN_PLAIN 0, 0, {0}, NULL, 0, 0, 0, KVT_CODEC_AUTO, NULL
#define GOLDEN_NATIVE 0, 0, {0}, NULL, 0, 0, 0, KVT_CODEC_RAW, NULL
#define GOLDEN_DELTA(codec, of) 0, 0, {0}, NULL, 0, 0, 0, codec, of
#define GOLDEN_WINDOW 90, 70, {0}, NULL, 0, 0, 0, KVT_CODEC_ZSTD, NULL
#define GOLDEN_CHECKPOINTS(codec) 50, 0, {100, 330, 345, 410}, NULL, 0, 0, 0, codec, NULL
#define GOLDEN_TAG 0, 0, {0}, "lora: 7", 77, 0, 0, KVT_CODEC_AUTO, NULL
#define GOLDEN_MOVED 0, 0, {0}, NULL, 0, 64, 0, KVT_CODEC_AUTO, NULL
#define GOLDEN_CUT_POINT 50, 0, {100, 345, 380}, NULL, 0, 0, 1, KVT_CODEC_AUTO, NULL

static const golden golden_all[GOLDEN_COUNT] = {
    /* Sealed, open and partial blocks. */
    {"i8", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 2, 24, 16, 0, 20, 300, 300, 300, 0, GOLDEN_PLAIN},
    /* Nothing but sealed blocks, the last one truncated. */
    {"i8-plain", KVT_TYPE_I8, KVT_TYPE_I8, 11, 1, 1, 24, 8, 100, 17, 310, 170, 180, 0,
     GOLDEN_PLAIN},
    {"i8-large", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 1, 16, 32, KVT_RESIDUAL_NONE, 31, 150, 150, 150, 1,
     GOLDEN_PLAIN},
    /* Rows without the offset: in the sealed block, and in the open one of layer 0. */
    {"i8-sink", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 1, 16, 8, KVT_RESIDUAL_NONE, 31, 90, 90, 90, 2,
     GOLDEN_PLAIN},
    {"f16-f32", KVT_TYPE_F16, KVT_TYPE_F32, 0, 1, 1, 8, 24, 0, 66, 66, 66, 66, 0, GOLDEN_PLAIN},
    /* The groups differ in which blocks are open. */
    {"groups", KVT_TYPE_I8, KVT_TYPE_F16, 1, 2, 1, 16, 32, 0, 9, 200, 200, 200, 0, GOLDEN_PLAIN},
    {"empty", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 2, 64, 64, 0, 1, 0, 0, 0, 0, GOLDEN_PLAIN},
    /* A sealed block that was truncated and filled up, then an open one. */
    {"v-in-k", KVT_TYPE_I8, KVT_TYPE_I8, KVT_GROUP_V_IN_K, 1, 2, 48, 32, KVT_RESIDUAL_NONE, 30, 200,
     100, 160, 0, GOLDEN_PLAIN},
    /* Released blocks between the sinks and the window. */
    {"window", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 1, 24, 8, 0, 20, 400, 400, 400, 0, GOLDEN_WINDOW},
    /* Checkpoints: of what is released and sealed since, in one row, and at the end. */
    {"checkpoints", KVT_TYPE_I8, KVT_TYPE_F16, 0, 2, 1, 16, 8, KVT_RESIDUAL_NONE, 25, 420, 390, 410,
     0, GOLDEN_CHECKPOINTS(KVT_CODEC_AUTO)},
    {"tag", KVT_TYPE_F16, KVT_TYPE_F16, 0, 1, 1, 8, 8, 0, 7, 30, 30, 30, 0, GOLDEN_TAG},
    /* Keys that have moved, and such that have not in the same block. */
    {"moved", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 1, 16, 8, 0, 40, 300, 300, 300, 0, GOLDEN_MOVED},
    /* Fine, sealed, and a row that was truncated and is open again, with tokens behind it. */
    {"i4", KVT_TYPE_I4, KVT_TYPE_I4, 0, 1, 2, 24, 40, KVT_RESIDUAL_NONE, 20, 300, 150, 170, 0,
     GOLDEN_PLAIN},
    /* Two open rows, one of them again, some tokens of which have no offset. */
    {"i4-i5", KVT_TYPE_I4, KVT_TYPE_I5, 0, 1, 2, 40, 24, 0, 19, 400, 300, 331, 2, GOLDEN_PLAIN},
    /* The last row is sealed and was truncated: 11 tokens. V is not rotated. */
    {"i4-i5-cut", KVT_TYPE_I4, KVT_TYPE_I5, 8, 1, 2, 24, 40, KVT_RESIDUAL_NONE, 23, 310, 203, 203,
     0, GOLDEN_PLAIN},
    /* The same, filled up: K of 8 bits is not opened again. */
    {"i8-i4", KVT_TYPE_I8, KVT_TYPE_I4, 0, 1, 2, 40, 24, KVT_RESIDUAL_NONE, 20, 310, 170, 183, 0,
     GOLDEN_PLAIN},
    /* A checkpoint of a row that was truncated, then open again, and has been sealed anew. */
    {"i4-checkpoints", KVT_TYPE_I4, KVT_TYPE_I4, 0, 2, 1, 16, 24, KVT_RESIDUAL_NONE, 25, 420, 370,
     410, 0, GOLDEN_CUT_POINT},
    /* The same contents in native sections. */
    {"i8-native", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 2, 24, 16, 0, 20, 300, 300, 300, 0,
     GOLDEN_NATIVE},
    {"f16-f32-native", KVT_TYPE_F16, KVT_TYPE_F32, 0, 1, 1, 8, 24, 0, 66, 66, 66, 66, 0,
     GOLDEN_NATIVE},
    {"v-in-k-native", KVT_TYPE_I8, KVT_TYPE_I8, KVT_GROUP_V_IN_K, 1, 2, 48, 32, KVT_RESIDUAL_NONE,
     30, 200, 100, 160, 0, GOLDEN_NATIVE},
    {"checkpoints-native", KVT_TYPE_I8, KVT_TYPE_F16, 0, 2, 1, 16, 8, KVT_RESIDUAL_NONE, 25, 420,
     390, 410, 0, GOLDEN_CHECKPOINTS(KVT_CODEC_RAW)},
    {"i4-native", KVT_TYPE_I4, KVT_TYPE_I4, 0, 1, 2, 24, 40, KVT_RESIDUAL_NONE, 20, 300, 150, 170,
     0, GOLDEN_NATIVE},
    {"i4-i5-native", KVT_TYPE_I4, KVT_TYPE_I5, 0, 1, 2, 40, 24, 0, 19, 400, 300, 331, 2,
     GOLDEN_NATIVE},
    /* What "i8" lacks of a longer sequence, and what that one lacks of a longer one. */
    {"delta", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 2, 24, 16, 0, 20, 360, 360, 360, 0,
     GOLDEN_DELTA(KVT_CODEC_AUTO, "i8.kvt")},
    {"delta-again", KVT_TYPE_I8, KVT_TYPE_I8, 0, 1, 2, 24, 16, 0, 20, 400, 400, 400, 0,
     GOLDEN_DELTA(KVT_CODEC_RAW, "delta.kvt")},
};

/* k_dim, v_dim, kv heads of a group. */
static inline void golden_group_of(const golden *g, uint32_t group, uint32_t *dims)
{
    dims[0] = group ? 8 : g->k_dim;
    dims[1] = group ? 16 : g->v_dim;
    dims[2] = group ? 2 : g->kv_heads;
}

static inline kvt_cache *golden_cache(const golden *g)
{
    static const uint32_t split[2][GOLDEN_LAYERS] = {{0, 2, 0}, {1, 0, 0}};
    static const float frequencies[4] = {1.0f, 0.25f, 0.0625f, 0.015625f};
    kvt_group_config groups[2];
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    uint32_t i, dims[3];

    for (i = 0; i < g->n_groups; i++) {
        golden_group_of(g, i, dims);
        groups[i] = kvt_group_config_init();
        groups[i].n_layers = g->n_groups == 1 ? GOLDEN_LAYERS : 2 - i;
        groups[i].n_q_heads = 2 * dims[2];
        groups[i].n_kv_heads = dims[2];
        groups[i].k_dim = dims[0];
        groups[i].v_dim = dims[1];
        groups[i].k_type = i ? KVT_TYPE_F32 : g->k_type;
        groups[i].v_type = i ? KVT_TYPE_I8 : g->v_type;
        groups[i].flags = i ? 0 : g->flags;
        groups[i].layers = g->n_groups == 1 ? NULL : split[i];
        groups[i].rotation_seed = 2026;
        groups[i].residual_tokens = i ? 100 : g->residual;
        groups[i].window_tokens = i ? 0 : g->window;
        groups[i].sink_tokens = i ? 0 : g->sinks;
        if (g->removed) {
            groups[i].rope_pairing = KVT_ROPE_NEIGHBOURS;
            groups[i].rope_dims = 8;
            groups[i].rope_inverse_frequencies = frequencies;
        }
    }
    config.groups = groups;
    config.n_groups = g->n_groups;
    config.max_tokens = GOLDEN_MOST;
    config.fingerprint = "golden";
    config.fingerprint_bytes = 6;
    return kvt_cache_create(&config, &cache) == KVT_OK ? cache : NULL;
}

/*
 * A multiple of 1/64 in about -8 .. 8, keys of some dims offset by 12; values of layer 0 repeat
 * every 7 tokens, so that each filter is the best one somewhere.
 */
static inline float golden_value(uint32_t layer, uint32_t token, uint32_t i, int is_k)
{
    uint32_t row = layer == 0 && !is_k ? token % 7 : token;
    uint32_t x = (layer * 1000003u + row * 7919u + i * 31u + (is_k ? 17u : 0u)) * 2654435761u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    return ((float)(x & 511u) + (float)(x >> 9 & 511u) - 511.0f) / 64.0f +
           (is_k && i % 11 == 0 ? 12.0f : 0.0f);
}

static inline uint32_t golden_layer_group(const golden *g, uint32_t layer)
{
    return g->n_groups == 2 && layer == 1;
}

/*
 * A first key that is an attention sink. Of the others of its block, 20, 40 or 63, by the layer,
 * are so small beside it that they have no offset; the rest are about as large as it, so are some
 * behind the block.
 */
static inline float golden_sink(uint32_t layer, uint32_t token, uint32_t i)
{
    static const uint32_t small[GOLDEN_LAYERS] = {20, 40, 63};
    float x = golden_value(layer, token, i, 1);
    if (token == 0 || token * 37 % 64 < 64 - small[layer])
        x += 99.0f * golden_value(layer, 0, i, 1);
    return x;
}

static inline float golden_sized(const golden *g, uint32_t layer, uint32_t token, uint32_t i,
                                 int is_k)
{
    float size = is_k && token % 70 == 0 ? 8.0f * 16384.0f : 16384.0f;
    if (g->large == 2 && is_k)
        return golden_sink(layer, token, i);
    return golden_value(layer, token, i, is_k) * (g->large == 1 ? size : 1.0f);
}

/* A checkpoint; its blob is as long as its token's number, modulo 50. */
static inline int golden_put_point(kvt_seq *seq, uint32_t n_tokens)
{
    unsigned char blob[50];
    for (uint32_t i = 0; i < sizeof blob; i++)
        blob[i] = (unsigned char)(n_tokens + i * i);
    return kvt_seq_checkpoint(seq, blob, n_tokens % 50) != KVT_OK;
}

/* One where there is to be one. */
static inline int golden_point(const golden *g, kvt_seq *seq, uint32_t n_tokens)
{
    for (uint32_t i = 0; i < GOLDEN_POINTS; i++)
        if (g->points[i] && g->points[i] == n_tokens) {
            if (i == 1 && kvt_seq_set_next_position(seq, 1000) != KVT_OK)
                return 1;
            if (golden_put_point(seq, n_tokens))
                return 1;
        }
    return 0;
}

/* Tokens first .. end - 1, in steps that end at checkpoints. 0 when all went well. */
static inline int golden_append(const golden *g, kvt_seq *seq, uint32_t first, uint32_t end)
{
    static float k[128 * 256], v[128 * 256];
    kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
    uint32_t layer, t, i, n, dims[3];
    int32_t ids[GOLDEN_MOST], positions[GOLDEN_MOST];

    for (; first < end; first += n) {
        n = end - first < g->step ? end - first : g->step;
        for (i = 0; i < GOLDEN_POINTS; i++)
            if (g->points[i] > first && g->points[i] - first < n)
                n = g->points[i] - first;
        for (t = 0; t < n; t++) {
            ids[t] = (first + t) % 5 ? (int32_t)((first + t) * 37 % 500) : KVT_TOKEN_NONE;
            positions[t] = (int32_t)(first + t + (first + t) / 10);
        }
        if (kvt_seq_begin(seq, n, positions) != KVT_OK)
            return 1;
        for (layer = 0; layer < GOLDEN_LAYERS; layer++) {
            golden_group_of(g, golden_layer_group(g, layer), dims);
            for (t = 0; t < n; t++) {
                for (i = 0; i < dims[2] * dims[0]; i++)
                    k[t * dims[2] * dims[0] + i] = golden_sized(g, layer, first + t, i, 1);
                for (i = 0; i < dims[2] * dims[1]; i++)
                    v[t * dims[2] * dims[1] + i] = golden_sized(g, layer, first + t, i, 0);
            }
            if (kvt_append(seq, layer, &k_view, g->flags & KVT_GROUP_V_IN_K ? NULL : &v_view) !=
                KVT_OK)
                return 1;
        }
        if (kvt_seq_commit(seq, ids) != KVT_OK || golden_point(g, seq, first + n) != 0)
            return 1;
    }
    return 0;
}

/* 0 when all went well. */
static inline int golden_fill(const golden *g, kvt_seq *seq)
{
    return (g->tag && kvt_seq_set_tag(seq, g->tag, strlen(g->tag)) != KVT_OK) ||
           golden_append(g, seq, 0, g->peak) || kvt_seq_truncate(seq, g->cut_at) != KVT_OK ||
           (g->cut_point && golden_put_point(seq, g->cut_at)) ||
           golden_append(g, seq, g->cut_at, g->n_tokens) ||
           (g->next && kvt_seq_set_next_position(seq, g->next) != KVT_OK) ||
           (g->removed && (kvt_seq_remove(seq, 64, g->removed) != KVT_OK ||
                           golden_append(g, seq, g->n_tokens, g->n_tokens + 20)));
}

/*
 * What one side of a layer holds, 64 tokens at a time, as f32; those that a window has released are
 * left out. 0 when all went well.
 */
static inline int golden_each(const golden *g, const kvt_seq *seq, uint32_t layer, int side,
                              void (*take)(void *user, const void *data, size_t n), void *user)
{
    static float x[64 * 256];
    kvt_tensor view = kvt_tensor_f32(x);
    uint64_t n = kvt_seq_length(seq), first;
    uint32_t dims[3];
    golden_group_of(g, golden_layer_group(g, layer), dims);
    for (first = 0; first < n; first += 64) {
        uint64_t here = n - first < 64 ? n - first : 64;
        kvt_status status = kvt_read(seq, layer, (kvt_side)side, first, here, &view);
        if (status == KVT_OK)
            take(user, x, (size_t)here * dims[2] * dims[side] * 4);
        else if (status != KVT_ERR_STATE || !g->window)
            return 1;
    }
    return 0;
}

/* FNV-1a over ids, positions and all of K and V as f32. */
static inline uint64_t golden_mix(uint64_t hash, const void *data, size_t n)
{
    const unsigned char *p = data;
    while (n--)
        hash = (hash ^ *p++) * 1099511628211u;
    return hash;
}

static inline void golden_take(void *user, const void *data, size_t n)
{
    uint64_t *hash = user;
    *hash = golden_mix(*hash, data, n);
}

static inline uint64_t golden_hash(const golden *g, const kvt_seq *seq)
{
    static int32_t ints[GOLDEN_MOST];
    uint64_t hash = 14695981039346656037u, n = kvt_seq_length(seq), points[GOLDEN_POINTS];
    unsigned char blob[50];
    int32_t next = kvt_seq_next_position(seq);
    size_t n_points, bytes;
    uint32_t layer;
    int side;

    if (kvt_seq_token_ids(seq, 0, n, ints) != KVT_OK)
        return 0;
    hash = golden_mix(hash, ints, (size_t)n * 4);
    if (kvt_seq_positions(seq, 0, n, ints) != KVT_OK)
        return 0;
    hash = golden_mix(hash, ints, (size_t)n * 4);
    if (kvt_seq_key_positions(seq, 0, n, ints) != KVT_OK)
        return 0;
    if (g->removed)
        hash = golden_mix(hash, ints, (size_t)n * 4);
    for (layer = 0; layer < GOLDEN_LAYERS; layer++)
        for (side = 0; side < 2; side++)
            if (golden_each(g, seq, layer, side, golden_take, &hash) != 0)
                return 0;
    if (g->next)
        hash = golden_mix(hash, &next, sizeof next);
    if (kvt_seq_checkpoints(seq, points, GOLDEN_POINTS, &n_points) != KVT_OK)
        return 0;
    for (size_t i = 0; i < n_points && i < GOLDEN_POINTS; i++) {
        hash = golden_mix(hash, &points[i], sizeof points[i]);
        if (kvt_seq_checkpoint_read(seq, points[i], blob, sizeof blob, &bytes) != KVT_OK)
            return 0;
        hash = golden_mix(hash, blob, bytes < sizeof blob ? bytes : sizeof blob);
    }
    return hash;
}

/*
 * The same of the sequence at its checkpoints, the last one first, which it is truncated to; of the
 * sequence itself before.
 */
static inline uint64_t golden_deep_hash(const golden *g, kvt_seq *seq)
{
    uint64_t hash = golden_hash(g, seq), points[GOLDEN_POINTS], here;
    size_t n;
    if (kvt_seq_checkpoints(seq, points, GOLDEN_POINTS, &n) != KVT_OK || n > GOLDEN_POINTS)
        return 0;
    while (n-- > 0) {
        if (kvt_seq_truncate(seq, points[n]) != KVT_OK)
            return 0;
        here = golden_hash(g, seq);
        hash = golden_mix(hash, &here, sizeof here);
    }
    return hash;
}

#endif
