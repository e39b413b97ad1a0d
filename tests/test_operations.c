/*
 * Long random runs of operations on the sequences of one cache, against a plain model.
 *
 * The model of a sequence is a list of tokens and a log of all that was done to it since it was
 * empty. A token's K and V are functions of its number (content). The log of a fork is that of its
 * source, and a truncate. Each sequence has a mirror: a sequence of a second cache, without forks,
 * threads and budget, that the log has been replayed on. What a sequence shows has to be its
 * mirror's, to the bit: the saved file, what is read back, attention. Where the header promises it
 * (is_straight), the file is also that of a sequence which got its tokens in one step; and what is
 * read back, and attention, are held to the tokens' K and V themselves.
 *
 * After every operation the bytes are added up: the allocator's, the cache's, those of all
 * sequences. A call that is refused, by the budget, an allocator that fails or for a reason that
 * the model knows, changes nothing. The mirror of a selection is a step of the selected tokens
 * alone.
 *
 * An operation is an entry of operations[]: a function that changes a sequence and its model, and
 * logs what has been done. What the mirror does is in replay_entry (operations_model.c), what calls
 * have to answer in operations_forms.c, attention in operations_attention.c, snapshots (whole, of
 * parts, deltas, mapped, damaged) in operations_files.c, those of them whose damage is found late
 * in operations_late.c, other types in operations_convert.c, and stores of prefixes, of which there
 * is a model too, in operations_store.c.
 *
 * KVT_TEST_OPERATIONS=n makes n runs of random operations, and n / 10 in threads (20000: the full
 * count, a quarter of an hour). A failure prints its seed; KVT_TEST_SEED=n makes that seed's run
 * alone.
 */
#include "operations_model.h"

#include <math.h>
#include <stdio.h>

enum { ACTORS = 3 };

#if defined(__SANITIZE_THREAD__)
#define HAS_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HAS_THREAD_SANITIZER 1
#endif
#endif
#ifndef HAS_THREAD_SANITIZER
#define HAS_THREAD_SANITIZER 0
#endif

static member *vacancy(actor *a)
{
    for (size_t i = 0; i < SEQS; i++)
        if (!a->members[i].seq)
            return &a->members[i];
    return NULL;
}

/* ---- operations ---- */

static void create(actor *a, member *m)
{
    (void)m;
    m = vacancy(a);
    if (!m)
        return;
    memset(m, 0, sizeof *m);
    forms_clear(m->forms);
    m->next_position = -1;
    m->unkeyed = SIZE_MAX;
    arm(a);
    if (!succeeded(a, kvt_seq_create(a->w->cache, &m->seq), NULL)) {
        m->seq = NULL;
        return;
    }
    must_mirror(a, kvt_seq_create(a->mirrors, &m->mirror));
    if (rng_below(&a->r, 4) == 0)
        set_tag(a, m, 1 + rng_below(&a->r, 3));
}

static void destroy(actor *a, member *m)
{
    (void)a;
    kvt_seq_destroy(m->seq);
    kvt_seq_destroy(m->mirror);
    log_free(&m->log);
    m->seq = m->mirror = NULL;
}

/* Lengths near the end, a block's border, or anywhere. */
static size_t some_length(actor *a, size_t length)
{
    size_t n = length;
    switch (rng_below(&a->r, 6)) {
    case 0: break;
    case 1: n -= n < 64 ? rng_below(&a->r, (uint32_t)n + 1) : rng_below(&a->r, 65); break;
    case 2: n = length / 64 * 64; break;
    case 3: n = length / 64 * 64 + rng_below(&a->r, 3); break;
    case 4: n -= n ? 1 : 0; break;
    default: n = rng_below(&a->r, (uint32_t)length + 1); break;
    }
    return n < length ? n : length;
}

/* What a cache has but for free blocks. */
static uint64_t used_bytes(const world *w)
{
    kvt_cache_stats all = {.struct_size = sizeof all};
    expect_ok(w->cache, kvt_cache_get_stats(w->cache, &all));
    return all.bytes - all.bytes_free;
}

/* A fork of a sequence without a step has no block of its own; used: used_bytes before it. */
static void expect_all_shared(const actor *a, const member *m, const kvt_seq *copy, uint64_t used)
{
    kvt_seq_stats one = {.struct_size = sizeof one};
    if ((m->pending && m->length % KVT_BLOCK_TOKENS) || a->w->is_shared || m->n_points || m->turned)
        return;
    must(a, kvt_seq_get_stats(copy, &one));
    check(a, one.own_bytes == a->w->seq_bytes);
    check(a, used_bytes(a->w) == used + a->w->seq_bytes);
}

/* A fork of n tokens in `copy`, a vacant member of `to`. 0: it was refused. */
static int fork_tokens(actor *a, member *m, size_t n, const actor *to, member *copy)
{
    kvt_seq *seq = NULL;
    uint64_t used = used_bytes(a->w);
    arm(a);
    if (!model_reaches(a->w, m, n)) {
        disarm(a);
        refused(a, kvt_seq_fork(m->seq, n, &seq), KVT_ERR_STATE, m);
        return 0;
    }
    if (!succeeded(a, kvt_seq_fork(m->seq, n, &seq), m)) {
        check(a, seq == NULL);
        return 0;
    }
    a->met.forks++;
    expect_all_shared(a, m, seq, used);
    copy_model(copy, m);
    copy->seq = seq;
    if (m->pending) /* its begin has ended the time of drafts */
        log_add(&copy->log, DROPPED, 0, 0, NULL);
    log_add(&copy->log, TRUNCATE, 0, n, NULL);
    model_truncate(a->w, copy, n);
    copy->pending = copy->appended = 0;
    copy->reserves = 0;
    copy->mirror = replay(to, &copy->log);
    expect_mirrored(to, copy);
    return 1;
}

static void fork_seq(actor *a, member *m)
{
    member *copy = vacancy(a);
    if (copy)
        fork_tokens(a, m, some_length(a, m->length), a, copy);
}

static size_t some_step(actor *a, const member *m)
{
    size_t to_border = 64 - m->length % 64;
    switch (rng_below(&a->r, 10)) {
    case 0:
    case 1:
    case 2: return 1;
    case 3: return to_border;
    case 4: return to_border + 1;
    case 5: return to_border > 1 ? to_border - 1 : 127;
    case 6: return 63 + rng_below(&a->r, 3);
    case 7:
    case 8: return 1 + rng_below(&a->r, 20);
    default: return 1 + rng_below(&a->r, 200);
    }
}

/* Positions that a caller gives: with gaps, shared ones, and in a wild world any. */
static int32_t given_position(actor *a, int32_t next, size_t i)
{
    if (a->w->is_wild && rng_below(&a->r, 8) == 0)
        return (int32_t)rng_below(&a->r, 2 * (uint32_t)next + 10);
    return next + (int32_t)(next % 2 ? 2 * i + 5 : i / 4);
}

