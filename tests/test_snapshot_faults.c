/*
 * Every system call and every allocation of a save, load, conversion or inspection fails in turn:
 * the file at the target is the old one, whole, or where the failure comes later the new one; the
 * sequence is as it was; nothing is left; and status and text name the call. Counts are printed.
 *
 * The calls are taken by the linker (call_faults.c). Runs in a folder of its own under the current
 * one. KVT_TEST_QUICK: fewer errors for each call.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_scenes.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- what has to come of it ---- */

typedef enum outcome {
    GOES_WELL, /* the call is made again, or can do without */
    FAILS,     /* with KVT_ERR_IO */
    FAILS_LATE /* the new file is in place */
} outcome;

static int is_in_place(scene_kind kind)
{
    return kind == SAVE_IN_PLACE || kind == SAVE_IN_PLACE_NEW || kind == SAVE_FD;
}

static int is_retried(call_kind kind)
{
    return kind == CALL_OPEN || kind == CALL_READ || kind == CALL_PREAD || kind == CALL_WRITE ||
           kind == CALL_FSYNC || kind == CALL_FLOCK || kind == CALL_FTRUNCATE;
}

static outcome outcome_of(scene_kind kind, const call *c, int error)
{
    if (error == EINTR && is_retried(c->kind))
        return GOES_WELL;
    switch (c->kind) {
    case CALL_OPEN:
        return c->role == ROLE_STALE || (c->role == ROLE_FOLDER && error == EACCES) ||
                       (c->role == ROLE_OUT && error == EEXIST)
                   ? GOES_WELL
                   : FAILS;
    case CALL_FSYNC: return c->role == ROLE_FOLDER ? FAILS_LATE : FAILS;
    case CALL_CLOSE: return c->role == ROLE_OUT && error != EINTR ? FAILS : GOES_WELL;
    case CALL_FSTAT: /* of a temporary: whether somebody has removed it */
        return c->role == ROLE_OUT && !is_in_place(kind) ? GOES_WELL : FAILS;
    case CALL_LSTAT: return c->role == ROLE_STALE ? GOES_WELL : FAILS;
    case CALL_GETRANDOM: /* of a name; of encryption */
        return c->n == 8 || error == EINTR ? GOES_WELL : FAILS;
    case CALL_UNLINK:
    case CALL_FLOCK:
    case CALL_MUNMAP:
    case CALL_OPENDIR:
    case CALL_READDIR: return GOES_WELL;
    default: return FAILS;
    }
}

/* What the text says of a call. */
static const char *said(const call *c)
{
    if (c->kind == CALL_OPEN && c->role == ROLE_FOLDER)
        return "opening its folder failed";
    if (c->kind == CALL_OPEN && c->role == ROLE_OUT && strstr(c->path, ".kvtile-"))
        return "creating a file in its folder failed";
    if (c->kind == CALL_FSYNC && c->role == ROLE_FOLDER)
        return "fsync of the folder failed";
    if (c->kind == CALL_GETRANDOM)
        return "the system gives no random numbers";
    if (c->kind == CALL_REALPATH)
        return "following the link failed";
    if (c->kind == CALL_PREAD) /* a regular file is read by it */
        return "read failed";
    return call_name(c->kind);
}

/* Errors that a call can answer; 0 ends them. */
static const int *errors_of(call_kind kind)
{
    static const int open_errors[] = {EIO, EMFILE, EACCES, ENOSPC, EINTR, EEXIST, 0};
    static const int write_errors[] = {EIO, ENOSPC, EDQUOT, EINTR, 0};
    static const int read_errors[] = {EIO, EINTR, 0};
    static const int rename_errors[] = {EIO, EBUSY, ENOSPC, EACCES, EXDEV, 0};
    static const int lock_errors[] = {ENOLCK, EWOULDBLOCK, EINTR, 0};
    static const int fcntl_errors[] = {EMFILE, EIO, 0};
    static const int map_errors[] = {ENOMEM, EACCES, 0};
    static const int random_errors[] = {ENOSYS, EAGAIN, EINTR, 0};
    static const int other_errors[] = {EIO, EACCES, 0};
    switch (kind) {
    case CALL_OPEN:
    case CALL_OPENDIR: return open_errors;
    case CALL_WRITE:
    case CALL_FSYNC:
    case CALL_FTRUNCATE:
    case CALL_CLOSE: return write_errors;
    case CALL_READ:
    case CALL_PREAD: return read_errors;
    case CALL_RENAME: return rename_errors;
    case CALL_FLOCK: return lock_errors;
    case CALL_FCNTL: return fcntl_errors;
    case CALL_MMAP:
    case CALL_MUNMAP: return map_errors;
    case CALL_GETRANDOM: return random_errors;
    default: return other_errors;
    }
}

