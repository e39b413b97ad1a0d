/*
 * The sections of decode: over the length of the context, and over the number of query heads for
 * each kv head. Each takes the longest such series that the data have.
 */
#include "bench_page.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double heads_ratio(const bench_line *l)
{
    return bench_line_number(l, "q_heads") / bench_line_number(l, "kv_heads");
}

static double x_of(const bench_line *l, bool over_ctx)
{
    return over_ctx ? bench_line_number(l, "ctx") : heads_ratio(l);
}

/* What stays the same along the axis. */
static bool same_sweep(const bench_line *a, const bench_line *b, bool over_ctx)
{
    return bench_line_same(a, b, "head_dim") && bench_line_same(a, b, "v_dim") &&
           (over_ctx ? bench_line_same(a, b, "q_heads") && bench_line_same(a, b, "kv_heads")
                     : bench_line_same(a, b, "ctx"));
}

/* Insert into sorted distinct numbers. */
static void insert(double *values, size_t *n, double value)
{
    size_t i = *n;
    for (size_t j = 0; j < *n; j++)
        if (fabs(values[j] - value) < 1e-9)
            return;
    if (!isfinite(value) || *n == BENCH_POINTS)
        return;
    for (; i > 0 && values[i - 1] > value; i--)
        values[i] = values[i - 1];
    values[i] = value;
    ++*n;
}

typedef struct sweep {
    const bench_line **lines;
    size_t n;
    double xs[BENCH_POINTS], threads[BENCH_POINTS];
    size_t n_xs, n_threads;
    bool over_ctx, by_mode, by_isa;
} sweep;

/* The lines of the longest sweep in the data. */
static void find_sweep(const bench_sections *s, sweep *w)
{
    const bench_line **all, *best = NULL;
    size_t n = bench_lines_of(s, "decode", &all), kept = 0, most = 0;
    for (size_t i = 0; i < n; i++) /* plain ones only */
        if (!(bench_line_number(all[i], "window") > 0.0) &&
            !bench_line_is(all[i], "v_in_k", "true"))
            all[kept++] = all[i];
    for (size_t i = 0; i < kept; i++) {
        double xs[BENCH_POINTS];
        size_t n_xs = 0;
        for (size_t j = 0; j < kept; j++)
            if (same_sweep(all[i], all[j], w->over_ctx))
                insert(xs, &n_xs, x_of(all[j], w->over_ctx));
        if (n_xs > most) {
            most = n_xs;
            best = all[i];
        }
    }
    w->lines = all;
    for (size_t i = 0; i < kept; i++) {
        if (!same_sweep(best, all[i], w->over_ctx))
            continue;
        w->lines[w->n++] = all[i];
        insert(w->xs, &w->n_xs, x_of(all[i], w->over_ctx));
        insert(w->threads, &w->n_threads, bench_line_number(all[i], "threads"));
    }
    w->by_mode = bench_lines_vary(w->lines, w->n, "mode");
    w->by_isa = bench_lines_vary(w->lines, w->n, "isa");
}

static void sweep_name(const sweep *w, const bench_line *l, char *name, size_t capacity)
{
    snprintf(name, capacity, "%s%s%s%s%s", bench_line_types(l), w->by_mode ? " " : "",
             w->by_mode ? bench_line_text(l, "mode") : "", w->by_isa ? " " : "",
             w->by_isa ? bench_line_text(l, "isa") : "");
}

static double read_at(const sweep *w, double threads, double x)
{
    double *values = bench_alloc(w->n, sizeof *values);
    size_t n = 0;
    for (size_t i = 0; i < w->n; i++)
        if (fabs(bench_line_number(w->lines[i], "threads") - threads) < 0.5 &&
            fabs(x_of(w->lines[i], w->over_ctx) - x) < 1e-9 &&
            isfinite(bench_line_number(w->lines[i], "read_gbps")))
            values[n++] = bench_line_number(w->lines[i], "read_gbps");
    double median = bench_median(values, n);
    free(values);
    return median;
}

