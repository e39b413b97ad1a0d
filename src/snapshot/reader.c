/*
 * Read and verify a snapshot from a stream, for loading and for inspection.
 *
 * Forward only: sections have one order, and after each the reader knows which may follow. No
 * byte is used before its checksum, and no size is believed before it is held against what the
 * header's geometry makes of it and against the bytes that are left; buffers grow as the bytes
 * arrive. So a file that lies costs no more memory than a small multiple of its own size, but for
 * what a compressed layer of its geometry decodes to.
 *
 * What is remembered on the way: the block table (32 bytes a block), to hold each block's id
 * against, and the index as it has to be, to compare the stored one with at the end. Where keys
 * have moved, and the sink has no positions, the sections of positions as they are stored.
 */
#include "src/snapshot/crypt.h"
#include "src/snapshot/parser.h"
#include "src/sort.h"

#include <stdio.h>

/*
 * Buffers that grow hold old and new at once for a moment, one of them at a time: what that adds
 * at most to a buffer of `bytes`. One that is filled again may have any smaller size before.
 */
static uint64_t growth(uint64_t bytes, int refilled)
{
    uint64_t step = KVT_SNAP_STEP_BYTES;

    if (bytes <= KVT_SNAP_STEP_BYTES)
        return 0;
    if (refilled)
        return bytes;
    while (step < bytes - step)
        step *= 2;
    return step;
}

uint64_t kvt_snap_read_bytes(const kvt_snap_header *header, size_t n_jobs)
{
    uint64_t chunks = (header->n_tokens + KVT_SNAP_CHUNK_TOKENS - 1) / KVT_SNAP_CHUNK_TOKENS;
    uint64_t native = kvt_snap_layer_bytes(header), ids = KVT_SNAP_CHUNK_TOKENS;
    uint64_t table = header->n_blocks * KVT_SNAP_ENTRY_BYTES, payload, index = KVT_SNAP_INDEX_BYTES,
             extra, layer;

    if (header->n_tokens < ids)
        ids = header->n_tokens;
    layer = kvt_snap_set_room((size_t)native);
    payload = kvt_snap_set_room(4 * (size_t)ids);
    while (index < (3 * chunks + 3 + header->n_blocks) * KVT_SNAP_NOTE_BYTES)
        index *= 2;
    extra = index > KVT_SNAP_INDEX_BYTES ? index / 2 : 0;
    if (growth(table, 0) > extra)
        extra = growth(table, 0);
    if (growth(layer, 1) > extra)
        extra = growth(layer, 1);
    return kvt_snap_counted(payload) + kvt_snap_counted(4 * ids) + kvt_snap_counted(table) + index +
           kvt_snap_counted(KVT_SNAP_ID_HEAD + header->n_layers * (uint64_t)KVT_SNAP_ID_BYTES) * 2 +
           kvt_snap_counted(sizeof(kvt_group) * header->n_groups) +
           kvt_snap_counted(KVT_SNAP_HEADER_MAX) + kvt_snap_counted(extra) +
           kvt_snap_decode_bytes(header) +
           kvt_snap_counted(sizeof(kvt_snap_job) * kvt_snap_jobs_room(header, n_jobs)) +
           kvt_snap_counted(64 * n_jobs) +
           n_jobs *
               (kvt_snap_counted(layer) + kvt_snap_counted(native) +
                kvt_snap_counted(kvt_snap_image_bytes(header)) + kvt_snap_decode_bytes(header));
}

/* ---- the parts of a snapshot ---- */

kvt_status kvt_snap_read_header(kvt_snap_parser *p)
{
    void *memory;
    unsigned char *bytes;
    size_t n;
    kvt_status status =
        kvt_snap_reserve(p->context, &p->header_at, 0, KVT_SNAP_HEADER_MAX, "a snapshot's header");
    uint32_t g;

    (void)snprintf(p->place, sizeof p->place, "header");
    bytes = p->header_at.data;
    if (status == KVT_OK)
        status = kvt_snap_take(p, bytes, KVT_SNAP_MAGIC_BYTES);
    if (status == KVT_OK && kvt_snap_is_encrypted(bytes))
        return kvt_snap_crypt_needs_key(p->context, p->name);
    if (status == KVT_OK && memcmp(bytes, KVT_SNAP_MAGIC, KVT_SNAP_MAGIC_BYTES) != 0)
        return kvt_snap_fail(p->context, KVT_ERR_FORMAT, "%snot a kvtile snapshot", p->name);
    if (status == KVT_OK)
        status = kvt_snap_take(p, bytes + KVT_SNAP_MAGIC_BYTES,
                               KVT_SNAP_FIXED_BYTES - KVT_SNAP_MAGIC_BYTES);
    if (status == KVT_OK)
        status = kvt_snap_header_begin(p->context, p->name, bytes, p->header, &n);
    if (status == KVT_OK)
        status = kvt_snap_take(p, bytes + KVT_SNAP_FIXED_BYTES, n - KVT_SNAP_FIXED_BYTES);
    if (status == KVT_OK)
        status = kvt_snap_header_get(p->context, p->name, bytes, n, p->header);
    if (status != KVT_OK)
        return status;
    p->header_bytes = n;
    status = kvt_snap_alloc(p->context, p->header->n_groups * sizeof *p->groups,
                            "a snapshot's geometry", &memory);
    if (status != KVT_OK)
        return status;
    p->groups = memory;
    for (g = 0; g < p->header->n_groups; g++)
        kvt_snap_group_make(&p->header->groups[g], &p->groups[g]);
    return p->sink->header ? p->sink->header(p->sink->user, p->header) : KVT_OK;
}

