/*
 * attend ISA: the widest instruction set of this build is ISA, and each that it has stores the
 * bytes of scalar and attends to nearly the same result.
 */
#include <kvtile/kvtile.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define TOKENS 200
#define KV_HEADS 2
#define Q_HEADS 8
#define DIM 64
#define QUERIES 5

typedef struct stored {
    size_t n;
    unsigned char bytes[1 << 19]; /* whole blocks, of 256 tokens */
} stored;

static float k[TOKENS * KV_HEADS * DIM], v[TOKENS * KV_HEADS * DIM], q[QUERIES * Q_HEADS * DIM];

static int put(void *user, const void *data, size_t n)
{
    stored *s = user;
    if (n > sizeof s->bytes - s->n)
        return -1;
    memcpy(s->bytes + s->n, data, n);
    s->n += n;
    return 0;
}

static int run(const char *isa, kvt_type k_type, kvt_type v_type, float *out, stored *snapshot)
{
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_item item;
    kvt_tensor keys = kvt_tensor_f32(k), values = kvt_tensor_f32(v);
    kvt_writer writer = {snapshot, put};
    kvt_save_options raw;
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    int failed;

    memset(&raw, 0, sizeof raw);
    raw.struct_size = sizeof raw;
    raw.codec = KVT_CODEC_RAW;
    snapshot->n = 0;
    group.n_layers = 1;
    group.n_q_heads = Q_HEADS;
    group.n_kv_heads = KV_HEADS;
    group.k_dim = group.v_dim = DIM;
    group.k_type = k_type;
    group.v_type = v_type;
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = TOKENS;
    config.isa = isa;
    memset(&item, 0, sizeof item);
    failed = kvt_cache_create(&config, &cache) || kvt_seq_create(cache, &seq) ||
             kvt_seq_begin(seq, TOKENS, NULL) || kvt_append(seq, 0, &keys, &values) ||
             kvt_seq_commit(seq, NULL) || kvt_seq_save_stream(seq, &writer, &raw);
    item.seq = seq;
    item.n_queries = QUERIES;
    args.items = &item;
    args.n_items = 1;
    args.flags = KVT_ATTEND_CAUSAL;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    failed = failed || kvt_attend(cache, &args);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return failed;
}

static void fill(float *x, size_t n, unsigned *state)
{
    for (size_t i = 0; i < n; i++) {
        *state = *state * 1664525u + 1013904223u;
        x[i] = (float)(*state >> 8) * 0x1p-23f - 1.0f;
    }
}

int main(int argc, char **argv)
{
    static const kvt_type types[][2] = {{KVT_TYPE_F32, KVT_TYPE_F32},
                                        {KVT_TYPE_F16, KVT_TYPE_F16},
                                        {KVT_TYPE_I8, KVT_TYPE_I8},
                                        {KVT_TYPE_I4, KVT_TYPE_I4},
                                        {KVT_TYPE_I4, KVT_TYPE_I5}};
    static float expected[QUERIES * Q_HEADS * DIM], out[QUERIES * Q_HEADS * DIM];
    static stored reference, snapshot;
    const char *isa, *widest = "";
    unsigned state = 1;

    fill(k, sizeof k / sizeof k[0], &state);
    fill(v, sizeof v / sizeof v[0], &state);
    fill(q, sizeof q / sizeof q[0], &state);
    for (uint32_t i = 0; (isa = kvt_isa_name(i)) != NULL; i++)
        widest = isa;
    if (argc != 2 || strcmp(argv[1], widest) != 0) {
        fprintf(stderr, "the widest instruction set is %s\n", widest);
        return 1;
    }
    for (size_t t = 0; t < sizeof types / sizeof types[0]; t++) {
        float largest = 0.0f;
        if (run("scalar", types[t][0], types[t][1], expected, &reference))
            return 1;
        for (size_t i = 0; i < sizeof out / sizeof out[0]; i++)
            largest = fmaxf(largest, fabsf(expected[i]));
        if (!(largest > 0.01f))
            return 1;
        for (uint32_t i = 1; (isa = kvt_isa_name(i)) != NULL; i++) {
            float difference = 0.0f;
            memset(out, 0, sizeof out);
            if (run(isa, types[t][0], types[t][1], out, &snapshot))
                return 1;
            for (size_t j = 0; j < sizeof out / sizeof out[0]; j++)
                difference = fmaxf(difference, fabsf(out[j] - expected[j]));
            if (snapshot.n != reference.n ||
                memcmp(snapshot.bytes, reference.bytes, snapshot.n) != 0 ||
                !(difference <= 0.02f * largest)) {
                fprintf(stderr, "%s, types %d and %d: stores other bytes, or differs by %g of %g\n",
                        isa, types[t][0], types[t][1], (double)difference, (double)largest);
                return 1;
            }
        }
    }
    return 0;
}
