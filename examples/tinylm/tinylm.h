/*
 * tinylm_core: a small transformer, llama2.c's architecture, with its keys and values in a store
 * that the caller provides.
 *
 * The parts, none of which depends on the ones below it in this list:
 *   tl_work       threads: one parallel-for, shared by the matrix products and by kvtile
 *   tl_model      weights from a llama2.c checkpoint or from tinylm's own f16 file
 *   tl_tokenizer  llama2.c's tokenizer.bin
 *   tl_kv         where K and V live: a table of functions; kvtile's are tl_kvtile and tl_batch
 *   tl_session    one forward pass after the other over a tl_kv
 *   tl_draft      what may come next, looked up in the text so far
 *   tl_sample     the next token from the logits
 *   tl_score      perplexity, divergence and recall of several tl_kv side by side
 *
 * Functions that can fail return 0 or -1 and write one line into a tl_error. Every size in a file
 * is checked against the file's length before anything is allocated.
 */
#ifndef TINYLM_H
#define TINYLM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvtile/kvtile.h>

typedef struct tl_error {
    char text[512];
} tl_error;

/* Write a line into err (which may be NULL); always -1, so that it can be returned. */
__attribute__((format(printf, 2, 3))) int tl_fail(tl_error *err, const char *format, ...);

/* ---- threads ---- */

typedef struct tl_work tl_work;

/* n_threads counts the caller's. NULL when memory or threads are short. */
tl_work *tl_work_create(unsigned n_threads);
void tl_work_destroy(tl_work *work);
unsigned tl_work_threads(const tl_work *work);

/* task(arg, i) for each i < n, in any order; returns when all are done. From any thread, and from a
   task; one caller has the threads, others run theirs alone. */
void tl_work_run(tl_work *work, void (*task)(void *arg, size_t i), void *arg, size_t n);

/* ---- model ---- */

/* llama2.c's header, with the sign of vocab_size as a flag. */
typedef struct tl_config {
    uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
    bool shared_classifier;
    uint32_t head_dim, kv_dim; /* dim / n_heads, head_dim * n_kv_heads */
} tl_config;

/*
 * A matrix ready to be multiplied: rows in panels of 16, [rows / 16][cols][16], so that the
 * innermost loop runs over rows without a horizontal sum. Rows are padded with zeros.
 */
typedef struct tl_matrix {
    float *panels;
    uint32_t rows, cols;
} tl_matrix;

typedef struct tl_layer {
    tl_matrix wq, wk, wv, wo, w1, w2, w3;
    float *att_norm, *ffn_norm; /* [dim] */
} tl_layer;

typedef struct tl_model {
    tl_config config;
    float *embedding; /* [vocab_size][dim] */
    tl_layer *layers;
    float *final_norm;
    tl_matrix classifier;
    uint8_t fingerprint[16]; /* of the file's bytes: two models never share a snapshot */
} tl_model;

int tl_model_load(tl_model *model, const char *path, tl_error *err);
void tl_model_free(tl_model *model);

/* The whole file, refused when empty or above 2^40 bytes. The caller frees *data. */
int tl_read_file(const char *path, uint8_t **data, size_t *n_bytes, tl_error *err);

/* y[i][r] = sum over c of w[r][c] * x[i][c]: the same bits for any n and any thread count. */
void tl_matmul(tl_work *work, const tl_matrix *w, const float *x, float *y, size_t n);

/* ---- tokenizer ---- */

enum { TL_BOS = 1, TL_EOS = 2 };

typedef struct tl_tokenizer tl_tokenizer;

/* vocab_size is the model's; a file with fewer or more tokens belongs to another model. */
tl_tokenizer *tl_tokenizer_load(const char *path, uint32_t vocab_size, tl_error *err);
void tl_tokenizer_free(tl_tokenizer *t);

