/* Model, tokenizer and threads for a command, the progress line and the table. */
#include "app.h"

#include <math.h>
#include <stdio.h>
#include <unistd.h>

int engine_open(engine *e, const options *o, tl_error *err)
{
    *e = (engine){0};
    if (tl_model_load(&e->model, o->model, err))
        return -1;
    e->tokenizer = tl_tokenizer_load(o->tokenizer, e->model.config.vocab_size, err);
    if (!e->tokenizer)
        goto fail;
    e->work = tl_work_create((unsigned)o->threads);
    if (!e->work) {
        tl_fail(err, "cannot start %u threads", (unsigned)o->threads);
        goto fail;
    }
    return 0;
fail:
    engine_close(e);
    return -1;
}

void engine_close(engine *e)
{
    tl_work_destroy(e->work);
    tl_tokenizer_free(e->tokenizer);
    tl_model_free(&e->model);
    *e = (engine){0};
}

void progress(const char *what, size_t done, size_t all)
{
    static size_t told; /* quarters */
    bool terminal = isatty(STDERR_FILENO) == 1;
    size_t quarter = done * 4 / all;
    if (!terminal && quarter == told)
        return;
    told = done == all ? 0 : quarter;
    fprintf(stderr, terminal ? "\r%s: %zu of %zu%s" : "%s: %zu of %zu%s", what, done, all,
            !terminal || done == all ? "\n" : "");
}

/* ---- the table ---- */

static double recall(const tl_score *s, size_t first, size_t last)
{
    size_t hits = 0, asked = 0;
    for (size_t i = first; i < last; i++) {
        hits += s->hits[i];
        asked += s->asked[i];
    }
    return asked ? 100.0 * (double)hits / (double)asked : -1;
}

static void print_percent(int width, double x)
{
    if (x < 0)
        printf("%*s", width, "-");
    else
        printf("%*.1f%%", width - 1, x);
}

void table_print(const table_row *rows, size_t n)
{
    const tl_score *reference = rows[0].score;
    double base = exp(reference->nll / (double)reference->n);
    bool extra = rows[0].snapshot_bytes > 0 && rows[0].attend_tokens_per_s > 0;
    printf("%-9s %11s %6s %11s %9s %10s %9s %8s", "K/V", "bytes/token", "ratio", "perplexity",
           "change", "KL to f32", "same top", "recall");
    if (extra)
        printf(" %12s %16s", "snapshot", "attention");
    printf("\n");
    for (size_t i = 0; i < n; i++) {
        const table_row *r = &rows[i];
        const tl_score *s = r->score;
        double perplexity = exp(s->nll / (double)s->n);
        printf("%-9s %11.1f %5.2fx %11.5f %+8.3f%% %10.2e %8.2f%%", r->name, r->bytes_per_token,
               rows[0].bytes_per_token / r->bytes_per_token, perplexity,
               100 * (perplexity / base - 1), s->kl / (double)s->n,
               100.0 * (double)s->same_top / (double)s->n);
        print_percent(9, recall(s, 0, TL_BINS));
        if (extra)
            printf(" %8.0f KiB %8.0f token/s", r->snapshot_bytes / 1024, r->attend_tokens_per_s);
        printf("\n");
    }
    if (recall(reference, 0, TL_BINS) < 0)
        return;
    printf("\nrecall by distance in tokens:\n%-9s", "");
    for (size_t b = 0; b < TL_BINS; b++) {
        char label[32];
        snprintf(label, sizeof label, "%u-%u", tl_bin_first[b], tl_bin_first[b + 1] - 1);
        printf(" %12s", label);
    }
    printf("\n");
    for (size_t i = 0; i < n; i++) {
        printf("%-9s", rows[i].name);
        for (size_t b = 0; b < TL_BINS; b++)
            print_percent(13, recall(rows[i].score, b, b + 1));
        printf("\n");
    }
    printf("%-9s", "of");
    for (size_t b = 0; b < TL_BINS; b++)
        printf(" %12zu", reference->asked[b]);
    printf("\n");
}
