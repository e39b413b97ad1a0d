/*
 * fidelity on a real model (tinylm): how the next-token distributions change when the cache is
 * not f32.
 *
 * Texts go through the model once with an f32 cache, the reference, and once with each of the
 * others. Compared are every token's prediction: KL(reference || other), the perplexity, the most
 * likely token, and the answers to questions whose facts were stated earlier.
 *
 *   f16, i8   the library's types
 *   R1        K and V through ggml-style q8_0 and back, attention in f32
 *   R2        the queries through q8_0 as well, as ggml's attention does
 *
 * and with --formats also the library's other pairs of types, K/V, and reference formats
 * (bench_formats.h) as they are, and with a window: the newest 64 to 127 tokens f16, the first 64
 * q8_0, attention in f32. Their rows change when they leave the window, so that they run token by
 * token.
 *
 * The key-bias variants add a constant to a few channels of every key, 30 and 120 times the
 * channel's own deviation, after RoPE: the keys of Llama and Qwen look like that. The constant's
 * product with the query is the same for all tokens, so it cancels in the softmax and the exact
 * output stays; the f32 rows of these variants show how far it does in f32. All variants are
 * compared with the one reference, without a bias.
 *
 * i8 depends on the sizes of the appends: "prompt" is the first half in chunks of 256 and the rest
 * token by token, "single" all of it token by token. The others do not, and run in chunks of 256
 * throughout.
 *
 * A standard error is over texts, whose tokens are not independent of each other; that of a
 * quotient of two methods, which err on the same texts, is the jackknife's (one text left out). The
 * mean KL is dominated by the few predictions that are nearly tied, so with 48 stories the quotient
 * i8 / R1 still has an error of about a tenth; its geometric mean over texts has half of that.
 */
#include "bench_formats.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tinylm.h"

