/*
 * Commit some of a pending step's tokens: the accepted path of a draft tree. And move tokens up
 * among open rows, for kvt_seq_remove.
 *
 * The sequence has to be, bit for bit, the one that was given these tokens alone. A row of a block
 * depends on its token and on the offset it is stored with, so it is moved as it is where both
 * places have the same offset:
 *
 *   open to open       the blocks of a step have the offset of the one that it begins in, which is
 *                      block 0's mean or what a file has, and block 0 its first key, which stays:
 *                      rows move, f16 and power of two. But where the step itself fills block 0,
 *                      and the selection with other tokens, that has another mean: tokens from 64
 *                      on are put again from their keys (border.c)
 *   sealed to sealed   within the block that the step begins in, if a truncate has cut it: i8 moves
 *   open to sealed     out of the block behind that one: quantized as append would have
 *
 * Moves go to the front, so that they are done in place in ascending order. What the step has
 * sealed of older tokens stays; a block that rows were moved into is sealed again, and what is not
 * old enough at the length that is reached is not sealed at all.
 *
 * A step of more than KVT_SELECT_TOKENS tokens may have sealed rows without an open form: with an
 * i8 side nothing is selected from it.
 *
 * The open blocks that kvt_seq_remove moves tokens between have the same offset, too, where appends
 * have made them. What a load has converted (convert.c), or a file has, may be otherwise: there a
 * row of K is put again from what it stands for, unless it is one without the offset.
 */
#include "src/cache/cache.h"
#include "src/fpenv.h"

/* Token base + source(j) goes to base + j, for j from `first` to n - 1. */
typedef struct select_job {
    kvt_seq *seq;
    const uint64_t *indices; /* NULL: all are `gap` behind their place */
    uint64_t n, first;       /* indices[first] is the first that is not its own place */
    uint64_t base, gap;
} select_job;

static uint64_t source(const select_job *job, uint64_t j)
{
    return job->indices ? job->indices[j] : j + job->gap;
}

/* One head's K or V. */
typedef struct select_side {
    const select_job *job;
    const kvt_group *group;
    uint32_t group_index;
    size_t layer_index, head;
    kvt_side side;
    kvt_type type; /* that the group stores */
    size_t dims, dims_p;
} select_side;

static kvt_record record_of(const select_side *s, const kvt_block *block)
{
    return kvt_record_of(s->group, block, s->side, s->layer_index, s->head);
}

/* ---- moves ---- */

/* Tokens of one block that go to one block, at most 64. */
typedef struct moves {
    size_t to_row, from_row;
    size_t n;
    size_t from[KVT_TOKENS], to[KVT_TOKENS]; /* slots */
} moves;

/* Runs of `elements` elements, `stride` elements apart: K's dims of a token, V's in one run. */
#define MOVE_STRIDED(name, type)                                                                   \
    static void name(type *to, const type *from, const size_t *to_at, const size_t *from_at,       \
                     size_t n, size_t stride, size_t count)                                        \
    {                                                                                              \
        for (size_t c = 0; c < count; c++, to += stride, from += stride)                           \
            for (size_t i = 0; i < n; i++)                                                         \
                to[to_at[i]] = from[from_at[i]];                                                   \
    }
MOVE_STRIDED(move_8, uint8_t)
MOVE_STRIDED(move_16, uint16_t)
MOVE_STRIDED(move_32, uint32_t)
MOVE_STRIDED(move_f32, float)

/* One code of V of 4 or 5 bits. */
static void move_coarse(kvt_type type, uint8_t *to, size_t to_token, const uint8_t *from,
                        size_t from_token, size_t d, size_t dims_p)
{
    kvt_put_bits(to + kvt_v4_index(to_token, d, dims_p), kvt_v4_shift(to_token), 15u,
                 (unsigned)from[kvt_v4_index(from_token, d, dims_p)] >> kvt_v4_shift(from_token) &
                     15u);
    if (type == KVT_TYPE_I5)
        kvt_put_bits(to + kvt_v5_index(to_token, d, dims_p), kvt_v5_shift(to_token, d), 1u,
                     (unsigned)from[kvt_v5_index(from_token, d, dims_p)] >>
                             kvt_v5_shift(from_token, d) &
                         1u);
}

