/*
 * Save a sequence: the parts of a snapshot, front to back, never seeking.
 *
 * Header, parent, tag, pieces, token ids, positions, block table, blocks (blocks_out.c),
 * checkpoints (checkpoints.c), index, end. The block table stands before the blocks, so that a
 * reader of a stream knows what will come; it has ids of those alone that a parent has, since an id
 * is known when a block has been hashed, which is done while it is written. Ids of blocks that have
 * not changed since they were hashed are remembered by the cache.
 */
#include "src/snapshot/saver.h"

#define OUT_BYTES ((size_t)1 << 16) /* small pieces are collected up to this before a write */

/* ---- bytes ---- */

kvt_status kvt_snap_written(const kvt_snap_saver *s, int answer)
{
    if (!answer)
        return KVT_OK;
    return kvt_snap_fail(s->context, KVT_ERR_IO,
                         "writing a snapshot failed before offset %llu: write answered %d",
                         (unsigned long long)s->offset, answer);
}

int kvt_snap_write_collected(kvt_snap_saver *s)
{
    size_t n = s->n_parts;

    s->n_parts = s->parts_bytes = s->out_bytes = 0;
    return s->output.write_parts(s->output.writer->user, s->parts, n);
}

static kvt_status write_bytes(kvt_snap_saver *s, const void *data, size_t bytes)
{
    return kvt_snap_written(s, s->output.writer->write(s->output.writer->user, data, bytes));
}

/* What is collected. */
static kvt_status flush(kvt_snap_saver *s)
{
    size_t n = s->n_parts, i;
    kvt_status status = KVT_OK;

    if (n && s->output.write_parts)
        return kvt_snap_written(s, kvt_snap_write_collected(s));
    s->n_parts = s->parts_bytes = s->out_bytes = 0;
    for (i = 0; status == KVT_OK && i < n; i++)
        status = write_bytes(s, s->parts[i].data, s->parts[i].bytes);
    return status;
}

/* One more part to collect; one that continues the last one is it. */
static kvt_status collect(kvt_snap_saver *s, const unsigned char *data, size_t bytes)
{
    kvt_snap_part *last = s->n_parts ? &s->parts[s->n_parts - 1] : NULL;

    s->parts_bytes += bytes;
    if (last && (const unsigned char *)last->data + last->bytes == data) {
        last->bytes += bytes;
    } else {
        s->parts[s->n_parts].data = data;
        s->parts[s->n_parts++].bytes = bytes;
    }
    return s->parts_bytes >= (s->writes_beside ? 2 * KVT_SNAP_WRITE_BYTES : KVT_SNAP_WRITE_BYTES) ||
                   s->n_parts == KVT_SNAP_PARTS
               ? flush(s)
               : KVT_OK;
}

unsigned char *kvt_snap_put_room(kvt_snap_saver *s, uint64_t bytes)
{
    unsigned char *to = s->output.memory + s->offset;
    if (bytes > s->output.room - s->offset) {
        (void)kvt_snap_fail(s->context, KVT_ERR_FULL,
                            "save: the memory of %zu bytes is too small (kvt_seq_save_bound)",
                            s->output.room);
        return NULL;
    }
    s->offset += bytes;
    return to;
}

static kvt_status put_memory(kvt_snap_saver *s, const void *data, size_t bytes)
{
    unsigned char *to = kvt_snap_put_room(s, bytes);
    if (to)
        memcpy(to, data, bytes);
    return to ? KVT_OK : KVT_ERR_FULL;
}

kvt_status kvt_snap_put(kvt_snap_saver *s, const void *data, size_t bytes)
{
    kvt_status status = KVT_OK;
    unsigned char *to;

    if (!bytes)
        return KVT_OK;
    if (!s->output.writer)
        return put_memory(s, data, bytes);
    s->offset += bytes;
    if (bytes > OUT_BYTES - s->out_bytes)
        status = flush(s);
    if (status != KVT_OK)
        return status;
    if (bytes >= OUT_BYTES) { /* it may change: at once */
        status = collect(s, data, bytes);
        return status == KVT_OK ? flush(s) : status;
    }
    to = s->out.data + s->out_bytes;
    memcpy(to, data, bytes);
    s->out_bytes += bytes;
    return collect(s, to, bytes);
}

kvt_status kvt_snap_put_kept(kvt_snap_saver *s, const void *data, size_t bytes)
{
    if (!s->output.writer)
        return put_memory(s, data, bytes);
    s->offset += bytes;
    return collect(s, data, bytes);
}

