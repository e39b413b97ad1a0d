/*
 * Long random runs of operations on the sequences of one cache, against a plain model.
 *
 * The model of a sequence is a list of tokens and a log of all that was done to it since it was
 * empty. A token's K and V are functions of its number (content). The log of a fork is that of its
 * source, and a truncate. Each sequence has a mirror: a sequence of a second cache, without forks,
 * threads and budget, that the log has been replayed on. What a sequence shows has to be its
 * mirror's, to the bit: the saved file, what is read back, attention. Where the header promises it
 * (forms, below), the file is also that of a sequence which got its tokens in one step; and what is
 * read back, and attention, are held to the tokens' K and V themselves.
 *
 * After every operation the bytes are added up: the allocator's, the cache's, those of all
 * sequences. A call that is refused, by the budget or an allocator that fails, changes nothing.
 *
 * An operation is an entry of operations[]: a function that changes a sequence and its model, and
 * logs what has been done. What the mirror does is in replay_entry.
 *
 * KVT_TEST_OPERATIONS=n makes n runs of random operations, and n / 10 in threads (10000: the full
 * count, some minutes). A failure prints its seed; KVT_TEST_SEED=n makes the run of that seed
 * alone.
 */
#include "snapshot_support.h"

#include <math.h>
#include <stdio.h>

enum { SEQS = 6, MOST = 720, GROUPS = 2, LAYERS = 4, MAX_DIM = 64, MAX_HEADS = 2, ACTORS = 3 };

#define META_BYTES 640 /* a block of positions, ids and bounds */

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

/* ---- the model ---- */

typedef struct token {
    uint32_t content;
    int32_t position, id;
} token;

typedef enum kind {
    STEP,     /* n tokens, committed */
    DROPPED,  /* a step that was begun and aborted */
    TRUNCATE, /* to n tokens */
    RELOAD    /* saved, and loaded from the file */
} kind;

typedef struct entry {
    kind kind;
    size_t n, first; /* of a step: its tokens in log.tokens */
} entry;

typedef struct history {
    entry *entries;
    token *tokens;
    size_t n_entries, n_tokens;
} history;

/*
 * Which blocks of a group are sealed, by the rules of the header (kvt_seq_truncate) and
 * docs/design.md: tells when a sequence equals one that never was longer.
 */
typedef struct form {
    size_t sealed; /* blocks */
    size_t final;  /* of these: no truncate opens them again */
    size_t marked; /* the first token that was appended to a sealed block; SIZE_MAX: none */
} form;

typedef struct member {
    kvt_seq *seq; /* NULL: there is none */
    kvt_seq *mirror;
    size_t length, pending;
    uint32_t appended; /* a bit a layer, of the pending step */
    int reserves;
    token tokens[MOST]; /* the pending ones included */
    form forms[GROUPS];
    history log;
} member;

/* A snapshot, and the model of the sequence that it was made of. */
typedef struct file {
    bytes bytes;
    size_t length;
    token tokens[MOST];
    form forms[GROUPS];
    history log;
} file;

/* Geometry and caches of a run. */
typedef struct world {
    uint64_t seed;
    kvt_group_config groups[GROUPS];
    uint32_t n_groups, n_layers;
    uint32_t group_of_layer[LAYERS];
    uint64_t residual[GROUPS];
    kvt_config config;
    kvt_cache *cache;
    ledger memory;
    int injects;                     /* some allocations fail */
    int is_shared;                   /* several threads: nobody can add up bytes */
    uint64_t cache_bytes, seq_bytes; /* of the cache without sequences; of an empty one */
    uint64_t open_bytes[GROUPS], sealed_bytes[GROUPS]; /* of a block */
} world;

/* One thread's sequences. */
typedef struct actor {
    world *w;
    rng r;
    kvt_cache *mirrors;
    member members[SEQS];
    file file;
    uint32_t next_content;
    size_t operation;
    const char *name; /* of the operation */
    size_t forks, refused;
} actor;

/* ---- failures ---- */

/* Another thread's assertions end the process without their text, so it is printed first. */
static void report(const actor *a, const char *where, const char *what)
{
    fprintf(stderr, "seed %llu, operation %zu (%s): %s: %s\n", (unsigned long long)a->w->seed,
            a->operation, a->name, where, what);
    fail();
}

static void must_at(const actor *a, const kvt_cache *cache, kvt_status got, const char *where)
{
    char text[256] = "";
    if (got == KVT_OK)
        return;
    kvt_cache_error(cache, text, sizeof text);
    report(a, where, text);
}

static void check_at(const actor *a, int holds, const char *where)
{
    if (!holds)
        report(a, where, "does not hold");
}

