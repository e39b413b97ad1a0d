/*
 * kvt_prefix_put: a sequence's sealed blocks, and its checkpoints, as far as a store lacks them.
 *
 * Values refer to the blocks where they lie: a head is made for each, with the digests of its
 * layers, and the store takes both. Only blocks with padding, or with slots without a token, are
 * copied first, with zeros there.
 */
#include "src/store/stored.h"

#define BATCH 64u                        /* values that are put at once, at most */
#define BATCH_BYTES ((uint64_t)64 << 20) /* and bytes, unless a value has more */
#define PARTS 2u                         /* of a block's value */

typedef struct batch {
    kvt_stored *p;
    size_t n;
    uint64_t bytes;
    kvt_snap_buffer heads; /* [BATCH][head_room] */
    size_t head_room;
    kvt_snap_buffer copies; /* of the values' images, copied bytes of them in use */
    size_t copied;
    size_t at[BATCH]; /* in the prefix's keys */
    kvt_store_key keys[BATCH];
    kvt_store_value values[BATCH];
    kvt_store_part parts[BATCH][PARTS];
    kvt_prefix_result *result;
} batch;

/* ---- which tokens ---- */

/*
 * Tokens from the beginning that have ids and depend on those before them alone. Shifts of its keys
 * tell a loaded sequence of a removal.
 */
static uint64_t count_keyed(const kvt_seq *seq, uint64_t most)
{
    if (most > seq->unkeyed_from)
        most = seq->unkeyed_from;
    for (uint64_t i = 0; i < most; i++) {
        const kvt_meta *meta = kvt_seq_meta(seq, (size_t)(i / KVT_TOKENS));
        if (meta->token_ids[i % KVT_TOKENS] < 0 || kvt_shift_at(meta, i % KVT_TOKENS) != 0)
            return i;
    }
    return most;
}

/*
 * The sealed block of a full row, in the form that its key says: a load leaves what it finds, and
 * the snapshot may be of a cache with other fine_tokens. It is that of the table, or of a
 * checkpoint where a window has released it there. NULL: there is none.
 */
static const kvt_block *sealed_block(const kvt_seq *seq, size_t row, uint32_t g)
{
    const uint32_t form = kvt_sealed_form(&seq->cache->groups[g], row);
    const kvt_block *block = kvt_seq_block(seq, row, g);
    size_t i;

    if (block)
        return block->form == form ? block : NULL;
    for (i = 0; i < seq->n_checkpoints; i++) {
        kvt_checkpoint *c = seq->checkpoints[i];
        if (row >= c->from[g] && row < c->n_tokens / KVT_TOKENS) {
            const kvt_block *kept = kvt_checkpoint_blocks(c, g)[row - c->from[g]];
            if (kept && kept->form == form)
                return kept;
        }
    }
    return NULL;
}

/* ---- values ---- */

/* Digests of a block's layers, after which its images are at *images. copy: room, where needed. */
static kvt_status digest_block(kvt_stored *p, const kvt_block *block, uint32_t tokens,
                               unsigned char *copy, unsigned char *digests,
                               const unsigned char **images)
{
    const kvt_group *group = kvt_group_of_block(p->cache, block);
    const kvt_layout *layout = kvt_block_layout(group, block);
    uint32_t layer;

    *images = block->data;
    for (layer = 0; layer < group->config.n_layers; layer++) {
        const unsigned char *image = block->data + layer * layout->layer_bytes;
        kvt_status status = kvt_block_verify(block, layer);
        if (status != KVT_OK)
            return status;
        if (!kvt_snap_is_image(group, block->form, tokens)) {
            unsigned char *cleared = copy + layer * layout->layer_bytes;
            memcpy(cleared, image, layout->layer_bytes);
            kvt_snap_image_clear(group, block->form, tokens, cleared);
            image = cleared;
            *images = copy;
        }
        kvt_snap_digest(image, layout->layer_bytes, digests + layer * KVT_SNAP_ID_BYTES);
    }
    return KVT_OK;
}

static kvt_value_entry entry_of(const kvt_stored *p, const kvt_block *block, size_t row, uint32_t g,
                                uint32_t tokens)
{
    const kvt_group *group = &p->cache->groups[g];
    kvt_value_entry entry;

    entry.row = row;
    entry.group = g;
    entry.form = block->form;
    entry.tokens = tokens;
    entry.n_layers = group->config.n_layers;
    entry.layer_bytes = kvt_block_layout(group, block)->layer_bytes;
    return entry;
}

/* ---- batches of blocks ---- */

