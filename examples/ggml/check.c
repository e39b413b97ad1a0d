/*
 * The adapter beside ggml's own attention, in graphs as an engine builds them.
 *
 * A layer here is what comes before attention in a Llama model: a fused QKV product, of which q, k
 * and v are views, and RoPE. Its attention is computed three times, over caches that are filled
 * from the same graph tensors:
 *
 *   ours    kvt_ggml_attention (kvtile_ggml.h)
 *   flash   ggml_flash_attn_ext over a cache tensor of f16, q8_0 or q4_0
 *   plain   ggml_mul_mat, ggml_soft_max_ext, ggml_mul_mat over a cache tensor of f32
 *
 * Errors are relative L2 to plain. Then: the same bits for any number of threads, for two sequences
 * in one graph, and a graph that fails. Last, the time of one layer's attention for one token, ours
 * and flash in turn on the same threads.
 *
 * usage: check [--quick] [--threads N] [--ctx N]. Exit code: 0 all is as it should be, 1 it is not,
 * 2 the command line is wrong.
 */
#include "kvtile_ggml.h"

#include <ggml-cpu.h>

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LAYERS = 2, EMBD = 64, MAX_TOKENS = 1024 };

static int n_failed;

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    printf("FAILED: %s\n", what);
    n_failed++;
}

static _Noreturn void stop(const char *what, const char *why)
{
    fprintf(stderr, "check: %s: %s\n", what, why);
    exit(1);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* About N(0,1). */
static void fill(float *x, size_t n, uint64_t seed)
{
    uint64_t s = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (int j = 0; j < 4; j++) {
            s = s * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            sum += (float)(s >> 40) * 0x1p-24f - 0.5f;
        }
        x[i] = sum * 1.7320508f;
    }
}

static double error_of(const float *x, const float *exact, size_t n)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)x[i] - (double)exact[i];
        difference += d * d;
        norm += (double)exact[i] * (double)exact[i];
    }
    return sqrt(difference / norm);
}

/* ---- shapes ---- */

typedef struct shape {
    uint32_t n_q_heads, n_kv_heads, dim;
    bool by_heads; /* V head-major */
} shape;

static uint32_t fused_width(const shape *s)
{
    return (s->n_q_heads + 2 * s->n_kv_heads) * s->dim;
}

/* ---- graphs ---- */

static struct ggml_context *new_context(size_t bytes)
{
    struct ggml_init_params p = {bytes, NULL, false};
    struct ggml_context *ctx = ggml_init(p);
    if (!ctx)
        stop("ggml_init", "no memory");
    return ctx;
}

/* A threadpool, and room for what graphs need while they run. */
typedef struct engine {
    struct ggml_threadpool *pool;
    int n_threads;
    uint8_t *work;
    size_t work_bytes;
} engine;

static engine engine_open(int n_threads)
{
    struct ggml_threadpool_params p = ggml_threadpool_params_default(n_threads);
    engine e = {ggml_threadpool_new(&p), n_threads, NULL, 0};
    if (!e.pool)
        stop("ggml_threadpool_new", "it failed");
    return e;
}

static void engine_close(engine *e)
{
    ggml_threadpool_free(e->pool);
    free(e->work);
}

static struct ggml_cplan prepare(engine *e, struct ggml_cgraph *graph)
{
    struct ggml_cplan plan = ggml_graph_plan(graph, e->n_threads, e->pool);
    if (plan.work_size > e->work_bytes) {
        free(e->work);
        e->work = malloc(e->work_bytes = plan.work_size);
        if (!e->work)
            stop("a graph's work data", "no memory");
    }
    plan.work_data = e->work;
    return plan;
}

static void compute(engine *e, struct ggml_cgraph *graph)
{
    struct ggml_cplan plan = prepare(e, graph);
    if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS)
        stop("ggml_graph_compute", "it failed");
}

/* ---- a model's layers up to attention ---- */

typedef struct qkv {
    struct ggml_tensor *q, *k, *v;
} qkv;

/* x [EMBD, n] and positions [n] to q, k after RoPE, and v, a view with strides of its own. */
static qkv project(struct ggml_context *ctx, const shape *s, struct ggml_tensor *w,
                   struct ggml_tensor *x, struct ggml_tensor *positions)
{
    struct ggml_tensor *fused = ggml_mul_mat(ctx, w, x);
    size_t row = s->dim * sizeof(float), k_at = s->n_q_heads * row,
           v_at = k_at + s->n_kv_heads * row;
    int64_t n = x->ne[1];
    qkv r;
    r.q = ggml_view_3d(ctx, fused, s->dim, s->n_q_heads, n, row, fused->nb[1], 0);
    r.k = ggml_view_3d(ctx, fused, s->dim, s->n_kv_heads, n, row, fused->nb[1], k_at);
    r.v = ggml_view_3d(ctx, fused, s->dim, s->n_kv_heads, n, row, fused->nb[1], v_at);
    if (s->by_heads) /* the same numbers, each head's tokens in one run of memory */
        r.v = ggml_permute(ctx, ggml_cont(ctx, ggml_permute(ctx, r.v, 0, 2, 1, 3)), 0, 2, 1, 3);
    r.q = ggml_rope(ctx, ggml_cont(ctx, r.q), positions, (int)s->dim, 0);
    r.k = ggml_rope(ctx, ggml_cont(ctx, r.k), positions, (int)s->dim, 0);
    return r;
}

