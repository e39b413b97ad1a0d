/*
 * Every byte of a set of snapshots is changed, and each of them is cut at every length: all of it
 * is refused, by each way to load, and the sequence stays as it was. The set has every section,
 * encoding, filter and representation, which is asserted.
 *
 * Bytes of headers, section heads and tables get all 255 other values where memory is loaded; all
 * other bytes, and all bytes by the other ways, 9: each bit flipped, and all of them. A file that
 * is mapped and verified late may be taken first: then the call that meets the damage refuses it,
 * with its output unwritten, and no call gives another number than the sound file does.
 *
 * KVT_TEST_FULL: all of it (minutes); otherwise a sample of the bytes, KVT_TEST_QUICK: a smaller
 * one. Counts are printed. Runs in a folder of its own under the current one.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_support.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[64];
static size_t every = 1; /* bytes that are changed: one in so many */

static const char *in_folder(const char *name)
{
    static char path[8][160];
    static int turn;
    turn = (turn + 1) % 8;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static bytes slurp(const char *path)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    b.data = malloc((size_t)1 << 20);
    assert_non_null(b.data);
    b.n = fread(b.data, 1, (size_t)1 << 20, f);
    (void)fclose(f);
    return b;
}

/* ---- contents ---- */

enum { LAYERS = 3, HEADS = 1, K_DIM = 16, V_DIM = 8, MOST = 256 };

static const unsigned char key[KVT_KEY_BYTES] = "another key of thirty-two bytes.";

/*
 * Noise, which no codec makes much smaller; but layer 0's values repeat, as those of equal tokens
 * do, and in layer 1 tokens follow each other closely.
 */
static float number(uint32_t layer, uint64_t token, size_t i, int is_k)
{
    rng r = {layer * 1000003u + (layer == 0 && !is_k ? token % 5 : token) * 131u + i * 2u +
             (unsigned)is_k};
    if (layer == 1)
        return (float)((i * 5 + token) % 61) / 8.0f;
    return (float)rng_normal(&r);
}

static void append(const model *m, kvt_cache *cache, kvt_seq *seq, size_t n)
{
    static float k[MOST * K_DIM], v[MOST * V_DIM];
    kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
    uint64_t first = kvt_seq_length(seq);
    int32_t ids[MOST];

    assert_true(n <= MOST);
    expect_ok(cache, kvt_seq_begin(seq, n, NULL));
    for (uint32_t g = 0; g < m->n_groups; g++)
        for (uint32_t l = 0; l < m->groups[g].n_layers; l++) {
            uint32_t layer = m->layers[g][l];
            for (size_t t = 0; t < n; t++) {
                ids[t] = (int32_t)((first + t) % 50);
                for (size_t i = 0; i < m->groups[g].k_dim; i++)
                    k[t * m->groups[g].k_dim + i] = number(layer, first + t, i, 1);
                for (size_t i = 0; i < m->groups[g].v_dim; i++)
                    v[t * m->groups[g].v_dim + i] = number(layer, first + t, i, 0);
            }
            expect_ok(cache, kvt_append(seq, layer, &k_view, &v_view));
        }
    expect_ok(cache, kvt_seq_commit(seq, ids));
}

/* ---- a file of the set ---- */

typedef enum case_kind {
    CODED,      /* i8; tag, pieces, checkpoint, shifts */
    NATIVE,     /* the same, raw */
    COARSE,     /* i4, i5: fine, sealed, open, open again */
    COARSE_RAW, /* the same, raw */
    WIDE,       /* f16 and f32, in two groups */
    CHILD,      /* a delta */
    PARENT,     /* its parent is changed */
    SECRET,     /* encrypted */
    CASES
} case_kind;

static const char *const case_names[CASES] = {"coded i8",       "native i8",      "coded i4, i5",
                                              "native i4, i5",  "coded f16, f32", "delta",
                                              "delta's parent", "encrypted"};

