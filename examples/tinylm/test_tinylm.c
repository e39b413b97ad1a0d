/*
 * tinylm_core without a trained model: damaged files are rejected, both file formats give the same
 * model, encoding equals llama2.c's plain algorithm, matrix products do not depend on their
 * division into chunks, the offsets that stories report are right.
 *
 * usage: test_tinylm MODEL TOKENIZER
 */
#include "stories.h"
#include "tinylm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static char folder[] = "/tmp/tinylm-test-XXXXXX";
static char path[64];
static uint64_t state = 1;

static uint32_t random_below(uint32_t n)
{
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(((state >> 32) * n) >> 32);
}

static void write_file(const uint8_t *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, n, f) == n && fclose(f) == 0);
}

static void put_u32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> 8 * i);
}

/* ---- model files ---- */

static void expect_bad_model(const uint8_t *data, size_t n)
{
    tl_model m;
    tl_error err = {""};
    write_file(data, n);
    CHECK(tl_model_load(&m, path, &err) == -1);
    CHECK(err.text[0] && !strchr(err.text, '\n'));
    CHECK(m.layers == NULL && m.embedding == NULL);
}

enum { DIM = 16, HIDDEN = 24, LAYERS = 2, HEADS = 2, KV_HEADS = 1, VOCAB = 300, SEQ = 32 };

/*
 * A small model, its weights multiples of 1/64 so that f16 holds them exactly. ours: tinylm's file,
 * else llama2.c's with its two tables.
 */
static size_t make_model(uint8_t **out, bool ours, bool shared)
{
    size_t kv = DIM / HEADS * KV_HEADS;
    size_t layers = LAYERS * (2 * DIM + 2 * DIM * DIM + 2 * DIM * kv + 3 * DIM * HIDDEN);
    size_t n = VOCAB * DIM + layers + DIM, tables = ours ? 0 : SEQ * (DIM / HEADS);
    size_t total = n + tables + (shared ? 0 : VOCAB * DIM), width = ours ? 2 : 4;
    size_t header = ours ? 32 : 28;
    uint8_t *p = calloc(header + total * width, 1);
    CHECK(p);
    if (ours)
        memcpy(p, "TLM1", 4);
    const uint32_t h[7] = {DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, shared ? VOCAB : 0u - VOCAB, SEQ};
    for (int i = 0; i < 7; i++)
        put_u32(p + header - 28 + 4 * i, h[i]);
    state = 7;
    for (size_t i = 0; i < total; i++) {
        if (i >= n && i < n + tables)
            continue;
        int k = (int)random_below(63) - 31; /* k / 64 */
        uint8_t *at = p + header + i * width;
        float f = (float)k / 64;
        if (!ours) {
            uint32_t bits;
            memcpy(&bits, &f, 4);
            put_u32(at, bits);
            continue;
        }
        int e = 0;
        float m = frexpf(fabsf(f), &e); /* in [0.5, 1) */
        uint32_t half = k == 0 ? 0 : (uint32_t)(e - 1 + 15) << 10 | ((uint32_t)(m * 2048) & 1023);
        half |= k < 0 ? 0x8000u : 0u;
        at[0] = (uint8_t)half;
        at[1] = (uint8_t)(half >> 8);
    }
    *out = p;
    return header + total * width;
}

static void test_bad_models(bool ours)
{
    uint8_t *data;
    size_t n = make_model(&data, ours, true), header = ours ? 32 : 28;
    expect_bad_model(data, 0);
    for (size_t cut = 1; cut < n; cut += cut < 64 ? 1 : 997)
        expect_bad_model(data, cut);
    expect_bad_model(data, n - 1);
    static const uint32_t bad[] = {0,          1,          3,          255,
                                   65536,      1u << 20,   1u << 24,   0x7FFFFFFF,
                                   0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFF00};
    for (size_t field = 0; field < 7; field++) {
        uint8_t *at = data + header - 28 + 4 * field, keep[4];
        memcpy(keep, at, 4);
        for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
            put_u32(at, bad[i]);
            if (memcmp(at, keep, 4) != 0) {
                /* Another seq_len changes nothing in our file: the only harmless field. */
                if (ours && field == 6 && bad[i] >= 1 && bad[i] <= 1u << 24)
                    continue;
                expect_bad_model(data, n);
            }
        }
        memcpy(at, keep, 4);
    }
    /* A weight that is infinite or not a number. */
    uint8_t *w = data + header + 100 * (ours ? 2 : 4), keep[4];
    memcpy(keep, w, 4);
    if (ours) {
        w[1] = 0x7C;
        w[0] = 0;
    } else {
        put_u32(w, 0x7FC00000);
    }
    expect_bad_model(data, n);
    memcpy(w, keep, 4);
    uint8_t *longer = calloc(n + 1, 1);
    CHECK(longer);
    memcpy(longer, data, n);
    expect_bad_model(longer, n + 1);
    free(longer);
    free(data);
}

