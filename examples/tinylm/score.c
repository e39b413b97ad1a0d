/*
 * The quality of a cache: the same text is fed to several sessions that differ only in their store,
 * and every prediction is compared with the first session's.
 *
 * Recall is the share of answers all of whose tokens are the most likely ones, given the text
 * before them, by the distance from the stated value to the answer.
 */
#include "tinylm.h"

#include "stories.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const uint32_t tl_bin_first[TL_BINS + 1] = {1, 128, 512, 1024, 2048};

/* ---- texts ---- */

/* Index of the token that holds byte `at`. */
static size_t token_at(const uint32_t *ends, size_t n, size_t at)
{
    size_t low = 0, high = n;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (ends[mid] > at)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

int tl_text_story(tl_text *t, const tl_tokenizer *tok, uint64_t seed, size_t max_tokens,
                  tl_error *err)
{
    story s;
    uint32_t *ends = NULL;
    *t = (tl_text){0};
    if (story_make(&s, seed, max_tokens))
        return tl_fail(err, "no memory for a story");
    t->recalls = calloc(s.n_questions + 1, sizeof *t->recalls);
    if (!t->recalls) {
        tl_fail(err, "no memory for a story");
        goto fail;
    }
    if (tl_encode(tok, s.text, s.n_bytes, true, &t->tokens, &ends, &t->n_tokens, err))
        goto fail;
    if (t->n_tokens > max_tokens)
        t->n_tokens = max_tokens;
    for (size_t i = 0; i < s.n_questions; i++) {
        const story_question *q = &s.questions[i];
        size_t begin = token_at(ends, t->n_tokens, q->answer_begin);
        size_t last = token_at(ends, t->n_tokens, q->answer_end - 1u);
        if (last >= t->n_tokens)
            break;
        t->recalls[t->n_recalls++] = (tl_recall){(uint32_t)token_at(ends, t->n_tokens, q->value),
                                                 (uint32_t)begin, (uint32_t)last + 1};
    }
    free(ends);
    story_free(&s);
    return 0;
fail:
    story_free(&s);
    tl_text_free(t);
    return -1;
}

void tl_text_free(tl_text *t)
{
    free(t->tokens);
    free(t->recalls);
    *t = (tl_text){0};
}

/* ---- comparing predictions ---- */

/* One token's predictions, by all stores. Each task writes its own row of results. */
typedef struct prediction {
    double nll, kl;
    int32_t top;
} prediction;

typedef struct comparison {
    const float *logits; /* [n_stores][chunk][vocab] */
    const int32_t *next; /* the tokens to be predicted */
    prediction *results; /* [chunk][n_stores] */
    size_t n_stores, chunk, vocab;
} comparison;

/* ln of the sum of exp(x): the part of log-softmax that is not x. */
static double log_sum(const float *x, size_t n, int32_t *top)
{
    size_t best = 0;
    double sum = 0;
    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    for (size_t i = 0; i < n; i++)
        sum += (double)expf(x[i] - x[best]);
    *top = (int32_t)best;
    return (double)x[best] + log(sum);
}

static void compare_token(void *arg, size_t i)
{
    const comparison *c = arg;
    const float *reference = c->logits + i * c->vocab;
    double reference_sum = 0;
    for (size_t s = 0; s < c->n_stores; s++) {
        const float *x = c->logits + (s * c->chunk + i) * c->vocab;
        prediction *r = &c->results[i * c->n_stores + s];
        double sum = log_sum(x, c->vocab, &r->top);
        r->nll = sum - (double)x[c->next[i]];
        r->kl = 0;
        if (s == 0) {
            reference_sum = sum;
            continue;
        }
        for (size_t k = 0; k < c->vocab; k++) {
            double lp = (double)reference[k] - reference_sum, lq = (double)x[k] - sum;
            if (lp > -40)
                r->kl += (double)expf((float)lp) * (lp - lq);
        }
    }
}

static void count_recalls(tl_score *score, const tl_text *text, const int32_t *top)
{
    for (size_t i = 0; i < text->n_recalls; i++) {
        const tl_recall *r = &text->recalls[i];
        size_t bin = 0, hit = 1;
        while (bin + 1 < TL_BINS && r->begin - r->value >= tl_bin_first[bin + 1])
            bin++;
        for (size_t t = r->begin; t < r->end; t++)
            hit &= top[t - 1] == text->tokens[t];
        score->asked[bin]++;
        score->hits[bin] += hit;
    }
}

int tl_score_text(tl_session *sessions, tl_score *scores, size_t n_stores, const tl_text *text,
                  size_t chunk, tl_error *err)
{
    size_t vocab = sessions[0].model->config.vocab_size, n = text->n_tokens;
    if (n < 2 || n_stores == 0)
        return 0;
    if (chunk > n - 1)
        chunk = n - 1;
    if (vocab > SIZE_MAX / sizeof(float) / chunk / n_stores)
        return tl_fail(err, "steps of %zu tokens are too long for this vocabulary", chunk);
    int status = -1;
    float *logits = malloc(n_stores * chunk * vocab * sizeof *logits);
    prediction *results = malloc(n_stores * chunk * sizeof *results);
    int32_t *tops = malloc(n_stores * n * sizeof *tops);
    if (!logits || !results || !tops) {
        tl_fail(err, "no memory to score %zu tokens", n);
        goto done;
    }
    for (size_t s = 0; s < n_stores; s++) {
        if (sessions[s].kv.ops->clear(sessions[s].kv.self)) {
            tl_fail(err, "clear: %s", sessions[s].kv.ops->error(sessions[s].kv.self));
            goto done;
        }
        sessions[s].position = 0;
    }
    /* The last token is predicted but never fed. */
    for (size_t at = 0; at < n - 1; at += chunk) {
        size_t m = n - 1 - at < chunk ? n - 1 - at : chunk;
        for (size_t s = 0; s < n_stores; s++)
            if (tl_forward(&sessions[s], text->tokens + at, m, logits + s * chunk * vocab, m, err))
                goto done;
        comparison c = {logits, text->tokens + at + 1, results, n_stores, chunk, vocab};
        tl_work_run(sessions[0].work, compare_token, &c, m);
        for (size_t i = 0; i < m; i++) {
            for (size_t s = 0; s < n_stores; s++) {
                const prediction *r = &results[i * n_stores + s];
                scores[s].nll += r->nll;
                scores[s].kl += r->kl;
                scores[s].same_top += r->top == results[i * n_stores].top;
                scores[s].n++;
                tops[s * n + at + i] = r->top;
            }
        }
    }
    for (size_t s = 0; s < n_stores; s++)
        count_recalls(&scores[s], text, tops + s * n);
    status = 0;
done:
    free(logits);
    free(results);
    free(tops);
    return status;
}
