/*
 * Sequences that share blocks: a fork is bit for bit what a truncated copy would be, whatever the
 * others do; bytes are counted once; a full open block that is shared is sealed once; and a fork
 * that fails leaves everything as it was.
 */
#include "subject.h"

#include <stdio.h>

/* A subject of two groups, of which one seals. */
static void open_two(subject *s, rng *r, uint32_t residual)
{
    kvt_group_config g[2];
    g[0] = group_of(2, 4, 2, 24, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    g[1] = group_of(1, 2, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F32);
    g[0].residual_tokens = residual;
    open_subject(s, g, 2, r);
}

static kvt_seq *fork_of(const subject *s, kvt_seq *seq, size_t n)
{
    kvt_seq *copy = NULL;
    expect_ok(s->cache, kvt_seq_fork(seq, n, &copy));
    assert_true(kvt_seq_length(copy) == n);
    assert_true(kvt_seq_pending(copy) == 0);
    return copy;
}

/* Tokens first .. first + n - 1 of the test's in steps of 1 to 40. */
static void grow_other(const subject *s, kvt_seq *seq, size_t first, size_t n, rng *r)
{
    while (n > 0) {
        size_t step = 1 + rng_below(r, 40);
        step = step < n ? step : n;
        step_of(s, seq, first, step);
        first += step;
        n -= step;
    }
}

/* ---- what a fork is ---- */

/*
 * For a length of the source and one of the fork: the fork equals another sequence that has had the
 * same steps and was truncated; then source, fork and both their doubles go on with tokens of their
 * own, in turns.
 */
static void check_fork(const subject *s, size_t n, size_t at, rng *r)
{
    kvt_seq *source = seq_of(s), *source2 = seq_of(s), *copy, *copy2 = seq_of(s);
    kvt_seq *seqs[3] = {source, source2, copy2};
    rng same = *r;
    for (size_t i = 0; i < 3; i++) {
        *r = same;
        grow_other(s, seqs[i], 0, n, r);
    }
    copy = fork_of(s, source, at);
    expect_ok(s->cache, kvt_seq_truncate(copy2, at));
    expect_equal(s, copy, copy2, "a fork", at);
    expect_equal(s, source, source2, "its source", at);
    for (size_t round = 0; round < 5; round++) {
        size_t more = 1 + rng_below(r, 50), swapped = rng_below(r, 2);
        for (size_t i = 0; i < 2; i++) {
            same = *r;
            if ((i ^ swapped) == 0) {
                grow_other(s, source, n, more, r);
                *r = same;
                grow_other(s, source2, n, more, r);
            } else {
                grow_other(s, copy, MOST - 60, more, r); /* other tokens */
                *r = same;
                grow_other(s, copy2, MOST - 60, more, r);
            }
        }
        expect_equal(s, source, source2, "its source goes on", at);
        expect_equal(s, copy, copy2, "a fork goes on", at);
        if (round == 2) {
            uint64_t length = kvt_seq_length(copy);
            length -= rng_below(r, (uint32_t)length);
            expect_ok(s->cache, kvt_seq_truncate(copy, length));
            expect_ok(s->cache, kvt_seq_truncate(copy2, length));
        }
    }
    if (rng_below(r, 2)) {
        kvt_seq_destroy(source);
        expect_equal(s, copy, copy2, "its source is gone", at);
        kvt_seq_destroy(copy);
    } else {
        kvt_seq_destroy(copy);
        expect_equal(s, source, source2, "the fork is gone", at);
        kvt_seq_destroy(source);
    }
    kvt_seq_destroy(source2);
    kvt_seq_destroy(copy2);
}

static void a_fork_is_a_truncated_copy(void **state)
{
    static const uint32_t residuals[] = {0, KVT_RESIDUAL_NONE, 1, 100};
    static const size_t lengths[] = {1, 63, 64, 65, 127, 128, 129, 150, 192, 260};
    rng r = {11};
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        subject s;
        ledger memory;
        ledger_init(&memory);
        open_two(&s, &r, residuals[i]);
        s.ledger = &memory;
        open_cache(&s, NULL);
        for (size_t j = 0; j < 10; j += quick_level() == 2 ? 3 : 1) {
            size_t n = lengths[j];
            check_fork(&s, n, n, &r);
            check_fork(&s, n, 0, &r);
            for (int k = 0; k < (is_quick() ? 1 : 6); k++)
                check_fork(&s, n, rng_below(&r, (uint32_t)n), &r);
            check_fork(&s, n, n / 64 * 64, &r);
        }
        close_subject(&s);
        ledger_close(&memory);
    }
}

