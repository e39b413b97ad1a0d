/*
 * Images of layers and their native streams, for all types, forms and numbers of tokens: against
 * the places that simd/tile.h gives a token and a dim, and against what append has stored. A unit
 * test of src/snapshot/image.c and streams.c: it includes internal headers and links the static
 * library.
 */
#include "support.h"

#include "src/snapshot/format.h"

/* ---- a layer's live bits, by tile.h ---- */

typedef struct layer {
    kvt_group group;
    kvt_snapshot_group geometry;
    uint32_t form, tokens;
    size_t bytes;
    unsigned char *live;   /* the bits that hold a number */
    unsigned char *memory; /* sound numbers there, anything elsewhere */
} layer;

/* Sound f16: of a power of two, a magnitude, or any. */
static uint16_t any_f16(rng *r, int is_power, int is_signed)
{
    uint32_t x = rng_below(r, 0x7c00);
    if (is_power)
        x = 0x3c00 + 0x400 * rng_below(r, 16);
    return (uint16_t)(x | (is_signed && rng_below(r, 2) ? 0x8000u : 0u));
}

static void put16(layer *l, size_t at, uint16_t x)
{
    memset(l->live + at, 0xff, 2);
    memcpy(l->memory + at, &x, 2);
}

static void put_code(layer *l, rng *r, kvt_type type, size_t codes, size_t at)
{
    uint32_t x = rng_below(r, 0x7f800000) | (rng_below(r, 2) ? 0x80000000u : 0);
    switch (type) {
    case KVT_TYPE_F32:
        memset(l->live + codes + at * 4, 0xff, 4);
        memcpy(l->memory + codes + at * 4, &x, 4);
        break;
    case KVT_TYPE_F16: put16(l, codes + at * 2, any_f16(r, 0, 1)); break;
    default:
        l->live[codes + at] = 0xff;
        l->memory[codes + at] = (unsigned char)(int)(rng_below(r, 255) - 127);
    }
}

/* The largest value of an open row, its offset apart: docs/format.md, "Streams". */
static double most_of(const layer *l, int is_k, uint16_t scale, unsigned gain)
{
    const kvt_type type = is_k ? l->group.config.k_type : l->group.config.v_type;
    if (l->form == KVT_REOPENED && is_k)
        return gain ? 786048 : 2.4e5;
    if (l->form == KVT_REOPENED && type == KVT_TYPE_I8)
        return 127 * 65504;
    if (l->form == KVT_REOPENED && type == KVT_TYPE_I5)
        return 31 * 65504;
    if (l->form == KVT_REOPENED && scale & 0x8000)
        return 63 * (double)kvt_f16_to_f32(scale & 0x7fff);
    return type == KVT_TYPE_I8 ? 8e6 : is_k ? 2.4e5 : 2e6;
}

/* A code of an open row, no larger than that. Half of the time of the largest ones. */
static uint16_t row_code(rng *r, uint16_t scale, double most)
{
    uint16_t x = rng_below(r, 2) ? (uint16_t)(0x7800 + rng_below(r, 0x400)) : any_f16(r, 0, 0);
    while ((double)kvt_f16_to_f32(x) * kvt_f16_to_f32(scale & 0x7fff) > most)
        x = (uint16_t)(x >= 0x400 ? x - 0x400 : 0);
    return (uint16_t)(x | (rng_below(r, 2) ? 0x8000u : 0u));
}

