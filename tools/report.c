/*
 * Errors, and the names of things.
 */
#include "tool.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

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

/* The names are as they can be shown. */
int tool_cut_name(char *text, const char *file)
{
    size_t n = strlen(text), name = strlen(file), i;
    const char *end = text + n - name;

    if (n <= name + 2 || memcmp(end - 2, ": ", 2) != 0)
        return 0;
    for (i = 0; i < name; i++)
        if (shown(end[i]) != shown(file[i]))
            return 0;
    text[n - name - 2] = '\0';
    return 1;
}

static void report(const tool_options *o, const char *file, kvt_status status, const char *format,
                   va_list arguments)
{
    char text[TOOL_TEXT + 512];
    const char *p;

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
    for (p = file; *p; p++)
        (void)fputc(shown(*p), stderr);
    (void)fprintf(stderr, ": %s\n", text);
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