static model model_for(case_kind kind)
{
    static const float frequencies[2] = {1.0f, 0.125f};
    model m = model_of(LAYERS, HEADS, K_DIM, V_DIM, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_group_config *g = &m.groups[0];

    m.max_tokens = MOST;
    g->n_q_heads = 2;
    g->flags = KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET | KVT_GROUP_NO_V_ROTATION;
    g->residual_tokens = KVT_RESIDUAL_NONE;
    if (kind == COARSE || kind == COARSE_RAW) {
        g->k_type = KVT_TYPE_I4;
        g->v_type = KVT_TYPE_I5;
        g->flags = 0;
    }
    if (kind == WIDE) {
        g->n_layers = 1;
        g->k_type = KVT_TYPE_F16;
        g->v_type = KVT_TYPE_F32;
        g->flags = 0;
        m.groups[1] = *g;
        m.groups[1].v_type = KVT_TYPE_F16;
        m.layers[1][0] = 1;
        m.n_groups = 2;
    }
    if (kind == CODED || kind == NATIVE) {
        g->rope_pairing = KVT_ROPE_HALVES;
        g->rope_dims = 4;
        g->rope_inverse_frequencies = frequencies;
    }
    return m;
}

/* What calls give, of the sequence and of it cut to its checkpoint. */
typedef struct answers {
    float data[2][LAYERS][2 * K_DIM + 2 * MOST * K_DIM];
    size_t count[2][LAYERS];
} answers;

typedef struct subject {
    case_kind kind;
    model m;
    kvt_cache *cache;
    kvt_seq *seq; /* must not change */
    uint64_t hash;
    bytes before;                       /* what it holds */
    bytes good, changed;                /* the file */
    bytes child;                        /* of PARENT: what is loaded */
    int fd;                             /* of the file with the change */
    unsigned char *structural, *unread; /* [good.n] */
    answers *sound;
    size_t trials, refused, late, same; /* late: at first use; same: bytes that nobody reads */
} subject;

static kvt_save_options save_options(uint32_t codec)
{
    static const kvt_snapshot_piece pieces[] = {{"one", "piece of the caller", 19}, {"two", "", 0}};
    kvt_save_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.codec = codec;
    o.no_fsync = 1;
    o.pieces = pieces;
    o.n_pieces = 2;
    return o;
}

static void make_file(subject *s)
{
    kvt_seq *seq = model_seq(s->cache);
    case_kind kind = s->kind;
    kvt_save_options o = save_options(
        kind == NATIVE || kind == COARSE_RAW || kind == PARENT ? KVT_CODEC_RAW : KVT_CODEC_ZSTD);
    const char *path = in_folder("file");

    if (kind == CODED || kind == NATIVE)
        expect_ok(s->cache, kvt_seq_set_tag(seq, "a tag", 5));
    if (kind == CHILD || kind == PARENT) {
        append(&s->m, s->cache, seq, 70);
        expect_ok(s->cache, kvt_seq_checkpoint(seq, "blob", 4));
        expect_ok(s->cache, kvt_seq_save(seq, in_folder("parent"), &o));
        append(&s->m, s->cache, seq, 30);
        o.parent = in_folder("parent");
    } else if (kind == COARSE || kind == COARSE_RAW) {
        append(&s->m, s->cache, seq, 135);
        append(&s->m, s->cache, seq, 1);
        expect_ok(s->cache, kvt_seq_truncate(seq, 131)); /* fine, sealed, open */
        append(&s->m, s->cache, seq, 66);
        append(&s->m, s->cache, seq, 1);
        expect_ok(s->cache, kvt_seq_truncate(seq, 140)); /* is opened again */
        append(&s->m, s->cache, seq, 1);
    } else if (kind == WIDE || kind == SECRET) {
        append(&s->m, s->cache, seq, 20);
    } else {
        append(&s->m, s->cache, seq, 68);
        append(&s->m, s->cache, seq, 2);
        expect_ok(s->cache, kvt_seq_remove(seq, 65, 2)); /* keys that have moved */
        expect_ok(s->cache, kvt_seq_checkpoint(seq, "a blob of the caller's", 22));
        append(&s->m, s->cache, seq, 3);
        expect_ok(s->cache, kvt_seq_set_next_position(seq, 500));
    }
    if (kind == SECRET)
        o.key = key;
    expect_ok(s->cache, kvt_seq_save(seq, path, &o));
    s->good = slurp(kind == PARENT ? in_folder("parent") : path);
    if (kind == PARENT)
        s->child = slurp(path);
    kvt_seq_destroy(seq);
}

/* ---- what a mapped sequence answers ---- */

/* Attention and reading of each layer. 1: all is as `sound` says; else one was refused. */
static int ask(const subject *s, kvt_seq *seq, int part, answers *a, const answers *sound)
{
    uint64_t n = kvt_seq_length(seq);
    int refused = 0;

    for (uint32_t layer = 0; layer < s->m.n_groups * s->m.groups[0].n_layers; layer++) {
        float *to = a->data[part][layer], q[2 * K_DIM];
        const size_t n_out = 2 * V_DIM;
        kvt_attend_args args = kvt_attend_args_init();
        kvt_attend_item item;
        size_t at = 0;

        for (size_t i = 0; i < 2 * K_DIM; i++)
            q[i] = (float)i / 16.0f;
        memset(&item, 0, sizeof item);
        item.seq = seq;
        item.n_queries = 1;
        args.layer = layer;
        args.items = &item;
        args.n_items = 1;
        args.q = kvt_tensor_f32(q);
        for (int call = 0; call < 3; call++) {
            size_t count = call == 0 ? n_out : (size_t)n * (call == 1 ? K_DIM : V_DIM);
            kvt_tensor out = kvt_tensor_f32(to + at);
            kvt_status status;
            for (size_t i = 0; i < count; i++)
                to[at + i] = -777.0f;
            args.out = out;
            status = call == 0
                         ? kvt_attend(s->cache, &args)
                         : kvt_read(seq, layer, call == 1 ? KVT_SIDE_K : KVT_SIDE_V, 0, n, &out);
            if (status != KVT_OK) {
                expect(s->cache, KVT_ERR_CORRUPT, status);
                for (size_t i = 0; i < count; i++)
                    assert_true(to[at + i] == -777.0f); /* nothing is written */
                refused = 1;
            } else if (sound &&
                       memcmp(to + at, sound->data[part][layer] + at, count * sizeof *to) != 0) {
                fail_msg("%s: a wrong number", case_names[s->kind]);
            }
            at += count;
        }
        a->count[part][layer] = at;
    }
    return !refused;
}

/* All of a sequence that was loaded. 1: as the sound one. */
static int ask_all(const subject *s, kvt_seq *seq, answers *a, const answers *sound)
{
    uint64_t points[4];
    size_t n = 0;
    int sound_all = ask(s, seq, 0, a, sound);
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_status status = kvt_seq_save_stream(seq, &writer, NULL);

    bytes_free(&b);
    if (status != KVT_OK) {
        expect(s->cache, KVT_ERR_CORRUPT, status);
        sound_all = 0;
    }
    expect_ok(s->cache, kvt_seq_checkpoints(seq, points, 4, &n));
    if (n) {
        expect_ok(s->cache, kvt_seq_truncate(seq, points[n - 1]));
        sound_all &= ask(s, seq, 1, a, sound);
    }
    return sound_all;
}

/* ---- ways to load ---- */

typedef enum route { STREAM, MEMORY, PATH, VERIFY, LAZY, ROUTES } route;

static const char *const route_names[ROUTES] = {"stream", "memory", "file", "mapped",
                                                "mapped, lazy"};

static kvt_status load(const subject *s, route way, const bytes *file)
{
    kvt_load_options o;
    bytes b = *file;
    kvt_reader reader = bytes_reader(&b);

    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.folder = folder;
    o.key = s->kind == SECRET ? key : NULL;
    b.at = 0;
    if (way == STREAM)
        return kvt_seq_load_stream(s->seq, &reader, &o, NULL);
    if (way == MEMORY)
        return kvt_seq_load_memory(s->seq, file->data, file->n, &o, NULL);
    o.map = way == VERIFY ? KVT_MAP_VERIFY : way == LAZY ? KVT_MAP_LAZY : KVT_MAP_NONE;
    return kvt_seq_load(s->seq, in_folder("file"), &o, NULL);
}

static void restore(const subject *s)
{
    expect_ok(s->cache, load_bytes(s->seq, s->before.data, s->before.n, NULL));
}

static void check(const subject *s)
{
    assert_true(state_hash(&s->m, s->cache, s->seq) == s->hash);
}

/* Load what has a change at a place. */
static void trial(subject *s, route way, size_t at, size_t n)
{
    static answers got;
    bytes file = s->kind == PARENT ? s->child : s->changed;
    kvt_status status;

    if (s->kind != PARENT)
        file.n = n;
    status = load(s, way, &file);
    s->trials++;
    if (status == KVT_OK) {
        int is_sound = ask_all(s, s->seq, &got, s->sound);
        if (!is_sound && way == LAZY)
            s->late++;
        else if (is_sound && at < s->good.n && s->unread[at])
            s->same++;
        else
            fail_msg("%s, %s: byte %zu of %zu, %zu bytes: loaded", case_names[s->kind],
                     route_names[way], at, s->good.n, n);
        restore(s);
    } else if (status == KVT_ERR_CORRUPT || status == KVT_ERR_FORMAT ||
               status == KVT_ERR_MISMATCH || status == KVT_ERR_IO || status == KVT_ERR_FULL) {
        s->refused++;
    } else {
        char text[256] = "";
        (void)kvt_cache_error(s->cache, text, sizeof text);
        fail_msg("%s, %s: byte %zu of %zu: status %d, %s", case_names[s->kind], route_names[way],
                 at, s->good.n, (int)status, text);
    }
    if (s->trials % 64 == 0)
        check(s); /* a change would stay */
}

static int has_route(const subject *s, route way)
{
    return s->kind == SECRET ? way <= PATH : s->kind != PARENT || way >= PATH;
}

static void put_byte(const subject *s, size_t at, unsigned char value)
{
    s->changed.data[at] = value;
    assert_int_equal(pwrite(s->fd, &value, 1, (off_t)at), 1);
}

static void flips(subject *s, size_t at)
{
    unsigned char was = s->good.data[at];

    for (int value = 0; value < 256; value++) {
        unsigned difference = (unsigned)value ^ was;
        int few = difference == 0xff || (difference & (difference - 1)) == 0;
        if (value == was || (!few && !s->structural[at]))
            continue;
        put_byte(s, at, (unsigned char)value);
        for (int way = 0; way < ROUTES; way++)
            if (has_route(s, (route)way) &&
                (few || way == MEMORY || (s->kind == PARENT && way == PATH)))
                trial(s, (route)way, at, s->good.n);
    }
    put_byte(s, at, was);
}

static void cuts(subject *s)
{
    for (size_t n = s->good.n; n-- > 0;) {
        assert_int_equal(ftruncate(s->fd, (off_t)n), 0);
        if (n % every && n > 100 && n < s->good.n - 100)
            continue;
        for (int way = 0; way < ROUTES; way++)
            if (has_route(s, (route)way))
                trial(s, (route)way, s->good.n, n);
    }
    assert_int_equal(pwrite(s->fd, s->good.data, s->good.n, 0), (ssize_t)s->good.n);
    /* And a byte behind the end, where the file is known to end. */
    for (int value = 0; value < 256; value += 15) {
        s->changed.data[s->good.n] = (unsigned char)value;
        assert_int_equal(pwrite(s->fd, s->changed.data + s->good.n, 1, (off_t)s->good.n), 1);
        for (int way = MEMORY; way < ROUTES; way++)
            if (has_route(s, (route)way))
                trial(s, (route)way, s->good.n, s->good.n + 1);
    }
    assert_int_equal(ftruncate(s->fd, (off_t)s->good.n), 0);
}

/* ---- coverage ---- */

/* What the set has: sections, filters, codecs, kinds, representations, places, layouts. */
static struct {
    unsigned sections, filters[2], kinds, forms, places, layouts, padded, moved, encrypted;
} seen;

static void mark(const subject *s, size_t at, size_t n)
{
    memset(s->structural + at, 1, n);
}

static int is_inherited(const subject *s, const unsigned char *id)
{
    size_t size, at = section_payload(s->child.data, s->child.n, 3, 0, &size);
    for (size_t i = 0; i + 8 < size; i += 32)
        if (memcmp(s->child.data + at + i, id, 16) == 0)
            return 1;
    return 0;
}

static void survey_set(const subject *s, const unsigned char *set, size_t at)
{
    size_t head = 16 + get32(set) * (size_t)24;
    mark(s, at, head);
    for (size_t i = 8; i + 8 < head; i += 24) {
        seen.kinds |= 1u << set[i];
        seen.filters[set[i + 3]] |= 1u << set[i + 2];
    }
}

static void survey(const subject *s)
{
    const unsigned char *d = s->good.data;
    size_t at = get32(d + 12), block_at = 0;

    if (s->kind == SECRET) {
        seen.encrypted = 1;
        mark(s, 0, 64 + 33);
        return;
    }
    mark(s, 0, at);
    seen.moved |= get32(d + 44);
    while (at + 32 <= s->good.n) {
        uint32_t type = get32(d + at);
        size_t size = (size_t)get64(d + at + 8), payload = at + 32;
        seen.sections |= 1u << type;
        mark(s, at, 32);
        if (type == 1 || type == 2 || type == 5 || type == 10)
            survey_set(s, d + payload, payload);
        else if (type == 13)
            seen.padded |= get64(d + at + 16) != 0;
        else if (type != 9 && type != 12)
            mark(s, payload, size);
        else
            mark(s, payload, 16);
        for (size_t i = 0; type == 3 && i + 8 < size; i += 32) {
            seen.forms |= 1u << d[payload + i + 28];
            seen.places |= 1u << d[payload + i + 30];
        }
        if (type == 4) {
            seen.layouts |= 1u << d[payload + 20];
            block_at = at;
        }
        /* Of a parent: what its child does not take. */
        if (s->kind == PARENT && (type == 3 || type == 8 || type == 9 || type == 12))
            memset(s->unread + at, 1, 32 + size);
        if (s->kind == PARENT && type == 14 && !is_inherited(s, d + payload))
            memset(s->unread + block_at, 1, payload + size - block_at);
        at = payload + size;
    }
}

/* ---- the runs ---- */

static subject open_case(case_kind kind)
{
    subject s;
    static answers sound[CASES], again;
    const char *name = kind == PARENT ? "parent" : "file";
    int has_sound = 0;

    memset(&s, 0, sizeof s);
    s.kind = kind;
    s.m = model_for(kind);
    s.cache = model_cache(&s.m);
    make_file(&s);
    s.changed = slurp(in_folder(name));
    s.fd = open(in_folder(name), O_RDWR);
    s.structural = calloc(s.good.n + 1, 1);
    s.unread = calloc(s.good.n + 1, 1);
    assert_true(s.fd >= 0 && s.structural && s.unread);
    survey(&s);
    s.seq = model_seq(s.cache);
    if (kind == CODED || kind == NATIVE)
        expect_ok(s.cache, kvt_seq_set_tag(s.seq, "a tag", 5));
    s.sound = &sound[kind];
    for (int way = 0; way < ROUTES; way++) /* the file is good */
        if (has_route(&s, (route)way)) {
            expect_ok(s.cache, load(&s, (route)way, kind == PARENT ? &s.child : &s.good));
            assert_true(
                ask_all(&s, s.seq, has_sound ? &again : s.sound, has_sound ? s.sound : NULL));
            has_sound = 1;
        }
    expect_ok(s.cache, kvt_seq_clear(s.seq));
    append(&s.m, s.cache, s.seq, 5);
    s.before = saved(s.cache, s.seq, KVT_CODEC_RAW);
    s.hash = state_hash(&s.m, s.cache, s.seq);
    return s;
}

static void close_case(subject *s)
{
    check(s);
    bytes_free(&s->before);
    bytes_free(&s->good);
    bytes_free(&s->changed);
    bytes_free(&s->child);
    free(s->structural);
    free(s->unread);
    (void)close(s->fd);
    kvt_seq_destroy(s->seq);
    kvt_cache_destroy(s->cache);
}

static void test_flips(void **state)
{
    size_t flipped = 0, cut = 0, refused = 0, late = 0, same = 0, all = 0;
#if defined(KVT_TEST_CRYPT)
    const int cases = CASES;
#else
    const int cases = SECRET;
#endif
    (void)state;

    every = is_full() ? 1 : is_quick() ? 97 : 23;
    for (int kind = 0; kind < cases; kind++) {
        subject s = open_case((case_kind)kind);
        size_t structural = 0, before;
        for (size_t i = 0; i < s.good.n; i++) {
            structural += s.structural[i];
            if (i % every == (size_t)kind % every)
                flips(&s, i);
        }
        before = s.trials;
        cuts(&s);
        print_message("%-16s %5zu bytes, %5zu of heads and tables: %8zu changes, %6zu cuts; %zu "
                      "refused at first use%s\n",
                      case_names[kind], s.good.n, structural, before, s.trials - before, s.late,
                      s.same ? ", some in what the child does not take" : "");
        assert_true(s.refused + s.late + s.same == s.trials);
        assert_true(s.same == 0 || kind == PARENT);
        flipped += before;
        cut += s.trials - before;
        refused += s.refused;
        late += s.late;
        same += s.same;
        all += s.trials;
        close_case(&s);
    }
    print_message("changes: %zu, cuts: %zu; refused: %zu, at first use: %zu, in bytes that are not "
                  "taken: %zu; loaded wrong: 0%s\n",
                  flipped, cut, refused, late, same, every > 1 ? " (a sample)" : "");
    assert_true(refused + late + same == all);
    assert_int_equal(seen.sections, 0x7ffe);    /* 1 to 14 */
    assert_int_equal(seen.filters[0], 1);       /* raw: native */
    assert_int_equal(seen.filters[1] & 14, 14); /* zstd: token-major, delta, planes */
    assert_int_equal(seen.kinds, 0xbe);         /* 1 to 5, 7 */
    assert_int_equal(seen.forms, 15);
    assert_int_equal(seen.places, 3);
    assert_int_equal(seen.layouts, 3);
    assert_true(seen.padded && seen.moved && seen.encrypted == (cases == CASES));
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(folder, sizeof folder, "test_snapshot_flips-%ld", (long)getpid());
    return mkdir(folder, 0700);
}

static int teardown(void **state)
{
    (void)state;
    (void)unlink(in_folder("file"));
    (void)unlink(in_folder("parent"));
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_flips)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
