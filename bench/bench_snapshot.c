/*
 * snapshot: first (--part sweep) save and load of one sequence of each --k, --v, --ctx, ...,
 * through memory and through a file, compressed and raw, beside memcpy (memory) or plain fwrite and
 * fread (file) of as many bytes.
 *
 * bytes are the keys and values of all layers as decode counts them, not the stored ones, so the
 * rates include the effect of compression. Files, the plain ones too, are written with and without
 * fsync; they are read back from the page cache. The keys are random: real ones compress a little
 * better.
 *
 * Loaded and saved state are compared (every dequantized number of the first and the last layer)
 * before anything is timed.
 *
 * Behind it come the figures with bars, on sequences of their own (bench_snap.c).
 */
#include "bench_files.h"
#include "bench_snap.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const bench_column columns[] = {{"isa", NULL, -8},           {"k_type", "K", -4},
                                       {"v_type", "V", -4},         {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},      {"ctx", NULL, 7},
                                       {"layers", "lay", 4},        {"op", NULL, -4},
                                       {"medium", NULL, -6},        {"codec", NULL, -4},
                                       {"fsync", NULL, -5},         {"ms_median", "ms", 9},
                                       {"ms_p10", "p10", 9},        {"ms_p90", "p90", 9},
                                       {"bytes", NULL, 10},         {"gbps", "GB/s", 7},
                                       {"plain", "beside", -7},     {"plain_gbps", "GB/s", 7},
                                       {"plain_ratio", "ratio", 7}, {"stored_bytes", "stored", 10},
                                       {"compression", "compr.", 7}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

/* A growing buffer with a read position. */
typedef struct buffer {
    unsigned char *data;
    size_t n, capacity, at;
} buffer;

static int buffer_write(void *user, const void *data, size_t bytes)
{
    buffer *b = user;
    if (bytes > b->capacity - b->n) {
        size_t capacity = b->capacity + b->capacity / 2 + bytes;
        unsigned char *p = realloc(b->data, capacity);
        if (!p)
            return -1;
        b->data = p;
        b->capacity = capacity;
    }
    memcpy(b->data + b->n, data, bytes);
    b->n += bytes;
    return 0;
}

static int64_t buffer_read(void *user, void *data, size_t bytes)
{
    buffer *b = user;
    size_t n = b->n - b->at < bytes ? b->n - b->at : bytes;
    memcpy(data, b->data + b->at, n);
    b->at += n;
    return (int64_t)n;
}

typedef struct snapshot {
    bench_cache b; /* seqs[0] is saved, seqs[1] loaded into */
    buffer stream;
    unsigned char *plain, *copy; /* [bytes] for memcpy, fwrite and fread */
    size_t bytes;
    uint32_t codec;
    bool fsync;
} snapshot;

/* Files that are removed also when the program fails. */
static char file_path[512], plain_path[512];

static void remove_files(void)
{
    if (file_path[0])
        unlink(file_path);
    if (plain_path[0])
        unlink(plain_path);
}

static kvt_save_options save_options(const snapshot *s)
{
    kvt_save_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.codec = s->codec;
    o.no_fsync = !s->fsync;
    return o;
}

/* ---- what is timed: seconds each ---- */

static double save_memory(snapshot *s)
{
    kvt_save_options o = save_options(s);
    kvt_writer w = {&s->stream, buffer_write};
    s->stream.n = 0;
    double start = bench_seconds();
    bench_require(kvt_seq_save_stream(s->b.seqs[0], &w, &o), s->b.cache, "kvt_seq_save_stream");
    return bench_seconds() - start;
}

static double load_memory(snapshot *s)
{
    kvt_reader r = {&s->stream, buffer_read};
    s->stream.at = 0;
    bench_require(kvt_seq_clear(s->b.seqs[1]), s->b.cache, "kvt_seq_clear");
    double start = bench_seconds();
    bench_require(kvt_seq_load_stream(s->b.seqs[1], &r, NULL, NULL), s->b.cache,
                  "kvt_seq_load_stream");
    return bench_seconds() - start;
}

static double save_file(snapshot *s)
{
    kvt_save_options o = save_options(s);
    unlink(file_path); /* a new file, as the plain one */
    double start = bench_seconds();
    bench_require(kvt_seq_save(s->b.seqs[0], file_path, &o), s->b.cache, "kvt_seq_save");
    return bench_seconds() - start;
}

static double load_file(snapshot *s)
{
    bench_require(kvt_seq_clear(s->b.seqs[1]), s->b.cache, "kvt_seq_clear");
    double start = bench_seconds();
    bench_require(kvt_seq_load(s->b.seqs[1], file_path, NULL, NULL), s->b.cache, "kvt_seq_load");
    return bench_seconds() - start;
}

static double plain_memory(snapshot *s)
{
    double start = bench_seconds();
    memcpy(s->copy, s->plain, s->bytes);
    return bench_seconds() - start;
}

