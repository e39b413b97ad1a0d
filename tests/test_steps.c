/*
 * Sequences against a reference model: arrays of the input. Thousands of random operations on a few
 * sequences of one cache; after each, all queries must agree with the model, stored values must not
 * change by a bit, and must be within their type's bound of the input. Then the guarantees of
 * truncate, abort, commit and positions one by one.
 */
#include "support.h"

#include <math.h>
#include <stdio.h>

/* Two groups whose layers are interleaved: 0, 2, 3 and 1, 4. */
enum { LAYERS = 5, MAX_TOKENS = 200, SEQS = 3, MAX_ROW = 2 * 48 };

static const uint32_t layers_a[] = {0, 2, 3}, layers_b[] = {1, 4};

typedef struct world {
    kvt_group_config groups[2];
    kvt_cache *cache;
    rng r;
} world;

static const kvt_group_config *group_at(const world *w, uint32_t layer)
{
    return &w->groups[layer == 1 || layer == 4];
}

static size_t dims_of(const world *w, uint32_t layer, int side)
{
    return side ? group_at(w, layer)->v_dim : group_at(w, layer)->k_dim;
}

static kvt_type type_of(const world *w, uint32_t layer, int side)
{
    return side ? group_at(w, layer)->v_type : group_at(w, layer)->k_type;
}

/* Floats of one token. */
static size_t row_of(const world *w, uint32_t layer, int side)
{
    return dims_of(w, layer, side) * group_at(w, layer)->n_kv_heads;
}

static void open_world(world *w, kvt_type k_type, kvt_type v_type, uint32_t flags,
                       uint64_t max_tokens, uint64_t seed)
{
    kvt_config c = kvt_config_init();
    w->r.state = seed;
    w->groups[0] = group_of(3, 4, 2, 48, 24, k_type, v_type);
    w->groups[1] = group_of(2, 3, 1, 64, 8, v_type, k_type);
    w->groups[0].layers = layers_a;
    w->groups[1].layers = layers_b;
    w->groups[0].flags = w->groups[1].flags = flags;
    c.groups = w->groups;
    c.n_groups = 2;
    c.max_tokens = max_tokens;
    expect_ok(NULL, kvt_cache_create(&c, &w->cache));
}

/* ---- the model of a sequence ---- */

typedef struct layer_model {
    float fed[2][MAX_TOKENS * MAX_ROW];
    float stored[2]
                [MAX_TOKENS * MAX_ROW]; /* as read back: may change by commit and truncate only */
    size_t n;                           /* tokens that it holds, pending ones included */
} layer_model;

typedef struct seq_model {
    kvt_seq *seq;
    size_t length, pending;
    int32_t positions[MAX_TOKENS], ids[MAX_TOKENS];
    layer_model layers[LAYERS];
} seq_model;

static int32_t model_next(const seq_model *m)
{
    if (m->length == 0)
        return 0;
    return m->positions[m->length - 1] == INT32_MAX ? INT32_MAX : m->positions[m->length - 1] + 1;
}

/* ---- bounds: docs/numerics.md ---- */

static double norm(const float *x, size_t n)
{
    double sum = 0;
    for (size_t d = 0; d < n; d++)
        sum += (double)x[d] * (double)x[d];
    return sqrt(sum);
}

/* The error of one row of one head is within the bound of its type. */
static int within_bound(const world *w, uint32_t layer, int side, const float *fed,
                        const float *got)
{
    /* Rows have at most this norm, and an offset is a mean of rows or of stored rows. */
    const double largest_norm = 16;
    size_t dims = dims_of(w, layer, side);
    double error = 0, absmax = 0;
    kvt_type type = type_of(w, layer, side);
    uint32_t flags = group_at(w, layer)->flags;
    if (type == KVT_TYPE_F32)
        return memcmp(fed, got, dims * sizeof *fed) == 0;
    for (size_t d = 0; d < dims; d++) {
        double e = fabs((double)got[d] - (double)fed[d]), x = fabs((double)fed[d]);
        absmax = x > absmax ? x : absmax;
        error += e * e;
        if (type == KVT_TYPE_F16 && e > x / 2048 + 0x1p-25) /* half an ulp */
            return 0;
    }
    if (type == KVT_TYPE_F16)
        return 1;
    if (!(flags & (side ? KVT_GROUP_NO_V_ROTATION : KVT_GROUP_NO_ROTATION)) ||
        (!side && !(flags & KVT_GROUP_NO_OFFSET))) {
        /*
         * In L2: the rotation keeps the norm (but for the power of two that undoing takes back),
         * an absmax is at most a norm, and each of the dims errs by at most half a step of
         * absmax / 127 (K: a whole one) and what f16 takes before.
         */
        double all = norm(fed, dims) + (side ? 0 : 1.1 * largest_norm);
        return sqrt(error) <=
               sqrt((double)dims) * all * (1.01 / (side ? 254 : 127) + 1.0 / 2048) + 1e-6;
    }
    for (size_t d = 0; d < dims; d++) /* half a step, K: one, and a scale rounded up to f16 */
        if (fabs((double)got[d] - (double)fed[d]) >
            absmax * (1.002 / (side ? 254 : 127) + 1.0 / 2048) + 0x1p-24)
            return 0;
    return 1;
}

