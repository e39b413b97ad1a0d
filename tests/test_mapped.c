/*
 * src/cache/mapping.c: sequences whose blocks lie in read-only memory that is mapped.
 *
 * A sequence is built by the public calls. Then two others get its tokens as a load would give
 * them: one, in a cache of its own, with blocks of that cache, the other with blocks that lie in a
 * region without the permission to write (whoever writes there is killed by the system). Both have
 * to go on alike, to the bit, whatever is done to them. Sees the library's own structures.
 *
 * KVT_TEST_SEED=n makes that seed's run alone.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#endif
#include "support.h"

#include <stdio.h>
#include <sys/mman.h>

#include "src/cache/cache.h"

enum { PAIRS = 4, MOST = 640, DIM = 32, KV_HEADS = 2, Q_HEADS = 4, LAYERS = 4, BLOCKS = 128 };

/* ---- the region ---- */

/* What the mapping's user has. */
typedef struct region {
    unsigned char *memory;
    size_t bytes, used;
    uint64_t sums[BLOCKS][LAYERS]; /* of the layers' bytes */
    size_t n_blocks;
    size_t verified, closed; /* calls; atomic */
} region;

static uint64_t sum_of(const unsigned char *data, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u, word;
    for (size_t i = 0; i < n; i += sizeof word) {
        memcpy(&word, data + i, sizeof word);
        h = (h ^ word) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return h;
}

static const kvt_layout *layout_of(const kvt_cache *cache, const kvt_block *block)
{
    return kvt_block_layout(kvt_group_of_block(cache, block), block);
}

static kvt_status verify(kvt_mapping *mapping, const kvt_block *block, uint32_t layer_index)
{
    region *r = mapping->user;
    const size_t bytes = layout_of(mapping->cache, block)->layer_bytes;
    const size_t i = kvt_mapping_index(mapping, block);
    __atomic_fetch_add(&r->verified, 1, __ATOMIC_RELAXED);
    if (sum_of(block->data + layer_index * bytes, bytes) == r->sums[i][layer_index])
        return KVT_OK;
    return kvt_fail(mapping->cache, KVT_ERR_CORRUPT, "block %zu, layer %u", i, layer_index);
}

static void close_region(kvt_mapping *mapping)
{
    region *r = mapping->user;
    assert_int_equal(munmap(r->memory, r->bytes), 0);
    __atomic_fetch_add(&r->closed, 1, __ATOMIC_RELAXED);
}

static void protect(const region *r, int may_write)
{
    assert_int_equal(mprotect(r->memory, r->bytes, PROT_READ | (may_write ? PROT_WRITE : 0)), 0);
}

static void open_region(region *r, size_t bytes)
{
    memset(r, 0, sizeof *r);
    r->bytes = kvt_round_up(bytes, 65536);
    r->memory = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(r->memory != MAP_FAILED);
}

/* ---- a loaded sequence ---- */

/* Blocks of the source, and what stands for them. */
typedef struct stage {
    kvt_cache *cache;
    kvt_mapping *mapping; /* NULL: blocks of the cache */
    region *region;
    const kvt_block *from[BLOCKS];
    kvt_block *to[BLOCKS];
    size_t n;
} stage;

/* The block that stands for one of the source, with one more reference. */
static kvt_block *stand_in(stage *s, const kvt_block *block)
{
    const size_t bytes = s->cache->class_bytes[block->class_index];
    kvt_block *made;
    for (size_t i = 0; i < s->n; i++)
        if (s->from[i] == block) {
            pthread_mutex_lock(&s->cache->lock);
            kvt_block_refer_locked(s->cache, s->to[i]);
            pthread_mutex_unlock(&s->cache->lock);
            return s->to[i];
        }
    assert_true(s->n < BLOCKS);
    if (s->mapping && block->class_index != s->cache->n_groups) {
        region *r = s->region;
        const kvt_layout *layout = layout_of(s->cache, block);
        unsigned char *data = r->memory + r->used;
        assert_true(r->used + bytes <= r->bytes);
        memcpy(data, block->data, bytes);
        for (size_t l = 0; l * layout->layer_bytes < layout->block_bytes; l++)
            r->sums[r->n_blocks][l] = sum_of(data + l * layout->layer_bytes, layout->layer_bytes);
        made = kvt_mapping_block(s->mapping, r->n_blocks++, block->class_index, data, 0);
        r->used += kvt_round_up(bytes, 64);
    } else {
        expect_ok(s->cache, kvt_block_get(s->cache, block->class_index, &made));
        memcpy(made->data, block->data, bytes);
    }
    s->from[s->n] = block;
    s->to[s->n++] = made;
    return made;
}

static void stage_checkpoint(stage *s, kvt_checkpoint *from, kvt_seq *made)
{
    const size_t rows = kvt_rows(from->n_tokens);
    kvt_checkpoint *to;
    expect_ok(s->cache, kvt_checkpoints_make_room(made));
    expect_ok(s->cache, kvt_checkpoint_new(s->cache, from->n_tokens, from->from, 0, &to));
    to->next_position = from->next_position;
    memcpy(to->groups, from->groups, sizeof to->groups);
    for (uint32_t c = 0; c <= s->cache->n_groups; c++) {
        for (size_t row = from->from[c]; row < rows; row++) {
            const kvt_block *block = kvt_checkpoint_blocks(from, c)[row - from->from[c]];
            kvt_checkpoint_blocks(to, c)[row - from->from[c]] = block ? stand_in(s, block) : NULL;
        }
        if (c < s->cache->n_groups)
            to->groups[c].n_final = to->groups[c].seal_end = to->groups[c].n_sealed;
    }
    made->checkpoints[made->n_checkpoints++] = to;
}

/* A sequence of a cache as a load makes it. region NULL: all blocks are the cache's. */
static kvt_seq *load(kvt_cache *cache, const kvt_seq *source, region *r)
{
    stage s = {.cache = cache, .region = r};
    kvt_seq made = {.cache = cache, .length = source->length, .n_rows = source->n_rows};
    kvt_seq *seq = NULL;
    made.next_position = source->next_position;
    made.table = calloc(source->n_rows * cache->n_columns + 1, sizeof *made.table);
    if (r) {
        open_region(r, (size_t)BLOCKS * 80 * 1024);
        expect_ok(cache, kvt_mapping_create(cache, BLOCKS, &s.mapping));
        s.mapping->user = r;
        s.mapping->verify = verify;
        s.mapping->close = close_region;
    }
    for (size_t row = 0; row < source->n_rows; row++)
        for (uint32_t c = 0; c <= cache->n_groups; c++) {
            const kvt_block *block = kvt_seq_block(source, row, c);
            *kvt_seq_entry(&made, row, c) = block ? stand_in(&s, block) : NULL;
        }
    for (size_t i = 0; i < source->n_checkpoints; i++)
        stage_checkpoint(&s, source->checkpoints[i], &made);
    kvt_rows_state(&made);
    expect_ok(cache, kvt_turns_copy(cache, source->turns, &made.turns));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    kvt_rows_replace(seq, &made);
    free(made.table);
    if (r) {
        protect(r, 0);
        kvt_mapping_put(s.mapping);
        assert_int_equal(r->closed, source->n_rows == 0); /* its blocks keep it open */
        assert_int_equal(r->verified, 0);
    }
    return seq;
}

/* ---- caches and steps ---- */

typedef struct world {
    uint64_t seed;
    rng r;
    ledger ledgers[2];
    kvt_cache *caches[2]; /* of the plain sequences and the mapped ones */
    kvt_seq *seqs[PAIRS][2];
    region region;
    float *numbers;           /* of keys, values and queries */
    size_t refused, compared; /* calls */
} world;

#define N_NUMBERS ((MOST + 64) * KV_HEADS * DIM)

/* Runs tasks from the last to the first, and counts them. */
static void run_backwards(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    size_t *count = user;
    *count += n;
    while (n-- > 0)
        task(arg, n);
}

/* count: of an executor's tasks; NULL: there is no executor. */
static void make_caches_with(world *w, uint64_t kind, uint32_t n_threads, size_t *count)
{
    static const kvt_type k[] = {KVT_TYPE_I8, KVT_TYPE_I4, KVT_TYPE_F16, KVT_TYPE_I4, KVT_TYPE_I8};
    static const kvt_type v[] = {KVT_TYPE_I8, KVT_TYPE_I4, KVT_TYPE_F16, KVT_TYPE_I5, KVT_TYPE_F16};
    kvt_group_config groups[2];
    kvt_config config = kvt_config_init();
    for (size_t g = 0; g < 2; g++) {
        size_t i = (kind + g) % 5;
        groups[g] = group_of(LAYERS / 2, Q_HEADS, KV_HEADS, DIM, DIM, k[i], v[i]);
        groups[g].residual_tokens = kind % 2 ? 64 : 20;
        groups[g].fine_tokens = kind % 3 ? KVT_FINE_NONE : 64;
    }
    groups[1].window_tokens = kind % 2 ? 100 : 0;
    config.groups = groups;
    config.n_groups = 2;
    config.max_tokens = MOST;
    config.n_threads = count ? n_threads : pool_threads(n_threads);
    if (count)
        config.executor =
            (kvt_executor){.user = count, .run = run_backwards, .n_threads = n_threads};
    for (int i = 0; i < 2; i++) {
        ledger_init(&w->ledgers[i]);
        config.allocator = ledger_allocator(&w->ledgers[i]);
        expect_ok(NULL, kvt_cache_create(&config, &w->caches[i]));
    }
    w->numbers = rng_normals(&w->r, N_NUMBERS + 4096);
}

static void make_caches(world *w, uint64_t kind, uint32_t n_threads)
{
    make_caches_with(w, kind, n_threads, NULL);
}

static void close_caches(world *w)
{
    for (int i = 0; i < 2; i++) {
        kvt_cache_destroy(w->caches[i]);
        ledger_close(&w->ledgers[i]);
    }
    free(w->numbers);
}

static void append_layers(world *w, kvt_seq *seq, size_t at)
{
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        kvt_tensor k = kvt_tensor_f32(w->numbers + at + layer);
        kvt_tensor v = kvt_tensor_f32(w->numbers + at + layer + 100);
        expect_ok(seq->cache, kvt_append(seq, layer, &k, &v));
    }
}