/* Begin a step of n new tokens, positions given or counted on. 0: it was refused. */
static int begin_tokens(actor *a, member *m, size_t n, int given)
{
    int32_t positions[MOST];
    int32_t next = kvt_seq_next_position(m->seq);
    for (size_t i = 0; i < n; i++) {
        token *t = &m->tokens[m->length + i];
        t->content = a->next_content++;
        t->position = t->key = given ? given_position(a, next, i) : next + (int32_t)i;
        t->id =
            a->w->has_ids || rng_below(&a->r, 5) ? (int32_t)(t->content % 50000) : KVT_TOKEN_NONE;
        positions[i] = t->position;
    }
    arm(a);
    if (!succeeded(a, kvt_seq_begin(m->seq, n, given ? positions : NULL), m))
        return 0;
    forms_begin(a->w, m->forms, m->length);
    m->pending = n;
    m->appended = 0;
    begin_step(a, a->mirrors, m->mirror, m->tokens + m->length, n);
    return 1;
}

static void begin(actor *a, member *m)
{
    size_t n, left = MOST - m->length;
    if (m->pending || !left)
        return;
    n = some_step(a, m);
    begin_tokens(a, m, n < left ? n : left, rng_below(&a->r, 4) == 0);
}

static void append(actor *a, member *m)
{
    uint32_t layer = rng_below(&a->r, a->w->n_layers);
    const token *fed = m->tokens + m->length;
    if (!m->pending || m->appended >> layer & 1)
        return;
    append_layer(a, a->w->cache, m->seq, fed, m->pending, layer, (int)rng_below(&a->r, 2));
    append_layer(a, a->mirrors, m->mirror, fed, m->pending, layer, 0);
    m->appended |= 1u << layer;
}

static void abort_step(actor *a, member *m)
{
    must(a, kvt_seq_abort(m->seq));
    must_mirror(a, kvt_seq_abort(m->mirror));
    if (m->pending)
        log_add(&m->log, DROPPED, 0, 0, NULL);
    m->pending = m->appended = 0;
}

/* What is missing of the step. */
static void append_rest(actor *a, member *m)
{
    const token *fed = m->tokens + m->length;
    for (uint32_t l = 0; l < a->w->n_layers; l++) {
        if (m->appended >> l & 1)
            continue;
        append_layer(a, a->w->cache, m->seq, fed, m->pending, l, (int)rng_below(&a->r, 2));
        append_layer(a, a->mirrors, m->mirror, fed, m->pending, l, 0);
        m->appended |= 1u << l;
    }
}

/* The step's first n tokens are committed, by the sequence and its mirror. */
static void committed(const actor *a, member *m, size_t n)
{
    log_add(&m->log, STEP, 0, n, m->tokens + m->length);
    forms_commit(a->w, m->forms, m->tokens, m->length, n);
    m->length += n;
    m->pending = m->appended = 0;
    m->next_position = -1;
}

static void commit(actor *a, member *m)
{
    const token *fed = m->tokens + m->length;
    if (!m->pending)
        return;
    append_rest(a, m);
    commit_step(a, a->w->cache, m->seq, fed, m->pending);
    commit_step(a, a->mirrors, m->mirror, fed, m->pending);
    committed(a, m, m->pending);
}

/* ---- operations: selections ---- */

/* Ascending indices of a step's tokens: few, many, a beginning, or all. */
static size_t some_selection(actor *a, size_t pending, uint64_t *indices)
{
    size_t n = 0;
    uint32_t way = rng_below(&a->r, 5), prefix = rng_below(&a->r, (uint32_t)pending + 1);
    for (size_t i = 0; i < pending; i++)
        if (way == 0   ? i < prefix
            : way == 1 ? rng_below(&a->r, 8) != 0
            : way == 2 ? i >= prefix
                       : rng_below(&a->r, 2) != 0)
            indices[n++] = i;
    return n;
}

/* What the call has to answer for ascending indices. */
static kvt_status selects(const world *w, const member *m, const uint64_t *indices, size_t n)
{
    if (n == 0 || n == m->pending)
        return KVT_OK;
    for (uint32_t g = 0; g < w->n_groups; g++)
        if (seals(w, g) && m->pending > KVT_SELECT_TOKENS)
            return KVT_ERR_STATE;
    for (uint32_t g = 0; g < w->n_groups; g++)
        if (has_offset(w, g) && m->length == 0 && indices[0] != 0)
            return KVT_ERR_ARG;
    return KVT_OK;
}

/* The mirror drops the step, and has one of the selected tokens alone. */
static void mirror_selection(const actor *a, member *m, size_t n)
{
    const token *fed = m->tokens + m->length;
    must_mirror(a, kvt_seq_abort(m->mirror));
    if (n == 0)
        return;
    step_whole(a, a->mirrors, m->mirror, fed, n);
}

/* Commit some of a pending step, or of a new one. */
static void select_tokens(actor *a, member *m)
{
    uint64_t indices[MOST];
    int32_t ids[MOST];
    size_t n, left = MOST - m->length, calls;
    kvt_status expected;
    if (!m->pending && left)
        begin_tokens(a, m, 1 + rng_below(&a->r, (uint32_t)(left < 64 ? left : 64)), 0);
    if (!m->pending)
        return;
    n = some_selection(a, m->pending, indices);
    for (size_t i = 0; i < n; i++)
        ids[i] = m->tokens[m->length + indices[i]].id;
    if (n && m->appended != (1u << a->w->n_layers) - 1)
        refused(a, kvt_seq_commit_selected(m->seq, indices, n, ids), KVT_ERR_STATE, m);
    append_rest(a, m);
    if (n > 1 && rng_below(&a->r, 8) == 0) {
        uint64_t last = indices[n - 1];
        indices[n - 1] = rng_below(&a->r, 2) ? indices[n - 2] : m->pending;
        refused(a, kvt_seq_commit_selected(m->seq, indices, n, ids), KVT_ERR_ARG, m);
        indices[n - 1] = last;
    }
    expected = selects(a->w, m, indices, n);
    if (expected != KVT_OK) {
        refused(a, kvt_seq_commit_selected(m->seq, indices, n, ids), expected, m);
        return;
    }
    calls = calls_of(a->w);
    must(a, kvt_seq_commit_selected(m->seq, indices, n, ids));
    check(a, calls_of(a->w) == calls);
    for (size_t i = 0; i < n; i++)
        m->tokens[m->length + i] = m->tokens[m->length + indices[i]];
    mirror_selection(a, m, n);
    a->met.selected++;
    if (n)
        committed(a, m, n);
    else
        log_add(&m->log, DROPPED, 0, 0, NULL);
    m->pending = m->appended = 0;
    expect_mirrored(a, m);
}

/* ---- operations: lengths ---- */

static void whole_step(actor *a, member *m)
{
    begin(a, m);
    commit(a, m);
}

