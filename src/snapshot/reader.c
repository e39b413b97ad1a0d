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
#include "src/snapshot/parser.h"

#include <stdio.h>

/*
 * Buffers that grow hold old and new at once for a moment, one of them at a time: what that adds
 * at most to a buffer of `bytes`. One that is filled again may have any smaller size before.
 */
static uint64_t growth(uint64_t bytes, int refilled)
{
    uint64_t step = KVT_SNAP_STEP_BYTES;

    if (bytes <= KVT_SNAP_STEP_BYTES)
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
    uint64_t table = header->n_blocks * KVT_SNAP_ENTRY_BYTES, payload, index = KVT_SNAP_INDEX_BYTES,
             extra;

    if (header->n_tokens < ids)
        ids = header->n_tokens;
    if (native < 4 * ids)
        native = 4 * ids;
    payload = KVT_SNAP_SET_BYTES + KVT_SNAP_MAX_STREAMS * KVT_SNAP_STREAM_BYTES +
              KVT_SNAP_SUM_BYTES + native + 7;
    while (index < (3 * chunks + 2 + header->n_blocks) * KVT_SNAP_ENTRY_BYTES)
        index *= 2;
    extra = index > KVT_SNAP_INDEX_BYTES ? index / 2 : 0;
    if (growth(table, 0) > extra)
        extra = growth(table, 0);
    if (growth(payload, 1) > extra)
        extra = growth(payload, 1);
    return kvt_snap_counted(payload) + kvt_snap_counted(native) + kvt_snap_counted(table) + index +
           kvt_snap_counted(KVT_SNAP_ID_HEAD + header->n_layers * (uint64_t)KVT_SNAP_ID_BYTES) +
           kvt_snap_counted(extra) + kvt_snap_decode_bytes(header);
}

/* ---- the parts of a snapshot ---- */

static kvt_status read_header(kvt_snap_parser *p)
{
    unsigned char bytes[KVT_SNAP_HEADER_MAX];
    size_t n;
    kvt_status status;

    (void)snprintf(p->place, sizeof p->place, "header");
    status = kvt_snap_take(p, bytes, KVT_SNAP_MAGIC_BYTES);
    if (status == KVT_OK && memcmp(bytes, KVT_SNAP_MAGIC, KVT_SNAP_MAGIC_BYTES) != 0)
        return kvt_snap_fail(p->context, KVT_ERR_FORMAT, "not a kvtile snapshot");
    if (status == KVT_OK)
        status = kvt_snap_take(p, bytes + KVT_SNAP_MAGIC_BYTES,
                               KVT_SNAP_FIXED_BYTES - KVT_SNAP_MAGIC_BYTES);
    if (status == KVT_OK)
        status = kvt_snap_header_begin(p->context, bytes, p->header, &n);
    if (status == KVT_OK)
        status = kvt_snap_take(p, bytes + KVT_SNAP_FIXED_BYTES, n - KVT_SNAP_FIXED_BYTES);
    if (status == KVT_OK)
        status = kvt_snap_header_get(p->context, bytes, n, p->header);
    if (status == KVT_OK && p->sink->header)
        status = p->sink->header(p->sink->user, p->header);
    return status;
}

