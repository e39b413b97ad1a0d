/*
 * The rows of a sequence's block table: which blocks it has, in which form, and which are to come.
 *
 * What may fail is done first: the blocks that a step needs are taken as spare ones, and then
 * placed, which cannot fail. See kvt_seq_group in cache.h for the states of a row.
 */
#include "src/cache/rows.h"

/* ---- blocks of a sequence ---- */

/* One of the reserved blocks of a class, or NULL. */
static kvt_block *take_spare(kvt_seq *seq, uint32_t class_index)
{
    kvt_block *block = seq->spare[class_index];
    if (block) {
        seq->spare[class_index] = block->next;
        seq->n_spare[class_index]--;
        __atomic_fetch_sub(&seq->cache->n_spare_blocks[class_index], 1, __ATOMIC_RELAXED);
        block->next = NULL;
    }
    return block;
}

/* A block of the sequence's own, without a twin. */
static void put_spare(kvt_seq *seq, kvt_block *block)
{
    block->next = seq->spare[block->class_index];
    seq->spare[block->class_index] = block;
    seq->n_spare[block->class_index]++;
    __atomic_fetch_add(&seq->cache->n_spare_blocks[block->class_index], 1, __ATOMIC_RELAXED);
}

/* Make a block a spare one, if it is the sequence's own. */
static int reclaim(kvt_seq *seq, kvt_block *block)
{
    kvt_cache *cache = seq->cache;
    int own;
    pthread_mutex_lock(&cache->lock);
    own = kvt_block_is_own_locked(block);
    if (own)
        kvt_block_part_locked(block);
    pthread_mutex_unlock(&cache->lock);
    if (own)
        put_spare(seq, block);
    return own;
}

/* A block that the sequence needs no more: it stays with it, or with the cache. */
static void put_block(kvt_seq *seq, kvt_block *block)
{
    if (!block || !seq->reserves || !reclaim(seq, block))
        kvt_block_put(seq->cache, block);
}

/*
 * The open form of a block that is sealed. Not to the free list: that would hold memory which a
 * long context has no use for, and which the forecast does not count.
 */
static void free_open(kvt_seq *seq, kvt_block *block)
{
    if (!block || !seq->reserves || !reclaim(seq, block))
        kvt_block_free(seq->cache, block);
}

/* The form of a row's block that is beside the one in force, or NULL. */
static kvt_block **beside(const kvt_seq *seq, size_t row, uint32_t g)
{
    return kvt_seq_entry(seq, row, kvt_beside(seq->cache, g));
}

/* Take a block out of the table. */
static kvt_block *take_out(kvt_block **entry)
{
    kvt_block *block = *entry;
    *entry = NULL;
    return block;
}

size_t kvt_rows_count_own(const kvt_seq *seq, size_t from, size_t to, uint32_t column,
                          uint32_t form)
{
    size_t n = 0;
    pthread_mutex_lock(&seq->cache->lock);
    for (size_t row = from; row < to; row++) {
        const kvt_block *block = *kvt_seq_entry(seq, row, column);
        n += block && block->form == form && kvt_block_is_own_locked(block);
    }
    pthread_mutex_unlock(&seq->cache->lock);
    return n;
}

size_t kvt_rows_own_open(const kvt_seq *seq, size_t from, size_t to, uint32_t column)
{
    return kvt_rows_count_own(seq, from, to, column, KVT_OPEN);
}

/* Bytes of open blocks of either form that are the sequence's own. */
static uint64_t own_open_bytes(const kvt_seq *seq, size_t from, size_t to, uint32_t column)
{
    uint64_t bytes = 0;
    pthread_mutex_lock(&seq->cache->lock);
    for (size_t row = from; row < to; row++) {
        const kvt_block *block = *kvt_seq_entry(seq, row, column);
        if (block && kvt_is_open(block->form) && kvt_block_is_own_locked(block))
            bytes += kvt_block_bytes(seq->cache, block->class_index);
    }
    pthread_mutex_unlock(&seq->cache->lock);
    return bytes;
}

/* Of the open forms that are kept beside sealed ones. */
static uint64_t own_kept_bytes(const kvt_seq *seq, uint32_t g)
{
    const kvt_seq_group *group = &seq->groups[g];
    return own_open_bytes(seq, group->n_final, group->n_sealed, kvt_beside(seq->cache, g));
}

size_t kvt_rows_own_kept(const kvt_seq *seq, uint32_t g)
{
    const kvt_seq_group *group = &seq->groups[g];
    return kvt_rows_own_open(seq, group->n_final, group->n_sealed, kvt_beside(seq->cache, g));
}

