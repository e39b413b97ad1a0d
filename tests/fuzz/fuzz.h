/*
 * Fuzzing of the snapshot code: inputs, the properties that hold of each, and files taken apart.
 *
 * An input is either a file, or an envelope: 'F', the number of files (1 to 3), 14 bytes of
 * controls that choose the options of the calls, the files' sizes (4 bytes each), the files. In an
 * envelope file i + 1 is the parent of file i, and lies beside it as p<i + 1>.kvt. All targets take
 * the same inputs, but for fuzz_model, whose input is a model or a tokenizer, and fuzz_store.
 *
 *   input.c       takes an input apart; caches of any small geometry, whose memory is counted
 *   properties.c  what holds of a sequence before and after a load
 *   target_*.c    the targets
 *   edges.c       options and callbacks that are at fault
 *   file.c        a snapshot as a list of sections, and all its checksums, digests and ids
 *   mutate.c      the mutator and the crossover of libFuzzer, on that list
 *   entry.c       libFuzzer's entry point; replay.c: a program that replays files
 *   make_seeds.c  the first corpus
 */
#ifndef KVT_TEST_FUZZ_H
#define KVT_TEST_FUZZ_H

#include <kvtile/kvtile.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FUZZ_FILES 3
#define FUZZ_CONTROLS 14
#define FUZZ_HEAD 16 /* of an envelope, before the sizes */

enum {                   /* controls */
       CONTROL_REUSE,    /* 0 to 2: KVT_REUSE_; from 4 on with a prompt */
       CONTROL_PROMPT,   /* the prompt's first other token */
       CONTROL_CACHE,    /* what a file does not say of its cache */
       CONTROL_TYPES,    /* convert: to types */
       CONTROL_LAYERS,   /* which layers of the file */
       CONTROL_CHUNK,    /* most bytes that a stream's read returns, 0: all */
       CONTROL_FAIL,     /* the allocation that fails, 0: none */
       CONTROL_CANCEL,   /* the call of progress that cancels, 0: none */
       CONTROL_CODEC,    /* of a save */
       CONTROL_RANGE,    /* of a save: first block and number of blocks */
       CONTROL_DAMAGE,   /* of an encrypted file: how it is damaged, 0: not */
       CONTROL_WHERE,    /* and where: 2 bytes */
       CONTROL_MORE = 13 /* bits of the targets */
};

#define MORE_EDGES 64  /* replay.c: fuzz_edges */
#define MORE_SWEEP 128 /* replay.c: each allocation fails in turn */

typedef struct input {
    size_t n;
    const unsigned char *files[FUZZ_FILES];
    size_t bytes[FUZZ_FILES];
    unsigned char controls[FUZZ_CONTROLS];
} input;

/* ---- input.c ---- */

void input_open(input *in, const uint8_t *data, size_t size);

/* The caches' memory. */
typedef struct meter {
    size_t live, peak;
    unsigned countdown; /* the allocation that fails; 0: none */
} meter;

/*
 * A cache for a file's geometry, with a sequence in a state that is known. Kept for later inputs.
 */
typedef struct place {
    uint64_t key;
    kvt_cache *cache;
    kvt_seq *seq, *other;
    kvt_config config;
    kvt_group_config groups[KVT_MAX_GROUPS];
    uint32_t layers[KVT_MAX_LAYERS];
    unsigned char tag[KVT_MAX_TAG];
    size_t tag_bytes;
    unsigned char *before; /* [n_before] the sequence's state, as it is saved */
    size_t n_before;
    meter meter;
    uint64_t working, working_tokens; /* the forecast of a load, and for how many tokens */
} place;

/* As file 0 and the controls say; the sequence is in its state. Never NULL. */
place *place_of(const input *in);
/* The sequence's state anew, after a load. */
void place_reset(place *p);
/* Append n tokens, which follow. */
void place_append(place *p, kvt_seq *seq, uint32_t n);

/* ---- properties.c ---- */

#define CHECK(x)                                                                                   \
    do {                                                                                           \
        if (!(x))                                                                                  \
            fuzz_fail(__FILE__, __LINE__, #x);                                                     \
    } while (0)
void fuzz_fail(const char *file, int line, const char *what);

typedef struct blob {
    unsigned char *data;
    size_t n;
} blob;

/* The whole state, raw. data NULL where damage is met (of a file that is mapped). */
blob state_of(const kvt_seq *seq);
int same_blob(const blob *a, const blob *b);
/* The sequence is as place_of gives it. */
void check_unchanged(place *p);
/* What holds after a load: attention is finite; it saves and loads to the same; it goes on. */
void check_loaded(place *p, kvt_seq *seq, const kvt_load_result *result, int lazy);
/* The most that a load takes of the allocator beyond what the cache keeps. */
void check_memory(place *p, const input *in, size_t before);

/* Options of the controls; their arrays are static. */
void options_of(const input *in, place *p, kvt_load_options *options);
void save_options_of(const input *in, const place *p, kvt_save_options *options);

/* A reader of memory. */
typedef struct view {
    const unsigned char *data;
    size_t n, at, most;
} view;
kvt_reader view_reader(view *v);
/* A file in memory that has a path: of its own until the next call but three. */
const char *memory_file(const unsigned char *data, size_t n);
/* A folder for files, the same one in each call. */
const char *fuzz_folder(void);
/* Its file i gets these bytes; the path is static. data NULL: the path alone. */
const char *folder_file(size_t i, const unsigned char *data, size_t n);

/* Without checksums what loads may be damaged, and be found so later. */
#ifdef KVT_FUZZING
#define FUZZ_UNCHECKED 1
#else
#define FUZZ_UNCHECKED 0
#endif

/* ---- targets ---- */

int fuzz_load(const uint8_t *data, size_t size);
int fuzz_map(const uint8_t *data, size_t size);
int fuzz_chain(const uint8_t *data, size_t size);
int fuzz_convert(const uint8_t *data, size_t size);
/* edges.c: faults of options and callbacks, with what file 0 makes. Slow: in replays. */
void fuzz_edges(const uint8_t *data, size_t size);
int fuzz_crypt(const uint8_t *data, size_t size);
int fuzz_model(const uint8_t *data, size_t size);
int fuzz_store(const uint8_t *data, size_t size); /* stored values: target_store.c */

/* ---- little-endian fields ---- */

static inline uint32_t load32(const void *p)
{
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline uint64_t load64(const void *p)
{
    uint64_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store32(void *p, uint32_t x)
{
    memcpy(p, &x, sizeof x);
}

static inline void store64(void *p, uint64_t x)
{
    memcpy(p, &x, sizeof x);
}

#endif
