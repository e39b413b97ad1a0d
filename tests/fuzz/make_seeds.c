/*
 * Writes the first corpus into a folder: make_seeds FOLDER. Small files of all types, in all forms;
 * the fuzzers find the rest.
 */
#include "fuzz.h"

#include <stdio.h>
#include <sys/stat.h>

typedef struct seed {
    const char *name;
    kvt_type k_type, v_type;
    uint32_t flags, k_dim, v_dim, kv_heads, layers, groups, residual, fine;
    uint32_t peak, cut, n_tokens; /* to peak, truncated, to n_tokens */
    uint32_t window, sinks, codec;
    uint32_t points; /* a checkpoint each so many tokens */
    uint32_t removed;
    uint32_t extras; /* 1: tag, 2: next position, 4: pieces */
    uint32_t chain;  /* parents */
} seed;

#define F32 KVT_TYPE_F32
#define F16 KVT_TYPE_F16
#define I8 KVT_TYPE_I8
#define I4 KVT_TYPE_I4
#define I5 KVT_TYPE_I5
#define NONE KVT_RESIDUAL_NONE
#define AUTO KVT_CODEC_AUTO
#define ZSTD KVT_CODEC_ZSTD
#define RAW KVT_CODEC_RAW
#define PLAIN 0, 0, AUTO, 0, 0, 0, 0

