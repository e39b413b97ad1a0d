/*
 * Redis servers and clusters for tests: see redis_support.h.
 */
#if defined(__linux__)
#define _GNU_SOURCE /* nftw; prctl */
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif
#include "redis_support.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BUS 10000 /* a cluster's nodes talk on a port so much higher */
#define PATIENCE_S 30

int redis_is_there(void)
{
    return system("redis-server --version > /dev/null 2>&1") == 0;
}

static char certificates[64]; /* a folder; "": servers have no TLS */
static char ca_file[80];

/* 0: there is no openssl, or redis-server has no TLS. */
static int use_tls(const char *script)
{
    char line[512];
    int status;

    /* Which either knows the option or does not, and ends, as it is to listen nowhere. */
    if (system("redis-server --port 0 --tls-port 0 2>&1 | grep -q 'Bad directive'") == 0)
        return 0;
    (void)snprintf(certificates, sizeof certificates, "/tmp/kvt-tls-%ld", (long)getpid());
    assert_int_equal(mkdir(certificates, 0700), 0);
    (void)snprintf(line, sizeof line, "'%s' %s", script, certificates);
    status = system(line);
    if (status != -1 && WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        redis_end();
        return 0;
    }
    assert_int_equal(status, 0);
    (void)snprintf(ca_file, sizeof ca_file, "%s/ca.crt", certificates);
    return 1;
}

int redis_begin(const char *script)
{
    if (!redis_is_there()) {
        print_message("no redis-server\n");
        return 0;
    }
    if (script && !use_tls(script)) {
        print_message("no openssl, or redis-server has no TLS\n");
        return 0;
    }
    return 1;
}

const char *redis_certificates(void)
{
    return certificates;
}

const char *redis_ca_file(void)
{
    return *certificates ? ca_file : NULL;
}

int redis_port(const redis_server *server)
{
    return server->tls_port ? server->tls_port : server->port;
}

static void pause_ms(int ms)
{
    (void)poll(NULL, 0, ms);
}

static double now_s(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- ports ---- */

static int can_bind(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1, bound;
    assert_true(fd >= 0);
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)port);
    bound = bind(fd, (struct sockaddr *)&address, sizeof address) == 0;
    (void)close(fd);
    return bound;
}

/* Free a moment ago, and below the ports that connections are given. */
static int find_port(void)
{
    static rng r;
    if (!r.state)
        r.state = (uint64_t)getpid() * 2654435761u + (uint64_t)(now_s() * 1e6);
    for (int i = 0; i < 1000; i++) {
        int port = 11000 + (int)rng_below(&r, 10000);
        if (can_bind(port) && can_bind(port + BUS))
            return port;
    }
    fail_msg("no free port");
    return 0;
}

/* ---- one command ---- */

static int connect_to(const redis_server *server)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    struct timeval patience = {PATIENCE_S, 0};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)server->port);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        (void)close(fd);
        return -1;
    }
    return fd;
}

/* NULL: no answer. QUIT behind the command, so that the answer ends with the connection. */
static const char *ask(const redis_server *server, const char *line)
{
    static char answer[1 << 16];
    size_t n = 0, bytes = strlen(line);
    ssize_t got = 0;
    int fd = connect_to(server);
    char *end;

    if (fd < 0)
        return NULL;
    if (send(fd, line, bytes, MSG_NOSIGNAL) == (ssize_t)bytes &&
        send(fd, "QUIT\r\n", 6, MSG_NOSIGNAL) == 6)
        while ((got = recv(fd, answer + n, sizeof answer - 1 - n, 0)) > 0)
            n += (size_t)got;
    (void)close(fd);
    if (n < 5 || memcmp(answer + n - 5, "+OK\r\n", 5) != 0)
        return NULL;
    answer[n - 5] = 0;
    end = strstr(answer, "\r\n");
    if (!end)
        return NULL;
    if (answer[0] == '*')
        return answer;
    if (answer[0] == '$' && answer[1] != '-') {
        answer[n - 7] = 0;
        return end + 2;
    }
    *end = 0;
    return answer;
}

