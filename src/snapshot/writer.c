/*
 * Save a sequence.
 *
 * Written in one go, never seeking: header, tag, token ids, positions, block table, blocks,
 * checkpoints, index, end.
 * The block table stands before the blocks and carries their ids, so that a reader of a stream
 * knows what will come; the ids are made in a pass of their own, which reads the cache once and
 * writes nothing. A block goes out layer by layer: gathered without what is dead, filtered and
 * compressed, and handed to the writer together with its head.
 */
#include "src/snapshot/saver.h"

#define OUT_BYTES ((size_t)1 << 16) /* small pieces are collected up to this before a write */

/* ---- bytes ---- */

static kvt_status write_bytes(kvt_snap_saver *s, const void *data, size_t bytes)
{
    int answer = s->writer->write(s->writer->user, data, bytes);
    if (answer)
        return kvt_snap_fail(s->context, KVT_ERR_IO,
                             "writing a snapshot failed before offset %llu: write answered %d",
                             (unsigned long long)s->offset, answer);
    return KVT_OK;
}

static kvt_status flush(kvt_snap_saver *s)
{
    size_t n = s->out_bytes;
    s->out_bytes = 0;
    return n ? write_bytes(s, s->out.data, n) : KVT_OK;
}

kvt_status kvt_snap_put(kvt_snap_saver *s, const void *data, size_t bytes)
{
    kvt_status status = KVT_OK;

    s->offset += bytes;
    if (bytes > OUT_BYTES - s->out_bytes)
        status = flush(s);
    if (status != KVT_OK || !bytes)
        return status;
    if (bytes >= OUT_BYTES)
        return write_bytes(s, data, bytes);
    memcpy(s->out.data + s->out_bytes, data, bytes);
    s->out_bytes += bytes;
    return KVT_OK;
}

/* ---- sections ---- */

static void make_head(unsigned char *head, uint32_t type, uint64_t bytes, uint64_t value)
{
    kvt_put32(head, type);
    kvt_put32(head + 4, KVT_SNAP_REQUIRED);
    kvt_put64(head + 8, bytes);
    kvt_put64(head + 16, value);
    kvt_put64(head + 24, kvt_snap_sum(head, 24));
}

kvt_status kvt_snap_put_head(kvt_snap_saver *s, uint32_t type, uint64_t bytes, uint64_t value)
{
    unsigned char head[KVT_SNAP_SECTION_BYTES];
    make_head(head, type, bytes, value);
    return kvt_snap_put(s, head, sizeof head);
}

/* Payload, and its checksum. */
static kvt_status put_summed(kvt_snap_saver *s, const void *data, size_t bytes)
{
    unsigned char sum[KVT_SNAP_SUM_BYTES];
    kvt_status status = kvt_snap_put(s, data, bytes);
    kvt_put64(sum, kvt_snap_sum(data, bytes));
    return status == KVT_OK ? kvt_snap_put(s, sum, sizeof sum) : status;
}

void kvt_snap_put_note(kvt_snap_saver *s, uint32_t type, uint64_t value, uint64_t offset)
{
    unsigned char *entry = s->index.data + s->index_bytes;
    kvt_put32(entry, type);
    kvt_put32(entry + 4, 0);
    kvt_put64(entry + 8, value);
    kvt_put64(entry + 16, offset);
    kvt_put64(entry + 24, s->offset - offset);
    s->index_bytes += KVT_SNAP_ENTRY_BYTES;
}

/* Where the streams of a set of n begin in s->stored. */
static unsigned char *set_streams(kvt_snap_saver *s, uint32_t n)
{
    return s->stored.data + KVT_SNAP_SECTION_BYTES + KVT_SNAP_SET_BYTES +
           n * (size_t)KVT_SNAP_STREAM_BYTES + KVT_SNAP_SUM_BYTES;
}

/*
 * Code native streams that lie one after the other, and put them as a section. Without
 * compression they may lie at set_streams already.
 */
