/*
 * fidelity on captured tensors: what each storage does to attention over the queries, keys and
 * values of a real model.
 *
 * NAME.q.npy, NAME.k.npy and NAME.v.npy are [layer][token][head][dim], K and q after RoPE; q has as
 * many heads as K and V, or a multiple of them (GQA). Two errors are measured for each layer and
 * head:
 *
 *   error  relative L2 of attention's output, over all queries, against attention in double over
 *          the exact K and V. The library's is its own attention, with what its kernels add.
 *   KL     of the attention weights, exact || quantized, the mean over queries, in double from K
 *          as it is stored
 *
 * Causal (the default): tokens come one by one, and query t attends over the cache as it is with
 * tokens 0 .. t: its newest tokens are still open. --full: all queries attend over the cache that
 * has all tokens. As K, V and q are fixed, a layer's figures are what its own storage costs,
 * whatever the other layers have.
 *
 * Every method is measured with everything sealed as soon as its block of 64 tokens is full (the
 * library: KVT_RESIDUAL_NONE), and with a residual window of 64 tokens. The references have with it
 * q8_0 in the first 64 tokens, as the library has i8 there where a side has fewer bits.
 */
#include "bench_formats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {{"layer", NULL, 5},
                                       {"method", NULL, -12},
                                       {"residual", "window", 6},
                                       {"bits", NULL, 6},
                                       {"bits_ctx", "at ctx", 6},
                                       {"error_mean", "error", 9},
                                       {"error_median", "median", 9},
                                       {"error_max", "max", 9},
                                       {"kl_mean", "KL x1e-4", 9},
                                       {"kl_median", "median", 9},
                                       {"kl_max", "max", 9},
                                       {"error_share", "share", 6},
                                       {"kl_share", "KL's", 6},
                                       {"costly_layers", NULL, -32}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0], STEP = 256 };

typedef struct method {
    char name[40], label[56];
    const bench_type_pair *pair; /* the library's, or */
    const bench_format *format;  /* a reference */
    bool window;
    double k_bits, v_bits, k_bits_ctx, v_bits_ctx;
    double *error, *kl, *square; /* [n_layers][q_heads]; square: error's, absolute */
} method;

typedef struct data {
    const bench_options *options;
    bench_npy files[3];
    bench_team *team;
    size_t n_layers, n_q, n, q_heads, kv_heads, k_dim, v_dim;
    bool causal;
    double scale;
    char isa[32];
    size_t *at; /* [n_at] the queries that are evaluated, ascending */
    size_t n_at;
    /* of one layer: q [n_q][q_heads][k_dim], the others [kv_heads][n][dim] */
    float *q, *k, *v;
    double *weights; /* [q_heads][n_at][n] exact */
    double *entropy; /* [q_heads][n_at] sum of weight * ln(weight) */
    double *exact;   /* [q_heads][n_at][v_dim] */
    /* of one layer and method: tokens as they are before and after they are sealed */
    float *open_k, *open_v, *final_k, *final_v; /* [kv_heads][n][dim] */
    float *out;                                 /* [n_at][q_heads][v_dim], the library's */
    double *logits;                             /* [q_heads][n] */
    double *sums;                               /* [q_heads][v_dim] */
    const method *now;
    size_t layer;
} data;

/* ---- input ---- */

