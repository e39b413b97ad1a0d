/*
 * Encrypted files: what goes in comes out, what was changed does not. A unit test of
 * src/snapshot/crypt.c: it includes internal headers and links the static library.
 */
#include "crypt_support.h"

static void test_first_bytes(void **state)
{
    (void)state;
    assert_true(kvt_snap_is_encrypted((const unsigned char *)"\x89KVX\r\n\x1a\n"));
    assert_false(kvt_snap_is_encrypted((const unsigned char *)"\x89KVT\r\n\x1a\n"));
    assert_false(kvt_snap_is_encrypted((const unsigned char *)"\x89KVX\r\n\x1a"));
}

/* ---- round trips ---- */

static void test_round_trip(void **state)
{
    static const size_t sizes[] = {0,         1,          S - 1,     S,         S + 1,
                                   2 * S - 1, 2 * S,      3 * S - 1, 3 * S,     3 * S + 1,
                                   4 * S,     7 * S + 5,  9 * S - 1, 9 * S,     9 * S + 1,
                                   16 * S,    16 * S + 1, 40 * S,    41 * S + 9};
    kvt_cache *caches[] = {NULL, cache_with(2, 0, NULL), cache_with(3, 1, NULL),
                           cache_with(64, 1, NULL)};
    rng r = {3};
    (void)state;

    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t k = 0; k < 16; k++) {
            const kvt_snap_context writer = context_of(caches[k % 4]);
            const kvt_snap_context reader = context_of(caches[k / 4]);
            const size_t n = sizes[i], most[] = {0, 700, 3 * S, 50000};
            unsigned char *plain = plain_of(n, n + 1);
            file f = file_of(NULL, 0);
            size_t delivered;

            by_parts = (int)(k / 4 + i) % 2;
            assert_int_equal(encrypt(&writer, plain, n, S, most[(k + i) % 4], &f), KVT_OK);
            by_parts = 0;
            assert_int_equal(f.n, HEAD + n + 49 * (n ? (n + S - 1) / S : 1));
            f.pieces = k % 2 ? &r : NULL;
            assert_int_equal(decrypt(&reader, key, &f, plain, n, k % 3 ? 999 : 3 * S, &delivered),
                             KVT_OK);
            assert_int_equal(delivered, n);
            assert_int_equal(f.at, f.n);
            assert_int_equal(decrypt_at(&reader, &f, plain, n), KVT_OK);
            free(plain);
            free(f.data);
        }
    for (size_t i = 0; i < 4; i++)
        kvt_cache_destroy(caches[i]);
}

/* Two files of the same bytes have no 16 in common but those of the head that say what it is. */
static void test_never_the_same(void **state)
{
    unsigned char *plain = calloc(2 * S, 1);
    file a, b;
    (void)state;

    assert_non_null(plain);
    a = encrypted(plain, 2 * S);
    b = encrypted(plain, 2 * S);
    assert_int_equal(a.n, b.n);
    assert_memory_equal(a.data, b.data, 16);
    for (size_t i = 16; i + 16 <= a.n; i++)
        assert_true((i >= 48 && i < 56) || memcmp(a.data + i, b.data + i, 16) != 0);
    for (size_t i = HEAD + 32; i + 16 < HEAD + WHOLE; i++)
        assert_true(memcmp(a.data + i, a.data + i + WHOLE, 16) != 0);
    free(plain);
    free(a.data);
    free(b.data);
}

/* What follows the last segment in a stream is somebody else's. */
static void test_what_follows(void **state)
{
    kvt_cache *cache = cache_with(3, 1, NULL);
    const kvt_snap_context context = context_of(cache);
    unsigned char *plain = plain_of(2 * S, 5);
    file f = encrypted(plain, 2 * S);
    const size_t n = f.n;
    size_t delivered;
    (void)state;

    (void)file_write(&f, f.data + HEAD, WHOLE);
    assert_int_equal(decrypt(&context, key, &f, plain, 2 * S, S, &delivered), KVT_OK);
    assert_int_equal(f.at, n);
    assert_int_equal(decrypt_at(&context, &f, plain, 2 * S), KVT_ERR_CORRUPT);
    f.n = n + 1;
    assert_int_equal(decrypt_at(&context, &f, plain, 2 * S), KVT_ERR_CORRUPT);
    free(f.data);
    f = encrypted(plain, S + 100);
    (void)file_write(&f, plain, 5); /* the size of the last segment does not tell of these */
    assert_int_equal(decrypt(&context, key, &f, plain, S + 100, S, &delivered), KVT_OK);
    assert_int_equal(f.at, f.n - 5);
    assert_int_equal(decrypt_at(&context, &f, plain, S + 100), KVT_ERR_CORRUPT);
    kvt_cache_destroy(cache);
    free(plain);
    free(f.data);
}

