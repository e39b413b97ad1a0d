#include <kvtile/kvtile.h>
#include <stdio.h>

static float k[100][2][64], v[100][2][64], q[8][64], out[8][64]; /* your model fills these */

int main(void)
{
    kvt_group_config group = {sizeof group, .n_layers = 1, .n_q_heads = 8, .n_kv_heads = 2, .k_dim = 64,
                              .v_dim = 64, .k_type = KVT_TYPE_I8, .v_type = KVT_TYPE_I8};
    kvt_config config = {sizeof config, .groups = &group, .n_groups = 1, .max_tokens = 4096};
    kvt_tensor keys = kvt_tensor_f32(k[0][0]), values = kvt_tensor_f32(v[0][0]);
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    int failed = kvt_cache_create(&config, &cache) || kvt_seq_create(cache, &seq);
    kvt_attend_item item = {.seq = seq, .n_queries = 1}; /* the last token's query */
    kvt_attend_args args = {sizeof args, .items = &item, .n_items = 1,
                            .q = kvt_tensor_f32(q[0]), .out = kvt_tensor_f32(out[0])};
    failed = failed || kvt_seq_begin(seq, 100, NULL)                           /* a step: 100 tokens */
             || kvt_append(seq, 0, &keys, &values) || kvt_attend(cache, &args) /* for each layer */
             || kvt_seq_commit(seq, NULL) || kvt_seq_save(seq, "first.kvt", NULL);
    printf("%s: %d tokens\n", failed ? "failed" : "saved", (int)kvt_seq_length(seq));
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return failed;
}