static kvt_status put_set(kvt_snap_saver *s, uint32_t type, uint64_t value,
                          const kvt_snap_shape *shapes, uint32_t n, const unsigned char *native)
{
    unsigned char *head = s->stored.data, *set = head + KVT_SNAP_SECTION_BYTES;
    unsigned char *entry = set + KVT_SNAP_SET_BYTES;
    size_t table = KVT_SNAP_SET_BYTES + n * (size_t)KVT_SNAP_STREAM_BYTES;
    size_t at = table + KVT_SNAP_SUM_BYTES, end;
    uint32_t i;

    kvt_put32(set, n);
    kvt_put32(set + 4, 0);
    for (i = 0; i < n; i++, entry += KVT_SNAP_STREAM_BYTES) {
        kvt_snap_stream stream;
        kvt_status status = kvt_snap_encode(&s->codec, &shapes[i], native, set + at, &stream);
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
    make_head(head, type, end, value);
    return kvt_snap_put(s, head, KVT_SNAP_SECTION_BYTES + end);
}

/* ---- the parts of a snapshot ---- */

static kvt_status put_header(kvt_snap_saver *s)
{
    unsigned char bytes[KVT_SNAP_HEADER_MAX];
    kvt_snap_header_put(s->header, bytes);
    return kvt_snap_put(s, bytes, kvt_snap_header_bytes(s->header));
}

/* What the sequence has besides tokens; there is no section where that is nothing. */
static kvt_status put_sequence(kvt_snap_saver *s)
{
    unsigned char payload[KVT_SNAP_STATE_BYTES + KVT_MAX_TAG];
    size_t bytes = kvt_round_up(KVT_SNAP_STATE_BYTES + (size_t)s->seq->tag_bytes, 8);
    uint64_t offset = s->offset;
    kvt_status status;

    if (s->seq->tag_bytes == 0 && s->seq->next_position < 0)
        return KVT_OK;
    memset(payload, 0, sizeof payload);
    kvt_put32(payload, (uint32_t)s->seq->next_position);
    kvt_put32(payload + 4, s->seq->tag_bytes);
    memcpy(payload + KVT_SNAP_STATE_BYTES, s->seq->tag, s->seq->tag_bytes);
    status = kvt_snap_put_head(s, KVT_SNAP_SEQUENCE, bytes + KVT_SNAP_SUM_BYTES, 0);
    if (status == KVT_OK)
        status = put_summed(s, payload, bytes);
    if (status == KVT_OK)
        kvt_snap_put_note(s, KVT_SNAP_SEQUENCE, 0, offset);
    return status;
}

/* n numbers of a row. */
static void take_tokens(const kvt_meta *meta, uint32_t kind, size_t n, unsigned char *to)
{
    size_t t;

    if (kind != KVT_SNAP_KIND_SHIFTS) {
        memcpy(to, kind == KVT_SNAP_KIND_POSITIONS ? meta->positions : meta->token_ids, n * 4);
        return;
    }
    for (t = 0; t < n; t++)
        kvt_put32(to + t * 4, (uint32_t)kvt_shift_at(meta, t));
}

static kvt_status put_tokens(kvt_snap_saver *s, uint32_t type, uint32_t kind)
{
    uint64_t first, offset;

    for (first = 0; first < s->header->n_tokens; first += KVT_SNAP_CHUNK_TOKENS) {
        uint64_t left = s->header->n_tokens - first;
        uint32_t n = left < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)left : KVT_SNAP_CHUNK_TOKENS, i;
        kvt_snap_shape shape;
        kvt_status status;

        memset(&shape, 0, sizeof shape);
        shape.kind = kind;
        shape.element = 4;
        shape.bits = 32;
        shape.bytes = n * (size_t)4;
        for (i = 0; i < n; i += KVT_TOKENS) {
            const kvt_meta *meta = kvt_seq_meta(s->seq, (size_t)((first + i) / KVT_TOKENS));
            size_t here = n - i < KVT_TOKENS ? n - i : KVT_TOKENS;
            take_tokens(meta, kind, here, s->native.data + i * (size_t)4);
        }
        offset = s->offset;
        status = put_set(s, type, first, &shape, 1, s->native.data);
        if (status != KVT_OK)
            return status;
        kvt_snap_put_note(s, type, first, offset);
    }
    return KVT_OK;
}