static void truncate_to(actor *a, member *m, size_t n)
{
    if (!model_reaches(a->w, m, n)) {
        refused(a, kvt_seq_truncate(m->seq, n), KVT_ERR_STATE, m);
        return;
    }
    a->met.returned += n < m->length && point_at(m, n);
    must(a, kvt_seq_truncate(m->seq, n));
    did(a, m, TRUNCATE, 0, n);
    model_truncate(a->w, m, n);
}

static void truncate_seq(actor *a, member *m)
{
    if (m->pending)
        refused(a, kvt_seq_truncate(m->seq, m->length), KVT_ERR_STATE, m);
    else if (m->n_points && rng_below(&a->r, 2))
        truncate_to(a, m, m->points[rng_below(&a->r, (uint32_t)m->n_points)].n_tokens);
    else
        truncate_to(a, m, some_length(a, m->length));
}

/* What can be reached, at all lengths; and on forks, which are of no account. */
static void reach(actor *a, member *m)
{
    size_t of = 0; /* what the model reaches at most */
    check(a, kvt_seq_reachable(m->seq, UINT64_MAX) == m->length);
    for (size_t n = 0; n <= m->length; n++) {
        of = model_reaches(a->w, m, n) ? n : of;
        check(a, kvt_seq_reachable(m->seq, n) == of);
        check(a, kvt_seq_reachable(m->mirror, n) == of);
    }
    for (int i = 0; i < 3 && !m->pending; i++) {
        size_t n = rng_below(&a->r, (uint32_t)m->length + 1);
        kvt_seq *copy = NULL;
        arm(a);
        if (!succeeded(a, kvt_seq_fork(m->seq, m->length, &copy), m))
            return;
        of = (size_t)kvt_seq_reachable(copy, n);
        check(a, of == deepest(a, m, n));
        check(a, of == n || kvt_seq_truncate(copy, n) == KVT_ERR_STATE);
        must(a, kvt_seq_truncate(copy, of));
        check(a, kvt_seq_length(copy) == of);
        kvt_seq_destroy(copy);
    }
}

/* ---- operations: removals ---- */

static void some_removal(actor *a, const member *m, size_t *first, size_t *n)
{
    size_t rows = m->length / 64, back = 0;
    uint32_t most = m->length < 130 ? (uint32_t)m->length : 130;
    switch (rng_below(&a->r, 4)) {
    case 0:
    case 1: /* blocks */
        *first = 64 * rng_below(&a->r, (uint32_t)rows + 1);
        *n = 64 * (1 + rng_below(&a->r, 3));
        break;
    case 2: /* among the newest */
        back = rng_below(&a->r, most + 1);
        *first = m->length - back;
        *n = rng_below(&a->r, (uint32_t)back / 2 + 2);
        break;
    default:
        *first = rng_below(&a->r, (uint32_t)m->length + 1);
        *n = rng_below(&a->r, (uint32_t)(m->length - *first) + 2);
        break;
    }
}

/* Take tokens out, or be refused as the model says. */
static void remove_range(actor *a, member *m, size_t first, size_t n)
{
    kvt_status expected = model_removes(a->w, m, first, n);
    if (expected != KVT_OK) {
        refused(a, kvt_seq_remove(m->seq, first, n), expected, m);
        return;
    }
    arm(a);
    if (!succeeded(a, kvt_seq_remove(m->seq, first, n), m))
        return;
    did(a, m, REMOVE, first, n);
    a->met.removed++;
    if (first + n == m->length)
        model_truncate(a->w, m, first);
    else
        model_remove(a->w, m, first, n);
    expect_mirrored(a, m);
}

static void remove_tokens(actor *a, member *m)
{
    size_t first, n;
    some_removal(a, m, &first, &n);
    remove_range(a, m, first, n);
}

/* ---- operations: what a sequence has besides tokens ---- */

static void checkpoint(actor *a, member *m)
{
    size_t blob = rng_below(&a->r, 1000), n;
    unsigned char data[BLOB_BYTES];
    int is_new = !point_at(m, m->length);
    n = blob_of(blob, data);
    if (m->pending) {
        refused(a, kvt_seq_checkpoint(m->seq, data, n), KVT_ERR_STATE, m);
        return;
    }
    if (is_new && m->n_points == POINTS)
        return;
    arm(a);
    if (!succeeded(a, kvt_seq_checkpoint(m->seq, n ? data : NULL, n), m))
        return;
    did(a, m, CHECKPOINT, 0, blob);
    m->n_points += (size_t)is_new;
    m->points[m->n_points - 1] = (point){m->length, blob, m->next_position, {{0, 0, 0, 0, 0, 0}}};
    memcpy(m->points[m->n_points - 1].forms, m->forms, sizeof m->forms);
}

static void drop(actor *a, member *m)
{
    size_t at = rng_below(&a->r, (uint32_t)m->length + 1), i, size;
    if (!point_at(m, at)) {
        refused(a, kvt_seq_checkpoint_drop(m->seq, at), KVT_ERR_ARG, m);
        check(a, kvt_seq_checkpoint_read(m->seq, at, NULL, 0, &size) == KVT_ERR_ARG);
    }
    if (!m->n_points)
        return;
    i = rng_below(&a->r, (uint32_t)m->n_points);
    at = m->points[i].n_tokens;
    must(a, kvt_seq_checkpoint_drop(m->seq, at));
    if (m->pending) { /* its log has no begin yet: the mirror has */
        must_mirror(a, kvt_seq_checkpoint_drop(m->mirror, at));
        log_add(&m->log, DROP, 0, at, NULL);
    } else {
        did(a, m, DROP, 0, at);
    }
    memmove(m->points + i, m->points + i + 1, (--m->n_points - i) * sizeof *m->points);
}

static void move_next(actor *a, member *m)
{
    int32_t next = model_next_position(m);
    next = a->w->is_wild ? (int32_t)rng_below(&a->r, 2 * (uint32_t)next + 10)
                         : next + (int32_t)rng_below(&a->r, 30);
    if (m->pending) {
        refused(a, kvt_seq_set_next_position(m->seq, next), KVT_ERR_STATE, m);
        return;
    }
    must(a, kvt_seq_set_next_position(m->seq, next));
    did(a, m, POSITION, 0, (size_t)next);
    m->next_position = next;
}

static void tag(actor *a, member *m)
{
    if (m->length || m->pending)
        refused(a, kvt_seq_set_tag(m->seq, "x", 1), KVT_ERR_STATE, m);
    else
        set_tag(a, m, rng_below(&a->r, 4));
}

static void reserve(actor *a, member *m)
{
    if (m->pending)
        return;
    arm(a);
    if (succeeded(a, kvt_seq_reserve(m->seq, rng_below(&a->r, MOST + 1)), m))
        m->reserves = 1;
}