/* Drafts that a fork's source has committed can be taken back in either, without a trace. */
static void forks_keep_what_a_truncate_needs(void **state)
{
    rng r = {12};
    kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    for (size_t n = 100; n < 200; n += 7) {
        kvt_seq *plain = seq_of(&s), *source = seq_of(&s), *copy;
        grow(&s, plain, n);
        grow(&s, source, n);
        step_of(&s, source, MOST - 64, 64);
        copy = fork_of(&s, source, n + 64);
        for (int i = 0; i < 2; i++) {
            kvt_seq *seq = i ? copy : source;
            expect_ok(s.cache, kvt_seq_truncate(seq, n));
            expect_equal(&s, seq, plain, "drafts and forks", n);
            grow(&s, seq, 70);
        }
        grow(&s, plain, 70);
        expect_equal(&s, source, plain, "drafts, forks, more", n);
        expect_equal(&s, copy, plain, "drafts, forks, more", n);
        kvt_seq_destroy(plain);
        kvt_seq_destroy(source);
        kvt_seq_destroy(copy);
    }
    close_subject(&s);
}

/* A step of the source that is pending stays with it, whether it is committed or not. */
static void a_pending_step_is_the_sources(void **state)
{
    rng r = {13};
    subject s;
    (void)state;
    open_two(&s, &r, 0);
    open_cache(&s, NULL);
    for (size_t n = 60; n < 200; n += 13)
        for (int commits = 0; commits < 2; commits++) {
            kvt_seq *source = seq_of(&s), *plain = seq_of(&s), *copy, *early;
            size_t before = n < 70 ? 20 : n / 64 * 64 - 10;
            grow(&s, source, n);
            grow(&s, plain, n);
            expect_ok(s.cache, kvt_seq_begin(source, 40, NULL));
            copy = fork_of(&s, source, n);
            early = fork_of(&s, source, before);
            append_layers(&s, source, 500);
            expect_equal(&s, copy, plain, "a fork of a pending step", n);
            grow(&s, copy, 50);
            if (commits)
                expect_ok(s.cache, kvt_seq_commit(source, NULL));
            else
                expect_ok(s.cache, kvt_seq_abort(source));
            grow(&s, plain, 50);
            expect_equal(&s, copy, plain, "a fork of a pending step goes on", n);
            expect_ok(s.cache, kvt_seq_truncate(source, n));
            grow(&s, source, 50);
            expect_equal(&s, source, plain, "its source goes on", n);
            grow(&s, early, n + 50 - before);
            assert_true(kvt_seq_length(early) == kvt_seq_length(plain));
            kvt_seq_destroy(source);
            kvt_seq_destroy(plain);
            kvt_seq_destroy(copy);
            kvt_seq_destroy(early);
        }
    close_subject(&s);
}

/* ---- what it costs ---- */

static kvt_cache_stats stats_of(const subject *s)
{
    kvt_cache_stats stats = {.struct_size = sizeof stats};
    expect_ok(s->cache, kvt_cache_get_stats(s->cache, &stats));
    assert_true(stats.bytes == kvt_cache_memory_bytes(s->cache));
    return stats;
}

static kvt_seq_stats seq_stats_of(const subject *s, const kvt_seq *seq)
{
    kvt_seq_stats stats = {.struct_size = sizeof stats};
    expect_ok(s->cache, kvt_seq_get_stats(seq, &stats));
    assert_true(stats.own_bytes + stats.shared_bytes == kvt_seq_memory_bytes(seq));
    return stats;
}

