/*
 * Matrix products for the forward pass.
 *
 * The simple form: for every token i and row r, sum over c of w[r][c] * x[i][c]. Rows are stored in
 * panels of 16 (tl_matrix), so vectors hold 16 accumulators, each of which adds its products in the
 * order of c. Up to six tokens share the panel's loads: a draft of a few tokens, or a few sequences
 * side by side, take little longer than one token. The order within a sum is the same in every
 * shape of the loop, so a token's result has the same bits alone, in a chunk, and on any number of
 * threads: prefill, decode and drafts agree.
 */
#include "tinylm.h"

/* GCC's and Clang's vectors: eight floats, split by the compiler where the CPU has fewer. */
typedef float v8 __attribute__((vector_size(32), aligned(4)));

enum { PANEL = 16, TOKENS = 6, PANELS_PER_TASK = 4 };

/* One panel times n <= TOKENS tokens; y gets `live` of the panel's rows. */
#define PANEL_BY(n)                                                                                \
    do {                                                                                           \
        v8 lo[n] = {{0}}, hi[n] = {{0}};                                                           \
        for (uint32_t c = 0; c < cols; c++) {                                                      \
            v8 a = *(const v8 *)(w + (size_t)c * PANEL),                                           \
               b = *(const v8 *)(w + (size_t)c * PANEL + 8);                                       \
            for (int i = 0; i < (n); i++) {                                                        \
                lo[i] += a * x[(size_t)i * cols + c];                                              \
                hi[i] += b * x[(size_t)i * cols + c];                                              \
            }                                                                                      \
        }                                                                                          \
        for (int i = 0; i < (n); i++)                                                              \
            for (uint32_t r = 0; r < live; r++)                                                    \
                y[(size_t)i * rows + r] = r < 8 ? lo[i][r] : hi[i][r - 8];                         \
    } while (0)

static inline __attribute__((always_inline)) void
panels(const tl_matrix *m, const float *x0, float *y0, size_t n, size_t first, size_t last)
{
    uint32_t cols = m->cols, rows = m->rows;
    for (size_t p = first; p < last; p++) {
        const float *w = m->panels + p * cols * PANEL;
        uint32_t live = rows - (uint32_t)p * PANEL < PANEL ? rows - (uint32_t)p * PANEL : PANEL;
        size_t i0 = 0;
        for (; i0 + TOKENS <= n; i0 += TOKENS) {
            const float *x = x0 + i0 * cols;
            float *y = y0 + i0 * rows + p * PANEL;
            PANEL_BY(TOKENS);
        }
        const float *x = x0 + i0 * cols;
        float *y = y0 + i0 * rows + p * PANEL;
        switch (n - i0) {
        case 1: PANEL_BY(1); break;
        case 2: PANEL_BY(2); break;
        case 3: PANEL_BY(3); break;
        case 4: PANEL_BY(4); break;
        case 5: PANEL_BY(5); break;
        default: break;
        }
    }
}

typedef void panels_fn(const tl_matrix *m, const float *x, float *y, size_t n, size_t first,
                       size_t last);

static void panels_plain(const tl_matrix *m, const float *x, float *y, size_t n, size_t first,
                         size_t last)
{
    panels(m, x, y, n, first, last);
}

#if defined(__x86_64__) || defined(__i386__)
__attribute__((target("avx2"))) static void
panels_avx2(const tl_matrix *m, const float *x, float *y, size_t n, size_t first, size_t last)
{
    panels(m, x, y, n, first, last);
}
#endif

typedef struct product {
    panels_fn *run;
    const tl_matrix *w;
    const float *x;
    float *y;
    size_t n, n_panels;
} product;

static void product_task(void *arg, size_t i)
{
    const product *p = arg;
    size_t first = i * PANELS_PER_TASK, last = first + PANELS_PER_TASK;
    p->run(p->w, p->x, p->y, p->n, first, last < p->n_panels ? last : p->n_panels);
}

void tl_matmul(tl_work *work, const tl_matrix *w, const float *x, float *y, size_t n)
{
    product p = {panels_plain, w, x, y, n, ((size_t)w->rows + PANEL - 1) / PANEL};
#if defined(__x86_64__) || defined(__i386__)
    if (__builtin_cpu_supports("avx2"))
        p.run = panels_avx2;
#endif
    size_t tasks = (p.n_panels + PANELS_PER_TASK - 1) / PANELS_PER_TASK;
    /* Waking a thread takes longer than a small product: decode runs on the caller's thread. */
    if (n * w->rows * w->cols < (1u << 20))
        for (size_t i = 0; i < tasks; i++)
            product_task(&p, i);
    else
        tl_work_run(work, product_task, &p, tasks);
}