/* The sequence section, if there is one. */
static kvt_status read_sequence(kvt_snap_parser *p)
{
    unsigned char bytes[KVT_SNAP_STATE_BYTES + KVT_MAX_TAG + KVT_SNAP_SUM_BYTES] = {0};
    int32_t next_position = -1;
    uint32_t tag_bytes = 0, i;
    unsigned char any = 0;
    size_t end;
    kvt_snap_section s;
    kvt_status status =
        kvt_snap_peek(p, p->header->n_tokens ? KVT_SNAP_TOKEN_IDS : KVT_SNAP_BLOCK_TABLE, 0);

    if (status == KVT_OK && p->next.type == KVT_SNAP_SEQUENCE) {
        status = kvt_snap_expect(p, KVT_SNAP_SEQUENCE, 0, &s);
        if (status != KVT_OK)
            return status;
        if (s.bytes < KVT_SNAP_STATE_BYTES + KVT_SNAP_SUM_BYTES || s.bytes > sizeof bytes ||
            s.bytes % 8)
            return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
        status = kvt_snap_take(p, bytes, (size_t)s.bytes);
        if (status != KVT_OK)
            return status;
        end = (size_t)s.bytes - KVT_SNAP_SUM_BYTES;
        if (!kvt_snap_same_sum(kvt_get64(bytes + end), kvt_snap_sum(bytes, end)))
            return kvt_snap_corrupt(p, "checksum of its payload");
        memcpy(&next_position, bytes, 4);
        tag_bytes = kvt_get32(bytes + 4);
        if (tag_bytes > KVT_MAX_TAG ||
            end != kvt_round_up(KVT_SNAP_STATE_BYTES + (size_t)tag_bytes, 8))
            return kvt_snap_corrupt(p, "a tag of %u bytes", (unsigned)tag_bytes);
        for (i = KVT_SNAP_STATE_BYTES + tag_bytes; i < end; i++)
            any |= bytes[i];
        if (any || next_position < -1 || (next_position == -1 && tag_bytes == 0))
            return kvt_snap_corrupt(p, "its next position, or padding");
        status = kvt_snap_note(p, &s);
    }
    if (status == KVT_OK && p->sink->sequence)
        status = p->sink->sequence(p->sink->user, next_position, bytes + KVT_SNAP_STATE_BYTES,
                                   tag_bytes);
    return status;
}

static kvt_status read_tokens(kvt_snap_parser *p, uint32_t type, uint32_t kind)
{
    uint64_t first;

    for (first = 0; first < p->header->n_tokens; first += KVT_SNAP_CHUNK_TOKENS) {
        uint64_t left = p->header->n_tokens - first;
        uint32_t n = left < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)left : KVT_SNAP_CHUNK_TOKENS;
        kvt_snap_shape shape;
        const unsigned char *native;
        kvt_snap_section s;
        kvt_status status = kvt_snap_expect(p, type, first, &s);

        memset(&shape, 0, sizeof shape);
        shape.kind = kind;
        shape.element = 4;
        shape.bits = 32;
        shape.bytes = n * (size_t)4;
        if (status == KVT_OK)
            status = kvt_snap_take_set(p, &s, &shape, 1, shape.bytes, &native);
        if (status == KVT_OK)
            status = kvt_snap_note(p, &s);
        if (status == KVT_OK && p->sink->tokens)
            status = p->sink->tokens(p->sink->user, kind, first, n, native);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

static unsigned char *entry_at(const kvt_snap_parser *p, uint64_t b)
{
    return p->table.data + b * KVT_SNAP_ENTRY_BYTES;
}

/* What holds for any entry but its place. */
static kvt_status check_form(kvt_snap_parser *p, uint64_t b, uint32_t group)
{
    uint32_t form = kvt_get32(entry_at(p, b) + 28);

    if (form >= KVT_FORMS)
        return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                             "snapshot with a block of representation %u, which this build "
                             "does not know",
                             (unsigned)form);
    if (!kvt_snap_has_form(&p->header->groups[group], form))
        return kvt_snap_corrupt(p, "entry %llu is %s, in a group that has no %s",
                                (unsigned long long)b,
                                form == KVT_FINE       ? "fine"
                                : form == KVT_REOPENED ? "open again"
                                                       : "open",
                                form == KVT_FINE       ? "i4 or i5"
                                : form == KVT_REOPENED ? "i4 keys"
                                                       : "i8, i4 or i5");
    p->counts.n_open_blocks += (uint64_t)kvt_is_open(form);
    return KVT_OK;
}

/*
 * The sequence's own entries: every row but those that a window has released, which are one run
 * behind the sinks and before the last row, all sealed before it.
 */
