/*
 * docs/numerics.md, implemented a second time from its text and compared bit for bit with what
 * kvt_read gives: conversions, open and sealed rows, offsets, rotations, truncation; on every
 * instruction set and under a hostile floating-point environment.
 */
#include "support.h"

#include <fenv.h>
#include <math.h>
#include <stdio.h>

#if defined(__SSE2_MATH__)
#include <xmmintrin.h>
#endif

/* ---- f16 by arithmetic in double, not by bits ---- */

/* x rounded to a multiple of the f16 step at its magnitude; up: toward +infinity. */
static double to_f16(double x, int up)
{
    int exponent;
    double step, scaled;
    if (x == 0)
        return x;
    frexp(x, &exponent); /* |x| in [2^(e-1), 2^e) */
    step = ldexp(1.0, (exponent < -13 ? -13 : exponent) - 11);
    scaled = x / step;
    return (up ? ceil(scaled) : nearbyint(scaled)) * step;
}

static float saturate(double x)
{
    double h = to_f16(x, 0);
    return (float)(h > 65504 ? 65504 : h < -65504 ? -65504 : h);
}

/* ---- rotation ---- */

static uint64_t splitmix(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* first: where the side's signs begin in the stream. */
static float sign_of(uint64_t seed, uint64_t first, size_t dim, size_t head, size_t d)
{
    size_t words = (dim + 63) / 64;
    return splitmix(seed, first + head * words + d / 64) >> d % 64 & 1 ? -1.0f : 1.0f;
}

static int log2_block(size_t dim)
{
    int log2 = 0;
    while (dim % 2 == 0) {
        dim /= 2;
        log2++;
    }
    return log2;
}

static void butterflies(float *x, size_t dim)
{
    size_t block = (size_t)1 << log2_block(dim);
    for (size_t h = 1; h < block; h *= 2)
        for (size_t i = 0; i < dim; i++)
            if (!(i & h)) {
                volatile float sum = x[i] + x[i + h], difference = x[i] - x[i + h];
                x[i] = sum;
                x[i + h] = difference;
            }
}

/* ---- the model of one head's K or V ---- */

enum { MAX_DIM = 1024, MAX_BLOCKS = 12, MAX_ROWS = 64 * MAX_BLOCKS };

typedef struct model {
    size_t dim, head, window;
    size_t fine; /* blocks that are sealed as i8 whatever the type */
    kvt_type type;
    int is_v, rotates, offsets;
    int seals, reopens; /* the group's K is i4: what a truncate cuts is open again */
    uint64_t seed, first_sign;
    float sign[MAX_DIM];
    size_t length;
    /* Of a block: */
    int sealed[MAX_BLOCKS];
    int fresh[MAX_BLOCKS]; /* sealed by the last commit's last 64 tokens; none has begun since */
    float a[MAX_BLOCKS][MAX_DIM], offset[MAX_BLOCKS][MAX_DIM];
    float step[MAX_BLOCKS][MAX_DIM]; /* K of 4 bits: the scale of each dim */
    /* Where it has been sealed before: */
    float had_offset[MAX_BLOCKS][MAX_DIM], had_step[MAX_BLOCKS][MAX_DIM];
    /* Of a row, in the stored domain: */
    float open[MAX_ROWS][MAX_DIM]; /* f16 * |s|; where nothing is sealed, the row as stored */
    int bare[MAX_ROWS];            /* an open row without the offset */
    float row[MAX_ROWS][MAX_DIM];  /* code * scale */
    int kept[MAX_ROWS];            /* an open row of 4-bit V that keeps its codes */
    int gain[MAX_ROWS];            /* of a sealed row of 4-bit K */
    int had_gain[MAX_ROWS];        /* of an open one that has been sealed before, else 0 */
} model;

static float add(float x, float y)
{
    volatile float sum = x + y;
    return sum;
}

static float times(float x, float y)
{
    volatile float product = x * y;
    return product;
}

static float over(float x, float y)
{
    volatile float quotient = x / y;
    return quotient;
}

static void model_init(model *m, const kvt_group_config *g, int is_v, size_t head)
{
    memset(m, 0, sizeof *m);
    m->dim = is_v ? g->v_dim : g->k_dim;
    m->type = is_v ? g->v_type : g->k_type;
    m->head = head;
    m->is_v = is_v;
    m->window = g->residual_tokens == KVT_RESIDUAL_NONE ? 0
                : g->residual_tokens == 0               ? KVT_RESIDUAL_TOKENS
                                                        : g->residual_tokens;
    m->fine = g->k_type <= KVT_TYPE_I8 && g->v_type <= KVT_TYPE_I8 ? 0
              : g->fine_tokens == KVT_FINE_NONE                    ? 0
              : g->fine_tokens == 0                                ? KVT_FINE_TOKENS / 64
                                                                   : (g->fine_tokens + 63) / 64;
    m->seals = m->type == KVT_TYPE_I8 || m->type == KVT_TYPE_I4 || m->type == KVT_TYPE_I5;
    m->rotates = is_v ? m->seals && !(g->flags & KVT_GROUP_NO_V_ROTATION)
                      : m->type == KVT_TYPE_I8 && !(g->flags & KVT_GROUP_NO_ROTATION);
    m->offsets = m->seals && !is_v && !(g->flags & KVT_GROUP_NO_OFFSET);
    m->reopens = g->k_type == KVT_TYPE_I4;
    m->seed = g->rotation_seed;
    for (size_t d = 0; d < m->dim; d++)
        m->sign[d] = sign_of(m->seed, is_v ? (uint64_t)1 << 32 : 0, m->dim, head, d);
}

static void rotate(const model *m, const float *x, float *y)
{
    int log2 = log2_block(m->dim);
    memcpy(y, x, m->dim * sizeof *y);
    if (!m->rotates)
        return;
    for (size_t d = 0; d < m->dim; d++)
        y[d] = y[d] * m->sign[d];
    butterflies(y, m->dim);
    for (size_t d = 0; d < m->dim; d++)
        y[d] = times(y[d], ldexpf(1.0f, -(log2 / 2)));
}

static void unrotate(const model *m, float *x)
{
    int log2 = log2_block(m->dim);
    if (!m->rotates)
        return;
    butterflies(x, m->dim);
    for (size_t d = 0; d < m->dim; d++)
        x[d] = times(x[d], ldexpf(1.0f, -(log2 - log2 / 2))) * m->sign[d];
}

/* Over all that a test has sealed: */
static int most_left_out;
static int most_nudged;         /* codes off the nearest */
static int bare_with_count[65]; /* blocks by their rows without offset */

/* "Sealed rows"; along: rounded so that the error along the row cancels. */
static void quantize(const float *w, size_t dim, int along, float *stored)
{
    float absmax = 0, scale, reciprocal, v[MAX_DIM], squares = 0, gain, projection = 0;
    for (size_t d = 0; d < dim; d++)
        absmax = fabsf(w[d]) > absmax ? fabsf(w[d]) : absmax;
    scale = (float)to_f16((double)over(absmax, 127.0f), 1);
    assert_true(scale <= 65504);
    reciprocal = scale > 0 ? over(1.0f, scale) : 0.0f;
    for (size_t d = 0; d < dim; d++) {
        v[d] = times(w[d], reciprocal);
        squares = fmaf(v[d], v[d], squares);
    }
    gain = over(1.0f, squares / 8 > 16129.0f ? squares / 8 : 16129.0f);
    for (size_t d = 0; d < dim; d++) {
        float q = times(projection, gain);
        int code;
        q = q > 0x1.f8p-9f ? 0x1.f8p-9f : q < -0x1.f8p-9f ? -0x1.f8p-9f : q;
        code = (int)nearbyint((double)(along ? fmaf(-v[d], q, v[d]) : v[d]));
        projection = fmaf(add((float)code, -v[d]), v[d], projection);
        assert_in_range(code + 127, 0, 254);
        most_nudged = abs(code - (int)nearbyint((double)v[d])) > most_nudged ? 1 : most_nudged;
        stored[d] = (float)code * scale;
    }
}

/* "Sealed rows of 4-bit V": magnitudes of the levels, and the middles between them. */
static const int magnitudes[8] = {3, 9, 15, 22, 29, 37, 48, 63};
static const int middles[3][7] = {
    {12, 24, 37, 51, 66, 85, 111}, {11, 22, 34, 46, 60, 78, 102}, {10, 20, 31, 42, 55, 71, 93}};
static int chosen[3]; /* scales of rows that each of the three searches gave */

static int level_of(int half_levels, const int *middle)
{
    int m = 0;
    while (m < 7 && half_levels > middle[m])
        m++;
    return magnitudes[m];
}

/* padding: dims of zeros that count in the search of the scale. */
static void quantize_v4(const float *x, size_t dim, size_t padding, float *stored)
{
    float largest = 0, scale = 0, best = -1, step = 0, reciprocal;
    int which = 0;
    for (size_t d = 0; d < dim; d++)
        largest = fabsf(x[d]) > largest ? fabsf(x[d]) : largest;
    if (largest >= 0x1p-100f) {
        float units = over(126.0f, largest);
        for (int set = 0; set < 3; set++) {
            int dot = 0, square = 9 * (int)padding;
            float gain;
            for (size_t d = 0; d < dim; d++) {
                int u = (int)nearbyintf(times(fabsf(x[d]), units));
                dot += u * level_of(u, middles[set]);
                square += level_of(u, middles[set]) * level_of(u, middles[set]);
            }
            gain = over(times((float)dot, (float)dot), (float)square);
            if (gain > best) {
                best = gain;
                step = over((float)dot, (float)square);
                which = set;
            }
        }
        chosen[which]++;
        scale = (float)to_f16((double)over(times(step, largest), 126.0f), 0);
        scale = scale > 0 ? scale : 0x1p-24f;
        assert_true(scale <= 65504);
    }
    reciprocal = scale > 0 ? over(2.0f, scale) : 0.0f;
    for (size_t d = 0; d < dim; d++) {
        float half = times(fabsf(x[d]), reciprocal);
        int level = level_of(half < 127 ? (int)nearbyintf(half) : 127, middles[0]);
        stored[d] = (float)(signbit(x[d]) ? -level : level) * scale;
    }
}

/* "Sealed rows of 5-bit V" */
static void quantize_v5(const float *x, size_t dim, float *stored)
{
    float largest = 0, scale, reciprocal;
    for (size_t d = 0; d < dim; d++)
        largest = fabsf(x[d]) > largest ? fabsf(x[d]) : largest;
    scale = (float)to_f16((double)over(largest, 31.0f), 1);
    assert_true(scale <= 65504);
    reciprocal = scale > 0 ? over(0.5f, scale) : 0.0f;
    for (size_t d = 0; d < dim; d++) {
        int code = (int)nearbyintf(add(times(x[d], reciprocal), 15.5f));
        assert_in_range(code, 0, 31);
        stored[d] = (float)(2 * code - 31) * scale;
    }
}

static int gains_seen[256]; /* rows of 4-bit K by their gain */
static int dims_seen[2];    /* dims of its blocks: whose offset the gain multiplies, and others */

/* What of the offset the gain multiplies. */
static float along_of(float offset, float step)
{
    return fabsf(offset) <= times(32, step) ? offset : 0;
}

static float gain_of(int gain)
{
    return 1 + (float)(gain - 128) / 1024;
}

/* "Sealing K of 4 bits", steps 5 to 7: codes as multiples of the dims' steps; the gain. */
static int quantize_k4(const float *w, size_t dim, const float *step, const float *offset,
                       float *stored)
{
    float squares = 0, products = 0, gain = 0;
    for (size_t d = 0; d < dim; d++) {
        const float along = along_of(offset[d], step[d]);
        const float key = add(w[d], along);
        float code = times(w[d], step[d] > 0 ? over(1.0f, step[d]) : 0.0f);
        code = code > 7.5f ? 7.5f : code < -7.5f ? -7.5f : code;
        code = nearbyintf(add(code, 7.5f));
        assert_in_range((int)code, 0, 15);
        stored[d] = (code - 7.5f) * step[d];
        squares = fmaf(key, key, squares);
        products = fmaf(add(stored[d], along), key, products);
    }
    if (products > 0)
        gain = times(add(over(squares, products), -1), 1024);
    gain = add(gain, 128);
    return (int)nearbyintf(gain < 1 ? 1 : gain > 255 ? 255 : gain);
}

/* The value of a sealed row of 4-bit K: its codes' multiples, gain and offset. */
static float k4_value(const model *m, size_t token, size_t d)
{
    const size_t block = token / 64;
    const float gain = gain_of(m->gain[token]), offset = m->offset[block][d];
    if (offset != 0 && along_of(offset, m->step[block][d]) == 0)
        return add(times(m->row[token][d], gain), offset);
    return times(add(m->row[token][d], offset), gain);
}

/* The base that most rows of a full block have: 0 (1), or the offset (0). */
static int most_are_bare(const model *m, size_t block)
{
    int n = 0;
    for (size_t t = 0; t < 64; t++)
        n += m->bare[64 * block + t];
    return n > 32;
}

/* The sum of 64 rows that are not left out, dim d, divided by their number; NULL is zero. */
static float mean_of(const float *const *rows, size_t d, const int *out, int n)
{
    float lane[16], x[64];
    for (size_t t = 0; t < 64; t++)
        x[t] = (out && out[t]) || !rows[t] ? 0 : rows[t][d];
    for (size_t j = 0; j < 16; j++)
        lane[j] = add(add(add(x[j], x[16 + j]), x[32 + j]), x[48 + j]);
    for (size_t h = 8; h; h /= 2)
        for (size_t j = 0; j < h; j++)
            lane[j] = add(lane[j], lane[j + h]);
    return over(lane[0], (float)n);
}

/* "Sealing", steps 1 to 5: the offset that a full open block gets. How many are left out. */
static int sealed_offset(const model *m, size_t block, float *offset)
{
    float mean[MAX_DIM], dist[64], sorted[64];
    const float *rows[64];
    int out[64], left = 0, bare = most_are_bare(m, block);
    for (size_t t = 0; t < 64; t++)
        rows[t] = m->bare[64 * block + t] == bare ? m->open[64 * block + t] : NULL;
    for (size_t d = 0; d < m->dim; d++)
        mean[d] = mean_of(rows, d, NULL, 64);
    for (size_t t = 0; t < 64; t++) {
        dist[t] = 0;
        for (size_t d = 0; d < m->dim; d++) {
            float away = add(rows[t] ? rows[t][d] : 0, -mean[d]);
            dist[t] = add(dist[t], times(away, away));
        }
        sorted[t] = dist[t];
    }
    for (size_t i = 1; i < 64; i++)
        for (size_t j = i; j && sorted[j - 1] > sorted[j]; j--) {
            float swap = sorted[j];
            sorted[j] = sorted[j - 1];
            sorted[j - 1] = swap;
        }
    for (size_t t = 0; t < 64; t++)
        left += out[t] = dist[t] > times(16.0f, sorted[31]);
    for (size_t d = 0; d < m->dim; d++) {
        if (left)
            mean[d] = mean_of(rows, d, out, 64 - left);
        offset[d] = saturate((double)(bare ? mean[d] : add(mean[d], m->a[block][d])));
    }
    return left;
}

/* "Open rows" */
static void open_row(const float *z, size_t dim, float *x)
{
    float most = 0, s = 1;
    for (size_t d = 0; d < dim; d++)
        most = fabsf(z[d]) > most ? fabsf(z[d]) : most;
    while (most / s >= 65520)
        s *= 2;
    for (size_t d = 0; d < dim; d++)
        x[d] = (float)to_f16((double)over(z[d], s), 0) * s;
}

/*
 * z = y - a, or y, where that is much the smaller one: then 1, a row without offset. a is unused
 * for V and where there is none.
 */
static int center(const model *m, const float *a, float *z)
{
    float most = 0, far = 0;
    if (!m->offsets)
        return 0;
    for (size_t d = 0; d < m->dim; d++) {
        float away = fabsf(add(z[d], -a[d]));
        most = fabsf(z[d]) > most ? fabsf(z[d]) : most;
        far = away > far ? away : far;
    }
    if (8 * most < far)
        return 1;
    for (size_t d = 0; d < m->dim; d++)
        z[d] = add(z[d], -a[d]);
    return 0;
}

/* Dims of blocks that were sealed again: as they were, moved, clipped, anew. */
static int ways[4];

static int is_within(float middle, float step, float lo, float hi, float steps)
{
    return add(hi, -middle) <= times(steps, step) && add(middle, -lo) <= times(steps, step);
}

/* Open rows of a block without the gains of those that have been sealed before. */
static struct {
    float open[64][MAX_DIM];
    int bare[64], again; /* again: there are such */
} taken;

static void take_gains(const model *m, size_t block)
{
    taken.again = 0;
    for (size_t i = 0; i < 64; i++) {
        const size_t t = 64 * block + i;
        float z[MAX_DIM];
        memcpy(taken.open[i], m->open[t], sizeof z);
        taken.bare[i] = m->bare[t];
        if (!m->had_gain[t])
            continue;
        taken.again = 1;
        for (size_t d = 0; d < m->dim; d++) {
            const float offset = m->had_offset[block][d];
            const float along = along_of(offset, m->had_step[block][d]);
            z[d] = add(m->open[t][d], m->bare[t] ? 0 : m->a[block][d]);
            z[d] = over(add(z[d], -add(offset, -along)), gain_of(m->had_gain[t]));
            z[d] = add(add(z[d], -along), offset);
        }
        taken.bare[i] = center(m, m->a[block], z);
        open_row(z, m->dim, taken.open[i]);
    }
}

/* "Sealing K of 4 bits": the middle of each dim's range, and the step that reaches its ends. */
static void choose_k4(const model *m, size_t block, float *offset, float *step)
{
    take_gains(m, block);
    for (size_t d = 0; d < m->dim; d++) {
        float lo = INFINITY, hi = -INFINITY, middle, above, below;
        for (size_t t = 0; t < 64; t++) {
            float y = add(add(taken.open[t][d], taken.bare[t] ? 0 : m->a[block][d]), 0.0f);
            lo = y < lo ? y : lo;
            hi = y > hi ? y : hi;
        }
        middle = saturate((double)times(0.5f, add(lo, hi)));
        above = add(hi, -middle), below = add(middle, -lo);
        step[d] = (float)to_f16((double)over(above > below ? above : below, 7.5f), 1);
        assert_true(step[d] <= 65504);
        offset[d] = middle;
        if (taken.again && m->had_step[block][d] > 0) {
            float had = m->had_step[block][d], at = m->had_offset[block][d];
            float moved = add(at, times(had, nearbyintf(over(add(middle, -at), had))));
            double to = to_f16((double)moved, 0);
            int way = is_within(at, had, lo, hi, 7.75f)                               ? 0
                      : fabs(to) <= 65504 && is_within((float)to, had, lo, hi, 7.75f) ? 1
                      : is_within(at, had, lo, hi, 13)                                ? 2
                                                                                      : 3;
            ways[way]++;
            if (way < 3) {
                step[d] = had;
                offset[d] = way == 1 ? (float)to : at;
            }
        }
    }
}

enum { SEALED = 1, FINE = 2 };

/* The offset that a full open block has once it is sealed. */
static void offset_to_be(const model *m, size_t block, float *offset)
{
    float step[MAX_DIM];
    if (m->type == KVT_TYPE_I4 && block >= m->fine)
        choose_k4(m, block, offset, step);
    else
        (void)sealed_offset(m, block, offset);
}

/* Not K of 4 bits. along: see quantize. padding: see quantize_v4. */
static void quantize_row(model *m, int form, const float *w, size_t token, int along,
                         size_t padding)
{
    float *row = m->row[token];
    if (m->type == KVT_TYPE_I8 || form == FINE)
        quantize(w, m->dim, along, row);
    else if (m->type == KVT_TYPE_I5)
        quantize_v5(w, m->dim, row);
    else
        quantize_v4(w, m->dim, padding, row);
}

/* What has been sealed before keeps its gain. */
static void seal_k4_row(model *m, const float *w, size_t token)
{
    const size_t block = token / 64;
    m->gain[token] = quantize_k4(w, m->dim, m->step[block], m->offset[block], m->row[token]);
    gains_seen[m->gain[token]]++;
    if (m->had_gain[token])
        m->gain[token] = m->had_gain[token];
    for (size_t d = 0; d < m->dim; d++)
        dims_seen[along_of(m->offset[block][d], m->step[block][d]) != m->offset[block][d]]++;
}

static void seal(model *m, size_t block)
{
    float w[MAX_DIM];
    int form = block < m->fine ? FINE : SEALED;
    int coarse_k = m->type == KVT_TYPE_I4 && !m->is_v && form == SEALED;
    if (coarse_k) {
        choose_k4(m, block, m->offset[block], m->step[block]);
    } else if (m->offsets) {
        int left = sealed_offset(m, block, m->offset[block]), bare = 0;
        for (size_t t = 64 * block; t < 64 * block + 64; t++)
            bare += m->bare[t];
        bare_with_count[bare]++;
        most_left_out = left > most_left_out ? left : most_left_out;
    }
    for (size_t t = 64 * block; t < 64 * block + 64; t++) {
        const float *x = coarse_k ? taken.open[t % 64] : m->open[t];
        const int bare = coarse_k ? taken.bare[t % 64] : m->bare[t];
        for (size_t d = 0; d < m->dim; d++)
            w[d] = !m->offsets ? x[d]
                               : add(x[d], add(bare ? 0 : m->a[block][d], -m->offset[block][d]));
        if (coarse_k)
            seal_k4_row(m, w, t);
        else if (!m->kept[t])
            quantize_row(m, form, w, t, !m->is_v, m->dim % 16);
    }
    m->sealed[block] = form;
}

/*
 * What a row is less the offset of open rows, as it would be appended now, into a sealed block too.
 * Sets the block's offset.
 */
static void model_centre(model *m, size_t token, const float *x, float *z)
{
    size_t block = token / 64;
    const float *a = m->sealed[block] && token % 64 ? m->offset[0] : m->a[block];
    if (token % 64 == 0)
        m->sealed[block] = 0;
    rotate(m, x, z);
    if (!m->offsets)
        return;
    if (token == 0)
        for (size_t d = 0; d < m->dim; d++)
            m->a[0][d] = saturate((double)z[d]);
    else if (token % 64 == 0 && m->sealed[0])
        memcpy(m->a[block], m->offset[0], sizeof m->offset[0]);
    else if (token % 64 == 0)
        offset_to_be(m, 0, m->a[block]);
    m->bare[token] = center(m, a, z);
}

/* "Tokens behind a cut in a sealed block" */
static void model_fill(model *m, size_t token)
{
    const float *offset = m->offset[token / 64];
    float w[MAX_DIM];
    for (size_t d = 0; d < m->dim; d++)
        w[d] = !m->offsets
                   ? m->open[token][d]
                   : add(m->open[token][d], add(m->bare[token] ? 0 : m->offset[0][d], -offset[d]));
    quantize_row(m, m->sealed[token / 64], w, token, 0, 0);
}

/* "Behind a cut in a block of 4-bit K": what is left of it is open again. */
static void model_reopen(model *m)
{
    size_t block = m->length / 64;
    if (!m->reopens || m->length % 64 == 0 || m->sealed[block] != SEALED)
        return;
    m->sealed[block] = 0;
    memcpy(m->had_offset[block], m->offset[block], sizeof m->offset[block]);
    memcpy(m->had_step[block], m->step[block], sizeof m->step[block]);
    memcpy(m->a[block], m->offset[0], sizeof m->a[block]);
    for (size_t t = 64 * block; t < m->length; t++) {
        float z[MAX_DIM];
        if (m->is_v) {
            memcpy(m->open[t], m->row[t], sizeof m->open[t]);
            m->kept[t] = m->type == KVT_TYPE_I4;
            continue;
        }
        for (size_t d = 0; d < m->dim; d++)
            z[d] = k4_value(m, t, d);
        m->bare[t] = center(m, m->a[block], z);
        open_row(z, m->dim, m->open[t]);
        m->had_gain[t] = m->gain[t];
    }
}

static void model_begin(model *m)
{
    memset(m->fresh, 0, sizeof m->fresh);
    model_reopen(m);
}

/* One step of n rows: begin, append, commit. */
static void model_step(model *m, const float *rows, size_t stride, size_t n)
{
    model_begin(m);
    for (size_t i = 0; i < n; i++) {
        size_t token = m->length + i, block = token / 64;
        const float *x = rows + i * stride;
        float z[MAX_DIM];
        m->kept[token] = m->had_gain[token] = 0;
        if (!m->seals) {
            for (size_t d = 0; d < m->dim; d++)
                m->open[token][d] = m->type == KVT_TYPE_F32 ? x[d] : (float)to_f16((double)x[d], 0);
            continue;
        }
        model_centre(m, token, x, z);
        open_row(z, m->dim, m->open[token]);
        if (m->sealed[block])
            model_fill(m, token);
    }
    m->length += n;
    for (size_t block = 0; 64 * (block + 1) + m->window <= m->length; block++)
        if (m->seals && !m->sealed[block]) {
            seal(m, block);
            m->fresh[block] = 64 * (block + 1) + m->window + 64 > m->length;
        }
}

static void model_truncate(model *m, size_t n)
{
    for (size_t block = 0; block < MAX_BLOCKS; block++)
        if (m->fresh[block] && 64 * (block + 1) + m->window > n)
            m->sealed[block] = m->fresh[block] = 0;
    m->length = n;
}

static void model_read(const model *m, size_t token, float *x)
{
    size_t block = token / 64;
    const float *y = m->sealed[block] ? m->row[token] : m->open[token];
    for (size_t d = 0; d < m->dim; d++) {
        x[d] = y[d];
        if (m->type == KVT_TYPE_I4 && !m->is_v && m->sealed[block] == SEALED)
            x[d] = k4_value(m, token, d);
        else if (m->offsets && (m->sealed[block] || !m->bare[token]))
            x[d] = add(x[d], m->sealed[block] ? m->offset[block][d] : m->a[block][d]);
    }
    unrotate(m, x);
}

/* ---- the comparison ---- */

static unsigned set_hostile_environment(void)
{
    unsigned saved = 0;
#if defined(__SSE2_MATH__)
    saved = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x4000 | 0x8040); /* toward +infinity, flush to zero, denormals are zero */
#else
    fesetround(FE_UPWARD);
#endif
    return saved;
}

