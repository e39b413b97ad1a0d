/*
 * Snapshots with windows, checkpoints and a tag that are damaged, or say other things with sound
 * checksums: each is refused and leaves the sequence unchanged, or is harmless.
 */
#include "snapshot_state.h"

#include <stdio.h>

/* ---- damage ---- */

/* Status of a load that may go well; then everything works, and nothing else than before. */
static kvt_status try_load(const subject *s, kvt_seq *victim, uint64_t before, const bytes *file)
{
    kvt_seq *seq;
    uint64_t at[MOST];
    kvt_status status = load_bytes(victim, file->data, file->n, NULL);
    size_t n;
    if (status != KVT_OK) {
        assert_true(file_hash(s, victim) == before);
        return status;
    }
    seq = reloaded(s, victim);
    expect_equal(s, seq, victim, "a changed file", 0);
    points_of(s, seq, at, &n);
    for (; n-- > 0; grow(s, seq, at[n] + 100 < MOST ? 100 : 1)) {
        expect_ok(s->cache, kvt_seq_truncate(seq, at[n]));
        if (at[n]) /* of a crafted file, the last query may see one token too many */
            (void)file_hash(s, seq);
        if (kvt_seq_next_position(seq) > 1 << 30)
            expect_ok(s->cache, kvt_seq_set_next_position(seq, 1));
    }
    kvt_seq_destroy(seq);
    return status;
}

static void every_byte_of(kvt_type type, uint32_t codec)
{
    static const unsigned char patterns[] = {0x01, 0x10, 0x80, 0xff};
    rng r = {19};
    kvt_seq *victim;
    uint64_t before;
    bytes file;
    subject s;
    make(&s, 20, 0, type, KVT_RESIDUAL_NONE, &r);
    file = whole_file(&s, codec);
    victim = victim_of(&s);
    before = file_hash(&s, victim);
    for (size_t i = 0; i < file.n; i += is_quick() ? 7 : 1) {
        kvt_status status;
        for (size_t p = 0; p < (is_quick() ? 1 : sizeof patterns); p++) {
            file.data[i] ^= patterns[p];
            status = load_bytes(victim, file.data, file.n, NULL);
            if (status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT)
                fail_msg("byte %zu of %zu changed: status %d", i, file.n, (int)status);
            file.data[i] ^= patterns[p];
        }
        status = load_bytes(victim, file.data, i, NULL);
        if (status != KVT_ERR_CORRUPT)
            fail_msg("cut at %zu of %zu: status %d", i, file.n, (int)status);
        if (i % 252 == 0)
            assert_true(file_hash(&s, victim) == before);
    }
    assert_true(file_hash(&s, victim) == before);
    expect_ok(s.cache, load_bytes(victim, file.data, file.n, NULL));
    bytes_free(&file);
    kvt_seq_destroy(victim);
    close_subject(&s);
}

static void every_byte(void **state)
{
    (void)state;
    every_byte_of(KVT_TYPE_F16, KVT_CODEC_ZSTD);
    if (is_quick())
        return;
    every_byte_of(KVT_TYPE_I8, KVT_CODEC_RAW);
    every_byte_of(KVT_TYPE_I4, KVT_CODEC_ZSTD);
    every_byte_of(KVT_TYPE_I5, KVT_CODEC_RAW);
}

/* A changed section with sound checksums: what may go well, and what may not. */
static void signed_section(const subject *s, uint32_t type, unsigned number, size_t first,
                           size_t end, int may_load)
{
    static const unsigned char patterns[] = {0x01, 0x02, 0x04, 0x07, 0x40, 0x80, 0xff};
    bytes good = whole_file(s, KVT_CODEC_RAW), file = whole_file(s, KVT_CODEC_RAW);
    kvt_seq *victim = victim_of(s);
    uint64_t before = file_hash(s, victim);
    size_t size, at = section_payload(good.data, good.n, type, number, &size);
    end = end ? end : size - 8;
    for (size_t i = first; i < end; i++)
        for (size_t p = is_quick() ? i % 4 : 0; p < sizeof patterns; p += is_quick() ? 4 : 1) {
            kvt_status status;
            memcpy(file.data, good.data, good.n);
            file.data[at + i] ^= patterns[p];
            resign_sums(file.data, file.n);
            status = try_load(s, victim, before, &file);
            if (status == KVT_OK ? !may_load
                                 : status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT &&
                                       status != KVT_ERR_MISMATCH)
                fail_msg("section %u (%u), byte %zu ^ %x: status %d", type, number, i, patterns[p],
                         (int)status);
            if (status == KVT_OK) {
                kvt_seq_destroy(victim);
                victim = victim_of(s);
            }
        }
    kvt_seq_destroy(victim);
    bytes_free(&good);
    bytes_free(&file);
}

