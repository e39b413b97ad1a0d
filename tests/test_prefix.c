/*
 * Batches of sequences that share the beginning of their tables: the bits of single calls, whatever
 * the items and the threads; blocks that are read once; tasks of equal work, and never more of it
 * than single calls have. Some of it looks at a plan's own fields, and counts calls of kernels.
 */
#include <stdio.h>

#include "src/attention/attention.h"
#include "support.h"

enum { MOST = 6100, ITEMS = 40, ROWS = 8 /* of an item's queries */ };

/* ---- counted kernels ---- */

static struct {
    size_t blocks, work; /* calls, and rows + 2 of each: as the estimate has it */
    kvt_kernels real;
    pthread_mutex_t lock;
} count = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void add(size_t rows)
{
    pthread_mutex_lock(&count.lock);
    count.blocks++;
    count.work += rows + 2;
    pthread_mutex_unlock(&count.lock);
}

#define COUNTED(name)                                                                              \
    static void name(const float *q, size_t ldq, size_t rows, const void *codes,                   \
                     const uint16_t *scales, size_t n, size_t dims, const void *next, float *s)    \
    {                                                                                              \
        add(rows);                                                                                 \
        count.real.name(q, ldq, rows, codes, scales, n, dims, next, s);                            \
    }
#define COUNTED_PACKED(name)                                                                       \
    static void name(const void *packed, size_t first, size_t rows, const void *codes,             \
                     const uint16_t *scales, size_t n, size_t dims, const void *next, float *s)    \
    {                                                                                              \
        add(rows - first);                                                                         \
        count.real.name(packed, first, rows, codes, scales, n, dims, next, s);                     \
    }
COUNTED(qk_f32)
COUNTED(qk_f16)
COUNTED(qk_i8)
COUNTED_PACKED(qk_i8_near)
COUNTED_PACKED(qk_i8_fast)

static void count_kernels(kvt_cache *cache)
{
    count.real = cache->kernels;
    cache->kernels.qk_f32 = qk_f32;
    cache->kernels.qk_f16 = qk_f16;
    cache->kernels.qk_i8 = qk_i8;
    cache->kernels.qk_i8_near = qk_i8_near;
    cache->kernels.qk_i8_fast = qk_i8_fast;
}

/* ---- a family of sequences ---- */

typedef struct family {
    kvt_group_config g;
    float frequencies[8];
    kvt_cache *cache;
    tokens t;
    kvt_seq *seqs[ITEMS];
    size_t n;
    rng r;
} family;

static void open_family(family *f, const kvt_group_config *g, uint64_t seed, uint32_t n_threads,
                        const char *isa)
{
    memset(f, 0, sizeof *f);
    f->g = *g;
    f->r.state = seed;
    for (size_t i = 0; i < 8; i++)
        f->frequencies[i] = 1.0f / (float)(1 + 3 * i);
    if (g->rope_dims)
        f->g.rope_inverse_frequencies = f->frequencies;
    f->cache = cache_of(&f->g, MOST, n_threads, isa);
    f->t = tokens_make(&f->r, MOST, &f->g);
    count_kernels(f->cache);
}

static void close_family(family *f)
{
    for (size_t i = 0; i < f->n; i++)
        kvt_seq_destroy(f->seqs[i]);
    kvt_cache_destroy(f->cache);
    tokens_free(&f->t);
}

/* n tokens more, from anywhere in the test's. */
static void grow(family *f, kvt_seq *seq, size_t n)
{
    while (n > 0) {
        size_t step = n < 500 ? n : 500;
        append_step(f->cache, seq, &f->g, &f->t, rng_below(&f->r, (uint32_t)(MOST - step + 1)),
                    step);
        n -= step;
    }
}

static kvt_seq *add_new(family *f, size_t n)
{
    kvt_seq *seq = NULL;
    expect_ok(f->cache, kvt_seq_create(f->cache, &seq));
    grow(f, seq, n);
    f->seqs[f->n++] = seq;
    return seq;
}

static kvt_seq *add_fork(family *f, kvt_seq *of, size_t at, size_t own)
{
    kvt_seq *seq = NULL;
    expect_ok(f->cache, kvt_seq_fork(of, at, &seq));
    grow(f, seq, own);
    f->seqs[f->n++] = seq;
    return seq;
}

