/*
 * What the sections of the report are made of: tables, as HTML and as Markdown at once, numbers as
 * texts, and the choice of lines.
 */
#include "bench_page.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void bench_html(bench_text *t, const char *text)
{
    for (; *text; text++) {
        if (*text == '<')
            bench_text_add(t, "&lt;");
        else if (*text == '>')
            bench_text_add(t, "&gt;");
        else if (*text == '&')
            bench_text_add(t, "&amp;");
        else if (*text == '"')
            bench_text_add(t, "&quot;");
        else
            bench_text_bytes(t, text, 1);
    }
}

double bench_noise(const bench_lines *data)
{
    double *spread = bench_alloc(data->n, sizeof *spread);
    size_t n = 0;
    for (size_t i = 0; i < data->n; i++) {
        const bench_line *l = &data->lines[i];
        double s = (bench_line_number(l, "ms_p90") - bench_line_number(l, "ms_p10")) /
                   bench_line_number(l, "ms_median");
        if (isfinite(s) && !bench_line_is(l, "quick", "true"))
            spread[n++] = s;
    }
    double median = bench_median(spread, n);
    free(spread);
    return median;
}

/* ---- tables: as HTML into the page, as Markdown beside it ---- */

bench_table bench_table_open(bench_sections *s, const char *name)
{
    bench_table t = {s, NULL, true};
    if (s->n_tables == sizeof s->tables / sizeof s->tables[0])
        bench_fail(1, "report: too many tables");
    s->tables[s->n_tables].name = name;
    t.md = &s->tables[s->n_tables++].text;
    bench_text_add(&s->page, "<div class=\"scroll\" tabindex=\"0\"><table>\n<thead><tr>");
    return t;
}

void bench_cell(bench_table *t, const char *text)
{
    const char *tag = t->title ? "th" : "td";
    bench_text_add(&t->s->page, "<%s>", tag);
    bench_html(&t->s->page, text);
    bench_text_add(&t->s->page, "</%s>", tag);
    bench_text_add(t->md, "| ");
    for (; *text; text++) /* a bar would end the cell */
        bench_text_add(t->md, *text == '|' ? "\\%c" : "%c", *text);
    bench_text_add(t->md, " ");
}

void bench_titles(bench_table *t, const char *text)
{
    char title[64];
    while (*text) {
        size_t n = strcspn(text, "|");
        snprintf(title, sizeof title, "%.*s", (int)n, text);
        bench_cell(t, title);
        text += n + (text[n] == '|');
    }
    bench_row(t);
}

void bench_row(bench_table *t)
{
    bench_text_add(&t->s->page, "</tr>\n");
    bench_text_add(t->md, "|\n");
    if (t->title) {
        size_t columns = 0;
        for (const char *p = t->md->data; *p; p++)
            columns += *p == '|' && (p == t->md->data || p[-1] != '\\');
        for (size_t i = 1; i < columns; i++)
            bench_text_add(t->md, i == 1 ? "|---" : "|--:");
        bench_text_add(t->md, "|\n");
        bench_text_add(&t->s->page, "</thead>\n<tbody>\n");
    }
    t->title = false;
}

void bench_row_begin(bench_table *t)
{
    bench_text_add(&t->s->page, "<tr>");
}

void bench_table_close(bench_table *t)
{
    bench_text_add(&t->s->page, "</tbody></table></div>\n");
}

const char *bench_digits(double x)
{
    static char texts[8][32];
    static size_t at;
    char *text = texts[at++ % 8];
    double size = fabs(x);
    if (!isfinite(x))
        return "-";
    if (size >= 100.0 || size < 1e-30)
        snprintf(text, sizeof texts[0], "%.0f", x);
    else if (size >= 0.01)
        snprintf(text, sizeof texts[0], "%.*f", size >= 10.0 ? 1 : size >= 0.1 ? 2 : 3, x);
    else
        snprintf(text, sizeof texts[0], size >= 0.0001 ? "%.2g" : "%.1e", x);
    return text;
}

