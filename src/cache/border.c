/*
 * The keys of a step that fills block 0 and goes on, as they were appended.
 *
 * K's rows of block 1 are stored less block 0's mean (docs/numerics.md, "Open rows"). Where a step
 * crosses the border between the two, that mean depends on which of its tokens are committed:
 * kvt_seq_commit_selected puts those beyond the border anew. f16 rows less another mean do not give
 * the key back to the bit, so append keeps the f32 rows here, in the stored domain, until the step
 * ends. Of groups whose block 0 is sealed already nothing is kept: its offset stays what it is.
 *
 * In a sequence with a reserve the memory is taken by that, for any step, and stays.
 */
#include "src/cache/rows.h"

/* Tokens of a step that may be selected from, when at least one is committed. */
#define MOST_BEYOND (KVT_SELECT_TOKENS - 1)

/* Whether block 0 of a group is open, or is opened again by the step that begins. */
static int is_open(const kvt_seq *seq, uint32_t g)
{
    return seq->groups[g].n_sealed == 0 || kvt_rows_reopens(seq, g);
}

/* Floats of the groups before `end` for n tokens of each; all groups, or those of the step. */
static size_t floats_before(const kvt_seq *seq, uint32_t end, size_t n, int all)
{
    size_t floats = 0;
    for (uint32_t g = 0; g < end; g++) {
        const kvt_group *group = &seq->cache->groups[g];
        if (group->offsets && (all || is_open(seq, g)))
            floats +=
                (size_t)group->config.n_layers * group->config.n_kv_heads * group->config.k_dim * n;
    }
    return floats;
}

float *kvt_border_keys(const kvt_seq *seq, uint32_t g, size_t layer_index, size_t kv_head)
{
    const kvt_group *group = &seq->cache->groups[g];
    if (!seq->n_border || !group->offsets || !is_open(seq, g))
        return NULL;
    return seq->border + floats_before(seq, g, seq->n_border, 0) +
           (layer_index * group->config.n_kv_heads + kv_head) * group->config.k_dim * seq->n_border;
}

/* counted: against the budget. Where there is none, once more without free blocks. */
static kvt_status allocate(kvt_seq *seq, size_t bytes, uint32_t counted)
{
    kvt_status (*get)(kvt_cache *, size_t, const char *, void **) =
        counted ? kvt_mem_alloc : kvt_mem_alloc_working;
    void *memory = NULL;
    kvt_status status = get(seq->cache, bytes, NULL, &memory);
    if (status != KVT_OK) {
        kvt_blocks_trim(seq->cache);
        status = get(seq->cache, bytes, "keys at the border of block 0", &memory);
    }
    if (status == KVT_OK) {
        seq->border = memory;
        seq->border_bytes = bytes;
        seq->border_counted = counted;
    }
    return status;
}

kvt_status kvt_border_begin(kvt_seq *seq, uint64_t n_tokens)
{
    uint64_t end = seq->length + n_tokens;
    size_t n, bytes;
    if (seq->length == 0 || seq->length >= KVT_TOKENS || end <= KVT_TOKENS ||
        n_tokens > KVT_SELECT_TOKENS)
        return KVT_OK;
    n = (size_t)(end - KVT_TOKENS);
    bytes = floats_before(seq, seq->cache->n_groups, n, 0) * sizeof(float);
    if (bytes && !seq->border) {
        kvt_status status = allocate(seq, bytes, 0);
        if (status != KVT_OK)
            return status;
    }
    assert(bytes <= seq->border_bytes);
    seq->n_border = bytes ? (uint32_t)n : 0;
    return KVT_OK;
}

void kvt_border_end(kvt_seq *seq)
{
    seq->n_border = 0;
    if (!seq->border_counted)
        kvt_border_release(seq);
}

kvt_status kvt_border_reserve(kvt_seq *seq)
{
    size_t bytes = floats_before(seq, seq->cache->n_groups, MOST_BEYOND, 1) * sizeof(float);
    return bytes && !seq->border ? allocate(seq, bytes, 1) : KVT_OK;
}

void kvt_border_release(kvt_seq *seq)
{
    if (seq->border_counted)
        kvt_mem_free(seq->cache, seq->border, seq->border_bytes);
    else
        kvt_mem_free_working(seq->cache, seq->border, seq->border_bytes);
    seq->border = NULL;
    seq->border_bytes = 0;
    seq->border_counted = 0;
    seq->n_border = 0;
}