/* ---- calls ---- */

/* Everything of a call but the items. */
typedef struct call {
    kvt_attend_args args;
    kvt_attend_item items[ITEMS];
    size_t queries;
    float *q, *out, *lse;
    float sinks[32], slopes[32];
    int32_t positions[ITEMS][ROWS];
    uint8_t masks[ITEMS][ROWS * 4];
} call;

static void open_call(call *c, const family *f)
{
    memset(c, 0, sizeof *c);
    c->args = kvt_attend_args_init();
    c->args.items = c->items;
    c->q = malloc(sizeof *c->q * ITEMS * ROWS * f->g.n_q_heads * f->g.k_dim);
    c->out = malloc(sizeof *c->out * ITEMS * ROWS * f->g.n_q_heads * f->g.v_dim);
    c->lse = malloc(sizeof *c->lse * ITEMS * ROWS * f->g.n_q_heads);
}

static void close_call(call *c)
{
    free(c->q), free(c->out), free(c->lse);
}

static void add_item(call *c, const kvt_seq *seq, uint64_t n_queries)
{
    c->items[c->args.n_items++] = (kvt_attend_item){.seq = seq, .n_queries = n_queries};
    c->queries += (size_t)n_queries;
}

static void fill_queries(call *c, family *f)
{
    float *q = rng_normals(&f->r, c->queries * f->g.n_q_heads * f->g.k_dim);
    memcpy(c->q, q, sizeof *q * c->queries * f->g.n_q_heads * f->g.k_dim);
    free(q);
    c->args.q = kvt_tensor_f32(c->q);
    c->args.out = kvt_tensor_f32(c->out);
    c->args.lse = c->lse;
}

/* Options at random. */
static void choose(call *c, family *f)
{
    static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    rng *r = &f->r;
    c->args.flags = modes[rng_below(r, 3)] | (rng_below(r, 2) ? KVT_ATTEND_CAUSAL : 0);
    c->args.softcap = rng_below(r, 3) ? 0 : 5;
    for (size_t h = 0; h < 32; h++) {
        c->sinks[h] = (float)rng_below(r, 5) - 2;
        c->slopes[h] = 0.01f / (float)(h + 1);
    }
    c->args.sink_logits = rng_below(r, 3) ? NULL : c->sinks;
    c->args.alibi_slopes = rng_below(r, 3) ? NULL : c->slopes;
    for (size_t i = 0; i < c->args.n_items; i++) {
        kvt_attend_item *item = &c->items[i];
        if (rng_below(r, 6) == 0) {
            int32_t next = kvt_seq_next_position(item->seq);
            uint32_t back = f->g.window_tokens ? 50 : 200; /* what a window has released */
            back = (uint32_t)next < back ? (uint32_t)next : back;
            item->query_positions = c->positions[i];
            for (size_t j = 0; j < item->n_queries; j++)
                c->positions[i][j] = next - 1 - (int32_t)rng_below(r, back);
        }
        if (rng_below(r, 12) == 0 && kvt_seq_length(item->seq) >= 32) {
            item->mask = c->masks[i];
            item->mask_stride = 4;
            item->mask_tokens = 1 + rng_below(r, 32);
            for (size_t j = 0; j < ROWS * 4; j++)
                c->masks[i][j] = (uint8_t)rng_next(r);
        }
    }
}

static uint64_t hash_of(const call *c, const family *f)
{
    uint64_t h = 7;
    size_t n = c->queries * f->g.n_q_heads;
    const unsigned char *bytes = (const unsigned char *)c->out;
    for (size_t i = 0; i < n * f->g.v_dim * sizeof(float); i++)
        h = (h ^ bytes[i]) * 0x100000001b3u;
    bytes = (const unsigned char *)c->lse;
    for (size_t i = 0; i < n * sizeof(float); i++)
        h = (h ^ bytes[i]) * 0x100000001b3u;
    return h;
}

static void clear(call *c, const family *f)
{
    memset(c->out, 0xff, sizeof *c->out * c->queries * f->g.n_q_heads * f->g.v_dim);
    memset(c->lse, 0xff, sizeof *c->lse * c->queries * f->g.n_q_heads);
}

