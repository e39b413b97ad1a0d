/*
 * libFuzzer's mutator and crossover for snapshots: a file of the input is taken apart, a part of it
 * is changed, and mostly all is mended that the change makes wrong, so that not a checksum but the
 * check that is meant for the change has to find it. Some are mended in part only.
 */
#include "file.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n_a, const uint8_t *b, size_t n_b,
                                 uint8_t *out, size_t room, unsigned seed);

static uint64_t state;

static uint32_t any(uint32_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below ? (uint32_t)(state * 2685821657736338717u >> 33) % below : 0;
}

static int one_in(uint32_t n)
{
    return any(n) == 0;
}

/* ---- numbers ---- */

static uint64_t number_near(uint64_t x)
{
    static const uint64_t edges[] = {0,
                                     1,
                                     2,
                                     3,
                                     7,
                                     8,
                                     16,
                                     63,
                                     64,
                                     65,
                                     127,
                                     128,
                                     255,
                                     256,
                                     257,
                                     1023,
                                     1024,
                                     16383,
                                     16384,
                                     16385,
                                     0x3FFFFFFF,
                                     0x40000000,
                                     0x7FFFFFFF,
                                     0x80000000,
                                     UINT32_MAX - 1,
                                     UINT32_MAX,
                                     (uint64_t)1 << 32,
                                     UINT64_MAX};
    switch (any(6)) {
    case 0: return x + 1;
    case 1: return x - 1;
    case 2: return x ^ (uint64_t)1 << any(64);
    case 3: return x + any(9) * 8 - 32;
    case 4: return edges[any(sizeof edges / sizeof *edges)];
    default: return x ^ (uint64_t)1 << any(8);
    }
}

/* A field of n bytes, as one of 1, 2, 4 or 8. */
static void change_field(unsigned char *p, size_t n)
{
    size_t at;
    if (n < 8) {
        if (n)
            p[any((uint32_t)n)] ^= (unsigned char)(1u << any(8));
        return;
    }
    at = any((uint32_t)(n / 4)) * 4;
    if (at + 8 <= n && one_in(3))
        store64(p + at, number_near(load64(p + at)));
    else if (one_in(8))
        p[at + any(4)] ^= (unsigned char)(1u << any(8));
    else
        store32(p + at, (uint32_t)number_near(load32(p + at)));
}

/* ---- changes of a file ---- */

static size_t pick(const file *f, uint32_t type)
{
    size_t found = f->n_sections, n = 0;
    for (size_t i = 0; i < f->n_sections; i++)
        if ((f->sections[i].type == type ||
             (type == 99 && f->sections[i].type != 6 && f->sections[i].type != 7)) &&
            one_in((uint32_t)++n))
            found = i;
    return found;
}

static void change_header(file *f)
{
    unsigned char *h = f->header;
    uint32_t n_groups = load32(h + 32);
    switch (any(4)) {
    case 0: change_field(h, 64 < f->n_header ? 64 : f->n_header); break;
    case 1: /* a group's */
        if (n_groups >= 1 && n_groups <= 8 && 64 + 48 * (size_t)n_groups <= f->n_header)
            change_field(h + 64 + 48 * any(n_groups), 48);
        break;
    case 2: store32(h + 44, load32(h + 44) ^ 1); break;
    default:
        if (f->n_header > 72)
            change_field(h + 64, f->n_header - 72);
        break;
    }
}

/* The native streams of a section, changed and coded anew. */
static void change_streams(file *f, size_t at)
{
    section *s = &f->sections[at];
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    kvt_snap_header header;
    size_t bytes = 0, block = at;
    uint32_t n = 1;
    unsigned char *native;

    if (s->type == 5) {
        while (block > 0 && f->sections[block].type != 4)
            block--;
        n = f->sections[block].type == 4 && file_header(f, &header)
                ? block_shapes(&header, &f->sections[block], shapes, &bytes)
                : 0;
    } else {
        n = tokens_shape(s, shapes) ? 1 : 0;
        bytes = shapes[0].bytes;
    }
    if (!n)
        return;
    native = set_native(s, shapes, n, bytes);
    if (!native)
        return;
    for (uint32_t changes = any(3); changes > 0 && bytes; changes--) {
        size_t begin = 0;
        uint32_t stream = any(n);
        for (uint32_t i = 0; i < stream; i++)
            begin += shapes[i].bytes;
        if (one_in(4))
            memset(native + begin, one_in(2) ? 0 : (int)any(256), shapes[stream].bytes);
        else if (one_in(2))
            change_field(native + begin, shapes[stream].bytes);
        else
            native[begin + any((uint32_t)shapes[stream].bytes)] = (unsigned char)any(256);
    }
    set_code(s, shapes, n, native, any(0x7FFFFFFF));
    free(native);
}

