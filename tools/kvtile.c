/*
 * kvtile: inspect, check, compare, convert and export snapshots, and look after stores of prefixes,
 * from the command line.
 *
 * Here are the options and the choice of the command; each command is a file of its own (tool.h).
 */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char help[] =
    "kvtile: look at snapshots of a kvtile cache, convert them, and look after stores\n"
    "\n"
    "  kvtile info [OPTIONS] FILE...    what a snapshot holds and what it costs\n"
    "  kvtile verify [OPTIONS] FILE...  read all of it and check everything\n"
    "  kvtile dump [OPTIONS] FILE       its tokens; its keys and values as arrays\n"
    "  kvtile diff [OPTIONS] FILE FILE  what differs between two\n"
    "  kvtile convert [OPTIONS] IN OUT  save it anew: other types, codec, key, some of it\n"
    "  kvtile merge [OPTIONS] IN OUT    a delta and its parents as one file\n"
    "  kvtile store ls [OPTIONS] STORE      the values of a store of prefixes\n"
    "  kvtile store stats [OPTIONS] STORE   how many they are, and their bound\n"
    "  kvtile store gc [OPTIONS] STORE      remove leftovers, count anew, keep the bound\n"
    "  kvtile store verify [OPTIONS] STORE  read and check all values\n"
    "  kvtile --help | --version\n"
    "\n"
    "all:\n"
    "  --json               one JSON object on stdout: a file and line with info and verify\n"
    "  --quiet              no other output but errors\n"
    "  --progress           say on stderr how far it is, also where that is no terminal\n"
    "all but store:\n"
    "  --key-file FILE      key of encrypted files: 32 bytes, or 64 hex digits\n"
    "info:\n"
    "  --quick              read and check the header only\n"
    "  --verify             read all of the file, as without --quick\n"
    "dump:\n"
    "  --npy FOLDER         a .npy file for each array: token_ids, positions, and layers.N.k\n"
    "                       and layers.N.v of shape [tokens][kv heads][dims]\n"
    "  --output FILE        one of them: of one --layer and --side; \"-\" is stdout\n"
    "  --safetensors FILE   all of them in one file\n"
    "  --dtype TYPE         f32, the default, f16, or bf16 (safetensors only)\n"
    "  --side k|v           keys alone, or values\n"
    "dump, convert:\n"
    "  --tokens A:B         tokens A to B - 1; A or B may be left out; N stands for :N\n"
    "  --layer N            this layer; may be repeated; \"all\" is the default\n"
    "dump, convert, merge:\n"
    "  --force              replace files that are there already, but no key file, and with dump\n"
    "                       not the input or its parents\n"
    "convert, merge:\n"
    "  --codec CODEC        auto, raw or zstd\n"
    "  --level N            of zstd, -7 to 19\n"
    "  --new-key-file FILE  key of the output; without it that of --key-file\n"
    "  --decrypt            the output is not encrypted\n"
    "convert:\n"
    "  --k-type TYPE        store keys as f32, f16, i8 or i4\n"
    "  --v-type TYPE        store values as f32, f16, i8, i5 or i4\n"
    "store:\n"
    "  --password-file FILE of a server: one line; else KVTILE_STORE_PASSWORD of the environment\n"
    "  --prefix TEXT        of the keys on a server; \"kvt:\" is the default\n"
    "  --ca-file FILE       rediss://: certificates that are trusted, in place of the system's\n"
    "  --cert-file FILE     rediss://: a certificate of the client's,\n"
    "  --key-file FILE      and its private key\n"
    "store ls:\n"
    "  --sort HOW           by key, size (largest first) or age (longest unused first)\n"
    "store gc:\n"
    "  --max-bytes N        the new bound of a directory; k, m or g behind it: times 1024, ...\n"
    "store verify:\n"
    "  --remove             remove damaged values\n"
    "\n"
    "STORE: a directory, redis[s]://[user:password@]host[:port][/database], or\n"
    "redis+unix:///path/of/socket.\n"
    "\n"
    "\"--\" ends the options.\n"
    "Exit code, the largest of all files: 0 sound (diff: equal), 1 damaged or not a snapshot\n"
    "(diff: different), 2 usage, 3 cannot be read or written.\n";