/* ---- a trial ---- */

typedef struct tally {
    size_t trials, failed, well, of_kind[CALL_KINDS];
} tally;

static void wrong(scene_kind kind, long at, const call *c, int error, const char *what,
                  kvt_status status, const char *text)
{
    fail_msg("%s, call %ld (%s of %s, role %d), error %d: %s; status %d, \"%s\"", scene_names[kind],
             at, call_name(c->kind), c->path, (int)c->role, error, what, (int)status, text);
}

/* The file at the target, by what documentation says. */
static int target_is_right(scene_kind kind, outcome expected, scene_target target)
{
    int is_new = kind == SAVE_NEW || kind == SAVE_IN_PLACE_NEW;
    if (!scene_writes(kind))
        return 1;
    if (expected != FAILS)
        return target == TARGET_NEW;
    if (kind == SAVE_FD)
        return target == TARGET_PART || target == TARGET_NEW;
    if (kind == SAVE_IN_PLACE)
        return target == TARGET_OLD || target == TARGET_PART || target == TARGET_NEW;
    return target == (is_new ? TARGET_NONE : TARGET_OLD);
}

static void trial(scenes *s, scene_kind kind, long at, const call *c, call_plan plan,
                  outcome expected, tally *t)
{
    kvt_status status;
    scene_target target;
    int leaves = plan.also != 0 || (kind == SAVE_STALE && expected == GOES_WELL) ||
                 (kind == SAVE_STALE && expected == FAILS);

    plan.at = at;
    scene_begin(s, kind);
    calls_arm(&plan);
    status = scene_run(s, kind);
    calls_disarm();
    t->trials++;
    t->of_kind[c->kind]++;
    if (!calls_met())
        wrong(kind, at, c, plan.error, "the call was not made", status, s->text);
    if ((status == KVT_OK) != (expected == GOES_WELL))
        wrong(kind, at, c, plan.error, "another outcome", status, s->text);
    if (status != KVT_OK) {
        t->failed++;
        if (status != (c->kind == CALL_GETRANDOM ? KVT_ERR_UNSUPPORTED : KVT_ERR_IO))
            wrong(kind, at, c, plan.error, "another status", status, s->text);
        if (!strstr(s->text, said(c)) ||
            (c->kind != CALL_GETRANDOM && !strstr(s->text, strerror(plan.error))))
            wrong(kind, at, c, plan.error, said(c), status, s->text);
    } else {
        t->well++;
    }
    target = scene_end(s, kind, status, leaves + (plan.also != 0));
    if (!target_is_right(kind, expected, target)) {
        (void)fprintf(stderr, "target %d\n", (int)target);
        wrong(kind, at, c, plan.error, "another target", status, s->text);
    }
    if (plan.also) { /* the next save removes what could not be removed */
        expect_ok(s->cache, scene_run(s, kind));
        assert_int_equal(scene_temporaries(), 0);
    }
}

/* The calls of a scene that goes well. */
static call *record(scenes *s, scene_kind kind, int memory, size_t *n)
{
    call_plan plan = {-1, FATE_NONE, 0, 0, 0, 0, 0};
    const call *made;
    call *copy;
    kvt_status status;

    plan.counts_memory = memory;
    scene_begin(s, kind);
    calls_arm(&plan);
    status = scene_run(s, kind);
    calls_disarm();
    if (status != KVT_OK)
        fail_msg("%s: %d, %s", scene_names[kind], (int)status, s->text);
    made = calls_made(n);
    copy = calloc(*n + 1, sizeof *copy);
    assert_non_null(copy);
    memcpy(copy, made, *n * sizeof *copy);
    assert_true(scene_end(s, kind, status, 0) == (scene_writes(kind) ? TARGET_NEW : TARGET_NONE));
    return copy;
}

