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
    uint64_t visible, released, sinks;
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
    released = seq->groups[r->group_index].first * (uint64_t)KVT_TOKENS;
    sinks = kvt_sink_rows(r->group) * (uint64_t)KVT_TOKENS;
    if (n && first < released && first + n > sinks)
        return kvt_fail(cache, KVT_ERR_STATE,
                        "%s: the window of layer %u has released tokens %llu to %llu", call, layer,
                        (unsigned long long)sinks, (unsigned long long)released - 1);
    return kvt_seq_verify_some(seq, layer, (size_t)(first / KVT_TOKENS), kvt_rows(first + n));
}

typedef void get_function(const void *codes, const uint16_t *scales, size_t slot, size_t dims,
                          size_t dims_p, float *x);

static get_function *get_of(const kvt_kernels *k, kvt_side side, kvt_type type)
{
    const int is_k = side == KVT_SIDE_K;
    switch (type) {
    case KVT_TYPE_F32: return is_k ? k->get_k_f32 : k->get_v_f32;
    case KVT_TYPE_F16: return is_k ? k->get_k_f16 : k->get_v_f16;
    case KVT_TYPE_I4: return k->get_v_i4; /* K: kvt_k4_get */
    case KVT_TYPE_I5: return k->get_v_i5;
    default: return is_k ? k->get_k_i8 : k->get_v_i8;
    }
}

void kvt_record_read(const kvt_kernels *k, const kvt_group *group, uint32_t form, kvt_side side,
                     size_t head, const kvt_record *record, size_t slot, float *x)
{
    const kvt_layout *layout = &group->layouts[form];
    const uint16_t *offset = record->offset;
    int is_k = side == KVT_SIDE_K;
    kvt_type type = is_k ? layout->k_type : layout->v_type;
    const kvt_rotation *rotation = is_k ? &group->rotation_k : &group->rotation_v;
    size_t dims = is_k ? group->config.k_dim : group->config.v_dim;

    if (is_k && type == KVT_TYPE_I4) {
        kvt_k4_get(k, record, slot, dims, layout->k_dims, x);
        return;
    }
    get_of(k, side, type)(record->codes, record->scales, slot, dims,
                          is_k ? layout->k_dims : layout->v_dims, x);
    if (record->scales && type == KVT_TYPE_F16) { /* an open row's */
        float scale = kvt_f16_to_f32(record->scales[slot] & 0x7fffu);
        if (record->scales[slot] >> 15) /* which says that a row of K has no offset; V has none */
            offset = NULL;
        for (size_t d = 0; d < dims; d++) /* of V, once 4-bit codes, it may be 0 */
            x[d] *= scale;
    }
    if (offset) {
        float base[KVT_MAX_DIM];
        (void)k->load_f16(offset, base, dims);
        for (size_t d = 0; d < dims; d++)
            x[d] += base[d];
    }
    if (rotation->block)
        k->unrotate(x, rotation->signs + head * rotation->stride, dims, rotation->block,
                    rotation->inverse);
}

static void read_side(const reader *r, kvt_side side, uint64_t token, size_t head, float *x)
{
    const kvt_block *block = kvt_seq_block(r->seq, (size_t)(token / KVT_TOKENS), r->group_index);
    const kvt_record record = kvt_record_of(r->group, block, side, r->layer_index, head);
    kvt_record_read(r->kernels, r->group, block->form, side, head, &record,
                    (size_t)(token % KVT_TOKENS), x);
}

static void read_k(const reader *r, uint64_t token, size_t head, float *x)
{
    read_side(r, KVT_SIDE_K, token, head, x);
}

static void read_v(const reader *r, uint64_t token, size_t head, float *x)
{
    if (r->group->v_in_k) { /* as kvt_read has K: the bits are to be the same */
        float row[KVT_MAX_DIM];
        read_k(r, token, head, row);
        memcpy(x, row, r->group->config.v_dim * sizeof *x);
        return;
    }
    read_side(r, KVT_SIDE_V, token, head, x);
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
