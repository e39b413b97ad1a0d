/*
 * prefill: causal attention of the last --queries tokens (default 512) of a cache of ctx tokens
 * (default 8192, the queries' own included), one layer a call.
 *
 * Work is counted as 2 * k_dim + 2 * v_dim operations for each query head and each key visible to
 * the query; additional work of a kernel (masked keys, padding, a second digit) is not counted. The
 * reference is the f32 multiply-add peak of the instruction set in use, measured with the same
 * threads before and after each call: the ratio is the median over the calls of a call's GFLOP/s to
 * the mean of the two peaks around it. Integer products can exceed 1; `bound` is the ratio at the
 * measured dot-product peak.
 *
 * The same layer is attended in every call: 512 queries read it 16 times or more, so it matters
 * little whether it is cached at first (17 MB as i8, 2 ms from memory, in a call of hundreds).
 *
 * Before anything is timed, outputs are checked (bench_attend.c).
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>

static const bench_column columns[] = {{"isa", NULL, -10},
                                       {"k_type", "K", -4},
                                       {"v_type", "V", -4},
                                       {"mode", NULL, -4},
                                       {"q_heads", "q", 4},
                                       {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},
                                       {"queries", NULL, 7},
                                       {"ctx", NULL, 7},
                                       {"threads", "thr", 3},
                                       {"ms_median", "ms", 8},
                                       {"ms_p10", "p10", 8},
                                       {"ms_p90", "p90", 8},
                                       {"spread", NULL, 6},
                                       {"gflop", "GFLOP", 6},
                                       {"gflops", "GFLOP/s", 7},
                                       {"fma_gflops", "FMA", 6},
                                       {"ratio", NULL, 6},
                                       {"ratio_best", "best", 6},
                                       {"bound", NULL, 6},
                                       {"dot_gmacs", "dot", 6},
                                       {"peak_share", "share", 6},
                                       {"preemptions", "preempt", 7},
                                       {"error", "vs cache", 9},
                                       {"error_input", "vs input", 9}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

typedef struct prefill {
    bench_cache b;
    size_t n_queries;
    float *q, *out;
    bench_reference *reference;
    bench_peaks *peaks;
} prefill;

static double round_of_all(prefill *p, bench_mode mode)
{
    double start = bench_seconds();
    for (size_t l = 0; l < p->b.n_layers; l++)
        bench_attend_layer(&p->b, 0, l, bench_mode_flags(mode) | KVT_ATTEND_CAUSAL, p->n_queries,
                           p->q, p->out);
    return (bench_seconds() - start) / (double)p->b.n_layers;
}

static void run_mode(const bench_options *options, prefill *p, bench_mode mode)
{
    const bench_case *c = &p->b.shape;
    bench_record record;
    double error, error_input;
    size_t n = options->runs;
    double *time = bench_alloc(n, sizeof *time), *ratio = bench_alloc(n, sizeof *ratio);
    bench_peak *peaks = bench_alloc(n + 1, sizeof *peaks);
    /* Visible to query i are all tokens but the last n_queries - 1 - i. */
    double pairs = (double)c->q_heads * (double)p->n_queries *
                   ((double)c->ctx - 0.5 * ((double)p->n_queries - 1.0));
    double gflop = 2e-9 * pairs * (c->k_dim + c->v_dim), best_peak = 0.0;

    bench_reference_check(p->reference, mode, &error, &error_input); /* and warms up */
    uint64_t preemptions = bench_preemptions();
    peaks[0] = bench_peaks_run(p->peaks);
    for (size_t i = 0; i < n; i++) {
        time[i] = round_of_all(p, mode);
        peaks[i + 1] = bench_peaks_run(p->peaks);
        ratio[i] = gflop / time[i] / (0.5 * (peaks[i].fma_gflops + peaks[i + 1].fma_gflops));
    }
    preemptions = bench_preemptions() - preemptions;
    for (size_t i = 0; i <= n; i++)
        best_peak = fmax(best_peak, peaks[i].fma_gflops);

    bench_stats t = bench_stats_of(time, n), spread = bench_stats_of(ratio, n);
    bench_peak peak = bench_peaks_median(peaks, n + 1);
    double arithmetic = bench_arithmetic_seconds(p->peaks, &peak, c, mode, pairs);
    bench_record_begin(&record, "prefill", kvt_cache_isa(p->b.cache), bench_type_name(c->k_type),
                       bench_v_name(c, options->json), c);
    bench_record_text(&record, "mode", bench_mode_name(mode));
    bench_record_integer(&record, "queries", p->n_queries);
    bench_record_number(&record, "ms_median", 1e3 * t.median);
    bench_record_number(&record, "ms_min", 1e3 * t.min);
    bench_record_number(&record, "ms_p10", 1e3 * t.p10);
    bench_record_number(&record, "ms_p90", 1e3 * t.p90);
    bench_record_number(&record, "spread", (t.p90 - t.p10) / t.median);
    bench_record_number(&record, "gflop", gflop);
    bench_record_number(&record, "gflops", gflop / t.median);
    bench_record_number(&record, "ratio", spread.median);
    bench_record_number(&record, "ratio_p10", spread.p10);
    bench_record_number(&record, "ratio_p90", spread.p90);
    bench_record_number(&record, "ratio_best", gflop / t.min / best_peak);
    bench_record_number(&record, "bound", gflop / arithmetic / peak.fma_gflops);
    bench_record_number(&record, "gmacs", 0.5 * gflop / t.median);
    bench_record_peak(&record, p->peaks, &peak);
    bench_record_number(&record, "peak_share", arithmetic / t.median);
    bench_record_integer(&record, "pairs", n);
    bench_record_integer(&record, "preemptions", preemptions);
    bench_record_integer(&record, "layers", p->b.n_layers);
    bench_record_integer(&record, "bytes", (uint64_t)bench_kv_bytes(c, c->ctx));
    bench_record_number(&record, "error", error);
    bench_record_number(&record, "error_input", error_input);
    bench_record_end(&record, options, bench_team_pinned(p->b.team));
    bench_emit(options, &record, columns, N_COLUMNS);

    free(peaks);
    free(ratio);
    free(time);
}