static void test_any_place(void **state)
{
    kvt_cache *caches[] = {NULL, cache_with(3, 1, NULL)};
    const size_t n = 9 * S + 1234;
    unsigned char *plain = plain_of(n, 7), *to = malloc(n);
    file f = encrypted(plain, n);
    rng r = {9};
    (void)state;

    assert_non_null(to);
    for (int i = 0; i < 2; i++) {
        const kvt_snap_context context = context_of(caches[i]);
        const kvt_snap_source source = {&f, file_read_at, f.n};
        kvt_snap_crypt c;
        uint64_t bytes;

        assert_int_equal(kvt_snap_decrypt_open(&context, key, &source, &c, &bytes), KVT_OK);
        assert_int_equal(bytes, n);
        for (int k = 0; k < 2000; k++) {
            size_t at = rng_below(&r, (uint32_t)n + 1);
            size_t m = rng_below(&r, k % 2 ? 300 : (uint32_t)(n - at) + 1);
            m = m < n - at ? m : n - at;
            assert_int_equal(kvt_snap_decrypt_at(&c, at, to, m), KVT_OK);
            assert_memory_equal(to, plain + at, m);
        }
        /* A segment that was read stays: no more reads. */
        assert_int_equal(kvt_snap_decrypt_at(&c, n - 1, to, 1), KVT_OK);
        f.countdown = 0;
        assert_int_equal(kvt_snap_decrypt_at(&c, n - 1234, to, 1234), KVT_OK);
        assert_int_equal(kvt_snap_decrypt_at(&c, 0, to, 1), KVT_ERR_IO);
        f.countdown = -1;
        assert_int_equal(kvt_snap_decrypt_at(&c, 0, to, 1), KVT_OK);
        assert_int_equal(kvt_snap_decrypt_at(&c, n, to, 0), KVT_OK);
        assert_int_equal(kvt_snap_decrypt_at(&c, n, to, 1), KVT_ERR_CORRUPT);
        assert_int_equal(kvt_snap_decrypt_at(&c, 1, to, SIZE_MAX), KVT_ERR_CORRUPT);
        assert_int_equal(kvt_snap_decrypt_at(&c, UINT64_MAX, to, 2), KVT_ERR_CORRUPT);
        /* A segment that is not authentic stays so, whatever was in memory before. */
        for (size_t k = 4; k < 7; k++) {
            f.data[HEAD + k * WHOLE + 40] ^= 1;
            for (int again = 0; again < 3; again++) {
                memset(to, 0, n);
                assert_int_equal(kvt_snap_decrypt_at(&c, 5 * S, to, 2 * S),
                                 k < 5 ? KVT_OK : KVT_ERR_CORRUPT);
                assert_int_equal(kvt_snap_decrypt_at(&c, 4 * S, to, 1),
                                 k > 4 ? KVT_OK : KVT_ERR_CORRUPT);
            }
            f.data[HEAD + k * WHOLE + 40] ^= 1;
        }
        kvt_snap_crypt_release(&c);
        kvt_cache_destroy(caches[i]);
    }
    free(plain);
    free(to);
    free(f.data);
}

/* ---- damage ---- */

static void expect_refused(file *f, const unsigned char *plain, size_t n, kvt_status expected,
                           size_t segments)
{
    const kvt_snap_context context = context_of(NULL);
    size_t delivered;

    assert_int_equal(decrypt(&context, key, f, plain, n, S, &delivered), expected);
    assert_int_equal(delivered, segments * S);
    assert_true(text[0] != 0);
    text[0] = 0;
    assert_int_equal(decrypt_at(&context, f, plain, n), expected);
    assert_true(text[0] != 0);
}

static void test_every_byte(void **state)
{
    const size_t n = 2 * S + 100;
    unsigned char *plain = plain_of(n, 11);
    file f = encrypted(plain, n);
    const size_t step = is_quick() ? 37 : 1;
    (void)state;

    for (size_t i = 0; i < f.n; i += i < 200 || i > f.n - 200 ? 1 : step)
        for (int bit = 0; bit < 8; bit += i < HEAD + 40 ? 1 : 7) {
            f.data[i] ^= (unsigned char)(1 << bit);
            expect_refused(&f, plain, n, i < 12 ? KVT_ERR_FORMAT : KVT_ERR_CORRUPT,
                           i < HEAD ? 0 : (i - HEAD) / WHOLE);
            f.data[i] ^= (unsigned char)(1 << bit);
        }
    free(plain);
    free(f.data);
}

