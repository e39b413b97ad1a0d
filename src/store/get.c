/*
 * kvt_prefix_get: the longest prefix that a store has, into an empty sequence.
 *
 * The length is chosen by which keys the store has, and its values are got, into blocks that no
 * sequence has yet. What turns out to be gone or damaged shortens the prefix, and what a window's
 * group then needs besides is got, too. At the end the blocks make a table, which the sequence
 * takes in one go, as a load does.
 *
 * With checkpoints the value of the deepest one comes first: it has the blocks that are not sealed
 * at its length, and says so which sealed ones are needed. Where they are not there, it is read no
 * further than its head.
 */
#include "src/store/stored.h"

#define NANOSECONDS_A_KB 200u /* of a value, read and verified: for the choice of threads */

typedef struct fetch {
    kvt_stored *p;
    kvt_snap_buffer staged; /* kvt_block *[n_rows][n_groups], NULL: not there */
    kvt_snap_buffer wants, keys, refused, taken;
    kvt_prefix_result result;
    /* A checkpoint's value: its blocks by rows are the ends of the groups' columns. */
    int has_checkpoint;
    kvt_value_head head;
    kvt_snap_buffer tail;          /* kvt_block *[tail_rows][n_groups] */
    size_t tail_from, tail_rows;   /* the first row of it */
    size_t sealed[KVT_MAX_GROUPS]; /* rows before those of the value */
    kvt_snap_buffer blob;
} fetch;

static kvt_block **staged_at(const fetch *f, size_t row, uint32_t group)
{
    return (kvt_block **)(void *)f->staged.data + kvt_stored_at(f->p, row, group);
}

static kvt_block **tail_at(const fetch *f, size_t row, uint32_t group)
{
    assert(row >= f->tail_from && row < f->tail_from + f->tail_rows);
    return (kvt_block **)(void *)f->tail.data + kvt_stored_at(f->p, row - f->tail_from, group);
}

static void drop_tail(fetch *f)
{
    for (size_t i = 0; i < f->tail_rows * f->p->cache->n_groups; i++)
        kvt_block_undo(f->p->cache, ((kvt_block **)(void *)f->tail.data)[i]);
    f->tail_rows = 0;
    f->has_checkpoint = 0;
}

static void release(fetch *f)
{
    const kvt_snap_context *context = &f->p->context;

    drop_tail(f);
    for (size_t i = 0; f->staged.data && i < f->p->n_rows * f->p->cache->n_groups; i++)
        kvt_block_undo(f->p->cache, ((kvt_block **)(void *)f->staged.data)[i]);
    kvt_snap_release(context, &f->staged);
    kvt_snap_release(context, &f->wants);
    kvt_snap_release(context, &f->keys);
    kvt_snap_release(context, &f->refused);
    kvt_snap_release(context, &f->taken);
    kvt_snap_release(context, &f->tail);
    kvt_snap_release(context, &f->blob);
}

/* ---- blocks ---- */

static kvt_status on_block(void *user, size_t i, const kvt_stored_got *got)
{
    fetch *f = user;
    const kvt_stored_want *want = (const kvt_stored_want *)(const void *)f->wants.data + i;

    assert(!*staged_at(f, want->row, want->group));
    *staged_at(f, want->row, want->group) = got->blocks[0];
    return KVT_OK;
}

/* Room for the most blocks that may be wanted. */
static kvt_status make_room(fetch *f)
{
    const kvt_stored *p = f->p;
    const size_t n = p->n_rows * p->cache->n_groups + 1;
    kvt_status status =
        kvt_snap_reserve(&p->context, &f->staged, 0, n * sizeof(kvt_block *), "a prefix's blocks");
    if (status == KVT_OK) {
        memset(f->staged.data, 0, n * sizeof(kvt_block *));
        status = kvt_snap_reserve(&p->context, &f->wants, 0, n * sizeof(kvt_stored_want),
                                  "a prefix's blocks");
    }
    if (status == KVT_OK)
        status = kvt_snap_reserve(&p->context, &f->keys, 0, n * sizeof(kvt_store_key),
                                  "a prefix's blocks");
    if (status == KVT_OK)
        status = kvt_snap_reserve(&p->context, &f->refused, 0, n, "a prefix's blocks");
    return status == KVT_OK ? kvt_snap_reserve(&p->context, &f->taken, 0, n, "a prefix's blocks")
                            : status;
}

