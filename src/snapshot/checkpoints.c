/*
 * Checkpoints in a snapshot: which blocks they add to its block table, their sections, and what is
 * checked of one that is read.
 *
 * A checkpoint's rows begin as those of the sequence's own table and are others from a row on, by
 * groups: the sequence has sealed them since, or released them, or filled the last one up. Its
 * section has the entries from the first on that differs. The blocks that the sequence itself has
 * no more are further entries of the table, the extras, in the order in which the checkpoints name
 * them first. Blocks are the same where their contents are (their ids), so that the file depends on
 * what a checkpoint is and not on how it came to be.
 *
 * A loaded sequence takes the rows before that from its table when it goes back, also from a later
 * checkpoint (rows.c). So those that cannot change any more have to be its own, and from checkpoint
 * to checkpoint no row may become unsealed, or be there again that was released.
 */
#include "src/snapshot/parser.h"
#include "src/snapshot/saver.h"

#include <stdio.h>

static uint64_t blob_room(uint64_t bytes)
{
    return (bytes + 7) / 8 * 8;
}

/* ---- writing ---- */

static kvt_snap_extra *extra_at(const kvt_snap_saver *s, size_t i)
{
    return (kvt_snap_extra *)(void *)s->extras.data + i;
}

/* Room for `bytes` bytes in a buffer that grows; the first `keep` stay. */
static kvt_status grow(kvt_snap_saver *s, kvt_snap_buffer *buffer, size_t keep, size_t bytes)
{
    size_t more = buffer->bytes ? 2 * buffer->bytes : 4096;
    return bytes <= buffer->bytes
               ? KVT_OK
               : kvt_snap_reserve(s->context, buffer, keep, more > bytes ? more : bytes,
                                  "a snapshot's checkpoints");
}

static kvt_status put_word(kvt_snap_saver *s, uint32_t word)
{
    kvt_status status = grow(s, &s->words, s->words_bytes, s->words_bytes + 4);
    if (status != KVT_OK)
        return status;
    kvt_put32(s->words.data + s->words_bytes, word);
    s->words_bytes += 4;
    return KVT_OK;
}

/* Whether the sequence's own block of a row is the same as one of an id. */
static kvt_status same_as_own(kvt_snap_saver *s, uint64_t row, uint32_t group, uint32_t tokens,
                              const unsigned char *id, int *same)
{
    const kvt_block *own = kvt_snap_own_block(s, row, group);
    unsigned char own_id[KVT_SNAP_ID_BYTES];
    kvt_status status;

    *same = 0;
    if (!own || tokens != kvt_snap_row_tokens(s->header->n_tokens, row))
        return KVT_OK;
    status = kvt_snap_id_of(s, own, row, group, tokens, own_id);
    *same = status == KVT_OK && memcmp(own_id, id, sizeof own_id) == 0;
    return status;
}

/* The entry of a block of a checkpoint; a new one where the table has none. */
static kvt_status find_entry(kvt_snap_saver *s, const kvt_block *block, uint64_t row,
                             uint32_t group, uint32_t tokens, uint32_t *entry)
{
    unsigned char id[KVT_SNAP_ID_BYTES];
    uint32_t *head = (uint32_t *)(void *)s->heads.data + row * s->header->n_groups + group, e;
    const kvt_block *own = kvt_snap_own_block(s, row, group);
    size_t n = (size_t)s->n_own + s->n_extras;
    kvt_snap_extra *extra;
    kvt_status status;
    int same;

    *entry = own ? kvt_snap_own_entry(&s->runs, row, group) : KVT_SNAP_ABSENT;
    if (own == block && tokens == kvt_snap_row_tokens(s->header->n_tokens, row))
        return KVT_OK;
    for (e = *head; e; e = extra_at(s, e - 1)->next)
        if (extra_at(s, e - 1)->block == block && extra_at(s, e - 1)->tokens == tokens) {
            *entry = (uint32_t)s->n_own + e - 1;
            return KVT_OK;
        }
    status = kvt_snap_id_of(s, block, row, group, tokens, id);
    if (status == KVT_OK)
        status = same_as_own(s, row, group, tokens, id, &same);
    if (status != KVT_OK || same)
        return status;
    for (e = *head; e; e = extra_at(s, e - 1)->next) {
        *entry = (uint32_t)s->n_own + e - 1;
        if (memcmp(extra_at(s, e - 1)->id, id, sizeof id) == 0)
            return KVT_OK;
    }
    if (n + 1 >= KVT_SNAP_ABSENT)
        return kvt_snap_fail(s->context, KVT_ERR_LIMIT, "save: too many blocks for a snapshot");
    status = grow(s, &s->table, n * KVT_SNAP_ENTRY_BYTES, (n + 1) * KVT_SNAP_ENTRY_BYTES);
    if (status == KVT_OK)
        status = grow(s, &s->extras, s->n_extras * sizeof(kvt_snap_extra),
                      (s->n_extras + (size_t)1) * sizeof(kvt_snap_extra));
    if (status != KVT_OK)
        return status;
    kvt_snap_make_entry(s, block, row, group, tokens,
                        s->chain && kvt_snap_chain_has(s->chain, id) ? id : NULL,
                        s->table.data + n * KVT_SNAP_ENTRY_BYTES);
    extra = extra_at(s, s->n_extras);
    extra->block = block;
    memcpy(extra->id, id, sizeof id);
    extra->row = (uint32_t)row;
    extra->group = group;
    extra->tokens = tokens;
    extra->next = *head;
    *head = ++s->n_extras;
    *entry = (uint32_t)n;
    return KVT_OK;
}

