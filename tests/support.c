#include "support.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>

uint64_t rng_next(rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint32_t rng_below(rng *r, uint32_t n)
{
    return (uint32_t)((rng_next(r) >> 32) * n >> 32);
}

double rng_normal(rng *r)
{
    double u = ((double)(rng_next(r) >> 11) + 1.0) / 9007199254740993.0;
    double v = (double)(rng_next(r) >> 11) / 9007199254740992.0;
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* Marsaglia and Tsang's ziggurat with 128 layers of one area, and an exponential for the tail. The
 * edge of layer i is edge[i]; below[i] is the part of it that lies under the curve at every height.
 */
enum { ZIGGURAT_LAYERS = 128 };
static double edge[ZIGGURAT_LAYERS + 1], below[ZIGGURAT_LAYERS];

static double density(double x)
{
    return exp(-0.5 * x * x);
}

static void ziggurat_init(void)
{
    const double tail = 3.442619855899, area = 9.91256303526217e-3;
    edge[0] = area / density(tail); /* the base layer with the tail, as a rectangle */
    edge[1] = tail;
    for (int i = 2; i < ZIGGURAT_LAYERS; i++)
        edge[i] = sqrt(-2.0 * log(area / edge[i - 1] + density(edge[i - 1])));
    edge[ZIGGURAT_LAYERS] = 0.0;
    for (int i = 0; i < ZIGGURAT_LAYERS; i++)
        below[i] = edge[i + 1] / edge[i];
}

static double uniform(rng *r)
{
    return ((double)(rng_next(r) >> 11) + 0.5) / 9007199254740992.0;
}

static double ziggurat_tail(rng *r, int is_negative)
{
    double x, y;
    do {
        x = -log(uniform(r)) / edge[1];
        y = -log(uniform(r));
    } while (y + y < x * x);
    return is_negative ? -edge[1] - x : edge[1] + x;
}

static double ziggurat(rng *r)
{
    for (;;) {
        uint64_t bits = rng_next(r);
        int i = (int)(bits % ZIGGURAT_LAYERS);
        double u = (double)((int64_t)bits >> 11) / 4503599627370496.0; /* -1 .. 1 */
        double x = u * edge[i];
        if (fabs(u) < below[i])
            return x;
        if (i == 0)
            return ziggurat_tail(r, u < 0.0);
        if (density(edge[i]) + uniform(r) * (density(edge[i + 1]) - density(edge[i])) < density(x))
            return x;
    }
}

float *rng_normals(rng *r, size_t n)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    float *x = malloc(n ? n * sizeof *x : 1);
    assert_non_null(x);
    pthread_once(&once, ziggurat_init);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)ziggurat(r);
    return x;
}

void expect_status(const kvt_cache *cache, kvt_status expected, kvt_status got, const char *where)
{
    char text[256] = "";
    if (expected == got)
        return;
    if (cache)
        kvt_cache_error(cache, text, sizeof text);
    fail_msg("%s\n  expected %d (%s), got %d (%s): %s", where, (int)expected,
             kvt_status_string(expected), (int)got, kvt_status_string(got), text);
}

kvt_group_config group_of(uint32_t layers, uint32_t q_heads, uint32_t kv_heads, uint32_t k_dim,
                          uint32_t v_dim, kvt_type k_type, kvt_type v_type)
{
    kvt_group_config g = kvt_group_config_init();
    g.n_layers = layers;
    g.n_q_heads = q_heads;
    g.n_kv_heads = kv_heads;
    g.k_dim = k_dim;
    g.v_dim = v_dim;
    g.k_type = k_type;
    g.v_type = v_type;
    g.rotation_seed = 42;
    return g;
}

