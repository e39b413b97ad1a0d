/*
 * The sections of the report: each takes the lines of the data that it is about, whatever commands
 * they came from, and makes charts and one table of them; a section without lines says which
 * command would measure it. Numbers are the lines' own, rounded for the tables.
 */
#include "bench_page.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- machine ---- */

static void section_machine(bench_sections *s)
{
    const bench_line **lines;
    size_t n = bench_lines_of(s, "machine", &lines);
    bench_section_begin(s, "machine", "The machine");
    bench_section_text(
        s, "What the other figures are ratios to: bytes a second of the fastest of several loops "
           "that only read memory, and the peaks of f32 multiply-adds and of integer dot "
           "products. Medians; all threads together.");
    if (n == 0) {
        bench_section_missing(s, "kvt-bench machine --json");
    } else {
        bench_table t = bench_table_open(s, "machine");
        bench_titles(&t, "Kernels|threads|read GB/s|p10 to p90|GHz|FMA GFLOP/s|dot GMAC/s");
        for (size_t i = 0; i < n; i++) {
            bench_row_begin(&t);
            bench_cell(&t, bench_line_text(lines[i], "isa"));
            bench_cell(&t, bench_tokens_text(bench_line_number(lines[i], "threads")));
            bench_cell_number(&t, bench_line_number(lines[i], "read_gbps"));
            bench_cell_range(&t, lines[i], "read_p10", "read_p90");
            bench_cell_number(&t, bench_line_number(lines[i], "clock_ghz"));
            bench_cell_number(&t, bench_line_number(lines[i], "fma_gflops"));
            bench_cell_number(&t, bench_line_number(lines[i], "dot_gmacs"));
            bench_row(&t);
        }
        bench_table_close(&t);
    }
    bench_section_end(s);
    free(lines);
}

/* ---- fidelity ---- */

static bool ours(const bench_line *l)
{
    const char *type = bench_line_text(l, "k_type");
    return bench_line_text(l, "method")[0] != 'R' &&
           (*bench_style_type(type) || !strcmp(type, "i5"));
}

static void fidelity_model(bench_sections *s, const bench_line *const *lines, size_t n)
{
    bench_chart *c = bench_chart_new(BENCH_SCATTER, "fidelity", "bits an element, at this length",
                                     "KL of the next token, 1e-4 nats");
    char name[96], words[400];
    bool missed = false;
    for (size_t i = 0; i < n; i++) {
        const bench_line *l = lines[i];
        double kl = bench_line_number(l, "kl"), se = bench_line_number(l, "kl_se");
        double bits = bench_line_number(l, "bits_ctx");
        missed = missed || !strcmp(bench_line_text(l, "pass"), "no");
        if (strcmp(bench_line_text(l, "residual"), "64") != 0 || !(kl > 0.0) ||
            strcmp(bench_line_text(l, "cut"), "single") != 0)
            continue;
        bench_series *point =
            bench_chart_series(c, bench_line_types(l), ours(l) ? "kvtile" : "other");
        if (point && point->n == 0)
            bench_series_add(point, bits, kl, kl - se > 0.05 * kl ? kl - se : NAN, kl + se);
    }
    snprintf(
        words, sizeof words,
        "What is lost, on a small language model: the Kullback-Leibler divergence of its next "
        "token's distribution from that with an f32 cache, %s predictions in texts of "
        "up to %s tokens (texts: %s). The newest 64 to 127 tokens stay in f16 here, for the other "
        "formats, too; bits have that in them.",
        bench_tokens_text(bench_line_number(lines[0], "predictions")),
        bench_tokens_text(bench_line_number(lines[0], "ctx")),
        bench_tokens_text(bench_line_number(lines[0], "texts")));
    bench_section_text(s, words);
    bench_text_add(&s->page, "<div class=\"charts\">\n");
    bench_section_draw(
        s, c,
        "Bits against KL, with one standard error over the texts; lower and to the left is "
        "better");
    bench_text_add(&s->page, "</div>\n");
    bench_table t = bench_table_open(s, "fidelity");
    bench_titles(
        &t, "K/V|f16 window|bits|bits here|KL, 1e-4 nats|standard error|perplexity %|same top %");
    for (size_t i = 0; i < n; i++) {
        const bench_line *l = lines[i];
        bench_row_begin(&t);
        snprintf(name, sizeof name, "%s%s", bench_line_types(l),
                 strcmp(bench_line_text(l, "cut"), "prompt") ? "" : ", in one call");
        if (!strcmp(bench_line_text(l, "method"), "R1"))
            snprintf(name, sizeof name, "%s before append", bench_line_types(l));
        else if (!strcmp(bench_line_text(l, "method"), "R2"))
            snprintf(name, sizeof name, "%s before append, q too", bench_line_types(l));
        bench_cell(&t, name);
        bench_cell(&t, bench_line_text(l, "residual"));
        bench_cell_number(&t, bench_line_number(l, "bits"));
        bench_cell_number(&t, bench_line_number(l, "bits_ctx"));
        bench_cell_number(&t, bench_line_number(l, "kl"));
        bench_cell_number(&t, bench_line_number(l, "kl_se"));
        bench_cell_number(&t, bench_line_number(l, "perplexity_change"));
        bench_cell_number(&t, bench_line_number(l, "same_top"));
        bench_row(&t);
    }
    bench_table_close(&t);
    if (missed)
        bench_text_add(&s->page, "<p class=\"warning\">A type missed its bar in this run "
                                 "(<code>pass</code> in the raw data).</p>\n");
}