void kvt_snap_make_entry(kvt_snap_saver *s, const kvt_block *block, uint64_t row, uint32_t group,
                         uint32_t tokens, unsigned char *entry)
{
    const kvt_snapshot_group *geometry = &s->header->groups[group];
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    size_t bytes;
    uint32_t layer;

    (void)kvt_snap_shapes(geometry, block->form, tokens, shapes, &bytes);
    kvt_put32(entry + 16, group);
    kvt_put32(entry + 20, (uint32_t)row);
    kvt_put32(entry + 24, tokens);
    kvt_put32(entry + 28, block->form);
    memcpy(s->digests.data, entry + KVT_SNAP_ENTRY_BYTES - KVT_SNAP_ID_HEAD, KVT_SNAP_ID_HEAD);
    for (layer = 0; layer < geometry->n_layers; layer++) {
        kvt_snap_gather(&s->seq->cache->groups[group], block->form, tokens,
                        kvt_head_record(&s->seq->cache->groups[group], block, layer, 0),
                        s->native.data);
        kvt_snap_digest(s->native.data, bytes,
                        s->digests.data + KVT_SNAP_ID_HEAD + layer * (size_t)KVT_SNAP_ID_BYTES);
    }
    kvt_snap_digest(s->digests.data,
                    KVT_SNAP_ID_HEAD + geometry->n_layers * (size_t)KVT_SNAP_ID_BYTES, entry);
}

/* The entries of the sequence's own blocks. */
static void make_own_entries(kvt_snap_saver *s)
{
    unsigned char *entry = s->table.data;
    uint64_t row;
    uint32_t g;

    for (row = 0; row < kvt_rows(s->header->n_tokens); row++)
        for (g = 0; g < s->header->n_groups; g++) {
            const kvt_block *block = kvt_seq_block(s->seq, (size_t)row, g);
            if (!kvt_snap_has_row(&s->runs, row, g))
                continue;
            kvt_snap_make_entry(s, block, row, g, kvt_snap_row_tokens(s->header->n_tokens, row),
                                entry);
            entry += KVT_SNAP_ENTRY_BYTES;
        }
}

static kvt_status put_block_table(kvt_snap_saver *s)
{
    size_t bytes = (size_t)s->header->n_blocks * KVT_SNAP_ENTRY_BYTES;
    uint64_t offset = s->offset;
    kvt_status status = kvt_snap_put_head(s, KVT_SNAP_BLOCK_TABLE, bytes + KVT_SNAP_SUM_BYTES, 0);

    if (status == KVT_OK)
        status = put_summed(s, s->table.data, bytes);
    if (status == KVT_OK)
        kvt_snap_put_note(s, KVT_SNAP_BLOCK_TABLE, 0, offset);
    return status;
}

