/*
 * Tokens out of the middle of a sequence: whole rows of the table, or tokens among the open rows,
 * one by one. The positions of those behind are lowered, where the groups' RoPE is described, and
 * each row (kvt_meta) has the sum of what its positions were lowered by, for which attention turns
 * q (turns.c).
 */
#include "src/cache/cache.h"

/* Tokens first .. first + n - 1 are rows from .. to - 1; those behind move by delta positions. */
typedef struct removal {
    uint64_t first, n;
    size_t from, to; /* rows, where they are whole ones */
    int whole;
    int32_t delta;
} removal;

static int32_t position_of(const kvt_seq *seq, uint64_t token)
{
    return kvt_seq_meta(seq, (size_t)(token / KVT_TOKENS))->positions[token % KVT_TOKENS];
}

/* By how much positions move, and whether what moves stays within bounds. */
static kvt_status find_delta(const kvt_seq *seq, removal *r)
{
    int64_t delta =
        (int64_t)position_of(seq, r->first + r->n) - (int64_t)position_of(seq, r->first);
    r->delta = 0;
    if (!seq->cache->moves)
        return KVT_OK;
    for (uint64_t token = r->first + r->n; token < seq->length; token++) {
        const kvt_meta *meta = kvt_seq_meta(seq, (size_t)(token / KVT_TOKENS));
        int64_t position = meta->positions[token % KVT_TOKENS] - delta;
        int64_t shift = kvt_shift_at(meta, token % KVT_TOKENS) + delta;
        if (position < 0 || position > INT32_MAX || shift > INT32_MAX || shift <= INT32_MIN)
            return kvt_fail(seq->cache, KVT_ERR_STATE,
                            "kvt_seq_remove: token %llu would move by %lld to position %lld",
                            (unsigned long long)token, (long long)delta, (long long)position);
    }
    if (seq->next_position >= 0 &&
        (seq->next_position - delta < 0 || seq->next_position - delta > INT32_MAX))
        return kvt_fail(seq->cache, KVT_ERR_STATE,
                        "kvt_seq_remove: the next position, %ld, would move to %lld",
                        (long)seq->next_position, (long long)(seq->next_position - delta));
    r->delta = (int32_t)delta;
    return KVT_OK;
}

/* Windows: what they have released stays out of sight, and they keep their sinks. */
static kvt_status check_windows(const kvt_seq *seq, const removal *r)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        const kvt_group *group = &seq->cache->groups[g];
        size_t first = seq->groups[g].first, sinks = kvt_sink_rows(group);
        size_t before = r->from < first ? r->from : first;
        if (first == 0)
            continue;
        if (r->from < sinks)
            return kvt_fail(seq->cache, KVT_ERR_STATE,
                            "kvt_seq_remove: tokens before %llu stay: group %u has a window, and "
                            "has released what would take the place of its sinks",
                            (unsigned long long)sinks * KVT_TOKENS, g);
        if (before > sinks && r->delta &&
            kvt_seq_meta(seq, before - 1)->reach >
                kvt_lowest_query(seq, seq->length, KVT_DRAFT_TOKENS) - r->delta -
                    (int64_t)group->window_tokens)
            return kvt_fail(seq->cache, KVT_ERR_STATE,
                            "kvt_seq_remove: tokens before %llu, which the window of group %u has "
                            "released, would come into its sight",
                            (unsigned long long)before * KVT_TOKENS, g);
    }
    return KVT_OK;
}

/* Whether every row from first's on is open, or of groups that do not seal: tokens can move. */
static int is_open(const kvt_seq *seq, uint64_t first)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        if (seq->groups[g].n_sealed > first / KVT_TOKENS ||
            seq->groups[g].first > first / KVT_TOKENS)
            return 0;
    return 1;
}

/* Which rows, or tokens among the open ones, and what their place means for those behind. */
static kvt_status check_rows(const kvt_seq *seq, removal *r)
{
    r->whole = r->first % KVT_TOKENS == 0 && r->n % KVT_TOKENS == 0;
    if (!r->whole && !is_open(seq, r->first))
        return kvt_fail(seq->cache, KVT_ERR_UNSUPPORTED,
                        "kvt_seq_remove: tokens %llu + %llu are neither whole blocks of %d nor "
                        "among the open ones",
                        (unsigned long long)r->first, (unsigned long long)r->n, KVT_TOKENS);
    for (uint32_t g = 0; r->from == 0 && g < seq->cache->n_groups; g++) {
        const kvt_group *group = &seq->cache->groups[g];
        if (!group->offsets)
            continue;
        if (r->whole && group->residual_tokens == 0)
            return kvt_fail(seq->cache, KVT_ERR_UNSUPPORTED,
                            "kvt_seq_remove: block 0 of group %u stays: without a residual window "
                            "the offset of later keys is its own",
                            g);
        if (!r->whole && seq->length > KVT_TOKENS)
            return kvt_fail(seq->cache, KVT_ERR_UNSUPPORTED,
                            "kvt_seq_remove: keys of group %u behind token %d would move into "
                            "block 0, whose offset is another one",
                            g, KVT_TOKENS);
    }
    return KVT_OK;
}

