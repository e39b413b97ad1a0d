/*
 * What the files of kvtile(1) share: the options, the exit codes, and errors, JSON, progress,
 * output files, keys, loaded snapshots and open stores. The library is used by its public headers
 * alone.
 */
#ifndef KVTILE_TOOLS_TOOL_H
#define KVTILE_TOOLS_TOOL_H

#include <kvtile/kvtile.h>
#include <kvtile/store.h>

#include <stdio.h>

/* Exit codes; of several files the largest. DIFFERENT is diff's. */
enum { SOUND = 0, DAMAGED = 1, DIFFERENT = 1, USAGE = 2, UNUSABLE = 3 };

/* The order of store ls: as the store has them, or sorted. */
enum { SORT_NONE = 0, SORT_KEY = 1, SORT_SIZE = 2, SORT_AGE = 3 };

#define TOOL_TEXT 512 /* room for the text of an error */

typedef struct tool_options {
    const char **files; /* [n_files] the arguments that are no options */
    int n_files;
    int json, quiet, progress;
    int quick, verify;                      /* info */
    int force;                              /* outputs may be there already */
    const char *npy, *output, *safetensors; /* dump: NULL where not asked for */
    kvt_dtype dtype;                        /* dump */
    int has_side;                           /* dump --output */
    kvt_side side;                          /* where has_side */
    int has_layers;                         /* dump: layers says which; else all */
    unsigned char layers[KVT_MAX_LAYERS];   /* 1: asked for */
    uint64_t first, end;                    /* --tokens; end UINT64_MAX: to the last one */
    uint32_t codec;                         /* convert, merge: KVT_CODEC_ */
    int32_t level;                          /* of zstd; 0: the library's default */
    int has_k_type, has_v_type;             /* convert: else as they are */
    kvt_type k_type, v_type;                /* where they are there */
    const char *key_file, *new_key_file;    /* NULL: none */
    int decrypt;                            /* convert, merge: the output has no key */
    unsigned char key[KVT_KEY_BYTES], new_key[KVT_KEY_BYTES]; /* what the files hold */
    int sort;                                                 /* store ls: SORT_ */
    int remove;                                               /* store verify: what is damaged */
    uint64_t max_bytes;                              /* store gc: the new bound; 0: none given */
    const char *password_file, *prefix;              /* store; NULL: none, as those below */
    const char *ca_file, *cert_file, *cert_key_file; /* of TLS */
} tool_options;

/* ---- commands: each answers an exit code ---- */

int info_run(const tool_options *o);
int verify_run(const tool_options *o);
int dump_run(const tool_options *o);
int diff_run(const tool_options *o);
int convert_run(const tool_options *o);
int merge_run(const tool_options *o);
int store_ls_run(const tool_options *o);
int store_stats_run(const tool_options *o);
int store_gc_run(const tool_options *o);
int store_verify_run(const tool_options *o);

/* ---- errors (report.c) ---- */

/*
 * The one line of an error, on stderr: "kvtile: FILE: TEXT"; with --json also the object of a file
 * that has failed, on stdout. Answers the exit code that belongs to the status.
 */
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
int tool_fail(const tool_options *o, const char *file, kvt_status status, const char *format, ...);

/* Likewise, where the command line asks for what the file does not have: USAGE. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int tool_refuse(const tool_options *o, const char *file, const char *format, ...);

/*
 * Whether the text ends with ": FILE", as the library's texts of files do: 2; 1: with the beginning
 * of that, where the library had no room for more; 0: neither. And cut it off.
 */
int tool_names(const char *text, const char *file);
int tool_cut_name(char *text, const char *file);

/* A name, or a text with names: on one line, without orders to a terminal. */
void tool_print_name(FILE *to, const char *name);
/* Two bytes that are a control character in UTF-8, U+0080 to U+009F: 1. */
int tool_is_control(const char *text);

const char *tool_type_name(kvt_type type);
void tool_print_hex(const uint8_t *bytes, uint32_t n);
/* A tag as it is, in quotes, where that is plain text, else as hex digits. */
void tool_print_tag(const uint8_t *tag, uint32_t tag_bytes);

