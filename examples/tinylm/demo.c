/*
 * The demo: save, load and storage types on a real model, in a minute.
 *
 * First, a conversation is saved, this program starts itself again, the second process loads and
 * continues the conversation, and its tokens are compared with those of the first process, which
 * continued without interruption. Then a table of memory, speed and quality over the storage types.
 */
#include "app.h"
#include "stories.h"

#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

enum { N_TYPES = 4 /* up to i4 */, CONTINUE_TOKENS = 64, DECODE_TOKENS = 48, REPEATS = 3 };

/* ---- the second process ---- */

/* Run argv and take the integers it prints; -1 when it cannot run or fails. */
static int run_for_ids(char *const argv[], int32_t *ids, size_t room, size_t *n_ids, tl_error *err)
{
    int fd[2];
    pid_t pid;
    posix_spawn_file_actions_t actions;
    if (pipe(fd))
        return tl_fail(err, "pipe: %s", strerror(errno));
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fd[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, fd[0]);
    posix_spawn_file_actions_addclose(&actions, fd[1]);
    int error = posix_spawnp(&pid, argv[0], &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(fd[1]);
    FILE *f = error ? NULL : fdopen(fd[0], "r");
    if (!f)
        close(fd[0]);
    if (error)
        return tl_fail(err, "cannot start %s: %s", argv[0], strerror(error));
    long id;
    *n_ids = 0;
    while (f && *n_ids < room && fscanf(f, "%ld", &id) == 1)
        ids[(*n_ids)++] = (int32_t)id;
    if (f)
        fclose(f);
    int status;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        continue;
    if (!f || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
        return tl_fail(err, "the second process failed");
    return 0;
}

static int continue_elsewhere(const options *o, const char *file, int32_t *ids, size_t *n_ids,
                              tl_error *err)
{
    char n[24], seed[24], threads[24], temperature[32], top_p[32];
    snprintf(n, sizeof n, "%d", CONTINUE_TOKENS);
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)o->seed);
    snprintf(threads, sizeof threads, "%llu", (unsigned long long)o->threads);
    snprintf(temperature, sizeof temperature, "%.17g", o->temperature);
    snprintf(top_p, sizeof top_p, "%.17g", o->top_p);
    /* posix_spawn takes char *const[] but changes nothing. */
    const char *const args[] = {
        o->program,  "chat",    "--load", file,          "--prompt",   "",
        "--ids",     "-n",      n,        "--seed",      seed,         "--threads",
        threads,     "--model", o->model, "--tokenizer", o->tokenizer, "--temperature",
        temperature, "--top-p", top_p,    NULL};
    char *argv[sizeof args / sizeof args[0]];
    memcpy(argv, args, sizeof args);
    return run_for_ids(argv, ids, CONTINUE_TOKENS, n_ids, err);
}

static void print_tokens(const engine *e, const int32_t *tokens, size_t from, size_t to)
{
    for (size_t i = from; i < to; i++) {
        size_t n;
        const char *s = tl_decode(e->tokenizer, i ? tokens[i - 1] : -1, tokens[i], &n);
        fwrite(s, 1, n, stdout);
    }
}

/*
 * Save after the story's beginning, continue here and in a second process, compare. *bytes is the
 * snapshot's size. Returns 1 when the continuations differ.
 */
static int prove(const options *o, const engine *e, const char *prompt, kvt_type type,
                 const char *file, double *bytes, tl_error *err)
{
    dialog d;
    options mine = *o;
    mine.k_type = mine.v_type = type;
    if (dialog_open(&d, e, &mine, err))
        return -1;
    d.silent = true;
    int status = -1;
    int32_t ids[CONTINUE_TOKENS];
    size_t n_ids = 0, saved;
    struct stat st;
    if (dialog_turn(&d, prompt, CONTINUE_TOKENS, err))
        goto done;
    saved = d.n_tokens;
    if (dialog_save(&d, file, err))
        goto done;
    if (stat(file, &st)) {
        tl_fail(err, "%s: %s", file, strerror(errno));
        goto done;
    }
    *bytes = (double)st.st_size;
    if (dialog_turn(&d, NULL, CONTINUE_TOKENS, err))
        goto done;
    if (continue_elsewhere(o, file, ids, &n_ids, err))
        goto done;
    bool same =
        n_ids == d.n_tokens - saved && memcmp(ids, d.tokens + saved, n_ids * sizeof *ids) == 0;
    if (type == KVT_TYPE_F32) {
        size_t prompt_end = saved > CONTINUE_TOKENS ? saved - CONTINUE_TOKENS : 0;
        printf("The story so far ends, and the model goes on:\n  ...");
        print_tokens(e, d.tokens, prompt_end > 30 ? prompt_end - 30 : 0, prompt_end);
        printf(" |");
        print_tokens(e, d.tokens, prompt_end, saved);
        printf(" ...\n\n");
    }
    printf("%s: %zu tokens saved in %.0f KiB; a second process restored them and went on: %s\n",
           type_name(type), saved, *bytes / 1024,
           same ? "the same tokens as without interruption" : "DIFFERENT TOKENS");
    if (type == KVT_TYPE_I8) {
        printf("  ...");
        print_tokens(e, d.tokens, saved, d.n_tokens);
        printf("\n");
    }
    fflush(stdout);
    status = same ? 0 : 1;
done:
    dialog_close(&d);
    return status;
}