/*
 * Open blocks of the sequence's own that have a sealed form beside them are not held against the
 * budget: bring their number up to date after every change. Those of a sequence that reserves are:
 * they stay with it, and what another sequence took in their place would be missing when they are
 * open again. Those that are shared are too, since the others may need them.
 */
static uint64_t exemption(const kvt_seq *seq)
{
    const kvt_cache *cache = seq->cache;
    uint64_t bytes = 0;
    for (uint32_t g = 0; g < cache->n_groups && !seq->reserves; g++) {
        const kvt_seq_group *group = &seq->groups[g];
        bytes += own_kept_bytes(seq, g);
        for (size_t row = group->n_sealed; row < group->seal_end; row++)
            if (*beside(seq, row, g))
                bytes += own_open_bytes(seq, row, row + 1, g);
    }
    return bytes;
}

static void account(kvt_seq *seq)
{
    uint64_t bytes = exemption(seq), before = seq->exempt_bytes;
    kvt_mem_exempt(seq->cache, bytes, before);
    seq->exempt_bytes = bytes;
    if (bytes < before && !kvt_mem_fits(seq->cache)) /* their sealed forms are free blocks now */
        kvt_blocks_trim(seq->cache);
}

/* ---- the table ---- */

/* Give up what a pending step was to seal from a row on. The rows that it added are not touched. */
static void drop_sealing(kvt_seq *seq, uint32_t g, size_t from)
{
    kvt_seq_group *group = &seq->groups[g];
    from = from > group->n_sealed ? from : group->n_sealed;
    while (group->seal_end > from)
        put_block(seq, take_out(beside(seq, --group->seal_end, g)));
}

void kvt_rows_seal_less(kvt_seq *seq, uint64_t n_tokens)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        drop_sealing(seq, g, kvt_rows_older(n_tokens, seq->cache->groups[g].residual_tokens));
}

/* Rows ahead of the one that is worked on whose blocks' heads are prefetched. */
#define ROWS_AHEAD 16

static void prefetch_row(const kvt_seq *seq, size_t row)
{
    for (uint32_t c = 0; c < seq->cache->n_columns; c++)
        if (*kvt_seq_entry(seq, row, c))
            __builtin_prefetch(*kvt_seq_entry(seq, row, c), 1);
}

/* Give back rows from .. to - 1, the last first, which is taken again first. */
static void put_rows(kvt_seq *seq, size_t from, size_t to)
{
    kvt_cache *cache = seq->cache;
    if (seq->reserves) {
        for (size_t row = to; row-- > from;)
            for (uint32_t c = 0; c < cache->n_columns; c++)
                put_block(seq, take_out(kvt_seq_entry(seq, row, c)));
        return;
    }
    pthread_mutex_lock(&cache->lock); /* once: there may be thousands */
    for (size_t row = to; row-- > from;) {
        if (row >= from + ROWS_AHEAD)
            prefetch_row(seq, row - ROWS_AHEAD);
        for (uint32_t c = 0; c < cache->n_columns; c++)
            if (*kvt_seq_entry(seq, row, c))
                kvt_block_put_locked(cache, take_out(kvt_seq_entry(seq, row, c)));
    }
    kvt_block_unlock(cache);
}

/* What a sequence of n_rows rows has sealed and released at most. */
static void cut_groups(kvt_seq *seq, size_t n_rows)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *group = &seq->groups[g];
        group->n_sealed = group->n_sealed < n_rows ? group->n_sealed : n_rows;
        group->n_final = group->n_final < group->n_sealed ? group->n_final : group->n_sealed;
        group->seal_end = group->n_sealed;
        if (n_rows <= kvt_sink_rows(&seq->cache->groups[g]))
            group->first = 0;
    }
}

void kvt_rows_shrink(kvt_seq *seq, size_t n_rows)
{
    kvt_cache *cache = seq->cache;
    for (uint32_t g = 0; g < cache->n_groups; g++)
        drop_sealing(seq, g, 0);
    if (seq->n_rows > n_rows) {
        put_rows(seq, n_rows, seq->n_rows);
        seq->n_rows = n_rows;
    }
    cut_groups(seq, n_rows);
    account(seq);
}

void kvt_rows_drop(kvt_seq *seq, uint32_t g, size_t from, size_t to)
{
    for (size_t row = from; row < to; row++)
        put_block(seq, take_out(kvt_seq_entry(seq, row, g)));
}

