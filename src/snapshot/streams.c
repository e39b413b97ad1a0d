/*
 * A layer of a block and its native streams: what is saved of the memory that tile.h describes.
 *
 * A native stream is the layout in memory without what is dead: dims are the model's, not the
 * padded ones (but in V's fifth bits, where the padding is zero); only tiles (K), runs of four or
 * eight tokens (V as i8, or of 4 and 5 bits) or tokens (V else, scales) that hold a live token; and
 * inside the last of them, zero where there is no token. In each layout the dims of a tile or token
 * come first and the padding last, so dropping it is a shorter copy.
 */
#include "src/snapshot/format.h"
#include "src/snapshot/lanes.h"

int kvt_snap_seals(const kvt_snapshot_group *group)
{
    return kvt_is_sealed_type(group->k_type) || kvt_is_sealed_type(group->v_type);
}

int kvt_snap_has_form(const kvt_snapshot_group *group, uint32_t form)
{
    switch (form) {
    case KVT_SEALED: return 1;
    case KVT_OPEN: return kvt_snap_seals(group);
    case KVT_FINE: return kvt_is_coarse(group->k_type) || kvt_is_coarse(group->v_type);
    default: return form == KVT_REOPENED && group->k_type == KVT_TYPE_I4;
    }
}

static int has_offset(const kvt_snapshot_group *group)
{
    return kvt_is_sealed_type(group->k_type) && !(group->flags & KVT_GROUP_NO_OFFSET);
}

static int has_v(const kvt_snapshot_group *group)
{
    return !(group->flags & KVT_GROUP_V_IN_K);
}

