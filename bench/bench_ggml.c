/*
 * decode --peer ggml: attention of one token beside ggml's flash attention (ggml_flash_attn_ext on
 * its CPU backend) over caches of its own types with the same tokens in them, in one run.
 *
 * ggml's cache of a layer is filled by ggml's own quantization and laid out in both of the ways
 * there are: by tokens, a row of all heads for each, as llama.cpp has it; and by heads, each head's
 * tokens in one run of memory, which is what ggml reads faster. Its side of a round is one graph
 * with a node for each layer, built and planned once, computed by its own thread pool: what is
 * timed is one ggml_graph_compute, which has one start of the threads and a barrier for each layer,
 * and nothing else of a graph. There is no mask to be read: one token sees all. kvtile's side is a
 * kvt_attend for each layer, with the bench's pinned threads: planning and starting the threads are
 * timed for each of them.
 *
 * A pair is a round of one and a round of the other, in alternating order; each has more than four
 * times the last-level cache to read. ggml's threads sleep while ours run (ggml_threadpool_pause;
 * they are woken before the time begins), and ours while ggml's do. The memory of both caches comes
 * from the same allocator.
 *
 * Before anything is timed outputs of both are compared with each other and with attention in
 * double over what went into the caches.
 */
#include "bench.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {{"isa", NULL, -10},          {"k_type", "K", -4},
                                       {"v_type", "V", -4},         {"peer_type", "ggml", -5},
                                       {"layout", "by", -6},        {"mode", NULL, -4},
                                       {"q_heads", "q", 4},         {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},      {"ctx", NULL, 7},
                                       {"threads", "thr", 3},       {"layers", "lay", 4},
                                       {"sequences", "seq", 4},     {"ms_median", "ms", 8},
                                       {"peer_ms", "ggml ms", 8},   {"speedup", NULL, 7},
                                       {"speedup_p10", "p10", 6},   {"speedup_p90", "p90", 6},
                                       {"speedup_best", "best", 6}, {"bytes_ratio", "bytes", 6},
                                       {"error_input", "error", 9}, {"peer_error", "ggml's", 9},
                                       {"apart", NULL, 9},          {"preemptions", "preempt", 7}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

static enum ggml_type type_of(bench_peer peer, kvt_type k_type)
{
    if (peer == BENCH_PEER_LIKE)
        peer = k_type >= KVT_TYPE_I4   ? BENCH_PEER_Q4_0
               : k_type == KVT_TYPE_I8 ? BENCH_PEER_Q8_0
                                       : BENCH_PEER_F16;
    return peer == BENCH_PEER_F16    ? GGML_TYPE_F16
           : peer == BENCH_PEER_Q8_0 ? GGML_TYPE_Q8_0
                                     : GGML_TYPE_Q4_0;
}

/*
 * Far above the error of each type on N(0,1), far below that of a wrong output. Values of f16 are
 * summed up in f16 by ggml, token by token, so that their error grows with the context: 0.02 at 8k
 * tokens, 0.07 at 32k.
 */
static double error_limit(enum ggml_type type, uint64_t ctx)
{
    return type == GGML_TYPE_Q4_0   ? 0.3
           : type == GGML_TYPE_Q8_0 ? 0.1
                                    : fmin(0.1 + 3e-6 * (double)ctx, 0.6);
}

/* Of one layer. */
static double peer_bytes(const bench_case *c, enum ggml_type type)
{
    return (double)c->ctx * c->kv_heads *
           (double)(ggml_row_size(type, c->k_dim) + ggml_row_size(type, c->v_dim));
}

/* ---- ggml's side ---- */

typedef struct peer {
    struct ggml_context *ctx;
    struct ggml_threadpool *pool; /* the caller's */
    struct ggml_cgraph *graph;
    struct ggml_cplan plan;
    struct ggml_tensor **out; /* [n_seqs * n_layers] */
    kvt_allocator memory;
    void **rows; /* [2 * n_seqs * n_layers] K, V */
    size_t k_bytes, v_bytes, n;
    bool by_heads;
} peer;

