/*
 * Deltas: whatever has happened to a sequence since its parent was saved, what comes back is what a
 * snapshot of its own would bring back, bit for bit; and what is refused of parents.
 */
#include "snapshot_options.h"

#include <fcntl.h>
#include <sys/stat.h>

static char names[300][24];

static const char *level_name(int i)
{
    (void)snprintf(names[i], sizeof names[i], "level-%d.kvt", i);
    return names[i];
}

static kvt_snapshot_info look_at(const char *path, const unsigned char *key)
{
    kvt_snapshot_info info;
    kvt_inspect_options o;
    char text[256] = "";
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.verify = 1;
    o.key = key;
    info.struct_size = sizeof info;
    if (kvt_snapshot_inspect_with(path, &o, &info, text, sizeof text) != KVT_OK)
        fail_msg("%s: %s", path, text);
    return info;
}

/* Load a file in every way that a delta can be loaded, and hold it against the sequence. */
static void check_file(const subject *s, const kvt_seq *seq, const char *path,
                       const unsigned char *key, const char *what, size_t detail)
{
    bytes file = slurp(path);
    for (int way = 0; way < 6; way++) {
        kvt_load_options l = loads();
        kvt_seq *to = tagged_seq(s);
        kvt_status status;
        l.key = key;
        l.folder = way >= 3 ? folder : NULL;
        l.map = way == 1 ? KVT_MAP_VERIFY : way == 2 ? KVT_MAP_LAZY : KVT_MAP_NONE;
        if (way == 4) {
            kvt_reader reader = bytes_reader(&file);
            file.at = 0;
            status = kvt_seq_load_stream(to, &reader, &l, NULL);
            assert_int_equal(file.at, file.n);
        } else if (way == 5) {
            status = kvt_seq_load_memory(to, file.data, file.n, &l, NULL);
        } else {
            status = kvt_seq_load(to, path, &l, NULL);
        }
        if (key && l.map) {
            assert_int_equal(status, KVT_ERR_UNSUPPORTED);
        } else {
            expect(s->cache, KVT_OK, status);
            expect_equal(s, seq, to, what, detail * 10 + (size_t)way);
        }
        kvt_seq_destroy(to);
    }
    bytes_free(&file);
}