int kvt_snap_zeros_from(const unsigned char *data, size_t from, size_t to)
{
    unsigned char any = 0;
    for (; from < to; from++)
        any |= data[from];
    return any == 0;
}

/* A file's name that is one in a folder. */
static int is_name(const char *name, size_t bytes)
{
    return !memchr(name, 0, bytes) && !memchr(name, '/', bytes) &&
           !(bytes == 1 && name[0] == '.') && !(bytes == 2 && memcmp(name, "..", 2) == 0);
}

/* What may follow: for the texts. */
static uint32_t type_behind(const kvt_snap_parser *p)
{
    return p->header->n_tokens > p->parent.inherited ? KVT_SNAP_TOKEN_IDS : KVT_SNAP_BLOCK_TABLE;
}

kvt_status kvt_snap_read_parent(kvt_snap_parser *p, int *is_delta)
{
    const size_t most = KVT_SNAP_PARENT_BYTES + kvt_round_up(KVT_SNAP_NAME_MAX, 8);
    unsigned char digest[KVT_SNAP_ID_BYTES];
    kvt_snap_parent *parent = &p->parent;
    const unsigned char *at;
    size_t end;
    kvt_snap_section s;
    kvt_status status = kvt_snap_peek(p, type_behind(p), 0);

    *is_delta = 0;
    if (status != KVT_OK || p->next.type != KVT_SNAP_PARENT)
        return status;
    status = kvt_snap_expect(p, KVT_SNAP_PARENT, 0, &s);
    if (status == KVT_OK)
        status = kvt_snap_take_summed(p, &s, KVT_SNAP_PARENT_BYTES + 8, most, digest);
    if (status != KVT_OK)
        return status;
    at = p->payload.data;
    end = (size_t)s.bytes - KVT_SNAP_SUM_BYTES;
    memcpy(parent->id, at, sizeof parent->id);
    parent->inherited = kvt_get64(at + 16);
    parent->depth = kvt_get32(at + 24);
    parent->name_bytes = kvt_get32(at + 28);
    if (parent->inherited > p->header->n_tokens)
        return kvt_snap_corrupt(p, "%llu tokens are inherited, of %llu",
                                (unsigned long long)parent->inherited,
                                (unsigned long long)p->header->n_tokens);
    if (parent->depth < 1 || parent->depth > KVT_MAX_DEPTH)
        return kvt_snap_corrupt(p, "a depth of %u", (unsigned)parent->depth);
    if (parent->name_bytes < 1 || parent->name_bytes > KVT_SNAP_NAME_MAX ||
        end != kvt_round_up(KVT_SNAP_PARENT_BYTES + (size_t)parent->name_bytes, 8) ||
        !is_name((const char *)at + KVT_SNAP_PARENT_BYTES, parent->name_bytes) ||
        !kvt_snap_zeros_from(at, KVT_SNAP_PARENT_BYTES + parent->name_bytes, end))
        return kvt_snap_corrupt(p, "the parent's name, or padding");
    memcpy(parent->name, at + KVT_SNAP_PARENT_BYTES, parent->name_bytes);
    parent->name[parent->name_bytes] = '\0';
    *is_delta = 1;
    status = kvt_snap_note(p, &s, digest);
    return status == KVT_OK && p->sink->parent ? p->sink->parent(p->sink->user, parent) : status;
}