/* The table of a set, or its stored bytes. */
static void change_set(section *s)
{
    size_t n = s->n >= 16 ? load32(s->data) : 0;
    if (n < 1 || n > 3 || s->n < 16 + 24 * n)
        return;
    if (one_in(3)) {
        unsigned char *entry = s->data + 8 + 24 * any((uint32_t)n);
        entry[one_in(2) ? 2 : 3] = (unsigned char)any(5);
    } else if (one_in(2)) {
        change_field(s->data, 8 + 24 * n);
    } else if (s->n > 16 + 24 * n) {
        size_t at = 16 + 24 * n;
        unsigned char *bytes = s->data + at;
        bytes[any((uint32_t)(s->n - at))] ^= (unsigned char)(1u << any(8));
    }
}

/* A block's layers as images, or images as layers. */
static void change_layout(file *f, size_t at)
{
    static unsigned char images[1 << 18];
    kvt_snap_header header;
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    kvt_group group;
    size_t bytes, image, i;
    uint32_t n, form, tokens, n_layers;
    section *block = &f->sections[at];
    int native;

    if (!file_header(f, &header) || !(n = block_shapes(&header, block, shapes, &bytes)) ||
        block->n < 40 || at + 2 >= f->n_sections)
        return;
    kvt_snap_group_make(&header.groups[load32(block->data)], &group);
    form = load32(block->data + 12);
    tokens = load32(block->data + 8);
    n_layers = header.groups[load32(block->data)].n_layers;
    image = group.layouts[form].layer_bytes;
    if (image * n_layers + 64 > sizeof images)
        return;
    native = f->sections[at + 1].type == 13;
    store32(block->data + 20, !native);
    if (native) {
        section s = f->sections[at + 1];
        if (s.value > s.n || s.n - s.value < image * n_layers)
            return;
        memcpy(images, s.data + s.value, image * n_layers);
        file_remove(f, at + 1);
        for (i = 0; i < n_layers; i++) {
            unsigned char *streams = calloc(1, bytes + 1);
            CHECK(streams);
            kvt_snap_gather(&group, form, tokens, images + i * image, streams);
            if (file_insert(f, at + 1 + i, 5, 1, i, NULL, 0))
                set_code(&f->sections[at + 1 + i], shapes, n, streams, any(0x7FFFFFFF));
            free(streams);
        }
        return;
    }
    memset(images, 0, image * n_layers);
    for (i = 0; i < n_layers && at + 1 < f->n_sections && f->sections[at + 1].type == 5; i++) {
        unsigned char *streams = set_native(&f->sections[at + 1], shapes, n, bytes);
        if (streams)
            kvt_snap_scatter(&group, form, tokens, streams, images + i * image);
        free(streams);
        file_remove(f, at + 1);
    }
    (void)file_insert(f, at + 1, 13, 1, 0, images, image * n_layers);
}

/* The end of a block with all that belongs to it. */
static size_t block_end(const file *f, size_t at)
{
    size_t end = at + 1;
    if (f->sections[at].type == 4)
        while (end < f->n_sections && (f->sections[end].type == 5 || f->sections[end].type == 13 ||
                                       f->sections[end].type == 14))
            end++;
    return end;
}

/* Behind what it is copied from, where that is of the same file. */
static void insert_copy(file *f, size_t to, const file *from, size_t at)
{
    size_t end = block_end(from, at);
    for (size_t i = at; i < end && end - at < 40; i++, to++) {
        section s = from->sections[i];
        unsigned char *data = malloc(s.n + 1);
        CHECK(data);
        memcpy(data, s.data, s.n);
        (void)file_insert(f, to, s.type, s.flags, s.value, data, s.n);
        free(data);
    }
}

