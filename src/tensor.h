/*
 * The caller's memory: validated views, read and written row by row.
 */
#ifndef KVT_TENSOR_H
#define KVT_TENSOR_H

#include "simd/kernels.h"
#include "src/status.h"

/* A validated view with the strides filled in. */
typedef struct kvt_view {
    unsigned char *data;
    kvt_dtype dtype;
    size_t token_stride, head_stride;
} kvt_view;

/*
 * Check a tensor of [n_tokens][n_heads][dims] and fill in its strides. "name" is for the text.
 * KVT_ERR_ARG: NULL, unknown dtype, misaligned, strides negative, overlapping or overflowing.
 */
kvt_status kvt_view_make(const kvt_cache *cache, const kvt_tensor *tensor, const char *name,
                         uint64_t n_tokens, size_t n_heads, size_t dims, kvt_view *view);

/* Row (token, head) of a view to f32; 0 when an element is not finite. And back. */
int kvt_view_load(const kvt_kernels *kernels, const kvt_view *view, uint64_t token, size_t head,
                  size_t dims, float *row);
void kvt_view_store(const kvt_kernels *kernels, const kvt_view *view, uint64_t token, size_t head,
                    size_t dims, const float *row);

#endif /* KVT_TENSOR_H */
