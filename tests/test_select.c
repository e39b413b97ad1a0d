/*
 * kvt_seq_commit_selected: whatever the selection, the sequence is bit for bit the one that was
 * given the selected tokens alone, and stays so; errors leave the step pending; the memory for keys
 * at the border of block 0 comes with begin, and goes with the step.
 */
#include "subject.h"

#include <stdio.h>

enum { HIGHEST = 150 }; /* tokens of a step */

static size_t min_of(size_t a, size_t b)
{
    return a < b ? a : b;
}

static const uint32_t residuals[] = {0, KVT_RESIDUAL_NONE, 1, 63, 100};

/* A selection of a step's tokens. */
typedef struct selection {
    size_t pending, n;
    uint64_t indices[HIGHEST];
    int32_t positions[HIGHEST]; /* of all pending tokens */
} selection;

/*
 * Append some of the tokens from `first` on to every layer: those of the indices. Each layer has
 * others.
 */
static void append_chosen(const subject *s, kvt_seq *seq, size_t first, const selection *c)
{
    uint32_t layer = 0;
    for (uint32_t g = 0; g < s->n_groups; g++) {
        const tokens *t = &s->t[g];
        size_t k_row = t->kv_heads * t->k_dim, v_row = t->kv_heads * t->v_dim;
        float *k = malloc(c->n * k_row * sizeof *k), *v = malloc(c->n * v_row * sizeof *v);
        kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
        int v_in_k = (s->groups[g].flags & KVT_GROUP_V_IN_K) != 0;
        assert_true(k && v);
        for (uint32_t l = 0; l < s->groups[g].n_layers; l++, layer++) {
            for (size_t j = 0; j < c->n; j++) {
                size_t token = (first + (size_t)c->indices[j] + 131 * l) % MOST;
                memcpy(k + j * k_row, t->k + token * k_row, k_row * sizeof *k);
                memcpy(v + j * v_row, t->v + token * v_row, v_row * sizeof *v);
            }
            expect_ok(s->cache, kvt_append(seq, layer, &k_view, v_in_k ? NULL : &v_view));
        }
        free(k);
        free(v);
    }
}

/* The ids of tokens from `first` on: the pending ones, or the selected ones. */
static void ids_of(size_t first, const selection *c, int32_t *ids)
{
    for (size_t j = 0; j < c->n; j++)
        ids[j] = (int32_t)(first + c->indices[j]);
}

/* Begin a step of a selection's pending tokens, from token `first` of the test's on. */
static void begin_tree(const subject *s, kvt_seq *seq, size_t first, const selection *c)
{
    selection all = {.pending = c->pending, .n = c->pending};
    for (size_t i = 0; i < c->pending; i++)
        all.indices[i] = i;
    expect_ok(s->cache, kvt_seq_begin(seq, c->pending, c->positions));
    append_chosen(s, seq, first, &all);
}

static kvt_status select_of(kvt_seq *seq, size_t first, const selection *c)
{
    int32_t ids[HIGHEST];
    ids_of(first, c, ids);
    return kvt_seq_commit_selected(seq, c->indices, c->n, first % 5 ? ids : NULL);
}

/* The step that the other sequence gets: the selected tokens alone. */
static void step_chosen(const subject *s, kvt_seq *seq, size_t first, const selection *c)
{
    int32_t ids[HIGHEST], positions[HIGHEST];
    if (c->n == 0)
        return;
    ids_of(first, c, ids);
    for (size_t j = 0; j < c->n; j++)
        positions[j] = c->positions[c->indices[j]];
    expect_ok(s->cache, kvt_seq_begin(seq, c->n, positions));
    append_chosen(s, seq, first, c);
    expect_ok(s->cache, kvt_seq_commit(seq, first % 5 ? ids : NULL));
}

/* A step of `pending` tokens, of which those are selected that takes[i] says. */
static selection selection_of(const kvt_seq *seq, size_t pending, const unsigned char *takes)
{
    selection c = {.pending = pending};
    for (size_t i = 0; i < pending; i++) {
        c.positions[i] = kvt_seq_next_position(seq) + (int32_t)(i / 3);
        if (takes[i])
            c.indices[c.n++] = i;
    }
    return c;
}

/* A selection at random: sparse, dense, a prefix, one token, all, none. */
static selection random_selection(const kvt_seq *seq, size_t pending, int with_first, rng *r)
{
    unsigned char takes[HIGHEST] = {0};
    uint32_t kind = rng_below(r, 12), share = 1 + rng_below(r, 8);
    size_t at = rng_below(r, (uint32_t)pending);
    for (size_t i = 0; i < pending; i++)
        takes[i] = kind < 5    ? rng_below(r, 8) < share
                   : kind < 7  ? i <= at
                   : kind < 8  ? i == at
                   : kind < 9  ? i != at
                   : kind < 10 ? i >= at
                   : kind < 11 ? rng_below(r, 8) == 0
                               : (pending + at) % 2 == 0;
    takes[0] |= (unsigned char)with_first;
    return selection_of(seq, pending, takes);
}

