/*
 * Memory, whatever happens: random operations on the sequences of one cache, with failing
 * allocations in between. After each the cache's figure is the allocator's; a budget of what is
 * kept at most never refuses a step; what one gives back another can use; a reserve is held.
 *
 * KVT_TEST_SEED=n runs that seed alone.
 */
#include "snapshot_support.h"

#include <math.h>
#include <stdio.h>

/* 64 k + 5 tokens: with these windows no shorter sequence has more open blocks. */
enum { SEQS = 3, MOST = 64 * 5 + 5, GROUPS = 3, DIMS = 8 };

static const uint32_t windows[GROUPS] = {64, 200, 0};

/* ---- caches and tokens ---- */

typedef struct member {
    kvt_seq *seq; /* NULL: there is none */
    size_t length, pending;
    int32_t ids[MOST];
} member;

typedef struct world {
    kvt_group_config groups[GROUPS];
    kvt_config config;
    kvt_cache *cache;
    ledger memory;
    rng r;
    member members[SEQS];
    bytes file; /* a snapshot of the ids below */
    size_t file_tokens;
    int32_t file_ids[MOST];
    int32_t next_id;
    int is_tight;       /* the budget is what SEQS sequences keep at most */
    uint64_t own, open; /* bytes of the cache without sequences; open blocks of a row's groups */
    size_t failures;    /* of allocations */
} world;

static void config_of(world *w)
{
    w->groups[0] = group_of(1, 1, 1, DIMS, DIMS, KVT_TYPE_I8, KVT_TYPE_I8);
    w->groups[1] = group_of(1, 2, 2, DIMS, DIMS, KVT_TYPE_F32, KVT_TYPE_I8);
    w->groups[2] = group_of(1, 1, 1, DIMS, DIMS, KVT_TYPE_F16, KVT_TYPE_F16);
    for (uint32_t g = 0; g < GROUPS; g++)
        w->groups[g].residual_tokens = windows[g];
    w->config = kvt_config_init();
    w->config.groups = w->groups;
    w->config.n_groups = GROUPS;
    w->config.max_tokens = MOST;
    w->config.allocator = ledger_allocator(&w->memory);
}

/* An open block of group g. */
static uint64_t open_bytes(const world *w, uint32_t g)
{
    kvt_group_config group = w->groups[g];
    kvt_config c = w->config;
    uint64_t empty, one;
    group.residual_tokens = 1000; /* so that a token's block is open */
    c.groups = &group;
    c.n_groups = 1;
    expect_ok(NULL, kvt_memory_forecast(&c, 1, 0, &empty));
    expect_ok(NULL, kvt_memory_forecast(&c, 1, 1, &one));
    return one - empty - 640; /* without positions and ids */
}

/* What a sequence of MOST tokens keeps; its open blocks beside sealed ones, one a group, not. */
static uint64_t least_budget(const world *w, uint64_t n)
{
    uint64_t all;
    expect_ok(NULL, kvt_memory_forecast(&w->config, n, MOST, &all));
    return all - n * (open_bytes(w, 0) + open_bytes(w, 1));
}

static float value_of(int32_t id, size_t layer, size_t i)
{
    return sinf((float)id * 1.7f + (float)i * 0.9f + (float)layer);
}

static uint32_t heads_of(const world *w, uint32_t layer)
{
    return w->groups[layer].n_kv_heads;
}

static void append_layer(world *w, member *m, uint32_t layer)
{
    float rows[MOST * 2 * DIMS];
    size_t row = heads_of(w, layer) * DIMS;
    kvt_tensor x = kvt_tensor_f32(rows);
    for (size_t t = 0; t < m->pending; t++)
        for (size_t i = 0; i < row; i++)
            rows[t * row + i] = value_of(m->ids[m->length + t], layer, i);
    expect_ok(w->cache, kvt_append(m->seq, layer, &x, &x));
}

