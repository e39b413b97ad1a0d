/*
 * Prefixes in a store: what is got is what was put, and only by who has the same prompt.
 */
#include "memory_store.h"
#include "subject.h"

/* The prompt of a test: the ids of its tokens. */
static void make_prompt(int32_t *prompt, size_t n)
{
    for (size_t i = 0; i < n; i++)
        prompt[i] = (int32_t)i;
}

typedef struct geometry {
    const char *name;
    kvt_type k_type, v_type;
    uint32_t k_dim, v_dim, flags, window, sinks, residual;
} geometry;

static const geometry geometries[] = {
    {"i8", KVT_TYPE_I8, KVT_TYPE_I8, 64, 64, 0, 0, 0, 0},
    {"i8, padded dims", KVT_TYPE_I8, KVT_TYPE_I8, 24, 40, 0, 0, 0, 0},
    {"i4", KVT_TYPE_I4, KVT_TYPE_I4, 64, 64, 0, 0, 0, 0},
    {"i4, i5, padded dims", KVT_TYPE_I4, KVT_TYPE_I5, 24, 40, 0, 0, 0, 0},
    {"f16", KVT_TYPE_F16, KVT_TYPE_F16, 32, 32, 0, 0, 0, 0},
    {"f32, i8", KVT_TYPE_F32, KVT_TYPE_I8, 16, 32, 0, 0, 0, 0},
    {"V in K", KVT_TYPE_I8, KVT_TYPE_I8, 96, 64, KVT_GROUP_V_IN_K, 0, 0, 0},
    {"window", KVT_TYPE_I8, KVT_TYPE_I8, 32, 32, 0, 150, 0, 0},
    {"window, sinks", KVT_TYPE_I4, KVT_TYPE_I4, 32, 32, 0, 100, 70, 0},
    {"window, f16", KVT_TYPE_F16, KVT_TYPE_F32, 32, 32, 0, 100, 0, 0},
    {"residual window", KVT_TYPE_I8, KVT_TYPE_I8, 32, 32, 0, 0, 0, 200},
    {"no residual window", KVT_TYPE_I4, KVT_TYPE_I4, 32, 32, 0, 0, 0, KVT_RESIDUAL_NONE},
};
enum { N_GEOMETRIES = sizeof geometries / sizeof *geometries };

static kvt_group_config group_at(size_t i)
{
    const geometry *g = &geometries[i];
    kvt_group_config group = group_of(2, 2, 1, g->k_dim, g->v_dim, g->k_type, g->v_type);
    group.flags = g->flags;
    group.window_tokens = g->window;
    group.sink_tokens = g->sinks;
    group.residual_tokens = g->residual;
    return group;
}

/* Rows that are sealed in all groups at MOST tokens. */
static uint64_t sealed_tokens(const subject *s)
{
    uint64_t least = MOST / 64 * 64;
    for (uint32_t g = 0; g < s->n_groups; g++) {
        const kvt_group_config *c = &s->groups[g];
        uint64_t residual = c->residual_tokens == 0                   ? 64
                            : c->residual_tokens == KVT_RESIDUAL_NONE ? 0
                                                                      : c->residual_tokens;
        int seals = c->k_type >= KVT_TYPE_I8 || c->v_type >= KVT_TYPE_I8;
        uint64_t n = seals ? (MOST - residual) / 64 * 64 : least;
        least = n < least ? n : least;
    }
    return least;
}

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

/* The sequence that a get of n tokens has to give: cut from a longer one, sealed for good. */
static kvt_seq *cut(const subject *s, uint64_t n)
{
    kvt_seq *seq = seq_of(s);
    grow(s, seq, MOST - 1);
    expect_ok(s->cache, kvt_seq_begin(seq, 1, NULL)); /* no truncate takes a sealing back now */
    expect_ok(s->cache, kvt_seq_abort(seq));
    if (kvt_seq_truncate(seq, n) != KVT_OK)
        fail_msg("truncate to %u", (unsigned)n);
    return seq;
}

static void round_trip(const subject *s, const char *name, size_t part_bytes, int places)
{
    memory_store m;
    kvt_store store = memory_store_open(&m);
    int32_t prompt[MOST + 1];
    kvt_prefix_result put, got, probed;
    kvt_seq *seq, *to, *like;
    uint64_t expected = sealed_tokens(s);

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
    like = cut(s, expected);
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
        kvt_group_config groups[2] = {group_at(i), group_at((i + 5) % N_GEOMETRIES)};
        open_subject(&s, groups, i % 3 == 1 ? 2 : 1, &r);
        open_cache(&s, NULL);
        for (size_t j = 0; j < 8; j++)
            round_trip(&s, geometries[i].name, sizes[j / 2], (int)(j % 2));
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
