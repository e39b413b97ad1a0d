/*
 * What the files of bench/ share.
 *
 *   bench_util.c            errors, memory, time, random numbers, number formats, statistics
 *   bench_report.c          one record: a JSON line or a row of a table
 *   bench_machine.c         processor, cache size, the allocator hook, a team of pinned threads
 *   bench_read.c            streaming-read bandwidth
 *   bench_peak.c            peaks of arithmetic, and the clock
 *   bench_cache.c           caches filled with random tokens, and attention in double
 *   bench_attend.c          attend calls, and the check of their output
 *   bench_survey.c, bench_decode.c, bench_against.c, bench_ggml.c, bench_prefill.c, bench_step.c,
 *   bench_append.c, bench_seal.c, bench_fork.c, bench_prefix.c, bench_shift.c, bench_snapshot.c,
 *   bench_fidelity.c, bench_fidelity_model.c, bench_fidelity_qkv.c
 *                           the commands
 *   bench_snap*.c           snapshot's figures with bars (bench_snap.h)
 *   bench_store.c           store, with bars likewise
 *   bench_rival.c           ggml-style q8_0, for comparison
 *   bench_formats.c         the other formats that fidelity compares (bench_formats.h)
 *   bench_npy.c             captured queries, keys and values
 *   bench_plot.c            SVG
 *   bench_files.c           output files, and what is removed at the end (bench_files.h)
 *   bench_lines.c           files of JSON lines, growing texts (bench_lines.h)
 *   bench_compare.c         compare: two such files
 *   bench_measure.c, bench_chart.c, bench_tables.c, bench_sections.c, bench_sweep.c, bench_page.c
 *                           report: a page with charts, from such lines (bench_page.h)
 *   kvt_bench.c             flags and cases
 *
 * All of it includes kvtile's public header only. Errors are not propagated: bench_fail prints one
 * line and exits.
 *
 * Exit codes: 0 done; 1 a call, a check or a bar failed; 2 the command line is wrong.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <kvtile/kvtile.h>

#if defined(__GNUC__)
#define BENCH_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define BENCH_PRINTF(text, first)
#endif

/* ---- util ---- */

_Noreturn void bench_fail(int exit_code, const char *format, ...) BENCH_PRINTF(2, 3);

/* Exit unless status is KVT_OK; the message has the cache's own text (cache may be NULL). */
void bench_require(kvt_status status, const kvt_cache *cache, const char *what);

/* Bytes of the UTF-8 sequence that a text begins with; 0: it is none. */
size_t bench_utf8(const char *text);

void *bench_alloc(size_t count, size_t size); /* zeroed; exits when there is no memory */

double bench_seconds(void); /* a monotonic clock */

typedef struct bench_random {
    uint64_t state[4];
    double spare;
    bool has_spare;
} bench_random;

void bench_random_seed(bench_random *r, uint64_t seed);
uint64_t bench_random_bits(bench_random *r);
double bench_random_normal(bench_random *r);
void bench_random_fill(bench_random *r, float *x, size_t n); /* N(0,1) */

/* IEEE binary16 and bfloat16, to nearest even. */
uint16_t bench_to_f16(float x);
float bench_from_f16(uint16_t h);
uint16_t bench_to_bf16(float x);

/* ---- statistics ---- */

typedef struct bench_stats {
    double min, p10, p25, median, p75, p90;
} bench_stats;

bench_stats bench_stats_of(const double *x, size_t n);
double bench_median(const double *x, size_t n);

/* ---- options ---- */

/* The parts of snapshot. */
#define BENCH_PART_SWEEP 1u
#define BENCH_PART_MEMORY 2u
#define BENCH_PART_ZSTD 4u
#define BENCH_PART_FILE 8u
#define BENCH_PART_DELTA 16u
#define BENCH_PART_MAP 32u
#define BENCH_PART_MODEL 64u
#define BENCH_PART_CRYPT 128u
#define BENCH_PART_THREADS 256u
/* Those of store. */
#define BENCH_PART_DIRECTORY 512u
#define BENCH_PART_REDIS 1024u
#define BENCH_PARTS_STORE (BENCH_PART_DIRECTORY | BENCH_PART_REDIS)

