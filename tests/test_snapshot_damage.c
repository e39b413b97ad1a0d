/*
 * Snapshots that must be rejected, and failures while saving and loading: each returns a status and
 * leaves the sequence unchanged, byte for byte.
 */
#include "snapshot_support.h"

#include <math.h>
#include <stdio.h>
#include <time.h>

/* A sequence with contents that must not change. */
typedef struct victim {
    model m;
    kvt_cache *cache;
    kvt_seq *seq;
    bytes before;
    uint64_t hash;
} victim;

static victim victim_make(const model *m)
{
    victim v;
    v.m = *m;
    v.cache = model_cache(m);
    v.seq = model_seq(v.cache);
    model_append(m, v.cache, v.seq, 21, 4);
    v.before = saved(v.cache, v.seq, KVT_CODEC_RAW);
    v.hash = state_hash(m, v.cache, v.seq);
    return v;
}

static void victim_check(const victim *v)
{
    bytes now = saved(v->cache, v->seq, KVT_CODEC_RAW);
    assert_int_equal(now.n, v->before.n);
    assert_memory_equal(now.data, v->before.data, now.n);
    assert_true(state_hash(&v->m, v->cache, v->seq) == v->hash);
    bytes_free(&now);
}

static void victim_destroy(victim *v)
{
    bytes_free(&v->before);
    kvt_seq_destroy(v->seq);
    kvt_cache_destroy(v->cache);
}

/* Not a codec: layer sections of raw streams without filter. */
#define LAYERS 77u

static bytes saved_as(const kvt_cache *cache, const kvt_seq *seq, uint32_t codec)
{
    bytes b = saved(cache, seq, codec == LAYERS ? KVT_CODEC_RAW : codec);
    if (codec == LAYERS)
        relay(&b, 0);
    return b;
}

static bytes snapshot_of(const model *m, size_t n, uint32_t codec)
{
    kvt_cache *cache = model_cache(m);
    kvt_seq *seq = model_seq(cache);
    bytes b;
    model_append(m, cache, seq, n, 40);
    b = saved_as(cache, seq, codec);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return b;
}

/* Of the same model with no residual window: 5 tokens of a sealed block, and so many behind. */
static bytes cut_snapshot_of(const model *m, size_t more)
{
    model sealing = *m;
    kvt_cache *cache;
    kvt_seq *seq;
    bytes b;
    sealing.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    cache = model_cache(&sealing);
    seq = model_seq(cache);
    model_append(&sealing, cache, seq, 71, 70); /* the last step makes the sealing final */
    expect_ok(cache, kvt_seq_truncate(seq, 5 - more));
    model_append(&sealing, cache, seq, more, more);
    b = saved_as(cache, seq, LAYERS);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return b;
}

static void must_refuse(const victim *v, const unsigned char *data, size_t n, const char *what,
                        size_t where)
{
    kvt_load_result result = {77, 77, 77, 77, 77, {0}};
    kvt_status status = load_bytes(v->seq, data, n, &result);
    if (status != KVT_ERR_CORRUPT && status != KVT_ERR_FORMAT)
        fail_msg("%s %zu of %zu: status %d", what, where, n, (int)status);
    assert_int_equal(result.n_tokens, 77);
}

static void every_byte(const model *m, size_t n, uint32_t codec)
{
    static const unsigned char patterns[] = {0x01, 0x10, 0x80, 0xff};
    const size_t step = quick_level() > 1 ? 7 : 1; /* not of the fields, which are of 4 and 8 */
    victim v = victim_make(m);
    bytes file = snapshot_of(m, n, codec);

    for (size_t i = 0; i < file.n; i += step) {
        for (size_t p = 0; p < sizeof patterns; p++) {
            file.data[i] ^= patterns[p];
            must_refuse(&v, file.data, file.n, "changed byte", i);
            file.data[i] ^= patterns[p];
        }
        must_refuse(&v, file.data, i, "cut at", i);
        if (i / step % 64 == 0)
            victim_check(&v);
    }
    victim_check(&v);
    expect_ok(v.cache, load_bytes(v.seq, file.data, file.n, NULL)); /* the file was good */
    bytes_free(&file);
    victim_destroy(&v);
}

static void test_every_byte(void **state)
{
    model i8 = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    model wide = model_of(2, 1, 16, 8, KVT_TYPE_F16, KVT_TYPE_F32);
    model two = model_of_two();
    model v_in_k = i8, sealing = i8, coarse; /* sealed blocks and an open one */
    (void)state;
    v_in_k.groups[0].flags = KVT_GROUP_V_IN_K;
    sealing.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    coarse = sealing; /* fine, sealed and open blocks */
    coarse.groups[0].k_type = KVT_TYPE_I4;
    coarse.groups[0].v_type = KVT_TYPE_I5;
    every_byte(&coarse, 131, KVT_CODEC_RAW);
    coarse.groups[0].v_type = KVT_TYPE_I4;
    every_byte(&coarse, 131, KVT_CODEC_ZSTD);
    coarse.groups[0].k_type = KVT_TYPE_I8;
    every_byte(&coarse, 67, KVT_CODEC_RAW);
    every_byte(&sealing, 67, KVT_CODEC_RAW);
    every_byte(&sealing, 131, KVT_CODEC_ZSTD);
    every_byte(&v_in_k, 5, KVT_CODEC_RAW);
    every_byte(&v_in_k, 67, KVT_CODEC_ZSTD);
    every_byte(&i8, 0, KVT_CODEC_ZSTD);
    every_byte(&i8, 5, KVT_CODEC_RAW);
    every_byte(&i8, 5, LAYERS);
    every_byte(&i8, 67, KVT_CODEC_ZSTD);
    every_byte(&wide, 3, KVT_CODEC_ZSTD);
    every_byte(&two, 18, KVT_CODEC_ZSTD);
}

/* ---- sound checksums, bad contents ---- */

static unsigned char *stream_at(bytes *file, uint32_t type, unsigned section, unsigned stream)
{
    size_t size, at = section_payload(file->data, file->n, type, section, &size);
    unsigned char *set = file->data + at;
    size_t begin = 8 + get32(set) * (size_t)24 + 8;
    for (unsigned i = 0; i < stream; i++)
        begin += get32(set + 8 + i * (size_t)24 + 4);
    return set + begin;
}

typedef void (*damage)(bytes *file);

static void bad_code(bytes *f)
{
    stream_at(f, 5, 0, 0)[0] = 0x80;
}
static void bad_v_code(bytes *f)
{
    stream_at(f, 5, 1, 1)[7] = 0x80;
}
/* 5 tokens: lanes 5 .. 15 of the tile are dead, so is lane 1 of the second group of V. */
static void bad_k_lane(bytes *f)
{
    stream_at(f, 5, 0, 0)[5 * 4] = 1;
}
static void bad_v_lane(bytes *f)
{
    stream_at(f, 5, 0, 1)[8 * 4 + 1] = 1;
}
static void bad_scale_sign(bytes *f)
{
    stream_at(f, 5, 0, 2)[1] |= 0x80;
}
static void bad_scale_inf(bytes *f)
{
    stream_at(f, 5, 0, 2)[3] = 0x7c;
}
static void bad_v_scale(bytes *f)
{
    stream_at(f, 5, 0, 2)[2 * 5 + 1] = 0x7e;
}
static void bad_offset(bytes *f)
{
    stream_at(f, 5, 0, 2)[2 * 10 + 15] = 0xfc;
}
static void bad_id(bytes *f)
{
    put32(stream_at(f, 1, 0, 0), (uint32_t)-2);
}
static void bad_id_low(bytes *f)
{
    put32(stream_at(f, 1, 0, 0), 0x80000000u);
}
static void bad_position(bytes *f)
{
    put32(stream_at(f, 2, 0, 0) + 16, 0xffffffffu);
}
static void bad_dead_position(bytes *f)
{
    put32(stream_at(f, 2, 0, 0) + 8, 0x80000000u);
}
static void bad_n_tokens(bytes *f)
{
    put64(f->data + 24, 6);
}
static void bad_many_tokens(bytes *f)
{
    put64(f->data + 24, (uint64_t)1 << 40);
}
static void bad_n_blocks(bytes *f)
{
    put64(f->data + 48, 1000);
}
static void bad_header_flags(bytes *f)
{
    put32(f->data + 44, 4);
}
static void bad_block_tokens(bytes *f)
{
    put32(f->data + 16, 128);
}
static void bad_sinks(bytes *f) /* without a window */
{
    f->data[64 + 44] = 1;
}
static void bad_layer_number(bytes *f)
{
    put32(f->data + 64 + 48, 1);
}
static void bad_layer_size(bytes *f)
{
    put64(f->data + 56, 1);
}

static void bad_section(bytes *f, uint32_t type, size_t field, uint32_t x)
{
    size_t size;
    put32(f->data + section_payload(f->data, f->n, type, 0, &size) - 32 + field, x);
}

static void bad_section_flag(bytes *f)
{
    bad_section(f, 2, 4, 0);
}
static void bad_section_flags(bytes *f)
{
    bad_section(f, 2, 4, 3);
}
static void bad_section_value(bytes *f)
{
    bad_section(f, 5, 16, 1);
}