/* A group's `from` and entries. */
static kvt_status plan_group(kvt_snap_saver *s, kvt_checkpoint *checkpoint, uint32_t group,
                             size_t first)
{
    const uint32_t column = s->group_of[group];
    kvt_block *const *blocks = kvt_checkpoint_blocks(checkpoint, column);
    size_t rows = kvt_rows(checkpoint->n_tokens), row;
    uint64_t sinks = s->runs.sinks[group];
    int differs = 0;
    kvt_status status = KVT_OK;

    for (row = checkpoint->from[column]; status == KVT_OK && row < rows; row++) {
        const kvt_block *block = blocks[row - checkpoint->from[column]];
        uint32_t entry = KVT_SNAP_ABSENT, own = KVT_SNAP_ABSENT;
        if (kvt_snap_has_row(&s->runs, row, group))
            own = kvt_snap_own_entry(&s->runs, row, group);
        /*
         * Types that are not sealed have no rows that may still change but the last: what the
         * sequence has of a full one stands for the open one that was.
         */
        if (s->targets && !s->stored_as[group]->seals && row < checkpoint->n_tokens / KVT_TOKENS &&
            own != KVT_SNAP_ABSENT)
            entry = own;
        else if (block && (row < sinks || row >= first))
            status = find_entry(s, block, row, group,
                                kvt_snap_row_tokens(checkpoint->n_tokens, row), &entry);
        if (!differs && entry == own)
            continue;
        if (status == KVT_OK && !differs)
            status = put_word(s, (uint32_t)row);
        differs = 1;
        if (status == KVT_OK)
            status = put_word(s, entry);
    }
    return status == KVT_OK && !differs ? put_word(s, (uint32_t)rows) : status;
}

/*
 * Which rows of checkpoints are left out: what is out of sight, but for a row that a later one has
 * (which may be, where positions go back).
 */
static kvt_status find_firsts(kvt_snap_saver *s)
{
    const kvt_seq *seq = s->seq;
    const uint32_t n_groups = s->header->n_groups;
    size_t i, *firsts;
    uint32_t g;
    kvt_status status = grow(s, &s->firsts, 0, s->n_checkpoints * n_groups * sizeof *firsts);

    if (status != KVT_OK)
        return status;
    firsts = (size_t *)(void *)s->firsts.data;
    for (i = s->n_checkpoints; i-- > 0;)
        for (g = 0; g < n_groups; g++) {
            const kvt_checkpoint *point = seq->checkpoints[i];
            uint32_t column = s->group_of[g];
            size_t first = kvt_window_first(seq, column, &point->groups[column], point->n_tokens,
                                            KVT_DRAFT_TOKENS);
            size_t later = i + 1 < s->n_checkpoints              ? firsts[(i + 1) * n_groups + g]
                           : s->runs.first[g] > s->runs.sinks[g] ? (size_t)s->runs.first[g]
                                                                 : 0;
            firsts[i * n_groups + g] = first < later ? first : later;
        }
    return KVT_OK;
}

kvt_status kvt_snap_plan_checkpoints(kvt_snap_saver *s)
{
    const kvt_seq *seq = s->seq;
    const size_t *firsts;
    size_t heads, i;
    kvt_status status = KVT_OK;
    uint32_t g;

    if (s->n_checkpoints) {
        heads = kvt_rows(seq->checkpoints[s->n_checkpoints - 1]->n_tokens) *
                (size_t)s->header->n_groups * sizeof(uint32_t);
        status = grow(s, &s->heads, 0, heads);
        if (status == KVT_OK && heads)
            memset(s->heads.data, 0, heads);
    }
    if (status == KVT_OK && s->n_checkpoints)
        status = find_firsts(s);
    firsts = (const size_t *)(const void *)s->firsts.data;
    for (i = 0; i < s->n_checkpoints; i++)
        for (g = 0; status == KVT_OK && g < s->header->n_groups; g++)
            status = plan_group(s, seq->checkpoints[i], g, firsts[i * s->header->n_groups + g]);
    s->header->n_blocks = s->n_own + s->n_extras;
    return status;
}

