/*
 * What the Python tests compare with: the headers' structs as the compiler lays them out, and the
 * same steps as a test's in C alone.
 *
 *   reference layout
 *       a line "struct field offset size" for each field, and "struct - 0 size" for each struct
 *   reference run K_TYPE V_TYPE DTYPE IN OUT SNAPSHOT
 *       2 layers, 8:2 heads, 64 dims. IN: for each step of steps[] and each layer K, V and q as
 *       DTYPE; OUT: for each of these the output and the log-sum-exp as f32, at the end K and V of
 *       both layers as f32; SNAPSHOT: the sequence. Token i has the id i.
 */
#include <kvtile/kvtile.h>
#include <kvtile/store.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, Q_HEADS = 8, KV_HEADS = 2, DIMS = 64, MAX_STEP = 150 };
static const size_t steps[] = {1, 70, 1, 1, 150, 3, 64};
enum { N_STEPS = sizeof steps / sizeof steps[0] };

#define STRUCT(type) printf("%s - 0 %zu\n", #type, sizeof(type))
#define FIELD(type, name)                                                                          \
    printf("%s %s %zu %zu\n", #type, #name, offsetof(type, name), sizeof(((type *)0)->name))

static void print_layout(void)
{
    STRUCT(kvt_tensor);
    FIELD(kvt_tensor, data), FIELD(kvt_tensor, dtype), FIELD(kvt_tensor, token_stride);
    FIELD(kvt_tensor, head_stride);
    STRUCT(kvt_allocator);
    FIELD(kvt_allocator, user), FIELD(kvt_allocator, alloc), FIELD(kvt_allocator, free);
    STRUCT(kvt_executor);
    FIELD(kvt_executor, user), FIELD(kvt_executor, run), FIELD(kvt_executor, n_threads);
    STRUCT(kvt_group_config);
    FIELD(kvt_group_config, struct_size), FIELD(kvt_group_config, n_layers);
    FIELD(kvt_group_config, n_q_heads), FIELD(kvt_group_config, n_kv_heads);
    FIELD(kvt_group_config, k_dim), FIELD(kvt_group_config, v_dim);
    FIELD(kvt_group_config, k_type), FIELD(kvt_group_config, v_type);
    FIELD(kvt_group_config, flags), FIELD(kvt_group_config, layers);
    FIELD(kvt_group_config, rotation_seed), FIELD(kvt_group_config, residual_tokens);
    FIELD(kvt_group_config, window_tokens), FIELD(kvt_group_config, sink_tokens);
    FIELD(kvt_group_config, rope_pairing), FIELD(kvt_group_config, rope_first_dim);
    FIELD(kvt_group_config, rope_dims), FIELD(kvt_group_config, rope_inverse_frequencies);
    FIELD(kvt_group_config, fine_tokens), FIELD(kvt_group_config, reserved);
    STRUCT(kvt_config);
    FIELD(kvt_config, struct_size), FIELD(kvt_config, groups), FIELD(kvt_config, n_groups);
    FIELD(kvt_config, n_threads), FIELD(kvt_config, max_tokens);
    FIELD(kvt_config, memory_budget_bytes), FIELD(kvt_config, fingerprint);
    FIELD(kvt_config, fingerprint_bytes), FIELD(kvt_config, allocator);
    FIELD(kvt_config, executor), FIELD(kvt_config, isa), FIELD(kvt_config, error_text);
    FIELD(kvt_config, error_text_bytes);
    STRUCT(kvt_cache_stats);
    FIELD(kvt_cache_stats, struct_size), FIELD(kvt_cache_stats, bytes);
    FIELD(kvt_cache_stats, blocks_free), FIELD(kvt_cache_stats, blocks_reserved);
    FIELD(kvt_cache_stats, blocks_used), FIELD(kvt_cache_stats, blocks_shared);
    FIELD(kvt_cache_stats, blocks_sealed), FIELD(kvt_cache_stats, bytes_free);
    FIELD(kvt_cache_stats, bytes_reserved), FIELD(kvt_cache_stats, bytes_used);
    FIELD(kvt_cache_stats, bytes_shared), FIELD(kvt_cache_stats, reserved);
    STRUCT(kvt_seq_stats);
    FIELD(kvt_seq_stats, struct_size), FIELD(kvt_seq_stats, own_bytes);
    FIELD(kvt_seq_stats, shared_bytes), FIELD(kvt_seq_stats, reserved);
    STRUCT(kvt_attend_item);
    FIELD(kvt_attend_item, seq), FIELD(kvt_attend_item, n_queries);
    FIELD(kvt_attend_item, query_positions), FIELD(kvt_attend_item, mask);
    FIELD(kvt_attend_item, mask_stride), FIELD(kvt_attend_item, mask_tokens);
    FIELD(kvt_attend_item, reserved);
    STRUCT(kvt_attend_args);
    FIELD(kvt_attend_args, struct_size), FIELD(kvt_attend_args, layer);
    FIELD(kvt_attend_args, flags), FIELD(kvt_attend_args, items);
    FIELD(kvt_attend_args, n_items), FIELD(kvt_attend_args, q), FIELD(kvt_attend_args, out);
    FIELD(kvt_attend_args, lse), FIELD(kvt_attend_args, scale), FIELD(kvt_attend_args, softcap);
    FIELD(kvt_attend_args, sink_logits), FIELD(kvt_attend_args, alibi_slopes);
    FIELD(kvt_attend_args, n_threads);
    STRUCT(kvt_writer);
    FIELD(kvt_writer, user), FIELD(kvt_writer, write);
    STRUCT(kvt_reader);
    FIELD(kvt_reader, user), FIELD(kvt_reader, read);
    STRUCT(kvt_snapshot_piece);
    FIELD(kvt_snapshot_piece, name), FIELD(kvt_snapshot_piece, data);
    FIELD(kvt_snapshot_piece, bytes);
    STRUCT(kvt_save_options);
    FIELD(kvt_save_options, struct_size), FIELD(kvt_save_options, codec);
    FIELD(kvt_save_options, no_fsync), FIELD(kvt_save_options, zstd_level);
    FIELD(kvt_save_options, in_place), FIELD(kvt_save_options, first_token);
    FIELD(kvt_save_options, n_tokens), FIELD(kvt_save_options, layers);
    FIELD(kvt_save_options, n_layers), FIELD(kvt_save_options, convert);
    FIELD(kvt_save_options, n_types), FIELD(kvt_save_options, reserved);
    FIELD(kvt_save_options, k_types), FIELD(kvt_save_options, v_types);
    FIELD(kvt_save_options, parent), FIELD(kvt_save_options, pieces);
    FIELD(kvt_save_options, n_pieces), FIELD(kvt_save_options, key);
    FIELD(kvt_save_options, progress), FIELD(kvt_save_options, progress_user);
    STRUCT(kvt_load_options);
    FIELD(kvt_load_options, struct_size), FIELD(kvt_load_options, prompt);
    FIELD(kvt_load_options, n_prompt), FIELD(kvt_load_options, reuse), FIELD(kvt_load_options, map);
    FIELD(kvt_load_options, convert), FIELD(kvt_load_options, n_layers);
    FIELD(kvt_load_options, layers), FIELD(kvt_load_options, folder), FIELD(kvt_load_options, key);
    FIELD(kvt_load_options, on_piece), FIELD(kvt_load_options, piece_user);
    FIELD(kvt_load_options, progress), FIELD(kvt_load_options, progress_user);
    STRUCT(kvt_inspect_options);
    FIELD(kvt_inspect_options, struct_size), FIELD(kvt_inspect_options, verify);
    FIELD(kvt_inspect_options, reserved), FIELD(kvt_inspect_options, folder);
    FIELD(kvt_inspect_options, key), FIELD(kvt_inspect_options, on_piece);
    FIELD(kvt_inspect_options, piece_user), FIELD(kvt_inspect_options, progress);
    FIELD(kvt_inspect_options, progress_user);
    STRUCT(kvt_load_result);
    FIELD(kvt_load_result, n_tokens), FIELD(kvt_load_result, prefix_tokens);
    FIELD(kvt_load_result, reuse_tokens), FIELD(kvt_load_result, checkpoint_tokens);
    FIELD(kvt_load_result, mapped_bytes), FIELD(kvt_load_result, reserved);
    STRUCT(kvt_snapshot_group);
    FIELD(kvt_snapshot_group, n_layers), FIELD(kvt_snapshot_group, n_q_heads);
    FIELD(kvt_snapshot_group, n_kv_heads), FIELD(kvt_snapshot_group, k_dim);
    FIELD(kvt_snapshot_group, v_dim), FIELD(kvt_snapshot_group, k_type);
    FIELD(kvt_snapshot_group, v_type), FIELD(kvt_snapshot_group, flags);
    FIELD(kvt_snapshot_group, rotation_seed), FIELD(kvt_snapshot_group, window_tokens);
    FIELD(kvt_snapshot_group, sink_tokens), FIELD(kvt_snapshot_group, reserved);
    STRUCT(kvt_snapshot_info);
    FIELD(kvt_snapshot_info, struct_size), FIELD(kvt_snapshot_info, version);
    FIELD(kvt_snapshot_info, n_groups), FIELD(kvt_snapshot_info, groups);
    FIELD(kvt_snapshot_info, fingerprint), FIELD(kvt_snapshot_info, fingerprint_bytes);
    FIELD(kvt_snapshot_info, next_position), FIELD(kvt_snapshot_info, tag);
    FIELD(kvt_snapshot_info, tag_bytes), FIELD(kvt_snapshot_info, reserved);
    FIELD(kvt_snapshot_info, n_tokens), FIELD(kvt_snapshot_info, n_blocks);
    FIELD(kvt_snapshot_info, n_open_blocks), FIELD(kvt_snapshot_info, n_checkpoints);
    FIELD(kvt_snapshot_info, file_bytes), FIELD(kvt_snapshot_info, stored_bytes);
    FIELD(kvt_snapshot_info, native_bytes), FIELD(kvt_snapshot_info, n_elements);
    FIELD(kvt_snapshot_info, snapshot_id), FIELD(kvt_snapshot_info, parent_id);
    FIELD(kvt_snapshot_info, parent_name), FIELD(kvt_snapshot_info, depth);
    FIELD(kvt_snapshot_info, encrypted), FIELD(kvt_snapshot_info, inherited_tokens);
    FIELD(kvt_snapshot_info, inherited_blocks), FIELD(kvt_snapshot_info, native_blocks);
    FIELD(kvt_snapshot_info, n_pieces), FIELD(kvt_snapshot_info, reserved2);
    FIELD(kvt_snapshot_info, n_layers), FIELD(kvt_snapshot_info, layer_groups);
    STRUCT(kvt_store_key);
    FIELD(kvt_store_key, bytes);
    STRUCT(kvt_store_error);
    FIELD(kvt_store_error, text);
    STRUCT(kvt_store_part);
    FIELD(kvt_store_part, data), FIELD(kvt_store_part, bytes);
    STRUCT(kvt_store_value);
    FIELD(kvt_store_value, parts), FIELD(kvt_store_value, n_parts), FIELD(kvt_store_value, bytes);
    STRUCT(kvt_store_receiver);
    FIELD(kvt_store_receiver, user), FIELD(kvt_store_receiver, part);
    FIELD(kvt_store_receiver, place);
    STRUCT(kvt_store_entry);
    FIELD(kvt_store_entry, key), FIELD(kvt_store_entry, bytes);
    FIELD(kvt_store_entry, used_seconds), FIELD(kvt_store_entry, left_seconds);
    STRUCT(kvt_store_stats);
    FIELD(kvt_store_stats, n_values), FIELD(kvt_store_stats, bytes);
    FIELD(kvt_store_stats, max_bytes), FIELD(kvt_store_stats, n_got);
    FIELD(kvt_store_stats, n_missed), FIELD(kvt_store_stats, n_put);
    FIELD(kvt_store_stats, n_evicted), FIELD(kvt_store_stats, n_failed);
    FIELD(kvt_store_stats, reserved);
    STRUCT(kvt_store);
    FIELD(kvt_store, struct_size), FIELD(kvt_store, user), FIELD(kvt_store, get);
    FIELD(kvt_store, put), FIELD(kvt_store, exists), FIELD(kvt_store, remove);
    FIELD(kvt_store, list), FIELD(kvt_store, stats), FIELD(kvt_store, collect);
    FIELD(kvt_store, close), FIELD(kvt_store, n_at_once), FIELD(kvt_store, reserved);
    STRUCT(kvt_directory_config);
    FIELD(kvt_directory_config, struct_size), FIELD(kvt_directory_config, path);
    FIELD(kvt_directory_config, max_bytes), FIELD(kvt_directory_config, sync);
    FIELD(kvt_directory_config, reserved), FIELD(kvt_directory_config, error_text);
    FIELD(kvt_directory_config, error_text_bytes);
    STRUCT(kvt_redis_config);
    FIELD(kvt_redis_config, struct_size), FIELD(kvt_redis_config, host);
    FIELD(kvt_redis_config, unix_path), FIELD(kvt_redis_config, port);
    FIELD(kvt_redis_config, database), FIELD(kvt_redis_config, username);
    FIELD(kvt_redis_config, password), FIELD(kvt_redis_config, tls);
    FIELD(kvt_redis_config, ttl_seconds), FIELD(kvt_redis_config, connect_timeout_ms);
    FIELD(kvt_redis_config, timeout_ms), FIELD(kvt_redis_config, call_timeout_ms);
    FIELD(kvt_redis_config, retry_ms), FIELD(kvt_redis_config, pipeline);
    FIELD(kvt_redis_config, reserved), FIELD(kvt_redis_config, prefix);
    FIELD(kvt_redis_config, tls_ca_file), FIELD(kvt_redis_config, tls_cert_file);
    FIELD(kvt_redis_config, tls_key_file), FIELD(kvt_redis_config, error_text);
    FIELD(kvt_redis_config, error_text_bytes);
    STRUCT(kvt_prefix_extra);
    FIELD(kvt_prefix_extra, block), FIELD(kvt_prefix_extra, data), FIELD(kvt_prefix_extra, bytes);
    STRUCT(kvt_prefix_options);
    FIELD(kvt_prefix_options, struct_size), FIELD(kvt_prefix_options, name_space);
    FIELD(kvt_prefix_options, name_space_bytes), FIELD(kvt_prefix_options, salt);
    FIELD(kvt_prefix_options, salt_bytes), FIELD(kvt_prefix_options, extras);
    FIELD(kvt_prefix_options, n_extras), FIELD(kvt_prefix_options, positions);
    FIELD(kvt_prefix_options, n_tokens), FIELD(kvt_prefix_options, checkpoints);
    FIELD(kvt_prefix_options, reserved), FIELD(kvt_prefix_options, checkpoint_tokens);
    FIELD(kvt_prefix_options, n_checkpoint_tokens);
    STRUCT(kvt_prefix_result);
    FIELD(kvt_prefix_result, n_tokens), FIELD(kvt_prefix_result, n_values);
    FIELD(kvt_prefix_result, n_bytes), FIELD(kvt_prefix_result, n_refused);
    FIELD(kvt_prefix_result, n_checkpoints), FIELD(kvt_prefix_result, reserved);
    STRUCT(kvt_value_info);
    FIELD(kvt_value_info, struct_size), FIELD(kvt_value_info, version);
    FIELD(kvt_value_info, checkpoint), FIELD(kvt_value_info, n_tokens);
    FIELD(kvt_value_info, n_blocks), FIELD(kvt_value_info, reserved);
    FIELD(kvt_value_info, blob_bytes), FIELD(kvt_value_info, reserved2);
}

static int run_step(kvt_cache *cache, kvt_seq *seq, size_t n, kvt_dtype dtype, FILE *in, FILE *out)
{
    static unsigned char k[MAX_STEP * KV_HEADS * DIMS * 4], v[sizeof k];
    static unsigned char q[MAX_STEP * Q_HEADS * DIMS * 4];
    static float o[MAX_STEP * Q_HEADS * DIMS], lse[MAX_STEP * Q_HEADS];
    size_t size = dtype == KVT_F32 ? 4 : 2, kv = n * KV_HEADS * DIMS * size;
    int32_t ids[MAX_STEP];
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)(kvt_seq_length(seq) + i);
    if (kvt_seq_begin(seq, n, NULL))
        return -1;
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        if (fread(k, 1, kv, in) != kv || fread(v, 1, kv, in) != kv ||
            fread(q, 1, n * Q_HEADS * DIMS * size, in) != n * Q_HEADS * DIMS * size)
            return -1;
        kvt_tensor tk = {k, dtype, 0, 0}, tv = {v, dtype, 0, 0};
        kvt_attend_item item = {.seq = seq, .n_queries = n};
        kvt_attend_args args = kvt_attend_args_init();
        args.layer = layer;
        args.flags = KVT_ATTEND_CAUSAL;
        args.items = &item;
        args.n_items = 1;
        args.q = (kvt_tensor){q, dtype, 0, 0};
        args.out = kvt_tensor_f32(o);
        args.lse = lse;
        if (kvt_append(seq, layer, &tk, &tv) || kvt_attend(cache, &args) ||
            fwrite(o, sizeof *o, n * Q_HEADS * DIMS, out) != n * Q_HEADS * DIMS ||
            fwrite(lse, sizeof *lse, n * Q_HEADS, out) != n * Q_HEADS)
            return -1;
    }
    return kvt_seq_commit(seq, ids) ? -1 : 0;
}