/* How many of rows from .. to - 1 are below `end`. */
static size_t rows_below(size_t from, size_t to, size_t end)
{
    to = to < end ? to : end;
    return to > from ? to - from : 0;
}

void kvt_rows_cut(kvt_seq *seq, size_t from, size_t to)
{
    put_rows(seq, from, to);
    memmove(kvt_seq_entry(seq, from, 0), kvt_seq_entry(seq, to, 0),
            (seq->n_rows - to) * seq->cache->n_columns * sizeof *seq->table);
    memset(kvt_seq_entry(seq, seq->n_rows - (to - from), 0), 0,
           (to - from) * seq->cache->n_columns * sizeof *seq->table);
    seq->n_rows -= to - from;
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *group = &seq->groups[g];
        group->first -= rows_below(from, to, group->first);
        group->n_final -= rows_below(from, to, group->n_final);
        group->n_sealed -= rows_below(from, to, group->n_sealed);
        group->seal_end = group->n_sealed;
        if (group->first <= kvt_sink_rows(&seq->cache->groups[g])) /* what was released is out */
            group->first = 0;
    }
    account(seq);
}

/* Put another block, or none, into an entry, whose block is given back. */
static void exchange(kvt_seq *seq, kvt_block **entry, kvt_block *block)
{
    kvt_block *old = *entry;
    if (block) {
        pthread_mutex_lock(&seq->cache->lock);
        kvt_block_refer_locked(seq->cache, block);
        pthread_mutex_unlock(&seq->cache->lock);
    }
    *entry = block;
    put_block(seq, old);
}

void kvt_rows_restore(kvt_seq *seq, const kvt_checkpoint *checkpoint)
{
    kvt_cache *cache = seq->cache;
    size_t n_rows = kvt_rows(checkpoint->n_tokens);

    put_rows(seq, n_rows, seq->n_rows);
    seq->n_rows = n_rows;
    for (uint32_t c = 0; c <= cache->n_groups; c++) {
        kvt_block *const *blocks = kvt_checkpoint_blocks((kvt_checkpoint *)checkpoint, c);
        size_t from = checkpoint->from[c];
        for (size_t row = from; row < n_rows; row++) {
            exchange(seq, kvt_seq_entry(seq, row, c), blocks[row - from]);
            if (c < cache->n_groups)
                exchange(seq, beside(seq, row, c), blocks[n_rows - from + row - from]);
        }
    }
    memcpy(seq->groups, checkpoint->groups, sizeof seq->groups);
    kvt_seq_unverified(seq);
    seq->length = checkpoint->n_tokens;
    account(seq);
}

void kvt_rows_state(kvt_seq *seq)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        kvt_seq_group *state = &seq->groups[g];
        size_t sinks = kvt_sink_rows(&seq->cache->groups[g]), first = sinks, sealed = 0;
        while (first < seq->n_rows && !kvt_seq_block(seq, first, g))
            first++;
        for (; seq->cache->groups[g].seals && sealed < seq->n_rows; sealed++) {
            const kvt_block *block = kvt_seq_block(seq, sealed, g);
            if (block && kvt_is_open(block->form))
                break;
        }
        state->first = first > sinks ? first : 0;
        state->n_final = state->n_sealed = state->seal_end = sealed;
    }
}

/* Whether a sequence's table or one of its checkpoints has a block of a mapping. */
static uint32_t has_mapped(const kvt_seq *seq)
{
    for (size_t i = 0; i < seq->n_rows * seq->cache->n_columns; i++)
        if (seq->table[i] && seq->table[i]->mapping)
            return 1;
    for (size_t i = 0; i < seq->n_checkpoints; i++) {
        const kvt_checkpoint *checkpoint = seq->checkpoints[i];
        for (size_t j = 0; j < checkpoint->n_blocks; j++)
            if (checkpoint->blocks[j] && checkpoint->blocks[j]->mapping)
                return 1;
    }
    return 0;
}

kvt_status kvt_rows_lend(kvt_seq *seq, uint32_t class_index, kvt_block **block)
{
    kvt_cache *cache = seq->cache;

    if (!seq->reserves)
        return kvt_block_get(cache, class_index, block);
    pthread_mutex_lock(&cache->lock);
    *block = take_spare(seq, class_index);
    if (*block) {
        kvt_block_refer_locked(cache, *block);
        (*block)->lent = seq->lent;
        seq->lent = *block;
    }
    pthread_mutex_unlock(&cache->lock);
    return *block ? KVT_OK : kvt_block_get(cache, class_index, block);
}

