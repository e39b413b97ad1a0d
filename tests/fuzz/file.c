/*
 * A snapshot as a list of sections, and back into bytes with all checksums, digests, ids, sizes,
 * index and end, so that a change reaches what lies behind them.
 */
#include "file.h"

#include <xxhash.h>
#include <zstd.h>

static const kvt_snap_context no_cache;

static void *take(size_t n)
{
    void *p = calloc(1, n + !n);
    CHECK(p);
    return p;
}

static void *copy_of(const void *data, size_t n)
{
    void *p = take(n);
    if (n)
        memcpy(p, data, n);
    return p;
}

static void put_digest(unsigned char *to, const void *data, size_t n)
{
    XXH128_canonical_t id;
    XXH128_canonicalFromHash(&id, XXH3_128bits(data, n));
    memcpy(to, &id, 16);
}

int file_read(file *f, const unsigned char *data, size_t n)
{
    size_t at;
    memset(f, 0, sizeof *f);
    if (n < 80 || memcmp(data, KVT_SNAP_MAGIC, 8) != 0)
        return 0;
    at = load32(data + 12);
    if (at < 72 || at > n || at > KVT_SNAP_HEADER_MAX)
        return 0;
    f->header = copy_of(data, at);
    f->n_header = at;
    while (n - at >= 32 && f->n_sections < FILE_SECTIONS - 16) {
        section *s = &f->sections[f->n_sections];
        uint64_t size = load64(data + at + 8);
        if (size > n - at - 32)
            break;
        s->type = load32(data + at);
        s->flags = load32(data + at + 4);
        s->value = load64(data + at + 16);
        s->n = (size_t)size;
        s->data = copy_of(data + at + 32, s->n);
        at += 32 + s->n;
        f->n_sections++;
    }
    f->n_tail = n - at;
    f->tail = copy_of(data + at, f->n_tail);
    return 1;
}

void file_free(file *f)
{
    free(f->header);
    free(f->tail);
    free(f->ids);
    for (size_t i = 0; i < f->n_sections; i++)
        free(f->sections[i].data);
    memset(f, 0, sizeof *f);
}

void section_resize(section *s, size_t n)
{
    unsigned char *data = take(n);
    memcpy(data, s->data, n < s->n ? n : s->n);
    free(s->data);
    s->data = data;
    s->n = n;
}

int file_insert(file *f, size_t at, uint32_t type, uint32_t flags, uint64_t value, const void *data,
                size_t n)
{
    section s = {type, flags, value, NULL, n};
    if (f->n_sections >= FILE_SECTIONS || at > f->n_sections)
        return 0;
    s.data = data ? copy_of(data, n) : take(n);
    memmove(&f->sections[at + 1], &f->sections[at], (f->n_sections - at) * sizeof s);
    f->sections[at] = s;
    f->n_sections++;
    return 1;
}

void file_remove(file *f, size_t at)
{
    free(f->sections[at].data);
    f->n_sections--;
    memmove(&f->sections[at], &f->sections[at + 1], (f->n_sections - at) * sizeof f->sections[0]);
}

/* ---- geometry ---- */

int file_header(const file *f, kvt_snap_header *header)
{
    unsigned char *copy = copy_of(f->header, f->n_header);
    size_t bytes = 0;
    int sound;
    store64(copy + f->n_header - 8, XXH64(copy, f->n_header - 8, 0));
    sound = kvt_snap_header_begin(&no_cache, "", copy, header, &bytes) == KVT_OK &&
            bytes == f->n_header &&
            kvt_snap_header_get(&no_cache, "", copy, bytes, header) == KVT_OK;
    if (!sound && bytes == f->n_header) { /* the groups may be sound, whatever else is not */
        const unsigned char *p = copy + 64;
        sound = header->n_groups >= 1 && header->n_groups <= KVT_MAX_GROUPS &&
                64 + 48 * (size_t)header->n_groups <= bytes;
        for (uint32_t g = 0; sound && g < header->n_groups; g++, p += 48) {
            kvt_snapshot_group *group = &header->groups[g];
            sound = load32(p + 20) <= 4 && load32(p + 24) <= 4;
            if (!sound)
                break;
            group->n_layers = load32(p);
            group->n_q_heads = load32(p + 4);
            group->n_kv_heads = load32(p + 8);
            group->k_dim = load32(p + 12);
            group->v_dim = load32(p + 16);
            group->k_type = (kvt_type)load32(p + 20);
            group->v_type = (kvt_type)load32(p + 24);
            group->flags = load32(p + 28);
            group->window_tokens = load32(p + 40);
            group->sink_tokens = load32(p + 44);
            sound = !kvt_snap_group_fault(group);
        }
    }
    free(copy);
    for (uint32_t g = 0; sound && g < header->n_groups; g++) {
        const kvt_snapshot_group *group = &header->groups[g];
        sound =
            (size_t)group->n_layers * group->n_kv_heads * (group->k_dim + group->v_dim) <= 1 << 14;
    }
    return sound;
}