static void remove_section(file *f, size_t at)
{
    for (size_t n = one_in(4) ? 1 : block_end(f, at) - at; n > 0; n--)
        file_remove(f, at);
}

static void change_order(file *f)
{
    size_t a = pick(f, 99), b = pick(f, 99);
    section s;
    if (a == f->n_sections || b == f->n_sections)
        return;
    switch (any(4)) {
    case 0: remove_section(f, a); break;
    case 1:
        if (f->n_sections < FILE_SECTIONS - 64)
            insert_copy(f, block_end(f, a), f, a);
        break;
    case 2:
        s = f->sections[a];
        f->sections[a] = f->sections[b];
        f->sections[b] = s;
        break;
    default: { /* one that a reader does not know, or knows to be elsewhere */
        static const uint32_t types[] = {0, 15, 16, 255, 12, 8, 9, 11, 10, 1, 2, 3, 14, 13, 6, 7};
        unsigned char payload[64] = {0};
        payload[0] = (unsigned char)any(4);
        (void)file_insert(f, a, types[any(one_in(2) ? 4 : 16)], any(3) == 0, any(3), payload,
                          8 * any(9));
        break;
    }
    }
}

static void change_table(file *f)
{
    size_t at = pick(f, 3);
    section *s = &f->sections[at];
    size_t n = at < f->n_sections && s->n >= 8 ? (s->n - 8) / 32 : 0;
    unsigned char *entry, other[32];
    if (!n)
        return;
    entry = s->data + 32 * any((uint32_t)n);
    switch (any(6)) {
    case 0: entry[28] = (unsigned char)any(5); break;
    case 1: entry[30] ^= 1; break;
    case 2: store32(entry + 24, (uint32_t)number_near(load32(entry + 24))); break;
    case 3: store32(entry + 16 + 4 * any(2), any(4)); break;
    case 4: {
        unsigned char *with = s->data + 32 * any((uint32_t)n);
        memcpy(other, entry, 32);
        memcpy(entry, with, 32);
        memcpy(with, other, 32);
        break;
    }
    default: change_field(entry, 32); break;
    }
}

static void resize_payload(section *s)
{
    size_t at = any((uint32_t)(s->n / 4 + 1)) * 4, n = 8 * (1 + any(4));
    if (one_in(2) && s->n >= at + n) {
        memmove(s->data + at, s->data + at + n, s->n - at - n);
        s->n -= n;
    } else if (s->n < 100000) {
        size_t old = s->n;
        section_resize(s, old + n);
        memmove(s->data + at + n, s->data + at, old - at);
    }
}

/* A checkpoint's rows, or what it is of. */
static void change_checkpoint(file *f)
{
    size_t at = pick(f, 9), table = pick(f, 3), words;
    section *s = &f->sections[at];
    uint32_t n;
    unsigned char *word;
    if (at == f->n_sections || table == f->n_sections || s->n < 32)
        return;
    n = (uint32_t)(f->sections[table].n / 32);
    words = (s->n - 24) / 4;
    word = s->data + 16 + 4 * any((uint32_t)words);
    switch (any(6)) {
    case 0: store32(word, UINT32_MAX); break;
    case 1: s->value += any(2) ? any(70) : 0 - (uint64_t)any(70); break;
    case 2: store32(word, load32(word) ^ 1); break;
    case 3: /* another block that only checkpoints have */
        if (n && f->sections[table].n >= 40) {
            section *t = &f->sections[table];
            size_t from = 32 * any(n), last = t->n - 8;
            section_resize(t, t->n + 32);
            memmove(t->data + last, t->data + from, 32); /* of a table that is none they overlap */
            store32(word, n);
            for (size_t i = 0, blocks = 0; !t->data[from + 30] && i < f->n_sections; i++)
                if (f->sections[i].type == 4 && blocks++ == from / 32 &&
                    f->n_sections < FILE_SECTIONS - 64) {
                    size_t to = at;
                    while (to > 0 && f->sections[to - 1].type == 9)
                        to--;
                    insert_copy(f, to, f, i);
                    break;
                }
        }
        break;
    default: store32(word, any(n + 2)); break;
    }
}