/* A chain of five, by turns raw and compressed. */
static void chains(void **state)
{
    rng r = {41};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int encrypted = 0; encrypted < 2; encrypted++) {
            subject s;
            kvt_seq *seq;
            const unsigned char *key = encrypted ? a_key : NULL;
            open_kind(&s, kind, &r);
            if (encrypted && !has_crypt(&s)) {
                close_subject(&s);
                continue;
            }
            seq = full_seq(&s, 100);
            for (int i = 0; i < 6; i++) {
                kvt_save_options o = saves((uint32_t)i % 3);
                kvt_snapshot_info info;
                o.key = key;
                o.parent = i ? in_folder(level_name(i - 1)) : NULL;
                expect_ok(s.cache, kvt_seq_save(seq, in_folder(level_name(i)), &o));
                info = look_at(in_folder(level_name(i)), key);
                assert_int_equal(info.depth, i);
                assert_string_equal(info.parent_name, i ? level_name(i - 1) : "");
                assert_int_equal(info.encrypted, encrypted);
                if (i) {
                    kvt_snapshot_info parent = look_at(in_folder(level_name(i - 1)), key);
                    assert_memory_equal(info.parent_id, parent.snapshot_id, 16);
                    assert_int_equal(info.inherited_tokens, parent.n_tokens);
                    assert_true(info.inherited_blocks > 0 || info.n_tokens < 200);
                }
                check_file(&s, seq, in_folder(level_name(i)), key, "a chain", (size_t)i);
                grow(&s, seq, 70);
                mark(&s, seq);
                grow(&s, seq, 10);
            }
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* What a turn may do to a sequence. Returns whether it did. */
static int turn(const subject *s, kvt_seq **seq, int what)
{
    uint64_t n = kvt_seq_length(*seq), to;
    kvt_seq *copy;
    switch (what) {
    case 0: return 1; /* nothing */
    case 1:           /* other tokens from a place on */
        to = kvt_seq_reachable(*seq, n - 30);
        expect_ok(s->cache, kvt_seq_truncate(*seq, to));
        step_of(s, *seq, 500, 90);
        return 1;
    case 2: /* shorter */
        to = kvt_seq_reachable(*seq, n - 50);
        expect_ok(s->cache, kvt_seq_truncate(*seq, to));
        return 1;
    case 3:
        expect_ok(s->cache, kvt_seq_fork(*seq, kvt_seq_reachable(*seq, n - 10), &copy));
        kvt_seq_destroy(*seq);
        *seq = copy;
        grow(s, *seq, 5);
        return 1;
    case 4: /* later tokens move up */
        if (kvt_seq_remove(*seq, 64, 64) != KVT_OK)
            return 0;
        grow(s, *seq, 20);
        return 1;
    case 5: /* not a token in common */
        expect_ok(s->cache, kvt_seq_clear(*seq));
        step_of(s, *seq, 400, 100);
        return 1;
    case 6: /* empty */ expect_ok(s->cache, kvt_seq_clear(*seq)); return 1;
    default: /* first tokens equal, positions not */
        expect_ok(s->cache, kvt_seq_clear(*seq));
        grow(s, *seq, 64);
        expect_ok(s->cache, kvt_seq_set_next_position(*seq, 1000));
        grow(s, *seq, 64);
        return 1;
    }
}

static void turns(void **state)
{
    rng r = {42};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int a = 0; a < 8; a++)
            for (int b = 0; b < 8; b += is_quick() ? 3 : 1) {
                uint32_t codec = (uint32_t)(a + b);
                kvt_save_options o = saves(codec % 3);
                subject s;
                kvt_seq *seq;
                open_kind(&s, kind, &r);
                seq = full_seq(&s, 300);
                expect_ok(s.cache, kvt_seq_save(seq, in_folder(level_name(0)), &o));
                if (turn(&s, &seq, a)) {
                    o.codec = (codec + 1) % 3;
                    o.parent = in_folder(level_name(0));
                    expect_ok(s.cache, kvt_seq_save(seq, in_folder(level_name(1)), &o));
                    check_file(&s, seq, in_folder(level_name(1)), NULL, "a turn", (size_t)a);
                    if (kvt_seq_length(seq) > 180 && turn(&s, &seq, b)) {
                        o.codec = (codec + 2) % 3;
                        o.parent = in_folder(level_name(1));
                        expect_ok(s.cache, kvt_seq_save(seq, in_folder(level_name(2)), &o));
                        check_file(&s, seq, in_folder(level_name(2)), NULL, "two turns",
                                   (size_t)(a * 8 + b));
                    }
                }
                kvt_seq_destroy(seq);
                close_subject(&s);
            }
}

/* n tokens whose ids are all the same, from token `first` of the test's on. */
static void same_ids(const subject *s, kvt_seq *seq, size_t first, size_t n)
{
    int32_t ids[MOST];
    for (size_t i = 0; i < n; i++)
        ids[i] = 7;
    expect_ok(s->cache, kvt_seq_begin(seq, n, NULL));
    append_layers(s, seq, first);
    expect_ok(s->cache, kvt_seq_commit(seq, ids));
}

/* Keys that have moved are told from such that have not by their shifts alone, either way. */
static void shifts(void **state)
{
    rng r = {47};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int later = 0; later < 2; later++)
            for (uint32_t codec = 0; codec < 2; codec++) {
                kvt_save_options o = saves(codec);
                subject s;
                kvt_seq *seq, *moved;
                if (kind == WINDOW || kind == I4_WINDOW || kind == I4_I5)
                    continue; /* released, or not without its first block's offset */
                open_kind(&s, kind, &r);
                seq = tagged_seq(&s);
                same_ids(&s, seq, 0, 260);
                expect_ok(s.cache, kvt_seq_fork(seq, 260, &moved));
                expect_ok(s.cache, kvt_seq_remove(moved, 64, 64));
                expect_ok(s.cache, kvt_seq_save(later ? seq : moved, in_folder(level_name(0)), &o));
                o.parent = in_folder(level_name(0));
                expect_ok(s.cache, kvt_seq_save(later ? moved : seq, in_folder(level_name(1)), &o));
                assert_int_equal(look_at(in_folder(level_name(1)), NULL).inherited_tokens, 64);
                check_file(&s, later ? moved : seq, in_folder(level_name(1)), NULL, "shifts",
                           (size_t)later);
                kvt_seq_destroy(moved);
                kvt_seq_destroy(seq);
                close_subject(&s);
            }
}

