/*
 * Memory: the forecast is exact to the byte, the budget is a bound, every free has the size of its
 * allocation, no leak whichever allocation fails, and no allocation where the header rules it out.
 */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <unistd.h>

/* ---- calls of malloc, where the C library allows interposition ---- */

static volatile size_t malloc_calls;

/* Interposed allocator of the C library. Valgrind replaces these functions, too. */
#if defined(__GLIBC__) && !defined(HAS_SANITIZER)
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t bytes);
void *__libc_realloc(void *memory, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);

void *malloc(size_t bytes)
{
    __atomic_fetch_add(&malloc_calls, 1, __ATOMIC_RELAXED);
    return __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    __atomic_fetch_add(&malloc_calls, 1, __ATOMIC_RELAXED);
    return __libc_calloc(n, bytes);
}

void *realloc(void *memory, size_t bytes)
{
    __atomic_fetch_add(&malloc_calls, 1, __ATOMIC_RELAXED);
    return __libc_realloc(memory, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    __atomic_fetch_add(&malloc_calls, 1, __ATOMIC_RELAXED);
    return __libc_memalign(alignment, bytes);
}

int posix_memalign(void **memory, size_t alignment, size_t bytes)
{
    __atomic_fetch_add(&malloc_calls, 1, __ATOMIC_RELAXED);
    *memory = __libc_memalign(alignment, bytes);
    return *memory ? 0 : 12; /* ENOMEM */
}
#endif

/* ---- configurations at random ---- */

static void run_inline(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    (void)user;
    for (size_t i = 0; i < n; i++)
        task(arg, i);
}

typedef struct shape {
    kvt_group_config groups[3];
    kvt_config config;
    ledger memory;
} shape;

static void random_shape(shape *s, rng *r)
{
    static const uint32_t dims[] = {8, 16, 24, 48, 64, 80, 128, 200, 576};
    static const uint32_t heads[][2] = {{1, 1}, {4, 2}, {8, 1}, {3, 3}, {40, 1}};
    static const uint64_t limits[] = {1, 63, 64, 65, 200, 1023, 1024, 1025, 4096, 100000};
    memset(s, 0, sizeof *s);
    ledger_init(&s->memory);
    s->config = kvt_config_init();
    s->config.groups = s->groups;
    s->config.n_groups = 1 + rng_below(r, 3);
    for (uint32_t g = 0; g < s->config.n_groups; g++) {
        const uint32_t *h = heads[rng_below(r, 5)];
        s->groups[g] =
            group_of(1 + rng_below(r, 5), h[0], h[1], dims[rng_below(r, 9)], dims[rng_below(r, 9)],
                     (kvt_type)rng_below(r, 4), (kvt_type)rng_below(r, 5));
        s->groups[g].flags = rng_below(r, 4) | (rng_below(r, 2) ? KVT_GROUP_NO_V_ROTATION : 0);
        if (s->groups[g].k_type == KVT_TYPE_I4)
            s->groups[g].flags &= ~(uint32_t)KVT_GROUP_NO_OFFSET;
        s->groups[g].fine_tokens =
            (const uint32_t[]){0, 0, KVT_FINE_NONE, 1, 65, 192}[rng_below(r, 6)];
        s->groups[g].residual_tokens =
            (const uint32_t[]){0, 0, KVT_RESIDUAL_NONE, 1, 63, 200}[rng_below(r, 6)];
        if (rng_below(r, 4) == 0 && s->groups[g].k_type <= KVT_TYPE_I8) {
            s->groups[g].flags |= KVT_GROUP_V_IN_K;
            s->groups[g].v_type = s->groups[g].k_type;
            s->groups[g].v_dim = s->groups[g].k_dim == 576 ? 512 : s->groups[g].k_dim;
        }
    }
    s->config.max_tokens = limits[rng_below(r, 10)];
    s->config.allocator = ledger_allocator(&s->memory);
    if (rng_below(r, 2)) {
        static const uint32_t threads[] = {0, 1, 2, 7, 64, 256};
        s->config.executor.run = run_inline;
        s->config.executor.n_threads = threads[rng_below(r, 6)];
        s->config.n_threads = threads[rng_below(r, 6)];
    }
}

static uint64_t random_length(rng *r, uint64_t max)
{
    static const uint64_t lengths[] = {0, 1, 15, 16, 17, 63, 64, 65, 128, 300};
    uint64_t n = rng_below(r, 3) ? lengths[rng_below(r, 10)] : max;
    n = n < max ? n : max;
    return n < 1500 ? n : 1500;
}

/* n sequences, each with n_tokens tokens begun. Returns the first status that is not KVT_OK. */
static kvt_status fill(kvt_cache *cache, kvt_seq **seqs, size_t n, uint64_t n_tokens)
{
    for (size_t i = 0; i < n; i++) {
        kvt_status status = kvt_seq_create(cache, &seqs[i]);
        if (status == KVT_OK && n_tokens)
            status = kvt_seq_begin(seqs[i], n_tokens, NULL);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

/*
 * Bytes of open blocks that are held beside their sealed form, of a sequence whose tokens came in
 * one step: they are not held against the budget.
 */
static uint64_t paired_bytes(const shape *s, uint64_t n_tokens)
{
    uint64_t sum = 0;
    for (uint32_t g = 0; g < s->config.n_groups; g++) {
        kvt_config c = s->config;
        kvt_group_config group = s->groups[g];
        uint64_t empty, one, w = group.residual_tokens, pairs;
        if (group.k_type < KVT_TYPE_I8 && group.v_type < KVT_TYPE_I8)
            continue;
        w = w == 0 ? 64 : w == KVT_RESIDUAL_NONE ? 0 : w;
        pairs = (n_tokens > w ? (n_tokens - w) / 64 : 0) -
                (n_tokens > w + 64 ? (n_tokens - w - 64) / 64 : 0);
        c.groups = &group;
        c.n_groups = 1;
        group.residual_tokens = 1000; /* so that a token's block is open */
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 0, &empty));
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 1, &one));
        sum += pairs * (one - empty - 640); /* without positions and ids */
    }
    return sum;
}