/* ---- at random ---- */

static void random_groups(kvt_group_config *g, uint32_t n_groups, rng *r)
{
    static const uint32_t dims[] = {8, 24, 40, 64, 80, 128, 192, 96};
    for (uint32_t i = 0; i < n_groups; i++) {
        kvt_type k = rng_below(r, 3) ? KVT_TYPE_I8 : (kvt_type)rng_below(r, 3);
        kvt_type v = rng_below(r, 3) ? KVT_TYPE_I8 : (kvt_type)rng_below(r, 3);
        uint32_t few = rng_below(r, 4) ? 4 : 8, k_dim = dims[rng_below(r, few)];
        g[i] = group_of(1 + rng_below(r, 2), 2, 1 + rng_below(r, 2), k_dim, dims[rng_below(r, few)],
                        k, v);
        g[i].residual_tokens = residuals[rng_below(r, 5)];
        g[i].rotation_seed = rng_next(r);
        if (rng_below(r, 4) == 0)
            g[i].flags = rng_below(r, 4) | (rng_below(r, 2) ? KVT_GROUP_NO_V_ROTATION : 0);
        if (k == v && rng_below(r, 4) == 0) {
            g[i].flags |= KVT_GROUP_V_IN_K;
            g[i].v_dim = k_dim;
        }
    }
}

/* Rows with scales above 1, and a first key that the others are small beside. */
static void make_large(subject *s, rng *r)
{
    for (uint32_t g = 0; g < s->n_groups; g++) {
        const kvt_group_config *config = &s->groups[g];
        tokens *t = &s->t[g];
        int all_i8 = config->k_type == KVT_TYPE_I8 && config->v_type == KVT_TYPE_I8;
        int large = all_i8 && rng_below(r, 3) == 0, sink = all_i8 && rng_below(r, 4) == 0;
        size_t k_row = t->kv_heads * t->k_dim, v_row = t->kv_heads * t->v_dim;
        for (size_t i = 0; large && i < MOST; i++) {
            float by = i % 97 && rng_below(r, 3) == 0 ? 2e4f : 1.0f;
            for (size_t d = 0; d < k_row; d++)
                t->k[i * k_row + d] *= by;
            for (size_t d = 0; d < v_row; d++)
                t->v[i * v_row + d] *= by;
        }
        for (size_t d = 0; sink && d < k_row; d++)
            t->k[d] *= 30.0f;
    }
}

typedef struct pair {
    const subject *s;
    kvt_seq *tree, *plain; /* the one that selects, and the one that is given what was selected */
    int with_first;        /* an empty sequence has to take the first token */
    uint64_t seed;
} pair;

/* The same step, of as many tokens as there is room for. */
static void both_step(const pair *p, size_t first, size_t n)
{
    n = min_of(n, MOST - (size_t)kvt_seq_length(p->plain));
    if (n == 0)
        return;
    step_of(p->s, p->tree, first, n);
    step_of(p->s, p->plain, first, n);
}

static void both_truncate(const pair *p, size_t back)
{
    size_t length = (size_t)kvt_seq_length(p->plain);
    length -= min_of(back, length);
    expect_ok(p->s->cache, kvt_seq_truncate(p->tree, length));
    expect_ok(p->s->cache, kvt_seq_truncate(p->plain, length));
}

static void both_select(const pair *p, rng *r, size_t most)
{
    size_t length = (size_t)kvt_seq_length(p->plain), first, pending;
    selection c;
    pending = 1 + rng_below(r, rng_below(r, 3) ? 12 : (uint32_t)most);
    if (rng_below(r, 3) == 0) /* over the border of a block, by a few */
        pending = 64 - length % 64 + rng_below(r, 9);
    pending = min_of(min_of(pending, most), MOST - length);
    if (pending == 0)
        return;
    first = rng_below(r, (uint32_t)(MOST - pending));
    c = random_selection(p->plain, pending, p->with_first && length == 0, r);
    if (p->with_first && length == 0)
        first = 0; /* with its sink, if it has one */
    begin_tree(p->s, p->tree, first, &c);
    expect_ok(p->s->cache, select_of(p->tree, first, &c));
    assert_true(kvt_seq_pending(p->tree) == 0);
    step_chosen(p->s, p->plain, first, &c);
    if (c.n == 0) { /* begin has ended what a truncate could take back; so does the other's */
        begin_tree(p->s, p->plain, first, &c);
        expect_ok(p->s->cache, kvt_seq_abort(p->plain));
    }
    expect_equal(p->s, p->tree, p->plain, "selected", (size_t)p->seed);
    if (rng_below(r, 4) == 0) /* a draft that is taken back before the next begin */
        both_truncate(p, 1 + rng_below(r, (uint32_t)c.n + 1));
}

