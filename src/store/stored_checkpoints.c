/*
 * Checkpoints in a store: at which lengths of a prompt there is one.
 *
 * A checkpoint can be at any length, and a store tells only whether it has a key. So the keys of
 * all lengths that may have one are made and looked for, the deepest first, by thousands: most
 * prompts go on from near their end. options.checkpoint_tokens says fewer.
 *
 * The rows' keys are looked for behind those of checkpoints, and only where there is one: of what
 * was asked for last a store may have the order (directory_asked.c).
 *
 * How many rows of a checkpoint are sealed, and have values of their own, is up to the
 * residual_tokens of the cache that has put it: its value says so.
 */
#include "src/store/stored.h"

void kvt_stored_checkpoint_key(kvt_stored *p, uint64_t n_tokens, kvt_store_key *key)
{
    const size_t row = (size_t)(n_tokens / KVT_TOKENS), behind = (size_t)(n_tokens % KVT_TOKENS);
    int32_t ids[KVT_TOKENS], positions[KVT_TOKENS];

    kvt_stored_chain_seek(&p->chain, &p->options, row, p->hashes.data + row * sizeof p->chain.hash);
    if (behind)
        kvt_stored_tokens(p, row, behind, ids, positions);
    kvt_stored_chain_checkpoint(&p->chain, ids, positions, behind, key);
}

int kvt_stored_has_rows(const kvt_stored *p, uint64_t n_tokens, const size_t *sealed)
{
    for (uint32_t g = 0; g < p->cache->n_groups; g++) {
        const size_t first = kvt_stored_first(p, g, n_tokens);
        for (size_t row = 0; row < sealed[g]; row++)
            if (kvt_stored_needs(p, g, first, row) && !p->found.data[kvt_stored_at(p, row, g)])
                return 0;
    }
    return 1;
}

int kvt_stored_has_own_rows(const kvt_stored *p, uint64_t n_tokens)
{
    size_t sealed[KVT_MAX_GROUPS];

    for (uint32_t g = 0; g < p->cache->n_groups; g++) {
        const kvt_group *group = &p->cache->groups[g];
        sealed[g] = kvt_rows_older(n_tokens, group->seals ? group->residual_tokens : 0);
    }
    return kvt_stored_has_rows(p, n_tokens, sealed);
}

kvt_status kvt_stored_search_begin(kvt_stored_search *s, kvt_stored *p)
{
    memset(s, 0, sizeof *s);
    s->p = p;
    s->left = p->options.checkpoint_tokens ? (uint64_t)p->options.n_checkpoint_tokens : p->n_tokens;
    return kvt_snap_reserve(&p->context, &s->keys, 0, KVT_STORED_AT_ONCE * sizeof(kvt_store_key),
                            "the keys of checkpoints");
}

void kvt_stored_search_end(kvt_stored_search *s)
{
    if (s->p)
        kvt_snap_release(&s->p->context, &s->keys);
}

/* Look for the next lengths, descending. */
static kvt_status look(kvt_stored_search *s)
{
    const kvt_prefix_options *o = &s->p->options;
    kvt_store_key *keys = (kvt_store_key *)(void *)s->keys.data;
    kvt_status status = KVT_OK;

    s->n = s->i = 0;
    while (s->left && s->n < KVT_STORED_AT_ONCE) {
        const uint64_t length = o->checkpoint_tokens ? o->checkpoint_tokens[s->left - 1] : s->left;
        --s->left;
        if (length > 0 && length <= s->p->n_tokens) {
            kvt_stored_checkpoint_key(s->p, length, &keys[s->n]);
            s->lengths[s->n++] = length;
        }
    }
    if (s->n)
        status = s->p->store->exists(s->p->store->user, keys, s->n, s->found, &s->p->error);
    return status == KVT_OK ? KVT_OK : kvt_stored_store_failed(s->p, status, &s->p->error);
}

kvt_status kvt_stored_search_next(kvt_stored_search *s, uint64_t *n_tokens, kvt_store_key *key)
{
    kvt_status status = KVT_OK;

    *n_tokens = 0;
    while (status == KVT_OK && *n_tokens == 0 && (s->i < s->n || s->left)) {
        if (s->i == s->n) {
            status = look(s);
        } else {
            if (s->found[s->i]) {
                *n_tokens = s->lengths[s->i];
                *key = ((kvt_store_key *)(void *)s->keys.data)[s->i];
            }
            s->i++;
        }
    }
    if (status == KVT_OK && *n_tokens && !s->has_rows) {
        s->has_rows = 1;
        status = kvt_stored_find(s->p);
    }
    return status;
}
