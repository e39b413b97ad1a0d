/*
 * SHA-256, by libsodium: the only file of this folder that names it.
 */
#ifdef KVT_HAVE_CRYPT
#include <sodium.h>
#endif

#include "src/store/stored.h"

#ifdef KVT_HAVE_CRYPT
int kvt_store_has_sha256(void)
{
    return 1;
}

void kvt_store_sha256_begin(kvt_store_sha256 *hash)
{
    _Static_assert(sizeof(crypto_hash_sha256_state) <= sizeof hash->state, "room for the state");
    (void)crypto_hash_sha256_init((crypto_hash_sha256_state *)(void *)hash->state);
}

void kvt_store_sha256_add(kvt_store_sha256 *hash, const void *data, size_t bytes)
{
    (void)crypto_hash_sha256_update((crypto_hash_sha256_state *)(void *)hash->state, data, bytes);
}

void kvt_store_sha256_end(kvt_store_sha256 *hash, unsigned char *digest)
{
    (void)crypto_hash_sha256_final((crypto_hash_sha256_state *)(void *)hash->state, digest);
}
#else
int kvt_store_has_sha256(void)
{
    return 0;
}

/* Not called: every call that needs keys is refused before. */
void kvt_store_sha256_begin(kvt_store_sha256 *hash)
{
    memset(hash, 0, sizeof *hash);
}

void kvt_store_sha256_add(kvt_store_sha256 *hash, const void *data, size_t bytes)
{
    (void)hash;
    (void)data;
    (void)bytes;
}

void kvt_store_sha256_end(kvt_store_sha256 *hash, unsigned char *digest)
{
    (void)hash;
    memset(digest, 0, KVT_STORE_KEY_BYTES);
}
#endif