/* Codes of the same type in both blocks, by the order of a tile (tile.h). */
static void move_codes(const select_side *s, kvt_type type, void *to, const void *from,
                       const moves *m)
{
    size_t to_at[KVT_TOKENS], from_at[KVT_TOKENS];
    const int is_k = s->side == KVT_SIDE_K;
    assert(!(is_k && type == KVT_TYPE_I4)); /* begin has opened a block that was cut */
    if (kvt_is_coarse(type)) {
        for (size_t i = 0; i < m->n; i++)
            for (size_t d = 0; d < s->dims; d++)
                move_coarse(type, to, m->to[i], from, m->from[i], d, s->dims_p);
        return;
    }
    if (type != KVT_TYPE_I8 && !is_k) {
        const size_t bytes = kvt_element_bytes(type);
        for (size_t i = 0; i < m->n; i++)
            memcpy((unsigned char *)to + kvt_vw_index(m->to[i], 0, s->dims_p) * bytes,
                   (const unsigned char *)from + kvt_vw_index(m->from[i], 0, s->dims_p) * bytes,
                   s->dims * bytes);
        return;
    }
    for (size_t i = 0; i < m->n; i++) {
        size_t (*index)(size_t, size_t, size_t) = !is_k                 ? kvt_v8_index
                                                  : type == KVT_TYPE_I8 ? kvt_k8_index
                                                                        : kvt_kw_index;
        to_at[i] = index(m->to[i], 0, s->dims_p);
        from_at[i] = index(m->from[i], 0, s->dims_p);
        if (is_k && type == KVT_TYPE_I8) { /* 4 dims at once */
            to_at[i] /= 4;
            from_at[i] /= 4;
        }
    }
    if (type == KVT_TYPE_F16)
        move_16(to, from, to_at, from_at, m->n, KVT_TILE_TOKENS, s->dims);
    else if (type == KVT_TYPE_F32)
        move_f32(to, from, to_at, from_at, m->n, KVT_TILE_TOKENS, s->dims);
    else if (is_k)
        move_32(to, from, to_at, from_at, m->n, KVT_TILE_TOKENS, s->dims / 4);
    else
        move_8(to, from, to_at, from_at, m->n, 4, s->dims);
}

/* Whether rows of K in two open records are less another offset. */
static int offsets_differ(const select_side *s, const kvt_record *a, const kvt_record *b)
{
    return a->offset && memcmp(a->offset, b->offset, s->dims * sizeof *a->offset) != 0;
}

/* A row of K as it is to be put again. 0: it has no offset, and needs not. */
static int row_of_k(const select_side *s, const kvt_record *from, size_t slot, float *x)
{
    const kvt_kernels *kernels = &s->job->seq->cache->kernels;
    float offset[KVT_MAX_DIM];
    if (from->scales[slot] & KVT_F16_MINUS)
        return 0;
    kernels->get_k_f16(from->codes, NULL, slot, s->dims, s->dims_p, x);
    (void)kernels->load_f16(from->offset, offset, s->dims);
    for (size_t d = 0; d < s->dims; d++)
        x[d] = x[d] * kvt_f16_to_f32(from->scales[slot]) + offset[d];
    return 1;
}

/* Rows of K that have been moved as they were, to where the offset is another one. */
static void put_again(const select_side *s, const kvt_record *to, const kvt_record *from,
                      const moves *m)
{
    const kvt_record plain = {to->codes, to->scales, to->offset, NULL}; /* the seed stays */
    float x[KVT_MAX_DIM];
    for (size_t i = 0; i < m->n; i++)
        if (row_of_k(s, from, m->from[i], x)) {
            int stored = kvt_open_put(&s->job->seq->cache->kernels, s->group, KVT_SIDE_K, x, 1,
                                      s->dims, &plain, m->to[i]);
            assert(stored); /* check_head */
            (void)stored;
        }
}

