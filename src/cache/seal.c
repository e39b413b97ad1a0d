/*
 * Open records into sealed ones: docs/numerics.md, "Sealing". What is sealed depends on the bytes
 * of the open record alone, so that it is the same whether the record is one of a block, or the
 * temporary one of an append that seals at once.
 */
#include <math.h>

#include "simd/levels.h"
#include "src/cache/cache.h"

#define F16_MAX 0x7bffu /* 65504 */

/*
 * Which rows of an open record of K have the same base, the record's offset or (a negative scale)
 * none: nearly always all. The rows of the base that fewer have, `few`, count as zero in the mean
 * and get their codes by a pass of their own.
 */
typedef struct bases {
    const uint16_t *magnitude; /* scales without their sign */
    const uint16_t *of_many;   /* zero for those that are few */
    uint64_t few;              /* a bit a token */
    int many_without;          /* most rows have no offset */
    uint16_t memory[2][KVT_TOKENS];
} bases;

static void find_bases(const kvt_record *open, bases *b)
{
    uint64_t without = 0;
    uint16_t signs = 0;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        signs |= open->scales[t];
    b->magnitude = b->of_many = open->scales;
    b->few = 0;
    b->many_without = 0;
    if (!(signs & KVT_F16_MINUS))
        return;
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        without |= (uint64_t)(open->scales[t] >> 15) << t;
        b->memory[0][t] = open->scales[t] & (uint16_t)~KVT_F16_MINUS;
    }
    b->many_without = __builtin_popcountll(without) > KVT_TOKENS / 2;
    b->few = b->many_without ? ~without : without;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        b->memory[1][t] = b->few >> t & 1 ? 0 : b->memory[0][t];
    b->magnitude = b->memory[0];
    b->of_many = b->memory[1];
}

static void offset_of(const kvt_kernels *kernels, size_t dims_p, const kvt_record *open,
                      const bases *b, uint16_t *offset)
{
    float mean[KVT_MAX_DIM], base[KVT_MAX_DIM];
    kernels->mean_k_f16(open->codes, b->of_many, dims_p, mean);
    if (!b->many_without) {
        (void)kernels->load_f16(open->offset, base, dims_p);
        for (size_t d = 0; d < dims_p; d++)
            mean[d] += base[d];
    }
    kernels->store_f16(mean, offset, dims_p); /* saturates at +-65504 */
}

/* ---- K of 4 bits ---- */

/* lo and hi of the rows that are not left out, with their base (NULL: none). */
static void range_of(const kvt_kernels *kernels, size_t dims_p, const kvt_record *open,
                     const uint16_t *scales, uint64_t left_out, const uint16_t *base, float *lo,
                     float *hi)
{
    float from[KVT_MAX_DIM];
    kernels->range_k_f16(open->codes, scales, left_out, dims_p, lo, hi);
    if (base)
        (void)kernels->load_f16(base, from, dims_p);
    else
        memset(from, 0, dims_p * sizeof *from);
    for (size_t d = 0; d < dims_p; d++) { /* no zero is negative */
        lo[d] = (lo[d] + from[d]) + 0.0f;
        hi[d] = (hi[d] + from[d]) + 0.0f;
    }
}

/* Whether a token has been codes before, as in few blocks. */
static int has_seed(const kvt_record *open, size_t dims_p)
{
    uint8_t any = 0;
    for (size_t t = 0; open->seed && t < KVT_TOKENS; t++)
        any |= kvt_seed_gains(open->seed, dims_p)[t];
    return any != 0;
}

/*
 * Into a copy of an open record with a seed: the rows that have been codes before stand for middle
 * + scale * (code - 7.5), without their gains. They keep those.
 */
