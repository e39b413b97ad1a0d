/*
 * The command line: one table of flags, each with its range and the commands that take it, which
 * drives parsing, error messages and help.
 */
#include "app.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef TINYLM_DATA
#define TINYLM_DATA "."
#endif

enum { GENERATE = 1, CHAT = 2, EVAL = 4, DEMO = 8, STORIES = 16, SERVE = 32, ALL = 63 };

static const struct {
    const char *name, *summary;
    unsigned bit;
} commands[] = {
    {"generate", "continue a prompt", GENERATE},
    {"chat",
     "a conversation that can be put away and taken up again; prompts from --prompt or "
     "from the lines of stdin",
     CHAT},
    {"eval", "perplexity, divergence from the f32 cache and recall, on held-out stories or a text",
     EVAL},
    {"demo", "save, restore in a second process, compare; then the table of all types", DEMO},
    {"serve-demo", "two processes, one prompt: the second gets what the first has computed", SERVE},
    {"stories", "print the stories that the model was trained on or is evaluated with", STORIES},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

typedef enum kind { STRING, COUNT, REAL, TYPE, SWITCH } kind;

static const struct flag {
    const char *name, *value, *help;
    kind kind;
    size_t offset;
    double low, high;
    unsigned commands;
} flags[] = {
#define AT(field) offsetof(options, field)
    {"--model", "FILE", "tinylm's f16 file or a llama2.c checkpoint", STRING, AT(model), 0, 0,
     ALL & ~STORIES},
    {"--tokenizer", "FILE", "its tokenizer.bin", STRING, AT(tokenizer), 0, 0, ALL & ~STORIES},
    {"--prompt", "TEXT", "what the model continues", STRING, AT(prompt), 0, 0, GENERATE | CHAT},
    {"-n", "N", "tokens to generate (for each turn)", COUNT, AT(n), 0, 1 << 24, GENERATE | CHAT},
    {"--temperature", "X", "0: always the most likely token", REAL, AT(temperature), 0, 100,
     GENERATE | CHAT},
    {"--top-p", "X", "sample from the most likely tokens of this total probability", REAL,
     AT(top_p), 0.0001, 1, GENERATE | CHAT},
    {"--seed", "N", "of the sampling, or of the first story", COUNT, AT(seed), 0, 1e15, ALL},
    {"--k", "TYPE", "store keys as f32, f16, i8 or i4", TYPE, AT(k_type), 0, 0,
     GENERATE | CHAT | EVAL | SERVE},
    {"--v", "TYPE", "store values as f32, f16, i8, i4 or i5", TYPE, AT(v_type), 0, 0,
     GENERATE | CHAT | EVAL | SERVE},
    {"--threads", "N", "threads of products and attention", COUNT, AT(threads), 1, 256,
     ALL & ~STORIES},
    {"--save", "FILE", "put the conversation away at the end", STRING, AT(save), 0, 0, CHAT},
    {"--load", "FILE", "take a conversation up again", STRING, AT(load), 0, 0, CHAT},
    {"--ids", NULL, "print token ids, one a line, instead of text", SWITCH, AT(ids), 0, 0,
     GENERATE | CHAT},
    {"--ctx", "N", "tokens that the cache has room for; default: the model's context", COUNT,
     AT(context), 2, 1000000, GENERATE | CHAT},
    {"--window", "N", "layers see the last N tokens only, and older ones are released", COUNT,
     AT(window), 1, 1000000, GENERATE | CHAT},
    {"--sinks", "N", "and the first N tokens; default 4", COUNT, AT(sinks), 0, 1000000,
     GENERATE | CHAT},
    {"--draft", "N", "guess N tokens from the text so far and check them in one step", COUNT,
     AT(draft), 1, MAX_DRAFT, GENERATE | CHAT},
    {"--shift", NULL, "when the context is full, leave out the oldest tokens and go on", SWITCH,
     AT(shift), 0, 0, CHAT},
    {"--parallel", "N", "N continuations of --prompt, with the seeds from --seed on", COUNT,
     AT(parallel), 2, TL_BATCH, CHAT},
    {"--text", "FILE", "evaluate on this text instead of stories", STRING, AT(text), 0, 0, EVAL},
    {"--stories", "N", "how many stories", COUNT, AT(stories), 1, 1000000, EVAL | DEMO},
    {"--count", "N", "how many stories", COUNT, AT(stories), 1, 1000000, STORIES},
    {"--tokens", "N", "length of a story, or of a window of the text", COUNT, AT(tokens), 48, 65536,
     EVAL | DEMO | STORIES},
    {"--chunk", "N", "tokens appended in one step; 1: as in decoding", COUNT, AT(chunk), 1, 4096,
     EVAL},
    {"--store", "STORE", "a directory, or redis://host[:port]; default: a temporary directory",
     STRING, AT(store), 0, 0, SERVE},
    {"--prefix-tokens", "N", "length of the prompts' common part; default: what fits", COUNT,
     AT(tokens), 128, 65536, SERVE},
#undef AT
};
enum { N_FLAGS = sizeof flags / sizeof flags[0] };

static const char *const type_names[] = {"f32", "f16", "i8", "i4", "i5"};

const char *type_name(kvt_type type)
{
    return type_names[type];
}

static int parse_type(kvt_type *out, const char *text)
{
    for (size_t i = 0; i < sizeof type_names / sizeof type_names[0]; i++) {
        if (strcmp(text, type_names[i]) == 0) {
            *out = (kvt_type)i;
            return 0;
        }
    }
    return -1;
}

static int parse_number(double *out, const char *text)
{
    char *end;
    errno = 0;
    *out = strtod(text, &end);
    return errno || end == text || *end || !(*out - *out == 0) ? -1 : 0;
}

static int parse_flag(options *o, const struct flag *f, const char *value, tl_error *err)
{
    void *field = (char *)o + f->offset;
    double x;
    switch (f->kind) {
    case STRING: *(const char **)field = value; return 0;
    case SWITCH: *(bool *)field = true; return 0;
    case TYPE:
        if (parse_type(field, value))
            return tl_fail(err, "%s: \"%s\" is not f32, f16, i8, i4 or i5", f->name, value);
        *(f->offset == offsetof(options, k_type) ? &o->k_given : &o->v_given) = true;
        return 0;
    default: break;
    }
    if (parse_number(&x, value) || x < f->low || x > f->high)
        return tl_fail(err, "%s: \"%s\" is not a number from %.16g to %.16g", f->name, value,
                       f->low, f->high); /* %.16g: whole limits as they are, 0.1 as 0.1 */
    if (f->kind == REAL) {
        *(double *)field = x;
        return 0;
    }
    if (x != (double)(uint64_t)x)
        return tl_fail(err, "%s: \"%s\" is not whole", f->name, value);
    *(uint64_t *)field = (uint64_t)x;
    o->sinks_given |= f->offset == offsetof(options, sinks);
    return 0;
}

/* Flags that do not go together. */
static int check_flags(const options *o, tl_error *err)
{
    if (o->sinks_given && !o->window)
        return tl_fail(err, "--sinks needs --window");
    if (o->parallel && !o->prompt)
        return tl_fail(err, "--parallel needs --prompt");
    if (o->parallel && (o->save || o->shift || o->draft))
        return tl_fail(err, "--parallel does not go with %s",
                       o->save    ? "--save: which of the texts?"
                       : o->shift ? "--shift"
                                  : "--draft");
    if (o->text && (o->stories || o->seed))
        return tl_fail(err, "--text does not go with %s", o->stories ? "--stories" : "--seed");
    return 0;
}

int options_parse(options *o, int argc, char **argv, bool *help, tl_error *err)
{
    *o = (options){.program = argc > 0 ? argv[0] : "tinylm",
                   .model = TINYLM_DATA "/tinylm.f16.bin",
                   .tokenizer = TINYLM_DATA "/tokenizer.bin",
                   .threads = 1,
                   .n = 128,
                   .temperature = 0.8,
                   .top_p = 0.95};
    *help = false;
    if (argc < 2 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "--help") == 0) {
        *help = argc >= 2;
        return argc < 2 ? tl_fail(err, "no command; try --help") : 0;
    }
    unsigned bit = 0;
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) {
            bit = commands[i].bit;
            o->command = commands[i].name;
        }
    }
    if (!bit)
        return tl_fail(err, "no command \"%s\"; try --help", argv[1]);
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
            *help = true;
            return 0;
        }
        const struct flag *f = NULL;
        for (int k = 0; k < N_FLAGS; k++)
            if (flags[k].commands & bit && strcmp(argv[i], flags[k].name) == 0)
                f = &flags[k];
        if (!f)
            return tl_fail(err, "%s takes no \"%s\"; try %s --help", o->command, argv[i],
                           o->command);
        if (f->kind != SWITCH && i + 1 >= argc)
            return tl_fail(err, "%s needs a value", f->name);
        if (parse_flag(o, f, f->kind == SWITCH ? NULL : argv[++i], err))
            return -1;
    }
    return check_flags(o, err);
}

void options_help(const char *command)
{
    printf("tinylm: a small language model whose keys and values live in kvtile\n\n");
    for (int i = 0; i < N_COMMANDS; i++) {
        if (command && strcmp(command, commands[i].name) != 0)
            continue;
        printf("tinylm %s: %s\n", commands[i].name, commands[i].summary);
        if (!command)
            continue;
        for (int k = 0; k < N_FLAGS; k++) {
            if (!(flags[k].commands & commands[i].bit))
                continue;
            char left[40];
            snprintf(left, sizeof left, "%s %s", flags[k].name,
                     flags[k].value ? flags[k].value : "");
            printf("  %-18s %s\n", left, flags[k].help);
        }
    }
    if (!command)
        printf("\ntinylm COMMAND --help lists a command's flags.\n");
}
