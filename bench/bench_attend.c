/*
 * Attend calls of decode and prefill, and the check before timing: a few queries' outputs against
 * attention in double over the cache's contents (kvt_read) and over its input.
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *bench_mode_name(bench_mode mode)
{
    static const char *const names[] = {"near", "f32", "fast"};
    return names[mode];
}

uint32_t bench_mode_flags(bench_mode mode)
{
    return mode == BENCH_F32 ? KVT_ATTEND_F32 : mode == BENCH_FAST ? KVT_ATTEND_FAST : 0;
}

void bench_attend_layer(bench_cache *b, size_t seq, size_t layer, uint32_t flags, size_t n_queries,
                        const float *q, float *out)
{
    kvt_attend_item item;
    kvt_attend_args args = kvt_attend_args_init();
    memset(&item, 0, sizeof item);
    item.seq = b->seqs[seq];
    item.n_queries = n_queries;
    args.layer = (uint32_t)layer;
    args.flags = flags;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    bench_require(kvt_attend(b->cache, &args), b->cache, "kvt_attend");
}

/*
 * The input of one layer, in order. Only this and the reference hold all tokens as f32 at once.
 */
void bench_gather_input(const bench_cache *b, size_t seq, size_t layer, float *k, float *v)
{
    for (uint64_t first = 0; first < b->ctx; first += 512) {
        size_t n = (size_t)(b->ctx - first < 512 ? b->ctx - first : 512);
        size_t at = bench_source_offset(b, seq, layer, first);
        memcpy(k + first * b->source.k_width, b->source.k + at * b->source.k_width,
               n * b->source.k_width * sizeof *k);
        memcpy(v + first * b->source.v_width, b->source.v + at * b->source.v_width,
               n * b->source.v_width * sizeof *v);
    }
}

/* One side, 64 tokens at a time. What a window has released, which no query sees, is left out. */
static void read_side(const bench_cache *b, size_t seq, size_t layer, kvt_side side, uint64_t n,
                      float *x)
{
    size_t width = side == KVT_SIDE_K ? b->source.k_width : b->source.v_width;
    for (uint64_t first = 0; first < n; first += 64) {
        uint64_t count = n - first < 64 ? n - first : 64;
        kvt_tensor t = kvt_tensor_f32(x + first * width);
        kvt_status status = kvt_read(b->seqs[seq], (uint32_t)layer, side, first, count, &t);
        if (status != KVT_ERR_STATE || !b->shape.window || first + b->shape.window > n)
            bench_require(status, b->cache, "kvt_read");
    }
}

void bench_read_layer(const bench_cache *b, size_t seq, size_t layer, uint64_t n, float *k,
                      float *v)
{
    read_side(b, seq, layer, KVT_SIDE_K, n, k);
    if (!b->shape.v_in_k)
        read_side(b, seq, layer, KVT_SIDE_V, n, v);
}

/* The first, the middle and the last query of the first and the last (sequence, layer). */
enum { PLACES = 2, QUERIES = 3 };

struct bench_reference {
    bench_cache *b;
    size_t n_queries, n_out;
    const float *q;
    float *out;
    size_t places, queries, chosen[QUERIES];
    double *cached, *given; /* [places][queries][n_out] */
};

static size_t seq_of(const bench_reference *r, size_t place)
{
    return place ? r->b->n_seqs - 1 : 0;
}

static size_t layer_of(const bench_reference *r, size_t place)
{
    return place ? r->b->n_layers - 1 : 0;
}

/* q row i over the tokens visible to it. */
static void expect(const bench_reference *r, const float *k, const float *v, double *result)
{
    const bench_case *c = &r->b->shape;
    for (size_t i = 0; i < r->queries; i++) {
        size_t query = r->chosen[i], end = (size_t)r->b->ctx - (r->n_queries - 1 - query);
        size_t begin = c->window && c->window < end ? end - c->window : 0;
        bench_attend_double(c, r->q + query * c->q_heads * c->k_dim, 1,
                            k + begin * r->b->source.k_width, v + begin * r->b->source.v_width,
                            end - begin, result + i * r->n_out);
    }
}

uint64_t bench_reference_bytes(const bench_case *c)
{
    return c->ctx * c->kv_heads * (c->k_dim + (c->v_in_k ? 0 : c->v_dim)) * sizeof(float);
}

