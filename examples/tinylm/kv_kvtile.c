/*
 * kvtile behind tl_kv: the code an engine needs to keep its K and V in the library.
 *
 * One cache with one sequence. A step of the forward pass is a step of kvtile; attention includes
 * the step's tokens before they are committed. The threads are the engine's own: its parallel-for
 * is kvtile's executor.
 */
#include "tinylm.h"

#include <stdio.h>
#include <string.h>

static int check(tl_kvtile *kv, kvt_status status)
{
    if (status == KVT_OK)
        return 0;
    char text[400] = "";
    if (kv->cache)
        kvt_cache_error(kv->cache, text, sizeof text);
    snprintf(kv->text, sizeof kv->text, "%s%s%s", kvt_status_string(status), *text ? ": " : "",
             text);
    return -1;
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
    (void)n;
    return check(kv, kvt_seq_commit(kv->seq, tokens));
}

static int kv_clear(void *self)
{
    tl_kvtile *kv = self;
    return check(kv, kvt_seq_clear(kv->seq));
}

static const char *kv_error(void *self)
{
    tl_kvtile *kv = self;
    return kv->text;
}

static void run(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n_tasks)
{
    tl_work_run(user, task, arg, n_tasks);
}

int tl_kvtile_open(tl_kvtile *kv, const tl_model *model, kvt_type k_type, kvt_type v_type,
                   tl_work *work, tl_error *err)
{
    const tl_config *c = &model->config;
    kvt_group_config group = kvt_group_config_init();
    group.n_layers = c->n_layers;
    group.n_q_heads = c->n_heads;
    group.n_kv_heads = c->n_kv_heads;
    group.k_dim = group.v_dim = c->head_dim;
    group.k_type = k_type;
    group.v_type = v_type;

    char text[400] = "";
    kvt_config config = kvt_config_init();
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = c->seq_len;
    config.fingerprint = model->fingerprint;
    config.fingerprint_bytes = sizeof model->fingerprint;
    config.executor = (kvt_executor){work, run, tl_work_threads(work)};
    config.n_threads = tl_work_threads(work);
    config.error_text = text;
    config.error_text_bytes = sizeof text;

    memset(kv, 0, sizeof *kv);
    kvt_status status = kvt_cache_create(&config, &kv->cache);
    if (status == KVT_OK) {
        status = kvt_seq_create(kv->cache, &kv->seq);
        if (status == KVT_OK)
            return 0;
        check(kv, status);
        tl_fail(err, "cache: %s", kv->text);
    } else {
        tl_fail(err, "cache: %s%s%s", kvt_status_string(status), *text ? ": " : "", text);
    }
    tl_kvtile_close(kv);
    return -1;
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
