/*
 * The parents of a delta: files that are read at any place.
 *
 * Each is opened once, its header, parent section, index and end are verified, and with them its
 * snapshot id, which its child has noted. Its index says where its blocks are, by their ids, and
 * its tokens. What is taken from it is verified as it is read, by the same code as the child
 * itself.
 */
#include "src/snapshot/crypt.h"
#include "src/snapshot/parser.h"
#include "src/sort.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#define AHEAD_BYTES ((size_t)1 << 15)

typedef struct place {
    unsigned char id[KVT_SNAP_ID_BYTES];
    uint64_t number, offset;
} place;

/* Where the index has tokens: an entry of type and value. */
typedef struct chunk {
    uint64_t first; /* its value */
    uint32_t type;
    size_t at; /* in the index */
} chunk;

typedef struct level {
    kvt_snap_file file;
    kvt_snap_crypt crypt;
    kvt_snap_input input;
    kvt_snap_mapped mapped;
    kvt_snap_header header;
    kvt_snap_parser p;
    char path[KVT_SNAP_PATH_BYTES];
    int encrypted;
    uint64_t at, bytes;    /* of the plain snapshot */
    kvt_snap_buffer ahead; /* [begin, end) of it */
    uint64_t begin, end;
    kvt_snap_buffer places; /* place [n_places], by id */
    size_t n_places;
    kvt_snap_buffer chunks; /* chunk [n_chunks], by type and first token */
    size_t n_chunks;
    unsigned char id[KVT_SNAP_ID_BYTES];
} level;

struct kvt_snap_chain {
    const kvt_snap_context *context;
    level *levels[KVT_MAX_DEPTH];
    uint32_t n;
    kvt_snap_codec codec; /* of the level that is read, as are its buffers */
    kvt_snap_buffer payload, native;
    int counted; /* the blocks of each level that the child's table has */
};

static const kvt_snap_sink no_sink;

/* ---- bytes of a level ---- */

static int64_t read_at(level *l, uint64_t offset, void *to, size_t bytes)
{
    if (l->encrypted)
        return kvt_snap_decrypt_at(&l->crypt, offset, to, bytes) == KVT_OK ? (int64_t)bytes : -1;
    return kvt_snap_file_read_at(&l->file, offset, to, bytes);
}

static int64_t source_read(void *user, uint64_t offset, void *to, size_t bytes)
{
    return kvt_snap_file_read_at(&((level *)user)->file, offset, to, bytes);
}

static int64_t level_read(void *user, void *to, size_t bytes)
{
    level *l = user;
    int64_t n;

    if (l->at >= l->bytes)
        return 0;
    if (bytes > l->bytes - l->at)
        bytes = (size_t)(l->bytes - l->at);
    if (l->at < l->begin || l->at >= l->end) {
        size_t part = l->bytes - l->at < AHEAD_BYTES ? (size_t)(l->bytes - l->at) : AHEAD_BYTES;
        if (bytes >= AHEAD_BYTES) {
            n = read_at(l, l->at, to, bytes);
            l->at += n > 0 ? (uint64_t)n : 0;
            return n;
        }
        n = read_at(l, l->at, l->ahead.data, part);
        if (n <= 0)
            return n;
        l->begin = l->at;
        l->end = l->at + (uint64_t)n;
    }
    if (bytes > l->end - l->at)
        bytes = (size_t)(l->end - l->at);
    memcpy(to, l->ahead.data + (l->at - l->begin), bytes);
    l->at += bytes;
    return (int64_t)bytes;
}

static void seek(level *l, uint64_t offset)
{
    l->at = offset;
    l->p.offset = offset;
    l->p.remaining = offset < l->bytes ? l->bytes - offset : 0;
    l->p.has_next = 0;
}

static void swap(kvt_snap_buffer *a, kvt_snap_buffer *b)
{
    kvt_snap_buffer was = *a;
    *a = *b;
    *b = was;
}

/*
 * What a level is read with, before and behind that: one for all of them, since there may be many.
 * For blocks the child lends its jobs and digests, too.
 */
