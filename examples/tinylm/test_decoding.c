/*
 * What tinylm shows of kvtile, on the trained model, logits compared bit by bit: drafts and plain
 * decoding, sequences side by side and alone, a window and a mask. And keys that a removal has
 * moved against keys that are turned here.
 *
 * usage: test_decoding MODEL TOKENIZER
 */
#include "stories.h"
#include "tinylm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum { PROMPT = 200, STEP = 64 };

static tl_model model;
static tl_tokenizer *tokenizer;
static tl_work *work;
static size_t vocab;

typedef struct run {
    tl_kvtile kv;
    tl_session session;
} run;

static void open_run(run *r, tl_kv_settings settings)
{
    tl_error err = {""};
    CHECK(tl_kvtile_open(&r->kv, &model, &settings, work, &err) == 0);
    CHECK(tl_session_open(&r->session, &model, tl_kvtile_store(&r->kv), work, STEP, &err) == 0);
}

static void close_run(run *r)
{
    tl_session_close(&r->session);
    tl_kvtile_close(&r->kv);
}

/* Feed tokens in steps of up to `chunk`; logits: [vocab], of the last. */
static void feed(run *r, const int32_t *tokens, size_t n, size_t chunk, float *logits)
{
    for (size_t at = 0, m; at < n; at += m) {
        m = n - at < chunk ? n - at : chunk;
        CHECK(tl_forward(&r->session, tokens + at, m, logits, 1, NULL) == 0);
    }
}

static float *rows(size_t n)
{
    float *x = malloc(n * vocab * sizeof *x);
    CHECK(x);
    return x;
}

static void read_story(tl_text *t, uint64_t seed, size_t n)
{
    CHECK(tl_text_story(t, tokenizer, seed, n + n / 4 + 64, NULL) == 0 && t->n_tokens >= n);
    t->n_tokens = n;
}

static int32_t choose(const tl_sampler *s, const float *logits, size_t position)
{
    static float copy[1 << 16];
    static uint32_t order[1 << 16];
    CHECK(vocab <= 1 << 16);
    memcpy(copy, logits, vocab * sizeof *copy);
    return tl_sample(s, copy, order, vocab, position);
}

/* ---- drafts ---- */

static void test_lookup(void)
{
    static const int32_t text[] = {1, 5, 6, 7, 8, 5, 6, 9, 2, 5, 6, 7, 3, 4, 5, 6};
    int32_t draft[8];
    CHECK(tl_draft(text, 0, draft, 8) == 0 && tl_draft(text, 2, draft, 8) == 0);
    CHECK(tl_draft(text, 16, draft, 0) == 0);
    CHECK(tl_draft(text, 5, draft, 8) == 0);
    /* "5 6" stood three times: the latest counts. */
    CHECK(tl_draft(text, 16, draft, 3) == 3 && memcmp(draft, text + 11, sizeof *draft * 3) == 0);
    CHECK(tl_draft(text, 16, draft, 8) == 5);
    /* "5 6 7" is longer than "6 7". */
    CHECK(tl_draft(text, 12, draft, 1) == 1 && draft[0] == 8);
    static const int32_t same[] = {4, 4, 4, 4, 4};
    CHECK(tl_draft(same, 5, draft, 8) == 1 && draft[0] == 4);
}

/*
 * Decode with steps of a token and a draft: the right one up to a random length, and then wrong
 * tokens. Kept tokens and the logits of each of them equal those of plain decoding, unless a step
 * passes the end of a block.
 */
