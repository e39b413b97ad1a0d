/*
 * Encrypted files: files that the writer never makes, under the right key, made here with libsodium
 * as docs/format.md, "Encrypted files", says; a file of another day; memory and streams that fail;
 * and what is left in memory. Includes internal headers and links the static library.
 *
 *   test_snapshot_crypt_faults FOLDER          golden/encrypted.kvx is in FOLDER
 *   test_snapshot_crypt_faults --write FILE    make it; tests/read_encrypted.py reads it too
 */
#include "crypt_support.h"

#include <sodium.h>
#include <stdio.h>

static const char *golden;

/* ---- files that the writer never makes ---- */

typedef struct forged {
    uint32_t bytes, flags;
    uint64_t number;
    unsigned char tag;
} forged;

/* A file of segments of plain bytes 0, 1, 2, ..., encrypted as docs/format.md says. */
static file forge(uint32_t segment, uint64_t zero, const forged *segments, size_t n)
{
    unsigned char head[HEAD] = "\x89KVX\r\n\x1a\n", keys[48], data[80];
    unsigned char *plain = calloc(65536, 1), *coded = malloc(65536 + 49);
    file f;

    assert_non_null(plain);
    assert_non_null(coded);
    assert_true(sodium_init() >= 0);
    kvt_put32(head + 8, 1);
    kvt_put32(head + 12, segment);
    memset(head + 16, 0xee, 16);
    (void)crypto_generichash(keys, 48, head, 32, key, 32);
    memcpy(head + 32, keys + 32, 16);
    kvt_put64(head + 48, zero);
    kvt_put64(head + 56, kvt_snap_sum(head, 56));
    f = file_of(head, HEAD);
    for (size_t i = 0; i < n; i++) {
        crypto_secretstream_xchacha20poly1305_state state;
        memcpy(data, head, HEAD);
        kvt_put64(data + HEAD, segments[i].number);
        kvt_put32(data + HEAD + 8, segments[i].bytes);
        kvt_put32(data + HEAD + 12, segments[i].flags);
        memcpy(coded, data + HEAD + 8, 8);
        (void)crypto_secretstream_xchacha20poly1305_init_push(&state, coded + 8, keys);
        (void)crypto_secretstream_xchacha20poly1305_push(
            &state, coded + 32, NULL, plain, segments[i].bytes, data, 80, segments[i].tag);
        (void)file_write(&f, coded, segments[i].bytes + 49);
    }
    free(plain);
    free(coded);
    return f;
}

static void test_forged(void **state)
{
    static const struct {
        uint32_t segment, ok; /* ok: so many segments are good; 100: all */
        size_t n;
        forged segments[3];
    } cases[] = {
        {S, 100, 1, {{0, 1, 0, 3}}},
        {S, 100, 2, {{S, 0, 0, 1}, {S, 1, 1, 3}}},
        {S, 100, 2, {{S, 0, 0, 1}, {1, 1, 1, 3}}},
        {8192, 100, 1, {{8192, 1, 0, 3}}},
        {S, 1, 2, {{S, 0, 0, 1}, {0, 1, 1, 3}}}, /* an empty last one */
        {S, 0, 1, {{1, 1, 0, 1}}},               /* tags */
        {S, 0, 1, {{1, 1, 0, 0}}},
        {S, 0, 2, {{S, 0, 0, 3}, {S, 1, 1, 3}}},
        {S, 0, 2, {{S, 0, 0, 0}, {S, 1, 1, 3}}},
        {S, 0, 2, {{S, 0, 0, 2}, {S, 1, 1, 3}}},
        {S, 0, 1, {{1, 1, 1, 3}}}, /* numbers */
        {S, 1, 3, {{S, 0, 0, 1}, {S, 0, 2, 1}, {1, 1, 2, 3}}},
        {S, 0, 2, {{100, 0, 0, 1}, {100, 1, 1, 3}}}, /* sizes */
        {S, 0, 1, {{S + 1, 1, 0, 3}}},
        {S, 0, 2, {{S + 1, 0, 0, 1}, {1, 1, 1, 3}}},
        {S, 0, 1, {{1, 3, 0, 3}}}, /* flags */
        {S, 0, 1, {{1, 2, 0, 3}}},
        {S, 2, 2, {{S, 0, 0, 1}, {S, 0, 1, 1}}}, /* no last one */
        {S / 2, 0, 1, {{1, 1, 0, 3}}},           /* sizes of a segment */
        {S + 1, 0, 1, {{1, 1, 0, 3}}},
        {3 * S, 0, 1, {{1, 1, 0, 3}}},
        {1u << 25, 0, 1, {{1, 1, 0, 3}}},
        {1u << 24, 100, 1, {{1, 1, 0, 3}}},
        {0, 0, 1, {{1, 1, 0, 3}}},
    };
    unsigned char *plain = calloc(65536, 1);
    (void)state;

    assert_non_null(plain);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const kvt_snap_context context = context_of(NULL);
        file f = forge(cases[i].segment, 0, cases[i].segments, cases[i].n);
        const kvt_status expected = cases[i].ok == 100 ? KVT_OK : KVT_ERR_CORRUPT;
        size_t delivered, bytes = 0;

        for (size_t k = 0; k < cases[i].n && k < cases[i].ok; k++)
            bytes += cases[i].segments[k].bytes;
        assert_int_equal(decrypt(&context, key, &f, plain, 65536, 5000, &delivered), expected);
        assert_int_equal(delivered, bytes);
        assert_int_equal(decrypt_at(&context, &f, plain, bytes), expected);
        free(f.data);
    }
    for (uint64_t zero = 0; zero < 2; zero++) { /* a field of a later version */
        const kvt_snap_context context = context_of(NULL);
        file f = forge(S, zero << 63, cases[0].segments, 1);
        assert_int_equal(decrypt_at(&context, &f, plain, 0), zero ? KVT_ERR_CORRUPT : KVT_OK);
        free(f.data);
    }
    free(plain);
}

