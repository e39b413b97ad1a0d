/*
 * Snapshots in other types than the cache's, both ways; and whole files that are read and saved
 * anew.
 */
#include "snapshot_options.h"

#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>

static const kvt_type k_types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4};
static const kvt_type v_types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4,
                                   KVT_TYPE_I5};

/* Relative error of a type, of rows of this test. */
static double error_of(kvt_type type)
{
    static const double errors[] = {0, 4e-4, 0.02, 0.2, 0.1};
    return errors[type];
}

/* The last n tokens of two sequences are the same but for that error. */
static void expect_close(const subject *a, const kvt_seq *of_a, const subject *b,
                         const kvt_seq *of_b, uint64_t n)
{
    static float x[MOST * 64], y[MOST * 64];
    uint64_t first = kvt_seq_length(of_a) - n;
    uint32_t layer = 0;
    for (uint32_t g = 0; g < a->n_groups; g++)
        for (uint32_t l = 0; l < a->groups[g].n_layers; l++, layer++)
            for (int side = 0; side < 2; side++) {
                const kvt_group_config *c = &b->groups[g];
                size_t dim = side ? c->v_dim : c->k_dim, count = (size_t)n * c->n_kv_heads * dim;
                double most = error_of(side ? c->v_type : c->k_type), d = 0, all = 0;
                kvt_tensor from = kvt_tensor_f32(x), to = kvt_tensor_f32(y);
                expect_ok(a->cache, kvt_read(of_a, layer, (kvt_side)side, first, n, &from));
                expect_ok(b->cache, kvt_read(of_b, layer, (kvt_side)side, first, n, &to));
                if (n == 25 && most > 0.05) /* the block's largest row may be out of sight */
                    all = 25.0 * 100 * 100 * (double)dim;
                for (size_t i = 0; i < count; i++) {
                    d += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
                    all += (double)x[i] * (double)x[i];
                }
                if (sqrt(d) > most * sqrt(all))
                    fail_msg("layer %u, %s, to type %d: error %g of %g", (unsigned)layer,
                             side ? "V" : "K", (int)(side ? c->v_type : c->k_type), sqrt(d / all),
                             most);
            }
}

/* The same subject with all groups in other types; 0: there is no such. */
static int retyped(const subject *s, kvt_type k, kvt_type v, subject *to)
{
    *to = *s;
    for (uint32_t g = 0; g < s->n_groups; g++) {
        to->groups[g].k_type = k;
        to->groups[g].v_type = v;
        if (s->groups[g].flags & KVT_GROUP_V_IN_K && (k != v || k == KVT_TYPE_I4))
            return 0;
    }
    open_cache(to, NULL);
    return 1;
}

/* Checkpoints are those of the source, and can be gone to. */
static void check_points(const subject *a, const kvt_seq *of_a, const subject *b, kvt_seq *of_b)
{
    uint64_t at[2][MOST];
    unsigned char blobs[2][64];
    size_t n[2], sizes[2];
    expect_ok(a->cache, kvt_seq_checkpoints(of_a, at[0], MOST, &n[0]));
    expect_ok(b->cache, kvt_seq_checkpoints(of_b, at[1], MOST, &n[1]));
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(at[0], at[1], n[0] * sizeof *at[0]);
    for (size_t i = n[0]; i-- > 0;) {
        expect_ok(a->cache, kvt_seq_checkpoint_read(of_a, at[0][i], blobs[0], 64, &sizes[0]));
        expect_ok(b->cache, kvt_seq_checkpoint_read(of_b, at[1][i], blobs[1], 64, &sizes[1]));
        assert_int_equal(sizes[0], sizes[1]);
        assert_memory_equal(blobs[0], blobs[1], sizes[0]);
        expect_ok(b->cache, kvt_seq_truncate(of_b, at[1][i]));
        (void)attend_hash(b, of_b);
        if (i % 2) {
            step_of(b, of_b, 500, 80);
            (void)attend_hash(b, of_b);
        }
    }
}

static int converted, refused_for_windows;