/* ggml's own cache of a layer: a row of all heads for each token. */
typedef struct store {
    struct ggml_tensor *k, *v;
} store;

static store new_store(struct ggml_context *ctx, const shape *s, enum ggml_type type, int64_t room)
{
    int64_t width = (int64_t)s->n_kv_heads * s->dim;
    return (store){ggml_new_tensor_2d(ctx, type, width, room),
                   ggml_new_tensor_2d(ctx, type, width, room)};
}

static void write_rows(struct ggml_context *ctx, struct ggml_cgraph *graph, struct ggml_tensor *to,
                       struct ggml_tensor *rows, int64_t past)
{
    int64_t n = rows->ne[2];
    struct ggml_tensor *dense = ggml_reshape_2d(ctx, ggml_cont(ctx, rows), to->ne[0], n);
    struct ggml_tensor *place =
        ggml_view_2d(ctx, to, to->ne[0], n, to->nb[1], (size_t)past * to->nb[1]);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, dense, place));
}

/* The first n tokens as [dim, n, heads]. */
static struct ggml_tensor *by_heads(struct ggml_context *ctx, const shape *s,
                                    struct ggml_tensor *rows, int64_t n)
{
    return ggml_view_3d(ctx, rows, s->dim, n, s->n_kv_heads, rows->nb[1],
                        ggml_row_size(rows->type, s->dim), 0);
}

static struct ggml_tensor *flash(struct ggml_context *ctx, const shape *s, const store *cache,
                                 struct ggml_tensor *q, struct ggml_tensor *mask, int64_t n)
{
    return ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), by_heads(ctx, s, cache->k, n),
                               by_heads(ctx, s, cache->v, n), mask, 1.0f / sqrtf((float)s->dim),
                               0.0f, 0.0f);
}

static struct ggml_tensor *plain(struct ggml_context *ctx, const shape *s, const store *cache,
                                 struct ggml_tensor *q, struct ggml_tensor *mask, int64_t n)
{
    struct ggml_tensor *k = by_heads(ctx, s, cache->k, n), *v = by_heads(ctx, s, cache->v, n);
    struct ggml_tensor *logits = ggml_mul_mat(ctx, k, ggml_permute(ctx, q, 0, 2, 1, 3));
    ggml_mul_mat_set_prec(logits, GGML_PREC_F32);
    struct ggml_tensor *weights =
        ggml_soft_max_ext(ctx, logits, mask, 1.0f / sqrtf((float)s->dim), 0.0f);
    struct ggml_tensor *turned = ggml_cont(ctx, ggml_permute(ctx, v, 1, 0, 2, 3));
    struct ggml_tensor *out = ggml_mul_mat(ctx, turned, weights);
    return ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));
}

static struct ggml_tensor *causal_mask(struct ggml_context *ctx, int64_t past, int64_t n)
{
    struct ggml_tensor *mask =
        ggml_new_tensor_2d(ctx, GGML_TYPE_F16, past + n, GGML_PAD(n, 64)); /* as old ggml wants */
    ggml_fp16_t *m = mask->data;
    for (int64_t i = 0; i < mask->ne[1]; i++)
        for (int64_t t = 0; t < past + n; t++)
            m[i * (past + n) + t] = ggml_fp32_to_fp16(t <= past + i ? 0.0f : -INFINITY);
    return mask;
}

/* ---- kvtile's side ---- */

typedef struct ours {
    kvt_cache *cache;
    kvt_ggml *adapter;
    kvt_seq *seqs[2];
} ours;

static ours ours_open(const shape *s, kvt_type k_type, kvt_type v_type, uint32_t n_layers,
                      uint64_t max_tokens)
{
    ours o;
    char why[256] = "";
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    group.n_layers = n_layers;
    group.n_q_heads = s->n_q_heads;
    group.n_kv_heads = s->n_kv_heads;
    group.k_dim = group.v_dim = s->dim;
    group.k_type = k_type;
    group.v_type = v_type;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = max_tokens;
    config.error_text = why;
    config.error_text_bytes = sizeof why;
    if (kvt_cache_create(&config, &o.cache) != KVT_OK)
        stop("kvt_cache_create", why);
    o.adapter = kvt_ggml_create(o.cache, &config);
    if (!o.adapter || kvt_seq_create(o.cache, &o.seqs[0]) || kvt_seq_create(o.cache, &o.seqs[1]))
        stop("kvtile", "no memory");
    return o;
}

