/*
 * decode: attention of one new token over ctx tokens, one layer a call, as a decoding engine
 * makes it.
 *
 * A real step reads each layer's keys and values once and then the next layer's, so none of
 * them is still in a cache of the processor when its turn comes again. Here as many layers (and
 * sequences) as exceed the last-level cache four times are attended in turn; one measurement is
 * one round over all of them, and a call's time is the round's over the number of calls.
 *
 * Every round is paired with a run of the read loop over other memory of the same kind, the two
 * in alternating order, and the ratio is the median of the pairs' ratios.
 *
 * Other programs disturb both: preemptions counts how often the system took a processor away
 * during the pairs (a quiet machine has few), and ratio_best is the fastest round over the fastest
 * read.
 *
 * Before anything is timed, the output of the first and the last (sequence, layer) is compared
 * with attention in double over what the cache holds (kvt_read) and over what went into it.
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>

static const bench_column columns[] = {{"isa", NULL, -8},
                                       {"k_type", "K", -4},
                                       {"v_type", "V", -4},
                                       {"q_heads", "q", 4},
                                       {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},
                                       {"ctx", NULL, 7},
                                       {"threads", "thr", 3},
                                       {"layers", "lay", 4},
                                       {"sequences", "seq", 4},
                                       {"ms_median", "ms", 9},
                                       {"ms_p10", "p10", 9},
                                       {"ms_p90", "p90", 9},
                                       {"bytes", NULL, 10},
                                       {"gbps", "GB/s", 7},
                                       {"read_gbps", "read", 7},
                                       {"ratio", NULL, 7},
                                       {"ratio_best", "best", 7},
                                       {"preemptions", "preempt", 7},
                                       {"error", "vs cache", 9},
                                       {"error_input", "vs input", 9}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

typedef struct decode {
    bench_cache b;
    float *q, *out;
} decode;

static void attend(decode *d, size_t seq, size_t layer)
{
    kvt_attend_item item;
    kvt_attend_args args = kvt_attend_args_init();
    memset(&item, 0, sizeof item);
    item.seq = d->b.seqs[seq];
    item.n_queries = 1;
    args.layer = (uint32_t)layer;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(d->q);
    args.out = kvt_tensor_f32(d->out);
    bench_require(kvt_attend(d->b.cache, &args), d->b.cache, "kvt_attend");
}

static double round_of_all(decode *d)
{
    double start = bench_seconds();
    for (size_t s = 0; s < d->b.n_seqs; s++)
        for (size_t l = 0; l < d->b.n_layers; l++)
            attend(d, s, l);
    return bench_seconds() - start;
}

/*
 * What one layer was given, in order. Only this and the reference need the tokens as f32 all at
 * once.
 */
static void gather_input(const bench_cache *b, size_t seq, size_t layer, float *k, float *v)
{
    for (uint64_t first = 0; first < b->ctx; first += 512) {
        size_t n = (size_t)(b->ctx - first < 512 ? b->ctx - first : 512);
        size_t at = bench_source_offset(b, seq, layer, first);
        memcpy(k + first * b->source.k_width, b->source.k + at * b->source.k_width,
               n * b->source.k_width * sizeof *k);
        memcpy(v + first * b->source.v_width, b->source.v + at * b->source.v_width,
               n * b->source.v_width * sizeof *v);
    }
}

/* The larger error of the two places, against the cache's contents and against the input. */
static void check(decode *d, double *error, double *error_input)
{
    const bench_cache *b = &d->b;
    size_t n_out = (size_t)b->shape.q_heads * b->shape.v_dim;
    float *k = bench_alloc((size_t)b->ctx * b->source.k_width, sizeof *k);
    float *v = bench_alloc((size_t)b->ctx * b->source.v_width, sizeof *v);
    double *expected = bench_alloc(n_out, sizeof *expected);
    size_t places = b->n_seqs * b->n_layers > 1 ? 2 : 1;
    *error = *error_input = 0.0;
    for (size_t i = 0; i < places; i++) {
        size_t seq = i ? b->n_seqs - 1 : 0, layer = i ? b->n_layers - 1 : 0;
        kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
        memset(d->out, 0xff, n_out * sizeof *d->out); /* NaN: what is not written shows */
        attend(d, seq, layer);
        bench_require(kvt_read(b->seqs[seq], (uint32_t)layer, KVT_SIDE_K, 0, b->ctx, &kt), b->cache,
                      "kvt_read");
        bench_require(kvt_read(b->seqs[seq], (uint32_t)layer, KVT_SIDE_V, 0, b->ctx, &vt), b->cache,
                      "kvt_read");
        bench_attend_double(&b->shape, d->q, 1, k, v, b->ctx, expected);
        double e = bench_relative_error(d->out, expected, n_out);
        gather_input(b, seq, layer, k, v);
        bench_attend_double(&b->shape, d->q, 1, k, v, b->ctx, expected);
        double e_input = bench_relative_error(d->out, expected, n_out);
        *error = e > *error || isnan(e) ? e : *error;
        *error_input = e_input > *error_input || isnan(e_input) ? e_input : *error_input;
    }
    free(expected);
    free(v);
    free(k);
    /* Far above what any sound kernel does, far below what a wrong one does. */
    double limit = b->shape.k_type == KVT_TYPE_I8 || b->shape.v_type == KVT_TYPE_I8 ? 2e-3 : 1e-4;
    if (!(*error < limit) || !(*error_input < 0.05))
        bench_fail(1,
                   "%s %s/%s %u:%u dims %u:%u ctx %llu: wrong output: relative error %.3g against "
                   "the cache's contents (limit %.3g), %.3g against its input (limit 0.05)",
                   kvt_cache_isa(b->cache), bench_type_name(b->shape.k_type),
                   bench_type_name(b->shape.v_type), b->shape.q_heads, b->shape.kv_heads,
                   b->shape.k_dim, b->shape.v_dim, (unsigned long long)b->ctx, *error, limit,
                   *error_input);
}

