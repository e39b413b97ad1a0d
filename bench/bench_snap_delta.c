/*
 * delta: 256 tokens are appended to a saved sequence, and the sequence is saved with that snapshot
 * as its parent: the bytes beside those of the tokens, and the time beside that of a full save with
 * the same codec. For each time the 256 tokens are appended anew, to a fork of the saved sequence:
 * a block's id is kept once it is known, so the second save of the same blocks has less to do.
 *
 * The tokens' bytes are codes, scales and offsets (kvt_cache_bytes_per_token); 64 KiB are added to
 * them for what a file has at least. With a residual window the delta has more than the 256 tokens:
 * blocks that were open (f16) in the parent are sealed now, and the newest ones are open;
 * delta_changed has the bytes of all blocks that changed.
 */
#include "bench_snap.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TURN = 256, FIXED = 64 << 10 };
#define LEAST ((uint64_t)12 << 30) /* bytes of memory for all layers */

typedef struct delta {
    const bench_options *o;
    bench_snap s;
    kvt_seq *base; /* as it was saved to `parent` */
    const char *parent, *child, *full;
    unsigned char *to;
    size_t room;
    uint32_t codec;
} delta;

static double save(delta *d, const char *path, bool with_parent)
{
    kvt_save_options options = bench_snap_save_options(d->codec);
    size_t n;
    options.parent = with_parent ? d->parent : NULL;
    if (path)
        unlink(path);
    double start = bench_snap_start();
    if (path)
        bench_require(kvt_seq_save(d->s.seq, path, &options), d->s.cache, "kvt_seq_save");
    else
        bench_require(kvt_seq_save_memory(d->s.seq, d->to, d->room, &n, &options), d->s.cache,
                      "kvt_seq_save_memory");
    return bench_snap_stop(start);
}

/* 256 tokens more than the parent has, which nothing has been saved of. */
static void take_turn(delta *d)
{
    kvt_seq_destroy(d->s.seq);
    bench_require(kvt_seq_fork(d->base, kvt_seq_length(d->base), &d->s.seq), d->s.cache,
                  "kvt_seq_fork");
    bench_snap_fill(&d->s, TURN);
}

static double run_delta_file(void *user)
{
    delta *d = user;
    take_turn(d);
    return save(d, d->child, true);
}

static double run_full_file(void *user)
{
    delta *d = user;
    return save(d, d->full, false);
}

static double run_delta_memory(void *user)
{
    take_turn(user);
    return save(user, NULL, true);
}

static double run_full_memory(void *user)
{
    return save(user, NULL, false);
}

static size_t delta_bytes(delta *d, uint32_t codec)
{
    kvt_save_options options = bench_snap_save_options(codec);
    size_t n, room;
    options.parent = d->parent;
    unsigned char *image = bench_snap_image(&d->s, &options, &n, &room);
    bench_snap_free(image, room);
    return n;
}

/* The last tokens' keys of the last layer, as they are and as the files give them back. */
static void check_files(delta *d)
{
    uint64_t n = kvt_seq_length(d->s.seq), first = n - 2 * TURN;
    size_t count = 2 * TURN * d->s.width;
    float *a = bench_alloc(2 * count, sizeof *a), *b = a + count;
    for (int i = 0; i < 2; i++) {
        kvt_tensor t = kvt_tensor_f32(i ? b : a);
        bench_require(kvt_read(d->s.seq, d->s.n_layers - 1, KVT_SIDE_K, first, 2 * TURN, &t),
                      d->s.cache, "kvt_read");
        if (i == 0) {
            bench_require(kvt_seq_clear(d->s.seq), d->s.cache, "kvt_seq_clear");
            bench_require(kvt_seq_load(d->s.seq, d->child, NULL, NULL), d->s.cache, "kvt_seq_load");
        }
    }
    if (kvt_seq_length(d->s.seq) != n || memcmp(a, b, count * sizeof *a) != 0)
        bench_fail(1, "snapshot: delta: the sequence came back different");
    free(a);
}

static void open_delta(delta *d, const bench_options *o, kvt_type type, uint32_t residual_tokens)
{
    uint64_t ctx = o->quick ? 512 : 32768;
    memset(d, 0, sizeof *d);
    d->o = o;
    d->parent = bench_snap_path(o, "parent.kvt");
    d->child = bench_snap_path(o, "child.kvt");
    bench_snap_open(&d->s, o, type, 1, ctx + TURN, residual_tokens);
    bench_snap_fill(&d->s, ctx);
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_RAW);
    options.no_fsync = o->quick;
    bench_require(kvt_seq_save(d->s.seq, d->parent, &options), d->s.cache, "kvt_seq_save");
    d->base = d->s.seq;
    d->s.seq = NULL;
    take_turn(d);
}

