/*
 * What a load has read, until all of it is verified: new blocks in a table of their own, which
 * grows as the data arrives. Checkpoints come behind the blocks, and take references to them.
 */
#include "src/snapshot/stage.h"

#include "src/snapshot/convert.h"

#include <stdio.h>

#define STAGE_ROWS 64u /* first size of the table */

static kvt_block **staged(const kvt_snap_stage *st, size_t row)
{
    return (kvt_block **)(void *)st->table.data + row * st->seq->cache->n_columns;
}

static kvt_meta *staged_meta(const kvt_snap_stage *st, size_t row)
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
    else
        (void)snprintf(text, text_bytes, "none");
}

static kvt_status on_sequence(void *user, int32_t next_position, const unsigned char *tag,
                              uint32_t tag_bytes)
{
    kvt_snap_stage *st = user;
    const kvt_seq *seq = st->seq;
    char stored[48], here[48];

    st->made.next_position = next_position;
    if (tag_bytes == seq->tag_bytes && (!tag_bytes || memcmp(tag, seq->tag, tag_bytes) == 0))
        return KVT_OK;
    show_tag(tag, tag_bytes, stored, sizeof stored);
    show_tag(seq->tag, seq->tag_bytes, here, sizeof here);
    return kvt_fail(seq->cache, KVT_ERR_MISMATCH,
                    "snapshot of another tag: it is %s (%u bytes), the sequence's is %s (%u bytes)",
                    stored, (unsigned)tag_bytes, here, (unsigned)seq->tag_bytes);
}

static kvt_status on_piece(void *user, const kvt_snapshot_piece *piece)
{
    const kvt_snap_stage *st = user;
    return st->options->on_piece && st->options->on_piece(st->options->piece_user, piece)
               ? kvt_fail(st->seq->cache, KVT_ERR_CANCELLED, "load: cancelled by on_piece")
               : KVT_OK;
}

static kvt_status on_progress(void *user, uint64_t done, uint64_t total)
{
    const kvt_snap_stage *st = user;
    return st->options->progress && st->options->progress(st->options->progress_user, done, total)
               ? kvt_fail(st->seq->cache, KVT_ERR_CANCELLED, "load: cancelled by progress")
               : KVT_OK;
}

uint64_t kvt_snap_load_bytes(const kvt_snap_header *header, size_t n_jobs)
{
    uint64_t row_bytes = (2 * header->n_groups + 1) * (uint64_t)sizeof(kvt_block *);
    uint64_t rows = STAGE_ROWS;

    /* Old and new at once while it grows, but then the index, which is larger, is not there. */
    while (rows < kvt_rows(header->n_tokens))
        rows *= 2;
    return kvt_snap_counted(rows * row_bytes) + kvt_snap_counted(sizeof *header) +
           kvt_snap_counted(KVT_SNAP_AHEAD_BYTES) + kvt_snap_read_bytes(header, n_jobs);
}

/* One more row, with its block of positions and ids. */
static kvt_status add_row(kvt_snap_stage *st)
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
    status = kvt_rows_lend(st->seq, cache->n_groups, &block);
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
static void give_shifts(kvt_meta *meta, size_t from, size_t n, const unsigned char *values)
{
    size_t t;

    if (from == 0)
        meta->shift = (int32_t)kvt_get32(values);
    for (t = from; t < from + n; t++) {
        meta->shifts[t] = (int32_t)kvt_get32(values + (t - from) * 4);
        if (meta->shifts[t] != meta->shifts[0])
            meta->shift = KVT_SHIFT_MIXED;
    }
}

/* How much of the prompt the ids equal. first: behind all that came before. */
static void compare_prompt(kvt_snap_stage *st, uint64_t first, uint32_t n,
                           const unsigned char *values)
{
    const kvt_load_options *o = st->options;
    uint32_t i;

    if (st->prefix_tokens != first)
        return;
    for (i = 0; i < n && first + i < o->n_prompt; i++) {
        int32_t id = (int32_t)kvt_get32(values + i * (size_t)4);
        if (id == KVT_TOKEN_NONE || id != o->prompt[first + i])
            break;
        st->prefix_tokens++;
    }
}

