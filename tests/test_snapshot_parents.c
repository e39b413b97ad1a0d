/*
 * Parents of a delta that are damaged under checksums, digests and ids that hold, or are of another
 * model: each is refused with a text that names the file and what is wrong, and the sequence stays
 * as it was. A file is loaded in three ways: read, mapped, and mapped lazily.
 */
#include "snapshot_options.h"

#include <xxhash.h>

enum { HEAD = 32, NOTE = 48, TAIL = 80, SET = 40 }; /* SET: before the stream of a set of one */

/* A chain of three raw files, base, middle and delta, and a sequence that must not change. */
typedef struct chain {
    subject s;
    bytes base, middle, delta;
    kvt_seq *seq, *victim; /* what delta is of */
    uint64_t hash;
} chain;

/* The tokens of base, of middle and of delta. */
enum { BASE = 140, MIDDLE = 200, DELTA = 270 };

static void save_level(const chain *c, const char *name, const char *parent,
                       const unsigned char *key)
{
    kvt_save_options o = saves(KVT_CODEC_RAW);
    o.parent = parent ? in_folder(parent) : NULL;
    o.key = key;
    expect_ok(c->s.cache, kvt_seq_save(c->seq, in_folder(name), &o));
}

/* c->s is there. */
static void chain_fill(chain *c, const unsigned char *key)
{
    c->seq = tagged_seq(&c->s);
    grow(&c->s, c->seq, BASE + (key ? 380 : 0)); /* encrypted: three segments */
    save_level(c, "base", NULL, key);
    grow(&c->s, c->seq, MIDDLE - BASE);
    save_level(c, "middle", "base", key);
    grow(&c->s, c->seq, DELTA - MIDDLE);
    save_level(c, "delta", "middle", key);
    c->base = slurp(in_folder("base"));
    c->middle = slurp(in_folder("middle"));
    c->delta = slurp(in_folder("delta"));
    c->victim = tagged_seq(&c->s);
    grow(&c->s, c->victim, 20);
    c->hash = file_hash(&c->s, c->victim);
}

static void chain_open(chain *c, int kind, const unsigned char *key)
{
    rng r = {61};
    open_kind(&c->s, kind, &r);
    chain_fill(c, key);
}

static void chain_close(chain *c)
{
    bytes_free(&c->base);
    bytes_free(&c->middle);
    bytes_free(&c->delta);
    kvt_seq_destroy(c->victim);
    kvt_seq_destroy(c->seq);
    close_subject(&c->s);
}

static bytes copy_of(const bytes *file)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    assert_int_equal(writer.write(writer.user, file->data, file->n), 0);
    return b;
}

static unsigned char *payload(const bytes *f, uint32_t type, unsigned i)
{
    size_t size;
    return f->data + section_payload(f->data, f->n, type, i, &size);
}

/* The entry of the index of the i-th section of a type. */
static unsigned char *note(const bytes *f, uint32_t type, unsigned i)
{
    size_t size, at = section_payload(f->data, f->n, 6, 0, &size);
    for (size_t n = 0; n + NOTE < size; n += NOTE)
        if (get32(f->data + at + n) == type && i-- == 0)
            return f->data + at + n;
    fail_msg("no such entry");
    return NULL;
}

/* A delta of what a file is now: the id in its parent section, and all that follows of it. */
static void adopt(bytes *child, const bytes *parent)
{
    memcpy(payload(child, 11, 0), parent->data + parent->n - 48 + 16, 16);
    resign(child->data, child->n);
}

/* Load the delta in each way: refused with a status and a text, and the sequence is as it was. */
static void refuse(const chain *c, kvt_status expected, const char *text, const char *what)
{
    for (uint32_t map = 0; map < 3; map++) {
        kvt_load_options l = loads();
        kvt_status status;
        l.map = map;
        status = kvt_seq_load(c->victim, in_folder("delta"), &l, NULL);
        if (status != expected)
            fail_msg("%s, map %u: status %d", what, (unsigned)map, (int)status);
        expect_error_text(c->s.cache, text, what);
        assert_true(file_hash(&c->s, c->victim) == c->hash);
    }
}

static void write_all(const bytes *base, const bytes *middle, const bytes *delta)
{
    spill(in_folder("base"), base->data, base->n);
    spill(in_folder("middle"), middle->data, middle->n);
    spill(in_folder("delta"), delta->data, delta->n);
}

/* The files are sound: the delta loads in each way. */
static void accept_written(const chain *c)
{
    for (uint32_t map = 0; map < 3; map++) {
        kvt_load_options l = loads();
        kvt_seq *to = tagged_seq(&c->s);
        l.map = map;
        expect_ok(c->s.cache, kvt_seq_load(to, in_folder("delta"), &l, NULL));
        expect_equal(&c->s, c->seq, to, "sound files", map);
        kvt_seq_destroy(to);
    }
}

static void accept(const chain *c)
{
    write_all(&c->base, &c->middle, &c->delta);
    accept_written(c);
}

/* ---- index and end, of any parent ---- */

static void sign_head(unsigned char *head)
{
    put64(head + 24, XXH64(head, 24, 0));
}
static void sign_end(bytes *f)
{
    unsigned char *end = f->data + f->n - 48;
    put64(end + 32, XXH64(end, 32, 0));
}
static unsigned char *index_head(const bytes *f)
{
    return f->data + get64(f->data + f->n - 48);
}

