/*
 * The image of a layer: its memory as it is attended over, with zeros in all that holds no number
 * (docs/format.md, "Images"). A digest is one of an image, whatever the way a layer is stored.
 *
 * What has to be zero is found by one walk over a head's record, which clears it or looks for what
 * is not; the sizes of what is live are those of streams.c.
 */
#include "simd/sound.h"
#include "src/cpu.h"
#include "src/snapshot/format.h"
#include "src/snapshot/lanes.h"

static const char no_token[] = "a value where there is no token";
static const char no_dim[] = "a value where there is no dim";
static const char not_finite[] = "a value that is not finite";

int kvt_snap_is_image(const kvt_group *group, uint32_t form, uint32_t tokens)
{
    const kvt_layout *layout = &group->layouts[form];
    if (tokens < KVT_TOKENS)
        return 0;
    if (kvt_is_coarse(layout->k_type) && layout->k_dims != group->config.k_dim)
        return 0;
    return group->v_in_k || !kvt_is_coarse(layout->v_type) || layout->v_dims == group->config.v_dim;
}

/* ---- what is zero ---- */

/* A walk over a record. */
typedef struct walk {
    const unsigned char *record;
    unsigned char *to; /* the record, to be cleared; NULL: to be looked at */
    const char *fault; /* where something is not zero: of what there is none */
} walk;

/* Bytes from..end - 1 of the record are zero. */
static void zero(walk *w, size_t from, size_t end, const char *of)
{
    unsigned char any = 0;
    size_t i;
    if (w->to) {
        memset(w->to + from, 0, end - from);
        return;
    }
    for (i = from; i < end; i++)
        any |= w->record[i];
    if (any)
        w->fault = of;
}

/* Bits of the eight bytes from `at` on that are not in the mask are zero. */
static void zero_bits(walk *w, size_t at, uint64_t mask)
{
    uint64_t bits = kvt_get64(w->record + at);
    if (w->to)
        kvt_put64(w->to + at, bits & mask);
    else if (bits & ~mask)
        w->fault = no_token;
}

static size_t live_of(size_t tokens, size_t first, size_t most)
{
    size_t n = tokens > first ? tokens - first : 0;
    return n < most ? n : most;
}

/* Bytes of a token that lie together in a tile of K: of i8 and i4 those of 4 or 8 dims. */
static size_t k_row_bytes(kvt_type type)
{
    return kvt_type_bits(type) <= 8 ? 4 : kvt_element_bytes(type);
}

static void zero_k(walk *w, const kvt_layout *layout, size_t dims, size_t tokens)
{
    size_t step = kvt_snap_k_tile_bytes(layout->k_type, layout->k_dims);
    size_t live = kvt_snap_k_tile_bytes(layout->k_type, dims);
    size_t row = k_row_bytes(layout->k_type), at = layout->k_codes, first, i, n;

    for (first = 0; first < KVT_TOKENS; first += KVT_TILE_TOKENS, at += step) {
        n = live_of(tokens, first, KVT_TILE_TOKENS);
        if (n == 0)
            zero(w, at, at + step, no_token);
        else if (n < KVT_TILE_TOKENS)
            for (i = 0; i < live; i += KVT_TILE_TOKENS * row)
                zero(w, at + i + n * row, at + i + KVT_TILE_TOKENS * row, no_token);
        zero(w, at + live, at + step, no_dim);
    }
}

static void zero_v(walk *w, const kvt_layout *layout, size_t dims, size_t tokens)
{
    size_t lanes = kvt_snap_v_lanes(layout->v_type);
    size_t step = kvt_snap_v_run_bytes(layout->v_type, layout->v_dims);
    size_t live = kvt_snap_v_run_bytes(layout->v_type, dims);
    size_t at = layout->v_codes, first, d, half, i, n;

    for (first = 0; first < KVT_TOKENS; first += lanes, at += step) {
        n = live_of(tokens, first, lanes);
        if (n == 0)
            zero(w, at, at + step, no_token);
        else if (n < lanes) {
            uint64_t mask = kvt_snap_live_bits(lanes == 8 ? 4 : 8, n);
            for (i = 0; i < live; i += 8)
                zero_bits(w, at + i, mask | mask << 32);
        }
        zero(w, at + live, at + step, no_dim);
    }
    if (layout->v_type != KVT_TYPE_I5 || (tokens == KVT_TOKENS && dims == layout->v_dims))
        return;
    for (first = 0; first < KVT_TOKENS; first += 8)
        for (d = 0; d < layout->v_dims; d += 16)
            for (half = 0; half < 2; half++, at += 8)
                zero_bits(
                    w, at,
                    kvt_snap_live_fifths(live_of(tokens, first, 8), half, live_of(dims, d, 16)));
}

