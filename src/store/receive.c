/*
 * Values as they come out of a store: verified, and into blocks of their own.
 *
 * One value comes at a time, in parts of any size. Its head is collected: as much as is needed to
 * know how long the next piece of it is. Images go where they are to stay, and each is verified
 * when its last byte is there, while it is in the core's cache: a store that reads into the memory
 * that `place` tells moves the bytes once. An image that comes in one part is copied, hashed and
 * checked in one pass.
 *
 * A value that was refused may come again from its beginning, where a store has another copy. It is
 * removed from the store only if none of its copies was taken and the store had no failure. (Two as
 * one have none where far has answered; a copy that a failing near did not deliver goes as well.)
 *
 * Nothing here changes a sequence: the blocks of a value that is whole and verified are handed on.
 */
#include "src/store/stored.h"

enum { FIXED, ENTRIES, DIGESTS, IMAGES, BLOB, DONE, LEFT, REFUSED };

void kvt_stored_receiver_begin(kvt_stored_receiver *r, kvt_stored *p, const kvt_stored_want *wants,
                               const kvt_store_key *keys, size_t n, uint8_t *refused,
                               uint8_t *taken)
{
    memset(r, 0, sizeof *r);
    r->p = p;
    r->wants = wants;
    r->keys = keys;
    r->n_wants = n;
    r->refused = refused;
    r->taken = taken;
    r->current = SIZE_MAX;
    memset(refused, 0, n);
    memset(taken, 0, n);
}

/* Give up the blocks of the value that was coming. */
static void drop(kvt_stored_receiver *r)
{
    if (r->current != SIZE_MAX && r->got.blocks)
        for (uint32_t i = 0; i < r->got.head.n_entries; i++)
            kvt_block_undo(r->p->cache, r->got.blocks[i]);
    r->got.blocks = NULL;
    r->current = SIZE_MAX;
}

void kvt_stored_receiver_end(kvt_stored_receiver *r)
{
    drop(r);
    kvt_snap_release(&r->p->context, &r->head);
    kvt_snap_release(&r->p->context, &r->entries);
    kvt_snap_release(&r->p->context, &r->blocks);
    kvt_snap_release(&r->p->context, &r->blob);
}

static kvt_value_entry *entries_of(const kvt_stored_receiver *r)
{
    return (kvt_value_entry *)(void *)r->entries.data;
}

/* ---- the head ---- */

/* More of the head is needed: room for it. */
static kvt_status need_head(kvt_stored_receiver *r, uint64_t bytes)
{
    size_t room = (size_t)bytes;

    if (bytes > SIZE_MAX / 2)
        return kvt_fail(r->p->cache, KVT_ERR_LIMIT, "%s: a value's head", r->p->call);
    r->need = room;
    if (room > r->head.bytes && room < 2 * r->head.bytes)
        room = 2 * r->head.bytes;
    return kvt_snap_reserve(&r->p->context, &r->head, r->have, room, "a stored value's head");
}

/* Bytes that the head of a block's value has: known before it comes. */
static uint64_t expected_head(const kvt_stored_receiver *r)
{
    const kvt_stored_want *want = &r->wants[r->current];
    kvt_value_head head;

    memset(&head, 0, sizeof head);
    head.n_entries = 1;
    return want->group == UINT32_MAX
               ? KVT_VALUE_FIXED_BYTES
               : kvt_value_head_bytes(&head, r->p->cache->groups[want->group].config.n_layers);
}

/*
 * Whether the head is that of the value that is wanted. It is not verified yet: what it claims to
 * have is bounded by what a sequence of its length can have, before there is memory for it.
 */
