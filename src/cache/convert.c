/*
 * A block of one group as a block of another group that has other types: docs/numerics.md,
 * "Conversion between types".
 *
 * A side is read back row by row, as kvt_read has it, and stored as an append stores such rows:
 * into an open record, and where the block is to be sealed, into a sealed one from there. What
 * comes of a block depends on that block alone, not on block 0 nor on the order: so blocks can be
 * converted one by one, and equal ones have equal conversions. A side whose bytes mean the same in
 * both groups is copied.
 */
#include <assert.h>

#include "src/cache/cache.h"
#include "src/fpenv.h"

typedef struct convert_job {
    const kvt_kernels *kernels;
    const kvt_group *from, *to;
    uint32_t form, to_form;
    size_t tokens;
    float *rows;     /* [64][dims]: a side's */
    kvt_record open; /* memory of an open record, for one that is sealed */
} convert_job;

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static kvt_type type_of(const kvt_group *group, kvt_side side)
{
    return side == KVT_SIDE_K ? group->config.k_type : group->config.v_type;
}

static size_t dims_of(const kvt_group *group, kvt_side side)
{
    return side == KVT_SIDE_K ? group->config.k_dim : group->config.v_dim;
}

static size_t padded_dims_of(const kvt_group *group, kvt_side side)
{
    const kvt_layout *layout = &group->layouts[KVT_SEALED];
    return side == KVT_SIDE_K ? layout->k_dims : layout->v_dims;
}

static const kvt_rotation *rotation_of(const kvt_group *group, kvt_side side)
{
    return side == KVT_SIDE_K ? &group->rotation_k : &group->rotation_v;
}

/* ---- forms ---- */

uint32_t kvt_convert_form(const kvt_group *from, uint32_t form, const kvt_group *to, size_t row,
                          uint32_t tokens)
{
    if (from->config.k_type == to->config.k_type && from->config.v_type == to->config.v_type)
        return form;
    if (!to->seals)
        return KVT_SEALED;
    if (kvt_is_open(form)) /* with a seed where K stays as it is */
        return form == KVT_REOPENED && to->reopens ? KVT_REOPENED : KVT_OPEN;
    /* Also of a sealed block that a truncate has cut. It is the last one. */
    return tokens < KVT_TOKENS ? KVT_OPEN : kvt_sealed_form(to, row);
}

/* ---- scratch memory ---- */

/* Floats of rows, and the elements of an open record's codes and offset. */
static void scratch_sizes(const kvt_group *group, size_t *rows, size_t *codes, size_t *offset)
{
    const size_t dims_p =
        larger(padded_dims_of(group, KVT_SIDE_K), padded_dims_of(group, KVT_SIDE_V));
    *rows = *codes = dims_p * KVT_TOKENS;
    *offset = kvt_round_up(dims_p, 32);
}

size_t kvt_convert_bytes(const kvt_group *from, const kvt_group *to)
{
    size_t rows, codes, offset;
    (void)from; /* has the same dims */
    scratch_sizes(to, &rows, &codes, &offset);
    return 64 + rows * sizeof(float) + (codes + offset + KVT_TOKENS) * sizeof(uint16_t);
}

static void use_scratch(convert_job *job, void *scratch)
{
    unsigned char *at = (unsigned char *)scratch + (64 - (uintptr_t)scratch % 64) % 64;
    size_t rows, codes, offset;
    scratch_sizes(job->to, &rows, &codes, &offset);
    job->rows = (float *)(void *)at;
    job->open.codes = at += rows * sizeof(float);
    job->open.scales = (uint16_t *)(void *)(at += codes * sizeof(uint16_t));
    job->open.offset = (uint16_t *)(void *)(at + KVT_TOKENS * sizeof(uint16_t));
    job->open.seed = NULL;
}

/* ---- what is not there ---- */

/* Zeros in place of a token's codes of dims from `first` on. */
static void clear_codes(kvt_side side, kvt_type type, size_t t, size_t first, size_t dims_p,
                        void *codes)
{
    const int is_k = side == KVT_SIDE_K;
    uint8_t *bytes = codes;
    for (size_t d = first; d < dims_p; d++) {
        const size_t wide = is_k ? kvt_kw_index(t, d, dims_p) : kvt_vw_index(t, d, dims_p);
        switch (type) {
        case KVT_TYPE_F32: memset(bytes + 4 * wide, 0, 4); break;
        case KVT_TYPE_F16: memset(bytes + 2 * wide, 0, 2); break;
        case KVT_TYPE_I8:
            bytes[is_k ? kvt_k8_index(t, d, dims_p) : kvt_v8_index(t, d, dims_p)] = 0;
            break;
        default:
            if (is_k)
                kvt_put_bits(bytes + kvt_k4_index(t, d, dims_p), kvt_k4_shift(d), 15, 0);
            else
                kvt_put_bits(bytes + kvt_v4_index(t, d, dims_p), kvt_v4_shift(t), 15, 0);
            if (type == KVT_TYPE_I5)
                kvt_put_bits(bytes + kvt_v5_index(t, d, dims_p), kvt_v5_shift(t, d), 1, 0);
        }
    }
}

