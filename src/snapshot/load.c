/*
 * Load a snapshot into a sequence.
 *
 * The reader verifies, this file stages: new blocks take what it delivers, in a table of their
 * own, which grows as the data arrives. Only when the end has been read and verified does the
 * sequence give its blocks up and take the new ones, which cannot fail.
 */
#include "src/snapshot/format.h"

#define STAGE_ROWS 64u /* first size of the table */

typedef struct stage {
    const kvt_snap_context *context;
    kvt_seq *seq;
    kvt_snap_buffer table; /* kvt_block *[rows][n_classes]; NULL where there is none yet */
    size_t rows;           /* begun: they have a block of positions and ids */
} stage;

static kvt_block **staged(const stage *st, size_t row)
{
    return (kvt_block **)(void *)st->table.data + row * st->seq->cache->n_classes;
}

static kvt_meta *staged_meta(const stage *st, size_t row)
{
    return (kvt_meta *)(void *)staged(st, row)[st->seq->cache->n_groups]->data;
}

static kvt_status on_header(void *user, const kvt_snap_header *header)
{
    const stage *st = user;
    return kvt_snap_header_match(st->seq->cache, header);
}

uint64_t kvt_snap_load_bytes(const kvt_snap_header *header)
{
    uint64_t row_bytes = (2 * header->n_groups + 1) * (uint64_t)sizeof(kvt_block *);
    uint64_t rows = STAGE_ROWS;

    /* Old and new at once while it grows, but then the index, which is larger, is not there. */
    while (rows < kvt_rows(header->n_tokens))
        rows *= 2;
    return kvt_snap_counted(rows * row_bytes) + kvt_snap_counted(sizeof *header) +
           kvt_snap_counted(KVT_SNAP_AHEAD_BYTES) + kvt_snap_read_bytes(header);
}

/* One more row, with its block of positions and ids. */
static kvt_status add_row(stage *st)
{
    kvt_cache *cache = st->seq->cache;
    size_t row_bytes = cache->n_classes * sizeof(kvt_block *), have = st->rows * row_bytes;
    kvt_block *block;
    kvt_status status;
    uint32_t c;

    if (have + row_bytes > st->table.bytes) {
        size_t more = st->table.bytes ? 2 * st->table.bytes : STAGE_ROWS * row_bytes;
        status = kvt_snap_reserve(st->context, &st->table, have, more, "a snapshot's staging");
        if (status != KVT_OK)
            return status;
    }
    status = kvt_block_get(cache, cache->n_groups, &block);
    if (status != KVT_OK)
        return status;
    for (c = 0; c < cache->n_classes; c++)
        staged(st, st->rows)[c] = NULL;
    staged(st, st->rows)[cache->n_groups] = block;
    staged_meta(st, st->rows)->shift = 0;
    st->rows++;
    return KVT_OK;
}

static kvt_status on_tokens(void *user, uint32_t kind, uint64_t first, uint32_t n,
                            const unsigned char *values)
{
    stage *st = user;
    uint32_t i;

    for (i = 0; i < n; i += KVT_TOKENS) {
        size_t row = (size_t)((first + i) / KVT_TOKENS), here = n - i;
        kvt_meta *meta;
        if (here > KVT_TOKENS)
            here = KVT_TOKENS;
        if (row == st->rows) { /* the ids come first */
            kvt_status status = add_row(st);
            if (status != KVT_OK)
                return status;
        }
        meta = staged_meta(st, row);
        memcpy(kind == KVT_SNAP_KIND_POSITIONS ? meta->positions : meta->token_ids,
               values + i * (size_t)4, here * 4);
        if (kind == KVT_SNAP_KIND_POSITIONS)
            kvt_meta_bound(meta, here, row > 0 ? staged_meta(st, row - 1) : NULL);
    }
    return KVT_OK;
}

static kvt_status on_layer(void *user, uint64_t row, uint32_t group, uint32_t form,
                           uint32_t layer_index, uint32_t tokens, const unsigned char *streams)
{
    stage *st = user;
    kvt_block **block = &staged(st, (size_t)row)[group];

    if (!*block) {
        kvt_block *fresh;
        kvt_status status =
            kvt_block_get(st->seq->cache, kvt_class_of(st->seq->cache, group, form), &fresh);
        if (status != KVT_OK)
            return status;
        *block = fresh;
    }
    kvt_snap_scatter(&st->seq->cache->groups[group], *block, layer_index, tokens, streams);
    return KVT_OK;
}

