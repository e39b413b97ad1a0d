/*
 * Asking memory for what will be read (kernels.h, "next"), on x86.
 *
 * A prefetch is a wish: a core that has too many under way forgets it, and the product later waits
 * for that line for the whole latency of memory. So a line is asked for twice, a product and half a
 * product before it is read.
 *
 * And an out-of-order core asks in bursts: while one line of codes is on its way it runs on through
 * the loop, and asks for all the lines that its window holds. Where a product multiplies faster
 * than memory reads, the first request therefore waits for a line that the product reads now:
 * requests go out as lines come in. Where multiplication is what takes the time, this would only
 * delay them.
 */
#ifndef KVT_ASK_H
#define KVT_ASK_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* Multiplications of a vector for each line up to which memory is the slower one. */
#define KVT_ASK_WAITS 4

/*
 * here: codes that are read now. next: the line to ask for, once they are there if `waits`. again:
 * a line that was asked for before. To the second level, as the codes of two sides need not fit the
 * first.
 */
static inline __attribute__((always_inline)) void kvt_ask_line(int waits, const void *here,
                                                               uintptr_t next, uintptr_t again)
{
    if (waits) {
        uint32_t zero;
        memcpy(&zero, here, sizeof zero);
        __asm__("andl $0, %0" : "+r"(zero) : : "cc"); /* the compiler must not know that it is 0 */
        next += zero;
    }
    _mm_prefetch((const char *)next, _MM_HINT_T1);
    _mm_prefetch((const char *)again, _MM_HINT_T1);
}

#endif /* KVT_ASK_H */
