/*
 * One prompt, computed once: a store of prefixes between processes (kvtile/store.h).
 *
 * Two processes, each with a cache of its own, answer a question about the same story. What a
 * server does for a request is in dialog.c and here:
 *
 *   dialog_read   asks the store for the longest prefix of the prompt that it has (kvt_prefix_get),
 *                 and computes the tokens behind it
 *   put           puts what the store has not got yet (kvt_prefix_put)
 *
 * So the first one computes the story and puts it, and the second one gets it. A store that fails
 * costs a message, and the tokens are computed.
 *
 * What is restored is sealed (docs/design.md, "Open and sealed blocks"): with i8, i4 or i5 the
 * story's newest 64 to 127 tokens are then of these types, where a sequence that has just computed
 * them still has them as f16. So the second text is not that of a cold cache to the bit, but that
 * of a sequence that has computed story and question of the first process itself and was cut back
 * to the tokens that were restored. A third process, without a store, compares the two: the logits
 * behind the question have the same bits.
 */
#define _XOPEN_SOURCE 700 /* nftw */
#include "app.h"
#include "stories.h"

#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    ANSWER_TOKENS = 8,
    QUESTION_WORDS = 512, /* of the story, behind the prefix: has questions about it */
    ROOM = 192,           /* tokens of the context for a question and its answer */
    TTL_SECONDS = 600     /* of values on a server */
};

/* The prompts: the story's beginning, and each time another question about it. */
typedef struct prompts {
    char *text[2], *answer[2];
    size_t question[2]; /* where it begins in the text */
} prompts;

/* What a process says of itself, through a pipe. */
typedef struct served {
    int failed;
    double seconds; /* from the prompt to its logits */
    size_t n_tokens;
    kvt_prefix_result got, put;
    uint64_t logits;   /* a hash of their bits */
    char text[512];    /* the question, and the model's answer */
    char expected[64]; /* the story's */
    bool right;        /* they are the same */
    tl_error err;
} served;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the prompts ---- */

static void prompts_free(prompts *p)
{
    for (int i = 0; i < 2; i++) {
        free(p->text[i]);
        free(p->answer[i]);
    }
}

/* Bytes of the story's whole sentences that have at most n_tokens tokens. */
static int prefix_bytes(const engine *e, const story *s, size_t n_tokens, size_t *bytes,
                        tl_error *err)
{
    int32_t *tokens;
    uint32_t *ends;
    size_t n;
    if (tl_encode(e->tokenizer, s->text, s->n_bytes, true, &tokens, &ends, &n, err))
        return -1;
    size_t end = n <= n_tokens ? s->n_bytes : ends[n_tokens - 1];
    while (end > 0 && s->text[end - 1] != '.')
        end--;
    *bytes = end;
    free(tokens);
    free(ends);
    return 0;
}

/* Two questions about the story's first `bytes` bytes that it has only behind them. */
static int find_prompts(prompts *p, const story *s, size_t bytes, tl_error *err)
{
    int found = 0;
    for (size_t i = 0; i < s->n_questions && found < 2; i++) {
        const story_question *q = &s->questions[i];
        size_t begin = q->answer_begin;
        if (q->fact >= bytes || q->answer_begin <= bytes)
            continue;
        while (begin > bytes && strncmp(s->text + begin, "Question:", 9) != 0)
            begin--;
        size_t n_question = q->answer_begin - begin, n_answer = q->answer_end - q->answer_begin;
        p->question[found] = bytes + 1;
        p->text[found] = calloc(bytes + n_question + 2, 1);
        p->answer[found] = calloc(n_answer + 1, 1);
        if (!p->text[found] || !p->answer[found])
            return tl_fail(err, "no memory for a prompt");
        memcpy(p->text[found], s->text, bytes);
        p->text[found][bytes] = ' ';
        memcpy(p->text[found] + bytes + 1, s->text + begin, n_question);
        memcpy(p->answer[found], s->text + q->answer_begin, n_answer);
        found++;
    }
    return found == 2 ? 0 : tl_fail(err, "no two questions about the story; try another --seed");
}

static int make_prompts(prompts *p, const engine *e, const options *o, tl_error *err)
{
    size_t context = e->model.config.seq_len, most = context > ROOM ? context - ROOM : 0, bytes;
    size_t n_tokens = o->tokens ? (size_t)o->tokens : most;
    story s;
    if (most == 0)
        return tl_fail(err, "the model's context of %zu tokens has no room for an answer", context);
    if (n_tokens > most)
        return tl_fail(err, "--prefix-tokens: at most %zu with the model's context of %zu", most,
                       context);
    if (story_make(&s, HELD_OUT_SEED + o->seed, n_tokens + QUESTION_WORDS))
        return tl_fail(err, "no memory for a story");
    int status = prefix_bytes(e, &s, n_tokens, &bytes, err);
    if (status == 0)
        status = find_prompts(p, &s, bytes, err);
    story_free(&s);
    return status;
}

/* ---- the store ---- */

static const char scheme[] = "redis://";

static bool is_redis(const char *name)
{
    return strncmp(name, scheme, sizeof scheme - 1) == 0;
}