/* A session's logits for a few tokens over an f32 cache. */
static void run_model(const tl_model *m, tl_work *work, const float *key_bias, float *logits,
                      size_t n)
{
    int32_t tokens[SEQ];
    tl_error err;
    tl_kv_settings settings = {.k_type = KVT_TYPE_F32, .v_type = KVT_TYPE_F32};
    tl_kvtile kv;
    tl_session s;
    for (size_t i = 0; i < n; i++)
        tokens[i] = (int32_t)(i * 37 % VOCAB);
    CHECK(tl_kvtile_open(&kv, m, &settings, work, &err) == 0);
    CHECK(tl_session_open(&s, m, tl_kvtile_store(&kv), work, SEQ, &err) == 0);
    s.key_bias = key_bias;
    CHECK(tl_forward(&s, tokens, n, logits, n, &err) == 0);
    /* A token that the model does not have and a step beyond the context: errors, not crashes. */
    int32_t bad = VOCAB;
    CHECK(tl_forward(&s, &bad, 1, logits, 0, &err) == -1);
    bad = -1;
    CHECK(tl_forward(&s, &bad, 1, logits, 0, &err) == -1);
    CHECK(tl_forward(&s, tokens, SEQ - n + 1, logits, 0, &err) == -1);
    tl_session_close(&s);
    tl_kvtile_close(&kv);
}

static void test_formats_agree(void)
{
    enum { N = 20 };
    static float a[N * VOCAB], b[N * VOCAB], c[N * VOCAB];
    tl_work *work = tl_work_create(2);
    CHECK(work);
    for (int shared = 0; shared < 2; shared++) {
        float *out[2] = {a, b};
        for (int ours = 0; ours < 2; ours++) {
            uint8_t *data;
            tl_model m;
            tl_error err = {""};
            size_t n = make_model(&data, ours, shared);
            write_file(data, n);
            free(data);
            CHECK(tl_model_load(&m, path, &err) == 0);
            CHECK(m.config.shared_classifier == (bool)shared && m.config.head_dim == DIM / HEADS);
            run_model(&m, work, NULL, out[ours], N);
            /* A constant added to all keys does not change the softmax. */
            float bias[LAYERS * DIM / HEADS * KV_HEADS];
            for (size_t i = 0; i < sizeof bias / sizeof *bias; i++)
                bias[i] = i % 3 ? 0 : 2;
            run_model(&m, work, bias, c, N);
            for (size_t i = 0; i < N * VOCAB; i++)
                CHECK(fabsf(c[i] - out[ours][i]) < 1e-3f);
            CHECK(memcmp(c, out[ours], sizeof c) != 0);
            tl_model_free(&m);
        }
        for (size_t i = 0; i < N * VOCAB; i++)
            CHECK(isfinite(a[i]));
        CHECK(memcmp(a, b, sizeof a) == 0);
    }
    tl_work_destroy(work);
}

/* ---- products ---- */

static void test_products(void)
{
    enum { ROWS = 50, COLS = 300, N = 15 };
    static float panels[4 * COLS * 16], x[N * COLS], y[N * ROWS], z[N * ROWS];
    for (size_t i = 0; i < sizeof x / sizeof *x; i++)
        x[i] = (float)random_below(2000) / 999 - 1;
    for (uint32_t r = 0; r < ROWS; r++)
        for (uint32_t c = 0; c < COLS; c++)
            panels[(r / 16 * COLS + c) * 16 + r % 16] = (float)random_below(2000) / 999 - 1;
    tl_matrix w = {panels, ROWS, COLS};
    tl_work *one = tl_work_create(1), *three = tl_work_create(3);
    CHECK(one && three);
    for (size_t i = 0; i < N; i++)
        tl_matmul(one, &w, x + i * COLS, z + i * ROWS, 1);
    for (size_t n = 1; n <= N; n++) {
        tl_matmul(three, &w, x, y, n);
        CHECK(memcmp(y, z, n * ROWS * sizeof *y) == 0);
    }
    for (size_t i = 0; i < N; i++) {
        for (uint32_t r = 0; r < ROWS; r++) {
            double sum = 0;
            for (uint32_t c = 0; c < COLS; c++)
                sum += (double)panels[(r / 16 * COLS + c) * 16 + r % 16] * (double)x[i * COLS + c];
            CHECK(fabs(sum - (double)y[i * ROWS + r]) < 1e-4);
        }
    }
    tl_work_destroy(one);
    tl_work_destroy(three);
}

