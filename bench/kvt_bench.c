/*
 * kvt-bench: the command line. The table of flags has the commands that take each; an argument
 * that cannot be parsed is named on stderr and the exit code is 2.
 */
#include "bench_files.h"
#include "bench_formats.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    DECODE = 1,
    PREFILL = 2,
    STEP = 4,
    APPEND = 8,
    SNAPSHOT = 16,
    FIDELITY = 32,
    MACHINE = 64,
    FORK = 128,
    SHIFT = 256,
    PREFIX = 512,
    SEAL = 1024,
    REPORT = 2048,
    COMPARE = 4096,
    STORE = 8192,
    ATTEND = DECODE | PREFILL | STEP | PREFIX,
    CACHE = ATTEND | APPEND | SEAL | SNAPSHOT | FORK | SHIFT,
    BARS = SNAPSHOT | STORE,
    MODEL = CACHE | FIDELITY,
    TIMED = CACHE | MACHINE | STORE,
    ALL = MODEL | MACHINE | STORE
};

static const char usage[] =
    "kvt-bench COMMAND [FLAGS]\n"
    "kvt-bench --help | --version\n"
    "\n"
    "  decode    attention of one token over a long context, beside the read bandwidth\n"
    "  prefill   attention of many tokens over a long context, beside the f32 peak\n"
    "  step      a whole decoding step of a small model, and its allocations\n"
    "  append    keys and values into the cache, beside memcpy\n"
    "  seal      an open block of f16 rows into its sealed form, beside memcpy\n"
    "  fork      a sequence that shares another one's blocks, and its first step\n"
    "  shift     decode over keys that have moved, beside as many that have not\n"
    "  prefix    attention of several forks in one call, beside a call for each\n"
    "  snapshot  save and load, beside memcpy, fwrite, fread and zstd; deltas, mapped files, "
    "sizes\n"
    "  store     a prefix out of a directory or Redis, beside read() and redis-benchmark\n"
    "  fidelity  what quantization costs, beside other formats: on random tokens, with --model on\n"
    "            a real model, with --qkv on queries, keys and values captured from one\n"
    "  machine   read bandwidth, clock and arithmetic peaks, which the others' ratios are to\n"
    "  report    the main ones of these as one HTML page with charts (needs gnuplot); minutes\n"
    "  compare OLD NEW   two files of --json lines: what has changed beyond noise\n"
    "\n"
    "LIST is one value or several with commas between them; every combination is run.\n"
    "  --k LIST, --v LIST  storage types: f32, f16, i8, i4, i5 (V)\n"
    "                      (default i8; --v: as K)                         not fidelity\n"
    "  --heads LIST        query:kv heads, e.g. 32:8,32:32                 (default 32:8;\n"
    "                      decode 32:32,32:8,28:4,32:4; prefix 32:32,32:8; fidelity 8:8,8:2)\n"
    "  --dim LIST          head dims, or K:V dims, e.g. 128,576:512        (default 128;\n"
    "                      fidelity 64,128,256)\n"
    "  --ctx LIST          tokens, also as 32k                             (default 32k;\n"
    "                      prefill, shift 8k; append, snapshot 4k; fidelity 2k; prefix 16k)\n"
    "                                                                      not seal\n"
    "  --threads LIST      (default 1; machine also all processors)        not seal\n"
    "  --isa LIST          kernels by name, or all                         (default: the widest;\n"
    "                      machine all)\n"
    "  --layers N          layers of the cache     (default: enough for 4 times the last-level\n"
    "                      cache; seal twice; prefill 1; fork 32)          not fidelity\n"
    "  --runs N            pairs of measurements, 9 or more                (default 15;\n"
    "                      report, store, and snapshot's figures with bars 9)\n"
    "  --llc-mib N         size of the last-level cache                    (default: as reported)\n"
    "  --seed N            of all random numbers                           (default 1)\n"
    "  --json              one JSON object a line\n"
    "  --quick             one pair on a small cache: shows that it runs, measures nothing\n"
    "decode, prefill, step, prefix, shift:\n"
    "  --mode LIST         how i8, i4 and i5 are multiplied: near, f32, fast (default near)\n"
    "  --v-in-k            V is the first dims of K and not stored, as in multi-head latent\n"
    "                      attention; --v as --k                (default --heads 128:1,16:1\n"
    "                      --dim 576:512)\n"
    "decode:\n"
    "  --window N          a sliding window of N tokens, also as 4k        (default none)\n"
    "  --against TYPE      beside the same with this type for K and V, in one run\n"
    "  --peer LIST         beside ggml's flash attention over a cache of f16, q8_0 or q4_0: ggml\n"
    "                      (the one of about as many bits), ggml:f16, ggml:q8_0, ggml:q4_0; only\n"
    "                      where ggml was there at build time          (default --k f16,i8,i4)\n"
    "prefill:\n"
    "  --queries N         the last so many of ctx tokens                  (default 512)\n"
    "prefix:\n"
    "  --forks N           of the sequence of ctx tokens                   (default 16)\n"
    "step: (default --heads 14:2 --dim 64 --ctx 4k --layers 24); also the slowest step of a block\n"
    "  --steps N           steps of a measurement                          (default 64)\n"
    "  --count             only the first steps, whose allocations are counted; no time\n"
    "append:\n"
    "  --tokens LIST       tokens a call, 1 to 512                         (default 1,512)\n"
    "  --dtype LIST        of the input: f32, f16, bf16                    (default f32)\n"
    "snapshot:\n"
    "  --dir PATH          where files go for the time being               (default $TMPDIR, "
    "/tmp)\n"
    "  --part LIST         sweep: each of --k, --v, --heads, --dim, --ctx, --threads; the others\n"
    "                      are figures with bars, on sequences of their own: memory, zstd, file,\n"
    "                      delta, map, model, crypt, threads             (default all)\n"
    "  --bytes N           of keys and values in those, also as 256m, 1g   (default 1g)\n"
    "  --map-bytes N       of the file that is mapped                      (default 4g)\n"
    "  --bars              exit code 1 where a bar is missed\n"
    "  --model FILE --tokenizer FILE   model's, of which the sizes are; as for report\n"
    "store: (--dir, --bytes and --bars as for snapshot; one --isa; --layers: default 2 and 32;\n"
    "        --threads: default 1 and all processors)\n"
    "  --part LIST         directory, redis                                (default both)\n"
    "  --redis HOST[:PORT] this server, also [ADDRESS]:PORT (default: redis-server is started);\n"
    "                      kvt-bench:* is put there and removed\n"
    "  --pipeline N        commands in flight                              (default 16)\n"
    "fidelity: (random tokens, or one of --model and --qkv)\n"
    "  --offset LIST       added to some K channels, in their deviations, 0 is plain\n"
    "                      (default 0,10,30,120; with --model 0,30,120)\n"
    "  --model FILE --tokenizer FILE   a llama2.c or tinylm model; heads and dims are its own\n"
    "  --text FILE         score this text, not generated stories\n"
    "  --stories N         stories, or at most so many pieces of the text  (default 24)\n"
    "  --qkv NAME          queries, keys (both after RoPE) and values of a model: NAME.q.npy,\n"
    "                      NAME.k.npy, NAME.v.npy, [layer][token][head][dim], f16 or f32\n"
    "    --causal, --full  query t sees tokens 0 to t (the default), or all\n"
    "    --scale X         of the logits                                   (default 1/sqrt(dim))\n"
    "    --queries N       so many queries, evenly spread                  (default 256)\n"
    "    --per-layer       a line for each layer\n"
    "  --formats LIST      references: f16, q8_0, q4_0, q4_0-rot, lm4-rot, turboquant4, exl3-4,\n"
    "                      kivi4, kvarn4; all, none        (default all; with --model none; then\n"
    "                      also all pairs of the library's types)\n"
    "  --svg FILE          bits against the errors, as a drawing; --qkv, --model\n"
    "report: (--threads: default 1 and all processors; --isa, --runs, --llc-mib, --seed, --quick,\n"
    "        --dir, --model and --tokenizer as above; the default model is examples/tinylm's\n"
    "        where the working directory or one above the program has it)\n"
    "  --out FOLDER        for report.html, *.svg, data.jsonl     (default kvt-report)\n"
    "  --from FILE         measure nothing: the page of these --json lines\n"
    "  --markdown FILE     also replace the tables between <!-- report NAME --> and\n"
    "                      <!-- end NAME --> in it; refused for noisy data but with --force\n"
    "compare: matches lines of the same configuration; a figure (a ratio within one run; of step\n"
    "        the time) has changed if the medians differ by more than the threshold and the\n"
    "        ranges p10 to p90 do not overlap (fidelity, without a spread: the threshold alone).\n"
    "        Exit code 1: a regression; what only one file has is listed and is none.\n"
    "  --threshold N       percent, 0 to 1000                              (default 5)\n"
    "  --force             files of different machines, too; report: noisy data in --markdown\n"
    "\n"
    "Exit code: 0 done, 1 a call, a check or a bar failed, 2 the command line is wrong.\n";

