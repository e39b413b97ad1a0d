/*
 * libFuzzer's entry point, of the target that KVT_FUZZ_TARGET names.
 */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    return KVT_FUZZ_TARGET(data, size);
}