static void exchange(kvt_snap_chain *chain, level *l, kvt_snap_parser *child)
{
    kvt_snap_jobs jobs = l->p.jobs;

    swap(&l->p.payload, &chain->payload);
    swap(&l->p.native, &chain->native);
    l->p.decoder = l->p.decoder == &chain->codec ? &l->p.codec : &chain->codec;
    if (!child)
        return;
    l->p.jobs = child->jobs;
    child->jobs = jobs;
    swap(&l->p.digests, &child->digests);
}

/* What the decryption of a level says, with its name, or `otherwise`. */
static kvt_status crypt_failed(const level *l, kvt_status otherwise)
{
    return l->crypt.failure == KVT_OK
               ? otherwise
               : kvt_snap_fail(l->p.context, l->crypt.failure, "%s%s", l->p.name, l->crypt.text);
}

/* What a failed read says, in place of a plain KVT_ERR_IO. */
static kvt_status explain(const level *l, kvt_status status)
{
    kvt_status why = KVT_OK;

    if (status != KVT_ERR_IO)
        return status;
    if (l->encrypted)
        why = crypt_failed(l, KVT_OK);
    if (why == KVT_OK)
        why = kvt_snap_file_failure(&l->file, l->path);
    return why != KVT_OK ? why : status;
}

/* ---- opening ---- */

static void close_level(const kvt_snap_context *context, level *l)
{
    kvt_snap_parser_release(&l->p);
    if (l->encrypted)
        kvt_snap_crypt_release(&l->crypt);
    if (l->mapped.memory && !l->mapped.owner)
        kvt_snap_unmap(&l->mapped);
    kvt_snap_file_close(&l->file);
    kvt_snap_release(context, &l->ahead);
    kvt_snap_release(context, &l->places);
    kvt_snap_release(context, &l->chunks);
    kvt_snap_free(context, l, sizeof *l);
}

void kvt_snap_chain_close(const kvt_snap_context *context, kvt_snap_chain *chain)
{
    if (!chain)
        return;
    while (chain->n)
        close_level(context, chain->levels[--chain->n]);
    kvt_snap_codec_release(&chain->codec);
    kvt_snap_release(context, &chain->payload);
    kvt_snap_release(context, &chain->native);
    kvt_snap_free(context, chain, sizeof *chain);
}

static int by_id(const void *a, const void *b)
{
    return memcmp(a, b, KVT_SNAP_ID_BYTES);
}

