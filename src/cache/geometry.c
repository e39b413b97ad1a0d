/*
 * Geometry of a layer group: where the parts of a head's record lie, and the rotation.
 */
#include "src/cache/cache.h"

size_t kvt_element_bytes(kvt_type type)
{
    return type == KVT_TYPE_F32 ? 4 : type == KVT_TYPE_F16 ? 2 : 1;
}

size_t kvt_type_bits(kvt_type type)
{
    return type == KVT_TYPE_I4 ? 4 : type == KVT_TYPE_I5 ? 5 : 8 * kvt_element_bytes(type);
}

size_t kvt_fine_rows(kvt_type k_type, kvt_type v_type, uint32_t fine_tokens)
{
    if (!kvt_is_coarse(k_type) && !kvt_is_coarse(v_type))
        return 0;
    return fine_tokens == 0               ? KVT_FINE_TOKENS / KVT_TOKENS
           : fine_tokens == KVT_FINE_NONE ? 0
                                          : (fine_tokens + KVT_TOKENS - 1) / KVT_TOKENS;
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
    if (kvt_is_coarse(k_type))
        return "K has 4 bits, with scales by dims: it cannot be V";
    if (k_type == KVT_TYPE_I8 && !(flags & KVT_GROUP_NO_ROTATION) &&
        v_dim % kvt_rotation_block(k_dim))
        return "v_dim is no multiple of the dims that are rotated together, the largest power of "
               "two dividing k_dim";
    return NULL;
}

/*
 * Sizes of a group's records in one form. Dims and heads are bounded, so nothing overflows below a
 * head's record; layers are bounded too: 1024 * 1024 heads of about 1 MiB stay far below 2^63.
 * Where pointers have 32 bits kvt_group_is_too_wide comes first.
 */
static void make_layout(const kvt_group_config *config, uint32_t form, int offsets,
                        kvt_layout *layout)
{
    size_t at = 0, v_bytes, by_dims;
    layout->k_type = kvt_type_in(config->k_type, form);
    layout->v_type = kvt_type_in(config->v_type, form);
    layout->k_dims = kvt_round_up(config->k_dim, 16);
    layout->v_dims = kvt_round_up(config->v_dim, 16);
    layout->k_code_bytes = layout->k_dims * KVT_TOKENS * kvt_type_bits(layout->k_type) / 8;
    v_bytes = layout->v_dims * KVT_TOKENS * kvt_type_bits(layout->v_type) / 8;
    layout->v_code_bytes = v_bytes;
    by_dims = kvt_round_up(layout->k_dims * sizeof(uint16_t), 64);
    layout->k_scale_bytes = layout->k_type == KVT_TYPE_I4        ? by_dims + KVT_TOKENS
                            : kvt_is_sealed_type(config->k_type) ? KVT_TOKENS * sizeof(uint16_t)
                                                                 : 0;
    layout->v_scale_bytes = kvt_is_sealed_type(config->v_type) ? KVT_TOKENS * sizeof(uint16_t) : 0;
    layout->k_offset_bytes = offsets ? by_dims : 0;
    layout->k_seed_bytes =
        form == KVT_REOPENED && config->k_type == KVT_TYPE_I4 ? 2 * by_dims + KVT_TOKENS : 0;

    layout->transposed_bytes = 0;
    if (config->flags & KVT_GROUP_V_IN_K) {
        layout->transposed_bytes = v_bytes;
        layout->v_code_bytes = layout->v_scale_bytes = 0;
    }
    layout->k_codes = at;
    layout->k_scales = at += layout->k_code_bytes;
    layout->k_offset = at += layout->k_scale_bytes;
    layout->k_seed = at += layout->k_offset_bytes;
    layout->v_scales = at += layout->k_seed_bytes;
    layout->v_codes = at += layout->v_scale_bytes;
    layout->head_bytes = at + layout->v_code_bytes;
    layout->layer_bytes = layout->head_bytes * config->n_kv_heads;
    layout->block_bytes = layout->layer_bytes * config->n_layers;
}

int kvt_group_is_too_wide(const kvt_group_config *config)
{
    kvt_group_config one = *config;
    kvt_layout layout;
    one.n_kv_heads = one.n_layers = 1;
    for (uint32_t form = 0; form < KVT_FORMS; form++) {
        /* whether there are offsets is a matter of a few bytes a dim: as if there were */
        make_layout(&one, form, 1, &layout);
        if ((uint64_t)layout.block_bytes * config->n_kv_heads * config->n_layers > SIZE_MAX / 4)
            return 1;
    }
    return 0;
}