/* The sequence section, if there is one. */
static kvt_status read_sequence(kvt_snap_parser *p)
{
    unsigned char digest[KVT_SNAP_ID_BYTES];
    const unsigned char *bytes = NULL;
    int32_t next_position = -1;
    uint32_t tag_bytes = 0;
    size_t end;
    kvt_snap_section s;
    kvt_status status = kvt_snap_peek(p, type_behind(p), 0);

    if (status == KVT_OK && p->next.type == KVT_SNAP_SEQUENCE) {
        status = kvt_snap_expect(p, KVT_SNAP_SEQUENCE, 0, &s);
        if (status == KVT_OK)
            status = kvt_snap_take_summed(p, &s, KVT_SNAP_STATE_BYTES,
                                          KVT_SNAP_STATE_BYTES + KVT_MAX_TAG, digest);
        if (status != KVT_OK)
            return status;
        bytes = p->payload.data;
        end = (size_t)s.bytes - KVT_SNAP_SUM_BYTES;
        memcpy(&next_position, bytes, 4);
        tag_bytes = kvt_get32(bytes + 4);
        if (tag_bytes > KVT_MAX_TAG ||
            end != kvt_round_up(KVT_SNAP_STATE_BYTES + (size_t)tag_bytes, 8))
            return kvt_snap_corrupt(p, "a tag of %u bytes", (unsigned)tag_bytes);
        if (!kvt_snap_zeros_from(bytes, KVT_SNAP_STATE_BYTES + tag_bytes, end) ||
            next_position < -1 || (next_position == -1 && tag_bytes == 0))
            return kvt_snap_corrupt(p, "its next position, or padding");
        status = kvt_snap_note(p, &s, digest);
    }
    if (status == KVT_OK && p->sink->sequence)
        status = p->sink->sequence(p->sink->user, next_position,
                                   bytes ? bytes + KVT_SNAP_STATE_BYTES : NULL, tag_bytes);
    return status;
}

/* A piece's name, which is at `at` in p->names. */
typedef struct piece_name {
    uint64_t sum;
    const char *text; /* while they are compared */
    size_t at;
} piece_name;

#define NAMES 16u /* room for so many at first */

static piece_name *names_of(const kvt_snap_parser *p)
{
    return (piece_name *)(void *)p->name_list.data;
}

static kvt_status note_name(kvt_snap_parser *p, const char *text, size_t bytes)
{
    size_t need = p->names_bytes + bytes + 1, n = (size_t)p->counts.n_pieces;
    kvt_status status = KVT_OK;
    piece_name *to;

    if (need > p->names.bytes)
        status = kvt_snap_reserve(p->context, &p->names, p->names_bytes,
                                  2 * need > 1024 ? 2 * need : 1024, "a snapshot's pieces");
    if (status == KVT_OK && (n + 1) * sizeof *to > p->name_list.bytes)
        status = kvt_snap_reserve(p->context, &p->name_list, n * sizeof *to,
                                  (n ? 2 * n : NAMES) * sizeof *to, "a snapshot's pieces");
    if (status != KVT_OK)
        return status;
    to = &names_of(p)[n];
    to->sum = kvt_snap_sum(text, bytes);
    to->at = p->names_bytes;
    memcpy(p->names.data + p->names_bytes, text, bytes + 1);
    p->names_bytes = need;
    return KVT_OK;
}

/* The sums keep them apart in one comparison, but for a file that is made to have equal ones. */
static int by_name(const void *a, const void *b)
{
    const piece_name *x = a, *y = b;
    int order;

    if (x->sum != y->sum)
        return x->sum < y->sum ? -1 : 1;
    order = strcmp(x->text, y->text);
    return order ? order : (x->at > y->at) - (x->at < y->at);
}

/*
 * No two pieces have the same name: when all are there. They are sorted, which takes n log n
 * comparisons whatever the names; a hash table would be slow with names that have the same hash.
 */
static kvt_status check_names(kvt_snap_parser *p)
{
    size_t n = (size_t)p->counts.n_pieces, i;
    piece_name *list = names_of(p);

    if (n < 2)
        return KVT_OK;
    for (i = 0; i < n; i++)
        list[i].text = (const char *)p->names.data + list[i].at;
    kvt_sort(list, n, sizeof *list, by_name);
    for (i = 1; i < n; i++)
        if (list[i - 1].sum == list[i].sum && strcmp(list[i - 1].text, list[i].text) == 0)
            return kvt_snap_corrupt(p, "two pieces have the same name");
    return KVT_OK;
}