/* Of those with one id the one with the least number comes first. */
static int by_id_and_number(const void *a, const void *b)
{
    const place *x = a, *y = b;
    int order = by_id(x, y);

    if (order)
        return order;
    if (x->number != y->number)
        return x->number < y->number ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Of those that are the same the first one in the index comes first. */
static int by_first(const void *a, const void *b)
{
    const chunk *x = a, *y = b;

    if (x->type != y->type)
        return x->type < y->type ? -1 : 1;
    if (x->first != y->first)
        return x->first < y->first ? -1 : 1;
    return (x->at > y->at) - (x->at < y->at);
}

static int is_of_tokens(uint32_t type)
{
    return type == KVT_SNAP_TOKEN_IDS || type == KVT_SNAP_POSITIONS || type == KVT_SNAP_SHIFTS;
}

/* The sections of tokens of a level's index. */
static kvt_status sort_chunks(level *l)
{
    const kvt_snap_parser *p = &l->p;
    size_t n = 0, at;
    chunk *chunks;
    kvt_status status;

    for (at = 0; at < p->index_bytes; at += KVT_SNAP_NOTE_BYTES)
        n += (size_t)is_of_tokens(kvt_get32(p->index.data + at));
    status = kvt_snap_reserve(p->context, &l->chunks, 0, n * sizeof *chunks, "a parent's tokens");
    if (status != KVT_OK)
        return status;
    chunks = (chunk *)(void *)l->chunks.data;
    for (at = 0; at < p->index_bytes; at += KVT_SNAP_NOTE_BYTES) {
        const unsigned char *entry = p->index.data + at;
        if (!is_of_tokens(kvt_get32(entry)))
            continue;
        chunks[l->n_chunks].type = kvt_get32(entry);
        chunks[l->n_chunks].first = kvt_get64(entry + 8);
        chunks[l->n_chunks++].at = at;
    }
    kvt_sort(chunks, l->n_chunks, sizeof *chunks, by_first);
    return KVT_OK;
}

/* The blocks of a level's index, by their ids; of several with one id the first. */
static kvt_status sort_places(level *l)
{
    const unsigned char *entry = l->p.index.data;
    size_t n = l->p.index_bytes / KVT_SNAP_NOTE_BYTES, kept = 0, i;
    place *places;
    kvt_status status =
        kvt_snap_reserve(l->p.context, &l->places, 0, n * sizeof *places, "a parent's blocks");

    if (status != KVT_OK)
        return status;
    places = (place *)(void *)l->places.data;
    for (i = 0; i < n; i++, entry += KVT_SNAP_NOTE_BYTES)
        if (kvt_get32(entry) == KVT_SNAP_BLOCK) {
            place *to = &places[l->n_places++];
            memcpy(to->id, entry + 32, sizeof to->id);
            to->number = kvt_get64(entry + 8);
            to->offset = kvt_get64(entry + 16);
        }
    kvt_sort(places, l->n_places, sizeof *places, by_id_and_number);
    for (i = 0; i < l->n_places; i++)
        if (i == 0 || by_id(&places[kept - 1], &places[i]) != 0)
            places[kept++] = places[i];
    l->n_places = kept;
    return KVT_OK;
}

/* Whether the index has the parent section that was read, and no other. noted: its entry, or 0 */
static int has_parent_noted(const kvt_snap_parser *p, const unsigned char *noted)
{
    size_t at;

    for (at = 0; at < p->index_bytes; at += KVT_SNAP_NOTE_BYTES)
        if (kvt_get32(p->index.data + at) == KVT_SNAP_PARENT) {
            if (!noted || memcmp(p->index.data + at, noted, KVT_SNAP_NOTE_BYTES) != 0)
                return 0;
            noted = NULL;
        }
    return !noted;
}

/*
 * Sections of later versions have their flags in the index: what may not be passed over is not,
 * wherever it stands.
 */
static kvt_status check_entries(kvt_snap_parser *p)
{
    size_t at;

    for (at = 0; at < p->index_bytes; at += KVT_SNAP_NOTE_BYTES) {
        const unsigned char *entry = p->index.data + at;
        uint32_t type = kvt_get32(entry), flags = kvt_get32(entry + 4);
        int known = type >= KVT_SNAP_TOKEN_IDS && type <= KVT_SNAP_LAST_TYPE;
        if (!known && flags == KVT_SNAP_REQUIRED)
            return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                                 "%ssnapshot with a section of type %u at offset %llu, which this "
                                 "build does not know",
                                 p->name, (unsigned)type,
                                 (unsigned long long)kvt_get64(entry + 16));
        if (flags || type == KVT_SNAP_LAYER || type == KVT_SNAP_IMAGES ||
            type == KVT_SNAP_DIGESTS || type == KVT_SNAP_INDEX || type == KVT_SNAP_END)
            return kvt_snap_corrupt(p, "entry %zu", at / KVT_SNAP_NOTE_BYTES);
    }
    return KVT_OK;
}

/*
 * The end and the index, which is in p.index then, and the snapshot's id. p.index: if there is a
 * parent section, its entry is the last one.
 */
