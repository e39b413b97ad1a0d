/*
 * The filters of snapshots against their formulas in docs/format.md, element by element, and the
 * decoder's status for invalid frames. A unit test of src/snapshot/codec.c: it includes internal
 * headers and links the static library.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "src/snapshot/format.h"

#include <stdlib.h>

enum { HEADS = 2 };

/* Index of (head, token, dim) in native and in token-major order. */
static size_t native_at(const kvt_snap_shape *s, size_t h, size_t t, size_t d)
{
    if (s->kind == KVT_SNAP_KIND_K) {
        size_t tiles = (s->tokens + 15) / 16;
        return ((h * tiles + t / 16) * (s->dims / 4) + d / 4) * 64 + t % 16 * 4 + d % 4;
    }
    return ((h * ((s->tokens + 3) / 4) + t / 4) * s->dims + d) * 4 + t % 4;
}

static size_t rounded(const kvt_snap_shape *s)
{
    size_t lane = s->kind == KVT_SNAP_KIND_K ? 16 : 4;
    return (s->tokens + lane - 1) / lane * lane;
}

static kvt_snap_shape i8_shape(uint32_t kind, uint32_t tokens, uint32_t dims)
{
    kvt_snap_shape s;
    memset(&s, 0, sizeof s);
    s.kind = kind;
    s.element = 1;
    s.bits = 8;
    s.heads = HEADS;
    s.dims = dims;
    s.tokens = tokens;
    s.bytes = HEADS * rounded(&s) * dims;
    return s;
}

static kvt_status decode(const kvt_snap_shape *s, uint32_t filter, uint32_t codec_id,
                         const unsigned char *stored, size_t n, unsigned char *native)
{
    kvt_snap_context context;
    kvt_snap_codec codec;
    kvt_snap_stream stream;
    kvt_status status;

    memset(&context, 0, sizeof context);
    memset(&stream, 0, sizeof stream);
    kvt_snap_codec_init(&codec, &context);
    stream.kind = s->kind;
    stream.filter = filter;
    stream.codec = codec_id;
    stream.stored_bytes = (uint32_t)n;
    stream.native_bytes = (uint32_t)s->bytes;
    status = kvt_snap_decode(&codec, s, &stream, stored, native);
    kvt_snap_codec_release(&codec);
    return status;
}

static void check_i8(uint32_t kind, uint32_t tokens, uint32_t dims)
{
    kvt_snap_shape s = i8_shape(kind, tokens, dims);
    unsigned char *native = calloc(s.bytes, 1), *filtered = calloc(s.bytes, 1);
    unsigned char *out = calloc(s.bytes, 1);
    uint32_t seed = tokens * 31 + dims;

    assert_non_null(native);
    assert_non_null(filtered);
    assert_non_null(out);
    for (uint32_t filter = 0; filter < 3; filter++) {
        for (size_t h = 0; h < HEADS; h++)
            for (size_t t = 0; t < rounded(&s); t++)
                for (size_t d = 0; d < dims; d++) {
                    size_t at = native_at(&s, h, t, d);
                    seed = seed * 1664525u + 1013904223u;
                    native[at] = t < tokens ? (unsigned char)(seed >> 24) : 0;
                    if (filter == KVT_SNAP_NATIVE)
                        filtered[at] = native[at];
                    else if (filter == KVT_SNAP_TOKEN_MAJOR)
                        filtered[(h * rounded(&s) + t) * dims + d] = native[at];
                    else
                        filtered[at] =
                            (unsigned char)(native[at] -
                                            (t ? native[native_at(&s, h, t - 1, d)] : 0));
                }
        assert_int_equal(decode(&s, filter, KVT_SNAP_RAW, filtered, s.bytes, out), KVT_OK);
        assert_memory_equal(out, native, s.bytes);
    }
    free(native);
    free(filtered);
    free(out);
}

static void test_i8(void **state)
{
    static const uint32_t tokens[] = {1, 3, 4, 5, 16, 17, 33, 64};
    (void)state;
    for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; i++)
        for (uint32_t dims = 8; dims <= 40; dims += 16) {
            check_i8(KVT_SNAP_KIND_K, tokens[i], dims);
            check_i8(KVT_SNAP_KIND_V, tokens[i], dims);
        }
}

static void test_planes(void **state)
{
    (void)state;
    for (uint32_t element = 2; element <= 4; element += 2) {
        unsigned char native[4 * 37], filtered[4 * 37], out[4 * 37];
        kvt_snap_shape s;
        memset(&s, 0, sizeof s);
        s.kind = KVT_SNAP_KIND_SCALES;
        s.element = element;
        s.bits = 8 * element;
        s.bytes = 37 * element;
        for (size_t i = 0; i < 37; i++)
            for (size_t b = 0; b < element; b++)
                native[i * element + b] = filtered[b * 37 + i] = (unsigned char)(i * 7 + b * 61);
        assert_int_equal(decode(&s, KVT_SNAP_PLANES, KVT_SNAP_RAW, filtered, s.bytes, out), KVT_OK);
        assert_memory_equal(out, native, s.bytes);
    }
}

