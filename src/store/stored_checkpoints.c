/*
 * Checkpoints in a store: at which lengths of a prompt there is one.
 *
 * A checkpoint can be at any length, and a store tells only whether it has a key. So the keys of
 * all lengths that may have one are made and looked for, the deepest first, by thousands: most
 * prompts go on from near their end. options.checkpoint_tokens says fewer.
 */
#include "src/store/stored.h"

#define AT_ONCE 1024u

void kvt_stored_checkpoint_key(kvt_stored *p, uint64_t n_tokens, kvt_store_key *key)
{
    const size_t row = (size_t)(n_tokens / KVT_TOKENS), behind = (size_t)(n_tokens % KVT_TOKENS);
    int32_t ids[KVT_TOKENS], positions[KVT_TOKENS];

    kvt_stored_chain_seek(&p->chain, &p->options, row, p->hashes.data + row * sizeof p->chain.hash);
    if (behind)
        kvt_stored_tokens(p, row, behind, ids, positions);
    kvt_stored_chain_checkpoint(&p->chain, ids, positions, behind, key);
}

/* Whether all blocks are found that a sequence has sealed at a length, as far as it needs them. */
static int has_sealed_rows(const kvt_stored *p, uint64_t n_tokens)
{
    for (uint32_t g = 0; g < p->cache->n_groups; g++) {
        const kvt_group *group = &p->cache->groups[g];
        const size_t rows = kvt_rows_older(n_tokens, group->seals ? group->residual_tokens : 0);
        const size_t first = kvt_stored_first(p, g, n_tokens);
        for (size_t row = 0; row < rows; row++)
            if (kvt_stored_needs(p, g, first, row) && !p->found.data[kvt_stored_at(p, row, g)])
                return 0;
    }
    return 1;
}

/* The next lengths to be looked at, descending, at most AT_ONCE. *left: how many were not yet. */
static size_t next_lengths(const kvt_stored *p, uint64_t most, uint64_t *left, uint64_t *lengths)
{
    const kvt_prefix_options *o = &p->options;
    size_t n = 0;

    while (*left && n < AT_ONCE) {
        const uint64_t length = o->checkpoint_tokens ? o->checkpoint_tokens[*left - 1] : *left;
        --*left;
        if (length > 0 && length <= most)
            lengths[n++] = length;
    }
    return n;
}

kvt_status kvt_stored_find_checkpoint(kvt_stored *p, uint64_t most, uint64_t *n_tokens,
                                      kvt_store_key *key)
{
    uint64_t lengths[AT_ONCE], left;
    uint8_t found[AT_ONCE] = {0};
    kvt_snap_buffer keys = {NULL, 0};
    kvt_status status;
    size_t n = 1, i;

    left = p->options.checkpoint_tokens ? p->options.n_checkpoint_tokens : most;
    *n_tokens = UINT64_MAX;
    status =
        kvt_snap_reserve(&p->context, &keys, 0, AT_ONCE * sizeof *key, "the keys of checkpoints");
    while (status == KVT_OK && n && *n_tokens == UINT64_MAX) {
        kvt_store_key *made = (kvt_store_key *)(void *)keys.data;
        n = next_lengths(p, most, &left, lengths);
        for (i = 0; i < n; i++)
            kvt_stored_checkpoint_key(p, lengths[i], &made[i]);
        if (n)
            status = p->store->exists(p->store->user, made, n, found, &p->error);
        if (status != KVT_OK) {
            status = kvt_stored_store_failed(p, status, &p->error);
            break;
        }
        for (i = 0; i < n && *n_tokens == UINT64_MAX; i++)
            if (found[i] && has_sealed_rows(p, lengths[i])) {
                *n_tokens = lengths[i];
                *key = made[i];
            }
    }
    kvt_snap_release(&p->context, &keys);
    return status;
}