static void take_gains(const kvt_kernels *kernels, const kvt_group *group, const kvt_record *open,
                       const kvt_record *copy)
{
    const size_t dims = group->config.k_dim, dims_p = group->layouts[KVT_OPEN].k_dims;
    const uint8_t *gains = kvt_seed_gains(open->seed, dims_p);
    float x[KVT_MAX_DIM];
    memcpy(copy->codes, open->codes, dims_p * KVT_TOKENS * sizeof(uint16_t));
    memcpy(copy->scales, open->scales, KVT_TOKENS * sizeof(uint16_t));
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        const float gain = kvt_k4_gain(gains[t]);
        const float scale = kvt_f16_to_f32(open->scales[t] & (uint16_t)~KVT_F16_MINUS);
        if (gains[t] == 0)
            continue;
        kernels->get_k_f16(open->codes, NULL, t, dims, dims_p, x);
        for (size_t d = 0; d < dims; d++) {
            const float middle = kvt_f16_to_f32(open->seed[dims_p + d]);
            const float along = open->seed[d] & KVT_F16_MINUS ? 0.0f : middle;
            const float base =
                open->scales[t] & KVT_F16_MINUS ? 0.0f : kvt_f16_to_f32(open->offset[d]);
            /* Below 1.2e6: kvt_open_largest, three f16 and a gain of 0.876 or more. */
            x[d] = (x[d] * scale + base - (middle - along)) / gain - along + middle;
        }
        kvt_open_put_back(kernels, group, x, dims, copy, t);
    }
}

/* Whether a grid of 16 levels about `middle` has lo and hi within so many of its steps. */
static int covers(float middle, float step, float lo, float hi, float steps)
{
    return hi - middle <= steps * step && middle - lo <= steps * step;
}

/*
 * The grid that a dim has had, where the block has been sealed before, so that its tokens keep
 * their values: as it was, if the rows are in its range (within a quarter of a step, for their
 * rounding to f16); else moved by whole steps, if that helps; else as it was, up to 5.5 steps
 * beyond its ends, where new rows are clipped. Farther out, it is given up. Every new grid adds
 * an error as large as the first one to the tokens that have been codes already, and with other
 * rows each time about every second dim's ends are passed.
 */
static void keep_grid(uint16_t *scale, uint16_t *offset, float had, float at, float middle,
                      float lo, float hi)
{
    uint16_t moved;
    if (!(had > 0.0f))
        return;
    moved = kvt_f32_to_f16(at + had * rintf((middle - at) / had));
    if (covers(at, had, lo, hi, 7.75f))
        *offset = kvt_f32_to_f16(at);
    else if (covers(kvt_f16_to_f32(moved), had, lo, hi, 7.75f))
        *offset = moved;
    else if (covers(at, had, lo, hi, 13.0f))
        *offset = kvt_f32_to_f16(at);
    else
        return;
    *scale = kvt_f32_to_f16(had);
}

/*
 * The middle of each dim's range, as the offset, and a scale that reaches its ends in 7.5 steps;
 * or what the block has had: see keep_grid.
 */
static void choose_k4(const kvt_kernels *kernels, size_t dims_p, const kvt_record *open,
                      const bases *b, uint16_t *offset, uint16_t *scales)
{
    float lo[KVT_MAX_DIM], hi[KVT_MAX_DIM], middle[KVT_MAX_DIM], scale[KVT_MAX_DIM];
    float stored[KVT_MAX_DIM];

    range_of(kernels, dims_p, open, b->magnitude, b->few, b->many_without ? NULL : open->offset, lo,
             hi);
    if (b->few) {
        range_of(kernels, dims_p, open, b->magnitude, ~b->few,
                 b->many_without ? open->offset : NULL, middle, scale);
        for (size_t d = 0; d < dims_p; d++) {
            lo[d] = middle[d] < lo[d] ? middle[d] : lo[d];
            hi[d] = scale[d] > hi[d] ? scale[d] : hi[d];
        }
    }
    for (size_t d = 0; d < dims_p; d++)
        middle[d] = 0.5f * (lo[d] + hi[d]);
    kernels->store_f16(middle, offset, dims_p); /* saturates at +-65504 */
    (void)kernels->load_f16(offset, middle, dims_p);
    for (size_t d = 0; d < dims_p; d++) {
        float above = hi[d] - middle[d], below = middle[d] - lo[d];
        scale[d] = (above > below ? above : below) / 7.5f;
    }
    /* Rounded up. KVT_K4_MAX keeps it below 65504, but for rows that had scales of a file. */
    kernels->store_f16(scale, scales, dims_p);
    (void)kernels->load_f16(scales, stored, dims_p);
    for (size_t d = 0; d < dims_p; d++)
        scales[d] = (uint16_t)(scales[d] + (stored[d] < scale[d] && scales[d] < F16_MAX));
    if (!has_seed(open, dims_p))
        return;
    for (size_t d = 0; d < dims_p; d++)
        keep_grid(&scales[d], &offset[d], kvt_f16_to_f32(open->seed[d] & (uint16_t)~KVT_F16_MINUS),
                  kvt_f16_to_f32(open->seed[dims_p + d]), middle[d], lo[d], hi[d]);
}

