/*
 * JSON on the standard output.
 */
#include "tool.h"

#include <stdio.h>

/* Bytes of the UTF-8 sequence that begins at p, 0 where it is none. */
static unsigned utf8(const unsigned char *p)
{
    unsigned n = 0, i;

    if (*p < 0x80)
        return 1;
    if (*p >= 0xc2 && *p <= 0xdf)
        n = 2;
    else if (*p >= 0xe0 && *p <= 0xef)
        n = 3;
    else if (*p >= 0xf0 && *p <= 0xf4)
        n = 4;
    for (i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    /* overlong forms, surrogates and code points beyond U+10FFFF: by the second byte */
    if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ||
        (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f))
        return 0;
    return n;
}

void json_text(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;

    while (*p) {
        unsigned n = utf8(p);
        if (*p == '"' || *p == '\\')
            printf("\\%c", *p);
        else if (*p < 0x20 || *p == 0x7f)
            printf("\\u%04x", *p);
        else if (tool_is_control((const char *)p))
            printf("\\u%04x", p[1]); /* U+0080 is c2 80 */
        else if (n == 0)
            printf("\\ufffd");
        else
            (void)fwrite(p, 1, n, stdout);
        p += n ? n : 1;
    }
}

void json_string(const char *text)
{
    putchar('"');
    json_text(text);
    putchar('"');
}

void json_hex(const uint8_t *bytes, uint32_t n)
{
    putchar('"');
    tool_print_hex(bytes, n);
    putchar('"');
}

void json_bool(int value)
{
    (void)fputs(value ? "true" : "false", stdout);
}

void json_begin(const char *file, kvt_status status)
{
    printf("{\"file\":");
    json_string(file);
    printf(",\"status\":%d,\"ok\":", (int)status);
    json_bool(status == KVT_OK);
}