/* How a cache lies in memory, in bytes from one token or head to the next. */
typedef struct layout {
    bool by_heads;
    size_t row, token, head;
} layout;

static layout layout_of(enum ggml_type type, const bench_case *c, uint32_t dim, bool by_heads)
{
    layout l = {.by_heads = by_heads, .row = ggml_row_size(type, dim)};
    l.token = by_heads ? l.row : l.row * c->kv_heads;
    l.head = by_heads ? l.row * c->ctx : l.row;
    return l;
}

/* The tokens that our layer has. source: those of all layers, [n][width]. */
static void fill(const bench_cache *b, size_t seq, size_t layer, enum ggml_type type, layout l,
                 uint32_t dim, const float *source, char *rows)
{
    size_t n_heads = b->shape.kv_heads, first = 0, at = 0;
    for (size_t t = 0; t < b->ctx; t++) {
        if (t % 512 == 0) {
            first = t;
            at = bench_source_offset(b, seq, layer, first);
        }
        for (size_t h = 0; h < n_heads; h++)
            ggml_quantize_chunk(type, source + ((at + t - first) * n_heads + h) * dim,
                                rows + t * l.token + h * l.head, 0, 1, dim, NULL);
    }
}

static struct ggml_tensor *as_tensor(struct ggml_context *ctx, enum ggml_type type, layout l,
                                     uint32_t dim, const bench_case *c, void *rows)
{
    struct ggml_tensor *t = ggml_new_tensor_3d(ctx, type, dim, (int64_t)c->ctx, c->kv_heads);
    t->nb[1] = l.token;
    t->nb[2] = l.head;
    t->nb[3] = l.row * c->kv_heads * c->ctx;
    t->data = rows;
    return t;
}

static void peer_create(peer *p, bench_cache *b, enum ggml_type type, bool by_heads, const float *q,
                        struct ggml_threadpool *pool)
{
    const bench_case *c = &b->shape;
    layout k = layout_of(type, c, c->k_dim, by_heads), v = layout_of(type, c, c->v_dim, by_heads);
    memset(p, 0, sizeof *p);
    p->n = b->n_seqs * b->n_layers;
    p->pool = pool;
    p->memory = bench_heap_hook(&b->heap);
    p->by_heads = by_heads;
    p->k_bytes = c->ctx * c->kv_heads * k.row;
    p->v_bytes = c->ctx * c->kv_heads * v.row;
    p->rows = bench_alloc(2 * p->n, sizeof *p->rows);
    p->out = bench_alloc(p->n, sizeof *p->out);

    struct ggml_init_params params = {
        p->n * (8 * ggml_tensor_overhead() + sizeof(float) * c->q_heads * c->v_dim) +
            ggml_graph_overhead_custom(4 * p->n + 16, false) + ((size_t)1 << 16),
        NULL, true};
    p->ctx = ggml_init(params);
    if (!p->ctx)
        bench_fail(1, "ggml_init failed");
    struct ggml_tensor *query = ggml_new_tensor_3d(p->ctx, GGML_TYPE_F32, c->k_dim, 1, c->q_heads);
    query->data = (void *)(uintptr_t)q;
    p->graph = ggml_new_graph_custom(p->ctx, 4 * p->n + 16, false);
    for (size_t i = 0; i < p->n; i++) {
        void **kv = p->rows + 2 * i;
        kv[0] = p->memory.alloc(p->memory.user, p->k_bytes, 64);
        kv[1] = p->memory.alloc(p->memory.user, p->v_bytes, 64);
        if (!kv[0] || !kv[1])
            bench_fail(1, "no memory for ggml's cache");
        size_t seq = i / b->n_layers, layer = i % b->n_layers;
        fill(b, seq, layer, type, k, c->k_dim, b->source.k, kv[0]);
        fill(b, seq, layer, type, v, c->v_dim, b->source.v, kv[1]);
        p->out[i] =
            ggml_flash_attn_ext(p->ctx, query, as_tensor(p->ctx, type, k, c->k_dim, c, kv[0]),
                                as_tensor(p->ctx, type, v, c->v_dim, c, kv[1]), NULL,
                                1.0f / sqrtf((float)c->k_dim), 0.0f, 0.0f);
        p->out[i]->data = bench_alloc((size_t)c->q_heads * c->v_dim, sizeof(float));
        ggml_build_forward_expand(p->graph, p->out[i]);
    }
    p->plan = ggml_graph_plan(p->graph, (int)c->threads, pool);
    p->plan.work_data = bench_alloc(p->plan.work_size ? p->plan.work_size : 1, 1);
}

