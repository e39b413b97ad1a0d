/*
 * The scalar kernels of 4- and 5-bit codes: scalar_4bit.c, for the table in scalar.c.
 */
#ifndef KVT_SCALAR_4BIT_H
#define KVT_SCALAR_4BIT_H

#include "simd/kernels.h"

#define KVT_KERNEL_PROTOTYPE(result, name, parameters) result kvt_scalar_##name parameters;
KVT_KERNELS_4BIT(KVT_KERNEL_PROTOTYPE)
#undef KVT_KERNEL_PROTOTYPE

#endif /* KVT_SCALAR_4BIT_H */
