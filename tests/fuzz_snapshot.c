/*
 * Fuzz the snapshot reader: any input may be rejected, none may cause undefined behaviour, and a
 * rejected load changes nothing. With KVT_FUZZING checksums are not verified, so that the parsers
 * behind them are reached; a state that loads must save, load again and attend.
 *
 *   clang -std=c11 -D_POSIX_C_SOURCE=200809L -O1 -g -DKVT_STATIC -DKVT_FUZZING -Iinclude \
 *     -ffp-contract=off -fsanitize=fuzzer,address,undefined -mavx2 -mfma -mf16c \
 *     $(find src simd -name "*.c") tests/fuzz_snapshot.c -lzstd -lxxhash -lsleef -lm -lpthread
 *   ./a.out -max_len=250000 corpus tests/golden
 *
 * With KVT_FUZZ_MAIN it has a main that replays files: fuzz_snapshot FILE...
 */
#include <kvtile/kvtile.h>

#include <stdio.h>
#include <stdlib.h>

#include "golden.h"

typedef struct view {
    const unsigned char *data;
    size_t n, at;
} view;

static int64_t view_read(void *user, void *to, size_t n)
{
    view *v = user;
    if (n > v->n - v->at)
        n = v->n - v->at;
    if (n)
        memcpy(to, v->data + v->at, n);
    v->at += n;
    return (int64_t)n;
}

static int drop(void *user, const void *data, size_t n)
{
    uint64_t *hash = user;
    *hash = golden_mix(*hash, data, n);
    return 0;
}

static uint64_t save_hash(const kvt_seq *seq)
{
    uint64_t hash = 1;
    kvt_writer writer = {&hash, drop};
    kvt_save_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = KVT_CODEC_RAW;
    if (kvt_seq_save_stream(seq, &writer, &options) != KVT_OK)
        abort();
    return hash;
}

static void use(const golden *g, kvt_cache *cache, const kvt_seq *seq)
{
    static float q[256], out[256];
    for (uint32_t layer = 0; layer < GOLDEN_LAYERS && kvt_seq_length(seq); layer++) {
        uint32_t dims[3];
        kvt_attend_args args = kvt_attend_args_init();
        kvt_attend_item item;
        golden_group_of(g, golden_layer_group(g, layer), dims);
        for (size_t i = 0; i < sizeof q / sizeof *q; i++)
            q[i] = 0.01f * (float)(i % 17);
        memset(&item, 0, sizeof item);
        item.seq = seq;
        item.n_queries = 1;
        args.layer = layer;
        args.items = &item;
        args.n_items = 1;
        args.q = kvt_tensor_f32(q);
        args.out = kvt_tensor_f32(out);
        kvt_status status = kvt_attend(cache, &args);
        /* Blocks for the next query suffice; the last token's may see one more. */
        if (status != KVT_OK && (status != KVT_ERR_STATE || !g->window))
            abort();
    }
}

/* Back to each checkpoint, which may be of any number, and on from there. */
static void use_checkpoints(const golden *g, kvt_cache *cache, kvt_seq *seq)
{
    uint64_t at[64];
    size_t n, bytes;
    if (kvt_seq_checkpoints(seq, at, 64, &n) != KVT_OK)
        abort();
    for (n = n < 64 ? n : 64; n-- > 0;) {
        if (kvt_seq_checkpoint_read(seq, at[n], NULL, 0, &bytes) != KVT_OK ||
            kvt_seq_truncate(seq, at[n]) != KVT_OK)
            abort();
        (void)save_hash(seq);
        (void)golden_hash(g, seq);
        use(g, cache, seq);
        if (at[n] + 130 < GOLDEN_MOST && kvt_seq_next_position(seq) < 1000000 &&
            golden_append(g, seq, (uint32_t)at[n], (uint32_t)at[n] + 130) != 0)
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static kvt_cache *caches[GOLDEN_COUNT];
    static kvt_seq *seqs[GOLDEN_COUNT];

    for (unsigned i = 0; i < GOLDEN_COUNT; i++) {
        const golden *g = &golden_all[i];
        view v = {data, size, 0};
        kvt_reader reader = {&v, view_read};
        kvt_load_result result = {0, 0, 0, 0, 0, {0}};
        uint64_t before;
        kvt_status status;

        if (!caches[i]) {
            caches[i] = golden_cache(g);
            if (!caches[i] || kvt_seq_create(caches[i], &seqs[i]) != KVT_OK ||
                golden_fill(g, seqs[i]) != 0)
                abort();
        }
        before = save_hash(seqs[i]);
        status = kvt_seq_load_stream(seqs[i], &reader, NULL, &result);
        if (status == KVT_OK) {
            if (result.n_tokens != kvt_seq_length(seqs[i]))
                abort();
            (void)save_hash(seqs[i]);
            (void)golden_hash(g, seqs[i]);
            use(g, caches[i], seqs[i]);
            use_checkpoints(g, caches[i], seqs[i]);
            if (kvt_seq_clear(seqs[i]) != KVT_OK || golden_fill(g, seqs[i]) != 0)
                abort();
            if (save_hash(seqs[i]) != before)
                abort();
        } else if (save_hash(seqs[i]) != before) {
            abort();
        }
    }
    return 0;
}

#ifdef KVT_FUZZ_MAIN
int main(int argc, char **argv)
{
    static unsigned char data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (!f)
            return 1;
        (void)LLVMFuzzerTestOneInput(data, fread(data, 1, sizeof data, f));
        (void)fclose(f);
    }
    return 0;
}
#endif