/* The caller's pieces, as many as there are. */
static kvt_status read_pieces(kvt_snap_parser *p)
{
    uint64_t i;

    for (i = 0;; i++) {
        unsigned char digest[KVT_SNAP_ID_BYTES];
        char name[KVT_MAX_NAME + 1];
        kvt_snapshot_piece piece;
        const unsigned char *at;
        uint64_t data, end;
        size_t name_bytes, first;
        kvt_snap_section s;
        kvt_status status = kvt_snap_peek(p, type_behind(p), 0);

        if (status == KVT_OK && p->next.type != KVT_SNAP_PIECE)
            return check_names(p);
        if (status != KVT_OK)
            return status;
        status = kvt_snap_expect(p, KVT_SNAP_PIECE, i, &s);
        if (status == KVT_OK)
            status = kvt_snap_take_summed(p, &s, KVT_SNAP_PIECE_BYTES + 8, UINT64_MAX, digest);
        if (status != KVT_OK)
            return status;
        at = p->payload.data;
        end = s.bytes - KVT_SNAP_SUM_BYTES;
        name_bytes = kvt_get32(at);
        data = kvt_get64(at + 8);
        if (kvt_get32(at + 4) || name_bytes < 1 || name_bytes > KVT_MAX_NAME)
            return kvt_snap_corrupt(p, "a name of %zu bytes", name_bytes);
        first = KVT_SNAP_PIECE_BYTES + kvt_round_up(name_bytes, 8);
        if (first > end || data > end - first || (data + 7) / 8 * 8 != end - first)
            return kvt_snap_corrupt(p, "%llu bytes of data", (unsigned long long)data);
        if (memchr(at + KVT_SNAP_PIECE_BYTES, 0, name_bytes) ||
            !kvt_snap_zeros_from(at, KVT_SNAP_PIECE_BYTES + name_bytes, first) ||
            !kvt_snap_zeros_from(at, first + (size_t)data, (size_t)end))
            return kvt_snap_corrupt(p, "its name, or padding");
        memcpy(name, at + KVT_SNAP_PIECE_BYTES, name_bytes);
        name[name_bytes] = '\0';
        status = note_name(p, name, name_bytes);
        if (status == KVT_OK)
            status = kvt_snap_note(p, &s, digest);
        p->counts.n_pieces++;
        piece.name = name;
        piece.data = at + first;
        piece.bytes = (size_t)data;
        if (status == KVT_OK && p->sink->piece)
            status = p->sink->piece(p->sink->user, &piece);
        if (status != KVT_OK)
            return status;
    }
}

/* A payload that has been taken, to the integers of n tokens, where it lies or in *buffer. */
static kvt_status decode_chunk(kvt_snap_parser *p, uint32_t kind, uint32_t n,
                               const unsigned char *from, size_t bytes, kvt_snap_buffer *buffer,
                               const unsigned char **values)
{
    kvt_snap_fault fault = {NULL, 0, 0, 0};
    kvt_snap_shape shape;
    uint64_t stored;
    kvt_status status;

    memset(&shape, 0, sizeof shape);
    shape.kind = kind;
    shape.element = 4;
    shape.bits = 32;
    shape.bytes = n * (size_t)4;
    status = kvt_snap_decode_set(p->decoder, &shape, 1, shape.bytes, from, bytes, buffer, values,
                                 &stored, &fault);
    return status == KVT_OK ? status : kvt_snap_set_failed(p, status, &fault);
}

/* A section of positions as it is stored, behind its size, for when the shifts come. */
static kvt_status keep_positions(kvt_snap_parser *p, const unsigned char *from, size_t bytes)
{
    size_t have = p->kept_bytes, need = have + 8 + bytes;

    if (need > p->kept.bytes) {
        kvt_status status =
            kvt_snap_reserve(p->context, &p->kept, have, 2 * need, "a snapshot's positions");
        if (status != KVT_OK)
            return status;
    }
    kvt_put64(p->kept.data + have, bytes);
    memcpy(p->kept.data + have + 8, from, bytes);
    p->kept_bytes = need;
    return KVT_OK;
}

kvt_status kvt_snap_read_chunk(kvt_snap_parser *p, uint32_t type, uint32_t kind, uint64_t first,
                               uint32_t n, const unsigned char **values, unsigned char *digest)
{
    const unsigned char *from;
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(p, type, first, &s);

    if (status == KVT_OK)
        status = kvt_snap_take_set(p, &s, 1, n * (size_t)4, &p->payload, &from);
    if (status == KVT_OK)
        status = decode_chunk(p, kind, n, from, (size_t)s.bytes, &p->native, values);
    if (status == KVT_OK && type == KVT_SNAP_POSITIONS && p->keeps_positions)
        status = keep_positions(p, from, (size_t)s.bytes);
    if (status != KVT_OK)
        return status;
    kvt_snap_digest(*values, n * (size_t)4, digest);
    return kvt_snap_note(p, &s, digest);
}

/* The positions of n tokens from `first` on, a part of one section here or inherited, again. */
static kvt_status positions_again(kvt_snap_parser *p, uint64_t first, uint32_t n,
                                  const unsigned char **positions)
{
    const unsigned char *from;
    size_t bytes;

    if (first < p->parent.inherited) {
        kvt_status status =
            kvt_snap_reserve(p->context, &p->positions, 0, n * (size_t)4, "a snapshot's positions");
        *positions = p->positions.data;
        return status == KVT_OK ? kvt_snap_chain_tokens(p->chain, KVT_SNAP_KIND_POSITIONS, first, n,
                                                        p->positions.data)
                                : status;
    }
    from = p->kept.data + p->kept_read;
    bytes = (size_t)kvt_get64(from);
    p->kept_read += 8 + bytes;
    return decode_chunk(p, KVT_SNAP_KIND_POSITIONS, n, from + 8, bytes, &p->positions, positions);
}

