/*
 * Prefixes in test_operations.c: sequences are put into a store in memory, and got from it into
 * empty ones. The model knows which blocks the store has, by the tokens before their end; the
 * mirrors' cache has a store of its own, which has to have the same values, byte for byte.
 */
#include "operations_model.h"

enum { BLOCK = KVT_BLOCK_TOKENS };

/* ---- the model of the store ---- */

/* A name for n tokens from the beginning, and the tag: what a key says of them. */
static uint64_t name_of(const token *fed, size_t n, uint32_t tag)
{
    uint64_t h = tag + 1;
    for (size_t i = 0; i < n; i++) {
        h = (h ^ (uint32_t)fed[i].id) * UINT64_C(0x9e3779b97f4a7c15);
        h = (h ^ h >> 29 ^ (uint32_t)fed[i].position) * UINT64_C(0xbf58476d1ce4e5b9);
        h ^= h >> 32;
    }
    return h;
}

static const stored_block *find(const actor *a, uint32_t g, size_t row, uint64_t name)
{
    for (size_t i = 0; i < a->n_stored; i++)
        if (a->stored[i].group == g && a->stored[i].row == row && a->stored[i].name == name)
            return &a->stored[i];
    return NULL;
}

/* Tokens from the beginning whose blocks have keys. */
static size_t keyed(const member *m)
{
    size_t n = m->length < m->unkeyed ? m->length : m->unkeyed;
    for (size_t i = 0; i < n; i++)
        if (m->tokens[i].id < 0 || m->tokens[i].key != m->tokens[i].position)
            return i;
    return n;
}

/* Whether a group's form has a row sealed and full, at a length. */
static int is_sealed(const world *w, const form *f, uint32_t g, size_t row, size_t length)
{
    return row < length / BLOCK && (!seals(w, g) || row < f->sealed) &&
           (row < sink_rows(w, g) || row >= f->first);
}

static int has_own_form(const world *w, const form *f, uint32_t g, size_t row)
{
    return (int)(f->fine >> row & 1) == (row < w->fine_rows[g]);
}

/* Whether a member has the sealed block of a row as its key says, or a checkpoint of it has. */
static int has_block(const world *w, const member *m, uint32_t g, size_t row)
{
    if (is_sealed(w, &m->forms[g], g, row, m->length))
        return has_own_form(w, &m->forms[g], g, row);
    for (size_t i = 0; i < m->n_points; i++)
        if (is_sealed(w, &m->points[i].forms[g], g, row, m->points[i].n_tokens) &&
            has_own_form(w, &m->points[i].forms[g], g, row))
            return 1;
    return 0;
}

/* The most rows, up to n_rows, of which the store has all blocks that a sequence needs. */
static size_t longest(const actor *a, const token *fed, size_t n_rows, uint32_t tag)
{
    const world *w = a->w;
    uint64_t names[MOST / BLOCK + 1];
    for (size_t row = 0; row < n_rows; row++)
        names[row] = name_of(fed, (row + 1) * BLOCK, tag);
    for (size_t n = n_rows; n > 0; n--) {
        int all = 1;
        for (uint32_t g = 0; g < w->n_groups; g++) {
            size_t first = first_needed(w, g, fed, n * BLOCK);
            for (size_t row = 0; row < n; row++)
                if (row < sink_rows(w, g) || row >= first)
                    all &= find(a, g, row, names[row]) != NULL;
        }
        if (all)
            return n;
    }
    return 0;
}

/* ---- checkpoints in the store ---- */

static const stored_point *find_point(const actor *a, uint64_t name)
{
    for (size_t i = 0; i < a->n_stored_points; i++)
        if (a->stored_points[i].name == name)
            return &a->stored_points[i];
    return NULL;
}

/* Rows of a group before those that a checkpoint's value has itself. SIZE_MAX: it has no value. */
static size_t rows_before(const world *w, const point *p, uint32_t g)
{
    const form *f = &p->forms[g];
    size_t rows = (p->n_tokens + BLOCK - 1) / BLOCK, sinks = sink_rows(w, g), row = rows;
    for (size_t i = 0; i < rows && i < f->sealed; i++)
        if ((i < sinks || i >= f->first) && !has_own_form(w, f, g, i))
            return SIZE_MAX;
    while (row > 0 && (row <= sinks || row > f->first) && !is_sealed(w, f, g, row - 1, p->n_tokens))
        row--;
    return row * BLOCK > p->n_tokens ? SIZE_MAX : row;
}