static void trim(actor *a, member *m)
{
    kvt_cache_stats all = {.struct_size = sizeof all};
    (void)m;
    must(a, kvt_cache_trim(a->w->cache));
    must(a, kvt_cache_get_stats(a->w->cache, &all));
    check(a, a->w->is_shared || (all.blocks_free == 0 && all.bytes_free == 0));
}

/* Nothing is allocated up to the capacity, in steps of one token. */
static void grow_to_capacity(actor *a, member *m)
{
    uint64_t capacity = kvt_seq_capacity(m->seq);
    size_t calls = calls_of(a->w), most = m->length + 70;
    int injects = a->w->injects;
    if (a->w->is_shared || a->w->config.memory_budget_bytes || m->pending)
        return;
    check(a, capacity >= m->length && capacity <= MOST);
    a->w->injects = 0;
    while (m->length < capacity && m->length < most) {
        begin_tokens(a, m, 1, 0);
        commit(a, m);
        check(a, calls_of(a->w) == calls);
    }
    a->w->injects = injects;
}

static void read_back(actor *a, member *m)
{
    uint32_t layer = rng_below(&a->r, a->w->n_layers);
    size_t n = visible(m, layer), first = rng_below(&a->r, (uint32_t)n + 1);
    expect_read(a, m, layer, (kvt_side)rng_below(&a->r, 2), first, n - first);
}

typedef struct operation {
    const char *name;
    void (*function)(actor *a, member *m);
    uint32_t weight;
    int needs_seq;
} operation;

static const operation operations[] = {
    {"create", create, 2, 0},
    {"destroy", destroy, 3, 1},
    {"fork", fork_seq, 8, 1},
    {"begin", begin, 6, 1},
    {"append", append, 6, 1},
    {"commit", commit, 4, 1},
    {"abort", abort_step, 1, 1},
    {"select", select_tokens, 6, 1},
    {"step", whole_step, 24, 1},
    {"truncate", truncate_seq, 10, 1},
    {"reach", reach, 2, 1},
    {"remove", remove_tokens, 6, 1},
    {"checkpoint", checkpoint, 5, 1},
    {"drop", drop, 1, 1},
    {"next position", move_next, 2, 1},
    {"tag", tag, 1, 1},
    {"clear", clear, 1, 1},
    {"reserve", reserve, 1, 1},
    {"save", save, 3, 1},
    {"load", load, 3, 1},
    {"part", save_part, 2, 1},
    {"damage", load_damaged, 2, 1},
    {"convert", convert, 1, 0},
    {"put", put_prefix, 4, 1},
    {"get", get_prefix, 6, 1},
    {"spoilt", get_spoilt, 2, 1},
    {"trim", trim, 1, 1},
    {"capacity", grow_to_capacity, 1, 1},
    {"attend", attend, 6, 1},
    {"read", read_back, 6, 1},
};

static void operate(actor *a)
{
    enum { N = sizeof operations / sizeof *operations };
    member *m = &a->members[rng_below(&a->r, SEQS)];
    uint32_t total = 0, pick, i = 0;
    for (uint32_t j = 0; j < N; j++)
        total += operations[j].weight;
    for (pick = rng_below(&a->r, total); pick >= operations[i].weight; i++)
        pick -= operations[i].weight;
    for (size_t j = 0; j < SEQS && operations[i].needs_seq && !m->seq; j++)
        m = &a->members[j];
    if (operations[i].needs_seq && !m->seq)
        i = 0; /* create: there is none */
    a->name = operations[i].name;
    operations[i].function(a, m);
    a->operation++;
    expect_bytes(a);
    if (m->seq && rng_below(&a->r, 3) == 0)
        read_back(a, m);
    if (rng_below(&a->r, 8) == 0)
        expect_all(a);
    if (m->seq && rng_below(&a->r, 16) == 0)
        expect_straight(a, m);
}

/* ---- runs ---- */

static kvt_group_config some_group(rng *r)
{
    static const kvt_type types[][2] = {
        {KVT_TYPE_I8, KVT_TYPE_I8},   {KVT_TYPE_I8, KVT_TYPE_I8},   {KVT_TYPE_I8, KVT_TYPE_I8},
        {KVT_TYPE_I8, KVT_TYPE_F16},  {KVT_TYPE_F16, KVT_TYPE_I8},  {KVT_TYPE_F32, KVT_TYPE_I8},
        {KVT_TYPE_F16, KVT_TYPE_F16}, {KVT_TYPE_F32, KVT_TYPE_F32}, {KVT_TYPE_I4, KVT_TYPE_I4},
        {KVT_TYPE_I4, KVT_TYPE_I4},   {KVT_TYPE_I4, KVT_TYPE_I5},   {KVT_TYPE_I4, KVT_TYPE_I8},
        {KVT_TYPE_I8, KVT_TYPE_I4},   {KVT_TYPE_F16, KVT_TYPE_I5},  {KVT_TYPE_I4, KVT_TYPE_F16},
    };
    static const uint32_t fines[] = {0, 0, KVT_FINE_NONE, 1, 65, 128};
    static const uint32_t dims[] = {8, 16, 16, 24, 32, 64};
    static const uint32_t residuals[] = {0, 0, 0, KVT_RESIDUAL_NONE, 1, 100};
    const kvt_type *type = types[rng_below(r, sizeof types / sizeof types[0])];
    uint32_t heads = 1 + rng_below(r, MAX_HEADS);
    kvt_group_config g = group_of(1 + rng_below(r, 2), heads * (1 + rng_below(r, 2)), heads,
                                  dims[rng_below(r, 6)], dims[rng_below(r, 6)], type[0], type[1]);
    g.rotation_seed = rng_next(r);
    g.residual_tokens = residuals[rng_below(r, 6)];
    if (rng_below(r, 4) == 0)
        g.flags = rng_below(r, 4) | (rng_below(r, 2) ? KVT_GROUP_NO_V_ROTATION : 0);
    g.fine_tokens = fines[rng_below(r, 6)];
    if (type[0] == KVT_TYPE_I4)
        g.flags &= ~KVT_GROUP_NO_OFFSET;
    if (type[0] == type[1] && type[0] <= KVT_TYPE_I8 && rng_below(r, 4) == 0) {
        g.flags |= KVT_GROUP_V_IN_K;
        g.v_dim = g.k_dim == 24 ? 16 : g.k_dim;
    }
    return g;
}

#define META_BYTES 640       /* a block of positions, ids and bounds */
#define META_MOVES_BYTES 896 /* the same with how far each key has moved */