/* ---- tokenizer ---- */

static void test_bad_tokenizers(const char *good, uint32_t vocab)
{
    uint8_t *data;
    size_t n;
    tl_error err = {""};
    CHECK(tl_read_file(good, &data, &n, &err) == 0);
    for (size_t cut = 0; cut < n; cut += cut < 32 ? 1 : 211) {
        write_file(data, cut);
        CHECK(tl_tokenizer_load(path, vocab, &err) == NULL && err.text[0]);
    }
    /* Lengths that lie: each of the first bytes set to 0xFF either fails or loads, never crashes.
     */
    for (size_t i = 0; i < 2000 && i < n; i++) {
        uint8_t keep = data[i];
        data[i] = 0xFF;
        write_file(data, n);
        tl_tokenizer_free(tl_tokenizer_load(path, vocab, &err));
        data[i] = keep;
    }
    put_u32(data, 0);
    write_file(data, n);
    CHECK(tl_tokenizer_load(path, vocab, &err) == NULL);
    CHECK(tl_tokenizer_load(good, vocab + 1, &err) == NULL);
    CHECK(tl_tokenizer_load(good, vocab - 1, &err) == NULL);
    CHECK(tl_tokenizer_load("/nowhere/tokenizer.bin", vocab, &err) == NULL);
    CHECK(tl_tokenizer_load(folder, vocab, &err) == NULL);
    free(data);
}

/* llama2.c's encoding, a full pass over the text for each merge. */
static size_t encode_plainly(char **tokens, const float *scores, size_t vocab, const char *text,
                             int32_t *out)
{
    size_t n = 0;
    char joint[256];
    for (const char *p = text; *p; p++) {
        char c[2] = {*p, 0};
        int32_t id = -1;
        for (size_t k = 0; k < vocab && id < 0; k++)
            if (strcmp(tokens[k], c) == 0)
                id = (int32_t)k;
        out[n++] = id >= 0 ? id : 3 + (unsigned char)*p;
    }
    for (;;) {
        float best = -1e10f;
        int32_t best_id = -1;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            snprintf(joint, sizeof joint, "%s%s", tokens[out[i]], tokens[out[i + 1]]);
            for (size_t k = 0; k < vocab; k++) {
                if (scores[k] > best && strcmp(tokens[k], joint) == 0) {
                    best = scores[k];
                    best_id = (int32_t)k;
                    at = i;
                }
            }
        }
        if (best_id < 0)
            return n;
        out[at] = best_id;
        n--;
        memmove(out + at + 1, out + at + 2, (n - at - 1) * sizeof *out);
    }
}

static void test_encoding(const char *file, uint32_t vocab)
{
    static const char *const texts[] = {"The hat of Lily is red.",
                                        "Question: Where is the home of Kit? Answer:",
                                        "  two  spaces\nand a newline",
                                        "xyzzy QQQ aaaa",
                                        "<0x41> \"a\"",
                                        "annannaAnna banana"};
    tl_error err;
    uint8_t *data;
    size_t n_bytes, at = 4;
    CHECK(tl_read_file(file, &data, &n_bytes, &err) == 0);
    char **tokens = calloc(vocab, sizeof *tokens);
    float *scores = calloc(vocab, sizeof *scores);
    CHECK(tokens && scores);
    for (uint32_t i = 0; i < vocab; i++) {
        uint32_t n;
        memcpy(&scores[i], data + at, 4);
        memcpy(&n, data + at + 4, 4);
        tokens[i] = calloc(n + 1, 1);
        CHECK(tokens[i]);
        memcpy(tokens[i], data + at + 8, n);
        at += 8 + n;
    }
    tl_tokenizer *t = tl_tokenizer_load(file, vocab, &err);
    CHECK(t);
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        char padded[128];
        int32_t plain[128], *ids;
        uint32_t *ends;
        size_t n, length = strlen(texts[i]);
        snprintf(padded, sizeof padded, " %s", texts[i]);
        size_t want = encode_plainly(tokens, scores, vocab, padded, plain);
        CHECK(tl_encode(t, texts[i], length, true, &ids, &ends, &n, &err) == 0);
        CHECK(n == want + 1 && ids[0] == TL_BOS && memcmp(ids + 1, plain, want * sizeof *ids) == 0);
        CHECK(ends[n - 1] == length);
        char back[256];
        size_t m = 0;
        for (size_t k = 1; k < n; k++) {
            size_t part;
            const char *s = tl_decode(t, ids[k - 1], ids[k], &part);
            CHECK(m + part < sizeof back);
            memcpy(back + m, s, part);
            m += part;
        }
        CHECK(m == length && memcmp(back, texts[i], m) == 0);
        free(ids);
        free(ends);
    }
    /* Any bytes survive the round trip, broken UTF-8 too. */
    for (int round = 0; round < 200; round++) {
        char text[64], back[80];
        size_t length = random_below(sizeof text), n, m = 0;
        int32_t *ids;
        for (size_t i = 0; i < length; i++)
            text[i] = (char)(round % 2 ? random_below(256) : 0x80 + random_below(128));
        CHECK(tl_encode(t, text, length, true, &ids, NULL, &n, &err) == 0);
        for (size_t k = 1; k < n; k++) {
            size_t part;
            const char *s = tl_decode(t, ids[k - 1], ids[k], &part);
            memcpy(back + m, s, part);
            m += part;
        }
        CHECK(m == length && memcmp(back, text, m) == 0);
        free(ids);
    }
    for (uint32_t i = 0; i < vocab; i++)
        free(tokens[i]);
    free(tokens);
    free(scores);
    free(data);
    tl_tokenizer_free(t);
}