static void restore_environment(unsigned saved)
{
#if defined(__SSE2_MATH__)
    _mm_setcsr(saved);
#else
    (void)saved;
    fesetround(FE_TONEAREST);
#endif
}

/* ---- one sequence and its models ---- */

/* Kinds of rows: BARE_KIND to EIGHTH_KIND have keys without offset: see make_rows. */
enum { HEADS = 2, BARE_KIND = 8, EIGHTH_KIND = 14, FLAT_KIND = 15, BIAS_KIND = 16, N_KINDS = 17 };

static model models[2][HEADS]; /* [is V] */

typedef struct subject {
    const char *isa;
    kvt_group_config g;
    kvt_cache *cache;
    kvt_seq *seq;
    tokens t;
    float *read;
    int hostile;
} subject;

/*
 * Rows of K whose 64 distances are exact: those of all but three tokens of a block are M, one is
 * 16 M, which stays, one a bit more, which goes; the mean of all is zero. Small integers: neither
 * the rotation nor the sums round.
 */
static double at_the_threshold(size_t t, size_t d)
{
    double p = d * 2654435761u >> 7 & 1 ? 1 : -1;
    switch (t % 64) {
    case 5: return 4 * p;
    case 6: return d ? -4 * p : -5 * p;
    case 7: return d ? p : 2 * p;
    default: return t % 2 ? p : -p;
    }
}

