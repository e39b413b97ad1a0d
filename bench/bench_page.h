/*
 * The parts of report.
 *
 *   bench_measure.c   runs this program's other commands with --json and keeps their lines
 *   bench_chart.c     charts by gnuplot, as files and as text for the page
 *   bench_tables.c    tables, numbers as texts, the choice of lines
 *   bench_sections.c, bench_sweep.c
 *                     the sections: which lines of the data make which chart and table
 *   bench_page.c      the page around them, the tables in a Markdown file, the command
 */
#ifndef BENCH_PAGE_H
#define BENCH_PAGE_H

#include "bench_lines.h"

/* ---- measure ---- */

/* Into a file of JSON lines: what the commands print, each command behind a line that has it. */
void bench_measure(const bench_options *options, const char *path);
/* examples/tinylm's model in the working directory or a folder above the program. */
bool bench_find_model(bench_text *model, bench_text *tokenizer);

/* ---- charts ---- */

enum { BENCH_SERIES = 32, BENCH_POINTS = 128 };

typedef struct bench_series {
    char name[64];
    const char *type; /* storage type, which has a colour and a mark; NULL: the machine's, black */
    int dash;         /* 0 solid */
    size_t n;
    double x[BENCH_POINTS], y[BENCH_POINTS];
    double low[BENCH_POINTS], high[BENCH_POINTS]; /* NaN: none */
} bench_series;

typedef enum bench_chart_kind {
    BENCH_LINES,  /* y over x, on a logarithmic axis */
    BENCH_BARS,   /* y to the right for each of the categories, where x is 0, 1, ... */
    BENCH_SCATTER /* y, logarithmic, over x, each point with the name of its series */
} bench_chart_kind;

typedef struct bench_chart {
    bench_chart_kind kind;
    char name[64];   /* of the file, without .svg */
    char label[160]; /* what it shows, in words */
    const char *x_title, *y_title;
    double mark; /* bars: a line at this x; NaN: none */
    size_t n_ticks;
    char ticks[BENCH_POINTS][64]; /* lines: at tick_at; bars: the categories */
    double tick_at[BENCH_POINTS];
    size_t n;
    bench_series series[BENCH_SERIES];
} bench_chart;

void bench_chart_require(void); /* exits (code 1) where there is no gnuplot */
bench_chart *bench_chart_new(bench_chart_kind kind, const char *name, const char *x_title,
                             const char *y_title);
/* The series of this name, new if there is none; NULL where there are too many. */
bench_series *bench_chart_series(bench_chart *c, const char *name, const char *type);
void bench_series_add(bench_series *s, double x, double y, double low, double high);
/* Draw into FOLDER/name.svg, add it to the page as <svg>, and free it. */
void bench_chart_draw(bench_chart *c, const char *folder, bench_text *page);

/* ---- sections ---- */

typedef struct bench_sections {
    const bench_lines *data;
    const char *folder;
    bench_text page; /* HTML */
    bench_text cards;
    struct {
        const char *name;
        bench_text text; /* Markdown */
    } tables[16];
    size_t n_tables;
} bench_sections;

void bench_sections_make(bench_sections *s);
void bench_section_decode(bench_sections *s, bool over_ctx);
/* How far times vary in the data: the median of (p90 - p10) / median; NaN where nothing says. */
double bench_noise(const bench_lines *data);

/* ---- what sections are made of ---- */

void bench_html(bench_text *t, const char *text); /* escaped */
void bench_section_begin(bench_sections *s, const char *id, const char *title);
void bench_section_end(bench_sections *s);
void bench_section_text(bench_sections *s, const char *words); /* a paragraph */
void bench_section_missing(bench_sections *s, const char *command);
/* The chart as a figure, and free it; nothing where it has no point. */
void bench_section_draw(bench_sections *s, bench_chart *c, const char *caption);

typedef struct bench_table {
    bench_sections *s;
    bench_text *md;
    bool title; /* cells are titles */
} bench_table;

/* Behind it come the titles' row, then rows: bench_row_begin, cells, bench_row. */
bench_table bench_table_open(bench_sections *s, const char *name);
void bench_table_close(bench_table *t);
void bench_row_begin(bench_table *t);
void bench_row(bench_table *t);
void bench_titles(bench_table *t, const char *text); /* | between them, and the end of their row */
void bench_cell(bench_table *t, const char *text);
void bench_cell_number(bench_table *t, double x);
void bench_cell_range(bench_table *t, const bench_line *l, const char *p10, const char *p90);

/* Texts of the last few calls. Two or three digits, "-" where it is not a number; 32k tokens. */
const char *bench_digits(double x);
const char *bench_tokens_text(double n);
const char *bench_or_dash(const char *text);
const char *bench_line_types(const bench_line *l); /* "i8", or "i8/i4" where V's differs */

const char *bench_style_type(const char *type); /* a constant, for bench_series.type */
bool bench_line_same(const bench_line *a, const bench_line *b, const char *key);
/* The lines of a command; the array is the caller's to free. */
size_t bench_lines_of(const bench_sections *s, const char *bench, const bench_line ***found);
/* More than one value of this key among the lines: names then have it. */
bool bench_lines_vary(const bench_line *const *lines, size_t n, const char *key);

#endif /* BENCH_PAGE_H */
