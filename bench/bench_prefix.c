/*
 * prefix: one token of each of several forks of a sequence of ctx tokens, in one attend call and in
 * a call for each fork.
 *
 * Every fork has 64 tokens of its own behind the shared ones. As in decode, so many layers are
 * attended in rotation that they exceed the last-level cache four times: one measurement is one
 * round over all of them. Rounds of the two kinds alternate, and the ratio is the median of the
 * pairs' ratios.
 *
 * Before anything is timed, the outputs of all layers are compared: the same bits.
 */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {{"isa", NULL, -10},
                                       {"k_type", "K", -4},
                                       {"v_type", "V", -4},
                                       {"mode", NULL, -4},
                                       {"q_heads", "q", 4},
                                       {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},
                                       {"ctx", NULL, 7},
                                       {"threads", "thr", 3},
                                       {"layers", "lay", 4},
                                       {"forks", NULL, 5},
                                       {"batch_ms", "batch ms", 9},
                                       {"batch_spread", "spread", 6},
                                       {"calls_ms", "calls ms", 9},
                                       {"calls_spread", "spread", 6},
                                       {"ratio", NULL, 6},
                                       {"ratio_p10", "p10", 6},
                                       {"ratio_p90", "p90", 6},
                                       {"preemptions", "preempt", 7}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

enum { OWN = 64 }; /* tokens of each fork */

typedef struct prefix {
    bench_cache b;
    size_t n; /* forks */
    kvt_attend_item *items;
    float *q, *out, *alone; /* of all forks */
    size_t q_width, out_width;
} prefix;

/* One call for items first .. first + n - 1. */
static void attend(prefix *p, size_t layer, uint32_t flags, size_t first, size_t n, float *out)
{
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = (uint32_t)layer;
    args.flags = flags;
    args.items = p->items + first;
    args.n_items = n;
    args.q = kvt_tensor_f32(p->q + first * p->q_width);
    args.out = kvt_tensor_f32(out + first * p->out_width);
    bench_require(kvt_attend(p->b.cache, &args), p->b.cache, "kvt_attend");
}

static double round_of_batches(prefix *p, uint32_t flags)
{
    double start = bench_seconds();
    for (size_t layer = 0; layer < p->b.n_layers; layer++)
        attend(p, layer, flags, 0, p->n, p->out);
    return (bench_seconds() - start) / (double)p->b.n_layers;
}

static double round_of_calls(prefix *p, uint32_t flags)
{
    double start = bench_seconds();
    for (size_t layer = 0; layer < p->b.n_layers; layer++)
        for (size_t i = 0; i < p->n; i++)
            attend(p, layer, flags, i, 1, p->alone);
    return (bench_seconds() - start) / (double)p->b.n_layers;
}

static void check(prefix *p, uint32_t flags)
{
    size_t bytes = p->n * p->out_width * sizeof *p->out;
    for (size_t layer = 0; layer < p->b.n_layers; layer++) {
        memset(p->out, 0xff, bytes); /* NaN: elements that are not written are detected */
        memset(p->alone, 0, bytes);
        attend(p, layer, flags, 0, p->n, p->out);
        for (size_t i = 0; i < p->n; i++)
            attend(p, layer, flags, i, 1, p->alone);
        if (memcmp(p->out, p->alone, bytes) != 0)
            bench_fail(1, "prefix: layer %zu: the batch's output differs from the calls'", layer);
    }
}

static void run_mode(const bench_options *options, prefix *p, bench_mode mode)
{
    const bench_case *c = &p->b.shape;
    uint32_t flags = bench_mode_flags(mode);
    size_t n = options->runs;
    double *batch = bench_alloc(3 * n, sizeof *batch), *calls = batch + n, *ratio = calls + n;
    bench_record r;

    check(p, flags); /* and warm up */
    uint64_t preemptions = bench_preemptions();
    for (size_t i = 0; i < n; i++) {
        if (i % 2)
            calls[i] = round_of_calls(p, flags);
        batch[i] = round_of_batches(p, flags);
        if (i % 2 == 0)
            calls[i] = round_of_calls(p, flags);
        ratio[i] = calls[i] / batch[i];
    }
    preemptions = bench_preemptions() - preemptions;

    bench_stats batches = bench_stats_of(batch, n), alone = bench_stats_of(calls, n);
    bench_stats spread = bench_stats_of(ratio, n);
    bench_record_begin(&r, "prefix", kvt_cache_isa(p->b.cache), bench_type_name(c->k_type),
                       bench_v_name(c, options->json), c);
    bench_record_text(&r, "mode", bench_mode_name(mode));
    bench_record_integer(&r, "layers", p->b.n_layers);
    bench_record_integer(&r, "forks", p->n);
    bench_record_integer(&r, "own_tokens", OWN);
    bench_record_number(&r, "batch_ms", 1e3 * batches.median);
    bench_record_number(&r, "batch_spread", (batches.p90 - batches.p10) / batches.median);
    bench_record_number(&r, "calls_ms", 1e3 * alone.median);
    bench_record_number(&r, "calls_spread", (alone.p90 - alone.p10) / alone.median);
    bench_record_number(&r, "ratio", spread.median);
    bench_record_number(&r, "ratio_p10", spread.p10);
    bench_record_number(&r, "ratio_p90", spread.p90);
    bench_record_integer(&r, "preemptions", preemptions);
    bench_record_integer(&r, "llc_bytes", options->llc_bytes);
    bench_record_end(&r, options, bench_team_pinned(p->b.team));
    bench_emit(options, &r, columns, N_COLUMNS);
    free(batch);
}

static int run(const bench_options *options, const bench_case *c)
{
    prefix p = {.n = options->forks};
    size_t n_layers, n_seqs;
    bench_random random;
    bench_plan_layers(c, c->ctx, options->quick ? 1 : 4 * options->llc_bytes, options->layers,
                      &n_layers, &n_seqs);
    /* What the forks have of their own: OWN tokens, f16 perhaps, and copies of blocks. */
    double own = 2.0 * bench_kv_bytes(c, 2 * OWN) * (double)(n_layers * p.n);

    bench_cache_create(&p.b, c, n_layers, 1, c->ctx + OWN, (uint64_t)own, options->seed);
    bench_cache_fill(&p.b, c->ctx);
    p.items = bench_alloc(p.n, sizeof *p.items);
    p.q_width = (size_t)c->q_heads * c->k_dim;
    p.out_width = (size_t)c->q_heads * c->v_dim;
    p.q = bench_alloc(p.n * p.q_width, sizeof *p.q);
    p.out = bench_alloc(p.n * p.out_width, sizeof *p.out);
    p.alone = bench_alloc(p.n * p.out_width, sizeof *p.alone);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, p.q, p.n * p.q_width);
    kvt_seq **forks = bench_alloc(p.n, sizeof *forks);
    for (size_t i = 0; i < p.n; i++) {
        bench_require(kvt_seq_fork(p.b.seqs[0], c->ctx, &forks[i]), p.b.cache, "kvt_seq_fork");
        bench_require(kvt_seq_begin(forks[i], OWN, NULL), p.b.cache, "kvt_seq_begin");
        for (size_t layer = 0; layer < n_layers; layer++) {
            size_t at = bench_source_offset(&p.b, i + 1, layer, 0);
            kvt_tensor k = kvt_tensor_f32(p.b.source.k + at * p.b.source.k_width);
            kvt_tensor v = kvt_tensor_f32(p.b.source.v + at * p.b.source.v_width);
            bench_require(kvt_append(forks[i], (uint32_t)layer, &k, c->v_in_k ? NULL : &v),
                          p.b.cache, "kvt_append");
        }
        bench_require(kvt_seq_commit(forks[i], NULL), p.b.cache, "kvt_seq_commit");
        p.items[i] = (kvt_attend_item){.seq = forks[i], .n_queries = 1};
    }
    for (size_t i = 0; i < options->n_modes; i++)
        run_mode(options, &p, options->modes[i]);

    for (size_t i = 0; i < p.n; i++)
        kvt_seq_destroy(forks[i]);
    free(forks);
    free(p.alone);
    free(p.out);
    free(p.q);
    free(p.items);
    bench_cache_destroy(&p.b);
    return 0;
}

int bench_prefix(const bench_options *options)
{
    bench_table_begin(options,
                      "prefix: one token of each of several forks of a sequence of ctx tokens",
                      columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "batch: one call for all forks, which have 64 tokens of their own; calls: one for "
               "each of them, one after the other; a\n"
               "layer's time, median of the rounds, and spread = (p90 - p10) / median. ratio = "
               "median of the pairs' calls / batch. The\n"
               "outputs of both are the same bits. preempt: times that other programs got in "
               "between.");
    return result;
}