/*
 * Shapes of both forms of a group, sizes by docs/format.md; K and V of open blocks are f16, whose
 * only filter is by planes; only open scales have to be powers of two, and only those of K beside
 * an offset may be negative.
 */
static void test_forms(void **state)
{
    kvt_snapshot_group g;
    kvt_snap_shape s[KVT_SNAP_MAX_STREAMS];
    size_t bytes;
    uint16_t scales[2 * 2 * 21 + 2 * 24]; /* the shape's: K scales, V scales, K offsets */
    (void)state;

    memset(&g, 0, sizeof g);
    g.n_layers = 1;
    g.n_q_heads = g.n_kv_heads = HEADS;
    g.k_dim = 24;
    g.v_dim = 40;
    g.k_type = g.v_type = KVT_TYPE_F16;
    assert_false(kvt_snap_seals(&g));
    g.k_type = KVT_TYPE_I8;
    assert_true(kvt_snap_seals(&g));
    g.v_type = KVT_TYPE_I8;
    assert_int_equal(kvt_snap_shapes(&g, KVT_SEALED, 21, s, &bytes), 3);
    assert_int_equal(s[0].bytes, 16 * HEADS * 2 * 24);
    assert_int_equal(s[1].bytes, 4 * HEADS * 6 * 40);
    assert_int_equal(s[2].bytes, sizeof scales);
    assert_true(kvt_snap_filter_known(&s[0], KVT_SNAP_TOKEN_MAJOR));
    assert_true(kvt_snap_filter_known(&s[1], KVT_SNAP_DELTA));
    assert_false(kvt_snap_filter_known(&s[0], KVT_SNAP_PLANES));
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        scales[i] = 0x4200; /* 3 */
    assert_null(kvt_snap_check(&s[2], (unsigned char *)scales));

    assert_int_equal(kvt_snap_shapes(&g, KVT_OPEN, 21, s, &bytes), 3);
    assert_int_equal(s[0].bytes, 32 * HEADS * 2 * 24);
    assert_int_equal(s[1].bytes, 2 * HEADS * 21 * 40);
    assert_int_equal(s[2].bytes, sizeof scales);
    assert_int_equal(bytes, s[0].bytes + s[1].bytes + s[2].bytes);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(s[i].element, 2);
        assert_false(kvt_snap_filter_known(&s[i], KVT_SNAP_TOKEN_MAJOR));
        assert_false(kvt_snap_filter_known(&s[i], KVT_SNAP_DELTA));
        assert_true(kvt_snap_filter_known(&s[i], KVT_SNAP_PLANES));
        assert_true(kvt_snap_filter_known(&s[i], KVT_SNAP_NATIVE));
    }
    for (size_t i = 0; i < 2 * HEADS * 21; i++)
        scales[i] = (uint16_t)(0x3c00 + 0x400 * (i % 16));       /* 1 .. 32768 */
    assert_null(kvt_snap_check(&s[2], (unsigned char *)scales)); /* offsets of 3 */
    for (uint32_t x = 0; x < 0x10000; x++) {
        uint32_t at = x * 7 % (2 * HEADS * 21), magnitude = x & 0x7fff;
        int power = magnitude >= 0x3c00 && magnitude <= 0x7800 && (x & 0x3ff) == 0;
        scales[at] = (uint16_t)x; /* signs on K's only: such a row has no offset */
        assert_true((kvt_snap_check(&s[2], (unsigned char *)scales) == NULL) ==
                    (power && (x < 0x8000 || at < HEADS * 21)));
        scales[at] = 0x3c00;
    }
    for (uint32_t at = 0; at < 2 * HEADS * 21; at++) { /* each place, for every form */
        for (int i = 0; i < 3; i++) {
            kvt_snap_shape form[KVT_SNAP_MAX_STREAMS];
            g.flags = i == 1 ? KVT_GROUP_NO_OFFSET : 0;
            (void)kvt_snap_shapes(&g, i == 2 ? KVT_SEALED : KVT_OPEN, 21, form, &bytes);
            scales[at] = 0xbc00;
            assert_true((kvt_snap_check(&form[2], (unsigned char *)scales) == NULL) ==
                        (i == 0 && at < HEADS * 21));
            scales[at] = 0x3c00;
            assert_null(kvt_snap_check(&form[2], (unsigned char *)scales));
        }
    }
    g.flags = 0;
    scales[2 * HEADS * 21] = 0xbc00; /* an offset may have one */
    assert_null(kvt_snap_check(&s[2], (unsigned char *)scales));
    scales[2 * HEADS * 21] = 0x7c00; /* an offset */
    assert_non_null(kvt_snap_check(&s[2], (unsigned char *)scales));

    g.v_type = KVT_TYPE_F32; /* the other side stays what it is */
    assert_int_equal(kvt_snap_shapes(&g, KVT_OPEN, 21, s, &bytes), 3);
    assert_int_equal(s[0].bytes, 32 * HEADS * 2 * 24);
    assert_int_equal(s[1].bytes, 4 * HEADS * 21 * 40);
    assert_int_equal(s[2].bytes, 2 * HEADS * (21 + 24));
    g.v_type = KVT_TYPE_I8;
    g.flags = KVT_GROUP_V_IN_K | KVT_GROUP_NO_OFFSET;
    assert_int_equal(kvt_snap_shapes(&g, KVT_OPEN, 21, s, &bytes), 2);
    assert_int_equal(s[0].bytes, 32 * HEADS * 2 * 24);
    assert_int_equal(s[1].bytes, 2 * HEADS * 21);
    scales[2 * HEADS * 21] = 0x4200;
    for (int offset = 0; offset < 2; offset++) { /* V in K */
        g.flags = KVT_GROUP_V_IN_K | (offset ? 0 : KVT_GROUP_NO_OFFSET);
        (void)kvt_snap_shapes(&g, KVT_OPEN, 21, s, &bytes);
        scales[HEADS * 21 - 1] = 0xc000;
        assert_true((kvt_snap_check(&s[1], (unsigned char *)scales) == NULL) == offset);
        scales[HEADS * 21 - 1] = 0x3c00;
    }
    g.flags = 0;
    g.k_type = KVT_TYPE_F16;
    (void)kvt_snap_shapes(&g, KVT_OPEN, 21, s, &bytes);
    scales[0] = 0xbc00;
    assert_non_null(kvt_snap_check(&s[2], (unsigned char *)scales));
}

