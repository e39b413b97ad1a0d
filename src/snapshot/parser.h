/*
 * What the readers of a snapshot's parts share: a parser, and how it takes bytes, sections and
 * stream sets. sections.c has them; reader.c and checkpoints.c use them.
 */
#ifndef KVT_SNAPSHOT_PARSER_H
#define KVT_SNAPSHOT_PARSER_H

#include "src/snapshot/format.h"

#define KVT_SNAP_STEP_BYTES ((size_t)1 << 20) /* first size of a buffer that grows with the data */
#define KVT_SNAP_INDEX_BYTES ((size_t)4096)   /* first size of the index */

typedef struct kvt_snap_section {
    uint32_t type, flags;
    uint64_t bytes; /* payload */
    uint64_t value;
    uint64_t offset; /* of the head */
} kvt_snap_section;

typedef struct kvt_snap_parser {
    const kvt_snap_context *context;
    const kvt_reader *reader;
    const kvt_snap_sink *sink;
    kvt_snap_header *header;
    uint64_t offset, remaining;
    kvt_snap_counts counts;
    char place[112]; /* what is being read, for the texts */
    kvt_snap_codec codec;
    kvt_snap_buffer payload, native, table, index, digests;
    size_t index_bytes;
    kvt_snap_section next; /* its head has been read */
    int has_next;
    kvt_snap_runs runs; /* of the sequence's own blocks, which are n_own entries of the table */
    uint64_t n_own;
    uint64_t n_named;  /* extras that a checkpoint has named: in the order of the table */
    uint64_t n_tokens; /* of the last checkpoint */
    /* By groups: see kvt_snap_checkpoint; of the sequence, and of the last checkpoint. */
    uint64_t own_sealed[KVT_MAX_GROUPS];
    uint64_t sealed[KVT_MAX_GROUPS], first[KVT_MAX_GROUPS];
} kvt_snap_parser;

/* KVT_ERR_CORRUPT, with a text that says where and what. */
kvt_status kvt_snap_corrupt(kvt_snap_parser *p, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

kvt_status kvt_snap_take(kvt_snap_parser *p, void *to, size_t bytes);
/* Read into buffer[have ..], growing it as the bytes arrive. */
kvt_status kvt_snap_take_growing(kvt_snap_parser *p, kvt_snap_buffer *buffer, size_t have,
                                 size_t bytes, const char *what);

/*
 * The head of the section that comes next, of a type that is known; it is taken by kvt_snap_expect.
 * Unknown optional ones before it are skipped. wanted: for the texts, a type and its value.
 */
kvt_status kvt_snap_peek(kvt_snap_parser *p, uint32_t wanted, uint64_t value);
/* The section that has to come next, and its value. */
kvt_status kvt_snap_expect(kvt_snap_parser *p, uint32_t type, uint64_t value, kvt_snap_section *s);
/* The index's entry for a section that began at s->offset and ended here. */
kvt_status kvt_snap_note(kvt_snap_parser *p, const kvt_snap_section *s);

/*
 * Read a section's stream set: *native is then its streams in native form, one after the other,
 * checked, in memory of the parser.
 */
kvt_status kvt_snap_take_set(kvt_snap_parser *p, const kvt_snap_section *s,
                             const kvt_snap_shape *shapes, uint32_t n, size_t native_bytes,
                             const unsigned char **native);

/* A checkpoint's section, whose head has been peeked: checkpoints.c. */
kvt_status kvt_snap_take_checkpoint(kvt_snap_parser *p);

#endif /* KVT_SNAPSHOT_PARSER_H */
