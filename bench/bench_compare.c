/*
 * compare: two files of JSON lines, before and after a change, for a continuous integration.
 *
 * Lines with the same configuration (bench, kernels, types, shape, threads, mode, ...) are matched,
 * in any order; lines of one configuration within a file, as of several runs, are put together: the
 * median of their medians, the least p10, the greatest p90. Each bench has one figure that is
 * judged, its ratio to what was measured in turn with it, so that a machine that is slower for a
 * while does not count. It has changed where the medians differ by more than --threshold percent
 * and the ranges p10 to p90 do not overlap. Figures of fidelity have no spread: with the same texts
 * and seed they do not vary from run to run, and the threshold alone counts. The machine's own
 * read bandwidth is shown and never judged.
 */
#include "bench_lines.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bench_column columns[] = {{"verdict", NULL, -12}, {"configuration", NULL, -72},
                                       {"figure", NULL, -12},  {"old", NULL, 9},
                                       {"old_p10", "p10", 9},  {"old_p90", "p90", 9},
                                       {"new", NULL, 9},       {"new_p10", "p10", 9},
                                       {"new_p90", "p90", 9},  {"change_percent", "change %", 9}};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

typedef enum better { HIGHER, LOWER, SHOWN } better; /* SHOWN: not judged */

static const struct figure {
    const char *bench, *value, *p10, *p90; /* p10 NULL: no spread */
    better better;
    double floor; /* differences up to this one are rounding */
} figures[] = {
    {"decode", "ratio", "ratio_p10", "ratio_p90", HIGHER, 0.0},
    {"prefill", "ratio", "ratio_p10", "ratio_p90", HIGHER, 0.0},
    {"append", "memcpy_ratio", "memcpy_ratio_p10", "memcpy_ratio_p90", HIGHER, 0.0},
    {"snapshot", "plain_ratio", "plain_ratio_p10", "plain_ratio_p90", HIGHER, 0.0},
    {"snapshot_bars", "value", "p10", "p90", HIGHER, 0.0},
    {"snapshot_bars", "value", "p10", "p90", LOWER, 0.0}, /* by the line's "better" */
    {"store_bars", "value", "p10", "p90", HIGHER, 0.0},
    {"seal", "ratio", "ratio_p10", "ratio_p90", HIGHER, 0.0},
    {"prefix", "ratio", "ratio_p10", "ratio_p90", HIGHER, 0.0},
    {"against", "speedup", "speedup_p10", "speedup_p90", HIGHER, 0.0},
    {"shift", "ratio", "ratio_p10", "ratio_p90", LOWER, 0.0},
    {"fork", "memcpy_ratio", "memcpy_ratio_p10", "memcpy_ratio_p90", LOWER, 0.0},
    {"step", "ms_median", "ms_p10", "ms_p90", LOWER, 0.0},
    {"fidelity", "kl", NULL, NULL, LOWER, 0.01}, /* 1e-6 nats */
    {"fidelity", "kl_mean", NULL, NULL, LOWER, 0.01},
    {"fidelity", "error", NULL, NULL, LOWER, 1e-6},
    {"machine", "read_gbps", "read_p10", "read_p90", SHOWN, 0.0},
};
enum { N_FIGURES = sizeof figures / sizeof figures[0] };

/* What a configuration is, beside kernels, types, heads and dims. null, false and 0 are left out,
   so that a line without the key matches. */
static const char *const identity[] = {
    "name",  "v_in_k",   "ctx",        "threads",   "mode",   "window", "queries",     "against",
    "dtype", "tokens",   "blocks",     "op",        "medium", "codec",  "fsync",       "layers",
    "forks", "steps",    "own_tokens", "data",      "method", "cut",    "offset",      "causal",
    "scale", "residual", "key_bias",   "reference", "layer",  "texts",  "predictions", "rival"};
enum { N_IDENTITY = sizeof identity / sizeof identity[0] };

typedef struct entry {
    char *key;
    const struct figure *figure; /* NULL: none is a number */
    double value, p10, p90, *values;
    size_t n; /* lines with a number */
    bool quick, matched;
    bool exact; /* sizes, which come out the same each time, and have no pairs */
} entry;

typedef struct side {
    bench_lines lines;
    entry *entries;
    size_t n;
    const char *cpu, *compiler;
    double llc_bytes;
} side;