static void open_files(data *d, const char *name)
{
    static const char *const suffixes[3] = {".q.npy", ".k.npy", ".v.npy"};
    for (int i = 0; i < 3; i++)
        bench_npy_open(&d->files[i], name, suffixes[i]);
    const size_t *q = d->files[0].shape, *k = d->files[1].shape, *v = d->files[2].shape;
    if (q[0] != k[0] || v[0] != k[0])
        bench_fail(2, "%s: %zu, %zu and %zu layers of q, k and v", name, q[0], k[0], v[0]);
    if (v[1] != k[1])
        bench_fail(2, "%s: %zu tokens of k and %zu of v", name, k[1], v[1]);
    if (d->causal && q[1] != k[1])
        bench_fail(2, "%s: %zu queries for %zu tokens, which --full is for", name, q[1], k[1]);
    if (v[2] != k[2])
        bench_fail(2, "%s: %zu heads of k and %zu of v", name, k[2], v[2]);
    if (q[2] % k[2] != 0)
        bench_fail(2, "%s: %zu heads of q are no multiple of k's %zu", name, q[2], k[2]);
    if (q[3] != k[3])
        bench_fail(2, "%s: q has %zu dims and k %zu", name, q[3], k[3]);
    if (k[3] % 8 || v[3] % 8 || k[3] > KVT_MAX_DIM || v[3] > KVT_MAX_DIM)
        bench_fail(2, "%s: dims %zu and %zu; they are multiples of 8, at most %d", name, k[3], v[3],
                   KVT_MAX_DIM);
    if (q[2] > KVT_MAX_HEADS)
        bench_fail(2, "%s: more than %d heads", name, KVT_MAX_HEADS);
    if (k[1] > KVT_MAX_TOKENS / 2 || q[1] > KVT_MAX_TOKENS / 2)
        bench_fail(2, "%s: more than %d tokens", name, KVT_MAX_TOKENS / 2);
    if (k[0] > KVT_MAX_LAYERS)
        bench_fail(2, "%s: more than %d layers", name, KVT_MAX_LAYERS);
    d->n_layers = k[0];
    d->n_q = q[1];
    d->n = k[1];
    d->q_heads = q[2];
    d->kv_heads = k[2];
    d->k_dim = k[3];
    d->v_dim = v[3];
}

static void allocate(data *d)
{
    size_t limit = (size_t)d->options->queries, kv = d->kv_heads * d->n;
    d->n_at = d->n_q < limit ? d->n_q : limit;
    double bytes = 8.0 * (double)d->q_heads * (double)d->n_at * (double)d->n +
                   16.0 * (double)kv * (double)(d->k_dim + d->v_dim);
    uint64_t available = bench_available_bytes();
    if (available != UINT64_MAX && bytes > 0.9 * (double)available)
        bench_fail(2, "%zu heads, %zu queries and %zu tokens need %.1f GiB; %.1f GiB are available",
                   d->q_heads, d->n_at, d->n, bytes * 0x1p-30, (double)available * 0x1p-30);
    d->at = bench_alloc(d->n_at, sizeof *d->at);
    for (size_t i = 0; i < d->n_at; i++)
        d->at[i] = (size_t)((uint64_t)(i + 1) * d->n_q / d->n_at) - 1;
    d->q = bench_alloc(d->n_q * d->q_heads * d->k_dim, sizeof *d->q);
    d->k = bench_alloc(kv * d->k_dim, sizeof *d->k);
    d->v = bench_alloc(kv * d->v_dim, sizeof *d->v);
    d->weights = bench_alloc(d->q_heads * d->n_at * d->n, sizeof *d->weights);
    d->entropy = bench_alloc(d->q_heads * d->n_at, sizeof *d->entropy);
    d->exact = bench_alloc(d->q_heads * d->n_at * d->v_dim, sizeof *d->exact);
    d->open_k = bench_alloc(kv * d->k_dim, sizeof *d->open_k);
    d->open_v = bench_alloc(kv * d->v_dim, sizeof *d->open_v);
    d->final_k = bench_alloc(kv * d->k_dim, sizeof *d->final_k);
    d->final_v = bench_alloc(kv * d->v_dim, sizeof *d->final_v);
    d->out = bench_alloc(d->n_at * d->q_heads * d->v_dim, sizeof *d->out);
    d->logits = bench_alloc(d->q_heads * d->n, sizeof *d->logits);
    d->sums = bench_alloc(d->q_heads * d->v_dim, sizeof *d->sums);
}