static const bench_column columns[] = {{"key_bias", "bias", 5},
                                       {"method", NULL, -11},
                                       {"cut", NULL, -7},
                                       {"residual", "window", 6},
                                       {"bits_ctx", "bits", 5},
                                       {"kl", "KL x1e-4", 10},
                                       {"kl_se", "+-", 9},
                                       {"kl_p99", "p99", 9},
                                       {"perplexity", "ppl", 7},
                                       {"perplexity_change", "change %", 9},
                                       {"same_top", "top-1 %", 8},
                                       {"recall", "recall %", 9},
                                       {"recall_1", "<128", 5},
                                       {"recall_128", "<512", 5},
                                       {"recall_512", "<1024", 5},
                                       {"recall_1024", "more", 5},
                                       {"kl_vs_r1", "KL/R1", 9},
                                       {"kl_vs_r1_se", "+-", 8},
                                       {"kl_vs_r2", "KL/R2", 9},
                                       {"kl_vs_r2_se", "+-", 8},
                                       {"kl_vs_r1_typical", "typical/R1", 10},
                                       {"kl_vs_bar", "of bar's", 8},
                                       {"bar", NULL, -14},
                                       {"pass", NULL, -5}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

enum { CHUNK = 256, BIASED_OF_64 = 4 };
/* Stories from here on are never trained on. */
#define HELD_OUT ((uint64_t)1 << 40)

/* ---- stores: one that passes everything on to another, and changes or looks at it ---- */

typedef struct filter {
    tl_kv inner;
    const tl_config *config;
    bool quantize_kv, quantize_q;
    double *sum, *sum2; /* [n_layers][kv_dim] of K; NULL: not collected */
    size_t seen;        /* tokens of layer 0 */
    float *a, *b;       /* [CHUNK][dim] */
    /* A reference format, with a window or without; NULL: none. */
    const bench_format *format;
    bool window;
    kvt_seq *seq; /* the inner store's, which is f32 */
    size_t max_tokens, length, pending, sealed;
    float *k, *v; /* [n_layers][max_tokens][kv_dim]: sealed tokens as they are, others exact */
    int32_t *ids; /* [max_tokens] */
} filter;

static int filter_begin(void *self, size_t n)
{
    filter *f = self;
    f->pending = n;
    return f->inner.ops->begin(f->inner.self, n);
}

/* Tokens from `first` on that are still open, as f16. */
static int append_open(filter *f, uint32_t layer, size_t first, size_t n)
{
    size_t width = f->config->kv_dim, at = ((size_t)layer * f->max_tokens + first) * width;
    memcpy(f->a, f->k + at, n * width * sizeof *f->a);
    memcpy(f->b, f->v + at, n * width * sizeof *f->b);
    bench_f16_round_trip(f->a, n * width);
    bench_f16_round_trip(f->b, n * width);
    return f->inner.ops->append(f->inner.self, layer, f->a, f->b, n);
}

/* Tokens first .. first + n - 1 of a layer's K or V, one kv head after the other, to the format. */
static void seal(filter *f, float *x, size_t first, size_t n, bool is_k)
{
    size_t width = f->config->kv_dim, dim = f->config->head_dim;
    float *head = bench_alloc(n * dim, sizeof *head);
    for (size_t h = 0; h < width; h += dim) {
        for (size_t t = 0; t < n; t++)
            memcpy(head + t * dim, x + (first + t) * width + h, dim * sizeof *head);
        size_t fine = first == 0 && f->window ? BENCH_BLOCK : 0;
        if (fine)
            bench_format_find("q8_0")->apply(head, BENCH_BLOCK, dim, is_k);
        if (n > fine)
            f->format->apply(head + fine * dim, n - fine, dim, is_k);
        for (size_t t = 0; t < n; t++)
            memcpy(x + (first + t) * width + h, head + t * dim, dim * sizeof *head);
    }
    free(head);
}

/* Blocks that have left the window take their final form: the store is cut back to the first of
   them, and they and the open tokens are appended again. */
static int filter_seal(filter *f)
{
    size_t sealed = bench_format_sealed(f->format, f->window, f->length), first = f->sealed;
    size_t width = f->config->kv_dim, n = f->length - first;
    if (sealed == first)
        return 0;
    if (n > CHUNK)
        bench_fail(1, "a step of more than one token");
    bench_require(kvt_seq_truncate(f->seq, first), NULL, "kvt_seq_truncate");
    if (f->inner.ops->begin(f->inner.self, n))
        return -1;
    for (uint32_t layer = 0; layer < f->config->n_layers; layer++) {
        float *k = f->k + (size_t)layer * f->max_tokens * width;
        float *v = f->v + (size_t)layer * f->max_tokens * width;
        seal(f, k, first, sealed - first, true);
        seal(f, v, first, sealed - first, false);
        /* The sealed ones as they are, in f32. */
        size_t open = f->length - sealed;
        memcpy(f->a, k + first * width, n * width * sizeof *f->a);
        memcpy(f->b, v + first * width, n * width * sizeof *f->b);
        bench_f16_round_trip(f->a + (n - open) * width, open * width);
        bench_f16_round_trip(f->b + (n - open) * width, open * width);
        if (f->inner.ops->append(f->inner.self, layer, f->a, f->b, n))
            return -1;
    }
    f->sealed = sealed;
    return f->inner.ops->commit(f->inner.self, f->ids + first, n);
}

/* q8_0 blocks never span heads where the head dim is a multiple of 32; else they do, as in ggml. */
static int filter_append(void *self, uint32_t layer, const float *k, const float *v, size_t n)
{
    filter *f = self;
    size_t width = f->config->kv_dim;
    if (f->sum) {
        for (size_t i = 0; i < n * width; i++) {
            f->sum[layer * width + i % width] += (double)k[i];
            f->sum2[layer * width + i % width] += (double)k[i] * (double)k[i];
        }
        f->seen += layer == 0 ? n : 0;
    }
    if (f->format) {
        size_t at = ((size_t)layer * f->max_tokens + f->length) * width;
        memcpy(f->k + at, k, n * width * sizeof *k);
        memcpy(f->v + at, v, n * width * sizeof *v);
        return append_open(f, layer, f->length, n);
    }
    if (f->quantize_kv) {
        for (size_t i = 0; i < n; i++) {
            bench_q8_0_round_trip(k + i * width, f->a + i * width, width);
            bench_q8_0_round_trip(v + i * width, f->b + i * width, width);
        }
        k = f->a;
        v = f->b;
    }
    return f->inner.ops->append(f->inner.self, layer, k, v, n);
}

static int filter_attend(void *self, uint32_t layer, const float *q, float *out, size_t n)
{
    filter *f = self;
    if (f->quantize_q) {
        size_t dim = f->config->head_dim;
        for (size_t i = 0; i < n * f->config->n_heads; i++)
            bench_q8_0_round_trip(q + i * dim, f->a + i * dim, dim);
        q = f->a;
    }
    return f->inner.ops->attend(f->inner.self, layer, q, out, n);
}

static int filter_commit(void *self, const int32_t *tokens, size_t n)
{
    filter *f = self;
    int status = f->inner.ops->commit(f->inner.self, tokens, n);
    if (status || !f->format)
        return status;
    if (n != f->pending)
        bench_fail(1, "a step was kept in part");
    memcpy(f->ids + f->length, tokens, n * sizeof *tokens);
    f->length += n;
    return filter_seal(f);
}

static int filter_clear(void *self)
{
    filter *f = self;
    f->length = f->sealed = 0;
    return f->inner.ops->clear(f->inner.self);
}

static const char *filter_error(void *self)
{
    filter *f = self;
    return f->inner.ops->error(f->inner.self);
}

static const tl_kv_ops filter_ops = {filter_begin,  filter_append, filter_attend,
                                     filter_commit, filter_clear,  filter_error};

/* ---- methods ---- */

typedef struct method {
    char name[24];
    const char *cut, *k_name, *v_name;
    kvt_type k_type, v_type;
    bool quantize_kv, quantize_q;
    const bench_format *format; /* a reference */
    bool window;                /* of it: newest and first tokens finer */
    uint32_t fine_tokens;       /* as in bench_type_pair */
} method;

enum { M_F32, M_F16, M_R1, M_R2, M_I8, M_I8_SINGLE, N_METHODS };
static const method base_methods[N_METHODS] = {
    {"f32", "256", "f32", "f32", KVT_TYPE_F32, KVT_TYPE_F32, false, false, NULL, false, 0},
    {"f16", "256", "f16", "f16", KVT_TYPE_F16, KVT_TYPE_F16, false, false, NULL, false, 0},
    {"R1", "256", "q8_0", "q8_0", KVT_TYPE_F32, KVT_TYPE_F32, true, false, NULL, false, 0},
    {"R2", "256", "q8_0", "q8_0", KVT_TYPE_F32, KVT_TYPE_F32, true, true, NULL, false, 0},
    {"i8", "prompt", "i8", "i8", KVT_TYPE_I8, KVT_TYPE_I8, false, false, NULL, false, 0},
    {"i8", "single", "i8", "i8", KVT_TYPE_I8, KVT_TYPE_I8, false, false, NULL, false, 0},
};

static bool is_i8(const method *m)
{
    return m->k_type == KVT_TYPE_I8 && m->v_type == KVT_TYPE_I8;
}

static bool is_i4(const method *m)
{
    return m->k_type == KVT_TYPE_I4 && m->v_type == KVT_TYPE_I4;
}

/* References of 4 bits that one of i4's bars is about, where all of them run. */
static const char *const fours[] = {"q4_0", "q4_0-rot", "exl3-4", "turboquant4"};
enum { N_FOURS = sizeof fours / sizeof fours[0] };

/* The methods that always run, and those of --formats. */
static method *make_methods(const bench_options *o, size_t *n_methods)
{
    size_t n = N_METHODS;
    method *m = bench_alloc(n + bench_n_type_pairs + 2 * o->n_formats, sizeof *m);
    memcpy(m, base_methods, sizeof base_methods);
    for (size_t i = 0; o->n_formats > 0 && i < bench_n_type_pairs; i++) {
        const bench_type_pair *p = &bench_type_pairs[i];
        if (p->k == p->v && (p->k == KVT_TYPE_F16 || p->k == KVT_TYPE_I8))
            continue;
        m[n].k_name = bench_type_name(p->k);
        m[n].v_name = bench_type_name(p->v);
        snprintf(m[n].name, sizeof m[n].name, "%s/%s", m[n].k_name, m[n].v_name);
        m[n].cut = "single";
        m[n].k_type = p->k;
        m[n].v_type = p->v;
        m[n++].fine_tokens = p->fine_tokens;
    }
    for (size_t i = 0; i < 2 * o->n_formats; i++) {
        const bench_format *f = o->formats[i / 2];
        if (!strcmp(f->name, "f16"))
            continue; /* the library's own is there */
        m[n].window = i % 2 == 0;
        snprintf(m[n].name, sizeof m[n].name, "%s", f->name);
        /* Without a window, and by rows, a token's form does not depend on those to come. */
        m[n].cut = m[n].window || f->blocks ? "single" : "256";
        m[n].k_name = m[n].v_name = f->name;
        m[n].k_type = m[n].v_type = KVT_TYPE_F32;
        m[n++].format = f;
    }
    *n_methods = n;
    return m;
}

/* One method on one variant: a session over its own cache, and its results by text. */
typedef struct subject {
    const method *method;
    double bias;
    tl_kvtile kvtile;
    filter filter;
    tl_session session;
    double *kl, *nll, *tokens; /* [n_texts] sums */
    double *each_kl;           /* [n_each] of every prediction */
    size_t n_each;
    double same_top, hits[TL_BINS];
} subject;

typedef struct setup {
    const bench_options *options;
    tl_model model;
    tl_tokenizer *tokenizer;
    tl_work *work;
    tl_text *texts;
    size_t n_texts, max_tokens, vocab, n_methods;
    double asked[TL_BINS]; /* questions in all texts, by distance */
    float **bias;          /* [n_offsets][n_layers][kv_dim] */
    float *reference;      /* [max_tokens][vocab] logits */
    double *reference_sum; /* [max_tokens] ln of the sum of their exp */
    int32_t *reference_top;
    float *logits; /* [CHUNK][vocab] */
    int32_t *top;  /* [max_tokens] */
} setup;

static void require(int status, const tl_error *err)
{
    if (status)
        bench_fail(1, "%s", err->text);
}

static void open_subject(setup *s, subject *x, const method *m, double bias, const float *values)
{
    tl_error err;
    x->method = m;
    x->bias = bias;
    tl_kv_settings settings = {.k_type = m->k_type, .v_type = m->v_type};
    require(tl_kvtile_open(&x->kvtile, &s->model, &settings, s->work, &err), &err);
    x->filter.inner = tl_kvtile_store(&x->kvtile);
    x->filter.config = &s->model.config;
    x->filter.quantize_kv = m->quantize_kv;
    x->filter.quantize_q = m->quantize_q;
    x->filter.a = bench_alloc((size_t)CHUNK * s->model.config.dim, sizeof(float));
    x->filter.b = bench_alloc((size_t)CHUNK * s->model.config.dim, sizeof(float));
    if (m->format) {
        size_t size = (size_t)s->model.config.n_layers * s->max_tokens * s->model.config.kv_dim;
        x->filter.format = m->format;
        x->filter.window = m->window;
        x->filter.seq = x->kvtile.seq;
        x->filter.max_tokens = s->max_tokens;
        x->filter.k = bench_alloc(size, sizeof(float));
        x->filter.v = bench_alloc(size, sizeof(float));
        x->filter.ids = bench_alloc(s->max_tokens, sizeof *x->filter.ids);
    }
    tl_kv kv = {&filter_ops, &x->filter};
    require(tl_session_open(&x->session, &s->model, kv, s->work, CHUNK, &err), &err);
    x->session.key_bias = values;
    x->each_kl = bench_alloc(s->n_texts * s->max_tokens, sizeof *x->each_kl);
    x->kl = bench_alloc(s->n_texts, sizeof *x->kl);
    x->nll = bench_alloc(s->n_texts, sizeof *x->nll);
    x->tokens = bench_alloc(s->n_texts, sizeof *x->tokens);
}

static void close_subject(subject *x)
{
    tl_session_close(&x->session);
    tl_kvtile_close(&x->kvtile);
    free(x->filter.a);
    free(x->filter.b);
    free(x->filter.k);
    free(x->filter.v);
    free(x->filter.ids);
    free(x->each_kl);
    free(x->kl);
    free(x->nll);
    free(x->tokens);
}

/* ---- one text through one subject ---- */

static double log_sum(const float *x, size_t n, int32_t *top)
{
    size_t best = 0;
    double sum = 0.0;
    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    for (size_t i = 0; i < n; i++)
        sum += exp((double)x[i] - (double)x[best]);
    *top = (int32_t)best;
    return (double)x[best] + log(sum);
}

static double divergence(const float *p, double p_sum, const float *q, double q_sum, size_t n)
{
    double kl = 0.0;
    for (size_t i = 0; i < n; i++) {
        double lp = (double)p[i] - p_sum, lq = (double)q[i] - q_sum;
        kl += exp(lp) * (lp - lq);
    }
    return kl;
}

/* By the distance from the stated value to the answer. */
static size_t bin_of(const tl_recall *r)
{
    size_t bin = 0;
    while (bin + 1 < TL_BINS && r->begin - r->value >= tl_bin_first[bin + 1])
        bin++;
    return bin;
}

static void run_text(setup *s, subject *x, size_t text, bool is_reference)
{
    const tl_text *t = &s->texts[text];
    size_t n = t->n_tokens - 1; /* the last token is predicted, never fed */
    size_t prompt = x->method->cut[0] == '2' ? n : x->method->cut[0] == 'p' ? n / 2 : 0;
    tl_error err;
    if (filter_clear(&x->filter))
        bench_fail(1, "clear: %s", filter_error(&x->filter));
    x->session.position = 0;
    for (size_t at = 0, m; at < n; at += m) {
        m = at >= prompt ? 1 : prompt - at < CHUNK ? prompt - at : CHUNK;
        float *logits = is_reference ? s->reference + at * s->vocab : s->logits;
        require(tl_forward(&x->session, t->tokens + at, m, logits, m, &err), &err);
        for (size_t i = 0; i < m; i++) {
            const float *row = logits + i * s->vocab;
            double sum = log_sum(row, s->vocab, &s->top[at + i]);
            if (is_reference) {
                s->reference_sum[at + i] = sum;
                s->reference_top[at + i] = s->top[at + i];
            } else {
                double kl = divergence(s->reference + (at + i) * s->vocab, s->reference_sum[at + i],
                                       row, sum, s->vocab);
                x->kl[text] += kl;
                x->each_kl[x->n_each++] = kl;
            }
            x->nll[text] += sum - (double)row[t->tokens[at + i + 1]];
            x->same_top += s->top[at + i] == s->reference_top[at + i];
        }
    }
    x->tokens[text] = (double)n;
    for (size_t i = 0; i < t->n_recalls; i++) {
        bool hit = true;
        for (size_t j = t->recalls[i].begin; j < t->recalls[i].end; j++)
            hit = hit && s->top[j - 1] == t->tokens[j];
        x->hits[bin_of(&t->recalls[i])] += hit;
    }
}

/* ---- statistics over texts ---- */

static double sum_of(const double *x, size_t n)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += x[i];
    return sum;
}

