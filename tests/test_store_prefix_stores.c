/*
 * Prefixes through directories and through two stores as one: what is evicted, and which of two
 * copies is taken.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "prefix_scene.h"
#include "store_values.h"

#include <stdio.h>
#include <unistd.h>

/* ---- copies ---- */

/* Two stores as one: a damaged copy in near is replaced by far's, which stays. */
static void test_damaged_near(void **state)
{
    enum { FAR_IS_SOUND, FAR_FAILS, FAR_IS_DAMAGED, FAR_LACKS, CASES };
    static const uint64_t expected[] = {SEALED, 0, 64, 64};
    (void)state;
    for (int what = FAR_IS_SOUND; what < CASES; what++)
        for (size_t at = 0; at < 3; at++) {
            memory_store far_memory;
            kvt_store far_store = memory_store_open(&far_memory), tiers;
            kvt_prefix_result got = {0};
            memory_value *v, *far_value;
            kvt_status status;
            prefix_scene c;

            prefix_open(&c, 0, TOKENS);
            memory_store_copy(&c.m, &far_memory);
            v = find_value(&c.m, 0, 128, 0);
            far_value = find_value(&far_memory, 0, 128, 0);
            /* Known at the first byte, amid the images, with the last one. */
            v->data[at == 0 ? 0 : at == 1 ? v->bytes / 2 : v->bytes - 1] ^= 1;
            if (what == FAR_FAILS)
                far_memory.fail_at = 1; /* exists, get */
            if (what == FAR_IS_DAMAGED)
                far_value->data[far_value->bytes - 1] ^= 1;
            if (what == FAR_LACKS)
                memory_store_drop(&far_memory, far_value);
            assert_int_equal(kvt_store_open_tiers(&c.store, &far_store, &tiers), KVT_OK);
            status = kvt_prefix_get(&tiers, c.to, c.prompt, TOKENS, NULL, &got);
            assert_int_equal(status, what == FAR_FAILS ? KVT_ERR_IO : KVT_OK);
            assert_int_equal(kvt_seq_length(c.to), expected[what]);
            assert_int_equal(got.n_refused, what == FAR_IS_DAMAGED || what == FAR_LACKS);
            /* A value goes where each copy of it is known to be bad, and no other does. */
            assert_int_equal(c.m.n, what == FAR_IS_DAMAGED || what == FAR_LACKS ? 2 : 3);
            assert_int_equal(far_memory.n, what == FAR_IS_DAMAGED || what == FAR_LACKS ? 2 : 3);
            if (what == FAR_IS_SOUND) { /* near has been mended */
                expect_ok(c.s.cache, kvt_seq_clear(c.to));
                assert_int_equal(prefix_get(&c, c.prompt, TOKENS, NULL), SEALED);
            }
            kvt_store_close(&tiers);
            memory_store_free(&far_memory);
            prefix_close(&c);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_damaged_near),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
