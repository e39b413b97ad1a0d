/*
 * Charts by gnuplot: a script through a pipe, an SVG file back. The file has gnuplot's own colours
 * on white. The copy in the page has classes of colours instead (CSS variables, so that it follows
 * a dark page), ids of its own, and no fixed size.
 *
 * Texts come from data files, so gnuplot gets only those characters of them that mean nothing to
 * it; numbers are printed here. Series differ by mark as well as by colour (Okabe and Ito's).
 */
#include "bench_page.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

enum { WIDTH = 440, HEIGHT = 350, FONT = 15 };

static const struct style {
    const char *type, *color;
    int point;
} styles[] = {{"i8", "#0072b2", 5},    {"i4", "#d55e00", 7},     {"f16", "#009e73", 9},
              {"f32", "#cc79a7", 13},  {"kvtile", "#0072b2", 5}, {"other", "#d55e00", 6},
              {"memcpy", "#999999", 9}};
static const struct style plain = {"", "#e69f00", 11}, machine = {NULL, "#000000", 0};

/* The page's names for the colours. */
static const struct {
    int red, green, blue;
    const char *name;
} colors[] = {{0, 114, 178, "var(--blue)"},   {213, 94, 0, "var(--red)"},
              {0, 158, 115, "var(--green)"},  {204, 121, 167, "var(--pink)"},
              {230, 159, 0, "var(--gold)"},   {153, 153, 153, "var(--mid)"},
              {216, 216, 216, "var(--grid)"}, {0, 0, 0, "var(--ink)"}};

/* Colours that gnuplot names otherwise: the background's, which is left out, that of the rings
   around marks, and its defaults. In quotes, of either kind. */
static const struct {
    const char *from, *to;
} names[] = {{"#ffffff", "none"},
             {"#FFFFFF", "var(--paper)"},
             {"white", "var(--paper)"},
             {"lightgrey", "var(--soft)"},
             {"black", "var(--ink)"}};

static const struct style *style_of(const bench_series *s)
{
    for (size_t i = 0; s->type && i < sizeof styles / sizeof styles[0]; i++)
        if (!strcmp(s->type, styles[i].type))
            return &styles[i];
    return s->type ? &plain : &machine;
}

void bench_chart_require(void)
{
    FILE *f = popen("gnuplot --version 2>/dev/null", "r");
    char line[128] = "";
    if (f && !fgets(line, sizeof line, f))
        line[0] = 0;
    if (!f || pclose(f) != 0 || strncmp(line, "gnuplot ", 8) != 0)
        bench_fail(1, "report draws with gnuplot, which is not there; on Debian: apt-get install "
                      "gnuplot-nox");
}

bench_chart *bench_chart_new(bench_chart_kind kind, const char *name, const char *x_title,
                             const char *y_title)
{
    bench_chart *c = bench_alloc(1, sizeof *c);
    c->kind = kind;
    snprintf(c->name, sizeof c->name, "%s", name);
    c->x_title = x_title;
    c->y_title = y_title;
    c->mark = NAN;
    return c;
}

bench_series *bench_chart_series(bench_chart *c, const char *name, const char *type)
{
    for (size_t i = 0; i < c->n; i++)
        if (!strncmp(c->series[i].name, name, sizeof c->series[i].name - 1))
            return &c->series[i];
    if (c->n == BENCH_SERIES)
        return NULL;
    bench_series *s = &c->series[c->n++];
    snprintf(s->name, sizeof s->name, "%s", name);
    s->type = type;
    return s;
}

void bench_series_add(bench_series *s, double x, double y, double low, double high)
{
    if (!s || s->n == BENCH_POINTS || !isfinite(x) || !isfinite(y))
        return;
    size_t i = s->n++;
    while (i > 0 && s->x[i - 1] > x) { /* in order */
        s->x[i] = s->x[i - 1];
        s->y[i] = s->y[i - 1];
        s->low[i] = s->low[i - 1];
        s->high[i] = s->high[i - 1];
        i--;
    }
    s->x[i] = x;
    s->y[i] = y;
    s->low[i] = isfinite(low) ? low : y;
    s->high[i] = isfinite(high) ? high : y;
}

