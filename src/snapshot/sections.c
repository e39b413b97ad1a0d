/*
 * How a snapshot is read: bytes, sections, and the stream sets in them. No byte is used before its
 * checksum, and no size is believed before it is held against what it has to be and against the
 * bytes that are left; buffers grow as the bytes arrive.
 */
#include "src/snapshot/parser.h"

#include <stdarg.h>
#include <stdio.h>

kvt_status kvt_snap_corrupt(kvt_snap_parser *p, const char *format, ...)
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

kvt_status kvt_snap_take(kvt_snap_parser *p, void *to, size_t bytes)
{
    unsigned char *at = to;

    while (bytes) {
        int64_t n = p->reader->read(p->reader->user, at, bytes);
        if (n == 0)
            return kvt_snap_corrupt(p, "it is cut here");
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

kvt_status kvt_snap_take_growing(kvt_snap_parser *p, kvt_snap_buffer *buffer, size_t have,
                                 size_t bytes, const char *what)
{
    while (bytes) {
        size_t part = have < KVT_SNAP_STEP_BYTES ? KVT_SNAP_STEP_BYTES - have : have;
        kvt_status status;
        if (part > bytes)
            part = bytes;
        status = kvt_snap_reserve(p->context, buffer, have, have + part, what);
        if (status == KVT_OK)
            status = kvt_snap_take(p, buffer->data + have, part);
        if (status != KVT_OK)
            return status;
        have += part;
        bytes -= part;
    }
    return KVT_OK;
}

/* ---- sections ---- */

static const char *section_name(uint32_t type)
{
    static const char *const names[] = {"?",        "token ids",  "positions", "block table",
                                        "block",    "layer",      "index",     "end",
                                        "sequence", "checkpoint", "shifts"};
    return type <= KVT_SNAP_LAST_TYPE ? names[type] : "?";
}

/* An optional section of a later version: its last eight bytes are the XXH64 of the others. */
static kvt_status skip(kvt_snap_parser *p, const kvt_snap_section *s)
{
    unsigned char piece[4096];
    uint64_t left = s->bytes - KVT_SNAP_SUM_BYTES;
    kvt_snap_summer summer;
    kvt_status status;

    kvt_snap_summer_init(&summer);
    while (left) {
        size_t n = left < sizeof piece ? (size_t)left : sizeof piece;
        status = kvt_snap_take(p, piece, n);
        if (status != KVT_OK)
            return status;
        kvt_snap_summer_add(&summer, piece, n);
        left -= n;
    }
    status = kvt_snap_take(p, piece, KVT_SNAP_SUM_BYTES);
    if (status == KVT_OK && !kvt_snap_same_sum(kvt_get64(piece), kvt_snap_summer_sum(&summer)))
        status = kvt_snap_corrupt(p, "checksum of its payload");
    return status;
}

static kvt_status read_head(kvt_snap_parser *p, kvt_snap_section *s)
{
    unsigned char head[KVT_SNAP_SECTION_BYTES];
    kvt_status status;

    s->offset = p->offset;
    status = kvt_snap_take(p, head, sizeof head);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(head + 24), kvt_snap_sum(head, 24)))
        return kvt_snap_corrupt(p, "checksum of a section's head");
    s->type = kvt_get32(head);
    s->flags = kvt_get32(head + 4);
    s->bytes = kvt_get64(head + 8);
    s->value = kvt_get64(head + 16);
    if (s->bytes > p->remaining)
        return kvt_snap_corrupt(p, "a section of %llu bytes, %llu are left",
                                (unsigned long long)s->bytes, (unsigned long long)p->remaining);
    return KVT_OK;
}