/* sum(a) / sum(b) and its jackknife standard error. */
static double quotient(const double *a, const double *b, size_t n, double *error)
{
    double sa = sum_of(a, n), sb = sum_of(b, n), mean = 0.0, squares = 0.0;
    *error = NAN;
    if (n > 1) {
        for (size_t i = 0; i < n; i++)
            mean += (sa - a[i]) / (sb - b[i]) / (double)n;
        for (size_t i = 0; i < n; i++) {
            double d = (sa - a[i]) / (sb - b[i]) - mean;
            squares += d * d;
        }
        *error = sqrt(squares * (double)(n - 1) / (double)n);
    }
    return sa / sb;
}

/*
 * exp of the mean over texts of ln(a / b), and its standard error. The mean KL is dominated by few
 * predictions that flip; this compares the two on a typical text.
 */
static double typical_quotient(const double *a, const double *b, size_t n, double *error)
{
    double mean = 0.0, squares = 0.0;
    *error = NAN;
    for (size_t i = 0; i < n; i++)
        mean += log(a[i] / b[i]) / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (log(a[i] / b[i]) - mean) * (log(a[i] / b[i]) - mean);
    if (n > 1)
        *error = exp(mean) * sqrt(squares / (double)(n - 1) / (double)n);
    return exp(mean);
}

