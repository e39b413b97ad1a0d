/*
 * Software prefetch of what will be read next (kernels.h, "next"), on x86.
 *
 * A prefetch is dropped when all line fill buffers are in use, and the later load then misses with
 * the full latency of memory. So a product that is bound by memory prefetches each line twice: a
 * whole block and half a product before it is read.
 *
 * An out-of-order core also issues prefetches in bursts: while a load of codes misses, it runs
 * ahead in the loop and issues the prefetches of its whole reorder window at once. So where memory
 * is the bottleneck, the address of the first prefetch is made to depend on a load of the current
 * codes: prefetches are issued at the rate at which lines arrive. A product that is bound by
 * arithmetic needs neither, and the dependency would only delay it.
 */
#ifndef KVT_PREFETCH_H
#define KVT_PREFETCH_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/*
 * Up to so many cycles of multiplication a line of codes, a prefetch depends on the current load
 * (WAITS), and is issued a second time (TWICE).
 */
#define KVT_PREFETCH_WAITS 4
#define KVT_PREFETCH_TWICE 8

/*
 * cycles: of multiplication for each line, a constant. here: codes that are read now. next: the
 * line to prefetch. again: one that was prefetched before. Into L2 (T1), as the codes of two sides
 * may exceed L1.
 */
static inline __attribute__((always_inline)) void kvt_prefetch_line(size_t cycles, const void *here,
                                                                    uintptr_t next, uintptr_t again)
{
    if (cycles <= KVT_PREFETCH_WAITS) {
        uint32_t zero;
        memcpy(&zero, here, sizeof zero);
        /* 0, opaque to the compiler, so that the dependency stays. */
        __asm__("andl $0, %0" : "+r"(zero) : : "cc");
        next += zero;
    }
    _mm_prefetch((const char *)next, _MM_HINT_T1);
    if (cycles <= KVT_PREFETCH_TWICE)
        _mm_prefetch((const char *)again, _MM_HINT_T1);
}

#endif /* KVT_PREFETCH_H */