uint32_t block_shapes(const kvt_snap_header *header, const section *block, kvt_snap_shape *shapes,
                      size_t *bytes)
{
    uint32_t group, tokens, form;
    if (block->n < 16)
        return 0;
    group = load32(block->data);
    tokens = load32(block->data + 8);
    form = load32(block->data + 12);
    if (group >= header->n_groups || tokens < 1 || tokens > 64 || form > 3 ||
        !kvt_snap_has_form(&header->groups[group], form))
        return 0;
    return kvt_snap_shapes(&header->groups[group], form, tokens, shapes, bytes);
}

int tokens_shape(const section *s, kvt_snap_shape *shape)
{
    memset(shape, 0, sizeof *shape);
    if ((s->type != 1 && s->type != 2 && s->type != 10) || s->n < 40)
        return 0;
    shape->kind = s->type == 10 ? 7 : s->type;
    shape->element = 4;
    shape->bits = 32;
    shape->heads = shape->dims = 1;
    shape->bytes = load32(s->data + 16);
    shape->tokens = (uint32_t)(shape->bytes / 4);
    return shape->bytes && shape->bytes % 4 == 0 && shape->bytes <= 1 << 16;
}

/* ---- stream sets ---- */

unsigned char *set_native(const section *s, const kvt_snap_shape *shapes, uint32_t n, size_t bytes)
{
    size_t table = 8 + 24 * (size_t)n + 8, at = table, to = 0;
    unsigned char *native;
    kvt_snap_codec codec;
    int sound = 1;

    if (s->n < table || load32(s->data) != n)
        return NULL;
    native = take(bytes);
    kvt_snap_codec_init(&codec, &no_cache);
    for (uint32_t i = 0; sound && i < n; i++) {
        const unsigned char *entry = s->data + 8 + 24 * i;
        kvt_snap_stream stream;
        memset(&stream, 0, sizeof stream);
        stream.kind = entry[0] | (uint32_t)entry[1] << 8;
        stream.filter = entry[2];
        stream.codec = entry[3];
        stream.stored_bytes = load32(entry + 4);
        stream.native_bytes = load32(entry + 8);
        sound = stream.kind == shapes[i].kind && stream.native_bytes == shapes[i].bytes &&
                stream.codec <= 1 && kvt_snap_filter_known(&shapes[i], stream.filter) &&
                stream.stored_bytes <= s->n - at &&
                (stream.codec ? stream.stored_bytes < stream.native_bytes
                              : stream.stored_bytes == stream.native_bytes) &&
                kvt_snap_decode(&codec, &shapes[i], &stream, s->data + at, native + to) == KVT_OK;
        at += stream.stored_bytes;
        to += shapes[i].bytes;
    }
    kvt_snap_codec_release(&codec);
    if (!sound) {
        free(native);
        native = NULL;
    }
    return native;
}

/* Compressed: as one frame, or as two. */
static size_t compress_parts(unsigned char *to, size_t room, const unsigned char *from, size_t n,
                             uint32_t how)
{
    size_t first = how & 1 ? n / 3 : 0, a = 0, b;
    int level = (int)(how >> 1 & 3) * 3 + 1;
    if (first) {
        a = ZSTD_compress(to, room, from, first, level);
        if (ZSTD_isError(a))
            return 0;
    }
    b = ZSTD_compress(to + a, room - a, from + first, n - first, level);
    return ZSTD_isError(b) ? 0 : a + b;
}

