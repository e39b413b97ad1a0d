/*
 * Status codes with a text, and what every validation needs: overflow checks, sized structs.
 */
#ifndef KVT_STATUS_H
#define KVT_STATUS_H

#include <kvtile/kvtile.h>

#include <pthread.h>

/* The text of the last failure. The first member of struct kvt_cache, by way of its heap. */
typedef struct kvt_report {
    pthread_mutex_t lock;
    char text[256];
} kvt_report;

/* Keep a text on the cache (which may be NULL) and return status. Takes the lock. */
kvt_status kvt_fail(const kvt_cache *cache, kvt_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* 1 when a * b, or a + b, overflows; else 0 and *result. */
static inline int kvt_mul_overflows(uint64_t a, uint64_t b, uint64_t *result)
{
    return __builtin_mul_overflow(a, b, result);
}

static inline int kvt_add_overflows(uint64_t a, uint64_t b, uint64_t *result)
{
    return __builtin_add_overflow(a, b, result);
}

/* Copy a public struct whose first member is struct_size. 0 when its size is not one we know. */
static inline int kvt_copy_struct(void *to, const void *from, size_t bytes)
{
    size_t struct_size;
    memcpy(&struct_size, from, sizeof struct_size);
    if (struct_size != bytes)
        return 0;
    memcpy(to, from, bytes);
    return 1;
}

#endif /* KVT_STATUS_H */
