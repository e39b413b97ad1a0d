/*
 * The rows of a sequence's block table: which blocks it has, in which form, and which are to come.
 *
 * What may fail is done first: the blocks that a step needs are taken as spare ones, and then
 * placed, which cannot fail. See kvt_seq_group in cache.h for the states of a row.
 */
#include "src/cache/cache.h"

/* ---- blocks of a sequence ---- */

/* One of the reserved blocks of a class, or NULL. */
static kvt_block *take_spare(kvt_seq *seq, uint32_t class_index)
{
    kvt_block *block = seq->spare[class_index];
    if (block) {
        seq->spare[class_index] = block->next;
        seq->n_spare[class_index]--;
        block->next = block->other = NULL;
    }
    return block;
}

static void put_spare(kvt_seq *seq, kvt_block *block)
{
    block->next = seq->spare[block->class_index];
    block->other = NULL;
    seq->spare[block->class_index] = block;
    seq->n_spare[block->class_index]++;
}

/* A block that the sequence needs no more: it stays with it, or with the cache. */
static void put_block(kvt_seq *seq, kvt_block *block)
{
    if (block && seq->reserves)
        put_spare(seq, block);
    else
        kvt_block_put(seq->cache, block);
}

/*
 * The open form of a block that is sealed. Not to the free list: that would hold memory which a
 * long context has no use for, and which the forecast does not count.
 */
static void free_open(kvt_seq *seq, kvt_block *block)
{
    if (block && seq->reserves)
        put_spare(seq, block);
    else
        kvt_block_free(seq->cache, block);
}

/* Make two blocks the forms of the same tokens. */
static void pair(kvt_block *open, kvt_block *sealed)
{
    open->other = sealed;
    sealed->other = open;
}

/* Undo that; the block's other form is returned, or NULL. */
static kvt_block *unpair(kvt_block *block)
{
    kvt_block *other = block->other;
    if (other)
        block->other = other->other = NULL;
    return other;
}

/*
 * Open blocks that have a sealed form beside them are not held against the budget: bring their
 * number up to date after every change. Those of a sequence that reserves are: they stay with it,
 * and what another sequence took in their place would be missing when they are open again.
 */
static void account(kvt_seq *seq)
{
    kvt_cache *cache = seq->cache;
    uint64_t bytes = 0;
    for (uint32_t g = 0; g < cache->n_groups && !seq->reserves; g++) {
        const kvt_seq_group *group = &seq->groups[g];
        size_t pairs = group->n_sealed - group->n_final;
        for (size_t row = group->n_sealed; row < group->seal_end; row++)
            pairs += kvt_seq_block(seq, row, g)->other != NULL;
        bytes += pairs * kvt_block_bytes(cache, kvt_class_of(cache, g, KVT_OPEN));
    }
    kvt_mem_exempt(cache, bytes, seq->exempt_bytes);
    seq->exempt_bytes = bytes;
}

/* ---- the table ---- */

/* Give up what a pending step was to seal. The rows that it added are not touched. */
static void drop_sealing(kvt_seq *seq)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *group = &seq->groups[g];
        for (size_t row = group->n_sealed; row < group->seal_end; row++)
            put_block(seq, unpair(kvt_seq_block(seq, row, g)));
        group->seal_end = group->n_sealed;
    }
}

void kvt_rows_shrink(kvt_seq *seq, size_t n_rows)
{
    kvt_cache *cache = seq->cache;
    drop_sealing(seq);
    while (seq->n_rows > n_rows) {
        seq->n_rows--;
        for (uint32_t c = 0; c < cache->n_columns; c++) {
            kvt_block **entry = kvt_seq_entry(seq, seq->n_rows, c);
            put_block(seq, unpair(*entry));
            put_block(seq, *entry);
            *entry = NULL;
        }
    }
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        kvt_seq_group *group = &seq->groups[g];
        group->n_sealed = group->n_sealed < n_rows ? group->n_sealed : n_rows;
        group->n_final = group->n_final < group->n_sealed ? group->n_final : group->n_sealed;
        group->seal_end = group->n_sealed;
    }
    account(seq);
}

void kvt_rows_replace(kvt_seq *seq, kvt_block *const *table, size_t n_rows, uint64_t n_tokens)
{
    kvt_rows_shrink(seq, 0);
    if (n_rows)
        memcpy(seq->table, table, n_rows * seq->cache->n_columns * sizeof *table);
    seq->n_rows = n_rows;
    seq->length = n_tokens;
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *group = &seq->groups[g];
        while (seq->cache->groups[g].seals && group->n_sealed < n_rows &&
               kvt_seq_block(seq, group->n_sealed, g)->form == KVT_SEALED)
            group->n_sealed++;
        group->n_final = group->seal_end = group->n_sealed;
    }
}

