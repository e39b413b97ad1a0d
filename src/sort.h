/*
 * Sorting in place.
 *
 * The C library's qsort may allocate a copy of all (glibc's does), which no allocator of the cache
 * would know of, and which of two equal items it puts first is its own. This is heapsort: no
 * memory, n log n steps whatever the order of the items. A function in a header, so that the
 * comparison and the size of an item are known where it is compiled.
 */
#ifndef KVT_SORT_H
#define KVT_SORT_H

#include <assert.h>
#include <stddef.h>
#include <string.h>

#define KVT_SORT_ITEM_BYTES 64 /* the most that an item may have */

/* compare: as qsort's. Of items for which it answers 0 either may come first. */
static inline void kvt_sort_sift(unsigned char *items, size_t i, size_t n, size_t bytes,
                                 int (*compare)(const void *a, const void *b))
{
    _Alignas(8) unsigned char top[KVT_SORT_ITEM_BYTES]; /* an item, for the comparison */

    memcpy(top, items + i * bytes, bytes);
    for (size_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && compare(items + (child + 1) * bytes, items + child * bytes) > 0)
            child++;
        if (compare(items + child * bytes, top) <= 0)
            break;
        memcpy(items + i * bytes, items + child * bytes, bytes);
        i = child;
    }
    memcpy(items + i * bytes, top, bytes);
}

static inline void kvt_sort(void *items, size_t n, size_t bytes,
                            int (*compare)(const void *a, const void *b))
{
    unsigned char *first = items, largest[KVT_SORT_ITEM_BYTES];

    assert(bytes <= KVT_SORT_ITEM_BYTES);
    for (size_t i = n / 2; i-- > 0;)
        kvt_sort_sift(first, i, n, bytes, compare);
    for (size_t end = n; end-- > 1;) {
        memcpy(largest, first, bytes);
        memcpy(first, first + end * bytes, bytes);
        memcpy(first + end * bytes, largest, bytes);
        kvt_sort_sift(first, 0, end, bytes, compare);
    }
}

#endif /* KVT_SORT_H */
