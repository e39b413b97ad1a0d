/*
 * What the writers of a snapshot's parts share: a saver, and how it puts bytes and sections.
 * writer.c has them, blocks_out.c and checkpoints.c use them, save.c makes a saver.
 */
#ifndef KVT_SNAPSHOT_SAVER_H
#define KVT_SNAPSHOT_SAVER_H

#include "src/snapshot/format.h"

/* A block of checkpoints that the sequence's table does not have. */
typedef struct kvt_snap_extra {
    const kvt_block *block;
    unsigned char id[KVT_SNAP_ID_BYTES];
    uint32_t row, group, tokens;
    uint32_t next; /* of the same row and group: its number from 1, 0: none */
} kvt_snap_extra;

/* Where the bytes go: to a stream, or to memory. */
typedef struct kvt_snap_output {
    const kvt_writer *writer; /* NULL: memory */
    /* Of the writer's: several parts at once; answers as write. NULL: one after the other. */
    int (*write_parts)(void *user, const kvt_snap_part *parts, size_t n);
    unsigned char *memory; /* [room] */
    size_t room;
} kvt_snap_output;

#define KVT_SNAP_PARTS 64 /* collected before a write */
/*
 * And so many bytes of what lies in memory that stays. A file system makes the pages that hold a
 * file as large as its writes: writes of a layer each, of 130 KiB, took ext4 twice the time.
 */
#define KVT_SNAP_WRITE_BYTES ((size_t)1 << 21)

typedef struct kvt_snap_saver {
    const kvt_snap_context *context;
    const kvt_seq *seq;
    const kvt_save_options *options;
    kvt_snap_output output;
    kvt_snap_header *header; /* of the file */
    /* Of the file's groups: the cache's, how they are stored, and where they are in layer_of. */
    uint32_t group_of[KVT_MAX_GROUPS], first_layer[KVT_MAX_GROUPS];
    const kvt_group *stored_as[KVT_MAX_GROUPS];
    uint32_t layer_of[KVT_MAX_LAYERS]; /* of the file's layers, by groups: in the cache's group */
    kvt_group *targets;                /* [header->n_groups] with convert, else NULL */
    float *signs[KVT_MAX_GROUPS];      /* of their rotations */
    int whole;                         /* blocks have the ids that the cache knows */
    int native;                        /* images, no streams */
    size_t first_row;                  /* of the sequence: the file's row 0 */
    size_t n_checkpoints;              /* of the sequence's, that are saved */
    kvt_snap_chain *chain;             /* of a delta: its parents, else NULL */
    kvt_snap_parent parent;
    kvt_snap_jobs jobs;  /* the first one's codec codes what is no layer, too */
    uint64_t offset;     /* bytes put so far */
    kvt_snap_buffer out; /* small pieces that are collected: out_bytes of it */
    size_t out_bytes;
    kvt_snap_part
        parts[KVT_SNAP_PARTS]; /* all that is collected, in order: in `out`, or elsewhere */
    size_t n_parts, parts_bytes;
    int writes_beside;          /* what is collected is written while layers are hashed */
    kvt_snap_buffer native_ids; /* ids of a section */
    kvt_snap_buffer stored;     /* the section that is made of them */
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
    uint64_t done, total, told; /* bytes of images: for the progress */
} kvt_snap_saver;

/* ---- writer.c ---- */

/* Write what is collected, by write_parts, which answers. No error text: by any thread. */
int kvt_snap_write_collected(kvt_snap_saver *s);
/* What a write's answer comes to: KVT_ERR_IO, with a text, where it is not 0. */
kvt_status kvt_snap_written(const kvt_snap_saver *s, int answer);
/* Collect bytes, and write them when there are enough. */
kvt_status kvt_snap_put(kvt_snap_saver *s, const void *data, size_t bytes);
/* The same of bytes that stay where they are and as they are until the end of the save. */
kvt_status kvt_snap_put_kept(kvt_snap_saver *s, const void *data, size_t bytes);
/* Room for so many bytes in the memory that is written; NULL: there is none (KVT_ERR_FULL). */
unsigned char *kvt_snap_put_room(kvt_snap_saver *s, uint64_t bytes);
/* A section's head, into memory; and put. */
void kvt_snap_make_head(unsigned char *head, uint32_t type, uint64_t bytes, uint64_t value);
kvt_status kvt_snap_put_head(kvt_snap_saver *s, uint32_t type, uint64_t bytes, uint64_t value);
/* A payload, and its checksum; *digest (may be NULL): of the same bytes. */
kvt_status kvt_snap_put_summed(kvt_snap_saver *s, const void *data, size_t bytes,
                               unsigned char *digest);
/*
 * A payload in parts: bytes filled up to `room` with zeros, and what they sum up to; then the
 * checksum and the index entry of the section, which began at `offset`.
 */
kvt_status kvt_snap_put_part(kvt_snap_saver *s, kvt_snap_summer *summer, const void *data,
                             size_t bytes, size_t room);
kvt_status kvt_snap_put_parts_end(kvt_snap_saver *s, const kvt_snap_summer *summer, uint32_t type,
                                  uint64_t value, uint64_t offset);
/* Index entry of a section that began at `offset` and has been put. The index has room. */
void kvt_snap_put_note(kvt_snap_saver *s, uint32_t type, uint64_t value, uint64_t offset,
                       const unsigned char *digest);
/*
 * Code streams that lie one after the other, into a section with its head at `to`. *bytes: its
 * size.
 */
kvt_status kvt_snap_make_set(kvt_snap_codec *codec, uint32_t type, uint64_t value,
                             const kvt_snap_shape *shapes, uint32_t n, const unsigned char *native,
                             unsigned char *to, size_t *bytes);
/* The whole snapshot: all of the saver up to `jobs` is set. */
kvt_status kvt_snap_write(kvt_snap_saver *s);

/* ---- blocks_out.c ---- */

/* A block of the sequence's in a row and group of the file, NULL where it has none. */
const kvt_block *kvt_snap_own_block(const kvt_snap_saver *s, uint64_t row, uint32_t group);
/* The form in which a block of the cache is stored. */
uint32_t kvt_snap_stored_form(const kvt_snap_saver *s, const kvt_block *block, uint64_t row,
                              uint32_t group, uint32_t tokens);
/* The id that a block has in the file. */
kvt_status kvt_snap_id_of(kvt_snap_saver *s, const kvt_block *block, uint64_t row, uint32_t group,
                          uint32_t tokens, unsigned char *id);
/* An entry of the block table; id NULL: the block is in the file. */
void kvt_snap_make_entry(kvt_snap_saver *s, const kvt_block *block, uint64_t row, uint32_t group,
                         uint32_t tokens, const unsigned char *id, unsigned char *entry);
/* `bytes`, and those that a block of a form takes in the file at most, that begins there. */
uint64_t kvt_snap_block_bound(const kvt_snap_saver *s, uint64_t bytes, uint32_t group,
                              uint32_t form);
/* Entry b of the table, which is this block, unless it is in a parent. */
kvt_status kvt_snap_put_block(kvt_snap_saver *s, uint64_t b, const kvt_block *block);

/* ---- checkpoints.c ---- */

/*
 * Find the entries of all checkpoints' blocks, when the table has the sequence's own: those that it
 * does not have become extras. Sets extras, words and the header's n_blocks.
 */
kvt_status kvt_snap_plan_checkpoints(kvt_snap_saver *s);
kvt_status kvt_snap_put_checkpoints(kvt_snap_saver *s);

#endif /* KVT_SNAPSHOT_SAVER_H */
