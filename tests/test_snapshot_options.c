/*
 * Where a snapshot goes and comes from besides files, how large it is, which tokens and layers it
 * has, the caller's pieces, progress; and all that options must not say.
 */
#include "snapshot_options.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>

#include <xxhash.h>

/* ---- sizes ---- */

/* Options of one kind; pieces and types are static. */
static kvt_save_options variant(const subject *s, int i, uint64_t length)
{
    static const uint32_t layers[] = {0, 2};
    static const kvt_snapshot_piece pieces[] = {
        {"a", "0123456789", 10}, {"name of a piece", NULL, 0}, {"c", "01234567", 8}};
    static const kvt_type i4[] = {KVT_TYPE_I4, KVT_TYPE_I4}, f16[] = {KVT_TYPE_F16, KVT_TYPE_F16};
    kvt_save_options o = saves((uint32_t)(i % 3));
    switch (i / 3) {
    case 1: o.key = a_key; break;
    case 2: o.pieces = pieces, o.n_pieces = 3; break;
    case 3: o.n_tokens = length - length / 9; break;
    case 4: o.layers = layers, o.n_layers = 2; break;
    case 5:
        o.convert = 1;
        o.v_types = s->groups[0].flags & KVT_GROUP_V_IN_K ? f16 : i4;
        o.k_types = f16;
        break;
    case 6: o.first_token = length / 64 * 64; break;
    default: break;
    }
    return o;
}

enum { VARIANTS = 21 };

/* checkpoints: those of the sequence are in the file. */
static void check_bound(const subject *s, const kvt_seq *seq, const kvt_save_options *o,
                        int checkpoints, int what)
{
    bytes file;
    uint64_t bound = 7;
    size_t n = 7;
    unsigned char *memory;

    if (kvt_seq_save_bound(seq, &bound, o) == KVT_ERR_STATE) { /* a window */
        assert_int_equal(bound, 7);
        return;
    }
    file = save_with(s, seq, o);
    if (file.n > bound)
        fail_msg("variant %d, %u tokens: %zu bytes, the bound is %llu", what,
                 (unsigned)kvt_seq_length(seq), file.n, (unsigned long long)bound);
    if (o->codec == KVT_CODEC_RAW && !checkpoints)
        assert_int_equal(file.n, bound);
    memory = malloc((size_t)bound + 8);
    assert_non_null(memory);
    for (size_t less = 1; less < file.n; less = less * 5 + 3) {
        memset(memory, 0xa5, (size_t)bound + 8);
        expect(s->cache, KVT_ERR_FULL, kvt_seq_save_memory(seq, memory, file.n - less, &n, o));
        expect_error_text(s->cache, "too small", "save to memory");
        assert_int_equal(n, 7);
        for (size_t i = file.n - less; i < (size_t)bound + 8; i++)
            assert_int_equal(memory[i], 0xa5);
        if (is_quick())
            break;
    }
    memset(memory, 0xa5, (size_t)bound + 8);
    expect(s->cache, KVT_ERR_FULL, kvt_seq_save_memory(seq, memory, 0, &n, o));
    expect_ok(s->cache, kvt_seq_save_memory(seq, memory, file.n, &n, o));
    assert_int_equal(n, file.n);
    if (!o->key)
        assert_memory_equal(memory, file.data, n);
    for (size_t i = n; i < (size_t)bound + 8; i++)
        assert_int_equal(memory[i], 0xa5);
    free(memory);
    bytes_free(&file);
}

/* An encrypted file whose last segment is full, and such as have 8 bytes more or less. */
static void bounds_of_segments(void **state)
{
    static unsigned char data[(1 << 19) + 8];
    const uint64_t segment = 1 << 18;
    kvt_snapshot_piece piece = {"fills a segment up", data, 0};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    rng r = {42};
    subject s;
    kvt_seq *seq;
    uint64_t bound;
    (void)state;
    open_kind(&s, I8, &r);
    if (has_crypt(&s)) {
        seq = tagged_seq(&s);
        grow(&s, seq, 100);
        o.pieces = &piece;
        o.n_pieces = 1;
        expect_ok(s.cache, kvt_seq_save_bound(seq, &bound, &o)); /* exact */
        piece.bytes = (size_t)(2 * segment - bound % segment - 8);
        o.key = a_key;
        for (int i = 0; i < 3; i++, piece.bytes += 8)
            check_bound(&s, seq, &o, 0, i);
        kvt_seq_destroy(seq);
    }
    close_subject(&s);
}

