/*
 * What a sliding window leaves in sight (kvt_group_config.window_tokens, sink_tokens).
 *
 * A window is one of positions, which may be any: equal, descending, with gaps. Each row of the
 * block table has the lowest and the highest of its positions, by which it is left out or masked,
 * and the highest up to and including it (`reach`), which ascends: the first row whose reach is
 * inside the window of the query farthest back is where sight begins, and a search finds it. In a
 * sequence whose positions count tokens, every row from there on is in sight, and only the rows at
 * the window's edge are masked.
 *
 * Only bounds and positions are read here, which are there for every row; blocks of keys and values
 * that are out of sight need not exist.
 */
#include "src/attention/attention.h"

int32_t kvt_query_position(const kvt_attend_item *item, uint64_t n_tokens, uint64_t query)
{
    uint64_t token = n_tokens - item->n_queries + query;
    if (item->query_positions)
        return item->query_positions[query];
    return kvt_seq_meta(item->seq, (size_t)(token / KVT_TOKENS))->positions[token % KVT_TOKENS];
}

static int reaches(const kvt_seq *seq, size_t row, int64_t behind)
{
    return kvt_seq_meta(seq, row)->reach > behind;
}

/*
 * The first row of low .. end - 1 with a position above `behind` in it or before it; end: none.
 * From where it is if positions count tokens, in doubling steps to either side, then by halves.
 */
static size_t first_reaching(const kvt_seq *seq, size_t low, size_t end, int64_t behind)
{
    size_t high = end, row, step = 1;
    int64_t back;
    if (low >= end || behind < 0)
        return low;
    back = (kvt_seq_meta(seq, end - 1)->reach - behind) / KVT_TOKENS;
    if (!reaches(seq, end - 1, behind))
        return end;
    row = back < (int64_t)(end - 1 - low) ? end - 1 - (size_t)back : low;
    if (reaches(seq, row, behind))
        for (high = row; high > low; step *= 2) {
            row = high - low > step ? high - step : low;
            if (!reaches(seq, row, behind)) {
                low = row + 1;
                break;
            }
            high = row;
        }
    else
        for (low = row + 1; low < high; step *= 2) {
            row = high - low > step ? low + step - 1 : high - 1;
            if (reaches(seq, row, behind)) {
                high = row;
                break;
            }
            low = row + 1;
        }
    while (low < high) {
        row = low + (high - low) / 2;
        if (reaches(seq, row, behind))
            high = row;
        else
            low = row + 1;
    }
    return low;
}

kvt_sight kvt_sight_of(const kvt_group *group, const kvt_attend_item *item, uint64_t n_tokens,
                       uint64_t first, uint64_t last, uint64_t most)
{
    const size_t rows_a_range = KVT_RANGE_TOKENS / KVT_TOKENS;
    kvt_sight sight = {.seq = item->seq, .behind = -1, .ahead = -1, .most = most};
    size_t end_range;

    sight.end_row = kvt_rows(most);
    if (group->window_tokens != UINT64_MAX) {
        int32_t lowest = INT32_MAX, highest = 0;
        for (uint64_t query = first; query <= last; query++) {
            int32_t position = kvt_query_position(item, n_tokens, query);
            lowest = position < lowest ? position : lowest;
            highest = position > highest ? position : highest;
        }
        sight.behind = lowest - (int64_t)group->window_tokens;
        sight.ahead = highest - (int64_t)group->window_tokens;
        sight.sink_tokens = group->sink_tokens < most ? group->sink_tokens : most;
        sight.sink_rows = kvt_rows(sight.sink_tokens);
        sight.first_row = first_reaching(item->seq, sight.sink_rows, sight.end_row, sight.behind);
    }
    sight.sink_ranges = (sight.sink_rows + rows_a_range - 1) / rows_a_range;
    sight.first_range = sight.first_row / rows_a_range;
    if (sight.first_range < sight.sink_ranges)
        sight.first_range = sight.sink_ranges;
    end_range =
        sight.first_row < sight.end_row ? (sight.end_row + rows_a_range - 1) / rows_a_range : 0;
    sight.ranges = sight.sink_ranges;
    if (end_range > sight.first_range)
        sight.ranges += end_range - sight.first_range;
    sight.ranges += sight.ranges == 0;
    return sight;
}

kvt_sees kvt_sight_sees(const kvt_sight *sight, size_t row)
{
    uint64_t first_token = (uint64_t)row * KVT_TOKENS, end = first_token + KVT_TOKENS;
    const kvt_meta *meta;

    if (sight->ahead < 0 || (end < sight->most ? end : sight->most) <= sight->sink_tokens)
        return KVT_SEES_ALL;
    if (row >= sight->sink_rows && row < sight->first_row)
        return KVT_SEES_NONE;
    meta = kvt_seq_meta(sight->seq, row);
    if (meta->lowest > sight->ahead)
        return KVT_SEES_ALL;
    return row < sight->sink_rows || meta->highest > sight->behind ? KVT_SEES_SOME : KVT_SEES_NONE;
}

size_t kvt_sight_next(const kvt_sight *sight, size_t row)
{
    if (row >= sight->sink_rows && row < sight->first_row)
        row = sight->first_row;
    while (row < sight->end_row && kvt_sight_sees(sight, row) == KVT_SEES_NONE)
        row++;
    return row;
}
