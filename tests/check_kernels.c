/*
 * Checks and times every kernel of every instruction set that this machine runs.
 *
 *   check_kernels [--seed N] [--isa NAME] [--kernel PART] [--bench]
 *
 * Kernels whose bytes are specified (put, mean, rotate, load, store, get) are compared with the
 * scalar table bit by bit; the scalar table itself, and the others, with references in double
 * precision, within bounds that each check derives. All buffers end at an inaccessible page.
 *
 * --kernel takes every kernel whose name contains PART. --bench prints the time of one typical
 * call beside scalar's, after the checks have passed.
 * Exit: 0 passed, 1 failed, 2 usage, 77 the instruction set of --isa is not there (skipped).
 */
#include "check.h"

#include <stdlib.h>
#include <time.h>

#include "src/cpu.h"
#include "src/dispatch.h"

#include <kvtile/kvtile.h>

#define SKIPPED 77

/* AVX-VNNI's source with AVX-512's encoding of the instruction, which more machines can run. */
#if defined(CHECK_AVXVNNI_EVEX)
extern const kvt_kernels kvt_kernels_avxvnni_evex;
#endif

typedef struct isa {
    const kvt_kernels *table;
    int (*present)(void); /* NULL: always */
} isa;

static const isa isas[] = {
    {&kvt_kernels_scalar, NULL},
#if defined(KVT_HAVE_AVX2)
    {&kvt_kernels_avx2, kvt_cpu_has_avx2},
#endif
#if defined(KVT_HAVE_AVXVNNI)
    {&kvt_kernels_avxvnni, kvt_cpu_has_avxvnni},
#endif
#if defined(CHECK_AVXVNNI_EVEX)
    {&kvt_kernels_avxvnni_evex, kvt_cpu_has_avx512vnni},
#endif
#if defined(KVT_HAVE_AVX512VNNI)
    {&kvt_kernels_avx512vnni, kvt_cpu_has_avx512vnni},
#endif
#if defined(KVT_HAVE_AMX)
    {&kvt_kernels_amx, kvt_cpu_take_amx},
#endif
#if defined(KVT_HAVE_NEON)
    {&kvt_kernels_neon, NULL},
#endif
#if defined(KVT_HAVE_DOTPROD)
    {&kvt_kernels_dotprod, kvt_cpu_has_dotprod},
#endif
#if defined(KVT_HAVE_I8MM)
    {&kvt_kernels_i8mm, kvt_cpu_has_i8mm},
#endif
#if defined(KVT_HAVE_AMX) && defined(__linux__)
    {&check_amx_emulated_table, check_amx_emulated},
#endif
};

#define N_ISAS (sizeof isas / sizeof isas[0])

typedef struct options {
    const char *isa, *kernel;
    uint64_t seed;
    int bench;
} options;

/* The seed of a kernel's check: one a kernel, so that --kernel reproduces a full run. */
static uint64_t seed_of(uint64_t seed, const char *kernel)
{
    for (; *kernel; kernel++)
        seed = (seed ^ (unsigned char)*kernel) * 0x100000001b3u;
    return seed;
}

static void begin(check *c, const options *o, const kvt_kernels *table, const char *kernel)
{
    c->table = table;
    c->isa = table->isa;
    c->kernel = kernel;
    c->random = seed_of(o->seed, kernel);
    for (size_t i = 0; i < CHECK_SLOTS; i++)
        c->slots[i].data = NULL;
}

/* The checks of one table. Returns the number of kernels that failed. */
static unsigned check_table(check *c, const options *o, const kvt_kernels *table)
{
    unsigned failed = 0, passed = 0, inherited = 0;
#define CHECK(result, name, parameters)                                                            \
    if (strstr(#name, o->kernel)) {                                                                \
        begin(c, o, table, #name);                                                                 \
        c->failures = 0;                                                                           \
        if (!table->name) {                                                                        \
            inherited++;                                                                           \
        } else {                                                                                   \
            check_##name(c, table->name);                                                          \
            check_canaries(c);                                                                     \
            if (c->failures)                                                                       \
                printf("%s %s: FAILED (%lu)\n", table->isa, #name, c->failures);                   \
            failed += c->failures != 0;                                                            \
            passed += c->failures == 0;                                                            \
        }                                                                                          \
    }
    KVT_KERNEL_LIST(CHECK)
#undef CHECK
    printf("%s: %u kernels passed, %u failed, %u inherited\n", table->isa, passed, failed,
           inherited);
    return failed;
}

static void bench_table(check *c, const options *o, const kvt_kernels *table)
{
    double scalar_ns;
    c->bench = 1;
#define BENCH(result, name, parameters)                                                            \
    if (table->name && strstr(#name, o->kernel)) {                                                 \
        begin(c, o, &kvt_kernels_scalar, #name);                                                   \
        check_##name(c, kvt_kernels_scalar.name);                                                  \
        scalar_ns = c->ns;                                                                         \
        begin(c, o, table, #name);                                                                 \
        check_##name(c, table->name);                                                              \
        printf("%-8s %-10s %9.1f ns %7.2f GB/s %6.2f x scalar\n", table->isa, #name, c->ns,        \
               c->bytes / c->ns, scalar_ns / c->ns);                                               \
    }
    KVT_KERNEL_LIST(BENCH)
#undef BENCH
    c->bench = 0;
}

static int names_a_kernel(const char *part)
{
    unsigned found = 0;
#define COUNT(result, name, parameters) found += strstr(#name, part) != NULL;
    KVT_KERNEL_LIST(COUNT)
#undef COUNT
    return found != 0;
}

static int parse(int argc, char **argv, options *o)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--bench") == 0) {
            o->bench = 1;
            continue;
        }
        if (!value)
            return 0;
        if (strcmp(argv[i], "--isa") == 0) {
            o->isa = value;
        } else if (strcmp(argv[i], "--kernel") == 0) {
            o->kernel = value;
        } else if (strcmp(argv[i], "--seed") == 0) {
            char *end;
            o->seed = strtoull(value, &end, 0);
            if (end == value || *end)
                return 0;
        } else {
            return 0;
        }
        i++;
    }
    return 1;
}

int main(int argc, char **argv)
{
    options o = {NULL, "", (uint64_t)time(NULL), 0};
    unsigned failed = 0, checked = 0;
    static check c;

    if (!parse(argc, argv, &o) || !names_a_kernel(o.kernel)) {
        fprintf(stderr, "usage: check_kernels [--seed N] [--isa NAME] [--kernel PART] [--bench]\n"
                        "PART is a part of a kernel's name.\n");
        return 2;
    }
    c.quick = getenv("KVT_TEST_QUICK") != NULL;
    printf("seed %llu\n", (unsigned long long)o.seed);
    for (size_t i = 0; i < N_ISAS; i++) {
        if (o.isa && strcmp(o.isa, isas[i].table->isa) != 0)
            continue;
        if (isas[i].present && !isas[i].present()) {
            printf("%s: skipped, not on this machine\n", isas[i].table->isa);
            continue;
        }
        checked++;
        failed += check_table(&c, &o, isas[i].table);
        if (o.bench && !failed)
            bench_table(&c, &o, isas[i].table);
    }
    if (!checked) {
        printf("%s: skipped, not on this machine or not in this build\n", o.isa);
        return SKIPPED;
    }
    return failed != 0;
}
