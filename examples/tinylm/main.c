/* tinylm: the command line. Every failure is one line on stderr and exit code 1. */
#include "app.h"

#include <stdio.h>
#include <string.h>

static int run(options *o, tl_error *err)
{
    if (strcmp(o->command, "generate") == 0)
        return cmd_generate(o, err);
    if (strcmp(o->command, "chat") == 0)
        return cmd_chat(o, err);
    if (strcmp(o->command, "eval") == 0)
        return cmd_eval(o, err);
    if (strcmp(o->command, "demo") == 0)
        return cmd_demo(o, err);
    if (strcmp(o->command, "serve-demo") == 0)
        return cmd_serve_demo(o, err);
    return cmd_stories(o, err);
}

int main(int argc, char **argv)
{
    options o;
    tl_error err = {""};
    bool help;
    int status = options_parse(&o, argc, argv, &help, &err);
    if (status == 0 && help) {
        options_help(o.command);
        return 0;
    }
    if (status == 0)
        status = run(&o, &err);
    if (status == 0 && (fflush(stdout) || ferror(stdout)))
        status = tl_fail(&err, "standard output cannot be written");
    if (status)
        fprintf(stderr, "tinylm: %s\n", err.text);
    return status ? 1 : 0;
}