static double plain_write(snapshot *s)
{
    unlink(plain_path);
    double start = bench_seconds();
    FILE *f = fopen(plain_path, "wb");
    if (!f || fwrite(s->plain, 1, s->bytes, f) != s->bytes || fflush(f) != 0 ||
        (s->fsync && fsync(fileno(f)) != 0) || fclose(f) != 0)
        bench_fail(1, "%s: %s", plain_path, strerror(errno));
    return bench_seconds() - start;
}

static double plain_read(snapshot *s)
{
    double start = bench_seconds();
    FILE *f = fopen(plain_path, "rb");
    if (!f || fread(s->copy, 1, s->bytes, f) != s->bytes || fclose(f) != 0)
        bench_fail(1, "%s: cannot be read back: %s", plain_path, strerror(errno));
    return bench_seconds() - start;
}

/* ---- */

static void check(snapshot *s, const char *what)
{
    uint64_t n = s->b.ctx;
    if (kvt_seq_length(s->b.seqs[1]) != n)
        bench_fail(1, "%s: %llu tokens came back of %llu", what,
                   (unsigned long long)kvt_seq_length(s->b.seqs[1]), (unsigned long long)n);
    for (int i = 0; i < 4; i++) {
        kvt_side side = i % 2 ? KVT_SIDE_V : KVT_SIDE_K;
        uint32_t layer = i < 2 ? 0 : (uint32_t)(s->b.n_layers - 1);
        size_t width = side == KVT_SIDE_V ? s->b.source.v_width : s->b.source.k_width;
        float *a = bench_alloc((size_t)n * width, sizeof *a);
        float *b = bench_alloc((size_t)n * width, sizeof *b);
        kvt_tensor ta = kvt_tensor_f32(a), tb = kvt_tensor_f32(b);
        bench_require(kvt_read(s->b.seqs[0], layer, side, 0, n, &ta), s->b.cache, "kvt_read");
        bench_require(kvt_read(s->b.seqs[1], layer, side, 0, n, &tb), s->b.cache, "kvt_read");
        if (memcmp(a, b, (size_t)n * width * sizeof *a) != 0)
            bench_fail(1, "%s: layer %u came back different", what, (unsigned)layer);
        free(b);
        free(a);
    }
}

typedef struct subject {
    const char *op, *medium, *plain;
    double (*run)(snapshot *s);
    double (*run_plain)(snapshot *s);
} subject;

static void report(const bench_options *options, snapshot *s, bench_read *reader,
                   const subject *what, double stored)
{
    const bench_case *c = &s->b.shape;
    size_t n = options->runs;
    double *time = bench_alloc(n, sizeof *time), *plain = bench_alloc(n, sizeof *plain);
    double *plain_ratio = bench_alloc(n, sizeof *plain_ratio);
    double *read = bench_alloc(n, sizeof *read), *ratio = bench_alloc(n, sizeof *ratio);
    double bytes = (double)s->bytes;
    bool file = what->medium[0] == 'f';
    bench_record r;
    what->run(s);
    what->run_plain(s);
    for (size_t i = 0; i < n; i++) {
        double t_plain = 0.0;
        bench_end_interrupted();
        if (i % 2 == 0)
            t_plain = what->run_plain(s);
        time[i] = what->run(s);
        if (i % 2 == 1)
            t_plain = what->run_plain(s);
        read[i] = 1e-9 * bench_read_bytes(reader) / bench_read_run(reader);
        ratio[i] = 1e-9 * bytes / time[i] / read[i];
        plain[i] = 1e-9 * bytes / t_plain;
        plain_ratio[i] = t_plain / time[i];
    }
    bench_record_begin(&r, "snapshot", kvt_cache_isa(s->b.cache), bench_type_name(c->k_type),
                       bench_type_name(c->v_type), c);
    bench_record_time(&r, time, n, bytes, bench_median(read, n), bench_median(ratio, n));
    bench_record_text(&r, "op", what->op);
    bench_record_text(&r, "medium", what->medium);
    bench_record_text(&r, "codec", s->codec == KVT_CODEC_RAW ? "raw" : "zstd");
    bench_record_text(&r, "fsync", !file || what->op[0] == 'l' ? NULL : s->fsync ? "yes" : "no");
    bench_record_text(&r, "plain", what->plain);
    bench_record_number(&r, "plain_gbps", bench_median(plain, n));
    bench_record_number(&r, "plain_ratio", bench_median(plain_ratio, n));
    bench_stats spread = bench_stats_of(plain_ratio, n);
    bench_record_number(&r, "plain_ratio_p10", spread.p10);
    bench_record_number(&r, "plain_ratio_p90", spread.p90);
    bench_record_integer(&r, "stored_bytes", (uint64_t)stored);
    bench_record_number(&r, "compression", bytes / stored);
    bench_record_integer(&r, "layers", s->b.n_layers);
    bench_record_text(&r, "read_loop", bench_read_loop(reader));
    bench_record_end(&r, options, bench_team_pinned(s->b.team));
    bench_emit(options, &r, columns, N_COLUMNS);
    free(ratio);
    free(read);
    free(plain_ratio);
    free(plain);
    free(time);
}