static void fidelity_random(bench_sections *s, const bench_line *const *lines, size_t n)
{
    bench_section_text(
        s, "No model was measured, so there is no KL here: a model is named with --model and "
           "--tokenizer. On random tokens, some of them with large key channels (offset, in their "
           "deviations), the error of attention's output, relative L2:");
    bench_table t = bench_table_open(s, "fidelity");
    bench_titles(&t, "Method|tokens come|q:kv|dims|tokens|offset|bits|error");
    for (size_t i = 0; i < n; i++) {
        char heads[64];
        const bench_line *l = lines[i];
        bench_row_begin(&t);
        bench_cell(&t, bench_line_text(l, "method"));
        bench_cell(&t, bench_line_text(l, "cut"));
        snprintf(heads, sizeof heads, "%.0f:%.0f", bench_line_number(l, "q_heads"),
                 bench_line_number(l, "kv_heads"));
        bench_cell(&t, heads);
        bench_cell(&t, bench_tokens_text(bench_line_number(l, "head_dim")));
        bench_cell(&t, bench_tokens_text(bench_line_number(l, "ctx")));
        bench_cell(&t, bench_tokens_text(bench_line_number(l, "offset")));
        bench_cell_number(&t, bench_line_number(l, "bits"));
        bench_cell_number(&t, bench_line_number(l, "error"));
        bench_row(&t);
    }
    bench_table_close(&t);
}

static void section_fidelity(bench_sections *s)
{
    const bench_line **all, **model, **random;
    size_t n = bench_lines_of(s, "fidelity", &all), n_model = 0, n_random = 0;
    model = bench_alloc(n, sizeof *model);
    random = bench_alloc(n, sizeof *random);
    for (size_t i = 0; i < n; i++) {
        bool plain = !(bench_line_number(all[i], "key_bias") > 0.0);
        if (isfinite(bench_line_number(all[i], "kl")) && plain)
            model[n_model++] = all[i];
        else if (!strcmp(bench_line_text(all[i], "data"), "random"))
            random[n_random++] = all[i];
    }
    bench_section_begin(s, "fidelity", "Fidelity: bits against KL");
    if (n_model > 0)
        fidelity_model(s, model, n_model);
    else if (n_random > 0)
        fidelity_random(s, random, n_random);
    else
        bench_section_missing(s, "kvt-bench fidelity --json --model FILE --tokenizer FILE");
    bench_section_end(s);
    free(random);
    free(model);
    free(all);
}

/* ---- prefill, append, snapshot ---- */