void kvt_rows_settle(kvt_seq *seq, int is_replaced)
{
    kvt_cache *cache = seq->cache;
    size_t brought[KVT_MAX_CLASSES] = {0};

    if (!seq->reserves)
        return;
    for (size_t i = 0; is_replaced && i < seq->n_rows * cache->n_columns; i++)
        if (seq->table[i] && !seq->table[i]->mapping)
            brought[seq->table[i]->class_index]++;
    while (seq->lent) {
        kvt_block *block = seq->lent;
        const uint32_t class_index = block->class_index;
        int is_back;
        seq->lent = block->lent;
        block->visit = 0;
        pthread_mutex_lock(&cache->lock);
        is_back = block->references == 1;
        pthread_mutex_unlock(&cache->lock);
        if (is_back) {
            if (block->flags & KVT_BLOCK_IS_READ_INTO)
                memset(block->data, 0, cache->class_bytes[class_index]);
            block->flags &= (uint8_t)~KVT_BLOCK_IS_READ_INTO;
            put_spare(seq, block);
        } else {
            kvt_block_put(cache, block);
            brought[class_index] -= brought[class_index] > 0;
        }
    }
    /* What was not lent came besides, and the blocks from before are spare ones now. */
    for (uint32_t c = 0; c < cache->n_classes; c++)
        for (; brought[c] && seq->n_spare[c]; brought[c]--)
            kvt_block_put(cache, take_spare(seq, c));
}

void kvt_rows_replace(kvt_seq *seq, const kvt_seq *with)
{
    assert(seq->n_checkpoints == 0 && !seq->turns);
    kvt_rows_shrink(seq, 0);
    if (with->n_rows)
        memcpy(seq->table, with->table, with->n_rows * seq->cache->n_columns * sizeof *with->table);
    seq->n_rows = with->n_rows;
    seq->length = with->length;
    seq->next_position = with->next_position;
    seq->unkeyed_from = UINT64_MAX;
    memcpy(seq->groups, with->groups, sizeof seq->groups);
    seq->checkpoints = with->checkpoints;
    seq->n_checkpoints = with->n_checkpoints;
    seq->checkpoint_room = with->checkpoint_room;
    seq->turns = with->turns;
    seq->has_mapped = has_mapped(seq);
    kvt_seq_unverified(seq);
}

kvt_status kvt_rows_set_exempt(kvt_seq *seq, uint64_t exempt)
{
    kvt_cache *cache = seq->cache;
    uint64_t before = seq->exempt_bytes;

    if (exempt >= before) {
        kvt_mem_exempt(cache, exempt, before);
        if (!kvt_mem_fits(cache))
            kvt_blocks_trim(cache);
    } else if (!kvt_mem_exempt_less(cache, before - exempt)) {
        kvt_blocks_trim(cache);
        if (!kvt_mem_exempt_less(cache, before - exempt))
            return kvt_mem_over_budget(cache);
    }
    seq->exempt_bytes = exempt;
    return KVT_OK;
}

void kvt_rows_share(const kvt_seq *from, uint64_t n_tokens, kvt_seq *to)
{
    kvt_cache *cache = from->cache;
    size_t n_rows = kvt_rows(n_tokens);

    pthread_mutex_lock(&cache->lock);
    for (size_t row = 0; row < n_rows; row++) {
        if (row + ROWS_AHEAD < n_rows)
            prefetch_row(from, row + ROWS_AHEAD);
        for (uint32_t c = 0; c < cache->n_columns; c++) {
            kvt_block *block = *kvt_seq_entry(from, row, c);
            /* What the pending step of `from` seals is its own until it commits. */
            if (c > cache->n_groups && row >= from->groups[c - cache->n_groups - 1].n_sealed)
                block = NULL;
            if (block)
                kvt_block_refer_locked(cache, block);
            *kvt_seq_entry(to, row, c) = block;
        }
    }
    pthread_mutex_unlock(&cache->lock);
    to->n_rows = n_rows;
    to->length = n_tokens;
    to->has_mapped = from->has_mapped;
    if (from->unkeyed_from < n_tokens)
        to->unkeyed_from = from->unkeyed_from;
    memcpy(to->groups, from->groups, cache->n_groups * sizeof *to->groups);
    cut_groups(to, n_rows);
    if (n_tokens < from->length)
        kvt_rows_revert(to, n_tokens);
}

kvt_status kvt_rows_charge(kvt_seq *seq)
{
    return kvt_rows_set_exempt(seq, exemption(seq));
}