static int is_wanted(const kvt_stored_receiver *r)
{
    const kvt_stored_want *want = &r->wants[r->current];
    const kvt_value_head *head = &r->got.head;

    return memcmp(&head->key, &r->keys[r->current], sizeof head->key) == 0 &&
           head->n_tokens == want->n_tokens &&
           !(head->flags & KVT_VALUE_CHECKPOINT) == (want->group != UINT32_MAX) &&
           head->n_entries <= kvt_rows(head->n_tokens) * (uint64_t)r->p->cache->n_groups;
}

/* Whether a block of a value is one that the cache can have there. */
static int is_sound(const kvt_stored_receiver *r, const kvt_value_entry *entry)
{
    const kvt_stored_want *want = &r->wants[r->current];
    const kvt_cache *cache = r->p->cache;
    const kvt_group *group;

    if (entry->group >= cache->n_groups)
        return 0;
    group = &cache->groups[entry->group];
    if (entry->n_layers != group->config.n_layers || group->layouts[entry->form].layer_bytes == 0 ||
        entry->layer_bytes != group->layouts[entry->form].layer_bytes)
        return 0;
    if (want->group != UINT32_MAX)
        return entry->group == want->group && entry->row == want->row &&
               entry->tokens == KVT_TOKENS &&
               entry->form == kvt_sealed_form(group, (size_t)entry->row);
    if (!kvt_is_open(entry->form))
        return entry->form == kvt_sealed_form(group, (size_t)entry->row);
    return group->seals && (entry->form == KVT_OPEN || group->reopens);
}

/* How many rows of each group are before a checkpoint's. 0: a last row, not full, is missing. */
static int count_sealed(kvt_stored_receiver *r)
{
    const kvt_value_head *head = &r->got.head;
    const uint32_t n_groups = r->p->cache->n_groups;
    size_t *sealed = r->got.sealed;
    int all = 1;

    for (uint32_t g = 0; g < n_groups; g++)
        sealed[g] = kvt_rows(head->n_tokens);
    for (uint32_t i = head->n_entries; i-- > 0;) /* the first one of a group is its first row */
        sealed[entries_of(r)[i].group] = (size_t)entries_of(r)[i].row;
    for (uint32_t g = 0; g < n_groups; g++)
        all &= sealed[g] * (uint64_t)KVT_TOKENS <= head->n_tokens;
    return all;
}

static kvt_status begin_images(kvt_stored_receiver *r)
{
    const size_t n = r->got.head.n_entries;
    kvt_status status = kvt_snap_reserve(&r->p->context, &r->blocks, 0, n * sizeof(kvt_block *) + 1,
                                         "a stored value's blocks");
    if (status != KVT_OK)
        return status;
    memset(r->blocks.data, 0, n * sizeof(kvt_block *));
    r->got.blocks = (kvt_block **)(void *)r->blocks.data;
    for (uint32_t i = 0; i < n && status == KVT_OK; i++) {
        const kvt_value_entry *entry = &entries_of(r)[i];
        status = kvt_rows_lend(r->p->takes, kvt_class_of(r->p->cache, entry->group, entry->form),
                               &r->got.blocks[i]);
        if (status == KVT_OK)
            kvt_block_will_be_read(r->got.blocks[i]);
    }
    r->entry = r->layer = 0;
    r->layer_have = r->digest = 0;
    r->stage = n ? IMAGES : BLOB;
    r->have = 0;
    return status;
}

/* The blob's room, which is not there at once: what claims to be large has to come first. */
static kvt_status grow_blob(kvt_stored_receiver *r)
{
    const uint64_t bytes = r->got.head.blob_bytes;
    uint64_t room = r->blob.bytes ? 2 * (uint64_t)r->blob.bytes : (uint64_t)1 << 20;
    if (room > bytes)
        room = bytes;
    if (room <= r->blob.bytes)
        return KVT_OK;
    if (room > SIZE_MAX / 2)
        return kvt_fail(r->p->cache, KVT_ERR_LIMIT, "%s: a checkpoint's blob", r->p->call);
    return kvt_snap_reserve(&r->p->context, &r->blob, r->have, (size_t)room, "a stored checkpoint");
}