/* Every item in a call of its own. Returns the work. */
static size_t run_alone(call *c, family *f, uint64_t *hash)
{
    size_t before = count.work, query = 0;
    clear(c, f);
    for (size_t i = 0; i < c->args.n_items; i++) {
        kvt_attend_args args = c->args;
        args.items = c->items + i;
        args.n_items = 1;
        args.q = kvt_tensor_f32(c->q + query * f->g.n_q_heads * f->g.k_dim);
        args.out = kvt_tensor_f32(c->out + query * f->g.n_q_heads * f->g.v_dim);
        args.lse = c->lse + query * f->g.n_q_heads;
        expect_ok(f->cache, kvt_attend(f->cache, &args));
        query += (size_t)c->items[i].n_queries;
    }
    *hash = hash_of(c, f);
    return count.work - before;
}

typedef struct planned {
    size_t shares, units, n_tasks, work, worst; /* of a task */
} planned;

static planned run_plan(call *c, family *f, uint32_t n_threads, uint64_t *hash)
{
    kvt_attend_plan plan;
    planned p = {0};
    unsigned char *scratch;
    size_t bytes, before = count.work;
    c->args.n_threads = n_threads;
    clear(c, f);
    expect_ok(f->cache, kvt_attend_plan_init(&plan, f->cache, &c->args));
    bytes = (plan.scratch_bytes + 63) / 64 * 64;
    scratch = aligned_alloc(64, bytes + 64);
    memset(scratch, 0xff, bytes + 64);
    for (size_t i = 0; i < plan.n_tasks; i++) {
        size_t task = count.work;
        expect_ok(f->cache, kvt_attend_task(&plan, scratch, plan.n_tasks - 1 - i));
        task = count.work - task;
        p.worst = task > p.worst ? task : p.worst;
    }
    expect_ok(f->cache, kvt_attend_finish(&plan, scratch));
    for (size_t i = plan.scratch_bytes; i < bytes + 64; i++)
        assert_int_equal(scratch[i], 0xff);
    free(scratch);
    p.shares = plan.flags_ & KVT_PLAN_SHARES;
    p.units = plan.units_;
    p.n_tasks = plan.n_tasks;
    p.work = count.work - before;
    *hash = hash_of(c, f);
    return p;
}

/* Of a group's work: the largest piece that is not cut, in counted work. */
static size_t piece_of(const family *f)
{
    (void)f;
    return (KVT_RANGE_TOKENS / KVT_TOKENS + 1) * (KVT_ROWS_MAX + 2);
}

/* One batch: in one call and by plans for 1 to 8 threads. Returns how many of those share. */
static size_t check_call(call *c, family *f, const char *what, int trial)
{
    uint64_t alone, hash;
    size_t most = run_alone(c, f, &alone), before = count.work, shares = 0;
    clear(c, f);
    expect_ok(f->cache, kvt_attend(f->cache, &c->args));
    if (hash_of(c, f) != alone)
        fail_msg("%s %d: one call differs from single calls", what, trial);
    assert_true(count.work - before <= most);
    for (uint32_t threads = 1; threads <= 8; threads++) {
        planned p = run_plan(c, f, threads, &hash);
        if (hash != alone)
            fail_msg("%s %d: a plan for %u threads differs from single calls", what, trial,
                     (unsigned)threads);
        assert_true(p.work <= most);
        shares += p.shares;
    }
    return shares;
}

/* ---- the same bits ---- */

/* f32, f16, i8; i8 with V in K; 4 bits; 4 and 5 bits. */
enum { STORAGES = 6, V_IN_K = 3 };

static kvt_group_config stored_as(int storage, uint32_t q_heads, uint32_t kv_heads)
{
    kvt_type type = storage > V_IN_K    ? KVT_TYPE_I4
                    : storage == V_IN_K ? KVT_TYPE_I8
                                        : (kvt_type)storage;
    kvt_group_config g = group_of(1, q_heads, kv_heads, storage == V_IN_K ? 48 : 24, 16, type,
                                  storage == 5 ? KVT_TYPE_I5 : type);
    g.flags = storage == V_IN_K ? KVT_GROUP_V_IN_K : 0;
    return g;
}

/*
 * Forks, and forks of forks, at their source's length or before it; sequences of their own between
 * them. Some lose tokens or go away.
 */
