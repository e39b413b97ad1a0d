/*
 * Connections to a Redis or Valkey server by TLS. OpenSSL is named here alone.
 *
 * A store has one SSL_CTX, a connection one SSL. The server's certificate is verified always: its
 * chain, and that it is for the host that was connected to, of a cluster's node for the host that
 * the cluster has named.
 *
 * SSL reads and writes the socket by a BIO of our own, as OpenSSL's own one calls write(), which
 * raises SIGPIPE. Nothing blocks. What a call of SSL's waits for, which for a read may be that
 * something can be written, is kept in the link for kvt_redis_wait. The loops wait only after a
 * receive that got nothing: SSL then has no byte left that it could give.
 *
 * A send that has failed is told to SSL as one that would block. After an error of its socket an
 * SSL may not be used any more, but what the server has said before it closed is still to be read.
 *
 * No close_notify is sent: a child of a fork would end its parent's connection by it.
 */
#include "src/store/redis.h"

#ifdef KVT_HAVE_REDIS
#ifdef KVT_HAVE_TLS

#include <errno.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#if OPENSSL_VERSION_NUMBER < 0x10101000L
#error "kvtile needs OpenSSL 1.1.1 or newer"
#endif

#define RECORD_BYTES ((size_t)16 << 10) /* the most that TLS puts into a record */
#define FAILURE_BYTES 144               /* of a text that a node's name goes before */
#define ALERTS 1000                     /* SSL's reasons from here on are the peer's alerts */
#define HANDSHAKE_BYTE 22               /* records of a server begin with it, or with an alert's */

struct kvt_redis_tls {
    SSL_CTX *context;
    BIO_METHOD *method;
    int has_certificate; /* of the client's */
};

struct kvt_redis_session {
    const kvt_redis_tls *tls;
    SSL *ssl;
    kvt_redis_link *link;
    int established;
    int ended;                     /* the server has closed */
    int receive_error, send_error; /* errno of the socket's; EPROTO: SSL's own, which is: */
    char failure[FAILURE_BYTES];
    unsigned char record[RECORD_BYTES]; /* small pieces, which go as one */
};

/* ---- the socket ---- */

static int read_socket(BIO *bio, char *data, int bytes)
{
    kvt_redis_session *session = BIO_get_data(bio);
    ssize_t n;

    BIO_clear_retry_flags(bio);
    do
        n = recv(session->link->fd, data, (size_t)bytes, 0);
    while (n < 0 && errno == EINTR);
    if (n > 0) {
        session->link->tls_moved = 1;
        if (session->link->first_byte < 0)
            session->link->first_byte = (unsigned char)data[0];
    } else if (n == 0) {
        session->ended = 1;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        BIO_set_retry_read(bio);
    } else {
        session->receive_error = errno;
    }
    return (int)n;
}

static int write_socket(BIO *bio, const char *data, int bytes)
{
    kvt_redis_session *session = BIO_get_data(bio);
    ssize_t n = -1;

    BIO_clear_retry_flags(bio);
    if (!session->send_error) {
        do
            n = send(session->link->fd, data, (size_t)bytes, MSG_NOSIGNAL);
        while (n < 0 && errno == EINTR);
        if (n >= 0)
            session->link->tls_moved = 1;
        else if (errno != EAGAIN && errno != EWOULDBLOCK)
            session->send_error = errno;
    }
    if (n < 0)
        BIO_set_retry_write(bio);
    return (int)n;
}

static long control_socket(BIO *bio, int command, long number, void *pointer)
{
    (void)bio;
    (void)number;
    (void)pointer;
    return command == BIO_CTRL_FLUSH; /* there is no buffer */
}

/* ---- texts ---- */

/* Why the server's certificate is refused. */
static void describe_certificate(kvt_redis_session *session, long code)
{
    const char *hint = "";
    switch (code) {
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: hint = " (of a CA that is not trusted)"; break;
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH: hint = " (it is another host's)"; break;
    default: break;
    }
    (void)snprintf(session->failure, sizeof session->failure, "certificate verify failed: %s%s",
                   X509_verify_cert_error_string(code), hint);
}

