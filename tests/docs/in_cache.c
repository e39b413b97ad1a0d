/*
 * Around a part of a program on a page of the guide, which stands in the place of the comment
 * BLOCK: a cache of two layers, an empty sequence, and a stand-in for a model's computations.
 */
#include <kvtile/store.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_LAYERS = 2, Q_HEADS = 8, KV_HEADS = 2, DIM = 64, MAX_STEP = 512 };

static kvt_cache *cache;
static kvt_seq *seq;
static float k[MAX_STEP][KV_HEADS][DIM], v[MAX_STEP][KV_HEADS][DIM];
static float q[MAX_STEP][Q_HEADS][DIM], out[MAX_STEP][Q_HEADS][DIM];
static int32_t ids[MAX_STEP];

/* Stop with the library's reason. */
static void ok(kvt_status status)
{
    char text[256] = "";
    if (status == KVT_OK)
        return;
    if (cache)
        kvt_cache_error(cache, text, sizeof text);
    fprintf(stderr, "%s: %s\n", kvt_status_string(status), text);
    exit(1);
}

/* Numbers between -1 and 1 that depend on the token and the layer alone. */
static void compute(const kvt_seq *s, uint32_t layer, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        uint32_t x = (uint32_t)(kvt_seq_length(s) + i) * 2654435761u + layer + 1;
        for (int j = 0; j < KV_HEADS * DIM; j++) {
            x = x * 1664525u + 1013904223u;
            k[i][j / DIM][j % DIM] = (float)(x >> 8) / 8388608.0f - 1.0f;
            v[i][j / DIM][j % DIM] = k[i][0][(j * 7) % DIM];
        }
        for (int j = 0; j < Q_HEADS * DIM; j++)
            q[i][j / DIM][j % DIM] = k[i][0][j % DIM];
        ids[i] = (int32_t)(kvt_seq_length(s) + i);
    }
}

static void one_layer(kvt_seq *s, uint32_t layer, uint64_t n)
{
    kvt_tensor keys = kvt_tensor_f32(k[0][0]), values = kvt_tensor_f32(v[0][0]);
    kvt_attend_item item = {.seq = s, .n_queries = n};
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = layer;
    args.flags = KVT_ATTEND_CAUSAL;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q[0][0]);
    args.out = kvt_tensor_f32(out[0][0]);
    compute(s, layer, n);
    ok(kvt_append(s, layer, &keys, &values));
    ok(kvt_attend(cache, &args));
}

/* A step of n tokens, without its commit. */
static void forward(kvt_seq *s, uint64_t n)
{
    ok(kvt_seq_begin(s, n, NULL));
    for (uint32_t layer = 0; layer < N_LAYERS; layer++)
        one_layer(s, layer, n);
}

/* Steps of up to MAX_STEP tokens until the sequence has `length` of them. */
static void grow(kvt_seq *s, uint64_t length)
{
    while (kvt_seq_length(s) < length) {
        uint64_t n = length - kvt_seq_length(s);
        n = n < MAX_STEP ? n : MAX_STEP;
        forward(s, n);
        ok(kvt_seq_commit(s, ids));
    }
}

static kvt_group_config the_group(void)
{
    kvt_group_config group = kvt_group_config_init();
    group.n_layers = N_LAYERS;
    group.n_q_heads = Q_HEADS;
    group.n_kv_heads = KV_HEADS;
    group.k_dim = DIM;
    group.v_dim = DIM;
    group.k_type = KVT_TYPE_I8;
    group.v_type = KVT_TYPE_I8;
    return group;
}

int main(void)
{
    kvt_group_config group = the_group();
    kvt_config config = kvt_config_init();
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 4096;
    ok(kvt_cache_create(&config, &cache));
    ok(kvt_seq_create(cache, &seq));
    grow(seq, 0);
    {
        /* BLOCK */
    }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return 0;
}