/* ---- stories and sampling ---- */

static void test_stories(void)
{
    for (uint64_t seed = 0; seed < 200; seed++) {
        story a, b;
        size_t words = 48 + (size_t)seed * 13;
        CHECK(story_make(&a, seed, words) == 0 && story_make(&b, seed, words) == 0);
        CHECK(a.n_bytes == b.n_bytes && memcmp(a.text, b.text, a.n_bytes) == 0);
        for (size_t i = 0; i < a.n_questions; i++) {
            const story_question *q = &a.questions[i];
            size_t n = q->answer_end - q->answer_begin;
            CHECK(q->fact < q->value && q->value + n < q->answer_begin &&
                  q->answer_end < a.n_bytes);
            CHECK(memcmp(a.text + q->value, a.text + q->answer_begin, n) == 0);
            CHECK(a.text[q->answer_begin] == ' ' && a.text[q->answer_end] == '.');
            /* Statement and answer share their wording. */
            CHECK(memcmp(a.text + q->fact, a.text + q->answer_begin - (q->value - q->fact),
                         q->value - q->fact) == 0);
        }
        story_free(&a);
        story_free(&b);
    }
}

static void test_sampling(void)
{
    enum { N = 50, DRAWS = 20000 };
    float logits[N], p[N], sum = 0;
    uint32_t order[N], seen[N] = {0};
    for (int i = 0; i < N; i++)
        sum += p[i] = expf(-0.2f * (float)i);
    tl_sampler s = {.temperature = 1, .top_p = 0.9f, .seed = 5};
    for (size_t d = 0; d < DRAWS; d++) {
        for (int i = 0; i < N; i++)
            logits[i] = -0.2f * (float)i;
        seen[tl_sample(&s, logits, order, N, d)]++;
    }
    float mass = 0;
    int nucleus = 0;
    while (mass < 0.9f * sum)
        mass += p[nucleus++];
    for (int i = 0; i < N; i++) {
        double want = i < nucleus ? DRAWS * (double)(p[i] / mass) : 0;
        CHECK(fabs(seen[i] - want) <= 5 * sqrt(want));
    }
    s.temperature = 0;
    for (int i = 0; i < N; i++)
        logits[i] = i == 31 ? 1 : 0;
    CHECK(tl_sample(&s, logits, order, N, 0) == 31);
}

int main(int argc, char **argv)
{
    tl_model m;
    tl_error err = {""};
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL TOKENIZER\n", argv[0]);
        return 2;
    }
    CHECK(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/file", folder);
    if (tl_model_load(&m, argv[1], &err)) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    uint32_t vocab = m.config.vocab_size;
    tl_model_free(&m);
    CHECK(tl_model_load(&m, folder, &err) == -1);
    CHECK(tl_model_load(&m, "/nowhere/model.bin", &err) == -1);
    test_bad_models(false);
    test_bad_models(true);
    test_products();
    test_bad_tokenizers(argv[2], vocab);
    test_encoding(argv[2], vocab);
    test_stories();
    test_sampling();
    test_formats_agree();
    unlink(path);
    rmdir(folder);
    puts("ok");
    return 0;
}
