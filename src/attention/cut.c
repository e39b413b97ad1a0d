/*
 * How a call's work is cut into tasks.
 *
 * All units of a plan in their order, each a run of ranges, make one line; a unit's length on it is
 * its tokens times what its rows cost. n tasks are n equal pieces of that line, each end moved to
 * the nearest end of a range, or, in units that are short beside a task, of the unit. So one long
 * sequence among many short ones, and the last queries of a causal prefill, are shared out by
 * their work, not by their number.
 *
 * A plan holds no memory: who needs a cut walks the items up to it. Lengths are a model. What the
 * results rest on is only that all walks of a plan find the same cuts, and in order: the arithmetic
 * is of integers.
 */
#include "src/attention/attention.h"

/* What a unit costs beyond its tokens, in tokens: its queries are loaded, its results stored. */
#define START_TOKENS 64
/* Rows that cost as much as reading K and V. */
#define READ_ROWS 2
/* Work of a call, of which sums and doubles are formed. */
#define WORK_MAX 4e18

static uint64_t weight_of(size_t rows)
{
    return rows + READ_ROWS;
}

static int is_causal(const kvt_attend_args *args, const kvt_attend_item *item)
{
    return (args->flags & KVT_ATTEND_CAUSAL) && !item->mask;
}

/* An item as its kv heads see it, or several with a shared prefix. */
typedef struct strip {
    const kvt_group *geometry;
    const kvt_attend_args *args;
    const kvt_attend_item *item;
    size_t group; /* query heads of a kv head */
    size_t chunks, rows;
    uint64_t n_tokens;
    /* A window: tokens that it hides from the last chunk, and chunks from which it hides none. */
    uint64_t hidden;
    size_t whole;
    /* Items with a shared prefix, and the work of a kv head of them; NULL: the item for itself. */
    const kvt_prefix *prefix;
    uint64_t prefix_work;
} strip;

/* What a chunk's window shows; only its ranges where there is none. */
static kvt_sight sight_of(const strip *s, size_t chunk)
{
    uint64_t n = s->item->n_queries, most = s->n_tokens;
    uint64_t first = (uint64_t)chunk * s->rows / s->group;
    uint64_t rows = ((uint64_t)chunk + 1) * s->rows;
    uint64_t last = (rows < n * s->group ? rows - 1 : n * s->group - 1) / s->group;
    if (is_causal(s->args, s->item))
        most -= n - 1 - last;
    return kvt_sight_of(s->geometry, s->item, s->n_tokens, first, last, most);
}

/* Work of a shared prefix's own ranges of an item. */
static uint64_t work_own(const strip *s, size_t i)
{
    const kvt_attend_item *item = &s->item[i];
    uint64_t tokens = kvt_seq_visible(item->seq, s->args->layer);
    tokens -= (uint64_t)s->prefix->shared * KVT_RANGE_TOKENS;
    return weight_of(kvt_item_rows(item, s->group)) * (tokens + START_TOKENS);
}

/* Of the ranges that all of its items attend over together. */
static uint64_t work_shared(const strip *s)
{
    return weight_of(s->prefix->rows) *
           ((uint64_t)s->prefix->shared * KVT_RANGE_TOKENS + START_TOKENS);
}

/* prefix: NULL, or that item i begins. */
static strip strip_of(const kvt_cache *cache, const kvt_attend_args *args, size_t i,
                      const kvt_prefix *prefix)
{
    const kvt_group *group = &cache->groups[cache->layers[args->layer].group];
    const kvt_attend_item *item = &args->items[i];
    size_t size = kvt_group_size(group);
    strip s = {group,
               args,
               item,
               size,
               kvt_item_chunks(item, size),
               kvt_item_rows(item, size),
               kvt_seq_visible(item->seq, args->layer),
               0,
               0,
               NULL,
               0};
    s.whole = s.chunks;
    if (prefix && prefix->shared) {
        s.prefix = prefix;
        s.rows = prefix->rows;
        s.prefix_work = work_shared(&s);
        for (size_t j = 0; j < prefix->n_items; j++)
            s.prefix_work += work_own(&s, j);
        return s;
    }
    if (group->window_tokens != UINT64_MAX) {
        kvt_sight last = sight_of(&s, s.chunks - 1);
        uint64_t hides;
        s.hidden = (uint64_t)(last.first_row - last.sink_rows) * KVT_TOKENS;
        s.hidden = s.hidden < s.n_tokens ? s.hidden : s.n_tokens;
        hides = (s.hidden * s.group + s.rows - 1) / s.rows;
        s.whole = hides < s.chunks ? s.chunks - (size_t)hides : 0;
    }
    return s;
}