static void step(world *w, kvt_seq *seq, size_t n, size_t at)
{
    expect_ok(seq->cache, kvt_seq_begin(seq, n, NULL));
    append_layers(w, seq, at);
    expect_ok(seq->cache, kvt_seq_commit(seq, NULL));
}

/* One query of all heads over one layer. */
static kvt_status attend(const world *w, kvt_seq *seq, uint32_t layer, float *out)
{
    kvt_attend_item item = {.seq = seq, .n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = layer;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(w->numbers + 7 * layer);
    args.out = kvt_tensor_f32(out);
    return kvt_attend(seq->cache, &args);
}

/* ---- comparisons ---- */

static void expect_equal_attend(world *w, kvt_seq *const *pair, uint32_t layer)
{
    float out[2][Q_HEADS * DIM];
    kvt_status status[2];
    for (int i = 0; i < 2; i++)
        status[i] = attend(w, pair[i], layer, out[i]);
    expect(pair[1]->cache, status[0], status[1]);
    if (status[0] == KVT_OK)
        assert_memory_equal(out[0], out[1], sizeof out[0]);
    w->compared++;
}

static void expect_equal_read(world *w, kvt_seq *const *pair, uint32_t layer)
{
    static float x[2][MOST * KV_HEADS * DIM];
    uint64_t first = rng_below(&w->r, (uint32_t)pair[0]->length + 1);
    uint64_t n = rng_below(&w->r, (uint32_t)(pair[0]->length - first) + 1);
    for (int side = 0; side < 2; side++) {
        kvt_status status[2];
        for (int i = 0; i < 2; i++) {
            kvt_tensor out = kvt_tensor_f32(x[i]);
            status[i] = kvt_read(pair[i], layer, (kvt_side)side, first, n, &out);
        }
        expect(pair[1]->cache, status[0], status[1]);
        if (status[0] == KVT_OK)
            assert_memory_equal(x[0], x[1], (size_t)n * KV_HEADS * DIM * sizeof(float));
    }
}

static void compare(world *w, kvt_seq *const *pair)
{
    assert_int_equal(kvt_seq_length(pair[0]), kvt_seq_length(pair[1]));
    assert_int_equal(kvt_seq_next_position(pair[0]), kvt_seq_next_position(pair[1]));
    assert_int_equal(pair[0]->n_checkpoints, pair[1]->n_checkpoints);
    expect_equal_attend(w, pair, rng_below(&w->r, LAYERS));
    expect_equal_read(w, pair, rng_below(&w->r, LAYERS));
}

/* Different blocks of a cache's sequences: of its memory, by class, and mapped ones. */
static size_t count_blocks(const world *w, int side, size_t *used, size_t *shared)
{
    static const kvt_block *seen[PAIRS * 2 * MOST];
    size_t n = 0, mapped = 0;
    memset(used, 0, KVT_MAX_CLASSES * sizeof *used);
    memset(shared, 0, KVT_MAX_CLASSES * sizeof *shared);
    for (size_t i = 0; i < PAIRS; i++) {
        const kvt_seq *seq = w->seqs[i][side];
        for (size_t c = 0; seq && c <= seq->n_checkpoints; c++) {
            kvt_block *const *blocks = c ? seq->checkpoints[c - 1]->blocks : seq->table;
            size_t m = c ? seq->checkpoints[c - 1]->n_blocks : seq->n_rows * seq->cache->n_columns;
            for (size_t j = 0, k; j < m; j++) {
                if (!blocks[j])
                    continue;
                for (k = 0; k < n && seen[k] != blocks[j]; k++)
                    ;
                if (k < n)
                    continue;
                seen[n++] = blocks[j];
                if (blocks[j]->mapping) {
                    mapped++;
                    assert_true(seq->has_mapped);
                    continue;
                }
                used[blocks[j]->class_index]++;
                shared[blocks[j]->class_index] += blocks[j]->references > 1;
            }
        }
    }
    return mapped;
}

/* The cache has as many blocks as its sequences, and the mapping is there for as long as needed. */
static void account(const world *w)
{
    for (int side = 0; side < 2; side++) {
        const kvt_cache *cache = w->caches[side];
        size_t used[KVT_MAX_CLASSES], shared[KVT_MAX_CLASSES];
        size_t mapped = count_blocks(w, side, used, shared);
        kvt_cache_stats all = {.struct_size = sizeof all};
        uint64_t bytes = 0, seqs = 0;
        expect_ok(cache, kvt_cache_get_stats(cache, &all));
        for (uint32_t c = 0; c < cache->n_classes; c++) {
            assert_int_equal(cache->n_used_blocks[c] - cache->n_spare_blocks[c], used[c]);
            assert_int_equal(cache->n_shared_blocks[c], shared[c]);
            bytes += used[c] * kvt_block_bytes(cache, c);
        }
        assert_int_equal(all.bytes_used, bytes);
        assert_int_equal(all.bytes, w->ledgers[side].live_bytes);
        if (side) {
            assert_int_equal(w->region.closed, mapped == 0);
        }
        for (size_t i = 0; i < PAIRS; i++) {
            kvt_seq_stats one = {.struct_size = sizeof one};
            if (w->seqs[i][side]) {
                expect_ok(cache, kvt_seq_get_stats(w->seqs[i][side], &one));
                seqs += one.own_bytes;
            }
        }
        assert_true(seqs <= all.bytes);
    }
}

/* ---- operations on a pair ---- */

static int both(world *w, kvt_status plain, kvt_status mapped)
{
    expect(w->caches[1], plain, mapped);
    w->refused += plain != KVT_OK;
    return plain == KVT_OK;
}

static size_t some_step(world *w, const kvt_seq *seq)
{
    size_t left = MOST - (size_t)seq->length, n = 1 + rng_below(&w->r, 3);
    switch (rng_below(&w->r, 3)) {
    case 0: n = 1 + rng_below(&w->r, 100); break;
    case 1: n = 64 - (size_t)(seq->length % 64); break;
    default: break;
    }
    return n < left ? n : left;
}

static void step_pair(world *w, kvt_seq **pair, int how)
{
    size_t n = some_step(w, pair[0]), at = rng_below(&w->r, 3000), m = 0;
    uint64_t indices[MOST];
    if (!n || !both(w, kvt_seq_begin(pair[0], n, NULL), kvt_seq_begin(pair[1], n, NULL)))
        return;
    for (int i = 0; i < 2; i++)
        append_layers(w, pair[i], at);
    expect_equal_attend(w, pair, rng_below(&w->r, LAYERS));
    for (size_t i = 0; i < n; i++)
        if (rng_below(&w->r, 3))
            indices[m++] = i;
    if (how == 0)
        both(w, kvt_seq_commit(pair[0], NULL), kvt_seq_commit(pair[1], NULL));
    else if (how == 1)
        both(w, kvt_seq_abort(pair[0]), kvt_seq_abort(pair[1]));
    else if (!both(w, kvt_seq_commit_selected(pair[0], indices, m, NULL),
                   kvt_seq_commit_selected(pair[1], indices, m, NULL)))
        both(w, kvt_seq_abort(pair[0]), kvt_seq_abort(pair[1]));
}

static void truncate_pair(world *w, kvt_seq **pair)
{
    uint32_t most = (uint32_t)pair[0]->length, n = rng_below(&w->r, 3) && most > 70 ? 70 : most;
    uint64_t to = most - rng_below(&w->r, n + 1);
    if (pair[0]->n_checkpoints && rng_below(&w->r, 3) == 0)
        to = pair[0]->checkpoints[rng_below(&w->r, (uint32_t)pair[0]->n_checkpoints)]->n_tokens;
    both(w, kvt_seq_truncate(pair[0], to), kvt_seq_truncate(pair[1], to));
}

static void remove_pair(world *w, kvt_seq **pair)
{
    uint64_t length = pair[0]->length, n = 64;
    uint64_t first = rng_below(&w->r, (uint32_t)(length / 64) + 1) * 64;
    if (rng_below(&w->r, 2)) {
        first = length - length / (1 + rng_below(&w->r, 20));
        n = (length - first) / 3 + 1;
    }
    if (first + n <= length)
        both(w, kvt_seq_remove(pair[0], first, n), kvt_seq_remove(pair[1], first, n));
}

static void fork_pair(world *w, kvt_seq **pair)
{
    kvt_seq **copy = w->seqs[rng_below(&w->r, PAIRS)];
    uint32_t length = (uint32_t)pair[0]->length;
    uint64_t n = rng_below(&w->r, 2) ? length : rng_below(&w->r, length + 1);
    if (!copy[0])
        both(w, kvt_seq_fork(pair[0], n, &copy[0]), kvt_seq_fork(pair[1], n, &copy[1]));
}

static void destroy_pair(kvt_seq **pair)
{
    kvt_seq_destroy(pair[0]);
    kvt_seq_destroy(pair[1]);
    pair[0] = pair[1] = NULL;
}

static void change(world *w, kvt_seq **pair)
{
    switch (rng_below(&w->r, 16)) {
    case 0:
    case 1:
    case 2:
    case 3: step_pair(w, pair, 0); break;
    case 4: step_pair(w, pair, 1); break;
    case 5: step_pair(w, pair, 2); break;
    case 6:
    case 7: truncate_pair(w, pair); break;
    case 8:
    case 9: remove_pair(w, pair); break;
    case 10:
    case 11: fork_pair(w, pair); break;
    case 12:
        both(w, kvt_seq_checkpoint(pair[0], NULL, 0), kvt_seq_checkpoint(pair[1], NULL, 0));
        break;
    case 13:
        if (rng_below(&w->r, 4) == 0)
            both(w, kvt_seq_clear(pair[0]), kvt_seq_clear(pair[1]));
        break;
    case 14:
        if (rng_below(&w->r, 2))
            destroy_pair(pair);
        break;
    default:
        if (rng_below(&w->r, 3) == 0)
            both(w, kvt_seq_reserve(pair[0], pair[0]->length + 1),
                 kvt_seq_reserve(pair[1], pair[1]->length + 1));
    }
}

/* ---- runs ---- */

/* A sequence of a plain cache, as it may be when it is saved: steps, drafts, checkpoints. */
static kvt_seq *source(world *w, size_t most)
{
    kvt_seq *seq = NULL;
    expect_ok(w->caches[0], kvt_seq_create(w->caches[0], &seq));
    while (seq->length + 70 < most) {
        step(w, seq, 1 + rng_below(&w->r, 70), rng_below(&w->r, 3000));
        if (rng_below(&w->r, 3) == 0)
            expect_ok(w->caches[0], kvt_seq_truncate(seq, seq->length - seq->length % 3));
        if (rng_below(&w->r, 6) == 0)
            expect_ok(w->caches[0], kvt_seq_checkpoint(seq, NULL, 0));
    }
    return seq;
}

static void open_pair(world *w, size_t most)
{
    kvt_seq *from = source(w, most);
    w->seqs[0][0] = load(w->caches[0], from, NULL);
    w->seqs[0][1] = load(w->caches[1], from, &w->region);
    kvt_seq_destroy(from);
}

static void run(uint64_t seed)
{
    static world w;
    memset(&w, 0, sizeof w);
    w.seed = seed;
    w.r.state = seed * 7919 + 1;
    print_message("seed %llu\n", (unsigned long long)seed);
    make_caches(&w, seed, 1);
    open_pair(&w, 70 + rng_below(&w.r, 400));
    account(&w);
    for (size_t i = 0, n = is_quick() ? 20 : 120; i < n; i++) {
        kvt_seq **pair = w.seqs[rng_below(&w.r, PAIRS)];
        if (!pair[0])
            continue;
        change(&w, pair);
        if (pair[0])
            compare(&w, pair);
        account(&w);
    }
    for (size_t i = 0; i < PAIRS; i++) {
        destroy_pair(w.seqs[seed % 2 ? i : PAIRS - 1 - i]);
        account(&w);
    }
    assert_int_equal(w.region.closed, 1);
    close_caches(&w);
}

static void mapped_sequences_are_as_others(void **state)
{
    const char *given = getenv("KVT_TEST_SEED");
    uint64_t first = given ? strtoull(given, NULL, 10) : 1;
    (void)state;
    for (uint64_t seed = first; seed < first + (given ? 1 : is_quick() ? 10 : 100); seed++)
        run(seed);
}

/* What is reserved suffices, to the call: no allocation while the sequence grows. */
static void reserves_and_capacities_are_exact(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 40; seed++) {
        static world w;
        kvt_seq *seq;
        uint64_t to;
        memset(&w, 0, sizeof w);
        w.r.state = seed + 1;
        make_caches(&w, seed, 1);
        open_pair(&w, 80 + (size_t)(seed * 10));
        seq = w.seqs[0][1];
        to = seq->length + 1 + rng_below(&w.r, 200);
        if (seed % 2)
            expect_ok(seq->cache, kvt_seq_reserve(seq, to));
        to = seed % 2 ? to : kvt_seq_capacity(seq);
        w.ledgers[1].countdown = 0;
        while (seq->length < to) {
            size_t left = (size_t)(to - seq->length), n = 1 + rng_below(&w.r, 90);
            step(&w, seq, seed % 2 == 0 ? 1 : n < left ? n : left, 5);
        }
        w.ledgers[1].countdown = -1;
        destroy_pair(w.seqs[0]);
        close_caches(&w);
    }
}

