/*
 * What the tests of snapshots with windows and checkpoints share.
 */
#ifndef KVT_TEST_SNAPSHOT_STATE_H
#define KVT_TEST_SNAPSHOT_STATE_H

#include "subject.h"

/* A group with a window and one without. type: of V, and of K, but for i5, beside which is i4. */
static inline void make(subject *s, uint32_t window, uint32_t sinks, kvt_type type,
                        uint32_t residual, rng *r)
{
    kvt_group_config g[2];
    g[0] = group_of(1, 2, 1, 16, 8, type == KVT_TYPE_I5 ? KVT_TYPE_I4 : type, type);
    g[1] = group_of(1, 2, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_F16);
    g[0].window_tokens = window;
    g[0].sink_tokens = sinks;
    g[0].residual_tokens = residual;
    open_subject(s, g, 2, r);
    open_cache(s, NULL);
}

static inline void checkpoint(const subject *s, kvt_seq *seq)
{
    unsigned char blob[80];
    uint64_t n = kvt_seq_length(seq);
    for (size_t i = 0; i < sizeof blob; i++)
        blob[i] = (unsigned char)(n * 7 + i);
    expect_ok(s->cache, kvt_seq_checkpoint(seq, blob, (size_t)(n % (sizeof blob + 1))));
}

/* Lengths of the checkpoints; *n of them. */
static inline void points_of(const subject *s, const kvt_seq *seq, uint64_t *at, size_t *n)
{
    expect_ok(s->cache, kvt_seq_checkpoints(seq, at, MOST, n));
}

/* A file with everything: released blocks, checkpoints of such, a tag and a next position. */
static inline bytes whole_file(const subject *s, uint32_t codec)
{
    kvt_seq *seq = seq_of(s);
    bytes file;
    expect_ok(s->cache, kvt_seq_set_tag(seq, "tag", 3));
    grow(s, seq, 30);
    checkpoint(s, seq);
    grow(s, seq, 70);
    expect_ok(s->cache, kvt_seq_set_next_position(seq, 500));
    checkpoint(s, seq);
    step_of(s, seq, 100, 100);
    expect_ok(s->cache, kvt_seq_set_next_position(seq, 1000));
    file = saved(s->cache, seq, codec);
    kvt_seq_destroy(seq);
    return file;
}

/* A sequence that must not change. */
static inline kvt_seq *victim_of(const subject *s)
{
    kvt_seq *seq = seq_of(s);
    expect_ok(s->cache, kvt_seq_set_tag(seq, "tag", 3));
    grow(s, seq, 80);
    checkpoint(s, seq);
    step_of(s, seq, 200, 250);
    return seq;
}

#endif