/* ---- texts and biases ---- */

static void load_texts(setup *s)
{
    const bench_options *o = s->options;
    tl_error err;
    if (!o->text) {
        s->n_texts = o->stories;
        s->texts = bench_alloc(s->n_texts, sizeof *s->texts);
        for (size_t i = 0; i < s->n_texts; i++)
            require(tl_text_story(&s->texts[i], s->tokenizer, HELD_OUT + o->seed * 100000 + i,
                                  s->max_tokens, &err),
                    &err);
    } else {
        uint8_t *bytes;
        int32_t *tokens;
        size_t n_bytes, n_tokens;
        require(tl_read_file(o->text, &bytes, &n_bytes, &err), &err);
        require(tl_encode(s->tokenizer, (const char *)bytes, n_bytes, true, &tokens, NULL,
                          &n_tokens, &err),
                &err);
        free(bytes);
        /* Pieces of a full context, each an independent text; a short rest is dropped. */
        size_t pieces = (n_tokens + s->max_tokens - 1) / s->max_tokens;
        if (pieces > o->stories)
            pieces = o->stories;
        s->texts = bench_alloc(pieces, sizeof *s->texts);
        for (size_t i = 0; i < pieces; i++) {
            size_t n = n_tokens - i * s->max_tokens;
            n = n < s->max_tokens ? n : s->max_tokens;
            if (i > 0 && n < s->max_tokens / 2)
                break;
            s->texts[i].tokens = bench_alloc(n, sizeof *tokens);
            memcpy(s->texts[i].tokens, tokens + i * s->max_tokens, n * sizeof *tokens);
            s->texts[i].n_tokens = n;
            s->n_texts++;
        }
        free(tokens);
    }
    for (size_t i = 0; i < s->n_texts; i++) {
        if (s->texts[i].n_tokens < 2)
            bench_fail(1, "text %zu has no two tokens", i);
        for (size_t j = 0; j < s->texts[i].n_recalls; j++)
            s->asked[bin_of(&s->texts[i].recalls[j])] += 1.0;
    }
}