static void run_selections(uint64_t seed)
{
    static const size_t lengths[] = {0,  1,  5,   30,  40,  55,  60,  62,  63,  64, 65,
                                     90, 99, 126, 127, 128, 129, 163, 164, 190, 250};
    rng r = {seed};
    kvt_group_config g[2];
    uint32_t n_groups = 1 + rng_below(&r, 2), isas = 0;
    pair p = {.seed = seed};
    kvt_seq *other = NULL;
    uint64_t other_file = 0;
    size_t most = HIGHEST;
    subject s;
    ledger memory;

    while (kvt_isa_name(isas))
        isas++;
    random_groups(g, n_groups, &r);
    for (uint32_t i = 0; i < n_groups; i++) {
        if (g[i].k_type == KVT_TYPE_I8 || g[i].v_type == KVT_TYPE_I8)
            most = KVT_SELECT_TOKENS;
        if (g[i].k_type == KVT_TYPE_I8 && !(g[i].flags & KVT_GROUP_NO_OFFSET))
            p.with_first = 1;
    }
    ledger_init(&memory);
    open_subject(&s, g, n_groups, &r);
    make_large(&s, &r);
    s.ledger = &memory;
    s.n_threads = seed % 16 == 0 ? 3 : 1;
    open_cache(&s, kvt_isa_name((uint32_t)(seed % isas)));
    p.s = &s;
    p.tree = seq_of(&s);
    p.plain = seq_of(&s);
    if (rng_below(&r, 8) == 0)
        expect_ok(s.cache, kvt_seq_reserve(p.tree, MOST));
    both_step(&p, 0, lengths[rng_below(&r, sizeof lengths / sizeof *lengths)]);
    if (rng_below(&r, 3) == 0) { /* into a sealed block, and filled up, or not */
        both_step(&p, 300, 200);
        both_truncate(&p, rng_below(&r, 3) ? 1 + rng_below(&r, 300) : 1 + rng_below(&r, 450));
        if (rng_below(&r, 3) == 0)
            both_step(&p, 500, 1 + rng_below(&r, 70));
    }
    for (int round = 0; round < 6; round++) {
        if (rng_below(&r, 3) == 0) { /* share blocks with a fork, which may seal before */
            kvt_seq_destroy(other);
            expect_ok(s.cache, kvt_seq_fork(p.tree, kvt_seq_length(p.tree), &other));
            if (rng_below(&r, 2))
                step_of(&s, other, 600, min_of(100, MOST - (size_t)kvt_seq_length(other)));
            other_file = file_hash(&s, other);
        }
        both_select(&p, &r, most);
        if (rng_below(&r, 3) == 0)
            both_step(&p, rng_below(&r, 300), 1 + rng_below(&r, 70));
        if (rng_below(&r, 4) == 0)
            both_truncate(&p, 1 + rng_below(&r, rng_below(&r, 2) ? 64 : 300));
        if (rng_below(&r, 16) == 0)
            both_truncate(&p, MOST);
    }
    for (int i = 0; i < 3; i++)
        both_step(&p, 100, 1 + rng_below(&r, 80));
    expect_equal(&s, p.tree, p.plain, "and goes on", (size_t)seed);
    if (other && file_hash(&s, other) != other_file)
        fail_msg("seed %u: a fork has changed", (unsigned)seed);
    kvt_seq_destroy(other);
    kvt_seq_destroy(p.tree);
    kvt_seq_destroy(p.plain);
    close_subject(&s);
    ledger_close(&memory);
}

static void a_selection_is_a_step_of_its_own(void **state)
{
    const uint64_t runs = is_quick() ? 40 : 1000;
    (void)state;
    for (uint64_t seed = 1; seed <= runs; seed++)
        run_selections(seed);
}

/* ---- at every border ---- */

/* To `length`, by a truncate from 300 where it is cut. */
static void prepare(const subject *s, kvt_seq *seq, size_t length, int is_cut)
{
    expect_ok(s->cache, kvt_seq_clear(seq));
    step_of(s, seq, 0, is_cut ? 300 : length);
    if (is_cut) {
        step_of(s, seq, 300, 1);
        expect_ok(s->cache, kvt_seq_truncate(seq, length));
    }
}

