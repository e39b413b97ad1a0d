/*
 * A conversation: turns of prompt and answer over one kvtile sequence.
 *
 * Between turns every token is in the cache. What a turn without a prompt needs besides is the last
 * token's logits, which go into the snapshot as a checkpoint's blob. (To run the last token again
 * would not do: where its commit had sealed a block, the load of a snapshot does not take that
 * back, and the token would see i8 of what it had seen as f16.)
 */
#include "app.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* What of the options depends on the model's context. */
static int check_context(const options *o, uint32_t seq_len, tl_error *err)
{
    uint64_t context = o->context ? o->context : seq_len;
    if (context > seq_len)
        return tl_fail(err, "--ctx: the model's context has %u tokens", seq_len);
    if (o->shift && context < SHIFT_CONTEXT)
        return tl_fail(err, "--shift needs a context of at least %d tokens", SHIFT_CONTEXT);
    if (o->shift && o->sinks_given && o->sinks > SHIFT_KEEPS) /* the flag's, or the snapshot's */
        return tl_fail(err, "--shift keeps the first %d tokens: --sinks is at most that",
                       SHIFT_KEEPS);
    if (o->shift && o->window && context < o->window + SHIFT_WINDOW)
        return tl_fail(err, "--shift with --window %llu needs a context of at least %llu tokens",
                       (unsigned long long)o->window, (unsigned long long)o->window + SHIFT_WINDOW);
    return 0;
}

int dialog_open(dialog *d, const engine *e, const options *o, tl_error *err)
{
    const tl_config *c = &e->model.config;
    *d = (dialog){.engine = e, .show_ids = o->ids, .shift = o->shift, .n_draft = o->draft};
    if (check_context(o, c->seq_len, err))
        return -1;
    d->context = o->context ? (size_t)o->context : c->seq_len;
    d->sampler = (tl_sampler){(float)o->temperature, (float)o->top_p, o->seed};
    d->tokens = calloc(d->context, sizeof *d->tokens);
    d->logits = calloc((1 + d->n_draft) * (size_t)c->vocab_size, sizeof *d->logits);
    d->last = calloc(c->vocab_size, sizeof *d->last);
    d->order = calloc(c->vocab_size, sizeof *d->order);
    if (!d->tokens || !d->logits || !d->last || !d->order) {
        tl_fail(err, "no memory for a conversation");
        goto fail;
    }
    d->settings = (tl_kv_settings){.k_type = o->k_type,
                                   .v_type = o->v_type,
                                   .max_tokens = (uint32_t)d->context,
                                   .window_tokens = (uint32_t)o->window};
    if (o->window)
        d->settings.sink_tokens = o->sinks_given ? (uint32_t)o->sinks : DEFAULT_SINKS;
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
    free(d->last);
    free(d->order);
    *d = (dialog){0};
}

static void count_bytes(dialog *d)
{
    uint64_t bytes = kvt_seq_memory_bytes(d->kv.seq);
    if (bytes > d->counts.most_bytes)
        d->counts.most_bytes = bytes;
}

/* ---- putting away, taking up ---- */

static size_t last_bytes(const dialog *d)
{
    return d->engine->model.config.vocab_size * sizeof *d->last;
}

int dialog_save(dialog *d, const char *path, tl_error *err)
{
    uint64_t n = kvt_seq_length(d->kv.seq);
    if (d->has_last) {
        kvt_status status = kvt_seq_checkpoint(d->kv.seq, d->last, last_bytes(d));
        if (tl_kvt_check(d->kv.cache, status, "checkpoint", err))
            return -1;
    }
    int failed = tl_kvt_check(d->kv.cache, kvt_seq_save(d->kv.seq, path, NULL), "save", err);
    if (d->has_last) /* it shares the last block, which a step would have to copy */
        kvt_seq_checkpoint_drop(d->kv.seq, n);
    return failed;
}

/* The last token's logits; a file without them (or of another model) is told by has_last. */
static void load_last(dialog *d)
{
    uint64_t n = kvt_seq_length(d->kv.seq);
    size_t bytes = 0;
    if (kvt_seq_checkpoint_read(d->kv.seq, n, d->last, last_bytes(d), &bytes) != KVT_OK)
        return;
    d->has_last = n > 0 && bytes == last_bytes(d);
    for (size_t i = 0; d->has_last && i < bytes / sizeof *d->last; i++)
        d->has_last = isfinite(d->last[i]);
    if (d->has_last)
        kvt_seq_checkpoint_drop(d->kv.seq, n);
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
    load_last(d);
    count_bytes(d);
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
    if (info.n_groups && !o->window) {
        o->window = info.groups[0].window_tokens;
        o->sinks = info.groups[0].sink_tokens;
        o->sinks_given = true;
    }
    return 0;
}

/* ---- the prompt ---- */

