/*
 * append: keys and values of 1 or 512 tokens a step into every layer, and the step's begin and
 * commit, beside memcpy of the same input bytes.
 *
 * An engine has just computed what it appends, so the input (one step's tokens, the same for every
 * layer) is in the processor's caches as far as it fits. The destination is four times the
 * last-level cache, here and for memcpy, and both get it from the same allocator:
 *   fresh     never written before: the time includes page faults
 *   recycled  blocks of a cleared sequence; for memcpy, memory that was written before
 *
 * One measurement appends ctx tokens to all layers (tokens a call: 1, then 256 of them, on top
 * of a sequence of ctx). Each is paired with a memcpy of as many bytes in the same pieces, and
 * with a run of the read loop. GB/s count the input once, as memcpy's count the bytes copied.
 *
 * Stored keys and values are compared with the input before anything is timed.
 */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

static const bench_column columns[] = {
    {"isa", NULL, -8},        {"k_type", "K", -4},          {"v_type", "V", -4},
    {"dtype", "from", -4},    {"tokens", "tok/call", 8},    {"blocks", NULL, -8},
    {"kv_heads", "kv", 4},    {"head_dim", "dim", 4},       {"ctx", NULL, 7},
    {"threads", "thr", 3},    {"layers", "lay", 4},         {"us_per_token", "us/token", 9},
    {"ms_median", "ms", 9},   {"ms_p10", "p10", 9},         {"ms_p90", "p90", 9},
    {"gbps", "GB/s in", 7},   {"memcpy_gbps", "memcpy", 7}, {"memcpy_ratio", "ratio", 7},
    {"read_gbps", "read", 7}, {"ratio", "of read", 7}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

enum { SINGLE_STEPS = 256 };

typedef struct append {
    bench_cache b;
    kvt_allocator memory;
    size_t element, tokens, steps, row_bytes; /* row: K and V of one token of one layer */
    kvt_dtype dtype;
    unsigned char *k, *v;    /* [tokens][heads][dim] of dtype */
    uint64_t base;           /* tokens that are there before each measurement */
    unsigned char **targets; /* of memcpy: allocations as large as the cache's blocks, */
    size_t n_targets, target_bytes, calls_a_target; /* with room for so many calls' input */
    size_t calls;                                   /* of kvt_append in one measurement */
    double bytes;                                   /* of input, in one measurement */
} append;

static size_t dtype_bytes(kvt_dtype dtype)
{
    return dtype == KVT_F32 ? 4 : 2;
}

static void convert(const float *x, unsigned char *y, size_t n, kvt_dtype dtype)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t half = dtype == KVT_F16 ? bench_to_f16(x[i]) : bench_to_bf16(x[i]);
        if (dtype == KVT_F32)
            memcpy(y + 4 * i, &x[i], 4);
        else
            memcpy(y + 2 * i, &half, 2);
    }
}

static kvt_tensor tensor(unsigned char *data, kvt_dtype dtype)
{
    kvt_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.dtype = dtype;
    return t;
}

static void step(append *a, size_t seq)
{
    kvt_tensor k = tensor(a->k, a->dtype), v = tensor(a->v, a->dtype);
    kvt_seq *s = a->b.seqs[seq];
    bench_require(kvt_seq_begin(s, a->tokens, NULL), a->b.cache, "kvt_seq_begin");
    for (size_t layer = 0; layer < a->b.n_layers; layer++)
        bench_require(kvt_append(s, (uint32_t)layer, &k, &v), a->b.cache, "kvt_append");
    bench_require(kvt_seq_commit(s, NULL), a->b.cache, "kvt_seq_commit");
}

/* Seconds for all steps of all sequences. Preparing the sequences is not timed. */
static double measure(append *a, bool fresh)
{
    for (size_t s = 0; s < a->b.n_seqs; s++)
        bench_require(kvt_seq_truncate(a->b.seqs[s], a->base), a->b.cache, "kvt_seq_truncate");
    if (fresh)
        bench_require(kvt_cache_trim(a->b.cache), a->b.cache, "kvt_cache_trim");
    double start = bench_seconds();
    for (size_t s = 0; s < a->b.n_seqs; s++)
        for (size_t i = 0; i < a->steps; i++)
            step(a, s);
    return bench_seconds() - start;
}

static void free_targets(append *a)
{
    for (size_t i = 0; a->targets && i < a->n_targets; i++)
        a->memory.free(a->memory.user, a->targets[i], a->target_bytes);
    free(a->targets);
    a->targets = NULL;
}

static void make_targets(append *a)
{
    a->targets = bench_alloc(a->n_targets, sizeof *a->targets);
    for (size_t i = 0; i < a->n_targets; i++) {
        a->targets[i] = a->memory.alloc(a->memory.user, a->target_bytes, 64);
        if (!a->targets[i])
            bench_fail(1, "no memory for memcpy");
    }
}