/* Entry b of the table, which is this block. */
static kvt_status put_block(kvt_snap_saver *s, uint64_t b, const kvt_block *block)
{
    const unsigned char *entry = s->table.data + b * KVT_SNAP_ENTRY_BYTES;
    uint64_t offset = s->offset;
    uint32_t group = kvt_get32(entry + 16), tokens = kvt_get32(entry + 24), layer, n;
    const kvt_snapshot_group *geometry = &s->header->groups[group];
    unsigned char payload[KVT_SNAP_BLOCK_BYTES - KVT_SNAP_SUM_BYTES];
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    const uint32_t *layers = s->header->layers;
    unsigned char *native;
    size_t bytes;
    kvt_status status;
    uint32_t g;

    for (g = 0; g < group; g++)
        layers += s->header->groups[g].n_layers;
    memcpy(payload, entry, KVT_SNAP_ENTRY_BYTES);
    kvt_put32(payload + 32, geometry->n_layers);
    kvt_put32(payload + 36, 0);
    status = kvt_snap_put_head(s, KVT_SNAP_BLOCK, KVT_SNAP_BLOCK_BYTES, b);
    if (status == KVT_OK)
        status = put_summed(s, payload, sizeof payload);
    n = kvt_snap_shapes(geometry, block->form, tokens, shapes, &bytes);
    native = s->codec.raw ? set_streams(s, n) : s->native.data;
    for (layer = 0; status == KVT_OK && layer < geometry->n_layers; layer++) {
        /* The first layer's values depend on the token alone: they repeat as tokens do. */
        shapes[1].repeats = shapes[1].kind == KVT_SNAP_KIND_V && layers[layer] == 0;
        kvt_snap_gather(&s->seq->cache->groups[group], block->form, tokens,
                        kvt_head_record(&s->seq->cache->groups[group], block, layer, 0), native);
        status = put_set(s, KVT_SNAP_LAYER, layer, shapes, n, native);
    }
    if (status == KVT_OK)
        kvt_snap_put_note(s, KVT_SNAP_BLOCK, b, offset);
    return status;
}

static kvt_status put_blocks(kvt_snap_saver *s)
{
    const kvt_snap_extra *extras = (const kvt_snap_extra *)(void *)s->extras.data;
    uint64_t row, b = 0;
    kvt_status status = KVT_OK;
    uint32_t g, i;

    for (row = 0; row < kvt_rows(s->header->n_tokens); row++)
        for (g = 0; status == KVT_OK && g < s->header->n_groups; g++)
            if (kvt_snap_has_row(&s->runs, row, g))
                status = put_block(s, b++, kvt_seq_block(s->seq, (size_t)row, g));
    for (i = 0; status == KVT_OK && i < s->n_extras; i++)
        status = put_block(s, b++, extras[i].block);
    return status;
}

static kvt_status put_index_and_end(kvt_snap_saver *s)
{
    unsigned char end[KVT_SNAP_END_BYTES];
    uint64_t offset = s->offset;
    kvt_status status =
        kvt_snap_put_head(s, KVT_SNAP_INDEX, (uint64_t)s->index_bytes + KVT_SNAP_SUM_BYTES, 0);

    if (status == KVT_OK)
        status = put_summed(s, s->index.data, s->index_bytes);
    if (status == KVT_OK)
        status = kvt_snap_put_head(s, KVT_SNAP_END, sizeof end, 0);
    if (status != KVT_OK)
        return status;
    kvt_put64(end, offset);
    kvt_put64(end + 8, s->offset + sizeof end);
    kvt_put64(end + 16, kvt_snap_sum(end, 16));
    memcpy(end + 24, KVT_SNAP_FOOTER, KVT_SNAP_MAGIC_BYTES);
    status = kvt_snap_put(s, end, sizeof end);
    return status == KVT_OK ? flush(s) : status;
}

typedef struct saver_sizes {
    size_t native, stored, digests;
    uint64_t table, index; /* forecast for sequences of any length */
} saver_sizes;

static saver_sizes sizes_of(const kvt_snap_header *header)
{
    uint64_t chunks = (header->n_tokens + KVT_SNAP_CHUNK_TOKENS - 1) / KVT_SNAP_CHUNK_TOKENS;
    saver_sizes z;

    z.native = kvt_snap_layer_bytes(header);
    if (z.native < KVT_SNAP_CHUNK_TOKENS * (size_t)4)
        z.native = KVT_SNAP_CHUNK_TOKENS * (size_t)4;
    z.stored = KVT_SNAP_SECTION_BYTES + KVT_SNAP_SET_BYTES +
               KVT_SNAP_MAX_STREAMS * KVT_SNAP_STREAM_BYTES + KVT_SNAP_SUM_BYTES + z.native + 8;
    z.digests = KVT_SNAP_ID_HEAD + header->n_layers * (size_t)KVT_SNAP_ID_BYTES;
    z.table = header->n_blocks * KVT_SNAP_ENTRY_BYTES;
    z.index = (3 * chunks + 2 + header->n_blocks) * KVT_SNAP_ENTRY_BYTES;
    return z;
}

