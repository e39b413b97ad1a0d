/*
 * The snapshot's records, and what the files of src/snapshot/ offer each other.
 *
 * docs/format.md specifies the file; the constants here are its numbers. Every integer in a file
 * is little-endian. Stored K and V go to the file as they lie in memory, so the host has to be
 * little-endian too: no other is supported.
 *
 * Arrows point down: writer -> checkpoints; load, inspect -> reader -> checkpoints -> sections;
 * codec, streams, header, hash and context below them all.
 */
#ifndef KVT_SNAPSHOT_FORMAT_H
#define KVT_SNAPSHOT_FORMAT_H

#include "simd/stripes.h"
#include "src/cache/cache.h"

#include <limits.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "kvtile snapshots hold blocks as they lie in memory: little-endian hosts only"
#endif

/* ---- numbers of the format ---- */

#define KVT_SNAP_VERSION 1u
#define KVT_SNAP_MAGIC "\x89KVT\r\n\x1a\n" /* 8 bytes: text-mode transfers break it */
#define KVT_SNAP_FOOTER "KVTE\r\n\x1a\n"   /* 8 bytes: the last of a file */
#define KVT_SNAP_MAGIC_BYTES 8

#define KVT_SNAP_FIXED_BYTES 64   /* header before the groups */
#define KVT_SNAP_GROUP_BYTES 48   /* one group in the header */
#define KVT_SNAP_SECTION_BYTES 32 /* head of a section */
#define KVT_SNAP_STREAM_BYTES 24  /* one stream in a stream set's table */
#define KVT_SNAP_SET_BYTES 8      /* a stream set before that table */
#define KVT_SNAP_SUM_BYTES 8      /* an XXH64 */
#define KVT_SNAP_ENTRY_BYTES 32   /* one entry of the block table */
#define KVT_SNAP_NOTE_BYTES 48    /* one entry of the index */
#define KVT_SNAP_BLOCK_BYTES 40   /* payload of a block section */
#define KVT_SNAP_END_BYTES 48     /* payload of the end section */
#define KVT_SNAP_PARENT_BYTES 32  /* payload of the parent section before the name */
#define KVT_SNAP_PIECE_BYTES 16   /* payload of a caller's section before the name */
#define KVT_SNAP_STATE_BYTES 8    /* payload of the sequence section before the tag */
#define KVT_SNAP_POINT_BYTES 16   /* payload of a checkpoint before its blocks */
#define KVT_SNAP_ID_BYTES 16
#define KVT_SNAP_ID_HEAD 8    /* an id is the digest of: tokens, representation, layers' digests */
#define KVT_SNAP_ALIGN 64     /* of a native block's images, from the header's start */
#define KVT_SNAP_NAME_MAX 255 /* bytes of a parent's file name */

#define KVT_SNAP_CHUNK_TOKENS 16384 /* tokens of a section of ids or positions: 256 blocks */
#define KVT_SNAP_MAX_STREAMS 3
#define KVT_SNAP_ABSENT UINT32_MAX /* in a checkpoint: a row without a block, out of its window */

/* Most bytes that a header can have, and an upper bound for its struct on disk. */
#define KVT_SNAP_HEADER_MAX                                                                        \
    (KVT_SNAP_FIXED_BYTES + KVT_MAX_GROUPS * KVT_SNAP_GROUP_BYTES + KVT_MAX_LAYERS * 4 +           \
     KVT_MAX_FINGERPRINT + KVT_SNAP_SUM_BYTES)

enum { /* section types */
       KVT_SNAP_TOKEN_IDS = 1,
       KVT_SNAP_POSITIONS = 2,
       KVT_SNAP_BLOCK_TABLE = 3,
       KVT_SNAP_BLOCK = 4,
       KVT_SNAP_LAYER = 5,
       KVT_SNAP_INDEX = 6,
       KVT_SNAP_END = 7,
       KVT_SNAP_SEQUENCE = 8,
       KVT_SNAP_CHECKPOINT = 9,
       KVT_SNAP_SHIFTS = 10,
       KVT_SNAP_PARENT = 11,
       KVT_SNAP_PIECE = 12,
       KVT_SNAP_IMAGES = 13,
       KVT_SNAP_DIGESTS = 14,
       KVT_SNAP_LAST_TYPE = 14
};

#define KVT_SNAP_MOVED 1u    /* header flag: keys have moved, and sections of shifts say so */
#define KVT_SNAP_UNKEYED 2u  /* header flag: nothing of it has a key in a store */
#define KVT_SNAP_REQUIRED 1u /* section flag: a reader that does not know the type must refuse */

