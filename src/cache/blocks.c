/*
 * Blocks of 64 tokens, and the free lists that keep them for reuse.
 *
 * A block is zeroed when it is new. That costs at most one pass over memory whose pages must be
 * touched anyway, keeps the padding of tiles zero for good, and never shows the heap's old bytes. A
 * recycled block keeps its bytes: everything that reads a block masks by the sequence's length.
 *
 * A block is used by as many entries of block tables as it has references. All changes of them are
 * made under the cache's lock. One that is a sequence's alone and has no twin stays so until that
 * sequence itself is forked, so that what has been asked once holds through a call. A sealed block
 * with a twin may get a reference at any time, from a sequence that has the twin. One of a mapping
 * (mapping.c) is nobody's own.
 */
#include "src/cache/cache.h"

size_t kvt_block_bytes(const kvt_cache *cache, uint32_t class_index)
{
    return kvt_round_up(sizeof(kvt_block) + cache->class_bytes[class_index], 64);
}

kvt_status kvt_block_memory(kvt_cache *cache, size_t bytes, const char *what, void **memory)
{
    kvt_status status = kvt_mem_alloc(cache, bytes, NULL, memory);
    if (status == KVT_OK)
        return KVT_OK;
    kvt_blocks_trim(cache);
    return kvt_mem_alloc(cache, bytes, what, memory);
}

kvt_status kvt_block_get(kvt_cache *cache, uint32_t class_index, kvt_block **block)
{
    size_t bytes = kvt_block_bytes(cache, class_index);
    kvt_block *found;
    void *memory;
    kvt_status status;

    pthread_mutex_lock(&cache->lock);
    found = cache->free_blocks[class_index];
    if (found) {
        cache->free_blocks[class_index] = found->next;
        cache->n_free_blocks[class_index]--;
        cache->n_used_blocks[class_index]++;
        found->references = 1;
        assert(found->id_tokens == 0);
    }
    pthread_mutex_unlock(&cache->lock);
    if (!found) {
        status = kvt_block_memory(cache, bytes, "a block of 64 tokens", &memory);
        if (status != KVT_OK)
            return status;
        found = memory;
        found->data = (unsigned char *)memory + sizeof *found;
        found->class_index = (uint16_t)class_index;
        found->form =
            (uint8_t)(class_index <= cache->n_groups ? (uint32_t)KVT_SEALED
                                                     : (class_index - 1) / cache->n_groups);
        found->flags = KVT_BLOCK_IS_NEW;
        found->references = 1;
        pthread_mutex_lock(&cache->lock);
        cache->n_used_blocks[class_index]++;
        pthread_mutex_unlock(&cache->lock);
    }
    *block = found;
    return KVT_OK;
}

/* ---- references ---- */

void kvt_block_refer_locked(kvt_cache *cache, kvt_block *block)
{
    assert(block->references > 0);
    if (++block->references == 2 && !block->mapping)
        cache->n_shared_blocks[block->class_index]++;
}

void kvt_block_part_locked(kvt_block *block)
{
    if (block->twin)
        block->twin = block->twin->twin = NULL;
    block->id_tokens = 0;
}

/* One reference less. 1: it was the last one, and the block's memory is nobody's now. */
static int drop_locked(kvt_cache *cache, kvt_block *block)
{
    assert(block->references > 0);
    if (--block->references > 0) {
        cache->n_shared_blocks[block->class_index] -= block->references == 1 && !block->mapping;
        return 0;
    }
    kvt_block_part_locked(block);
    if (block->mapping) {
        kvt_mapping_drop_locked(block->mapping);
        return 0;
    }
    cache->n_used_blocks[block->class_index]--;
    return 1;
}

void kvt_block_put_locked(kvt_cache *cache, kvt_block *block)
{
    if (!drop_locked(cache, block))
        return;
    block->flags = 0;
    block->next = cache->free_blocks[block->class_index];
    cache->free_blocks[block->class_index] = block;
    cache->n_free_blocks[block->class_index]++;
}

int kvt_block_is_own(kvt_cache *cache, const kvt_block *block)
{
    int own;
    pthread_mutex_lock(&cache->lock);
    own = kvt_block_is_own_locked(block);
    pthread_mutex_unlock(&cache->lock);
    return own;
}

void kvt_block_unlock(kvt_cache *cache)
{
    kvt_mapping *unused = cache->unused_mappings;
    cache->unused_mappings = NULL;
    pthread_mutex_unlock(&cache->lock);
    while (unused) {
        kvt_mapping *next = unused->next;
        if (unused->close)
            unused->close(unused);
        kvt_mem_free_working(cache, unused, unused->bytes);
        unused = next;
    }
}