static void ours_close(ours *o)
{
    kvt_ggml_destroy(o->adapter);
    kvt_seq_destroy(o->seqs[0]);
    kvt_seq_destroy(o->seqs[1]);
    kvt_cache_destroy(o->cache);
}

static void begin(ours *o, const kvt_ggml_item *items, size_t n)
{
    if (kvt_ggml_begin(o->adapter, items, n, NULL) != KVT_OK)
        stop("kvt_ggml_begin", kvt_ggml_error(o->adapter));
}

static void commit(ours *o)
{
    if (kvt_ggml_commit(o->adapter, NULL) != KVT_OK)
        stop("kvt_ggml_commit", kvt_ggml_error(o->adapter));
}

/* ---- numbers ---- */

/* Weights, and the input of a run of tokens, of which each layer has its own. */
static struct ggml_tensor *weights_of(struct ggml_context *ctx, const shape *s, int layer)
{
    struct ggml_tensor *w = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, EMBD, fused_width(s));
    fill(w->data, (size_t)ggml_nelements(w), 77 + (uint64_t)layer);
    for (int64_t i = 0; i < ggml_nelements(w); i++)
        ((float *)w->data)[i] *= 1.4f / 8; /* 1 / sqrt(EMBD), and logits with some spread */
    return w;
}

static struct ggml_tensor *input_of(struct ggml_context *ctx, int layer, int64_t past, int64_t n)
{
    struct ggml_tensor *x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, EMBD, n);
    for (int64_t i = 0; i < n; i++)
        fill((float *)x->data + i * EMBD, EMBD, (uint64_t)((past + i) * LAYERS + layer + 1));
    return x;
}

static struct ggml_tensor *positions_of(struct ggml_context *ctx, int64_t past, int64_t n)
{
    struct ggml_tensor *p = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    for (int64_t i = 0; i < n; i++)
        ((int32_t *)p->data)[i] = (int32_t)(past + i);
    return p;
}

typedef struct pair {
    const char *name;
    kvt_type k_type, v_type;
    enum ggml_type peer;
    double limit, peer_limit; /* of the errors */
} pair;

static const pair pairs[] = {{"f32", KVT_TYPE_F32, KVT_TYPE_F32, GGML_TYPE_F32, 1e-5, 1e-3},
                             {"f16", KVT_TYPE_F16, KVT_TYPE_F16, GGML_TYPE_F16, 1e-3, 5e-3},
                             {"i8", KVT_TYPE_I8, KVT_TYPE_I8, GGML_TYPE_Q8_0, 2e-2, 2e-2},
                             {"i4", KVT_TYPE_I4, KVT_TYPE_I4, GGML_TYPE_Q4_0, 2e-1, 3e-1},
                             {"i4/i5", KVT_TYPE_I4, KVT_TYPE_I5, GGML_TYPE_Q4_0, 2e-1, 3e-1}};
enum { PAIRS = sizeof pairs / sizeof pairs[0] };

/* A prompt, single tokens, a few at once: the outputs of all layers, one after the other. */
typedef struct outputs {
    float *ours, *flash, *plain;
    size_t n;
} outputs;

static const int64_t steps[] = {450, 1, 1, 1, 1, 7, 1, 64, 1, 1, 33, 1};
enum { STEPS = sizeof steps / sizeof steps[0] };

static int64_t all_tokens(void)
{
    int64_t n = 0;
    for (int i = 0; i < STEPS; i++)
        n += steps[i];
    return n;
}

