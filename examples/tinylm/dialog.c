/*
 * A conversation: turns of prompt and answer over one kvtile sequence.
 *
 * Between turns every token is in the cache, so a snapshot is the whole conversation. A turn
 * without a prompt needs the logits of the last token, which are not in the snapshot: the sequence
 * is truncated by that token and it is run again, whether the conversation was loaded or not. As
 * the last token always was a step of its own, running it again stores the same bytes.
 */
#include "app.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int dialog_open(dialog *d, const engine *e, const options *o, tl_error *err)
{
    const tl_config *c = &e->model.config;
    *d = (dialog){.engine = e, .show_ids = o->ids};
    d->sampler = (tl_sampler){(float)o->temperature, (float)o->top_p, o->seed};
    d->tokens = calloc(c->seq_len, sizeof *d->tokens);
    d->logits = calloc(c->vocab_size, sizeof *d->logits);
    d->order = calloc(c->vocab_size, sizeof *d->order);
    if (!d->tokens || !d->logits || !d->order) {
        tl_fail(err, "no memory for a conversation");
        goto fail;
    }
    d->settings = (tl_kv_settings){.k_type = o->k_type, .v_type = o->v_type};
    if (tl_kvtile_open(&d->kv, &e->model, &d->settings, e->work, err))
        goto fail;
    if (tl_session_open(&d->session, &e->model, tl_kvtile_store(&d->kv), e->work, PREFILL_TOKENS,
                        err))
        goto fail;
    return 0;
fail:
    dialog_close(d);
    return -1;
}

void dialog_close(dialog *d)
{
    tl_session_close(&d->session);
    tl_kvtile_close(&d->kv);
    free(d->tokens);
    free(d->logits);
    free(d->order);
    *d = (dialog){0};
}

/* ---- putting away, taking up ---- */

int dialog_save(dialog *d, const char *path, tl_error *err)
{
    return tl_kvt_check(d->kv.cache, kvt_seq_save(d->kv.seq, path, NULL), "save", err);
}

int dialog_load(dialog *d, const char *path, tl_error *err)
{
    const tl_config *c = &d->engine->model.config;
    if (tl_kvt_check(d->kv.cache, kvt_seq_load(d->kv.seq, path, NULL, NULL), "load", err))
        return -1;
    size_t n = (size_t)kvt_seq_length(d->kv.seq); /* at most seq_len: the cache's max_tokens */
    if (n && tl_kvt_check(d->kv.cache, kvt_seq_token_ids(d->kv.seq, 0, n, d->tokens), "load", err))
        return -1;
    for (size_t i = 0; i < n; i++)
        if (d->tokens[i] < 0 || (uint32_t)d->tokens[i] >= c->vocab_size)
            return tl_fail(err, "load: %s: token %zu has no id of this model", path, i);
    d->n_tokens = d->session.position = n;
    return 0;
}

int snapshot_types(options *o, tl_error *err)
{
    kvt_snapshot_info info = {.struct_size = sizeof info};
    char text[400] = "";
    kvt_status status = kvt_snapshot_inspect(o->load, 0, &info, text, sizeof text);
    if (status != KVT_OK)
        return tl_fail(err, "load: %s%s%s", kvt_status_string(status), *text ? ": " : "", text);
    if (info.n_groups && !o->k_given)
        o->k_type = info.groups[0].k_type;
    if (info.n_groups && !o->v_given)
        o->v_type = info.groups[0].v_type;
    return 0;
}

/* ---- a turn ---- */

static void show(dialog *d, int32_t previous, int32_t token)
{
    if (d->silent)
        return;
    if (d->show_ids) {
        printf("%d\n", token);
        return;
    }
    size_t n;
    const char *s = tl_decode(d->engine->tokenizer, previous, token, &n);
    fwrite(s, 1, n, stdout);
    fflush(stdout);
}

/* Read the conversation's tokens from the session's position on; logits are those of the last. */
static int feed(dialog *d, tl_error *err)
{
    size_t position;
    while ((position = d->session.position) < d->n_tokens) {
        size_t left = d->n_tokens - position;
        /* The last token is always a step of its own: see the head of this file. */
        size_t n = left == 1 ? 1 : left - 1 < PREFILL_TOKENS ? left - 1 : PREFILL_TOKENS;
        if (tl_forward(&d->session, d->tokens + position, n, d->logits, left == 1, err))
            return -1;
        if (d->n_tokens >= 4 * PREFILL_TOKENS && left > 1)
            progress("reading the prompt, tokens", position + n, d->n_tokens);
    }
    return 0;
}

static int add_prompt(dialog *d, const char *prompt, tl_error *err)
{
    int32_t *tokens;
    size_t n, room = d->engine->model.config.seq_len - d->n_tokens;
    if (tl_encode(d->engine->tokenizer, prompt, strlen(prompt), d->n_tokens == 0, &tokens, NULL, &n,
                  err))
        return -1;
    if (n > room) {
        free(tokens);
        return tl_fail(err, "the prompt has %zu tokens, the context has room for %zu", n, room);
    }
    if (d->echo)
        fputs(prompt, stdout);
    memcpy(d->tokens + d->n_tokens, tokens, n * sizeof *tokens);
    d->n_tokens += n;
    free(tokens);
    return 0;
}

int dialog_turn(dialog *d, const char *prompt, size_t n, tl_error *err)
{
    const tl_config *c = &d->engine->model.config;
    if (d->n_tokens == 0 || (prompt && *prompt)) {
        if (add_prompt(d, prompt ? prompt : "", err))
            return -1;
    } else if (n > 0) {
        kvt_status status = kvt_seq_truncate(d->kv.seq, d->n_tokens - 1);
        if (tl_kvt_check(d->kv.cache, status, "truncate", err))
            return -1;
        d->session.position = d->n_tokens - 1;
    }
    if (feed(d, err))
        return -1;
    for (size_t i = 0; i < n && d->n_tokens < c->seq_len; i++) {
        int32_t token = tl_sample(&d->sampler, d->logits, d->order, c->vocab_size, d->n_tokens);
        if (token == TL_BOS || token == TL_EOS)
            break;
        d->tokens[d->n_tokens++] = token;
        show(d, d->tokens[d->n_tokens - 2], token);
        if (feed(d, err))
            return -1;
    }
    if (n > 0 && d->n_tokens == c->seq_len && !d->silent)
        fprintf(stderr, "\nthe context of %u tokens is full\n", c->seq_len);
    return 0;
}