/* What of the mending would undo nothing of the change. */
static unsigned change_file(file *f)
{
    size_t at = pick(f, 99);
    section *s = &f->sections[at];
    static const uint32_t small[] = {3, 8, 9, 11, 12, 4};
    if (at == f->n_sections)
        return MEND_ALL;
    switch (any(15)) {
    case 0: change_header(f); break;
    case 13: change_checkpoint(f); break;
    case 1: change_order(f); break;
    case 2: change_table(f); break;
    case 3: /* the head */
        if (one_in(2))
            s->value = number_near(s->value);
        else if (one_in(2))
            s->flags ^= 1u << any(3);
        else
            s->type = any(17);
        break;
    case 4:
    case 5: /* the sections that have no streams */
        at = pick(f, small[any(6)]);
        if (at < f->n_sections && f->sections[at].n >= 8)
            change_field(f->sections[at].data, f->sections[at].n - 8);
        break;
    case 6:
    case 7:
        at = pick(f, one_in(2) ? 5 : one_in(3) ? 10 : 1 + any(2));
        if (at < f->n_sections)
            change_streams(f, at);
        break;
    case 8:
        at = pick(f, one_in(2) ? 5 : 1 + any(2));
        if (at < f->n_sections)
            change_set(&f->sections[at]);
        break;
    case 9:
        at = pick(f, 13);
        if (at < f->n_sections && f->sections[at].n > f->sections[at].value) {
            s = &f->sections[at];
            for (uint32_t n = any(4); n > 0; n--)
                change_field(s->data + s->value, s->n - (size_t)s->value);
        }
        break;
    case 10:
        at = pick(f, 4);
        if (at < f->n_sections)
            change_layout(f, at);
        break;
    case 11: resize_payload(s); break;
    case 12: /* index and end: as they are, then */
        at = pick(f, 6 + any(2));
        if (at < f->n_sections) {
            s = &f->sections[at];
            if (one_in(6))
                resize_payload(s);
            else if (one_in(6))
                s->type = any(17);
            else
                change_field(s->data, s->n);
        }
        return one_in(2) ? MEND_SUMS : MEND_SUMS | MEND_COUNTS;
    default: /* in the bytes of one payload, as libFuzzer likes */
        if (s->n && s->n < 4096) {
            static unsigned char room[8192];
            size_t n;
            memcpy(room, s->data, s->n);
            n = LLVMFuzzerMutate(room, s->n, s->n + 64);
            section_resize(s, n);
            memcpy(s->data, room, n);
        }
        break;
    }
    return MEND_ALL;
}

/* ---- inputs ---- */

typedef struct parts {
    input in;
    file files[FUZZ_FILES];
    int sound[FUZZ_FILES];
} parts;

static void parts_open(parts *p, const uint8_t *data, size_t size)
{
    input_open(&p->in, data, size);
    for (size_t i = 0; i < p->in.n; i++)
        p->sound[i] = file_read(&p->files[i], p->in.files[i], p->in.bytes[i]);
}

static void parts_close(parts *p)
{
    for (size_t i = 0; i < p->in.n; i++)
        if (p->sound[i])
            file_free(&p->files[i]);
}

/* As an envelope, the parents first. The result is not in what the parts were made of. */
static size_t parts_write(parts *p, const unsigned *mend, uint8_t *out, size_t room)
{
    static unsigned char rooms[FUZZ_FILES][1 << 20];
    size_t sizes[FUZZ_FILES], at = FUZZ_HEAD + 4 * p->in.n;
    for (size_t i = p->in.n; i-- > 0;) {
        for (size_t j = i + 1; p->sound[i] && j < p->in.n; j++)
            if (p->sound[j])
                file_adopt(&p->files[i], &p->files[j], j == i + 1 ? (unsigned)j : 0);
        if (p->sound[i]) {
            sizes[i] = file_write(&p->files[i], mend[i], rooms[i], sizeof rooms[i]);
        } else {
            sizes[i] = p->in.bytes[i] < sizeof rooms[i] ? p->in.bytes[i] : sizeof rooms[i];
            memcpy(rooms[i], p->in.files[i], sizes[i]);
        }
        if (!sizes[i])
            return 0;
    }
    if (at > room)
        return 0;
    memset(out, 0, at);
    out[0] = 'F';
    out[1] = (unsigned char)p->in.n;
    memcpy(out + 2, p->in.controls, FUZZ_CONTROLS);
    for (size_t i = 0; i < p->in.n; i++) {
        store32(out + FUZZ_HEAD + 4 * i, (uint32_t)sizes[i]);
        if (sizes[i] > room - at)
            return 0;
        memcpy(out + at, rooms[i], sizes[i]);
        at += sizes[i];
    }
    return at;
}