static void bad_payload(bytes *f, uint32_t type, size_t at, uint32_t x)
{
    size_t size;
    put32(f->data + section_payload(f->data, f->n, type, 0, &size) + at, x);
}

static void bad_table_row(bytes *f)
{
    bad_payload(f, 3, 20, 1);
}
static void bad_table_tokens(bytes *f)
{
    bad_payload(f, 3, 24, 4);
}
static void bad_representation(bytes *f)
{
    bad_payload(f, 3, 28, 1);
}
/* In the block table and in the block. */
static void represent(bytes *f, unsigned block, uint32_t representation)
{
    size_t size;
    unsigned char *entry = f->data + section_payload(f->data, f->n, 3, 0, &size) + 32 * block + 28;
    unsigned char *again = f->data + section_payload(f->data, f->n, 4, block, &size) + 12;
    entry[0] = again[0] = (unsigned char)representation;
    entry[1] = again[1] = (unsigned char)(representation >> 8);
}
static void bad_form_2(bytes *f)
{
    represent(f, 0, 2);
}
static void bad_form_3(bytes *f)
{
    represent(f, 0, 3);
}
static void bad_form_4(bytes *f)
{
    represent(f, 0, 4);
}
static void bad_form_large(bytes *f)
{
    represent(f, 0, 0x101);
}
static void bad_form_of_block(bytes *f) /* only in one of two places */
{
    bad_section(f, 4, 32 + 12, 1);
}
static void turned_form(bytes *f) /* streams are of the other form */
{
    size_t size;
    represent(f, 0, !get32(f->data + section_payload(f->data, f->n, 3, 0, &size) + 28));
}
static void bad_form_order(bytes *f)
{
    represent(f, 0, 1);
    represent(f, 1, 0);
}
static void bad_last_form(bytes *f)
{
    represent(f, 1, 0);
}

/* Streams of 5 tokens, 8 dims, an open block. Scales: K at 0 .. 4, V at 5 .. 9, then offsets. */
static void put16(bytes *f, unsigned stream, size_t element, uint32_t x)
{
    unsigned char *at = stream_at(f, 5, 1, stream) + 2 * element;
    at[0] = (unsigned char)x;
    at[1] = (unsigned char)(x >> 8);
}
static void open_scale_3(bytes *f)
{
    put16(f, 2, 0, 0x4200);
}
static void open_scale_65504(bytes *f)
{
    put16(f, 2, 4, 0x7bff);
}
static void open_scale_half(bytes *f)
{
    put16(f, 2, 1, 0x3800);
}
static void open_scale_zero(bytes *f)
{
    put16(f, 2, 2, 0);
}
static void open_scale_inf(bytes *f) /* where 65536 would be */
{
    put16(f, 2, 3, 0x7c00);
}
/* Of K in an open block with offset, a sign is sound. */
static void open_scale_minus(bytes *f)
{
    put16(f, 2, 3, 0xbc00);
}
static void open_v_scale_minus(bytes *f)
{
    put16(f, 2, 5, 0xbc00);
}
static void open_v_last_scale_minus(bytes *f)
{
    put16(f, 2, 9, 0xbc00);
}
static void open_scale_minus_3(bytes *f)
{
    put16(f, 2, 4, 0xc200);
}
static void open_scale_minus_half(bytes *f)
{
    put16(f, 2, 0, 0xb800);
}
static void open_scale_minus_zero(bytes *f)
{
    put16(f, 2, 2, 0x8000);
}
static void open_scale_minus_inf(bytes *f)
{
    put16(f, 2, 3, 0xfc00);
}
static void open_scale_denormal(bytes *f) /* a power of two, too */
{
    put16(f, 2, 3, 1);
}
static void open_v_scale_3(bytes *f)
{
    put16(f, 2, 5, 0x4200);
}
static void open_v_scale_65504(bytes *f)
{
    put16(f, 2, 9, 0x7bff);
}
static void open_v_scale_half(bytes *f)
{
    put16(f, 2, 9, 0x3800);
}
static void open_v_scale_near(bytes *f) /* 1 and a bit */
{
    put16(f, 2, 7, 0x3c01);
}
static void open_offset(bytes *f)
{
    put16(f, 2, 17, 0x7e00);
}
static void open_k_inf(bytes *f)
{
    put16(f, 0, 16 * 3 + 4, 0xfc00);
}
static void open_k_lane(bytes *f) /* a lane without token, -0 */
{
    put16(f, 0, 16 * 3 + 5, 0x8000);
}
static void open_k_last_lane(bytes *f)
{
    put16(f, 0, 16 * 7 + 15, 1);
}
static void open_v_nan(bytes *f)
{
    put16(f, 1, 39, 0x7fff);
}
/* Token 4's row, which has not been sealed, with a code of 65504: beyond i8, i4 of K and of V. */
static void open_k_large(bytes *f)
{
    put16(f, 0, 16 * 3 + 4, 0x7bff);
    put16(f, 2, 4, 0x5800);
}
static void open_k_large_of_4(bytes *f)
{
    put16(f, 0, 16 * 7 + 4, 0xfbff);
    put16(f, 2, 4, 0x4400);
}
static void open_v_large(bytes *f)
{
    put16(f, 1, 39, 0xfbff);
    put16(f, 2, 9, 0x5800);
}
static void open_v_large_of_4(bytes *f)
{
    put16(f, 1, 32, 0x7bff);
    put16(f, 2, 9, 0x5000);
}
/* Token 3's, which has been codes. */
static void open_k_large_again(bytes *f)
{
    put16(f, 0, 16 * 3 + 3, 0x7bff);
    put16(f, 2, 3, 0x4c00);
}
static void open_v_level(bytes *f)
{
    put16(f, 1, 31, 0x5400);
}
/*
 * Of 4 and 5 bits: 5 tokens of 8 dims. K: a tile of a byte for dims d and d + 4 of a token. V: a
 * byte for tokens t and t + 4 of a dim, then 16 bytes of fifth bits. Scales of a sealed block: K at
 * 0 .. 7, V at 8 .. 12, the middles at 13 .. 20, the gains at 21 .. 25; of an open one K's at 0 ..
 * 4, V's at 5 .. 9, the offset at 10 .. 17; of one that is open again also the seed's scales at 18
 * .. 25, its middles at 26 .. 33 and its gains at 34 .. 38.
 */
static void coarse_k_lane(bytes *f)
{
    stream_at(f, 5, 0, 0)[5 * 4] = 1;
}
static void coarse_k_high_lane(bytes *f)
{
    stream_at(f, 5, 1, 0)[15 * 4 + 3] = 0x80;
}
static void coarse_v_lane(bytes *f) /* token 5 of dim 0 */
{
    stream_at(f, 5, 0, 1)[1] |= 0x10;
}
static void coarse_v_last_lane(bytes *f) /* token 7 of dim 7 */
{
    stream_at(f, 5, 1, 1)[7 * 4 + 3] |= 0x80;
}
static void fifth_of_no_token(bytes *f) /* token 5 of dim 0 */
{
    stream_at(f, 5, 0, 1)[8 * 4 + 8] |= 2;
}
static void fifth_of_no_dim(bytes *f) /* token 0 of dim 8 */
{
    stream_at(f, 5, 1, 1)[8 * 4 + 4] |= 1;
}
static void fifth_of_no_dim_high(bytes *f) /* token 4 of dim 15 */
{
    stream_at(f, 5, 1, 1)[8 * 4 + 8 + 7] |= 0x10;
}
static void coarse_v_scale_minus(bytes *f)
{
    put16(f, 2, 12, 0x8001);
}
static void coarse_v_first_scale_minus(bytes *f)
{
    put16(f, 2, 8, 0x8001);
}
static void coarse_scale_nan(bytes *f)
{
    put16(f, 2, 7, 0xfe00);
}
static void coarse_middle(bytes *f)
{
    put16(f, 2, 20, 0x7c00);
}
static void gain_zero(bytes *f)
{
    put16(f, 2, 21, 0);
}
static void gain_last_zero(bytes *f)
{
    put16(f, 2, 25, 0);
}
static void gain_256(bytes *f) /* see native_damage */
{
    put16(f, 2, 25, 256);
}
static void open_gain_256(bytes *f)
{
    put16(f, 2, 34, 256);
}
static void open_last_gain_minus(bytes *f)
{
    put16(f, 2, 38, 0x8080);
}
static void seed_nan(bytes *f)
{
    put16(f, 2, 18, 0x7e00);
}
static void seed_middle(bytes *f)
{
    put16(f, 2, 33, 0xfc00);
}
static void open_v_scale_nan(bytes *f)
{
    put16(f, 2, 5, 0x7e00);
}
static void k_type_4(bytes *f)
{
    put32(f->data + 64 + 20, 4);
}
static void k_type_5(bytes *f)
{
    put32(f->data + 64 + 20, 5);
}
static void v_type_5(bytes *f)
{
    put32(f->data + 64 + 24, 5);
}
static void coarse_no_offset(bytes *f)
{
    put32(f->data + 64 + 28, KVT_GROUP_NO_OFFSET);
}
static void coarse_v_in_k(bytes *f)
{
    put32(f->data + 64 + 28, KVT_GROUP_V_IN_K);
    put32(f->data + 64 + 24, KVT_TYPE_I4);
}
static void bad_fine_order(bytes *f) /* fine behind an open one */
{
    represent(f, 0, 1);
    represent(f, 1, 2);
}

