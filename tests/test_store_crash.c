/*
 * Processes that end by SIGKILL amid a call of the directory store: before each system call of a
 * put, after it, and amid each write; alone, and with three processes at work that use the same
 * directory; and four processes that are killed at random calls. Each time all values are whole,
 * and no more than the bound allows, but for a temporary a process; the next call works, and counts
 * what is there.
 *
 * The calls are taken by the linker (call_faults.c). Runs in a folder of its own under the current
 * one. KVT_TEST_QUICK: fewer kills.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "call_faults.h"
#include "store_values.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BOUND = 30000, BYTES = 4000, NUMBERS = 40, WORKERS = 3 };

static char path[64];
static const call_fate fates[] = {FATE_KILL_BEFORE, FATE_KILL_AMID, FATE_KILL_AFTER};

/* What a killed process did. */
typedef enum deed { PUT_NEW, PUT_OVER, PUT_EVICT, REMOVE, OPEN_LESS, DEEDS } deed;

static const char *const names[DEEDS] = {"put", "put over", "put, evict", "remove", "open, evict"};

/* ---- in a process that is killed, without cmocka ---- */

static unsigned char data[BYTES];

static int put_number(kvt_store *s, uint64_t number, uint64_t version, size_t bytes)
{
    kvt_store_key key = key_of(number);
    kvt_store_part parts[2] = {{data, 1000}, {data + 1000, bytes - 1000}};
    kvt_store_value value = {parts, 2, bytes};
    kvt_store_error error;
    size_t n_put;

    value_fill(number, version, data, bytes);
    return s->put(s->user, &key, &value, 1, &n_put, &error) == KVT_OK;
}

static int do_deed(kvt_store *s, deed what)
{
    kvt_store_key key = key_of(2);
    kvt_store_error error;
    kvt_store other;

    switch (what) {
    case REMOVE: return s->remove(s->user, &key, 1, &error) == KVT_OK;
    case OPEN_LESS:
        if (folder_open(path, BOUND - 2 * BYTES, &other) != KVT_OK)
            return 0;
        kvt_store_close(&other);
        return 1;
    default: return put_number(s, what == PUT_OVER ? 2 : 39, 7, what == PUT_NEW ? 1024 : BYTES);
    }
}

static void arm(long at, call_fate fate)
{
    call_plan plan = {0, FATE_NONE, 0, 0, 0, 0, 0};
    plan.at = at;
    plan.fate = fate;
    calls_arm(&plan);
}

/* Random puts and gets, the latter checked, until something is wrong. */
static int work(kvt_store *s, uint64_t seed, size_t n_calls)
{
    rng r = {seed * 2 + 1};
    kvt_store_error error;

    for (; n_calls; n_calls--) {
        uint64_t number = rng_below(&r, NUMBERS);
        kvt_store_key key = key_of(number);
        if (rng_below(&r, 3)) {
            if (!put_number(s, number, rng_next(&r), 1024 + rng_below(&r, BYTES - 1024)))
                return 0;
        } else if (rng_below(&r, 4)) {
            collector c;
            kvt_store_receiver receiver;
            int sound;
            collector_make(&c, 1);
            receiver = collector_receiver(&c);
            sound = s->get(s->user, &key, 1, &receiver, &error) == KVT_OK &&
                    (!c.values[0].n_begun ||
                     value_is_sound(&key, c.values[0].data, (size_t)c.values[0].have, NULL));
            collector_free(&c);
            if (!sound)
                return 0;
        } else if (s->remove(s->user, &key, 1, &error) != KVT_OK) {
            return 0;
        }
    }
    return 1;
}

/* ---- the parent ---- */

/* 1: the process was killed; 0: it has come to its end. */
static int was_killed(pid_t child)
{
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        return 1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        fail_msg("a process has ended with status %x", (unsigned)status);
    return 0;
}

/* Eight values fill the store, and no temporary is there. */
static void fill(kvt_store *s)
{
    kvt_store_key keys[NUMBERS];
    for (size_t i = 0; i < NUMBERS; i++)
        keys[i] = key_of(i);
    store_ok(s->remove(s->user, keys, NUMBERS, &store_error));
    for (uint64_t i = 0; i < 8; i++)
        store_ok(put_value(s, i, 1, i == 7 ? 900 : BYTES));
    store_ok(s->collect(s->user, &store_error));
}

