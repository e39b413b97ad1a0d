/*
 * Segments of encrypted files, by OpenSSL where it has the cipher: the same bytes as libsodium's
 * secret stream, and nothing else is taken. A unit test of src/snapshot/cipher.c.
 *
 *   test_snapshot_cipher [none]     none: OpenSSL is there and refuses the cipher
 */
#include "support.h"

#include "src/snapshot/crypt.h"

#include <sodium.h>
#if defined(KVT_TEST_CIPHER)
#include <openssl/err.h>
#include <openssl/opensslv.h>
#endif

enum { MOST = 1 << 18, MORE = crypto_secretstream_xchacha20poly1305_ABYTES };

static int expect_openssl; /* that it encrypts what it can */

static unsigned char key[32], header[24], data[200], plain[MOST], coded[MOST + MORE],
    expected[MOST + MORE], back[MOST];

static kvt_snap_message message(size_t data_bytes)
{
    kvt_snap_message m = {key, header, data, data_bytes};
    return m;
}

static void fill(rng *r, unsigned char *to, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = (unsigned char)rng_next(r);
}

/* As libsodium makes it. */
static void by_libsodium(const kvt_snap_message *m, size_t n, unsigned char tag)
{
    crypto_secretstream_xchacha20poly1305_state state;
    assert_int_equal(crypto_secretstream_xchacha20poly1305_init_pull(&state, m->header, m->key), 0);
    assert_int_equal(crypto_secretstream_xchacha20poly1305_push(&state, expected, NULL, plain, n,
                                                                m->data, m->data_bytes, tag),
                     0);
}

static const size_t sizes[] = {0,    1,    15,   16,    17,    24,       31,        32,
                               48,   63,   64,   65,    79,    80,       96,        112,
                               1000, 1008, 4096, 65520, 65536, MOST - 8, MOST - 16, MOST};

static void same_bytes(void **state)
{
    static const unsigned char tags[] = {crypto_secretstream_xchacha20poly1305_TAG_PUSH,
                                         crypto_secretstream_xchacha20poly1305_TAG_FINAL, 255};
    static const size_t datas[] = {80, 0, 1, 16, 199};
    rng r = {1};
    (void)state;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t k = 0; k < 15; k++) {
            const size_t n = sizes[i];
            const kvt_snap_message m = message(datas[k % 5]);
            const unsigned char tag = tags[k % 3];
            unsigned char found = 77;
            int fast;
            fill(&r, key, sizeof key);
            fill(&r, header, sizeof header);
            fill(&r, data, sizeof data);
            fill(&r, plain, n);
            by_libsodium(&m, n, tag);
            memset(coded, 0xee, sizeof coded);
            kvt_snap_seal(&m, plain, n, tag, coded);
            assert_memory_equal(coded, expected, n + MORE);
            fast = kvt_snap_seal_by_openssl(&m, plain, n, tag, coded);
            assert_int_equal(fast, expect_openssl && n > 0 && n % 16 == 0);
            if (fast)
                assert_memory_equal(coded, expected, n + MORE);
            assert_int_equal(kvt_snap_unseal(&m, expected, n, &found, back), 1);
            assert_int_equal(found, tag);
            assert_memory_equal(back, plain, n);
        }
}

/* Every byte of all that goes in: not authentic, and no byte of the text is left. */
static void changed(void **state)
{
    static const size_t lengths[] = {64, 80, 100};
    rng r = {2};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        const size_t n = lengths[i];
        const kvt_snap_message m = message(80);
        struct {
            unsigned char *bytes;
            size_t n;
        } parts[] = {{coded, n + MORE}, {data, 80}, {header, 24}, {key, 32}};
        unsigned char tag;
        fill(&r, plain, n);
        kvt_snap_seal(&m, plain, n, 3, coded);
        for (size_t k = 0; k < 4; k++)
            for (size_t at = 0; at < parts[k].n; at++)
                for (unsigned bit = 1; bit < 256; bit *= 2) {
                    memset(back, 0, n);
                    parts[k].bytes[at] ^= (unsigned char)bit;
                    assert_int_equal(kvt_snap_unseal(&m, coded, n, &tag, back), 0);
                    parts[k].bytes[at] ^= (unsigned char)bit;
                    for (size_t b = 0; b < n; b++)
                        assert_int_equal(back[b], 0);
                }
        { /* a longer or shorter one, or more or less additional data */
            kvt_snap_message other = m;
            other.data_bytes = 79;
            assert_int_equal(kvt_snap_unseal(&m, coded, n - 16, &tag, back), 0);
            assert_int_equal(kvt_snap_unseal(&m, coded, n + 16, &tag, back), 0);
            assert_int_equal(kvt_snap_unseal(&other, coded, n, &tag, back), 0);
        }
        assert_int_equal(kvt_snap_unseal(&m, coded, n, &tag, back), 1);
        assert_int_equal(tag, 3);
    }
}

/* OpenSSL's list of errors is the caller's. */
static void no_errors(void **state)
{
    (void)state;
#if defined(KVT_TEST_CIPHER)
    const kvt_snap_message m = message(80);
    unsigned char tag;
    ERR_clear_error();
    for (int before = 0; before < 2; before++) {
        unsigned long error = 0;
        if (before) {
            ERR_put_error(ERR_LIB_USER, 0, 5, __FILE__, __LINE__);
            error = ERR_peek_error();
            assert_true(error != 0);
        }
        kvt_snap_seal(&m, plain, 4096, 0, coded);
        coded[9] ^= 1;
        assert_int_equal(kvt_snap_unseal(&m, coded, 4096, &tag, back), 0);
        coded[9] ^= 1;
        assert_int_equal(kvt_snap_unseal(&m, coded, 4096, &tag, back), 1);
        assert_true(ERR_peek_last_error() == error);
    }
    ERR_clear_error();
#else
    skip();
#endif
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_bytes),
        cmocka_unit_test(changed),
        cmocka_unit_test(no_errors),
    };
    if (sodium_init() < 0)
        return 1;
#if defined(KVT_TEST_CIPHER)
    if (argc > 1 && OPENSSL_VERSION_NUMBER < 0x30000000L)
        return 77; /* it has no providers to leave out */
    expect_openssl = !(argc > 1 && strcmp(argv[1], "none") == 0);
#endif
    (void)argc, (void)argv;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
