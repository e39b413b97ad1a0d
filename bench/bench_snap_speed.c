/*
 * memory, file, crypt, threads: how fast i8 is saved and loaded, raw beside memcpy, fwrite and
 * fread of as many bytes, encrypted beside raw, with two threads beside one. fwrite, fread and
 * memcpy have one thread each time.
 *
 * Loads are into recycled blocks; memory_load_fresh into blocks that have never been written to,
 * beside a memcpy into such memory. What is loaded is compared before anything is timed.
 */
#include "bench_snap.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct speed {
    const bench_options *o;
    bench_snap one, two; /* with one thread, with two; both have the same tokens */
    bench_snap *of;      /* which of them runs */
    unsigned char *raw;  /* the snapshot, raw */
    size_t bytes;
    unsigned char *other; /* as many bytes and more */
    size_t room;
    uint32_t codec;
    unsigned char *image; /* the snapshot as it is loaded, where it is not raw */
    size_t image_bytes, image_room;
    const char *path, *plain;
} speed;

static const unsigned char key[KVT_KEY_BYTES] = "kvt-bench: no secret, a test key";

static kvt_load_options load_options(const unsigned char *with_key)
{
    kvt_load_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.key = with_key;
    return o;
}

/* ---- seconds of one run ---- */

static double save_to_memory(bench_snap *s, unsigned char *to, size_t room, uint32_t codec,
                             const unsigned char *with_key)
{
    kvt_save_options options = bench_snap_save_options(codec);
    size_t n;
    options.key = with_key;
    double start = bench_snap_start();
    bench_require(kvt_seq_save_memory(s->seq, to, room, &n, &options), s->cache,
                  "kvt_seq_save_memory");
    return bench_snap_stop(start);
}

static double load_from_memory(bench_snap *s, const unsigned char *from, size_t bytes,
                               const unsigned char *with_key, bool fresh)
{
    kvt_load_options options = load_options(with_key);
    bench_require(kvt_seq_clear(s->seq), s->cache, "kvt_seq_clear");
    if (fresh)
        bench_require(kvt_cache_trim(s->cache), s->cache, "kvt_cache_trim");
    double start = bench_snap_start();
    bench_require(kvt_seq_load_memory(s->seq, from, bytes, &options, NULL), s->cache,
                  "kvt_seq_load_memory");
    return bench_snap_stop(start);
}

static double save_to_file(speed *x, const unsigned char *with_key)
{
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_RAW);
    options.key = with_key;
    unlink(x->path);
    double start = bench_snap_start();
    bench_require(kvt_seq_save(x->of->seq, x->path, &options), x->of->cache, "kvt_seq_save");
    return bench_snap_stop(start);
}

static double run_memcpy(void *user)
{
    speed *x = user;
    double start = bench_snap_start();
    memcpy(x->other, x->raw, x->bytes);
    return bench_snap_stop(start);
}

static double run_memcpy_fresh(void *user)
{
    speed *x = user;
    unsigned char *to = bench_snap_memory(x->bytes, false);
    double start = bench_snap_start();
    memcpy(to, x->raw, x->bytes);
    double seconds = bench_snap_stop(start);
    bench_snap_free(to, x->bytes);
    return seconds;
}

static double run_save(void *user)
{
    speed *x = user;
    return save_to_memory(x->of, x->other, x->room, KVT_CODEC_RAW, NULL);
}

static double run_load(void *user)
{
    speed *x = user;
    return load_from_memory(x->of, x->raw, x->bytes, NULL, false);
}

static double run_load_fresh(void *user)
{
    speed *x = user;
    return load_from_memory(x->of, x->raw, x->bytes, NULL, true);
}

static double run_fwrite(void *user)
{
    speed *x = user;
    unlink(x->plain); /* a snapshot is a new file each time, too */
    double start = bench_snap_start();
    FILE *f = fopen(x->plain, "wb");
    if (!f || fwrite(x->raw, 1, x->bytes, f) != x->bytes || fclose(f) != 0)
        bench_fail(1, "%s: %s", x->plain, strerror(errno));
    return bench_snap_stop(start);
}

static double run_fread(void *user)
{
    speed *x = user;
    double start = bench_snap_start();
    FILE *f = fopen(x->plain, "rb");
    if (!f || fread(x->other, 1, x->bytes, f) != x->bytes || fclose(f) != 0)
        bench_fail(1, "%s: cannot be read back: %s", x->plain, strerror(errno));
    return bench_snap_stop(start);
}

static double run_file_save(void *user)
{
    return save_to_file(user, NULL);
}