static void signed_sections(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4, KVT_TYPE_I5};
    (void)state;
    for (int i = 0; i < 4; i++) {
        rng r = {20};
        subject s;
        bytes file;
        size_t size, points = 0, blob;
        make(&s, 20, 0, types[i], KVT_RESIDUAL_NONE, &r);
        file = whole_file(&s, KVT_CODEC_RAW);
        (void)section_payload(file.data, file.n, 8, 0, &size);
        assert_int_equal(size, 8 + 8 + 8);
        signed_section(&s, 8, 0, 0, 4, 1);  /* next position: any that is not negative */
        signed_section(&s, 8, 0, 4, 16, 0); /* tag */
        signed_section(&s, 3, 0, 0, 0, 0);  /* the block table: ids and places */
        for (unsigned n = 0; n < 2; n++) {
            size_t at = section_payload(file.data, file.n, 9, n, &size);
            blob = (size_t)get64(file.data + at + 8);
            assert_int_equal(blob, n ? 100 % 81 : 30);
            points = size - 8 - (blob + 7) / 8 * 8; /* where the blob begins */
            signed_section(&s, 9, n, 0, 4, 1);
            signed_section(&s, 9, n, 4, 8, 0);
            signed_section(&s, 9, n, 8, 16, 1);      /* its size: as far as it is padded */
            signed_section(&s, 9, n, 16, points, 0); /* rows and entries */
            signed_section(&s, 9, n, points, points + blob, 1);
            signed_section(&s, 9, n, points + blob, 0, 0);
        }
        bytes_free(&file);
        close_subject(&s);
    }
}

/* ---- contradictions ---- */

static unsigned char *payload(bytes *f, uint32_t type, unsigned i)
{
    size_t size;
    return f->data + section_payload(f->data, f->n, type, i, &size);
}

/* One field of entry b, in the table and in the block. */
static void put_entry(bytes *f, unsigned b, size_t field, uint32_t x)
{
    put32(payload(f, 3, 0) + 32 * b + field, x);
    put32(payload(f, 4, b) + field - 16, x);
}

static void point_order(bytes *f)
{
    put64(payload(f, 9, 1) - 16, 30);
}
static void point_order_back(bytes *f)
{
    put64(payload(f, 9, 1) - 16, 29);
}
static void point_beyond(bytes *f)
{
    put64(payload(f, 9, 1) - 16, 201);
}
static void point_other_length(bytes *f)
{
    put64(payload(f, 9, 1) - 16, 101);
}
static void point_optional(bytes *f)
{
    put32(payload(f, 9, 0) - 28, 0);
}
static void point_no_position(bytes *f)
{
    put32(payload(f, 9, 0), (uint32_t)-2);
}
static void point_from_later(bytes *f) /* the same words: one row less, and padding */
{
    put32(payload(f, 9, 0) + 16, 1);
}
static void point_own_block(bytes *f)
{
    put32(payload(f, 9, 0) + 20, 0);
}
static void point_no_window(bytes *f) /* as the sequence, which has released it */
{
    put32(payload(f, 9, 0) + 20, UINT32_MAX);
}
static void point_no_block(bytes *f) /* of the group without a window */
{
    put32(payload(f, 9, 0) + 28, UINT32_MAX);
}
static void point_beyond_table(bytes *f)
{
    put32(payload(f, 9, 0) + 20, (uint32_t)get64(f->data + 48));
}
static void point_huge_blob(bytes *f)
{
    put64(payload(f, 9, 0) + 8, UINT64_MAX - 3);
}
static void more_blocks(bytes *f)
{
    put64(f->data + 48, get64(f->data + 48) + 1);
}
static void few_blocks(bytes *f)
{
    put64(f->data + 48, 1);
}
static void all_blocks(bytes *f)
{
    put64(f->data + 48, UINT32_MAX);
}
static void sinks_alone(bytes *f)
{
    put32(f->data + 64 + 48 + 44, 4);
}
static void extra_row(bytes *f)
{
    put_entry(f, (unsigned)get64(f->data + 48) - 1, 20, 9);
}
static void extra_group(bytes *f)
{
    put_entry(f, (unsigned)get64(f->data + 48) - 1, 16, 2);
}
static void extra_tokens(bytes *f)
{
    put_entry(f, (unsigned)get64(f->data + 48) - 1, 24, 0);
}
static void extra_fine(bytes *f)
{
    put_entry(f, (unsigned)get64(f->data + 48) - 1, 28, 2);
}
static void extra_again(bytes *f)
{
    put_entry(f, (unsigned)get64(f->data + 48) - 1, 28, 3);
}
static void extra_form(bytes *f)
{
    put_entry(f, (unsigned)get64(f->data + 48) - 1, 28, 4);
}
static void first_row_gone(bytes *f) /* of the group without a window */
{
    put_entry(f, 0, 16, 1);
    put_entry(f, 0, 20, 1);
}
static void tag_size(bytes *f)
{
    put32(payload(f, 8, 0) + 4, 2);
}
static void tag_huge(bytes *f)
{
    put32(payload(f, 8, 0) + 4, 257);
}
static void sequence_of_nothing(bytes *f)
{
    put32(payload(f, 8, 0), (uint32_t)-1);
    put32(payload(f, 8, 0) + 4, 0);
}
static void sequence_value(bytes *f)
{
    put64(payload(f, 8, 0) - 16, 1);
}
static void next_position_low(bytes *f)
{
    put32(payload(f, 8, 0), (uint32_t)-2);
}
/* The window grows: blocks that it needs are not there. The cache has that window. */
static void window_larger(bytes *f)
{
    put32(f->data + 64 + 40, 600);
}