static void bounds_hold(void **state)
{
    static const size_t lengths[] = {0, 1, 63, 64, 65, 200, 333, 448};
    rng r = {31};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        subject s;
        int crypt;
        open_kind(&s, kind, &r);
        crypt = has_crypt(&s);
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i += is_quick() ? 5 : 1)
            for (int marks = 0; marks < 3; marks++) {
                kvt_seq *seq = marks == 1 ? full_seq(&s, lengths[i]) : seq_of(&s);
                if (marks != 1 && lengths[i])
                    grow(&s, seq, lengths[i]);
                if (marks == 2) { /* no tag, but a position; keys that have moved */
                    (void)kvt_seq_remove(seq, 64, 64);
                    expect_ok(s.cache, kvt_seq_set_next_position(seq, 700));
                }
                for (int v = 0; v < VARIANTS; v++) {
                    kvt_save_options o = variant(&s, v, kvt_seq_length(seq));
                    if (!o.key || crypt)
                        check_bound(&s, seq, &o, marks == 1, v);
                }
                kvt_seq_destroy(seq);
            }
        close_subject(&s);
    }
}

/* A delta is never larger than its bound, one of a parent with which it has nothing in common. */
static void bounds_of_deltas(void **state)
{
    rng r = {32};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int parent = 0; parent < 2; parent++)
            for (uint32_t codec = 0; codec < 3; codec++) {
                kvt_save_options o = saves(codec);
                kvt_seq *seq;
                subject s;
                open_kind(&s, kind, &r);
                seq = full_seq(&s, 300);
                if (parent) {
                    expect_ok(s.cache, kvt_seq_save(seq, in_folder("p"), &o));
                } else {
                    kvt_seq *other = seq_of(&s);
                    step_of(&s, other, 300, 200);
                    expect_ok(s.cache, kvt_seq_save(other, in_folder("p"), &o));
                    kvt_seq_destroy(other);
                }
                o.parent = in_folder("p");
                check_bound(&s, seq, &o, 1, (int)codec);
                kvt_seq_destroy(seq);
                close_subject(&s);
            }
}

/* ---- descriptors and memory ---- */