typedef kvt_status take_value(void *user, size_t i, const kvt_stored_got *got);

/* Values that are got at once: those of a receiver are a run of the wants. */
typedef struct slice {
    kvt_stored_receiver r;
    size_t first;
    take_value *take;
    fetch *f;
    kvt_status status;
} slice;

static kvt_status take_of_slice(void *user, size_t i, const kvt_stored_got *got)
{
    const slice *s = user;
    return s->take(s->f, s->first + i, got);
}

static void run_slice(void *arg, size_t i)
{
    slice *s = (slice *)arg + i;
    s->status = kvt_stored_receive(&s->r);
}

/* How many receivers are worth it for n values. */
static size_t count_slices(const fetch *f, size_t n)
{
    kvt_cache *cache = f->p->cache;
    const uint64_t nanoseconds = n * (uint64_t)cache->class_bytes[0] / 1024 * NANOSECONDS_A_KB;
    size_t most = f->p->store->n_at_once, slices = 1;

    if (most > 1 && n > 1)
        slices = kvt_parallel_threads(&cache->parallel, nanoseconds);
    slices = slices < most ? slices : most;
    return slices < 1 ? 1 : slices < n ? slices : n;
}

/* Where slice i of n values begins. */
static size_t slice_at(size_t n, size_t n_slices, size_t i)
{
    const size_t more = n % n_slices;
    return i * (n / n_slices) + (i < more ? i : more);
}

/* Get n values by so many receivers at once. get_near: see kvt_stored_receiver. */
static kvt_status receive_slices(fetch *f, size_t n, size_t n_slices, take_value *take,
                                 kvt_store_get *get_near)
{
    const kvt_stored *p = f->p;
    kvt_status status;
    slice *slices;
    void *memory;
    size_t i;

    status = kvt_snap_alloc(&p->context, n_slices * sizeof *slices, "a prefix's values", &memory);
    if (status != KVT_OK)
        return status;
    slices = memory;
    for (i = 0; i < n_slices; i++) {
        slice *s = &slices[i];
        size_t here;
        s->first = slice_at(n, n_slices, i);
        here = slice_at(n, n_slices, i + 1) - s->first;
        kvt_stored_receiver_begin(&s->r, f->p,
                                  (const kvt_stored_want *)(const void *)f->wants.data + s->first,
                                  (const kvt_store_key *)(const void *)f->keys.data + s->first,
                                  here, f->refused.data + s->first, f->taken.data + s->first);
        s->r.on_value = take_of_slice;
        s->r.user = s;
        s->r.get_near = get_near;
        s->take = take;
        s->f = f;
    }
    kvt_parallel_run(&p->cache->parallel, run_slice, slices, n_slices, (uint32_t)n_slices);
    for (i = 0; i < n_slices; i++) {
        slice *s = &slices[i];
        if (s->status != KVT_OK && status == KVT_OK)
            status = s->r.status != KVT_OK ? s->status
                                           : kvt_stored_store_failed(p, s->status, &s->r.error);
        f->result.n_values += s->r.n_values;
        f->result.n_bytes += s->r.n_bytes;
        kvt_stored_receiver_end(&s->r);
    }
    kvt_snap_free(&p->context, memory, n_slices * sizeof *slices);
    return status;
}

/* Move the wants that were not taken to the front: how many they are. */
static size_t keep_missing(fetch *f, size_t n)
{
    kvt_stored_want *wants = (kvt_stored_want *)(void *)f->wants.data;
    kvt_store_key *keys = (kvt_store_key *)(void *)f->keys.data;
    size_t n_left = 0;

    for (size_t i = 0; i < n; i++)
        if (!f->taken.data[i]) {
            wants[n_left] = wants[i];
            keys[n_left++] = keys[i];
        }
    return n_left;
}