/* Room for the values of a batch, before the first one. */
static kvt_status make_room(batch *b)
{
    const kvt_cache *cache = b->p->cache;
    uint64_t copies = 0; /* bytes of the largest block that is copied; then of all in a batch */
    kvt_value_head head;
    kvt_status status;

    if (b->heads.data)
        return KVT_OK;

    memset(&head, 0, sizeof head);
    head.n_entries = 1;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const kvt_group *group = &cache->groups[g];
        const size_t bytes = (size_t)kvt_value_head_bytes(&head, group->config.n_layers);
        b->head_room = bytes > b->head_room ? bytes : b->head_room;
        for (uint32_t form = 0; form < KVT_FORMS; form++) {
            if (kvt_is_open(form) || kvt_snap_is_image(group, form, KVT_TOKENS))
                continue;
            if (group->layouts[form].block_bytes > copies)
                copies = group->layouts[form].block_bytes;
        }
    }
    if (copies < BATCH_BYTES)
        copies = copies < BATCH_BYTES / BATCH ? BATCH * copies : BATCH_BYTES;
    status = copies ? kvt_snap_reserve(&b->p->context, &b->copies, 0, (size_t)copies,
                                       "a prefix's values")
                    : KVT_OK;
    return status == KVT_OK ? kvt_snap_reserve(&b->p->context, &b->heads, 0, BATCH * b->head_room,
                                               "a prefix's values")
                            : status;
}

static kvt_status flush(batch *b)
{
    const kvt_store *store = b->p->store;
    size_t n_put = 0, i;
    kvt_status status = KVT_OK;

    if (b->n)
        status = store->put(store->user, b->keys, b->values, b->n, &n_put, &b->p->error);
    if (status != KVT_OK)
        return kvt_stored_store_failed(b->p, status, &b->p->error);
    for (i = 0; i < b->n && i < n_put; i++) {
        b->p->found.data[b->at[i]] = 1;
        b->result->n_values++;
        b->result->n_bytes += b->values[i].bytes;
    }
    b->n = b->copied = 0;
    b->bytes = 0;
    return KVT_OK;
}

static kvt_status add_block(batch *b, const kvt_block *block, size_t row, uint32_t g)
{
    kvt_stored *p = b->p;
    const kvt_value_entry entry = entry_of(p, block, row, g, KVT_TOKENS);
    const size_t images = entry.n_layers * (size_t)entry.layer_bytes, at = kvt_stored_at(p, row, g);
    unsigned char *to, *copy;
    const unsigned char *data;
    kvt_value_head head;
    kvt_status status = KVT_OK;
    size_t i, head_bytes;

    memset(&head, 0, sizeof head);
    head.n_entries = 1;
    head_bytes = (size_t)kvt_value_head_bytes(&head, entry.n_layers);
    if (b->n == BATCH || (b->n && b->bytes + head_bytes + images > BATCH_BYTES))
        status = flush(b);
    if (status == KVT_OK)
        status = make_room(b);
    if (status != KVT_OK)
        return status;
    i = b->n;
    copy = b->copies.data ? b->copies.data + b->copied : NULL;
    to = b->heads.data + i * b->head_room;
    head.key = kvt_stored_keys(p)[at];
    head.bytes = head_bytes + images;
    head.n_tokens = ((uint64_t)row + 1) * KVT_TOKENS;
    head.next_position = -1;
    kvt_value_put_fixed(&head, to);
    kvt_value_put_entry(&head, 0, &entry, to);
    status = digest_block(p, block, KVT_TOKENS, copy, to + kvt_value_digests_at(&head), &data);
    if (status != KVT_OK)
        return status;
    if (data == copy)
        b->copied += images;
    kvt_value_put_sum(&head, entry.n_layers, to);
    b->parts[i][0].data = to;
    b->parts[i][0].bytes = head_bytes;
    b->parts[i][1].data = data;
    b->parts[i][1].bytes = images;
    b->values[i].parts = b->parts[i];
    b->values[i].n_parts = PARTS;
    b->values[i].bytes = head.bytes;
    b->keys[i] = head.key;
    b->at[i] = at;
    b->bytes += head.bytes;
    b->n++;
    return KVT_OK;
}

static kvt_status put_rows(kvt_stored *p, kvt_prefix_result *result)
{
    kvt_status status;
    batch *b;
    void *memory;

    status = kvt_snap_alloc(&p->context, sizeof *b, "a prefix's values", &memory);
    if (status != KVT_OK)
        return status;
    b = memory;
    memset(b, 0, sizeof *b);
    b->p = p;
    b->result = result;
    for (size_t row = 0; row < p->n_rows && status == KVT_OK; row++)
        for (uint32_t g = 0; g < p->cache->n_groups && status == KVT_OK; g++) {
            const kvt_block *block = sealed_block(p->seq, row, g);
            if (block && !p->found.data[kvt_stored_at(p, row, g)])
                status = add_block(b, block, row, g);
        }
    if (status == KVT_OK)
        status = flush(b);
    kvt_snap_release(&p->context, &b->heads);
    kvt_snap_release(&p->context, &b->copies);
    kvt_snap_free(&p->context, memory, sizeof *b);
    return status;
}

