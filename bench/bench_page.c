/*
 * report: one HTML page that holds everything, charts and raw data too, so that it can be mailed or
 * kept as a build's artifact; beside it in the folder the charts as files and the data. Nothing in
 * it is loaded from elsewhere and nothing runs in it. Texts of the data are escaped.
 */
#include "bench_page.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define NOISY 0.10 /* of bench_noise: above, tables are not put into documents */

static const char style[] =
    ":root{color-scheme:light dark;--paper:#fff;--ink:#1c1e21;--mid:#8a8f98;--grid:#dcdfe4;"
    "--soft:#f4f5f7;--blue:#0072b2;--red:#d55e00;--green:#009e73;--pink:#b8578f;--gold:#b07800}\n"
    "@media(prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e4e6ea;--mid:#8f959f;"
    "--grid:#33373d;--soft:#1e2126;--blue:#56b4e9;--red:#f0864a;--green:#2fc49a;--pink:#e39cc8;"
    "--gold:#e6b54a}}\n"
    "*{box-sizing:border-box}\n"
    "body{margin:0 auto;padding:1.2rem 1rem 4rem;max-width:66rem;background:var(--paper);"
    "color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',"
    "'DejaVu Sans',sans-serif;overflow-wrap:break-word}\n"
    "h1{font-size:1.7rem;line-height:1.2;margin:.4rem 0 .2rem}\n"
    "h2{font-size:1.25rem;line-height:1.3;margin:2.6rem 0 .4rem;padding-top:.9rem;"
    "border-top:1px solid var(--grid)}\n"
    "p{max-width:44rem;margin:.5rem 0 .9rem}\n"
    ".machine{color:var(--ink)}.small,figcaption,footer{font-size:.87rem;color:var(--ink);"
    "opacity:.82}\n"
    "nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.8rem 0;font-size:.95rem}\n"
    "a{color:var(--blue)}\n"
    ".cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));"
    "gap:.8rem;margin:1rem 0}\n"
    ".cards div{background:var(--soft);border-radius:.5rem;padding:.8rem 1rem}\n"
    ".cards dt{font-weight:600}.cards dd{margin:0}.cards b{font-size:1.5rem}\n"
    ".charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));"
    "gap:1rem 1.6rem;align-items:start}\n"
    "figure{margin:0;max-width:30rem}\n"
    "svg{display:block;width:100%;height:auto;color:var(--ink)}\n"
    "svg text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}\n"
    ".scroll{overflow-x:auto;max-width:100%;margin:.4rem 0 1rem}\n"
    "table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}\n"
    "th,td{text-align:right;padding:.28rem .7rem;border-bottom:1px solid var(--grid);"
    "white-space:nowrap}\n"
    "th{font-weight:600;border-bottom:2px solid var(--mid)}\n"
    "th:first-child,td:first-child{text-align:left;padding-left:0;"
    "position:sticky;left:0;background:var(--paper)}\n"
    "@media(max-width:30rem){th,td{padding:.28rem .45rem}table{font-size:.84rem}}\n"
    "tbody tr:hover{background:var(--soft)}\n"
    "code,pre{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
    "font-size:.85em}\n"
    "pre{overflow-x:auto;background:var(--soft);padding:.7rem .9rem;border-radius:.4rem;"
    "max-width:100%}\n"
    "pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}\n"
    ".warning{border-left:.25rem solid var(--red);background:var(--soft);padding:.6rem .9rem}\n"
    ".missing{color:var(--mid)}\n"
    "summary{cursor:pointer}\n"
    "@media print{:root{--paper:#fff;--ink:#000}details{display:none}}\n";

static const struct {
    const char *id, *name;
} sections[] = {{"decode-context", "Context"}, {"decode-heads", "GQA"}, {"fidelity", "Fidelity"},
                {"prefill", "Prefill"},        {"append", "Append"},    {"snapshot", "Snapshot"},
                {"snapshot-bars", "Bars"},     {"machine", "Machine"},  {"how", "How measured"}};