/* Where the scale of an open row goes up; exact where there is neither rotation nor offset. */
static double at_the_scale(size_t t, size_t d, double x)
{
    static const double most[] = {65504, 65512, 65519.99, 65520, 65536, 131039.98, 131040, 131050};
    if (d == (t + 1) % 8)
        return ldexp(3, -24); /* f16's subnormals show the scale */
    return d == t % 8 ? (t % 3 ? most[t / 8 % 8] : -most[t / 8 % 8]) : x * 1000;
}

/*
 * Keys that have no offset as long as their block is open, beside a first one that is 100 times
 * larger: x if the token is such a one, else about the first one's x0; p is 1 or -1.
 */
static double without_offset(int kind, size_t t, double x0, double x, double p)
{
    /* How many of block 0, of the blocks behind it; the first key always has the offset. */
    static const unsigned char counts[][3] = {{63, 63, 63}, {1, 33, 62}, {31, 32, 64},
                                              {32, 1, 31},  {33, 0, 1},  {62, 0, 62}};
    if (kind == EIGHTH_KIND) /* at 8 it has one, below it has none; a few ulps about 9 / 7, too */
        return t == 0       ? 9 * p
               : t % 4 == 1 ? p
               : t % 4 == 2 ? p * (1 - ldexp(1, -12))
               : t % 8 == 3 ? -p
               : t % 8 == 7 ? -9.0 / 7 * p * (1 + ((double)(t / 8 % 7) - 3) * ldexp(1, -23))
                            : 9 * p + x / 8;
    if (t * 37 % 64 >= 64u - counts[kind - BARE_KIND][t / 64 % 3])
        return t % 5 == 4 ? 0 : x;
    return 100 * x0 + (t ? x : 0);
}

