#include "snapshot_support.h"

#include <xxhash.h>

/* ---- allocator ---- */

static void *counter_alloc(void *user, size_t n, size_t alignment)
{
    counter *c = user;
    void *memory;
    if (c->countdown == 0)
        return NULL;
    if (c->countdown > 0)
        c->countdown--;
    memory = aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
    c->live += memory != NULL;
    return memory;
}

static void counter_free(void *user, void *memory, size_t n)
{
    counter *c = user;
    (void)n;
    c->live -= memory != NULL;
    free(memory);
}

/* ---- models ---- */

model model_of(uint32_t layers, uint32_t kv_heads, uint32_t k_dim, uint32_t v_dim, kvt_type k_type,
               kvt_type v_type)
{
    model m;
    memset(&m, 0, sizeof m);
    m.groups[0] = group_of(layers, 2 * kv_heads, kv_heads, k_dim, v_dim, k_type, v_type);
    for (uint32_t i = 0; i < layers; i++)
        m.layers[0][i] = i;
    m.n_groups = 1;
    m.max_tokens = 512;
    m.fingerprint = "test model";
    return m;
}

model model_of_two(void)
{
    model m = model_of(2, 2, 80, 96, KVT_TYPE_I8, KVT_TYPE_I8);
    m.groups[1] = group_of(2, 3, 1, 16, 8, KVT_TYPE_F16, KVT_TYPE_F32);
    m.n_groups = 2;
    m.layers[0][1] = 2;
    m.layers[1][0] = 1;
    m.layers[1][1] = 3;
    return m;
}

kvt_config model_config(const model *m, kvt_group_config *groups)
{
    kvt_config config = kvt_config_init();

    for (uint32_t g = 0; g < m->n_groups; g++) {
        groups[g] = m->groups[g];
        groups[g].layers = m->layers[g];
    }
    config.groups = groups;
    config.n_groups = m->n_groups;
    config.max_tokens = m->max_tokens;
    config.fingerprint = m->fingerprint;
    config.fingerprint_bytes = strlen(m->fingerprint);
    config.memory_budget_bytes = m->budget_bytes;
    config.n_threads = m->n_threads;
    if (m->ledger)
        config.allocator = ledger_allocator(m->ledger);
    if (m->counter) {
        config.allocator.user = m->counter;
        config.allocator.alloc = counter_alloc;
        config.allocator.free = counter_free;
    }
    return config;
}

kvt_cache *model_cache(const model *m)
{
    kvt_group_config groups[2];
    kvt_config config = model_config(m, groups);
    kvt_cache *cache = NULL;
    char text[256] = "";

    config.error_text = text;
    config.error_text_bytes = sizeof text;
    if (kvt_cache_create(&config, &cache) != KVT_OK)
        fail_msg("kvt_cache_create: %s", text);
    return cache;
}

kvt_seq *model_seq(kvt_cache *cache)
{
    kvt_seq *seq = NULL;
    expect_ok(cache, kvt_seq_create(cache, &seq));
    return seq;
}

/* Row (layer, token) of K or V: roughly normal, K with an offset on some channels. */
static void fill_row(float *x, size_t n, uint32_t layer, uint64_t token, int is_k)
{
    rng r = {(uint64_t)layer << 40 ^ token << 1 ^ (uint64_t)is_k};
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)rng_normal(&r);
        if (is_k && i % 13 == 0)
            x[i] += 20.0f;
    }
}

void model_append(const model *m, kvt_cache *cache, kvt_seq *seq, size_t n, size_t step)
{
    while (n) {
        size_t here = n < step ? n : step;
        uint64_t first = kvt_seq_length(seq);
        int32_t *ids = malloc(here * sizeof *ids), *positions = malloc(here * sizeof *positions);
        assert_non_null(ids);
        assert_non_null(positions);
        for (size_t i = 0; i < here; i++) {
            ids[i] = (first + i) % 7 == 3 ? KVT_TOKEN_NONE : (int32_t)((first + i) * 11 % 1000);
            positions[i] = (int32_t)(first + i) * 2 + 1;
        }
        expect_ok(cache, kvt_seq_begin(seq, here, positions));
        for (uint32_t g = 0; g < m->n_groups; g++) {
            const kvt_group_config *group = &m->groups[g];
            size_t k_row = group->n_kv_heads * (size_t)group->k_dim;
            size_t v_row = group->n_kv_heads * (size_t)group->v_dim;
            float *k = malloc(here * k_row * sizeof *k), *v = malloc(here * v_row * sizeof *v);
            kvt_tensor k_view = kvt_tensor_f32(k), v_view = kvt_tensor_f32(v);
            assert_non_null(k);
            assert_non_null(v);
            for (uint32_t l = 0; l < group->n_layers; l++) {
                for (size_t i = 0; i < here; i++) {
                    fill_row(k + i * k_row, k_row, m->layers[g][l], first + i, 1);
                    fill_row(v + i * v_row, v_row, m->layers[g][l], first + i, 0);
                }
                expect_ok(cache, kvt_append(seq, m->layers[g][l], &k_view,
                                            group->flags & KVT_GROUP_V_IN_K ? NULL : &v_view));
            }
            free(k);
            free(v);
        }
        expect_ok(cache, kvt_seq_commit(seq, ids));
        free(ids);
        free(positions);
        n -= here;
    }
}

