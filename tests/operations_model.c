/*
 * The model of test_operations.c: tokens, logs, mirrors and comparisons.
 */
#include "operations_model.h"

#include <math.h>
#include <stdio.h>

/* ---- failures ---- */

void report(const actor *a, const char *where, const char *what)
{
    fprintf(stderr, "seed %llu, operation %zu (%s): %s: %s\n", (unsigned long long)a->w->seed,
            a->operation, a->name, where, what);
    fail();
}

void must_at(const actor *a, const kvt_cache *cache, kvt_status got, const char *where)
{
    char text[256] = "";
    if (got == KVT_OK)
        return;
    kvt_cache_error(cache, text, sizeof text);
    report(a, where, text);
}

void check_at(const actor *a, int holds, const char *where)
{
    if (!holds)
        report(a, where, "does not hold");
}

void *room(size_t n)
{
    void *memory = malloc(n ? n : 1);
    if (!memory)
        abort();
    return memory;
}

size_t calls_of(const world *w)
{
    return w->is_shared ? 0 : w->memory.calls;
}

/* ---- K and V of a token ---- */

enum { NORMALS = 4096 };

static float normals[NORMALS];

void make_normals(void)
{
    rng r = {20};
    for (size_t i = 0; i < NORMALS; i++)
        normals[i] = (float)rng_normal(&r);
}

/* All heads of one token of a layer: a bias on some dims, and now and then an outlier. */
static void row_of(const world *w, uint32_t content, uint32_t layer, kvt_side side, float *row)
{
    const kvt_group_config *g = &w->groups[w->group_of_layer[layer]];
    int v_in_k = (g->flags & KVT_GROUP_V_IN_K) != 0;
    rng r = {(uint64_t)content << 8 ^ layer << 1 ^ (side == KVT_SIDE_V && !v_in_k)};
    uint32_t dim = side == KVT_SIDE_K ? g->k_dim : g->v_dim;
    float scale = rng_below(&r, 97) == 0 ? 20.0f : 1.0f;
    for (uint32_t h = 0; h < g->n_kv_heads; h++) {
        uint64_t at = rng_next(&r), step = at >> 32 | 1;
        for (uint32_t d = 0; d < dim; d++)
            row[h * dim + d] =
                scale * (normals[(at + d * step) % NORMALS] + (d % 7 == 3 ? 3.0f : 0.5f));
    }
}

size_t row_floats(const world *w, uint32_t layer, kvt_side side)
{
    const kvt_group_config *g = &w->groups[w->group_of_layer[layer]];
    return (size_t)g->n_kv_heads * (side == KVT_SIDE_K ? g->k_dim : g->v_dim);
}

/* Rows of n tokens, malloc'ed. */
float *rows_of(const world *w, const token *fed, size_t n, uint32_t layer, kvt_side side)
{
    size_t row = row_floats(w, layer, side);
    float *x = room(n * row * sizeof *x);
    for (size_t i = 0; i < n; i++)
        row_of(w, fed[i].content, layer, side, x + i * row);
    return x;
}

/* By `by` positions, as the group's RoPE is described. */
static void turn(const world *w, uint32_t g, double by, float *x)
{
    const kvt_group_config *group = &w->groups[g];
    const int halves = group->rope_pairing == KVT_ROPE_HALVES;
    for (uint32_t i = 0; i < group->rope_dims / 2; i++) {
        size_t first = group->rope_first_dim + (halves ? i : 2 * (size_t)i);
        size_t second = first + (halves ? group->rope_dims / 2 : 1);
        double angle = by * (double)w->frequencies[g][i], c = cos(angle), s = sin(angle);
        double a = (double)x[first], b = (double)x[second];
        x[first] = (float)(a * c - b * s);
        x[second] = (float)(a * s + b * c);
    }
}