/* A part of f16, `live` of them, which ends at `end`. */
static void zero_f16(walk *w, size_t at, size_t live, size_t end, const char *of)
{
    zero(w, at + live * 2, end, of);
}

static void zero_record(walk *w, const kvt_group *group, uint32_t form, size_t tokens)
{
    const kvt_layout *layout = &group->layouts[form];
    size_t dims = group->config.k_dim, padded = layout->k_dims, at;

    zero_k(w, layout, dims, tokens);
    if (!group->v_in_k)
        zero_v(w, layout, group->config.v_dim, tokens);
    at = layout->k_scales;
    if (layout->k_type == KVT_TYPE_I4) {
        zero_f16(w, at, dims, at + kvt_k4_scales(padded) * 2, no_dim);
        at += kvt_k4_scales(padded) * 2;
        zero(w, at + tokens, layout->k_offset, no_token);
    } else if (layout->k_scale_bytes) {
        zero_f16(w, at, tokens, layout->k_offset, no_token);
    }
    if (layout->k_offset_bytes)
        zero_f16(w, layout->k_offset, dims, layout->k_seed, no_dim);
    if (layout->k_seed_bytes) {
        at = layout->k_seed;
        zero_f16(w, at, dims, at + padded * 2, no_dim);
        zero_f16(w, at + padded * 2, dims, at + padded * 4, no_dim);
        zero(w, at + padded * 4 + tokens, at + padded * 4 + KVT_TOKENS, no_token);
        zero(w, at + padded * 4 + KVT_TOKENS, layout->v_scales, no_dim);
    }
    if (layout->v_scale_bytes)
        zero_f16(w, layout->v_scales, tokens, layout->v_codes, no_token);
}

void kvt_snap_image_clear(const kvt_group *group, uint32_t form, uint32_t tokens,
                          unsigned char *layer)
{
    size_t step = group->layouts[form].head_bytes, h;
    for (h = 0; h < group->config.n_kv_heads; h++) {
        walk w = {layer + h * step, layer + h * step, NULL};
        zero_record(&w, group, form, tokens);
    }
}

/* ---- what append could have stored ---- */