static void fill_head(layer *l, rng *r, size_t record)
{
    const kvt_layout *o = &l->group.layouts[l->form];
    const kvt_group_config *c = &l->group.config;
    const size_t k = record + o->k_codes, v = record + o->v_codes;
    const int is_open = kvt_is_open(l->form), reopens = l->form == KVT_REOPENED;
    const int k4 = o->k_type == KVT_TYPE_I4;
    size_t t, d, at;

    for (t = 0; t < l->tokens; t++) {
        const int k_rows = is_open && kvt_is_sealed_type(c->k_type);
        const int v_rows = is_open && kvt_is_sealed_type(c->v_type);
        uint16_t k_scale = any_f16(r, is_open, is_open && l->group.offsets);
        uint16_t v_scale = any_f16(r, is_open && !reopens, reopens && c->v_type == KVT_TYPE_I4);
        unsigned gain = k4 ? 1 + rng_below(r, 255) : rng_below(r, 2) * rng_below(r, 256);
        for (d = 0; d < c->k_dim; d++) {
            if (k_rows)
                put16(l, k + kvt_kw_index(t, d, o->k_dims) * 2,
                      row_code(r, k_scale, most_of(l, 1, k_scale, gain)));
            else if (o->k_type == KVT_TYPE_I8)
                put_code(l, r, o->k_type, k, kvt_k8_index(t, d, o->k_dims));
            else if (k4)
                l->live[k + kvt_k4_index(t, d, o->k_dims)] |=
                    (unsigned char)(15 << kvt_k4_shift(d));
            else
                put_code(l, r, o->k_type, k, kvt_kw_index(t, d, o->k_dims));
        }
        for (d = 0; d < c->v_dim && !l->group.v_in_k; d++) {
            if (v_rows)
                put16(l, v + kvt_vw_index(t, d, o->v_dims) * 2,
                      row_code(r, v_scale, most_of(l, 0, v_scale, 0)));
            else if (o->v_type == KVT_TYPE_I8)
                put_code(l, r, o->v_type, v, kvt_v8_index(t, d, o->v_dims));
            else if (kvt_is_coarse(o->v_type))
                l->live[v + kvt_v4_index(t, d, o->v_dims)] |=
                    (unsigned char)(15 << kvt_v4_shift(t));
            else
                put_code(l, r, o->v_type, v, kvt_vw_index(t, d, o->v_dims));
            if (o->v_type == KVT_TYPE_I5)
                l->live[v + kvt_v5_index(t, d, o->v_dims)] |=
                    (unsigned char)(1 << kvt_v5_shift(t, d));
        }
        if (o->k_scale_bytes && !k4)
            put16(l, record + o->k_scales + t * 2, k_scale);
        if (o->v_scale_bytes)
            put16(l, record + o->v_scales + t * 2, v_scale);
        at = record +
             (k4 ? o->k_scales + kvt_k4_scales(o->k_dims) * 2 : o->k_seed + o->k_dims * 4) + t;
        if (k4 || reopens) {
            l->live[at] = 0xff;
            l->memory[at] = (unsigned char)gain;
        }
    }
    for (d = 0; d < c->k_dim; d++) {
        if (k4)
            put16(l, record + o->k_scales + d * 2, any_f16(r, 0, 1));
        if (o->k_offset_bytes)
            put16(l, record + o->k_offset + d * 2, any_f16(r, 0, 1));
        if (o->k_seed_bytes) {
            put16(l, record + o->k_seed + d * 2, any_f16(r, 0, 1));
            put16(l, record + o->k_seed + (o->k_dims + d) * 2, any_f16(r, 0, 1));
        }
    }
}

static unsigned char *some(size_t bytes)
{
    unsigned char *p = malloc(bytes ? bytes : 1);
    assert_non_null(p);
    return p;
}

static void layer_make(layer *l, rng *r)
{
    size_t i, h, step = l->group.layouts[l->form].head_bytes;
    l->bytes = l->group.layouts[l->form].layer_bytes;
    assert_int_equal(l->bytes, step * l->group.config.n_kv_heads);
    l->live = some(l->bytes);
    l->memory = some(l->bytes);
    memset(l->live, 0, l->bytes);
    for (i = 0; i < l->bytes; i++)
        l->memory[i] = (unsigned char)rng_next(r);
    for (h = 0; h < l->group.config.n_kv_heads; h++)
        fill_head(l, r, h * step);
}

static void layer_free(layer *l)
{
    free(l->live);
    free(l->memory);
}

static const char *image_fault(const layer *l, const unsigned char *image)
{
    return kvt_snap_image_check(&l->group, l->form, l->tokens, image);
}

/* The same with a copy. */
static const char *copy_fault(const layer *l, const unsigned char *image)
{
    unsigned char *to = some(l->bytes), digest[KVT_SNAP_ID_BYTES];
    const char *fault = kvt_snap_image_copy(&l->group, l->form, l->tokens, to, image, digest);
    free(to);
    return fault;
}

