/*
 * What the tests of stored prefixes share: geometries, prompts, sequences to compare with, and
 * stored values taken apart (docs/format.md, "Stored values"). Includes the public headers and
 * xxHash only.
 */
#ifndef KVT_TEST_STORE_SCENES_H
#define KVT_TEST_STORE_SCENES_H

#include "memory_store.h"
#include "subject.h"

/* ---- geometries ---- */

enum { N_GEOMETRIES = 12 };
const char *geometry_name(size_t i);
/* A group of two layers. */
kvt_group_config geometry_group(size_t i);

/* ---- prompts and sequences ---- */

/* The ids of the first n tokens of a subject's: 0, 1, 2, ... */
void make_prompt(int32_t *prompt, size_t n);
/* How many tokens are sealed in all groups at n tokens. */
uint64_t sealed_tokens(const subject *s, uint64_t n);
/* n tokens, in steps of 40. */
kvt_seq *sequence_of(const subject *s, uint64_t n);
/*
 * The sequence that a get of n tokens has to give: cut from one of MOST tokens, so that all its
 * rows are sealed for good. It cannot be had where a window has released them.
 */
kvt_seq *sequence_cut(const subject *s, uint64_t n);
/* Options of the right size. */
kvt_prefix_options prefix_options(void);

/* ---- values ---- */

enum {                      /* offsets in a value */
       VALUE_VERSION = 8,   /* 4 */
       VALUE_FLAGS = 12,    /* 4 */
       VALUE_KEY = 16,      /* 32 */
       VALUE_BYTES = 48,    /* 8 */
       VALUE_TOKENS = 56,   /* 8 */
       VALUE_BLOB = 64,     /* 8 */
       VALUE_POSITION = 72, /* 4 */
       VALUE_N = 76,        /* 4: entries */
       VALUE_ENTRIES = 80,
       ENTRY_ROW = 0,     /* 8 */
       ENTRY_GROUP = 8,   /* 4 */
       ENTRY_FORM = 12,   /* 4 */
       ENTRY_TOKENS = 16, /* 4 */
       ENTRY_LAYERS = 20, /* 4 */
       ENTRY_IMAGE = 24,  /* 8: bytes of a layer */
       ENTRY_BYTES = 32
};

/* Where the parts of a value are that is one. */
typedef struct value_map {
    size_t n_entries, n_layers;
    size_t digests, sum, head; /* offsets of the digests and the checksum; bytes of the head */
    size_t blob;               /* offset */
} value_map;
value_map map_value(const unsigned char *data, size_t n);
/* All digests and the checksum anew, as far as what the value says of itself is in it. */
void resign_value(unsigned char *data, size_t n);
/* The checksum alone. */
void resum_value(unsigned char *data, size_t n);
/* The value of so many tokens, of a block (of a group) or of a checkpoint; fails the test. */
memory_value *find_value(memory_store *m, int checkpoint, uint64_t n_tokens, uint32_t group);

#endif
