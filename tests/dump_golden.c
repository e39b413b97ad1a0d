/*
 * dump_golden SNAPSHOT: load a golden snapshot (by its file's name) and write ids, positions (also
 * those of the keys), K and V of each layer as f32, and the next position to the standard output;
 * then, from the last checkpoint to the first, its length, its blob, and the same of the sequence
 * there. For tests/read_snapshot.py.
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

static void put(void *user, const void *data, size_t n)
{
    (void)user;
    (void)fwrite(data, 1, n, stdout);
}

/*
 * Ids, positions, also of the keys, K and V of each layer, where they are, then the next position.
 */
static int dump(const golden *g, const kvt_seq *seq)
{
    static int32_t ints[GOLDEN_MOST];
    uint64_t n = kvt_seq_length(seq);
    int32_t next = kvt_seq_next_position(seq);
    int bad = kvt_seq_token_ids(seq, 0, n, ints) != KVT_OK;

    put(NULL, ints, (size_t)n * 4);
    bad |= kvt_seq_positions(seq, 0, n, ints) != KVT_OK;
    put(NULL, ints, (size_t)n * 4);
    bad |= kvt_seq_key_positions(seq, 0, n, ints) != KVT_OK;
    put(NULL, ints, (size_t)n * 4);
    for (uint32_t layer = 0; layer < GOLDEN_LAYERS; layer++)
        for (int side = 0; side < 2; side++)
            bad |= golden_each(g, seq, layer, side, put, NULL);
    put(NULL, &next, sizeof next);
    return bad;
}

int main(int argc, char **argv)
{
    const golden *g = argc == 2 ? find(argv[1]) : NULL;
    kvt_cache *cache = g ? golden_cache(g) : NULL;
    kvt_seq *seq = NULL;
    uint64_t points[GOLDEN_POINTS];
    unsigned char blob[50];
    size_t n_points, bytes;
    int bad;

    if (!cache)
        return 2;
    if (kvt_seq_create(cache, &seq) != KVT_OK)
        return 1;
    if (g->tag && kvt_seq_set_tag(seq, g->tag, strlen(g->tag)) != KVT_OK)
        return 1;
    if (kvt_seq_load(seq, argv[1], NULL, NULL) != KVT_OK)
        return 1;
    bad = dump(g, seq);
    bad |= kvt_seq_checkpoints(seq, points, GOLDEN_POINTS, &n_points) != KVT_OK;
    while (n_points-- > 0) { /* as it is after a truncate to each, the last one first */
        bad |= kvt_seq_checkpoint_read(seq, points[n_points], blob, sizeof blob, &bytes) != KVT_OK;
        put(NULL, &points[n_points], sizeof points[n_points]);
        put(NULL, blob, bytes);
        bad |= kvt_seq_truncate(seq, points[n_points]) != KVT_OK;
        bad |= dump(g, seq);
    }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return bad || fflush(stdout) != 0;
}