/* Some tokens are what was fed. */
static void expect_content(world *w, const member *m)
{
    float got[2 * DIMS];
    kvt_tensor out = kvt_tensor_f32(got);
    assert_true(kvt_seq_length(m->seq) == m->length && kvt_seq_pending(m->seq) == m->pending);
    for (int i = 0; m->length && i < 8; i++) {
        size_t t = i < 2 ? (size_t)i * (m->length - 1) : rng_below(&w->r, (uint32_t)m->length);
        uint32_t layer = rng_below(&w->r, GROUPS);
        expect_ok(w->cache, kvt_read(m->seq, layer, (kvt_side)rng_below(&w->r, 2), t, 1, &out));
        for (size_t j = 0; j < heads_of(w, layer) * DIMS; j++)
            if (fabsf(got[j] - value_of(m->ids[t], layer, j)) > 0.1f)
                fail_msg("token %zu of %zu, layer %u: %g instead of %g", t, m->length, layer,
                         (double)got[j], (double)value_of(m->ids[t], layer, j));
    }
}

/* ---- operations ---- */

/* 1: a call of this status has succeeded. Else it failed for want of memory, as it may. */
static int succeeded(world *w, kvt_status status, int may_pass_the_budget)
{
    int was_armed = w->memory.countdown >= 0;
    w->memory.countdown = -1;
    if (status == KVT_OK)
        return 1;
    if (status == KVT_ERR_MEMORY && was_armed)
        w->failures++;
    else if (status != KVT_ERR_BUDGET || !may_pass_the_budget)
        expect(w->cache, KVT_OK, status);
    return 0;
}

static void arm(world *w)
{
    if (rng_below(&w->r, 3) == 0)
        w->memory.countdown = (long)rng_below(&w->r, 12);
}

static void create(world *w, member *m)
{
    arm(w);
    if (succeeded(w, kvt_seq_create(w->cache, &m->seq), 0))
        m->length = m->pending = 0;
    else
        m->seq = NULL;
}

static void begin(world *w, member *m)
{
    size_t left = MOST - m->length, n = 1 + rng_below(&w->r, 3);
    uint64_t before = kvt_seq_memory_bytes(m->seq);
    if (m->pending || !left)
        return;
    if (rng_below(&w->r, 3) == 0)
        n = 1 + rng_below(&w->r, (uint32_t)left);
    else if (rng_below(&w->r, 3) == 0) /* to a border of a block, or one beyond */
        n = 64 - m->length % 64 + rng_below(&w->r, 2);
    n = n < left ? n : left;
    arm(w);
    if (!succeeded(w, kvt_seq_begin(m->seq, n, NULL), 0)) {
        assert_true(kvt_seq_memory_bytes(m->seq) == before);
        return;
    }
    m->pending = n;
    for (size_t i = 0; i < n; i++)
        m->ids[m->length + i] = w->next_id++ % 10000;
}

static void finish(world *w, member *m)
{
    uint32_t layers = GROUPS;
    if (!m->pending)
        return;
    if (rng_below(&w->r, 5) == 0)
        layers = rng_below(&w->r, GROUPS + 1);
    for (uint32_t l = 0; l < layers; l++)
        append_layer(w, m, l);
    if (layers < GROUPS || rng_below(&w->r, 8) == 0) {
        expect_ok(w->cache, kvt_seq_abort(m->seq));
    } else {
        expect_ok(w->cache, kvt_seq_commit(m->seq, m->ids + m->length));
        m->length += m->pending;
    }
    m->pending = 0;
}

static void truncate(world *w, member *m)
{
    size_t back = rng_below(&w->r, 3) ? rng_below(&w->r, 66) : rng_below(&w->r, MOST + 1);
    if (m->pending)
        return;
    m->length -= back < m->length ? back : m->length;
    expect_ok(w->cache, kvt_seq_truncate(m->seq, m->length));
}

static void save(world *w, const member *m)
{
    if (m->pending)
        return;
    bytes_free(&w->file);
    w->file = saved(w->cache, m->seq, KVT_CODEC_RAW);
    w->file_tokens = m->length;
    memcpy(w->file_ids, m->ids, sizeof w->file_ids);
}

static void load(world *w, member *m)
{
    int replaces = m->length > 0;
    uint64_t before;
    if (!w->file.n)
        return;
    if (m->pending || rng_below(&w->r, 2)) {
        expect_ok(w->cache, kvt_seq_clear(m->seq));
        m->length = m->pending = 0;
        replaces = 0;
    }
    before = kvt_seq_memory_bytes(m->seq);
    arm(w);
    if (succeeded(w, load_bytes(m->seq, w->file.data, w->file.n, NULL), replaces)) {
        m->length = w->file_tokens;
        memcpy(m->ids, w->file_ids, sizeof m->ids);
    } else {
        assert_true(kvt_seq_memory_bytes(m->seq) == before);
    }
}