/* 16 forks of a prefix of 160 tokens: three blocks, of which the last is not full. */
static void blocks_are_counted_once(void **state)
{
    enum { FORKS = 16 };
    rng r = {14};
    kvt_group_config g = group_of(2, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    uint64_t before, table, block, open, positions;
    kvt_seq *source, *forks[FORKS];
    kvt_cache_stats stats;
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    source = seq_of(&s);
    table = kvt_seq_memory_bytes(source);
    for (size_t i = 0; i < 160; i++)
        grow(&s, source, 1);
    stats = stats_of(&s);
    assert_true(stats.blocks_used == 3 && stats.blocks_sealed == 1 && stats.blocks_shared == 0);
    before = stats.bytes;
    assert_true(stats.bytes_used + table == kvt_seq_memory_bytes(source));
    for (size_t i = 0; i < FORKS; i++)
        forks[i] = fork_of(&s, source, 160);
    stats = stats_of(&s);
    assert_true(stats.bytes == before + FORKS * table);
    assert_true(stats.blocks_used == 3 && stats.blocks_shared == 3 && stats.blocks_sealed == 1);
    assert_true(stats.bytes_shared == stats.bytes_used);
    assert_true(seq_stats_of(&s, source).own_bytes == table);
    assert_true(seq_stats_of(&s, forks[3]).shared_bytes == stats.bytes_used);
    /* Each copies the open block that it writes. */
    grow(&s, forks[0], 1);
    stats = stats_of(&s);
    assert_true(stats.blocks_used == 4 && stats.blocks_shared == 3);
    positions = 2 * sizeof(int32_t) * 64;
    open = seq_stats_of(&s, forks[0]).own_bytes - table;
    assert_true(open > positions);
    for (size_t i = 1; i < FORKS; i++)
        grow(&s, forks[i], 1);
    stats = stats_of(&s);
    assert_true(stats.blocks_used == 3 + FORKS && stats.blocks_shared == 2);
    assert_true(stats.bytes == before + FORKS * (table + open));
    /* 192 tokens seal the second block: begun in all forks before any commits, yet sealed once. */
    for (size_t i = 0; i < FORKS; i++)
        expect_ok(s.cache, kvt_seq_begin(forks[i], 31, NULL));
    for (size_t i = 0; i < FORKS; i++)
        append_layers(&s, forks[i], 161);
    for (size_t i = 0; i < FORKS; i++)
        expect_ok(s.cache, kvt_seq_commit(forks[i], NULL));
    stats = stats_of(&s);
    assert_true(stats.blocks_sealed == 2);
    assert_true(stats.blocks_shared == 3);
    /* The source comes later, and takes the same. */
    grow(&s, source, 40);
    stats = stats_of(&s);
    assert_true(stats.blocks_sealed == 2);
    kvt_seq_destroy(source);
    for (size_t i = 0; i < FORKS; i++)
        kvt_seq_destroy(forks[i]);
    stats = stats_of(&s);
    assert_true(stats.blocks_used == 0 && stats.blocks_shared == 0 && stats.bytes_used == 0);
    assert_true(stats.blocks_free > 0);
    expect_ok(s.cache, kvt_cache_trim(s.cache));
    block = stats.bytes - stats_of(&s).bytes;
    assert_true(block == stats.bytes_free);
    close_subject(&s);
}

/* The source seals first: a fork that comes later seals nothing, and truncates as if it had. */
static void what_is_sealed_is_taken(void **state)
{
    rng r = {15};
    subject s;
    (void)state;
    open_two(&s, &r, 0);
    open_cache(&s, NULL);
    for (size_t back = 1; back < 160; back += 31) {
        kvt_seq *source = seq_of(&s), *copy, *plain = seq_of(&s);
        grow(&s, source, 150);
        grow(&s, plain, 150);
        copy = fork_of(&s, source, 150);
        grow(&s, source, 64); /* seals tokens 64 .. 127 */
        /* Its sealed block is written over: the fork's open one is no longer its source. */
        expect_ok(s.cache, kvt_seq_truncate(source, 214 - back));
        step_of(&s, source, 400, 30);
        grow(&s, copy, 64);
        grow(&s, plain, 64);
        expect_equal(&s, copy, plain, "sealed after the source's was", back);
        kvt_seq_destroy(source);
        expect_equal(&s, copy, plain, "and the source is gone", back);
        kvt_seq_destroy(copy);
        kvt_seq_destroy(plain);
    }
    close_subject(&s);
}

static void a_budget_counts_a_block_once(void **state)
{
    enum { FORKS = 8 };
    rng r = {16};
    kvt_group_config g = group_of(2, 1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_seq *source, *forks[FORKS], *none = NULL;
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    for (int bounded = 0; bounded < 2; bounded++) {
        open_cache(&s, NULL);
        source = seq_of(&s);
        for (size_t i = 0; i < 640; i++)
            grow(&s, source, 1);
        for (size_t i = 0; i < FORKS; i++)
            forks[i] = fork_of(&s, source, 640);
        if (bounded) {
            assert_true(kvt_cache_memory_bytes(s.cache) == s.budget);
            expect(s.cache, KVT_ERR_BUDGET, kvt_seq_fork(source, 640, &none));
            assert_null(none);
            for (size_t i = 0; i < FORKS; i++)
                expect_equal(&s, source, forks[i], "within the budget", i);
        }
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        s.budget = kvt_cache_memory_bytes(s.cache);
        for (size_t i = 0; i < FORKS; i++)
            kvt_seq_destroy(forks[i]);
        kvt_seq_destroy(source);
        if (!bounded)
            kvt_cache_destroy(s.cache);
    }
    close_subject(&s);
}

/*
 * An open block that is kept for a truncate is not held against the budget; once it is shared it
 * is, since a fork may need it, so that a fork can be refused for it.
 */
static void a_shared_open_block_is_not_exempt(void **state)
{
    rng r = {21};
    kvt_group_config g = group_of(2, 1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_seq *source, *copy = NULL;
    uint64_t table = 0, plain = 0;
    subject s;
    (void)state;
    open_subject(&s, &g, 1, &r);
    for (int more = -1; more < 2; more++) {
        if (more >= 0)
            s.budget = plain + table + (uint64_t)more;
        open_cache(&s, NULL);
        source = seq_of(&s);
        table = kvt_seq_memory_bytes(source);
        for (size_t i = 0; i < 192; i++) /* the last step has sealed tokens 64 .. 127 */
            grow(&s, source, 1);
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        if (more < 0)
            plain = kvt_cache_memory_bytes(s.cache) - 1; /* too little by a byte */
        else
            expect(s.cache, more ? KVT_OK : KVT_ERR_BUDGET, kvt_seq_fork(source, 192, &copy));
        kvt_seq_destroy(copy);
        copy = NULL;
        expect_ok(s.cache, kvt_seq_truncate(source, 191));
        grow(&s, source, 1);
        kvt_seq_destroy(source);
        if (more < 1)
            kvt_cache_destroy(s.cache);
    }
    close_subject(&s);
}

/*
 * An open block that the pending step seals is not held against the budget, nor is it after a fork:
 * neither one that is refused, wherever that is, nor one whose copy of the block is its own.
 */
static void a_fork_of_a_pending_step_keeps_its_exemption(void **state)
{
    rng r = {24};
    kvt_group_config g = group_of(1, 1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    ledger memory;
    subject s;
    (void)state;
    ledger_init(&memory);
    g.residual_tokens = KVT_RESIDUAL_NONE;
    open_subject(&s, &g, 1, &r);
    s.ledger = &memory;
    for (size_t n = 127; n < 192; n += 64) {
        s.budget = 0;
        for (int bounded = 0; bounded < 2; bounded++) {
            kvt_seq *source, *copy = NULL;
            kvt_status status = KVT_OK;
            size_t room = 0;
            open_cache(&s, NULL);
            source = seq_of(&s);
            grow(&s, source, n - 30);
            grow(&s, source, 30);
            expect_ok(s.cache, kvt_seq_begin(source, 1, NULL)); /* seals the last row */
            expect_ok(s.cache, kvt_cache_trim(s.cache));
            for (long fail = 0; bounded; fail++) {
                room = room_of(&s);
                assert_true(room > 1);
                memory.countdown = fail;
                status = kvt_seq_fork(source, n, &copy);
                memory.countdown = -1;
                if (status != KVT_ERR_MEMORY)
                    break;
                expect_ok(s.cache, kvt_cache_trim(s.cache));
                assert_true(room_of(&s) == room);
            }
            expect_ok(s.cache, status);
            kvt_seq_destroy(copy);
            expect_ok(s.cache, kvt_cache_trim(s.cache));
            if (bounded)
                assert_true(room_of(&s) == room);
            s.budget = kvt_cache_memory_bytes(s.cache) + 20000; /* and what is exempt: for a copy */
            kvt_seq_destroy(source);
            kvt_cache_destroy(s.cache);
        }
    }
    s.cache = NULL;
    close_subject(&s);
    ledger_close(&memory);
}

/* A reserve covers the copies that a fork's first step makes. */
static void a_fork_can_reserve(void **state)
{
    rng r = {17};
    (void)state;
    for (size_t n = 70; n < 400; n += quick_level() == 2 ? 51 : 17)
        for (size_t more = 1; more < 300; more += 47) {
            subject s;
            ledger memory;
            kvt_seq *source, *copy;
            size_t calls;
            ledger_init(&memory);
            open_two(&s, &r, n % 2 ? 0 : 100);
            s.ledger = &memory;
            open_cache(&s, NULL);
            source = seq_of(&s);
            grow(&s, source, n);
            copy = fork_of(&s, source, n);
            expect_ok(s.cache, kvt_seq_reserve(copy, n + more));
            assert_true(kvt_seq_capacity(copy) >= n + more);
            calls = memory.calls;
            while (kvt_seq_length(copy) < n + more) {
                size_t left = n + more - (size_t)kvt_seq_length(copy);
                size_t step = 1 + rng_below(&r, rng_below(&r, 2) ? 4 : 100);
                grow(&s, copy, step < left ? step : left);
            }
            assert_true(memory.calls == calls);
            kvt_seq_destroy(source);
            kvt_seq_destroy(copy);
            close_subject(&s);
            ledger_close(&memory);
        }
}

/* What kvt_seq_capacity says of a fork, without a reserve: to there no memory is asked for. */
static void a_forks_capacity_holds(void **state)
{
    rng r = {18};
    (void)state;
    for (size_t n = 60; n < 330; n += 9) {
        subject s;
        ledger memory;
        kvt_seq *source, *copy, *other;
        uint64_t reach;
        size_t calls;
        ledger_init(&memory);
        open_two(&s, &r, 0);
        s.ledger = &memory;
        open_cache(&s, NULL);
        source = seq_of(&s);
        grow(&s, source, n);
        copy = fork_of(&s, source, n);
        assert_true(kvt_seq_capacity(copy) == (n % 64 ? n : kvt_seq_capacity(copy)));
        other = seq_of(&s); /* leaves free blocks */
        for (size_t i = 0; i < n; i++)
            grow(&s, other, 1);
        kvt_seq_destroy(other);
        reach = kvt_seq_capacity(copy);
        assert_true(reach >= n);
        calls = memory.calls;
        while (kvt_seq_length(copy) < reach)
            grow(&s, copy, 1);
        assert_true(memory.calls == calls);
        kvt_seq_destroy(source);
        kvt_seq_destroy(copy);
        close_subject(&s);
        ledger_close(&memory);
    }
}

/* ---- tags and the next position ---- */

static void a_tag_is_inherited(void **state)
{
    rng r = {22};
    unsigned char tag[KVT_MAX_TAG + 1], got[KVT_MAX_TAG];
    kvt_seq *seq, *copy;
    size_t n = 1;
    subject s;
    (void)state;
    memset(tag, 7, sizeof tag);
    open_two(&s, &r, 0);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    expect_ok(s.cache, kvt_seq_tag(seq, NULL, 0, &n));
    assert_true(n == 0);
    assert_true(kvt_seq_set_tag(NULL, tag, 1) == KVT_ERR_ARG);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_set_tag(seq, NULL, 1));
    expect(s.cache, KVT_ERR_LIMIT, kvt_seq_set_tag(seq, tag, sizeof tag));
    expect_ok(s.cache, kvt_seq_set_tag(seq, tag, KVT_MAX_TAG));
    expect_ok(s.cache, kvt_seq_set_tag(seq, NULL, 0));
    expect_ok(s.cache, kvt_seq_set_tag(seq, "lora 3", 6));
    expect_ok(s.cache, kvt_seq_begin(seq, 1, NULL));
    expect(s.cache, KVT_ERR_STATE, kvt_seq_set_tag(seq, tag, 1));
    expect_ok(s.cache, kvt_seq_abort(seq));
    grow(&s, seq, 5);
    expect(s.cache, KVT_ERR_STATE, kvt_seq_set_tag(seq, tag, 1));
    copy = fork_of(&s, seq, 3);
    kvt_seq_destroy(seq);
    memset(got, 0, sizeof got);
    expect_ok(s.cache, kvt_seq_tag(copy, got, 4, &n));
    assert_true(n == 6 && memcmp(got, "lora\0", 5) == 0);
    expect_ok(s.cache, kvt_seq_tag(copy, got, sizeof got, &n));
    assert_memory_equal(got, "lora 3", 6);
    expect_ok(s.cache, kvt_seq_clear(copy));
    expect_ok(s.cache, kvt_seq_tag(copy, NULL, 0, &n));
    assert_true(n == 6);
    assert_true(kvt_seq_tag(NULL, got, 1, &n) == KVT_ERR_ARG);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_tag(copy, NULL, 1, &n));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_tag(copy, got, 1, NULL));
    kvt_seq_destroy(copy);
    close_subject(&s);
}

static void the_next_position_can_be_set(void **state)
{
    rng r = {23};
    int32_t positions[6];
    kvt_seq *seq, *copy, *shorter;
    subject s;
    (void)state;
    open_two(&s, &r, 0);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    assert_true(kvt_seq_set_next_position(NULL, 1) == KVT_ERR_ARG);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_set_next_position(seq, -1));
    expect_ok(s.cache, kvt_seq_set_next_position(seq, 100));
    assert_true(kvt_seq_next_position(seq) == 100);
    expect_ok(s.cache, kvt_seq_begin(seq, 2, NULL));
    expect(s.cache, KVT_ERR_STATE, kvt_seq_set_next_position(seq, 3));
    expect_ok(s.cache, kvt_seq_abort(seq));
    assert_true(kvt_seq_next_position(seq) == 100); /* for the step that comes again */
    grow(&s, seq, 3);
    assert_true(kvt_seq_next_position(seq) == 103);
    expect_ok(s.cache, kvt_seq_set_next_position(seq, 50)); /* behind an image */
    copy = fork_of(&s, seq, 3);
    shorter = fork_of(&s, seq, 2);
    assert_true(kvt_seq_next_position(copy) == 50);
    assert_true(kvt_seq_next_position(shorter) == 102);
    expect_ok(s.cache, kvt_seq_truncate(seq, 3)); /* takes nothing away */
    assert_true(kvt_seq_next_position(seq) == 50);
    grow(&s, copy, 3);
    expect_ok(s.cache, kvt_seq_positions(copy, 0, 6, positions));
    assert_true(positions[0] == 100 && positions[2] == 102);
    assert_true(positions[3] == 50 && positions[5] == 52);
    assert_true(kvt_seq_next_position(copy) == 53);
    expect_ok(s.cache, kvt_seq_truncate(seq, 2));
    assert_true(kvt_seq_next_position(seq) == 102);
    expect_ok(s.cache, kvt_seq_set_next_position(seq, 50));
    expect_ok(s.cache, kvt_seq_clear(seq));
    assert_true(kvt_seq_next_position(seq) == 0);
    expect_ok(s.cache, kvt_seq_set_next_position(seq, INT32_MAX));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_begin(seq, 2, NULL));
    kvt_seq_destroy(seq);
    kvt_seq_destroy(copy);
    kvt_seq_destroy(shorter);
    close_subject(&s);
}