/* What the rows are like: see kind. */
static void make_rows(subject *s, rng *r, size_t n, int kind, double size)
{
    size_t dims[2] = {s->g.k_dim, s->g.v_dim};
    double first[HEADS][MAX_DIM];
    s->t = tokens_make(r, n, &s->g);
    for (int side = 0; side < 2; side++) {
        float *rows = side ? s->t.v : s->t.k;
        size_t dim = dims[side];
        for (size_t i = 0; i < n * HEADS; i++)
            for (size_t d = 0; d < dim; d++) {
                size_t t = i / HEADS;
                double x = (double)rows[i * dim + d];
                if (kind >= 1 && kind < 5 && side == 0 && d % 17 == 3)
                    x += 30; /* channels with an offset */
                if (kind == 2 && (t == 0 || t % 23 == 7))
                    x *= 40;   /* tokens far away */
                if (kind == 3) /* half of a block far away, on both sides of the mean */
                    x = t % 2 ? x * 0.01 : t % 4 ? 50 + x : -50 - x;
                if (kind == 4 && t % 9) /* most tokens are alike */
                    x = (double)(d % 5);
                if (kind == 5) /* about the threshold of being left out */
                    x *= t % 8 == 3 ? 2.8 + 0.2 * (double)(t % 64 / 8) : 1;
                if (kind == 6 && side == 0)
                    x = at_the_threshold(t, d) / size;
                if (kind == 7)
                    x = at_the_scale(t, d, x) / size;
                if (kind == FLAT_KIND &&
                    d % 3 == 0) /* the same in all tokens, or in blocks of them */
                    x = d % 2 ? 1234.567 : (double)(t / 64 % 3);
                if (kind == FLAT_KIND && d % 7 == 5)
                    x = 0;
                if (kind == BIAS_KIND && side == 0)
                    x += d % 5 == 2 ? 120 : d % 5 == 4 ? -120 : 0;
                if (kind >= BARE_KIND && kind <= EIGHTH_KIND && side == 0) {
                    if (t == 0)
                        first[i][d] = x;
                    x = without_offset(kind, t, first[i % HEADS][d], x,
                                       d * 2654435761u >> 7 & 1 ? 1 : -1);
                }
                rows[i * dim + d] = (float)(x * size);
            }
    }
    memset(s->t.v, 0, dims[1] * sizeof *s->t.v); /* a row of zeros */
    for (size_t i = 0; i < n * HEADS && s->g.flags & KVT_GROUP_V_IN_K; i++)
        memcpy(s->t.v + i * dims[1], s->t.k + i * dims[0], dims[1] * sizeof *s->t.v);
}

