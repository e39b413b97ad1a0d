/*
 * Creation of a cache, and what it will cost.
 *
 * Creation first plans (config -> a kvt_cache on the stack, every check, no allocation), then
 * builds. The forecast is the same plan plus arithmetic; a test holds the two together. The only
 * file above cache/, attention/ and snapshot/.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "src/attention/attention.h"
#include "src/cache/cache.h"
#include "src/dispatch.h"
#include "src/snapshot/format.h"

_Static_assert(KVT_DIMS_MAX == KVT_MAX_DIM, "kernels have buffers for all dims of a head");

/* Failure before a cache exists: the text goes where the config says. */
static kvt_status refuse(const kvt_config *config, kvt_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

static kvt_status refuse(const kvt_config *config, kvt_status status, const char *format, ...)
{
    va_list arguments;
    if (!config->error_text || config->error_text_bytes == 0)
        return status;
    va_start(arguments, format);
    vsnprintf(config->error_text, config->error_text_bytes, format, arguments);
    va_end(arguments);
    return status;
}

static kvt_status check_rope(const kvt_config *config, uint32_t g, const kvt_group_config *group)
{
    int turns =
        group->rope_pairing == KVT_ROPE_HALVES || group->rope_pairing == KVT_ROPE_NEIGHBOURS;
    if ((unsigned)group->rope_pairing > KVT_ROPE_NONE)
        return refuse(config, KVT_ERR_ARG, "group %u: unknown rope_pairing %d", g,
                      (int)group->rope_pairing);
    if (!turns && (group->rope_first_dim || group->rope_dims || group->rope_inverse_frequencies))
        return refuse(config, KVT_ERR_ARG, "group %u: RoPE's dims without a pairing", g);
    if (turns &&
        (group->rope_dims == 0 || group->rope_dims % 2 || group->rope_dims > group->k_dim ||
         group->rope_first_dim > group->k_dim - group->rope_dims))
        return refuse(
            config, KVT_ERR_ARG,
            "group %u: rope_dims %u from rope_first_dim %u: an even number of the %u dims "
            "of K needed",
            g, group->rope_dims, group->rope_first_dim, group->k_dim);
    if (turns && (group->flags & KVT_GROUP_V_IN_K) && group->rope_first_dim < group->v_dim)
        return refuse(config, KVT_ERR_ARG,
                      "group %u: RoPE turns dims from %u on, which are V's: V is in K", g,
                      group->rope_first_dim);
    if (turns && !group->rope_inverse_frequencies)
        return refuse(config, KVT_ERR_ARG, "group %u: rope_inverse_frequencies is NULL", g);
    for (uint32_t i = 0; i < group->rope_dims / 2; i++)
        if (!isfinite(group->rope_inverse_frequencies[i]))
            return refuse(config, KVT_ERR_VALUE,
                          "group %u: rope_inverse_frequencies[%u] is not finite", g, i);
    return KVT_OK;
}

static kvt_status check_group(const kvt_config *config, uint32_t g, const kvt_group_config *group)
{
    const char *fault;
    kvt_status status;

    if (group->n_layers == 0 || group->n_q_heads == 0 || group->n_kv_heads == 0)
        return refuse(config, KVT_ERR_ARG, "group %u: n_layers, n_q_heads or n_kv_heads is 0", g);
    if (group->n_layers > KVT_MAX_LAYERS)
        return refuse(config, KVT_ERR_LIMIT, "group %u: n_layers %u is above %d", g,
                      group->n_layers, KVT_MAX_LAYERS);
    if (group->n_q_heads > KVT_MAX_HEADS || group->n_kv_heads > KVT_MAX_HEADS)
        return refuse(config, KVT_ERR_LIMIT, "group %u: %u query and %u kv heads, at most %d", g,
                      group->n_q_heads, group->n_kv_heads, KVT_MAX_HEADS);
    if (group->n_q_heads % group->n_kv_heads != 0)
        return refuse(config, KVT_ERR_ARG, "group %u: %u query heads do not divide by %u kv heads",
                      g, group->n_q_heads, group->n_kv_heads);
    if (group->k_dim == 0 || group->v_dim == 0 || group->k_dim % 8 || group->v_dim % 8)
        return refuse(config, KVT_ERR_ARG, "group %u: k_dim %u, v_dim %u: multiples of 8 needed", g,
                      group->k_dim, group->v_dim);
    if (group->k_dim > KVT_MAX_DIM || group->v_dim > KVT_MAX_DIM)
        return refuse(config, KVT_ERR_LIMIT, "group %u: k_dim %u, v_dim %u: at most %d", g,
                      group->k_dim, group->v_dim, KVT_MAX_DIM);
    if ((unsigned)group->k_type > KVT_TYPE_I5 || (unsigned)group->v_type > KVT_TYPE_I5)
        return refuse(config, KVT_ERR_ARG, "group %u: unknown k_type %d or v_type %d", g,
                      (int)group->k_type, (int)group->v_type);
    if (group->k_type == KVT_TYPE_I5)
        return refuse(config, KVT_ERR_ARG, "group %u: k_type is i5, which is for V only", g);
    if (group->k_type == KVT_TYPE_I4 && (group->flags & KVT_GROUP_NO_OFFSET))
        return refuse(config, KVT_ERR_ARG, "group %u: KVT_GROUP_NO_OFFSET with K of 4 bits", g);
    if (group->flags &
        ~(KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_OFFSET | KVT_GROUP_V_IN_K | KVT_GROUP_NO_V_ROTATION))
        return refuse(config, KVT_ERR_ARG, "group %u: unknown flags 0x%x", g,
                      (unsigned)group->flags);
    if (group->residual_tokens > KVT_MAX_TOKENS && group->residual_tokens != KVT_RESIDUAL_NONE)
        return refuse(config, KVT_ERR_LIMIT, "group %u: residual_tokens %u is above %d", g,
                      group->residual_tokens, KVT_MAX_TOKENS);
    if (group->sink_tokens && !group->window_tokens)
        return refuse(config, KVT_ERR_ARG,
                      "group %u: sink_tokens is %u, but without window_tokens there is no window",
                      g, group->sink_tokens);
    if (group->fine_tokens > KVT_MAX_TOKENS && group->fine_tokens != KVT_FINE_NONE)
        return refuse(config, KVT_ERR_LIMIT, "group %u: fine_tokens %u is above %d", g,
                      group->fine_tokens, KVT_MAX_TOKENS);
    if (group->reserved)
        return refuse(config, KVT_ERR_ARG, "group %u: reserved is not 0", g);
    status = check_rope(config, g, group);
    if (status != KVT_OK)
        return status;
    fault =
        kvt_v_in_k_fault(group->flags, group->k_dim, group->v_dim, group->k_type, group->v_type);
    if (fault)
        return refuse(config, KVT_ERR_ARG, "group %u: KVT_GROUP_V_IN_K, but %s", g, fault);
    return KVT_OK;
}

/* Number the layers of all groups: each of 0 .. n - 1 once. layers may be NULL: only check. */
static kvt_status number_layers(const kvt_config *config, uint32_t n_layers, kvt_layer *layers)
{
    uint8_t seen[KVT_MAX_LAYERS] = {0};
    uint32_t next = 0;
    for (uint32_t g = 0; g < config->n_groups; g++) {
        const kvt_group_config *group = &config->groups[g];
        for (uint32_t i = 0; i < group->n_layers; i++) {
            uint32_t layer = group->layers ? group->layers[i] : next + i;
            if (layer >= n_layers || seen[layer])
                return refuse(config, KVT_ERR_ARG,
                              "group %u: layer %u is numbered twice or not "
                              "below the %u layers there are",
                              g, layer, n_layers);
            if (group->layers && i > 0 && layer < group->layers[i - 1])
                return refuse(config, KVT_ERR_ARG, "group %u: layers are not ascending", g);
            seen[layer] = 1;
            if (layers)
                layers[layer] = (kvt_layer){g, i};
        }
        next += group->n_layers;
    }
    return KVT_OK;
}

/* ---- the plan ---- */

static uint32_t config_threads(const kvt_config *config)
{
    uint32_t n = config->n_threads;
    if (n == 0 && config->executor.run)
        n = config->executor.n_threads;
    return n ? n : 1;
}

/*
 * Check a config and fill everything of a cache that needs no memory. creates: its kernels will be
 * used.
 */
static kvt_status plan_cache(const kvt_config *config, int creates, kvt_cache *cache)
{
    kvt_status status;

    memset(cache, 0, sizeof *cache);
    if (!config->groups || config->n_groups == 0)
        return refuse(config, KVT_ERR_ARG, "no layer groups");
    if (config->n_groups > KVT_MAX_GROUPS)
        return refuse(config, KVT_ERR_LIMIT, "%u layer groups, at most %d", config->n_groups,
                      KVT_MAX_GROUPS);
    if (config->max_tokens == 0)
        return refuse(config, KVT_ERR_ARG, "max_tokens is 0");
    if (config->max_tokens > KVT_MAX_TOKENS)
        return refuse(config, KVT_ERR_LIMIT, "max_tokens is above %d", KVT_MAX_TOKENS);
    if (config->fingerprint_bytes > KVT_MAX_FINGERPRINT)
        return refuse(config, KVT_ERR_LIMIT, "the fingerprint has more than %d bytes",
                      KVT_MAX_FINGERPRINT);
    if (!config->fingerprint && config->fingerprint_bytes > 0)
        return refuse(config, KVT_ERR_ARG, "fingerprint is NULL");
    if (!config->allocator.alloc != !config->allocator.free)
        return refuse(config, KVT_ERR_ARG, "the allocator has only one of alloc and free");
    if (config_threads(config) > KVT_MAX_THREADS)
        return refuse(config, KVT_ERR_LIMIT, "more than %d threads", KVT_MAX_THREADS);
    if (config_threads(config) > 1 && !config->executor.run && !kvt_parallel_has_pool())
        return refuse(config, KVT_ERR_UNSUPPORTED,
                      "n_threads is %u, but this build has no thread pool: give an executor",
                      config->n_threads);

    cache->n_groups = config->n_groups;
    cache->n_classes = KVT_FORMS * config->n_groups + 1;
    cache->n_columns = 2 * config->n_groups + 1;
    for (uint32_t g = 0; g < config->n_groups; g++) {
        kvt_group_config group;
        if (!kvt_copy_struct(&group, &config->groups[g], sizeof group))
            return refuse(config, KVT_ERR_ARG, "group %u: struct_size is not that of this version",
                          g);
        status = check_group(config, g, &group);
        if (status != KVT_OK)
            return status;
        if (cache->n_layers + group.n_layers > KVT_MAX_LAYERS)
            return refuse(config, KVT_ERR_LIMIT, "more than %d layers", KVT_MAX_LAYERS);
        cache->n_layers += group.n_layers;
        if (g > 0 && cache->moves != (group.rope_pairing != KVT_ROPE_UNKNOWN))
            return refuse(config, KVT_ERR_ARG,
                          "group %u: RoPE is described for some groups and not for others", g);
        cache->moves = group.rope_pairing != KVT_ROPE_UNKNOWN;
        if (kvt_group_is_too_wide(&group))
            return refuse(config, KVT_ERR_LIMIT,
                          "group %u: a block of 64 tokens is more than this machine can address",
                          g);
        kvt_group_make(&group, &cache->groups[g]);
        for (uint32_t form = KVT_SEALED; form < KVT_FORMS; form++)
            cache->class_bytes[kvt_class_of(cache, g, form)] =
                cache->groups[g].layouts[form].block_bytes;
    }
    cache->class_bytes[cache->n_groups] =
        cache->moves ? sizeof(kvt_meta) : offsetof(kvt_meta, shifts);
    status = number_layers(config, cache->n_layers, NULL);
    if (status != KVT_OK)
        return status;

    cache->heap.allocator = config->allocator;
    cache->heap.budget_bytes =
        config->memory_budget_bytes ? config->memory_budget_bytes : UINT64_MAX;
    cache->max_tokens = config->max_tokens;
    cache->max_rows = kvt_rows(config->max_tokens);
    cache->fingerprint_bytes = config->fingerprint_bytes;
    if (config->fingerprint_bytes)
        memcpy(cache->fingerprint, config->fingerprint, config->fingerprint_bytes);
    cache->scratch_bytes = kvt_attend_scratch_bytes(cache->groups, cache->n_groups,
                                                    cache->max_tokens, config_threads(config));
    cache->parallel.executor.n_threads = config_threads(config); /* for forecasts, as they are */
    cache->parallel.n_threads = config_threads(config);          /* at most */
    if (!kvt_dispatch(config->isa, creates, &cache->kernels))
        return refuse(config, KVT_ERR_UNSUPPORTED,
                      "isa \"%.20s\" is not in this build or CPU, or the system refuses it",
                      config->isa);
    return KVT_OK;
}

/* ---- creation ---- */

kvt_status kvt_cache_create(const kvt_config *config_in, kvt_cache **cache_out)
{
    kvt_config config;
    kvt_cache plan, *cache;
    kvt_status status;
    void *memory;

    if (!config_in || !cache_out)
        return KVT_ERR_ARG;
    if (!kvt_copy_struct(&config, config_in, sizeof config))
        return KVT_ERR_ARG;
    status = plan_cache(&config, 1, &plan);
    if (status != KVT_OK)
        return status;
    plan.heap.bytes = kvt_round_up(sizeof plan, 64);
    if (plan.heap.bytes > plan.heap.budget_bytes)
        return refuse(&config, KVT_ERR_BUDGET,
                      "the memory budget is below the cache's own %llu "
                      "bytes",
                      (unsigned long long)plan.heap.bytes);
    cache = kvt_mem_raw_alloc(&plan.heap.allocator, sizeof *cache);
    if (!cache)
        return refuse(&config, KVT_ERR_MEMORY, "the allocator has no memory for the cache");
    *cache = plan;
    pthread_mutex_init(&cache->heap.report.lock, NULL);
    pthread_mutex_init(&cache->heap.lock, NULL);
    pthread_mutex_init(&cache->lock, NULL);
    pthread_mutex_init(&cache->scratch_lock, NULL);

    status = kvt_mem_alloc(cache, cache->n_layers * sizeof *cache->layers, "layers", &memory);
    if (status != KVT_OK)
        goto fail;
    cache->layers = memory;
    status = number_layers(&config, cache->n_layers, cache->layers);
    if (status != KVT_OK)
        goto fail;
    for (uint32_t g = 0; g < cache->n_groups; g++)
        if (kvt_group_signs_bytes(&cache->groups[g])) {
            status = kvt_mem_alloc(cache, kvt_group_signs_bytes(&cache->groups[g]),
                                   "rotation signs", &memory);
            if (status != KVT_OK)
                goto fail;
            kvt_group_fill_signs(&cache->groups[g], memory);
        }
    for (uint32_t g = 0; g < cache->n_groups; g++)
        if (kvt_group_rope_bytes(&cache->groups[g])) {
            kvt_group_config group;
            status = kvt_mem_alloc(cache, kvt_group_rope_bytes(&cache->groups[g]),
                                   "RoPE's frequencies", &memory);
            if (status != KVT_OK)
                goto fail;
            kvt_copy_struct(&group, &config.groups[g], sizeof group);
            memcpy(memory, group.rope_inverse_frequencies, kvt_group_rope_bytes(&cache->groups[g]));
            cache->groups[g].rope_frequencies = memory;
        }
    status = kvt_mem_alloc(cache, cache->scratch_bytes, "attention's scratch", &cache->scratch);
    if (status == KVT_OK)
        status = kvt_parallel_create(&cache->parallel, cache,
                                     config.executor.run ? &config.executor : NULL,
                                     config_threads(&config));
    if (status != KVT_OK)
        goto fail;
    cache->references = 1;
    *cache_out = cache;
    return KVT_OK;

fail:
    refuse(&config, status, "%s", cache->heap.report.text);
    kvt_cache_free(cache);
    return status;
}

/* ---- forecast ---- */

/*
 * Bytes of a group's blocks of a sequence whose n_tokens tokens came in one step, none of which a
 * window has released: what is sealed, what is open, and what is both, since a truncate may still
 * need its open form (kvt_seq_group). 1: they overflow.
 */
static int group_overflows(const kvt_cache *plan, uint32_t g, uint64_t n_tokens, uint64_t *bytes)
{
    const kvt_group *group = &plan->groups[g];
    uint64_t sealed = kvt_rows(n_tokens), open = 0, fine, part;
    if (group->seals) {
        open = sealed - kvt_rows_older(n_tokens, group->residual_tokens + KVT_DRAFT_TOKENS);
        sealed = kvt_rows_older(n_tokens, group->residual_tokens);
    }
    fine = sealed < group->fine_rows ? sealed : group->fine_rows;
    sealed -= fine;
    return kvt_mul_overflows(sealed, kvt_block_bytes(plan, kvt_class_of(plan, g, KVT_SEALED)),
                             bytes) ||
           kvt_mul_overflows(fine, kvt_block_bytes(plan, kvt_class_of(plan, g, KVT_FINE)), &part) ||
           kvt_add_overflows(*bytes, part, bytes) ||
           kvt_mul_overflows(open, kvt_block_bytes(plan, kvt_class_of(plan, g, KVT_OPEN)), &part) ||
           kvt_add_overflows(*bytes, part, bytes);
}

/*
 * Bytes of a sequence's blocks, those of positions included. With a window the most that a group
 * has on the way to n_tokens, in steps of one token: from the length on at which the first row is
 * released, 64 tokens more release one row and add one, which is never larger, so that the last 64
 * lengths before are the ones to look at. (Open blocks make a period of 64 tokens.) 1: they
 * overflow.
 */
static int blocks_overflow(const kvt_cache *plan, uint64_t n_tokens, uint64_t *bytes)
{
    if (kvt_mul_overflows(kvt_rows(n_tokens), kvt_block_bytes(plan, plan->n_groups), bytes))
        return 1;
    for (uint32_t g = 0; g < plan->n_groups; g++) {
        const uint64_t full = kvt_window_full(&plan->groups[g]);
        uint64_t to = n_tokens < full ? n_tokens : full, most = 0, part;
        for (uint64_t n = n_tokens > full ? full - (KVT_TOKENS - 1) : to; n <= to; n++) {
            if (group_overflows(plan, g, n, &part))
                return 1;
            most = part > most ? part : most;
        }
        if (kvt_add_overflows(*bytes, most, bytes))
            return 1;
    }
    return 0;
}

kvt_status kvt_memory_forecast(const kvt_config *config_in, uint64_t n_sequences, uint64_t n_tokens,
                               uint64_t *bytes)
{
    kvt_config config;
    kvt_cache plan;
    kvt_status status;
    uint64_t own, sequence, total;

    if (!config_in || !bytes || !kvt_copy_struct(&config, config_in, sizeof config))
        return KVT_ERR_ARG;
    status = plan_cache(&config, 0, &plan);
    if (status != KVT_OK)
        return status;
    if (n_tokens > plan.max_tokens)
        return refuse(&config, KVT_ERR_LIMIT, "n_tokens is above max_tokens");

    own = kvt_round_up(sizeof plan, 64) + kvt_round_up(plan.n_layers * sizeof *plan.layers, 64) +
          kvt_round_up(plan.scratch_bytes, 64);
    for (uint32_t g = 0; g < plan.n_groups; g++)
        own += kvt_round_up(kvt_group_signs_bytes(&plan.groups[g]), 64) +
               kvt_round_up(kvt_group_rope_bytes(&plan.groups[g]), 64);
    if (blocks_overflow(&plan, n_tokens, &sequence) ||
        kvt_add_overflows(sequence, kvt_seq_own_bytes(&plan), &sequence) ||
        kvt_mul_overflows(sequence, n_sequences, &total) || kvt_add_overflows(total, own, &total))
        return refuse(&config, KVT_ERR_LIMIT, "the sum overflows");
    *bytes = total;
    return KVT_OK;
}

/* Layers of the group that has most. */
static uint32_t largest_group(const kvt_cache *plan)
{
    uint32_t most = 0;
    for (uint32_t g = 0; g < plan->n_groups; g++)
        if (plan->groups[g].config.n_layers > most)
            most = plan->groups[g].config.n_layers;
    return most;
}

kvt_status kvt_working_forecast(const kvt_config *config_in, uint64_t n_tokens, uint64_t *bytes)
{
    kvt_config config;
    kvt_cache plan;
    kvt_snap_header header;
    kvt_status status;
    uint64_t save, load;
    size_t n_jobs;

    if (!config_in || !bytes || !kvt_copy_struct(&config, config_in, sizeof config))
        return KVT_ERR_ARG;
    status = plan_cache(&config, 0, &plan);
    if (status != KVT_OK)
        return status;
    if (n_tokens > plan.max_tokens)
        return refuse(&config, KVT_ERR_LIMIT, "n_tokens is above max_tokens");
    kvt_snap_header_make(&plan, n_tokens, &header);
    n_jobs = kvt_snap_jobs_count(&plan, largest_group(&plan));
    save = kvt_snap_save_bytes(&header, n_jobs);
    load = kvt_snap_load_bytes(&header, n_jobs);
    *bytes = save > load ? save : load;
    return KVT_OK;
}
