/*
 * step: one decoding step of a small model: begin one token, append and attend every layer,
 * commit. Beyond decode it includes the library's work around its kernels: plans, checks, tables,
 * locks. step_overhead.sh counts that in instructions; here it is time.
 *
 * So many sequences are stepped in rotation that they make four times the last-level cache, and a
 * step's keys and values are not cached. A measurement is --steps steps (default 64, one block) of
 * each sequence from ctx tokens on; before each the sequences are truncated to ctx.
 *
 * The very first steps, which write to newly allocated blocks, are not timed: their allocations are
 * counted through the allocator hook, those of steps that begin a block apart from the others.
 *
 * What a user sees as a stall is the slowest of a block's steps: the one that begins a block, or
 * that with which a block is sealed. Each step's own time is kept, and the worst is the largest of
 * the medians, over measurements and sequences, of the i-th steps; worst_best is the same of the
 * fastest i-th steps, for machines that other programs use. Free blocks go back to the allocator
 * before each measurement, so that such a step pays for the memory of its blocks as in a long
 * decoding.
 *
 * Their last output is checked against attention in double over what the cache then holds.
 */
#include "bench.h"

#include <math.h>
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
                                       {"sequences", "seq", 4},
                                       {"steps", NULL, 5},
                                       {"ms_median", "ms/step", 8},
                                       {"spread", NULL, 7},
                                       {"worst_ms", "worst", 7},
                                       {"worst_ratio", "worst/m", 7},
                                       {"worst_best", "best", 6},
                                       {"bytes", NULL, 10},
                                       {"gbps", "GB/s", 6},
                                       {"read_gbps", "read", 6},
                                       {"ratio", NULL, 6},
                                       {"us_begin", "begin", 7},
                                       {"us_append", "append", 7},
                                       {"us_attend", "attend", 7},
                                       {"us_commit", "commit", 7},
                                       {"allocations", "allocs", 6},
                                       {"allocations_block", "a block", 7},
                                       {"preemptions", "preempt", 7},
                                       {"error", "vs cache", 9}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

enum { BEGIN, APPEND, ATTEND, COMMIT, PARTS };

typedef struct step {
    bench_cache b;
    bench_mode mode;
    size_t n_steps;
    float *q, *out;
    double *times; /* [n_steps][measurements][sequences], seconds */
} step;

/*
 * One token of one sequence. Not static and not inlined: step_overhead.sh selects it by name.
 * parts: four sums that seconds are added to; NULL: no clock is read.
 */
void bench_step_once(step *s, size_t seq, size_t token, double *parts);

__attribute__((noinline)) void bench_step_once(step *s, size_t seq, size_t token, double *parts)
{
    bench_cache *b = &s->b;
    double t[4] = {0, 0, 0, 0};
    if (parts)
        t[0] = bench_seconds();
    bench_require(kvt_seq_begin(b->seqs[seq], 1, NULL), b->cache, "kvt_seq_begin");
    if (parts)
        parts[BEGIN] += bench_seconds() - t[0];
    for (size_t layer = 0; layer < b->n_layers; layer++) {
        size_t at = (token + layer) % b->source.n;
        if (parts)
            t[1] = bench_seconds();
        bench_cache_append(b, seq, layer, at);
        if (parts)
            t[2] = bench_seconds();
        bench_attend_layer(b, seq, layer, bench_mode_flags(s->mode) | KVT_ATTEND_CAUSAL, 1, s->q,
                           s->out); /* causal: engines have one call for prompts and steps */
        if (parts) {
            parts[APPEND] += t[2] - t[1];
            parts[ATTEND] += bench_seconds() - t[2];
        }
    }
    if (parts)
        t[3] = bench_seconds();
    bench_require(kvt_seq_commit(b->seqs[seq], NULL), b->cache, "kvt_seq_commit");
    if (parts)
        parts[COMMIT] += bench_seconds() - t[3];
}

static void cut_back(step *s)
{
    for (size_t i = 0; i < s->b.n_seqs; i++)
        bench_require(kvt_seq_truncate(s->b.seqs[i], s->b.ctx), s->b.cache, "kvt_seq_truncate");
    bench_require(kvt_cache_trim(s->b.cache), s->b.cache, "kvt_cache_trim");
}