/* ---- failures ---- */

/* Callbacks that say they have read more than there was room for. */
static int64_t read_too_much(void *user, void *data, size_t bytes)
{
    int64_t n = file_read(user, data, bytes);
    return n == (int64_t)bytes && ((file *)user)->at > HEAD ? n + 1 : n;
}

static int64_t read_too_much_at(void *user, uint64_t offset, void *data, size_t bytes)
{
    int64_t n = file_read_at(user, offset, data, bytes);
    return n == (int64_t)bytes && offset > 0 ? n + 1 : n;
}

static void test_callbacks(void **state)
{
    const kvt_snap_context context = context_of(NULL);
    unsigned char *plain = plain_of(2 * S, 31);
    file f = encrypted(plain, 2 * S);
    const kvt_reader in = {&f, read_too_much};
    const kvt_snap_source source = {&f, read_too_much_at, f.n};
    kvt_reader out;
    kvt_snap_crypt c;
    uint64_t bytes;
    (void)state;

    assert_int_equal(kvt_snap_decrypt_begin(&context, key, &in, &c, &out), KVT_OK);
    assert_true(out.read(out.user, plain, 1) < 0);
    assert_int_equal(kvt_snap_crypt_failure(&c), KVT_OK);
    kvt_snap_crypt_release(&c);
    assert_int_equal(kvt_snap_decrypt_open(&context, key, &source, &c, &bytes), KVT_ERR_IO);
    kvt_snap_crypt_release(&c);
    free(plain);
    free(f.data);
}

static void test_memory(void **state)
{
    const size_t n = 37 * S + 5;
    unsigned char *plain = plain_of(n, 23);
    file whole = encrypted(plain, n);
    (void)state;

    for (int how = 0; how < 3; how++) {
        const int executor = how > 0;
        ledger memory;
        kvt_allocator allocator;
        kvt_cache *cache;
        kvt_snap_context context;
        kvt_status status[3];
        long k = 0, refused = 0;

        ledger_init(&memory);
        allocator = ledger_allocator(&memory);
        cache = cache_with(executor ? 4 : 1, executor, &allocator);
        context = context_of(cache);
        do {
            const size_t live = memory.live_bytes;
            file f = file_of(NULL, 0);
            size_t delivered;

            memory.countdown = k;
            by_parts = how == 2;
            status[0] = encrypt(&context, plain, n, S, 1000, &f);
            by_parts = 0;
            if (status[0] != KVT_OK)
                expect_error_text(cache, "no memory for a segment", "encrypt");
            memory.countdown = k;
            status[1] = decrypt(&context, key, &whole, plain, n, 1000, &delivered);
            if (status[1] != KVT_OK)
                expect_error_text(cache, "no memory for a segment", "decrypt");
            memory.countdown = k++;
            status[2] = decrypt_at(&context, &whole, plain, n);
            memory.countdown = -1;
            for (int i = 0; i < 3; i++) {
                assert_true(status[i] == KVT_OK || status[i] == KVT_ERR_MEMORY);
                refused += status[i] != KVT_OK;
            }
            assert_int_equal(memory.live_bytes, live);
            free(f.data);
        } while (status[0] != KVT_OK || status[1] != KVT_OK || status[2] != KVT_OK);
        /* Two buffers a lane, and one more where the last batch is written meanwhile; a save has
         * 16 lanes, a load of a stream has 4, one of a source one. */
        assert_int_equal(refused, how == 2 ? 58 : executor ? 42 : 6);
        kvt_cache_destroy(cache);
        ledger_close(&memory);
    }
    free(plain);
    free(whole.data);
}

