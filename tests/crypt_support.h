/*
 * What the tests of encrypted files share: memory files, contexts, whole files encrypted and
 * decrypted. Includes internal headers; for the static library.
 */
#ifndef KVT_TEST_CRYPT_SUPPORT_H
#define KVT_TEST_CRYPT_SUPPORT_H

#include "support.h"

#include "src/snapshot/crypt.h"

enum {
    S = 4096,
    WHOLE = S + 49,
    HEAD = 64
}; /* a segment: its plain bytes, its bytes in the file */

extern char text[300]; /* of the last error without a cache */
extern const unsigned char key[32];

typedef struct file {
    unsigned char *data;
    size_t n, room, at;
    long countdown; /* calls that still succeed, negative: all */
    rng *pieces;    /* reads return a random number of bytes; NULL: all */
} file;

file file_of(const unsigned char *data, size_t n); /* a copy; data is freed by the caller */
int file_write(void *user, const void *data, size_t bytes);
int64_t file_read(void *user, void *data, size_t bytes);
int64_t file_read_at(void *user, uint64_t offset, void *data, size_t bytes);

/* executor: a caller's that says so many threads, and runs the tasks backwards. */
kvt_cache *cache_with(uint32_t n_threads, int executor, const kvt_allocator *allocator);
kvt_snap_context context_of(kvt_cache *cache);

unsigned char *plain_of(size_t n, uint64_t seed);
/* Encrypt, in writes of up to `most` bytes (0: one). */
kvt_status encrypt(const kvt_snap_context *context, const unsigned char *plain, size_t n,
                   uint32_t segment, size_t most, file *to);
/* Whether it takes several segments at once (kvt_snap_crypt.write_parts). Off at first. */
extern int by_parts;
file encrypted(const unsigned char *plain, size_t n);
/*
 * Decrypt front to back in reads of up to `most` bytes. Delivered bytes have to be the beginning of
 * `plain`, n long, whatever becomes of the file; *delivered is how many.
 */
kvt_status decrypt(const kvt_snap_context *context, const unsigned char *k, file *from,
                   const unsigned char *plain, size_t n, size_t most, size_t *delivered);
/* Open at any place and read all: the first error. Without one it has to be `plain`. */
kvt_status decrypt_at(const kvt_snap_context *context, file *from, const unsigned char *plain,
                      size_t n);

#endif
