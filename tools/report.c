/*
 * Errors, and the names of things.
 */
#include "tool.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define LIBRARY_TEXT 255 /* bytes of an error that the library has room for */

static int exit_code(kvt_status status)
{
    switch (status) {
    case KVT_OK: return SOUND;
    case KVT_ERR_FORMAT:
    case KVT_ERR_CORRUPT: return DAMAGED;
    default: return UNUSABLE;
    }
}

/* A name may have any bytes; the line is one. */
static char shown(char c)
{
    return (unsigned char)c < 0x20 || c == 0x7f ? '?' : c;
}

int tool_is_control(const char *text)
{
    return (unsigned char)text[0] == 0xc2 && ((unsigned char)text[1] & 0xe0) == 0x80;
}

void tool_print_name(FILE *to, const char *name)
{
    for (; *name; name++) {
        int two = tool_is_control(name);
        (void)fputc(two ? '?' : shown(*name), to);
        name += two;
    }
}

/* Whether the first n bytes of both are shown alike. */
static int is_alike(const char *a, const char *b, size_t n)
{
    size_t i;

    for (i = 0; i < n; i++)
        if (shown(a[i]) != shown(b[i]))
            return 0;
    return 1;
}

/* Where a text that the library had no more room for ends with the beginning of the name. */
static const char *find_cut(const char *text, const char *file)
{
    const char *at = strlen(text) == LIBRARY_TEXT ? strstr(text, ": ") : NULL;

    for (; at; at = strstr(at + 1, ": ")) {
        size_t n = strlen(at + 2);
        if (n && n < strlen(file) && is_alike(at + 2, file, n))
            return at;
    }
    return NULL;
}

int tool_names(const char *text, const char *file)
{
    size_t n = strlen(text), name = strlen(file);

    if (n > name + 2 && memcmp(text + n - name - 2, ": ", 2) == 0 &&
        is_alike(text + n - name, file, name))
        return 2;
    return find_cut(text, file) != NULL;
}

int tool_cut_name(char *text, const char *file)
{
    int how = tool_names(text, file);

    if (how == 2)
        text[strlen(text) - strlen(file) - 2] = '\0';
    else if (how)
        text[find_cut(text, file) - text] = '\0';
    return how;
}

static void report(const tool_options *o, const char *file, kvt_status status, const char *format,
                   va_list arguments)
{
    char text[TOOL_TEXT + 512];

    progress_stop();
    if (output_is_unread())
        return;
    (void)vsnprintf(text, sizeof text, format, arguments);
    if (output_interrupted()) /* whatever the call has made of it */
        (void)snprintf(text, sizeof text, "interrupted");
    (void)tool_cut_name(text, file); /* the line begins with it */
    if (o->json) {
        json_begin(file, status);
        printf(",\"error\":");
        json_string(text);
        printf("}\n");
    }
    (void)fflush(stdout);
    (void)fputs("kvtile: ", stderr);
    tool_print_name(stderr, file);
    (void)fputs(": ", stderr);
    tool_print_name(stderr, text); /* which may name other files */
    (void)fputc('\n', stderr);
}

int tool_fail(const tool_options *o, const char *file, kvt_status status, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    report(o, file, status, format, arguments);
    va_end(arguments);
    return exit_code(status);
}

int tool_refuse(const tool_options *o, const char *file, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    report(o, file, KVT_ERR_ARG, format, arguments);
    va_end(arguments);
    return USAGE;
}

const char *tool_type_name(kvt_type type)
{
    switch (type) {
    case KVT_TYPE_F32: return "f32";
    case KVT_TYPE_F16: return "f16";
    case KVT_TYPE_I8: return "i8";
    case KVT_TYPE_I4: return "i4";
    case KVT_TYPE_I5: return "i5";
    default: return "?";
    }
}

void tool_print_hex(const uint8_t *bytes, uint32_t n)
{
    uint32_t i;

    for (i = 0; i < n; i++)
        printf("%02x", bytes[i]);
}

void tool_print_tag(const uint8_t *tag, uint32_t tag_bytes)
{
    uint32_t i;

    for (i = 0; i < tag_bytes; i++)
        if (tag[i] < 0x20 || tag[i] > 0x7e || tag[i] == '"') {
            tool_print_hex(tag, tag_bytes);
            return;
        }
    printf("\"%.*s\"", (int)tag_bytes, (const char *)tag);
}