static kvt_status on_tokens(void *user, uint32_t kind, uint64_t first, uint32_t n,
                            const unsigned char *values)
{
    kvt_snap_stage *st = user;
    uint32_t i, here;

    if (kind == KVT_SNAP_KIND_TOKEN_IDS)
        compare_prompt(st, first, n, values);
    for (i = 0; i < n; i += here) {
        size_t row = (size_t)((first + i) / KVT_TOKENS), from = (first + i) % KVT_TOKENS;
        const unsigned char *at = values + i * (size_t)4;
        kvt_meta *meta;
        here = n - i < KVT_TOKENS - from ? n - i : (uint32_t)(KVT_TOKENS - from);
        if (row == st->rows) { /* the ids come first */
            kvt_status status = add_row(st);
            if (status != KVT_OK)
                return status;
        }
        meta = staged_meta(st, row);
        if (kind == KVT_SNAP_KIND_SHIFTS) {
            give_shifts(meta, from, here, at);
            continue;
        }
        memcpy((kind == KVT_SNAP_KIND_POSITIONS ? meta->positions : meta->token_ids) + from, at,
               here * (size_t)4);
        if (kind == KVT_SNAP_KIND_POSITIONS)
            kvt_meta_bound(meta, from + here, row > 0 ? staged_meta(st, row - 1) : NULL);
    }
    return KVT_OK;
}

static const unsigned char *on_positions(void *user, uint64_t first)
{
    const kvt_meta *meta = staged_meta(user, (size_t)(first / KVT_TOKENS));
    return (const unsigned char *)(meta->positions + first % KVT_TOKENS);
}

/*
 * The length to which the sequence will be cut: what is behind need not be staged. With a window,
 * what can be reached shows only when all is there.
 */
static void set_keep(kvt_snap_stage *st)
{
    const kvt_load_options *o = st->options;
    uint64_t most = st->prefix_tokens;
    uint32_t g;

    if (o->reuse == KVT_REUSE_ALL)
        return;
    if (o->n_prompt && most == o->n_prompt)
        most--;
    for (g = 0; g < st->seq->cache->n_groups; g++)
        if (kvt_has_window(&st->seq->cache->groups[g]))
            return;
    /* One more than is wanted: the cut finds a checkpoint there, and restores it. */
    st->keep_tokens = most < st->n_tokens ? most + 1 : most;
}

static kvt_block **extra_at(const kvt_snap_stage *st, uint64_t i)
{
    return (kvt_block **)(void *)st->extras.data + i;
}

/* Whether a block is of tokens that are kept; one of checkpoints alone is of theirs. */
static int is_kept(const kvt_snap_stage *st, const kvt_snap_block *at)
{
    return at->row < kvt_rows(st->keep_tokens);
}

/* Where a block of the file is staged; NULL: it is not wanted. */
static kvt_status entry_of(kvt_snap_stage *st, const kvt_snap_block *at, kvt_block ***entry)
{
    *entry = NULL;
    if (!is_kept(st, at) && !at->extra)
        return KVT_OK;
    if (at->extra > st->n_extras) {
        size_t have = st->n_extras * sizeof **entry;
        size_t more = st->extras.bytes ? 2 * st->extras.bytes : STAGE_ROWS * sizeof **entry;
        kvt_status status =
            have + sizeof **entry <= st->extras.bytes
                ? KVT_OK
                : kvt_snap_reserve(st->context, &st->extras, have, more, "a snapshot's staging");
        if (status != KVT_OK)
            return status;
        *extra_at(st, st->n_extras++) = NULL;
    }
    if (!is_kept(st, at)) /* it has its number all the same */
        return KVT_OK;
    *entry = at->extra ? extra_at(st, at->extra - 1)
                       : &staged(st, (size_t)at->row)[st->group_of[at->group]];
    return KVT_OK;
}