/* ---- checkpoints ---- */

/* A group's block of a row as a checkpoint has it; NULL: released. */
static kvt_block *point_block(const kvt_seq *seq, kvt_checkpoint *c, size_t row, uint32_t g)
{
    return row >= c->from[g] ? kvt_checkpoint_blocks(c, g)[row - c->from[g]]
                             : kvt_seq_block(seq, row, g);
}

/* Whether a block's own value is that of the row: it is full and sealed. */
static int is_whole(const kvt_block *block, const kvt_checkpoint *c, size_t row)
{
    return !kvt_is_open(block->form) && kvt_snap_row_tokens(c->n_tokens, row) == KVT_TOKENS;
}

typedef struct point {
    kvt_stored *p;
    kvt_checkpoint *checkpoint;
    size_t from[KVT_MAX_GROUPS]; /* the first row whose block is in the value */
    uint64_t n_layers;
    size_t copy_bytes, image_bytes;
    kvt_value_head head;
    kvt_snap_buffer bytes, copies, parts;
} point;

/* Whether a group's blocks at the checkpoint are in the forms that keys say, as far as sealed. */
static int has_own_forms(const point *t, uint32_t g)
{
    const size_t rows = kvt_rows(t->checkpoint->n_tokens);

    for (size_t row = 0; row < rows; row++) {
        const kvt_block *block = point_block(t->p->seq, t->checkpoint, row, g);
        if (block && !kvt_is_open(block->form) &&
            block->form != kvt_sealed_form(&t->p->cache->groups[g], row))
            return 0;
    }
    return 1;
}

/* What the value will have. 0: a block is missing, or has no key. */
static int survey(point *t)
{
    const kvt_cache *cache = t->p->cache;
    const size_t rows = kvt_rows(t->checkpoint->n_tokens);

    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const kvt_group *group = &cache->groups[g];
        size_t row = rows;
        if (!has_own_forms(t, g))
            return 0;
        while (row > 0) {
            const kvt_block *block = point_block(t->p->seq, t->checkpoint, row - 1, g);
            if (!block || is_whole(block, t->checkpoint, row - 1))
                break;
            row--;
        }
        t->from[g] = row;
        if (row * (uint64_t)KVT_TOKENS > t->checkpoint->n_tokens)
            return 0; /* the last row, which is not full, has been released */
        for (; row < rows; row++) {
            const kvt_block *block = point_block(t->p->seq, t->checkpoint, row, g);
            const kvt_layout *layout = kvt_block_layout(group, block);
            const uint32_t tokens = kvt_snap_row_tokens(t->checkpoint->n_tokens, row);
            t->head.n_entries++;
            t->n_layers += group->config.n_layers;
            t->image_bytes += layout->block_bytes;
            if (!kvt_snap_is_image(group, block->form, tokens))
                t->copy_bytes += layout->block_bytes;
        }
    }
    return 1;
}

static kvt_status make_point(point *t, kvt_store_value *value)
{
    const kvt_snap_context *context = &t->p->context;
    const size_t rows = kvt_rows(t->checkpoint->n_tokens);
    const size_t head_bytes = (size_t)kvt_value_head_bytes(&t->head, t->n_layers);
    unsigned char *to, *copy, *digest;
    kvt_store_part *parts;
    kvt_status status;
    uint32_t n = 0;

    t->head.bytes = head_bytes + (uint64_t)t->image_bytes + t->head.blob_bytes;
    status = kvt_snap_reserve(context, &t->bytes, 0, head_bytes, "a checkpoint's value");
    if (status == KVT_OK)
        status =
            kvt_snap_reserve(context, &t->copies, 0, t->copy_bytes + 1, "a checkpoint's value");
    if (status == KVT_OK)
        status =
            kvt_snap_reserve(context, &t->parts, 0, (t->head.n_entries + PARTS) * sizeof *parts,
                             "a checkpoint's value");
    if (status != KVT_OK)
        return status;
    to = t->bytes.data;
    copy = t->copies.data;
    parts = (kvt_store_part *)(void *)t->parts.data;
    digest = to + kvt_value_digests_at(&t->head);
    kvt_value_put_fixed(&t->head, to);
    for (uint32_t g = 0; g < t->p->cache->n_groups; g++)
        for (size_t row = t->from[g]; row < rows; row++, n++) {
            const kvt_block *block = point_block(t->p->seq, t->checkpoint, row, g);
            const uint32_t tokens = kvt_snap_row_tokens(t->checkpoint->n_tokens, row);
            const kvt_value_entry entry = entry_of(t->p, block, row, g, tokens);
            const unsigned char *images;
            kvt_value_put_entry(&t->head, n, &entry, to);
            status = digest_block(t->p, block, tokens, copy, digest, &images);
            if (status != KVT_OK)
                return status;
            digest += entry.n_layers * (size_t)KVT_SNAP_ID_BYTES;
            parts[n + 1].data = images;
            parts[n + 1].bytes = entry.n_layers * (size_t)entry.layer_bytes;
            if (images == copy)
                copy += parts[n + 1].bytes;
        }
    parts[n + 1].data = kvt_checkpoint_blob(t->checkpoint);
    parts[n + 1].bytes = (size_t)t->head.blob_bytes;
    kvt_snap_digest(parts[n + 1].data, parts[n + 1].bytes, digest);
    kvt_value_put_sum(&t->head, t->n_layers, to);
    parts[0].data = to;
    parts[0].bytes = head_bytes;
    value->parts = parts;
    value->n_parts = n + PARTS;
    value->bytes = t->head.bytes;
    return KVT_OK;
}

