/*
 * Sequences: creation, questions, steps, and what changes a sequence as a whole. rows.c has the
 * blocks.
 *
 * Invariants: n_rows covers length + pending and the rows have all their blocks; a step changes
 * nothing that a reader of the committed tokens can see until commit, except that attend and
 * read see the pending tokens of a layer that has them, and that begin opens a block again which a
 * truncate has cut (reopen.c): its keys are rounded to f16. Which rows are sealed follows from the
 * length: see kvt_seq_group.
 */
#include "src/cache/cache.h"

static size_t table_bytes(const kvt_cache *cache)
{
    return cache->max_rows * cache->n_columns * sizeof(kvt_block *);
}

uint64_t kvt_seq_own_bytes(const kvt_cache *cache)
{
    return kvt_round_up(sizeof(kvt_seq), 64) + kvt_round_up(cache->n_layers, 64) +
           kvt_round_up(table_bytes(cache), 64);
}

/* ---- create, destroy ---- */

kvt_status kvt_seq_create(kvt_cache *cache, kvt_seq **seq_out)
{
    void *memory = NULL, *appended = NULL, *table = NULL;
    kvt_status status;
    kvt_seq *seq;

    if (!cache || !seq_out)
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_seq_create: NULL");
    status = kvt_block_memory(cache, sizeof *seq, "a sequence", &memory);
    if (status == KVT_OK)
        status = kvt_block_memory(cache, cache->n_layers, "a sequence's layers", &appended);
    if (status == KVT_OK)
        status = kvt_block_memory(cache, table_bytes(cache), "a sequence's block table", &table);
    if (status != KVT_OK) {
        kvt_mem_free(cache, appended, cache->n_layers);
        kvt_mem_free(cache, memory, sizeof *seq);
        return status;
    }
    seq = memory;
    seq->cache = cache;
    seq->appended = appended;
    seq->table = table;
    seq->next_position = -1;
    seq->unkeyed_from = UINT64_MAX;
    pthread_mutex_lock(&cache->lock);
    cache->references++;
    pthread_mutex_unlock(&cache->lock);
    *seq_out = seq;
    return KVT_OK;
}

void kvt_seq_destroy(kvt_seq *seq)
{
    kvt_cache *cache;
    if (!seq)
        return;
    cache = seq->cache;
    kvt_checkpoints_drop_from(seq, 0);
    kvt_turns_free(cache, seq->turns);
    kvt_rows_release(seq);
    kvt_mem_free(cache, seq->table, table_bytes(cache));
    kvt_mem_free(cache, seq->appended, cache->n_layers);
    kvt_mem_free(cache, seq, sizeof *seq);
    kvt_cache_release(cache);
}

/* ---- questions ---- */

uint64_t kvt_seq_length(const kvt_seq *seq)
{
    return seq ? seq->length : 0;
}

int kvt_seq_is_empty(const kvt_seq *seq)
{
    return kvt_seq_length(seq) == 0;
}

uint64_t kvt_seq_pending(const kvt_seq *seq)
{
    return seq ? seq->pending : 0;
}

uint64_t kvt_seq_max_tokens(const kvt_seq *seq)
{
    return seq ? seq->cache->max_tokens : 0;
}

/* May be INT32_MAX + 1. */
static int64_t next_position(const kvt_seq *seq)
{
    size_t last;
    if (seq && seq->next_position >= 0)
        return seq->next_position;
    if (!seq || seq->length == 0)
        return 0;
    last = (size_t)(seq->length - 1);
    return (int64_t)kvt_seq_meta(seq, last / KVT_TOKENS)->positions[last % KVT_TOKENS] + 1;
}

int32_t kvt_seq_next_position(const kvt_seq *seq)
{
    int64_t next = next_position(seq);
    return next > INT32_MAX ? INT32_MAX : (int32_t)next;
}

kvt_status kvt_seq_set_next_position(kvt_seq *seq, int32_t position)
{
    if (!seq)
        return KVT_ERR_ARG;
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_seq_set_next_position: a step is pending");
    if (position < 0)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_set_next_position: %ld", (long)position);
    seq->next_position = position;
    return KVT_OK;
}

kvt_status kvt_seq_set_tag(kvt_seq *seq, const void *tag, size_t bytes)
{
    if (!seq)
        return KVT_ERR_ARG;
    if (!tag && bytes)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_set_tag: tag is NULL");
    if (bytes > KVT_MAX_TAG)
        return kvt_fail(seq->cache, KVT_ERR_LIMIT, "kvt_seq_set_tag: %zu bytes, at most %d", bytes,
                        KVT_MAX_TAG);
    if (seq->length || seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE,
                        "kvt_seq_set_tag: the sequence has tokens, which another tag may change");
    seq->tag_bytes = (uint32_t)bytes;
    if (bytes)
        memcpy(seq->tag, tag, bytes);
    return KVT_OK;
}

