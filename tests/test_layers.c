/*
 * kvt_group_split_ends: which layers come into which group, with which types.
 */
#include "support.h"

enum { LAYERS = 12 };

/* The type of K of each layer, by the groups' layer numbers; -1: in no group, or in two. */
static void types_of(const kvt_group_config *groups, uint32_t n_groups, int *types)
{
    for (size_t i = 0; i < LAYERS; i++)
        types[i] = -1;
    for (uint32_t g = 0; g < n_groups; g++)
        for (uint32_t i = 0; i < groups[g].n_layers; i++) {
            uint32_t layer = groups[g].layers[i];
            assert_true(layer < LAYERS && (i == 0 || layer > groups[g].layers[i - 1]));
            assert_int_equal(types[layer], -1);
            types[layer] = (int)groups[g].k_type;
            assert_int_equal(groups[g].v_type,
                             groups[g].k_type == KVT_TYPE_I4 ? KVT_TYPE_I4 : KVT_TYPE_F16);
            assert_int_equal(groups[g].k_dim, 64);
            assert_int_equal(groups[g].residual_tokens, 100);
        }
}

static void every_split(void **state)
{
    kvt_group_config all = group_of(LAYERS, 2, 1, 64, 32, KVT_TYPE_I4, KVT_TYPE_I4), groups[2];
    (void)state;
    all.residual_tokens = 100;
    for (uint32_t first = 0; first <= LAYERS + 1; first++)
        for (uint32_t last = 0; last <= LAYERS + 1; last++) {
            uint32_t layers[LAYERS], n_groups;
            int types[LAYERS];
            kvt_config config = kvt_config_init();
            kvt_cache *cache;
            expect_ok(NULL, kvt_group_split_ends(&all, first, last, KVT_TYPE_I8, KVT_TYPE_F16,
                                                 groups, &n_groups, layers));
            types_of(groups, n_groups, types);
            for (uint32_t i = 0; i < LAYERS; i++)
                assert_int_equal(types[i],
                                 i < first || i + last >= LAYERS ? KVT_TYPE_I8 : KVT_TYPE_I4);
            assert_int_equal(n_groups, first + last == 0 || first + last >= LAYERS ? 1 : 2);
            config.groups = groups;
            config.n_groups = n_groups;
            config.max_tokens = 64;
            expect_ok(NULL, kvt_cache_create(&config, &cache));
            kvt_cache_destroy(cache);
        }
}

/* Numbers of the caller's own stay, and group and groups may be the same memory. */
static void numbers_of_the_caller(void **state)
{
    static const uint32_t given[] = {1, 3, 5, 7};
    kvt_group_config groups[2] = {group_of(4, 2, 1, 64, 32, KVT_TYPE_I4, KVT_TYPE_I4)};
    uint32_t layers[4], n_groups;
    (void)state;
    groups[0].layers = given;
    expect_ok(NULL, kvt_group_split_ends(&groups[0], 1, 1, KVT_TYPE_I8, KVT_TYPE_I8, groups,
                                         &n_groups, layers));
    assert_int_equal(n_groups, 2);
    assert_int_equal(groups[0].n_layers, 2);
    assert_int_equal(groups[0].layers[0], 3);
    assert_int_equal(groups[0].layers[1], 5);
    assert_int_equal(groups[1].layers[0], 1);
    assert_int_equal(groups[1].layers[1], 7);
}

static void bad_arguments(void **state)
{
    kvt_group_config all = group_of(4, 2, 1, 64, 32, KVT_TYPE_I4, KVT_TYPE_I4), groups[2];
    uint32_t layers[4], n = 9;
    (void)state;
#define REFUSED(...) expect(NULL, KVT_ERR_ARG, kvt_group_split_ends(__VA_ARGS__))
    REFUSED(NULL, 1, 1, KVT_TYPE_I8, KVT_TYPE_I8, groups, &n, layers);
    REFUSED(&all, 1, 1, KVT_TYPE_I8, KVT_TYPE_I8, NULL, &n, layers);
    REFUSED(&all, 1, 1, KVT_TYPE_I8, KVT_TYPE_I8, groups, NULL, layers);
    REFUSED(&all, 1, 1, KVT_TYPE_I8, KVT_TYPE_I8, groups, &n, NULL);
    all.struct_size--;
    REFUSED(&all, 1, 1, KVT_TYPE_I8, KVT_TYPE_I8, groups, &n, layers);
    all.struct_size++;
    all.n_layers = 0;
    REFUSED(&all, 1, 1, KVT_TYPE_I8, KVT_TYPE_I8, groups, &n, layers);
    assert_int_equal(n, 9);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_split),
        cmocka_unit_test(numbers_of_the_caller),
        cmocka_unit_test(bad_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
