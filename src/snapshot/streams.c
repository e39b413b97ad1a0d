/*
 * One layer of a block and its native streams: what is saved of the memory that tile.h describes.
 *
 * A native stream is the layout in memory without what is dead: dims are the model's, not the
 * padded ones; only tiles (K), groups of four tokens (V as i8) or tokens (V else, scales) that
 * hold a live token; and inside the last of them, zero where there is no token. In each layout the
 * dims of a tile or token come first and the padding last, so dropping it is a shorter copy.
 */
#include "src/snapshot/format.h"

/* How a side of a given type is stored in a form. */
static kvt_type stored_type(kvt_type type, uint32_t form)
{
    return form == KVT_OPEN && type == KVT_TYPE_I8 ? KVT_TYPE_F16 : type;
}

int kvt_snap_seals(const kvt_snapshot_group *group)
{
    return group->k_type == KVT_TYPE_I8 || group->v_type == KVT_TYPE_I8;
}

static int has_offset(const kvt_snapshot_group *group)
{
    return group->k_type == KVT_TYPE_I8 && !(group->flags & KVT_GROUP_NO_OFFSET);
}

static int has_v(const kvt_snapshot_group *group)
{
    return !(group->flags & KVT_GROUP_V_IN_K);
}

uint32_t kvt_snap_shapes(const kvt_snapshot_group *group, uint32_t form, uint32_t tokens,
                         kvt_snap_shape *shapes, size_t *bytes)
{
    kvt_type k_type = stored_type(group->k_type, form), v_type = stored_type(group->v_type, form);
    size_t heads = group->n_kv_heads;
    size_t k_tokens = kvt_round_up(tokens, KVT_TILE_TOKENS);
    size_t v_tokens = v_type == KVT_TYPE_I8 ? kvt_round_up(tokens, 4) : tokens;
    uint32_t n_scales = ((group->k_type == KVT_TYPE_I8 ? 1u : 0u) +
                         (group->v_type == KVT_TYPE_I8 && has_v(group) ? 1u : 0u)) *
                        group->n_kv_heads * tokens;
    size_t n_small = n_scales + (has_offset(group) ? heads * group->k_dim : 0);
    uint32_t n = 1;

    memset(shapes, 0, KVT_SNAP_MAX_STREAMS * sizeof *shapes);
    shapes[0].kind = KVT_SNAP_KIND_K;
    shapes[0].element = (uint32_t)kvt_element_bytes(k_type);
    shapes[0].heads = group->n_kv_heads;
    shapes[0].dims = group->k_dim;
    shapes[0].tokens = tokens;
    shapes[0].bytes = heads * k_tokens * group->k_dim * shapes[0].element;
    *bytes = shapes[0].bytes + n_small * 2;
    if (has_v(group)) {
        kvt_snap_shape *v = &shapes[n++];
        *v = shapes[0];
        v->kind = KVT_SNAP_KIND_V;
        v->element = (uint32_t)kvt_element_bytes(v_type);
        v->dims = group->v_dim;
        v->bytes = heads * v_tokens * group->v_dim * v->element;
        *bytes += v->bytes;
    }
    if (n_small) {
        kvt_snap_shape *small = &shapes[n++];
        small->kind = KVT_SNAP_KIND_SCALES;
        small->element = 2;
        small->plain = n_scales;
        small->powers = form == KVT_OPEN;
        if (form == KVT_OPEN && has_offset(group))
            small->signs = group->n_kv_heads * tokens;
        small->bytes = n_small * 2;
    }
    return n;
}

size_t kvt_snap_layer_bytes(const kvt_snap_header *header)
{
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    size_t bytes, most = 0;
    uint32_t g, form;

    for (g = 0; g < header->n_groups; g++)
        for (form = KVT_SEALED;
             form <= (kvt_snap_seals(&header->groups[g]) ? KVT_OPEN : KVT_SEALED); form++) {
            (void)kvt_snap_shapes(&header->groups[g], form, KVT_TOKENS, shapes, &bytes);
            if (bytes > most)
                most = bytes;
        }
    return most;
}

