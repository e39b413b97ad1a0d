/*
 * Keys of encrypted snapshots, from files: 32 bytes, or 64 hex digits and perhaps a newline.
 */
#include "tool.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static int digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

static int from_hex(const char *text, unsigned char key[KVT_KEY_BYTES])
{
    int i;

    for (i = 0; i < KVT_KEY_BYTES; i++) {
        int high = digit(text[2 * i]), low = digit(text[2 * i + 1]);
        if (high < 0 || low < 0)
            return -1;
        key[i] = (unsigned char)(high << 4 | low);
    }
    return 0;
}

void key_forget(unsigned char key[KVT_KEY_BYTES])
{
    volatile unsigned char *p = key; /* stores to it are not left out */
    int i;

    for (i = 0; i < KVT_KEY_BYTES; i++)
        p[i] = 0;
}

int key_read(const tool_options *o, const char *path, unsigned char key[KVT_KEY_BYTES])
{
    unsigned char text[2 * KVT_KEY_BYTES + 3]; /* one more than a key has */
    FILE *file = fopen(path, "rb");
    size_t n;
    int bad;

    if (!file)
        return tool_fail(o, path, KVT_ERR_IO, "the key cannot be opened: %s", strerror(errno));
    (void)setvbuf(file, NULL, _IONBF, 0); /* no copy stays in a buffer */
    errno = 0;
    n = fread(text, 1, sizeof text, file);
    bad = ferror(file) ? errno : 0;
    (void)fclose(file);
    if (bad)
        return tool_fail(o, path, KVT_ERR_IO, "the key cannot be read: %s", strerror(bad));
    if (n == 2 * KVT_KEY_BYTES + 2 && text[n - 2] == '\r' && text[n - 1] == '\n')
        n -= 2;
    else if (n == 2 * KVT_KEY_BYTES + 1 && text[n - 1] == '\n')
        n--;
    if (n == KVT_KEY_BYTES)
        memcpy(key, text, n);
    bad = n != KVT_KEY_BYTES && (n != 2 * KVT_KEY_BYTES || from_hex((const char *)text, key) != 0);
    key_forget(text);
    key_forget(text + KVT_KEY_BYTES);
    return bad ? tool_fail(o, path, KVT_ERR_ARG, "no key: it has to be %d bytes, or %d hex digits",
                           KVT_KEY_BYTES, 2 * KVT_KEY_BYTES)
               : SOUND;
}