/* An alert: why the server refuses. */
static void describe_alert(kvt_redis_session *session, int alert)
{
    const char *hint = "";
    switch (alert) {
    case SSL_AD_CERTIFICATE_REQUIRED: hint = ": it wants a client certificate"; break;
    case SSL_AD_HANDSHAKE_FAILURE:
        hint = session->tls->has_certificate ? "" : ": it may want a client certificate";
        break;
    case SSL_AD_BAD_CERTIFICATE:
    case SSL_AD_UNSUPPORTED_CERTIFICATE:
    case SSL_AD_CERTIFICATE_REVOKED:
    case SSL_AD_CERTIFICATE_EXPIRED:
    case SSL_AD_CERTIFICATE_UNKNOWN:
    case SSL_AD_UNKNOWN_CA:
        if (session->tls->has_certificate)
            hint = ": it refuses the client certificate";
        break;
    case SSL_AD_PROTOCOL_VERSION: hint = ": it has no TLS from 1.2 on"; break;
    case SSL_AD_UNRECOGNIZED_NAME: hint = ": it does not know the host's name"; break;
    default: break;
    }
    (void)snprintf(session->failure, sizeof session->failure, "TLS alert \"%s\"%s",
                   SSL_alert_desc_string_long(alert), hint);
}

/* What OpenSSL's queue of errors and the session tell. The queue is empty then. */
static void describe(kvt_redis_session *session)
{
    long verified = SSL_get_verify_result(session->ssl);
    unsigned long code, first = 0;
    int alert = 0;

    while ((code = ERR_get_error()) != 0) {
        if (!first)
            first = code;
        if (ERR_GET_LIB(code) == ERR_LIB_SSL && ERR_GET_REASON(code) > ALERTS)
            alert = ERR_GET_REASON(code) - ALERTS;
    }
    if (!session->established && session->link->first_byte >= 0 &&
        session->link->first_byte != HANDSHAKE_BYTE && session->link->first_byte != KVT_TLS_ALERT) {
        (void)snprintf(session->failure, sizeof session->failure,
                       "the server does not speak TLS on this port");
    } else if (!session->established && verified != X509_V_OK) {
        describe_certificate(session, verified);
    } else if (alert) {
        describe_alert(session, alert);
    } else if (ERR_GET_REASON(first) == SSL_R_UNSUPPORTED_PROTOCOL) {
        (void)snprintf(session->failure, sizeof session->failure,
                       "the server has no TLS from 1.2 on");
    } else {
        const char *reason = ERR_reason_error_string(first);
        (void)snprintf(session->failure, sizeof session->failure, "TLS: %s",
                       reason ? reason : "an error without a text");
    }
}

const char *kvt_redis_tls_failure(const kvt_redis_link *link, int number)
{
    return number == EPROTO && link->tls && link->tls->failure[0] ? link->tls->failure
                                                                  : strerror(number);
}

/* ---- sessions ---- */

/*
 * What it means that a call of SSL's has not done what it was to do: 0, the server has closed; or
 * -1 and an errno, EAGAIN for one that is to be called again on *events.
 */
static int judge(kvt_redis_session *session, int result, short *events)
{
    int kind = SSL_get_error(session->ssl, result);

    if (kind == SSL_ERROR_WANT_READ || (kind == SSL_ERROR_WANT_WRITE && !session->send_error)) {
        *events = kind == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT;
        errno = EAGAIN;
        return -1;
    }
    if (kind == SSL_ERROR_WANT_WRITE) {
        errno = session->send_error;
        return -1;
    }
    if (kind == SSL_ERROR_ZERO_RETURN)
        session->ended = 1;
    if (!session->ended && !session->receive_error) {
        describe(session);
        session->receive_error = EPROTO;
    }
    ERR_clear_error();
    errno = session->receive_error;
    return session->receive_error ? -1 : 0;
}