/* What of the offset a token's gain multiplies, by dims: not a middle far beyond their range. */
static void choose_along(const kvt_kernels *kernels, size_t dims_p, const uint16_t *offset,
                         const uint16_t *scales, float *along)
{
    float scale[KVT_MAX_DIM];
    (void)kernels->load_f16(offset, along, dims_p);
    (void)kernels->load_f16(scales, scale, dims_p);
    for (size_t d = 0; d < dims_p; d++)
        along[d] = fabsf(along[d]) <= KVT_K4_ALONG * scale[d] ? along[d] : 0.0f;
}

/* The sign of the scales of those dims: not before the codes are there. */
static void mark_scales(size_t dims_p, const uint16_t *offset, uint16_t *scales, const float *along)
{
    for (size_t d = 0; d < dims_p; d++)
        if (along[d] == 0.0f && (offset[d] & (uint16_t)~KVT_F16_MINUS))
            scales[d] |= KVT_F16_MINUS;
}

void kvt_k4_get(const kvt_kernels *kernels, const kvt_record *record, size_t t, size_t dims,
                size_t dims_p, float *x)
{
    const float gain = kvt_k4_gain(kvt_record_gains(record, dims_p)[t]);
    uint16_t scales[KVT_MAX_DIM];
    float middle[KVT_MAX_DIM];
    for (size_t d = 0; d < dims_p; d++)
        scales[d] = record->scales[d] & (uint16_t)~KVT_F16_MINUS;
    kernels->get_k_i4(record->codes, scales, t, dims, dims_p, x);
    (void)kernels->load_f16(record->offset, middle, dims);
    for (size_t d = 0; d < dims; d++) {
        const float with = (x[d] + middle[d]) * gain, without = x[d] * gain + middle[d];
        x[d] = record->scales[d] & KVT_F16_MINUS ? without : with;
    }
}

#if defined(__GNUC__)
#define NOINLINE __attribute__((noinline)) /* memory on the stack that is needed seldom */
#else
#define NOINLINE
#endif

/* The offset of a block that has been sealed before. */
static NOINLINE void offset_again(const kvt_kernels *kernels, const kvt_group *group,
                                  const kvt_record *open, uint16_t *offset)
{
    _Alignas(64) uint16_t codes[KVT_MAX_DIM * KVT_TOKENS];
    uint16_t row_scales[KVT_TOKENS], scales[KVT_MAX_DIM];
    const kvt_record copy = {codes, row_scales, open->offset, NULL};
    kvt_record seeded = copy;
    bases b;
    take_gains(kernels, group, open, &copy);
    seeded.seed = open->seed;
    find_bases(&seeded, &b);
    choose_k4(kernels, group->layouts[KVT_OPEN].k_dims, &seeded, &b, offset, scales);
}