static void move_rows(const select_side *s, const moves *m)
{
    const kvt_seq *seq = s->job->seq;
    const kvt_block *to_block = kvt_seq_block(seq, m->to_row, s->group_index);
    const kvt_block *from_block = kvt_seq_block(seq, m->from_row, s->group_index);
    const kvt_layout *layout = kvt_block_layout(s->group, to_block);
    const kvt_record to = record_of(s, to_block), from = record_of(s, from_block);
    float x[KVT_MAX_DIM];

    if (kvt_is_sealed_type(s->type) && !kvt_is_open(to_block->form) &&
        to_block->form != from_block->form) {
        for (size_t i = 0; i < m->n; i++)
            kvt_sealed_put(&seq->cache->kernels, s->group, s->side, to_block->form, &from,
                           m->from[i], 1, x, &to, m->to[i]);
        return;
    }
    move_codes(s, s->side == KVT_SIDE_K ? layout->k_type : layout->v_type, to.codes, from.codes, m);
    for (size_t i = 0; i < m->n && to.scales; i++)
        to.scales[m->to[i]] = from.scales[m->from[i]];
    if (offsets_differ(s, &to, &from))
        put_again(s, &to, &from, m);
    assert(to.seed || !from.seed); /* rows before one that is open again are sealed */
    for (size_t i = 0; i < m->n && to.seed; i++)
        kvt_seed_gains(to.seed, s->dims_p)[m->to[i]] =
            from.seed ? kvt_seed_gains(from.seed, s->dims_p)[m->from[i]] : 0;
}

/* Of tokens j .. end - 1 the first ones that all go from one block to one; the next j. */
static uint64_t next_moves(const select_job *job, uint64_t j, uint64_t end, moves *m)
{
    const uint64_t base = job->base;
    m->to_row = (size_t)((base + j) / KVT_TOKENS);
    m->from_row = (size_t)((base + source(job, j)) / KVT_TOKENS);
    for (m->n = 0; j < end; j++, m->n++) {
        const uint64_t to = base + j, from = base + source(job, j);
        if (to / KVT_TOKENS != m->to_row || from / KVT_TOKENS != m->from_row)
            break;
        m->to[m->n] = (size_t)(to % KVT_TOKENS);
        m->from[m->n] = (size_t)(from % KVT_TOKENS);
    }
    return j;
}

/* Move selected tokens j .. end - 1, as they are. */
static void move_tokens(const select_side *s, uint64_t j, uint64_t end)
{
    moves m;
    while (j < end) {
        j = next_moves(s->job, j, end, &m);
        move_rows(s, &m);
    }
}

/* ---- the border of block 0 ---- */

/* Whether block 0, which the pending step fills, gets other tokens than it has now. */
static int changes_border(const select_job *job)
{
    return job->seq->n_border && job->seq->length + job->first < KVT_TOKENS;
}

/* The first selected token that is from block 1. */
static uint64_t first_beyond(const select_job *job)
{
    uint64_t j = job->first;
    while (j < job->n && job->seq->length + job->indices[j] < KVT_TOKENS)
        j++;
    return j;
}

#define ROWS_FLOATS 8192

/* Put selected tokens from the j-th on again, which are from block 1, from their keys. */
static void put_beyond(const select_side *s, const float *keys, uint64_t j)
{
    const select_job *job = s->job;
    const kvt_seq *seq = job->seq;
    const kvt_kernels *kernels = &seq->cache->kernels;
    const size_t most = ROWS_FLOATS / s->dims;
    const kvt_record zero = record_of(s, kvt_seq_block(seq, 0, s->group_index));
    float buffer[ROWS_FLOATS];

    while (j < job->n) {
        const size_t token = (size_t)(seq->length + j), slot = token % KVT_TOKENS;
        const kvt_record to = record_of(s, kvt_seq_block(seq, token / KVT_TOKENS, s->group_index));
        size_t part = KVT_TILE_TOKENS - slot % KVT_TILE_TOKENS;
        int stored;
        part = part < most ? part : most;
        part = part < job->n - j ? part : (size_t)(job->n - j);
        if (token == KVT_TOKENS) /* block 0 is there */
            kvt_seal_offset(kernels, s->group, kvt_sealed_form(s->group, 0), &zero, to.offset);
        for (size_t i = 0; i < part; i++) {
            const size_t index = (size_t)(seq->length + job->indices[j + i] - KVT_TOKENS);
            memcpy(buffer + i * s->dims, keys + index * s->dims, s->dims * sizeof *buffer);
        }
        stored = kvt_open_put(kernels, s->group, s->side, buffer, part, s->dims, &to, slot);
        assert(stored); /* check_border */
        (void)stored;
        j += part;
    }
}

