/*
 * An independent implementation of docs/numerics.md, compared bit for bit with kvt_read:
 * conversions, scales, codes, offset, rotation; on every instruction set and under another
 * floating-point environment (rounding upward, flush to zero).
 */
#include "support.h"

#include <fenv.h>
#include <math.h>
#include <stdio.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

/* ---- f16 by arithmetic in double, not by bits ---- */

/* x rounded to a multiple of the f16 step at its magnitude; up: toward +infinity. */
static double to_f16(double x, int up)
{
    int exponent;
    double step, scaled;
    if (x == 0)
        return x;
    frexp(x, &exponent); /* |x| in [2^(e-1), 2^e) */
    step = ldexp(1.0, (exponent < -13 ? -13 : exponent) - 11);
    scaled = x / step;
    return (up ? ceil(scaled) : nearbyint(scaled)) * step;
}

static float saturate(double x)
{
    double h = to_f16(x, 0);
    return (float)(h > 65504 ? 65504 : h < -65504 ? -65504 : h);
}

/* ---- rotation ---- */

static uint64_t splitmix(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static float sign_of(uint64_t seed, size_t dim, size_t head, size_t d)
{
    size_t words = (dim + 63) / 64;
    return splitmix(seed, head * words + d / 64) >> d % 64 & 1 ? -1.0f : 1.0f;
}

static int log2_block(size_t dim)
{
    int log2 = 0;
    while (dim % 2 == 0) {
        dim /= 2;
        log2++;
    }
    return log2;
}

static void butterflies(float *x, size_t dim)
{
    size_t block = (size_t)1 << log2_block(dim);
    for (size_t h = 1; h < block; h *= 2)
        for (size_t i = 0; i < dim; i++)
            if (!(i & h)) {
                volatile float sum = x[i] + x[i + h], difference = x[i] - x[i + h];
                x[i] = sum;
                x[i + h] = difference;
            }
}

/* ---- the model of one head's K or V ---- */

typedef struct model {
    size_t dim, head;
    int rotates, offsets;
    uint64_t seed;
    float mu[2048 / 64][576];
    float stored[2048][576]; /* code * scale, in the stored domain */
    size_t length;
} model;

static void quantize(const float *x, size_t dim, float *stored)
{
    float absmax = 0, scale, reciprocal;
    for (size_t d = 0; d < dim; d++)
        absmax = fabsf(x[d]) > absmax ? fabsf(x[d]) : absmax;
    {
        volatile float quotient = absmax / 127.0f;
        scale = (float)to_f16((double)quotient, 1);
    }
    {
        volatile float one_over = scale > 0 ? 1.0f / scale : 0.0f;
        reciprocal = one_over;
    }
    for (size_t d = 0; d < dim; d++) {
        volatile float product = x[d] * reciprocal;
        double code = nearbyint((double)product);
        assert_true(code >= -127 && code <= 127);
        stored[d] = (float)(code * (double)scale);
    }
}

static void unrotated(const model *m, const float *stored, float *x)
{
    int log2 = log2_block(m->dim);
    memcpy(x, stored, m->dim * sizeof *x);
    if (!m->rotates)
        return;
    butterflies(x, m->dim);
    for (size_t d = 0; d < m->dim; d++)
        x[d] = x[d] * ldexpf(1.0f, -(log2 - log2 / 2)) * sign_of(m->seed, m->dim, m->head, d);
}

static void fix_offset(model *m, size_t block, const float *rows, size_t stride, size_t n)
{
    float mean[576] = {0};
    if (n == 64 || (block == 0 && n >= 16)) {
        for (size_t i = 0; i < n; i++)
            for (size_t d = 0; d < m->dim; d++) {
                volatile float sum = mean[d] + rows[i * stride + d];
                mean[d] = sum;
            }
        for (size_t d = 0; d < m->dim; d++)
            mean[d] /= (float)n;
    } else if (block > 0) {
        const float(*y)[576] = (const float(*)[576]) & m->stored[(block - 1) * 64];
        float stored_mean[576];
        for (size_t d = 0; d < m->dim; d++) {
            volatile float lane[16];
            for (size_t j = 0; j < 16; j++) {
                lane[j] = y[j][d] + y[16 + j][d];
                lane[j] = lane[j] + y[32 + j][d];
                lane[j] = lane[j] + y[48 + j][d];
            }
            for (size_t h = 8; h; h /= 2)
                for (size_t j = 0; j < h; j++)
                    lane[j] = lane[j] + lane[j + h];
            stored_mean[d] = lane[0] / 64;
        }
        unrotated(m, stored_mean, mean);
        for (size_t d = 0; d < m->dim; d++)
            mean[d] += m->mu[block - 1][d];
    }
    for (size_t d = 0; d < m->dim; d++)
        m->mu[block][d] = saturate((double)mean[d]);
}

/* One append of n rows. */
static void model_append(model *m, const float *rows, size_t stride, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        size_t token = m->length + i, block = token / 64;
        float x[576];
        if (m->offsets && token % 64 == 0)
            fix_offset(m, block, rows + i * stride, stride, n - i < 64 ? n - i : 64);
        for (size_t d = 0; d < m->dim; d++)
            x[d] = m->offsets ? rows[i * stride + d] - m->mu[block][d] : rows[i * stride + d];
        if (m->rotates) {
            int log2 = log2_block(m->dim);
            for (size_t d = 0; d < m->dim; d++)
                x[d] *= sign_of(m->seed, m->dim, m->head, d);
            butterflies(x, m->dim);
            for (size_t d = 0; d < m->dim; d++)
                x[d] *= ldexpf(1.0f, -(log2 / 2));
        }
        quantize(x, m->dim, m->stored[token]);
    }
    m->length += n;
}

