/*
 * Encrypted files: a container around a whole snapshot, below its reader and writer.
 * docs/format.md, "Encrypted files", specifies the bytes.
 *
 * crypt.c and cipher.c alone name libsodium, cipher.c alone OpenSSL. Without libsodium
 * (KVT_HAVE_CRYPT undefined) everything here but kvt_snap_is_encrypted, kvt_snap_crypt_failure,
 * _release and _bytes answers KVT_ERR_UNSUPPORTED.
 */
#ifndef KVT_SNAPSHOT_CRYPT_H
#define KVT_SNAPSHOT_CRYPT_H

#include "src/snapshot/format.h"

#define KVT_SNAP_CRYPT_VERSION 1u
#define KVT_SNAP_CRYPT_MAGIC "\x89KVX\r\n\x1a\n" /* KVT_SNAP_MAGIC_BYTES */
#define KVT_SNAP_CRYPT_KEY_BYTES 32
#define KVT_SNAP_CRYPT_HEAD_BYTES 64
#define KVT_SNAP_CRYPT_PREFIX_BYTES 32 /* of a segment: size, flags, stream header */
#define KVT_SNAP_CRYPT_MORE_BYTES 49   /* what a segment takes beyond its plain bytes */
#define KVT_SNAP_CRYPT_LEAST ((uint32_t)1 << 12)
#define KVT_SNAP_CRYPT_MOST ((uint32_t)1 << 24)
#define KVT_SNAP_CRYPT_SEGMENT ((uint32_t)1 << 18) /* plain bytes of a segment, as written */
#define KVT_SNAP_CRYPT_LANES 16                    /* segments in memory, at most */

/* A file, or what is like one, that is read at any place. */
typedef struct kvt_snap_source {
    void *user;
    /* Bytes read, from 1 to `bytes`; 0: there is nothing; negative: an error. */
    int64_t (*read_at)(void *user, uint64_t offset, void *to, size_t bytes);
    uint64_t bytes; /* its size */
} kvt_snap_source;

/* One segment in memory. */
typedef struct kvt_snap_lane {
    kvt_snap_buffer plain, coded;
    kvt_snap_buffer other; /* coded of the batch before, which is written meanwhile */
    uint64_t number;
    uint32_t bytes; /* of plain */
    uint32_t last;  /* 1: the last segment of the file */
    uint32_t sound; /* decoding: the segment is authentic, `plain` holds it */
} kvt_snap_lane;

/* A container being written or read, by one thread at a time. Stays where it is meanwhile. */
typedef struct kvt_snap_crypt {
    const kvt_snap_context *context;
    kvt_writer to;
    /*
     * Of the writer's, to be set after a begin: several parts at once, by any thread, while what
     * follows is encrypted; answers as write. NULL: `to` alone, by the thread that writes to
     * *plain.
     */
    int (*write_parts)(void *user, const kvt_snap_part *parts, size_t n);
    kvt_snap_part parts[KVT_SNAP_CRYPT_LANES + 1]; /* to be written: the head, and segments */
    size_t n_parts;
    int answer; /* of the last write */
    kvt_reader from;
    kvt_snap_source source;
    unsigned char head[KVT_SNAP_CRYPT_HEAD_BYTES];
    unsigned char key[KVT_SNAP_CRYPT_KEY_BYTES]; /* the file's, not the caller's */
    uint32_t segment_bytes, n_lanes;
    kvt_snap_lane lanes[KVT_SNAP_CRYPT_LANES];
    uint64_t number;                  /* of the next segment to be written or read */
    uint64_t n_segments, plain_bytes; /* of a source */
    uint32_t n_ready, lane; /* reading: lanes to deliver; the one that is written or delivered */
    size_t at;              /* delivered of that lane */
    int begun, ended;       /* the head is written; the last segment is written or in a lane */
    int stopped;            /* nothing is written or delivered any more */
    kvt_status failure;     /* KVT_OK: none, or one of `to` or `from` */
    char text[160];         /* of it */
} kvt_snap_crypt;

/* Bytes of the container around so many plain ones. */
static inline uint64_t kvt_snap_crypt_bound(uint64_t plain_bytes)
{
    uint64_t segments = (plain_bytes + KVT_SNAP_CRYPT_SEGMENT - 1) / KVT_SNAP_CRYPT_SEGMENT;
    return plain_bytes + KVT_SNAP_CRYPT_HEAD_BYTES +
           (segments ? segments : 1) * KVT_SNAP_CRYPT_MORE_BYTES;
}

/* Whether this build can encrypt. */
int kvt_snap_crypt_built(void);

/* Whether a file that begins with these 8 bytes is an encrypted one. */
int kvt_snap_is_encrypted(const unsigned char *first);

