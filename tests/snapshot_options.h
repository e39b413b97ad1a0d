/*
 * What the tests of the options of saves and loads share: a folder, options, subjects of all kinds.
 */
#ifndef KVT_TEST_SNAPSHOT_OPTIONS_H
#define KVT_TEST_SNAPSHOT_OPTIONS_H

#include "subject.h"

#include <stdio.h>
#include <unistd.h>

static char folder[64];

/* A path in the folder: one of eight buffers in turn. */
static inline const char *in_folder(const char *name)
{
    static char paths[8][400];
    static int next;
    char *path = paths[next++ % 8];
    int n = snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    assert_true(n > 0 && n < (int)sizeof paths[0]);
    return path;
}

/* Run tests with a folder of their own, which is empty again at their end. */
#define RUN_IN_FOLDER(tests)                                                                       \
    do {                                                                                           \
        char command[100];                                                                         \
        int failed;                                                                                \
        (void)snprintf(folder, sizeof folder, "/tmp/kvtile-options-XXXXXX");                       \
        if (!mkdtemp(folder))                                                                      \
            return 1;                                                                              \
        failed = cmocka_run_group_tests(tests, NULL, NULL);                                        \
        (void)snprintf(command, sizeof command, "rm -rf '%s'", folder);                            \
        return system(command) ? 1 : failed;                                                       \
    } while (0)

static inline kvt_save_options saves(uint32_t codec)
{
    kvt_save_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.codec = codec;
    o.no_fsync = 1;
    return o;
}

static inline kvt_load_options loads(void)
{
    kvt_load_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

static inline bytes save_with(const subject *s, const kvt_seq *seq, const kvt_save_options *o)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    expect_ok(s->cache, kvt_seq_save_stream(seq, &writer, o));
    return b;
}

static inline bytes slurp(const char *path)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    unsigned char part[4096];
    size_t n;
    FILE *f = fopen(path, "rb");
    if (!f)
        fail_msg("cannot open %s", path);
    while ((n = fread(part, 1, sizeof part, f)) > 0)
        assert_int_equal(writer.write(writer.user, part, n), 0);
    assert_int_equal(fclose(f), 0);
    return b;
}

static inline void spill(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    if (!f)
        fail_msg("cannot open %s", path);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static const unsigned char a_key[KVT_KEY_BYTES] = "a key of thirty-two bytes, or so";

/* Whether this build encrypts. */
static inline int has_crypt(const subject *s)
{
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_seq *seq = seq_of(s);
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_status status;
    o.key = a_key;
    status = kvt_seq_save_stream(seq, &writer, &o);
    assert_true(status == KVT_OK || status == KVT_ERR_UNSUPPORTED);
    bytes_free(&b);
    kvt_seq_destroy(seq);
    return status == KVT_OK;
}

/* Of the groups of a subject. */
enum {
    I8,
    I4_I5,
    WINDOW, /* with sinks, beside a group of f16 and f32 without one */
    F16,
    LATENT, /* V in K */
    I4_WINDOW /* of K in i4, alone */,
    F32,
    KINDS
};

static inline void open_kind(subject *s, int kind, rng *r)
{
    static const float turns[4] = {1.0f, 0.3f, 0.1f, 0.03f};
    kvt_group_config g[2];
    uint32_t n = 1;
    g[0] = group_of(3, 4, 2, 24, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    g[1] = group_of(2, 2, 1, 16, 24, KVT_TYPE_F16, KVT_TYPE_F32);
    switch (kind) {
    case I4_I5:
        g[0].k_type = KVT_TYPE_I4;
        g[0].v_type = KVT_TYPE_I5;
        g[0].residual_tokens = KVT_RESIDUAL_NONE;
        break;
    case WINDOW:
        g[0].window_tokens = 70;
        g[0].sink_tokens = 3;
        n = 2;
        break;
    case F16: g[0].k_type = g[0].v_type = KVT_TYPE_F16; break;
    case LATENT:
        g[0].flags = KVT_GROUP_V_IN_K;
        g[0].n_kv_heads = 1;
        g[0].k_dim = 24;
        break;
    case I4_WINDOW:
        g[0].k_type = g[0].v_type = KVT_TYPE_I4;
        g[0].window_tokens = 30;
        g[0].residual_tokens = KVT_RESIDUAL_NONE;
        break;
    case F32: g[0].k_type = g[0].v_type = KVT_TYPE_F32; break;
    default: break;
    }
    for (uint32_t i = 0; i < n; i++) {
        g[i].rope_pairing = KVT_ROPE_HALVES;
        g[i].rope_first_dim = kind == LATENT ? 16 : 0; /* not in V */
        g[i].rope_dims = 8;
        g[i].rope_inverse_frequencies = turns;
    }
    open_subject(s, g, n, r);
    open_cache(s, NULL);
}

static inline void mark(const subject *s, kvt_seq *seq)
{
    unsigned char blob[50];
    size_t n = (size_t)kvt_seq_length(seq) % sizeof blob;
    memset(blob, (int)n, sizeof blob);
    expect_ok(s->cache, kvt_seq_checkpoint(seq, blob, n));
}

/* A sequence with everything: checkpoints, a tag, a next position. */
static inline kvt_seq *full_seq(const subject *s, size_t n)
{
    kvt_seq *seq = seq_of(s);
    expect_ok(s->cache, kvt_seq_set_tag(seq, "tag", 3));
    for (size_t step = 0; kvt_seq_length(seq) < n; step++) {
        size_t left = n - (size_t)kvt_seq_length(seq), want = 1 + step * 37 % 90;
        grow(s, seq, want < left ? want : left);
        if (step % 2)
            mark(s, seq);
    }
    expect_ok(s->cache, kvt_seq_set_next_position(seq, 5000));
    return seq;
}

/* An empty one that may take what full_seq has saved. */
static inline kvt_seq *tagged_seq(const subject *s)
{
    kvt_seq *seq = seq_of(s);
    expect_ok(s->cache, kvt_seq_set_tag(seq, "tag", 3));
    return seq;
}

#endif