/* ---- JSON on stdout (json.c) ---- */

void json_string(const char *text); /* in quotes; bytes that are no UTF-8 become U+FFFD */
void json_text(const char *text);   /* likewise, without the quotes */
void json_hex(const uint8_t *bytes, uint32_t n); /* in quotes */
void json_bool(int value);
/* {"file":FILE,"status":N,"ok":..., the object's beginning: each command goes on with a comma. */
void json_begin(const char *file, kvt_status status);

/* ---- progress on stderr (progress.c) ---- */

/*
 * From one second on, where stderr is a terminal, or at once and as lines with --progress: how much
 * of `what` is done of the file. One at a time; begin ends the one before.
 */
void progress_begin(const tool_options *o, const char *file, const char *what);
/* A kvt_progress; user is not looked at. Not 0 when a signal wants the program to end. */
int progress_step(void *user, uint64_t done, uint64_t total);
void progress_end(void);  /* all is done */
void progress_stop(void); /* no more is to come */
/* Behind an error that has not ended the work: go on with what progress_stop has stopped. */
void progress_resume(void);

/* ---- which files they are (paths.c) ---- */

/*
 * SOUND, or reported: a pipe, or something else that cannot be read more than once. It is not
 * opened; one that is missing is SOUND.
 */
int input_check(const tool_options *o, const char *path);

/* The input, and the parents of it that are there: all of them, if a load of it succeeds. */
typedef struct tool_inputs {
    uint32_t n;
    struct {
        uint64_t device, inode;
    } files[1 + KVT_MAX_DEPTH];
} tool_inputs;

void inputs_find(tool_inputs *inputs, const tool_options *o, const char *path);
/* SOUND, or reported: the output ("-": stdout) is an input (NULL: may be), or a key's file. */
int output_apart(const tool_options *o, const char *path, const tool_inputs *inputs);

/* Where an output goes: to a name in a folder, or to what is there and is written as it is. */
typedef struct tool_place {
    const char *path;   /* "-": stdout */
    char *target;       /* what has the name; NULL: none, or written as it is */
    uint64_t file[2];   /* device, inode; zeros: there is none yet */
    uint64_t folder[2]; /* of target */
} tool_place;

void place_find(tool_place *place, const char *path);
int place_is_same(const tool_place *a, const tool_place *b);
void place_release(tool_place *place);

/* ---- output files (output.c) ---- */

/*
 * A file that appears whole or not at all: written beside its name, synced, and renamed. "-" is
 * stdout; what is no regular file (a pipe, a device) is written as it is.
 */
typedef struct tool_output {
    const char *path;
    char *target;    /* what the temporary replaces: path, or what the link there leads to */
    char *temporary; /* NULL: written directly */
    FILE *file;
    int force;            /* a file of that name is replaced */
    char text[TOOL_TEXT]; /* why a call has failed */
} tool_output;

/* 0, or -1: a file is there and may not be replaced (text says so). For checks before the work. */
int output_check(const char *path, int force, char *text, size_t text_bytes);
/* 0, or -1 with a text in the output; then nothing is left of it. */
int output_open(tool_output *out, const char *path, int force);
int output_write(tool_output *out, const void *data, size_t bytes);
int output_commit(tool_output *out); /* the file is under its name, or -1 */
void output_discard(tool_output *out);

/* Path, or what a link there leads to: what an output replaces. From malloc; NULL: errno says. */
char *output_target(const char *path);
/* A name in the folder of path; from malloc. */
char *output_beside(const char *path, const char *name);
const char *output_name(const char *path); /* behind its folder */

/* So that a name in the folder of path outlasts a crash; what cannot be read is not synced. */
int output_sync_folder(const char *path); /* 0, or -1 with errno */
int output_stdout_failed(void);           /* of an output "-", which has been reported */

/*
 * From now on, as from output_open on, the signals that end a program are noted, so that no
 * temporary is left.
 */
void output_note_signals(void);
int output_interrupted(void);
int output_is_unread(void); /* by SIGPIPE: what is printed has no reader */
/* End by the signal that was noted; answers if there was none. */
void output_end_interrupted(void);