static double run_file_save_crypt(void *user)
{
    return save_to_file(user, key);
}

static double run_file_load(void *user)
{
    speed *x = user;
    bench_require(kvt_seq_clear(x->of->seq), x->of->cache, "kvt_seq_clear");
    double start = bench_snap_start();
    bench_require(kvt_seq_load(x->of->seq, x->path, NULL, NULL), x->of->cache, "kvt_seq_load");
    return bench_snap_stop(start);
}

static double run_save_crypt(void *user)
{
    speed *x = user;
    return save_to_memory(x->of, x->other, x->room, KVT_CODEC_RAW, key);
}

static double run_load_crypt(void *user)
{
    speed *x = user;
    return load_from_memory(x->of, x->image, x->image_bytes, key, false);
}

static double run_save_two(void *user)
{
    speed *x = user;
    return save_to_memory(&x->two, x->other, x->room, x->codec, NULL);
}

static double run_save_one(void *user)
{
    speed *x = user;
    return save_to_memory(&x->one, x->other, x->room, x->codec, NULL);
}

static double run_load_two(void *user)
{
    speed *x = user;
    return load_from_memory(&x->two, x->image, x->image_bytes, NULL, false);
}

static double run_load_one(void *user)
{
    speed *x = user;
    return load_from_memory(&x->one, x->image, x->image_bytes, NULL, false);
}

/* ---- parts ---- */

static void part_memory(speed *x)
{
    static const bench_figure save = {"memory", "memory_save", "of memcpy", 0.8,
                                      true,     "memcpy",      NULL};
    static const bench_figure load = {"memory", "memory_load", "of memcpy", 0.8,
                                      true,     "memcpy",      NULL};
    static const bench_figure fresh = {"memory", "memory_load_fresh",    "of memcpy", NAN,
                                       true,     "memcpy, fresh memory", NULL};
    x->of = &x->one;
    run_save(x);
    if (memcmp(x->other, x->raw, x->bytes) != 0)
        bench_fail(1, "snapshot: two saves differ");
    run_load(x);
    bench_snap_check(x->of, x->raw, x->bytes, "memory");
    bench_snap_pairs(x->o, x->of, &save, run_save, run_memcpy, x, (double)x->bytes);
    bench_snap_pairs(x->o, x->of, &load, run_load, run_memcpy, x, (double)x->bytes);
    bench_snap_pairs(x->o, x->of, &fresh, run_load_fresh, run_memcpy_fresh, x, (double)x->bytes);
}

static void part_file(speed *x)
{
    static const char *const names[2][2] = {{"file_save", "file_load"},
                                            {"file_save_2", "file_load_2"}};
    for (int i = 0; i < 2; i++) {
        bench_figure save = {"file", names[i][0], "of fwrite", 0.9, true, "fwrite", NULL};
        bench_figure load = {"file", names[i][1], "of fread", 0.9, true, "fread", NULL};
        if (i == 1 && !bench_has_pool()) {
            save.note = load.note = BENCH_SNAP_NO_POOL;
            bench_snap_missing(x->o, &save);
            bench_snap_missing(x->o, &load);
            continue;
        }
        x->of = i ? &x->two : &x->one;
        run_file_save(x);
        run_file_load(x);
        bench_snap_check(x->of, x->raw, x->bytes, "file");
        bench_snap_pairs(x->o, x->of, &save, run_file_save, run_fwrite, x, (double)x->bytes);
        bench_snap_pairs(x->o, x->of, &load, run_file_load, run_fread, x, (double)x->bytes);
    }
    unlink(x->plain);
    unlink(x->path);
}

static void make_image(speed *x, uint32_t codec, const unsigned char *with_key)
{
    kvt_save_options options = bench_snap_save_options(codec);
    options.key = with_key;
    x->image = bench_snap_image(&x->one, &options, &x->image_bytes, &x->image_room);
}