static void descriptors(void **state)
{
    rng r = {33};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int encrypted = 0; encrypted < 2; encrypted++) {
            kvt_save_options o = saves(encrypted ? KVT_CODEC_ZSTD : KVT_CODEC_RAW);
            kvt_load_options l = loads();
            kvt_load_result result;
            kvt_seq *seq, *to;
            char text[16] = "";
            subject s;
            int fd, ends[2];
            open_kind(&s, kind, &r);
            if (encrypted && !has_crypt(&s)) {
                close_subject(&s);
                return;
            }
            o.key = l.key = encrypted ? a_key : NULL;
            seq = full_seq(&s, 200);
            to = tagged_seq(&s);
            fd = open(in_folder("stream"), O_RDWR | O_CREAT | O_TRUNC, 0600);
            assert_true(fd >= 0);
            assert_int_equal(write(fd, "before", 6), 6);
            expect_ok(s.cache, kvt_seq_save_fd(seq, fd, &o));
            assert_int_equal(write(fd, "behind", 6), 6);
            assert_int_equal(lseek(fd, 6, SEEK_SET), 6);
            expect_ok(s.cache, kvt_seq_load_fd(to, fd, &l, &result));
            assert_int_equal(result.n_tokens, 200);
            assert_int_equal(read(fd, text, sizeof text), 6); /* not read by the load */
            assert_string_equal(text, "behind");
            expect_equal(&s, seq, to, "by a descriptor", (size_t)kind);
            assert_int_equal(lseek(fd, 5, SEEK_SET), 5); /* not where it begins */
            expect(s.cache, KVT_ERR_FORMAT, kvt_seq_load_fd(to, fd, &l, NULL));
            assert_int_equal(ftruncate(fd, 3000), 0);
            assert_int_equal(lseek(fd, 6, SEEK_SET), 6);
            expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load_fd(to, fd, &l, NULL));
            expect_equal(&s, seq, to, "as it was", (size_t)kind);
            assert_int_equal(close(fd), 0);
            expect(s.cache, KVT_ERR_IO, kvt_seq_load_fd(to, fd, &l, NULL));
            expect_error_text(s.cache, "descriptor", "a closed one");
            expect(s.cache, KVT_ERR_IO, kvt_seq_save_fd(seq, fd, &o));
            expect_error_text(s.cache, "descriptor", "a closed one");
            expect(s.cache, KVT_ERR_ARG, kvt_seq_load_fd(to, -1, &l, NULL));
            expect(s.cache, KVT_ERR_ARG, kvt_seq_save_fd(seq, -1, &o));
            kvt_seq_destroy(to);

            to = tagged_seq(&s); /* a pipe's room is less: only what fits is tried */
            assert_int_equal(pipe(ends), 0);
            expect_ok(s.cache, kvt_seq_truncate(seq, kvt_seq_reachable(seq, 2)));
            o.codec = KVT_CODEC_ZSTD; /* raw, a block of one token is as large as a full one */
            expect_ok(s.cache, kvt_seq_save_fd(seq, ends[1], &o));
            assert_int_equal(write(ends[1], "behind", 6), 6);
            expect_ok(s.cache, kvt_seq_load_fd(to, ends[0], &l, NULL));
            memset(text, 0, sizeof text);
            assert_int_equal(read(ends[0], text, sizeof text), 6);
            assert_string_equal(text, "behind");
            expect_equal(&s, seq, to, "by a pipe", (size_t)kind);
            assert_int_equal(close(ends[1]), 0);
            expect(s.cache, encrypted ? KVT_ERR_FORMAT : KVT_ERR_CORRUPT,
                   kvt_seq_load_fd(to, ends[0], &l, NULL));
            assert_int_equal(close(ends[0]), 0);
            kvt_seq_destroy(to);
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* A pipe whose ends do not block is waited for: here for each other, as it is full, or empty. */
static void descriptors_that_do_not_block(void **state)
{
    rng r = {41};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_seq *seq, *to;
    subject s;
    int ends[2], answer;
    pid_t child;
    (void)state;
    open_kind(&s, I8, &r);
    seq = tagged_seq(&s);
    to = tagged_seq(&s);
    grow(&s, seq, 300);
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(fcntl(ends[0], F_SETFL, O_NONBLOCK), 0);
    assert_int_equal(fcntl(ends[1], F_SETFL, O_NONBLOCK), 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)nanosleep(&(struct timespec){0, 50000000}, NULL); /* the reader is there first */
        _exit(kvt_seq_save_fd(seq, ends[1], &o) == KVT_OK ? 0 : 1);
    }
    assert_int_equal(close(ends[1]), 0);
    expect_ok(s.cache, kvt_seq_load_fd(to, ends[0], NULL, NULL));
    assert_int_equal(waitpid(child, &answer, 0), child);
    assert_true(WIFEXITED(answer) && WEXITSTATUS(answer) == 0);
    expect_equal(&s, seq, to, "by a pipe that does not block", 0);
    assert_int_equal(close(ends[0]), 0);
    { /* a socket that blocks, with a time limit of its own */
        const struct timeval limit = {0, 50000};
        const int room = 4096;
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(setsockopt(ends[i], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit), 0);
            assert_int_equal(setsockopt(ends[i], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit), 0);
        }
        assert_int_equal(setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room), 0);
        expect(s.cache, KVT_ERR_IO, kvt_seq_load_fd(to, ends[0], NULL, NULL));
        expect_error_text(s.cache, strerror(EAGAIN), "a load");
        expect(s.cache, KVT_ERR_IO, kvt_seq_save_fd(seq, ends[1], &o));
        expect_error_text(s.cache, strerror(EAGAIN), "a save");
        assert_int_equal(close(ends[0]), 0);
        assert_int_equal(close(ends[1]), 0);
    }
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* What has no size: a pipe by a path. It ends where its bytes do. */
static kvt_status load_pipe(kvt_seq *to, const unsigned char *data, size_t n)
{
    char path[64];
    int ends[2];
    kvt_status status;
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(write(ends[1], data, n), n);
    assert_int_equal(close(ends[1]), 0);
    (void)snprintf(path, sizeof path, "/proc/self/fd/%d", ends[0]);
    status = kvt_seq_load(to, path, NULL, NULL);
    assert_int_equal(close(ends[0]), 0);
    return status;
}