/* A call verifies what it reads, once. */
static void layers_are_verified_when_they_are_read(void **state)
{
    static world w;
    float out[Q_HEADS * DIM];
    kvt_seq *seq, *copy = NULL;
    kvt_tensor x;
    (void)state;
    memset(&w, 0, sizeof w);
    make_caches(&w, 0, 1);
    open_pair(&w, 500);
    seq = w.seqs[0][1];
    x = kvt_tensor_f32(malloc(MOST * KV_HEADS * DIM * sizeof(float)));
    expect_ok(seq->cache, kvt_read(seq, 1, KVT_SIDE_K, 70, 10, &x));
    assert_int_equal(w.region.verified, 1);
    expect_ok(seq->cache, kvt_read(seq, 1, KVT_SIDE_V, 64, 65, &x));
    assert_int_equal(w.region.verified, 2);
    expect_ok(seq->cache, attend(&w, seq, 1, out));
    assert_int_equal(w.region.verified, seq->n_rows);
    expect_ok(seq->cache, attend(&w, seq, 1, out));
    expect_ok(seq->cache, kvt_seq_fork(seq, seq->length - 5, &copy));
    expect_ok(seq->cache, attend(&w, copy, 1, out));
    assert_int_equal(w.region.verified, seq->n_rows);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        expect_ok(seq->cache, attend(&w, copy, layer, out));
    assert_int_equal(w.region.verified, LAYERS * seq->n_rows);
    assert_int_equal(copy->verified[0], (1 << LAYERS) - 1);
    free(x.data);
    expect_ok(copy->cache, kvt_seq_clear(copy));
    assert_false(copy->has_mapped);
    kvt_seq_destroy(copy);
    destroy_pair(w.seqs[0]);
    close_caches(&w);
}

