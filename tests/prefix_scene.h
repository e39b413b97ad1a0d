/*
 * A cache, a store in memory, a sequence whose prefix is put and one to get it into: what the tests
 * of a store's prefixes and of its keys share.
 */
#ifndef KVT_TEST_PREFIX_SCENE_H
#define KVT_TEST_PREFIX_SCENE_H

#include "store_scenes.h"

typedef struct prefix_scene {
    subject s;
    memory_store m;
    kvt_store store;
    kvt_seq *source, *to;
    int32_t prompt[MOST + 1];
} prefix_scene;

enum { TOKENS = 300, SEALED = 192 }; /* of a source, and of them what is put */

/* The source has n tokens, whose prefix has been put. */
void prefix_open(prefix_scene *c, size_t geometry, uint64_t n);
void prefix_close(prefix_scene *c);
/* What a get gives, which is what a probe says; the sequence is cleared. */
uint64_t prefix_get(prefix_scene *c, const int32_t *prompt, uint64_t n,
                    const kvt_prefix_options *options);

#endif
