/* Around the executor of threads.md: a cache with it attends as one without. */
#include "engine.h"

#include <pthread.h>
#include <stdatomic.h>

/* BLOCK */

int main(void)
{
    static float first[sizeof att / sizeof *att];
    for (int with = 0; with < 2; with++) {
        kvt_group_config group = kvt_group_config_init();
        group.n_layers = 1;
        group.n_q_heads = Q_HEADS;
        group.n_kv_heads = KV_HEADS;
        group.k_dim = group.v_dim = DIM;
        group.k_type = group.v_type = KVT_TYPE_I8;
        kvt_config config = kvt_config_init();
        config.groups = &group;
        config.n_groups = 1;
        config.max_tokens = 8192;
        if (with)
            config.executor = two_threads;
        kvt_cache *cache = NULL;
        kvt_seq *seq = NULL;
        if (kvt_cache_create(&config, &cache) || kvt_seq_create(cache, &seq))
            return 1;
        kvt_tensor keys = kvt_tensor_f32(k), values = kvt_tensor_f32(v);
        for (int32_t step = 0; step < 20; step++) {
            int32_t ids[MAX_STEP];
            for (int i = 0; i < MAX_STEP; i++)
                ids[i] = (step * MAX_STEP + i) % N_VOCAB;
            embed(ids, MAX_STEP);
            project(0, MAX_STEP, step * MAX_STEP);
            if (kvt_seq_begin(seq, MAX_STEP, NULL) || kvt_append(seq, 0, &keys, &values) ||
                kvt_seq_commit(seq, ids))
                return 1;
        }
        kvt_attend_item item = {.seq = seq, .n_queries = MAX_STEP};
        kvt_attend_args args = kvt_attend_args_init();
        args.flags = KVT_ATTEND_CAUSAL;
        args.items = &item;
        args.n_items = 1;
        args.q = kvt_tensor_f32(q);
        args.out = kvt_tensor_f32(att);
        if (kvt_attend(cache, &args))
            return 1;
        if (with && memcmp(first, att, sizeof att) != 0)
            return 1;
        memcpy(first, att, sizeof att);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    (void)best_token, (void)feed_forward, (void)create;
    return 0;
}