enum {
    INFO = 1,
    VERIFY = 2,
    DUMP = 4,
    DIFF = 8,
    CONVERT = 16,
    MERGE = 32,
    FILES = 63, /* what is about files */
    STORE_LS = 64,
    STORE_STATS = 128,
    STORE_GC = 256,
    STORE_VERIFY = 512,
    STORE = 960,
    ALL = FILES | STORE
};

static const struct command {
    const char *name, *second; /* second: another word, or NULL */
    int bit;
    int least, most; /* files; most 0: any number */
    int (*run)(const tool_options *o);
} commands[] = {
    {"info", NULL, INFO, 1, 0, info_run},
    {"verify", NULL, VERIFY, 1, 0, verify_run},
    {"dump", NULL, DUMP, 1, 1, dump_run},
    {"diff", NULL, DIFF, 2, 2, diff_run},
    {"convert", NULL, CONVERT, 2, 2, convert_run},
    {"merge", NULL, MERGE, 2, 2, merge_run},
    {"store", "ls", STORE_LS, 1, 1, store_ls_run},
    {"store", "stats", STORE_STATS, 1, 1, store_stats_run},
    {"store", "gc", STORE_GC, 1, 1, store_gc_run},
    {"store", "verify", STORE_VERIFY, 1, 1, store_verify_run},
};

/* ---- values: 0, or -1 for one that is not taken ---- */

static int set_json(tool_options *o, const char *value)
{
    (void)value;
    o->json = 1;
    return 0;
}

static int set_quiet(tool_options *o, const char *value)
{
    (void)value;
    o->quiet = 1;
    return 0;
}

static int set_progress(tool_options *o, const char *value)
{
    (void)value;
    o->progress = 1;
    return 0;
}

static int set_quick(tool_options *o, const char *value)
{
    (void)value;
    o->quick = 1;
    return 0;
}

static int set_verify(tool_options *o, const char *value)
{
    (void)value;
    o->verify = 1;
    return 0;
}

static int set_force(tool_options *o, const char *value)
{
    (void)value;
    o->force = 1;
    return 0;
}

static int set_decrypt(tool_options *o, const char *value)
{
    (void)value;
    o->decrypt = 1;
    return 0;
}

static int set_key_file(tool_options *o, const char *value)
{
    o->key_file = value;
    return *value ? 0 : -1;
}

static int set_new_key_file(tool_options *o, const char *value)
{
    o->new_key_file = value;
    return *value ? 0 : -1;
}

static int set_npy(tool_options *o, const char *value)
{
    o->npy = value;
    return *value ? 0 : -1;
}

static int set_output(tool_options *o, const char *value)
{
    o->output = value;
    return *value ? 0 : -1;
}

static int set_safetensors(tool_options *o, const char *value)
{
    o->safetensors = value;
    return *value ? 0 : -1;
}

static int set_dtype(tool_options *o, const char *value)
{
    if (strcmp(value, "f32") == 0)
        o->dtype = KVT_F32;
    else if (strcmp(value, "f16") == 0)
        o->dtype = KVT_F16;
    else if (strcmp(value, "bf16") == 0)
        o->dtype = KVT_BF16;
    else
        return -1;
    return 0;
}

/* Digits alone, up to the character `until`; *end is behind them. */
static int number(const char *text, char until, uint64_t *value, const char **end)
{
    char *behind;

    if (*text < '0' || *text > '9')
        return -1;
    errno = 0;
    *value = strtoull(text, &behind, 10);
    *end = behind;
    return errno != 0 || *value > KVT_MAX_TOKENS || (*behind != '\0' && *behind != until) ? -1 : 0;
}

static int set_layer(tool_options *o, const char *value)
{
    const char *end;
    uint64_t layer;

    if (strcmp(value, "all") == 0) {
        o->has_layers = 0;
        memset(o->layers, 0, sizeof o->layers);
        return 0;
    }
    if (number(value, '\0', &layer, &end) != 0 || layer >= KVT_MAX_LAYERS)
        return -1;
    o->has_layers = 1;
    o->layers[layer] = 1;
    return 0;
}