static int read_back(const kvt_seq *seq, FILE *out)
{
    size_t n = (size_t)kvt_seq_length(seq), floats = n * KV_HEADS * DIMS;
    float *rows = malloc(floats * sizeof *rows);
    int failed = !rows;
    for (uint32_t layer = 0; layer < LAYERS && !failed; layer++) {
        kvt_tensor t = kvt_tensor_f32(rows);
        failed = kvt_read(seq, layer, KVT_SIDE_K, 0, n, &t) ||
                 fwrite(rows, sizeof *rows, floats, out) != floats ||
                 kvt_read(seq, layer, KVT_SIDE_V, 0, n, &t) ||
                 fwrite(rows, sizeof *rows, floats, out) != floats;
    }
    free(rows);
    return failed ? -1 : 0;
}

static int run(char **argv)
{
    kvt_group_config group = kvt_group_config_init();
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    kvt_dtype dtype = (kvt_dtype)atoi(argv[2]);
    FILE *in = fopen(argv[3], "rb"), *out = fopen(argv[4], "wb");
    group.n_layers = LAYERS;
    group.n_q_heads = Q_HEADS;
    group.n_kv_heads = KV_HEADS;
    group.k_dim = group.v_dim = DIMS;
    group.k_type = (kvt_type)atoi(argv[0]);
    group.v_type = (kvt_type)atoi(argv[1]);
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 1000;
    config.fingerprint = "reference";
    config.fingerprint_bytes = 9;
    int failed = !in || !out || kvt_cache_create(&config, &cache) || kvt_seq_create(cache, &seq);
    for (size_t i = 0; i < N_STEPS && !failed; i++)
        failed = run_step(cache, seq, steps[i], dtype, in, out);
    failed = failed || read_back(seq, out) || kvt_seq_save(seq, argv[5], NULL);
    if (failed)
        fprintf(stderr, "reference: the run failed\n");
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    if (in)
        fclose(in);
    if (out && fclose(out))
        failed = 1;
    return failed ? 1 : 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "layout") == 0) {
        print_layout();
        return 0;
    }
    if (argc == 8 && strcmp(argv[1], "run") == 0)
        return run(argv + 2);
    fprintf(stderr, "reference layout | run K_TYPE V_TYPE DTYPE IN OUT SNAPSHOT\n");
    return 2;
}