/* peer GGML_TYPE_COUNT: ours alone. */
static void run_steps(engine *e, const shape *s, ours *o, enum ggml_type peer, outputs *out)
{
    struct ggml_context *fixed = new_context((size_t)64 << 20);
    struct ggml_tensor *w[LAYERS];
    store theirs[LAYERS], exact[LAYERS];
    bool alone = peer == GGML_TYPE_COUNT;
    for (int l = 0; l < LAYERS; l++) {
        w[l] = weights_of(fixed, s, l);
        if (!alone)
            theirs[l] = new_store(fixed, s, peer, MAX_TOKENS);
        exact[l] = new_store(fixed, s, GGML_TYPE_F32, MAX_TOKENS);
    }
    int64_t past = 0;
    out->n = 0;
    for (int i = 0; i < STEPS; i++) {
        int64_t n = steps[i];
        struct ggml_context *ctx = new_context((size_t)64 << 20);
        struct ggml_cgraph *graph = ggml_new_graph(ctx);
        struct ggml_tensor *mask = causal_mask(ctx, past, n), *all[LAYERS][3];
        struct ggml_tensor *positions = positions_of(ctx, past, n);
        for (int l = 0; l < LAYERS; l++) {
            qkv r = project(ctx, s, w[l], input_of(ctx, l, past, n), positions);
            all[l][0] = kvt_ggml_attention(o->adapter, ctx, (uint32_t)l, r.q, r.k, r.v, NULL);
            ggml_build_forward_expand(graph, all[l][0]);
            if (alone)
                continue;
            write_rows(ctx, graph, theirs[l].k, r.k, past);
            write_rows(ctx, graph, theirs[l].v, r.v, past);
            write_rows(ctx, graph, exact[l].k, r.k, past);
            write_rows(ctx, graph, exact[l].v, r.v, past);
            all[l][1] = flash(ctx, s, &theirs[l], r.q, mask, past + n);
            all[l][2] = plain(ctx, s, &exact[l], r.q, mask, past + n);
            ggml_build_forward_expand(graph, all[l][1]);
            ggml_build_forward_expand(graph, all[l][2]);
        }
        kvt_ggml_item item = {o->seqs[0], (uint64_t)n};
        begin(o, &item, 1);
        compute(e, graph);
        commit(o);
        for (int l = 0; l < LAYERS; l++) {
            size_t count = (size_t)ggml_nelements(all[l][0]);
            memcpy(out->ours + out->n, all[l][0]->data, count * sizeof(float));
            if (!alone) {
                memcpy(out->flash + out->n, all[l][1]->data, count * sizeof(float));
                memcpy(out->plain + out->n, all[l][2]->data, count * sizeof(float));
            }
            out->n += count;
        }
        past += n;
        ggml_free(ctx);
    }
    ggml_free(fixed);
}

static outputs new_outputs(const shape *s)
{
    size_t n = (size_t)all_tokens() * LAYERS * s->n_q_heads * s->dim;
    outputs o = {calloc(n, 4), calloc(n, 4), calloc(n, 4), 0};
    if (!o.ours || !o.flash || !o.plain)
        stop("outputs", "no memory");
    return o;
}

static void free_outputs(outputs *o)
{
    free(o->ours);
    free(o->flash);
    free(o->plain);
}

static void check_numbers(const shape *s, int n_threads)
{
    engine e = engine_open(n_threads), one = engine_open(1);
    outputs out = new_outputs(s), again = new_outputs(s);
    printf("%u:%u heads of %u dims, %lld tokens in %d steps, %d threads\n", s->n_q_heads,
           s->n_kv_heads, s->dim, (long long)all_tokens(), STEPS, n_threads);
    printf("  %-6s %-5s %12s %12s %13s\n", "ours", "flash", "ours-plain", "flash-plain",
           "ours-flash");
    for (int i = 0; i < PAIRS; i++) {
        const pair *p = &pairs[i];
        ours o = ours_open(s, p->k_type, p->v_type, LAYERS, MAX_TOKENS);
        run_steps(&e, s, &o, p->peer, &out);
        double ours_error = error_of(out.ours, out.plain, out.n);
        double flash_error = error_of(out.flash, out.plain, out.n);
        double apart = error_of(out.ours, out.flash, out.n);
        printf("  %-6s %-5s %12.3g %12.3g %13.3g\n", p->name, ggml_type_name(p->peer), ours_error,
               flash_error, apart);
        require(ours_error < p->limit, "ours is not what plain ggml operators give");
        require(flash_error < p->peer_limit, "flash attention is not what plain operators give");
        require(apart < p->limit + p->peer_limit, "ours is not what flash attention gives");
        require(kvt_seq_length(o.seqs[0]) == (uint64_t)all_tokens(), "tokens are missing");
        ours_close(&o);

        o = ours_open(s, p->k_type, p->v_type, LAYERS, MAX_TOKENS);
        run_steps(&one, s, &o, GGML_TYPE_COUNT, &again);
        require(memcmp(out.ours, again.ours, out.n * sizeof(float)) == 0,
                "one thread gives other bits");
        ours_close(&o);
    }
    free_outputs(&again);
    free_outputs(&out);
    engine_close(&one);
    engine_close(&e);
}

/* ---- several sequences, reused graphs, failures ---- */

/* A graph of n tokens: its input can be written again and again. */
typedef struct layered {
    struct ggml_context *ctx;
    struct ggml_cgraph *graph;
    struct ggml_tensor *x, *positions, *out[LAYERS];
} layered;

static layered new_graph_with(const shape *s, ours *o, int64_t n, const kvt_ggml_options *options)
{
    layered g;
    g.ctx = new_context((size_t)16 << 20);
    g.graph = ggml_new_graph(g.ctx);
    g.x = ggml_new_tensor_2d(g.ctx, GGML_TYPE_F32, EMBD, n);
    g.positions = positions_of(g.ctx, 0, n);
    for (int l = 0; l < LAYERS; l++) {
        qkv r = project(g.ctx, s, weights_of(g.ctx, s, l), g.x, g.positions);
        g.out[l] = kvt_ggml_attention(o->adapter, g.ctx, (uint32_t)l, r.q, r.k, r.v, options);
        ggml_build_forward_expand(g.graph, g.out[l]);
    }
    return g;
}