static int set_side(tool_options *o, const char *value)
{
    if (strcmp(value, "k") != 0 && strcmp(value, "v") != 0)
        return -1;
    o->has_side = 1;
    o->side = *value == 'k' ? KVT_SIDE_K : KVT_SIDE_V;
    return 0;
}

static int set_tokens(tool_options *o, const char *value)
{
    const char *at = value;

    o->first = 0;
    o->end = UINT64_MAX;
    if (!strchr(value, ':'))
        return number(value, '\0', &o->end, &at);
    if (*at != ':' && number(at, ':', &o->first, &at) != 0)
        return -1;
    return at[1] == '\0' ? 0 : number(at + 1, '\0', &o->end, &at);
}

static int set_codec(tool_options *o, const char *value)
{
    if (strcmp(value, "auto") == 0)
        o->codec = KVT_CODEC_AUTO;
    else if (strcmp(value, "raw") == 0)
        o->codec = KVT_CODEC_RAW;
    else if (strcmp(value, "zstd") == 0)
        o->codec = KVT_CODEC_ZSTD;
    else
        return -1;
    return 0;
}

static int set_level(tool_options *o, const char *value)
{
    const char *digits = value + (*value == '-'), *end;
    uint64_t level;

    if (number(digits, '\0', &level, &end) != 0 || level > (*value == '-' ? 7 : 19))
        return -1;
    o->level = *value == '-' ? -(int32_t)level : (int32_t)level;
    return 0;
}

static int type_of(const char *name, kvt_type *type)
{
    int i;

    for (i = KVT_TYPE_F32; i <= KVT_TYPE_I5; i++)
        if (strcmp(name, tool_type_name((kvt_type)i)) == 0) {
            *type = (kvt_type)i;
            return 0;
        }
    return -1;
}

static int set_k_type(tool_options *o, const char *value)
{
    o->has_k_type = 1;
    return type_of(value, &o->k_type) != 0 || o->k_type == KVT_TYPE_I5 ? -1 : 0;
}

static int set_v_type(tool_options *o, const char *value)
{
    o->has_v_type = 1;
    return type_of(value, &o->v_type);
}

static int set_password_file(tool_options *o, const char *value)
{
    o->password_file = value;
    return *value ? 0 : -1;
}

static int set_prefix(tool_options *o, const char *value)
{
    o->prefix = value; /* may be empty: the library takes that, too */
    return 0;
}

static int set_ca_file(tool_options *o, const char *value)
{
    o->ca_file = value;
    return *value ? 0 : -1;
}

static int set_cert_file(tool_options *o, const char *value)
{
    o->cert_file = value;
    return *value ? 0 : -1;
}

static int set_cert_key_file(tool_options *o, const char *value)
{
    o->cert_key_file = value;
    return *value ? 0 : -1;
}

static int set_sort(tool_options *o, const char *value)
{
    static const char *const names[] = {"", "key", "size", "age"};
    int i;

    for (i = SORT_KEY; i <= SORT_AGE; i++)
        if (strcmp(value, names[i]) == 0)
            o->sort = i;
    return o->sort && strcmp(value, names[o->sort]) == 0 ? 0 : -1;
}

static int set_remove(tool_options *o, const char *value)
{
    (void)value;
    o->remove = 1;
    return 0;
}

static int set_max_bytes(tool_options *o, const char *value)
{
    static const char units[] = "kmg";
    const char *unit;
    char *end;
    int shift = 0;

    if (*value < '0' || *value > '9')
        return -1;
    errno = 0;
    o->max_bytes = strtoull(value, &end, 10);
    if (errno || o->max_bytes == 0)
        return -1;
    if (*end) {
        unit = strchr(units, *end | 0x20); /* in lower case */
        if (!unit || end[1])
            return -1;
        shift = 10 * (int)(unit - units + 1);
    }
    if (o->max_bytes > UINT64_MAX >> shift)
        return -1;
    o->max_bytes <<= shift;
    return 0;
}

