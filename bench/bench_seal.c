/*
 * seal: what turning a full open block (f16) into its sealed form takes, beside memcpy of the f16
 * rows of K and V of that block.
 *
 * Sealing is a part of kvt_append: of the append with which a block becomes older than the residual
 * window. So two steps of one token are timed in turn, the one that seals block 2 of a short
 * sequence, and the one before it, which appends a token to the same open block and seals nothing;
 * truncates take both back. The difference of a layer's appends is the sealing of its kv heads, K
 * and V, with all that the library does for it.
 *
 * By default there are so many layers that their open blocks are twice the last-level cache: a
 * block's rows were written during its 64 steps, in each of which attention has read all of the
 * cache, so that decoding finds them in memory. memcpy goes through as much. With --layers 1 both
 * find the rows in the second-level cache (8 heads of 128 dims: 256 KiB). Blocks and memcpy's
 * memory have been written before.
 *
 * Each layer's append and memcpy is timed by itself and a measurement is their medians, so that
 * other programs disturb little. The bar: sealing as i4 or i5 takes at most 4 times as long as
 * memcpy.
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {
    {"isa", NULL, -10},       {"k_type", "K", -4},           {"v_type", "V", -4},
    {"kv_heads", "kv", 4},    {"head_dim", "dim", 4},        {"layers", "lay", 4},
    {"us_append", NULL, 9},   {"us_seal", NULL, 9},          {"us_memcpy", NULL, 9},
    {"seal_gbps", "GB/s", 7}, {"memcpy_gbps", "memcpy", 7},  {"ratio", NULL, 6},
    {"ratio_p10", "p10", 6},  {"ratio_p90", "p90", 6},       {"bar", NULL, 5},
    {"passed", NULL, 6},      {"preemptions", "preempt", 7}, {"error", "vs open", 9}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

/* With this length block 2 is sealed: 3 blocks and a residual window of one. */
enum { LENGTH = 4 * KVT_BLOCK_TOKENS, BLOCK = 2, TIMES = 512 };
#define BAR 0.25

typedef struct seal {
    bench_cache b;
    unsigned char *from, *to; /* [layer][heads][K and V of 64 tokens], f16 */
    size_t layer_bytes, turns;
    double *times; /* [3][turns][layers] */
} seal;

/* One token. seconds: of each layer's append. */
static void step(seal *s, double *seconds)
{
    kvt_seq *seq = s->b.seqs[0];
    bench_require(kvt_seq_begin(seq, 1, NULL), s->b.cache, "kvt_seq_begin");
    for (size_t layer = 0; layer < s->b.n_layers; layer++) {
        double start = bench_seconds();
        bench_cache_append(&s->b, 0, layer, layer % s->b.source.n);
        seconds[layer] = bench_seconds() - start;
    }
    bench_require(kvt_seq_commit(seq, NULL), s->b.cache, "kvt_seq_commit");
}

static void copy(seal *s, double *seconds)
{
    for (size_t layer = 0; layer < s->b.n_layers; layer++) {
        double start = bench_seconds();
        memcpy(s->to + layer * s->layer_bytes, s->from + layer * s->layer_bytes, s->layer_bytes);
        __asm__ volatile("" : : "r"(s->to) : "memory");
        seconds[layer] = bench_seconds() - start;
    }
}

static void cut_back(seal *s)
{
    bench_require(kvt_seq_truncate(s->b.seqs[0], LENGTH - 2), s->b.cache, "kvt_seq_truncate");
}

/* Medians of a layer's seconds. */
static void measure(seal *s, double *append, double *sealing, double *copying)
{
    size_t layers = s->b.n_layers, n = s->turns * layers;
    double *x = s->times, *y = x + n, *z = y + n;
    for (size_t i = 0; i < n; i += layers) {
        cut_back(s);
        step(s, x + i);
        step(s, y + i);
        copy(s, z + i);
    }
    *append = bench_median(x, n);
    *sealing = bench_median(y, n) - *append;
    *copying = bench_median(z, n);
}

/* The block's rows of the last layer, K and V, as they stand. */
static void read_block(const seal *s, float *x)
{
    const bench_case *c = &s->b.shape;
    size_t width = (size_t)c->kv_heads * c->k_dim * KVT_BLOCK_TOKENS;
    for (int side = 0; side < 2; side++) {
        kvt_tensor t = kvt_tensor_f32(x + (side ? width : 0));
        bench_require(kvt_read(s->b.seqs[0], (uint32_t)s->b.n_layers - 1,
                               side ? KVT_SIDE_V : KVT_SIDE_K, BLOCK * KVT_BLOCK_TOKENS,
                               KVT_BLOCK_TOKENS, &t),
                      s->b.cache, "kvt_read");
    }
}

/* That the second step, and only that one, seals: the relative error of its rows. */
static double check(seal *s)
{
    const bench_case *c = &s->b.shape;
    size_t n = (size_t)c->kv_heads * (c->k_dim + c->v_dim) * KVT_BLOCK_TOKENS;
    float *x = bench_alloc(n, sizeof *x), *before = bench_alloc(n, sizeof *before);
    double *expected = bench_alloc(n, sizeof *expected);
    cut_back(s);
    read_block(s, before);
    step(s, s->times);
    read_block(s, x);
    if (memcmp(x, before, n * sizeof *x) != 0)
        bench_fail(1, "seal: the step before the one that seals has changed the block");
    step(s, s->times);
    read_block(s, x);
    for (size_t i = 0; i < n; i++)
        expected[i] = before[i];
    double error = bench_relative_error(x, expected, n);
    if (!(error > 1e-4 && error < 0.2))
        bench_fail(1, "seal: the sealed rows' relative error to the open ones is %.3g", error);
    free(expected);
    free(before);
    free(x);
    return error;
}