void dialog_show(const dialog *d, int32_t previous, int32_t token)
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

/*
 * Leave out the oldest tokens behind the first block, in whole blocks: half of them, or as many as
 * `room` tokens need. kvtile moves the others' positions up, so that the next token's is n_tokens
 * again. The first tokens stay because much of the attention rests on them (arXiv 2309.17453).
 */
static int shift(dialog *d, size_t room, tl_error *err)
{
    size_t block = KVT_BLOCK_TOKENS, window = d->settings.window_tokens;
    size_t behind = d->n_tokens > SHIFT_KEEPS ? d->n_tokens - SHIFT_KEEPS : 0;
    /* What a window has released must not come into its sight again. */
    size_t stays = window ? window + 2 * block : 1;
    size_t most = behind > stays ? (behind - stays) / block * block : 0;
    size_t left = d->context - d->n_tokens, n = behind / 2 / block * block;
    if (room > left && n < room - left)
        n = (room - left + block - 1) / block * block;
    d->refused = n > most && room > left + most;
    if (d->refused)
        return tl_fail(err, "%zu tokens do not fit: the context has room for %zu", room,
                       left + most);
    n = n < most ? n : most;
    if (tl_kvt_check(d->kv.cache, kvt_seq_remove(d->kv.seq, SHIFT_KEEPS, n), "shift", err))
        return -1;
    memmove(d->tokens + SHIFT_KEEPS, d->tokens + SHIFT_KEEPS + n, (behind - n) * sizeof *d->tokens);
    d->n_tokens -= n;
    d->session.position = (size_t)kvt_seq_next_position(d->kv.seq);
    if (!d->silent)
        fprintf(stderr, "\n[shifted: %zu tokens left out, %zu kept]\n", n, d->n_tokens);
    return 0;
}

/* Read the conversation's tokens from the session's position on; logits are those of the last. */
static int feed(dialog *d, tl_error *err)
{
    size_t position;
    d->has_last = false;
    while ((position = d->session.position) < d->n_tokens) {
        size_t left = d->n_tokens - position;
        /* The last token is a step of its own, as it is for a prefix out of a store. */
        size_t n = left == 1 ? 1 : left - 1 < PREFILL_TOKENS ? left - 1 : PREFILL_TOKENS;
        if (tl_forward(&d->session, d->tokens + position, n, d->logits, left == 1, err))
            return -1;
        count_bytes(d);
        if (d->n_tokens >= 4 * PREFILL_TOKENS)
            progress("reading the prompt, tokens", position + n, d->n_tokens);
    }
    memcpy(d->last, d->logits, last_bytes(d));
    d->has_last = true;
    return 0;
}

static int add_prompt(dialog *d, const char *prompt, tl_error *err)
{
    int32_t *tokens;
    size_t n;
    if (tl_encode(d->engine->tokenizer, prompt, strlen(prompt), d->n_tokens == 0, &tokens, NULL, &n,
                  err))
        return -1;
    if (n > d->context - d->n_tokens && d->shift && d->n_tokens > 0 && shift(d, n, err)) {
        free(tokens);
        return -1;
    }
    size_t room = d->context - d->n_tokens;
    if (n > room) {
        free(tokens);
        d->refused = true;
        return tl_fail(err, "the prompt has %zu tokens, the context has room for %zu", n, room);
    }
    if (d->echo)
        fputs(prompt, stdout);
    memcpy(d->tokens + d->n_tokens, tokens, n * sizeof *tokens);
    d->n_tokens += n;
    free(tokens);
    return 0;
}

/*
 * The longest prefix of the prompt that the store has, instead of computing it. Without it, and
 * without a store that answers, all is computed.
 */
static void get_prefix(dialog *d)
{
    tl_error why;
    kvt_status status =
        kvt_prefix_get(d->store, d->kv.seq, d->tokens, d->n_tokens, d->prefix_options, &d->got);
    if (tl_kvt_check(d->kv.cache, status, "get", &why)) {
        d->got = (kvt_prefix_result){0};
        fprintf(stderr, "[store: %s]\n", why.text);
    }
    d->session.position = (size_t)d->got.n_tokens;
}

int dialog_read(dialog *d, const char *prompt, tl_error *err)
{
    if (d->n_tokens == 0 || (prompt && *prompt)) {
        if (add_prompt(d, prompt ? prompt : "", err))
            return -1;
    } else if (d->has_last) {
        memcpy(d->logits, d->last, last_bytes(d));
        return 0;
    } else { /* loaded without logits: the same to rounding */
        kvt_status status = kvt_seq_truncate(d->kv.seq, d->n_tokens - 1);
        if (tl_kvt_check(d->kv.cache, status, "truncate", err))
            return -1;
        d->session.position = d->n_tokens - 1;
    }
    if (d->store && d->session.position == 0)
        get_prefix(d);
    return feed(d, err);
}