static void release(data *d)
{
    for (int i = 0; i < 3; i++)
        bench_npy_close(&d->files[i]);
    bench_team_destroy(d->team);
    free(d->at);
    free(d->q);
    free(d->k);
    free(d->v);
    free(d->weights);
    free(d->entropy);
    free(d->exact);
    free(d->open_k);
    free(d->open_v);
    free(d->final_k);
    free(d->final_v);
    free(d->out);
    free(d->logits);
    free(d->sums);
}

/* [n][heads][dim] to [heads][n][dim] */
static void by_head(const float *in, float *out, size_t n, size_t heads, size_t dim)
{
    for (size_t t = 0; t < n; t++)
        for (size_t h = 0; h < heads; h++)
            memcpy(out + (h * n + t) * dim, in + (t * heads + h) * dim, dim * sizeof *out);
}

static void load_layer(data *d, size_t layer)
{
    d->layer = layer;
    bench_npy_read(&d->files[0], layer, d->q);
    bench_npy_read(&d->files[1], layer, d->open_k);
    bench_npy_read(&d->files[2], layer, d->open_v);
    by_head(d->open_k, d->k, d->n, d->kv_heads, d->k_dim);
    by_head(d->open_v, d->v, d->n, d->kv_heads, d->v_dim);
}

/* ---- attention in double ---- */

static double dot(const float *a, const float *b, size_t n)
{
    double s[8] = {0};
    for (size_t i = 0; i < n; i += 8) /* dims are multiples of 8 */
        for (size_t j = 0; j < 8; j++)
            s[j] += (double)a[i + j] * (double)b[i + j];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

/* out += w * x */
static void add_row(double *out, double w, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] += w * (double)x[i];
}

/* Tokens that query i sees. */
static size_t tokens_seen(const data *d, size_t i)
{
    return d->causal ? d->at[i] + 1 : d->n;
}

static const float *query(const data *d, size_t i, size_t head)
{
    return d->q + (d->at[i] * d->q_heads + head) * d->k_dim;
}

/* The logits of n tokens; returns ln of the sum of their exp. */
static double logits_of(const data *d, double *logits, const float *q, const float *sealed,
                        size_t n_sealed, const float *open, size_t n)
{
    double largest = -INFINITY, sum = 0.0;
    for (size_t t = 0; t < n; t++) {
        const float *key = (t < n_sealed ? sealed : open) + t * d->k_dim;
        logits[t] = d->scale * dot(q, key, d->k_dim);
        largest = fmax(largest, logits[t]);
    }
    for (size_t t = 0; t < n; t++)
        sum += exp(logits[t] - largest);
    return largest + log(sum);
}

static void exact_heads(void *arg, unsigned worker)
{
    data *d = arg;
    for (size_t h = worker; h < d->q_heads; h += bench_team_threads(d->team)) {
        size_t kv = h / (d->q_heads / d->kv_heads) * d->n;
        for (size_t i = 0; i < d->n_at; i++) {
            size_t n = tokens_seen(d, i), row = h * d->n_at + i;
            double *p = d->weights + row * d->n, *out = d->exact + row * d->v_dim, plogp = 0.0;
            double sum = logits_of(d, p, query(d, i, h), d->k + kv * d->k_dim, n, NULL, n);
            memset(out, 0, d->v_dim * sizeof *out);
            for (size_t t = 0; t < n; t++) {
                double log_p = p[t] - sum;
                p[t] = exp(log_p);
                plogp += p[t] * log_p;
                add_row(out, p[t], d->v + (kv + t) * d->v_dim, d->v_dim);
            }
            d->entropy[row] = plogp;
        }
    }
}

/* How many of n tokens are in their final form. */
static size_t sealed_of(const method *m, size_t n)
{
    if (m->format)
        return bench_format_sealed(m->format, m->window, n);
    n = m->window ? (n < BENCH_BLOCK ? 0 : n - BENCH_BLOCK) : n;
    return n / BENCH_BLOCK * BENCH_BLOCK;
}