kvt_status kvt_seq_tag(const kvt_seq *seq, void *buffer, size_t room, size_t *bytes)
{
    if (!seq)
        return KVT_ERR_ARG;
    if (!bytes || (!buffer && room))
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_tag: NULL");
    if (room > seq->tag_bytes)
        room = seq->tag_bytes;
    if (room)
        memcpy(buffer, seq->tag, room);
    *bytes = seq->tag_bytes;
    return KVT_OK;
}

uint64_t kvt_seq_visible(const kvt_seq *seq, uint32_t layer)
{
    return seq->length + (seq->pending && seq->appended[layer] ? seq->pending : 0);
}

/* Ids and positions lie in one array each per row: copy row by row. */
static kvt_status copy_meta(const kvt_seq *seq, uint64_t first, uint64_t n, int32_t *out,
                            int want_ids, const char *call)
{
    if (!seq)
        return KVT_ERR_ARG;
    if (!out)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "%s: NULL", call);
    if (first > seq->length || n > seq->length - first)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "%s: tokens %llu + %llu of %llu", call,
                        (unsigned long long)first, (unsigned long long)n,
                        (unsigned long long)seq->length);
    while (n > 0) {
        size_t row = (size_t)(first / KVT_TOKENS), slot = (size_t)(first % KVT_TOKENS);
        size_t count = KVT_TOKENS - slot < n ? KVT_TOKENS - slot : (size_t)n;
        const kvt_meta *meta = kvt_seq_meta(seq, row);
        memcpy(out, (want_ids ? meta->token_ids : meta->positions) + slot, count * sizeof *out);
        out += count;
        first += count;
        n -= count;
    }
    return KVT_OK;
}

kvt_status kvt_seq_token_ids(const kvt_seq *seq, uint64_t first, uint64_t n, int32_t *token_ids)
{
    return copy_meta(seq, first, n, token_ids, 1, "kvt_seq_token_ids");
}

kvt_status kvt_seq_positions(const kvt_seq *seq, uint64_t first, uint64_t n, int32_t *positions)
{
    return copy_meta(seq, first, n, positions, 0, "kvt_seq_positions");
}

kvt_status kvt_seq_key_positions(const kvt_seq *seq, uint64_t first, uint64_t n, int32_t *positions)
{
    kvt_status status = copy_meta(seq, first, n, positions, 0, "kvt_seq_key_positions");
    for (uint64_t i = 0; status == KVT_OK && i < n; i++)
        positions[i] += kvt_shift_at(kvt_seq_meta(seq, (size_t)((first + i) / KVT_TOKENS)),
                                     (size_t)((first + i) % KVT_TOKENS));
    return status;
}

void kvt_meta_bound(kvt_meta *meta, size_t n, const kvt_meta *before)
{
    int32_t lowest = meta->positions[0], highest = lowest;
    assert(n > 0 && n <= KVT_TOKENS);
    for (size_t t = 1; t < n; t++) {
        lowest = meta->positions[t] < lowest ? meta->positions[t] : lowest;
        highest = meta->positions[t] > highest ? meta->positions[t] : highest;
    }
    meta->lowest = lowest;
    meta->highest = highest;
    meta->reach = before && before->reach > highest ? before->reach : highest;
}

/* ---- steps ---- */

/* A new token's key has not moved; those before it in its row may have. */
static void not_moved(kvt_meta *meta, size_t slot)
{
    if (slot == 0)
        meta->shift = 0;
    if (meta->shift == 0)
        return;
    if (meta->shift != KVT_SHIFT_MIXED)
        for (size_t t = 0; t < slot; t++)
            meta->shifts[t] = meta->shift;
    meta->shift = KVT_SHIFT_MIXED;
    meta->shifts[slot] = 0;
}

kvt_status kvt_seq_begin(kvt_seq *seq, uint64_t n_tokens, const int32_t *positions)
{
    int64_t next;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (n_tokens == 0)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_begin: a step of 0 tokens");
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE,
                        "kvt_seq_begin: a step of %llu tokens is "
                        "pending: commit or abort it",
                        (unsigned long long)seq->pending);
    if (n_tokens > seq->cache->max_tokens - seq->length)
        return kvt_fail(seq->cache, KVT_ERR_FULL, "kvt_seq_begin: %llu + %llu tokens, at most %llu",
                        (unsigned long long)seq->length, (unsigned long long)n_tokens,
                        (unsigned long long)seq->cache->max_tokens);
    next = next_position(seq);
    if (!positions && next > INT32_MAX - (int64_t)(n_tokens - 1))
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_begin: positions would pass INT32_MAX");
    for (uint64_t i = 0; positions && i < n_tokens; i++)
        if (positions[i] < 0)
            return kvt_fail(seq->cache, KVT_ERR_ARG,
                            "kvt_seq_begin: position %ld of token %llu is "
                            "negative",
                            (long)positions[i], (unsigned long long)i);
    status = kvt_border_begin(seq, n_tokens);
    if (status == KVT_OK)
        status = kvt_rows_begin(seq, n_tokens);
    if (status != KVT_OK) {
        kvt_border_end(seq);
        return status;
    }

    for (uint64_t i = 0; i < n_tokens; i++) {
        size_t token = (size_t)(seq->length + i);
        kvt_meta *meta = kvt_seq_meta(seq, token / KVT_TOKENS);
        meta->positions[token % KVT_TOKENS] =
            positions ? positions[i] : (int32_t)(next + (int64_t)i);
        meta->token_ids[token % KVT_TOKENS] = KVT_TOKEN_NONE;
        not_moved(meta, token % KVT_TOKENS);
        if (token % KVT_TOKENS == KVT_TOKENS - 1 || i == n_tokens - 1)
            kvt_meta_bound(meta, token % KVT_TOKENS + 1,
                           token < KVT_TOKENS ? NULL : kvt_seq_meta(seq, token / KVT_TOKENS - 1));
    }
    seq->pending = n_tokens;
    seq->step++;
    seq->n_appended = 0;
    memset(seq->appended, 0, seq->cache->n_layers);
    return KVT_OK;
}