void bench_cell_number(bench_table *t, double x)
{
    bench_cell(t, bench_digits(x));
}

void bench_cell_range(bench_table *t, const bench_line *l, const char *p10, const char *p90)
{
    char text[80];
    double low = bench_line_number(l, p10), high = bench_line_number(l, p90);
    snprintf(text, sizeof text, "%s to %s", bench_digits(low), bench_digits(high));
    bench_cell(t, isfinite(low) && isfinite(high) ? text : "-");
}

const char *bench_or_dash(const char *text)
{
    return *text ? text : "-";
}

const char *bench_tokens_text(double n)
{
    static char texts[4][32];
    static size_t at;
    char *text = texts[at++ % 4];
    if (!isfinite(n))
        return "-";
    if (n >= 1024.0 && fmod(n, 1024.0) < 0.5)
        snprintf(text, sizeof texts[0], "%.0fk", n / 1024.0);
    else
        snprintf(text, sizeof texts[0], "%.0f", n);
    return text;
}

/* ---- lines ---- */

const char *bench_line_types(const bench_line *l)
{
    static char texts[4][64];
    static size_t at;
    char *text = texts[at++ % 4];
    const char *k = bench_line_text(l, "k_type"), *v = bench_line_text(l, "v_type");
    if (!strcmp(k, v))
        return k;
    snprintf(text, sizeof texts[0], "%.24s/%.24s", k, v);
    return text;
}

const char *bench_style_type(const char *type)
{
    static const char *const types[] = {"i8", "i4", "f16", "f32"};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (!strcmp(type, types[i]))
            return types[i];
    return "";
}

static bool is_bench(const bench_line *l, const char *bench)
{
    return !strcmp(bench_line_text(l, "bench"), bench);
}

bool bench_line_same(const bench_line *a, const bench_line *b, const char *key)
{
    const bench_field *x = bench_line_find(a, key), *y = bench_line_find(b, key);
    return !x || !y ? x == y : !strcmp(x->text, y->text);
}

size_t bench_lines_of(const bench_sections *s, const char *bench, const bench_line ***found)
{
    size_t n = 0;
    *found = bench_alloc(s->data->n, sizeof **found);
    for (size_t i = 0; i < s->data->n; i++)
        if (is_bench(&s->data->lines[i], bench))
            (*found)[n++] = &s->data->lines[i];
    return n;
}

bool bench_lines_vary(const bench_line *const *lines, size_t n, const char *key)
{
    for (size_t i = 1; i < n; i++)
        if (!bench_line_same(lines[0], lines[i], key))
            return true;
    return false;
}

void bench_section_begin(bench_sections *s, const char *id, const char *title)
{
    bench_text_add(&s->page, "<section id=\"%s\">\n<h2>%s</h2>\n", id, title);
}

void bench_section_end(bench_sections *s)
{
    bench_text_add(&s->page, "</section>\n");
}

void bench_section_text(bench_sections *s, const char *words)
{
    bench_text_add(&s->page, "<p>");
    bench_html(&s->page, words);
    bench_text_add(&s->page, "</p>\n");
}

void bench_section_missing(bench_sections *s, const char *command)
{
    bench_text_add(&s->page, "<p class=\"missing\">Not in these data: <code>%s</code></p>\n",
                   command);
}

void bench_section_draw(bench_sections *s, bench_chart *c, const char *caption)
{
    bool empty = true;
    for (size_t i = 0; i < c->n; i++)
        empty = empty && c->series[i].n == 0;
    if (empty) {
        free(c);
        return;
    }
    bench_text_add(&s->page, "<figure>");
    snprintf(c->label, sizeof c->label, "%s", caption);
    bench_chart_draw(c, s->folder, &s->page);
    bench_text_add(&s->page, "<figcaption>");
    bench_html(&s->page, caption);
    bench_text_add(&s->page, "</figcaption></figure>\n");
}
