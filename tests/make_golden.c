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

int main(int argc, char **argv)
{
    if (argc != 2)
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
