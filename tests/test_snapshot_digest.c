/*
 * Digests against xxHash's, for all short lengths and some long ones, of each kernel, at any
 * address, with a copy and without, at once and in pieces. A unit test of src/snapshot/digest.c
 * and hash.c: it includes internal headers and links the static library.
 */
#include "support.h"

#include "src/cpu.h"
#include "src/snapshot/format.h"

#include <xxhash.h>

enum { MOST = 300000, CANARY = 64 };

typedef struct fixture {
    unsigned char *from, *to; /* room for MOST bytes behind an offset, and for canaries */
    kvt_stripes *stripes[2];
    size_t n_stripes;
} fixture;

static unsigned char *aligned(size_t bytes)
{
    void *p = NULL;
    assert_int_equal(posix_memalign(&p, 64, bytes), 0);
    return p;
}

static int setup(void **state)
{
    static fixture f;
    rng r = {5};
    f.from = aligned(MOST + 2 * CANARY);
    f.to = aligned(MOST + 3 * CANARY);
    for (size_t i = 0; i < MOST + 2 * CANARY; i++)
        f.from[i] = (unsigned char)rng_next(&r);
    f.n_stripes = 0;
    f.stripes[f.n_stripes++] = kvt_stripes_base;
#if defined(KVT_HAVE_AVX2)
    if (kvt_cpu_has_avx2())
        f.stripes[f.n_stripes++] = kvt_stripes_avx2;
#endif
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    free(f->from);
    free(f->to);
    return 0;
}

static void expected(const unsigned char *from, size_t n, unsigned char *digest)
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(from, n));
    memcpy(digest, &canonical, KVT_SNAP_ID_BYTES);
}

/* The copy is there, and nothing around it has changed. */
static void check_copy(const fixture *f, size_t at, const unsigned char *from, size_t n)
{
    for (size_t i = 0; i < at; i++)
        assert_int_equal(f->to[i], 0xa5);
    assert_memory_equal(f->to + at, from, n);
    for (size_t i = at + n; i < at + n + CANARY; i++)
        assert_int_equal(f->to[i], 0xa5);
}

/* In pieces of one size, or at random. */
static void check_pieces(const unsigned char *from, size_t n, size_t size, rng *r,
                         const unsigned char *want)
{
    unsigned char got[KVT_SNAP_ID_BYTES];
    kvt_snap_digester digester;
    kvt_snap_digester_init(&digester);
    for (size_t at = 0, step; at < n; at += step) {
        step = size ? size : 1 + rng_below(r, 2000);
        step = step < n - at ? step : n - at;
        kvt_snap_digester_add(&digester, from + at, step);
    }
    kvt_snap_digester_end(&digester, got);
    assert_memory_equal(got, want, sizeof got);
    kvt_snap_digester_end(&digester, got); /* it can go on */
    assert_memory_equal(got, want, sizeof got);
}

static void check_length(const fixture *f, size_t n, rng *r)
{
    unsigned char want[KVT_SNAP_ID_BYTES], got[KVT_SNAP_ID_BYTES];
    for (size_t i = 0; i < 4; i++) {
        const size_t at = i == 0 ? 0 : rng_below(r, 64), to = i < 2 ? 0 : rng_below(r, 64);
        const unsigned char *from = f->from + at;
        expected(from, n, want);
        kvt_snap_digest(from, n, got);
        assert_memory_equal(got, want, sizeof got);
        memset(f->to, 0xa5, n + to + CANARY);
        memset(got, 0, sizeof got);
        kvt_snap_copy_digest(f->to + to, from, n, got);
        assert_memory_equal(got, want, sizeof got);
        check_copy(f, to, from, n);
        for (size_t k = 0; k < f->n_stripes && n > KVT_SNAP_SHORT_BYTES; k++) {
            kvt_snap_copier c;
            kvt_snap_copier_begin(&c, f->stripes[k], NULL, from, n);
            kvt_snap_copier_end(&c, got);
            assert_memory_equal(got, want, sizeof got);
            memset(f->to, 0xa5, n + to + CANARY);
            memset(got, 0, sizeof got);
            kvt_snap_copier_begin(&c, f->stripes[k], f->to + to, from, n);
            for (size_t end = 0; end < n; end += 1 + rng_below(r, 20000))
                kvt_snap_copier_reach(&c, end);
            kvt_snap_copier_end(&c, got);
            assert_memory_equal(got, want, sizeof got);
            check_copy(f, to, from, n);
        }
    }
    check_pieces(f->from, n, n < 600 ? 1 : 0, r, (expected(f->from, n, want), want));
}

static void digests_are_those_of_xxhash(void **state)
{
    static const size_t around[] = {4096, 8192, 16384, 135168, 262144};
    rng r = {6};
    for (size_t n = 0; n <= 2200; n++)
        check_length(*state, n, &r);
    for (size_t i = 0; i < sizeof around / sizeof *around; i++)
        for (size_t n = around[i] - 2; n <= around[i] + 66; n += n % 64 == 2 ? 60 : 1)
            check_length(*state, n, &r);
    for (int i = 0; i < 100; i++)
        check_length(*state, rng_below(&r, MOST), &r);
}

/* Each address that what is copied, and where to, can have within a line. */
static void copies_lie_anywhere(void **state)
{
    const fixture *f = *state;
    unsigned char want[KVT_SNAP_ID_BYTES], got[KVT_SNAP_ID_BYTES];
    for (size_t at = 0; at < 64; at++)
        for (size_t to = 0; to < 64; to += at % 16 ? 8 : 1) {
            const size_t n = 16384 + at;
            expected(f->from + at, n, want);
            memset(f->to, 0xa5, n + to + CANARY);
            kvt_snap_copy_digest(f->to + to, f->from + at, n, got);
            assert_memory_equal(got, want, sizeof got);
            check_copy(f, to, f->from + at, n);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(digests_are_those_of_xxhash),
        cmocka_unit_test(copies_lie_anywhere),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