/*
 * For each offset a bias for every layer and channel: on a few channels of every head the offset
 * times the channel's deviation over the first texts, either sign; else zero.
 */
static void make_biases(setup *s)
{
    const tl_config *c = &s->model.config;
    size_t n = (size_t)c->n_layers * c->kv_dim;
    size_t few = c->head_dim * BIASED_OF_64 / 64;
    subject x;
    memset(&x, 0, sizeof x);
    open_subject(s, &x, &base_methods[M_F32], 0.0, NULL);
    x.filter.sum = bench_alloc(n, sizeof *x.filter.sum);
    x.filter.sum2 = bench_alloc(n, sizeof *x.filter.sum2);
    for (size_t i = 0; i < s->n_texts && i < 2; i++)
        run_text(s, &x, i, true);

    if (few == 0)
        few = 1;
    s->bias = bench_alloc(s->options->n_offsets, sizeof *s->bias);
    for (size_t v = 0; v < s->options->n_offsets; v++) {
        bench_random random;
        bench_random_seed(&random, s->options->seed + 3); /* the same channels in all variants */
        s->bias[v] = bench_alloc(n, sizeof *s->bias[v]);
        for (size_t head = 0; head < n; head += c->head_dim) {
            for (size_t i = 0; i < few; i++) {
                uint64_t bits = bench_random_bits(&random);
                size_t part = c->head_dim / few, at = head + i * part + (size_t)(bits >> 1) % part;
                double mean = x.filter.sum[at] / (double)x.filter.seen;
                double square = x.filter.sum2[at] / (double)x.filter.seen - mean * mean;
                double value = s->options->offsets[v] * sqrt(fmax(square, 0.0));
                s->bias[v][at] = (float)(bits & 1 ? value : -value);
            }
        }
    }
    free(x.filter.sum2);
    free(x.filter.sum);
    close_subject(&x);
}

