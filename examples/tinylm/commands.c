/* generate, chat, eval and stories. */
#include "app.h"
#include "stories.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const default_prompt = "One morning, Anna and Tom went to the";

/* The turn again without drafts: the same tokens, at another speed. */
static int compare_with_plain(const dialog *drafted, const char *prompt, const options *o,
                              tl_error *err)
{
    dialog d;
    options plain = *o;
    plain.draft = 0;
    if (dialog_open(&d, drafted->engine, &plain, err))
        return -1;
    d.silent = true;
    int status = dialog_turn(&d, prompt, (size_t)o->n, err);
    if (status == 0 && (d.n_tokens != drafted->n_tokens ||
                        memcmp(d.tokens, drafted->tokens, d.n_tokens * sizeof *d.tokens) != 0))
        status = tl_fail(err, "with drafts the text is another than without");
    if (status == 0 && d.counts.steps)
        fprintf(stderr, "[without: the same text, %.0f tokens/s]\n",
                (double)d.counts.tokens / d.counts.seconds);
    dialog_close(&d);
    return status;
}

int cmd_generate(const options *o, tl_error *err)
{
    engine e;
    dialog d;
    const char *prompt = o->prompt ? o->prompt : default_prompt;
    if (engine_open(&e, o, err))
        return -1;
    int status = dialog_open(&d, &e, o, err);
    if (status == 0) {
        d.echo = !o->ids;
        status = dialog_turn(&d, prompt, (size_t)o->n, err);
        if (!o->ids && status == 0)
            printf("\n");
        if (status == 0)
            dialog_report(&d);
        if (status == 0 && o->draft)
            status = compare_with_plain(&d, prompt, o, err);
        dialog_close(&d);
    }
    engine_close(&e);
    return status;
}

/* ---- chat ---- */

/* One line of stdin without its end, or NULL: 0 at the end of the input, else -1. The caller frees
   it. */
static int read_line(char **line, tl_error *err)
{
    size_t n = 0, cap = 0;
    *line = NULL;
    for (;;) {
        int c = getc(stdin);
        if (c == EOF && (n == 0 || ferror(stdin)))
            break;
        if (n + 1 >= cap) {
            char *p = realloc(*line, cap = cap * 2 + 128);
            if (!p) {
                tl_fail(err, "no memory for a line of stdin");
                goto fail;
            }
            *line = p;
        }
        if (c == EOF || c == '\n') {
            (*line)[n] = 0;
            return 0;
        }
        if (c == 0) {
            tl_fail(err, "stdin is no text: a byte of it is 0");
            goto fail;
        }
        (*line)[n++] = (char)c;
    }
    if (!ferror(stdin)) {
        free(*line);
        *line = NULL;
        return 0;
    }
    tl_fail(err, "stdin: %s", strerror(errno));
fail:
    free(*line);
    *line = NULL;
    return -1;
}

/* 1: some were refused, and err says so; the others are there. */
static int chat_turns(dialog *d, const options *o, tl_error *err)
{
    int status = 0;
    size_t n_refused = 0;
    if (o->prompt) {
        status = dialog_turn(d, o->prompt, (size_t)o->n, err);
        if (!o->ids && status == 0)
            printf("\n");
        return status;
    }
    char *line;
    int unread = 0;
    while (status == 0 && (unread = read_line(&line, err)) == 0 && line) {
        status = dialog_turn(d, line, (size_t)o->n, err);
        if (!o->ids && status == 0)
            printf("\n");
        fflush(stdout);
        free(line);
        if (status && d->refused) { /* the conversation is as it was, and is not lost for it */
            fprintf(stderr, "tinylm: %s\n", err->text);
            n_refused++;
            status = 0;
        }
    }
    if (status == 0 && unread)
        return 1; /* what was read is a conversation, and is saved */
    if (status == 0 && n_refused) {
        tl_fail(err, "turns refused: %zu", n_refused);
        return 1;
    }
    return status;
}

int cmd_chat(options *o, tl_error *err)
{
    engine e;
    dialog d;
    if (o->load && snapshot_types(o, err))
        return -1;
    if (engine_open(&e, o, err))
        return -1;
    int status = dialog_open(&d, &e, o, err);
    if (status == 0) {
        if (o->load)
            status = dialog_load(&d, o->load, err);
        if (status == 0 && o->parallel)
            status = dialog_parallel(&d, o->prompt, (size_t)o->parallel, (size_t)o->n, err);
        else if (status == 0)
            status = chat_turns(&d, o, err);
        if (status >= 0)
            dialog_report(&d);
        if (status >= 0 && o->save && dialog_save(&d, o->save, err))
            status = -1;
        dialog_close(&d);
    }
    engine_close(&e);
    return status;
}

/* ---- eval ---- */