uint32_t kvt_snap_shapes(const kvt_snapshot_group *group, uint32_t form, uint32_t tokens,
                         kvt_snap_shape *shapes, size_t *bytes)
{
    kvt_type k_type = kvt_type_in(group->k_type, form), v_type = kvt_type_in(group->v_type, form);
    size_t heads = group->n_kv_heads, n_seeds = 0, n_gains = 0, n_small;
    uint32_t k_scales = 0, v_scales = 0, n = 1;

    if (kvt_is_sealed_type(group->k_type))
        k_scales = group->n_kv_heads * (k_type == KVT_TYPE_I4 ? group->k_dim : tokens);
    if (kvt_is_sealed_type(group->v_type) && has_v(group))
        v_scales = group->n_kv_heads * tokens;
    if (form == KVT_REOPENED)
        n_seeds = 2 * heads * group->k_dim;
    if (form == KVT_REOPENED || k_type == KVT_TYPE_I4)
        n_gains = heads * tokens;
    n_small =
        k_scales + v_scales + (has_offset(group) ? heads * group->k_dim : 0) + n_seeds + n_gains;

    memset(shapes, 0, KVT_SNAP_MAX_STREAMS * sizeof *shapes);
    shapes[0].kind = KVT_SNAP_KIND_K;
    shapes[0].type = group->k_type;
    shapes[0].form = form;
    shapes[0].bits = (uint32_t)kvt_type_bits(k_type);
    shapes[0].element = (uint32_t)kvt_element_bytes(k_type);
    shapes[0].heads = group->n_kv_heads;
    shapes[0].dims = group->k_dim;
    shapes[0].tokens = tokens;
    shapes[0].bytes =
        heads * kvt_round_up(tokens, KVT_TILE_TOKENS) * group->k_dim * shapes[0].bits / 8;
    *bytes = shapes[0].bytes + n_small * 2;
    if (has_v(group)) {
        kvt_snap_shape *v = &shapes[n++];
        size_t v_tokens = kvt_round_up(tokens, kvt_snap_v_lanes(v_type));
        *v = shapes[0];
        v->kind = KVT_SNAP_KIND_V;
        v->type = group->v_type;
        v->bits = (uint32_t)kvt_type_bits(v_type);
        v->element = (uint32_t)kvt_element_bytes(v_type);
        v->dims = group->v_dim;
        v->bytes =
            heads * (kvt_is_coarse(v_type) ? v_tokens * group->v_dim / 2 +
                                                 kvt_snap_fifth_bytes(v_type, tokens, group->v_dim)
                                           : v_tokens * group->v_dim * v->element);
        *bytes += v->bytes;
    }
    if (n_small) {
        kvt_snap_shape *small = &shapes[n++];
        small->kind = KVT_SNAP_KIND_SCALES;
        small->bits = 16;
        small->element = 2;
        small->plain = k_scales + v_scales;
        small->gains = (uint32_t)n_gains;
        small->least_gain = form == KVT_SEALED; /* 0: a row that has never been sealed */
        if (k_type == KVT_TYPE_I4)
            small->signs = k_scales;
        if (kvt_is_open(form)) {
            /* Rows of V that were sealed before have the scale that they had: reopen.c. */
            const int reopens = form == KVT_REOPENED;
            small->powers = k_scales + (reopens ? 0 : v_scales);
            small->signs = has_offset(group) ? k_scales : 0;
            if (reopens && group->v_type == KVT_TYPE_I4)
                small->signs += v_scales;
        }
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
        for (form = KVT_SEALED; form < KVT_FORMS; form++) {
            if (!kvt_snap_has_form(&header->groups[g], form))
                continue;
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

static unsigned char *gather_rows(const unsigned char *codes, size_t n, size_t live, size_t step,
                                  unsigned char *to)
{
    size_t i;
    if (live == step)
        memcpy(to, codes, n * live);
    else
        for (i = 0; i < n; i++)
            memcpy(to + i * live, codes + i * step, live);
    return to + n * live;
}

static unsigned char *gather_k(const kvt_group *group, const kvt_layout *layout,
                               const unsigned char *codes, size_t tokens, unsigned char *to)
{
    size_t live = kvt_snap_k_tile_bytes(layout->k_type, group->config.k_dim);
    size_t step = kvt_snap_k_tile_bytes(layout->k_type, layout->k_dims);
    size_t tiles = (tokens + KVT_TILE_TOKENS - 1) / KVT_TILE_TOKENS;

    to = gather_rows(codes, tiles, live, step, to);
    if (tokens % KVT_TILE_TOKENS) /* i8 and i4: 4 or 8 dims of a token lie together */
        clear_lanes(to - live, live, tokens % KVT_TILE_TOKENS,
                    kvt_type_bits(layout->k_type) <= 8 ? 4 : kvt_element_bytes(layout->k_type));
    return to;
}

/* Zero where there is no token, or no dim. */
static void clear_fifths(unsigned char *bits, size_t tokens, size_t dims)
{
    size_t run, d, half;
    for (run = 0; run < tokens; run += 8)
        for (d = 0; d < dims; d += 16)
            for (half = 0; half < 2; half++, bits += 8)
                kvt_put64(bits,
                          kvt_get64(bits) & kvt_snap_live_fifths(tokens - run, half, dims - d));
}

static unsigned char *gather_v(const kvt_group *group, const kvt_layout *layout,
                               const unsigned char *codes, size_t tokens, unsigned char *to)
{
    size_t lanes = kvt_snap_v_lanes(layout->v_type), dims = group->config.v_dim;
    size_t live = kvt_snap_v_run_bytes(layout->v_type, dims);
    size_t fifths = kvt_snap_fifth_bytes(layout->v_type, tokens, dims);

    to = gather_rows(codes, (tokens + lanes - 1) / lanes, live,
                     kvt_snap_v_run_bytes(layout->v_type, layout->v_dims), to);
    if (lanes > 1 && tokens % lanes) {
        uint32_t mask = kvt_snap_live_bits(lanes == 8 ? 4 : 8, tokens % lanes), word;
        unsigned char *p;
        for (p = to - live; p < to; p += 4) {
            memcpy(&word, p, 4);
            word &= mask;
            memcpy(p, &word, 4);
        }
    }
    if (fifths) {
        memcpy(to, codes + layout->v_dims * KVT_TOKENS / 2, fifths);
        clear_fifths(to, tokens, dims);
    }
    return to + fifths;
}

/* The runs of f16 in a head's record that the stream of scales has, for each head. */
typedef struct small_run {
    size_t at, bytes; /* bytes: of the stream */
    int widens;       /* a byte of the record is an f16 of the stream */
} small_run;

enum { MAX_RUNS = 6 };

static size_t small_runs(const kvt_group *group, const kvt_layout *layout, size_t tokens,
                         small_run *runs)
{
    size_t n = 0, by_tokens = tokens * 2, by_dims = group->config.k_dim * (size_t)2;
    if (layout->k_scale_bytes)
        runs[n++] =
            (small_run){layout->k_scales, layout->k_type == KVT_TYPE_I4 ? by_dims : by_tokens, 0};
    if (layout->v_scale_bytes)
        runs[n++] = (small_run){layout->v_scales, by_tokens, 0};
    if (layout->k_offset_bytes)
        runs[n++] = (small_run){layout->k_offset, by_dims, 0};
    if (layout->k_seed_bytes) { /* scales, then middles */
        runs[n++] = (small_run){layout->k_seed, by_dims, 0};
        runs[n++] = (small_run){layout->k_seed + layout->k_dims * 2, by_dims, 0};
        runs[n++] = (small_run){layout->k_seed + layout->k_dims * 4, by_tokens, 1};
    }
    if (layout->k_type == KVT_TYPE_I4)
        runs[n++] = (small_run){layout->k_scales + kvt_k4_scales(layout->k_dims) * 2, by_tokens, 1};
    return n;
}

static void gather_small(const small_run *run, const unsigned char *record, unsigned char *to)
{
    size_t i;
    if (!run->widens) {
        memcpy(to, record + run->at, run->bytes);
        return;
    }
    for (i = 0; i < run->bytes; i += 2) {
        to[i] = record[run->at + i / 2];
        to[i + 1] = 0;
    }
}

static void scatter_small(const small_run *run, const unsigned char *from, unsigned char *record)
{
    size_t i;
    if (!run->widens)
        memcpy(record + run->at, from, run->bytes);
    for (i = 0; run->widens && i < run->bytes; i += 2)
        record[run->at + i / 2] = from[i];
}

void kvt_snap_gather(const kvt_group *group, uint32_t form, uint32_t tokens,
                     const unsigned char *layer, unsigned char *streams)
{
    const kvt_layout *layout = &group->layouts[form];
    size_t heads = group->config.n_kv_heads, step = layout->head_bytes, h, i, n;
    unsigned char *to = streams;
    small_run runs[MAX_RUNS];

    n = small_runs(group, layout, tokens, runs);

    for (h = 0; h < heads; h++)
        to = gather_k(group, layout, layer + h * step + layout->k_codes, tokens, to);
    for (h = 0; h < heads && !group->v_in_k; h++)
        to = gather_v(group, layout, layer + h * step + layout->v_codes, tokens, to);
    for (i = 0; i < n; i++)
        for (h = 0; h < heads; h++, to += runs[i].bytes)
            gather_small(&runs[i], layer + h * step, to);
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

void kvt_snap_scatter(const kvt_group *group, uint32_t form, uint32_t tokens,
                      const unsigned char *streams, unsigned char *image)
{
    const kvt_layout *layout = &group->layouts[form];
    size_t heads = group->config.n_kv_heads, step = layout->head_bytes, h, i, n;
    size_t lanes = kvt_snap_v_lanes(layout->v_type), v_runs = (tokens + lanes - 1) / lanes;
    size_t tiles = (tokens + (size_t)KVT_TILE_TOKENS - 1) / KVT_TILE_TOKENS;
    size_t fifths = kvt_snap_fifth_bytes(layout->v_type, tokens, group->config.v_dim);
    const unsigned char *from = streams;
    small_run runs[MAX_RUNS];

    memset(image, 0, layout->layer_bytes);
    for (h = 0; h < heads; h++)
        from = scatter_rows(image + h * step + layout->k_codes, tiles,
                            kvt_snap_k_tile_bytes(layout->k_type, group->config.k_dim),
                            kvt_snap_k_tile_bytes(layout->k_type, layout->k_dims), from);
    for (h = 0; h < heads && !group->v_in_k; h++, from += fifths) {
        unsigned char *codes = image + h * step + layout->v_codes;
        from =
            scatter_rows(codes, v_runs, kvt_snap_v_run_bytes(layout->v_type, group->config.v_dim),
                         kvt_snap_v_run_bytes(layout->v_type, layout->v_dims), from);
        memcpy(codes + layout->v_dims * KVT_TOKENS / 2, from, fifths);
    }
    n = small_runs(group, layout, tokens, runs);
    for (i = 0; i < n; i++)
        for (h = 0; h < heads; h++, from += runs[i].bytes)
            scatter_small(&runs[i], from, image + h * step);
}

/* ---- check ---- */

/* 1 when the gains are bytes, and of sealed rows not 0. */
static int gains_sound(const kvt_snap_shape *shape, const unsigned char *gains)
{
    uint32_t bad = 0, i;
    for (i = 0; i < shape->gains; i++) {
        uint32_t x = gains[2 * i] | (uint32_t)gains[2 * i + 1] << 8;
        bad |= x > 255 || x < shape->least_gain;
    }
    return !bad;
}

/* V of 4 and 5 bits: 1 when nothing is set where there is no token, or no dim. */
static int dead_bits_zero(const kvt_snap_shape *shape, const unsigned char *stream)
{
    size_t live = shape->tokens % 8, runs = (shape->tokens + (size_t)7) / 8;
    size_t row = (size_t)shape->dims * 4, h, i, d, half;
    uint32_t mask = live ? ~kvt_snap_live_bits(4, live) : 0, any = 0;
    uint64_t fifth = 0;

    for (h = 0; h < shape->heads; h++) {
        for (i = 0; i < row; i += 4)
            any |= kvt_get32(stream + (runs - 1) * row + i) & mask;
        stream += runs * row;
        for (i = 0; shape->bits == 5 && i < shape->tokens; i += 8)
            for (d = 0; d < shape->dims; d += 16)
                for (half = 0; half < 2; half++, stream += 8)
                    fifth |= kvt_get64(stream) &
                             ~kvt_snap_live_fifths(shape->tokens - i, half, shape->dims - d);
    }
    return any == 0 && fifth == 0;
}

/* 1 when every lane without a token is zero. */
static int dead_lanes_zero(const kvt_snap_shape *shape, const unsigned char *stream)
{
    size_t is_k = shape->kind == KVT_SNAP_KIND_K;
    size_t lanes = is_k ? KVT_TILE_TOKENS : 4; /* tokens that lie together */
    size_t live = shape->tokens % lanes;
    size_t lane = is_k && shape->element == 1 ? 4 : shape->element;
    size_t tokens = kvt_round_up(shape->tokens, lanes);
    size_t head = tokens * shape->dims * shape->bits / 8; /* bytes */
    size_t last = lanes * shape->dims * shape->bits / 8, h, i, j;
    unsigned char any = 0;

    if (!is_k && shape->bits < 8)
        return dead_bits_zero(shape, stream);
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
        return kvt_snap_none_negative32(stream, bytes) ? NULL : "a negative position";
    case KVT_SNAP_KIND_SHIFTS: {
        size_t i;
        for (i = 0; i < bytes; i += 4)
            if (kvt_get32(stream + i) == 0x80000000u)
                return "a shift of -2^31";
        return NULL;
    }
    case KVT_SNAP_KIND_SCALES:
        if (!kvt_snap_none_negative16(stream + shape->signs * (size_t)2,
                                      (shape->plain - shape->signs) * (size_t)2))
            return "a negative scale";
        if (!gains_sound(shape, stream + bytes - shape->gains * (size_t)2))
            return "a gain that is none";
        if (!kvt_snap_all_powers16(stream, shape->powers * (size_t)2))
            return "an open block's scale that is no power of two from 1 to 32768";
        return kvt_snap_all_finite16(stream, bytes) ? NULL : "a scale or offset that is not finite";
    default: break;
    }
    if (!dead_lanes_zero(shape, stream))
        return "a value where there is no token";
    if (shape->bits < 8)
        return NULL;
    if (shape->element == 1)
        return kvt_snap_none_minus_128(stream, bytes) ? NULL : "a code of -128";
    return (shape->element == 2 ? kvt_snap_all_finite16 : kvt_snap_all_finite32)(stream, bytes)
               ? NULL
               : "a value that is not finite";
}

/* The largest magnitude of a row of K's tile, a lane a token, or of V: f16 without signs. */
static void largest_in_tile(const unsigned char *tile, size_t dims, int16_t *largest)
{
    int16_t x[KVT_TILE_TOKENS], most[KVT_TILE_TOKENS] = {0};
    size_t d, t;

    for (d = 0; d < dims; d++) {
        memcpy(x, tile + d * sizeof x, sizeof x);
        for (t = 0; t < KVT_TILE_TOKENS; t++) {
            x[t] &= 0x7fff;
            most[t] = x[t] > most[t] ? x[t] : most[t];
        }
    }
    memcpy(largest, most, sizeof most);
}

static int16_t largest_in_row(const unsigned char *row, size_t dims)
{
    int16_t largest = 0, x;
    size_t d;

    for (d = 0; d < dims; d++) {
        memcpy(&x, row + d * sizeof x, sizeof x);
        x &= 0x7fff;
        largest = x > largest ? x : largest;
    }
    return largest;
}

/* Nearly all rows have a scale with which no f16 is too large: the codes are not looked at. */
const char *kvt_snap_rows_fault(const kvt_snap_rows *rows)
{
    int16_t largest[KVT_TILE_TOKENS];
    size_t t, in_tile = KVT_TOKENS; /* tokens of K's tile in largest[] begin here */

    if (rows->form == KVT_OPEN && /* one bound for all rows */
        65504.0f * kvt_f16_to_f32((uint16_t)largest_in_row(rows->scales, rows->tokens)) <=
            kvt_open_largest(rows->side, rows->type, rows->form, KVT_F16_ONE, 0))
        return NULL;
    for (t = 0; t < rows->tokens; t++) {
        uint16_t scale = (uint16_t)(rows->scales[2 * t] | rows->scales[2 * t + 1] << 8);
        uint8_t gain = rows->gains ? rows->gains[t * rows->gain_bytes] : 0;
        float most = kvt_open_largest(rows->side, rows->type, rows->form, scale, gain);
        float magnitude = kvt_f16_to_f32(scale & (uint16_t)~KVT_F16_MINUS);
        int16_t code;
        if (65504.0f * magnitude <= most)
            continue;
        if (rows->side == KVT_SIDE_V) {
            code = largest_in_row(rows->codes + t * rows->dims * 2, rows->dims);
        } else {
            if (in_tile != t - t % KVT_TILE_TOKENS) {
                in_tile = t - t % KVT_TILE_TOKENS;
                largest_in_tile(rows->codes + in_tile * rows->dims * 2, rows->dims, largest);
            }
            code = largest[t % KVT_TILE_TOKENS];
        }
        if (kvt_f16_to_f32((uint16_t)code) * magnitude > most)
            return "an open row's value that is too large";
    }
    return NULL;
}

const char *kvt_snap_check_rows(const kvt_snap_shape *shapes, uint32_t n,
                                const unsigned char *streams)
{
    const kvt_snap_shape *small = &shapes[n - 1];
    const unsigned char *codes = streams, *scales = streams, *gains = NULL;
    const char *fault = NULL;
    uint32_t i, h;

    if (!kvt_is_open(shapes[0].form) || small->kind != KVT_SNAP_KIND_SCALES)
        return NULL;
    for (i = 0; i + 1 < n; i++)
        scales += shapes[i].bytes;
    if (small->gains)
        gains = scales + small->bytes - small->gains * (size_t)2;
    for (i = 0; i + 1 < n && !fault; codes += shapes[i++].bytes) {
        const kvt_snap_shape *s = &shapes[i];
        kvt_snap_rows rows = {s->kind == KVT_SNAP_KIND_K ? KVT_SIDE_K : KVT_SIDE_V,
                              s->type,
                              s->form,
                              s->tokens,
                              s->dims,
                              codes,
                              scales,
                              gains,
                              2};
        size_t head = s->bytes / s->heads;
        if (!kvt_is_sealed_type(s->type))
            continue;
        for (h = 0; h < s->heads && !fault; h++) {
            fault = kvt_snap_rows_fault(&rows);
            rows.codes += head;
            rows.scales += s->tokens * (size_t)2;
            if (gains)
                rows.gains += s->tokens * (size_t)2;
        }
        scales = rows.scales;
    }
    return fault;
}