/* Whether single tokens can move: the blocks have to be what they were, to look at their keys. */
static kvt_status check_moves(const kvt_seq *seq, const removal *r)
{
    kvt_status status = KVT_OK;
    for (uint32_t g = 0; status == KVT_OK && !r->whole && g < seq->cache->n_groups; g++)
        status = kvt_seq_verify_rows(seq, g, r->from, seq->n_rows);
    return status == KVT_OK && !r->whole ? kvt_rows_check_move_up(seq, r->first, r->n) : status;
}

/* The positions of a row move. The row before it has its bounds already. */
static void move_row(kvt_seq *seq, size_t row, int32_t delta)
{
    kvt_meta *meta = kvt_seq_meta(seq, row);
    size_t n = kvt_row_tokens(seq, row);
    for (size_t t = 0; t < n; t++)
        meta->positions[t] -= delta;
    if (meta->shift == KVT_SHIFT_MIXED)
        for (size_t t = 0; t < n; t++)
            meta->shifts[t] += delta;
    else
        meta->shift += delta;
    kvt_meta_bound(meta, n, row > 0 ? kvt_seq_meta(seq, row - 1) : NULL);
}

/* A token's shift. There is room for each token's own where positions move at all. */
static void set_shift(kvt_meta *meta, size_t slot, int32_t shift)
{
    if (meta->shift == shift)
        return;
    if (meta->shift != KVT_SHIFT_MIXED)
        for (size_t t = 0; t < KVT_TOKENS; t++)
            meta->shifts[t] = meta->shift;
    meta->shift = KVT_SHIFT_MIXED;
    meta->shifts[slot] = shift;
}

/* Tokens behind the removed ones move up, one by one: what they have of positions and ids. */
static void move_tokens(kvt_seq *seq, const removal *r)
{
    for (uint64_t token = r->first; token + r->n < seq->length; token++) {
        const uint64_t source = token + r->n;
        const kvt_meta *from = kvt_seq_meta(seq, (size_t)(source / KVT_TOKENS));
        kvt_meta *to = kvt_seq_meta(seq, (size_t)(token / KVT_TOKENS));
        const size_t at = (size_t)(source % KVT_TOKENS), slot = (size_t)(token % KVT_TOKENS);
        to->positions[slot] = from->positions[at] - r->delta;
        to->token_ids[slot] = from->token_ids[at];
        set_shift(to, slot, kvt_shift_at(from, at) + r->delta);
    }
}

static void remove_rows(kvt_seq *seq, const removal *r)
{
    kvt_rows_cut(seq, r->from, r->to);
    seq->length -= r->n;
    for (size_t row = r->from; row < seq->n_rows; row++)
        move_row(seq, row, r->delta);
}

static void remove_tokens(kvt_seq *seq, const removal *r)
{
    kvt_rows_move_up(seq, r->first, r->n);
    move_tokens(seq, r);
    seq->length -= r->n;
    kvt_rows_shrink(seq, kvt_rows(seq->length));
    for (size_t row = r->from; row < seq->n_rows; row++)
        kvt_meta_bound(kvt_seq_meta(seq, row), kvt_row_tokens(seq, row),
                       row > 0 ? kvt_seq_meta(seq, row - 1) : NULL);
}

/*
 * Blocks that are written become the sequence's own: positions of all rows that move, or whose
 * bounds change, and where tokens move one by one all that the rows have.
 */
static kvt_status own_blocks(kvt_seq *seq, const removal *r)
{
    size_t from[KVT_MAX_GROUPS + 1];
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        from[g] = r->whole ? seq->n_rows : r->from;
    from[seq->cache->n_groups] = r->whole ? r->to : r->from;
    return kvt_rows_own(seq, from);
}

kvt_status kvt_seq_remove(kvt_seq *seq, uint64_t first, uint64_t n)
{
    removal r = {first, n, (size_t)(first / KVT_TOKENS), 0, 0, 0};
    kvt_turns *turns = NULL;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_seq_remove: a step is pending");
    if (n == 0 || first > seq->length || n > seq->length - first)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_remove: tokens %llu + %llu of %llu",
                        (unsigned long long)first, (unsigned long long)n,
                        (unsigned long long)seq->length);
    if (first + n == seq->length)
        return kvt_seq_truncate(seq, first);
    r.to = (size_t)((first + n) / KVT_TOKENS);
    status = check_rows(seq, &r);
    if (status == KVT_OK)
        status = find_delta(seq, &r);
    if (status == KVT_OK)
        status = check_windows(seq, &r);
    if (status == KVT_OK)
        status = check_moves(seq, &r);
    if (status == KVT_OK && seq->cache->moves)
        status = kvt_turns_make(seq, first + n, r.delta, &turns);
    if (status == KVT_OK)
        status = own_blocks(seq, &r);
    if (status != KVT_OK) {
        kvt_turns_free(seq->cache, turns);
        return status;
    }
    kvt_checkpoints_drop_from(seq, first + 1);
    if (r.whole)
        remove_rows(seq, &r);
    else
        remove_tokens(seq, &r);
    if (seq->next_position >= 0)
        seq->next_position -= r.delta;
    if (first < seq->unkeyed_from)
        seq->unkeyed_from = first;
    kvt_turns_free(seq->cache, seq->turns);
    seq->turns = turns;
    return KVT_OK;
}