/* A begin after a load has much to verify: the executor's threads share it. */
static void verification_is_shared_out(void **state)
{
    static world w;
    size_t count = 0, before;
    kvt_seq *seq;
    (void)state;
    memset(&w, 0, sizeof w);
    make_caches_with(&w, 0, 3, &count);
    open_pair(&w, 500);
    seq = w.seqs[0][1];
    before = count;
    expect_ok(seq->cache, kvt_seq_verify_rows(seq, 0, 1, seq->n_rows));
    assert_int_equal(count - before, LAYERS / 2 * (seq->n_rows - 1));
    assert_int_equal(w.region.verified, count - before);
    expect_ok(seq->cache, kvt_seq_verify_rows(seq, 0, 0, seq->n_rows));
    assert_int_equal(w.region.verified, LAYERS / 2 * seq->n_rows);
    before = count;
    expect_ok(seq->cache, kvt_seq_verify_rows(seq, 0, 0, seq->n_rows));
    expect_ok(seq->cache, kvt_seq_verify_layer(seq, 0));
    assert_int_equal(count, before);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        expect_equal_attend(&w, w.seqs[0], layer);
    destroy_pair(w.seqs[0]);
    close_caches(&w);
}

/* ---- damage ---- */

/* Whether a step of n tokens reads a row's block of a group. */
static int step_reads(const kvt_seq *seq, uint32_t g, size_t row, size_t n)
{
    const kvt_group *group = &seq->cache->groups[g];
    if (row + 1 == seq->n_rows && (group->seals || seq->length % 64))
        return 1;
    if (row == 0 && group->offsets)
        return 1;
    return group->seals && row >= seq->groups[g].n_sealed &&
           row < kvt_rows_older(seq->length + n, group->residual_tokens);
}

