/*
 * The measurements of report: other commands of this program, each in a process of its own, so that
 * pinned threads and memory of one leave no trace in the next. Their lines go to a file as they
 * come, which takes its name at the end; a command that fails ends the report with its message, and
 * what came before is kept under the other name.
 */
#include "bench_files.h"
#include "bench_page.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

typedef struct arguments {
    char *words[64];
    size_t n;
} arguments;

static void push(arguments *a, const char *word)
{
    if (a->n + 1 >= sizeof a->words / sizeof a->words[0])
        bench_fail(1, "report: a command has too many arguments");
    a->words[a->n] = bench_alloc(strlen(word) + 1, 1);
    strcpy(a->words[a->n++], word);
}

/* Words of a constant text, with spaces between them. */
static void push_all(arguments *a, const char *text)
{
    char word[128];
    while (*text) {
        size_t n = strcspn(text, " ");
        snprintf(word, sizeof word, "%.*s", (int)n, text);
        push(a, word);
        text += n + (text[n] == ' ');
    }
}

static void push_threads(arguments *a, const bench_options *o)
{
    bench_text t = {NULL, 0, 0};
    for (size_t i = 0; i < o->n_threads; i++)
        bench_text_add(&t, "%s%u", i ? "," : "", o->threads[i]);
    push(a, "--threads");
    push(a, t.data);
    bench_text_free(&t);
}

static void push_number(arguments *a, const char *flag, uint64_t n)
{
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)n);
    push(a, flag);
    push(a, text);
}

static void push_isas(arguments *a, const bench_options *o)
{
    bench_text t = {NULL, 0, 0};
    for (size_t i = 0; i < o->n_isas && o->isas[0]; i++)
        bench_text_add(&t, "%s%s", i ? "," : "", o->isas[i]);
    if (t.n > 0) {
        push(a, "--isa");
        push(a, t.data);
    }
    bench_text_free(&t);
}

static char self[4096];

static void find_self(void)
{
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0)
        bench_fail(1, "report: /proc/self/exe: %s", strerror(errno));
    self[n] = 0;
}

