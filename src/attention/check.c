/*
 * What an attend call refuses before anything is computed: arguments that contradict each other or
 * the sequences, and numbers that f32 cannot take.
 */
#include "src/attention/attention.h"

#include <math.h>

#include "src/fpenv.h"

static kvt_status check_item(const kvt_cache *cache, const kvt_attend_args *args, size_t i,
                             const kvt_group *group)
{
    const kvt_attend_item *item = &args->items[i];
    uint64_t n_tokens, rows;
    size_t released;

    if (!item->seq || item->seq->cache != cache)
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: item %zu: seq is NULL or of another cache",
                        i);
    if (item->reserved[0] || item->reserved[1])
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: item %zu: reserved is not 0", i);
    n_tokens = kvt_seq_visible(item->seq, args->layer);
    if (item->n_queries == 0 || item->n_queries > KVT_MAX_TOKENS ||
        kvt_mul_overflows(item->n_queries, kvt_group_size(group), &rows))
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: item %zu: %llu queries", i,
                        (unsigned long long)item->n_queries);
    if ((args->flags & KVT_ATTEND_CAUSAL) && !item->mask && item->n_queries > n_tokens)
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_attend: item %zu: causal with %llu queries over "
                        "%llu tokens",
                        i, (unsigned long long)item->n_queries, (unsigned long long)n_tokens);
    if (item->mask &&
        (item->mask_tokens > n_tokens || item->mask_stride < (size_t)((item->mask_tokens + 7) / 8)))
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_attend: item %zu: a mask of %llu tokens, stride "
                        "%zu, over %llu tokens",
                        i, (unsigned long long)item->mask_tokens, item->mask_stride,
                        (unsigned long long)n_tokens);
    if (!item->mask && (item->mask_tokens || item->mask_stride))
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: item %zu: mask is NULL", i);
    if (args->alibi_slopes && !item->query_positions && item->n_queries > n_tokens)
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_attend: item %zu: ALiBi needs query_positions for "
                        "%llu queries over %llu tokens",
                        i, (unsigned long long)item->n_queries, (unsigned long long)n_tokens);
    if (group->window_tokens != UINT64_MAX && !item->query_positions && item->n_queries > n_tokens)
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_attend: item %zu: a window needs query_positions for "
                        "%llu queries over %llu tokens",
                        i, (unsigned long long)item->n_queries, (unsigned long long)n_tokens);
    if (item->query_positions)
        for (uint64_t j = 0; j < item->n_queries; j++)
            if (item->query_positions[j] < 0)
                return kvt_fail(cache, KVT_ERR_ARG,
                                "kvt_attend: item %zu: query_positions[%llu] "
                                "is negative",
                                i, (unsigned long long)j);
    released = item->seq->groups[cache->layers[args->layer].group].first;
    if (released) {
        kvt_sight sight = kvt_sight_of(group, item, n_tokens, 0, item->n_queries - 1, n_tokens);
        if (sight.first_row < released && sight.first_row < sight.end_row)
            return kvt_fail(cache, KVT_ERR_STATE,
                            "kvt_attend: item %zu: a query's window begins in tokens before %llu, "
                            "which have been released",
                            i, (unsigned long long)released * KVT_TOKENS);
    }
    return KVT_OK;
}

/* Times the largest distance of two positions this stays within f32. */
#define ALIBI_SLOPE_MAX 1e28f

/*
 * A product of q and K below the least f32 is a weight of 0. The least numbers of f32 are 2^104
 * apart: scaled by this or more it is 2^7 or more below all others, so that it has to be.
 */
#define SCALE_MIN 0x1p-96f

/* In the library's floating-point environment: under denormals-are-zero nothing small is < 0. */
static kvt_status check_numbers(const kvt_cache *cache, const kvt_attend_args *args,
                                const kvt_group *group)
{
    if (!isfinite(args->scale) || args->scale < 0.0f)
        return kvt_fail(cache, KVT_ERR_VALUE, "kvt_attend: scale is negative or not finite");
    if (args->scale > 0.0f && args->scale < SCALE_MIN)
        return kvt_fail(cache, KVT_ERR_VALUE, "kvt_attend: scale %g is below 2^-96",
                        (double)args->scale);
    if (!isfinite(args->softcap) || args->softcap < 0.0f)
        return kvt_fail(cache, KVT_ERR_VALUE, "kvt_attend: softcap is negative or not finite");
    for (uint32_t h = 0; h < group->config.n_q_heads; h++) {
        if (args->sink_logits && !isfinite(args->sink_logits[h]))
            return kvt_fail(cache, KVT_ERR_VALUE, "kvt_attend: sink_logits[%u] is not finite", h);
        if (args->alibi_slopes &&
            !(args->alibi_slopes[h] >= 0.0f && args->alibi_slopes[h] <= ALIBI_SLOPE_MAX))
            return kvt_fail(cache, KVT_ERR_VALUE,
                            "kvt_attend: alibi_slopes[%u] is negative, not finite or beyond 1e28",
                            h);
    }
    return KVT_OK;
}

