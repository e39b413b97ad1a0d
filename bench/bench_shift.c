/*
 * shift: decode over keys that have moved (kvt_seq_remove), beside decode over as many that have
 * not.
 *
 *   plain   a sequence of ctx tokens
 *   moved   one that has had 512 tokens more, behind its first 64, which have been taken out: all
 *           later keys have one shift, and q is turned for them
 *
 * Both attend with one new token over all layers, in turn, and the ratio is the median of the
 * pairs' ratios. The layers exceed the last-level cache as those of decode do. remove: the time of
 * taking 64 tokens more out of the moved one.
 *
 * Before anything is timed: a sequence of the same tokens at the positions that the moved one has
 * now would need other keys, so the check is that 64 tokens taken out at the end of both, and put
 * back, leave the output bit for bit; tests/test_remove.c has the accuracy.
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {{"isa", NULL, -10},           {"k_type", "K", -4},
                                       {"v_type", "V", -4},          {"mode", NULL, -4},
                                       {"q_heads", "q", 4},          {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},       {"ctx", NULL, 7},
                                       {"threads", "thr", 3},        {"layers", "lay", 4},
                                       {"plain_ms", NULL, 8},        {"moved_ms", NULL, 8},
                                       {"ratio", NULL, 6},           {"ratio_p10", "p10", 6},
                                       {"ratio_p90", "p90", 6},      {"remove_us", NULL, 9},
                                       {"preemptions", "preempt", 7}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

enum { KEPT = 64, REMOVED = 512 };

typedef struct shift {
    bench_cache b;
    float *q, *out;
} shift;

static double attend_all(shift *s, size_t seq, bench_mode mode)
{
    double start = bench_seconds();
    for (size_t l = 0; l < s->b.n_layers; l++)
        bench_attend_layer(&s->b, seq, l, bench_mode_flags(mode), 1, s->q, s->out);
    return bench_seconds() - start;
}

static void report(const bench_options *options, shift *s, bench_mode mode, double remove_seconds)
{
    const bench_case *c = &s->b.shape;
    size_t n = options->runs;
    double *plain = bench_alloc(n, sizeof *plain), *moved = bench_alloc(n, sizeof *moved);
    double *ratio = bench_alloc(n, sizeof *ratio);
    bench_record r;
    uint64_t preemptions;

    attend_all(s, 0, mode);
    attend_all(s, 1, mode);
    preemptions = bench_preemptions();
    for (size_t i = 0; i < n; i++) {
        if (i % 2 == 0)
            plain[i] = attend_all(s, 0, mode);
        moved[i] = attend_all(s, 1, mode);
        if (i % 2 == 1)
            plain[i] = attend_all(s, 0, mode);
        ratio[i] = moved[i] / plain[i];
    }
    preemptions = bench_preemptions() - preemptions;
    bench_stats spread = bench_stats_of(ratio, n);
    bench_record_begin(&r, "shift", kvt_cache_isa(s->b.cache), bench_type_name(c->k_type),
                       bench_type_name(c->v_type), c);
    bench_record_text(&r, "mode", bench_mode_name(mode));
    bench_record_integer(&r, "layers", s->b.n_layers);
    bench_record_number(&r, "plain_ms", 1e3 * bench_median(plain, n));
    bench_record_number(&r, "moved_ms", 1e3 * bench_median(moved, n));
    bench_record_number(&r, "ratio", spread.median);
    bench_record_number(&r, "ratio_p10", spread.p10);
    bench_record_number(&r, "ratio_p90", spread.p90);
    bench_record_number(&r, "remove_us", 1e6 * remove_seconds);
    bench_record_integer(&r, "preemptions", preemptions);
    bench_record_end(&r, options, bench_team_pinned(s->b.team));
    bench_emit(options, &r, columns, N_COLUMNS);
    free(ratio);
    free(moved);
    free(plain);
}

/* 64 tokens more come and go at the end: the output is the same, bit for bit, and finite. */
static void check(shift *s)
{
    const bench_case *c = &s->b.shape;
    size_t n = (size_t)c->q_heads * c->v_dim;
    float *before = bench_alloc(n, sizeof *before);
    for (size_t seq = 0; seq < 2; seq++) {
        uint64_t length = kvt_seq_length(s->b.seqs[seq]);
        bench_attend_layer(&s->b, seq, 0, 0, 1, s->q, s->out);
        memcpy(before, s->out, n * sizeof *before);
        bench_require(kvt_seq_begin(s->b.seqs[seq], 64, NULL), s->b.cache, "kvt_seq_begin");
        for (size_t l = 0; l < s->b.n_layers; l++)
            bench_cache_append(&s->b, seq, l, 0);
        bench_require(kvt_seq_commit(s->b.seqs[seq], NULL), s->b.cache, "kvt_seq_commit");
        bench_require(kvt_seq_truncate(s->b.seqs[seq], length), s->b.cache, "kvt_seq_truncate");
        bench_attend_layer(&s->b, seq, 0, 0, 1, s->q, s->out);
        if (memcmp(before, s->out, n * sizeof *before) != 0 || !isfinite(before[0]))
            bench_fail(1, "shift: drafts that came and went have changed the output");
    }
    free(before);
}

static double remove_again(shift *s)
{
    double start = bench_seconds();
    bench_require(kvt_seq_remove(s->b.seqs[1], KEPT, 64), s->b.cache, "kvt_seq_remove");
    return bench_seconds() - start;
}

static int run(const bench_options *options, const bench_case *c)
{
    shift s;
    bench_random random;
    bench_case shape = *c;
    size_t n_layers, n_seqs;
    double seconds;
    uint64_t set_bytes = options->quick ? 1 << 20 : 2 * options->llc_bytes;

    memset(&s, 0, sizeof s);
    shape.rope = true;
    bench_plan_layers(c, c->ctx, set_bytes, options->layers, &n_layers, &n_seqs);
    bench_cache_create(&s.b, &shape, n_layers, 2, c->ctx + REMOVED + 128, 0, options->seed);
    s.b.n_seqs = 2;
    bench_cache_fill(&s.b, c->ctx);
    s.q = bench_alloc((size_t)c->q_heads * c->k_dim, sizeof *s.q);
    s.out = bench_alloc((size_t)c->q_heads * c->v_dim, sizeof *s.out);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, s.q, (size_t)c->q_heads * c->k_dim);
    /* The second one gets more, and loses as many. */
    for (uint64_t more = 0; more < REMOVED + 64; more += 64) {
        bench_require(kvt_seq_begin(s.b.seqs[1], 64, NULL), s.b.cache, "kvt_seq_begin");
        for (size_t l = 0; l < n_layers; l++)
            bench_cache_append(&s.b, 1, l, 0);
        bench_require(kvt_seq_commit(s.b.seqs[1], NULL), s.b.cache, "kvt_seq_commit");
    }
    bench_require(kvt_seq_remove(s.b.seqs[1], KEPT, REMOVED), s.b.cache, "kvt_seq_remove");
    seconds = remove_again(&s);
    check(&s);
    for (size_t i = 0; i < options->n_modes; i++)
        report(options, &s, options->modes[i], seconds);
    free(s.out);
    free(s.q);
    bench_cache_destroy(&s.b);
    return 0;
}

int bench_shift(const bench_options *options)
{
    bench_table_begin(options, "shift: decode over keys that have moved", columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "ms of one token's attention over all layers; ratio = median of the pairs' moved / "
               "plain. moved: 512 tokens were\n"
               "taken out behind the first 64 (then 64 more), so that q is turned for all later "
               "keys. remove: of 64 tokens.");
    return result;
}
