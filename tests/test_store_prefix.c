/*
 * Prefixes in a store: what is got is what was put, and only by who has the same prompt.
 */
#include "store_scenes.h"

/* A sequence of a subject's that has been put as it grew. */
static kvt_seq *put_all(const subject *s, const kvt_store *store, kvt_prefix_result *result)
{
    kvt_seq *seq = seq_of(s);
    while (kvt_seq_length(seq) < MOST) {
        grow(s, seq, 40);
        expect_ok(s->cache, kvt_prefix_put(store, seq, NULL, result));
    }
    return seq;
}

static void round_trip(const subject *s, const char *name, size_t part_bytes, int places)
{
    memory_store m;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[MOST + 1];
    kvt_prefix_result put, got, probed;
    kvt_seq *seq, *to, *like;
    uint64_t expected = sealed_tokens(s, MOST);

    make_prompt(prompt, MOST + 1);
    seq = put_all(s, &store, &put);
    assert_int_equal(put.n_tokens, expected);
    m.part_bytes = part_bytes;
    m.places = places;
    to = seq_of(s);
    expect_ok(s->cache, kvt_prefix_probe(&store, to, prompt, MOST, NULL, &probed));
    expect_ok(s->cache, kvt_prefix_get(&store, to, prompt, MOST, NULL, &got));
    if (got.n_tokens != expected || probed.n_tokens != expected || got.n_refused)
        fail_msg("%s: %u tokens got, %u probed, of %u; %u refused", name, (unsigned)got.n_tokens,
                 (unsigned)probed.n_tokens, (unsigned)expected, (unsigned)got.n_refused);
    assert_int_equal(kvt_seq_length(to), expected);
    like = sequence_cut(s, expected);
    expect_equal(s, to, like, name, part_bytes);
    /* Both go on alike, and are put alike: there is nothing new. */
    grow(s, to, (size_t)(MOST - expected));
    grow(s, like, (size_t)(MOST - expected));
    expect_equal(s, to, like, name, part_bytes);
    expect_ok(s->cache, kvt_prefix_put(&store, to, NULL, &put));
    assert_int_equal(put.n_values, 0);
    assert_int_equal(put.n_tokens, expected);
    kvt_seq_destroy(like);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    memory_store_free(&m);
}

static void test_round_trips(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        static const size_t sizes[] = {0, 1000, 100000, 64};
        rng r = {i + 1};
        subject s;
        kvt_group_config groups[2] = {geometry_group(i), geometry_group((i + 5) % N_GEOMETRIES)};
        open_subject(&s, groups, i % 3 == 1 ? 2 : 1, &r);
        open_cache(&s, NULL);
        for (size_t j = 0; j < 8; j++)
            round_trip(&s, geometry_name(i), sizes[j / 2], (int)(j % 2));
        close_subject(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
