/*
 * machine: the denominators of the other commands' ratios. For each number of threads the read
 * bandwidth, for each instruction set that has kernels the peaks of its arithmetic.
 */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {
    {"threads", NULL, 7},
    {"read_gbps", "read", 7},
    {"read_p10", "p10", 7},
    {"read_p90", "p90", 7},
    {"isa", NULL, -10},
    {"clock_ghz", "GHz", 6},
    {"fma_gflops", "FMA", 8},
    {"fma_loop", "by", -13},
    {"dot_gmacs", "dot", 8},
    {"dot_loop", "by", -20},
    {"read_loop", "read by", -34},
};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

/* Loops of an instruction set may need what a cache with its kernels gets the process: AMX's do. */
static void use_isa(const char *isa)
{
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    char text[200];
    group.n_layers = group.n_q_heads = group.n_kv_heads = 1;
    group.k_dim = group.v_dim = 8;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 64;
    config.isa = isa;
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    if (kvt_cache_create(&config, &cache) != KVT_OK)
        bench_fail(1, "%s", text);
    kvt_cache_destroy(cache);
}

static void survey(const bench_options *options, bench_team *team, bench_read *reader,
                   const char *isa, unsigned processors)
{
    bench_record record;
    size_t n = options->runs;
    double *read = bench_alloc(n, sizeof *read);
    bench_peak *peaks = bench_alloc(n, sizeof *peaks);
    use_isa(isa);
    bench_peaks *p = bench_peaks_create(team, isa);
    for (size_t i = 0; i < n; i++) {
        read[i] = 1e-9 * bench_read_bytes(reader) / bench_read_run(reader);
        peaks[i] = bench_peaks_run(p);
    }
    bench_stats s = bench_stats_of(read, n);
    bench_peak peak = bench_peaks_median(peaks, n);
    record.n = 0;
    bench_record_text(&record, "bench", "machine");
    bench_record_text(&record, "isa", isa);
    bench_record_integer(&record, "threads", bench_team_threads(team));
    bench_record_number(&record, "read_gbps", s.median);
    bench_record_number(&record, "read_p10", s.p10);
    bench_record_number(&record, "read_p90", s.p90);
    bench_record_text(&record, "read_loop", bench_read_loop(reader));
    bench_record_peak(&record, p, &peak);
    bench_record_integer(&record, "pairs", n);
    for (int level = 1; level <= 3; level++) {
        static const char *const keys[] = {"l1d_bytes", "l2_bytes", "l3_bytes"};
        bench_record_integer(&record, keys[level - 1], bench_cache_bytes(level));
    }
    bench_record_integer(&record, "llc_bytes", options->llc_bytes);
    bench_record_integer(&record, "processors", processors);
    bench_record_end(&record, options, bench_team_pinned(team));
    bench_emit(options, &record, columns, N_COLUMNS);
    bench_peaks_destroy(p);
    free(peaks);
    free(read);
}

int bench_machine(const bench_options *options)
{
    char title[160];
    unsigned processors = bench_processors(); /* before this thread is pinned to one */
    uint64_t bytes = options->quick ? 1 << 20 : 4 * options->llc_bytes;
    snprintf(title, sizeof title,
             "machine: %u processors; data caches: %llu KiB, %llu KiB, %llu KiB", processors,
             (unsigned long long)bench_cache_bytes(1) >> 10,
             (unsigned long long)bench_cache_bytes(2) >> 10,
             (unsigned long long)bench_cache_bytes(3) >> 10);
    bench_table_begin(options, title, columns, N_COLUMNS);
    for (size_t t = 0; t < options->n_threads; t++) {
        bench_heap heap;
        memset(&heap, 0, sizeof heap);
        bench_team *team = bench_team_create(options->threads[t]);
        bench_read *reader = bench_read_create(&heap, team, (size_t)1 << 20, bytes);
        for (size_t i = 0; i < options->n_isas; i++)
            survey(options, team, reader, options->isas[i], processors);
        bench_read_destroy(reader);
        bench_team_destroy(team);
    }
    bench_note(options, "read: GB/s of the fastest loop over four times the last-level cache; FMA: "
                        "GFLOP/s of f32; dot: GMAC/s of integers;\n"
                        "all threads together, medians. GHz: of dependent additions, one a cycle.");
    return 0;
}