/* The text in windows of n_tokens, each with BOS in front; *n_texts of them. */
static int cut_text(const engine *e, const char *path, size_t n_tokens, tl_text **texts,
                    size_t *n_texts, tl_error *err)
{
    uint8_t *data;
    size_t n_bytes, n = 0;
    int32_t *tokens = NULL;
    if (tl_read_file(path, &data, &n_bytes, err))
        return -1;
    int status =
        tl_encode(e->tokenizer, (const char *)data, n_bytes, false, &tokens, NULL, &n, err);
    free(data);
    if (status)
        return -1;
    size_t each = n_tokens - 1, count = (n + each - 1) / each;
    tl_text *all = calloc(count + 1, sizeof *all);
    if (!all)
        goto fail;
    for (size_t i = 0; i < count; i++) {
        size_t m = n - i * each < each ? n - i * each : each;
        all[i].tokens = malloc((m + 1) * sizeof *tokens);
        if (!all[i].tokens)
            goto fail;
        all[i].tokens[0] = TL_BOS;
        memcpy(all[i].tokens + 1, tokens + i * each, m * sizeof *tokens);
        all[i].n_tokens = m + 1;
    }
    free(tokens);
    *texts = all;
    *n_texts = count;
    return 0;
fail:
    for (size_t i = 0; all && i < count; i++)
        tl_text_free(&all[i]);
    free(all);
    free(tokens);
    return tl_fail(err, "no memory for the text");
}

static int eval_texts(const options *o, const engine *e, tl_error *err)
{
    size_t context = e->model.config.seq_len, n_tokens = o->tokens ? (size_t)o->tokens : context;
    size_t n_texts = o->stories ? (size_t)o->stories : 4;
    if (n_tokens > context)
        return tl_fail(err, "--tokens: the model's context has %zu tokens", context);
    if (n_tokens < 2)
        return tl_fail(err, "the model's context of 1 token leaves nothing to predict");
    tl_text *texts = NULL;
    if (o->text && cut_text(e, o->text, n_tokens, &texts, &n_texts, err))
        return -1;

    size_t chunk = o->chunk ? (size_t)o->chunk : PREFILL_TOKENS, longest = 0;
    tl_kvtile kv[2] = {{0}};
    tl_session sessions[2] = {{0}};
    tl_score scores[2] = {{.n = 0}};
    double bytes_per_token[2] = {1, 1};
    const tl_kv_settings settings[2] = {{.k_type = KVT_TYPE_F32, .v_type = KVT_TYPE_F32},
                                        {.k_type = o->k_type, .v_type = o->v_type}};
    int status = -1;
    for (int s = 0; s < 2; s++) {
        if (tl_kvtile_open(&kv[s], &e->model, &settings[s], e->work, err))
            goto done;
        if (tl_session_open(&sessions[s], &e->model, tl_kvtile_store(&kv[s]), e->work, chunk, err))
            goto done;
    }
    for (size_t i = 0; i < n_texts; i++) {
        tl_text made = {0};
        if (!texts &&
            tl_text_story(&made, e->tokenizer, HELD_OUT_SEED + o->seed + i, n_tokens, err))
            goto done;
        const tl_text *t = texts ? &texts[i] : &made;
        int failed = tl_score_text(sessions, scores, 2, t, chunk, err);
        /* A short last window would be mostly padding of its block. */
        for (int k = 0; k < 2 && t->n_tokens >= longest; k++)
            bytes_per_token[k] =
                (double)kvt_seq_memory_bytes(kv[k].seq) / (double)kvt_seq_length(kv[k].seq);
        longest = t->n_tokens > longest ? t->n_tokens : longest;
        tl_text_free(&made);
        if (failed)
            goto done;
        progress("evaluated", i + 1, n_texts);
    }
    if (scores[0].n == 0) {
        tl_fail(err, "the text is too short");
        goto done;
    }
    char name[32];
    snprintf(name, sizeof name, "%s/%s", type_name(o->k_type), type_name(o->v_type));
    table_row rows[2] = {
        {.name = "f32/f32", .bytes_per_token = bytes_per_token[0], .score = &scores[0]},
        {.name = name, .bytes_per_token = bytes_per_token[1], .score = &scores[1]}};
    table_print(rows, 2);
    status = 0;
done:
    for (int s = 0; s < 2; s++) {
        tl_session_close(&sessions[s]);
        tl_kvtile_close(&kv[s]);
    }
    for (size_t i = 0; texts && i < n_texts; i++)
        tl_text_free(&texts[i]);
    free(texts);
    return status;
}

int cmd_eval(const options *o, tl_error *err)
{
    engine e;
    if (engine_open(&e, o, err))
        return -1;
    int status = eval_texts(o, &e, err);
    engine_close(&e);
    return status;
}

/* ---- stories ---- */

int cmd_stories(const options *o, tl_error *err)
{
    uint64_t count = o->stories ? o->stories : 1;
    for (uint64_t i = 0; i < count; i++) {
        story s;
        if (story_make(&s, o->seed + i, o->tokens ? (size_t)o->tokens : 512))
            return tl_fail(err, "no memory for a story");
        printf("%s%s\n", i ? "\n" : "", s.text);
        story_free(&s);
    }
    return 0;
}