static int run(const bench_options *options, const bench_case *c)
{
    seal s;
    bench_record r;
    size_t n = options->runs, n_layers = options->layers;
    double *append = bench_alloc(n, sizeof *append), *sealing = bench_alloc(n, sizeof *sealing);
    double *copying = bench_alloc(n, sizeof *copying), *ratio = bench_alloc(n, sizeof *ratio);

    memset(&s, 0, sizeof s);
    s.layer_bytes = (size_t)c->kv_heads * (c->k_dim + c->v_dim) * KVT_BLOCK_TOKENS * 2;
    if (n_layers == 0)
        n_layers = options->quick ? 3 : (size_t)(2 * options->llc_bytes / s.layer_bytes) + 1;
    n_layers = n_layers < KVT_MAX_LAYERS ? n_layers : KVT_MAX_LAYERS;
    s.turns = TIMES / n_layers + 1;
    s.times = bench_alloc(3 * s.turns * n_layers, sizeof *s.times);
    bench_cache_create(&s.b, c, n_layers, 1, LENGTH, 2 * n_layers * s.layer_bytes, options->seed);
    bench_cache_fill(&s.b, LENGTH - 2);
    kvt_allocator memory = bench_heap_hook(&s.b.heap);
    s.from = memory.alloc(memory.user, n_layers * s.layer_bytes, 64);
    s.to = memory.alloc(memory.user, n_layers * s.layer_bytes, 64);
    if (!s.from || !s.to)
        bench_fail(1, "no memory for two times %zu bytes", n_layers * s.layer_bytes);
    memset(s.from, 1, n_layers * s.layer_bytes);
    memset(s.to, 2, n_layers * s.layer_bytes);

    double error = check(&s);
    measure(&s, &append[0], &sealing[0], &copying[0]); /* warm up */
    uint64_t preemptions = bench_preemptions();
    for (size_t i = 0; i < n; i++) {
        measure(&s, &append[i], &sealing[i], &copying[i]);
        ratio[i] = copying[i] / sealing[i];
    }
    preemptions = bench_preemptions() - preemptions;
    bench_stats spread = bench_stats_of(ratio, n);
    double t_seal = bench_median(sealing, n), t_copy = bench_median(copying, n);
    bool has_bar = c->k_type >= KVT_TYPE_I4 || c->v_type >= KVT_TYPE_I4;
    bool passed = !has_bar || spread.median >= BAR;
    bench_record_begin(&r, "seal", kvt_cache_isa(s.b.cache), bench_type_name(c->k_type),
                       bench_type_name(c->v_type), c);
    bench_record_integer(&r, "layers", n_layers);
    bench_record_integer(&r, "bytes", s.layer_bytes);
    bench_record_number(&r, "us_append", 1e6 * bench_median(append, n));
    bench_record_number(&r, "us_seal", 1e6 * t_seal);
    bench_record_number(&r, "us_memcpy", 1e6 * t_copy);
    bench_record_number(&r, "seal_gbps", 1e-9 * (double)s.layer_bytes / t_seal);
    bench_record_number(&r, "memcpy_gbps", 1e-9 * (double)s.layer_bytes / t_copy);
    bench_record_number(&r, "ratio", spread.median);
    bench_record_number(&r, "ratio_p10", spread.p10);
    bench_record_number(&r, "ratio_p90", spread.p90);
    bench_record_number(&r, "bar", has_bar ? BAR : NAN);
    bench_record_bool(&r, "passed", passed);
    bench_record_integer(&r, "pairs", n);
    bench_record_integer(&r, "preemptions", preemptions);
    bench_record_number(&r, "error", error);
    bench_record_end(&r, options, bench_team_pinned(s.b.team));
    bench_emit(options, &r, columns, N_COLUMNS);

    memory.free(memory.user, s.to, n_layers * s.layer_bytes);
    memory.free(memory.user, s.from, n_layers * s.layer_bytes);
    free(s.times);
    free(ratio);
    free(copying);
    free(sealing);
    free(append);
    bench_cache_destroy(&s.b);
    return passed || options->quick ? 0 : 1;
}

static void require_sealed(const kvt_type *types, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (types[i] < KVT_TYPE_I8)
            bench_fail(2, "seal: %s: i8, i4 and i5 are sealed", bench_type_name(types[i]));
}

int bench_seal(const bench_options *options)
{
    require_sealed(options->k_types, options->n_k_types);
    require_sealed(options->v_types, options->n_v_types);
    bench_table_begin(options, "seal: an open block of f16 rows into its sealed form", columns,
                      N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "us of one layer: append of one token that seals nothing; seal = what the append "
               "that seals a block of 64 tokens takes\n"
               "more; memcpy of the block's f16 rows, K and V. GB/s of those rows; ratio = GB/s / "
               "memcpy, the median of the pairs.\n"
               "vs open: relative error of the sealed rows against the open ones.");
    return result;
}