/* ---- values ---- */

/* What names and addresses of hosts consist of; % is before an interface. */
static const char hosts[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:%";

/* A number with an optional k (1024); nothing else around it. */
static uint64_t parse_count(const char *flag, const char *text, uint64_t least, uint64_t most)
{
    char *end = NULL;
    unsigned long long n = 0;
    errno = 0;
    if (isdigit((unsigned char)text[0]))
        n = strtoull(text, &end, 10);
    bool sound = end && end != text && errno == 0;
    if (sound && (*end == 'k' || *end == 'K') && n <= most / 1024) {
        n *= 1024;
        end++;
    }
    if (!sound || *end != 0 || n < least || n > most)
        bench_fail(2, "%s: %s is not a number from %llu to %llu", flag, text,
                   (unsigned long long)least, (unsigned long long)most);
    return n;
}

/* Bytes: a number with an optional k, m or g. At most 2^40. */
static uint64_t parse_bytes(const char *flag, const char *text)
{
    const char *units = "kmg", *unit;
    char digits[24];
    size_t n = strlen(text);
    if (n < 2 || n >= sizeof digits || !(unit = strchr(units, tolower((unsigned char)text[n - 1]))))
        return parse_count(flag, text, 1 << 20, (uint64_t)1 << 40);
    int shift = 10 * (int)(unit - units + 1);
    memcpy(digits, text, n - 1);
    digits[n - 1] = 0;
    uint64_t count = parse_count(flag, digits, 1, ((uint64_t)1 << 40) >> shift) << shift;
    if (count < 1 << 20)
        bench_fail(2, "%s: %s is less than 1m", flag, text);
    return count;
}

/* a:b, or one number for both where `single` allows it. */
static bench_pair parse_pair(const char *flag, const char *text, uint64_t most, bool single)
{
    char first[32];
    const char *colon = strchr(text, ':');
    bench_pair p;
    if (!colon && single) {
        p.first = p.second = (uint32_t)parse_count(flag, text, 1, most);
        return p;
    }
    if (!colon || (size_t)(colon - text) >= sizeof first)
        bench_fail(2, "%s: %s is not of the form 32:8", flag, text);
    memcpy(first, text, (size_t)(colon - text));
    first[colon - text] = 0;
    p.first = (uint32_t)parse_count(flag, first, 1, most);
    p.second = (uint32_t)parse_count(flag, colon + 1, 1, most);
    return p;
}

static kvt_type parse_type(const char *flag, const char *text)
{
    static const kvt_type types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4,
                                     KVT_TYPE_I5};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (!strcmp(text, bench_type_name(types[i])))
            return types[i];
    bench_fail(2, "%s: %s is not a type: f32, f16, i8, i4 or i5 (V)", flag, text);
}