static void run_codec(const bench_options *options, snapshot *s, bench_read *reader)
{
    static const subject save_to_memory = {"save", "memory", "memcpy", save_memory, plain_memory};
    static const subject load_from_memory = {"load", "memory", "memcpy", load_memory, plain_memory};
    static const subject save_to_file = {"save", "file", "fwrite", save_file, plain_write};
    static const subject load_from_file = {"load", "file", "fread", load_file, plain_read};

    save_memory(s);
    load_memory(s);
    check(s, "memory stream");
    double stored = (double)s->stream.n;
    report(options, s, reader, &save_to_memory, stored);
    report(options, s, reader, &load_from_memory, stored);

    s->fsync = false;
    save_file(s);
    bench_require(kvt_seq_clear(s->b.seqs[1]), s->b.cache, "kvt_seq_clear");
    load_file(s);
    check(s, "file");
    kvt_snapshot_info info;
    char error[256] = "";
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    kvt_status status = kvt_snapshot_inspect(file_path, 1, &info, error, sizeof error);
    if (status != KVT_OK)
        bench_fail(1, "%s: %s: %s", file_path, kvt_status_string(status), error);
    stored = (double)info.file_bytes;
    report(options, s, reader, &save_to_file, stored);
    s->fsync = true;
    report(options, s, reader, &save_to_file, stored);
    s->fsync = false;
    plain_write(s);
    report(options, s, reader, &load_from_file, stored);
}

static int run(const bench_options *options, const bench_case *c)
{
    snapshot s;
    bench_random random;
    size_t n_layers, n_seqs;
    uint64_t set_bytes = options->quick ? 1 << 20 : 4 * options->llc_bytes;
    memset(&s, 0, sizeof s);
    bench_plan_layers(c, c->ctx, set_bytes, options->layers, &n_layers, &n_seqs);
    s.bytes = (size_t)(bench_kv_bytes(c, c->ctx) * (double)n_layers);
    bench_cache_create(&s.b, c, n_layers, 2, c->ctx, 4 * (uint64_t)s.bytes + set_bytes,
                       options->seed);
    s.b.n_seqs = 1; /* fill the first one only */
    s.b.unique = true;
    bench_cache_fill(&s.b, c->ctx);
    s.b.n_seqs = 2;

    /* Random bytes: file systems and disks may compress zeros. */
    s.plain = bench_alloc(s.bytes, 1);
    s.copy = bench_alloc(s.bytes, 1);
    bench_random_seed(&random, options->seed + 2);
    for (size_t i = 0; i + 8 <= s.bytes; i += 8) {
        uint64_t bits = bench_random_bits(&random);
        memcpy(s.plain + i, &bits, sizeof bits);
    }
    snprintf(file_path, sizeof file_path, "%s/kvt-bench-%ld.kvt", options->dir, (long)getpid());
    snprintf(plain_path, sizeof plain_path, "%s/kvt-bench-%ld.bin", options->dir, (long)getpid());

    bench_read *reader =
        bench_read_create(&s.b.heap, s.b.team, bench_heap_main_size(&s.b.heap), set_bytes);
    for (int codec = 0; codec < 2; codec++) {
        bench_end_interrupted();
        s.codec = codec ? KVT_CODEC_RAW : KVT_CODEC_ZSTD;
        run_codec(options, &s, reader);
        remove_files();
    }
    bench_read_destroy(reader);
    free(s.stream.data);
    free(s.copy);
    free(s.plain);
    bench_cache_destroy(&s.b);
    return 0;
}

static int sweep(const bench_options *options)
{
    if (strlen(options->dir) > sizeof file_path - 64)
        bench_fail(2, "--dir: the path is too long");
    bench_at_end(remove_files);
    bench_table_begin(options, "snapshot: one sequence, all layers", columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(
        options,
        "%s\n"
        "GB/s = these bytes, of all layers, over the median time, compressed or not. beside: "
        "as many random bytes by\n"
        "memcpy, fwrite (and fsync where the snapshot does) or fread, in turn; ratio = median "
        "of the pairs' ratios to it.\n"
        "Loads are into recycled blocks; files are read from the page cache. stored: the "
        "whole snapshot; compr. = bytes / stored.",
        bench_kv_formula);
    return result;
}

int bench_snapshot(const bench_options *options)
{
    int result = 0;
    if (options->parts & BENCH_PART_SWEEP)
        result = sweep(options);
    if (options->parts & ~BENCH_PART_SWEEP) {
        if (options->parts & BENCH_PART_SWEEP)
            bench_note(options, "%s", "");
        int code = bench_snap_run(options);
        result = code > result ? code : result;
    }
    return result;
}
