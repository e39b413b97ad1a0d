/*
 * Turns: what q is turned by for keys that have moved (remove.c), one for each shift that a
 * sequence's keys have.
 *
 * With RoPE a key that was computed at position p is R(p) k, R(p) being a rotation of pairs of dims
 * by p times a frequency. Moved to p - s its product with a query is q . R(-s) R(p) k, which is
 * (R(s) q) . (R(p) k): q is turned by s, the key stays as stored.
 */
#include <math.h>

#include "src/cache/cache.h"
#include "src/fpenv.h"
#include "src/sort.h"

const float *kvt_turn_of(const kvt_turns *turns, uint32_t group, int32_t shift)
{
    size_t low = 0, high = turns->n - 1;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (turns->shifts[middle] < shift)
            low = middle + 1;
        else
            high = middle;
    }
    assert(turns->shifts[low] == shift);
    return turns->floats + turns->at[group] + low * turns->stride[group];
}

/* Room for n turns. */
static kvt_status alloc_turns(kvt_cache *cache, size_t n, kvt_turns **made)
{
    size_t at[KVT_MAX_GROUPS], head, bytes;
    uint64_t floats = 0, sum; /* below 2^45: n is below KVT_MAX_TOKENS */
    kvt_turns *turns;
    kvt_status status;
    void *memory;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        at[g] = (size_t)floats;
        floats += (uint64_t)n * cache->groups[g].config.rope_dims;
    }
    head = kvt_round_up(sizeof *turns, 64);
    sum = head + 64 + (uint64_t)n * sizeof(int32_t) + floats * sizeof(float);
    if (sum > SIZE_MAX / 2)
        return kvt_fail(cache, KVT_ERR_MEMORY, "%zu turns of moved keys are too many", n);
    bytes = head + kvt_round_up(n * sizeof(int32_t), 64) + (size_t)floats * sizeof(float);
    status = kvt_block_memory(cache, bytes, "the turns of moved keys", &memory);
    if (status != KVT_OK)
        return status;
    turns = memory;
    turns->bytes = bytes;
    turns->n = n;
    memcpy(turns->at, at, cache->n_groups * sizeof *at);
    for (uint32_t g = 0; g < cache->n_groups; g++)
        turns->stride[g] = cache->groups[g].config.rope_dims;
    turns->shifts = (int32_t *)(void *)((unsigned char *)memory + head);
    turns->floats =
        (float *)(void *)((unsigned char *)turns->shifts + kvt_round_up(n * sizeof(int32_t), 64));
    *made = turns;
    return KVT_OK;
}

/* Cosines and sines of shift * frequency, in double: shifts may be large. */
static void fill_turn(const kvt_group *group, int32_t shift, float *turn)
{
    size_t pairs = group->config.rope_dims / 2;
    for (size_t i = 0; i < pairs; i++) {
        double angle = (double)shift * (double)group->rope_frequencies[i];
        turn[i] = (float)cos(angle);
        turn[pairs + i] = (float)sin(angle);
    }
}

static int by_shift(const void *a, const void *b)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* Sort, and keep each number once; how many there are is returned. A file may have any. */
static size_t sort_unique(int32_t *x, size_t n)
{
    size_t kept = 1;
    kvt_sort(x, n, sizeof *x, by_shift);
    for (size_t i = 1; i < n; i++)
        if (x[i] != x[kept - 1])
            x[kept++] = x[i];
    return kept;
}

/* A walk over the shifts of a sequence's tokens; those of tokens from `moved` on are delta more. */
typedef struct shift_walk {
    uint64_t moved;
    int32_t delta, last;
    size_t n;      /* changes: no less than there are different ones */
    int32_t *into; /* NULL: they are only counted */
} shift_walk;

static void visit_shift(shift_walk *walk, int32_t shift)
{
    if (shift == 0 || shift == walk->last)
        return;
    walk->last = shift;
    if (walk->into)
        walk->into[walk->n] = shift;
    walk->n++;
}

static void walk_shifts(const kvt_seq *seq, shift_walk *walk)
{
    for (uint64_t token = 0; token < seq->length; token++) {
        const kvt_meta *meta = kvt_seq_meta(seq, (size_t)(token / KVT_TOKENS));
        visit_shift(walk, kvt_shift_at(meta, token % KVT_TOKENS) +
                              (token < walk->moved ? 0 : walk->delta));
        if (meta->shift != KVT_SHIFT_MIXED && token + 1 != walk->moved) { /* to the next change */
            uint64_t next = (token / KVT_TOKENS + 1) * KVT_TOKENS;
            token = (token < walk->moved && walk->moved < next ? walk->moved : next) - 1;
        }
    }
}

kvt_status kvt_turns_make(const kvt_seq *seq, uint64_t moved, int32_t delta, kvt_turns **made)
{
    shift_walk walk = {moved, delta, 0, 0, NULL};
    kvt_turns *turns = NULL;
    kvt_status status;
    kvt_fpenv saved;
    *made = NULL;
    walk_shifts(seq, &walk);
    if (walk.n == 0)
        return KVT_OK;
    status = alloc_turns(seq->cache, walk.n, &turns);
    if (status != KVT_OK)
        return status;
    walk.last = 0;
    walk.n = 0;
    walk.into = turns->shifts;
    walk_shifts(seq, &walk);
    turns->n = sort_unique(turns->shifts, walk.n);
    saved = kvt_fpenv_enter();
    for (uint32_t g = 0; g < seq->cache->n_groups; g++)
        for (size_t i = 0; i < turns->n; i++)
            fill_turn(&seq->cache->groups[g], turns->shifts[i],
                      turns->floats + turns->at[g] + i * turns->stride[g]);
    kvt_fpenv_leave(saved);
    *made = turns;
    return KVT_OK;
}

int kvt_turns_needed(const kvt_seq *seq, uint64_t first, uint64_t n_tokens)
{
    for (uint64_t token = first; seq->turns && token < first + n_tokens; token++) {
        const kvt_meta *meta = kvt_seq_meta(seq, (size_t)(token / KVT_TOKENS));
        if (kvt_shift_at(meta, token % KVT_TOKENS))
            return 1;
        if (meta->shift != KVT_SHIFT_MIXED) /* it is that of the whole row */
            token = (token / KVT_TOKENS + 1) * KVT_TOKENS - 1;
    }
    return 0;
}

kvt_status kvt_turns_copy(kvt_cache *cache, const kvt_turns *turns, kvt_turns **copy)
{
    ptrdiff_t shifts, floats;
    kvt_status status;
    void *memory;
    *copy = NULL;
    if (!turns)
        return KVT_OK;
    status = kvt_block_memory(cache, turns->bytes, "the turns of moved keys", &memory);
    if (status != KVT_OK)
        return status;
    shifts = (const unsigned char *)turns->shifts - (const unsigned char *)turns;
    floats = (const unsigned char *)turns->floats - (const unsigned char *)turns;
    memcpy(memory, turns, turns->bytes);
    *copy = memory;
    (*copy)->shifts = (int32_t *)(void *)((unsigned char *)memory + shifts);
    (*copy)->floats = (float *)(void *)((unsigned char *)memory + floats);
    return KVT_OK;
}

void kvt_turns_free(kvt_cache *cache, kvt_turns *turns)
{
    if (turns)
        kvt_mem_free(cache, turns, turns->bytes);
}
