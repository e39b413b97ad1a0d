/*
 * Status texts, the version, and the error text of a cache.
 */
#include <stdarg.h>
#include <stdio.h>

#include <string.h>

#include "src/status.h"

const char *kvt_status_string(kvt_status status)
{
    switch (status) {
    case KVT_OK: return "success";
    case KVT_ERR_ARG: return "invalid argument";
    case KVT_ERR_STATE: return "the call does not fit the state of the sequence";
    case KVT_ERR_VALUE: return "a value is not finite or cannot be stored in this type";
    case KVT_ERR_MEMORY: return "out of memory";
    case KVT_ERR_BUDGET: return "the memory budget would be passed";
    case KVT_ERR_FULL: return "the sequence's maximum number of tokens would be passed";
    case KVT_ERR_LIMIT: return "a size is beyond the library's limits";
    case KVT_ERR_UNSUPPORTED: return "not supported by this build or this CPU";
    case KVT_ERR_IO: return "input or output failed";
    case KVT_ERR_FORMAT: return "not a kvtile snapshot of a version that can be read";
    case KVT_ERR_CORRUPT: return "the snapshot is damaged";
    case KVT_ERR_MISMATCH: return "the snapshot belongs to another model or geometry";
    case KVT_ERR_CANCELLED: return "the caller has ended it";
    }
    return "not a kvtile status";
}

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

const char *kvt_version(void)
{
    return TEXT(KVT_VERSION_MAJOR) "." TEXT(KVT_VERSION_MINOR) "." TEXT(KVT_VERSION_PATCH);
}

/* A cache begins with its heap, which begins with its report. The text is bookkeeping, not state: a
 * const cache still takes it. */
static kvt_report *report_of(const kvt_cache *cache)
{
    return (kvt_report *)(uintptr_t)cache;
}

kvt_status kvt_fail(const kvt_cache *cache, kvt_status status, const char *format, ...)
{
    kvt_report *report = report_of(cache);
    char text[sizeof report->text] = "";
    va_list arguments;

    if (!cache)
        return status;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&report->lock);
    memcpy(report->text, text, sizeof text);
    pthread_mutex_unlock(&report->lock);
    return status;
}

kvt_status kvt_cache_error(const kvt_cache *cache, char *buffer, size_t buffer_bytes)
{
    kvt_report *report = report_of(cache);
    if (!cache || !buffer || buffer_bytes == 0)
        return KVT_ERR_ARG;
    pthread_mutex_lock(&report->lock);
    snprintf(buffer, buffer_bytes, "%s", report->text);
    pthread_mutex_unlock(&report->lock);
    return KVT_OK;
}