/* What kvt_snap_check finds in streams. */
static const char *streams_fault(const layer *l, const unsigned char *streams)
{
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    const char *fault = NULL;
    size_t bytes;
    uint32_t n = kvt_snap_shapes(&l->geometry, l->form, l->tokens, shapes, &bytes), i;
    for (i = 0; i < n && !fault; streams += shapes[i++].bytes)
        fault = kvt_snap_check(&shapes[i], streams);
    return fault ? fault : kvt_snap_check_rows(shapes, n, streams - bytes);
}

static size_t streams_bytes(const layer *l)
{
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    size_t bytes;
    (void)kvt_snap_shapes(&l->geometry, l->form, l->tokens, shapes, &bytes);
    return bytes;
}

/* ---- checks of one layer ---- */

/* Each bit that holds no number, or each of a sample, is refused when it is set. */
static void check_dead(const layer *l, rng *r, unsigned char *image, int all)
{
    size_t n = all ? l->bytes : 300, i;
    for (i = 0; i < n; i++) {
        size_t at = all ? i : rng_below(r, (uint32_t)l->bytes);
        unsigned char dead = (unsigned char)~l->live[at], bit = (unsigned char)(dead & -dead);
        if (!dead)
            continue;
        if (rng_below(r, 2)) /* the highest */
            for (bit = 0x80; !(bit & dead);)
                bit = (unsigned char)(bit >> 1);
        image[at] |= bit;
        if (!image_fault(l, image) || (i % 16 == 0 && !copy_fault(l, image)))
            fail_msg("byte %zu: 0x%x is taken", at, (unsigned)bit);
        image[at] = (unsigned char)(image[at] & ~bit);
    }
    assert_null(image_fault(l, image));
}

/* What an element's change makes unsound in an image, it makes unsound in the streams, and only
 * that. */
static void check_values(const layer *l, rng *r, unsigned char *image, unsigned char *streams)
{
    static const uint16_t bad[] = {0x7c00, 0xfc00, 0x7e01, 0x8000, 0xbc00, 0x0000, 0x8080,
                                   0x7fff, 0x3c01, 0x3c00, 0x7800, 0xf800, 0x7bff, 0xfbff};
    size_t i;
    for (i = 0; i < 400; i++) {
        size_t at = rng_below(r, (uint32_t)(l->bytes / 2)) * 2, b;
        unsigned char had[2];
        uint16_t x = bad[rng_below(r, sizeof bad / sizeof *bad)];
        const char *a, *of_streams;
        if (i % 4 == 0) { /* of the parts that are small */
            size_t k = l->group.layouts[l->form].k_scales, end = l->group.layouts[l->form].v_codes;
            at = end > k ? k + rng_below(r, (uint32_t)(end - k) / 2) * 2 : at;
        }
        memcpy(had, image + at, 2);
        for (b = 0; b < 2; b++) { /* bits that hold a number only */
            unsigned char byte = (unsigned char)(b ? x >> 8 : x), live = l->live[at + b];
            image[at + b] = (unsigned char)((image[at + b] & ~live) | (byte & live));
        }
        kvt_snap_gather(&l->group, l->form, l->tokens, image, streams);
        a = image_fault(l, image);
        of_streams = streams_fault(l, streams);
        if (!a != !of_streams || (a && strcmp(a, of_streams) != 0))
            fail_msg("byte %zu, 0x%x: image: %s; streams: %s", at, (unsigned)x, a ? a : "sound",
                     of_streams ? of_streams : "sound");
        memcpy(image + at, had, 2);
    }
    assert_null(image_fault(l, image));
}

