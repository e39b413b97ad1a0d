/*
 * Read and verify a snapshot from a stream, for loading and for inspection.
 *
 * Forward only: sections have one order, and after each the reader knows which may follow. No
 * byte is used before its checksum, and no size is believed before it is held against what the
 * header's geometry makes of it and against the bytes that are left; buffers grow as the bytes
 * arrive. So a file that lies costs no more memory than a small multiple of its own size, but for
 * what a compressed layer of its geometry decodes to.
 *
 * What is remembered on the way: the block table (32 bytes a block), to hold each block's id
 * against, and the index as it has to be, to compare the stored one with at the end.
 */
#include "src/snapshot/format.h"

#include <stdarg.h>
#include <stdio.h>

#define STEP_BYTES ((size_t)1 << 20) /* first size of a buffer that grows with the data */
#define INDEX_BYTES ((size_t)4096)   /* first size of the index */

typedef struct section {
    uint32_t type, flags;
    uint64_t bytes; /* payload */
    uint64_t value;
    uint64_t offset; /* of the head */
} section;

typedef struct parser {
    const kvt_snap_context *context;
    const kvt_reader *reader;
    const kvt_snap_sink *sink;
    kvt_snap_header *header;
    uint64_t offset, remaining;
    uint64_t stored_bytes, native_bytes;
    char place[112]; /* what is being read, for the texts */
    kvt_snap_codec codec;
    kvt_snap_buffer payload, native, table, index, digests;
    size_t index_bytes;
} parser;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static kvt_status
corrupt(parser *p, const char *format, ...)
{
    char text[160];
    va_list arguments;

    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return kvt_snap_fail(p->context, KVT_ERR_CORRUPT, "snapshot damaged before offset %llu, %s: %s",
                         (unsigned long long)p->offset, p->place, text);
}

/* ---- bytes ---- */

static kvt_status read_bytes(parser *p, void *to, size_t bytes)
{
    unsigned char *at = to;

    while (bytes) {
        int64_t n = p->reader->read(p->reader->user, at, bytes);
        if (n == 0)
            return corrupt(p, "it is cut here");
        if (n < 0 || (uint64_t)n > bytes)
            return kvt_snap_fail(p->context, KVT_ERR_IO,
                                 "reading a snapshot failed at offset %llu: read answered %lld",
                                 (unsigned long long)p->offset, (long long)n);
        at += n;
        bytes -= (size_t)n;
        p->offset += (uint64_t)n;
        if (p->remaining != UINT64_MAX)
            p->remaining -= (uint64_t)n < p->remaining ? (uint64_t)n : p->remaining;
    }
    return KVT_OK;
}

/* Read into buffer[have ..], growing it as the bytes arrive. */
static kvt_status read_growing(parser *p, kvt_snap_buffer *buffer, size_t have, size_t bytes,
                               const char *what)
{
    while (bytes) {
        size_t part = have < STEP_BYTES ? STEP_BYTES - have : have;
        kvt_status status;
        if (part > bytes)
            part = bytes;
        status = kvt_snap_reserve(p->context, buffer, have, have + part, what);
        if (status == KVT_OK)
            status = read_bytes(p, buffer->data + have, part);
        if (status != KVT_OK)
            return status;
        have += part;
        bytes -= part;
    }
    return KVT_OK;
}

/*
 * Buffers that grow hold old and new at once for a moment, one of them at a time: what that adds
 * at most to a buffer of `bytes`. One that is filled again may have any smaller size before.
 */
static uint64_t growth(uint64_t bytes, int refilled)
{
    uint64_t step = STEP_BYTES;

    if (bytes <= STEP_BYTES)
        return 0;
    if (refilled)
        return bytes;
    while (step < bytes - step)
        step *= 2;
    return step;
}