static void check_pair(const subject *s, kvt_seq *seq, kvt_type k, kvt_type v, uint32_t codec)
{
    kvt_save_options o = saves(codec);
    kvt_load_options l = loads();
    const kvt_type k_all[2] = {k, k}, v_all[2] = {v, v};
    uint64_t hash = file_hash(s, seq), n = kvt_seq_length(seq);
    uint64_t seen = s->groups[0].window_tokens && n > 25 ? 25 : n; /* in sight */
    kvt_seq *of_save, *of_load, *again;
    kvt_status status;
    subject to;
    int same = 1;
    for (uint32_t g = 0; g < s->n_groups; g++)
        same &= s->groups[g].k_type == k && s->groups[g].v_type == v;
    if (!retyped(s, k, v, &to))
        return;
    of_save = tagged_seq(&to);
    of_load = tagged_seq(&to);
    grow(&to, of_load, 3);
    expect_ok(s->cache, kvt_seq_save(seq, in_folder("plain"), &o));
    o.convert = 1;
    o.k_types = k_all;
    o.v_types = v_all;
    o.n_types = codec % 2;
    status = kvt_seq_save(seq, in_folder("converted"), &o);
    assert_true(file_hash(s, seq) == hash);
    if (status != KVT_OK) {
        expect(s->cache, KVT_ERR_STATE, status);
        expect_error_text(s->cache, "types", "converted by a save");
        assert_true(s->groups[0].window_tokens > 0);
        refused_for_windows++;
    } else {
        expect_ok(to.cache, kvt_seq_load(of_save, in_folder("converted"), &l, NULL));
        expect_close(s, seq, &to, of_save, seen);
        converted++;
    }
    if (!same) {
        uint64_t was = file_hash(&to, of_load);
        expect(to.cache, KVT_ERR_MISMATCH, kvt_seq_load(of_load, in_folder("plain"), &l, NULL));
        assert_true(file_hash(&to, of_load) == was);
    }
    l.convert = 1;
    status = kvt_seq_load(of_load, in_folder("plain"), &l, NULL);
    if (status != KVT_OK) {
        expect(to.cache, KVT_ERR_MISMATCH, status);
        expect_error_text(to.cache, "types", "converted by a load");
        assert_int_equal(kvt_seq_length(of_load), 3);
        assert_true(s->groups[0].window_tokens > 0);
    } else {
        expect_close(s, seq, &to, of_load, seen);
        if (n < 640)
            step_of(&to, of_load, 600, 70);
        (void)attend_hash(&to, of_load);
        again = reloaded(&to, of_load);
        expect_equal(&to, of_load, again, "what a load has made", 0);
        kvt_seq_destroy(again);
        check_points(s, seq, &to, of_load);
    }
    kvt_seq_destroy(of_load);
    if (!kvt_seq_is_empty(of_save)) {
        expect_ok(to.cache, kvt_seq_fork(of_save, n, &again));
        if (!s->groups[0].window_tokens) /* else the file may lack what the sequence has */
            expect_ok(to.cache, kvt_seq_load(again, in_folder("plain"), &l, NULL));
        if (!s->groups[0].window_tokens && attend_hash(&to, of_save) != attend_hash(&to, again))
            fail_msg("types %d and %d: a save converts other than a load", (int)k, (int)v);
        kvt_seq_destroy(again);
        step_of(&to, of_save, 600, 70);
        (void)attend_hash(&to, of_save);
        again = reloaded(&to, of_save);
        expect_equal(&to, of_save, again, "what it has become", 0);
        kvt_seq_destroy(again);
        check_points(s, seq, &to, of_save);
    }
    kvt_seq_destroy(of_save);
    kvt_cache_destroy(to.cache);
}

static void pairs(void **state)
{
    static const size_t lengths[] = {0, 1, 64, 100, 330};
    rng r = {71};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        converted = 0;
        for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n += is_quick() ? 4 : 1)
            for (int what = 0; what < 2; what++) {
                subject s;
                kvt_seq *seq;
                open_kind(&s, kind, &r);
                seq = full_seq(&s, lengths[n]);
                if (what && lengths[n] > 150) { /* cut, and keys that have moved */
                    expect_ok(s.cache, kvt_seq_truncate(seq, kvt_seq_reachable(seq, 300)));
                    (void)kvt_seq_remove(seq, 64, 64);
                }
                for (size_t k = 0; k < 4; k++)
                    for (size_t v = 0; v < 5; v++)
                        check_pair(&s, seq, k_types[k], v_types[v], (uint32_t)(k + v + n) % 3);
                kvt_seq_destroy(seq);
                close_subject(&s);
            }
        assert_true(converted > (is_quick() ? 1 : 5));
    }
}

