/*
 * Snapshots of one machine on another: snapshot_exchange write FOLDER, on the one, saves what
 * golden.h describes with each codec, and as deltas; snapshot_exchange check FOLDER, on the other,
 * makes the same sequences and compares: the loaded ones with them, and the bytes that both are
 * saved to with the files. arm64.cmake runs them on x86-64 and under QEMU.
 */
#include <kvtile/kvtile.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "golden.h"

static const char *folder;
static size_t n_files, n_deltas, n_bytes;

static int fail(const char *what, const char *path, const kvt_cache *cache)
{
    char text[256] = "";
    (void)kvt_cache_error(cache, text, sizeof text);
    (void)fprintf(stderr, "%s: %s: %s\n", path, what, text);
    return 1;
}

/* Whether a sequence, saved so, gives the bytes of a file. */
static int gives(const kvt_seq *seq, const kvt_save_options *options, const unsigned char *file,
                 size_t n)
{
    uint64_t room = 0;
    size_t bytes = 0;
    unsigned char *to;
    int same;

    if (kvt_seq_save_bound(seq, &room, options) != KVT_OK)
        return 0;
    to = malloc((size_t)room + 1);
    same = to && kvt_seq_save_memory(seq, to, (size_t)room, &bytes, options) == KVT_OK &&
           bytes == n && memcmp(to, file, n) == 0;
    free(to);
    return same;
}

static unsigned char *read_file(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    unsigned char *data = malloc((size_t)1 << 20);
    *n = 0;
    if (f && data)
        *n = fread(data, 1, (size_t)1 << 20, f);
    if (f)
        (void)fclose(f);
    return data;
}

static int check_file(const golden *g, const kvt_seq *seq, const char *path,
                      const kvt_save_options *options)
{
    kvt_cache *cache = golden_cache(g);
    int bad = cache == NULL;
    uint64_t want = 0;
    size_t n;
    unsigned char *file = read_file(path, &n);

    for (int way = 0; !bad && way < 3; way++) { /* read, mapped, mapped and verified late */
        kvt_load_options load;
        kvt_seq *loaded = NULL;
        uint64_t hash;
        memset(&load, 0, sizeof load);
        load.struct_size = sizeof load;
        load.map = (uint32_t)way;
        if (kvt_seq_create(cache, &loaded) != KVT_OK ||
            (g->tag && kvt_seq_set_tag(loaded, g->tag, strlen(g->tag)) != KVT_OK) ||
            kvt_seq_load(loaded, path, &load, NULL) != KVT_OK)
            bad = fail("load", path, cache);
        else if (!gives(loaded, options, file, n))
            bad = fail("loaded and saved again it is another", path, cache);
        hash = bad ? 0 : golden_hash(g, loaded);
        if (g->window == 0 && way == 0) /* else the file may lack rows that the sequence has */
            want = golden_hash(g, seq);
        if (!bad && want && hash != want)
            bad = fail("it holds something else", path, cache);
        want = hash;
        kvt_seq_destroy(loaded);
    }
    if (!bad && !gives(seq, options, file, n))
        bad = fail("made here it is another", path, cache);
    if (!bad)
        printf("%016" PRIx64 " %s\n", want, strrchr(path, '/') + 1);
    n_bytes += n;
    free(file);
    kvt_cache_destroy(cache);
    return bad;
}

static int one(const golden *g, const kvt_cache *cache, const kvt_seq *seq, const char *path,
               const kvt_save_options *options, int writes)
{
    kvt_status status;
    n_files++;
    n_deltas += options->parent != NULL;
    if (!writes)
        return check_file(g, seq, path, options);
    status = kvt_seq_save(seq, path, options);
    return status == KVT_OK ? 0 : fail("save", path, cache);
}

int main(int argc, char **argv)
{
    static const char *const codecs[] = {"auto", "raw", "zstd"};
    int writes = argc == 3 && strcmp(argv[1], "write") == 0, bad = 0;

    if (argc != 3 || (!writes && strcmp(argv[1], "check") != 0))
        return 2;
    folder = argv[2];
    for (unsigned i = 0; i < GOLDEN_COUNT; i++) {
        const golden *g = &golden_all[i];
        kvt_cache *cache;
        kvt_seq *seq = NULL;
        if (g->parent || g->codec == KVT_CODEC_RAW) /* the others have the same contents */
            continue;
        cache = golden_cache(g);
        if (!cache || kvt_seq_create(cache, &seq) != KVT_OK || golden_fill(g, seq) != 0)
            return 1;
        for (uint32_t codec = 0; codec < 3; codec++) {
            char path[1024], parent[1024];
            kvt_save_options options;
            kvt_status status = KVT_ERR_STATE;

            memset(&options, 0, sizeof options);
            options.struct_size = sizeof options;
            options.codec = codec;
            options.no_fsync = 1;
            (void)snprintf(path, sizeof path, "%s/%s-%s.kvt", folder, g->name, codecs[codec]);
            bad |= one(g, cache, seq, path, &options, writes);
            /* A delta of its first tokens, where a window has not released what that needs. */
            (void)snprintf(parent, sizeof parent, "%s/%s-%s-first.kvt", folder, g->name,
                           codecs[codec]);
            options.n_tokens = kvt_seq_length(seq) / 128 * 64;
            if (options.n_tokens)
                status = writes ? kvt_seq_save(seq, parent, &options) : KVT_OK;
            options.n_tokens = 0;
            options.parent = parent;
            (void)snprintf(path, sizeof path, "%s/%s-%s-delta.kvt", folder, g->name, codecs[codec]);
            if (!writes) {
                FILE *f = fopen(path, "rb");
                if (!f)
                    continue;
                (void)fclose(f);
            }
            if (status == KVT_OK)
                bad |= one(g, cache, seq, path, &options, writes);
        }
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    printf("%s: %zu files, %zu of them deltas, %zu bytes compared\n", argv[1], n_files, n_deltas,
           n_bytes);
    return bad || n_files < 50 || n_deltas < 20;
}
