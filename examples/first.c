#include <kvtile/kvtile.h>
#include <stdio.h>

static float k[100][2][64], v[100][2][64], q[8][64], out[8][64]; /* your model fills these */

int main(void)
{
    kvt_group_config group = {.struct_size = sizeof group, .n_layers = 1, .n_q_heads = 8,
                              .n_kv_heads = 2, .k_dim = 64, .v_dim = 64,
                              .k_type = KVT_TYPE_I8, .v_type = KVT_TYPE_I8};
    kvt_config config = {.struct_size = sizeof config, .groups = &group, .n_groups = 1, .max_tokens = 4096};
    kvt_tensor keys = kvt_tensor_f32(k[0][0]), values = kvt_tensor_f32(v[0][0]);
    kvt_attend_item item = {.n_queries = 1};
    kvt_attend_args args = {.struct_size = sizeof args, .items = &item, .n_items = 1,
                            .q = kvt_tensor_f32(q[0]), .out = kvt_tensor_f32(out[0])};
    kvt_cache *cache = NULL;
    kvt_status status = kvt_cache_create(&config, &cache);
    kvt_seq *seq = NULL;
    if (!status) status = kvt_seq_create(cache, &seq);
    item.seq = seq;
    if (!status) status = kvt_seq_begin(seq, 100, NULL);      /* a step of 100 tokens: */
    if (!status) status = kvt_append(seq, 0, &keys, &values); /* for each layer append, */
    if (!status) status = kvt_attend(cache, &args);           /* and attend */
    if (!status) status = kvt_seq_commit(seq, NULL);          /* now they are part of it */
    if (!status) status = kvt_seq_save(seq, "first.kvt", NULL);
    printf("%s: %d tokens\n", kvt_status_string(status), (int)kvt_seq_length(seq));
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    return status != KVT_OK;
}