/*
 * llama2.c's encoding: a space before the text, characters, then the best-scored merges. Bytes
 * without a token become byte tokens. `first` adds BOS in front.
 *
 * ends (may be NULL) receives one array beside *tokens: the offset in the text at which each
 * token ends, so that bytes can be mapped to tokens. The caller frees both.
 */
int tl_encode(const tl_tokenizer *t, const char *text, size_t n_bytes, bool first, int32_t **tokens,
              uint32_t **ends, size_t *n_tokens, tl_error *err);

/*
 * The bytes of a token that follows `previous` (the space after BOS is dropped). Valid until the
 * next call; at most *n_bytes of them, which may include zeros.
 */
const char *tl_decode(tl_tokenizer *t, int32_t previous, int32_t token, size_t *n_bytes);

/* ---- where K and V live ---- */

/*
 * A store of one sequence. Tokens enter in steps: begin(n), then append and attend for each
 * layer, then commit. attend includes the step's tokens, causally. commit keeps the first n tokens
 * of the step and drops the others. Each function returns 0, or -1 with the reason in error().
 *
 * k, v: [n][n_kv_heads][head_dim]; q, out: [n][n_heads][head_dim]; all f32, dense; k and q after
 * RoPE.
 */
typedef struct tl_kv_ops {
    int (*begin)(void *self, size_t n);
    int (*append)(void *self, uint32_t layer, const float *k, const float *v, size_t n);
    int (*attend)(void *self, uint32_t layer, const float *q, float *out, size_t n);
    int (*commit)(void *self, const int32_t *tokens, size_t n);
    int (*clear)(void *self);
    const char *(*error)(void *self);
} tl_kv_ops;

typedef struct tl_kv {
    const tl_kv_ops *ops;
    void *self;
} tl_kv;

/* How kvtile keeps them. What is 0 has its default. */
typedef struct tl_kv_settings {
    kvt_type k_type, v_type;
    uint32_t max_tokens;    /* of a sequence; 0: the model's context */
    uint32_t window_tokens; /* as in kvt_group_config; 0: every token sees all before it */
    uint32_t sink_tokens;
} tl_kv_settings;

/* kvtile as a store. cache and seq are its handles, for calls that tl_kv does not have. */
typedef struct tl_kvtile {
    kvt_cache *cache;
    kvt_seq *seq;
    tl_error failure;
} tl_kvtile;

int tl_kvtile_open(tl_kvtile *kv, const tl_model *model, const tl_kv_settings *settings,
                   tl_work *work, tl_error *err);
void tl_kvtile_close(tl_kvtile *kv);
tl_kv tl_kvtile_store(tl_kvtile *kv);

/* Bytes that a sequence of n_tokens tokens would have; 0 when it cannot be. */
uint64_t tl_kvtile_forecast(const tl_model *model, const tl_kv_settings *settings, size_t n_tokens);

/* 0 for KVT_OK; else -1, and "what: the status: the cache's reason" in err. */
int tl_kvt_check(const kvt_cache *cache, kvt_status status, const char *what, tl_error *err);

enum { TL_BATCH = 16 };

/*
 * Several sequences of one cache side by side as a store: a step of n_seqs tokens is one of each,
 * and attention is one call for all of them. A session over it has `side_by_side` set.
 */
typedef struct tl_batch {
    kvt_cache *cache;
    kvt_seq *seqs[TL_BATCH]; /* the caller's; they may change between steps */
    size_t n_seqs;
    const tl_config *config;
    tl_error failure;
} tl_batch;

tl_kv tl_batch_store(tl_batch *batch);

/* ---- forward ---- */

