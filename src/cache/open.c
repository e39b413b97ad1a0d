/*
 * Rows into open records: docs/numerics.md, "Open rows". And where a record lies in its block.
 */
#include <math.h>

#include "src/cache/cache.h"

kvt_record kvt_record_at(const kvt_group *group, uint32_t form, kvt_side side,
                         unsigned char *memory)
{
    const kvt_layout *layout = &group->layouts[form];
    kvt_record record = {memory + (side == KVT_SIDE_K ? layout->k_codes : layout->v_codes), NULL,
                         NULL, NULL};
    if (side == KVT_SIDE_K && layout->k_scale_bytes)
        record.scales = (uint16_t *)(void *)(memory + layout->k_scales);
    if (side == KVT_SIDE_V && layout->v_scale_bytes)
        record.scales = (uint16_t *)(void *)(memory + layout->v_scales);
    if (side == KVT_SIDE_K && layout->k_offset_bytes)
        record.offset = (uint16_t *)(void *)(memory + layout->k_offset);
    if (side == KVT_SIDE_K && layout->k_seed_bytes)
        record.seed = (uint16_t *)(void *)(memory + layout->k_seed);
    return record;
}

kvt_record kvt_record_of(const kvt_group *group, const kvt_block *block, kvt_side side,
                         size_t layer_index, size_t kv_head)
{
    return kvt_record_at(group, block->form, side,
                         kvt_head_record(group, block, layer_index, kv_head));
}

/*
 * Scale a row so that it fits f16: the scale is the least power of two, from 1 on, that leaves no
 * magnitude that rounds beyond 65504. 0: a magnitude is above `most` or not a number.
 */
static int scale_row(float *x, size_t dims, float most, uint16_t *scale)
{
    float largest = 0.0f, down = 1.0f, up = 1.0f;
    for (size_t d = 0; d < dims; d++) {
        float a = fabsf(x[d]);
        if (!(a <= most))
            return 0;
        largest = a > largest ? a : largest;
    }
    while (largest * down >= 65520.0f) {
        down *= 0.5f;
        up *= 2.0f;
    }
    for (size_t d = 0; d < dims; d++)
        x[d] *= down;
    *scale = (uint16_t)(kvt_f32_to_f16(up) | (*scale & KVT_F16_MINUS));
    return 1;
}

/* The offset's largest magnitude. f16 without its sign orders as integers do. */
static float largest_of(const uint16_t *offset, size_t dims)
{
    int16_t largest = 0;
    for (size_t d = 0; d < dims; d++) {
        int16_t a = (int16_t)(offset[d] & 0x7fff);
        largest = a > largest ? a : largest;
    }
    return kvt_f16_to_f32((uint16_t)largest);
}

/* Whether a magnitude is at least `bound`; as integers, which order alike. Mostly one is soon. */
static int reaches(const float *x, size_t dims, float bound)
{
    const int32_t below = (int32_t)kvt_f32_bits(bound) - 1;
    int32_t found = 0;
    size_t d = 0;
    for (; d + 16 <= dims && !found; d += 16)
        for (size_t i = 0; i < 16; i++)
            found |= (int32_t)(kvt_f32_bits(x[d + i]) & 0x7fffffffu) > below;
    for (; d < dims && !found; d++)
        found = (int32_t)(kvt_f32_bits(x[d]) & 0x7fffffffu) > below;
    return found;
}

/*
 * Whether a row is stored without the offset: its own magnitude is below an eighth of what the
 * offset would leave of it. (In block 0 the offset is the first key, which may be an outlier.)
 */
static int is_alone(const float *y, const uint16_t *offset, size_t dims)
{
    float with = 0.0f, without = 0.0f;
    for (size_t d = 0; d < dims; d++) {
        float a = fabsf(y[d]), b = fabsf(y[d] - kvt_f16_to_f32(offset[d]));
        without = a > without ? a : without;
        with = b > with ? b : with;
    }
    return 8.0f * without < with;
}

