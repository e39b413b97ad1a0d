/*
 * The floating-point environment of the library's own arithmetic: round to nearest, no flush to
 * zero, no traps, whatever the caller has set. Entered by every task that computes, and left
 * with the caller's settings (its sticky flags included).
 */
#ifndef KVT_FPENV_H
#define KVT_FPENV_H

#if defined(__x86_64__)
#include <xmmintrin.h>
typedef unsigned kvt_fpenv;
static inline kvt_fpenv kvt_fpenv_enter(void)
{
    kvt_fpenv saved = _mm_getcsr();
    _mm_setcsr(0x1f80); /* all exceptions masked, nearest, DAZ and FTZ off */
    return saved;
}
static inline void kvt_fpenv_leave(kvt_fpenv saved)
{
    _mm_setcsr(saved);
}
#elif defined(__aarch64__)
#include <stdint.h>
typedef struct kvt_fpenv {
    uint64_t control, status; /* FPCR; FPSR has the sticky flags */
} kvt_fpenv;
static inline kvt_fpenv kvt_fpenv_enter(void)
{
    kvt_fpenv saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved.control));
    __asm__ volatile("mrs %0, fpsr" : "=r"(saved.status) : : "memory");
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
    return saved;
}
static inline void kvt_fpenv_leave(kvt_fpenv saved)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(saved.control) : "memory");
    __asm__ volatile("msr fpsr, %0" : : "r"(saved.status) : "memory");
}
#else
#include <fenv.h>
typedef fenv_t kvt_fpenv;
static inline kvt_fpenv kvt_fpenv_enter(void)
{
    kvt_fpenv saved;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    return saved;
}
static inline void kvt_fpenv_leave(kvt_fpenv saved)
{
    fesetenv(&saved);
}
#endif

#endif /* KVT_FPENV_H */