static void subject_open(subject *s, size_t max_tokens)
{
    size_t dim = s->g.k_dim > s->g.v_dim ? s->g.k_dim : s->g.v_dim;
    s->cache = cache_of(&s->g, max_tokens, 1, s->isa);
    s->seq = NULL;
    expect_ok(s->cache, kvt_seq_create(s->cache, &s->seq));
    s->read = malloc(max_tokens * HEADS * dim * sizeof *s->read);
    assert_non_null(s->read);
    for (int side = 0; side < 2; side++)
        for (size_t head = 0; head < HEADS; head++)
            model_init(&models[side][head], &s->g, side, head);
}

static void subject_close(subject *s)
{
    free(s->read);
    tokens_free(&s->t);
    kvt_seq_destroy(s->seq);
    kvt_cache_destroy(s->cache);
}

static void subject_step(subject *s, size_t first, size_t n)
{
    unsigned saved = s->hostile ? set_hostile_environment() : 0;
    append_step(s->cache, s->seq, &s->g, &s->t, first, n);
    if (s->hostile)
        restore_environment(saved);
    for (int side = 0; side < 2; side++)
        for (size_t head = 0; head < HEADS; head++) {
            model *m = &models[side][head];
            const float *rows = side ? s->t.v : s->t.k;
            if (side == 0 || !(s->g.flags & KVT_GROUP_V_IN_K))
                model_step(m, rows + (first * HEADS + head) * m->dim, HEADS * m->dim, n);
        }
}

static void subject_truncate(subject *s, size_t n)
{
    expect_ok(s->cache, kvt_seq_truncate(s->seq, n));
    for (int side = 0; side < 2; side++)
        for (size_t head = 0; head < HEADS; head++)
            model_truncate(&models[side][head], n);
}

static void subject_check(const subject *s)
{
    size_t length = (size_t)kvt_seq_length(s->seq);
    kvt_tensor out = kvt_tensor_f32(s->read);
    assert_int_equal(length, models[0][0].length);
    for (int side = 0; side < 2 && length; side++) {
        int in_k = side && s->g.flags & KVT_GROUP_V_IN_K;
        size_t dim = side ? s->g.v_dim : s->g.k_dim;
        unsigned saved = s->hostile ? set_hostile_environment() : 0;
        kvt_status status = kvt_read(s->seq, 0, side ? KVT_SIDE_V : KVT_SIDE_K, 0, length, &out);
        if (s->hostile)
            restore_environment(saved);
        expect_ok(s->cache, status);
        for (size_t i = 0; i < length * HEADS; i++) {
            float x[MAX_DIM];
            const float *got = s->read + i * dim;
            const model *m = &models[in_k ? 0 : side][i % HEADS];
            model_read(m, i / HEADS, x);
            if (memcmp(x, got, dim * sizeof *x) != 0)
                for (size_t d = 0; d < dim; d++)
                    if (memcmp(&x[d], &got[d], sizeof x[d]) != 0)
                        fail_msg("isa %s dims %u %u types %d %d flags %u fine %zu window %zu "
                                 "length %zu, "
                                 "side %d token %zu (%s) head %zu dim %zu: model %a, library %a",
                                 s->isa, s->g.k_dim, s->g.v_dim, (int)s->g.k_type, (int)s->g.v_type,
                                 s->g.flags, m->fine, m->window, length, side, i / HEADS,
                                 m->sealed[i / HEADS / 64] ? "sealed" : "open", i % HEADS, d,
                                 (double)x[d], (double)got[d]);
        }
    }
}

static void models_begin(void)
{
    for (int side = 0; side < 2; side++)
        for (size_t head = 0; head < HEADS; head++)
            model_begin(&models[side][head]);
}

/* Appends and truncates of any cut; what is read back is compared after some of them. */
static void check_cuts(const char *isa, const kvt_group_config *g, int hostile, int kind,
                       double size, uint64_t seed)
{
    rng r = {seed};
    size_t total = 200 + rng_below(&r, 260);
    subject s = {.isa = isa, .g = *g, .hostile = hostile};
    s.g.rotation_seed = rng_next(&r);
    subject_open(&s, total);
    make_rows(&s, &r, total, kind, size);
    for (size_t at = 0; at < total;) {
        size_t choice = rng_below(&r, 4), n;
        n = choice == 0 ? 1 : choice == 1 ? 1 + rng_below(&r, 40) : 1 + rng_below(&r, 200);
        n = n > total - at ? total - at : n;
        subject_step(&s, at, n);
        at += n;
        if (rng_below(&r, 3) == 0)
            subject_check(&s);
        if (rng_below(&r, 4) == 0) { /* the same tokens come again, or what they store differs */
            at -= rng_below(&r, 1 + (uint32_t)(at < 150 ? at : 150));
            subject_truncate(&s, at);
            subject_check(&s);
            if (at < total && rng_below(&r, 2)) { /* a step that comes to nothing */
                expect_ok(s.cache,
                          kvt_seq_begin(s.seq, 1 + rng_below(&r, (uint32_t)(total - at)), NULL));
                expect_ok(s.cache, kvt_seq_abort(s.seq));
                models_begin();
                subject_check(&s);
            }
        }
    }
    subject_check(&s);
    subject_close(&s);
}

static const uint32_t windows[] = {0, KVT_RESIDUAL_NONE, 100, 1, 192};
static const double sizes[] = {1, 1e-3, 3e-6, 1e-9, 1e-41, 30, 2e3};

