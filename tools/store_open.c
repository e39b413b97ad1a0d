/*
 * The stores that the command line names: directories, and servers by their URLs.
 *
 *   redis[s]://[[user]:password@]host[:port][/database]
 *   redis+unix://[[user]:password@]/path/of/socket
 *
 * User and password may have %XX for bytes that end them otherwise. What else the password may come
 * from is not seen by others as a command line is: --password-file, KVTILE_STORE_PASSWORD.
 */
#include "tool.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PASSWORD_ENVIRONMENT "KVTILE_STORE_PASSWORD"
#define URL_BYTES 1024 /* of a URL, of a password file: more than servers take */

/* A URL, taken apart. The pointers are into text. */
typedef struct parts {
    char text[URL_BYTES], file_text[URL_BYTES];
    char *user, *password, *host, *unix_path; /* NULL: not there */
    uint32_t port, database;
    uint32_t tls;
} parts;

/* Digits alone, up to a largest number. */
static int number(const char *text, unsigned long most, uint32_t *value)
{
    char *end;
    unsigned long n;

    if (*text < '0' || *text > '9' || strlen(text) > 9)
        return -1;
    n = strtoul(text, &end, 10);
    *value = (uint32_t)n;
    return *end || n > most ? -1 : 0;
}

static int hex(char c)
{
    static const char digits[] = "0123456789abcdefABCDEF";
    const char *at = c ? strchr(digits, c) : NULL;
    int value = at ? (int)(at - digits) : -1;

    return value > 15 ? value - 6 : value;
}

/* %XX in place. -1: no such bytes. */
static int decode(char *text)
{
    char *to = text;

    for (; *text; text++, to++) {
        *to = *text;
        if (*text == '%') {
            int high = hex(text[1]), low = high < 0 ? -1 : hex(text[2]);
            if (low < 0 || (high == 0 && low == 0))
                return -1;
            *to = (char)(high << 4 | low);
            text += 2;
        }
    }
    *to = '\0';
    return 0;
}

/* [[user]:password@] or user@ before what is returned; NULL: not to be understood. */
static char *take_user(parts *p, char *at, char *end)
{
    char *sign = NULL, *colon, *c;

    for (c = at; c < end; c++) /* the last one: passwords in the wild have some */
        sign = *c == '@' ? c : sign;
    if (!sign)
        return at;
    *sign = '\0';
    colon = strchr(at, ':');
    if (colon) {
        *colon = '\0';
        p->password = colon + 1;
    }
    p->user = *at ? at : NULL;
    if ((p->user && decode(p->user) != 0) || (p->password && decode(p->password) != 0))
        return NULL;
    return sign + 1;
}

/* host, host:port, [address] or [address]:port */
static int take_host(parts *p, char *at)
{
    char *end, *colon;

    p->host = at;
    if (*at == '[') {
        p->host = at + 1;
        end = strchr(at, ']');
        if (!end || (end[1] && end[1] != ':'))
            return -1;
        *end = '\0';
        colon = end[1] ? end + 1 : NULL;
    } else {
        colon = strchr(at, ':');
    }
    if (colon) {
        *colon = '\0';
        if (number(colon + 1, 65535, &p->port) != 0 || p->port == 0)
            return -1;
    }
    return *p->host ? 0 : -1;
}

/* 1: a URL; 0: a path; -1: a URL that is not one. */
static int take_apart(parts *p, const char *name)
{
    static const char *const schemes[] = {"redis://", "rediss://", "redis+unix://"};
    char *at, *slash;
    size_t i;

    for (i = 0; i < 3 && strncmp(name, schemes[i], strlen(schemes[i])) != 0; i++)
        continue;
    if (i == 3)
        return 0;
    if (strlen(name) >= sizeof p->text)
        return -1;
    (void)snprintf(p->text, sizeof p->text, "%s", name);
    at = p->text + strlen(schemes[i]);
    if (i == 2) {
        /* A path may have @ behind its first slash, a password may not have a slash. */
        slash = strchr(at, '/');
        at = slash ? take_user(p, at, slash) : NULL;
        p->unix_path = at;
        return at && *at == '/' ? 1 : -1;
    }
    p->tls = i == 1;
    slash = strrchr(at, '@'); /* a password may have a slash */
    slash = strchr(slash ? slash : at, '/');
    if (slash) {
        *slash = '\0';
        if (slash[1] && number(slash + 1, 999999, &p->database) != 0)
            return -1;
    }
    at = take_user(p, at, at + strlen(at));
    return at && take_host(p, at) == 0 ? 1 : -1;
}

static void forget(parts *p)
{
    volatile char *at = (volatile char *)p;
    size_t i;

    for (i = 0; i < sizeof *p; i++)
        at[i] = 0;
}

static int read_password(parts *p, const tool_options *o)
{
    const char *path = o->password_file;
    FILE *file = fopen(path, "rb");
    size_t n;
    int bad;

    if (!file)
        return tool_fail(o, path, KVT_ERR_IO, "the password cannot be opened: %s", strerror(errno));
    (void)setvbuf(file, NULL, _IONBF, 0); /* no copy stays in a buffer */
    errno = 0;
    n = fread(p->file_text, 1, sizeof p->file_text, file);
    bad = ferror(file) ? errno : 0;
    (void)fclose(file);
    if (bad)
        return tool_fail(o, path, KVT_ERR_IO, "the password cannot be read: %s", strerror(bad));
    if (n && n < sizeof p->file_text && p->file_text[n - 1] == '\n')
        n -= n > 1 && p->file_text[n - 2] == '\r' ? 2 : 1;
    if (n == 0 || n == sizeof p->file_text || memchr(p->file_text, '\0', n) ||
        memchr(p->file_text, '\n', n))
        return tool_fail(o, path, KVT_ERR_ARG, "no password: it has to be one line of text");
    p->file_text[n] = '\0';
    p->password = p->file_text;
    return SOUND;
}