/*
 * Logits are f32: a bias of this size leaves them 2^-13. The nearest token that a query sees has to
 * have no larger one; those of tokens further away differ from it by what f32 holds, or are weights
 * of 0. That needs slopes >= 0: else the farthest token decides.
 */
#define ALIBI_BIAS_MAX 4096.0

static int32_t position_of_token(const kvt_seq *seq, uint64_t token)
{
    return kvt_seq_meta(seq, (size_t)(token / KVT_TOKENS))->positions[token % KVT_TOKENS];
}

/* Whether a query sees a token, or none, whose bias f32 can hold. From the last on: the nearest. */
static int has_near_token(const kvt_attend_args *args, const kvt_attend_item *item,
                          const kvt_group *group, uint64_t n_tokens, uint64_t query, double slope)
{
    uint64_t n = n_tokens, first_bit = n_tokens - item->mask_tokens, seen = 0;
    int32_t position = kvt_query_position(item, n_tokens, query);
    if ((args->flags & KVT_ATTEND_CAUSAL) && !item->mask)
        n -= item->n_queries - 1 - query;
    while (n-- > 0) {
        int32_t there = position_of_token(item->seq, n);
        int64_t distance = (int64_t)position - there;
        if (item->mask && n >= first_bit) {
            uint64_t bit = n - first_bit;
            if (!(item->mask[query * item->mask_stride + bit / 8] >> bit % 8 & 1))
                continue;
        }
        if (!kvt_in_window(group, position, n, there))
            continue;
        seen++;
        if (slope * (double)(distance < 0 ? -distance : distance) <= ALIBI_BIAS_MAX)
            return 1;
    }
    return seen == 0;
}

/* ALiBi's biases; without positions and masks every query sees its own token. */
static kvt_status check_biases(const kvt_cache *cache, const kvt_attend_args *args,
                               const kvt_group *group)
{
    double slope = 0;
    if (!args->alibi_slopes)
        return KVT_OK;
    for (uint32_t h = 0; h < group->config.n_q_heads; h++)
        slope = (double)args->alibi_slopes[h] > slope ? (double)args->alibi_slopes[h] : slope;
    for (size_t i = 0; i < args->n_items; i++) {
        const kvt_attend_item *item = &args->items[i];
        uint64_t n_tokens = kvt_seq_visible(item->seq, args->layer);
        for (uint64_t j = 0; (item->query_positions || item->mask) && j < item->n_queries; j++)
            if (!has_near_token(args, item, group, n_tokens, j, slope))
                return kvt_fail(cache, KVT_ERR_VALUE,
                                "kvt_attend: item %zu: query %llu is so far from all tokens that "
                                "ALiBi's bias, slope %g, is beyond %g: f32 would lose the logits",
                                i, (unsigned long long)j, slope, ALIBI_BIAS_MAX);
    }
    return KVT_OK;
}

kvt_status kvt_attend_check(const kvt_cache *cache, const kvt_attend_args *args)
{
    const kvt_group *group;
    kvt_view view;
    uint64_t queries = 0;
    kvt_fpenv saved;
    kvt_status status;

    if (args->layer >= cache->n_layers)
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: layer %u of %u", args->layer,
                        cache->n_layers);
    if (args->flags & ~(KVT_ATTEND_CAUSAL | KVT_ATTEND_F32 | KVT_ATTEND_FAST))
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: unknown flags 0x%x",
                        (unsigned)args->flags);
    if ((args->flags & KVT_ATTEND_F32) && (args->flags & KVT_ATTEND_FAST))
        return kvt_fail(cache, KVT_ERR_ARG,
                        "kvt_attend: KVT_ATTEND_F32 and KVT_ATTEND_FAST exclude each other");
    if (!args->items || args->n_items == 0)
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: no items");
    group = &cache->groups[cache->layers[args->layer].group];
    for (size_t i = 0; i < args->n_items; i++) {
        status = check_item(cache, args, i, group);
        if (status != KVT_OK)
            return status;
        if (kvt_add_overflows(queries, args->items[i].n_queries, &queries))
            return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: the number of queries overflows");
    }
    saved = kvt_fpenv_enter();
    status = check_numbers(cache, args, group);
    if (status == KVT_OK)
        status = check_biases(cache, args, group);
    kvt_fpenv_leave(saved);
    if (status == KVT_OK)
        status = kvt_view_make(cache, &args->q, "q", queries, group->config.n_q_heads,
                               group->config.k_dim, &view);
    if (status == KVT_OK)
        status = kvt_view_make(cache, &args->out, "out", queries, group->config.n_q_heads,
                               group->config.v_dim, &view);
    if (status != KVT_OK)
        return status;
    if ((uintptr_t)args->lse % sizeof(float))
        return kvt_fail(cache, KVT_ERR_ARG, "kvt_attend: lse is not aligned");
    return KVT_OK;
}
