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
    return kvt_snap_fail(p->context, KVT_ERR_CORRUPT,
                         "snapshot damaged before offset %llu, %s%s: %s",
                         (unsigned long long)p->offset, p->name, p->place, text);
}

/* ---- bytes ---- */

const unsigned char *kvt_snap_take_view(kvt_snap_parser *p, size_t bytes)
{
    const unsigned char *at = NULL;

    if (bytes > p->remaining)
        return NULL;
    if (p->input->memory)
        at = p->input->memory + p->offset;
    else if (p->input->view && p->jobs.n == 1) /* one at a time */
        at = p->input->view(p->input->reader.user, bytes);
    if (!at)
        return NULL;
    p->offset += bytes;
    if (p->remaining != UINT64_MAX)
        p->remaining -= bytes;
    return at;
}

void kvt_snap_skip(kvt_snap_parser *p, uint64_t bytes)
{
    p->input->skip(p->input->reader.user, bytes);
    p->offset += bytes;
    p->remaining -= bytes; /* known, where there are places to read by */
}

kvt_status kvt_snap_take(kvt_snap_parser *p, void *to, size_t bytes)
{
    unsigned char *at = to;

    if (p->input->memory) {
        const unsigned char *from = kvt_snap_take_view(p, bytes);
        if (!from)
            return kvt_snap_corrupt(p, "it is cut here");
        memcpy(to, from, bytes);
        return KVT_OK;
    }
    while (bytes) {
        int64_t n = p->input->reader.read(p->input->reader.user, at, bytes);
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
    static const char *const names[] = {
        "?",        "token ids",  "positions", "block table", "block", "layer",  "index",  "end",
        "sequence", "checkpoint", "shifts",    "parent",      "piece", "native", "digests"};
    _Static_assert(sizeof names / sizeof *names == KVT_SNAP_LAST_TYPE + 1, "a name for each");
    return names[type]; /* it is one that is known: kvt_snap_peek */
}

/* An optional section of a later version: its last eight bytes are the XXH64 of the others. The
   index has it, too. */
static kvt_status skip(kvt_snap_parser *p, const kvt_snap_section *s)
{
    unsigned char piece[4096], digest[KVT_SNAP_ID_BYTES];
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
    kvt_snap_summer_digest(&summer, digest);
    return status == KVT_OK ? kvt_snap_note(p, s, digest) : status;
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
                                 "%ssnapshot with a section of type %u at offset %llu, which this "
                                 "build does not know",
                                 p->name, (unsigned)s->type, (unsigned long long)s->offset);
        if (p->by_index || s->flags || s->bytes < KVT_SNAP_SUM_BYTES || wanted == KVT_SNAP_LAYER ||
            wanted == KVT_SNAP_IMAGES || wanted == KVT_SNAP_DIGESTS || wanted == KVT_SNAP_END)
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
    if (s->type != type || s->flags != (type == KVT_SNAP_PIECE ? 0 : KVT_SNAP_REQUIRED) ||
        s->value != value)
        return kvt_snap_corrupt(p, "section %s %llu is in its place", section_name(s->type),
                                (unsigned long long)s->value);
    (void)snprintf(p->place, sizeof p->place, "section %s %llu", section_name(type),
                   (unsigned long long)value);
    return KVT_OK;
}

kvt_status kvt_snap_note(kvt_snap_parser *p, const kvt_snap_section *s, const unsigned char *digest)
{
    size_t need = p->index_bytes + KVT_SNAP_NOTE_BYTES;
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
    memcpy(entry + 32, digest, KVT_SNAP_ID_BYTES);
    p->index_bytes = need;
    return KVT_OK;
}

kvt_status kvt_snap_take_summed(kvt_snap_parser *p, const kvt_snap_section *s, size_t least,
                                uint64_t most, unsigned char *digest)
{
    size_t bytes = (size_t)s->bytes, end = bytes - KVT_SNAP_SUM_BYTES;
    kvt_status status;

    if (s->bytes % 8 || s->bytes < (uint64_t)least + KVT_SNAP_SUM_BYTES ||
        s->bytes - KVT_SNAP_SUM_BYTES > most || s->bytes > SIZE_MAX / 2)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s->bytes);
    status = kvt_snap_take_growing(p, &p->payload, 0, bytes, "a snapshot's section");
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(p->payload.data + end), kvt_snap_sum(p->payload.data, end)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    kvt_snap_digest(p->payload.data, end, digest);
    return KVT_OK;
}

/* ---- stream sets ---- */

static kvt_status faulty(kvt_snap_fault *fault, kvt_status status, uint32_t kind, const char *text,
                         uint32_t a, uint32_t b)
{
    fault->kind = kind;
    fault->text = text;
    fault->a = a;
    fault->b = b;
    return status;
}

kvt_status kvt_snap_set_failed(kvt_snap_parser *p, kvt_status status, const kvt_snap_fault *fault)
{
    char text[120];

    if (!fault->text)
        return status;
    if (status == KVT_ERR_FORMAT)
        return kvt_snap_fail(
            p->context, KVT_ERR_FORMAT,
            "snapshot, %s%s: filter %u or codec %u, which this build does not know", p->name,
            p->place, (unsigned)fault->a, (unsigned)fault->b);
    (void)snprintf(text, sizeof text, fault->text, (unsigned)fault->a, (unsigned)fault->b);
    return fault->kind ? kvt_snap_corrupt(p, "stream of kind %u: %s", (unsigned)fault->kind, text)
                       : kvt_snap_corrupt(p, "%s", text);
}

