/*
 * Several sequences of one cache behind tl_kv, one token each a step: what an engine does that
 * serves many conversations at once. The matrix products see a batch of n tokens, kvtile one attend
 * call with n items; each sequence begins, appends and commits for itself.
 */
#include "tinylm.h"

static int check(tl_batch *b, kvt_status status)
{
    return tl_kvt_check(b->cache, status, "kvtile", &b->failure);
}

static int batch_begin(void *self, size_t n)
{
    tl_batch *b = self;
    if (n != b->n_seqs)
        return tl_fail(&b->failure, "%zu tokens for %zu sequences", n, b->n_seqs);
    for (size_t i = 0; i < n; i++) {
        /* A forward pass that failed may have left its step pending. */
        if (kvt_seq_pending(b->seqs[i]))
            kvt_seq_abort(b->seqs[i]);
        if (check(b, kvt_seq_begin(b->seqs[i], 1, NULL))) {
            while (i-- > 0) /* all or none: the others may be used elsewhere */
                kvt_seq_abort(b->seqs[i]);
            return -1;
        }
    }
    return 0;
}

static int batch_append(void *self, uint32_t layer, const float *k, const float *v, size_t n)
{
    tl_batch *b = self;
    for (size_t i = 0; i < n; i++, k += b->config->kv_dim, v += b->config->kv_dim) {
        kvt_tensor tk = kvt_tensor_f32(k), tv = kvt_tensor_f32(v);
        if (check(b, kvt_append(b->seqs[i], layer, &tk, &tv)))
            return -1;
    }
    return 0;
}

static int batch_attend(void *self, uint32_t layer, const float *q, float *out, size_t n)
{
    tl_batch *b = self;
    kvt_attend_item items[TL_BATCH];
    kvt_attend_args args = kvt_attend_args_init();
    for (size_t i = 0; i < n; i++)
        items[i] = (kvt_attend_item){.seq = b->seqs[i], .n_queries = 1};
    args.layer = layer;
    args.items = items;
    args.n_items = n;
    args.q = kvt_tensor_f32(q); /* the items' queries, one after the other */
    args.out = kvt_tensor_f32(out);
    return check(b, kvt_attend(b->cache, &args));
}

static int batch_commit(void *self, const int32_t *tokens, size_t n)
{
    tl_batch *b = self;
    for (size_t i = 0; i < n; i++)
        if (check(b, kvt_seq_commit(b->seqs[i], &tokens[i])))
            return -1;
    return 0;
}

static int batch_clear(void *self)
{
    tl_batch *b = self;
    for (size_t i = 0; i < b->n_seqs; i++)
        if (check(b, kvt_seq_clear(b->seqs[i])))
            return -1;
    return 0;
}

static const char *batch_error(void *self)
{
    tl_batch *b = self;
    return b->failure.text;
}

tl_kv tl_batch_store(tl_batch *batch)
{
    static const tl_kv_ops ops = {batch_begin,  batch_append, batch_attend,
                                  batch_commit, batch_clear,  batch_error};
    return (tl_kv){&ops, batch};
}