/* A code of each open row, at any dim, as large as its scale allows, and larger by one. */
static void check_rows(const layer *l, rng *r, unsigned char *image, unsigned char *streams)
{
    const kvt_layout *o = &l->group.layouts[l->form];
    const kvt_group_config *c = &l->group.config;
    size_t t;
    int is_k;
    for (t = 0; t < 2 * (size_t)l->tokens && kvt_is_open(l->form); t++)
        for (is_k = 0; is_k < 2; is_k++) {
            const size_t record = rng_below(r, c->n_kv_heads) * o->head_bytes, row = t / 2;
            unsigned char *scale = image + record + (is_k ? o->k_scales : o->v_scales) + row * 2;
            unsigned gain = o->k_seed_bytes ? image[record + o->k_seed + o->k_dims * 4 + row] : 0;
            unsigned char *code =
                image + record +
                (is_k ? o->k_codes + 2 * kvt_kw_index(row, rng_below(r, c->k_dim), o->k_dims)
                      : o->v_codes + 2 * kvt_vw_index(row, rng_below(r, c->v_dim), o->v_dims));
            uint16_t had, x, s;
            double most;
            if (!(is_k ? o->k_scale_bytes : o->v_scale_bytes))
                continue;
            memcpy(&had, code, 2);
            memcpy(&s, scale, 2);
            most = most_of(l, is_k, s, gain);
            for (x = 0x7bff; x; x--)
                if ((double)kvt_f16_to_f32(x) * kvt_f16_to_f32(s & 0x7fff) <= most)
                    break;
            for (int more = 0; more < 2 && x + more < 0x7c00; more++) {
                const uint16_t put = (uint16_t)((x + more) | (t % 2 ? 0x8000 : 0));
                const char *fault;
                memcpy(code, &put, 2);
                kvt_snap_gather(&l->group, l->form, l->tokens, image, streams);
                fault = image_fault(l, image);
                if (!fault != !more || !streams_fault(l, streams) != !more ||
                    !copy_fault(l, image) != !more || (fault && !strstr(fault, "too large")))
                    fail_msg("form %u, %s of type %d, row %zu, scale %04x, gain %u, code %04x: %s",
                             l->form, is_k ? "K" : "V", (int)(is_k ? c->k_type : c->v_type), row, s,
                             gain, put, fault ? fault : "sound");
            }
            memcpy(code, &had, 2);
        }
}

static void check_layer(layer *l, rng *r)
{
    unsigned char *image = some(l->bytes), *again = some(l->bytes);
    unsigned char *streams = some(streams_bytes(l)), *other = some(streams_bytes(l));
    unsigned char digests[2][KVT_SNAP_ID_BYTES];
    const int all = l->tokens == 64 || l->tokens == 37 || l->tokens == 1;
    size_t i;

    memcpy(image, l->memory, l->bytes);
    kvt_snap_image_clear(&l->group, l->form, l->tokens, image);
    for (i = 0; i < l->bytes; i++)
        if (image[i] != (l->memory[i] & l->live[i]))
            fail_msg("byte %zu is 0x%x, of 0x%x, of which 0x%x are live", i, image[i], l->memory[i],
                     l->live[i]);
    assert_ptr_equal(image_fault(l, image), NULL);

    kvt_snap_gather(&l->group, l->form, l->tokens, l->memory, streams);
    kvt_snap_gather(&l->group, l->form, l->tokens, image, other);
    assert_memory_equal(streams, other, streams_bytes(l));
    assert_null(streams_fault(l, streams));
    memset(again, 0xa5, l->bytes);
    kvt_snap_scatter(&l->group, l->form, l->tokens, streams, again);
    assert_memory_equal(again, image, l->bytes);

    memset(again, 0xa5, l->bytes);
    assert_null(kvt_snap_image_copy(&l->group, l->form, l->tokens, again, image, digests[0]));
    assert_memory_equal(again, image, l->bytes);
    kvt_snap_digest(image, l->bytes, digests[1]);
    assert_memory_equal(digests[0], digests[1], sizeof digests[0]);

    if (all || l->tokens % 7 == 3) {
        check_dead(l, r, image, all && l->group.config.n_kv_heads == 1);
        check_values(l, r, image, other);
        check_rows(l, r, image, other);
    }
    free(image);
    free(again);
    free(streams);
    free(other);
}

/* ---- all types, forms, dims ---- */

