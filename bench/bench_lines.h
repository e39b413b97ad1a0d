/*
 * Files of JSON lines, as the commands write them with --json, and growing texts: what report and
 * compare share (bench_lines.c).
 */
#ifndef BENCH_LINES_H
#define BENCH_LINES_H

#include "bench.h"

/* ---- texts ---- */

typedef struct bench_text {
    char *data; /* ends with a 0 once something was added */
    size_t n, capacity;
} bench_text;

void bench_text_add(bench_text *t, const char *format, ...) BENCH_PRINTF(2, 3);
void bench_text_bytes(bench_text *t, const char *data, size_t n);
/* In quotes, escaped; bytes that are no UTF-8 become U+FFFD. */
void bench_text_json(bench_text *t, const char *value);
void bench_text_free(bench_text *t);
/* All of a file; exits (code 2) where it cannot be read. */
bench_text bench_text_read(const char *path);
/* By bench_file_create: an old file stays whole on failure. Exits (code 1) where it cannot be
   written. */
void bench_text_write(const bench_text *t, const char *path);

/* ---- lines ---- */

typedef enum bench_kind { BENCH_NULL, BENCH_BOOL, BENCH_NUMBER, BENCH_STRING } bench_kind;

typedef struct bench_field {
    char *key, *text; /* the text of a string, of others as it stands in the file */
    double number;    /* NaN unless a number */
    bench_kind kind;
} bench_field;

typedef struct bench_line {
    size_t number; /* in the file, from 1 */
    size_t n;
    bench_field *fields;
} bench_line;

typedef struct bench_lines {
    char *path;
    size_t n;
    bench_line *lines;
} bench_lines;

/*
 * Every line that is not empty is one object of strings, numbers, true, false and null; NaN and
 * infinities, which some writers emit, count as null. Exits (code 2) with file, line and reason
 * where it is anything else, has a key twice or no "bench", or the file has no line.
 */
bench_lines bench_lines_read(const char *path);
void bench_lines_free(bench_lines *lines);

const bench_field *bench_line_find(const bench_line *l, const char *key); /* NULL: none */
/* A string's; "" where there is none. */
const char *bench_line_text(const bench_line *l, const char *key);
/* A number's; NaN where there is none. */
double bench_line_number(const bench_line *l, const char *key);
bool bench_line_is(const bench_line *l, const char *key, const char *text); /* of any kind */

#endif /* BENCH_LINES_H */
