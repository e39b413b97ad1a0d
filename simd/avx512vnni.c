/*
 * AVX-512 with VNNI.
 */
#include "kernels.h"

const kvt_kernels kvt_kernels_avx512vnni = {
    .isa = "avx512vnni",
};