kvt_status kvt_seq_check_appended(const kvt_seq *seq, const char *call)
{
    uint32_t layer = 0;
    if (!seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "%s: no step is pending", call);
    if (seq->n_appended == seq->cache->n_layers)
        return KVT_OK;
    while (seq->appended[layer])
        layer++;
    return kvt_fail(seq->cache, KVT_ERR_STATE, "%s: layer %u was not appended (%u of %u were)",
                    call, layer, seq->n_appended, seq->cache->n_layers);
}

void kvt_seq_end_step(kvt_seq *seq, uint64_t n)
{
    seq->length += n;
    seq->pending = 0;
    seq->next_position = -1;
    kvt_border_end(seq);
    kvt_rows_commit(seq);
    kvt_window_release(seq);
}

kvt_status kvt_seq_commit(kvt_seq *seq, const int32_t *token_ids)
{
    kvt_status status;
    if (!seq)
        return KVT_ERR_ARG;
    status = kvt_seq_check_appended(seq, "kvt_seq_commit");
    if (status != KVT_OK)
        return status;
    for (uint64_t i = 0; token_ids && i < seq->pending; i++)
        if (token_ids[i] < KVT_TOKEN_NONE)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_commit: token id %ld of token %llu",
                            (long)token_ids[i], (unsigned long long)i);
    for (uint64_t i = 0; token_ids && i < seq->pending; i++) {
        size_t token = (size_t)(seq->length + i);
        kvt_seq_meta(seq, token / KVT_TOKENS)->token_ids[token % KVT_TOKENS] = token_ids[i];
    }
    kvt_seq_end_step(seq, seq->pending);
    return KVT_OK;
}

kvt_status kvt_seq_abort(kvt_seq *seq)
{
    if (!seq)
        return KVT_ERR_ARG;
    seq->pending = 0;
    kvt_border_end(seq);
    kvt_rows_shrink(seq, kvt_rows(seq->length));
    return KVT_OK;
}

kvt_status kvt_seq_truncate(kvt_seq *seq, uint64_t n_tokens)
{
    const kvt_checkpoint *checkpoint;
    if (!seq)
        return KVT_ERR_ARG;
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_seq_truncate: a step is pending");
    if (n_tokens > seq->length)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_truncate: to %llu of %llu tokens",
                        (unsigned long long)n_tokens, (unsigned long long)seq->length);
    checkpoint = kvt_checkpoint_at(seq, n_tokens);
    if (!checkpoint && !kvt_window_reaches(seq, n_tokens))
        return kvt_fail(seq->cache, KVT_ERR_STATE,
                        "kvt_seq_truncate: to %llu tokens: a window has released what they need; "
                        "the next that can be reached is %llu",
                        (unsigned long long)n_tokens,
                        (unsigned long long)kvt_seq_reachable(seq, n_tokens));
    if (n_tokens == seq->length && !checkpoint)
        return KVT_OK;
    if (checkpoint) {
        if (n_tokens != seq->length)
            seq->next_position = checkpoint->next_position;
        kvt_rows_restore(seq, checkpoint);
    } else {
        kvt_rows_revert(seq, n_tokens);
        seq->length = n_tokens;
        seq->next_position = -1;
        kvt_rows_shrink(seq, kvt_rows(n_tokens));
    }
    kvt_checkpoints_drop_from(seq, n_tokens + 1);
    if (n_tokens <= seq->unkeyed_from)
        seq->unkeyed_from = UINT64_MAX;
    return KVT_OK;
}

kvt_status kvt_seq_clear(kvt_seq *seq)
{
    if (!seq)
        return KVT_ERR_ARG;
    seq->length = 0;
    seq->pending = 0;
    seq->next_position = -1;
    seq->unkeyed_from = UINT64_MAX;
    kvt_checkpoints_drop_from(seq, 0);
    kvt_turns_free(seq->cache, seq->turns);
    seq->turns = NULL;
    kvt_border_end(seq);
    kvt_rows_shrink(seq, 0);
    seq->has_mapped = 0;
    return KVT_OK;
}