/*
 * A key that was stored less one offset could be too large less another: none is while it is
 * smaller than kvt_largest by the largest f16.
 */
static kvt_status check_border(const select_job *job)
{
    const kvt_seq *seq = job->seq;
    const kvt_cache *cache = seq->cache;
    const uint64_t beyond = first_beyond(job);
    if (!changes_border(job))
        return KVT_OK;
    for (uint32_t layer = 0; layer < cache->n_layers; layer++) {
        const uint32_t g = cache->layers[layer].group;
        const kvt_group_config *config = &cache->groups[g].config;
        const uint32_t limit = kvt_f32_bits(kvt_largest(KVT_SIDE_K, config->k_type) - 65504.0f);
        for (size_t head = 0; head < config->n_kv_heads; head++) {
            const float *keys = kvt_border_keys(seq, g, cache->layers[layer].index, head);
            uint32_t outside = 0;
            for (uint64_t j = beyond; keys && j < job->n; j++) {
                const float *key =
                    keys + (size_t)(seq->length + job->indices[j] - KVT_TOKENS) * config->k_dim;
                for (size_t d = 0; d < config->k_dim; d++)
                    outside |= (kvt_f32_bits(key[d]) & 0x7fffffffu) > limit;
            }
            if (outside)
                return kvt_fail(cache, KVT_ERR_VALUE,
                                "kvt_seq_commit_selected: layer %u, kv head %zu: a key is too "
                                "large to be stored with another offset",
                                layer, head);
        }
    }
    return KVT_OK;
}

/* ---- a layer ---- */

/* Seal again what tokens were moved into. */
static void seal_again(const select_side *s)
{
    const select_job *job = s->job;
    const kvt_seq *seq = job->seq;
    const kvt_seq_group *state = &seq->groups[s->group_index];
    size_t row = (size_t)((seq->length + job->first) / KVT_TOKENS);
    for (row = row > state->n_sealed ? row : state->n_sealed; row < state->seal_end; row++) {
        const kvt_block *block = kvt_seq_block(seq, row, s->group_index);
        const kvt_block *to = kvt_seq_block(seq, row, kvt_beside(seq->cache, s->group_index));
        const kvt_record open = record_of(s, block), sealed = record_of(s, to);
        assert(kvt_is_open(block->form) && !to->twin); /* no other sequence has it yet */
        kvt_seal(&seq->cache->kernels, s->group, s->side, to->form, &open, NULL, &sealed);
    }
}

static void select_head(select_side *s, kvt_side side)
{
    const select_job *job = s->job;
    const kvt_layout *layout = &s->group->layouts[KVT_SEALED];
    const int is_k = side == KVT_SIDE_K;
    const float *keys = NULL;

    s->side = side;
    s->type = is_k ? s->group->config.k_type : s->group->config.v_type;
    s->dims = is_k ? s->group->config.k_dim : s->group->config.v_dim;
    s->dims_p = is_k ? layout->k_dims : layout->v_dims;
    if (is_k && changes_border(job))
        keys = kvt_border_keys(job->seq, s->group_index, s->layer_index, s->head);
    if (keys) {
        const uint64_t beyond = first_beyond(job);
        move_tokens(s, job->first, beyond);
        put_beyond(s, keys, beyond);
    } else {
        move_tokens(s, job->first, job->n);
    }
    seal_again(s);
}