/* The form that a block gets. */
static uint32_t form_of(const kvt_snap_stage *st, const kvt_snap_block *at)
{
    return st->sources[at->group]
               ? kvt_convert_form(st->sources[at->group], at->form,
                                  &st->seq->cache->groups[st->group_of[at->group]], (size_t)at->row,
                                  at->tokens)
               : at->form;
}

static kvt_status on_place(void *user, const kvt_snap_block *at, uint32_t layer_index,
                           unsigned char **image)
{
    kvt_snap_stage *st = user;
    kvt_cache *cache = st->seq->cache;
    uint32_t group = st->group_of[at->group];
    uint32_t layer = st->layer_of[st->first_layer[at->group] + layer_index];
    kvt_block **entry;
    kvt_status status;

    *image = NULL;
    if (group == UINT32_MAX) {
        if (at->extra > st->n_extras) /* it has its number all the same */
            return entry_of(st, at, &entry);
        return KVT_OK;
    }
    status = entry_of(st, at, &entry);
    if (status != KVT_OK || !entry)
        return status;
    if (!*entry) {
        kvt_block *fresh;
        status = kvt_rows_lend(st->seq, kvt_class_of(cache, group, form_of(st, at)), &fresh);
        if (status != KVT_OK)
            return status;
        kvt_block_will_be_read(fresh);
        *entry = fresh;
    }
    if (layer != UINT32_MAX && !st->sources[at->group])
        *image = kvt_head_record(&cache->groups[group], *entry, layer, 0);
    return KVT_OK;
}

/* The block that a verified image is of, which is there. */
static kvt_block *block_at(const kvt_snap_stage *st, const kvt_snap_block *at)
{
    if (at->extra)
        return *extra_at(st, at->extra - 1);
    return is_kept(st, at) ? staged(st, (size_t)at->row)[st->group_of[at->group]] : NULL;
}

/* An image in types of the file's, into the block. */
static kvt_status on_layer(void *user, const kvt_snap_block *at, uint32_t layer_index,
                           const unsigned char *image, kvt_snap_buffer *scratch)
{
    const kvt_snap_stage *st = user;
    uint32_t group = st->group_of[at->group];
    uint32_t layer = st->layer_of[st->first_layer[at->group] + layer_index];
    const kvt_group *own;
    kvt_block *block;

    if (group == UINT32_MAX || layer == UINT32_MAX || !st->sources[at->group])
        return KVT_OK;
    block = block_at(st, at);
    if (!block)
        return KVT_OK;
    own = &st->seq->cache->groups[group];
    return kvt_convert_image(st->context, st->sources[at->group], at->form, image, at->tokens, own,
                             block->form, kvt_head_record(own, block, layer, 0), scratch);
}

static kvt_status on_block(void *user, const kvt_snap_block *at, const unsigned char *id)
{
    const kvt_snap_stage *st = user;
    kvt_block *block;

    if (!st->whole || st->sources[at->group])
        return KVT_OK;
    block = block_at(st, at);
    if (block)
        kvt_block_set_id(st->seq->cache, block, at->tokens, id);
    return KVT_OK;
}

static kvt_status on_map(void *user, const kvt_snap_block *at, kvt_snap_mapped *file,
                         uint64_t n_blocks, const unsigned char *images,
                         const unsigned char *digests, int *taken)
{
    kvt_snap_stage *st = user;
    uint32_t group = st->group_of[at->group];
    kvt_block **entry;
    kvt_status status;

    *taken = 0;
    if (!st->whole || st->sources[at->group] || group == UINT32_MAX)
        return KVT_OK;
    status = entry_of(st, at, &entry);
    if (status != KVT_OK || !entry)
        return status;
    status = kvt_snap_map_block(&st->maps, st->seq->cache, file, n_blocks, group, at->form,
                                at->tokens, images, digests, entry);
    *taken = status == KVT_OK;
    return status;
}

/* What the sequence becomes, as far as it is staged: to be looked at, not changed. */
static void set_view(kvt_snap_stage *st)
{
    st->made.table = (kvt_block **)(void *)st->table.data;
    st->made.n_rows = st->rows;
}

