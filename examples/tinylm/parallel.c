/*
 * chat --parallel: several continuations of one conversation. The prompt is computed once; forks of
 * its sequence share its blocks, and each goes on with blocks of its own. A step decodes one token
 * of all of them in one batch.
 */
#include "app.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct branch {
    kvt_seq *seq;
    int32_t *tokens; /* [n] behind the prompt */
    size_t n_tokens;
    int32_t next; /* the token to be taken */
} branch;

static int32_t choose(dialog *d, const branch *b, size_t i, float *logits)
{
    tl_sampler sampler = d->sampler;
    sampler.seed += i;
    return tl_sample(&sampler, logits, d->order, d->engine->model.config.vocab_size,
                     d->n_tokens + b->n_tokens);
}

/* Decode up to n tokens of each. logits: [n_branches][vocab_size], of the prompt's last token. */
static int decode(dialog *d, branch *branches, size_t n_branches, size_t n, float *logits,
                  tl_error *err)
{
    const tl_config *c = &d->engine->model.config;
    tl_batch batch = {.cache = d->kv.cache, .config = c};
    tl_session session;
    if (tl_session_open(&session, &d->engine->model, tl_batch_store(&batch), d->engine->work,
                        n_branches, err))
        return -1;
    session.side_by_side = true;
    session.position = d->n_tokens;
    for (size_t i = 0; i < n_branches; i++)
        branches[i].next = choose(d, &branches[i], i, logits + i * c->vocab_size);
    int status = 0;
    for (size_t step = 0; step < n && session.position < d->context; step++) {
        size_t live[TL_BATCH];
        int32_t tokens[TL_BATCH];
        batch.n_seqs = 0;
        for (size_t i = 0; i < n_branches; i++) {
            branch *b = &branches[i];
            if (is_end(b->next))
                continue;
            b->tokens[b->n_tokens++] = b->next;
            live[batch.n_seqs] = i;
            tokens[batch.n_seqs] = b->next;
            batch.seqs[batch.n_seqs++] = b->seq;
        }
        if (batch.n_seqs == 0)
            break;
        status = tl_forward(&session, tokens, batch.n_seqs, logits, batch.n_seqs, err);
        if (status)
            break;
        for (size_t k = 0; k < batch.n_seqs; k++)
            branches[live[k]].next =
                choose(d, &branches[live[k]], live[k], logits + k * c->vocab_size);
    }
    if (session.position == d->context)
        fprintf(stderr, "the context of %zu tokens is full\n", d->context);
    tl_session_close(&session);
    return status;
}

static void show(const dialog *d, const branch *b, uint64_t seed)
{
    if (!d->show_ids)
        printf("--- seed %llu\n", (unsigned long long)seed);
    int32_t previous = d->tokens[d->n_tokens - 1];
    for (size_t i = 0; i < b->n_tokens; previous = b->tokens[i++])
        dialog_show(d, previous, b->tokens[i]);
    printf("\n");
}

/* What each has for itself and together with the others; on stderr beside --ids. */
static int show_bytes(const dialog *d, const branch *branches, size_t n_branches, tl_error *err)
{
    FILE *out = d->show_ids ? stderr : stdout;
    kvt_cache_stats cache = {.struct_size = sizeof cache};
    uint64_t alone = 0, held = 0;
    fprintf(out, "\n%-10s %8s %12s %12s\n", "sequence", "tokens", "own", "shared");
    for (size_t i = 0; i < n_branches; i++) {
        kvt_seq_stats seq = {.struct_size = sizeof seq};
        kvt_status status = kvt_seq_get_stats(branches[i].seq, &seq);
        if (tl_kvt_check(d->kv.cache, status, "stats", err))
            return -1;
        fprintf(out, "seed %-5llu %8llu %8.1f KiB %8.1f KiB\n",
                (unsigned long long)(d->sampler.seed + i),
                (unsigned long long)kvt_seq_length(branches[i].seq), (double)seq.own_bytes / 1024,
                (double)seq.shared_bytes / 1024);
        alone += seq.own_bytes + seq.shared_bytes;
        held += seq.own_bytes;
    }
    if (tl_kvt_check(d->kv.cache, kvt_cache_get_stats(d->kv.cache, &cache), "stats", err))
        return -1;
    held += cache.bytes_shared; /* once, however many have them */
    fprintf(out, "%zu separate caches: %.1f KiB; held here: %.1f KiB\n", n_branches,
            (double)alone / 1024, (double)held / 1024);
    return 0;
}

int dialog_parallel(dialog *d, const char *prompt, size_t n_texts, size_t n, tl_error *err)
{
    size_t vocab = d->engine->model.config.vocab_size;
    branch branches[TL_BATCH] = {{0}};
    float *logits = malloc(n_texts * vocab * sizeof *logits);
    int status = -1;
    if (!logits) {
        tl_fail(err, "no memory for %zu texts", n_texts);
        goto done;
    }
    if (dialog_read(d, prompt, err))
        goto done;
    size_t room = d->context - d->n_tokens;
    n = n < room ? n : room;
    for (size_t i = 0; i < n_texts; i++) {
        memcpy(logits + i * vocab, d->logits, vocab * sizeof *logits);
        branches[i].tokens = calloc(n + 1, sizeof *branches[i].tokens);
        if (!branches[i].tokens) {
            tl_fail(err, "no memory for %zu texts", n_texts);
            goto done;
        }
        if (i == 0) {
            branches[i].seq = d->kv.seq;
            continue;
        }
        kvt_status forked = kvt_seq_fork(d->kv.seq, d->n_tokens, &branches[i].seq);
        if (tl_kvt_check(d->kv.cache, forked, "fork", err))
            goto done;
    }
    if (decode(d, branches, n_texts, n, logits, err))
        goto done;
    for (size_t i = 0; i < n_texts; i++)
        show(d, &branches[i], d->sampler.seed + i);
    status = show_bytes(d, branches, n_texts, err);
done:
    for (size_t i = 0; i < n_texts; i++) {
        if (i > 0)
            kvt_seq_destroy(branches[i].seq);
        free(branches[i].tokens);
    }
    free(logits);
    return status;
}
