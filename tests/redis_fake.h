/*
 * Servers that do not behave, each a thread with a port of the loopback: what they answer, when
 * they do, and when they close is up to the test. One connection after the other. All functions
 * assert.
 */
#ifndef KVT_TEST_REDIS_FAKE_H
#define KVT_TEST_REDIS_FAKE_H

#include "support.h"

#include <stdatomic.h>

typedef enum fake_kind {
    FAKE_DEAF,  /* accepts a connection, and never reads or writes */
    FAKE_SAYS,  /* for whatever comes: `text` */
    FAKE_ENDS,  /* once, and then closes */
    FAKE_DRIPS, /* once, and then an x every `pause_ms` */
    FAKE_PASSES /* passes bytes to and from the server at `target` */
} fake_kind;

typedef struct fake {
    fake_kind kind;
    const char *path; /* a socket of the file system, in place of a port; or NULL */
    const char *text;
    size_t text_bytes; /* 0: up to its zero */
    const char *then;  /* FAKE_SAYS: from the second time on; NULL: `text` */
    int pause_ms;      /* FAKE_PASSES: between two pieces */
    /* FAKE_PASSES: */
    int target;     /* its port */
    uint32_t slice; /* answers are passed on in pieces of 1 .. slice bytes; 0: as they come */
    size_t cut;     /* the first connection is closed after so many bytes of answers; SIZE_MAX: */
    int reset;      /* by RST. Else by FIN */
    /* The test's to read: */
    int port;
    atomic_int n_accepted;
    /* Its own: */
    int listener, stop[2];
    pthread_t thread;
} fake;

/* Start what is set in *f. */
void fake_start(fake *f);
void fake_stop(fake *f);

/* A port that nobody listens at; and one where connections are never accepted (close the
   sockets). */
int port_of_nobody(void);
int port_of_nowhere(int sockets[4]);

#endif /* KVT_TEST_REDIS_FAKE_H */