static void part_crypt(speed *x)
{
    static const struct {
        const char *save, *load, *file;
    } names[2] = {{"crypt_save_memory_1", "crypt_load_memory_1", "crypt_save_file_1"},
                  {"crypt_save_memory_2", "crypt_load_memory_2", "crypt_save_file_2"}};
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_RAW);
    uint64_t bound;
    options.key = key;
    bool has_crypt = kvt_seq_save_bound(x->one.seq, &bound, &options) != KVT_ERR_UNSUPPORTED;
    if (has_crypt)
        make_image(x, KVT_CODEC_RAW, key);
    for (int i = 0; i < 2; i++) {
        bench_figure f = {"crypt", names[i].save, "of raw", 0.5, true, "raw save", NULL};
        if (!has_crypt || (i == 1 && !bench_has_pool())) {
            f.note = has_crypt ? BENCH_SNAP_NO_POOL
                               : "not measured: the library was built without libsodium";
            bench_snap_missing(x->o, &f);
            f.name = names[i].file;
            bench_snap_missing(x->o, &f);
            f.name = names[i].load;
            f.bar = NAN;
            bench_snap_missing(x->o, &f);
            continue;
        }
        x->of = i ? &x->two : &x->one;
        run_load_crypt(x);
        bench_snap_check(x->of, x->raw, x->bytes, "crypt");
        bench_snap_pairs(x->o, x->of, &f, run_save_crypt, run_save, x, (double)x->bytes);
        f.name = names[i].file;
        bench_snap_pairs(x->o, x->of, &f, run_file_save_crypt, run_file_save, x, (double)x->bytes);
        f.name = names[i].load;
        f.bar = NAN;
        f.rival = "raw load";
        bench_snap_pairs(x->o, x->of, &f, run_load_crypt, run_load, x, (double)x->bytes);
    }
    if (has_crypt)
        bench_snap_free(x->image, x->image_room);
}

static void part_threads(speed *x)
{
    static const char *const names[2][2] = {{"threads_save_raw", "threads_load_raw"},
                                            {"threads_save_zstd", "threads_load_zstd"}};
    for (int i = 0; i < 2; i++) {
        bench_figure f = {"threads", names[i][0], "of one thread", NAN, true, "one thread", NULL};
        if (!bench_has_pool()) {
            f.note = BENCH_SNAP_NO_POOL;
            bench_snap_missing(x->o, &f);
            f.name = names[i][1];
            bench_snap_missing(x->o, &f);
            continue;
        }
        x->codec = i ? KVT_CODEC_ZSTD : KVT_CODEC_RAW;
        make_image(x, x->codec, NULL);
        run_load_two(x);
        bench_snap_check(&x->two, x->raw, x->bytes, "threads");
        bench_snap_pairs(x->o, &x->two, &f, run_save_two, run_save_one, x, (double)x->bytes);
        f.name = names[i][1];
        bench_snap_pairs(x->o, &x->two, &f, run_load_two, run_load_one, x, (double)x->bytes);
        bench_snap_free(x->image, x->image_room);
    }
}

void bench_snap_speed(const bench_options *o, unsigned parts)
{
    speed x;
    kvt_save_options raw = bench_snap_save_options(KVT_CODEC_RAW), zstd = raw, crypt = raw;
    uint64_t bound;
    size_t room;
    memset(&x, 0, sizeof x);
    x.o = o;
    uint64_t n_tokens = bench_snap_tokens(o, KVT_TYPE_I8, o->bytes);
    bench_snap_open(&x.one, o, KVT_TYPE_I8, 1, n_tokens, 0);
    bench_snap_fill(&x.one, n_tokens);
    x.raw = bench_snap_image(&x.one, &raw, &x.bytes, &room);
    x.path = bench_snap_path(o, "kvt");
    x.plain = bench_snap_path(o, "bin");
    x.room = room;
    zstd.codec = KVT_CODEC_ZSTD;
    crypt.key = key;
    const kvt_save_options *others[] = {&zstd, &crypt};
    for (size_t i = 0; i < 2; i++)
        if (kvt_seq_save_bound(x.one.seq, &bound, others[i]) == KVT_OK && bound > x.room)
            x.room = (size_t)bound;
    x.other = bench_snap_memory(x.room, true);
    if (parts & BENCH_PART_MEMORY)
        part_memory(&x);
    if (parts & (BENCH_PART_FILE | BENCH_PART_CRYPT | BENCH_PART_THREADS)) {
        if (bench_has_pool()) {
            bench_snap_open(&x.two, o, KVT_TYPE_I8, 2, n_tokens, 0);
            bench_require(kvt_seq_load_memory(x.two.seq, x.raw, x.bytes, NULL, NULL), x.two.cache,
                          "kvt_seq_load_memory");
        }
        if (parts & BENCH_PART_FILE)
            part_file(&x);
        if (parts & BENCH_PART_CRYPT)
            part_crypt(&x);
        if (parts & BENCH_PART_THREADS)
            part_threads(&x);
        bench_snap_close(&x.two);
    }
    unlink(x.plain);
    unlink(x.path);
    bench_snap_free(x.other, x.room);
    bench_snap_free(x.raw, room);
    bench_snap_close(&x.one);
}