static layered new_graph(const shape *s, ours *o, int64_t n)
{
    return new_graph_with(s, o, n, NULL);
}

static void set_token(layered *g, int64_t i, int32_t position, uint64_t seed)
{
    fill((float *)g->x->data + i * EMBD, EMBD, seed);
    ((int32_t *)g->positions->data)[i] = position;
}

static const float *row_of(const layered *g, int layer, int64_t token)
{
    const struct ggml_tensor *t = g->out[layer];
    return (const float *)((const char *)t->data + (size_t)token * t->nb[2]);
}

static void check_batch(const shape *s, int n_threads, int32_t n_steps)
{
    engine e = engine_open(n_threads);
    ours together = ours_open(s, KVT_TYPE_I8, KVT_TYPE_I8, LAYERS, MAX_TOKENS);
    ours apart = ours_open(s, KVT_TYPE_I8, KVT_TYPE_I8, LAYERS, MAX_TOKENS);
    layered both = new_graph(s, &together, 3), first = new_graph(s, &apart, 1),
            second = new_graph(s, &apart, 2);
    size_t bytes = s->n_q_heads * s->dim * sizeof(float);
    bool same = true;
    for (int32_t step = 0; step < n_steps; step++) {
        uint64_t seed = 1000 + 3 * (uint64_t)step;
        kvt_ggml_item items[2] = {{together.seqs[0], 1}, {together.seqs[1], 2}};
        kvt_ggml_item one = {apart.seqs[0], 1}, two = {apart.seqs[1], 2};
        set_token(&both, 0, step, seed);
        set_token(&first, 0, step, seed);
        for (int i = 0; i < 2; i++) {
            set_token(&both, 1 + i, 2 * step + i, seed + 1 + (uint64_t)i);
            set_token(&second, i, 2 * step + i, seed + 1 + (uint64_t)i);
        }
        begin(&together, items, 2);
        compute(&e, both.graph);
        commit(&together);
        begin(&apart, &one, 1);
        compute(&e, first.graph);
        commit(&apart);
        begin(&apart, &two, 1);
        compute(&e, second.graph);
        commit(&apart);
        for (int l = 0; l < LAYERS; l++)
            same = same && !memcmp(row_of(&both, l, 0), row_of(&first, l, 0), bytes) &&
                   !memcmp(row_of(&both, l, 1), row_of(&second, l, 0), 2 * bytes);
    }
    require(same, "two sequences in one graph give other bits than alone");
    require(kvt_seq_length(together.seqs[0]) == (uint64_t)n_steps &&
                kvt_seq_length(together.seqs[1]) == 2 * (uint64_t)n_steps,
            "tokens of a batch are missing");
    printf("two sequences in one graph, computed %d times: %s\n", n_steps,
           same ? "the bits of each alone" : "other bits");
    ggml_free(both.ctx);
    ggml_free(first.ctx);
    ggml_free(second.ctx);
    ours_close(&apart);
    ours_close(&together);
    engine_close(&e);
}

/*
 * What README.md shows, word for word: a layer's attention in a graph, and a step of two sequences
 * on ggml's CPU backend. The outputs are those of the same graph computed without a backend.
 */
