/*
 * Views of the caller's memory: checked once, then read and written row by row.
 */
#include "src/tensor.h"

static size_t dtype_bytes(kvt_dtype dtype)
{
    return dtype == KVT_F32 ? 4 : 2;
}

/*
 * Whether rows of row_bytes on a grid of n1 strides s1 and n2 strides s2 stay apart and within
 * the address space. The smaller stride clears a row, the larger one a run of the smaller.
 */
static int is_apart(uint64_t row_bytes, uint64_t n1, uint64_t s1, uint64_t n2, uint64_t s2)
{
    uint64_t run = row_bytes, extent;
    if (s2 < s1 || n1 <= 1) { /* let (n1, s1) be the smaller stride that counts */
        uint64_t n = n1, s = s1;
        n1 = n2, s1 = s2;
        n2 = n, s2 = s;
    }
    if (n1 > 1) {
        if (s1 < run || kvt_mul_overflows(n1 - 1, s1, &extent) ||
            kvt_add_overflows(extent, row_bytes, &run))
            return 0;
    }
    if (n2 > 1) {
        if (s2 < run || kvt_mul_overflows(n2 - 1, s2, &extent) ||
            kvt_add_overflows(extent, run, &run))
            return 0;
    }
    return run <= PTRDIFF_MAX;
}

kvt_status kvt_view_make(const kvt_cache *cache, const kvt_tensor *tensor, const char *name,
                         uint64_t n_tokens, size_t n_heads, size_t dims, kvt_view *view)
{
    uint64_t row_bytes, token_stride, head_stride;
    size_t element;

    if (!tensor || !tensor->data)
        return kvt_fail(cache, KVT_ERR_ARG, "%s is NULL", name);
    if ((unsigned)tensor->dtype > KVT_BF16)
        return kvt_fail(cache, KVT_ERR_ARG, "%s: unknown dtype %d", name, (int)tensor->dtype);
    element = dtype_bytes(tensor->dtype);
    row_bytes = dims * element;
    if (tensor->token_stride < 0 || tensor->head_stride < 0)
        return kvt_fail(cache, KVT_ERR_ARG, "%s: a stride is negative", name);
    head_stride = tensor->head_stride ? (uint64_t)tensor->head_stride : row_bytes;
    token_stride = (uint64_t)tensor->token_stride;
    if (token_stride == 0 && kvt_mul_overflows(head_stride, n_heads, &token_stride))
        return kvt_fail(cache, KVT_ERR_ARG, "%s: the strides overflow", name);
    if (head_stride % element || token_stride % element || (uintptr_t)tensor->data % element)
        return kvt_fail(cache, KVT_ERR_ARG,
                        "%s: data or a stride is no multiple of the element's "
                        "%zu bytes",
                        name, element);
    if (!is_apart(row_bytes, n_heads, head_stride, n_tokens, token_stride))
        return kvt_fail(cache, KVT_ERR_ARG, "%s: the strides overlap or overflow", name);
    view->data = tensor->data;
    view->dtype = tensor->dtype;
    view->token_stride = (size_t)token_stride;
    view->head_stride = (size_t)head_stride;
    return KVT_OK;
}

static unsigned char *row_of(const kvt_view *view, uint64_t token, size_t head)
{
    return view->data + (size_t)token * view->token_stride + head * view->head_stride;
}

int kvt_view_load(const kvt_kernels *kernels, const kvt_view *view, uint64_t token, size_t head,
                  size_t dims, float *row)
{
    const void *from = row_of(view, token, head);
    if (view->dtype == KVT_F32)
        return kernels->load_f32(from, row, dims);
    if (view->dtype == KVT_F16)
        return kernels->load_f16(from, row, dims);
    return kernels->load_bf16(from, row, dims);
}

void kvt_view_store(const kvt_kernels *kernels, const kvt_view *view, uint64_t token, size_t head,
                    size_t dims, const float *row)
{
    void *to = row_of(view, token, head);
    if (view->dtype == KVT_F32)
        kernels->store_f32(row, to, dims);
    else if (view->dtype == KVT_F16)
        kernels->store_f16(row, to, dims);
    else
        kernels->store_bf16(row, to, dims);
}
