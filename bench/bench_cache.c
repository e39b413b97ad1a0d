/*
 * Caches filled with random tokens, the bytes of keys and values that they hold, and reference
 * attention over them in double.
 *
 * Tokens are N(0,1), and so are queries: with the scale 1 / sqrt(k_dim) the logits then have a
 * deviation of one. All layers and steps take their tokens from one source of 1024, at different
 * offsets: generating normal numbers costs more than storing them.
 */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { SOURCE_TOKENS = 1024, STEP_TOKENS = 512, MAX_AUTO_LAYERS = 64 };
#define HUGE_SET 2.5e9 /* bytes up to which a cache is enlarged for huge pages */

const char *bench_type_name(kvt_type type)
{
    switch (type) {
    case KVT_TYPE_F32: return "f32";
    case KVT_TYPE_F16: return "f16";
    case KVT_TYPE_I8: return "i8";
    case KVT_TYPE_I4: return "i4";
    case KVT_TYPE_I5: return "i5";
    }
    return "unknown";
}

const char *bench_v_name(const bench_case *c, bool json)
{
    return c->v_in_k && !json ? "in K" : bench_type_name(c->v_type);
}

const char *bench_dtype_name(kvt_dtype dtype)
{
    switch (dtype) {
    case KVT_F32: return "f32";
    case KVT_F16: return "f16";
    case KVT_BF16: return "bf16";
    }
    return "unknown";
}

/* ---- bytes ---- */

const char bench_kv_formula[] =
    "bytes = kv_heads * (K + V) of the live tokens of one layer, no padding, each kv head once:\n"
    "  f32  4 * dim * tokens    f16  2 * dim * tokens\n"
    "  i8   (dim + 2) * tokens: codes and one f16 scale; K also 2 * dim a block of 64 tokens: its "
    "offset\n"
    "  i4   K (dim / 2 + 1) * tokens: codes and gain, and 4 * dim a block: scales and offset; V "
    "(dim / 2 + 2) * tokens\n"
    "  i5   V (5 * dim / 8 + 2) * tokens\n"
    "  --v-in-k: V is K's first dims and counts 0 bytes";

static double side_bytes(kvt_type type, uint32_t dim, uint64_t n_tokens, bool is_k)
{
    double n = (double)n_tokens, blocks = (double)((n_tokens + 63) / 64);
    switch (type) {
    case KVT_TYPE_F32: return 4.0 * dim * n;
    case KVT_TYPE_F16: return 2.0 * dim * n;
    case KVT_TYPE_I8: return (dim + 2.0) * n + (is_k ? 2.0 * dim * blocks : 0.0);
    case KVT_TYPE_I4: return 0.5 * dim * n + (is_k ? n + 4.0 * dim * blocks : 2.0 * n);
    case KVT_TYPE_I5: return (0.625 * dim + 2.0) * n;
    }
    return 0.0;
}

double bench_kv_bytes(const bench_case *c, uint64_t n_tokens)
{
    double v = c->v_in_k ? 0.0 : side_bytes(c->v_type, c->v_dim, n_tokens, false);
    return c->kv_heads * (side_bytes(c->k_type, c->k_dim, n_tokens, true) + v);
}

void bench_plan_layers(const bench_case *c, uint64_t n_tokens, uint64_t bytes, size_t layers,
                       size_t *n_layers, size_t *n_seqs)
{
    double one = bench_kv_bytes(c, n_tokens);
    double need = ceil((double)bytes / one);
    /*
     * With a real model's layers a block of 64 tokens is megabytes, for which the library requests
     * huge pages. So blocks are that large here, unless the measurement would need too much memory.
     */
    double block = one / (double)n_tokens * 64.0, fill = ceil(1.02 * BENCH_HUGE_PAGE / block);
    if (bytes >= 2 * BENCH_HUGE_PAGE && fill > need && fill * one <= HUGE_SET)
        need = fill;
    if (layers == 0)
        layers = need < 1 ? 1 : need > MAX_AUTO_LAYERS ? MAX_AUTO_LAYERS : (size_t)need;
    *n_layers = layers;
    *n_seqs = (size_t)ceil((double)bytes / (one * (double)layers));
    if (*n_seqs == 0)
        *n_seqs = 1;
}