/* Checkpoints up to n tokens that the store lacks are in it: how many. */
static size_t add_points(actor *a, const member *m, size_t n)
{
    size_t before = a->n_stored_points;
    for (size_t i = 0; i < m->n_points; i++) {
        const point *p = &m->points[i];
        uint64_t name = name_of(m->tokens, p->n_tokens, m->tag);
        int has_value = 1;
        for (uint32_t g = 0; g < a->w->n_groups; g++)
            has_value &= rows_before(a->w, p, g) != SIZE_MAX;
        if (!has_value || p->n_tokens == 0 || p->n_tokens > n || find_point(a, name))
            continue;
        a->stored_points =
            realloc(a->stored_points, (a->n_stored_points + 1) * sizeof *a->stored_points);
        if (!a->stored_points)
            abort();
        a->stored_points[a->n_stored_points++] = (stored_point){name, *p};
    }
    return a->n_stored_points - before;
}

/* The deepest checkpoint of up to n tokens of which the store has all; NULL: there is none. */
static const point *deepest_point(const actor *a, const token *fed, size_t n, uint32_t tag)
{
    for (; n > 0; n--) {
        const stored_point *s = find_point(a, name_of(fed, n, tag));
        int all = s != NULL;
        for (uint32_t g = 0; g < a->w->n_groups && all; g++) {
            size_t first = first_needed(a->w, g, fed, n);
            for (size_t row = 0; row < rows_before(a->w, &s->point, g); row++)
                if (row < sink_rows(a->w, g) || row >= first)
                    all &= find(a, g, row, name_of(fed, (row + 1) * BLOCK, tag)) != NULL;
        }
        if (all)
            return &s->point;
    }
    return NULL;
}

/* ---- puts ---- */

void open_stores(actor *a)
{
    a->store = memory_store_open(&a->values);
    a->mirror_store = memory_store_open(&a->mirror_values);
}

void close_stores(actor *a)
{
    memory_store_free(&a->values);
    memory_store_free(&a->mirror_values);
    free(a->stored);
    free(a->stored_points);
    for (size_t i = 0; i < a->n_got; i++)
        bytes_free(&a->got[i]);
    free(a->got);
}

int has_store(const kvt_seq *seq)
{
    memory_store values;
    kvt_store store = memory_store_open(&values);
    kvt_status status = kvt_prefix_put(&store, seq, NULL, NULL);
    memory_store_free(&values);
    return status != KVT_ERR_UNSUPPORTED;
}

/* Blocks of rows 0 .. n_rows - 1 that the store lacks are in it: how many. */
static size_t add_blocks(actor *a, const member *m, size_t n_rows)
{
    size_t before = a->n_stored;
    for (size_t row = 0; row < n_rows; row++) {
        uint64_t name = name_of(m->tokens, (row + 1) * BLOCK, m->tag);
        for (uint32_t g = 0; g < a->w->n_groups; g++) {
            if (find(a, g, row, name) || !has_block(a->w, m, g, row))
                continue;
            a->stored = realloc(a->stored, (a->n_stored + 1) * sizeof *a->stored);
            if (!a->stored)
                abort();
            a->stored[a->n_stored++] = (stored_block){g, row, name, m->forms[g].marked};
        }
    }
    return a->n_stored - before;
}

static void expect_same_values(actor *a)
{
    check(a, a->values.n == a->n_stored + a->n_stored_points);
    check(a, a->mirror_values.n == a->values.n);
    for (size_t i = 0; i < a->values.n; i++) {
        const memory_value *one = &a->values.values[i];
        const memory_value *other = memory_store_find(&a->mirror_values, &one->key);
        check(a, other && other->bytes == one->bytes &&
                     memcmp(one->data, other->data, one->bytes) == 0);
    }
}

