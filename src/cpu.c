/*
 * What this CPU can do. A feature counts only when the system saves its registers (XCR0).
 */
#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>

int kvt_cpu_has_avx2(void)
{
    const unsigned leaf1_needed = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA, OSXSAVE, AVX,
                                                                                F16C */
    unsigned eax, ebx, ecx, edx, xcr0, xcr0_high;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & leaf1_needed) != leaf1_needed)
        return 0;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
    if ((xcr0 & 6u) != 6u) /* xmm and ymm state */
        return 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & 1u << 5);
}
#else
typedef int kvt_cpu_is_empty; /* C has no empty files */
#endif