static void end_magic(bytes *f)
{
    f->data[f->n - 1] ^= 1;
}
static void end_sum(bytes *f)
{
    f->data[f->n - 16] ^= 1;
}
static void end_bytes(bytes *f)
{
    put64(f->data + f->n - 40, f->n + 8);
    sign_end(f);
}
static void end_index_beyond(bytes *f)
{
    put64(f->data + f->n - 48, f->n - TAIL + 1);
    sign_end(f);
}
static void end_index_elsewhere(bytes *f) /* at the block table */
{
    put64(f->data + f->n - 48, (uint64_t)(payload(f, 3, 0) - HEAD - f->data));
    sign_end(f);
}
static void end_index_at_end(bytes *f)
{
    put64(f->data + f->n - 48, f->n - TAIL);
    sign_end(f);
}
static void end_id(bytes *f)
{
    f->data[f->n - 48 + 20] ^= 1;
    sign_end(f);
}
static void end_head_sum(bytes *f)
{
    f->data[f->n - TAIL + 25] ^= 1;
}
static void end_type(bytes *f)
{
    put32(f->data + f->n - TAIL, 6);
    sign_head(f->data + f->n - TAIL);
}
static void end_flags(bytes *f)
{
    put32(f->data + f->n - TAIL + 4, 0);
    sign_head(f->data + f->n - TAIL);
}
static void end_size(bytes *f)
{
    put64(f->data + f->n - TAIL + 8, 40);
    sign_head(f->data + f->n - TAIL);
}
static void end_twice(bytes *f)
{
    bytes end = copy_of(f);
    replace_bytes(f, f->n - TAIL, 0, end.data + end.n - TAIL, TAIL);
    put64(f->data + f->n - 40, f->n);
    sign_end(f);
    bytes_free(&end);
}
static void end_large(bytes *f)
{
    put64(f->data + f->n - TAIL + 8, 56);
    sign_head(f->data + f->n - TAIL);
}
static void set_index_size(bytes *f, uint64_t size)
{
    unsigned char *head = index_head(f);
    put64(head + 8, size);
    sign_head(head);
}
static void index_empty(bytes *f)
{
    set_index_size(f, 0);
}
static void index_of_no_entries(bytes *f) /* though it has some */
{
    set_index_size(f, 8);
}
static void index_odd(bytes *f)
{
    set_index_size(f, get64(index_head(f) + 8) - 1);
}
static void index_short(bytes *f)
{
    set_index_size(f, get64(index_head(f) + 8) - NOTE);
}
static void index_long(bytes *f)
{
    set_index_size(f, get64(index_head(f) + 8) + NOTE);
}
static void index_huge(bytes *f)
{
    set_index_size(f, UINT64_MAX / NOTE * NOTE + 8);
}
static void index_value(bytes *f)
{
    put64(index_head(f) + 16, 1);
    sign_head(index_head(f));
}
static void index_entry(bytes *f)
{
    index_head(f)[HEAD + NOTE + 33] ^= 1;
}
static void index_sum(bytes *f)
{
    index_head(f)[HEAD + get64(index_head(f) + 8) - 3] ^= 1;
}
static void cut_behind_header(bytes *f)
{
    f->n = get32(f->data + 12);
}
static void cut_head(bytes *f)
{
    f->n = get32(f->data + 12) + 20;
}

#define CASE(change, text)                                                                         \
    {                                                                                              \
        change, #change, text                                                                      \
    }

static void ends(void **state)
{
    static const struct {
        void (*change)(bytes *f);
        const char *name, *text;
    } cases[] = {
        CASE(end_magic, "section end 0: the footer"),
        CASE(end_sum, "section end 0: the footer"),
        CASE(end_bytes, "section end 0: the footer"),
        CASE(end_index_beyond, "section end 0: the footer"),
        CASE(end_index_elsewhere, "section block table 0 is in its place"),
        CASE(end_index_at_end, "section end 0 is in its place"),
        CASE(end_id, "the snapshot's id"),
        CASE(end_head_sum, "checksum of a section's head"),
        CASE(end_type, "section index 0 is in its place"),
        CASE(end_flags, "section end 0 is in its place"),
        CASE(end_size, "section end 0: the footer"),
        CASE(end_twice, "section end 0: there are two"),
        CASE(end_large, "a section of 56 bytes, 48 are left"),
        CASE(index_empty, "section index 0: its size is 0"),
        CASE(index_of_no_entries, "section index 0: checksum of its payload"),
        CASE(index_odd, "section index 0: its size is"),
        CASE(index_short, "section index 0: checksum of its payload"),
        CASE(index_long, "section index 0: checksum of its payload"),
        CASE(index_huge, "bytes, "),
        CASE(index_value, "section index 1 is in its place"),
        CASE(index_entry, "section index 0: checksum of its payload"),
        CASE(index_sum, "section index 0: checksum of its payload"),
        CASE(cut_behind_header, "it is cut here"),
        CASE(cut_head, "it is cut here"),
    };
    chain c;
    (void)state;
    chain_open(&c, I8, NULL);
    accept(&c);
    for (int level = 0; level < 2; level++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            bytes file = copy_of(level ? &c.middle : &c.base);
            const char *name = level ? "middle" : "base";
            char said[40];
            kvt_save_options o = saves(KVT_CODEC_RAW);
            cases[i].change(&file);
            write_all(&c.base, &c.middle, &c.delta);
            spill(in_folder(name), file.data, file.n);
            refuse(&c, KVT_ERR_CORRUPT, cases[i].text, cases[i].name);
            (void)snprintf(said, sizeof said, "in the parent %s, ", name);
            expect_error_text(c.s.cache, said, cases[i].name);
            o.parent = in_folder("middle"); /* nor is anything saved as a delta of it */
            expect(c.s.cache, KVT_ERR_CORRUPT, kvt_seq_save(c.seq, in_folder("new"), &o));
            expect_error_text(c.s.cache, cases[i].text, cases[i].name);
            expect_error_text(c.s.cache, said, cases[i].name);
            assert_int_not_equal(access(in_folder("new"), F_OK), 0);
            bytes_free(&file);
        }
    accept(&c);
    chain_close(&c);
}

/* ---- an index whose checksum, and the id that is of it, hold ---- */

