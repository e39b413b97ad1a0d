/*
 * A Redis or Valkey server, or a cluster, as a store: what the files redis*.c offer each other.
 *
 * A client is the connections of one call, one a node. A call takes an idle client or makes one, so
 * that no lock is held while it waits for a server or gives values to a receiver, which may call
 * the store again. What all clients share, under the store's lock: the nodes' addresses and
 * failures, the cluster's map of slots, counters.
 *
 * hiredis parses replies (redisReader), but for the bytes of values that are got: these are
 * received into the receiver's memory, or given to it in pieces from the receive buffer. Sockets
 * are our own, so that every wait has a deadline: hiredis 0.14 has none for sending a value in
 * parts. It has no TLS either: that is OpenSSL's, on the same sockets (redis_tls.c).
 */
#ifndef KVT_STORE_REDIS_H
#define KVT_STORE_REDIS_H

#include "src/store/store.h"

#ifdef KVT_HAVE_REDIS

#if defined(KVT_HIREDIS_FLAT)
#include <hiredis.h>
#else
#include <hiredis/hiredis.h>
#endif
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* then there is SO_NOSIGPIPE */
#endif

#define KVT_TLS_ALERT 21 /* the first byte of a record of that kind */
#define KVT_REDIS_SLOTS 16384
#define KVT_REDIS_NODES 1024                   /* addresses of a cluster that are known at most */
#define KVT_REDIS_HEX_BYTES 64                 /* of a key, behind the prefix */
#define KVT_REDIS_NAME_BYTES 96                /* of a node's name in texts */
#define KVT_REDIS_IN_BYTES ((size_t)256 << 10) /* of a receive buffer: one system call, and L2 */

/* When a call ends: at end_ms, or when a connection has moved no byte for idle_ms. */
typedef struct kvt_redis_clock {
    uint64_t end_ms;
    uint64_t idle_ms;
} kvt_redis_clock;

typedef struct kvt_redis_tls kvt_redis_tls;         /* what all connections by TLS need */
typedef struct kvt_redis_session kvt_redis_session; /* one connection's */

typedef struct kvt_redis_node {
    char *host; /* NULL: the config's unix_path */
    uint32_t port;
    char name[KVT_REDIS_NAME_BYTES];
    /* Under the store's lock: */
    uint64_t retry_at_ms; /* before that it is not connected to */
    char failure[KVT_STORE_ERROR_BYTES];
} kvt_redis_node;

/* Bytes to be sent: text of the link's (data is NULL) or the caller's. */
typedef struct kvt_redis_segment {
    const void *data;
    size_t offset; /* in the link's text */
    size_t bytes;
} kvt_redis_segment;

/* What a reply that is still to come answers. */
typedef struct kvt_redis_request {
    size_t index;   /* of the job's command */
    uint64_t bytes; /* of a value on its way to the server */
    int kind;       /* see redis_run.c */
} kvt_redis_request;

/* A value that is being received. */
typedef struct kvt_redis_incoming {
    int active;
    int skip;             /* the receiver wants no more of it */
    int no_place;         /* the receiver has no memory for the next bytes */
    size_t index;         /* the receiver's */
    uint64_t total, done; /* done: given to the receiver, or skipped */
    unsigned char *place; /* the receiver's memory for the bytes from done on; or NULL */
    size_t place_bytes, place_filled;
} kvt_redis_incoming;

