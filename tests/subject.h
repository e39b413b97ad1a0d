/*
 * What tests of whole sequences share: a cache of one or two groups, tokens for it, steps of them,
 * and the comparison of two sequences. Includes the public header only.
 */
#ifndef KVT_TEST_SUBJECT_H
#define KVT_TEST_SUBJECT_H

#include "snapshot_support.h"

enum { MOST = 720 }; /* tokens of a test */

typedef struct subject {
    kvt_group_config groups[2];
    uint32_t n_groups;
    tokens t[2];     /* of each group, the same for all its layers */
    ledger *ledger;  /* of its memory; NULL: the C library's */
    uint64_t budget; /* 0: none */
    uint32_t n_threads;
    kvt_config config;
    kvt_cache *cache;
} subject;

/* FNV-1a of n more bytes. */
uint64_t mix(uint64_t h, const void *data, size_t n);
/* The cache of a subject: with an instruction set (NULL: the widest). */
void open_cache(subject *s, const char *isa);
/* Tokens for the groups: keys have a bias, and now and then an outlier. No cache yet. */
void open_subject(subject *s, const kvt_group_config *groups, uint32_t n_groups, rng *r);
/* Release both. */
void close_subject(subject *s);
/* Append the pending step's tokens, from token `first` of the test's on, to every layer. */
void append_layers(const subject *s, kvt_seq *seq, size_t first);
/* One step of tokens `first` .. of the test's tokens behind what the sequence has. */
void step_of(const subject *s, kvt_seq *seq, size_t first, size_t n);
/* The same, with the tokens that come next. */
void grow(const subject *s, kvt_seq *seq, size_t n);
/* An empty sequence. */
kvt_seq *seq_of(const subject *s);
/* How many empty sequences the budget still has room for: 1 to 63. */
size_t room_of(const subject *s);
/* What attention of the last query gives, on every layer, in every mode. */
uint64_t attend_hash(const subject *s, const kvt_seq *seq);
/* A new sequence, loaded from what another one saves. */
kvt_seq *reloaded(const subject *s, const kvt_seq *seq);
/* A raw snapshot. */
uint64_t file_hash(const subject *s, const kvt_seq *seq);
/* Two sequences have the same file, and the same attention. */
void expect_equal(const subject *s, const kvt_seq *a, const kvt_seq *b, const char *what,
                  size_t detail);

#endif