enum { BENCH_LIST = 32 };

typedef struct bench_pair {
    uint32_t first, second;
} bench_pair;

/* How i8 is multiplied: KVT_ATTEND_. */
typedef enum bench_mode { BENCH_NEAR, BENCH_F32, BENCH_FAST } bench_mode;

/* ggml's flash attention over caches of these types; LIKE: of about as many bits as K's type. */
typedef enum bench_peer {
    BENCH_PEER_LIKE,
    BENCH_PEER_F16,
    BENCH_PEER_Q8_0,
    BENCH_PEER_Q4_0
} bench_peer;

typedef struct bench_options {
    bool json, quick;
    uint64_t seed;
    size_t runs;   /* pairs of measurements */
    size_t layers; /* 0: as many as exceed the last-level cache */
    uint64_t llc_bytes;
    bool llc_given;

    kvt_type k_types[BENCH_LIST], v_types[BENCH_LIST];
    size_t n_k_types, n_v_types;  /* n_v_types 0: V as K */
    bench_pair heads[BENCH_LIST]; /* query, kv */
    size_t n_heads;
    bench_pair dims[BENCH_LIST]; /* K, V */
    size_t n_dims;
    bool v_in_k; /* V is K's first dims: KVT_GROUP_V_IN_K */
    uint64_t ctx[BENCH_LIST];
    size_t n_ctx;
    uint32_t threads[BENCH_LIST];
    size_t n_threads;
    const char *isas[BENCH_LIST]; /* NULL: the widest */
    size_t n_isas;

    bench_mode modes[BENCH_LIST];
    size_t n_modes;
    uint64_t queries;             /* prefill */
    uint64_t window;              /* decode; 0: none */
    bool has_against;             /* decode */
    kvt_type against;             /* for K and V */
    bench_peer peers[BENCH_LIST]; /* decode */
    size_t n_peers;
    uint64_t steps; /* step: of a measurement */
    size_t forks;   /* prefix */
    bool count;     /* step: nothing is timed */

    uint64_t tokens[BENCH_LIST]; /* append: tokens a call */
    size_t n_tokens;
    kvt_dtype dtypes[BENCH_LIST]; /* append: of the input */
    size_t n_dtypes;

    const char *dir;           /* snapshot: where files go, as all below */
    unsigned parts;            /* BENCH_PART_ */
    uint64_t bytes, map_bytes; /* of the caches; 0: the default */
    bool bars;                 /* 1 is the exit code where one is missed */
    const char *redis;         /* store: a host; NULL: one is started */
    uint32_t redis_port;
    uint64_t pipeline; /* store: commands in flight */
    size_t bar_runs;   /* as runs, but for the default */

    double offsets[BENCH_LIST]; /* fidelity: of some K channels, in deviations */
    size_t n_offsets;
    const char *model, *tokenizer, *text;
    size_t stories;
    const char *qkv; /* NAME of NAME.q.npy, NAME.k.npy, NAME.v.npy */
    bool full;       /* every query sees every token */
    double scale;    /* of logits; 0: 1 / sqrt(dim) */
    bool per_layer;
    const struct bench_format *formats[BENCH_LIST]; /* references */
    size_t n_formats;
    bool formats_given;
    const char *svg;

    const char *command_line;          /* as it was given */
    const char *out, *from, *markdown; /* report */
    bool force;                        /* report, compare */
    double threshold;                  /* compare: percent */
    const char *files[2];              /* compare */
    size_t n_files;
} bench_options;

/* One point of the sweep over an options' lists. */
typedef struct bench_case {
    const char *isa;
    kvt_type k_type, v_type;
    uint32_t q_heads, kv_heads, k_dim, v_dim, threads;
    bool v_in_k; /* v_type is k_type then */
    bool rope;   /* the group's RoPE is described: all dims, in halves, base 10000 */
    uint64_t ctx;
    uint32_t window; /* 0: none */
} bench_case;

/* Tokens that the last token's query sees. */
static inline uint64_t bench_tokens_seen(const bench_case *c)
{
    return c->window && c->window < c->ctx ? c->window : c->ctx;
}