static void model_read(const model *m, size_t token, float *x)
{
    unrotated(m, m->stored[token], x);
    if (m->offsets)
        for (size_t d = 0; d < m->dim; d++)
            x[d] += m->mu[token / 64][d];
}

/* ---- the comparison ---- */

static unsigned set_hostile_environment(void)
{
    unsigned saved = 0;
#if defined(__x86_64__)
    saved = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x4000 | 0x8040); /* toward +infinity, flush to zero, denormals are zero */
#else
    fesetround(FE_UPWARD);
#endif
    return saved;
}

static void restore_environment(unsigned saved)
{
#if defined(__x86_64__)
    _mm_setcsr(saved);
#else
    (void)saved;
    fesetround(FE_TONEAREST);
#endif
}

static void check_i8(const char *isa, uint32_t dim, uint32_t flags, int hostile, double size,
                     double outlier, uint64_t seed)
{
    enum { HEADS = 2 };
    static model k_model, v_model;
    rng r = {seed};
    kvt_group_config g = group_of(1, HEADS, HEADS, dim, dim, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_cache *cache;
    kvt_seq *seq = NULL;
    size_t total = 64 + rng_below(&r, 300);
    tokens t;
    float *read = malloc(total * HEADS * dim * sizeof *read);
    kvt_tensor out = kvt_tensor_f32(read);
    g.flags = flags;
    g.rotation_seed = rng_next(&r);
    cache = cache_of(&g, total, 1, isa);
    t = tokens_make(&r, total, &g);
    for (size_t i = 0; i < total * HEADS * dim; i++) {
        double bias = i % dim % 17 == 3 ? outlier : 0;
        t.k[i] = (float)(((double)t.k[i] + bias) * size);
        t.v[i] = (float)((double)t.v[i] * size);
    }
    memset(t.v, 0, dim * sizeof *t.v); /* a row of zeros */

    expect_ok(cache, kvt_seq_create(cache, &seq));
    for (size_t head = 0; head < HEADS; head++) {
        memset(&k_model, 0, sizeof k_model);
        memset(&v_model, 0, sizeof v_model);
        k_model.dim = v_model.dim = dim;
        k_model.head = head;
        k_model.rotates = !(flags & KVT_GROUP_NO_ROTATION);
        k_model.offsets = !(flags & KVT_GROUP_NO_OFFSET);
        k_model.seed = g.rotation_seed;
        for (size_t first = 0, n; first < total; first += n) {
            rng cut = {seed * 31 + first};
            size_t choice = rng_below(&cut, 4);
            n = choice == 0 ? 1 : choice == 1 ? 1 + rng_below(&cut, 40) : 1 + rng_below(&cut, 200);
            n = n > total - first ? total - first : n;
            if (head == 0) {
                unsigned saved = hostile ? set_hostile_environment() : 0;
                append_step(cache, seq, &g, &t, first, n);
                if (hostile)
                    restore_environment(saved);
            }
            model_append(&k_model, t.k + (first * HEADS + head) * dim, HEADS * dim, n);
            model_append(&v_model, t.v + (first * HEADS + head) * dim, HEADS * dim, n);
        }
        for (int side = 0; side < 2; side++) {
            expect_ok(cache, kvt_read(seq, 0, side ? KVT_SIDE_V : KVT_SIDE_K, 0, total, &out));
            for (size_t i = 0; i < total; i++) {
                float x[576];
                const float *got = read + (i * HEADS + head) * dim;
                model_read(side ? &v_model : &k_model, i, x);
                for (size_t d = 0; d < dim; d++)
                    if (memcmp(&x[d], &got[d], sizeof x[d]) != 0 && !(x[d] == 0 && got[d] == 0))
                        fail_msg("isa %s dim %u flags %u side %d token %zu dim %zu: model %a, "
                                 "library %a",
                                 isa, dim, flags, side, i, d, (double)x[d], (double)got[d]);
            }
        }
    }
    free(read);
    tokens_free(&t);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

static void i8_as_specified(void **state)
{
    const uint32_t dims[] = {8, 48, 64, 80, 96, 128, 192, 256, 512, 576};
    const double sizes[] = {1, 1e-3, 3e-6, 1e-9, 1e-41, 3e4};
    rng r = {11};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (uint32_t flags = 0; flags < 4; flags++)
                check_i8(kvt_isa_name(isa), dims[d], flags, (int)rng_below(&r, 2),
                         sizes[rng_below(&r, 6)], rng_below(&r, 2) ? 30 : 0, rng_next(&r));
}

/* f16 storage: every representable value, every tie between two, and the edge of the range. */
static void f16_as_specified(void **state)
{
    enum { DIM = 64 };
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++) {
        kvt_group_config g = group_of(1, 1, 1, DIM, DIM, KVT_TYPE_F16, KVT_TYPE_F16);
        kvt_cache *cache = cache_of(&g, 65536, 1, kvt_isa_name(isa));
        kvt_seq *seq = NULL;
        size_t n = 0;
        float *x = malloc(4 * 65536 * sizeof *x), *back = malloc(4 * 65536 * sizeof *back),
              edge[DIM];
        kvt_tensor in = kvt_tensor_f32(x), out = kvt_tensor_f32(back), bad = kvt_tensor_f32(edge);
        unsigned saved;
        for (int exponent = 0; exponent < 31; exponent++)
            for (int mantissa = 0; mantissa < 1024; mantissa++) {
                double step = ldexp(1.0, (exponent ? exponent : 1) - 25);
                double value = (exponent ? 1024 + mantissa : mantissa) * step;
                if (exponent == 30 && mantissa == 1023)
                    continue;
                x[n++] = (float)value;
                x[n++] = (float)-(value + step / 2);                    /* a tie */
                x[n++] = nextafterf((float)(value + step / 2), 0);      /* below it */
                x[n++] = nextafterf((float)-(value + step / 2), -1e9f); /* beyond it */
            }
        while (n % DIM)
            x[n++] = 65519.0f;
        expect_ok(cache, kvt_seq_create(cache, &seq));
        saved = set_hostile_environment();
        expect_ok(cache, kvt_seq_begin(seq, n / DIM, NULL));
        expect_ok(cache, kvt_append(seq, 0, &in, &in));
        expect_ok(cache, kvt_seq_commit(seq, NULL));
        restore_environment(saved);
        for (int side = 0; side < 2; side++) {
            expect_ok(cache, kvt_read(seq, 0, (kvt_side)side, 0, n / DIM, &out));
            for (size_t i = 0; i < n; i++)
                if ((double)back[i] != to_f16((double)x[i], 0))
                    fail_msg("isa %s: %a stored as %a", kvt_isa_name(isa), (double)x[i],
                             (double)back[i]);
        }
        for (size_t d = 0; d < DIM; d++)
            edge[d] = 1;
        edge[DIM - 1] = 65520.0f;
        expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
        expect(cache, KVT_ERR_VALUE, kvt_append(seq, 0, &bad, &bad));
        edge[DIM - 1] = nextafterf(65520.0f, 0);
        expect_ok(cache, kvt_append(seq, 0, &bad, &bad));
        free(x), free(back);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i8_as_specified),
        cmocka_unit_test(f16_as_specified),
    };
    return cmocka_run_group_tests_name("numerics", tests, NULL, NULL);
}
