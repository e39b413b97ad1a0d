/* Around the plan of threads.md: its result is that of the one-call form. */
#include "engine.h"

#include <pthread.h>
#include <stdatomic.h>

/* BLOCK */

int main(void)
{
    static float first[sizeof att / sizeof *att];
    kvt_tensor keys = kvt_tensor_f32(k), values = kvt_tensor_f32(v);
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    int32_t ids[MAX_STEP];
    if (create(&cache, &seq) || kvt_seq_begin(seq, MAX_STEP, NULL))
        return 1;
    for (int i = 0; i < MAX_STEP; i++)
        ids[i] = i % N_VOCAB;
    embed(ids, MAX_STEP);
    project(0, MAX_STEP, 0);
    kvt_attend_item item = {.seq = seq, .n_queries = MAX_STEP};
    kvt_attend_args args = kvt_attend_args_init();
    args.flags = KVT_ATTEND_CAUSAL;
    args.items = &item;
    args.n_items = 1;
    args.n_threads = 2;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(att);
    if (kvt_append(seq, 0, &keys, &values) || kvt_attend(cache, &args))
        return 1;
    memcpy(first, att, sizeof att);
    memset(att, 0, sizeof att);
    if (attend_layer(cache, &args) || memcmp(first, att, sizeof att) != 0)
        return 1;
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    (void)best_token, (void)feed_forward;
    return 0;
}