static int run(const bench_options *options, const bench_case *c)
{
    decode d;
    bench_record record;
    bench_random random;
    size_t n_layers, n_seqs;
    uint64_t set_bytes = options->quick ? 1 << 20 : 4 * options->llc_bytes;
    bench_plan_layers(c, c->ctx, set_bytes, options->layers, &n_layers, &n_seqs);
    double call_bytes = bench_kv_bytes(c, c->ctx);
    double round_bytes = call_bytes * (double)(n_layers * n_seqs);
    uint64_t read_bytes = round_bytes > 0x1p29 ? UINT64_C(1) << 29 : (uint64_t)round_bytes;
    if (read_bytes < set_bytes)
        read_bytes = set_bytes;
    uint64_t check_bytes = c->ctx * c->kv_heads * (c->k_dim + c->v_dim) * sizeof(float);

    bench_cache_create(&d.b, c, n_layers, n_seqs, c->ctx,
                       read_bytes > check_bytes ? read_bytes : check_bytes, options->seed);
    bench_cache_fill(&d.b, c->ctx);
    d.q = bench_alloc((size_t)c->q_heads * c->k_dim, sizeof *d.q);
    d.out = bench_alloc((size_t)c->q_heads * c->v_dim, sizeof *d.out);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, d.q, (size_t)c->q_heads * c->k_dim);

    double per_token = kvt_cache_bytes_per_token(d.b.cache) * (double)c->ctx / (double)n_layers;
    if (c->ctx % 64 == 0 && fabs(per_token - call_bytes) > 1e-6 * call_bytes)
        bench_fail(1, "the byte formula says %.0f, kvt_cache_bytes_per_token %.0f", call_bytes,
                   per_token);
    double error, error_input;
    check(&d, &error, &error_input);

    bench_read *reader =
        bench_read_create(&d.b.heap, d.b.team, bench_heap_main_size(&d.b.heap), read_bytes);
    size_t n = options->runs;
    double *kernel = bench_alloc(n, sizeof *kernel), *read = bench_alloc(n, sizeof *read);
    double *ratio = bench_alloc(n, sizeof *ratio), *read_time = bench_alloc(n, sizeof *read_time);
    double calls = (double)(n_layers * n_seqs);
    round_of_all(&d); /* warm up */
    uint64_t preemptions = bench_preemptions();
    for (size_t i = 0; i < n; i++) {
        double t_read = 0.0, t_kernel;
        if (i % 2 == 0)
            t_read = bench_read_run(reader);
        t_kernel = round_of_all(&d);
        if (i % 2 == 1)
            t_read = bench_read_run(reader);
        kernel[i] = t_kernel / calls;
        read_time[i] = t_read;
        read[i] = 1e-9 * bench_read_bytes(reader) / t_read;
        ratio[i] = 1e-9 * call_bytes / kernel[i] / read[i];
    }

    preemptions = bench_preemptions() - preemptions;
    bench_record_begin(&record, "decode", kvt_cache_isa(d.b.cache), bench_type_name(c->k_type),
                       bench_type_name(c->v_type), c);
    bench_record_time(&record, kernel, n, call_bytes, bench_median(read, n),
                      bench_median(ratio, n));
    bench_stats spread = bench_stats_of(ratio, n);
    bench_record_number(&record, "ratio_p10", spread.p10);
    bench_record_number(&record, "ratio_p90", spread.p90);
    bench_record_number(&record, "ratio_best",
                        call_bytes / bench_stats_of(kernel, n).min /
                            (bench_read_bytes(reader) / bench_stats_of(read_time, n).min));
    bench_record_integer(&record, "preemptions", preemptions);
    bench_record_integer(&record, "layers", n_layers);
    bench_record_integer(&record, "sequences", n_seqs);
    bench_record_integer(&record, "set_bytes", (uint64_t)round_bytes);
    bench_record_integer(&record, "llc_bytes", options->llc_bytes);
    bench_record_number(&record, "error", error);
    bench_record_number(&record, "error_input", error_input);
    bench_record_text(&record, "read_loop", bench_read_loop(reader));
    bench_record_end(&record, options, bench_team_pinned(d.b.team));
    bench_emit(options, &record, columns, N_COLUMNS);

    free(read_time);
    free(ratio);
    free(read);
    free(kernel);
    free(d.out);
    free(d.q);
    bench_read_destroy(reader);
    bench_cache_destroy(&d.b);
    return 0;
}

int bench_decode(const bench_options *options)
{
    bench_table_begin(options, "decode: attention of one token over ctx tokens, one layer a call",
                      columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "%s\n"
               "GB/s = bytes / median time of a call; read = the best read loop over memory of the "
               "same kind, same threads, run in turn;\n"
               "ratio = median of the pairs' (GB/s / read); best = fastest round over fastest "
               "read; preempt: "
               "times that other programs got in between.\nvs cache, vs input: relative L2 error "
               "against attention in double\n"
               "over the dequantized cache and over what went into it.",
               bench_kv_formula);
    return result;
}