static void make_family(family *f)
{
    kvt_seq *base = add_new(f, 1024 * (2 + (size_t)rng_below(&f->r, 3)) + rng_below(&f->r, 300));
    for (size_t i = 1; i < 14; i++) {
        size_t at = (size_t)kvt_seq_length(base);
        kvt_seq *seq;
        switch (rng_below(&f->r, 8)) {
        case 0: seq = add_new(f, 1 + rng_below(&f->r, 1500)); break;
        case 1:
            at = (size_t)kvt_seq_reachable(base, rng_below(&f->r, (uint32_t)at + 1));
            /* fall through */
        default: seq = add_fork(f, base, at, at > 4800 ? 1 : rng_below(&f->r, i % 3 ? 90 : 1200));
        }
        if (kvt_seq_length(seq) == 0)
            grow(f, seq, 5);
        if (rng_below(&f->r, 12) == 0 && kvt_seq_length(seq) > 1400) {
            kvt_status status = kvt_seq_remove(seq, (uint64_t)64 * rng_below(&f->r, 20), 64);
            assert_true(status == KVT_OK || status == KVT_ERR_STATE ||
                        status == KVT_ERR_UNSUPPORTED);
        }
        if (rng_below(&f->r, 6) == 0 && kvt_seq_length(seq) > 2048)
            base = seq;
    }
    /* The first one goes: what its forks share stays. */
    kvt_seq_destroy(f->seqs[0]);
    memmove(f->seqs, f->seqs + 1, --f->n * sizeof *f->seqs);
}

static void batches_have_the_bits_of_single_calls(void **state)
{
    static const uint32_t heads[][2] = {{4, 4}, {8, 2}, {2, 1}, {6, 2}, {3, 3}};
    size_t shares = 0, plans = 0;
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int storage = 0; storage < STORAGES; storage++)
            for (int trial = 0; trial < (is_quick() ? 1 : is_full() ? 6 : 3); trial++) {
                int shape = (trial + storage) % 5, kind = trial % 3;
                kvt_group_config g = stored_as(storage, heads[shape][0], heads[shape][1]);
                uint64_t seed = 1000 * (isa + 1) + 10 * (uint64_t)trial + (uint64_t)storage;
                family f;
                if (kind > 0) { /* keys that move, so that tokens can be removed */
                    g.rope_dims = 16;
                    g.rope_pairing = KVT_ROPE_HALVES;
                    g.rope_first_dim = storage == V_IN_K ? 32 : 0; /* not V's */
                }
                if (kind == 2) {
                    g.window_tokens = 1500;
                    g.sink_tokens = 4;
                }
                open_family(&f, &g, seed, 1 + (uint32_t)trial % 2, kvt_isa_name(isa));
                make_family(&f);
                for (int batch = 0; batch < 4; batch++) {
                    size_t n = 2 + rng_below(&f.r, 14);
                    call c;
                    open_call(&c, &f);
                    for (size_t i = 0; i < n; i++) {
                        const kvt_seq *seq =
                            f.seqs[(rng_below(&f.r, 8) ? i : rng_next(&f.r)) % f.n];
                        uint64_t queries = rng_below(&f.r, 4) ? 1 : 1 + rng_below(&f.r, ROWS);
                        add_item(&c, seq, queries < kvt_seq_length(seq) ? queries : 1);
                    }
                    fill_queries(&c, &f);
                    choose(&c, &f);
                    shares += check_call(&c, &f, kvt_isa_name(isa), (int)seed * 10 + batch);
                    plans += 8;
                    close_call(&c);
                }
                close_family(&f);
            }
    printf("%zu of %zu plans share\n", shares, plans);
    assert_true(shares > plans / 16);
}

/* A step of which one layer is there: attention sees it, and the prefix is still shared. */
static void pending_steps(void **state)
{
    kvt_group_config g = stored_as(2, 4, 4);
    family f;
    call c;
    float row[4 * 24] = {1, 2, 3};
    kvt_tensor t = kvt_tensor_f32(row);
    (void)state;
    open_family(&f, &g, 5, 1, NULL);
    add_new(&f, 2048 + 64);
    for (size_t i = 0; i < 4; i++) {
        kvt_seq *seq = add_fork(&f, f.seqs[0], 2048 + 60 + i, i);
        expect_ok(f.cache, kvt_seq_begin(seq, 1, NULL));
        if (i % 2)
            expect_ok(f.cache, kvt_append(seq, 0, &t, &t));
    }
    open_call(&c, &f);
    for (size_t i = 0; i < 5; i++)
        add_item(&c, f.seqs[i], 1);
    fill_queries(&c, &f);
    assert_true(check_call(&c, &f, "pending", 0) >= 3); /* as far as tasks are not too small */
    close_call(&c);
    close_family(&f);
}