void turn_rows(const world *w, const token *fed, size_t n, uint32_t layer, float *keys)
{
    const uint32_t g = w->group_of_layer[layer];
    const size_t row = row_floats(w, layer, KVT_SIDE_K), dim = w->groups[g].k_dim;
    for (size_t i = 0; i < n; i++)
        for (size_t d = 0; d < row && fed[i].key != fed[i].position; d += dim)
            turn(w, g, (double)fed[i].position - (double)fed[i].key, keys + i * row + d);
}

/* ---- steps of a sequence, or of its mirror ---- */

void begin_step(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n)
{
    int32_t positions[MOST];
    for (size_t i = 0; i < n; i++)
        positions[i] = fed[i].position;
    must_at(a, cache, kvt_seq_begin(seq, n, positions), "begin");
}

/* By a call, or a plan whose tasks run in descending order. */
void append_layer(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n,
                  uint32_t layer, int by_plan)
{
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[layer]];
    float *k = rows_of(a->w, fed, n, layer, KVT_SIDE_K);
    float *v = rows_of(a->w, fed, n, layer, KVT_SIDE_V);
    kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
    const kvt_tensor *v_given = g->flags & KVT_GROUP_V_IN_K ? NULL : &v_view;
    if (by_plan) {
        kvt_append_plan plan;
        must_at(a, cache, kvt_append_plan_init(&plan, seq, layer, &k_view, v_given), "plan");
        for (size_t i = plan.n_tasks; i-- > 0;)
            must_at(a, cache, kvt_append_task(&plan, i), "append task");
        must_at(a, cache, kvt_append_finish(&plan), "append finish");
    } else {
        must_at(a, cache, kvt_append(seq, layer, &k_view, v_given), "append");
    }
    free(k);
    free(v);
}

void commit_step(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n)
{
    int32_t ids[MOST];
    for (size_t i = 0; i < n; i++)
        ids[i] = fed[i].id;
    must_at(a, cache, kvt_seq_commit(seq, ids), "commit");
}

void step_whole(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n)
{
    begin_step(a, cache, seq, fed, n);
    for (uint32_t l = 0; l < a->w->n_layers; l++)
        append_layer(a, cache, seq, fed, n, l, 0);
    commit_step(a, cache, seq, fed, n);
}

void some_tokens(actor *a, int32_t next, token *fed, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        fed[i].content = a->next_content++;
        fed[i].position = fed[i].key = next + (int32_t)i;
        fed[i].id = (int32_t)(fed[i].content % 50000);
    }
}

kvt_seq *tagged_seq(const actor *a, kvt_cache *cache, uint32_t tag)
{
    char text[32];
    kvt_seq *seq = NULL;
    must_at(a, cache, kvt_seq_create(cache, &seq), "create");
    must_at(a, cache, kvt_seq_set_tag(seq, text, tag_of(tag, text)), "tag");
    return seq;
}

kvt_save_options save_options(uint32_t codec)
{
    kvt_save_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = codec;
    options.no_fsync = 1;
    return options;
}

bytes save_raw(const actor *a, const kvt_cache *cache, const kvt_seq *seq)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options = save_options(KVT_CODEC_RAW);
    must_at(a, cache, kvt_seq_save_stream(seq, &writer, &options), "save");
    return b;
}

size_t tag_of(size_t number, char *text)
{
    return number ? (size_t)snprintf(text, 32, "tag %zu", number) : 0;
}

size_t blob_of(size_t number, unsigned char *data)
{
    for (size_t i = 0; i < BLOB_BYTES; i++)
        data[i] = (unsigned char)(number * 7 + i);
    return number % (BLOB_BYTES + 1);
}

/* ---- logs and mirrors ---- */

void log_add(history *l, kind what, size_t first, size_t n, const token *fed)
{
    size_t more = what == STEP ? n : 0;
    l->entries = realloc(l->entries, (l->n_entries + 1) * sizeof *l->entries);
    l->tokens = realloc(l->tokens, (l->n_tokens + more + 1) * sizeof *l->tokens);
    if (!l->entries || !l->tokens)
        abort();
    l->entries[l->n_entries++] = (entry){what, n, what == STEP ? l->n_tokens : first};
    if (more && fed)
        memcpy(l->tokens + l->n_tokens, fed, more * sizeof *fed);
    l->n_tokens += more;
}