/* ---- the comparison ---- */

static void expect_layer(const world *w, seq_model *m, uint32_t layer, const char *what)
{
    static float got[MAX_TOKENS * MAX_ROW];
    kvt_tensor out = kvt_tensor_f32(got);
    const layer_model *l = &m->layers[layer];
    for (int side = 0; side < 2; side++) {
        size_t row = row_of(w, layer, side);
        expect_ok(w->cache, kvt_read(m->seq, layer, (kvt_side)side, 0, l->n, &out));
        if (memcmp(got, l->stored[side], l->n * row * sizeof *got))
            fail_msg("after %s: layer %u side %d: stored values have changed", what, layer, side);
        expect(w->cache, KVT_ERR_ARG, kvt_read(m->seq, layer, (kvt_side)side, l->n, 1, &out));
        expect(w->cache, KVT_ERR_ARG, kvt_read(m->seq, layer, (kvt_side)side, 0, l->n + 1, &out));
    }
}

static void expect_model(const world *w, seq_model *m, const char *what)
{
    int32_t got[MAX_TOKENS];
    uint64_t capacity = kvt_seq_capacity(m->seq);
    if (kvt_seq_length(m->seq) != m->length || kvt_seq_pending(m->seq) != m->pending ||
        kvt_seq_is_empty(m->seq) != (m->length == 0) ||
        kvt_seq_next_position(m->seq) != model_next(m))
        fail_msg("after %s: length %u, pending %u, empty %d, next %d; expected %zu, %zu, %d, %d",
                 what, (unsigned)kvt_seq_length(m->seq), (unsigned)kvt_seq_pending(m->seq),
                 kvt_seq_is_empty(m->seq), kvt_seq_next_position(m->seq), m->length, m->pending,
                 m->length == 0, model_next(m));
    assert_true(capacity >= m->length + m->pending && capacity <= MAX_TOKENS);
    expect_ok(w->cache, kvt_seq_token_ids(m->seq, 0, m->length, got));
    assert_memory_equal(got, m->ids, m->length * sizeof *got);
    expect_ok(w->cache, kvt_seq_positions(m->seq, 0, m->length, got));
    assert_memory_equal(got, m->positions, m->length * sizeof *got);
    expect(w->cache, KVT_ERR_ARG, kvt_seq_token_ids(m->seq, m->length, 1, got));
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        assert_true(m->layers[layer].n == m->length ||
                    m->layers[layer].n == m->length + m->pending);
}

/* ---- visiting ---- */

typedef struct visit {
    const world *w;
    const seq_model *m;
    uint32_t layer;
    uint64_t next, stop;
} visit;

static int check_visit(void *user, const kvt_token_view *token)
{
    visit *v = user;
    const layer_model *l = &v->m->layers[v->layer];
    size_t k_row = row_of(v->w, v->layer, 0), v_row = row_of(v->w, v->layer, 1);
    size_t i = (size_t)token->index;
    assert_true(token->index == v->next);
    assert_int_equal(token->position, v->m->positions[i]);
    assert_int_equal(token->token_id, i < v->m->length ? v->m->ids[i] : KVT_TOKEN_NONE);
    assert_memory_equal(token->k, l->stored[0] + i * k_row, k_row * sizeof(float));
    assert_memory_equal(token->v, l->stored[1] + i * v_row, v_row * sizeof(float));
    assert_true(kvt_seq_length(v->m->seq) == v->m->length); /* it may read the sequence */
    v->next++;
    return token->index == v->stop ? (int)(token->index % 3) - 7 : 0;
}