uint32_t pool_threads(uint32_t n_threads)
{
    kvt_group_config group = group_of(1, 1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_config config = kvt_config_init();
    uint64_t bytes;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 1;
    config.n_threads = n_threads;
    return kvt_memory_forecast(&config, 0, 0, &bytes) == KVT_ERR_UNSUPPORTED ? 1 : n_threads;
}

kvt_cache *cache_of(const kvt_group_config *group, uint64_t max_tokens, uint32_t n_threads,
                    const char *isa)
{
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    char text[256] = "";
    config.groups = group;
    config.n_groups = 1;
    config.max_tokens = max_tokens;
    config.n_threads = n_threads;
    config.isa = isa;
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    if (kvt_cache_create(&config, &cache) != KVT_OK)
        fail_msg("kvt_cache_create: %s", text);
    return cache;
}

tokens tokens_make(rng *r, size_t n, const kvt_group_config *group)
{
    tokens t = {n, group->n_kv_heads, group->k_dim, group->v_dim, NULL, NULL};
    t.k = rng_normals(r, n * t.kv_heads * t.k_dim);
    t.v = rng_normals(r, n * t.kv_heads * t.v_dim);
    for (size_t i = 0; i < n * t.kv_heads && group->flags & KVT_GROUP_V_IN_K; i++)
        memcpy(t.v + i * t.v_dim, t.k + i * t.k_dim, t.v_dim * sizeof *t.v);
    return t;
}

void tokens_free(tokens *t)
{
    free(t->k);
    free(t->v);
    t->k = t->v = NULL;
}

void append_step(kvt_cache *cache, kvt_seq *seq, const kvt_group_config *group, const tokens *t,
                 size_t first, size_t n)
{
    kvt_tensor k = kvt_tensor_f32(t->k + first * t->kv_heads * t->k_dim);
    kvt_tensor v = kvt_tensor_f32(t->v + first * t->kv_heads * t->v_dim);
    int32_t *ids = malloc(n * sizeof *ids);
    assert_non_null(ids);
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)(first + i) * 3 + 1;
    expect_ok(cache, kvt_seq_begin(seq, n, NULL));
    for (uint32_t layer = 0; layer < group->n_layers; layer++)
        expect_ok(cache, kvt_append(seq, layer, &k, group->flags & KVT_GROUP_V_IN_K ? NULL : &v));
    expect_ok(cache, kvt_seq_commit(seq, ids));
    free(ids);
}

void append_all(kvt_cache *cache, kvt_seq *seq, const kvt_group_config *group, const tokens *t,
                size_t first, size_t n, size_t step)
{
    for (size_t i = 0; i < n; i += step)
        append_step(cache, seq, group, t, first + i, n - i < step ? n - i : step);
}