static kvt_status check_own(kvt_snap_parser *p)
{
    uint32_t forms[KVT_MAX_GROUPS] = {KVT_SEALED}, n_groups = p->header->n_groups, g;
    uint64_t rows = kvt_rows(p->header->n_tokens), b = 0, row;

    p->runs.n_groups = n_groups;
    for (g = 0; g < n_groups; g++)
        p->runs.sinks[g] = p->runs.first[g] = kvt_snap_sink_rows(&p->header->groups[g]);
    for (row = 0; row < rows; row++)
        for (g = 0; g < n_groups; g++) {
            const unsigned char *entry = entry_at(p, b);
            kvt_status status;
            uint32_t form;
            if (b == p->header->n_blocks || kvt_get32(entry + 16) != g ||
                kvt_get32(entry + 20) != row) {
                if (!p->header->groups[g].window_tokens || p->runs.first[g] != row ||
                    row + 1 == rows || kvt_is_open(forms[g]))
                    return kvt_snap_corrupt(p, "entry %llu, row %llu of group %u is missing",
                                            (unsigned long long)b, (unsigned long long)row,
                                            (unsigned)g);
                p->runs.first[g] = row + 1;
                p->own_sealed[g] = row + 1;
                continue;
            }
            status = check_form(p, b, g);
            if (status != KVT_OK)
                return status;
            form = kvt_get32(entry + 28);
            if (!kvt_is_open(form) &&
                kvt_is_open(forms[g])) /* open blocks follow the sealed ones */
                return kvt_snap_corrupt(p, "entry %llu is sealed, behind an open one",
                                        (unsigned long long)b);
            forms[g] = form;
            if (!kvt_is_open(form))
                p->own_sealed[g] = row + 1;
            if (kvt_get32(entry + 24) != kvt_snap_row_tokens(p->header->n_tokens, row))
                return kvt_snap_corrupt(p, "entry %llu", (unsigned long long)b);
            b++;
        }
    p->n_own = b;
    return KVT_OK;
}

/* The entries behind them, which checkpoints have. */
static kvt_status check_extras(kvt_snap_parser *p)
{
    uint64_t rows = kvt_rows(p->header->n_tokens), b;

    for (b = p->n_own; b < p->header->n_blocks; b++) {
        const unsigned char *entry = entry_at(p, b);
        uint32_t group = kvt_get32(entry + 16), row = kvt_get32(entry + 20);
        uint32_t tokens = kvt_get32(entry + 24);
        kvt_status status;
        if (group >= p->header->n_groups || row >= rows || tokens < 1 || tokens > KVT_TOKENS)
            return kvt_snap_corrupt(p, "entry %llu", (unsigned long long)b);
        status = check_form(p, b, group);
        if (status != KVT_OK)
            return status;
        if (kvt_snap_has_row(&p->runs, row, group) &&
            memcmp(entry, entry_at(p, kvt_snap_own_entry(&p->runs, row, group)),
                   KVT_SNAP_ENTRY_BYTES) == 0)
            return kvt_snap_corrupt(p, "entry %llu is there twice", (unsigned long long)b);
    }
    return KVT_OK;
}

static kvt_status read_block_table(kvt_snap_parser *p)
{
    uint64_t bytes = p->header->n_blocks * KVT_SNAP_ENTRY_BYTES;
    unsigned char sum[KVT_SNAP_SUM_BYTES];
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_BLOCK_TABLE, 0, &s);

    if (status != KVT_OK)
        return status;
    if (s.bytes != bytes + KVT_SNAP_SUM_BYTES)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    if (bytes > SIZE_MAX / 2) /* where pointers have 32 bits */
        return kvt_snap_fail(p->context, KVT_ERR_LIMIT,
                             "a snapshot's block table of %llu bytes is more than this machine can "
                             "address",
                             (unsigned long long)bytes);
    status = kvt_snap_take_growing(p, &p->table, 0, (size_t)bytes, "a snapshot's block table");
    if (status == KVT_OK)
        status = kvt_snap_take(p, sum, sizeof sum);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(sum), kvt_snap_sum(p->table.data, (size_t)bytes)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    status = check_own(p);
    if (status == KVT_OK)
        status = check_extras(p);
    return status == KVT_OK ? kvt_snap_note(p, &s) : status;
}