static void section_prefill(bench_sections *s)
{
    const bench_line **lines;
    size_t n = bench_lines_of(s, "prefill", &lines);
    bench_section_begin(s, "prefill", "Prefill");
    if (n == 0) {
        bench_section_missing(s, "kvt-bench prefill --json --k f16,i8,i4");
    } else {
        char words[300];
        bench_chart *c = bench_chart_new(BENCH_BARS, "prefill", "ratio to the f32 peak", "");
        bench_series *bars = bench_chart_series(c, "kvtile", "kvtile");
        bool by_isa = bench_lines_vary(lines, n, "isa"),
             by_threads = bench_lines_vary(lines, n, "threads");
        bool by_heads = bench_lines_vary(lines, n, "kv_heads");
        c->mark = 1.0;
        snprintf(words, sizeof words,
                 "Causal attention of %s queries at the end of %s tokens, %.0f:%.0f heads of %.0f "
                 "dims, over the machine's peak of f32 multiply-adds, measured between the calls. "
                 "Types that are multiplied as integers can pass it.",
                 bench_tokens_text(bench_line_number(lines[0], "queries")),
                 bench_tokens_text(bench_line_number(lines[0], "ctx")),
                 bench_line_number(lines[0], "q_heads"), bench_line_number(lines[0], "kv_heads"),
                 bench_line_number(lines[0], "head_dim"));
        bench_section_text(s, words);
        for (size_t i = 0; i < n && c->n_ticks < BENCH_POINTS; i++) {
            const bench_line *l = lines[i];
            bench_text name = {NULL, 0, 0};
            bench_text_add(&name, "%s", bench_line_types(l));
            if (bench_line_text(l, "k_type")[0] != 'f') /* floats have one mode */
                bench_text_add(&name, " %s", bench_line_text(l, "mode"));
            if (by_isa)
                bench_text_add(&name, ", %s", bench_line_text(l, "isa"));
            if (by_heads)
                bench_text_add(&name, ", %.0f:%.0f", bench_line_number(l, "q_heads"),
                               bench_line_number(l, "kv_heads"));
            if (by_threads)
                bench_text_add(&name, ", %.0f", bench_line_number(l, "threads"));
            snprintf(c->ticks[c->n_ticks], sizeof c->ticks[0], "%s", name.data);
            bench_series_add(bars, (double)c->n_ticks++, bench_line_number(l, "ratio"),
                             bench_line_number(l, "ratio_p10"), bench_line_number(l, "ratio_p90"));
            bench_text_free(&name);
        }
        bench_text_add(&s->page, "<div class=\"charts\">\n");
        bench_section_draw(
            s, c,
            "GFLOP/s over the f32 multiply-add peak (the dashed line), medians with p10 to "
            "p90");
        bench_text_add(&s->page, "</div>\n");
        bench_table t = bench_table_open(s, "prefill");
        bench_titles(&t, "K/V|mode|kernels|threads|GFLOP/s|peak|ratio|p10 to p90");
        for (size_t i = 0; i < n; i++) {
            bench_row_begin(&t);
            bench_cell(&t, bench_line_types(lines[i]));
            bench_cell(&t, bench_line_text(lines[i], "mode"));
            bench_cell(&t, bench_line_text(lines[i], "isa"));
            bench_cell(&t, bench_tokens_text(bench_line_number(lines[i], "threads")));
            bench_cell_number(&t, bench_line_number(lines[i], "gflops"));
            bench_cell_number(&t, bench_line_number(lines[i], "fma_gflops"));
            bench_cell_number(&t, bench_line_number(lines[i], "ratio"));
            bench_cell_range(&t, lines[i], "ratio_p10", "ratio_p90");
            bench_row(&t);
        }
        bench_table_close(&t);
    }
    bench_section_end(s);
    free(lines);
}