static void visit_some(world *w, seq_model *m)
{
    uint32_t layer = rng_below(&w->r, LAYERS);
    size_t n = m->layers[layer].n, first = rng_below(&w->r, (uint32_t)n + 1);
    size_t count = rng_below(&w->r, (uint32_t)(n - first) + 1);
    visit v = {w, m, layer, first, UINT64_MAX};
    uint64_t stopped = 12345;
    if (count && rng_below(&w->r, 2))
        v.stop = first + rng_below(&w->r, (uint32_t)count);
    expect_ok(w->cache, kvt_visit(m->seq, layer, first, count, check_visit, &v, &stopped));
    assert_true(stopped == (v.stop == UINT64_MAX ? first + count : v.stop));
    assert_true(v.next == (v.stop == UINT64_MAX ? first + count : v.stop + 1));
}

/* ---- operations ---- */

/* Numbers whose rows of at most 64 dims have a norm below 16; each head with a bias, as keys. */
static void feed(world *w, seq_model *m, uint32_t layer)
{
    layer_model *l = &m->layers[layer];
    for (int side = 0; side < 2; side++) {
        size_t row = row_of(w, layer, side);
        for (size_t i = 0; i < m->pending * row; i++) {
            double x = rng_normal(&w->r);
            x = x > 3 ? 3 : x < -3 ? -3 : x;
            l->fed[side][m->length * row + i] = (float)(x * 0.5 + (i % 5 == 0 ? 0.4 : 0));
        }
    }
}

/*
 * A commit seals, and a truncate may take that back: what is stored as i8 changes within its
 * bound, the rest not at all.
 */
static void sealing_may_change(world *w, seq_model *m)
{
    static float got[MAX_TOKENS * MAX_ROW];
    kvt_tensor out = kvt_tensor_f32(got);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (int side = 0; side < 2; side++) {
            layer_model *l = &m->layers[layer];
            size_t row = row_of(w, layer, side), dims = dims_of(w, layer, side);
            if (type_of(w, layer, side) != KVT_TYPE_I8)
                continue;
            expect_ok(w->cache, kvt_read(m->seq, layer, (kvt_side)side, 0, l->n, &out));
            for (size_t i = 0; i < l->n * row; i += dims)
                if (!within_bound(w, layer, side, l->fed[side] + i, got + i))
                    fail_msg("layer %u side %d: token %zu of %zu is beyond its bound", layer, side,
                             i / row, l->n);
            memcpy(l->stored[side], got, l->n * row * sizeof *got);
        }
}

static void append_in_one(world *w, seq_model *m, uint32_t layer, const kvt_tensor *k,
                          const kvt_tensor *v)
{
    kvt_append_plan plan;
    size_t at;
    if (rng_below(&w->r, 2)) {
        expect_ok(w->cache, kvt_append(m->seq, layer, k, v));
        return;
    }
    expect_ok(w->cache, kvt_append_plan_init(&plan, m->seq, layer, k, v));
    at = rng_below(&w->r, (uint32_t)plan.n_tasks);
    for (size_t i = 0; i < plan.n_tasks; i++) /* rotated, then reversed */
        expect_ok(w->cache, kvt_append_task(&plan, plan.n_tasks - 1 - (at + i) % plan.n_tasks));
    expect_ok(w->cache, kvt_append_finish(&plan));
}

static void append_layer(world *w, seq_model *m, uint32_t layer)
{
    static float got[MAX_TOKENS * MAX_ROW];
    layer_model *l = &m->layers[layer];
    kvt_tensor k, v, out = kvt_tensor_f32(got);
    size_t heads = group_at(w, layer)->n_kv_heads;

    k = kvt_tensor_f32(l->fed[0] + m->length * row_of(w, layer, 0));
    v = kvt_tensor_f32(l->fed[1] + m->length * row_of(w, layer, 1));
    if (m->pending == 0 || l->n > m->length) {
        expect(w->cache, KVT_ERR_STATE, kvt_append(m->seq, layer, &k, &v));
        return;
    }
    feed(w, m, layer);
    if (rng_below(&w->r, 16) == 0) { /* a refused append first; it leaves nothing behind */
        float *last = l->fed[1] + (m->length + m->pending) * row_of(w, layer, 1) - 1, saved = *last;
        *last = NAN;
        expect(w->cache, KVT_ERR_VALUE, kvt_append(m->seq, layer, &k, &v));
        *last = saved;
        expect_layer(w, m, layer, "a refused append");
    }
    append_in_one(w, m, layer, &k, &v);
    l->n = m->length + m->pending;
    for (int side = 0; side < 2; side++) {
        size_t row = row_of(w, layer, side), dims = dims_of(w, layer, side);
        expect_ok(w->cache, kvt_read(m->seq, layer, (kvt_side)side, m->length, m->pending, &out));
        for (size_t i = 0; i < m->pending * heads; i++)
            if (!within_bound(w, layer, side, l->fed[side] + m->length * row + i * dims,
                              got + i * dims))
                fail_msg("layer %u side %d type %d: token %zu of %zu pending at %zu is beyond its "
                         "bound",
                         layer, side, (int)type_of(w, layer, side), i / heads, m->pending,
                         m->length);
        memcpy(l->stored[side] + m->length * row, got, m->pending * row * sizeof *got);
    }
}