static void contradictions(void **state)
{
#define CASE(change, text)                                                                         \
    {                                                                                              \
        change, #change, text                                                                      \
    }
    static const struct {
        void (*change)(bytes *f);
        const char *name, *text;
    } cases[] = {
        CASE(point_order, "do not ascend"),
        CASE(point_order_back, "do not ascend"),
        CASE(point_beyond, "do not ascend"),
        CASE(point_other_length, ""),
        CASE(point_optional, "in its place"),
        CASE(point_no_position, "next position"),
        CASE(point_from_later, ""),
        CASE(point_own_block, ""),
        CASE(point_no_block, "without a block"),
        CASE(point_no_window, "the sequence's own"),
        CASE(point_beyond_table, "beyond the block table"),
        CASE(point_huge_blob, "sizes"),
        CASE(more_blocks, "size"),
        CASE(few_blocks, "number of blocks"),
        CASE(all_blocks, "number of blocks"),
        CASE(sinks_alone, "sink_tokens"),
        CASE(extra_row, "entry"),
        CASE(extra_group, "entry"),
        CASE(extra_tokens, "entry"),
        CASE(extra_fine, "is fine, in a group"),
        CASE(extra_again, "is open again, in a group"),
        CASE(extra_form, "representation 4"),
        CASE(first_row_gone, "missing"),
        CASE(tag_size, ""),
        CASE(tag_huge, "tag of 257"),
        CASE(sequence_of_nothing, ""),
        CASE(sequence_value, "in its place"),
        CASE(next_position_low, "next position"),
        CASE(window_larger, "blocks that"),
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rng r = {21};
        kvt_seq *victim;
        uint64_t before;
        kvt_status status;
        bytes file;
        subject s;
        make(&s, 20, 0, KVT_TYPE_F16, KVT_RESIDUAL_NONE, &r);
        file = whole_file(&s, KVT_CODEC_RAW);
        cases[i].change(&file);
        if (cases[i].change == window_larger) {
            kvt_cache_destroy(s.cache);
            s.groups[0].window_tokens = 600;
            open_cache(&s, NULL);
        }
        resign(file.data, file.n);
        victim = victim_of(&s);
        before = file_hash(&s, victim);
        status = load_bytes(victim, file.data, file.n, NULL);
        if (status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT)
            fail_msg("%s: status %d", cases[i].name, (int)status);
        expect_error_text(s.cache, cases[i].text, cases[i].name);
        assert_true(file_hash(&s, victim) == before);
        bytes_free(&file);
        kvt_seq_destroy(victim);
        close_subject(&s);
    }
}

/* ---- files of other checkpoints ---- */

/* Number the blocks, put them into native sections, make the index, the end, checksums and ids. */
static void settle(bytes *f)
{
    size_t at = get32(f->data + 12);
    uint64_t blocks = 0;
    for (; get32(f->data + at) != 6; at += 32 + (size_t)get64(f->data + at + 8))
        if (get32(f->data + at) == 4)
            put64(f->data + at + 16, blocks++);
        else if (get32(f->data + at) == 14)
            put64(f->data + at + 16, blocks - 1);
    put64(f->data + 48, blocks);
    relay(f, 1);
}

/* The end of the sections of the block whose head is at an offset. */
static size_t block_end(const bytes *f, size_t at)
{
    uint32_t type;
    do {
        at += 32 + (size_t)get64(f->data + at + 8);
        type = get32(f->data + at);
    } while (type == 5 || type == 13 || type == 14);
    return at;
}

/* The groups' words of a checkpoint. */
static void set_words(bytes *f, unsigned i, const uint32_t *words, size_t n)
{
    size_t size, at = section_payload(f->data, f->n, 9, i, &size);
    size_t blob = ((size_t)get64(f->data + at + 8) + 7) / 8 * 8, old = size - 16 - 8 - blob;
    unsigned char put[32 * 4] = {0};
    for (size_t w = 0; w < n; w++)
        put32(put + 4 * w, words[w]);
    n = (n + 1) / 2 * 8;
    put64(f->data + at - 24, size - old + n);
    replace_bytes(f, at + 16, old, put, n);
}

static void drop_point(bytes *f, unsigned i)
{
    size_t size, at = section_payload(f->data, f->n, 9, i, &size);
    replace_bytes(f, at - 32, size + 32, NULL, 0);
}