/* RoPE over some of K's dims, those behind V where that is in K. */
static void some_rope(world *w, uint32_t g, rng *r)
{
    kvt_group_config *group = &w->groups[g];
    uint32_t begin = group->flags & KVT_GROUP_V_IN_K ? group->v_dim : 0, room_dims, dims;
    room_dims = group->k_dim - begin;
    group->rope_pairing = room_dims == 0 ? KVT_ROPE_NONE : (kvt_rope)(1 + rng_below(r, 3));
    if (group->rope_pairing == KVT_ROPE_NONE)
        return;
    dims = rng_below(r, 2) ? room_dims : 2 * (1 + rng_below(r, room_dims / 2));
    group->rope_dims = dims;
    group->rope_first_dim = begin + rng_below(r, room_dims - dims + 1);
    group->rope_inverse_frequencies = w->frequencies[g];
    for (uint32_t i = 0; i < dims / 2; i++)
        w->frequencies[g][i] = (float)pow(1000.0, -2.0 * i / dims);
}

static void some_window(kvt_group_config *g, rng *r)
{
    static const uint32_t sinks[] = {0, 0, 4, 64, 70};
    g->window_tokens = 1 + rng_below(r, rng_below(r, 3) ? 150 : 20);
    g->sink_tokens = sinks[rng_below(r, 5)];
}

/* What n tokens up to 64 of group g take, but for positions and ids. */
static uint64_t block_bytes(const world *w, uint32_t g, uint64_t n, uint32_t residual,
                            uint32_t fine_tokens)
{
    kvt_group_config group = w->groups[g];
    kvt_config c = w->config;
    uint64_t empty, one;
    group.residual_tokens = residual;
    group.fine_tokens = fine_tokens;
    c.groups = &group;
    c.n_groups = 1;
    expect_ok(NULL, kvt_memory_forecast(&c, 1, 0, &empty));
    expect_ok(NULL, kvt_memory_forecast(&c, 1, n, &one));
    return one - empty - w->meta_bytes;
}

static void measure_blocks(world *w)
{
    w->meta_bytes = w->moves ? META_MOVES_BYTES : META_BYTES;
    for (uint32_t g = 0; g < w->n_groups; g++) {
        w->open_bytes[g] = block_bytes(w, g, 1, 1000, 0);
        w->sealed_bytes[g] = w->open_bytes[g];
        if (!seals(w, g))
            continue;
        if (w->groups[g].k_type == KVT_TYPE_I4) /* scales, middles, gains */
            w->seed_bytes[g] = (uint64_t)w->groups[g].n_layers * w->groups[g].n_kv_heads *
                               (2 * ((w->groups[g].k_dim * 2 + 63) / 64 * 64) + 64);
        /* The open form is kept beside. */
        w->sealed_bytes[g] =
            block_bytes(w, g, 64, KVT_RESIDUAL_NONE, KVT_FINE_NONE) - w->open_bytes[g];
        w->fine_bytes[g] = block_bytes(w, g, 64, KVT_RESIDUAL_NONE, 64) - w->open_bytes[g];
    }
}

/* From the groups: the rest of the config, without limits. */
static void config_world(world *w)
{
    rng r = {w->seed + 1};
    for (uint32_t g = 0; g < w->n_groups; g++) {
        uint32_t given = w->groups[g].residual_tokens;
        w->residual[g] = given == 0 ? KVT_RESIDUAL_TOKENS : given == KVT_RESIDUAL_NONE ? 0 : given;
        if (w->groups[g].k_type > KVT_TYPE_I8 || w->groups[g].v_type > KVT_TYPE_I8) {
            uint32_t fine = w->groups[g].fine_tokens;
            w->fine_rows[g] = fine == 0 ? 1 : fine == KVT_FINE_NONE ? 0 : (fine + 63) / 64;
        }
        for (uint32_t l = 0; l < w->groups[g].n_layers; l++)
            w->group_of_layer[w->n_layers++] = g;
    }
    ledger_init(&w->memory);
    w->config = kvt_config_init();
    w->config.groups = w->groups;
    w->config.n_groups = w->n_groups;
    w->config.max_tokens = MOST;
    w->config.allocator = ledger_allocator(&w->memory);
    measure_blocks(w);
    some_other_types(w, &r);
}

static void open_world(world *w)
{
    kvt_seq *seq = NULL;
    expect_ok(NULL, kvt_cache_create(&w->config, &w->cache));
    w->cache_bytes = kvt_cache_memory_bytes(w->cache);
    expect_ok(w->cache, kvt_seq_create(w->cache, &seq));
    w->seq_bytes = kvt_seq_memory_bytes(seq);
    w->has_store = has_store(seq);
    kvt_seq_destroy(seq);
}

static void random_world(world *w, uint64_t seed, rng *r, int is_shared)
{
    memset(w, 0, sizeof *w);
    w->seed = seed;
    w->is_shared = is_shared;
    w->n_groups = 1 + rng_below(r, GROUPS);
    for (uint32_t g = 0; g < w->n_groups; g++)
        w->groups[g] = some_group(r);
    w->moves = (int)rng_below(r, 2);
    w->on_disk = (int)rng_below(r, 2);
    w->has_ids = rng_below(r, 4) != 0;
    w->is_wild = rng_below(r, 4) == 0;
    for (uint32_t g = 0; g < w->n_groups; g++) {
        if (w->moves)
            some_rope(w, g, r);
        if (rng_below(r, 3) == 0)
            some_window(&w->groups[g], r);
    }
    config_world(w);
    w->config.n_threads = pool_threads(1 + (rng_below(r, 8) == 0));
    w->injects = !is_shared && rng_below(r, 3) == 0;
    if (rng_below(r, 3) == 0) {
        uint64_t n = 1 + rng_below(r, 3), length = 100 + rng_below(r, 400);
        expect_ok(NULL, kvt_memory_forecast(&w->config, n, length, &w->config.memory_budget_bytes));
    }
    open_world(w);
}

static void open_actor(actor *a, world *w, uint64_t seed)
{
    kvt_config c = w->config;
    memset(a, 0, sizeof *a);
    a->w = w;
    a->name = "none yet";
    a->r.state = seed;
    memset(&c.allocator, 0, sizeof c.allocator);
    c.memory_budget_bytes = 0;
    c.n_threads = 1;
    expect_ok(NULL, kvt_cache_create(&c, &a->mirrors));
    expect_ok(NULL, kvt_cache_create(&w->other, &a->others));
    open_stores(a);
    if (w->on_disk)
        open_folder(a);
}

static void close_actor(actor *a)
{
    for (size_t i = 0; i < SEQS; i++)
        destroy(a, &a->members[i]);
    bytes_free(&a->file);
    log_free(&a->filed.log);
    kvt_seq_destroy(a->other);
    kvt_cache_destroy(a->others);
    close_stores(a);
    if (a->w->on_disk)
        close_folder(a);
    kvt_cache_destroy(a->mirrors);
}

