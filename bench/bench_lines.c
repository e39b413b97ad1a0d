/*
 * Texts that grow, and a reader of JSON lines (RFC 8259, one flat object a line).
 */
#include "bench_lines.h"

#include "bench_files.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---- texts ---- */

static void reserve(bench_text *t, size_t more)
{
    if (t->capacity - t->n > more)
        return;
    size_t capacity = 2 * (t->n + more) + 256;
    char *data = realloc(t->data, capacity);
    if (!data)
        bench_fail(1, "no memory for a text of %zu bytes", capacity);
    t->data = data;
    t->capacity = capacity;
}

void bench_text_bytes(bench_text *t, const char *data, size_t n)
{
    reserve(t, n);
    memcpy(t->data + t->n, data, n);
    t->n += n;
    t->data[t->n] = 0;
}

void bench_text_add(bench_text *t, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0)
        bench_fail(1, "a text cannot be formatted");
    reserve(t, (size_t)n);
    va_start(args, format);
    vsnprintf(t->data + t->n, (size_t)n + 1, format, args);
    va_end(args);
    t->n += (size_t)n;
}

void bench_text_json(bench_text *t, const char *value)
{
    bench_text_bytes(t, "\"", 1);
    while (*value) {
        unsigned char c = (unsigned char)*value;
        size_t n = bench_utf8(value);
        if (n == 0)
            bench_text_add(t, "\\ufffd");
        else if (c < 0x20 || c == 0x7f)
            bench_text_add(t, "\\u%04x", c);
        else if (c == '"' || c == '\\')
            bench_text_add(t, "\\%c", c);
        else
            bench_text_bytes(t, value, n);
        value += n ? n : 1;
    }
    bench_text_bytes(t, "\"", 1);
}

void bench_text_free(bench_text *t)
{
    free(t->data);
    memset(t, 0, sizeof *t);
}

bench_text bench_text_read(const char *path)
{
    bench_text t = {NULL, 0, 0};
    char piece[16384];
    size_t n;
    FILE *f = fopen(path, "rb");
    if (!f)
        bench_fail(2, "%s: %s", path, strerror(errno));
    errno = 0;
    while ((n = fread(piece, 1, sizeof piece, f)) > 0)
        bench_text_bytes(&t, piece, n);
    if (ferror(f))
        bench_fail(2, "%s: %s", path, strerror(errno));
    fclose(f);
    bench_text_bytes(&t, "", 0);
    return t;
}

void bench_text_write(const bench_text *t, const char *path)
{
    bench_file file;
    bench_file_create(&file, path);
    fwrite(t->data, 1, t->n, file.file); /* the commit finds what has failed */
    bench_file_commit(&file);
}

/* ---- JSON ---- */

typedef struct parser {
    const char *path, *at, *end; /* end: of the line */
    size_t number;
} parser;

_Noreturn static void refuse(const parser *p, const char *reason)
{
    bench_fail(2, "%s:%zu: %s", p->path, p->number, reason);
}

static void skip_space(parser *p)
{
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\t' || *p->at == '\r'))
        p->at++;
}

static bool take(parser *p, const char *word)
{
    size_t n = strlen(word);
    if ((size_t)(p->end - p->at) < n || memcmp(p->at, word, n) != 0)
        return false;
    p->at += n;
    return true;
}

static unsigned parse_hex(parser *p)
{
    unsigned code = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        char c = p->at < p->end ? *p->at : 0;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            refuse(p, "\\u is not followed by four hexadecimal digits");
        code = 16 * code + (unsigned)digit;
    }
    return code;
}

static void put_utf8(bench_text *t, unsigned code)
{
    if (code < 0x80) {
        bench_text_add(t, "%c", (int)code);
    } else if (code < 0x800) {
        bench_text_add(t, "%c%c", (int)(0xc0 | code >> 6), (int)(0x80 | (code & 63)));
    } else if (code < 0x10000) {
        bench_text_add(t, "%c%c%c", (int)(0xe0 | code >> 12), (int)(0x80 | (code >> 6 & 63)),
                       (int)(0x80 | (code & 63)));
    } else {
        bench_text_add(t, "%c%c%c%c", (int)(0xf0 | code >> 18), (int)(0x80 | (code >> 12 & 63)),
                       (int)(0x80 | (code >> 6 & 63)), (int)(0x80 | (code & 63)));
    }
}

static void parse_escape(parser *p, bench_text *t)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char c = p->at < p->end ? *p->at++ : 0;
    const char *found = c ? strchr(from, c) : NULL;
    if (found) {
        bench_text_bytes(t, &to[found - from], 1);
        return;
    }
    if (c != 'u')
        refuse(p, "a string has an escape that JSON does not know");
    unsigned code = parse_hex(p);
    if (code >= 0xd800 && code < 0xdc00 && take(p, "\\u")) {
        unsigned low = parse_hex(p);
        if (low < 0xdc00 || low > 0xdfff)
            refuse(p, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xd800 && code <= 0xdfff) {
        refuse(p, "half of a surrogate pair");
    }
    if (code == 0)
        refuse(p, "a string has a zero character");
    put_utf8(t, code);
}

static char *parse_string(parser *p)
{
    bench_text t = {NULL, 0, 0};
    bench_text_bytes(&t, "", 0);
    if (!take(p, "\""))
        refuse(p, "not a string in quotes where one has to be");
    while (!take(p, "\"")) {
        if (p->at == p->end)
            refuse(p, "a string does not end on its line");
        if ((unsigned char)*p->at < 0x20)
            refuse(p, "a string has a control character");
        if (take(p, "\\"))
            parse_escape(p, &t);
        else
            bench_text_bytes(&t, p->at++, 1);
    }
    return t.data;
}