/*
 * Get the n values that are wanted. The cache's threads, which other calls need, do not wait for
 * the farther one of two stores: what the nearer one has not got comes in a second pass, on this
 * thread. wants[n] are all of those that were not got then, and others that were.
 */
static kvt_status receive(fetch *f, size_t n, take_value *take)
{
    kvt_store_get *get_near = kvt_store_get_near(f->p->store);
    size_t n_slices = n ? count_slices(f, n) : 0, n_left = n;
    kvt_status status = KVT_OK;

    if (n_slices > 1 && get_near) {
        status = receive_slices(f, n, n_slices, take, get_near);
        n_left = status == KVT_OK ? keep_missing(f, n) : 0;
        n_slices = 1;
    }
    if (n_left)
        status = receive_slices(f, n_left, n_slices, take, NULL);
    for (size_t i = 0; i < n_left; i++)
        f->result.n_refused += f->refused.data[i];
    return status;
}

static int is_wanted(const fetch *f, size_t row, uint32_t g, const size_t *sealed,
                     const size_t *first)
{
    return row < sealed[g] && kvt_stored_needs(f->p, g, first[g], row) && !*staged_at(f, row, g);
}

/*
 * Get the blocks that a sequence of n_tokens needs of the first sealed[g] rows of each group and
 * that are not there yet. *all 0: some could not be had, and count as not found from now on.
 */
static kvt_status get_blocks(fetch *f, uint64_t n_tokens, const size_t *sealed, int *all)
{
    kvt_stored *p = f->p;
    kvt_stored_want *wants = (kvt_stored_want *)(void *)f->wants.data;
    kvt_store_key *keys = (kvt_store_key *)(void *)f->keys.data;
    size_t first[KVT_MAX_GROUPS], n = 0, n_slices, rows = 0;
    kvt_status status;

    for (uint32_t g = 0; g < p->cache->n_groups; g++) {
        first[g] = kvt_stored_first(p, g, n_tokens);
        rows = sealed[g] > rows ? sealed[g] : rows;
    }
    for (size_t row = 0; row < rows; row++)
        for (uint32_t g = 0; g < p->cache->n_groups; g++)
            n += (size_t)is_wanted(f, row, g, sealed, first);
    n_slices = n ? count_slices(f, n) : 1;
    for (size_t row = 0, i = 0; row < rows; row++)
        for (uint32_t g = 0; g < p->cache->n_groups; g++)
            if (is_wanted(f, row, g, sealed, first)) {
                /* Each slice has values of the whole prefix: all are used as long ago. */
                const size_t to = slice_at(n, n_slices, i % n_slices) + i / n_slices;
                wants[to].n_tokens = ((uint64_t)row + 1) * KVT_TOKENS;
                wants[to].row = row;
                wants[to].group = g;
                keys[to] = kvt_stored_keys(p)[kvt_stored_at(p, row, g)];
                i++;
            }
    status = receive(f, n, on_block);
    *all = 1;
    for (size_t i = 0; i < n; i++)
        if (!*staged_at(f, wants[i].row, wants[i].group)) {
            p->found.data[kvt_stored_at(p, wants[i].row, wants[i].group)] = 0;
            *all = 0;
        }
    return status;
}

/* The longest prefix of whole rows: *n_tokens of it are there. */
static kvt_status get_rows(fetch *f, uint64_t *n_tokens)
{
    size_t sealed[KVT_MAX_GROUPS], rows;
    kvt_status status = KVT_OK;
    int all = 0;

    do {
        rows = kvt_stored_longest(f->p);
        for (uint32_t g = 0; g < f->p->cache->n_groups; g++)
            sealed[g] = rows;
        if (rows == 0)
            break;
        status = get_blocks(f, rows * (uint64_t)KVT_TOKENS, sealed, &all);
    } while (status == KVT_OK && !all);
    *n_tokens = rows * (uint64_t)KVT_TOKENS;
    return status;
}