typedef struct tl_session {
    const tl_model *model;
    tl_work *work;
    tl_kv kv;
    size_t position;       /* of the next token; set it after changing kv behind the session */
    bool side_by_side;     /* a call's tokens are of as many sequences, all of them at `position` */
    const float *key_bias; /* [n_layers][kv_dim] added to K after RoPE, or NULL. A constant added to
                              every key changes no softmax: it makes keys hard to quantize, as
                              the biases of large models do, and leaves the exact output alone */
    double attend_seconds; /* spent in kv's attend, summed */
    size_t max_tokens;     /* of one call of tl_forward */
    float *x, *h, *q, *k, *v, *o, *gate, *up; /* [max_tokens][...] */
    float *angles;                            /* [max_tokens][head_dim / 2][cos, sin] */
} tl_session;

int tl_session_open(tl_session *s, const tl_model *model, tl_kv kv, tl_work *work,
                    size_t max_tokens, tl_error *err);
void tl_session_close(tl_session *s);

/*
 * Run n <= max_tokens tokens at the session's position. logits: [n_logits][vocab_size], of the
 * last n_logits of them. On failure the store may hold a pending step.
 */
int tl_forward(tl_session *s, const int32_t *tokens, size_t n, float *logits, size_t n_logits,
               tl_error *err);

/*
 * The same in two parts, for drafts: tl_step leaves the tokens pending, tl_keep makes the first n
 * of them part of the sequence and drops the others.
 */
int tl_step(tl_session *s, const int32_t *tokens, size_t n, float *logits, size_t n_logits,
            tl_error *err);
int tl_keep(tl_session *s, const int32_t *tokens, size_t n, tl_error *err);

/* Radians that RoPE turns dims 2 * pair and 2 * pair + 1 of a head by, for each position. */
float tl_inverse_frequency(const tl_config *config, uint32_t pair);

/* ---- drafts ---- */

/*
 * Up to `room` tokens that may come next: those that followed the last place where the text's
 * longest possible suffix (of 2 to 16 tokens) stood before. Returns how many.
 */
size_t tl_draft(const int32_t *tokens, size_t n_tokens, int32_t *draft, size_t room);

/* ---- sampling ---- */

typedef struct tl_sampler {
    float temperature; /* 0: the most likely token */
    float top_p;       /* in (0, 1]; 1: no cut */
    uint64_t seed;
} tl_sampler;

/*
 * The token for `position`, from its logits, which are overwritten. The random number is a hash of
 * seed and position, without a state: a conversation that is saved and loaded needs only its seed
 * to continue identically.
 *
 * order is the caller's scratch of n entries.
 */
int32_t tl_sample(const tl_sampler *s, float *logits, uint32_t *order, size_t n, size_t position);

/* ---- scoring ---- */

enum { TL_BINS = 4 };
extern const uint32_t tl_bin_first[TL_BINS + 1]; /* distances in tokens: 1, 128, 512, 1024, 2048 */

/* Where an answer lies in a text, in tokens. */
typedef struct tl_recall {
    uint32_t value;      /* the first token of the value as it was stated */
    uint32_t begin, end; /* the answer's tokens */
} tl_recall;

typedef struct tl_text {
    int32_t *tokens;
    size_t n_tokens;
    tl_recall *recalls;
    size_t n_recalls;
} tl_text;

/* The story of `seed`, cut to max_tokens tokens, BOS included. */
int tl_text_story(tl_text *t, const tl_tokenizer *tok, uint64_t seed, size_t max_tokens,
                  tl_error *err);
void tl_text_free(tl_text *t);

typedef struct tl_score {
    double nll;      /* sum of -ln p(token) */
    double kl;       /* sum of KL(reference || this), nats */
    size_t same_top; /* tokens for which both find the same token most likely */
    size_t n;        /* tokens predicted */
    size_t hits[TL_BINS], asked[TL_BINS];
} tl_score;

/*
 * Feed a text to n_stores sessions side by side, `chunk` tokens at a time, and add to scores.
 * Session 0 is the reference. The stores are cleared first.
 */
int tl_score_text(tl_session *sessions, tl_score *scores, size_t n_stores, const tl_text *text,
                  size_t chunk, tl_error *err);

#endif