/* ---- errors ---- */

static void wrong_arguments_are_refused(void **state)
{
    rng r = {19};
    kvt_seq *seq, *copy = NULL;
    kvt_cache_stats stats = {0};
    kvt_seq_stats seq_stats = {0};
    subject s;
    (void)state;
    open_two(&s, &r, 0);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    grow(&s, seq, 10);
    assert_true(kvt_seq_fork(NULL, 0, &copy) == KVT_ERR_ARG);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_fork(seq, 10, NULL));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_fork(seq, 11, &copy));
    expect_error_text(s.cache, "11 of 10", "fork");
    assert_null(copy);
    expect(s.cache, KVT_ERR_ARG, kvt_cache_get_stats(s.cache, NULL));
    expect(s.cache, KVT_ERR_ARG, kvt_cache_get_stats(s.cache, &stats));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_get_stats(seq, NULL));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_get_stats(seq, &seq_stats));
    assert_true(kvt_cache_get_stats(NULL, &stats) == KVT_ERR_ARG);
    assert_true(kvt_seq_get_stats(NULL, &seq_stats) == KVT_ERR_ARG);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* Every allocation of a fork, and of the steps of it and of its source, fails in turn. */
static void failing_allocations_change_nothing(void **state)
{
    rng r = {20};
    subject s;
    ledger memory;
    (void)state;
    ledger_init(&memory);
    open_two(&s, &r, 0);
    s.ledger = &memory;
    open_cache(&s, NULL);
    for (size_t n = 100; n < 200; n += 11)
        for (int pending = 0; pending < 2; pending++) {
            kvt_seq *source = seq_of(&s), *copy = NULL, *plain = seq_of(&s);
            kvt_status status;
            grow(&s, source, n);
            grow(&s, plain, n);
            if (pending)
                expect_ok(s.cache, kvt_seq_begin(source, 3, NULL));
            expect_ok(s.cache, kvt_cache_trim(s.cache));
            for (long fail = 0;; fail++) {
                size_t live = memory.live_bytes;
                memory.countdown = fail;
                status = kvt_seq_fork(source, n, &copy);
                memory.countdown = -1;
                if (status == KVT_OK)
                    break;
                assert_true(status == KVT_ERR_MEMORY);
                assert_null(copy);
                expect_ok(s.cache, kvt_cache_trim(s.cache));
                assert_true(memory.live_bytes == live);
                assert_true(stats_of(&s).blocks_shared == 0);
                assert_true(kvt_seq_length(source) == n);
                if (!pending)
                    expect_equal(&s, source, plain, "a fork that failed", n);
            }
            if (pending)
                expect_ok(s.cache, kvt_seq_abort(source));
            for (int i = 0; i < 2; i++) {
                kvt_seq *seq = i ? source : copy;
                for (long fail = 0;; fail++) {
                    expect_ok(s.cache, kvt_cache_trim(s.cache));
                    memory.countdown = fail;
                    status = kvt_seq_begin(seq, 64, NULL);
                    memory.countdown = -1;
                    if (status == KVT_OK)
                        break;
                    assert_true(status == KVT_ERR_MEMORY);
                    expect_equal(&s, seq, plain, "a begin that failed", n);
                }
                append_layers(&s, seq, n);
                expect_ok(s.cache, kvt_seq_commit(seq, NULL));
                expect_ok(s.cache, kvt_seq_truncate(seq, n));
                expect_equal(&s, seq, plain, "a begin after some that failed", n);
            }
            kvt_seq_destroy(source);
            kvt_seq_destroy(copy);
            kvt_seq_destroy(plain);
        }
    close_subject(&s);
    ledger_close(&memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_fork_is_a_truncated_copy),
        cmocka_unit_test(forks_keep_what_a_truncate_needs),
        cmocka_unit_test(a_pending_step_is_the_sources),
        cmocka_unit_test(blocks_are_counted_once),
        cmocka_unit_test(what_is_sealed_is_taken),
        cmocka_unit_test(a_budget_counts_a_block_once),
        cmocka_unit_test(a_shared_open_block_is_not_exempt),
        cmocka_unit_test(a_fork_of_a_pending_step_keeps_its_exemption),
        cmocka_unit_test(a_fork_can_reserve),
        cmocka_unit_test(a_forks_capacity_holds),
        cmocka_unit_test(a_tag_is_inherited),
        cmocka_unit_test(the_next_position_can_be_set),
        cmocka_unit_test(wrong_arguments_are_refused),
        cmocka_unit_test(failing_allocations_change_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
