/*
 * A process that ends, and a machine that stops, in the midst of a save.
 *
 * SIGKILL at each system call of a save, before it, after it and amid each write: the target is the
 * old file or the new one, and the next save removes what is left.
 *
 * Power cuts: the writes, syncs and renames of a save are recorded, and each state built that a
 * file system may leave which orders nothing but what fsync orders. The target is the old file or
 * the new one, and the new one once the save has answered. The same with calls left out shows that
 * the states would tell.
 *
 * The calls are taken by the linker (call_faults.c). Runs in a folder of its own under the current
 * one.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_scenes.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const scene_kind saves[] = {SAVE_NEW,   SAVE_OVER,   SAVE_LINK,         SAVE_STALE,
                                   SAVE_DELTA, SAVE_SECRET, SAVE_SECRET_DELTA, CONVERT_MERGE};
#define N_SAVES (sizeof saves / sizeof saves[0])

/* ---- the process ends ---- */

/* 1: it was killed; 0: it has saved, since there are fewer calls. */
static int run_killed(scenes *s, scene_kind kind, long at, call_fate fate)
{
    pid_t child = fork();
    int status;

    assert_true(child >= 0);
    if (child == 0) {
        call_plan plan = {0, FATE_NONE, 0, 0, 0, 0, 0};
        plan.at = at;
        plan.fate = fate;
        calls_arm(&plan);
        _exit(scene_run(s, kind) == KVT_OK ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        return 1;
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return 0;
}

/* Which of a save's calls are writes; how many calls there are. */
static size_t calls_of(scenes *s, scene_kind kind, char *is_write, size_t room)
{
    call_plan plan = {-1, FATE_NONE, 0, 0, 0, 0, 0};
    const call *made;
    size_t n;

    scene_begin(s, kind);
    calls_arm(&plan);
    expect_ok(s->cache, scene_run(s, kind));
    calls_disarm();
    made = calls_made(&n);
    assert_true(n > 0 && n < room);
    for (size_t i = 0; i < n; i++)
        is_write[i] = made[i].kind == CALL_WRITE;
    return n;
}

static void test_kills(void **state)
{
    static const call_fate fates[] = {FATE_KILL_BEFORE, FATE_KILL_AMID, FATE_KILL_AFTER};
    size_t trials = 0, old = 0, new = 0, left = 0;
    scenes s;
    (void)state;

    scenes_open(&s, THREADS_1);
    for (size_t i = 0; i < N_SAVES; i++) {
        scene_kind kind = saves[i];
        scene_target none = kind == SAVE_NEW ? TARGET_NONE : TARGET_OLD, last = none;
        char is_write[256];
        size_t before = trials, n;
        if (!scene_is_possible(kind))
            continue;
        n = calls_of(&s, kind, is_write, sizeof is_write);
        for (size_t at = 0; at < n; at++)
            for (int f = 0; f < 3; f++) {
                scene_target target;
                if (fates[f] == FATE_KILL_AMID && !is_write[at])
                    continue;
                scene_begin(&s, kind);
                assert_int_equal(run_killed(&s, kind, (long)at, fates[f]), 1);
                target = scene_target_of(&s, kind);
                if (target != none && target != TARGET_NEW)
                    fail_msg("%s, killed at call %zu: target %d", scene_names[kind], at,
                             (int)target);
                assert_true(last == none || target == TARGET_NEW); /* and stays so */
                last = target;
                trials++;
                old += target != TARGET_NEW;
                new += target == TARGET_NEW;
                left += scene_temporaries() > 0;
                expect_ok(s.cache, scene_run(&s, kind)); /* the next save */
                assert_true(scene_end(&s, kind, KVT_OK, 0) == TARGET_NEW);
            }
        assert_true(last == TARGET_NEW);
        scene_begin(&s, kind);
        assert_int_equal(run_killed(&s, kind, (long)n, FATE_KILL_BEFORE), 0);
        print_message("%-24s %3zu system calls, %3zu kills\n", scene_names[kind], n,
                      trials - before);
    }
    print_message("kills: %zu; then the old file: %zu, the new one: %zu, any other: 0; "
                  "temporaries left: %zu, removed by the next save: %zu\n",
                  trials, old, new, left, left);
    scenes_close(&s);
}

/* In place is not atomic: a part of a file, which is refused. */
static void test_kills_in_place(void **state)
{
    static const call_fate fates[] = {FATE_KILL_BEFORE, FATE_KILL_AMID, FATE_KILL_AFTER};
    size_t of[TARGET_OTHER + 1] = {0}, n;
    char is_write[256];
    scenes s;
    (void)state;

    scenes_open(&s, THREADS_1);
    n = calls_of(&s, SAVE_IN_PLACE, is_write, sizeof is_write);
    for (size_t at = 0; at < n; at++)
        for (int f = 0; f < 3; f++) {
            scene_begin(&s, SAVE_IN_PLACE);
            assert_int_equal(run_killed(&s, SAVE_IN_PLACE, (long)at, fates[f]), 1);
            of[scene_target_of(&s, SAVE_IN_PLACE)]++;
        }
    print_message("in place: %zu kills; old %zu, new %zu, refused %zu, any other: %zu\n", 3 * n,
                  of[TARGET_OLD], of[TARGET_NEW], of[TARGET_PART],
                  of[TARGET_OTHER] + of[TARGET_NONE]);
    assert_true(of[TARGET_OLD] && of[TARGET_NEW] && of[TARGET_PART]);
    assert_int_equal(of[TARGET_OTHER] + of[TARGET_NONE], 0);
    scene_begin(&s, SAVE_NEW);
    scenes_close(&s);
}

/* ---- the machine stops ---- */

enum { MOST_WRITES = 64, SECTOR = 512 };

/* A part of a write that a disk writes as a whole: a sector, or more where there are too many. */
typedef struct write_at {
    size_t begin, n;
    const unsigned char *data;
    int synced;
} write_at;

/* What a save has done so far, and what of it must be on the disk. */
typedef struct disk {
    write_at writes[MOST_WRITES]; /* to the new file */
    size_t n_writes, size, part;
    int truncated, renamed, rename_synced, in_place;
} disk;

typedef struct verdicts {
    size_t states, old, new, refused, wrong; /* refused: neither, and a load says so */
} verdicts;

/* Do one recorded call. */
static void apply(disk *d, const call *c)
{
    if (c->kind == CALL_WRITE && c->role == ROLE_OUT) {
        for (size_t at = 0; at < c->n; at += d->part) {
            write_at *w = &d->writes[d->n_writes++];
            assert_true(d->n_writes <= MOST_WRITES);
            w->begin = d->size;
            w->n = c->n - at < d->part ? c->n - at : d->part;
            w->data = c->data + at;
            w->synced = 0;
            d->size += w->n;
        }
    } else if (c->kind == CALL_FTRUNCATE) {
        d->truncated = 1;
    } else if (c->kind == CALL_FSYNC && c->role == ROLE_OUT) {
        for (size_t i = 0; i < d->n_writes; i++)
            d->writes[i].synced = 1;
    } else if (c->kind == CALL_FSYNC && c->role == ROLE_FOLDER) {
        d->rename_synced = d->renamed;
    } else if (c->kind == CALL_RENAME) {
        d->renamed = 1;
    }
}

/*
 * The new file where the parts in `lost` (bits) did not reach the disk; what was not written is
 * zeros.
 */
static void build(const disk *d, uint64_t lost, unsigned char *to)
{
    memset(to, 0, d->size);
    for (size_t i = 0; i < d->n_writes; i++)
        if (d->writes[i].synced || !(lost >> i & 1))
            memcpy(to + d->writes[i].begin, d->writes[i].data, d->writes[i].n);
}

/* The target holds this. */
static void judge(scenes *s, const bytes *whole, const unsigned char *data, size_t n,
                  int must_be_new, int may_be_part, verdicts *v)
{
    v->states++;
    if (n == whole->n && memcmp(data, whole->data, n) == 0) {
        v->new ++;
    } else if (must_be_new || !may_be_part) {
        v->wrong++;
    } else {
        kvt_seq *seq = model_seq(s->cache);
        kvt_status status = load_bytes(seq, data, n, NULL);
        v->refused += status != KVT_OK;
        v->wrong += status == KVT_OK;
        kvt_seq_destroy(seq);
    }
}

/* All sizes and lost writes of the new file, where its name is the target's. */
static void new_file_states(scenes *s, const disk *d, const bytes *whole, int must_be_new,
                            int may_be_part, rng *r, verdicts *v)
{
    unsigned char *data = malloc(d->size + 1);
    size_t open = 0, unsynced[MOST_WRITES];
    uint64_t sets;

    assert_non_null(data);
    for (size_t i = 0; i < d->n_writes; i++)
        if (!d->writes[i].synced)
            unsynced[open++] = i;
    sets = open <= 10 ? (uint64_t)1 << open : 2 * open + 500; /* each, all behind, at random */
    for (uint64_t set = 0; set < sets; set++) {
        uint64_t lost = 0, chosen = open <= 10        ? set
                                    : set < open      ? (uint64_t)1 << set
                                    : set + 1 == sets ? 0
                                    : set < 2 * open  ? ~(uint64_t)0 << (set - open)
                                                      : rng_next(r);
        size_t least = 0, sizes[3];
        for (size_t i = 0; i < open; i++)
            lost |= (chosen >> i & 1) << unsynced[i];
        for (size_t i = 0; i < d->n_writes; i++)
            if (d->writes[i].synced)
                least = d->writes[i].begin + d->writes[i].n;
        build(d, lost, data);
        /* As long as it was made; cut behind the last write that is there; amid what is not. */
        sizes[0] = d->size;
        sizes[1] = least;
        for (size_t i = 0; i < d->n_writes; i++)
            if (!(lost >> i & 1))
                sizes[1] = d->writes[i].begin + d->writes[i].n;
        sizes[2] = least + (size_t)rng_below(r, (uint32_t)(d->size - least) + 1);
        for (int i = 0; i < (open ? 3 : 1); i++)
            judge(s, whole, data, sizes[i], must_be_new, may_be_part, v);
    }
    free(data);
}

/* The states that a stop at this point may leave. */
static void states(scenes *s, const disk *d, const bytes *whole, int has_answered, int syncs,
                   rng *r, verdicts *v)
{
    if (!d->in_place && !d->rename_synced) { /* the old name may still be in force */
        v->states++;
        v->old++;
        if (has_answered && syncs)
            v->wrong++;
    }
    if (d->in_place && !d->truncated) {
        v->states++;
        v->old++;
        return;
    }
    if (d->in_place || d->renamed) /* or the new one */
        new_file_states(s, d, whole, has_answered && syncs, d->in_place || !syncs, r, v);
}

typedef enum left_out { NOTHING, FILE_SYNC, FOLDER_SYNC, RENAME_FIRST } left_out;

/* Record a save and build all states; `without`: as if the save did not make that call. */
static verdicts replay(scenes *s, scene_kind kind, int syncs, left_out without)
{
    call_plan plan = {-1, FATE_NONE, 0, 0, 0, 0, 1};
    kvt_save_options options;
    rng r = {11};
    verdicts v;
    disk d;
    const call *made;
    bytes whole;
    size_t n, i, writes = 0;

    memset(&v, 0, sizeof v);
    memset(&d, 0, sizeof d);
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.no_fsync = !syncs;
    options.in_place = kind == SAVE_IN_PLACE;
    d.in_place = kind == SAVE_IN_PLACE;
    scene_begin(s, kind);
    calls_arm(&plan);
    expect_ok(s->cache, syncs && kind != SAVE_IN_PLACE
                            ? scene_run(s, kind)
                            : kvt_seq_save(s->full, scene_path(FILE_TARGET), &options));
    calls_disarm();
    whole = slurp(scene_path(FILE_TARGET));
    made = calls_made(&n);
    d.part = whole.n / (MOST_WRITES - 16) + 1; /* each write begins a part */
    d.part = d.part < SECTOR ? SECTOR : d.part;
    for (i = 0; i <= n; i++) {
        states(s, &d, &whole, i == n, syncs, &r, &v);
        if (i == n)
            break;
        if (without == FILE_SYNC && made[i].kind == CALL_FSYNC && made[i].role == ROLE_OUT)
            continue;
        if (without == FOLDER_SYNC && made[i].kind == CALL_FSYNC && made[i].role == ROLE_FOLDER)
            continue;
        if (without == RENAME_FIRST && made[i].kind == CALL_FSYNC && made[i].role == ROLE_OUT) {
            d.renamed = 1; /* before it is synced */
            states(s, &d, &whole, 0, syncs, &r, &v);
        }
        writes += made[i].kind == CALL_WRITE;
        apply(&d, &made[i]);
    }
    assert_true(d.size == whole.n && writes > 0);
    bytes_free(&whole);
    return v;
}

static void test_power_cuts(void **state)
{
    static const char *const left_outs[] = {"", "without the file's fsync",
                                            "without the folder's fsync",
                                            "with the rename before the fsync"};
    verdicts all, v, broken[4];
    scenes s;
    (void)state;

    memset(&all, 0, sizeof all);
    memset(broken, 0, sizeof broken);
    scenes_open(&s, THREADS_1);
    for (size_t i = 0; i < N_SAVES; i++) {
        if (!scene_is_possible(saves[i]))
            continue;
        v = replay(&s, saves[i], 1, NOTHING);
        print_message("%-24s %4zu states: %zu old, %zu new\n", scene_names[saves[i]], v.states,
                      v.old, v.new);
        if (v.wrong || v.refused || v.old + v.new != v.states)
            fail_msg("%s: %zu of %zu states are wrong", scene_names[saves[i]], v.wrong, v.states);
        all.states += v.states;
        for (int without = FILE_SYNC; without <= RENAME_FIRST; without++) { /* would be found */
            v = replay(&s, saves[i], 1, (left_out)without);
            broken[without].states += v.states;
            broken[without].wrong += v.wrong;
            if (v.wrong == 0)
                fail_msg("%s: left out %d, and nothing is wrong", scene_names[saves[i]], without);
        }
    }
    print_message("power cuts: %zu states, each the old file or the new one; the new one once the "
                  "save has answered\n",
                  all.states);
    for (int without = FILE_SYNC; without <= RENAME_FIRST; without++)
        print_message("  %s: wrong in %zu of %zu\n", left_outs[without], broken[without].wrong,
                      broken[without].states);
    /* Without the disk's order there are parts of files: none is loaded. */
    for (int in_place = 0; in_place < 2; in_place++) {
        v = replay(&s, in_place ? SAVE_IN_PLACE : SAVE_OVER, in_place, NOTHING);
        print_message("%s: %zu states: %zu old, %zu new, %zu refused, %zu loaded wrong\n",
                      in_place ? "in place" : "no_fsync", v.states, v.old, v.new, v.refused,
                      v.wrong);
        assert_int_equal(v.wrong, 0);
        assert_true(v.refused > 10);
    }
    scene_begin(&s, SAVE_NEW);
    scenes_close(&s);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(scene_folder, sizeof scene_folder, "test_snapshot_crash-%ld", (long)getpid());
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
        cmocka_unit_test(test_kills),
        cmocka_unit_test(test_kills_in_place),
        cmocka_unit_test(test_power_cuts),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