/* The same without a window; chunk c of a causal call sees c chunks' queries more. */
static uint64_t work_unhidden(const strip *s, size_t n)
{
    uint64_t tokens = s->n_tokens + START_TOKENS, queries = 0;
    if (s->chunks > 1 && is_causal(s->args, s->item)) {
        tokens -= s->item->n_queries;
        queries = (uint64_t)s->rows * n / s->group;
    }
    return weight_of(s->rows) * (n * tokens + queries * (n + 1) / 2);
}

/*
 * Work of the first n chunks of a kv head. With a window, from chunk `whole` on each chunk has its
 * queries more hidden than the one before, so that causal ones see the same number of tokens, and
 * others ever fewer. That takes the queries' positions to ascend with the tokens'.
 */
static uint64_t work_of(const strip *s, size_t n)
{
    uint64_t later, least, chunks;
    if (s->prefix)
        return n ? s->prefix_work : 0;
    if (n <= s->whole)
        return work_unhidden(s, n);
    later = n - s->whole;
    least = later * (s->n_tokens - s->hidden + START_TOKENS);
    if (s->chunks > 1 && !is_causal(s->args, s->item)) {
        /* Chunk c sees the tokens of chunks - 1 - c chunks more than the last. */
        chunks = later * (2 * (uint64_t)s->chunks - s->whole - n - 1) / 2;
        least += chunks / s->group * s->rows + chunks % s->group * s->rows / s->group;
    }
    return work_unhidden(s, s->whole) + weight_of(s->rows) * least;
}

/* Tokens of the chunk that has most, about. */
static uint64_t longest_of(const strip *s)
{
    uint64_t more = 0;
    if (!is_causal(s->args, s->item))
        more = ((uint64_t)s->chunks - 1) * s->rows / s->group;
    return s->hidden > more ? s->n_tokens - s->hidden + more : s->n_tokens;
}

uint64_t kvt_work_tokens(const kvt_cache *cache, const kvt_attend_args *args, size_t item)
{
    strip s = strip_of(cache, args, item, NULL);
    return s.hidden ? work_of(&s, s.chunks) / weight_of(s.rows) / s.chunks - START_TOKENS
                    : s.n_tokens;
}

/* Ranges that a chunk has at most, or some more. */
static size_t most_ranges(const strip *s)
{
    size_t last = sight_of(s, s->chunks - 1).ranges;
    size_t most =
        (size_t)(longest_of(s) / KVT_RANGE_TOKENS) + 3; /* sinks, and parts at both ends */
    return s->chunks == 1 || !s->hidden || last > most ? last : most;
}

/* What of a strip's unit, at most, is one piece of work, and all of it. */
static uint64_t piece_of(const strip *s)
{
    uint64_t tokens = longest_of(s) + START_TOKENS;
    if (s->prefix || tokens >= KVT_RANGE_TOKENS)
        tokens = KVT_RANGE_TOKENS + START_TOKENS;
    return weight_of(s->rows) * tokens;
}

static uint64_t unit_work(const strip *s)
{
    return s->prefix ? s->prefix_work : weight_of(s->rows) * (longest_of(s) + START_TOKENS);
}

int kvt_work_measure(const kvt_cache *cache, const kvt_attend_args *args, int shares,
                     kvt_work *work)
{
    size_t heads = cache->groups[cache->layers[args->layer].group].config.n_kv_heads;
    double sum = 0;
    kvt_walk walk;

    *work = (kvt_work){.one_chunk = 1};
    for (kvt_walk_begin(&walk, cache, args, shares); walk.item < args->n_items;
         kvt_walk_next(&walk)) {
        strip s = strip_of(cache, args, walk.item, &walk.prefix);
        size_t ranges = s.prefix ? kvt_prefix_steps(s.prefix) : most_ranges(&s);
        uint64_t longest = unit_work(&s), piece = piece_of(&s);
        sum += (double)heads * (double)s.chunks *
               (s.prefix ? (double)s.prefix_work
                         : (double)weight_of(s.rows) * (double)(s.n_tokens + START_TOKENS));
        if (sum > WORK_MAX)
            return 0;
        work->sum += heads * work_of(&s, s.chunks);
        work->longest = longest > work->longest ? longest : work->longest;
        work->piece = piece > work->piece ? piece : work->piece;
        work->rows = s.rows > work->rows ? s.rows : work->rows;
        work->units += heads * s.chunks;
        work->ranges += heads * s.chunks * ranges;
        work->one_chunk &= s.chunks == 1 && !s.prefix;
    }
    return 1;
}