/* Seconds of a step. parts as in bench_step_once; NULL: the steps' own times are kept. */
static double measure(step *s, double *parts, size_t measurement, size_t n_measurements)
{
    cut_back(s);
    double start = bench_seconds(), before = start, now = start;
    for (size_t i = 0; i < s->n_steps; i++)
        for (size_t seq = 0; seq < s->b.n_seqs; seq++, before = now) {
            bench_step_once(s, seq, i, parts);
            now = bench_seconds();
            if (!parts)
                s->times[(i * n_measurements + measurement) * s->b.n_seqs + seq] = now - before;
        }
    return (now - start) / (double)(s->n_steps * s->b.n_seqs);
}

/* The index of the largest, and its ratio to the median. */
static size_t worst_of(const double *x, size_t n, double *ratio)
{
    size_t worst = 0;
    for (size_t i = 0; i < n; i++)
        worst = x[i] > x[worst] ? i : worst;
    *ratio = x[worst] / bench_median(x, n);
    return worst;
}

static void record_worst(bench_record *r, const step *s, size_t n_measurements)
{
    size_t n = n_measurements * s->b.n_seqs, worst;
    double *median = bench_alloc(s->n_steps, sizeof *median), ratio, best;
    double *least = bench_alloc(s->n_steps, sizeof *least);
    for (size_t i = 0; i < s->n_steps; i++) {
        bench_stats t = bench_stats_of(s->times + i * n, n);
        median[i] = t.median;
        least[i] = t.min;
    }
    worst = worst_of(median, s->n_steps, &ratio);
    worst_of(least, s->n_steps, &best);
    bench_record_integer(r, "worst_step", worst);
    bench_record_number(r, "worst_ms", 1e3 * median[worst]);
    bench_record_number(r, "worst_ratio", ratio);
    bench_record_number(r, "worst_best", best);
    free(least);
    free(median);
}

/* The first steps: allocations of all of those within a block, and of one that begins a block. */
static void count_allocations(step *s, size_t *within, double *beginning)
{
    size_t total[2] = {0, 0}, n[2] = {0, 0};
    for (size_t i = 0; i < s->n_steps; i++) {
        for (size_t seq = 0; seq < s->b.n_seqs; seq++) {
            bool begins = kvt_seq_length(s->b.seqs[seq]) % KVT_BLOCK_TOKENS == 0;
            size_t before = s->b.heap.n_allocations;
            bench_step_once(s, seq, i, NULL);
            total[begins] += s->b.heap.n_allocations - before;
            n[begins]++;
        }
    }
    *within = total[0];
    *beginning = n[1] ? (double)total[1] / (double)n[1] : NAN;
}

/*
 * out is of the last sequence's last layer. The commit may have sealed a block after that, which a
 * truncate by the last token takes back: the tokens before it are read as they were attended.
 */
static double check(const step *s)
{
    const bench_cache *b = &s->b;
    const bench_case *c = &b->shape;
    size_t n_out = (size_t)c->q_heads * c->v_dim, seq = b->n_seqs - 1;
    uint64_t n = kvt_seq_length(b->seqs[seq]);
    float *k = bench_alloc((size_t)n * b->source.k_width, sizeof *k);
    float *v = bench_alloc((size_t)n * b->source.v_width, sizeof *v);
    double *expected = bench_alloc(n_out, sizeof *expected);
    bench_read_layer(b, seq, b->n_layers - 1, n, k, v);
    bench_require(kvt_seq_truncate(b->seqs[seq], n - 1), b->cache, "kvt_seq_truncate");
    bench_read_layer(b, seq, b->n_layers - 1, n - 1, k, v);
    bench_attend_double(c, s->q, 1, k, v, n, expected);
    double error = bench_relative_error(s->out, expected, n_out);
    free(expected);
    free(v);
    free(k);
    if (!(error < bench_error_limit(c, s->mode)))
        bench_fail(1, "%s %s: wrong output after %llu tokens: relative error %.3g (limit %.3g)",
                   kvt_cache_isa(b->cache), bench_mode_name(s->mode), (unsigned long long)n, error,
                   bench_error_limit(c, s->mode));
    return error;
}