#define must(a, call) must_at(a, (a)->w->cache, call, TEXT(__LINE__) ": " #call)
#define must_mirror(a, call) must_at(a, (a)->mirrors, call, TEXT(__LINE__) ": " #call)
#define check(a, condition) check_at(a, (condition) != 0, TEXT(__LINE__) ": " #condition)

static void *room(size_t n)
{
    void *memory = malloc(n ? n : 1);
    if (!memory)
        abort();
    return memory;
}

/* ---- K and V of a token ---- */

enum { NORMALS = 4096 };

static float normals[NORMALS];

static void make_normals(void)
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

static size_t row_floats(const world *w, uint32_t layer, kvt_side side)
{
    const kvt_group_config *g = &w->groups[w->group_of_layer[layer]];
    return (size_t)g->n_kv_heads * (side == KVT_SIDE_K ? g->k_dim : g->v_dim);
}

/* Rows of n tokens, malloc'ed. */
static float *rows_of(const world *w, const token *fed, size_t n, uint32_t layer, kvt_side side)
{
    size_t row = row_floats(w, layer, side);
    float *x = room(n * row * sizeof *x);
    for (size_t i = 0; i < n; i++)
        row_of(w, fed[i].content, layer, side, x + i * row);
    return x;
}

/* ---- steps of a sequence, or of its mirror ---- */

static void begin_step(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed,
                       size_t n)
{
    int32_t positions[MOST];
    for (size_t i = 0; i < n; i++)
        positions[i] = fed[i].position;
    must_at(a, cache, kvt_seq_begin(seq, n, positions), "begin");
}

/* By a call, or a plan whose tasks run in descending order. */
static void append_layer(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed,
                         size_t n, uint32_t layer, int by_plan)
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

static void commit_step(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed,
                        size_t n)
{
    int32_t ids[MOST];
    for (size_t i = 0; i < n; i++)
        ids[i] = fed[i].id;
    must_at(a, cache, kvt_seq_commit(seq, ids), "commit");
}

static bytes save_raw(const actor *a, const kvt_cache *cache, const kvt_seq *seq)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = KVT_CODEC_RAW;
    must_at(a, cache, kvt_seq_save_stream(seq, &writer, &options), "save");
    return b;
}

/* ---- logs and mirrors ---- */

static void log_add(history *l, kind what, size_t n, const token *fed)
{
    size_t more = what == STEP ? n : 0;
    l->entries = realloc(l->entries, (l->n_entries + 1) * sizeof *l->entries);
    l->tokens = realloc(l->tokens, (l->n_tokens + more + 1) * sizeof *l->tokens);
    if (!l->entries || !l->tokens)
        abort();
    l->entries[l->n_entries++] = (entry){what, n, l->n_tokens};
    if (more)
        memcpy(l->tokens + l->n_tokens, fed, more * sizeof *fed);
    l->n_tokens += more;
}

static void log_free(history *l)
{
    free(l->entries);
    free(l->tokens);
    memset(l, 0, sizeof *l);
}

static history log_copy(const history *from)
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
    bytes b;
    switch (e->kind) {
    case STEP:
        begin_step(a, a->mirrors, seq, fed, e->n);
        for (uint32_t l = 0; l < a->w->n_layers; l++)
            append_layer(a, a->mirrors, seq, fed, e->n, l, 0);
        commit_step(a, a->mirrors, seq, fed, e->n);
        break;
    case DROPPED: /* how many tokens it had shows nowhere */
        begin_step(a, a->mirrors, seq, &none, 1);
        must_mirror(a, kvt_seq_abort(seq));
        break;
    case TRUNCATE: must_mirror(a, kvt_seq_truncate(seq, e->n)); break;
    case RELOAD:
        b = save_raw(a, a->mirrors, seq);
        must_mirror(a, load_bytes(seq, b.data, b.n, NULL));
        bytes_free(&b);
        break;
    }
}

static kvt_seq *replay(const actor *a, const history *l)
{
    kvt_seq *seq = NULL;
    must_mirror(a, kvt_seq_create(a->mirrors, &seq));
    for (size_t i = 0; i < l->n_entries; i++)
        replay_entry(a, seq, &l->entries[i], l->tokens + l->entries[i].first);
    return seq;
}

/* What was done to a member, into its log and its mirror. */
static void did(const actor *a, member *m, kind what, size_t n, const token *fed)
{
    log_add(&m->log, what, n, fed);
    replay_entry(a, m->mirror, &m->log.entries[m->log.n_entries - 1], fed);
}

/* ---- forms ---- */

static int seals(const world *w, uint32_t g)
{
    return w->groups[g].k_type == KVT_TYPE_I8 || w->groups[g].v_type == KVT_TYPE_I8;
}

static size_t older(size_t n_tokens, uint64_t residual)
{
    return n_tokens > residual ? (size_t)((n_tokens - residual) / 64) : 0;
}

