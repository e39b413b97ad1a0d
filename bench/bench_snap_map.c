/*
 * map: a large raw snapshot in the page cache, opened in place and attended over in one layer,
 * beside a load of all of it into memory (recycled blocks), which is verified; and what a second
 * process that maps the file and attends over all layers takes for itself, beside the file's size.
 *
 * The second process is this program, started with the hidden command snapshot-reader, while the
 * first one has the file mapped and has read all of it: pages that only one process had mapped
 * would count as its own. Its own memory is Private_Clean + Private_Dirty of
 * /proc/self/smaps_rollup, behind less before.
 */
#include "bench_snap.h"

#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

typedef struct map {
    bench_snap s;
    const char *path;
    uint32_t map; /* KVT_MAP_ */
    float *q, *out;
    size_t out_width;
} map;

static void attend(map *m, uint32_t layer)
{
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_item item = {.seq = m->s.seq, .n_queries = 1};
    args.layer = layer;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(m->q);
    args.out = kvt_tensor_f32(m->out);
    bench_require(kvt_attend(m->s.cache, &args), m->s.cache, "kvt_attend");
}

static uint64_t load(map *m, uint32_t how)
{
    kvt_load_options options;
    kvt_load_result result;
    memset(&options, 0, sizeof options);
    memset(&result, 0, sizeof result);
    options.struct_size = sizeof options;
    options.map = how;
    bench_require(kvt_seq_load(m->s.seq, m->path, &options, &result), m->s.cache, "kvt_seq_load");
    return result.mapped_bytes;
}

static void clear(map *m)
{
    bench_require(kvt_seq_clear(m->s.seq), m->s.cache, "kvt_seq_clear");
}

static double run_mapped(void *user)
{
    map *m = user;
    clear(m);
    double start = bench_snap_start();
    load(m, m->map);
    attend(m, 0);
    return bench_snap_stop(start);
}

static double run_load(void *user)
{
    map *m = user;
    clear(m);
    double start = bench_snap_start();
    load(m, KVT_MAP_NONE);
    return bench_snap_stop(start);
}

static void make_query(map *m, const bench_options *o)
{
    bench_random random;
    size_t n = (size_t)m->s.shape.q_heads * m->s.shape.k_dim;
    m->out_width = (size_t)m->s.shape.q_heads * m->s.shape.v_dim;
    m->q = bench_alloc(n, sizeof *m->q);
    m->out = bench_alloc(m->out_width, sizeof *m->out);
    bench_random_seed(&random, o->seed + 1);
    bench_random_fill(&random, m->q, n);
}

/* ---- the second process ---- */

/* Bytes that only this process has; NaN where the system does not tell. */
static double private_bytes(void)
{
    char line[256];
    double sum = NAN;
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    if (!f)
        return NAN;
    while (fgets(line, sizeof line, f)) {
        unsigned long long kib;
        if (sscanf(line, "Private_Clean: %llu kB", &kib) == 1 ||
            sscanf(line, "Private_Dirty: %llu kB", &kib) == 1)
            sum = (isnan(sum) ? 0.0 : sum) + 1024.0 * (double)kib;
    }
    fclose(f);
    return sum;
}

/* snapshot-reader FILE TOKENS LAYERS QUICK: prints the memory that mapping and attending took. */
int bench_snap_reader(int argc, char **argv)
{
    static bench_options o;
    map m;
    if (argc != 6)
        bench_fail(2, "%s is not a command: see kvt-bench --help", argv[1]);
    memset(&m, 0, sizeof m);
    o.quick = argv[5][0] == '1';
    o.layers = (size_t)strtoull(argv[4], NULL, 10);
    m.path = argv[2];
    bench_snap_open(&m.s, &o, KVT_TYPE_I8, 1, strtoull(argv[3], NULL, 10), 0);
    make_query(&m, &o);
    double before = private_bytes();
    uint64_t mapped = load(&m, KVT_MAP_LAZY);
    for (uint32_t layer = 0; layer < m.s.n_layers; layer++)
        attend(&m, layer);
    printf("%.0f %llu\n", private_bytes() - before, (unsigned long long)mapped);
    clear(&m);
    free(m.q);
    free(m.out);
    bench_snap_close(&m.s);
    return 0;
}