/* ---- a step's blocks ---- */

/* What a step that ends with n_tokens adds to a group. */
typedef struct group_plan {
    size_t seal_end;     /* rows n_sealed .. seal_end - 1 are sealed by it */
    size_t open_begin;   /* new rows before it are sealed at once, those from it on are open */
    size_t sealed, open; /* blocks to be added */
    size_t pairs;        /* rows that have both forms while the step is pending */
} group_plan;

static group_plan plan_group(const kvt_seq *seq, uint32_t g, uint64_t n_tokens)
{
    const kvt_group *group = &seq->cache->groups[g];
    size_t n_rows = kvt_rows(n_tokens), n_sealed = seq->groups[g].n_sealed, direct;
    group_plan plan = {n_sealed, n_rows, 0, 0, 0};

    if (!group->seals) {
        plan.sealed = n_rows - seq->n_rows;
        return plan;
    }
    plan.seal_end = kvt_rows_older(n_tokens, group->residual_tokens);
    if (plan.seal_end < n_sealed)
        plan.seal_end = n_sealed;
    direct = kvt_rows_older(n_tokens, group->residual_tokens + KVT_DRAFT_TOKENS);
    plan.open_begin = direct > seq->n_rows ? direct : seq->n_rows;
    plan.sealed = plan.seal_end - n_sealed;
    plan.open = n_rows - plan.open_begin;
    plan.pairs = plan.sealed - (plan.open_begin - seq->n_rows);
    return plan;
}

/*
 * Have at least `want` spare blocks of a class. On an error there are as many as before. *added:
 * how many are new.
 */
static kvt_status add_spares(kvt_seq *seq, uint32_t class_index, size_t want, size_t *added)
{
    *added = 0;
    while (seq->n_spare[class_index] < want) {
        kvt_block *block;
        kvt_status status = kvt_block_get(seq->cache, class_index, &block);
        if (status != KVT_OK)
            return status;
        put_spare(seq, block);
        ++*added;
    }
    return KVT_OK;
}

/* Give spare blocks back to where they came from. */
static void undo_spares(kvt_seq *seq, uint32_t class_index, size_t n)
{
    while (n-- > 0)
        kvt_block_undo(seq->cache, take_spare(seq, class_index));
}

/*
 * Hold `exempt` bytes of the sequence not against the budget. Where that passes it, free blocks
 * are given back. If it still does, and by this sequence, nothing is changed.
 */
static kvt_status set_exempt(kvt_seq *seq, uint64_t exempt)
{
    kvt_cache *cache = seq->cache;
    uint64_t before = seq->exempt_bytes;
    kvt_status status = KVT_OK;

    kvt_mem_exempt(cache, exempt, before);
    if (!kvt_mem_fits(cache)) {
        kvt_blocks_trim(cache);
        status = exempt < before ? kvt_mem_check(cache) : KVT_OK;
    }
    if (status == KVT_OK)
        seq->exempt_bytes = exempt;
    else
        kvt_mem_exempt(cache, before, exempt);
    return status;
}

/*
 * What may fail of a step's begin: the blocks that it needs, as spare ones. Open forms that were
 * kept for a truncate serve as open blocks of new rows.
 */
static kvt_status reserve_step(kvt_seq *seq, const group_plan *plans, size_t n_rows)
{
    kvt_cache *cache = seq->cache;
    size_t want[KVT_MAX_CLASSES] = {0}, added[KVT_MAX_CLASSES] = {0};
    uint64_t exempt = 0, before = seq->exempt_bytes;
    kvt_status status;

    want[cache->n_groups] = n_rows > seq->n_rows ? n_rows - seq->n_rows : 0;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        size_t kept = seq->groups[g].n_sealed - seq->groups[g].n_final, used = plans[g].open;
        used = used < kept ? used : kept;
        want[g] = plans[g].sealed;
        want[kvt_class_of(cache, g, KVT_OPEN)] = plans[g].open - used;
        exempt += (plans[g].pairs + kept - used) *
                  kvt_block_bytes(cache, kvt_class_of(cache, g, KVT_OPEN));
    }
    status = set_exempt(seq, seq->reserves ? 0 : exempt);
    if (status != KVT_OK)
        return status;
    for (uint32_t c = 0; status == KVT_OK && c < cache->n_classes; c++)
        status = add_spares(seq, c, want[c], &added[c]);
    if (status == KVT_OK)
        return KVT_OK;
    for (uint32_t c = 0; c < cache->n_classes; c++)
        undo_spares(seq, c, added[c]);
    kvt_mem_exempt(cache, before, seq->exempt_bytes);
    seq->exempt_bytes = before;
    return status;
}