static void check_backend(const shape *s, int n_threads)
{
    engine e = engine_open(n_threads);
    ours o[2] = {ours_open(s, KVT_TYPE_I8, KVT_TYPE_I8, 1, MAX_TOKENS),
                 ours_open(s, KVT_TYPE_I8, KVT_TYPE_I8, 1, MAX_TOKENS)};
    ggml_backend_t backend = ggml_backend_cpu_init();
    int64_t n_first = 2, n_second = 3, n_tokens = n_first + n_second;
    int64_t v_dim = s->dim, n_q_heads = s->n_q_heads;
    int32_t token_ids[] = {11, 12, 21, 22, 23}, ids[3] = {0};
    struct ggml_tensor *out[2];
    struct ggml_context *both[2];
    if (!backend)
        stop("ggml_backend_cpu_init", "it failed");
    ggml_backend_cpu_set_n_threads(backend, n_threads);
    for (int i = 0; i < 2; i++) {
        kvt_ggml *adapter = o[i].adapter;
        kvt_seq *first = o[i].seqs[0], *second = o[i].seqs[1];
        struct ggml_context *ctx = both[i] = new_context((size_t)16 << 20);
        struct ggml_cgraph *graph = ggml_new_graph(ctx);
        uint32_t layer = 0;
        qkv r = project(ctx, s, weights_of(ctx, s, 0), input_of(ctx, 0, 0, n_tokens),
                        positions_of(ctx, 0, n_tokens));
        struct ggml_tensor *q = r.q, *k = r.k, *v = r.v, *cur;

        cur = kvt_ggml_attention(adapter, ctx, layer, q, k, v, NULL);
        cur = ggml_reshape_2d(ctx, cur, v_dim * n_q_heads, n_tokens);

        out[i] = ggml_scale(ctx, cur, 2.0f); /* as an output product would read it */
        ggml_build_forward_expand(graph, out[i]);
        if (i == 0) {
            kvt_ggml_item items[] = {{first, (uint64_t)n_first}, {second, (uint64_t)n_second}};
            begin(&o[i], items, 2);
            compute(&e, graph);
            commit(&o[i]);
            continue;
        }
        kvt_status status;

        kvt_ggml_item items[] = {{first, (uint64_t)n_first}, {second, (uint64_t)n_second}};
        status = kvt_ggml_begin(adapter, items, 2, NULL);
        if (status == KVT_OK && ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            kvt_ggml_abort(adapter); /* interrupted */
            status = KVT_ERR_CANCELLED;
        } else if (status == KVT_OK) {
            status = kvt_ggml_commit(adapter, token_ids);
        }

        require(status == KVT_OK && kvt_seq_length(first) == 2, "a step on the CPU backend");
        require(kvt_seq_token_ids(second, 0, 3, ids) == KVT_OK && ids[0] == 21 && ids[2] == 23,
                "token ids of the second sequence");
    }
    require(isfinite(((float *)out[0]->data)[0]) &&
                memcmp(out[0]->data, out[1]->data, ggml_nbytes(out[0])) == 0,
            "the CPU backend gives other bits");
    for (int i = 0; i < 2; i++) {
        ggml_free(both[i]);
        ours_close(&o[i]);
    }
    ggml_backend_free(backend);
    engine_close(&e);
}

/* Options are of the graph that was built with them, whatever is built later. */
static void check_options(const shape *s, int n_threads)
{
    engine e = engine_open(n_threads);
    ours both = ours_open(s, KVT_TYPE_I8, KVT_TYPE_I8, LAYERS, MAX_TOKENS);
    ours alone = ours_open(s, KVT_TYPE_I8, KVT_TYPE_I8, LAYERS, MAX_TOKENS);
    kvt_ggml_options soft = {.softcap = 0.01f, .scale = 2.0f};
    layered first = new_graph_with(s, &both, 3, &soft), later = new_graph(s, &both, 3);
    layered other = new_graph_with(s, &alone, 3, &soft);
    size_t bytes = 3 * s->n_q_heads * s->dim * sizeof(float);
    bool same = true, differ = false;
    soft.softcap = 0; /* copied */
    for (int turn = 0; turn < 2; turn++) {
        kvt_ggml_item mine = {both.seqs[turn], 3}, theirs = {alone.seqs[turn], 3};
        for (int i = 0; i < 3; i++) {
            set_token(&first, i, i, 500 + (uint64_t)i);
            set_token(&later, i, i, 500 + (uint64_t)i);
            set_token(&other, i, i, 500 + (uint64_t)i);
        }
        begin(&both, &mine, 1);
        compute(&e, turn ? later.graph : first.graph);
        commit(&both);
        begin(&alone, &theirs, 1);
        compute(&e, other.graph);
        commit(&alone);
        for (int l = 0; l < LAYERS; l++) {
            const float *made = row_of(turn ? &later : &first, l, 0);
            bool equal = memcmp(made, row_of(&other, l, 0), bytes) == 0;
            same = same && (turn || equal);
            differ = differ || (turn && !equal);
        }
    }
    require(same, "a graph has the options of one that was built later");
    require(differ, "softcap and scale do nothing");
    require(kvt_ggml_begin(both.adapter, NULL, 0, NULL) == KVT_ERR_ARG &&
                strstr(kvt_ggml_error(both.adapter), "no items"),
            "a begin of nothing");
    kvt_ggml_item none = {NULL, 1}, one = {both.seqs[0], 1};
    require(kvt_ggml_begin(both.adapter, &none, 1, NULL) == KVT_ERR_ARG &&
                strstr(kvt_ggml_error(both.adapter), "no sequence"),
            "a begin without a sequence");
    begin(&both, &one, 1);
    require(kvt_ggml_begin(both.adapter, &one, 1, NULL) == KVT_ERR_STATE &&
                strstr(kvt_ggml_error(both.adapter), "pending"),
            "a second begin");
    kvt_ggml_abort(both.adapter);
    ggml_free(first.ctx);
    ggml_free(later.ctx);
    ggml_free(other.ctx);
    ours_close(&both);
    ours_close(&alone);
    engine_close(&e);
}