static kvt_dtype parse_dtype(const char *flag, const char *text)
{
    static const kvt_dtype types[] = {KVT_F32, KVT_F16, KVT_BF16};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (!strcmp(text, bench_dtype_name(types[i])))
            return types[i];
    bench_fail(2, "%s: %s is not f32, f16 or bf16", flag, text);
}

static bench_mode parse_mode(const char *flag, const char *text)
{
    static const bench_mode modes[] = {BENCH_NEAR, BENCH_F32, BENCH_FAST};
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
        if (!strcmp(text, bench_mode_name(modes[i])))
            return modes[i];
    bench_fail(2, "%s: %s is not near, f32 or fast", flag, text);
}

static const char *parse_isa(const char *flag, const char *text)
{
    char names[256] = "";
    for (uint32_t i = 0; kvt_isa_name(i); i++) {
        if (!strcmp(kvt_isa_name(i), text))
            return kvt_isa_name(i);
        size_t n = strlen(names);
        snprintf(names + n, sizeof names - n, "%s%s", i ? ", " : "", kvt_isa_name(i));
    }
    bench_fail(2, "%s: no %s kernels here; there are: %s", flag, text, names);
}

static const bench_format *parse_format(const char *flag, const char *text)
{
    char names[256] = "";
    const bench_format *found = bench_format_find(text);
    for (size_t i = 0; !found && i < bench_n_formats; i++) {
        size_t n = strlen(names);
        snprintf(names + n, sizeof names - n, ", %s", bench_formats[i].name);
    }
    if (!found)
        bench_fail(2, "%s: %s is not all, none%s", flag, text, names);
    return found;
}

/* HOST, HOST:PORT, [ADDRESS] or [ADDRESS]:PORT: the host. Never freed. */
static const char *parse_address(const char *flag, const char *text, uint32_t *port)
{
    size_t n = strlen(text);
    char *host = bench_alloc(n + 1, 1), *end, *colon;
    strcpy(host, text);
    if (*host == '[') {
        host++;
        end = strchr(host, ']');
        if (!end || (end[1] && end[1] != ':'))
            bench_fail(2, "%s: %s is not of the form [ADDRESS]:PORT", flag, text);
        colon = end[1] ? end + 1 : NULL;
        *end = 0;
    } else {
        colon = strchr(host, ':');
    }
    *port = 6379;
    if (colon) {
        const char *digits = colon + 1;
        *colon = 0;
        if (strspn(digits, "0123456789") != strlen(digits) || strlen(digits) > 5 ||
            strtoul(digits, NULL, 10) < 1 || strtoul(digits, NULL, 10) > 65535)
            bench_fail(2, "%s: %s: the port is not a number from 1 to 65535", flag, text);
        *port = (uint32_t)strtoul(digits, NULL, 10);
    }
    /* redis-benchmark is called with it. */
    if (!*host || *host == '-' || strspn(host, hosts) != strlen(host))
        bench_fail(2, "%s: %s has no name or address of a host", flag, text);
    return host;
}

static double parse_scale(const char *flag, const char *text)
{
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end != 0 || !(x >= 1e-6 && x <= 1e6))
        bench_fail(2, "%s: %s is not a number from 1e-6 to 1e6", flag, text);
    return x;
}

static double parse_threshold(const char *flag, const char *text)
{
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end != 0 || !(x >= 0.0 && x <= 1000.0))
        bench_fail(2, "%s: %s is not a number from 0 to 1000", flag, text);
    return x;
}

static double parse_offset(const char *flag, const char *text)
{
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end != 0 || !isfinite(x) || x < 0.0 || x > 1e4)
        bench_fail(2, "%s: %s is not a number from 0 to 10000", flag, text);
    return x;
}

/* ---- flags ---- */