static void the_forecast_is_exact(void **state)
{
    const size_t rounds = is_quick() ? 25 : 400;
    rng r = {2024};
    (void)state;
    for (size_t round = 0; round < rounds; round++) {
        shape s;
        size_t n = rng_below(&r, 5);
        kvt_seq *seqs[5] = {NULL};
        kvt_cache *cache = NULL;
        uint64_t forecast = 0, n_tokens, sum = 0;
        kvt_status status;

        random_shape(&s, &r);
        n_tokens = random_length(&r, s.config.max_tokens);
        expect_ok(NULL, kvt_memory_forecast(&s.config, n, n_tokens, &forecast));
        assert_true(s.memory.calls == 0);
        expect_ok(NULL, kvt_cache_create(&s.config, &cache));
        expect_ok(cache, fill(cache, seqs, n, n_tokens));
        if (kvt_cache_memory_bytes(cache) != forecast || s.memory.live_bytes != forecast)
            fail_msg("round %zu: forecast %llu, kvt_cache_memory_bytes %llu, the allocator %zu",
                     round, (unsigned long long)forecast,
                     (unsigned long long)kvt_cache_memory_bytes(cache), s.memory.live_bytes);
        for (size_t i = 0; i < n; i++)
            sum += kvt_seq_memory_bytes(seqs[i]);
        for (size_t i = 0; i < n; i++)
            kvt_seq_destroy(seqs[i]);
        /* A cache is its sequences and its own part. */
        expect_ok(cache, kvt_cache_trim(cache));
        assert_true(kvt_cache_memory_bytes(cache) + sum == forecast);
        kvt_cache_destroy(cache);
        assert_true(s.memory.live_bytes == 0);

        /* As a budget it suffices; less what is paired it does, and a byte less does not. */
        s.config.memory_budget_bytes = forecast;
        memset(seqs, 0, sizeof seqs);
        expect_ok(NULL, kvt_cache_create(&s.config, &cache));
        expect_ok(cache, fill(cache, seqs, n, n_tokens));
        for (size_t i = 0; i < n; i++)
            kvt_seq_destroy(seqs[i]);
        kvt_cache_destroy(cache);
        forecast -= n * paired_bytes(&s, n_tokens);
        s.config.memory_budget_bytes = forecast;
        memset(seqs, 0, sizeof seqs);
        expect_ok(NULL, kvt_cache_create(&s.config, &cache));
        expect_ok(cache, fill(cache, seqs, n, n_tokens));
        for (size_t i = 0; i < n; i++)
            kvt_seq_destroy(seqs[i]);
        kvt_cache_destroy(cache);
        s.config.memory_budget_bytes = forecast - 1;
        memset(seqs, 0, sizeof seqs);
        cache = NULL;
        status = kvt_cache_create(&s.config, &cache);
        if (status == KVT_OK)
            status = fill(cache, seqs, n, n_tokens);
        expect(cache, KVT_ERR_BUDGET, status);
        if (cache)
            expect_error_text(cache, "budget", "a byte less");
        assert_true(s.memory.live_bytes <= forecast - 1 + n * paired_bytes(&s, n_tokens));
        for (size_t i = 0; i < n; i++)
            kvt_seq_destroy(seqs[i]);
        kvt_cache_destroy(cache);
        ledger_close(&s.memory);
    }
}

/* At rest all but what is exempt is within the budget: also when a sealing has been taken back. */
static void the_budget_holds_at_rest(void **state)
{
    kvt_group_config g = group_of(2, 4, 2, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    rng r = {3};
    tokens t = tokens_make(&r, 128, &g);
    (void)state;
    for (int how = 0; how < 2; how++) {
        kvt_config c = kvt_config_init();
        kvt_cache *cache = NULL;
        kvt_seq *seq = NULL;
        uint64_t hash;
        c.groups = &g;
        c.n_groups = 1;
        c.max_tokens = 1000;
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 127, &c.memory_budget_bytes));
        expect_ok(NULL, kvt_cache_create(&c, &cache));
        expect_ok(cache, kvt_seq_create(cache, &seq));
        append_step(cache, seq, &g, &t, 0, 127);
        hash = seq_hash(seq, &g);
        for (int round = 0; round < 3; round++) { /* token 127 seals row 0 */
            if (how == 0) {
                expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
                expect_ok(cache, kvt_seq_abort(seq));
            } else {
                append_step(cache, seq, &g, &t, 127, 1);
                expect_ok(cache, kvt_seq_truncate(seq, 127));
            }
            if (kvt_cache_memory_bytes(cache) > c.memory_budget_bytes)
                fail_msg("%s: %llu bytes of %llu", how ? "truncated" : "aborted",
                         (unsigned long long)kvt_cache_memory_bytes(cache),
                         (unsigned long long)c.memory_budget_bytes);
            assert_true(seq_hash(seq, &g) == hash);
        }
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    tokens_free(&t);
}

