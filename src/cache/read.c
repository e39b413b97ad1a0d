/*
 * Reading keys and values back as numbers: dequantized, rotation and offset undone.
 */
#include "src/fpenv.h"
#include "src/cache/cache.h"
#include "src/tensor.h"

typedef struct reader {
    const kvt_seq *seq;
    const kvt_kernels *kernels;
    const kvt_group *group;
    uint32_t group_index, layer_index;
} reader;

static kvt_status make_reader(const kvt_seq *seq, uint32_t layer, uint64_t first, uint64_t n,
                              const char *call, reader *r)
{
    const kvt_cache *cache;
    uint64_t visible;
    if (!seq)
        return KVT_ERR_ARG;
    cache = seq->cache;
    if (layer >= cache->n_layers)
        return kvt_fail(cache, KVT_ERR_ARG, "%s: layer %u of %u", call, layer, cache->n_layers);
    visible = kvt_seq_visible(seq, layer);
    if (first > visible || n > visible - first)
        return kvt_fail(cache, KVT_ERR_ARG, "%s: tokens %llu + %llu of %llu", call,
                        (unsigned long long)first, (unsigned long long)n,
                        (unsigned long long)visible);
    r->seq = seq;
    r->kernels = &cache->kernels;
    r->group_index = cache->layers[layer].group;
    r->layer_index = cache->layers[layer].index;
    r->group = &cache->groups[r->group_index];
    return KVT_OK;
}

static const unsigned char *record_of(const reader *r, uint64_t token, size_t head)
{
    const kvt_block *block = kvt_seq_block(r->seq, (size_t)(token / KVT_TOKENS), r->group_index);
    return kvt_head_record(r->group, block, r->layer_index, head);
}

static const uint16_t *halves(const unsigned char *memory)
{
    return (const uint16_t *)(const void *)memory;
}

static void read_k(const reader *r, uint64_t token, size_t head, float *x)
{
    const kvt_kernels *k = r->kernels;
    const kvt_group *group = r->group;
    const kvt_layout *layout = &group->layout;
    const unsigned char *record = record_of(r, token, head);
    size_t dims = group->config.k_dim;

    (group->config.k_type == KVT_TYPE_F32 ? k->get_k_f32
     : group->config.k_type == KVT_TYPE_F16
         ? k->get_k_f16
         : k->get_k_i8)(record + layout->k_codes, halves(record + layout->k_scales),
                        (size_t)(token % KVT_TOKENS), dims, layout->k_dims, x);
    if (group->rotates)
        k->unrotate(x, group->signs + head * dims, dims, group->rotation_block,
                    group->rotation_scale_q);
    if (group->offsets)
        for (size_t d = 0; d < dims; d++)
            x[d] += kvt_f16_to_f32(halves(record + layout->k_offset)[d]);
}

static void read_v(const reader *r, uint64_t token, size_t head, float *x)
{
    const kvt_kernels *k = r->kernels;
    const kvt_group_config *config = &r->group->config;
    const kvt_layout *layout = &r->group->layout;
    const unsigned char *record = record_of(r, token, head);

    if (r->group->v_in_k) { /* as kvt_read has K: the bits are to be the same */
        float row[KVT_MAX_DIM];
        read_k(r, token, head, row);
        memcpy(x, row, config->v_dim * sizeof *x);
        return;
    }
    (config->v_type == KVT_TYPE_F32 ? k->get_v_f32
     : config->v_type == KVT_TYPE_F16
         ? k->get_v_f16
         : k->get_v_i8)(record + layout->v_codes, halves(record + layout->v_scales),
                        (size_t)(token % KVT_TOKENS), config->v_dim, layout->v_dims, x);
}

kvt_status kvt_read(const kvt_seq *seq, uint32_t layer, kvt_side side, uint64_t first, uint64_t n,
                    const kvt_tensor *out)
{
    float x[KVT_MAX_DIM];
    size_t dims;
    kvt_view view;
    kvt_fpenv saved;
    reader r;
    kvt_status status = make_reader(seq, layer, first, n, "kvt_read", &r);

    if (status != KVT_OK)
        return status;
    if (side != KVT_SIDE_K && side != KVT_SIDE_V)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_read: unknown side %d", (int)side);
    dims = side == KVT_SIDE_K ? r.group->config.k_dim : r.group->config.v_dim;
    status = kvt_view_make(seq->cache, out, "out", n, r.group->config.n_kv_heads, dims, &view);
    if (status != KVT_OK)
        return status;
    saved = kvt_fpenv_enter();
    for (uint64_t i = 0; i < n; i++)
        for (size_t head = 0; head < r.group->config.n_kv_heads; head++) {
            if (side == KVT_SIDE_K)
                read_k(&r, first + i, head, x);
            else
                read_v(&r, first + i, head, x);
            kvt_view_store(r.kernels, &view, i, head, dims, x);
        }
    kvt_fpenv_leave(saved);
    return KVT_OK;
}

kvt_status kvt_visit(const kvt_seq *seq, uint32_t layer, uint64_t first, uint64_t n,
                     int (*visitor)(void *user, const kvt_token_view *token), void *user,
                     uint64_t *stopped_at)
{
    size_t heads, k_floats, bytes;
    uint64_t i;
    void *memory;
    float *k, *v;
    reader r;
    kvt_status status = make_reader(seq, layer, first, n, "kvt_visit", &r);

    if (status != KVT_OK)
        return status;
    if (!visitor)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_visit: visitor is NULL");
    heads = r.group->config.n_kv_heads;
    k_floats = heads * r.group->config.k_dim;
    bytes = (k_floats + heads * r.group->config.v_dim) * sizeof(float);
    status = kvt_mem_alloc_working(seq->cache, bytes, "a visited token", &memory);
    if (status != KVT_OK)
        return status;
    k = memory;
    v = k + k_floats;
    for (i = first; i < first + n; i++) {
        const kvt_meta *meta = kvt_seq_meta(seq, (size_t)(i / KVT_TOKENS));
        kvt_token_view token = {i, meta->positions[i % KVT_TOKENS], meta->token_ids[i % KVT_TOKENS],
                                k, v};
        kvt_fpenv saved = kvt_fpenv_enter();
        for (size_t head = 0; head < heads; head++) {
            read_k(&r, i, head, k + head * r.group->config.k_dim);
            read_v(&r, i, head, v + head * r.group->config.v_dim);
        }
        kvt_fpenv_leave(saved);
        if (visitor(user, &token))
            break;
    }
    kvt_mem_free_working(seq->cache, memory, bytes);
    if (stopped_at)
        *stopped_at = i;
    return KVT_OK;
}