/* As readv. One call is bounded as that is by the socket's buffer: the call's time is looked at in
   between. */
ssize_t kvt_redis_tls_receive(kvt_redis_link *link, const struct iovec *pieces, size_t n_pieces)
{
    kvt_redis_session *session = link->tls;
    size_t total = 0;

    for (size_t p = 0; p < n_pieces; p++)
        for (size_t filled = 0, n; filled < pieces[p].iov_len; filled += n, total += n) {
            int result = 0, outcome;

            if (total >= KVT_REDIS_IN_BYTES)
                return (ssize_t)total;
            ERR_clear_error();
            if (!session->ended && !session->receive_error) {
                result = SSL_read_ex(session->ssl, (char *)pieces[p].iov_base + filled,
                                     pieces[p].iov_len - filled, &n);
                if (result == 1)
                    continue;
                outcome = judge(session, result, &link->receive_events);
            } else { /* found behind bytes that had to be given first */
                errno = session->receive_error;
                outcome = session->receive_error ? -1 : 0;
            }
            return total ? (ssize_t)total : outcome;
        }
    return (ssize_t)total;
}

/* As sendmsg, a record at most. A call that could not be done is repeated with the same bytes, and
   perhaps more, wherever they are now. */
ssize_t kvt_redis_tls_send(kvt_redis_link *link, const struct iovec *pieces, size_t n_pieces)
{
    kvt_redis_session *session = link->tls;
    const void *data = pieces[0].iov_base;
    size_t bytes = pieces[0].iov_len, n;
    int result;

    if (session->receive_error == EPROTO || session->send_error) {
        errno = session->send_error ? session->send_error : EPROTO;
        return -1;
    }
    if (bytes < RECORD_BYTES && n_pieces > 1) {
        bytes = 0;
        for (size_t p = 0; p < n_pieces && bytes < RECORD_BYTES; p++) {
            size_t room = RECORD_BYTES - bytes;
            n = pieces[p].iov_len < room ? pieces[p].iov_len : room;
            memcpy(session->record + bytes, pieces[p].iov_base, n);
            bytes += n;
        }
        data = session->record;
    }
    ERR_clear_error();
    result = SSL_write_ex(session->ssl, data, bytes, &n);
    if (result == 1)
        return (ssize_t)n;
    if (judge(session, result, &link->send_events) == 0)
        errno = EPIPE;
    return -1;
}

int kvt_redis_tls_is_quiet(kvt_redis_link *link)
{
    kvt_redis_session *session = link->tls;
    char byte;
    size_t n;

    ERR_clear_error();
    return !session->ended && !session->receive_error &&
           SSL_peek_ex(session->ssl, &byte, 1, &n) != 1 &&
           judge(session, 0, &link->receive_events) < 0 && errno == EAGAIN;
}

void kvt_redis_tls_end(kvt_redis_link *link)
{
    if (link->tls) {
        SSL_free(link->tls->ssl);
        free(link->tls);
    }
    link->tls = NULL;
}

/* ---- connecting ---- */

