/*
 * dump_golden SNAPSHOT: load a golden snapshot (by its file's name) and write ids, positions, then
 * K and V of each layer as f32 to the standard output. For tests/read_snapshot.py.
 */
#include <kvtile/kvtile.h>

#include <stdio.h>

#include "golden.h"

static const golden *find(const char *path)
{
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    for (unsigned i = 0; i < GOLDEN_COUNT; i++) {
        size_t n = strlen(golden_all[i].name);
        if (strncmp(name, golden_all[i].name, n) == 0 && strcmp(name + n, ".kvt") == 0)
            return &golden_all[i];
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static int32_t ints[GOLDEN_MOST];
    static float x[256 * 256];
    kvt_tensor view = kvt_tensor_f32(x);
    const golden *g = argc == 2 ? find(argv[1]) : NULL;
    kvt_cache *cache = g ? golden_cache(g) : NULL;
    kvt_seq *seq = NULL;
    uint32_t dims[3];
    uint64_t n;
    int bad;

    if (!cache)
        return 2;
    if (kvt_seq_create(cache, &seq) != KVT_OK || kvt_seq_load(seq, argv[1], NULL, NULL) != KVT_OK)
        return 1;
    n = kvt_seq_length(seq);
    bad = kvt_seq_token_ids(seq, 0, n, ints) != KVT_OK;
    (void)fwrite(ints, 4, (size_t)n, stdout);
    bad |= kvt_seq_positions(seq, 0, n, ints) != KVT_OK;
    (void)fwrite(ints, 4, (size_t)n, stdout);
    for (uint32_t layer = 0; layer < GOLDEN_LAYERS; layer++)
        for (int side = 0; side < 2 && n; side++) {
            golden_group_of(g, golden_layer_group(g, layer), dims);
            bad |= kvt_read(seq, layer, (kvt_side)side, 0, n, &view) != KVT_OK;
            (void)fwrite(x, 4, (size_t)n * dims[2] * dims[side], stdout);
        }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return bad || fflush(stdout) != 0;
}