uint64_t kvt_snap_read_bytes(const kvt_snap_header *header)
{
    uint64_t chunks = (header->n_tokens + KVT_SNAP_CHUNK_TOKENS - 1) / KVT_SNAP_CHUNK_TOKENS;
    uint64_t native = kvt_snap_layer_bytes(header), ids = KVT_SNAP_CHUNK_TOKENS;
    uint64_t table = header->n_blocks * KVT_SNAP_ENTRY_BYTES, payload, index = INDEX_BYTES, extra;

    if (header->n_tokens < ids)
        ids = header->n_tokens;
    if (native < 4 * ids)
        native = 4 * ids;
    payload = KVT_SNAP_SET_BYTES + KVT_SNAP_MAX_STREAMS * KVT_SNAP_STREAM_BYTES +
              KVT_SNAP_SUM_BYTES + native + 7;
    while (index < (2 * chunks + 1 + header->n_blocks) * KVT_SNAP_ENTRY_BYTES)
        index *= 2;
    extra = index > INDEX_BYTES ? index / 2 : 0;
    if (growth(table, 0) > extra)
        extra = growth(table, 0);
    if (growth(payload, 1) > extra)
        extra = growth(payload, 1);
    return kvt_snap_counted(payload) + kvt_snap_counted(native) + kvt_snap_counted(table) + index +
           kvt_snap_counted(KVT_SNAP_ID_HEAD + header->n_layers * (uint64_t)KVT_SNAP_ID_BYTES) +
           kvt_snap_counted(extra) + kvt_snap_decode_bytes(header);
}

/* ---- sections ---- */

static const char *section_name(uint32_t type)
{
    static const char *const names[] = {"?",     "token ids", "positions", "block table",
                                        "block", "layer",     "index",     "end"};
    return type <= KVT_SNAP_END ? names[type] : "?";
}

/* An optional section of a later version: its last eight bytes are the XXH64 of the others. */
static kvt_status skip(parser *p, const section *s)
{
    unsigned char piece[4096];
    uint64_t left = s->bytes - KVT_SNAP_SUM_BYTES;
    kvt_snap_summer summer;
    kvt_status status;

    kvt_snap_summer_init(&summer);
    while (left) {
        size_t n = left < sizeof piece ? (size_t)left : sizeof piece;
        status = read_bytes(p, piece, n);
        if (status != KVT_OK)
            return status;
        kvt_snap_summer_add(&summer, piece, n);
        left -= n;
    }
    status = read_bytes(p, piece, KVT_SNAP_SUM_BYTES);
    if (status == KVT_OK && !kvt_snap_same_sum(kvt_get64(piece), kvt_snap_summer_sum(&summer)))
        status = corrupt(p, "checksum of its payload");
    return status;
}

static kvt_status read_head(parser *p, section *s)
{
    unsigned char head[KVT_SNAP_SECTION_BYTES];
    kvt_status status;

    s->offset = p->offset;
    status = read_bytes(p, head, sizeof head);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(head + 24), kvt_snap_sum(head, 24)))
        return corrupt(p, "checksum of a section's head");
    s->type = kvt_get32(head);
    s->flags = kvt_get32(head + 4);
    s->bytes = kvt_get64(head + 8);
    s->value = kvt_get64(head + 16);
    if (s->bytes > p->remaining)
        return corrupt(p, "a section of %llu bytes, %llu are left", (unsigned long long)s->bytes,
                       (unsigned long long)p->remaining);
    return KVT_OK;
}

/* The section that has to come next, and its value. Unknown optional ones before it are skipped. */
static kvt_status expect(parser *p, uint32_t type, uint64_t value, section *s)
{
    for (;;) {
        kvt_status status;
        (void)snprintf(p->place, sizeof p->place, "before section %s %llu", section_name(type),
                       (unsigned long long)value);
        status = read_head(p, s);
        if (status != KVT_OK)
            return status;
        if (s->type >= KVT_SNAP_TOKEN_IDS && s->type <= KVT_SNAP_END)
            break;
        if (s->flags & KVT_SNAP_REQUIRED)
            return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                                 "snapshot with a section of type %u at offset %llu, which this "
                                 "build does not know",
                                 (unsigned)s->type, (unsigned long long)s->offset);
        if (s->flags || s->bytes < KVT_SNAP_SUM_BYTES || type == KVT_SNAP_LAYER)
            return corrupt(p, "section of unknown type %u", (unsigned)s->type);
        (void)snprintf(p->place, sizeof p->place, "section of type %u", (unsigned)s->type);
        status = skip(p, s);
        if (status != KVT_OK)
            return status;
    }
    if (s->type != type || s->flags != KVT_SNAP_REQUIRED || s->value != value)
        return corrupt(p, "section %s %llu is in its place", section_name(s->type),
                       (unsigned long long)s->value);
    (void)snprintf(p->place, sizeof p->place, "section %s %llu", section_name(type),
                   (unsigned long long)value);
    return KVT_OK;
}