static const char *say(const redis_server *server, const char *format, va_list arguments)
{
    char line[4096];
    int n = vsnprintf(line, sizeof line - 2, format, arguments);
    assert_true(n > 0 && n < (int)sizeof line - 2);
    memcpy(line + n, "\r\n", 3);
    return ask(server, line);
}

const char *redis_say(const redis_server *server, const char *format, ...)
{
    const char *answer;
    va_list arguments;
    va_start(arguments, format);
    answer = say(server, format, arguments);
    va_end(arguments);
    assert_non_null(answer);
    return answer;
}

void redis_expect(const redis_server *server, const char *expected, const char *format, ...)
{
    const char *answer;
    va_list arguments;
    va_start(arguments, format);
    answer = say(server, format, arguments);
    va_end(arguments);
    assert_non_null(answer);
    assert_string_equal(answer, expected);
}

/* ---- servers ---- */

/* Run the program; it dies with us. */
static void launch(redis_server *server)
{
    char port[16], line[1024], *words[64], *rest = NULL;
    size_t n = 0;
    int used = 0;

    (void)snprintf(port, sizeof port, "%d", server->port);
    if (server->tls_port)
        used = snprintf(line, sizeof line,
                        "--tls-port %d --tls-cert-file %s/server.crt --tls-key-file %s/server.key "
                        "--tls-ca-cert-file %s/ca.crt --tls-auth-clients no --tls-cluster yes "
                        "--tls-replication yes ",
                        server->tls_port, certificates, certificates, certificates);
    (void)snprintf(line + used, sizeof line - (size_t)used, "%s", server->options);
    words[n++] = "redis-server";
    words[n++] = "--port";
    words[n++] = port;
    words[n++] = "--bind";
    words[n++] = "127.0.0.1";
    words[n++] = "--unixsocket";
    words[n++] = server->socket;
    words[n++] = "--dir";
    words[n++] = server->folder;
    words[n++] = "--save";
    words[n++] = "";
    words[n++] = "--appendonly";
    words[n++] = "no";
    words[n++] = "--repl-diskless-sync-delay";
    words[n++] = "0";
    for (char *word = strtok_r(line, " ", &rest); word && n < 63; word = strtok_r(NULL, " ", &rest))
        words[n++] = strcmp(word, "''") == 0 ? "" : word;
    words[n] = NULL;
    server->pid = fork();
    assert_true(server->pid >= 0);
    if (server->pid == 0) {
        char log[128];
        int fd;
#if defined(__linux__)
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
        (void)snprintf(log, sizeof log, "%s/log", server->folder);
        fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        (void)dup2(fd, 1);
        (void)dup2(fd, 2);
        (void)execvp(words[0], words);
        _exit(127);
    }
}

/* 0: it has ended, as its port was taken. */
static int wait_until_it_answers(redis_server *server)
{
    double end = now_s() + PATIENCE_S;
    for (;;) {
        int status;
        const char *answer;
        if (waitpid(server->pid, &status, WNOHANG) == server->pid) {
            server->pid = 0;
            return 0;
        }
        answer = ask(server, "PING\r\n");
        /* The socket is our server's own, and it listens there after it has its port. */
        if (answer && access(server->socket, F_OK) == 0)
            return 1;
        assert_true(now_s() < end);
        pause_ms(10);
    }
}

void redis_start(redis_server *server, const char *options)
{
    memset(server, 0, sizeof *server);
    (void)snprintf(server->folder, sizeof server->folder, "/tmp/kvt-redis-XXXXXX");
    assert_non_null(mkdtemp(server->folder));
    (void)snprintf(server->socket, sizeof server->socket, "%s/socket", server->folder);
    (void)snprintf(server->options, sizeof server->options, "%s", options ? options : "");
    for (int tries = 0; tries < 20; tries++) {
        server->port = find_port();
        while (certificates[0] && (!server->tls_port || server->tls_port == server->port))
            server->tls_port = find_port();
        launch(server);
        if (wait_until_it_answers(server))
            return;
    }
    fail_msg("redis-server does not start: see %s/log", server->folder);
}