/* One list item into the options. i: its place in the list. */
static void set_k(bench_options *o, size_t i, const char *f, const char *x)
{
    o->k_types[i] = parse_type(f, x);
    if (o->k_types[i] == KVT_TYPE_I5)
        bench_fail(2, "%s: i5 is a type of V only", f);
    o->n_k_types = i + 1;
}
static void set_v(bench_options *o, size_t i, const char *f, const char *x)
{
    o->v_types[i] = parse_type(f, x);
    o->n_v_types = i + 1;
}
static void set_heads(bench_options *o, size_t i, const char *f, const char *x)
{
    bench_pair p = parse_pair(f, x, KVT_MAX_HEADS, false);
    if (p.first % p.second)
        bench_fail(2, "%s: %u query heads are no multiple of %u kv heads", f, p.first, p.second);
    o->heads[i] = p;
    o->n_heads = i + 1;
}
static void set_dim(bench_options *o, size_t i, const char *f, const char *x)
{
    bench_pair p = parse_pair(f, x, KVT_MAX_DIM, true);
    if (p.first % 8 || p.second % 8)
        bench_fail(2, "%s: %s: a dim is a multiple of 8", f, x);
    o->dims[i] = p;
    o->n_dims = i + 1;
}
static void set_ctx(bench_options *o, size_t i, const char *f, const char *x)
{
    o->ctx[i] = parse_count(f, x, 1, KVT_MAX_TOKENS / 2);
    o->n_ctx = i + 1;
}
static void set_threads(bench_options *o, size_t i, const char *f, const char *x)
{
    o->threads[i] = (uint32_t)parse_count(f, x, 1, KVT_MAX_THREADS);
    o->n_threads = i + 1;
}
static void set_isa(bench_options *o, size_t i, const char *f, const char *x)
{
    if (!strcmp(x, "all")) {
        for (uint32_t n = 0; kvt_isa_name(n) && i < BENCH_LIST; n++)
            o->isas[i++] = kvt_isa_name(n);
        o->n_isas = i;
        return;
    }
    o->isas[i] = parse_isa(f, x);
    o->n_isas = i + 1;
}
static void set_layers(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->layers = (size_t)parse_count(f, x, 1, KVT_MAX_LAYERS);
}
static void set_runs(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->runs = (size_t)parse_count(f, x, 9, 100000);
}
static void set_llc(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->llc_bytes = parse_count(f, x, 1, 1 << 20) << 20;
    o->llc_given = true;
}
static void set_seed(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->seed = parse_count(f, x, 0, UINT32_MAX);
}
static void set_mode(bench_options *o, size_t i, const char *f, const char *x)
{
    o->modes[i] = parse_mode(f, x);
    o->n_modes = i + 1;
}
static void set_v_in_k(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->v_in_k = true;
}
static void set_window(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->window = parse_count(f, x, 1, KVT_MAX_TOKENS);
}
static void set_against(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->against = parse_type(f, x);
    o->has_against = true;
    if (o->against == KVT_TYPE_I5)
        bench_fail(2, "%s: i5 is a type of V only", f);
}
static void set_peer(bench_options *o, size_t i, const char *f, const char *x)
{
    static const char *const names[] = {"ggml", "ggml:f16", "ggml:q8_0", "ggml:q4_0"};
    size_t n = sizeof names / sizeof names[0], peer = 0;
    while (peer < n && strcmp(names[peer], x) != 0)
        peer++;
    if (peer == n)
        bench_fail(2, "%s: %s is not ggml, ggml:f16, ggml:q8_0 or ggml:q4_0", f, x);
#if !defined(KVT_BENCH_GGML)
    bench_fail(2,
               "%s: this kvt-bench was built without ggml: install ggml, name its folder in "
               "CMAKE_PREFIX_PATH and configure again",
               f);
#endif
    o->peers[i] = (bench_peer)peer;
    o->n_peers = i + 1;
}

