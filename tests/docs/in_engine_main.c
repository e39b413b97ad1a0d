/* Around the first part of engine.md. */
#include <kvtile/kvtile.h>
#include <stdio.h>

int main(void)
{
    /* BLOCK */
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return 0;
}