static kvt_status put_checkpoint(kvt_stored *p, kvt_checkpoint *checkpoint,
                                 kvt_prefix_result *result)
{
    const kvt_store *store = p->store;
    kvt_store_value value;
    kvt_status status;
    size_t n_put = 0;
    uint8_t found = 0;
    point t;

    memset(&t, 0, sizeof t);
    t.p = p;
    t.checkpoint = checkpoint;
    t.head.flags = KVT_VALUE_CHECKPOINT;
    t.head.n_tokens = checkpoint->n_tokens;
    t.head.blob_bytes = checkpoint->blob_bytes;
    t.head.next_position = checkpoint->next_position;
    kvt_stored_checkpoint_key(p, checkpoint->n_tokens, &t.head.key);
    status = store->exists(store->user, &t.head.key, 1, &found, &p->error);
    if (status != KVT_OK)
        return kvt_stored_store_failed(p, status, &p->error);
    if (found || !survey(&t))
        return KVT_OK;
    status = make_point(&t, &value);
    if (status == KVT_OK) {
        status = store->put(store->user, &t.head.key, &value, 1, &n_put, &p->error);
        if (status != KVT_OK)
            status = kvt_stored_store_failed(p, status, &p->error);
    }
    if (status == KVT_OK && n_put) {
        result->n_checkpoints++;
        result->n_values++;
        result->n_bytes += value.bytes;
    }
    kvt_snap_release(&p->context, &t.bytes);
    kvt_snap_release(&p->context, &t.copies);
    kvt_snap_release(&p->context, &t.parts);
    return status;
}

/* ---- the call ---- */

static kvt_status check(const kvt_stored *p)
{
    const kvt_prefix_options *o = &p->options;

    if (p->seq->pending)
        return kvt_fail(p->cache, KVT_ERR_STATE, "kvt_prefix_put: a step is pending");
    if (o->positions || o->checkpoint_tokens)
        return kvt_fail(p->cache, KVT_ERR_ARG, "kvt_prefix_put: %s",
                        o->positions ? "positions are those of the sequence"
                                     : "checkpoint_tokens are those of the sequence");
    return KVT_OK;
}

kvt_status kvt_prefix_put(const kvt_store *store, const kvt_seq *seq,
                          const kvt_prefix_options *options, kvt_prefix_result *result)
{
    kvt_stored p;
    kvt_prefix_result made;
    uint64_t n_tokens = 0;
    size_t i;
    kvt_status status = kvt_stored_admit(&p, "kvt_prefix_put", store, seq, options);

    if (!seq)
        return status;
    memset(&made, 0, sizeof made);
    if (status == KVT_OK)
        status = check(&p);
    if (status == KVT_OK) {
        n_tokens = seq->length;
        if (p.options.n_tokens && p.options.n_tokens < n_tokens)
            n_tokens = p.options.n_tokens;
        n_tokens = count_keyed(seq, n_tokens);
        status = kvt_stored_make_keys(&p, NULL, n_tokens);
    }
    if (status == KVT_OK)
        status = kvt_stored_find(&p);
    if (status == KVT_OK)
        status = put_rows(&p, &made);
    for (i = 0; status == KVT_OK && p.options.checkpoints && i < seq->n_checkpoints; i++)
        if (seq->checkpoints[i]->n_tokens > 0 && seq->checkpoints[i]->n_tokens <= n_tokens)
            status = put_checkpoint(&p, seq->checkpoints[i], &made);
    if (status == KVT_OK) {
        made.n_tokens = kvt_stored_longest(&p) * (uint64_t)KVT_TOKENS;
        if (result)
            *result = made;
    }
    kvt_stored_release(&p);
    return status;
}
