/*
 * src/cache/blocks.c: a block's id is known for as long as its contents are what they were. Ids are
 * set to a hash of the block's tokens, wherever a snapshot might, and held to it after each of many
 * random operations. Sees the library's own structures.
 *
 * KVT_TEST_SEED=n makes that seed's run alone. A failure prints its seed.
 */
#include "support.h"

#include <stdio.h>

#include "src/cache/cache.h"

enum { SEQS = 5, MOST = 520, DIM = 16, LAYERS = 2, SEEDS = 6, OPERATIONS = 350 };

typedef struct world {
    uint64_t seed;
    rng r;
    kvt_cache *cache;
    kvt_seq *seqs[SEQS];
    float *numbers; /* of keys and values */
    size_t operation;
    const char *name;     /* of the operation */
    size_t kept, refused; /* ids that were held to their blocks; calls */
} world;

static void complain(const world *w, const char *what)
{
    fprintf(stderr, "seed %llu, operation %zu (%s): %s\n", (unsigned long long)w->seed,
            w->operation, w->name, what);
    fail_msg("%s", what);
}

/* ---- contents ---- */

static uint64_t mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 29;
}

/* Code of a token and dim. */
static uint32_t code_at(kvt_type type, int is_k, const void *codes, size_t t, size_t d, size_t dims)
{
    const uint8_t *bytes = codes;
    switch (type) {
    case KVT_TYPE_I8: return bytes[(is_k ? kvt_k8_index : kvt_v8_index)(t, d, dims)];
    case KVT_TYPE_I4:
        return is_k ? (uint32_t)bytes[kvt_k4_index(t, d, dims)] >> kvt_k4_shift(d) & 15u
                    : (uint32_t)bytes[kvt_v4_index(t, d, dims)] >> kvt_v4_shift(t) & 15u;
    case KVT_TYPE_I5:
        return ((uint32_t)bytes[kvt_v4_index(t, d, dims)] >> kvt_v4_shift(t) & 15u) |
               ((uint32_t)bytes[kvt_v5_index(t, d, dims)] >> kvt_v5_shift(t, d) & 1u) << 4;
    case KVT_TYPE_F16:
        return ((const uint16_t *)codes)[(is_k ? kvt_kw_index : kvt_vw_index)(t, d, dims)];
    default: return ((const uint32_t *)codes)[(is_k ? kvt_kw_index : kvt_vw_index)(t, d, dims)];
    }
}

static uint64_t hash_side(const kvt_group *group, const kvt_block *block, kvt_side side,
                          size_t layer, size_t head, size_t n, uint64_t h)
{
    const kvt_layout *layout = kvt_block_layout(group, block);
    const kvt_record r = kvt_record_of(group, block, side, layer, head);
    const int is_k = side == KVT_SIDE_K;
    const kvt_type type = is_k ? layout->k_type : layout->v_type;
    const size_t dims = is_k ? layout->k_dims : layout->v_dims;
    const int by_dim = is_k && type == KVT_TYPE_I4;
    for (size_t t = 0; t < n; t++)
        for (size_t d = 0; d < DIM; d++)
            h = mix(h, code_at(type, is_k, r.codes, t, d, dims));
    for (size_t i = 0; r.scales && i < (by_dim ? DIM : n); i++)
        h = mix(h, r.scales[i]);
    for (size_t t = 0; by_dim && t < n; t++)
        h = mix(h, kvt_record_gains(&r, dims)[t]);
    for (size_t d = 0; r.offset && d < DIM; d++)
        h = mix(h, r.offset[d]);
    for (size_t d = 0; r.seed && d < DIM; d++)
        h = mix(mix(h, r.seed[d]), r.seed[dims + d]);
    for (size_t t = 0; r.seed && t < n; t++)
        h = mix(h, kvt_seed_gains(r.seed, dims)[t]);
    return h;
}