/* A call beyond the budget fails and changes nothing; calls within it still succeed. */
static void the_budget_is_kept(void **state)
{
    kvt_group_config g = group_of(2, 4, 2, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_config c = kvt_config_init();
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL, *more = NULL;
    ledger memory;
    uint64_t budget, hash, before;
    rng r = {3};
    tokens t = tokens_make(&r, 400, &g);
    (void)state;
    ledger_init(&memory);
    c.groups = &g;
    c.n_groups = 1;
    c.max_tokens = 1000;
    c.allocator = ledger_allocator(&memory);
    /* What 300 tokens take, of which no block is both open and sealed. */
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    append_all(cache, seq, &g, &t, 0, 256, 64);
    append_step(cache, seq, &g, &t, 256, 44);
    budget = kvt_cache_memory_bytes(cache);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);

    c.memory_budget_bytes = budget;
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    append_all(cache, seq, &g, &t, 0, 256, 64);
    append_step(cache, seq, &g, &t, 256, 44);
    assert_true(kvt_cache_memory_bytes(cache) == budget);
    hash = seq_hash(seq, &g);
    expect(cache, KVT_ERR_BUDGET, kvt_seq_begin(seq, 21, NULL)); /* opens another block */
    expect_error_text(cache, "budget", "begin");
    expect(cache, KVT_ERR_BUDGET, kvt_seq_create(cache, &more));
    expect_error_text(cache, "sequence", "create");
    assert_null(more);
    assert_true(kvt_seq_pending(seq) == 0 && kvt_cache_memory_bytes(cache) == budget);
    assert_true(seq_hash(seq, &g) == hash);
    append_step(cache, seq, &g, &t, 300, 19);
    assert_true(kvt_seq_length(seq) == 319 && memory.live_bytes == budget);

    /* Freed memory can be used again. */
    expect_ok(cache, kvt_seq_truncate(seq, 200));
    before = kvt_cache_memory_bytes(cache);
    assert_true(before == budget);
    expect_ok(cache, kvt_cache_trim(cache));
    assert_true(kvt_cache_memory_bytes(cache) < budget);
    expect_ok(cache, kvt_seq_create(cache, &more));
    kvt_seq_destroy(more);
    append_step(cache, seq, &g, &t, 200, 120);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    tokens_free(&t);
    ledger_close(&memory);
}

/* A begin that fails reserves nothing: neither memory nor capacity. */
static void a_failed_begin_gives_back_what_it_took(void **state)
{
    (void)state;
    for (int by_budget = 0; by_budget < 2; by_budget++)
        for (long left = 0; left < 6; left++) { /* of the six blocks that three rows need */
            kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_F32, KVT_TYPE_F32);
            kvt_config c = kvt_config_init();
            kvt_cache *cache = NULL;
            kvt_seq *seq = NULL;
            ledger memory;
            uint64_t bytes, capacity, budget;
            ledger_init(&memory);
            c.groups = &g;
            c.n_groups = 1;
            c.max_tokens = 1000;
            c.allocator = ledger_allocator(&memory);
            expect_ok(NULL, kvt_memory_forecast(&c, 1, (uint64_t)(left / 2 + 1) * 64, &budget));
            c.memory_budget_bytes = by_budget ? budget - 1 : 0;
            expect_ok(NULL, kvt_cache_create(&c, &cache));
            expect_ok(cache, kvt_seq_create(cache, &seq));
            bytes = kvt_cache_memory_bytes(cache);
            capacity = kvt_seq_capacity(seq);
            memory.countdown = by_budget ? -1 : left;
            expect(cache, by_budget ? KVT_ERR_BUDGET : KVT_ERR_MEMORY,
                   kvt_seq_begin(seq, 192, NULL));
            if (kvt_cache_memory_bytes(cache) != bytes || kvt_seq_capacity(seq) != capacity ||
                memory.live_bytes != bytes)
                fail_msg("by_budget %d, %ld blocks: a failed begin left memory %llu -> %llu, "
                         "capacity %llu -> %llu",
                         by_budget, left, (unsigned long long)bytes,
                         (unsigned long long)kvt_cache_memory_bytes(cache),
                         (unsigned long long)capacity, (unsigned long long)kvt_seq_capacity(seq));
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
            ledger_close(&memory);
        }
}

/* ---- every allocation fails in turn ---- */

static int count_visits(void *user, const kvt_token_view *token)
{
    (void)token;
    *(size_t *)user += 1;
    return 0;
}

/*
 * A call under an allocator that fails at its countdown. After a failure the status, the text and
 * the state are checked, and the call is repeated with memory.
 */
