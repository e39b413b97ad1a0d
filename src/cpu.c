/*
 * What this CPU can do. A feature counts only when the system saves its registers (XCR0). Those of
 * AMX a process has to ask Linux for. The permission is for the whole process and is never taken
 * back; from then on the system refuses an alternate signal stack which has no room for a frame
 * with tiles, in any thread. So it is asked for where AMX is to be used, not to find out about it.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* syscall */
#endif
#include "src/cpu.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>

/* Register states in XCR0. */
#define XCR0_AVX 0x6u     /* xmm, ymm */
#define XCR0_AVX512 0xe6u /* and opmasks, zmm */
#define XCR0_AMX 0x60000u /* tile configuration and data */

static uint32_t xcr0(void)
{
    unsigned eax, ebx, ecx, edx, high;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & 1u << 27)) /* OSXSAVE */
        return 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(high) : "c"(0));
    return eax;
}

/* Leaf 7 of cpuid; zeros where it does not exist. */
typedef struct leaf7 {
    unsigned eax, ebx, ecx, edx;
} leaf7;

static leaf7 leaf7_of(unsigned subleaf)
{
    leaf7 l = {0, 0, 0, 0};
    if (!__get_cpuid_count(7, subleaf, &l.eax, &l.ebx, &l.ecx, &l.edx))
        return (leaf7){0, 0, 0, 0};
    return l;
}

int kvt_cpu_has_avx2(void)
{
    const unsigned needed = 1u << 12 | 1u << 28 | 1u << 29; /* FMA, AVX, F16C */
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & needed) != needed)
        return 0;
    return (xcr0() & XCR0_AVX) == XCR0_AVX && (leaf7_of(0).ebx & 1u << 5);
}

/* cpuid is slow, in virtual machines above all. The answer is the same whoever finds it. */
int kvt_cpu_knows_avx2(void)
{
    static unsigned char known; /* 1: no, 2: yes */
    unsigned char answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (answer == 0) {
        answer = kvt_cpu_has_avx2() ? 2 : 1;
        __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
    }
    return answer == 2;
}

int kvt_cpu_has_avxvnni(void)
{
    return kvt_cpu_has_avx2() && leaf7_of(0).eax >= 1 && (leaf7_of(1).eax & 1u << 4);
}

int kvt_cpu_has_avx512vnni(void)
{
    const unsigned needed = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    leaf7 l = leaf7_of(0);
    return kvt_cpu_has_avx2() && (xcr0() & XCR0_AVX512) == XCR0_AVX512 &&
           (l.ebx & needed) == needed && (l.ecx & 1u << 11);
}

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* asm/prctl.h, which older systems lack. */
#define ARCH_GET_XCOMP_SUPP 0x1021
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

int kvt_cpu_has_amx(void)
{
    const unsigned needed = 1u << 24 | 1u << 25; /* AMX-TILE, AMX-INT8 */
    uint64_t supported = 0;
    if (!kvt_cpu_has_avx512vnni() || (leaf7_of(0).edx & needed) != needed ||
        (xcr0() & XCR0_AMX) != XCR0_AMX)
        return 0;
    return syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &supported) == 0 &&
           supported >> XFEATURE_XTILEDATA & 1;
}

int kvt_cpu_take_amx(void)
{
    return kvt_cpu_has_amx() &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
int kvt_cpu_has_amx(void)
{
    return 0;
}

int kvt_cpu_take_amx(void)
{
    return 0;
}
#endif

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* asm/hwcap.h, which older systems lack. */
#define HWCAP_DOTPROD (1ul << 20)
#define HWCAP2_INT8MM (1ul << 13)

int kvt_cpu_has_dotprod(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_DOTPROD) != 0;
}

int kvt_cpu_has_i8mm(void)
{
    return kvt_cpu_has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_INT8MM) != 0;
}

#elif defined(__aarch64__)

/* Apple's systems: every processor they run on has dot products, matrix products only newer ones.
 */
int kvt_cpu_has_dotprod(void)
{
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#else
    return 0;
#endif
}

int kvt_cpu_has_i8mm(void)
{
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return 1;
#else
    return 0;
#endif
}
#else
typedef int kvt_cpu_is_empty; /* C has no empty files */
#endif