void kvt_seal_offset(const kvt_kernels *kernels, const kvt_group *group, uint32_t form,
                     const kvt_record *record, uint16_t *offset)
{
    const kvt_layout *layout = &group->layouts[form];
    uint16_t scales[KVT_MAX_DIM];
    bases b;
    if (layout->k_type == KVT_TYPE_I4 && has_seed(record, layout->k_dims)) {
        offset_again(kernels, group, record, offset);
        return;
    }
    find_bases(record, &b);
    if (layout->k_type == KVT_TYPE_I4)
        choose_k4(kernels, layout->k_dims, record, &b, offset, scales);
    else
        offset_of(kernels, layout->k_dims, record, &b, offset);
}

/* delta = base - offset; base NULL: zero. */
static void make_delta(const kvt_kernels *kernels, size_t dims_p, const uint16_t *base,
                       const uint16_t *offset, float *delta)
{
    float from[KVT_MAX_DIM];
    (void)kernels->load_f16(offset, delta, dims_p);
    if (base)
        (void)kernels->load_f16(base, from, dims_p);
    else
        memset(from, 0, dims_p * sizeof *from);
    kernels->center(from, delta, dims_p, delta);
}

/* What K is sealed as, and with; along: of i4. */
typedef struct seal_job {
    const kvt_kernels *kernels;
    size_t dims_p;
    const kvt_record *open, *sealed; /* the sealed one has its offset, and the scales of i4 */
    const bases *bases;
    const float *along;
    kvt_type type;
} seal_job;

/* All 64 rows, as if they all had the offset, or none. */
static void seal_rows(const seal_job *job, int with_offset, const void *next)
{
    const kvt_kernels *kernels = job->kernels;
    const kvt_record *open = job->open, *sealed = job->sealed;
    const size_t dims_p = job->dims_p;
    float delta[KVT_MAX_DIM];

    make_delta(kernels, dims_p, with_offset ? open->offset : NULL, sealed->offset, delta);
    if (job->type == KVT_TYPE_I8)
        kernels->seal_k_i8(open->codes, job->bases->magnitude, delta, dims_p, next, sealed->codes,
                           sealed->scales);
    else
        kernels->seal_k_i4(open->codes, job->bases->magnitude, delta, job->along, sealed->scales,
                           dims_p, next, sealed->codes, kvt_record_gains(sealed, dims_p));
}

/* Copy the codes of the rows that are few out of the record, one row after the other, or back. */
static void copy_few(const seal_job *job, int back, uint8_t *few)
{
    const int is_i8 = job->type == KVT_TYPE_I8;
    uint8_t *codes = job->sealed->codes;
    for (size_t t = 0; t < KVT_TOKENS; t++)
        for (size_t d = 0; job->bases->few >> t & 1 && d < job->dims_p; d += is_i8 ? 4 : 8) {
            uint8_t *at = codes + (is_i8 ? kvt_k8_index : kvt_k4_index)(t, d, job->dims_p);
            memcpy(back ? at : few, back ? few : at, 4);
            few += 4;
        }
}

/* Rows of two bases: those that are few are sealed first, and put by while the others are. */
static void seal_both(const seal_job *job, const void *next, uint8_t *few)
{
    const kvt_record *sealed = job->sealed;
    uint8_t gains[KVT_TOKENS];
    uint16_t scales[KVT_TOKENS];

    seal_rows(job, job->bases->many_without, NULL);
    copy_few(job, 0, few);
    if (job->type == KVT_TYPE_I8)
        memcpy(scales, sealed->scales, sizeof scales);
    else
        memcpy(gains, kvt_record_gains(sealed, job->dims_p), sizeof gains);
    seal_rows(job, !job->bases->many_without, next);
    copy_few(job, 1, few);
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        if (!(job->bases->few >> t & 1))
            continue;
        if (job->type == KVT_TYPE_I8)
            sealed->scales[t] = scales[t];
        else
            kvt_record_gains(sealed, job->dims_p)[t] = gains[t];
    }
}

/* Two sizes, as append's: this memory is beside that of a row which is sealed as it comes. */
#define FEW_DIMS 256

static NOINLINE void seal_both_small(const seal_job *job, const void *next)
{
    uint8_t few[FEW_DIMS * KVT_TOKENS / 2];
    seal_both(job, next, few);
}