static void bad_again_order(bytes *f) /* open again behind an open one */
{
    represent(f, 0, 1);
    represent(f, 1, 3);
}
static void two_again(bytes *f)
{
    represent(f, 0, 3);
    represent(f, 1, 3);
}

static void open_filter(bytes *f) /* is for i8 codes */
{
    bad_payload(f, 5, 8, 3 | 1 << 16);
}
static void open_v_filter(bytes *f)
{
    bad_payload(f, 5, 32, 4 | 2 << 16);
}
static void scales_filter(bytes *f)
{
    bad_payload(f, 5, 56, 5 | 1 << 16);
}

static void bad_block_layers(bytes *f)
{
    bad_payload(f, 4, 16, 3);
}
static void bad_block_reserved(bytes *f)
{
    bad_payload(f, 4, 24, 1);
}
static void bad_block_reserved_high(bytes *f)
{
    bad_payload(f, 4, 28, 1);
}
static void bad_block_place(bytes *f)
{
    bad_payload(f, 4, 12,
                get32(f->data + section_payload(f->data, f->n, 4, 0, &(size_t){0}) + 12) |
                    1u << 16);
}
static void bad_block_layout(bytes *f) /* layers follow */
{
    bad_payload(f, 4, 20, 1);
}
static void bad_block_layout_2(bytes *f)
{
    bad_payload(f, 4, 20, 2);
}
static void bad_block_layout_256(bytes *f)
{
    bad_payload(f, 4, 20, 256);
}
static void bad_block_layout_large(bytes *f)
{
    bad_payload(f, 4, 20, 0x10000);
}
static void bad_table_id(bytes *f)
{
    bad_payload(f, 3, 0, 1);
}
static void bad_table_id_high(bytes *f)
{
    bad_payload(f, 3, 12, 0x80000000u);
}
/* The high half of the word of the representation. */
static void bad_place(bytes *f, uint32_t place)
{
    size_t size;
    f->data[section_payload(f->data, f->n, 3, 0, &size) + 30] = (unsigned char)place;
    f->data[section_payload(f->data, f->n, 3, 0, &size) + 31] = (unsigned char)(place >> 8);
}
static void bad_place_1(bytes *f)
{
    bad_place(f, 1);
}
static void bad_place_1_id(bytes *f)
{
    bad_place(f, 1);
    bad_payload(f, 3, 0, 77);
}
static void bad_place_2(bytes *f)
{
    bad_place(f, 2);
}
static void bad_place_256(bytes *f)
{
    bad_place(f, 256);
}
static void bad_stream_count(bytes *f)
{
    bad_payload(f, 1, 4, 1);
}
static void bad_stream_kind(bytes *f)
{
    bad_payload(f, 5, 8, 6);
}
static void bad_stream_filter(bytes *f)
{
    bad_payload(f, 5, 8, 3 | 3 << 16);
}
static void bad_stream_codec(bytes *f)
{
    bad_payload(f, 5, 8, 3 | 2 << 24);
}
static void bad_stream_zstd(bytes *f)
{
    bad_payload(f, 1, 8, 1 | 1 << 24);
}
static void bad_stream_native(bytes *f)
{
    bad_payload(f, 5, 16, 64);
}
static void bad_stream_reserved(bytes *f)
{
    bad_payload(f, 5, 20, 1);
}
static void bad_index(bytes *f)
{
    bad_payload(f, 6, 16, 8);
}
static void bad_index_reserved(bytes *f)
{
    bad_payload(f, 6, 4, 1);
}
static void bad_footer(bytes *f)
{
    bad_payload(f, 7, 0, 8);
}
static void bad_footer_size(bytes *f)
{
    bad_payload(f, 7, 8, 8);
}
static void bad_footer_magic(bytes *f)
{
    f->data[f->n - 1] ^= 1;
}

static void bad_padding(bytes *f) /* 5 ids are 20 bytes: 4 of padding */
{
    stream_at(f, 1, 0, 0)[21] = 1;
}

/* Files to damage. */
enum {
    SEALED,
    OPEN,
    PLAIN, /* open, without offset */
    TWO,
    WIDE,
    I4_I4, /* sealed */
    I4_I5,
    I4_OPEN,
    I4_AGAIN, /* open again: tokens 0 to 3 have been i4 */
    I5_AGAIN,
    FINE, /* a block behind it is open */
    N_FILES
};
#define IN(file) (1u << (file))
#define IN_COARSE (IN(I4_I4) | IN(I4_I5))
#define IN_AGAIN (IN(I4_AGAIN) | IN(I5_AGAIN))
#define IN_OPEN (IN(I4_OPEN) | IN_AGAIN) /* of K of 4 bits */
#define IN_ALL (IN(N_FILES) - 1)

typedef struct damage_case {
    damage make;
    const char *name;
    uint32_t files;
    kvt_status status; /* KVT_OK: damaged or of another format */
    const char *text;  /* a part of the error's */
} damage_case;

