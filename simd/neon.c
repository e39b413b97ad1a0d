/*
 * NEON (armv8-a).
 */
#include "kernels.h"

const kvt_kernels kvt_kernels_neon = {
    .isa = "neon",
};