/* A copy of block `from` becomes block `to`; one of its bytes is another one, if other is not 0. */
static void add_block(bytes *f, unsigned from, unsigned to, unsigned char other)
{
    size_t size, begin = section_payload(f->data, f->n, 4, from, &size) - 32;
    size_t end = block_end(f, begin), at;
    unsigned char *copy, entry[32];
    copy = malloc(end - begin);
    assert_non_null(copy);
    memcpy(copy, f->data + begin, end - begin);
    copy[32 + 40 + 32 + 8 + 3 * 24 + 8] ^= other; /* the first code of the first layer */
    if (to < get64(f->data + 48))
        at = section_payload(f->data, f->n, 4, to, &size) - 32;
    else /* behind the last one */
        at = block_end(f, section_payload(f->data, f->n, 4, to - 1, &size) - 32);
    replace_bytes(f, at, 0, copy, end - begin);
    free(copy);
    at = section_payload(f->data, f->n, 3, 0, &size);
    memcpy(entry, f->data + at + 32 * from, 32);
    put64(f->data + at - 24, size + 32);
    replace_bytes(f, at + 32 * to, 0, entry, 32);
}

/* Block b is gone. */
static void drop_block(bytes *f, unsigned b)
{
    size_t size, at, begin = section_payload(f->data, f->n, 4, b, &size) - 32;
    replace_bytes(f, begin, block_end(f, begin) - begin, NULL, 0);
    at = section_payload(f->data, f->n, 3, 0, &size);
    put64(f->data + at - 24, size - 32);
    replace_bytes(f, at + 32 * b, 32, NULL, 0);
}

/*
 * Two groups of i8 without windows; checkpoints at 190, 192 and 200, where row 1 is open, then
 * sealed. Own blocks: 14. Behind: rows 1 and 2 of both groups at 190, row 2 of both at 192, row 3
 * of both at 200.
 */
static bytes sealing_file(const subject *s)
{
    kvt_seq *seq = seq_of(s);
    bytes file;
    grow(s, seq, 190);
    checkpoint(s, seq);
    grow(s, seq, 2);
    checkpoint(s, seq);
    grow(s, seq, 8);
    checkpoint(s, seq);
    grow(s, seq, 200);
    file = saved(s->cache, seq, KVT_CODEC_RAW);
    assert_int_equal(get64(file.data + 48), 22);
    kvt_seq_destroy(seq);
    return file;
}

static void same_words(bytes *f)
{
    static const uint32_t a[] = {1, 14, 15, 1, 16, 17}, b[] = {2, 18, 2, 19};
    static const uint32_t c[] = {2, 18, 20, 2, 19, 21};
    set_words(f, 0, a, 6);
    set_words(f, 1, b, 4);
    set_words(f, 2, c, 6);
}
static void open_again(bytes *f)
{
    static const uint32_t c[] = {1, 14, 18, 20, 2, 19, 21};
    set_words(f, 2, c, 7);
}
static void sealed_behind_open(bytes *f)
{
    static const uint32_t a[] = {1, 14, 2, 1, 16, 17};
    set_words(f, 0, a, 6);
}
static void twice(bytes *f) /* the same block, again, for the last checkpoint */
{
    static const uint32_t c[] = {2, 20, 21, 2, 19, 22};
    add_block(f, 18, 20, 0);
    set_words(f, 2, c, 6);
}
static void changed_for_good(bytes *f) /* row 0, which is sealed */
{
    static const uint32_t a[] = {0, 14, 15, 16, 1, 17, 18}, b[] = {2, 19, 2, 20};
    static const uint32_t c[] = {2, 19, 21, 2, 20, 22};
    add_block(f, 0, 14, 1);
    set_words(f, 0, a, 7);
    set_words(f, 1, b, 4);
    set_words(f, 2, c, 6);
}
static void own_as_extra(bytes *f) /* at the sequence's end; its last row is open */
{
    static const uint32_t words[] = {6, 22, 7};
    unsigned char body[16 + 16] = {0xff, 0xff, 0xff, 0xff};
    size_t size, end;
    for (int w = 0; w < 3; w++)
        put32(body + 16 + 4 * w, words[w]);
    add_block(f, 12, 22, 0);
    end = section_payload(f->data, f->n, 6, 0, &size) - 32;
    add_section(f, end, 9, 1, 400, body, sizeof body);
}
static void nobodys(bytes *f)
{
    drop_point(f, 2);
}
static void not_in_order(bytes *f)
{
    drop_point(f, 0);
}
static void another_group(bytes *f)
{
    static const uint32_t a[] = {1, 14, 15, 1, 14, 16};
    set_words(f, 0, a, 6);
}
static void another_row(bytes *f)
{
    static const uint32_t c[] = {2, 18, 3, 2, 19, 21};
    set_words(f, 2, c, 6);
}
static void own_of_more_tokens(bytes *f) /* 190 with the sequence's row 2 */
{
    static const uint32_t a[] = {1, 14, 4, 1, 16, 17};
    set_words(f, 0, a, 6);
}
static void no_row_differs(bytes *f)
{
    static const uint32_t a[] = {3, 1, 16, 17};
    set_words(f, 0, a, 4);
}
static void fewer_tokens(bytes *f) /* row 2 as it was at 190 */
{
    static const uint32_t b[] = {2, 15, 2, 18};
    set_words(f, 1, b, 4);
}
static void gap(bytes *f)
{
    static const uint32_t a[] = {1, UINT32_MAX, 14, 1, 16, 17};
    set_words(f, 0, a, 6);
}
static void
sealed_behind_open_extra(bytes *f) /* at 200: a sealed row 2 that is not the sequence's */
{
    static const uint32_t c[] = {1, 14, 20, 21, 2, 19, 22};
    add_block(f, 4, 20, 2);
    assert_true(get32(payload(f, 3, 0) + 32 * 14 + 28) == 1);
    set_words(f, 2, c, 7);
}
static void sealed_early(bytes *f) /* at the sequence's end; its row 5 is open */
{
    static const uint32_t words[] = {5, 22, 12, 7};
    unsigned char body[16 + 16] = {0xff, 0xff, 0xff, 0xff};
    size_t size, end;
    for (int w = 0; w < 4; w++)
        put32(body + 16 + 4 * w, words[w]);
    assert_true(get32(payload(f, 3, 0) + 32 * 10 + 28) == 1);
    add_block(f, 0, 22, 0);
    put_entry(f, 22, 20, 5);
    end = section_payload(f->data, f->n, 6, 0, &size) - 32;
    add_section(f, end, 9, 1, 400, body, sizeof body);
}

