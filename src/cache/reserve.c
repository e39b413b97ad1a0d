/*
 * How far a sequence can go without an allocation, and kvt_seq_reserve, which takes the blocks for
 * it ahead.
 */
#include "src/cache/rows.h"

/* Open blocks that a group needs at most, in steps of one token. */
static size_t open_rows(const kvt_group *group)
{
    return (size_t)((group->residual_tokens + 2 * KVT_TOKENS - 1) / KVT_TOKENS);
}

/*
 * The same in steps of any size: those of the last residual_tokens to residual_tokens + 63 tokens
 * (or what is open now: a snapshot may have more), and those that a step leaves behind, which are
 * up to KVT_DRAFT_TOKENS more.
 */
static size_t step_open_rows(const kvt_group *group, size_t open_now)
{
    size_t open = (size_t)((group->residual_tokens + 2 * KVT_TOKENS - 2) / KVT_TOKENS);
    return (open > open_now ? open : open_now) +
           (size_t)((group->residual_tokens + KVT_DRAFT_TOKENS + 2 * KVT_TOKENS - 2) / KVT_TOKENS);
}

/*
 * Open blocks that a group has for new rows, of the sequence's own, once a pending step is
 * committed. Where nothing is reserved, the open form that is kept for a truncate serves the next
 * begin, if that opens a row, and is freed by it else.
 */
static size_t kept_for_rows(const kvt_seq *seq, uint32_t g)
{
    const kvt_seq_group *state = &seq->groups[g];
    uint64_t n_tokens = seq->length + seq->pending;
    size_t pairs, final;
    if (!seq->reserves && n_tokens % KVT_TOKENS)
        return 0;
    pairs = kvt_rows_own_kept(seq, g);
    final = kvt_rows_older(n_tokens, seq->cache->groups[g].residual_tokens + KVT_DRAFT_TOKENS);
    for (size_t row = state->n_sealed; row < state->seal_end; row++)
        if ((row >= final || seq->reserves) && *kvt_seq_entry(seq, row, kvt_beside(seq->cache, g)))
            pairs += kvt_rows_own_open(seq, row, row + 1, g);
    return pairs;
}

/* Whether a row of the sequence's own is open again: there is never more than one. */
static int has_reopened(const kvt_seq *seq, uint32_t g)
{
    const kvt_seq_group *state = &seq->groups[g];
    return kvt_rows_count_own(seq, state->n_sealed, seq->n_rows, g, KVT_REOPENED) ||
           kvt_rows_count_own(seq, state->n_final, state->n_sealed, kvt_beside(seq->cache, g),
                              KVT_REOPENED);
}

/* Tokens that a group can hold with free blocks have[class], in steps of one token. */
static uint64_t reachable(const kvt_seq *seq, uint32_t g, const size_t *have)
{
    const kvt_group *group = &seq->cache->groups[g];
    const int reopens = kvt_rows_reopens(seq, g);
    size_t sealed = seq->groups[g].seal_end - (size_t)reopens, fresh, own, more, fine;
    const kvt_block *copied;
    uint64_t most, rows;
    if (!group->seals)
        return (seq->n_rows + have[g]) * (uint64_t)KVT_TOKENS;
    fresh = have[kvt_class_of(seq->cache, g, KVT_OPEN)] + kept_for_rows(seq, g);
    /* One token before the next row would be sealed. */
    more = have[kvt_class_of(seq->cache, g, KVT_FINE)];
    fine = kvt_rows_fine(group, sealed, group->fine_rows);
    more = more < fine ? more : fine + have[g];
    most = (sealed + more + 1) * (uint64_t)KVT_TOKENS + group->residual_tokens - 1;
    /*
     * A row that is sealed leaves its open block, if that is not shared, to the row that the next
     * step opens. It opens none where rows are sealed in the midst of another; and no row is sealed
     * where there are too few open blocks to get so far.
     */
    own = kvt_rows_own_open(seq, sealed, seq->n_rows, g);
    copied = seq->pending
                 ? NULL
                 : kvt_rows_shared_block(seq, g); /* by the next begin, which makes it own */
    own += copied && copied->form == KVT_OPEN;
    rows = (seq->n_rows + fresh) * (uint64_t)KVT_TOKENS;
    if (rows < most &&
        (own + fresh < open_rows(group) || (!seq->reserves && group->residual_tokens % KVT_TOKENS)))
        most = rows;
    return most > seq->length + seq->pending ? most : seq->length + seq->pending;
}

uint64_t kvt_seq_capacity(const kvt_seq *seq)
{
    kvt_cache *cache;
    size_t have[KVT_MAX_CLASSES];
    uint64_t most;
    if (!seq)
        return 0;
    cache = seq->cache;
    pthread_mutex_lock(&cache->lock);
    for (uint32_t c = 0; c < cache->n_classes; c++)
        have[c] = cache->n_free_blocks[c] + seq->n_spare[c];
    pthread_mutex_unlock(&cache->lock);
    for (uint32_t c = 0; !seq->pending && c <= cache->n_groups; c++) {
        const kvt_block *copied = kvt_rows_shared_block(seq, c);
        if (c < cache->n_groups && kvt_rows_reopens(seq, c)) {
            if (have[kvt_class_of(cache, c, KVT_REOPENED)]-- == 0)
                return seq->length;
            have[c] += !copied; /* the sealed block, if it is the sequence's own */
        } else if (copied && have[copied->class_index]-- == 0) {
            return seq->length;
        }
    }
    most = (seq->n_rows + have[cache->n_groups]) * (uint64_t)KVT_TOKENS;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        uint64_t reach = reachable(seq, g, have);
        most = reach < most ? reach : most;
    }
    return most < cache->max_tokens ? most : cache->max_tokens;
}

