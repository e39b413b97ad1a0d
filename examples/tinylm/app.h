/* What the commands of the tinylm program share. */
#ifndef TINYLM_APP_H
#define TINYLM_APP_H

#include "tinylm.h"

#include <kvtile/store.h>

enum {
    PREFILL_TOKENS = 256,                 /* a step while a prompt is read */
    MAX_DRAFT = KVT_SELECT_TOKENS - 1,    /* a step is a token and its draft */
    DEFAULT_SINKS = 4,                    /* of a window */
    SHIFT_KEEPS = KVT_BLOCK_TOKENS,       /* tokens at the beginning that no shift leaves out */
    SHIFT_CONTEXT = 3 * KVT_BLOCK_TOKENS, /* the shortest context that can be shifted */
    SHIFT_WINDOW = 4 * KVT_BLOCK_TOKENS   /* what it has to have beyond a window */
};

/* Stories from here on are for evaluation: train.py never trains on them. */
#define HELD_OUT_SEED (UINT64_C(1) << 40)

typedef struct options {
    const char *command, *program;
    const char *model, *tokenizer;
    const char *prompt, *save, *load, *text, *store;
    kvt_type k_type, v_type;
    bool k_given, v_given, ids, shift, sinks_given;
    uint64_t seed;
    uint64_t threads, n, stories, tokens, chunk;
    uint64_t context, window, sinks, draft, parallel; /* 0: not given */
    double temperature, top_p;
} options;

/* Fill o from the command line; -1 with the cause in err. -h and --help set *help. */
int options_parse(options *o, int argc, char **argv, bool *help, tl_error *err);
void options_help(const char *command);
const char *type_name(kvt_type type);

/* Model, tokenizer and threads. */
typedef struct engine {
    tl_model model;
    tl_tokenizer *tokenizer;
    tl_work *work;
} engine;

int engine_open(engine *e, const options *o, tl_error *err);
void engine_close(engine *e);

/* A line of progress on stderr, overwritten in place on a terminal, else four are shown. */
void progress(const char *what, size_t done, size_t all);

/* What decoding has done so far, for the line at the end. */
typedef struct dialog_counts {
    size_t tokens, steps, drafted, accepted;
    double seconds;
    uint64_t most_bytes; /* that the sequence has had after a step */
} dialog_counts;

/* A conversation: the tokens so far and a session that holds all of them but perhaps the last. */
typedef struct dialog {
    const engine *engine;
    tl_kv_settings settings;
    tl_kvtile kv;
    tl_session session;
    tl_sampler sampler;
    int32_t *tokens; /* [context] */
    size_t n_tokens, context;
    size_t n_draft; /* the longest draft; 0: plain decoding */
    bool shift;     /* leave out the oldest tokens when the context is full */
    float *logits;  /* [1 + n_draft][vocab_size] */
    float *last;    /* [vocab_size]: the last token's, where has_last says so */
    bool has_last;
    uint32_t *order;
    dialog_counts counts;
    const kvt_store *store; /* where prompts' prefixes are looked up; NULL: nowhere */
    const kvt_prefix_options *prefix_options; /* for it; or NULL */
    kvt_prefix_result got;                    /* from it */
    bool show_ids;                            /* print token ids, one a line, instead of text */
    bool silent, echo; /* nothing is printed; the prompt is printed once it is accepted */
    bool refused;      /* the last turn, for its length: nothing has changed */
} dialog;

int dialog_open(dialog *d, const engine *e, const options *o, tl_error *err);
void dialog_close(dialog *d);

/* Take over a snapshot's tokens; the types come from it unless --k or --v name others. */
int dialog_load(dialog *d, const char *path, tl_error *err);
int dialog_save(dialog *d, const char *path, tl_error *err);

/* Types of a snapshot, for options that do not set them. */
int snapshot_types(options *o, tl_error *err);

/*
 * One turn: the prompt's tokens (none when it is NULL or empty) and n sampled ones, all of
 * them in the cache afterwards. Ends early when the context is full or the model ends the text.
 */
int dialog_turn(dialog *d, const char *prompt, size_t n, tl_error *err);

/* Its first half: read the prompt; d->logits[0] are then those of the conversation's last token. */
int dialog_read(dialog *d, const char *prompt, tl_error *err);

/* Print a token's text, or its id where they are asked for. */
void dialog_show(const dialog *d, int32_t previous, int32_t token);

/* The model has ended its text. */
bool is_end(int32_t token);

/* Lines on stderr: what the window has saved, what drafts have gained. */
void dialog_report(const dialog *d);

/*
 * n_texts continuations of one prompt, of n tokens each, on forks of the conversation; text i is
 * that of seed + i alone. Prints them and what they take.
 */
int dialog_parallel(dialog *d, const char *prompt, size_t n_texts, size_t n, tl_error *err);

/* One row of the table that eval and demo print. */
typedef struct table_row {
    const char *name;
    double bytes_per_token; /* memory of the sequence, its blocks and table, over its length */
    const tl_score *score;
    double snapshot_bytes, attend_tokens_per_s; /* 0: not measured */
} table_row;

/* Row 0 is the reference. */
void table_print(const table_row *rows, size_t n);

int cmd_generate(const options *o, tl_error *err);
int cmd_chat(options *o, tl_error *err);
int cmd_eval(const options *o, tl_error *err);
int cmd_demo(const options *o, tl_error *err);
int cmd_serve_demo(const options *o, tl_error *err);
int cmd_stories(const options *o, tl_error *err);

#endif