/* Any begin: what the commit before it has sealed is sealed for good. */
static void forms_begin(const world *w, form *forms)
{
    for (uint32_t g = 0; g < w->n_groups; g++)
        forms[g].final = forms[g].sealed;
}

/* After forms_begin: tokens length .. length + n - 1 are committed. */
static void forms_commit(const world *w, form *forms, size_t length, size_t n)
{
    for (uint32_t g = 0; g < w->n_groups; g++) {
        form *f = &forms[g];
        size_t due = older(length + n, w->residual[g]),
               final = older(length + n, w->residual[g] + 64);
        if (!seals(w, g))
            continue;
        if (length < 64 * f->sealed && length < f->marked)
            f->marked = length;
        f->sealed = due > f->sealed ? due : f->sealed;
        f->final = final > f->final ? final : f->final;
        f->final = f->final < f->sealed ? f->final : f->sealed;
    }
}

static void forms_truncate(const world *w, form *forms, size_t length)
{
    for (uint32_t g = 0; g < w->n_groups; g++) {
        form *f = &forms[g];
        size_t due = older(length, w->residual[g]), rows = (length + 63) / 64;
        size_t least = due > f->final ? due : f->final;
        f->sealed = f->sealed < least ? f->sealed : least;
        f->sealed = f->sealed < rows ? f->sealed : rows;
        f->final = f->final < f->sealed ? f->final : f->sealed;
        if (f->marked >= length)
            f->marked = SIZE_MAX;
    }
}

static void forms_clear(form *forms)
{
    for (uint32_t g = 0; g < GROUPS; g++)
        forms[g] = (form){0, 0, SIZE_MAX};
}

/* Whether a sequence equals one that got its tokens in one step. */
static int is_straight(const world *w, const form *forms, size_t length)
{
    for (uint32_t g = 0; g < w->n_groups; g++)
        if (seals(w, g) &&
            (forms[g].marked < length || forms[g].sealed != older(length, w->residual[g])))
            return 0;
    return 1;
}

/* ---- comparisons ---- */

static size_t visible(const member *m, uint32_t layer)
{
    return m->length + (m->appended >> layer & 1 ? m->pending : 0);
}

static void expect_tokens(const actor *a, const member *m)
{
    int32_t values[MOST];
    check(a, kvt_seq_length(m->seq) == m->length);
    check(a, kvt_seq_pending(m->seq) == m->pending);
    must(a, kvt_seq_positions(m->seq, 0, m->length, values));
    for (size_t i = 0; i < m->length; i++)
        check(a, values[i] == m->tokens[i].position);
    must(a, kvt_seq_token_ids(m->seq, 0, m->length, values));
    for (size_t i = 0; i < m->length; i++)
        check(a, values[i] == m->tokens[i].id);
}

/* Tokens first .. first + n - 1 as read back: the mirror's bits, near what was appended. */
static void expect_read(const actor *a, const member *m, uint32_t layer, kvt_side side,
                        size_t first, size_t n)
{
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[layer]];
    kvt_type type = side == KVT_SIDE_K ? g->k_type : g->v_type;
    size_t row = row_floats(a->w, layer, side), dim = row / g->n_kv_heads;
    float *got = room(n * row * sizeof *got), *same = room(n * row * sizeof *same);
    float *fed = rows_of(a->w, m->tokens + first, n, layer, side);
    kvt_tensor got_view = kvt_tensor_f32(got), same_view = kvt_tensor_f32(same);

    must(a, kvt_read(m->seq, layer, side, first, n, &got_view));
    must_mirror(a, kvt_read(m->mirror, layer, side, first, n, &same_view));
    check(a, memcmp(got, same, n * row * sizeof *got) == 0);
    for (size_t i = 0; i < n * row; i += dim) {
        double error = 0, norm = 0, bound;
        for (size_t d = i; d < i + dim; d++) {
            error += ((double)got[d] - (double)fed[d]) * ((double)got[d] - (double)fed[d]);
            norm += (double)fed[d] * (double)fed[d];
        }
        /*
         * i8: a step of the largest element a dim, which is at most the norm of the row less its
         * offset. The offset is at most about an ordinary row, of mean square 2.3.
         */
        bound = type == KVT_TYPE_F32 ? 0
                : type == KVT_TYPE_F16
                    ? 0x1p-11 * sqrt(norm) + 1e-6
                    : sqrt((double)dim) / 127 * (sqrt(norm) + 2 * sqrt(2.3 * (double)dim));
        check(a, sqrt(error) <= bound);
    }
    free(got);
    free(same);
    free(fed);
}