static void section_append(bench_sections *s)
{
    const bench_line **lines;
    size_t n = bench_lines_of(s, "append", &lines);
    bench_section_begin(s, "append", "Append");
    if (n == 0) {
        bench_section_missing(s, "kvt-bench append --json --k f16,i8,i4");
    } else {
        bench_chart *c = bench_chart_new(BENCH_BARS, "append", "ratio to memcpy", "");
        bench_series *bars = bench_chart_series(c, "kvtile", "kvtile");
        c->mark = 1.0;
        bench_section_text(
            s, "Keys and values into every layer, by one token or many a call, over a memcpy of "
               "the same input bytes in turn with it. Recycled blocks were used before; fresh ones "
               "are written for the first time, page faults included.");
        for (size_t i = 0; i < n && c->n_ticks < BENCH_POINTS; i++) {
            const bench_line *l = lines[i];
            snprintf(c->ticks[c->n_ticks], sizeof c->ticks[0], "%s, %s, %s", bench_line_types(l),
                     bench_tokens_text(bench_line_number(l, "tokens")),
                     bench_line_text(l, "blocks"));
            bench_series_add(bars, (double)c->n_ticks++, bench_line_number(l, "memcpy_ratio"),
                             bench_line_number(l, "memcpy_ratio_p10"),
                             bench_line_number(l, "memcpy_ratio_p90"));
        }
        bench_text_add(&s->page, "<div class=\"charts\">\n");
        bench_section_draw(
            s, c,
            "Type, tokens a call, blocks: input bytes a second over those of memcpy (the dashed "
            "line), medians with p10 "
            "to p90");
        bench_text_add(&s->page, "</div>\n");
        bench_table t = bench_table_open(s, "append");
        bench_titles(&t, "K/V|tokens a call|blocks|us a token|GB/s in|memcpy|ratio|p10 to p90");
        for (size_t i = 0; i < n; i++) {
            bench_row_begin(&t);
            bench_cell(&t, bench_line_types(lines[i]));
            bench_cell(&t, bench_tokens_text(bench_line_number(lines[i], "tokens")));
            bench_cell(&t, bench_line_text(lines[i], "blocks"));
            bench_cell_number(&t, bench_line_number(lines[i], "us_per_token"));
            bench_cell_number(&t, bench_line_number(lines[i], "gbps"));
            bench_cell_number(&t, bench_line_number(lines[i], "memcpy_gbps"));
            bench_cell_number(&t, bench_line_number(lines[i], "memcpy_ratio"));
            bench_cell_range(&t, lines[i], "memcpy_ratio_p10", "memcpy_ratio_p90");
            bench_row(&t);
        }
        bench_table_close(&t);
    }
    bench_section_end(s);
    free(lines);
}