static void test_every_length(void **state)
{
    const size_t n = 2 * S + 100;
    unsigned char *plain = plain_of(n, 13);
    file f = encrypted(plain, n);
    const size_t whole = f.n, step = is_quick() ? 41 : 1;
    (void)state;

    for (f.n = 0; f.n < whole; f.n += f.n < 200 || f.n % WHOLE < 200 ? 1 : step)
        expect_refused(&f, plain, n, f.n < 8 ? KVT_ERR_FORMAT : KVT_ERR_CORRUPT,
                       f.n < HEAD ? 0 : (f.n - HEAD) / WHOLE);
    free(plain);
    free(f.data);
}

/* A file of chosen segments: of f by their number, of g by 100 and more; -1 is g's head. */
static file joined(const file *f, const file *g, const int *segments, size_t n)
{
    file out = file_of(f->data, HEAD);

    for (size_t i = 0; i < n; i++) {
        const file *from = segments[i] < 100 ? f : g;
        const size_t at = HEAD + (size_t)(segments[i] % 100) * WHOLE;
        if (segments[i] < 0)
            memcpy(out.data, g->data, HEAD);
        else
            (void)file_write(&out, from->data + at, from->n - at < WHOLE ? from->n - at : WHOLE);
    }
    return out;
}

static void test_segments(void **state)
{
    /* The number of segments that are in their places. */
    static const int cases[][6] = {{0, 1, 0, 2, 3},  {1, 0, 2, 1, 3}, {0, 2, 3, 1},
                                   {0, 0, 1, 2, 3},  {0, 1, 2, 3, 2}, {3},
                                   {0, 1, 2},        {0, 1, 1, 3},    {100, 1, 2, 3},
                                   {0, 101, 2, 3},   {0, 1, 2, 103},  {100, 101, 102, 103},
                                   {-1, 0, 1, 2, 3}, {0, 1, 2, 0},    {1, 2, 3},
                                   {0, 1, 3, 2}};
    static const size_t lengths[] = {5, 5, 4, 5, 5, 1, 3, 4, 4, 4, 4, 4, 5, 4, 3, 4};
    const size_t n = 4 * S; /* all segments are full: their sizes tell nothing */
    unsigned char *plain = plain_of(n, 17);
    file f = encrypted(plain, n), g = encrypted(plain, n);
    (void)state;

    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        file x = joined(&f, &g, cases[i], lengths[i]);
        const kvt_snap_context context = context_of(NULL);
        size_t delivered, right = 0;

        while (right < lengths[i] && cases[i][right] == (int)right)
            right++;
        assert_int_equal(decrypt_at(&context, &x, plain, n), KVT_ERR_CORRUPT);
        if (right == 4) { /* what follows is left unread */
            assert_int_equal(decrypt(&context, key, &x, plain, n, S, &delivered), KVT_OK);
        } else {
            assert_int_equal(decrypt(&context, key, &x, plain, n, S, &delivered), KVT_ERR_CORRUPT);
            assert_int_equal(delivered, right * S);
        }
        free(x.data);
    }
    free(plain);
    free(f.data);
    free(g.data);
}