static void peer_destroy(peer *p)
{
    for (size_t i = 0; i < p->n; i++) {
        p->memory.free(p->memory.user, p->rows[2 * i], p->k_bytes);
        p->memory.free(p->memory.user, p->rows[2 * i + 1], p->v_bytes);
        free(p->out[i]->data);
    }
    free(p->plan.work_data);
    free(p->rows);
    free(p->out);
    ggml_free(p->ctx);
}

/* Seconds of a round. The threads are awake before the time begins, and sleep after it. */
static double peer_round(peer *p)
{
    ggml_threadpool_resume(p->pool);
    double start = bench_seconds();
    enum ggml_status status = ggml_graph_compute(p->graph, &p->plan);
    double time = bench_seconds() - start;
    ggml_threadpool_pause(p->pool);
    if (status != GGML_STATUS_SUCCESS)
        bench_fail(1, "ggml_graph_compute failed");
    return time;
}

/* ---- the command ---- */

typedef struct both {
    bench_cache b;
    struct ggml_threadpool *pool;
    float *q, *out;
    bench_reference *reference;
} both;

static double round_of_ours(both *a, bench_mode mode)
{
    double start = bench_seconds();
    for (size_t s = 0; s < a->b.n_seqs; s++)
        for (size_t l = 0; l < a->b.n_layers; l++)
            bench_attend_layer(&a->b, s, l, bench_mode_flags(mode), 1, a->q, a->out);
    return bench_seconds() - start;
}

static double apart_from(const float *x, const float *y, size_t n)
{
    double *wide = bench_alloc(n, sizeof *wide);
    for (size_t i = 0; i < n; i++)
        wide[i] = y[i];
    double error = bench_relative_error(x, wide, n);
    free(wide);
    return error;
}

/* The first and the last layer: ggml's outputs beside exact ones and ours. */
static void check(both *a, peer *p, enum ggml_type type, bench_mode mode, double *error,
                  double *apart)
{
    bench_cache *b = &a->b;
    const bench_case *c = &b->shape;
    size_t n = (size_t)c->q_heads * c->v_dim, places[2] = {0, p->n - 1};
    float *k = bench_alloc((size_t)b->ctx * b->source.k_width, sizeof *k);
    float *v = bench_alloc((size_t)b->ctx * b->source.v_width, sizeof *v);
    double *exact = bench_alloc(n, sizeof *exact);
    *error = *apart = 0.0;
    for (size_t i = 0; i < p->n; i++) /* NaN, so that what is not written is detected */
        memset(p->out[i]->data, 0xff, n * sizeof(float));
    peer_round(p);
    for (int i = 0; i < 2; i++) {
        size_t seq = places[i] / b->n_layers, layer = places[i] % b->n_layers;
        const float *theirs = p->out[places[i]]->data;
        bench_gather_input(b, seq, layer, k, v);
        bench_attend_double(c, a->q, 1, k, v, b->ctx, exact);
        bench_attend_layer(b, seq, layer, bench_mode_flags(mode), 1, a->q, a->out);
        double e = bench_relative_error(theirs, exact, n), d = apart_from(theirs, a->out, n);
        *error = e > *error || isnan(e) ? e : *error;
        *apart = d > *apart || isnan(d) ? d : *apart;
    }
    double limit = error_limit(type, c->ctx),
           ours = c->k_type >= KVT_TYPE_I4 || c->v_type >= KVT_TYPE_I4
                      ? 0.2
                      : 0.05; /* as bench_reference_check */
    if (!(*error < limit) || !(*apart < limit + ours))
        bench_fail(1,
                   "%s/%s beside ggml's %s, %u:%u dims %u:%u ctx %llu: ggml's relative error is "
                   "%.3g (limit %.3g), its distance from ours %.3g (limit %.3g)",
                   bench_type_name(c->k_type), bench_type_name(c->v_type), ggml_type_name(type),
                   c->q_heads, c->kv_heads, c->k_dim, c->v_dim, (unsigned long long)c->ctx, *error,
                   limit, *apart, limit + ours);
    free(exact);
    free(v);
    free(k);
}