static char *key_of(const bench_line *l)
{
    bench_text t = {NULL, 0, 0};
    bench_text_add(&t, "%s", bench_line_text(l, "bench"));
    if (*bench_line_text(l, "isa"))
        bench_text_add(&t, " %s", bench_line_text(l, "isa"));
    if (*bench_line_text(l, "k_type"))
        bench_text_add(&t, " %s/%s", bench_line_text(l, "k_type"), bench_line_text(l, "v_type"));
    const bench_field *q = bench_line_find(l, "q_heads"), *kv = bench_line_find(l, "kv_heads");
    const bench_field *dim = bench_line_find(l, "head_dim"), *v = bench_line_find(l, "v_dim");
    if (q && kv)
        bench_text_add(&t, " %s:%s", q->text, kv->text);
    if (dim && v && !strcmp(dim->text, v->text))
        bench_text_add(&t, " dim %s", dim->text);
    else if (dim && v)
        bench_text_add(&t, " dim %s:%s", dim->text, v->text);
    for (size_t i = 0; i < N_IDENTITY; i++) {
        const bench_field *f = bench_line_find(l, identity[i]);
        if (f && f->kind != BENCH_NULL && strcmp(f->text, "false") != 0 && strcmp(f->text, "0"))
            bench_text_add(&t, " %s%s%s", identity[i], f->kind == BENCH_BOOL ? "" : " ",
                           f->kind == BENCH_BOOL ? "" : f->text);
    }
    if (!strcmp(bench_line_text(l, "bench"), "fidelity") && bench_line_find(l, "seed"))
        bench_text_add(&t, " seed %s", bench_line_find(l, "seed")->text);
    return t.data;
}

static const struct figure *figure_of(const bench_line *l)
{
    const char *way = bench_line_text(l, "better");
    for (size_t i = 0; i < N_FIGURES; i++)
        if (bench_line_is(l, "bench", figures[i].bench) &&
            (!*way || !strcmp(way, figures[i].better == LOWER ? "lower" : "higher")) &&
            isfinite(bench_line_number(l, figures[i].value)))
            return &figures[i];
    return NULL;
}

static void add(side *s, const bench_line *l)
{
    char *key = key_of(l);
    size_t i = 0;
    while (i < s->n && strcmp(s->entries[i].key, key) != 0)
        i++;
    entry *e = &s->entries[i];
    if (i < s->n) {
        free(key);
    } else {
        s->n++;
        e->key = key;
        e->p10 = INFINITY;
        e->p90 = -INFINITY;
        e->values = bench_alloc(s->lines.n, sizeof *e->values);
    }
    e->quick = e->quick || bench_line_is(l, "quick", "true");
    e->exact = bench_line_is(l, "pairs", "0");
    const struct figure *f = figure_of(l);
    if (!f || (e->figure && e->figure != f))
        return;
    e->figure = f;
    e->values[e->n++] = bench_line_number(l, f->value);
    e->value = bench_median(e->values, e->n);
    double p10 = f->p10 ? bench_line_number(l, f->p10) : NAN;
    double p90 = f->p90 ? bench_line_number(l, f->p90) : NAN;
    /* One line without a spread: the entry has none. */
    e->p10 = isnan(p10) || isnan(e->p10) ? NAN : fmin(e->p10, p10);
    e->p90 = isnan(p90) || isnan(e->p90) ? NAN : fmax(e->p90, p90);
}

static void note_machine(const bench_options *o, side *s, const bench_line *l)
{
    const char *cpu = bench_line_text(l, "cpu"), *compiler = bench_line_text(l, "compiler");
    double llc = bench_line_number(l, "llc_bytes");
    if (*cpu && *s->cpu && strcmp(cpu, s->cpu) != 0 && !o->force)
        bench_fail(2, "%s:%zu: of another machine than the lines before (%s, %s); --force",
                   s->lines.path, l->number, cpu, s->cpu);
    if (*cpu)
        s->cpu = cpu;
    if (*compiler)
        s->compiler = compiler;
    if (isfinite(llc))
        s->llc_bytes = llc;
}

static side read_side(const bench_options *o, const char *path)
{
    side s;
    memset(&s, 0, sizeof s);
    s.lines = bench_lines_read(path);
    s.entries = bench_alloc(s.lines.n, sizeof *s.entries);
    s.cpu = s.compiler = "";
    s.llc_bytes = NAN;
    for (size_t i = 0; i < s.lines.n; i++) {
        const bench_line *l = &s.lines.lines[i];
        if (bench_line_is(l, "bench", "report")) /* what report says about itself */
            continue;
        note_machine(o, &s, l);
        add(&s, l);
    }
    return s;
}

static void free_side(side *s)
{
    for (size_t i = 0; i < s->n; i++) {
        free(s->entries[i].key);
        free(s->entries[i].values);
    }
    free(s->entries);
    bench_lines_free(&s->lines);
}

static void check_machines(const bench_options *o, const side *old, const side *new)
{
    bool cpu = strcmp(old->cpu, new->cpu) != 0;
    bool llc = isfinite(old->llc_bytes) && isfinite(new->llc_bytes) &&
               fabs(old->llc_bytes - new->llc_bytes) > 0.5;
    if ((cpu || llc) && !o->force)
        bench_fail(2,
                   "the files are of different machines: %s, last-level cache %.0f bytes; %s, %.0f "
                   "bytes; --force compares them anyway",
                   *old->cpu ? old->cpu : "unknown", old->llc_bytes,
                   *new->cpu ? new->cpu : "unknown", new->llc_bytes);
}