static void sweep_chart(bench_sections *s, const sweep *w, double threads)
{
    char name[64], caption[160];
    snprintf(name, sizeof name, "decode-%s-%.0f", w->over_ctx ? "context" : "heads", threads);
    bench_chart *c = bench_chart_new(
        BENCH_LINES, name, w->over_ctx ? "tokens in the context" : "query heads for each kv head",
        "GB/s of K and V");
    for (size_t i = 0; i < w->n_xs; i++) {
        snprintf(c->ticks[i], sizeof c->ticks[i], "%s",
                 w->over_ctx ? bench_tokens_text(w->xs[i]) : bench_digits(w->xs[i]));
        if (!w->over_ctx)
            snprintf(c->ticks[i], sizeof c->ticks[i], "%g", w->xs[i]);
        c->tick_at[i] = w->xs[i];
    }
    c->n_ticks = w->n_xs;
    for (size_t i = 0; i < w->n; i++) {
        const bench_line *l = w->lines[i];
        char label[64];
        if (fabs(bench_line_number(l, "threads") - threads) > 0.5)
            continue;
        sweep_name(w, l, label, sizeof label);
        bench_series *line = bench_chart_series(c, label, bench_style_type(bench_line_types(l)));
        double x = x_of(l, w->over_ctx), bytes = 1e-6 * bench_line_number(l, "bytes");
        bool there = !line;
        for (size_t j = 0; line && j < line->n; j++)
            there = there || fabs(line->x[j] - x) < 1e-9;
        if (!there)
            bench_series_add(line, x, bench_line_number(l, "gbps"),
                             bytes / bench_line_number(l, "ms_p90"),
                             bytes / bench_line_number(l, "ms_p10"));
    }
    for (size_t i = 0; i < c->n; i++) /* series of one type differ by their dashes */
        for (size_t j = 0; j < i; j++)
            c->series[i].dash += !strcmp(c->series[i].type, c->series[j].type);
    bench_series *read = bench_chart_series(c, "read bandwidth", NULL);
    for (size_t i = 0; i < w->n_xs; i++)
        bench_series_add(read, w->xs[i], read_at(w, threads, w->xs[i]), NAN, NAN);
    snprintf(caption, sizeof caption,
             "%.0f thread%s: bytes of K and V a second, medians with p10 to p90, beside the "
             "machine's read bandwidth in the same runs",
             threads, threads > 1.5 ? "s" : "");
    bench_section_draw(s, c, caption);
}

/* What a cell has: GB/s and its ratio, or milliseconds and the speed as a multiple of f16's. */
static void sweep_cell(const sweep *w, const bench_line *l, bool time, char *label, size_t size)
{
    double ms = bench_line_number(l, "ms_median");
    const bench_line *f16 = NULL;
    if (!time) {
        snprintf(label, size, "%s, %s", bench_digits(bench_line_number(l, "gbps")),
                 bench_digits(bench_line_number(l, "ratio")));
        return;
    }
    for (size_t j = 0; j < w->n && !f16; j++)
        if (!strcmp(bench_line_types(w->lines[j]), "f16") &&
            bench_line_same(w->lines[j], l, "threads") && bench_line_same(w->lines[j], l, "isa") &&
            bench_line_same(w->lines[j], l, "ctx") && bench_line_same(w->lines[j], l, "q_heads") &&
            bench_line_same(w->lines[j], l, "kv_heads"))
            f16 = w->lines[j];
    if (f16 && f16 != l)
        snprintf(label, size, "%s, %sx", bench_digits(ms),
                 bench_digits(bench_line_number(f16, "ms_median") / ms));
    else
        snprintf(label, size, "%s", bench_digits(ms));
}

static void sweep_table(bench_sections *s, const sweep *w, bool time)
{
    char label[96], name[64];
    const bench_line **done = bench_alloc(w->n, sizeof *done);
    size_t n_done = 0;
    bench_table t =
        bench_table_open(s, w->over_ctx ? time ? "decode-context-time" : "decode-context"
                            : time      ? "decode-heads-time"
                                        : "decode-heads");
    bench_cell(&t, "K and V");
    for (size_t i = 0; i < w->n_xs; i++) {
        if (w->over_ctx)
            snprintf(label, sizeof label, "%s", bench_tokens_text(w->xs[i]));
        else
            snprintf(label, sizeof label, "%g", w->xs[i]);
        bench_cell(&t, label);
    }
    bench_row(&t);
    for (size_t k = 0; k < w->n_threads; k++) {
        for (size_t i = 0; i < w->n; i++) {
            const bench_line *l = w->lines[i];
            bool there = fabs(bench_line_number(l, "threads") - w->threads[k]) > 0.5;
            sweep_name(w, l, name, sizeof name);
            for (size_t j = 0; j < n_done && !there; j++) {
                char other[64];
                sweep_name(w, done[j], other, sizeof other);
                there = bench_line_same(done[j], l, "threads") && !strcmp(name, other);
            }
            if (there)
                continue;
            done[n_done++] = l;
            snprintf(label, sizeof label, "%s, %.0f thread%s", name, w->threads[k],
                     w->threads[k] > 1.5 ? "s" : "");
            bench_row_begin(&t);
            bench_cell(&t, label);
            for (size_t x = 0; x < w->n_xs; x++) {
                const bench_line *at = NULL;
                for (size_t j = 0; j < w->n && !at; j++) {
                    char other[64];
                    sweep_name(w, w->lines[j], other, sizeof other);
                    if (bench_line_same(w->lines[j], l, "threads") && !strcmp(name, other) &&
                        fabs(x_of(w->lines[j], w->over_ctx) - w->xs[x]) < 1e-9)
                        at = w->lines[j];
                }
                if (at)
                    sweep_cell(w, at, time, label, sizeof label);
                bench_cell(&t, at ? label : "-");
            }
            bench_row(&t);
        }
        if (time)
            continue;
        snprintf(label, sizeof label, "memory, %.0f thread%s", w->threads[k],
                 w->threads[k] > 1.5 ? "s" : "");
        bench_row_begin(&t);
        bench_cell(&t, label);
        for (size_t x = 0; x < w->n_xs; x++)
            bench_cell_number(&t, read_at(w, w->threads[k], w->xs[x]));
        bench_row(&t);
    }
    bench_table_close(&t);
    free(done);
}

