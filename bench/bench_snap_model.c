/*
 * model: the sizes of snapshots of a small language model's keys and values (examples/tinylm on
 * its own stories), beside those at zstd's level 19 of the same filtered streams: how much of what
 * zstd can get out of them the default gets.
 *
 * For the choice of a default, model_level_N_TYPE has the size at other levels and, as GB/s of raw
 * bytes on one thread, what it costs.
 */
#include "bench_snap.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(KVT_BENCH_TINYLM)
#include "bench_page.h"
#include "tinylm.h"

enum { CHUNK = 256, TYPES = 3 };
/* Stories from here on are never trained on. */
#define HELD_OUT ((uint64_t)1 << 40)

typedef struct way {
    uint32_t codec;
    int32_t level;
} way;

static const way ways[] = {{KVT_CODEC_RAW, 0},   {KVT_CODEC_AUTO, 0},  {KVT_CODEC_ZSTD, 1},
                           {KVT_CODEC_ZSTD, -1}, {KVT_CODEC_ZSTD, 3},  {KVT_CODEC_ZSTD, 6},
                           {KVT_CODEC_ZSTD, 9},  {KVT_CODEC_ZSTD, 12}, {KVT_CODEC_ZSTD, 19}};
enum { RAW, AUTO, ONE, LAST = sizeof ways / sizeof ways[0] - 1, WAYS };

typedef struct sizes {
    double bytes[WAYS], seconds[WAYS];
} sizes;

static void require(int status, const tl_error *err)
{
    if (status)
        bench_fail(1, "%s", err->text);
}

static void save_all(const bench_options *o, kvt_cache *cache, kvt_seq *seq, sizes *z)
{
    for (size_t i = 0; i < WAYS; i++) {
        kvt_save_options options = bench_snap_save_options(ways[i].codec);
        bench_snap s = {.cache = cache, .seq = seq};
        size_t n, room, runs = i == LAST ? 0 : o->bar_runs;
        double *seconds = bench_alloc(runs, sizeof *seconds);
        options.zstd_level = ways[i].level;
        unsigned char *image = bench_snap_image(&s, &options, &n, &room);
        for (size_t j = 0; j < runs; j++) {
            double start = bench_seconds();
            bench_require(kvt_seq_save_memory(seq, image, room, &n, &options), cache,
                          "kvt_seq_save_memory");
            seconds[j] = bench_seconds() - start;
        }
        z->bytes[i] += (double)n;
        z->seconds[i] += bench_median(seconds, runs);
        bench_snap_free(image, room);
        free(seconds);
    }
}

static void report(const bench_options *o, const bench_snap *s, const sizes *z)
{
    const char *type = bench_type_name(s->shape.k_type);
    char name[64], words[200];
    double best = z->bytes[LAST], raw = z->bytes[RAW];
    bench_figure f = {"model", name, "of level 19's", 1.01, false, "zstd -19, same streams", words};
    snprintf(name, sizeof name, "model_auto_%s", type);
    snprintf(words, sizeof words, "bytes: raw %.0f, auto %.0f (%.3f of raw), level 19 %.0f", raw,
             z->bytes[AUTO], z->bytes[AUTO] / raw, best);
    bench_snap_value(o, s, &f, z->bytes[AUTO] / best, best, "bytes");
    f.bar = NAN;
    for (size_t i = ONE; i < LAST; i++) {
        snprintf(name, sizeof name, "model_level_%d_%s", (int)ways[i].level, type);
        snprintf(words, sizeof words, "bytes: %.0f (%.3f of raw); %.3g GB/s of raw ones",
                 z->bytes[i], z->bytes[i] / raw, 1e-9 * raw / z->seconds[i]);
        bench_snap_value(o, s, &f, z->bytes[i] / best, best, "bytes");
    }
}