/* ---- codes of 4 and 5 bits ---- */

/* Whether a bit of a native stream belongs to a token and a dim: docs/format.md, by inversion. */
static int is_live(const kvt_snap_shape *s, size_t bit)
{
    size_t head = s->bytes / s->heads * 8, at = bit % head, runs = (s->tokens + 7) / 8;
    size_t nibbles = runs * s->dims * 32, wide = (s->dims + 15) / 16;

    if (s->kind == KVT_SNAP_KIND_K)
        return at / (s->dims * 64) * 16 + at / 32 % 16 < s->tokens;
    if (at < nibbles)
        return at / (s->dims * 32) * 8 + at / 4 % 2 * 4 + at / 8 % 4 < s->tokens;
    at -= nibbles;
    return at / (wide * 128) * 8 + at / 64 % 2 * 4 + at % 4 < s->tokens &&
           at / 128 % wide * 16 + at / 4 % 16 < s->dims;
}

static void check_each_bit(const kvt_snap_shape *s)
{
    unsigned char *stream = calloc(s->bytes, 1);
    assert_non_null(stream);
    assert_null(kvt_snap_check(s, stream));
    for (size_t bit = 0; bit < s->bytes * 8; bit++) {
        stream[bit / 8] = (unsigned char)(1 << bit % 8);
        if ((kvt_snap_check(s, stream) == NULL) != is_live(s, bit))
            fail_msg("kind %u, %u bits, %u tokens, %u dims: bit %zu", s->kind, s->bits, s->tokens,
                     s->dims, bit);
        stream[bit / 8] = 0;
    }
    memset(stream, 0x80, s->bytes); /* of fewer bits than 8 each code is one */
    if (s->tokens % 16 == 0 && s->bits == 4)
        assert_null(kvt_snap_check(s, stream));
    free(stream);
}