static const damage_case damages[] = {
#define DAMAGE(x, files, status, text)                                                             \
    {                                                                                              \
        x, #x, files, status, text                                                                 \
    }
    DAMAGE(bad_code, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_v_code, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_k_lane, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_v_lane, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_scale_sign, IN(SEALED) | IN(PLAIN), KVT_ERR_CORRUPT, "negative scale"),
    DAMAGE(bad_scale_inf, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_v_scale, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_offset, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_id, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_id_low, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_position, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_dead_position, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_n_tokens, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_many_tokens, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_n_blocks, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_header_flags, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_block_tokens, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_sinks, IN(SEALED) | IN(OPEN), KVT_ERR_CORRUPT, "sink_tokens"),
    DAMAGE(bad_layer_number, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_layer_size, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_section_flag, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_section_flags, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_section_value, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_table_row, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_table_tokens, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_representation, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_block_layers, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_block_reserved, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_block_reserved_high, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_block_place, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_block_layout, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_block_layout_2, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_block_layout_256, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_block_layout_large, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_table_id, IN(SEALED) | IN(TWO), KVT_OK, ""),
    DAMAGE(bad_table_id_high, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_place_1, IN(SEALED) | IN(TWO), KVT_OK, ""),
    DAMAGE(bad_place_1_id, IN(SEALED) | IN(TWO), KVT_OK, ""),
    DAMAGE(bad_place_2, IN(SEALED) | IN(TWO), KVT_OK, ""),
    DAMAGE(bad_place_256, IN(SEALED) | IN(TWO), KVT_OK, ""),
    DAMAGE(bad_index_reserved, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_stream_count, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_stream_kind, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_stream_filter, IN(SEALED), KVT_OK, ""),
    DAMAGE(bad_stream_codec, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_stream_zstd, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_stream_native, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_stream_reserved, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_index, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_footer, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_footer_size, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_footer_magic, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_padding, IN(SEALED) | IN(OPEN), KVT_OK, ""),
    DAMAGE(bad_form_2, IN(SEALED) | IN(OPEN) | IN(TWO) | IN(WIDE), KVT_ERR_CORRUPT,
           "is fine, in a group that has no i4 or i5"),
    DAMAGE(bad_form_2, IN_COARSE | IN_OPEN, KVT_ERR_CORRUPT, "layer 0"),
    DAMAGE(bad_form_3, IN(SEALED) | IN(OPEN) | IN(TWO) | IN(WIDE), KVT_ERR_CORRUPT,
           "is open again, in a group that has no i4 keys"),
    DAMAGE(bad_form_3, IN_COARSE, KVT_ERR_CORRUPT, "layer 0"),
    DAMAGE(bad_form_4, IN_ALL, KVT_ERR_FORMAT, "representation 4"),
    DAMAGE(bad_form_large, IN(SEALED) | IN(OPEN), KVT_ERR_FORMAT, "representation 257"),
    DAMAGE(bad_form_of_block, IN(SEALED) | IN(WIDE), KVT_ERR_CORRUPT,
           "not the block that the block table lists"),
    DAMAGE(turned_form, IN(SEALED) | IN(OPEN) | IN_COARSE | IN_OPEN, KVT_ERR_CORRUPT, ""),
    DAMAGE(turned_form, IN(WIDE), KVT_ERR_CORRUPT, "no i8"),
    DAMAGE(bad_form_order, IN(TWO) | IN(FINE), KVT_ERR_CORRUPT, "sealed, behind an open one"),
    DAMAGE(bad_fine_order, IN(FINE), KVT_ERR_CORRUPT, "sealed, behind an open one"),
    DAMAGE(bad_again_order, IN(FINE), KVT_ERR_CORRUPT, "open again, behind an open one"),
    DAMAGE(two_again, IN(FINE), KVT_ERR_CORRUPT, "open again, behind an open one"),
    DAMAGE(bad_last_form, IN(TWO) | IN(FINE), KVT_ERR_CORRUPT, "layer 0"),
    DAMAGE(bad_code, IN(FINE), KVT_ERR_CORRUPT, "-128"),
    DAMAGE(bad_v_code, IN(FINE), KVT_ERR_CORRUPT, "-128"),
    DAMAGE(coarse_k_lane, IN_COARSE, KVT_ERR_CORRUPT, "no token"),
    DAMAGE(coarse_k_high_lane, IN_COARSE, KVT_ERR_CORRUPT, "no token"),
    DAMAGE(coarse_v_lane, IN_COARSE, KVT_ERR_CORRUPT, "no token"),
    DAMAGE(coarse_v_last_lane, IN_COARSE, KVT_ERR_CORRUPT, "no token"),
    DAMAGE(fifth_of_no_token, IN(I4_I5), KVT_ERR_CORRUPT, "no token"),
    DAMAGE(fifth_of_no_dim, IN(I4_I5), KVT_ERR_CORRUPT, "no token"),
    DAMAGE(fifth_of_no_dim_high, IN(I4_I5), KVT_ERR_CORRUPT, "no token"),
    DAMAGE(bad_scale_sign, IN(FINE), KVT_ERR_CORRUPT, "negative scale"),
    DAMAGE(coarse_v_first_scale_minus, IN_COARSE, KVT_ERR_CORRUPT, "negative scale"),
    DAMAGE(coarse_v_scale_minus, IN_COARSE, KVT_ERR_CORRUPT, "negative scale"),
    DAMAGE(coarse_scale_nan, IN_COARSE, KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(gain_zero, IN_COARSE, KVT_ERR_CORRUPT, "a gain that is none"),
    DAMAGE(gain_last_zero, IN_COARSE, KVT_ERR_CORRUPT, "a gain that is none"),
    DAMAGE(gain_256, IN_COARSE, KVT_ERR_CORRUPT, "a gain that is none"),
    DAMAGE(open_gain_256, IN_AGAIN, KVT_ERR_CORRUPT, "a gain that is none"),
    DAMAGE(open_last_gain_minus, IN_AGAIN, KVT_ERR_CORRUPT, "a gain that is none"),
    DAMAGE(coarse_middle, IN_COARSE, KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(bad_scale_inf, IN_COARSE | IN_OPEN, KVT_ERR_CORRUPT, ""),
    DAMAGE(open_scale_3, IN_OPEN, KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_minus_3, IN_OPEN, KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_zero, IN_OPEN, KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_v_scale_3, IN(I4_OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_v_scale_nan, IN_AGAIN, KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(open_v_scale_minus, IN(I4_OPEN) | IN(I5_AGAIN), KVT_ERR_CORRUPT, "negative scale"),
    DAMAGE(open_v_last_scale_minus, IN(I4_OPEN) | IN(I5_AGAIN), KVT_ERR_CORRUPT, "negative scale"),
    DAMAGE(seed_nan, IN_AGAIN, KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(seed_middle, IN_AGAIN, KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(open_k_lane, IN_OPEN, KVT_ERR_CORRUPT, "no token"),
    DAMAGE(open_v_nan, IN_OPEN, KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(open_k_large, IN(OPEN) | IN(PLAIN) | IN_OPEN, KVT_ERR_CORRUPT, "too large"),
    DAMAGE(open_k_large_of_4, IN_OPEN, KVT_ERR_CORRUPT, "too large"),
    DAMAGE(open_v_large, IN(OPEN) | IN(PLAIN) | IN_OPEN, KVT_ERR_CORRUPT, "too large"),
    DAMAGE(open_v_large_of_4, IN_OPEN, KVT_ERR_CORRUPT, "too large"),
    DAMAGE(open_k_large_again, IN_AGAIN, KVT_ERR_CORRUPT, "too large"),
    DAMAGE(open_v_level, IN(I4_AGAIN), KVT_ERR_CORRUPT, "too large"),
    DAMAGE(open_filter, IN_COARSE | IN_OPEN, KVT_ERR_FORMAT, "filter 1"),
    DAMAGE(open_v_filter, IN_COARSE | IN_OPEN, KVT_ERR_FORMAT, "filter 2"),
    DAMAGE(bad_stream_filter, IN_COARSE, KVT_ERR_FORMAT, "filter 3"),
    DAMAGE(k_type_4, IN_ALL, KVT_ERR_CORRUPT, "k_type"),
    DAMAGE(k_type_5, IN_ALL, KVT_ERR_FORMAT, "storage type"),
    DAMAGE(v_type_5, IN_ALL, KVT_ERR_FORMAT, "storage type"),
    DAMAGE(coarse_no_offset, IN_COARSE, KVT_ERR_CORRUPT, "flags"),
    DAMAGE(coarse_v_in_k, IN_COARSE, KVT_ERR_CORRUPT, "4 bits"),
    DAMAGE(open_scale_3, IN(OPEN) | IN(PLAIN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_65504, IN(OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_half, IN(OPEN) | IN(PLAIN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_zero, IN(OPEN) | IN(PLAIN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_denormal, IN(OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_v_scale_3, IN(OPEN) | IN(PLAIN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_v_scale_65504, IN(OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_v_scale_half, IN(OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_v_scale_near, IN(OPEN) | IN(PLAIN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_inf, IN(OPEN), KVT_ERR_CORRUPT, ""),
    DAMAGE(open_scale_minus, IN(SEALED) | IN(PLAIN), KVT_ERR_CORRUPT, "negative scale"),
    DAMAGE(open_v_scale_minus, IN(SEALED) | IN(OPEN) | IN(PLAIN), KVT_ERR_CORRUPT,
           "negative scale"),
    DAMAGE(open_v_last_scale_minus, IN(SEALED) | IN(OPEN) | IN(PLAIN), KVT_ERR_CORRUPT,
           "negative scale"),
    DAMAGE(open_scale_minus_3, IN(OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_minus_half, IN(OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_minus_zero, IN(OPEN), KVT_ERR_CORRUPT, "no power of two"),
    DAMAGE(open_scale_minus_inf, IN(OPEN), KVT_ERR_CORRUPT, ""),
    DAMAGE(open_offset, IN(SEALED) | IN(OPEN), KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(open_k_inf, IN(OPEN), KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(open_k_lane, IN(OPEN), KVT_ERR_CORRUPT, "no token"),
    DAMAGE(open_k_last_lane, IN(OPEN), KVT_ERR_CORRUPT, "no token"),
    DAMAGE(open_v_nan, IN(OPEN), KVT_ERR_CORRUPT, "not finite"),
    DAMAGE(open_filter, IN(OPEN), KVT_ERR_FORMAT, "filter 1"),
    DAMAGE(open_v_filter, IN(OPEN), KVT_ERR_FORMAT, "filter 2"),
    DAMAGE(scales_filter, IN(SEALED) | IN(OPEN), KVT_ERR_FORMAT, "filter 1"),
};

/* Whether an offset is one of a layer section's streams. */
static int in_streams(const unsigned char *data, size_t n, size_t at)
{
    size_t begin = get32(data + 12), size;
    for (; begin < n; begin += size) {
        size = 32 + (size_t)get64(data + begin + 8);
        if (at < begin + size)
            return get32(data + begin) == 5 &&
                   at >= begin + 32 + 8 + 24 * (size_t)get32(data + begin + 32) + 8;
    }
    return 0;
}

/* Damage that is in streams alone is found in images, too; a gain's high byte is not there. */
static void native_damage(const victim *v, const bytes *file, const unsigned char *before,
                          const damage_case *d)
{
    bytes native = {NULL, 0, 0, 0, -1, 0}, good = native;
    kvt_writer writer = bytes_writer(&native), other = bytes_writer(&good);

    for (size_t at = 0; at < file->n; at++)
        if (file->data[at] != before[at] && in_streams(before, file->n, at)) {
            assert_int_equal(writer.write(writer.user, file->data, file->n), 0);
            assert_int_equal(other.write(other.user, before, file->n), 0);
            break;
        }
    if (!native.n || strstr(d->name, "gain_256") || strstr(d->name, "last_gain_minus")) {
        bytes_free(&native);
        bytes_free(&good);
        return;
    }
    relay(&native, 1);
    relay(&good, 1);
    assert_int_equal(native.n, good.n);
    assert_memory_not_equal(native.data, good.data, native.n);
    must_refuse(v, native.data, native.n, d->name, 77);
    expect_error_text(v->cache, d->text, d->name);
    victim_check(v);
    bytes_free(&native);
    bytes_free(&good);
}

static void contradictions_in(int which)
{
    const int coarse = which >= I4_I4,
              open = which == OPEN || which == PLAIN || (which >= I4_OPEN && which <= I5_AGAIN);
    const int has_two = which == TWO || which == FINE;
    kvt_type k_type = coarse ? KVT_TYPE_I4 : which == WIDE ? KVT_TYPE_F16 : KVT_TYPE_I8;
    const int again = which == I4_AGAIN || which == I5_AGAIN;
    kvt_type v_type = which == I4_I5 || which == I5_AGAIN ? KVT_TYPE_I5 : k_type;
    model m = model_of(2, 1, 8, 8, k_type, v_type);
    victim v;
    bytes good;
    unsigned char *before;
    size_t size, table;
    uint64_t hash;

    if (has_two)
        m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    if (which == PLAIN)
        m.groups[0].flags = KVT_GROUP_NO_OFFSET;
    if (coarse && which != FINE)
        m.groups[0].fine_tokens = KVT_FINE_NONE;
    v = victim_make(&m);
    good = which == SEALED || which == I4_I4 || which == I4_I5 ? cut_snapshot_of(&m, 0)
           : again                                             ? cut_snapshot_of(&m, 1)
                   : snapshot_of(&m, has_two ? 67 : 5, LAYERS);
    table = section_payload(good.data, good.n, 3, 0, &size);
    assert_int_equal(get32(good.data + table + 28), which == FINE ? 2 : again ? 3 : open);
    for (unsigned i = 0; again && i < 13; i++) {
        const unsigned char *small = stream_at(&good, 5, 0, 2);
        if (i < 5) { /* V's rows: those of 4 bits are taken over; the gains */
            assert_int_equal(small[2 * (5 + i) + 1] >> 7, which == I4_AGAIN && i < 4);
            assert_true((small[2 * (34 + i)] != 0) == (i < 4));
        } else /* the seed's scales */
            assert_true(small[2 * (13 + i)] | small[2 * (13 + i) + 1]);
    }
    if (has_two)
        assert_int_equal(get32(good.data + table + 32 + 28), 1);
    before = malloc(good.n);
    assert_non_null(before);
    memcpy(before, good.data, good.n);
    resign(good.data, good.n); /* recomputed checksums must equal the writer's */
    assert_memory_equal(good.data, before, good.n);
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) {
        kvt_status status;
        if (!(damages[i].files & IN(which)))
            continue;
        memcpy(good.data, before, good.n);
        damages[i].make(&good);
        if (memcmp(good.data, before, good.n) == 0)
            fail_msg("%s changes nothing", damages[i].name);
        resign(good.data, good.n);
        must_refuse(&v, good.data, good.n, damages[i].name, (size_t)which);
        status = load_bytes(v.seq, good.data, good.n, NULL);
        if (damages[i].status != KVT_OK && status != damages[i].status)
            fail_msg("%s of file %d: status %d", damages[i].name, which, (int)status);
        expect_error_text(v.cache, damages[i].text, damages[i].name);
        victim_check(&v);
        native_damage(&v, &good, before, &damages[i]);
    }
    /* A valid change with recomputed checksums loads: above, the contents were rejected. */
    memcpy(good.data, before, good.n);
    stream_at(&good, 5, 0, 0)[0] = stream_at(&good, 5, 0, 0)[0] == 5 ? 6 : 5;
    if (open)
        for (unsigned i = 0; i < 10; i++) /* scales: 1 .. 32768 */
            put16(&good, 2, i, 0x3c00 + 0x400 * (i + (i > 4 ? 6 : 0)));
    for (unsigned i = 0; coarse && which != FINE && which != I4_OPEN && i < 5;
         i++) { /* gains, signs of scales */
        put16(&good, 2, (open ? 34 : 21) + i, i ? 51 * i + 51 : open ? 0 : 1);
        put16(&good, 2, (open ? 18 : 0) + i, i % 2 ? 0xbc00 : 0x3c00);
    }
    resign(good.data, good.n);
    expect_ok(v.cache, load_bytes(v.seq, good.data, good.n, NULL));
    hash = state_hash(&m, v.cache, v.seq);
    relay(&good, 1); /* the same in native sections */
    expect_ok(v.cache, load_bytes(v.seq, good.data, good.n, NULL));
    assert_true(state_hash(&m, v.cache, v.seq) == hash);
    free(before);
    bytes_free(&good);
    victim_destroy(&v);
}

static void test_contradictions(void **state)
{
    (void)state;
    for (int which = 0; which < N_FILES; which++)
        contradictions_in(which);
}

/*
 * Scales -1 to -32768 of K in an open block: such rows have no offset, the others have it. Codes
 * are 1.5, offsets 2; also as V in K.
 */
static void test_signed_scales(void **state)
{
    (void)state;
    for (int in_k = 0; in_k < 2; in_k++) {
        model m = model_of(2, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
        unsigned n = 32, small = in_k ? 1 : 2;
        bytes file;
        float x[32 * 8];
        kvt_tensor out = kvt_tensor_f32(x);
        victim v;
        m.groups[0].flags = KVT_GROUP_NO_ROTATION | (in_k ? KVT_GROUP_V_IN_K : 0);
        v = victim_make(&m);
        file = snapshot_of(&m, n, LAYERS);
        for (unsigned i = 0; i < 8 * n; i++)
            put16(&file, 0, i, 0x3e00);
        for (unsigned t = 0; t < n; t++)
            put16(&file, small, t, (0x3c00 + 0x400 * (t % 16)) | (t < 16 ? 0x8000 : 0));
        for (unsigned d = 0; d < 8; d++)
            put16(&file, small, n * (2 - (unsigned)in_k) + d, 0x4000);
        resign(file.data, file.n);
        expect_ok(v.cache, load_bytes(v.seq, file.data, file.n, NULL));
        for (int side = 0; side <= in_k; side++) {
            expect_ok(v.cache, kvt_read(v.seq, 1, (kvt_side)side, 0, n, &out));
            for (unsigned i = 0; i < 8 * n; i++)
                assert_true(x[i] == 1.5f * (float)(1u << i / 8 % 16) + (i < 16 * 8 ? 0.0f : 2.0f));
        }
        bytes_free(&v.before); /* and comes back as it was */
        v.before = saved_as(v.cache, v.seq, LAYERS);
        assert_int_equal(v.before.n, file.n);
        assert_memory_equal(v.before.data, file.data, file.n);
        bytes_free(&file);
        victim_destroy(&v);
    }
}

/*
 * An open block that says of rows that they were 4-bit K, with numbers that no such rows have: it
 * loads, and is sealed to something that does, too.
 */
static void test_extreme_seeds(void **state)
{
    static const uint16_t numbers[] = {0x7bff, 0xfbff, 0, 0x8000, 1, 0x8001, 0x3c00, 0xbc00};
    model m = model_of(2, 1, 8, 8, KVT_TYPE_I4, KVT_TYPE_I4);
    rng r = {91};
    (void)state;
    m.groups[0].fine_tokens = KVT_FINE_NONE;
    for (int round = 0; round < 300; round++) {
        const uint32_t range = round % 3 ? 8 : 2; /* 2: the largest of either sign */
        victim v;
        bytes file, again;
        m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
        v = victim_make(&m);
        file = cut_snapshot_of(&m, 1);
        for (unsigned t = 0; t < 5; t++) {
            const uint32_t gain = rng_below(&r, 3) ? 1 + 254 * rng_below(&r, 2) : 0;
            const uint32_t power = range == 2 ? 15 : rng_below(&r, 16);
            /* The largest that are taken: 785920 of what has been codes, else 240000. */
            const uint32_t most = (gain ? (34 - power) << 10 | 511 : (32 - power) << 10 | 851);
            put16(&file, 2, t, (0x3c00 + 0x400 * power) | rng_below(&r, 2) << 15);
            put16(&file, 2, 34 + t, gain);
            for (unsigned d = 0; d < 8; d++) {
                const uint32_t x = numbers[rng_below(&r, range)];
                put16(&file, 0, 16 * d + t, (x & 0x7fff) > most ? most | (x & 0x8000) : x);
            }
        }
        for (unsigned i = 10; i < 34; i++) /* offset, scales, middles */
            put16(&file, 2, i, numbers[rng_below(&r, range)]);
        resign(file.data, file.n);
        expect_ok(v.cache, load_bytes(v.seq, file.data, file.n, NULL));
        model_append(&m, v.cache, v.seq, 70, 70);
        again = saved(v.cache, v.seq, KVT_CODEC_RAW);
        expect_ok(v.cache, load_bytes(v.seq, again.data, again.n, NULL));
        bytes_free(&again);
        bytes_free(&file);
        victim_destroy(&v);
    }
}

/* Attention of one query over all tokens, against that over keys that have been turned back. */
static void check_turned(kvt_cache *cache, const kvt_seq *seq, const int32_t *shifts,
                         const float *frequencies)
{
    const size_t n = (size_t)kvt_seq_length(seq);
    kvt_attend_item item = {.seq = seq, .n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    float q[8], got[8], *k = malloc(n * 8 * sizeof *k), *v = malloc(n * 8 * sizeof *v);
    kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
    double want[8];
    assert_non_null(k);
    assert_non_null(v);
    for (size_t d = 0; d < 8; d++)
        q[d] = 0.5f * (float)d - 1.5f;
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, n, &kt));
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_V, 0, n, &vt));
    for (size_t t = 0; t < n; t++)
        for (size_t i = 0; i < 4; i++) {
            const double angle = -(double)shifts[t] * (double)frequencies[i];
            const double a = k[8 * t + i], b = k[8 * t + 4 + i];
            k[8 * t + i] = (float)(a * cos(angle) - b * sin(angle));
            k[8 * t + 4 + i] = (float)(a * sin(angle) + b * cos(angle));
        }
    reference_row(q, k, v, n, 1, 0, 8, 8, 1.0, 0.0, NULL, NULL, 0, 0.0, -INFINITY, want);
    args.items = &item;
    args.n_items = 1;
    args.scale = 1.0f;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(got);
    expect_ok(cache, kvt_attend(cache, &args));
    assert_true(relative_l2(got, want, 8) < 1e-3);
    free(k);
    free(v);
}

/* Each token of a file has another shift, ascending, descending or in no order. */
static void test_shifts(void **state)
{
    static const float frequencies[] = {1.0f, 0.1f, 0.01f, 0.001f};
    const size_t n = is_quick() ? 20 * 64 : 4096 * 64;
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    int32_t *shifts = malloc(n * sizeof *shifts), *positions = malloc(n * sizeof *positions);
    rng r = {92};
    tokens t;
    kvt_cache *cache;
    (void)state;

    assert_non_null(shifts);
    assert_non_null(positions);
    g.rope_pairing = KVT_ROPE_HALVES;
    g.rope_dims = 8;
    g.rope_inverse_frequencies = frequencies;
    cache = cache_of(&g, n + 64, 1, NULL);
    t = tokens_make(&r, n + 64, &g);
    for (int order = 0; order < 3; order++) {
        kvt_seq *seq, *loaded;
        bytes file;
        clock_t begin;
        expect_ok(cache, kvt_seq_create(cache, &seq));
        append_all(cache, seq, &g, &t, 0, n + 64, n + 64);
        expect_ok(cache, kvt_seq_remove(seq, 0, 64));
        file = saved(cache, seq, KVT_CODEC_RAW);
        kvt_seq_destroy(seq);
        for (size_t i = 0; i < n; i++) {
            /* 40503 is odd, and n a power of two times 1 or 5. */
            size_t x = order == 0 ? i : order == 1 ? n - 1 - i : i * 40503 % n;
            shifts[i] = (int32_t)x;
            put32(stream_at(&file, 10, (unsigned)(i / 16384), 0) + i % 16384 * 4,
                  (uint32_t)shifts[i]);
        }
        resign(file.data, file.n);
        expect_ok(cache, kvt_seq_create(cache, &loaded));
        begin = clock();
        expect_ok(cache, load_bytes(loaded, file.data, file.n, NULL));
        /* Less than a tenth of that; comparing each shift with all takes many times as long. */
        if (!is_quick())
            assert_true((double)(clock() - begin) / CLOCKS_PER_SEC < 5.0);
        expect_ok(cache, kvt_seq_key_positions(loaded, 0, n, positions));
        for (size_t i = 0; i < n; i++)
            assert_int_equal(positions[i], (int32_t)i + shifts[i]);
        check_turned(cache, loaded, shifts, frequencies);
        kvt_seq_destroy(loaded);
        bytes_free(&file);
    }
    tokens_free(&t);
    kvt_cache_destroy(cache);
    free(shifts);
    free(positions);
}

/* Checksums that hold over ids, or sizes, that are wrong. */
static void test_ids(void **state)
{
    model m = model_of(1, 1, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16);
    victim v = victim_make(&m);
    (void)state;
    for (int i = 0; i < 7; i++) {
        bytes file = snapshot_of(&m, 70, KVT_CODEC_ZSTD);
        size_t size, table = section_payload(file.data, file.n, 3, 0, &size);
        size_t layer = section_payload(file.data, file.n, 5, 0, &size);
        size_t digests = section_payload(file.data, file.n, 14, 0, &size);
        if (i == 1)
            file.data[table + 5] ^= 1;
        if (i == 2 || i == 6)
            file.data[digests + 5] ^= 1;
        if (i == 3 || i == 6)
            file.data[digests + 16 + 15] ^= 1;
        if (i == 4) {
            assert_int_equal(file.data[layer + 8 + 3], 1); /* zstd: else the sizes are equal */
            put32(file.data + layer + 8 + 8, get32(file.data + layer + 8 + 8) + 64);
        }
        if (i == 5) { /* the index' digest of a block; its entry is behind ids, positions, table */
            size_t index = section_payload(file.data, file.n, 6, 0, &size);
            assert_int_equal(get32(file.data + index + 3 * 48), 4);
            assert_memory_equal(file.data + index + 3 * 48 + 32, file.data + digests, 16);
            file.data[index + 3 * 48 + 32] ^= 1;
        }
        resign_sums(file.data, file.n);
        if (i == 0)
            expect_ok(v.cache, load_bytes(v.seq, file.data, file.n, NULL));
        else
            must_refuse(&v, file.data, file.n, "id", (size_t)i);
        if (i == 0)
            expect_ok(v.cache, load_bytes(v.seq, v.before.data, v.before.n, NULL));
        victim_check(&v);
        bytes_free(&file);
    }
    victim_destroy(&v);
}

/* Flag 2 is of tokens: it says nothing where there are none. */
static void test_unkeyed(void **state)
{
    model m = model_of(1, 1, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16);
    victim v = victim_make(&m);
    (void)state;
    for (size_t n = 0; n < 2; n++) {
        bytes file = snapshot_of(&m, n, KVT_CODEC_ZSTD);
        put32(file.data + 44, 2);
        resign(file.data, file.n);
        if (n)
            expect_ok(v.cache, load_bytes(v.seq, file.data, file.n, NULL));
        else
            must_refuse(&v, file.data, file.n, "flags, tokens", n);
        bytes_free(&file);
    }
    victim_destroy(&v);
}

static void test_wide_values(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F32);
    victim v = victim_make(&m);
    (void)state;
    for (int i = 0; i < 4; i++) {
        bytes file = snapshot_of(&m, 5, LAYERS);
        if (i < 2)
            stream_at(&file, 5, 0, 0)[9] = i ? 0xfc : 0x7c; /* infinities, or NaN */
        else
            put32(stream_at(&file, 5, 0, 1) + 12, i == 2 ? 0x7f800001u : 0xff800000u);
        resign(file.data, file.n);
        must_refuse(&v, file.data, file.n, "not finite", (size_t)i);
        relay(&file, 1);
        must_refuse(&v, file.data, file.n, "not finite, native", (size_t)i);
        victim_check(&v);
        bytes_free(&file);
    }
    victim_destroy(&v);
}

/*
 * V in K, or not: the flag inverted, requirements of the flag violated, streams that must not
 * exist. In the header's group, flags are at 28, v_dim at 16, v_type at 24.
 */
static void test_v_in_k(void **state)
{
    model with = model_of(2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8), without = with;
    (void)state;
    with.groups[0].flags = KVT_GROUP_V_IN_K;
    for (int i = 0; i < 7; i++) {
        const model *m = i < 5 ? &with : &without;
        victim v = victim_make(m);
        bytes file = snapshot_of(m, 5, LAYERS);
        unsigned char *group = file.data + 64;
        static const char *const names[] = {"as it is",     "no V in K", "v_dim",    "v_type",
                                            "another flag", "V in K",    "as it was"};
        size_t size, layer = section_payload(file.data, file.n, 5, 0, &size);
        assert_int_equal(get32(file.data + layer), i < 5 ? 2 : 3); /* streams */
        assert_int_equal(get32(file.data + layer + 8) & 0xffff, 3);
        assert_int_equal(get32(file.data + layer + 32) & 0xffff, i < 5 ? 5 : 4);
        switch (i) {
        case 1: put32(group + 28, 0); break;
        case 2: put32(group + 16, 24); break; /* above k_dim */
        case 3: put32(group + 24, KVT_TYPE_F16); break;
        case 4: put32(group + 28, KVT_GROUP_V_IN_K | 16); break;
        case 5: put32(group + 28, KVT_GROUP_V_IN_K); break;
        default: break;
        }
        resign(file.data, file.n);
        if (i == 0 || i == 6)
            expect_ok(v.cache, load_bytes(v.seq, file.data, file.n, NULL));
        else
            must_refuse(&v, file.data, file.n, names[i], (size_t)i);
        if (i == 0 || i == 6)
            expect_ok(v.cache, load_bytes(v.seq, v.before.data, v.before.n, NULL));
        victim_check(&v);
        bytes_free(&file);
        victim_destroy(&v);
    }
}

enum { UNKNOWN = 128 }; /* bytes of such a section: what is behind it stays aligned */

static bytes copy_of_bytes(const bytes *from)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    assert_int_equal(writer.write(writer.user, from->data, from->n), 0);
    return b;
}

/* A file with a section of a later version before the section at `at`. */
static bytes with_unknown(const bytes *good, size_t at, uint32_t type, uint32_t flags)
{
    static const unsigned char body[UNKNOWN - 40] = "some bytes of a later version";
    bytes f = copy_of_bytes(good);
    add_section(&f, at, type, flags, 9, body, sizeof body);
    return f;
}

/* Sections of later versions, before any section that may have one before it: optional ones are
   skipped and checked, and so is what the index has of them. Required ones are refused. */
static void test_unknown_sections(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    victim v = victim_make(&m);
    bytes good = snapshot_of(&m, 70, KVT_CODEC_RAW);
    size_t at = get32(good.data + 12), n_taken = 0, n_refused = 0;
    (void)state;

    for (; at < good.n; at += 32 + (size_t)get64(good.data + at + 8)) {
        const uint32_t before = get32(good.data + at);
        const int may = before != 5 && before != 13 && before != 14 && before != 7;
        for (uint32_t i = 0; i < 4; i++) {
            static const uint32_t types[] = {77, 0, 15, 77}, flags[] = {0, 0, 1, 2};
            bytes f;
            if (before == 7) { /* behind the index: reindex would not pass over it */
                static const unsigned char section[UNKNOWN] = {0};
                f = copy_of_bytes(&good);
                replace_bytes(&f, at, 0, section, sizeof section);
                put32(f.data + at, types[i]);
                put32(f.data + at + 4, flags[i]);
                put64(f.data + at + 8, UNKNOWN - 32);
                put64(f.data + f.n - 40, f.n);
                resign(f.data, f.n);
            } else {
                f = with_unknown(&good, at, types[i], flags[i]);
            }
            if (may && flags[i] == 0) {
                expect_ok(v.cache, load_bytes(v.seq, f.data, f.n, NULL));
                expect_ok(v.cache, load_bytes(v.seq, v.before.data, v.before.n, NULL));
                n_taken++;
            } else {
                must_refuse(&v, f.data, f.n, "unknown section", i);
                expect_error_text(v.cache,
                                  flags[i] == 1 ? "which this build does not know"
                                                : "section of unknown type",
                                  "unknown section");
                n_refused++;
            }
            bytes_free(&f);
        }
    }
    assert_true(n_taken == 2 * 6 && n_refused > n_taken);
    { /* its bytes, and its entry of the index, under checksums that hold */
        const size_t first = get32(good.data + 12);
        bytes f = with_unknown(&good, first, 77, 0);
        size_t size, entry = section_payload(f.data, f.n, 6, 0, &size);
        assert_int_equal(get32(f.data + entry), 77);
        for (size_t i = 0; i < UNKNOWN; i++) {
            f.data[first + i] ^= 4;
            must_refuse(&v, f.data, f.n, "unknown section", i);
            f.data[first + i] ^= 4;
            must_refuse(&v, f.data, first + i, "cut in an unknown section", i);
            expect_error_text(v.cache, "it is cut here", "cut in an unknown section");
        }
        for (size_t i = 0; i < 48; i++) {
            f.data[entry + i] ^= 2;
            resum(f.data, f.n);
            must_refuse(&v, f.data, f.n, "the entry of an unknown section", i);
            expect_error_text(v.cache, "entry 0 is not where the file has it", "an entry");
            f.data[entry + i] ^= 2;
        }
        resum(f.data, f.n);
        expect_ok(v.cache, load_bytes(v.seq, f.data, f.n, NULL));
        expect_ok(v.cache, load_bytes(v.seq, v.before.data, v.before.n, NULL));
        bytes_free(&f);
    }
    victim_check(&v);
    bytes_free(&good);
    victim_destroy(&v);
}

/* ---- another model ---- */

static void mismatch(const model *other, kvt_status status, const char *named)
{
    model m = model_of_two();
    victim v = victim_make(&m);
    bytes file = snapshot_of(other, 70, KVT_CODEC_ZSTD);
    char text[256];

    expect(v.cache, status, load_bytes(v.seq, file.data, file.n, NULL));
    expect_ok(v.cache, kvt_cache_error(v.cache, text, sizeof text));
    if (!strstr(text, named))
        fail_msg("\"%s\" does not name %s", text, named);
    victim_check(&v);
    bytes_free(&file);
    victim_destroy(&v);
}

static void test_mismatch(void **state)
{
    model m = model_of(4, 2, 80, 96, KVT_TYPE_I8, KVT_TYPE_I8);
    (void)state;
    mismatch(&m, KVT_ERR_MISMATCH, "n_groups is 1, the cache's is 2");
#define OTHER(change, named)                                                                       \
    do {                                                                                           \
        m = model_of_two();                                                                        \
        change;                                                                                    \
        mismatch(&m, KVT_ERR_MISMATCH, named);                                                     \
    } while (0)
    OTHER(m.groups[0].n_q_heads = 2, "n_q_heads of group 0 is 2, the cache's is 4");
    OTHER(m.groups[1].n_kv_heads = 3, "n_kv_heads of group 1 is 3, the cache's is 1");
    OTHER(m.groups[0].k_dim = 96, "k_dim of group 0 is 96, the cache's is 80");
    OTHER(m.groups[1].v_dim = 16, "v_dim of group 1 is 16, the cache's is 8");
    OTHER(m.groups[1].k_type = KVT_TYPE_F32, "group 1 are f32, f32, the cache's are f16, f32");
    OTHER(m.groups[0].v_type = KVT_TYPE_F16, "group 0 are i8, f16, the cache's are i8, i8");
    OTHER(m.groups[0].flags = KVT_GROUP_NO_ROTATION, "flags of group 0 is 1, the cache's is 0");
    OTHER(m.groups[0].flags = KVT_GROUP_NO_V_ROTATION, "flags of group 0 is 8, the cache's is 0");
    OTHER((m.groups[0].v_dim = 80, m.groups[0].flags = KVT_GROUP_V_IN_K),
          "v_dim of group 0 is 80, the cache's is 96");
    OTHER(m.groups[0].rotation_seed = 7, "rotation_seed of group 0 is 7, the cache's is 42");
    OTHER(m.groups[1].window_tokens = 9, "window_tokens of group 1 is 9, the cache's is 0");
    OTHER((m.groups[1].window_tokens = 9, m.groups[1].sink_tokens = 3), "window_tokens of group 1");
    OTHER((m.layers[0][1] = 1, m.layers[1][0] = 2), "layer 1 is in group 0");
    OTHER((m.layers[0][0] = 2, m.layers[0][1] = 3, m.layers[1][0] = 0, m.layers[1][1] = 1),
          "layer 3 is in group 0, in the cache it is in group 1");
    OTHER(m.fingerprint = "test modem", "fingerprint");
    OTHER(m.fingerprint = "", "(0 bytes)");
    m = model_of_two();
    m.groups[0].n_layers = 1;
    m.groups[1].n_layers = 3;
    m.layers[1][0] = 1;
    m.layers[1][1] = 2;
    m.layers[1][2] = 3;
    mismatch(&m, KVT_ERR_MISMATCH, "n_layers of group 0 is 1, the cache's is 2");
    m = model_of_two(); /* the same first group, of layers that the cache does not have */
    m.groups[1].n_layers = 38;
    m.layers[0][0] = 38;
    m.layers[0][1] = 39;
    for (uint32_t i = 0; i < 38; i++)
        m.layers[1][i] = i;
    mismatch(&m, KVT_ERR_MISMATCH, "n_layers of group 1 is 38, the cache's is 2");
}

/* Layer numbers: ascending in a group, each once. */
static void test_layer_numbers(void **state)
{
    static const uint32_t cases[][4] = {
        {2, 0, 1, 3}, {0, 2, 3, 1}, {0, 0, 1, 3}, {0, 2, 1, 2}, {0, 2, 1, 4}, {0, UINT32_MAX, 1, 3},
    };
    model m = model_of_two();
    victim v = victim_make(&m);
    bytes file = snapshot_of(&m, 70, KVT_CODEC_RAW);
    unsigned char *layers = file.data + 64 + 2 * 48;
    (void)state;
    assert_true(get32(layers) == 0 && get32(layers + 4) == 2 && get32(layers + 12) == 3);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (size_t l = 0; l < 4; l++)
            put32(layers + 4 * l, cases[i][l]);
        resign(file.data, file.n);
        must_refuse(&v, file.data, file.n, "layer numbers", i);
        expect_error_text(v.cache, "the header's layer numbers", "layer numbers");
        victim_check(&v);
    }
    bytes_free(&file);
    victim_destroy(&v);
}

static void test_too_long(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    bytes file = snapshot_of(&m, 101, KVT_CODEC_ZSTD);
    victim v;
    (void)state;
    m.max_tokens = 100;
    v = victim_make(&m);
    expect(v.cache, KVT_ERR_FULL, load_bytes(v.seq, file.data, file.n, NULL));
    victim_check(&v);
    bytes_free(&file);
    victim_destroy(&v);
}

/* ---- failures on the way ---- */

static void test_allocations(void **state)
{
    (void)state;
    for (int loads = 0; loads < 2; loads++) {
        counter c = {0, -1};
        model m = model_of_two();
        bytes file = snapshot_of(&m, 150, KVT_CODEC_ZSTD);
        victim v;
        uint64_t memory;
        long n = 0;

        m.counter = &c;
        v = victim_make(&m);
        expect_ok(v.cache, kvt_cache_trim(v.cache));
        memory = kvt_cache_memory_bytes(v.cache);
        for (;; n++) {
            bytes out = {NULL, 0, 0, 0, -1, 0};
            kvt_writer writer = bytes_writer(&out);
            kvt_status status;
            c.countdown = n;
            status = loads ? load_bytes(v.seq, file.data, file.n, NULL)
                           : kvt_seq_save_stream(v.seq, &writer, NULL);
            c.countdown = -1;
            bytes_free(&out);
            if (status == KVT_OK)
                break;
            expect(v.cache, KVT_ERR_MEMORY, status);
            assert_int_equal(kvt_cache_memory_bytes(v.cache), memory); /* nothing kept */
            victim_check(&v);
            expect_ok(v.cache, kvt_cache_trim(v.cache));
        }
        assert_true(n >= 8); /* there were that many to fail */
        victim_destroy(&v);
        assert_int_equal(c.live, 0);
        bytes_free(&file);
    }
}

static void test_failing_writer(void **state)
{
    model m = model_of(2, 2, 128, 128, KVT_TYPE_F32, KVT_TYPE_I8);
    victim v = victim_make(&m);
    uint64_t hash;
    long n = 0;
    (void)state;
    model_append(&m, v.cache, v.seq, 200, 200);
    hash = state_hash(&m, v.cache, v.seq);
    for (;; n++) {
        bytes out = {NULL, 0, 0, 0, n, 0};
        kvt_writer writer = bytes_writer(&out);
        kvt_status status = kvt_seq_save_stream(v.seq, &writer, NULL);
        bytes_free(&out);
        if (status == KVT_OK)
            break;
        expect(v.cache, KVT_ERR_IO, status);
        assert_true(state_hash(&m, v.cache, v.seq) == hash);
    }
    assert_true(n >= 8);
    victim_destroy(&v);
}

static int64_t bad_read(void *user, void *data, size_t n)
{
    (void)data;
    return *(int *)user ? -5 : (int64_t)n + 1;
}

static void test_arguments(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    victim v = victim_make(&m);
    kvt_save_options save;
    kvt_load_options load;
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b), no_writer = {&b, NULL};
    kvt_reader reader = bytes_reader(&b), no_reader = {&b, NULL};
    (void)state;

    assert_int_equal(kvt_seq_save(NULL, "x", NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_seq_save_stream(NULL, &writer, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_seq_load(NULL, "x", NULL, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_seq_load_stream(NULL, &reader, NULL, NULL), KVT_ERR_ARG);
    expect(v.cache, KVT_ERR_ARG, kvt_seq_save(v.seq, NULL, NULL));
    expect(v.cache, KVT_ERR_ARG, kvt_seq_save(v.seq, "", NULL));
    expect(v.cache, KVT_ERR_ARG, kvt_seq_load(v.seq, NULL, NULL, NULL));
    expect(v.cache, KVT_ERR_ARG, kvt_seq_load(v.seq, "", NULL, NULL));
    expect(v.cache, KVT_ERR_ARG, kvt_seq_save_stream(v.seq, NULL, NULL));
    expect(v.cache, KVT_ERR_ARG, kvt_seq_save_stream(v.seq, &no_writer, NULL));
    expect(v.cache, KVT_ERR_ARG, kvt_seq_load_stream(v.seq, NULL, NULL, NULL));
    expect(v.cache, KVT_ERR_ARG, kvt_seq_load_stream(v.seq, &no_reader, NULL, NULL));
#define BAD_SAVE(field, value)                                                                     \
    do {                                                                                           \
        memset(&save, 0, sizeof save);                                                             \
        save.struct_size = sizeof save;                                                            \
        save.field = value;                                                                        \
        expect(v.cache, KVT_ERR_ARG, kvt_seq_save_stream(v.seq, &writer, &save));                  \
    } while (0)
    BAD_SAVE(struct_size, 3);
    BAD_SAVE(codec, 3);
    BAD_SAVE(no_fsync, 2);
    BAD_SAVE(in_place, 2);
    BAD_SAVE(zstd_level, 20);
    BAD_SAVE(zstd_level, -8);
    assert_int_equal(b.n, 0);
    memset(&load, 0, sizeof load);
    expect(v.cache, KVT_ERR_ARG, kvt_seq_load_stream(v.seq, &reader, &load, NULL));
    load.struct_size = sizeof load;
    load.n_prompt = 1;
    expect(v.cache, KVT_ERR_ARG, kvt_seq_load_stream(v.seq, &reader, &load, NULL));
    for (int negative = 0; negative < 2; negative++) {
        kvt_reader bad = {&negative, bad_read};
        expect(v.cache, KVT_ERR_IO, kvt_seq_load_stream(v.seq, &bad, NULL, NULL));
    }
    expect_ok(v.cache, kvt_seq_begin(v.seq, 1, NULL));
    expect(v.cache, KVT_ERR_STATE, kvt_seq_save_stream(v.seq, &writer, NULL));
    expect(v.cache, KVT_ERR_STATE, load_bytes(v.seq, v.before.data, v.before.n, NULL));
    expect_ok(v.cache, kvt_seq_abort(v.seq));
    victim_check(&v);
    victim_destroy(&v);
}

/*
 * What a load that fails has read into recycled blocks is in none that comes into use later: where
 * a block never holds a number, the next save would have it, and could not be loaded.
 */
static void test_recycled_blocks(void **state)
{
    static const struct {
        uint32_t k_dim, v_dim;
        kvt_type k, v;
    } kinds[] = {
        {8, 8, KVT_TYPE_I8, KVT_TYPE_I8},   {24, 8, KVT_TYPE_I4, KVT_TYPE_I5},
        {8, 24, KVT_TYPE_F16, KVT_TYPE_I4}, {8, 24, KVT_TYPE_F32, KVT_TYPE_F16},
        {24, 8, KVT_TYPE_I8, KVT_TYPE_F32},
    };
    (void)state;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (unsigned coarse = 0; coarse < 2; coarse++) {
            model m =
                model_of(1, 2, kinds[kind].k_dim, kinds[kind].v_dim, kinds[kind].k, kinds[kind].v);
            const size_t step = is_quick() ? 11 : 1;
            size_t size, images;
            kvt_cache *cache;
            kvt_seq *seq;
            bytes file;
            m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
            m.groups[0].fine_tokens = coarse ? KVT_FINE_NONE : 0;
            cache = model_cache(&m);
            seq = model_seq(cache);
            model_append(&m, cache, seq, 70, 35);
            file = saved(cache, seq, KVT_CODEC_RAW);
            images = section_payload(file.data, file.n, 13, 0, &size);
            for (size_t i = 0; i < size; i += step) {
                bytes now;
                expect_ok(cache, kvt_seq_clear(seq));
                file.data[images + i] ^= 0x10;
                expect(cache, KVT_ERR_CORRUPT, load_bytes(seq, file.data, file.n, NULL));
                file.data[images + i] ^= 0x10;
                model_append(&m, cache, seq, 70, 35);
                now = saved(cache, seq, KVT_CODEC_RAW);
                if (now.n != file.n || memcmp(now.data, file.data, now.n) != 0)
                    fail_msg("kind %zu: byte %zu of the images stays in a block", kind, i);
                bytes_free(&now);
            }
            bytes_free(&file);
            kvt_seq_destroy(seq);
            kvt_cache_destroy(cache);
        }
}

/*
 * A block table of 2^32 bytes: where pointers have 32 bits that is one of none, if its size is cut
 * off. Elsewhere it ends early.
 */
static void test_wide_table(void **state)
{
    model m = model_of(1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    victim v = victim_make(&m);
    bytes file = snapshot_of(&m, 5, KVT_CODEC_RAW);
    (void)state;
    claim_blocks(file.data, file.n, (uint64_t)1 << 27);
    if (SIZE_MAX == UINT32_MAX) {
        assert_int_equal(load_bytes(v.seq, file.data, file.n, NULL), KVT_ERR_LIMIT);
        expect_error_text(v.cache, "4294967296", "a table of 2^32 bytes");
    } else {
        must_refuse(&v, file.data, file.n, "a table of 2^32 bytes", 0);
    }
    victim_check(&v);
    bytes_free(&file);
    victim_destroy(&v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_byte),     cmocka_unit_test(test_contradictions),
        cmocka_unit_test(test_signed_scales),  cmocka_unit_test(test_extreme_seeds),
        cmocka_unit_test(test_shifts),         cmocka_unit_test(test_ids),
        cmocka_unit_test(test_unkeyed),        cmocka_unit_test(test_wide_values),
        cmocka_unit_test(test_v_in_k),         cmocka_unit_test(test_unknown_sections),
        cmocka_unit_test(test_layer_numbers),  cmocka_unit_test(test_mismatch),
        cmocka_unit_test(test_too_long),       cmocka_unit_test(test_allocations),
        cmocka_unit_test(test_failing_writer), cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_wide_table),     cmocka_unit_test(test_recycled_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