static double second_process(const map *m, const bench_options *o, double *mapped)
{
    char self[4096], tokens[32], layers[32], line[128] = "";
    int ends[2], status = 0;
    pid_t child;
    posix_spawn_file_actions_t actions;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0 || pipe(ends) != 0 || posix_spawn_file_actions_init(&actions) != 0)
        return NAN;
    self[n] = 0;
    snprintf(tokens, sizeof tokens, "%llu", (unsigned long long)m->s.shape.ctx);
    snprintf(layers, sizeof layers, "%u", (unsigned)m->s.n_layers);
    char *argv[] = {
        "kvt-bench", "snapshot-reader", (char *)m->path, tokens, layers, o->quick ? "1" : "0",
        NULL};
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    posix_spawn_file_actions_addclose(&actions, ends[1]);
    int failed = posix_spawn(&child, self, &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    if (failed)
        bench_fail(1, "snapshot: cannot run %s: %s", self, strerror(failed));
    FILE *in = fdopen(ends[0], "r");
    if (!in || !fgets(line, sizeof line, in))
        line[0] = 0;
    if (in)
        fclose(in);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    double added = NAN;
    *mapped = NAN;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        bench_fail(1, "snapshot: the second process failed");
    if (sscanf(line, "%lf %lf", &added, mapped) != 2)
        return NAN; /* "nan": the system does not tell */
    return added;
}

/* ---- the part ---- */

/* What there is room for: the cache, or the loaded blocks, and the file. */
static uint64_t size_of_file(const bench_options *o)
{
    struct statvfs disk;
    uint64_t bytes = o->map_bytes, available = bench_available_bytes();
    if (available != UINT64_MAX && bytes > available / 5 * 2)
        bytes = available / 5 * 2;
    if (statvfs(o->dir, &disk) == 0) {
        uint64_t room = (uint64_t)disk.f_bavail * disk.f_frsize;
        bytes = bytes > room / 2 ? room / 2 : bytes;
    }
    return bytes;
}

void bench_snap_map(const bench_options *o)
{
    map m;
    char words[160], less[160] = "";
    uint64_t bytes = size_of_file(o);
    memset(&m, 0, sizeof m);
    uint64_t n_tokens = bench_snap_tokens(o, KVT_TYPE_I8, bytes);
    m.path = bench_snap_path(o, "mapped.kvt");
    bench_snap_open(&m.s, o, KVT_TYPE_I8, 1, n_tokens, 0);
    bench_snap_fill(&m.s, n_tokens);
    make_query(&m, o);
    attend(&m, 0);
    float *expected = bench_alloc(m.out_width, sizeof *expected);
    memcpy(expected, m.out, m.out_width * sizeof *expected);
    kvt_save_options options = bench_snap_save_options(KVT_CODEC_RAW);
    bench_require(kvt_seq_save(m.s.seq, m.path, &options), m.s.cache, "kvt_seq_save");
    struct stat file;
    if (stat(m.path, &file) != 0)
        bench_fail(1, "%s: %s", m.path, strerror(errno));
    double file_bytes = (double)file.st_size;
    if (bytes < o->map_bytes)
        snprintf(less, sizeof less, "%.2f GiB, not %.2f: memory or disk is short",
                 file_bytes * 0x1p-30, (double)o->map_bytes * 0x1p-30);

    bench_figure lazy = {"map", "map_lazy",  "of a full load",   1.0 / 20,
                         false, "full load", *less ? less : NULL};
    bench_figure verify = {"map", "map_verify", "of a full load", NAN, false, "full load", NULL};
    m.map = KVT_MAP_LAZY;
    run_mapped(&m);
    if (memcmp(m.out, expected, m.out_width * sizeof *expected) != 0)
        bench_fail(1, "snapshot: map: attention over the mapped file differs");
    bench_snap_pairs(o, &m.s, &lazy, run_mapped, run_load, &m, NAN);
    m.map = KVT_MAP_VERIFY;
    bench_snap_pairs(o, &m.s, &verify, run_mapped, run_load, &m, file_bytes);

    clear(&m);
    load(&m, KVT_MAP_LAZY);
    for (uint32_t layer = 0; layer < m.s.n_layers; layer++)
        attend(&m, layer);
    double mapped, added = second_process(&m, o, &mapped);
    bench_figure second = {"map", "map_second_process", "of the file", 0.01,
                           false, "the file",           words};
    if (isfinite(added))
        snprintf(words, sizeof words, "bytes of its own %.0f; %.0f of the file's are mapped", added,
                 mapped);
    else
        snprintf(words, sizeof words, "not measured: no /proc/self/smaps_rollup");
    bench_snap_value(o, &m.s, &second, added / file_bytes, file_bytes, "bytes");
    clear(&m);
    unlink(m.path);
    free(expected);
    free(m.q);
    free(m.out);
    bench_snap_close(&m.s);
}