static const seed seeds[] = {
    {"empty", I8, I8, 0, 8, 8, 1, 1, 1, 0, 0, 0, 0, 0, PLAIN},
    {"one", I8, I8, 0, 8, 8, 1, 1, 1, 0, 0, 1, 1, 1, PLAIN},
    {"f16", F16, F16, 0, 8, 16, 1, 1, 1, 0, 0, 70, 70, 70, PLAIN},
    {"f32", F32, F32, 0, 8, 8, 1, 1, 1, 0, 0, 66, 66, 66, 0, 0, RAW, 0, 0, 0, 0},
    {"f16-f32", F16, F32, 0, 24, 8, 1, 1, 1, 0, 0, 66, 66, 66, 0, 0, ZSTD, 0, 0, 0, 0},
    {"i8-open", I8, I8, 0, 8, 8, 1, 2, 1, 0, 0, 90, 90, 90, PLAIN},
    {"i8-sealed", I8, I8, 0, 24, 8, 1, 2, 1, NONE, 0, 140, 140, 140, 0, 0, ZSTD, 0, 0, 0, 0},
    {"i8-plain", I8, I8, 11, 16, 8, 1, 1, 1, NONE, 0, 150, 100, 120, PLAIN},
    {"i8-raw", I8, I8, 0, 16, 8, 1, 1, 1, NONE, 0, 150, 150, 150, 0, 0, RAW, 0, 0, 0, 0},
    {"i8-f16", I8, F16, 2, 8, 16, 1, 1, 1, NONE, 0, 80, 80, 80, 0, 0, RAW, 0, 0, 7, 0},
    {"f16-i8", F16, I8, 0, 8, 16, 1, 1, 1, NONE, 0, 80, 80, 80, 0, 0, ZSTD, 0, 0, 7, 0},
    {"i4", I4, I4, 0, 8, 8, 1, 1, 1, NONE, KVT_FINE_NONE, 150, 150, 150, PLAIN},
    {"i4-fine", I4, I4, 0, 8, 24, 1, 2, 1, NONE, 0, 150, 150, 150, 0, 0, ZSTD, 0, 0, 0, 0},
    {"i4-again", I4, I4, 0, 16, 8, 1, 1, 1, NONE, KVT_FINE_NONE, 200, 150, 160, PLAIN},
    {"i4-again-raw",
     I4,
     I4,
     0,
     8,
     8,
     1,
     1,
     1,
     NONE,
     KVT_FINE_NONE,
     200,
     150,
     160,
     0,
     0,
     RAW,
     0,
     0,
     0,
     0},
    {"i4-i5", I4, I5, 0, 8, 24, 2, 1, 1, NONE, KVT_FINE_NONE, 150, 90, 140, 0, 0, RAW, 0, 0, 0, 0},
    {"i4-i5-cut", I4, I5, 8, 8, 8, 1, 1, 1, NONE, KVT_FINE_NONE, 150, 90, 90, PLAIN},
    {"i8-i4", I8, I4, 0, 8, 8, 1, 1, 1, NONE, KVT_FINE_NONE, 140, 140, 140, PLAIN},
    {"f16-i5", F16, I5, 0, 8, 8, 1, 1, 1, NONE, KVT_FINE_NONE, 70, 70, 70, 0, 0, RAW, 0, 0, 0, 0},
    {"v-in-k", I8, I8, KVT_GROUP_V_IN_K, 24, 16, 1, 1, 1, NONE, 0, 100, 100, 100, PLAIN},
    {"v-in-k-f16",
     F16,
     F16,
     KVT_GROUP_V_IN_K,
     16,
     8,
     1,
     1,
     1,
     0,
     0,
     40,
     40,
     40,
     0,
     0,
     RAW,
     0,
     0,
     0,
     0},
    {"groups", I8, F16, 0, 8, 8, 1, 3, 2, NONE, 0, 140, 140, 140, PLAIN},
    {"groups-raw", F16, I8, 0, 8, 8, 1, 3, 2, 0, 0, 80, 80, 80, 0, 0, RAW, 0, 0, 4, 0},
    {"window", I8, I8, 0, 8, 8, 1, 1, 1, NONE, 0, 400, 400, 400, 64, 0, AUTO, 0, 0, 0, 0},
    {"window-sinks", I8, I8, 2, 8, 8, 1, 1, 1, NONE, 0, 420, 420, 420, 70, 70, RAW, 0, 0, 0, 0},
    {"window-points", I8, I8, 0, 8, 8, 1, 1, 1, NONE, 0, 520, 520, 520, 64, 2, AUTO, 130, 0, 0, 0},
    {"points", I8, I8, 0, 8, 8, 1, 1, 1, NONE, 0, 150, 150, 150, 0, 0, AUTO, 50, 0, 2, 0},
    {"points-raw", I8, I8, 0, 8, 8, 1, 1, 1, NONE, 0, 80, 80, 80, 0, 0, RAW, 70, 0, 0, 0},
    {"points-i4", I4,  I4,  0, 8, 8,    1,  1, 1, NONE, KVT_FINE_NONE,
     180,         100, 190, 0, 0, AUTO, 30, 0, 0, 0},
    {"points-groups", I4, I8, 0, 8, 8, 1, 2, 2, NONE, 0, 180, 100, 190, 0, 0, ZSTD, 60, 0, 1, 0},
    {"moved", I8, I8, 0, 8, 8, 1, 1, 1, 0, 0, 220, 220, 220, 0, 0, AUTO, 0, 64, 0, 0},
    {"moved-f16", F16, F16, 0, 8, 8, 1, 1, 1, 0, 0, 100, 100, 100, 0, 0, RAW, 0, 5, 0, 0},
    {"long", I8, I8, 0, 8, 8, 1, 1, 1, NONE, 0, 16500, 16500, 16500, 64, 0, ZSTD, 0, 0, 0, 0},
    {"delta", I8, I8, 0, 8, 8, 1, 1, 1, NONE, 0, 150, 150, 150, 0, 0, AUTO, 0, 0, 0, 1},
    {"delta-raw", F16, F16, 0, 8, 8, 1, 1, 1, 0, 0, 140, 140, 140, 0, 0, RAW, 0, 0, 7, 1},
    {"delta-two", I4, I8, 0, 8, 8, 1, 1, 1, NONE, 0, 150, 150, 150, 0, 0, AUTO, 0, 0, 1, 2},
    {"delta-groups", I8, F16, 0, 8, 8, 1, 2, 2, NONE, 0, 50, 50, 50, 0, 0, RAW, 60, 0, 0, 2},
    {"delta-moved", I8, I8, 0, 8, 8, 1, 1, 1, 0, 0, 220, 220, 220, 0, 0, AUTO, 0, 64, 0, 2},
    {"delta-long", F16, F16, 0, 8, 8, 1, 1, 1, 0, 0, 16390, 16390, 16390, 64, 0, ZSTD, 0, 0, 0, 1},
};