/* A connection to one node. */
typedef struct kvt_redis_link {
    int fd; /* -1: none */
    const kvt_redis_node *node;
    kvt_redis_session *tls;            /* NULL: bytes come and go as they are */
    short receive_events, send_events; /* of poll: what a receive, what a send waits for */
    int tls_moved;                     /* a byte of the socket's has come or gone */
    int first_byte;                    /* of the socket's that has come; -1: none yet */
    redisReader *reader;
    redisReplyObjectFunctions functions; /* the reader's, but for create_array, create_string */
    const redisReplyObjectFunctions *own_functions;
    uint64_t n_elements;     /* of all arrays of the reply that is read */
    uint64_t n_string_bytes; /* of all its strings */
    unsigned char *in;       /* bytes received, not yet used: in_begin .. in_end - 1 */
    size_t in_begin, in_end;
    kvt_redis_incoming value;
    /* To be sent. */
    char *text;
    size_t text_bytes, text_capacity;
    kvt_redis_segment *segments; /* from `first` on; `sent` bytes of this one are gone */
    size_t first, n_segments, segment_capacity, sent;
    int no_memory;     /* a command could not be appended */
    int send_error;    /* errno of a send that has failed; replies may still be there */
    int timed_out;     /* it was closed since no byte came or went */
    int demoted;       /* its server is no master any more: the name may be another's */
    uint64_t since_ms; /* no byte has come or gone since; 0: one has */
    /* Of a job (redis_run.c): commands to be sent, requests that are not answered. */
    size_t queue, queue_last; /* linked by command.next; SIZE_MAX: none, as between calls */
    kvt_redis_request *ring;
    size_t ring_first, ring_count, ring_capacity;
    size_t n_flying; /* commands in the ring */
    uint64_t flying_bytes;
    uint64_t value_bytes; /* of the value that was got last: what others may have */
} kvt_redis_link;

typedef struct kvt_redis_client {
    struct kvt_redis_client *next;          /* idle ones */
    kvt_redis_link *links[KVT_REDIS_NODES]; /* by node; NULL: none yet */
    size_t n_links;
    struct pollfd polled[KVT_REDIS_NODES];
} kvt_redis_client;

typedef struct kvt_redis {
    char *host, *unix_path, *username, *password, *prefix;
    kvt_redis_tls *tls; /* NULL: without */
    size_t prefix_bytes;
    uint32_t port, database, ttl_seconds;
    uint32_t connect_timeout_ms, timeout_ms, call_timeout_ms, retry_ms, pipeline;
    uint16_t prefix_crc;  /* of a key's part before its digits that counts for the slot */
    int slot_fixed;       /* the prefix has a hash tag: all keys are in prefix_crc's slot */
    pthread_mutex_t lock; /* of all below */
    kvt_redis_client *idle;
    size_t n_idle;
    kvt_redis_node *nodes[KVT_REDIS_NODES]; /* only added; 0 is the config's */
    size_t n_nodes;
    int is_cluster;
    int no_unlink;                  /* the server does not know UNLINK */
    int16_t slots[KVT_REDIS_SLOTS]; /* node of each; -1: unknown */
    uint64_t n_got, n_missed, n_put, n_failed;
} kvt_redis;

/* ---- redis_connection.c ---- */

uint64_t kvt_redis_now_ms(void);
kvt_redis_link *kvt_redis_link_make(const kvt_redis_node *node, size_t ring_capacity);
void kvt_redis_link_free(kvt_redis_link *link);
/* Connect, AUTH, SELECT. On a failure it is closed. */
kvt_status kvt_redis_link_open(const kvt_redis *redis, kvt_redis_link *link,
                               const kvt_redis_clock *clock, kvt_store_error *error);
/* Close it, with all that was to be sent or received. */
void kvt_redis_link_close(kvt_redis_link *link);
/* Whether it is open and nothing is under way. */
int kvt_redis_link_is_clean(const kvt_redis_link *link);
/* The same, and the server has neither sent anything nor closed it. */
int kvt_redis_link_is_usable(kvt_redis_link *link);

/* Append to what is to be sent; a failure is told by link->no_memory. Data is not copied. */
void kvt_redis_append_text(kvt_redis_link *link, const void *text, size_t bytes);
void kvt_redis_append_data(kvt_redis_link *link, const void *data, size_t bytes);
/* "*n\r\n", and "$bytes\r\n...\r\n". */
void kvt_redis_append_array(kvt_redis_link *link, size_t n);
void kvt_redis_append_string(kvt_redis_link *link, const void *text, size_t bytes);
/* A command of words, each up to a zero; the last one is NULL. */
void kvt_redis_append_words(kvt_redis_link *link, ...);