/* Whether the keys of n tokens from `first` on were computed at positions that there are. */
static kvt_status check_shifts(kvt_snap_parser *p, uint64_t first, uint32_t n,
                               const unsigned char *shifts)
{
    const unsigned char *positions = NULL;
    uint32_t i, here, t;
    kvt_status status = p->keeps_positions ? positions_again(p, first, n, &positions) : KVT_OK;

    for (i = 0; status == KVT_OK && i < n; i += here) {
        uint32_t in_row = (uint32_t)((first + i) % KVT_TOKENS);
        const unsigned char *of_row = p->keeps_positions
                                          ? positions + i * (size_t)4
                                          : p->sink->positions(p->sink->user, first + i);
        int64_t any = 0;
        here = n - i < KVT_TOKENS - in_row ? n - i : KVT_TOKENS - in_row;
        for (t = 0; t < here; t++) {
            int64_t position = (int64_t)(int32_t)kvt_get32(of_row + t * (size_t)4) +
                               (int32_t)kvt_get32(shifts + (i + t) * (size_t)4);
            any |= position | (INT32_MAX - position); /* negative: one of them is */
        }
        if (any < 0)
            status = kvt_snap_corrupt(
                p, "a key of tokens %llu to %llu was computed for no position",
                (unsigned long long)(first + i), (unsigned long long)(first + i + here - 1));
    }
    return status;
}

/* Integers of tokens to the sink, as they have come. */
static kvt_status give_tokens(kvt_snap_parser *p, uint32_t kind, uint64_t first, uint32_t n,
                              const unsigned char *values)
{
    kvt_status status = kind == KVT_SNAP_KIND_SHIFTS ? check_shifts(p, first, n, values) : KVT_OK;

    return status == KVT_OK && p->sink->tokens
               ? p->sink->tokens(p->sink->user, kind, first, n, values)
               : status;
}

/* Those that the parent has. */
static kvt_status inherit_tokens(kvt_snap_parser *p, uint32_t kind)
{
    uint64_t first;
    kvt_status status = KVT_OK;

    for (first = 0; first < p->parent.inherited; first += KVT_SNAP_CHUNK_TOKENS) {
        uint64_t left = p->parent.inherited - first;
        uint32_t n = left < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)left : KVT_SNAP_CHUNK_TOKENS;
        status = kvt_snap_reserve(p->context, &p->native, 0, n * (size_t)4, "a snapshot's tokens");
        if (status == KVT_OK)
            status = kvt_snap_chain_tokens(p->chain, kind, first, n, p->native.data);
        if (status == KVT_OK)
            status = give_tokens(p, kind, first, n, p->native.data);
        if (status != KVT_OK)
            return status;
    }
    return status;
}

/* No key of this file has moved: so none of those that it inherits. */
static kvt_status check_unmoved(kvt_snap_parser *p)
{
    uint64_t first;

    for (first = 0; first < p->parent.inherited; first += KVT_SNAP_CHUNK_TOKENS) {
        uint64_t left = p->parent.inherited - first;
        uint32_t n = left < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)left : KVT_SNAP_CHUNK_TOKENS;
        kvt_status status =
            kvt_snap_reserve(p->context, &p->native, 0, n * (size_t)4, "a snapshot's tokens");
        if (status == KVT_OK)
            status =
                kvt_snap_chain_tokens(p->chain, KVT_SNAP_KIND_SHIFTS, first, n, p->native.data);
        if (status != KVT_OK)
            return status;
        if (!kvt_snap_zeros_from(p->native.data, 0, n * (size_t)4))
            return kvt_snap_corrupt(p, KVT_SNAP_MOVED_TEXT);
    }
    return KVT_OK;
}

static kvt_status read_tokens(kvt_snap_parser *p, uint32_t type, uint32_t kind)
{
    uint64_t first;
    kvt_status status = inherit_tokens(p, kind);

    for (first = p->parent.inherited; status == KVT_OK && first < p->header->n_tokens;
         first += KVT_SNAP_CHUNK_TOKENS) {
        uint64_t left = p->header->n_tokens - first;
        uint32_t n = left < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)left : KVT_SNAP_CHUNK_TOKENS;
        unsigned char digest[KVT_SNAP_ID_BYTES];
        const unsigned char *values;
        status = kvt_snap_read_chunk(p, type, kind, first, n, &values, digest);
        if (status == KVT_OK)
            status = give_tokens(p, kind, first, n, values);
    }
    return status;
}

static unsigned char *entry_at(const kvt_snap_parser *p, uint64_t b)
{
    return p->table.data + b * KVT_SNAP_ENTRY_BYTES;
}

/* An entry's representation. */
static uint32_t entry_form(const unsigned char *entry)
{
    return entry[28] | (uint32_t)entry[29] << 8;
}