/* The program's lines into `out`. Returns its exit code. */
static int run(const arguments *a, FILE *out, size_t *n_lines)
{
    posix_spawn_file_actions_t actions;
    int ends[2], status = 0;
    char *argv[66];
    pid_t child;
    char line[16384];
    for (size_t i = 0; i < a->n; i++)
        argv[i] = a->words[i];
    argv[a->n] = NULL;
    if (pipe(ends) != 0 || posix_spawn_file_actions_init(&actions) != 0)
        bench_fail(1, "report: cannot make a pipe: %s", strerror(errno));
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    posix_spawn_file_actions_addclose(&actions, ends[1]);
    int failed = posix_spawn(&child, self, &actions, NULL, argv, environ);
    if (failed)
        bench_fail(1, "report: cannot run %s: %s", self, strerror(failed));
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    FILE *in = fdopen(ends[0], "r");
    if (!in)
        bench_fail(1, "report: %s", strerror(errno));
    *n_lines = 0;
    while (fgets(line, sizeof line, in)) {
        fputs(line, out);
        *n_lines += strchr(line, '\n') != NULL;
    }
    fclose(in);
    if (bench_interrupted())
        kill(child, SIGTERM);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static bool readable(const char *path)
{
    return access(path, R_OK) == 0;
}

static bool model_in(const char *folder, bench_text *model, bench_text *tokenizer)
{
    bench_text_free(model);
    bench_text_free(tokenizer);
    bench_text_add(model, "%s/examples/tinylm/tinylm.f16.bin", folder);
    bench_text_add(tokenizer, "%s/examples/tinylm/tokenizer.bin", folder);
    return readable(model->data) && readable(tokenizer->data);
}

bool bench_find_model(bench_text *model, bench_text *tokenizer)
{
    char folder[sizeof self], *end;
    find_self();
    if (model_in(".", model, tokenizer))
        return true;
    strcpy(folder, self);
    while ((end = strrchr(folder, '/')) != NULL) {
        *end = 0;
        if (model_in(folder, model, tokenizer))
            return true;
    }
    return false;
}

static void push_fidelity(arguments *a, const bench_options *o)
{
    bench_text model = {NULL, 0, 0}, tokenizer = {NULL, 0, 0};
    push_all(a, "kvt-bench fidelity --json --offset 0");
    if (o->model) {
        bench_text_add(&model, "%s", o->model);
        bench_text_add(&tokenizer, "%s", o->tokenizer);
    }
#if defined(KVT_BENCH_TINYLM)
    bool found = o->model || bench_find_model(&model, &tokenizer);
#else
    bool found = o->model; /* which fidelity refuses, and says why */
#endif
    if (found) {
        push(a, "--model");
        push(a, model.data);
        push(a, "--tokenizer");
        push(a, tokenizer.data);
        push_all(a, o->quick
                        ? "--stories 1 --ctx 256 --formats q8_0,q4_0-rot"
                        : "--stories 4 --ctx 1k --formats q8_0,q4_0,q4_0-rot,turboquant4,kvarn4");
    } else {
        push_all(a, o->quick ? "--heads 4:2 --dim 64 --ctx 256" : "--heads 8:2 --dim 128");
    }
    bench_text_free(&model);
    bench_text_free(&tokenizer);
}

/* Commands without what the report's own flags add. Each line of decode, append, prefill and
   snapshot compares within itself; see the head of each command's file. */
static const struct plan {
    const char *command, *quick;
    bool threads;
} plans[] = {
    {"machine --json", "machine --json --quick", true},
    {"decode --json --k f16,i8,i4 --heads 32:8 --ctx 1k,4k,16k,32k",
     "decode --json --quick --k f16,i8,i4 --heads 8:2 --dim 64 --ctx 256,512", true},
    {"decode --json --k f16,i8,i4 --heads 32:32,32:16,32:8,28:4,32:4 --ctx 8k",
     "decode --json --quick --k f16,i8,i4 --heads 8:8,8:2,8:1 --dim 64 --ctx 128", true},
    {"fidelity", "fidelity", false},
    {"prefill --json --k f16", "prefill --json --quick --k f16 --heads 8:2 --dim 64 --ctx 130",
     false},
    {"prefill --json --k i8,i4 --mode near,fast",
     "prefill --json --quick --k i8,i4 --mode near,fast --heads 8:2 --dim 64 --ctx 130", false},
    {"append --json --k f16,i8,i4", "append --json --quick --k f16,i8,i4 --dim 64 --ctx 100",
     false},
    {"snapshot --json --k i8 --bytes 256m --map-bytes 1g",
     "snapshot --json --quick --k i8 --dim 64 --ctx 200", false},
};
enum { N_PLANS = sizeof plans / sizeof plans[0] };

static void write_setup(const bench_options *o, FILE *out)
{
    bench_text t = {NULL, 0, 0};
    char date[32] = "";
    struct utsname system;
    time_t now = time(NULL);
    struct tm *utc = gmtime(&now);
    double load[1] = {NAN};
    FILE *f = fopen("/proc/loadavg", "r");
    if (f) {
        if (fscanf(f, "%lf", load) != 1)
            load[0] = NAN;
        fclose(f);
    }
    if (utc)
        strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", utc);
    bench_text_add(&t, "{\"bench\": \"report\", \"kind\": \"setup\", \"date\": ");
    bench_text_json(&t, date);
    bench_text_add(&t, ", \"command\": ");
    bench_text_json(&t, o->command_line);
    bench_text_add(&t, ", \"system\": ");
    if (uname(&system) == 0) {
        bench_text name = {NULL, 0, 0};
        bench_text_add(&name, "%s %s %s", system.sysname, system.release, system.machine);
        bench_text_json(&t, name.data);
        bench_text_free(&name);
    } else {
        bench_text_add(&t, "null");
    }
    if (isfinite(load[0]))
        bench_text_add(&t, ", \"load\": %.2f", load[0]);
    bench_text_add(&t, ", \"processors\": %u, \"quick\": %s, \"cpu\": ", bench_processors(),
                   o->quick ? "true" : "false");
    bench_text_json(&t, bench_cpu_name());
    bench_text_add(&t, ", \"compiler\": ");
    bench_text_json(&t, bench_compiler());
    bench_text_add(&t, ", \"commit\": ");
    bench_text_json(&t, bench_commit());
    bench_text_add(&t, ", \"version\": ");
    bench_text_json(&t, kvt_version());
    fprintf(out, "%s}\n", t.data);
    bench_text_free(&t);
}

static void write_command(const arguments *a, FILE *out)
{
    bench_text line = {NULL, 0, 0}, t = {NULL, 0, 0};
    for (size_t i = 0; i < a->n; i++)
        bench_text_add(&line, "%s%s", i ? " " : "", a->words[i]);
    bench_text_add(&t, "{\"bench\": \"report\", \"kind\": \"command\", \"command\": ");
    bench_text_json(&t, line.data);
    fprintf(out, "%s}\n", t.data);
    fflush(out);
    printf("%s\n", line.data);
    fflush(stdout);
    bench_text_free(&t);
    bench_text_free(&line);
}

void bench_measure(const bench_options *options, const char *path)
{
    find_self();
    bench_file file;
    bench_file_create(&file, path);
    FILE *out = file.file;
    write_setup(options, out);
    for (size_t i = 0; i < N_PLANS; i++) {
        const struct plan *p = &plans[i];
        bool fidelity = !strcmp(p->command, "fidelity"), machine = !strncmp(p->command, "mach", 4);
        arguments a = {{NULL}, 0};
        size_t n = 0;
        if (fidelity) {
            push_fidelity(&a, options);
        } else {
            push(&a, "kvt-bench");
            push_all(&a, options->quick ? p->quick : p->command);
            if (p->threads)
                push_threads(&a, options);
            if (!machine || options->isas[0])
                push_isas(&a, options);
            if (!options->quick)
                push_number(&a, "--runs", options->runs);
            if (options->llc_given)
                push_number(&a, "--llc-mib", options->llc_bytes >> 20);
            if (!strncmp(p->command, "snapshot", 8)) {
                push(&a, "--dir");
                push(&a, options->dir);
                if (options->model) {
                    push(&a, "--model");
                    push(&a, options->model);
                    push(&a, "--tokenizer");
                    push(&a, options->tokenizer);
                }
            }
        }
        if (options->seed != 1)
            push_number(&a, "--seed", options->seed);
        write_command(&a, out);
        int code = run(&a, out, &n);
        /* fidelity's 1 with all its lines: a bar was missed, which the page shows */
        if (code != 0 && !(fidelity && code == 1 && n > 0))
            bench_fail(code == 2 ? 2 : 1,
                       "report: this command ended with code %d; its lines so "
                       "far are in %s",
                       code, bench_file_keep(&file));
        for (size_t j = 0; j < a.n; j++)
            free(a.words[j]);
    }
    bench_file_commit(&file);
}