#define with_failures(call, may_be_text)                                                           \
    do {                                                                                           \
        uint64_t hash_ = seq ? seq_hash(seq, &g) : 0, pending_ = kvt_seq_pending(seq);             \
        kvt_status status_ = call;                                                                 \
        if (status_ != KVT_OK) {                                                                   \
            expect(cache, KVT_ERR_MEMORY, status_);                                                \
            if (may_be_text)                                                                       \
                expect_error_text(cache, "allocator", #call);                                      \
            assert_true(!seq || (seq_hash(seq, &g) == hash_ && kvt_seq_pending(seq) == pending_)); \
            failures++;                                                                            \
            memory.countdown = -1;                                                                 \
            expect_ok(cache, call);                                                                \
        }                                                                                          \
    } while (0)

static void every_allocation_fails_in_turn(void **state)
{
    size_t total = 0;
    (void)state;
    for (int type = 0; type < 3; type++)
        for (long countdown = 0;; countdown++) {
            kvt_group_config g = group_of(2, 2, 1, 16, 8, (kvt_type)type, (kvt_type)type);
            kvt_group_config groups[2] = {g, g};
            kvt_config c = kvt_config_init();
            kvt_cache *cache = NULL;
            kvt_seq *seq = NULL, *second = NULL, *clean = NULL;
            char text[100] = "";
            size_t failures = 0, visits = 0, live;
            uint64_t expected, stopped = 0;
            ledger memory;
            rng r = {9};
            tokens t = tokens_make(&r, 300, &g);
            ledger_init(&memory);
            memory.countdown = countdown;
            c.groups = groups;
            c.n_groups = 1;
            c.max_tokens = 400;
            c.n_threads = 3;
            c.executor.run = run_inline;
            c.allocator = ledger_allocator(&memory);
            c.error_text = text;
            c.error_text_bytes = sizeof text;
            if (kvt_cache_create(&c, &cache) != KVT_OK) {
                assert_non_null(strstr(text, "allocator"));
                assert_null(cache);
                assert_int_equal(memory.live, 0);
                failures++;
                memory.countdown = -1;
                expect_ok(NULL, kvt_cache_create(&c, &cache));
            }
            live = memory.live;
            with_failures(kvt_seq_create(cache, &seq), 1);
            assert_true(failures || memory.live > live);
            with_failures(kvt_seq_begin(seq, 70, NULL), 1);
            expect_ok(cache, kvt_seq_abort(seq));
            append_all(cache, seq, &g, &t, 0, 60, 20);
            with_failures(kvt_seq_begin(seq, 200, NULL), 1);
            expect_ok(cache, kvt_seq_abort(seq));
            append_all(cache, seq, &g, &t, 60, 200, 80);
            with_failures(kvt_visit(seq, 1, 5, 100, count_visits, &visits, &stopped), 1);
            assert_true(visits == 100 && stopped == 105);
            with_failures(kvt_seq_create(cache, &second), 1);
            with_failures(kvt_seq_begin(second, 130, NULL), 1);
            total += failures;
            memory.countdown = -1;
            /* And the contents are those of a run without failures. */
            expected = seq_hash(seq, &g);
            expect_ok(cache, kvt_seq_create(cache, &clean));
            append_all(cache, clean, &g, &t, 0, 60, 20);
            append_all(cache, clean, &g, &t, 60, 200, 80);
            assert_true(seq_hash(clean, &g) == expected);
            assert_true(kvt_cache_memory_bytes(cache) == memory.live_bytes);
            kvt_seq_destroy(clean);
            kvt_seq_destroy(second);
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
            ledger_close(&memory);
            tokens_free(&t);
            if (failures == 0)
                break;
            assert_true(failures == 1);
        }
    printf("%zu allocations failed in turn\n", total);
    assert_true(total >= 3 * 15);
}

/* ---- keeping and giving back ---- */

static void clear_keeps_and_trim_gives_back(void **state)
{
    kvt_group_config g[2] = {group_of(2, 2, 2, 24, 16, KVT_TYPE_F16, KVT_TYPE_F16),
                             group_of(1, 2, 1, 8, 8, KVT_TYPE_F32, KVT_TYPE_F16)};
    kvt_config c = kvt_config_init();
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL, *other = NULL;
    ledger memory;
    uint64_t empty, full, own, row;
    size_t calls;
    (void)state;
    ledger_init(&memory);
    c.groups = g;
    c.n_groups = 2;
    c.max_tokens = 500;
    c.allocator = ledger_allocator(&memory);
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    own = kvt_seq_memory_bytes(seq);
    empty = kvt_cache_memory_bytes(cache);
    assert_true(kvt_seq_capacity(seq) == 0);
    expect_ok(cache, kvt_seq_begin(seq, 130, NULL)); /* three blocks of 64 */
    full = kvt_cache_memory_bytes(cache);
    row = (full - empty) / 3;
    assert_true(kvt_seq_memory_bytes(seq) == own + 3 * row);
    assert_true(kvt_seq_capacity(seq) == 192);
    calls = memory.calls;
    expect_ok(cache, kvt_seq_clear(seq));
    assert_true(kvt_cache_memory_bytes(cache) == full && kvt_seq_memory_bytes(seq) == own);
    assert_true(kvt_seq_capacity(seq) == 192);

    /* Free blocks are shared by all sequences; nothing is allocated up to the capacity. */
    expect_ok(cache, kvt_seq_begin(seq, 192, NULL));
    expect_ok(cache, kvt_seq_abort(seq));
    for (uint64_t n = 1; n <= 192; n += 17) {
        expect_ok(cache, kvt_seq_begin(seq, n, NULL));
        assert_true(kvt_seq_capacity(seq) == 192);
        expect_ok(cache, kvt_seq_clear(seq));
    }
    assert_true(memory.calls == calls);
    expect_ok(cache, kvt_seq_create(cache, &other));
    calls = memory.calls;
    assert_true(kvt_seq_capacity(other) == 192);
    expect_ok(cache, kvt_seq_begin(other, 65, NULL));
    assert_true(kvt_seq_capacity(other) == 192 && kvt_seq_capacity(seq) == 64);
    expect_ok(cache, kvt_seq_begin(seq, 64, NULL));
    assert_true(memory.calls == calls);
    assert_true(kvt_seq_capacity(seq) == 64 && kvt_seq_capacity(other) == 128);
    expect_ok(cache, kvt_cache_trim(cache)); /* nothing is free */
    assert_true(kvt_cache_memory_bytes(cache) == full + own);
    expect_ok(cache, kvt_seq_clear(other));
    expect_ok(cache, kvt_cache_trim(cache));
    assert_true(kvt_cache_memory_bytes(cache) == full + own - 2 * row);
    assert_true(kvt_seq_capacity(other) == 0 && kvt_seq_capacity(seq) == 64);
    expect_ok(cache, kvt_seq_abort(seq));
    expect_ok(cache, kvt_cache_trim(cache));
    assert_true(kvt_cache_memory_bytes(cache) == empty + own);

    /* max_tokens bounds the capacity, in the middle of a block. */
    expect_ok(cache, kvt_seq_begin(seq, 500, NULL));
    assert_true(kvt_seq_capacity(seq) == 500);
    kvt_seq_destroy(seq); /* with its step */
    assert_true(kvt_seq_capacity(other) == 500);
    assert_true(kvt_cache_memory_bytes(cache) == memory.live_bytes);
    kvt_seq_destroy(other);
    kvt_cache_destroy(cache);
    ledger_close(&memory);
}

/* A truncate keeps the blocks that its tokens need and no more, at borders of blocks as well. */
static void a_truncate_keeps_what_it_needs(void **state)
{
    static const uint64_t lengths[] = {0, 1, 63, 64, 65, 127, 128, 129, 192, 256, 320, 383, 384};
    (void)state;
    for (int type = 0; type < 3; type++)
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            kvt_group_config g = group_of(1, 2, 1, 8, 8, (kvt_type)type, (kvt_type)type);
            kvt_cache *cache;
            kvt_seq *seq = NULL, *other = NULL;
            uint64_t n = lengths[i], rows = (n + 63) / 64, empty, row, all;
            rng r = {1};
            tokens t = tokens_make(&r, 384, &g);
            g.residual_tokens = 1000; /* i8: all are open */
            cache = cache_of(&g, 384, 1, NULL);
            expect_ok(cache, kvt_seq_create(cache, &seq));
            expect_ok(cache, kvt_seq_create(cache, &other));
            empty = kvt_seq_memory_bytes(seq);
            append_step(cache, seq, &g, &t, 0, 1);
            row = kvt_seq_memory_bytes(seq) - empty;
            append_step(cache, seq, &g, &t, 1, 383);
            all = kvt_cache_memory_bytes(cache);
            expect_ok(cache, kvt_seq_truncate(seq, n));
            assert_int_equal(kvt_seq_memory_bytes(seq), empty + rows * row);
            /* The others are there for another sequence: nothing is allocated for it. */
            if (rows < 6)
                expect_ok(cache, kvt_seq_begin(other, (6 - rows) * 64, NULL));
            assert_true(kvt_cache_memory_bytes(cache) == all);
            kvt_seq_destroy(other);
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
            tokens_free(&t);
        }
}