/* The index's entry for a section that began at s->offset and ended here. */
static kvt_status note(parser *p, const section *s)
{
    size_t need = p->index_bytes + KVT_SNAP_ENTRY_BYTES;
    kvt_status status = KVT_OK;
    unsigned char *entry;

    if (need > p->index.bytes) {
        size_t more = p->index.bytes ? 2 * p->index.bytes : INDEX_BYTES;
        status =
            kvt_snap_reserve(p->context, &p->index, p->index_bytes, more, "a snapshot's index");
    }
    if (status != KVT_OK)
        return status;
    entry = p->index.data + p->index_bytes;
    kvt_put32(entry, s->type);
    kvt_put32(entry + 4, 0);
    kvt_put64(entry + 8, s->value);
    kvt_put64(entry + 16, s->offset);
    kvt_put64(entry + 24, p->offset - s->offset);
    p->index_bytes = need;
    return KVT_OK;
}

/* ---- stream sets ---- */

/* Check the table of a stream set against what the streams have to be, and take it. */
static kvt_status take_table(parser *p, const kvt_snap_shape *shapes, uint32_t n,
                             kvt_snap_stream *streams, size_t payload_bytes)
{
    const unsigned char *at = p->payload.data + KVT_SNAP_SET_BYTES;
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES;
    uint64_t all = table + KVT_SNAP_SUM_BYTES;
    uint32_t i;

    if (!kvt_snap_same_sum(kvt_get64(p->payload.data + table),
                           kvt_snap_sum(p->payload.data, table)))
        return corrupt(p, "checksum of its stream table");
    if (kvt_get32(p->payload.data) != n || kvt_get32(p->payload.data + 4))
        return corrupt(p, "%u streams where %u belong", (unsigned)kvt_get32(p->payload.data),
                       (unsigned)n);
    for (i = 0; i < n; i++, at += KVT_SNAP_STREAM_BYTES) {
        kvt_snap_stream *stream = &streams[i];
        stream->kind = at[0] | (uint32_t)at[1] << 8;
        stream->filter = at[2];
        stream->codec = at[3];
        stream->stored_bytes = kvt_get32(at + 4);
        stream->native_bytes = kvt_get32(at + 8);
        stream->sum = kvt_get64(at + 16);
        if (stream->kind != shapes[i].kind)
            return corrupt(p, "stream of kind %u where kind %u belongs", (unsigned)stream->kind,
                           (unsigned)shapes[i].kind);
        if (!kvt_snap_filter_known(&shapes[i], stream->filter) || stream->codec > KVT_SNAP_ZSTD)
            return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                                 "snapshot, %s: filter %u or codec %u, which this build does not "
                                 "know",
                                 p->place, (unsigned)stream->filter, (unsigned)stream->codec);
        if (stream->native_bytes != shapes[i].bytes)
            return corrupt(p, "stream of kind %u has %u bytes, %zu belong", (unsigned)stream->kind,
                           (unsigned)stream->native_bytes, shapes[i].bytes);
        if (kvt_get32(at + 12) ||
            (stream->codec == KVT_SNAP_RAW ? stream->stored_bytes != stream->native_bytes
                                           : stream->stored_bytes >= stream->native_bytes))
            return corrupt(p, "stream of kind %u is stored in %u bytes", (unsigned)stream->kind,
                           (unsigned)stream->stored_bytes);
        all += stream->stored_bytes;
    }
    if ((all + 7) / 8 * 8 != payload_bytes)
        return corrupt(p, "its streams make %llu bytes, the section has %zu",
                       (unsigned long long)all, payload_bytes);
    return KVT_OK;
}

/*
 * Read a section's stream set: *native is then its streams in native form, one after the other,
 * checked, in memory of the parser.
 */