/* Of all that a block's first n tokens are. */
static void id_of(const kvt_cache *cache, const kvt_block *block, size_t n, unsigned char *id)
{
    const kvt_group *group = kvt_group_of_block(cache, block);
    uint64_t h[2] = {mix(n, block->form), 0};
    for (size_t layer = 0; layer < group->config.n_layers; layer++)
        for (size_t head = 0; head < group->config.n_kv_heads; head++)
            for (int side = 0; side < (group->v_in_k ? 1 : 2); side++)
                h[0] = hash_side(group, block, (kvt_side)side, layer, head, n, h[0]);
    h[1] = mix(h[0], 1);
    memcpy(id, h, KVT_BLOCK_ID_BYTES);
}

/* ---- what is known ---- */

static void check_block(world *w, const kvt_block *block)
{
    unsigned char id[KVT_BLOCK_ID_BYTES], now[KVT_BLOCK_ID_BYTES];
    if (!block || block->class_index == w->cache->n_groups || !block->id_tokens)
        return;
    if (!kvt_block_id(w->cache, block, block->id_tokens, id) ||
        kvt_block_id(w->cache, block, block->id_tokens % 64 + 1, now))
        complain(w, "an id is known for other tokens than it is of");
    id_of(w->cache, block, block->id_tokens, now);
    if (memcmp(id, now, sizeof id) != 0)
        complain(w, "a known id is not that of the block's bytes");
    w->kept++;
}

static void check_list(const world *w, const kvt_block *block, size_t n)
{
    for (; block; block = block->next, n--)
        if (block->id_tokens || n == 0)
            complain(w, "a block in a list has an id, or the list is another");
    if (n)
        complain(w, "a list is too short");
}

static void check_all(world *w)
{
    for (size_t i = 0; i < SEQS; i++) {
        const kvt_seq *seq = w->seqs[i];
        if (!seq)
            continue;
        for (size_t j = 0; j < seq->n_rows * w->cache->n_columns; j++)
            check_block(w, seq->table[j]);
        for (size_t c = 0; c < seq->n_checkpoints; c++)
            for (size_t j = 0; j < seq->checkpoints[c]->n_blocks; j++)
                check_block(w, seq->checkpoints[c]->blocks[j]);
        for (uint32_t c = 0; c < w->cache->n_classes; c++)
            check_list(w, seq->spare[c], seq->n_spare[c]);
    }
    for (uint32_t c = 0; c < w->cache->n_classes; c++)
        check_list(w, w->cache->free_blocks[c], w->cache->n_free_blocks[c]);
}

/* A block in force gets its id, as a save would give it. */
static void know(world *w, kvt_block *block, uint64_t n_tokens, size_t row)
{
    unsigned char id[KVT_BLOCK_ID_BYTES], known[KVT_BLOCK_ID_BYTES];
    uint64_t left = n_tokens - (uint64_t)row * KVT_TOKENS;
    uint32_t n = left < KVT_TOKENS ? (uint32_t)left : KVT_TOKENS;
    if (!block || rng_below(&w->r, 3) == 0)
        return;
    id_of(w->cache, block, n, id);
    kvt_block_set_id(w->cache, block, n, id);
    if (!kvt_block_id(w->cache, block, n, known) || memcmp(id, known, sizeof id) != 0)
        complain(w, "an id that was set is not known");
}

static void know_some(world *w)
{
    for (size_t i = 0; i < SEQS; i++) {
        kvt_seq *seq = w->seqs[i];
        if (!seq || rng_below(&w->r, 4) == 0)
            continue;
        for (uint32_t g = 0; g < w->cache->n_groups; g++)
            for (size_t row = 0; row < kvt_rows(seq->length); row++)
                know(w, kvt_seq_block(seq, row, g), seq->length, row);
        for (size_t c = 0; c < seq->n_checkpoints; c++) {
            kvt_checkpoint *point = seq->checkpoints[c];
            for (uint32_t g = 0; g < w->cache->n_groups; g++)
                for (size_t row = point->from[g]; row < kvt_rows(point->n_tokens); row++)
                    know(w, kvt_checkpoint_blocks(point, g)[row - point->from[g]], point->n_tokens,
                         row);
        }
    }
}