/* ---- gather ---- */

/* Zero the lanes of tokens from `live` on in one tile of K: rows of `row` bytes a token. */
static void clear_lanes(unsigned char *tile, size_t tile_bytes, size_t live, size_t row)
{
    size_t i, lane = KVT_TILE_TOKENS * row;
    for (i = 0; i < tile_bytes; i += lane)
        memset(tile + i + live * row, 0, lane - live * row);
}

static unsigned char *gather_k(const kvt_group *group, const kvt_layout *layout,
                               const unsigned char *codes, size_t tokens, unsigned char *to)
{
    size_t element = kvt_element_bytes(layout->k_type);
    size_t live = group->config.k_dim * element * KVT_TILE_TOKENS;
    size_t step = layout->k_dims * element * KVT_TILE_TOKENS;
    size_t tiles = (tokens + KVT_TILE_TOKENS - 1) / KVT_TILE_TOKENS, i;

    if (live == step)
        memcpy(to, codes, tiles * live);
    else
        for (i = 0; i < tiles; i++)
            memcpy(to + i * live, codes + i * step, live);
    to += tiles * live;
    if (tokens % KVT_TILE_TOKENS) /* i8: 4 dims of a token lie together */
        clear_lanes(to - live, live, tokens % KVT_TILE_TOKENS,
                    layout->k_type == KVT_TYPE_I8 ? 4 : element);
    return to;
}

static unsigned char *gather_v(const kvt_group *group, const kvt_layout *layout,
                               const unsigned char *codes, size_t tokens, unsigned char *to)
{
    size_t is_i8 = layout->v_type == KVT_TYPE_I8;
    size_t row = is_i8 ? 4 : kvt_element_bytes(layout->v_type);
    size_t live = group->config.v_dim * row, step = layout->v_dims * row;
    size_t n = is_i8 ? (tokens + 3) / 4 : tokens, i;

    if (live == step)
        memcpy(to, codes, n * live);
    else
        for (i = 0; i < n; i++)
            memcpy(to + i * live, codes + i * step, live);
    to += n * live;
    if (is_i8 && tokens % 4) {
        uint32_t mask = ((uint32_t)1 << 8 * (tokens % 4)) - 1, word;
        unsigned char *p;
        for (p = to - live; p < to; p += 4) {
            memcpy(&word, p, 4);
            word &= mask;
            memcpy(p, &word, 4);
        }
    }
    return to;
}

void kvt_snap_gather(const kvt_group *group, const kvt_block *block, size_t layer_index,
                     uint32_t tokens, unsigned char *streams)
{
    const kvt_layout *layout = kvt_block_layout(group, block);
    size_t heads = group->config.n_kv_heads, h;
    unsigned char *to = streams;

    for (h = 0; h < heads; h++)
        to = gather_k(group, layout,
                      kvt_head_record(group, block, layer_index, h) + layout->k_codes, tokens, to);
    for (h = 0; h < heads && !group->v_in_k; h++)
        to = gather_v(group, layout,
                      kvt_head_record(group, block, layer_index, h) + layout->v_codes, tokens, to);
    if (layout->k_scale_bytes)
        for (h = 0; h < heads; h++, to += tokens * (size_t)2)
            memcpy(to, kvt_head_record(group, block, layer_index, h) + layout->k_scales,
                   tokens * (size_t)2);
    if (layout->v_scale_bytes)
        for (h = 0; h < heads; h++, to += tokens * (size_t)2)
            memcpy(to, kvt_head_record(group, block, layer_index, h) + layout->v_scales,
                   tokens * (size_t)2);
    if (group->offsets)
        for (h = 0; h < heads; h++, to += group->config.k_dim * (size_t)2)
            memcpy(to, kvt_head_record(group, block, layer_index, h) + layout->k_offset,
                   group->config.k_dim * (size_t)2);
}

/* ---- scatter ---- */

