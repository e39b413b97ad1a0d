/*
 * The choice of the kernel table.
 */
#ifndef KVT_DISPATCH_H
#define KVT_DISPATCH_H

#include "simd/kernels.h"

/* Fill the table for a name of kvt_isa_name (NULL: the widest); 0 when there is none here. */
int kvt_dispatch(const char *isa, kvt_kernels *kernels);

#endif /* KVT_DISPATCH_H */