/* Controls for some of them. */
typedef struct variant {
    const char *seed, *name;
    unsigned char controls[FUZZ_CONTROLS];
} variant;

static const variant variants[] = {
    {"moved", "edges", {[CONTROL_MORE] = MORE_EDGES}},
    {"window-points", "edges", {[CONTROL_MORE] = MORE_EDGES}},
    {"points-i4", "edges", {[CONTROL_MORE] = MORE_EDGES}},
    {"points", "edges", {0, 0, 0, 0, 0, 0, 0, 0, 32, [CONTROL_MORE] = MORE_EDGES}},
    {"i8-f16", "edges", {0, 0, 0, 0, 0, 0, 0, 0, 32, [CONTROL_MORE] = MORE_EDGES}},
    {"f16-i8", "sweep", {[CONTROL_MORE] = MORE_SWEEP}},
    {"i4-again", "sweep", {[CONTROL_TYPES] = 1 + 1 * 4, [CONTROL_MORE] = MORE_SWEEP}},
    {"i8-sealed", "sweep", {0, 0, 8, [CONTROL_CODEC] = 65 + 6, [CONTROL_MORE] = MORE_SWEEP}},
    {"points", "sweep", {[CONTROL_MORE] = MORE_SWEEP}},
    {"window", "sweep", {[CONTROL_MORE] = MORE_SWEEP}},
    {"moved-f16", "sweep", {[CONTROL_MORE] = MORE_SWEEP}},
    {"delta-two", "sweep", {[CONTROL_CODEC] = 1, [CONTROL_MORE] = MORE_SWEEP}},
    {"f16", "prefix", {1, 10}},
    {"i8-open", "prefix", {1, 16, 8}},
    {"points", "checkpoint", {2, 40}},
    {"window", "prefix", {1, 90, 1}},
    {"f16", "prompt", {6, 9}},
    {"i8-sealed", "threads", {0, 0, 9}},
    {"i8-sealed", "budget", {0, 0, 17}},
    {"f16", "full", {0, 0, 64}},
    {"groups-raw", "no-tag", {0, 0, 128}},
    {"moved", "no-rope", {0, 0, 32}},
    {"i8-sealed", "to-i4", {0, 0, 1, 3 + 3 * 4}},
    {"i4-again", "to-f32", {0, 0, 1, 64}},
    {"i4-i5", "to-i8", {0, 0, 5, 2 + 2 * 4}},
    {"f32", "to-i5", {0, 0, 5, 3 + 4 * 4}},
    {"points-i4", "to-i8", {0, 0, 5, 2 + 2 * 4}},
    {"v-in-k", "to-f16", {0, 0, 1, 1 + 1 * 4}},
    {"window", "to-f16", {0, 0, 1, 1 + 1 * 4}},
    {"moved", "to-f16", {0, 0, 1, 1 + 1 * 4}},
    {"groups", "layers", {0, 0, 0, 0, 5}},
    {"groups-raw", "layers", {0, 0, 0, 0, 2}},
    {"i8-sealed", "layers", {0, 0, 1, 0, 1}},
    {"i8-sealed", "chunk", {0, 0, 0, 0, 0, 1}},
    {"points", "chunk", {0, 0, 0, 0, 0, 7}},
    {"i8-sealed", "fail", {0, 0, 0, 0, 0, 0, 5}},
    {"points", "fail", {0, 0, 0, 0, 0, 0, 12}},
    {"delta-two", "fail", {0, 0, 0, 0, 0, 0, 9}},
    {"i8-sealed", "cancel", {0, 0, 0, 0, 0, 0, 0, 1}},
    {"i8-f16", "cancel", {0, 0, 0, 0, 0, 0, 0, 255}},
    {"i8-sealed", "save-raw", {0, 0, 1, 0, 0, 0, 0, 0, 33, 0, 0, 0, 0, 1}},
    {"i8-sealed", "save-zstd", {0, 0, 1, 0, 0, 0, 0, 0, 2 + 24, 1, 0, 0, 0, 0}},
    {"points", "save-range", {0, 0, 0, 0, 0, 0, 0, 0, 2, 4 * 40}},
    {"groups", "save-layers", {0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3}},
    {"i4-again", "save-as", {0, 0, 1, 0, 0, 0, 0, 0, 66, 0}},
    {"f32", "save-as", {0, 0, 1, 0, 0, 0, 0, 0, 67 + 3, 0}},
    {"i8-open", "save-one-as", {0, 0, 1, 0, 0, 0, 0, 0, 64 + 16 + 1, 0}},
    {"i8-open", "save-v-as", {0, 0, 1, 0, 0, 0, 0, 0, 64 + 144 + 1, 0}},
    {"v-in-k", "save-k-as", {0, 0, 1, 0, 0, 0, 0, 0, 64 + 128 + 1, 0}},
    {"window", "save-as", {0, 0, 1, 0, 0, 0, 0, 0, 64 + 1, 0}},
    {"points", "save-v-as", {0, 0, 1, 0, 0, 0, 0, 0, 64 + 144 + 1, 0}},
    {"groups", "save-one-as", {0, 0, 1, 0, 0, 0, 0, 0, 64 + 16 + 1, 0}},
    {"i8-open", "save-as", {0, 0, 1, 0, 0, 0, 0, 0, 65 + 6, 0}},
    {"points", "save-as", {0, 0, 1, 0, 0, 0, 0, 0, 65 + 6, 0}},
    {"f16", "save-in-place", {0, 0, 1, 0, 0, 0, 0, 0, 4, 0}},
    {"delta-raw", "save-delta", {0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2}},
    {"delta", "layers", {0, 0, 0, 0, 1}},
    {"delta-groups", "layers", {0, 0, 0, 0, 2}},
    {"delta-two", "to-f16", {0, 0, 1, 1 + 1 * 4}},
    {"i8-sealed", "crypt-flip", {[CONTROL_DAMAGE] = 1, [CONTROL_WHERE] = 200}},
    {"i8-sealed", "crypt-cut", {[CONTROL_DAMAGE] = 2, [CONTROL_WHERE] = 200}},
    {"i8-sealed", "crypt-head", {[CONTROL_DAMAGE] = 3, [CONTROL_WHERE] = 4}},
    {"i8-sealed", "crypt-head-size", {[CONTROL_DAMAGE] = 3, [CONTROL_WHERE] = 5}},
    {"i8-sealed", "crypt-swap", {[CONTROL_DAMAGE] = 4}},
    {"i8-sealed", "crypt-twice", {[CONTROL_DAMAGE] = 5}},
    {"i8-sealed", "crypt-segment", {[CONTROL_DAMAGE] = 6, [CONTROL_WHERE] = 4 * 4}},
    {"i8-sealed", "crypt-segment-size", {[CONTROL_DAMAGE] = 6, [CONTROL_WHERE] = 1}},
    {"i8-sealed", "crypt-short", {[CONTROL_DAMAGE] = 7}},
};