/* Send until the socket takes no more. Returns whether a byte was sent. */
int kvt_redis_link_send(kvt_redis_link *link);
/* Send and receive what can be without waiting. *moved: whether any byte was. */
kvt_status kvt_redis_link_move(kvt_redis_link *link, const kvt_store_receiver *receiver,
                               const kvt_redis_clock *clock, int *moved, kvt_store_error *error);
/* Wait until a byte can come or go on one of links[n] that have a connection and wait for it. */
void kvt_redis_wait(kvt_redis_link *const *links, size_t n, struct pollfd *polled,
                    const kvt_redis_clock *clock);
/* KVT_ERR_IO with the text where the call's time is over. */
kvt_status kvt_redis_check_time(const kvt_redis *redis, const kvt_redis_clock *clock,
                                kvt_store_error *error);

/* ---- redis_reply.c ---- */

/* Make the link's reader. 0: no memory. */
int kvt_redis_link_make_reader(kvt_redis_link *link);
/* "NODE: what: the system's text". KVT_ERR_IO. */
kvt_status kvt_redis_fail_errno(const kvt_redis_link *link, const char *what, int number,
                                kvt_store_error *error);
/* Receive what there is. *moved: 1 where a byte has come, else as it was. */
kvt_status kvt_redis_link_receive(kvt_redis_link *link, const kvt_store_receiver *receiver,
                                  int *moved, kvt_store_error *error);

/* What kvt_redis_link_next has found among the bytes received. */
typedef enum kvt_redis_event {
    KVT_REDIS_NOTHING, /* more bytes are needed */
    KVT_REDIS_REPLY,   /* *reply, which is the caller's to free */
    KVT_REDIS_VALUE,   /* all of a value has been given to the receiver */
    KVT_REDIS_STOPPED  /* the receiver wants no more at all; the connection is to be closed */
} kvt_redis_event;

/*
 * The next reply of one line; or, with a receiver, that or a value, which is given to it as value
 * `index`, as far as it has been received. (Others are a protocol error.)
 */
kvt_status kvt_redis_link_next(kvt_redis_link *link, const kvt_store_receiver *receiver,
                               size_t index, kvt_redis_event *event, redisReply **reply,
                               kvt_store_error *error);
/* Send what was appended and wait for the next reply, of any kind. On a failure it is closed. */
kvt_status kvt_redis_link_take(const kvt_redis *redis, kvt_redis_link *link,
                               const kvt_redis_clock *clock, redisReply **reply,
                               kvt_store_error *error);

/* Whether an error's first word is `code`. */
int kvt_redis_is_error(const redisReply *reply, const char *code);
/* The status and the text of an error that the server has answered. */
kvt_status kvt_redis_refused(const kvt_redis *redis, const kvt_redis_node *node,
                             const redisReply *reply, kvt_store_error *error);

/* ---- redis_tls.c ---- */

/* From the config, whose files are read now. KVT_ERR_UNSUPPORTED in a build without TLS. */
kvt_status kvt_redis_tls_make(const kvt_redis_config *config, kvt_redis_tls **tls,
                              kvt_store_error *error);
void kvt_redis_tls_free(kvt_redis_tls *tls);
/* The handshake on link->fd, until end_ms. After a failure too there may be a session to end. */
kvt_status kvt_redis_tls_connect(const kvt_redis_tls *tls, kvt_redis_link *link, uint64_t end_ms,
                                 kvt_store_error *error);
/* Free link->tls; fine where it is NULL. */
void kvt_redis_tls_end(kvt_redis_link *link);
/*
 * As readv and sendmsg of a socket that does not block, for n_pieces of 1 or more. They set the
 * link's events, and tls_moved where bytes came or went of which none is the caller's yet. EPROTO:
 * kvt_redis_tls_failure has the text, which is strerror's for any other number.
 */
