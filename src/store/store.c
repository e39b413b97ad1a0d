/*
 * What all stores share: closing, and the check of a store that a caller gives.
 */
#include "src/store/store.h"

#include <stdarg.h>
#include <stdio.h>

void kvt_store_close(kvt_store *store)
{
    if (!store)
        return;
    if (store->close)
        store->close(store->user);
    memset(store, 0, sizeof *store);
}

int kvt_store_is_whole(const kvt_store *store)
{
    return store && store->struct_size == sizeof *store && store->get && store->put &&
           store->exists && store->remove;
}

kvt_status kvt_store_fail(kvt_store_error *error, kvt_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

kvt_status kvt_store_fail_open(char *text, size_t text_bytes, kvt_status status, const char *format,
                               ...)
{
    if (text && text_bytes) {
        va_list arguments;
        va_start(arguments, format);
        (void)vsnprintf(text, text_bytes, format, arguments);
        va_end(arguments);
    }
    return status;
}