static void reserve(world *w, member *m)
{
    uint64_t before = kvt_seq_memory_bytes(m->seq);
    if (w->is_tight || m->pending)
        return;
    arm(w);
    if (!succeeded(w, kvt_seq_reserve(m->seq, rng_below(&w->r, MOST + 1)), 0))
        assert_true(kvt_seq_memory_bytes(m->seq) == before);
}

/* Nothing is allocated up to the capacity, unless a tight budget takes free blocks meanwhile. */
static void grow_to_capacity(world *w, member *m)
{
    uint64_t capacity = kvt_seq_capacity(m->seq);
    size_t calls = w->memory.calls;
    assert_true(capacity >= m->length + m->pending && capacity <= MOST);
    while (!m->pending && m->length < capacity) {
        expect_ok(w->cache, kvt_seq_begin(m->seq, 1, NULL));
        m->pending = 1;
        m->ids[m->length] = w->next_id++ % 10000;
        for (uint32_t l = 0; l < GROUPS; l++)
            append_layer(w, m, l);
        expect_ok(w->cache, kvt_seq_commit(m->seq, m->ids + m->length));
        m->pending = 0;
        m->length++;
    }
    if (w->memory.calls != calls && !w->is_tight)
        fail_msg("an allocation up to the capacity of %u tokens", (unsigned)capacity);
}

/* What the cache holds is its own part and its sequences. */
static void trim(world *w)
{
    uint64_t sum = w->own, beside = 0;
    expect_ok(w->cache, kvt_cache_trim(w->cache));
    for (size_t i = 0; i < SEQS; i++) {
        const member *m = &w->members[i];
        sum += kvt_seq_memory_bytes(m->seq);
        for (uint32_t g = 0; m->seq && g < 2; g++)
            beside += (m->pending ? windows[g] / 64 + 3 : 1) * open_bytes(w, g);
    }
    if (kvt_cache_memory_bytes(w->cache) != sum)
        fail_msg("%u bytes, but the parts have %u", (unsigned)kvt_cache_memory_bytes(w->cache),
                 (unsigned)sum);
    assert_true(!w->is_tight || sum <= w->config.memory_budget_bytes + beside);
}

static void operate(world *w)
{
    member *m = &w->members[rng_below(&w->r, SEQS)];
    if (!m->seq) {
        create(w, m);
        return;
    }
    switch (rng_below(&w->r, 32)) {
    case 0:
        if (rng_below(&w->r, 2)) {
            kvt_seq_destroy(m->seq);
            m->seq = NULL;
        }
        break;
    case 1:
        if (rng_below(&w->r, 2)) {
            expect_ok(w->cache, kvt_seq_clear(m->seq));
            m->length = m->pending = 0;
        }
        break;
    case 2:
        expect_ok(w->cache, kvt_seq_abort(m->seq));
        m->pending = 0;
        break;
    case 3: trim(w); break;
    case 4: grow_to_capacity(w, m); break;
    case 5: save(w, m); break;
    case 6: load(w, m); break;
    case 7: reserve(w, m); break;
    case 8:
    case 9:
    case 10:
    case 11:
    case 12: truncate(w, m); break;
    case 13:
    case 14:
    case 15: begin(w, m); break; /* and is left pending */
    default:
        begin(w, m);
        finish(w, m);
        break;
    }
    if (m->seq)
        expect_content(w, m);
    if (kvt_cache_memory_bytes(w->cache) != w->memory.live_bytes)
        fail_msg("the cache counts %u bytes, the allocator %u",
                 (unsigned)kvt_cache_memory_bytes(w->cache), (unsigned)w->memory.live_bytes);
}

