/*
 * Load a snapshot into a sequence.
 *
 * The reader verifies, this file stages: new blocks take what it delivers, in a table of their
 * own, which grows as the data arrives. Checkpoints come behind the blocks, and take references to
 * them. Only when the end has been read and verified does the sequence give its blocks up and take
 * the new ones, which cannot fail.
 */
#include "src/snapshot/convert.h"
#include "src/snapshot/crypt.h"
#include "src/snapshot/map.h"

#include <stdio.h>

#define STAGE_ROWS 64u /* first size of the table */

typedef struct stage {
    const kvt_snap_context *context;
    kvt_seq *seq;
    const kvt_load_options *options;
    /*
     * By the file's groups: the cache's, UINT32_MAX: none; and by its layers, in the group's order.
     */
    uint32_t group_of[KVT_MAX_GROUPS], first_layer[KVT_MAX_GROUPS];
    uint32_t layer_of[KVT_MAX_LAYERS];  /* in the cache's group; UINT32_MAX: not wanted */
    kvt_group *sources[KVT_MAX_GROUPS]; /* where types are converted, else NULL */
    float *signs[KVT_MAX_GROUPS];       /* of their rotations */
    int whole;                          /* all layers: ids hold, of groups without other types */
    uint32_t n_groups;                  /* of the file */
    uint64_t n_tokens;                  /* of the file */
    uint64_t prefix_tokens;             /* equal to the prompt's, as far as ids have come */
    uint64_t keep_tokens;               /* no more is wanted: rows behind are not staged */
    kvt_snap_maps maps;
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
    else
        (void)snprintf(text, text_bytes, "none");
}