/* ---- a step's blocks ---- */

/* What a step that ends with n_tokens adds to a group. */
typedef struct group_plan {
    size_t seal_end;   /* rows n_sealed .. seal_end - 1 are sealed by it */
    size_t open_begin; /* new rows before it are sealed at once, those from it on are open */
    size_t sealed, fine, open; /* blocks to be added */
    uint64_t exempt;           /* bytes of own open blocks that will have a sealed form beside */
    int reopens;               /* the last row, which a truncate has cut, is open again */
    int again;                 /* and is sealed by the step, into the block that it had */
} group_plan;

int kvt_rows_reopens(const kvt_seq *seq, uint32_t g)
{
    return seq->cache->groups[g].reopens && !seq->pending && seq->length % KVT_TOKENS &&
           kvt_seq_block(seq, seq->n_rows - 1, g)->form == KVT_SEALED;
}

size_t kvt_rows_fine(const kvt_group *group, size_t from, size_t to)
{
    size_t end = to < group->fine_rows ? to : group->fine_rows;
    return end > from ? end - from : 0;
}

static group_plan plan_group(const kvt_seq *seq, uint32_t g, uint64_t n_tokens)
{
    const kvt_group *group = &seq->cache->groups[g];
    const int reopened = kvt_rows_reopens(seq, g);
    size_t n_rows = kvt_rows(n_tokens), direct, old_end;
    size_t n_sealed = seq->groups[g].n_sealed - (size_t)reopened;
    group_plan plan = {n_sealed, n_rows, 0, 0, 0, 0, reopened, 0};

    if (!group->seals) {
        plan.sealed = n_rows - seq->n_rows;
        return plan;
    }
    plan.seal_end = kvt_rows_older(n_tokens, group->residual_tokens);
    if (plan.seal_end < n_sealed)
        plan.seal_end = n_sealed;
    direct = kvt_rows_older(n_tokens, group->residual_tokens + KVT_DRAFT_TOKENS);
    plan.open_begin = direct > seq->n_rows ? direct : seq->n_rows;
    plan.fine = kvt_rows_fine(group, n_sealed, plan.seal_end);
    plan.sealed = plan.seal_end - n_sealed - plan.fine;
    plan.open = n_rows - plan.open_begin;
    old_end = plan.seal_end < seq->n_rows ? plan.seal_end : seq->n_rows;
    plan.exempt = own_open_bytes(seq, n_sealed, old_end, g);
    if (reopened && plan.seal_end > n_sealed)
        plan.exempt += kvt_block_bytes(seq->cache, kvt_class_of(seq->cache, g, KVT_REOPENED));
    if (plan.seal_end > plan.open_begin)
        plan.exempt += (plan.seal_end - plan.open_begin) *
                       kvt_block_bytes(seq->cache, kvt_class_of(seq->cache, g, KVT_OPEN));
    return plan;
}

kvt_status kvt_rows_add_spares(kvt_seq *seq, uint32_t class_index, size_t want, size_t *added)
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

void kvt_rows_undo_spares(kvt_seq *seq, uint32_t class_index, size_t n)
{
    while (n-- > 0)
        kvt_block_undo(seq->cache, take_spare(seq, class_index));
}

kvt_block *kvt_rows_shared_block(const kvt_seq *seq, uint32_t column)
{
    kvt_block *block;
    if (seq->length % KVT_TOKENS == 0)
        return NULL;
    block = kvt_seq_block(seq, seq->n_rows - 1, column);
    return kvt_block_is_own(seq->cache, block) ? NULL : block;
}

/*
 * The same, for a step that begins. A block that is the sequence's own is about to be written: it
 * parts from its twin under the same lock, so that no other sequence takes it meanwhile.
 */
static kvt_block *block_to_copy(const kvt_seq *seq, uint32_t column)
{
    kvt_block *block;
    int own;
    if (seq->length % KVT_TOKENS == 0)
        return NULL;
    block = kvt_seq_block(seq, seq->n_rows - 1, column);
    pthread_mutex_lock(&seq->cache->lock);
    own = kvt_block_is_own_locked(block);
    if (own)
        kvt_block_part_locked(block);
    pthread_mutex_unlock(&seq->cache->lock);
    return own ? NULL : block;
}

/* Give up what adopt has taken. */
static void unadopt(kvt_seq *seq, const group_plan *plans)
{
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        for (size_t row = seq->groups[g].n_sealed; row < plans[g].seal_end && row < seq->n_rows;
             row++)
            kvt_block_put(seq->cache, take_out(beside(seq, row, g)));
}