bench_reference *bench_reference_create(bench_cache *b, const float *q, float *out,
                                        size_t n_queries)
{
    bench_reference *r = bench_alloc(1, sizeof *r);
    r->b = b;
    r->q = q;
    r->out = out;
    r->n_queries = n_queries;
    r->n_out = (size_t)b->shape.q_heads * b->shape.v_dim;
    r->places = b->n_seqs * b->n_layers > 1 ? PLACES : 1;
    r->queries = n_queries < QUERIES ? 1 : QUERIES;
    for (size_t i = 0; i < r->queries; i++)
        r->chosen[i] = r->queries > 1 ? i * (n_queries - 1) / (QUERIES - 1) : n_queries - 1;
    r->cached = bench_alloc(r->places * r->queries * r->n_out, sizeof *r->cached);
    r->given = bench_alloc(r->places * r->queries * r->n_out, sizeof *r->given);
    float *k = bench_alloc((size_t)b->ctx * b->source.k_width, sizeof *k);
    float *v = bench_alloc((size_t)b->ctx * b->source.v_width, sizeof *v);
    for (size_t i = 0; i < r->places; i++) {
        size_t at = i * r->queries * r->n_out;
        bench_read_layer(b, seq_of(r, i), layer_of(r, i), b->ctx, k, v);
        expect(r, k, v, r->cached + at);
        bench_gather_input(b, seq_of(r, i), layer_of(r, i), k, v);
        expect(r, k, v, r->given + at);
    }
    free(v);
    free(k);
    return r;
}

void bench_reference_destroy(bench_reference *r)
{
    free(r->given);
    free(r->cached);
    free(r);
}

/*
 * Limits far above the error of a correct kernel and far below that of a wrong one. Only fast mode
 * adds an error as large as the storage type's own. V in K needs no wider limits, although errors
 * of q do not average out there: docs/numerics.md.
 */
double bench_error_limit(const bench_case *c, bench_mode mode)
{
    bool integer = c->k_type >= KVT_TYPE_I8 || c->v_type >= KVT_TYPE_I8;
    if (!integer || mode == BENCH_F32)
        return 2e-5;
    if (c->k_type >= KVT_TYPE_I4 || c->v_type >= KVT_TYPE_I4)
        return 0.02; /* rows have one digit */
    return mode == BENCH_FAST ? 0.02 : 4e-4;
}

static double worse(double a, double b)
{
    return b > a || isnan(b) ? b : a;
}

void bench_reference_check(bench_reference *r, bench_mode mode, double *error, double *error_input)
{
    const bench_cache *b = r->b;
    const bench_case *c = &b->shape;
    *error = *error_input = 0.0;
    for (size_t place = 0; place < r->places; place++) {
        /* NaN, so that elements that are not written are detected. */
        memset(r->out, 0xff, r->n_queries * r->n_out * sizeof *r->out);
        bench_attend_layer(r->b, seq_of(r, place), layer_of(r, place),
                           bench_mode_flags(mode) | (r->n_queries > 1 ? KVT_ATTEND_CAUSAL : 0),
                           r->n_queries, r->q, r->out);
        for (size_t i = 0; i < r->queries; i++) {
            const float *out = r->out + r->chosen[i] * r->n_out;
            size_t at = (place * r->queries + i) * r->n_out;
            *error = worse(*error, bench_relative_error(out, r->cached + at, r->n_out));
            *error_input = worse(*error_input, bench_relative_error(out, r->given + at, r->n_out));
        }
    }
    double limit = bench_error_limit(c, mode);
    double input_limit = c->k_type >= KVT_TYPE_I4 || c->v_type >= KVT_TYPE_I4 ? 0.2 : 0.05;
    if (!(*error < limit) || !(*error_input < input_limit))
        bench_fail(1,
                   "%s %s %s/%s %u:%u dims %u:%u ctx %llu: wrong output: relative error %.3g "
                   "against the cache's contents (limit %.3g), %.3g against its input (limit %.3g)",
                   kvt_cache_isa(b->cache), bench_mode_name(mode), bench_type_name(c->k_type),
                   bench_v_name(c, false), c->q_heads, c->kv_heads, c->k_dim, c->v_dim,
                   (unsigned long long)b->ctx, *error, limit, *error_input, input_limit);
}