/* A thread's share of copy_all: the input of every n-th call, to addresses not written before. */
static void copy_share(void *arg, unsigned worker)
{
    append *a = arg;
    unsigned n_threads = bench_team_threads(a->b.team);
    size_t k_bytes = a->tokens * a->b.source.k_width * a->element;
    size_t v_bytes = a->tokens * a->b.source.v_width * a->element;
    for (size_t i = worker; i < a->calls; i += n_threads) {
        unsigned char *to =
            a->targets[i / a->calls_a_target] + i % a->calls_a_target * (k_bytes + v_bytes);
        memcpy(to, a->k, k_bytes);
        memcpy(to + k_bytes, a->v, v_bytes);
    }
}

/* memcpy of all that measure() appends, in the pieces of one call of kvt_append. */
static double copy_all(append *a, bool fresh)
{
    if (fresh) {
        free_targets(a);
        make_targets(a);
    }
    double start = bench_seconds();
    bench_team_each(a->b.team, copy_share, a);
    return bench_seconds() - start;
}

/* K and V of the last step of the last layer against the input. */
static void check(append *a)
{
    const bench_case *c = &a->b.shape;
    kvt_seq *s = a->b.seqs[a->b.n_seqs - 1];
    for (int side = 0; side < 2; side++) {
        size_t width = side ? a->b.source.v_width : a->b.source.k_width, n = a->tokens * width;
        float *got = bench_alloc(n, sizeof *got);
        double *given = bench_alloc(n, sizeof *given);
        kvt_tensor t = kvt_tensor_f32(got);
        bench_require(kvt_read(s, (uint32_t)(a->b.n_layers - 1), side ? KVT_SIDE_V : KVT_SIDE_K,
                               kvt_seq_length(s) - a->tokens, a->tokens, &t),
                      a->b.cache, "kvt_read");
        for (size_t i = 0; i < n; i++)
            given[i] = (double)(side ? a->b.source.v : a->b.source.k)[i];
        double error = bench_relative_error(got, given, n);
        kvt_type type = side ? c->v_type : c->k_type;
        double limit = type >= KVT_TYPE_I4                           ? 0.2
                       : type == KVT_TYPE_I8 || a->dtype == KVT_BF16 ? 0.02
                       : type == KVT_TYPE_F16 || a->dtype == KVT_F16 ? 1e-3
                                                                     : 1e-30;
        if (!(error < limit))
            bench_fail(
                1, "append %s to %s: %c differs from the input: relative error %.3g, limit %.3g",
                bench_dtype_name(a->dtype), bench_type_name(type), side ? 'V' : 'K', error, limit);
        free(given);
        free(got);
    }
}

static void report(const bench_options *options, append *a, bench_read *reader, bool fresh)
{
    const bench_case *c = &a->b.shape;
    size_t n = options->runs;
    double *time = bench_alloc(n, sizeof *time), *copy = bench_alloc(n, sizeof *copy);
    double *copy_ratio = bench_alloc(n, sizeof *copy_ratio);
    double *read = bench_alloc(n, sizeof *read), *ratio = bench_alloc(n, sizeof *ratio);
    double calls = (double)a->calls;
    bench_record r;

    measure(a, fresh); /* warm up; leaves used memory behind for the recycled case */
    copy_all(a, true);
    for (size_t i = 0; i < n; i++) {
        double t_copy = 0.0, t;
        if (i % 2 == 0)
            t_copy = copy_all(a, fresh);
        t = measure(a, fresh);
        if (i % 2 == 1)
            t_copy = copy_all(a, fresh);
        time[i] = t / calls;
        copy[i] = 1e-9 * a->bytes / t_copy;
        copy_ratio[i] = t_copy / t;
        read[i] = 1e-9 * bench_read_bytes(reader) / bench_read_run(reader);
        ratio[i] = 1e-9 * a->bytes / t / read[i];
    }
    bench_record_begin(&r, "append", kvt_cache_isa(a->b.cache), bench_type_name(c->k_type),
                       bench_type_name(c->v_type), c);
    bench_record_time(&r, time, n, a->bytes / calls, bench_median(read, n), bench_median(ratio, n));
    bench_record_number(&r, "memcpy_gbps", bench_median(copy, n));
    bench_record_number(&r, "memcpy_ratio", bench_median(copy_ratio, n));
    bench_stats spread = bench_stats_of(copy_ratio, n);
    bench_record_number(&r, "memcpy_ratio_p10", spread.p10);
    bench_record_number(&r, "memcpy_ratio_p90", spread.p90);
    bench_record_number(&r, "us_per_token",
                        1e6 * bench_median(time, n) / (double)a->tokens); /* and layer */
    bench_record_text(&r, "dtype", bench_dtype_name(a->dtype));
    bench_record_integer(&r, "tokens", a->tokens);
    bench_record_text(&r, "blocks", fresh ? "fresh" : "recycled");
    bench_record_integer(&r, "layers", a->b.n_layers);
    bench_record_integer(&r, "sequences", a->b.n_seqs);
    bench_record_number(&r, "stored_bytes", bench_kv_bytes(c, a->tokens));
    bench_record_text(&r, "read_loop", bench_read_loop(reader));
    bench_record_end(&r, options, bench_team_pinned(a->b.team));
    bench_emit(options, &r, columns, N_COLUMNS);
    free(ratio);
    free(read);
    free(copy_ratio);
    free(copy);
    free(time);
}