void set_code(section *s, const kvt_snap_shape *shapes, uint32_t n, const unsigned char *native,
              uint32_t how)
{
    size_t bytes = 0, at = 8 + 24 * (size_t)n + 8;
    unsigned char *set, *attempt;
    for (uint32_t i = 0; i < n; i++)
        bytes += shapes[i].bytes;
    set = take(at + bytes + 8);
    attempt = take(ZSTD_compressBound(bytes) + 64);
    store32(set, n);
    for (uint32_t i = 0; i < n; i++, how = how >> 5 | how << 27) {
        kvt_snap_codec codec;
        kvt_snap_stream stream;
        size_t stored = shapes[i].bytes;
        memset(&stream, 0, sizeof stream);
        stream.kind = shapes[i].kind;
        stream.native_bytes = (uint32_t)stored;
        memcpy(set + at, native, stored);
        if (how & 1) { /* the library's choice of a filter */
            kvt_snap_codec_init(&codec, &no_cache);
            codec.level = 1;
            if (kvt_snap_encode(&codec, &shapes[i], native, set + at, &stream) == KVT_OK)
                stored = stream.stored_bytes;
            kvt_snap_codec_release(&codec);
        } else if (how & 2) {
            size_t made =
                compress_parts(attempt, ZSTD_compressBound(bytes) + 64, native, stored, how >> 2);
            if (made && made < stored) {
                memcpy(set + at, attempt, made);
                stored = made;
                stream.codec = 1;
            }
        }
        set[8 + 24 * i] = (unsigned char)stream.kind;
        set[8 + 24 * i + 2] = (unsigned char)stream.filter;
        set[8 + 24 * i + 3] = (unsigned char)stream.codec;
        store32(set + 8 + 24 * i + 4, (uint32_t)stored);
        store32(set + 8 + 24 * i + 8, stream.native_bytes);
        at += stored;
        native += shapes[i].bytes;
    }
    free(attempt);
    free(s->data);
    s->data = set;
    s->n = (at + 7) / 8 * 8;
}

/* The checksums of a set, as far as it is one. */
static void sum_set(section *s)
{
    size_t n = s->n >= 16 ? load32(s->data) : 0, at = 8 + 24 * n + 8;
    if (s->n < 16 || n > 8 || at > s->n)
        return;
    for (size_t i = 0; i < n; i++) {
        unsigned char *entry = s->data + 8 + 24 * i;
        size_t stored = load32(entry + 4);
        if (stored > s->n - at)
            break;
        store64(entry + 16, XXH64(s->data + at, stored, 0));
        at += stored;
    }
    store64(s->data + 8 + 24 * n, XXH64(s->data, 8 + 24 * n, 0));
}

/* ---- writing ---- */

typedef struct writing {
    file *f;
    unsigned mend;
    unsigned char *to;
    size_t n, room;
    kvt_snap_header header;
    int sound; /* the header is */
    kvt_group groups[KVT_MAX_GROUPS];
    unsigned char *index;
    size_t n_index; /* bytes */
    const section *table, *block;
    size_t next_entry; /* of the table: the next block in this file */
    unsigned char digests[1024][16];
    size_t n_digests;
    int lost; /* a digest cannot be computed: those of the file are left */
} writing;

static void put_bytes(writing *w, const void *data, size_t n)
{
    if (n <= w->room - w->n && w->room)
        memcpy(w->to + w->n, data, n);
    else
        w->room = 0;
    w->n += n;
}

static void digest_layers(writing *w, const section *s)
{
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    size_t bytes, image;
    uint32_t n = w->block && w->sound ? block_shapes(&w->header, w->block, shapes, &bytes) : 0;
    uint32_t group, form;
    unsigned char *native, *made;
    if (!n) {
        w->lost = 1;
        return;
    }
    group = load32(w->block->data);
    form = load32(w->block->data + 12);
    image = w->groups[group].layouts[form].layer_bytes;
    if (s->type == 13) {
        for (size_t at = (size_t)s->value; at <= s->n && image <= s->n - at && w->n_digests < 1024;
             at += image)
            put_digest(w->digests[w->n_digests++], s->data + at, image);
        return;
    }
    native = set_native(s, shapes, n, bytes);
    if (!native || w->n_digests == 1024) {
        w->lost = 1;
        free(native);
        return;
    }
    made = take(image);
    kvt_snap_scatter(&w->groups[group], form, load32(w->block->data + 8), native, made);
    put_digest(w->digests[w->n_digests++], made, image);
    free(made);
    free(native);
}

