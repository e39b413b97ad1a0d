/*
 * llama2: a whole inference engine in one file, with kvtile as its K/V cache.
 *
 * It reads a small model of the Llama type, continues a prompt with the most likely tokens, puts
 * the conversation away in a file and takes it up again. What an engine needs is here once, as
 * plainly as it can be written: RMSNorm, RoPE, grouped-query attention, SwiGLU, a tokenizer. What
 * it does not have is attention, a cache, or a file format for one: sections 5 to 8 have the calls
 * that replace them. README.md walks through them.
 *
 *   1  errors            4  the parts of a layer     7  save, restore
 *   2  the model         5  kvtile                   8  drafts
 *   3  the tokenizer     6  the forward pass         9  the program
 *
 * Models: llama2.c's checkpoints (its version 0), such as its stories15M.bin, and tinylm's, which
 * are the same in f16. usage: llama2 MODEL TOKENIZER [options], see `usage` below.
 */
#include <kvtile/kvtile.h>

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- 1. errors ---- */

/* A program of one file ends at the first error; an engine hands it on. Nothing is lost: kvtile's
   calls change nothing when they fail, and a snapshot appears whole or not at all. */
static _Noreturn void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("llama2: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static void *room(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p)
        die("no memory for %zu times %zu bytes", n, size);
    return p;
}

/* ---- 2. the model ---- */

/*
 * A model file is seven int32, then matrix after matrix, each kind for all layers, row-major, in
 * the order of the fields below. A negative vocab_size says that the classifier is a matrix of its
 * own; else it is the embedding. llama2.c's files have f32 weights, and two tables of RoPE that
 * are not used here before the classifier. tinylm's begin with "TLM1", have f16 weights and no
 * tables. All is little-endian.
 */
typedef struct model {
    uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
    uint32_t head_dim, kv_dim;
    float *weights; /* all of them; the others point into it */
    const float *embedding, *att_norm, *wq, *wk, *wv, *wo, *ffn_norm, *w1, *w2, *w3, *final_norm;
    const float *classifier;
    uint64_t fingerprint; /* of the file's bytes */
} model;

static unsigned char *read_file(const char *path, size_t *n_bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        die("%s: cannot be opened", path);
    size_t n = 0, size = 0, got;
    unsigned char *data = NULL;
    do {
        if (n == size) {
            size = size * 2 + (1 << 20);
            data = realloc(data, size);
            if (!data)
                die("%s: no memory for %zu bytes", path, size);
        }
        got = fread(data + n, 1, size - n, f);
        n += got;
    } while (got > 0);
    if (ferror(f))
        die("%s: cannot be read", path);
    fclose(f);
    *n_bytes = n;
    return data;
}

