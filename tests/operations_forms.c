/*
 * The rules of the model: which blocks are sealed or released, what can be reached and removed, and
 * how many bytes that is.
 */
#include "operations_model.h"

enum { BLOCK = KVT_BLOCK_TOKENS, DRAFTS = 64 };

/* ---- groups ---- */

int seals(const world *w, uint32_t g)
{
    return w->groups[g].k_type >= KVT_TYPE_I8 || w->groups[g].v_type >= KVT_TYPE_I8;
}

int has_offset(const world *w, uint32_t g)
{
    return w->groups[g].k_type >= KVT_TYPE_I8 && !(w->groups[g].flags & KVT_GROUP_NO_OFFSET);
}

size_t sink_rows(const world *w, uint32_t g)
{
    size_t rows = (w->groups[g].sink_tokens + BLOCK - 1) / BLOCK;
    return rows == 0 && has_offset(w, g) ? 1 : rows;
}

size_t older(size_t n_tokens, uint64_t residual)
{
    return n_tokens > residual ? (size_t)((n_tokens - residual) / BLOCK) : 0;
}

static size_t rows_of_tokens(size_t n)
{
    return (n + BLOCK - 1) / BLOCK;
}

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* ---- windows ---- */

/* The highest position of the first n tokens; -1: there is none. */
static int64_t highest(const token *fed, size_t n)
{
    int64_t most = -1;
    for (size_t i = 0; i < n; i++)
        most = fed[i].position > most ? fed[i].position : most;
    return most;
}

/* The lowest position that a next token can have, after a truncate of up to `slack` tokens too. */
static int64_t lowest_query(const token *fed, size_t length, size_t slack)
{
    int64_t lowest = INT64_MAX;
    for (size_t n = length; n > 0 && n + slack >= length; n--)
        if (fed[n - 1].position + (int64_t)1 < lowest)
            lowest = fed[n - 1].position + (int64_t)1;
    return length > slack && lowest < INT64_MAX ? lowest : 0;
}

/* Blocks behind the sinks up to which nothing is in sight for that; sealed ones only. */
static void leave_out(const world *w, uint32_t g, form *f, const token *fed, size_t length,
                      size_t slack, size_t sealed)
{
    const kvt_group_config *group = &w->groups[g];
    size_t row = sink_rows(w, g), end = older(length, slack + (seals(w, g) ? w->residual[g] : 0));
    if (!group->window_tokens || length <= slack)
        return;
    if (seals(w, g))
        end = least(end, sealed);
    while (row < end && highest(fed, (row + 1) * BLOCK) <=
                            lowest_query(fed, length, slack) - (int64_t)group->window_tokens)
        row++;
    if (row > f->first && row > sink_rows(w, g))
        f->first = row;
}

/*
 * What a commit that leads to `length` releases: drafts that come and go leave what was in sight.
 */
static void release(const world *w, uint32_t g, form *f, const token *fed, size_t length)
{
    leave_out(w, g, f, fed, length, 2 * DRAFTS, f->final);
}

void forms_save(const world *w, form *forms, const token *fed, size_t length)
{
    for (uint32_t g = 0; g < w->n_groups; g++)
        leave_out(w, g, &forms[g], fed, length, DRAFTS, forms[g].sealed);
}

size_t first_needed(const world *w, uint32_t g, const token *fed, size_t length)
{
    form f = {0, 0, SIZE_MAX, 0, 0, SIZE_MAX};
    leave_out(w, g, &f, fed, length, DRAFTS, length / BLOCK);
    return f.first;
}

int is_there(const world *w, const member *m, uint32_t layer, size_t first, size_t n)
{
    uint32_t g = w->group_of_layer[layer];
    return n == 0 || first >= m->forms[g].first * BLOCK || first + n <= sink_rows(w, g) * BLOCK;
}

int is_in_sight(const world *w, const member *m, uint32_t layer, int32_t position, size_t index)
{
    const kvt_group_config *g = &w->groups[w->group_of_layer[layer]];
    return !g->window_tokens || index < g->sink_tokens ||
           (int64_t)position - m->tokens[index].position < (int64_t)g->window_tokens;
}

/* ---- forms ---- */

void forms_clear(form *forms)
{
    for (uint32_t g = 0; g < GROUPS; g++)
        forms[g] = (form){0, 0, SIZE_MAX, 0, 0, SIZE_MAX};
}

void forms_settle(const world *w, form *forms)
{
    for (uint32_t g = 0; g < w->n_groups; g++)
        forms[g].final = forms[g].sealed;
}

/* A block of 4-bit keys that a truncate has cut is open again. */
void forms_begin(const world *w, form *forms, size_t length)
{
    forms_settle(w, forms);
    for (uint32_t g = 0; g < w->n_groups; g++) {
        form *f = &forms[g];
        size_t row = length / BLOCK;
        if (w->groups[g].k_type != KVT_TYPE_I4 || length % BLOCK == 0 || f->sealed <= row ||
            f->fine >> row & 1)
            continue;
        f->sealed = f->final = f->reopened = row;
        f->marked = least(f->marked, row * BLOCK);
    }
}