static const struct option {
    const char *name;
    int commands, has_value;
    int (*set)(tool_options *o, const char *value);
} options[] = {
    {"--json", ALL, 0, set_json},
    {"--quiet", ALL, 0, set_quiet},
    {"--progress", ALL, 0, set_progress},
    {"--quick", INFO, 0, set_quick},
    {"--verify", INFO, 0, set_verify},
    {"--key-file", FILES, 1, set_key_file},
    {"--force", DUMP | CONVERT | MERGE, 0, set_force},
    {"--npy", DUMP, 1, set_npy},
    {"--output", DUMP, 1, set_output},
    {"--safetensors", DUMP, 1, set_safetensors},
    {"--dtype", DUMP, 1, set_dtype},
    {"--layer", DUMP | CONVERT, 1, set_layer},
    {"--side", DUMP, 1, set_side},
    {"--tokens", DUMP | CONVERT, 1, set_tokens},
    {"--codec", CONVERT | MERGE, 1, set_codec},
    {"--level", CONVERT | MERGE, 1, set_level},
    {"--new-key-file", CONVERT | MERGE, 1, set_new_key_file},
    {"--decrypt", CONVERT | MERGE, 0, set_decrypt},
    {"--k-type", CONVERT, 1, set_k_type},
    {"--v-type", CONVERT, 1, set_v_type},
    {"--password-file", STORE, 1, set_password_file},
    {"--prefix", STORE, 1, set_prefix},
    {"--ca-file", STORE, 1, set_ca_file},
    {"--cert-file", STORE, 1, set_cert_file},
    {"--key-file", STORE, 1, set_cert_key_file},
    {"--sort", STORE_LS, 1, set_sort},
    {"--max-bytes", STORE_GC, 1, set_max_bytes},
    {"--remove", STORE_VERIFY, 0, set_remove},
};

/* ---- the command line ---- */

static int usage(const char *what, const char *argument)
{
    (void)fprintf(stderr, "kvtile: %s", what);
    tool_print_name(stderr, argument);
    (void)fputs(" (see kvtile --help)\n", stderr);
    return USAGE;
}

/* Take the option at argv[*i], and its value: --name VALUE or --name=VALUE. */
static int take_option(tool_options *o, int bit, char **argv, int argc, int *i)
{
    const char *argument = argv[*i], *equals = strchr(argument, '='), *value = NULL;
    size_t n = equals ? (size_t)(equals - argument) : strlen(argument), at;

    for (at = 0; at < sizeof options / sizeof options[0]; at++)
        if (strlen(options[at].name) == n && strncmp(options[at].name, argument, n) == 0 &&
            options[at].commands & bit)
            break;
    if (at == sizeof options / sizeof options[0] || (equals && !options[at].has_value))
        return usage("unknown option ", argument);
    if (options[at].has_value) {
        value = equals ? equals + 1 : *i + 1 < argc ? argv[++*i] : NULL;
        if (!value)
            return usage("no value for ", argument);
    }
    if (options[at].set(o, value) != 0)
        return usage("a value that is not taken for ", options[at].name);
    return SOUND;
}

/* What no option rules out by itself. */
static int check(const tool_options *o, const struct command *command)
{
    int to_stdout = (o->output && strcmp(o->output, "-") == 0) ||
                    (o->safetensors && strcmp(o->safetensors, "-") == 0);
    int i;

    for (i = 0; i < o->n_files; i++)
        if (!*o->files[i])
            return usage(command->bit & STORE ? "the name of the store is empty"
                                              : "the name of a file is empty",
                         "");
    if (o->quick && o->verify)
        return usage("--quick and --verify", "");
    if (to_stdout && o->json)
        return usage("--json, and stdout for the output", "");
    if (o->output && o->safetensors && strcmp(o->output, o->safetensors) == 0)
        return usage("one file for --output and --safetensors", "");
    if (o->dtype == KVT_BF16 && (o->npy || o->output))
        return usage("NumPy's files have no bf16", "");
    if (o->new_key_file && o->decrypt)
        return usage("--new-key-file and --decrypt", "");
    if (o->decrypt && !o->key_file)
        return usage("--decrypt without --key-file", "");
    if (!o->cert_file != !o->cert_key_file)
        return usage("--cert-file and --key-file: one without the other", "");
    if ((command->bit == CONVERT || command->bit == MERGE) && strcmp(o->files[1], "-") == 0)
        return usage("the output has to be a file, not ", o->files[1]);
    return SOUND;
}