/* ---- report ---- */

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts x. */
static double percentile(double *x, size_t n, double part)
{
    if (n == 0)
        return NAN;
    qsort(x, n, sizeof *x, compare);
    return x[(size_t)(part * (double)(n - 1))];
}

/* An element's bits; *at_ctx: in a text of full length, with the window and the first tokens. */
static double bits_of(const setup *s, const subject *x, double *at_ctx)
{
    const method *m = x->method;
    const tl_config *c = &s->model.config;
    double bits =
        kvt_cache_bytes_per_token(x->kvtile.cache) * 8.0 / (2.0 * c->kv_dim * c->n_layers);
    double fine_bits = 8.5;
    size_t n = s->max_tokens, fine = BENCH_BLOCK, sealed = n;
    if (m->format) {
        bits = 0.5 * (m->format->bits(c->head_dim, true) + m->format->bits(c->head_dim, false));
        sealed = bench_format_sealed(m->format, m->window, n);
        fine = m->window ? fine : 0;
    } else if (m->quantize_kv) {
        bits = 8.5;
    } else {
        fine = m->fine_tokens;
        fine_bits = 8.0 + 16.0 / c->head_dim + 8.0 / BENCH_BLOCK;
        if (bits < 16.0)
            sealed = n < BENCH_BLOCK ? 0 : (n - BENCH_BLOCK) / BENCH_BLOCK * BENCH_BLOCK;
    }
    *at_ctx = bench_bits_at(bits, fine_bits, fine, sealed, n);
    return bits;
}

static bool has_window(const method *m)
{
    return m->format ? m->window : !m->quantize_kv && m->k_type != KVT_TYPE_F32;
}

static void plot(const setup *s, const subject *rows, size_t n)
{
    bench_point *points = bench_alloc(n, sizeof *points);
    size_t shown = 0;
    for (size_t i = 0; i < n; i++) {
        const subject *x = &rows[i];
        double bits_ctx, kl = sum_of(x->kl, s->n_texts) / sum_of(x->tokens, s->n_texts);
        bool ours = !x->method->format && !x->method->quantize_kv;
        if (x->bias == s->options->offsets[0] && bits_of(s, x, &bits_ctx) < 16.0)
            points[shown++] =
                (bench_point){x->method->name, bits_ctx, kl, ours, !has_window(x->method)};
    }
    bench_plot plots = {"KL of the next token's distribution",
                        "bits an element of K and V (filled: with a window of 64)", points, shown};
    bench_plot_write(s->options->svg, &plots, 1);
    free(points);
}

/*
 * Of the 4-bit references of a row with a window the one of the least KL; NULL: not all are there.
 */
static const subject *best_of_four(const setup *s, const subject *row)
{
    const subject *best = NULL;
    size_t found = 0;
    for (size_t i = 0; i < s->n_methods; i++)
        for (size_t j = 0; j < N_FOURS; j++) {
            if (!row[i].method->window || strcmp(row[i].method->name, fours[j]) != 0)
                continue;
            found++;
            if (!best || sum_of(row[i].kl, s->n_texts) < sum_of(best->kl, s->n_texts))
                best = &row[i];
        }
    return found == N_FOURS ? best : NULL;
}