/* ---- sections ---- */

void kvt_snap_make_head(unsigned char *head, uint32_t type, uint64_t bytes, uint64_t value)
{
    kvt_put32(head, type);
    kvt_put32(head + 4, type == KVT_SNAP_PIECE ? 0 : KVT_SNAP_REQUIRED);
    kvt_put64(head + 8, bytes);
    kvt_put64(head + 16, value);
    kvt_put64(head + 24, kvt_snap_sum(head, 24));
}

kvt_status kvt_snap_put_head(kvt_snap_saver *s, uint32_t type, uint64_t bytes, uint64_t value)
{
    unsigned char head[KVT_SNAP_SECTION_BYTES];
    kvt_snap_make_head(head, type, bytes, value);
    return kvt_snap_put(s, head, sizeof head);
}

kvt_status kvt_snap_put_summed(kvt_snap_saver *s, const void *data, size_t bytes,
                               unsigned char *digest)
{
    unsigned char sum[KVT_SNAP_SUM_BYTES];
    kvt_status status = kvt_snap_put(s, data, bytes);
    kvt_put64(sum, kvt_snap_sum(data, bytes));
    if (digest)
        kvt_snap_digest(data, bytes, digest);
    return status == KVT_OK ? kvt_snap_put(s, sum, sizeof sum) : status;
}

void kvt_snap_put_note(kvt_snap_saver *s, uint32_t type, uint64_t value, uint64_t offset,
                       const unsigned char *digest)
{
    unsigned char *entry = s->index.data + s->index_bytes;
    kvt_put32(entry, type);
    kvt_put32(entry + 4, 0);
    kvt_put64(entry + 8, value);
    kvt_put64(entry + 16, offset);
    kvt_put64(entry + 24, s->offset - offset);
    memcpy(entry + 32, digest, KVT_SNAP_ID_BYTES);
    s->index_bytes += KVT_SNAP_NOTE_BYTES;
}

kvt_status kvt_snap_make_set(kvt_snap_codec *codec, uint32_t type, uint64_t value,
                             const kvt_snap_shape *shapes, uint32_t n, const unsigned char *native,
                             unsigned char *to, size_t *bytes)
{
    unsigned char *set = to + KVT_SNAP_SECTION_BYTES, *entry = set + KVT_SNAP_SET_BYTES;
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES;
    size_t at = table + KVT_SNAP_SUM_BYTES, end;
    uint32_t i;

    kvt_put32(set, n);
    kvt_put32(set + 4, 0);
    for (i = 0; i < n; i++, entry += KVT_SNAP_STREAM_BYTES) {
        kvt_snap_stream stream;
        kvt_status status = kvt_snap_encode(codec, &shapes[i], native, set + at, &stream);
        if (status != KVT_OK)
            return status;
        entry[0] = (unsigned char)stream.kind;
        entry[1] = (unsigned char)(stream.kind >> 8);
        entry[2] = (unsigned char)stream.filter;
        entry[3] = (unsigned char)stream.codec;
        kvt_put32(entry + 4, stream.stored_bytes);
        kvt_put32(entry + 8, stream.native_bytes);
        kvt_put32(entry + 12, 0);
        kvt_put64(entry + 16, stream.sum);
        at += stream.stored_bytes;
        native += shapes[i].bytes;
    }
    kvt_put64(set + table, kvt_snap_sum(set, table));
    end = kvt_round_up(at, 8);
    memset(set + at, 0, end - at);
    kvt_snap_make_head(to, type, end, value);
    *bytes = KVT_SNAP_SECTION_BYTES + end;
    return KVT_OK;
}

/* ---- the parts before the blocks ---- */

static kvt_status put_header(kvt_snap_saver *s)
{
    unsigned char bytes[KVT_SNAP_HEADER_MAX];
    kvt_snap_header_put(s->header, bytes);
    return kvt_snap_put(s, bytes, kvt_snap_header_bytes(s->header));
}

/* A section whose payload is here, but for its checksum. */
static kvt_status put_section(kvt_snap_saver *s, uint32_t type, uint64_t value, const void *payload,
                              size_t bytes)
{
    unsigned char digest[KVT_SNAP_ID_BYTES];
    uint64_t offset = s->offset;
    kvt_status status = kvt_snap_put_head(s, type, (uint64_t)bytes + KVT_SNAP_SUM_BYTES, value);

    if (status == KVT_OK)
        status = kvt_snap_put_summed(s, payload, bytes, digest);
    if (status == KVT_OK)
        kvt_snap_put_note(s, type, value, offset, digest);
    return status;
}

