/*
 * libFuzzer's mutator for tinylm's models: the header's numbers stay small, and mostly the file is
 * as long as they make it.
 */
#include "fuzz.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed)
{
    uint64_t v[7], n, layer;
    size_t begin;
    int ours, shared;

    size = LLVMFuzzerMutate(data, size, room);
    ours = size >= 4 && memcmp(data, "TLM1", 4) == 0;
    begin = ours ? 4 : 0;
    if (seed % 4 == 0 || size < begin + 28)
        return size;
    if (seed % 4 == 1) { /* a small number */
        unsigned char *field = data + begin + 4 * (seed / 4 % 7);
        store32(field, seed / 64 % 17);
        if (seed / 4 % 7 == 5 && seed & 1 << 20)
            store32(field, 0 - load32(field));
    }
    for (int i = 0; i < 7; i++)
        v[i] = load32(data + begin + 4 * i);
    shared = v[5] < 0x80000000;
    v[5] = shared ? v[5] : (uint32_t)(0 - (uint32_t)v[5]);
    if (!v[3] || v[0] > 64 || v[1] > 64 || v[2] > 8 || v[4] > 64 || v[5] > 64 || v[6] > 64)
        return size;
    layer = 2 * v[0] + 2 * v[0] * v[0] + 2 * v[0] * (v[0] / v[3] * v[4]) + 3 * v[0] * v[1];
    n = v[5] * v[0] * (shared ? 1 : 2) + v[2] * layer + v[0] + (ours ? 0 : v[6] * (v[0] / v[3]));
    n = n * (ours ? 2 : 4) + begin + 28;
    if (n > room)
        return size;
    if (n > size)
        memset(data + size, 0, (size_t)n - size);
    return (size_t)n;
}