static void test_drafts(tl_kv_settings settings, const tl_sampler *sampler, uint64_t seed,
                        size_t n_prompt, size_t longest)
{
    enum { N = 200 };
    tl_text t;
    run plain, drafted;
    uint64_t state = seed * 977 + longest;
    float *want = rows(N + 1), *got = rows(STEP);
    int32_t tokens[N + STEP] = {0};
    read_story(&t, seed, n_prompt);
    open_run(&plain, settings);
    open_run(&drafted, settings);
    feed(&plain, t.tokens, n_prompt - 1, STEP, want);
    feed(&plain, t.tokens + n_prompt - 1, 1, 1, want);
    feed(&drafted, t.tokens, n_prompt - 1, STEP, got);
    feed(&drafted, t.tokens + n_prompt - 1, 1, 1, got);
    CHECK(memcmp(want, got, vocab * sizeof *want) == 0);
    for (size_t i = 0; i < N; i++) {
        tokens[i] = choose(sampler, want + i * vocab, n_prompt + i);
        feed(&plain, tokens + i, 1, 1, want + (i + 1) * vocab);
    }
    for (size_t i = 0; i < N;) {
        int32_t step[STEP];
        size_t position = n_prompt + i, to_end = STEP - position % STEP, right, n, kept = 0;
        state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
        n = 1 + (size_t)(state >> 40) % (longest + 1);
        n = n < to_end ? n : to_end;
        n = n < N - i ? n : N - i;
        right = 1 + (size_t)(state >> 20) % n;
        memcpy(step, tokens + i, n * sizeof *step);
        for (size_t k = right; k < n; k++)
            step[k] = (int32_t)((size_t)(step[k] + 1) % vocab);
        CHECK(tl_step(&drafted.session, step, n, got, n, NULL) == 0);
        while (kept < n && step[kept] == tokens[i + kept]) {
            CHECK(memcmp(got + kept * vocab, want + (i + kept + 1) * vocab, vocab * sizeof *got) ==
                  0);
            kept++;
        }
        CHECK(kept == right);
        CHECK(tl_keep(&drafted.session, step, kept, NULL) == 0);
        i += kept;
        CHECK(kvt_seq_length(drafted.kv.seq) == n_prompt + i &&
              drafted.session.position == n_prompt + i);
    }
    close_run(&plain);
    close_run(&drafted);
    tl_text_free(&t);
    free(want);
    free(got);
}

/* ---- side by side ---- */

/* Forks decode other tokens in one batch: each has the logits that it has alone. */
static void test_batch(tl_kv_settings settings, size_t n_prompt)
{
    enum { N = 5, TOKENS = 100 };
    tl_text prompt, texts[N];
    run shared, alone;
    float *got = rows(N * TOKENS), *want = rows(1);
    tl_batch batch = {.config = &model.config, .n_seqs = N};
    tl_session session;
    read_story(&prompt, 11, n_prompt);
    open_run(&shared, settings);
    feed(&shared, prompt.tokens, n_prompt, STEP, want);
    batch.cache = shared.kv.cache;
    for (size_t i = 0; i < N; i++) {
        read_story(&texts[i], 100 + i, TOKENS);
        if (i == 0)
            batch.seqs[i] = shared.kv.seq;
        else
            CHECK(kvt_seq_fork(shared.kv.seq, n_prompt, &batch.seqs[i]) == KVT_OK);
    }
    CHECK(tl_session_open(&session, &model, tl_batch_store(&batch), work, N, NULL) == 0);
    session.side_by_side = true;
    session.position = n_prompt;
    for (size_t at = 0; at < TOKENS; at++) {
        int32_t tokens[N];
        for (size_t i = 0; i < N; i++)
            tokens[i] = texts[i].tokens[at];
        CHECK(tl_forward(&session, tokens, N, got + at * N * vocab, N, NULL) == 0);
    }
    CHECK(tl_forward(&session, prompt.tokens, N - 1, want, 0, NULL) == -1);
    tl_session_close(&session);

    kvt_cache_stats cache = {.struct_size = sizeof cache};
    CHECK(kvt_cache_get_stats(shared.kv.cache, &cache) == KVT_OK && cache.bytes_shared > 0);
    for (size_t i = 0; i < N; i++) {
        kvt_seq_stats stats = {.struct_size = sizeof stats};
        CHECK(kvt_seq_get_stats(batch.seqs[i], &stats) == KVT_OK);
        CHECK(stats.shared_bytes == cache.bytes_shared);
        CHECK(stats.own_bytes + stats.shared_bytes == kvt_seq_memory_bytes(batch.seqs[i]));
    }
    for (size_t i = 0; i < N; i++) {
        open_run(&alone, settings);
        feed(&alone, prompt.tokens, n_prompt, STEP, want);
        for (size_t at = 0; at < TOKENS; at++) {
            feed(&alone, texts[i].tokens + at, 1, 1, want);
            CHECK(memcmp(want, got + (at * N + i) * vocab, vocab * sizeof *want) == 0);
        }
        close_run(&alone);
        if (i > 0)
            kvt_seq_destroy(batch.seqs[i]);
        tl_text_free(&texts[i]);
    }
    close_run(&shared);
    tl_text_free(&prompt);
    free(got);
    free(want);
}

/* ---- windows ---- */

/* A store without a window whose attention is given one as an explicit mask. */
typedef struct masked {
    tl_kvtile *kv;
    size_t window, sinks;
    uint8_t mask[STEP][256];
} masked;