/* A call that meets a damaged layer fails, and leaves all as it was. */
static void check_damage(world *w, uint32_t g, size_t row, uint32_t layer_index, size_t n)
{
    kvt_seq **pair = w->seqs[0];
    kvt_block *block = kvt_seq_block(pair[1], row, g);
    const kvt_group *group = &pair[1]->cache->groups[g];
    const size_t layer_bytes = kvt_block_layout(group, block)->layer_bytes;
    const uint32_t bad = g * (LAYERS / 2) + layer_index;
    float out[Q_HEADS * DIM], as_was[Q_HEADS * DIM], row_out[KV_HEADS * DIM];
    kvt_tensor x = kvt_tensor_f32(row_out);
    kvt_seq_stats before = {.struct_size = sizeof before}, behind = before;
    kvt_attend_item item = {.seq = pair[1], .n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_plan plan;

    protect(&w->region, 1);
    block->data[layer_index * layer_bytes + rng_below(&w->r, (uint32_t)layer_bytes)] ^= 4;
    protect(&w->region, 0);
    expect_ok(pair[1]->cache, kvt_seq_get_stats(pair[1], &before));
    memset(out, 0x5a, sizeof out);
    memcpy(as_was, out, sizeof out);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        if (layer != bad) {
            expect_equal_attend(w, pair, layer);
            continue;
        }
        for (int again = 0; again < 2; again++) {
            expect(pair[1]->cache, KVT_ERR_CORRUPT, attend(w, pair[1], layer, out));
            assert_memory_equal(out, as_was, sizeof out);
        }
    }
    args.layer = bad;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(w->numbers);
    args.out = kvt_tensor_f32(out);
    expect(pair[1]->cache, KVT_ERR_CORRUPT, kvt_attend_plan_init(&plan, pair[1]->cache, &args));
    for (size_t r = pair[1]->groups[g].first; r < pair[1]->n_rows; r++)
        expect(pair[1]->cache, r == row ? KVT_ERR_CORRUPT : KVT_OK,
               kvt_read(pair[1], bad, KVT_SIDE_K, r * 64, 1, &x));
    if (step_reads(pair[1], g, row, n)) {
        expect(pair[1]->cache, KVT_ERR_CORRUPT, kvt_seq_begin(pair[1], n, NULL));
        assert_int_equal(kvt_seq_pending(pair[1]), 0);
        expect_ok(pair[1]->cache, kvt_seq_get_stats(pair[1], &behind));
        assert_memory_equal(&before, &behind, sizeof before);
        w->refused++;
    } else {
        for (int i = 0; i < 2; i++)
            step(w, pair[i], n, 17);
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            if (layer != bad)
                expect_equal_attend(w, pair, layer);
    }
    account(w);
}