/* Step sizes around the tile and the block, cut to what fits (or one too many). */
static size_t step_size(world *w, const seq_model *m)
{
    static const size_t sizes[] = {1, 1, 1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 100, 128};
    size_t left = MAX_TOKENS - m->length, n = sizes[rng_below(&w->r, 15)];
    if (rng_below(&w->r, 6) == 0) /* up to the next multiple of 16 or 64 */
        n = 64 - m->length % (rng_below(&w->r, 2) ? 64 : 16) % 64;
    if (rng_below(&w->r, 10) == 0)
        n = left + rng_below(&w->r, 2);
    return n;
}

static void begin(world *w, seq_model *m)
{
    size_t n = step_size(w, m);
    int32_t own[MAX_TOKENS + 1];
    const int32_t *positions = NULL;
    if (rng_below(&w->r, 3) == 0 && n > 0) {
        for (size_t i = 0; i < n && i <= MAX_TOKENS; i++) /* in any order, equal ones too */
            own[i] = rng_below(&w->r, 20) ? (int32_t)rng_below(&w->r, 1000) : INT32_MAX - 40;
        positions = own;
    }
    if (n == 0 || m->pending || n > MAX_TOKENS - m->length) {
        expect(w->cache,
               n == 0       ? KVT_ERR_ARG
               : m->pending ? KVT_ERR_STATE
                            : KVT_ERR_FULL,
               kvt_seq_begin(m->seq, n, positions));
        return;
    }
    if (!positions && (int64_t)model_next(m) + (int64_t)n - 1 > INT32_MAX) {
        expect(w->cache, KVT_ERR_ARG, kvt_seq_begin(m->seq, n, NULL));
        return;
    }
    expect_ok(w->cache, kvt_seq_begin(m->seq, n, positions));
    for (size_t i = 0; i < n; i++)
        m->positions[m->length + i] = positions ? positions[i] : model_next(m) + (int32_t)i;
    m->pending = n;
    memset(own, 0x77, sizeof own); /* copied */
}

static void commit(world *w, seq_model *m)
{
    int32_t ids[MAX_TOKENS];
    const int32_t *given = rng_below(&w->r, 3) ? ids : NULL;
    char name[20];
    for (size_t i = 0; i < m->pending; i++)
        ids[i] = rng_below(&w->r, 5) ? (int32_t)rng_below(&w->r, INT32_MAX) : KVT_TOKEN_NONE;
    if (!m->pending) {
        expect(w->cache, KVT_ERR_STATE, kvt_seq_commit(m->seq, given));
        return;
    }
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        if (m->layers[layer].n == m->length) {
            expect(w->cache, KVT_ERR_STATE, kvt_seq_commit(m->seq, given));
            snprintf(name, sizeof name, "layer %u", layer);
            expect_error_text(w->cache, name, "commit");
            return;
        }
    expect_ok(w->cache, kvt_seq_commit(m->seq, given));
    for (size_t i = 0; i < m->pending; i++)
        m->ids[m->length + i] = given ? ids[i] : KVT_TOKEN_NONE;
    m->length += m->pending;
    m->pending = 0;
    sealing_may_change(w, m);
}

static void shorten(seq_model *m, size_t length)
{
    m->length = length;
    m->pending = 0;
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        if (m->layers[layer].n > length)
            m->layers[layer].n = length;
}

static void truncate(world *w, seq_model *m)
{
    size_t n = rng_below(&w->r, 3)
                   ? m->length - (m->length ? rng_below(&w->r, (uint32_t)m->length) : 0)
                   : rng_below(&w->r, MAX_TOKENS + 2);
    if (rng_below(&w->r, 4) == 0)
        n = n / 64 * 64;
    if (m->pending || n > m->length) {
        expect(w->cache, m->pending ? KVT_ERR_STATE : KVT_ERR_ARG, kvt_seq_truncate(m->seq, n));
        return;
    }
    expect_ok(w->cache, kvt_seq_truncate(m->seq, n));
    shorten(m, n);
    sealing_may_change(w, m);
}

