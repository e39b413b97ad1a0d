/*
 * What the parts of snapshot's figures share: a sequence of synthetic tokens, pairs of
 * measurements, and the line of a figure.
 *
 * Tokens come from a pool of normal numbers, each append from another place of it and multiplied
 * by another factor: so fast that gigabytes of cache are filled in seconds, and yet no block
 * repeats another one, which deltas would find, and no f16 number, which zstd would.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* madvise */
#endif
#include "bench_files.h"
#include "bench_snap.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { POOL = 1 << 22, STEP_TOKENS = 512, PATHS = 16 };

static const bench_column columns[] = {
    {"part", NULL, -7},      {"name", NULL, -26},       {"k_type", "K", -3},
    {"layers", "lay", 3},    {"ctx", NULL, 6},          {"threads", "thr", 3},
    {"value", NULL, 9},      {"p25", NULL, 8},          {"p75", NULL, 8},
    {"cpu_value", "cpu", 7}, {"unit", NULL, -14},       {"bar_text", "bar", -8},
    {"met", NULL, -5},       {"gbps", "GB/s", 7},       {"ms_median", "ms", 9},
    {"rival", NULL, -26},    {"rival_value", "its", 9}, {"rival_unit", "unit", -6}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

static size_t n_bars, n_missed;
static const char *bench_name = "snapshot_bars";

/* ---- files ---- */

static char paths[PATHS][600];
static size_t n_paths;

static void remove_paths(void)
{
    for (size_t i = 0; i < n_paths; i++)
        unlink(paths[i]);
}

const char *bench_snap_path(const bench_options *o, const char *suffix)
{
    if (n_paths == PATHS)
        bench_fail(1, "more than %d files", PATHS);
    bench_at_end(remove_paths);
    char *path = paths[n_paths++];
    int n = snprintf(path, sizeof paths[0], "%s/kvt-bench-%ld-%zu.%s", o->dir, (long)getpid(),
                     n_paths, suffix);
    if (n < 0 || (size_t)n >= sizeof paths[0])
        bench_fail(2, "--dir: the path is too long");
    return path;
}

/* ---- memory ---- */

unsigned char *bench_snap_memory(size_t bytes, bool touch)
{
    unsigned char *p = NULL;
    size_t size = (bytes + BENCH_HUGE_PAGE - 1) / BENCH_HUGE_PAGE * BENCH_HUGE_PAGE;
    if (posix_memalign((void **)&p, BENCH_HUGE_PAGE, size) != 0)
        bench_fail(1, "no memory for %zu bytes", bytes);
#if defined(MADV_HUGEPAGE)
    madvise(p, size, MADV_HUGEPAGE);
#endif
    if (touch)
        memset(p, 1, size);
    return p;
}

void bench_snap_free(void *memory, size_t bytes)
{
    (void)bytes;
    free(memory);
}

/* ---- the sequence ---- */

static void set_shape(bench_case *c, const bench_options *o, kvt_type type, uint32_t *n_layers)
{
    memset(c, 0, sizeof *c);
    c->isa = o->isas[0];
    c->k_type = c->v_type = type;
    c->q_heads = o->quick ? 4 : 32;
    c->kv_heads = o->quick ? 2 : 8;
    c->k_dim = c->v_dim = o->quick ? 64 : 128;
    *n_layers = o->layers ? (uint32_t)o->layers : o->quick ? 4 : BENCH_SNAP_LAYERS;
}

void bench_snap_open(bench_snap *s, const bench_options *o, kvt_type type, uint32_t threads,
                     uint64_t max_tokens, uint32_t residual_tokens)
{
    char error[256] = "";
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    memset(s, 0, sizeof *s);
    set_shape(&s->shape, o, type, &s->n_layers);
    s->shape.threads = threads;
    s->shape.ctx = max_tokens;
    s->residual_tokens = residual_tokens;
    group.n_layers = s->n_layers;
    group.n_q_heads = s->shape.q_heads;
    group.n_kv_heads = s->shape.kv_heads;
    group.k_dim = s->shape.k_dim;
    group.v_dim = s->shape.v_dim;
    group.k_type = group.v_type = type;
    group.residual_tokens = residual_tokens;
    config.groups = &group;
    config.n_groups = 1;
    config.n_threads = threads;
    config.max_tokens = max_tokens;
    config.isa = o->isas[0];
    config.error_text = error;
    config.error_text_bytes = sizeof error;
    kvt_status status = kvt_cache_create(&config, &s->cache);
    if (status != KVT_OK)
        bench_fail(1, "cannot create a cache: %s: %s", kvt_status_string(status), error);
    bench_require(kvt_seq_create(s->cache, &s->seq), s->cache, "kvt_seq_create");
    s->width = (size_t)s->shape.kv_heads * s->shape.k_dim;
    s->pool = bench_alloc(POOL, sizeof *s->pool);
    s->k = bench_alloc(STEP_TOKENS * s->width, sizeof *s->k);
    s->v = bench_alloc(STEP_TOKENS * s->width, sizeof *s->v);
    bench_random_seed(&s->random, o->seed);
    bench_random_fill(&s->random, s->pool, POOL);
}

void bench_snap_close(bench_snap *s)
{
    kvt_seq_destroy(s->seq);
    kvt_cache_destroy(s->cache);
    free(s->pool);
    free(s->k);
    free(s->v);
    memset(s, 0, sizeof *s);
}

uint64_t bench_snap_tokens(const bench_options *o, kvt_type type, uint64_t bytes)
{
    bench_case c;
    uint32_t n_layers;
    set_shape(&c, o, type, &n_layers);
    double one = bench_kv_bytes(&c, 64) * n_layers;
    uint64_t n = (uint64_t)((double)bytes / one) * 64;
    return n > 128 ? n : 128;
}

static void draw(bench_snap *s, float *x, size_t n)
{
    uint64_t bits = bench_random_bits(&s->random);
    size_t at = (size_t)(bits >> 32) % (POOL - STEP_TOKENS * s->width + 1);
    float factor = 0.5f + 0x1p-32f * (float)(uint32_t)bits;
    for (size_t i = 0; i < n; i++)
        x[i] = factor * s->pool[at + i];
}

void bench_snap_fill(bench_snap *s, uint64_t n_tokens)
{
    kvt_tensor k = kvt_tensor_f32(s->k), v = kvt_tensor_f32(s->v);
    while (n_tokens > 0) {
        uint64_t n = n_tokens < STEP_TOKENS ? n_tokens : STEP_TOKENS;
        int32_t ids[STEP_TOKENS];
        bench_end_interrupted();
        for (uint64_t i = 0; i < n; i++)
            ids[i] = (int32_t)(kvt_seq_length(s->seq) + i);
        bench_require(kvt_seq_begin(s->seq, n, NULL), s->cache, "kvt_seq_begin");
        for (uint32_t layer = 0; layer < s->n_layers; layer++) {
            draw(s, s->k, (size_t)n * s->width);
            draw(s, s->v, (size_t)n * s->width);
            bench_require(kvt_append(s->seq, layer, &k, &v), s->cache, "kvt_append");
        }
        bench_require(kvt_seq_commit(s->seq, ids), s->cache, "kvt_seq_commit");
        n_tokens -= n;
    }
}

kvt_save_options bench_snap_save_options(uint32_t codec)
{
    kvt_save_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.codec = codec;
    o.no_fsync = 1;
    return o;
}

unsigned char *bench_snap_image(const bench_snap *s, const kvt_save_options *options, size_t *bytes,
                                size_t *room)
{
    uint64_t bound;
    bench_require(kvt_seq_save_bound(s->seq, &bound, options), s->cache, "kvt_seq_save_bound");
    *room = (size_t)bound;
    unsigned char *image = bench_snap_memory(*room, true);
    bench_require(kvt_seq_save_memory(s->seq, image, *room, bytes, options), s->cache,
                  "kvt_seq_save_memory");
    return image;
}

void bench_snap_check(const bench_snap *s, const unsigned char *raw, size_t bytes, const char *what)
{
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_RAW);
    size_t n, room;
    unsigned char *again = bench_snap_image(s, &options, &n, &room);
    if (n != bytes || memcmp(again, raw, n) != 0)
        bench_fail(1, "snapshot: %s: the sequence came back different", what);
    bench_snap_free(again, room);
}

