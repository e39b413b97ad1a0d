/*
 * Rows into open records, and open records into sealed ones: docs/numerics.md, "Open blocks" and
 * "Sealing". What is sealed depends on the bytes of the open record alone, so that it is the same
 * whether the record is one of a block, or the temporary one of an append that seals at once.
 */
#include <math.h>

#include "src/cache/cache.h"

#define F16_ONE 0x3c00u

kvt_record kvt_record_of(const kvt_group *group, const kvt_block *block, kvt_side side,
                         size_t layer_index, size_t kv_head)
{
    const kvt_layout *layout = kvt_block_layout(group, block);
    unsigned char *memory = kvt_head_record(group, block, layer_index, kv_head);
    kvt_record record = {memory + (side == KVT_SIDE_K ? layout->k_codes : layout->v_codes), NULL,
                         NULL};
    if (side == KVT_SIDE_K && layout->k_scale_bytes)
        record.scales = (uint16_t *)(void *)(memory + layout->k_scales);
    if (side == KVT_SIDE_V && layout->v_scale_bytes)
        record.scales = (uint16_t *)(void *)(memory + layout->v_scales);
    if (side == KVT_SIDE_K && layout->k_offset_bytes)
        record.offset = (uint16_t *)(void *)(memory + layout->k_offset);
    return record;
}

/* ---- open rows ---- */

/*
 * Scale a row so that it fits f16: the scale is the least power of two, from 1 on, that leaves no
 * magnitude that rounds beyond 65504. 0: a magnitude is above KVT_I8_MAX or not a number.
 */
static int scale_row(float *x, size_t dims, uint16_t *scale)
{
    float largest = 0.0f, down = 1.0f, up = 1.0f;
    for (size_t d = 0; d < dims; d++) {
        float a = fabsf(x[d]);
        if (!(a <= KVT_I8_MAX))
            return 0;
        largest = a > largest ? a : largest;
    }
    while (largest * down >= 65520.0f) {
        down *= 0.5f;
        up *= 2.0f;
    }
    for (size_t d = 0; d < dims; d++)
        x[d] *= down;
    *scale = kvt_f32_to_f16(up);
    return 1;
}

int kvt_open_put(const kvt_kernels *kernels, const kvt_layout *open, kvt_side side, float *x,
                 size_t n, size_t dims, const kvt_record *to, size_t slot)
{
    size_t dims_p = side == KVT_SIDE_K ? open->k_dims : open->v_dims;
    for (size_t i = 0; i < n; i++)
        to->scales[slot + i] = F16_ONE;
    if ((side == KVT_SIDE_K ? kernels->put_k_f16 : kernels->put_v_f16)(x, dims, n, dims, dims_p,
                                                                       to->codes, NULL, slot))
        return 1;
    for (size_t i = 0; i < n; i++)
        if (!scale_row(x + i * dims, dims, &to->scales[slot + i]))
            return 0;
    return (side == KVT_SIDE_K ? kernels->put_k_f16 : kernels->put_v_f16)(x, dims, n, dims, dims_p,
                                                                          to->codes, NULL, slot);
}

/* ---- sealing ---- */

/* mean: of the open rows, which lack the open record's offset. */
static void store_offset(const kvt_kernels *kernels, size_t dims_p, const uint16_t *base,
                         float *mean, uint16_t *offset)
{
    for (size_t d = 0; d < dims_p; d++)
        mean[d] += kvt_f16_to_f32(base[d]);
    kernels->store_f16(mean, offset, dims_p); /* saturates at +-65504 */
}

void kvt_seal_offset(const kvt_kernels *kernels, const kvt_layout *open, const kvt_record *record,
                     uint16_t *offset)
{
    float mean[KVT_MAX_DIM];
    kernels->mean_k_f16(record->codes, record->scales, open->k_dims, mean);
    store_offset(kernels, open->k_dims, record->offset, mean, offset);
}

static void seal_k(const kvt_kernels *kernels, const kvt_group *group, const kvt_record *open,
                   const kvt_record *sealed)
{
    const kvt_layout *layout = &group->layouts[KVT_OPEN];
    float delta[KVT_MAX_DIM], base[KVT_MAX_DIM];

    if (group->offsets) { /* the rows are key - base, and become key - offset */
        kvt_seal_offset(kernels, layout, open, sealed->offset);
        (void)kernels->load_f16(open->offset, base, layout->k_dims);
        (void)kernels->load_f16(sealed->offset, delta, layout->k_dims);
        kernels->center(base, delta, layout->k_dims, delta);
    }
    kernels->seal_k_i8(open->codes, open->scales, group->offsets ? delta : NULL, layout->k_dims,
                       sealed->codes, sealed->scales);
}

void kvt_seal(const kvt_kernels *kernels, const kvt_group *group, kvt_side side,
              const kvt_record *open, const kvt_record *sealed)
{
    const kvt_layout *layout = &group->layouts[KVT_OPEN];
    kvt_type type = side == KVT_SIDE_K ? group->config.k_type : group->config.v_type;

    if (type != KVT_TYPE_I8) /* the other side is: this one is the same in both forms */
        memcpy(sealed->codes, open->codes,
               side == KVT_SIDE_K ? layout->k_code_bytes : layout->v_code_bytes);
    else if (side == KVT_SIDE_K)
        seal_k(kernels, group, open, sealed);
    else
        kernels->seal_v_i8(open->codes, open->scales, layout->v_dims, sealed->codes,
                           sealed->scales);
}