/* Saved in other types, with a parent of these; and a part of a sequence with one of a part. */
static void options_of_deltas(void **state)
{
    static const kvt_type i8[] = {KVT_TYPE_I8, KVT_TYPE_I8};
    static const uint32_t layers[] = {1, 2};
    rng r = {43};
    (void)state;
    for (int what = 0; what < 3; what++)
        for (int kind = 0; kind < KINDS; kind++) {
            kvt_save_options o = saves(KVT_CODEC_RAW);
            kvt_snapshot_info info;
            kvt_load_options l = loads();
            bytes delta, full;
            subject s;
            kvt_seq *seq;
            char text[200];
            if (kind == WINDOW || kind == I4_WINDOW)
                continue;
            open_kind(&s, kind, &r);
            seq = full_seq(&s, 300);
            switch (what) {
            case 0: o.convert = 1, o.k_types = o.v_types = i8; break;
            case 1: o.layers = layers, o.n_layers = 2; break;
            default: o.first_token = 128; break;
            }
            expect_ok(s.cache, kvt_seq_save(seq, in_folder("parent"), &o));
            grow(&s, seq, 100);
            full = save_with(&s, seq, &o);
            o.parent = in_folder("parent");
            expect_ok(s.cache, kvt_seq_save(seq, in_folder("delta"), &o));
            delta = slurp(in_folder("delta"));
            assert_true(delta.n < full.n - full.n / 8);
            info = look_at(in_folder("delta"), NULL);
            assert_int_equal(info.inherited_tokens, what == 2 ? 300 - 128 : 300);
            assert_true(info.inherited_blocks > 0);
            if (kvt_snapshot_convert(in_folder("delta"), &l, in_folder("merged"), NULL, text,
                                     sizeof text) != KVT_OK)
                fail_msg("%s", text);
            spill(in_folder("full"), full.data, full.n);
            assert_memory_equal(look_at(in_folder("merged"), NULL).groups,
                                look_at(in_folder("full"), NULL).groups, sizeof info.groups);
            if (what) { /* of another model */
                o.layers = NULL, o.n_layers = 0, o.first_token = 0;
                if (what == 1)
                    expect(s.cache, KVT_ERR_MISMATCH, kvt_seq_save(seq, in_folder("delta"), &o));
            } else {
                o.convert = 0, o.k_types = o.v_types = NULL;
                expect(s.cache, s.groups[0].k_type == KVT_TYPE_I8 ? KVT_OK : KVT_ERR_MISMATCH,
                       kvt_seq_save(seq, in_folder("delta"), &o));
            }
            bytes_free(&delta);
            bytes_free(&full);
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* About what the turn has added. */
static void sizes(void **state)
{
    kvt_group_config g = group_of(4, 4, 4, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16);
    rng r = {44};
    subject s;
    kvt_seq *seq;
    kvt_save_options o = saves(KVT_CODEC_RAW);
    struct stat st;
    (void)state;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    grow(&s, seq, 576);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("parent"), &o));
    grow(&s, seq, 64);
    o.parent = in_folder("parent");
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("delta"), &o));
    assert_int_equal(stat(in_folder("delta"), &st), 0);
    assert_true(st.st_size > 64 * 4 * 4 * 128 * 2);
    assert_true(st.st_size < 64 * 4 * 4 * 128 * 2 + 4096);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("again"), (o.parent = in_folder("delta"), &o)));
    assert_int_equal(stat(in_folder("again"), &st), 0);
    assert_true(st.st_size < 2048);
    /* Cut, and the same again: its parent is shorter, but that one's parents have the blocks. */
    expect_ok(s.cache, kvt_seq_truncate(seq, 320));
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("cut"), &o));
    grow(&s, seq, 320);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("back"), (o.parent = in_folder("cut"), &o)));
    assert_int_equal(stat(in_folder("back"), &st), 0);
    assert_true(st.st_size < 8192);
    assert_int_equal(look_at(in_folder("back"), NULL).inherited_blocks, 10);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/*
 * Blocks of zeros of two groups whose dims differ by less than the padding: their images are equal,
 * and so are their ids, but not the streams that they are stored as.
 */