static void pipes(void **state)
{
    rng r = {39};
    (void)state;
    if (access("/proc/self/fd", R_OK) != 0)
        skip();
    for (int kind = 0; kind < KINDS; kind++)
        for (uint32_t codec = 0; codec < 3; codec++) {
            subject s;
            kvt_seq *seq, *to;
            bytes file;
            uint64_t hash;
            open_kind(&s, kind, &r);
            seq = seq_of(&s);
            to = seq_of(&s);
            grow(&s, seq, 3);
            file = saved(s.cache, seq, codec);
            grow(&s, seq, 40);
            if (file.n < 60000) { /* it fits into a pipe */
                expect_ok(s.cache, load_pipe(to, file.data, file.n));
                assert_int_equal(kvt_seq_length(to), 3);
                hash = file_hash(&s, to);
                for (size_t cut = 1; cut < file.n; cut += file.n / 23) {
                    expect(s.cache, KVT_ERR_CORRUPT, load_pipe(to, file.data, file.n - cut));
                    expect_error_text(s.cache, "it is cut here", "a pipe that ends early");
                    assert_true(file_hash(&s, to) == hash);
                }
                file.data = realloc(file.data, file.n + 1);
                assert_non_null(file.data);
                file.data[file.n] = 0;
                expect(s.cache, KVT_ERR_CORRUPT, load_pipe(to, file.data, file.n + 1));
                expect_error_text(s.cache, "bytes after its end", "a pipe with more");
                assert_true(file_hash(&s, to) == hash);
            }
            bytes_free(&file);
            kvt_seq_destroy(to);
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

static void memory(void **state)
{
    rng r = {34};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int encrypted = 0; encrypted < 2; encrypted++) {
            kvt_save_options o = saves(encrypted ? KVT_CODEC_AUTO : KVT_CODEC_RAW);
            kvt_load_options l = loads();
            unsigned char *data;
            kvt_seq *seq, *to;
            uint64_t bound;
            size_t n;
            subject s;
            bytes stream;
            open_kind(&s, kind, &r);
            if (encrypted && !has_crypt(&s)) {
                close_subject(&s);
                return;
            }
            o.key = l.key = encrypted ? a_key : NULL;
            seq = full_seq(&s, 130);
            to = tagged_seq(&s);
            expect_ok(s.cache, kvt_seq_save_bound(seq, &bound, &o));
            data = malloc((size_t)bound + 1);
            assert_non_null(data);
            expect_ok(s.cache, kvt_seq_save_memory(seq, data, (size_t)bound, &n, &o));
            expect_ok(s.cache, kvt_seq_load_memory(to, data, n, &l, NULL));
            expect_equal(&s, seq, to, "by memory", (size_t)kind);
            data[n] = 0;
            expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load_memory(to, data, n + 1, &l, NULL));
            expect_error_text(s.cache, "bytes after its end", "load from memory");
            expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load_memory(to, data, n - 1, &l, NULL));
            expect(s.cache, encrypted ? KVT_ERR_FORMAT : KVT_ERR_CORRUPT,
                   kvt_seq_load_memory(to, data, 0, &l, NULL));
            expect_equal(&s, seq, to, "as it was", (size_t)kind);
            memset(&stream, 0, sizeof stream); /* of a stream more may follow */
            stream.data = data;
            stream.n = n + 1;
            stream.most = 999;
            {
                kvt_reader reader = bytes_reader(&stream);
                expect_ok(s.cache, kvt_seq_load_stream(to, &reader, &l, NULL));
                assert_int_equal(stream.at, n);
            }
            spill(in_folder("more"), data, n + 1);
            expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("more"), &l, NULL));
            expect_error_text(s.cache, "bytes after its end", "load of a file");
            free(data);
            kvt_seq_destroy(to);
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* ---- progress ---- */

typedef struct watch {
    uint64_t done, total;
    int calls, stop_at; /* < 0: never */
} watch;