static void run_mode(const bench_options *options, both *a, peer *p, enum ggml_type type,
                     bench_mode mode)
{
    const bench_case *c = &a->b.shape;
    bench_record r;
    size_t n = options->runs;
    double calls = (double)p->n, error, error_input, peer_error, apart;
    double least = INFINITY, peer_least = INFINITY;
    double *time = bench_alloc(n, sizeof *time), *peer_time = bench_alloc(n, sizeof *peer_time);
    double *ratio = bench_alloc(n, sizeof *ratio);

    bench_reference_check(a->reference, mode, &error, &error_input);
    check(a, p, type, mode, &peer_error, &apart);
    round_of_ours(a, mode); /* warm up; ggml's check was a round */
    uint64_t preemptions = bench_preemptions();
    for (size_t i = 0; i < n; i++) {
        if (i % 2 == 0)
            time[i] = round_of_ours(a, mode) / calls;
        peer_time[i] = peer_round(p) / calls;
        if (i % 2 == 1)
            time[i] = round_of_ours(a, mode) / calls;
        ratio[i] = peer_time[i] / time[i];
        least = fmin(least, time[i]);
        peer_least = fmin(peer_least, peer_time[i]);
    }
    preemptions = bench_preemptions() - preemptions;

    bench_stats spread = bench_stats_of(ratio, n);
    bench_record_begin(&r, "peer", kvt_cache_isa(a->b.cache), bench_type_name(c->k_type),
                       bench_v_name(c, options->json), c);
    bench_record_text(&r, "mode", bench_mode_name(mode));
    bench_record_text(&r, "peer", "ggml " KVT_BENCH_GGML);
    bench_record_text(&r, "peer_type", ggml_type_name(type));
    bench_record_text(&r, "layout", p->by_heads ? "heads" : "tokens");
    bench_record_integer(&r, "layers", a->b.n_layers);
    bench_record_integer(&r, "sequences", a->b.n_seqs);
    bench_record_number(&r, "ms_median", 1e3 * bench_median(time, n));
    bench_record_number(&r, "peer_ms", 1e3 * bench_median(peer_time, n));
    bench_record_number(&r, "speedup", spread.median);
    bench_record_number(&r, "speedup_p10", spread.p10);
    bench_record_number(&r, "speedup_p90", spread.p90);
    bench_record_number(&r, "speedup_best", peer_least / least);
    bench_record_number(&r, "bytes_ratio", peer_bytes(c, type) / bench_kv_bytes(c, c->ctx));
    bench_record_number(&r, "error_input", error_input);
    bench_record_number(&r, "peer_error", peer_error);
    bench_record_number(&r, "apart", apart);
    bench_record_integer(&r, "pairs", n);
    bench_record_integer(&r, "preemptions", preemptions);
    bench_record_end(&r, options, bench_team_pinned(a->b.team));
    bench_emit(options, &r, columns, N_COLUMNS);
    free(ratio);
    free(peer_time);
    free(time);
}