/* Between two changes. */
static void look(world *w)
{
    check_all(w);
    know_some(w);
}

/* ---- operations ---- */

/* A call that may be refused for where the sequence is. */
static int done(world *w, kvt_status status)
{
    if (status == KVT_OK)
        return 1;
    if (status != KVT_ERR_STATE && status != KVT_ERR_ARG && status != KVT_ERR_UNSUPPORTED)
        expect_ok(w->cache, status);
    w->refused++;
    return 0;
}

static void begin(world *w, kvt_seq *seq, size_t n)
{
    expect_ok(w->cache, kvt_seq_begin(seq, n, NULL));
    look(w);
    for (uint32_t layer = 0; layer < w->cache->n_layers; layer++) {
        size_t at = rng_below(&w->r, 1000);
        kvt_tensor k = kvt_tensor_f32(w->numbers + at), v = kvt_tensor_f32(w->numbers + at + 500);
        expect_ok(w->cache, kvt_append(seq, layer, &k, &v));
        if (layer == 0)
            look(w);
    }
    look(w);
}

static size_t some_step(world *w, const kvt_seq *seq)
{
    size_t left = MOST - (size_t)seq->length, n;
    switch (rng_below(&w->r, 4)) {
    case 0: n = 1 + rng_below(&w->r, 3); break;
    case 1: n = 1 + rng_below(&w->r, 64); break;
    case 2: n = 64 - (size_t)(seq->length % 64); break;
    default: n = 1 + rng_below(&w->r, 150); break;
    }
    return n < left ? n : left;
}

static void step(world *w, kvt_seq *seq)
{
    size_t n = some_step(w, seq);
    if (!n)
        return;
    begin(w, seq, n);
    expect_ok(w->cache, kvt_seq_commit(seq, NULL));
}

static void aborted(world *w, kvt_seq *seq)
{
    size_t n = some_step(w, seq);
    if (!n)
        return;
    begin(w, seq, n);
    expect_ok(w->cache, kvt_seq_abort(seq));
}

static void selected(world *w, kvt_seq *seq)
{
    size_t n = some_step(w, seq), m = 0;
    uint64_t indices[MOST];
    if (!n)
        return;
    begin(w, seq, n);
    for (size_t i = 0; i < n; i++)
        if (rng_below(&w->r, 3))
            indices[m++] = i;
    if (!done(w, kvt_seq_commit_selected(seq, indices, m, NULL)))
        expect_ok(w->cache, kvt_seq_abort(seq));
}

static void truncated(world *w, kvt_seq *seq)
{
    uint32_t most = (uint32_t)seq->length, n = rng_below(&w->r, 2) && most > 70 ? 70 : most;
    done(w, kvt_seq_truncate(seq, seq->length - rng_below(&w->r, n + 1)));
}

static void returned(world *w, kvt_seq *seq)
{
    if (seq->n_checkpoints)
        expect_ok(
            w->cache,
            kvt_seq_truncate(
                seq, seq->checkpoints[rng_below(&w->r, (uint32_t)seq->n_checkpoints)]->n_tokens));
}

static void checkpoint(world *w, kvt_seq *seq)
{
    if (seq->n_checkpoints < 4)
        expect_ok(w->cache, kvt_seq_checkpoint(seq, NULL, 0));
    else
        expect_ok(w->cache, kvt_seq_checkpoint_drop(seq, seq->checkpoints[1]->n_tokens));
}