const char *bench_type_name(kvt_type type);
/* V's type; for people (not in JSON, which has a key for it) "in K" where it is K's first dims. */
const char *bench_v_name(const bench_case *c, bool json);
const char *bench_dtype_name(kvt_dtype dtype);
const char *bench_mode_name(bench_mode mode);

/* ---- report ---- */

/* Fields in the order in which they were added. */
typedef struct bench_record {
    size_t n;
    struct {
        const char *key;
        char value[112]; /* as it stands in the JSON line */
    } fields[64];
} bench_record;

/* The keys that every line begins with, up to threads. isa: NULL where none is involved. */
void bench_record_begin(bench_record *r, const char *bench, const char *isa, const char *k_type,
                        const char *v_type, const bench_case *c);
void bench_record_text(bench_record *r, const char *key, const char *value); /* NULL: null */
void bench_record_number(bench_record *r, const char *key, double value);    /* NaN: null */
void bench_record_integer(bench_record *r, const char *key, uint64_t value);
void bench_record_bool(bench_record *r, const char *key, bool value);
/* ms_median, ms_min, bytes, gbps, read_gbps, ratio, ms_p10, ms_p90, pairs */
void bench_record_time(bench_record *r, const double *seconds, size_t n, double bytes,
                       double read_gbps, double ratio);
/* The same keys with null, for what is not timed. */
void bench_record_no_time(bench_record *r, double bytes);
/* pinned, seed, quick, cpu, compiler, commit, version: the keys that every line ends with. */
void bench_record_end(bench_record *r, const bench_options *options, bool pinned);

typedef struct bench_column {
    const char *key, *title; /* title NULL: the key */
    int width;               /* negative: to the left */
} bench_column;

/* The title line of a table; nothing for JSON output. */
void bench_table_begin(const bench_options *options, const char *title, const bench_column *columns,
                       size_t n_columns);
/* One line of either kind. */
void bench_emit(const bench_options *options, const bench_record *r, const bench_column *columns,
                size_t n_columns);
/* A line of text under a table; nothing in JSON. */
void bench_note(const bench_options *options, const char *format, ...) BENCH_PRINTF(2, 3);
/* One line on a terminal's stderr that is written over. */
void bench_progress(const char *what, size_t i, size_t n);

/* ---- machine ---- */

const char *bench_cpu_name(void);
const char *bench_compiler(void);
const char *bench_commit(void);
uint64_t bench_preemptions(void);      /* of this process so far; 0 where unknown */
uint64_t bench_cache_bytes(int level); /* data or unified; 0 where unknown */
unsigned bench_processors(void);       /* that this process may use */
bool bench_has_pool(void);             /* the library was built with KVTILE_POOL */
uint64_t bench_llc_bytes(void);
#define BENCH_HUGE_PAGE ((size_t)2 << 20) /* last-level cache; a guess of 32 MiB where unknown */
uint64_t bench_available_bytes(void);     /* of memory; UINT64_MAX where unknown */

/*
 * The allocator of the caches and of the read bandwidth's memory, so that both have the same kind
 * of pages. It counts allocations, and records which size holds the most bytes.
 */
typedef struct bench_heap {
    struct {
        size_t bytes, count;
    } sizes[32];
    size_t n_sizes;
    size_t n_allocations;
} bench_heap;

kvt_allocator bench_heap_hook(bench_heap *heap);
/* The size of allocation that holds the most bytes so far. */
size_t bench_heap_main_size(const bench_heap *heap);

/* Persistent threads; worker 0 is the caller. */
typedef struct bench_team bench_team;

bench_team *bench_team_create(unsigned n_threads);
void bench_team_destroy(bench_team *team);
unsigned bench_team_threads(const bench_team *team);
bool bench_team_pinned(const bench_team *team);
/* job(arg, worker) once on every worker; returns when all are done. */
void bench_team_each(bench_team *team, void (*job)(void *arg, unsigned worker), void *arg);
/* For kvt_config.executor. */
kvt_executor bench_team_executor(bench_team *team);

/* ---- read ---- */

typedef struct bench_read bench_read;

/*
 * Memory of at least total_bytes in allocations of chunk_bytes from the heap, touched, and the
 * loop that reads it fastest with this team.
 */