static void a_cache_outlived_by_its_sequences(void **state)
{
    kvt_group_config g = group_of(2, 2, 1, 32, 32, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_config c = kvt_config_init();
    (void)state;
    for (int order = 0; order < 2; order++) {
        kvt_cache *cache = NULL;
        kvt_seq *seqs[2] = {NULL, NULL};
        ledger memory;
        uint64_t hash;
        rng r = {1};
        tokens t = tokens_make(&r, 200, &g);
        ledger_init(&memory);
        c.groups = &g;
        c.n_groups = 1;
        c.max_tokens = 200;
        c.allocator = ledger_allocator(&memory);
        expect_ok(NULL, kvt_cache_create(&c, &cache));
        for (int i = 0; i < 2; i++) {
            expect_ok(cache, kvt_seq_create(cache, &seqs[i]));
            append_all(cache, seqs[i], &g, &t, 0, 100, 50);
        }
        hash = seq_hash(seqs[0], &g);
        kvt_cache_destroy(cache);
        assert_true(memory.live > 0);
        for (int i = 0; i < 2; i++) { /* still usable */
            assert_true(seq_hash(seqs[i], &g) == hash);
            append_all(NULL, seqs[i], &g, &t, 100, 20, 10); /* too few to seal a block */
            expect_ok(NULL, kvt_seq_truncate(seqs[i], 100));
            assert_true(seq_hash(seqs[i], &g) == hash);
        }
        kvt_seq_destroy(seqs[order]);
        assert_true(memory.live > 0);
        assert_true(seq_hash(seqs[!order], &g) == hash);
        kvt_seq_destroy(seqs[!order]);
        ledger_close(&memory);
        tokens_free(&t);
    }
}

/* ---- the figures ---- */

/* Bits of an element of K and of V of 128 dims, by type: codes, scales, gains and offsets. */
static const double k_bits[] = {32, 16, 8.375, 4.5625}, v_bits[] = {32, 16, 8.125, 4.125, 5.125};

/*
 * Bits an element that n tokens take, 8 kv heads, dim 128, all bytes counted: as forecast, and
 * (but for the largest caches) as it is after one step, after steps of 100 tokens, and token by
 * token.
 */
static double bits_of(kvt_type k_type, kvt_type v_type, size_t n, uint32_t layers, uint32_t threads)
{
    static const size_t steps[] = {0, 100, 1};
    kvt_group_config g = group_of(layers, 32, 8, 128, 128, k_type, v_type);
    kvt_config c = kvt_config_init();
    const double elements = (double)n * 2 * 8 * 128 * layers;
    const double expected = (k_bits[k_type] + v_bits[v_type]) / 2;
    uint64_t forecast = 0;
    double bits;
    c.groups = &g;
    c.n_groups = 1;
    c.max_tokens = n;
    c.n_threads = threads;
    c.executor.run = run_inline;
    expect_ok(NULL, kvt_memory_forecast(&c, 1, n, &forecast));
    for (size_t i = 0; i < 3 && layers == 1 && n <= 4096; i++) {
        kvt_cache *cache = NULL;
        kvt_seq *seq = NULL;
        rng r = {7};
        tokens t = tokens_make(&r, n, &g);
        ledger memory;
        ledger_init(&memory);
        c.allocator = ledger_allocator(&memory);
        expect_ok(NULL, kvt_cache_create(&c, &cache));
        expect_ok(cache, kvt_seq_create(cache, &seq));
        append_all(cache, seq, &g, &t, 0, n, steps[i] ? steps[i] : n);
        assert_true(memory.live_bytes <= forecast);
        if (i == 0 || n % 64 == 0)
            assert_true(memory.live_bytes == forecast);
        assert_true(fabs(kvt_cache_bytes_per_token(cache) * 8 / (2 * 8 * 128 * layers) - expected) <
                    1e-9);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        ledger_close(&memory);
        tokens_free(&t);
    }
    bits = 8.0 * (double)forecast / elements;
    printf("types %d/%d, %zu tokens, 8 kv heads, dim 128, %u layers, %u threads: %.4f bits an "
           "element (%+.2f%%)\n",
           (int)k_type, (int)v_type, n, layers, threads, bits, (bits / expected - 1) * 100);
    return bits;
}

/* In percent over i8's 8.25 bits. */
static double bits_over(size_t n, uint32_t layers, uint32_t threads)
{
    return (bits_of(KVT_TYPE_I8, KVT_TYPE_I8, n, layers, threads) / 8.25 - 1) * 100;
}

static void i8_bits_per_element(void **state)
{
    (void)state;
    assert_true(bits_over(32768, 1, 1) < 1.5);
    (void)bits_over(32768, 1, 8); /* the scratch of 8 threads: more than this one layer */
    assert_true(bits_over(32768, 4, 8) < 1.5);
    assert_true(bits_over(32768, 32, 8) < 1.5);
    (void)bits_over(is_quick() ? 1088 : 4096, 1, 1);
    assert_true(bits_over(4096, 32, 1) < 6);
    assert_true(bits_over(4096, 32, 8) < 6);
}

static void coarse_bits_per_element(void **state)
{
    static const struct {
        kvt_type k, v;
        double at_32768, at_4096;
        uint64_t sealed, fine, open; /* bytes of a head: codes, scales, gains, offsets */
    } cases[] = {
        {KVT_TYPE_I4, KVT_TYPE_I4, 4.45, 4.85, 4096 + 256 + 64 + 256 + 128 + 4096,
         8192 + 128 + 256 + 128 + 8192, 16384 + 128 + 256 + 128 + 16384},
        {KVT_TYPE_I4, KVT_TYPE_I5, 4.95, 5.35, 4096 + 256 + 64 + 256 + 128 + 5120,
         8192 + 128 + 256 + 128 + 8192, 16384 + 128 + 256 + 128 + 16384},
        {KVT_TYPE_I8, KVT_TYPE_I4, 6.35, 6.75, 8192 + 128 + 256 + 128 + 4096,
         8192 + 128 + 256 + 128 + 8192, 16384 + 128 + 256 + 128 + 16384},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const uint64_t sealed = 64 + 32 * 8 * cases[i].sealed, fine = 64 + 32 * 8 * cases[i].fine,
                       open = 64 + 32 * 8 * cases[i].open, ids = 640;
        kvt_group_config g = group_of(32, 32, 8, 128, 128, cases[i].k, cases[i].v);
        kvt_config c = kvt_config_init();
        uint64_t none, some;
        assert_true(bits_of(cases[i].k, cases[i].v, 32768, 32, 1) <= cases[i].at_32768);
        assert_true(bits_of(cases[i].k, cases[i].v, 32768, 32, 8) <= cases[i].at_32768);
        assert_true(bits_of(cases[i].k, cases[i].v, 4096, 32, 1) <= cases[i].at_4096);
        /* The scratch of 8 threads is about 1 MiB. */
        assert_true(bits_of(cases[i].k, cases[i].v, 4096, 32, 8) <= cases[i].at_4096 + 0.04);
        (void)bits_of(cases[i].k, cases[i].v, is_quick() ? 1088 : 4096, 1, 1);
        c.groups = &g;
        c.n_groups = 1;
        c.max_tokens = 32768;
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 0, &none));
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 64, &some));
        assert_true(some - none == ids + open);
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 128, &some));
        assert_true(some - none == 2 * ids + fine + 2 * open);
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 32768, &some));
        assert_true(some - none == 512 * ids + fine + 510 * sealed + 2 * open);
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 32767, &some)); /* open: 62 tokens more */
        assert_true(some - none == 512 * ids + fine + 509 * sealed + 3 * open);
        g.fine_tokens = 200; /* 4 blocks */
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 32768, &some));
        assert_true(some - none == 512 * ids + 4 * fine + 507 * sealed + 2 * open);
        g.fine_tokens = KVT_FINE_NONE;
        g.residual_tokens = KVT_RESIDUAL_NONE;
        expect_ok(NULL, kvt_memory_forecast(&c, 1, 32768, &some));
        assert_true(some - none == 512 * ids + 512 * sealed + open);
    }
}