static void close_delta(delta *d)
{
    kvt_seq_destroy(d->base);
    unlink(d->parent);
    unlink(d->child);
    bench_snap_close(&d->s);
}

static void report_size(delta *d, const char *name, uint32_t codec, double bar)
{
    char words[200];
    double bytes = (double)delta_bytes(d, codec);
    double tokens = kvt_cache_bytes_per_token(d->s.cache) * TURN;
    bench_figure f = {"delta", name, "of tokens+64K", bar, false, "256 tokens + 64 KiB", words};
    snprintf(words, sizeof words, "bytes: the delta %.0f, the tokens %.0f", bytes, tokens);
    bench_snap_value(d->o, &d->s, &f, bytes / (tokens + FIXED), tokens + FIXED, "bytes");
}

static void report_changed(delta *d)
{
    char words[250], error[256] = "";
    kvt_snapshot_info info;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    kvt_status status = kvt_snapshot_inspect(d->child, 1, &info, error, sizeof error);
    if (status != KVT_OK)
        bench_fail(1, "%s: %s: %s", d->child, kvt_status_string(status), error);
    const bench_case *c = &d->s.shape;
    double token = kvt_cache_bytes_per_token(d->s.cache), tokens = token * TURN;
    double open = 2.0 * d->s.n_layers * c->kv_heads * (c->k_dim + c->v_dim) * KVT_BLOCK_TOKENS;
    uint64_t blocks = info.n_blocks - info.inherited_blocks;
    double bytes = (double)(blocks - info.n_open_blocks) * token * KVT_BLOCK_TOKENS +
                   (double)info.n_open_blocks * open;
    bench_figure f = {"delta", "delta_changed", "of the tokens", NAN, false, "256 tokens", words};
    snprintf(words, sizeof words,
             "bytes of changed blocks: %.0f, of %llu blocks, %llu of them open; the tokens %.0f",
             bytes, (unsigned long long)blocks, (unsigned long long)info.n_open_blocks, tokens);
    bench_snap_value(d->o, &d->s, &f, bytes / tokens, tokens, "bytes");
}

static void report_times(delta *d)
{
    static const char *const names[2][2] = {{"delta_time_file_raw", "delta_time_memory_raw"},
                                            {"delta_time_file", "delta_time_memory"}};
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_AUTO);
    uint64_t bound;
    bench_require(kvt_seq_save_bound(d->s.seq, &bound, &options), d->s.cache, "kvt_seq_save_bound");
    d->room = (size_t)bound;
    d->to = bench_snap_memory(d->room, true);
    d->full = bench_snap_path(d->o, "full.kvt");
    for (int i = 0; i < 2; i++) {
        bench_figure f = {"delta",  names[i][0], "of a full save",
                          1.0 / 50, false,       i ? "full save, auto" : "full save, raw",
                          NULL};
        d->codec = i ? KVT_CODEC_AUTO : KVT_CODEC_RAW;
        bench_snap_pairs(d->o, &d->s, &f, run_delta_file, run_full_file, d, NAN);
        f.name = names[i][1];
        bench_snap_pairs(d->o, &d->s, &f, run_delta_memory, run_full_memory, d, NAN);
    }
    unlink(d->full);
    bench_snap_free(d->to, d->room);
}

void bench_snap_delta(const bench_options *o)
{
    delta d;
    bench_options few = *o, first = *o;
    if (!few.layers && !few.quick)
        few.layers = 8; /* the sizes alone, which go with the layers */
    /* The cache, its image, its files and their copy are 2 GiB each. */
    if (bench_available_bytes() < LEAST)
        first.layers = few.layers;
    open_delta(&d, &first, KVT_TYPE_I8, 0);
    report_size(&d, "delta_size", KVT_CODEC_RAW, 1.05);
    report_size(&d, "delta_size_auto", KVT_CODEC_AUTO, NAN);
    d.codec = KVT_CODEC_RAW;
    run_delta_file(&d);
    check_files(&d);
    report_changed(&d);
    report_times(&d);
    close_delta(&d);

    open_delta(&d, &few, KVT_TYPE_I8, KVT_RESIDUAL_NONE);
    report_size(&d, "delta_size_residual_none", KVT_CODEC_RAW, 1.05);
    close_delta(&d);
    open_delta(&d, &few, KVT_TYPE_F16, 0);
    report_size(&d, "delta_size_f16", KVT_CODEC_RAW, 1.05);
    close_delta(&d);
}