static void drop(stage *st)
{
    kvt_cache *cache = st->seq->cache;
    size_t row;
    uint32_t c;

    for (row = 0; row < st->rows; row++)
        for (c = 0; c < cache->n_classes; c++)
            kvt_block_undo(cache, staged(st, row)[c]);
    st->rows = 0;
}

static uint64_t common_prefix(const kvt_seq *seq, const kvt_load_options *options)
{
    uint64_t n = options->n_prompt < seq->length ? options->n_prompt : seq->length, i;

    for (i = 0; i < n; i++) {
        int32_t id = kvt_seq_meta(seq, (size_t)(i / KVT_TOKENS))->token_ids[i % KVT_TOKENS];
        if (id == KVT_TOKEN_NONE || id != options->prompt[i])
            break;
    }
    return i;
}

/* The checks that both forms share. *copy: the options, or the defaults. */
static kvt_status admit(const kvt_seq *seq, const kvt_load_options *options, kvt_load_options *copy)
{
    memset(copy, 0, sizeof *copy);
    if (options) {
        if (!kvt_copy_struct(copy, options, sizeof *copy))
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: unknown struct_size");
        if (!copy->prompt && copy->n_prompt)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: prompt is NULL");
    }
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "load: a step is pending");
    return KVT_OK;
}

/* file (may be NULL): what the reader reads, with its path. */
static kvt_status load(kvt_seq *seq, const kvt_snap_context *context, const kvt_reader *reader,
                       kvt_snap_file *file, const char *path, const kvt_load_options *options,
                       kvt_load_result *result)
{
    kvt_snap_header *header;
    kvt_snap_sink sink;
    stage st;
    void *memory;
    kvt_status status, failure;

    memset(&st, 0, sizeof st);
    st.context = context;
    st.seq = seq;
    sink.user = &st;
    sink.header = on_header;
    sink.tokens = on_tokens;
    sink.layer = on_layer;
    status = kvt_snap_alloc(context, sizeof *header, "a snapshot's header", &memory);
    if (status != KVT_OK)
        return status;
    header = memory;
    status =
        kvt_snap_read(context, reader, file ? file->bytes : UINT64_MAX, 0, &sink, header, NULL);
    if (status == KVT_ERR_IO && file) {
        failure = kvt_snap_file_failure(file, path);
        status = failure != KVT_OK ? failure : status;
    }
    if (status == KVT_OK && file)
        status = kvt_snap_file_expect_end(file, path);
    if (status == KVT_OK) {
        kvt_rows_replace(seq, (kvt_block **)(void *)st.table.data, st.rows, header->n_tokens);
        if (result) {
            result->n_tokens = seq->length;
            result->prefix_tokens = common_prefix(seq, options);
            result->reuse_tokens = result->prefix_tokens;
            if (options->n_prompt && result->reuse_tokens == options->n_prompt)
                result->reuse_tokens--;
        }
    } else {
        drop(&st);
    }
    kvt_snap_release(context, &st.table);
    kvt_snap_free(context, header, sizeof *header);
    return status;
}

kvt_status kvt_seq_load_stream(kvt_seq *seq, const kvt_reader *reader,
                               const kvt_load_options *options, kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!reader || !reader->read)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no reader");
    status = admit(seq, options, &copy);
    if (status != KVT_OK)
        return status;
    memset(&context, 0, sizeof context);
    context.cache = seq->cache;
    return load(seq, &context, reader, NULL, NULL, &copy, result);
}

kvt_status kvt_seq_load(kvt_seq *seq, const char *path, const kvt_load_options *options,
                        kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    kvt_snap_file file;
    kvt_reader reader;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!path || !*path)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no path");
    status = admit(seq, options, &copy);
    if (status != KVT_OK)
        return status;
    memset(&context, 0, sizeof context);
    context.cache = seq->cache;
    status = kvt_snap_file_open(&context, path, &file, &reader);
    if (status == KVT_OK)
        status = load(seq, &context, &reader, &file, path, &copy, result);
    kvt_snap_file_close(&file);
    return status;
}