static kvt_status put_parent(kvt_snap_saver *s)
{
    unsigned char payload[KVT_SNAP_PARENT_BYTES + KVT_SNAP_NAME_MAX + 1] = {0};
    const kvt_snap_parent *parent = &s->parent;

    if (!s->chain)
        return KVT_OK;
    memcpy(payload, parent->id, sizeof parent->id);
    kvt_put64(payload + 16, parent->inherited);
    kvt_put32(payload + 24, parent->depth);
    kvt_put32(payload + 28, parent->name_bytes);
    memcpy(payload + KVT_SNAP_PARENT_BYTES, parent->name, parent->name_bytes);
    return put_section(s, KVT_SNAP_PARENT, 0, payload,
                       kvt_round_up(KVT_SNAP_PARENT_BYTES + (size_t)parent->name_bytes, 8));
}

/* The next position that was set, and the tag; nothing where there is neither. */
static kvt_status put_sequence(kvt_snap_saver *s)
{
    unsigned char payload[KVT_SNAP_STATE_BYTES + KVT_MAX_TAG] = {0};
    /* What was set is of the token behind the last one. */
    int whole = s->first_row * KVT_TOKENS + s->header->n_tokens == s->seq->length;
    int32_t next_position = whole ? s->seq->next_position : -1;

    if (next_position < 0 && !s->seq->tag_bytes)
        return KVT_OK;
    kvt_put32(payload, (uint32_t)next_position);
    kvt_put32(payload + 4, s->seq->tag_bytes);
    memcpy(payload + KVT_SNAP_STATE_BYTES, s->seq->tag, s->seq->tag_bytes);
    return put_section(s, KVT_SNAP_SEQUENCE, 0, payload,
                       kvt_round_up(KVT_SNAP_STATE_BYTES + (size_t)s->seq->tag_bytes, 8));
}

kvt_status kvt_snap_put_part(kvt_snap_saver *s, kvt_snap_summer *summer, const void *data,
                             size_t bytes, size_t room)
{
    static const unsigned char zeros[8];
    kvt_status status = kvt_snap_put(s, data, bytes);
    if (status == KVT_OK)
        status = kvt_snap_put(s, zeros, room - bytes);
    kvt_snap_summer_add(summer, data, bytes);
    kvt_snap_summer_add(summer, zeros, room - bytes);
    return status;
}

kvt_status kvt_snap_put_parts_end(kvt_snap_saver *s, const kvt_snap_summer *summer, uint32_t type,
                                  uint64_t value, uint64_t offset)
{
    unsigned char sum[KVT_SNAP_SUM_BYTES], digest[KVT_SNAP_ID_BYTES];
    kvt_status status;

    kvt_put64(sum, kvt_snap_summer_sum(summer));
    kvt_snap_summer_digest(summer, digest);
    status = kvt_snap_put(s, sum, sizeof sum);
    if (status == KVT_OK)
        kvt_snap_put_note(s, type, value, offset, digest);
    return status;
}

static kvt_status put_pieces(kvt_snap_saver *s)
{
    kvt_status status = KVT_OK;
    size_t i;

    for (i = 0; status == KVT_OK && i < s->options->n_pieces; i++) {
        const kvt_snapshot_piece *piece = &s->options->pieces[i];
        size_t name = strlen(piece->name), name_room = kvt_round_up(name, 8);
        size_t room = kvt_round_up(piece->bytes, 8);
        unsigned char head[KVT_SNAP_PIECE_BYTES];
        uint64_t offset = s->offset;
        kvt_snap_summer summer;

        kvt_put32(head, (uint32_t)name);
        kvt_put32(head + 4, 0);
        kvt_put64(head + 8, piece->bytes);
        kvt_snap_summer_init(&summer);
        status = kvt_snap_put_head(
            s, KVT_SNAP_PIECE, sizeof head + name_room + (uint64_t)room + KVT_SNAP_SUM_BYTES, i);
        if (status == KVT_OK)
            status = kvt_snap_put_part(s, &summer, head, sizeof head, sizeof head);
        if (status == KVT_OK)
            status = kvt_snap_put_part(s, &summer, piece->name, name, name_room);
        if (status == KVT_OK)
            status = kvt_snap_put_part(s, &summer, piece->data, piece->bytes, room);
        if (status == KVT_OK)
            status = kvt_snap_put_parts_end(s, &summer, KVT_SNAP_PIECE, i, offset);
    }
    return status;
}