/* At the end the budget is what it was: as many sequences fit into it, and nothing more. */
static void expect_whole_budget(world *w)
{
    kvt_seq *more = NULL;
    for (size_t i = 0; i < SEQS; i++) {
        kvt_seq_destroy(w->members[i].seq);
        expect_ok(w->cache, kvt_seq_create(w->cache, &w->members[i].seq));
        expect_ok(w->cache, kvt_seq_begin(w->members[i].seq, MOST, NULL));
    }
    expect(w->cache, KVT_ERR_BUDGET, kvt_seq_create(w->cache, &more));
    for (size_t i = 0; i < SEQS; i++)
        kvt_seq_destroy(w->members[i].seq);
    memset(w->members, 0, sizeof w->members);
    expect_ok(w->cache, kvt_cache_trim(w->cache));
    assert_true(w->memory.live_bytes == w->own);
}

static size_t run(uint64_t seed, size_t operations)
{
    static const uint32_t any[] = {64, 200, 0, 1, 2, 66, 128, KVT_RESIDUAL_NONE};
    world w;
    memset(&w, 0, sizeof w);
    w.r.state = seed;
    ledger_init(&w.memory);
    config_of(&w);
    w.is_tight = seed % 2;
    for (uint32_t g = 0; g < 2 && !w.is_tight; g++)
        w.groups[g].residual_tokens = any[(seed / 2 + g * 3) % 8];
    w.config.memory_budget_bytes = w.is_tight ? least_budget(&w, SEQS) : 0;
    expect_ok(NULL, kvt_cache_create(&w.config, &w.cache));
    w.own = kvt_cache_memory_bytes(w.cache);
    for (size_t i = 0; i < operations; i++)
        operate(&w);
    trim(&w);
    if (w.is_tight)
        expect_whole_budget(&w);
    for (size_t i = 0; i < SEQS; i += 2)
        kvt_seq_destroy(w.members[i].seq);
    kvt_cache_destroy(w.cache);
    kvt_seq_destroy(w.members[1].seq);
    bytes_free(&w.file);
    ledger_close(&w.memory);
    return w.failures;
}

static void random_operations(void **state)
{
    const char *given = getenv("KVT_TEST_SEED");
    uint64_t first = given ? strtoull(given, NULL, 10) : 1, n = given ? 1 : is_quick() ? 6 : 60;
    size_t failures = 0;
    (void)state;
    for (uint64_t seed = first; seed < first + n; seed++) {
        printf("seed %u\n", (unsigned)seed);
        failures += run(seed, is_quick() ? 1000 : 3000);
    }
    printf("%zu allocations failed\n", failures);
    assert_true(failures > 0);
}

/* ---- one by one ---- */

static void open_world(world *w, uint64_t budget_bytes)
{
    memset(w, 0, sizeof *w);
    ledger_init(&w->memory);
    config_of(w);
    w->config.memory_budget_bytes = budget_bytes;
    expect_ok(NULL, kvt_cache_create(&w->config, &w->cache));
    w->own = kvt_cache_memory_bytes(w->cache);
}

static void step(world *w, member *m, size_t n)
{
    expect_ok(w->cache, kvt_seq_begin(m->seq, n, NULL));
    m->pending = n;
    for (uint32_t l = 0; l < GROUPS; l++)
        append_layer(w, m, l);
    expect_ok(w->cache, kvt_seq_commit(m->seq, NULL));
    m->length += n;
    m->pending = 0;
}

/*
 * A long step holds open blocks beside sealed ones, beyond the budget. Once it is aborted, or its
 * sequence destroyed, they are free blocks and no more exempt: what comes gives them back.
 */
static void free_blocks_do_not_use_up_the_budget(void **state)
{
    (void)state;
    for (int destroys = 0; destroys < 2; destroys++) {
        world w;
        uint64_t budget;
        member *m = &w.members[0];
        open_world(&w, 0);
        budget = least_budget(&w, 1);
        kvt_cache_destroy(w.cache);
        ledger_close(&w.memory);
        open_world(&w, budget);
        expect_ok(w.cache, kvt_seq_create(w.cache, &m->seq));
        step(&w, m, 130);
        expect_ok(w.cache, kvt_seq_begin(m->seq, MOST - 130, NULL));
        assert_true(kvt_cache_memory_bytes(w.cache) > budget);
        if (destroys) {
            kvt_seq_destroy(m->seq);
            expect_ok(w.cache, kvt_seq_create(w.cache, &m->seq));
            m->length = 0;
        } else {
            expect_ok(w.cache, kvt_seq_abort(m->seq));
        }
        step(&w, m, 1);
        assert_true(kvt_cache_memory_bytes(w.cache) <= budget);
        step(&w, m, MOST - m->length);
        kvt_seq_destroy(m->seq);
        kvt_cache_destroy(w.cache);
        ledger_close(&w.memory);
    }
}

