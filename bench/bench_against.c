/*
 * decode --against TYPE: attention of one token with the storage types of --k and --v beside the
 * same with another type, in one run.
 *
 * Two caches of the same tokens, with as many layers and sequences, each more than four times the
 * last-level cache. Layer by layer a call over one is followed by a call over the other, so that
 * both have the same share of what else goes on. A pair is a round over all layers: its ratio is
 * the time of the calls with TYPE over that of the others, that is tokens a second over tokens a
 * second. best is the ratio of the fastest calls.
 *
 * Outputs of both are checked before anything is timed (bench_attend.c).
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {
    {"isa", NULL, -10},           {"k_type", "K", -4},       {"v_type", "V", -4},
    {"against", NULL, -7},        {"mode", NULL, -4},        {"q_heads", "q", 4},
    {"kv_heads", "kv", 4},        {"head_dim", "dim", 4},    {"ctx", NULL, 7},
    {"threads", "thr", 3},        {"layers", "lay", 4},      {"sequences", "seq", 4},
    {"ms_median", "ms", 8},       {"against_ms", NULL, 10},  {"speedup", NULL, 7},
    {"speedup_p10", "p10", 6},    {"speedup_p90", "p90", 6}, {"speedup_best", "best", 6},
    {"bytes_ratio", "bytes", 6},  {"bar", NULL, 5},          {"passed", NULL, 6},
    {"preemptions", "preempt", 7}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

/* What i4 is to reach against i8: at 32k tokens, 128 dims, one thread, near. */
static const struct bar {
    const char *isa;
    uint32_t q_heads, kv_heads;
    double speedup;
} bars[] = {{"avx512vnni", 32, 32, 1.6}, {"avx512vnni", 32, 8, 1.6}, {"avx512vnni", 28, 4, 1.4},
            {"avx512vnni", 32, 4, 1.4},  {"avx2", 32, 32, 1.4},      {"avx2", 32, 8, 1.3},
            {"avx2", 28, 4, 1.15}};

/* NaN: none. */
static double bar_of(const bench_case *c, const char *isa, kvt_type against, bench_mode mode)
{
    bool fits = c->k_type == KVT_TYPE_I4 && c->v_type == KVT_TYPE_I4 && against == KVT_TYPE_I8 &&
                mode == BENCH_NEAR && c->ctx == 32768 && c->k_dim == 128 && c->v_dim == 128 &&
                c->threads == 1 && !c->window;
    for (size_t i = 0; fits && i < sizeof bars / sizeof bars[0]; i++)
        if (!strcmp(bars[i].isa, isa) && bars[i].q_heads == c->q_heads &&
            bars[i].kv_heads == c->kv_heads)
            return bars[i].speedup;
    return NAN;
}

enum { THIS, OTHER, BOTH };

typedef struct against {
    bench_cache b[BOTH];
    float *q, *out;
} against;

static double call(against *a, int which, size_t seq, size_t layer, bench_mode mode)
{
    double start = bench_seconds();
    bench_attend_layer(&a->b[which], seq, layer, bench_mode_flags(mode), 1, a->q, a->out);
    return bench_seconds() - start;
}

/* A round over all layers: the sums of both caches' times, and the shortest of each. */
static void round_of_both(against *a, bench_mode mode, bool other_first, double *sum, double *least)
{
    sum[THIS] = sum[OTHER] = 0.0;
    for (size_t seq = 0; seq < a->b[THIS].n_seqs; seq++)
        for (size_t layer = 0; layer < a->b[THIS].n_layers; layer++)
            for (int i = 0; i < BOTH; i++) {
                int which = other_first ? OTHER - i : i;
                double seconds = call(a, which, seq, layer, mode);
                sum[which] += seconds;
                least[which] = fmin(least[which], seconds);
            }
}

