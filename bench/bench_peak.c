/*
 * Peaks of arithmetic: f32 multiply-adds and integer dot products a second, with the instructions
 * of the kernels in use, and the clock.
 *
 * A loop has as many independent accumulators as hide the instruction's latency (at most 5 cycles
 * times two a cycle on x86, 4 times four on ARM) and no memory accesses. It is an upper bound for
 * kernels built on this instruction, which also load codes, split digits and apply scales.
 *
 * The clock is measured by a chain of dependent additions, one a cycle on every supported
 * processor. Both operands are registers: some processors fold immediate additions at rename.
 */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/*
 * steps times sums independent operations. a and b pass through an empty asm before each of them,
 * so the compiler can neither move a product out of the loop nor share it.
 */
#define PEAK_LOOP(name, attribute, constraint, vector, fill, op, sums)                             \
    attribute static void name(size_t steps)                                                       \
    {                                                                                              \
        vector sum[sums], a = fill, b = fill;                                                      \
        UNROLL for (int j = 0; j < (sums); j++) sum[j] = fill;                                     \
        for (size_t i = 0; i < steps; i++) {                                                       \
            UNROLL for (int j = 0; j < (sums); j++)                                                \
            {                                                                                      \
                __asm__ volatile("" : "+" constraint(a), "+" constraint(b));                       \
                sum[j] = op(sum[j], a, b);                                                         \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int j = 0; j < (sums); j++) __asm__ volatile("" : : constraint(sum[j]));       \
    }

/* Operands of the integer loops: bytes (and pairs of them) of either sign, small enough. */
#define BYTES 0x1b2ce3f4

#if defined(__x86_64__)

#define NOTHING
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVXVNNI __attribute__((target("avx2,avxvnni")))
#define TARGET_AVX512 __attribute__((target("avx512f")))
#define TARGET_AVX512VNNI __attribute__((target("avx512f,avx512vnni")))
#define TARGET_AMX __attribute__((target("amx-tile,amx-int8")))

#define MULADD_SSE2(s, a, b) _mm_add_ps(s, _mm_mul_ps(a, b))
#define MADD_SSE2(s, a, b) _mm_add_epi32(s, _mm_madd_epi16(a, b))
#define FMA_AVX2(s, a, b) _mm256_fmadd_ps(a, b, s)
#define MADD_AVX2(s, a, b) _mm256_add_epi32(s, _mm256_madd_epi16(a, b))
#define FMA_AVX512(s, a, b) _mm512_fmadd_ps(a, b, s)

PEAK_LOOP(muladd_sse2, NOTHING, "x", __m128, _mm_set1_ps(0.01f), MULADD_SSE2, 12)
PEAK_LOOP(madd_sse2, NOTHING, "x", __m128i, _mm_set1_epi32(BYTES), MADD_SSE2, 12)
PEAK_LOOP(fma_avx2, TARGET_AVX2, "x", __m256, _mm256_set1_ps(0.01f), FMA_AVX2, 12)
PEAK_LOOP(madd_avx2, TARGET_AVX2, "x", __m256i, _mm256_set1_epi32(BYTES), MADD_AVX2, 12)
PEAK_LOOP(dot_avxvnni, TARGET_AVXVNNI, "x", __m256i, _mm256_set1_epi32(BYTES),
          _mm256_dpbusd_avx_epi32, 12)
PEAK_LOOP(fma_avx512, TARGET_AVX512, "v", __m512, _mm512_set1_ps(0.01f), FMA_AVX512, 16)
PEAK_LOOP(dot_avx512, TARGET_AVX512VNNI, "v", __m512i, _mm512_set1_epi32(BYTES),
          _mm512_dpbusd_epi32, 16)

/* Four tiles of sums, two by two of operands: 52 cycles of latency, 16 a product. */
TARGET_AMX static void dot_amx(size_t steps)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    uint8_t bytes[16 * 64];
    memset(bytes, 0x1b, sizeof bytes);
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    /* gcc 12 takes ldtilecfg to read 8 bytes, tileloadd none: it would drop stores to them. */
    __asm__ volatile("" : : "r"(&config), "r"(bytes) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, bytes, 64);
    _tile_loadd(5, bytes, 64);
    _tile_loadd(6, bytes, 64);
    _tile_loadd(7, bytes, 64);
    for (size_t i = 0; i < steps; i++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
}

#elif defined(__aarch64__)

#define NOTHING
#if defined(__clang__)
#define TARGET_DOTPROD __attribute__((target("dotprod")))
#define TARGET_I8MM __attribute__((target("i8mm")))
#else
#define TARGET_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define TARGET_I8MM __attribute__((target("arch=armv8.2-a+i8mm")))
#endif

/* Not the intrinsics: up to clang 15 they need the whole file to be compiled for the extension. */
#define ARM_DOT(name, attribute, instruction)                                                      \
    attribute static inline int32x4_t name(int32x4_t s, int32x4_t a, int32x4_t b)                  \
    {                                                                                              \
        __asm__(instruction : "+w"(s) : "w"(a), "w"(b));                                           \
        return s;                                                                                  \
    }
ARM_DOT(smlal, NOTHING, "smlal2 %0.4s, %1.8h, %2.8h")
ARM_DOT(sdot, TARGET_DOTPROD, "sdot %0.4s, %1.16b, %2.16b")
ARM_DOT(smmla, TARGET_I8MM, "smmla %0.4s, %1.16b, %2.16b")

PEAK_LOOP(fma_neon, NOTHING, "w", float32x4_t, vdupq_n_f32(0.01f), vfmaq_f32, 24)
PEAK_LOOP(smlal_neon, NOTHING, "w", int32x4_t, vdupq_n_s32(BYTES), smlal, 24)
PEAK_LOOP(sdot_neon, TARGET_DOTPROD, "w", int32x4_t, vdupq_n_s32(BYTES), sdot, 24)
PEAK_LOOP(smmla_neon, TARGET_I8MM, "w", int32x4_t, vdupq_n_s32(BYTES), smmla, 24)

#else

typedef float floats __attribute__((vector_size(16)));
#define MULADD(s, a, b) ((s) + (a) * (b))
static void muladd_plain(size_t steps)
{
    floats sum[8], a = {0.01f}, b = {0.01f};
    memset(sum, 0, sizeof sum);
    for (size_t i = 0; i < steps; i++) {
        for (int j = 0; j < 8; j++) {
            __asm__ volatile("" : "+m"(a), "+m"(b));
            sum[j] = MULADD(sum[j], a, b);
        }
    }
    __asm__ volatile("" : : "m"(sum));
}

#endif

static void count_cycles(size_t steps)
{
    size_t x = 0, y = 1;
    for (size_t i = 0; i < steps; i++) {
        UNROLL for (int j = 0; j < 32; j++)
        {
            x += y;
            __asm__ volatile("" : "+r"(x), "+r"(y));
        }
    }
}

typedef struct peak_loop {
    const char *name; /* NULL: none */
    void (*run)(size_t steps);
    double a_step; /* multiply-adds, or cycles */
} peak_loop;

static const peak_loop clock_loop = {"add", count_cycles, 32};

/*
 * near, fast: products of the dot loop that one multiply-add of i8 takes. Instructions on bytes
 * need two for q or weights of two digits; those on 16 bits take them whole. few: the same of 4 and
 * 5 bits, near and fast, where q and weights have one digit: half a product where i8 has products
 * of 16 bits, since those of bytes (vpmaddubsw, smlal) are twice as many an instruction.
 */
static const struct peak_isa {
    const char *isa;
    peak_loop fma, dot;
    double near, fast, few;
} isas[] = {
#if defined(__x86_64__)
    {"scalar",
     {"mulps, addps", muladd_sse2, 12 * 4},
     {"pmaddwd, paddd", madd_sse2, 12 * 8},
     1,
     1,
     1},
    {"avx2",
     {"vfmadd ymm", fma_avx2, 12 * 8},
     {"vpmaddwd, vpaddd ymm", madd_avx2, 12 * 16},
     1,
     1,
     0.5},
    {"avxvnni", {"vfmadd ymm", fma_avx2, 12 * 8}, {"vpdpbusd ymm", dot_avxvnni, 12 * 32}, 2, 1, 1},
    {"avx512vnni",
     {"vfmadd zmm", fma_avx512, 16 * 16},
     {"vpdpbusd zmm", dot_avx512, 16 * 64},
     2,
     1,
     1},
    {"amx", {"vfmadd zmm", fma_avx512, 16 * 16}, {"tdpbssd", dot_amx, 4.0 * 16 * 16 * 64}, 2, 1, 1},
#elif defined(__aarch64__)
    {"scalar", {"fmla", fma_neon, 24 * 4}, {"smlal", smlal_neon, 24 * 4}, 1, 1, 1},
    {"neon", {"fmla", fma_neon, 24 * 4}, {"smlal", smlal_neon, 24 * 4}, 1, 1, 0.5},
    {"dotprod", {"fmla", fma_neon, 24 * 4}, {"sdot", sdot_neon, 24 * 16}, 2, 1, 1},
    {"i8mm", {"fmla", fma_neon, 24 * 4}, {"smmla", smmla_neon, 24 * 32}, 2, 1, 1},
#else
    {"scalar", {"multiply, add", muladd_plain, 8 * 4}, {NULL, NULL, 0}, 1, 1, 1},
#endif
};

struct bench_peaks {
    bench_team *team;
    const struct peak_isa *isa;
    size_t clock_steps, fma_steps, dot_steps;
};

typedef struct peak_job {
    void (*run)(size_t steps);
    size_t steps;
} peak_job;

static void do_job(void *arg, unsigned worker)
{
    const peak_job *job = arg;
    (void)worker;
    job->run(job->steps);
}

static double run_loop(const bench_peaks *p, const peak_loop *loop, size_t steps)
{
    peak_job job = {loop->run, steps};
    double start = bench_seconds();
    bench_team_each(p->team, do_job, &job);
    return bench_seconds() - start;
}

/* Steps that take half a millisecond or more, so that a thread's start is negligible. */
static size_t enough_steps(const bench_peaks *p, const peak_loop *loop)
{
    size_t steps = 256;
    while (loop->name && run_loop(p, loop, steps) < 0.5e-3)
        steps *= 2;
    return steps;
}

/* Operations a second of all threads, 1e9: the best of three, as disturbances only slow down. */
static double rate(const bench_peaks *p, const peak_loop *loop, size_t steps)
{
    double best = INFINITY;
    if (!loop->name)
        return NAN;
    for (int i = 0; i < 3; i++)
        best = fmin(best, run_loop(p, loop, steps));
    return 1e-9 * loop->a_step * (double)steps * bench_team_threads(p->team) / best;
}

bench_peaks *bench_peaks_create(bench_team *team, const char *isa)
{
    bench_peaks *p = bench_alloc(1, sizeof *p);
    p->team = team;
    p->isa = &isas[0];
    for (size_t i = 0; i < sizeof isas / sizeof isas[0]; i++)
        if (!strcmp(isas[i].isa, isa))
            p->isa = &isas[i];
    p->clock_steps = enough_steps(p, &clock_loop);
    p->fma_steps = enough_steps(p, &p->isa->fma);
    p->dot_steps = enough_steps(p, &p->isa->dot);
    return p;
}

void bench_peaks_destroy(bench_peaks *p)
{
    free(p);
}

bench_peak bench_peaks_run(bench_peaks *p)
{
    bench_peak peak;
    peak.clock_ghz = rate(p, &clock_loop, p->clock_steps) / bench_team_threads(p->team);
    peak.fma_gflops = 2.0 * rate(p, &p->isa->fma, p->fma_steps);
    peak.dot_gmacs = rate(p, &p->isa->dot, p->dot_steps);
    return peak;
}

bench_peak bench_peaks_median(const bench_peak *peaks, size_t n)
{
    double *x = bench_alloc(n, sizeof *x);
    bench_peak median;
    for (size_t i = 0; i < n; i++)
        x[i] = peaks[i].clock_ghz;
    median.clock_ghz = bench_median(x, n);
    for (size_t i = 0; i < n; i++)
        x[i] = peaks[i].fma_gflops;
    median.fma_gflops = bench_median(x, n);
    for (size_t i = 0; i < n; i++)
        x[i] = peaks[i].dot_gmacs;
    median.dot_gmacs = bench_median(x, n);
    free(x);
    return median;
}

void bench_record_peak(bench_record *r, const bench_peaks *p, const bench_peak *peak)
{
    bench_record_number(r, "clock_ghz", peak->clock_ghz);
    bench_record_number(r, "fma_gflops", peak->fma_gflops);
    bench_record_number(r, "dot_gmacs", peak->dot_gmacs);
    bench_record_text(r, "fma_loop", p->isa->fma.name);
    bench_record_text(r, "dot_loop", p->isa->dot.name);
}

/* Seconds of 1e9 multiply-adds. */
static double seconds_of(const bench_peaks *p, const bench_peak *peak, kvt_type type,
                         bench_mode mode)
{
    if (type < KVT_TYPE_I8 || mode == BENCH_F32)
        return 2.0 / peak->fma_gflops;
    if (type > KVT_TYPE_I8)
        return p->isa->few / peak->dot_gmacs;
    return (mode == BENCH_FAST ? p->isa->fast : p->isa->near) / peak->dot_gmacs;
}

double bench_arithmetic_seconds(const bench_peaks *p, const bench_peak *peak, const bench_case *c,
                                bench_mode mode, double pairs)
{
    return 1e-9 * pairs *
           (c->k_dim * seconds_of(p, peak, c->k_type, mode) +
            c->v_dim * seconds_of(p, peak, c->v_type, mode));
}