/*
 * What is reserved is held against the budget, open blocks beside sealed ones too: no other
 * sequence can use it meanwhile. The budget is a byte less than the reserve and a row of another.
 */
static void a_reserve_is_held(void **state)
{
    uint64_t budget = 0;
    (void)state;
    for (uint64_t seed = 0; seed <= (is_quick() ? 10 : 100); seed++) {
        world w;
        member *m = &w.members[0], *other = &w.members[1];
        size_t calls;
        open_world(&w, budget);
        w.r.state = seed;
        expect_ok(w.cache, kvt_seq_create(w.cache, &m->seq));
        expect_ok(w.cache, kvt_seq_create(w.cache, &other->seq));
        step(&w, m, 128); /* seals a row */
        expect_ok(w.cache, kvt_seq_reserve(m->seq, MOST));
        if (seed == 0) {
            expect_ok(w.cache, kvt_seq_begin(other->seq, 1, NULL));
            budget = kvt_cache_memory_bytes(w.cache) - 1;
        }
        while (seed && m->length < MOST) {
            size_t left = MOST - m->length, n = 1 + rng_below(&w.r, rng_below(&w.r, 2) ? 3 : 100);
            expect(w.cache, KVT_ERR_BUDGET, kvt_seq_begin(other->seq, 1, NULL));
            calls = w.memory.calls;
            step(&w, m, n < left ? n : left);
            assert_true(w.memory.calls == calls);
            if (rng_below(&w.r, 4) == 0 && m->length > 192) {
                m->length -= rng_below(&w.r, 64);
                expect_ok(w.cache, kvt_seq_truncate(m->seq, m->length));
            }
        }
        kvt_seq_destroy(m->seq);
        kvt_seq_destroy(other->seq);
        kvt_cache_destroy(w.cache);
        ledger_close(&w.memory);
    }
}

/* A reserve where an open block is exempt needs the budget for it, and without takes nothing. */
static void a_reserve_pays_for_what_is_exempt(void **state)
{
    world w;
    uint64_t full = 0, before;
    member *m = &w.members[0];
    (void)state;
    for (uint64_t less = 0; less < 2; less++) {
        for (int round = 0; round < 2; round++) {
            open_world(&w, round ? full - less : 0);
            expect_ok(w.cache, kvt_seq_create(w.cache, &m->seq));
            step(&w, m, MOST);
            before = kvt_cache_memory_bytes(w.cache);
            if (round && less) {
                expect(w.cache, KVT_ERR_BUDGET, kvt_seq_reserve(m->seq, MOST));
                assert_true(kvt_cache_memory_bytes(w.cache) == before);
                expect_ok(w.cache, kvt_seq_truncate(m->seq, MOST - 1));
                step(&w, m, 1);
            } else {
                expect_ok(w.cache, kvt_seq_reserve(m->seq, MOST));
            }
            full = round ? full : kvt_cache_memory_bytes(w.cache);
            kvt_seq_destroy(m->seq);
            kvt_cache_destroy(w.cache);
            ledger_close(&w.memory);
        }
    }
}

/* A reserve takes what the steps need and no more, also where an open block is kept already. */
static void a_reserve_takes_no_more(void **state)
{
    uint64_t forecast, full;
    kvt_seq *fresh = NULL;
    world w;
    member *m = &w.members[0];
    (void)state;
    open_world(&w, 0);
    expect_ok(NULL, kvt_memory_forecast(&w.config, 1, 1, &forecast));
    expect_ok(w.cache, kvt_seq_create(w.cache, &fresh));
    expect_ok(w.cache, kvt_seq_reserve(fresh, 1));
    assert_true(kvt_cache_memory_bytes(w.cache) == forecast);
    expect_ok(w.cache, kvt_seq_reserve(fresh, MOST));
    full = kvt_seq_memory_bytes(fresh);
    expect_ok(w.cache, kvt_seq_create(w.cache, &m->seq));
    step(&w, m, 128);
    expect_ok(w.cache, kvt_seq_reserve(m->seq, MOST));
    assert_true(kvt_seq_memory_bytes(m->seq) == full);
    kvt_seq_destroy(fresh);
    kvt_seq_destroy(m->seq);
    kvt_cache_destroy(w.cache);
    ledger_close(&w.memory);
}

