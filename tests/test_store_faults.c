/*
 * Each system call and each allocation of a call of the directory store fails in turn: what the
 * call says is what is in the directory then, and its counts are right; the values that were there
 * before are; nothing is left, neither a temporary nor a descriptor; and the next call works.
 * Counts are printed. And a lock that is not let go: how long a call waits, by a clock of the
 * test's.
 *
 * The calls are taken by the linker (call_faults.c). Runs in a folder of its own under the current
 * one. KVT_TEST_QUICK: fewer errors for each call.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* flock */
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "call_faults.h"
#include "store_values.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BOUND = 4500 };
#define STALE "tmp/put-0123456789abcdef"

static char path[64];
static kvt_store s; /* open from scene to scene */

/* The clock of waiting: it stands still in trials, as the seconds that a long turn notes are
   calls. */
static int is_fake;
static int64_t fake_seconds, goes_on_until;
static int64_t set_forward;  /* seconds that the clock of times of use is ahead */
static int runs_on;          /* it does not stand still: a second each time that it is read */
static long touches_at = -1; /* the reading at which somebody uses value 1; < 0: none */
static int has_touched;

typedef enum scene {
    PUT_NEW,
    PUT_FIRST, /* of its folder, and of temporaries */
    PUT_OVER,
    PUT_EVICT,
    PUT_SYNC,
    PUT_UNSURE, /* the state has to be counted anew */
    GET,
    EXISTS,
    REMOVE,
    LIST,
    STATS,
    COLLECT,
    OPEN,
    OPEN_NEW,
    OPEN_LESS, /* with a bound that evicts */
    SCENES
} scene;

static const char *const names[SCENES] = {"put",       "first put",   "put over",   "put, evict",
                                          "put, sync", "put, unsure", "get",        "exists",
                                          "remove",    "list",        "stats",      "collect",
                                          "open",      "open new",    "open, evict"};

static const char *in_folder(const char *name)
{
    static char file[256];
    (void)snprintf(file, sizeof file, "%s/%s", path, name);
    return file;
}