static uint32_t get_u32(const unsigned char *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static float get_f32(const unsigned char *p)
{
    uint32_t bits = get_u32(p);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float get_f16(const unsigned char *p)
{
    unsigned h = p[0] | (unsigned)p[1] << 8, exponent = h >> 10 & 31;
    float fraction = (float)(h & 1023) / 1024;
    float x = exponent == 0    ? ldexpf(fraction, -14)
              : exponent == 31 ? (h & 1023 ? NAN : INFINITY)
                               : ldexpf(1 + fraction, (int)exponent - 15);
    return h & 0x8000 ? -x : x;
}

static void model_load(model *m, const char *path)
{
    size_t n_bytes;
    unsigned char *data = read_file(path, &n_bytes), *p = data;
    bool half = n_bytes >= 4 && memcmp(data, "TLM1", 4) == 0;
    size_t header = half ? 32 : 28, width = half ? 2 : 4;
    uint32_t *sizes[7] = {&m->dim,        &m->hidden_dim, &m->n_layers, &m->n_heads,
                          &m->n_kv_heads, &m->vocab_size, &m->seq_len};
    if (n_bytes < header)
        die("%s: not a model: it ends in its header", path);
    p += header - 28;
    for (int i = 0; i < 7; i++, p += 4)
        *sizes[i] = get_u32(p);
    bool shared = m->vocab_size < 0x80000000u;
    if (!shared)
        m->vocab_size = 0 - m->vocab_size;
    for (int i = 0; i < 7; i++) /* so that no product below overflows */
        if (*sizes[i] == 0 || *sizes[i] > 1 << 20)
            die("%s: not a model: its header has the size %u", path, *sizes[i]);
    if (m->dim % m->n_heads || m->n_heads % m->n_kv_heads || m->dim / m->n_heads % 2 ||
        m->n_layers > 1024)
        die("%s: not a model: dim %u, %u layers, %u heads over %u kv heads", path, m->dim,
            m->n_layers, m->n_heads, m->n_kv_heads);
    m->head_dim = m->dim / m->n_heads;
    m->kv_dim = m->head_dim * m->n_kv_heads;

    uint64_t dim = m->dim, layers = m->n_layers;
    uint64_t tables = half ? 0 : (uint64_t)m->seq_len * m->head_dim, n = 0;
    struct {
        const float **to;
        uint64_t n;
    } parts[] = {{&m->embedding, m->vocab_size * dim},
                 {&m->att_norm, layers * dim},
                 {&m->wq, layers * dim * dim},
                 {&m->wk, layers * m->kv_dim * dim},
                 {&m->wv, layers * m->kv_dim * dim},
                 {&m->wo, layers * dim * dim},
                 {&m->ffn_norm, layers * dim},
                 {&m->w1, layers * m->hidden_dim * dim},
                 {&m->w2, layers * m->hidden_dim * dim},
                 {&m->w3, layers * m->hidden_dim * dim},
                 {&m->final_norm, dim},
                 {&m->classifier, tables + (shared ? 0 : m->vocab_size * dim)}};
    enum { PARTS = sizeof parts / sizeof parts[0] };
    for (int i = 0; i < PARTS; i++)
        n += parts[i].n;
    if (n > n_bytes || n * width + header != n_bytes)
        die("%s: damaged or not a model: its header asks for %llu weights, it has %zu bytes", path,
            (unsigned long long)n, n_bytes);
    float *w = m->weights = room((size_t)n, sizeof *w);
    for (uint64_t i = 0; i < n; i++, p += width)
        w[i] = half ? get_f16(p) : get_f32(p);
    for (int i = 0; i < PARTS; w += parts[i++].n)
        *parts[i].to = w;
    m->classifier = shared ? m->embedding : m->classifier + tables;

    m->fingerprint = UINT64_C(0xCBF29CE484222325); /* FNV-1a */
    for (size_t i = 0; i < n_bytes; i++)
        m->fingerprint = (m->fingerprint ^ data[i]) * UINT64_C(0x100000001B3);
    free(data);
}

/* ---- 3. the tokenizer ---- */

/*
 * llama2.c's tokenizer.bin: the longest token's length, then for each token its score (f32), its
 * length and its bytes. Tokens 1 and 2 begin and end a text; byte b without a token of its own is
 * token 3 + b, whose bytes here are "<0x..>".
 */
enum { BOS = 1, EOS = 2, BYTES = 3 };

typedef struct token {
    float score;
    uint32_t n, id;
    const char *bytes;
} token;

typedef struct tokenizer {
    unsigned char *data;
    uint32_t n, longest;
    token *tokens; /* [n] by id */
    token *sorted; /* [n] by bytes */
} tokenizer;

static int compare(const char *a, size_t na, const char *b, size_t nb)
{
    int order = memcmp(a, b, na < nb ? na : nb);
    return order ? order : (na > nb) - (na < nb);
}

static int compare_tokens(const void *a, const void *b)
{
    const token *x = a, *y = b;
    int order = compare(x->bytes, x->n, y->bytes, y->n);
    return order ? order : (x->id > y->id) - (x->id < y->id);
}

static void tokenizer_load(tokenizer *t, const char *path, uint32_t vocab_size)
{
    size_t n_bytes, at = 4;
    t->data = read_file(path, &n_bytes);
    t->n = vocab_size;
    if (n_bytes < 4 || (n_bytes - 4) / 8 < vocab_size || vocab_size < BYTES + 256)
        die("%s: not a tokenizer of %u tokens", path, vocab_size);
    t->tokens = room(vocab_size, sizeof *t->tokens);
    t->sorted = room(vocab_size, sizeof *t->sorted);
    for (uint32_t i = 0; i < vocab_size; i++) {
        if (n_bytes - at < 8 || get_u32(t->data + at + 4) > n_bytes - at - 8)
            die("%s: damaged, or it has fewer tokens than the model's %u", path, vocab_size);
        t->tokens[i] = (token){get_f32(t->data + at), get_u32(t->data + at + 4), i,
                               (const char *)t->data + at + 8};
        t->longest = t->tokens[i].n > t->longest ? t->tokens[i].n : t->longest;
        at += 8 + t->tokens[i].n;
    }
    if (at != n_bytes)
        die("%s: it has more tokens than the model's %u", path, vocab_size);
    memcpy(t->sorted, t->tokens, vocab_size * sizeof *t->sorted);
    qsort(t->sorted, vocab_size, sizeof *t->sorted, compare_tokens);
}

/* The first token with these bytes; -1: there is none. */
static int32_t find(const tokenizer *t, const char *bytes, size_t n)
{
    uint32_t low = 0, high = t->n;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (compare(t->sorted[middle].bytes, t->sorted[middle].n, bytes, n) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    bool found = low < t->n && !compare(t->sorted[low].bytes, t->sorted[low].n, bytes, n);
    return found ? (int32_t)t->sorted[low].id : -1;
}

/*
 * A space, the characters, then merge after merge: of all neighbours that are a token together the
 * one with the best score, the first of equals. out has room for the text's bytes and 2 more.
 */
static size_t encode(const tokenizer *t, const char *text, bool first, int32_t *out)
{
    size_t n = 0, left = strlen(text);
    int32_t space = left ? find(t, " ", 1) : -1;
    if (first)
        out[n++] = BOS;
    if (space >= 0)
        out[n++] = space;
    for (size_t length; left > 0; text += length, left -= length) {
        for (length = 1; length < 4 && ((unsigned char)text[length] & 0xC0) == 0x80;)
            length++; /* of a character in UTF-8 */
        int32_t id = find(t, text, length);
        for (size_t i = 0; i < (id < 0 ? length : 1); i++)
            out[n++] = id < 0 ? BYTES + (unsigned char)text[i] : id;
    }
    char *joint = room(2, t->longest);
    for (;;) {
        float best = -1e10f;
        size_t where = n;
        int32_t merged = -1;
        for (size_t i = first; i + 1 < n; i++) {
            const token *a = &t->tokens[out[i]], *b = &t->tokens[out[i + 1]];
            memcpy(joint, a->bytes, a->n);
            memcpy(joint + a->n, b->bytes, b->n);
            int32_t id = find(t, joint, a->n + b->n);
            if (id >= 0 && t->tokens[id].score > best) {
                best = t->tokens[id].score;
                where = i;
                merged = id;
            }
        }
        if (where == n)
            break;
        out[where] = merged;
        n--;
        memmove(out + where + 1, out + where + 2, (n - where - 1) * sizeof *out);
    }
    free(joint);
    return n;
}

static void print_token(const tokenizer *t, int32_t previous, int32_t id)
{
    const token *k = &t->tokens[id];
    bool space = previous == BOS && k->n > 0 && k->bytes[0] == ' '; /* encode's own */
    if (k->n == 6 && memcmp(k->bytes, "<0x", 3) == 0)
        putchar(id - BYTES);
    else
        fwrite(k->bytes + space, 1, k->n - space, stdout);
    fflush(stdout);
}

/* ---- 4. the parts of a layer ---- */

/* y[i] = W x[i] for n tokens. The order of a sum does not depend on n, so that a token has the same
   bits whether it comes alone or with others: drafts (section 8) rely on it. */
static void matmul(float *y, const float *w, const float *x, size_t n, size_t rows, size_t cols)
{
    for (size_t r = 0; r < rows; r++, w += cols) {
        for (size_t i = 0; i < n; i++) {
            const float *xi = x + i * cols;
            float s[8] = {0};
            size_t c = 0;
            for (; c + 8 <= cols; c += 8)
                for (int j = 0; j < 8; j++)
                    s[j] += w[c + (size_t)j] * xi[c + (size_t)j];
            for (; c < cols; c++)
                s[0] += w[c] * xi[c];
            y[i * rows + r] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
        }
    }
}

static void rms_norm(float *out, const float *x, const float *weight, size_t n, size_t dim)
{
    for (size_t i = 0; i < n; i++, x += dim, out += dim) {
        float sum = 0;
        for (size_t d = 0; d < dim; d++)
            sum += x[d] * x[d];
        float scale = 1 / sqrtf(sum / (float)dim + 1e-5f);
        for (size_t d = 0; d < dim; d++)
            out[d] = x[d] * scale * weight[d];
    }
}

/* Turn neighbouring dims of each head by its token's position. */
static void rope(float *x, size_t n, size_t position, uint32_t n_heads, uint32_t head_dim)
{
    for (size_t i = 0; i < n; i++)
        for (uint32_t h = 0; h < n_heads; h++, x += head_dim)
            for (uint32_t d = 0; d < head_dim; d += 2) {
                float frequency = 1 / powf(10000, (float)d / (float)head_dim);
                float angle = (float)(position + i) * frequency, c = cosf(angle), s = sinf(angle);
                float a = x[d], b = x[d + 1];
                x[d] = a * c - b * s;
                x[d + 1] = a * s + b * c;
            }
}

static void swiglu(float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++)
        gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
}

/* ---- 5. kvtile ---- */

typedef struct engine {
    model model;
    tokenizer tokenizer;
    kvt_cache *cache; /* how K and V are kept */
    kvt_seq *seq;     /* this conversation's */
    int32_t *text;    /* [seq_len] its token ids; with those that are not in seq yet */
    size_t n_text;
    int32_t next;                             /* the token behind the text, chosen, not yet in it */
    float *x, *h, *q, *o, *k, *v, *gate, *up; /* [seq_len][...], one allocation, x's */
    float *logits;                            /* [KVT_SELECT_TOKENS][vocab_size], its end */
} engine;

/* The cache knows what a call failed of. */
static void check(const engine *e, kvt_status status, const char *what)
{
    char why[400] = "";
    if (status == KVT_OK)
        return;
    kvt_cache_error(e->cache, why, sizeof why);
    die("%s: %s%s%s", what, kvt_status_string(status), *why ? ": " : "", why);
}

static void engine_open(engine *e, kvt_type k_type, kvt_type v_type, uint32_t n_threads)
{
    const model *m = &e->model;
    char why[400] = "";
    /* All layers alike: one group. */
    kvt_group_config group = kvt_group_config_init();
    group.n_layers = m->n_layers;
    group.n_q_heads = m->n_heads;
    group.n_kv_heads = m->n_kv_heads;
    group.k_dim = group.v_dim = m->head_dim;
    group.k_type = k_type;
    group.v_type = v_type;
    kvt_config config = kvt_config_init();
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = m->seq_len;
    config.n_threads = n_threads; /* kvtile's own; an engine that has threads lends them */
    config.fingerprint = &m->fingerprint;
    config.fingerprint_bytes = sizeof m->fingerprint;
    config.error_text = why;
    config.error_text_bytes = sizeof why;
    kvt_status status = kvt_cache_create(&config, &e->cache);
    if (status != KVT_OK)
        die("no cache: %s: %s", kvt_status_string(status), why);
    check(e, kvt_seq_create(e->cache, &e->seq), "no sequence");

    size_t n = m->seq_len, wide = n * m->dim, kv = n * m->kv_dim, hidden = n * m->hidden_dim;
    e->text = room(n, sizeof *e->text);
    e->x = room(4 * wide + 2 * kv + 2 * hidden + (size_t)KVT_SELECT_TOKENS * m->vocab_size, 4);
    e->h = e->x + wide;
    e->q = e->h + wide;
    e->o = e->q + wide;
    e->k = e->o + wide;
    e->v = e->k + kv;
    e->gate = e->v + kv;
    e->up = e->gate + hidden;
    e->logits = e->up + hidden;
}

static void engine_close(engine *e)
{
    kvt_seq_destroy(e->seq);
    kvt_cache_destroy(e->cache);
    free(e->x);
    free(e->text);
    free(e->tokenizer.tokens);
    free(e->tokenizer.sorted);
    free(e->tokenizer.data);
    free(e->model.weights);
}

/* The place of the attention loop: n tokens' keys and values go in, and each of its queries sees
   all tokens up to its own. */
static void attention(engine *e, uint32_t layer, size_t n)
{
    kvt_tensor k = kvt_tensor_f32(e->k), v = kvt_tensor_f32(e->v);
    check(e, kvt_append(e->seq, layer, &k, &v), "append");

    kvt_attend_item item = {.seq = e->seq, .n_queries = n};
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = layer;
    args.flags = KVT_ATTEND_CAUSAL;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(e->q);
    args.out = kvt_tensor_f32(e->o);
    check(e, kvt_attend(e->cache, &args), "attend");
}

/* ---- 6. the forward pass ---- */

/*
 * Run n tokens behind those of the sequence, and leave them pending: `keep` makes them part of it.
 * The logits are those of the last n_logits tokens.
 */
static void forward(engine *e, const int32_t *tokens, size_t n, size_t n_logits)
{
    const model *m = &e->model;
    size_t dim = m->dim, hidden = m->hidden_dim, position = (size_t)kvt_seq_length(e->seq);
    for (size_t i = 0; i < n; i++)
        memcpy(e->x + i * dim, m->embedding + (size_t)tokens[i] * dim, dim * sizeof(float));
    check(e, kvt_seq_begin(e->seq, n, NULL), "begin");
    for (uint32_t l = 0; l < m->n_layers; l++) {
        rms_norm(e->h, e->x, m->att_norm + l * dim, n, dim);
        matmul(e->q, m->wq + l * dim * dim, e->h, n, dim, dim);
        matmul(e->k, m->wk + l * dim * m->kv_dim, e->h, n, m->kv_dim, dim);
        matmul(e->v, m->wv + l * dim * m->kv_dim, e->h, n, m->kv_dim, dim);
        rope(e->q, n, position, m->n_heads, m->head_dim);
        rope(e->k, n, position, m->n_kv_heads, m->head_dim);
        attention(e, l, n);
        matmul(e->h, m->wo + l * dim * dim, e->o, n, dim, dim);
        add(e->x, e->h, n * dim);

        rms_norm(e->h, e->x, m->ffn_norm + l * dim, n, dim);
        matmul(e->gate, m->w1 + l * dim * hidden, e->h, n, hidden, dim);
        matmul(e->up, m->w3 + l * dim * hidden, e->h, n, hidden, dim);
        swiglu(e->gate, e->up, n * hidden);
        matmul(e->h, m->w2 + l * dim * hidden, e->gate, n, dim, hidden);
        add(e->x, e->h, n * dim);
    }
    rms_norm(e->h, e->x + (n - n_logits) * dim, m->final_norm, n_logits, dim);
    matmul(e->logits, m->classifier, e->h, n_logits, m->vocab_size, dim);
}

/* The first n of the pending tokens become part of the sequence, the others leave no trace. */
static void keep(engine *e, const int32_t *tokens, size_t n)
{
    uint64_t indices[KVT_SELECT_TOKENS];
    if (n == kvt_seq_pending(e->seq)) {
        check(e, kvt_seq_commit(e->seq, tokens), "commit");
        return;
    }
    for (size_t i = 0; i < n; i++)
        indices[i] = i;
    check(e, kvt_seq_commit_selected(e->seq, indices, n, tokens), "commit");
}

static int32_t most_likely(const engine *e, size_t row)
{
    const float *logits = e->logits + row * e->model.vocab_size;
    uint32_t best = 0;
    for (uint32_t i = 1; i < e->model.vocab_size; i++)
        if (logits[i] > logits[best])
            best = i;
    return (int32_t)best;
}

/* ---- 7. save, restore ---- */

/*
 * Between two steps the sequence has all of the text, and what else there is is the token that was
 * chosen and not yet run. It goes into the file as a checkpoint's blob, as a sampler's state would:
 * so the restored conversation goes on as this one does, with the same bits and nothing to compute.
 */
static void save(engine *e, const char *path)
{
    check(e, kvt_seq_checkpoint(e->seq, &e->next, sizeof e->next), "checkpoint");
    check(e, kvt_seq_save(e->seq, path, NULL), path);
}

static void restore(engine *e, const char *path)
{
    size_t bytes = 0;
    check(e, kvt_seq_load(e->seq, path, NULL, NULL), path);
    uint64_t n = kvt_seq_length(e->seq);
    if (n == 0 || kvt_seq_checkpoint_read(e->seq, n, &e->next, sizeof e->next, &bytes) != KVT_OK ||
        bytes != sizeof e->next)
        die("%s: not saved by this program", path);
    check(e, kvt_seq_token_ids(e->seq, 0, n, e->text), path);
    check(e, kvt_seq_checkpoint_drop(e->seq, n), path);
    e->n_text = (size_t)n;
    for (size_t i = 0; i <= n; i++) {
        int32_t id = i < n ? e->text[i] : e->next;
        if (id < 0 || (uint32_t)id >= e->model.vocab_size)
            die("%s: not saved by this program", path);
    }
}

/* ---- 8. drafts ---- */

/*
 * Guess the tokens behind the text: those that followed where its last two tokens stood together
 * the last time. They are written behind the text; the answer is how many.
 *
 * A step that passes the end of a block of the cache would see an older block as f16 that plain
 * decoding would see sealed by then, so the draft ends there and the text stays the same, to the
 * bit.
 */
static size_t draft(engine *e, size_t most)
{
    size_t n = e->n_text, left = (KVT_BLOCK_TOKENS - n % KVT_BLOCK_TOKENS) % KVT_BLOCK_TOKENS;
    most = most < left ? most : left;
    most = most < e->model.seq_len - n ? most : e->model.seq_len - n;
    for (size_t at = n - 1; at >= 2; at--) {
        if (e->text[at - 2] != e->text[n - 2] || e->text[at - 1] != e->text[n - 1])
            continue;
        most = most < n - at ? most : n - at;
        memcpy(e->text + n, e->text + at, most * sizeof *e->text);
        return most;
    }
    return 0;
}

/* ---- 9. the program ---- */

static void read_prompt(engine *e, const char *prompt)
{
    int32_t *tokens = room(strlen(prompt) + 2, sizeof *tokens);
    size_t n = encode(&e->tokenizer, prompt, e->n_text == 0, tokens);
    if (n > e->model.seq_len - e->n_text)
        die("the prompt has %zu tokens, the context has room for %zu", n,
            e->model.seq_len - e->n_text);
    fputs(prompt, stdout);
    if (n > 0) {
        forward(e, tokens, n, 1); /* the whole prompt in one step */
        keep(e, tokens, n);
        memcpy(e->text + e->n_text, tokens, n * sizeof *tokens);
        e->n_text += n;
        e->next = most_likely(e, 0);
    }
    free(tokens);
}

/* Each step runs the token that was chosen last, and a draft of those behind it. */
static void generate(engine *e, size_t n, size_t most_drafted)
{
    size_t made = 0, steps = 0;
    while (made < n && e->next != BOS && e->next != EOS && e->n_text < e->model.seq_len) {
        size_t first = e->n_text, kept = 1;
        e->text[e->n_text++] = e->next;
        size_t wanted = n - made - 1 < most_drafted ? n - made - 1 : most_drafted;
        size_t drafted = wanted ? draft(e, wanted) : 0;
        forward(e, e->text + first, 1 + drafted, 1 + drafted);
        while (kept <= drafted && most_likely(e, kept - 1) == e->text[first + kept] &&
               e->text[first + kept] != BOS && e->text[first + kept] != EOS)
            kept++; /* as decoding one by one would have chosen it */
        keep(e, e->text + first, kept);
        e->n_text = first + kept;
        e->next = most_likely(e, kept - 1);
        for (size_t i = first; i < e->n_text; i++)
            print_token(&e->tokenizer, e->text[i - 1], e->text[i]);
        made += kept;
        steps++;
    }
    printf("\n");
    fprintf(stderr, "[%zu tokens in %zu steps; %zu tokens take %.1f KiB]\n", made, steps, e->n_text,
            (double)kvt_seq_memory_bytes(e->seq) / 1024);
}

static const char usage[] =
    "usage: llama2 MODEL TOKENIZER [options]\n"
    "  -p TEXT   the prompt; behind a loaded conversation it goes on with it\n"
    "  -n N      tokens to generate                              (default 100)\n"
    "  -k TYPE   how K is stored: f32, f16, i8, i4               (default i8)\n"
    "  -v TYPE   how V is stored: these or i5                    (default: as K)\n"
    "  -t N      threads of attention                            (default 1)\n"
    "  -d N      draft up to N tokens a step, at most 63         (default 0)\n"
    "  -l FILE   load a conversation\n"
    "  -s FILE   save the conversation at the end\n";

static kvt_type parse_type(const char *text, bool is_v)
{
    static const char *const names[] = {"f32", "f16", "i8", "i4", "i5"};
    for (int i = 0; i < (is_v ? 5 : 4); i++)
        if (!strcmp(text, names[i]))
            return (kvt_type)i;
    die("%s is not a type of %s", text, is_v ? "V" : "K");
}

static size_t parse_number(const char *text, unsigned long most)
{
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || n > most)
        die("%s is not a number from 0 to %lu", text, most);
    return n;
}

int main(int argc, char **argv)
{
    const char *options[128] = {NULL}; /* by letter */
    engine e = {0};
    for (int i = 3; i < argc; i += 2) {
        if (argv[i][0] != '-' || !argv[i][1] || argv[i][2] || !strchr("pnkvtdls", argv[i][1]) ||
            i + 1 == argc) {
            fputs(usage, stderr);
            return 2;
        }
        options[(unsigned char)argv[i][1]] = argv[i + 1];
    }
    if (argc < 3) {
        fputs(usage, stderr);
        return 2;
    }
    const char *prompt = options['p'], *k = options['k'] ? options['k'] : "i8";
    kvt_type k_type = parse_type(k, false),
             v_type = parse_type(options['v'] ? options['v'] : k, true);
    size_t n = options['n'] ? parse_number(options['n'], 1 << 20) : 100;
    size_t n_threads = options['t'] ? parse_number(options['t'], KVT_MAX_THREADS) : 1;
    size_t drafted = options['d'] ? parse_number(options['d'], KVT_SELECT_TOKENS - 1) : 0;

    model_load(&e.model, argv[1]);
    tokenizer_load(&e.tokenizer, argv[2], e.model.vocab_size);
    engine_open(&e, k_type, v_type, (uint32_t)n_threads);
    if (options['l'])
        restore(&e, options['l']);
    if (prompt || !options['l'])
        read_prompt(&e, prompt ? prompt : "One morning, Anna and Tom went to the");
    generate(&e, n, drafted);
    if (options['s'])
        save(&e, options['s']);
    engine_close(&e);
    if (fflush(stdout) || ferror(stdout))
        die("standard output cannot be written");
    return 0;
}