static void run_one(const bench_options *options, const bench_case *c, uint64_t tokens,
                    kvt_dtype dtype)
{
    append a;
    size_t n_layers, n_seqs;
    uint64_t set_bytes = options->quick ? 1 << 20 : 4 * options->llc_bytes;

    memset(&a, 0, sizeof a);
    a.tokens = (size_t)tokens;
    a.dtype = dtype;
    a.element = dtype_bytes(dtype);
    if (tokens == 1) {
        a.steps = options->quick ? 8 : SINGLE_STEPS;
        a.base = c->ctx;
    } else {
        a.steps = (size_t)((c->ctx + tokens - 1) / tokens);
        a.base = 0;
    }
    uint64_t appended = a.steps * tokens;
    bench_plan_layers(c, appended, set_bytes, options->layers, &n_layers, &n_seqs);
    /* Single tokens measure the cost of a step; 256 tokens of a few layers need not exceed the
     * last-level cache. The memory written was last touched one round before in any case. */
    if (tokens == 1 && n_seqs > 4)
        n_seqs = 4;

    a.calls = n_layers * n_seqs * a.steps;
    a.row_bytes = (size_t)c->kv_heads * (c->k_dim + c->v_dim) * a.element;
    a.bytes = (double)(a.row_bytes * a.tokens) * (double)a.calls;
    bench_cache_create(&a.b, c, n_layers, n_seqs, a.base + appended, set_bytes + (uint64_t)a.bytes,
                       options->seed);
    a.memory = bench_heap_hook(&a.b.heap);
    a.k = bench_alloc(a.tokens * a.b.source.k_width, a.element);
    a.v = bench_alloc(a.tokens * a.b.source.v_width, a.element);
    convert(a.b.source.k, a.k, a.tokens * a.b.source.k_width, dtype);
    convert(a.b.source.v, a.v, a.tokens * a.b.source.v_width, dtype);

    if (a.base > 0)
        bench_cache_fill(&a.b, a.base);
    measure(&a, false);
    check(&a);
    a.target_bytes = bench_heap_main_size(&a.b.heap);
    if (a.target_bytes < a.row_bytes * a.tokens)
        a.target_bytes = a.row_bytes * a.tokens;
    a.calls_a_target = a.target_bytes / (a.row_bytes * a.tokens);
    a.n_targets = (a.calls + a.calls_a_target - 1) / a.calls_a_target;
    bench_read *reader =
        bench_read_create(&a.b.heap, a.b.team, bench_heap_main_size(&a.b.heap), set_bytes);
    report(options, &a, reader, true);
    report(options, &a, reader, false);

    bench_read_destroy(reader);
    free_targets(&a);
    free(a.v);
    free(a.k);
    bench_cache_destroy(&a.b);
}

static int run(const bench_options *options, const bench_case *c)
{
    for (size_t d = 0; d < options->n_dtypes; d++)
        for (size_t t = 0; t < options->n_tokens; t++)
            run_one(options, c, options->tokens[t], options->dtypes[d]);
    return 0;
}

int bench_append(const bench_options *options)
{
#if defined(__GLIBC__)
    /* Fixed, as malloc else raises it after a free and then reuses freed blocks as "fresh" ones. */
    mallopt(M_MMAP_THRESHOLD, 64 * 1024);
#endif
    bench_table_begin(options, "append: a step's keys and values into every layer", columns,
                      N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(
        options,
        "bytes = tokens * kv_heads * (K + V dims) * size of the input's element, of one call "
        "(one layer);\n"
        "ms of a call, begin and commit shared out among the layers; us/token of one layer. "
        "memcpy: the same input\n"
        "bytes in the same pieces to memory of the same allocator, same threads, in turn; "
        "copied bytes count once.\n"
        "ratio = median of the pairs' ratios to it; of read = to the read bandwidth. fresh: "
        "to memory never written\n"
        "before; recycled: to blocks (memory) used before.");
    return result;
}