/* Empty sequences fit into the budget to the byte: nothing is exempt any more. */
static void expect_whole_budget(world *w)
{
    kvt_seq **seqs = NULL;
    kvt_status status = KVT_OK;
    size_t n = 0;
    while (status == KVT_OK) {
        seqs = realloc(seqs, (n + 1) * sizeof(kvt_seq *));
        assert_non_null(seqs);
        status = kvt_seq_create(w->cache, &seqs[n]);
        n += status == KVT_OK;
    }
    assert_int_equal(status, KVT_ERR_BUDGET);
    assert_true(w->memory.live_bytes <= w->config.memory_budget_bytes);
    assert_true(w->memory.live_bytes + w->seq_bytes > w->config.memory_budget_bytes);
    while (n > 0)
        kvt_seq_destroy(seqs[--n]);
    free(seqs);
}

/* Without sequences the cache has its own bytes and free blocks, and then its own alone. */
static void close_world(world *w)
{
    kvt_cache_stats all = {.struct_size = sizeof all};
    expect_ok(w->cache, kvt_cache_get_stats(w->cache, &all));
    assert_true(all.blocks_used == 0 && all.bytes_used == 0 && all.bytes_reserved == 0);
    assert_true(all.blocks_shared == 0 && all.bytes_shared == 0);
    if (w->config.memory_budget_bytes)
        expect_whole_budget(w);
    expect_ok(w->cache, kvt_cache_trim(w->cache));
    assert_true(w->memory.live_bytes == w->cache_bytes);
    kvt_cache_destroy(w->cache);
    ledger_close(&w->memory);
}

static void add_up(tally *sum, const tally *met)
{
    sum->forks += met->forks;
    sum->refused += met->refused;
    sum->selected += met->selected;
    sum->removed += met->removed;
    sum->returned += met->returned;
    sum->loaded += met->loaded;
    sum->mapped += met->mapped;
    sum->deltas += met->deltas;
    sum->damaged += met->damaged;
    sum->late += met->late;
    sum->put += met->put;
    sum->got += met->got;
    sum->got_points += met->got_points;
    sum->parts += met->parts;
    sum->converted += met->converted;
    sum->spoilt += met->spoilt;
    sum->straight += met->straight;
}

static void run(uint64_t seed, tally *sum)
{
    rng r = {seed * 1000003};
    size_t n;
    world w;
    actor *a = room(sizeof *a);
    random_world(&w, seed, &r, 0);
    open_actor(a, &w, rng_next(&r));
    n = 100 + rng_below(&r, 100);
    while (a->operation < n)
        operate(a);
    a->name = "the end";
    for (size_t i = 0; i < SEQS; i++)
        if (a->members[i].seq) {
            commit(a, &a->members[i]);
            expect_straight(a, &a->members[i]);
        }
    expect_all(a);
    add_up(sum, &a->met);
    close_actor(a);
    free(a);
    close_world(&w);
}

/* What one thread does concerns the thread sanitizer little. */
static uint64_t n_runs(void)
{
    const char *given = getenv("KVT_TEST_OPERATIONS");
    if (given)
        return strtoull(given, NULL, 10);
    return HAS_THREAD_SANITIZER ? 25 : is_quick() ? 100 / (uint64_t)quick_level() : 400;
}

static void random_operations(void **state)
{
    const char *given = getenv("KVT_TEST_SEED");
    uint64_t first = given ? strtoull(given, NULL, 10) : 1, n = given ? 1 : n_runs();
    tally met = {0};
    (void)state;
    for (uint64_t seed = first; seed < first + n; seed++)
        run(seed, &met);
    printf(
        "seeds %llu to %llu: %zu forks, %zu selections, %zu removals, %zu returns to "
        "checkpoints, %zu loads (%zu mapped), %zu deltas, %zu damaged files, %zu more found late, "
        "%zu puts, %zu gets (%zu of checkpoints; %zu of damaged values), "
        "%zu conversions, %zu parts, "
        "%zu refused calls, %zu straight builds\n",
        (unsigned long long)first, (unsigned long long)(first + n - 1), met.forks, met.selected,
        met.removed, met.returned, met.loaded, met.mapped, met.deltas, met.damaged, met.late,
        met.put, met.got, met.got_points, met.spoilt, met.converted, met.parts, met.refused,
        met.straight);
    assert_true(n < 100 ||
                (met.forks > n && met.selected > n && met.removed > n / 4 && met.returned > n / 4 &&
                 met.loaded > n / 4 && met.mapped > n / 20 && met.deltas > n / 20 &&
                 met.damaged > n / 4 && met.late > n / 40 && met.converted > n / 4 &&
                 met.parts > n / 4 && met.refused > n && met.straight > n));
    assert_true(n < 100 || !met.put || (met.got > n / 40 && met.got_points && met.spoilt));
}

/* ---- threads ---- */

static void *act(void *user)
{
    actor *a = user;
    for (size_t n = is_quick() ? 60 : 150; a->operation < n;)
        operate(a);
    a->name = "the end";
    expect_all(a);
    return NULL;
}

/* The first sequences of each thread are forks of one that has a step pending now and then. */
static void share_out(actor *source, actor *actors, rng *r)
{
    member *common = &source->members[0];
    create(source, NULL);
    for (size_t steps = 1 + rng_below(r, 6); steps > 0; steps--)
        whole_step(source, common);
    if (rng_below(r, 2))
        begin(source, common);
    for (size_t i = 0; i < ACTORS; i++)
        for (size_t j = 0; j < 3; j++) {
            size_t n = j ? rng_below(r, (uint32_t)common->length + 1) : common->length;
            n = deepest(source, common, n);
            fork_tokens(source, common, n, &actors[i], &actors[i].members[j]);
        }
}

/*
 * Threads that operate on sequences of their own, which are forks of a common one, and on that one:
 * blocks that several share are copied, sealed and given up at the same time.
 */
static void operations_in_threads(void **state)
{
    const char *given = getenv("KVT_TEST_SEED");
    uint64_t first = given ? strtoull(given, NULL, 10) : 1;
    uint64_t n = given ? 1 : n_runs() / (HAS_THREAD_SANITIZER ? 4 : 10);
    (void)state;
    for (uint64_t seed = first; seed < first + n; seed++) {
        rng r = {seed * 1000003};
        actor *actors = room((ACTORS + 1) * sizeof *actors), *source = &actors[ACTORS];
        pthread_t threads[ACTORS + 1];
        world w;
        random_world(&w, seed, &r, 1);
        for (size_t i = 0; i <= ACTORS; i++) {
            open_actor(&actors[i], &w, rng_next(&r));
            actors[i].next_content = (uint32_t)i << 20;
        }
        share_out(source, actors, &r);
        for (size_t i = 0; i <= ACTORS; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, act, &actors[i]), 0);
        for (size_t i = 0; i <= ACTORS; i++)
            assert_int_equal(pthread_join(threads[i], NULL), 0);
        for (size_t i = 0; i <= ACTORS; i++)
            close_actor(&actors[i]);
        free(actors);
        close_world(&w);
    }
}

/* ---- one by one ---- */