/* ---- script ---- */

/* Characters without a meaning inside gnuplot's double quotes. */
static void put_quoted(bench_text *t, const char *text)
{
    bench_text_add(t, "\"");
    for (; *text; text++) {
        char c = *text;
        bool sound = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                     strchr(" _.,:;/+-()=*<>", c);
        bench_text_add(t, "%c", sound ? c : '?');
    }
    bench_text_add(t, "\"");
}

/* gnuplot's single quotes know one escape, '' for '. */
static void put_path(bench_text *t, const char *path)
{
    bench_text_add(t, "'");
    for (; *path; path++)
        bench_text_add(t, *path == '\'' ? "''" : "%c", *path);
    bench_text_add(t, "'");
}

static void put_data(bench_text *t, const bench_chart *c)
{
    for (size_t i = 0; i < c->n; i++) {
        const bench_series *s = &c->series[i];
        bench_text_add(t, "$s%zu << EOD\n", i);
        for (size_t j = 0; j < s->n; j++)
            bench_text_add(t, "%.9g %.9g %.9g %.9g\n", s->x[j], s->y[j], s->low[j], s->high[j]);
        bench_text_add(t, "EOD\n");
    }
}

static void put_ticks(bench_text *t, const bench_chart *c, char axis)
{
    bench_text_add(t, "set %ctics (", axis);
    for (size_t i = 0; i < c->n_ticks; i++) {
        bench_text_add(t, i ? ", " : "");
        put_quoted(t, c->ticks[i]);
        bench_text_add(t, " %.9g", c->kind == BENCH_BARS ? (double)i : c->tick_at[i]);
    }
    bench_text_add(t, ")\n");
}

static void script_lines(bench_text *t, const bench_chart *c)
{
    double low = INFINITY, high = 0.0, top = 0.0;
    bool range = false;
    for (size_t i = 0; i < c->n; i++)
        for (size_t j = 0; j < c->series[i].n; j++) {
            const bench_series *s = &c->series[i];
            low = fmin(low, s->x[j]);
            high = fmax(high, s->x[j]);
            top = fmax(top, s->high[j]);
            range = true;
        }
    if (range)
        bench_text_add(t, "set xrange [%.9g:%.9g]\nset yrange [0:%.9g]\n", low / 1.15, high * 1.15,
                       top > 0.0 ? 1.08 * top : 1.0);
    put_ticks(t, c, 'x');
    bench_text_add(t, "set logscale x 2\nset grid ytics lt 1 lc rgb '#d8d8d8' lw 1\nplot ");
    for (size_t i = 0; i < c->n; i++) {
        const bench_series *s = &c->series[i];
        const struct style *style = style_of(s);
        if (s->type)
            bench_text_add(t,
                           "%s$s%zu using 1:2:3:4 with yerrorbars pt %d ps 0 lw 1.2 lc rgb '%s' "
                           "notitle, $s%zu using 1:2 with linespoints pt %d ps 0.9 lw 2.2 dt %d "
                           "lc rgb '%s' title ",
                           i ? ", " : "", i, style->point, style->color, i, style->point,
                           s->dash + 1, style->color);
        else
            bench_text_add(t, "%s$s%zu using 1:2 with lines lw 1.6 dt (6,4) lc rgb '%s' title ",
                           i ? ", " : "", i, style->color);
        put_quoted(t, s->name);
    }
}

/* 1, 2 or 5 times a power of ten: four or five of them reach `top`. */
static double nice_step(double top)
{
    double step = top / 4.0, ten = pow(10.0, floor(log10(step)));
    return ten * (step / ten < 1.5 ? 1.0 : step / ten < 3.5 ? 2.0 : step / ten < 7.5 ? 5.0 : 10.0);
}

