/*
 * The tables of this build, and the choice among them. Only this file names them all.
 *
 * A NULL entry of a table inherits from the one below. The overlay is computed at cache creation
 * and kept in the cache: no mutable globals.
 */
#include "src/cpu.h"
#include "src/dispatch.h"

#include <kvtile/kvtile.h>

typedef struct kvt_isa {
    const kvt_kernels *table;
    int (*present)(void); /* NULL: always */
    int (*take)(void);    /* makes the process one that may use it; NULL: it may */
} kvt_isa;

/* Narrowest first; each overlays all before it. */
static const kvt_isa isas[] = {
    {&kvt_kernels_scalar, NULL, NULL},
#if defined(KVT_HAVE_AVX2)
    {&kvt_kernels_avx2, kvt_cpu_has_avx2, NULL},
#endif
#if defined(KVT_HAVE_AVXVNNI)
    {&kvt_kernels_avxvnni, kvt_cpu_has_avxvnni, NULL},
#endif
#if defined(KVT_HAVE_AVX512VNNI)
    {&kvt_kernels_avx512vnni, kvt_cpu_has_avx512vnni, NULL},
#endif
#if defined(KVT_HAVE_AMX)
    {&kvt_kernels_amx, kvt_cpu_has_amx, kvt_cpu_take_amx},
#endif
#if defined(KVT_HAVE_NEON)
    {&kvt_kernels_neon, NULL, NULL},
#endif
#if defined(KVT_HAVE_DOTPROD)
    {&kvt_kernels_dotprod, kvt_cpu_has_dotprod, NULL},
#endif
#if defined(KVT_HAVE_I8MM)
    {&kvt_kernels_i8mm, kvt_cpu_has_i8mm, NULL},
#endif
};

#define N_ISAS (sizeof isas / sizeof isas[0])

static int is_present(const kvt_isa *isa)
{
    return !isa->present || isa->present();
}

const char *kvt_isa_name(uint32_t index)
{
    for (size_t i = 0; i < N_ISAS; i++)
        if (is_present(&isas[i]) && index-- == 0)
            return isas[i].table->isa;
    return NULL;
}

/* The widest that the name stands for and, if it is used, may be used; N_ISAS: none. */
static size_t choose(const char *isa, int uses)
{
    for (size_t i = N_ISAS; i-- > 0;)
        if ((!isa || strcmp(isa, isas[i].table->isa) == 0) && is_present(&isas[i]) &&
            (!uses || !isas[i].take || isas[i].take()))
            return i;
    return N_ISAS;
}

int kvt_dispatch(const char *isa, int uses, kvt_kernels *kernels)
{
    const size_t last = choose(isa, uses);
    if (last == N_ISAS)
        return 0;
    memset(kernels, 0, sizeof *kernels);
    for (size_t i = 0; i <= last; i++) {
        if (!is_present(&isas[i]))
            continue;
        kernels->isa = isas[i].table->isa;
#define OVERLAY(result, name, parameters)                                                          \
    if (isas[i].table->name)                                                                       \
        kernels->name = isas[i].table->name;
        KVT_KERNEL_LIST(OVERLAY)
#undef OVERLAY
    }
    return 1;
}
