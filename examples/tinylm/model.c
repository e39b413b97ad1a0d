/*
 * Model files: llama2.c's version 0 checkpoint and tinylm's f16 file.
 *
 * Both hold seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len) and
 * then the weights, matrix after matrix, each kind for all layers:
 *
 *   embedding, att_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3, final_norm,
 *   [two RoPE tables of seq_len * head_dim / 2, llama2.c only, not used],
 *   [classifier, only when vocab_size is negative in the file]
 *
 * The f16 file begins with "TLM1" before the integers and has f16 instead of f32 weights. All is
 * little-endian. The header determines the file's size to the byte: a file of another size is
 * rejected before anything is allocated for it.
 */
#include "tinylm.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER_BYTES = 28, MAX_WIDTH = 1 << 20 };

int tl_read_file(const char *path, uint8_t **data, size_t *n_bytes, tl_error *err)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return tl_fail(err, "%s: %s", path, strerror(errno));
    uint8_t *p = NULL;
    long long size = -1;
    if (fseek(f, 0, SEEK_END) == 0)
        size = ftell(f);
    if (size < 0 || fseek(f, 0, SEEK_SET) != 0) {
        tl_fail(err, "%s: not a regular file", path);
        goto fail;
    }
    if (size == 0) {
        tl_fail(err, "%s: the file is empty", path);
        goto fail;
    }
    /* A directory opens on some systems and has an absurd size. */
    if (size > (1LL << 40) || (unsigned long long)size >= SIZE_MAX) {
        tl_fail(err, "%s: not a file, or too large", path);
        goto fail;
    }
    p = malloc((size_t)size + 1);
    if (!p) {
        tl_fail(err, "%s: no memory for its %lld bytes", path, size);
        goto fail;
    }
    if (fread(p, 1, (size_t)size, f) != (size_t)size) {
        tl_fail(err, "%s: cannot be read", path);
        goto fail;
    }
    fclose(f);
    p[size] = 0;
    *data = p;
    *n_bytes = (size_t)size;
    return 0;
fail:
    free(p);
    fclose(f);
    return -1;
}

static uint32_t load_u32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 0) {
        float f = ldexpf((float)mantissa, -24);
        return sign ? -f : f;
    }
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* ---- header ---- */

static int parse_config(tl_config *c, const uint8_t *p, const char *path, tl_error *err)
{
    static const char *const names[7] = {"dim",        "hidden_dim", "n_layers", "n_heads",
                                         "n_kv_heads", "vocab_size", "seq_len"};
    static const uint32_t limits[7] = {MAX_WIDTH, MAX_WIDTH, 1024, 1024, 1024, 1 << 24, 1 << 24};
    uint32_t v[7];
    for (int i = 0; i < 7; i++) {
        v[i] = load_u32(p + 4 * i);
        if (i == 5) {
            c->shared_classifier = v[i] < UINT32_C(0x80000000);
            if (!c->shared_classifier)
                v[i] = 0 - v[i];
        }
        if (v[i] == 0 || v[i] > limits[i])
            return tl_fail(err, "%s: not a model: %s is %lld, not 1 to %lu", path, names[i],
                           (long long)(int32_t)load_u32(p + 4 * i), (unsigned long)limits[i]);
    }
    c->dim = v[0];
    c->hidden_dim = v[1];
    c->n_layers = v[2];
    c->n_heads = v[3];
    c->n_kv_heads = v[4];
    c->vocab_size = v[5];
    c->seq_len = v[6];
    if (c->dim % c->n_heads)
        return tl_fail(err, "%s: not a model: dim %u is no multiple of its %u heads", path, c->dim,
                       c->n_heads);
    if (c->n_kv_heads > c->n_heads || c->n_heads % c->n_kv_heads)
        return tl_fail(err, "%s: not a model: %u heads over %u kv heads", path, c->n_heads,
                       c->n_kv_heads);
    c->head_dim = c->dim / c->n_heads;
    c->kv_dim = c->head_dim * c->n_kv_heads;
    if (c->head_dim % 2)
        return tl_fail(err, "%s: not a model: head dim %u is odd", path, c->head_dim);
    return 0;
}

/*
 * Numbers in the file after the header. With the limits above every product of two sizes is below
 * 2^44 and a layer below 2^45, so the sum over a thousand layers does not overflow 64 bits.
 */
static uint64_t count_weights(const tl_config *c, bool has_tables)
{
    uint64_t dim = c->dim, hidden = c->hidden_dim, kv = c->kv_dim;
    uint64_t layer = 2 * dim + 2 * dim * dim + 2 * dim * kv + 3 * dim * hidden;
    uint64_t n = (uint64_t)c->vocab_size * dim + c->n_layers * layer + dim;
    if (has_tables)
        n += (uint64_t)c->seq_len * c->head_dim;
    if (!c->shared_classifier)
        n += (uint64_t)c->vocab_size * dim;
    return n;
}

/* ---- weights ---- */

/* A cursor over the file's weights. The total was checked, so no read passes the end. */
typedef struct source {
    const uint8_t *p;
    size_t width; /* 2 or 4 bytes a weight */
    bool finite;
} source;

static void take(source *s, float *out, size_t n)
{
    for (size_t i = 0; i < n; i++, s->p += s->width) {
        if (s->width == 2) {
            out[i] = f16_to_f32((uint16_t)(s->p[0] | s->p[1] << 8));
        } else {
            uint32_t bits = load_u32(s->p);
            memcpy(&out[i], &bits, sizeof out[i]);
        }
        /* isfinite, but not removed by -ffinite-math-only in a user's CFLAGS */
        uint32_t bits;
        memcpy(&bits, &out[i], sizeof bits);
        if ((bits & 0x7F800000) == 0x7F800000)
            s->finite = false;
    }
}