/* The line that says on what and when: report's own, or the first that names a processor. */
static const bench_line *setup_of(const bench_lines *data)
{
    const bench_line *found = NULL;
    for (size_t i = data->n; i-- > 0;)
        if (bench_line_is(&data->lines[i], "kind", "setup") ||
            (*bench_line_text(&data->lines[i], "cpu") &&
             !(found && bench_line_is(found, "kind", "setup"))))
            found = &data->lines[i];
    return found;
}

static const char *or_unknown(const char *text)
{
    return *text ? text : "unknown";
}

/* "AMD EPYC, 2 processors, 32 MiB last-level cache; ..." */
static void put_machine(bench_text *t, const bench_lines *data)
{
    const bench_line *setup = setup_of(data);
    if (!setup) {
        bench_text_add(t, "unknown machine");
        return;
    }
    double processors = bench_line_number(setup, "processors"), llc = NAN;
    for (size_t i = 0; i < data->n && !isfinite(llc); i++)
        llc = bench_line_number(&data->lines[i], "llc_bytes");
    bench_text_add(t, "%s", or_unknown(bench_line_text(setup, "cpu")));
    if (isfinite(processors))
        bench_text_add(t, ", %.0f processor%s", processors, processors > 1.5 ? "s" : "");
    if (isfinite(llc))
        bench_text_add(t, ", last-level cache %.0f MiB", llc / 1048576.0);
    if (*bench_line_text(setup, "system"))
        bench_text_add(t, "; %s", bench_line_text(setup, "system"));
    bench_text_add(t, "; %s; kvtile %s, commit %s", or_unknown(bench_line_text(setup, "compiler")),
                   or_unknown(bench_line_text(setup, "version")),
                   or_unknown(bench_line_text(setup, "commit")));
    if (*bench_line_text(setup, "date"))
        bench_text_add(t, "; %s", bench_line_text(setup, "date"));
}

/* The commands, one a line; empty where the data do not have them. */
static void put_commands(bench_text *t, const bench_lines *data)
{
    for (size_t i = 0; i < data->n; i++)
        if (bench_line_is(&data->lines[i], "kind", "command"))
            bench_text_add(t, "%s\n", bench_line_text(&data->lines[i], "command"));
}

static bool is_quick(const bench_lines *data)
{
    for (size_t i = 0; i < data->n; i++)
        if (bench_line_is(&data->lines[i], "quick", "true"))
            return true;
    return false;
}

/* Lines of more than one processor, compiler or commit. */
static bool is_mixed(const bench_lines *data)
{
    static const char *const keys[] = {"cpu", "compiler", "commit"};
    for (size_t k = 0; k < 3; k++) {
        const char *first = "";
        for (size_t i = 0; i < data->n; i++) {
            const char *value = bench_line_text(&data->lines[i], keys[k]);
            if (*value && *first && strcmp(value, first) != 0)
                return true;
            if (*value)
                first = value;
        }
    }
    return false;
}

static void put_head(bench_text *page, const bench_lines *data, const bench_sections *s)
{
    bench_text machine = {NULL, 0, 0};
    const bench_line *setup = setup_of(data);
    double noise = bench_noise(data);
    put_machine(&machine, data);
    bench_text_add(page, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
                         "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
                         "<title>kvtile on ");
    bench_html(page, setup ? or_unknown(bench_line_text(setup, "cpu")) : "unknown machine");
    bench_text_add(page, "</title>\n<style>\n%s</style>\n</head>\n<body>\n<header>\n<h1>kvtile on ",
                   style);
    bench_html(page, setup ? or_unknown(bench_line_text(setup, "cpu")) : "unknown machine");
    bench_text_add(page, "</h1>\n<p class=\"machine\">");
    bench_html(page, machine.data);
    bench_text_add(page, "</p>\n<nav>");
    for (size_t i = 0; i < sizeof sections / sizeof sections[0]; i++)
        bench_text_add(page, "<a href=\"#%s\">%s</a>\n", sections[i].id, sections[i].name);
    bench_text_add(page, "</nav>\n");
    if (is_quick(data))
        bench_text_add(page, "<p class=\"warning\">Made with <code>--quick</code>: shows that it "
                             "runs; no figure here means anything.</p>\n");
    else if (noise > NOISY)
        bench_text_add(
            page,
            "<p class=\"warning\">The machine was busy: (p90 &minus; p10) / median of "
            "the times is %.0f&nbsp;%% in the median. Ratios are to what was measured in "
            "turn with them, but look at the ranges.</p>\n",
            100.0 * noise);
    if (is_mixed(data))
        bench_text_add(page, "<p class=\"warning\">The data are of several processors, compilers "
                             "or commits; the line above names the first.</p>\n");
    if (s->cards.n > 0 && !is_quick(data) && !(noise > NOISY))
        bench_text_add(page, "<dl class=\"cards\">\n%s</dl>\n", s->cards.data);
    bench_text_add(page, "</header>\n<main>\n");
    bench_text_free(&machine);
}