/* ---- the cache ---- */

static void make_source(bench_cache *b)
{
    bench_random_fill(&b->random, b->source.k, b->source.n * b->source.k_width);
    bench_random_fill(&b->random, b->source.v, b->source.n * b->source.v_width);
}

void bench_cache_create(bench_cache *b, const bench_case *c, size_t n_layers, size_t n_seqs,
                        uint64_t n_tokens, uint64_t extra_bytes, uint64_t seed)
{
    char error[256] = "";
    float frequencies[KVT_MAX_DIM / 2];
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();

    memset(b, 0, sizeof *b);
    b->shape = *c;
    b->n_layers = n_layers;
    b->n_seqs = n_seqs;
    b->ctx = n_tokens;

    group.n_layers = (uint32_t)n_layers;
    group.n_q_heads = c->q_heads;
    group.n_kv_heads = c->kv_heads;
    group.k_dim = c->k_dim;
    group.v_dim = c->v_dim;
    group.k_type = c->k_type;
    group.v_type = c->v_type;
    group.flags |= c->v_in_k ? KVT_GROUP_V_IN_K : 0;
    for (uint32_t i = 0; c->rope && i < c->k_dim / 2; i++)
        frequencies[i] = (float)pow(10000.0, -2.0 * i / c->k_dim);
    if (c->rope) {
        group.rope_pairing = KVT_ROPE_HALVES;
        group.rope_dims = c->k_dim;
        group.rope_inverse_frequencies = frequencies;
    }
    group.window_tokens = c->window;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = n_tokens;
    config.n_threads = c->threads;
    config.isa = c->isa;
    config.error_text = error;
    config.error_text_bytes = sizeof error;
    config.allocator = bench_heap_hook(&b->heap);
    b->team = bench_team_create(c->threads);
    config.executor = bench_team_executor(b->team);

    uint64_t forecast;
    kvt_status status = kvt_memory_forecast(&config, n_seqs, n_tokens, &forecast);
    if (status != KVT_OK)
        bench_fail(status == KVT_ERR_LIMIT || status == KVT_ERR_ARG ? 2 : 1, "forecast: %s: %s",
                   kvt_status_string(status), error);
    uint64_t available = bench_available_bytes();
    if (available != UINT64_MAX && forecast + extra_bytes > available / 10 * 9)
        bench_fail(2,
                   "%s/%s %u:%u, dims %u:%u, ctx %llu, %zu layers, %zu sequences need %.1f GiB; "
                   "%.1f GiB are available",
                   bench_type_name(c->k_type), bench_type_name(c->v_type), c->q_heads, c->kv_heads,
                   c->k_dim, c->v_dim, (unsigned long long)n_tokens, n_layers, n_seqs,
                   (double)(forecast + extra_bytes) * 0x1p-30, (double)available * 0x1p-30);

    status = kvt_cache_create(&config, &b->cache);
    if (status != KVT_OK)
        bench_fail(1, "cannot create a cache: %s: %s", kvt_status_string(status), error);
    b->seqs = bench_alloc(n_seqs, sizeof *b->seqs);
    for (size_t i = 0; i < n_seqs; i++)
        bench_require(kvt_seq_create(b->cache, &b->seqs[i]), b->cache, "kvt_seq_create");

    b->source.n = SOURCE_TOKENS;
    b->source.k_width = (size_t)c->kv_heads * c->k_dim;
    b->source.v_width = c->v_in_k ? 0 : (size_t)c->kv_heads * c->v_dim;
    b->source.k = bench_alloc(b->source.n * b->source.k_width, sizeof(float));
    b->source.v = bench_alloc(b->source.n * b->source.v_width, sizeof(float));
    bench_random_seed(&b->random, seed);
    make_source(b);
}