static void section_snapshot(bench_sections *s)
{
    const bench_line **lines;
    size_t n = bench_lines_of(s, "snapshot", &lines);
    bench_section_begin(s, "snapshot", "Snapshot");
    if (n == 0) {
        bench_section_missing(s, "kvt-bench snapshot --json --k i8");
    } else {
        bench_chart *c = bench_chart_new(BENCH_BARS, "snapshot", "ratio to plain bytes", "");
        bench_series *bars = bench_chart_series(c, "kvtile", "kvtile");
        c->mark = 1.0;
        bool by_type = bench_lines_vary(lines, n, "k_type") || bench_lines_vary(lines, n, "v_type");
        bench_section_text(
            s, "A sequence saved and loaded, all layers, beside as many random bytes by memcpy, "
               "fwrite (with fsync where the snapshot has it) or fread, in turn. Random keys and "
               "values hardly compress: zstd shows what it costs, not what it saves on a model's.");
        for (size_t i = 0; i < n && c->n_ticks < BENCH_POINTS; i++) {
            const bench_line *l = lines[i];
            snprintf(c->ticks[c->n_ticks], sizeof c->ticks[0], "%s%s%s, %s, %s%s",
                     by_type ? bench_line_types(l) : "", by_type ? " " : "",
                     bench_line_text(l, "op"), bench_line_text(l, "medium"),
                     bench_line_text(l, "codec"),
                     strcmp(bench_line_text(l, "fsync"), "yes") ? "" : ", fsync");
            bench_series_add(bars, (double)c->n_ticks++, bench_line_number(l, "plain_ratio"),
                             bench_line_number(l, "plain_ratio_p10"),
                             bench_line_number(l, "plain_ratio_p90"));
        }
        bench_text_add(&s->page, "<div class=\"charts\">\n");
        bench_section_draw(
            s, c,
            "Bytes of K and V a second over those of memcpy, fwrite or fread (the dashed line), "
            "medians with p10 to p90");
        bench_text_add(&s->page, "</div>\n");
        bench_table t = bench_table_open(s, "snapshot");
        bench_titles(&t,
                     "K/V|call|medium|codec|fsync|GB/s|beside|GB/s|ratio|p10 to p90|compression");
        for (size_t i = 0; i < n; i++) {
            bench_row_begin(&t);
            bench_cell(&t, bench_line_types(lines[i]));
            bench_cell(&t, bench_line_text(lines[i], "op"));
            bench_cell(&t, bench_line_text(lines[i], "medium"));
            bench_cell(&t, bench_line_text(lines[i], "codec"));
            bench_cell(&t, bench_or_dash(bench_line_text(lines[i], "fsync")));
            bench_cell_number(&t, bench_line_number(lines[i], "gbps"));
            bench_cell(&t, bench_line_text(lines[i], "plain"));
            bench_cell_number(&t, bench_line_number(lines[i], "plain_gbps"));
            bench_cell_number(&t, bench_line_number(lines[i], "plain_ratio"));
            bench_cell_range(&t, lines[i], "plain_ratio_p10", "plain_ratio_p90");
            bench_cell_number(&t, bench_line_number(lines[i], "compression"));
            bench_row(&t);
        }
        bench_table_close(&t);
    }
    bench_section_end(s);
    free(lines);
}

static void section_bars(bench_sections *s)
{
    const bench_line **lines;
    size_t n = bench_lines_of(s, "snapshot_bars", &lines);
    bench_section_begin(s, "snapshot-bars", "Snapshot: bars");
    if (n == 0) {
        bench_section_missing(s, "kvt-bench snapshot --json");
    } else {
        bench_section_text(
            s, "Saves, loads, deltas, mapped files and sizes, each beside what does the same in "
               "another way, in the same run; the bar is what is asked of it. Synthetic keys and "
               "values but for part model, which has a small language model's.");
        bench_table t = bench_table_open(s, "snapshot-bars");
        bench_titles(&t, "Part|figure|K/V|threads|value|p25 to p75|unit|bar|met|GB/s|beside|its "
                         "figure|unit");
        for (size_t i = 0; i < n; i++) {
            bench_row_begin(&t);
            bench_cell(&t, bench_line_text(lines[i], "part"));
            bench_cell(&t, bench_line_text(lines[i], "name"));
            bench_cell(&t, bench_or_dash(bench_line_types(lines[i])));
            bench_cell(&t, bench_tokens_text(bench_line_number(lines[i], "threads")));
            bench_cell_number(&t, bench_line_number(lines[i], "value"));
            bench_cell_range(&t, lines[i], "p25", "p75");
            bench_cell(&t, bench_line_text(lines[i], "unit"));
            bench_cell(&t, bench_or_dash(bench_line_text(lines[i], "bar_text")));
            bench_cell(&t, bench_or_dash(bench_line_text(lines[i], "met")));
            bench_cell_number(&t, bench_line_number(lines[i], "gbps"));
            bench_cell(&t, bench_line_text(lines[i], "rival"));
            bench_cell_number(&t, bench_line_number(lines[i], "rival_value"));
            bench_cell(&t, bench_or_dash(bench_line_text(lines[i], "rival_unit")));
            bench_row(&t);
        }
        bench_table_close(&t);
    }
    bench_section_end(s);
    free(lines);
}

void bench_sections_make(bench_sections *s)
{
    bench_section_decode(s, true);
    bench_section_decode(s, false);
    section_fidelity(s);
    section_prefill(s);
    section_append(s);
    section_snapshot(s);
    section_bars(s);
    section_machine(s);
}
