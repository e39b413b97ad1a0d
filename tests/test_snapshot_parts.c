/*
 * Damage in what stands around the streams of a snapshot: images, digests and ids, the caller's
 * pieces, parents. Each is refused, and the sequence stays as it was.
 */
#include "snapshot_support.h"

#include <stdio.h>
#include <unistd.h>

static char folder[256];

static const char *in_folder(const char *name)
{
    static char path[512];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

/* A sequence that must stay as it is, and a sound file. */
typedef struct target {
    model m;
    kvt_cache *cache;
    kvt_seq *seq;
    uint64_t hash;
    bytes file;
} target;

static bytes copy_of(const bytes *file)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    assert_int_equal(writer.write(writer.user, file->data, file->n), 0);
    return b;
}

static kvt_status load(const target *t, const bytes *file)
{
    bytes b = *file;
    kvt_reader reader = bytes_reader(&b);
    kvt_load_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.folder = folder;
    b.at = 0;
    b.most = 0;
    return kvt_seq_load_stream(t->seq, &reader, &options, NULL);
}

static void refuse(const target *t, const bytes *file, const char *what, size_t where)
{
    kvt_status status = load(t, file);
    if (status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT && status != KVT_ERR_MISMATCH)
        fail_msg("%s, %zu: status %d", what, where, (int)status);
    assert_true(state_hash(&t->m, t->cache, t->seq) == t->hash);
}

/* n tokens of a model, saved; where `cut` is not 0 sealed, cut to so many, and one more. */
static target target_of(const model *m, size_t n, size_t cut)
{
    target t;
    kvt_seq *seq;
    t.m = *m;
    if (cut)
        t.m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    t.cache = model_cache(&t.m);
    seq = model_seq(t.cache);
    model_append(&t.m, t.cache, seq, n, 40);
    if (cut) {
        model_append(&t.m, t.cache, seq, 1, 1); /* sealings are final */
        expect_ok(t.cache, kvt_seq_truncate(seq, cut));
        model_append(&t.m, t.cache, seq, 1, 1);
    }
    t.file = saved(t.cache, seq, KVT_CODEC_RAW);
    kvt_seq_destroy(seq);
    t.seq = model_seq(t.cache);
    model_append(&t.m, t.cache, t.seq, 21, 4);
    t.hash = state_hash(&t.m, t.cache, t.seq);
    return t;
}

static void target_close(target *t)
{
    bytes_free(&t->file);
    kvt_seq_destroy(t->seq);
    kvt_cache_destroy(t->cache);
}

static unsigned char *payload(const bytes *f, uint32_t type, unsigned i, size_t *size)
{
    return f->data + section_payload(f->data, f->n, type, i, size);
}

/* ---- images ---- */

/* Every byte of an image that no stream has: tokens and dims that there are not, and filling. */
static void gaps_of(const model *m, size_t n, size_t cut)
{
    target t = target_of(m, n, cut);
    bytes ones = copy_of(&t.file), file = copy_of(&t.file);
    size_t size, image, gaps = 0, at = section_payload(t.file.data, t.file.n, 13, 0, &size);
    size_t padding = (size_t)get64(t.file.data + at - 16);

    assert_int_equal((at + padding) % 64, 0);
    memset(ones.data + at + padding, 0xff, size - padding);
    relay(&ones, 0);
    relay(&ones, 1);
    assert_int_equal(ones.n, t.file.n);
    resign(file.data, file.n);
    assert_memory_equal(file.data, t.file.data, file.n);
    image = (size - padding) / m->groups[0].n_layers;
    for (size_t i = padding; i < size; i++) {
        if (ones.data[at + i])
            continue;
        assert_int_equal(file.data[at + i], 0);
        if (gaps++ % (is_quick() ? 37 : 5) && i < size - 8 && (i - padding) % image > 8)
            continue;
        file.data[at + i] = gaps % 2 ? 0x80 : 1;
        resign(file.data, file.n);
        refuse(&t, &file, "a byte of an image that is nobody's", i);
        file.data[at + i] = 0;
    }
    assert_true(gaps > 100);
    resign(file.data, file.n);
    expect_ok(t.cache, load(&t, &file));
    bytes_free(&ones);
    bytes_free(&file);
    target_close(&t);
}

