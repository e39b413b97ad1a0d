/*
 * Make the golden snapshots: make_golden FOLDER writes them, one of each storage.
 *
 * They are made once for a version of the format and from its release on have to load for ever; a
 * test compares what they load to with the hashes in tests/golden/HASHES, which this program
 * prints. Values are made of integers, so that they are the same on every machine.
 */
#include <kvtile/kvtile.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "golden.h"

/*
 * The example of docs/format.md: a layer of one head of 8 dims, two tokens of a sealed block. Keys
 * and values are small and not rotated, so that one can find them in the bytes.
 */
static int make_example(const char *folder)
{
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    kvt_save_options options;
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    static float k[70 * 8], v[70 * 8];
    kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
    int32_t ids[70];
    char path[1024];
    int bad;

    for (int t = 0; t < 70; t++) {
        ids[t] = 100 + t;
        for (int d = 0; d < 8; d++) {
            k[8 * t + d] = (float)(t % 2 ? d : 8 - d);
            v[8 * t + d] = (float)(t % 2 ? -d : 2 * d);
        }
    }
    group.n_layers = group.n_kv_heads = group.n_q_heads = 1;
    group.k_dim = group.v_dim = 8;
    group.k_type = group.v_type = KVT_TYPE_I8;
    group.flags = KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_V_ROTATION;
    group.residual_tokens = KVT_RESIDUAL_NONE;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 128;
    config.fingerprint = "example";
    config.fingerprint_bytes = 7;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = KVT_CODEC_RAW;
    (void)snprintf(path, sizeof path, "%s/example.kvt", folder);
    bad = kvt_cache_create(&config, &cache) != KVT_OK || kvt_seq_create(cache, &seq) != KVT_OK;
    for (size_t step = 0; !bad && step < 2; step++) /* the second makes the sealing final */
        bad = kvt_seq_begin(seq, step ? 1 : 69, NULL) != KVT_OK ||
              kvt_append(seq, 0, &k_view, &v_view) != KVT_OK || kvt_seq_commit(seq, ids) != KVT_OK;
    bad = bad || kvt_seq_truncate(seq, 2) != KVT_OK || kvt_seq_save(seq, path, &options) != KVT_OK;
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return bad;
}

int main(int argc, char **argv)
{
    if (argc != 2 || make_example(argv[1]) != 0)
        return 2;
    for (unsigned i = 0; i < GOLDEN_COUNT; i++) {
        const golden *g = &golden_all[i];
        kvt_cache *cache = golden_cache(g);
        kvt_seq *seq = NULL;
        const kvt_snapshot_piece piece = {GOLDEN_PIECE, GOLDEN_PIECE_TEXT,
                                          sizeof GOLDEN_PIECE_TEXT - 1};
        kvt_save_options options;
        char path[1024], parent[1024];

        memset(&options, 0, sizeof options);
        options.struct_size = sizeof options;
        options.codec = g->codec;
        if (g->codec == KVT_CODEC_RAW) {
            options.pieces = &piece;
            options.n_pieces = 1;
        }
        if (g->parent) {
            (void)snprintf(parent, sizeof parent, "%s/%s", argv[1], g->parent);
            options.parent = parent;
        }
        if (!cache || kvt_seq_create(cache, &seq) != KVT_OK || golden_fill(g, seq) != 0)
            return 1;
        (void)snprintf(path, sizeof path, "%s/%s.kvt", argv[1], g->name);
        if (kvt_seq_save(seq, path, &options) != KVT_OK) {
            char text[256];
            (void)kvt_cache_error(cache, text, sizeof text);
            fprintf(stderr, "%s\n", text);
            return 1;
        }
        if (kvt_seq_load(seq, path, NULL, NULL) != KVT_OK) /* a file has less than a sequence may */
            return 1;
        printf("%s %016" PRIx64 "\n", g->name, golden_deep_hash(g, seq));
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    return 0;
}