/* What a pending step holds beside is exempt until its commit, and no longer. */
static void a_commit_ends_the_exemption(void **state)
{
    uint64_t budget = 0;
    (void)state;
    for (int round = 0; round < 2; round++) {
        world w;
        member *m = &w.members[0], *other = &w.members[1];
        open_world(&w, budget);
        expect_ok(w.cache, kvt_seq_create(w.cache, &m->seq));
        expect_ok(w.cache, kvt_seq_create(w.cache, &other->seq));
        step(&w, m, 250);
        step(&w, m, MOST - 250); /* has more than one row in both forms */
        if (round == 0) {
            expect_ok(w.cache, kvt_seq_begin(other->seq, 1, NULL));
            budget = kvt_cache_memory_bytes(w.cache) - open_bytes(&w, 0) - open_bytes(&w, 1) - 1;
        } else {
            expect(w.cache, KVT_ERR_BUDGET, kvt_seq_begin(other->seq, 1, NULL));
        }
        kvt_seq_destroy(m->seq);
        kvt_seq_destroy(other->seq);
        kvt_cache_destroy(w.cache);
        ledger_close(&w.memory);
    }
}

/* What a cache of these groups saves of n tokens. */
static bytes saved_of(world *w, size_t n)
{
    member *m = &w->members[0];
    bytes file;
    expect_ok(NULL, kvt_cache_create(&w->config, &w->cache));
    expect_ok(w->cache, kvt_seq_create(w->cache, &m->seq));
    step(w, m, n);
    file = saved(w->cache, m->seq, KVT_CODEC_RAW);
    kvt_seq_destroy(m->seq);
    kvt_cache_destroy(w->cache);
    return file;
}

/* Load it into a cache of these groups, reserve, truncate, and go on to the end. */
static void reserve_after(world *w, const bytes *file, uint64_t to, size_t n)
{
    member *m = &w->members[0];
    size_t calls;
    expect_ok(NULL, kvt_cache_create(&w->config, &w->cache));
    expect_ok(w->cache, kvt_seq_create(w->cache, &m->seq));
    expect_ok(w->cache, load_bytes(m->seq, file->data, file->n, NULL));
    expect_ok(w->cache, kvt_seq_reserve(m->seq, MOST));
    calls = w->memory.calls;
    expect_ok(w->cache, kvt_seq_truncate(m->seq, kvt_seq_reachable(m->seq, to)));
    step(w, m, MOST - (size_t)kvt_seq_length(m->seq));
    if (w->memory.calls != calls)
        fail_msg("an allocation after a load of %zu tokens and a truncate to %llu", n,
                 (unsigned long long)to);
    kvt_seq_destroy(m->seq);
    kvt_cache_destroy(w->cache);
}

/* A snapshot may hold more open blocks than the window: a reserve counts on them no longer. */
static void a_reserve_after_a_load(void **state)
{
    (void)state;
    for (size_t first = 1; first < MOST; first += 27) {
        world w;
        bytes file;
        open_world(&w, 0);
        kvt_cache_destroy(w.cache);
        for (uint32_t g = 0; g < GROUPS; g++)
            w.groups[g].residual_tokens = 1000;
        file = saved_of(&w, first);
        for (uint32_t g = 0; g < GROUPS; g++)
            w.groups[g].residual_tokens = windows[g];
        reserve_after(&w, &file, first, first);
        bytes_free(&file);
        ledger_close(&w.memory);
    }
}