static void change_controls(unsigned char *controls)
{
    unsigned char *c = &controls[any(FUZZ_CONTROLS)];
    if (one_in(3))
        *c = 0;
    else if (one_in(2))
        *c ^= (unsigned char)(1u << any(8));
    else
        *c = (unsigned char)any(one_in(2) ? 8 : 256);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed)
{
    static parts p;
    unsigned mend[FUZZ_FILES] = {MEND_ALL, MEND_ALL, MEND_ALL};
    size_t n = 0, i;

    state = seed * 6364136223846793005u + 1442695040888963407u;
    (void)any(1);
    if (one_in(40))
        return LLVMFuzzerMutate(data, size, room);
    parts_open(&p, data, size);
    if (one_in(5)) {
        change_controls(p.in.controls);
    } else {
        i = any((uint32_t)p.in.n);
        if (p.sound[i]) {
            uint32_t changes = 1 + (one_in(3) ? any(3) : 0);
            while (changes-- > 0)
                mend[i] &= change_file(&p.files[i]);
            if (one_in(12))
                mend[i] &= ~MEND_COUNTS;
            if (one_in(16))
                mend[i] &= ~(MEND_DIGESTS | MEND_PLACES);
            if (one_in(30) && p.files[i].n_sections) { /* cut, or gone on */
                section_resize(&p.files[i].sections[p.files[i].n_sections - 1], any(64));
                mend[i] = MEND_SUMS;
            }
        } else if (!one_in(4)) {
            static unsigned char bytes[1 << 20];
            if (p.in.bytes[i] && p.in.bytes[i] < sizeof bytes / 2) {
                memcpy(bytes, p.in.files[i], p.in.bytes[i]);
                p.in.bytes[i] = LLVMFuzzerMutate(bytes, p.in.bytes[i], p.in.bytes[i] + 64);
                p.in.files[i] = bytes;
            }
        }
    }
    n = parts_write(&p, mend, data, room);
    parts_close(&p);
    return n ? n : LLVMFuzzerMutate(data, size < room ? size : room, room);
}

size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n_a, const uint8_t *b, size_t n_b,
                                 uint8_t *out, size_t room, unsigned seed)
{
    static parts p, q;
    const unsigned mend[FUZZ_FILES] = {MEND_ALL, MEND_ALL, MEND_ALL};
    size_t n;

    state = seed * 6364136223846793005u + 1442695040888963407u;
    (void)any(1);
    parts_open(&p, a, n_a);
    parts_open(&q, b, n_b);
    if (one_in(3)) {
        for (size_t i = 0; i < FUZZ_CONTROLS; i++)
            if (one_in(2))
                p.in.controls[i] = q.in.controls[i];
    }
    if (one_in(6) && p.in.n < FUZZ_FILES) { /* another parent */
        p.in.files[p.in.n] = q.in.files[0];
        p.in.bytes[p.in.n] = q.in.bytes[0];
        p.sound[p.in.n] = file_read(&p.files[p.in.n], q.in.files[0], q.in.bytes[0]);
        p.in.n++;
    } else if (p.sound[0] && q.sound[0]) {
        file *f = &p.files[0];
        const file *from = &q.files[any((uint32_t)q.in.n)];
        if (from->n_sections && f->n_sections) {
            size_t at = any((uint32_t)from->n_sections), to = any((uint32_t)f->n_sections);
            for (size_t i = 0; i < f->n_sections && !one_in(4); i++) /* beside its like */
                if (f->sections[i].type == from->sections[at].type)
                    to = i;
            if (one_in(2) && f->n_sections < FILE_SECTIONS - 64) {
                insert_copy(f, to, from, at);
            } else {
                section *s = &f->sections[to];
                s->value = from->sections[at].value;
                s->n = 0;
                section_resize(s, from->sections[at].n);
                memcpy(s->data, from->sections[at].data, s->n);
            }
        }
    }
    n = parts_write(&p, mend, out, room);
    parts_close(&p);
    parts_close(&q);
    return n;
}