/* What is behind redis://: a host, and a port or none (0). */
static int parse_server(const char *name, char host[256], unsigned *port, tl_error *err)
{
    const char *at = name + sizeof scheme - 1;
    size_t n = strcspn(at, ":/@"), digits = 0;
    *port = 0;
    if (n > 0 && n < 256) {
        memcpy(host, at, n);
        host[n] = 0;
        if (!at[n])
            return 0;
        digits = strspn(at + n + 1, "0123456789");
        if (at[n] == ':' && digits > 0 && digits < 6 && !at[n + 1 + digits])
            *port = (unsigned)strtoul(at + n + 1, NULL, 10);
    }
    if (*port < 1 || *port > 65535)
        return tl_fail(err, "--store: \"%s\" is not redis://host[:port]", name);
    return 0;
}

/* A directory, or redis://host[:port]. Without one the store stays zeroed. */
static void open_store(kvt_store *store, const char *name)
{
    char text[400] = "", host[256] = "";
    tl_error err;
    kvt_status status;
    if (is_redis(name)) {
        kvt_redis_config config = {.struct_size = sizeof config,
                                   .password = getenv("KVTILE_STORE_PASSWORD"),
                                   .ttl_seconds = TTL_SECONDS,
                                   .error_text = text,
                                   .error_text_bytes = sizeof text};
        unsigned port = 0;
        parse_server(name, host, &port, &err); /* cmd_serve_demo has refused others */
        config.host = host;
        config.port = port;
        status = kvt_store_open_redis(&config, store);
    } else {
        kvt_directory_config config = {.struct_size = sizeof config,
                                       .path = name,
                                       .error_text = text,
                                       .error_text_bytes = sizeof text};
        status = kvt_store_open_directory(&config, store);
    }
    if (status != KVT_OK) {
        memset(store, 0, sizeof *store);
        fprintf(stderr, "[store: %s%s%s]\n", kvt_status_string(status), *text ? ": " : "", text);
    }
}

/* After the answer: nobody waits for it. */
static void put(const dialog *d, kvt_prefix_result *result)
{
    tl_error why;
    kvt_status status = kvt_prefix_put(d->store, d->kv.seq, d->prefix_options, result);
    if (tl_kvt_check(d->kv.cache, status, "put", &why))
        fprintf(stderr, "[store: %s]\n", why.text);
}

/* ---- one process ---- */

/* Prefill of prompt i. */
static int prefill(dialog *d, const prompts *p, int i, served *to)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
    const unsigned char *bytes = (const unsigned char *)d->logits;
    double start = now();
    if (dialog_turn(d, p->text[i], 0, &to->err))
        return -1;
    to->seconds = now() - start;
    to->n_tokens = d->n_tokens;
    to->got = d->got;
    for (size_t k = 0; k < d->engine->model.config.vocab_size * sizeof *d->logits; k++)
        hash = (hash ^ bytes[k]) * UINT64_C(0x100000001b3);
    to->logits = hash;
    return 0;
}

static int answer(dialog *d, const prompts *p, int i, served *to)
{
    size_t first = d->n_tokens, used, begin;
    used = begin =
        (size_t)snprintf(to->text, sizeof to->text, "%.256s |", p->text[i] + p->question[i]);
    if (dialog_turn(d, NULL, ANSWER_TOKENS, &to->err))
        return -1;
    for (size_t k = first; k < d->n_tokens; k++) {
        size_t n;
        const char *s = tl_decode(d->engine->tokenizer, d->tokens[k - 1], d->tokens[k], &n);
        n = n < sizeof to->text - 1 - used ? n : sizeof to->text - 1 - used;
        memcpy(to->text + used, s, n);
        used += n;
    }
    to->text[used] = 0;
    snprintf(to->expected, sizeof to->expected, "%s", p->answer[i]);
    to->right = strncmp(to->text + begin, to->expected, strlen(to->expected)) == 0;
    return 0;
}

/* Answer prompt i with a store. */
static int serve(dialog *d, const prompts *p, int i, served *to)
{
    if (prefill(d, p, i, to) || answer(d, p, i, to))
        return -1;
    if (d->store)
        put(d, &to->put);
    return 0;
}

/* Prompt 0 without a store; then back to the first n_tokens tokens, and prompt 1 behind them. */
static int serve_cut(dialog *d, const prompts *p, uint64_t n_tokens, served *to)
{
    if (prefill(d, p, 0, to) || answer(d, p, 0, to))
        return -1;
    if (tl_kvt_check(d->kv.cache, kvt_seq_truncate(d->kv.seq, n_tokens), "truncate", &to->err))
        return -1;
    d->n_tokens = 0; /* the prompt is read from its beginning, and computed from here on: */
    d->session.position = (size_t)n_tokens;
    return prefill(d, p, 1, to) || answer(d, p, 1, to) ? -1 : 0;
}

