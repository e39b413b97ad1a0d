/*
 * What putting and getting prefixes share: the options, the keys of a prompt's rows, and which rows
 * a sequence of some length needs. And kvt_prefix_probe.
 *
 * A group with a sliding window needs the rows of its sinks and those in sight of the next query,
 * or of one 64 tokens before it, as a snapshot keeps them (src/cache/window.c); any other group
 * needs all. So the longest prefix is the largest number of rows at which nothing that is needed
 * lacks.
 */
#include "src/store/stored.h"

#include <stdio.h>

/* ---- arguments ---- */

static kvt_status refuse(const kvt_stored *p, const char *why)
{
    return kvt_fail(p->cache, KVT_ERR_ARG, "%s: %s", p->call, why);
}

static kvt_status check_options(const kvt_stored *p)
{
    const kvt_prefix_options *o = &p->options;
    size_t i;

    if (!o->name_space && o->name_space_bytes)
        return refuse(p, "name_space is NULL");
    if (!o->salt && o->salt_bytes)
        return refuse(p, "salt is NULL");
    if (!o->extras && o->n_extras)
        return refuse(p, "extras is NULL");
    for (i = 0; i < o->n_extras; i++) {
        if (!o->extras[i].data && o->extras[i].bytes)
            return refuse(p, "the data of an extra is NULL");
        if (i && o->extras[i].block <= o->extras[i - 1].block)
            return refuse(p, "the extras' blocks do not ascend");
    }
    if (o->checkpoints > KVT_PREFIX_CHECKPOINT)
        return refuse(p, "checkpoints is out of range");
    if (o->reserved)
        return refuse(p, "reserved is not 0");
    if (!o->checkpoint_tokens && o->n_checkpoint_tokens)
        return refuse(p, "checkpoint_tokens is NULL");
    if (o->n_checkpoint_tokens && !o->checkpoints)
        return refuse(p, "checkpoint_tokens without checkpoints");
    for (i = 1; i < o->n_checkpoint_tokens; i++)
        if (o->checkpoint_tokens[i] <= o->checkpoint_tokens[i - 1])
            return refuse(p, "checkpoint_tokens do not ascend");
    return KVT_OK;
}

kvt_status kvt_stored_admit(kvt_stored *p, const char *call, const kvt_store *store,
                            const kvt_seq *seq, const kvt_prefix_options *options)
{
    memset(p, 0, sizeof *p);
    if (!seq)
        return KVT_ERR_ARG;
    p->cache = seq->cache;
    p->context.cache = seq->cache;
    p->seq = seq;
    p->store = store;
    p->call = call;
    if (!kvt_store_is_whole(store))
        return refuse(p, "no store, or one without struct_size or its functions");
    if (options && !kvt_copy_struct(&p->options, options, sizeof p->options))
        return refuse(p, "options of an unknown struct_size");
    if (!kvt_store_has_sha256())
        return kvt_fail(p->cache, KVT_ERR_UNSUPPORTED,
                        "%s: the library was built without libsodium", call);
    return check_options(p);
}

void kvt_stored_release(kvt_stored *p)
{
    kvt_snap_release(&p->context, &p->keys);
    kvt_snap_release(&p->context, &p->hashes);
    kvt_snap_release(&p->context, &p->found);
    kvt_snap_release(&p->context, &p->reach);
    kvt_snap_release(&p->context, &p->fits);
}

kvt_status kvt_stored_store_failed(const kvt_stored *p, kvt_status status, kvt_store_error *error)
{
    error->text[sizeof error->text - 1] = '\0';
    return kvt_snap_fail(&p->context, status, "%s: %s", p->call,
                         error->text[0] ? error->text : "the store has failed");
}

/* ---- tokens and keys ---- */

int32_t kvt_stored_position(const kvt_stored *p, uint64_t token)
{
    if (!p->prompt)
        return kvt_seq_meta(p->seq, (size_t)(token / KVT_TOKENS))->positions[token % KVT_TOKENS];
    return p->options.positions ? p->options.positions[token] : (int32_t)token;
}