/* JSON's own form, which strtod's includes. */
static bool is_number(const char *text)
{
    text += *text == '-';
    size_t digits = strspn(text, "0123456789");
    if (digits == 0 || (digits > 1 && *text == '0'))
        return false;
    text += digits;
    if (*text == '.') {
        digits = strspn(++text, "0123456789");
        if (digits == 0)
            return false;
        text += digits;
    }
    if (*text == 'e' || *text == 'E') {
        text++;
        text += *text == '-' || *text == '+';
        digits = strspn(text, "0123456789");
        if (digits == 0)
            return false;
        text += digits;
    }
    return *text == 0;
}

static void parse_value(parser *p, bench_field *field)
{
    static const char *const nulls[] = {"null",      "NaN",      "nan", "-nan", "Infinity",
                                        "-Infinity", "infinity", "inf", "-inf"};
    field->number = NAN;
    if (p->at < p->end && *p->at == '"') {
        field->kind = BENCH_STRING;
        field->text = parse_string(p);
        return;
    }
    if (p->at < p->end && (*p->at == '{' || *p->at == '['))
        refuse(p, "a value is an object or a list: not a line of kvt-bench --json");
    size_t n = 0;
    while (p->at + n < p->end && !strchr(",} \t\r", p->at[n]))
        n++;
    field->text = bench_alloc(n + 1, 1);
    memcpy(field->text, p->at, n);
    p->at += n;
    if (!strcmp(field->text, "true") || !strcmp(field->text, "false")) {
        field->kind = BENCH_BOOL;
        return;
    }
    if (is_number(field->text)) {
        field->number = strtod(field->text, NULL);
        field->kind = isfinite(field->number) ? BENCH_NUMBER : BENCH_NULL;
        if (field->kind == BENCH_NULL)
            field->number = NAN;
        return;
    }
    for (size_t i = 0; i < sizeof nulls / sizeof nulls[0]; i++)
        if (!strcmp(field->text, nulls[i]))
            return;
    refuse(p, "a value is neither a string, a number, true, false nor null");
}

static void parse_line(parser *p, bench_line *l)
{
    size_t capacity = 0;
    skip_space(p);
    if (!take(p, "{"))
        refuse(p, "not a JSON object");
    skip_space(p);
    bool more = !take(p, "}");
    while (more) {
        if (l->n == capacity) {
            capacity = 2 * capacity + 16;
            l->fields = realloc(l->fields, capacity * sizeof *l->fields);
            if (!l->fields)
                bench_fail(1, "no memory for %zu fields", capacity);
        }
        bench_field *field = &l->fields[l->n];
        memset(field, 0, sizeof *field);
        skip_space(p);
        field->key = parse_string(p);
        if (bench_line_find(l, field->key))
            refuse(p, "a key stands there twice");
        skip_space(p);
        if (!take(p, ":"))
            refuse(p, "no colon behind a key");
        skip_space(p);
        parse_value(p, field);
        l->n++;
        skip_space(p);
        more = take(p, ",");
        if (!more && !take(p, "}"))
            refuse(p, "neither a comma nor } behind a value: the line may be cut");
    }
    skip_space(p);
    if (p->at != p->end)
        refuse(p, "text behind the object");
    if (*bench_line_text(l, "bench") == 0)
        refuse(p, "no \"bench\": not a line of kvt-bench --json");
}

bench_lines bench_lines_read(const char *path)
{
    bench_lines r;
    bench_text text = bench_text_read(path);
    parser p = {path, text.data, NULL, 0};
    size_t capacity = 0;
    memset(&r, 0, sizeof r);
    r.path = bench_alloc(strlen(path) + 1, 1);
    strcpy(r.path, path);
    for (const char *end = text.data + text.n; p.at < end; p.at = p.end + 1) {
        p.number++;
        p.end = memchr(p.at, '\n', (size_t)(end - p.at));
        if (!p.end)
            p.end = end;
        if (memchr(p.at, 0, (size_t)(p.end - p.at)))
            refuse(&p, "a zero byte: not a text");
        skip_space(&p);
        if (p.at == p.end)
            continue;
        if (r.n == capacity) {
            capacity = 2 * capacity + 64;
            r.lines = realloc(r.lines, capacity * sizeof *r.lines);
            if (!r.lines)
                bench_fail(1, "no memory for %zu lines", capacity);
        }
        memset(&r.lines[r.n], 0, sizeof r.lines[r.n]);
        r.lines[r.n].number = p.number;
        parse_line(&p, &r.lines[r.n]);
        r.n++;
    }
    bench_text_free(&text);
    if (r.n == 0)
        bench_fail(2, "%s: no line in it", path);
    return r;
}

void bench_lines_free(bench_lines *lines)
{
    for (size_t i = 0; i < lines->n; i++) {
        for (size_t j = 0; j < lines->lines[i].n; j++) {
            free(lines->lines[i].fields[j].key);
            free(lines->lines[i].fields[j].text);
        }
        free(lines->lines[i].fields);
    }
    free(lines->lines);
    free(lines->path);
    memset(lines, 0, sizeof *lines);
}

const bench_field *bench_line_find(const bench_line *l, const char *key)
{
    for (size_t i = 0; i < l->n; i++)
        if (!strcmp(l->fields[i].key, key))
            return &l->fields[i];
    return NULL;
}

const char *bench_line_text(const bench_line *l, const char *key)
{
    const bench_field *f = bench_line_find(l, key);
    return f && f->kind == BENCH_STRING ? f->text : "";
}

double bench_line_number(const bench_line *l, const char *key)
{
    const bench_field *f = bench_line_find(l, key);
    return f ? f->number : NAN;
}

bool bench_line_is(const bench_line *l, const char *key, const char *text)
{
    const bench_field *f = bench_line_find(l, key);
    return f && !strcmp(f->text, text);
}