static void ids_number(bytes *f) /* of other tokens */
{
    put64(note(f, 1, 0) + 8, 16384);
}
static void ids_gone(bytes *f) /* its entry is one of no section that is looked for */
{
    put32(note(f, 1, 0), 8);
}
static void positions_gone(bytes *f)
{
    put32(note(f, 2, 0), 1);
}
static void ids_elsewhere(bytes *f)
{
    put64(note(f, 1, 0) + 16, get64(note(f, 2, 0) + 16));
}
static void ids_beyond(bytes *f)
{
    put64(note(f, 1, 0) + 16, f->n + 100);
}
static void ids_far_beyond(bytes *f)
{
    put64(note(f, 1, 0) + 16, UINT64_MAX - 7);
}
static void ids_amid(bytes *f)
{
    put64(note(f, 1, 0) + 16, get64(note(f, 1, 0) + 16) + 8);
}
static void ids_digest(bytes *f)
{
    note(f, 1, 0)[40] ^= 1;
}
static void positions_digest(bytes *f)
{
    note(f, 2, 0)[32] ^= 0x80;
}
static void block_elsewhere(bytes *f) /* where the next one is */
{
    put64(note(f, 4, 0) + 16, get64(note(f, 4, 1) + 16));
}
static void block_beyond(bytes *f)
{
    put64(note(f, 4, 0) + 16, f->n);
}
static void block_at_end(bytes *f)
{
    put64(note(f, 4, 0) + 16, f->n - 8);
}
static void block_number(bytes *f)
{
    put64(note(f, 4, 0) + 8, 5);
}
static void block_gone(bytes *f)
{
    put32(note(f, 4, 0), 9);
}
static void no_block_at_all(bytes *f)
{
    unsigned char *entry = index_head(f) + HEAD, *end = f->data + f->n - TAIL;
    for (; entry + NOTE < end; entry += NOTE)
        if (get32(entry) == 4)
            put32(entry, 9);
}
static void table_inside(bytes *f) /* a byte of an image, and no digest of it */
{
    size_t size, at = section_payload(f->data, f->n, 13, 0, &size);
    f->data[at + (size_t)get64(f->data + at - 16) + 70] ^= 1;
}

static void indexes(void **state)
{
    static const struct {
        void (*change)(bytes *f);
        const char *name, *text;
    } cases[] = {
        CASE(ids_number, "its index lacks tokens 0"),
        CASE(ids_gone, "its index lacks tokens 0"),
        CASE(positions_gone, "its index lacks tokens 0"),
        CASE(ids_elsewhere, "section positions 0 is in its place"),
        CASE(ids_beyond, "it is cut here"),
        CASE(ids_far_beyond, "it is cut here"),
        CASE(ids_amid, "checksum of a section's head"),
        CASE(ids_digest, "its tokens do not make their digest"),
        CASE(positions_digest, "its tokens do not make their digest"),
        CASE(block_elsewhere, "section block 1 is in its place"),
        CASE(block_beyond, "it is cut here"),
        CASE(block_at_end, "it is cut here"),
        CASE(block_number, "section block 0 is in its place"),
        CASE(block_gone, "no parent has the block of group 0, tokens from 0"),
        CASE(no_block_at_all, "no parent has the block of group 0, tokens from 0"),
        CASE(table_inside, "in the parent base, "),
    };
    chain c;
    (void)state;
    chain_open(&c, I8, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bytes base = copy_of(&c.base), middle = copy_of(&c.middle), delta = copy_of(&c.delta);
        cases[i].change(&base);
        resign_sums(base.data, base.n);
        adopt(&middle, &base);
        adopt(&delta, &middle);
        write_all(&base, &middle, &delta);
        if (cases[i].change == table_inside) { /* lazily it is found at first use */
            kvt_load_options l = loads();
            kvt_seq *to = tagged_seq(&c.s);
            kvt_save_options o = saves(KVT_CODEC_RAW);
            expect(c.s.cache, KVT_ERR_CORRUPT,
                   kvt_seq_load(c.victim, in_folder("delta"), &l, NULL));
            expect_error_text(c.s.cache, cases[i].text, cases[i].name);
            l.map = KVT_MAP_LAZY;
            expect_ok(c.s.cache, kvt_seq_load(to, in_folder("delta"), &l, NULL));
            expect(c.s.cache, KVT_ERR_CORRUPT, kvt_seq_save(to, in_folder("new"), &o));
            expect_error_text(c.s.cache, "its bytes do not make its digest", cases[i].name);
            kvt_seq_destroy(to);
        } else {
            refuse(&c, KVT_ERR_CORRUPT, cases[i].text, cases[i].name);
        }
        bytes_free(&base);
        bytes_free(&middle);
        bytes_free(&delta);
    }
    accept(&c);
    chain_close(&c);
}

/*
 * An index that has the id of block 1 twice: the entry with the lesser number counts, or offset
 * where the numbers are the same. The other one was that of the last block, which no child has, and
 * leads to another section.
 */
static void same_ids(void **state)
{
    chain c;
    (void)state;
    chain_open(&c, F16, NULL);
    for (uint64_t number = 0; number < 4; number++) {
        bytes base = copy_of(&c.base), middle = copy_of(&c.middle), delta = copy_of(&c.delta);
        unsigned char *extra = note(&base, 4, 2), *block = note(&base, 4, 1);
        put64(extra + 8, number);
        put64(extra + 16, get64(note(&base, 2, 0) + 16));
        memcpy(extra + 32, block + 32, 16);
        resign_sums(base.data, base.n);
        adopt(&middle, &base);
        adopt(&delta, &middle);
        write_all(&base, &middle, &delta);
        if (number > 1)
            accept_written(&c);
        else
            refuse(&c, KVT_ERR_CORRUPT, "section positions 0 is in its place", "a lesser number");
        bytes_free(&base);
        bytes_free(&middle);
        bytes_free(&delta);
    }
    accept(&c);
    chain_close(&c);
}