static int see(void *user, uint64_t done, uint64_t total)
{
    watch *w = user;
    assert_true(done > w->done || (done == w->done && w->calls == 0));
    assert_true(w->calls == 0 || total == w->total);
    assert_true(done <= total);
    w->done = done;
    w->total = total;
    return w->calls++ == w->stop_at;
}

/* Names in the folder, but for the dots. */
static int folder_entries(void)
{
    char command[100], text[20] = "";
    FILE *p;
    (void)snprintf(command, sizeof command, "ls -A '%s' | wc -l", folder);
    p = popen(command, "r");
    assert_non_null(p);
    assert_non_null(fgets(text, sizeof text, p));
    (void)pclose(p);
    return atoi(text);
}

/* 70 MiB: more than one call. */
static void progress(void **state)
{
    kvt_group_config g = group_of(4, 8, 8, 128, 128, KVT_TYPE_F32, KVT_TYPE_F32);
    kvt_cache *cache = cache_of(&g, 2240, 1, NULL);
    kvt_seq *seq, *to;
    tokens t;
    rng r = {35};
    uint64_t hash;
    int entries;
    (void)state;
    t = tokens_make(&r, 320, &g);
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_create(cache, &to));
    append_all(cache, to, &g, &t, 0, 5, 5);
    hash = seq_hash(to, &g);
    for (int i = 0; i < 7; i++)
        append_step(cache, seq, &g, &t, 0, 320);
    tokens_free(&t);
    spill(in_folder("file"), "old", 3);
    entries = folder_entries();
    for (uint32_t codec = 0; codec < 3; codec++) {
        watch w = {0, 0, 0, -1}, all;
        kvt_save_options o = saves(codec);
        kvt_load_options l = loads();
        bytes old;
        o.progress = l.progress = see;
        o.progress_user = l.progress_user = &w;
        if (codec != KVT_CODEC_RAW && is_quick())
            continue;
        expect_ok(cache, kvt_seq_save(seq, in_folder("big"), &o));
        assert_true(w.calls >= 2 && w.calls <= 5);
        assert_int_equal(w.done, w.total);
        assert_int_equal(w.total, (uint64_t)2240 * 4 * 8 * 256 * 4);
        all = w;
        for (int stop = 0; stop < all.calls; stop++) {
            memset(&w, 0, sizeof w);
            w.stop_at = stop;
            expect(cache, KVT_ERR_CANCELLED, kvt_seq_save(seq, in_folder("file"), &o));
            expect_error_text(cache, "cancelled", "save");
            assert_int_equal(w.calls, stop + 1);
            old = slurp(in_folder("file"));
            assert_int_equal(old.n, 3);
            bytes_free(&old);
            assert_int_equal(folder_entries(), entries + 1);
        }
        for (uint32_t map = 0; map < 3; map++) {
            l.map = map;
            memset(&w, 0, sizeof w);
            w.stop_at = -1;
            {
                kvt_seq *other;
                expect_ok(cache, kvt_seq_create(cache, &other));
                expect_ok(cache, kvt_seq_load(other, in_folder("big"), &l, NULL));
                kvt_seq_destroy(other);
            }
            assert_int_equal(w.total, all.total);
            assert_int_equal(w.done, w.total);
            all.calls = w.calls;
            for (int stop = 0; stop < all.calls; stop++) {
                memset(&w, 0, sizeof w);
                w.stop_at = stop;
                expect(cache, KVT_ERR_CANCELLED, kvt_seq_load(to, in_folder("big"), &l, NULL));
                assert_true(seq_hash(to, &g) == hash);
            }
        }
        assert_int_equal(unlink(in_folder("big")), 0);
        expect_ok(cache, kvt_cache_trim(cache));
    }
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* ---- pieces ---- */

typedef struct seen {
    const kvt_snapshot_piece *expected;
    size_t n, stop_at;
} seen;

static int see_piece(void *user, const kvt_snapshot_piece *piece)
{
    seen *s = user;
    const kvt_snapshot_piece *e = &s->expected[s->n];
    assert_string_equal(piece->name, e->name);
    assert_int_equal(piece->bytes, e->bytes);
    if (e->bytes)
        assert_memory_equal(piece->data, e->data, e->bytes);
    return s->n++ == s->stop_at;
}