/* All that was needed of the head is there: take it, and see what comes next. */
static kvt_status take_head(kvt_stored_receiver *r)
{
    kvt_value_head *head = &r->got.head;
    kvt_status status = KVT_OK;
    uint64_t bytes;

    if (r->stage == FIXED) {
        if (kvt_value_get_fixed(r->head.data, r->total, head) || !is_wanted(r)) {
            r->stage = REFUSED;
            return KVT_OK;
        }
        r->stage = ENTRIES;
        return need_head(r, kvt_value_digests_at(head));
    }
    if (r->stage == ENTRIES) {
        status = kvt_snap_reserve(&r->p->context, &r->entries, 0,
                                  head->n_entries * sizeof(kvt_value_entry) + 1,
                                  "a stored value's blocks");
        if (status != KVT_OK)
            return status;
        r->n_layers = r->image_bytes = 0;
        for (uint32_t i = 0; i < head->n_entries; i++) {
            kvt_value_entry *entry = &entries_of(r)[i];
            if (kvt_value_get_entry(head, i, r->head.data, entry) || !is_sound(r, entry) ||
                kvt_mul_overflows(entry->n_layers, entry->layer_bytes, &bytes) ||
                kvt_add_overflows(r->image_bytes, bytes, &r->image_bytes)) {
                r->stage = REFUSED;
                return KVT_OK;
            }
            r->n_layers += entry->n_layers;
        }
        if (kvt_value_check_sizes(head, r->n_layers, r->image_bytes) ||
            (head->flags & KVT_VALUE_CHECKPOINT && !count_sealed(r))) {
            r->stage = REFUSED;
            return KVT_OK;
        }
        r->got.entries = entries_of(r);
        r->stage = DIGESTS;
        return need_head(r, kvt_value_head_bytes(head, r->n_layers));
    }
    if (kvt_value_check_sum(head, r->n_layers, r->head.data)) {
        r->stage = REFUSED;
        return KVT_OK;
    }
    if (head->flags & KVT_VALUE_CHECKPOINT &&
        !kvt_stored_has_rows(r->p, head->n_tokens, r->got.sealed)) {
        r->stage = LEFT;
        return KVT_OK;
    }
    return begin_images(r);
}

/* ---- images ---- */

static const unsigned char *next_digest(const kvt_stored_receiver *r)
{
    return r->head.data + kvt_value_digests_at(&r->got.head) + r->digest * KVT_SNAP_ID_BYTES;
}

static unsigned char *image_of(const kvt_stored_receiver *r)
{
    const kvt_value_entry *entry = &entries_of(r)[r->entry];
    return r->got.blocks[r->entry]->data + (size_t)r->layer * (size_t)entry->layer_bytes;
}

/* An image is there: from NULL: where it stays; else it is copied there. */
static void take_image(kvt_stored_receiver *r, const unsigned char *from)
{
    const kvt_value_entry *entry = &entries_of(r)[r->entry];
    const kvt_group *group = &r->p->cache->groups[entry->group];
    unsigned char digest[KVT_SNAP_ID_BYTES], *image = image_of(r);

    if (kvt_snap_image_copy(group, entry->form, entry->tokens, from ? image : NULL,
                            from ? from : image, digest) ||
        memcmp(digest, next_digest(r), sizeof digest) != 0) {
        r->stage = REFUSED;
        return;
    }
    r->digest++;
    r->layer_have = 0;
    if (++r->layer < entry->n_layers)
        return;
    r->layer = 0;
    if (++r->entry == r->got.head.n_entries)
        r->stage = BLOB;
}