static void set_queries(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->queries = parse_count(f, x, 1, 1 << 20);
}
static void set_steps(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->steps = parse_count(f, x, 1, 1 << 16);
}
static void set_forks(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->forks = (size_t)parse_count(f, x, 1, 1 << 16);
}
static void set_count(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->count = true;
}
static void set_tokens(bench_options *o, size_t i, const char *f, const char *x)
{
    o->tokens[i] = parse_count(f, x, 1, 512);
    o->n_tokens = i + 1;
}
static void set_dtype(bench_options *o, size_t i, const char *f, const char *x)
{
    o->dtypes[i] = parse_dtype(f, x);
    o->n_dtypes = i + 1;
}
static void set_offset(bench_options *o, size_t i, const char *f, const char *x)
{
    o->offsets[i] = parse_offset(f, x);
    o->n_offsets = i + 1;
}
static void set_stories(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->stories = (size_t)parse_count(f, x, 1, 10000);
}
static void set_json(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->json = true;
}
static void set_quick(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->quick = true;
}
static void set_dir(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->dir = x;
}
static void set_part(bench_options *o, size_t i, const char *f, const char *x)
{
    static const char *const names[] = {"sweep", "memory", "zstd",    "file",      "delta", "map",
                                        "model", "crypt",  "threads", "directory", "redis"};
    (void)i;
    for (size_t n = 0; n < sizeof names / sizeof names[0]; n++)
        if (!strcmp(x, names[n])) {
            o->parts |= 1u << n;
            return;
        }
    bench_fail(2, "%s: there is no part %s", f, x);
}
static void set_redis(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->redis = parse_address(f, x, &o->redis_port);
}
static void set_pipeline(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->pipeline = parse_count(f, x, 1, 1000);
}
static void set_bytes(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->bytes = parse_bytes(f, x);
}
static void set_map_bytes(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->map_bytes = parse_bytes(f, x);
}
static void set_bars(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->bars = true;
}
static void set_model(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->model = x;
}
static void set_tokenizer(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->tokenizer = x;
}
static void set_qkv(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->qkv = x;
}
static void set_causal(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->full = false;
}
static void set_full(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->full = true;
}
static void set_scale(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->scale = parse_scale(f, x);
}
static void set_per_layer(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->per_layer = true;
}
static void set_formats(bench_options *o, size_t i, const char *f, const char *x)
{
    o->formats_given = true;
    if (!strcmp(x, "all") || !strcmp(x, "none")) {
        if (i > 0 || o->n_formats > 0)
            bench_fail(2, "%s: %s stands alone", f, x);
        for (size_t n = 0; *x == 'a' && n < bench_n_formats; n++)
            o->formats[o->n_formats++] = &bench_formats[n];
        return;
    }
    if (o->n_formats != i)
        bench_fail(2, "%s: all and none stand alone", f);
    o->formats[i] = parse_format(f, x);
    o->n_formats = i + 1;
}
static void set_svg(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->svg = x;
}
static void set_out(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->out = x;
}
static void set_from(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->from = x;
}
static void set_markdown(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->markdown = x;
}
static void set_force(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f, (void)x;
    o->force = true;
}
static void set_threshold(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i;
    o->threshold = parse_threshold(f, x);
}
static void set_text(bench_options *o, size_t i, const char *f, const char *x)
{
    (void)i, (void)f;
    o->text = x;
}

typedef enum flag_kind { SWITCH, ONE, LIST } flag_kind;

/* What fidelity runs on: which of it a flag goes with. */
enum { RANDOM = 1, ON_MODEL = 2, ON_QKV = 4, ANY = RANDOM | ON_MODEL | ON_QKV };

static const struct flag {
    const char *name;
    flag_kind kind;
    int commands;
    int on;
    void (*set)(bench_options *o, size_t i, const char *flag, const char *value);
} flags[] = {
    {"--k", LIST, CACHE, ANY, set_k},
    {"--v", LIST, CACHE, ANY, set_v},
    {"--heads", LIST, MODEL, RANDOM, set_heads},
    {"--dim", LIST, MODEL, RANDOM, set_dim},
    {"--ctx", LIST, MODEL & ~SEAL, RANDOM | ON_MODEL, set_ctx},
    {"--threads", LIST, (ALL & ~SEAL) | REPORT, ANY, set_threads},
    {"--isa", LIST, ALL | REPORT, RANDOM | ON_QKV, set_isa},
    {"--layers", ONE, CACHE | STORE, ANY, set_layers},
    {"--runs", ONE, TIMED | REPORT, ANY, set_runs},
    {"--llc-mib", ONE, TIMED | REPORT, ANY, set_llc},
    {"--seed", ONE, ALL | REPORT, ANY, set_seed},
    {"--json", SWITCH, ALL | COMPARE, ANY, set_json},
    {"--quick", SWITCH, ALL | REPORT, ANY, set_quick},
    {"--mode", LIST, ATTEND | SHIFT, ANY, set_mode},
    {"--v-in-k", SWITCH, ATTEND, ANY, set_v_in_k},
    {"--window", ONE, DECODE, ANY, set_window},
    {"--against", ONE, DECODE, ANY, set_against},
    {"--peer", LIST, DECODE, ANY, set_peer},
    {"--queries", ONE, PREFILL | FIDELITY, ON_QKV, set_queries},
    {"--steps", ONE, STEP, ANY, set_steps},
    {"--forks", ONE, PREFIX, ANY, set_forks},
    {"--count", SWITCH, STEP, ANY, set_count},
    {"--tokens", LIST, APPEND, ANY, set_tokens},
    {"--dtype", LIST, APPEND, ANY, set_dtype},
    {"--dir", ONE, BARS | REPORT, ANY, set_dir},
    {"--part", LIST, BARS, ANY, set_part},
    {"--redis", ONE, STORE, ANY, set_redis},
    {"--pipeline", ONE, STORE, ANY, set_pipeline},
    {"--bytes", ONE, BARS, ANY, set_bytes},
    {"--map-bytes", ONE, SNAPSHOT, ANY, set_map_bytes},
    {"--bars", SWITCH, BARS, ANY, set_bars},
    {"--offset", LIST, FIDELITY, RANDOM | ON_MODEL, set_offset},
    {"--model", ONE, FIDELITY | REPORT | SNAPSHOT, ON_MODEL, set_model},
    {"--tokenizer", ONE, FIDELITY | REPORT | SNAPSHOT, ON_MODEL, set_tokenizer},
    {"--text", ONE, FIDELITY, ON_MODEL, set_text},
    {"--stories", ONE, FIDELITY, ON_MODEL, set_stories},
    {"--qkv", ONE, FIDELITY, ON_QKV, set_qkv},
    {"--causal", SWITCH, FIDELITY, ON_QKV, set_causal},
    {"--full", SWITCH, FIDELITY, ON_QKV, set_full},
    {"--scale", ONE, FIDELITY, ON_QKV, set_scale},
    {"--per-layer", SWITCH, FIDELITY, ON_QKV, set_per_layer},
    {"--formats", LIST, FIDELITY, ON_MODEL | ON_QKV, set_formats},
    {"--svg", ONE, FIDELITY, ON_MODEL | ON_QKV, set_svg},
    {"--out", ONE, REPORT, ANY, set_out},
    {"--from", ONE, REPORT, ANY, set_from},
    {"--markdown", ONE, REPORT, ANY, set_markdown},
    {"--force", SWITCH, REPORT | COMPARE, ANY, set_force},
    {"--threshold", ONE, COMPARE, ANY, set_threshold},
};
enum { N_FLAGS = sizeof flags / sizeof flags[0] };