/* A checkpoint's block of a row, NULL where its window has released it. */
static kvt_block *block_of(const kvt_snap_stage *st, const kvt_snap_checkpoint *c, uint32_t group,
                           uint64_t row)
{
    uint32_t entry;

    const uint32_t column = st->group_of[group];

    if (row < c->from[group])
        return staged(st, (size_t)row)[column];
    entry = kvt_get32(c->entries[group] + 4 * (row - c->from[group]));
    if (entry == KVT_SNAP_ABSENT)
        return NULL;
    /* Types that are not sealed: the sequence's own full row stands for it, as in a save. */
    if (st->sources[group] && !st->seq->cache->groups[column].seals &&
        row < c->n_tokens / KVT_TOKENS && staged(st, (size_t)row)[column])
        return staged(st, (size_t)row)[column];
    return entry < c->n_own ? staged(st, (size_t)row)[column] : *extra_at(st, entry - c->n_own);
}

/* Rows of a checkpoint that are sealed, or released: types that are converted change it. */
static size_t sealed_rows(const kvt_snap_stage *st, const kvt_snap_checkpoint *c, uint32_t group,
                          size_t rows)
{
    size_t row = 0;

    if (!st->sources[group])
        return (size_t)c->sealed[group];
    for (; row < rows; row++) {
        const kvt_block *block = block_of(st, c, group, row);
        if (block && kvt_is_open(block->form))
            break;
    }
    return row;
}