static void check_border(const subject *s, kvt_seq *tree, kvt_seq *plain, size_t length, int is_cut,
                         size_t pending, int kind)
{
    unsigned char takes[HIGHEST];
    selection c;
    for (size_t i = 0; i < pending; i++)
        takes[i] = kind == 0   ? i + 1 == pending
                   : kind == 1 ? i > 0
                   : kind == 2 ? i % 2 == 1
                   : kind == 3 ? i + 2 != pending
                   : kind == 4 ? i < pending / 2
                               : length + i + 1 != 64 && length + i + 1 != 128;
    prepare(s, tree, length, is_cut);
    prepare(s, plain, length, is_cut);
    c = selection_of(plain, pending, takes);
    begin_tree(s, tree, 400, &c);
    expect_ok(s->cache, select_of(tree, 400, &c));
    step_chosen(s, plain, 400, &c);
    expect_equal(s, tree, plain, is_cut ? "behind a cut" : "at a border", length * 100 + pending);
    for (int i = 0; i < 2; i++) {
        step_of(s, tree, 500, 63);
        step_of(s, plain, 500, 63);
    }
    expect_equal(s, tree, plain, "and goes on", length * 100 + pending);
}

static void at_every_border(void **state)
{
    static const size_t lengths[] = {1, 20, 60, 62, 63, 64, 65, 100, 126, 127, 128, 190};
    static const size_t steps[] = {2, 3, 5, 40, 64};
    (void)state;
    for (size_t w = 0; w < 5; w++)
        for (int types = 0; types < 3; types++) {
            rng r = {w};
            kvt_group_config g = group_of(1, 1, 1, 16, 24, types == 1 ? KVT_TYPE_F16 : KVT_TYPE_I8,
                                          types == 2 ? KVT_TYPE_F32 : KVT_TYPE_I8);
            kvt_seq *tree, *plain;
            subject s;
            g.residual_tokens = residuals[w];
            open_subject(&s, &g, 1, &r);
            open_cache(&s, NULL);
            tree = seq_of(&s);
            plain = seq_of(&s);
            for (size_t i = 0; i < 12; i += is_quick() ? 3 : 1)
                for (int cut = 0; cut < 2; cut++)
                    for (size_t j = 0; j < 5; j += quick_level() == 2 ? 2 : 1)
                        for (int kind = 0; kind < 6; kind++)
                            check_border(&s, tree, plain, lengths[i], cut, steps[j], kind);
            kvt_seq_destroy(tree);
            kvt_seq_destroy(plain);
            close_subject(&s);
        }
}

/* ---- with forks, and on threads ---- */