static void damage_is_met_before_it_is_used(void **state)
{
    static const size_t steps[] = {1, 64, 200};
    size_t refused = 0, went_on = 0;
    (void)state;
    for (uint64_t kind = 0; kind < 10; kind++) {
        size_t rows = 1;
        for (size_t i = 0; i < rows * 2 * 3; i++) {
            static world w;
            memset(&w, 0, sizeof w);
            w.r.state = kind + 1;
            make_caches(&w, kind, 1);
            open_pair(&w, 330);
            rows = w.seqs[0][1]->n_rows;
            if (kvt_seq_block(w.seqs[0][1], i / 6, (uint32_t)(i / 3 % 2))) {
                check_damage(&w, (uint32_t)(i / 3 % 2), i / 6, (uint32_t)(i % 2), steps[i % 3]);
                refused += w.refused;
                went_on += !w.refused;
            }
            destroy_pair(w.seqs[0]);
            close_caches(&w);
        }
    }
    assert_true(refused > 50 && went_on > 50);
}

/* A removal that would copy what is damaged. */
static void damage_stays_out_of_a_removal(void **state)
{
    static world w;
    kvt_seq *seq;
    kvt_block *block;
    uint64_t length;
    (void)state;
    memset(&w, 0, sizeof w);
    make_caches(&w, 1, 1);
    open_pair(&w, 330);
    seq = w.seqs[0][1];
    length = seq->length;
    block = kvt_seq_block(seq, seq->n_rows - 1, 1);
    protect(&w.region, 1);
    block->data[3] ^= 1;
    protect(&w.region, 0);
    expect(seq->cache, KVT_ERR_CORRUPT, kvt_seq_remove(seq, length - 2, 1));
    assert_int_equal(seq->length, length);
    expect_ok(seq->cache, kvt_seq_truncate(seq, length - 64));
    destroy_pair(w.seqs[0]);
    account(&w);
    close_caches(&w);
}