/*
 * Rows to be sealed whose open block has been sealed by another sequence that shares it: its form
 * is taken, and one less of its class wanted. Full rows only: the last one, where it is not, gets
 * other tokens.
 */
static void adopt(kvt_seq *seq, uint32_t g, size_t seal_end, size_t *want)
{
    kvt_cache *cache = seq->cache;
    size_t full = (size_t)(seq->length / KVT_TOKENS);
    pthread_mutex_lock(&cache->lock);
    for (size_t row = seq->groups[g].n_sealed; row < seal_end && row < full; row++) {
        kvt_block *twin = kvt_seq_block(seq, row, g)->twin;
        /* Behind a removal it may be another row there, sealed in another form. */
        if (!twin || twin->form != kvt_sealed_form(&cache->groups[g], row))
            continue;
        kvt_block_refer_locked(cache, twin);
        *beside(seq, row, g) = twin;
        want[twin->class_index]--;
    }
    pthread_mutex_unlock(&cache->lock);
}

/*
 * What may fail of a step's begin: the blocks that it needs, as spare ones. Open forms that were
 * kept for a truncate serve as open blocks of new rows. copies: the shared blocks, by columns, that
 * are to be copied.
 */
static kvt_status reserve_step(kvt_seq *seq, const group_plan *plans, kvt_block *const *copies,
                               size_t n_rows)
{
    kvt_cache *cache = seq->cache;
    size_t want[KVT_MAX_CLASSES] = {0}, added[KVT_MAX_CLASSES] = {0};
    uint64_t exempt = 0, before = seq->exempt_bytes;
    kvt_status status;

    want[cache->n_groups] = n_rows > seq->n_rows ? n_rows - seq->n_rows : 0;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        size_t kept = kvt_rows_own_kept(seq, g), used = plans[g].open;
        used = used < kept ? used : kept;
        want[g] = plans[g].sealed;
        want[kvt_class_of(cache, g, KVT_FINE)] = plans[g].fine;
        adopt(seq, g, plans[g].seal_end, want);
        want[kvt_class_of(cache, g, KVT_OPEN)] = plans[g].open - used;
        want[kvt_class_of(cache, g, KVT_REOPENED)] = (size_t)plans[g].reopens;
        exempt += plans[g].exempt + own_kept_bytes(seq, g) -
                  (uint64_t)used * kvt_block_bytes(cache, kvt_class_of(cache, g, KVT_OPEN));
    }
    for (uint32_t c = 0; c <= cache->n_groups; c++)
        if (copies[c])
            want[copies[c]->class_index]++;
    status = kvt_rows_set_exempt(seq, seq->reserves ? 0 : exempt);
    for (uint32_t c = 0; status == KVT_OK && c < cache->n_classes; c++)
        status = kvt_rows_add_spares(seq, c, want[c], &added[c]);
    if (status == KVT_OK)
        return KVT_OK;
    for (uint32_t c = 0; c < cache->n_classes; c++)
        kvt_rows_undo_spares(seq, c, added[c]);
    unadopt(seq, plans);
    kvt_mem_exempt(cache, before, seq->exempt_bytes);
    seq->exempt_bytes = before;
    return status;
}

/* The open forms that were kept for a truncate become spare blocks, where nobody shares them. */
static void release_kept(kvt_seq *seq, uint32_t g)
{
    kvt_seq_group *group = &seq->groups[g];
    for (; group->n_final < group->n_sealed; group->n_final++) {
        kvt_block *open = take_out(beside(seq, group->n_final, g));
        if (open && !reclaim(seq, open))
            kvt_block_free(seq->cache, open);
    }
}

/* A block of the class that a row is sealed in. */
static kvt_block *take_sealed(kvt_seq *seq, size_t row, uint32_t g)
{
    return take_spare(seq,
                      kvt_class_of(seq->cache, g, kvt_sealed_form(&seq->cache->groups[g], row)));
}

/*
 * The last row, which a truncate has cut, is open again. again: its block, which is the sequence's
 * own, is what the step seals it into.
 */