/* row: all methods with the same bias; plain: this method without one, or NULL. */
static int report(setup *s, const subject *row, const subject *x, const subject *plain,
                  const subject *reference)
{
    const bench_options *o = s->options;
    const tl_config *c = &s->model.config;
    size_t n = s->n_texts;
    bench_case shape;
    bench_record r;
    memset(&shape, 0, sizeof shape);
    shape.q_heads = c->n_heads;
    shape.kv_heads = c->n_kv_heads;
    shape.k_dim = shape.v_dim = c->head_dim;
    shape.threads = o->threads[0];
    shape.ctx = s->max_tokens;

    double tokens = sum_of(x->tokens, n), kl_se, r1_se, r2_se;
    double kl = quotient(x->kl, x->tokens, n, &kl_se);
    double vs_r1 = quotient(x->kl, row[M_R1].kl, n, &r1_se);
    double vs_r2 = quotient(x->kl, row[M_R2].kl, n, &r2_se);
    double nll = sum_of(x->nll, n) / tokens, nll_reference = sum_of(reference->nll, n) / tokens;

    /*
     * The bars, of i8: well below q8_0, and a bias of the keys changes little, in the appends of a
     * conversation as token by token.
     */
    char bar[64];
    const subject *best = is_i4(x->method) ? best_of_four(s, row) : NULL;
    bool ours = is_i8(x->method), four = is_i4(x->method);
    bool has_bar = (ours && x->bias == 0.0) || (four && x->bias == 0.0 && best) ||
                   ((ours || four) && x->bias != 0.0 && plain);
    double limit = x->bias != 0.0 ? 1.5 : four ? 0.8 : 0.4, vs = vs_r1, vs_se = r1_se;
    if (has_bar && x->bias != 0.0)
        vs = quotient(x->kl, plain->kl, n, &vs_se);
    else if (has_bar && four)
        vs = quotient(x->kl, best->kl, n, &vs_se);
    bool pass = vs <= limit, clear = fabs(vs - limit) > 2.0 * vs_se;
    snprintf(bar, sizeof bar, "/%s <= %g",
             x->bias != 0.0 ? "plain"
             : four && best ? best->method->name
                            : "R1",
             limit);

    double elements = 2.0 * c->kv_dim * c->n_layers, asked = sum_of(s->asked, TL_BINS);
    double bits_ctx, bits = bits_of(s, x, &bits_ctx);
    bench_record_begin(&r, "fidelity", kvt_cache_isa(x->kvtile.cache), x->method->k_name,
                       x->method->v_name, &shape);
    bench_record_no_time(&r, bits / 8.0 * elements * (double)shape.ctx);
    bench_record_text(&r, "data", o->text ? "text" : "stories");
    bench_record_text(&r, "method", x->method->name);
    bench_record_text(&r, "cut", x->method->cut);
    bench_record_text(&r, "residual", has_window(x->method) && bits < 16.0 ? "64" : "none");
    bench_record_number(&r, "bits", bits);
    bench_record_number(&r, "bits_ctx", bits_ctx);
    bench_record_number(&r, "key_bias", x->bias);
    bench_record_number(&r, "kl", 1e4 * kl); /* of 1e-4 nats */
    bench_record_number(&r, "kl_se", 1e4 * kl_se);
    bench_record_number(&r, "kl_p99", 1e4 * percentile(x->each_kl, x->n_each, 0.99));
    bench_record_number(&r, "perplexity", exp(nll));
    bench_record_number(&r, "perplexity_change", 100.0 * expm1(nll - nll_reference));
    bench_record_number(&r, "same_top", 100.0 * x->same_top / tokens);
    bench_record_number(&r, "recall", asked > 0 ? 100.0 * sum_of(x->hits, TL_BINS) / asked : NAN);
    bench_record_number(&r, "recall_reference",
                        asked > 0 ? 100.0 * sum_of(reference->hits, TL_BINS) / asked : NAN);
    static const char *const bins[TL_BINS] = {"recall_1", "recall_128", "recall_512",
                                              "recall_1024"};
    for (size_t i = 0; i < TL_BINS; i++)
        bench_record_number(&r, bins[i], s->asked[i] > 0 ? 100.0 * x->hits[i] / s->asked[i] : NAN);
    double t1_se, t1 = typical_quotient(x->kl, row[M_R1].kl, n, &t1_se);
    double t2_se, t2 = typical_quotient(x->kl, row[M_R2].kl, n, &t2_se);
    bench_record_number(&r, "kl_vs_r1", ours ? vs_r1 : NAN);
    bench_record_number(&r, "kl_vs_r1_se", ours ? r1_se : NAN);
    bench_record_number(&r, "kl_vs_r2", ours ? vs_r2 : NAN);
    bench_record_number(&r, "kl_vs_r2_se", ours ? r2_se : NAN);
    bench_record_number(&r, "kl_vs_bar", has_bar ? vs : NAN);
    bench_record_number(&r, "kl_vs_r1_typical", ours ? t1 : NAN);
    bench_record_number(&r, "kl_vs_r1_typical_se", ours ? t1_se : NAN);
    bench_record_number(&r, "kl_vs_r2_typical", ours ? t2 : NAN);
    bench_record_number(&r, "kl_vs_r2_typical_se", ours ? t2_se : NAN);
    bench_record_integer(&r, "texts", n);
    bench_record_integer(&r, "predictions", (uint64_t)tokens);
    bench_record_text(&r, "bar", has_bar ? bar : NULL);
    bench_record_text(&r, "pass",
                      !has_bar ? NULL
                      : clear  ? (pass ? "yes" : "no")
                      : pass   ? "yes?"
                               : "no?");
    bench_record_end(&r, o, false);
    bench_emit(o, &r, columns, N_COLUMNS);
    return has_bar && !pass && (ours || clear); /* few texts decide little about i4 */
}