/* ---- figures ---- */

static double cpu_start, cpu_seconds;

static double cpu_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double bench_snap_start(void)
{
    bench_end_interrupted();
    cpu_start = cpu_now();
    return bench_seconds();
}

double bench_snap_stop(double start)
{
    double seconds = bench_seconds() - start;
    cpu_seconds = cpu_now() - cpu_start;
    return seconds;
}

void bench_snap_elsewhere(void)
{
    cpu_seconds = NAN;
}

/* Seconds of each pair, ours and the rival's, and their quotients. */
typedef struct pairs {
    double *time, *rival, *value;        /* by the clock */
    double *cpu, *rival_cpu, *cpu_value; /* of processor time */
    double bytes;                        /* NaN: both do not read the same ones */
} pairs;

static void emit(const bench_options *o, const bench_snap *s, const bench_figure *f,
                 const bench_stats *value, const pairs *p, double rival_value,
                 const char *rival_unit)
{
    bench_record r;
    bench_case none = {0};
    const bench_case *c = s ? &s->shape : &none;
    const char *type = s ? bench_type_name(c->k_type) : NULL;
    size_t n = p ? o->bar_runs : 0;
    double bytes = p ? p->bytes : 0.0;
    bool has_bar = isfinite(f->bar), measured = isfinite(value->median);
    bool met = f->at_least ? value->median >= f->bar : value->median <= f->bar;
    char bar[32] = "-";
    bench_stats time = {0}, rival_time = {0};
    if (p) {
        time = bench_stats_of(p->time, n);
        rival_time = bench_stats_of(p->rival, n);
        rival_value = 1e-9 * bytes / rival_time.median;
        rival_unit = "GB/s";
        if (!isfinite(bytes)) {
            rival_value = 1e3 * rival_time.median;
            rival_unit = "ms";
        }
    }
    if (has_bar)
        snprintf(bar, sizeof bar, "%s %.4g", f->at_least ? ">=" : "<=", f->bar);
    n_bars += has_bar && measured;
    n_missed += has_bar && measured && !met;
    bench_record_begin(&r, bench_name, s ? kvt_cache_isa(s->cache) : NULL, type, type, c);
    bench_record_integer(&r, "layers", s ? s->n_layers : 0);
    bench_record_text(&r, "part", f->part);
    bench_record_text(&r, "name", f->name);
    bench_record_number(&r, "value", value->median);
    bench_record_text(&r, "unit", f->unit);
    bench_record_number(&r, "bar", f->bar);
    bench_record_text(&r, "bar_text", has_bar ? bar : NULL);
    bench_record_text(&r, "met", !has_bar || !measured ? NULL : met ? "yes" : "no");
    bench_record_text(&r, "better", f->at_least ? "higher" : "lower");
    bench_record_number(&r, "p10", n ? value->p10 : NAN);
    bench_record_number(&r, "p25", n ? value->p25 : NAN);
    bench_record_number(&r, "p75", n ? value->p75 : NAN);
    bench_record_number(&r, "p90", n ? value->p90 : NAN);
    bench_record_number(&r, "cpu_value", p ? bench_median(p->cpu_value, n) : NAN);
    bench_record_number(&r, "cpu_ms", p ? 1e3 * bench_median(p->cpu, n) : NAN);
    bench_record_text(&r, "rival", f->rival);
    bench_record_number(&r, "rival_value", rival_value);
    bench_record_text(&r, "rival_unit", rival_unit);
    bench_record_number(&r, "rival_cpu_ms", p ? 1e3 * bench_median(p->rival_cpu, n) : NAN);
    bench_record_number(&r, "rival_ms", p ? 1e3 * rival_time.median : NAN);
    bench_record_number(&r, "gbps", p ? 1e-9 * bytes / time.median : NAN);
    bench_record_number(&r, "ms_median", p ? 1e3 * time.median : NAN);
    bench_record_integer(&r, "bytes", isfinite(bytes) ? (uint64_t)bytes : 0);
    bench_record_integer(&r, "pairs", n);
    bench_record_text(&r, "note", f->note);
    bench_record_end(&r, o, false);
    bench_emit(o, &r, columns, N_COLUMNS);
    if (f->note)
        bench_note(o, "        %s", f->note);
}