static void script_bars(bench_text *t, const bench_chart *c)
{
    size_t longest = 0;
    for (size_t i = 0; i < c->n_ticks; i++)
        longest = strlen(c->ticks[i]) > longest ? strlen(c->ticks[i]) : longest;
    double width = c->n > 0 ? 0.76 / (double)c->n : 0.76, top = 0.0;
    for (size_t i = 0; i < c->n; i++)
        for (size_t j = 0; j < c->series[i].n; j++)
            top = fmax(top, c->series[i].high[j]);
    if (isfinite(c->mark))
        top = fmax(top, c->mark);
    bench_text_add(t,
                   "set yrange [%.9g:-0.6]\nset xrange [0:%.9g]\nset grid xtics lt 1 lc rgb "
                   "'#d8d8d8' lw 1\nset ytics scale 0\nset style fill solid 0.85 noborder\n",
                   (double)c->n_ticks - 0.4, top > 0.0 ? 1.06 * top : 1.0);
    bench_text_add(t, "set lmargin at screen %.4f\nset rmargin at screen 0.96\nset xtics %.9g\n",
                   fmin(0.6, (14.0 + 7.7 * (double)longest) / WIDTH),
                   nice_step(top > 0.0 ? top : 1.0));
    put_ticks(t, c, 'y');
    if (isfinite(c->mark))
        bench_text_add(t,
                       "set arrow from %.9g, graph 0 to %.9g, graph 1 nohead front lw 1.6 dt "
                       "(6,4) lc rgb '#000000'\n",
                       c->mark, c->mark);
    if (c->n < 2)
        bench_text_add(t, "unset key\n");
    bench_text_add(t, "plot ");
    for (size_t i = 0; i < c->n; i++) {
        const struct style *style = style_of(&c->series[i]);
        double off = ((double)i - 0.5 * ((double)c->n - 1.0)) * width;
        bench_text_add(t,
                       "%s$s%zu using (0):($1+%.6g):(0):2:($1+%.6g):($1+%.6g) with boxxyerror "
                       "lc rgb '%s' title ",
                       i ? ", " : "", i, off, off - 0.46 * width, off + 0.46 * width, style->color);
        put_quoted(t, c->series[i].name);
        bench_text_add(t,
                       ", $s%zu using 2:($1+%.6g):3:4 with xerrorbars pt 0 ps 0 lw 1.2 lc rgb "
                       "'#000000' notitle",
                       i, off);
    }
}

typedef struct box {
    double x0, y0, x1, y1;
} box;

static bool overlap(const box *a, const box *b)
{
    return a->x0 < b->x1 && b->x0 < a->x1 && a->y0 < b->y1 && b->y0 < a->y1;
}

/* Of the places beside a point, in pixels from it, the one that hits the fewest boxes. */
static box place(const box *taken, size_t n, double x, double y, double width, double right)
{
    static const double ups[] = {0, -12, 12, -22, 22, -34, 34};
    box best = {0, 0, 0, 0};
    size_t least = SIZE_MAX;
    for (size_t i = 0; i < 2 * sizeof ups / sizeof ups[0]; i++) {
        double at = i % 2 == 0 ? x + 9 : x - 9 - width, up = y + ups[i / 2];
        box b = {at, up - 7, at + width, up + 7};
        size_t hits = b.x1 > right || b.x0 < 0 ? 1000 : 0;
        for (size_t j = 0; j < n; j++)
            hits += overlap(&b, &taken[j]) ? 1 : 0;
        if (hits < least) {
            least = hits;
            best = b;
        }
    }
    return best;
}

