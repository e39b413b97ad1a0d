/* Random data, guarded buffers and references of the kernel checker: see check.h. */
#define _DEFAULT_SOURCE
#include "check.h"

#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CANARY 0xa5u
#define CANARY_BYTES 256 /* before a buffer */
#define PRINTED 8        /* failures of a kernel */

void check_fail(check *c, const char *format, ...)
{
    va_list arguments;
    if (c->failures++ >= PRINTED)
        return;
    printf("%s %s: ", c->isa, c->kernel);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

/* ---- random data ---- */

size_t check_rounds(const check *c, size_t n)
{
    return c->quick ? n / 4 : n;
}

uint64_t check_random(check *c) /* splitmix64 */
{
    uint64_t x = c->random += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

size_t check_below(check *c, size_t n)
{
    return (size_t)(check_random(c) >> 11) % n;
}

float check_normal(check *c)
{
    /* The sum of 12 uniform 16-bit numbers has a deviation of 2^16. */
    int64_t sum = 0;
    for (int i = 0; i < 3; i++)
        for (uint64_t x = check_random(c), j = 0; j < 4; j++, x >>= 16)
            sum += (int64_t)(x & 0xffffu);
    return (float)(sum - 6 * 65535) * 0x1p-16f;
}

float check_finite(check *c)
{
    uint32_t bits;
    do
        bits = (uint32_t)(check_random(c) >> 32);
    while ((bits & 0x7f800000u) == 0x7f800000u);
    return kvt_bits_f32(bits);
}

uint16_t check_finite_f16(check *c)
{
    uint16_t h;
    do
        h = (uint16_t)(check_random(c) >> 48);
    while ((h & 0x7c00u) == 0x7c00u);
    return h;
}

void check_fill(check *c, float *x, size_t n, check_kind kind, float limit)
{
    for (size_t i = 0; i < n; i++) {
        float normal = check_normal(c);
        switch (kind) {
        case CHECK_ZERO: x[i] = normal < 0 ? -0.0f : 0.0f; break;
        case CHECK_TINY: x[i] = normal * 0x1p-127f; break;
        case CHECK_SPREAD: x[i] = ldexpf(normal, (int)check_below(c, 41) - 20); break;
        case CHECK_LARGE: x[i] = copysignf(limit, normal) * (i % 3 ? 1.0f : 0.75f); break;
        default: x[i] = normal; break;
        }
    }
}

void check_fill_nan(void *data, size_t bytes)
{
    memset(data, 0xff, bytes);
}

size_t check_dims(size_t index)
{
    static const size_t dims[CHECK_N_DIMS] = {8, 48, 64, 80, 96, 128, 192, 256, 512, 576};
    return dims[index % CHECK_N_DIMS];
}

/* ---- guarded buffers ---- */

static size_t page_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

void *check_buffer(check *c, size_t slot, size_t bytes, size_t align)
{
    check_slot *s = c->slots + slot;
    size_t page = page_bytes();
    unsigned char *end;

    if (slot >= CHECK_SLOTS || bytes + align + CANARY_BYTES > CHECK_SLOT_BYTES)
        abort();
    if (!s->base) {
        void *memory = mmap(NULL, CHECK_SLOT_BYTES + 2 * page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) ||
            mprotect((char *)memory + page + CHECK_SLOT_BYTES, page, PROT_NONE))
            abort();
        s->base = (unsigned char *)memory + page;
    }
    end = s->base + CHECK_SLOT_BYTES;
    s->bytes = bytes;
    s->data = end - bytes;
    s->data -= (uintptr_t)s->data % align;
    memset(s->data - CANARY_BYTES, (int)CANARY, CANARY_BYTES);
    memset(s->data + bytes, (int)CANARY, (size_t)(end - s->data) - bytes);
    return s->data;
}

void check_canaries(check *c)
{
    for (size_t i = 0; i < CHECK_SLOTS; i++) {
        const check_slot *s = c->slots + i;
        const unsigned char *end;
        int bad = 0;
        if (!s->data)
            continue;
        end = s->base + CHECK_SLOT_BYTES;
        for (const unsigned char *p = s->data - CANARY_BYTES; p < s->data; p++)
            bad |= *p != CANARY;
        for (const unsigned char *p = s->data + s->bytes; p < end; p++)
            bad |= *p != CANARY;
        if (bad)
            check_fail(c, "wrote beside buffer %zu", i);
    }
}

/* ---- references ---- */

long double check_f16_value(uint16_t h)
{
    int exponent = h >> 10 & 31;
    long double mantissa = h & 1023, value;
    value = exponent ? ldexpl(mantissa + 1024, exponent - 25) : ldexpl(mantissa, -24);
    return h >> 15 ? -value : value;
}

long double check_bf16_value(uint16_t h)
{
    int exponent = h >> 7 & 255;
    long double mantissa = h & 127, value;
    value = exponent ? ldexpl(mantissa + 128, exponent - 134) : ldexpl(mantissa, -133);
    return h >> 15 ? -value : value;
}

/*
 * x as a multiple of the quantum of its binade: 2^(e - bits), no finer than 2^lowest. A value
 * that rounds up to the next binade is a multiple of that quantum too.
 */
static uint16_t encode(float x, int up, int bits, int lowest, uint16_t infinity)
{
    int exponent, negative = signbit(x) != 0;
    long double quantum, n;
    frexpl(fabsl((long double)x), &exponent); /* |x| < 2^exponent, at least half of it */
    exponent = exponent - 1 - bits < lowest || x == 0 ? lowest : exponent - 1 - bits;
    quantum = ldexpl(1, exponent);
    n = fabsl((long double)x) / quantum;
    if (!up)
        n = rintl(n);
    else
        n = negative ? floorl(n) : ceill(n);
    /* The code: 2^bits a binade, the quantum's exponent counted from the lowest. */
    n += ldexpl(exponent - lowest, bits);
    if (n >= infinity)
        n = up && negative && (long double)fabsf(x) < INFINITY ? infinity - 1 : infinity;
    return (uint16_t)((unsigned)negative << 15 | (unsigned)n);
}

uint16_t check_to_f16(float x, int up)
{
    return encode(x, up, 10, -24, 0x7c00);
}

uint16_t check_to_bf16(float x)
{
    return encode(x, 0, 7, -133, 0x7f80);
}

int check_same_bits(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++) /* NaNs compare equal: signs and payloads are not specified */
        if (kvt_f32_bits(a[i]) != kvt_f32_bits(b[i]) && !(isnan(a[i]) && isnan(b[i])))
            return 0;
    return 1;
}