/* One side alone; V that is in K. */
static void sides(void **state)
{
    static const kvt_type i4 = KVT_TYPE_I4, f16 = KVT_TYPE_F16;
    rng r = {72};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int side = 0; side < 2; side++) {
            kvt_save_options o = saves(KVT_CODEC_RAW);
            kvt_snapshot_info info;
            kvt_status status;
            subject s;
            kvt_seq *seq;
            char text[200];
            open_kind(&s, kind, &r);
            seq = full_seq(&s, 90);
            o.convert = 1;
            o.n_types = 1;
            *(side ? &o.v_types : &o.k_types) = kind == LATENT ? &f16 : &i4;
            status = kvt_seq_save(seq, in_folder("one"), &o);
            if (kind == LATENT && side) { /* V is what K is */
                expect(s.cache, KVT_ERR_ARG, status);
                expect_error_text(s.cache, "these types", "V alone");
            } else {
                expect(s.cache, KVT_OK, status);
                info.struct_size = sizeof info;
                assert_int_equal(kvt_snapshot_inspect(in_folder("one"), 1, &info, text, 200),
                                 KVT_OK);
                for (uint32_t g = 0; g < s.n_groups; g++) {
                    kvt_type to = kind == LATENT ? f16 : i4;
                    assert_int_equal(info.groups[g].k_type, side ? s.groups[g].k_type : to);
                    assert_int_equal(info.groups[g].v_type,
                                     side || kind == LATENT ? to : s.groups[g].v_type);
                }
            }
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* What a type cannot store. */
static void overflows(void **state)
{
    static const kvt_type f16 = KVT_TYPE_F16;
    kvt_group_config g = group_of(2, 1, 1, 16, 16, KVT_TYPE_F32, KVT_TYPE_F32);
    rng r = {73};
    (void)state;
    for (int threads = 1; threads < 4; threads += 2)
        for (uint32_t codec = 0; codec < 3; codec++) {
            kvt_save_options o = saves(codec);
            kvt_load_options l = loads();
            subject s, to;
            kvt_seq *seq, *of_to;
            char text[200] = "";
            uint64_t hash;
            open_subject(&s, &g, 1, &r);
            s.n_threads = (uint32_t)threads;
            open_cache(&s, NULL);
            seq = tagged_seq(&s);
            s.t[0].v[70 * 16 + 5] = 1e6f;
            grow(&s, seq, 100);
            hash = file_hash(&s, seq);
            expect_ok(s.cache, kvt_seq_save(seq, in_folder("f32"), &o));
            o.convert = 1;
            o.n_types = 1;
            o.k_types = o.v_types = &f16;
            spill(in_folder("f16"), "old", 3);
            expect(s.cache, KVT_ERR_VALUE, kvt_seq_save(seq, in_folder("f16"), &o));
            expect_error_text(s.cache, "beyond", "converted by a save");
            {
                bytes old = slurp(in_folder("f16"));
                assert_int_equal(old.n, 3);
                bytes_free(&old);
            }
            assert_true(file_hash(&s, seq) == hash);
            assert_int_equal(kvt_snapshot_convert(in_folder("f32"), NULL, in_folder("f16"), &o,
                                                  text, sizeof text),
                             KVT_ERR_VALUE);
            assert_non_null(strstr(text, "beyond"));
            assert_true(retyped(&s, KVT_TYPE_F16, KVT_TYPE_F16, &to));
            of_to = tagged_seq(&to);
            l.convert = 1;
            expect(to.cache, KVT_ERR_VALUE, kvt_seq_load(of_to, in_folder("f32"), &l, NULL));
            expect_error_text(to.cache, "beyond", "converted by a load");
            assert_true(kvt_seq_is_empty(of_to));
            o.n_tokens = 64; /* before it */
            expect_ok(s.cache, kvt_seq_save(seq, in_folder("f16"), &o));
            expect_ok(to.cache, kvt_seq_load(of_to, in_folder("f16"), &l, NULL));
            kvt_seq_destroy(of_to);
            kvt_cache_destroy(to.cache);
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* ---- whole files ---- */

static kvt_status convert(const char *from, const kvt_load_options *l, const char *to,
                          const kvt_save_options *o, const char *says)
{
    char text[300] = "nothing";
    kvt_status status = kvt_snapshot_convert(from ? in_folder(from) : NULL, l,
                                             to ? in_folder(to) : NULL, o, text, sizeof text);
    if (status == KVT_OK ? says != NULL : !says || !strstr(text, says))
        fail_msg("%s to %s: status %d: %s", from, to, (int)status, text);
    assert_true(status != KVT_OK || !*text);
    assert_int_equal(kvt_snapshot_convert(from ? in_folder(from) : NULL, l,
                                          to ? in_folder(to) : NULL, o, NULL, 0),
                     status);
    text[0] = 'x';
    assert_int_equal(kvt_snapshot_convert(from ? in_folder(from) : NULL, l,
                                          to ? in_folder(to) : NULL, o, text, 0),
                     status);
    assert_int_equal(text[0], 'x');
    return status;
}

static void whole_files(void **state)
{
    rng r = {74};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (uint32_t codec = 0; codec < 3; codec++)
            for (int moved = 0; moved < 2; moved++) {
                kvt_save_options o = saves(codec);
                kvt_load_options l = loads();
                subject s;
                kvt_seq *seq, *to;
                open_kind(&s, kind, &r);
                seq = full_seq(&s, 250);
                if (moved)
                    (void)kvt_seq_remove(seq, 64, 64);
                expect_ok(s.cache, kvt_seq_save(seq, in_folder("a"), &o));
                grow(&s, seq, 60);
                mark(&s, seq);
                o.parent = in_folder("a");
                expect_ok(s.cache, kvt_seq_save(seq, in_folder("b"), &o));
                o = saves((codec + 1) % 3);
                if (has_crypt(&s))
                    o.key = l.key = a_key;
                assert_int_equal(convert("b", NULL, "c", &o, NULL), KVT_OK);
                to = tagged_seq(&s);
                expect_ok(s.cache, kvt_seq_load(to, in_folder("c"), &l, NULL));
                expect_equal(&s, seq, to, "merged and encrypted", codec);
                if (l.key) {
                    l.key = (const unsigned char *)"another key of thirty-two bytes.";
                    assert_int_equal(convert("c", &l, "d", NULL, "key"), KVT_ERR_MISMATCH);
                    assert_int_equal(convert("c", NULL, "d", NULL, "key"), KVT_ERR_MISMATCH);
                    assert_int_not_equal(access(in_folder("d"), F_OK), 0);
                    l.key = a_key;
                }
                o.key = NULL;
                assert_int_equal(
                    kvt_snapshot_convert(in_folder("c"), &l, in_folder("c"), &o, NULL, 0),
                    KVT_OK); /* over itself */
                expect_ok(s.cache, kvt_seq_load(to, in_folder("c"), NULL, NULL));
                expect_equal(&s, seq, to, "decrypted over itself", codec);
                kvt_seq_destroy(to);
                kvt_seq_destroy(seq);
                close_subject(&s);
                assert_int_equal(unlink(in_folder("c")), 0);
            }
}

/* ---- pieces, layers, tokens ---- */

/* Names and contents in order, as one text. */
static int collect(void *user, const kvt_snapshot_piece *piece)
{
    char *text = user;
    size_t n = strlen(text);
    (void)snprintf(text + n, 200 - n, "%s=%.*s;", piece->name, (int)piece->bytes,
                   piece->bytes ? (const char *)piece->data : "");
    return 0;
}

static void pieces_go_along(void **state)
{
    static const kvt_snapshot_piece first[] = {{"a", "1", 1}, {"b", "22", 2}, {"c", NULL, 0}};
    static const kvt_snapshot_piece others[] = {{"b", "new", 3}, {"d", "4", 1}, {"e", NULL, 0}};
    static const kvt_snapshot_piece twice[] = {{"x", "1", 1}, {"x", "2", 1}};
    static const kvt_snapshot_piece twice_replacing[] = {{"b", "1", 1}, {"b", "2", 1}};
    static const kvt_snapshot_piece unnamed[] = {{NULL, "1", 1}};
    rng r = {75};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_load_options l = loads();
    kvt_snapshot_piece many[20];
    char text[200] = "", names[20][12];
    subject s;
    kvt_seq *seq, *to;
    (void)state;
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 80);
    to = tagged_seq(&s);
    o.pieces = first;
    o.n_pieces = 3;
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("a"), &o));
    l.on_piece = collect;
    l.piece_user = text;
    assert_int_equal(kvt_snapshot_convert(in_folder("a"), &l, in_folder("b"), NULL, NULL, 0), 0);
    assert_string_equal(text, "a=1;b=22;c=;"); /* the caller sees those of the file */
    o.pieces = others;
    assert_int_equal(convert("b", NULL, "c", &o, NULL), KVT_OK);
    text[0] = '\0';
    expect_ok(s.cache, kvt_seq_load(to, in_folder("c"), &l, NULL));
    assert_string_equal(text, "a=1;b=new;c=;d=4;e=;");
    o.pieces = twice;
    o.n_pieces = 2;
    assert_int_equal(convert("b", NULL, "d", &o, "same name"), KVT_ERR_ARG);
    o.pieces = twice_replacing;
    assert_int_equal(convert("b", NULL, "d", &o, "same name"), KVT_ERR_ARG);
    o.pieces = unnamed;
    o.n_pieces = 1;
    assert_int_equal(convert("b", NULL, "d", &o, "name"), KVT_ERR_ARG);
    o.pieces = NULL;
    assert_int_equal(convert("b", NULL, "d", &o, "pieces"), KVT_ERR_ARG);
    for (int i = 0; i < 20; i++) {
        (void)snprintf(names[i], sizeof names[i], "%d", i);
        many[i].name = names[i];
        many[i].data = names[i];
        many[i].bytes = 1;
    }
    o.pieces = many;
    o.n_pieces = 20;
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("many"), &o));
    o.pieces = NULL;
    o.n_pieces = 0;
    assert_int_equal(convert("many", NULL, "c", &o, NULL), KVT_OK);
    text[0] = '\0';
    expect_ok(s.cache, kvt_seq_load(to, in_folder("c"), &l, NULL));
    assert_int_equal(strlen(text), 10 * 4 + 10 * 5);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