/* Rounded up to a multiple of a range. */
static uint64_t whole_ranges(uint64_t n_tokens)
{
    return (n_tokens + KVT_RANGE_TOKENS - 1) / KVT_RANGE_TOKENS * KVT_RANGE_TOKENS;
}

kvt_work kvt_work_one_query(const kvt_group *group, uint64_t n_tokens)
{
    size_t size = kvt_group_size(group), rows = size < KVT_ROWS_MAX ? size : KVT_ROWS_MAX;
    size_t chunks = (size + rows - 1) / rows, heads = group->config.n_kv_heads;
    size_t ranges;
    kvt_work work = {.rows = rows, .units = heads * chunks, .one_chunk = chunks == 1};
    uint64_t start = weight_of(rows) * START_TOKENS, sight = whole_ranges(group->sink_tokens);
    /* A window that begins and ends inside ranges, and the sinks' ranges. */
    if (group->window_tokens < n_tokens && sight < n_tokens) {
        sight += whole_ranges(group->window_tokens) + KVT_RANGE_TOKENS;
        n_tokens = sight < n_tokens ? sight : n_tokens;
    }
    ranges = (size_t)(whole_ranges(n_tokens) / KVT_RANGE_TOKENS);
    work.longest = weight_of(rows) * n_tokens + start;
    work.piece = ranges > 1 ? weight_of(rows) * KVT_RANGE_TOKENS + start : work.longest;
    work.ranges = work.units * ranges;
    work.sum = work.units * work.longest;
    return work;
}

/* ---- cuts ---- */

void kvt_cutter_begin(kvt_cutter *cutter, const kvt_attend_plan *plan)
{
    cutter->plan = plan;
    cutter->work = 0;
    kvt_walk_begin(&cutter->walk, plan->cache_, &plan->args_,
                   (plan->flags_ & KVT_PLAN_SHARES) != 0);
}