static void set_list(bench_options *o, const struct flag *flag, char *value)
{
    size_t i = 0;
    for (char *item = value; item; i++) {
        char *comma = strchr(item, ',');
        if (comma)
            *comma = 0;
        if (*item == 0)
            bench_fail(2, "%s: an empty item in the list", flag->name);
        if (i == BENCH_LIST)
            bench_fail(2, "%s: more than %d items", flag->name, BENCH_LIST);
        flag->set(o, i, flag->name, item);
        item = comma ? comma + 1 : NULL;
    }
}

/* The drawing can be written and is no input: now, and not after minutes. */
static void check_svg(const bench_options *o)
{
    static const char *const suffixes[] = {".q.npy", ".k.npy", ".v.npy"};
    const char *inputs[6] = {o->model, o->tokenizer, o->text, NULL, NULL, NULL};
    char *names[3] = {NULL, NULL, NULL};
    for (size_t i = 0; o->qkv && i < 3; i++) {
        size_t room = strlen(o->qkv) + strlen(suffixes[i]) + 1;
        inputs[3 + i] = names[i] = bench_alloc(room, 1);
        snprintf(names[i], room, "%s%s", o->qkv, suffixes[i]);
    }
    bench_file_check("--svg", o->svg, inputs, 6);
    for (size_t i = 0; i < 3; i++)
        free(names[i]);
}

/* argv[2..]; --flag value and --flag=value both work. */
static void parse_flags(bench_options *o, int command, const char *command_name, int argc,
                        char **argv)
{
    bool seen[N_FLAGS] = {false}, causal = false;
    for (int i = 2; i < argc; i++) {
        char *name = argv[i], *value = strchr(name, '=');
        size_t f = 0;
        if (command == COMPARE && name[0] != '-') {
            if (o->n_files == 2)
                bench_fail(2, "compare takes two files, not also %s", name);
            o->files[o->n_files++] = name;
            continue;
        }
        if (value)
            *value++ = 0;
        while (f < N_FLAGS && strcmp(flags[f].name, name) != 0)
            f++;
        if (f == N_FLAGS)
            bench_fail(2, "%s is not a flag; see kvt-bench --help", name);
        if (!(flags[f].commands & command))
            bench_fail(2, "%s does not go with %s", name, command_name);
        if (seen[f])
            bench_fail(2, "%s is given twice", name);
        seen[f] = true;
        causal = causal || flags[f].set == set_causal;
        if (flags[f].kind == SWITCH) {
            if (value)
                bench_fail(2, "%s takes no value", name);
            flags[f].set(o, 0, name, NULL);
            continue;
        }
        if (!value && ++i < argc)
            value = argv[i];
        if (!value || *value == 0)
            bench_fail(2, "%s needs a value", name);
        if (flags[f].kind == LIST)
            set_list(o, &flags[f], value);
        else
            flags[f].set(o, 0, name, value);
    }
    if (o->parts & (command == STORE ? ~BENCH_PARTS_STORE : BENCH_PARTS_STORE))
        bench_fail(2, "--part: not one of %s", command_name);
    if (!o->model != !o->tokenizer)
        bench_fail(2, "--model and --tokenizer go together");
    if (o->text && !o->model)
        bench_fail(2, "--text needs --model");
    if (o->model && o->qkv)
        bench_fail(2, "--model and --qkv are two things to measure");
    int on = o->model ? ON_MODEL : o->qkv ? ON_QKV : RANDOM;
    for (size_t f = 0; f < N_FLAGS && command == FIDELITY; f++) {
        if (!seen[f] || flags[f].on & on)
            continue;
        if (on != RANDOM)
            bench_fail(2, "%s does not go with %s", flags[f].name, o->model ? "--model" : "--qkv");
        bench_fail(2, "%s needs %s%s", flags[f].name, flags[f].on & ON_QKV ? "--qkv" : "--model",
                   flags[f].on == (ON_MODEL | ON_QKV) ? " or --model" : "");
    }
    if (o->n_peers && (o->has_against || o->window || o->v_in_k))
        bench_fail(2, "--peer does not go with --against, --window and --v-in-k");
    if (o->full && causal)
        bench_fail(2, "--causal and --full contradict each other");
    if (o->qkv && (o->n_threads > 1 || o->n_isas > 1))
        bench_fail(2, "--qkv: one --threads and one --isa");
    if (o->model && command == FIDELITY && (o->n_ctx > 1 || o->n_threads > 1))
        bench_fail(2, "--model: one --ctx and one --threads");
    if (o->svg)
        check_svg(o);
}