/* One group of i8, and an actor's sequences A and B. */
typedef struct pair {
    world w;
    actor actor;
} pair;

static void config_pair(pair *p)
{
    memset(&p->w, 0, sizeof p->w);
    p->w.n_groups = 1;
    p->w.groups[0] = group_of(1, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    config_world(&p->w);
}

static void open_pair(pair *p, const char *name)
{
    open_world(&p->w);
    open_actor(&p->actor, &p->w, 1);
    p->actor.name = name;
    create(&p->actor, NULL);
}

static void close_pair(pair *p)
{
    expect_bytes(&p->actor);
    expect_all(&p->actor);
    close_actor(&p->actor);
    close_world(&p->w);
}

static void step_of(actor *a, member *m, size_t n)
{
    check(a, begin_tokens(a, m, n, 0));
    commit(a, m);
}

/*
 * A seals a block that it shares with B. B has been truncated into that block meanwhile: what its
 * next step fills it with is not what A has sealed.
 */
static void a_cut_block_takes_no_sealed_form(void **state)
{
    static pair p;
    (void)state;
    for (int alone = 0; alone < 2; alone++) {
        actor *a = &p.actor;
        member *m = &a->members[0], *b = &a->members[1];
        config_pair(&p);
        open_pair(&p, "a cut block");
        step_of(a, m, 127);
        check(a, fork_tokens(a, m, 64, a, b));
        step_of(a, m, 1);
        if (alone) /* the open block is B's alone */
            step_of(a, m, 1);
        truncate_to(a, b, 32);
        step_of(a, b, 200);
        close_pair(&p);
    }
}

/* An allocator that has another thread make a call, once, while it is in one. */
typedef struct interposer {
    kvt_allocator inner;
    void *(*call)(void *user);
    void *user;
} interposer;

static void *interposed_alloc(void *user, size_t n, size_t alignment)
{
    interposer *i = user;
    void *(*call)(void *) = i->call;
    pthread_t thread;
    i->call = NULL;
    if (call) {
        assert_int_equal(pthread_create(&thread, NULL, call, i->user), 0);
        assert_int_equal(pthread_join(thread, NULL), 0);
    }
    return i->inner.alloc(i->inner.user, n, alignment);
}

static void interposed_free(void *user, void *memory, size_t n)
{
    interposer *i = user;
    i->inner.free(i->inner.user, memory, n);
}

static void *begin_b(void *user)
{
    actor *a = user;
    begin_tokens(a, &a->members[1], 64, 0);
    return NULL;
}

/*
 * A's begin finds that a sealed block is its own, and waits for memory. B, which has the open form
 * of that block, begins a step that seals it: it may not take A's, which A is about to write.
 */
static void a_block_about_to_be_written_is_not_taken(void **state)
{
    static pair p;
    actor *a = &p.actor;
    member *m = &a->members[0], *b = &a->members[1];
    interposer between = {{NULL, NULL, NULL}, NULL, a};
    (void)state;
    config_pair(&p);
    between.inner = p.w.config.allocator;
    p.w.config.allocator = (kvt_allocator){&between, interposed_alloc, interposed_free};
    open_pair(&p, "a block about to be written");
    step_of(a, m, 127);
    check(a, fork_tokens(a, m, 64, a, b));
    step_of(a, m, 2);
    step_of(a, m, 1); /* the open form is B's alone */
    truncate_to(a, m, 32);
    expect_ok(p.w.cache, kvt_cache_trim(p.w.cache));
    between.call = begin_b;
    check(a, begin_tokens(a, m, 200, 0));
    check(a, between.call == NULL && b->pending == 64);
    commit(a, m);
    commit(a, b);
    close_pair(&p);
}

/* Blocks that are shared when they become old are sealed once, also by steps at the same time. */
static void what_is_shared_is_sealed_once(void **state)
{
    static pair p;
    (void)state;
    for (int at_once = 0; at_once < 2; at_once++) {
        actor *a = &p.actor;
        member *m = &a->members[0], *b = &a->members[1];
        kvt_cache_stats all = {.struct_size = sizeof all};
        config_pair(&p);
        open_pair(&p, "a shared block");
        step_of(a, m, 127);
        check(a, fork_tokens(a, m, 64, a, b));
        if (at_once) {
            check(a, begin_tokens(a, m, 1, 0) && begin_tokens(a, b, 64, 0));
            commit(a, m);
            commit(a, b);
        } else {
            step_of(a, m, 1);
            check(a, begin_tokens(a, b, 64, 0));
            must(a, kvt_cache_get_stats(p.w.cache, &all));
            check(a, all.blocks_sealed == 1); /* a pending step has it already */
            commit(a, b);
        }
        must(a, kvt_cache_get_stats(p.w.cache, &all));
        check(a, all.blocks_sealed == 1 && all.blocks_shared == 2); /* and its open form */
        step_of(a, m, 1);
        step_of(a, b, 1);
        must(a, kvt_cache_get_stats(p.w.cache, &all));
        check(a, all.blocks_sealed == 1 && all.blocks_shared == 1);
        close_pair(&p);
    }
}

/*
 * An open block beside its sealed form is not held against the budget; when it is shared it is. A
 * budget a byte too small for that refuses the fork, and nothing has changed.
 */
static void shared_open_blocks_are_held_against_the_budget(void **state)
{
    static pair p;
    (void)state;
    for (uint64_t less = 0; less < 2; less++) {
        actor *a = &p.actor;
        member *m = &a->members[0], *b = &a->members[1];
        uint64_t budget, before;
        config_pair(&p);
        open_pair(&p, "a budget");
        step_of(a, m, 128);
        budget = kvt_cache_memory_bytes(p.w.cache) + p.w.seq_bytes - less;
        close_pair(&p);

        config_pair(&p);
        p.w.config.memory_budget_bytes = budget;
        open_pair(&p, "a budget");
        step_of(a, m, 128);
        before = kvt_cache_memory_bytes(p.w.cache);
        check(a, fork_tokens(a, m, 128, a, b) == !less);
        check(a, kvt_cache_memory_bytes(p.w.cache) == before + (less ? 0 : p.w.seq_bytes));
        /* The refused fork holds nothing: another sequence fits, to the byte. */
        if (less)
            create(a, NULL);
        check(a, b->seq != NULL);
        close_pair(&p);
    }
}

/* The same where the open block is a checkpoint's, too. */
static void open_blocks_of_checkpoints_are_held_against_the_budget(void **state)
{
    static pair p;
    uint64_t budget = 0;
    (void)state;
    for (uint64_t less = 0; less < 3; less++) { /* the first has no budget */
        actor *a = &p.actor;
        member *m = &a->members[0];
        config_pair(&p);
        p.w.config.memory_budget_bytes = less ? budget + 1 - less : 0;
        open_pair(&p, "a budget");
        step_of(a, m, 128);
        check(a, m->forms[0].sealed == 1 && m->forms[0].final == 0);
        checkpoint(a, m);
        check(a, m->n_points == (less < 2));
        budget = less ? budget : kvt_cache_memory_bytes(p.w.cache);
        close_pair(&p);
    }
}

/* A pair whose group has a window of one token. */
static void open_windowed(pair *p, kvt_type k_type, int moves, const char *name)
{
    config_pair(p);
    p->w.groups[0].k_type = k_type;
    p->w.groups[0].window_tokens = 1;
    p->w.groups[0].rope_pairing = moves ? KVT_ROPE_NONE : KVT_ROPE_UNKNOWN;
    p->w.moves = moves;
    measure_blocks(&p->w);
    open_pair(p, name);
}

/* When all that a window has released is taken out, nothing is released any more. */
static void released_blocks_are_taken_out(void **state)
{
    static pair p;
    (void)state;
    for (int moves = 0; moves < 2; moves++) {
        actor *a = &p.actor;
        member *m = &a->members[0];
        open_windowed(&p, KVT_TYPE_I8, moves, "released blocks are taken out");
        step_of(a, m, 464);
        check(a, m->forms[0].first == 4);
        remove_range(a, m, 64, 192);
        check(a, m->forms[0].first == 0);
        for (int side = 0; side < 2; side++)
            expect_read(a, m, 0, (kvt_side)side, 0, m->length);
        remove_range(a, m, 0, 64);
        for (int i = 0; i < 20; i++)
            attend(a, m);
        close_pair(&p);
    }
}

/* Positions go back behind what a window has released: the sequence is as it is, everywhere. */
static void positions_go_back(void **state)
{
    static pair p;
    (void)state;
    for (int at_checkpoint = 0; at_checkpoint < 2; at_checkpoint++) {
        actor *a = &p.actor;
        member *m = &a->members[0];
        open_windowed(&p, KVT_TYPE_I8, 0, "positions go back");
        step_of(a, m, 400);
        must(a, kvt_seq_set_next_position(m->seq, 0));
        did(a, m, POSITION, 0, 0);
        m->next_position = 0;
        step_of(a, m, 1);
        reach(a, m);
        truncate_to(a, m, 401);
        check(a, fork_tokens(a, m, 401, a, &a->members[1]));
        if (at_checkpoint) {
            checkpoint(a, m);
            step_of(a, m, 200);
        }
        save(a, m);
        create(a, NULL);
        while (a->members[2].length < m->length) /* a load may take a part */
            load(a, &a->members[2]);
        truncate_to(a, &a->members[2], 401);
        close_pair(&p);
    }
}

/* An open block is taken out: a block that is sealed already stays so in a fork, too. */
static void a_fork_seals_no_less(void **state)
{
    static pair p;
    actor *a = &p.actor;
    member *m = &a->members[0];
    (void)state;
    config_pair(&p);
    open_pair(&p, "a fork seals no less");
    step_of(a, m, 200);
    check(a, m->forms[0].sealed == 2 && m->forms[0].final == 1);
    remove_range(a, m, 128, 64);
    check(a, m->length == 136 && m->forms[0].sealed == 2);
    check(a, fork_tokens(a, m, 136, a, &a->members[1]));
    check(a, fork_tokens(a, m, 135, a, &a->members[2]));
    close_pair(&p);
}

/* At a checkpoint a fork copies nothing, though a step is pending in the same block. */
static void a_fork_at_a_checkpoint_copies_nothing(void **state)
{
    static pair p;
    actor *a = &p.actor;
    member *m = &a->members[0];
    kvt_seq_stats one = {.struct_size = sizeof one};
    (void)state;
    config_pair(&p);
    open_pair(&p, "a fork at a checkpoint");
    step_of(a, m, 80);
    checkpoint(a, m);
    step_of(a, m, 10);
    check(a, begin_tokens(a, m, 1, 0));
    check(a, fork_tokens(a, m, 80, a, &a->members[1]));
    must(a, kvt_seq_get_stats(a->members[1].seq, &one));
    check(a, one.own_bytes == p.w.seq_bytes + 64); /* the list of checkpoints */
    commit(a, m);
    step_of(a, &a->members[1], 10);
    close_pair(&p);
}

/* A cut block that is sealed is filled up, where the window has released block 0. */
static void a_cut_block_without_block_0(void **state)
{
    static pair p;
    actor *a = &p.actor;
    member *m = &a->members[0];
    (void)state;
    open_windowed(&p, KVT_TYPE_F16, 0, "a cut block without block 0");
    step_of(a, m, 464);
    step_of(a, m, 1);
    check(a, m->forms[0].first == 4 && m->forms[0].final == 6);
    truncate_to(a, m, 310);
    step_of(a, m, 5);
    close_pair(&p);
}

/* A removal that finds no memory for its last copy has taken none for the first. */
static void a_refused_removal_holds_nothing(void **state)
{
    static pair p;
    actor *a = &p.actor;
    member *m = &a->members[0];
    size_t refusals = 0;
    (void)state;
    config_pair(&p);
    open_pair(&p, "a refused removal");
    step_of(a, m, 100);
    checkpoint(a, m);
    check(a, fork_tokens(a, m, 100, a, &a->members[1]));
    for (long calls = 0; m->length == 100; calls++) {
        kvt_status status;
        uint64_t before = kvt_seq_memory_bytes(m->seq);
        must(a, kvt_cache_trim(p.w.cache));
        p.w.memory.countdown = calls;
        status = kvt_seq_remove(m->seq, 70, 5);
        p.w.memory.countdown = -1;
        if (status == KVT_OK) {
            did(a, m, REMOVE, 70, 5);
            model_remove(&p.w, m, 70, 5);
        } else {
            refusals++;
            check(a, status == KVT_ERR_MEMORY && kvt_seq_memory_bytes(m->seq) == before);
        }
        expect_bytes(a);
    }
    check(a, refusals == 2);
    close_pair(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_operations),
        cmocka_unit_test(operations_in_threads),
        cmocka_unit_test(a_cut_block_takes_no_sealed_form),
        cmocka_unit_test(a_block_about_to_be_written_is_not_taken),
        cmocka_unit_test(what_is_shared_is_sealed_once),
        cmocka_unit_test(shared_open_blocks_are_held_against_the_budget),
        cmocka_unit_test(open_blocks_of_checkpoints_are_held_against_the_budget),
        cmocka_unit_test(released_blocks_are_taken_out),
        cmocka_unit_test(positions_go_back),
        cmocka_unit_test(a_fork_seals_no_less),
        cmocka_unit_test(a_fork_at_a_checkpoint_copies_nothing),
        cmocka_unit_test(a_cut_block_without_block_0),
        cmocka_unit_test(a_refused_removal_holds_nothing),
    };
    make_normals();
    return cmocka_run_group_tests_name("operations", tests, NULL, NULL);
}