void bench_snap_pairs(const bench_options *o, const bench_snap *s, const bench_figure *f,
                      double (*ours)(void *user), double (*rival)(void *user), void *user,
                      double bytes)
{
    size_t n = o->bar_runs;
    double *all = bench_alloc(6 * n, sizeof *all);
    pairs p = {all, all + n, all + 2 * n, all + 3 * n, all + 4 * n, all + 5 * n, bytes};
    rival(user);
    ours(user);
    for (size_t i = 0; i < n; i++) {
        for (size_t turn = 0; turn < 2; turn++) {
            if ((i + turn) % 2 == 0) {
                p.rival[i] = rival(user);
                p.rival_cpu[i] = cpu_seconds;
            } else {
                p.time[i] = ours(user);
                p.cpu[i] = cpu_seconds;
            }
        }
        p.value[i] = f->at_least ? p.rival[i] / p.time[i] : p.time[i] / p.rival[i];
        p.cpu_value[i] = f->at_least ? p.rival_cpu[i] / p.cpu[i] : p.cpu[i] / p.rival_cpu[i];
    }
    bench_stats stats = bench_stats_of(p.value, n);
    emit(o, s, f, &stats, &p, NAN, NULL);
    free(all);
}

void bench_snap_value(const bench_options *o, const bench_snap *s, const bench_figure *f,
                      double value, double rival_value, const char *rival_unit)
{
    bench_stats stats = {.median = value};
    emit(o, s, f, &stats, NULL, rival_value, rival_unit);
}

