/*
 * What the readers of a snapshot's parts share: a parser, and how it takes bytes, sections and
 * stream sets. sections.c has them; reader.c, blocks_in.c, chain.c and checkpoints.c use them.
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
    const kvt_snap_input *input;
    const kvt_snap_sink *sink;
    kvt_snap_header *header;
    kvt_group *groups;         /* [header->n_groups] their geometry */
    kvt_snap_buffer header_at; /* the header as it is in the file: [header_bytes] */
    size_t header_bytes;
    uint64_t offset, remaining;
    struct kvt_snap_parser *child; /* of a parent: whose blocks are read, else NULL */
    kvt_snap_counts counts;
    uint64_t done, total, told; /* bytes of images: for the progress */
    char place[160];            /* what is being read, for the texts */
    char name[64];              /* of the file, in the texts: of parents */
    kvt_snap_codec codec;       /* of all but layers */
    kvt_snap_codec *decoder;    /* that one, or the one that a chain has for all its files */
    kvt_snap_jobs jobs;
    kvt_snap_buffer payload, native, table, index, digests;
    size_t index_bytes;
    kvt_snap_parent parent;
    kvt_snap_chain *chain;     /* of a delta */
    int keeps_positions;       /* for the shifts: the sink does not */
    kvt_snap_buffer kept;      /* the sections of positions, as stored, each behind its size */
    size_t kept_bytes;         /* of them */
    size_t kept_read;          /* so many of these have been used again */
    kvt_snap_buffer positions; /* of a section that is */
    kvt_snap_buffer names;     /* of pieces: with their zeros, one after the other */
    size_t names_bytes;
    kvt_snap_buffer name_list; /* of them: reader.c */
    kvt_snap_section next;     /* its head has been read */
    int has_next;
    int by_index;       /* what is wanted has to begin where it is looked for */
    kvt_snap_runs runs; /* of the sequence's own blocks, which are n_own entries of the table */
    uint64_t n_own;
    uint64_t n_here;   /* entries of the table, or of the child's, whose blocks are in this file */
    uint64_t n_named;  /* extras that a checkpoint has named: in the order of the table */
    uint64_t n_tokens; /* of the last checkpoint */
    /* By groups: see kvt_snap_checkpoint; of the sequence, and of the last checkpoint. */
    uint64_t own_sealed[KVT_MAX_GROUPS];
    uint64_t sealed[KVT_MAX_GROUPS], first[KVT_MAX_GROUPS];
} kvt_snap_parser;

/* Whether bytes from .. end - 1 are all 0. */
int kvt_snap_zeros_from(const unsigned char *bytes, size_t from, size_t end);

/* Of a file that has no shifts, and whose parents have some. */
#define KVT_SNAP_MOVED_TEXT "keys that it inherits have moved, and it says that none has"

/* KVT_ERR_CORRUPT, with a text that says where and what. */
kvt_status kvt_snap_corrupt(kvt_snap_parser *p, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

kvt_status kvt_snap_take(kvt_snap_parser *p, void *to, size_t bytes);
/* The next bytes where they are memory already, and nowhere else: NULL otherwise, or at the end. */
const unsigned char *kvt_snap_take_view(kvt_snap_parser *p, size_t bytes);
/* Read into buffer[have ..], growing it as the bytes arrive. */
kvt_status kvt_snap_take_growing(kvt_snap_parser *p, kvt_snap_buffer *buffer, size_t have,
                                 size_t bytes, const char *what);

/*
 * The head of the section that comes next, of a type that is known; it is taken by kvt_snap_expect.
 * Unknown optional ones before it are skipped and noted. wanted: a type, and for the texts its
 * value.
 */
kvt_status kvt_snap_peek(kvt_snap_parser *p, uint32_t wanted, uint64_t value);
/* The section that has to come next, and its value. */
kvt_status kvt_snap_expect(kvt_snap_parser *p, uint32_t type, uint64_t value, kvt_snap_section *s);
/* The index's entry for a section that began at s->offset and ended here. */
kvt_status kvt_snap_note(kvt_snap_parser *p, const kvt_snap_section *s,
                         const unsigned char *digest);
/*
 * A section's payload with its checksum, in p->payload; *digest: of what the checksum is of. least:
 * bytes that it has without the checksum, at least; it has a multiple of 8, up to `most`.
 */
kvt_status kvt_snap_take_summed(kvt_snap_parser *p, const kvt_snap_section *s, size_t least,
                                uint64_t most, unsigned char *digest);

/*
 * Check the head of a stream set's section, and take its payload: *from, in memory as it is, or in
 * *buffer.
 */
kvt_status kvt_snap_take_set(kvt_snap_parser *p, const kvt_snap_section *s, uint32_t n,
                             size_t native_bytes, kvt_snap_buffer *buffer,
                             const unsigned char **from);

/* Why a stream set is not what it has to be. */
typedef struct kvt_snap_fault {
    const char *text; /* NULL: nothing, or a status with a text of its own */
    uint32_t kind;    /* of the stream; 0: of the set */
    uint32_t a, b;    /* numbers for the text */
} kvt_snap_fault;

/*
 * Decode and check a payload: *streams is then its streams in native form, one after the other,
 * where they lie in the payload or in *buffer. Touches nothing but its arguments: any thread may.
 * *stored: bytes of the streams as stored. KVT_ERR_CORRUPT and KVT_ERR_FORMAT come with a fault.
 */
kvt_status kvt_snap_decode_set(kvt_snap_codec *codec, const kvt_snap_shape *shapes, uint32_t n,
                               size_t native_bytes, const unsigned char *payload, size_t bytes,
                               kvt_snap_buffer *buffer, const unsigned char **streams,
                               uint64_t *stored, kvt_snap_fault *fault);
/* That fault as a status with a text. */
kvt_status kvt_snap_set_failed(kvt_snap_parser *p, kvt_status status, const kvt_snap_fault *fault);

/* ---- reader.c ---- */

void kvt_snap_parser_init(kvt_snap_parser *p, const kvt_snap_context *context,
                          const kvt_snap_input *input, const kvt_snap_sink *sink,
                          kvt_snap_header *header);
void kvt_snap_parser_release(kvt_snap_parser *p);
/* The header, and the parent section if there is one (else parent.depth is 0). */
kvt_status kvt_snap_read_header(kvt_snap_parser *p);
kvt_status kvt_snap_read_parent(kvt_snap_parser *p, int *is_delta);
/* The next bytes, read by places in the meantime. */
void kvt_snap_skip(kvt_snap_parser *p, uint64_t bytes);
/* One section of integers of n tokens from `first` on. */
kvt_status kvt_snap_read_chunk(kvt_snap_parser *p, uint32_t type, uint32_t kind, uint64_t first,
                               uint32_t n, const unsigned char **values, unsigned char *digest);
kvt_status kvt_snap_tell(kvt_snap_parser *p, uint64_t bytes);

/* ---- blocks_in.c ---- */

/*
 * Block number b of this file, whose section comes next, to the sink as `at`. entry: its 16 bytes
 * of the block table from the group on, or NULL where they are not known. id: its id, in the end;
 * wanted (may be NULL): what that has to be.
 */
kvt_status kvt_snap_read_block(kvt_snap_parser *p, uint64_t b, const kvt_snap_block *at,
                               const unsigned char *entry, const unsigned char *wanted,
                               unsigned char *id);

/* ---- checkpoints.c ---- */

/* A checkpoint's section, whose head has been peeked: checkpoints.c. */
kvt_status kvt_snap_take_checkpoint(kvt_snap_parser *p);

#endif /* KVT_SNAPSHOT_PARSER_H */