int bench_fidelity_model(const bench_options *options)
{
    setup s;
    tl_error err;
    int failed = 0;
    memset(&s, 0, sizeof s);
    s.options = options;
    require(tl_model_load(&s.model, options->model, &err), &err);
    const tl_config *c = &s.model.config;
    s.vocab = c->vocab_size;
    s.tokenizer = tl_tokenizer_load(options->tokenizer, c->vocab_size, &err);
    require(s.tokenizer ? 0 : -1, &err);
    s.work = tl_work_create(options->threads[0]);
    if (!s.work)
        bench_fail(1, "cannot start %u threads", options->threads[0]);
    s.max_tokens = c->seq_len;
    if (options->n_ctx && options->ctx[0] < s.max_tokens)
        s.max_tokens = (size_t)options->ctx[0];
    if (s.max_tokens < 2)
        bench_fail(2, "--ctx: a text needs two tokens at least");
    load_texts(&s);
    s.reference = bench_alloc(s.max_tokens * s.vocab, sizeof *s.reference);
    s.reference_sum = bench_alloc(s.max_tokens, sizeof *s.reference_sum);
    s.reference_top = bench_alloc(s.max_tokens, sizeof *s.reference_top);
    s.logits = bench_alloc(CHUNK * s.vocab, sizeof *s.logits);
    s.top = bench_alloc(s.max_tokens, sizeof *s.top);
    make_biases(&s);

    size_t n_methods, n_variants = options->n_offsets;
    method *methods = make_methods(options, &n_methods);
    size_t n = n_variants * n_methods;
    s.n_methods = n_methods;
    subject reference, *rows = bench_alloc(n, sizeof *rows);
    memset(&reference, 0, sizeof reference);
    open_subject(&s, &reference, &methods[M_F32], 0.0, NULL);
    for (size_t i = 0; i < n; i++)
        open_subject(&s, &rows[i], &methods[i % n_methods], options->offsets[i / n_methods],
                     options->offsets[i / n_methods] == 0.0 ? NULL : s.bias[i / n_methods]);

    bench_table_begin(options, "fidelity: predictions of a model against those with an f32 cache",
                      columns, N_COLUMNS);
    for (size_t t = 0; t < s.n_texts; t++) {
        run_text(&s, &reference, t, true);
        for (size_t i = 0; i < n; i++) {
            bench_progress("text and cache", t * n + i, s.n_texts * n);
            run_text(&s, &rows[i], t, false);
        }
    }
    bench_progress("text and cache", s.n_texts * n, s.n_texts * n);
    for (size_t i = 0; i < n; i++)
        failed |= report(&s, &rows[i - i % n_methods], &rows[i],
                         options->offsets[0] == 0.0 ? &rows[i % n_methods] : NULL, &reference);
    if (options->svg)
        plot(&s, rows, n);
    double asked = sum_of(s.asked, TL_BINS);
    bench_note(
        options,
        "%zu texts, %.0f predictions, %.0f questions (f32 answers %.1f %%). KL in 1e-4 nats "
        "against the f32 cache without bias, +- one\n"
        "standard error over texts (of a quotient: jackknife; typical: geometric mean over texts). "
        "bias: added to a few channels "
        "of every key, in deviations of the channel;\n"
        "f32 with a bias shows that the exact output stays. R1: K and V through q8_0; R2: q, "
        "too. pass with a question mark:\n"
        "closer to the bar than two standard errors.",
        s.n_texts, sum_of(reference.tokens, s.n_texts), asked,
        asked > 0 ? 100.0 * sum_of(reference.hits, TL_BINS) / asked : NAN);

    if (n_methods > N_METHODS)
        bench_note(options,
                   "window: the newest 64 to 127 tokens f16, the first 64 i8, of the references "
                   "q8_0; of these the others are without, as they are.");
    for (size_t i = 0; i < n; i++)
        close_subject(&rows[i]);
    close_subject(&reference);
    free(rows);
    free(methods);
    for (size_t i = 0; i < n_variants; i++)
        free(s.bias[i]);
    free(s.bias);
    free(s.top);
    free(s.logits);
    free(s.reference_top);
    free(s.reference_sum);
    free(s.reference);
    for (size_t i = 0; i < s.n_texts; i++)
        tl_text_free(&s.texts[i]);
    free(s.texts);
    tl_work_destroy(s.work);
    tl_tokenizer_free(s.tokenizer);
    tl_model_free(&s.model);
    return failed;
}