static kvt_status on_sequence(void *user, int32_t next_position, const unsigned char *tag,
                              uint32_t tag_bytes)
{
    stage *st = user;
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

/* The file's layers that the cache's are, and the cache's groups of its groups. */
static kvt_status match_layers(stage *st, const kvt_snap_header *header)
{
    const kvt_cache *cache = st->seq->cache;
    const kvt_load_options *o = st->options;
    uint32_t g, i, n = 0, c;

    for (g = 0; g < header->n_groups; g++) {
        uint32_t next = 0;
        st->first_layer[g] = n;
        st->group_of[g] = UINT32_MAX;
        for (i = 0; i < header->groups[g].n_layers; i++, n++) {
            uint32_t layer = header->layers[n], at = layer;
            st->layer_of[n] = UINT32_MAX;
            if (o->layers) {
                for (at = 0; at < o->n_layers && o->layers[at] != layer; at++)
                    ;
                if (at == o->n_layers)
                    continue;
            }
            c = cache->layers[at].group;
            if (st->group_of[g] == UINT32_MAX)
                st->group_of[g] = c;
            if (st->group_of[g] != c)
                return kvt_fail(
                    cache, KVT_ERR_MISMATCH,
                    "snapshot of another model: its layer %u is in group %u, layer %u of "
                    "the cache in group %u",
                    (unsigned)layer, (unsigned)g, (unsigned)at, (unsigned)c);
            st->layer_of[n] = next++;
        }
        if (st->group_of[g] != UINT32_MAX && next != cache->groups[st->group_of[g]].config.n_layers)
            return kvt_fail(cache, KVT_ERR_MISMATCH,
                            "snapshot of another model: %u of its layers are of group %u of the "
                            "cache, which has %u",
                            (unsigned)next, (unsigned)st->group_of[g],
                            (unsigned)cache->groups[st->group_of[g]].config.n_layers);
    }
    for (c = 0; c < cache->n_groups; c++) {
        uint32_t with = 0;
        for (g = 0; g < header->n_groups; g++)
            with += st->group_of[g] == c;
        if (with != 1)
            return kvt_fail(cache, KVT_ERR_MISMATCH,
                            "snapshot of another model: group %u of the cache is %u groups of it",
                            (unsigned)c, (unsigned)with);
    }
    return KVT_OK;
}

/* Where the file has other types than the cache. */
static kvt_status match_types(stage *st, const kvt_snap_header *header)
{
    kvt_cache *cache = st->seq->cache;
    uint32_t g;

    for (g = 0; g < header->n_groups; g++) {
        const kvt_snapshot_group *group = &header->groups[g];
        const kvt_group *own;
        void *memory;
        kvt_status status;
        if (st->group_of[g] == UINT32_MAX)
            continue;
        own = &cache->groups[st->group_of[g]];
        if (group->k_type == own->config.k_type && group->v_type == own->config.v_type)
            continue;
        status = kvt_snap_alloc(st->context, sizeof *st->sources[g], "a snapshot's types", &memory);
        if (status != KVT_OK)
            return status;
        st->sources[g] = memory;
        memset(memory, 0, sizeof *st->sources[g]);
        status = kvt_snap_target_make(st->context, own, group, st->sources[g], &st->signs[g]);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

/*
 * Groups that are left out are verified like the others, in memory that grows with their layers. A
 * model's groups differ in size, but a file could say anything of them: what goes far beyond the
 * layers that are wanted is refused.
 */
#define UNWANTED_TIMES 64u
#define UNWANTED_BYTES ((uint64_t)4 << 20) /* or so many, where that is more */
static kvt_status check_unwanted(const stage *st, const kvt_snap_header *header)
{
    uint64_t most = 0;
    uint32_t g;

    for (g = 0; g < header->n_groups; g++) {
        uint64_t bytes = kvt_snap_group_image_bytes(&header->groups[g]);
        if (st->group_of[g] != UINT32_MAX && bytes > most)
            most = bytes;
    }
    most *= UNWANTED_TIMES;
    if (most < UNWANTED_BYTES)
        most = UNWANTED_BYTES;
    for (g = 0; g < header->n_groups; g++) {
        uint64_t bytes = kvt_snap_group_image_bytes(&header->groups[g]);
        if (st->group_of[g] == UINT32_MAX && bytes > most)
            return kvt_fail(st->seq->cache, KVT_ERR_LIMIT,
                            "load: a layer of group %u of the snapshot, of which none is wanted, "
                            "takes %llu bytes for 64 tokens; %llu are the most beside those that "
                            "are",
                            (unsigned)g, (unsigned long long)bytes, (unsigned long long)most);
    }
    return KVT_OK;
}

static kvt_status on_header(void *user, const kvt_snap_header *header)
{
    stage *st = user;
    kvt_status status;

    if (st->options->layers) {
        status = kvt_snap_header_match_model(st->seq->cache, header);
    } else {
        status = kvt_snap_header_match(st->seq->cache, header, st->options->convert);
    }
    if (status == KVT_OK)
        status = match_layers(st, header);
    if (status != KVT_OK)
        return status;
    st->n_groups = header->n_groups;
    st->n_tokens = header->n_tokens;
    st->keep_tokens = header->n_tokens;
    st->whole = header->n_layers == st->seq->cache->n_layers;
    for (uint32_t g = 0; g < header->n_groups && st->options->layers; g++) {
        if (st->group_of[g] == UINT32_MAX)
            continue;
        status =
            kvt_snap_group_match(st->seq->cache, header, g, st->group_of[g], st->options->convert);
        if (status != KVT_OK)
            return status;
    }
    status = check_unwanted(st, header);
    return status == KVT_OK ? match_types(st, header) : status;
}

static kvt_status on_piece(void *user, const kvt_snapshot_piece *piece)
{
    const stage *st = user;
    return st->options->on_piece && st->options->on_piece(st->options->piece_user, piece)
               ? kvt_fail(st->seq->cache, KVT_ERR_CANCELLED, "load: cancelled by on_piece")
               : KVT_OK;
}

static kvt_status on_progress(void *user, uint64_t done, uint64_t total)
{
    const stage *st = user;
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
static void compare_prompt(stage *st, uint64_t first, uint32_t n, const unsigned char *values)
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
    stage *st = user;
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
static void set_keep(stage *st)
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

static kvt_block **extra_at(const stage *st, uint64_t i)
{
    return (kvt_block **)(void *)st->extras.data + i;
}

/* Whether a block is of tokens that are kept; one of checkpoints alone is of theirs. */
static int is_kept(const stage *st, const kvt_snap_block *at)
{
    return at->row < kvt_rows(st->keep_tokens);
}

/* Where a block of the file is staged; NULL: it is not wanted. */
static kvt_status entry_of(stage *st, const kvt_snap_block *at, kvt_block ***entry)
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
static uint32_t form_of(const stage *st, const kvt_snap_block *at)
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
    stage *st = user;
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
        status = kvt_block_get(cache, kvt_class_of(cache, group, form_of(st, at)), &fresh);
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
static kvt_block *block_at(const stage *st, const kvt_snap_block *at)
{
    if (at->extra)
        return *extra_at(st, at->extra - 1);
    return is_kept(st, at) ? staged(st, (size_t)at->row)[st->group_of[at->group]] : NULL;
}

/* An image in types of the file's, into the block. */
static kvt_status on_layer(void *user, const kvt_snap_block *at, uint32_t layer_index,
                           const unsigned char *image, kvt_snap_buffer *scratch)
{
    const stage *st = user;
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
    const stage *st = user;
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
    stage *st = user;
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
static size_t sealed_rows(const stage *st, const kvt_snap_checkpoint *c, uint32_t group,
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
    stage *st = user;
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
static kvt_status check_sinks(const stage *st, const kvt_snap_header *header)
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
static kvt_status complete(stage *st, const kvt_snap_header *header)
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

static int converts(const stage *st)
{
    for (uint32_t g = 0; g < st->n_groups; g++) {
        if (st->sources[g])
            return 1;
    }
    return 0;
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

/* How to go on with the prompt: see kvt_load_result. */
static void answer(const stage *st, const kvt_seq *seq, kvt_load_result *result)
{
    const kvt_load_options *o = st->options;
    const kvt_checkpoint *checkpoint;
    uint64_t most;

    memset(result, 0, sizeof *result);
    result->n_tokens = seq->length;
    most = result->prefix_tokens = st->prefix_tokens;
    if (o->n_prompt && most == o->n_prompt)
        most--;
    checkpoint = kvt_checkpoint_before(seq, most);
    result->reuse_tokens = kvt_seq_reachable(seq, most);
    result->checkpoint_tokens = checkpoint ? checkpoint->n_tokens : UINT64_MAX;
}

/* Cut to what the prompt can use: no step is pending and it can be reached, so it does not fail. */
static kvt_status cut(kvt_seq *seq, uint32_t reuse, kvt_load_result *result)
{
    uint64_t n = reuse == KVT_REUSE_PREFIX                 ? result->reuse_tokens
                 : result->checkpoint_tokens == UINT64_MAX ? 0
                                                           : result->checkpoint_tokens;
    kvt_status status;

    if (n == seq->length)
        return KVT_OK;
    status = kvt_seq_truncate(seq, n);
    result->n_tokens = seq->length;
    return status;
}

/* The checks that all forms share. *copy: the options, or the defaults. */
static kvt_status admit(const kvt_seq *seq, const kvt_load_options *options, kvt_load_options *copy)
{
    uint32_t i;

    memset(copy, 0, sizeof *copy);
    if (options) {
        if (!kvt_copy_struct(copy, options, sizeof *copy))
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: unknown struct_size");
        if (!copy->prompt && copy->n_prompt)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: prompt is NULL");
        if (copy->reuse > KVT_REUSE_CHECKPOINT || copy->map > KVT_MAP_LAZY || copy->convert > 1)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: reuse %u, map %u or convert %u",
                            (unsigned)copy->reuse, (unsigned)copy->map, (unsigned)copy->convert);
        if (copy->layers ? copy->n_layers != seq->cache->n_layers : copy->n_layers != 0)
            return kvt_fail(seq->cache, KVT_ERR_ARG,
                            "load options: n_layers is %u, the cache's is %u",
                            (unsigned)copy->n_layers, (unsigned)seq->cache->n_layers);
        for (i = 1; i < copy->n_layers; i++)
            if (copy->layers[i] <= copy->layers[i - 1])
                return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: layers do not ascend");
        if (copy->reuse && !copy->n_prompt)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: reuse without a prompt");
        if (copy->map && copy->key)
            return kvt_fail(seq->cache, KVT_ERR_UNSUPPORTED,
                            "load: an encrypted snapshot cannot be mapped");
    }
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "load: a step is pending");
    return KVT_OK;
}

/* Reading memory by way of a reader: what is encrypted. */
typedef struct view {
    const unsigned char *data;
    size_t bytes, at;
} view;

/* What is read from, beside the bytes. */
typedef struct origin {
    kvt_snap_input input;
    kvt_snap_file *file; /* NULL: none */
    const char *path;    /* of it */
    int whole;           /* the snapshot fills it */
    const view *view;    /* memory by way of a reader, NULL: none */
    const kvt_snap_crypt *crypt;
} origin;

/* A failed read: why. */
static kvt_status explain(const origin *from, kvt_status status)
{
    kvt_status why = KVT_OK;

    if (status != KVT_ERR_IO)
        return status;
    if (from->crypt)
        why = kvt_snap_crypt_failure(from->crypt);
    if (why == KVT_OK && from->file)
        why = kvt_snap_file_failure(from->file, from->path);
    return why != KVT_OK ? why : status;
}

/* Nothing may follow the snapshot in what it fills. */
static kvt_status expect_end(const stage *st, const origin *from, uint64_t bytes)
{
    unsigned char byte;
    int64_t n = 0;

    if (!from->whole)
        return KVT_OK;
    if (!from->input.memory && from->crypt)
        n = from->input.reader.read(from->input.reader.user, &byte, 1);
    if (n < 0)
        return KVT_ERR_IO;
    if (n > 0 || (from->input.memory && bytes != from->input.bytes) ||
        (from->view && from->view->at != from->view->bytes))
        return kvt_fail(st->seq->cache, KVT_ERR_CORRUPT,
                        "snapshot damaged: there are bytes after its end%s%s",
                        from->path ? ": " : "", from->path ? from->path : "");
    return !from->input.memory && from->file ? kvt_snap_file_expect_end(from->file, from->path)
                                             : KVT_OK;
}

static void release(stage *st)
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

/* All ids have come when the first positions do. */
static kvt_status on_tokens_of_prompt(void *user, uint32_t kind, uint64_t first, uint32_t n,
                                      const unsigned char *values)
{
    stage *st = user;
    kvt_status status = on_tokens(user, kind, first, n, values);

    if (status == KVT_OK && kind == KVT_SNAP_KIND_TOKEN_IDS && first + n == st->n_tokens)
        set_keep(st);
    return status;
}

static kvt_status load(kvt_seq *seq, const kvt_snap_context *context, const origin *from,
                       const kvt_load_options *options, kvt_load_result *result)
{
    kvt_load_result found;
    kvt_snap_counts counts;
    kvt_snap_header *header;
    kvt_snap_sink sink;
    stage st;
    void *memory;
    kvt_status status;

    memset(&st, 0, sizeof st);
    memset(&sink, 0, sizeof sink);
    memset(&counts, 0, sizeof counts);
    st.context = context;
    st.seq = seq;
    st.options = options;
    st.made.cache = seq->cache;
    st.made.next_position = -1;
    st.maps.lazy = options->map == KVT_MAP_LAZY;
    sink.user = &st;
    sink.header = on_header;
    sink.sequence = on_sequence;
    sink.piece = on_piece;
    sink.tokens = on_tokens_of_prompt;
    sink.positions = on_positions;
    sink.place = on_place;
    sink.layer = on_layer;
    sink.map = options->map ? on_map : NULL;
    sink.block = on_block;
    sink.checkpoint = on_checkpoint;
    sink.progress = on_progress;
    sink.lazy = options->map == KVT_MAP_LAZY;
    status = kvt_snap_alloc(context, sizeof *header, "a snapshot's header", &memory);
    if (status != KVT_OK)
        return status;
    header = memory;
    status = kvt_snap_read(context, &from->input, 0, &sink, header, &counts);
    if (status == KVT_OK)
        status = expect_end(&st, from, counts.file_bytes);
    status = explain(from, status);
    if (status == KVT_OK)
        status = complete(&st, header);
    if (status == KVT_OK) {
        kvt_checkpoints_drop_from(seq, 0);
        kvt_turns_free(seq->cache, seq->turns);
        seq->turns = NULL;
        kvt_rows_replace(seq, &st.made);
        if (seq->length && (header->flags & KVT_SNAP_UNKEYED || converts(&st)))
            seq->unkeyed_from = 0;
        answer(&st, seq, &found);
        if (options->reuse)
            status = cut(seq, options->reuse, &found);
        found.mapped_bytes = kvt_snap_maps_bytes(&st.maps);
        if (status == KVT_OK && result)
            *result = found;
    } else {
        drop(&st);
    }
    release(&st);
    kvt_snap_free(context, header, sizeof *header);
    return status;
}

/* The same, decrypted where there is a key. */
static kvt_status load_from(kvt_seq *seq, const kvt_snap_context *context, origin *from,
                            const kvt_load_options *options, kvt_load_result *result)
{
    kvt_snap_crypt crypt;
    kvt_reader reader, plain;
    kvt_status status;

    if (!from->input.folder)
        from->input.folder = options->folder;
    from->input.key = options->key;
    if (!options->key)
        return load(seq, context, from, options, result);
    reader = from->input.reader;
    status = kvt_snap_decrypt_begin(context, options->key, &reader, &crypt, &plain);
    if (status == KVT_ERR_IO)
        status = explain(from, status);
    if (status == KVT_OK) {
        from->input.reader = plain;
        from->input.bytes = UINT64_MAX;
        from->crypt = &crypt;
        status = load(seq, context, from, options, result);
    }
    kvt_snap_crypt_release(&crypt);
    return status;
}

static origin origin_of(const kvt_reader *reader)
{
    origin from;
    memset(&from, 0, sizeof from);
    if (reader)
        from.input.reader = *reader;
    from.input.bytes = UINT64_MAX;
    return from;
}

/* What all loads begin with. */
static kvt_status begin(const kvt_seq *seq, const kvt_load_options *options,
                        kvt_snap_context *context, kvt_load_options *copy)
{
    memset(context, 0, sizeof *context);
    context->cache = seq->cache;
    return admit(seq, options, copy);
}

static kvt_status refuse_map(const kvt_seq *seq, const kvt_load_options *options)
{
    return options->map ? kvt_fail(seq->cache, KVT_ERR_ARG, "load: only a file can be mapped")
                        : KVT_OK;
}

kvt_status kvt_seq_load_stream(kvt_seq *seq, const kvt_reader *reader,
                               const kvt_load_options *options, kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    origin from;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!reader || !reader->read)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no reader");
    status = begin(seq, options, &context, &copy);
    if (status == KVT_OK)
        status = refuse_map(seq, &copy);
    if (status != KVT_OK)
        return status;
    from = origin_of(reader);
    return load_from(seq, &context, &from, &copy, result);
}

kvt_status kvt_seq_load_fd(kvt_seq *seq, int fd, const kvt_load_options *options,
                           kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    kvt_snap_file file;
    kvt_reader reader;
    origin from;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (fd < 0)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: file descriptor %d", fd);
    status = begin(seq, options, &context, &copy);
    if (status == KVT_OK)
        status = refuse_map(seq, &copy);
    if (status != KVT_OK)
        return status;
    kvt_snap_file_of_fd(&context, fd, &file, NULL, &reader);
    from = origin_of(&reader);
    from.file = &file;
    from.path = "the file descriptor";
    return load_from(seq, &context, &from, &copy, result);
}

static int64_t read_memory(void *user, void *data, size_t bytes)
{
    view *v = user;
    if (bytes > v->bytes - v->at)
        bytes = v->bytes - v->at;
    memcpy(data, v->data + v->at, bytes);
    v->at += bytes;
    return (int64_t)bytes;
}

kvt_status kvt_seq_load_memory(kvt_seq *seq, const void *data, size_t bytes,
                               const kvt_load_options *options, kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    origin from;
    view v = {data, bytes, 0};
    kvt_reader reader = {&v, read_memory};
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!data)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no memory");
    status = begin(seq, options, &context, &copy);
    if (status == KVT_OK)
        status = refuse_map(seq, &copy);
    if (status != KVT_OK)
        return status;
    from = origin_of(copy.key ? &reader : NULL);
    from.whole = 1;
    if (copy.key) {
        from.view = &v;
    } else {
        from.input.memory = data;
        from.input.bytes = bytes;
    }
    return load_from(seq, &context, &from, &copy, result);
}

kvt_status kvt_seq_load(kvt_seq *seq, const char *path, const kvt_load_options *options,
                        kvt_load_result *result)
{
    char folder[KVT_SNAP_PATH_BYTES];
    kvt_snap_context context;
    kvt_load_options copy;
    kvt_snap_mapped mapped;
    kvt_snap_file file;
    kvt_reader reader;
    origin from;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!path || !*path)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no path");
    status = begin(seq, options, &context, &copy);
    if (status != KVT_OK)
        return status;
    memset(&mapped, 0, sizeof mapped);
    status = kvt_snap_file_open(&context, path, &file, &reader);
    if (status == KVT_OK) {
        size_t n = kvt_snap_folder_bytes(path);
        from = origin_of(&reader);
        from.file = &file;
        from.path = path;
        from.whole = 1;
        from.input.bytes = file.bytes;
        if (!copy.key) {
            from.input.view = kvt_snap_file_view;
            from.input.read_at = file.bytes == UINT64_MAX ? NULL : kvt_snap_file_part;
            from.input.skip = kvt_snap_file_skip;
        }
        if (n < sizeof folder) { /* it was opened, so it is */
            memcpy(folder, path, n);
            folder[n] = '\0';
            from.input.folder = copy.folder ? copy.folder : folder;
        }
        if (copy.map) {
            status = kvt_snap_file_map(&file, path, &mapped);
            from.input.memory = mapped.memory;
            from.input.mapped = &mapped;
        }
        if (status == KVT_OK)
            status = load_from(seq, &context, &from, &copy, result);
        if (!mapped.owner)
            kvt_snap_unmap(&mapped);
    }
    kvt_snap_file_close(&file);
    return status;
}
