/*
 * Blocks whose data lies in a mapped file.
 *
 * A snapshot can have a block's layers just as they lie in memory (docs/format.md, "Images"). Such
 * a block is attended over where it is: the table has a header that points there. The header is one
 * of the mapping's, which lasts as long as any of them has a reference, or its creator. Nobody
 * writes into such a block, and it never is a sequence's own: it is copied before the first write,
 * as a shared one is. It takes no memory of the cache, and counts nowhere as a block that does.
 *
 * Nothing of a file is trusted before its checksum has been computed. That is put off until a call
 * is about to read a layer of the block: then it is verified, and this is noted, so that what is
 * never attended over is never read. A sequence notes the layers of which all blocks in force are
 * verified, until others come into force. What fails stays unusable, whatever the file has then.
 */
#include "src/cache/cache.h"

enum { UNVERIFIED, VERIFIED, DAMAGED };

kvt_status kvt_mapping_create(kvt_cache *cache, size_t n_blocks, kvt_mapping **made)
{
    const size_t head = kvt_round_up(sizeof(kvt_mapping), 64);
    size_t layers = 0;
    uint64_t sum;
    kvt_mapping *mapping;
    kvt_status status;
    void *memory;

    for (uint32_t g = 0; g < cache->n_groups; g++)
        layers =
            cache->groups[g].config.n_layers > layers ? cache->groups[g].config.n_layers : layers;
    if (kvt_mul_overflows(n_blocks, sizeof(kvt_block) + layers, &sum) ||
        kvt_add_overflows(sum, head, &sum) || sum > SIZE_MAX / 2)
        return kvt_fail(cache, KVT_ERR_LIMIT, "a mapping of %zu blocks", n_blocks);
    status = kvt_mem_alloc_working(cache, (size_t)sum, "the blocks of a mapped file", &memory);
    if (status != KVT_OK)
        return status;
    mapping = memory;
    mapping->cache = cache;
    mapping->references = 1;
    mapping->bytes = (size_t)sum;
    mapping->n_blocks = n_blocks;
    mapping->layers = layers;
    mapping->blocks = (kvt_block *)(void *)((unsigned char *)memory + head);
    mapping->states = (uint8_t *)(mapping->blocks + n_blocks);
    *made = mapping;
    return KVT_OK;
}

static uint8_t *state_of(const kvt_block *block, uint32_t layer_index)
{
    const kvt_mapping *mapping = block->mapping;
    assert(layer_index < mapping->layers);
    return &mapping->states[kvt_mapping_index(mapping, block) * mapping->layers + layer_index];
}

kvt_block *kvt_mapping_block(kvt_mapping *mapping, size_t i, uint32_t class_index,
                             const unsigned char *data, int verified)
{
    kvt_cache *cache = mapping->cache;
    kvt_block *block = &mapping->blocks[i];
    assert(i < mapping->n_blocks && block->references == 0 && (uintptr_t)data % 64 == 0);
    assert(class_index < cache->n_classes && class_index != cache->n_groups);
    block->data = (unsigned char *)(uintptr_t)data; /* never written through it */
    block->mapping = mapping;
    block->class_index = (uint16_t)class_index;
    block->form = (uint8_t)(class_index < cache->n_groups ? (uint32_t)KVT_SEALED
                                                          : (class_index - 1) / cache->n_groups);
    block->references = 1;
    memset(state_of(block, 0), verified ? VERIFIED : UNVERIFIED, mapping->layers);
    pthread_mutex_lock(&cache->lock);
    mapping->references++;
    pthread_mutex_unlock(&cache->lock);
    return block;
}

uint64_t kvt_mapping_used_bytes(const kvt_mapping *mapping)
{
    uint64_t bytes = 0;
    pthread_mutex_lock(&mapping->cache->lock);
    for (size_t i = 0; i < mapping->n_blocks; i++)
        if (mapping->blocks[i].references)
            bytes += mapping->cache->class_bytes[mapping->blocks[i].class_index];
    pthread_mutex_unlock(&mapping->cache->lock);
    return bytes;
}

void kvt_mapping_drop_locked(kvt_mapping *mapping)
{
    if (--mapping->references > 0)
        return;
    mapping->next = mapping->cache->unused_mappings;
    mapping->cache->unused_mappings = mapping;
}

void kvt_mapping_put(kvt_mapping *mapping)
{
    kvt_cache *cache;
    if (!mapping)
        return;
    cache = mapping->cache;
    pthread_mutex_lock(&cache->lock);
    kvt_mapping_drop_locked(mapping);
    kvt_block_unlock(cache);
}

/* ---- verification ---- */

