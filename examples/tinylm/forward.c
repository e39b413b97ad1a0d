/*
 * The forward pass of llama2.c's architecture for a chunk of tokens: RMSNorm, RoPE on adjacent
 * pairs, grouped-query attention, SwiGLU. The session's store appends keys and values and computes
 * attention; everything else is here.
 *
 * No result depends on the division of tokens into chunks, except through the store.
 */
#include "tinylm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static float *room(size_t tokens, size_t floats)
{
    if (floats && tokens > SIZE_MAX / sizeof(float) / floats)
        return NULL;
    return malloc(tokens * floats * sizeof(float));
}

int tl_session_open(tl_session *s, const tl_model *model, tl_kv kv, tl_work *work,
                    size_t max_tokens, tl_error *err)
{
    const tl_config *c = &model->config;
    *s = (tl_session){.model = model, .work = work, .kv = kv, .max_tokens = max_tokens};
    s->x = room(max_tokens, c->dim);
    s->h = room(max_tokens, c->dim);
    s->q = room(max_tokens, c->dim);
    s->k = room(max_tokens, c->kv_dim);
    s->v = room(max_tokens, c->kv_dim);
    s->o = room(max_tokens, c->dim);
    s->gate = room(max_tokens, c->hidden_dim);
    s->up = room(max_tokens, c->hidden_dim);
    s->angles = room(max_tokens, c->head_dim);
    if (s->x && s->h && s->q && s->k && s->v && s->o && s->gate && s->up && s->angles)
        return 0;
    tl_session_close(s);
    return tl_fail(err, "no memory for a session of %zu tokens", max_tokens);
}

void tl_session_close(tl_session *s)
{
    free(s->x);
    free(s->h);
    free(s->q);
    free(s->k);
    free(s->v);
    free(s->o);
    free(s->gate);
    free(s->up);
    free(s->angles);
    *s = (tl_session){0};
}

static void norm(float *out, const float *x, const float *weight, size_t n, size_t dim)
{
    for (size_t i = 0; i < n; i++, x += dim, out += dim) {
        float sum = 0;
        for (size_t d = 0; d < dim; d++)
            sum += x[d] * x[d];
        float scale = 1 / sqrtf(sum / (float)dim + 1e-5f);
        for (size_t d = 0; d < dim; d++)
            out[d] = weight[d] * (x[d] * scale);
    }
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
}

float tl_inverse_frequency(const tl_config *config, uint32_t pair)
{
    return 1 / powf(10000.0f, (float)(2 * pair) / (float)config->head_dim);
}

/* cos and sin for each token and pair: computed once a chunk, used by all layers and heads. */
static void fill_angles(const tl_session *s, size_t n)
{
    const tl_config *c = &s->model->config;
    for (uint32_t d = 0; d < c->head_dim; d += 2) {
        float freq = tl_inverse_frequency(c, d / 2);
        for (size_t i = 0; i < n; i++) {
            float angle = (float)(s->position + (s->side_by_side ? 0 : i)) * freq;
            s->angles[i * c->head_dim + d] = cosf(angle);
            s->angles[i * c->head_dim + d + 1] = sinf(angle);
        }
    }
}

static void rope(float *x, const float *angles, size_t n, uint32_t n_heads, uint32_t head_dim)
{
    for (size_t i = 0; i < n; i++, angles += head_dim) {
        for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
            for (uint32_t d = 0; d < head_dim; d += 2) {
                float a = x[d], b = x[d + 1], c = angles[d], s = angles[d + 1];
                x[d] = a * c - b * s;
                x[d + 1] = a * s + b * c;
            }
        }
    }
}

/* One expf for each activation is slow enough to distribute the tokens over the threads. */
typedef struct silu_task {
    float *gate;
    const float *up;
    size_t width;
} silu_task;