static kvt_status read_set(parser *p, const section *s, const kvt_snap_shape *shapes, uint32_t n,
                           size_t native_bytes, const unsigned char **native)
{
    kvt_snap_stream streams[KVT_SNAP_MAX_STREAMS];
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES + KVT_SNAP_SUM_BYTES;
    size_t at = table, done = 0, bytes = (size_t)s->bytes;
    kvt_status status;
    int plain = 1;
    uint32_t i;

    if (s->bytes < table || s->bytes > table + native_bytes + 7 || s->bytes % 8)
        return corrupt(p, "its size is %llu", (unsigned long long)s->bytes);
    status = read_growing(p, &p->payload, 0, bytes, "a snapshot's section");
    if (status == KVT_OK)
        status = take_table(p, shapes, n, streams, bytes);
    if (status != KVT_OK)
        return status;
    for (i = 0; i < n; i++) {
        if (!kvt_snap_same_sum(streams[i].sum,
                               kvt_snap_sum(p->payload.data + at, streams[i].stored_bytes)))
            return corrupt(p, "checksum of the stream of kind %u", (unsigned)streams[i].kind);
        at += streams[i].stored_bytes;
        plain &= streams[i].codec == KVT_SNAP_RAW && streams[i].filter == KVT_SNAP_NATIVE;
        p->stored_bytes += s->type == KVT_SNAP_LAYER ? streams[i].stored_bytes : 0;
    }
    for (; at < bytes; at++)
        if (p->payload.data[at])
            return corrupt(p, "padding that is not zero");
    if (plain) {
        *native = p->payload.data + table; /* as it lies */
    } else {
        status = kvt_snap_reserve(p->context, &p->native, 0, native_bytes, "a snapshot's streams");
        if (status != KVT_OK)
            return status;
        *native = p->native.data;
    }
    at = table;
    for (i = 0; i < n; i++) {
        const char *fault;
        if (!plain) {
            status = kvt_snap_decode(&p->codec, &shapes[i], &streams[i], p->payload.data + at,
                                     p->native.data + done);
            if (status == KVT_ERR_CORRUPT)
                return corrupt(p, "the stream of kind %u does not decompress",
                               (unsigned)streams[i].kind);
            if (status != KVT_OK)
                return status;
        }
        fault = kvt_snap_check(&shapes[i], *native + done);
        if (fault)
            return corrupt(p, "%s", fault);
        at += streams[i].stored_bytes;
        done += shapes[i].bytes;
    }
    return KVT_OK;
}

/* ---- the parts of a snapshot ---- */

static kvt_status read_header(parser *p)
{
    unsigned char bytes[KVT_SNAP_HEADER_MAX];
    size_t n;
    kvt_status status;

    (void)snprintf(p->place, sizeof p->place, "header");
    status = read_bytes(p, bytes, KVT_SNAP_MAGIC_BYTES);
    if (status == KVT_OK && memcmp(bytes, KVT_SNAP_MAGIC, KVT_SNAP_MAGIC_BYTES) != 0)
        return kvt_snap_fail(p->context, KVT_ERR_FORMAT, "not a kvtile snapshot");
    if (status == KVT_OK)
        status = read_bytes(p, bytes + KVT_SNAP_MAGIC_BYTES,
                            KVT_SNAP_FIXED_BYTES - KVT_SNAP_MAGIC_BYTES);
    if (status == KVT_OK)
        status = kvt_snap_header_begin(p->context, bytes, p->header, &n);
    if (status == KVT_OK)
        status = read_bytes(p, bytes + KVT_SNAP_FIXED_BYTES, n - KVT_SNAP_FIXED_BYTES);
    if (status == KVT_OK)
        status = kvt_snap_header_get(p->context, bytes, n, p->header);
    if (status == KVT_OK && p->sink->header)
        status = p->sink->header(p->sink->user, p->header);
    return status;
}