double dot_f64(const float *a, const float *b, size_t n)
{
    double sum[4] = {0}; /* four sums that do not wait for one another */
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (size_t j = 0; j < 4; j++)
            sum[j] += (double)a[i + j] * (double)b[i + j];
    for (; i < n; i++)
        sum[0] += (double)a[i] * (double)b[i];
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

double reference_row(const float *q, const float *k, const float *v, size_t n, size_t kv_heads,
                     size_t kv_head, size_t k_dim, size_t v_dim, double scale, double softcap,
                     const unsigned char *sees, const int32_t *positions, int32_t position,
                     double slope, double sink, double *out)
{
    double maximum = sink, sum = 0, *logit = malloc((n ? n : 1) * sizeof *logit);
    assert_non_null(logit);
    for (size_t d = 0; d < v_dim; d++)
        out[d] = 0;
    for (size_t t = 0; t < n; t++) {
        logit[t] = dot_f64(q, k + (t * kv_heads + kv_head) * k_dim, k_dim) * scale;
        if (softcap > 0)
            logit[t] = softcap * tanh(logit[t] / softcap);
        if (positions)
            logit[t] -= slope * fabs((double)position - (double)positions[t]);
        if (sees && !sees[t])
            logit[t] = -INFINITY;
        maximum = logit[t] > maximum ? logit[t] : maximum;
    }
    if (maximum == -INFINITY) {
        free(logit);
        return -INFINITY;
    }
    sum = exp(sink - maximum);
    for (size_t t = 0; t < n; t++) {
        double p = exp(logit[t] - maximum);
        const float *row = v + (t * kv_heads + kv_head) * v_dim;
        sum += p;
        for (size_t d = 0; d < v_dim && p > 0; d++)
            out[d] += p * (double)row[d];
    }
    for (size_t d = 0; d < v_dim; d++)
        out[d] /= sum;
    free(logit);
    return maximum + log(sum);
}

double relative_l2(const float *a, const double *b, size_t n)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

/* FNV-1a over bytes. */
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

uint64_t seq_hash(const kvt_seq *seq, const kvt_group_config *group)
{
    size_t n = (size_t)kvt_seq_length(seq);
    size_t k = n * group->n_kv_heads * group->k_dim, v = n * group->n_kv_heads * group->v_dim;
    float *buffer = malloc((k > v ? k : v) * sizeof *buffer + 4);
    int32_t *ids = malloc(n * sizeof *ids + 4);
    kvt_tensor out = kvt_tensor_f32(buffer);
    uint64_t h = hash_bytes(0xcbf29ce484222325u, &n, sizeof n);
    assert_non_null(buffer);
    assert_non_null(ids);
    expect_ok(NULL, kvt_seq_token_ids(seq, 0, n, ids));
    h = hash_bytes(h, ids, n * sizeof *ids);
    expect_ok(NULL, kvt_seq_positions(seq, 0, n, ids));
    h = hash_bytes(h, ids, n * sizeof *ids);
    for (uint32_t layer = 0; layer < group->n_layers; layer++) {
        expect_ok(NULL, kvt_read(seq, layer, KVT_SIDE_K, 0, n, &out));
        h = hash_bytes(h, buffer, k * sizeof *buffer);
        expect_ok(NULL, kvt_read(seq, layer, KVT_SIDE_V, 0, n, &out));
        h = hash_bytes(h, buffer, v * sizeof *buffer);
    }
    free(buffer);
    free(ids);
    return h;
}

/* ---- the ledger ---- */

/* Before each piece: its size. 64 bytes, so that the piece keeps its alignment. */
#define LEDGER_HEAD 64

static void *ledger_alloc(void *user, size_t bytes, size_t alignment)
{
    ledger *l = user;
    unsigned char *memory = NULL;
    int refused;
    pthread_mutex_lock(&l->lock);
    l->calls++;
    l->mistakes += alignment != 64 || bytes == 0;
    refused = l->countdown == 0 || (l->most_bytes && bytes > l->most_bytes);
    if (l->countdown > 0)
        l->countdown--;
    pthread_mutex_unlock(&l->lock);
    if (!refused)
        memory = aligned_alloc(64, (bytes + LEDGER_HEAD + 63) / 64 * 64);
    if (!memory)
        return NULL;
    memcpy(memory, &bytes, sizeof bytes);
    memset(memory + LEDGER_HEAD, 0xff, bytes);
    pthread_mutex_lock(&l->lock);
    l->live++;
    l->live_bytes += bytes;
    if (l->live_bytes > l->peak_bytes)
        l->peak_bytes = l->live_bytes;
    pthread_mutex_unlock(&l->lock);
    return memory + LEDGER_HEAD;
}

static void ledger_free(void *user, void *memory, size_t bytes)
{
    ledger *l = user;
    unsigned char *begin = (unsigned char *)memory - LEDGER_HEAD;
    size_t was;
    memcpy(&was, begin, sizeof was);
    memset(memory, 0xdd, was);
    free(begin);
    pthread_mutex_lock(&l->lock);
    l->mistakes += was != bytes;
    l->live--;
    l->live_bytes -= was;
    pthread_mutex_unlock(&l->lock);
}

void ledger_init(ledger *l)
{
    memset(l, 0, sizeof *l);
    l->countdown = -1;
    assert_int_equal(pthread_mutex_init(&l->lock, NULL), 0);
}

void ledger_close(ledger *l)
{
    assert_int_equal(l->live, 0);
    assert_int_equal(l->live_bytes, 0);
    assert_int_equal(l->mistakes, 0);
    pthread_mutex_destroy(&l->lock);
}

kvt_allocator ledger_allocator(ledger *l)
{
    return (kvt_allocator){l, ledger_alloc, ledger_free};
}

int quick_level(void)
{
    const char *level = getenv("KVT_TEST_QUICK");
    return level ? 1 + (strcmp(level, "2") == 0) : 0;
}

int is_quick(void)
{
    return quick_level() > 0;
}

int is_full(void)
{
    return getenv("KVT_TEST_FULL") != NULL;
}

int count_entries(const char *folder)
{
    DIR *dir = opendir(folder);
    int n = 0;
    assert_non_null(dir);
    while (readdir(dir))
        n++;
    assert_int_equal(closedir(dir), 0);
    return n - 2; /* without "." and ".." */
}

void expect_error_text(const kvt_cache *cache, const char *fragment, const char *where)
{
    char text[512];
    assert_int_equal(kvt_cache_error(cache, text, sizeof text), KVT_OK);
    if (!strstr(text, fragment))
        fail_msg("%s\n  the error text does not name \"%s\": \"%s\"", where, fragment, text);
}