/* Bytes of images: how many of them were taken. */
static size_t take_images(kvt_stored_receiver *r, const unsigned char *data, size_t bytes)
{
    const size_t layer_bytes = (size_t)entries_of(r)[r->entry].layer_bytes;
    unsigned char *to = image_of(r) + r->layer_have;
    size_t n = layer_bytes - r->layer_have;

    if (data != to && r->layer_have == 0 && bytes >= n) {
        take_image(r, data);
        return n;
    }
    n = n < bytes ? n : bytes;
    if (data != to)
        memcpy(to, data, n);
    r->layer_have += n;
    if (r->layer_have == layer_bytes)
        take_image(r, NULL);
    return n;
}

/* ---- the end ---- */

/* The id of a block's contents, as snapshots have it: a delta then need not hash it. */
static void set_id(const kvt_stored_receiver *r)
{
    const kvt_value_entry *entry = &entries_of(r)[0];
    unsigned char id[KVT_SNAP_ID_BYTES];
    unsigned char *from = r->head.data + kvt_value_digests_at(&r->got.head) - KVT_SNAP_ID_HEAD;

    kvt_put32(from, entry->tokens);
    kvt_put32(from + 4, entry->form);
    kvt_snap_digest(from, KVT_SNAP_ID_HEAD + (size_t)r->n_layers * KVT_SNAP_ID_BYTES, id);
    kvt_block_set_id(r->p->cache, r->got.blocks[0], entry->tokens, id);
}

static kvt_status finish(kvt_stored_receiver *r)
{
    unsigned char digest[KVT_SNAP_ID_BYTES];
    kvt_status status;

    if (r->got.head.flags & KVT_VALUE_CHECKPOINT) {
        kvt_snap_digest(r->blob.data ? r->blob.data : r->head.data, (size_t)r->got.head.blob_bytes,
                        digest);
        if (memcmp(digest, next_digest(r), sizeof digest) != 0) {
            r->stage = REFUSED;
            return KVT_OK;
        }
    } else {
        set_id(r);
    }
    r->got.blob = r->blob.data;
    status = r->on_value(r->user, r->current, &r->got);
    if (status != KVT_OK)
        return status;
    r->taken[r->current] = 1;
    r->got.blocks = NULL; /* taken over */
    r->n_values++;
    r->n_bytes += r->total;
    r->stage = DONE;
    return KVT_OK;
}

/* Stages that need no more bytes than there are. */
static kvt_status advance(kvt_stored_receiver *r)
{
    kvt_status status = KVT_OK;
    while (status == KVT_OK && r->stage < IMAGES && r->have >= r->need)
        status = take_head(r);
    if (status == KVT_OK && r->stage == BLOB) {
        if (r->have == r->got.head.blob_bytes)
            return finish(r);
        if (r->have == r->blob.bytes || r->blob.bytes == 0)
            status = grow_blob(r);
    }
    return status;
}