static void pieces(void **state)
{
    static char x65[66], large[100001];
    kvt_snapshot_piece list[] = {{"z", large, sizeof large},
                                 {"empty", NULL, 0},
                                 {x65 + 1, "of 64", 5},
                                 {"a", "8 bytes.", 8},
                                 {"\xc3\xa4", "9 bytes..", 9}};
    const size_t n = sizeof list / sizeof *list;
    rng r = {36};
    subject s;
    kvt_seq *seq, *to;
    (void)state;
    memset(x65, 'x', 65);
    for (size_t i = 0; i < sizeof large; i++)
        large[i] = (char)(i * i % 251);
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 100);
    for (uint32_t codec = 0; codec < 3; codec++)
        for (int way = 0; way < 4; way++) {
            kvt_save_options o = saves(codec);
            kvt_load_options l = loads();
            seen w = {list, 0, SIZE_MAX};
            bytes file;
            o.pieces = list;
            o.n_pieces = n;
            l.on_piece = see_piece;
            l.piece_user = &w;
            l.map = way == 3 ? KVT_MAP_LAZY : KVT_MAP_NONE;
            if (way == 1 && has_crypt(&s))
                o.key = l.key = a_key;
            file = save_with(&s, seq, &o);
            spill(in_folder("pieces"), file.data, file.n);
            for (size_t stop = 0; stop <= n; stop++) {
                kvt_status expected = stop < n ? KVT_ERR_CANCELLED : KVT_OK;
                w.n = 0;
                w.stop_at = stop;
                to = tagged_seq(&s);
                expect(s.cache, expected,
                       way == 2 ? kvt_seq_load_memory(to, file.data, file.n, &l, NULL)
                                : kvt_seq_load(to, in_folder("pieces"), &l, NULL));
                assert_int_equal(w.n, stop < n ? stop + 1 : n);
                if (expected == KVT_OK)
                    expect_equal(&s, seq, to, "with pieces", codec);
                else
                    assert_true(kvt_seq_is_empty(to));
                kvt_seq_destroy(to);
            }
            l.on_piece = NULL; /* they are not needed */
            to = tagged_seq(&s);
            expect_ok(s.cache, kvt_seq_load(to, in_folder("pieces"), &l, NULL));
            kvt_seq_destroy(to);
            {
                kvt_inspect_options looks;
                kvt_snapshot_info info;
                char text[200];
                memset(&looks, 0, sizeof looks);
                looks.struct_size = sizeof looks;
                looks.verify = 1;
                looks.key = l.key;
                looks.on_piece = see_piece;
                looks.piece_user = &w;
                for (size_t stop = 0; stop <= n; stop++) {
                    w.n = 0;
                    w.stop_at = stop;
                    info.struct_size = sizeof info;
                    assert_int_equal(kvt_snapshot_inspect_with(in_folder("pieces"), &looks, &info,
                                                               text, sizeof text),
                                     stop < n ? KVT_ERR_CANCELLED : KVT_OK);
                }
                assert_int_equal(info.n_pieces, n);
            }
            bytes_free(&file);
        }
    for (int i = 0; i < 6; i++) {
        kvt_snapshot_piece bad[2] = {{"a", "1", 1}, {"b", "2", 1}};
        kvt_save_options o = saves(KVT_CODEC_RAW);
        size_t room;
        uint64_t bound = 0;
        o.pieces = bad;
        o.n_pieces = 2;
        switch (i) {
        case 0: bad[1].name = x65; break;
        case 1: bad[1].name = ""; break;
        case 2: bad[1].name = NULL; break;
        case 3: bad[1].name = "a"; break;
        case 4: bad[0].data = NULL; break;
        default: bad[1].bytes = SIZE_MAX / 2; break;
        }
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("bad"), &o));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_bound(seq, &bound, &o));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_memory(seq, &bad, sizeof bad, &room, &o));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_fd(seq, 1, &o));
    }
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* Names are told apart, however many there are, and one that comes again is found. */
static void many_pieces(void **state)
{
    enum { MANY = 700 };
    static char piece_names[MANY][24];
    static kvt_snapshot_piece list[MANY];
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_load_options l = loads();
    seen w = {list, 0, SIZE_MAX};
    rng r = {37};
    subject s;
    kvt_seq *seq, *to;
    bytes file;
    (void)state;
    for (int i = 0; i < MANY; i++) {
        (void)snprintf(piece_names[i], sizeof piece_names[i], "piece %03d", i);
        list[i].name = list[i].data = piece_names[i];
        list[i].bytes = (size_t)i % 16;
    }
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 10);
    to = tagged_seq(&s);
    o.pieces = list;
    o.n_pieces = MANY;
    for (int i = 1; i < MANY; i += 233) {
        size_t room;
        list[i].name = piece_names[MANY - 1 - i];
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_memory(seq, &room, sizeof room, &room, &o));
        expect_error_text(s.cache, "same name", "a name that is there");
        list[i].name = piece_names[i];
    }
    file = save_with(&s, seq, &o);
    l.on_piece = see_piece;
    l.piece_user = &w;
    expect_ok(s.cache, kvt_seq_load_memory(to, file.data, file.n, &l, NULL));
    assert_int_equal(w.n, MANY);
    l.on_piece = NULL;
    for (int i = 1; i < MANY; i += 99)
        for (int twin = 0; twin < i; twin += 50) {
            size_t payload, at = section_payload(file.data, file.n, 12, (unsigned)i, &payload);
            memcpy(file.data + at + 16, piece_names[twin], 9);
            resign(file.data, file.n);
            expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load_memory(to, file.data, file.n, &l, NULL));
            expect_error_text(s.cache, "same name", "a name that comes again");
            memcpy(file.data + at + 16, piece_names[i], 9);
        }
    resign(file.data, file.n);
    expect_ok(s.cache, kvt_seq_load_memory(to, file.data, file.n, &l, NULL));
    bytes_free(&file);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* ---- names that a table of hashes cannot tell apart ---- */