/* ---- checkpoints ---- */

static kvt_status on_checkpoint(void *user, size_t i, const kvt_stored_got *got)
{
    fetch *f = user;
    const kvt_cache *cache = f->p->cache;
    const size_t rows = kvt_rows(got->head.n_tokens);
    size_t from = rows, n;
    kvt_status status;

    (void)i;
    memcpy(f->sealed, got->sealed, sizeof f->sealed);
    for (uint32_t g = 0; g < cache->n_groups; g++)
        from = f->sealed[g] < from ? f->sealed[g] : from;
    n = (rows - from) * cache->n_groups;
    status = kvt_snap_reserve(&f->p->context, &f->tail, 0, n * sizeof(kvt_block *) + 1,
                              "a stored checkpoint");
    if (status == KVT_OK)
        status = kvt_snap_reserve(&f->p->context, &f->blob, 0, (size_t)got->head.blob_bytes + 1,
                                  "a stored checkpoint");
    if (status != KVT_OK)
        return status;
    memset(f->tail.data, 0, n * sizeof(kvt_block *));
    f->tail_from = from;
    f->tail_rows = rows - from;
    for (n = 0; n < got->head.n_entries; n++)
        *tail_at(f, (size_t)got->entries[n].row, got->entries[n].group) = got->blocks[n];
    if (got->head.blob_bytes)
        memcpy(f->blob.data, got->blob, (size_t)got->head.blob_bytes);
    f->head = got->head;
    f->has_checkpoint = 1;
    return KVT_OK;
}

/* The deepest checkpoint of which all is there. */
static kvt_status get_checkpoint(fetch *f, uint64_t *n_tokens)
{
    kvt_stored_want *want = (kvt_stored_want *)(void *)f->wants.data;
    kvt_stored_search search;
    kvt_status status = kvt_stored_search_begin(&search, f->p);
    int all = 0;

    while (status == KVT_OK && !all) {
        drop_tail(f);
        status = kvt_stored_search_next(&search, n_tokens, (kvt_store_key *)(void *)f->keys.data);
        if (status != KVT_OK || *n_tokens == 0)
            break;
        memset(want, 0, sizeof *want);
        want->n_tokens = *n_tokens;
        want->group = UINT32_MAX;
        status = receive(f, 1, on_checkpoint);
        if (status == KVT_OK && f->has_checkpoint)
            status = get_blocks(f, *n_tokens, f->sealed, &all);
    }
    kvt_stored_search_end(&search);
    return status;
}

/* ---- the sequence ---- */

/* A row of the table: its blocks are moved there, and one of positions and ids is made. */
static kvt_status move_row(fetch *f, kvt_seq *made, const size_t *first, size_t row)
{
    kvt_cache *cache = f->p->cache;
    const size_t n = kvt_snap_row_tokens(made->length, row);
    kvt_meta *meta;
    kvt_status status;

    made->n_rows = row + 1;
    status = kvt_rows_lend(f->p->takes, cache->n_groups, kvt_seq_entry(made, row, cache->n_groups));
    if (status != KVT_OK)
        return status;
    for (uint32_t g = 0; g < cache->n_groups; g++) {
        const int is_tail = f->has_checkpoint && row >= f->sealed[g];
        kvt_block **from = is_tail ? tail_at(f, row, g) : staged_at(f, row, g);
        if (!is_tail && !kvt_stored_needs(f->p, g, first[g], row))
            continue; /* got for a longer prefix: there may be none between it and the others */
        *kvt_seq_entry(made, row, g) = *from;
        *from = NULL;
    }
    meta = kvt_seq_meta(made, row);
    kvt_stored_tokens(f->p, row, n, meta->token_ids, meta->positions);
    meta->shift = 0;
    kvt_meta_bound(meta, n, row > 0 ? kvt_seq_meta(made, row - 1) : NULL);
    return KVT_OK;
}

/*
 * The sequence becomes what has been got. All that can fail comes before the exchange: the new
 * checkpoint, too, is of what is made. One at 0 is the sequence's own, and stays.
 */
