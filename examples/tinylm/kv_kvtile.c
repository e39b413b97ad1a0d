/*
 * kvtile behind tl_kv: the code an engine needs to keep its K and V in the library.
 *
 * One cache with one sequence. A step of the forward pass is a step of kvtile; attention includes
 * the step's tokens before they are committed. The threads are the engine's own: its parallel-for
 * is kvtile's executor. Several sequences side by side are in kv_batch.c.
 */
#include "tinylm.h"

#include <string.h>

int tl_kvt_check(const kvt_cache *cache, kvt_status status, const char *what, tl_error *err)
{
    if (status == KVT_OK)
        return 0;
    char text[400] = "";
    if (cache)
        kvt_cache_error(cache, text, sizeof text);
    return tl_fail(err, "%s: %s%s%s", what, kvt_status_string(status), *text ? ": " : "", text);
}

static int check(tl_kvtile *kv, kvt_status status)
{
    return tl_kvt_check(kv->cache, status, "kvtile", &kv->failure);
}

static int kv_begin(void *self, size_t n)
{
    tl_kvtile *kv = self;
    /* A forward pass that failed may have left its step pending. */
    if (kvt_seq_pending(kv->seq))
        kvt_seq_abort(kv->seq);
    return check(kv, kvt_seq_begin(kv->seq, n, NULL));
}

static int kv_append(void *self, uint32_t layer, const float *k, const float *v, size_t n)
{
    tl_kvtile *kv = self;
    kvt_tensor tk = kvt_tensor_f32(k), tv = kvt_tensor_f32(v);
    (void)n; /* the step's */
    return check(kv, kvt_append(kv->seq, layer, &tk, &tv));
}

static int kv_attend(void *self, uint32_t layer, const float *q, float *out, size_t n)
{
    tl_kvtile *kv = self;
    kvt_attend_item item = {.seq = kv->seq, .n_queries = n};
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = layer;
    args.flags = KVT_ATTEND_CAUSAL;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    return check(kv, kvt_attend(kv->cache, &args));
}

static int kv_commit(void *self, const int32_t *tokens, size_t n)
{
    tl_kvtile *kv = self;
    if (n == kvt_seq_pending(kv->seq))
        return check(kv, kvt_seq_commit(kv->seq, tokens));
    /* The others were drafts that have been rejected. */
    uint64_t kept[KVT_SELECT_TOKENS];
    if (n > KVT_SELECT_TOKENS)
        return tl_fail(&kv->failure, "%zu tokens are too many to be selected", n);
    for (size_t i = 0; i < n; i++)
        kept[i] = i;
    return check(kv, kvt_seq_commit_selected(kv->seq, kept, n, tokens));
}

static int kv_clear(void *self)
{
    tl_kvtile *kv = self;
    return check(kv, kvt_seq_clear(kv->seq));
}

static const char *kv_error(void *self)
{
    tl_kvtile *kv = self;
    return kv->failure.text;
}

static void run(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n_tasks)
{
    tl_work_run(user, task, arg, n_tasks);
}

/* A cache's config, with what it points to. */
typedef struct plan {
    kvt_config config;
    kvt_group_config group;
    float inverse_frequencies[KVT_MAX_DIM / 2];
} plan;

static void make_plan(plan *p, const tl_model *model, const tl_kv_settings *settings)
{
    const tl_config *c = &model->config;
    p->group = kvt_group_config_init();
    p->group.n_layers = c->n_layers;
    p->group.n_q_heads = c->n_heads;
    p->group.n_kv_heads = c->n_kv_heads;
    p->group.k_dim = p->group.v_dim = c->head_dim;
    p->group.k_type = settings->k_type;
    p->group.v_type = settings->v_type;
    p->group.window_tokens = settings->window_tokens;
    p->group.sink_tokens = settings->sink_tokens;
    /* What forward.c does to q and K: kvtile needs it to move tokens' positions. */
    if (c->head_dim <= KVT_MAX_DIM) {
        for (uint32_t i = 0; i < c->head_dim / 2; i++)
            p->inverse_frequencies[i] = tl_inverse_frequency(c, i);
        p->group.rope_pairing = KVT_ROPE_NEIGHBOURS;
        p->group.rope_dims = c->head_dim;
        p->group.rope_inverse_frequencies = p->inverse_frequencies;
    }
    p->config = kvt_config_init();
    p->config.groups = &p->group;
    p->config.n_groups = 1;
    p->config.max_tokens = settings->max_tokens ? settings->max_tokens : c->seq_len;
    p->config.fingerprint = model->fingerprint;
    p->config.fingerprint_bytes = sizeof model->fingerprint;
}

int tl_kvtile_open(tl_kvtile *kv, const tl_model *model, const tl_kv_settings *settings,
                   tl_work *work, tl_error *err)
{
    plan p;
    char text[400] = "";
    make_plan(&p, model, settings);
    p.config.executor = (kvt_executor){work, run, tl_work_threads(work)};
    p.config.n_threads = tl_work_threads(work);
    p.config.error_text = text;
    p.config.error_text_bytes = sizeof text;

    memset(kv, 0, sizeof *kv);
    kvt_status status = kvt_cache_create(&p.config, &kv->cache);
    if (status != KVT_OK)
        return tl_fail(err, "cache: %s%s%s", kvt_status_string(status), *text ? ": " : "", text);
    if (tl_kvt_check(kv->cache, kvt_seq_create(kv->cache, &kv->seq), "cache", err) == 0)
        return 0;
    tl_kvtile_close(kv);
    return -1;
}

uint64_t tl_kvtile_forecast(const tl_model *model, const tl_kv_settings *settings, size_t n_tokens)
{
    plan p;
    uint64_t empty, bytes;
    make_plan(&p, model, settings);
    if (kvt_memory_forecast(&p.config, 0, n_tokens, &empty) != KVT_OK ||
        kvt_memory_forecast(&p.config, 1, n_tokens, &bytes) != KVT_OK)
        return 0;
    return bytes - empty;
}

void tl_kvtile_close(tl_kvtile *kv)
{
    kvt_seq_destroy(kv->seq);
    kvt_cache_destroy(kv->cache);
    memset(kv, 0, sizeof *kv);
}

tl_kv tl_kvtile_store(tl_kvtile *kv)
{
    static const tl_kv_ops ops = {kv_begin, kv_append, kv_attend, kv_commit, kv_clear, kv_error};
    return (tl_kv){&ops, kv};
}