static kvt_status read_block(kvt_snap_parser *p, uint64_t b)
{
    const unsigned char *entry = entry_at(p, b), *native = NULL;
    kvt_snap_block at = {b < p->n_own ? 0 : b - p->n_own + 1, kvt_get32(entry + 20),
                         kvt_get32(entry + 16), kvt_get32(entry + 28), kvt_get32(entry + 24)};
    const kvt_snapshot_group *geometry = &p->header->groups[at.group];
    unsigned char bytes[KVT_SNAP_BLOCK_BYTES], id[KVT_SNAP_ID_BYTES];
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    size_t native_bytes;
    uint32_t n = kvt_snap_shapes(geometry, at.form, at.tokens, shapes, &native_bytes), layer;
    uint32_t v_dim = geometry->flags & KVT_GROUP_V_IN_K ? 0 : geometry->v_dim;
    kvt_snap_section block, s;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_BLOCK, b, &block);

    if (status != KVT_OK)
        return status;
    if (block.bytes != sizeof bytes)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)block.bytes);
    status = kvt_snap_take(p, bytes, sizeof bytes);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(bytes + 40), kvt_snap_sum(bytes, 40)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    if (memcmp(bytes, entry, KVT_SNAP_ENTRY_BYTES) != 0)
        return kvt_snap_corrupt(p, "it is not the block that the block table lists");
    if (kvt_get32(bytes + 32) != geometry->n_layers || kvt_get32(bytes + 36))
        return kvt_snap_corrupt(p, "%u layers where %u belong", (unsigned)kvt_get32(bytes + 32),
                                (unsigned)geometry->n_layers);
    for (layer = 0; layer < geometry->n_layers; layer++) {
        status = kvt_snap_expect(p, KVT_SNAP_LAYER, layer, &s);
        if (status != KVT_OK)
            return status;
        (void)snprintf(p->place, sizeof p->place,
                       "block %llu (group %u, tokens from %llu), layer %u", (unsigned long long)b,
                       (unsigned)at.group, (unsigned long long)at.row * KVT_TOKENS,
                       (unsigned)layer);
        status = kvt_snap_take_set(p, &s, shapes, n, native_bytes, &native);
        if (status != KVT_OK)
            return status;
        p->counts.native_bytes += native_bytes;
        p->counts.n_elements +=
            (uint64_t)geometry->n_kv_heads * (geometry->k_dim + v_dim) * at.tokens;
        kvt_snap_digest(native, native_bytes,
                        p->digests.data + KVT_SNAP_ID_HEAD + layer * (size_t)KVT_SNAP_ID_BYTES);
        if (p->sink->layer)
            status = p->sink->layer(p->sink->user, &at, layer, native);
        if (status != KVT_OK)
            return status;
    }
    memcpy(p->digests.data, entry + KVT_SNAP_ENTRY_BYTES - KVT_SNAP_ID_HEAD, KVT_SNAP_ID_HEAD);
    kvt_snap_digest(p->digests.data,
                    KVT_SNAP_ID_HEAD + geometry->n_layers * (size_t)KVT_SNAP_ID_BYTES, id);
#ifndef KVT_FUZZING
    if (memcmp(id, entry, KVT_SNAP_ID_BYTES) != 0)
        return kvt_snap_corrupt(p, "the block's bytes do not make its id");
#endif
    return kvt_snap_note(p, &block);
}