static const unsigned char *scatter_rows(unsigned char *codes, size_t n, size_t live, size_t step,
                                         const unsigned char *from)
{
    size_t i;

    if (live == step)
        memcpy(codes, from, n * live);
    else
        for (i = 0; i < n; i++)
            memcpy(codes + i * step, from + i * live, live);
    return from + n * live;
}

void kvt_snap_scatter(const kvt_group *group, kvt_block *block, size_t layer_index, uint32_t tokens,
                      const unsigned char *streams)
{
    const kvt_layout *layout = kvt_block_layout(group, block);
    size_t heads = group->config.n_kv_heads, h;
    size_t k_row = kvt_element_bytes(layout->k_type) * KVT_TILE_TOKENS;
    size_t v_row = layout->v_type == KVT_TYPE_I8 ? 4 : kvt_element_bytes(layout->v_type);
    size_t tiles = (tokens + (size_t)KVT_TILE_TOKENS - 1) / KVT_TILE_TOKENS;
    size_t v_rows = layout->v_type == KVT_TYPE_I8 ? (tokens + (size_t)3) / 4 : tokens;
    const unsigned char *from = streams;

    for (h = 0; h < heads; h++)
        from = scatter_rows(kvt_head_record(group, block, layer_index, h) + layout->k_codes, tiles,
                            group->config.k_dim * k_row, layout->k_dims * k_row, from);
    for (h = 0; h < heads && !group->v_in_k; h++)
        from = scatter_rows(kvt_head_record(group, block, layer_index, h) + layout->v_codes, v_rows,
                            group->config.v_dim * v_row, layout->v_dims * v_row, from);
    if (layout->k_scale_bytes)
        for (h = 0; h < heads; h++, from += tokens * (size_t)2)
            memcpy(kvt_head_record(group, block, layer_index, h) + layout->k_scales, from,
                   tokens * (size_t)2);
    if (layout->v_scale_bytes)
        for (h = 0; h < heads; h++, from += tokens * (size_t)2)
            memcpy(kvt_head_record(group, block, layer_index, h) + layout->v_scales, from,
                   tokens * (size_t)2);
    if (group->offsets)
        for (h = 0; h < heads; h++, from += group->config.k_dim * (size_t)2)
            memcpy(kvt_head_record(group, block, layer_index, h) + layout->k_offset, from,
                   group->config.k_dim * (size_t)2);
}

/* ---- check: eight bytes at a time ---- */

#define LANES8(x) ((uint64_t)(x)*0x0101010101010101u)
#define LANES16(x) ((uint64_t)(x)*0x0001000100010001u)
#define LANES32(x) ((uint64_t)(x)*0x0000000100000001u)

/* Non-zero when a byte is 0x80. Exact: an addition that carries out of a lane marks its own. */
static uint64_t has_minus_128(uint64_t x)
{
    x ^= LANES8(0x80);
    return ~(((x & LANES8(0x7f)) + LANES8(0x7f)) | x) & LANES8(0x80);
}

/* Non-zero when an f16 is infinite or NaN: adding one to a full exponent carries. */
static uint64_t has_infinite16(uint64_t x)
{
    return ((x & LANES16(0x7c00)) + LANES16(0x0400)) & LANES16(0x8000);
}

static uint64_t has_infinite32(uint64_t x)
{
    return ((x & LANES32(0x7f800000)) + LANES32(0x00800000)) & LANES32(0x80000000);
}

static uint64_t has_negative16(uint64_t x)
{
    return x & LANES16(0x8000);
}

static uint64_t has_negative32(uint64_t x)
{
    return x & LANES32(0x80000000);
}

/*
 * A function that answers 1 when fault(eight bytes) is 0 all over; the last, shorter piece is
 * filled up with zeros. Made by a macro, since a pointer to fault would be called for each piece.
 */