static void center_rows(const kvt_kernels *kernels, float *x, size_t n, size_t dims,
                        const uint16_t *offset, const uint16_t *scales)
{
    float from[KVT_MAX_DIM];
    (void)kernels->load_f16(offset, from, dims);
    for (size_t i = 0; i < n; i++)
        if (!(scales[i] & KVT_F16_MINUS))
            kernels->center(x + i * dims, from, dims, x + i * dims);
}

/*
 * Rows of K into a record that has an offset. A row that is stored without it has no magnitude
 * above a seventh of the offset's largest, since |y - a| <= |y| + |a|; so few are looked at in
 * full. (A bound of some ulps more allows for the roundings.) centered: the rows are, on return.
 */
static int put_less(const kvt_kernels *kernels, float *x, size_t n, size_t dims, size_t dims_p,
                    const kvt_record *to, size_t slot, int *centered)
{
    float bound = largest_of(to->offset, dims) / 7.0f * 1.000001f;
    uint16_t *scales = to->scales + slot;
    *centered = 0;
    for (size_t i = 0; i < n; i++)
        if (!reaches(x + i * dims, dims, bound) && is_alone(x + i * dims, to->offset, dims)) {
            scales[i] |= KVT_F16_MINUS;
            *centered = 1;
        }
    if (!*centered)
        return kernels->put_k_open(x, dims, n, dims, dims_p, to->offset, to->codes, slot);
    center_rows(kernels, x, n, dims, to->offset, scales);
    return kernels->put_k_f16(x, dims, n, dims, dims_p, to->codes, NULL, slot);
}

static int put_rows(const kvt_kernels *kernels, const kvt_group *group, kvt_side side, float most,
                    float *x, size_t n, size_t dims, const kvt_record *to, size_t slot)
{
    const kvt_layout *open = &group->layouts[KVT_OPEN];
    size_t dims_p = side == KVT_SIDE_K ? open->k_dims : open->v_dims;
    int centered = 1, stored;
    for (size_t i = 0; i < n; i++)
        to->scales[slot + i] = KVT_F16_ONE;
    if (to->seed && slot == 0)
        memset(to->seed, 0, 2 * dims_p * sizeof *to->seed);
    if (to->seed)
        memset(kvt_seed_gains(to->seed, dims_p) + slot, 0, n);
    if (to->offset)
        stored = put_less(kernels, x, n, dims, dims_p, to, slot, &centered);
    else
        stored = (side == KVT_SIDE_K ? kernels->put_k_f16 : kernels->put_v_f16)(
            x, dims, n, dims, dims_p, to->codes, NULL, slot);
    if (stored)
        return 1;
    if (!centered)
        center_rows(kernels, x, n, dims, to->offset, to->scales + slot);
    for (size_t i = 0; i < n; i++)
        if (!scale_row(x + i * dims, dims, most, &to->scales[slot + i]))
            return 0;
    return (side == KVT_SIDE_K ? kernels->put_k_f16 : kernels->put_v_f16)(x, dims, n, dims, dims_p,
                                                                          to->codes, NULL, slot);
}

int kvt_open_put(const kvt_kernels *kernels, const kvt_group *group, kvt_side side, float *x,
                 size_t n, size_t dims, const kvt_record *to, size_t slot)
{
    const kvt_type type = side == KVT_SIDE_K ? group->config.k_type : group->config.v_type;
    return put_rows(kernels, group, side, kvt_largest(side, type), x, n, dims, to, slot);
}

void kvt_open_put_back(const kvt_kernels *kernels, const kvt_group *group, float *x, size_t dims,
                       const kvt_record *to, size_t slot)
{
    int stored = put_rows(kernels, group, KVT_SIDE_K, KVT_I8_MAX, x, 1, dims, to, slot);
    assert(stored); /* 7.5 scales, a middle and a gain, an offset: below 12 * 65504 */
    (void)stored;
}