static void expect_same_file(const actor *a, const kvt_cache *cache, const kvt_seq *seq,
                             const kvt_seq *other, const char *what)
{
    bytes x = save_raw(a, cache, seq), y = save_raw(a, a->mirrors, other);
    if (x.n != y.n || memcmp(x.data, y.data, x.n) != 0)
        report(a, what, "the files differ");
    bytes_free(&x);
    bytes_free(&y);
}

/* All that a sequence shows is its mirror's. */
static void expect_mirrored(const actor *a, const member *m)
{
    expect_tokens(a, m);
    if (!m->pending) {
        expect_same_file(a, a->w->cache, m->seq, m->mirror, "against the mirror");
        return;
    }
    for (uint32_t l = 0; l < a->w->n_layers; l++)
        for (int side = 0; side < 2; side++)
            expect_read(a, m, l, (kvt_side)side, 0, visible(m, l));
}

/* A straight build in the mirrors' cache saves the same file, where it has to. */
static void expect_straight(const actor *a, const member *m)
{
    history straight = {NULL, NULL, 0, 0};
    kvt_seq *seq;
    if (m->pending || !m->length || !is_straight(a->w, m->forms, m->length))
        return;
    log_add(&straight, STEP, m->length, m->tokens);
    seq = replay(a, &straight);
    expect_same_file(a, a->w->cache, m->seq, seq, "against a straight build");
    kvt_seq_destroy(seq);
    log_free(&straight);
}

static void expect_all(const actor *a)
{
    for (size_t i = 0; i < SEQS; i++)
        if (a->members[i].seq)
            expect_mirrored(a, &a->members[i]);
}

/* ---- bytes ---- */

/* The most that a sequence's open blocks may be beyond the budget (kvt_memory_forecast). */
static uint64_t exempt_bytes(const world *w, const member *m)
{
    uint64_t sum = 0;
    for (uint32_t g = 0; g < w->n_groups && !m->reserves; g++)
        if (seals(w, g))
            sum += (m->pending ? w->residual[g] / 64 + 3 : 1) * w->open_bytes[g];
    return sum;
}

/* Bytes of a sequence that has no step pending and no reserve: its blocks, shared or not. */
static uint64_t model_bytes(const world *w, const member *m)
{
    size_t rows = (m->length + 63) / 64;
    uint64_t sum = w->seq_bytes + rows * META_BYTES;
    for (uint32_t g = 0; g < w->n_groups; g++) {
        const form *f = &m->forms[g];
        size_t sealed = seals(w, g) ? f->sealed : rows;
        sum += sealed * w->sealed_bytes[g];
        sum += (rows - sealed + f->sealed - f->final) * w->open_bytes[g];
    }
    return sum;
}

static void expect_bytes(const actor *a)
{
    const world *w = a->w;
    kvt_cache_stats all = {.struct_size = sizeof all};
    uint64_t n = 0, own = 0, shared = 0, exempt = 0, border, reserves = 0;

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
        if (!m->pending && !m->reserves)
            check(a, one.own_bytes + one.shared_bytes == model_bytes(w, m));
        n++;
        own += one.own_bytes;
        shared += one.shared_bytes;
        exempt += exempt_bytes(w, m);
        reserves += (uint64_t)(m->reserves || m->pending);
    }
    check(a, all.bytes == w->memory.live_bytes);
    check(a, all.bytes == kvt_cache_memory_bytes(w->cache));
    /* The keys for a selection in block 0: of a pending step, or of a reserve. */
    border = all.bytes - (w->cache_bytes + n * w->seq_bytes + all.bytes_free + all.bytes_reserved +
                          all.bytes_used);
    check(a, border == 0 || reserves);
    check(a, own - border - n * w->seq_bytes + all.bytes_shared ==
                 all.bytes_used + all.bytes_reserved);
    check(a, shared >= 2 * all.bytes_shared && shared <= n * all.bytes_shared);
    check(a, all.blocks_sealed <= all.blocks_used && all.blocks_shared <= all.blocks_used);
    if (w->config.memory_budget_bytes)
        check(a, all.bytes - all.bytes_free <= w->config.memory_budget_bytes + exempt);
}

/* Calls of the allocator so far, where no other thread makes any. */
static size_t calls_of(const world *w)
{
    return w->is_shared ? 0 : w->memory.calls;
}

/* ---- operations: what may be refused ---- */

static void arm(const actor *a)
{
    rng *r = (rng *)(uintptr_t)&a->r;
    if (a->w->injects && rng_below(r, 3) == 0)
        a->w->memory.countdown = rng_below(r, 6);
}