/* A huge max_tokens makes a large table for each sequence, not a large cache. */
static void scratch_does_not_follow_max_tokens_without_end(void **state)
{
    (void)state;
    for (uint32_t threads = 1; threads <= 64; threads *= 4) {
        kvt_group_config g = group_of(32, 32, 8, 128, 128, KVT_TYPE_I8, KVT_TYPE_I8);
        kvt_executor executor = {NULL, run_inline, threads};
        kvt_config config = kvt_config_init();
        uint64_t million = 0, most = 0;
        config.groups = &g;
        config.n_groups = 1;
        config.executor = executor;
        config.max_tokens = (uint64_t)1 << 20;
        expect_ok(NULL, kvt_memory_forecast(&config, 0, 0, &million));
        config.max_tokens = KVT_MAX_TOKENS;
        expect_ok(NULL, kvt_memory_forecast(&config, 0, 0, &most));
        assert_true(million == most);
    }
}

/* Codes, scales, gains and 1/64 of an offset, over all layers and heads. */
static void bytes_per_token_by_formula(void **state)
{
    static const double element[] = {4, 2, 1, 0.5, 0.625};
    rng r = {5};
    (void)state;
    for (int round = 0; round < 200; round++) {
        shape s;
        kvt_cache *cache = NULL;
        double expected = 0;
        random_shape(&s, &r);
        for (uint32_t i = 0; i < s.config.n_groups; i++) {
            const kvt_group_config *g = &s.groups[i];
            double head = g->k_dim * element[g->k_type] + 2.0 * (g->k_type == KVT_TYPE_I8);
            if (!(g->flags & KVT_GROUP_V_IN_K))
                head += g->v_dim * element[g->v_type] + 2.0 * (g->v_type >= KVT_TYPE_I8);
            if (g->k_type >= KVT_TYPE_I8 && !(g->flags & KVT_GROUP_NO_OFFSET))
                head += g->k_dim * 2.0 / 64;
            if (g->k_type == KVT_TYPE_I4) /* a scale for each dim, a gain */
                head += g->k_dim * 2.0 / 64 + 1;
            expected += head * g->n_kv_heads * g->n_layers;
        }
        expect_ok(NULL, kvt_cache_create(&s.config, &cache));
        assert_true(fabs(kvt_cache_bytes_per_token(cache) - expected) <= 1e-9 * expected);
        kvt_cache_destroy(cache);
        ledger_close(&s.memory);
    }
}