/* The open forms that were kept for a truncate become spare blocks. */
static void release_kept(kvt_seq *seq, uint32_t g)
{
    kvt_seq_group *group = &seq->groups[g];
    for (; group->n_final < group->n_sealed; group->n_final++)
        put_spare(seq, unpair(kvt_seq_block(seq, group->n_final, g)));
}

/* Take the spare blocks of reserve_step into the table. Cannot fail. */
static void place_step(kvt_seq *seq, const group_plan *plans, size_t n_rows)
{
    kvt_cache *cache = seq->cache;
    size_t first_new = seq->n_rows;

    if (n_rows > first_new)
        seq->n_rows = n_rows;
    for (size_t row = first_new; row < n_rows; row++)
        *kvt_seq_entry(seq, row, cache->n_groups) = take_spare(seq, cache->n_groups);
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const group_plan *plan = &plans[g];
        uint32_t open_class = kvt_class_of(cache, g, KVT_OPEN);
        release_kept(seq, g);
        for (size_t row = first_new; row < n_rows; row++)
            *kvt_seq_entry(seq, row, g) = take_spare(seq, row < plan->open_begin ? g : open_class);
        for (size_t row = seq->groups[g].n_sealed; row < plan->seal_end; row++)
            if (kvt_seq_block(seq, row, g)->form == KVT_OPEN)
                pair(kvt_seq_block(seq, row, g), take_spare(seq, g));
        seq->groups[g].seal_end = plan->seal_end;
        while (!seq->reserves && seq->spare[open_class])
            kvt_block_free(cache, take_spare(seq, open_class));
    }
    account(seq);
}

/* What a commit puts in force: rows that the step has sealed. */
void kvt_rows_commit(kvt_seq *seq)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *group = &seq->groups[g];
        uint64_t residual = seq->cache->groups[g].residual_tokens;
        size_t final = kvt_rows_older(seq->length, residual + KVT_DRAFT_TOKENS);
        for (size_t row = group->n_sealed; row < group->seal_end; row++) {
            kvt_block **entry = kvt_seq_entry(seq, row, g), *open = *entry;
            if (open->form == KVT_SEALED)
                continue;
            *entry = open->other;
            if (row < final)
                free_open(seq, unpair(*entry));
        }
        final = final < group->seal_end ? final : group->seal_end;
        group->n_final = final > group->n_final ? final : group->n_final;
        group->n_sealed = group->seal_end;
    }
    account(seq);
}

/* What a truncate takes back: rows that are sealed, but would not be at this length. */
void kvt_rows_revert(kvt_seq *seq, uint64_t n_tokens)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *group = &seq->groups[g];
        size_t older = kvt_rows_older(n_tokens, seq->cache->groups[g].residual_tokens);
        while (group->n_sealed > group->n_final && group->n_sealed > older) {
            kvt_block **entry = kvt_seq_entry(seq, --group->n_sealed, g), *sealed = *entry;
            *entry = unpair(sealed);
            put_block(seq, sealed);
        }
        group->seal_end = group->n_sealed;
    }
}

kvt_status kvt_rows_begin(kvt_seq *seq, uint64_t n_tokens)
{
    group_plan plans[KVT_MAX_GROUPS];
    size_t n_rows = kvt_rows(seq->length + n_tokens);
    kvt_status status;

    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        plans[g] = plan_group(seq, g, seq->length + n_tokens);
    status = reserve_step(seq, plans, n_rows);
    if (status == KVT_OK)
        place_step(seq, plans, n_rows);
    return status;
}

void kvt_rows_release(kvt_seq *seq)
{
    seq->reserves = 0;
    kvt_rows_shrink(seq, 0);
    for (uint32_t c = 0; c < seq->cache->n_classes; c++)
        while (seq->spare[c])
            kvt_block_put(seq->cache, take_spare(seq, c));
}

/* ---- how far the blocks reach ---- */

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
    size_t pairs = state->n_sealed - state->n_final, final;
    if (!seq->reserves && n_tokens % KVT_TOKENS)
        return 0;
    final = kvt_rows_older(n_tokens, seq->cache->groups[g].residual_tokens + KVT_DRAFT_TOKENS);
    for (size_t row = state->n_sealed; row < state->seal_end; row++)
        pairs += (row >= final || seq->reserves) && kvt_seq_block(seq, row, g)->other;
    return pairs;
}