/* The scales are powers of two, so that scaling is exact; that of K and V is near 1 / sqrt(block).
 */
static kvt_rotation make_rotation(size_t dims, size_t stride)
{
    kvt_rotation rotation = {NULL, stride, kvt_rotation_block(dims), 0.0f, 0.0f};
    int log2_block = 0;
    while ((size_t)2 << log2_block <= rotation.block)
        log2_block++;
    rotation.scale = 1.0f / (float)(1u << log2_block / 2);
    rotation.inverse = 1.0f / (float)(1u << (log2_block - log2_block / 2));
    return rotation;
}

void kvt_group_make(const kvt_group_config *config, kvt_group *group)
{
    memset(group, 0, sizeof *group);
    group->config = *config;
    group->config.layers = NULL;
    group->config.rope_inverse_frequencies = NULL;
    group->seals = kvt_is_sealed_type(config->k_type) || kvt_is_sealed_type(config->v_type);
    group->offsets = kvt_is_sealed_type(config->k_type) && !(config->flags & KVT_GROUP_NO_OFFSET);
    group->reopens = config->k_type == KVT_TYPE_I4;
    group->fine_rows = kvt_fine_rows(config->k_type, config->v_type, config->fine_tokens);
    group->v_in_k = (config->flags & KVT_GROUP_V_IN_K) != 0;
    group->residual_tokens = config->residual_tokens == 0 ? KVT_RESIDUAL_TOKENS
                             : config->residual_tokens == KVT_RESIDUAL_NONE
                                 ? 0
                                 : config->residual_tokens;
    group->window_tokens = config->window_tokens ? config->window_tokens : UINT64_MAX;
    group->sink_tokens = config->sink_tokens;
    for (uint32_t form = 0; form < KVT_FORMS; form++)
        make_layout(config, form, (int)group->offsets, &group->layouts[form]);
    if (config->k_type == KVT_TYPE_I8 && !(config->flags & KVT_GROUP_NO_ROTATION))
        group->rotation_k = make_rotation(config->k_dim, config->k_dim);
    if (group->v_in_k)
        group->rotation_v = group->rotation_k;
    else if (kvt_is_sealed_type(config->v_type) && !(config->flags & KVT_GROUP_NO_V_ROTATION))
        group->rotation_v = make_rotation(config->v_dim, config->v_dim);
}

size_t kvt_group_rope_bytes(const kvt_group *group)
{
    return group->config.rope_dims / 2 * sizeof(float);
}

/* ---- the rotations' signs ---- */

/* Floats of signs of K and of V. */
static size_t signs_of_k(const kvt_group *group)
{
    return group->rotation_k.block ? group->config.n_kv_heads * (size_t)group->config.k_dim : 0;
}

static size_t signs_of_v(const kvt_group *group)
{
    return group->rotation_v.block && !group->v_in_k
               ? group->config.n_kv_heads * (size_t)group->config.v_dim
               : 0;
}

size_t kvt_group_signs_bytes(const kvt_group *group)
{
    return (signs_of_k(group) + signs_of_v(group)) * sizeof(float);
}

/* splitmix64 (Steele, Lea and Flood 2014): the i-th output of a stream, by its counter. */
static uint64_t splitmix64(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Sign of dim d of kv head h: bit d % 64 of output (first + h * words + d / 64); 1 is minus. */
static void fill_signs(uint64_t seed, uint64_t first, size_t heads, size_t dims, float *signs)
{
    size_t words = (dims + 63) / 64;
    for (size_t h = 0; h < heads; h++)
        for (size_t d = 0; d < dims; d++) {
            uint64_t bits = splitmix64(seed, first + h * words + d / 64);
            signs[h * dims + d] = bits >> d % 64 & 1 ? -1.0f : 1.0f;
        }
}

/* V's signs are outputs of the same stream from here on. */
#define V_SIGNS ((uint64_t)1 << 32)

void kvt_group_fill_signs(kvt_group *group, float *signs)
{
    const kvt_group_config *config = &group->config;
    if (signs_of_k(group)) {
        group->rotation_k.signs = signs;
        fill_signs(config->rotation_seed, 0, config->n_kv_heads, config->k_dim, signs);
    }
    if (signs_of_v(group)) {
        group->rotation_v.signs = signs + signs_of_k(group);
        fill_signs(config->rotation_seed, V_SIGNS, config->n_kv_heads, config->v_dim,
                   group->rotation_v.signs);
    }
    if (group->v_in_k)
        group->rotation_v.signs = group->rotation_k.signs;
}