/* Lengths around whole ranges: causal queries and masks that leave a part of the last unseen. */
static void ends_of_ranges(void **state)
{
    size_t shares = 0;
    (void)state;
    for (int trial = 0; trial < 24; trial++) {
        kvt_group_config g = stored_as(trial % 3, 2, 2);
        family f;
        call c;
        open_family(&f, &g, 50 + (uint64_t)trial, 1, NULL);
        add_new(&f, 3072);
        for (size_t i = 1; i < 20; i++)
            add_fork(&f, f.seqs[0], 3072 - (trial % 4 ? 0 : rng_below(&f.r, 2)), i % 4);
        open_call(&c, &f);
        for (size_t i = 0; i < f.n; i++)
            add_item(&c, f.seqs[i], 1 + rng_below(&f.r, 3));
        c.args.flags = trial % 3 ? KVT_ATTEND_CAUSAL : 0;
        for (size_t i = 0; i < f.n && trial % 2; i++) {
            kvt_attend_item *item = &c.items[i];
            if (rng_below(&f.r, 4))
                continue;
            item->mask = c.masks[i];
            item->mask_stride = 4;
            item->mask_tokens = 20;
            memset(c.masks[i], trial % 5, sizeof c.masks[i]);
        }
        fill_queries(&c, &f);
        shares += check_call(&c, &f, "ends", trial);
        close_call(&c);
        close_family(&f);
    }
    assert_true(shares >= 16); /* of 192: on few threads, where tasks are not too small */
}

/* ---- what is shared ---- */

/* n forks at `at` of a sequence of that length, and a call of one query of each. */
static void open_forks(family *f, call *c, const kvt_group_config *g, size_t at, size_t n,
                       size_t own)
{
    kvt_seq *root;
    open_family(f, g, 3, 1, NULL);
    root = add_new(f, at);
    for (size_t i = 0; i < n; i++)
        add_fork(f, root, at, own);
    open_call(c, f);
    for (size_t i = 0; i < n; i++)
        add_item(c, f->seqs[1 + i], 1);
    fill_queries(c, f);
}

static void codes_are_read_once(void **state)
{
    (void)state;
    for (int mode = 0; mode < 3; mode++)
        for (size_t extra = 0; extra < 200; extra += 70) {
            static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
            const size_t n = 16, at = 3 * 1024 + extra, own = 64;
            kvt_group_config g = stored_as(2, 4, 2);
            uint64_t alone, hash;
            size_t before;
            family f;
            call c;
            open_forks(&f, &c, &g, at, n, own);
            c.args.flags = modes[mode];
            before = count.blocks;
            run_alone(&c, &f, &alone);
            assert_int_equal(count.blocks - before, 2 * n * ((at + own + 63) / 64));
            for (uint32_t threads = 0; threads < 4; threads++) {
                before = count.blocks;
                if (threads)
                    run_plan(&c, &f, threads, &hash);
                else
                    expect_ok(f.cache, kvt_attend(f.cache, &c.args));
                /* 16 items of 2 rows are a unit of 32; a range that is not whole is each one's. */
                assert_int_equal(count.blocks - before,
                                 2 * (3 * 16 + n * ((extra + own + 63) / 64)));
            }
            close_call(&c);
            close_family(&f);
        }
}

/* Units of a plan for a batch of single queries: kv heads times what is not together. */
static size_t units_of(family *f, kvt_seq *const *seqs, size_t n)
{
    uint64_t hash, alone;
    planned p;
    call c;
    open_call(&c, f);
    for (size_t i = 0; i < n; i++)
        add_item(&c, seqs[i], 1);
    fill_queries(&c, f);
    run_alone(&c, f, &alone);
    p = run_plan(&c, f, 1, &hash);
    assert_true(hash == alone);
    close_call(&c);
    return p.units;
}

