/*
 * The parts of snapshot's figures with bars.
 *
 *   bench_snap.c        the sequence that is saved, pairs of measurements, one line of a figure
 *   bench_snap_speed.c  memory, file, crypt, threads: beside memcpy, fwrite, fread and the raw save
 *   bench_snap_zstd.c   zstd: f16 beside libzstd on the same bytes
 *   bench_snap_delta.c  delta: the size and time of a turn's save
 *   bench_snap_map.c    map: a large file, opened in place
 *   bench_snap_model.c  model: sizes on a model's keys and values
 */
#ifndef BENCH_SNAP_H
#define BENCH_SNAP_H

#include "bench.h"

/* A sequence of synthetic tokens, no two blocks of which are the same, with the threads of the
   cache's own. */
typedef struct bench_snap {
    kvt_cache *cache;
    kvt_seq *seq;
    bench_case shape; /* ctx: max_tokens */
    uint32_t n_layers;
    uint32_t residual_tokens;
    bench_random random;
    float *pool, *k, *v;
    size_t width;
} bench_snap;

enum { BENCH_SNAP_LAYERS = 32 };

/* --quick: few small layers. residual_tokens: as in kvt_group_config. */
void bench_snap_open(bench_snap *s, const bench_options *o, kvt_type type, uint32_t threads,
                     uint64_t max_tokens, uint32_t residual_tokens);
void bench_snap_close(bench_snap *s);
/* Tokens, a multiple of 64, whose keys and values are at most so many bytes. */
uint64_t bench_snap_tokens(const bench_options *o, kvt_type type, uint64_t bytes);
void bench_snap_fill(bench_snap *s, uint64_t n_tokens); /* append so many */

/* Memory that has been written to, huge pages where the system has them, as the library's. */
unsigned char *bench_snap_memory(size_t bytes, bool touch);
void bench_snap_free(void *memory, size_t bytes);

kvt_save_options bench_snap_save_options(uint32_t codec);
/* Save to memory that is made here; *room: its size. */
unsigned char *bench_snap_image(const bench_snap *s, const kvt_save_options *options, size_t *bytes,
                                size_t *room);
/* Exits unless the sequence, saved raw, is these bytes again. */
void bench_snap_check(const bench_snap *s, const unsigned char *raw, size_t bytes,
                      const char *what);

/* Around what is timed: seconds; the processor time of all threads is kept for bench_snap_pairs. */
double bench_snap_start(void);
double bench_snap_stop(double start);
void bench_snap_elsewhere(void); /* instead: it was another process's, and is not known */

/* What a figure is. */
typedef struct bench_figure {
    const char *part, *name, *unit;
    double bar; /* NaN: none */
    bool at_least;
    const char *rival, *note; /* NULL: none */
} bench_figure;

/*
 * ours and rival in turn, each of which returns seconds. The value is rival / ours where the bar
 * is at_least (how fast, beside the rival), else ours / rival (the share of its time). bytes: what
 * one run of either saves or loads, for GB/s; NaN where they do not handle the same
 * bytes, or not all of them. cpu_value is the same quotient of processor times,
 * which other programs on the machine disturb less.
 */
void bench_snap_pairs(const bench_options *o, const bench_snap *s, const bench_figure *f,
                      double (*ours)(void *user), double (*rival)(void *user), void *user,
                      double bytes);
/* A figure without a spread; rival_value in `rival_unit`. */
void bench_snap_value(const bench_options *o, const bench_snap *s, const bench_figure *f,
                      double value, double rival_value, const char *rival_unit);
void bench_snap_missing(const bench_options *o, const bench_figure *f); /* not measured: f->note */
#define BENCH_SNAP_NO_POOL "not measured: the library was built without a thread pool"

/* A path in --dir that is removed when the program ends; up to 16 of them. */
const char *bench_snap_path(const bench_options *o, const char *suffix);

void bench_snap_speed(const bench_options *o, unsigned parts);
void bench_snap_zstd(const bench_options *o);
void bench_snap_delta(const bench_options *o);
void bench_snap_map(const bench_options *o);
void bench_snap_model(const bench_options *o);

/* Begin and end the figures: the records' name; 1 where --bars is given and a bar is missed. */
void bench_snap_begin(const bench_options *o, const char *bench, const char *title);
int bench_snap_end(const bench_options *o, const char *note);

/* All parts of o->parts; 1 where --bars is given and a bar is missed. */
int bench_snap_run(const bench_options *o);

#endif /* BENCH_SNAP_H */