static void put_how(bench_text *page, const bench_lines *data, const bench_text *raw)
{
    bench_text commands = {NULL, 0, 0};
    const bench_line *setup = setup_of(data);
    put_commands(&commands, data);
    bench_text_add(
        page, "<section id=\"how\">\n<h2>How it was measured</h2>\n<p>Every figure is a median "
              "of runs in alternation with what it is compared to; p10 to p90 is the range of "
              "the middle eight tenths of them. Attention's outputs were checked against "
              "double precision, appended keys and values against the input, and what a snapshot "
              "brings back against what it took, before anything was timed. ");
    if (setup && isfinite(bench_line_number(setup, "load")))
        bench_text_add(page, "Load average at the start: %.2f. ", bench_line_number(setup, "load"));
    bench_text_add(page, "</p>\n");
    if (commands.n > 0) {
        bench_text_add(page, "<p>The commands");
        if (setup && *bench_line_text(setup, "command")) {
            bench_text_add(page, " of <code>");
            bench_html(page, bench_line_text(setup, "command"));
            bench_text_add(page, "</code>");
        }
        bench_text_add(page, ":</p>\n<pre class=\"wrap\">");
        bench_html(page, commands.data);
        bench_text_add(page, "</pre>\n");
    } else {
        bench_text_add(page, "<p>The data do not have the commands that made them.</p>\n");
    }
    bench_text_add(page,
                   "<details><summary>Raw data: %zu lines of JSON (data.jsonl; "
                   "<code>kvt-bench compare</code> takes two such files, "
                   "<code>kvt-bench report --from</code> one)</summary>\n<pre>",
                   data->n);
    bench_html(page, raw->data);
    bench_text_add(page, "</pre></details>\n</section>\n");
    bench_text_free(&commands);
}

/* ---- Markdown ---- */

static const bench_text *table_named(const bench_sections *s, const bench_text *setup,
                                     const char *name, size_t n)
{
    if (n == 5 && !strncmp(name, "setup", n))
        return setup;
    for (size_t i = 0; i < s->n_tables; i++)
        if (strlen(s->tables[i].name) == n && !strncmp(s->tables[i].name, name, n))
            return &s->tables[i].text;
    return NULL;
}

static size_t line_at(const bench_text *t, const char *p)
{
    size_t line = 1;
    for (const char *q = t->data; q < p; q++)
        line += *q == '\n';
    return line;
}

/* From `at` on, the first line that begins with a mark; inside a line it is spoken of. */
static const char *find_line(const bench_text *t, const char *at, const char *mark)
{
    while ((at = strstr(at, mark)) != NULL && at != t->data && at[-1] != '\n')
        at++;
    return at;
}