/* ---- keys (key.c) ---- */

/* SOUND, or reported. */
int key_read(const tool_options *o, const char *path, unsigned char key[KVT_KEY_BYTES]);
void key_forget(unsigned char key[KVT_KEY_BYTES]);

/* ---- a snapshot that is loaded (source.c) ---- */

typedef struct tool_source {
    const char *path;
    kvt_snapshot_info info;
    kvt_cache *cache; /* with the geometry of the file */
    kvt_seq *seq;     /* NULL where it is not loaded */
} tool_source;

/* A piece of the caller's. */
typedef struct tool_piece {
    char name[KVT_MAX_NAME + 1];
    uint64_t bytes;
} tool_piece;

typedef struct tool_pieces {
    tool_piece *list; /* [n], from malloc */
    size_t n, room;
} tool_pieces;

/*
 * What the file holds; without verify its header alone. SOUND, or reported. pieces (may be NULL)
 * gets those of the caller's, with verify.
 */
int source_describe(tool_source *s, const char *path, int verify, tool_pieces *pieces,
                    const tool_options *o);
typedef int (*tool_on_piece)(void *user, const kvt_snapshot_piece *piece); /* not 0: no memory */
/* The same and all of its tokens. Release it in any case. on_piece may be NULL. */
int source_load(tool_source *s, const char *path, tool_on_piece on_piece, void *user,
                const tool_options *o);
void source_release(tool_source *s);

/* Heads times dims of a side of the layer, and either of them. */
uint32_t source_heads(const tool_source *s, uint32_t layer);
uint32_t source_dims(const tool_source *s, uint32_t layer, kvt_side side);

/*
 * Which tokens of the loaded sequence the window of a group has released: *first .. *end - 1, none
 * where both are equal. KVT_OK, or what a read has answered.
 */
kvt_status source_released(const tool_source *s, uint32_t group, uint64_t *first, uint64_t *end);

/* ---- pieces of two snapshots (pieces.c) ---- */

/* A name, and what either of them has under it. */
typedef struct tool_pair {
    char name[KVT_MAX_NAME + 1];
    int has[2], equal;
    uint64_t bytes[2];
    unsigned char *data; /* of the first one, until the second one's is compared */
} tool_pair;

/* Zeros: none yet. */
typedef struct tool_pairs {
    tool_pair *list; /* [n], from malloc */
    size_t n, room;
} tool_pairs;

/* Each a tool_on_piece with the pairs as user; all of the first snapshot before the second. */
int pieces_first(void *user, const kvt_snapshot_piece *piece);
int pieces_second(void *user, const kvt_snapshot_piece *piece);
int pieces_equal(const tool_pairs *pairs);
void pieces_release(tool_pairs *pairs);

/* ---- stores (store_open.c) ---- */

typedef struct tool_store {
    const char *path; /* of a directory; NULL: a server */
    char name[1100];  /* of a server, without user and password */
    kvt_store store;
} tool_store;

/*
 * Open the store of a path or a URL that is there already. SOUND, or reported. kvt_store_close
 * closes it, also where it is not open.
 */
int store_open(tool_store *s, const char *name, const tool_options *o);
const char *store_name(const tool_store *s); /* as it is shown */

/* ---- formats of arrays (npy.c, safetensors.c) ---- */

typedef struct tool_array {
    char name[40];   /* as "layers.0.k" */
    char dtype[5];   /* "I32", "F32", "F16", "BF16": safetensors' names */
    uint32_t n_dims; /* 1 or 3 */
    uint64_t shape[3];
} tool_array;

uint64_t array_bytes(const tool_array *array);

/* NumPy's header of an array: up to NPY_HEADER bytes; answers how many. */
#define NPY_HEADER 192
size_t npy_header(char *header, const tool_array *array);

/* The header of a safetensors file, from malloc, with its size before it; NULL: no memory. */
char *safetensors_header(const tool_array *arrays, size_t n_arrays, const char *metadata,
                         size_t *bytes);

#endif