kvt_status kvt_block_verify(const kvt_block *block, uint32_t layer_index)
{
    kvt_mapping *mapping = block->mapping;
    kvt_status status = KVT_OK;
    uint8_t *state, before = UNVERIFIED;
    if (!mapping)
        return KVT_OK;
    state = state_of(block, layer_index);
    switch (__atomic_load_n(state, __ATOMIC_ACQUIRE)) {
    case VERIFIED: return KVT_OK;
    case DAMAGED:
        return kvt_fail(mapping->cache, KVT_ERR_CORRUPT,
                        "snapshot damaged: a mapped block, in layer %u of its group", layer_index);
    default: status = mapping->verify(mapping, block, layer_index);
    }
    if (status == KVT_ERR_CORRUPT)
        __atomic_store_n(state, DAMAGED, __ATOMIC_RELEASE);
    else if (status == KVT_OK) /* but what another thread has found damaged meanwhile */
        __atomic_compare_exchange_n(state, &before, VERIFIED, 0, __ATOMIC_RELEASE,
                                    __ATOMIC_RELAXED);
    return status;
}

/* Rows of a sequence and layers of a group: one task for each pair. */
typedef struct verify_job {
    const kvt_seq *seq;
    uint32_t group, layer_index; /* the first layer */
    size_t from, rows;
    int32_t status; /* of one that has failed; atomic */
} verify_job;

/* NULL: there is nothing to verify. */
static const kvt_block *block_of(const verify_job *job, size_t i)
{
    const kvt_block *block = *kvt_seq_entry(job->seq, job->from + i % job->rows, job->group);
    return block && block->mapping ? block : NULL;
}

static uint32_t layer_of(const verify_job *job, size_t i)
{
    return job->layer_index + (uint32_t)(i / job->rows);
}

static void verify_task(void *arg, size_t i)
{
    verify_job *job = arg;
    const kvt_block *block = block_of(job, i);
    kvt_status status = block ? kvt_block_verify(block, layer_of(job, i)) : KVT_OK;
    if (status != KVT_OK)
        __atomic_store_n(&job->status, (int32_t)status, __ATOMIC_RELAXED);
}

/* About what one thread reads and hashes in a nanosecond, in bytes: pages may not be there yet. */
#define VERIFY_BYTES 4

static kvt_status verify(const kvt_seq *seq, uint32_t g, uint32_t layer_index, size_t n_layers,
                         size_t from, size_t to)
{
    kvt_parallel *parallel = &seq->cache->parallel;
    verify_job job = {seq, g, layer_index, from, to - from, KVT_OK};
    uint64_t bytes = 0;
    if (!seq->has_mapped || from >= to)
        return KVT_OK;
    for (size_t i = 0; i < n_layers * job.rows; i++) {
        const kvt_block *block = block_of(&job, i);
        if (block &&
            __atomic_load_n(state_of(block, layer_of(&job, i)), __ATOMIC_ACQUIRE) != VERIFIED)
            bytes += kvt_block_layout(&seq->cache->groups[g], block)->layer_bytes;
    }
    if (bytes)
        kvt_parallel_run(parallel, verify_task, &job, n_layers * job.rows,
                         kvt_parallel_threads(parallel, bytes / VERIFY_BYTES));
    return (kvt_status)job.status;
}

kvt_status kvt_seq_verify_rows(const kvt_seq *seq, uint32_t g, size_t from, size_t to)
{
    return verify(seq, g, 0, seq->cache->groups[g].config.n_layers, from, to);
}

kvt_status kvt_seq_verify_some(const kvt_seq *seq, uint32_t layer, size_t from, size_t to)
{
    const kvt_layer *at = &seq->cache->layers[layer];
    return verify(seq, at->group, at->index, 1, from, to);
}

kvt_status kvt_seq_verify_layer(const kvt_seq *seq, uint32_t layer)
{
    /* Bookkeeping, not state: calls that read a sequence may do so at once. */
    uint8_t *byte = (uint8_t *)(uintptr_t)&seq->verified[layer / 8];
    const uint8_t bit = (uint8_t)(1u << layer % 8);
    kvt_status status;
    if (!seq->has_mapped || (__atomic_load_n(byte, __ATOMIC_ACQUIRE) & bit))
        return KVT_OK;
    status = kvt_seq_verify_some(seq, layer, 0, seq->n_rows);
    if (status == KVT_OK)
        __atomic_fetch_or(byte, bit, __ATOMIC_RELEASE);
    return status;
}

void kvt_seq_unverified(kvt_seq *seq)
{
    memset(seq->verified, 0, sizeof seq->verified);
}