/*
 * The first group has a window: at 200 it has rows 1 .. 3, then 3 and 4, 3 and 4, 3 .. 5, 3 .. 5.
 */
static bytes releasing_file(const subject *s)
{
    kvt_seq *seq = seq_of(s);
    bytes file;
    for (size_t i = 0; kvt_seq_length(seq) < 600;) {
        static const uint64_t points[] = {200, 300, 310, 325, 330, MOST};
        grow(s, seq, 5);
        if (kvt_seq_length(seq) == points[i]) {
            checkpoint(s, seq);
            i++;
        }
    }
    file = saved(s->cache, seq, KVT_CODEC_RAW);
    kvt_seq_destroy(seq);
    return file;
}

/* Group 0's words of a checkpoint become these; those of the other group stay. */
static void set_first_words(bytes *f, unsigned i, const uint32_t *first, size_t n)
{
    uint32_t words[32];
    const unsigned char *p = payload(f, 9, i) + 16;
    size_t rows = ((size_t)get64(p - 32) + 63) / 64, count;
    memcpy(words, first, n * sizeof *first);
    p += 4 * (1 + rows - get32(p));
    count = 1 + rows - get32(p);
    for (size_t w = 0; w < count; w++)
        words[n + w] = get32(p + 4 * w);
    set_words(f, i, words, n + count);
}

static uint32_t word(bytes *f, unsigned i, size_t w)
{
    return get32(payload(f, 9, i) + 16 + 4 * w);
}

static void there_again(bytes *f)
{
    uint32_t words[] = {2, word(f, 0, 2), word(f, 2, 1), word(f, 2, 2)};
    assert_true(word(f, 0, 0) == 1 && word(f, 1, 0) == 3 && word(f, 2, 0) == 3);
    set_first_words(f, 2, words, 4);
}
static void window_gap(bytes *f)
{
    uint32_t words[] = {1, word(f, 0, 1), UINT32_MAX, word(f, 0, 3)};
    set_first_words(f, 0, words, 4);
}
static void window_no_last(bytes *f)
{
    uint32_t words[] = {1, word(f, 0, 1), word(f, 0, 2), UINT32_MAX};
    set_first_words(f, 0, words, 4);
}
static void window_own_of_released(bytes *f) /* row 3, which the sequence has no more */
{
    uint32_t words[] = {1, word(f, 0, 1), 0, word(f, 0, 3)};
    set_first_words(f, 0, words, 4);
}
/* The entry of a row of the sequence's own. */
static uint32_t own_entry(bytes *f, uint32_t group, uint32_t row)
{
    for (uint32_t i = 0; i < get64(f->data + 48); i++) {
        const unsigned char *entry = payload(f, 3, 0) + 32 * (size_t)i;
        if (get32(entry + 16) == group && get32(entry + 20) == row)
            return i;
    }
    fail_msg("no such row");
    return 0;
}
/* A checkpoint behind the others, that has as the first of group 0's rows none; 1: and one more. */
static void add_absent(bytes *f, uint64_t n_tokens, int more)
{
    const uint32_t first = get32(payload(f, 3, 0) + 32 * own_entry(f, 0, 8) + 20), rows = 9;
    unsigned char body[16 + 16] = {0xff, 0xff, 0xff, 0xff};
    size_t size, end = section_payload(f->data, f->n, 6, 0, &size) - 32;
    assert_int_equal(first, 8);
    put32(body + 16, 8);
    put32(body + 20, UINT32_MAX);
    put32(body + 24, more ? own_entry(f, 0, 9) : rows);
    put32(body + 28, more ? rows + 1 : 0);
    add_section(f, end, 9, 1, n_tokens, body, sizeof body);
}
static void window_first_is_absent(bytes *f)
{
    add_absent(f, 600, 1);
}
static void window_last_is_absent(bytes *f)
{
    add_absent(f, 576, 0);
}
/* Row 0 is a sink, and another one at 200; row 1, which could be released, is not there. */
static void behind_a_sink(bytes *f)
{
    uint32_t words[] = {0, word(f, 0, 1), UINT32_MAX, word(f, 0, 2), word(f, 0, 3)};
    assert_int_equal(word(f, 0, 0), 1);
    put_entry(f, words[1], 20, 0);
    set_first_words(f, 0, words, 5);
}
static void window_too_short(bytes *f) /* row 4 has 20 tokens that the next query sees */
{
    uint32_t words[] = {5, word(f, 4, 3)};
    assert_true(word(f, 3, 0) == 3 && word(f, 4, 0) == 3);
    set_first_words(f, 4, words, 2);
}