static int stop(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    return done == total;
}

static int stop_at_piece(void *user, const kvt_snapshot_piece *piece)
{
    (void)user;
    return piece->bytes > 0;
}

static void parts_of_files(void **state)
{
    static const uint32_t layers[] = {1, 4}, down[] = {1, 0}, far[] = {0, 9}, beyond[] = {9};
    static const uint32_t many[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    static const kvt_type f16 = KVT_TYPE_F16;
    static const kvt_snapshot_piece piece = {"p", "1", 1};
    static const int32_t prompt[] = {1};
    rng r = {76};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_load_options l = loads();
    kvt_snapshot_info info;
    subject s;
    kvt_seq *seq;
    (void)state;
    open_kind(&s, WINDOW, &r);
    seq = full_seq(&s, 130);
    o.pieces = &piece;
    o.n_pieces = 1;
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("a"), &o));
    o = saves(KVT_CODEC_ZSTD);
    l.layers = layers;
    l.n_layers = 2;
    o.n_tokens = 100;
    o.convert = 1;
    o.n_types = 1;
    o.k_types = o.v_types = &f16;
    assert_int_equal(convert("a", &l, "b", &o, NULL), KVT_OK);
    info.struct_size = sizeof info;
    assert_int_equal(kvt_snapshot_inspect(in_folder("b"), 1, &info, NULL, 0), KVT_OK);
    assert_int_equal(info.n_layers, 2);
    assert_int_equal(info.n_groups, 2);
    assert_int_equal(info.n_tokens, 100);
    assert_int_equal(info.groups[0].k_type, KVT_TYPE_F16);
    assert_int_equal(info.groups[0].window_tokens, 70);
    assert_int_equal(info.groups[1].v_type, KVT_TYPE_F16);
    o = saves(KVT_CODEC_RAW);
    for (int i = 0; i < 18; i++) {
        kvt_status expected = KVT_ERR_ARG;
        const char *from = "a", *to = "x", *says = "";
        l = loads();
        o = saves(KVT_CODEC_RAW);
        switch (i) {
        case 0: l.layers = down, l.n_layers = 2, says = "ascend"; break;
        case 1: l.layers = many, l.n_layers = 17, says = "ascend"; break;
        case 2: l.layers = far, l.n_layers = 2, says = "layer"; break;
        case 3: l.layers = beyond, l.n_layers = 1, says = "layer"; break;
        case 4: l.n_layers = 2, says = "layers"; break;
        case 5: l.struct_size = 1, says = "struct_size"; break;
        case 6: o.struct_size = 1, says = "struct_size"; break;
        case 7: l.prompt = prompt, l.n_prompt = 1, says = "prompt"; break;
        case 8: l.reuse = 1, says = "reuse"; break;
        case 9: l.map = 1, says = "map"; break;
        case 10: l.convert = 1, says = "convert"; break;
        case 11: from = NULL, says = "path"; break;
        case 12: to = NULL, says = "path"; break;
        case 13: from = "none", expected = KVT_ERR_IO, says = "none"; break;
        case 16: o.pieces = &piece, o.n_pieces = SIZE_MAX, says = "n_pieces is too large"; break;
        case 17: l.n_prompt = 1, says = "prompt"; break;
        case 14: l.progress = stop, expected = KVT_ERR_CANCELLED, says = "cancelled"; break;
        default:
            l.on_piece = stop_at_piece, expected = KVT_ERR_CANCELLED, says = "cancelled";
            break;
        }
        assert_int_equal(convert(from, &l, to, &o, says), expected);
        assert_int_not_equal(access(in_folder("x"), F_OK), 0);
    }
    kvt_seq_destroy(seq);
    seq = seq_of(&s); /* nothing in it */
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("empty"), NULL));
    assert_int_equal(convert("empty", NULL, "b", NULL, NULL), KVT_OK);
    assert_int_equal(kvt_snapshot_inspect(in_folder("b"), 1, &info, NULL, 0), KVT_OK);
    assert_int_equal(info.n_tokens, 0);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