static void removed(world *w, kvt_seq *seq)
{
    uint64_t rows = seq->length / 64, first = rng_below(&w->r, (uint32_t)rows + 1) * 64;
    if (rng_below(&w->r, 2) && rows) {
        done(w, kvt_seq_remove(seq, first, 64));
        return;
    }
    first = seq->length - seq->length / (1 + rng_below(&w->r, 20));
    if (first < seq->length)
        done(w, kvt_seq_remove(seq, first, 1 + (seq->length - first) / 3));
}

static void cleared(world *w, kvt_seq *seq)
{
    if (rng_below(&w->r, 4) == 0)
        expect_ok(w->cache, kvt_seq_clear(seq));
}

static void reserved(world *w, kvt_seq *seq)
{
    uint64_t n = seq->length + rng_below(&w->r, 200);
    expect_ok(w->cache, kvt_seq_reserve(seq, n < MOST ? n : MOST));
}

static void trimmed(world *w, kvt_seq *seq)
{
    (void)seq;
    if (rng_below(&w->r, 4) == 0)
        expect_ok(w->cache, kvt_cache_trim(w->cache));
}

/* In place of another sequence. */
static void forked(world *w, kvt_seq *seq)
{
    kvt_seq *copy = NULL, **place = &w->seqs[rng_below(&w->r, SEQS)];
    uint64_t n = rng_below(&w->r, 2) ? seq->length : rng_below(&w->r, (uint32_t)seq->length + 1);
    if (!done(w, kvt_seq_fork(seq, n, &copy)))
        return;
    kvt_seq_destroy(*place);
    *place = copy;
}

/* A fork in the midst of a step. */
static void forked_pending(world *w, kvt_seq *seq)
{
    size_t n = some_step(w, seq);
    kvt_seq *copy = NULL, **place = &w->seqs[rng_below(&w->r, SEQS)];
    if (!n)
        return;
    begin(w, seq, n);
    expect_ok(w->cache, kvt_seq_fork(seq, seq->length, &copy));
    look(w);
    expect_ok(w->cache, kvt_seq_commit(seq, NULL));
    kvt_seq_destroy(*place);
    *place = copy;
}

static const struct operation {
    const char *name;
    void (*run)(world *w, kvt_seq *seq);
    uint32_t weight;
} operations[] = {
    {"step", step, 30},          {"abort", aborted, 6},   {"select", selected, 8},
    {"truncate", truncated, 12}, {"return", returned, 5}, {"checkpoint", checkpoint, 5},
    {"remove", removed, 7},      {"clear", cleared, 3},   {"reserve", reserved, 3},
    {"trim", trimmed, 2},        {"fork", forked, 8},     {"fork while pending", forked_pending, 3},
};
#define N_OPERATIONS (sizeof operations / sizeof operations[0])

static const struct operation *some_operation(world *w)
{
    uint32_t sum = 0, at;
    size_t i = 0;
    for (; i < N_OPERATIONS; i++)
        sum += operations[i].weight;
    at = rng_below(&w->r, sum);
    for (i = 0; at >= operations[i].weight; i++)
        at -= operations[i].weight;
    return &operations[i];
}

/* ---- runs ---- */

static kvt_cache *make_cache(uint64_t seed)
{
    static const kvt_type k_types[] = {KVT_TYPE_I8,  KVT_TYPE_I4, KVT_TYPE_I4,
                                       KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_F32};
    static const kvt_type v_types[] = {KVT_TYPE_I8, KVT_TYPE_I4, KVT_TYPE_I5,
                                       KVT_TYPE_I8, KVT_TYPE_I5, KVT_TYPE_F32};
    kvt_group_config groups[2];
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    for (size_t g = 0; g < 2; g++) {
        size_t type = (seed + g) % 6;
        groups[g] = group_of(LAYERS, 1, 1, DIM, DIM, k_types[type], v_types[type]);
        groups[g].residual_tokens = seed % 2 ? 64 : 20;
        groups[g].fine_tokens = seed % 3 ? KVT_FINE_NONE : 64;
    }
    groups[1].window_tokens = seed % 4 ? 0 : 100;
    config.groups = groups;
    config.n_groups = 2;
    config.max_tokens = MOST;
    expect_ok(NULL, kvt_cache_create(&config, &cache));
    return cache;
}