/* Sizes of all forms, by docs/format.md; every bit of K and V where it may be set, and may not. */
static void test_coarse(void **state)
{
    kvt_snapshot_group g;
    kvt_snap_shape s[KVT_SNAP_MAX_STREAMS];
    size_t bytes;
    (void)state;

    memset(&g, 0, sizeof g);
    g.n_layers = 1;
    g.n_q_heads = g.n_kv_heads = HEADS;
    g.k_type = KVT_TYPE_I4;
    for (uint32_t n = 1; n <= 64; n++)
        for (uint32_t dims = 8; dims <= 40; dims += 16) {
            const size_t tiles = (n + 15) / 16, runs = (n + 7) / 8;
            g.k_dim = dims;
            g.v_dim = 48 - dims;
            for (int v_type = KVT_TYPE_I4; v_type <= KVT_TYPE_I5; v_type++) {
                const size_t fifths = v_type == KVT_TYPE_I5 ? 16 * ((g.v_dim + 15) / 16) : 0;
                g.v_type = (kvt_type)v_type;
                for (uint32_t form = KVT_SEALED; form < KVT_FORMS; form++)
                    assert_true(kvt_snap_has_form(&g, form));
                assert_false(kvt_snap_has_form(&g, KVT_FORMS));
                assert_int_equal(kvt_snap_shapes(&g, KVT_SEALED, n, s, &bytes), 3);
                assert_int_equal(s[0].bytes, HEADS * tiles * 8 * dims);
                assert_int_equal(s[1].bytes, HEADS * runs * (4 * g.v_dim + fifths));
                assert_int_equal(s[2].bytes, 2 * HEADS * (dims + n + dims + n));
                assert_int_equal(bytes, s[0].bytes + s[1].bytes + s[2].bytes);
                check_each_bit(&s[0]);
                check_each_bit(&s[1]);
                for (uint32_t filter = 0; filter < 4; filter++)
                    for (int i = 0; i < 2; i++)
                        assert_int_equal(kvt_snap_filter_known(&s[i], filter), filter == 0);
                assert_int_equal(kvt_snap_shapes(&g, KVT_FINE, n, s, &bytes), 3);
                assert_int_equal(s[0].bytes, HEADS * tiles * 16 * dims);
                assert_int_equal(s[1].bytes, HEADS * ((n + 3) / 4 * 4) * g.v_dim);
                assert_int_equal(s[2].bytes, 2 * HEADS * (n + n + dims));
                assert_int_equal(kvt_snap_shapes(&g, KVT_OPEN, n, s, &bytes), 3);
                assert_int_equal(s[0].bytes, HEADS * tiles * 32 * dims);
                assert_int_equal(s[1].bytes, HEADS * n * 2 * g.v_dim);
                assert_int_equal(s[2].bytes, 2 * HEADS * (n + n + dims));
                assert_int_equal(kvt_snap_shapes(&g, KVT_REOPENED, n, s, &bytes), 3);
                assert_int_equal(s[0].bytes, HEADS * tiles * 32 * dims);
                assert_int_equal(s[1].bytes, HEADS * n * 2 * g.v_dim);
                assert_int_equal(s[2].bytes, 2 * HEADS * (n + n + 3 * dims + n));
            }
        }
    g.k_type = KVT_TYPE_F16; /* the other side stays what it is */
    assert_true(kvt_snap_has_form(&g, KVT_FINE) && !kvt_snap_has_form(&g, KVT_REOPENED));
    assert_int_equal(kvt_snap_shapes(&g, KVT_FINE, 21, s, &bytes), 3);
    assert_int_equal(s[0].bytes, 32 * HEADS * 2 * g.k_dim);
    assert_int_equal(s[1].bytes, 4 * HEADS * 6 * g.v_dim);
    assert_int_equal(s[2].bytes, 2 * HEADS * 21);
    g.v_type = KVT_TYPE_I8;
    assert_true(kvt_snap_has_form(&g, KVT_OPEN) && !kvt_snap_has_form(&g, KVT_FINE));
    g.v_type = KVT_TYPE_F32;
    assert_true(kvt_snap_has_form(&g, KVT_SEALED) && !kvt_snap_has_form(&g, KVT_OPEN));
}

/* What each number of the scales' stream may be: docs/format.md, its table, a second time. */
enum { K_SCALE, V_SCALE, OFFSET, SEED_SCALE, SEED_MIDDLE, GAIN };

static int is_sound(const kvt_snapshot_group *g, uint32_t form, int part, uint32_t x)
{
    const uint32_t magnitude = x & 0x7fff, negative = x >> 15;
    const int power = magnitude >= 0x3c00 && magnitude <= 0x7800 && (x & 0x3ff) == 0;
    const int i4 = g->k_type == KVT_TYPE_I4, open = form == KVT_OPEN || form == KVT_REOPENED;
    if (magnitude >= 0x7c00)
        return 0;
    switch (part) {
    case K_SCALE: return open ? power : form == KVT_SEALED && i4 ? 1 : !negative;
    case V_SCALE:
        if (form == KVT_REOPENED)
            return !negative || g->v_type == KVT_TYPE_I4;
        return !negative && (power || !open);
    case GAIN: return x <= 255 && (x || form == KVT_REOPENED);
    default: return 1;
    }
}