static void sign_digests(writing *w, section *s)
{
    unsigned char named[8 + 16 * 1024];
    file *f = w->f;
    if (s->n < 24 || w->lost || !w->n_digests || !w->block)
        return;
    f->ids = realloc(f->ids, (f->n_ids + 1) * sizeof *f->ids);
    CHECK(f->ids);
    memcpy(f->ids[f->n_ids][0], s->data, 16);
    if (w->mend & MEND_COUNTS && s->n != 24 + 16 * w->n_digests)
        section_resize(s, 24 + 16 * w->n_digests);
    if (s->n >= 24 + 16 * w->n_digests)
        memcpy(s->data + 16, w->digests, 16 * w->n_digests);
    memcpy(named, w->block->data + 8, 8);
    memcpy(named + 8, s->data + 16, s->n - 24 <= 16 * 1024 ? s->n - 24 : 0);
    put_digest(s->data, named, 8 + (s->n - 24 <= 16 * 1024 ? s->n - 24 : 0));
    memcpy(f->ids[f->n_ids++][1], s->data, 16);
}

/* The block's own fields: those of its entry. */
static void follow_table(writing *w, section *s)
{
    const section *t = w->table;
    if (!t || s->n < 40)
        return;
    while (32 * (w->next_entry + 1) + 8 <= t->n && t->data[32 * w->next_entry + 30])
        w->next_entry++;
    if (32 * (w->next_entry + 1) + 8 <= t->n) {
        const unsigned char *entry = t->data + 32 * w->next_entry;
        memcpy(s->data, entry + 16, 12);
        store32(s->data + 12, entry[28]);
        if (w->sound && load32(s->data) < w->header.n_groups)
            store32(s->data + 16, w->header.groups[load32(s->data)].n_layers);
        s->value = w->next_entry++;
    }
}

static int is_indexed(uint32_t type)
{
    return (type >= 1 && type <= 4) || (type >= 8 && type <= 12) || type == 0 || type > 14;
}

static void note(writing *w, const section *s, size_t at)
{
    unsigned char *entry;
    kvt_snap_shape shape;
    if (s->type == 5 || s->type == 13 || s->type == 14) {
        if (w->n_index && load32(w->index + w->n_index - 48) == 4) {
            entry = w->index + w->n_index - 48;
            store64(entry + 24, load64(entry + 24) + 32 + s->n);
            if (s->type == 14 && s->n >= 16)
                memcpy(entry + 32, s->data, 16);
        }
        return;
    }
    if (!is_indexed(s->type))
        return;
    w->index = realloc(w->index, w->n_index + 48 + 8);
    CHECK(w->index);
    entry = w->index + w->n_index;
    memset(entry, 0, 48);
    store32(entry, s->type);
    if (s->type == 0 || s->type > 14)
        store32(entry + 4, s->flags);
    store64(entry + 8, s->value);
    store64(entry + 16, at);
    store64(entry + 24, 32 + s->n);
    if (tokens_shape(s, &shape)) {
        unsigned char *native = set_native(s, &shape, 1, shape.bytes);
        if (native)
            put_digest(entry + 32, native, shape.bytes);
        free(native);
    } else if (s->type != 4 && s->n >= 8) {
        put_digest(entry + 32, s->data, s->n - 8);
    }
    w->n_index += 48;
}

static void finish_end(writing *w, section *s, size_t index_at)
{
    unsigned char *named;
    size_t n = w->f->n_header;
    if (s->n < 48)
        return;
    if (w->mend & MEND_PLACES) {
        store64(s->data, index_at);
        store64(s->data + 8, w->n + 32 + s->n);
        memcpy(s->data + s->n - 8, KVT_SNAP_FOOTER, 8);
    }
    if (w->mend & MEND_DIGESTS) {
        named = take(n + w->n_index);
        memcpy(named, w->f->header, n);
        for (size_t i = 0; i + 48 <= w->n_index; i += 48, n += 28) {
            memcpy(named + n, w->index + i, 4);
            memcpy(named + n + 4, w->index + i + 8, 8);
            memcpy(named + n + 12, w->index + i + 32, 16);
        }
        put_digest(s->data + 16, named, n);
        free(named);
    }
    memcpy(w->f->id, s->data + 16, 16);
    store64(s->data + 32, XXH64(s->data, 32, 0));
}

