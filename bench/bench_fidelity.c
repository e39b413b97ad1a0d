/*
 * fidelity on random tokens: how far attention over a quantized cache is from attention in
 * double over the exact keys and values, relative L2 over all queries and heads.
 *
 * Keys, values and queries are N(0,1). The harder variants add a constant of 10, 30 or 120 to
 * 4 of 128 channels of every key: large models have such channels. The constant is the same for
 * every token, so exact attention does not change; only the quantization error does.
 *
 *   f32, f16, i8   the library's types, K and V alike
 *   R1             K and V through ggml-style q8_0 and back, attention in f32
 *   R2             the queries through q8_0 as well, as ggml's attention does
 *
 * i8 is measured twice, as its offset depends on the sizes of the appends: "prompt" appends the
 * first half in chunks of 256 and the rest token by token, as in a conversation; "single" appends
 * token by token from the start, where the offset is the mean of the fewest tokens. The types
 * without an offset do not depend on it.
 *
 * error_cache is the error against attention in double over the dequantized cache, that is the
 * kernels' part; error_read is the error of the stored numbers alone.
 */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const bench_column columns[] = {{"isa", NULL, -8},
                                       {"method", NULL, -7},
                                       {"cut", NULL, -7},
                                       {"q_heads", "q", 4},
                                       {"kv_heads", "kv", 4},
                                       {"head_dim", "dim", 4},
                                       {"ctx", NULL, 6},
                                       {"offset", NULL, 6},
                                       {"bits", NULL, 6},
                                       {"error", "error", 10},
                                       {"error_cache", "vs cache", 10},
                                       {"error_read", "stored", 10},
                                       {"vs_r1", "/R1", 7},
                                       {"vs_r2", "/R2", 7},
                                       {"bar", NULL, -24},
                                       {"bar_value", "value", 10},
                                       {"bar_limit", "limit", 7},
                                       {"pass", NULL, -5}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

enum { QUERIES = 16, CHUNK = 256 };

typedef struct method {
    const char *name, *cut, *type_name;
    kvt_type type;
    bool quantize_kv, quantize_q; /* by q8_0, before append */
} method;

static const method methods[] = {
    {"f32", "prompt", "f32", KVT_TYPE_F32, false, false},
    {"f16", "prompt", "f16", KVT_TYPE_F16, false, false},
    {"R1", "prompt", "q8_0", KVT_TYPE_F32, true, false},
    {"R2", "prompt", "q8_0", KVT_TYPE_F32, true, true},
    {"i8", "prompt", "i8", KVT_TYPE_I8, false, false},
    {"i8", "single", "i8", KVT_TYPE_I8, false, false},
};
enum { N_METHODS = sizeof methods / sizeof methods[0] };

typedef struct data {
    size_t n, k_width, v_width;
    float *k, *v, *q; /* [n][kv_heads][dim], q [QUERIES][q_heads][k_dim] */
    double *exact;    /* [QUERIES][q_heads][v_dim] */
} data;

static void make_data(data *d, const bench_case *c, double offset, uint64_t seed)
{
    bench_random random;
    size_t n_q = QUERIES * (size_t)c->q_heads * c->k_dim;
    size_t outliers = c->k_dim / 32;
    d->n = (size_t)c->ctx;
    d->k_width = (size_t)c->kv_heads * c->k_dim;
    d->v_width = (size_t)c->kv_heads * c->v_dim;
    d->k = bench_alloc(d->n * d->k_width, sizeof *d->k);
    d->v = bench_alloc(d->n * d->v_width, sizeof *d->v);
    d->q = bench_alloc(n_q, sizeof *d->q);
    d->exact = bench_alloc(QUERIES * (size_t)c->q_heads * c->v_dim, sizeof *d->exact);
    bench_random_seed(&random, seed);
    bench_random_fill(&random, d->k, d->n * d->k_width);
    bench_random_fill(&random, d->v, d->n * d->v_width);
    bench_random_fill(&random, d->q, n_q);
    if (outliers == 0)
        outliers = 1;
    for (size_t h = 0; h < c->kv_heads; h++) {
        for (size_t i = 0; i < outliers; i++) {
            uint64_t bits = bench_random_bits(&random);
            /* one in each of as many parts of the dims, so that the channels are distinct */
            size_t part = c->k_dim / outliers, at = i * part + (size_t)(bits >> 1) % part;
            float add = (float)(bits & 1 ? offset : -offset);
            for (size_t t = 0; t < d->n; t++)
                d->k[t * d->k_width + h * c->k_dim + at] += add;
        }
    }
    bench_attend_double(c, d->q, QUERIES, d->k, d->v, d->n, d->exact);
}

static void free_data(data *d)
{
    free(d->exact);
    free(d->q);
    free(d->v);
    free(d->k);
}

static void append(kvt_cache *cache, kvt_seq *seq, const data *d, const float *k, const float *v,
                   size_t first, size_t n)
{
    kvt_tensor kt = kvt_tensor_f32(k + first * d->k_width);
    kvt_tensor vt = kvt_tensor_f32(v + first * d->v_width);
    bench_require(kvt_seq_begin(seq, n, NULL), cache, "kvt_seq_begin");
    bench_require(kvt_append(seq, 0, &kt, &vt), cache, "kvt_append");
    bench_require(kvt_seq_commit(seq, NULL), cache, "kvt_seq_commit");
}

typedef struct result {
    double error, error_cache, error_read, bits;
    char isa[32];
} result;

static float *round_trip(const float *x, size_t n)
{
    float *y = bench_alloc(n, sizeof *y);
    bench_q8_0_round_trip(x, y, n);
    return y;
}

static result measure(const method *m, const bench_case *c, const data *d)
{
    result r;
    bench_case shape = *c;
    shape.k_type = shape.v_type = m->type;
    size_t n_q = QUERIES * (size_t)c->q_heads * c->k_dim;
    size_t n_out = QUERIES * (size_t)c->q_heads * c->v_dim;
    float *k = m->quantize_kv ? round_trip(d->k, d->n * d->k_width) : d->k;
    float *v = m->quantize_kv ? round_trip(d->v, d->n * d->v_width) : d->v;
    float *q = m->quantize_q ? round_trip(d->q, n_q) : d->q;
    float *out = bench_alloc(n_out, sizeof *out);

    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    char error[256] = "";
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    group.n_layers = 1;
    group.n_q_heads = c->q_heads;
    group.n_kv_heads = c->kv_heads;
    group.k_dim = c->k_dim;
    group.v_dim = c->v_dim;
    group.k_type = group.v_type = m->type;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = d->n;
    config.isa = c->isa;
    config.error_text = error;
    config.error_text_bytes = sizeof error;
    kvt_status status = kvt_cache_create(&config, &cache);
    if (status != KVT_OK)
        bench_fail(1, "cannot create a cache: %s: %s", kvt_status_string(status), error);
    bench_require(kvt_seq_create(cache, &seq), cache, "kvt_seq_create");

    size_t first = 0, prompt = m->cut[0] == 'p' ? d->n / 2 : 0;
    while (first < d->n) {
        size_t n = first >= prompt ? 1 : prompt - first < CHUNK ? prompt - first : CHUNK;
        append(cache, seq, d, k, v, first, n);
        first += n;
    }

    kvt_attend_item item;
    kvt_attend_args args = kvt_attend_args_init();
    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.n_queries = QUERIES;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    bench_require(kvt_attend(cache, &args), cache, "kvt_attend");
    r.error = bench_relative_error(out, d->exact, n_out);

    float *k_read = bench_alloc(d->n * d->k_width, sizeof *k_read);
    float *v_read = bench_alloc(d->n * d->v_width, sizeof *v_read);
    float *stored = bench_alloc(n_out, sizeof *stored);
    double *expected = bench_alloc(n_out, sizeof *expected);
    kvt_tensor kt = kvt_tensor_f32(k_read), vt = kvt_tensor_f32(v_read);
    bench_require(kvt_read(seq, 0, KVT_SIDE_K, 0, d->n, &kt), cache, "kvt_read");
    bench_require(kvt_read(seq, 0, KVT_SIDE_V, 0, d->n, &vt), cache, "kvt_read");
    bench_attend_double(c, q, QUERIES, k_read, v_read, d->n, expected);
    r.error_cache = bench_relative_error(out, expected, n_out);
    /* from float's rounding of the reference: 6e-8, below every error of a quantized type */
    for (size_t i = 0; i < n_out; i++)
        stored[i] = (float)expected[i];
    r.error_read = bench_relative_error(stored, d->exact, n_out);

    double values = (double)(d->k_width + d->v_width);
    r.bits = m->quantize_kv ? 8.5 : 8.0 * kvt_cache_bytes_per_token(cache) / values;
    snprintf(r.isa, sizeof r.isa, "%s", kvt_cache_isa(cache));
    free(expected);
    free(stored);
    free(v_read);
    free(k_read);
    free(out);
    if (q != d->q)
        free(q);
    if (v != d->v)
        free(v);
    if (k != d->k)
        free(k);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return r;
}

/* The bar of a method on normal data; false when it has none. */
static bool bar_of(const method *m, const result *r, const char **name, double *value,
                   double *limit)
{
    switch (m->type) {
    case KVT_TYPE_F32:
        if (m->quantize_kv)
            return false;
        *name = "error below 1e-6";
        *value = r->error;
        *limit = 1e-6;
        return true;
    case KVT_TYPE_F16:
        *name = "error below 1e-3";
        *value = r->error;
        *limit = 1e-3;
        return true;
    case KVT_TYPE_I8:
        *name = "error over stored error";
        *value = r->error / r->error_read;
        *limit = 1.02;
        return true;
    default: return false;
    }
}

static int run_data(const bench_options *options, const bench_case *c, double offset)
{
    data d;
    result results[N_METHODS];
    size_t r1 = 0, r2 = 0;
    int failed = 0;
    make_data(&d, c, offset, options->seed);
    for (size_t i = 0; i < N_METHODS; i++) {
        results[i] = measure(&methods[i], c, &d);
        if (methods[i].quantize_q)
            r2 = i;
        else if (methods[i].quantize_kv)
            r1 = i;
    }
    for (size_t i = 0; i < N_METHODS; i++) {
        const method *m = &methods[i];
        const result *r = &results[i];
        bench_record record;
        const char *name = NULL;
        double value = NAN, limit = NAN;
        bool has_bar = offset == 0.0 && bar_of(m, r, &name, &value, &limit);
        bool pass = has_bar && value <= limit;
        if (has_bar && !pass)
            failed = 1;
        bench_record_begin(&record, "fidelity", r->isa, m->type_name, m->type_name, c);
        bench_record_no_time(&record,
                             r->bits / 8.0 * (double)(d.k_width + d.v_width) * (double)d.n);
        bench_record_text(&record, "data", "random");
        bench_record_text(&record, "method", m->name);
        bench_record_text(&record, "cut", m->cut);
        bench_record_number(&record, "offset", offset);
        bench_record_number(&record, "bits", r->bits);
        bench_record_number(&record, "error", r->error);
        bench_record_number(&record, "error_cache", r->error_cache);
        bench_record_number(&record, "error_read", r->error_read);
        bench_record_number(&record, "vs_r1", r->error / results[r1].error);
        bench_record_number(&record, "vs_r2", r->error / results[r2].error);
        bench_record_integer(&record, "queries", QUERIES);
        bench_record_text(&record, "bar", name);
        bench_record_number(&record, "bar_value", value);
        bench_record_number(&record, "bar_limit", limit);
        bench_record_text(&record, "pass", has_bar ? (pass ? "yes" : "no") : NULL);
        bench_record_end(&record, options, false);
        bench_emit(options, &record, columns, N_COLUMNS);
    }
    free_data(&d);
    return failed;
}

static int run(const bench_options *options, const bench_case *c)
{
    int failed = 0;
    for (size_t i = 0; i < options->n_offsets; i++)
        failed |= run_data(options, c, options->offsets[i]);
    return failed;
}

int bench_fidelity(const bench_options *options)
{
    if (options->qkv)
        return bench_fidelity_qkv(options);
#if defined(KVT_BENCH_TINYLM)
    if (options->model)
        return bench_fidelity_model(options);
#else
    if (options->model)
        bench_fail(2, "--model: this kvt-bench was built without examples/tinylm");
#endif
    bench_table_begin(options, "fidelity: attention output against double, relative L2", columns,
                      N_COLUMNS);
    int code = bench_each_case(options, run);
    bench_note(
        options,
        "error: against attention in double over the exact keys and values; vs cache: over "
        "the dequantized ones; stored: what\n"
        "the dequantized ones alone are off. offset: added to 4 of 128 channels of every key. "
        "R1: K and V through q8_0; R2: q, too.\n"
        "bits per element with scales and offsets. Bars are for offset 0.");
    return code;
}