uint64_t kvt_snap_save_bytes(const kvt_snap_header *header)
{
    saver_sizes z = sizes_of(header);
    return kvt_snap_counted(sizeof *header) + kvt_snap_counted(OUT_BYTES) +
           kvt_snap_counted(z.native) + kvt_snap_counted(z.stored) + kvt_snap_counted(z.digests) +
           kvt_snap_counted(z.table) + kvt_snap_counted(z.index) + kvt_snap_encode_bytes(header);
}

/*
 * All memory but the compressor's, so that little is left to fail once bytes have gone out, and the
 * block table.
 */
static kvt_status prepare(kvt_snap_saver *s)
{
    saver_sizes z = sizes_of(s->header);
    kvt_status status = kvt_snap_reserve(s->context, &s->out, 0, OUT_BYTES, "a snapshot's output");

    if (status == KVT_OK)
        status = kvt_snap_reserve(s->context, &s->native, 0, z.native, "a snapshot's streams");
    if (status == KVT_OK)
        status = kvt_snap_reserve(s->context, &s->stored, 0, z.stored, "a snapshot's section");
    if (status == KVT_OK)
        status = kvt_snap_reserve(s->context, &s->digests, 0, z.digests, "a snapshot's digests");
    if (status == KVT_OK)
        status =
            kvt_snap_reserve(s->context, &s->table, 0, (size_t)z.table, "a snapshot's block table");
    if (status != KVT_OK)
        return status;
    make_own_entries(s);
    status = kvt_snap_plan_checkpoints(s);
    if (status == KVT_OK)
        status = kvt_snap_reserve(s->context, &s->index, 0,
                                  (size_t)sizes_of(s->header).index +
                                      s->seq->n_checkpoints * KVT_SNAP_ENTRY_BYTES,
                                  "a snapshot's index");
    return status;
}

/* Which rows the sequence has blocks of, and how many blocks that makes. */
static void count_own(kvt_snap_saver *s)
{
    uint32_t g;

    s->runs.n_groups = s->header->n_groups;
    for (g = 0; g < s->header->n_groups; g++) {
        const kvt_seq_group *state = &s->seq->groups[g];
        s->runs.sinks[g] = kvt_snap_sink_rows(&s->header->groups[g]);
        s->runs.first[g] =
            kvt_window_first(s->seq, g, state, s->header->n_tokens, KVT_DRAFT_TOKENS);
        if (s->runs.first[g] == 0)
            s->runs.first[g] = s->runs.sinks[g];
        s->n_own += kvt_rows(s->header->n_tokens) - (s->runs.first[g] - s->runs.sinks[g]);
    }
    s->header->n_blocks = s->n_own;
}

