/*
 * llama2.c's tokenizer: tokenizer.bin and the greedy encoding that goes with it.
 *
 * File, little-endian: int32 max_token_length; for each token f32 score, int32 length, bytes.
 * Ids 0, 1, 2 are <unk>, BOS, EOS; byte b without a token of its own is id 3 + b.
 *
 * The simple form of encoding: split the text into characters, then repeatedly merge the adjacent
 * pair whose joint string is the best-scored token, the leftmost of equals, until no pair is a
 * token. That is a pass over the whole text for each merge. Here the pairs that are tokens are in a
 * heap, best first; a merge adds at most two new pairs, and pairs whose parts have changed since
 * are dropped when popped. The result is the same, token for token.
 */
#include "tinylm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct entry {
    const char *bytes; /* in the file's data */
    uint32_t n_bytes;
    float score;
} entry;

struct tl_tokenizer {
    uint8_t *data;
    entry *entries;
    uint32_t n;
    int32_t *table; /* open addressing over the strings; -1: free */
    size_t mask;
    char byte;
};

static uint32_t load_u32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* FNV-1a over a string in two parts, so that a pair is looked up without joining it. */
static uint64_t hash_bytes(uint64_t h, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)s[i]) * UINT64_C(0x100000001B3);
    return h;
}

static int32_t find2(const tl_tokenizer *t, const char *a, size_t na, const char *b, size_t nb)
{
    uint64_t h = hash_bytes(hash_bytes(UINT64_C(0xCBF29CE484222325), a, na), b, nb);
    for (size_t at = (size_t)(h ^ h >> 32) & t->mask; t->table[at] >= 0; at = (at + 1) & t->mask) {
        const entry *e = &t->entries[t->table[at]];
        if (e->n_bytes == na + nb && memcmp(e->bytes, a, na) == 0 &&
            (nb == 0 || memcmp(e->bytes + na, b, nb) == 0))
            return t->table[at];
    }
    return -1;
}

static void insert(tl_tokenizer *t, uint32_t id)
{
    const entry *e = &t->entries[id];
    uint64_t h = hash_bytes(UINT64_C(0xCBF29CE484222325), e->bytes, e->n_bytes);
    size_t at = (size_t)(h ^ h >> 32) & t->mask;
    while (t->table[at] >= 0)
        at = (at + 1) & t->mask;
    t->table[at] = (int32_t)id;
}

tl_tokenizer *tl_tokenizer_load(const char *path, uint32_t vocab_size, tl_error *err)
{
    tl_tokenizer *t = calloc(1, sizeof *t);
    size_t n_bytes, at = 4, slots = 16;
    if (!t) {
        tl_fail(err, "%s: no memory", path);
        return NULL;
    }
    if (tl_read_file(path, &t->data, &n_bytes, err))
        goto fail;
    /* Each token takes 8 bytes at least: this bounds what vocab_size makes us allocate. */
    if (n_bytes < 4 || (n_bytes - 4) / 8 < vocab_size) {
        tl_fail(err, "%s: not a tokenizer of %u tokens: too short", path, vocab_size);
        goto fail;
    }
    uint32_t longest = load_u32(t->data);
    if (longest == 0 || longest > 65536) {
        tl_fail(err, "%s: not a tokenizer: longest token of %u bytes", path, longest);
        goto fail;
    }
    while (slots < (size_t)vocab_size * 2)
        slots *= 2;
    t->mask = slots - 1;
    t->entries = calloc(vocab_size, sizeof *t->entries);
    t->table = malloc(slots * sizeof *t->table);
    if (!t->entries || !t->table) {
        tl_fail(err, "%s: no memory", path);
        goto fail;
    }
    memset(t->table, -1, slots * sizeof *t->table);
    for (t->n = 0; t->n < vocab_size; t->n++) {
        if (n_bytes - at < 8) {
            tl_fail(err, "%s: ends after %u of %u tokens", path, t->n, vocab_size);
            goto fail;
        }
        uint32_t bits = load_u32(t->data + at), length = load_u32(t->data + at + 4);
        at += 8;
        if (length > longest || length > n_bytes - at) {
            tl_fail(err, "%s: damaged: token %u has %u bytes", path, t->n, length);
            goto fail;
        }
        entry *e = &t->entries[t->n];
        memcpy(&e->score, &bits, sizeof e->score);
        if (!(e->score == e->score)) {
            tl_fail(err, "%s: damaged: token %u has no number for its score", path, t->n);
            goto fail;
        }
        e->bytes = (const char *)t->data + at;
        e->n_bytes = length;
        at += length;
        if (length && find2(t, e->bytes, length, "", 0) < 0)
            insert(t, t->n);
    }
    if (at != n_bytes) {
        tl_fail(err, "%s: holds more than the model's %u tokens", path, vocab_size);
        goto fail;
    }
    return t;
fail:
    tl_tokenizer_free(t);
    return NULL;
}

void tl_tokenizer_free(tl_tokenizer *t)
{
    if (!t)
        return;
    free(t->data);
    free(t->entries);
    free(t->table);
    free(t);
}

/* ---- encoding ---- */

/* A symbol of the text: a doubly linked list in an array. id < 0: merged into its left one. */
typedef struct symbol {
    int32_t id;
    uint32_t previous, next;
    uint32_t end; /* offset in the text */
} symbol;

enum { NONE = UINT32_MAX >> 1 };

typedef struct pair {
    float score;
    uint32_t left;
    int32_t left_id, right_id, joint;
} pair;

typedef struct heap {
    pair *p;
    size_t n;
} heap;

static bool better(const pair *a, const pair *b)
{
    return a->score != b->score ? a->score > b->score : a->left < b->left;
}

