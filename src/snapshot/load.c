/*
 * Load a snapshot into a sequence.
 *
 * The reader verifies, this file stages: new blocks take what it delivers, in a table of their
 * own, which grows as the data arrives. Checkpoints come behind the blocks, and take references to
 * them. Only when the end has been read and verified does the sequence give its blocks up and take
 * the new ones, which cannot fail.
 */
#include "src/snapshot/format.h"

#include <stdio.h>

#define STAGE_ROWS 64u /* first size of the table */

typedef struct stage {
    const kvt_snap_context *context;
    kvt_seq *seq;
    kvt_snap_buffer table;  /* kvt_block *[rows][n_columns]; NULL where there is none yet */
    size_t rows;            /* begun: they have a block of positions and ids */
    kvt_snap_buffer extras; /* kvt_block *[n_extras]: blocks that checkpoints alone have */
    size_t n_extras;
    kvt_seq made; /* what the sequence becomes; it has the table and the checkpoints */
} stage;

static kvt_block **staged(const stage *st, size_t row)
{
    return (kvt_block **)(void *)st->table.data + row * st->seq->cache->n_columns;
}

static kvt_meta *staged_meta(const stage *st, size_t row)
{
    return (kvt_meta *)(void *)staged(st, row)[st->seq->cache->n_groups]->data;
}

/* A tag as text: printable, or hex digits; cut. */
static void show_tag(const unsigned char *tag, uint32_t bytes, char *text, size_t text_bytes)
{
    size_t used = 0, i;
    int plain = 1;

    for (i = 0; i < bytes; i++)
        plain &= tag[i] >= 0x20 && tag[i] < 0x7f && tag[i] != '"';
    text[0] = '\0';
    for (i = 0; i < bytes && used + 8 < text_bytes; i++)
        used += (size_t)snprintf(text + used, text_bytes - used, plain ? "%s%c" : "%s%02x",
                                 i || !plain ? "" : "\"", tag[i]);
    if (bytes)
        (void)snprintf(text + used, text_bytes - used, "%s", i < bytes ? "..." : plain ? "\"" : "");
}

static kvt_status on_sequence(void *user, int32_t next_position, const unsigned char *tag,
                              uint32_t tag_bytes)
{
    stage *st = user;
    const kvt_seq *seq = st->seq;
    char stored[48], here[48];

    st->made.next_position = next_position;
    if (tag_bytes == seq->tag_bytes && memcmp(tag, seq->tag, tag_bytes) == 0)
        return KVT_OK;
    show_tag(tag, tag_bytes, stored, sizeof stored);
    show_tag(seq->tag, seq->tag_bytes, here, sizeof here);
    return kvt_fail(seq->cache, KVT_ERR_MISMATCH,
                    "snapshot of another tag: it is %s (%u bytes), the sequence's is %s (%u bytes)",
                    stored, (unsigned)tag_bytes, here, (unsigned)seq->tag_bytes);
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
    size_t row_bytes = cache->n_columns * sizeof(kvt_block *), have = st->rows * row_bytes;
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
    for (c = 0; c < cache->n_columns; c++)
        staged(st, st->rows)[c] = NULL;
    staged(st, st->rows)[cache->n_groups] = block;
    staged_meta(st, st->rows)->shift = 0;
    st->rows++;
    return KVT_OK;
}

/* All of a row's n tokens have the same shift, or each its own. */
static void give_shifts(kvt_meta *meta, size_t n, const unsigned char *values)
{
    size_t t;

    meta->shift = (int32_t)kvt_get32(values);
    for (t = 0; t < n; t++) {
        meta->shifts[t] = (int32_t)kvt_get32(values + t * 4);
        if (meta->shifts[t] != meta->shifts[0])
            meta->shift = KVT_SHIFT_MIXED;
    }
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
        if (kind == KVT_SNAP_KIND_SHIFTS) {
            give_shifts(meta, here, values + i * (size_t)4);
            continue;
        }
        memcpy(kind == KVT_SNAP_KIND_POSITIONS ? meta->positions : meta->token_ids,
               values + i * (size_t)4, here * 4);
        if (kind == KVT_SNAP_KIND_POSITIONS)
            kvt_meta_bound(meta, here, row > 0 ? staged_meta(st, row - 1) : NULL);
    }
    return KVT_OK;
}

static kvt_block **extra_at(const stage *st, uint64_t i)
{
    return (kvt_block **)(void *)st->extras.data + i;
}

static kvt_status on_layer(void *user, const kvt_snap_block *at, uint32_t layer_index,
                           const unsigned char *streams)
{
    stage *st = user;
    kvt_cache *cache = st->seq->cache;
    kvt_block **block;

    if (at->extra > st->n_extras) {
        size_t have = st->n_extras * sizeof *block;
        size_t more = st->extras.bytes ? 2 * st->extras.bytes : STAGE_ROWS * sizeof *block;
        kvt_status status =
            have + sizeof *block <= st->extras.bytes
                ? KVT_OK
                : kvt_snap_reserve(st->context, &st->extras, have, more, "a snapshot's staging");
        if (status != KVT_OK)
            return status;
        *extra_at(st, st->n_extras++) = NULL;
    }
    block = at->extra ? extra_at(st, at->extra - 1) : &staged(st, (size_t)at->row)[at->group];
    if (!*block) {
        kvt_block *fresh;
        kvt_status status = kvt_block_get(cache, kvt_class_of(cache, at->group, at->form), &fresh);
        if (status != KVT_OK)
            return status;
        *block = fresh;
    }
    kvt_snap_scatter(&cache->groups[at->group], at->form, at->tokens, streams,
                     kvt_head_record(&cache->groups[at->group], *block, layer_index, 0));
    return KVT_OK;
}