static void run(uint64_t seed)
{
    world w = {.seed = seed, .r = {seed * 7919 + 1}, .name = "create"};
    w.cache = make_cache(seed);
    w.numbers = rng_normals(&w.r, 2000 + MOST * DIM);
    for (size_t n = is_quick() ? OPERATIONS / 10 : OPERATIONS; w.operation < n; w.operation++) {
        kvt_seq **seq = &w.seqs[rng_below(&w.r, SEQS)];
        const struct operation *o = some_operation(&w);
        if (!*seq)
            expect_ok(w.cache, kvt_seq_create(w.cache, seq));
        w.name = o->name;
        o->run(&w, *seq);
        look(&w);
    }
    assert_true(w.kept > 10 * w.operation);
    assert_true(w.refused * 4 < w.operation);
    for (size_t i = 0; i < SEQS; i++)
        kvt_seq_destroy(w.seqs[i]);
    kvt_cache_destroy(w.cache);
    free(w.numbers);
}

static void ids_are_never_stale(void **state)
{
    const char *given = getenv("KVT_TEST_SEED");
    uint64_t first = given ? strtoull(given, NULL, 10) : 1;
    (void)state;
    for (uint64_t seed = first; seed < first + (given ? 1 : 2 * SEEDS); seed++)
        run(seed);
}

/* What no operation has touched stays known. */
static void ids_last(void **state)
{
    world w = {.seed = 2, .r = {1}, .name = "ids last"};
    unsigned char id[KVT_BLOCK_ID_BYTES];
    kvt_seq *seq = NULL, *copy = NULL;
    const kvt_block *last;
    (void)state;
    w.cache = make_cache(0); /* i8 and i4 */
    w.numbers = rng_normals(&w.r, 2000 + MOST * DIM);
    expect_ok(w.cache, kvt_seq_create(w.cache, &seq));
    w.seqs[0] = seq;
    begin(&w, seq, 200);
    expect_ok(w.cache, kvt_seq_commit(seq, NULL));
    for (size_t row = 0; row < 4; row++) {
        id_of(w.cache, kvt_seq_block(seq, row, 0), row < 3 ? 64 : 8, id);
        kvt_block_set_id(w.cache, kvt_seq_block(seq, row, 0), row < 3 ? 64 : 8, id);
    }
    last = kvt_seq_block(seq, 3, 0);
    assert_false(kvt_block_id(w.cache, last, 7, id));
    assert_false(kvt_block_id(w.cache, last, 0, id));
    expect_ok(w.cache, kvt_seq_fork(seq, 200, &copy));
    assert_true(kvt_block_id(w.cache, last, 8, id));
    expect_ok(w.cache, kvt_seq_begin(seq, 1, NULL)); /* copies the block; the fork has it still */
    assert_true(kvt_seq_block(copy, 3, 0) == last && kvt_seq_block(seq, 3, 0) != last);
    assert_true(kvt_block_id(w.cache, last, 8, id));
    assert_false(kvt_block_id(w.cache, kvt_seq_block(seq, 3, 0), 8, id));
    expect_ok(w.cache, kvt_seq_begin(copy, 1, NULL)); /* writes into it */
    assert_false(kvt_block_id(w.cache, last, 8, id));
    for (size_t row = 0; row < 3; row++)
        assert_true(kvt_block_id(w.cache, kvt_seq_block(seq, row, 0), 64, id));
    kvt_seq_destroy(copy);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(w.cache);
    free(w.numbers);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_are_never_stale),
        cmocka_unit_test(ids_last),
    };
    return cmocka_run_group_tests_name("block_id", tests, NULL, NULL);
}
