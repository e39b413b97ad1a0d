/*
 * Items whose tables begin with the same blocks, as those of forks do (kvt_seq_fork): found, and
 * their ranges put in order.
 *
 * A range's softmax rests on nothing but the rows' own queries and the range's blocks, and a
 * kernel's row on nothing but that row. So rows of several items may be one unit over ranges that
 * are the same for all of them: codes are read once, and every row has the bits that it has alone.
 * The same means: the same blocks in force, and the same blocks of positions, which also say by how
 * much keys have moved; every row sees all of it, without a mask or a window.
 *
 * Only whole ranges are shared, only by consecutive items, and only by as many of them as have
 * KVT_ROWS_MAX rows a kv head together: their queries, and their results, are then consecutive too,
 * and the search is linear in the items.
 */
#include "src/attention/attention.h"

#define ROWS_A_RANGE (KVT_RANGE_TOKENS / KVT_TOKENS)

/* Whole ranges that every row of an item sees all of, and may share. */
static size_t whole_ranges(const kvt_attend_args *args, const kvt_group *group,
                           const kvt_attend_item *item)
{
    uint64_t n_tokens = kvt_seq_visible(item->seq, args->layer);
    if (item->mask || kvt_has_window(group) || kvt_item_chunks(item, kvt_group_size(group)) > 1)
        return 0;
    if (args->flags & KVT_ATTEND_CAUSAL)
        n_tokens -= item->n_queries - 1;
    return (size_t)(n_tokens / KVT_RANGE_TOKENS);
}

/* How many of the first n ranges are the same in two sequences. */
static size_t same_ranges(const kvt_seq *a, const kvt_seq *b, uint32_t group, size_t n)
{
    uint32_t positions = a->cache->n_groups;
    for (size_t row = 0; row < n * ROWS_A_RANGE; row++)
        if (*kvt_seq_entry(a, row, group) != *kvt_seq_entry(b, row, group) ||
            *kvt_seq_entry(a, row, positions) != *kvt_seq_entry(b, row, positions))
            return row / ROWS_A_RANGE;
    return n;
}

/* Whether item i and the next one share so many ranges. */
static int next_shares(const kvt_cache *cache, const kvt_attend_args *args, size_t i, size_t n)
{
    uint32_t g = cache->layers[args->layer].group;
    const kvt_attend_item *a = &args->items[i], *b = a + 1;
    return i + 1 < args->n_items && whole_ranges(args, &cache->groups[g], a) >= n &&
           whole_ranges(args, &cache->groups[g], b) >= n && same_ranges(a->seq, b->seq, g, n) == n;
}

int kvt_prefix_exists(const kvt_cache *cache, const kvt_attend_args *args)
{
    for (size_t i = 0; i + 1 < args->n_items; i++)
        if (next_shares(cache, args, i, 1))
            return 1;
    return 0;
}

/*
 * From an item on as many as there is room for, but none that would cost the ones before it more
 * than it saves: n items save n - 1 of n readings of what they share. Nor one that shares twice as
 * much with the next: these two alone save as much.
 */
void kvt_prefix_find(const kvt_cache *cache, const kvt_attend_args *args, size_t first,
                     kvt_prefix *prefix)
{
    uint32_t g = cache->layers[args->layer].group;
    const kvt_group *group = &cache->groups[g];
    size_t size = kvt_group_size(group), shared = whole_ranges(args, group, &args->items[first]);

    *prefix = (kvt_prefix){.n_items = 1};
    prefix->rows = kvt_item_rows(&args->items[first], size);
    for (size_t i = first + 1; i < args->n_items && shared > 0; i++) {
        const kvt_attend_item *item = &args->items[i];
        size_t n = whole_ranges(args, group, item), rows = kvt_item_rows(item, size);
        if (n == 0 || prefix->rows + rows > KVT_ROWS_MAX)
            break;
        n = same_ranges(args->items[first].seq, item->seq, g, n < shared ? n : shared);
        if (n == 0 || n * prefix->n_items < shared * (prefix->n_items - 1) ||
            next_shares(cache, args, i, 2 * n))
            break;
        shared = n;
        prefix->rows += rows;
        prefix->n_items++;
    }
    if (prefix->n_items == 1)
        return;
    prefix->shared = shared;
    for (size_t i = 0, steps = shared; i < prefix->n_items; i++) {
        size_t rows = kvt_rows(kvt_seq_visible(args->items[first + i].seq, args->layer));
        steps += (rows + ROWS_A_RANGE - 1) / ROWS_A_RANGE - shared;
        prefix->ends[i] = steps;
    }
}

kvt_step kvt_prefix_step(const kvt_prefix *prefix, size_t step)
{
    size_t item = 0;
    if (step < prefix->shared)
        return (kvt_step){prefix->n_items, step};
    while (step >= prefix->ends[item])
        item++;
    return (kvt_step){item,
                      step - (item ? prefix->ends[item - 1] : prefix->shared) + prefix->shared};
}

size_t kvt_prefix_base(const kvt_prefix *prefix, size_t from, size_t to)
{
    kvt_step first = kvt_prefix_step(prefix, from), last = kvt_prefix_step(prefix, to - 1);
    return first.item == last.item || from < prefix->shared ? first.range : prefix->shared;
}

size_t kvt_prefix_slots(const kvt_prefix *prefix, size_t from, size_t to)
{
    size_t base = kvt_prefix_base(prefix, from, to), most = kvt_prefix_step(prefix, to - 1).range;
    /* The items before the last one go on to their ends. */
    for (size_t i = 0, begin = prefix->shared; i < prefix->n_items; begin = prefix->ends[i++]) {
        size_t last = prefix->shared + prefix->ends[i] - begin; /* behind its last range */
        if (prefix->ends[i] > from && prefix->ends[i] <= to && last > most + 1)
            most = last - 1;
    }
    return most - base + 1;
}

/* ---- walk ---- */

static void look(kvt_walk *walk)
{
    const kvt_group *group = &walk->cache->groups[walk->cache->layers[walk->args->layer].group];
    walk->prefix.shared = 0;
    walk->units = group->config.n_kv_heads;
    if (walk->item == walk->args->n_items)
        return;
    if (walk->shares)
        kvt_prefix_find(walk->cache, walk->args, walk->item, &walk->prefix);
    if (!walk->prefix.shared)
        walk->units *= kvt_item_chunks(&walk->args->items[walk->item], kvt_group_size(group));
}

void kvt_walk_begin(kvt_walk *walk, const kvt_cache *cache, const kvt_attend_args *args, int shares)
{
    walk->cache = cache;
    walk->args = args;
    walk->shares = shares;
    walk->item = walk->unit = walk->query = 0;
    look(walk);
}

void kvt_walk_next(kvt_walk *walk)
{
    size_t n = walk->prefix.shared ? walk->prefix.n_items : 1;
    walk->unit += walk->units;
    for (; n > 0; n--)
        walk->query += (size_t)walk->args->items[walk->item++].n_queries;
    look(walk);
}
