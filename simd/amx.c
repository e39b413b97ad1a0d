/*
 * AMX int8.
 */
#include "kernels.h"

const kvt_kernels kvt_kernels_amx = {
    .isa = "amx",
};