void redis_kill(redis_server *server)
{
    int status;
    if (!server->pid)
        return;
    (void)kill(server->pid, SIGKILL);
    while (waitpid(server->pid, &status, 0) < 0 && errno == EINTR)
        ;
    server->pid = 0;
    (void)unlink(server->socket);
}

void redis_restart(redis_server *server)
{
    double end = now_s() + PATIENCE_S;
    do {
        launch(server);
        if (wait_until_it_answers(server))
            return;
        pause_ms(100);
    } while (now_s() < end);
    fail_msg("redis-server does not start again: see %s/log", server->folder);
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *at)
{
    (void)info;
    (void)kind;
    (void)at;
    return remove(path);
}

void redis_stop(redis_server *server)
{
    redis_kill(server);
    if (server->folder[0])
        (void)nftw(server->folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    memset(server, 0, sizeof *server);
}

void redis_freeze(redis_server *server)
{
    assert_true(server->pid > 0); /* else it would be a group of processes */
    assert_int_equal(kill(server->pid, SIGSTOP), 0);
}

void redis_thaw(redis_server *server)
{
    assert_true(server->pid > 0); /* else it would be a group of processes */
    assert_int_equal(kill(server->pid, SIGCONT), 0);
}

void redis_end(void)
{
    if (certificates[0])
        (void)nftw(certificates, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    certificates[0] = 0;
}

/* ---- clusters ---- */

const char *redis_cluster_id(const redis_cluster *cluster, int node)
{
    static char id[64];
    (void)snprintf(id, sizeof id, "%s", redis_say(&cluster->nodes[node], "CLUSTER MYID"));
    return id;
}

/* Wait until what a node answers has a text. */
static void wait_for(const redis_server *server, const char *command, const char *text)
{
    double end = now_s() + PATIENCE_S;
    while (!strstr(redis_say(server, "%s", command), text)) {
        if (now_s() > end)
            fail_msg("%s: no %s", command, text);
        pause_ms(20);
    }
}

void redis_cluster_wait(redis_cluster *cluster)
{
    for (int i = 0; i < cluster->n_nodes; i++)
        if (cluster->nodes[i].pid)
            wait_for(&cluster->nodes[i], "CLUSTER INFO", "cluster_state:ok");
}

void redis_cluster_start(redis_cluster *cluster, int n_masters, int n_replicas, const char *options)
{
    char all[512], known[64];

    memset(cluster, 0, sizeof *cluster);
    cluster->n_masters = n_masters;
    cluster->n_nodes = n_masters * (1 + n_replicas);
    assert_in_range(cluster->n_nodes, 1, REDIS_NODES);
    (void)snprintf(all, sizeof all, "--cluster-enabled yes --cluster-node-timeout 1000 %s",
                   options ? options : "");
    for (int i = 0; i < cluster->n_nodes; i++) {
        redis_server *node = &cluster->nodes[i];
        redis_start(node, all);
        redis_expect(node, "+OK", "CLUSTER SET-CONFIG-EPOCH %d", i + 1);
        if (i < n_masters)
            redis_expect(node, "+OK", "CLUSTER ADDSLOTSRANGE %d %d", 16384 * i / n_masters,
                         16384 * (i + 1) / n_masters - 1);
        if (i > 0)
            redis_expect(&cluster->nodes[0], "+OK", "CLUSTER MEET 127.0.0.1 %d", redis_port(node));
    }
    (void)snprintf(known, sizeof known, "cluster_known_nodes:%d\r\n", cluster->n_nodes);
    for (int i = 0; i < cluster->n_nodes; i++)
        wait_for(&cluster->nodes[i], "CLUSTER INFO", known);
    redis_cluster_wait(cluster);
    for (int i = n_masters; i < cluster->n_nodes; i++) {
        redis_expect(&cluster->nodes[i], "+OK", "CLUSTER REPLICATE %s",
                     redis_cluster_id(cluster, i - n_masters));
        wait_for(&cluster->nodes[i], "INFO replication", "master_link_status:up");
    }
    redis_cluster_wait(cluster);
}

void redis_cluster_stop(redis_cluster *cluster)
{
    for (int i = 0; i < cluster->n_nodes; i++)
        redis_stop(&cluster->nodes[i]);
}

/* Wait until no node takes a dead one for the master of a slot. */
static void wait_until_forgotten(const redis_cluster *cluster, int dead)
{
    char port[16];
    double end = now_s() + PATIENCE_S;

    /* On a connection without TLS a node names the others' ports without. */
    (void)snprintf(port, sizeof port, "\n:%d\r", cluster->nodes[dead].port);
    for (int i = 0; i < cluster->n_nodes; i++)
        while (cluster->nodes[i].pid &&
               strstr(redis_say(&cluster->nodes[i], "CLUSTER SLOTS"), port)) {
            if (now_s() > end)
                fail_msg("node %d does not see the failover", i);
            pause_ms(20);
        }
}

void redis_cluster_failover(redis_cluster *cluster, int n)
{
    redis_server *replica = &cluster->nodes[cluster->n_masters + n];
    redis_expect(replica, "+OK", "CLUSTER FAILOVER TAKEOVER");
    wait_for(replica, "ROLE", "\nmaster\r");
    redis_cluster_wait(cluster);
    if (cluster->nodes[n].pid == 0)
        wait_until_forgotten(cluster, n);
}

void redis_cluster_move_keys(redis_cluster *cluster, int slot, int from, int to)
{
    for (;;) {
        const char *found = redis_say(&cluster->nodes[from], "CLUSTER GETKEYSINSLOT %d 1", slot);
        const char *key = strchr(found, '$');
        char name[256];
        if (!key)
            return;
        key = strchr(key, '\n') + 1;
        (void)snprintf(name, sizeof name, "%.*s", (int)strcspn(key, "\r"), key);
        redis_expect(&cluster->nodes[from], "+OK", "MIGRATE 127.0.0.1 %d %s 0 5000",
                     redis_port(&cluster->nodes[to]), name);
    }
}

void redis_cluster_begin_move(redis_cluster *cluster, int slot, int from, int to)
{
    redis_expect(&cluster->nodes[to], "+OK", "CLUSTER SETSLOT %d IMPORTING %s", slot,
                 redis_cluster_id(cluster, from));
    redis_expect(&cluster->nodes[from], "+OK", "CLUSTER SETSLOT %d MIGRATING %s", slot,
                 redis_cluster_id(cluster, to));
}

/*
 * Until all nodes know a node's epoch. A replica that takes over with the one that its dead master
 * had made for a slot moved to it is not believed by those who know of the master's.
 */
static void wait_for_epoch(const redis_cluster *cluster, int node)
{
    char epoch[64];
    const char *line =
        strstr(redis_say(&cluster->nodes[node], "CLUSTER INFO"), "cluster_current_epoch:");
    assert_non_null(line);
    (void)snprintf(epoch, sizeof epoch, "%.*s\r", (int)strcspn(line, "\r"), line);
    for (int i = 0; i < cluster->n_nodes; i++)
        if (cluster->nodes[i].pid)
            wait_for(&cluster->nodes[i], "CLUSTER INFO", epoch);
}

void redis_cluster_move(redis_cluster *cluster, int slot, int from, int to)
{
    redis_cluster_begin_move(cluster, slot, from, to);
    redis_cluster_move_keys(cluster, slot, from, to);
    for (int i = 0; i < cluster->n_masters; i++)
        redis_expect(&cluster->nodes[(to + i) % cluster->n_masters], "+OK",
                     "CLUSTER SETSLOT %d NODE %s", slot, redis_cluster_id(cluster, to));
    wait_for_epoch(cluster, to);
}