static const uint32_t layers_of[2][3] = {{0, 2}, {1}};

static kvt_cache *cache_of(const seed *s)
{
    static const float frequencies[4] = {1.0f, 0.25f, 0.0625f, 0.015625f};
    kvt_group_config groups[2];
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    char text[256];
    for (uint32_t g = 0; g < s->groups; g++) {
        groups[g] = kvt_group_config_init();
        groups[g].n_layers = s->groups == 1 ? s->layers : g ? 1 : s->layers - 1;
        groups[g].layers = s->groups == 2 && s->layers == 3 ? layers_of[g] : NULL;
        groups[g].n_kv_heads = s->kv_heads;
        groups[g].n_q_heads = s->kv_heads * (1 + g);
        groups[g].k_dim = g ? 8 : s->k_dim;
        groups[g].v_dim = g ? 16 : s->v_dim;
        groups[g].k_type = g ? KVT_TYPE_F16 : s->k_type;
        groups[g].v_type = g ? KVT_TYPE_I8 : s->v_type;
        groups[g].flags = g ? 0 : s->flags;
        groups[g].residual_tokens = s->residual;
        groups[g].fine_tokens = s->fine;
        groups[g].window_tokens = g ? 0 : s->window;
        groups[g].sink_tokens = g ? 0 : s->sinks;
        groups[g].rope_pairing = KVT_ROPE_NEIGHBOURS;
        groups[g].rope_dims = 8;
        groups[g].rope_first_dim = !g && s->flags & KVT_GROUP_V_IN_K ? s->v_dim : 0;
        groups[g].rope_inverse_frequencies = frequencies;
    }
    config.groups = groups;
    config.n_groups = s->groups;
    config.max_tokens = 20000;
    config.fingerprint = "fuzz";
    config.fingerprint_bytes = s->extras & 1 ? 4 : 0;
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    if (kvt_cache_create(&config, &cache) != KVT_OK)
        fuzz_fail(s->name, 0, text);
    return cache;
}