static size_t head_at(const bytes *f, uint32_t type, unsigned i)
{
    size_t size;
    return section_payload(f->data, f->n, type, i, &size) - HEAD;
}

/*
 * Sections of later versions in a parent, of which the index alone is read: optional ones are
 * passed over wherever they stand, required ones refused; none is behind the index.
 */
static void unknown_sections(void **state)
{
    static const unsigned char body[88] = "some bytes: what is behind them stays aligned";
    static const uint32_t before[] = {1, 2, 3, 4, 6, 0}; /* 0: the end, behind the index */
    chain c;
    (void)state;
    chain_open(&c, I8, NULL);
    for (size_t i = 0; i < 6; i++)
        for (uint32_t flags = 0; flags < 3; flags++) {
            bytes base = copy_of(&c.base), middle = copy_of(&c.middle), delta = copy_of(&c.delta);
            if (before[i]) {
                add_section(&base, head_at(&base, before[i], 0), 77, flags, 9, body, sizeof body);
            } else {
                unsigned char section[HEAD + 48] = {0};
                put32(section, 77);
                put32(section + 4, flags);
                put64(section + 8, 48);
                replace_bytes(&base, base.n - TAIL, 0, section, sizeof section);
                put64(base.data + base.n - 40, base.n);
                resign(base.data, base.n);
            }
            adopt(&middle, &base);
            adopt(&delta, &middle);
            write_all(&base, &middle, &delta);
            if (flags == 1)
                refuse(&c, KVT_ERR_FORMAT, "section of type 77", "required");
            else if (flags == 0 && before[i])
                accept_written(&c);
            else
                refuse(&c, KVT_ERR_CORRUPT,
                       before[i] ? "in the parent base, section index 0: entry "
                                 : "section of unknown type 77",
                       "flags, or behind the index");
            bytes_free(&base);
            bytes_free(&middle);
            bytes_free(&delta);
        }
    chain_close(&c);
}

/* What the end and the index lead to begins there, not behind an optional section. */
static void places_of_sections(void **state)
{
    static const uint32_t types[] = {6, 4, 1};
    static const unsigned char body[88] = "some bytes: what is behind them stays aligned";
    chain c;
    (void)state;
    chain_open(&c, I8, NULL);
    for (size_t i = 0; i < 3; i++)
        for (int moved = 0; moved < 2; moved++) {
            bytes base = copy_of(&c.base), middle = copy_of(&c.middle), delta = copy_of(&c.delta);
            const size_t at = head_at(&base, types[i], 0);
            add_section(&base, at, 77, 0, 9, body, sizeof body);
            if (moved && types[i] == 6)
                put64(base.data + base.n - 48, at);
            else if (moved)
                put64(note(&base, types[i], 0) + 16, at);
            resign_sums(base.data, base.n);
            adopt(&middle, &base);
            adopt(&delta, &middle);
            write_all(&base, &middle, &delta);
            if (moved)
                refuse(&c, KVT_ERR_CORRUPT, "section of unknown type 77", "another place");
            else
                accept_written(&c);
            bytes_free(&base);
            bytes_free(&middle);
            bytes_free(&delta);
        }
    chain_close(&c);
}

/* What is wrong with a parent's header, or of a later version in it, is said of the parent. */
static void headers(void **state)
{
    static const struct {
        size_t at;
        uint32_t x;
        kvt_status status;
    } cases[] = {
        {8, 2, KVT_ERR_FORMAT},        /* version */
        {12, 8, KVT_ERR_CORRUPT},      /* size */
        {16, 32, KVT_ERR_FORMAT},      /* tokens of a block */
        {32, 9, KVT_ERR_CORRUPT},      /* groups */
        {44, 4, KVT_ERR_FORMAT},       /* flags */
        {48, 0, KVT_ERR_CORRUPT},      /* blocks */
        {56, 1, KVT_ERR_CORRUPT},      /* the largest layer */
        {64, 0, KVT_ERR_CORRUPT},      /* a group's layers */
        {64 + 20, 7, KVT_ERR_FORMAT},  /* its k_type */
        {64 + 28, 16, KVT_ERR_FORMAT}, /* its flags */
    };
    chain c;
    (void)state;
    chain_open(&c, I8, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t n = get32(c.base.data + 12);
        unsigned char *header = c.base.data;
        const uint32_t was = get32(header + cases[i].at);
        put32(header + cases[i].at, cases[i].x);
        put64(header + n - 8, XXH64(header, n - 8, 0));
        spill(in_folder("base"), c.base.data, c.base.n);
        refuse(&c, cases[i].status, "in the parent base, snapshot", "a header");
        put32(header + cases[i].at, was);
    }
    chain_close(&c);
}

/* A parent's block that says to be of a group which has none like it: of images of the same size,
   but in a representation that its blocks do not have, or of more layers. */
static void blocks_of_other_groups(void **state)
{
    (void)state;
    for (int layers = 0; layers < 2; layers++) {
        kvt_group_config groups[2] = {
            group_of(1, 2, 1, 16, 16, KVT_TYPE_I8, layers ? KVT_TYPE_I8 : KVT_TYPE_I4),
            group_of(layers ? 2 : 1, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8)};
        rng r = {62};
        chain c;
        open_subject(&c.s, groups, 2, &r);
        open_cache(&c.s, NULL);
        chain_fill(&c, NULL);
        assert_int_equal(get32(payload(&c.base, 4, 0) + 12), layers ? 0 : 2); /* fine */
        put32(payload(&c.base, 4, 0), 1);
        resign(c.base.data, c.base.n);
        adopt(&c.middle, &c.base);
        adopt(&c.delta, &c.middle);
        write_all(&c.base, &c.middle, &c.delta);
        refuse(&c, KVT_ERR_CORRUPT, "it is of a group whose blocks are others", "a block");
        chain_close(&c);
    }
}