static kvt_group_config any_group(rng *r, uint32_t k_dim, uint32_t v_dim, kvt_type k, kvt_type v)
{
    kvt_group_config g = group_of(1, HEADS, HEADS, k_dim, v_dim, k, v);
    g.residual_tokens = windows[rng_below(r, 5)];
    return g;
}

static void i8_as_specified(void **state)
{
    const uint32_t dims[] = {8, 48, 64, 80, 96, 128, 192, 256, 512, 576};
    const uint32_t flags[] = {0, 1, 2, 3, 8, 9, 11};
    rng r = {11};
    (void)state;
    most_left_out = 0;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (size_t f = 0; f < sizeof flags / sizeof *flags; f++) {
                uint32_t other = dims[rng_below(&r, 10)];
                int kind = (int)rng_below(&r, N_KINDS);
                kvt_group_config g = any_group(&r, dims[d], other, KVT_TYPE_I8, KVT_TYPE_I8);
                if (is_quick() && (d + f + isa) % 5)
                    continue;
                g.flags = flags[f];
                check_cuts(kvt_isa_name(isa), &g, (int)rng_below(&r, 2), kind,
                           kind == 6 || kind == 7 ? 1 : sizes[rng_below(&r, 7)], rng_next(&r));
            }
    /* The edges, on each. */
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d += is_quick() ? 3 : 1) {
            kvt_group_config g = any_group(&r, dims[d], dims[d], KVT_TYPE_I8, KVT_TYPE_I8);
            g.residual_tokens = 1;
            check_cuts(kvt_isa_name(isa), &g, 0, 6, 1, rng_next(&r));
            g.flags = 11;
            check_cuts(kvt_isa_name(isa), &g, 0, 7, 1, rng_next(&r));
        }
    assert_int_equal(most_left_out, 32); /* that many there can be */
    assert_int_equal(most_nudged, 1);
}

/* Rows of K without the offset, read back from open blocks and once these are sealed. */
static void rows_without_offset(void **state)
{
    const unsigned char counts[] = {0, 1, 31, 32, 33, 62, 63, 64};
    const uint32_t dims[] = {128, 48, 576};
    const uint32_t flags[] = {0, 1, 2, KVT_GROUP_V_IN_K};
    rng r = {16};
    (void)state;
    memset(bare_with_count, 0, sizeof bare_with_count);
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int kind = BARE_KIND; kind <= EIGHTH_KIND; kind++)
            for (size_t f = 0; f < 4; f++)
                for (size_t d = 0; d < (is_quick() ? 1 : 3); d++) {
                    if (quick_level() == 2 && ((size_t)kind + f + isa) % 2)
                        continue;
                    kvt_group_config g = group_of(1, HEADS, HEADS, dims[d], 64 * (f == 3) + 64,
                                                  KVT_TYPE_I8, KVT_TYPE_I8);
                    subject s = {.isa = kvt_isa_name(isa), .g = g, .hostile = (int)d & 1};
                    s.g.v_dim = dims[d] < s.g.v_dim ? dims[d] : s.g.v_dim;
                    s.g.flags = flags[f];
                    s.g.residual_tokens = f ? KVT_RESIDUAL_TOKENS : KVT_RESIDUAL_NONE;
                    subject_open(&s, 320);
                    make_rows(&s, &r, 320, kind, 1);
                    subject_step(&s, 0, 1 + rng_below(&r, 63));
                    subject_check(&s);
                    subject_step(&s, models[0][0].length, 64 - models[0][0].length);
                    subject_check(&s);
                    subject_truncate(&s, 40); /* takes it back, where it was sealed */
                    subject_step(&s, 40, 35);
                    subject_check(&s);
                    subject_step(&s, 75, 60);
                    subject_check(&s);
                    subject_step(&s, 135, 120);
                    subject_check(&s);
                    subject_step(&s, 255, 65);
                    subject_check(&s);
                    subject_truncate(&s,
                                     150); /* appended to a sealed block if there is no window */
                    subject_step(&s, 150, 70);
                    subject_check(&s);
                    subject_close(&s);
                }
    for (size_t i = 0; i < sizeof counts; i++)
        if (!bare_with_count[counts[i]])
            fail_msg("no block had %d rows without offset", counts[i]);
}

/*
 * Rows found by a search among millions: a code of each is another one if one of the three fma of
 * "Sealed rows" is rounded twice: of the first three that of N, of the fourth that of the code, of
 * the others that of P.
 */
static void fused_as_specified(void **state)
{
    enum { DIM = 64, TOKENS = 64 };
    static const uint64_t seeds[] = {2533908, 9885482, 26153288, 14902218,
                                     2172935, 4648335, 8302299};
    rng r = {17};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++) {
        subject s = {.isa = kvt_isa_name(isa)};
        s.g = group_of(1, HEADS, HEADS, DIM, DIM, KVT_TYPE_I8, KVT_TYPE_I8);
        s.g.flags = KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET;
        s.g.residual_tokens = KVT_RESIDUAL_NONE;
        subject_open(&s, TOKENS);
        make_rows(&s, &r, TOKENS, 0, 1);
        for (size_t i = 0; i < TOKENS * HEADS; i++)
            for (size_t d = 0; d < DIM; d++) {
                uint64_t u = splitmix(0, seeds[i % 7] * 1024 + d);
                float x = (float)((int)(u % 2032) - 1016 + (int)((u >> 40) % 1016)) / 16;
                s.t.k[i * DIM + d] = d == DIM - 1 || x > 100 ? 100 : x < -100 ? -100 : x;
            }
        subject_step(&s, 0, TOKENS);
        subject_check(&s);
        subject_close(&s);
    }
}

static int any_kind(rng *r) /* kind 7 is beyond f16 */
{
    int kind = (int)rng_below(r, N_KINDS - 1);
    return kind < 7 ? kind : kind + 1;
}

/* One side i8, the other wider; V in K. */
static void mixed_types(void **state)
{
    rng r = {12};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++) {
        for (int types = 0; types < 9; types++)
            for (int i = 0; i < 2; i++) {
                kvt_group_config g = any_group(&r, i ? 40 : 128, i ? 64 : 24, (kvt_type)(types / 3),
                                               (kvt_type)(types % 3));
                if (is_quick() && (types + i + (int)isa) % (3 * quick_level()))
                    continue;
                check_cuts(kvt_isa_name(isa), &g, i, any_kind(&r), i ? 1 : 30, rng_next(&r));
            }
        for (int type = 0; type <= KVT_TYPE_I8; type++)
            for (uint32_t flags = 0; flags < 4; flags++) {
                kvt_group_config g = any_group(&r, 576, 512, (kvt_type)type, (kvt_type)type);
                g.flags = KVT_GROUP_V_IN_K | flags;
                if (is_quick() && ((uint32_t)type + flags + isa) % 3)
                    continue;
                check_cuts(kvt_isa_name(isa), &g, (int)flags & 1, any_kind(&r), 1, rng_next(&r));
            }
    }
}

/* ---- 4-bit K, 4- and 5-bit V ---- */

static const kvt_type coarse[][2] = {
    {KVT_TYPE_I4, KVT_TYPE_I4},  {KVT_TYPE_I4, KVT_TYPE_I5},  {KVT_TYPE_I8, KVT_TYPE_I4},
    {KVT_TYPE_I4, KVT_TYPE_I8},  {KVT_TYPE_I8, KVT_TYPE_I5},  {KVT_TYPE_I4, KVT_TYPE_F16},
    {KVT_TYPE_F32, KVT_TYPE_I4}, {KVT_TYPE_F16, KVT_TYPE_I5},
};
enum { N_COARSE = sizeof coarse / sizeof *coarse };