/* What holds for any entry but its row. */
static kvt_status check_form(kvt_snap_parser *p, uint64_t b, uint32_t group)
{
    const unsigned char *entry = entry_at(p, b);
    uint32_t form = entry_form(entry), place = entry[30] | (uint32_t)entry[31] << 8;

    if (place > 1)
        return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                             "%ssnapshot with a block in place %u, which this build does not know",
                             p->name, (unsigned)place);
    if (place ? !p->chain : !kvt_snap_zeros_from(entry, 0, KVT_SNAP_ID_BYTES))
        return kvt_snap_corrupt(p, "entry %llu %s", (unsigned long long)b,
                                place ? "is in a parent, and there is none"
                                      : "has an id, and the block is here");
    p->counts.n_inherited_blocks += place;
    p->total += (uint64_t)p->header->groups[group].n_layers *
                (form < KVT_FORMS ? p->groups[group].layouts[form].layer_bytes : 0);
    if (form >= KVT_FORMS)
        return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                             "%ssnapshot with a block of representation %u, which this build "
                             "does not know",
                             p->name, (unsigned)form);
    if (!kvt_snap_has_form(&p->header->groups[group], form))
        return kvt_snap_corrupt(p, "entry %llu is %s, in a group that has no %s",
                                (unsigned long long)b,
                                form == KVT_FINE       ? "fine"
                                : form == KVT_REOPENED ? "open again"
                                                       : "open",
                                form == KVT_FINE       ? "i4 or i5"
                                : form == KVT_REOPENED ? "i4 keys"
                                                       : "i8, i4 or i5");
    p->counts.n_open_blocks += (uint64_t)kvt_is_open(form);
    return KVT_OK;
}

/*
 * The sequence's own entries: every row but those that a window has released, which are one run
 * behind the sinks and before the last row, all sealed before it.
 */
static kvt_status check_own(kvt_snap_parser *p)
{
    uint32_t forms[KVT_MAX_GROUPS] = {KVT_SEALED}, n_groups = p->header->n_groups, g;
    uint64_t rows = kvt_rows(p->header->n_tokens), b = 0, row;

    p->runs.n_groups = n_groups;
    for (g = 0; g < n_groups; g++)
        p->runs.sinks[g] = p->runs.first[g] = kvt_snap_sink_rows(&p->header->groups[g]);
    for (row = 0; row < rows; row++)
        for (g = 0; g < n_groups; g++) {
            const unsigned char *entry = entry_at(p, b);
            kvt_status status;
            uint32_t form;
            if (b == p->header->n_blocks || kvt_get32(entry + 16) != g ||
                kvt_get32(entry + 20) != row) {
                if (!p->header->groups[g].window_tokens || p->runs.first[g] != row ||
                    row + 1 == rows || kvt_is_open(forms[g]))
                    return kvt_snap_corrupt(p, "entry %llu, row %llu of group %u is missing",
                                            (unsigned long long)b, (unsigned long long)row,
                                            (unsigned)g);
                p->runs.first[g] = row + 1;
                p->own_sealed[g] = row + 1;
                continue;
            }
            status = check_form(p, b, g);
            if (status != KVT_OK)
                return status;
            form = entry_form(entry);
            if (!kvt_form_follows(forms[g], form))
                return kvt_snap_corrupt(p, "entry %llu is %s, behind an open one",
                                        (unsigned long long)b,
                                        kvt_is_open(form) ? "open again" : "sealed");
            forms[g] = form;
            if (!kvt_is_open(form))
                p->own_sealed[g] = row + 1;
            if (kvt_get32(entry + 24) != kvt_snap_row_tokens(p->header->n_tokens, row))
                return kvt_snap_corrupt(p, "entry %llu", (unsigned long long)b);
            b++;
        }
    p->n_own = b;
    return KVT_OK;
}