static void select_layer(void *arg, size_t layer)
{
    const select_job *job = arg;
    const kvt_cache *cache = job->seq->cache;
    select_side s = {.job = job, .group_index = cache->layers[layer].group};
    kvt_fpenv saved = kvt_fpenv_enter();
    s.group = &cache->groups[s.group_index];
    s.layer_index = cache->layers[layer].index;
    for (s.head = 0; s.head < s.group->config.n_kv_heads; s.head++) {
        select_head(&s, KVT_SIDE_K);
        if (!s.group->v_in_k)
            select_head(&s, KVT_SIDE_V);
    }
    kvt_fpenv_leave(saved);
}

/* About how many nanoseconds one thread takes: one for each element moved, or sealed. */
static uint64_t cost(const select_job *job)
{
    const kvt_seq *seq = job->seq;
    uint64_t total = 0;
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        const kvt_group_config *config = &seq->cache->groups[g].config;
        const kvt_seq_group *state = &seq->groups[g];
        uint64_t tokens = job->n - job->first;
        tokens += (state->seal_end - state->n_sealed) * (uint64_t)KVT_TOKENS;
        total += tokens * config->n_layers * config->n_kv_heads * (config->k_dim + config->v_dim);
    }
    return total;
}

static void run(select_job *job)
{
    kvt_parallel *parallel = &job->seq->cache->parallel;
    kvt_parallel_run(parallel, select_layer, job, job->seq->cache->n_layers,
                     kvt_parallel_threads(parallel, cost(job)));
}

/* Whether each row of K of one head can be put again where it has to be. */
static int check_head(const select_side *s)
{
    _Alignas(64) uint16_t codes[KVT_TILE_TOKENS * KVT_MAX_DIM], scale;
    const kvt_seq *seq = s->job->seq;
    float x[KVT_MAX_DIM];
    moves m;

    for (uint64_t j = 0; j < s->job->n;) {
        kvt_record to, from, tried = {codes, &scale, NULL, NULL};
        j = next_moves(s->job, j, s->job->n, &m);
        to = record_of(s, kvt_seq_block(seq, m.to_row, s->group_index));
        from = record_of(s, kvt_seq_block(seq, m.from_row, s->group_index));
        tried.offset = to.offset;
        for (size_t i = 0; i < m.n && offsets_differ(s, &to, &from); i++)
            if (row_of_k(s, &from, m.from[i], x) &&
                !kvt_open_put(&seq->cache->kernels, s->group, KVT_SIDE_K, x, 1, s->dims, &tried, 0))
                return 0;
    }
    return 1;
}

kvt_status kvt_rows_check_move_up(const kvt_seq *seq, uint64_t first, uint64_t gap)
{
    const kvt_cache *cache = seq->cache;
    const select_job job = {
        (kvt_seq *)(uintptr_t)seq, NULL, seq->length - first - gap, 0, first, gap};
    kvt_status status = KVT_OK;

    for (uint32_t layer = 0; status == KVT_OK && layer < cache->n_layers; layer++) {
        const uint32_t g = cache->layers[layer].group;
        const kvt_group *group = &cache->groups[g];
        select_side s = {&job, group, g, cache->layers[layer].index, 0, KVT_SIDE_K, 0, 0, 0};
        kvt_fpenv saved;
        int fits = 1;
        if (!group->offsets)
            continue;
        s.type = group->config.k_type;
        s.dims = group->config.k_dim;
        s.dims_p = group->layouts[KVT_SEALED].k_dims;
        saved = kvt_fpenv_enter();
        for (; fits && s.head < group->config.n_kv_heads; s.head++)
            fits = check_head(&s);
        kvt_fpenv_leave(saved);
        if (!fits)
            status = kvt_fail(cache, KVT_ERR_UNSUPPORTED,
                              "kvt_seq_remove: layer %u, kv head %zu: a key is too large to be "
                              "stored with the offset of the block that it would move to",
                              layer, s.head - 1);
    }
    return status;
}

void kvt_rows_move_up(kvt_seq *seq, uint64_t first, uint64_t gap)
{
    select_job job = {seq, NULL, seq->length - first - gap, 0, first, gap};
    assert(seq->pending == 0);
    run(&job);
}

/* ---- the call ---- */