static int masked_begin(void *self, size_t n)
{
    masked *m = self;
    return tl_kvtile_store(m->kv).ops->begin(m->kv, n);
}

static int masked_append(void *self, uint32_t layer, const float *k, const float *v, size_t n)
{
    masked *m = self;
    return tl_kvtile_store(m->kv).ops->append(m->kv, layer, k, v, n);
}

static int masked_attend(void *self, uint32_t layer, const float *q, float *out, size_t n)
{
    masked *m = self;
    size_t all = (size_t)kvt_seq_length(m->kv->seq) + n;
    CHECK(all <= sizeof m->mask[0] * 8 && n <= STEP);
    memset(m->mask, 0, sizeof m->mask);
    for (size_t i = 0; i < n; i++) {
        size_t position = all - n + i;
        for (size_t t = 0; t <= position; t++)
            if (position - t < m->window || t < m->sinks)
                m->mask[i][t / 8] |= (uint8_t)(1u << t % 8);
    }
    kvt_attend_item item = {.seq = m->kv->seq,
                            .n_queries = n,
                            .mask = m->mask[0],
                            .mask_stride = sizeof m->mask[0],
                            .mask_tokens = all};
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = layer;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    return tl_kvt_check(m->kv->cache, kvt_attend(m->kv->cache, &args), "masked", &m->kv->failure);
}

static int masked_commit(void *self, const int32_t *tokens, size_t n)
{
    masked *m = self;
    return tl_kvtile_store(m->kv).ops->commit(m->kv, tokens, n);
}

static const char *masked_error(void *self)
{
    masked *m = self;
    return m->kv->failure.text;
}

static void test_window(tl_kv_settings settings, uint32_t window, uint32_t sinks)
{
    enum { N = 900 };
    static const tl_kv_ops ops = {masked_begin,  masked_append, masked_attend,
                                  masked_commit, NULL,          masked_error};
    static masked mask;
    tl_text t;
    run whole, explicit, windowed;
    float *want = rows(STEP), *got = rows(STEP), *first = rows(STEP);
    uint64_t middle = 0;
    read_story(&t, 21, N);
    open_run(&whole, settings);
    open_run(&explicit, settings);
    mask = (masked){.kv = &explicit.kv, .window = window, .sinks = sinks};
    explicit.session.kv = (tl_kv){&ops, &mask};
    settings.window_tokens = window;
    settings.sink_tokens = sinks;
    open_run(&windowed, settings);
    for (size_t at = 0, n; at < N; at += n) {
        /* Long steps, and single tokens over the end of a block. */
        n = at % 256 < 128 && at + STEP <= N ? STEP - 1 : 1;
        CHECK(tl_forward(&windowed.session, t.tokens + at, n, got, n, NULL) == 0);
        CHECK(tl_forward(&explicit.session, t.tokens + at, n, want, n, NULL) == 0);
        CHECK(memcmp(want, got, n * vocab * sizeof *got) == 0);
        if (at + n <= window) {
            CHECK(tl_forward(&whole.session, t.tokens + at, n, first, n, NULL) == 0);
            CHECK(memcmp(first, got, n * vocab * sizeof *got) == 0);
        }
        if (at < N / 2)
            middle = kvt_seq_memory_bytes(windowed.kv.seq);
    }
    /* Positions and token ids of all tokens stay; keys and values do not. */
    CHECK(kvt_seq_memory_bytes(windowed.kv.seq) < middle + middle / 8);
    CHECK(kvt_seq_memory_bytes(windowed.kv.seq) < kvt_seq_memory_bytes(explicit.kv.seq));
    close_run(&whole);
    close_run(&explicit);
    close_run(&windowed);
    tl_text_free(&t);
    free(want);
    free(got);
    free(first);
}

/* ---- tokens left out ---- */

/*
 * After a removal the model goes on as over a cache that has the same keys, turned back by as many
 * positions as they have moved: what forward.c tells kvtile of its RoPE is right.
 */