static void mend_section(writing *w, section *s, size_t index_at)
{
    if (s->type == 4) {
        if (w->mend & MEND_COUNTS)
            follow_table(w, s);
        w->block = s;
        w->n_digests = 0;
        w->lost = 0;
    }
    if (s->type == 13 && w->mend & MEND_PLACES && s->value <= s->n) {
        size_t padding = (64 - (w->n + 32) % 64) % 64, images = s->n - (size_t)s->value;
        unsigned char *data = take(padding + images);
        memcpy(data + padding, s->data + s->value, images);
        free(s->data);
        s->data = data;
        s->n = padding + images;
        s->value = padding;
    }
    if (s->type == 6 && w->mend & MEND_PLACES && w->index) {
        section_resize(s, w->n_index + 8);
        memcpy(s->data, w->index, w->n_index);
    }
    if (w->mend & MEND_DIGESTS) {
        if (s->type == 5 || s->type == 13)
            digest_layers(w, s);
        if (s->type == 14)
            sign_digests(w, s);
    }
    if (s->type == 7)
        finish_end(w, s, index_at);
    else if (s->type == 1 || s->type == 2 || s->type == 5 || s->type == 10)
        sum_set(s);
    else if (s->type != 13 && s->n >= 8)
        store64(s->data + s->n - 8, XXH64(s->data, s->n - 8, 0));
}

static void mend_header(writing *w)
{
    file *f = w->f;
    if (!(w->mend & MEND_SUMS))
        return;
    if (w->mend & MEND_COUNTS) {
        size_t size;
        for (size_t i = 0; i < f->n_sections; i++)
            if (f->sections[i].type == 3) {
                w->table = &f->sections[i];
                store64(f->header + 48, w->table->n >= 8 ? (w->table->n - 8) / 32 : 0);
                break;
            }
        if (w->sound) {
            w->header.n_layers = load32(f->header + 36);
            size = kvt_snap_layer_bytes(&w->header);
            store64(f->header + 56, size);
        }
        store32(f->header + 12, (uint32_t)f->n_header);
    }
    store64(f->header + f->n_header - 8, XXH64(f->header, f->n_header - 8, 0));
}

size_t file_write(file *f, unsigned mend, unsigned char *to, size_t room)
{
    static writing w;
    size_t index_at = 0;

    memset(&w, 0, sizeof w);
    w.f = f;
    w.mend = mend;
    w.to = to;
    w.room = room;
    w.sound = file_header(f, &w.header);
    for (uint32_t g = 0; w.sound && g < w.header.n_groups; g++)
        kvt_snap_group_make(&w.header.groups[g], &w.groups[g]);
    free(f->ids);
    f->ids = NULL;
    f->n_ids = 0;
    mend_header(&w);
    put_bytes(&w, f->header, f->n_header);
    for (size_t i = 0; i < f->n_sections; i++) {
        section *s = &f->sections[i];
        unsigned char head[32];
        if (s->type == 6)
            index_at = w.n;
        if (mend & MEND_SUMS)
            mend_section(&w, s, index_at);
        note(&w, s, w.n);
        store32(head, s->type);
        store32(head + 4, s->flags);
        store64(head + 8, s->n);
        store64(head + 16, s->value);
        store64(head + 24, XXH64(head, 24, 0));
        put_bytes(&w, head, 32);
        put_bytes(&w, s->data, s->n);
    }
    put_bytes(&w, f->tail, f->n_tail);
    free(w.index);
    return w.room ? w.n : 0;
}

void file_adopt(file *f, const file *parent, unsigned number)
{
    for (size_t i = 0; i < f->n_sections; i++) {
        section *s = &f->sections[i];
        if (s->type == 11 && s->n >= 48 && number) {
            memcpy(s->data, parent->id, 16);
            /* The name that the file gets. */
            if (load32(s->data + 28) == 6)
                s->data[33] = (unsigned char)('0' + number);
        }
        if (s->type != 3)
            continue;
        for (size_t at = 0; at + 40 <= s->n; at += 32)
            for (size_t j = 0; s->data[at + 30] && j < parent->n_ids; j++)
                if (memcmp(s->data + at, parent->ids[j][0], 16) == 0) {
                    memcpy(s->data + at, parent->ids[j][1], 16);
                    break;
                }
    }
}
