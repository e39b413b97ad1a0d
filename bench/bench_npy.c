/*
 * .npy files (NumPy's format, versions 1 to 3) of four dimensions, f16 or f32, little endian, in C
 * order. Read a slice of the first dimension at a time.
 *
 * Nothing in a file is believed: its header has one form, the product of the shape is checked for
 * overflow and is what the file's length has to be, and a number that is not finite, or beyond f16,
 * is refused with its place. Every refusal ends the program with code 2.
 */
#include "bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEADER = 65536 };

/* The position in a header's text: a Python dict of a string, a bool and a tuple. */
typedef struct text {
    const char *path, *at;
} text;

static void skip_spaces(text *t)
{
    while (*t->at == ' ' || *t->at == '\t' || *t->at == '\n')
        t->at++;
}

static bool take(text *t, const char *word)
{
    size_t n = strlen(word);
    skip_spaces(t);
    if (strncmp(t->at, word, n) != 0)
        return false;
    t->at += n;
    return true;
}

static void need(text *t, const char *word)
{
    if (!take(t, word))
        bench_fail(2,
                   "%s: the header is no dict of descr, fortran_order and shape: no %s at '%.16s'",
                   t->path, word, t->at);
}

/* A quoted string, without escapes. */
static void take_string(text *t, char *out, size_t room)
{
    size_t n = 0;
    skip_spaces(t);
    char quote = *t->at == '"' ? '"' : '\'';
    need(t, quote == '"' ? "\"" : "'");
    while (*t->at && *t->at != quote && n + 1 < room)
        out[n++] = *t->at++;
    out[n] = 0;
    if (*t->at++ != quote)
        bench_fail(2, "%s: the header has a string without an end, or a long one: %s", t->path,
                   out);
}

static void take_shape(text *t, bench_npy *npy)
{
    size_t n = 0;
    need(t, "(");
    while (!take(t, ")")) {
        size_t size = 0;
        skip_spaces(t);
        const char *digits = t->at;
        for (; *t->at >= '0' && *t->at <= '9'; t->at++) {
            size_t digit = (size_t)(*t->at - '0');
            if (size > (SIZE_MAX - digit) / 10)
                bench_fail(2, "%s: a size in the shape overflows: %.24s", t->path, digits);
            size = 10 * size + digit;
        }
        if (t->at == digits)
            bench_fail(2, "%s: the shape has something else than numbers: %.16s", t->path, digits);
        if (size == 0)
            bench_fail(2, "%s: a size in the shape is 0", t->path);
        if (n == 4)
            bench_fail(2, "%s: more than 4 dimensions; they are [layer][token][head][dim]",
                       t->path);
        npy->shape[n++] = size;
        if (!take(t, ",")) {
            need(t, ")");
            break;
        }
    }
    if (n != 4)
        bench_fail(2, "%s: %zu dimensions; there are 4: [layer][token][head][dim]", t->path, n);
}

static void read_header(bench_npy *npy, char *header)
{
    text t = {npy->path, header};
    bool has_descr = false, has_order = false, has_shape = false;
    char key[32], descr[16];
    need(&t, "{");
    while (!take(&t, "}")) {
        take_string(&t, key, sizeof key);
        need(&t, ":");
        if (!strcmp(key, "descr") && !has_descr) {
            has_descr = true;
            skip_spaces(&t);
            if (*t.at == '[')
                bench_fail(2, "%s: a structured dtype; it has to be <f2 or <f4", npy->path);
            take_string(&t, descr, sizeof descr);
            if (strcmp(descr, "<f2") != 0 && strcmp(descr, "<f4") != 0)
                bench_fail(2, "%s: dtype %s; it has to be <f2 or <f4 (f16, f32, little endian)",
                           npy->path, descr);
            npy->item = descr[2] == '2' ? 2 : 4;
        } else if (!strcmp(key, "fortran_order") && !has_order) {
            has_order = true;
            if (take(&t, "True"))
                bench_fail(2, "%s: Fortran order; it has to be C order", npy->path);
            need(&t, "False");
        } else if (!strcmp(key, "shape") && !has_shape) {
            has_shape = true;
            take_shape(&t, npy);
        } else {
            bench_fail(2, "%s: the header has an unknown key, or one twice: %s", npy->path, key);
        }
        if (!take(&t, ",")) {
            need(&t, "}");
            break;
        }
    }
    skip_spaces(&t);
    if (*t.at)
        bench_fail(2, "%s: the header goes on behind its dict: %.16s", npy->path, t.at);
    if (!has_descr || !has_order || !has_shape)
        bench_fail(2, "%s: the header lacks %s", npy->path,
                   !has_descr   ? "descr"
                   : !has_order ? "fortran_order"
                                : "shape");
}