#if defined(KVT_HAVE_AVX2)
#define SOUND(bits, fallback, codes, bytes)                                                        \
    (kvt_cpu_knows_avx2() ? kvt_sound_##bits##_avx2(codes, bytes) : fallback(codes, bytes))
#else
#define SOUND(bits, fallback, codes, bytes) fallback(codes, bytes)
#endif

/* Codes, padding included: zeros are sound. */
static const char *codes_fault(kvt_type type, const unsigned char *codes, size_t bytes)
{
    switch (type) {
    case KVT_TYPE_I8:
        return SOUND(i8, kvt_snap_none_minus_128, codes, bytes) ? NULL : "a code of -128";
    case KVT_TYPE_F16: return SOUND(f16, kvt_snap_all_finite16, codes, bytes) ? NULL : not_finite;
    case KVT_TYPE_F32: return SOUND(f32, kvt_snap_all_finite32, codes, bytes) ? NULL : not_finite;
    default: return NULL; /* all nibbles and fifth bits are */
    }
}

static const char *f16_fault(const unsigned char *part, size_t n, int may_be_negative,
                             int are_powers)
{
    if (!may_be_negative && !kvt_snap_none_negative16(part, n * 2))
        return "a negative scale";
    if (are_powers && !kvt_snap_all_powers16(part, n * 2))
        return "an open block's scale that is no power of two from 1 to 32768";
    return kvt_snap_all_finite16(part, n * 2) ? NULL : "a scale or offset that is not finite";
}

static int all_gains(const unsigned char *gains, size_t n)
{
    int bad = 0;
    size_t i;
    for (i = 0; i < n; i++)
        bad |= gains[i] == 0;
    return !bad;
}

static const char *scales_fault(const kvt_group *group, uint32_t form, size_t tokens,
                                const unsigned char *record)
{
    const kvt_layout *layout = &group->layouts[form];
    const int is_open = kvt_is_open(form), by_dims = layout->k_type == KVT_TYPE_I4;
    const int reopens = form == KVT_REOPENED;
    const char *fault = NULL;
    size_t dims = group->config.k_dim;

    if (layout->k_scale_bytes)
        fault = f16_fault(record + layout->k_scales, by_dims ? dims : tokens,
                          by_dims || (is_open && group->offsets), is_open);
    if (!fault && layout->v_scale_bytes)
        fault = f16_fault(record + layout->v_scales, tokens,
                          reopens && group->config.v_type == KVT_TYPE_I4, is_open && !reopens);
    if (!fault && layout->k_offset_bytes)
        fault = f16_fault(record + layout->k_offset, dims, 1, 0);
    if (!fault && layout->k_seed_bytes) /* scales and middles; the gains may be any */
        fault = f16_fault(record + layout->k_seed, 2 * layout->k_dims, 1, 0);
    if (!fault && by_dims &&
        !all_gains(record + layout->k_scales + kvt_k4_scales(layout->k_dims) * 2, tokens))
        fault = "a gain that is none";
    return fault;
}

static const char *rows_fault(const kvt_group *group, uint32_t form, size_t tokens,
                              const unsigned char *record)
{
    const kvt_layout *layout = &group->layouts[form];
    const unsigned char *gains =
        layout->k_seed_bytes ? record + layout->k_seed + layout->k_dims * 4 : NULL;
    const kvt_snap_rows k = {KVT_SIDE_K,
                             group->config.k_type,
                             form,
                             tokens,
                             layout->k_dims,
                             record + layout->k_codes,
                             record + layout->k_scales,
                             gains,
                             1};
    const kvt_snap_rows v = {KVT_SIDE_V,
                             group->config.v_type,
                             form,
                             tokens,
                             layout->v_dims,
                             record + layout->v_codes,
                             record + layout->v_scales,
                             NULL,
                             0};
    const char *fault = NULL;

    if (!kvt_is_open(form))
        return NULL;
    if (layout->k_scale_bytes)
        fault = kvt_snap_rows_fault(&k);
    return !fault && layout->v_scale_bytes ? kvt_snap_rows_fault(&v) : fault;
}

static const char *record_fault(const kvt_group *group, uint32_t form, size_t tokens,
                                const unsigned char *record)
{
    const kvt_layout *layout = &group->layouts[form];
    walk w = {record, NULL, NULL};
    const char *fault;

    zero_record(&w, group, form, tokens);
    fault = w.fault;
    if (!fault)
        fault = codes_fault(layout->k_type, record + layout->k_codes, layout->k_code_bytes);
    if (!fault && !group->v_in_k)
        fault = codes_fault(layout->v_type, record + layout->v_codes, layout->v_code_bytes);
    if (!fault)
        fault = scales_fault(group, form, tokens, record);
    return fault ? fault : rows_fault(group, form, tokens, record);
}

const char *kvt_snap_image_check(const kvt_group *group, uint32_t form, uint32_t tokens,
                                 const unsigned char *image)
{
    size_t step = group->layouts[form].head_bytes, h;
    const char *fault = NULL;
    for (h = 0; h < group->config.n_kv_heads && !fault; h++)
        fault = record_fault(group, form, tokens, image + h * step);
    return fault;
}

const char *kvt_snap_image_copy(const kvt_group *group, uint32_t form, uint32_t tokens,
                                unsigned char *to, const unsigned char *from, unsigned char *digest)
{
    size_t step = group->layouts[form].head_bytes, h;
    const char *fault = NULL;
    kvt_snap_copier copier;

    /* A record of 8 dims has 512 bytes of codes and more. */
    kvt_snap_copier_begin(&copier, NULL, to, from, group->layouts[form].layer_bytes);
    for (h = 0; h < group->config.n_kv_heads && !fault; h++) {
        kvt_snap_copier_reach(&copier, (h + 1) * step);
        fault = record_fault(group, form, tokens, from + h * step);
    }
    kvt_snap_copier_end(&copier, digest);
    return fault;
}
