/*
 * The snapshot format, written down a second time, as far as the tests change files: the checksums,
 * digests and ids of a changed file, and the two forms of a block. See docs/format.md.
 */
#include "snapshot_support.h"

#include <xxhash.h>

enum { HEAD = 32, ENTRY = 48 };

void put32(unsigned char *p, uint32_t x)
{
    for (int i = 0; i < 4; i++)
        p[i] = (unsigned char)(x >> 8 * i);
}

void put64(unsigned char *p, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        p[i] = (unsigned char)(x >> 8 * i);
}

uint32_t get32(const unsigned char *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

uint64_t get64(const unsigned char *p)
{
    return get32(p) | (uint64_t)get32(p + 4) << 32;
}

static size_t up(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

static void put128(unsigned char *p, const void *data, size_t n)
{
    XXH128_canonical_t id;
    XXH128_canonicalFromHash(&id, XXH3_128bits(data, n));
    memcpy(p, &id, 16);
}

size_t section_payload(const unsigned char *data, size_t n, uint32_t type, unsigned i,
                       size_t *payload)
{
    size_t at = get32(data + 12);
    while (at + HEAD <= n) {
        size_t size = (size_t)get64(data + at + 8);
        if (get32(data + at) == type && i-- == 0) {
            *payload = size;
            return at + HEAD;
        }
        at += HEAD + size;
    }
    fail_msg("no such section");
    return 0;
}

/* ---- images and streams ---- */

/* A part of a head's record, and where it is in the streams. */
typedef struct part {
    unsigned kind;
    size_t begin, head; /* in the stream: of the first head, and from head to head */
    size_t rows, row;   /* in the stream: rows, and bytes of one */
    size_t at;          /* in the record */
    size_t wide;        /* in the record: bytes of a row, the others are 0 */
} part;

typedef struct layout {
    part parts[8];
    size_t n_parts, heads;
    size_t record;    /* bytes */
    size_t native[6]; /* native sizes of the streams, by kind */
} layout;

enum { F32, F16, I8, I4, I5, N_TYPES };

static void add_part(layout *l, unsigned kind, size_t begin, size_t rows, size_t row, size_t all,
                     size_t wide)
{
    part p = {kind, begin, rows * row, rows, row, l->record, wide};
    l->parts[l->n_parts++] = p;
    l->record += all * wide;
}

/* A part of kind 5: `count` numbers of a head, in `room` bytes of the record. */
static void add_numbers(layout *l, size_t count, size_t room, int there)
{
    if (there) {
        add_part(l, 5, l->native[5], 1, 2 * count, 1, room);
        l->native[5] += 2 * count * l->heads;
    }
}

/* Of a block with n tokens in a representation; 0: there is none such. */
static int lay_out(layout *l, const unsigned char *group, size_t n, uint32_t form)
{
    static const unsigned k_bytes[] = {64, 32, 64, 64}, k_per[] = {1, 1, 4, 8};
    static const unsigned v_bytes[] = {4, 2, 4, 4, 4}, v_per[] = {1, 1, 4, 8, 8};
    uint32_t k_of = get32(group + 20), v_of = get32(group + 24), flags = get32(group + 28);
    size_t k_dim = get32(group + 12), v_dim = get32(group + 16);
    size_t k_wide = up(k_dim, 16), v_wide = up(v_dim, 16), tiles = (n + 15) / 16, runs, gains;
    const int open = form == 1 || form == 3, in_k = (flags & 4) != 0, coarse = k_of == I4;
    const int k_scales = k_of == I8 || coarse, offsets = coarse || (k_of == I8 && !(flags & 2));
    const int v_scales = v_of >= I8 && !in_k;
    uint32_t k, v;

    memset(l, 0, sizeof *l);
    if (form > 3 || k_of > I4 || v_of > I5 || n < 1 || n > 64)
        return 0;
    k = k_of < I8 ? k_of : open ? F16 : form == 2 ? I8 : k_of;
    v = v_of < I8 ? v_of : open ? F16 : form == 2 ? I8 : v_of;
    runs = (n + v_per[v] - 1) / v_per[v];
    l->heads = get32(group + 8);

    add_part(l, 3, 0, tiles, k_dim / k_per[k] * k_bytes[k], 4, k_wide / k_per[k] * k_bytes[k]);
    l->native[3] = l->heads * l->parts[0].head;
    /*
     * The stream's order of kind 5: K's scales, V's, offsets, the seed, gains. The places of the
     * gains are found when all else is.
     */
    add_numbers(l, k == I4 ? k_dim : n, k == I4 ? 2 * k_wide : 128, k_scales);
    gains = l->record = up(l->record, 64);
    if (k == I4)
        l->record += 64;
    l->native[5] += v_scales ? 2 * n * l->heads : 0; /* V's are a later part of the record */
    add_numbers(l, k_dim, 2 * k_wide, offsets);
    l->record = up(l->record, 64);
    if (form == 3) {
        size_t end = l->record + 2 * up(2 * k_wide, 64) + 64;
        add_numbers(l, k_dim, 2 * k_wide, 1);
        add_numbers(l, k_dim, 2 * k_wide, 1);
        gains = l->record;
        l->record = end;
    }
    if (k == I4 || (form == 3 && coarse)) {
        part p = {5, l->native[5], 2 * n, n, 2, gains, 1};
        l->parts[l->n_parts++] = p;
        l->native[5] += 2 * n * l->heads;
    }
    if (v_scales) {
        size_t begin = k_scales ? 2 * l->heads * (k == I4 ? k_dim : n) : 0;
        add_part(l, 5, begin, 1, 2 * n, 1, 128);
    }
    if (!in_k) {
        size_t head = runs * v_dim * v_bytes[v] + (v == I5 ? runs * v_wide : 0);
        add_part(l, 4, 0, runs, v_dim * v_bytes[v], 64 / v_per[v], v_wide * v_bytes[v]);
        l->parts[l->n_parts - 1].head = head;
        if (v == I5) {
            add_part(l, 4, runs * v_dim * 4, runs, v_wide, 8, v_wide);
            l->parts[l->n_parts - 1].head = head;
        }
        l->native[4] = l->heads * head;
    }
    return 1;
}

/* Between an image and the streams, one behind the other in the order of their kinds. */
static void copy_parts(const layout *l, unsigned char *image, unsigned char *streams, int to_image)
{
    for (size_t i = 0; i < l->n_parts; i++) {
        const part *p = &l->parts[i];
        size_t begin =
            p->begin + (p->kind > 3 ? l->native[3] : 0) + (p->kind > 4 ? l->native[4] : 0);
        size_t row = p->row < p->wide ? p->row : p->wide; /* a gain's high byte has no place */
        for (size_t h = 0; h < l->heads; h++)
            for (size_t r = 0; r < p->rows; r++) {
                unsigned char *a = image + h * l->record + p->at + r * p->wide;
                unsigned char *b = streams + begin + h * p->head + r * p->row;
                memcpy(to_image ? a : b, to_image ? b : a, row);
            }
    }
}

static void *zeros(size_t n)
{
    void *p = calloc(1, n + !n);
    assert_non_null(p);
    return p;
}

/* The image of a layer section's payload, or NULL where its streams are not native and raw. */
static unsigned char *image_of(const layout *l, const unsigned char *set, size_t size)
{
    size_t n = get32(set), at = 8, native = 0;
    unsigned char *image;

    if (n > 3 || size < 8 + 24 * n + 8)
        return NULL;
    for (size_t i = 0; i < n; i++, at += 24) {
        unsigned kind = set[at];
        if (kind < 3 || kind > 5 || set[at + 1] || set[at + 2] || set[at + 3] ||
            get32(set + at + 4) != l->native[kind])
            return NULL;
        native += l->native[kind];
    }
    if (native != l->native[3] + l->native[4] + l->native[5] || at + 8 + native > size)
        return NULL;
    image = zeros(l->heads * l->record);
    copy_parts(l, image, (unsigned char *)(uintptr_t)(set + at + 8), 1);
    return image;
}

static void append(bytes *to, const void *data, size_t n)
{
    kvt_writer writer = bytes_writer(to);
    assert_int_equal(writer.write(writer.user, data, n), 0);
}

static void append_section(bytes *to, uint32_t type, uint64_t value, const void *payload, size_t n)
{
    unsigned char head[HEAD] = {0};
    put32(head, type);
    put32(head + 4, 1);
    put64(head + 8, n);
    put64(head + 16, value);
    append(to, head, HEAD);
    append(to, payload, n);
}

/* A layer section of an image. */
static void append_layer(bytes *to, const layout *l, unsigned char *image, uint64_t place)
{
    size_t n = 0, all = l->native[3] + l->native[4] + l->native[5];
    unsigned char *set;

    for (unsigned kind = 3; kind <= 5; kind++)
        n += l->native[kind] != 0;
    set = zeros(up(8 + 24 * n + 8 + all, 8));
    put32(set, (uint32_t)n);
    n = 0;
    for (unsigned kind = 3; kind <= 5; kind++)
        if (l->native[kind]) {
            set[8 + 24 * n] = (unsigned char)kind;
            put32(set + 8 + 24 * n + 4, (uint32_t)l->native[kind]);
            put32(set + 8 + 24 * n++ + 8, (uint32_t)l->native[kind]);
        }
    copy_parts(l, image, set + 8 + 24 * n + 8, 0);
    append_section(to, 5, place, set, up(8 + 24 * n + 8 + all, 8));
    free(set);
}

void relay(bytes *f, int native)
{
    bytes to = {NULL, 0, 0, 0, -1, 0};
    unsigned char *images = NULL;
    size_t at = get32(f->data + 12), n_images = 0, size, value = 0;
    uint32_t n_layers = 0;
    layout l;

    append(&to, f->data, at);
    for (; at < f->n; at += HEAD + size) {
        const unsigned char *head = f->data + at, *payload = head + HEAD;
        const uint32_t type = get32(head);
        size = (size_t)get64(head + 8);
        switch (type) {
        case 4: {
            size_t start = to.n;
            n_layers = get32(payload + 16);
            assert_int_equal(lay_out(&l, f->data + 64 + 48 * (size_t)get32(payload),
                                     get32(payload + 8), get32(payload + 12)),
                             1);
            images = zeros(n_layers * l.heads * l.record);
            n_images = 0;
            append(&to, head, HEAD + size);
            put32(to.data + start + HEAD + 20, native != 0);
            break;
        }
        case 5: {
            unsigned char *image = image_of(&l, payload, size);
            assert_non_null(image);
            memcpy(images + n_images++ * l.heads * l.record, image, l.heads * l.record);
            free(image);
            break;
        }
        case 13:
            value = (size_t)get64(head + 16);
            assert_int_equal(size, value + n_layers * l.heads * l.record);
            memcpy(images, payload + value, size - value);
            break;
        case 14:
            if (native) {
                size_t padding = (64 - (to.n + HEAD) % 64) % 64,
                       all = l.heads * l.record * n_layers;
                unsigned char *section = zeros(padding + all);
                memcpy(section + padding, images, all);
                append_section(&to, 13, padding, section, padding + all);
                free(section);
            } else {
                for (uint32_t i = 0; i < n_layers; i++)
                    append_layer(&to, &l, images + i * l.heads * l.record, i);
            }
            free(images);
            append(&to, head, HEAD + size);
            break;
        default: append(&to, head, HEAD + size); break;
        }
    }
    bytes_free(f);
    *f = to;
    reindex(f);
}

/* ---- checksums, digests and ids ---- */

/* Streams and table of a stream set. Returns the offset of its first stream. */
static size_t sign_set(unsigned char *set)
{
    size_t n = get32(set), at = 8 + n * 24 + 8;
    for (size_t i = 0; i < n; i++) {
        unsigned char *entry = set + 8 + i * 24;
        put64(entry + 16, XXH64(set + at, get32(entry + 4), 0));
        at += get32(entry + 4);
    }
    put64(set + 8 + n * 24, XXH64(set, 8 + n * 24, 0));
    return 8 + n * 24 + 8;
}

static int is_indexed(uint32_t type)
{
    return (type >= 1 && type <= 4) || (type >= 8 && type <= 12) || type == 0 || type > 14;
}

static int is_stream_set(uint32_t type)
{
    return type == 1 || type == 2 || type == 5 || type == 10;
}

/* What is computed: checksums; the file's id and digests but of blocks and streams, too; all. */
typedef enum depth { SUMS, BUT_BLOCKS, ALL } depth;

/* The block whose sections are walked over: where its digests go is known at their section. */
typedef struct block_signer {
    const unsigned char *payload;
    layout l;
    int known; /* the layout is */
    unsigned char digests[16 * 1024];
    size_t n;
    int lost; /* a digest that cannot be computed here: those of the file are left */
} block_signer;

static void sign_layers(block_signer *b, const unsigned char *payload, size_t size, uint32_t type,
                        size_t value)
{
    size_t n_layers = get32(b->payload + 16);
    if (type == 13) {
        size_t image = value < size && n_layers ? (size - value) / n_layers : 0;
        b->lost |= !image || (size - value) % n_layers || n_layers > 1024;
        for (size_t i = 0; !b->lost && i < n_layers; i++)
            put128(b->digests + 16 * b->n++, payload + value + i * image, image);
    } else {
        unsigned char *image = b->known ? image_of(&b->l, payload, size) : NULL;
        b->lost |= !image || b->n >= 1024;
        if (!b->lost)
            put128(b->digests + 16 * b->n++, image, b->l.heads * b->l.record);
        free(image);
    }
}

static void sign_digests(block_signer *b, unsigned char *payload, size_t size)
{
    unsigned char *named;
    if (b->lost || size != 24 + 16 * b->n)
        return;
    memcpy(payload + 16, b->digests, 16 * b->n);
    named = zeros(8 + 16 * b->n);
    memcpy(named, b->payload + 8, 8); /* tokens, representation */
    memcpy(named + 8, b->digests, 16 * b->n);
    put128(payload, named, 8 + 16 * b->n);
    free(named);
}

/* The index' digests of sections other than blocks; those of blocks are in digests sections. */
static void sign_entry(unsigned char *digest, const unsigned char *payload, size_t size,
                       uint32_t type, depth what)
{
    if (type == 1 || type == 2 || type == 10) {
        if (what == ALL && get32(payload) == 1 && payload[10] == 0 && payload[11] == 0)
            put128(digest, payload + 40, get32(payload + 12));
    } else if (type != 4 && size >= 8) {
        put128(digest, payload, size - 8);
    }
}

static void sign(unsigned char *data, size_t n, depth what)
{
    size_t header = get32(data + 12), at = header, found, entry = 0, n_index = 0, size, room = 0;
    unsigned char *index = NULL, *named;
    block_signer *b = zeros(sizeof *b);

    put64(data + header - 8, XXH64(data, header - 8, 0));
    for (found = header; found + HEAD <= n; found += HEAD + (size_t)get64(data + found + 8))
        if (get32(data + found) == 6) { /* the last one is the index */
            index = data + found + HEAD;
            n_index = ((size_t)get64(data + found + 8) - 8) / ENTRY;
        }
    assert_non_null(index);
    named = zeros(header + 28 * n_index);
    for (; at < n; at += HEAD + size) {
        unsigned char *payload = data + at + HEAD;
        const uint32_t type = get32(data + at);

        size = (size_t)get64(data + at + 8);
        put64(data + at + 24, XXH64(data + at, 24, 0));
        if (is_stream_set(type)) {
            (void)sign_set(payload);
        } else if (type == 7) {
            memcpy(named, data, header);
            room = header;
            for (size_t i = 0; i < n_index; i++, room += 28) {
                memcpy(named + room, index + ENTRY * i, 4);
                memcpy(named + room + 4, index + ENTRY * i + 8, 8);
                memcpy(named + room + 12, index + ENTRY * i + 32, 16);
            }
            if (what != SUMS)
                put128(payload + 16, named, room);
            put64(payload + 32, XXH64(payload, 32, 0));
        }
        if (type == 4) {
            const uint32_t group = get32(payload);
            b->payload = payload;
            b->n = 0;
            b->lost = what != ALL;
            b->known = group < get32(data + 32) && lay_out(&b->l, data + 64 + 48 * (size_t)group,
                                                           get32(payload + 8), get32(payload + 12));
        } else if ((type == 5 || type == 13) && b->payload) {
            sign_layers(b, payload, size, type, (size_t)get64(data + at + 16));
        } else if (type == 14 && b->payload) {
            sign_digests(b, payload, size);
            if (what == ALL && entry && entry <= n_index)
                memcpy(index + ENTRY * (entry - 1) + 32, payload, 16);
        }
        if (size >= 8 && !is_stream_set(type) && type != 7 && type != 13)
            put64(payload + size - 8, XXH64(payload, size - 8, 0));
        if (is_indexed(type) && entry++ < n_index && what != SUMS)
            sign_entry(index + ENTRY * (entry - 1) + 32, payload, size, type, what);
    }
    free(named);
    free(b);
}

void resign(unsigned char *data, size_t n)
{
    sign(data, n, ALL);
}

void give_keys(bytes *f)
{
    if (!(f->data[44] & 2))
        return;
    f->data[44] &= (unsigned char)~2u;
    resign(f->data, f->n);
}

void resign_sums(unsigned char *data, size_t n)
{
    sign(data, n, BUT_BLOCKS);
}

void resum(unsigned char *data, size_t n)
{
    sign(data, n, SUMS);
}

void reindex(bytes *f)
{
    bytes index = {NULL, 0, 0, 0, -1, 0};
    unsigned char end[48] = {0}, *copy;
    size_t at = get32(f->data + 12), size, old;
    uint32_t type;

    for (; (type = get32(f->data + at)) != 6; at += size) {
        size = HEAD + (size_t)get64(f->data + at + 8);
        if (is_indexed(type)) {
            unsigned char entry[ENTRY] = {0};
            put32(entry, type);
            if (type == 0 || type > 14)
                memcpy(entry + 4, f->data + at + 4, 4);
            memcpy(entry + 8, f->data + at + 16, 8);
            put64(entry + 16, at);
            put64(entry + 24, size);
            append(&index, entry, ENTRY);
        } else if (type == 5 || type == 13 || type == 14) { /* its block's */
            unsigned char *block = index.data + index.n - ENTRY;
            put64(block + 24, get64(block + 24) + size);
            if (type == 14)
                memcpy(block + 32, f->data + at + HEAD, 16);
        }
    }
    /* Digests of streams that cannot be computed here are those of the file's index. */
    for (size_t i = 0; i < index.n; i += ENTRY)
        for (old = at + HEAD; old + ENTRY <= at + HEAD + (size_t)get64(f->data + at + 8);
             old += ENTRY)
            if (get32(index.data + i) != 4 && get32(index.data + i) == get32(f->data + old) &&
                get64(index.data + i + 8) == get64(f->data + old + 8))
                memcpy(index.data + i + 32, f->data + old + 32, 16);
    append(&index, end, 8);
    copy = zeros(index.n);
    memcpy(copy, index.data, index.n);
    f->n = at;
    append_section(f, 6, 0, copy, index.n);
    put64(end, at);
    put64(end + 8, f->n + HEAD + 48);
    memcpy(end + 40, "KVTE\r\n\x1a\n", 8);
    append_section(f, 7, 0, end, 48);
    free(copy);
    bytes_free(&index);
    resign(f->data, f->n);
}

void replace_bytes(bytes *f, size_t at, size_t gone, const void *data, size_t n)
{
    unsigned char *joined = malloc(f->n - gone + n + 1);
    assert_non_null(joined);
    memcpy(joined, f->data, at);
    if (n)
        memcpy(joined + at, data, n);
    memcpy(joined + at + n, f->data + at + gone, f->n - at - gone);
    free(f->data);
    f->data = joined;
    f->n = f->room = f->n - gone + n;
}

void add_section(bytes *f, size_t at, uint32_t type, uint32_t flags, uint64_t value,
                 const void *payload, size_t n)
{
    unsigned char *section = zeros(HEAD + n + 8);
    put32(section, type);
    put32(section + 4, flags);
    put64(section + 8, n + 8);
    put64(section + 16, value);
    if (n)
        memcpy(section + HEAD, payload, n);
    replace_bytes(f, at, 0, section, HEAD + n + 8);
    free(section);
    reindex(f);
}

void claim_blocks(unsigned char *data, size_t n, uint64_t n_blocks)
{
    size_t header = get32(data + 12), size, payload = section_payload(data, n, 3, 0, &size);

    put64(data + 48, n_blocks);
    put64(data + header - 8, XXH64(data, header - 8, 0));
    put64(data + payload - 24, n_blocks * 32 + 8);
    put64(data + payload - 8, XXH64(data + payload - 32, 24, 0));
    put64(data + payload, XXH64(data, 0, 0));
}