/* n integers of the file's tokens from `first` on. */
static void take_tokens(const kvt_snap_saver *s, uint32_t kind, uint64_t first, uint32_t n,
                        unsigned char *to)
{
    uint32_t i, here;

    for (i = 0; i < n; i += here) {
        uint64_t token = first + i;
        const kvt_meta *meta = kvt_seq_meta(s->seq, s->first_row + (size_t)(token / KVT_TOKENS));
        uint32_t slot = (uint32_t)(token % KVT_TOKENS), t;
        unsigned char *at = to + i * (size_t)4;
        here = KVT_TOKENS - slot < n - i ? KVT_TOKENS - slot : n - i;
        if (kind == KVT_SNAP_KIND_SHIFTS)
            for (t = 0; t < here; t++)
                kvt_put32(at + t * (size_t)4, (uint32_t)kvt_shift_at(meta, slot + t));
        else
            memcpy(at, (kind == KVT_SNAP_KIND_POSITIONS ? meta->positions : meta->token_ids) + slot,
                   here * (size_t)4);
    }
}

static uint32_t chunk_of(uint64_t first, uint64_t end)
{
    return end - first < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)(end - first) : KVT_SNAP_CHUNK_TOKENS;
}

/* How many of the first tokens the parent has with the same ids, positions and shifts. */
static kvt_status find_inherited(kvt_snap_saver *s)
{
    static const uint32_t kinds[] = {KVT_SNAP_KIND_TOKEN_IDS, KVT_SNAP_KIND_POSITIONS,
                                     KVT_SNAP_KIND_SHIFTS};
    const size_t half = KVT_SNAP_CHUNK_TOKENS * (size_t)4;
    uint64_t end = kvt_snap_chain_n_tokens(s->chain), first;
    size_t k;

    if (end > s->header->n_tokens)
        end = s->header->n_tokens;
    for (k = 0; k < sizeof kinds / sizeof *kinds; k++)
        for (first = 0; first < end; first += KVT_SNAP_CHUNK_TOKENS) {
            uint32_t n = chunk_of(first, end), i;
            unsigned char *here = s->native_ids.data, *there = here + half;
            kvt_status status = kvt_snap_chain_tokens(s->chain, kinds[k], first, n, there);
            if (status != KVT_OK)
                return status;
            take_tokens(s, kinds[k], first, n, here);
            for (i = 0; i < n && kvt_get32(here + 4 * i) == kvt_get32(there + 4 * i); i++)
                ;
            if (i < n)
                end = first + i;
        }
    s->parent.inherited = end;
    return KVT_OK;
}

static kvt_status put_tokens(kvt_snap_saver *s, uint32_t type, uint32_t kind)
{
    uint64_t first, offset;

    for (first = s->parent.inherited; first < s->header->n_tokens; first += KVT_SNAP_CHUNK_TOKENS) {
        uint32_t n = chunk_of(first, s->header->n_tokens);
        unsigned char digest[KVT_SNAP_ID_BYTES];
        kvt_snap_shape shape;
        kvt_status status;
        size_t bytes;

        memset(&shape, 0, sizeof shape);
        shape.kind = kind;
        shape.element = 4;
        shape.bits = 32;
        shape.bytes = n * (size_t)4;
        take_tokens(s, kind, first, n, s->native_ids.data);
        kvt_snap_digest(s->native_ids.data, shape.bytes, digest);
        offset = s->offset;
        status = kvt_snap_make_set(&s->jobs.jobs[0].codec, type, first, &shape, 1,
                                   s->native_ids.data, s->stored.data, &bytes);
        if (status == KVT_OK)
            status = kvt_snap_put(s, s->stored.data, bytes);
        if (status != KVT_OK)
            return status;
        kvt_snap_put_note(s, type, first, offset, digest);
    }
    return KVT_OK;
}

/*
 * The entries of the sequence's own blocks. A block with tokens behind the end of every parent is
 * in none of them: its contents are read once, when it is written, and not for its id before.
 */