enum { /* stream kinds */
       KVT_SNAP_KIND_TOKEN_IDS = 1,
       KVT_SNAP_KIND_POSITIONS = 2,
       KVT_SNAP_KIND_K = 3,
       KVT_SNAP_KIND_V = 4,
       KVT_SNAP_KIND_SCALES = 5,
       KVT_SNAP_KIND_SHIFTS = 7
};

enum { /* filters */
       KVT_SNAP_NATIVE = 0,
       KVT_SNAP_TOKEN_MAJOR = 1,
       KVT_SNAP_DELTA = 2,
       KVT_SNAP_PLANES = 3
};

enum { KVT_SNAP_RAW = 0, KVT_SNAP_ZSTD = 1 }; /* codecs */

/* Representations of a block are KVT_SEALED, KVT_OPEN and KVT_FINE of cache.h. */

/* ---- little-endian fields ---- */

static inline void kvt_put32(unsigned char *p, uint32_t x)
{
    memcpy(p, &x, sizeof x);
}

static inline void kvt_put64(unsigned char *p, uint64_t x)
{
    memcpy(p, &x, sizeof x);
}

static inline uint32_t kvt_get32(const unsigned char *p)
{
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline uint64_t kvt_get64(const unsigned char *p)
{
    uint64_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* ---- hash.c: the only file that names xxHash ---- */

uint64_t kvt_snap_sum(const void *data, size_t bytes); /* XXH64, seed 0 */
/* XXH3-128, in its canonical (big-endian) bytes, of the concatenation of pieces. */
typedef struct kvt_snap_digester {
    uint64_t state[72]; /* room for XXH3_state_t */
} kvt_snap_digester;
void kvt_snap_digester_init(kvt_snap_digester *digester);
void kvt_snap_digester_add(kvt_snap_digester *digester, const void *data, size_t bytes);
void kvt_snap_digester_end(const kvt_snap_digester *digester, unsigned char *digest);
/* XXH64 and XXH3-128 of the concatenation of pieces. */
typedef struct kvt_snap_summer {
    uint64_t state[16]; /* room for XXH64_state_t */
    kvt_snap_digester digester;
} kvt_snap_summer;
void kvt_snap_summer_init(kvt_snap_summer *summer);
void kvt_snap_summer_add(kvt_snap_summer *summer, const void *data, size_t bytes);
uint64_t kvt_snap_summer_sum(const kvt_snap_summer *summer);
void kvt_snap_summer_digest(const kvt_snap_summer *summer, unsigned char *digest);
/* XXH3-128 of at most so many bytes, for digest.c. */
#define KVT_SNAP_SHORT_BYTES 240
void kvt_snap_digest_short(const void *data, size_t bytes, unsigned char *digest);

/* ---- digest.c: XXH3-128 of what is long ---- */

/* XXH3-128 in its canonical bytes. */
void kvt_snap_digest(const void *data, size_t bytes, unsigned char *digest);
/*
 * memcpy, and kvt_snap_digest of what is copied. `to` is not going to be read soon: what is long is
 * written past the caches.
 */
void kvt_snap_copy_digest(void *to, const void *from, size_t bytes, unsigned char *digest);
/* The same of more than KVT_SNAP_SHORT_BYTES, by parts: what is read is in the caches then. */
typedef struct kvt_snap_copier {
    uint64_t accumulators[8];
    kvt_stripes *stripes;
    const unsigned char *from;
    unsigned char *to;
    size_t bytes, done, copied; /* done: in the accumulators */
    int past_caches;
} kvt_snap_copier;
/* stripes NULL: those for this processor. to NULL: no copy. */
void kvt_snap_copier_begin(kvt_snap_copier *copier, kvt_stripes *stripes, unsigned char *to,
                           const unsigned char *from, size_t bytes);
/* At least the first `end` bytes are read, but for the last stripe. */
void kvt_snap_copier_reach(kvt_snap_copier *copier, size_t end);
/* The rest. */
void kvt_snap_copier_end(kvt_snap_copier *copier, unsigned char *digest);

/* Does a checksum hold? A fuzzer has to get past it. */
static inline int kvt_snap_same_sum(uint64_t stored, uint64_t computed)
{
#ifdef KVT_FUZZING
    (void)stored;
    (void)computed;
    return 1;
#else
    return stored == computed;
#endif
}

/* ---- context.c: memory and texts, with a cache or without ---- */

/* cache NULL (inspection): memory is the C library's, texts go to text. */
typedef struct kvt_snap_context {
    kvt_cache *cache;
    char *text;
    size_t text_bytes;
} kvt_snap_context;

kvt_status kvt_snap_fail(const kvt_snap_context *context, kvt_status status, const char *format,
                         ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* As kvt_mem_alloc_working and kvt_mem_free_working. */
kvt_status kvt_snap_alloc(const kvt_snap_context *context, size_t bytes, const char *what,
                          void **memory);
void kvt_snap_free(const kvt_snap_context *context, void *memory, size_t bytes);

typedef struct kvt_snap_buffer {
    unsigned char *data;
    size_t bytes;
} kvt_snap_buffer;

/* Make a buffer at least `bytes` long; its first `keep` bytes stay. On an error it stays sound. */
kvt_status kvt_snap_reserve(const kvt_snap_context *context, kvt_snap_buffer *buffer, size_t keep,
                            size_t bytes, const char *what);
void kvt_snap_release(const kvt_snap_context *context, kvt_snap_buffer *buffer);

/* What an allocation of `bytes` counts as: see src/memory.c. */
static inline uint64_t kvt_snap_counted(uint64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* ---- header.c ---- */

typedef struct kvt_snap_header {
    uint64_t n_tokens;
    uint64_t n_blocks; /* of the block table */
    uint32_t n_groups, n_layers;
    kvt_snapshot_group groups[KVT_MAX_GROUPS];
    uint32_t layers[KVT_MAX_LAYERS]; /* the groups' layer numbers, one group after the other */
    uint8_t fingerprint[KVT_MAX_FINGERPRINT];
    uint32_t fingerprint_bytes;
    uint32_t flags; /* KVT_SNAP_MOVED, KVT_SNAP_UNKEYED */
} kvt_snap_header;

/*
 * n_blocks: as if every row had a block of each group, and none of a checkpoint's. The cache may be
 * one that is only planned: then header->layers stay 0.
 */
void kvt_snap_header_make(const kvt_cache *cache, uint64_t n_tokens, kvt_snap_header *header);
/* Bytes on disk, checksum included. */
size_t kvt_snap_header_bytes(const kvt_snap_header *header);
void kvt_snap_header_put(const kvt_snap_header *header, unsigned char *to);
/*
 * The first KVT_SNAP_FIXED_BYTES of a file: magic, version, limits, counts. Sets *header's counts
 * and *bytes, the size of the whole header. name: of the file, as the texts begin with it, or "".
 */
kvt_status kvt_snap_header_begin(const kvt_snap_context *context, const char *name,
                                 const unsigned char *from, kvt_snap_header *header, size_t *bytes);
/* The whole header, after kvt_snap_header_begin. */
kvt_status kvt_snap_header_get(const kvt_snap_context *context, const char *name,
                               const unsigned char *from, size_t bytes, kvt_snap_header *header);
/*
 * KVT_ERR_MISMATCH, naming the field, unless the header is of this cache's model; KVT_ERR_FULL.
 * converts: the storage types need not be the cache's.
 */
kvt_status kvt_snap_header_match(const kvt_cache *cache, const kvt_snap_header *header,
                                 uint32_t converts);
/* In parts, where layers are chosen: all but the groups; group g as one of the cache's. */
kvt_status kvt_snap_header_match_model(const kvt_cache *cache, const kvt_snap_header *header);
kvt_status kvt_snap_group_match(const kvt_cache *cache, const kvt_snap_header *header, uint32_t g,
                                uint32_t of, uint32_t converts);

/* Why a group cannot be one that kvt_cache_create takes; NULL when it can. */
const char *kvt_snap_group_fault(const kvt_snapshot_group *group);
/* Rows of a group that its window always leaves: as kvt_sink_rows; 0 where it has none. */
uint64_t kvt_snap_sink_rows(const kvt_snapshot_group *group);

/*
 * Which rows a sequence has blocks of, by groups: all but sinks .. first - 1, which are none where
 * the two are equal.
 */
typedef struct kvt_snap_runs {
    uint32_t n_groups;
    uint64_t sinks[KVT_MAX_GROUPS], first[KVT_MAX_GROUPS];
} kvt_snap_runs;

static inline int kvt_snap_has_row(const kvt_snap_runs *runs, uint64_t row, uint32_t group)
{
    return row < runs->sinks[group] || row >= runs->first[group];
}

/* The entry of a sequence's own block in the block table: they ascend by (row, group). */
uint32_t kvt_snap_own_entry(const kvt_snap_runs *runs, uint64_t row, uint32_t group);

/* Tokens of a row of a sequence of n_tokens. */
static inline uint32_t kvt_snap_row_tokens(uint64_t n_tokens, uint64_t row)
{
    uint64_t left = n_tokens - row * KVT_TOKENS;
    return left < KVT_TOKENS ? (uint32_t)left : KVT_TOKENS;
}

/* The id of a snapshot, of its header's bytes and its index's entries. */
void kvt_snap_make_id(const unsigned char *header, size_t header_bytes, const unsigned char *index,
                      size_t index_bytes, unsigned char *id);

/* ---- streams.c: a block's layer and its native streams ---- */

/* One stream: what the filters and checks have to know of it. */
typedef struct kvt_snap_shape {
    uint32_t kind;
    uint32_t element;             /* bytes: 1, 2 or 4; 1 for codes of 4 and 5 bits too */
    uint32_t bits;                /* of an element: 4, 5, 8, 16 or 32 */
    uint32_t heads, dims, tokens; /* K and V */
    kvt_type type;                /* K and V: that the group stores, */
    uint32_t form;                /* and the block's form */
    uint32_t plain;               /* KVT_SNAP_KIND_SCALES: how many of its elements are scales */
    uint32_t powers; /* so many of them, the first ones, are powers of two: open rows' */
    uint32_t signs;  /* so many of them, the first ones, may be negative */
    uint32_t gains;  /* of tokens: so many, the last ones, bytes as numbers of 16 bits */
    uint32_t least_gain;
    uint32_t repeats; /* rows may be equal from token to token: the writer tries more */
    size_t bytes;     /* native size */
} kvt_snap_shape;

/*
 * The streams of one layer of a block in one form with `tokens` live tokens, in file order; those
 * that the types do not have are left out. *bytes: their sum. The number of streams is returned.
 */
uint32_t kvt_snap_shapes(const kvt_snapshot_group *group, uint32_t form, uint32_t tokens,
                         kvt_snap_shape *shapes, size_t *bytes);
/* Whether blocks of a group are open first: a side is i8, i4 or i5. */
int kvt_snap_seals(const kvt_snapshot_group *group);
/* Whether a block of the group can be of a form. */
int kvt_snap_has_form(const kvt_snapshot_group *group, uint32_t form);
/* Largest sum of a layer's streams over all groups and forms. */
size_t kvt_snap_layer_bytes(const kvt_snap_header *header);
/* The geometry of a header's group: its layouts, and nothing that points anywhere. */
void kvt_snap_group_make(const kvt_snapshot_group *group, kvt_group *made);
/* Largest image of a layer over all forms of a group; over all groups, too. */
size_t kvt_snap_group_image_bytes(const kvt_snapshot_group *group);
size_t kvt_snap_image_bytes(const kvt_snap_header *header);

/*
 * A layer's streams, one after the other, from its memory: live tokens only, zero where a tile has
 * no token.
 */
void kvt_snap_gather(const kvt_group *group, uint32_t form, uint32_t tokens,
                     const unsigned char *layer, unsigned char *streams);
/* The reverse: all of the image is written. What the streams have in dead lanes goes along. */
void kvt_snap_scatter(const kvt_group *group, uint32_t form, uint32_t tokens,
                      const unsigned char *streams, unsigned char *image);
/* NULL when a native stream holds nothing that append could not have stored, else what. */
const char *kvt_snap_check(const kvt_snap_shape *shape, const unsigned char *stream);
/*
 * The same of a layer's n streams, one behind the other, each of which is sound: of open rows the
 * numbers that codes and scales stand for.
 */
const char *kvt_snap_check_rows(const kvt_snap_shape *shapes, uint32_t n,
                                const unsigned char *streams);

/* Open rows of a side of one head, in a stream or a record. */
typedef struct kvt_snap_rows {
    kvt_side side;
    kvt_type type; /* that the group stores: i8, i4 or i5 */
    uint32_t form;
    size_t tokens, dims;        /* dims: of a row in memory */
    const unsigned char *codes; /* f16 */
    const unsigned char *scales;
    const unsigned char *gains; /* of K, every `gain_bytes` one; NULL: none */
    size_t gain_bytes;
} kvt_snap_rows;

/* NULL when no row is larger than kvt_open_largest, else what. Codes and scales are finite. */
const char *kvt_snap_rows_fault(const kvt_snap_rows *rows);

/* ---- image.c: a layer as it is attended over; of the group the layouts count ---- */

/*
 * Whether a layer of a block lies in memory as its image: there are 64 tokens, and no padding that
 * may hold anything.
 */
int kvt_snap_is_image(const kvt_group *group, uint32_t form, uint32_t tokens);
/* Zero, in a layer's memory, what its image has as zero: where there is no token, dim or part. */
void kvt_snap_image_clear(const kvt_group *group, uint32_t form, uint32_t tokens,
                          unsigned char *layer);
/*
 * NULL when an image holds nothing that append could not have stored, and zeros where
 * kvt_snap_image_clear makes them; else what.
 */
const char *kvt_snap_image_check(const kvt_group *group, uint32_t form, uint32_t tokens,
                                 const unsigned char *image);
/*
 * The same and kvt_snap_copy_digest of the image, in one pass over memory. `from` must not change
 * meanwhile, as memory that is mapped of a file may: what is checked is `from`. On a fault `to` and
 * digest hold something.
 */
const char *kvt_snap_image_copy(const kvt_group *group, uint32_t form, uint32_t tokens,
                                unsigned char *to, const unsigned char *from,
                                unsigned char *digest);

/* ---- codec.c: filters, and the only file that names zstd ---- */

typedef struct kvt_snap_codec {
    const kvt_snap_context *context;
    void *compressor, *decompressor; /* made at first use */
    int level;                       /* 0: 1, or more where a stream is small */
    int set_level;                   /* that the compressor has */
    uint32_t raw;                    /* 1: no compression */
    uint32_t samples;   /* 1: a sample of 8-bit and narrower codes says whether they are tried */
    kvt_status failure; /* of zstd's last allocation */
    kvt_snap_buffer filtered, attempt;
} kvt_snap_codec;

void kvt_snap_codec_init(kvt_snap_codec *codec, const kvt_snap_context *context);
void kvt_snap_codec_release(kvt_snap_codec *codec);

/* How a stream lies in a file. */
typedef struct kvt_snap_stream {
    uint32_t kind, filter, codec;
    uint32_t stored_bytes, native_bytes;
    uint64_t sum; /* of the stored bytes */
} kvt_snap_stream;

/* Code a native stream into `to`, which has room for its native size. Sets all of *stream. */
kvt_status kvt_snap_encode(kvt_snap_codec *codec, const kvt_snap_shape *shape,
                           const unsigned char *native, unsigned char *to, kvt_snap_stream *stream);
/*
 * Decode stored bytes into `native`, shape->bytes long. stream's fields have been checked.
 * KVT_ERR_CORRUPT comes without a text.
 */
kvt_status kvt_snap_decode(kvt_snap_codec *codec, const kvt_snap_shape *shape,
                           const kvt_snap_stream *stream, const unsigned char *stored,
                           unsigned char *native);
/*
 * Most working memory that coding (zstd's level 1), or decoding, the streams of such a snapshot
 * takes. Of the header the groups and n_tokens count.
 */
uint64_t kvt_snap_encode_bytes(const kvt_snap_header *header);
uint64_t kvt_snap_decode_bytes(const kvt_snap_header *header);
/* Whether a filter is defined for a stream. */
int kvt_snap_filter_known(const kvt_snap_shape *shape, uint32_t filter);

/* Room that a section of streams of so many bytes can take, its head included. */
static inline size_t kvt_snap_set_room(size_t native_bytes)
{
    return KVT_SNAP_SECTION_BYTES + KVT_SNAP_SET_BYTES +
           KVT_SNAP_MAX_STREAMS * KVT_SNAP_STREAM_BYTES + KVT_SNAP_SUM_BYTES + native_bytes + 8;
}

/* ---- jobs.c: one layer of a block, coded by any thread ---- */

typedef struct kvt_snap_job {
    uint32_t layer; /* in its block */
    kvt_status status;
    kvt_snap_buffer section;   /* as the file has it: head, table and streams; reading: no head */
    kvt_snap_buffer native;    /* its streams */
    kvt_snap_buffer image;     /* where it has no other place */
    kvt_snap_buffer scratch;   /* of conversions */
    const unsigned char *from; /* reading: the section's payload; writing: the image */
    unsigned char *to;         /* reading: the image; writing: where it goes in memory, or NULL */
    size_t bytes;              /* of the section */
    kvt_snap_codec codec;
    unsigned char digest[KVT_SNAP_ID_BYTES];
} kvt_snap_job;

typedef struct kvt_snap_jobs {
    const kvt_snap_context *context;
    kvt_snap_job *jobs; /* [room] */
    size_t n;           /* of layers that may take buffers */
    size_t room;        /* n or more: of layers that take none */
} kvt_snap_jobs;

/* How many layers are coded at once, of blocks of up to `layers` layers. */
size_t kvt_snap_jobs_count(const kvt_cache *cache, uint32_t layers);
/* And where none takes a buffer, of blocks of a header; n: what jobs_count has answered. */
size_t kvt_snap_jobs_room(const kvt_snap_header *header, size_t n);
kvt_status kvt_snap_jobs_make(kvt_snap_jobs *jobs, const kvt_snap_context *context,
                              const kvt_snap_header *header);
void kvt_snap_jobs_release(kvt_snap_jobs *jobs);
/* task(arg, i) for i < n, each about `bytes` bytes of work. */
void kvt_snap_jobs_run(kvt_snap_jobs *jobs, void (*task)(void *arg, size_t i), void *arg, size_t n,
                       size_t bytes);

/* ---- reader.c: read and verify a snapshot ---- */

/* A file that is mapped. */
typedef struct kvt_snap_mapped {
    const unsigned char *memory;
    size_t bytes;
    void *owner; /* who has taken it over and will unmap it; NULL: who mapped it */
} kvt_snap_mapped;

/* Where a snapshot is read from. */
typedef struct kvt_snap_input {
    kvt_reader reader; /* read NULL: memory */
    /*
     * The next bytes in memory of the reader's, until its next call; they are taken then. NULL:
     * they have to be read. May be NULL.
     */
    const unsigned char *(*view)(void *user, size_t bytes);
    /*
     * All bytes at an offset, as far as they can be read; called by any thread. And the next bytes
     * have been read that way. Both or neither.
     */
    size_t (*read_at)(void *user, uint64_t offset, void *to, size_t bytes);
    void (*skip)(void *user, uint64_t bytes);
    const unsigned char *memory; /* the snapshot, from its header on */
    kvt_snap_mapped *mapped;     /* memory is of it; parents are to be mapped too; NULL: not */
    uint64_t bytes;              /* that there are at most, UINT64_MAX where unknown */
    const char *folder;          /* where parents are; NULL: there is none */
    const unsigned char *key;    /* of the parents, or NULL */
} kvt_snap_input;

typedef struct kvt_snap_block {
    uint64_t extra; /* 0: the sequence's own; else its number behind those, from 1 */
    uint64_t row;
    uint32_t group, form, tokens;
} kvt_snap_block;

typedef struct kvt_snap_checkpoint {
    uint64_t n_tokens;
    int32_t next_position;
    uint64_t n_own; /* of the block table's entries, before the extras */
    /*
     * By groups: rows that are sealed or absent, from 0 on; the first behind the absent ones, 0
     * where there are none; the first that may ever be another than the sequence's own: see
     * checkpoint.c of the cache.
     */
    uint64_t sealed[KVT_MAX_GROUPS], first[KVT_MAX_GROUPS], kept[KVT_MAX_GROUPS];
    /* Entries (4 bytes each) of rows from[g] on; the rows before are the sequence's own. */
    const unsigned char *entries[KVT_MAX_GROUPS];
    uint64_t from[KVT_MAX_GROUPS];
    const unsigned char *blob;
    uint64_t blob_bytes;
} kvt_snap_checkpoint;

/* The parent section of a delta. */
typedef struct kvt_snap_parent {
    unsigned char id[KVT_SNAP_ID_BYTES];
    uint64_t inherited; /* tokens */
    uint32_t depth, name_bytes;
    char name[KVT_SNAP_NAME_MAX + 1];
} kvt_snap_parent;

/* Where the verified parts go. Each callback may be NULL. A status other than KVT_OK ends all. */
typedef struct kvt_snap_sink {
    void *user;
    kvt_status (*header)(void *user, const kvt_snap_header *header);
    kvt_status (*parent)(void *user, const kvt_snap_parent *parent);
    /* Once, behind the header, whether the file has that section or not. */
    kvt_status (*sequence)(void *user, int32_t next_position, const unsigned char *tag,
                           uint32_t tag_bytes);
    kvt_status (*piece)(void *user, const kvt_snapshot_piece *piece);
    /* kind: KVT_SNAP_KIND_TOKEN_IDS, _POSITIONS or _SHIFTS */
    kvt_status (*tokens)(void *user, uint32_t kind, uint64_t first, uint32_t n,
                         const unsigned char *values);
    /*
     * The positions that it has been given, of a row's tokens from `first` on, 4 bytes each. NULL:
     * where keys have moved the reader keeps the sections of positions, for those of shifts.
     */
    const unsigned char *(*positions)(void *user, uint64_t first);
    /*
     * Memory for the image of a layer, or NULL: it is verified, but not wanted. What is there when
     * the call fails is unspecified.
     */
    kvt_status (*place)(void *user, const kvt_snap_block *block, uint32_t layer_index,
                        unsigned char **image);
    /*
     * The image of a layer, verified; called by any thread, several at once. A text that it fails
     * with does not depend on the block or layer: which of several is the last is not known.
     * scratch: of the job.
     */
    kvt_status (*layer)(void *user, const kvt_snap_block *block, uint32_t layer_index,
                        const unsigned char *image, kvt_snap_buffer *scratch);
    /*
     * All images of a native block, where they lie in a mapped file, of which n_blocks at most
     * come, and the layers' digests, which the file may be too short for. *taken 1: they are used
     * there. Comes before they are verified.
     */
    kvt_status (*map)(void *user, const kvt_snap_block *block, kvt_snap_mapped *file,
                      uint64_t n_blocks, const unsigned char *images, const unsigned char *digests,
                      int *taken);
    /* A block's end: all its layers hold. */
    kvt_status (*block)(void *user, const kvt_snap_block *block, const unsigned char *id);
    kvt_status (*checkpoint)(void *user, const kvt_snap_checkpoint *checkpoint);
    /* done of total bytes of images; a status other than KVT_OK ends all. */
    kvt_status (*progress)(void *user, uint64_t done, uint64_t total);
    uint32_t lazy; /* 1: images that are mapped are not verified */
} kvt_snap_sink;

typedef struct kvt_snap_counts {
    uint64_t file_bytes, stored_bytes, native_bytes;
    uint64_t n_elements; /* of K and V */
    uint64_t n_open_blocks, n_checkpoints, n_pieces, n_native_blocks, n_inherited_blocks;
    unsigned char id[KVT_SNAP_ID_BYTES]; /* of the snapshot */
} kvt_snap_counts;

/*
 * Read a snapshot to its end and give its verified parts to the sink, in file order.
 *
 * header_only: stop after it, the parent and the sequence section.
 * header: filled in. counts (may be NULL): on success.
 */
kvt_status kvt_snap_read(const kvt_snap_context *context, const kvt_snap_input *input,
                         int header_only, const kvt_snap_sink *sink, kvt_snap_header *header,
                         kvt_snap_counts *counts);

/*
 * Most working memory of kvt_snap_read, of a whole load from a file (blocks apart) and of a whole
 * save to one, for snapshots of up to header->n_tokens tokens of the header's groups, without
 * checkpoints, where n_jobs layers are coded at once.
 */
uint64_t kvt_snap_read_bytes(const kvt_snap_header *header, size_t n_jobs);
uint64_t kvt_snap_load_bytes(const kvt_snap_header *header, size_t n_jobs);
uint64_t kvt_snap_save_bytes(const kvt_snap_header *header, size_t n_jobs);

/* ---- chain.c: the parents of a delta ---- */

typedef struct kvt_snap_chain kvt_snap_chain;
struct kvt_snap_parser;

/*
 * Open the parent that a section names, and its own parents. header: of the child, which has to be
 * of the same geometry. Reads their headers, parent sections, indexes and ends.
 */
kvt_status kvt_snap_chain_open(const kvt_snap_context *context, const kvt_snap_input *input,
                               const kvt_snap_header *header, const kvt_snap_parent *parent,
                               kvt_snap_chain **chain);
/* The same of the file at path, which is to be a parent: sets *parent but for inherited. */
kvt_status kvt_snap_chain_open_path(const kvt_snap_context *context, const char *path,
                                    const unsigned char *key, const kvt_snap_header *header,
                                    kvt_snap_parent *parent, kvt_snap_chain **chain);
void kvt_snap_chain_close(const kvt_snap_context *context, kvt_snap_chain *chain);
/* Ids, positions or shifts of n tokens, from a section's worth on: [n] integers. */
kvt_status kvt_snap_chain_tokens(kvt_snap_chain *chain, uint32_t kind, uint64_t first, uint32_t n,
                                 unsigned char *values);
uint64_t kvt_snap_chain_n_tokens(const kvt_snap_chain *chain); /* of the nearest parent */
uint64_t kvt_snap_chain_longest(const kvt_snap_chain *chain);  /* the most that one of them has */
/* Whether one of them has a block of this id. */
int kvt_snap_chain_has(const kvt_snap_chain *chain, const unsigned char *id);
/* Read the block of this id to the sink of the child's parser, and count it there. */
kvt_status kvt_snap_chain_block(kvt_snap_chain *chain, const unsigned char *id,
                                const kvt_snap_block *at, struct kvt_snap_parser *child);
/* Whether one of them is the file at path, NULL: of a descriptor. 1, 0, or -1: KVT_ERR_IO. */
int kvt_snap_chain_has_file(const kvt_snap_chain *chain, const char *path, int fd);

/* ---- file.c, replace.c ---- */

#define KVT_SNAP_AHEAD_BYTES ((size_t)1 << 19) /* read at once: stays in a cache of its core */
#ifdef PATH_MAX
#define KVT_SNAP_PATH_BYTES PATH_MAX /* what realpath writes */
#else
#define KVT_SNAP_PATH_BYTES 4096
#endif

/* Bytes of a path's folder, the slash at its end included; 0 for the current one. */
size_t kvt_snap_folder_bytes(const char *path);
/* The path of a name in a folder, "" for the current one. 0: longer than KVT_SNAP_PATH_BYTES. */
int kvt_snap_path_in(const char *folder, const char *name, char *path);
/* Bytes of a file, 0 where there is none. KVT_ERR_IO: it cannot be read at any place. */
kvt_status kvt_snap_file_size(const kvt_snap_context *context, const char *path, uint64_t *bytes);
/* Whether two paths name the same file; whether their folders are the same. -1: KVT_ERR_IO. */
int kvt_snap_same_file(const kvt_snap_context *context, const char *a, const char *b);
int kvt_snap_same_folder(const kvt_snap_context *context, const char *a, const char *b);

/* Bytes that are written. */
typedef struct kvt_snap_part {
    const void *data;
    size_t bytes;
} kvt_snap_part;

/* Write parts to a kvt_snap_file, in order: what a kvt_writer's write answers. */
int kvt_snap_file_write_parts(void *user, const kvt_snap_part *parts, size_t n);

/* A file being read or written. */
typedef struct kvt_snap_file {
    const kvt_snap_context *context;
    int fd, folder; /* -1: none */
    int is_callers; /* fd is not to be closed */
    int lock;       /* keeps the temporary locked, -1: none */
    int error;      /* errno of the call below that failed */
    const char *call;
    int part_error;                   /* errno of a read of a part; atomic */
    char target[KVT_SNAP_PATH_BYTES]; /* name that the file is to get */
    char temporary[KVT_SNAP_PATH_BYTES];
    int exists;            /* the temporary does */
    int in_place;          /* there is none, the target is written */
    int truncates;         /* at the first write */
    int syncs;             /* the file and its folder */
    uint64_t bytes;        /* reading: size, UINT64_MAX where it has none */
    kvt_snap_buffer ahead; /* reading: [begin, end) is read already */
    size_t begin, end;
    uint64_t position; /* reading a regular file: behind what has been read */
    int large;         /* reading: the last part went past the buffer */
} kvt_snap_file;

kvt_status kvt_snap_file_open(const kvt_snap_context *context, const char *path,
                              kvt_snap_file *file, kvt_reader *reader);
/*
 * One that a snapshot names: a regular file, or KVT_ERR_IO. Nothing else is waited for. It is read
 * by places alone, without a buffer.
 */
kvt_status kvt_snap_file_open_named(const kvt_snap_context *context, const char *path,
                                    kvt_snap_file *file);
/* Whether it is the file at path, NULL: of a descriptor. 1, 0, or -1: KVT_ERR_IO. */
int kvt_snap_file_is(const kvt_snap_file *file, const char *path, int fd);
/* What kvt_snap_input has, of a file that is read; all but view of a regular one only. */
const unsigned char *kvt_snap_file_view(void *user, size_t bytes);
size_t kvt_snap_file_part(void *user, uint64_t offset, void *to, size_t bytes);
void kvt_snap_file_skip(void *user, uint64_t bytes);
/* Up to `bytes` bytes at an offset, fewer at the end; negative: the failure is noted. */
int64_t kvt_snap_file_read_at(kvt_snap_file *file, uint64_t offset, void *to, size_t bytes);
/* Map the whole file for reading, and give that up. */
kvt_status kvt_snap_file_map(kvt_snap_file *file, const char *path, kvt_snap_mapped *mapped);
void kvt_snap_unmap(const kvt_snap_mapped *mapped);
/* A file of the caller's descriptor, which stays open; reader or writer may be NULL. */
void kvt_snap_file_of_fd(const kvt_snap_context *context, int fd, kvt_snap_file *file,
                         kvt_writer *writer, kvt_reader *reader);
/* KVT_ERR_CORRUPT when there are bytes left to read. */
kvt_status kvt_snap_file_expect_end(kvt_snap_file *file, const char *path);
/* Of the options no_fsync and in_place count. */
kvt_status kvt_snap_file_create(const kvt_snap_context *context, const char *path,
                                const kvt_save_options *options, kvt_snap_file *file,
                                kvt_writer *writer);
/* Sync, rename over the target, sync the folder. */
kvt_status kvt_snap_file_commit(kvt_snap_file *file);
/* The failed read or write as a status with a text; KVT_OK when none has failed. */
kvt_status kvt_snap_file_failure(const kvt_snap_file *file, const char *path);
/* Close, and remove a temporary that was not renamed. */
void kvt_snap_file_close(kvt_snap_file *file);

#endif /* KVT_SNAPSHOT_FORMAT_H */
