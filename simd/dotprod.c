/*
 * NEON with dot products (armv8.2-a+dotprod).
 */
#include "kernels.h"

const kvt_kernels kvt_kernels_dotprod = {
    .isa = "dotprod",
};