#define ALL_SOUND(name, fault)                                                                     \
    static int name(const unsigned char *p, size_t bytes)                                          \
    {                                                                                              \
        uint64_t any = 0, x;                                                                       \
        size_t i;                                                                                  \
                                                                                                   \
        for (i = 0; i + 8 <= bytes; i += 8) {                                                      \
            memcpy(&x, p + i, 8);                                                                  \
            any |= fault(x);                                                                       \
        }                                                                                          \
        if (i < bytes) {                                                                           \
            x = 0;                                                                                 \
            memcpy(&x, p + i, bytes - i);                                                          \
            any |= fault(x);                                                                       \
        }                                                                                          \
        return any == 0;                                                                           \
    }

ALL_SOUND(none_minus_128, has_minus_128)
ALL_SOUND(all_finite16, has_infinite16)
ALL_SOUND(all_finite32, has_infinite32)
ALL_SOUND(none_negative16, has_negative16)
ALL_SOUND(none_negative32, has_negative32)

/* 1 when the magnitudes of all f16 are powers of two from 1 to 2^15: scales of an open block. */
static int all_powers16(const unsigned char *p, size_t bytes)
{
    uint32_t bad = 0;
    size_t i;

    for (i = 0; i < bytes; i += 2) {
        uint32_t x = p[i] | (uint32_t)p[i + 1] << 8;
        x &= 0x7fffu;
        bad |= (x & 0x3ffu) | (x - 0x3c00u > 15u * 0x400u);
    }
    return !bad;
}

/* 1 when every lane without a token is zero. */
static int dead_lanes_zero(const kvt_snap_shape *shape, const unsigned char *stream)
{
    size_t is_k = shape->kind == KVT_SNAP_KIND_K;
    size_t lanes = is_k ? KVT_TILE_TOKENS : 4; /* tokens that lie together */
    size_t live = shape->tokens % lanes;
    size_t lane = is_k && shape->element == 1 ? 4 : shape->element;
    size_t tokens = kvt_round_up(shape->tokens, lanes);
    size_t head = tokens * shape->dims * shape->element; /* bytes */
    size_t last = lanes * shape->dims * shape->element, h, i, j;
    unsigned char any = 0;

    if (!live || (!is_k && shape->element != 1))
        return 1;
    for (h = 0; h < shape->heads; h++) {
        const unsigned char *p = stream + (h + 1) * head - last;
        for (i = 0; i < last; i += lanes * lane)
            for (j = live * lane; j < lanes * lane; j++)
                any |= p[i + j];
    }
    return any == 0;
}

const char *kvt_snap_check(const kvt_snap_shape *shape, const unsigned char *stream)
{
    size_t bytes = shape->bytes;

    switch (shape->kind) {
    case KVT_SNAP_KIND_TOKEN_IDS: /* >= -1: x + 1 is not negative, except where it wraps */
    {
        size_t i;
        uint32_t any = 0;
        for (i = 0; i < bytes; i += 4) {
            uint32_t x = kvt_get32(stream + i);
            any |= x & (x + 1);
        }
        return any & 0x80000000u ? "a token id below -1" : NULL;
    }
    case KVT_SNAP_KIND_POSITIONS:
        return none_negative32(stream, bytes) ? NULL : "a negative position";
    case KVT_SNAP_KIND_SHIFTS: {
        size_t i;
        for (i = 0; i < bytes; i += 4)
            if (kvt_get32(stream + i) == 0x80000000u)
                return "a shift of -2^31";
        return NULL;
    }
    case KVT_SNAP_KIND_SCALES:
        if (!none_negative16(stream + shape->signs * (size_t)2,
                             (shape->plain - shape->signs) * (size_t)2))
            return "a negative scale";
        if (shape->powers && !all_powers16(stream, shape->plain * (size_t)2))
            return "an open block's scale that is no power of two from 1 to 32768";
        return all_finite16(stream, bytes) ? NULL : "a scale or offset that is not finite";
    default: break;
    }
    if (!dead_lanes_zero(shape, stream))
        return "a value where there is no token";
    if (shape->element == 1)
        return none_minus_128(stream, bytes) ? NULL : "a code of -128";
    return (shape->element == 2 ? all_finite16 : all_finite32)(stream, bytes)
               ? NULL
               : "a value that is not finite";
}
