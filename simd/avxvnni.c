/*
 * AVX-VNNI: integer dot products of 256 bits.
 */
#include "kernels.h"

const kvt_kernels kvt_kernels_avxvnni = {
    .isa = "avxvnni",
};