static void reopen_last(kvt_seq *seq, uint32_t g, int again)
{
    kvt_seq_group *state = &seq->groups[g];
    size_t row = seq->n_rows - 1;
    kvt_block **entry = kvt_seq_entry(seq, row, g), *sealed = *entry;
    kvt_block *open = take_spare(seq, kvt_class_of(seq->cache, g, KVT_REOPENED));
    assert(state->n_sealed == seq->n_rows && !*beside(seq, row, g));
    kvt_reopen(seq, g, row, open);
    *entry = open;
    if (again)
        *beside(seq, row, g) = sealed;
    else
        put_block(seq, sealed);
    state->n_sealed = state->seal_end = row;
    state->n_final = state->n_final < row ? state->n_final : row;
}

/* Take the spare blocks of reserve_step into the table. Cannot fail. */
static void place_step(kvt_seq *seq, const group_plan *plans, kvt_block *const *copies,
                       size_t n_rows)
{
    kvt_cache *cache = seq->cache;
    size_t first_new = seq->n_rows;

    for (uint32_t c = 0; c <= cache->n_groups; c++)
        if (copies[c]) {
            kvt_block **entry = kvt_seq_entry(seq, first_new - 1, c);
            *entry = take_spare(seq, copies[c]->class_index);
            kvt_block_copy(cache, copies[c], (size_t)(seq->length % KVT_TOKENS), *entry);
            if (kvt_is_open(copies[c]->form))
                kvt_block_free(cache, copies[c]);
            else
                kvt_block_put(cache, copies[c]);
        }
    for (uint32_t g = 0; g < cache->n_groups; g++)
        if (plans[g].reopens)
            reopen_last(seq, g, plans[g].again);
    if (n_rows > first_new)
        seq->n_rows = n_rows;
    for (size_t row = first_new; row < n_rows; row++)
        *kvt_seq_entry(seq, row, cache->n_groups) = take_spare(seq, cache->n_groups);
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const group_plan *plan = &plans[g];
        uint32_t open_class = kvt_class_of(cache, g, KVT_OPEN);
        uint32_t reopened_class = kvt_class_of(cache, g, KVT_REOPENED);
        release_kept(seq, g);
        for (size_t row = first_new; row < n_rows; row++)
            *kvt_seq_entry(seq, row, g) =
                row < plan->open_begin ? take_sealed(seq, row, g) : take_spare(seq, open_class);
        for (size_t row = seq->groups[g].n_sealed; row < plan->seal_end; row++)
            if (kvt_is_open(kvt_seq_block(seq, row, g)->form) && !*beside(seq, row, g))
                *beside(seq, row, g) = take_sealed(seq, row, g);
        seq->groups[g].seal_end = plan->seal_end;
        while (!seq->reserves && seq->spare[open_class])
            kvt_block_free(cache, take_spare(seq, open_class));
        while (!seq->reserves && seq->spare[reopened_class])
            kvt_block_free(cache, take_spare(seq, reopened_class));
    }
    account(seq);
}

/*
 * The step has sealed a row. Its sealed form becomes that of the open block for all sequences that
 * share it; where another sequence came first, that one's is taken. Returns the sealed form.
 */
static kvt_block *publish(kvt_cache *cache, kvt_block *open, kvt_block *sealed)
{
    pthread_mutex_lock(&cache->lock);
    if (!open->twin) {
        open->twin = sealed;
        sealed->twin = open;
    } else if (open->twin != sealed && open->twin->form == sealed->form) {
        kvt_block_refer_locked(cache, open->twin);
        kvt_block_put_locked(cache, sealed);
        sealed = open->twin;
    }
    kvt_block_unlock(cache);
    return sealed;
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
            if (!kvt_is_open(open->form))
                continue;
            *entry = publish(seq->cache, open, *beside(seq, row, g));
            *beside(seq, row, g) = open;
            if (row < final)
                free_open(seq, take_out(beside(seq, row, g)));
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
            *entry = take_out(beside(seq, group->n_sealed, g));
            put_block(seq, sealed);
        }
        group->seal_end = group->n_sealed;
    }
}

/* Whether a block is the sequence's own. It parts from its twin then, as in block_to_copy. */
static int make_own(kvt_cache *cache, kvt_block *block)
{
    int own;
    pthread_mutex_lock(&cache->lock);
    own = kvt_block_is_own_locked(block);
    if (own)
        kvt_block_part_locked(block);
    pthread_mutex_unlock(&cache->lock);
    return own;
}