static NOINLINE void seal_both_large(const seal_job *job, const void *next)
{
    uint8_t few[KVT_MAX_DIM * KVT_TOKENS / 2];
    seal_both(job, next, few);
}

static void seal_bases(const seal_job *job, const void *next)
{
    if (!job->bases->few)
        seal_rows(job, !job->bases->many_without, next);
    else
        (job->dims_p <= FEW_DIMS ? seal_both_small : seal_both_large)(job, next);
}

static void seal_k8(const kvt_kernels *kernels, const kvt_group *group, const kvt_record *open,
                    const void *next, const kvt_record *sealed)
{
    size_t dims_p = group->layouts[KVT_OPEN].k_dims;
    bases b;
    const seal_job job = {kernels, dims_p, open, sealed, &b, NULL, KVT_TYPE_I8};

    if (!group->offsets) {
        kernels->seal_k_i8(open->codes, open->scales, NULL, dims_p, next, sealed->codes,
                           sealed->scales);
        return;
    }
    find_bases(open, &b);
    offset_of(kernels, dims_p, open, &b, sealed->offset);
    seal_bases(&job, next);
}

static void seal_k4(const kvt_kernels *kernels, const kvt_group *group, const kvt_record *open,
                    const void *next, const kvt_record *sealed)
{
    size_t dims_p = group->layouts[KVT_OPEN].k_dims;
    float along[KVT_MAX_DIM];
    bases b;
    const seal_job job = {kernels, dims_p, open, sealed, &b, along, KVT_TYPE_I4};

    find_bases(open, &b);
    choose_k4(kernels, dims_p, open, &b, sealed->offset, sealed->scales);
    choose_along(kernels, dims_p, sealed->offset, sealed->scales, along);
    seal_bases(&job, next);
    mark_scales(dims_p, sealed->offset, sealed->scales, along);
}

/* A block that has been sealed before: what were codes keep their gains. */
static NOINLINE void seal_k4_again(const kvt_kernels *kernels, const kvt_group *group,
                                   const kvt_record *open, const kvt_record *sealed)
{
    _Alignas(64) uint16_t codes[KVT_MAX_DIM * KVT_TOKENS];
    const size_t dims_p = group->layouts[KVT_OPEN].k_dims;
    const uint8_t *gains = kvt_seed_gains(open->seed, dims_p);
    uint16_t scales[KVT_TOKENS];
    kvt_record copy = {codes, scales, open->offset, NULL};
    take_gains(kernels, group, open, &copy);
    copy.seed = open->seed;
    seal_k4(kernels, group, &copy, NULL, sealed);
    for (size_t t = 0; t < KVT_TOKENS; t++)
        if (gains[t])
            kvt_record_gains(sealed, dims_p)[t] = gains[t];
}

static void seal_k(const kvt_kernels *kernels, const kvt_group *group, kvt_type type,
                   const kvt_record *open, const void *next, const kvt_record *sealed)
{
    if (type == KVT_TYPE_I8)
        seal_k8(kernels, group, open, next, sealed);
    else if (has_seed(open, group->layouts[KVT_OPEN].k_dims))
        seal_k4_again(kernels, group, open, sealed);
    else
        seal_k4(kernels, group, open, next, sealed);
}

/*
 * Rows of V with a negative scale have been 4-bit codes before (reopen.c): an element is a level,
 * and the scale the one it had. They are what they were.
 */