static kvt_status anew(const char *from, const char *to, char *text)
{
    kvt_save_options o = saves(KVT_CODEC_RAW);
    return kvt_snapshot_convert(in_folder(from), NULL, in_folder(to), &o, text, 256);
}

/* Onto a parent of the file: with it others would be lost that have it for a parent. */
static void chains(void **state)
{
    static const char *const names[] = {"root", "middle", "last"};
    rng r = {91};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_seq *seq, *to;
    char text[256];
    subject s;
    (void)state;
    open_kind(&s, I8, &r);
    seq = tagged_seq(&s);
    to = tagged_seq(&s);
    for (int i = 0; i < 3; i++) {
        o.parent = i ? in_folder(names[i - 1]) : NULL;
        grow(&s, seq, 100);
        expect_ok(s.cache, kvt_seq_save(seq, in_folder(names[i]), &o));
    }
    assert_int_equal(symlink("root", in_folder("link")), 0);
    for (int i = 0; i < 3; i++) {
        static const char *const onto[] = {"root", "middle", "link"};
        assert_int_equal(anew("last", onto[i], text), KVT_ERR_ARG);
        assert_non_null(strstr(text, "the output is a parent of the file"));
        assert_non_null(strstr(text, onto[i]));
        expect_ok(s.cache, kvt_seq_load(to, in_folder("last"), NULL, NULL));
        expect_equal(&s, seq, to, "of a chain", (size_t)i);
    }
    { /* the folder of the parents, where that is the current one */
        kvt_load_options l = loads();
        int here = open(".", O_RDONLY);
        assert_true(here >= 0);
        l.folder = "";
        assert_int_equal(chdir(folder), 0);
        assert_int_equal(kvt_snapshot_convert("last", &l, "new", NULL, text, sizeof text), KVT_OK);
        assert_int_equal(unlink("new"), 0);
        assert_int_equal(fchdir(here), 0);
        assert_int_equal(close(here), 0);
    }
    assert_int_equal(anew("root", "root", text), KVT_OK); /* raw as it is: its id stays */
    expect_ok(s.cache, kvt_seq_load(to, in_folder("last"), NULL, NULL));
    assert_int_equal(anew("last", "last", text), KVT_OK);
    assert_int_equal(unlink(in_folder("root")), 0);
    expect_ok(s.cache, kvt_seq_load(to, in_folder("last"), NULL, NULL));
    expect_equal(&s, seq, to, "folded", 0);
    assert_int_equal(anew("middle", "new", text), KVT_ERR_IO);
    assert_non_null(strstr(text, "root"));
    spill(in_folder("root"), "no snapshot at all", 18);
    assert_int_equal(anew("middle", "new", text), KVT_ERR_FORMAT);
    assert_non_null(strstr(text, "in the parent root, not a kvtile snapshot"));
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* What cannot be read twice; what claims more than it can hold. */
/* With another codec a file has the same contents: deltas of it load as before. */
static void codec_in_place(void **state)
{
    static const uint32_t residuals[] = {0, 1, 64, 200, 500, KVT_RESIDUAL_NONE};
    static const uint32_t windows[] = {0, 1, 100, 300};
    (void)state;
    for (size_t i = 0; i < 4 * 6 * 4; i++) {
        kvt_group_config groups[2] = {group_of(1, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8),
                                      group_of(1, 2, 1, 16, 16, KVT_TYPE_I4, KVT_TYPE_I5)};
        const int has_point = i % 2, is_part = i / 2 % 2;
        rng r = {i};
        uint64_t whole;
        kvt_seq *seq, *to;
        kvt_save_options o = saves(KVT_CODEC_RAW);
        char why[200] = "";
        subject s;
        for (int g = 0; g < 2; g++) {
            groups[g].residual_tokens = residuals[i / 4 % 6];
            groups[g].window_tokens = windows[i / 24];
            groups[g].sink_tokens = groups[g].window_tokens && g ? 70 : 0;
        }
        open_subject(&s, groups, 2, &r);
        open_cache(&s, NULL);
        seq = tagged_seq(&s);
        to = tagged_seq(&s);
        while (kvt_seq_length(seq) < MOST - 90) {
            grow(&s, seq, 40);
            if (has_point && kvt_seq_length(seq) % 280 == 0)
                expect_ok(s.cache, kvt_seq_checkpoint(seq, "x", 1));
        }
        if (is_part && kvt_seq_reachable(seq, kvt_seq_length(seq) - 3) == kvt_seq_length(seq) - 3)
            expect_ok(s.cache, kvt_seq_truncate(seq, kvt_seq_length(seq) - 3));
        expect_ok(s.cache, kvt_seq_save(seq, in_folder("base"), &o));
        grow(&s, seq, 70);
        o.parent = in_folder("base");
        expect_ok(s.cache, kvt_seq_save(seq, in_folder("child"), &o));
        expect_ok(s.cache, kvt_seq_load(to, in_folder("child"), NULL, NULL));
        whole = file_hash(&s, to);
        o = saves(KVT_CODEC_ZSTD);
        if (kvt_snapshot_convert(in_folder("base"), NULL, in_folder("base"), &o, why, sizeof why))
            fail_msg("%zu: %s", i, why);
        expect_ok(s.cache, kvt_seq_load(to, in_folder("child"), NULL, NULL));
        assert_true(file_hash(&s, to) == whole);
        kvt_seq_destroy(seq);
        kvt_seq_destroy(to);
        close_subject(&s);
    }
}

static void sources(void **state)
{
    rng r = {92};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    char text[256];
    kvt_seq *seq;
    bytes file;
    subject s;
    (void)state;
    assert_int_equal(mkfifo(in_folder("pipe"), 0600), 0);
    assert_int_equal(anew("pipe", "new", text), KVT_ERR_IO);
    assert_non_null(strstr(text, "not a regular file"));
    open_kind(&s, I8, &r);
    seq = tagged_seq(&s);
    grow(&s, seq, 70);
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("file"), &o));
    file = slurp(in_folder("file"));
    put64(file.data + 24, (uint64_t)1 << 30); /* tokens */
    put64(file.data + 48, (uint64_t)1 << 24); /* blocks: one for 64 */
    resum(file.data, file.n);
    spill(in_folder("liar"), file.data, file.n);
    assert_int_equal(anew("liar", "new", text), KVT_ERR_CORRUPT);
    assert_non_null(strstr(text, "cannot hold the 1073741824 tokens and 16777216 blocks"));
    assert_int_equal(access(in_folder("new"), F_OK), -1);
    bytes_free(&file);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chains),         cmocka_unit_test(codec_in_place),
        cmocka_unit_test(sources),        cmocka_unit_test(pairs),
        cmocka_unit_test(sides),          cmocka_unit_test(overflows),
        cmocka_unit_test(whole_files),    cmocka_unit_test(pieces_go_along),
        cmocka_unit_test(parts_of_files),
    };
    RUN_IN_FOLDER(tests);
}