/* ---- calls that never allocate ---- */

static void quiet_calls(const kvt_config *config, const kvt_group_config *g, ledger *memory,
                        const char *what)
{
    enum { N = 300, Q = 40 };
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    rng r = {6};
    tokens t = tokens_make(&r, N, g);
    float *q = rng_normals(&r, (size_t)Q * g->n_q_heads * g->k_dim);
    float *out = malloc((size_t)Q * g->n_q_heads * g->v_dim * sizeof *out);
    kvt_attend_item item = {.n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_plan plan;
    void *scratch = NULL;
    int32_t ids[N] = {0};
    size_t first = 0, in_ledger, in_malloc;

    assert_non_null(out);
    expect_ok(NULL, kvt_cache_create(config, &cache));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    item.seq = seq;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    for (size_t n = 1; first + n <= N; first += n, n = n * 3) {
        kvt_tensor k = kvt_tensor_f32(t.k + first * g->n_kv_heads * g->k_dim);
        kvt_tensor v = kvt_tensor_f32(t.v + first * g->n_kv_heads * g->v_dim);
        const kvt_tensor *given = g->flags & KVT_GROUP_V_IN_K ? NULL : &v;
        kvt_tensor back = kvt_tensor_f32(out);
        expect_ok(cache, kvt_seq_begin(seq, n, NULL));
        item.n_queries = n < Q ? n : Q;
        args.flags = KVT_ATTEND_CAUSAL;
        in_ledger = memory->calls;
        in_malloc = malloc_calls;
        for (args.layer = 0; args.layer < g->n_layers; args.layer++) {
            expect_ok(cache, kvt_append(seq, args.layer, &k, given));
            expect_ok(cache, kvt_attend(cache, &args));
            expect_ok(cache, kvt_attend_plan_init(&plan, cache, &args));
            expect_ok(cache, kvt_read(seq, args.layer, KVT_SIDE_V, first, 1, &back));
        }
        expect_ok(cache, kvt_seq_commit(seq, ids));
        if (memory->calls != in_ledger || malloc_calls != in_malloc)
            fail_msg("%s: a step of %zu tokens: %zu allocations of the cache, %zu of malloc", what,
                     n, memory->calls - in_ledger, malloc_calls - in_malloc);
        args.layer = 0;
        expect_ok(cache, kvt_attend_plan_init(&plan, cache, &args));
        scratch = aligned_alloc(64, (plan.scratch_bytes + 63) / 64 * 64);
        assert_non_null(scratch);
        in_ledger = memory->calls;
        in_malloc = malloc_calls;
        for (size_t i = 0; i < plan.n_tasks; i++)
            expect_ok(cache, kvt_attend_task(&plan, scratch, i));
        expect_ok(cache, kvt_attend_finish(&plan, scratch));
        assert_true(memory->calls == in_ledger && malloc_calls == in_malloc);
        free(scratch);
    }
    in_ledger = memory->calls;
    in_malloc = malloc_calls;
    expect_ok(cache, kvt_seq_truncate(seq, 70));
    expect(cache, KVT_ERR_ARG, kvt_seq_truncate(seq, 71)); /* nor does a failure */
    expect_ok(cache, kvt_seq_clear(seq));
    assert_true(memory->calls == in_ledger && malloc_calls == in_malloc);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    tokens_free(&t);
    free(q);
    free(out);
}

static void attend_append_and_commit_never_allocate(void **state)
{
    size_t before = malloc_calls;
    void *volatile probe = malloc(10);
    (void)state;
    free(probe);
    if (malloc_calls == before)
        printf("malloc is not ours here: only the cache's allocator is counted\n");
    for (int type = 0; type < 6; type++) /* 3: i8 with V in K; 5: V of 5 bits */
        for (int threads = 1; threads <= 4; threads += 3) {
            kvt_type storage = type < 3 ? (kvt_type)type : type == 3 ? KVT_TYPE_I8 : KVT_TYPE_I4;
            kvt_group_config g =
                group_of(2, 12, 2, 80, 64, storage, type == 5 ? KVT_TYPE_I5 : storage);
            kvt_config c = kvt_config_init();
            ledger memory;
            ledger_init(&memory);
            g.flags = type == 3 ? KVT_GROUP_V_IN_K : 0;
            c.groups = &g;
            c.n_groups = 1;
            c.max_tokens = 3000;
            c.n_threads = (uint32_t)threads;
            c.executor.run = run_inline;
            c.allocator = ledger_allocator(&memory);
            quiet_calls(&c, &g, &memory, threads > 1 ? "an executor" : "inline");
            ledger_close(&memory);
        }
}

/* Without a caller's allocator the C library's is used, with the same counts. */
static void the_c_library_as_allocator(void **state)
{
    kvt_group_config g = group_of(2, 12, 2, 80, 64, KVT_TYPE_I8, KVT_TYPE_F16);
    kvt_cache *cache = cache_of(&g, 500, 1, NULL);
    kvt_seq *seq = NULL;
    kvt_config c = kvt_config_init();
    uint64_t forecast;
    (void)state;
    c.groups = &g;
    c.n_groups = 1;
    c.max_tokens = 500;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_begin(seq, 300, NULL));
    expect_ok(NULL, kvt_memory_forecast(&c, 1, 300, &forecast));
    assert_true(kvt_cache_memory_bytes(cache) == forecast);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* Bytes of memory that are this process's, 0 where that is not known (or a sanitizer keeps them).
 */
static uint64_t resident_bytes(void)
{
    unsigned long pages = 0;
#if defined(__linux__) && !defined(HAS_SANITIZER)
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%*u %lu", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
#endif
    return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Blocks beyond 2 MiB use huge pages: no more memory, zeroed, and unmapped by trim. */
static void blocks_of_megabytes(void **state)
{
    enum { LAYERS = 17, HEADS = 5, TOKENS = 8 * 64 };
    kvt_group_config g = group_of(LAYERS, HEADS, HEADS, 128, 128, KVT_TYPE_F16, KVT_TYPE_F16);
    const uint64_t block = (uint64_t)LAYERS * HEADS * 64 * 2 * 128 * 2, blocks = TOKENS / 64;
    kvt_config c = kvt_config_init();
    kvt_cache *cache = cache_of(&g, TOKENS, 1, NULL);
    kvt_seq *seq = NULL;
    uint64_t empty, full, used, before;
    rng r = {7};
    tokens t = tokens_make(&r, TOKENS, &g);
    float *got = malloc((size_t)TOKENS * HEADS * 128 * sizeof *got);
    kvt_tensor out = kvt_tensor_f32(got);
    (void)state;

    assert_true(block > (2 << 20) && block % (2 << 20) != 0);
    c.groups = &g;
    c.n_groups = 1;
    c.max_tokens = TOKENS;
    expect_ok(NULL, kvt_memory_forecast(&c, 1, 0, &empty));
    expect_ok(NULL, kvt_memory_forecast(&c, 1, TOKENS, &full));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    for (int round = 0; round < 3; round++) {
        before = is_quick() ? 0 : resident_bytes(); /* valgrind and sanitizers have pages too */
        append_all(cache, seq, &g, &t, 0, TOKENS, round == 1 ? 64 : TOKENS);
        assert_true(kvt_cache_memory_bytes(cache) == full);
        used = resident_bytes();
        if (before) /* a block's tail must not occupy a huge page: 1.3 MiB each */
            assert_in_range(used - before, blocks * (block - (1 << 18)),
                            blocks * (block + (1 << 20)));
        expect_ok(cache, kvt_read(seq, LAYERS - 1, KVT_SIDE_V, 0, TOKENS, &out));
        for (size_t i = 0; i < (size_t)TOKENS * HEADS * 128; i += 97)
            assert_true(got[i] - t.v[i] < 4e-3f && t.v[i] - got[i] < 4e-3f);
        expect_ok(cache, kvt_seq_clear(seq));
        assert_true(kvt_cache_memory_bytes(cache) == full);
        expect_ok(cache, kvt_cache_trim(cache));
        assert_true(kvt_cache_memory_bytes(cache) == empty);
        if (before)
            assert_true(resident_bytes() + blocks * block <= used + (1 << 20));
    }
    free(got);
    tokens_free(&t);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

#if defined(__linux__) && !defined(HAS_SANITIZER)
static size_t count_mappings(void)
{
    FILE *f = fopen("/proc/self/maps", "r");
    size_t n = 0;
    for (int c; f && (c = fgetc(f)) != EOF;)
        n += c == '\n';
    if (f)
        fclose(f);
    return n;
}

/* Not every block beyond 2 MiB is a mapping of its own: the system has room for 65530 in all. */
static void mappings_of_many_blocks(void **state)
{
    enum { MOST = 4096, MORE = 64, ROWS = MOST + MORE };
    kvt_group_config g = group_of(16, 8, 8, 128, 128, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_config config = kvt_config_init();
    size_t before = count_mappings();
    uint64_t empty;
    kvt_cache *cache;
    kvt_seq *seq;
    (void)state;

    if (is_quick() || !before)
        skip();
    g.residual_tokens = KVT_RESIDUAL_NONE;
    config.groups = &g;
    config.n_groups = 1;
    config.max_tokens = (uint64_t)ROWS * 64;
    expect_ok(NULL, kvt_cache_create(&config, &cache));
    empty = kvt_cache_memory_bytes(cache);
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_reserve(seq, (uint64_t)ROWS * 64));
    assert_true(kvt_cache_memory_bytes(cache) > (uint64_t)ROWS * (2 << 20));
    assert_in_range(count_mappings() - before, MOST / 2, MOST + MORE / 2);
    kvt_seq_destroy(seq);
    expect_ok(cache, kvt_cache_trim(cache));
    assert_true(kvt_cache_memory_bytes(cache) == empty);
    assert_true(count_mappings() < before + 32);
    kvt_cache_destroy(cache);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_forecast_is_exact),
        cmocka_unit_test(the_budget_is_kept),
        cmocka_unit_test(the_budget_holds_at_rest),
        cmocka_unit_test(a_failed_begin_gives_back_what_it_took),
        cmocka_unit_test(every_allocation_fails_in_turn),
        cmocka_unit_test(clear_keeps_and_trim_gives_back),
        cmocka_unit_test(a_truncate_keeps_what_it_needs),
        cmocka_unit_test(a_cache_outlived_by_its_sequences),
        cmocka_unit_test(i8_bits_per_element),
        cmocka_unit_test(coarse_bits_per_element),
        cmocka_unit_test(scratch_does_not_follow_max_tokens_without_end),
        cmocka_unit_test(bytes_per_token_by_formula),
        cmocka_unit_test(attend_append_and_commit_never_allocate),
        cmocka_unit_test(the_c_library_as_allocator),
        cmocka_unit_test(blocks_of_megabytes),
#if defined(__linux__) && !defined(HAS_SANITIZER)
        cmocka_unit_test(mappings_of_many_blocks),
#endif
    };
    return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}