/* kvt_snap_crypt_bytes is what one takes, whatever the size of segments. */
static void test_bound(void **state)
{
    static const uint32_t threads[] = {1, 2, 5, 64};
    static const uint32_t sizes[] = {S, 1u << 18, 1u << 20, 1u << 22};
    const size_t n = 18u << 20;
    unsigned char *plain = calloc(n, 1);
    (void)state;

    assert_non_null(plain);
    for (size_t i = 0; i < 4 && !is_quick(); i++)
        for (size_t k = 0; k < 4; k++) {
            ledger memory;
            kvt_allocator allocator;
            kvt_cache *cache;
            kvt_snap_context context;
            uint64_t most = kvt_snap_crypt_bytes(threads[i]), one = 2 * (sizes[k] + 64u);
            file f = file_of(NULL, 0);
            size_t delivered;

            ledger_init(&memory);
            allocator = ledger_allocator(&memory);
            cache = cache_with(threads[i], 1, &allocator);
            context = context_of(cache);
            memory.peak_bytes = memory.live_bytes;
            by_parts = 1;
            assert_int_equal(encrypt(&context, plain, n, sizes[k], 0, &f), KVT_OK);
            by_parts = 0;
            assert_int_equal(decrypt(&context, key, &f, plain, n, n, &delivered), KVT_OK);
            if (sizes[k] == KVT_SNAP_CRYPT_SEGMENT)
                assert_int_equal(memory.peak_bytes - memory.live_bytes, most);
            assert_true(memory.peak_bytes - memory.live_bytes <= (most > one ? most : one));
            kvt_cache_destroy(cache);
            ledger_close(&memory);
            free(f.data);
        }
    free(plain);
}

static void test_streams(void **state)
{
    const size_t n = 37 * S + 5, less = 9 * S + 5;
    unsigned char *plain = plain_of(n, 29);
    kvt_cache *cache = cache_with(4, 1, NULL);
    const kvt_snap_context context = context_of(cache);
    size_t delivered;
    long k;
    (void)state;

    for (by_parts = 0; by_parts < 2; by_parts++) {
        for (k = 0;; k++) {
            file f = file_of(NULL, 0);
            kvt_status status;
            f.countdown = k;
            status = encrypt(&context, plain, n, S, 1000, &f);
            if (status == KVT_OK) {
                f.countdown = -1;
                assert_int_equal(decrypt(&context, key, &f, plain, n, S, &delivered), KVT_OK);
                free(f.data);
                break;
            }
            assert_int_equal(status, KVT_ERR_IO);
            expect_error_text(cache, "writing the encrypted snapshot failed", "encrypt");
            /* What was written before is there, and nothing behind the write that failed. */
            assert_int_equal(f.n, k == 0 ? 0 : HEAD + (size_t)(k - 1) * WHOLE);
            free(f.data);
        }
        assert_int_equal(k, 1 + 38); /* the head, and segments */
    }
    by_parts = 0;
    for (k = 0;; k++) {
        file f = encrypted(plain, less);
        kvt_status status;
        f.countdown = k;
        status = decrypt(&context, key, &f, plain, less, S, &delivered);
        f.countdown = k;
        assert_int_equal(decrypt_at(&context, &f, plain, less), k < 13 ? KVT_ERR_IO : KVT_OK);
        free(f.data);
        if (status == KVT_OK)
            break;
        assert_int_equal(status, KVT_ERR_IO);
    }
    assert_int_equal(k, 22);
    kvt_cache_destroy(cache);
    free(plain);
}