static const uint32_t fine[] = {0, KVT_FINE_NONE, 0, 65, KVT_FINE_NONE, 1, 192};

/* Magnitudes up to 2e5, with a first key 100 times as large as the others. */
static const double coarse_sizes[] = {1, 1e-3, 3e-6, 1e-9, 1e-41, 30, 120};

static void coarse_as_specified(void **state)
{
    const uint32_t dims[] = {8, 24, 64, 128, 40, 96, 256};
    const uint32_t flags[] = {0, 1, 8, 9};
    rng r = {21};
    (void)state;
    memset(chosen, 0, sizeof chosen);
    memset(gains_seen, 0, sizeof gains_seen);
    memset(dims_seen, 0, sizeof dims_seen);
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (size_t c = 0; c < N_COARSE; c++)
                for (int i = 0; i < 3; i++) {
                    int kind = (int)rng_below(&r, N_KINDS);
                    kvt_group_config g =
                        any_group(&r, dims[d], dims[rng_below(&r, 7)], coarse[c][0], coarse[c][1]);
                    int has_f16 = coarse[c][0] == KVT_TYPE_F16 || coarse[c][1] == KVT_TYPE_F16;
                    double size;
                    if (is_quick() && (d + c + isa + (size_t)i) % (4 * (size_t)quick_level() + 1))
                        continue;
                    if (has_f16 && kind == 7) /* is beyond it */
                        kind = FLAT_KIND;
                    g.flags = flags[rng_below(&r, 4)];
                    g.fine_tokens = fine[rng_below(&r, 7)];
                    size = coarse_sizes[rng_below(&r, has_f16 ? 5 : 7)];
                    check_cuts(kvt_isa_name(isa), &g, (int)rng_below(&r, 2), kind,
                               kind == 6 || kind == 7 ? 1 : size, rng_next(&r));
                }
    for (int set = 0; set < 3; set++)
        assert_true(chosen[set] > 0);
    for (int gain = 1; gain < 256; gain += gain == 1 ? 119 : gain == 136 ? 119 : 1)
        if (!gains_seen[gain]) /* those of most rows, and the ends */
            fail_msg("no row has a gain of %d", gain);
    assert_true(dims_seen[0] > 0 && dims_seen[1] > 0);
}

/* Cuts and what comes behind them, at each kind of rows; the sealing that is taken back, too. */
static void coarse_cut_and_sealed_again(void **state)
{
    rng r = {22};
    (void)state;
    memset(ways, 0, sizeof ways);
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int kind = 0; kind < N_KINDS; kind++)
            for (size_t c = 0; c < 4; c++) {
                kvt_group_config g = group_of(1, HEADS, HEADS, 64, 48, coarse[c][0], coarse[c][1]);
                subject s = {.isa = kvt_isa_name(isa), .g = g};
                if (is_quick() && ((size_t)kind + c + 4 * isa) % (4 * (size_t)quick_level()))
                    continue;
                s.g.fine_tokens = kind % 2 ? KVT_FINE_NONE : 0;
                s.g.residual_tokens = kind % 3 ? KVT_RESIDUAL_NONE : 0;
                subject_open(&s, 400);
                make_rows(&s, &r, 400, kind, kind == 7 ? 1 : 10);
                subject_step(&s, 0, 330);
                subject_check(&s);
                for (size_t i = 0; i < 12; i++) { /* the blocks 3, 2, 1 and 0 */
                    size_t cut = 64 * (3 - i / 3) + 1 + rng_below(&r, 63), last = 64 * (4 - i / 3);
                    subject_truncate(&s, cut);
                    subject_check(&s);
                    if (i % 3 == 1) { /* other tokens */
                        size_t n = 1 + rng_below(&r, (uint32_t)(last - cut));
                        subject_step(&s, rng_below(&r, 400 - 64), n);
                        cut += n;
                    }
                    subject_step(&s, cut, last + models[0][0].window + 3 - cut);
                    subject_check(&s);
                    subject_truncate(&s, last + models[0][0].window - 1); /* takes it back */
                    subject_check(&s);
                    subject_step(&s, last + models[0][0].window - 1, 2);
                    subject_check(&s);
                    if (i % 3 == 2) { /* cut twice before it is sealed */
                        subject_truncate(&s, last - 20);
                        subject_step(&s, last - 20, 5);
                        subject_truncate(&s, last - 40);
                        subject_step(&s, last - 40, 60 + models[0][0].window);
                        subject_check(&s);
                    }
                }
                subject_close(&s);
            }
    for (int way = 0; way < 4; way++)
        assert_true(ways[way] > 0);
}

/* Which sealings a truncate takes back: around the bounds, and after two truncates. */
static void taken_back(void **state)
{
    rng r = {15};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t w = 0; w < (is_quick() ? 2 : 5); w++)
            for (size_t past = is_quick() ? 64 : 61; past < (is_quick() ? 66 : 68); past++) {
                kvt_group_config g = group_of(1, HEADS, HEADS, 16, 8, KVT_TYPE_I8, KVT_TYPE_I8);
                subject s = {.isa = kvt_isa_name(isa), .g = g};
                size_t due;
                s.g.residual_tokens = windows[w];
                subject_open(&s, 640);
                make_rows(&s, &r, 640, 1, 1);
                due = 128 + models[0][0].window;
                for (size_t back = 1; back < 66; back += 16)
                    for (int steps = 0; steps < 3; steps++) {
                        if (steps == 1)
                            subject_step(&s, 0, due + 1);
                        if (steps == 2)
                            subject_step(&s, 0, due + past - 64);
                        subject_step(&s, models[0][0].length, due + past - models[0][0].length);
                        subject_check(&s);
                        subject_truncate(&s, due + 20);
                        subject_check(&s);
                        subject_truncate(&s, due - back);
                        subject_check(&s);
                        subject_step(&s, due - back, 200);
                        subject_check(&s);
                        subject_truncate(&s, 0);
                    }
                subject_close(&s);
            }
}

/* ---- what is refused ---- */

static float largest_of(model *m, const float *x)
{
    float z[MAX_DIM], most = 0;
    model_centre(m, m->length, x, z);
    for (size_t d = 0; d < m->dim; d++)
        most = fabsf(z[d]) > most ? fabsf(z[d]) : most;
    return most;
}

/* The largest magnitude that a side takes in the stored domain; of K less the offset. */
static float most_of(int side, kvt_type type)
{
    return type == KVT_TYPE_I8 ? 8e6f : side ? 2e6f : 2.4e5f;
}

/* The next token's row of one head as large as may be, and a step larger. */
static void check_limit(subject *s, rng *r, int side)
{
    size_t head = rng_below(r, HEADS), at = models[0][0].length;
    model *m = &models[side][head];
    float *row = (side ? s->t.v : s->t.k) + (at * HEADS + head) * m->dim;
    float *was = malloc(m->dim * sizeof *was), *way = rng_normals(r, m->dim);
    kvt_tensor k = kvt_tensor_f32(s->t.k + at * HEADS * s->g.k_dim);
    kvt_tensor v = kvt_tensor_f32(s->t.v + at * HEADS * s->g.v_dim);
    float fits = 1, high = 1e10f, largest = most_of(side, side ? s->g.v_type : s->g.k_type);
    assert_non_null(was);
    models_begin();
    memcpy(was, row, m->dim * sizeof *was);
    while (nextafterf(fits, high) < high) {
        float middle = fits + (high - fits) / 2;
        for (size_t d = 0; d < m->dim; d++)
            row[d] = times(way[d], middle);
        *(largest_of(m, row) <= largest ? &fits : &high) = middle;
    }
    for (size_t d = 0; d < m->dim; d++)
        row[d] = times(way[d], high);
    expect_ok(s->cache, kvt_seq_begin(s->seq, 1, NULL));
    expect(s->cache, KVT_ERR_VALUE, kvt_append(s->seq, 0, &k, &v));
    for (size_t d = 0; d < m->dim; d++)
        row[d] = times(way[d], fits);
    expect_ok(s->cache, kvt_append(s->seq, 0, &k, &v));
    expect_ok(s->cache, kvt_seq_abort(s->seq));
    subject_check(s);
    subject_step(s, at, 1);
    subject_check(s);
    subject_truncate(s, at);
    memcpy(row, was, m->dim * sizeof *was);
    free(was), free(way);
}