/* What only a checkpoint has is verified when the sequence has gone back there. */
static void damage_of_a_checkpoint(void **state)
{
    static world w;
    float out[Q_HEADS * DIM];
    kvt_seq *from = NULL, *seq;
    kvt_block *block;
    (void)state;
    memset(&w, 0, sizeof w);
    make_caches(&w, 0, 1);
    expect_ok(w.caches[0], kvt_seq_create(w.caches[0], &from));
    step(&w, from, 200, 0);
    expect_ok(w.caches[0], kvt_seq_checkpoint(from, NULL, 0));
    step(&w, from, 100, 0);
    seq = w.seqs[0][1] = load(w.caches[1], from, &w.region);
    kvt_seq_destroy(from);
    block = kvt_checkpoint_blocks(seq->checkpoints[0], 0)[3 - seq->checkpoints[0]->from[0]];
    assert_true(block != kvt_seq_block(seq, 3, 0) && block->mapping);
    protect(&w.region, 1);
    block->data[5] ^= 1;
    protect(&w.region, 0);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        expect_ok(seq->cache, attend(&w, seq, layer, out));
    expect_ok(seq->cache, kvt_seq_truncate(seq, 200));
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        expect(seq->cache, layer ? KVT_OK : KVT_ERR_CORRUPT, attend(&w, seq, layer, out));
    expect(seq->cache, KVT_ERR_CORRUPT, kvt_seq_begin(seq, 1, NULL));
    kvt_seq_destroy(seq);
    w.seqs[0][1] = NULL;
    assert_int_equal(w.region.closed, 1);
    close_caches(&w);
}

/* ---- threads ---- */

typedef struct attender {
    const world *w;
    kvt_seq *seq;
    float out[LAYERS][Q_HEADS * DIM];
} attender;

static void *attend_all(void *arg)
{
    attender *a = arg;
    for (int again = 0; again < 3; again++)
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            if (attend(a->w, a->seq, layer, a->out[layer]) != KVT_OK)
                return NULL;
    return arg;
}

