/*
 * fork: a sequence that shares the blocks of another one of ctx tokens.
 *
 *   fork      kvt_seq_fork of the whole sequence; its destruction is not timed
 *   truncate  kvt_seq_truncate of the fork to half of it
 *   step      the first step of the fork, one token in all layers: begin, which copies the open
 *             block that both share, append, commit
 *   memcpy    of as many bytes as that block has, from it to memory of the same allocator
 *
 * The last block is nearly full, the most there is to copy: 60 tokens more than a multiple of 64.
 * Fresh: the copy goes to memory never written before, as does memcpy's; recycled: both to memory
 * used before. The step and memcpy are measured in turn.
 *
 * The fork is compared with its source before and after: same tokens, same output.
 */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const bench_column columns[] = {{"isa", NULL, -8},
                                       {"k_type", "K", -4},
                                       {"v_type", "V", -4},
                                       {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},
                                       {"ctx", NULL, 7},
                                       {"threads", "thr", 3},
                                       {"layers", "lay", 4},
                                       {"blocks", NULL, -8},
                                       {"fork_us", NULL, 8},
                                       {"truncate_us", NULL, 12},
                                       {"step_ms", NULL, 8},
                                       {"memcpy_ms", NULL, 10},
                                       {"memcpy_ratio", NULL, 12},
                                       {"memcpy_ratio_p10", "p10", 6},
                                       {"memcpy_ratio_p90", "p90", 6}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

enum { FILLED = 60 }; /* tokens of the last block */

typedef struct forks {
    bench_cache b;
    kvt_allocator memory;
    size_t block_bytes;             /* of the open block that is copied, all layers */
    unsigned char *from, *target;   /* of memcpy */
    double *fork, *truncate, *step; /* seconds */
    double *copy, *ratio;
} forks;

static uint64_t memory_of(const forks *f)
{
    return kvt_cache_memory_bytes(f->b.cache);
}

/* One token into all layers of a fork. */
static void first_step(forks *f, kvt_seq *seq)
{
    kvt_tensor k = kvt_tensor_f32(f->b.source.k), v = kvt_tensor_f32(f->b.source.v);
    bench_require(kvt_seq_begin(seq, 1, NULL), f->b.cache, "kvt_seq_begin");
    for (size_t layer = 0; layer < f->b.n_layers; layer++)
        bench_require(kvt_append(seq, (uint32_t)layer, &k, &v), f->b.cache, "kvt_append");
    bench_require(kvt_seq_commit(seq, NULL), f->b.cache, "kvt_seq_commit");
}

static kvt_seq *fork_source(forks *f)
{
    kvt_seq *copy;
    bench_require(kvt_seq_fork(f->b.seqs[0], kvt_seq_length(f->b.seqs[0]), &copy), f->b.cache,
                  "kvt_seq_fork");
    return copy;
}

static double copy_block(forks *f, bool fresh)
{
    double start;
    if (fresh) {
        if (f->target)
            f->memory.free(f->memory.user, f->target, f->block_bytes);
        f->target = f->memory.alloc(f->memory.user, f->block_bytes, 64);
        if (!f->target)
            bench_fail(1, "no memory for memcpy");
    }
    start = bench_seconds();
    memcpy(f->target, f->from, f->block_bytes);
    return bench_seconds() - start;
}

static void measure(forks *f, size_t i, bool fresh)
{
    double copied = 0.0, start = bench_seconds();
    kvt_seq *seq = fork_source(f);
    f->fork[i] = bench_seconds() - start;
    start = bench_seconds();
    bench_require(kvt_seq_truncate(seq, kvt_seq_length(seq) / 2), f->b.cache, "kvt_seq_truncate");
    f->truncate[i] = bench_seconds() - start;
    kvt_seq_destroy(seq);

    seq = fork_source(f);
    if (fresh)
        bench_require(kvt_cache_trim(f->b.cache), f->b.cache, "kvt_cache_trim");
    if (i % 2)
        copied = copy_block(f, fresh);
    start = bench_seconds();
    first_step(f, seq);
    f->step[i] = bench_seconds() - start;
    if (i % 2 == 0)
        copied = copy_block(f, fresh);
    kvt_seq_destroy(seq);
    f->copy[i] = copied;
    f->ratio[i] = f->step[i] / copied;
}

static void attend_last(forks *f, const kvt_seq *seq, const float *q, float *out)
{
    kvt_attend_item item = {.seq = seq, .n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    args.items = &item;
    args.n_items = 1;
    args.layer = (uint32_t)(f->b.n_layers - 1);
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    bench_require(kvt_attend(f->b.cache, &args), f->b.cache, "kvt_attend");
}

/* The fork has its source's tokens, in their own block, and the source is as it was. */
static void check(forks *f)
{
    const bench_case *c = &f->b.shape;
    size_t n_out = (size_t)c->q_heads * c->v_dim;
    float *q = bench_alloc((size_t)c->q_heads * c->k_dim, sizeof *q);
    float *out[3];
    uint64_t before = memory_of(f), length = kvt_seq_length(f->b.seqs[0]), table;
    kvt_seq *seq = fork_source(f);

    table = memory_of(f) - before;
    bench_random_fill(&f->b.random, q, (size_t)c->q_heads * c->k_dim);
    for (int i = 0; i < 3; i++)
        out[i] = bench_alloc(n_out, sizeof **out);
    attend_last(f, f->b.seqs[0], q, out[0]);
    attend_last(f, seq, q, out[1]);
    first_step(f, seq);
    bench_require(kvt_seq_truncate(seq, length), f->b.cache, "kvt_seq_truncate");
    attend_last(f, seq, q, out[2]);
    if (memcmp(out[0], out[1], n_out * sizeof **out) != 0 ||
        memcmp(out[0], out[2], n_out * sizeof **out) != 0)
        bench_fail(1, "fork: the output differs from the source's");
    f->block_bytes = (size_t)(memory_of(f) - before - table);
    kvt_seq_destroy(seq);
    for (int i = 0; i < 3; i++)
        free(out[i]);
    free(q);
}

static void report(const bench_options *options, forks *f, bool fresh)
{
    size_t n = options->runs;
    const bench_case *c = &f->b.shape;
    bench_record r;
    measure(f, 0, fresh); /* warm up */
    for (size_t i = 0; i < n; i++)
        measure(f, i, fresh);
    bench_record_begin(&r, "fork", kvt_cache_isa(f->b.cache), bench_type_name(c->k_type),
                       bench_type_name(c->v_type), c);
    bench_stats spread = bench_stats_of(f->ratio, n);
    bench_record_integer(&r, "layers", f->b.n_layers);
    bench_record_text(&r, "blocks", fresh ? "fresh" : "recycled");
    bench_record_number(&r, "fork_us", 1e6 * bench_median(f->fork, n));
    bench_record_number(&r, "fork_us_p90", 1e6 * bench_stats_of(f->fork, n).p90);
    bench_record_number(&r, "truncate_us", 1e6 * bench_median(f->truncate, n));
    bench_record_number(&r, "truncate_us_p90", 1e6 * bench_stats_of(f->truncate, n).p90);
    bench_record_number(&r, "step_ms", 1e3 * bench_median(f->step, n));
    bench_record_number(&r, "memcpy_ms", 1e3 * bench_median(f->copy, n));
    bench_record_integer(&r, "block_bytes", f->block_bytes);
    bench_record_number(&r, "memcpy_ratio", bench_median(f->ratio, n));
    bench_record_number(&r, "memcpy_ratio_p10", spread.p10);
    bench_record_number(&r, "memcpy_ratio_p90", spread.p90);
    bench_record_end(&r, options, bench_team_pinned(f->b.team));
    bench_emit(options, &r, columns, N_COLUMNS);
}

static int run(const bench_options *options, const bench_case *c)
{
    forks f;
    size_t n = options->runs, layers = options->layers ? options->layers : 32;
    double *times = bench_alloc(5 * n, sizeof *times);
    uint64_t tokens = c->ctx / 64 * 64 + FILLED;

    memset(&f, 0, sizeof f);
    f.fork = times;
    f.truncate = times + n;
    f.step = times + 2 * n;
    f.copy = times + 3 * n;
    f.ratio = times + 4 * n;
    bench_cache_create(&f.b, c, layers, 1, tokens + 1, 0, options->seed);
    f.memory = bench_heap_hook(&f.b.heap);
    bench_cache_fill(&f.b, tokens);
    check(&f);
    f.from = f.memory.alloc(f.memory.user, f.block_bytes, 64);
    if (!f.from)
        bench_fail(1, "no memory for memcpy");
    memset(f.from, 1, f.block_bytes);
    report(options, &f, true);
    report(options, &f, false);
    f.memory.free(f.memory.user, f.from, f.block_bytes);
    f.memory.free(f.memory.user, f.target, f.block_bytes);
    bench_cache_destroy(&f.b);
    free(times);
    return 0;
}

int bench_fork(const bench_options *options)
{
    bench_table_begin(options, "fork: a sequence that shares another one's blocks", columns,
                      N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(
        options,
        "fork: of all tokens; truncate: of the fork to its half; step: the fork's first, "
        "of one token, in all\n"
        "layers, which copies an open block of 60 tokens; memcpy: of that block's bytes, all "
        "of them, to memory of\n"
        "the same allocator. ratio = median of step to memcpy, in turn.");
    return result;
}
