/*
 * The calls' options and callbacks rather than the file: each fault that there can be, once, with
 * the sequence that the file makes. A call with a fault is refused, or fails as its callback says.
 */
#include "fuzz.h"

#include <stdio.h>

static unsigned char key[KVT_KEY_BYTES];

typedef struct failing {
    unsigned char *data;
    size_t n, room, at;
    unsigned countdown; /* the call that fails; 0: none */
} failing;

static int failing_write(void *user, const void *data, size_t n)
{
    failing *f = user;
    if (f->countdown && --f->countdown == 0)
        return 1;
    if (n > f->room - f->n)
        return 1;
    if (n)
        memcpy(f->data + f->n, data, n);
    f->n += n;
    return 0;
}

static int64_t failing_read(void *user, void *to, size_t n)
{
    failing *f = user;
    if (f->countdown && --f->countdown == 0)
        return -1;
    if (n > f->n - f->at)
        n = f->n - f->at;
    if (n)
        memcpy(to, f->data + f->at, n);
    f->at += n;
    return (int64_t)n;
}

/* ---- saves ---- */

enum { SAVE_FAULTS = 32 };

/* 0: there is no such fault. */
static int save_fault(unsigned i, const kvt_seq *seq, kvt_save_options *o)
{
    static const uint32_t layers[3] = {0, 0, 200};
    static const kvt_type types[2] = {KVT_TYPE_F16, (kvt_type)7};
    static kvt_snapshot_piece pieces[2];
    static char name[KVT_MAX_NAME + 2];

    memset(o, 0, sizeof *o);
    o->struct_size = sizeof *o;
    memset(name, 'n', sizeof name - 1);
    pieces[0].name = pieces[1].name = "twice";
    pieces[0].data = pieces[1].data = name;
    pieces[0].bytes = pieces[1].bytes = 2;
    o->pieces = pieces;
    switch (i) {
    case 0: o->struct_size = 3; break;
    case 1: o->codec = 3; break;
    case 2: o->no_fsync = 2; break;
    case 3: o->in_place = 2; break;
    case 4: o->convert = 2; break;
    case 5: o->zstd_level = 20; break;
    case 6: o->zstd_level = -8; break;
    case 7: o->convert = 1; break;
    case 8: o->k_types = types; break;
    case 9: o->v_types = types; break;
    case 10: o->first_token = 1; break;
    case 11: o->first_token = 1 << 20; break;
    case 12: o->n_tokens = kvt_seq_length(seq) + 1; break;
    case 13: o->layers = layers; break;
    case 14: o->n_layers = 1; break;
    case 15:
        o->layers = layers;
        o->n_layers = 2;
        break;
    case 16:
        o->layers = layers + 2;
        o->n_layers = 1;
        break;
    case 17:
        o->pieces = NULL;
        o->n_pieces = 1;
        break;
    case 18: o->n_pieces = (size_t)1 << 33; break;
    case 19:
        o->n_pieces = 1;
        pieces[0].name = NULL;
        break;
    case 20:
        o->n_pieces = 1;
        pieces[0].name = "";
        break;
    case 21:
        o->n_pieces = 1;
        pieces[0].name = name;
        break;
    case 22:
        o->n_pieces = 1;
        pieces[0].data = NULL;
        break;
    case 23:
        o->n_pieces = 1;
        pieces[0].bytes = SIZE_MAX / 2;
        break;
    case 24: o->n_pieces = 2; break;
    case 25: o->parent = ""; break;
    case 26: o->parent = "/nowhere/parent.kvt"; break;
    case 27: o->parent = folder_file(8, NULL, 0); break;
    case 28:
        o->convert = 1;
        o->k_types = types + 1;
        o->n_types = 1;
        break;
    case 29:
        o->convert = 1;
        o->v_types = types;
        o->n_types = 9;
        break;
    case 30: o->parent = "/proc/self/exe"; break;
    default: return 0;
    }
    return 1;
}