void log_free(history *l)
{
    free(l->entries);
    free(l->tokens);
    memset(l, 0, sizeof *l);
}

history log_copy(const history *from)
{
    history l = *from;
    l.entries = room(from->n_entries * sizeof *l.entries);
    l.tokens = room(from->n_tokens * sizeof *l.tokens);
    if (from->n_entries)
        memcpy(l.entries, from->entries, from->n_entries * sizeof *l.entries);
    if (from->n_tokens)
        memcpy(l.tokens, from->tokens, from->n_tokens * sizeof *l.tokens);
    return l;
}

static void replay_entry(const actor *a, kvt_seq *seq, const entry *e, const token *fed)
{
    static const token none;
    unsigned char blob[BLOB_BYTES];
    char tag[32];
    size_t n;
    bytes b;
    switch (e->kind) {
    case STEP: step_whole(a, a->mirrors, seq, fed, e->n); break;
    case DROPPED: /* how many tokens it had shows nowhere */
        begin_step(a, a->mirrors, seq, &none, 1);
        must_mirror(a, kvt_seq_abort(seq));
        break;
    case TRUNCATE: must_mirror(a, kvt_seq_truncate(seq, e->n)); break;
    case REMOVE: must_mirror(a, kvt_seq_remove(seq, e->first, e->n)); break;
    case CHECKPOINT:
        n = blob_of(e->n, blob);
        must_mirror(a, kvt_seq_checkpoint(seq, n ? blob : NULL, n));
        break;
    case DROP: must_mirror(a, kvt_seq_checkpoint_drop(seq, e->n)); break;
    case POSITION: must_mirror(a, kvt_seq_set_next_position(seq, (int32_t)e->n)); break;
    case TAG:
        n = tag_of(e->n, tag);
        must_mirror(a, kvt_seq_set_tag(seq, tag, n));
        break;
    case RELOAD:
        b = save_raw(a, a->mirrors, seq);
        must_mirror(a, load_bytes(seq, b.data, b.n, NULL));
        bytes_free(&b);
        break;
    case GOT: must_mirror(a, load_bytes(seq, a->got[e->n].data, a->got[e->n].n, NULL)); break;
    }
}

/* A step's tokens. */
static const token *fed_of(const history *l, const entry *e)
{
    return e->kind == STEP ? l->tokens + e->first : NULL;
}

kvt_seq *replay(const actor *a, const history *l)
{
    kvt_seq *seq = NULL;
    must_mirror(a, kvt_seq_create(a->mirrors, &seq));
    for (size_t i = 0; i < l->n_entries; i++)
        replay_entry(a, seq, &l->entries[i], fed_of(l, &l->entries[i]));
    return seq;
}

void did(const actor *a, member *m, kind what, size_t first, size_t n)
{
    log_add(&m->log, what, first, n, NULL);
    replay_entry(a, m->mirror, &m->log.entries[m->log.n_entries - 1], NULL);
}

void copy_model(member *to, const member *from)
{
    *to = *from;
    to->seq = to->mirror = NULL;
    to->log = log_copy(&from->log);
}

size_t deepest(const actor *a, const member *m, size_t n)
{
    while (!model_reaches(a->w, m, n))
        n--;
    return n;
}

/* ---- comparisons ---- */

size_t visible(const member *m, uint32_t layer)
{
    return m->length + (m->appended >> layer & 1 ? m->pending : 0);
}

