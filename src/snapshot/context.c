/*
 * Memory and error texts of the snapshot code, which runs with a cache (save, load: everything
 * through its allocator, as working memory) or without one (inspection: the C library).
 */
#include "src/snapshot/format.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

kvt_status kvt_snap_fail(const kvt_snap_context *context, kvt_status status, const char *format,
                         ...)
{
    char text[256], *at;
    va_list arguments;

    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (at = text; *at; at++) /* names that a file gives: no orders to a terminal */
        if ((unsigned char)*at < 0x20 || *at == 0x7f)
            *at = '?';
    if (context->cache)
        return kvt_fail(context->cache, status, "%s", text);
    if (context->text && context->text_bytes)
        (void)snprintf(context->text, context->text_bytes, "%s", text);
    return status;
}

kvt_status kvt_snap_alloc(const kvt_snap_context *context, size_t bytes, const char *what,
                          void **memory)
{
    if (context->cache)
        return kvt_mem_alloc_working(context->cache, bytes, what, memory);
    *memory = malloc(bytes ? bytes : 1);
    if (!*memory)
        return kvt_snap_fail(context, KVT_ERR_MEMORY, "no memory for %s: %zu bytes", what, bytes);
    return KVT_OK;
}

void kvt_snap_free(const kvt_snap_context *context, void *memory, size_t bytes)
{
    if (context->cache)
        kvt_mem_free_working(context->cache, memory, bytes);
    else
        free(memory);
}

kvt_status kvt_snap_reserve(const kvt_snap_context *context, kvt_snap_buffer *buffer, size_t keep,
                            size_t bytes, const char *what)
{
    void *memory;
    kvt_status status;

    if (bytes <= buffer->bytes)
        return KVT_OK;
    if (!keep)
        kvt_snap_release(context, buffer);
    status = kvt_snap_alloc(context, bytes, what, &memory);
    if (status != KVT_OK)
        return status;
    if (keep)
        memcpy(memory, buffer->data, keep);
    kvt_snap_release(context, buffer);
    buffer->data = memory;
    buffer->bytes = bytes;
    return KVT_OK;
}

void kvt_snap_release(const kvt_snap_context *context, kvt_snap_buffer *buffer)
{
    if (buffer->data)
        kvt_snap_free(context, buffer->data, buffer->bytes);
    buffer->data = NULL;
    buffer->bytes = 0;
}