static void compare_heads(void *arg, unsigned worker)
{
    data *d = arg;
    const method *m = d->now;
    for (size_t h = worker; h < d->q_heads; h += bench_team_threads(d->team)) {
        size_t kv = h / (d->q_heads / d->kv_heads) * d->n, cell = d->layer * d->q_heads + h;
        double *logits = d->logits + h * d->n, *sums = d->sums + h * d->v_dim;
        double kl = 0.0, error = 0.0, norm = 0.0;
        for (size_t i = 0; i < d->n_at; i++) {
            size_t n = tokens_seen(d, i), row = h * d->n_at + i, sealed = sealed_of(m, n);
            const double *p = d->weights + row * d->n, *exact = d->exact + row * d->v_dim;
            double sum = logits_of(d, logits, query(d, i, h), d->final_k + kv * d->k_dim, sealed,
                                   d->open_k + kv * d->k_dim, n);
            /* sum of p (ln p - ln q), where q's logarithm is logit - sum */
            double cross = 0.0;
            for (size_t t = 0; t < n; t++)
                cross += p[t] * (logits[t] - sum);
            kl += fmax(d->entropy[row] - cross, 0.0) / (double)d->n_at;
            memset(sums, 0, d->v_dim * sizeof *sums);
            for (size_t t = 0; m->format && t < n; t++)
                add_row(sums, exp(logits[t] - sum),
                        (t < sealed ? d->final_v : d->open_v) + (kv + t) * d->v_dim, d->v_dim);
            const float *out = d->out + (i * d->q_heads + h) * d->v_dim;
            for (size_t j = 0; j < d->v_dim; j++) {
                double x = (m->format ? sums[j] : (double)out[j]) - exact[j];
                error += x * x;
                norm += exact[j] * exact[j];
            }
        }
        m->kl[cell] = kl;
        m->error[cell] = norm > 0.0 ? sqrt(error / norm) : sqrt(error);
        m->square[cell] = error;
    }
}

/* ---- a reference ---- */

static void run_format(data *d, const method *m)
{
    size_t k_size = d->n * d->k_dim, v_size = d->n * d->v_dim;
    memcpy(d->open_k, d->k, d->kv_heads * k_size * sizeof *d->k);
    memcpy(d->open_v, d->v, d->kv_heads * v_size * sizeof *d->v);
    memcpy(d->final_k, d->k, d->kv_heads * k_size * sizeof *d->k);
    memcpy(d->final_v, d->v, d->kv_heads * v_size * sizeof *d->v);
    bench_f16_round_trip(d->open_k, d->kv_heads * k_size);
    bench_f16_round_trip(d->open_v, d->kv_heads * v_size);
    for (size_t h = 0; h < d->kv_heads; h++) {
        bench_format_final(m->format, m->window, d->final_k + h * k_size, d->n, d->k_dim, true);
        bench_format_final(m->format, m->window, d->final_v + h * v_size, d->n, d->v_dim, false);
    }
}

/* ---- the library ---- */

static kvt_tensor tensor_by_head(float *x, size_t first, size_t n, size_t dim)
{
    kvt_tensor t = kvt_tensor_f32(x + first * dim);
    t.token_stride = (int64_t)(dim * sizeof *x);
    t.head_stride = (int64_t)(n * dim * sizeof *x);
    return t;
}