static void expect_tokens(const actor *a, const member *m)
{
    int32_t values[MOST];
    check(a, kvt_seq_length(m->seq) == m->length);
    check(a, kvt_seq_pending(m->seq) == m->pending);
    check(a, kvt_seq_next_position(m->seq) == model_next_position(m));
    must(a, kvt_seq_positions(m->seq, 0, m->length, values));
    for (size_t i = 0; i < m->length; i++)
        check(a, values[i] == m->tokens[i].position);
    must(a, kvt_seq_key_positions(m->seq, 0, m->length, values));
    for (size_t i = 0; i < m->length; i++)
        check(a, values[i] == m->tokens[i].key);
    must(a, kvt_seq_token_ids(m->seq, 0, m->length, values));
    for (size_t i = 0; i < m->length; i++)
        check(a, values[i] == m->tokens[i].id);
}

/* The checkpoints with their blobs, and the tag. */
static void expect_points(const actor *a, const member *m)
{
    uint64_t at[POINTS];
    unsigned char blob[BLOB_BYTES], data[BLOB_BYTES];
    char tag[32], got[32];
    size_t n, size;
    must(a, kvt_seq_checkpoints(m->seq, at, POINTS, &n));
    check(a, n == m->n_points);
    for (size_t i = 0; i < n; i++) {
        check(a, at[i] == m->points[i].n_tokens);
        must(a, kvt_seq_checkpoint_read(m->seq, at[i], data, BLOB_BYTES, &size));
        check(a, size == blob_of(m->points[i].blob, blob) && memcmp(blob, data, size) == 0);
    }
    must(a, kvt_seq_tag(m->seq, got, sizeof got, &size));
    check(a, size == tag_of(m->tag, tag) && memcmp(got, tag, size) == 0);
}

/*
 * The most that a row of a type is off as read back, as a norm, from its squared norm. i8: a step
 * of the largest element a dim, which is at most the norm of the row less its offset. The offset is
 * at most about an ordinary row, of mean square 2.3. i4: of K, a step of an outlier.
 */
static double row_bound(kvt_type type, kvt_side side, size_t dim, double norm)
{
    return type == KVT_TYPE_F32   ? 0
           : type == KVT_TYPE_F16 ? 0x1p-11 * sqrt(norm) + 1e-6
           : type == KVT_TYPE_I8
               ? sqrt((double)dim) / 127 * (sqrt(norm) + 2 * sqrt(2.3 * (double)dim))
           : side == KVT_SIDE_V ? (type == KVT_TYPE_I4 ? 0.25 : 0.12) * sqrt(norm)
                                : sqrt((double)dim) * 2 * 160 / 15;
}

void expect_near(const actor *a, uint32_t layer, kvt_side side, const kvt_group_config *to,
                 const token *of, size_t n, const float *got)
{
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[layer]];
    size_t row = row_floats(a->w, layer, side), dim = row / g->n_kv_heads;
    float *fed = rows_of(a->w, of, n, layer, side);

    for (size_t i = 0; i < n * row; i += dim) {
        double error = 0, norm = 0, bound;
        for (size_t d = i; d < i + dim; d++) {
            error += ((double)got[d] - (double)fed[d]) * ((double)got[d] - (double)fed[d]);
            norm += (double)fed[d] * (double)fed[d];
        }
        bound = row_bound(side == KVT_SIDE_K ? g->k_type : g->v_type, side, dim, norm);
        if (to) { /* rounded again, with the first error */
            norm = (sqrt(norm) + bound) * (sqrt(norm) + bound);
            bound += row_bound(side == KVT_SIDE_K ? to->k_type : to->v_type, side, dim, norm);
        }
        check(a, sqrt(error) <= bound);
    }
    free(fed);
}

void expect_read(const actor *a, const member *m, uint32_t layer, kvt_side side, size_t first,
                 size_t n)
{
    size_t row = row_floats(a->w, layer, side);
    float *got = room(n * row * sizeof *got), *same = room(n * row * sizeof *same);
    kvt_tensor got_view = kvt_tensor_f32(got), same_view = kvt_tensor_f32(same);

    if (!is_there(a->w, m, layer, first, n)) {
        check(a, kvt_read(m->seq, layer, side, first, n, &got_view) == KVT_ERR_STATE);
        check(a, kvt_read(m->mirror, layer, side, first, n, &same_view) == KVT_ERR_STATE);
        n = 0;
    }
    must(a, kvt_read(m->seq, layer, side, first, n, &got_view));
    must_mirror(a, kvt_read(m->mirror, layer, side, first, n, &same_view));
    check(a, memcmp(got, same, n * row * sizeof *got) == 0);
    expect_near(a, layer, side, NULL, m->tokens + first, n, got);
    free(got);
    free(same);
}

