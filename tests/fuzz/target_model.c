/*
 * tinylm's files: a model that is read has finite weights, of the sizes that its header says, and
 * runs; a tokenizer that is read encodes any text to tokens of its own.
 *
 * An input is a model; or a tokenizer behind "TOK", the number of its tokens (1 byte), the length
 * of a text (1 byte) and the text.
 */
#include "fuzz.h"
#include "tinylm.h"

#include <math.h>
#include <stdlib.h>

enum { MOST_TOKENS = 12, TOK_HEAD = 5 };

/* One step of tokens first .. first + n, which succeeds whole or leaves a reason. */
static int step(tl_session *s, const int32_t *tokens, size_t n, float *logits)
{
    tl_error error;
    size_t before = s->position;
    int status;

    error.text[0] = 0;
    status = tl_forward(s, tokens, n, logits, n, &error);
    CHECK(status == 0 ? s->position == before + n : error.text[0] && s->position == before);
    return status;
}

/* Tokens in one step, then one by one, through a cache of a type of the file's last byte. */
static void run(const tl_model *model, const uint8_t *data, size_t size)
{
    static const kvt_type types[][2] = {{KVT_TYPE_F32, KVT_TYPE_F32}, {KVT_TYPE_F16, KVT_TYPE_F16},
                                        {KVT_TYPE_I8, KVT_TYPE_I8},   {KVT_TYPE_I4, KVT_TYPE_I4},
                                        {KVT_TYPE_I4, KVT_TYPE_I5},   {KVT_TYPE_F32, KVT_TYPE_I8}};
    static tl_work *work;
    size_t pick = data[size - 1], n = 1 + pick / 6 % 8;
    tl_kv_settings settings = {types[pick % 6][0], types[pick % 6][1], MOST_TOKENS, 0, 0};
    int32_t tokens[MOST_TOKENS];
    tl_kvtile kv;
    tl_session session;
    tl_error error;
    float *logits;

    if (!work)
        CHECK((work = tl_work_create(1)) != NULL);
    error.text[0] = 0;
    if (tl_kvtile_open(&kv, model, &settings, work, &error) != 0) {
        CHECK(error.text[0] && !kv.cache && !kv.seq);
        return;
    }
    for (size_t i = 0; i < MOST_TOKENS; i++)
        tokens[i] = (int32_t)(data[size - 1 - (i + 1) % size] % model->config.vocab_size);
    logits = malloc(MOST_TOKENS * (size_t)model->config.vocab_size * sizeof *logits);
    CHECK(logits && tl_session_open(&session, model, tl_kvtile_store(&kv), work, n, &error) == 0);
    if (step(&session, tokens, n, logits) == 0)
        for (size_t i = n; i < MOST_TOKENS && step(&session, tokens + i, 1, logits) == 0; i++)
            CHECK(kvt_seq_length(kv.seq) == i + 1);
    CHECK(kvt_seq_length(kv.seq) == session.position);
    /* An unsound token, and what came before it does not matter after a clear. */
    tokens[0] = (int32_t)model->config.vocab_size;
    CHECK(step(&session, tokens, 1, logits) != 0);
    CHECK(session.kv.ops->clear(session.kv.self) == 0 && kvt_seq_length(kv.seq) == 0);
    tl_session_close(&session);
    tl_kvtile_close(&kv);
    free(logits);
}

static int load_model(const uint8_t *data, size_t size)
{
    tl_model model;
    tl_error error;
    int status;

    error.text[0] = 0;
    status = tl_model_load(&model, memory_file(data, size), &error);
    CHECK(status == 0 || (error.text[0] && !model.layers && !model.embedding));
    if (status == 0) {
        const tl_config *c = &model.config;
        CHECK(c->dim == c->n_heads * c->head_dim && c->kv_dim == c->n_kv_heads * c->head_dim);
        CHECK(model.classifier.rows == c->vocab_size && model.classifier.cols == c->dim);
        for (size_t i = 0; i < (size_t)c->vocab_size * c->dim; i++)
            CHECK(isfinite(model.embedding[i]));
        for (uint32_t i = 0; i < c->n_layers; i++)
            CHECK(model.layers[i].w2.cols == c->hidden_dim &&
                  isfinite(model.layers[i].ffn_norm[c->dim - 1]));
        run(&model, data, size);
        tl_model_free(&model);
    }
    return 0;
}

static int load_tokenizer(const uint8_t *data, size_t size)
{
    uint32_t vocab = data[3] ? data[3] : 256, *ends = NULL;
    size_t n_text = data[4], n = 0;
    const char *text = (const char *)data + TOK_HEAD;
    int32_t *tokens = NULL;
    tl_tokenizer *t;
    tl_error error;

    if (n_text > size - TOK_HEAD)
        n_text = size - TOK_HEAD;
    error.text[0] = 0;
    t = tl_tokenizer_load(memory_file(data + TOK_HEAD + n_text, size - TOK_HEAD - n_text), vocab,
                          &error);
    if (!t) {
        CHECK(error.text[0]);
        return 0;
    }
    CHECK(tl_encode(t, text, n_text, true, &tokens, &ends, &n, &error) == 0);
    CHECK(n >= 1 && n <= n_text + 2 && tokens[0] == TL_BOS && ends[0] == 0);
    CHECK(ends[n - 1] == n_text);
    for (size_t i = 1; i < n; i++) {
        size_t n_bytes, sum = 0;
        const char *bytes = tl_decode(t, tokens[i - 1], tokens[i], &n_bytes);
        CHECK(tokens[i] >= 0 && (uint32_t)tokens[i] < vocab && ends[i] >= ends[i - 1]);
        for (size_t b = 0; b < n_bytes; b++)
            sum += (unsigned char)bytes[b];
        CHECK(sum <= 255 * n_bytes); /* reads them */
    }
    for (int32_t id = -1; id <= (int32_t)vocab; id++) {
        size_t n_bytes;
        (void)tl_decode(t, TL_BOS, id, &n_bytes);
        CHECK(n_bytes == 0 || (id >= 0 && id < (int32_t)vocab));
    }
    free(tokens);
    free(ends);
    tl_tokenizer_free(t);
    return 0;
}

int fuzz_model(const uint8_t *data, size_t size)
{
    if (size >= TOK_HEAD && memcmp(data, "TOK", 3) == 0)
        return load_tokenizer(data, size);
    return load_model(data, size);
}