/*
 * The first group's row 1 is open at 100, sealed and cut at 110, at 120 open again where K has 4
 * bits, and sealed at 170. Extras: row 1 of both groups at 100, 110 and 120, row 0 of the second at
 * 100.
 */
static bytes reopening_file(const subject *s)
{
    kvt_seq *seq = seq_of(s);
    bytes file;
    grow(s, seq, 100);
    checkpoint(s, seq);
    grow(s, seq, 50);
    grow(s, seq, 1);
    expect_ok(s->cache, kvt_seq_truncate(seq, 110));
    checkpoint(s, seq);
    grow(s, seq, 10);
    checkpoint(s, seq);
    grow(s, seq, 50);
    file = saved(s->cache, seq, KVT_CODEC_RAW);
    assert_int_equal(get64(file.data + 48), 2 * 3 + 7);
    kvt_seq_destroy(seq);
    return file;
}

/* The representation of the first group's row 1 at a checkpoint. */
static uint32_t form_at(bytes *f, unsigned i)
{
    assert_int_equal(word(f, i, 0), 1);
    return get32(payload(f, 3, 0) + 32 * word(f, i, 1) + 28);
}

/* A row of 4-bit keys that was cut is open again: later checkpoints may have it so. */
static void reopened_rows(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_I4, KVT_TYPE_I5, KVT_TYPE_I8};
    (void)state;
    for (int i = 0; i < 3; i++) {
        rng r = {26};
        kvt_seq *victim;
        bytes file, again;
        subject s;
        make(&s, 0, 0, types[i], KVT_RESIDUAL_NONE, &r);
        file = reopening_file(&s);
        assert_true(form_at(&file, 0) == 1 && form_at(&file, 1) == 0);
        assert_int_equal(form_at(&file, 2), types[i] == KVT_TYPE_I8 ? 0 : 3);
        victim = seq_of(&s);
        expect_ok(s.cache, load_bytes(victim, file.data, file.n, NULL));
        again = saved(s.cache, victim, KVT_CODEC_RAW);
        assert_int_equal(file.n, again.n);
        assert_memory_equal(file.data, again.data, file.n);
        bytes_free(&file);
        bytes_free(&again);
        kvt_seq_destroy(victim);
        close_subject(&s);
    }
}

/*
 * Of 4-bit keys, row 0 is open at 70, sealed at 120, where row 1 is open again. With the row 0 of
 * the first checkpoint the second one has an open row before it, which no sequence comes to.
 */
static void open_again_behind_open(void **state)
{
    rng r = {28};
    kvt_seq *seq, *victim;
    uint32_t words[3];
    uint64_t before;
    bytes file;
    subject s;
    (void)state;
    make(&s, 0, 0, KVT_TYPE_I4, 0, &r);
    seq = seq_of(&s);
    grow(&s, seq, 70);
    checkpoint(&s, seq);
    grow(&s, seq, 230);
    grow(&s, seq, 1);
    expect_ok(s.cache, kvt_seq_truncate(seq, 110));
    grow(&s, seq, 10);
    checkpoint(&s, seq);
    grow(&s, seq, 200);
    file = saved(s.cache, seq, KVT_CODEC_RAW);
    kvt_seq_destroy(seq);
    assert_true(word(&file, 0, 0) == 0 && word(&file, 1, 0) == 1);
    assert_int_equal(get32(payload(&file, 3, 0) + 32 * word(&file, 0, 1) + 28), 1);
    assert_int_equal(form_at(&file, 1), 3);
    words[0] = 0;
    words[1] = word(&file, 0, 1);
    words[2] = word(&file, 1, 1);
    set_first_words(&file, 1, words, 3);
    settle(&file);
    victim = seq_of(&s);
    grow(&s, victim, 80);
    before = file_hash(&s, victim);
    expect(s.cache, KVT_ERR_CORRUPT, load_bytes(victim, file.data, file.n, NULL));
    expect_error_text(s.cache, "a block open again behind an open one", "checkpoint");
    assert_true(file_hash(&s, victim) == before);
    bytes_free(&file);
    kvt_seq_destroy(victim);
    close_subject(&s);
}