/* The chunk in which a head's work reaches `at`: the last that begins at or before it. */
static size_t chunk_at(const strip *s, uint64_t at)
{
    size_t low = 0, high = s->chunks;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (work_of(s, middle) <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Tokens in sight before a range. */
static uint64_t tokens_before(const kvt_sight *sight, size_t range)
{
    size_t row = kvt_sight_range(sight, range) * (KVT_RANGE_TOKENS / KVT_TOKENS);
    size_t rows = row < sight->sink_rows ? row : sight->sink_rows;
    rows += row > sight->first_row ? row - sight->first_row : 0;
    return (uint64_t)rows * KVT_TOKENS;
}

/* The end of a range, or of the unit, that is nearest to `at` of a unit's work `length`. */
static size_t nearest_range(const kvt_attend_plan *plan, uint64_t at, uint64_t length,
                            uint64_t weight, const kvt_sight *sight)
{
    uint64_t tokens = at / weight;
    size_t low = 0, high = sight->ranges;
    if (high == 1 || length <= plan->split_)
        return 2 * at >= length ? high : 0;
    tokens = tokens > START_TOKENS ? tokens - START_TOKENS : 0;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (2 * tokens >= tokens_before(sight, middle) + tokens_before(sight, middle + 1))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The end of a run of n ranges of a work per token that is nearest to `at` of its work. */
static size_t nearest_of(uint64_t at, uint64_t weight, uint64_t tokens)
{
    uint64_t before = at / weight, ranges = (tokens + KVT_RANGE_TOKENS - 1) / KVT_RANGE_TOKENS;
    uint64_t range;
    before = before > START_TOKENS ? before - START_TOKENS : 0;
    range = before / KVT_RANGE_TOKENS;
    if (range < ranges) { /* from its middle on its end is nearer */
        uint64_t begin = range * KVT_RANGE_TOKENS, end = begin + KVT_RANGE_TOKENS;
        range += 2 * before >= begin + (end < tokens ? end : tokens);
    }
    return (size_t)(range < ranges ? range : ranges);
}

/* The same of the steps of a shared prefix. */
static size_t nearest_step(const kvt_attend_plan *plan, uint64_t at, const strip *s)
{
    const kvt_prefix *prefix = s->prefix;
    size_t steps = kvt_prefix_steps(prefix), begin = prefix->shared;
    uint64_t length = work_shared(s);
    if (s->prefix_work <= plan->split_)
        return 2 * at >= s->prefix_work ? steps : 0;
    if (at < length)
        return nearest_of(at, weight_of(s->rows), (uint64_t)prefix->shared * KVT_RANGE_TOKENS);
    for (size_t i = 0; i < prefix->n_items; begin = prefix->ends[i++]) {
        uint64_t weight = weight_of(kvt_item_rows(&s->item[i], s->group));
        at -= length;
        length = work_own(s, i);
        if (at < length)
            return begin + nearest_of(at, weight, length / weight - START_TOKENS);
    }
    return steps;
}

kvt_cut kvt_cutter_next(kvt_cutter *cutter, size_t i)
{
    const kvt_attend_plan *plan = cutter->plan;
    const kvt_attend_args *args = &plan->args_;
    const kvt_cache *cache = plan->cache_;
    size_t heads = cache->groups[cache->layers[args->layer].group].config.n_kv_heads;
    uint64_t share = plan->work_ / plan->n_tasks, rest = plan->work_ % plan->n_tasks;
    uint64_t at = share * i + (i < rest ? i : rest);

    /* A task for each bundle: units of unlike work would leave tasks empty, and others with two. */
    if (plan->split_ == UINT64_MAX && plan->n_tasks * plan->bundle_ == plan->units_)
        return (kvt_cut){i * plan->bundle_, 0, 0};
    for (; cutter->walk.item < args->n_items; kvt_walk_next(&cutter->walk)) {
        strip s = strip_of(cache, args, cutter->walk.item, &cutter->walk.prefix);
        uint64_t head = work_of(&s, s.chunks), offset, before, length;
        size_t unit = cutter->walk.unit, chunk, range, ranges;
        if (at - cutter->work >= head * heads) {
            cutter->work += head * heads;
            continue;
        }
        offset = (at - cutter->work) % (head * plan->bundle_);
        unit += (size_t)((at - cutter->work) / (head * plan->bundle_)) * plan->bundle_ * s.chunks;
        if (s.prefix) {
            range = nearest_step(plan, offset, &s);
            ranges = kvt_prefix_steps(s.prefix);
        } else {
            kvt_sight sight;
            chunk = plan->bundle_ > 1 ? 0 : chunk_at(&s, offset); /* bundles: one chunk a head */
            before = work_of(&s, chunk);
            length = (work_of(&s, chunk + 1) - before) * plan->bundle_;
            sight = sight_of(&s, chunk);
            ranges = sight.ranges;
            range = nearest_range(plan, offset - before, length, weight_of(s.rows) * plan->bundle_,
                                  &sight);
            unit += chunk;
        }
        return range < ranges ? (kvt_cut){unit, range, ranges}
                              : (kvt_cut){unit + plan->bundle_, 0, 0};
    }
    return (kvt_cut){plan->units_, 0, 0};
}

size_t kvt_cut_tail(kvt_cut from, kvt_cut to)
{
    if (from.range == 0)
        return 0;
    return (to.unit == from.unit ? to.range : from.ranges) - from.range;
}

size_t kvt_cut_longest_tail(const kvt_attend_plan *plan)
{
    kvt_cutter cutter;
    kvt_cut from, to;
    size_t most = 0, tail;
    kvt_cutter_begin(&cutter, plan);
    from = kvt_cutter_next(&cutter, 0);
    for (size_t i = 0; i < plan->n_tasks; i++, from = to) {
        kvt_prefix prefix;
        prefix.shared = 0;
        if (from.range > 0 && cutter.walk.prefix.shared)
            prefix = cutter.walk.prefix;
        to = kvt_cutter_next(&cutter, i + 1);
        tail = kvt_cut_tail(from, to);
        if (prefix.shared && tail)
            tail = kvt_prefix_slots(&prefix, from.range, from.range + tail);
        most = tail > most ? tail : most;
    }
    return most;
}