static kvt_cache *create_cache(data *d, const method *m)
{
    char error[256] = "";
    kvt_cache *cache = NULL;
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    group.n_layers = 1;
    group.n_q_heads = (uint32_t)d->q_heads;
    group.n_kv_heads = (uint32_t)d->kv_heads;
    group.k_dim = (uint32_t)d->k_dim;
    group.v_dim = (uint32_t)d->v_dim;
    group.k_type = m->pair->k;
    group.v_type = m->pair->v;
    group.residual_tokens = m->window ? BENCH_BLOCK : KVT_RESIDUAL_NONE;
    group.fine_tokens = m->window ? m->pair->fine_tokens : KVT_FINE_NONE;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = d->n;
    config.isa = d->options->isas[0];
    config.n_threads = bench_team_threads(d->team);
    config.executor = bench_team_executor(d->team);
    config.error_text = error;
    config.error_text_bytes = sizeof error;
    kvt_status status = kvt_cache_create(&config, &cache);
    if (status != KVT_OK)
        bench_fail(1, "%s: cannot create a cache: %s: %s", m->name, kvt_status_string(status),
                   error);
    snprintf(d->isa, sizeof d->isa, "%s", kvt_cache_isa(cache));
    return cache;
}

/* The queries from `first` on, n of them, into d->out. */
static void attend(data *d, kvt_cache *cache, kvt_seq *seq, size_t first, size_t n)
{
    kvt_attend_item item;
    kvt_attend_args args = kvt_attend_args_init();
    float *q = bench_alloc(n * d->q_heads * d->k_dim, sizeof *q);
    for (size_t i = 0; i < n; i++)
        memcpy(q + i * d->q_heads * d->k_dim, query(d, first + i, 0),
               d->q_heads * d->k_dim * sizeof *q);
    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.n_queries = n;
    args.items = &item;
    args.n_items = 1;
    args.scale = (float)d->scale;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(d->out + first * d->q_heads * d->v_dim);
    bench_require(kvt_attend(cache, &args), cache, "kvt_attend");
    free(q);
}

/* K of these tokens, as it is now, into x [kv_heads][d->n][k_dim]. */
static void read_keys(const data *d, const kvt_cache *cache, const kvt_seq *seq, float *x,
                      size_t first, size_t n)
{
    kvt_tensor k = tensor_by_head(x, first, d->n, d->k_dim);
    bench_require(kvt_read(seq, 0, KVT_SIDE_K, first, n, &k), cache, "kvt_read");
}