bench_read *bench_read_create(bench_heap *heap, bench_team *team, size_t chunk_bytes,
                              uint64_t total_bytes);
void bench_read_destroy(bench_read *r);
const char *bench_read_loop(const bench_read *r); /* "avx512 4 streams, prefetch 1024" */
double bench_read_bytes(const bench_read *r);     /* of one run */
double bench_read_run(bench_read *r);             /* seconds */

/* ---- peaks ---- */

/* Of all threads of a team; dot_gmacs NaN where there is no loop for it. */
typedef struct bench_peak {
    double clock_ghz;  /* of one thread */
    double fma_gflops; /* f32, a multiply-add counts two */
    double dot_gmacs;  /* integer multiply-adds of the widest dot product */
} bench_peak;

/* The loops for kernels of this name, on this team's threads. */
typedef struct bench_peaks bench_peaks;

bench_peaks *bench_peaks_create(bench_team *team, const char *isa);
void bench_peaks_destroy(bench_peaks *p);
bench_peak bench_peaks_run(bench_peaks *p); /* takes about five milliseconds */
bench_peak bench_peaks_median(const bench_peak *peaks, size_t n);
/* clock_ghz, fma_gflops, dot_gmacs, fma_loop, dot_loop */
void bench_record_peak(bench_record *r, const bench_peaks *p, const bench_peak *peak);

/* ---- caches ---- */

typedef struct bench_tokens {
    size_t n, k_width, v_width; /* heads * dim; v_width 0 where V is in K */
    float *k, *v;               /* [n][width] */
} bench_tokens;

/* A cache with sequences in it, its memory and its threads. */
typedef struct bench_cache {
    bench_heap heap;
    bench_team *team;
    kvt_cache *cache;
    kvt_seq **seqs;
    size_t n_seqs, n_layers;
    uint64_t ctx;
    bench_case shape;
    bench_tokens source;
    bench_random random;
    bool unique; /* bench_cache_fill makes new tokens for every step and layer: for what compresses
                  */
} bench_cache;

/* Bytes of codes, scales and offsets of n tokens of one layer, without padding: the byte formula.
 */
double bench_kv_bytes(const bench_case *c, uint64_t n_tokens);
extern const char bench_kv_formula[];

/*
 * Layers and sequences of n_tokens that hold at least `bytes`. layers 0: chosen here, 64 at most;
 * else fixed, and only the number of sequences is chosen.
 */
void bench_plan_layers(const bench_case *c, uint64_t n_tokens, uint64_t bytes, size_t layers,
                       size_t *n_layers, size_t *n_seqs);

/*
 * Create a cache with empty sequences and a source of random tokens. Exits (code 2) when the
 * machine lacks the memory for n_tokens in each of them and for extra_bytes.
 */
void bench_cache_create(bench_cache *b, const bench_case *c, size_t n_layers, size_t n_seqs,
                        uint64_t n_tokens, uint64_t extra_bytes, uint64_t seed);
void bench_cache_destroy(bench_cache *b);
/* kvt_append of the step's tokens, from this one of the source on. */
void bench_cache_append(const bench_cache *b, size_t seq, size_t layer, size_t source_token);
/* Append n_tokens to every layer of every sequence, 512 at a time. */
void bench_cache_fill(bench_cache *b, uint64_t n_tokens);
/* Where in the source the 512 tokens from `first` on of a layer come from. */
size_t bench_source_offset(const bench_cache *b, size_t seq, size_t layer, uint64_t first);

/* softmax(q K^T / sqrt(k_dim)) V in double. k [n][kv_heads][k_dim], v likewise, q
   [n_q][q_heads][k_dim], out [n_q][q_heads][v_dim]. All tokens are visible. Where V is in K
   it is taken from there and v is not read. */
void bench_attend_double(const bench_case *c, const float *q, size_t n_q, const float *k,
                         const float *v, uint64_t n, double *out);
/* ||a - b|| / ||b|| */
double bench_relative_error(const float *a, const double *b, size_t n);

/* ---- attend ---- */