static const char *operate(world *w, seq_model *m)
{
    switch (rng_below(&w->r, 24)) {
    case 0:
    case 1:
    case 2:
    case 3: begin(w, m); return "begin";
    case 4:
    case 5:
    case 6:
    case 7:
    case 8:
    case 9: append_layer(w, m, rng_below(&w->r, LAYERS)); return "append";
    case 10:
    case 11:
    case 12:
    case 13: { /* all layers that are missing, in any order */
        uint32_t at = rng_below(&w->r, LAYERS), by = 1 + rng_below(&w->r, LAYERS - 1);
        for (uint32_t i = 0; i < LAYERS && m->pending; i++)
            append_layer(w, m, (at + i * by) % LAYERS);
        return "append all";
    }
    case 14:
    case 15:
    case 16:
    case 17: commit(w, m); return "commit";
    case 18:
        expect_ok(w->cache, kvt_seq_abort(m->seq));
        shorten(m, m->length);
        return "abort";
    case 19:
    case 20: truncate(w, m); return "truncate";
    case 21: visit_some(w, m); return "visit";
    case 22:
        if (rng_below(&w->r, 4) == 0) {
            expect_ok(w->cache, kvt_seq_clear(m->seq));
            shorten(m, 0);
            return "clear";
        }
        expect_ok(w->cache, kvt_cache_trim(w->cache));
        return "trim";
    default:
        if (rng_below(&w->r, 4) == 0) {
            kvt_seq_destroy(m->seq);
            expect_ok(w->cache, kvt_seq_create(w->cache, &m->seq));
            shorten(m, 0);
            return "destroy and create";
        }
        return "nothing";
    }
}

static void random_operations(void **state)
{
    const size_t operations = is_quick() ? 100 : 2500;
    static const uint32_t flags[] = {0, KVT_GROUP_NO_ROTATION, KVT_GROUP_NO_OFFSET,
                                     KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET |
                                         KVT_GROUP_NO_V_ROTATION};
    size_t reached[3] = {0};
    (void)state;
    for (int k_type = 0; k_type < 3; k_type++)
        for (int v_type = 0; v_type < 3; v_type++)
            for (int flag = 0; flag < (k_type == KVT_TYPE_I8 || v_type == KVT_TYPE_I8 ? 4 : 1);
                 flag++) {
                world w;
                seq_model *models = calloc(SEQS, sizeof *models);
                assert_non_null(models);
                open_world(&w, (kvt_type)k_type, (kvt_type)v_type, flags[flag], MAX_TOKENS,
                           (uint64_t)(k_type * 100 + v_type * 10 + flag));
                for (int s = 0; s < SEQS; s++)
                    expect_ok(w.cache, kvt_seq_create(w.cache, &models[s].seq));
                for (size_t i = 0; i < operations; i++) {
                    seq_model *m = &models[rng_below(&w.r, SEQS)];
                    const char *what = operate(&w, m);
                    for (int s = 0; s < SEQS; s++)
                        expect_model(&w, &models[s], what);
                    expect_layer(&w, m, rng_below(&w.r, LAYERS), what);
                    if (i % 8 == 0) /* and layers of other sequences */
                        for (uint32_t layer = 0; layer < LAYERS; layer++)
                            expect_layer(&w, &models[rng_below(&w.r, SEQS)], layer, what);
                    reached[0] += m->length == MAX_TOKENS;
                    reached[1] += m->length % 64 == 0 && m->length > 0;
                    reached[2] += m->pending > 64;
                }
                for (int s = 0; s < SEQS; s++)
                    kvt_seq_destroy(models[s].seq);
                kvt_cache_destroy(w.cache);
                free(models);
            }
    printf("states seen: full %zu, at a block's end %zu, long steps %zu\n", reached[0], reached[1],
           reached[2]);
    if (!is_quick())
        assert_true(reached[0] > 10 && reached[1] > 10 && reached[2] > 10);
}

/* ---- guarantees one by one: one group, hashes ---- */

typedef struct pair {
    kvt_group_config group;
    kvt_cache *cache;
    kvt_seq *a, *b;
    tokens t, junk;
} pair;

static void open_pair(pair *p, kvt_type type, uint64_t max_tokens)
{
    rng r = {(uint64_t)type + 5};
    p->group = group_of(2, 4, 2, 40, 24, type, type);
    p->cache = cache_of(&p->group, max_tokens, 1, NULL);
    p->t = tokens_make(&r, (size_t)max_tokens, &p->group);
    p->junk = tokens_make(&r, (size_t)max_tokens, &p->group);
    for (size_t i = 0; i < max_tokens * 2 * 40; i++)
        p->junk.k[i] = p->junk.k[i] * 20 + 7; /* another offset altogether */
    expect_ok(p->cache, kvt_seq_create(p->cache, &p->a));
    expect_ok(p->cache, kvt_seq_create(p->cache, &p->b));
}

