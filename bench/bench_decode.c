/*
 * decode: attention of one new token over ctx tokens, one layer a call, as a decoding engine
 * makes it.
 *
 * A real step reads each layer's keys and values once and then the next layer's, so they have been
 * evicted from all processor caches before they are read again. Here so many layers (and sequences)
 * are attended in rotation that they exceed the last-level cache four times; one measurement is
 * one round over all of them, and a call's time is the round's over the number of calls.
 *
 * Every round is paired with a run of the read loop over other memory from the same allocator, the
 * two in alternating order, and the ratio is the median of the pairs' ratios. The peaks of
 * arithmetic and the clock are measured between the pairs: with several query heads a kv head
 * arithmetic is the limit, and `bound` is the ratio at that limit.
 *
 * Other processes disturb both: preemptions counts involuntary context switches during the pairs
 * (few on a quiet machine), and ratio_best is the fastest round over the fastest read.
 *
 * With --window the layers have a sliding window: bytes and products are those of the tokens in it.
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
                                       {"ctx", NULL, 7},
                                       {"window", NULL, 7},
                                       {"threads", "thr", 3},
                                       {"layers", "lay", 4},
                                       {"sequences", "seq", 4},
                                       {"ms_median", "ms", 8},
                                       {"spread", NULL, 6},
                                       {"bytes", NULL, 10},
                                       {"gbps", "GB/s", 6},
                                       {"read_gbps", "read", 6},
                                       {"ratio", NULL, 6},
                                       {"ratio_best", "best", 6},
                                       {"bound", NULL, 6},
                                       {"gmacs", "GMAC/s", 6},
                                       {"fma_gflops", "FMA", 6},
                                       {"dot_gmacs", "dot", 6},
                                       {"peak_share", "share", 6},
                                       {"cycles_per_byte", "cyc/B", 6},
                                       {"preemptions", "preempt", 7},
                                       {"error", "vs cache", 9},
                                       {"error_input", "vs input", 9}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

typedef struct decode {
    bench_cache b;
    float *q, *out;
    bench_reference *reference;
    bench_read *reader;
    bench_peaks *peaks;
    double call_bytes;
} decode;

static double round_of_all(decode *d, bench_mode mode)
{
    double start = bench_seconds();
    for (size_t s = 0; s < d->b.n_seqs; s++)
        for (size_t l = 0; l < d->b.n_layers; l++)
            bench_attend_layer(&d->b, s, l, bench_mode_flags(mode), 1, d->q, d->out);
    return bench_seconds() - start;
}

static void run_mode(const bench_options *options, decode *d, bench_mode mode)
{
    const bench_case *c = &d->b.shape;
    bench_record record;
    double error, error_input, calls = (double)(d->b.n_layers * d->b.n_seqs);
    size_t n = options->runs;
    double *kernel = bench_alloc(n, sizeof *kernel), *read = bench_alloc(n, sizeof *read);
    double *ratio = bench_alloc(n, sizeof *ratio), *read_time = bench_alloc(n, sizeof *read_time);
    bench_peak *peaks = bench_alloc(n, sizeof *peaks);

    bench_reference_check(d->reference, mode, &error, &error_input);
    round_of_all(d, mode); /* warm up */
    uint64_t preemptions = bench_preemptions();
    for (size_t i = 0; i < n; i++) {
        double t_read = 0.0, t_kernel;
        peaks[i] = bench_peaks_run(d->peaks);
        if (i % 2 == 0)
            t_read = bench_read_run(d->reader);
        t_kernel = round_of_all(d, mode);
        if (i % 2 == 1)
            t_read = bench_read_run(d->reader);
        kernel[i] = t_kernel / calls;
        read_time[i] = t_read;
        read[i] = 1e-9 * bench_read_bytes(d->reader) / t_read;
        ratio[i] = 1e-9 * d->call_bytes / kernel[i] / read[i];
    }
    preemptions = bench_preemptions() - preemptions;

    bench_stats time = bench_stats_of(kernel, n), spread = bench_stats_of(ratio, n);
    bench_peak peak = bench_peaks_median(peaks, n);
    double read_gbps = bench_median(read, n);
    double pairs = (double)c->q_heads * (double)bench_tokens_seen(c);
    double arithmetic = bench_arithmetic_seconds(d->peaks, &peak, c, mode, pairs);
    bench_record_begin(&record, "decode", kvt_cache_isa(d->b.cache), bench_type_name(c->k_type),
                       bench_v_name(c, options->json), c);
    bench_record_text(&record, "mode", bench_mode_name(mode));
    bench_record_integer(&record, "window", c->window);
    bench_record_time(&record, kernel, n, d->call_bytes, read_gbps, spread.median);
    bench_record_number(&record, "spread", (time.p90 - time.p10) / time.median);
    bench_record_number(&record, "ratio_p10", spread.p10);
    bench_record_number(&record, "ratio_p90", spread.p90);
    bench_record_number(&record, "ratio_best",
                        d->call_bytes / time.min /
                            (bench_read_bytes(d->reader) / bench_stats_of(read_time, n).min));
    bench_record_number(&record, "bound", 1e-9 * d->call_bytes / arithmetic / read_gbps);
    bench_record_number(&record, "gmacs", 1e-9 * pairs * (c->k_dim + c->v_dim) / time.median);
    bench_record_peak(&record, d->peaks, &peak);
    bench_record_number(&record, "peak_share", arithmetic / time.median);
    bench_record_number(&record, "cycles_per_byte",
                        1e9 * peak.clock_ghz * c->threads * time.median / d->call_bytes);
    bench_record_integer(&record, "preemptions", preemptions);
    bench_record_integer(&record, "layers", d->b.n_layers);
    bench_record_integer(&record, "sequences", d->b.n_seqs);
    bench_record_integer(&record, "set_bytes", (uint64_t)(d->call_bytes * calls));
    bench_record_integer(&record, "llc_bytes", options->llc_bytes);
    bench_record_number(&record, "error", error);
    bench_record_number(&record, "error_input", error_input);
    bench_record_text(&record, "read_loop", bench_read_loop(d->reader));
    bench_record_end(&record, options, bench_team_pinned(d->b.team));
    bench_emit(options, &record, columns, N_COLUMNS);

    free(peaks);
    free(read_time);
    free(ratio);
    free(read);
    free(kernel);
}