uint32_t bench_mode_flags(bench_mode mode); /* KVT_ATTEND_ */
/* What went into all tokens of a layer. */
void bench_gather_input(const bench_cache *b, size_t seq, size_t layer, float *k, float *v);
/* n_queries queries, the last of which is the last token's. */
void bench_attend_layer(bench_cache *b, size_t seq, size_t layer, uint32_t flags, size_t n_queries,
                        const float *q, float *out);
/* The first n tokens of a layer as f32; K alone where V is in it. */
void bench_read_layer(const bench_cache *b, size_t seq, size_t layer, uint64_t n, float *k,
                      float *v);

/* Reference outputs, in double, of some of n_queries queries. Keeps q and out. */
typedef struct bench_reference bench_reference;

bench_reference *bench_reference_create(bench_cache *b, const float *q, float *out,
                                        size_t n_queries);
void bench_reference_destroy(bench_reference *r);
uint64_t bench_reference_bytes(const bench_case *c); /* of memory, while it is made */
/* Attend, and exit where an error is beyond its limit. Relative L2, against attention over the
   cache's contents and over its input. */
void bench_reference_check(bench_reference *r, bench_mode mode, double *error, double *error_input);
double bench_error_limit(const bench_case *c, bench_mode mode);

/* Seconds that the products of so many (query head, key) pairs take at the peaks: as many integer
   products as type and mode need where storage is i8, i4 or i5, f32 multiply-adds elsewhere. */
double bench_arithmetic_seconds(const bench_peaks *p, const bench_peak *peak, const bench_case *c,
                                bench_mode mode, double pairs);

/* ---- rival ---- */

/* x to q8_0 and back, in blocks of 32 (the last one shorter where n is no multiple). */
void bench_q8_0_round_trip(const float *x, float *y, size_t n);

/* ---- npy ---- */

typedef struct bench_npy {
    char *path;
    FILE *file;
    long data;             /* where the numbers begin */
    size_t item, shape[4]; /* bytes of a number; none of them 0 */
    size_t slice;          /* numbers of one index of the first dimension */
} bench_npy;

/* The file name + suffix; exits (code 2) unless it is one of 4 dimensions, f16 or f32. */
void bench_npy_open(bench_npy *npy, const char *name, const char *suffix);
void bench_npy_close(bench_npy *npy);
/* Exits (code 2) where a number is not finite or beyond f16. */
void bench_npy_read(bench_npy *npy, size_t slice, float *out);

/* ---- plot ---- */

typedef struct bench_point {
    const char *name;
    double x, y; /* bits; an error, on a logarithmic axis: not drawn unless above 0 */
    bool ours, hollow;
} bench_point;

typedef struct bench_plot {
    const char *title, *x_title;
    const bench_point *points;
    size_t n;
} bench_plot;

/* An SVG file with the plots side by side. */
void bench_plot_write(const char *path, const bench_plot *plots, size_t n);

/* ---- commands: exit codes ---- */

int bench_decode(const bench_options *options);
int bench_against(const bench_options *options); /* decode, with options->against */
#if defined(KVT_BENCH_GGML)
int bench_ggml(const bench_options *options); /* decode, with options->peers */
#endif
int bench_prefill(const bench_options *options);
int bench_step(const bench_options *options);
int bench_machine(const bench_options *options);
int bench_append(const bench_options *options);
int bench_seal(const bench_options *options);
int bench_fork(const bench_options *options);
int bench_shift(const bench_options *options);
int bench_prefix(const bench_options *options);
int bench_snapshot(const bench_options *options);
int bench_store(const bench_options *options);
int bench_snap_reader(int argc, char **argv); /* the hidden snapshot-reader: bench_snap_map.c */
int bench_fidelity(const bench_options *options);
int bench_page(const bench_options *options); /* report */
int bench_compare(const bench_options *options);
int bench_fidelity_qkv(const bench_options *options);
#if defined(KVT_BENCH_TINYLM)
int bench_fidelity_model(const bench_options *options);
#endif

/* Call run for each case of the lists. Returns the largest of its exit codes. */
int bench_each_case(const bench_options *options,
                    int (*run)(const bench_options *options, const bench_case *c));

#endif /* BENCH_H */