int kvt_block_id(kvt_cache *cache, const kvt_block *block, uint32_t tokens, unsigned char *id)
{
    int known;
    pthread_mutex_lock(&cache->lock);
    known = tokens > 0 && block->id_tokens == tokens;
    if (known)
        memcpy(id, block->id, sizeof block->id);
    pthread_mutex_unlock(&cache->lock);
    return known;
}

void kvt_block_set_id(kvt_cache *cache, kvt_block *block, uint32_t tokens, const unsigned char *id)
{
    assert(tokens > 0 && tokens <= KVT_TOKENS);
    pthread_mutex_lock(&cache->lock);
    assert(block->references > 0);
    memcpy(block->id, id, sizeof block->id);
    block->id_tokens = tokens;
    pthread_mutex_unlock(&cache->lock);
}

void kvt_block_put(kvt_cache *cache, kvt_block *block)
{
    if (!block)
        return;
    pthread_mutex_lock(&cache->lock);
    kvt_block_put_locked(cache, block);
    kvt_block_unlock(cache);
}

static void free_memory(kvt_cache *cache, kvt_block *block)
{
    kvt_mem_free(cache, block, kvt_block_bytes(cache, block->class_index));
}

void kvt_block_free(kvt_cache *cache, kvt_block *block)
{
    int last;
    if (!block)
        return;
    pthread_mutex_lock(&cache->lock);
    last = drop_locked(cache, block);
    kvt_block_unlock(cache);
    if (last)
        free_memory(cache, block);
}

void kvt_block_undo(kvt_cache *cache, kvt_block *block)
{
    if (block && block->flags & KVT_BLOCK_IS_NEW) {
        kvt_block_free(cache, block);
        return;
    }
    if (block && block->flags & KVT_BLOCK_IS_READ_INTO && kvt_block_is_own(cache, block))
        memset(block->data, 0, cache->class_bytes[block->class_index]);
    kvt_block_put(cache, block);
}

void kvt_blocks_trim(kvt_cache *cache)
{
    for (uint32_t c = 0; c < cache->n_classes; c++) {
        kvt_block *block;
        do { /* one at a time: the others can be had meanwhile */
            pthread_mutex_lock(&cache->lock);
            block = cache->free_blocks[c];
            if (block) {
                cache->free_blocks[c] = block->next;
                cache->n_free_blocks[c]--;
            }
            pthread_mutex_unlock(&cache->lock);
            if (block)
                free_memory(cache, block);
        } while (block);
    }
}

kvt_status kvt_cache_trim(kvt_cache *cache)
{
    if (!cache)
        return KVT_ERR_ARG;
    kvt_blocks_trim(cache);
    return KVT_OK;
}

/* ---- copies ---- */

typedef struct copy_job {
    const kvt_group *group;
    const kvt_block *from;
    kvt_block *to;
    size_t tiles;
} copy_job;

/* One layer: tiles, scales and offsets. Records of both sides lie alike, whatever the form. */
static void copy_layer(void *arg, size_t layer)
{
    const copy_job *job = arg;
    const kvt_layout *layout = kvt_block_layout(job->group, job->from);
    const size_t tiles_a_block = KVT_TOKENS / KVT_TILE_TOKENS;
    for (size_t head = 0; head < job->group->config.n_kv_heads; head++) {
        const unsigned char *from = kvt_head_record(job->group, job->from, layer, head);
        unsigned char *to = kvt_head_record(job->group, job->to, layer, head);
        memcpy(to + layout->k_codes, from + layout->k_codes,
               layout->k_code_bytes / tiles_a_block * job->tiles);
        memcpy(to + layout->k_scales, from + layout->k_scales, layout->v_codes - layout->k_scales);
        /* The fifth bits of all tokens follow their nibbles. */
        memcpy(to + layout->v_codes, from + layout->v_codes,
               layout->v_type == KVT_TYPE_I5 ? layout->v_code_bytes
                                             : layout->v_code_bytes / tiles_a_block * job->tiles);
    }
}

/* About what one thread copies in a nanosecond, in bytes. */
#define COPY_BYTES 8

void kvt_block_copy(kvt_cache *cache, const kvt_block *from, size_t n_tokens, kvt_block *to)
{
    copy_job job = {NULL, from, to, (n_tokens + KVT_TILE_TOKENS - 1) / KVT_TILE_TOKENS};
    uint32_t g = from->class_index, n_threads;

    if (g == cache->n_groups) {
        memcpy(to->data, from->data, cache->class_bytes[g]);
        return;
    }
    job.group = kvt_group_of_block(cache, from);
    n_threads = kvt_parallel_threads(&cache->parallel, cache->class_bytes[g] / COPY_BYTES);
    kvt_parallel_run(&cache->parallel, copy_layer, &job, job.group->config.n_layers, n_threads);
}
