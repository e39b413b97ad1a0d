/*
 * A snapshot as a list of sections: for the mutator. See file.c.
 */
#ifndef KVT_TEST_FUZZ_FILE_H
#define KVT_TEST_FUZZ_FILE_H

#include "fuzz.h"
#include "src/snapshot/format.h"

typedef struct section {
    uint32_t type, flags;
    uint64_t value;
    unsigned char *data; /* [n] the payload; malloc */
    size_t n;
} section;

#define FILE_SECTIONS 2048

typedef struct file {
    unsigned char *header;
    size_t n_header;
    section sections[FILE_SECTIONS];
    size_t n_sections;
    unsigned char *tail; /* what is no section */
    size_t n_tail;
    unsigned char id[16]; /* set by file_write */
    /* Ids of blocks, as they were and as they are after file_write, for the child. */
    unsigned char (*ids)[2][16];
    size_t n_ids;
} file;

/* How much is mended. */
#define MEND_NOTHING 0u
#define MEND_SUMS 1u    /* checksums, sizes that the file's structure needs */
#define MEND_DIGESTS 2u /* digests of layers, ids */
#define MEND_COUNTS 4u  /* n_blocks, the largest layer, blocks as the table has them */
#define MEND_PLACES 8u  /* padding of native sections, the index, the end */
#define MEND_ALL 15u

/* 0: it is none. */
int file_read(file *f, const unsigned char *data, size_t n);
void file_free(file *f);
void section_resize(section *s, size_t n);
/* A section at a place; data may be NULL: zeros. 0: there is no room. */
int file_insert(file *f, size_t at, uint32_t type, uint32_t flags, uint64_t value, const void *data,
                size_t n);
void file_remove(file *f, size_t at);
/* Bytes written, 0: more than room. */
size_t file_write(file *f, unsigned mend, unsigned char *to, size_t room);
/* A delta's parent section (number: of the parent's file; 0: not that) and block table, for one of
   its parents as that was written. */
void file_adopt(file *f, const file *parent, unsigned number);

/* The header's groups; 0: it is not sound. */
int file_header(const file *f, kvt_snap_header *header);
/* The native streams of a set of a section of layers, or of tokens; NULL: it is damaged. */
unsigned char *set_native(const section *s, const kvt_snap_shape *shapes, uint32_t n, size_t bytes);
/* The other way round; codec and filter are chosen by `how`. */
void set_code(section *s, const kvt_snap_shape *shapes, uint32_t n, const unsigned char *native,
              uint32_t how);
/* The one shape of a section of tokens. */
int tokens_shape(const section *s, kvt_snap_shape *shape);
/* The shapes of the layers of a block section; 0: there are none such. */
uint32_t block_shapes(const kvt_snap_header *header, const section *block, kvt_snap_shape *shapes,
                      size_t *bytes);

#endif