kvt_status kvt_snap_peek(kvt_snap_parser *p, uint32_t wanted, uint64_t value)
{
    kvt_snap_section *s = &p->next;

    while (!p->has_next) {
        kvt_status status;
        (void)snprintf(p->place, sizeof p->place, "before section %s %llu", section_name(wanted),
                       (unsigned long long)value);
        status = read_head(p, s);
        if (status != KVT_OK)
            return status;
        if (s->type >= KVT_SNAP_TOKEN_IDS && s->type <= KVT_SNAP_LAST_TYPE) {
            p->has_next = 1;
            break;
        }
        if (s->flags & KVT_SNAP_REQUIRED)
            return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                                 "snapshot with a section of type %u at offset %llu, which this "
                                 "build does not know",
                                 (unsigned)s->type, (unsigned long long)s->offset);
        if (s->flags || s->bytes < KVT_SNAP_SUM_BYTES || wanted == KVT_SNAP_LAYER)
            return kvt_snap_corrupt(p, "section of unknown type %u", (unsigned)s->type);
        (void)snprintf(p->place, sizeof p->place, "section of type %u", (unsigned)s->type);
        status = skip(p, s);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

kvt_status kvt_snap_expect(kvt_snap_parser *p, uint32_t type, uint64_t value, kvt_snap_section *s)
{
    kvt_status status = kvt_snap_peek(p, type, value);

    if (status != KVT_OK)
        return status;
    *s = p->next;
    p->has_next = 0;
    if (s->type != type || s->flags != KVT_SNAP_REQUIRED || s->value != value)
        return kvt_snap_corrupt(p, "section %s %llu is in its place", section_name(s->type),
                                (unsigned long long)s->value);
    (void)snprintf(p->place, sizeof p->place, "section %s %llu", section_name(type),
                   (unsigned long long)value);
    return KVT_OK;
}

kvt_status kvt_snap_note(kvt_snap_parser *p, const kvt_snap_section *s)
{
    size_t need = p->index_bytes + KVT_SNAP_ENTRY_BYTES;
    kvt_status status = KVT_OK;
    unsigned char *entry;

    if (need > p->index.bytes) {
        size_t more = p->index.bytes ? 2 * p->index.bytes : KVT_SNAP_INDEX_BYTES;
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
static kvt_status take_table(kvt_snap_parser *p, const kvt_snap_shape *shapes, uint32_t n,
                             kvt_snap_stream *streams, size_t payload_bytes)
{
    const unsigned char *at = p->payload.data + KVT_SNAP_SET_BYTES;
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES;
    uint64_t all = table + KVT_SNAP_SUM_BYTES;
    uint32_t i;

    if (!kvt_snap_same_sum(kvt_get64(p->payload.data + table),
                           kvt_snap_sum(p->payload.data, table)))
        return kvt_snap_corrupt(p, "checksum of its stream table");
    if (kvt_get32(p->payload.data) != n || kvt_get32(p->payload.data + 4))
        return kvt_snap_corrupt(p, "%u streams where %u belong",
                                (unsigned)kvt_get32(p->payload.data), (unsigned)n);
    for (i = 0; i < n; i++, at += KVT_SNAP_STREAM_BYTES) {
        kvt_snap_stream *stream = &streams[i];
        stream->kind = at[0] | (uint32_t)at[1] << 8;
        stream->filter = at[2];
        stream->codec = at[3];
        stream->stored_bytes = kvt_get32(at + 4);
        stream->native_bytes = kvt_get32(at + 8);
        stream->sum = kvt_get64(at + 16);
        if (stream->kind != shapes[i].kind)
            return kvt_snap_corrupt(p, "stream of kind %u where kind %u belongs",
                                    (unsigned)stream->kind, (unsigned)shapes[i].kind);
        if (!kvt_snap_filter_known(&shapes[i], stream->filter) || stream->codec > KVT_SNAP_ZSTD)
            return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                                 "snapshot, %s: filter %u or codec %u, which this build does not "
                                 "know",
                                 p->place, (unsigned)stream->filter, (unsigned)stream->codec);
        if (stream->native_bytes != shapes[i].bytes)
            return kvt_snap_corrupt(p, "stream of kind %u has %u bytes, %zu belong",
                                    (unsigned)stream->kind, (unsigned)stream->native_bytes,
                                    shapes[i].bytes);
        if (kvt_get32(at + 12) ||
            (stream->codec == KVT_SNAP_RAW ? stream->stored_bytes != stream->native_bytes
                                           : stream->stored_bytes >= stream->native_bytes))
            return kvt_snap_corrupt(p, "stream of kind %u is stored in %u bytes",
                                    (unsigned)stream->kind, (unsigned)stream->stored_bytes);
        all += stream->stored_bytes;
    }
    if ((all + 7) / 8 * 8 != payload_bytes)
        return kvt_snap_corrupt(p, "its streams make %llu bytes, the section has %zu",
                                (unsigned long long)all, payload_bytes);
    return KVT_OK;
}

kvt_status kvt_snap_take_set(kvt_snap_parser *p, const kvt_snap_section *s,
                             const kvt_snap_shape *shapes, uint32_t n, size_t native_bytes,
                             const unsigned char **native)
{
    kvt_snap_stream streams[KVT_SNAP_MAX_STREAMS];
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES + KVT_SNAP_SUM_BYTES;
    size_t at = table, done = 0, bytes = (size_t)s->bytes;
    kvt_status status;
    int plain = 1;
    uint32_t i;

    if (s->bytes < table || s->bytes > table + native_bytes + 7 || s->bytes % 8)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s->bytes);
    status = kvt_snap_take_growing(p, &p->payload, 0, bytes, "a snapshot's section");
    if (status == KVT_OK)
        status = take_table(p, shapes, n, streams, bytes);
    if (status != KVT_OK)
        return status;
    for (i = 0; i < n; i++) {
        if (!kvt_snap_same_sum(streams[i].sum,
                               kvt_snap_sum(p->payload.data + at, streams[i].stored_bytes)))
            return kvt_snap_corrupt(p, "checksum of the stream of kind %u",
                                    (unsigned)streams[i].kind);
        at += streams[i].stored_bytes;
        plain &= streams[i].codec == KVT_SNAP_RAW && streams[i].filter == KVT_SNAP_NATIVE;
        p->counts.stored_bytes += s->type == KVT_SNAP_LAYER ? streams[i].stored_bytes : 0;
    }
    for (; at < bytes; at++)
        if (p->payload.data[at])
            return kvt_snap_corrupt(p, "padding that is not zero");
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
                return kvt_snap_corrupt(p, "the stream of kind %u does not decompress",
                                        (unsigned)streams[i].kind);
            if (status != KVT_OK)
                return status;
        }
        fault = kvt_snap_check(&shapes[i], *native + done);
        if (fault)
            return kvt_snap_corrupt(p, "%s", fault);
        at += streams[i].stored_bytes;
        done += shapes[i].bytes;
    }
    return KVT_OK;
}