static void other_checkpoints(void **state)
{
    static const struct {
        void (*change)(bytes *f);
        const char *name, *text; /* NULL: sound, and the same as before when it is saved again */
    } cases[] = {
        CASE(same_words, NULL),
        CASE(twice, NULL),
        CASE(open_again, "open again"),
        CASE(sealed_behind_open, "another row"),
        CASE(changed_for_good, "cannot have changed"),
        CASE(own_as_extra, "there twice"),
        CASE(nobodys, "of no checkpoint"),
        CASE(not_in_order, "another order"),
        CASE(another_group, "another row"),
        CASE(another_row, "another row"),
        CASE(own_of_more_tokens, "more or fewer"),
        CASE(no_row_differs, "last row is not"),
        CASE(fewer_tokens, "more or fewer"),
        CASE(gap, "without a block"),
        CASE(sealed_behind_open_extra, "a sealed block behind an open one"),
        CASE(sealed_early, "open again"),
        CASE(there_again, "there again"),
        CASE(window_gap, "without a block"),
        CASE(window_no_last, "without a block"),
        CASE(window_too_short, "the checkpoint at 330 tokens"),
        CASE(window_own_of_released, "another row"),
        CASE(window_first_is_absent, "there again"),
        CASE(window_last_is_absent, "without a block"),
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rng r = {24};
        int window = i >= 16;
        kvt_seq *victim;
        kvt_status status;
        uint64_t before;
        bytes file, good;
        subject s;
        make(&s, window ? 20 : 0, 0, window ? KVT_TYPE_F16 : KVT_TYPE_I8, 0, &r);
        file = window ? releasing_file(&s) : sealing_file(&s);
        good = window ? releasing_file(&s) : sealing_file(&s);
        relay(&file, 0);
        settle(&file);
        assert_int_equal(file.n, good.n);
        assert_memory_equal(file.data, good.data, good.n);
        relay(&file, 0); /* layers: they may stand anywhere */
        cases[i].change(&file);
        settle(&file);
        victim = seq_of(&s);
        grow(&s, victim, 80);
        checkpoint(&s, victim);
        before = file_hash(&s, victim);
        status = load_bytes(victim, file.data, file.n, NULL);
        if (cases[i].text) {
            if (status != KVT_ERR_CORRUPT)
                fail_msg("%s: status %d", cases[i].name, (int)status);
            expect_error_text(s.cache, cases[i].text, cases[i].name);
            assert_true(file_hash(&s, victim) == before);
        } else {
            expect_ok(s.cache, status);
            bytes_free(&file);
            file = saved(s.cache, victim, KVT_CODEC_RAW);
            assert_int_equal(file.n, good.n);
            assert_memory_equal(file.data, good.data, good.n);
        }
        bytes_free(&file);
        bytes_free(&good);
        kvt_seq_destroy(victim);
        close_subject(&s);
    }
}

/* A checkpoint that has another sink, and none of the rows behind it: sealed, and open. */
static void other_sinks(void **state)
{
    (void)state;
    for (int open = 0; open < 2; open++) {
        rng r = {27};
        kvt_seq *victim;
        uint64_t before;
        bytes file;
        subject s;
        make(&s, 20, 4, open ? KVT_TYPE_I8 : KVT_TYPE_F16, open ? 128 : 0, &r);
        file = releasing_file(&s);
        relay(&file, 0);
        assert_int_equal(get32(payload(&file, 3, 0) + 32 * word(&file, 0, 1) + 28), open);
        behind_a_sink(&file);
        settle(&file);
        victim = seq_of(&s);
        grow(&s, victim, 80);
        checkpoint(&s, victim);
        before = file_hash(&s, victim);
        expect(s.cache, KVT_ERR_CORRUPT, load_bytes(victim, file.data, file.n, NULL));
        expect_error_text(s.cache, open ? "a row without a block" : "cannot have changed", "sinks");
        assert_true(file_hash(&s, victim) == before);
        bytes_free(&file);
        kvt_seq_destroy(victim);
        close_subject(&s);
    }
}