void bench_npy_open(bench_npy *npy, const char *name, const char *suffix)
{
    unsigned char start[12];
    size_t values = 1;
    memset(npy, 0, sizeof *npy);
    size_t room = strlen(name) + strlen(suffix) + 1;
    char *path = bench_alloc(room, 1);
    snprintf(path, room, "%s%s", name, suffix);
    npy->path = path;
    npy->file = fopen(path, "rb");
    if (!npy->file)
        bench_fail(2, "%s: %s", path, strerror(errno));
    if (fread(start, 1, 10, npy->file) != 10 || memcmp(start, "\x93NUMPY", 6) != 0)
        bench_fail(2, "%s: not a .npy file", path);
    size_t length = start[8] | (size_t)start[9] << 8, start_bytes = 10;
    if (start[6] < 1 || start[6] > 3 || start[7] != 0)
        bench_fail(2, "%s: version %u.%u of .npy; 1.0, 2.0 and 3.0 are known", path, start[6],
                   start[7]);
    if (start[6] >= 2) {
        start_bytes = 12;
        if (fread(start + 10, 1, 2, npy->file) != 2)
            bench_fail(2, "%s: the file ends in its header", path);
        length |= (size_t)start[10] << 16 | (size_t)start[11] << 24;
    }
    if (length > MAX_HEADER)
        bench_fail(2, "%s: a header of %zu bytes", path, length);
    char *header = bench_alloc(length + 1, 1);
    if (fread(header, 1, length, npy->file) != length)
        bench_fail(2, "%s: the file ends in its header", path);
    if (memchr(header, 0, length))
        bench_fail(2, "%s: the header has a zero byte", path);
    read_header(npy, header);
    free(header);
    npy->data = (long)(start_bytes + length);

    for (size_t i = 0; i < 4; i++) {
        if (npy->shape[i] > SIZE_MAX / 4 / values)
            bench_fail(2, "%s: the shape's product overflows", path);
        values *= npy->shape[i];
    }
    npy->slice = values / npy->shape[0];
    if (fseek(npy->file, 0, SEEK_END) != 0)
        bench_fail(2, "%s: cannot be read in parts: %s", path, strerror(errno));
    long end = ftell(npy->file);
    if (end < npy->data || (size_t)(end - npy->data) != values * npy->item)
        bench_fail(2, "%s: %ld bytes of data; its shape has %zu", path, end - npy->data,
                   values * npy->item);
}

void bench_npy_close(bench_npy *npy)
{
    fclose(npy->file);
    free(npy->path);
}

void bench_npy_read(bench_npy *npy, size_t slice, float *out)
{
    size_t n = npy->slice, bytes = n * npy->item;
    unsigned char *raw = bench_alloc(bytes, 1);
    if (fseek(npy->file, npy->data + (long)(slice * bytes), SEEK_SET) != 0 ||
        fread(raw, 1, bytes, npy->file) != bytes)
        bench_fail(2, "%s: cannot be read", npy->path);
    size_t bad = n;
    bool bad_finite = true;
    for (size_t i = 0; i < n && bad == n; i++) {
        const unsigned char *p = raw + i * npy->item;
        uint32_t bits = p[0] | (uint32_t)p[1] << 8;
        bool finite;
        if (npy->item == 2) {
            finite = (bits & 0x7c00) != 0x7c00;
            out[i] = finite ? bench_from_f16((uint16_t)bits) : 0.0f;
        } else {
            bits |= (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
            finite = (bits & 0x7f800000) != 0x7f800000;
            memcpy(&out[i], &bits, sizeof bits);
        }
        if (!finite || out[i] > 65504.0f || out[i] < -65504.0f) {
            bad = i;
            bad_finite = finite;
        }
    }
    free(raw);
    if (bad < n) {
        size_t dim = npy->shape[3], heads = npy->shape[2];
        bench_fail(2, "%s: [%zu][%zu][%zu][%zu] is %s", npy->path, slice, bad / dim / heads,
                   bad / dim % heads, bad % dim, bad_finite ? "beyond f16's 65504" : "not finite");
    }
}