/* The name of a server as it is shown: without user and password. */
static void set_name(tool_store *s, const parts *p)
{
    static const char *const schemes[] = {"redis", "rediss"};

    if (p->unix_path)
        (void)snprintf(s->name, sizeof s->name, "redis+unix://%s", p->unix_path);
    else
        (void)snprintf(s->name, sizeof s->name,
                       strchr(p->host, ':') ? "%s://[%s]:%u/%u" : "%s://%s:%u/%u", schemes[p->tls],
                       p->host, p->port ? p->port : 6379u, p->database);
}

/*
 * The library names the fields of its struct, as the first or the last word; here they are options.
 * What stands between is a path.
 */
static void name_options(char *text)
{
    static const char *const names[][2] = {{"tls_ca_file", "--ca-file"},
                                           {"tls_cert_file", "--cert-file"},
                                           {"tls_key_file", "--key-file"}};
    size_t i;

    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        size_t field = strlen(names[i][0]), option = strlen(names[i][1]), n = strlen(text);
        if (n >= field && strcmp(text + n - field, names[i][0]) == 0)
            memcpy(text + n - field, names[i][1], option + 1); /* which is shorter */
        if (strncmp(text, names[i][0], field) == 0 && text[field] == ':') {
            memcpy(text, names[i][1], option);
            memmove(text + option, text + field, strlen(text + field) + 1);
        }
    }
}

static int open_server(tool_store *s, parts *p, const tool_options *o)
{
    kvt_redis_config config;
    char text[TOOL_TEXT] = "";
    kvt_status status;
    int code;

    set_name(s, p);
    if (o->max_bytes)
        return tool_refuse(o, s->name, "a server's bound is its own: its option maxmemory");
    if ((o->ca_file || o->cert_file) && !p->tls)
        return tool_refuse(o, s->name, "%s is for rediss://",
                           o->ca_file ? "--ca-file" : "--cert-file");
    if (p->password && o->password_file)
        return tool_refuse(o, s->name, "two passwords: of the URL, and --password-file");
    if (o->password_file) {
        code = read_password(p, o);
        if (code != SOUND)
            return code;
    } else if (!p->password) {
        p->password = getenv(PASSWORD_ENVIRONMENT);
    }
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.host = p->host;
    config.unix_path = p->unix_path;
    config.port = p->port;
    config.database = p->database;
    config.username = p->user;
    config.password = p->password && *p->password ? p->password : NULL;
    config.tls = p->tls;
    config.tls_ca_file = o->ca_file;
    config.tls_cert_file = o->cert_file;
    config.tls_key_file = o->cert_key_file;
    config.prefix = o->prefix;
    /* Nobody waits for a token here: a server that is busy or far away may take its time. */
    config.connect_timeout_ms = 10000;
    config.timeout_ms = 30000;
    config.call_timeout_ms = 86400000; /* a list is as long as it is: silence alone ends it */
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    status = kvt_store_open_redis(&config, &s->store);
    name_options(text);
    return status == KVT_OK
               ? SOUND
               : tool_fail(o, s->name, status, "%s", *text ? text : kvt_status_string(status));
}

/* A directory that is missing or empty would become a store by being opened. */
static int is_there(const char *path, const tool_options *o)
{
    DIR *folder = opendir(path);
    struct dirent *entry;
    int found = 0, bad;

    if (!folder)
        return tool_fail(o, path, KVT_ERR_IO, "there is no such store: %s", strerror(errno));
    errno = 0;
    while (!found && (entry = readdir(folder)) != NULL)
        found = strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
    bad = found ? 0 : errno;
    (void)closedir(folder);
    if (bad)
        return tool_fail(o, path, KVT_ERR_IO, "cannot be read: %s", strerror(bad));
    return found ? SOUND : tool_fail(o, path, KVT_ERR_IO, "there is no store: it is empty");
}

static int open_folder(tool_store *s, const char *path, const tool_options *o)
{
    kvt_directory_config config;
    char text[TOOL_TEXT] = "";
    kvt_status status;
    int code;

    if (o->password_file || o->prefix || o->ca_file || o->cert_file)
        return tool_refuse(o, path, "a directory has no %s",
                           o->password_file ? "password"
                           : o->prefix      ? "prefix"
                                            : "TLS");
    code = is_there(path, o);
    if (code != SOUND)
        return code;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.path = path;
    config.max_bytes = o->max_bytes;
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    status = kvt_store_open_directory(&config, &s->store);
    return status == KVT_OK
               ? SOUND
               : tool_fail(o, path, status, "%s", *text ? text : kvt_status_string(status));
}

int store_open(tool_store *s, const char *name, const tool_options *o)
{
    parts p;
    int code, kind;

    memset(s, 0, sizeof *s);
    memset(&p, 0, sizeof p);
    kind = take_apart(&p, name);
    if (kind < 0) /* which may have a password */
        code = tool_refuse(o, "redis",
                           "the URL is not redis[s]://[user:password@]host[:port]"
                           "[/database] or redis+unix:///path");
    else if (kind > 0)
        code = open_server(s, &p, o);
    else
        code = open_folder(s, name, o);
    if (kind == 0)
        s->path = name;
    forget(&p);
    return code;
}

const char *store_name(const tool_store *s)
{
    return s->path ? s->path : s->name;
}