/* Sealing leaves codes in the padding of dims, of which those of 4 and 5 bits are not zero. */
static void clear_padding(const convert_job *job, kvt_side side, const kvt_record *to)
{
    const kvt_layout *layout = &job->to->layouts[job->to_form];
    const kvt_type type = side == KVT_SIDE_K ? layout->k_type : layout->v_type;
    const size_t dims = dims_of(job->to, side), dims_p = padded_dims_of(job->to, side);
    for (size_t t = 0; kvt_is_coarse(type) && dims < dims_p && t < KVT_TOKENS; t++)
        clear_codes(side, type, t, dims, dims_p, to->codes);
}

/* ---- sides that are copied ---- */

/* Whether rows of both groups are in the same stored domain: the seeds are the same. */
static int same_domain(const kvt_group *from, const kvt_group *to, kvt_side side)
{
    return rotation_of(from, side)->block == rotation_of(to, side)->block;
}

static int is_copied(const convert_job *job, kvt_side side)
{
    const kvt_type from = type_of(job->from, side), to = type_of(job->to, side);
    if (kvt_type_in(from, job->form) != kvt_type_in(to, job->to_form) ||
        kvt_is_sealed_type(from) != kvt_is_sealed_type(to))
        return 0;
    if (!kvt_is_sealed_type(from))
        return 1;
    if (!same_domain(job->from, job->to, side) ||
        (side == KVT_SIDE_K && job->from->offsets != job->to->offsets))
        return 0;
    /* Open rows may be larger than another type takes, and have been codes before. */
    return !kvt_is_open(job->form) || (from == to && job->form == job->to_form);
}

static void copy_side(const convert_job *job, kvt_side side, const kvt_record *from,
                      const kvt_record *to)
{
    const kvt_layout *layout = &job->to->layouts[job->to_form];
    const int is_k = side == KVT_SIDE_K;
    const kvt_type type = is_k ? layout->k_type : layout->v_type;
    const size_t dims_p = is_k ? layout->k_dims : layout->v_dims;

    memcpy(to->codes, from->codes, is_k ? layout->k_code_bytes : layout->v_code_bytes);
    if (to->scales)
        memcpy(to->scales, from->scales, is_k ? layout->k_scale_bytes : layout->v_scale_bytes);
    if (to->offset)
        memcpy(to->offset, from->offset, layout->k_offset_bytes);
    if (to->seed)
        memcpy(to->seed, from->seed, layout->k_seed_bytes);
    for (size_t t = job->tokens; t < KVT_TOKENS; t++) {
        clear_codes(side, type, t, 0, dims_p, to->codes);
        if (is_k && type == KVT_TYPE_I4)
            kvt_record_gains(to, dims_p)[t] = 0;
        else if (to->scales)
            to->scales[t] = 0;
        if (to->seed)
            kvt_seed_gains(to->seed, dims_p)[t] = 0;
    }
}

/* ---- sides that are stored anew ---- */

typedef int put_function(const float *x, size_t ldx, size_t n, size_t dims, size_t dims_p,
                         void *codes, uint16_t *scales, size_t slot);

/* f32 and f16. 0: a value is beyond f16. */
static int put_plain(const convert_job *job, kvt_side side, const kvt_record *to)
{
    const kvt_kernels *k = job->kernels;
    const int is_f32 = type_of(job->to, side) == KVT_TYPE_F32;
    const size_t dims = dims_of(job->to, side), dims_p = padded_dims_of(job->to, side);
    put_function *put = side == KVT_SIDE_K ? (is_f32 ? k->put_k_f32 : k->put_k_f16)
                                           : (is_f32 ? k->put_v_f32 : k->put_v_f16);
    for (size_t t = 0; t < job->tokens; t += KVT_TILE_TOKENS) {
        size_t n = job->tokens - t < KVT_TILE_TOKENS ? job->tokens - t : KVT_TILE_TOKENS;
        if (!put(job->rows + t * dims, dims, n, dims, dims_p, to->codes, NULL, t))
            return 0;
    }
    return 1;
}

/*
 * The offset of the open record: any is valid, and one near the middle of the keys leaves f16 the
 * most. What the keys had in the other group; else their mean.
 */