static void run_mode(const bench_options *options, const bench_case *c, bench_mode mode)
{
    step s;
    bench_record record;
    bench_random random;
    size_t n_layers, n_seqs, n = options->runs, within;
    uint64_t set_bytes = options->quick ? 1 : 4 * options->llc_bytes;
    double parts[PARTS] = {0}, bytes = 0.0, steps, beginning;

    bench_plan_layers(c, c->ctx, set_bytes, options->layers ? options->layers : 24, &n_layers,
                      &n_seqs);
    s.n_steps = (size_t)options->steps;
    s.mode = mode;
    bench_cache_create(&s.b, c, n_layers, n_seqs, c->ctx + s.n_steps,
                       set_bytes + bench_reference_bytes(c), options->seed);
    s.b.ctx = c->ctx;
    bench_cache_fill(&s.b, c->ctx);
    s.q = bench_alloc((size_t)c->q_heads * c->k_dim, sizeof *s.q);
    s.out = bench_alloc((size_t)c->q_heads * c->v_dim, sizeof *s.out);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, s.q, (size_t)c->q_heads * c->k_dim);
    steps = (double)(s.n_steps * n_seqs);
    for (size_t i = 1; i <= s.n_steps; i++)
        bytes += (double)n_layers * bench_kv_bytes(c, c->ctx + i) / (double)s.n_steps;

    count_allocations(&s, &within, &beginning);
    double error = check(&s);
    bench_record_begin(&record, "step", kvt_cache_isa(s.b.cache), bench_type_name(c->k_type),
                       bench_v_name(c, options->json), c);
    bench_record_text(&record, "mode", bench_mode_name(mode));
    bench_record_integer(&record, "layers", n_layers);
    bench_record_integer(&record, "sequences", n_seqs);
    bench_record_integer(&record, "steps", s.n_steps);

    if (options->count) {
        bench_record_no_time(&record, bytes);
    } else {
        bench_read *reader =
            bench_read_create(&s.b.heap, s.b.team, bench_heap_main_size(&s.b.heap), set_bytes);
        double *time = bench_alloc(n, sizeof *time), *ratio = bench_alloc(n, sizeof *ratio);
        double *read = bench_alloc(n, sizeof *read);
        s.times = bench_alloc(s.n_steps * n * n_seqs, sizeof *s.times);
        measure(&s, parts, 0, n);
        uint64_t preemptions = bench_preemptions();
        for (size_t i = 0; i < n; i++) {
            double t_read = 0.0;
            if (i % 2 == 0)
                t_read = bench_read_run(reader);
            time[i] = measure(&s, NULL, i, n);
            if (i % 2 == 1)
                t_read = bench_read_run(reader);
            read[i] = 1e-9 * bench_read_bytes(reader) / t_read;
            ratio[i] = 1e-9 * bytes / time[i] / read[i];
        }
        bench_stats t = bench_stats_of(time, n);
        bench_record_time(&record, time, n, bytes, bench_median(read, n), bench_median(ratio, n));
        bench_record_number(&record, "spread", (t.p90 - t.p10) / t.median);
        record_worst(&record, &s, n);
        bench_record_number(&record, "us_begin", 1e6 * parts[BEGIN] / steps);
        bench_record_number(&record, "us_append", 1e6 * parts[APPEND] / steps);
        bench_record_number(&record, "us_attend", 1e6 * parts[ATTEND] / steps);
        bench_record_number(&record, "us_commit", 1e6 * parts[COMMIT] / steps);
        bench_record_integer(&record, "preemptions", bench_preemptions() - preemptions);
        bench_record_text(&record, "read_loop", bench_read_loop(reader));
        free(s.times);
        free(read);
        free(ratio);
        free(time);
        bench_read_destroy(reader);
    }
    bench_record_integer(&record, "allocations", within);
    bench_record_number(&record, "allocations_block", beginning);
    bench_record_number(&record, "error", error);
    bench_record_end(&record, options, bench_team_pinned(s.b.team));
    bench_emit(options, &record, columns, N_COLUMNS);

    free(s.out);
    free(s.q);
    bench_cache_destroy(&s.b);
}

static int run(const bench_options *options, const bench_case *c)
{
    for (size_t i = 0; i < options->n_modes; i++)
        run_mode(options, c, options->modes[i]);
    return 0;
}

int bench_step(const bench_options *options)
{
    bench_table_begin(options,
                      "step: begin one token, append and attend every layer, commit; from ctx "
                      "tokens on",
                      columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "%s\n"
               "bytes: of all layers, at the mean length. ms/step: median over the measurements, "
               "spread = (p90 - p10) / median; read,\n"
               "ratio as in decode. worst: ms of the slowest of the steps (that which seals a "
               "block, or begins one; the median of each\n"
               "over the measurements), worst/m: over the median step's, best: the same of the "
               "fastest. begin, append, attend, commit: us of\n"
               "a step in all calls of that name, in a measurement of its own.\n"
               "allocs: allocations by the first steps of all, in so far as they do not begin a "
               "block; a block: by one that does.",
               bench_kv_formula);
    return result;
}