static void gaps(void **state)
{
    static const kvt_type k_types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4};
    (void)state;
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < 5; v++) {
            static const kvt_type v_types[] = {KVT_TYPE_F16, KVT_TYPE_F32, KVT_TYPE_I8, KVT_TYPE_I4,
                                               KVT_TYPE_I5};
            model m = model_of(2, 2, 24, 8, k_types[k], v_types[v]);
            gaps_of(&m, 37, 0); /* one block, open where it can be */
            if (k >= 2 || v >= 2)
                gaps_of(&m, 70, 61); /* a sealed one that was cut, or one that is open again */
            if (k == 3 || v >= 3) {
                m.groups[0].fine_tokens = KVT_FINE_NONE;
                gaps_of(&m, 70, 61);
            }
        }
    {
        model m = model_of(2, 2, 24, 8, KVT_TYPE_I8, KVT_TYPE_I8);
        m.groups[0].flags = KVT_GROUP_V_IN_K;
        gaps_of(&m, 37, 0);
    }
}

/* The native section itself: value, padding, size; and another layout than the block says. */
static void native_sections(void **state)
{
    model m = model_of(2, 1, 24, 8, KVT_TYPE_I8, KVT_TYPE_I5);
    target t;
    size_t size, at, padding = 0;
    (void)state;
    for (size_t i = 0; padding == 0; i++) { /* a piece in front moves the images */
        char data[64] = {4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 'n', 'a', 'm', 'e'};
        assert_true(i < 3);
        t = target_of(&m, 70, 0);
        data[8] = (char)(8 * i);
        add_section(&t.file, get32(t.file.data + 12), 12, 0, 0, data, 24 + 8 * i);
        relay(&t.file, 1);
        at = section_payload(t.file.data, t.file.n, 13, 0, &size);
        padding = (size_t)get64(t.file.data + at - 16);
        if (!padding)
            target_close(&t);
    }
    at = section_payload(t.file.data, t.file.n, 13, 0, &size);
    expect_ok(t.cache, load(&t, &t.file));
    t.hash = state_hash(&t.m, t.cache, t.seq);
    for (int i = 0; i < 12; i++) {
        bytes file = copy_of(&t.file);
        unsigned char *head = file.data + at - 32;
        switch (i) {
        case 0: head[32] = 1; break;
        case 1: head[32 + padding - 1] = 0x80; break;
        case 2: put64(head + 16, padding - 1); break;
        case 3: put64(head + 16, padding + 1); break;
        case 4: put64(head + 16, padding + 64); break;
        case 5: put64(head + 16, UINT64_MAX - 63 + padding); break;
        case 6: put32(head + 4, 0); break;
        case 7: put32(head, 5); break;
        case 8: put32(payload(&file, 4, 0, &size) + 20, 0); break;
        case 9: put32(payload(&file, 4, 0, &size) + 20, 2); break;
        default: { /* 64 bytes fewer, or more */
            size_t all = (size_t)get64(head + 8);
            unsigned char zeros[64] = {0};
            put64(head + 8, i == 10 ? all - 64 : all + 64);
            replace_bytes(&file, at + all - (i == 10 ? 64 : 0), i == 10 ? 64 : 0, zeros,
                          i == 10 ? 0 : 64);
            reindex(&file);
            break;
        }
        }
        if (i != 7 && i < 10)
            resign(file.data, file.n);
        refuse(&t, &file, "native section", (size_t)i);
        bytes_free(&file);
    }
    target_close(&t);
}

/* ---- digests and ids ---- */