static kvt_status check_indices(const kvt_seq *seq, const uint64_t *indices, uint64_t n,
                                const int32_t *token_ids)
{
    if (n > seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_commit_selected: %llu of %llu tokens",
                        (unsigned long long)n, (unsigned long long)seq->pending);
    for (uint64_t j = 0; j < n; j++) {
        if (indices[j] >= seq->pending || (j && indices[j] <= indices[j - 1]))
            return kvt_fail(seq->cache, KVT_ERR_ARG,
                            "kvt_seq_commit_selected: index %llu at %llu is not ascending, or not "
                            "below %llu",
                            (unsigned long long)indices[j], (unsigned long long)j,
                            (unsigned long long)seq->pending);
        if (token_ids && token_ids[j] < KVT_TOKEN_NONE)
            return kvt_fail(seq->cache, KVT_ERR_ARG,
                            "kvt_seq_commit_selected: token id %ld of token %llu",
                            (long)token_ids[j], (unsigned long long)j);
    }
    return KVT_OK;
}

/* What the stored form allows. */
static kvt_status check_forms(const select_job *job)
{
    const kvt_seq *seq = job->seq;
    int seals = 0, offsets = 0;
    for (uint32_t g = 0; g < seq->cache->n_groups; g++) {
        seals |= (int)seq->cache->groups[g].seals;
        offsets |= (int)seq->cache->groups[g].offsets;
    }
    if (seals && seq->pending > KVT_SELECT_TOKENS)
        return kvt_fail(seq->cache, KVT_ERR_STATE,
                        "kvt_seq_commit_selected: a step of %llu tokens is too long to select from "
                        "where K or V is i8, i4 or i5: at most %d",
                        (unsigned long long)seq->pending, KVT_SELECT_TOKENS);
    if (offsets && seq->length == 0 && job->first == 0)
        return kvt_fail(seq->cache, KVT_ERR_ARG,
                        "kvt_seq_commit_selected: the step's first token is left out, and the "
                        "sequence is empty: its key is the offset of the others");
    return check_border(job);
}

kvt_status kvt_seq_commit_selected(kvt_seq *seq, const uint64_t *indices, uint64_t n,
                                   const int32_t *token_ids)
{
    select_job job = {seq, indices, n, 0, 0, 0};
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    job.base = seq->length;
    if (n == 0)
        return kvt_seq_abort(seq);
    if (!indices)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_commit_selected: indices is NULL");
    status = kvt_seq_check_appended(seq, "kvt_seq_commit_selected");
    if (status == KVT_OK)
        status = check_indices(seq, indices, n, token_ids);
    if (status != KVT_OK)
        return status;
    if (n == seq->pending)
        return kvt_seq_commit(seq, token_ids);
    while (job.first < n && indices[job.first] == job.first)
        job.first++;
    status = check_forms(&job);
    if (status != KVT_OK)
        return status;

    kvt_rows_seal_less(seq, seq->length + n);
    if (job.first < n)
        run(&job);
    for (uint64_t j = 0; j < n; j++) {
        const size_t to = (size_t)(seq->length + j), from = (size_t)(seq->length + indices[j]);
        kvt_meta *meta = kvt_seq_meta(seq, to / KVT_TOKENS);
        meta->positions[to % KVT_TOKENS] =
            kvt_seq_meta(seq, from / KVT_TOKENS)->positions[from % KVT_TOKENS];
        meta->token_ids[to % KVT_TOKENS] = token_ids ? token_ids[j] : KVT_TOKEN_NONE;
    }
    for (size_t row = (size_t)(seq->length / KVT_TOKENS); row < kvt_rows(seq->length + n); row++) {
        const size_t rest = (size_t)(seq->length + n - (uint64_t)row * KVT_TOKENS);
        kvt_meta_bound(kvt_seq_meta(seq, row), rest < KVT_TOKENS ? rest : KVT_TOKENS,
                       row > 0 ? kvt_seq_meta(seq, row - 1) : NULL);
    }
    kvt_seq_end_step(seq, n);
    kvt_rows_shrink(seq, kvt_rows(seq->length));
    return KVT_OK;
}