static void check_failures(const shape *s, int n_threads)
{
    engine e = engine_open(n_threads);
    ours o = ours_open(s, KVT_TYPE_I8, KVT_TYPE_I8, LAYERS, MAX_TOKENS);
    layered g = new_graph(s, &o, 1);
    kvt_ggml_item item = {o.seqs[0], 1};
    int32_t wrong = -7;

    set_token(&g, 0, 0, 5);
    compute(&e, g.graph); /* no step */
    require(isnan(row_of(&g, 0, 0)[0]), "a graph without a step gives numbers");
    require(kvt_ggml_commit(o.adapter, NULL) == KVT_ERR_STATE, "a commit without a step");

    begin(&o, &item, 1);
    require(kvt_ggml_begin(o.adapter, &item, 1, NULL) == KVT_ERR_STATE, "two steps at once");
    require(kvt_ggml_commit(o.adapter, NULL) == KVT_ERR_STATE, "a commit without the graph");
    require(kvt_seq_pending(o.seqs[0]) == 0, "the step is still pending");

    begin(&o, &item, 1);
    ((float *)g.x->data)[3] = NAN;
    compute(&e, g.graph);
    require(isnan(row_of(&g, 1, 0)[0]), "the last layer has numbers after a failure in the first");
    require(kvt_ggml_commit(o.adapter, NULL) == KVT_ERR_VALUE, "a key that is no number");
    printf("a key that is no number: %s\n", kvt_ggml_error(o.adapter));
    require(kvt_seq_length(o.seqs[0]) == 0, "a failed step has left tokens");

    set_token(&g, 0, 0, 5);
    begin(&o, &item, 1);
    compute(&e, g.graph);
    require(kvt_ggml_commit(o.adapter, &wrong) == KVT_ERR_ARG, "token id -7");
    begin(&o, &item, 1);
    compute(&e, g.graph);
    require(kvt_ggml_commit(o.adapter, NULL) == KVT_OK && kvt_seq_length(o.seqs[0]) == 1,
            "no step after failures");
    require(isfinite(row_of(&g, 1, 0)[0]), "no output after failures");

    kvt_ggml_item two = {o.seqs[0], 2}, both[2] = {{o.seqs[0], 1}, {o.seqs[0], 1}};
    begin(&o, &two, 1);
    compute(&e, g.graph);
    require(kvt_ggml_commit(o.adapter, NULL) == KVT_ERR_ARG, "a graph of another size");
    require(kvt_ggml_begin(o.adapter, both, 2, NULL) == KVT_ERR_STATE &&
                kvt_seq_pending(o.seqs[0]) == 0,
            "a sequence twice");
    ggml_free(g.ctx);
    ours_close(&o);
    engine_close(&e);
}