static void close_pair(pair *p)
{
    tokens_free(&p->t);
    tokens_free(&p->junk);
    kvt_seq_destroy(p->a);
    kvt_seq_destroy(p->b);
    kvt_cache_destroy(p->cache);
}

static uint64_t attend_hash(const pair *p, const kvt_seq *seq)
{
    float q[4 * 40], out[4 * 24];
    kvt_attend_item item = {.seq = seq, .n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    uint64_t h = 1;
    for (int i = 0; i < 4 * 40; i++)
        q[i] = (float)(i % 11) * 0.1f - 0.5f;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    for (args.layer = 0; args.layer < 2; args.layer++) {
        expect_ok(p->cache, kvt_attend(p->cache, &args));
        for (int i = 0; i < 4 * 24; i++) {
            uint32_t bits;
            memcpy(&bits, &out[i], sizeof bits);
            h = (h ^ bits) * 0x100000001b3u;
        }
    }
    return h;
}

/* Same contents, and the same attention. */
static void expect_same(const pair *p, const char *what, size_t n, size_t m)
{
    if (seq_hash(p->a, &p->group) != seq_hash(p->b, &p->group) ||
        attend_hash(p, p->a) != attend_hash(p, p->b))
        fail_msg("type %d: %s at %zu of %zu: other bits", (int)p->group.k_type, what, m, n);
}

static const size_t edges[] = {0, 1, 15, 16, 17, 32, 63, 64, 65, 127, 128, 129};
#define N_EDGES (sizeof edges / sizeof *edges)

/*
 * Truncate and go on, against a sequence that never had the part in between. For f32 and f16
 * always the same bits; for i8 where the part has at most 64 tokens, or is too short for any block
 * to be sealed by it.
 */
static void truncated_parts_leave_no_trace(void **state)
{
    (void)state;
    for (int type = 0; type < 3; type++)
        for (size_t cut = 0; cut < N_EDGES; cut++)
            for (size_t more = 1; more < N_EDGES; more++) {
                pair p;
                size_t keep = edges[cut], tail = edges[more];
                if (is_quick() && (cut * N_EDGES + more) % 7)
                    continue;
                if (type == KVT_TYPE_I8 && tail > 64 && (keep + tail) / 64 > (keep + 64) / 64)
                    continue;
                open_pair(&p, (kvt_type)type, 300);
                if (keep) {
                    append_step(p.cache, p.a, &p.group, &p.t, 0, keep);
                    append_step(p.cache, p.b, &p.group, &p.t, 0, keep);
                }
                append_step(p.cache, p.a, &p.group, &p.junk, keep, tail);
                expect_ok(p.cache, kvt_seq_truncate(p.a, keep));
                expect_same(&p, "truncate", keep, tail);
                append_step(p.cache, p.a, &p.group, &p.t, keep, 70);
                append_step(p.cache, p.b, &p.group, &p.t, keep, 70);
                expect_same(&p, "truncate and append", keep, tail);
                append_all(p.cache, p.a, &p.group, &p.t, keep + 70, 80, 9);
                append_all(p.cache, p.b, &p.group, &p.t, keep + 70, 80, 9);
                expect_same(&p, "truncate and append more", keep, tail);
                close_pair(&p);
            }
}

/*
 * What was cut off and comes again, however it is cut into appends, has the same bits as the first
 * time.
 */
static void what_was_cut_off_comes_again(void **state)
{
    (void)state;
    for (int type = 0; type < 3; type++)
        for (size_t block = 0; block < 3; block++)
            for (size_t keep = 1; keep < 64; keep += is_quick() ? 21 : 3) {
                pair p;
                uint64_t before;
                open_pair(&p, (kvt_type)type, 300);
                append_step(p.cache, p.a, &p.group, &p.t, 0, block * 64 + 64);
                before = seq_hash(p.a, &p.group);
                expect_ok(p.cache, kvt_seq_truncate(p.a, block * 64 + keep));
                append_all(p.cache, p.a, &p.group, &p.t, block * 64 + keep, 64 - keep,
                           1 + keep % 5);
                if (seq_hash(p.a, &p.group) != before)
                    fail_msg("type %d block %zu keep %zu: other bits", type, block, keep);
                close_pair(&p);
            }
}

/* Nothing depends on how appends are cut. test_seal.c has more of this. */
static void cuts_do_not_matter(void **state)
{
    (void)state;
    for (int type = 0; type < 3; type++)
        for (size_t step = 1; step < 70; step += is_quick() ? 16 : 3) {
            pair p;
            open_pair(&p, (kvt_type)type, 150);
            append_step(p.cache, p.a, &p.group, &p.t, 0, 150);
            append_all(p.cache, p.b, &p.group, &p.t, 0, 150, step);
            /* Ids are equal in both. */
            expect_same(&p, "step", 150, step);
            close_pair(&p);
        }
}

static void begin_and_append(const pair *p, kvt_seq *seq, const tokens *t, size_t first, size_t n,
                             uint32_t layers)
{
    kvt_tensor k = kvt_tensor_f32(t->k + first * 2 * 40), v = kvt_tensor_f32(t->v + first * 2 * 24);
    expect_ok(p->cache, kvt_seq_begin(seq, n, NULL));
    for (uint32_t layer = 0; layer < layers; layer++)
        expect_ok(p->cache, kvt_append(seq, layer, &k, &v));
}

/* An aborted step leaves no trace: neither in the contents nor in later steps. */
static void aborted_steps_leave_no_trace(void **state)
{
    (void)state;
    for (int type = 0; type < 3; type++)
        for (size_t at = 0; at < N_EDGES; at++)
            for (size_t n = 1; n < N_EDGES; n++)
                for (uint32_t layers = 0; layers < 3; layers++) {
                    pair p;
                    if (is_quick() && (at * N_EDGES + n) % 11)
                        continue;
                    open_pair(&p, (kvt_type)type, 300);
                    if (edges[at]) {
                        append_all(p.cache, p.a, &p.group, &p.t, 0, edges[at], 48);
                        append_all(p.cache, p.b, &p.group, &p.t, 0, edges[at], 48);
                    }
                    begin_and_append(&p, p.a, &p.junk, edges[at], edges[n], layers);
                    assert_true(kvt_seq_pending(p.a) == edges[n]);
                    expect_ok(p.cache, kvt_seq_abort(p.a));
                    expect_ok(p.cache, kvt_seq_abort(p.a));
                    assert_true(kvt_seq_pending(p.a) == 0);
                    expect_same(&p, "abort", edges[at], edges[n]);
                    append_all(p.cache, p.a, &p.group, &p.t, edges[at], 100, 37);
                    append_all(p.cache, p.b, &p.group, &p.t, edges[at], 100, 37);
                    expect_same(&p, "abort and append", edges[at], edges[n]);
                    close_pair(&p);
                }
}

/* Pending tokens are visible to attend on layers that have them, and only there. */
static void attend_sees_pending_tokens(void **state)
{
    (void)state;
    for (int type = 0; type < 3; type++) {
        pair p;
        float q[4 * 40], lse[2][4], out[4 * 24];
        kvt_attend_item item = {.n_queries = 1};
        kvt_attend_args args = kvt_attend_args_init();
        open_pair(&p, (kvt_type)type, 300);
        for (int i = 0; i < 4 * 40; i++)
            q[i] = 1;
        append_step(p.cache, p.a, &p.group, &p.t, 0, 70);
        append_step(p.cache, p.b, &p.group, &p.t, 0, 70);
        begin_and_append(&p, p.a, &p.t, 70, 20, 1);
        args.items = &item;
        args.n_items = 1;
        args.q = kvt_tensor_f32(q);
        args.out = kvt_tensor_f32(out);
        for (args.layer = 0; args.layer < 2; args.layer++) {
            for (int with = 0; with < 2; with++) {
                item.seq = with ? p.a : p.b;
                args.lse = lse[with];
                expect_ok(p.cache, kvt_attend(p.cache, &args));
            }
            for (int h = 0; h < 4; h++) /* a softmax over more tokens has a larger denominator */
                assert_true(args.layer == 0 ? lse[1][h] > lse[0][h] : lse[1][h] == lse[0][h]);
        }
        close_pair(&p);
    }
}

static void commit_names_the_forgotten_layer(void **state)
{
    kvt_group_config g = group_of(9, 1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    float x[8] = {1};
    kvt_tensor t = kvt_tensor_f32(x);
    kvt_cache *cache = cache_of(&g, 8, 1, NULL);
    kvt_seq *seq = NULL;
    (void)state;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    for (uint32_t forgotten = 0; forgotten < 9; forgotten++) {
        char name[20];
        snprintf(name, sizeof name, "layer %u ", forgotten);
        expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
        for (uint32_t layer = 9; layer-- > 0;)
            if (layer != forgotten)
                expect_ok(cache, kvt_append(seq, layer, &t, &t));
        expect(cache, KVT_ERR_STATE, kvt_seq_commit(seq, NULL));
        expect_error_text(cache, name, "commit");
        assert_true(kvt_seq_pending(seq) == 1);
        if (forgotten % 2)
            expect_ok(cache, kvt_seq_abort(seq));
        else {
            expect_ok(cache, kvt_append(seq, forgotten, &t, &t));
            expect_ok(cache, kvt_seq_commit(seq, NULL));
        }
    }
    assert_true(kvt_seq_length(seq) == 5);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* max_tokens is reached exactly and not passed, wherever it lies in a tile and a block. */
static void max_tokens_exactly(void **state)
{
    (void)state;
    for (size_t i = 1; i < N_EDGES; i++)
        for (size_t step = 1; step <= edges[i]; step = step * 3 + 1) {
            size_t max = edges[i];
            pair p;
            open_pair(&p, KVT_TYPE_I8, max);
            append_all(p.cache, p.a, &p.group, &p.t, 0, max, step);
            assert_true(kvt_seq_length(p.a) == max && kvt_seq_max_tokens(p.a) == max);
            assert_true(kvt_seq_capacity(p.a) == max);
            expect(p.cache, KVT_ERR_FULL, kvt_seq_begin(p.a, 1, NULL));
            expect(p.cache, KVT_ERR_FULL, kvt_seq_begin(p.b, max + 1, NULL));
            expect_ok(p.cache, kvt_seq_truncate(p.a, max - 1));
            expect(p.cache, KVT_ERR_FULL, kvt_seq_begin(p.a, 2, NULL));
            append_step(p.cache, p.a, &p.group, &p.t, max - 1, 1);
            expect(p.cache, KVT_ERR_FULL, kvt_seq_begin(p.a, 1, NULL));
            close_pair(&p);
        }
}

static void positions_up_to_the_last(void **state)
{
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_F32, KVT_TYPE_F32);
    float x[80 * 8] = {1};
    kvt_tensor t = kvt_tensor_f32(x);
    kvt_cache *cache = cache_of(&g, 80, 1, NULL);
    kvt_seq *seq = NULL;
    int32_t given[3] = {5, 5, INT32_MAX - 3}, got[70];
    (void)state;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    assert_int_equal(kvt_seq_next_position(seq), 0);
    expect_ok(cache, kvt_seq_begin(seq, 3, given));
    assert_int_equal(kvt_seq_next_position(seq), 0); /* of the committed ones */
    expect_ok(cache, kvt_append(seq, 0, &t, &t));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    assert_int_equal(kvt_seq_next_position(seq), INT32_MAX - 2);
    expect(cache, KVT_ERR_ARG, kvt_seq_begin(seq, 4, NULL));
    expect_error_text(cache, "INT32_MAX", "begin");
    assert_true(kvt_seq_pending(seq) == 0);
    expect_ok(cache, kvt_seq_begin(seq, 3, NULL));
    expect_ok(cache, kvt_append(seq, 0, &t, &t));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    expect_ok(cache, kvt_seq_positions(seq, 0, 6, got));
    assert_int_equal(got[1], 5);
    assert_int_equal(got[3], INT32_MAX - 2);
    assert_int_equal(got[5], INT32_MAX);
    expect(cache, KVT_ERR_ARG, kvt_seq_begin(seq, 1, NULL)); /* INT32_MAX + 1 */
    expect_ok(cache, kvt_seq_begin(seq, 1, given));          /* given ones go anywhere */
    expect_ok(cache, kvt_append(seq, 0, &t, &t));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    assert_int_equal(kvt_seq_next_position(seq), 6);
    expect_ok(cache, kvt_seq_begin(seq, 70, NULL)); /* across a block */
    expect_ok(cache, kvt_append(seq, 0, &t, &t));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    expect_ok(cache, kvt_seq_positions(seq, 7, 70, got));
    for (int i = 0; i < 70; i++)
        assert_int_equal(got[i], 6 + i);
    expect_ok(cache, kvt_seq_truncate(seq, 3));
    assert_int_equal(kvt_seq_next_position(seq), INT32_MAX - 2);
    expect_ok(cache, kvt_seq_clear(seq));
    assert_int_equal(kvt_seq_next_position(seq), 0);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_operations),
        cmocka_unit_test(truncated_parts_leave_no_trace),
        cmocka_unit_test(what_was_cut_off_comes_again),
        cmocka_unit_test(cuts_do_not_matter),
        cmocka_unit_test(aborted_steps_leave_no_trace),
        cmocka_unit_test(attend_sees_pending_tokens),
        cmocka_unit_test(commit_names_the_forgotten_layer),
        cmocka_unit_test(max_tokens_exactly),
        cmocka_unit_test(positions_up_to_the_last),
    };
    return cmocka_run_group_tests_name("steps", tests, NULL, NULL);
}