static int run_mode(const bench_options *options, against *a, bench_mode mode)
{
    const bench_case *c = &a->b[THIS].shape;
    bench_record r;
    size_t n = options->runs;
    double calls = (double)(a->b[THIS].n_layers * a->b[THIS].n_seqs), sum[BOTH];
    double least[BOTH] = {INFINITY, INFINITY};
    double *time = bench_alloc(n, sizeof *time), *other = bench_alloc(n, sizeof *other);
    double *ratio = bench_alloc(n, sizeof *ratio);

    round_of_both(a, mode, false, sum, least); /* warm up */
    uint64_t preemptions = bench_preemptions();
    for (size_t i = 0; i < n; i++) {
        round_of_both(a, mode, i % 2 == 1, sum, least);
        time[i] = sum[THIS] / calls;
        other[i] = sum[OTHER] / calls;
        ratio[i] = sum[OTHER] / sum[THIS];
    }
    preemptions = bench_preemptions() - preemptions;

    bench_stats spread = bench_stats_of(ratio, n), t = bench_stats_of(time, n);
    const char *isa = kvt_cache_isa(a->b[THIS].cache);
    double bar = bar_of(c, isa, a->b[OTHER].shape.k_type, mode);
    bool passed = isnan(bar) || spread.median >= bar;
    bench_record_begin(&r, "against", isa, bench_type_name(c->k_type),
                       bench_v_name(c, options->json), c);
    bench_record_text(&r, "against", bench_type_name(a->b[OTHER].shape.k_type));
    bench_record_text(&r, "mode", bench_mode_name(mode));
    bench_record_integer(&r, "window", c->window);
    bench_record_integer(&r, "layers", a->b[THIS].n_layers);
    bench_record_integer(&r, "sequences", a->b[THIS].n_seqs);
    bench_record_number(&r, "ms_median", 1e3 * t.median);
    bench_record_number(&r, "against_ms", 1e3 * bench_median(other, n));
    bench_record_number(&r, "speedup", spread.median);
    bench_record_number(&r, "speedup_p10", spread.p10);
    bench_record_number(&r, "speedup_p90", spread.p90);
    bench_record_number(&r, "speedup_best", least[OTHER] / least[THIS]);
    bench_record_number(&r, "bytes_ratio",
                        bench_kv_bytes(&a->b[OTHER].shape, bench_tokens_seen(c)) /
                            bench_kv_bytes(c, bench_tokens_seen(c)));
    bench_record_number(&r, "bar", bar);
    bench_record_bool(&r, "passed", passed);
    bench_record_integer(&r, "pairs", n);
    bench_record_integer(&r, "preemptions", preemptions);
    bench_record_end(&r, options, bench_team_pinned(a->b[THIS].team));
    bench_emit(options, &r, columns, N_COLUMNS);
    free(ratio);
    free(other);
    free(time);
    return passed || options->quick ? 0 : 1;
}

static void check(const bench_options *options, against *a)
{
    for (int i = 0; i < BOTH; i++) {
        bench_reference *reference = bench_reference_create(&a->b[i], a->q, a->out, 1);
        double error, error_input;
        for (size_t m = 0; m < options->n_modes; m++)
            bench_reference_check(reference, options->modes[m], &error, &error_input);
        bench_reference_destroy(reference);
    }
}

static int run(const bench_options *options, const bench_case *c)
{
    against a;
    bench_case shapes[BOTH] = {*c, *c};
    bench_random random;
    size_t n_layers, n_seqs, smaller;
    uint64_t set_bytes = options->quick ? 1 << 20 : 4 * options->llc_bytes;
    uint64_t tokens = bench_tokens_seen(c);
    int result = 0;

    memset(&a, 0, sizeof a);
    shapes[OTHER].k_type = shapes[OTHER].v_type = options->against;
    smaller = bench_kv_bytes(&shapes[OTHER], tokens) < bench_kv_bytes(&shapes[THIS], tokens) ? OTHER
                                                                                             : THIS;
    bench_plan_layers(&shapes[smaller], tokens, set_bytes, options->layers, &n_layers, &n_seqs);
    for (int i = 0; i < BOTH; i++) {
        bench_cache_create(&a.b[i], &shapes[i], n_layers, n_seqs, c->ctx, bench_reference_bytes(c),
                           options->seed);
        bench_cache_fill(&a.b[i], c->ctx);
    }
    a.q = bench_alloc((size_t)c->q_heads * c->k_dim, sizeof *a.q);
    a.out = bench_alloc((size_t)c->q_heads * c->v_dim, sizeof *a.out);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, a.q, (size_t)c->q_heads * c->k_dim);
    check(options, &a);
    for (size_t i = 0; i < options->n_modes; i++) {
        int code = run_mode(options, &a, options->modes[i]);
        result = code > result ? code : result;
    }
    free(a.out);
    free(a.q);
    bench_cache_destroy(&a.b[OTHER]);
    bench_cache_destroy(&a.b[THIS]);
    return result;
}

int bench_against(const bench_options *options)
{
    bench_table_begin(options,
                      "decode: attention of one token over ctx tokens, beside another type",
                      columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "ms of a call of one layer, medians; against_ms: with the other type for K and V, a "
               "call after each of these. speedup = tokens\n"
               "a second over those of the other type: median, p10 and p90 of the pairs, best = "
               "fastest call over fastest call. bytes: of\n"
               "keys and values, of the other type over those of K and V.\n"
               "%s",
               bench_kv_formula);
    return result;
}