static void script_scatter(bench_text *t, const bench_chart *c)
{
    double x0 = INFINITY, x1 = -INFINITY, y0 = INFINITY, y1 = -INFINITY;
    const double wide = 0.78 * WIDTH, tall = 0.66 * HEIGHT; /* of the area */
    box *taken = bench_alloc(2 * BENCH_SERIES, sizeof *taken);
    size_t n = 0;
    bool seen[2] = {false, false};
    for (size_t i = 0; i < c->n; i++) {
        const bench_series *s = &c->series[i];
        if (s->n == 0 || !(s->y[0] > 0.0))
            continue;
        x0 = fmin(x0, s->x[0]);
        x1 = fmax(x1, s->x[0]);
        y0 = fmin(y0, log10(s->low[0] > 0.0 ? s->low[0] : s->y[0]));
        y1 = fmax(y1, log10(s->high[0]));
    }
    if (!(x0 <= x1)) {
        x0 = x1 = 4.0;
        y0 = y1 = 0.0;
    }
    x0 = floor(x0) - 0.3;
    x1 += 0.22 * (x1 - x0);
    y0 = floor(y0 - 0.1);
    y1 = ceil(y1 + 0.1);
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < c->n; i++) {
            const bench_series *s = &c->series[i];
            if (s->n == 0 || !(s->y[0] > 0.0))
                continue;
            double x = (s->x[0] - x0) / (x1 - x0) * wide;
            double y = (y1 - log10(s->y[0])) / (y1 - y0) * tall;
            if (pass == 0) {
                taken[n++] = (box){x - 5, y - 5, x + 5, y + 5};
                continue;
            }
            box b = place(taken, n, x, y, 8.2 * (double)strlen(s->name), wide);
            bool left = b.x0 < x;
            taken[n++] = b;
            double at_x = x0 + (left ? b.x1 : b.x0) / wide * (x1 - x0);
            double at_y = pow(10.0, y1 - 0.5 * (b.y0 + b.y1) / tall * (y1 - y0));
            bench_text_add(t, "set label ");
            put_quoted(t, s->name);
            bench_text_add(t, " at %.9g, %.9g %s front\n", at_x, at_y, left ? "right" : "left");
            if (fabs(0.5 * (b.y0 + b.y1) - y) > 8.0) /* lead from the point to its label */
                bench_text_add(t,
                               "set arrow from %.9g, %.9g to %.9g, %.9g nohead back lw 1 lc rgb "
                               "'#999999'\n",
                               s->x[0], s->y[0], at_x, at_y);
        }
    bench_text_add(t,
                   "set lmargin at screen 0.19\nset rmargin at screen 0.97\n"
                   "set bmargin at screen 0.2\nset tmargin at screen 0.86\n"
                   "set xrange [%.9g:%.9g]\nset yrange [%.9g:%.9g]\nset logscale y\nset format y "
                   "\"%%h\"\nset xtics 1\nset grid xtics ytics lt 1 lc rgb '#d8d8d8' lw 1\nplot ",
                   x0, x1, pow(10.0, y0), pow(10.0, y1));
    for (size_t i = 0; i < c->n; i++) {
        const bench_series *s = &c->series[i];
        const struct style *style = style_of(s);
        bool ours = !strcmp(s->type, "kvtile");
        bench_text_add(t, "%s$s%zu using 1:2:3:4 with yerrorbars pt %d ps 1 lw 1.4 lc rgb '%s' ",
                       i ? ", " : "", i, style->point, style->color);
        bench_text_add(t, seen[ours] ? "notitle" : "title \"%s\"",
                       ours ? "kvtile" : "other formats");
        seen[ours] = true;
    }
    free(taken);
}

static void run_gnuplot(const bench_text *script)
{
    void (*old)(int) = signal(SIGPIPE, SIG_IGN);
    FILE *f = popen("gnuplot", "w");
    if (!f)
        bench_fail(1, "report: cannot run gnuplot: %s", strerror(errno));
    fwrite(script->data, 1, script->n, f);
    int status = pclose(f);
    signal(SIGPIPE, old);
    if (status != 0)
        bench_fail(1, "report: gnuplot ended with code %d",
                   WIFEXITED(status) ? WEXITSTATUS(status) : status);
}

/* ---- page ---- */

/* The text at p up to `end` begins with word. */
static bool begins(const char *p, const char *end, const char *word)
{
    size_t n = strlen(word);
    return (size_t)(end - p) >= n && !memcmp(p, word, n);
}

/* "rgb(  0, 114, 178)" as the page's name for it; returns its length, 0 for other colours. */
static size_t put_rgb(bench_text *page, const char *p)
{
    int red, green, blue, n = 0;
    if (sscanf(p, "rgb(%d,%d,%d)%n", &red, &green, &blue, &n) != 3)
        return 0;
    for (size_t i = 0; n > 0 && i < sizeof colors / sizeof colors[0]; i++)
        if (colors[i].red == red && colors[i].green == green && colors[i].blue == blue) {
            bench_text_add(page, "%s", colors[i].name);
            return (size_t)n;
        }
    return 0;
}