static void silu(void *arg, size_t i)
{
    const silu_task *t = arg;
    float *g = t->gate + i * t->width;
    const float *u = t->up + i * t->width;
    for (size_t d = 0; d < t->width; d++)
        g[d] = g[d] / (1 + expf(-g[d])) * u[d];
}

static int store_failed(tl_session *s, const char *what, tl_error *err)
{
    return tl_fail(err, "%s at token %zu: %s", what, s->position, s->kv.ops->error(s->kv.self));
}

static int attention(tl_session *s, const tl_layer *l, uint32_t layer, size_t n, tl_error *err)
{
    const tl_config *c = &s->model->config;
    tl_matmul(s->work, &l->wq, s->h, s->q, n);
    tl_matmul(s->work, &l->wk, s->h, s->k, n);
    tl_matmul(s->work, &l->wv, s->h, s->v, n);
    rope(s->q, s->angles, n, c->n_heads, c->head_dim);
    rope(s->k, s->angles, n, c->n_kv_heads, c->head_dim);
    if (s->key_bias)
        for (size_t i = 0; i < n; i++)
            add(s->k + i * c->kv_dim, s->key_bias + (size_t)layer * c->kv_dim, c->kv_dim);
    if (s->kv.ops->append(s->kv.self, layer, s->k, s->v, n))
        return store_failed(s, "append", err);
    double t = now();
    if (s->kv.ops->attend(s->kv.self, layer, s->q, s->o, n))
        return store_failed(s, "attend", err);
    s->attend_seconds += now() - t;
    tl_matmul(s->work, &l->wo, s->o, s->h, n);
    add(s->x, s->h, n * c->dim);
    return 0;
}

int tl_step(tl_session *s, const int32_t *tokens, size_t n, float *logits, size_t n_logits,
            tl_error *err)
{
    const tl_model *m = s->model;
    const tl_config *c = &m->config;
    if (n == 0 || n > s->max_tokens || n_logits > n)
        return tl_fail(err, "a step of %zu tokens does not fit the session", n);
    if (s->position > c->seq_len || (s->side_by_side ? 1 : n) > c->seq_len - s->position)
        return tl_fail(err, "the context of %u tokens is full", c->seq_len);
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= c->vocab_size)
            return tl_fail(err, "token id %ld is not in the vocabulary", (long)tokens[i]);
        memcpy(s->x + i * c->dim, m->embedding + (size_t)tokens[i] * c->dim,
               c->dim * sizeof(float));
    }
    if (s->kv.ops->begin(s->kv.self, n))
        return store_failed(s, "begin", err);
    fill_angles(s, n);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        const tl_layer *l = &m->layers[i];
        norm(s->h, s->x, l->att_norm, n, c->dim);
        if (attention(s, l, i, n, err))
            return -1;
        norm(s->h, s->x, l->ffn_norm, n, c->dim);
        tl_matmul(s->work, &l->w1, s->h, s->gate, n);
        tl_matmul(s->work, &l->w3, s->h, s->up, n);
        silu_task t = {s->gate, s->up, c->hidden_dim};
        tl_work_run(s->work, silu, &t, n);
        tl_matmul(s->work, &l->w2, s->gate, s->h, n);
        add(s->x, s->h, n * c->dim);
    }
    if (n_logits) {
        const float *x = s->x + (n - n_logits) * c->dim;
        norm(s->h, x, m->final_norm, n_logits, c->dim);
        tl_matmul(s->work, &m->classifier, s->h, logits, n_logits);
    }
    return 0;
}

int tl_keep(tl_session *s, const int32_t *tokens, size_t n, tl_error *err)
{
    if (s->kv.ops->commit(s->kv.self, tokens, n))
        return store_failed(s, "commit", err);
    s->position += s->side_by_side ? 1 : n;
    return 0;
}

int tl_forward(tl_session *s, const int32_t *tokens, size_t n, float *logits, size_t n_logits,
               tl_error *err)
{
    return tl_step(s, tokens, n, logits, n_logits, err) ? -1 : tl_keep(s, tokens, n, err);
}
