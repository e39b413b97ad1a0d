/*
 * A segment of an encrypted file: one message of libsodium's crypto_secretstream_xchacha20poly1305,
 * by OpenSSL where the build has it: 1.9 GB/s with AVX2, where libsodium has 1.0.
 *
 * OpenSSL has the AEAD of RFC 8439, and vector code for it, on ARM too, where libsodium 1.0.18 has
 * none. A message of the secret stream is that AEAD's, under a key and a nonce that HChaCha20 makes
 * of the header: a block of 64 bytes that begins with the tag and of whose ciphertext the first
 * byte alone is stored, then the message. The two pad differently behind it, but not where its size
 * is a multiple of 16, which is that of every segment but the last one. The last one, and all of
 * them where OpenSSL refuses the cipher (as its FIPS provider does), are libsodium's.
 */
#ifdef KVT_HAVE_CRYPT
#include <sodium.h>
#endif
#ifdef KVT_HAVE_CIPHER
#include <openssl/err.h>
#include <openssl/evp.h>
#endif

#include "src/snapshot/crypt.h"

#ifdef KVT_HAVE_CRYPT

#define TAG_BLOCK_BYTES 64
#define AUTHENTICATOR_BYTES 16
#define NONCE_BYTES 12

#ifdef KVT_HAVE_CIPHER

/* What a message is encrypted with. */
typedef struct stream {
    unsigned char key[crypto_core_hchacha20_OUTPUTBYTES], nonce[NONCE_BYTES];
} stream;

static stream stream_of(const unsigned char *header, const unsigned char *key)
{
    stream s = {{0}, {1}}; /* the stream's counter of messages, which begins at 1 */

    (void)crypto_core_hchacha20(s.key, header, key, NULL);
    memcpy(s.nonce + 4, header + crypto_core_hchacha20_INPUTBYTES, 8);
    return s;
}

static int is_equal_padded(size_t bytes)
{
    return bytes > 0 && bytes % 16 == 0 && bytes <= KVT_SNAP_CRYPT_MOST;
}

/* NULL: OpenSSL does not have the cipher, or no memory. */
static EVP_CIPHER_CTX *begin(const stream *s, int encrypt, const kvt_snap_message *m)
{
    EVP_CIPHER_CTX *aead = EVP_CIPHER_CTX_new();
    int n;

    if (aead &&
        EVP_CipherInit_ex(aead, EVP_chacha20_poly1305(), NULL, s->key, s->nonce, encrypt) == 1 &&
        EVP_CipherUpdate(aead, NULL, &n, m->data, (int)m->data_bytes) == 1)
        return aead;
    EVP_CIPHER_CTX_free(aead);
    return NULL;
}

int kvt_snap_seal_by_openssl(const kvt_snap_message *m, const unsigned char *plain, size_t bytes,
                             unsigned char tag, unsigned char *coded)
{
    unsigned char block[TAG_BLOCK_BYTES] = {0};
    unsigned char *to = coded + 1;
    EVP_CIPHER_CTX *aead = NULL;
    stream s;
    int done = 0, n;

    if (!is_equal_padded(bytes))
        return 0;
    s = stream_of(m->header, m->key);
    block[0] = tag;
    (void)ERR_set_mark(); /* the caller's errors stay, and no others */
    aead = begin(&s, 1, m);
    if (aead && EVP_EncryptUpdate(aead, block, &n, block, sizeof block) == 1 &&
        EVP_EncryptUpdate(aead, to, &n, plain, (int)bytes) == 1 &&
        EVP_EncryptFinal_ex(aead, to + bytes, &n) == 1 &&
        EVP_CIPHER_CTX_ctrl(aead, EVP_CTRL_AEAD_GET_TAG, AUTHENTICATOR_BYTES, to + bytes) == 1)
        done = 1;
    coded[0] = block[0];
    EVP_CIPHER_CTX_free(aead);
    (void)ERR_pop_to_mark();
    sodium_memzero(&s, sizeof s);
    return done;
}

/* -1: not by OpenSSL. The plain bytes are there before they are known to be authentic. */
static int unseal_by_openssl(const kvt_snap_message *m, const unsigned char *coded, size_t bytes,
                             unsigned char *tag, unsigned char *plain)
{
    unsigned char block[TAG_BLOCK_BYTES] = {0}, authenticator[AUTHENTICATOR_BYTES], none[1];
    EVP_CIPHER_CTX *aead = NULL;
    stream s;
    int sound = -1, n;

    if (!is_equal_padded(bytes))
        return -1;
    s = stream_of(m->header, m->key);
    /* The block as it was encrypted: what is not stored of it is that of zeros. */
    (void)crypto_stream_chacha20_ietf_xor_ic(block, block, sizeof block, s.nonce, 1, s.key);
    block[0] = coded[0];
    memcpy(authenticator, coded + 1 + bytes, sizeof authenticator);
    (void)ERR_set_mark();
    aead = begin(&s, 0, m);
    if (aead &&
        EVP_CIPHER_CTX_ctrl(aead, EVP_CTRL_AEAD_SET_TAG, AUTHENTICATOR_BYTES, authenticator) == 1 &&
        EVP_DecryptUpdate(aead, block, &n, block, sizeof block) == 1 &&
        EVP_DecryptUpdate(aead, plain, &n, coded + 1, (int)bytes) == 1)
        sound = EVP_DecryptFinal_ex(aead, none, &n) == 1;
    *tag = block[0];
    if (sound != 1)
        sodium_memzero(plain, bytes);
    EVP_CIPHER_CTX_free(aead);
    (void)ERR_pop_to_mark();
    sodium_memzero(&s, sizeof s);
    return sound;
}

#else

int kvt_snap_seal_by_openssl(const kvt_snap_message *m, const unsigned char *plain, size_t bytes,
                             unsigned char tag, unsigned char *coded)
{
    (void)m, (void)plain, (void)bytes, (void)tag, (void)coded;
    return 0;
}

static int unseal_by_openssl(const kvt_snap_message *m, const unsigned char *coded, size_t bytes,
                             unsigned char *tag, unsigned char *plain)
{
    (void)m, (void)coded, (void)bytes, (void)tag, (void)plain;
    return -1;
}

#endif

void kvt_snap_seal(const kvt_snap_message *m, const unsigned char *plain, size_t bytes,
                   unsigned char tag, unsigned char *coded)
{
    crypto_secretstream_xchacha20poly1305_state state;

    if (kvt_snap_seal_by_openssl(m, plain, bytes, tag, coded))
        return;
    (void)crypto_secretstream_xchacha20poly1305_init_pull(&state, m->header, m->key);
    (void)crypto_secretstream_xchacha20poly1305_push(&state, coded, NULL, plain, bytes, m->data,
                                                     m->data_bytes, tag);
    sodium_memzero(&state, sizeof state);
}

int kvt_snap_unseal(const kvt_snap_message *m, const unsigned char *coded, size_t bytes,
                    unsigned char *tag, unsigned char *plain)
{
    crypto_secretstream_xchacha20poly1305_state state;
    int sound = unseal_by_openssl(m, coded, bytes, tag, plain);

    if (sound >= 0)
        return sound;
    sound = crypto_secretstream_xchacha20poly1305_init_pull(&state, m->header, m->key) == 0 &&
            crypto_secretstream_xchacha20poly1305_pull(
                &state, plain, NULL, tag, coded,
                (unsigned long long)bytes + crypto_secretstream_xchacha20poly1305_ABYTES, m->data,
                m->data_bytes) == 0;
    sodium_memzero(&state, sizeof state);
    return sound;
}

#endif
