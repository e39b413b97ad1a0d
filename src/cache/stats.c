/*
 * What a sequence's blocks are: its own, or shared.
 */
#include "src/cache/cache.h"

/*
 * Every reference of a sequence and of its checkpoints. own: not of a checkpoint that other
 * sequences have too.
 */
static void each_block(const kvt_seq *seq,
                       void (*visit)(const kvt_cache *cache, kvt_block *block, uint32_t own,
                                     kvt_seq_stats *stats),
                       kvt_seq_stats *stats)
{
    const kvt_cache *cache = seq->cache;
    for (size_t i = 0; i < seq->n_rows * cache->n_columns; i++)
        if (seq->table[i])
            visit(cache, seq->table[i], 1, stats);
    for (size_t i = 0; i < seq->n_checkpoints; i++) {
        const kvt_checkpoint *checkpoint = seq->checkpoints[i];
        for (size_t j = 0; j < checkpoint->n_blocks; j++)
            if (checkpoint->blocks[j])
                visit(cache, checkpoint->blocks[j], checkpoint->references == 1, stats);
    }
}

static void see_block(const kvt_cache *cache, kvt_block *block, uint32_t own, kvt_seq_stats *stats)
{
    (void)stats;
    block->seen = block->visit == cache->n_visits ? block->seen + own : own;
    block->visit = cache->n_visits;
}

/* Once a block: it is the sequence's own where all its references are. */
static void count_block(const kvt_cache *cache, kvt_block *block, uint32_t own,
                        kvt_seq_stats *stats)
{
    uint64_t bytes = block->mapping ? 0 : kvt_block_bytes(cache, block->class_index);
    (void)own;
    if (block->visit == cache->n_visits)
        *(block->seen < block->references ? &stats->shared_bytes : &stats->own_bytes) += bytes;
    block->visit = 0;
}

kvt_status kvt_seq_get_stats(const kvt_seq *seq, kvt_seq_stats *stats)
{
    kvt_cache *cache;
    kvt_seq_stats found;
    if (!seq)
        return KVT_ERR_ARG;
    cache = seq->cache;
    if (!stats || stats->struct_size != sizeof found)
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_seq_get_stats: stats is NULL, or struct_size is not this version's");
    memset(&found, 0, sizeof found);
    found.struct_size = sizeof found;
    found.own_bytes = kvt_seq_own_bytes(cache) + kvt_round_up(seq->border_bytes, 64) +
                      kvt_round_up(seq->checkpoint_room * sizeof *seq->checkpoints, 64) +
                      kvt_round_up(seq->turns ? seq->turns->bytes : 0, 64);
    for (uint32_t c = 0; c < cache->n_classes; c++)
        found.own_bytes += seq->n_spare[c] * kvt_block_bytes(cache, c);
    pthread_mutex_lock(&cache->lock);
    cache->n_visits++;
    each_block(seq, see_block, &found);
    each_block(seq, count_block, &found);
    for (size_t i = 0; i < seq->n_checkpoints; i++) {
        const kvt_checkpoint *checkpoint = seq->checkpoints[i];
        uint64_t bytes = kvt_round_up(checkpoint->bytes, 64);
        *(checkpoint->references > 1 ? &found.shared_bytes : &found.own_bytes) += bytes;
    }
    pthread_mutex_unlock(&cache->lock);
    *stats = found;
    return KVT_OK;
}

uint64_t kvt_seq_memory_bytes(const kvt_seq *seq)
{
    kvt_seq_stats stats = {.struct_size = sizeof stats};
    return kvt_seq_get_stats(seq, &stats) == KVT_OK ? stats.own_bytes + stats.shared_bytes : 0;
}
