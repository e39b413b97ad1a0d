/* Around the loop over layers of engine.md. */
#include "engine.h"

/* BLOCK */

/* The same prompt in one step and in pieces, whose last output has to be the same. */
int main(void)
{
    float last[2][WIDTH];
    int32_t ids[100];
    for (int i = 0; i < 100; i++)
        ids[i] = i * 7 % N_VOCAB;
    for (int run = 0; run < 2; run++) {
        kvt_cache *cache = NULL;
        kvt_seq *seq = NULL;
        if (create(&cache, &seq))
            return 1;
        for (uint64_t done = 0, n = run ? 33 : 100; done < 100; done += n) {
            n = n < 100 - done ? n : 100 - done;
            if (forward(cache, seq, ids + done, n) != KVT_OK)
                return 1;
            memcpy(last[run], x[n - 1], sizeof last[run]);
        }
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
    (void)best_token;
    return memcmp(last[0], last[1], sizeof last[0]) != 0;
}