static kvt_status save(const kvt_seq *seq, const kvt_snap_context *context,
                       const kvt_writer *writer, const kvt_save_options *options)
{
    kvt_snap_saver s;
    void *memory;
    kvt_status status;

    memset(&s, 0, sizeof s);
    s.context = context;
    s.seq = seq;
    s.writer = writer;
    kvt_snap_codec_init(&s.codec, context);
    s.codec.raw = options->codec == KVT_CODEC_RAW;
    s.codec.level = options->zstd_level ? options->zstd_level : 1;
    status = kvt_snap_alloc(context, sizeof *s.header, "a snapshot's header", &memory);
    if (status != KVT_OK)
        return status;
    s.header = memory;
    kvt_snap_header_make(seq->cache, seq->length, s.header);
    s.header->flags = kvt_turns_needed(seq) ? KVT_SNAP_MOVED : 0;
    count_own(&s);
    status = prepare(&s);
    if (status == KVT_OK)
        status = put_header(&s);
    if (status == KVT_OK)
        status = put_sequence(&s);
    if (status == KVT_OK)
        status = put_tokens(&s, KVT_SNAP_TOKEN_IDS, KVT_SNAP_KIND_TOKEN_IDS);
    if (status == KVT_OK)
        status = put_tokens(&s, KVT_SNAP_POSITIONS, KVT_SNAP_KIND_POSITIONS);
    if (status == KVT_OK && (s.header->flags & KVT_SNAP_MOVED))
        status = put_tokens(&s, KVT_SNAP_SHIFTS, KVT_SNAP_KIND_SHIFTS);
    if (status == KVT_OK)
        status = put_block_table(&s);
    if (status == KVT_OK)
        status = put_blocks(&s);
    if (status == KVT_OK)
        status = kvt_snap_put_checkpoints(&s);
    if (status == KVT_OK)
        status = put_index_and_end(&s);
    kvt_snap_release(context, &s.index);
    kvt_snap_release(context, &s.words);
    kvt_snap_release(context, &s.extras);
    kvt_snap_release(context, &s.heads);
    kvt_snap_release(context, &s.firsts);
    kvt_snap_release(context, &s.table);
    kvt_snap_release(context, &s.digests);
    kvt_snap_release(context, &s.stored);
    kvt_snap_release(context, &s.native);
    kvt_snap_release(context, &s.out);
    kvt_snap_codec_release(&s.codec);
    kvt_snap_free(context, s.header, sizeof *s.header);
    return status;
}

/* The checks that both forms share. *copy: the options, or the defaults. */
static kvt_status admit(const kvt_seq *seq, const kvt_save_options *options, kvt_save_options *copy)
{
    memset(copy, 0, sizeof *copy);
    if (options) {
        if (!kvt_copy_struct(copy, options, sizeof *copy))
            return kvt_fail(seq->cache, KVT_ERR_ARG, "save options: unknown struct_size");
        if (copy->codec > KVT_CODEC_RAW || copy->no_fsync > 1 || copy->in_place > 1)
            return kvt_fail(seq->cache, KVT_ERR_ARG,
                            "save options: codec %u, no_fsync %u or in_place %u", copy->codec,
                            copy->no_fsync, copy->in_place);
        if (copy->zstd_level < -7 || copy->zstd_level > 19)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "save options: zstd_level %d is not -7 to 19",
                            (int)copy->zstd_level);
    }
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "save: a step is pending");
    return KVT_OK;
}

kvt_status kvt_seq_save_stream(const kvt_seq *seq, const kvt_writer *writer,
                               const kvt_save_options *options)
{
    kvt_snap_context context;
    kvt_save_options copy;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!writer || !writer->write)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "save: no writer");
    status = admit(seq, options, &copy);
    if (status != KVT_OK)
        return status;
    memset(&context, 0, sizeof context);
    context.cache = seq->cache;
    return save(seq, &context, writer, &copy);
}

kvt_status kvt_seq_save(const kvt_seq *seq, const char *path, const kvt_save_options *options)
{
    kvt_snap_context context;
    kvt_save_options copy;
    kvt_snap_file file;
    kvt_writer writer;
    kvt_status status, failure;

    if (!seq)
        return KVT_ERR_ARG;
    if (!path || !*path)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "save: no path");
    status = admit(seq, options, &copy);
    if (status != KVT_OK)
        return status;
    memset(&context, 0, sizeof context);
    context.cache = seq->cache;
    status = kvt_snap_file_create(&context, path, &copy, &file, &writer);
    if (status == KVT_OK)
        status = save(seq, &context, &writer, &copy);
    if (status == KVT_ERR_IO) {
        failure = kvt_snap_file_failure(&file, path);
        status = failure != KVT_OK ? failure : status;
    }
    if (status == KVT_OK) {
        status = kvt_snap_file_commit(&file);
        if (status != KVT_OK)
            status = kvt_snap_file_failure(&file, path);
    }
    kvt_snap_file_close(&file);
    return status;
}
