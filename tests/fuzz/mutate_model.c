/*
 * libFuzzer's mutator for tinylm's files. Models: the header's numbers stay small, and mostly the
 * file is as long as they make it. Tokenizers: mostly whole tokens, as many as are counted.
 */
#include "fuzz.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);

/* The tokens that are whole are counted, and what follows them is left out. */
static size_t mend_tokenizer(uint8_t *data, size_t size)
{
    size_t at = 5 + (size_t)data[4] + 4, n = 0;
    if (size < at)
        return size;
    store32(data + at - 4, 1 + load32(data + at - 4) % 64);
    while (n < 255 && size - at >= 8) {
        uint32_t length = load32(data + at + 4) % 16;
        if (length > size - at - 8)
            break;
        store32(data + at + 4, length);
        at += 8 + length;
        n++;
    }
    if (n == 0)
        return size;
    data[3] = (uint8_t)n;
    return at;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed)
{
    uint64_t v[7], n, layer;
    size_t begin;
    int ours, shared;

    size = LLVMFuzzerMutate(data, size, room);
    if (size >= 5 && memcmp(data, "TOK", 3) == 0)
        return seed % 4 ? mend_tokenizer(data, size) : size;
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