/* Two threads attend over one sequence, two over its fork, which one of them destroys. */
static void threads_attend_at_once(void **state)
{
    (void)state;
    for (uint64_t kind = 0; kind < 5; kind++) {
        static world w;
        static attender a[5];
        pthread_t threads[4];
        kvt_seq *copy = NULL;
        memset(&w, 0, sizeof w);
        make_caches(&w, kind, 2);
        open_pair(&w, 600);
        expect_ok(w.caches[1], kvt_seq_fork(w.seqs[0][1], w.seqs[0][1]->length, &copy));
        for (int i = 0; i < 5; i++)
            a[i] = (attender){.w = &w, .seq = i == 4 ? w.seqs[0][0] : i < 2 ? w.seqs[0][1] : copy};
        for (int i = 0; i < 4; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, attend_all, &a[i]), 0);
        assert_non_null(attend_all(&a[4]));
        for (int i = 0; i < 4; i++) {
            void *result;
            assert_int_equal(pthread_join(threads[i], &result), 0);
            assert_non_null(result);
            assert_memory_equal(a[i].out, a[4].out, sizeof a[i].out);
        }
        destroy_pair(w.seqs[0]);
        assert_int_equal(w.region.closed, 0);
        kvt_seq_destroy(copy);
        assert_int_equal(w.region.closed, 1);
        close_caches(&w);
    }
}

/* ---- the mapping itself ---- */

static void mappings_end_with_their_last_reference(void **state)
{
    static world w;
    region *r = &w.region;
    kvt_mapping *mapping = NULL;
    kvt_block *blocks[2];
    (void)state;
    for (int order = 0; order < 6; order++) {
        memset(&w, 0, sizeof w);
        make_caches(&w, 0, 1);
        open_region(r, 1 << 20);
        w.ledgers[1].countdown = 0;
        expect(w.caches[1], KVT_ERR_MEMORY, kvt_mapping_create(w.caches[1], 2, &mapping));
        w.ledgers[1].countdown = -1;
        expect(w.caches[1], KVT_ERR_LIMIT,
               kvt_mapping_create(w.caches[1], SIZE_MAX / 64, &mapping));
        expect_ok(w.caches[1], kvt_mapping_create(w.caches[1], 2, &mapping));
        mapping->user = r;
        mapping->close = close_region;
        for (size_t i = 0; i < 2; i++) {
            blocks[i] = kvt_mapping_block(mapping, i, 0, r->memory + i * 65536, 1);
            assert_int_equal(kvt_block_verify(blocks[i], 0), KVT_OK);
            assert_false(kvt_block_is_own(w.caches[1], blocks[i]));
        }
        for (int i = 0; i < 3; i++) {
            assert_int_equal(r->closed, 0);
            switch ((order / 2 + (order % 2 ? i : 3 - i)) % 3) {
            case 0: kvt_mapping_put(mapping); break;
            case 1: kvt_block_put(w.caches[1], blocks[0]); break;
            default: kvt_block_free(w.caches[1], blocks[1]); break;
            }
        }
        assert_int_equal(r->closed, 1);
        kvt_mapping_put(NULL);
        account(&w);
        close_caches(&w);
    }
}

/* As where a sequence is of several files: both are closed when it goes. */
static void mappings_end_together(void **state)
{
    static world w;
    region regions[2];
    kvt_block *blocks[2];
    (void)state;
    memset(&w, 0, sizeof w);
    make_caches(&w, 0, 1);
    for (int i = 0; i < 2; i++) {
        kvt_mapping *mapping = NULL;
        open_region(&regions[i], 1 << 20);
        expect_ok(w.caches[1], kvt_mapping_create(w.caches[1], 1, &mapping));
        mapping->user = &regions[i];
        mapping->close = close_region;
        blocks[i] = kvt_mapping_block(mapping, 0, 0, regions[i].memory, 1);
        kvt_mapping_put(mapping);
    }
    pthread_mutex_lock(&w.caches[1]->lock);
    for (int i = 0; i < 2; i++)
        kvt_block_put_locked(w.caches[1], blocks[i]);
    assert_int_equal(regions[0].closed + regions[1].closed, 0);
    kvt_block_unlock(w.caches[1]);
    assert_int_equal(regions[0].closed, 1);
    assert_int_equal(regions[1].closed, 1);
    close_caches(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mappings_end_with_their_last_reference),
        cmocka_unit_test(mappings_end_together),
        cmocka_unit_test(mapped_sequences_are_as_others),
        cmocka_unit_test(reserves_and_capacities_are_exact),
        cmocka_unit_test(layers_are_verified_when_they_are_read),
        cmocka_unit_test(verification_is_shared_out),
        cmocka_unit_test(damage_is_met_before_it_is_used),
        cmocka_unit_test(damage_stays_out_of_a_removal),
        cmocka_unit_test(damage_of_a_checkpoint),
        cmocka_unit_test(threads_attend_at_once),
    };
    return cmocka_run_group_tests_name("mapped", tests, NULL, NULL);
}