void bench_snap_missing(const bench_options *o, const bench_figure *f)
{
    bench_snap_value(o, NULL, f, NAN, NAN, NULL);
}

void bench_snap_begin(const bench_options *o, const char *bench, const char *title)
{
    bench_name = bench;
    n_bars = n_missed = 0;
    bench_table_begin(o, title, columns, N_COLUMNS);
}

int bench_snap_end(const bench_options *o, const char *note)
{
    bench_note(o,
               "value: median of the pairs' ratios, p25 and p75 its quartiles, cpu: of processor "
               "times; GB/s and ms: of the "
               "library, its: of what it is beside.\n"
               "%zu bars, %zu missed. %s",
               n_bars, n_missed, note);
    return o->bars && n_missed > 0;
}

int bench_snap_run(const bench_options *o)
{
    unsigned speed = BENCH_PART_MEMORY | BENCH_PART_FILE | BENCH_PART_CRYPT | BENCH_PART_THREADS;
    uint64_t available = bench_available_bytes();
    if (o->parts & (speed | BENCH_PART_ZSTD) && available != UINT64_MAX &&
        5 * o->bytes > available / 10 * 9) /* two caches, two images and the files */
        bench_fail(2,
                   "snapshot: --bytes of %.1f GiB need five times as much; %.1f GiB are available",
                   (double)o->bytes * 0x1p-30, (double)available * 0x1p-30);
    bench_snap_begin(o, "snapshot_bars", "snapshot: figures with bars");
    if (o->parts & speed)
        bench_snap_speed(o, o->parts);
    if (o->parts & BENCH_PART_ZSTD)
        bench_snap_zstd(o);
    if (o->parts & BENCH_PART_DELTA)
        bench_snap_delta(o);
    if (o->parts & BENCH_PART_MAP)
        bench_snap_map(o);
    if (o->parts & BENCH_PART_MODEL)
        bench_snap_model(o);
    return bench_snap_end(o, "Files are new ones in the page cache, without fsync.");
}