static void equal_images(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4};
    (void)state;
    for (size_t i = 0; i < 12; i++) {
        const kvt_type type = types[i % 3];
        const uint32_t dim = i / 3 % 2 ? 8 : 16, codec = i / 6 ? KVT_CODEC_AUTO : KVT_CODEC_ZSTD;
        kvt_group_config g[2] = {group_of(1, 1, 1, dim, dim, type, type),
                                 group_of(1, 1, 1, 24 - dim, 24 - dim, type, type)};
        kvt_save_options o = saves(codec);
        rng r = {45};
        subject s;
        kvt_seq *seq;
        open_subject(&s, g, 2, &r);
        for (size_t j = 0; j < 2; j++) {
            memset(s.t[j].k, 0, s.t[j].n * s.t[j].k_dim * sizeof *s.t[j].k);
            memset(s.t[j].v, 0, s.t[j].n * s.t[j].v_dim * sizeof *s.t[j].v);
        }
        open_cache(&s, NULL);
        seq = tagged_seq(&s);
        grow(&s, seq, 256);
        expect_ok(s.cache, kvt_seq_save(seq, in_folder("parent"), &o));
        grow(&s, seq, 10);
        o.parent = in_folder("parent");
        expect_ok(s.cache, kvt_seq_save(seq, in_folder("delta"), &o));
        assert_true(look_at(in_folder("delta"), NULL).inherited_blocks > 0);
        check_file(&s, seq, in_folder("delta"), NULL, "equal images", i);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* ---- what is refused ---- */

static void parents_that_are_not(void **state)
{
    rng r = {45};
    subject s;
    kvt_seq *seq, *other, *to;
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_load_options l = loads();
    kvt_load_result result;
    bytes file, base;
    uint64_t hash;
    (void)state;
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 300);
    to = tagged_seq(&s);
    grow(&s, to, 20);
    hash = file_hash(&s, to);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("base"), &o));
    base = slurp(in_folder("base"));
    grow(&s, seq, 50);
    o.parent = in_folder("none");
    expect(s.cache, KVT_ERR_IO, kvt_seq_save(seq, in_folder("delta"), &o));
    expect_error_text(s.cache, "none", "a parent that is not there");
    o.parent = folder;
    expect(s.cache, KVT_ERR_IO, kvt_seq_save(seq, in_folder("delta"), &o));
    o.parent = "";
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("delta"), &o));
    spill(in_folder("text"), "this is no snapshot, but longer than a header", 45);
    o.parent = in_folder("text");
    expect(s.cache, KVT_ERR_FORMAT, kvt_seq_save(seq, in_folder("delta"), &o));
    for (size_t n = 0; n < base.n; n += n < 300 ? 40 : base.n / 7) { /* cut */
        spill(in_folder("cut"), base.data, n);
        o.parent = in_folder("cut");
        expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_save(seq, in_folder("delta"), &o));
    }
    /* its own, by any name; in another folder */
    o.parent = in_folder("base");
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("base"), &o));
    expect_error_text(s.cache, "its own parent", "a file of itself");
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("./base"), &o));
    assert_int_equal(symlink("base", in_folder("link")), 0);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("link"), &o));
    assert_int_equal(unlink(in_folder("link")), 0);
    o.parent = in_folder("base"); /* nor of its parent's */
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("child"), &o));
    o.parent = in_folder("child");
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("base"), &o));
    expect_error_text(s.cache, "its own parent", "a file of its child");
    o.in_place = 1;
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("base"), &o));
    o.in_place = 0;
    for (int own = 0; own < 2; own++) { /* by a descriptor, which has no name */
        int fd = open(in_folder(own ? "child" : "base"), O_RDWR);
        assert_true(fd >= 0);
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_fd(seq, fd, &o));
        expect_error_text(s.cache, "its own parent", "a descriptor of its child or base");
        assert_true(lseek(fd, 0, SEEK_CUR) == 0);
        assert_int_equal(close(fd), 0);
    }
    {
        int fd = open(in_folder("other"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
        assert_true(fd >= 0);
        expect_ok(s.cache, kvt_seq_save_fd(seq, fd, &o));
        assert_int_equal(close(fd), 0);
        expect_ok(s.cache, kvt_seq_load(to, in_folder("other"), &l, NULL));
        expect_equal(&s, seq, to, "by a descriptor", 0);
        kvt_seq_destroy(to);
        to = tagged_seq(&s);
        grow(&s, to, 20);
        hash = file_hash(&s, to);
    }
    o.parent = in_folder("base");
    assert_int_equal(mkdir(in_folder("sub"), 0700), 0);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("sub/delta"), &o));
    expect_error_text(s.cache, "not in the folder", "another folder");
    assert_int_equal(mkdir(in_folder("su\nb"), 0700), 0);
    o.parent = in_folder("su\nb/../base");
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("sub/delta"), &o));
    expect_error_text(s.cache, "/su?b/../base", "a control character");
    assert_int_equal(symlink("base", in_folder("li\nk")), 0);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("li\nk"), &o));
    expect_error_text(s.cache, "/li?k", "a control character");
    assert_int_equal(unlink(in_folder("li\nk")), 0);
    assert_int_equal(rmdir(in_folder("su\nb")), 0);
    o.parent = in_folder("sub/../base"); /* the same folder */
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("delta"), &o));
    {
        bytes now = slurp(in_folder("base")); /* nothing has happened to it */
        assert_int_equal(now.n, base.n);
        assert_memory_equal(now.data, base.data, base.n);
        bytes_free(&now);
    }
    if (has_crypt(&s)) { /* the key is of both */
        o.key = a_key;
        expect(s.cache, KVT_ERR_MISMATCH, kvt_seq_save(seq, in_folder("x"), &o));
        o.parent = NULL;
        expect_ok(s.cache, kvt_seq_save(seq, in_folder("secret"), &o));
        o.parent = in_folder("secret");
        o.key = (const unsigned char *)"another key of thirty-two bytes.";
        expect(s.cache, KVT_ERR_MISMATCH, kvt_seq_save(seq, in_folder("x"), &o));
        o.key = NULL;
        expect(s.cache, KVT_ERR_MISMATCH, kvt_seq_save(seq, in_folder("x"), &o));
        expect_error_text(s.cache, "in the parent secret, ", "which file is encrypted");
        o.key = a_key;
        o.parent = in_folder("base");
        expect(s.cache, KVT_ERR_MISMATCH, kvt_seq_save(seq, in_folder("x"), &o));
        expect_error_text(s.cache, "in the parent base, ", "which file is not encrypted");
        o.key = NULL;
    }
    /* loads: where the parents are */
    file = slurp(in_folder("delta"));
    for (int way = 0; way < 4; way++) {
        kvt_status expected = way % 2 ? KVT_OK : KVT_ERR_IO;
        kvt_seq *fresh = tagged_seq(&s);
        kvt_reader reader = bytes_reader(&file);
        file.at = 0;
        l.folder = way % 2 ? folder : NULL;
        expect(s.cache, expected,
               way < 2 ? kvt_seq_load_stream(fresh, &reader, &l, &result)
                       : kvt_seq_load_memory(fresh, file.data, file.n, &l, &result));
        if (way % 2)
            expect_equal(&s, seq, fresh, "with a folder", (size_t)way);
        else
            expect_error_text(s.cache, "folder", "without a folder");
        kvt_seq_destroy(fresh);
    }
    l.folder = in_folder("sub");
    expect(s.cache, KVT_ERR_IO, kvt_seq_load(to, in_folder("delta"), &l, NULL));
    expect_error_text(s.cache, "sub/base", "another folder");
    l.folder = NULL;
    other = full_seq(&s, 200); /* another file of the name */
    o = saves(KVT_CODEC_RAW);
    expect_ok(s.cache, kvt_seq_save(other, in_folder("base"), &o));
    expect(s.cache, KVT_ERR_MISMATCH, kvt_seq_load(to, in_folder("delta"), &l, NULL));
    expect_error_text(s.cache, "base", "another parent");
    spill(in_folder("base"), "this is no snapshot, but longer than a header", 45);
    expect(s.cache, KVT_ERR_FORMAT, kvt_seq_load(to, in_folder("delta"), &l, NULL));
    expect_error_text(s.cache, "in the parent base, not a kvtile", "which file is no snapshot");
    assert_int_equal(unlink(in_folder("base")), 0);
    assert_int_equal(mkfifo(in_folder("base"), 0600), 0); /* is not waited for */
    expect(s.cache, KVT_ERR_IO, kvt_seq_load(to, in_folder("delta"), &l, NULL));
    expect_error_text(s.cache, "not a regular file", "a pipe");
    assert_int_equal(unlink(in_folder("base")), 0);
    expect(s.cache, KVT_ERR_IO, kvt_seq_load(to, in_folder("delta"), &l, NULL));
    expect_error_text(s.cache, "base", "no parent");
    {
        kvt_snapshot_info info;
        char text[200];
        info.struct_size = sizeof info;
        assert_int_equal(kvt_snapshot_inspect(in_folder("delta"), 1, &info, text, sizeof text),
                         KVT_ERR_IO);
        assert_int_equal(kvt_snapshot_inspect(in_folder("delta"), 0, &info, text, sizeof text),
                         KVT_OK);
        assert_string_equal(info.parent_name, "base");
    }
    assert_true(file_hash(&s, to) == hash);
    spill(in_folder("base"), base.data, base.n); /* the same again */
    expect_ok(s.cache, kvt_seq_load(to, in_folder("delta"), &l, NULL));
    expect_equal(&s, seq, to, "with its parent", 0);
    bytes_free(&file);
    bytes_free(&base);
    kvt_seq_destroy(to);
    kvt_seq_destroy(other);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* A name from a file is shown, and gives a terminal no orders. */