/* ---- time ---- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Attention of one token over ctx tokens in one layer; each graph is built and planned once. */
static void time_pair(engine *e, const shape *s, const pair *p, int64_t ctx_tokens, int runs)
{
    size_t width = (size_t)s->n_kv_heads * s->dim, q_width = (size_t)s->n_q_heads * s->dim;
    size_t row = ggml_row_size(p->peer, (int64_t)width);
    struct ggml_context *ctx = new_context(((size_t)1 << 20) + 2 * row * (size_t)ctx_tokens);
    store theirs = new_store(ctx, s, p->peer, ctx_tokens);
    ours o = ours_open(s, p->k_type, p->v_type, 1, (uint64_t)ctx_tokens);
    float *k = malloc(width * sizeof *k), *v = malloc(width * sizeof *v);
    double *ratio = calloc((size_t)runs, sizeof *ratio), *mine = calloc((size_t)runs, sizeof *mine);
    if (!k || !v || !ratio || !mine)
        stop("time", "no memory");
    struct ggml_tensor *q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s->dim, s->n_q_heads, 1);
    fill(q->data, q_width, 3);
    for (int64_t t = 0; t < ctx_tokens; t++) {
        kvt_tensor tk = kvt_tensor_f32(k), tv = kvt_tensor_f32(v);
        fill(k, width, 2 * (uint64_t)t + 10);
        fill(v, width, 2 * (uint64_t)t + 11);
        if (kvt_seq_begin(o.seqs[0], 1, NULL) || kvt_append(o.seqs[0], 0, &tk, &tv) ||
            kvt_seq_commit(o.seqs[0], NULL))
            stop("time", "an append failed");
        char *to[2] = {(char *)theirs.k->data + (size_t)t * row,
                       (char *)theirs.v->data + (size_t)t * row};
        ggml_quantize_chunk(p->peer, k, to[0], 0, 1, (int64_t)width, NULL);
        ggml_quantize_chunk(p->peer, v, to[1], 0, 1, (int64_t)width, NULL);
    }
    /* The last token again, pending: attention over it can be computed as often as we like. */
    kvt_ggml_item item = {o.seqs[0], 1};
    kvt_tensor tk = kvt_tensor_f32(k), tv = kvt_tensor_f32(v);
    kvt_seq_truncate(o.seqs[0], (uint64_t)ctx_tokens - 1);
    begin(&o, &item, 1);
    if (kvt_append(o.seqs[0], 0, &tk, &tv))
        stop("time", "an append failed");

    struct ggml_cgraph *graphs[2] = {ggml_new_graph(ctx), ggml_new_graph(ctx)};
    struct ggml_tensor *out[2] = {
        kvt_ggml_attention(o.adapter, ctx, 0, q, NULL, NULL, NULL),
        flash(ctx, s, &theirs, ggml_reshape_3d(ctx, q, s->dim, s->n_q_heads, 1), NULL, ctx_tokens)};
    struct ggml_cplan plans[2];
    for (int i = 0; i < 2; i++)
        ggml_build_forward_expand(graphs[i], out[i]);
    for (int i = 0; i < 2; i++)
        prepare(e, graphs[i]); /* the larger of the two work buffers */
    for (int i = 0; i < 2; i++)
        plans[i] = prepare(e, graphs[i]);
    for (int i = -1; i < runs; i++) { /* the first is to warm up */
        double t[2];
        for (int j = 0; j < 2; j++) {
            int which = i % 2 == 0 ? j : 1 - j;
            double start = seconds();
            if (ggml_graph_compute(graphs[which], &plans[which]) != GGML_STATUS_SUCCESS)
                stop("ggml_graph_compute", "it failed");
            t[which] = seconds() - start;
        }
        if (i >= 0) {
            ratio[i] = t[1] / t[0];
            mine[i] = t[0];
        }
    }
    double apart = error_of(out[0]->data, out[1]->data, q_width);
    qsort(ratio, (size_t)runs, sizeof *ratio, by_value);
    qsort(mine, (size_t)runs, sizeof *mine, by_value);
    printf("  %-6s %-5s %10.3f %8.2f %6.2f %6.2f %12.3g\n", p->name, ggml_type_name(p->peer),
           1e3 * mine[runs / 2], ratio[runs / 2], ratio[runs / 10], ratio[runs - 1 - runs / 10],
           apart);
    require(apart < p->limit + p->peer_limit + 0.1, "timed outputs differ");
    free(mine);
    free(ratio);
    free(v);
    free(k);
    ours_close(&o);
    ggml_free(ctx);
}

static void time_all(const shape *s, int n_threads, int64_t ctx_tokens, int runs)
{
    engine e = engine_open(n_threads);
    printf("one token's attention over %lld tokens, %u:%u heads of %u dims, %d threads:\n",
           (long long)ctx_tokens, s->n_q_heads, s->n_kv_heads, s->dim, n_threads);
    printf("  %-6s %-5s %10s %8s %6s %6s %12s\n", "ours", "flash", "ours ms", "speedup", "p10",
           "p90", "apart");
    for (int i = 1; i < PAIRS; i++)
        time_pair(&e, s, &pairs[i], ctx_tokens, runs);
    engine_close(&e);
}

static long number(const char *text, long least, long most)
{
    char *end = NULL;
    long n = text ? strtol(text, &end, 10) : 0;
    if (!text || end == text || *end || n < least || n > most) {
        fprintf(stderr, "check: %s is not a number from %ld to %ld\n", text ? text : "nothing",
                least, most);
        exit(2);
    }
    return n;
}

int main(int argc, char **argv)
{
    static const shape shapes[] = {
        {8, 2, 64, true}, {4, 4, 128, false}, {7, 1, 64, false}, {32, 8, 128, false}};
    int n_threads = 2;
    int64_t ctx_tokens = 8192;
    bool quick = false;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            quick = true;
        else if (!strcmp(argv[i], "--threads"))
            n_threads = (int)number(argv[++i], 1, 256);
        else if (!strcmp(argv[i], "--ctx"))
            ctx_tokens = number(argv[++i], 64, 1 << 20);
        else {
            fprintf(stderr, "usage: check [--quick] [--threads N] [--ctx N]\n");
            return 2;
        }
    }
    /* ggml's threads spin at the barrier behind each node: slow where other programs run too. */
    bool less = quick && n_threads > 1;
    for (int i = 0; i < (less ? 1 : 3); i++)
        check_numbers(&shapes[i], n_threads);
    check_batch(&shapes[0], n_threads, less ? 20 : 100);
    check_backend(&shapes[0], n_threads);
    check_options(&shapes[0], n_threads);
    check_failures(&shapes[0], n_threads);
    time_all(&shapes[3], n_threads, quick ? 512 : ctx_tokens, quick ? 3 : 21);
    printf("%s\n", n_failed ? "FAILED" : "all as it should be");
    return n_failed ? 1 : 0;
}