static void calls_fail(scenes *s, scene_kind kind, tally *t)
{
    size_t n, before = t->trials;
    call *made = record(s, kind, 0, &n);

    for (size_t i = 0; i < n; i++) {
        const int *errors = errors_of(made[i].kind);
        for (size_t e = 0; errors[e]; e++) {
            if (is_quick() && e && errors[e] != EINTR)
                continue;
            call_plan plan = {0, FATE_FAIL, 0, 0, 0, 0, 0};
            outcome expected = outcome_of(kind, &made[i], errors[e]);
            plan.error = errors[e];
            if (is_in_place(kind) && errors[e] == EEXIST)
                continue;
            trial(s, kind, (long)i, &made[i], plan, expected, t);
            if (errors[e] == EINTR && is_retried(made[i].kind)) { /* three times in a row */
                plan.times = 3;
                trial(s, kind, (long)i, &made[i], plan, expected, t);
            }
            if (expected == FAILS && scene_writes(kind)) { /* and cleaning up fails, too */
                plan.also = 1u << CALL_UNLINK;
                plan.times = 0;
                if (!is_in_place(kind))
                    trial(s, kind, (long)i, &made[i], plan, expected, t);
            }
        }
        if (made[i].kind == CALL_READ || made[i].kind == CALL_PREAD || made[i].kind == CALL_WRITE) {
            call_plan plan = {0, FATE_SHORT, 0, 0, 0, 0, 0};
            trial(s, kind, (long)i, &made[i], plan, GOES_WELL, t);
            plan.times = 1000;
            trial(s, kind, (long)i, &made[i], plan, GOES_WELL, t);
        }
    }
    print_message("%-24s %3zu system calls, %4zu trials\n", scene_names[kind], n,
                  t->trials - before);
    free(made);
}

static void test_calls(void **state)
{
    tally t;
    scenes s;
    (void)state;

    memset(&t, 0, sizeof t);
    for (int threads = 0; threads < 2; threads++) {
        scenes_open(&s, threads ? THREADS_EXECUTOR : THREADS_1);
        for (int kind = 0; kind < SCENES; kind++)
            if (scene_is_possible((scene_kind)kind))
                calls_fail(&s, (scene_kind)kind, &t);
        scenes_close(&s);
    }
    print_message("system calls: %zu trials, %zu failed as documented, %zu went well\n", t.trials,
                  t.failed, t.well);
    for (int kind = 0; kind < CALL_KINDS; kind++)
        if (t.of_kind[kind])
            print_message("  %s: %zu\n", call_name((call_kind)kind), t.of_kind[kind]);
    for (int kind = 0; kind < CALL_ALLOC; kind++) /* each was met somewhere, but stores' calls */
        assert_true(t.of_kind[kind] > 0 || kind == CALL_PWRITE || kind == CALL_FSTATAT ||
                    kind == CALL_MKDIR || kind == CALL_FUTIMENS);
}