void expect_same_file(const actor *a, const kvt_cache *cache, const kvt_seq *seq,
                      const kvt_cache *other_cache, const kvt_seq *other, const char *what)
{
    bytes x = save_raw(a, cache, seq), y = save_raw(a, other_cache, other);
    give_keys(&x);
    give_keys(&y);
    if (x.n != y.n || memcmp(x.data, y.data, x.n) != 0)
        report(a, what, "the files differ");
    bytes_free(&x);
    bytes_free(&y);
}

/* A pending step's sequence cannot be saved: what is there of a layer is read. */
static void expect_layer(const actor *a, const member *m, uint32_t layer, kvt_side side)
{
    uint32_t g = a->w->group_of_layer[layer];
    size_t first = m->forms[g].first * KVT_BLOCK_TOKENS;
    if (first)
        expect_read(a, m, layer, side, 0, sink_rows(a->w, g) * KVT_BLOCK_TOKENS);
    expect_read(a, m, layer, side, first, visible(m, layer) - first);
}

void expect_mirrored(const actor *a, const member *m)
{
    expect_tokens(a, m);
    expect_points(a, m);
    if (!m->pending) {
        expect_same_file(a, a->w->cache, m->seq, a->mirrors, m->mirror, "against the mirror");
        return;
    }
    for (uint32_t l = 0; l < a->w->n_layers; l++)
        for (int side = 0; side < 2; side++)
            expect_layer(a, m, l, (kvt_side)side);
}

/* Of a sequence that has checkpoints: what it is without them. */
static kvt_seq *without_points(const actor *a, const member *m)
{
    kvt_seq *copy = NULL;
    must_mirror(a, kvt_seq_fork(m->mirror, m->length, &copy));
    for (size_t i = 0; i < m->n_points; i++)
        must_mirror(a, kvt_seq_checkpoint_drop(copy, m->points[i].n_tokens));
    return copy;
}

void expect_straight(actor *a, const member *m)
{
    history straight = {NULL, NULL, 0, 0};
    kvt_seq *seq, *copy;
    if (m->pending || !m->length || !is_straight(a->w, m))
        return;
    a->met.straight++;
    log_add(&straight, TAG, 0, m->tag, NULL);
    log_add(&straight, STEP, 0, m->length, m->tokens);
    if (m->next_position >= 0)
        log_add(&straight, POSITION, 0, (size_t)m->next_position, NULL);
    seq = replay(a, &straight);
    if (m->n_points) {
        copy = without_points(a, m);
        expect_same_file(a, a->mirrors, copy, a->mirrors, seq,
                         "without checkpoints, against a straight build");
        kvt_seq_destroy(copy);
    } else {
        expect_same_file(a, a->w->cache, m->seq, a->mirrors, seq, "against a straight build");
    }
    kvt_seq_destroy(seq);
    log_free(&straight);
}

void expect_all(const actor *a)
{
    for (size_t i = 0; i < SEQS; i++)
        if (a->members[i].seq)
            expect_mirrored(a, &a->members[i]);
}

