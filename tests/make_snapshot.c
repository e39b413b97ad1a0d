/*
 * make_snapshot PATH TOKENS [TOKEN [PARENT [TEXT]]]: a snapshot of two layers, i8, for tests of
 * programs: 2 kv heads of 64 dims, 512 bytes a token as f32 in each side of a layer. The values of
 * token TOKEN of layer 1 are others than without it; "none" is none; a number from TOKENS on is the
 * blob of a checkpoint at the end. With a parent it is a delta, and has a piece "title": TEXT, or
 * of 5 bytes.
 *
 * make_snapshot points:PATH TOKENS [TOKEN [POSITION]]: a checkpoint of the first 256 tokens, with
 * POSITION as its next position (default 256); layer 0 has a window of 100 tokens. The keys and
 * values of token TOKEN are others in layer 0; with ~TOKEN its values are in layer 1, by so little
 * that only f16 shows it, not the i8 that they are sealed as.
 *
 * make_snapshot store:FOLDER TOKENS, make_snapshot redis:PORT TOKENS: the blocks of that sequence
 * into a store, of a server on 127.0.0.1. Prints how many values were written. Exit code 77: the
 * library cannot.
 */
#include <kvtile/kvtile.h>
#include <kvtile/store.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEP 256u
#define ROW 128u

static float value(uint64_t token, uint32_t i, uint32_t seed)
{
    uint32_t x = ((uint32_t)token * ROW + i + seed) * 2654435761u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    return ((float)(x & 1023u) - 511.5f) / 256.0f;
}

typedef struct contents {
    uint64_t n_tokens;
    uint64_t changed, nudged; /* tokens; UINT64_MAX: none */
    uint32_t changed_layer;
    int32_t point; /* the next position of a checkpoint after the first step; -1: none */
} contents;

static int fill(kvt_seq *seq, const contents *c)
{
    static float k[STEP * ROW], v[STEP * ROW];
    kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
    int32_t ids[STEP], positions[STEP];
    uint64_t first, n, t;
    uint32_t layer, i;

    for (first = 0; first < c->n_tokens; first += n) {
        n = c->n_tokens - first < STEP ? c->n_tokens - first : STEP;
        for (t = 0; t < n; t++)
            positions[t] = (int32_t)(first + t);
        if (kvt_seq_begin(seq, n, positions) != KVT_OK)
            return 1;
        for (layer = 0; layer < 2; layer++) {
            for (t = 0; t < n; t++)
                for (i = 0; i < ROW; i++) {
                    int other = layer == c->changed_layer && first + t == c->changed;
                    uint32_t seed = layer + (other ? 977u : 0u);
                    k[t * ROW + i] = value(first + t, i, seed);
                    v[t * ROW + i] = value(first + t, i, seed + 7u);
                }
            if (layer == 1 && c->nudged - first < n)
                v[(c->nudged - first) * ROW] *= 1.001f;
            if (kvt_append(seq, layer, &k_view, &v_view) != KVT_OK)
                return 1;
        }
        for (t = 0; t < n; t++)
            ids[t] = (int32_t)((first + t) * 37 % 32000);
        if (kvt_seq_commit(seq, ids) != KVT_OK)
            return 1;
        if (first == 0 && c->point >= 0 &&
            (kvt_seq_set_next_position(seq, c->point) != KVT_OK ||
             kvt_seq_checkpoint(seq, "point", 5) != KVT_OK))
            return 1;
    }
    return 0;
}

/* Its exit code. */
static int put(const char *to, const kvt_seq *seq)
{
    kvt_directory_config directory = {.struct_size = sizeof directory};
    kvt_redis_config redis = {.struct_size = sizeof redis,
                              .connect_timeout_ms = 30000, /* of a machine that is busy */
                              .timeout_ms = 30000};
    kvt_prefix_result result = {0};
    kvt_status status;
    kvt_store store;

    memset(&store, 0, sizeof store);
    directory.path = strchr(to, ':') + 1;
    if (*to == 's') {
        status = kvt_store_open_directory(&directory, &store);
    } else {
        redis.port = (uint32_t)strtoul(directory.path, NULL, 10);
        status = kvt_store_open_redis(&redis, &store);
    }
    if (status == KVT_OK)
        status = kvt_prefix_put(&store, seq, NULL, &result);
    kvt_store_close(&store);
    if (status == KVT_OK)
        printf("%u\n", (unsigned)result.n_values);
    return status == KVT_OK ? 0 : status == KVT_ERR_UNSUPPORTED ? 77 : 1;
}

int main(int argc, char **argv)
{
    static const uint32_t numbers[2] = {0, 1};
    kvt_group_config groups[2] = {kvt_group_config_init(), kvt_group_config_init()};
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    kvt_save_options options;
    kvt_snapshot_piece piece = {"title", "a\0b\"c", 5};
    contents c = {0, UINT64_MAX, UINT64_MAX, 1, -1};
    int bad, points, g;

    if (argc < 3)
        return 2;
    c.n_tokens = strtoull(argv[2], NULL, 10);
    points = strncmp(argv[1], "points:", 7) == 0;
    if (argc > 3 && *argv[3] == '~')
        c.nudged = strtoull(argv[3] + 1, NULL, 10);
    else if (argc > 3 && strcmp(argv[3], "none") != 0)
        c.changed = strtoull(argv[3], NULL, 10);
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    if (points) {
        c.point = argc > 4 ? (int32_t)strtol(argv[4], NULL, 10) : (int32_t)STEP;
        c.changed_layer = 0;
        groups[0].window_tokens = 100;
    } else if (argc > 4) {
        options.parent = argv[4];
        if (argc > 5) {
            piece.data = argv[5];
            piece.bytes = strlen(argv[5]);
        }
        options.pieces = &piece;
        options.n_pieces = 1;
    }
    for (g = 0; g < 2; g++) {
        groups[g].n_layers = points ? 1 : 2;
        groups[g].layers = points ? &numbers[g] : NULL;
        groups[g].n_q_heads = 4;
        groups[g].n_kv_heads = 2;
        groups[g].k_dim = groups[g].v_dim = ROW / 2;
        groups[g].k_type = groups[g].v_type = KVT_TYPE_I8;
    }
    config.groups = groups;
    config.n_groups = points ? 2 : 1;
    config.max_tokens = c.n_tokens + 1;
    bad = kvt_cache_create(&config, &cache) != KVT_OK || kvt_seq_create(cache, &seq) != KVT_OK ||
          fill(seq, &c) != 0 ||
          (!points && c.changed >= c.n_tokens && c.changed != UINT64_MAX &&
           kvt_seq_checkpoint(seq, &c.changed, sizeof c.changed) != KVT_OK);
    if (!bad && (strncmp(argv[1], "store:", 6) == 0 || strncmp(argv[1], "redis:", 6) == 0))
        bad = put(argv[1], seq);
    else if (!bad)
        bad = kvt_seq_save(seq, argv[1] + (points ? 7 : 0), &options) != KVT_OK;
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return bad;
}