static void append(const seed *s, kvt_seq *seq, uint32_t first, uint32_t end)
{
    static float k[64 * 64], v[64 * 64];
    static int32_t ids[64];
    for (uint32_t n = 0; first < end; first += n) {
        kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
        n = end - first < 10 ? end - first : 10;
        for (uint32_t i = 0; i < 64 * 64; i++) {
            uint32_t x = (i + (s->n_tokens > 1000 ? 0 : first * 77)) * 2654435761u;
            k[i] = (float)(int32_t)(x >> 24) / 32.0f - 4.0f + (i % 8 == 3 ? 9.0f : 0.0f);
            v[i] = (float)(int32_t)(x >> 16 & 255) / 64.0f - 2.0f;
        }
        for (uint32_t i = 0; i < n; i++)
            ids[i] = s->n_tokens > 1000 ? 7 : (int32_t)((first + i) % 5 ? first + i : 0) - 1;
        CHECK(kvt_seq_begin(seq, n, NULL) == KVT_OK);
        for (uint32_t layer = 0; layer < s->layers; layer++) {
            uint32_t g = s->groups == 2 && (s->layers == 3 ? layer == 1 : layer + 1 == s->layers);
            CHECK(kvt_append(seq, layer, &k_view,
                             !g && s->flags & KVT_GROUP_V_IN_K ? NULL : &v_view) == KVT_OK);
        }
        CHECK(kvt_seq_commit(seq, ids) == KVT_OK);
        if (s->points && (first + n) % s->points < n)
            CHECK(kvt_seq_checkpoint(seq, "the caller's", (first + n) % 13) == KVT_OK);
    }
}

static unsigned char out[1 << 22];

static size_t add_file(size_t at, const char *path, size_t number)
{
    FILE *f = fopen(path, "rb");
    size_t n;
    CHECK(f);
    n = fread(out + at, 1, sizeof out - at, f);
    (void)fclose(f);
    store32(out + FUZZ_HEAD + 4 * number, (uint32_t)n);
    return at + n;
}

static void write_out(const char *target, const char *name, const char *suffix, size_t n)
{
    char path[4096];
    FILE *f;
    (void)snprintf(path, sizeof path, "%s/%s%s%s", target, name, suffix[0] ? "-" : "", suffix);
    f = fopen(path, "wb");
    CHECK(f);
    CHECK(fwrite(out, 1, n, f) == n);
    CHECK(fclose(f) == 0);
}