static void choose_offset(const convert_job *job, size_t head, const kvt_record *from,
                          uint16_t *offset)
{
    const kvt_kernels *k = job->kernels;
    const kvt_rotation *a = &job->from->rotation_k, *b = &job->to->rotation_k;
    const size_t dims = job->to->config.k_dim;
    float x[KVT_MAX_DIM];

    if (from->offset && same_domain(job->from, job->to, KVT_SIDE_K)) {
        memcpy(offset, from->offset, dims * sizeof *offset);
        return;
    }
    if (from->offset) {
        (void)k->load_f16(from->offset, x, dims);
        if (a->block)
            k->unrotate(x, a->signs + head * a->stride, dims, a->block, a->inverse);
        if (b->block)
            k->rotate(x, b->signs + head * b->stride, dims, b->block, b->scale, x);
    } else {
        memset(x, 0, dims * sizeof *x);
        for (size_t t = 0; t < job->tokens; t++)
            for (size_t d = 0; d < dims; d++)
                x[d] += job->rows[t * dims + d];
        for (size_t d = 0; d < dims; d++)
            x[d] /= (float)job->tokens;
    }
    k->store_f16(x, offset, dims); /* saturates at +-65504 */
}

/* i8, i4 and i5. 0: a value is beyond what the type takes. */
static int put_sealed(const convert_job *job, kvt_side side, size_t head, const kvt_record *from,
                      const kvt_record *to)
{
    const kvt_kernels *k = job->kernels;
    const kvt_rotation *rotation = rotation_of(job->to, side);
    const size_t dims = dims_of(job->to, side), dims_p = padded_dims_of(job->to, side);
    kvt_record open = *to;

    if (!kvt_is_open(job->to_form)) {
        assert(job->tokens == KVT_TOKENS);
        open = job->open;
        if (!to->offset)
            open.offset = NULL;
        if (dims != dims_p) {
            memset(open.codes, 0, dims_p * KVT_TOKENS * sizeof(uint16_t));
            if (open.offset)
                memset(open.offset, 0, dims_p * sizeof *open.offset);
        }
    }
    for (size_t t = 0; rotation->block && t < job->tokens; t++) {
        float *row = job->rows + t * dims;
        k->rotate(row, rotation->signs + head * rotation->stride, dims, rotation->block,
                  rotation->scale, row);
    }
    if (open.offset)
        choose_offset(job, head, from, open.offset);
    for (size_t t = 0; t < job->tokens; t += KVT_TILE_TOKENS) {
        size_t n = job->tokens - t < KVT_TILE_TOKENS ? job->tokens - t : KVT_TILE_TOKENS;
        if (!kvt_open_put(k, job->to, side, job->rows + t * dims, n, dims, &open, t))
            return 0;
    }
    if (!kvt_is_open(job->to_form))
        kvt_seal(k, job->to, side, job->to_form, &open, NULL, to);
    return 1;
}

static int convert_side(const convert_job *job, kvt_side side, size_t head,
                        const unsigned char *from, unsigned char *to)
{
    /* kvt_record has pointers that may be written through: these are not. */
    const kvt_record a =
        kvt_record_at(job->from, job->form, side, (unsigned char *)(uintptr_t)from);
    const kvt_record b = kvt_record_at(job->to, job->to_form, side, to);
    const size_t dims = dims_of(job->from, side);

    int stored = 1;

    if (is_copied(job, side)) {
        copy_side(job, side, &a, &b);
    } else {
        for (size_t t = 0; t < job->tokens; t++)
            kvt_record_read(job->kernels, job->from, job->form, side, head, &a, t,
                            job->rows + t * dims);
        stored = kvt_is_sealed_type(type_of(job->to, side)) ? put_sealed(job, side, head, &a, &b)
                                                            : put_plain(job, side, &b);
    }
    clear_padding(job, side, &b);
    return stored;
}

kvt_status kvt_convert_layer(const kvt_kernels *kernels, const kvt_group *from_group, uint32_t form,
                             const unsigned char *from, uint32_t tokens, const kvt_group *to_group,
                             uint32_t to_form, unsigned char *to, void *scratch)
{
    const kvt_layout *layout = &from_group->layouts[form], *to_layout = &to_group->layouts[to_form];
    convert_job job = {kernels, from_group, to_group, form, to_form, tokens, NULL, {0}};
    kvt_fpenv saved;
    int stored = 1;

    assert(tokens >= 1 && tokens <= KVT_TOKENS && from_group->v_in_k == to_group->v_in_k &&
           from_group->config.rotation_seed == to_group->config.rotation_seed);
    use_scratch(&job, scratch);
    memset(to, 0, to_layout->layer_bytes);
    saved = kvt_fpenv_enter();
    for (size_t head = 0; stored && head < from_group->config.n_kv_heads; head++) {
        const unsigned char *a = from + head * layout->head_bytes;
        unsigned char *b = to + head * to_layout->head_bytes;
        stored = convert_side(&job, KVT_SIDE_K, head, a, b) &&
                 (from_group->v_in_k || convert_side(&job, KVT_SIDE_V, head, a, b));
    }
    kvt_fpenv_leave(saved);
    return stored ? KVT_OK : KVT_ERR_VALUE;
}
