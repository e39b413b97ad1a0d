/*
 * As in_cache.c, for blocks that have functions of their own: the block stands outside of any, and
 * defines run(void), which finds the cache of two layers and the empty sequence.
 */
#define main main_of_in_cache
#include "in_cache.c"
#undef main

/* BLOCK */

int main(void)
{
    kvt_group_config group = the_group();
    kvt_config config = kvt_config_init();
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 4096;
    ok(kvt_cache_create(&config, &cache));
    ok(kvt_seq_create(cache, &seq));
    run();
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return 0;
}