/* 1: the call has succeeded. 0: it was refused as it may be, and nothing has changed. */
static int succeeded(actor *a, kvt_status status, const member *m)
{
    int was_armed = !a->w->is_shared && a->w->memory.countdown >= 0;
    if (was_armed)
        a->w->memory.countdown = -1;
    if (status == KVT_OK)
        return 1;
    if (!(status == KVT_ERR_MEMORY && was_armed) &&
        !(status == KVT_ERR_BUDGET && a->w->config.memory_budget_bytes))
        must_at(a, a->w->cache, status, "refused");
    a->refused++;
    if (m && m->seq)
        expect_mirrored(a, m);
    return 0;
}

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
    arm(a);
    if (succeeded(a, kvt_seq_create(a->w->cache, &m->seq), NULL))
        must_mirror(a, kvt_seq_create(a->mirrors, &m->mirror));
    else
        m->seq = NULL;
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
    if (m->pending || a->w->is_shared)
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
    if (!succeeded(a, kvt_seq_fork(m->seq, n, &seq), m)) {
        check(a, seq == NULL);
        return 0;
    }
    a->forks++;
    expect_all_shared(a, m, seq, used);
    *copy = *m;
    copy->seq = seq;
    copy->log = log_copy(&m->log);
    if (m->pending) /* its begin has ended the time of drafts */
        log_add(&copy->log, DROPPED, 0, NULL);
    log_add(&copy->log, TRUNCATE, n, NULL);
    forms_truncate(a->w, copy->forms, n);
    copy->length = n;
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

/* Begin a step of n new tokens, positions given or counted on. 0: it was refused. */
static int begin_tokens(actor *a, member *m, size_t n, int given)
{
    int32_t positions[MOST];
    int32_t next = kvt_seq_next_position(m->seq);
    for (size_t i = 0; i < n; i++) {
        token *t = &m->tokens[m->length + i];
        t->content = a->next_content++;
        t->position = next + (int32_t)(given ? 2 * i + 5 : i);
        t->id = rng_below(&a->r, 5) ? (int32_t)(t->content % 50000) : KVT_TOKEN_NONE;
        positions[i] = t->position;
    }
    arm(a);
    if (!succeeded(a, kvt_seq_begin(m->seq, n, given ? positions : NULL), m))
        return 0;
    forms_begin(a->w, m->forms);
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
        log_add(&m->log, DROPPED, 0, NULL);
    m->pending = m->appended = 0;
}

/* What is missing of the step, and its commit. */
static void commit(actor *a, member *m)
{
    const token *fed = m->tokens + m->length;
    if (!m->pending)
        return;
    for (uint32_t l = 0; l < a->w->n_layers; l++) {
        if (m->appended >> l & 1)
            continue;
        append_layer(a, a->w->cache, m->seq, fed, m->pending, l, (int)rng_below(&a->r, 2));
        append_layer(a, a->mirrors, m->mirror, fed, m->pending, l, 0);
    }
    commit_step(a, a->w->cache, m->seq, fed, m->pending);
    commit_step(a, a->mirrors, m->mirror, fed, m->pending);
    log_add(&m->log, STEP, m->pending, fed);
    forms_commit(a->w, m->forms, m->length, m->pending);
    m->length += m->pending;
    m->pending = m->appended = 0;
}

static void whole_step(actor *a, member *m)
{
    begin(a, m);
    commit(a, m);
}

static void truncate_to(actor *a, member *m, size_t n)
{
    must(a, kvt_seq_truncate(m->seq, n));
    did(a, m, TRUNCATE, n, NULL);
    forms_truncate(a->w, m->forms, n);
    m->length = n;
}

static void truncate_seq(actor *a, member *m)
{
    if (!m->pending)
        truncate_to(a, m, some_length(a, m->length));
}

static void clear(actor *a, member *m)
{
    must(a, kvt_seq_clear(m->seq));
    must_mirror(a, kvt_seq_clear(m->mirror));
    log_free(&m->log);
    forms_clear(m->forms);
    m->length = m->pending = m->appended = 0;
}

static void reserve(actor *a, member *m)
{
    if (m->pending)
        return;
    arm(a);
    if (succeeded(a, kvt_seq_reserve(m->seq, rng_below(&a->r, MOST + 1)), m))
        m->reserves = 1;
}

static void save(actor *a, member *m)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options = {sizeof options, KVT_CODEC_ZSTD, 0, 0, 0};
    if (m->pending)
        return;
    options.codec = rng_below(&a->r, 4) ? KVT_CODEC_RAW : KVT_CODEC_ZSTD;
    arm(a);
    if (!succeeded(a, kvt_seq_save_stream(m->seq, &writer, &options), m)) {
        bytes_free(&b);
        return;
    }
    bytes_free(&a->file.bytes);
    log_free(&a->file.log);
    a->file.bytes = b;
    a->file.length = m->length;
    memcpy(a->file.tokens, m->tokens, sizeof m->tokens);
    memcpy(a->file.forms, m->forms, sizeof m->forms);
    a->file.log = log_copy(&m->log);
    log_add(&a->file.log, RELOAD, 0, NULL);
}