/* ---- parents that do not fit their children ---- */

static void fits(void **state)
{
    static const struct {
        size_t at;
        uint32_t of_middle, of_delta; /* words of their parent sections */
        const char *file;
    } cases[] = {
        {16, 141, 200, "/base"},   /* base has 140 tokens */
        {16, 140, 201, "/middle"}, /* and middle 200 */
        {24, 2, 2, "/middle"},     /* depths */
        {24, 1, 3, "/middle"},     {24, 2, 3, "/base"},
        {24, 256, 2, "/middle"},   {24, 255, 256, "/base"},
    };
    chain c;
    (void)state;
    chain_open(&c, I8, NULL);
    assert_int_equal(get64(payload(&c.middle, 11, 0) + 16), BASE);
    assert_int_equal(get64(payload(&c.delta, 11, 0) + 16), MIDDLE);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bytes middle = copy_of(&c.middle), delta = copy_of(&c.delta);
        put32(payload(&middle, 11, 0) + cases[i].at, cases[i].of_middle);
        put32(payload(&delta, 11, 0) + cases[i].at, cases[i].of_delta);
        resign(middle.data, middle.n);
        adopt(&delta, &middle);
        write_all(&c.base, &middle, &delta);
        refuse(&c, KVT_ERR_CORRUPT, "its tokens or depth do not fit its parent", "a delta");
        expect_error_text(c.s.cache, cases[i].file, "which parent");
        bytes_free(&middle);
        bytes_free(&delta);
    }
    { /* middle is its own parent: its id cannot be in itself */
        bytes middle = copy_of(&c.middle), delta = copy_of(&c.delta);
        unsigned char body[40] = {0};
        size_t size, at = section_payload(middle.data, middle.n, 11, 0, &size);
        memcpy(body, middle.data + at, 32);
        put32(body + 28, 6);
        memcpy(body + 32, "middle", 6);
        replace_bytes(&middle, at - HEAD, HEAD + size, NULL, 0);
        add_section(&middle, at - HEAD, 11, 1, 0, body, sizeof body);
        adopt(&delta, &middle);
        write_all(&c.base, &middle, &delta);
        refuse(&c, KVT_ERR_MISMATCH, "another snapshot than the delta was saved for", "a circle");
        bytes_free(&middle);
        bytes_free(&delta);
    }
    accept(&c);
    chain_close(&c);
}