void expect_bytes(const actor *a)
{
    const world *w = a->w;
    kvt_cache_stats all = {.struct_size = sizeof all};
    uint64_t n = 0, own = 0, shared = 0, exempt = 0, others;
    int plain = 1, reserves = 0, uncounted = 0;

    if (w->is_shared)
        return;
    must(a, kvt_cache_get_stats(w->cache, &all));
    for (size_t i = 0; i < SEQS; i++) {
        const member *m = &a->members[i];
        kvt_seq_stats one = {.struct_size = sizeof one};
        if (!m->seq)
            continue;
        must(a, kvt_seq_get_stats(m->seq, &one));
        check(a, kvt_seq_memory_bytes(m->seq) == one.own_bytes + one.shared_bytes);
        if (!m->pending && !m->reserves && !m->uncounted) {
            check(a, one.own_bytes + one.shared_bytes == kvt_seq_memory_bytes(m->mirror));
            if (!m->n_points && !m->turned)
                check(a, one.own_bytes + one.shared_bytes == model_bytes(w, m));
        }
        n++;
        own += one.own_bytes;
        shared += one.shared_bytes;
        exempt += exempt_bytes(w, m);
        plain &= !m->n_points && !m->turned;
        reserves |= m->reserves || m->pending;
        uncounted |= m->uncounted;
    }
    check(a, all.bytes == w->memory.live_bytes);
    check(a, all.bytes == kvt_cache_memory_bytes(w->cache));
    check(a, all.blocks_sealed <= all.blocks_used && all.blocks_shared <= all.blocks_used);
    if (uncounted) /* what a mapping takes is no block, and beside the budget */
        return;
    if (w->config.memory_budget_bytes)
        check(a, all.bytes - all.bytes_free <= w->config.memory_budget_bytes + exempt);
    /* What several sequences have, once. */
    others = all.bytes - w->cache_bytes - all.bytes_free - own;
    check(a, shared >= 2 * others && shared <= n * others);
    /* A block that a sequence shares with its own checkpoint is shared, too, to the cache. */
    check(a, plain ? others == all.bytes_shared : others <= all.bytes);
    /* But for blocks: the keys for a selection in block 0, of a pending step or of a reserve. */
    others = all.bytes - (w->cache_bytes + n * w->seq_bytes + all.bytes_free + all.bytes_reserved +
                          all.bytes_used);
    check(a, !plain || others == 0 || reserves);
    check(a, others <= all.bytes);
}

/* ---- calls that may be refused ---- */

void arm(actor *a)
{
    if (a->w->injects && rng_below(&a->r, 3) == 0)
        a->w->memory.countdown = (long)rng_below(&a->r, 6);
}

int succeeded(actor *a, kvt_status status, const member *m)
{
    int was_armed = !a->w->is_shared && a->w->memory.countdown >= 0;
    if (was_armed)
        a->w->memory.countdown = -1;
    if (status == KVT_OK)
        return 1;
    if (!(status == KVT_ERR_MEMORY && was_armed) &&
        !(status == KVT_ERR_BUDGET && a->w->config.memory_budget_bytes))
        must_at(a, a->w->cache, status, "refused");
    a->met.refused++;
    if (m && m->seq)
        expect_mirrored(a, m);
    return 0;
}

void refused(actor *a, kvt_status status, kvt_status expected, const member *m)
{
    if (status != expected) {
        must(a, status);
        report(a, "a call", "was not refused");
    }
    a->met.refused++;
    expect_mirrored(a, m);
}

void disarm(const actor *a)
{
    if (!a->w->is_shared)
        a->w->memory.countdown = -1;
}

void set_tag(actor *a, member *m, uint32_t number)
{
    char tag[32];
    must(a, kvt_seq_set_tag(m->seq, tag, tag_of(number, tag)));
    did(a, m, TAG, 0, number);
    m->tag = number;
}

void clear(actor *a, member *m)
{
    must(a, kvt_seq_clear(m->seq));
    must_mirror(a, kvt_seq_clear(m->mirror));
    log_free(&m->log);
    log_add(&m->log, TAG, 0, m->tag, NULL);
    forms_clear(m->forms);
    m->length = m->pending = m->appended = 0;
    m->n_points = 0;
    m->next_position = -1;
    m->turned = m->uncounted = 0;
    m->unkeyed = SIZE_MAX;
}