static void load(actor *a, member *m)
{
    if (m->pending || !a->file.bytes.n)
        return;
    arm(a);
    if (!succeeded(a, load_bytes(m->seq, a->file.bytes.data, a->file.bytes.n, NULL), m))
        return;
    log_free(&m->log);
    m->log = log_copy(&a->file.log);
    kvt_seq_destroy(m->mirror);
    m->mirror = replay(a, &m->log);
    m->length = a->file.length;
    memcpy(m->tokens, a->file.tokens, sizeof m->tokens);
    memcpy(m->forms, a->file.forms, sizeof m->forms);
    forms_begin(a->w, m->forms);
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

/* ---- attention ---- */

typedef struct attention {
    const actor *a;
    uint32_t layer, flags;
    size_t q_row, out_row; /* floats of a query, of all heads */
} attention;

static void attend_all(const attention *t, kvt_cache *cache, const kvt_attend_item *items,
                       size_t n_items, const float *q, float *out, float *lse, int by_plan)
{
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = t->layer;
    args.flags = t->flags;
    args.items = items;
    args.n_items = n_items;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.lse = lse;
    args.n_threads = by_plan ? 3 : 0;
    if (by_plan) {
        kvt_attend_plan plan;
        void *scratch;
        must_at(t->a, cache, kvt_attend_plan_init(&plan, cache, &args), "attend plan");
        scratch = aligned_alloc(64, (plan.scratch_bytes + 127) / 64 * 64);
        if (!scratch)
            abort();
        for (size_t i = plan.n_tasks; i-- > 0;)
            must_at(t->a, cache, kvt_attend_task(&plan, scratch, i), "attend task");
        must_at(t->a, cache, kvt_attend_finish(&plan, scratch), "attend finish");
        free(scratch);
    } else {
        must_at(t->a, cache, kvt_attend(cache, &args), "attend");
    }
}

/*
 * One query that sees all tokens against attention in double, over the tokens as they are read back
 * and over the tokens themselves. Bounds: docs/numerics.md, "Attention".
 */
static void expect_near(const attention *t, const member *m, const float *q, const float *out)
{
    const actor *a = t->a;
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[t->layer]];
    size_t n = visible(m, t->layer), ratio = g->n_q_heads / g->n_kv_heads;
    float *k = rows_of(a->w, m->tokens, n, t->layer, KVT_SIDE_K);
    float *v = rows_of(a->w, m->tokens, n, t->layer, KVT_SIDE_V);
    float *k_read = room(n * row_floats(a->w, t->layer, KVT_SIDE_K) * sizeof *k_read);
    float *v_read = room(n * row_floats(a->w, t->layer, KVT_SIDE_V) * sizeof *v_read);
    kvt_tensor k_view = kvt_tensor_f32(k_read), v_view = kvt_tensor_f32(v_read);
    kvt_type worst = g->k_type > g->v_type ? g->k_type : g->v_type;
    double scale = 1.0 / (double)sqrtf((float)g->k_dim);

    must(a, kvt_read(m->seq, t->layer, KVT_SIDE_K, 0, n, &k_view));
    must(a, kvt_read(m->seq, t->layer, KVT_SIDE_V, 0, n, &v_view));
    for (size_t h = 0; h < g->n_q_heads; h++) {
        double exact[MAX_DIM], stored[MAX_DIM], dequant, added, difference = 0, norm = 0;
        double largest = 0, small, bound;
        for (size_t i = 0; i < n; i++) {
            double logit = 0;
            for (size_t d = 0; d < g->k_dim; d++)
                logit += (double)q[h * g->k_dim + d] *
                         (double)k[(i * g->n_kv_heads + h / ratio) * g->k_dim + d] * scale;
            largest = fabs(logit) > largest ? fabs(logit) : largest;
        }
        reference_row(q + h * g->k_dim, k, v, n, g->n_kv_heads, h / ratio, g->k_dim, g->v_dim,
                      scale, 0, NULL, NULL, 0, 0, -INFINITY, exact);
        reference_row(q + h * g->k_dim, k_read, v_read, n, g->n_kv_heads, h / ratio, g->k_dim,
                      g->v_dim, scale, 0, NULL, NULL, 0, 0, -INFINITY, stored);
        for (size_t d = 0; d < g->v_dim; d++) {
            difference += (stored[d] - exact[d]) * (stored[d] - exact[d]);
            norm += exact[d] * exact[d];
        }
        dequant = sqrt(difference / norm);
        added = relative_l2(out + h * g->v_dim, stored, g->v_dim);
        small = 2e-6 * (1 + largest);
        /* Integer products: q of 14 bits, the logits' error shifts weights. */
        bound = small + (worst == KVT_TYPE_I8 && !(t->flags & KVT_ATTEND_F32)
                             ? 0.06 * dequant + (1 + largest) / 4000
                             : 0);
        check(a, t->flags & KVT_ATTEND_FAST || added <= bound);
        check(a, worst != KVT_TYPE_F32 || dequant <= small);
        check(a, worst != KVT_TYPE_F16 || dequant <= 4e-3 * (1 + largest));
        check(a, worst != KVT_TYPE_I8 || dequant <= 0.1 * (1 + largest));
    }
    free(k);
    free(v);
    free(k_read);
    free(v_read);
}

