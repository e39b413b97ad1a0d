/* Around what engine.md does with its loop over layers, which is in forward.c. */
#include "engine.h"

#include "forward.c"

int main(void)
{
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    if (create(&cache, &seq))
        return 1;
    {
        /* BLOCK */
    }(void)best_token;
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return 0;
}