kvt_status kvt_snap_put_checkpoints(kvt_snap_saver *s)
{
    const unsigned char *words = s->words.data;
    kvt_status status = KVT_OK;
    size_t i;

    for (i = 0; status == KVT_OK && i < s->n_checkpoints; i++) {
        kvt_checkpoint *checkpoint = s->seq->checkpoints[i];
        unsigned char point[KVT_SNAP_POINT_BYTES];
        uint64_t rows = kvt_rows(checkpoint->n_tokens), offset = s->offset;
        size_t bytes = 0, room, blob = (size_t)blob_room(checkpoint->blob_bytes);
        kvt_snap_summer summer;
        uint32_t g;

        for (g = 0; g < s->header->n_groups; g++)
            bytes += 4 * (size_t)(1 + rows - kvt_get32(words + bytes));
        room = kvt_round_up(bytes, 8);
        kvt_put32(point, (uint32_t)checkpoint->next_position);
        kvt_put32(point + 4, 0);
        kvt_put64(point + 8, checkpoint->blob_bytes);
        kvt_snap_summer_init(&summer);
        status = kvt_snap_put_head(s, KVT_SNAP_CHECKPOINT,
                                   sizeof point + room + blob + KVT_SNAP_SUM_BYTES,
                                   checkpoint->n_tokens);
        if (status == KVT_OK)
            status = kvt_snap_put_part(s, &summer, point, sizeof point, sizeof point);
        if (status == KVT_OK)
            status = kvt_snap_put_part(s, &summer, words, bytes, room);
        if (status == KVT_OK)
            status = kvt_snap_put_part(s, &summer, kvt_checkpoint_blob(checkpoint),
                                       checkpoint->blob_bytes, blob);
        if (status == KVT_OK)
            status = kvt_snap_put_parts_end(s, &summer, KVT_SNAP_CHECKPOINT, checkpoint->n_tokens,
                                            offset);
        words += bytes;
    }
    return status;
}

/* ---- reading ---- */

static const unsigned char *entry_of(const kvt_snap_parser *p, uint64_t i)
{
    return p->table.data + i * KVT_SNAP_ENTRY_BYTES;
}

static uint32_t form_of(const unsigned char *entry)
{
    return entry[28] | (uint32_t)entry[29] << 8;
}

/* Why an entry cannot be that of a checkpoint's row, NULL when it can. Takes note of extras. */
static const char *entry_fault(kvt_snap_parser *p, uint64_t index, uint64_t row, uint32_t group,
                               uint32_t tokens)
{
    const unsigned char *entry;

    if (index >= p->header->n_blocks)
        return "an entry beyond the block table";
    if (index < p->n_own && (!kvt_snap_has_row(&p->runs, row, group) ||
                             index != kvt_snap_own_entry(&p->runs, row, group)))
        return "a block of another row";
    if (index >= p->n_own && index - p->n_own > p->n_named)
        return "blocks in another order";
    entry = entry_of(p, index);
    if (kvt_get32(entry + 16) != group || kvt_get32(entry + 20) != row)
        return "a block of another row";
    if (kvt_get32(entry + 24) != tokens)
        return "a block of more or fewer tokens";
    p->n_named += index == p->n_own + p->n_named;
    return NULL;
}

/* The form of the row before `row` in the sequence itself; a released one counts as sealed. */
static uint32_t own_form(const kvt_snap_parser *p, uint64_t row, uint32_t group)
{
    return row > 0 && kvt_snap_has_row(&p->runs, row - 1, group)
               ? form_of(entry_of(p, kvt_snap_own_entry(&p->runs, row - 1, group)))
               : KVT_SEALED;
}

/*
 * Check the rows of one group, of which `from` and the entries are set, and set the rest. NULL, or
 * what is wrong.
 */