/* ---- bytes ---- */

static int bytes_write(void *user, const void *data, size_t n)
{
    bytes *b = user;
    if (b->fail_at == 0)
        return -1;
    if (b->fail_at > 0)
        b->fail_at--;
    if (b->n + n > b->room) {
        b->room = 2 * (b->n + n);
        b->data = realloc(b->data, b->room);
        assert_non_null(b->data);
    }
    memcpy(b->data + b->n, data, n);
    b->n += n;
    return 0;
}

static int64_t bytes_read(void *user, void *data, size_t n)
{
    bytes *b = user;
    if (n > b->n - b->at)
        n = b->n - b->at;
    if (b->most && n > b->most)
        n = b->most;
    if (n)
        memcpy(data, b->data + b->at, n);
    b->at += n;
    return (int64_t)n;
}

kvt_writer bytes_writer(bytes *b)
{
    kvt_writer w = {b, bytes_write};
    return w;
}

kvt_reader bytes_reader(bytes *b)
{
    kvt_reader r = {b, bytes_read};
    return r;
}

void bytes_free(bytes *b)
{
    free(b->data);
    memset(b, 0, sizeof *b);
}

bytes saved(const kvt_cache *cache, const kvt_seq *seq, uint32_t codec)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = codec;
    expect_ok(cache, kvt_seq_save_stream(seq, &writer, &options));
    return b;
}

kvt_status load_bytes(kvt_seq *seq, const unsigned char *data, size_t n, kvt_load_result *result)
{
    bytes b = {NULL, n, n, 0, -1, 0};
    kvt_reader reader = bytes_reader(&b);
    b.data = (unsigned char *)(uintptr_t)data;
    return kvt_seq_load_stream(seq, &reader, NULL, result);
}

/* ---- state ---- */

static uint64_t mix(uint64_t hash, const void *data, size_t n)
{
    return XXH64(data, n, hash);
}

static uint64_t attend_hash(kvt_cache *cache, const kvt_seq *seq, const kvt_group_config *group,
                            uint32_t layer, uint64_t hash)
{
    size_t n_q = group->n_q_heads * (size_t)group->k_dim;
    size_t n_out = group->n_q_heads * (size_t)group->v_dim;
    rng r = {layer + 99u};
    float *q = rng_normals(&r, n_q), *out = calloc(n_out, sizeof *out);
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_item item;

    assert_non_null(out);
    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.n_queries = 1;
    args.layer = layer;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    expect_ok(cache, kvt_attend(cache, &args));
    hash = mix(hash, out, n_out * sizeof *out);
    free(q);
    free(out);
    return hash;
}

uint64_t state_hash(const model *m, kvt_cache *cache, const kvt_seq *seq)
{
    uint64_t n = kvt_seq_length(seq), hash = mix(1, &n, sizeof n);
    int32_t *ints = calloc((size_t)n + 1, sizeof *ints);
    int32_t next = kvt_seq_next_position(seq);

    assert_non_null(ints);
    hash = mix(hash, &next, sizeof next);
    expect_ok(cache, kvt_seq_token_ids(seq, 0, n, ints));
    hash = mix(hash, ints, (size_t)n * sizeof *ints);
    expect_ok(cache, kvt_seq_positions(seq, 0, n, ints));
    hash = mix(hash, ints, (size_t)n * sizeof *ints);
    free(ints);
    for (uint32_t g = 0; g < m->n_groups; g++) {
        const kvt_group_config *group = &m->groups[g];
        for (uint32_t l = 0; l < group->n_layers; l++) {
            for (int side = 0; side < 2 && n; side++) {
                size_t dim = side ? group->v_dim : group->k_dim;
                size_t count = (size_t)n * group->n_kv_heads * dim;
                float *x = malloc(count * sizeof *x);
                kvt_tensor out = kvt_tensor_f32(x);
                assert_non_null(x);
                expect_ok(cache, kvt_read(seq, m->layers[g][l], (kvt_side)side, 0, n, &out));
                hash = mix(hash, x, count * sizeof *x);
                free(x);
            }
            if (n)
                hash = attend_hash(cache, seq, group, m->layers[g][l], hash);
        }
    }
    return hash;
}