/*
 * Blocks for rows that a removal moved, or a file brought, sealed in another form than is due to
 * their place: a truncate gives up the one, and what is appended then needs the other. Of all
 * lengths that it may cut to, the most that is missing.
 */
static void want_moved(const kvt_seq *seq, uint32_t g, size_t n_sealed, size_t end, size_t *want)
{
    const kvt_cache *cache = seq->cache;
    const kvt_group *group = &cache->groups[g];
    size_t missing[2] = {0}, given[2] = {0}, most[2] = {0}; /* [fine] */
    if (kvt_fine_rows(group->config.k_type, group->config.v_type, 1) == 0)
        return; /* sealed in one form only, whatever the file's cache had for fine_tokens */
    for (size_t row = n_sealed; row-- > 0;) {
        const kvt_block *block = kvt_seq_block(seq, row, g); /* none: a window has released it */
        size_t due = kvt_sealed_form(group, row) == KVT_FINE;
        missing[due] += row < end;
        given[block ? block->form == KVT_FINE : due]++;
        for (int fine = 0; fine < 2; fine++)
            if (missing[fine] > given[fine] + most[fine])
                most[fine] = missing[fine] - given[fine];
    }
    want[g] += most[0];
    want[kvt_class_of(cache, g, KVT_FINE)] += most[1];
}

kvt_status kvt_seq_reserve(kvt_seq *seq, uint64_t n_tokens)
{
    size_t want[KVT_MAX_CLASSES] = {0}, added[KVT_MAX_CLASSES] = {0}, rows;
    kvt_cache *cache;
    kvt_status status = KVT_OK;
    int had_border;

    if (!seq)
        return KVT_ERR_ARG;
    cache = seq->cache;
    if (seq->pending)
        return kvt_fail(cache, KVT_ERR_STATE, "kvt_seq_reserve: a step is pending");
    if (n_tokens > cache->max_tokens)
        return kvt_fail(cache, KVT_ERR_FULL, "kvt_seq_reserve: %llu tokens, at most %llu",
                        (unsigned long long)n_tokens, (unsigned long long)cache->max_tokens);
    rows = kvt_rows(n_tokens);
    had_border = seq->border != NULL;
    want[cache->n_groups] = rows > seq->n_rows ? rows - seq->n_rows : 0;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const kvt_group *group = &cache->groups[g];
        const kvt_seq_group *state = &seq->groups[g];
        size_t sealed = rows, open = 0, have, have_open = 0, fine;
        const size_t reopens = (size_t)kvt_rows_reopens(seq, g);
        if (group->seals) {
            have_open =
                kvt_rows_own_open(seq, state->n_sealed, seq->n_rows, g) + kvt_rows_own_kept(seq, g);
            sealed = kvt_rows_older(n_tokens, group->residual_tokens);
            open = step_open_rows(group, seq->n_rows - state->n_sealed + reopens);
            open = open < rows ? open : rows;
        }
        have = group->seals ? state->n_sealed : seq->n_rows;
        if (reopens && (kvt_rows_shared_block(seq, g) ||
                        kvt_sealed_form(group, seq->n_rows - 1) != KVT_SEALED))
            have--; /* else the block that is open again is sealed into the one that it had */
        fine = kvt_rows_fine(group, have, sealed);
        want[kvt_class_of(cache, g, KVT_FINE)] = fine;
        want[g] = sealed > have ? sealed - have - fine : 0;
        want[kvt_class_of(cache, g, KVT_OPEN)] = open > have_open ? open - have_open : 0;
        want[kvt_class_of(cache, g, KVT_REOPENED)] = group->reopens && !has_reopened(seq, g);
        want_moved(seq, g, have, sealed, want);
    }
    /* Shared open ones are no part of have_open. */
    for (uint32_t c = 0; c <= cache->n_groups; c++) {
        const kvt_block *copied = kvt_rows_shared_block(seq, c);
        if (copied && !kvt_is_open(copied->form) &&
            !(c < cache->n_groups && kvt_rows_reopens(seq, c)))
            want[copied->class_index]++;
    }
    if (n_tokens > KVT_TOKENS)
        status = kvt_border_reserve(seq);
    for (uint32_t c = 0; status == KVT_OK && c < cache->n_classes; c++)
        status = kvt_rows_add_spares(seq, c, want[c], &added[c]);
    if (status == KVT_OK)
        status = kvt_rows_set_exempt(seq, 0);
    if (status != KVT_OK) {
        for (uint32_t c = 0; c < cache->n_classes; c++)
            kvt_rows_undo_spares(seq, c, added[c]);
        if (!had_border)
            kvt_border_release(seq);
        return status;
    }
    seq->reserves = 1;
    return KVT_OK;
}