static const char *group_fault(kvt_snap_parser *p, kvt_snap_checkpoint *c, uint32_t g)
{
    const kvt_snapshot_group *group = &p->header->groups[g];
    uint64_t rows = kvt_rows(c->n_tokens), sinks = p->runs.sinks[g], from = c->from[g], row;
    uint64_t sealed = from < p->own_sealed[g] ? from : p->own_sealed[g];
    uint64_t first = from < p->runs.first[g] ? from : p->runs.first[g];
    uint32_t form = own_form(p, from, g); /* of the row before */

    if (first < sinks)
        first = sinks;
    if (from == rows && rows > 0 &&
        (!kvt_snap_has_row(&p->runs, rows - 1, g) ||
         kvt_snap_row_tokens(c->n_tokens, rows - 1) !=
             kvt_snap_row_tokens(p->header->n_tokens, rows - 1)))
        return "its last row is not the sequence's";
    for (row = from; row < rows; row++) {
        uint32_t index = kvt_get32(c->entries[g] + 4 * (row - from));
        int own =
            index < p->n_own || (index == KVT_SNAP_ABSENT && !kvt_snap_has_row(&p->runs, row, g));
        const char *fault;
        if (row == from && own)
            return "a first row that is the sequence's own";
        if (index == KVT_SNAP_ABSENT) {
            /* first is not below sinks */
            if (!group->window_tokens || first != row || row + 1 == rows || kvt_is_open(form))
                return "a row without a block";
            first = row + 1;
        } else {
            fault = entry_fault(p, index, row, g, kvt_snap_row_tokens(c->n_tokens, row));
            if (fault)
                return fault;
            if (!kvt_form_follows(form, form_of(entry_of(p, index))))
                return kvt_is_open(form_of(entry_of(p, index)))
                           ? "a block open again behind an open one"
                           : "a sealed block behind an open one";
            form = form_of(entry_of(p, index));
        }
        if (!kvt_is_open(form))
            sealed = row + 1;
    }
    c->sealed[g] = sealed;
    c->first[g] = first > sinks ? first : 0;
    /* A row of 4-bit keys that a truncate has cut is open again with the next step. */
    if (group->k_type == KVT_TYPE_I4 && c->n_tokens % KVT_TOKENS && sealed == rows &&
        form == KVT_SEALED)
        sealed--;
    if (sealed < p->sealed[g] || sealed > p->own_sealed[g])
        return "a block is open again";
    p->sealed[g] = sealed;
    if (c->first[g] < p->first[g] || first > p->runs.first[g])
        return "a block that was released is there again";
    c->kept[g] = c->n_tokens / KVT_TOKENS;
    if (kvt_snap_seals(group) && sealed < c->kept[g])
        c->kept[g] = sealed;
    if (group->window_tokens && first < c->kept[g])
        c->kept[g] = first;
    return from < c->kept[g] ? "a row that cannot have changed is another" : NULL;
}

/* Where the groups' entries and the blob are; 0 when the sizes do not fit. */
static int split(const kvt_snap_parser *p, kvt_snap_checkpoint *c, uint64_t bytes)
{
    const unsigned char *data = p->payload.data;
    uint64_t rows = kvt_rows(c->n_tokens), at = KVT_SNAP_POINT_BYTES, end = bytes;
    unsigned char any = 0;
    uint32_t g;

    end -= KVT_SNAP_SUM_BYTES;
    c->blob_bytes = kvt_get64(data + 8);
    if (c->blob_bytes > end)
        return 0;
    for (g = 0; g < p->header->n_groups; g++) {
        if (end - at < 4)
            return 0;
        c->from[g] = kvt_get32(data + at);
        at += 4;
        if (c->from[g] > rows || 4 * (rows - c->from[g]) > end - at)
            return 0;
        c->entries[g] = data + at;
        at += 4 * (rows - c->from[g]);
    }
    for (; at % 8; at++)
        any |= data[at]; /* below end, which is a multiple of 8 */
    c->blob = data + at;
    if (end - at != blob_room(c->blob_bytes))
        return 0;
    for (at += c->blob_bytes; at < end; at++)
        any |= data[at];
    return any == 0 && kvt_get32(data + 4) == 0;
}

kvt_status kvt_snap_take_checkpoint(kvt_snap_parser *p)
{
    kvt_snap_checkpoint c;
    unsigned char digest[KVT_SNAP_ID_BYTES];
    kvt_snap_section s;
    uint32_t g;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_CHECKPOINT, p->next.value, &s);

    if (status != KVT_OK)
        return status;
    memset(&c, 0, sizeof c);
    c.n_tokens = s.value;
    c.n_own = p->n_own;
    if (s.value > p->header->n_tokens || (p->counts.n_checkpoints && s.value <= p->n_tokens))
        return kvt_snap_corrupt(p, "checkpoints do not ascend up to the sequence's length");
    status = kvt_snap_take_summed(p, &s, KVT_SNAP_POINT_BYTES, UINT64_MAX, digest);
    if (status != KVT_OK)
        return status;
    memcpy(&c.next_position, p->payload.data, 4);
    if (!split(p, &c, s.bytes) || c.next_position < -1)
        return kvt_snap_corrupt(p, "its sizes, padding or next position");
    for (g = 0; g < p->header->n_groups; g++) {
        const char *fault = group_fault(p, &c, g);
        if (fault)
            return kvt_snap_corrupt(p, "group %u: %s", (unsigned)g, fault);
    }
    if (p->sink->checkpoint)
        status = p->sink->checkpoint(p->sink->user, &c);
    memcpy(p->first, c.first, sizeof p->first);
    p->n_tokens = c.n_tokens;
    p->counts.n_checkpoints++;
    return status == KVT_OK ? kvt_snap_note(p, &s, digest) : status;
}
