/*
 * One record of results, as a JSON line or as a row of a table. Values are formatted as JSON when
 * they are added; a table shows the same text without the quotes.
 */
#include "bench.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char *add(bench_record *r, const char *key)
{
    size_t capacity = sizeof r->fields / sizeof r->fields[0];
    if (r->n == capacity)
        bench_fail(1, "a record has more than %zu fields", capacity);
    r->fields[r->n].key = key;
    return r->fields[r->n++].value;
}

void bench_record_text(bench_record *r, const char *key, const char *value)
{
    char *p = add(r, key), *end = p + sizeof r->fields[0].value - 9;
    if (!value) {
        memcpy(p, "null", 5);
        return;
    }
    *p++ = '"';
    while (*value && p < end) {
        unsigned char c = (unsigned char)*value;
        size_t n = bench_utf8(value);
        if (c == '"' || c == '\\')
            *p++ = '\\';
        if (n == 0 || c < 0x20 || c == 0x7f)
            p += snprintf(p, 7, "\\u%04x", n == 0 ? 0xfffdu : c);
        else
            memcpy(p, value, n);
        p += n == 0 || c < 0x20 || c == 0x7f ? 0 : n;
        value += n ? n : 1;
    }
    *p++ = '"';
    *p = 0;
}

void bench_record_number(bench_record *r, const char *key, double value)
{
    char *p = add(r, key);
    if (isfinite(value))
        snprintf(p, sizeof r->fields[0].value, "%.6g", value);
    else
        memcpy(p, "null", 5);
}

void bench_record_integer(bench_record *r, const char *key, uint64_t value)
{
    snprintf(add(r, key), sizeof r->fields[0].value, "%llu", (unsigned long long)value);
}

void bench_record_bool(bench_record *r, const char *key, bool value)
{
    strcpy(add(r, key), value ? "true" : "false");
}

void bench_record_begin(bench_record *r, const char *bench, const char *isa, const char *k_type,
                        const char *v_type, const bench_case *c)
{
    r->n = 0;
    bench_record_text(r, "bench", bench);
    bench_record_text(r, "isa", isa);
    bench_record_text(r, "k_type", k_type);
    bench_record_text(r, "v_type", v_type);
    bench_record_integer(r, "q_heads", c->q_heads);
    bench_record_integer(r, "kv_heads", c->kv_heads);
    bench_record_integer(r, "head_dim", c->k_dim);
    bench_record_integer(r, "v_dim", c->v_dim);
    bench_record_bool(r, "v_in_k", c->v_in_k);
    bench_record_integer(r, "ctx", c->ctx);
    bench_record_integer(r, "threads", c->threads);
}

void bench_record_time(bench_record *r, const double *seconds, size_t n, double bytes,
                       double read_gbps, double ratio)
{
    bench_stats s = bench_stats_of(seconds, n);
    bench_record_number(r, "ms_median", 1e3 * s.median);
    bench_record_number(r, "ms_min", 1e3 * s.min);
    bench_record_integer(r, "bytes", (uint64_t)llround(bytes));
    bench_record_number(r, "gbps", 1e-9 * bytes / s.median);
    bench_record_number(r, "read_gbps", read_gbps);
    bench_record_number(r, "ratio", ratio);
    bench_record_number(r, "ms_p10", 1e3 * s.p10);
    bench_record_number(r, "ms_p90", 1e3 * s.p90);
    bench_record_integer(r, "pairs", n);
}

void bench_record_no_time(bench_record *r, double bytes)
{
    bench_record_number(r, "ms_median", NAN);
    bench_record_number(r, "ms_min", NAN);
    bench_record_integer(r, "bytes", (uint64_t)llround(bytes));
    bench_record_number(r, "gbps", NAN);
    bench_record_number(r, "read_gbps", NAN);
    bench_record_number(r, "ratio", NAN);
}

void bench_record_end(bench_record *r, const bench_options *options, bool pinned)
{
    bench_record_bool(r, "pinned", pinned);
    bench_record_integer(r, "seed", options->seed);
    bench_record_bool(r, "quick", options->quick);
    bench_record_text(r, "cpu", bench_cpu_name());
    bench_record_text(r, "compiler", bench_compiler());
    bench_record_text(r, "commit", bench_commit());
    bench_record_text(r, "version", kvt_version());
}

/* ---- output ---- */

void bench_table_begin(const bench_options *options, const char *title, const bench_column *columns,
                       size_t n_columns)
{
    if (options->json)
        return;
    printf("%s\n", title);
    printf("%s, %s, commit %s, kvtile %s, seed %llu\n", bench_cpu_name(), bench_compiler(),
           bench_commit(), kvt_version(), (unsigned long long)options->seed);
    if (options->quick)
        printf("--quick: shows that it runs; no figure here means anything\n");
    for (size_t i = 0; i < n_columns; i++)
        printf("%*s ", columns[i].width, columns[i].title ? columns[i].title : columns[i].key);
    printf("\n");
    fflush(stdout);
}

static void print_cell(const bench_record *r, const bench_column *column)
{
    char text[sizeof r->fields[0].value] = "-";
    for (size_t i = 0; i < r->n; i++) {
        if (strcmp(r->fields[i].key, column->key) != 0)
            continue;
        const char *value = r->fields[i].value;
        size_t length = strlen(value);
        if (value[0] == '"')
            snprintf(text, sizeof text, "%.*s", (int)length - 2, value + 1);
        else if (strcmp(value, "null") != 0)
            snprintf(text, sizeof text, "%s", value);
        /* shorter than JSON's six digits */
        double number;
        char rest;
        if (value[0] != '"' && strchr(value, '.') && sscanf(value, "%lf%c", &number, &rest) == 1)
            snprintf(text, sizeof text, "%.4g", number);
        break;
    }
    printf("%*s ", column->width, text);
}

void bench_emit(const bench_options *options, const bench_record *r, const bench_column *columns,
                size_t n_columns)
{
    if (options->json) {
        for (size_t i = 0; i < r->n; i++)
            printf("%s\"%s\": %s", i ? ", " : "{", r->fields[i].key, r->fields[i].value);
        printf("}\n");
    } else {
        for (size_t i = 0; i < n_columns; i++)
            print_cell(r, &columns[i]);
        printf("\n");
    }
    fflush(stdout);
}

void bench_note(const bench_options *options, const char *format, ...)
{
    va_list args;
    if (options->json)
        return;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
}

void bench_progress(const char *what, size_t i, size_t n)
{
    if (isatty(fileno(stderr)))
        fprintf(stderr, "\r%s %zu of %zu%s", what, i, n, i == n ? "\r\033[K" : " ");
}