static const uint64_t p1 = 0x9E3779B185EBCA87u, p2 = 0xC2B2AE3D27D4EB4Fu; /* of XXH64 */

static uint64_t inverse(uint64_t odd) /* modulo 2^64 */
{
    uint64_t x = odd;
    for (int i = 0; i < 6; i++)
        x *= 2 - odd * x;
    return x;
}

static uint64_t rotated(uint64_t x, int left)
{
    return x << left | x >> (64 - left);
}

/*
 * A name of 64 bytes, all of the same XXH64 where `same`: two lanes of 8 bytes for each of its four
 * accumulators, the second of which leads to the same number from wherever the first has led.
 */
static void make_name(rng *r, int same, char *to)
{
    const uint64_t begin[4] = {p1 + p2, p2, 0, 0 - p1};
    do {
        uint64_t lanes[8];
        for (int i = 0; i < 4; i++) {
            const uint64_t target = 1234567890123456789u + (uint64_t)i;
            lanes[i] = rng_next(r);
            lanes[i + 4] =
                (rotated(target * inverse(p1), 33) - rotated(begin[i] + lanes[i] * p2, 31) * p1) *
                inverse(p2);
            if (!same)
                lanes[i + 4] = rng_next(r);
        }
        memcpy(to, lanes, 64);
    } while (memchr(to, 0, 64));
    to[64] = '\0';
}

/* Names that are made to have one hash take about as long as any, and are told apart. */
static void names_of_one_hash(void **state)
{
    const size_t n = is_quick() ? 500 : 20000;
    kvt_snapshot_piece *list = calloc(n, sizeof *list);
    char(*names)[65] = calloc(n, sizeof *names);
    double seconds[2] = {0, 0};
    rng r = {39};
    subject s;
    kvt_seq *seq, *to;
    (void)state;
    assert_true(list && names);
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 10);
    to = tagged_seq(&s);
    for (int same = 0; same < 2; same++) {
        kvt_save_options o = saves(KVT_CODEC_RAW);
        size_t at, payload;
        bytes file;
        clock_t begin;
        for (size_t i = 0; i < n; i++) {
            make_name(&r, same, names[i]);
            list[i].name = names[i];
        }
        assert_int_equal(XXH64(names[0], 64, 0) == XXH64(names[n - 1], 64, 0), same);
        o.pieces = list;
        o.n_pieces = n;
        file = save_with(&s, seq, &o);
        begin = clock();
        expect_ok(s.cache, kvt_seq_load_memory(to, file.data, file.n, NULL, NULL));
        seconds[same] = (double)(clock() - begin) / CLOCKS_PER_SEC;
        at = section_payload(file.data, file.n, 12, (unsigned)n / 2, &payload);
        memcpy(file.data + at + 16, names[n / 3], 64);
        resign(file.data, file.n);
        expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load_memory(to, file.data, file.n, NULL, NULL));
        expect_error_text(s.cache, "same name", "a name that comes again");
        bytes_free(&file);
    }
    if (seconds[1] > 10 * seconds[0] + 0.2)
        fail_msg("%zu pieces: %.3f s, with names of one hash %.3f s", n, seconds[0], seconds[1]);
    free(names);
    free(list);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* ---- inspection ---- */

