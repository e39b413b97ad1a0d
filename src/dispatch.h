/*
 * The choice of the kernel table.
 */
#ifndef KVT_DISPATCH_H
#define KVT_DISPATCH_H

#include "simd/kernels.h"

/*
 * Fill the table for a name of kvt_isa_name (NULL: the widest); 0 when there is none here. uses: it
 * will be used; where it is AMX's, the process gets the permission that its registers need, and
 * another table, or none, is the answer where the system refuses it (src/cpu.c).
 */
int kvt_dispatch(const char *isa, int uses, kvt_kernels *kernels);

#endif /* KVT_DISPATCH_H */