static int run(const bench_options *options, const bench_case *c)
{
    prefill p;
    bench_random random;
    size_t n_layers = options->layers ? options->layers : 1;
    p.n_queries = options->queries < c->ctx ? (size_t)options->queries : (size_t)c->ctx;
    size_t q_floats = p.n_queries * c->q_heads * c->k_dim;
    size_t out_floats = p.n_queries * c->q_heads * c->v_dim;
    bench_cache_create(&p.b, c, n_layers, 1, c->ctx,
                       bench_reference_bytes(c) + sizeof(float) * (q_floats + out_floats),
                       options->seed);
    bench_cache_fill(&p.b, c->ctx);
    p.q = bench_alloc(q_floats, sizeof *p.q);
    p.out = bench_alloc(out_floats, sizeof *p.out);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, p.q, q_floats);
    p.reference = bench_reference_create(&p.b, p.q, p.out, p.n_queries);
    p.peaks = bench_peaks_create(p.b.team, kvt_cache_isa(p.b.cache));
    for (size_t i = 0; i < options->n_modes; i++)
        run_mode(options, &p, options->modes[i]);

    bench_peaks_destroy(p.peaks);
    bench_reference_destroy(p.reference);
    free(p.out);
    free(p.q);
    bench_cache_destroy(&p.b);
    return 0;
}

int bench_prefill(const bench_options *options)
{
    bench_table_begin(options,
                      "prefill: causal attention of the last queries of ctx tokens, one layer a "
                      "call",
                      columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "GFLOP = (2 * K dims + 2 * V dims) for each query head and key that it sees; ctx "
               "includes the queries' own tokens.\n"
               "FMA, dot: GFLOP/s of f32 multiply-adds, GMAC/s of integer dot products of the "
               "instruction set in use, same threads,\n"
               "measured before and after each call; ratio = median over the calls of GFLOP/s / "
               "FMA; best = fastest call over highest\n"
               "FMA; share = time that the products take at that peak / time; bound = ratio at "
               "share 1. spread = (p90 - p10) / median\n"
               "of the time. preempt: times that other programs got in between. vs cache, vs "
               "input: relative L2 error of three\n"
               "queries against attention in double over the dequantized cache and over what went "
               "into it.");
    return result;
}
