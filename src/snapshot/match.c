/*
 * A snapshot that is loaded against the cache: which of its layers are the cache's, and where the
 * types differ.
 */
#include "src/snapshot/convert.h"
#include "src/snapshot/stage.h"

/* The file's layers that the cache's are, and the cache's groups of its groups. */
static kvt_status match_layers(kvt_snap_stage *st, const kvt_snap_header *header)
{
    const kvt_cache *cache = st->seq->cache;
    const kvt_load_options *o = st->options;
    uint32_t g, i, n = 0, c;

    for (g = 0; g < header->n_groups; g++) {
        uint32_t next = 0;
        st->first_layer[g] = n;
        st->group_of[g] = UINT32_MAX;
        for (i = 0; i < header->groups[g].n_layers; i++, n++) {
            uint32_t layer = header->layers[n], at = layer;
            st->layer_of[n] = UINT32_MAX;
            if (o->layers) {
                for (at = 0; at < o->n_layers && o->layers[at] != layer; at++)
                    ;
                if (at == o->n_layers)
                    continue;
            }
            c = cache->layers[at].group;
            if (st->group_of[g] == UINT32_MAX)
                st->group_of[g] = c;
            if (st->group_of[g] != c)
                return kvt_fail(
                    cache, KVT_ERR_MISMATCH,
                    "snapshot of another model: its layer %u is in group %u, layer %u of "
                    "the cache in group %u",
                    (unsigned)layer, (unsigned)g, (unsigned)at, (unsigned)c);
            st->layer_of[n] = next++;
        }
        if (st->group_of[g] != UINT32_MAX && next != cache->groups[st->group_of[g]].config.n_layers)
            return kvt_fail(cache, KVT_ERR_MISMATCH,
                            "snapshot of another model: %u of its layers are of group %u of the "
                            "cache, which has %u",
                            (unsigned)next, (unsigned)st->group_of[g],
                            (unsigned)cache->groups[st->group_of[g]].config.n_layers);
    }
    for (c = 0; c < cache->n_groups; c++) {
        uint32_t with = 0;
        for (g = 0; g < header->n_groups; g++)
            with += st->group_of[g] == c;
        if (with != 1)
            return kvt_fail(cache, KVT_ERR_MISMATCH,
                            "snapshot of another model: group %u of the cache is %u groups of it",
                            (unsigned)c, (unsigned)with);
    }
    return KVT_OK;
}

/* Where the file has other types than the cache. */
static kvt_status match_types(kvt_snap_stage *st, const kvt_snap_header *header)
{
    kvt_cache *cache = st->seq->cache;
    uint32_t g;

    for (g = 0; g < header->n_groups; g++) {
        const kvt_snapshot_group *group = &header->groups[g];
        const kvt_group *own;
        void *memory;
        kvt_status status;
        if (st->group_of[g] == UINT32_MAX)
            continue;
        own = &cache->groups[st->group_of[g]];
        if (group->k_type == own->config.k_type && group->v_type == own->config.v_type)
            continue;
        status = kvt_snap_alloc(st->context, sizeof *st->sources[g], "a snapshot's types", &memory);
        if (status != KVT_OK)
            return status;
        st->sources[g] = memory;
        memset(memory, 0, sizeof *st->sources[g]);
        status = kvt_snap_target_make(st->context, own, group, st->sources[g], &st->signs[g]);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

/*
 * Groups that are left out are verified like the others, in memory that grows with their layers. A
 * model's groups differ in size, but a file could say anything of them: what goes far beyond the
 * layers that are wanted is refused.
 */
#define UNWANTED_TIMES 64u
#define UNWANTED_BYTES ((uint64_t)4 << 20) /* or so many, where that is more */
static kvt_status check_unwanted(const kvt_snap_stage *st, const kvt_snap_header *header)
{
    uint64_t most = 0;
    uint32_t g;

    for (g = 0; g < header->n_groups; g++) {
        uint64_t bytes = kvt_snap_group_image_bytes(&header->groups[g]);
        if (st->group_of[g] != UINT32_MAX && bytes > most)
            most = bytes;
    }
    most *= UNWANTED_TIMES;
    if (most < UNWANTED_BYTES)
        most = UNWANTED_BYTES;
    for (g = 0; g < header->n_groups; g++) {
        uint64_t bytes = kvt_snap_group_image_bytes(&header->groups[g]);
        if (st->group_of[g] == UINT32_MAX && bytes > most)
            return kvt_fail(st->seq->cache, KVT_ERR_LIMIT,
                            "load: a layer of group %u of the snapshot, of which none is wanted, "
                            "takes %llu bytes for 64 tokens; %llu are the most beside those that "
                            "are",
                            (unsigned)g, (unsigned long long)bytes, (unsigned long long)most);
    }
    return KVT_OK;
}

kvt_status kvt_snap_stage_header(void *user, const kvt_snap_header *header)
{
    kvt_snap_stage *st = user;
    kvt_status status;

    if (st->options->layers) {
        status = kvt_snap_header_match_model(st->seq->cache, header);
    } else {
        status = kvt_snap_header_match(st->seq->cache, header, st->options->convert);
    }
    if (status == KVT_OK)
        status = match_layers(st, header);
    if (status != KVT_OK)
        return status;
    st->n_groups = header->n_groups;
    st->n_tokens = header->n_tokens;
    st->keep_tokens = header->n_tokens;
    st->whole = header->n_layers == st->seq->cache->n_layers;
    for (uint32_t g = 0; g < header->n_groups && st->options->layers; g++) {
        if (st->group_of[g] == UINT32_MAX)
            continue;
        status =
            kvt_snap_group_match(st->seq->cache, header, g, st->group_of[g], st->options->convert);
        if (status != KVT_OK)
            return status;
    }
    status = check_unwanted(st, header);
    return status == KVT_OK ? match_types(st, header) : status;
}