static kvt_status on_checkpoint(void *user, const kvt_snap_checkpoint *c)
{
    kvt_snap_stage *st = user;
    kvt_cache *cache = st->seq->cache;
    size_t from[KVT_MAX_GROUPS + 1], rows = kvt_rows(c->n_tokens), row;
    uint32_t file_group[KVT_MAX_GROUPS + 1] = {0}; /* of the cache's */
    kvt_checkpoint *made;
    kvt_status status;
    uint32_t g;

    if (c->n_tokens > st->keep_tokens)
        return KVT_OK;
    for (g = 0; g < KVT_MAX_GROUPS; g++)
        if (g < st->n_groups && st->group_of[g] != UINT32_MAX)
            file_group[st->group_of[g]] = g;
    for (g = 0; g < cache->n_groups; g++) {
        size_t behind = (size_t)c->first[file_group[g]];
        from[g] = (size_t)c->kept[file_group[g]];
        /* A window may release it later, also where the file has none. */
        if (behind == 0)
            behind = kvt_sink_rows(&cache->groups[g]);
        if (kvt_has_window(&cache->groups[g]) && behind < from[g])
            from[g] = behind;
    }
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
            kvt_block *block =
                g < cache->n_groups ? block_of(st, c, file_group[g], row) : staged(st, row)[g];
            kvt_checkpoint_blocks(made, g)[row - from[g]] = block;
            if (block)
                kvt_block_refer_locked(cache, block);
        }
    pthread_mutex_unlock(&cache->lock);
    for (g = 0; g < cache->n_groups; g++) {
        kvt_seq_group *state = &made->groups[g];
        state->first = (size_t)c->first[file_group[g]];
        if (cache->groups[g].seals)
            state->n_final = state->n_sealed = state->seal_end =
                sealed_rows(st, c, file_group[g], rows);
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

/* Converted types may need more of the first rows, or fewer, than the file has of a window. */
static kvt_status check_sinks(const kvt_snap_stage *st, const kvt_snap_header *header)
{
    uint32_t g;
    size_t row;

    for (g = 0; g < header->n_groups; g++) {
        const kvt_group *own;
        if (!st->sources[g])
            continue;
        own = &st->seq->cache->groups[st->group_of[g]];
        if (kvt_sink_rows(own) == kvt_snap_sink_rows(&header->groups[g]))
            continue;
        for (row = 0; row < st->rows; row++)
            if (!staged(st, row)[st->group_of[g]])
                return kvt_fail(st->seq->cache, KVT_ERR_MISMATCH,
                                "load: the window of group %u has released tokens, and the types "
                                "differ in what they need of the first ones",
                                (unsigned)g);
    }
    return KVT_OK;
}

/* All is there: the states of the groups. */
kvt_status kvt_snap_stage_complete(kvt_snap_stage *st, const kvt_snap_header *header)
{
    size_t rows = kvt_rows(st->keep_tokens);
    kvt_status status;
    uint32_t c;

    while (st->rows > rows) { /* what is behind a prompt's end has not been staged */
        st->rows--;
        for (c = 0; c < st->seq->cache->n_columns; c++)
            kvt_block_undo(st->seq->cache, staged(st, st->rows)[c]);
    }
    if (st->keep_tokens < header->n_tokens)
        st->made.next_position = -1;
    set_view(st);
    status = check_sinks(st, header);
    if (status != KVT_OK)
        return status;
    st->made.length = st->keep_tokens;
    memset(st->made.groups, 0, sizeof st->made.groups);
    kvt_rows_state(&st->made);
    if (!kvt_window_suffices(&st->made, st->made.length))
        return kvt_fail(st->seq->cache, KVT_ERR_CORRUPT,
                        "snapshot damaged: blocks that a window needs are missing");
    return header->flags & KVT_SNAP_MOVED
               ? kvt_turns_make(&st->made, UINT64_MAX, 0, &st->made.turns)
               : KVT_OK;
}

int kvt_snap_stage_converts(const kvt_snap_stage *st)
{
    for (uint32_t g = 0; g < st->n_groups; g++) {
        if (st->sources[g])
            return 1;
    }
    return 0;
}

/* The checkpoints have references to the blocks that are theirs alone. */
static void drop_extras(kvt_snap_stage *st)
{
    while (st->n_extras)
        kvt_block_undo(st->seq->cache, *extra_at(st, --st->n_extras));
}

void kvt_snap_stage_drop(kvt_snap_stage *st)
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

/* All ids have come when the first positions do. */
static kvt_status on_tokens_of_prompt(void *user, uint32_t kind, uint64_t first, uint32_t n,
                                      const unsigned char *values)
{
    kvt_snap_stage *st = user;
    kvt_status status = on_tokens(user, kind, first, n, values);

    if (status == KVT_OK && kind == KVT_SNAP_KIND_TOKEN_IDS && first + n == st->n_tokens)
        set_keep(st);
    return status;
}

void kvt_snap_stage_release(kvt_snap_stage *st)
{
    uint32_t g;

    drop_extras(st);
    kvt_snap_maps_release(&st->maps);
    kvt_snap_release(st->context, &st->extras);
    kvt_snap_release(st->context, &st->table);
    for (g = 0; g < KVT_MAX_GROUPS; g++)
        if (st->sources[g]) {
            kvt_snap_target_release(st->context, st->sources[g], st->signs[g]);
            kvt_snap_free(st->context, st->sources[g], sizeof *st->sources[g]);
        }
}

void kvt_snap_stage_begin(kvt_snap_stage *st, const kvt_snap_context *context, kvt_seq *seq,
                          const kvt_load_options *options, kvt_snap_sink *sink)
{
    memset(st, 0, sizeof *st);
    st->context = context;
    st->seq = seq;
    st->options = options;
    st->made.cache = seq->cache;
    st->made.next_position = -1;
    st->maps.lazy = options->map == KVT_MAP_LAZY;
    memset(sink, 0, sizeof *sink);
    sink->user = st;
    sink->header = kvt_snap_stage_header;
    sink->sequence = on_sequence;
    sink->piece = on_piece;
    sink->tokens = on_tokens_of_prompt;
    sink->positions = on_positions;
    sink->place = on_place;
    sink->layer = on_layer;
    sink->map = options->map ? on_map : NULL;
    sink->block = on_block;
    sink->checkpoint = on_checkpoint;
    sink->progress = on_progress;
    sink->lazy = options->map == KVT_MAP_LAZY;
}