/* A batch of all sequences that have tokens: each as its mirror alone, to the bit. */
static void attend(actor *a, member *m)
{
    static const uint32_t modes[] = {0, 0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    enum { QUERIES = 3 };
    attention t = {a, rng_below(&a->r, a->w->n_layers), modes[rng_below(&a->r, 4)], 0, 0};
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[t.layer]];
    kvt_attend_item items[SEQS];
    member *of[SEQS];
    size_t n_items = 0, n = 0, at = 0, calls = calls_of(a->w);
    float *q, *out, *alone, *lse, lse_alone[QUERIES * 4];
    int by_plan = (int)rng_below(&a->r, 2);

    (void)m;
    t.q_row = (size_t)g->n_q_heads * g->k_dim;
    t.out_row = (size_t)g->n_q_heads * g->v_dim;
    if (rng_below(&a->r, 2))
        t.flags |= KVT_ATTEND_CAUSAL;
    memset(items, 0, sizeof items);
    for (size_t i = 0; i < SEQS; i++) {
        size_t n_tokens = a->members[i].seq ? visible(&a->members[i], t.layer) : 0;
        if (!n_tokens)
            continue;
        of[n_items] = &a->members[i];
        items[n_items].seq = a->members[i].seq;
        items[n_items].n_queries = n_tokens < QUERIES ? 1 : 1 + rng_below(&a->r, QUERIES);
        n += (size_t)items[n_items++].n_queries;
    }
    if (!n_items)
        return;
    q = rng_normals(&a->r, n * t.q_row);
    for (size_t i = 0; i < n * t.q_row; i++)
        q[i] *= 0.5f;
    out = room(n * t.out_row * sizeof *out);
    alone = room(QUERIES * t.out_row * sizeof *alone);
    lse = room(n * g->n_q_heads * sizeof *lse);
    attend_all(&t, a->w->cache, items, n_items, q, out, lse, by_plan);
    check(a, calls_of(a->w) == calls);
    for (size_t i = 0; i < n_items; i++) {
        size_t queries = (size_t)items[i].n_queries;
        kvt_attend_item item = items[i];
        item.seq = of[i]->mirror;
        attend_all(&t, a->mirrors, &item, 1, q + at * t.q_row, alone, lse_alone, 0);
        check(a, memcmp(alone, out + at * t.out_row, queries * t.out_row * sizeof *out) == 0);
        check(a, memcmp(lse_alone, lse + at * g->n_q_heads, queries * g->n_q_heads * sizeof *lse) ==
                     0);
        at += queries;
        if (rng_below(&a->r, 4) == 0) /* the last query sees all tokens, causal or not */
            expect_near(&t, of[i], q + (at - 1) * t.q_row, out + (at - 1) * t.out_row);
    }
    free(q);
    free(out);
    free(alone);
    free(lse);
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
    {"create", create, 2, 0},    {"destroy", destroy, 3, 1},  {"fork", fork_seq, 8, 1},
    {"begin", begin, 6, 1},      {"append", append, 6, 1},    {"commit", commit, 4, 1},
    {"abort", abort_step, 1, 1}, {"step", whole_step, 24, 1}, {"truncate", truncate_seq, 10, 1},
    {"clear", clear, 1, 1},      {"reserve", reserve, 1, 1},  {"save", save, 2, 1},
    {"load", load, 2, 1},        {"trim", trim, 1, 1},        {"capacity", grow_to_capacity, 1, 1},
    {"attend", attend, 6, 1},    {"read", read_back, 6, 1},
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
        {KVT_TYPE_F16, KVT_TYPE_F16}, {KVT_TYPE_F32, KVT_TYPE_F32},
    };
    static const uint32_t dims[] = {8, 16, 16, 24, 32, 64};
    static const uint32_t residuals[] = {0, 0, 0, KVT_RESIDUAL_NONE, 1, 100};
    const kvt_type *type = types[rng_below(r, 8)];
    uint32_t heads = 1 + rng_below(r, MAX_HEADS);
    kvt_group_config g = group_of(1 + rng_below(r, 2), heads * (1 + rng_below(r, 2)), heads,
                                  dims[rng_below(r, 6)], dims[rng_below(r, 6)], type[0], type[1]);
    g.rotation_seed = rng_next(r);
    g.residual_tokens = residuals[rng_below(r, 6)];
    if (rng_below(r, 4) == 0)
        g.flags = rng_below(r, 4) | (rng_below(r, 2) ? KVT_GROUP_NO_V_ROTATION : 0);
    if (type[0] == type[1] && rng_below(r, 4) == 0) {
        g.flags |= KVT_GROUP_V_IN_K;
        g.v_dim = g.k_dim == 24 ? 16 : g.k_dim;
    }
    return g;
}