static float *take_vector(source *s, size_t n)
{
    float *v = malloc(n * sizeof *v);
    if (v)
        take(s, v, n);
    return v;
}

/* row: scratch of one row. */
static int take_matrix(source *s, tl_matrix *m, uint32_t rows, uint32_t cols, float *row)
{
    size_t n_panels = ((size_t)rows + 15) / 16;
    m->rows = rows;
    m->cols = cols;
    m->panels = calloc(n_panels * cols, 16 * sizeof(float));
    if (!m->panels)
        return -1;
    for (size_t r = 0; r < rows; r++) {
        take(s, row, cols);
        float *panel = m->panels + (r / 16) * cols * 16 + r % 16;
        for (size_t c = 0; c < cols; c++)
            panel[c * 16] = row[c];
    }
    return 0;
}

static int take_weights(tl_model *m, source *s, bool has_tables)
{
    const tl_config *c = &m->config;
    uint32_t widest = c->dim > c->hidden_dim ? c->dim : c->hidden_dim;
    float *row = malloc(widest * sizeof *row);
    int failed = !row;
    const uint8_t *embedding = s->p;
    if (!failed)
        failed |= !(m->embedding = take_vector(s, (size_t)c->vocab_size * c->dim));

#define EACH_LAYER(statement)                                                                      \
    for (uint32_t i = 0; i < c->n_layers && !failed; i++) {                                        \
        tl_layer *l = &m->layers[i];                                                               \
        statement;                                                                                 \
    }
    EACH_LAYER(failed |= !(l->att_norm = take_vector(s, c->dim)))
    EACH_LAYER(failed |= take_matrix(s, &l->wq, c->dim, c->dim, row))
    EACH_LAYER(failed |= take_matrix(s, &l->wk, c->kv_dim, c->dim, row))
    EACH_LAYER(failed |= take_matrix(s, &l->wv, c->kv_dim, c->dim, row))
    EACH_LAYER(failed |= take_matrix(s, &l->wo, c->dim, c->dim, row))
    EACH_LAYER(failed |= !(l->ffn_norm = take_vector(s, c->dim)))
    EACH_LAYER(failed |= take_matrix(s, &l->w1, c->hidden_dim, c->dim, row))
    EACH_LAYER(failed |= take_matrix(s, &l->w2, c->dim, c->hidden_dim, row))
    EACH_LAYER(failed |= take_matrix(s, &l->w3, c->hidden_dim, c->dim, row))
#undef EACH_LAYER
    if (!failed)
        failed |= !(m->final_norm = take_vector(s, c->dim));
    if (has_tables)
        s->p += (size_t)c->seq_len * c->head_dim * s->width;
    source again = {embedding, s->width, true};
    if (!failed)
        failed |= take_matrix(c->shared_classifier ? &again : s, &m->classifier, c->vocab_size,
                              c->dim, row);
    free(row);
    return failed ? -1 : 0;
}

/* ---- the file ---- */

/* Two FNV-1a hashes of the bytes, from the front and from the back: 128 bits that differ. */
static void fingerprint(uint8_t out[16], const uint8_t *data, size_t n)
{
    uint64_t a = UINT64_C(0xCBF29CE484222325), b = a ^ n;
    for (size_t i = 0; i < n; i++) {
        a = (a ^ data[i]) * UINT64_C(0x100000001B3);
        b = (b ^ data[n - 1 - i]) * UINT64_C(0x100000001B3);
    }
    for (int i = 0; i < 8; i++) {
        out[i] = (uint8_t)(a >> 8 * i);
        out[8 + i] = (uint8_t)(b >> 8 * i);
    }
}

int tl_model_load(tl_model *model, const char *path, tl_error *err)
{
    uint8_t *data;
    size_t n_bytes;
    *model = (tl_model){0};
    if (tl_read_file(path, &data, &n_bytes, err))
        return -1;

    tl_model m = {0};
    bool ours = n_bytes >= 4 && memcmp(data, "TLM1", 4) == 0;
    size_t header = HEADER_BYTES + (ours ? 4u : 0u);
    if (n_bytes < header) {
        tl_fail(err, "%s: not a model: %zu bytes are less than a header", path, n_bytes);
        goto fail;
    }
    if (parse_config(&m.config, data + header - HEADER_BYTES, path, err))
        goto fail;
    source s = {data + header, ours ? 2 : 4, true};
    uint64_t want = count_weights(&m.config, !ours) * s.width + header;
    if (want != n_bytes) {
        tl_fail(err, "%s: damaged or not a model: its header asks for %llu bytes, it has %zu", path,
                (unsigned long long)want, n_bytes);
        goto fail;
    }
    m.layers = calloc(m.config.n_layers, sizeof *m.layers);
    if (!m.layers || take_weights(&m, &s, !ours)) {
        tl_fail(err, "%s: no memory for the model", path);
        goto fail;
    }
    if (!s.finite) {
        tl_fail(err, "%s: damaged: a weight is not a finite number", path);
        goto fail;
    }
    fingerprint(m.fingerprint, data, n_bytes);
    free(data);
    *model = m;
    return 0;
fail:
    free(data);
    tl_model_free(&m);
    return -1;
}

void tl_model_free(tl_model *m)
{
    for (uint32_t i = 0; m->layers && i < m->config.n_layers; i++) {
        tl_layer *l = &m->layers[i];
        tl_matrix *all[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->w1, &l->w2, &l->w3};
        for (size_t k = 0; k < sizeof all / sizeof all[0]; k++)
            free(all[k]->panels);
        free(l->att_norm);
        free(l->ffn_norm);
    }
    free(m->layers);
    free(m->embedding);
    free(m->final_norm);
    free(m->classifier.panels);
    *m = (tl_model){0};
}