/* The entries behind them, which checkpoints have. */
static kvt_status check_extras(kvt_snap_parser *p)
{
    uint64_t rows = kvt_rows(p->header->n_tokens), b;

    for (b = p->n_own; b < p->header->n_blocks; b++) {
        const unsigned char *entry = entry_at(p, b);
        uint32_t group = kvt_get32(entry + 16), row = kvt_get32(entry + 20);
        uint32_t tokens = kvt_get32(entry + 24);
        kvt_status status;
        if (group >= p->header->n_groups || row >= rows || tokens < 1 || tokens > KVT_TOKENS)
            return kvt_snap_corrupt(p, "entry %llu", (unsigned long long)b);
        status = check_form(p, b, group);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

/* None of a checkpoint's blocks is the sequence's own: when all ids are known. */
static kvt_status check_twins(kvt_snap_parser *p)
{
    uint64_t b;

    (void)snprintf(p->place, sizeof p->place, "section block table 0");
    for (b = p->n_own; b < p->header->n_blocks; b++) {
        const unsigned char *entry = entry_at(p, b), *own;
        uint32_t group = kvt_get32(entry + 16), row = kvt_get32(entry + 20);
        if (!kvt_snap_has_row(&p->runs, row, group))
            continue;
        own = entry_at(p, kvt_snap_own_entry(&p->runs, row, group));
        if (memcmp(entry, own, KVT_SNAP_ENTRY_BYTES - 2) == 0)
            return kvt_snap_corrupt(p, "entry %llu is there twice", (unsigned long long)b);
    }
    return KVT_OK;
}

static kvt_status read_block_table(kvt_snap_parser *p)
{
    uint64_t bytes = p->header->n_blocks * KVT_SNAP_ENTRY_BYTES;
    unsigned char sum[KVT_SNAP_SUM_BYTES], digest[KVT_SNAP_ID_BYTES];
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_BLOCK_TABLE, 0, &s);

    if (status != KVT_OK)
        return status;
    if (s.bytes != bytes + KVT_SNAP_SUM_BYTES)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    if (bytes > SIZE_MAX / 2) /* where pointers have 32 bits */
        return kvt_snap_fail(p->context, KVT_ERR_LIMIT,
                             "a snapshot's block table of %llu bytes is more than this machine can "
                             "address",
                             (unsigned long long)bytes);
    status = kvt_snap_take_growing(p, &p->table, 0, (size_t)bytes, "a snapshot's block table");
    if (status == KVT_OK)
        status = kvt_snap_take(p, sum, sizeof sum);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(sum), kvt_snap_sum(p->table.data, (size_t)bytes)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    status = check_own(p);
    if (status == KVT_OK)
        status = check_extras(p);
    p->n_here = p->header->n_blocks - p->counts.n_inherited_blocks;
    kvt_snap_digest(p->table.data, (size_t)bytes, digest);
    return status == KVT_OK ? kvt_snap_note(p, &s, digest) : status;
}

/* Entry b, from here or from a parent; its id is in the table then. */
static kvt_status read_block(kvt_snap_parser *p, uint64_t b)
{
    unsigned char *entry = entry_at(p, b), id[KVT_SNAP_ID_BYTES];
    kvt_snap_block at = {b < p->n_own ? 0 : b - p->n_own + 1, kvt_get32(entry + 20),
                         kvt_get32(entry + 16), entry_form(entry), kvt_get32(entry + 24)};
    kvt_status status;

    if (entry[30])
        return kvt_snap_chain_block(p->chain, entry, &at, p);
    status = kvt_snap_read_block(p, b, &at, entry + KVT_SNAP_ID_BYTES, NULL, id);
    memcpy(entry, id, sizeof id);
    return status;
}

/* Those that there are, and that they name all blocks that are only theirs. */
static kvt_status read_checkpoints(kvt_snap_parser *p)
{
    kvt_status status = kvt_snap_peek(p, KVT_SNAP_INDEX, 0);

    while (status == KVT_OK && p->next.type == KVT_SNAP_CHECKPOINT) {
        status = kvt_snap_take_checkpoint(p);
        if (status == KVT_OK)
            status = kvt_snap_peek(p, KVT_SNAP_INDEX, 0);
    }
    if (status == KVT_OK && p->n_own + p->n_named != p->header->n_blocks)
        return kvt_snap_corrupt(p, "the block table has blocks of no checkpoint");
    return status == KVT_OK ? check_twins(p) : status;
}

static kvt_status read_index_and_end(kvt_snap_parser *p)
{
    unsigned char entry[KVT_SNAP_NOTE_BYTES], end[KVT_SNAP_END_BYTES];
    uint64_t index_offset;
    size_t at;
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_INDEX, 0, &s);

    if (status != KVT_OK)
        return status;
    index_offset = s.offset;
    if (s.bytes != p->index_bytes + KVT_SNAP_SUM_BYTES)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    for (at = 0; at < p->index_bytes; at += sizeof entry) {
        status = kvt_snap_take(p, entry, sizeof entry);
        if (status != KVT_OK)
            return status;
        if (memcmp(entry, p->index.data + at, sizeof entry) != 0)
            return kvt_snap_corrupt(p, "entry %zu is not where the file has it", at / sizeof entry);
    }
    status = kvt_snap_take(p, entry, KVT_SNAP_SUM_BYTES);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(entry), kvt_snap_sum(p->index.data, p->index_bytes)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    status = kvt_snap_expect(p, KVT_SNAP_END, 0, &s);
    if (status != KVT_OK)
        return status;
    if (s.bytes != sizeof end)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    status = kvt_snap_take(p, end, sizeof end);
    if (status != KVT_OK)
        return status;
    kvt_snap_make_id(p->header_at.data, p->header_bytes, p->index.data, p->index_bytes,
                     p->counts.id);
    if (!kvt_snap_same_sum(kvt_get64(end + 32), kvt_snap_sum(end, 32)) ||
        kvt_get64(end) != index_offset || kvt_get64(end + 8) != p->offset ||
        memcmp(end + 40, KVT_SNAP_FOOTER, KVT_SNAP_MAGIC_BYTES) != 0)
        return kvt_snap_corrupt(p, "the footer");
#ifndef KVT_FUZZING
    if (memcmp(end + 16, p->counts.id, KVT_SNAP_ID_BYTES) != 0)
        return kvt_snap_corrupt(p, "the snapshot's id");
#endif
    return KVT_OK;
}