static void test_coarse_scales(void **state)
{
    static const kvt_type types[][2] = {{KVT_TYPE_I4, KVT_TYPE_I4}, {KVT_TYPE_I4, KVT_TYPE_I5},
                                        {KVT_TYPE_I4, KVT_TYPE_I8}, {KVT_TYPE_I4, KVT_TYPE_F16},
                                        {KVT_TYPE_I8, KVT_TYPE_I4}, {KVT_TYPE_I8, KVT_TYPE_I5}};
    enum { N = 11, DIM = 24 };
    (void)state;
    for (size_t pair = 0; pair < sizeof types / sizeof *types; pair++)
        for (uint32_t form = KVT_SEALED; form < KVT_FORMS; form++) {
            unsigned char parts[2 * (3 * N + 3 * DIM)];
            uint16_t scales[sizeof parts];
            kvt_snapshot_group g;
            kvt_snap_shape s[KVT_SNAP_MAX_STREAMS];
            size_t bytes, n = 0;
            memset(&g, 0, sizeof g);
            g.n_layers = 1;
            g.n_q_heads = g.n_kv_heads = HEADS;
            g.k_dim = DIM;
            g.v_dim = 8;
            g.k_type = types[pair][0];
            g.v_type = types[pair][1];
            if (!kvt_snap_has_form(&g, form))
                continue;
            assert_int_equal(kvt_snap_shapes(&g, form, N, s, &bytes), 3);
            for (int part = K_SCALE; part <= GAIN; part++) {
                const int by_dims = part == K_SCALE ? g.k_type == KVT_TYPE_I4 && form == KVT_SEALED
                                                    : part >= OFFSET && part != GAIN;
                if ((part == V_SCALE && g.v_type == KVT_TYPE_F16) ||
                    (part >= SEED_SCALE && g.k_type != KVT_TYPE_I4) ||
                    (part >= SEED_SCALE && part != GAIN && form != KVT_REOPENED) ||
                    (part == GAIN && form != KVT_SEALED && form != KVT_REOPENED))
                    continue;
                for (size_t i = 0; i < HEADS * (size_t)(by_dims ? DIM : N); i++)
                    parts[n++] = (unsigned char)part;
            }
            assert_int_equal(s[2].bytes, 2 * n);
            for (size_t i = 0; i < n; i++)
                scales[i] = parts[i] == GAIN ? 1 : 0x3c00;
            for (size_t i = 0; i < n; i++) {
                const uint16_t was = scales[i];
                for (uint32_t x = 0; x < 0x10000; x += x < 0x400 || x % 0x400 < 2 ? 1 : 0x1ff) {
                    scales[i] = (uint16_t)x;
                    if ((kvt_snap_check(&s[2], (unsigned char *)scales) == NULL) !=
                        is_sound(&g, form, parts[i], x))
                        fail_msg("types %d, %d, form %u, number %zu: %04x", (int)g.k_type,
                                 (int)g.v_type, form, i, x);
                    scales[i] = was;
                }
            }
        }
}

/* ---- a block's memory, and its streams ---- */

/* Bit `bit` of stream bytes, or of a record's. */
static unsigned bit_of(const void *bytes, size_t bit)
{
    const unsigned char *p = bytes;
    return (unsigned)p[bit / 8] >> bit % 8 & 1u;
}

/* Where bit b of the code of a token and dim is, in bits of one head's K or V: docs/format.md. */
static size_t bit_in_stream(const kvt_snap_shape *s, size_t t, size_t d, size_t b)
{
    const size_t runs = (s->tokens + 7) / 8, wide = (s->dims + 15) / 16;
    if (s->bits > 8)
        return b + s->bits * (s->kind == KVT_SNAP_KIND_K ? (t / 16 * s->dims + d) * 16 + t % 16
                                                         : t * s->dims + d);
    if (s->bits == 8)
        return b + 8 * (s->kind == KVT_SNAP_KIND_K
                            ? (t / 16 * (s->dims / 4) + d / 4) * 64 + t % 16 * 4 + d % 4
                            : (t / 4 * s->dims + d) * 4 + t % 4);
    if (s->kind == KVT_SNAP_KIND_K)
        return b + 8 * ((t / 16 * (s->dims / 8) + d / 8) * 64 + t % 16 * 4 + d % 4) +
               (d % 8 < 4 ? 0 : 4);
    if (b == 4)
        return 8 * (4 * runs * s->dims + (t / 8 * wide + d / 16) * 16 + t % 8 / 4 * 8) +
               d % 16 * 4 + t % 4;
    return b + 8 * ((t / 8 * s->dims + d) * 4 + t % 4) + (t % 8 < 4 ? 0 : 4);
}

/* The same in a record, whose dims are padded and which has 64 tokens: simd/tile.h. */
static size_t bit_in_record(const kvt_snap_shape *s, size_t t, size_t d, size_t b)
{
    const size_t dims_p = kvt_round_up(s->dims, 16);
    if (s->bits < 8 && s->kind == KVT_SNAP_KIND_K)
        return 8 * kvt_k4_index(t, d, dims_p) + kvt_k4_shift(d) + b;
    if (s->bits < 8)
        return b < 4 ? 8 * kvt_v4_index(t, d, dims_p) + kvt_v4_shift(t) + b
                     : 8 * kvt_v5_index(t, d, dims_p) + kvt_v5_shift(t, d);
    if (s->bits == 8)
        return b + 8 * (s->kind == KVT_SNAP_KIND_K ? kvt_k8_index : kvt_v8_index)(t, d, dims_p);
    return b + s->bits * (s->kind == KVT_SNAP_KIND_K ? kvt_kw_index : kvt_vw_index)(t, d, dims_p);
}