/* ---- the table ---- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Tokens a second of attention alone, all layers, decoding at the end of a full context. */
static int time_attention(tl_session *s, tl_kvtile *kv, const tl_text *text, float *logits,
                          double *rate, tl_error *err)
{
    size_t end = text->n_tokens - 1;
    size_t n = end < 2 * DECODE_TOKENS ? end / 2 : DECODE_TOKENS, start = end - n;
    *rate = 0;
    for (int r = 0; r < REPEATS; r++) {
        if (kvt_seq_truncate(kv->seq, start) != KVT_OK)
            return tl_fail(err, "truncate failed");
        s->position = start;
        s->attend_seconds = 0;
        for (size_t i = 0; i < n; i++)
            if (tl_forward(s, text->tokens + start + i, 1, logits, 0, err))
                return -1;
        if ((double)n / s->attend_seconds > *rate)
            *rate = (double)n / s->attend_seconds;
    }
    return 0;
}

static int compare_types(const options *o, const engine *e, const double *snapshots, tl_error *err)
{
    size_t context = e->model.config.seq_len;
    size_t n_tokens = o->tokens ? (size_t)o->tokens : context;
    size_t n_stories = o->stories ? (size_t)o->stories : 16;
    tl_kvtile kv[N_TYPES] = {{0}};
    tl_session sessions[N_TYPES] = {{0}};
    tl_score scores[N_TYPES] = {{0}};
    table_row rows[N_TYPES] = {{0}};
    float *logits = malloc(e->model.config.vocab_size * sizeof *logits);
    int status = -1;
    for (int i = 0; i < N_TYPES; i++) {
        tl_kv_settings settings = {.k_type = (kvt_type)i, .v_type = (kvt_type)i};
        if (tl_kvtile_open(&kv[i], &e->model, &settings, e->work, err))
            goto done;
        if (tl_session_open(&sessions[i], &e->model, tl_kvtile_store(&kv[i]), e->work,
                            PREFILL_TOKENS, err))
            goto done;
    }
    for (size_t k = 0; k < n_stories; k++) {
        tl_text text;
        if (tl_text_story(&text, e->tokenizer, HELD_OUT_SEED + o->seed + k, n_tokens, err))
            goto done;
        int failed = tl_score_text(sessions, scores, N_TYPES, &text, PREFILL_TOKENS, err);
        for (int i = 0; i < N_TYPES && !failed && k + 1 == n_stories; i++) {
            rows[i].name = type_name((kvt_type)i);
            rows[i].score = &scores[i];
            rows[i].snapshot_bytes = snapshots[i];
            rows[i].bytes_per_token =
                (double)kvt_seq_memory_bytes(kv[i].seq) / (double)kvt_seq_length(kv[i].seq);
            failed = !logits || time_attention(&sessions[i], &kv[i], &text, logits,
                                               &rows[i].attend_tokens_per_s, err);
        }
        tl_text_free(&text);
        if (failed)
            goto done;
        progress("stories evaluated with all types", k + 1, n_stories);
    }
    printf("\n%zu held-out stories, %zu tokens; attention: decoding at the end of the context, %u "
           "thread%s\n\n",
           n_stories, scores[0].n, (unsigned)o->threads, o->threads == 1 ? "" : "s");
    table_print(rows, N_TYPES);
    status = 0;
done:
    for (int i = 0; i < N_TYPES; i++) {
        tl_session_close(&sessions[i]);
        tl_kvtile_close(&kv[i]);
    }
    free(logits);
    return status;
}

int cmd_demo(const options *o, tl_error *err)
{
    engine e;
    story s = {0};
    double snapshots[N_TYPES], start = now();
    int status = -1, different = 0;
    const char *tmpdir = getenv("TMPDIR");
    char folder[400], file[440];
    if (!tmpdir || !*tmpdir || strlen(tmpdir) > 300)
        tmpdir = "/tmp";
    snprintf(folder, sizeof folder, "%s/tinylm-demo-XXXXXX", tmpdir);
    if (!mkdtemp(folder))
        return tl_fail(err, "%s: %s", folder, strerror(errno));
    snprintf(file, sizeof file, "%s/conversation.kvt", folder);
    if (engine_open(&e, o, err))
        goto done;
    if (o->tokens > e.model.config.seq_len) {
        tl_fail(err, "--tokens: the model's context has %u tokens", e.model.config.seq_len);
        goto closed;
    }
    /* Half of the context is a generated story, whose facts the continuation can recall. */
    if (story_make(&s, HELD_OUT_SEED + o->seed, e.model.config.seq_len / 2)) {
        tl_fail(err, "no memory for a story");
        goto closed;
    }
    printf("Model: %u layers, %u heads over %u kv heads of %u dims, context %u.\n\n",
           e.model.config.n_layers, e.model.config.n_heads, e.model.config.n_kv_heads,
           e.model.config.head_dim, e.model.config.seq_len);
    for (int i = 0; i < N_TYPES; i++) {
        int r = prove(o, &e, s.text, (kvt_type)i, file, &snapshots[i], err);
        if (r < 0)
            goto closed;
        different |= r;
    }
    if (compare_types(o, &e, snapshots, err))
        goto closed;
    printf("\nin %.1f s\n", now() - start);
    status = different ? tl_fail(err, "a restored conversation went on differently") : 0;
closed:
    story_free(&s);
    engine_close(&e);
done:
    unlink(file);
    rmdir(folder);
    return status;
}