/* What has to be in the certificate, and what the server is told. 0: no memory. */
static int set_host(SSL *ssl, const char *host)
{
    X509_VERIFY_PARAM *checks = SSL_get0_param(ssl);
    if (X509_VERIFY_PARAM_set1_ip_asc(checks, host))
        return 1; /* an address, of which TLS has no indication */
    X509_VERIFY_PARAM_set_hostflags(checks, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return *host && X509_VERIFY_PARAM_set1_host(checks, host, strlen(host)) == 1 &&
           SSL_set_tlsext_host_name(ssl, host) == 1;
}

static kvt_redis_session *make_session(const kvt_redis_tls *tls, kvt_redis_link *link)
{
    kvt_redis_session *session = calloc(1, sizeof *session);
    BIO *bio;

    if (!session)
        return NULL;
    session->tls = tls;
    session->link = link;
    session->ssl = SSL_new(tls->context);
    bio = session->ssl ? BIO_new(tls->method) : NULL;
    if (!bio)
        goto fail;
    BIO_set_data(bio, session);
    BIO_set_init(bio, 1);
    SSL_set_bio(session->ssl, bio, bio);
    if (!set_host(session->ssl, link->node->host))
        goto fail;
    SSL_set_connect_state(session->ssl);
    return session;

fail:
    SSL_free(session->ssl);
    free(session);
    ERR_clear_error();
    return NULL;
}

static kvt_status fail_late(const kvt_redis_link *link, kvt_store_error *error)
{
    return kvt_store_fail(error, KVT_ERR_IO, "%s: no TLS handshake in time%s", link->node->name,
                          link->first_byte < 0 ? ": does the server speak TLS on this port?" : "");
}

kvt_status kvt_redis_tls_connect(const kvt_redis_tls *tls, kvt_redis_link *link, uint64_t end_ms,
                                 kvt_store_error *error)
{
    kvt_redis_session *session = make_session(tls, link);

    link->tls = session;
    if (!session)
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for a connection");
    for (;;) {
        struct pollfd polled = {link->fd, 0, 0};
        uint64_t now;
        int result;

        ERR_clear_error();
        result = SSL_connect(session->ssl);
        if (result == 1)
            break;
        result = judge(session, result, &polled.events);
        if (result == 0)
            return kvt_store_fail(error, KVT_ERR_IO,
                                  "%s has closed the connection amid the TLS handshake",
                                  link->node->name);
        if (errno == EPROTO)
            return kvt_store_fail(error, KVT_ERR_IO, "%s: %s", link->node->name, session->failure);
        if (errno != EAGAIN)
            return kvt_redis_fail_errno(link, "the TLS handshake failed", errno, error);
        now = kvt_redis_now_ms();
        if (now >= end_ms)
            return fail_late(link, error);
        (void)poll(&polled, 1, end_ms - now > 60000 ? 60000 : (int)(end_ms - now));
    }
    session->established = 1;
    return KVT_OK;
}

/* ---- what a store has ---- */

/* Why a file cannot be used. */
static kvt_status fail_file(const char *field, const char *path, const char *why,
                            kvt_store_error *error)
{
    FILE *file = fopen(path, "rb");
    int number = file ? 0 : errno;
    unsigned long code = ERR_peek_error();

    if (file)
        (void)fclose(file);
    ERR_clear_error();
    if (ERR_GET_REASON(code) == ERR_R_MALLOC_FAILURE)
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the store");
    if (number)
        return kvt_store_fail(error, KVT_ERR_IO, "%s: %.120s: %s", field, path, strerror(number));
    return kvt_store_fail(error, KVT_ERR_ARG, "%s: %.120s: %s", field, path, why);
}

/* In place of OpenSSL's own one, which reads the terminal. */
static int no_password(char *text, int bytes, int writes, void *user)
{
    (void)text;
    (void)bytes;
    (void)writes;
    *(int *)user = 1;
    return -1;
}

static kvt_status take_certificate(SSL_CTX *context, const kvt_redis_config *config,
                                   kvt_store_error *error)
{
    const char *certificate = config->tls_cert_file, *key = config->tls_key_file;
    int is_encrypted = 0, taken;

    if (SSL_CTX_use_certificate_chain_file(context, certificate) != 1)
        return fail_file("tls_cert_file", certificate, "it is no certificate in PEM", error);
    SSL_CTX_set_default_passwd_cb(context, no_password);
    SSL_CTX_set_default_passwd_cb_userdata(context, &is_encrypted);
    taken = SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) == 1;
    SSL_CTX_set_default_passwd_cb_userdata(context, NULL);
    if (!taken)
        return fail_file("tls_key_file", key,
                         is_encrypted ? "it needs a password: store the key without one"
                         : ERR_GET_LIB(ERR_peek_last_error()) == ERR_LIB_X509
                             ? "it is not the key of tls_cert_file"
                             : "it is no private key in PEM",
                         error);
    return KVT_OK;
}