void kvt_stored_tokens(const kvt_stored *p, size_t row, size_t n, int32_t *ids, int32_t *positions)
{
    const uint64_t first = (uint64_t)row * KVT_TOKENS;
    size_t t;

    if (p->prompt)
        memcpy(ids, p->prompt + first, n * sizeof *ids);
    else
        memcpy(ids, kvt_seq_meta(p->seq, row)->token_ids, n * sizeof *ids);
    for (t = 0; t < n; t++)
        positions[t] = kvt_stored_position(p, first + t);
}

kvt_status kvt_stored_make_keys(kvt_stored *p, const int32_t *prompt, uint64_t n_tokens)
{
    const size_t n_rows = (size_t)(n_tokens / KVT_TOKENS);
    const size_t n = n_rows * p->cache->n_groups;
    int32_t ids[KVT_TOKENS], positions[KVT_TOKENS], highest = INT32_MIN;
    kvt_stored_chain *chain = &p->chain;
    unsigned char *hash;
    kvt_status status;
    size_t row, t;

    if (n_rows > SIZE_MAX / 2 / sizeof(kvt_stored_want) / KVT_MAX_GROUPS)
        return kvt_fail(p->cache, KVT_ERR_LIMIT, "%s: the keys of %llu tokens", p->call,
                        (unsigned long long)n_tokens);
    p->prompt = prompt;
    p->n_tokens = n_tokens;
    p->n_rows = n_rows;
    status = kvt_snap_reserve(&p->context, &p->keys, 0, n * sizeof(kvt_store_key) + 1,
                              "the keys of a prefix");
    if (status == KVT_OK)
        status = kvt_snap_reserve(&p->context, &p->hashes, 0, (n_rows + 1) * sizeof chain->hash,
                                  "the keys of a prefix");
    if (status == KVT_OK)
        status = kvt_snap_reserve(&p->context, &p->found, 0, n + 1, "the keys of a prefix");
    if (status == KVT_OK)
        status = kvt_snap_reserve(&p->context, &p->reach, 0, n_rows * sizeof(int32_t) + 1,
                                  "the keys of a prefix");
    if (status == KVT_OK)
        status = kvt_snap_reserve(&p->context, &p->fits, 0, n_rows + 1, "the keys of a prefix");
    if (status != KVT_OK)
        return status;
    memset(p->found.data, 0, n + 1);
    kvt_stored_chain_begin(chain, p->seq, &p->options);
    hash = p->hashes.data;
    memcpy(hash, chain->hash, sizeof chain->hash);
    for (row = 0; row < n_rows; row++) {
        kvt_stored_tokens(p, row, KVT_TOKENS, ids, positions);
        for (t = 0; t < KVT_TOKENS; t++)
            highest = positions[t] > highest ? positions[t] : highest;
        ((int32_t *)(void *)p->reach.data)[row] = highest;
        kvt_stored_chain_add(chain, ids, positions);
        hash += sizeof chain->hash;
        memcpy(hash, chain->hash, sizeof chain->hash);
        for (uint32_t g = 0; g < p->cache->n_groups; g++)
            kvt_stored_chain_key(chain, g, &kvt_stored_keys(p)[kvt_stored_at(p, row, g)]);
    }
    return KVT_OK;
}

kvt_status kvt_stored_find(kvt_stored *p)
{
    const size_t n = p->n_rows * p->cache->n_groups;
    kvt_status status;

    if (n == 0)
        return KVT_OK;
    status = p->store->exists(p->store->user, kvt_stored_keys(p), n, p->found.data, &p->error);
    return status == KVT_OK ? KVT_OK : kvt_stored_store_failed(p, status, &p->error);
}

/* ---- how much is there ---- */

size_t kvt_stored_first(const kvt_stored *p, uint32_t g, uint64_t n_tokens)
{
    const kvt_group *group = &p->cache->groups[g];
    const int32_t *reach = (const int32_t *)(const void *)p->reach.data;
    const uint64_t slack = KVT_DRAFT_TOKENS;
    size_t low = kvt_sink_rows(group), high;
    int64_t lowest = INT64_MAX;
    uint64_t i;

    if (!kvt_has_window(group) || n_tokens <= slack)
        return 0;
    for (i = 0; i <= slack; i++) {
        const int64_t next = (int64_t)kvt_stored_position(p, n_tokens - 1 - i) + 1;
        lowest = next < lowest ? next : lowest;
    }
    high = kvt_rows_older(n_tokens, slack + (group->seals ? group->residual_tokens : 0));
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (reach[middle] > lowest - (int64_t)group->window_tokens)
            high = middle;
        else
            low = middle + 1;
    }
    return low > kvt_sink_rows(group) ? low : 0;
}