/* Tokens that a group can hold with free blocks have[class], in steps of one token. */
static uint64_t reachable(const kvt_seq *seq, uint32_t g, const size_t *have)
{
    const kvt_group *group = &seq->cache->groups[g];
    size_t sealed = seq->groups[g].seal_end, fresh;
    uint64_t most, rows;
    if (!group->seals)
        return (seq->n_rows + have[g]) * (uint64_t)KVT_TOKENS;
    fresh = have[kvt_class_of(seq->cache, g, KVT_OPEN)] + kept_for_rows(seq, g);
    /* One token before the next row would be sealed. */
    most = (sealed + have[g] + 1) * (uint64_t)KVT_TOKENS + group->residual_tokens - 1;
    /*
     * A row that is sealed leaves its open block to the row that the next step opens. It opens
     * none where rows are sealed in the midst of another; and no row is sealed where there are too
     * few open blocks to get so far.
     */
    rows = (seq->n_rows + fresh) * (uint64_t)KVT_TOKENS;
    if (rows < most && (seq->n_rows - sealed + fresh < open_rows(group) ||
                        (!seq->reserves && group->residual_tokens % KVT_TOKENS)))
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
    most = (seq->n_rows + have[cache->n_groups]) * (uint64_t)KVT_TOKENS;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        uint64_t reach = reachable(seq, g, have);
        most = reach < most ? reach : most;
    }
    return most < cache->max_tokens ? most : cache->max_tokens;
}

uint64_t kvt_seq_memory_bytes(const kvt_seq *seq)
{
    const kvt_cache *cache;
    uint64_t bytes;
    if (!seq)
        return 0;
    cache = seq->cache;
    bytes = kvt_seq_own_bytes(cache);
    for (size_t row = 0; row < seq->n_rows; row++)
        for (uint32_t c = 0; c < cache->n_columns; c++) {
            const kvt_block *block = kvt_seq_block(seq, row, c);
            bytes += kvt_block_bytes(cache, block->class_index);
            if (block->other)
                bytes += kvt_block_bytes(cache, block->other->class_index);
        }
    for (uint32_t c = 0; c < cache->n_classes; c++)
        bytes += seq->n_spare[c] * kvt_block_bytes(cache, c);
    return bytes;
}

kvt_status kvt_seq_reserve(kvt_seq *seq, uint64_t n_tokens)
{
    size_t want[KVT_MAX_CLASSES] = {0}, added[KVT_MAX_CLASSES] = {0}, rows;
    kvt_cache *cache;
    kvt_status status = KVT_OK;

    if (!seq)
        return KVT_ERR_ARG;
    cache = seq->cache;
    if (seq->pending)
        return kvt_fail(cache, KVT_ERR_STATE, "kvt_seq_reserve: a step is pending");
    if (n_tokens > cache->max_tokens)
        return kvt_fail(cache, KVT_ERR_FULL, "kvt_seq_reserve: %llu tokens, at most %llu",
                        (unsigned long long)n_tokens, (unsigned long long)cache->max_tokens);
    rows = kvt_rows(n_tokens);
    want[cache->n_groups] = rows > seq->n_rows ? rows - seq->n_rows : 0;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const kvt_group *group = &cache->groups[g];
        const kvt_seq_group *state = &seq->groups[g];
        size_t sealed = rows, open = 0, have, have_open = seq->n_rows - state->n_final;
        if (group->seals) {
            sealed = kvt_rows_older(n_tokens, group->residual_tokens);
            open = step_open_rows(group, seq->n_rows - state->n_sealed);
            open = open < rows ? open : rows;
        } else {
            have_open = 0;
        }
        have = group->seals ? state->n_sealed : seq->n_rows;
        want[g] = sealed > have ? sealed - have : 0;
        want[kvt_class_of(cache, g, KVT_OPEN)] = open > have_open ? open - have_open : 0;
    }
    for (uint32_t c = 0; status == KVT_OK && c < cache->n_classes; c++)
        status = add_spares(seq, c, want[c], &added[c]);
    if (status == KVT_OK)
        status = set_exempt(seq, 0);
    if (status != KVT_OK) {
        for (uint32_t c = 0; c < cache->n_classes; c++)
            undo_spares(seq, c, added[c]);
        return status;
    }
    seq->reserves = 1;
    return KVT_OK;
}