static kvt_prefix_options prefix_options(void)
{
    kvt_prefix_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

void put_prefix(actor *a, member *m)
{
    kvt_prefix_options options = prefix_options();
    kvt_prefix_result result;
    size_t n = keyed(m);
    if (!a->w->has_store)
        return;
    if (m->pending) {
        refused(a, kvt_prefix_put(&a->store, m->seq, &options, &result), KVT_ERR_STATE, m);
        return;
    }
    if (rng_below(&a->r, 4) == 0)
        options.n_tokens = rng_below(&a->r, MOST);
    if (options.n_tokens && options.n_tokens < n)
        n = (size_t)options.n_tokens;
    options.checkpoints = rng_below(&a->r, 2);
    must(a, kvt_prefix_put(&a->store, m->seq, &options, &result));
    check(a, result.n_values - result.n_checkpoints == add_blocks(a, m, n / BLOCK));
    check(a, result.n_checkpoints == (options.checkpoints ? add_points(a, m, n) : 0));
    check(a, result.n_tokens == BLOCK * longest(a, m->tokens, n / BLOCK, m->tag));
    must_mirror(a, kvt_prefix_put(&a->mirror_store, m->mirror, &options, NULL));
    expect_same_values(a);
    a->met.put += result.n_values > 0;
}

/* ---- gets ---- */

/* A prompt, and how much of it the store has. */
typedef struct asked {
    const member *of; /* whose tokens it begins with */
    uint32_t tag;
    int32_t ids[MOST + 1], positions[MOST + 1];
    size_t n;
    kvt_prefix_options options;
    size_t expected;    /* tokens */
    const point *point; /* with checkpoints: where they end */
} asked;

/* The beginning of a sequence that has ids, or of that of the file. 0: there is none. */
static int some_question(actor *a, asked *q)
{
    int counted = 1;
    for (int tries = 0; tries < 4; tries++) {
        uint32_t pick = rng_below(&a->r, SEQS + 1);
        q->of = pick < SEQS ? &a->members[pick] : &a->filed;
        if (keyed(q->of) > BLOCK)
            break;
    }
    if (q->of->length == 0)
        return 0;
    q->tag = q->of->tag;
    q->options = prefix_options();
    q->n = rng_below(&a->r, 2) ? q->of->length : 1 + rng_below(&a->r, (uint32_t)q->of->length);
    for (size_t i = 0; i < q->n; i++) {
        const token *t = &q->of->tokens[i];
        if (t->id < 0)
            return 0;
        q->ids[i] = t->id;
        q->positions[i] = t->position;
        counted &= t->position == (int32_t)i;
    }
    if (rng_below(&a->r, 2)) {
        q->ids[q->n] = 70000;
        q->positions[q->n] = (int32_t)q->n;
        q->n++;
    }
    if (!counted || rng_below(&a->r, 2))
        q->options.positions = q->positions;
    q->point = NULL;
    q->options.checkpoints = rng_below(&a->r, 2);
    if (q->options.checkpoints) {
        q->point = deepest_point(a, q->of->tokens,
                                 q->n - 1 < q->of->length ? q->n - 1 : q->of->length, q->tag);
        q->expected = q->point ? q->point->n_tokens : 0;
    } else {
        q->expected = BLOCK * longest(a, q->of->tokens, (q->n - 1) / BLOCK, q->tag);
    }
    return 1;
}

/* The model is n tokens of the store. */
static void take_stored(actor *a, member *m, const asked *q)
{
    size_t n = q->expected, rows = n / BLOCK;
    forms_clear(m->forms);
    for (size_t i = 0; i < n; i++) {
        m->tokens[i] = q->of->tokens[i];
        m->tokens[i].key = m->tokens[i].position;
    }
    for (uint32_t g = 0; g < a->w->n_groups; g++) {
        form *f = &m->forms[g];
        f->first = first_needed(a->w, g, m->tokens, n);
        if (!seals(a->w, g))
            continue;
        f->sealed = f->final = rows;
        if (q->point) {
            *f = q->point->forms[g];
            f->first = first_needed(a->w, g, m->tokens, n);
        }
        for (size_t row = 0; row < rows; row++) {
            const stored_block *s = find(a, g, row, name_of(m->tokens, (row + 1) * BLOCK, m->tag));
            f->fine |= (uint32_t)(row < a->w->fine_rows[g]) << row;
            if (s && s->marked < (row + 1) * BLOCK && s->marked < f->marked)
                f->marked = s->marked;
        }
    }
    forms_settle(a->w, m->forms);
    m->length = n;
    m->next_position = q->point ? q->point->next_position : -1;
    m->turned = m->uncounted = 0;
    m->unkeyed = SIZE_MAX;
    if (q->point) {
        m->n_points = 1;
        m->points[0] = *q->point;
        memcpy(m->points[0].forms, m->forms, sizeof m->forms);
    }
}

/* The mirror gets it from the mirrors' store; the log says what that was. */
static void mirror_get(actor *a, member *m, const asked *q)
{
    kvt_prefix_result result;
    must_mirror(a, kvt_prefix_get(&a->mirror_store, m->mirror, q->ids, q->n, &q->options, &result));
    check(a, result.n_tokens == q->expected);
    a->got = realloc(a->got, (a->n_got + 1) * sizeof *a->got);
    if (!a->got)
        abort();
    a->got[a->n_got] = save_raw(a, a->mirrors, m->mirror);
    log_free(&m->log);
    log_add(&m->log, TAG, 0, m->tag, NULL);
    log_add(&m->log, GOT, 0, a->n_got++, NULL);
}

void get_prefix(actor *a, member *m)
{
    kvt_prefix_result result;
    asked q;
    if (!a->w->has_store || !some_question(a, &q))
        return;
    if ((m->length || m->pending) && rng_below(&a->r, 4) == 0) {
        refused(a, kvt_prefix_get(&a->store, m->seq, q.ids, q.n, &q.options, &result),
                KVT_ERR_STATE, m);
        return;
    }
    if (m == q.of)
        return;
    if (m->length || m->pending || m->n_points)
        clear(a, m);
    if (m->tag != q.tag)
        set_tag(a, m, q.tag);
    must(a, kvt_prefix_probe(&a->store, m->seq, q.ids, q.n, &q.options, &result));
    check(a, result.n_tokens == q.expected || q.options.checkpoints);
    arm(a);
    if (!succeeded(a, kvt_prefix_get(&a->store, m->seq, q.ids, q.n, &q.options, &result), m))
        return;
    check(a, result.n_tokens == q.expected && result.n_refused == 0);
    if (q.expected == 0)
        return;
    take_stored(a, m, &q);
    mirror_get(a, m, &q);
    a->met.got++;
    a->met.got_points += q.point != NULL;
    expect_mirrored(a, m);
}

/* What was got of a store with a damaged value is what a store without that value gives. */
static void expect_as_without(actor *a, const asked *q, const kvt_seq *got,
                              const kvt_store_key *key, const unsigned char *data, size_t n)
{
    kvt_seq *seq = tagged_seq(a, a->mirrors, q->tag);
    memory_store_drop(&a->mirror_values, memory_store_find(&a->mirror_values, key));
    must_mirror(a, kvt_prefix_get(&a->mirror_store, seq, q->ids, q->n, &q->options, NULL));
    expect_same_file(a, a->w->cache, got, a->mirrors, seq, "got of a store with a damaged value");
    kvt_seq_destroy(seq);
    memory_store_set(&a->mirror_values, key, data, n);
}

/* A sequence is got while a value is damaged: it ends before that value, or has no need of it. */
void get_spoilt(actor *a, member *m)
{
    kvt_prefix_result result;
    kvt_store_key key;
    memory_value *value;
    unsigned char *data;
    char text[32];
    kvt_seq *seq = NULL;
    size_t n_bytes, i;
    kvt_status status;
    asked q;
    (void)m;
    if (!a->w->has_store || !a->values.n || !some_question(a, &q))
        return;
    i = rng_below(&a->r, (uint32_t)a->values.n);
    value = &a->values.values[i];
    key = value->key;
    n_bytes = value->bytes;
    data = room(n_bytes);
    memcpy(data, value->data, n_bytes);
    value->data[rng_below(&a->r, (uint32_t)n_bytes)] ^= (unsigned char)(1 + rng_below(&a->r, 255));
    if (kvt_seq_create(a->w->cache, &seq) == KVT_OK) {
        must(a, kvt_seq_set_tag(seq, text, tag_of(q.tag, text)));
        status = kvt_prefix_get(&a->store, seq, q.ids, q.n, &q.options, &result);
        if (succeeded(a, status, NULL)) {
            check(a, result.n_refused <= 1);
            check(a,
                  result.n_refused ? result.n_tokens < q.expected : result.n_tokens == q.expected);
            check(a, !memory_store_find(&a->values, &key) == (result.n_refused > 0));
            check(a, kvt_seq_length(seq) == result.n_tokens);
            a->met.spoilt += result.n_refused > 0;
            if (result.n_refused)
                expect_as_without(a, &q, seq, &key, data, n_bytes);
        }
        kvt_seq_destroy(seq);
    }
    memory_store_set(&a->values, &key, data, n_bytes);
    free(data);
}