static void run_pair(data *d, const method *m)
{
    kvt_cache *cache = create_cache(d, m);
    kvt_seq *seq = NULL;
    size_t next = 0;
    bench_require(kvt_seq_create(cache, &seq), cache, "kvt_seq_create");
    for (size_t t = 0; t < d->n;) {
        size_t step = d->causal ? 1 : d->n - t < STEP ? d->n - t : STEP;
        kvt_tensor k = tensor_by_head(d->k, t, d->n, d->k_dim);
        kvt_tensor v = tensor_by_head(d->v, t, d->n, d->v_dim);
        bench_require(kvt_seq_begin(seq, step, NULL), cache, "kvt_seq_begin");
        bench_require(kvt_append(seq, 0, &k, &v), cache, "kvt_append");
        bench_require(kvt_seq_commit(seq, NULL), cache, "kvt_seq_commit");
        if (d->causal) {
            read_keys(d, cache, seq, d->open_k, t, 1);
            if (next < d->n_at && d->at[next] == t)
                attend(d, cache, seq, next++, 1);
        }
        t += step;
    }
    read_keys(d, cache, seq, d->final_k, 0, d->n);
    if (!d->causal) {
        read_keys(d, cache, seq, d->open_k, 0, d->n);
        for (size_t i = 0; i < d->n_at; i += STEP)
            attend(d, cache, seq, i, d->n_at - i < STEP ? d->n_at - i : STEP);
    }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* ---- methods ---- */

/* Bits an element of one side, from the bytes of a cache whose other side is i8, and i8's own from
   one whose other side is f16. */
static double type_bits(data *d, kvt_type type, bool is_k)
{
    kvt_type other = type == KVT_TYPE_I8 ? KVT_TYPE_F16 : KVT_TYPE_I8;
    if (type == KVT_TYPE_F16)
        return 16.0;
    bench_type_pair pair = {is_k ? type : other, is_k ? other : type, 0};
    method m = {.name = "bits", .pair = &pair};
    kvt_cache *cache = create_cache(d, &m);
    double bits = 8.0 * kvt_cache_bytes_per_token(cache) / (double)d->kv_heads;
    size_t dim = is_k ? d->k_dim : d->v_dim, other_dim = is_k ? d->v_dim : d->k_dim;
    kvt_cache_destroy(cache);
    return (bits - type_bits(d, other, !is_k) * (double)other_dim) / (double)dim;
}

static void name_method(method *m)
{
    if (m->format)
        snprintf(m->name, sizeof m->name, "%s", m->format->name);
    else
        snprintf(m->name, sizeof m->name, "%s/%s", bench_type_name(m->pair->k),
                 bench_type_name(m->pair->v));
    snprintf(m->label, sizeof m->label, "%s%s%s", m->format ? "" : "kvtile ", m->name,
             m->window ? " +64" : "");
}

static void set_bits(data *d, method *m)
{
    size_t sealed = sealed_of(m, d->n), fine = m->window && m->format ? BENCH_BLOCK : 0;
    double fine_k = 8.5, fine_v = 8.5;
    if (m->format) {
        m->k_bits = m->format->bits(d->k_dim, true);
        m->v_bits = m->format->bits(d->v_dim, false);
    } else {
        fine = m->window ? m->pair->fine_tokens : 0;
        m->k_bits = type_bits(d, m->pair->k, true);
        m->v_bits = type_bits(d, m->pair->v, false);
        fine_k = type_bits(d, KVT_TYPE_I8, true);
        fine_v = type_bits(d, KVT_TYPE_I8, false);
    }
    m->k_bits_ctx = bench_bits_at(m->k_bits, fine_k, fine, sealed, d->n);
    m->v_bits_ctx = bench_bits_at(m->v_bits, fine_v, fine, sealed, d->n);
}

/* The library's pairs and the references, each without a window and with one. */
static method *make_methods(data *d, size_t *n_methods)
{
    const bench_options *o = d->options;
    size_t n = 0, cells = d->n_layers * d->q_heads;
    method *all = bench_alloc(2 * (bench_n_type_pairs + o->n_formats), sizeof *all);
    for (size_t i = 0; i < bench_n_type_pairs + o->n_formats; i++) {
        bool is_pair = i < bench_n_type_pairs;
        for (int window = 0; window < 2; window++) {
            method *m = &all[n];
            if (is_pair)
                m->pair = &bench_type_pairs[i];
            else
                m->format = o->formats[i - bench_n_type_pairs];
            m->window = window;
            name_method(m);
            if (window && (is_pair ? m->pair->k == KVT_TYPE_F16 && m->pair->v == KVT_TYPE_F16
                                   : !strcmp(m->name, "f16")))
                continue; /* the same with a window */
            set_bits(d, m);
            m->error = bench_alloc(cells, sizeof *m->error);
            m->kl = bench_alloc(cells, sizeof *m->kl);
            m->square = bench_alloc(cells, sizeof *m->square);
            n++;
        }
    }
    *n_methods = n;
    return all;
}

/* ---- report ---- */

static double mean_of(const double *x, size_t n)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] / (double)n;
    return sum;
}

static double max_of(const double *x, size_t n)
{
    double largest = x[0];
    for (size_t i = 1; i < n; i++)
        largest = fmax(largest, x[i]);
    return largest;
}

/* A layer's part of the sum over all layers. */
static double share(const data *d, const double *x, size_t layer)
{
    double all = mean_of(x, d->n_layers * d->q_heads) * (double)d->n_layers;
    return all > 0.0 ? mean_of(x + layer * d->q_heads, d->q_heads) / all : NAN;
}