static void names_in_texts(void **state)
{
    static const char bad[] = "a\033[2J\177b\n";
    char longer[100];
    rng r = {46};
    subject s;
    kvt_seq *seq, *to;
    kvt_save_options o = saves(KVT_CODEC_RAW);
    bytes base;
    (void)state;
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 100);
    to = tagged_seq(&s);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder(bad), &o));
    o.parent = in_folder(bad);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("named"), &o));
    assert_int_equal(unlink(in_folder(bad)), 0);
    expect(s.cache, KVT_ERR_IO, kvt_seq_load(to, in_folder("named"), NULL, NULL));
    expect_error_text(s.cache, "a?[2J?b?", "a name with control characters");
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    o.parent = NULL;
    expect_ok(s.cache, kvt_seq_save(seq, in_folder(longer), &o));
    o.parent = in_folder(longer);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("named"), &o));
    base = slurp(in_folder(longer));
    spill(in_folder(longer), base.data, base.n - 8);
    expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("named"), NULL, NULL));
    expect_error_text(s.cache, "xxx, ", "a long name");
    bytes_free(&base);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* 256 parents, and not one more. */
static void depth(void **state)
{
    rng r = {46};
    subject s;
    kvt_seq *seq, *to;
    kvt_load_options l = loads();
    (void)state;
    open_kind(&s, F16, &r);
    seq = tagged_seq(&s);
    for (int i = 0; i <= KVT_MAX_DEPTH; i++) {
        kvt_save_options o = saves(KVT_CODEC_RAW);
        grow(&s, seq, 1);
        o.parent = i ? in_folder(level_name(i - 1)) : NULL;
        expect_ok(s.cache, kvt_seq_save(seq, in_folder(level_name(i)), &o));
    }
    {
        kvt_save_options o = saves(KVT_CODEC_RAW);
        o.parent = in_folder(level_name(KVT_MAX_DEPTH));
        expect(s.cache, KVT_ERR_LIMIT, kvt_seq_save(seq, in_folder("x"), &o));
        expect_error_text(s.cache, "256 parents", "a chain that is too long");
    }
    for (uint32_t map = 0; map < 3; map++) {
        to = tagged_seq(&s);
        l.map = map;
        expect_ok(s.cache, kvt_seq_load(to, in_folder(level_name(KVT_MAX_DEPTH)), &l, NULL));
        expect_equal(&s, seq, to, "a long chain", map);
        kvt_seq_destroy(to);
    }
    {
        char text[256] = "";
        if (kvt_snapshot_convert(in_folder(level_name(KVT_MAX_DEPTH)), NULL, in_folder("one"), NULL,
                                 text, sizeof text) != KVT_OK)
            fail_msg("%s", text);
    }
    assert_int_equal(look_at(in_folder("one"), NULL).depth, 0);
    check_file(&s, seq, in_folder("one"), NULL, "a chain that is one file", 0);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chains),
        cmocka_unit_test(turns),
        cmocka_unit_test(options_of_deltas),
        cmocka_unit_test(sizes),
        cmocka_unit_test(equal_images),
        cmocka_unit_test(shifts),
        cmocka_unit_test(parents_that_are_not),
        cmocka_unit_test(names_in_texts),
        cmocka_unit_test(depth),
    };
    RUN_IN_FOLDER(tests);
}