/* Defaults of the flags that were not given. */
static void set_defaults(bench_options *o, int command)
{
    const char *tmp = getenv("TMPDIR");
    if (o->n_peers && o->n_k_types == 0 && o->n_v_types == 0) {
        o->k_types[o->n_k_types++] = KVT_TYPE_F16;
        o->k_types[o->n_k_types++] = KVT_TYPE_I8;
        o->k_types[o->n_k_types++] = KVT_TYPE_I4;
    }
    if (o->n_k_types == 0) /* i5 is a type of V only */
        o->k_types[o->n_k_types++] =
            o->n_v_types == 0 || o->v_types[0] == KVT_TYPE_I5 ? KVT_TYPE_I8 : o->v_types[0];
    if (o->n_heads == 0) {
        o->heads[o->n_heads++] = (bench_pair){32, 8};
        if (o->v_in_k) {
            o->heads[0] = (bench_pair){128, 1};
            o->heads[o->n_heads++] = (bench_pair){16, 1};
        } else if (command == DECODE) {
            o->heads[0] = (bench_pair){32, 32};
            o->heads[o->n_heads++] = (bench_pair){32, 8};
            o->heads[o->n_heads++] = (bench_pair){28, 4};
            o->heads[o->n_heads++] = (bench_pair){32, 4};
        } else if (command == PREFIX) {
            o->heads[0] = (bench_pair){32, 32};
            o->heads[o->n_heads++] = (bench_pair){32, 8};
        } else if (command == STEP) {
            o->heads[0] = (bench_pair){14, 2};
        } else if (command == FIDELITY) {
            o->heads[0] = (bench_pair){8, 8};
            o->heads[o->n_heads++] = (bench_pair){8, 2};
        }
    }
    if (o->n_dims == 0) {
        o->dims[o->n_dims++] = (bench_pair){128, 128};
        if (o->v_in_k) {
            o->dims[0] = (bench_pair){576, 512};
        } else if (command == STEP) {
            o->dims[0] = (bench_pair){64, 64};
        } else if (command == FIDELITY) {
            o->dims[0] = (bench_pair){64, 64};
            o->dims[o->n_dims++] = (bench_pair){128, 128};
            o->dims[o->n_dims++] = (bench_pair){256, 256};
        }
    }
    if (o->n_ctx == 0 && (!o->model || command == SNAPSHOT))
        o->ctx[o->n_ctx++] = o->quick                                 ? 512
                             : command == FIDELITY                    ? 2048
                             : command == DECODE || command == FORK   ? 32768
                             : command == PREFIX                      ? 16384
                             : command == PREFILL || command == SHIFT ? 8192
                                                                      : 4096;
    if (o->n_threads == 0) {
        o->threads[o->n_threads++] = 1;
        if ((command == MACHINE || command == REPORT || (command == STORE && bench_has_pool())) &&
            bench_processors() > 1)
            o->threads[o->n_threads++] = bench_processors();
    }
    if (o->n_isas == 0) {
        if (command == MACHINE)
            set_isa(o, 0, "--isa", "all");
        else
            o->isas[o->n_isas++] = NULL;
    }
    if (o->steps == 0)
        o->steps = 64;
    if (o->forks == 0)
        o->forks = 16;
    if (o->n_modes == 0)
        o->modes[o->n_modes++] = BENCH_NEAR;
    if (o->queries == 0)
        o->queries = command == FIDELITY ? 256 : 512;
    if (!o->formats_given && o->qkv)
        for (size_t i = 0; i < bench_n_formats; i++)
            o->formats[o->n_formats++] = &bench_formats[i];
    if (o->n_tokens == 0) {
        o->tokens[o->n_tokens++] = 1;
        o->tokens[o->n_tokens++] = 512;
    }
    if (o->n_dtypes == 0)
        o->dtypes[o->n_dtypes++] = KVT_F32;
    if (o->n_offsets == 0) {
        o->offsets[o->n_offsets++] = 0.0;
        if (!o->model)
            o->offsets[o->n_offsets++] = 10.0;
        o->offsets[o->n_offsets++] = 30.0;
        o->offsets[o->n_offsets++] = 120.0;
    }
    o->bar_runs = o->quick ? 1 : o->runs ? o->runs : 9;
    if (o->runs == 0)
        o->runs = command == REPORT ? 9 : 15;
    if (o->quick)
        o->runs = 1;
    if (o->pipeline == 0)
        o->pipeline = 16;
    if (o->parts == 0)
        o->parts = ~0u;
    if (o->bytes == 0)
        o->bytes = (uint64_t)1 << (o->quick ? 20 : 30);
    if (o->map_bytes == 0)
        o->map_bytes = (uint64_t)4 << (o->quick ? 20 : 30);
    if (o->stories == 0)
        o->stories = o->quick ? 1 : 24;
    if (o->llc_bytes == 0)
        o->llc_bytes = bench_llc_bytes();
    if (!o->dir)
        o->dir = tmp && *tmp ? tmp : "/tmp";
}