/* Memory for blocks: jobs, and the digests of one. */
static kvt_status prepare_blocks(kvt_snap_parser *p)
{
    uint32_t layers = 0, g;
    kvt_status status;

    for (g = 0; g < p->header->n_groups; g++)
        if (p->header->groups[g].n_layers > layers)
            layers = p->header->groups[g].n_layers;
    status = kvt_snap_reserve(p->context, &p->digests, 0,
                              KVT_SNAP_ID_HEAD + layers * (size_t)KVT_SNAP_ID_BYTES,
                              "a snapshot's digests");
    return status == KVT_OK ? kvt_snap_jobs_make(&p->jobs, p->context, p->header) : status;
}

#define PROGRESS_BYTES ((uint64_t)64 << 20)

kvt_status kvt_snap_tell(kvt_snap_parser *p, uint64_t bytes)
{
    if (p->child)
        p = p->child;
    p->done += bytes;
    if (!p->sink->progress || (p->done - p->told < PROGRESS_BYTES && p->done < p->total))
        return KVT_OK;
    p->told = p->done;
    return p->sink->progress(p->sink->user, p->done, p->total);
}

static kvt_status read_body(kvt_snap_parser *p)
{
    uint64_t b;
    kvt_status status = prepare_blocks(p);

    p->keeps_positions = (p->header->flags & KVT_SNAP_MOVED) && !p->sink->positions;
    if (status == KVT_OK)
        status = read_pieces(p);
    if (status == KVT_OK)
        status = read_tokens(p, KVT_SNAP_TOKEN_IDS, KVT_SNAP_KIND_TOKEN_IDS);
    if (status == KVT_OK)
        status = read_tokens(p, KVT_SNAP_POSITIONS, KVT_SNAP_KIND_POSITIONS);
    if (status == KVT_OK && (p->header->flags & KVT_SNAP_MOVED))
        status = read_tokens(p, KVT_SNAP_SHIFTS, KVT_SNAP_KIND_SHIFTS);
    else if (status == KVT_OK)
        status = check_unmoved(p);
    if (status == KVT_OK)
        status = read_block_table(p);
    for (b = 0; status == KVT_OK && b < p->header->n_blocks; b++)
        status = read_block(p, b);
    if (status == KVT_OK)
        status = read_checkpoints(p);
    if (status == KVT_OK)
        status = read_index_and_end(p);
    return status;
}

void kvt_snap_parser_init(kvt_snap_parser *p, const kvt_snap_context *context,
                          const kvt_snap_input *input, const kvt_snap_sink *sink,
                          kvt_snap_header *header)
{
    memset(p, 0, sizeof *p);
    p->context = context;
    p->input = input;
    p->sink = sink;
    p->header = header;
    p->remaining = input->bytes;
    kvt_snap_codec_init(&p->codec, context);
    p->decoder = &p->codec;
}

void kvt_snap_parser_release(kvt_snap_parser *p)
{
    kvt_snap_chain_close(p->context, p->chain);
    kvt_snap_jobs_release(&p->jobs);
    kvt_snap_codec_release(&p->codec);
    if (p->groups)
        kvt_snap_free(p->context, p->groups, p->header->n_groups * sizeof *p->groups);
    p->groups = NULL;
    kvt_snap_release(p->context, &p->header_at);
    kvt_snap_release(p->context, &p->payload);
    kvt_snap_release(p->context, &p->native);
    kvt_snap_release(p->context, &p->kept);
    kvt_snap_release(p->context, &p->positions);
    kvt_snap_release(p->context, &p->table);
    kvt_snap_release(p->context, &p->index);
    kvt_snap_release(p->context, &p->digests);
    kvt_snap_release(p->context, &p->names);
    kvt_snap_release(p->context, &p->name_list);
}

kvt_status kvt_snap_read(const kvt_snap_context *context, const kvt_snap_input *input,
                         int header_only, const kvt_snap_sink *sink, kvt_snap_header *header,
                         kvt_snap_counts *counts)
{
    kvt_snap_parser p;
    kvt_status status;
    int is_delta;

    kvt_snap_parser_init(&p, context, input, sink, header);
    status = kvt_snap_read_header(&p);
    if (status == KVT_OK)
        status = kvt_snap_read_parent(&p, &is_delta);
    if (status == KVT_OK)
        status = read_sequence(&p);
    if (status == KVT_OK && is_delta && !header_only)
        status = kvt_snap_chain_open(context, input, header, &p.parent, &p.chain);
    if (status == KVT_OK && !header_only)
        status = read_body(&p);
    p.counts.file_bytes = p.offset;
    if (status == KVT_OK && counts)
        *counts = p.counts;
    kvt_snap_parser_release(&p);
    return status;
}
