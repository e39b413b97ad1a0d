/*
 * Redis servers and clusters for tests: each on a port of the loopback and a socket of its own, in
 * a temporary folder, killed with the test. All functions assert.
 */
#ifndef KVT_TEST_REDIS_SUPPORT_H
#define KVT_TEST_REDIS_SUPPORT_H

#include "support.h"

#include <sys/types.h>

#define REDIS_NODES 8

typedef struct redis_server {
    pid_t pid; /* 0: it does not run */
    int port;
    int tls_port; /* 0: it has none */
    char folder[64];
    char socket[96];
    char options[512]; /* of its command line, by spaces */
} redis_server;

typedef struct redis_cluster {
    redis_server nodes[REDIS_NODES]; /* masters, then their replicas in the same order */
    int n_masters, n_nodes;
} redis_cluster;

/* Whether there is a redis-server; a test without one exits with 77. */
int redis_is_there(void);

/*
 * Whether tests can begin; else prints why not. script, the path of make_certificates.sh, or NULL:
 * with TLS, for which it makes certificates in a temporary folder. Then all servers listen at
 * tls_port too, with that of `server`, trust `ca`, and want none of a client ("--tls-auth-clients
 * no"), and a cluster's nodes name each other their tls_port.
 */
int redis_begin(const char *script);
/* Remove the folder, if there is one. */
void redis_end(void);
const char *redis_certificates(void); /* the folder */
const char *redis_ca_file(void);      /* what clients trust; NULL: without TLS */
/* The port of a server for clients: tls_port where there is one. */
int redis_port(const redis_server *server);

/* Start a server with more options ("--maxmemory 8mb"; or NULL) and wait until it answers. */
void redis_start(redis_server *server, const char *options);
/* Kill it (SIGKILL), and remove its folder. Fine for one that does not run. */
void redis_stop(redis_server *server);
/* Kill it; its folder and port stay for redis_restart. */
void redis_kill(redis_server *server);
/* Start it again on its port. What it had in memory is gone; a cluster's node knows the cluster. */
void redis_restart(redis_server *server);
/* Stop it from answering (SIGSTOP), and let it go on. */
void redis_freeze(redis_server *server);
void redis_thaw(redis_server *server);

/*
 * The answer to a command of words by spaces, on a connection of its own: a line with its first
 * character ("+OK", ":3", "-ERR ..."), a string, or an array as it is sent ("*1\r\n..."). Valid
 * until the next call.
 */
const char *redis_say(const redis_server *server, const char *format, ...);
/* The same, which must be `answer`. */
void redis_expect(const redis_server *server, const char *answer, const char *format, ...);

/*
 * A cluster of n_masters with the slots in equal parts, each with n_replicas (0 or 1). `options` as
 * for redis_start; cluster-node-timeout is 1000 ms unless they say another one.
 */
void redis_cluster_start(redis_cluster *cluster, int n_masters, int n_replicas,
                         const char *options);
void redis_cluster_stop(redis_cluster *cluster);
/* Wait until all nodes that run say that the cluster is whole. */
void redis_cluster_wait(redis_cluster *cluster);
/* Make the replica of master `n` the master of its slots, without asking the others. */
void redis_cluster_failover(redis_cluster *cluster, int n);
/* Move a slot with its keys, from the node that has it. */
void redis_cluster_move(redis_cluster *cluster, int slot, int from, int to);
/* Its beginning: the slot is MIGRATING and IMPORTING; and its middle: the keys. */
void redis_cluster_begin_move(redis_cluster *cluster, int slot, int from, int to);
void redis_cluster_move_keys(redis_cluster *cluster, int slot, int from, int to);
/* A node's id; valid until the next call. */
const char *redis_cluster_id(const redis_cluster *cluster, int node);

#endif /* KVT_TEST_REDIS_SUPPORT_H */