size_t kvt_stored_longest(kvt_stored *p)
{
    unsigned char *fits = p->fits.data;
    size_t most = p->n_rows, rows;

    memset(fits, 1, most + 1);
    for (uint32_t g = 0; g < p->cache->n_groups; g++) {
        const size_t sinks = kvt_sink_rows(&p->cache->groups[g]);
        size_t lacks_sink = SIZE_MAX, lacks = SIZE_MAX; /* the first sink; the last behind them */
        for (rows = 1; rows <= most; rows++) {
            const size_t row = rows - 1, first = kvt_stored_first(p, g, rows * KVT_TOKENS);
            if (!p->found.data[kvt_stored_at(p, row, g)]) {
                if (row >= sinks)
                    lacks = row;
                else if (lacks_sink == SIZE_MAX)
                    lacks_sink = row;
            }
            if (lacks_sink != SIZE_MAX || (lacks != SIZE_MAX && lacks >= first))
                fits[rows] = 0;
        }
    }
    for (rows = most; rows > 0 && !fits[rows]; rows--)
        ;
    return rows;
}

/* ---- probing ---- */

/* What get and probe have in common before a key is made: how much of the prompt may be used. */
kvt_status kvt_stored_begin(kvt_stored *p, const int32_t *prompt, uint64_t n_prompt)
{
    uint64_t usable = n_prompt ? n_prompt - 1 : 0, i;

    if (!prompt && n_prompt)
        return refuse(p, "prompt is NULL");
    if (p->options.n_tokens)
        return refuse(p, "n_tokens is for kvt_prefix_put");
    for (i = 0; i < n_prompt; i++)
        if (prompt[i] < 0)
            return refuse(p, "a token id of the prompt is below 0");
    if (p->options.positions)
        for (i = 0; i < n_prompt; i++)
            if (p->options.positions[i] < 0)
                return refuse(p, "a position is below 0");
    if (usable > p->cache->max_tokens)
        usable = p->cache->max_tokens;
    return kvt_stored_make_keys(p, prompt, usable);
}

/* The deepest checkpoint that can be used, if what it has sealed is what this cache would have. */
static kvt_status probe_checkpoints(kvt_stored *p, uint64_t *n_tokens)
{
    kvt_stored_search search;
    kvt_store_key key;
    kvt_status status = kvt_stored_search_begin(&search, p);

    do {
        if (status == KVT_OK)
            status = kvt_stored_search_next(&search, n_tokens, &key);
    } while (status == KVT_OK && *n_tokens && !kvt_stored_has_own_rows(p, *n_tokens));
    kvt_stored_search_end(&search);
    return status;
}

kvt_status kvt_prefix_probe(const kvt_store *store, const kvt_seq *seq, const int32_t *prompt,
                            uint64_t n_prompt, const kvt_prefix_options *options,
                            kvt_prefix_result *result)
{
    kvt_stored p;
    kvt_prefix_result found;
    kvt_status status = kvt_stored_admit(&p, "kvt_prefix_probe", store, seq, options);

    if (status == KVT_OK && !result)
        status = refuse(&p, "result is NULL");
    if (status == KVT_OK)
        status = kvt_stored_begin(&p, prompt, n_prompt);
    if (status == KVT_OK && !p.options.checkpoints)
        status = kvt_stored_find(&p);
    if (status == KVT_OK) {
        memset(&found, 0, sizeof found);
        if (p.options.checkpoints)
            status = probe_checkpoints(&p, &found.n_tokens);
        else
            found.n_tokens = kvt_stored_longest(&p) * (uint64_t)KVT_TOKENS;
    }
    if (status == KVT_OK)
        *result = found;
    if (seq)
        kvt_stored_release(&p);
    return status;
}
