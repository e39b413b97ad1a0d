/*
 * zstd: an f16 sequence saved and loaded with two threads, each beside libzstd on the same bytes
 * (the raw snapshot's): level 1 with two threads, as `zstd -1 -T2`, and one-thread decompression,
 * as `zstd -d`, which has no other. All from memory to memory that has been written to.
 *
 * libzstd is loaded when the program runs and is no dependency of it; where there is none, or one
 * without threads, the figures are not measured.
 */
#include "bench_snap.h"

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Of zstd.h, which is stable: ZSTD_c_compressionLevel, ZSTD_c_nbWorkers. */
enum { LEVEL = 100, WORKERS = 400 };

typedef struct zstd {
    void *library;
    const char *(*version)(void);
    size_t (*bound)(size_t bytes);
    unsigned (*is_error)(size_t result);
    void *(*create)(void);
    size_t (*destroy)(void *context);
    size_t (*set)(void *context, int parameter, int value);
    size_t (*compress)(void *context, void *to, size_t room, const void *from, size_t bytes);
    size_t (*decompress)(void *to, size_t room, const void *from, size_t bytes);
    void *context;

    bench_snap s;
    unsigned char *raw, *image, *packed;
    size_t bytes, image_bytes, packed_bytes, raw_room, image_room, packed_room;
} zstd;

static bool open_library(zstd *z)
{
    static const char *const names[] = {"libzstd.so.1", "libzstd.so", "libzstd.1.dylib"};
    static const char *const functions[] = {
        "ZSTD_versionString", "ZSTD_compressBound",     "ZSTD_isError",   "ZSTD_createCCtx",
        "ZSTD_freeCCtx",      "ZSTD_CCtx_setParameter", "ZSTD_compress2", "ZSTD_decompress"};
    void *const to[] = {&z->version, &z->bound, &z->is_error, &z->create,
                        &z->destroy, &z->set,   &z->compress, &z->decompress};
    for (size_t i = 0; i < sizeof names / sizeof names[0] && !z->library; i++)
        z->library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!z->library)
        return false;
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        void *f = dlsym(z->library, functions[i]);
        if (!f)
            return false;
        memcpy(to[i], &f, sizeof f);
    }
    z->context = z->create();
    return z->context && !z->is_error(z->set(z->context, LEVEL, 1)) &&
           !z->is_error(z->set(z->context, WORKERS, 2));
}

static double run_save(void *user)
{
    zstd *z = user;
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_AUTO);
    double start = bench_snap_start();
    bench_require(kvt_seq_save_memory(z->s.seq, z->image, z->image_room, &z->image_bytes, &options),
                  z->s.cache, "kvt_seq_save_memory");
    return bench_snap_stop(start);
}

static double run_load(void *user)
{
    zstd *z = user;
    bench_require(kvt_seq_clear(z->s.seq), z->s.cache, "kvt_seq_clear");
    double start = bench_snap_start();
    bench_require(kvt_seq_load_memory(z->s.seq, z->image, z->image_bytes, NULL, NULL), z->s.cache,
                  "kvt_seq_load_memory");
    return bench_snap_stop(start);
}

static double run_compress(void *user)
{
    zstd *z = user;
    double start = bench_snap_start();
    z->packed_bytes = z->compress(z->context, z->packed, z->packed_room, z->raw, z->bytes);
    double seconds = bench_snap_stop(start);
    if (z->is_error(z->packed_bytes))
        bench_fail(1, "libzstd: compression failed");
    return seconds;
}

/* Over the raw snapshot, which has the same bytes. */
static double run_decompress(void *user)
{
    zstd *z = user;
    double start = bench_snap_start();
    if (z->decompress(z->raw, z->bytes, z->packed, z->packed_bytes) != z->bytes)
        bench_fail(1, "libzstd: decompression failed");
    return bench_snap_stop(start);
}

void bench_snap_zstd(const bench_options *o)
{
    zstd z;
    char rival[64], size[160], words[160];
    bench_figure save = {"zstd", "zstd_save", "of zstd -1 -T2", 0.9, true, "zstd -1 -T2", NULL};
    bench_figure load = {"zstd", "zstd_load", "of zstd -d", 0.9, true, "zstd -d", NULL};
    bench_figure bytes = {"zstd", "zstd_size", "of zstd -1's", NAN, false, "zstd -1 -T2", size};
    memset(&z, 0, sizeof z);
    if (!bench_has_pool() || !open_library(&z)) {
        save.note = load.note = bytes.note =
            bench_has_pool() ? "not measured: no libzstd with threads" : BENCH_SNAP_NO_POOL;
        bench_snap_missing(o, &save);
        bench_snap_missing(o, &load);
        bench_snap_missing(o, &bytes);
        if (z.context)
            z.destroy(z.context);
        return;
    }
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_RAW);
    uint64_t n_tokens = bench_snap_tokens(o, KVT_TYPE_F16, o->bytes);
    bench_snap_open(&z.s, o, KVT_TYPE_F16, 2, n_tokens, 0);
    bench_snap_fill(&z.s, n_tokens);
    z.raw = bench_snap_image(&z.s, &options, &z.bytes, &z.raw_room);
    options.codec = KVT_CODEC_AUTO;
    z.image = bench_snap_image(&z.s, &options, &z.image_bytes, &z.image_room);
    z.packed_room = z.bound(z.bytes);
    z.packed = bench_snap_memory(z.packed_room, true);
    run_load(&z);
    bench_snap_check(&z.s, z.raw, z.bytes, "zstd");
    run_compress(&z);
    run_decompress(&z);
    bench_snap_check(&z.s, z.raw, z.bytes, "libzstd");

    snprintf(rival, sizeof rival, "libzstd %s -1 -T2", z.version());
    snprintf(words, sizeof words, "libzstd %s -d", z.version());
    save.rival = bytes.rival = rival;
    load.rival = words;
    bench_snap_pairs(o, &z.s, &save, run_save, run_compress, &z, (double)z.bytes);
    bench_snap_pairs(o, &z.s, &load, run_load, run_decompress, &z, (double)z.bytes);
    snprintf(size, sizeof size, "bytes: raw %zu, the snapshot %zu, zstd -1 %zu", z.bytes,
             z.image_bytes, z.packed_bytes);
    bench_snap_value(o, &z.s, &bytes, (double)z.image_bytes / (double)z.packed_bytes,
                     (double)z.packed_bytes, "bytes");
    z.destroy(z.context);
    bench_snap_free(z.packed, z.packed_room);
    bench_snap_free(z.image, z.image_room);
    bench_snap_free(z.raw, z.raw_room);
    bench_snap_close(&z.s);
}