/* Each code of a side where it belongs, and nothing else set. */
static void check_codes(const kvt_snap_shape *s, const kvt_group *group, const kvt_block *block,
                        size_t codes_at, const unsigned char *stream)
{
    size_t set = 0, found = 0;
    for (size_t bit = 0; bit < s->bytes * 8; bit++)
        set += bit_of(stream, bit);
    for (size_t h = 0; h < HEADS; h++)
        for (size_t t = 0; t < s->tokens; t++)
            for (size_t d = 0; d < s->dims; d++)
                for (size_t b = 0; b < s->bits; b++) {
                    unsigned want = bit_of(kvt_head_record(group, block, 0, h) + codes_at,
                                           bit_in_record(s, t, d, b));
                    if (bit_of(stream + s->bytes / HEADS * h, bit_in_stream(s, t, d, b)) != want)
                        fail_msg("kind %u, %u bits: head %zu, token %zu, dim %zu, bit %zu", s->kind,
                                 s->bits, h, t, d, b);
                    found += want;
                }
    assert_int_equal(set, found);
}

static void check_part(const kvt_group *group, const kvt_block *block, size_t at, size_t n,
                       const unsigned char **from)
{
    for (size_t h = 0; h < HEADS; h++, *from += 2 * n)
        assert_memory_equal(*from, kvt_head_record(group, block, 0, h) + at, 2 * n);
}

/* A byte each in the record, two in the stream. */
static void check_gains(const kvt_group *group, const kvt_block *block, size_t at, size_t n,
                        const unsigned char **from)
{
    for (size_t h = 0; h < HEADS; h++)
        for (size_t t = 0; t < n; t++, *from += 2) {
            assert_int_equal((*from)[0], kvt_head_record(group, block, 0, h)[at + t]);
            assert_int_equal((*from)[1], 0);
        }
}

/* A block of random bytes: its streams, and those of the block that they are put into. */
static void check_block(kvt_type k_type, kvt_type v_type, uint32_t form, uint32_t tokens)
{
    kvt_group_config config = kvt_group_config_init();
    kvt_snapshot_group g;
    kvt_snap_shape s[KVT_SNAP_MAX_STREAMS];
    kvt_block blocks[2];
    kvt_group group;
    const kvt_layout *layout;
    unsigned char *streams[2];
    const unsigned char *small;
    size_t bytes;
    uint32_t seed = tokens;

    config.n_layers = 1;
    config.n_q_heads = config.n_kv_heads = HEADS;
    config.k_dim = 24;
    config.v_dim = 40;
    config.k_type = k_type;
    config.v_type = v_type;
    kvt_group_make(&config, &group);
    memset(&g, 0, sizeof g);
    g.n_layers = 1;
    g.n_q_heads = g.n_kv_heads = HEADS;
    g.k_dim = 24;
    g.v_dim = 40;
    g.k_type = k_type;
    g.v_type = v_type;
    assert_int_equal(kvt_snap_shapes(&g, form, tokens, s, &bytes), 3);
    memset(blocks, 0, sizeof blocks);
    layout = &group.layouts[form];
    for (int i = 0; i < 2; i++) {
        blocks[i].form = (uint8_t)form;
        blocks[i].data = malloc(layout->block_bytes);
        streams[i] = malloc(bytes);
        assert_non_null(blocks[i].data);
        assert_non_null(streams[i]);
        for (size_t at = 0; at < layout->block_bytes; at++) {
            seed = seed * 1664525u + 1013904223u;
            blocks[i].data[at] = (unsigned char)(seed >> 24);
        }
    }
    kvt_snap_gather(&group, form, tokens, blocks[0].data, streams[0]);
    check_codes(&s[0], &group, &blocks[0], layout->k_codes, streams[0]);
    check_codes(&s[1], &group, &blocks[0], layout->v_codes, streams[0] + s[0].bytes);
    small = streams[0] + s[0].bytes + s[1].bytes;
    if (k_type >= KVT_TYPE_I8)
        check_part(&group, &blocks[0], layout->k_scales, s[0].bits == 4 ? 24 : tokens, &small);
    if (v_type >= KVT_TYPE_I8)
        check_part(&group, &blocks[0], layout->v_scales, tokens, &small);
    if (k_type >= KVT_TYPE_I8)
        check_part(&group, &blocks[0], layout->k_offset, 24, &small);
    if (form == KVT_REOPENED) {
        check_part(&group, &blocks[0], layout->k_seed, 24, &small);
        check_part(&group, &blocks[0], layout->k_seed + 2 * 32, 24, &small);
        check_gains(&group, &blocks[0], layout->k_seed + 4 * 32, tokens, &small);
    }
    if (k_type == KVT_TYPE_I4 && form == KVT_SEALED)
        check_gains(&group, &blocks[0], layout->k_scales + 2 * 32, tokens, &small);
    assert_ptr_equal(small, streams[0] + bytes);
    kvt_snap_scatter(&group, form, tokens, streams[0], blocks[1].data);
    kvt_snap_gather(&group, form, tokens, blocks[1].data, streams[1]);
    assert_memory_equal(streams[0], streams[1], bytes);
    check_codes(&s[0], &group, &blocks[1], layout->k_codes, streams[0]);
    check_codes(&s[1], &group, &blocks[1], layout->v_codes, streams[0] + s[0].bytes);
    for (int i = 0; i < 2; i++) {
        free(blocks[i].data);
        free(streams[i]);
    }
}