/* ---- decoding ---- */

bool is_end(int32_t token)
{
    return token == TL_BOS || token == TL_EOS;
}

/* The token behind all others, by row i of the logits, which sampling changes. */
static int32_t next_token(dialog *d, size_t i)
{
    uint32_t vocab = d->engine->model.config.vocab_size;
    memcpy(d->last, d->logits + i * vocab, last_bytes(d));
    d->has_last = true;
    return tl_sample(&d->sampler, d->logits + i * vocab, d->order, vocab, d->n_tokens);
}

static void take(dialog *d, int32_t token)
{
    d->tokens[d->n_tokens++] = token;
    d->counts.tokens++;
    dialog_show(d, d->tokens[d->n_tokens - 2], token);
}

/*
 * How long a draft behind the last token may be. A step must not pass the end of a block of the
 * cache: blocks turn into i8 when a commit has reached their end, and the tokens of one step all
 * see them as they were at its begin.
 */
static size_t draft_room(const dialog *d, size_t wanted)
{
    size_t to_end = (KVT_BLOCK_TOKENS - d->n_tokens % KVT_BLOCK_TOKENS) % KVT_BLOCK_TOKENS;
    size_t room = d->n_draft < wanted ? d->n_draft : wanted;
    room = room < to_end ? room : to_end;
    return room < d->context - d->n_tokens ? room : d->context - d->n_tokens;
}

/*
 * Decode n tokens. A step is the token that was chosen last and a draft of those after it, if there
 * is one: each is then chosen as without a draft, from the logits of the token before it and with
 * its position's random number, until the draft has another. So the text is that of plain decoding,
 * whatever the draft, sampling included. The rest of the draft is dropped.
 */
static int decode(dialog *d, size_t n, tl_error *err)
{
    int32_t token = next_token(d, 0);
    size_t end = d->counts.tokens + n;
    while (d->counts.tokens < end && !is_end(token)) {
        if (d->n_tokens == d->context && (!d->shift || shift(d, 1, err)))
            return d->shift ? -1 : 0;
        size_t first = d->n_tokens;
        take(d, token);
        const int32_t *step = d->tokens + first;
        size_t drafted = tl_draft(d->tokens, d->n_tokens, d->tokens + d->n_tokens,
                                  draft_room(d, end - d->counts.tokens));
        if (tl_step(&d->session, step, 1 + drafted, d->logits, 1 + drafted, err))
            return -1;
        for (size_t i = 0;; i++) {
            token = next_token(d, i);
            if (i == drafted || token != d->tokens[d->n_tokens] || is_end(token))
                break;
            take(d, token);
        }
        size_t kept = d->n_tokens - first;
        if (tl_keep(&d->session, step, kept, err))
            return -1;
        count_bytes(d);
        d->counts.steps++;
        d->counts.drafted += drafted;
        d->counts.accepted += kept - 1;
    }
    return 0;
}

int dialog_turn(dialog *d, const char *prompt, size_t n, tl_error *err)
{
    d->refused = false;
    if ((n > 0 || d->n_tokens == 0 || (prompt && *prompt)) && dialog_read(d, prompt, err))
        return -1;
    if (n == 0)
        return 0;
    double start = seconds();
    if (decode(d, n, err))
        return -1;
    d->counts.seconds += seconds() - start;
    if (d->n_tokens == d->context && !d->shift && !d->silent)
        fprintf(stderr, "\nthe context of %zu tokens is full\n", d->context);
    return 0;
}

void dialog_report(const dialog *d)
{
    const dialog_counts *c = &d->counts;
    size_t n_tokens = (size_t)kvt_seq_length(d->kv.seq);
    uint64_t bytes = kvt_seq_memory_bytes(d->kv.seq);
    uint64_t most = bytes > c->most_bytes ? bytes : c->most_bytes;
    tl_kv_settings whole = d->settings;
    whole.window_tokens = whole.sink_tokens = 0;
    if (d->settings.window_tokens)
        fprintf(stderr,
                "[window of %u tokens, %u sinks: %zu tokens in %.1f KiB, at most %.1f KiB; without "
                "a window %.1f KiB]\n",
                d->settings.window_tokens, d->settings.sink_tokens, n_tokens, (double)bytes / 1024,
                (double)most / 1024,
                (double)tl_kvtile_forecast(&d->engine->model, &whole, n_tokens) / 1024);
    if (d->n_draft && c->steps)
        fprintf(stderr,
                "[drafts: %zu tokens in %zu steps; a step, %.2f of %.2f drafted tokens accepted; "
                "%.0f tokens/s]\n",
                c->tokens, c->steps, (double)c->accepted / (double)c->steps,
                (double)c->drafted / (double)c->steps, (double)c->tokens / c->seconds);
}