static void heap_push(heap *h, pair x)
{
    size_t i = h->n++;
    for (; i > 0 && better(&x, &h->p[(i - 1) / 2]); i = (i - 1) / 2)
        h->p[i] = h->p[(i - 1) / 2];
    h->p[i] = x;
}

static pair heap_pop(heap *h)
{
    pair top = h->p[0], x = h->p[--h->n];
    size_t i = 0;
    for (;;) {
        size_t k = 2 * i + 1;
        if (k >= h->n)
            break;
        if (k + 1 < h->n && better(&h->p[k + 1], &h->p[k]))
            k++;
        if (!better(&h->p[k], &x))
            break;
        h->p[i] = h->p[k];
        i = k;
    }
    if (h->n)
        h->p[i] = x;
    return top;
}

static void offer(const tl_tokenizer *t, heap *h, const symbol *s, uint32_t left)
{
    if (left == NONE || s[left].next == NONE)
        return;
    const symbol *l = &s[left], *r = &s[l->next];
    const entry *a = &t->entries[l->id], *b = &t->entries[r->id];
    int32_t joint = find2(t, a->bytes, a->n_bytes, b->bytes, b->n_bytes);
    /* llama2.c begins its search for the best score at -1e10: the same lower bound. */
    if (joint >= 0 && t->entries[joint].score > -1e10f)
        heap_push(h, (pair){t->entries[joint].score, left, l->id, r->id, joint});
}

static size_t merge(const tl_tokenizer *t, symbol *s, size_t n, heap *h)
{
    size_t left = n;
    for (uint32_t i = 0; i + 1 < n; i++)
        offer(t, h, s, i);
    while (h->n) {
        pair p = heap_pop(h);
        symbol *l = &s[p.left];
        if (l->id != p.left_id || l->next == NONE || s[l->next].id != p.right_id)
            continue;
        symbol *r = &s[l->next];
        l->id = p.joint;
        l->end = r->end;
        r->id = -1;
        l->next = r->next;
        if (l->next != NONE)
            s[l->next].previous = p.left;
        left--;
        offer(t, h, s, l->previous);
        offer(t, h, s, p.left);
    }
    return left;
}

/* Length of the UTF-8 character at s as in llama2.c: a byte and up to three continuation bytes. */
static size_t char_bytes(const char *s, size_t n)
{
    size_t k = 1;
    while (k < n && k < 4 && ((unsigned char)s[k] & 0xC0) == 0x80)
        k++;
    return k;
}

int tl_encode(const tl_tokenizer *t, const char *text, size_t n_bytes, bool first, int32_t **tokens,
              uint32_t **ends, size_t *n_tokens, tl_error *err)
{
    if (n_bytes > (1u << 28) || n_bytes > SIZE_MAX / (4 * sizeof(pair)))
        return tl_fail(err, "a text of %zu bytes is too long", n_bytes);
    symbol *s = malloc((n_bytes + 2) * sizeof *s);
    /* At most one pair per gap at the start and two for each merge. */
    heap h = {malloc((3 * n_bytes + 4) * sizeof(pair)), 0};
    int32_t *out = malloc((n_bytes + 3) * sizeof *out);
    uint32_t *out_ends = malloc((n_bytes + 3) * sizeof *out_ends);
    if (!s || !h.p || !out || !out_ends) {
        free(s);
        free(h.p);
        free(out);
        free(out_ends);
        return tl_fail(err, "no memory to encode %zu bytes", n_bytes);
    }
    size_t n = 0;
    int32_t space = n_bytes ? find2(t, " ", 1, "", 0) : -1;
    if (space >= 0)
        s[n++] = (symbol){.id = space, .end = 0};
    for (size_t at = 0; at < n_bytes;) {
        size_t k = char_bytes(text + at, n_bytes - at);
        int32_t id = find2(t, text + at, k, "", 0);
        if (id >= 0) {
            at += k;
            s[n++] = (symbol){.id = id, .end = (uint32_t)at};
            continue;
        }
        for (; k > 0; k--) {
            uint32_t b = 3u + (unsigned char)text[at++];
            s[n++] = (symbol){.id = b < t->n ? (int32_t)b : 0, .end = (uint32_t)at};
        }
    }
    for (size_t i = 0; i < n; i++) {
        s[i].previous = i ? (uint32_t)i - 1 : NONE;
        s[i].next = i + 1 < n ? (uint32_t)i + 1 : NONE;
    }
    if (n)
        merge(t, s, n, &h);
    size_t m = 0;
    if (first) {
        out_ends[m] = 0;
        out[m++] = TL_BOS;
    }
    for (uint32_t i = 0; n && i != NONE; i = s[i].next) {
        out_ends[m] = s[i].end;
        out[m++] = s[i].id;
    }
    free(s);
    free(h.p);
    *tokens = out;
    if (ends)
        *ends = out_ends;
    else
        free(out_ends);
    *n_tokens = m;
    return 0;
}

/* ---- decoding ---- */

static int hex(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return -1;
}

const char *tl_decode(tl_tokenizer *t, int32_t previous, int32_t token, size_t *n_bytes)
{
    *n_bytes = 0;
    if (token < 0 || (uint32_t)token >= t->n)
        return "";
    const entry *e = &t->entries[token];
    const char *p = e->bytes;
    size_t n = e->n_bytes;
    if (previous == TL_BOS && n && *p == ' ') {
        p++;
        n--;
    }
    if (n == 6 && memcmp(p, "<0x", 3) == 0 && p[5] == '>' && hex(p[3]) >= 0 && hex(p[4]) >= 0) {
        t->byte = (char)(hex(p[3]) * 16 + hex(p[4]));
        p = &t->byte;
        n = 1;
    }
    *n_bytes = n;
    return p;
}