static int stop_at_once(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    return done <= total;
}

static int go_on(void *user, uint64_t done, uint64_t total)
{
    *(uint64_t *)user = done;
    return done > total;
}

static void inspections(void **state)
{
    rng r = {37};
    subject s;
    kvt_seq *seq;
    kvt_save_options o = saves(KVT_CODEC_ZSTD);
    const char *path = in_folder("file");
    (void)state;
    open_kind(&s, WINDOW, &r);
    seq = full_seq(&s, 100);
    expect_ok(s.cache, kvt_seq_save(seq, path, &o));
    for (int i = 0; i < 13; i++) {
        kvt_status expected = KVT_ERR_ARG;
        uint64_t done = 0;
        kvt_inspect_options looks;
        kvt_snapshot_info info;
        const char *at = path;
        char text[200] = "";
        memset(&looks, 0, sizeof looks);
        looks.struct_size = sizeof looks;
        looks.verify = 1;
        info.struct_size = sizeof info;
        switch (i) {
        case 0: at = NULL; break;
        case 1: at = ""; break;
        case 2: info.struct_size = 8; break;
        case 3: looks.struct_size = 8; break;
        case 4: looks.verify = 2; break;
        case 5: looks.progress = stop_at_once, expected = KVT_ERR_CANCELLED; break;
        case 6: looks.folder = folder, expected = KVT_OK; break;
        case 7: looks.key = a_key, expected = KVT_ERR_MISMATCH; break;
        case 8: at = folder, expected = KVT_ERR_IO; break;
        case 9: at = in_folder("nothing"), expected = KVT_ERR_IO; break;
        case 12: looks.progress = go_on, looks.progress_user = &done, expected = KVT_OK; break;
        default: expected = KVT_OK; break;
        }
        if (i == 7 && !has_crypt(&s))
            expected = KVT_ERR_UNSUPPORTED;
        assert_int_equal(
            kvt_snapshot_inspect_with(at, i == 11 ? NULL : &looks, &info, text, sizeof text),
            expected);
        assert_true((expected == KVT_OK) == !*text);
        if (expected != KVT_OK) {
            if (i != 2)
                info.struct_size = sizeof info;
            assert_int_equal(kvt_snapshot_inspect_with(at, &looks, &info, NULL, 0), expected);
            continue;
        }
        assert_int_equal(info.n_tokens, 100);
        assert_int_equal(info.n_checkpoints > 0, i != 11);
        assert_int_equal(done > 0, i == 12);
    }
    {
        char text[50];
        assert_int_equal(kvt_snapshot_inspect_with(path, NULL, NULL, text, sizeof text),
                         KVT_ERR_ARG);
    }
    kvt_seq_destroy(seq);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bounds_of_segments),
        cmocka_unit_test(bounds_hold),
        cmocka_unit_test(bounds_of_deltas),
        cmocka_unit_test(descriptors),
        cmocka_unit_test(memory),
        cmocka_unit_test(descriptors_that_do_not_block),
        cmocka_unit_test(pipes),
        cmocka_unit_test(progress),
        cmocka_unit_test(pieces),
        cmocka_unit_test(many_pieces),
        cmocka_unit_test(names_of_one_hash),
        cmocka_unit_test(inspections),
    };
    RUN_IN_FOLDER(tests);
}