static void make(const seed *s, const char *target)
{
    static const kvt_snapshot_piece pieces[2] = {{"title", "of the caller", 13}, {"none", "", 0}};
    kvt_cache *cache = cache_of(s);
    kvt_seq *seq;
    kvt_save_options options;
    size_t at = FUZZ_HEAD + 4 * (s->chain + 1);

    CHECK(kvt_seq_create(cache, &seq) == KVT_OK);
    if (s->extras & 1)
        CHECK(kvt_seq_set_tag(seq, "lora: 7", 7) == KVT_OK);
    append(s, seq, 0, s->peak);
    CHECK(kvt_seq_truncate(seq, s->cut) == KVT_OK);
    append(s, seq, s->cut, s->n_tokens);
    if (s->removed)
        CHECK(kvt_seq_remove(seq, s->removed < 64 ? s->n_tokens - 20 : 64, s->removed) == KVT_OK);
    if (s->extras & 2)
        CHECK(kvt_seq_set_next_position(seq, 100000) == KVT_OK);
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.no_fsync = 1;
    options.codec = s->codec;
    for (uint32_t i = s->chain + 1; i-- > 0;) {
        options.pieces = s->extras & 4 ? pieces : NULL;
        options.n_pieces = s->extras & 4 ? 2 : 0;
        options.parent = i < s->chain ? folder_file(i + 1, NULL, 0) : NULL;
        CHECK(kvt_seq_save(seq, folder_file(i, NULL, 0), &options) == KVT_OK);
        append(s, seq, (uint32_t)kvt_seq_length(seq), (uint32_t)kvt_seq_length(seq) + 40);
    }
    memset(out, 0, at);
    out[0] = 'F';
    out[1] = (unsigned char)(s->chain + 1);
    for (uint32_t i = 0; i <= s->chain; i++) {
        at = add_file(at, folder_file(i, NULL, 0), i);
        (void)remove(folder_file(i, NULL, 0));
    }
    write_out(target, s->name, "", at);
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (strcmp(variants[i].seed, s->name) == 0) {
            memcpy(out + 2, variants[i].controls, FUZZ_CONTROLS);
            write_out(target, s->name, variants[i].name, at);
        }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* A model in which all numbers are 1; vocab -n: a classifier of its own. */
static void make_model(const char *target, const char *name, int ours, int32_t vocab)
{
    const int32_t numbers[7] = {8, 12, 2, 2, 1, vocab, 4};
    const uint32_t words = (uint32_t)abs(vocab);
    size_t n = words * 8 * (vocab < 0 ? 2 : 1) + 2 * (16 + 128 + 64 + 288) + 8 + (ours ? 0 : 16);
    size_t at = ours ? 4 : 0, width = ours ? 2 : 4;
    memcpy(out, "TLM1", at);
    memcpy(out + at, numbers, sizeof numbers);
    at += sizeof numbers;
    for (size_t i = 0; i < n; i++, at += width) {
        const float one = 1.0f;
        if (ours)
            memcpy(out + at, "\0\x3c", 2);
        else
            memcpy(out + at, &one, 4);
    }
    write_out(target, name, "", at);
}

/* A tokenizer behind a text, as target_model.c has them. */
static void make_tokenizer(const char *target)
{
    static const char *const words[] = {"<unk>", "<s>", "</s>", " ",  "a",
                                        "b",     "ab",  "aab",  " a", "<0x41>"};
    static const char text[] = "aab ba\xc3\xa9\xff";
    const uint32_t longest = 6;
    size_t n = sizeof words / sizeof *words, at = 5 + sizeof text - 1;
    memcpy(out, "TOK", 3);
    out[3] = (unsigned char)n;
    out[4] = sizeof text - 1;
    memcpy(out + 5, text, sizeof text - 1);
    memcpy(out + at, &longest, 4);
    at += 4;
    for (size_t i = 0; i < n; i++) {
        const float score = (float)i;
        const uint32_t length = (uint32_t)strlen(words[i]);
        memcpy(out + at, &score, 4);
        memcpy(out + at + 4, &length, 4);
        memcpy(out + at + 8, words[i], length);
        at += 8 + length;
    }
    write_out(target, "tokenizer", "", at);
}

int main(int argc, char **argv)
{
    char models[4096];
    if (argc != 2)
        return 2;
    for (size_t i = 0; i < sizeof seeds / sizeof *seeds; i++)
        make(&seeds[i], argv[1]);
    (void)snprintf(models, sizeof models, "%s/model", argv[1]);
    (void)mkdir(models, 0777);
    make_model(models, "f16", 1, 5);
    make_model(models, "f32", 0, 5);
    make_model(models, "f16-classifier", 1, -3);
    make_model(models, "f32-classifier", 0, -3);
    make_tokenizer(models);
    return 0;
}