static void test_keys(void **state)
{
    const kvt_snap_context context = context_of(NULL);
    const size_t n = S + 100;
    unsigned char *plain = plain_of(n, 19), other[32];
    file f = encrypted(plain, n), p = file_of((const unsigned char *)"\x89KVT\r\n\x1a\n", 8);
    kvt_snap_crypt c;
    size_t delivered;
    (void)state;

    for (int bit = 0; bit < 256; bit++) {
        memcpy(other, key, 32);
        other[bit / 8] ^= (unsigned char)(1 << bit % 8);
        assert_int_equal(decrypt(&context, other, &f, plain, n, S, &delivered), KVT_ERR_MISMATCH);
        assert_non_null(strstr(text, "another key"));
        assert_int_equal(delivered, 0);
    }
    assert_int_equal(decrypt(&context, key, &p, plain, n, S, &delivered), KVT_ERR_MISMATCH);
    assert_non_null(strstr(text, "not encrypted"));
    assert_int_equal(decrypt(&context, NULL, &f, plain, n, S, &delivered), KVT_ERR_ARG);
    assert_int_equal(kvt_snap_crypt_needs_key(&context, ""), KVT_ERR_MISMATCH);
    assert_non_null(strstr(text, "a key is needed"));

    /* Any head with a sum that is right: the key does not fit, or the segments do not. */
    for (size_t i = 12; i < 56; i++) {
        const uint64_t sum = kvt_get64(f.data + 56);
        f.data[i] ^= 0x10;
        if (i == 13)
            f.data[i] = 0x20; /* segments of 8 KiB */
        kvt_put64(f.data + 56, kvt_snap_sum(f.data, 56));
        assert_int_equal(decrypt(&context, key, &f, plain, n, S, &delivered),
                         i >= 48 || (i < 16 && i != 13) ? KVT_ERR_CORRUPT : KVT_ERR_MISMATCH);
        assert_int_equal(delivered, 0);
        f.data[i] = i == 13 ? 0x10 : f.data[i] ^ 0x10;
        kvt_put64(f.data + 56, sum);
    }
    assert_int_equal(decrypt(&context, key, &f, plain, n, S, &delivered), KVT_OK);

    /* The file's key is gone, and the released struct can be released again. */
    {
        const kvt_snap_source source = {&f, file_read_at, f.n};
        const unsigned char zeros[32] = {0};
        uint64_t bytes;
        assert_int_equal(kvt_snap_decrypt_open(&context, key, &source, &c, &bytes), KVT_OK);
        assert_true(memcmp(c.key, zeros, 32) != 0 && memcmp(c.key, key, 32) != 0);
        kvt_snap_crypt_release(&c);
        assert_memory_equal(c.key, zeros, 32);
        kvt_snap_crypt_release(&c);
    }
    free(plain);
    free(f.data);
    free(p.data);
}

static kvt_status load_file(kvt_seq *seq, file *f, int stream)
{
    const kvt_reader reader = {f, file_read};
    kvt_load_options o;

    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.key = key;
    f->at = 0;
    return stream ? kvt_seq_load_stream(seq, &reader, &o, NULL)
                  : kvt_seq_load_memory(seq, f->data, f->n, &o, NULL);
}

/* A container is filled by its snapshot, also one in a stream, where more may follow it. */
static void test_containers_of_more(void **state)
{
    kvt_group_config group = group_of(1, 1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache = cache_of(&group, 1000, 1, NULL);
    rng r = {23};
    tokens t = tokens_make(&r, 64, &group);
    file plain = file_of(NULL, 0), f;
    const kvt_writer writer = {&plain, file_write};
    size_t n, segments;
    kvt_seq *seq, *to;
    (void)state;

    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_create(cache, &to));
    append_step(cache, to, &group, &t, 0, 5);
    append_step(cache, seq, &group, &t, 0, 64);
    expect_ok(cache, kvt_seq_save_stream(seq, &writer, NULL));
    n = plain.n;
    segments = (n + S - 1) / S;
    assert_true(n % S > 8 && segments > 1);
    plain.data = realloc(plain.data, n + 5 * S);
    assert_non_null(plain.data);
    memset(plain.data + n, 'z', 5 * S);
    for (int stream = 0; stream < 2; stream++) {
        static const size_t more[] = {1, 8, 100, 0, 5 * S, 5 * S, 5 * S};
        for (size_t i = 0; i < 7; i++) {
            f = encrypted(plain.data, n + (i == 3 ? segments * S - n : more[i]));
            if (i == 5) /* it ends with a segment that is not the last one */
                f.n = HEAD + segments * WHOLE;
            if (i == 6) /* and the next one is forged */
                memset(f.data + HEAD + segments * WHOLE, 0, WHOLE);
            expect(cache, KVT_ERR_CORRUPT, load_file(to, &f, stream));
            assert_int_equal(kvt_seq_length(to), 5);
            free(f.data);
        }
        f = encrypted(plain.data, n);
        if (stream) { /* somebody else's */
            f.data = realloc(f.data, f.n + 3);
            assert_non_null(f.data);
            memset(f.data + f.n, 0, 3);
            f.n += 3;
        }
        expect_ok(cache, load_file(to, &f, stream));
        assert_int_equal(kvt_seq_length(to), 64);
        if (stream)
            assert_int_equal(f.at, f.n - 3);
        expect_ok(cache, kvt_seq_truncate(to, 5));
        free(f.data);
    }
    free(plain.data);
    tokens_free(&t);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_first_bytes),    cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_never_the_same), cmocka_unit_test(test_what_follows),
        cmocka_unit_test(test_any_place),      cmocka_unit_test(test_every_byte),
        cmocka_unit_test(test_every_length),   cmocka_unit_test(test_segments),
        cmocka_unit_test(test_keys),           cmocka_unit_test(test_containers_of_more),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
