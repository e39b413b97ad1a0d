/*
 * What the files of the kernel checker share: the context of a check, random data, guarded
 * buffers, and references that share no code with the kernels.
 *
 * A check of kernel NAME is a function check_NAME(c, kernel). The prototypes below come from the
 * kernel list, and check_kernels.c calls them through it: a kernel without a check, or with other
 * parameters than its check expects, does not build.
 */
#ifndef KVT_CHECK_H
#define KVT_CHECK_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "simd/kernels.h"

#define CHECK_SLOTS 10
#define CHECK_SLOT_BYTES ((size_t)1 << 19)
#define CHECK_MAX_DIMS 576

/* Half an ulp of f32, relative: the error of one operation. */
#define CHECK_EPS 0x1p-24

/* A guarded buffer: inaccessible pages around it, canaries in the gaps. */
typedef struct check_slot {
    unsigned char *base;
    unsigned char *data; /* NULL: not in use */
    size_t bytes;
} check_slot;

typedef struct check {
    const kvt_kernels *table; /* the kernel's table: packed q needs two of its entries */
    const char *isa, *kernel;
    uint64_t random;
    unsigned long failures, calls;
    int bench;        /* time one typical call instead of checking */
    int quick;        /* KVT_TEST_QUICK: a quarter of the trials, under emulators and sanitizers */
    double ns, bytes; /* of it: the result */
    check_slot slots[CHECK_SLOTS];
} check;

#define CHECK_PROTOTYPE(result, name, parameters)                                                  \
    void check_##name(check *c, result(*kernel) parameters);
KVT_KERNEL_LIST(CHECK_PROTOTYPE)
#undef CHECK_PROTOTYPE

/*
 * amx_emulated.c: AMX's kernels on processors without AMX. check_amx_emulated returns whether they
 * can run; it has to be called before them.
 */
extern kvt_kernels check_amx_emulated_table;
int check_amx_emulated(void);

/* Report a failure (the first few of a kernel are printed). */
void check_fail(check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- random data ---- */

/* n, or a quarter of it: of random trials of one kind. */
size_t check_rounds(const check *c, size_t n);

uint64_t check_random(check *c);
/* 0 .. n - 1 */
size_t check_below(check *c, size_t n);
/* Roughly N(0, 1). */
float check_normal(check *c);
/* Any finite f32: all exponents, subnormals and both zeros. */
float check_finite(check *c);
/* Any finite f16. */
uint16_t check_finite_f16(check *c);

typedef enum check_kind {
    CHECK_NORMAL,
    CHECK_ZERO,
    CHECK_TINY,   /* subnormal and barely normal */
    CHECK_SPREAD, /* 2^-20 to 2^20 */
    CHECK_LARGE,  /* as large as `limit` */
    CHECK_KINDS
} check_kind;

void check_fill(check *c, float *x, size_t n, check_kind kind, float limit);
/* Bytes that are a NaN as f32 and as f16. */
void check_fill_nan(void *data, size_t bytes);

/* dims as real models have them; index is taken modulo their number. */
size_t check_dims(size_t index);
#define CHECK_N_DIMS 10

/* ---- guarded buffers ---- */

/* `bytes` bytes whose last is followed by an inaccessible page, up to `align`. */
void *check_buffer(check *c, size_t slot, size_t bytes, size_t align);
/* Whether a canary of a buffer in use was overwritten. */
void check_canaries(check *c);

/* ---- references ---- */

/* All of these are computed in long double from the formats' definitions. */
long double check_f16_value(uint16_t h);
long double check_bf16_value(uint16_t h);
/* To nearest even (up 0) or toward +infinity (up 1); beyond the range: infinity. */
uint16_t check_to_f16(float x, int up);
uint16_t check_to_bf16(float x);

int check_same_bits(const float *a, const float *b, size_t n);

/* ---- weights of one digit ---- */

/* The largest digit is this at least, and what a weight may be off by: half a step and a dither of
   less than half a step. */
#define CHECK_STEPS 120
#define CHECK_OFF 0.993

typedef void check_pv_function(const float *, size_t, const void *, const uint16_t *, size_t,
                               size_t, const float *, const void *, float *, size_t);
/*
 * One token of a block with most of its weight, the others alike and less than two steps each: the
 * sum over tokens of one value has to keep their weight. All bytes of 32 dims' codes are `byte`,
 * which stands for `value`.
 */
void check_one_digit(check *c, check_pv_function *kernel, size_t code_bytes, unsigned char byte,
                     double value);

/* ---- timing ---- */

double check_now_ns(void);

/* In a check: with --bench, time `call`, which moves `moved` bytes, and return. */
#define CHECK_BENCH(c, moved, call)                                                                \
    do {                                                                                           \
        if ((c)->bench) {                                                                          \
            double best = 1e300;                                                                   \
            for (int repeat = 0; repeat < 9; repeat++) {                                           \
                double start = check_now_ns();                                                     \
                for (int inner = 0; inner < 200; inner++)                                          \
                    call;                                                                          \
                start = (check_now_ns() - start) / 200;                                            \
                best = start < best ? start : best;                                                \
            }                                                                                      \
            (c)->ns = best;                                                                        \
            (c)->bytes = (double)(moved);                                                          \
            return;                                                                                \
        }                                                                                          \
    } while (0)

#endif /* KVT_CHECK_H */