static kvt_status make_own_entries(kvt_snap_saver *s)
{
    unsigned char *entry = s->table.data;
    uint64_t row, longest = s->chain ? kvt_snap_chain_longest(s->chain) : 0;
    uint32_t g;

    for (row = 0; row < kvt_rows(s->header->n_tokens); row++)
        for (g = 0; g < s->header->n_groups; g++) {
            const kvt_block *block = kvt_snap_own_block(s, row, g);
            uint32_t tokens = kvt_snap_row_tokens(s->header->n_tokens, row);
            unsigned char id[KVT_SNAP_ID_BYTES];
            int there = 0;
            if (!block)
                continue;
            if (row * KVT_TOKENS + tokens <= longest) {
                kvt_status status = kvt_snap_id_of(s, block, row, g, tokens, id);
                if (status != KVT_OK)
                    return status;
                there = kvt_snap_chain_has(s->chain, id);
            }
            kvt_snap_make_entry(s, block, row, g, tokens, there ? id : NULL, entry);
            entry += KVT_SNAP_ENTRY_BYTES;
        }
    return KVT_OK;
}

/* ---- blocks, and the parts behind them ---- */

static kvt_status put_blocks(kvt_snap_saver *s)
{
    const kvt_snap_extra *extras = (const kvt_snap_extra *)(void *)s->extras.data;
    uint64_t row, b = 0;
    kvt_status status = KVT_OK;
    uint32_t g, i;

    for (row = 0; row < kvt_rows(s->header->n_tokens); row++)
        for (g = 0; status == KVT_OK && g < s->header->n_groups; g++)
            if (kvt_snap_has_row(&s->runs, row, g))
                status = kvt_snap_put_block(s, b++, kvt_snap_own_block(s, row, g));
    for (i = 0; status == KVT_OK && i < s->n_extras; i++)
        status = kvt_snap_put_block(s, b++, extras[i].block);
    return status;
}

/* The snapshot's id, of its header and its index. */
static void make_snapshot_id(const kvt_snap_saver *s, unsigned char *id)
{
    unsigned char header[KVT_SNAP_HEADER_MAX];
    kvt_snap_header_put(s->header, header);
    kvt_snap_make_id(header, kvt_snap_header_bytes(s->header), s->index.data, s->index_bytes, id);
}

static kvt_status put_index_and_end(kvt_snap_saver *s)
{
    unsigned char end[KVT_SNAP_END_BYTES];
    uint64_t offset = s->offset;
    kvt_status status =
        kvt_snap_put_head(s, KVT_SNAP_INDEX, (uint64_t)s->index_bytes + KVT_SNAP_SUM_BYTES, 0);

    if (status == KVT_OK)
        status = kvt_snap_put_summed(s, s->index.data, s->index_bytes, NULL);
    if (status == KVT_OK)
        status = kvt_snap_put_head(s, KVT_SNAP_END, sizeof end, 0);
    if (status != KVT_OK)
        return status;
    kvt_put64(end, offset);
    kvt_put64(end + 8, s->offset + sizeof end);
    make_snapshot_id(s, end + 16);
    kvt_put64(end + 32, kvt_snap_sum(end, 32));
    memcpy(end + 40, KVT_SNAP_FOOTER, KVT_SNAP_MAGIC_BYTES);
    status = kvt_snap_put(s, end, sizeof end);
    return status == KVT_OK && s->output.writer ? flush(s) : status;
}

typedef struct saver_sizes {
    size_t native, stored, digests;
    uint64_t table, index; /* forecast for sequences of any length */
} saver_sizes;

static saver_sizes sizes_of(const kvt_snap_header *header)
{
    uint64_t chunks = (header->n_tokens + KVT_SNAP_CHUNK_TOKENS - 1) / KVT_SNAP_CHUNK_TOKENS;
    saver_sizes z;

    z.native = KVT_SNAP_CHUNK_TOKENS * (size_t)4;
    z.stored = kvt_snap_set_room(z.native);
    z.digests = KVT_SNAP_ID_HEAD + header->n_layers * (size_t)KVT_SNAP_ID_BYTES;
    z.table = header->n_blocks * KVT_SNAP_ENTRY_BYTES;
    z.index = (3 * chunks + 3 + header->n_blocks) * KVT_SNAP_NOTE_BYTES;
    return z;
}