static uint32_t bits_below(size_t n)
{
    return ((uint32_t)1 << n) - 1;
}

void forms_commit(const world *w, form *forms, const token *fed, size_t length, size_t n)
{
    for (uint32_t g = 0; g < w->n_groups; g++) {
        form *f = &forms[g];
        size_t due = older(length + n, w->residual[g]),
               final = older(length + n, w->residual[g] + DRAFTS);
        if (seals(w, g)) {
            if (length < BLOCK * f->sealed && length < f->marked)
                f->marked = length;
            for (; f->sealed < due; f->sealed++)
                f->fine |= (uint32_t)(f->sealed < w->fine_rows[g]) << f->sealed;
            f->final = final > f->final ? final : f->final;
            f->final = least(f->final, f->sealed);
        }
        release(w, g, f, fed, length + n);
    }
}

/* No more than there are tokens for. */
static void forms_shrink(const world *w, form *forms, size_t length)
{
    for (uint32_t g = 0; g < w->n_groups; g++) {
        form *f = &forms[g];
        f->sealed = least(f->sealed, rows_of_tokens(length));
        f->fine &= bits_below(f->sealed);
        f->final = least(f->final, f->sealed);
        if (rows_of_tokens(length) <= sink_rows(w, g))
            f->first = 0;
        if (f->reopened >= rows_of_tokens(length))
            f->reopened = SIZE_MAX;
        if (f->marked >= length)
            f->marked = SIZE_MAX;
    }
}

/* ---- lengths ---- */

const point *point_before(const member *m, size_t n)
{
    const point *found = NULL;
    for (size_t i = 0; i < m->n_points && m->points[i].n_tokens <= n; i++)
        found = &m->points[i];
    return found;
}

const point *point_at(const member *m, size_t n)
{
    const point *p = point_before(m, n);
    return p && p->n_tokens == n ? p : NULL;
}

int32_t model_next_position(const member *m)
{
    if (m->next_position >= 0)
        return m->next_position;
    return m->length ? m->tokens[m->length - 1].position + 1 : 0;
}

int model_reaches(const world *w, const member *m, size_t n)
{
    if (n == m->length || point_at(m, n))
        return 1;
    for (uint32_t g = 0; g < w->n_groups; g++) {
        size_t first = m->forms[g].first, rows = rows_of_tokens(n);
        if (first == 0 || rows <= sink_rows(w, g))
            continue;
        if (rows <= first ||
            highest(m->tokens, first * BLOCK) >
                m->tokens[n - 1].position + (int64_t)1 - (int64_t)w->groups[g].window_tokens)
            return 0;
    }
    return 1;
}

void model_truncate(const world *w, member *m, size_t n)
{
    const point *p = point_at(m, n);
    if (n == m->length && !p)
        return;
    if (n != m->length)
        m->next_position = p ? p->next_position : -1;
    if (p)
        memcpy(m->forms, p->forms, sizeof m->forms);
    for (uint32_t g = 0; !p && g < w->n_groups; g++) {
        form *f = &m->forms[g];
        size_t due = older(n, w->residual[g]);
        f->sealed = least(f->sealed, due > f->final ? due : f->final);
        f->fine &= bits_below(f->sealed);
    }
    m->length = n;
    if (n <= m->unkeyed)
        m->unkeyed = SIZE_MAX;
    if (!p)
        forms_shrink(w, m->forms, n);
    while (m->n_points && m->points[m->n_points - 1].n_tokens > n)
        m->n_points--;
}

/* ---- removals ---- */

static int32_t delta_of(const world *w, const member *m, size_t first, size_t n)
{
    return w->moves ? m->tokens[first + n].position - m->tokens[first].position : 0;
}

static kvt_status fits_windows(const world *w, const member *m, size_t first, int32_t delta)
{
    for (uint32_t g = 0; g < w->n_groups; g++) {
        size_t released = m->forms[g].first, before = least(first / BLOCK, released);
        if (released == 0)
            continue;
        if (first / BLOCK < sink_rows(w, g))
            return KVT_ERR_STATE;
        if (before > sink_rows(w, g) && delta &&
            highest(m->tokens, before * BLOCK) > lowest_query(m->tokens, m->length, DRAFTS) -
                                                     delta - (int64_t)w->groups[g].window_tokens)
            return KVT_ERR_STATE;
    }
    return KVT_OK;
}

