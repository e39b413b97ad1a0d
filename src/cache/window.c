/*
 * Sliding windows: which blocks of a group a sequence needs, and the release of the others.
 *
 * A query at position p sees what is above p - window_tokens, so that a sequence of n tokens, whose
 * next query stands at position(n - 1) + 1, needs the rows from the first on that reaches that far:
 * kvt_meta.reach, which does not fall from row to row, is searched for it. The positions and token
 * ids of all rows stay.
 *
 * A commit releases what is out of sight for every length down to KVT_WINDOW_SLACK tokens before
 * the one that it leads to. Rejected drafts can be taken back, up to KVT_DRAFT_TOKENS at once, and
 * what a sequence then still has covers all lengths down to KVT_DRAFT_TOKENS before its own: that
 * is what a snapshot keeps, so that it does not depend on the drafts. Blocks that are not sealed
 * for good stay, the rows of the sinks, and row 0, whose offset open rows take.
 */
#include "src/cache/cache.h"

static int32_t reach_of(const kvt_seq *seq, size_t row)
{
    return kvt_seq_meta(seq, row)->reach;
}

/* The first row behind the sinks and below n_rows that reaches beyond `position`, or n_rows. */
static size_t first_beyond(const kvt_seq *seq, const kvt_group *group, size_t n_rows,
                           int64_t position)
{
    size_t low = kvt_sink_rows(group), high = n_rows;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (reach_of(seq, middle) > position)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static int64_t position_of(const kvt_seq *seq, uint64_t token)
{
    return kvt_seq_meta(seq, (size_t)(token / KVT_TOKENS))->positions[token % KVT_TOKENS];
}

/* Whether n_tokens tokens have what a query of group g at `position` sees. */
static int group_has_sight(const kvt_seq *seq, uint32_t g, uint64_t n_tokens, int64_t position)
{
    const kvt_group *group = &seq->cache->groups[g];
    size_t n_rows = kvt_rows(n_tokens), first = seq->groups[g].first;

    if (first == 0 || n_rows <= kvt_sink_rows(group))
        return 1;
    return n_rows > first &&
           first_beyond(seq, group, n_rows, position - (int64_t)group->window_tokens) >= first;
}

static int has_sight(const kvt_seq *seq, uint64_t n_tokens, int64_t position)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        if (!group_has_sight(seq, g, n_tokens, position))
            return 0;
    return 1;
}

int kvt_window_group_reaches(const kvt_seq *seq, uint32_t g, uint64_t n_tokens)
{
    return n_tokens == seq->length || n_tokens == 0 ||
           group_has_sight(seq, g, n_tokens, position_of(seq, n_tokens - 1) + 1);
}

int kvt_window_reaches(const kvt_seq *seq, uint64_t n_tokens)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        if (!kvt_window_group_reaches(seq, g, n_tokens))
            return 0;
    return 1;
}

int kvt_window_suffices(const kvt_seq *seq, uint64_t n_tokens)
{
    int64_t highest = 0;
    if (n_tokens == 0)
        return 1;
    for (uint64_t t = (n_tokens - 1) / KVT_TOKENS * KVT_TOKENS; t < n_tokens; t++)
        highest = position_of(seq, t) > highest ? position_of(seq, t) : highest;
    if (n_tokens > KVT_TOKENS) {
        const int64_t reach = reach_of(seq, kvt_rows(n_tokens) - 2);
        highest = reach > highest ? reach : highest;
    }
    return has_sight(seq, n_tokens, highest + 1);
}

int64_t kvt_lowest_query(const kvt_seq *seq, uint64_t n_tokens, uint64_t slack)
{
    int64_t lowest = n_tokens > slack ? INT64_MAX : 0;
    for (uint64_t i = 0; i <= slack && i < n_tokens; i++) {
        int64_t next = position_of(seq, n_tokens - 1 - i) + 1;
        lowest = next < lowest ? next : lowest;
    }
    return lowest;
}

size_t kvt_window_first(const kvt_seq *seq, uint32_t g, const kvt_seq_group *state,
                        uint64_t n_tokens, uint64_t slack)
{
    const kvt_group *group = &seq->cache->groups[g];
    size_t first, end;
    if (!kvt_has_window(group) || n_tokens <= slack)
        return state->first;
    end = kvt_rows_older(n_tokens, slack + (group->seals ? group->residual_tokens : 0));
    end = group->seals && state->n_sealed < end ? state->n_sealed : end;
    first = first_beyond(seq, group, end,
                         kvt_lowest_query(seq, n_tokens, slack) - (int64_t)group->window_tokens);
    return first > state->first && first > kvt_sink_rows(group) ? first : state->first;
}

void kvt_window_release(kvt_seq *seq)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *state = &seq->groups[g];
        size_t sinks = kvt_sink_rows(&seq->cache->groups[g]);
        size_t first = kvt_window_first(seq, g, state, seq->length, KVT_WINDOW_SLACK);
        if (seq->cache->groups[g].seals && first > state->n_final)
            first = state->n_final;
        if (first <= state->first || first <= sinks)
            continue;
        kvt_rows_drop(seq, g, state->first ? state->first : sinks, first);
        state->first = first;
    }
}

uint64_t kvt_window_full(const kvt_group *group)
{
    /* From the end of a row to the first position that does not see it, or at which it is sealed */
    uint64_t behind = group->window_tokens - 1;
    if (!kvt_has_window(group))
        return UINT64_MAX;
    if (group->seals && group->residual_tokens > behind)
        behind = group->residual_tokens;
    return (kvt_sink_rows(group) + 1) * (uint64_t)KVT_TOKENS + behind + KVT_WINDOW_SLACK;
}

uint64_t kvt_seq_reachable(const kvt_seq *seq, uint64_t n_tokens)
{
    uint64_t lowest = 0; /* no shorter length within the window can be reached */
    if (!seq)
        return 0;
    if (n_tokens > seq->length)
        n_tokens = seq->length;
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        if (seq->groups[g].first * (uint64_t)KVT_TOKENS > lowest)
            lowest = seq->groups[g].first * (uint64_t)KVT_TOKENS;
    for (; n_tokens > lowest; n_tokens--)
        if (kvt_checkpoint_at(seq, n_tokens) || kvt_window_reaches(seq, n_tokens))
            return n_tokens;
    /* Checkpoints, and what lies in the rows of the sinks of all groups that have released any. */
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        if (seq->groups[g].first) {
            uint64_t sinks = kvt_sink_rows(&seq->cache->groups[g]) * (uint64_t)KVT_TOKENS;
            lowest = sinks < lowest ? sinks : lowest;
        }
    lowest = lowest < n_tokens ? lowest : n_tokens;
    for (size_t i = seq->n_checkpoints; i-- > 0;)
        if (seq->checkpoints[i]->n_tokens <= n_tokens && seq->checkpoints[i]->n_tokens > lowest)
            return seq->checkpoints[i]->n_tokens;
    return lowest;
}
