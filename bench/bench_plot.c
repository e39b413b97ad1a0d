/*
 * Scatter plots as SVG: bits an element against an error on a logarithmic axis, each point with its
 * name beside it. Labels are put where they hit no earlier label and no point, as far as there is
 * such a place.
 */
#include "bench_files.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 760, HEIGHT = 560, LEFT = 70, RIGHT = 20, TOP = 40, BOTTOM = 50, FONT = 12 };
#define GLYPH 6.4 /* width of a character, about */

typedef struct box {
    double x0, y0, x1, y1;
} box;

typedef struct axis {
    double low, high, from, to; /* values, and where they are drawn */
} axis;

static double place(const axis *a, double value)
{
    return a->from + (value - a->low) / (a->high - a->low) * (a->to - a->from);
}

static bool overlap(const box *a, const box *b)
{
    return a->x0 < b->x1 && b->x0 < a->x1 && a->y0 < b->y1 && b->y0 < a->y1;
}

static void put_text(FILE *out, const char *text)
{
    for (; *text; text++) {
        if (*text == '<')
            fputs("&lt;", out);
        else if (*text == '&')
            fputs("&amp;", out);
        else
            fputc(*text, out);
    }
}

/* Where the label of the point at (x, y) is drawn: its left end, on the base line. */
static box place_label(const box *taken, size_t n_taken, double x, double y, double width,
                       double right)
{
    static const double up[] = {4, -8, 16, -20, 28, -32, 40, -44, 52, -56, 64, -68, 76, -80};
    box best = {0, 0, 0, 0};
    size_t least = SIZE_MAX;
    for (size_t i = 0; i < 2 * sizeof up / sizeof up[0]; i++) {
        double at = i % 2 == 0 ? x + 8 : x - 8 - width, base = y + up[i / 2];
        box b = {at, base - FONT + 2, at + width, base + 3};
        size_t hits =
            b.x1 > right || b.x0 < LEFT || b.y0 < TOP || b.y1 > HEIGHT - BOTTOM ? 1000 : 0;
        for (size_t j = 0; j < n_taken; j++)
            hits += overlap(&b, &taken[j]);
        if (hits < least) {
            least = hits;
            best = b;
        }
    }
    return best;
}

static void draw_axes(FILE *out, const bench_plot *p, const axis *x, const axis *y, double shift)
{
    fprintf(out, "<g transform=\"translate(%g 0)\">\n", shift);
    fprintf(out, "<text x=\"%d\" y=\"22\" font-size=\"15\">", LEFT);
    put_text(out, p->title);
    fprintf(out, "</text>\n<g stroke=\"#ddd\">\n");
    for (double v = ceil(x->low); v <= x->high; v += 1.0)
        fprintf(out, "<path d=\"M%.1f %.1fV%.1f\"/>\n", place(x, v), y->from, y->to);
    for (double v = ceil(y->low); v <= y->high; v += 1.0)
        fprintf(out, "<path d=\"M%.1f %.1fH%.1f\"/>\n", x->from, place(y, v), x->to);
    fprintf(out, "</g>\n<g fill=\"#555\">\n");
    for (double v = ceil(x->low); v <= x->high; v += 1.0)
        fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%g</text>\n", place(x, v),
                y->from + 18, v);
    for (double v = ceil(y->low); v <= y->high; v += 1.0)
        fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">1e%g</text>\n", x->from - 6,
                place(y, v) + 4, v);
    fprintf(out, "</g>\n<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", (x->from + x->to) / 2,
            y->from + 38);
    put_text(out, p->x_title);
    fprintf(out,
            "</text>\n<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" "
            "fill=\"none\" stroke=\"#888\"/>\n",
            x->from, y->to, x->to - x->from, y->from - y->to);
}

static bool shown(const bench_point *point)
{
    return isfinite(point->x) && point->y > 0.0 && isfinite(point->y);
}

static void draw_plot(FILE *out, const bench_plot *p, double shift)
{
    axis x = {INFINITY, -INFINITY, LEFT, WIDTH - RIGHT};
    axis y = {INFINITY, -INFINITY, HEIGHT - BOTTOM, TOP};
    box *taken = bench_alloc(2 * p->n + 1, sizeof *taken);
    size_t n_taken = 0;
    for (size_t i = 0; i < p->n; i++) {
        if (!shown(&p->points[i]))
            continue;
        x.low = fmin(x.low, p->points[i].x);
        x.high = fmax(x.high, p->points[i].x);
        y.low = fmin(y.low, log10(p->points[i].y));
        y.high = fmax(y.high, log10(p->points[i].y));
    }
    if (!(x.low <= x.high)) {
        x.low = x.high = 4.0;
        y.low = y.high = 0.0;
    }
    x.low = floor(2.0 * x.low) / 2.0 - 0.5;
    x.high = ceil(x.high) + 1.0;
    y.low = floor(2.0 * y.low) / 2.0 - 0.25;
    y.high = ceil(2.0 * y.high) / 2.0 + 0.25;
    draw_axes(out, p, &x, &y, shift);

    for (size_t i = 0; i < p->n; i++) {
        double px = place(&x, p->points[i].x), py = place(&y, log10(p->points[i].y));
        if (shown(&p->points[i]))
            taken[n_taken++] = (box){px - 5, py - 5, px + 5, py + 5};
    }
    for (size_t i = 0; i < p->n; i++) {
        const bench_point *point = &p->points[i];
        if (!shown(point))
            continue;
        double px = place(&x, point->x), py = place(&y, log10(point->y));
        const char *color = point->ours ? "#c03020" : "#2060b0";
        box b =
            place_label(taken, n_taken, px, py, GLYPH * (double)strlen(point->name), WIDTH - RIGHT);
        taken[n_taken++] = b;
        double end = b.x0 > px ? b.x0 - 1 : b.x1 + 1, base = b.y1 - 3;
        if (fabs(base - 4 - py) > 8)
            fprintf(out, "<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"#aaa\"/>\n", px, py, end,
                    base - 4);
        fprintf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\" stroke=\"%s\"/>\n", px,
                py, point->hollow ? "#fff" : color, color);
        fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" fill=\"%s\">", b.x0, base, color);
        put_text(out, point->name);
        fprintf(out, "</text>\n");
    }
    fprintf(out, "</g>\n");
    free(taken);
}

void bench_plot_write(const char *path, const bench_plot *plots, size_t n)
{
    bench_file file;
    bench_file_create(&file, path);
    FILE *out = file.file;
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %zu %d\" font-size=\"%d\" "
            "font-family=\"sans-serif\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
            n * WIDTH, HEIGHT, FONT);
    for (size_t i = 0; i < n; i++)
        draw_plot(out, &plots[i], (double)(i * WIDTH));
    fprintf(out, "</svg>\n");
    bench_file_commit(&file);
}