/* The layers with the largest parts of the output's squared error: "3 41%, 0 22%, 7 9%". */
static void name_costly(const data *d, const method *m, char *text, size_t room)
{
    enum { NAMED = 3 };
    size_t named[NAMED], used = 0;
    *text = 0;
    for (size_t k = 0; k < NAMED && k < d->n_layers; k++) {
        size_t best = SIZE_MAX;
        for (size_t l = 0; l < d->n_layers; l++) {
            bool before = false;
            for (size_t j = 0; j < k; j++)
                before = before || named[j] == l;
            if (!before && (best == SIZE_MAX || share(d, m->square, l) > share(d, m->square, best)))
                best = l;
        }
        named[k] = best;
        double part = share(d, m->square, best);
        if (isfinite(part) && used < room)
            used += (size_t)snprintf(text + used, room - used, "%s%zu %.0f%%", k ? ", " : "", best,
                                     100.0 * part);
    }
}

/* layer: d->n_layers for all of them. */
static void report(const data *d, const method *m, size_t layer)
{
    bool all = layer == d->n_layers;
    size_t n = all ? d->n_layers * d->q_heads : d->q_heads, first = all ? 0 : layer * d->q_heads;
    const double *error = m->error + first, *kl = m->kl + first;
    const char *k_name = m->format ? m->name : bench_type_name(m->pair->k);
    const char *v_name = m->format ? m->name : bench_type_name(m->pair->v);
    double k_part = (double)d->k_dim / (double)(d->k_dim + d->v_dim), v_part = 1.0 - k_part;
    double bits_ctx = k_part * m->k_bits_ctx + v_part * m->v_bits_ctx;
    char text[64];
    bench_case shape;
    bench_record r;
    memset(&shape, 0, sizeof shape);
    shape.q_heads = (uint32_t)d->q_heads;
    shape.kv_heads = (uint32_t)d->kv_heads;
    shape.k_dim = (uint32_t)d->k_dim;
    shape.v_dim = (uint32_t)d->v_dim;
    shape.threads = bench_team_threads(d->team);
    shape.ctx = d->n;
    bench_record_begin(&r, "fidelity", m->format ? NULL : d->isa, k_name, v_name, &shape);
    bench_record_no_time(&r, bits_ctx / 8.0 * (double)(d->k_dim + d->v_dim) *
                                 (double)(d->kv_heads * d->n) * (double)(all ? d->n_layers : 1));
    bench_record_text(&r, "data", "qkv");
    bench_record_bool(&r, "causal", d->causal);
    bench_record_number(&r, "scale", d->scale);
    bench_record_integer(&r, "layers", d->n_layers);
    bench_record_integer(&r, "queries", d->n_at);
    snprintf(text, sizeof text, "%zu", layer);
    bench_record_text(&r, "layer", all ? "all" : text);
    bench_record_bool(&r, "reference", m->format != NULL);
    bench_record_text(&r, "method", m->name);
    bench_record_text(&r, "residual", m->window ? "64" : "none");
    bench_record_number(&r, "bits", k_part * m->k_bits + v_part * m->v_bits);
    bench_record_number(&r, "k_bits", m->k_bits);
    bench_record_number(&r, "v_bits", m->v_bits);
    bench_record_number(&r, "bits_ctx", bits_ctx);
    bench_record_number(&r, "error_mean", mean_of(error, n));
    bench_record_number(&r, "error_median", bench_median(error, n));
    bench_record_number(&r, "error_max", max_of(error, n));
    bench_record_number(&r, "kl_mean", 1e4 * mean_of(kl, n)); /* of 1e-4 nats */
    bench_record_number(&r, "kl_median", 1e4 * bench_median(kl, n));
    bench_record_number(&r, "kl_max", 1e4 * max_of(kl, n));
    bench_record_number(&r, "error_share", all ? NAN : share(d, m->square, layer));
    bench_record_number(&r, "kl_share", all ? NAN : share(d, m->kl, layer));
    name_costly(d, m, text, sizeof text);
    bench_record_text(&r, "costly_layers", all && d->n_layers > 1 ? text : NULL);
    bench_record_end(&r, d->options, bench_team_pinned(d->team));
    bench_emit(d->options, &r, columns, N_COLUMNS);
}