/* Each thing by which a parent can be told to be of another model. */
static void other_models(void **state)
{
    model m = model_of_two();
    kvt_cache *cache = model_cache(&m);
    kvt_seq *seq = model_seq(cache), *to = model_seq(cache);
    kvt_save_options o = saves(KVT_CODEC_RAW);
    uint64_t hash;
    (void)state;
    model_append(&m, cache, seq, 70, 70);
    expect_ok(cache, kvt_seq_save(seq, in_folder("mine"), &o));
    model_append(&m, cache, seq, 30, 30);
    o.parent = in_folder("mine");
    expect_ok(cache, kvt_seq_save(seq, in_folder("child"), &o));
    model_append(&m, cache, to, 5, 5);
    hash = state_hash(&m, cache, to);
    for (int what = 0; what < 7; what++) {
        model other = m;
        kvt_cache *others;
        kvt_seq *of_other;
        kvt_save_options plain = saves(KVT_CODEC_RAW);
        switch (what) {
        case 0: /* groups */ other = model_of(4, 2, 80, 96, KVT_TYPE_I8, KVT_TYPE_I8); break;
        case 1: /* layers */
            other.groups[1].n_layers = 1;
            other.layers[0][1] = 1;
            other.layers[1][0] = 2;
            break;
        case 2: other.groups[0].k_dim = 96; break;
        case 3: other.groups[1].v_type = KVT_TYPE_F16; break;
        case 4: /* which layers a group has */
            other.layers[0][1] = 1;
            other.layers[1][0] = 2;
            break;
        case 5: other.fingerprint = "test model, and more"; break;
        default: other.fingerprint = "Test model"; break;
        }
        others = model_cache(&other);
        of_other = model_seq(others);
        model_append(&other, others, of_other, 70, 70);
        expect_ok(others, kvt_seq_save(of_other, in_folder("mine"), &plain));
        expect(cache, KVT_ERR_MISMATCH, kvt_seq_load(to, in_folder("child"), NULL, NULL));
        expect_error_text(cache, "the parent is of another model, geometry", "load");
        expect_error_text(cache, "/mine", "load");
        assert_true(state_hash(&m, cache, to) == hash);
        o.parent = in_folder("mine");
        expect(cache, KVT_ERR_MISMATCH, kvt_seq_save(seq, in_folder("new"), &o));
        expect_error_text(cache, "the parent is of another model, geometry", "save");
        assert_int_not_equal(access(in_folder("new"), F_OK), 0);
        kvt_seq_destroy(of_other);
        kvt_cache_destroy(others);
    }
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* ---- where they are ---- */

static void paths(void **state)
{
    static char longer[5000];
    char here[1024];
    kvt_load_options l = loads();
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_seq *to;
    chain c;
    (void)state;
    chain_open(&c, I8, NULL);
    memset(longer, 'x', sizeof longer - 1);
    l.folder = longer;
    expect(c.s.cache, KVT_ERR_IO, kvt_seq_load(c.victim, in_folder("delta"), &l, NULL));
    expect_error_text(c.s.cache, "a parent's path is too long: middle", "a long folder");
    longer[4090] = '\0'; /* by its name alone */
    expect(c.s.cache, KVT_ERR_IO, kvt_seq_load(c.victim, in_folder("delta"), &l, NULL));
    expect_error_text(c.s.cache, "a parent's path is too long: middle", "a long folder");
    longer[4090] = 'x';
    assert_true(file_hash(&c.s, c.victim) == c.hash);
    o.parent = longer;
    expect(c.s.cache, KVT_ERR_IO, kvt_seq_save(c.seq, in_folder("new"), &o));
    assert_int_not_equal(access(in_folder("new"), F_OK), 0);
    /* Paths without a folder, and a folder that is given as "" or with a slash. */
    assert_non_null(getcwd(here, sizeof here));
    to = tagged_seq(&c.s);
    assert_int_equal(chdir(folder), 0);
    expect_ok(c.s.cache, kvt_seq_load(to, "delta", NULL, NULL));
    expect_equal(&c.s, c.seq, to, "a path without a folder", 0);
    l.folder = "";
    expect_ok(c.s.cache, kvt_seq_load_memory(to, c.delta.data, c.delta.n, &l, NULL));
    expect_equal(&c.s, c.seq, to, "the empty folder", 0);
    l.folder = "./";
    expect_ok(c.s.cache, kvt_seq_load_memory(to, c.delta.data, c.delta.n, &l, NULL));
    o.parent = "delta";
    expect_ok(c.s.cache, kvt_seq_save(c.seq, "new", &o));
    expect(c.s.cache, KVT_ERR_ARG, kvt_seq_save(c.seq, "middle", &o));
    expect_error_text(c.s.cache, "its own parent", "a parent of its parent");
    assert_int_equal(chdir(here), 0);
    expect_ok(c.s.cache, kvt_seq_load(to, in_folder("new"), NULL, NULL));
    expect_equal(&c.s, c.seq, to, "saved without a folder", 0);
    kvt_seq_destroy(to);
    chain_close(&c);
}

/* ---- tokens ---- */

/* The file says that no key has moved, and has no shifts. */
static void deny_shifts(bytes *f)
{
    size_t size, at = section_payload(f->data, f->n, 10, 0, &size);
    put32(f->data + 44, 0);
    replace_bytes(f, at - HEAD, HEAD + size, NULL, 0);
    relay(f, 0);
    relay(f, 1);
}

/* Keys that have moved in a parent have not in its delta: it would load them as if they stood. */
static void moved_keys(void **state)
{
    rng r = {62};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    bytes base, delta, bent;
    subject s;
    kvt_seq *seq, *to;
    uint64_t hash;
    (void)state;
    open_kind(&s, I8, &r);
    seq = tagged_seq(&s);
    grow(&s, seq, 260);
    expect_ok(s.cache, kvt_seq_remove(seq, 64, 64));
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("base"), &o));
    grow(&s, seq, 70);
    o.parent = in_folder("base");
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("delta"), &o));
    base = slurp(in_folder("base"));
    delta = slurp(in_folder("delta"));
    to = tagged_seq(&s);
    grow(&s, to, 20);
    hash = file_hash(&s, to);
    assert_int_equal(get32(delta.data + 44), 1);
    deny_shifts(&delta);
    spill(in_folder("delta"), delta.data, delta.n);
    expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("delta"), NULL, NULL));
    expect_error_text(s.cache, "keys that it inherits have moved", "no flag and no shifts");
    assert_true(file_hash(&s, to) == hash);
    bent = copy_of(&base); /* and the parent's cannot be read */
    note(&bent, 10, 0)[35] ^= 1;
    resign_sums(bent.data, bent.n);
    adopt(&delta, &bent);
    spill(in_folder("base"), bent.data, bent.n);
    spill(in_folder("delta"), delta.data, delta.n);
    expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("delta"), NULL, NULL));
    expect_error_text(s.cache, "section shifts 0: its tokens do not make their digest", "shifts");
    assert_true(file_hash(&s, to) == hash);
    bytes_free(&bent);
    bytes_free(&base);
    bytes_free(&delta);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* A parent on the way says that no key has moved, and inherits such as have. */
static void moved_keys_on_the_way(void **state)
{
    rng r = {63};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    bytes middle, delta;
    subject s;
    kvt_seq *seq, *to;
    uint64_t hash;
    (void)state;
    open_kind(&s, I8, &r);
    seq = tagged_seq(&s);
    grow(&s, seq, 260);
    expect_ok(s.cache, kvt_seq_remove(seq, 64, 64));
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("base"), &o));
    grow(&s, seq, 70);
    o.parent = in_folder("base");
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("middle"), &o));
    grow(&s, seq, 70);
    o.parent = in_folder("middle");
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("delta"), &o));
    middle = slurp(in_folder("middle"));
    delta = slurp(in_folder("delta"));
    to = tagged_seq(&s);
    grow(&s, to, 20);
    hash = file_hash(&s, to);
    deny_shifts(&middle);
    adopt(&delta, &middle);
    spill(in_folder("middle"), middle.data, middle.n);
    spill(in_folder("delta"), delta.data, delta.n);
    expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("delta"), NULL, NULL));
    expect_error_text(s.cache, "keys that it inherits have moved", "a parent on the way");
    expect_error_text(s.cache, "in the parent middle", "which");
    assert_true(file_hash(&s, to) == hash);
    bytes_free(&middle);
    bytes_free(&delta);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* A key's position, which is its token's and the shift, is one. */