void bench_cache_destroy(bench_cache *b)
{
    for (size_t i = 0; i < b->n_seqs; i++)
        kvt_seq_destroy(b->seqs[i]);
    kvt_cache_destroy(b->cache);
    bench_team_destroy(b->team);
    free(b->seqs);
    free(b->source.k);
    free(b->source.v);
    memset(b, 0, sizeof *b);
}

size_t bench_source_offset(const bench_cache *b, size_t seq, size_t layer, uint64_t first)
{
    uint64_t h = (uint64_t)seq * 1000003u + layer * 10007u + first / STEP_TOKENS * 101u;
    return (size_t)(h % (b->source.n - STEP_TOKENS + 1));
}

void bench_cache_append(const bench_cache *b, size_t seq, size_t layer, size_t source_token)
{
    kvt_tensor k = kvt_tensor_f32(b->source.k + source_token * b->source.k_width);
    kvt_tensor v = kvt_tensor_f32(b->source.v + source_token * b->source.v_width);
    bench_require(kvt_append(b->seqs[seq], (uint32_t)layer, &k, b->shape.v_in_k ? NULL : &v),
                  b->cache, "kvt_append");
}

void bench_cache_fill(bench_cache *b, uint64_t n_tokens)
{
    for (size_t s = 0; s < b->n_seqs; s++) {
        uint64_t first = kvt_seq_length(b->seqs[s]), end = first + n_tokens;
        while (first < end) {
            uint64_t n = end - first < STEP_TOKENS ? end - first : STEP_TOKENS;
            bench_require(kvt_seq_begin(b->seqs[s], n, NULL), b->cache, "kvt_seq_begin");
            for (size_t layer = 0; layer < b->n_layers; layer++) {
                if (b->unique)
                    make_source(b);
                bench_cache_append(b, s, layer, bench_source_offset(b, s, layer, first));
            }
            bench_require(kvt_seq_commit(b->seqs[s], NULL), b->cache, "kvt_seq_commit");
            first += n;
        }
    }
}

/* ---- the reference ---- */

static double dot(const float *a, const float *b, size_t n)
{
    double s[4] = {0, 0, 0, 0};
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (size_t j = 0; j < 4; j++)
            s[j] += (double)a[i + j] * (double)b[i + j];
    for (; i < n; i++)
        s[0] += (double)a[i] * (double)b[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

void bench_attend_double(const bench_case *c, const float *q, size_t n_q, const float *k,
                         const float *v, uint64_t n, double *out)
{
    size_t group = c->q_heads / c->kv_heads, k_dim = c->k_dim, v_dim = c->v_dim;
    size_t v_stride = c->v_in_k ? k_dim : v_dim; /* of kv heads */
    double scale = 1.0 / sqrt((double)k_dim);
    double *p = bench_alloc((size_t)n, sizeof *p);
    for (size_t i = 0; i < n_q; i++) {
        for (size_t h = 0; h < c->q_heads; h++) {
            const float *row = q + (i * c->q_heads + h) * k_dim;
            const float *keys = k + h / group * k_dim,
                        *values = (c->v_in_k ? k : v) + h / group * v_stride;
            double *result = out + (i * c->q_heads + h) * v_dim;
            double largest = -INFINITY, sum = 0.0;
            for (uint64_t t = 0; t < n; t++) {
                p[t] = scale * dot(row, keys + t * c->kv_heads * k_dim, k_dim);
                largest = fmax(largest, p[t]);
            }
            for (size_t d = 0; d < v_dim; d++)
                result[d] = 0.0;
            for (uint64_t t = 0; t < n; t++) {
                double w = exp(p[t] - largest);
                const float *value = values + t * c->kv_heads * v_stride;
                sum += w;
                for (size_t d = 0; d < v_dim; d++)
                    result[d] += w * (double)value[d];
            }
            for (size_t d = 0; d < v_dim; d++)
                result[d] /= sum;
        }
    }
    free(p);
}

double bench_relative_error(const float *a, const double *b, size_t n)
{
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - b[i];
        error += d * d;
        norm += b[i] * b[i];
    }
    return norm > 0.0 ? sqrt(error / norm) : sqrt(error);
}