/*
 * KVT_ERR_MISMATCH with a text: what to answer where such a file is opened without a key. name:
 * what the text begins with.
 */
kvt_status kvt_snap_crypt_needs_key(const kvt_snap_context *context, const char *name);

/*
 * Every begin and open sets up *c, which is released by kvt_snap_crypt_release, after an error too.
 * key: KVT_SNAP_CRYPT_KEY_BYTES, not needed afterwards. *context, and the users of `to`, `from` and
 * `source`, stay.
 *
 * KVT_ERR_UNSUPPORTED: no libsodium, or no random numbers from the system. KVT_ERR_ARG: key NULL.
 */

/*
 * What is written to *plain goes encrypted to `to`. Nothing is written to it before a segment is
 * full, or kvt_snap_encrypt_end. A write that fails fails all later ones.
 */
kvt_status kvt_snap_encrypt_begin(const kvt_snap_context *context, const unsigned char *key,
                                  const kvt_writer *to, kvt_snap_crypt *c, kvt_writer *plain);
/* The same with another size of segments. */
kvt_status kvt_snap_encrypt_begin_sized(const kvt_snap_context *context, const unsigned char *key,
                                        const kvt_writer *to, uint32_t segment_bytes,
                                        kvt_snap_crypt *c, kvt_writer *plain);
/* Write the last segment. KVT_ERR_IO where `to` has failed, now or before. */
kvt_status kvt_snap_encrypt_end(kvt_snap_crypt *c);

/*
 * Read the head, so that *plain reads the decrypted bytes to their end, which is that of the last
 * segment: what follows in `from` is left unread. Delivered are bytes of segments that are
 * authentic, in order; what comes before a segment that is not is delivered before the error.
 *
 * KVT_ERR_MISMATCH  the file is not encrypted, or with another key
 * KVT_ERR_FORMAT    no kvtile file, or of a later version
 * KVT_ERR_CORRUPT   the head is damaged
 * KVT_ERR_IO        `from` failed
 */
kvt_status kvt_snap_decrypt_begin(const kvt_snap_context *context, const unsigned char *key,
                                  const kvt_reader *from, kvt_snap_crypt *c, kvt_reader *plain);

/*
 * The same for a source that holds an encrypted file and nothing else. The last segment is read, so
 * that *plain_bytes, the size of the plain data, is authentic.
 */
kvt_status kvt_snap_decrypt_open(const kvt_snap_context *context, const unsigned char *key,
                                 const kvt_snap_source *source, kvt_snap_crypt *c,
                                 uint64_t *plain_bytes);
/*
 * Plain bytes offset .. offset + bytes - 1. On an error `to` may hold some of them, all authentic.
 * The segment last read stays decrypted. KVT_ERR_CORRUPT, also for a range beyond the end;
 * KVT_ERR_IO: read_at failed; KVT_ERR_MEMORY. Another call may succeed afterwards.
 */
kvt_status kvt_snap_decrypt_at(kvt_snap_crypt *c, uint64_t offset, void *to, size_t bytes);

/*
 * Why `plain` failed, its text set once more: KVT_ERR_CORRUPT, KVT_ERR_MEMORY; KVT_OK where it did
 * not, or where `to` or `from` failed, whose owner knows more.
 */
kvt_status kvt_snap_crypt_failure(const kvt_snap_crypt *c);

/* Wipe and free. A zeroed struct is fine. */
void kvt_snap_crypt_release(kvt_snap_crypt *c);

/*
 * The most that one takes of the context's memory, in a cache of n_threads (0 and 1: without). A
 * source takes what one thread does.
 */
uint64_t kvt_snap_crypt_bytes(uint32_t n_threads);

/* ---- cipher.c: one segment. Only where there is libsodium. ---- */

typedef struct kvt_snap_message {
    const unsigned char *key, *header; /* 32 bytes, and 24 random ones of this message alone */
    const unsigned char *data;         /* additional data, at most 2^20 bytes */
    size_t data_bytes;
} kvt_snap_message;

/* *coded: the tag, encrypted, so many bytes, and the authenticator: bytes + 17. */
void kvt_snap_seal(const kvt_snap_message *m, const unsigned char *plain, size_t bytes,
                   unsigned char tag, unsigned char *coded);
/* 1: authentic, *tag and `plain`, bytes long, are what was encrypted; else 0, and neither is. */
int kvt_snap_unseal(const kvt_snap_message *m, const unsigned char *coded, size_t bytes,
                    unsigned char *tag, unsigned char *plain);
/* The same as kvt_snap_seal, where OpenSSL can do it: 1. Otherwise 0. */
int kvt_snap_seal_by_openssl(const kvt_snap_message *m, const unsigned char *plain, size_t bytes,
                             unsigned char tag, unsigned char *coded);

#endif /* KVT_SNAPSHOT_CRYPT_H */