static kvt_snapshot_group geometry_of(const kvt_group_config *c)
{
    kvt_snapshot_group g;
    memset(&g, 0, sizeof g);
    g.n_layers = c->n_layers;
    g.n_q_heads = c->n_q_heads;
    g.n_kv_heads = c->n_kv_heads;
    g.k_dim = c->k_dim;
    g.v_dim = c->v_dim;
    g.k_type = c->k_type;
    g.v_type = c->v_type;
    g.flags = c->flags;
    return g;
}

/* Groups of all types: calls `use` for each. */
static void each_group(rng *r, void (*use)(const kvt_group_config *, rng *))
{
    static const uint32_t dims[][2] = {{24, 40}, {40, 24}, {64, 64}, {8, 136}, {136, 8}, {32, 16}};
    for (int k = 0; k <= KVT_TYPE_I4; k++)
        for (int v = 0; v <= KVT_TYPE_I5; v++)
            for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
                uint32_t heads = 1 + rng_below(r, 2);
                kvt_group_config c =
                    group_of(1, heads, heads, dims[i][0], dims[i][1], (kvt_type)k, (kvt_type)v);
                if (k != KVT_TYPE_I4 && rng_below(r, 3) == 0)
                    c.flags |= KVT_GROUP_NO_OFFSET;
                if (k == v && k != KVT_TYPE_I4 && i < 3) {
                    c.flags |= KVT_GROUP_V_IN_K;
                    c.v_dim = c.k_dim;
                }
                use(&c, r);
            }
}

static void check_group(const kvt_group_config *config, rng *r)
{
    static unsigned n_groups;
    layer l;
    if (is_quick() && n_groups++ % 4)
        return;
    kvt_group_make(config, &l.group);
    l.geometry = geometry_of(config);
    for (l.form = KVT_SEALED; l.form < KVT_FORMS; l.form++)
        for (l.tokens = 1; l.tokens <= 64; l.tokens++) {
            if (!kvt_snap_has_form(&l.geometry, l.form))
                continue;
            if (is_quick() && l.tokens % 9 != 1) /* with 1, 37 and 64 */
                continue;
            layer_make(&l, r);
            check_layer(&l, r);
            layer_free(&l);
        }
}

static void images_and_streams_are_the_same_numbers(void **state)
{
    rng r = {11};
    (void)state;
    each_group(&r, check_group);
}

/* ---- what append has stored ---- */

static uint32_t forms_seen;
static size_t images_seen;

static void check_stored(const kvt_seq *seq, const kvt_group_config *config)
{
    const kvt_group *of_cache = &seq->cache->groups[0];
    layer l;
    kvt_group_make(config, &l.group);
    l.geometry = geometry_of(config);
    for (size_t row = 0; row < seq->n_rows; row++) {
        const kvt_block *block = kvt_seq_block(seq, row, 0);
        const unsigned char *memory = kvt_head_record(of_cache, block, 0, 0);
        unsigned char *image;
        l.form = block->form;
        l.tokens = (uint32_t)kvt_row_tokens(seq, row);
        l.bytes = l.group.layouts[l.form].layer_bytes;
        forms_seen |= 1u << l.form;
        image = some(l.bytes);
        memcpy(image, memory, l.bytes);
        kvt_snap_image_clear(&l.group, l.form, l.tokens, image);
        if (image_fault(&l, image))
            fail_msg("form %u, row %zu, %u tokens: %s", l.form, row, l.tokens,
                     image_fault(&l, image));
        if (kvt_snap_is_image(&l.group, l.form, l.tokens)) {
            images_seen++;
            for (size_t i = 0; i < l.bytes; i++)
                if (image[i] != memory[i])
                    fail_msg("form %u, row %zu, types %d %d, dims %u %u, byte %zu: 0x%x", l.form,
                             row, (int)config->k_type, (int)config->v_type, config->k_dim,
                             config->v_dim, i, memory[i]);
        }
        free(image);
    }
}