static void run_type(const bench_options *o, const tl_model *model, tl_work *work,
                     const tl_text *texts, size_t n_texts, kvt_type type)
{
    tl_error err;
    tl_kvtile kv;
    tl_session session;
    sizes z;
    bench_snap shown;
    tl_kv_settings settings = {.k_type = type, .v_type = type};
    memset(&z, 0, sizeof z);
    memset(&shown, 0, sizeof shown);
    require(tl_kvtile_open(&kv, model, &settings, work, &err), &err);
    require(tl_session_open(&session, model, tl_kvtile_store(&kv), work, CHUNK, &err), &err);
    float *logits = bench_alloc(model->config.vocab_size, sizeof *logits);
    for (size_t i = 0; i < n_texts; i++) {
        size_t n = texts[i].n_tokens;
        bench_require(kvt_seq_clear(kv.seq), kv.cache, "kvt_seq_clear");
        session.position = 0;
        for (size_t at = 0, m; at < n; at += m) {
            m = n - at < CHUNK ? n - at : CHUNK;
            require(tl_forward(&session, texts[i].tokens + at, m, logits, 1, &err), &err);
        }
        shown.shape.ctx += n;
        save_all(o, kv.cache, kv.seq, &z);
    }
    shown.cache = kv.cache;
    shown.n_layers = model->config.n_layers;
    shown.shape.k_type = shown.shape.v_type = type;
    shown.shape.q_heads = model->config.n_heads;
    shown.shape.kv_heads = model->config.n_kv_heads;
    shown.shape.k_dim = shown.shape.v_dim = model->config.head_dim;
    shown.shape.threads = 1;
    report(o, &shown, &z);
    free(logits);
    tl_session_close(&session);
    tl_kvtile_close(&kv);
}

static bool run(const bench_options *o)
{
    static const kvt_type types[TYPES] = {KVT_TYPE_I8, KVT_TYPE_F16, KVT_TYPE_I4};
    bench_text found = {NULL, 0, 0}, found_tokenizer = {NULL, 0, 0};
    const char *model_path = o->model, *tokenizer_path = o->tokenizer;
    tl_model model;
    tl_error err;
    if (!model_path) {
        if (!bench_find_model(&found, &found_tokenizer)) {
            bench_text_free(&found);
            bench_text_free(&found_tokenizer);
            return false;
        }
        model_path = found.data;
        tokenizer_path = found_tokenizer.data;
    }
    require(tl_model_load(&model, model_path, &err), &err);
    tl_tokenizer *tokenizer = tl_tokenizer_load(tokenizer_path, model.config.vocab_size, &err);
    require(tokenizer ? 0 : -1, &err);
    tl_work *work = tl_work_create(1);
    if (!work)
        bench_fail(1, "no memory");
    size_t n_texts = o->quick ? 1 : 4, max_tokens = o->quick ? 256 : model.config.seq_len;
    tl_text *texts = bench_alloc(n_texts, sizeof *texts);
    if (max_tokens > model.config.seq_len)
        max_tokens = model.config.seq_len;
    for (size_t i = 0; i < n_texts; i++)
        require(
            tl_text_story(&texts[i], tokenizer, HELD_OUT + o->seed * 100000 + i, max_tokens, &err),
            &err);
    for (size_t i = 0; i < TYPES; i++)
        run_type(o, &model, work, texts, n_texts, types[i]);
    for (size_t i = 0; i < n_texts; i++)
        tl_text_free(&texts[i]);
    free(texts);
    tl_work_destroy(work);
    tl_tokenizer_free(tokenizer);
    tl_model_free(&model);
    bench_text_free(&found);
    bench_text_free(&found_tokenizer);
    return true;
}
#else
static bool run(const bench_options *o)
{
    (void)o;
    return false;
}
#endif

void bench_snap_model(const bench_options *o)
{
    static const char *const names[] = {"model_auto_i8", "model_auto_f16", "model_auto_i4"};
    if (run(o))
        return;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        bench_figure f = {"model",
                          names[i],
                          "of level 19's",
                          1.01,
                          false,
                          "zstd -19, same streams",
                          "not measured: no examples/tinylm, or its model is not found"};
        bench_snap_missing(o, &f);
    }
}