/* Those that there are, and that they name all blocks that are only theirs. */
static kvt_status read_checkpoints(kvt_snap_parser *p)
{
    kvt_status status = kvt_snap_peek(p, KVT_SNAP_INDEX, 0);

    while (status == KVT_OK && p->next.type == KVT_SNAP_CHECKPOINT) {
        status = kvt_snap_take_checkpoint(p);
        if (status == KVT_OK)
            status = kvt_snap_peek(p, KVT_SNAP_INDEX, 0);
    }
    if (status == KVT_OK && p->n_own + p->n_named != p->header->n_blocks)
        return kvt_snap_corrupt(p, "the block table has blocks of no checkpoint");
    return status;
}

static kvt_status read_index_and_end(kvt_snap_parser *p)
{
    unsigned char entry[KVT_SNAP_ENTRY_BYTES], end[KVT_SNAP_END_BYTES];
    uint64_t index_offset;
    size_t at;
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_INDEX, 0, &s);

    if (status != KVT_OK)
        return status;
    index_offset = s.offset;
    if (s.bytes != p->index_bytes + KVT_SNAP_SUM_BYTES)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    for (at = 0; at < p->index_bytes; at += sizeof entry) {
        status = kvt_snap_take(p, entry, sizeof entry);
        if (status != KVT_OK)
            return status;
        if (memcmp(entry, p->index.data + at, sizeof entry) != 0)
            return kvt_snap_corrupt(p, "entry %zu is not where the file has it", at / sizeof entry);
    }
    status = kvt_snap_take(p, entry, KVT_SNAP_SUM_BYTES);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(entry), kvt_snap_sum(p->index.data, p->index_bytes)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    status = kvt_snap_expect(p, KVT_SNAP_END, 0, &s);
    if (status != KVT_OK)
        return status;
    if (s.bytes != sizeof end)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    status = kvt_snap_take(p, end, sizeof end);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(end + 16), kvt_snap_sum(end, 16)) ||
        kvt_get64(end) != index_offset || kvt_get64(end + 8) != p->offset ||
        memcmp(end + 24, KVT_SNAP_FOOTER, KVT_SNAP_MAGIC_BYTES) != 0)
        return kvt_snap_corrupt(p, "the footer");
    return KVT_OK;
}

static kvt_status read_body(kvt_snap_parser *p)
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
    if (status == KVT_OK && (p->header->flags & KVT_SNAP_MOVED))
        status = read_tokens(p, KVT_SNAP_SHIFTS, KVT_SNAP_KIND_SHIFTS);
    if (status == KVT_OK)
        status = read_block_table(p);
    for (b = 0; status == KVT_OK && b < p->header->n_blocks; b++)
        status = read_block(p, b);
    if (status == KVT_OK)
        status = read_checkpoints(p);
    if (status == KVT_OK)
        status = read_index_and_end(p);
    return status;
}

kvt_status kvt_snap_read(const kvt_snap_context *context, const kvt_reader *reader,
                         uint64_t remaining, int header_only, const kvt_snap_sink *sink,
                         kvt_snap_header *header, kvt_snap_counts *counts)
{
    kvt_snap_parser p;
    kvt_status status;

    memset(&p, 0, sizeof p);
    p.context = context;
    p.reader = reader;
    p.sink = sink;
    p.header = header;
    p.remaining = remaining;
    kvt_snap_codec_init(&p.codec, context);
    status = read_header(&p);
    if (status == KVT_OK)
        status = read_sequence(&p);
    if (status == KVT_OK && !header_only)
        status = read_body(&p);
    p.counts.file_bytes = p.offset;
    if (status == KVT_OK && counts)
        *counts = p.counts;
    kvt_snap_codec_release(&p.codec);
    kvt_snap_release(context, &p.payload);
    kvt_snap_release(context, &p.native);
    kvt_snap_release(context, &p.table);
    kvt_snap_release(context, &p.index);
    kvt_snap_release(context, &p.digests);
    return status;
}