uint64_t kvt_snap_save_bytes(const kvt_snap_header *header, size_t n_jobs)
{
    saver_sizes z = sizes_of(header);
    uint64_t layer = kvt_snap_layer_bytes(header), image = kvt_snap_image_bytes(header);
    uint64_t job = kvt_snap_counted(layer) + kvt_snap_counted(kvt_snap_set_room((size_t)layer)) +
                   kvt_snap_counted(image) + kvt_snap_encode_bytes(header);

    return kvt_snap_counted(sizeof *header) + kvt_snap_counted(OUT_BYTES) +
           kvt_snap_counted(z.native) + kvt_snap_counted(z.stored) + kvt_snap_counted(z.digests) +
           kvt_snap_counted(z.table) + kvt_snap_counted(z.index) +
           kvt_snap_counted(sizeof(kvt_snap_job) * kvt_snap_jobs_room(header, n_jobs)) +
           n_jobs * job;
}

/*
 * All memory but that of layers, so that little is left to fail once bytes have gone out, and the
 * block table.
 */
static kvt_status prepare(kvt_snap_saver *s)
{
    saver_sizes z = sizes_of(s->header);
    kvt_status status = kvt_snap_reserve(s->context, &s->out, 0, OUT_BYTES, "a snapshot's output");

    if (status == KVT_OK) /* twice: find_inherited compares */
        status = kvt_snap_reserve(s->context, &s->native_ids, 0, z.native * (s->chain ? 2 : 1),
                                  "a snapshot's tokens");
    if (status == KVT_OK)
        status = kvt_snap_reserve(s->context, &s->stored, 0, z.stored, "a snapshot's section");
    if (status == KVT_OK)
        status = kvt_snap_reserve(s->context, &s->digests, 0, z.digests, "a snapshot's digests");
    if (status == KVT_OK)
        status =
            kvt_snap_reserve(s->context, &s->table, 0, (size_t)z.table, "a snapshot's block table");
    if (status == KVT_OK && s->chain)
        status = find_inherited(s);
    if (status == KVT_OK)
        status = make_own_entries(s);
    if (status == KVT_OK)
        status = kvt_snap_plan_checkpoints(s);
    if (status == KVT_OK)
        status =
            kvt_snap_reserve(s->context, &s->index, 0,
                             (size_t)sizes_of(s->header).index +
                                 (s->n_checkpoints + s->options->n_pieces) * KVT_SNAP_NOTE_BYTES,
                             "a snapshot's index");
    return status;
}

/* Bytes of images that will be written: for the progress. */
static void count_total(kvt_snap_saver *s)
{
    uint64_t b;

    for (b = 0; b < s->header->n_blocks; b++) {
        const unsigned char *entry = s->table.data + b * KVT_SNAP_ENTRY_BYTES;
        uint32_t group = kvt_get32(entry + 16);
        if (!entry[30])
            s->total += (uint64_t)s->header->groups[group].n_layers *
                        s->stored_as[group]->layouts[entry[28]].layer_bytes;
    }
}

kvt_status kvt_snap_write(kvt_snap_saver *s)
{
    uint64_t rows = 0;
    uint32_t g;
    kvt_status status;

    for (g = 0; g < s->header->n_groups; g++)
        rows += kvt_rows(s->header->n_tokens) - (s->runs.first[g] - s->runs.sinks[g]);
    s->n_own = s->header->n_blocks = rows;
    s->writes_beside = s->native && s->output.write_parts && s->jobs.n > 1;
    status = prepare(s);
    if (status != KVT_OK)
        return status;
    count_total(s);
    status = put_header(s);
    if (status == KVT_OK)
        status = put_parent(s);
    if (status == KVT_OK)
        status = put_sequence(s);
    if (status == KVT_OK)
        status = put_pieces(s);
    if (status == KVT_OK)
        status = put_tokens(s, KVT_SNAP_TOKEN_IDS, KVT_SNAP_KIND_TOKEN_IDS);
    if (status == KVT_OK)
        status = put_tokens(s, KVT_SNAP_POSITIONS, KVT_SNAP_KIND_POSITIONS);
    if (status == KVT_OK && (s->header->flags & KVT_SNAP_MOVED))
        status = put_tokens(s, KVT_SNAP_SHIFTS, KVT_SNAP_KIND_SHIFTS);
    if (status == KVT_OK)
        status = put_section(s, KVT_SNAP_BLOCK_TABLE, 0, s->table.data,
                             (size_t)s->header->n_blocks * KVT_SNAP_ENTRY_BYTES);
    if (status == KVT_OK)
        status = put_blocks(s);
    if (status == KVT_OK)
        status = kvt_snap_put_checkpoints(s);
    if (status == KVT_OK)
        status = put_index_and_end(s);
    return status;
}