static void positions_of_keys(void **state)
{
    static const int32_t shifts[] = {INT32_MAX, -1000000, -INT32_MAX};
    rng r = {64};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    subject s;
    kvt_seq *seq, *to;
    uint64_t hash;
    size_t size, at;
    char text[200];
    (void)state;
    open_kind(&s, I8, &r);
    seq = tagged_seq(&s);
    grow(&s, seq, 260);
    expect_ok(s.cache, kvt_seq_remove(seq, 64, 64));
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("moved"), &o));
    to = tagged_seq(&s);
    grow(&s, to, 20);
    hash = file_hash(&s, to);
    for (size_t i = 0; i < sizeof shifts / sizeof *shifts; i++) {
        bytes file = slurp(in_folder("moved"));
        kvt_snapshot_info info;
        at = section_payload(file.data, file.n, 10, 0, &size);
        put32(file.data + at + SET + 4 * 100, (uint32_t)shifts[i]); /* of token 100 */
        resign(file.data, file.n);
        spill(in_folder("bent"), file.data, file.n);
        info.struct_size = sizeof info;
        assert_int_equal(kvt_snapshot_inspect(in_folder("bent"), 0, &info, NULL, 0), KVT_OK);
        assert_int_equal(kvt_snapshot_inspect(in_folder("bent"), 1, &info, text, sizeof text),
                         KVT_ERR_CORRUPT);
        assert_non_null(strstr(text, "tokens 64 to 127 was computed for no position"));
        expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("bent"), NULL, NULL));
        expect_error_text(s.cache, "tokens 64 to 127 was computed for no position", "a shift");
        assert_true(file_hash(&s, to) == hash);
        bytes_free(&file);
    }
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* A parent's own parent section is the one that its id is made of. */
static void parent_sections(void **state)
{
    chain c;
    bytes other, middle;
    unsigned char *to;
    uint64_t size;
    (void)state;
    chain_open(&c, I8, NULL);
    write_all(&c.base, &c.middle, &c.delta);
    other = copy_of(&c.base); /* other tokens over the same blocks */
    payload(&other, 1, 0)[SET] ^= 1;
    resign(other.data, other.n);
    accept_written(&c);
    middle = copy_of(&c.middle);
    to = payload(&middle, 11, 0);
    memcpy(to, other.data + other.n - 48 + 16, 16);
    size = get64(to - HEAD + 8);
    put64(to + size - 8, XXH64(to, (size_t)size - 8, 0));
    write_all(&other, &middle, &c.delta); /* middle's id is what it was */
    refuse(&c, KVT_ERR_CORRUPT, "it does not have the parent section", "another parent");
    bytes_free(&middle);
    accept(&c);
    bytes_free(&other);
    chain_close(&c);
}