typedef enum verdict { SAME, REGRESSION, IMPROVEMENT, UNJUDGED, ONLY_OLD, ONLY_NEW } verdict;

static verdict judge(const bench_options *o, const entry *old, const entry *new)
{
    const struct figure *f = old->figure;
    if (!f || new->figure != f || f->better == SHOWN || old->quick || new->quick)
        return UNJUDGED;
    bool has_spread = f->p10 && !(old->exact && new->exact);
    if (has_spread && (isnan(old->p10) || isnan(new->p10) || isnan(old->p90) || isnan(new->p90)))
        return UNJUDGED;
    if (fabs(new->value - old->value) <= f->floor)
        return SAME;
    if (has_spread && old->p10 <= new->p90 &&new->p10 <= old->p90)
        return SAME;
    double low = fmin(old->value, new->value), high = fmax(old->value, new->value);
    if (high <= low * (1.0 + o->threshold / 100.0))
        return SAME;
    return (new->value > old->value) == (f->better == HIGHER) ? IMPROVEMENT : REGRESSION;
}

static void put(bench_record *r, const char *key, const entry *e, double value)
{
    bench_record_number(r, key, e && e->figure ? value : NAN);
}

static void emit(const bench_options *o, verdict v, const entry *old, const entry *new)
{
    static const char *const names[] = {"same",       "REGRESSION",  "improvement",
                                        "not judged", "only in OLD", "only in NEW"};
    const entry *any = old ? old : new;
    bool both = old && new && old->figure && old->figure == new->figure;
    bench_record r;
    r.n = 0;
    bench_record_text(&r, "bench", "compare");
    bench_record_text(&r, "verdict", names[v]);
    bench_record_text(&r, "configuration", any->key);
    bench_record_text(&r, "figure", any->figure ? any->figure->value : NULL);
    put(&r, "old", old, old ? old->value : NAN);
    put(&r, "old_p10", old, old ? old->p10 : NAN);
    put(&r, "old_p90", old, old ? old->p90 : NAN);
    put(&r, "new", new, new ? new->value : NAN);
    put(&r, "new_p10", new, new ? new->p10 : NAN);
    put(&r, "new_p90", new, new ? new->p90 : NAN);
    bench_record_number(&r, "change_percent", both ? 100.0 * (new->value / old->value - 1.0) : NAN);
    bench_emit(o, &r, columns, N_COLUMNS);
}

int bench_compare(const bench_options *options)
{
    if (options->n_files != 2)
        bench_fail(2, "compare takes two files, OLD and NEW: see kvt-bench --help");
    side old = read_side(options, options->files[0]), new = read_side(options, options->files[1]);
    size_t counts[ONLY_NEW + 1] = {0}, matched = 0, judged = 0;
    check_machines(options, &old, &new);

    if (!options->json) {
        printf("compare: %s, then %s\n", options->files[0], options->files[1]);
        printf("%s, %s\n", *new.cpu ? new.cpu : "unknown machine", new.compiler);
        if (strcmp(old.compiler, new.compiler) != 0)
            printf("compilers differ: %s, then %s\n", old.compiler, new.compiler);
        for (size_t i = 0; i < N_COLUMNS; i++)
            printf("%*s ", columns[i].width, columns[i].title ? columns[i].title : columns[i].key);
        printf("\n");
    }
    for (size_t i = 0; i < old.n; i++) {
        entry *e = &old.entries[i], *other = NULL;
        for (size_t j = 0; j < new.n && !other; j++)
            if (!strcmp(new.entries[j].key, e->key))
                other = &new.entries[j];
        verdict v = other ? judge(options, e, other) : ONLY_OLD;
        if (other)
            other->matched = true;
        matched += other != NULL;
        judged += v <= IMPROVEMENT;
        counts[v]++;
        emit(options, v, e, other);
    }
    for (size_t i = 0; i < new.n; i++) {
        if (new.entries[i].matched)
            continue;
        counts[ONLY_NEW]++;
        emit(options, ONLY_NEW, NULL, &new.entries[i]);
    }
    bench_note(options,
               "%zu judged: %zu regressions, %zu improvements, %zu the same (up to %g %%, or p10 "
               "to p90 overlap); %zu not judged\n"
               "(the machine's own, of --quick, or without a spread); %zu only in OLD, %zu only in "
               "NEW.",
               judged, counts[REGRESSION], counts[IMPROVEMENT], counts[SAME], options->threshold,
               counts[UNJUDGED], counts[ONLY_OLD], counts[ONLY_NEW]);
    free_side(&old);
    free_side(&new);
    if (matched == 0)
        bench_fail(2, "no configuration is in both files");
    if (judged == 0)
        bench_fail(2, "nothing to judge: every line that is in both files is of --quick, without a "
                      "spread, or the machine's own");
    return counts[REGRESSION] > 0;
}