/* Each of them, with checksums that hold; also where the other digests follow. */
static void digests(void **state)
{
    model m = model_of(2, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_F16);
    (void)state;
    for (int layout = 0; layout < 2; layout++) {
        target t = target_of(&m, 70, 0);
        size_t size, at, end;
        bytes file;
        relay(&t.file, layout);
        file = copy_of(&t.file);
        for (unsigned b = 0; b < 2; b++) { /* digests sections */
            at = section_payload(file.data, file.n, 14, b, &size);
            assert_int_equal(size, 16 + 2 * 16 + 8);
            for (size_t i = 0; i < size - 8; i += 5)
                for (int level = 0; level < 2; level++) {
                    memcpy(file.data, t.file.data, file.n);
                    file.data[at + i] ^= 4;
                    (level ? resign_sums : resum)(file.data, file.n);
                    refuse(&t, &file, "digests", i);
                }
        }
        at = section_payload(file.data, file.n, 6, 0, &size);
        assert_int_equal(size, 5 * 48 + 8); /* ids, positions, table, two blocks */
        for (size_t i = 0; i < size - 8; i++) {
            memcpy(file.data, t.file.data, file.n);
            file.data[at + i] ^= 0x80;
            resum(file.data, file.n);
            refuse(&t, &file, "index", i);
        }
        end = section_payload(file.data, file.n, 7, 0, &size);
        assert_int_equal(size, 48);
        for (size_t i = 0; i < 32; i++) {
            memcpy(file.data, t.file.data, file.n);
            file.data[end + i] ^= 1;
            resum(file.data, file.n);
            refuse(&t, &file, "end", i);
        }
        memcpy(file.data, t.file.data, file.n); /* another digest, and a snapshot id that has it */
        file.data[at + 32] ^= 1;
        resum(file.data, file.n);
        refuse(&t, &file, "digest of token ids", 0);
        memcpy(file.data, t.file.data, file.n);
        resum(file.data, file.n);
        assert_memory_equal(file.data, t.file.data, file.n);
        expect_ok(t.cache, load(&t, &file));
        bytes_free(&file);
        target_close(&t);
    }
}

/* ---- the caller's pieces ---- */

/* A piece of `name_bytes` bytes of a name, and data, in a payload; its size without checksum. */
static size_t piece_of(unsigned char *to, const char *name, size_t name_bytes, size_t data_bytes)
{
    size_t at = 16 + (name_bytes + 7) / 8 * 8;
    memset(to, 0, 200);
    put32(to, (uint32_t)name_bytes);
    put64(to + 8, data_bytes);
    memcpy(to + 16, name, name_bytes);
    memset(to + at, 'd', data_bytes);
    return at + (data_bytes + 7) / 8 * 8;
}

typedef struct found {
    unsigned n;
    size_t bytes;
} found;

static int on_piece(void *user, const kvt_snapshot_piece *piece)
{
    found *f = user;
    f->n++;
    f->bytes += (size_t)piece->bytes;
    return 0;
}

static void pieces(void **state)
{
    static char x65[66] = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";
    static const struct {
        const char *name;
        size_t name_bytes, data_bytes;
        uint32_t flags;
        uint64_t value; /* of a second piece, behind one of name "first" */
        int sound;
    } cases[] = {
        {"name", 4, 9, 0, 1, 1}, {"n", 1, 0, 0, 1, 1},      {x65, 64, 8, 0, 1, 1},
        {"firs", 4, 0, 0, 1, 1}, {"first ", 6, 0, 0, 1, 1}, {"first", 5, 3, 0, 1, 0},
        {"", 0, 9, 0, 1, 0},     {x65, 65, 0, 0, 1, 0},     {"na\0e", 4, 8, 0, 1, 0},
        {"\0", 1, 8, 0, 1, 0},   {"nam\0", 4, 8, 0, 1, 0},  {"name", 4, 9, 1, 1, 0},
        {"name", 4, 9, 0, 0, 0}, {"name", 4, 9, 0, 2, 0},   {"name", 4, 9, 2, 1, 0},
    };
    static const struct {
        size_t at;
        uint64_t x;
        int wide;
    } fields[] = {
        {0, 0, 0},  {0, 9, 0},          {0, 65, 0}, {0, UINT32_MAX, 0}, {4, 1, 0},
        {8, 8, 1},  {8, 17, 1},         {8, 0, 1},  {8, UINT64_MAX, 1}, {8, UINT64_MAX - 7, 1},
        {20, 1, 0}, {36, 0x1000000, 0},
    };
    model m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    target t = target_of(&m, 5, 0);
    unsigned char body[256];
    size_t size, header = get32(t.file.data + 12), first = piece_of(body, "first", 5, 2);
    (void)state;
    add_section(&t.file, header, 12, 0, 0, body, first);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bytes file = copy_of(&t.file);
        size = piece_of(body, cases[i].name, cases[i].name_bytes, cases[i].data_bytes);
        add_section(&file, header + 32 + first + 8, 12, cases[i].flags, cases[i].value, body, size);
        relay(&file, 1);
        if (cases[i].sound) {
            kvt_load_options options;
            kvt_reader reader = bytes_reader(&file);
            found f = {0, 0};
            memset(&options, 0, sizeof options);
            options.struct_size = sizeof options;
            options.on_piece = on_piece;
            options.piece_user = &f;
            file.at = 0;
            expect_ok(t.cache, kvt_seq_load_stream(t.seq, &reader, &options, NULL));
            assert_true(f.n == 2 && f.bytes == 2 + cases[i].data_bytes);
            expect_ok(t.cache, load(&t, &file));
            t.hash = state_hash(&t.m, t.cache, t.seq);
        } else {
            refuse(&t, &file, "piece", i);
        }
        bytes_free(&file);
    }
    size = piece_of(body, "name", 4, 9);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        bytes file = copy_of(&t.file);
        unsigned char bad[256];
        memcpy(bad, body, sizeof bad);
        (fields[i].wide ? put64(bad + fields[i].at, fields[i].x)
                        : put32(bad + fields[i].at, (uint32_t)fields[i].x));
        add_section(&file, header + 32 + first + 8, 12, 0, 1, bad, size);
        relay(&file, 1);
        refuse(&t, &file, "field of a piece", i);
        bytes_free(&file);
    }
    for (size_t cut = 8; cut <= size; cut += 8) { /* the payload ends early */
        bytes file = copy_of(&t.file);
        add_section(&file, header + 32 + first + 8, 12, 0, 1, body, size - cut);
        relay(&file, 1);
        refuse(&t, &file, "cut piece", cut);
        bytes_free(&file);
    }
    { /* a name of 64 bytes, for which the payload has no room */
        bytes file = copy_of(&t.file);
        unsigned char bad[24] = {64};
        add_section(&file, header + 32 + first + 8, 12, 0, 1, bad, sizeof bad);
        refuse(&t, &file, "piece that is all name", 0);
        expect_error_text(t.cache, "bytes of data", "piece that is all name");
        bytes_free(&file);
    }
    { /* behind the block table */
        bytes file = copy_of(&t.file);
        size_t table, at = section_payload(file.data, file.n, 3, 0, &table);
        add_section(&file, at + table, 12, 0, 1, body, size);
        relay(&file, 1);
        refuse(&t, &file, "piece in another place", 0);
        bytes_free(&file);
    }
    target_close(&t);
}

