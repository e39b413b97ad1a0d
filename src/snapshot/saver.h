/*
 * What the writers of a snapshot's parts share: a saver, and how it puts bytes and sections.
 * writer.c has them; checkpoints.c uses them.
 */
#ifndef KVT_SNAPSHOT_SAVER_H
#define KVT_SNAPSHOT_SAVER_H

#include "src/snapshot/format.h"

/* A block of checkpoints that the sequence's table does not have. */
typedef struct kvt_snap_extra {
    const kvt_block *block;
    uint32_t row, group, tokens;
    uint32_t next; /* of the same row and group: its number from 1, 0: none */
} kvt_snap_extra;

typedef struct kvt_snap_saver {
    const kvt_snap_context *context;
    const kvt_seq *seq;
    const kvt_writer *writer;
    kvt_snap_header *header;
    kvt_snap_codec codec;
    uint64_t offset;     /* bytes put so far */
    kvt_snap_buffer out; /* collected: out_bytes of it */
    size_t out_bytes;
    kvt_snap_buffer native; /* streams of a layer, or ids of a section */
    kvt_snap_buffer stored; /* the section that is made of them */
    kvt_snap_buffer table, index, digests;
    size_t index_bytes;
    kvt_snap_runs runs;
    uint64_t n_own;         /* entries of the table that are the sequence's own; extras follow */
    kvt_snap_buffer extras; /* kvt_snap_extra[n_extras] */
    uint32_t n_extras;
    kvt_snap_buffer firsts; /* size_t [checkpoint][group]: the first row behind the sinks */
    kvt_snap_buffer heads;  /* by (row, group): the last extra of it, its number from 1 */
    kvt_snap_buffer words;  /* of all checkpoints: for each group `from`, then the rows' entries */
    size_t words_bytes;
} kvt_snap_saver;

/* Collect bytes, and write them when there are enough. */
kvt_status kvt_snap_put(kvt_snap_saver *s, const void *data, size_t bytes);
/* A section's head. */
kvt_status kvt_snap_put_head(kvt_snap_saver *s, uint32_t type, uint64_t bytes, uint64_t value);
/* Index entry of a section that began at `offset` and has been put. The index has room. */
void kvt_snap_put_note(kvt_snap_saver *s, uint32_t type, uint64_t value, uint64_t offset);
/* The block table's entry of a block, its id included. */
void kvt_snap_make_entry(kvt_snap_saver *s, const kvt_block *block, uint64_t row, uint32_t group,
                         uint32_t tokens, unsigned char *entry);

/* ---- checkpoints.c ---- */

/*
 * Find the entries of all checkpoints' blocks, when the table has the sequence's own: those that it
 * does not have become extras. Sets extras, words and the header's n_blocks.
 */
kvt_status kvt_snap_plan_checkpoints(kvt_snap_saver *s);
kvt_status kvt_snap_put_checkpoints(kvt_snap_saver *s);

#endif /* KVT_SNAPSHOT_SAVER_H */