static void expect_bound(uint64_t max_bytes, size_t n_temporaries, const char *what, size_t at)
{
    folder_state f = folder_look(path);
    if (f.n_unsound || f.bytes > max_bytes || f.n_temporaries > n_temporaries ||
        f.temporary_bytes > n_temporaries * BYTES)
        fail_msg("%s, killed at %zu: %llu values of %llu bytes, %llu unsound, %llu temporaries",
                 what, at, (unsigned long long)f.n_values, (unsigned long long)f.bytes,
                 (unsigned long long)f.n_unsound, (unsigned long long)f.n_temporaries);
}

/* Whether a call of a deed is a write, of which a part can be done. */
static int is_write(kvt_store *s, deed what, size_t at)
{
    static char kinds[DEEDS][1000];
    const call *made;
    size_t n;

    if (!kinds[what][0]) {
        fill(s);
        arm(-1, FATE_NONE);
        assert_true(do_deed(s, what));
        calls_disarm();
        made = calls_made(&n);
        assert_true(n < sizeof kinds[what]);
        for (size_t i = 0; i < n; i++)
            kinds[what][i] = made[i].kind == CALL_WRITE || made[i].kind == CALL_PWRITE ? 'w' : '-';
    }
    return kinds[what][at] == 'w';
}

/* Each call of each deed, in a directory that nobody else uses. */
static void test_alone(void **state)
{
    kvt_store s, again;
    size_t trials = 0, dirty = 0, left = 0;
    (void)state;

    store_ok(folder_open(path, BOUND, &s));
    for (int what = 0; what < DEEDS; what++) {
        int goes_on = 1;
        for (size_t at = 0; goes_on; at++) {
            assert_true(at < 1000);
            goes_on = 0;
            for (int f = 0; f < 3 && (f == 0 || goes_on); f++) {
                folder_state before, after;
                kvt_store_stats stats;
                pid_t child;
                if (fates[f] == FATE_KILL_AMID && !is_write(&s, (deed)what, at))
                    continue;                               /* as after it */
                store_ok(folder_open(path, BOUND, &again)); /* OPEN_LESS has changed it */
                kvt_store_close(&again);
                fill(&s);
                before = folder_look(path);
                child = fork();
                assert_true(child >= 0);
                if (child == 0) {
                    arm((long)at, fates[f]);
                    _exit(!do_deed(&s, (deed)what));
                }
                if (!was_killed(child))
                    continue;
                goes_on = 1;
                trials++;
                expect_bound(BOUND, 1, names[what], at);
                after = folder_look(path);
                left += after.n_temporaries;
                assert_true(after.n_values + 4 >= before.n_values);
                if (at % 2) { /* another one sweeps as it opens */
                    store_ok(folder_open(path, 0, &again));
                    after = folder_look(path); /* and evicts, if the bound is less already */
                    assert_int_equal(after.n_temporaries, 0);
                    kvt_store_close(&again);
                }
                store_ok(s.stats(s.user, &stats, &store_error));
                dirty += stats.n_values != before.n_values;
                assert_true(stats.n_values == after.n_values && stats.bytes == after.bytes);
                store_ok(put_value(&s, 20, 3, BYTES));
                assert_int_equal(get_version(&s, 20), 3);
                store_ok(s.collect(s.user, &store_error));
                assert_int_equal(folder_look(path).n_temporaries, 0);
                folder_agrees(path, &s);
                assert_true(has_value(&s, 6)); /* of the newest ones */
            }
        }
    }
    print_message("%zu kills: %zu left a temporary, after %zu the values were others\n", trials,
                  left, dirty);
    assert_true(left > 10 && dirty > 10);
    kvt_store_close(&s);
    folder_remove(path);
}

