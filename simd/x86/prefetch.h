/*
 * Asking memory for what will be read (kernels.h, "next"), on x86.
 *
 * A prefetch is a wish: a core that has too many under way forgets it, and the product later waits
 * for that line for the whole latency of memory. So a product that can keep up with memory asks for
 * a line twice, a product and half a product before it is read.
 *
 * And an out-of-order core asks in bursts: while one line of codes is on its way it runs on through
 * the loop, and asks for all the lines that its window holds. So where memory is the slower one,
 * the first request waits for a line that the product reads now: requests go out as lines come in.
 * A product that multiplies for longer needs neither, and would only be delayed.
 */
#ifndef KVT_PREFETCH_H
#define KVT_PREFETCH_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Cycles of multiplication for each line of codes up to which requests wait, and are made twice. */
#define KVT_PREFETCH_WAITS 4
#define KVT_PREFETCH_TWICE 8

/*
 * cycles: of multiplication for each line, a constant. here: codes that are read now. next: the
 * line to ask for. again: one that was asked for before. To the second level, as the codes of two
 * sides need not fit the first.
 */
static inline __attribute__((always_inline)) void kvt_prefetch_line(size_t cycles, const void *here,
                                                                    uintptr_t next, uintptr_t again)
{
    if (cycles <= KVT_PREFETCH_WAITS) {
        uint32_t zero;
        memcpy(&zero, here, sizeof zero);
        __asm__("andl $0, %0" : "+r"(zero) : : "cc"); /* the compiler must not know that it is 0 */
        next += zero;
    }
    _mm_prefetch((const char *)next, _MM_HINT_T1);
    if (cycles <= KVT_PREFETCH_TWICE)
        _mm_prefetch((const char *)again, _MM_HINT_T1);
}

#endif /* KVT_PREFETCH_H */