/* What the sequence becomes, as far as it is staged: to be looked at, not changed. */
static void set_view(stage *st)
{
    st->made.table = (kvt_block **)(void *)st->table.data;
    st->made.n_rows = st->rows;
}

/* A checkpoint's block of a row, NULL where its window has released it. */
static kvt_block *block_of(const stage *st, const kvt_snap_checkpoint *c, uint32_t group,
                           uint64_t row)
{
    uint32_t entry;

    if (row < c->from[group])
        return staged(st, (size_t)row)[group];
    entry = kvt_get32(c->entries[group] + 4 * (row - c->from[group]));
    if (entry == KVT_SNAP_ABSENT)
        return NULL;
    return entry < c->n_own ? staged(st, (size_t)row)[group] : *extra_at(st, entry - c->n_own);
}

static kvt_status on_checkpoint(void *user, const kvt_snap_checkpoint *c)
{
    stage *st = user;
    kvt_cache *cache = st->seq->cache;
    size_t from[KVT_MAX_GROUPS + 1], rows = kvt_rows(c->n_tokens), row;
    kvt_checkpoint *made;
    kvt_status status;
    uint32_t g;

    for (g = 0; g < cache->n_groups; g++)
        from[g] = (size_t)c->kept[g];
    from[cache->n_groups] = (size_t)(c->n_tokens / KVT_TOKENS);
    status = kvt_checkpoints_make_room(&st->made);
    if (status == KVT_OK)
        status = kvt_checkpoint_new(cache, c->n_tokens, from, c->blob_bytes, &made);
    if (status != KVT_OK)
        return status;
    st->made.checkpoints[st->made.n_checkpoints++] = made;
    made->next_position = c->next_position;
    pthread_mutex_lock(&cache->lock);
    for (g = 0; g <= cache->n_groups; g++)
        for (row = from[g]; row < rows; row++) {
            /* The last row's positions are the sequence's: it has the same tokens, and more. */
            kvt_block *block = g < cache->n_groups ? block_of(st, c, g, row) : staged(st, row)[g];
            kvt_checkpoint_blocks(made, g)[row - from[g]] = block;
            if (block)
                kvt_block_refer_locked(cache, block);
        }
    pthread_mutex_unlock(&cache->lock);
    for (g = 0; g < cache->n_groups; g++) {
        kvt_seq_group *state = &made->groups[g];
        state->first = (size_t)c->first[g];
        if (cache->groups[g].seals)
            state->n_final = state->n_sealed = state->seal_end = (size_t)c->sealed[g];
    }
    if (c->blob_bytes)
        memcpy(kvt_checkpoint_blob(made), c->blob, (size_t)c->blob_bytes);
    set_view(st);
    memcpy(st->made.groups, made->groups, sizeof made->groups);
    if (!kvt_window_suffices(&st->made, c->n_tokens))
        return kvt_fail(cache, KVT_ERR_CORRUPT,
                        "snapshot damaged: blocks that the window of the checkpoint at %llu tokens "
                        "needs are missing",
                        (unsigned long long)c->n_tokens);
    return KVT_OK;
}

/* All is there: the states of the groups. */
static kvt_status complete(stage *st, const kvt_snap_header *header)
{
    set_view(st);
    st->made.length = header->n_tokens;
    memset(st->made.groups, 0, sizeof st->made.groups);
    kvt_rows_state(&st->made);
    if (!kvt_window_suffices(&st->made, header->n_tokens))
        return kvt_fail(st->seq->cache, KVT_ERR_CORRUPT,
                        "snapshot damaged: blocks that a window needs are missing");
    return header->flags & KVT_SNAP_MOVED
               ? kvt_turns_make(&st->made, UINT64_MAX, 0, &st->made.turns)
               : KVT_OK;
}

/* The checkpoints have references to the blocks that are theirs alone. */
static void drop_extras(stage *st)
{
    while (st->n_extras)
        kvt_block_undo(st->seq->cache, *extra_at(st, --st->n_extras));
}

static void drop(stage *st)
{
    kvt_cache *cache = st->seq->cache;
    size_t row;
    uint32_t c;

    kvt_checkpoints_drop_from(&st->made, 0);
    kvt_turns_free(cache, st->made.turns);
    for (row = 0; row < st->rows; row++)
        for (c = 0; c < cache->n_columns; c++)
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

/* How to go on with the prompt: see kvt_load_result. */
static void answer(const kvt_seq *seq, const kvt_load_options *options, kvt_load_result *result)
{
    const kvt_checkpoint *checkpoint;
    uint64_t most;

    memset(result, 0, sizeof *result);
    result->n_tokens = seq->length;
    most = result->prefix_tokens = common_prefix(seq, options);
    if (options->n_prompt && most == options->n_prompt)
        most--;
    checkpoint = kvt_checkpoint_before(seq, most);
    result->reuse_tokens = kvt_seq_reachable(seq, most);
    result->checkpoint_tokens = checkpoint ? checkpoint->n_tokens : UINT64_MAX;
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
    st.made.cache = seq->cache;
    sink.user = &st;
    sink.header = on_header;
    sink.tokens = on_tokens;
    sink.layer = on_layer;
    sink.sequence = on_sequence;
    sink.checkpoint = on_checkpoint;
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
    if (status == KVT_OK)
        status = complete(&st, header);
    if (status == KVT_OK) {
        kvt_checkpoints_drop_from(seq, 0);
        kvt_turns_free(seq->cache, seq->turns);
        seq->turns = NULL;
        kvt_rows_replace(seq, &st.made);
        if (result)
            answer(seq, options, result);
    } else {
        drop(&st);
    }
    drop_extras(&st);
    kvt_snap_release(context, &st.extras);
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
