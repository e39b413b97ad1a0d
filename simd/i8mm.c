/*
 * NEON with matrix products of int8 (armv8.2-a+i8mm).
 */
#include "kernels.h"

const kvt_kernels kvt_kernels_i8mm = {
    .isa = "i8mm",
};