/* ---- parents ---- */

static bytes slurp(const char *name)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    unsigned char buffer[4096];
    FILE *f = fopen(in_folder(name), "rb");
    size_t n;
    assert_non_null(f);
    while ((n = fread(buffer, 1, sizeof buffer, f)) != 0)
        assert_int_equal(writer.write(writer.user, buffer, n), 0);
    (void)fclose(f);
    return b;
}

static void spill(const char *name, const bytes *file)
{
    FILE *f = fopen(in_folder(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(file->data, 1, file->n, f), file->n);
    assert_int_equal(fclose(f), 0);
}

/* base.kvt has 140 tokens; the file is a delta of it with n, its rows 0 and 1 are the parent's. */
static target delta_of(const model *m, size_t n)
{
    target t = target_of(m, 5, 0);
    kvt_seq *seq = model_seq(t.cache);
    kvt_save_options options;
    static char path[512];
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = KVT_CODEC_RAW;
    options.no_fsync = 1;
    model_append(m, t.cache, seq, 140, 40);
    expect_ok(t.cache, kvt_seq_save(seq, in_folder("base.kvt"), &options));
    if (n > 140)
        model_append(m, t.cache, seq, n - 140, 40);
    else
        expect_ok(t.cache, kvt_seq_truncate(seq, n));
    (void)snprintf(path, sizeof path, "%s", in_folder("base.kvt"));
    options.parent = path;
    expect_ok(t.cache, kvt_seq_save(seq, in_folder("delta.kvt"), &options));
    bytes_free(&t.file);
    t.file = slurp("delta.kvt");
    kvt_seq_destroy(seq);
    return t;
}

/* The parent section with another name. */
static void rename_parent(bytes *file, const char *name, size_t n)
{
    unsigned char body[512] = {0};
    size_t size, at = section_payload(file->data, file->n, 11, 0, &size);
    memcpy(body, file->data + at, 32);
    put32(body + 28, (uint32_t)n);
    memcpy(body + 32, name, n);
    replace_bytes(file, at - 32, 32 + size, NULL, 0);
    add_section(file, at - 32, 11, 1, 0, body, 32 + (n + 7) / 8 * 8);
    relay(file, 1);
}

static void parents(void **state)
{
    static char x256[257];
    static const struct {
        const char *name;
        size_t bytes;
        int status; /* 0: CORRUPT or FORMAT */
    } names[] = {
        {"base.kvt", 8, -1},
        {".", 1, 0},
        {"..", 2, 0},
        {"", 0, 0},
        {"a/base.kvt", 10, 0},
        {"/base.kvt", 9, 0},
        {"base.kvt/", 9, 0},
        {"base.kvt\0", 9, 0},
        {"\0", 1, 0},
        {x256, 256, 0},
        {"none.kvt", 8, KVT_ERR_IO},
        {"delta.kvt", 9, KVT_ERR_MISMATCH},
        {"other.kvt", 9, KVT_ERR_MISMATCH},
    };
    static const struct {
        uint32_t type;
        size_t at;
        uint32_t x;
    } fields[] = {
        {11, 0, 77}, {11, 12, 77},     {11, 16, 201}, {11, 20, 1},          {11, 24, 0},
        {11, 24, 2}, {11, 24, 256},    {11, 24, 257}, {11, 24, UINT32_MAX}, {11, 28, 0},
        {11, 28, 7}, {11, 28, 9},      {11, 28, 256}, {11, 28, UINT32_MAX}, {3, 0, 1},
        {3, 12, 1},  {3, 28, 2 << 16}, {3, 28, 0},    {3, 28, 1 << 16 | 4}, {3, 28, 1 << 16 | 1},
        {3, 24, 63}, {3, 20, 1},
    };
    model m = model_of(2, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8), other;
    target t;
    size_t size, at;
    uint64_t inherited;
    (void)state;
    memset(x256, 'x', 256);
    m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    t = delta_of(&m, 200);
    at = section_payload(t.file.data, t.file.n, 11, 0, &size);
    inherited = get64(t.file.data + at + 16);
    assert_int_equal(get32(t.file.data + at + 24), 1);
    assert_true(inherited > 0 && inherited <= 140);
    at = section_payload(t.file.data, t.file.n, 3, 0, &size);
    assert_int_equal(get32(t.file.data + at + 28), 1 << 16); /* the parent's, sealed */
    assert_true(get64(t.file.data + at) != 0);
    {
        bytes file = copy_of(&t.file); /* the writer's checksums, digests and ids */
        resign(file.data, file.n);
        assert_memory_equal(file.data, t.file.data, file.n);
        reindex(&file);
        assert_int_equal(file.n, t.file.n);
        assert_memory_equal(file.data, t.file.data, file.n);
        bytes_free(&file);
        file = copy_of(&t.file); /* another file of the same name and geometry */
        spill("other.kvt", &file);
        bytes_free(&file);
    }
    expect_ok(t.cache, load(&t, &t.file));
    t.hash = state_hash(&t.m, t.cache, t.seq);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        bytes file = copy_of(&t.file);
        rename_parent(&file, names[i].name, names[i].bytes);
        if (names[i].status < 0)
            expect_ok(t.cache, load(&t, &file));
        else if (names[i].status)
            expect(t.cache, (kvt_status)names[i].status, load(&t, &file));
        else
            refuse(&t, &file, "name of a parent", i);
        assert_true(state_hash(&t.m, t.cache, t.seq) == t.hash);
        bytes_free(&file);
    }
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        bytes file = copy_of(&t.file);
        put32(payload(&file, fields[i].type, 0, &size) + fields[i].at, fields[i].x);
        resign(file.data, file.n);
        refuse(&t, &file, "field of a delta", i);
        bytes_free(&file);
    }
    for (int i = 0; i < 5; i++) {
        bytes file = copy_of(&t.file);
        unsigned char *p = payload(&file, 11, 0, &size);
        at = (size_t)(p - file.data);
        switch (i) {
        case 0: put64(p + 16, inherited - 1); break; /* then ids begin a token earlier */
        case 1: p[size - 9] |= p[size - 9] ? 0 : 1; break;
        case 2: put32(p - 28, 0); break; /* not required */
        case 3: put64(p - 16, 1); break; /* value */
        default:                         /* no parent section */
            replace_bytes(&file, at - 32, 32 + size, NULL, 0);
            relay(&file, 1);
            break;
        }
        if (memcmp(file.data, t.file.data, file.n < t.file.n ? file.n : t.file.n) != 0) {
            resign(file.data, file.n);
            refuse(&t, &file, "delta", (size_t)i);
        }
        bytes_free(&file);
    }
    for (size_t i = 64; i < get32(t.file.data + 12) - 8u; i += 4) { /* the headers differ */
        bytes file = copy_of(&t.file);
        file.data[i] ^= 1;
        resign(file.data, file.n);
        refuse(&t, &file, "header of a delta", i);
        bytes_free(&file);
    }
    { /* every byte of the parent, of which some are not needed here */
        bytes base = slurp("base.kvt"), file = copy_of(&base);
        for (size_t i = 0; i < base.n; i += is_quick() ? 97 : 11) {
            kvt_status status;
            file.data[i] ^= 0x10;
            spill("base.kvt", &file);
            status = load(&t, &t.file);
            if (status != KVT_OK && status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT &&
                status != KVT_ERR_MISMATCH)
                fail_msg("byte %zu of the parent: status %d", i, (int)status);
            assert_true(state_hash(&t.m, t.cache, t.seq) == t.hash); /* or it is the same */
            file.data[i] ^= 0x10;
        }
        spill("base.kvt", &base);
        expect_ok(t.cache, load(&t, &t.file));
        /* A parent whose contents are others, and sound. */
        {
            unsigned char *code = payload(&file, 13, 0, &size);
            code += (size_t)get64(code - 16);
            *code = *code == 5 ? 6 : 5;
            resign(file.data, file.n);
            spill("base.kvt", &file);
            expect(t.cache, KVT_ERR_MISMATCH, load(&t, &t.file));
            spill("base.kvt", &base);
        }
        for (int i = 0; i < 3; i++) { /* an index that the parent's id is of, and no section is */
            bytes child = copy_of(&t.file);
            unsigned char *index, *id;
            memcpy(file.data, base.data, base.n);
            index = payload(&file, 6, 0, &size);
            index += i < 2 ? 48 * i : 48 * 3; /* ids, positions; behind the table the first block */
            assert_int_equal(get32(index), i < 2 ? i + 1 : 4);
            index[32] ^= 1;
            resign_sums(file.data, file.n);
            spill("base.kvt", &file);
            id = payload(&file, 7, 0, &size) + 16;
            assert_memory_not_equal(id, payload(&child, 11, 0, &size), 16);
            memcpy(payload(&child, 11, 0, &size), id, 16);
            if (i == 2)
                payload(&child, 3, 0, &size)[0] ^= 1;
            resign(child.data, child.n);
            expect(t.cache, KVT_ERR_CORRUPT, load(&t, &child));
            bytes_free(&child);
        }
        spill("base.kvt", &base);
        bytes_free(&base);
        bytes_free(&file);
    }
    expect(t.cache, KVT_ERR_IO,
           (assert_int_equal(unlink(in_folder("base.kvt")), 0), load(&t, &t.file)));
    assert_true(state_hash(&t.m, t.cache, t.seq) == t.hash);
    target_close(&t);
    t = delta_of(&m, 100); /* shorter than its parent */
    expect_ok(t.cache, load(&t, &t.file));
    t.hash = state_hash(&t.m, t.cache, t.seq);
    assert_int_equal(get64(payload(&t.file, 11, 0, &size) + 16), 100);
    for (uint64_t i = 101; i < 150; i += 13) {
        bytes file = copy_of(&t.file);
        put64(payload(&file, 11, 0, &size) + 16, i);
        resign(file.data, file.n);
        refuse(&t, &file, "more inherited tokens than there are", (size_t)i);
        expect_error_text(t.cache, "tokens are inherited", "inherited tokens");
        bytes_free(&file);
    }
    target_close(&t);
    other = m; /* of a plain file: place 1 and no parent */
    t = target_of(&other, 70, 0);
    for (int i = 0; i < 2; i++) {
        bytes file = copy_of(&t.file);
        unsigned char *entry = payload(&file, 3, 0, &size);
        entry[30] = 1;
        entry[0] = (unsigned char)i;
        resign(file.data, file.n);
        refuse(&t, &file, "a block of no parent", (size_t)i);
        bytes_free(&file);
    }
    target_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gaps),   cmocka_unit_test(native_sections), cmocka_unit_test(digests),
        cmocka_unit_test(pieces), cmocka_unit_test(parents),
    };
    int failed;
    char command[300];
    (void)snprintf(folder, sizeof folder, "/tmp/kvtile-parts-XXXXXX");
    if (!mkdtemp(folder))
        return 1;
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    (void)snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command) ? 1 : failed;
}