/* Put the tables between their marks in a file; what is outside of marks stays as it is. */
static void write_markdown(const bench_options *o, const bench_sections *s)
{
    static const char mark[] = "<!-- report ";
    bench_text in = bench_text_read(o->markdown), out = {NULL, 0, 0}, setup = {NULL, 0, 0};
    const char *at = in.data, *p;
    size_t n_tables = 0;
    double noise = bench_noise(s->data);
    if (is_quick(s->data) && !o->force)
        bench_fail(2, "--markdown: the data are of --quick, which measures nothing");
    if (noise > NOISY && !o->force)
        bench_fail(2,
                   "--markdown: the machine was busy: (p90 - p10) / median of the times is %.0f %% "
                   "in the median, more than %.0f %%; measure again, or --force",
                   100.0 * noise, 100.0 * NOISY);
    put_machine(&setup, s->data);
    /* The comment tells this project's test of its pages (tests/docs/blocks.py). */
    bench_text_add(&setup, "\n\n<!-- test: not run: they measure for minutes -->\n```sh\n");
    put_commands(&setup, s->data);
    bench_text_add(&setup, "```\n");
    while ((p = find_line(&in, at, mark)) != NULL) {
        const char *name = p + sizeof mark - 1;
        size_t n = strcspn(name, " \n");
        char end[96];
        if (strncmp(name + n, " -->\n", 5) != 0 || n > 40)
            bench_fail(2, "%s:%zu: not of the form <!-- report NAME --> on a line of its own",
                       o->markdown, line_at(&in, p));
        snprintf(end, sizeof end, "<!-- end %.*s -->", (int)n, name);
        const char *close = find_line(&in, name, end), *next = find_line(&in, name, mark);
        if (!close || (next && next < close))
            bench_fail(2, "%s:%zu: no %s behind it", o->markdown, line_at(&in, p), end);
        const bench_text *table = table_named(s, &setup, name, n);
        if (!table)
            bench_fail(2, "%s:%zu: the data have no table %.*s", o->markdown, line_at(&in, p),
                       (int)n, name);
        bench_text_bytes(&out, at, (size_t)(name + n + 5 - at));
        bench_text_bytes(&out, table->data, table->n);
        at = close;
        n_tables++;
    }
    if (n_tables == 0)
        bench_fail(2, "%s: no <!-- report NAME --> in it", o->markdown);
    bench_text_bytes(&out, at, strlen(at));
    bench_text_write(&out, o->markdown);
    printf("%s: %zu tables\n", o->markdown, n_tables);
    bench_text_free(&setup);
    bench_text_free(&out);
    bench_text_free(&in);
}

/* ---- the command ---- */

int bench_page(const bench_options *options)
{
    const char *folder = options->out ? options->out : "kvt-report";
    bench_text page = {NULL, 0, 0}, path = {NULL, 0, 0}, data_path = {NULL, 0, 0};
    bench_sections *s = bench_alloc(1, sizeof *s);
    struct stat kind;
    bench_chart_require(); /* now, and not after minutes */
    if (options->markdown)
        bench_text_free(&(bench_text){bench_text_read(options->markdown).data, 0, 0});
    if (strchr(folder, '\n'))
        bench_fail(2, "--out: a line break in the name");
    if (mkdir(folder, 0777) != 0 && errno != EEXIST)
        bench_fail(2, "--out: %s: %s", folder, strerror(errno));
    if (stat(folder, &kind) != 0 || !S_ISDIR(kind.st_mode))
        bench_fail(2, "--out: %s is not a folder", folder);
    bench_text_add(&data_path, "%s/data.jsonl", folder);
    bench_text_add(&path, "%s/report.html", folder);
    if (!options->from)
        bench_measure(options, data_path.data);

    const char *from = options->from ? options->from : data_path.data;
    bench_lines data = bench_lines_read(from);
    bench_text raw = bench_text_read(from);
    if (options->from)
        bench_text_write(&raw, data_path.data);
    s->data = &data;
    s->folder = folder;
    bench_sections_make(s);
    put_head(&page, &data, s);
    bench_text_bytes(&page, s->page.data, s->page.n);
    put_how(&page, &data, &raw);
    bench_text_add(&page, "</main>\n<footer><p>Made by <code>kvt-bench report</code>; the charts "
                          "are drawn by gnuplot.</p></footer>\n</body>\n</html>\n");
    bench_text_write(&page, path.data);
    printf("%s: %zu lines of data\n", path.data, data.n);
    if (options->markdown)
        write_markdown(options, s);

    for (size_t i = 0; i < s->n_tables; i++)
        bench_text_free(&s->tables[i].text);
    bench_text_free(&s->page);
    bench_text_free(&s->cards);
    free(s);
    bench_lines_free(&data);
    bench_text_free(&raw);
    bench_text_free(&page);
    bench_text_free(&data_path);
    bench_text_free(&path);
    return 0;
}