void check_one_digit(check *c, check_pv_function *kernel, size_t code_bytes, unsigned char byte,
                     double value)
{
    enum { DIMS = 32, ROWS = 20 }; /* with AMX as few rows are not its own */
    static const size_t counts[] = {64, 47, 17}, rows[] = {1, ROWS};
    if (c->bench)
        return;
    for (size_t i = 0; i < 3 * 2 * 80; i++) {
        size_t n_tokens = counts[i % 3], n_rows = rows[i / 3 % 2], heavy = check_below(c, n_tokens);
        float *p = check_buffer(c, 0, n_rows * KVT_TOKENS * 4, 64);
        unsigned char *codes = check_buffer(c, 1, code_bytes, 64);
        uint16_t *scales = check_buffer(c, 2, KVT_TOKENS * 2, 64);
        float *acc = check_buffer(c, 3, n_rows * DIMS * 4, 64);
        float *alpha = check_buffer(c, 4, n_rows * 4, 4), x = (float)(i / 6) / (40 * CHECK_STEPS);
        double sum = 0;
        memset(codes, byte, code_bytes);
        memset(p, 0, n_rows * KVT_TOKENS * 4);
        memset(acc, 0, n_rows * DIMS * 4);
        for (size_t t = 0; t < KVT_TOKENS; t++)
            scales[t] = 0x3c00; /* 1 */
        for (size_t r = 0; r < n_rows; r++) {
            alpha[r] = 1;
            for (size_t t = 0; t < n_tokens; t++)
                p[r * KVT_TOKENS + t] = t == heavy ? 1 : x;
        }
        for (size_t t = 0; t < n_tokens; t++)
            sum += (double)p[t];
        kernel(p, n_rows, codes, scales, n_tokens, DIMS, alpha, NULL, acc, DIMS);
        for (size_t at = 0; at < n_rows * DIMS; at++)
            if (!(fabs(acc[at] / value - sum) <= 2.0 / CHECK_STEPS))
                check_fail(c, "weights of %g beside one of 1: %g, not %g: %zu tokens", (double)x,
                           acc[at] / value, sum, n_tokens);
        check_canaries(c);
    }
}

double check_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}