static void seal_v(const kvt_kernels *kernels, kvt_type type, size_t dims_p, const kvt_record *open,
                   const void *next, const kvt_record *sealed)
{
    static const float magnitudes[] = {KVT_V4_MAGNITUDES};
    uint16_t memory[KVT_TOKENS], signs = 0;
    const uint16_t *scales = open->scales, *codes = open->codes;

    for (size_t t = 0; t < KVT_TOKENS; t++)
        signs |= open->scales[t];
    if (signs & KVT_F16_MINUS) {
        for (size_t t = 0; t < KVT_TOKENS; t++)
            memory[t] = open->scales[t] & (uint16_t)~KVT_F16_MINUS;
        scales = memory;
    }
    (type == KVT_TYPE_I8 ? kernels->seal_v_i8
     : type == KVT_TYPE_I4
         ? kernels->seal_v_i4
         : kernels->seal_v_i5)(open->codes, scales, dims_p, next, sealed->codes, sealed->scales);
    if (type != KVT_TYPE_I4 || scales == open->scales)
        return;
    for (size_t t = 0; t < KVT_TOKENS; t++) {
        if (!(open->scales[t] & KVT_F16_MINUS))
            continue;
        sealed->scales[t] = scales[t];
        for (size_t d = 0; d < dims_p; d++) {
            float level = kvt_f16_to_f32(codes[kvt_vw_index(t, d, dims_p)]);
            unsigned m = 0;
            while (m < 7 && magnitudes[m] < fabsf(level))
                m++;
            kvt_put_bits((uint8_t *)sealed->codes + kvt_v4_index(t, d, dims_p), kvt_v4_shift(t),
                         15u, level < 0.0f ? 7 - m : 8 + m);
        }
    }
}

void kvt_seal(const kvt_kernels *kernels, const kvt_group *group, kvt_side side, uint32_t form,
              const kvt_record *open, const void *next, const kvt_record *sealed)
{
    const kvt_layout *layout = &group->layouts[form];
    kvt_type type = side == KVT_SIDE_K ? layout->k_type : layout->v_type;

    if (!kvt_is_sealed_type(type)) /* the other side is: this one is the same in all forms */
        memcpy(sealed->codes, open->codes,
               side == KVT_SIDE_K ? layout->k_code_bytes : layout->v_code_bytes);
    else if (side == KVT_SIDE_K)
        seal_k(kernels, group, type, open, next, sealed);
    else
        seal_v(kernels, type, layout->v_dims, open, next, sealed);
}

void kvt_sealed_put(const kvt_kernels *kernels, const kvt_group *group, kvt_side side,
                    uint32_t form, const kvt_record *open, size_t from, size_t n, float *x,
                    const kvt_record *sealed, size_t slot)
{
    const kvt_layout *layout = &group->layouts[form];
    const int is_k = side == KVT_SIDE_K;
    const size_t dims = is_k ? group->config.k_dim : group->config.v_dim;
    const size_t dims_p = is_k ? layout->k_dims : layout->v_dims;
    float delta[2][KVT_MAX_DIM]; /* of rows with the open record's offset, and without */
    int has_delta[2] = {0, 0}, stored;

    for (size_t i = 0; i < n; i++) {
        float *row = x + i * dims;
        uint16_t scale = open->scales[from + i];
        const int bare = (scale & KVT_F16_MINUS) != 0;
        (is_k ? kernels->get_k_f16 : kernels->get_v_f16)(open->codes, NULL, from + i, dims, dims_p,
                                                         row);
        scale &= (uint16_t)~KVT_F16_MINUS;
        for (size_t d = 0; scale != KVT_F16_ONE && d < dims; d++) /* exact */
            row[d] *= kvt_f16_to_f32(scale);
        if (!sealed->offset)
            continue;
        if (!has_delta[bare])
            make_delta(kernels, dims_p, bare ? NULL : open->offset, sealed->offset, delta[bare]);
        has_delta[bare] = 1;
        for (size_t d = 0; d < dims; d++)
            row[d] += delta[bare][d];
    }
    assert(!is_k || layout->k_type == KVT_TYPE_I8);
    stored = (is_k                            ? kernels->put_k_i8
              : layout->v_type == KVT_TYPE_I8 ? kernels->put_v_i8
              : layout->v_type == KVT_TYPE_I4 ? kernels->put_v_i4
                                              : kernels->put_v_i5)(
        x, dims, n, dims, dims_p, sealed->codes, sealed->scales, slot);
    assert(stored); /* kvt_largest and two offsets of f16 are within the largest scale's reach */
    (void)stored;
}