/* A fork of the pending step's sequence has nothing of it, whatever is selected. */
static void forks_of_a_pending_step(void **state)
{
    rng r = {31};
    kvt_group_config g = group_of(2, 2, 2, 24, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    for (size_t n = 40; n < 200; n += 13) {
        kvt_seq *tree = seq_of(&s), *plain = seq_of(&s), *before = seq_of(&s), *copy = NULL;
        selection c, all = {.pending = 64, .n = 64};
        grow(&s, tree, n);
        grow(&s, plain, n);
        grow(&s, before, n);
        c = random_selection(plain, 64, 0, &r);
        for (size_t i = 0; i < 64; i++)
            all.indices[i] = i;
        expect_ok(s.cache, kvt_seq_begin(tree, c.pending, c.positions));
        expect_ok(s.cache, kvt_seq_fork(tree, n, &copy));
        append_chosen(&s, tree, 400, &all);
        grow(&s, copy, 64);
        grow(&s, before, 64);
        expect_ok(s.cache, select_of(tree, 400, &c));
        step_chosen(&s, plain, 400, &c);
        expect_equal(&s, tree, plain, "with a fork", n);
        expect_equal(&s, copy, before, "the fork", n);
        kvt_seq_destroy(tree);
        grow(&s, copy, 64);
        grow(&s, before, 64);
        expect_equal(&s, copy, before, "the fork goes on", n);
        kvt_seq_destroy(plain);
        kvt_seq_destroy(before);
        kvt_seq_destroy(copy);
    }
    close_subject(&s);
}

typedef struct worker {
    kvt_append_plan *plan;
    size_t from;
    kvt_status status;
} worker;

enum { WORKERS = 4 };

static void *work(void *arg)
{
    worker *w = arg;
    for (size_t i = w->from; i < w->plan->n_tasks && w->status == KVT_OK; i += WORKERS)
        w->status = kvt_append_task(w->plan, i);
    return NULL;
}

static void append_on_threads(const subject *s, kvt_seq *seq, uint32_t layer, size_t first)
{
    const tokens *t = &s->t[0];
    kvt_tensor k = kvt_tensor_f32(t->k + first * t->kv_heads * t->k_dim);
    kvt_tensor v = kvt_tensor_f32(t->v + first * t->kv_heads * t->v_dim);
    kvt_append_plan plan;
    worker workers[WORKERS];
    pthread_t threads[WORKERS];
    expect_ok(s->cache, kvt_append_plan_init(&plan, seq, layer, &k, &v));
    for (size_t i = 0; i < WORKERS; i++) {
        workers[i] = (worker){&plan, i, KVT_OK};
        assert_int_equal(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    for (size_t i = 0; i < WORKERS; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        expect_ok(s->cache, workers[i].status);
    }
    expect_ok(s->cache, kvt_append_finish(&plan));
}

/* Tasks of a plan on several threads, the layers one after the other, and moves on a pool. */
static void tasks_on_threads(void **state)
{
    rng r = {32};
    kvt_group_config g = group_of(3, 8, 8, 128, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    s.n_threads = 3;
    open_cache(&s, NULL);
    for (size_t n = 10; n < 64; n += is_quick() ? 40 : 7) {
        kvt_seq *tree = seq_of(&s), *plain = seq_of(&s);
        selection c;
        grow(&s, tree, n);
        grow(&s, plain, n);
        c = random_selection(plain, 64, 0, &r);
        expect_ok(s.cache, kvt_seq_begin(tree, c.pending, c.positions));
        for (uint32_t layer = 0; layer < 3; layer++)
            append_on_threads(&s, tree, layer, 390 + 131 * layer);
        expect_ok(s.cache, select_of(tree, 390, &c));
        step_chosen(&s, plain, 390, &c);
        expect_equal(&s, tree, plain, "tasks on threads", n);
        kvt_seq_destroy(tree);
        kvt_seq_destroy(plain);
    }
    close_subject(&s);
}

/* ---- errors ---- */

/* A refused call: the step is pending as before, and can be committed. */
static void refuse(const subject *s, kvt_seq *seq, kvt_status status, const uint64_t *indices,
                   uint64_t n, const int32_t *ids, const char *text)
{
    uint64_t length = kvt_seq_length(seq), pending = kvt_seq_pending(seq);
    uint64_t attention = length + pending ? attend_hash(s, seq) : 0;
    expect(s->cache, status, kvt_seq_commit_selected(seq, indices, n, ids));
    expect_error_text(s->cache, text, "a refused selection");
    assert_true(kvt_seq_length(seq) == length && kvt_seq_pending(seq) == pending);
    assert_true(!(length + pending) || attend_hash(s, seq) == attention);
}

static void errors_leave_the_step_pending(void **state)
{
    static const uint64_t twice[] = {1, 1}, down[] = {3, 2}, high[] = {1, 10}, late[] = {1, 2};
    static const uint64_t all[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9};
    static const int32_t ids[] = {5, -2};
    rng r = {33};
    kvt_group_config g[2] = {group_of(2, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8),
                             group_of(1, 1, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F16)};
    subject s;
    (void)state;
    open_subject(&s, g, 2, &r);
    open_cache(&s, NULL);
    assert_true(kvt_seq_commit_selected(NULL, late, 1, NULL) == KVT_ERR_ARG);
    for (size_t n = 0; n < 200; n += 57) { /* the empty one; 57 is before the border of block 0 */
        kvt_seq *seq = seq_of(&s), *plain = seq_of(&s);
        kvt_tensor k = kvt_tensor_f32(s.t[0].k), v = kvt_tensor_f32(s.t[0].v);
        if (n) {
            grow(&s, seq, n);
            grow(&s, plain, n);
        }
        refuse(&s, seq, KVT_ERR_STATE, late, 2, NULL, "no step is pending");
        expect_ok(s.cache, kvt_seq_commit_selected(seq, late, 0, NULL)); /* as an abort */
        expect_ok(s.cache, kvt_seq_begin(seq, 10, NULL));
        expect_ok(s.cache, kvt_append(seq, 0, &k, &v));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_commit_selected(seq, late, 2, NULL));
        expect_error_text(s.cache, "layer 1 was not appended", "an incomplete step");
        expect_ok(s.cache, kvt_seq_commit_selected(seq, NULL, 0, NULL)); /* whatever is missing */
        assert_true(kvt_seq_pending(seq) == 0 && kvt_seq_length(seq) == n);
        expect_ok(s.cache, kvt_seq_begin(seq, 10, NULL));
        append_layers(&s, seq, n);
        refuse(&s, seq, KVT_ERR_ARG, NULL, 2, NULL, "NULL");
        refuse(&s, seq, KVT_ERR_ARG, twice, 2, NULL, "not ascending");
        refuse(&s, seq, KVT_ERR_ARG, down, 2, NULL, "not ascending");
        refuse(&s, seq, KVT_ERR_ARG, high, 2, NULL, "not below 10");
        refuse(&s, seq, KVT_ERR_ARG, all, 11, NULL, "11 of 10");
        refuse(&s, seq, KVT_ERR_ARG, late, 2, ids, "token id -2 of token 1");
        if (n == 0)
            refuse(&s, seq, KVT_ERR_ARG, late, 2, NULL, "first token is left out");
        expect_ok(s.cache, kvt_seq_commit_selected(seq, all, 10, NULL)); /* as kvt_seq_commit */
        expect_ok(s.cache, kvt_seq_begin(plain, 10, NULL));
        append_layers(&s, plain, n);
        expect_ok(s.cache, kvt_seq_commit(plain, NULL));
        expect_equal(&s, seq, plain, "after errors", n);
        refuse(&s, seq, KVT_ERR_STATE, late, 2, NULL, "no step is pending");
        kvt_seq_destroy(seq);
        kvt_seq_destroy(plain);
    }
    close_subject(&s);
}

/* More than KVT_SELECT_TOKENS tokens: refused with an i8 side, but all of them; fine without. */
static void long_steps(void **state)
{
    rng r = {34};
    (void)state;
    for (int i8 = 0; i8 < 2; i8++)
        for (size_t more = 0; more < 2; more++) {
            kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F32);
            size_t pending = KVT_SELECT_TOKENS + more;
            uint64_t all[HIGHEST];
            kvt_seq *seq, *plain;
            selection c;
            subject s;
            if (i8)
                g.v_type = KVT_TYPE_I8;
            open_subject(&s, &g, 1, &r);
            open_cache(&s, NULL);
            seq = seq_of(&s);
            plain = seq_of(&s);
            grow(&s, seq, 40);
            grow(&s, plain, 40);
            do
                c = random_selection(plain, pending, 0, &r);
            while (c.n == 0 || c.n == pending);
            begin_tree(&s, seq, 200, &c);
            for (size_t i = 0; i < pending; i++)
                all[i] = i;
            if (i8 && more) {
                refuse(&s, seq, KVT_ERR_STATE, c.indices, c.n, NULL, "too long");
                refuse(&s, seq, KVT_ERR_STATE, all, 5, NULL, "too long");
                memcpy(c.indices, all, sizeof all);
                c.n = pending;
            }
            expect_ok(s.cache, select_of(seq, 200, &c));
            step_chosen(&s, plain, 200, &c);
            expect_equal(&s, seq, plain, "a long step", pending);
            kvt_seq_destroy(seq);
            kvt_seq_destroy(plain);
            close_subject(&s);
        }
}

/* A key that might not be stored less another offset is refused, before anything has changed. */
static void keys_beyond_their_type(void **state)
{
    static const uint64_t chosen[] = {1, 3, 5, 7, 9}, prefix[] = {0, 1, 2, 3, 4, 5, 6};
    rng r = {35};
    kvt_group_config g = group_of(2, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_seq *seq, *plain;
    subject s;
    (void)state;
    g.flags = KVT_GROUP_NO_ROTATION;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    plain = seq_of(&s);
    grow(&s, seq, 60);
    grow(&s, plain, 60);
    for (int is_large = 0; is_large < 2; is_large++) {
        s.t[0].k[407 * 16 + 3] = is_large ? -7.935e6f : -7.934e6f;
        expect_ok(s.cache, kvt_seq_begin(seq, 10, NULL));
        append_layers(&s, seq, 400);
        if (is_large)
            refuse(&s, seq, KVT_ERR_VALUE, chosen, 5, NULL, "layer 0, kv head 0");
        else
            expect_ok(s.cache, kvt_seq_commit_selected(seq, chosen, 5, NULL));
        if (!is_large)
            expect_ok(s.cache, kvt_seq_truncate(seq, 60));
    }
    expect_ok(s.cache,
              kvt_seq_commit_selected(seq, prefix, 7, NULL)); /* has it, and moves nothing */
    expect_ok(s.cache, kvt_seq_begin(plain, 7, NULL));
    append_layers(&s, plain, 400);
    expect_ok(s.cache, kvt_seq_commit(plain, NULL));
    expect_equal(&s, seq, plain, "a large key", 0);
    kvt_seq_destroy(seq);
    kvt_seq_destroy(plain);
    close_subject(&s);
}

/* ---- memory ---- */

static void open_bordered(subject *s, ledger *memory, rng *r)
{
    kvt_group_config g[2] = {group_of(2, 2, 2, 24, 16, KVT_TYPE_I8, KVT_TYPE_I8),
                             group_of(1, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_F32)};
    ledger_init(memory);
    open_subject(s, g, 2, r);
    s->ledger = memory;
    open_cache(s, NULL);
}

/* Of n tokens' keys. */
static uint64_t border_bytes(size_t n)
{
    return (n * (2 * 2 * 24 + 16) * sizeof(float) + 63) / 64 * 64;
}

static size_t live_trimmed(const subject *s)
{
    expect_ok(s->cache, kvt_cache_trim(s->cache));
    return s->ledger->live_bytes;
}

/* The memory of a step over the border goes with it, however it ends. */
static void memory_goes_with_the_step(void **state)
{
    rng r = {36};
    subject s;
    ledger memory;
    (void)state;
    open_bordered(&s, &memory, &r);
    for (int end = 0; end < 6; end++) {
        kvt_seq *seq = seq_of(&s), *plain = seq_of(&s);
        uint64_t held, before, empty = kvt_seq_memory_bytes(seq);
        selection c;
        size_t live;
        grow(&s, seq, 40);
        grow(&s, plain, 40);
        do
            c = random_selection(plain, 50, 0, &r);
        while (c.n < 30 || c.n == 50);
        before = kvt_seq_memory_bytes(seq);
        live = live_trimmed(&s);
        begin_tree(&s, seq, 300, &c);
        held = kvt_seq_memory_bytes(seq);
        expect_ok(s.cache, kvt_seq_begin(plain, 50, NULL)); /* the same, less the keys */
        assert_true(kvt_seq_memory_bytes(plain) == held);
        expect_ok(s.cache, kvt_seq_abort(plain));
        switch (end) {
        case 0: expect_ok(s.cache, kvt_seq_commit(seq, NULL)); break;
        case 1: expect_ok(s.cache, kvt_seq_abort(seq)); break;
        case 2: expect_ok(s.cache, kvt_seq_clear(seq)); break;
        case 3: expect_ok(s.cache, select_of(seq, 300, &c)); break;
        case 4: expect_ok(s.cache, kvt_seq_commit_selected(seq, NULL, 0, NULL)); break;
        default: kvt_seq_destroy(seq); seq = NULL;
        }
        if (end == 0) /* nothing is sealed: the blocks stay */
            assert_true(kvt_seq_memory_bytes(seq) == held - border_bytes(26));
        if (end == 1 || end == 4) {
            assert_true(kvt_seq_memory_bytes(seq) == before);
            assert_true(live_trimmed(&s) == live);
        }
        if (end == 2)
            assert_true(kvt_seq_memory_bytes(seq) == empty);
        if (end == 3) {
            step_chosen(&s, plain, 300, &c);
            assert_true(kvt_seq_memory_bytes(seq) == kvt_seq_memory_bytes(plain));
        }
        kvt_seq_destroy(seq);
        kvt_seq_destroy(plain);
    }
    close_subject(&s);
    ledger_close(&memory);
}

/* Which steps take it: of up to KVT_SELECT_TOKENS tokens, over the border of an open block 0. */
static void steps_that_take_memory(void **state)
{
    static const struct {
        size_t length, step, kept;
    } cases[] = {{0, 64, 0},  {0, 65, 0},   {1, 63, 0},  {1, 64, 1},  {63, 1, 0},
                 {63, 2, 1},  {63, 64, 63}, {63, 65, 0}, {64, 64, 0}, {20, 64, 20},
                 {20, 65, 0}, {100, 64, 0}, {20, 44, 0}, {20, 45, 1}};
    rng r = {37};
    subject s;
    ledger memory;
    kvt_seq *seq;
    (void)state;
    open_bordered(&s, &memory, &r);
    seq = seq_of(&s);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t held;
        expect_ok(s.cache, kvt_seq_clear(seq));
        if (cases[i].length)
            grow(&s, seq, cases[i].length);
        expect_ok(s.cache, kvt_seq_begin(seq, cases[i].step, NULL));
        held = kvt_seq_memory_bytes(seq);
        append_layers(&s, seq, 300);
        expect_ok(s.cache, kvt_seq_commit(seq, NULL)); /* seals nothing: at most 128 tokens */
        if (cases[i].length + cases[i].step < 128 &&
            held - kvt_seq_memory_bytes(seq) != border_bytes(cases[i].kept))
            fail_msg("%zu + %zu tokens", cases[i].length, cases[i].step);
    }
    grow(&s, seq, 200);
    expect_ok(s.cache, kvt_seq_truncate(seq, 20)); /* block 0 is sealed: its offset stays */
    expect_ok(s.cache, kvt_seq_begin(seq, 60, NULL));
    {
        uint64_t held = kvt_seq_memory_bytes(seq);
        append_layers(&s, seq, 300);
        expect_ok(s.cache, kvt_seq_commit(seq, NULL));
        assert_true(kvt_seq_memory_bytes(seq) == held);
    }
    kvt_seq_destroy(seq);
    close_subject(&s);
    ledger_close(&memory);
}

static void failing_allocations_change_nothing(void **state)
{
    rng r = {38};
    subject s;
    ledger memory;
    (void)state;
    open_bordered(&s, &memory, &r);
    for (size_t n = 20; n < 64; n += 14) {
        kvt_seq *seq = seq_of(&s), *plain = seq_of(&s);
        long failed = 0;
        selection c, all = {.pending = 64, .n = 64};
        grow(&s, seq, n);
        grow(&s, plain, n);
        c = random_selection(plain, 64, 0, &r);
        for (long fail = 0;; fail++) {
            size_t live = live_trimmed(&s);
            kvt_status status;
            memory.countdown = fail;
            status = kvt_seq_begin(seq, c.pending, c.positions);
            memory.countdown = -1;
            if (status == KVT_OK)
                break;
            failed++;
            assert_true(status == KVT_ERR_MEMORY && live_trimmed(&s) == live);
            assert_true(kvt_seq_pending(seq) == 0);
            expect_equal(&s, seq, plain, "a begin that failed", n);
        }
        assert_true(failed == 4); /* keys, positions, an open block a group */
        for (size_t i = 0; i < 64; i++)
            all.indices[i] = i;
        append_chosen(&s, seq, 300, &all);
        memory.countdown = 0; /* no allocation from here on */
        expect_ok(s.cache, select_of(seq, 300, &c));
        memory.countdown = -1;
        step_chosen(&s, plain, 300, &c);
        expect_equal(&s, seq, plain, "a begin after some that failed", n);
        kvt_seq_destroy(seq);
        kvt_seq_destroy(plain);
    }
    close_subject(&s);
    ledger_close(&memory);
}

/* With the budget of what a sequence keeps, a step over the border is not refused for its keys. */
static void keys_are_not_held_against_the_budget(void **state)
{
    rng r = {39};
    kvt_group_config g = group_of(2, 2, 2, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_seq *seq;
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    expect_ok(NULL, kvt_memory_forecast(&s.config, 1, 104, &s.budget));
    kvt_cache_destroy(s.cache);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    grow(&s, seq, 40);
    expect_ok(s.cache, kvt_seq_begin(seq, 64, NULL));
    assert_true(kvt_cache_memory_bytes(s.cache) > s.budget);
    append_layers(&s, seq, 300);
    expect_ok(s.cache, kvt_seq_commit(seq, NULL));
    assert_true(kvt_cache_memory_bytes(s.cache) == s.budget);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* A loop of drafts within a reserve allocates nothing, cleared and again. */
static void a_reserve_covers_the_keys(void **state)
{
    rng r = {40};
    (void)state;
    for (int round = 0; round < (is_quick() ? 4 : 40); round++) {
        size_t calls, before;
        subject s;
        ledger memory;
        pair p;
        open_bordered(&s, &memory, &r);
        p = (pair){&s, seq_of(&s), seq_of(&s), 1, (uint64_t)round};
        both_step(&p, 0, rng_below(&r, 64));
        if (round % 2) /* one to which no step needs keys */
            expect_ok(s.cache, kvt_seq_reserve(p.tree, 64));
        before = live_trimmed(&s);
        for (long fail = 0;; fail++) {
            kvt_status status;
            memory.countdown = fail;
            status = kvt_seq_reserve(p.tree, MOST);
            memory.countdown = -1;
            if (status == KVT_OK)
                break;
            assert_true(status == KVT_ERR_MEMORY && live_trimmed(&s) == before);
        }
        for (int again = 0; again < 2; again++) {
            for (int i = 0; i < 8; i++) {
                size_t length = (size_t)kvt_seq_length(p.tree);
                selection c = random_selection(p.plain, 1 + rng_below(&r, 64), length == 0, &r);
                calls = memory.calls;
                begin_tree(&s, p.tree, 300, &c);
                expect_ok(s.cache, select_of(p.tree, 300, &c));
                assert_true(memory.calls == calls);
                step_chosen(&s, p.plain, 300, &c);
                expect_equal(&s, p.tree, p.plain, "within a reserve", (size_t)round);
            }
            expect_ok(s.cache, kvt_seq_clear(p.tree));
            expect_ok(s.cache, kvt_seq_clear(p.plain));
        }
        kvt_seq_destroy(p.tree);
        kvt_seq_destroy(p.plain);
        close_subject(&s);
        ledger_close(&memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_selection_is_a_step_of_its_own),
        cmocka_unit_test(at_every_border),
        cmocka_unit_test(forks_of_a_pending_step),
        cmocka_unit_test(tasks_on_threads),
        cmocka_unit_test(errors_leave_the_step_pending),
        cmocka_unit_test(long_steps),
        cmocka_unit_test(keys_beyond_their_type),
        cmocka_unit_test(memory_goes_with_the_step),
        cmocka_unit_test(steps_that_take_memory),
        cmocka_unit_test(failing_allocations_change_nothing),
        cmocka_unit_test(keys_are_not_held_against_the_budget),
        cmocka_unit_test(a_reserve_covers_the_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