/* What a quantized type buys over f16: at the most tokens and threads that both have. */
static void sweep_cards(bench_sections *s, const sweep *w)
{
    static const char *const types[] = {"i8", "i4"};
    for (size_t k = 0; k < 2; k++) {
        const bench_line *best = NULL, *f16 = NULL;
        for (size_t i = 0; i < w->n; i++)
            for (size_t j = 0; j < w->n; j++) {
                const bench_line *a = w->lines[i], *b = w->lines[j];
                if (strcmp(bench_line_types(a), types[k]) != 0 ||
                    strcmp(bench_line_types(b), "f16") != 0 || !bench_line_same(a, b, "threads") ||
                    !bench_line_same(a, b, "ctx") || !bench_line_same(a, b, "isa") ||
                    !bench_line_is(a, "mode", "near"))
                    continue;
                double x = bench_line_number(a, "ctx"), threads = bench_line_number(a, "threads");
                double y = best ? bench_line_number(best, "ctx") : -1.0;
                if (x > y || (x >= y && threads > bench_line_number(best, "threads"))) {
                    best = a;
                    f16 = b;
                }
            }
        if (!best)
            continue;
        bench_text_add(
            &s->cards,
            "<div><dt>%s</dt><dd><b>%s&times;</b> the speed of f16 in %s of its bytes</dd>"
            "<dd class=\"small\">attention of one token over %s tokens, %.0f:%.0f heads, %.0f "
            "thread%s; reads K and V at %s GB/s, f16's at %s</dd></div>\n",
            types[k],
            bench_digits(bench_line_number(f16, "ms_median") /
                         bench_line_number(best, "ms_median")),
            bench_digits(bench_line_number(best, "bytes") / bench_line_number(f16, "bytes")),
            bench_tokens_text(bench_line_number(best, "ctx")), bench_line_number(best, "q_heads"),
            bench_line_number(best, "kv_heads"), bench_line_number(best, "threads"),
            bench_line_number(best, "threads") > 1.5 ? "s" : "",
            bench_digits(bench_line_number(best, "gbps")),
            bench_digits(bench_line_number(f16, "gbps")));
    }
}

void bench_section_decode(bench_sections *s, bool over_ctx)
{
    sweep *w = bench_alloc(1, sizeof *w);
    w->over_ctx = over_ctx;
    find_sweep(s, w);
    bench_section_begin(s, over_ctx ? "decode-context" : "decode-heads",
                        over_ctx ? "Decode: length of the context"
                                 : "Decode: query heads for each kv head");
    if (w->n == 0) {
        bench_section_missing(
            s, over_ctx ? "kvt-bench decode --json --k f16,i8,i4 --heads 32:8 --ctx 1k,4k,16k"
                        : "kvt-bench decode --json --k f16,i8,i4 --ctx 8k");
    } else {
        char words[400];
        const bench_line *l = w->lines[0];
        if (over_ctx)
            snprintf(words, sizeof words,
                     "Attention of one token, one layer a call, %.0f query heads on %.0f kv heads "
                     "of %.0f dims. The bytes are those of the stored K and V, each read once; "
                     "fewer of them for the same tokens are what quantization gains. ",
                     bench_line_number(l, "q_heads"), bench_line_number(l, "kv_heads"),
                     bench_line_number(l, "head_dim"));
        else
            snprintf(
                words, sizeof words,
                "The same over %s tokens with other numbers of query heads that share a kv "
                "head (GQA): each byte of K and V is multiplied once for each of them, so that "
                "in the end arithmetic is the limit, not memory. ",
                bench_tokens_text(bench_line_number(l, "ctx")));
        bench_section_text(s, words);
        bench_text_add(&s->page, "<div class=\"charts\">\n");
        for (size_t i = 0; i < w->n_threads; i++)
            sweep_chart(s, w, w->threads[i]);
        bench_text_add(&s->page, "</div>\n");
        bench_section_text(
            s, over_ctx ? "GB/s, and ratio to the read bandwidth measured in turn with it; columns "
                          "are tokens:"
                        : "GB/s, and ratio to the read bandwidth; columns are query heads for "
                          "each kv head:");
        sweep_table(s, w, false);
        bench_section_text(s, "Milliseconds of a call, and its speed as a multiple of f16's:");
        sweep_table(s, w, true);
        if (over_ctx)
            sweep_cards(s, w);
    }
    bench_section_end(s);
    free(w->lines);
    free(w);
}