static void check_appended(const kvt_group_config *config, rng *r)
{
    kvt_group_config c = *config;
    kvt_cache *cache;
    kvt_seq *seq;
    tokens t;
    c.fine_tokens = rng_below(r, 2) ? KVT_FINE_NONE : 64;
    c.residual_tokens = rng_below(r, 2) ? KVT_RESIDUAL_NONE : 100;
    cache = cache_of(&c, 1024, 1, NULL);
    t = tokens_make(r, 450, &c);
    for (size_t i = 0; i < 450 * t.kv_heads * c.k_dim; i += 97) /* few outliers, and large */
        t.k[i] *= i % 2 ? 30.0f : 3000.0f;
    for (size_t i = 0; i < t.n * t.kv_heads * c.v_dim && (c.flags & KVT_GROUP_V_IN_K); i++)
        t.v[i] = t.k[i];
    for (int round = 0; round < 3; round++) { /* with blocks that are recycled */
        expect_ok(cache, kvt_seq_create(cache, &seq));
        append_all(cache, seq, &c, &t, 0, 300, round == 1 ? 7 : 64 + rng_below(r, 100));
        check_stored(seq, config);
        expect_ok(cache, kvt_seq_truncate(seq, 170 + rng_below(r, 20)));
        check_stored(seq, config);
        for (int step = 0; step < 3; step++) { /* some of the rows are open again */
            append_all(cache, seq, &c, &t, (size_t)kvt_seq_length(seq), step == 1 ? 50 : 4, 5);
            check_stored(seq, config);
        }
        append_all(cache, seq, &c, &t, (size_t)kvt_seq_length(seq), 150, 5);
        check_stored(seq, config);
        kvt_seq_destroy(seq);
    }
    tokens_free(&t);
    kvt_cache_destroy(cache);
}

static void what_append_stores_is_sound(void **state)
{
    rng r = {12};
    (void)state;
    forms_seen = 0;
    images_seen = 0;
    each_group(&r, check_appended);
    assert_int_equal(forms_seen, (1 << KVT_FORMS) - 1);
    assert_true(images_seen > 500);
}

/*
 * Rows as large as an append takes: each is made smaller until it does. first: how large token 0
 * is, the offset of the others.
 */
static void append_largest(kvt_cache *cache, kvt_seq *seq, const kvt_group_config *c, rng *r,
                           size_t n, int first)
{
    float k[64], v[64];
    for (size_t i = 0; i < n; i++) {
        const int is_first = kvt_seq_length(seq) == 0;
        static const float limit[] = {6.5e4f, 6.5e4f, 8e6f, 2.4e5f, 2e6f};
        float most[2] = {limit[c->k_type], c->v_type == KVT_TYPE_I4 ? 2e6f : limit[c->v_type]};
        kvt_status status = KVT_ERR_VALUE;
        most[0] += kvt_is_sealed_type(c->k_type) ? 65504.0f : 0.0f; /* and an offset */
        while (status != KVT_OK) {
            const kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
            rng same = {r->state};
            for (size_t d = 0; d < c->k_dim; d++)
                k[d] = (float)((int)rng_below(&same, 3) - 1) * (is_first ? (float)first : most[0]);
            for (size_t d = 0; d < c->v_dim; d++)
                v[d] = (float)((int)rng_below(&same, 3) - 1) * most[1];
            expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
            status = kvt_append(seq, 0, &kt, &vt);
            if (status == KVT_OK) {
                expect_ok(cache, kvt_seq_commit(seq, NULL));
                break;
            }
            expect_ok(cache, kvt_seq_abort(seq));
            most[0] -= 9357.0f; /* a seventh of it */
        }
        (void)rng_next(r);
    }
}

/* What a sealed block of a file may hold: the largest scales, middles and gains. */
static void make_extreme(kvt_seq *seq, size_t row, rng *r)
{
    const kvt_group *group = &seq->cache->groups[0];
    const kvt_block *block = kvt_seq_block(seq, row, 0);
    const kvt_layout *o = &group->layouts[block->form];
    unsigned char *record = kvt_head_record(group, block, 0, 0);
    uint16_t *at;
    size_t i;
    for (i = 0; i < o->k_code_bytes; i++)
        record[o->k_codes + i] = (unsigned char)(15 * rng_below(r, 2) + 240 * rng_below(r, 2));
    for (i = 0; i < group->config.k_dim; i++) {
        at = (uint16_t *)(void *)(record + o->k_scales) + i;
        *at = (uint16_t)(rng_below(r, 4) ? 0x7bff : 0xfbff);
        at = (uint16_t *)(void *)(record + o->k_offset) + i;
        *at = (uint16_t)(rng_below(r, 2) ? 0x7bff : 0xfbff);
    }
    for (i = 0; i < 64; i++)
        record[o->k_scales + kvt_k4_scales(o->k_dims) * 2 + i] =
            (unsigned char)(rng_below(r, 2) ? 255 : 1);
    for (i = 0; i < o->v_scale_bytes / 2; i++) {
        at = (uint16_t *)(void *)(record + o->v_scales) + i;
        *at = 0x7bff;
    }
    for (i = 0; i < o->v_code_bytes && o->v_scale_bytes; i++)
        record[o->v_codes + i] = o->v_type == KVT_TYPE_I8
                                     ? (rng_below(r, 2) ? 127 : 129)
                                     : (unsigned char)(rng_below(r, 2) ? 0xff : 0x00);
}