/* A file that ends early while it is read: damaged, or a failed read, and nothing else. */
static void test_files_end(void **state)
{
    size_t trials = 0;
    scenes s;
    (void)state;

    for (int threads = 0; threads < 2; threads++) {
        scenes_open(&s, threads ? THREADS_EXECUTOR : THREADS_1);
        for (int kind = 0; kind < SCENES; kind++) {
            size_t n;
            call *made;
            if (!scene_is_possible((scene_kind)kind))
                continue;
            made = record(&s, (scene_kind)kind, 0, &n);
            for (size_t i = 0; i < n; i++) {
                call_plan plan = {0, FATE_END, 0, 1000, 0, 0, 0};
                kvt_status status;
                scene_target target;
                if (made[i].kind != CALL_READ && made[i].kind != CALL_PREAD)
                    continue;
                plan.at = (long)i;
                scene_begin(&s, (scene_kind)kind);
                calls_arm(&plan);
                status = scene_run(&s, (scene_kind)kind);
                calls_disarm();
                trials++;
                if (status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT && status != KVT_ERR_IO &&
                    status != KVT_OK)
                    wrong((scene_kind)kind, (long)i, &made[i], 0, "the end", status, s.text);
                if (status == KVT_OK && i + 2 < n && made[i + 1].kind != CALL_CLOSE)
                    wrong((scene_kind)kind, (long)i, &made[i], 0, "well", status, s.text);
                target = scene_end(&s, (scene_kind)kind, status, 0);
                assert_true(target == (!scene_writes((scene_kind)kind) ? TARGET_NONE
                                       : status == KVT_OK              ? TARGET_NEW
                                                                       : TARGET_OLD));
            }
            free(made);
        }
        scenes_close(&s);
    }
    print_message("files that end early: %zu trials\n", trials);
    assert_true(trials > 50);
}

/* One allocation; or all from it on, where the cache gives back what is free and tries again. */
static void memory_fails(scenes *s, scene_kind kind, int all, int by_chance, tally *t)
{
    size_t n = 0, before = t->trials;

    for (long i = 0;; i++) {
        call_plan plan = {0, FATE_FAIL, ENOMEM, 0, 0, 1, 0};
        kvt_status status;
        scene_target target;
        plan.at = i;
        plan.times = all ? 1 << 30 : 0;
        scene_begin(s, kind);
        calls_arm(&plan);
        status = scene_run(s, kind);
        calls_disarm();
        (void)calls_made(&n);
        t->trials += (size_t)calls_met();
        if (status != KVT_OK && status != KVT_ERR_MEMORY)
            fail_msg("%s, allocation %ld: status %d, %s", scene_names[kind], i, (int)status,
                     s->text);
        if (status != KVT_OK && !strstr(s->text, "memory") &&
            !strstr(s->text, "the allocator has no"))
            fail_msg("%s, allocation %ld: \"%s\"", scene_names[kind], i, s->text);
        if (status == KVT_OK && calls_met()) { /* it can do without */
            t->well++;
            if (all)
                fail_msg("%s goes well without allocations from %ld on", scene_names[kind], i);
            if (getenv("KVT_TEST_VERBOSE"))
                print_message("%s: well without allocation %ld of %zu bytes\n", scene_names[kind],
                              i, calls_made(&n)[i].n);
        }
        t->failed += status != KVT_OK;
        target = scene_end(s, kind, status, kind == SAVE_STALE);
        if (!target_is_right(kind, status == KVT_OK ? GOES_WELL : FAILS, target))
            fail_msg("%s, allocation %ld: target %d", scene_names[kind], i, (int)target);
        if (!calls_met())
            break;
    }
    if (!all)
        print_message("%-24s %3zu allocations%s\n", scene_names[kind], t->trials - before,
                      by_chance ? ", in any order" : "");
}

static void test_memory(void **state)
{
    tally t;
    scenes s;
    (void)state;

    memset(&t, 0, sizeof t);
    for (int threads = 0; threads < 3; threads++) {
        scenes_open(&s, (scene_threads)threads);
        for (int kind = 0; kind < SCENES; kind++)
            for (int all = 0; all < 2 && scene_is_possible((scene_kind)kind); all++)
                memory_fails(&s, (scene_kind)kind, all, threads == THREADS_POOL, &t);
        scenes_close(&s);
    }
    print_message("allocations: %zu trials, %zu KVT_ERR_MEMORY, %zu went well\n", t.trials,
                  t.failed, t.well);
    assert_true(t.failed > 300);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(scene_folder, sizeof scene_folder, "test_snapshot_faults-%ld", (long)getpid());
    return mkdir(scene_folder, 0700);
}

static int teardown(void **state)
{
    (void)state;
    return rmdir(scene_folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_calls),
        cmocka_unit_test(test_files_end),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