static kvt_status read_index(level *l, int is_delta)
{
    const uint64_t tail = KVT_SNAP_SECTION_BYTES + KVT_SNAP_END_BYTES;
    unsigned char end[KVT_SNAP_END_BYTES], sum[KVT_SNAP_SUM_BYTES], noted[KVT_SNAP_NOTE_BYTES];
    kvt_snap_parser *p = &l->p;
    uint64_t offset, bytes;
    kvt_snap_section s;
    kvt_status status;

    assert(l->bytes > tail); /* there is a header, which is longer */
    if (is_delta)
        memcpy(noted, p->index.data + p->index_bytes - sizeof noted, sizeof noted);
    p->by_index = 1;
    seek(l, l->bytes - tail);
    status = kvt_snap_expect(p, KVT_SNAP_END, 0, &s);
    if (status == KVT_OK)
        status = kvt_snap_take(p, end, sizeof end);
    if (status != KVT_OK)
        return status;
    offset = kvt_get64(end);
    if (s.bytes != sizeof end || !kvt_snap_same_sum(kvt_get64(end + 32), kvt_snap_sum(end, 32)) ||
        kvt_get64(end + 8) != l->bytes || offset > l->bytes - tail ||
        memcmp(end + 40, KVT_SNAP_FOOTER, KVT_SNAP_MAGIC_BYTES) != 0)
        return kvt_snap_corrupt(p, "the footer");
    seek(l, offset);
    status = kvt_snap_expect(p, KVT_SNAP_INDEX, 0, &s);
    if (status != KVT_OK)
        return status;
    bytes = s.bytes - KVT_SNAP_SUM_BYTES;
    if (s.bytes < KVT_SNAP_SUM_BYTES || bytes % KVT_SNAP_NOTE_BYTES || bytes > SIZE_MAX / 2)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    status = kvt_snap_take_growing(p, &p->index, 0, (size_t)bytes, "a parent's index");
    if (status == KVT_OK)
        status = kvt_snap_take(p, sum, sizeof sum);
    if (status != KVT_OK)
        return status;
    p->index_bytes = (size_t)bytes;
    if (!kvt_snap_same_sum(kvt_get64(sum), kvt_snap_sum(p->index.data, p->index_bytes)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    if (!has_parent_noted(p, is_delta ? noted : NULL))
        return kvt_snap_corrupt(p, "it does not have the parent section");
    status = check_entries(p);
    if (status == KVT_OK)
        status = kvt_snap_expect(p, KVT_SNAP_END, 0, &s);
    if (status != KVT_OK)
        return status;
    if (s.offset != l->bytes - tail)
        return kvt_snap_corrupt(p, "there are two");
    kvt_snap_make_id(p->header_at.data, p->header_bytes, p->index.data, p->index_bytes, l->id);
    if (memcmp(end + 16, l->id, sizeof l->id) != 0)
        return kvt_snap_corrupt(p, "the snapshot's id");
    status = sort_chunks(l);
    return status == KVT_OK ? sort_places(l) : status;
}

/* The same model: all but what grows with the tokens. */
static kvt_status check_header(const level *l, const kvt_snap_header *child)
{
    const kvt_snap_header *header = &l->header;

    if (header->n_groups == child->n_groups && header->n_layers == child->n_layers &&
        memcmp(header->groups, child->groups, header->n_groups * sizeof *header->groups) == 0 &&
        memcmp(header->layers, child->layers, header->n_layers * sizeof *header->layers) == 0 &&
        header->fingerprint_bytes == child->fingerprint_bytes &&
        memcmp(header->fingerprint, child->fingerprint, child->fingerprint_bytes) == 0)
        return KVT_OK;
    return kvt_snap_fail(l->p.context, KVT_ERR_MISMATCH,
                         "the parent is of another model, geometry or storage type: %s", l->path);
}

static kvt_status open_source(level *l, const kvt_snap_input *input)
{
    kvt_snap_source source = {l, source_read, l->file.bytes};
    kvt_status status;

    l->bytes = l->file.bytes;
    if (!input->key)
        return KVT_OK;
    l->encrypted = 1;
    status = kvt_snap_decrypt_open(l->p.context, input->key, &source, &l->crypt, &l->bytes);
    return explain(l, crypt_failed(l, status));
}

/* path: in l->path. */
static kvt_status open_level(const kvt_snap_context *context, const kvt_snap_input *input,
                             const kvt_snap_header *child, level *l)
{
    kvt_status status;
    int is_delta;

    kvt_snap_parser_init(&l->p, context, input, &no_sink, &l->header);
    (void)snprintf(l->p.name, sizeof l->p.name, "in the parent %.47s, ", /* cut, not the comma */
                   l->path + kvt_snap_folder_bytes(l->path));
    status = kvt_snap_file_open_named(context, l->path, &l->file);
    if (status == KVT_OK)
        status = kvt_snap_reserve(context, &l->ahead, 0, AHEAD_BYTES, "a file's buffer");
    if (status == KVT_OK)
        status = open_source(l, input);
    if (status == KVT_OK && input->mapped && !l->encrypted)
        status = kvt_snap_file_map(&l->file, l->path, &l->mapped);
    if (status != KVT_OK)
        return status;
    l->input.bytes = l->bytes;
    l->input.reader.user = l;
    l->input.reader.read = level_read;
    if (l->mapped.memory) {
        l->input.memory = l->mapped.memory;
        l->input.mapped = &l->mapped;
    }
    l->p.input = &l->input;
    seek(l, 0);
    status = kvt_snap_read_header(&l->p);
    if (status == KVT_OK)
        status = kvt_snap_read_parent(&l->p, &is_delta);
    if (status == KVT_OK)
        status = check_header(l, child);
    if (status == KVT_OK)
        status = read_index(l, is_delta);
    return explain(l, status);
}

static kvt_status new_level(kvt_snap_chain *chain, level **made)
{
    void *memory;
    kvt_status status =
        kvt_snap_alloc(chain->context, sizeof **made, "the parent of a snapshot", &memory);

    if (status != KVT_OK)
        return status;
    memset(memory, 0, sizeof **made);
    *made = memory;
    (*made)->file.fd = (*made)->file.folder = (*made)->file.lock = -1;
    (*made)->file.context = chain->context;
    (*made)->p.context = chain->context;
    (*made)->p.header = &(*made)->header;
    chain->levels[chain->n++] = *made;
    return KVT_OK;
}

/* The parents of what `parent` is the section of, to the end. */
static kvt_status open_parents(kvt_snap_chain *chain, const kvt_snap_input *input,
                               const kvt_snap_header *header, const kvt_snap_parent *parent)
{
    while (parent->depth) {
        uint64_t needed = parent->inherited;
        uint32_t depth = parent->depth;
        level *l;
        kvt_status status;

        if (!input->folder)
            return kvt_snap_fail(chain->context, KVT_ERR_IO,
                                 "the snapshot is a delta: where its parent %s is has to be given "
                                 "(load options: folder)",
                                 parent->name);
        assert(chain->n < KVT_MAX_DEPTH); /* the first depth is at most that, and each one less */
        status = new_level(chain, &l);
        if (status != KVT_OK)
            return status;
        if (!kvt_snap_path_in(input->folder, parent->name, l->path))
            return kvt_snap_fail(chain->context, KVT_ERR_IO, "a parent's path is too long: %s",
                                 parent->name);
        status = open_level(chain->context, input, header, l);
        if (status != KVT_OK)
            return status;
        if (memcmp(l->id, parent->id, sizeof l->id) != 0)
            return kvt_snap_fail(chain->context, KVT_ERR_MISMATCH,
                                 "the parent is another snapshot than the delta was saved for: %s",
                                 l->path);
        if (l->header.n_tokens < needed || l->p.parent.depth != depth - 1)
            return kvt_snap_fail(chain->context, KVT_ERR_CORRUPT,
                                 "snapshot damaged: its tokens or depth do not fit its parent: %s",
                                 l->path);
        parent = &l->p.parent;
    }
    return KVT_OK;
}

static kvt_status new_chain(const kvt_snap_context *context, kvt_snap_chain **chain)
{
    void *memory;
    kvt_status status =
        kvt_snap_alloc(context, sizeof **chain, "the parents of a snapshot", &memory);

    if (status == KVT_OK) {
        memset(memory, 0, sizeof **chain);
        *chain = memory;
        (*chain)->context = context;
        kvt_snap_codec_init(&(*chain)->codec, context);
    }
    return status;
}

kvt_status kvt_snap_chain_open(const kvt_snap_context *context, const kvt_snap_input *input,
                               const kvt_snap_header *header, const kvt_snap_parent *parent,
                               kvt_snap_chain **chain)
{
    kvt_status status = new_chain(context, chain);
    return status == KVT_OK ? open_parents(*chain, input, header, parent) : status;
}

kvt_status kvt_snap_chain_open_path(const kvt_snap_context *context, const char *path,
                                    const unsigned char *key, const kvt_snap_header *header,
                                    kvt_snap_parent *parent, kvt_snap_chain **chain)
{
    char folder[KVT_SNAP_PATH_BYTES];
    size_t n = kvt_snap_folder_bytes(path);
    kvt_snap_input input;
    level *l;
    kvt_status status;

    if (strlen(path) >= sizeof folder)
        return kvt_snap_fail(context, KVT_ERR_IO, "a parent's path is too long: %s", path);
    memcpy(folder, path, n);
    folder[n] = '\0';
    memset(&input, 0, sizeof input);
    input.key = key;
    input.folder = folder;
    status = new_chain(context, chain);
    if (status == KVT_OK)
        status = new_level(*chain, &l);
    if (status != KVT_OK)
        return status;
    memcpy(l->path, path, strlen(path) + 1);
    status = open_level(context, &input, header, l);
    if (status != KVT_OK)
        return status;
    if (l->p.parent.depth >= KVT_MAX_DEPTH)
        return kvt_snap_fail(context, KVT_ERR_LIMIT,
                             "save: the parent has %u parents already, the most there can be: fold "
                             "them (kvtile merge)",
                             (unsigned)l->p.parent.depth);
    memcpy(parent->id, l->id, sizeof l->id);
    parent->depth = l->p.parent.depth + 1;
    return open_parents(*chain, &input, header, &l->p.parent);
}

/* ---- what they have ---- */

uint64_t kvt_snap_chain_n_tokens(const kvt_snap_chain *chain)
{
    return chain->levels[0]->header.n_tokens;
}

uint64_t kvt_snap_chain_longest(const kvt_snap_chain *chain)
{
    uint64_t longest = 0;
    uint32_t i;

    for (i = 0; i < chain->n; i++)
        if (longest < chain->levels[i]->header.n_tokens)
            longest = chain->levels[i]->header.n_tokens;
    return longest;
}

static const place *find(const level *l, const unsigned char *id)
{
    return l->n_places ? bsearch(id, l->places.data, l->n_places, sizeof(place), by_id) : NULL;
}

/* The first level that has a block, and where; NULL: none has. */
static level *find_level(const kvt_snap_chain *chain, const unsigned char *id, const place **where)
{
    uint32_t i;

    for (i = 0; i < chain->n; i++) {
        *where = find(chain->levels[i], id);
        if (*where)
            return chain->levels[i];
    }
    return NULL;
}

int kvt_snap_chain_has(const kvt_snap_chain *chain, const unsigned char *id)
{
    const place *where;
    return find_level(chain, id, &where) != NULL;
}

int kvt_snap_chain_has_file(const kvt_snap_chain *chain, const char *path, int fd)
{
    uint32_t i;
    int same = 0;

    for (i = 0; i < chain->n && !same; i++)
        same = kvt_snap_file_is(&chain->levels[i]->file, path, fd);
    return same;
}

/* The section of a level that token `token` is in, whose first token is *first. */
static const unsigned char *find_chunk(const level *l, uint32_t type, uint64_t token,
                                       uint64_t *first)
{
    const chunk *chunks = (const chunk *)(const void *)l->chunks.data;
    uint64_t from = l->p.parent.inherited;
    size_t low = 0, high = l->n_chunks;
    chunk wanted;

    *first = from + (token - from) / KVT_SNAP_CHUNK_TOKENS * KVT_SNAP_CHUNK_TOKENS;
    wanted.type = type;
    wanted.first = *first;
    wanted.at = 0;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (by_first(&chunks[middle], &wanted) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low < l->n_chunks && chunks[low].type == type && chunks[low].first == *first
               ? l->p.index.data + chunks[low].at
               : NULL;
}

/* Those of tokens first .. first + n - 1, all in one section of the level. */
static kvt_status read_tokens(kvt_snap_chain *chain, level *l, uint32_t kind, uint64_t first,
                              uint32_t n, unsigned char *values)
{
    uint32_t type = kind == KVT_SNAP_KIND_TOKEN_IDS   ? KVT_SNAP_TOKEN_IDS
                    : kind == KVT_SNAP_KIND_POSITIONS ? KVT_SNAP_POSITIONS
                                                      : KVT_SNAP_SHIFTS;
    unsigned char digest[KVT_SNAP_ID_BYTES];
    const unsigned char *entry, *all;
    uint64_t begin, left;
    size_t index_bytes = l->p.index_bytes, at;
    kvt_status status;

    if (kind == KVT_SNAP_KIND_SHIFTS && !(l->header.flags & KVT_SNAP_MOVED)) {
        memset(values, 0, n * (size_t)4);
        return KVT_OK;
    }
    entry = find_chunk(l, type, first, &begin);
    if (!entry)
        return kvt_snap_corrupt(&l->p, "its index lacks tokens %llu", (unsigned long long)first);
    at = (size_t)(entry - l->p.index.data);
    seek(l, kvt_get64(entry + 16));
    left = l->header.n_tokens - begin;
    exchange(chain, l, NULL);
    status = kvt_snap_read_chunk(
        &l->p, type, kind, begin,
        left < KVT_SNAP_CHUNK_TOKENS ? (uint32_t)left : KVT_SNAP_CHUNK_TOKENS, &all, digest);
    if (status == KVT_OK)
        memcpy(values, all + (first - begin) * 4, n * (size_t)4);
    exchange(chain, l, NULL);
    l->p.index_bytes = index_bytes; /* it is the file's own: nothing is to be noted in it */
    if (status != KVT_OK)
        return explain(l, status);
    entry = l->p.index.data + at; /* which may lie elsewhere now */
    if (memcmp(digest, entry + 32, sizeof digest) != 0)
        return kvt_snap_corrupt(&l->p, "its tokens do not make their digest");
    return KVT_OK;
}

kvt_status kvt_snap_chain_tokens(kvt_snap_chain *chain, uint32_t kind, uint64_t first, uint32_t n,
                                 unsigned char *values)
{
    while (n) {
        uint32_t i = 0, part = n;
        uint64_t begin;
        level *l = chain->levels[0], *unmoved = NULL; /* on the way, of which no key has moved */
        kvt_status status;

        while (first < l->p.parent.inherited) { /* its parent has it */
            uint64_t left = l->p.parent.inherited - first;
            part = left < part ? (uint32_t)left : part;
            if (kind == KVT_SNAP_KIND_SHIFTS && !(l->header.flags & KVT_SNAP_MOVED))
                unmoved = l;
            l = chain->levels[++i];
        }
        begin = (first - l->p.parent.inherited) % KVT_SNAP_CHUNK_TOKENS;
        if (part > KVT_SNAP_CHUNK_TOKENS - begin)
            part = (uint32_t)(KVT_SNAP_CHUNK_TOKENS - begin);
        status = read_tokens(chain, l, kind, first, part, values);
        if (status != KVT_OK)
            return status;
        if (unmoved && !kvt_snap_zeros_from(values, 0, part * (size_t)4))
            return kvt_snap_corrupt(&unmoved->p, KVT_SNAP_MOVED_TEXT);
        values += part * (size_t)4;
        first += part;
        n -= part;
    }
    return KVT_OK;
}

/*
 * How many entries of the child's table each level has: a mapping of its file has room for these
 * and no more, so that all mappings of a chain together have as much as the table.
 */
static void count_blocks(kvt_snap_chain *chain, const kvt_snap_parser *child)
{
    const unsigned char *entry = child->table.data;
    uint64_t b;

    if (chain->counted || !child->sink->map)
        return;
    chain->counted = 1;
    for (b = 0; b < child->header->n_blocks; b++, entry += KVT_SNAP_ENTRY_BYTES) {
        const place *where;
        level *l = entry[30] ? find_level(chain, entry, &where) : NULL;
        if (l)
            l->p.n_here++;
    }
}

static void add_counts(kvt_snap_counts *to, kvt_snap_counts *from)
{
    to->stored_bytes += from->stored_bytes;
    to->native_bytes += from->native_bytes;
    to->n_elements += from->n_elements;
    to->n_native_blocks += from->n_native_blocks;
    memset(from, 0, sizeof *from);
}

kvt_status kvt_snap_chain_block(kvt_snap_chain *chain, const unsigned char *id,
                                const kvt_snap_block *at, kvt_snap_parser *child)
{
    unsigned char found[KVT_SNAP_ID_BYTES];
    const place *where;
    size_t index_bytes;
    kvt_status status;
    level *l = find_level(chain, id, &where);

    if (!l)
        return kvt_snap_corrupt(child, "no parent has the block of group %u, tokens from %llu",
                                (unsigned)at->group, (unsigned long long)at->row * KVT_TOKENS);
    count_blocks(chain, child);
    exchange(chain, l, child);
    l->p.sink = child->sink;
    l->p.child = child;
    index_bytes = l->p.index_bytes;
    seek(l, where->offset);
    status = kvt_snap_read_block(&l->p, where->number, at, NULL, id, found);
    l->p.index_bytes = index_bytes;
    l->p.sink = &no_sink;
    l->p.child = NULL;
    exchange(chain, l, child);
    add_counts(&child->counts, &l->p.counts);
    return explain(l, status);
}