static void test_blocks(void **state)
{
    (void)state;
    for (int k = KVT_TYPE_F16; k <= KVT_TYPE_I4; k++)
        for (int v = KVT_TYPE_F16; v <= KVT_TYPE_I5; v++)
            for (uint32_t form = 0; form < KVT_FORMS; form++)
                for (uint32_t n = 1; n <= 64; n += n % 16 == 15 ? 1 : 2) {
                    const int seals = k >= KVT_TYPE_I8 || v >= KVT_TYPE_I8;
                    const int coarse = k == KVT_TYPE_I4 || v >= KVT_TYPE_I4;
                    if (form == KVT_REOPENED ? k == KVT_TYPE_I4 : form == KVT_FINE ? coarse : seals)
                        check_block((kvt_type)k, (kvt_type)v, form, n);
                }
}

/* What the encoder makes, for data that makes it choose each filter, comes back. */
static void test_choice(void **state)
{
    (void)state;
    for (int kind = KVT_SNAP_KIND_K; kind <= KVT_SNAP_KIND_V; kind++)
        for (uint32_t want = 0; want < 3; want++) {
            kvt_snap_shape s = i8_shape((uint32_t)kind, 61, 64);
            unsigned char *native = calloc(s.bytes, 1), *to = calloc(s.bytes, 1);
            unsigned char *out = calloc(s.bytes, 1);
            kvt_snap_context context;
            kvt_snap_codec codec;
            kvt_snap_stream stream;
            uint32_t seed = 5;

            assert_non_null(native);
            assert_non_null(to);
            assert_non_null(out);
            memset(&context, 0, sizeof context);
            for (size_t h = 0; h < HEADS; h++)
                for (size_t t = 0; t < 61; t++)
                    for (size_t d = 0; d < 64; d++) {
                        uint32_t small, row = (uint32_t)(t % 3 * 64 + d);
                        int x;
                        seed = seed * 1664525u + 1013904223u;
                        small = (seed >> 28) + (seed >> 24 & 15);
                        x = want == KVT_SNAP_DELTA ? (int)(d * 3) - 96 + (int)(small & 3)
                            : want == KVT_SNAP_TOKEN_MAJOR
                                ? (int)((row * 2654435761u >> 24) & 127) - 64
                                : (int)small - 15;
                        native[native_at(&s, h, t, d)] = (unsigned char)x;
                    }
            s.repeats = want == KVT_SNAP_TOKEN_MAJOR;
            kvt_snap_codec_init(&codec, &context);
            assert_int_equal(kvt_snap_encode(&codec, &s, native, to, &stream), KVT_OK);
            kvt_snap_codec_release(&codec);
            assert_int_equal(stream.codec, KVT_SNAP_ZSTD);
            assert_int_equal(stream.filter, want);
            assert_int_equal(decode(&s, stream.filter, stream.codec, to, stream.stored_bytes, out),
                             KVT_OK);
            assert_memory_equal(out, native, s.bytes);
            /* A frame cut, one that decodes to less, one that would decode to more. */
            assert_int_equal(
                decode(&s, stream.filter, stream.codec, to, stream.stored_bytes - 1, out),
                KVT_ERR_CORRUPT);
            s.bytes++;
            native = realloc(native, s.bytes);
            assert_non_null(native);
            assert_int_equal(
                decode(&s, KVT_SNAP_NATIVE, stream.codec, to, stream.stored_bytes, native),
                KVT_ERR_CORRUPT);
            s.bytes -= 2;
            assert_int_equal(
                decode(&s, KVT_SNAP_NATIVE, stream.codec, to, stream.stored_bytes, out),
                KVT_ERR_CORRUPT);
            free(native);
            free(to);
            free(out);
        }
}