kvt_status kvt_rows_own(kvt_seq *seq, const size_t *from)
{
    kvt_cache *cache = seq->cache;
    size_t want[KVT_MAX_CLASSES] = {0}, added[KVT_MAX_CLASSES] = {0};
    kvt_status status = KVT_OK;

    for (uint32_t g = 0; status == KVT_OK && g < cache->n_groups; g++)
        status = kvt_seq_verify_rows(seq, g, from[g], seq->n_rows);
    if (status != KVT_OK)
        return status;
    for (uint32_t c = 0; c <= cache->n_groups; c++)
        for (size_t row = from[c]; row < seq->n_rows; row++) {
            kvt_block *block = kvt_seq_block(seq, row, c);
            want[block->class_index] += !make_own(cache, block);
        }
    for (uint32_t c = 0; status == KVT_OK && c < cache->n_classes; c++)
        status = kvt_rows_add_spares(seq, c, want[c], &added[c]);
    for (uint32_t c = 0; status == KVT_OK && c <= cache->n_groups; c++)
        for (size_t row = from[c]; row < seq->n_rows; row++) {
            kvt_block **entry = kvt_seq_entry(seq, row, c), *shared = *entry;
            if (make_own(cache, shared))
                continue;
            *entry = take_spare(seq, shared->class_index);
            added[shared->class_index] -= added[shared->class_index] > 0;
            kvt_block_copy(cache, shared, kvt_row_tokens(seq, row), *entry);
            kvt_block_put(cache, shared);
        }
    for (uint32_t c = 0; c < cache->n_classes; c++) /* on an error, or shared no more */
        kvt_rows_undo_spares(seq, c, added[c]);
    return status;
}

kvt_status kvt_rows_own_last(kvt_seq *seq)
{
    kvt_cache *cache = seq->cache;
    for (uint32_t c = 0; c <= cache->n_groups; c++) {
        kvt_block *shared = kvt_rows_shared_block(seq, c), *copy;
        kvt_status status;
        if (!shared)
            continue;
        status = kvt_block_get(cache, shared->class_index, &copy);
        if (status != KVT_OK)
            return status;
        kvt_block_copy(cache, shared, (size_t)(seq->length % KVT_TOKENS), copy);
        *kvt_seq_entry(seq, seq->n_rows - 1, c) = copy;
        kvt_block_put(cache, shared);
    }
    return KVT_OK;
}

/*
 * The blocks that a step copies, opens again, seals, or takes an offset from are what they were:
 * its appends cannot fail for them.
 */
static kvt_status verify_step(const kvt_seq *seq, uint32_t g, const group_plan *plan)
{
    const kvt_group *group = &seq->cache->groups[g];
    const size_t n = seq->n_rows, n_sealed = seq->groups[g].n_sealed - (size_t)plan->reopens;
    kvt_status status = KVT_OK;
    if (!seq->has_mapped || n == 0)
        return KVT_OK;
    if (group->seals || seq->length % KVT_TOKENS)
        status = kvt_seq_verify_rows(seq, g, n - 1, n);
    if (status == KVT_OK && group->offsets)
        status = kvt_seq_verify_rows(seq, g, 0, 1);
    if (status == KVT_OK && group->seals)
        status = kvt_seq_verify_rows(seq, g, n_sealed, plan->seal_end < n ? plan->seal_end : n);
    return status;
}

kvt_status kvt_rows_begin(kvt_seq *seq, uint64_t n_tokens)
{
    group_plan plans[KVT_MAX_GROUPS];
    kvt_block *copies[KVT_MAX_GROUPS + 1];
    size_t n_rows = kvt_rows(seq->length + n_tokens);
    kvt_status status;

    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        plans[g] = plan_group(seq, g, seq->length + n_tokens);
        status = verify_step(seq, g, &plans[g]);
        if (status != KVT_OK)
            return status;
    }
    for (uint32_t c = 0; c <= seq->cache->n_groups; c++) {
        copies[c] = block_to_copy(seq, c);
        if (c == seq->cache->n_groups || !plans[c].reopens)
            continue;
        plans[c].again = !copies[c] && plans[c].seal_end >= seq->n_rows &&
                         kvt_sealed_form(&seq->cache->groups[c], seq->n_rows - 1) == KVT_SEALED;
        plans[c].sealed -= (size_t)plans[c].again;
        copies[c] = NULL;
    }
    status = reserve_step(seq, plans, copies, n_rows);
    if (status == KVT_OK)
        place_step(seq, plans, copies, n_rows);
    return status;
}

void kvt_rows_release(kvt_seq *seq)
{
    kvt_border_release(seq);
    seq->reserves = 0;
    kvt_rows_shrink(seq, 0);
    for (uint32_t c = 0; c < seq->cache->n_classes; c++)
        while (seq->spare[c])
            kvt_block_put(seq->cache, take_spare(seq, c));
}
