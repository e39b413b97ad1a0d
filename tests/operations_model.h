/*
 * The plain model of test_operations.c: what the sequences of a run should be, their logs and
 * mirrors, and the comparisons. The head comment of test_operations.c says how they go together.
 *
 * Which answer a call has to give, how many bytes a sequence has and whether it equals one that
 * got its tokens in one step follows from the model alone (operations_forms.c), by the rules of
 * the header and docs/design.md.
 */
#ifndef KVT_TEST_OPERATIONS_MODEL_H
#define KVT_TEST_OPERATIONS_MODEL_H

#include "memory_store.h"
#include "snapshot_support.h"

enum {
    SEQS = 6,
    MOST = 720, /* tokens of a sequence */
    GROUPS = 2,
    LAYERS = 4,
    MAX_DIM = 64,
    MAX_HEADS = 2,
    POINTS = 8, /* checkpoints of a sequence: as many as its list has room for at first */
    BLOB_BYTES = 90
};

typedef struct token {
    uint32_t content;
    int32_t position, id;
    int32_t key; /* the position that its key was computed at */
} token;

typedef enum kind {
    STEP,       /* n tokens, committed */
    DROPPED,    /* a step that was begun and aborted */
    TRUNCATE,   /* to n tokens */
    REMOVE,     /* tokens first .. first + n - 1 */
    CHECKPOINT, /* with blob n */
    DROP,       /* of the checkpoint at n */
    POSITION,   /* the next one is n */
    TAG,        /* number n */
    RELOAD,     /* saved, and loaded from the file */
    GOT         /* from the store: number n of actor.got */
} kind;

typedef struct entry {
    kind kind;
    size_t n, first; /* of a step: its tokens in log.tokens */
} entry;

typedef struct history {
    entry *entries;
    token *tokens;
    size_t n_entries, n_tokens;
} history;

/*
 * Which blocks of a group are sealed, and which a window has released: tells when a sequence equals
 * one that never was longer.
 */
typedef struct form {
    size_t sealed; /* blocks */
    size_t final;  /* of these: no truncate opens them again */
    size_t marked; /* from this token on bytes may not be those of a straight build: the first that
                      was appended to a sealed block; SIZE_MAX: none */
    size_t first;  /* blocks behind the sinks and before it are released; 0: none is */
    uint32_t fine; /* a bit a block: sealed as i8 where the type is i4 or i5 */
    size_t reopened; /* a row that is open again, its open form there; SIZE_MAX: none */
} form;

/* A checkpoint: what the tokens do not say. */
typedef struct point {
    size_t n_tokens, blob;
    int32_t next_position;
    form forms[GROUPS];
} point;

typedef struct member {
    kvt_seq *seq; /* NULL: there is none */
    kvt_seq *mirror;
    size_t length, pending;
    uint32_t appended; /* a bit a layer, of the pending step */
    int reserves;
    int turned;            /* keys have moved since it was empty */
    int uncounted;         /* its bytes are not the mirror's: blocks of it may lie in a file */
    int32_t next_position; /* as set; -1: it is not */
    size_t unkeyed;        /* tokens from this one on are not put into stores; SIZE_MAX: none */
    uint32_t tag;          /* 0: none */
    token tokens[MOST];    /* the pending ones included */
    form forms[GROUPS];
    point points[POINTS];
    size_t n_points;
    history log;
} member;

/* Geometry and caches of a run. */
typedef struct world {
    uint64_t seed;
    kvt_group_config groups[GROUPS];
    float frequencies[GROUPS][MAX_DIM / 2];
    uint32_t n_groups, n_layers;
    uint32_t group_of_layer[LAYERS];
    uint64_t residual[GROUPS];
    int on_disk; /* snapshots are files, and may be deltas */
    int has_ids; /* all tokens have */
    int has_store;
    int moves;   /* RoPE is described */
    int is_wild; /* positions go back, too */
    kvt_config config;
    kvt_group_config other_groups[GROUPS]; /* of other types */
    kvt_config other;
    kvt_cache *cache;
    ledger memory;
    int injects;                     /* some allocations fail */
    int is_shared;                   /* several threads: nobody can add up bytes */
    uint64_t cache_bytes, seq_bytes; /* of the cache without sequences; of an empty one */
    uint64_t open_bytes[GROUPS], seed_bytes[GROUPS], sealed_bytes[GROUPS], fine_bytes[GROUPS],
        meta_bytes; /* a block's */
    size_t fine_rows[GROUPS];
} world;

/* What has happened. */
typedef struct tally {
    size_t forks, refused; /* calls */
    size_t selected, removed, loaded, mapped;
    size_t deltas;                       /* saved */
    size_t damaged, late;                /* files refused: by loads, at first use */
    size_t put, got, got_points, spoilt; /* prefixes */
    size_t converted, parts;
    size_t returned; /* truncates to checkpoints */
    size_t straight; /* comparisons with a straight build */
} tally;