static void the_largest_rows_are_sound(void **state)
{
    rng r = {13};
    (void)state;
    forms_seen = 0;
    for (int k = KVT_TYPE_F32; k <= KVT_TYPE_I4; k++)
        for (int v = KVT_TYPE_F32; v <= KVT_TYPE_I5; v++)
            for (int first = -65504; first <= 65504; first += 65504) {
                kvt_group_config c = group_of(1, 1, 1, 16, 16, (kvt_type)k, (kvt_type)v);
                kvt_cache *cache;
                kvt_seq *seq;
                if (k < KVT_TYPE_I8 && v < KVT_TYPE_I8)
                    continue;
                if (is_quick() && first)
                    continue;
                c.flags |= KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_V_ROTATION;
                c.fine_tokens = KVT_FINE_NONE;
                c.residual_tokens = KVT_RESIDUAL_NONE;
                cache = cache_of(&c, 1024, 1, NULL);
                expect_ok(cache, kvt_seq_create(cache, &seq));
                for (int round = 0; round < 4; round++) { /* rows that are open, and again */
                    append_largest(cache, seq, &c, &r, 30, first);
                    check_stored(seq, &c);
                    append_largest(cache, seq, &c, &r, 60, first);
                    check_stored(seq, &c);
                    for (size_t row = 0; row < 2 && round % 2 && k == KVT_TYPE_I4; row++)
                        if (!kvt_is_open(kvt_seq_block(seq, row, 0)->form))
                            make_extreme(seq, row, &r);
                    expect_ok(cache, kvt_seq_truncate(seq, 20 + 10 * (uint64_t)round));
                }
                kvt_seq_destroy(seq);
                kvt_cache_destroy(cache);
            }
    assert_int_equal(forms_seen & (1 << KVT_OPEN | 1 << KVT_REOPENED),
                     1 << KVT_OPEN | 1 << KVT_REOPENED);
}

/* A layer of 64 tokens is its image as it lies there, unless its padding may hold anything. */
static void some_layers_are_images(void **state)
{
    kvt_group g;
    kvt_group_config c = group_of(1, 1, 1, 24, 64, KVT_TYPE_I4, KVT_TYPE_I5);
    (void)state;
    kvt_group_make(&c, &g);
    assert_false(kvt_snap_is_image(&g, KVT_SEALED, 64)); /* K's dims */
    assert_true(kvt_snap_is_image(&g, KVT_FINE, 64));
    assert_true(kvt_snap_is_image(&g, KVT_OPEN, 64));
    assert_true(kvt_snap_is_image(&g, KVT_REOPENED, 64));
    assert_false(kvt_snap_is_image(&g, KVT_FINE, 63));
    c.k_dim = 32;
    kvt_group_make(&c, &g);
    assert_true(kvt_snap_is_image(&g, KVT_SEALED, 64));
    c.v_dim = 40;
    kvt_group_make(&c, &g);
    assert_false(kvt_snap_is_image(&g, KVT_SEALED, 64));
    assert_true(kvt_snap_is_image(&g, KVT_FINE, 64));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(images_and_streams_are_the_same_numbers),
        cmocka_unit_test(what_append_stores_is_sound),
        cmocka_unit_test(the_largest_rows_are_sound),
        cmocka_unit_test(some_layers_are_images),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
