/*
 * NumPy's .npy, version 1.0 (numpy.lib.format): a magic, the size of the header, a Python
 * dictionary padded to a multiple of 64, the elements.
 */
#include "tool.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

size_t npy_header(char *header, const tool_array *array)
{
    static const char magic[] = "\x93NUMPY\x01";
    const char *descr = strcmp(array->dtype, "I32") == 0   ? "<i4"
                        : strcmp(array->dtype, "F32") == 0 ? "<f4"
                                                           : "<f2";
    size_t n = 10, end;

    memcpy(header, magic, 8); /* the terminating 0 is the minor version */
    n += (size_t)snprintf(header + n, NPY_HEADER - n,
                          "{'descr': '%s', 'fortran_order': False, 'shape': (%" PRIu64 ",", descr,
                          array->shape[0]);
    if (array->n_dims == 3)
        n += (size_t)snprintf(header + n, NPY_HEADER - n, " %" PRIu64 ", %" PRIu64, array->shape[1],
                              array->shape[2]);
    n += (size_t)snprintf(header + n, NPY_HEADER - n, "), }");
    end = (n + 1 + 63) / 64 * 64;
    memset(header + n, ' ', end - n);
    header[end - 1] = '\n';
    header[8] = (char)((end - 10) & 0xff);
    header[9] = (char)((end - 10) >> 8);
    return end;
}