static void refusals(void **state)
{
    const uint32_t dims[] = {8, 64, 96, 512, 1024};
    const uint32_t flags[] = {0, 2, 9, 11};
    rng r = {13};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t d = 0; d < 5; d++)
            for (size_t f = 0; f < 4 + 5; f++) {
                subject s = {.isa = kvt_isa_name(isa)};
                if (is_quick() && (d + f + isa) % (4 * (size_t)quick_level()))
                    continue;
                s.g = group_of(1, HEADS, HEADS, dims[d], dims[4 - d], KVT_TYPE_I8, KVT_TYPE_I8);
                s.g.flags = flags[f % 4] & (f < 4 ? 11 : 9);
                if (f >= 4) {
                    s.g.k_type = coarse[f - 4][0];
                    s.g.v_type = coarse[f - 4][1];
                    s.g.fine_tokens = (f + d) % 2 ? KVT_FINE_NONE : 0;
                }
                s.g.residual_tokens = KVT_RESIDUAL_NONE;
                subject_open(&s, 200);
                make_rows(&s, &r, 200, 1, 1);
                for (int side = 0; side < 2; side++) { /* tokens of open blocks */
                    check_limit(&s, &r, side);
                    subject_step(&s, 0, 30);
                    check_limit(&s, &r, side);
                    subject_step(&s, 30, 34);
                    check_limit(&s, &r, side);
                    subject_step(&s, 64, 36);
                    check_limit(&s, &r, side);
                    subject_step(&s, 100, 40); /* and of a sealed one, or one that was */
                    subject_truncate(&s, 70);
                    check_limit(&s, &r, side);
                    subject_truncate(&s, 30);
                    check_limit(&s, &r, side);
                    subject_truncate(&s, 0);
                }
                subject_close(&s);
            }
}

/* Magnitudes of 240 000 always fit, with the signs that add up in the rotation, too. */
static void always_fits(void **state)
{
    const uint32_t dims[] = {8, 96, 128, 512, 576, 1024};
    rng r = {14};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t d = 0; d < 6; d++)
            for (uint32_t flags = 0; flags < 3; flags += 2) {
                subject s = {.isa = kvt_isa_name(isa)};
                float most = 0;
                s.g = group_of(1, HEADS, HEADS, dims[d], dims[d], KVT_TYPE_I8, KVT_TYPE_I8);
                s.g.flags = flags;
                subject_open(&s, 200);
                make_rows(&s, &r, 200, 0, 1);
                for (int side = 0; side < 2; side++)
                    for (size_t i = 0; i < 200 * HEADS; i++)
                        for (size_t x = 0; x < dims[d]; x++) {
                            float *at = (side ? s.t.v : s.t.k) + i * dims[d] + x;
                            size_t t = i / HEADS, walsh = (t / 4) & x, odd = 0;
                            for (; walsh; walsh &= walsh - 1)
                                odd ^= 1;
                            *at = t % 4 == 3 ? (*at < 0 ? -240000.0f : 240000.0f)
                                             : (odd ^ (t & 1) ? -240000.0f : 240000.0f) *
                                                   models[side][i % HEADS].sign[x];
                        }
                for (int side = 0; side < 2; side++)
                    for (size_t head = 0; head < HEADS; head++) {
                        float y[MAX_DIM];
                        model *m = &models[side][head];
                        rotate(m, (side ? s.t.v : s.t.k) + head * dims[d], y);
                        for (size_t x = 0; x < dims[d]; x++)
                            most = fabsf(y[x]) > most ? fabsf(y[x]) : most;
                    }
                if (dims[d] == 512 || dims[d] == 1024)
                    assert_true(most == 240000.0f * 32);
                subject_step(&s, 0, 61);
                subject_step(&s, 61, 139);
                subject_check(&s);
                subject_close(&s);
            }
}

/* f16 storage: every representable value, every tie between two, and the edge of the range. */
static void f16_as_specified(void **state)
{
    enum { DIM = 64 };
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++) {
        kvt_group_config g = group_of(1, 1, 1, DIM, DIM, KVT_TYPE_F16, KVT_TYPE_F16);
        kvt_cache *cache = cache_of(&g, 65536, 1, kvt_isa_name(isa));
        kvt_seq *seq = NULL;
        size_t n = 0;
        float *x = malloc(4 * 65536 * sizeof *x), *back = malloc(4 * 65536 * sizeof *back),
              edge[DIM];
        kvt_tensor in = kvt_tensor_f32(x), out = kvt_tensor_f32(back), bad = kvt_tensor_f32(edge);
        unsigned saved;
        for (int exponent = 0; exponent < 31; exponent++)
            for (int mantissa = 0; mantissa < 1024; mantissa++) {
                double step = ldexp(1.0, (exponent ? exponent : 1) - 25);
                double value = (exponent ? 1024 + mantissa : mantissa) * step;
                if (exponent == 30 && mantissa == 1023)
                    continue;
                x[n++] = (float)value;
                x[n++] = (float)-(value + step / 2);                    /* a tie */
                x[n++] = nextafterf((float)(value + step / 2), 0);      /* below it */
                x[n++] = nextafterf((float)-(value + step / 2), -1e9f); /* beyond it */
            }
        while (n % DIM)
            x[n++] = 65519.0f;
        expect_ok(cache, kvt_seq_create(cache, &seq));
        saved = set_hostile_environment();
        expect_ok(cache, kvt_seq_begin(seq, n / DIM, NULL));
        expect_ok(cache, kvt_append(seq, 0, &in, &in));
        expect_ok(cache, kvt_seq_commit(seq, NULL));
        restore_environment(saved);
        for (int side = 0; side < 2; side++) {
            expect_ok(cache, kvt_read(seq, 0, (kvt_side)side, 0, n / DIM, &out));
            for (size_t i = 0; i < n; i++)
                if ((double)back[i] != to_f16((double)x[i], 0))
                    fail_msg("isa %s: %a stored as %a", kvt_isa_name(isa), (double)x[i],
                             (double)back[i]);
        }
        for (size_t d = 0; d < DIM; d++)
            edge[d] = 1;
        edge[DIM - 1] = 65520.0f;
        expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
        expect(cache, KVT_ERR_VALUE, kvt_append(seq, 0, &bad, &bad));
        edge[DIM - 1] = nextafterf(65520.0f, 0);
        expect_ok(cache, kvt_append(seq, 0, &bad, &bad));
        free(x), free(back);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i8_as_specified),     cmocka_unit_test(rows_without_offset),
        cmocka_unit_test(coarse_as_specified), cmocka_unit_test(coarse_cut_and_sealed_again),
        cmocka_unit_test(fused_as_specified),  cmocka_unit_test(mixed_types),
        cmocka_unit_test(taken_back),          cmocka_unit_test(refusals),
        cmocka_unit_test(always_fits),         cmocka_unit_test(f16_as_specified),
    };
    return cmocka_run_group_tests_name("numerics", tests, NULL, NULL);
}