static void test_removal(void)
{
    enum { N = 256, GONE = 64, FIRST = 64, LEFT = N - GONE };
    tl_kv_settings settings = {.k_type = KVT_TYPE_F32, .v_type = KVT_TYPE_F32};
    const tl_config *c = &model.config;
    static float k[LEFT * 4096], v[LEFT * 4096];
    tl_text t;
    run moved, turned;
    float *want = rows(1), *got = rows(1);
    CHECK(c->kv_dim <= 4096);
    read_story(&t, 31, N + 8);
    open_run(&moved, settings);
    open_run(&turned, settings);
    feed(&moved, t.tokens, N, STEP, got);
    CHECK(kvt_seq_begin(turned.kv.seq, LEFT, NULL) == KVT_OK);
    for (uint32_t layer = 0; layer < c->n_layers; layer++) {
        for (size_t part = 0; part < 2; part++) {
            size_t from = part ? FIRST + GONE : 0, n = part ? LEFT - FIRST : FIRST;
            kvt_tensor tk = kvt_tensor_f32(k + (part ? FIRST : 0) * c->kv_dim);
            kvt_tensor tv = kvt_tensor_f32(v + (part ? FIRST : 0) * c->kv_dim);
            CHECK(kvt_read(moved.kv.seq, layer, KVT_SIDE_K, from, n, &tk) == KVT_OK);
            CHECK(kvt_read(moved.kv.seq, layer, KVT_SIDE_V, from, n, &tv) == KVT_OK);
        }
        for (size_t at = FIRST * c->kv_dim; at < LEFT * c->kv_dim; at += 2) {
            uint32_t pair = (uint32_t)(at % c->head_dim) / 2;
            double angle = -GONE * (double)tl_inverse_frequency(c, pair);
            double a = (double)k[at], b = (double)k[at + 1];
            k[at] = (float)(a * cos(angle) - b * sin(angle));
            k[at + 1] = (float)(a * sin(angle) + b * cos(angle));
        }
        kvt_tensor tk = kvt_tensor_f32(k), tv = kvt_tensor_f32(v);
        CHECK(kvt_append(turned.kv.seq, layer, &tk, &tv) == KVT_OK);
    }
    CHECK(kvt_seq_commit(turned.kv.seq, NULL) == KVT_OK);
    turned.session.position = LEFT;
    CHECK(kvt_seq_remove(moved.kv.seq, FIRST, GONE) == KVT_OK);
    moved.session.position = (size_t)kvt_seq_next_position(moved.kv.seq);
    CHECK(moved.session.position == LEFT);
    for (size_t i = 0; i < 8; i++) {
        feed(&moved, t.tokens + N + i, 1, 1, got);
        feed(&turned, t.tokens + N + i, 1, 1, want);
        for (size_t j = 0; j < vocab; j++)
            CHECK(fabsf(want[j] - got[j]) < 1e-3f);
    }
    close_run(&moved);
    close_run(&turned);
    tl_text_free(&t);
    free(want);
    free(got);
}

int main(int argc, char **argv)
{
    static const kvt_type types[][2] = {{KVT_TYPE_F32, KVT_TYPE_F32},
                                        {KVT_TYPE_F16, KVT_TYPE_F16},
                                        {KVT_TYPE_I8, KVT_TYPE_I8},
                                        {KVT_TYPE_I8, KVT_TYPE_F16}};
    static const tl_sampler greedy = {.temperature = 0},
                            sampled = {.temperature = 0.8f, .top_p = 0.95f, .seed = 5};
    tl_error err = {""};
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL TOKENIZER\n", argv[0]);
        return 2;
    }
    if (tl_model_load(&model, argv[1], &err) ||
        !(tokenizer = tl_tokenizer_load(argv[2], model.config.vocab_size, &err))) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    work = tl_work_create(2);
    CHECK(work);
    vocab = model.config.vocab_size;
    test_lookup();
    test_removal();
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        if (getenv("KVT_TEST_QUICK") && types[i][1] != KVT_TYPE_I8)
            continue;
        tl_kv_settings settings = {.k_type = types[i][0], .v_type = types[i][1]};
        test_drafts(settings, &greedy, 1, PROMPT, 4);
        test_drafts(settings, &greedy, 2, 50, 7);
        test_drafts(settings, &sampled, 3, 1000, 20);
        test_drafts(settings, &sampled, 4, 130, STEP - 1);
        test_batch(settings, PROMPT);
        test_batch(settings, 192);
        test_window(settings, 200, 4);
        test_window(settings, 64, 0);
        settings.window_tokens = 100;
        settings.sink_tokens = 4;
        test_drafts(settings, &greedy, 6, 300, 7);
        test_batch(settings, 500);
    }
    tl_work_destroy(work);
    tl_tokenizer_free(tokenizer);
    tl_model_free(&model);
    puts("ok");
    return 0;
}
