/*
 * Geometry of a layer group: where the parts of a head's record lie, and the rotation.
 */
#include "src/cache/cache.h"

size_t kvt_element_bytes(kvt_type type)
{
    return type == KVT_TYPE_F32 ? 4 : type == KVT_TYPE_F16 ? 2 : 1;
}

size_t kvt_rotation_block(size_t dims)
{
    return dims & (~dims + 1);
}

/*
 * A rotation mixes runs of dims. V has to consist of whole runs, since the sum of p * V is formed
 * in the rotated domain and rotated back.
 */
const char *kvt_v_in_k_fault(uint32_t flags, uint32_t k_dim, uint32_t v_dim, kvt_type k_type,
                             kvt_type v_type)
{
    if (!(flags & KVT_GROUP_V_IN_K))
        return NULL;
    if (v_dim > k_dim)
        return "v_dim is above k_dim";
    if (v_type != k_type)
        return "v_type is not k_type";
    if (k_type == KVT_TYPE_I8 && !(flags & KVT_GROUP_NO_ROTATION) &&
        v_dim % kvt_rotation_block(k_dim))
        return "v_dim is no multiple of the dims that are rotated together, the largest power of "
               "two dividing k_dim";
    return NULL;
}

/*
 * Sizes of a group's records. Dims and heads are bounded, so nothing overflows below a head's
 * record; layers are bounded too: 1024 * 1024 heads of about 1 MiB stay far below 2^63.
 */
static void make_layout(const kvt_group_config *config, int offsets, kvt_layout *layout)
{
    size_t at = 0, v_bytes;
    layout->k_dims = kvt_round_up(config->k_dim, 16);
    layout->v_dims = kvt_round_up(config->v_dim, 16);
    layout->k_code_bytes = layout->k_dims * KVT_TOKENS * kvt_element_bytes(config->k_type);
    v_bytes = layout->v_dims * KVT_TOKENS * kvt_element_bytes(config->v_type);
    layout->v_code_bytes = v_bytes;
    layout->k_scale_bytes = config->k_type == KVT_TYPE_I8 ? KVT_TOKENS * sizeof(uint16_t) : 0;
    layout->v_scale_bytes = config->v_type == KVT_TYPE_I8 ? KVT_TOKENS * sizeof(uint16_t) : 0;
    layout->k_offset_bytes = offsets ? kvt_round_up(layout->k_dims * sizeof(uint16_t), 64) : 0;

    layout->transposed_bytes = 0;
    if (config->flags & KVT_GROUP_V_IN_K) {
        layout->transposed_bytes = v_bytes;
        layout->v_code_bytes = layout->v_scale_bytes = 0;
    }
    layout->k_codes = at;
    layout->k_scales = at += layout->k_code_bytes;
    layout->k_offset = at += layout->k_scale_bytes;
    layout->v_scales = at += layout->k_offset_bytes;
    layout->v_codes = at += layout->v_scale_bytes;
    layout->head_bytes = at + layout->v_code_bytes;
    layout->layer_bytes = layout->head_bytes * config->n_kv_heads;
    layout->block_bytes = layout->layer_bytes * config->n_layers;
}

void kvt_group_make(const kvt_group_config *config, kvt_group *group)
{
    int log2_block = 0;

    group->config = *config;
    group->config.layers = NULL;
    group->rotates = config->k_type == KVT_TYPE_I8 && !(config->flags & KVT_GROUP_NO_ROTATION);
    group->offsets = config->k_type == KVT_TYPE_I8 && !(config->flags & KVT_GROUP_NO_OFFSET);
    group->v_in_k = (config->flags & KVT_GROUP_V_IN_K) != 0;
    make_layout(config, (int)group->offsets, &group->layout);

    group->rotation_block = kvt_rotation_block(config->k_dim);
    while ((size_t)2 << log2_block <= group->rotation_block)
        log2_block++;
    /* Powers of two, so that scaling is exact. K's is near 1 / sqrt(block). */
    group->rotation_scale_k = 1.0f / (float)(1u << log2_block / 2);
    group->rotation_scale_q = 1.0f / (float)(1u << (log2_block - log2_block / 2));
}

/* ---- the rotation's signs ---- */

size_t kvt_group_signs_bytes(const kvt_group *group)
{
    return group->rotates ? group->config.n_kv_heads * group->config.k_dim * sizeof(float) : 0;
}

/* splitmix64 (Steele, Lea and Flood 2014): the i-th output of a stream, by its counter. */
static uint64_t splitmix64(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Sign of dim d of kv head h: bit d % 64 of output (h * words + d / 64); 1 is minus. */
void kvt_group_fill_signs(const kvt_group *group)
{
    size_t dim = group->config.k_dim, words = (dim + 63) / 64;
    for (size_t h = 0; h < group->config.n_kv_heads; h++)
        for (size_t d = 0; d < dim; d++) {
            uint64_t bits = splitmix64(group->config.rotation_seed, h * words + d / 64);
            group->signs[h * dim + d] = bits >> d % 64 & 1 ? -1.0f : 1.0f;
        }
}