/* A snapshot may have finer blocks than the cache gives these rows, or coarser ones. */
static void a_reserve_after_a_load_of_other_forms(void **state)
{
    static const uint32_t fines[] = {KVT_FINE_NONE, 64, 256};
    (void)state;
    for (size_t i = 0; i < 9; i++)
        for (size_t n = 70; n < MOST; n += 90)
            for (uint64_t to = 0; to < n; to += 50) {
                world w;
                bytes file;
                open_world(&w, 0);
                kvt_cache_destroy(w.cache);
                for (uint32_t g = 0; g < GROUPS; g++) {
                    w.groups[g].k_type = g ? KVT_TYPE_I4 : KVT_TYPE_I8;
                    w.groups[g].v_type = g ? KVT_TYPE_F16 : KVT_TYPE_I5;
                    w.groups[g].residual_tokens = g ? 100 : KVT_RESIDUAL_NONE;
                    w.groups[g].fine_tokens = fines[i % 3];
                }
                file = saved_of(&w, n);
                for (uint32_t g = 0; g < GROUPS; g++) {
                    w.groups[g].residual_tokens = KVT_RESIDUAL_NONE;
                    w.groups[g].fine_tokens = fines[i / 3];
                }
                reserve_after(&w, &file, to, n);
                bytes_free(&file);
                ledger_close(&w.memory);
            }
}

static uint64_t free_blocks(const kvt_cache *cache)
{
    kvt_cache_stats stats;
    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    expect_ok(cache, kvt_cache_get_stats(cache, &stats));
    return stats.blocks_free;
}

/* A load uses what the sequence has reserved, and what it replaces is reserved then: none adds to
   it, whether it succeeds or fails, and the sequence goes on to the end without an allocation. */
static void a_reserve_serves_loads(void **state)
{
    (void)state;
    for (size_t n = 1; n < MOST; n += 36)
        for (int way = 0; way < 4; way++) {
            world w;
            member *m = &w.members[0];
            uint64_t reserved;
            size_t calls;
            bytes file, damaged;
            open_world(&w, 0);
            kvt_cache_destroy(w.cache);
            file = saved_of(&w, n);
            damaged = saved_of(&w, n);
            damaged.data[damaged.n - 60] ^= 1; /* the snapshot's id: all blocks are there */
            expect_ok(NULL, kvt_cache_create(&w.config, &w.cache));
            expect_ok(w.cache, kvt_seq_create(w.cache, &m->seq));
            m->length = 0;
            step(&w, m, 70);
            expect_ok(w.cache, kvt_seq_reserve(m->seq, MOST));
            reserved = kvt_cache_memory_bytes(w.cache);
            assert_true(free_blocks(w.cache) == 0);
            for (int i = 0; i < 5; i++) {
                if (way & 1)
                    expect_ok(w.cache, kvt_seq_clear(m->seq));
                if (way & 2)
                    expect(w.cache, KVT_ERR_CORRUPT,
                           load_bytes(m->seq, damaged.data, damaged.n, NULL));
                assert_true(!(way & 1) || free_blocks(w.cache) == 0);
                expect_ok(w.cache, load_bytes(m->seq, file.data, file.n, NULL));
                assert_true(!(way & 1) || free_blocks(w.cache) == 0);
                expect_ok(w.cache, kvt_cache_trim(w.cache));
                if (kvt_cache_memory_bytes(w.cache) != reserved)
                    fail_msg("%zu tokens, way %d, load %d: %llu bytes, not %llu", n, way, i,
                             (unsigned long long)kvt_cache_memory_bytes(w.cache),
                             (unsigned long long)reserved);
            }
            calls = w.memory.calls;
            m->length = n;
            step(&w, m, MOST - n);
            assert_true(w.memory.calls == calls);
            kvt_seq_destroy(m->seq);
            kvt_cache_destroy(w.cache);
            bytes_free(&file);
            bytes_free(&damaged);
            ledger_close(&w.memory);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_operations),
        cmocka_unit_test(free_blocks_do_not_use_up_the_budget),
        cmocka_unit_test(a_reserve_is_held),
        cmocka_unit_test(a_reserve_pays_for_what_is_exempt),
        cmocka_unit_test(a_reserve_takes_no_more),
        cmocka_unit_test(a_commit_ends_the_exemption),
        cmocka_unit_test(a_reserve_after_a_load),
        cmocka_unit_test(a_reserve_after_a_load_of_other_forms),
        cmocka_unit_test(a_reserve_serves_loads),
    };
    return cmocka_run_group_tests_name("accounting", tests, NULL, NULL);
}
