/*
 * The header of a safetensors file: the size of a JSON object as 8 bytes, the object, padded with
 * spaces to a multiple of 8. The tensors' bytes follow in the object's order, without gaps.
 */
#include "tool.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint64_t array_bytes(const tool_array *array)
{
    uint64_t bytes = strcmp(array->dtype, "F16") == 0 || strcmp(array->dtype, "BF16") == 0 ? 2 : 4;
    uint32_t i;

    for (i = 0; i < array->n_dims; i++)
        bytes *= array->shape[i];
    return bytes;
}

char *safetensors_header(const tool_array *arrays, size_t n_arrays, const char *metadata,
                         size_t *bytes)
{
    /* one tensor: a name, a dtype and five numbers of up to 20 digits */
    size_t room = 64 + strlen(metadata) + n_arrays * 256, n = 8, i, end;
    char *header = malloc(room);
    uint64_t at = 0;

    if (!header)
        return NULL;
    n += (size_t)snprintf(header + n, room - n, "{\"__metadata__\":%s", metadata);
    for (i = 0; i < n_arrays; i++) {
        const tool_array *a = &arrays[i];
        uint64_t size = array_bytes(a);
        n += (size_t)snprintf(header + n, room - n, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%" PRIu64,
                              a->name, a->dtype, a->shape[0]);
        if (a->n_dims == 3)
            n += (size_t)snprintf(header + n, room - n, ",%" PRIu64 ",%" PRIu64, a->shape[1],
                                  a->shape[2]);
        n += (size_t)snprintf(header + n, room - n, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}",
                              at, at + size);
        at += size;
    }
    header[n++] = '}';
    end = (n + 7) / 8 * 8;
    memset(header + n, ' ', end - n);
    for (i = 0; i < 8; i++)
        header[i] = (char)((uint64_t)(end - 8) >> 8 * i & 0xff);
    *bytes = end;
    return header;
}