void kvt_redis_tls_free(kvt_redis_tls *tls)
{
    if (!tls)
        return;
    SSL_CTX_free(tls->context);
    BIO_meth_free(tls->method);
    free(tls);
}

kvt_status kvt_redis_tls_make(const kvt_redis_config *config, kvt_redis_tls **result,
                              kvt_store_error *error)
{
    const char *ca = config->tls_ca_file;
    kvt_redis_tls *tls = calloc(1, sizeof *tls);
    kvt_status status = KVT_OK;

    ERR_clear_error();
    if (tls) {
        tls->context = SSL_CTX_new(TLS_client_method());
        /* Not with a number of BIO_get_new_index, of which a process has about a hundred. */
        tls->method = BIO_meth_new(BIO_TYPE_SOURCE_SINK, "kvtile socket");
    }
    if (!tls || !tls->context || !tls->method || !BIO_meth_set_read(tls->method, read_socket) ||
        !BIO_meth_set_write(tls->method, write_socket) ||
        !BIO_meth_set_ctrl(tls->method, control_socket) ||
        !SSL_CTX_set_min_proto_version(tls->context, TLS1_2_VERSION)) {
        status = kvt_store_fail(error, KVT_ERR_MEMORY,
                                "no memory for TLS, or OpenSSL's own configuration has an error");
        goto fail;
    }
    (void)SSL_CTX_set_options(tls->context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
    (void)SSL_CTX_set_mode(tls->context,
                           SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(tls->context, 1); /* a record's head and the rest by one system call */
    SSL_CTX_set_verify(tls->context, SSL_VERIFY_PEER, NULL);
    if (ca && SSL_CTX_load_verify_locations(tls->context, ca, NULL) != 1)
        status = fail_file("tls_ca_file", ca, "it has no certificate in PEM", error);
    else if (!ca && SSL_CTX_set_default_verify_paths(tls->context) != 1)
        status = kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the store");
    else if (config->tls_cert_file)
        status = take_certificate(tls->context, config, error);
    if (status != KVT_OK)
        goto fail;
    tls->has_certificate = config->tls_cert_file != NULL;
    ERR_clear_error();
    *result = tls;
    return KVT_OK;

fail:
    kvt_redis_tls_free(tls);
    ERR_clear_error();
    return status;
}

#else /* no TLS: there is no link that has it */

#include <string.h>

kvt_status kvt_redis_tls_make(const kvt_redis_config *config, kvt_redis_tls **result,
                              kvt_store_error *error)
{
    (void)config;
    (void)result;
    return kvt_store_fail(error, KVT_ERR_UNSUPPORTED,
                          "the library was built without TLS (KVTILE_TLS, OpenSSL): "
                          "let stunnel carry the connection");
}

void kvt_redis_tls_free(kvt_redis_tls *tls)
{
    (void)tls;
}

kvt_status kvt_redis_tls_connect(const kvt_redis_tls *tls, kvt_redis_link *link, uint64_t end_ms,
                                 kvt_store_error *error)
{
    (void)tls;
    (void)end_ms;
    return kvt_store_fail(error, KVT_ERR_UNSUPPORTED, "%s: no TLS", link->node->name);
}

void kvt_redis_tls_end(kvt_redis_link *link)
{
    (void)link;
}

ssize_t kvt_redis_tls_receive(kvt_redis_link *link, const struct iovec *pieces, size_t n_pieces)
{
    (void)link;
    (void)pieces;
    (void)n_pieces;
    return 0;
}

ssize_t kvt_redis_tls_send(kvt_redis_link *link, const struct iovec *pieces, size_t n_pieces)
{
    (void)link;
    (void)pieces;
    (void)n_pieces;
    return 0;
}

int kvt_redis_tls_is_quiet(kvt_redis_link *link)
{
    (void)link;
    return 0;
}

const char *kvt_redis_tls_failure(const kvt_redis_link *link, int number)
{
    (void)link;
    return strerror(number);
}

#endif /* KVT_HAVE_TLS */
#endif /* KVT_HAVE_REDIS */