ssize_t kvt_redis_tls_receive(kvt_redis_link *link, const struct iovec *pieces, size_t n_pieces);
ssize_t kvt_redis_tls_send(kvt_redis_link *link, const struct iovec *pieces, size_t n_pieces);
const char *kvt_redis_tls_failure(const kvt_redis_link *link, int number);
/* Whether the server has neither sent anything nor closed. Messages of TLS's own, as its session
   tickets, are taken. */
int kvt_redis_tls_is_quiet(kvt_redis_link *link);

/* ---- redis_cluster.c ---- */

/* CRC16 (XMODEM) of more bytes, from the CRC of those before. */
uint16_t kvt_redis_crc16(uint16_t crc, const void *data, size_t bytes);
/* Set prefix_crc and slot_fixed. */
void kvt_redis_prepare_slots(kvt_redis *redis);
uint32_t kvt_redis_slot(const kvt_redis *redis, const kvt_store_key *key);
/* The number of a node, which is added where it is new; -1: no memory, or too many. */
int kvt_redis_add_node(kvt_redis *redis, const char *host, uint32_t port);
/* "slot host:port" of MOVED and ASK, as `from` has answered it: the slot and the node's number. 0:
   it is none. */
int kvt_redis_parse_target(kvt_redis *redis, const kvt_redis_node *from, const char *text,
                           uint32_t *slot, int *node);
/*
 * Fetch the map of slots from a node that can be reached, `avoid` (or -1) last. `first` (or -1):
 * whom MOVED has named; the others may not have heard yet that a slot is its.
 */
kvt_status kvt_redis_fetch_map(kvt_redis *redis, kvt_redis_client *client, int first, int avoid,
                               const kvt_redis_clock *clock, kvt_store_error *error);
/* The masters' numbers, each once, to nodes[KVT_REDIS_NODES]; returns how many. */
size_t kvt_redis_masters(kvt_redis *redis, int *nodes);

/* ---- redis.c ---- */

/* An idle client, or a new one; NULL: no memory. Give it back; its broken links are closed, its
   queues emptied. */
kvt_redis_client *kvt_redis_client_take(kvt_redis *redis);
void kvt_redis_client_give(kvt_redis *redis, kvt_redis_client *client);
/* The client's link to a node, connected now if it was not. */
kvt_status kvt_redis_client_link(kvt_redis *redis, kvt_redis_client *client, int node,
                                 const kvt_redis_clock *clock, kvt_redis_link **link,
                                 kvt_store_error *error);
/* Keep why a node cannot be reached: it is not connected to for retry_ms. */
void kvt_redis_node_failed(kvt_redis *redis, int node, const kvt_store_error *error);
void kvt_redis_start_clock(const kvt_redis *redis, kvt_redis_clock *clock);
/* The key's digits. */
void kvt_redis_hex(const kvt_store_key *key, char *hex);

/* ---- redis_run.c ---- */

typedef enum kvt_redis_operation {
    KVT_REDIS_GET,
    KVT_REDIS_SET,
    KVT_REDIS_EXISTS,
    KVT_REDIS_UNLINK
} kvt_redis_operation;

/* One command a key, pipelined, to the nodes that have them. */
typedef struct kvt_redis_job {
    kvt_redis_operation operation;
    const kvt_store_key *keys; /* [n] */
    size_t n;
    const kvt_store_value *values;      /* SET: [n] */
    const kvt_store_receiver *receiver; /* GET */
    uint8_t *done; /* [n], zeroed before: 1 where a value was got, put, or is there */
} kvt_redis_job;

kvt_status kvt_redis_run(kvt_redis *redis, const kvt_redis_job *job, kvt_store_error *error);

/* ---- redis_list.c ---- */

kvt_status kvt_redis_list(kvt_redis *redis,
                          int (*on_entry)(void *entry_user, const kvt_store_entry *entry),
                          void *entry_user, kvt_store_error *error);
kvt_status kvt_redis_stats(kvt_redis *redis, kvt_store_stats *stats, kvt_store_error *error);

#endif /* KVT_HAVE_REDIS */

#endif /* KVT_STORE_REDIS_H */