/* ---- what is left in memory ---- */

static size_t left_over; /* freed buffers that had plain bytes in them */

static void *watched_alloc(void *user, size_t bytes, size_t alignment)
{
    (void)user;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void watched_free(void *user, void *memory, size_t bytes)
{
    (void)user;
    for (size_t i = 0; memory && i + 8 <= bytes; i++)
        if (memcmp((unsigned char *)memory + i, "ZZZZZZZZ", 8) == 0) {
            left_over++;
            break;
        }
    free(memory);
}

static void test_wiped(void **state)
{
    const kvt_allocator allocator = {NULL, watched_alloc, watched_free};
    kvt_cache *cache = cache_with(4, 1, &allocator);
    const kvt_snap_context context = context_of(cache);
    const size_t n = 37 * S + 5;
    unsigned char *plain = malloc(n);
    file f = file_of(NULL, 0);
    size_t delivered;
    void *memory;
    (void)state;

    assert_non_null(plain);
    memset(plain, 'Z', n);
    by_parts = 1;
    assert_int_equal(encrypt(&context, plain, n, S, 0, &f), KVT_OK);
    by_parts = 0;
    assert_int_equal(decrypt(&context, key, &f, plain, n, S, &delivered), KVT_OK);
    assert_int_equal(decrypt_at(&context, &f, plain, n), KVT_OK);
    assert_int_equal(left_over, 0);
    assert_int_equal(kvt_snap_alloc(&context, 100, "a check of this test", &memory), KVT_OK);
    memset(memory, 'Z', 100);
    kvt_snap_free(&context, memory, 100);
    assert_int_equal(left_over, 1);
    kvt_cache_destroy(cache);
    free(plain);
    free(f.data);
}

/* ---- a file of another day ---- */

enum { GOLDEN_BYTES = 2 * S + 100 };

static unsigned char *golden_plain(void)
{
    unsigned char *plain = malloc(GOLDEN_BYTES);

    assert_non_null(plain);
    for (uint32_t i = 0; i < GOLDEN_BYTES; i++)
        plain[i] = (unsigned char)(i * 2654435761u >> 24);
    return plain;
}

static void test_golden(void **state)
{
    const kvt_snap_context context = context_of(NULL);
    unsigned char *plain = golden_plain(), data[GOLDEN_BYTES + 1000];
    FILE *stream;
    file f;
    size_t delivered, n;
    (void)state;

    if (!golden)
        skip();
    stream = fopen(golden, "rb");
    assert_non_null(stream);
    n = fread(data, 1, sizeof data, stream);
    assert_int_equal(fclose(stream), 0);
    assert_int_equal(n, HEAD + GOLDEN_BYTES + 3 * 49);
    f = file_of(data, n);
    assert_int_equal(decrypt(&context, key, &f, plain, GOLDEN_BYTES, 1000, &delivered), KVT_OK);
    assert_int_equal(delivered, GOLDEN_BYTES);
    assert_int_equal(decrypt_at(&context, &f, plain, GOLDEN_BYTES), KVT_OK);
    free(f.data);
    free(plain);
}

static int write_golden(const char *path)
{
    unsigned char *plain = golden_plain();
    file f = encrypted(plain, GOLDEN_BYTES);
    FILE *stream = fopen(path, "wb");
    const int written = stream && fwrite(f.data, 1, f.n, stream) == f.n;

    free(plain);
    free(f.data);
    return stream && fclose(stream) == 0 && written ? 0 : 1;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forged),  cmocka_unit_test(test_callbacks),
        cmocka_unit_test(test_memory),  cmocka_unit_test(test_bound),
        cmocka_unit_test(test_streams), cmocka_unit_test(test_wiped),
        cmocka_unit_test(test_golden),
    };
    char path[4096];

    if (argc == 3 && strcmp(argv[1], "--write") == 0)
        return write_golden(argv[2]);
    if (argc == 2) {
        (void)snprintf(path, sizeof path, "%s/encrypted.kvx", argv[1]);
        golden = path;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