static kvt_status read_tokens(parser *p, uint32_t type, uint32_t kind)
{
    uint64_t first;

    for (first = 0; first < p->header->n_tokens; first += KVT_SNAP_CHUNK_TOKENS) {
        uint64_t left = p->header->n_tokens - first;
        uint32_t n = left < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)left : KVT_SNAP_CHUNK_TOKENS;
        kvt_snap_shape shape;
        const unsigned char *native;
        section s;
        kvt_status status = expect(p, type, first, &s);

        memset(&shape, 0, sizeof shape);
        shape.kind = kind;
        shape.element = 4;
        shape.bytes = n * (size_t)4;
        if (status == KVT_OK)
            status = read_set(p, &s, &shape, 1, shape.bytes, &native);
        if (status == KVT_OK)
            status = note(p, &s);
        if (status == KVT_OK && p->sink->tokens)
            status = p->sink->tokens(p->sink->user, kind, first, n, native);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

static uint32_t block_tokens(const kvt_snap_header *header, uint64_t row)
{
    uint64_t left = header->n_tokens - row * KVT_TOKENS;
    return left < KVT_TOKENS ? (uint32_t)left : KVT_TOKENS;
}

static kvt_status read_block_table(parser *p)
{
    uint32_t forms[KVT_MAX_GROUPS] = {KVT_SEALED};
    uint64_t bytes = p->header->n_blocks * KVT_SNAP_ENTRY_BYTES, b;
    unsigned char sum[KVT_SNAP_SUM_BYTES];
    section s;
    kvt_status status = expect(p, KVT_SNAP_BLOCK_TABLE, 0, &s);

    if (status != KVT_OK)
        return status;
    if (s.bytes != bytes + KVT_SNAP_SUM_BYTES)
        return corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    status = read_growing(p, &p->table, 0, (size_t)bytes, "a snapshot's block table");
    if (status == KVT_OK)
        status = read_bytes(p, sum, sizeof sum);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(sum), kvt_snap_sum(p->table.data, (size_t)bytes)))
        return corrupt(p, "checksum of its payload");
    for (b = 0; b < p->header->n_blocks; b++) {
        const unsigned char *entry = p->table.data + b * KVT_SNAP_ENTRY_BYTES;
        uint64_t row = b / p->header->n_groups;
        uint32_t group = (uint32_t)(b % p->header->n_groups), form = kvt_get32(entry + 28);
        if (form > KVT_OPEN)
            return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                                 "snapshot with a block of representation %u, which this build "
                                 "does not know",
                                 (unsigned)form);
        /* Open blocks follow the sealed ones. */
        if (form == KVT_OPEN && !kvt_snap_seals(&p->header->groups[group]))
            return corrupt(p, "entry %llu is open, in a group that has no i8",
                           (unsigned long long)b);
        if (form < forms[group])
            return corrupt(p, "entry %llu is sealed, behind an open one", (unsigned long long)b);
        forms[group] = form;
        if (kvt_get32(entry + 16) != group || kvt_get32(entry + 20) != row ||
            kvt_get32(entry + 24) != block_tokens(p->header, row))
            return corrupt(p, "entry %llu", (unsigned long long)b);
    }
    return note(p, &s);
}

static kvt_status read_block(parser *p, uint64_t b)
{
    const unsigned char *entry = p->table.data + b * KVT_SNAP_ENTRY_BYTES, *native = NULL;
    uint32_t group = (uint32_t)(b % p->header->n_groups), layer;
    uint64_t row = b / p->header->n_groups;
    uint32_t tokens = block_tokens(p->header, row);
    const kvt_snapshot_group *geometry = &p->header->groups[group];
    unsigned char bytes[KVT_SNAP_BLOCK_BYTES], id[KVT_SNAP_ID_BYTES];
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    size_t native_bytes;
    uint32_t form = kvt_get32(entry + 28);
    uint32_t n = kvt_snap_shapes(geometry, form, tokens, shapes, &native_bytes);
    section block, s;
    kvt_status status = expect(p, KVT_SNAP_BLOCK, b, &block);

    if (status != KVT_OK)
        return status;
    if (block.bytes != sizeof bytes)
        return corrupt(p, "its size is %llu", (unsigned long long)block.bytes);
    status = read_bytes(p, bytes, sizeof bytes);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(bytes + 40), kvt_snap_sum(bytes, 40)))
        return corrupt(p, "checksum of its payload");
    if (memcmp(bytes, entry, KVT_SNAP_ENTRY_BYTES) != 0)
        return corrupt(p, "it is not the block that the block table lists");
    if (kvt_get32(bytes + 32) != geometry->n_layers || kvt_get32(bytes + 36))
        return corrupt(p, "%u layers where %u belong", (unsigned)kvt_get32(bytes + 32),
                       (unsigned)geometry->n_layers);
    for (layer = 0; layer < geometry->n_layers; layer++) {
        status = expect(p, KVT_SNAP_LAYER, layer, &s);
        if (status != KVT_OK)
            return status;
        (void)snprintf(p->place, sizeof p->place,
                       "block %llu (group %u, tokens from %llu), layer %u", (unsigned long long)b,
                       (unsigned)group, (unsigned long long)row * KVT_TOKENS, (unsigned)layer);
        status = read_set(p, &s, shapes, n, native_bytes, &native);
        if (status != KVT_OK)
            return status;
        p->native_bytes += native_bytes;
        kvt_snap_digest(native, native_bytes,
                        p->digests.data + KVT_SNAP_ID_HEAD + layer * (size_t)KVT_SNAP_ID_BYTES);
        if (p->sink->layer)
            status = p->sink->layer(p->sink->user, row, group, form, layer, tokens, native);
        if (status != KVT_OK)
            return status;
    }
    memcpy(p->digests.data, entry + KVT_SNAP_ENTRY_BYTES - KVT_SNAP_ID_HEAD, KVT_SNAP_ID_HEAD);
    kvt_snap_digest(p->digests.data,
                    KVT_SNAP_ID_HEAD + geometry->n_layers * (size_t)KVT_SNAP_ID_BYTES, id);