static kvt_status take_over(fetch *f, kvt_seq *seq, uint64_t n_tokens)
{
    kvt_cache *cache = f->p->cache;
    const size_t rows = kvt_rows(n_tokens);
    size_t first[KVT_MAX_GROUPS];
    kvt_snap_buffer table = {NULL, 0};
    kvt_seq *made;
    void *memory;
    kvt_status status = kvt_snap_alloc(&f->p->context, sizeof *made, "a prefix's staging", &memory);

    if (status != KVT_OK)
        return status;
    made = memory;
    memset(made, 0, sizeof *made);
    made->cache = cache;
    made->length = n_tokens;
    made->next_position = f->has_checkpoint ? f->head.next_position : -1;
    status = kvt_snap_reserve(&f->p->context, &table, 0,
                              rows * cache->n_columns * sizeof *made->table, "a prefix's staging");
    if (status == KVT_OK) {
        made->table = (kvt_block **)(void *)table.data;
        memset(made->table, 0, rows * cache->n_columns * sizeof *made->table);
    }
    for (uint32_t g = 0; g < cache->n_groups; g++)
        first[g] = kvt_stored_first(f->p, g, n_tokens);
    for (size_t row = 0; row < rows && status == KVT_OK; row++)
        status = move_row(f, made, first, row);
    if (status == KVT_OK) {
        kvt_rows_state(made);
        if (!kvt_window_suffices(made, n_tokens))
            status = kvt_fail(cache, KVT_ERR_CORRUPT, "%s: blocks that a window needs are missing",
                              f->p->call);
    }
    if (status == KVT_OK)
        status = kvt_checkpoints_share(seq, 0, made);
    if (status == KVT_OK && f->has_checkpoint)
        status = kvt_seq_checkpoint(made, f->blob.data, (size_t)f->head.blob_bytes);
    if (status == KVT_OK) {
        kvt_checkpoints_drop_from(seq, 0);
        kvt_turns_free(cache, seq->turns);
        seq->turns = NULL;
        kvt_rows_replace(seq, made);
    }
    if (status != KVT_OK)
        kvt_checkpoints_drop_from(made, 0);
    for (size_t i = 0; status != KVT_OK && i < made->n_rows * cache->n_columns; i++)
        kvt_block_undo(cache, made->table[i]);
    kvt_snap_release(&f->p->context, &table);
    kvt_snap_free(&f->p->context, memory, sizeof *made);
    return status;
}

kvt_status kvt_prefix_get(const kvt_store *store, kvt_seq *seq, const int32_t *prompt,
                          uint64_t n_prompt, const kvt_prefix_options *options,
                          kvt_prefix_result *result)
{
    kvt_stored p;
    fetch f;
    uint64_t n_tokens = 0;
    kvt_status status = kvt_stored_admit(&p, "kvt_prefix_get", store, seq, options);

    if (!seq)
        return status;
    memset(&f, 0, sizeof f);
    f.p = &p;
    p.takes = seq;
    if (status == KVT_OK && (seq->length || seq->pending))
        status = kvt_fail(seq->cache, KVT_ERR_STATE, "kvt_prefix_get: %s",
                          seq->pending ? "a step is pending" : "the sequence is not empty");
    if (status == KVT_OK)
        status = kvt_stored_begin(&p, prompt, n_prompt);
    if (status == KVT_OK && !p.options.checkpoints)
        status = kvt_stored_find(&p);
    if (status == KVT_OK)
        status = make_room(&f);
    if (status == KVT_OK)
        status = p.options.checkpoints ? get_checkpoint(&f, &n_tokens) : get_rows(&f, &n_tokens);
    if (status == KVT_OK && n_tokens)
        status = take_over(&f, seq, n_tokens);
    if (status == KVT_OK && result) {
        f.result.n_tokens = n_tokens;
        *result = f.result;
    }
    release(&f);
    kvt_rows_settle(seq, status == KVT_OK && n_tokens);
    kvt_stored_release(&p);
    return status;
}