/* What n tokens up to 64 of group g take, but for positions and ids. */
static uint64_t block_bytes(const world *w, uint32_t g, uint64_t n, uint32_t residual)
{
    kvt_group_config group = w->groups[g];
    kvt_config c = w->config;
    uint64_t empty, one;
    group.residual_tokens = residual;
    c.groups = &group;
    c.n_groups = 1;
    expect_ok(NULL, kvt_memory_forecast(&c, 1, 0, &empty));
    expect_ok(NULL, kvt_memory_forecast(&c, 1, n, &one));
    return one - empty - META_BYTES;
}

/* From the groups: the rest of the config, without limits. */
static void config_world(world *w)
{
    for (uint32_t g = 0; g < w->n_groups; g++) {
        uint32_t given = w->groups[g].residual_tokens;
        w->residual[g] = given == 0 ? KVT_RESIDUAL_TOKENS : given == KVT_RESIDUAL_NONE ? 0 : given;
        for (uint32_t l = 0; l < w->groups[g].n_layers; l++)
            w->group_of_layer[w->n_layers++] = g;
    }
    ledger_init(&w->memory);
    w->config = kvt_config_init();
    w->config.groups = w->groups;
    w->config.n_groups = w->n_groups;
    w->config.max_tokens = MOST;
    w->config.allocator = ledger_allocator(&w->memory);
    for (uint32_t g = 0; g < w->n_groups; g++) {
        w->open_bytes[g] = block_bytes(w, g, 1, 1000);
        w->sealed_bytes[g] = w->open_bytes[g];
        if (seals(w, g)) /* the open form is kept beside */
            w->sealed_bytes[g] = block_bytes(w, g, 64, KVT_RESIDUAL_NONE) - w->open_bytes[g];
    }
}

static void open_world(world *w)
{
    kvt_seq *seq = NULL;
    expect_ok(NULL, kvt_cache_create(&w->config, &w->cache));
    w->cache_bytes = kvt_cache_memory_bytes(w->cache);
    expect_ok(w->cache, kvt_seq_create(w->cache, &seq));
    w->seq_bytes = kvt_seq_memory_bytes(seq);
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
    config_world(w);
    w->config.n_threads = 1 + (rng_below(r, 8) == 0);
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
}

static void close_actor(actor *a)
{
    for (size_t i = 0; i < SEQS; i++)
        destroy(a, &a->members[i]);
    bytes_free(&a->file.bytes);
    log_free(&a->file.log);
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

static size_t run(uint64_t seed, size_t *refused)
{
    rng r = {seed * 1000003};
    size_t n, forks;
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
    forks = a->forks;
    *refused += a->refused;
    close_actor(a);
    free(a);
    close_world(&w);
    return forks;
}

/* What one thread does concerns the thread sanitizer little. */
static uint64_t n_runs(void)
{
    const char *given = getenv("KVT_TEST_OPERATIONS");
    return given ? strtoull(given, NULL, 10) : is_quick() || HAS_THREAD_SANITIZER ? 40 : 300;
}

static void random_operations(void **state)
{
    const char *given = getenv("KVT_TEST_SEED");
    uint64_t first = given ? strtoull(given, NULL, 10) : 1, n = given ? 1 : n_runs();
    size_t forks = 0, refused = 0;
    (void)state;
    for (uint64_t seed = first; seed < first + n; seed++)
        forks += run(seed, &refused);
    printf("seeds %llu to %llu: %zu forks, %zu refused calls\n", (unsigned long long)first,
           (unsigned long long)(first + n - 1), forks, refused);
    assert_true(given || (forks > n && refused > n / 4));
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_operations),
        cmocka_unit_test(operations_in_threads),
        cmocka_unit_test(a_cut_block_takes_no_sealed_form),
        cmocka_unit_test(a_block_about_to_be_written_is_not_taken),
        cmocka_unit_test(what_is_shared_is_sealed_once),
        cmocka_unit_test(shared_open_blocks_are_held_against_the_budget),
    };
    make_normals();
    return cmocka_run_group_tests_name("operations", tests, NULL, NULL);
}