/* Rows that a window may have released, and may not: behind an open one, the last, among others. */
static void own_rows(void **state)
{
    static const struct {
        unsigned drop[2]; /* blocks: row 2 r of the first group is 2 r; 99: none */
        uint32_t residual;
        int sound;
    } cases[] = {
        {{99, 99}, KVT_RESIDUAL_NONE, 1}, {{2, 99}, KVT_RESIDUAL_NONE, 1},
        {{4, 2}, KVT_RESIDUAL_NONE, 0},   {{4, 99}, KVT_RESIDUAL_NONE, 0},
        {{0, 99}, KVT_RESIDUAL_NONE, 0},  {{3, 99}, KVT_RESIDUAL_NONE, 0},
        {{8, 99}, KVT_RESIDUAL_NONE, 0},  {{2, 99}, 1000, 0},
        {{9, 99}, KVT_RESIDUAL_NONE, 0}, /* the last one of all */
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rng r = {25};
        kvt_seq *seq;
        bytes file;
        kvt_status status;
        subject s;
        make(&s, 120, 0, KVT_TYPE_I8, cases[i].residual, &r);
        seq = seq_of(&s);
        grow(&s, seq, 300);
        if (cases[i].residual != 1000)
            grow(&s, seq, 1);
        file = saved(s.cache, seq, KVT_CODEC_RAW);
        assert_int_equal(get64(file.data + 48), 10); /* nothing is released yet */
        relay(&file, 0);
        for (int d = 0; d < 2; d++)
            if (cases[i].drop[d] != 99)
                drop_block(&file, cases[i].drop[d]);
        settle(&file);
        status = load_bytes(seq, file.data, file.n, NULL);
        if (status != (cases[i].sound ? KVT_OK : KVT_ERR_CORRUPT))
            fail_msg("case %zu: status %d", i, (int)status);
        if (!cases[i].sound)
            expect_error_text(s.cache, "missing", "rows");
        grow(&s, seq, 100);
        bytes_free(&file);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/*
 * What a query sees that stands behind the highest position of all has to be there, and the rows of
 * the sinks count with those that are released: as docs/format.md has it.
 */
static void window_positions(void **state)
{
    static const struct {
        size_t token;
        int32_t position;
        int sound;
        size_t other; /* token, where not 0, */
        int32_t high; /* and its position */
    } cases[] = {
        {599, 0, 1, 0, 0},     {599, 5, 1, 0, 0},     {0, 599, 0, 0, 0},       {0, 575, 1, 0, 0},
        {0, 580, 1, 0, 0},     {0, 581, 0, 0, 0},     {100, 581, 0, 0, 0},     {550, 650, 1, 0, 0},
        {0, 630, 1, 550, 649}, {0, 631, 0, 550, 649}, {0, INT32_MAX, 0, 0, 0},
    };
    rng r = {29};
    kvt_seq *seq, *victim;
    subject s;
    bytes good;
    (void)state;
    make(&s, 20, 3, KVT_TYPE_F16, 0, &r);
    seq = seq_of(&s);
    victim = seq_of(&s);
    grow(&s, seq, 600);
    good = saved(s.cache, seq, KVT_CODEC_RAW);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bytes file = saved(s.cache, seq, KVT_CODEC_RAW);
        put32(payload(&file, 2, 0) + 40 + 4 * cases[i].token, (uint32_t)cases[i].position);
        if (cases[i].other)
            put32(payload(&file, 2, 0) + 40 + 4 * cases[i].other, (uint32_t)cases[i].high);
        resign(file.data, file.n);
        if (cases[i].sound) {
            expect_ok(s.cache, load_bytes(victim, file.data, file.n, NULL));
        } else {
            expect(s.cache, KVT_ERR_CORRUPT, load_bytes(victim, file.data, file.n, NULL));
            expect_error_text(s.cache, "blocks that a window needs are missing", "positions");
        }
        bytes_free(&file);
    }
    expect_ok(s.cache, load_bytes(victim, good.data, good.n, NULL));
    bytes_free(&good);
    kvt_seq_destroy(victim);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

static void windows_have_to_be_the_same(void **state)
{
    static const char *const texts[] = {
        "window_tokens of group 0 is 20, the cache's is 21",
        "sink_tokens of group 0 is 0, the cache's is 4",
        "window_tokens of group 0 is 20, the cache's is 0",
    };
    rng r = {22};
    subject s;
    bytes file;
    (void)state;
    make(&s, 20, 0, KVT_TYPE_I8, 0, &r);
    file = whole_file(&s, KVT_CODEC_ZSTD);
    for (int i = 0; i < 3; i++) {
        kvt_seq *victim;
        uint64_t before;
        kvt_cache_destroy(s.cache);
        s.groups[0].window_tokens = i == 0 ? 21 : i == 1 ? 20 : 0;
        s.groups[0].sink_tokens = i == 1 ? 4 : 0;
        open_cache(&s, NULL);
        victim = victim_of(&s);
        before = file_hash(&s, victim);
        expect(s.cache, KVT_ERR_MISMATCH, load_bytes(victim, file.data, file.n, NULL));
        expect_error_text(s.cache, texts[i], "window");
        assert_true(file_hash(&s, victim) == before);
        kvt_seq_destroy(victim);
    }
    bytes_free(&file);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_byte),
        cmocka_unit_test(signed_sections),
        cmocka_unit_test(contradictions),
        cmocka_unit_test(other_checkpoints),
        cmocka_unit_test(other_sinks),
        cmocka_unit_test(reopened_rows),
        cmocka_unit_test(open_again_behind_open),
        cmocka_unit_test(own_rows),
        cmocka_unit_test(window_positions),
        cmocka_unit_test(windows_have_to_be_the_same),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