/* Likewise "black" and the like, p at the quote before it. */
static size_t put_name(bench_text *page, const char *p, const char *end)
{
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        size_t n = strlen(names[i].from);
        if (begins(p + 1, end, names[i].from) && p + 1 + n < end && p[1 + n] == *p) {
            bench_text_add(page, "%c%s%c", *p, names[i].to, *p);
            return n + 2;
        }
    }
    return 0;
}

static void put_inline(bench_text *page, const char *svg, size_t n, const bench_chart *c)
{
    const char *end = svg + n, *p = strstr(svg, "<svg"), *body = p ? strchr(p, '>') : NULL;
    const char *box_at = p ? strstr(p, "viewBox=\"") : NULL;
    size_t box_n = box_at ? strcspn(box_at + 9, "\"") : 0;
    if (!body || !box_at || box_at > body)
        bench_fail(1, "report: gnuplot's %s.svg is not understood", c->name);
    bench_text_add(page, "<svg role=\"img\" aria-label=\"");
    bench_html(page, c->label);
    bench_text_add(page,
                   "\" viewBox=\"%.*s\" xmlns=\"http://www.w3.org/2000/svg\" "
                   "xmlns:xlink=\"http://www.w3.org/1999/xlink\">",
                   (int)box_n, box_at + 9);
    for (p = body + 1; p < end;) {
        static const char *const ids[] = {" id='", " id=\"", "href='#", "href=\"#", "url(#"};
        size_t i = 0;
        if (begins(p, end, "<title>") || begins(p, end, "<desc>")) { /* gnuplot's own */
            const char *close = strstr(p, "</");
            close = close ? strchr(close, '>') : NULL;
            p = close ? close + 1 : end;
            continue;
        }
        while (i < sizeof ids / sizeof ids[0] && !begins(p, end, ids[i]))
            i++;
        if (i < sizeof ids / sizeof ids[0]) {
            bench_text_add(page, "%s%s-", ids[i], c->name);
            p += strlen(ids[i]);
            continue;
        }
        size_t used = begins(p, end, "rgb(") ? put_rgb(page, p) : 0;
        if (used == 0 && (*p == '"' || *p == '\''))
            used = put_name(page, p, end);
        if (used > 0) {
            p += used;
            continue;
        }
        bench_text_bytes(page, p++, 1);
    }
}

void bench_chart_draw(bench_chart *c, const char *folder, bench_text *page)
{
    bench_text script = {NULL, 0, 0}, path = {NULL, 0, 0};
    int height = c->kind == BENCH_BARS ? 85 + (int)(c->n_ticks * (c->n > 1 ? 32 : 24)) : HEIGHT;
    char title[sizeof c->name]; /* gnuplot takes letters, digits and _ */
    for (size_t i = 0; i < sizeof title; i++)
        title[i] = c->name[i] == '-' ? '_' : c->name[i];
    bench_text_add(&path, "%s/%s.svg", folder, c->name);
    bench_text_add(&script,
                   "set encoding utf8\nset terminal svg size %d,%d font \"sans-serif,%d\" "
                   "noenhanced background \"#ffffff\" name \"%s\"\nset output ",
                   WIDTH, height, FONT, title);
    put_path(&script, path.data);
    bench_text_add(&script, "\nset border 3 lw 1 lc rgb '#000000'\nset tics nomirror out scale "
                            "0.5\nset key tmargin left Left reverse horizontal samplen 1.7 "
                            "width -3 maxcols 2 font \",14\"\nset xlabel offset 0,0.4 ");
    put_quoted(&script, c->x_title);
    if (c->kind != BENCH_BARS) {
        bench_text_add(&script, "\nset ylabel ");
        put_quoted(&script, c->y_title);
    }
    bench_text_add(&script, "\n");
    put_data(&script, c);
    if (c->kind == BENCH_LINES)
        script_lines(&script, c);
    else if (c->kind == BENCH_BARS)
        script_bars(&script, c);
    else
        script_scatter(&script, c);
    bench_text_add(&script, "\nset output\n");
    run_gnuplot(&script);

    bench_text svg = bench_text_read(path.data);
    put_inline(page, svg.data, svg.n, c);
    bench_text_free(&svg);
    bench_text_free(&path);
    bench_text_free(&script);
    free(c);
}