/* Sections of 16384 tokens that begin where a parent's own do: a delta's cross their borders. */
static void long_parents(void **state)
{
    static const size_t lengths[] = {100, 16600, 17000};
    model m = model_of(1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_snapshot_info info;
    static int32_t of_seq[17000], of_loaded[17000];
    kvt_cache *cache;
    kvt_seq *seq, *to;
    (void)state;
    m.max_tokens = 17000;
    cache = model_cache(&m);
    seq = model_seq(cache);
    to = model_seq(cache);
    for (int i = 0; i < 3; i++) {
        kvt_save_options o = saves(KVT_CODEC_RAW);
        const char *names[] = {"l0", "l1", "l2"};
        o.parent = i ? in_folder(names[i - 1]) : NULL;
        model_append(&m, cache, seq, lengths[i] - (size_t)kvt_seq_length(seq), 4000);
        expect_ok(cache, kvt_seq_save(seq, in_folder(names[i]), &o));
        info.struct_size = sizeof info;
        assert_int_equal(kvt_snapshot_inspect(in_folder(names[i]), 1, &info, NULL, 0), KVT_OK);
        assert_int_equal(info.inherited_tokens, i ? lengths[i - 1] : 0); /* all are found there */
    }
    expect_ok(cache, kvt_seq_load(to, in_folder("l2"), NULL, NULL));
    assert_int_equal(kvt_seq_length(to), 17000);
    expect_ok(cache, kvt_seq_token_ids(seq, 0, 17000, of_seq));
    expect_ok(cache, kvt_seq_token_ids(to, 0, 17000, of_loaded));
    assert_memory_equal(of_seq, of_loaded, sizeof of_seq);
    expect_ok(cache, kvt_seq_positions(seq, 0, 17000, of_seq));
    expect_ok(cache, kvt_seq_positions(to, 0, 17000, of_loaded));
    assert_memory_equal(of_seq, of_loaded, sizeof of_seq);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/*
 * Keys that have moved, in a chain of such files: inspection has the positions of each section and
 * of those that are inherited again when the shifts come.
 */
static void long_moved_parents(void **state)
{
    static const size_t lengths[] = {136, 16600, 33500};
    static const char *const names[] = {"m0", "m1", "m2"};
    static const float frequencies[2] = {1.0f, 0.1f};
    model m = model_of(1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_snapshot_info info;
    kvt_cache *cache;
    kvt_seq *to;
    (void)state;
    m.max_tokens = 34000;
    m.groups[0].rope_pairing = KVT_ROPE_HALVES;
    m.groups[0].rope_dims = 4;
    m.groups[0].rope_inverse_frequencies = frequencies;
    cache = model_cache(&m);
    to = model_seq(cache);
    info.struct_size = sizeof info;
    for (uint32_t codec = KVT_CODEC_AUTO; codec <= KVT_CODEC_RAW; codec++) {
        kvt_seq *seq = model_seq(cache);
        char text[200] = "";
        size_t size, at;
        bytes file;
        model_append(&m, cache, seq, 200, 200);
        expect_ok(cache, kvt_seq_remove(seq, 64, 64));
        for (int i = 0; i < 3; i++) {
            kvt_save_options o = saves(codec);
            o.parent = i ? in_folder(names[i - 1]) : NULL;
            model_append(&m, cache, seq, lengths[i] - (size_t)kvt_seq_length(seq), 4000);
            expect_ok(cache, kvt_seq_save(seq, in_folder(names[i]), &o));
            (void)kvt_snapshot_inspect(in_folder(names[i]), 1, &info, text, sizeof text);
            assert_string_equal(text, "");
            assert_int_equal(info.inherited_tokens, i ? lengths[i - 1] : 0);
        }
        expect_ok(cache, kvt_seq_load(to, in_folder("m2"), NULL, NULL));
        assert_true(state_hash(&m, cache, to) == state_hash(&m, cache, seq));
        kvt_seq_destroy(seq);
        if (codec != KVT_CODEC_RAW)
            continue;
        for (unsigned i = 0; i < 2; i++) { /* in both sections of the delta */
            static const char *const told[] = {"tokens 16768 to 16831 was", "33280 to 33343 was"};
            const size_t token[] = {16800 - 16600, 33300 - 16600 - 16384};
            file = slurp(in_folder("m2"));
            at = section_payload(file.data, file.n, 10, i, &size);
            put32(file.data + at + SET + 4 * token[i], INT32_MAX);
            resign(file.data, file.n);
            spill(in_folder("m3"), file.data, file.n);
            assert_int_equal(kvt_snapshot_inspect(in_folder("m3"), 1, &info, text, sizeof text),
                             KVT_ERR_CORRUPT);
            assert_non_null(strstr(text, told[i]));
            expect(cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("m3"), NULL, NULL));
            expect_error_text(cache, told[i], "a load");
            bytes_free(&file);
        }
    }
    kvt_seq_destroy(to);
    kvt_cache_destroy(cache);
}

/* Saves that go elsewhere than to a path: nothing is written where there is no parent. */
static void no_parent(void **state)
{
    rng r = {63};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    unsigned char memory[8] = {0};
    size_t n = 7;
    uint64_t bound = 7;
    subject s;
    kvt_seq *seq;
    int ends[2];
    (void)state;
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 100);
    assert_int_equal(pipe(ends), 0);
    o.parent = in_folder("nowhere");
    expect(s.cache, KVT_ERR_IO, kvt_seq_save_stream(seq, &writer, &o));
    expect_error_text(s.cache, "/nowhere", "stream");
    expect(s.cache, KVT_ERR_IO, kvt_seq_save_fd(seq, ends[1], &o));
    expect_error_text(s.cache, "/nowhere", "descriptor");
    expect(s.cache, KVT_ERR_IO, kvt_seq_save_memory(seq, memory, sizeof memory, &n, &o));
    expect_error_text(s.cache, "/nowhere", "memory");
    spill(in_folder("file"), "text", 4); /* nor below a file */
    o.parent = in_folder("file/base");
    expect(s.cache, KVT_ERR_IO, kvt_seq_save_stream(seq, &writer, &o));
    expect_error_text(s.cache, "file/base", "below a file");
    expect_ok(s.cache, kvt_seq_save_bound(seq, &bound, &o)); /* that needs none */
    assert_true(b.n == 0 && n == 7 && bound > 7);
    assert_int_equal(close(ends[1]), 0);
    assert_int_equal(read(ends[0], memory, 1), 0);
    assert_int_equal(close(ends[0]), 0);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* ---- encrypted ---- */

/* Any byte of an encrypted parent, and any length: the text names the file. */
static void encrypted(void **state)
{
    kvt_load_options l = loads();
    size_t damaged = 0;
    chain c;
    (void)state;
    chain_open(&c, F32, NULL);
    if (!has_crypt(&c.s)) {
        chain_close(&c);
        skip();
    }
    chain_close(&c);
    chain_open(&c, F32, a_key);
    l.key = a_key;
    for (int level = 0; level < 2; level++) {
        const bytes *good = level ? &c.middle : &c.base;
        const char *name = level ? "middle" : "base";
        bytes file = copy_of(good);
        char said[40];
        assert_true(file.n > ((size_t)2 << 18) || level);
        (void)snprintf(said, sizeof said, "in the parent %s, ", name);
        for (size_t i = 0; i < file.n; i += i < 200 ? 13 : file.n / 17) {
            for (int cut = 0; cut < 2; cut++) {
                kvt_status status;
                file.data[i] ^= 4;
                spill(in_folder(name), cut ? good->data : file.data, cut ? i : file.n);
                file.data[i] ^= 4;
                status = kvt_seq_load(c.victim, in_folder("delta"), &l, NULL);
                if (status == KVT_OK && !cut) { /* of what the delta does not need */
                    kvt_seq_destroy(c.victim);
                    c.victim = tagged_seq(&c.s);
                    grow(&c.s, c.victim, 20);
                    continue;
                }
                if (status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT &&
                    status != KVT_ERR_MISMATCH)
                    fail_msg("%s, byte %zu: status %d", name, i, (int)status);
                damaged += status == KVT_ERR_CORRUPT && !cut;
                expect_error_text(c.s.cache, said, name);
                assert_true(file_hash(&c.s, c.victim) == c.hash);
            }
        }
        write_all(&c.base, &c.middle, &c.delta);
        bytes_free(&file);
    }
    assert_true(damaged > 10);
    expect_ok(c.s.cache, kvt_seq_load(c.victim, in_folder("delta"), &l, NULL));
    expect_equal(&c.s, c.seq, c.victim, "encrypted and sound", 0);
    chain_close(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ends),
        cmocka_unit_test(indexes),
        cmocka_unit_test(same_ids),
        cmocka_unit_test(unknown_sections),
        cmocka_unit_test(places_of_sections),
        cmocka_unit_test(blocks_of_other_groups),
        cmocka_unit_test(headers),
        cmocka_unit_test(fits),
        cmocka_unit_test(other_models),
        cmocka_unit_test(paths),
        cmocka_unit_test(encrypted),
        cmocka_unit_test(moved_keys),
        cmocka_unit_test(moved_keys_on_the_way),
        cmocka_unit_test(positions_of_keys),
        cmocka_unit_test(parent_sections),
        cmocka_unit_test(long_parents),
        cmocka_unit_test(long_moved_parents),
        cmocka_unit_test(no_parent),
    };
    RUN_IN_FOLDER(tests);
}
