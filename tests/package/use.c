/*
 * What somebody else's program does with kvtile, as C or as C++: a little of everything that makes
 * the library need what it is linked with. KVTILE_VERSION is what the package says it is.
 */
#include <kvtile/kvtile.h>
#include <kvtile/store.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);                             \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

static float k[100][2][64], v[100][2][64], q[8][64], out[8][64];

/* As far as the library was built with what stores need; nothing listens at the port. */
static int use_stores(const kvt_seq *seq)
{
    kvt_directory_config directory;
    kvt_redis_config redis;
    kvt_prefix_result result;
    kvt_store store;
    kvt_status status;

    memset(&store, 0, sizeof store);
    memset(&directory, 0, sizeof directory);
    directory.struct_size = sizeof directory;
    directory.path = "use.store";
    status = kvt_store_open_directory(&directory, &store);
    CHECK(status == KVT_OK || status == KVT_ERR_UNSUPPORTED);
    if (status == KVT_OK) {
        status = kvt_prefix_put(&store, seq, NULL, &result);
        CHECK(status == KVT_OK || status == KVT_ERR_UNSUPPORTED);
    }
    kvt_store_close(&store);

    memset(&redis, 0, sizeof redis);
    redis.struct_size = sizeof redis;
    redis.port = 1;
    status = kvt_store_open_redis(&redis, &store);
    CHECK(status == KVT_OK || status == KVT_ERR_UNSUPPORTED);
    if (status == KVT_OK) {
        kvt_store_key key;
        uint8_t found;
        kvt_store_error error;
        memset(&key, 0, sizeof key);
        CHECK(store.exists(store.user, &key, 1, &found, &error) == KVT_ERR_IO);
    }
    kvt_store_close(&store);
    return 0;
}

static int use(uint32_t n_threads)
{
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_item item;
    kvt_tensor keys = kvt_tensor_f32(k[0][0]), values = kvt_tensor_f32(v[0][0]);
    kvt_snapshot_info info;
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    kvt_status status;
    float sinks[8];
    size_t h;

    group.n_layers = 1;
    group.n_q_heads = 8;
    group.n_kv_heads = 2;
    group.k_dim = group.v_dim = 64;
    group.k_type = group.v_type = KVT_TYPE_I8;
    config.groups = &group;
    config.n_groups = 1;
    config.n_threads = n_threads;
    config.max_tokens = 4096;
    status = kvt_cache_create(&config, &cache);
    if (n_threads > 1 && status == KVT_ERR_UNSUPPORTED)
        return 0; /* built without a pool */
    CHECK(status == KVT_OK);
    CHECK(kvt_seq_create(cache, &seq) == KVT_OK);
    CHECK(kvt_seq_begin(seq, 100, NULL) == KVT_OK);
    CHECK(kvt_append(seq, 0, &keys, &values) == KVT_OK);

    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.n_queries = 1;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q[0]);
    args.out = kvt_tensor_f32(out[0]);
    CHECK(kvt_attend(cache, &args) == KVT_OK);
    CHECK(out[7][63] > 0.99f && out[7][63] < 1.01f);
    /* -ffast-math of the project around would let this pass. */
    for (h = 0; h < 8; h++)
        sinks[h] = strtof("-inf", NULL);
    args.sink_logits = sinks;
    CHECK(kvt_attend(cache, &args) == KVT_ERR_VALUE);

    CHECK(kvt_seq_commit(seq, NULL) == KVT_OK);
    CHECK(kvt_seq_save(seq, "use.kvt", NULL) == KVT_OK);
    info.struct_size = sizeof info;
    CHECK(kvt_snapshot_inspect("use.kvt", 1, &info, NULL, 0) == KVT_OK);
    CHECK(info.n_tokens == 100);
    CHECK(use_stores(seq) == 0);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return 0;
}

int main(void)
{
    size_t t, h, d;
    for (t = 0; t < 100; t++)
        for (h = 0; h < 2; h++)
            for (d = 0; d < 64; d++)
                k[t][h][d] = v[t][h][d] = 1.0f;
    CHECK(strcmp(kvt_version(), KVTILE_VERSION) == 0);
    CHECK(use(1) == 0);
    CHECK(use(2) == 0);
    return 0;
}