/* A process's work. cut: the third one's, with the tokens that the second has got. */
static int work(const options *o, int i, const kvt_prefix_options *prefix, bool cut,
                uint64_t n_tokens, served *to)
{
    engine e;
    dialog d;
    prompts p = {{NULL}, {NULL}, {0}};
    kvt_store store = {0};
    if (engine_open(&e, o, &to->err))
        return -1;
    int status = make_prompts(&p, &e, o, &to->err);
    if (status == 0)
        status = dialog_open(&d, &e, o, &to->err);
    if (status == 0) {
        d.silent = true;
        if (!cut)
            open_store(&store, o->store);
        d.store = store.get ? &store : NULL;
        d.prefix_options = prefix;
        status = cut ? serve_cut(&d, &p, n_tokens, to) : serve(&d, &p, i, to);
        kvt_store_close(&store);
        dialog_close(&d);
    }
    prompts_free(&p);
    engine_close(&e);
    return status;
}

/* The same in a process of its own. */
static int work_elsewhere(const options *o, int i, const kvt_prefix_options *prefix, bool cut,
                          uint64_t n_tokens, served *to, tl_error *err)
{
    int fd[2], status;
    fflush(stdout);
    if (pipe(fd))
        return tl_fail(err, "pipe: %s", strerror(errno));
    pid_t pid = fork(); /* there are no threads yet */
    if (pid < 0) {
        close(fd[0]);
        close(fd[1]);
        return tl_fail(err, "fork: %s", strerror(errno));
    }
    memset(to, 0, sizeof *to);
    if (pid == 0) {
        close(fd[0]);
        to->failed = work(o, i, prefix, cut, n_tokens, to);
        exit(write(fd[1], to, sizeof *to) != (ssize_t)sizeof *to);
    }
    close(fd[1]);
    size_t n = 0;
    ssize_t more;
    while (n < sizeof *to && ((more = read(fd[0], (char *)to + n, sizeof *to - n)) > 0 ||
                              (more < 0 && errno == EINTR)))
        n += more > 0 ? (size_t)more : 0;
    close(fd[0]);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        continue;
    if (n != sizeof *to)
        return tl_fail(err, "a process has ended without a result");
    return to->failed ? tl_fail(err, "%s", to->err.text) : 0;
}

/* ---- the demo ---- */

static void report(const char *name, const served *s)
{
    printf("%s process: %zu tokens, %llu of them from the store (%.1f KiB); prefill %.1f ms; "
           "put %llu values, %.1f KiB\n",
           name, s->n_tokens, (unsigned long long)s->got.n_tokens, (double)s->got.n_bytes / 1024,
           1e3 * s->seconds, (unsigned long long)s->put.n_values, (double)s->put.n_bytes / 1024);
    printf("  %s\n", s->text);
    if (!s->right)
        printf("  (the story says%s)\n", s->expected);
}

static int demo(const options *o, tl_error *err)
{
    /* A name space of this run's own: in a store that has been used before, too, the first process
       has to compute. */
    char name_space[80];
    int n = snprintf(name_space, sizeof name_space, "tinylm serve-demo %ld %lld", (long)getpid(),
                     (long long)time(NULL));
    kvt_prefix_options prefix = {
        .struct_size = sizeof prefix, .name_space = name_space, .name_space_bytes = (size_t)n};
    served first, second, cut;
    if (work_elsewhere(o, 0, &prefix, false, 0, &first, err))
        return -1;
    report("first", &first);
    if (work_elsewhere(o, 1, &prefix, false, 0, &second, err))
        return -1;
    report("second", &second);
    if (work_elsewhere(o, 1, NULL, true, second.got.n_tokens, &cut, err))
        return -1;
    bool same = second.logits == cut.logits && strcmp(second.text, cut.text) == 0;
    if (second.got.n_tokens)
        printf("prefill: %.1f times as fast, %.1f ms saved\n", first.seconds / second.seconds,
               1e3 * (first.seconds - second.seconds));
    else
        printf("prefill: nothing came from the store\n");
    printf("a sequence that computed the first %llu tokens itself: %s\n",
           (unsigned long long)second.got.n_tokens,
           same ? "the same logits, the same text" : "ANOTHER TEXT");
    return same ? 0 : tl_fail(err, "the restored prefix was continued differently");
}

static int remove_entry(const char *path, const struct stat *status, int flag, struct FTW *at)
{
    (void)status;
    (void)flag;
    (void)at;
    return remove(path);
}

int cmd_serve_demo(const options *o, tl_error *err)
{
    options mine = *o;
    const char *tmpdir = getenv("TMPDIR");
    char folder[400], host[256];
    unsigned port;
    if (o->store && is_redis(o->store) && parse_server(o->store, host, &port, err))
        return -1;
    if (!tmpdir || !*tmpdir || strlen(tmpdir) > 300)
        tmpdir = "/tmp";
    snprintf(folder, sizeof folder, "%s/tinylm-store-XXXXXX", tmpdir);
    if (!o->store && !mkdtemp(folder))
        return tl_fail(err, "%s: %s", folder, strerror(errno));
    if (!o->store)
        mine.store = folder;
    if (!o->k_given)
        mine.k_type = KVT_TYPE_I8;
    if (!o->v_given)
        mine.v_type = KVT_TYPE_I8;
    mine.temperature = 0;
    int status = demo(&mine, err);
    if (!o->store)
        (void)nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return status;
}
