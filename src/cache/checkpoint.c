/*
 * Checkpoints: a token to which a sequence can go back, exactly, however far it has gone on since,
 * with bytes of the caller.
 *
 * What a table loses as a sequence goes on are the blocks that a window releases, and the open
 * forms of blocks that are sealed. A checkpoint has references to these: for each group the rows
 * from the first on that may change, and of the last row, where it is not full, the positions. The
 * rows before stay in the table until a truncate to less, which drops the checkpoint. The next
 * begin writes into the last row, and copies it, since it is shared now.
 */
#include "src/cache/cache.h"

unsigned char *kvt_checkpoint_blob(kvt_checkpoint *checkpoint)
{
    return (unsigned char *)(checkpoint->blocks + checkpoint->n_blocks);
}

/* ---- the list of a sequence ---- */

/* Where a checkpoint of n_tokens tokens is, or would be. */
static size_t place_of(const kvt_seq *seq, uint64_t n_tokens)
{
    size_t low = 0, high = seq->n_checkpoints;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (seq->checkpoints[middle]->n_tokens < n_tokens)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

const kvt_checkpoint *kvt_checkpoint_at(const kvt_seq *seq, uint64_t n_tokens)
{
    size_t i = place_of(seq, n_tokens);
    return i < seq->n_checkpoints && seq->checkpoints[i]->n_tokens == n_tokens ? seq->checkpoints[i]
                                                                               : NULL;
}

const kvt_checkpoint *kvt_checkpoint_before(const kvt_seq *seq, uint64_t n_tokens)
{
    size_t i = place_of(seq, n_tokens + 1);
    return i ? seq->checkpoints[i - 1] : NULL;
}

kvt_status kvt_checkpoints_make_room(kvt_seq *seq)
{
    size_t room = seq->checkpoint_room ? 2 * seq->checkpoint_room : 8;
    kvt_status status;
    void *memory;
    if (seq->n_checkpoints < seq->checkpoint_room)
        return KVT_OK;
    status = kvt_block_memory(seq->cache, room * sizeof *seq->checkpoints,
                              "a sequence's list of checkpoints", &memory);
    if (status != KVT_OK)
        return status;
    if (seq->n_checkpoints)
        memcpy(memory, seq->checkpoints, seq->n_checkpoints * sizeof *seq->checkpoints);
    kvt_mem_free(seq->cache, seq->checkpoints, seq->checkpoint_room * sizeof *seq->checkpoints);
    seq->checkpoints = memory;
    seq->checkpoint_room = room;
    return KVT_OK;
}

void kvt_checkpoint_put(kvt_cache *cache, kvt_checkpoint *checkpoint)
{
    uint64_t left;
    if (!checkpoint)
        return;
    pthread_mutex_lock(&cache->lock);
    left = --checkpoint->references;
    for (size_t i = 0; left == 0 && i < checkpoint->n_blocks; i++)
        if (checkpoint->blocks[i])
            kvt_block_put_locked(cache, checkpoint->blocks[i]);
    kvt_block_unlock(cache);
    if (left == 0)
        kvt_mem_free(cache, checkpoint, checkpoint->bytes);
}

void kvt_checkpoints_drop_from(kvt_seq *seq, uint64_t n_tokens)
{
    while (seq->n_checkpoints && seq->checkpoints[seq->n_checkpoints - 1]->n_tokens >= n_tokens)
        kvt_checkpoint_put(seq->cache, seq->checkpoints[--seq->n_checkpoints]);
    if (seq->n_checkpoints == 0) {
        kvt_mem_free(seq->cache, seq->checkpoints, seq->checkpoint_room * sizeof *seq->checkpoints);
        seq->checkpoints = NULL;
        seq->checkpoint_room = 0;
    }
}

kvt_status kvt_checkpoints_share(const kvt_seq *from, uint64_t n_tokens, kvt_seq *to)
{
    for (size_t i = 0; i < from->n_checkpoints && from->checkpoints[i]->n_tokens <= n_tokens; i++) {
        kvt_status status = kvt_checkpoints_make_room(to);
        if (status != KVT_OK)
            return status;
        pthread_mutex_lock(&to->cache->lock);
        from->checkpoints[i]->references++;
        pthread_mutex_unlock(&to->cache->lock);
        to->checkpoints[to->n_checkpoints++] = from->checkpoints[i];
    }
    return KVT_OK;
}

/* ---- the calls ---- */

/*
 * The first row of a group that the table may lose, or a step change: behind the sinks of a window,
 * not sealed for good, or not full.
 */
static size_t first_kept(const kvt_seq *seq, uint32_t g)
{
    const kvt_group *group = &seq->cache->groups[g];
    const kvt_seq_group *state = &seq->groups[g];
    size_t from = (size_t)(seq->length / KVT_TOKENS);
    if (group->seals && state->n_final < from)
        from = state->n_final;
    if (kvt_has_window(group)) {
        size_t behind = state->first ? state->first : kvt_sink_rows(group);
        from = behind < from ? behind : from;
    }
    return from;
}

kvt_status kvt_checkpoint_new(kvt_cache *cache, uint64_t n_tokens, const size_t *from,
                              uint64_t blob_bytes, kvt_checkpoint **made)
{
    size_t n_blocks = 0;
    kvt_checkpoint *checkpoint;
    kvt_status status;
    uint64_t sum;
    void *memory;

    for (uint32_t c = 0; c <= cache->n_groups; c++)
        n_blocks += 2 * (kvt_rows(n_tokens) - from[c]);
    if (kvt_add_overflows(sizeof *checkpoint + n_blocks * sizeof(kvt_block *), blob_bytes, &sum) ||
        sum > SIZE_MAX / 2)
        return kvt_fail(cache, KVT_ERR_LIMIT, "a checkpoint's blob of %llu bytes",
                        (unsigned long long)blob_bytes);
    status = kvt_block_memory(cache, (size_t)sum, "a checkpoint", &memory);
    if (status != KVT_OK)
        return status;
    checkpoint = memory;
    checkpoint->references = 1;
    checkpoint->n_tokens = n_tokens;
    checkpoint->bytes = (size_t)sum;
    checkpoint->blob_bytes = (size_t)blob_bytes;
    checkpoint->n_blocks = n_blocks;
    checkpoint->next_position = -1;
    memcpy(checkpoint->from, from, sizeof from[0] * (cache->n_groups + 1));
    *made = checkpoint;
    return KVT_OK;
}

/* A checkpoint of the sequence as it is, with one reference. */
static kvt_status make_checkpoint(const kvt_seq *seq, const void *blob, size_t blob_bytes,
                                  kvt_checkpoint **made)
{
    kvt_cache *cache = seq->cache;
    size_t n_rows = seq->n_rows, from[KVT_MAX_GROUPS + 1];
    kvt_checkpoint *checkpoint;
    kvt_status status;

    for (uint32_t g = 0; g < cache->n_groups; g++)
        from[g] = first_kept(seq, g);
    from[cache->n_groups] = (size_t)(seq->length / KVT_TOKENS);
    status = kvt_checkpoint_new(cache, seq->length, from, blob_bytes, &checkpoint);
    if (status != KVT_OK)
        return status;
    checkpoint->next_position = seq->next_position;
    memcpy(checkpoint->groups, seq->groups, sizeof checkpoint->groups);
    pthread_mutex_lock(&cache->lock);
    for (uint32_t c = 0, i = 0; c <= cache->n_groups; c++)
        for (int side = 0; side < 2; side++)
            for (size_t row = from[c]; row < n_rows; row++, i++) {
                if (side && c == cache->n_groups)
                    continue;
                checkpoint->blocks[i] = *kvt_seq_entry(seq, row, side ? kvt_beside(cache, c) : c);
                if (checkpoint->blocks[i])
                    kvt_block_refer_locked(cache, checkpoint->blocks[i]);
            }
    pthread_mutex_unlock(&cache->lock);
    if (blob_bytes)
        memcpy(kvt_checkpoint_blob(checkpoint), blob, blob_bytes);
    *made = checkpoint;
    return KVT_OK;
}

kvt_status kvt_seq_checkpoint(kvt_seq *seq, const void *blob, size_t bytes)
{
    kvt_checkpoint *made = NULL;
    kvt_status status;
    size_t i;

    if (!seq)
        return KVT_ERR_ARG;
    if (!blob && bytes)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_checkpoint: blob is NULL");
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_seq_checkpoint: a step is pending");
    i = place_of(seq, seq->length);
    status = make_checkpoint(seq, blob, bytes, &made);
    if (status == KVT_OK)
        status = kvt_rows_charge(seq);
    if (status == KVT_OK && i == seq->n_checkpoints) /* last: a longer list does not shrink */
        status = kvt_checkpoints_make_room(seq);
    if (status != KVT_OK) {
        kvt_checkpoint_put(seq->cache, made);
        (void)kvt_rows_charge(seq); /* its blocks are its own again: never more than it was */
        return status;
    }
    if (i < seq->n_checkpoints) /* the last one: none is behind the length */
        kvt_checkpoint_put(seq->cache, seq->checkpoints[i]);
    else
        seq->n_checkpoints++;
    seq->checkpoints[i] = made;
    return KVT_OK;
}

kvt_status kvt_seq_checkpoints(const kvt_seq *seq, uint64_t *tokens, size_t room, size_t *n)
{
    if (!seq)
        return KVT_ERR_ARG;
    if (!n || (!tokens && room))
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_checkpoints: NULL");
    for (size_t i = 0; i < room && i < seq->n_checkpoints; i++)
        tokens[i] = seq->checkpoints[i]->n_tokens;
    *n = seq->n_checkpoints;
    return KVT_OK;
}

/* The checkpoint that a call names. */
static kvt_status find(const kvt_seq *seq, uint64_t n_tokens, const char *call,
                       const kvt_checkpoint **found)
{
    *found = kvt_checkpoint_at(seq, n_tokens);
    if (*found)
        return KVT_OK;
    return kvt_fail(seq->cache, KVT_ERR_ARG, "%s: there is no checkpoint at %llu tokens", call,
                    (unsigned long long)n_tokens);
}

kvt_status kvt_seq_checkpoint_read(const kvt_seq *seq, uint64_t n_tokens, void *buffer, size_t room,
                                   size_t *bytes)
{
    const kvt_checkpoint *checkpoint;
    kvt_status status;
    if (!seq)
        return KVT_ERR_ARG;
    if (!bytes || (!buffer && room))
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_checkpoint_read: NULL");
    status = find(seq, n_tokens, "kvt_seq_checkpoint_read", &checkpoint);
    if (status != KVT_OK)
        return status;
    if (room > checkpoint->blob_bytes)
        room = checkpoint->blob_bytes;
    if (room)
        memcpy(buffer, checkpoint->blocks + checkpoint->n_blocks, room);
    *bytes = checkpoint->blob_bytes;
    return KVT_OK;
}

kvt_status kvt_seq_checkpoint_drop(kvt_seq *seq, uint64_t n_tokens)
{
    const kvt_checkpoint *checkpoint;
    kvt_status status;
    size_t i;
    if (!seq)
        return KVT_ERR_ARG;
    status = find(seq, n_tokens, "kvt_seq_checkpoint_drop", &checkpoint);
    if (status != KVT_OK)
        return status;
    i = place_of(seq, n_tokens);
    kvt_checkpoint_put(seq->cache, seq->checkpoints[i]);
    seq->n_checkpoints--;
    memmove(seq->checkpoints + i, seq->checkpoints + i + 1,
            (seq->n_checkpoints - i) * sizeof *seq->checkpoints);
    kvt_checkpoints_drop_from(seq, UINT64_MAX); /* an empty list goes */
    return KVT_OK;
}