/* A block that the store has. */
typedef struct stored_block {
    uint32_t group;
    size_t row;
    uint64_t name; /* of the tokens up to its end */
    size_t marked; /* its source's form.marked */
} stored_block;

typedef struct stored_point {
    uint64_t name;
    point point; /* its source's */
} stored_point;

/* One thread's sequences. */
typedef struct actor {
    world *w;
    rng r;
    kvt_cache *mirrors;
    kvt_cache *others; /* of the other types */
    kvt_seq *other;    /* what has been loaded there last, or NULL */
    member members[SEQS];
    char folder[40]; /* of a world on disk */
    bytes file;
    size_t depth; /* of it in a chain of deltas: its parent in the folder is at the one before */
    member filed; /* the sequence that the file was made of, without its handles */
    memory_store values, mirror_values;
    kvt_store store, mirror_store;
    stored_block *stored;        /* [n_stored] */
    bytes *got;                  /* [n_got]: what gets have made, as snapshots */
    stored_point *stored_points; /* [n_stored_points] */
    size_t n_stored, n_got, n_stored_points;
    uint32_t next_content;
    size_t operation;
    const char *name; /* of the operation */
    tally met;
} actor;

/* ---- failures: printed with the seed, since other threads' assertions end the process ---- */

void report(const actor *a, const char *where, const char *what);
void must_at(const actor *a, const kvt_cache *cache, kvt_status got, const char *where);
void check_at(const actor *a, int holds, const char *where);

#define must(a, call) must_at(a, (a)->w->cache, call, TEXT(__LINE__) ": " #call)
#define must_mirror(a, call) must_at(a, (a)->mirrors, call, TEXT(__LINE__) ": " #call)
#define check(a, condition) check_at(a, (condition) != 0, TEXT(__LINE__) ": " #condition)

void *room(size_t n);
/* Calls of the allocator so far, where no other thread makes any. */
size_t calls_of(const world *w);

/* ---- K and V of a token ---- */

/* Before all else. */
void make_normals(void);
/* Floats of a token, all heads. */
size_t row_floats(const world *w, uint32_t layer, kvt_side side);
/* Rows of n tokens, malloc'ed. */
float *rows_of(const world *w, const token *fed, size_t n, uint32_t layer, kvt_side side);
/* Turn n keys, as rows_of gives them, to the positions that the tokens have now. */
void turn_rows(const world *w, const token *fed, size_t n, uint32_t layer, float *keys);

/* ---- steps of a sequence, or of its mirror ---- */

void begin_step(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n);
/* By a call, or a plan whose tasks run in descending order. */
void append_layer(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n,
                  uint32_t layer, int by_plan);
void commit_step(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n);
void step_whole(const actor *a, const kvt_cache *cache, kvt_seq *seq, const token *fed, size_t n);
/* n new tokens with ids, at positions from `next` on. */
void some_tokens(actor *a, int32_t next, token *fed, size_t n);
/* An empty sequence with a tag. */
kvt_seq *tagged_seq(const actor *a, kvt_cache *cache, uint32_t tag);
/* Of a codec; without waiting for the disk. */
kvt_save_options save_options(uint32_t codec);
bytes save_raw(const actor *a, const kvt_cache *cache, const kvt_seq *seq);
/* The tag of a number, and the bytes of a blob: how many. */
size_t tag_of(size_t number, char *text);
size_t blob_of(size_t number, unsigned char *data);

/* ---- logs and mirrors ---- */

void log_add(history *l, kind what, size_t first, size_t n, const token *fed);
void log_free(history *l);
history log_copy(const history *from);
kvt_seq *replay(const actor *a, const history *l);
/* What was done to a member, into its log and its mirror. */
void did(const actor *a, member *m, kind what, size_t first, size_t n);
/* A copy of a model, without handles. */
void copy_model(member *to, const member *from);
/* The largest length up to n that the model reaches. */
size_t deepest(const actor *a, const member *m, size_t n);

/* ---- the model's rules: operations_forms.c ---- */