static void spill(const char *name)
{
    FILE *f = fopen(in_folder(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite("stale", 1, 5, f), 5);
    assert_int_equal(fclose(f), 0);
}

static kvt_status open_other(uint64_t max_bytes, uint32_t sync, kvt_store *to)
{
    kvt_directory_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.path = path;
    config.max_bytes = max_bytes;
    config.sync = sync;
    config.error_text = store_error.text;
    config.error_text_bytes = sizeof store_error.text;
    return kvt_store_open_directory(&config, to);
}

static void close_store(void)
{
    if (s.user)
        kvt_store_close(&s);
}

/* Values 1 .. 4 of 1000 bytes, 1 the oldest; the bound has room for 500 more. */
static void begin(scene kind)
{
    kvt_store_key keys[8];

    for (size_t i = 0; i < 8; i++)
        keys[i] = key_of(i);
    if (kind == OPEN_NEW) {
        close_store();
        folder_remove(path);
        return;
    }
    close_store(); /* with another one's settings, and of another folder */
    store_ok(open_other(BOUND, 0, &s));
    store_ok(put_value(&s, 5, 1, 100)); /* its folder is there */
    store_ok(s.remove(s.user, keys, 8, &store_error));
    for (uint64_t i = 1; i < 5; i++)
        store_ok(put_value(&s, i, 1, 1000));
    if (kind == PUT_SYNC) {
        close_store();
        store_ok(open_other(BOUND, 1, &s));
    }
    if (kind == PUT_FIRST) {
        char file[256];
        folder_file(path, 5, file, sizeof file);
        *strrchr(file, '/') = 0;
        (void)rmdir(file);
        (void)rmdir(in_folder("tmp"));
    }
    if (kind == PUT_UNSURE || kind == COLLECT || kind == OPEN || kind == OPEN_LESS)
        spill(STALE);
    if (kind == PUT_UNSURE) { /* another sum */
        int fd = open(in_folder("kvtile-store"), O_RDWR);
        unsigned char byte;
        assert_true(pread(fd, &byte, 1, 71) == 1);
        byte ^= 1;
        assert_true(pwrite(fd, &byte, 1, 71) == 1);
        assert_int_equal(close(fd), 0);
    }
}

typedef struct result {
    kvt_status status;
    uint64_t seen; /* get, list, exists: bits of numbers */
    kvt_store_stats stats;
    collector c;
    kvt_store other;
} result;

static int on_entry(void *user, const kvt_store_entry *entry)
{
    result *r = user;
    for (uint64_t i = 0; i < 8; i++) {
        kvt_store_key key = key_of(i);
        if (memcmp(&key, &entry->key, sizeof key) == 0)
            r->seen |= (uint64_t)1 << i;
    }
    return 0;
}

static void run(scene kind, result *r)
{
    static unsigned char data[1000];
    kvt_store_key keys[8];
    uint64_t number = kind == PUT_OVER ? 2 : 5;
    size_t bytes = kind == PUT_OVER || kind == PUT_EVICT ? 1000 : 400, n_put = 9;
    kvt_store_part parts[2] = {{data, 100}, {data + 100, bytes - 100}};
    kvt_store_value value = {parts, 2, bytes};
    kvt_store_receiver receiver;
    uint8_t found[8];

    for (size_t i = 0; i < 8; i++)
        keys[i] = key_of(i);
    receiver = collector_receiver(&r->c);
    switch (kind) {
    case GET: r->status = s.get(s.user, keys + 1, 4, &receiver, &store_error); break;
    case EXISTS:
        r->status = s.exists(s.user, keys, 8, found, &store_error);
        for (size_t i = 0; r->status == KVT_OK && i < 8; i++)
            r->seen |= (uint64_t)found[i] << i;
        break;
    case REMOVE: r->status = s.remove(s.user, keys + 1, 2, &store_error); break;
    case LIST: r->status = s.list(s.user, on_entry, r, &store_error); break;
    case STATS: r->status = s.stats(s.user, &r->stats, &store_error); break;
    case COLLECT: r->status = s.collect(s.user, &store_error); break;
    case OPEN: r->status = open_other(BOUND, 0, &r->other); break;
    case OPEN_NEW: r->status = open_other(BOUND, 1, &r->other); break;
    case OPEN_LESS: r->status = open_other(2500, 0, &r->other); break;
    default:
        value_fill(number, 2, data, bytes);
        r->status = s.put(s.user, &keys[number], &value, 1, &n_put, &store_error);
        assert_true(n_put <= 1 && (n_put == 1 || r->status != KVT_OK));
    }
}

/* ---- a trial ---- */

typedef struct tally {
    size_t trials, failed, well;
} tally;

typedef struct fault {
    scene kind;
    long at;
    call c;
    call_plan plan;
} fault;

static void wrong(const fault *f, const char *what, kvt_status status)
{
    fail_msg("%s, call %ld (%s of %s), fate %d, error %d, %d times: %s; status %d, \"%s\"",
             names[f->kind], f->at, call_name(f->c.kind), f->c.path, (int)f->plan.fate,
             f->plan.error, f->plan.times, what, (int)status, store_error.text);
}

static int is_put(scene kind)
{
    return kind <= PUT_UNSURE;
}

/* What has to hold whatever has failed. */
static void check(const fault *f, result *r, const char *said)
{
    kvt_status status = r->status;
    folder_state folder = folder_look(path);
    uint64_t there = 0, lost = 0; /* values that could not be read: they are removed */
    int64_t five, two;
    int damages = f->kind == GET && f->c.kind == CALL_READ && f->plan.fate == FATE_FAIL &&
                  f->plan.error == EIO;
    int leaves = f->plan.times > 1 || f->kind == PUT_UNSURE || f->kind == COLLECT ||
                 f->kind == OPEN || f->kind == OPEN_LESS;

    if (status != KVT_OK && f->plan.error && !f->plan.counts_memory &&
        !(f->kind == OPEN_NEW &&
          f->plan.error == EACCES) && /* a file to read, which is not there */
        !strstr(said, strerror(f->plan.error)))
        wrong(f, "the text does not say why", status);
    if (f->plan.counts_memory ? status != KVT_OK && status != KVT_ERR_MEMORY
        : f->plan.error == ENOSPC || f->plan.error == EDQUOT
            ? status != KVT_OK && status != (f->kind >= OPEN ? KVT_ERR_IO : KVT_ERR_FULL)
            : status != KVT_OK && status != KVT_ERR_IO)
        wrong(f, "another status", status);
    if (folder.n_unsound || folder.bytes > BOUND)
        wrong(f, "a value is unsound, or the bound is passed", status);
    if (folder.n_temporaries && !(leaves && folder.n_temporaries == 1))
        wrong(f, "a temporary is left", status);
    for (uint64_t i = 1; i < 6; i++)
        there |= (uint64_t)has_value(&s, i) << i;
    five = get_version(&s, 5);
    two = get_version(&s, 2);
    for (size_t i = 0; damages && status == KVT_OK && i < 4; i++)
        if (!r->c.values[i].n_begun || r->c.values[i].have != r->c.values[i].total)
            lost |= (uint64_t)2 << i;
    if (damages && status == KVT_OK && !lost)
        wrong(f, "a value was got that cannot be read", status);
    if (damages && status != KVT_OK && !f->plan.times)
        wrong(f, "one bad sector fails the others", status);
    if (is_put(f->kind) && f->kind != PUT_OVER) {
        if (status == KVT_OK ? five != 2 : five != -1 && !(f->kind == PUT_SYNC && five == 2))
            wrong(f, "the value put", status);
        if ((there & 0x1c) != 0x1c || (f->kind != PUT_EVICT && !(there & 2)))
            wrong(f, "others", status);
        if (f->kind == PUT_EVICT && status == KVT_OK && there != 0x3c)
            wrong(f, "another one was evicted", status);
    } else if (f->kind == PUT_OVER) {
        if (there != 0x1e || two != (status == KVT_OK ? 2 : 1))
            wrong(f, "the value put over", status);
    } else if (f->kind == REMOVE) {
        if (status == KVT_OK ? there != 0x18 : (there & 0x18) != 0x18)
            wrong(f, "what is removed", status);
    } else if (f->kind == OPEN_LESS) {
        if ((there & 0x18) != 0x18)
            wrong(f, "what is evicted", status);
    } else if (f->kind != OPEN_NEW && there != (0x1e & ~lost)) {
        wrong(f, "values are gone", status);
    }
    if (status == KVT_OK && (f->kind == LIST || f->kind == EXISTS) && r->seen != 0x1e)
        wrong(f, "what is there", status);
    if (status == KVT_OK && f->kind == STATS && (r->stats.n_values != 4 || r->stats.bytes != 4000))
        wrong(f, "the numbers", status);
    for (size_t i = 0; f->kind == GET && i < 4; i++) {
        const got_value *v = &r->c.values[i];
        kvt_store_key key = key_of(i + 1);
        int whole = v->n_begun && v->have == v->total;
        if (v->is_wrong || (whole && !value_is_sound(&key, v->data, (size_t)v->total, NULL)) ||
            (!whole && status == KVT_OK && f->plan.fate != FATE_END && !damages))
            wrong(f, "what was got", status);
    }
    folder_agrees(path, &s);
}

static void trial(const fault *f, tally *t)
{
    int descriptors;
    char said[sizeof store_error.text];
    result r;

    begin(f->kind);
    memset(&r, 0, sizeof r);
    collector_make(&r.c, 4);
    descriptors = count_descriptors();
    store_error.text[0] = 0;
    is_fake = 1;
    calls_arm(&f->plan);
    run(f->kind, &r);
    calls_disarm();
    is_fake = 0;
    memcpy(said, store_error.text, sizeof said);
    if (!calls_met())
        wrong(f, "there is no such call", r.status);
    if (r.other.user)
        kvt_store_close(&r.other);
    if (count_descriptors() != descriptors)
        wrong(f, "a descriptor is left", r.status);
    if (f->kind == OPEN_NEW) /* what a failure leaves can be opened */
        store_ok(open_other(BOUND, 0, &s));
    check(f, &r, said);
    store_ok(put_value(&s, 6, 1, 100));
    store_ok(s.collect(s.user, &store_error));
    assert_int_equal(folder_look(path).n_temporaries, 0);
    folder_agrees(path, &s);
    collector_free(&r.c);
    t->trials++;
    t->failed += r.status != KVT_OK;
    t->well += r.status == KVT_OK;
    if (r.status != KVT_OK && f->plan.error == EINTR &&
        (f->c.kind == CALL_OPEN || f->c.kind == CALL_READ || f->c.kind == CALL_PREAD ||
         f->c.kind == CALL_WRITE || f->c.kind == CALL_PWRITE || f->c.kind == CALL_FSYNC ||
         f->c.kind == CALL_FLOCK || f->c.kind == CALL_CLOSE))
        wrong(f, "is not made again", r.status);
    if (r.status != KVT_OK && f->plan.fate == FATE_SHORT)
        wrong(f, "a short one", r.status);
    if (r.status == KVT_OK && f->kind == PUT_SYNC && f->c.kind == CALL_FSYNC &&
        f->plan.error == EIO)
        wrong(f, "a failed sync", r.status);
}

/* The calls of a scene. */
static call *calls_of(scene kind, int counts_memory, size_t *n)
{
    call_plan plan = {-1, FATE_NONE, 0, 0, 0, 0, 0};
    const call *made;
    call *copy;
    result r;

    begin(kind);
    memset(&r, 0, sizeof r);
    collector_make(&r.c, 4);
    plan.counts_memory = counts_memory;
    is_fake = 1;
    calls_arm(&plan);
    run(kind, &r);
    calls_disarm();
    is_fake = 0;
    store_is(KVT_OK, r.status);
    if (r.other.user)
        kvt_store_close(&r.other);
    collector_free(&r.c);
    made = calls_made(n);
    copy = malloc((*n + 1) * sizeof *copy);
    assert_non_null(copy);
    memcpy(copy, made, *n * sizeof *copy);
    return copy;
}

/* Whether a call answers an error, so that it is tried. */
static int is_apt(call_kind kind, int error)
{
    switch (error) {
    case EINTR: return kind != CALL_READDIR && kind != CALL_OPENDIR && kind != CALL_FSTATAT;
    case EDQUOT:
    case ENOSPC:
        return kind == CALL_OPEN || kind == CALL_WRITE || kind == CALL_PWRITE ||
               kind == CALL_FSYNC || kind == CALL_CLOSE || kind == CALL_RENAME ||
               kind == CALL_MKDIR;
    case EMFILE: return kind == CALL_OPEN || kind == CALL_FCNTL;
    case EACCES:
        return kind == CALL_OPEN || kind == CALL_RENAME || kind == CALL_UNLINK ||
               kind == CALL_FSTATAT || kind == CALL_MKDIR;
    default: return 1;
    }
}

static void test_calls(void **state)
{
    static const int errors[] = {EIO, EINTR, ENOSPC, EDQUOT, EMFILE, EACCES};
    tally all = {0, 0, 0};
    (void)state;

    for (int kind = 0; kind < SCENES; kind++) {
        tally t = {0, 0, 0};
        size_t n;
        call *made = calls_of((scene)kind, 0, &n);
        assert_true(n > 0);
        for (size_t at = 0; at < n; at++) {
            fault f;
            memset(&f, 0, sizeof f);
            f.kind = (scene)kind;
            f.at = f.plan.at = (long)at;
            f.c = made[at];
            f.plan.fate = FATE_FAIL;
            for (size_t e = 0; e < sizeof errors / sizeof errors[0]; e++) {
                if ((is_quick() && e > 2) || !is_apt(made[at].kind, errors[e]))
                    continue;
                f.plan.error = errors[e];
                trial(&f, &t);
            }
            f.plan.error = EIO; /* and all of its kind from then on */
            f.plan.times = 1000;
            trial(&f, &t);
            f.plan.times = 0;
            f.plan.error = 0;
            if (made[at].kind == CALL_READ || made[at].kind == CALL_PREAD ||
                made[at].kind == CALL_WRITE || made[at].kind == CALL_PWRITE) {
                f.plan.fate = FATE_SHORT;
                trial(&f, &t);
            }
            if (made[at].kind == CALL_READ || made[at].kind == CALL_PREAD) {
                f.plan.fate = FATE_END;
                trial(&f, &t);
            }
        }
        print_message("%-12s %3zu calls, %4zu trials: %4zu failed, %4zu went well\n", names[kind],
                      n, t.trials, t.failed, t.well);
        all.trials += t.trials;
        all.failed += t.failed;
        all.well += t.well;
        free(made);
    }
    print_message("%zu trials: %zu failed, %zu went well, none wrong\n", all.trials, all.failed,
                  all.well);
    assert_true(all.failed > 100 && all.well > 100);
    close_store();
    folder_remove(path);
}

static void test_memory(void **state)
{
    size_t n_all = 0;
    (void)state;

    for (int kind = 0; kind < SCENES; kind++) {
        tally t = {0, 0, 0};
        size_t n;
        call *made = calls_of((scene)kind, 1, &n);
        for (size_t at = 0; at < n; at++) {
            fault f;
            memset(&f, 0, sizeof f);
            f.kind = (scene)kind;
            f.at = f.plan.at = (long)at;
            f.c = made[at];
            f.plan.fate = FATE_FAIL;
            f.plan.error = ENOMEM;
            f.plan.counts_memory = 1;
            if (f.kind == GET && made[at].n <= 1001) /* of the test's receiver */
                continue;
            trial(&f, &t);
            n_all++;
        }
        free(made);
    }
    print_message("%zu allocations\n", n_all);
    assert_true(n_all >= 6);
    close_store();
    folder_remove(path);
}

/* ---- the lock ---- */

int __real_nanosleep(const struct timespec *pause, struct timespec *left);
int __wrap_nanosleep(const struct timespec *pause, struct timespec *left);
int __real_clock_gettime(clockid_t clock, struct timespec *to);
int __wrap_clock_gettime(clockid_t clock, struct timespec *to);

/* Who has the lock goes on. */
static void take_turn(void)
{
    static uint64_t turn;
    int fd = open(in_folder("kvtile-store"), O_WRONLY);
    turn++;
    if (pwrite(fd, &turn, 8, 56) != 8)
        fake_seconds = 1000;
    (void)close(fd);
}

/* A pause of 20 ms. Who has the lock goes on until then. */
int __wrap_nanosleep(const struct timespec *pause, struct timespec *left)
{
    static int part;
    if (!is_fake)
        return __real_nanosleep(pause, left);
    if (++part % 50)
        return 0;
    fake_seconds++;
    if (fake_seconds <= goes_on_until)
        take_turn();
    return 0;
}

int __wrap_clock_gettime(clockid_t clock, struct timespec *to)
{
    int answer = __real_clock_gettime(clock, to);
    if (clock == CLOCK_REALTIME)
        to->tv_sec += (time_t)set_forward;
    if (is_fake && clock == CLOCK_MONOTONIC) {
        if (touches_at >= 0 && touches_at-- == 0) {
            char file[256];
            folder_file(path, 1, file, sizeof file);
            has_touched = utimensat(AT_FDCWD, file, NULL, 0) == 0;
        }
        fake_seconds += runs_on;
        to->tv_sec = (time_t)fake_seconds;
        to->tv_nsec = 0;
    }
    return answer;
}

static void test_wait(void **state)
{
    static const int64_t until[] = {0, 5, 25, 100000}, waits[] = {10, 15, 35, 60};
    int fd;
    (void)state;

    begin(PUT_NEW);
    fd = open(in_folder("kvtile-store"), O_RDWR);
    for (size_t i = 0; i < 4; i++) {
        kvt_store_key key = key_of(1);
        kvt_status status;
        assert_int_equal(flock(fd, LOCK_EX), 0);
        fake_seconds = 0;
        goes_on_until = until[i];
        is_fake = 1;
        status = i % 2 ? s.remove(s.user, &key, 1, &store_error) : put_value(&s, 5, 2, 100);
        is_fake = 0;
        assert_int_equal(status, KVT_ERR_IO);
        assert_non_null(strstr(store_error.text, "another process has the store locked"));
        if (fake_seconds < waits[i] || fake_seconds > waits[i] + 2)
            fail_msg("it has waited for %lld s", (long long)fake_seconds);
        assert_int_equal(folder_look(path).n_temporaries, 0);
        assert_int_equal(get_version(&s, 1), 1); /* without the lock */
        for (size_t again = 0; again < 3 && i < 3; again++) {
            /* Now it is known that who has the lock does not go on; then it does; then it has not
               for long. */
            const int64_t more[] = {0, 15, 10};
            int64_t start = fake_seconds += again == 2 ? 60 : 0;
            goes_on_until = again == 1 ? fake_seconds + 5 : 0;
            if (again == 1)
                take_turn();
            is_fake = 1;
            status = put_value(&s, 5, 2, 100);
            is_fake = 0;
            assert_int_equal(status, KVT_ERR_IO);
            if (fake_seconds < start + more[again] || fake_seconds > start + more[again] + 2)
                fail_msg("%zu: it has waited for %lld s", again, (long long)(fake_seconds - start));
        }
        for (size_t again = 0; again < 3 && i == 3; again++) {
            /* One that goes on, and has had it for so long: for a minute that is not waited for. */
            int64_t start = fake_seconds += again == 2 ? 60 : 0;
            is_fake = 1;
            status = put_value(&s, 5, 2, 100);
            is_fake = 0;
            assert_int_equal(status, KVT_ERR_IO);
            if (fake_seconds > start + 62 || (fake_seconds > start + 4) != (again == 2))
                fail_msg("%zu: it has waited for %lld s", again, (long long)(fake_seconds - start));
        }
        assert_int_equal(flock(fd, LOCK_UN), 0);
        store_ok(put_value(&s, 6, 1, 100));
        folder_agrees(path, &s);
        if (i == 3) { /* and that is over when it has been had */
            assert_int_equal(flock(fd, LOCK_EX), 0);
            int64_t start = fake_seconds;
            is_fake = 1;
            assert_int_equal(put_value(&s, 5, 2, 100), KVT_ERR_IO);
            is_fake = 0;
            assert_in_range(fake_seconds - start, 59, 62);
            assert_int_equal(flock(fd, LOCK_UN), 0);
        }
    }
    (void)close(fd);
    close_store();
    folder_remove(path);
}

/* A turn that takes long says so every second: by a write after each value of a scan. */
static void test_progress(void **state)
{
    (void)state;
    for (runs_on = 0; runs_on < 2; runs_on++) {
        size_t n, writes = 0;
        call *made = calls_of(PUT_EVICT, 0, &n);
        for (size_t i = 0; i < n; i++)
            writes += made[i].kind == CALL_PWRITE;
        if (runs_on ? writes < 2 + 4 : writes != 2)
            fail_msg("%zu writes", writes);
        free(made);
    }
    runs_on = 0;
    close_store();
    folder_remove(path);
}

/* Who can write nothing there cannot say so: it counts without the lock. */
static void test_count_unlocked(void **state)
{
    call_plan plan = {-1, FATE_NONE, 0, 0, 0, 0, 0};
    result r;
    size_t n;
    const call *made;
    int locked = 0, n_counted = 0;
    (void)state;

    begin(PUT_UNSURE);
    memset(&r, 0, sizeof r);
    calls_arm(&plan);
    run(OPEN, &r);
    calls_disarm();
    kvt_store_close(&r.other);
    made = calls_made(&n);
    for (plan.at = 0; strcmp(made[plan.at].path, "kvtile-store") != 0; plan.at++)
        assert_true(plan.at < (long)n);
    plan.fate = FATE_FAIL;
    plan.error = EACCES;
    begin(PUT_UNSURE);
    calls_arm(&plan);
    run(OPEN, &r);
    calls_disarm();
    store_ok(r.status);
    made = calls_made(&n);
    for (size_t i = 0; i < n; i++) {
        locked = made[i].kind == CALL_FLOCK ? (made[i].flags & LOCK_EX) != 0 : locked;
        n_counted += made[i].kind == CALL_FSTATAT;
        assert_true(made[i].kind != CALL_READDIR || !locked);
    }
    assert_int_equal(n_counted, 4);
    folder_agrees(path, &r.other);
    kvt_store_close(&r.other);
    close_store();
    folder_remove(path);
}

/* A value that is used while a put is about to evict it stays, and the next one goes. */
static void test_used_meanwhile(void **state)
{
    size_t n_touched = 0;
    long at = 0;
    (void)state;

    do {
        result r;
        memset(&r, 0, sizeof r);
        begin(PUT_EVICT);
        is_fake = 1;
        has_touched = 0;
        touches_at = at++;
        run(PUT_EVICT, &r);
        is_fake = 0;
        store_is(KVT_OK, r.status);
        n_touched += (size_t)has_touched;
        assert_true(has_value(&s, 1) == has_touched);
        assert_true(has_value(&s, 2) == !has_touched);
        assert_true(has_value(&s, 3) && has_value(&s, 4) && has_value(&s, 5));
        folder_agrees(path, &s);
    } while (touches_at < 0);
    touches_at = -1;
    print_message("used at %zu points of an eviction\n", n_touched);
    assert_true(n_touched > 3);
    close_store();
    folder_remove(path);
}

/* With sync: the value before it gets its name, the folders after it. */
static void test_syncs(void **state)
{
    size_t n, before = 0, after = 0, renames = 0;
    call *made = calls_of(PUT_SYNC, 0, &n);
    (void)state;

    for (size_t i = 0; i < n; i++) {
        renames += made[i].kind == CALL_RENAME;
        if (made[i].kind == CALL_FSYNC)
            *(renames ? &after : &before) += 1;
        assert_true(made[i].kind != CALL_FSYNC || renames || made[i].role == ROLE_OUT);
    }
    assert_true(renames == 1 && before == 1 && after == 2);
    free(made);
    close_store();
    folder_remove(path);
}

/* How many calls of an armed run are fsyncs. */
static size_t count_syncs(void)
{
    size_t n, syncs = 0;
    const call *made = calls_made(&n);
    for (size_t i = 0; i < n; i++)
        syncs += made[i].kind == CALL_FSYNC;
    return syncs;
}

/* A bound that is changed is on the disk before it counts, where the store syncs. */
static void test_syncs_the_bound(void **state)
{
    static const call_plan plan = {-1, FATE_NONE, 0, 0, 0, 0, 0};
    (void)state;
    begin(OPEN_NEW);
    store_ok(open_other(BOUND, 0, &s));
    close_store();
    for (uint32_t sync = 0; sync < 2; sync++) {
        calls_arm(&plan);
        store_ok(open_other((2 + sync) * BOUND, sync, &s));
        calls_disarm();
        assert_int_equal(count_syncs(), 2 * sync); /* the folder that has it; the state */
        close_store();
    }
    folder_remove(path);
}

/* With sync: entries of the directory that others have removed, or made without sync. */
static void test_syncs_again(void **state)
{
    static const call_plan plan = {-1, FATE_NONE, 0, 0, 0, 0, 0};
    kvt_store_key key = key_of(5);
    result r;
    (void)state;

    begin(OPEN_NEW); /* there is nothing */
    store_ok(open_other(0, 0, &s));
    close_store();
    calls_arm(&plan);
    store_ok(open_other(0, 1, &s));
    calls_disarm();
    assert_int_equal(count_syncs(), 1); /* the folder that has the directory */
    for (int turn = 0; turn < 4; turn++) {
        char file[256];
        store_ok(s.remove(s.user, &key, 1, &store_error));
        folder_file(path, 5, file, sizeof file);
        *strrchr(file, '/') = 0;
        if (turn == 2)
            assert_int_equal(rmdir(file), 0);
        if (turn == 3)
            assert_int_equal(unlink(in_folder("kvtile-store")), 0);
        memset(&r, 0, sizeof r);
        calls_arm(&plan);
        run(PUT_SYNC, &r);
        calls_disarm();
        store_ok(r.status);
        /* The value, its folder, and where there is a new entry the directory. */
        assert_int_equal(count_syncs(), turn == 1 ? 2 : 3);
    }
    close_store();
    folder_remove(path);
}

static struct timespec time_of_use(const kvt_store_key *key)
{
    char name[80];
    struct stat status;
    int n = snprintf(name, sizeof name, "%02x/", key->bytes[0]);
    for (size_t i = 0; i < sizeof key->bytes; i++)
        n += snprintf(name + n, sizeof name - (size_t)n, "%02x", key->bytes[i]);
    assert_int_equal(stat(in_folder(name), &status), 0);
    return status.st_mtim;
}

/* The clock is set back: the questions from before make room for those that come. (What is noted of
   a question is its time, which the gets that follow leave to the values.) */
static void test_clock(void **state)
{
    kvt_store_key keys[8];
    kvt_store_part part = {"value", 5};
    const kvt_store_value values[] = {{&part, 1, 5}, {&part, 1, 5}, {&part, 1, 5}, {&part, 1, 5}};
    kvt_store_receiver receiver;
    struct timespec asked[4];
    uint8_t found[4];
    size_t n_put;
    collector c;
    (void)state;

    memset(keys, 0, sizeof keys);
    for (uint8_t i = 0; i < 8; i++) /* the bytes that tell where a note is are the same */
        keys[i].bytes[1] = i;
    begin(OPEN_NEW);
    store_ok(open_other(0, 0, &s));
    store_ok(s.put(s.user, keys + 4, values, 4, &n_put, &store_error));
    set_forward = 86400;
    store_ok(s.exists(s.user, keys, 4, found, &store_error));
    set_forward = 0;
    store_ok(s.exists(s.user, keys + 4, 4, found, &store_error));
    for (size_t i = 0; i < 4; i++)
        asked[i] = time_of_use(&keys[4 + i]);
    set_forward = 2;
    collector_make(&c, 4);
    receiver = collector_receiver(&c);
    store_ok(s.get(s.user, keys + 4, 4, &receiver, &store_error));
    set_forward = 0;
    collector_free(&c);
    for (size_t i = 0; i < 4; i++) {
        struct timespec used = time_of_use(&keys[4 + i]);
        assert_memory_equal(&used, &asked[i], sizeof used);
    }
    close_store();
    folder_remove(path);
}

/* ---- what was asked for lately ---- */

/* Ask for value 4, which is there, and for n - 1 others; the time that it gets. */
static struct timespec ask(size_t n, uint8_t first)
{
    kvt_store_key *keys = calloc(n, sizeof *keys), four = key_of(4);
    uint8_t *found = malloc(n);
    struct timespec time;

    assert_true(keys && found && n > 1);
    keys[0] = four;
    for (size_t i = 1; i < n; i++) {
        keys[i].bytes[0] = first;
        for (size_t digit = 0; digit < 3; digit++) /* the last one is of the note's name, too */
            keys[i].bytes[1 + digit] = (uint8_t)(i >> 8 * digit);
    }
    store_ok(s.exists(s.user, keys, n, found, &store_error));
    assert_true(found[0] && !found[1]);
    time = time_of_use(&four);
    free(keys);
    free(found);
    return time;
}

/* Put what was number i of such a question: 1 where it gets the time of it. */
static int has_time_of(struct timespec asked, size_t i, uint8_t first)
{
    kvt_store_part part = {"value", 5};
    const kvt_store_value value = {&part, 1, 5};
    struct timespec used;
    kvt_store_key key;
    size_t n_put;
    int64_t before;

    memset(&key, 0, sizeof key);
    key.bytes[0] = first;
    for (size_t digit = 0; digit < 3; digit++)
        key.bytes[1 + digit] = (uint8_t)(i >> 8 * digit);
    store_ok(s.put(s.user, &key, &value, 1, &n_put, &store_error));
    used = time_of_use(&key);
    store_ok(s.remove(s.user, &key, 1, &store_error));
    before = ((int64_t)asked.tv_sec - used.tv_sec) * 1000000000 + asked.tv_nsec - used.tv_nsec;
    if (before == (int64_t)i * 1000)
        return 1;
    assert_true(before < -1000); /* of its own, later */
    return 0;
}

/* For a minute for gets, an hour for puts; of the last 256 questions of several keys, and of so
   many keys as store.h says. */
static void test_asked(void **state)
{
    enum { QUESTIONS = 256, KEYS = 262144 };
    kvt_store_key four = key_of(4);
    struct timespec asked, used;
    uint8_t found;
    (void)state;

    begin(OPEN_NEW);
    store_ok(open_other(0, 0, &s));
    store_ok(put_value(&s, 4, 1, 100));
    asked = ask(3, 200);
    set_forward = 58;
    assert_int_equal(get_version(&s, 4), 1);
    used = time_of_use(&four);
    assert_memory_equal(&used, &asked, sizeof used);
    set_forward = 60;
    assert_int_equal(get_version(&s, 4), 1);
    used = time_of_use(&four);
    assert_true(used.tv_sec >= asked.tv_sec + 60);
    set_forward = 3598;
    assert_true(has_time_of(asked, 2, 200));
    set_forward = 3600;
    assert_true(!has_time_of(asked, 2, 200));
    set_forward = 0;

    asked = ask(3, 200);
    for (size_t i = 0; i < QUESTIONS - 1; i++) {
        store_ok(s.exists(s.user, &four, 1, &found, &store_error)); /* no question of several */
        (void)ask(2, 201);
    }
    assert_true(has_time_of(asked, 1, 200));
    (void)ask(2, 201);
    assert_true(!has_time_of(asked, 1, 200));

    asked = ask(3, 200); /* with those before it that are still there */
    for (size_t i = 0; i < QUESTIONS - 2; i++)
        (void)ask(2, 201);
    (void)ask(KEYS - 3 - 2 * (QUESTIONS - 2), 202);
    assert_true(has_time_of(asked, 2, 200));
    (void)ask(2, 201); /* in place of the oldest one, which is this */
    assert_true(!has_time_of(asked, 2, 200));
    asked = ask(3, 200);
    (void)ask(KEYS - 2, 202);
    assert_true(!has_time_of(asked, 2, 200));
    asked = ask(KEYS + 1, 203); /* the newest one stays, however long */
    assert_true(has_time_of(asked, KEYS, 203));
    close_store();
    folder_remove(path);
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(path, sizeof path, "test_store_faults-%ld", (long)getpid());
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_calls),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_wait),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_used_meanwhile),
        cmocka_unit_test(test_syncs),
        cmocka_unit_test(test_syncs_the_bound),
        cmocka_unit_test(test_syncs_again),
        cmocka_unit_test(test_clock),
        cmocka_unit_test(test_asked),
        cmocka_unit_test(test_count_unlocked),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