static int run(const bench_options *options, const bench_case *c)
{
    both a;
    bench_random random;
    size_t n_layers, n_seqs;
    double ours = bench_kv_bytes(c, c->ctx), least = ours, most = 0.0;
    uint64_t set_bytes = options->quick ? 1 << 20 : 4 * options->llc_bytes;

    for (size_t i = 0; i < options->n_peers; i++) {
        enum ggml_type type = type_of(options->peers[i], c->k_type);
        least = fmin(least, peer_bytes(c, type));
        most = fmax(most, peer_bytes(c, type));
    }
    /* The smallest of the caches is to exceed set_bytes. */
    bench_plan_layers(c, c->ctx, (uint64_t)((double)set_bytes * ours / least), options->layers,
                      &n_layers, &n_seqs);
    uint64_t extra = (uint64_t)(most * (double)(n_layers * n_seqs)) + bench_reference_bytes(c);

    /* Before the bench's threads: these are to run where they like, not on the caller's CPU. */
    struct ggml_threadpool_params pool = ggml_threadpool_params_default((int)c->threads);
    pool.paused = true;
    a.pool = ggml_threadpool_new(&pool);
    if (!a.pool)
        bench_fail(1, "ggml_threadpool_new failed");
    bench_cache_create(&a.b, c, n_layers, n_seqs, c->ctx, extra, options->seed);
    bench_cache_fill(&a.b, c->ctx);
    a.q = bench_alloc((size_t)c->q_heads * c->k_dim, sizeof *a.q);
    a.out = bench_alloc((size_t)c->q_heads * c->v_dim, sizeof *a.out);
    bench_random_seed(&random, options->seed + 1);
    bench_random_fill(&random, a.q, (size_t)c->q_heads * c->k_dim);
    a.reference = bench_reference_create(&a.b, a.q, a.out, 1);

    for (size_t i = 0; i < 2 * options->n_peers; i++) {
        peer p;
        enum ggml_type type = type_of(options->peers[i / 2], c->k_type);
        peer_create(&p, &a.b, type, i % 2 == 1, a.q, a.pool);
        for (size_t m = 0; m < options->n_modes; m++)
            run_mode(options, &a, &p, type, options->modes[m]);
        peer_destroy(&p);
    }
    bench_reference_destroy(a.reference);
    free(a.out);
    free(a.q);
    bench_cache_destroy(&a.b);
    ggml_threadpool_free(a.pool);
    return 0;
}

static void check_dims(const bench_options *options)
{
    for (size_t i = 0; i < options->n_peers * options->n_k_types; i++) {
        enum ggml_type type = type_of(options->peers[i / options->n_k_types],
                                      options->k_types[i % options->n_k_types]);
        uint32_t block = (uint32_t)ggml_blck_size(type);
        for (size_t d = 0; d < options->n_dims; d++)
            if (options->dims[d].first % block || options->dims[d].second % block)
                bench_fail(2, "--peer: dims %u:%u: ggml's %s has blocks of %u dims",
                           options->dims[d].first, options->dims[d].second, ggml_type_name(type),
                           block);
    }
}

int bench_ggml(const bench_options *options)
{
    check_dims(options);
    bench_table_begin(options,
                      "decode: attention of one token over ctx tokens, beside ggml " KVT_BENCH_GGML
                      "'s flash attention",
                      columns, N_COLUMNS);
    int result = bench_each_case(options, run);
    bench_note(options,
               "ms of one layer, medians of rounds over all layers: ours a kvt_attend each, ggml's "
               "one graph with a ggml_flash_attn_ext each,\n"
               "built and planned once, without a mask, on its own threads. by: how ggml's cache "
               "lies in memory, by tokens (llama.cpp's way) or\n"
               "by heads. speedup = ggml's time over ours, of rounds that follow each other: "
               "median, p10 and p90 of the pairs, best = fastest\n"
               "round over fastest round. bytes: of ggml's cache over those of K and V. error, "
               "ggml's: relative L2 to attention in double over\n"
               "what went into the caches; apart: ggml's output to ours.\n"
               "%s",
               bench_kv_formula);
    return result;
}