static kvt_status take(kvt_stored_receiver *r, const unsigned char *data, size_t bytes)
{
    while (bytes && r->stage < DONE) {
        size_t n;
        kvt_status status;
        if (r->stage == IMAGES) {
            n = take_images(r, data, bytes);
        } else {
            kvt_snap_buffer *to = r->stage == BLOB ? &r->blob : &r->head;
            size_t most = r->need;
            if (r->stage == BLOB)
                most = r->blob.bytes < r->got.head.blob_bytes ? r->blob.bytes
                                                              : (size_t)r->got.head.blob_bytes;
            n = most - r->have < bytes ? most - r->have : bytes;
            if (data != to->data + r->have)
                memcpy(to->data + r->have, data, n);
            r->have += n;
        }
        data += n;
        bytes -= n;
        status = advance(r);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

/* ---- what the store calls ---- */

static kvt_status begin_value(kvt_stored_receiver *r, size_t i, uint64_t total)
{
    drop(r);
    r->refused[i] = 0; /* of the copy before */
    r->current = i;
    r->total = total;
    r->offset = 0;
    r->stage = FIXED;
    r->have = 0;
    memset(&r->got, 0, sizeof r->got);
    if (total < expected_head(r)) {
        r->stage = REFUSED;
        return KVT_OK;
    }
    r->need = 0;
    kvt_status status = need_head(r, expected_head(r));
    r->need = KVT_VALUE_FIXED_BYTES;
    return status;
}

static int part(void *user, size_t i, uint64_t total, uint64_t offset, const void *data,
                size_t bytes)
{
    kvt_stored_receiver *r = user;

    if (r->status != KVT_OK)
        return KVT_STORE_STOP;
    if (i >= r->n_wants || r->taken[i]) /* there is no such one, or it has come */
        return KVT_STORE_SKIP;
    if (offset == 0 && (r->current != i || r->offset != 0 || r->total != total))
        r->status = begin_value(r, i, total);
    if (r->status == KVT_OK && (r->current != i || r->offset != offset || r->total != total ||
                                bytes > total - offset)) { /* a store that keeps no order */
        drop(r);
        return KVT_STORE_SKIP;
    }
    if (r->status == KVT_OK) {
        r->offset += bytes;
        r->status = take(r, data, bytes);
    }
    if (r->status != KVT_OK) {
        drop(r);
        return KVT_STORE_STOP;
    }
    if (r->stage == LEFT) {
        drop(r);
        return KVT_STORE_STOP;
    }
    if (r->offset == total && r->stage < DONE)
        r->stage = REFUSED; /* it is shorter than what it says */
    if (r->stage == REFUSED) {
        r->refused[i] = 1;
        drop(r);
        return KVT_STORE_SKIP;
    }
    if (r->stage == DONE)
        r->current = SIZE_MAX;
    return KVT_STORE_MORE;
}

static void *place(void *user, size_t i, uint64_t total, uint64_t offset, size_t *bytes)
{
    kvt_stored_receiver *r = user;
    unsigned char *at;
    uint64_t room;

    if (r->status != KVT_OK || i >= r->n_wants || r->taken[i])
        return NULL;
    if (offset == 0 && (r->current != i || r->offset != 0 || r->total != total)) {
        r->status = begin_value(r, i, total);
        if (r->status != KVT_OK)
            return NULL;
    }
    if (r->current != i || r->offset != offset || r->total != total)
        return NULL;
    switch (r->stage) {
    case FIXED:
        at = r->head.data + r->have;
        room = expected_head(r) - r->have;
        break;
    case ENTRIES:
    case DIGESTS:
        at = r->head.data + r->have;
        room = r->need - r->have;
        break;
    case IMAGES:
        at = image_of(r) + r->layer_have;
        room = (entries_of(r)[r->entry].n_layers - r->layer) * entries_of(r)[r->entry].layer_bytes -
               r->layer_have;
        break;
    case BLOB:
        at = r->blob.data + r->have;
        room = (r->blob.bytes < r->got.head.blob_bytes ? r->blob.bytes : r->got.head.blob_bytes) -
               r->have;
        break;
    default: return NULL;
    }
    if (*bytes > room)
        *bytes = (size_t)room;
    return room ? at : NULL;
}

kvt_status kvt_stored_receive(kvt_stored_receiver *r)
{
    const kvt_store *store = r->p->store;
    kvt_store_receiver receiver = {r, part, place};
    kvt_status status;
    size_t i;

    if (r->n_wants == 0)
        return KVT_OK;
    status = (r->get_near ? r->get_near : store->get)(store->user, r->keys, r->n_wants, &receiver,
                                                      &r->error);
    drop(r);
    if (r->get_near || r->status != KVT_OK || status != KVT_OK)
        return r->status != KVT_OK ? r->status : status;
    /* So that a put can mend them. One that another process has mended since is removed, too, and
       computed once more. */
    for (i = 0; i < r->n_wants; i++) {
        kvt_store_error unused;
        unused.text[0] = '\0';
        if (r->refused[i])
            (void)store->remove(store->user, &r->keys[i], 1, &unused);
    }
    return KVT_OK;
}