static int run(const bench_options *options, const bench_case *c)
{
    decode d;
    bench_random random;
    size_t n_layers, n_seqs;
    uint64_t set_bytes = options->quick ? 1 << 20 : 4 * options->llc_bytes;
    bench_plan_layers(c, bench_tokens_seen(c), set_bytes, options->layers, &n_layers, &n_seqs);
    d.call_bytes = bench_kv_bytes(c, bench_tokens_seen(c));
    double round_bytes = d.call_bytes * (double)(n_layers * n_seqs);
    uint64_t read_bytes = round_bytes > 0x1p29 ? UINT64_C(1) << 29 : (uint64_t)round_bytes;
    if (read_bytes < set_bytes)
        read_bytes = set_bytes;
    uint64_t check_bytes = bench_reference_bytes(c);

    bench_cache_create(&d.b, c, n_layers, n_seqs, c->ctx,
                       read_bytes > check_bytes ? read_bytes : check_bytes, options->seed);
    bench_cache_fill(&d.b, c->ctx);
    d.q = bench_alloc((size_t)c->q_heads * c->k_dim, sizeof *d.q);
    d.out = bench_alloc((size_t)c->q_heads * c->v_dim, sizeof *d.out);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, d.q, (size_t)c->q_heads * c->k_dim);

    double per_token = kvt_cache_bytes_per_token(d.b.cache) * (double)c->ctx / (double)n_layers;
    double all_bytes = bench_kv_bytes(c, c->ctx);
    if (c->ctx % 64 == 0 && fabs(per_token - all_bytes) > 1e-6 * all_bytes)
        bench_fail(1, "the byte formula says %.0f, kvt_cache_bytes_per_token %.0f", all_bytes,
                   per_token);
    d.reference = bench_reference_create(&d.b, d.q, d.out, 1);
    d.reader = bench_read_create(&d.b.heap, d.b.team, bench_heap_main_size(&d.b.heap), read_bytes);
    d.peaks = bench_peaks_create(d.b.team, kvt_cache_isa(d.b.cache));
    for (size_t i = 0; i < options->n_modes; i++)
        run_mode(options, &d, options->modes[i]);

    bench_peaks_destroy(d.peaks);
    bench_read_destroy(d.reader);
    bench_reference_destroy(d.reference);
    free(d.out);
    free(d.q);
    bench_cache_destroy(&d.b);
    return 0;
}

int bench_decode(const bench_options *options)
{
    if (options->has_against)
        return bench_against(options);
#if defined(KVT_BENCH_GGML)
    if (options->n_peers)
        return bench_ggml(options);
#endif
    bench_table_begin(options, "decode: attention of one token over ctx tokens, one layer a call",
                      columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "%s\n"
               "GB/s = bytes / median time of a call; spread = (p90 - p10) / median of it; read = "
               "the best read loop over memory of\n"
               "the same kind, same threads, run in turn; ratio = median of the pairs' (GB/s / "
               "read); best = fastest round over fastest\n"
               "read. GMAC/s = q heads * tokens * (K + V dims) / time. FMA, dot: GFLOP/s of f32 "
               "multiply-adds, GMAC/s of integer dot\n"
               "products, measured between the pairs; share = time that the call's products take "
               "at that peak / time; bound = ratio at\n"
               "share 1. cyc/B: cycles of all threads a byte, at the measured clock. preempt: "
               "times that other programs got in\n"
               "between. vs cache, vs input: relative L2 error against attention in double over "
               "the dequantized cache and over what\n"
               "went into it.",
               bench_kv_formula);
    return result;
}