/* Check the table of a stream set against what the streams have to be, and take it. */
static kvt_status take_table(const unsigned char *payload, const kvt_snap_shape *shapes, uint32_t n,
                             kvt_snap_stream *streams, size_t payload_bytes, kvt_snap_fault *fault)
{
    const unsigned char *at = payload + KVT_SNAP_SET_BYTES;
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES;
    uint64_t all = table + KVT_SNAP_SUM_BYTES;
    uint32_t i;

    if (!kvt_snap_same_sum(kvt_get64(payload + table), kvt_snap_sum(payload, table)))
        return faulty(fault, KVT_ERR_CORRUPT, 0, "checksum of its stream table", 0, 0);
    if (kvt_get32(payload) != n || kvt_get32(payload + 4))
        return faulty(fault, KVT_ERR_CORRUPT, 0, "%u streams where %u belong", kvt_get32(payload),
                      n);
    for (i = 0; i < n; i++, at += KVT_SNAP_STREAM_BYTES) {
        kvt_snap_stream *stream = &streams[i];
        stream->kind = at[0] | (uint32_t)at[1] << 8;
        stream->filter = at[2];
        stream->codec = at[3];
        stream->stored_bytes = kvt_get32(at + 4);
        stream->native_bytes = kvt_get32(at + 8);
        stream->sum = kvt_get64(at + 16);
        if (stream->kind != shapes[i].kind)
            return faulty(fault, KVT_ERR_CORRUPT, 0, "stream of kind %u where kind %u belongs",
                          stream->kind, shapes[i].kind);
        if (!kvt_snap_filter_known(&shapes[i], stream->filter) || stream->codec > KVT_SNAP_ZSTD)
            return faulty(fault, KVT_ERR_FORMAT, stream->kind, "", stream->filter, stream->codec);
        if (stream->native_bytes != shapes[i].bytes)
            return faulty(fault, KVT_ERR_CORRUPT, stream->kind, "it has %u bytes, %u belong",
                          stream->native_bytes, (uint32_t)shapes[i].bytes);
        if (kvt_get32(at + 12) ||
            (stream->codec == KVT_SNAP_RAW ? stream->stored_bytes != stream->native_bytes
                                           : stream->stored_bytes >= stream->native_bytes))
            return faulty(fault, KVT_ERR_CORRUPT, stream->kind, "it is stored in %u bytes",
                          stream->stored_bytes, 0);
        all += stream->stored_bytes;
    }
    if ((all + 7) / 8 * 8 != payload_bytes)
        return faulty(fault, KVT_ERR_CORRUPT, 0, "its streams make %u bytes, the section has %u",
                      (uint32_t)all, (uint32_t)payload_bytes);
    return KVT_OK;
}

kvt_status kvt_snap_take_set(kvt_snap_parser *p, const kvt_snap_section *s, uint32_t n,
                             size_t native_bytes, kvt_snap_buffer *buffer,
                             const unsigned char **from)
{
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES + KVT_SNAP_SUM_BYTES;
    size_t bytes = (size_t)s->bytes;
    kvt_status status;

    if (s->bytes < table || s->bytes > table + native_bytes + 7 || s->bytes % 8)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s->bytes);
    *from = kvt_snap_take_view(p, bytes);
    if (*from)
        return KVT_OK;
    status = kvt_snap_take_growing(p, buffer, 0, bytes, "a snapshot's section");
    *from = buffer->data;
    return status;
}

kvt_status kvt_snap_decode_set(kvt_snap_codec *codec, const kvt_snap_shape *shapes, uint32_t n,
                               size_t native_bytes, const unsigned char *payload, size_t bytes,
                               kvt_snap_buffer *buffer, const unsigned char **streams,
                               uint64_t *stored, kvt_snap_fault *fault)
{
    kvt_snap_stream table[KVT_SNAP_MAX_STREAMS];
    size_t begin = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES + KVT_SNAP_SUM_BYTES;
    size_t at = begin, done = 0;
    kvt_status status = take_table(payload, shapes, n, table, bytes, fault);
    int plain = 1;
    uint32_t i;

    *stored = 0;
    if (status != KVT_OK)
        return status;
    for (i = 0; i < n; i++) {
        if (!kvt_snap_same_sum(table[i].sum, kvt_snap_sum(payload + at, table[i].stored_bytes)))
            return faulty(fault, KVT_ERR_CORRUPT, table[i].kind, "its checksum", 0, 0);
        at += table[i].stored_bytes;
        plain &= table[i].codec == KVT_SNAP_RAW && table[i].filter == KVT_SNAP_NATIVE;
        *stored += table[i].stored_bytes;
    }
    for (; at < bytes; at++)
        if (payload[at])
            return faulty(fault, KVT_ERR_CORRUPT, 0, "padding that is not zero", 0, 0);
    if (plain) {
        *streams = payload + begin; /* as it lies */
    } else {
        status = kvt_snap_reserve(codec->context, buffer, 0, native_bytes, "a snapshot's streams");
        if (status != KVT_OK)
            return status;
        *streams = buffer->data;
    }
    at = begin;
    for (i = 0; i < n; i++) {
        const char *text;
        if (!plain) {
            status =
                kvt_snap_decode(codec, &shapes[i], &table[i], payload + at, buffer->data + done);
            if (status == KVT_ERR_CORRUPT)
                return faulty(fault, KVT_ERR_CORRUPT, table[i].kind, "it does not decompress", 0,
                              0);
            if (status != KVT_OK)
                return status;
        }
        text = kvt_snap_check(&shapes[i], *streams + done);
        if (text)
            return faulty(fault, KVT_ERR_CORRUPT, 0, text, 0, 0);
        at += table[i].stored_bytes;
        done += shapes[i].bytes;
    }
    if (n) {
        const char *text = kvt_snap_check_rows(shapes, n, *streams);
        if (text)
            return faulty(fault, KVT_ERR_CORRUPT, 0, text, 0, 0);
    }
    return KVT_OK;
}