/* Check all cases before any is measured. */
static void check_v_in_k(const bench_options *o)
{
    for (size_t k = 0; k < o->n_k_types; k++)
        for (size_t v = 0; v < o->n_v_types; v++)
            if (o->k_types[k] != o->v_types[v])
                bench_fail(2, "--v-in-k: K as %s and V as %s: V in K is of K's type; leave out --v",
                           bench_type_name(o->k_types[k]), bench_type_name(o->v_types[v]));
    for (size_t i = 0; i < o->n_dims; i++)
        if (o->dims[i].second > o->dims[i].first)
            bench_fail(2, "--v-in-k: --dim %u:%u: V in K has no more dims than K", o->dims[i].first,
                       o->dims[i].second);
}

/* Files can be made in --dir: now, and not behind what needs none. */
static void check_dir(const bench_options *o)
{
    struct stat found;
    if (stat(o->dir, &found) != 0 || access(o->dir, W_OK | X_OK) != 0)
        bench_fail(2, "--dir: %s: %s", o->dir, strerror(errno));
    if (!S_ISDIR(found.st_mode))
        bench_fail(2, "--dir: %s is not a folder", o->dir);
}

int bench_each_case(const bench_options *o, int (*run)(const bench_options *o, const bench_case *c))
{
    size_t n_v = o->n_v_types ? o->n_v_types : 1;
    size_t counts[] = {o->n_isas, o->n_threads, o->n_k_types, n_v, o->n_dims, o->n_heads, o->n_ctx};
    enum { AXES = sizeof counts / sizeof counts[0] };
    size_t at[AXES] = {0};
    int result = 0;
    for (;;) {
        bench_case c;
        memset(&c, 0, sizeof c);
        c.isa = o->isas[at[0]];
        c.threads = o->threads[at[1]];
        c.k_type = o->k_types[at[2]];
        c.v_type = o->n_v_types ? o->v_types[at[3]] : c.k_type;
        c.k_dim = o->dims[at[4]].first;
        c.v_dim = o->dims[at[4]].second;
        c.v_in_k = o->v_in_k;
        c.window = (uint32_t)o->window;
        c.q_heads = o->heads[at[5]].first;
        c.kv_heads = o->heads[at[5]].second;
        c.ctx = o->ctx[at[6]];
        int code = run(o, &c);
        if (code > result)
            result = code;
        size_t axis = AXES;
        while (axis > 0 && ++at[axis - 1] == counts[axis - 1])
            at[--axis] = 0;
        if (axis == 0)
            return result;
    }
}

/* The command line as text, before it is cut up. Never freed. */
static const char *join(int argc, char **argv)
{
    size_t n = 16;
    for (int i = 1; i < argc; i++)
        n += strlen(argv[i]) + 1;
    char *line = bench_alloc(n, 1), *p = line + sprintf(line, "kvt-bench");
    for (int i = 1; i < argc; i++)
        p += sprintf(p, " %s", argv[i]);
    return line;
}

static int finish(int code)
{
    if (fflush(stdout) != 0 || ferror(stdout))
        bench_fail(1, "stdout: cannot be written");
    return code;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int bit;
        int (*run)(const bench_options *options);
    } commands[] = {{"decode", DECODE, bench_decode},
                    {"prefill", PREFILL, bench_prefill},
                    {"step", STEP, bench_step},
                    {"append", APPEND, bench_append},
                    {"seal", SEAL, bench_seal},
                    {"fork", FORK, bench_fork},
                    {"shift", SHIFT, bench_shift},
                    {"prefix", PREFIX, bench_prefix},
                    {"snapshot", SNAPSHOT, bench_snapshot},
                    {"store", STORE, bench_store},
                    {"fidelity", FIDELITY, bench_fidelity},
                    {"machine", MACHINE, bench_machine},
                    {"report", REPORT, bench_page},
                    {"compare", COMPARE, bench_compare}};
    static bench_options options;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h") ||
            (i == 1 && !strcmp(argv[i], "help"))) {
            fputs(usage, stdout);
            return finish(0);
        }
        if (!strcmp(argv[i], "--version")) {
            printf("kvt-bench %s\n", kvt_version());
            return finish(0);
        }
    }
    if (argc < 2) {
        fputs(usage, stderr);
        return 2;
    }
    if (!strcmp(argv[1], "snapshot-reader"))
        return bench_snap_reader(argc, argv);
    options.seed = 1;
    options.threshold = 5.0;
    options.command_line = join(argc, argv);
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(argv[1], commands[i].name) != 0)
            continue;
        parse_flags(&options, commands[i].bit, commands[i].name, argc, argv);
        set_defaults(&options, commands[i].bit);
        if (options.v_in_k)
            check_v_in_k(&options);
        if (commands[i].bit & BARS || (commands[i].bit == REPORT && !options.from))
            check_dir(&options);
        return finish(commands[i].run(&options));
    }
    bench_fail(2, "%s is not a command: see kvt-bench --help", argv[1]);
}