static void plot(const data *d, const method *methods, size_t n)
{
    size_t cells = d->n_layers * d->q_heads, shown = 0;
    double k_part = (double)d->k_dim / (double)(d->k_dim + d->v_dim);
    bench_point *weights = bench_alloc(2 * n, sizeof *weights), *outputs = weights + n;
    for (size_t i = 0; i < n; i++) {
        const method *m = &methods[i];
        if (m->k_bits == 16.0 && m->v_bits == 16.0)
            continue; /* f16 would take most of the drawing */
        double bits = k_part * m->k_bits_ctx + (1.0 - k_part) * m->v_bits_ctx;
        weights[shown] =
            (bench_point){m->label, m->k_bits_ctx, mean_of(m->kl, cells), !m->format, !m->window};
        outputs[shown++] =
            (bench_point){m->label, bits, mean_of(m->error, cells), !m->format, !m->window};
    }
    bench_plot plots[2] = {{"KL of the attention weights, mean over heads",
                            "bits an element of K (filled: with a window of 64)", weights, shown},
                           {"error of attention's output, mean over heads",
                            "bits an element of K and V (filled: with a window of 64)", outputs,
                            shown}};
    bench_plot_write(d->options->svg, plots, 2);
    free(weights);
}

int bench_fidelity_qkv(const bench_options *options)
{
    data d;
    size_t n_methods;
    memset(&d, 0, sizeof d);
    d.options = options;
    d.causal = !options->full;
    open_files(&d, options->qkv);
    d.scale = options->scale > 0.0 ? options->scale : 1.0 / sqrt((double)d.k_dim);
    allocate(&d);
    d.team = bench_team_create(options->threads[0]);
    method *methods = make_methods(&d, &n_methods);
    for (size_t layer = 0; layer < d.n_layers; layer++) {
        load_layer(&d, layer);
        bench_team_each(d.team, exact_heads, &d);
        for (size_t i = 0; i < n_methods; i++) {
            if (methods[i].format)
                run_format(&d, &methods[i]);
            else
                run_pair(&d, &methods[i]);
            d.now = &methods[i];
            bench_team_each(d.team, compare_heads, &d);
            bench_progress("layer and format", layer * n_methods + i + 1, d.n_layers * n_methods);
        }
    }
    bench_table_begin(options,
                      "fidelity: attention over a model's own queries, keys and values, against "
                      "double",
                      columns, N_COLUMNS);
    for (size_t i = 0; i < n_methods; i++) {
        report(&d, &methods[i], d.n_layers);
        for (size_t layer = 0; options->per_layer && layer < d.n_layers; layer++)
            report(&d, &methods[i], layer);
    }
    bench_note(options,
               "%zu layers, %zu:%zu heads, %zu tokens, %zu queries, %s. Mean, median and maximum "
               "over the heads%s. error: relative L2 of the\n"
               "output; KL: of the attention weights, exact || quantized, which K alone decides. "
               "window 64: the newest 64 to 127 tokens are f16, and of the\n"
               "references (names without /) the first 64 are q8_0. bits per element with scales; "
               "at ctx: window and first tokens included. costly layers:\n"
               "their share of the output's squared error.",
               d.n_layers, d.q_heads, d.kv_heads, d.n, d.n_at,
               d.causal ? "causal, token by token" : "every query over all tokens",
               d.n_layers > 1 ? " of all layers" : "");
    if (options->svg)
        plot(&d, methods, n_methods);
    for (size_t i = 0; i < n_methods; i++) {
        free(methods[i].error);
        free(methods[i].kl);
        free(methods[i].square);
    }
    free(methods);
    release(&d);
    return 0;
}