static void save_edges(place *p, const char *path, unsigned char *data, size_t room)
{
    kvt_save_options options;
    kvt_writer writer = {NULL, NULL};
    uint64_t bound;
    size_t n;
    FILE *f;

    for (unsigned i = 0; i < SAVE_FAULTS && save_fault(i, p->seq, &options); i++) {
        CHECK(kvt_seq_save(p->seq, path, &options) != KVT_OK);
        CHECK(kvt_seq_save_memory(p->seq, data, room, &n, &options) != KVT_OK || i == 27);
        (void)kvt_seq_save_bound(p->seq, &bound, &options);
    }
    CHECK(kvt_seq_save(NULL, path, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save(p->seq, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save(p->seq, "", NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save(p->seq, "/nowhere/file.kvt", NULL) == KVT_ERR_IO);
    CHECK(kvt_seq_save(p->seq, fuzz_folder(), NULL) != KVT_OK);
    CHECK(kvt_seq_save_stream(NULL, &writer, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_stream(p->seq, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_stream(p->seq, &writer, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_fd(NULL, 1, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_fd(p->seq, -1, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_fd(p->seq, 1 << 20, NULL) == KVT_ERR_IO);
    CHECK(kvt_seq_save_memory(NULL, data, room, &n, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_memory(p->seq, NULL, room, &n, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_memory(p->seq, data, room, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_bound(NULL, &bound, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_bound(p->seq, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_save_bound(p->seq, &bound, NULL) == KVT_OK);

    f = fopen(path, "wb");
    CHECK(f);
    CHECK(kvt_seq_save_fd(p->seq, fileno(f), NULL) == KVT_OK);
    CHECK(fclose(f) == 0);
    f = fopen(path, "rb");
    CHECK(f);
    CHECK(kvt_seq_clear(p->other) == KVT_OK);
    CHECK(kvt_seq_load_fd(p->other, fileno(f), NULL, NULL) == KVT_OK);
    CHECK(fclose(f) == 0);
    CHECK(kvt_seq_load_fd(p->other, -1, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load_fd(NULL, 0, NULL, NULL) == KVT_ERR_ARG);
    /* Its own parent; in a folder of another; a pending step. */
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.parent = path;
    CHECK(kvt_seq_save(p->seq, path, &options) == KVT_ERR_ARG);
    CHECK(kvt_seq_save(p->seq, "/tmp/kvt-fuzz-not-made", &options) == KVT_ERR_ARG);
    options.key = key; /* the parent's too, which has none */
    CHECK(kvt_seq_save(p->seq, folder_file(7, NULL, 0), &options) != KVT_OK);
    if (kvt_seq_begin(p->other, 1, NULL) == KVT_OK) {
        CHECK(kvt_seq_save(p->other, path, NULL) == KVT_ERR_STATE);
        CHECK(kvt_seq_load(p->other, path, NULL, NULL) == KVT_ERR_STATE);
        CHECK(kvt_seq_abort(p->other) == KVT_OK);
    }
}

/* ---- loads ---- */

static void load_edges(place *p, const unsigned char *data, size_t n, const char *path)
{
    static const int32_t prompt[2] = {-2, 0};
    static const uint32_t layers[3] = {1, 1, 300};
    kvt_load_options options;
    kvt_reader reader = {NULL, NULL};

    for (unsigned i = 0; i < 14; i++) {
        kvt_status status;
        memset(&options, 0, sizeof options);
        options.struct_size = sizeof options;
        switch (i) {
        case 0: options.struct_size = 1; break;
        case 1: options.reuse = 3; break;
        case 2: options.map = 3; break;
        case 3: options.convert = 2; break;
        case 4: options.n_prompt = 1; break;
        case 5: options.prompt = prompt; break;
        case 6:
            options.prompt = prompt;
            options.n_prompt = 1;
            break;
        case 7: options.layers = layers; break;
        case 8: options.n_layers = 1; break;
        case 9:
            options.layers = layers;
            options.n_layers = 2;
            break;
        case 10:
            options.layers = layers + 2;
            options.n_layers = 1;
            break;
        case 11: options.map = KVT_MAP_LAZY; break; /* of memory */
        case 12: options.key = key; break;          /* of a plain file */
        default:
            options.key = key;
            options.map = KVT_MAP_VERIFY;
            break;
        }
        (void)kvt_seq_load(p->other, path, &options, NULL);
        status = kvt_seq_load_memory(p->other, data, n, &options, NULL);
        CHECK(status != KVT_OK || i == 4 || i == 5 || i == 6 || i == 8 || i == 10);
    }
    CHECK(kvt_seq_load(NULL, path, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load(p->other, NULL, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load(p->other, "", NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load(p->other, "/nowhere", NULL, NULL) == KVT_ERR_IO);
    CHECK(kvt_seq_load(p->other, fuzz_folder(), NULL, NULL) != KVT_OK);
    CHECK(kvt_seq_load(p->other, "/dev/null", NULL, NULL) != KVT_OK);
    CHECK(kvt_seq_load_stream(NULL, &reader, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load_stream(p->other, NULL, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load_stream(p->other, &reader, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load_memory(NULL, data, n, NULL, NULL) == KVT_ERR_ARG);
    CHECK(kvt_seq_load_memory(p->other, NULL, n, NULL, NULL) == KVT_ERR_ARG);
}

static int refuse_piece(void *user, const kvt_snapshot_piece *piece)
{
    (void)user;
    (void)piece;
    return 1;
}

static int refuse_progress(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    (void)done;
    (void)total;
    return 1;
}

static void inspect_edges(const char *path)
{
    kvt_inspect_options options;
    kvt_load_options from;
    kvt_save_options to;
    kvt_snapshot_info info;
    char text[8];

    memset(&info, 0, sizeof info);
    CHECK(kvt_snapshot_inspect(path, 1, &info, text, sizeof text) == KVT_ERR_ARG);
    CHECK(kvt_snapshot_inspect(path, 1, NULL, text, sizeof text) == KVT_ERR_ARG);
    info.struct_size = sizeof info;
    CHECK(kvt_snapshot_inspect(NULL, 1, &info, NULL, 0) == KVT_ERR_ARG);
    CHECK(kvt_snapshot_inspect("", 1, &info, text, 0) == KVT_ERR_ARG);
    CHECK(kvt_snapshot_inspect("/nowhere", 1, &info, text, sizeof text) == KVT_ERR_IO);
    for (unsigned i = 0; i < 7; i++) {
        memset(&options, 0, sizeof options);
        options.struct_size = i == 0 ? 1 : sizeof options;
        options.verify = i == 1 ? 2 : 1;
        options.reserved = i == 2;
        options.key = i == 3 ? key : NULL;
        options.on_piece = i == 4 ? refuse_piece : NULL;
        options.progress = i == 5 ? refuse_progress : NULL;
        options.folder = i == 6 ? "/nowhere" : NULL;
        CHECK(kvt_snapshot_inspect_with(path, &options, &info, text, sizeof text) != KVT_OK ||
              i == 2 || i >= 4);
    }
    CHECK(kvt_snapshot_convert(NULL, NULL, path, NULL, text, sizeof text) == KVT_ERR_ARG);
    CHECK(kvt_snapshot_convert("", NULL, path, NULL, text, sizeof text) == KVT_ERR_ARG);
    CHECK(kvt_snapshot_convert(path, NULL, NULL, NULL, NULL, 0) == KVT_ERR_ARG);
    CHECK(kvt_snapshot_convert(path, NULL, "", NULL, text, 0) == KVT_ERR_ARG);
    CHECK(kvt_snapshot_convert("/nowhere", NULL, path, NULL, text, sizeof text) == KVT_ERR_IO);
    for (unsigned i = 0; i < 13; i++) {
        static const uint32_t layers[3] = {0, 0, 99};
        static const kvt_type types[1] = {KVT_TYPE_F16};
        static const kvt_snapshot_piece pieces[2] = {{"title", "new", 3}, {"fuzz", "b", 1}};
        static const kvt_snapshot_piece nameless = {NULL, "b", 1};
        memset(&from, 0, sizeof from);
        memset(&to, 0, sizeof to);
        from.struct_size = i == 0 ? 1 : sizeof from;
        to.struct_size = i == 1 ? 1 : sizeof to;
        from.map = i == 2;
        from.reuse = i == 3;
        from.convert = i == 4;
        from.layers = i == 5 ? layers : i == 6 ? layers + 2 : NULL;
        from.n_layers = i == 5 ? 2 : i == 6;
        to.convert = i == 7;
        to.k_types = i == 7 ? types : NULL;
        to.n_pieces = i == 8 || i == 12 ? 1 : i == 9 ? 2 : 0;
        to.pieces = i == 9 ? pieces : i == 12 ? &nameless : NULL;
        from.on_piece = i == 10 ? refuse_piece : NULL;
        to.progress = i == 11 ? refuse_progress : NULL;
        to.no_fsync = 1;
        CHECK(kvt_snapshot_convert(path, &from, folder_file(7, NULL, 0), &to, text, sizeof text) !=
                  KVT_OK ||
              i >= 9);
    }
}

/* ---- callbacks ---- */

static void callback_edges(place *p, unsigned char *data, size_t room)
{
    static const kvt_snapshot_piece pieces[2] = {{"title", "of two", 6}, {"none", "", 0}};
    kvt_save_options save;
    kvt_load_options load;
    for (unsigned coded = 0; coded < 4; coded++) {
        failing f = {data, 0, room, 0, 0};
        kvt_writer writer = {&f, failing_write};
        kvt_reader reader = {&f, failing_read};
        kvt_status status = KVT_ERR_IO;
        size_t step;
        memset(&save, 0, sizeof save);
        memset(&load, 0, sizeof load);
        save.struct_size = sizeof save;
        load.struct_size = sizeof load;
        save.pieces = pieces;
        save.n_pieces = 2;
        save.key = load.key = coded & 1 ? key : NULL;
        save.codec = coded & 2 ? KVT_CODEC_RAW : KVT_CODEC_ZSTD;
        for (unsigned fail = 1; status != KVT_OK && fail < 300; fail++) {
            f.n = 0;
            f.countdown = fail;
            status = kvt_seq_save_stream(p->seq, &writer, &save);
            CHECK(status == KVT_OK || status == KVT_ERR_IO || status == KVT_ERR_UNSUPPORTED);
            if (status == KVT_ERR_UNSUPPORTED)
                return;
        }
        CHECK(status == KVT_OK);
        for (unsigned fail = 1; fail < 300; fail++) {
            f.at = 0;
            f.countdown = fail;
            status = kvt_seq_load_stream(p->other, &reader, &load, NULL);
            CHECK(status == KVT_OK || status == KVT_ERR_IO);
            if (status == KVT_OK)
                break;
        }
        step = coded & 1 || f.n > 40000 ? 1 + f.n / 40 : 8; /* at each part of each section */
        for (size_t small = 0; small < f.n; small += step) {
            size_t n;
            CHECK(kvt_seq_save_memory(p->seq, data + f.n, small < room - f.n ? small : 0, &n,
                                      &save) == KVT_ERR_FULL);
        }
        for (size_t n = 0; n < f.n; n += step)
            CHECK(kvt_seq_load_memory(p->other, data, n, &load, NULL) == KVT_ERR_CORRUPT || n < 64);
    }
}

/* A delta, encrypted where there is a key, of a parent that is then damaged and cut. */
static void chain_edges(place *p, const unsigned char *with, unsigned char *data, size_t room)
{
    const char *parent = folder_file(8, NULL, 0), *child = folder_file(7, NULL, 0);
    kvt_save_options save;
    kvt_load_options load;
    kvt_status status;
    uint64_t bound;
    size_t n;
    FILE *f;

    memset(&save, 0, sizeof save);
    memset(&load, 0, sizeof load);
    save.struct_size = sizeof save;
    load.struct_size = sizeof load;
    save.no_fsync = 1;
    save.key = load.key = with;
    status = kvt_seq_save(p->seq, parent, &save);
    if (status == KVT_ERR_UNSUPPORTED)
        return;
    CHECK(status == KVT_OK);
    save.parent = parent;
    CHECK(kvt_seq_save(p->seq, child, &save) == KVT_OK);
    CHECK(kvt_seq_save_bound(p->seq, &bound, &save) == KVT_OK);
    CHECK(kvt_seq_load(p->other, child, &load, NULL) == KVT_OK);
    load.map = KVT_MAP_VERIFY;
    CHECK(kvt_seq_load(p->other, child, &load, NULL) == (with ? KVT_ERR_UNSUPPORTED : KVT_OK));
    load.map = 0;
    CHECK(kvt_seq_load(p->other, child, NULL, NULL) == (with ? KVT_ERR_MISMATCH : KVT_OK));
    CHECK(kvt_seq_clear(p->other) == KVT_OK); /* it is mapped */
    f = fopen(parent, "rb");
    CHECK(f);
    n = fread(data, 1, room, f);
    CHECK(fclose(f) == 0);
    /* Of a plain parent not all is read; the index and what is before the blocks are. */
    for (size_t at = 0; at < n; at += with || (at > 400 && n - at > 800) ? 1 + n / 50 : 4) {
        data[at] ^= 1;
        (void)folder_file(8, data, n);
        status = kvt_seq_load(p->other, child, &load, NULL);
        CHECK(status != KVT_OK || !with);
        status = kvt_seq_save(p->seq, folder_file(9, NULL, 0), &save);
        CHECK(status != KVT_OK || !with);
        data[at] ^= 1;
        (void)folder_file(8, data, at);
        CHECK(kvt_seq_load(p->other, child, &load, NULL) != KVT_OK);
    }
    (void)remove(parent);
    CHECK(kvt_seq_load(p->other, child, &load, NULL) == KVT_ERR_IO);
    load.folder = "/";
    CHECK(kvt_seq_load(p->other, child, &load, NULL) == KVT_ERR_IO);
}

void fuzz_edges(const uint8_t *input_data, size_t size)
{
    static unsigned char data[1 << 21];
    static const unsigned char text[80] = "not a snapshot";
    const char *path = folder_file(8, text, sizeof text);
    static const kvt_snapshot_piece pieces[2] = {{"title", "old", 3}, {"kept", "a", 1}};
    kvt_save_options options;

    input in;
    place *p;

    input_open(&in, input_data, size);
    p = place_of(&in);
    if (kvt_seq_load_memory(p->seq, in.files[0], in.bytes[0], NULL, NULL) != KVT_OK ||
        kvt_seq_length(p->seq) > 1000)
        return;
    save_edges(p, path, data, sizeof data);
    load_edges(p, in.files[0], in.bytes[0], path);
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.pieces = pieces;
    options.n_pieces = 2;
    CHECK(kvt_seq_save(p->seq, folder_file(9, NULL, 0), &options) == KVT_OK);
    inspect_edges(folder_file(9, NULL, 0));
    callback_edges(p, data, sizeof data);
    chain_edges(p, NULL, data, sizeof data);
    chain_edges(p, key, data, sizeof data);
    place_reset(p);
    for (size_t i = 7; i < 10; i++)
        (void)remove(folder_file(i, NULL, 0));
}