static void who_is_together(void **state)
{
    kvt_group_config g = stored_as(2, 1, 1);
    kvt_seq *s[ITEMS];
    family f;
    (void)state;
    g.rope_dims = 16;
    g.rope_pairing = KVT_ROPE_HALVES;
    open_family(&f, &g, 4, 1, NULL);
    s[0] = add_new(&f, 2048);
    for (size_t i = 1; i < 36; i++)
        s[i] = add_fork(&f, s[0], 2048, i % 3);
    assert_int_equal(units_of(&f, s, 2), 1);
    assert_int_equal(units_of(&f, s, 32), 1);
    assert_int_equal(units_of(&f, s, 33), 2); /* 32 rows at most */
    assert_int_equal(units_of(&f, s, 36), 2);
    /* One of its own between them. */
    s[20] = add_new(&f, 2048);
    assert_int_equal(units_of(&f, s, 33), 3);
    /* A fork at less than a whole range is none of them; at one range it would cost the others. */
    s[20] = add_fork(&f, s[0], 1023, 1200);
    assert_int_equal(units_of(&f, s, 33), 3);
    s[20] = add_fork(&f, s[0], 1024, 2200);
    assert_int_equal(units_of(&f, s, 33), 3);
    s[2] = s[0];
    s[0] = s[20]; /* less than the others among each other: alone */
    assert_int_equal(units_of(&f, s, 9), 2);
    s[0] = s[2];
    s[1] = s[20];
    assert_int_equal(units_of(&f, s, 2), 2); /* saves less than a sixth */
    close_family(&f);
}

static void moved_keys_are_apart(void **state)
{
    kvt_group_config g = stored_as(2, 1, 1);
    kvt_seq *s[4];
    family f;
    (void)state;
    g.rope_dims = 16;
    g.rope_pairing = KVT_ROPE_HALVES;
    open_family(&f, &g, 4, 1, NULL);
    s[0] = add_new(&f, 3072);
    expect_ok(f.cache, kvt_seq_remove(s[0], 128, 64));
    for (size_t i = 1; i < 4; i++)
        s[i] = add_fork(&f, s[0], (size_t)kvt_seq_length(s[0]), 10);
    assert_int_equal(units_of(&f, s, 4), 1); /* moved before the fork: the same for all */
    for (size_t i = 0; i < 4; i++)
        expect_ok(f.cache, kvt_seq_remove(s[i], 64, 64));
    assert_int_equal(units_of(&f, s, 4), 4); /* moved by each: positions of their own */
    close_family(&f);
}

/* ---- work ---- */

static void tasks_are_even(void **state)
{
    (void)state;
    for (int trial = 0; trial < (is_quick() ? 4 : 24); trial++) {
        static const uint32_t heads[][2] = {{1, 1}, {4, 4}, {8, 2}, {4, 1}};
        kvt_group_config g = stored_as(2, heads[trial % 4][0], heads[trial % 4][1]);
        size_t n = 2 + (size_t)trial % 15, own = trial % 5 ? (size_t)trial * 40 : 3000;
        family f;
        call c;
        open_forks(&f, &c, &g, trial % 5 ? 4096 : 3072, n, own);
        if (trial % 3 == 0)
            add_item(&c, add_new(&f, 5000), 1);
        if (trial % 3 == 0)
            fill_queries(&c, &f);
        for (uint32_t threads = 1; threads <= 8; threads++) {
            uint64_t alone, hash;
            size_t most = run_alone(&c, &f, &alone), mean;
            planned p = run_plan(&c, &f, threads, &hash);
            assert_true(hash == alone);
            mean = p.work / p.n_tasks;
            if (p.worst > mean + mean / 8 + piece_of(&f))
                fail_msg("trial %d, %u threads: %zu tasks of %zu, one has %zu", trial,
                         (unsigned)threads, p.n_tasks, mean, p.worst);
            /* Shared or not, no thread has more to do than its part of single calls. */
            if (p.shares)
                assert_true((p.n_tasks + threads - 1) / threads * mean <= most / threads);
        }
        close_call(&c);
        close_family(&f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(batches_have_the_bits_of_single_calls),
        cmocka_unit_test(pending_steps),
        cmocka_unit_test(ends_of_ranges),
        cmocka_unit_test(codes_are_read_once),
        cmocka_unit_test(who_is_together),
        cmocka_unit_test(moved_keys_are_apart),
        cmocka_unit_test(tasks_are_even),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