kvt_status model_removes(const world *w, const member *m, size_t first, size_t n)
{
    int whole = first % BLOCK == 0 && n % BLOCK == 0;
    int32_t delta;
    if (m->pending)
        return KVT_ERR_STATE;
    if (n == 0 || first > m->length || n > m->length - first)
        return KVT_ERR_ARG;
    if (first + n == m->length)
        return model_reaches(w, m, first) ? KVT_OK : KVT_ERR_STATE;
    for (uint32_t g = 0; g < w->n_groups; g++) {
        const form *f = &m->forms[g];
        if (!whole && (f->sealed > first / BLOCK || f->first > first / BLOCK))
            return KVT_ERR_UNSUPPORTED;
        if (has_offset(w, g) && first < BLOCK && (whole ? w->residual[g] == 0 : m->length > BLOCK))
            return KVT_ERR_UNSUPPORTED;
    }
    delta = delta_of(w, m, first, n);
    for (size_t i = first + n; i < m->length; i++)
        if (m->tokens[i].position < delta)
            return KVT_ERR_STATE;
    if (m->next_position >= 0 && m->next_position < delta)
        return KVT_ERR_STATE;
    return fits_windows(w, m, first, delta);
}

/* How many of the removed blocks are before `end`. */
static size_t blocks_before(size_t first, size_t n, size_t end)
{
    size_t from = first / BLOCK, to = least((first + n) / BLOCK, end);
    return to > from ? to - from : 0;
}

void model_remove(const world *w, member *m, size_t first, size_t n)
{
    int whole = first % BLOCK == 0 && n % BLOCK == 0;
    int32_t delta = delta_of(w, m, first, n);
    for (uint32_t g = 0; g < w->n_groups; g++) {
        form *f = &m->forms[g];
        if (whole) {
            f->fine = (f->fine & bits_below(first / BLOCK)) | (f->fine >> (first + n) / BLOCK)
                                                                  << first / BLOCK;
            f->sealed -= blocks_before(first, n, f->sealed);
            if (f->reopened >= first / BLOCK && f->reopened != SIZE_MAX)
                f->reopened =
                    f->reopened < (first + n) / BLOCK ? SIZE_MAX : f->reopened - n / BLOCK;
            f->final -= blocks_before(first, n, f->final);
            f->first -= blocks_before(first, n, f->first);
            f->first = f->first > sink_rows(w, g) ? f->first : 0;
        }
        if (f->marked != SIZE_MAX && f->marked >= first)
            f->marked = f->marked >= first + n ? f->marked - n : first;
        if (has_offset(w, g) && (whole ? first < BLOCK : first == 0))
            f->marked = 0; /* the offset is still that of what was first */
    }
    memmove(m->tokens + first, m->tokens + first + n, (m->length - first - n) * sizeof *m->tokens);
    m->length -= n;
    for (size_t i = first; i < m->length; i++)
        m->tokens[i].position -= delta;
    forms_shrink(w, m->forms, m->length);
    m->next_position -= m->next_position >= 0 ? delta : 0;
    m->turned |= w->moves;
    m->unkeyed = least(m->unkeyed, first);
    while (m->n_points && m->points[m->n_points - 1].n_tokens > first)
        m->n_points--;
}

/* ---- straight builds, and bytes ---- */

int is_straight(const world *w, const member *m)
{
    form straight[GROUPS], forms[GROUPS];
    forms_clear(straight);
    forms_commit(w, straight, m->tokens, 0, m->length);
    memcpy(forms, m->forms, sizeof forms);
    forms_save(w, forms, m->tokens, m->length);
    forms_save(w, straight, m->tokens, m->length);
    for (uint32_t g = 0; g < w->n_groups; g++)
        if (forms[g].marked < m->length || forms[g].sealed != straight[g].sealed ||
            forms[g].first != straight[g].first || forms[g].fine != straight[g].fine)
            return 0;
    for (size_t i = 0; i < m->length; i++)
        if (m->tokens[i].key != m->tokens[i].position)
            return 0;
    return 1;
}

uint64_t model_bytes(const world *w, const member *m)
{
    size_t rows = rows_of_tokens(m->length);
    uint64_t sum = w->seq_bytes + rows * w->meta_bytes;
    for (uint32_t g = 0; g < w->n_groups; g++) {
        const form *f = &m->forms[g];
        size_t sealed = seals(w, g) ? f->sealed : rows;
        size_t released = f->first ? f->first - sink_rows(w, g) : 0;
        for (size_t row = 0; row < sealed; row++)
            if (row < sink_rows(w, g) || row >= sink_rows(w, g) + released)
                sum += f->fine >> row & 1 ? w->fine_bytes[g] : w->sealed_bytes[g];
        sum += (rows - sealed + f->sealed - f->final) * w->open_bytes[g];
        sum += f->reopened >= f->final && f->reopened < rows ? w->seed_bytes[g] : 0;
    }
    return sum;
}

uint64_t exempt_bytes(const world *w, const member *m)
{
    uint64_t sum = 0;
    for (uint32_t g = 0; g < w->n_groups && !m->reserves; g++)
        if (seals(w, g))
            sum += (m->pending ? w->residual[g] / BLOCK + 3 : 1) *
                   (w->open_bytes[g] + w->seed_bytes[g]);
    return sum;
}