#ifndef KVT_FUZZING
    if (memcmp(id, entry, KVT_SNAP_ID_BYTES) != 0)
        return corrupt(p, "the block's bytes do not make its id");
#endif
    return note(p, &block);
}

static kvt_status read_index_and_end(parser *p)
{
    unsigned char entry[KVT_SNAP_ENTRY_BYTES], end[KVT_SNAP_END_BYTES];
    uint64_t index_offset;
    size_t at;
    section s;
    kvt_status status = expect(p, KVT_SNAP_INDEX, 0, &s);

    if (status != KVT_OK)
        return status;
    index_offset = s.offset;
    if (s.bytes != p->index_bytes + KVT_SNAP_SUM_BYTES)
        return corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    for (at = 0; at < p->index_bytes; at += sizeof entry) {
        status = read_bytes(p, entry, sizeof entry);
        if (status != KVT_OK)
            return status;
        if (memcmp(entry, p->index.data + at, sizeof entry) != 0)
            return corrupt(p, "entry %zu is not where the file has it", at / sizeof entry);
    }
    status = read_bytes(p, entry, KVT_SNAP_SUM_BYTES);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(entry), kvt_snap_sum(p->index.data, p->index_bytes)))
        return corrupt(p, "checksum of its payload");
    status = expect(p, KVT_SNAP_END, 0, &s);
    if (status != KVT_OK)
        return status;
    if (s.bytes != sizeof end)
        return corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    status = read_bytes(p, end, sizeof end);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(end + 16), kvt_snap_sum(end, 16)) ||
        kvt_get64(end) != index_offset || kvt_get64(end + 8) != p->offset ||
        memcmp(end + 24, KVT_SNAP_FOOTER, KVT_SNAP_MAGIC_BYTES) != 0)
        return corrupt(p, "the footer");
    return KVT_OK;
}

static kvt_status read_body(parser *p)
{
    uint32_t layers = 0, g;
    uint64_t b;
    kvt_status status;

    for (g = 0; g < p->header->n_groups; g++)
        if (p->header->groups[g].n_layers > layers)
            layers = p->header->groups[g].n_layers;
    status = kvt_snap_reserve(p->context, &p->digests, 0,
                              KVT_SNAP_ID_HEAD + layers * (size_t)KVT_SNAP_ID_BYTES,
                              "a snapshot's digests");
    if (status == KVT_OK)
        status = read_tokens(p, KVT_SNAP_TOKEN_IDS, KVT_SNAP_KIND_TOKEN_IDS);
    if (status == KVT_OK)
        status = read_tokens(p, KVT_SNAP_POSITIONS, KVT_SNAP_KIND_POSITIONS);
    if (status == KVT_OK)
        status = read_block_table(p);
    for (b = 0; status == KVT_OK && b < p->header->n_blocks; b++)
        status = read_block(p, b);
    if (status == KVT_OK)
        status = read_index_and_end(p);
    return status;
}

kvt_status kvt_snap_read(const kvt_snap_context *context, const kvt_reader *reader,
                         uint64_t remaining, int header_only, const kvt_snap_sink *sink,
                         kvt_snap_header *header, kvt_snap_counts *counts)
{
    parser p;
    kvt_status status;

    memset(&p, 0, sizeof p);
    p.context = context;
    p.reader = reader;
    p.sink = sink;
    p.header = header;
    p.remaining = remaining;
    kvt_snap_codec_init(&p.codec, context);
    status = read_header(&p);
    if (status == KVT_OK && !header_only)
        status = read_body(&p);
    if (status == KVT_OK && counts) {
        counts->file_bytes = p.offset;
        counts->stored_bytes = p.stored_bytes;
        counts->native_bytes = p.native_bytes;
    }
    kvt_snap_codec_release(&p.codec);
    kvt_snap_release(context, &p.payload);
    kvt_snap_release(context, &p.native);
    kvt_snap_release(context, &p.table);
    kvt_snap_release(context, &p.index);
    kvt_snap_release(context, &p.digests);
    return status;
}
