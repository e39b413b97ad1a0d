/*
 * What this CPU can do.
 */
#ifndef KVT_CPU_H
#define KVT_CPU_H

/* Whether this CPU has what a table needs, with the registers saved by the system. */
#if defined(__x86_64__)
int kvt_cpu_has_avx2(void);       /* AVX2, FMA and F16C */
int kvt_cpu_knows_avx2(void);     /* the same, found out once: without a cache to keep it in */
int kvt_cpu_has_avxvnni(void);    /* and AVX-VNNI */
int kvt_cpu_has_avx512vnni(void); /* AVX-512 F, BW, DQ, VL and VNNI */
int kvt_cpu_has_amx(void);        /* and AMX int8, which a process has to be permitted to use */
int kvt_cpu_take_amx(void);       /* get that permission, for good; 0: no AMX, or refused */
#elif defined(__aarch64__)
int kvt_cpu_has_dotprod(void);
int kvt_cpu_has_i8mm(void);
#endif

#endif /* KVT_CPU_H */