static int finish(int code)
{
    int failed = ferror(stdout) != 0;

    failed |= fclose(stdout) != 0; /* network file systems report here */
    output_end_interrupted();
    if (failed && !output_stdout_failed())
        (void)fprintf(stderr, "kvtile: stdout: cannot be written\n");
    return failed ? UNUSABLE : code;
}

static int run(const struct command *command, tool_options *o, int argc, char **argv)
{
    const char *a_file = command->bit & STORE ? "store" : "file";
    int i, code, ended = 0;

    for (i = command->second ? 3 : 2; i < argc; i++) { /* options may be anywhere before "--" */
        if (!ended && strcmp(argv[i], "--") == 0) {
            ended = 1;
        } else if (!ended && argv[i][0] == '-' && argv[i][1] != '\0') {
            code = take_option(o, command->bit, argv, argc, &i);
            if (code != SOUND)
                return code;
        } else {
            o->files[o->n_files++] = argv[i];
        }
    }
    if (o->n_files < command->least)
        return usage(o->n_files ? "a file is missing" : "no ", o->n_files ? "" : a_file);
    if (command->most && o->n_files > command->most)
        return usage(command->bit & STORE ? "one store too many: " : "one file too many: ",
                     o->files[command->most]);
    code = check(o, command);
    if (code != SOUND)
        return code;
    if (o->key_file)
        code = key_read(o, o->key_file, o->key);
    if (code == SOUND && o->new_key_file)
        code = key_read(o, o->new_key_file, o->new_key);
    if (code == SOUND)
        code = command->run(o);
    key_forget(o->key);
    key_forget(o->new_key);
    return finish(code);
}

/* NULL: there is none, and that has been said. */
static const struct command *find_command(int argc, char **argv)
{
    int is_name = 0;
    size_t c;

    for (c = 0; c < sizeof commands / sizeof commands[0]; c++) {
        if (strcmp(argv[1], commands[c].name) != 0)
            continue;
        is_name = 1;
        if (!commands[c].second || (argc > 2 && strcmp(argv[2], commands[c].second) == 0))
            return &commands[c];
    }
    if (!is_name)
        (void)usage("unknown command ", argv[1]);
    else if (argc > 2)
        (void)usage("unknown command store ", argv[2]);
    else
        (void)usage("store: no command: ls, stats, gc or verify", "");
    return NULL;
}

/*
 * Where the tool was started with a standard descriptor closed, the next file that is opened, an
 * output or a server's socket, would get its number, and progress or a listing be written into it.
 * The root folder takes the place: reads and writes of it fail, as those of a closed one do, and so
 * does /dev/stdout as an output. What cannot be read is /dev/null, opened the wrong way round.
 */
static int open_standard(void)
{
    int fd;

    for (fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/", O_RDONLY) != fd &&
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            return -1;
    return 0;
}

int main(int argc, char **argv)
{
    const struct command *command;
    tool_options *o;
    int i, code;

    if (open_standard() != 0)
        return UNUSABLE;
    (void)setvbuf(stderr, NULL, _IOLBF, 4096); /* lines of two processes do not mix */
    for (i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            (void)fputs(help, stdout);
            return finish(SOUND);
        }
        if (strcmp(argv[i], "--version") == 0) {
            printf("kvtile %s\n", kvt_version());
            return finish(SOUND);
        }
    }
    if (argc < 2)
        return usage("no command", "");
    command = find_command(argc, argv);
    if (!command)
        return USAGE;
    o = calloc(1, sizeof *o);
    if (o)
        o->files = calloc((size_t)argc, sizeof *o->files);
    if (!o || !o->files) {
        free(o);
        (void)fprintf(stderr, "kvtile: no memory\n");
        return UNUSABLE;
    }
    o->end = UINT64_MAX;
    code = run(command, o, argc, argv);
    free(o->files);
    free(o);
    return code;
}