int seals(const world *w, uint32_t g);
int has_offset(const world *w, uint32_t g);
/* Blocks that a window leaves at the front. */
size_t sink_rows(const world *w, uint32_t g);
/* Full blocks of tokens older than the last `residual`. */
size_t older(size_t n_tokens, uint64_t residual);
/* Any begin: what the commit before it has sealed is sealed for good. */
void forms_begin(const world *w, form *forms, size_t length);
/* What was sealed stays so. */
void forms_settle(const world *w, form *forms);
/* After forms_begin: tokens length .. length + n - 1 are committed. */
void forms_commit(const world *w, form *forms, const token *fed, size_t length, size_t n);
/* What a snapshot leaves out behind windows: of a sequence or a checkpoint of `length` tokens. */
void forms_save(const world *w, form *forms, const token *fed, size_t length);
/* The first block behind the sinks that a sequence of these tokens needs; 0: all are. */
size_t first_needed(const world *w, uint32_t g, const token *fed, size_t length);
void forms_clear(form *forms);
/* The member has n tokens, after a truncate, or as a fork. */
void model_truncate(const world *w, member *m, size_t n);
/* Whether a truncate to n can be done. */
int model_reaches(const world *w, const member *m, size_t n);
/* What kvt_seq_remove has to answer. */
kvt_status model_removes(const world *w, const member *m, size_t first, size_t n);
/* After model_removes, where tokens are left behind. */
void model_remove(const world *w, member *m, size_t first, size_t n);
/* The last checkpoint at or before n; NULL: none. */
const point *point_before(const member *m, size_t n);
const point *point_at(const member *m, size_t n);
int32_t model_next_position(const member *m);
/* Whether a sequence equals one that got its tokens in one step. */
int is_straight(const world *w, const member *m);
/* Tokens first .. first + n - 1 of a layer are there. */
int is_there(const world *w, const member *m, uint32_t layer, size_t first, size_t n);
/* Whether a query at a position sees a token, by the layer's window. */
int is_in_sight(const world *w, const member *m, uint32_t layer, int32_t position, size_t index);
/* Bytes of a sequence that has no step pending, no reserve, no checkpoints and no turns. */
uint64_t model_bytes(const world *w, const member *m);
/* The most that a sequence's open blocks may be beyond the budget (kvt_memory_forecast). */
uint64_t exempt_bytes(const world *w, const member *m);

/* ---- comparisons ---- */

/* Tokens of a layer, the pending ones included where it has them. */
size_t visible(const member *m, uint32_t layer);
/* n rows as read back, near those of the tokens. to: the types they were converted to, or NULL. */
void expect_near(const actor *a, uint32_t layer, kvt_side side, const kvt_group_config *to,
                 const token *of, size_t n, const float *got);
/* Tokens first .. first + n - 1 as read back: the mirror's bits, near what was appended. */
void expect_read(const actor *a, const member *m, uint32_t layer, kvt_side side, size_t first,
                 size_t n);
void expect_same_file(const actor *a, const kvt_cache *cache, const kvt_seq *seq,
                      const kvt_cache *other_cache, const kvt_seq *other, const char *what);
/* All that a sequence shows is its mirror's. */
void expect_mirrored(const actor *a, const member *m);
/* A straight build in the mirrors' cache saves the same file, where it has to. */
void expect_straight(actor *a, const member *m);
void expect_all(const actor *a);
/* Nothing is lost, nothing is counted twice, and the budget is kept. */
void expect_bytes(const actor *a);

/* ---- calls that may be refused ---- */

/* Now and then one of the next allocations fails. */
void arm(actor *a);
/* arm, undone by a call that made no use of it. */
void disarm(const actor *a);
/* 1: the call has succeeded. 0: it was refused as it may be, and nothing has changed. */
int succeeded(actor *a, kvt_status status, const member *m);
/* Refused, for a reason that the model knows; nothing has changed. */
void refused(actor *a, kvt_status status, kvt_status expected, const member *m);
void clear(actor *a, member *m);
/* Of an empty member. */
void set_tag(actor *a, member *m, uint32_t number);

/* ---- operations_files.c ---- */

/* The member is saved; that is the run's file from now on. */
void save(actor *a, member *m);
/* The run's file into the member. */
void load(actor *a, member *m);
/* The same, damaged. */
void load_damaged(actor *a, member *m);
/* Some tokens of the member alone, saved and loaded. */
void save_part(actor *a, member *m);
/* The run's file from memory. */
kvt_status load_filed(const actor *a, kvt_seq *seq, kvt_load_options *options,
                      kvt_load_result *result);
void open_folder(actor *a);
void close_folder(const actor *a);

/* ---- operations_late.c ---- */

/* Load a damaged copy of the run's file, mapped and verified late, and go on for a while. 0: it was
   refused at once. */
int load_late(actor *a, const char *path);

/* ---- operations_store.c ---- */

void put_prefix(actor *a, member *m);
/* Into the member, which is cleared first. */
void get_prefix(actor *a, member *m);
/* Of a store one of whose values is damaged. The member is of no account. */
void get_spoilt(actor *a, member *m);
/* Whether this build makes keys. */
int has_store(const kvt_seq *seq);
void open_stores(actor *a);
void close_stores(actor *a);

/* ---- operations_convert.c ---- */

/* Types that the groups' files can be converted to. */
void some_other_types(world *w, rng *r);
/* The run's file, and the member, into the other types. */
void convert(actor *a, member *m);

/* ---- operations_attention.c ---- */

/* Attend over all sequences that have tokens, in a batch. The member is of no account. */
void attend(actor *a, member *m);

#endif