/* Frames of contents alone: none that zstd skips, before, between or behind them; none cut. */
static void test_skippable(void **state)
{
    static const unsigned char skipped[16] = {0, 0x2a, 0x4d, 0x18, 8};
    kvt_snap_shape s;
    unsigned char native[4096], to[4096], out[4096];
    kvt_snap_context context;
    kvt_snap_codec codec;
    kvt_snap_stream stream;
    size_t n, first;
    (void)state;

    memset(&s, 0, sizeof s);
    memset(&context, 0, sizeof context);
    s.kind = KVT_SNAP_KIND_TOKEN_IDS; /* four planes, a frame of each */
    s.element = 4;
    s.bits = 32;
    s.bytes = sizeof native;
    for (size_t i = 0; i < sizeof native; i++)
        native[i] = (unsigned char)(i % 4 < 2 ? i * i % 11 : 0);
    kvt_snap_codec_init(&codec, &context);
    assert_int_equal(kvt_snap_encode(&codec, &s, native, to, &stream), KVT_OK);
    kvt_snap_codec_release(&codec);
    assert_int_equal(stream.codec, KVT_SNAP_ZSTD);
    n = stream.stored_bytes;
    assert_int_equal(decode(&s, stream.filter, KVT_SNAP_ZSTD, to, n, out), KVT_OK);
    assert_memory_equal(out, native, sizeof native);
    for (first = 4; memcmp(to + first, to, 4) != 0; first++) /* the second frame */
        assert_true(first < n);
    for (unsigned low = 0x4f; low <= 0x60; low++) {
        const size_t places[] = {0, first, n};
        for (int i = 0; i < 3; i++) {
            unsigned char file[4096];
            memcpy(file, to, places[i]);
            memcpy(file + places[i], skipped, sizeof skipped);
            file[places[i]] = (unsigned char)low;
            memcpy(file + places[i] + sizeof skipped, to + places[i], n - places[i]);
            assert_int_equal(
                decode(&s, stream.filter, KVT_SNAP_ZSTD, file, n + sizeof skipped, out),
                KVT_ERR_CORRUPT);
        }
    }
    for (size_t more = 1; more < 8; more++) { /* bytes behind the last one */
        memset(to + n, 0x28, more);
        assert_int_equal(decode(&s, stream.filter, KVT_SNAP_ZSTD, to, n + more, out),
                         KVT_ERR_CORRUPT);
        assert_int_equal(decode(&s, stream.filter, KVT_SNAP_ZSTD, to, n - more, out),
                         KVT_ERR_CORRUPT);
    }
}

/* Windows that zstd takes where pointers have 32 bits, and no larger ones. */
static void test_frame_windows(void **state)
{
    enum { N = 4096 };
    unsigned char frame[] = {0x28, 0xb5, 0x2f, 0xfd, 0, 0, 3, N * 8 >> 8 & 255, N * 8 >> 16, 0};
    unsigned char out[N], native[N] = {0};
    kvt_snap_shape s;
    (void)state;

    memset(&s, 0, sizeof s);
    s.kind = KVT_SNAP_KIND_TOKEN_IDS;
    s.element = 4;
    s.bits = 32;
    s.bytes = N;
    for (unsigned window = 16; window < 256; window++) { /* less than N is another matter */
        frame[5] = (unsigned char)window;
        memset(out, 1, N);
        assert_int_equal(decode(&s, KVT_SNAP_NATIVE, KVT_SNAP_ZSTD, frame, sizeof frame, out),
                         window >> 3 <= 20 ? KVT_OK : KVT_ERR_CORRUPT);
        if (window >> 3 <= 20)
            assert_memory_equal(out, native, N);
    }
}

/* zstd where it saves 2% or more, else raw: random bytes with ever more zeros among them. */
static void test_saving(void **state)
{
    kvt_snap_shape s = i8_shape(KVT_SNAP_KIND_K, 64, 512);
    unsigned char *native = calloc(s.bytes, 1), *to = calloc(s.bytes, 1);
    kvt_snap_context context;
    kvt_snap_codec codec;
    int raw = 0, coded = 0;
    (void)state;

    assert_non_null(native);
    assert_non_null(to);
    memset(&context, 0, sizeof context);
    kvt_snap_codec_init(&codec, &context);
    for (uint32_t zeros = 0; zeros < 120; zeros++) { /* of 1024 */
        kvt_snap_stream stream;
        uint32_t seed = zeros;
        for (size_t i = 0; i < s.bytes; i++) {
            seed = seed * 1664525u + 1013904223u;
            native[i] = (unsigned char)((seed >> 14 & 1023) < zeros ? 0 : seed >> 24);
        }
        assert_int_equal(kvt_snap_encode(&codec, &s, native, to, &stream), KVT_OK);
        raw += stream.codec == KVT_SNAP_RAW;
        coded += stream.codec == KVT_SNAP_ZSTD;
        assert_true(stream.codec == KVT_SNAP_RAW ? stream.stored_bytes == s.bytes
                                                 : stream.stored_bytes <= s.bytes - s.bytes / 50);
    }
    assert_true(raw > 10 && coded > 10);
    kvt_snap_codec_release(&codec);
    free(native);
    free(to);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_i8),
        cmocka_unit_test(test_planes),
        cmocka_unit_test(test_forms),
        cmocka_unit_test(test_coarse),
        cmocka_unit_test(test_coarse_scales),
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_choice),
        cmocka_unit_test(test_skippable),
        cmocka_unit_test(test_frame_windows),
        cmocka_unit_test(test_saving),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