static void stop(const pid_t *workers, size_t n)
{
    for (size_t i = 0; i < n; i++)
        assert_int_equal(kill(workers[i], SIGSTOP), 0);
    for (size_t i = 0; i < n; i++) {
        int status;
        assert_int_equal(waitpid(workers[i], &status, WUNTRACED), workers[i]);
        if (!WIFSTOPPED(status))
            fail_msg("a worker has ended with status %x", (unsigned)status);
    }
}

/* The same with three others at work. They are stopped to look at the directory, amid anything. */
static void test_together(void **state)
{
    pid_t workers[WORKERS];
    size_t killed = 0, survived = 0, step = is_quick() ? 7 : 1, n_dead = 0;
    kvt_store s;
    (void)state;

    store_ok(folder_open(path, BOUND, &s));
    for (size_t i = 0; i < WORKERS; i++) {
        workers[i] = fork();
        assert_true(workers[i] >= 0);
        if (workers[i] == 0)
            _exit(folder_open(path, 0, &s) != KVT_OK || !work(&s, 50 + i, SIZE_MAX));
    }
    for (size_t at = 0; at < 120; at += step) {
        call_fate fate = fates[at % 3];
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            if (folder_open(path, 0, &s) != KVT_OK) /* which sweeps */
                _exit(1);
            arm((long)at, fate);
            _exit(!put_number(&s, at % NUMBERS, at, BYTES));
        }
        if (was_killed(child)) {
            killed++;
            n_dead = 1;
        } else {
            survived++; /* it had fewer calls; what was dead is swept */
            n_dead = 0;
        }
        stop(workers, WORKERS);
        expect_bound(BOUND, WORKERS + n_dead, "put", at);
        for (size_t i = 0; i < WORKERS; i++)
            assert_int_equal(kill(workers[i], SIGCONT), 0);
        store_ok(put_value(&s, at % NUMBERS, at, 2000));
    }
    for (size_t i = 0; i < WORKERS; i++) {
        assert_int_equal(kill(workers[i], SIGKILL), 0); /* anywhere */
        assert_int_equal(was_killed(workers[i]), 1);
    }
    expect_bound(BOUND, WORKERS + 1, "all", 0);
    store_ok(s.collect(s.user, &store_error));
    assert_int_equal(folder_look(path).n_temporaries, 0);
    folder_agrees(path, &s);
    print_message("%zu kills among %d others at work, %zu came to their end\n", killed, WORKERS,
                  survived);
    assert_true(killed > (is_quick() ? 5 : 60));
    kvt_store_close(&s);
    folder_remove(path);
}

static pid_t start(uint64_t seed)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        rng r = {seed * 2 + 1};
        kvt_store own;
        if (folder_open(path, 0, &own) != KVT_OK)
            _exit(1);
        arm((long)rng_below(&r, 400), fates[rng_below(&r, 3)]);
        _exit(!work(&own, seed, 6));
    }
    return child;
}

/* Four, each killed somewhere or not at all, and another one begins in its place. */
static void test_random(void **state)
{
    pid_t running[4];
    size_t n_killed = 0, rounds = is_quick() ? 40 : 300;
    kvt_store s;
    (void)state;

    store_ok(folder_open(path, BOUND, &s));
    for (size_t i = 0; i < 4; i++)
        running[i] = start(i);
    for (size_t round = 0; round < rounds; round++) {
        size_t i = round % 4;
        n_killed += (size_t)was_killed(running[i]);
        running[i] = start(round + 4);
        if (round % 10 == 0) { /* temporaries of the dead may be there until one is opened */
            folder_state f = folder_look(path);
            assert_int_equal(f.n_unsound, 0);
        }
    }
    for (size_t i = 0; i < 4; i++)
        n_killed += (size_t)was_killed(running[i]);
    expect_bound(BOUND, 8, "random", 0);
    store_ok(s.collect(s.user, &store_error));
    assert_int_equal(folder_look(path).n_temporaries, 0);
    folder_agrees(path, &s);
    print_message("%zu of %zu processes were killed\n", n_killed, rounds + 4);
    assert_true(n_killed > rounds / 10);
    kvt_store_close(&s);
    folder_remove(path);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(path, sizeof path, "test_store_crash-%ld", (long)getpid());
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_together),
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
