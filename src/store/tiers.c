/*
 * Two stores as one, the nearer before the farther.
 *
 * A get asks near for all keys, then far for those that near did not deliver in whole, or that the
 * receiver has left: near's copy may be damaged and far's sound, which then takes its place. What
 * far delivers passes through to the receiver part by part; it is copied meanwhile, and when its
 * last part has come, and the receiver has not left it, put into near: one value at a time is in
 * memory. The copy grows with what comes, not with the size that far claims. The put runs inside
 * far's get, whose time it takes: a near that has failed, other than by having no room, is not
 * given anything for NEAR_RESTS_MS, or for ten times as long as it took to fail where that is
 * longer, nor by the same get later.
 *
 * A value of which near has delivered a part before it failed comes from far from its beginning:
 * the two copies may differ in their bytes, so that one cannot be continued by the other.
 */
#include "src/store/store.h"

#include <stdlib.h>
#include <time.h>

#define NEAR_RESTS_MS 1000
#define FIRST_BYTES ((size_t)256 << 10) /* of a copy, at first */

typedef struct tiers {
    kvt_store near_store, far_store;
    /* Atomic. */
    uint64_t n_got, n_missed, n_put, n_failed;
    uint64_t near_rests_until_ms;
} tiers;

static void add(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* Of a call to both: where one has failed its status and text, where both have those of far. */
static kvt_status answer(tiers *t, kvt_status near_status, kvt_status far_status,
                         kvt_store_error *error, const kvt_store_error *far_error)
{
    add(&t->n_failed, (uint64_t)(near_status != KVT_OK) + (uint64_t)(far_status != KVT_OK));
    if (far_status == KVT_OK)
        return near_status;
    *error = *far_error;
    return far_status;
}

/* ---- get ---- */

enum { WANTED, TAKEN, LEFT }; /* not delivered yet; in whole; not wanted any more */

typedef struct getting {
    tiers *t;
    const kvt_store_receiver *receiver;
    const kvt_store_key *keys; /* the caller's */
    unsigned char *done;       /* [n]: of the caller's keys */
    const size_t *index;       /* far: of its key i the caller's; NULL: near, the same */
    int stopped;
    unsigned char *copy; /* far: of the value that is coming */
    size_t room;
    uint64_t n_copied;
    int copies; /* the copy is whole so far */
    int near_fails;
} getting;

static size_t index_of(const getting *g, size_t i)
{
    return g->index ? g->index[i] : i;
}

static void *place(void *user, size_t i, uint64_t total, uint64_t offset, size_t *bytes)
{
    const getting *g = user;
    return g->receiver->place(g->receiver->user, index_of(g, i), total, offset, bytes);
}

static uint64_t now_ms(void)
{
    struct timespec now = {0, 0};
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Whether near is not to be given what comes now. */
static int near_rests(const getting *g)
{
    return g->near_fails ||
           now_ms() < __atomic_load_n(&g->t->near_rests_until_ms, __ATOMIC_RELAXED);
}

/* Take a part into the copy; without memory there is none of this value. */
static void copy_part(getting *g, uint64_t total, uint64_t offset, const void *data, size_t bytes)
{
    if (offset == 0) {
        g->n_copied = 0;
        g->copies = !near_rests(g);
    }
    if (!g->copies || offset != g->n_copied || bytes > total - offset || total > SIZE_MAX / 2) {
        g->copies = 0;
        return;
    }
    if (g->room - (size_t)offset < bytes) {
        size_t room = g->room > FIRST_BYTES ? g->room : FIRST_BYTES;
        unsigned char *copy;
        while (room - (size_t)offset < bytes)
            room *= 2;
        room = room < total ? room : (size_t)total;
        copy = realloc(g->copy, room);
        if (!copy) {
            add(&g->t->n_failed, 1);
            g->copies = 0;
            return;
        }
        g->copy = copy;
        g->room = room;
    }
    if (bytes)
        memcpy(g->copy + offset, data, bytes);
    g->n_copied += bytes;
}

/* A value that far has and near has not. That near fails is counted, and no failure of the get. */
static void put_near(getting *g, const kvt_store_key *key, uint64_t total)
{
    kvt_store_part part = {g->copy, (size_t)total};
    kvt_store_value value = {&part, 1, total};
    const kvt_store *s = &g->t->near_store;
    kvt_store_error ignored;
    kvt_status status;
    uint64_t begun, took;
    size_t n_put;

    if (near_rests(g)) /* since the value began to come */
        return;
    begun = now_ms();
    status = s->put(s->user, key, &value, 1, &n_put, &ignored);
    if (status == KVT_OK)
        return;
    took = now_ms() - begun;
    add(&g->t->n_failed, 1);
    if (status == KVT_ERR_FULL) /* another value may have room */
        return;
    g->near_fails = 1;
    __atomic_store_n(&g->t->near_rests_until_ms,
                     begun + took + (10 * took > NEAR_RESTS_MS ? 10 * took : NEAR_RESTS_MS),
                     __ATOMIC_RELAXED);
}

static int part(void *user, size_t i, uint64_t total, uint64_t offset, const void *data,
                size_t bytes)
{
    getting *g = user;
    size_t at = index_of(g, i);
    int reply, is_last = bytes >= total - offset;

    if (g->index) /* before the receiver: it may change the data, where they are in its memory */
        copy_part(g, total, offset, data, bytes);
    reply = g->receiver->part(g->receiver->user, at, total, offset, data, bytes);
    if (is_last && (g->index || reply != KVT_STORE_SKIP))
        g->done[at] = TAKEN;
    else if (g->index && reply != KVT_STORE_MORE && g->done[at] == WANTED)
        g->done[at] = LEFT;
    if (reply != KVT_STORE_MORE && reply != KVT_STORE_SKIP)
        g->stopped = 1;
    if (g->index && is_last && g->copies && reply == KVT_STORE_MORE)
        put_near(g, &g->keys[at], total);
    if (is_last)
        g->copies = 0;
    return reply;
}

/* far, for what is wanted still. */
static kvt_status get_far(getting *g, size_t n, kvt_store_error *error)
{
    const kvt_store *s = &g->t->far_store;
    kvt_store_receiver own = {g, part, g->receiver->place ? place : NULL};
    size_t i, n_wanted = 0, at = 0, *index;
    kvt_store_key *keys;
    kvt_status status;

    for (i = 0; i < n; i++)
        n_wanted += g->done[i] == WANTED;
    if (n_wanted == 0)
        return KVT_OK;
    keys = calloc(n_wanted, sizeof *keys);
    index = calloc(n_wanted, sizeof *index);
    if (!keys || !index) {
        free(keys);
        free(index);
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the keys of a get");
    }
    for (i = 0; i < n; i++)
        if (g->done[i] == WANTED) {
            keys[at] = g->keys[i];
            index[at++] = i;
        }
    g->index = index;
    status = s->get(s->user, keys, n_wanted, &own, error);
    /* Where it has delivered all the same, nothing is missing. */
    for (at = i = 0; i < n; i++)
        at += g->done[i] == WANTED;
    free(g->copy);
    free(keys);
    free(index);
    if (status != KVT_OK)
        add(&g->t->n_failed, 1);
    return at ? status : KVT_OK;
}

/* What near delivers. Its failure is counted where it is asked for the rest, with far. */
static kvt_status get_near(void *user, const kvt_store_key *keys, size_t n,
                           const kvt_store_receiver *receiver, kvt_store_error *error)
{
    tiers *t = user;
    unsigned char *done = calloc(n ? n : 1, 1);
    getting g = {.t = t, .receiver = receiver, .keys = keys, .done = done};
    kvt_store_receiver own = {&g, part, receiver->place ? place : NULL};
    kvt_store_get *inner;

    if (!done)
        return KVT_OK;
    inner = kvt_store_get_near(&t->near_store); /* tiers of its own */
    (void)(inner ? inner : t->near_store.get)(t->near_store.user, keys, n, &own, error);
    for (size_t i = 0; i < n; i++)
        add(&t->n_got, done[i] == TAKEN);
    free(done);
    return KVT_OK;
}

static kvt_status get(void *user, const kvt_store_key *keys, size_t n,
                      const kvt_store_receiver *receiver, kvt_store_error *error)
{
    getting g;
    kvt_store_receiver own = {&g, part, receiver->place ? place : NULL};
    kvt_status status = KVT_OK;
    tiers *t = user;
    size_t i;

    memset(&g, 0, sizeof g);
    g.t = t;
    g.receiver = receiver;
    g.keys = keys;
    g.done = calloc(n ? n : 1, 1);
    if (!g.done) {
        add(&t->n_failed, 1);
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for a get");
    }
    if (t->near_store.get(t->near_store.user, keys, n, &own, error) != KVT_OK)
        add(&t->n_failed, 1);
    if (!g.stopped)
        status = get_far(&g, n, error);
    for (i = 0; i < n; i++) {
        add(&t->n_got, g.done[i] == TAKEN);
        add(&t->n_missed, g.done[i] == WANTED && !g.stopped);
    }
    free(g.done);
    return status;
}

/* ---- the others ---- */

/*
 * Both always: what one has is of use without the other, so the failure of one is none of the call:
 * it is counted.
 */
static kvt_status put(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                      size_t n, size_t *n_put, kvt_store_error *error)
{
    tiers *t = user;
    kvt_store_error far_error = {""};
    size_t n_near = 0, n_far = 0;
    kvt_status near_status, far_status;

    near_status = t->near_store.put(t->near_store.user, keys, values, n, &n_near, error);
    far_status = t->far_store.put(t->far_store.user, keys, values, n, &n_far, &far_error);
    *n_put = n_near > n_far ? n_near : n_far;
    add(&t->n_put, *n_put);
    near_status = answer(t, near_status, far_status, error, &far_error);
    return *n_put == n ? KVT_OK : near_status;
}

/* far, for what near has not. */
static kvt_status exists_far(tiers *t, const kvt_store_key *keys, size_t n, uint8_t *found,
                             kvt_store_error *error)
{
    size_t i, n_asked = 0, at = 0;
    kvt_store_key *asked;
    uint8_t *answers;
    kvt_status status;

    for (i = 0; i < n; i++)
        n_asked += !found[i];
    if (n_asked == 0)
        return KVT_OK;
    asked = calloc(n_asked, sizeof *asked + 1);
    if (!asked)
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the keys of a query");
    answers = (uint8_t *)(asked + n_asked);
    for (i = 0; i < n; i++)
        if (!found[i])
            asked[at++] = keys[i];
    status = t->far_store.exists(t->far_store.user, asked, n_asked, answers, error);
    for (at = i = 0; i < n && status == KVT_OK; i++)
        if (!found[i]) {
            found[i] = answers[at++] != 0;
            add(&t->n_missed, !found[i]);
        }
    free(asked);
    return status;
}

static kvt_status exists(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                         kvt_store_error *error)
{
    tiers *t = user;
    kvt_store_error far_error = {""};
    kvt_status near_status, far_status;

    near_status = t->near_store.exists(t->near_store.user, keys, n, found, error);
    if (near_status != KVT_OK && n)
        memset(found, 0, n);
    far_status = exists_far(t, keys, n, found, &far_error);
    (void)answer(t, near_status, far_status, error, &far_error);
    /* What one of them has is there, whatever the other may have besides. */
    return near_status == KVT_OK || far_status == KVT_OK ? KVT_OK : far_status;
}

static kvt_status remove_values(void *user, const kvt_store_key *keys, size_t n,
                                kvt_store_error *error)
{
    tiers *t = user;
    kvt_store_error far_error = {""};
    kvt_status near_status, far_status;

    near_status = t->near_store.remove(t->near_store.user, keys, n, error);
    far_status = t->far_store.remove(t->far_store.user, keys, n, &far_error);
    return answer(t, near_status, far_status, error, &far_error);
}

typedef struct listing {
    int (*on_entry)(void *entry_user, const kvt_store_entry *entry);
    void *entry_user;
    int stopped;
} listing;

static int list_entry(void *user, const kvt_store_entry *entry)
{
    listing *l = user;
    l->stopped = l->on_entry(l->entry_user, entry) != 0;
    return l->stopped;
}

/* near's, then far's: a value that both have comes twice, as keys are not kept in memory. */
static kvt_status list(void *user, int (*on_entry)(void *entry_user, const kvt_store_entry *entry),
                       void *entry_user, kvt_store_error *error)
{
    tiers *t = user;
    listing l = {on_entry, entry_user, 0};
    kvt_status near_status = KVT_OK, far_status = KVT_OK;
    kvt_store_error far_error = {""};

    if (t->near_store.list)
        near_status = t->near_store.list(t->near_store.user, list_entry, &l, error);
    if (t->far_store.list && !l.stopped)
        far_status = t->far_store.list(t->far_store.user, list_entry, &l, &far_error);
    return answer(t, near_status, far_status, error, &far_error);
}

/* What is in the store is what is in far; the counters are of this one. */
static kvt_status stats(void *user, kvt_store_stats *to, kvt_store_error *error)
{
    tiers *t = user;
    kvt_store_stats all;
    kvt_status status = KVT_OK;

    memset(&all, 0, sizeof all);
    all.n_values = all.bytes = all.max_bytes = all.n_evicted = UINT64_MAX;
    if (t->far_store.stats)
        status = t->far_store.stats(t->far_store.user, &all, error);
    if (status != KVT_OK) {
        add(&t->n_failed, 1);
        return status;
    }
    all.n_got = __atomic_load_n(&t->n_got, __ATOMIC_RELAXED);
    all.n_missed = __atomic_load_n(&t->n_missed, __ATOMIC_RELAXED);
    all.n_put = __atomic_load_n(&t->n_put, __ATOMIC_RELAXED);
    all.n_failed = __atomic_load_n(&t->n_failed, __ATOMIC_RELAXED);
    *to = all;
    return KVT_OK;
}

static kvt_status collect(void *user, kvt_store_error *error)
{
    tiers *t = user;
    kvt_store_error far_error = {""};
    kvt_status near_status = KVT_OK, far_status = KVT_OK;

    if (t->near_store.collect)
        near_status = t->near_store.collect(t->near_store.user, error);
    if (t->far_store.collect)
        far_status = t->far_store.collect(t->far_store.user, &far_error);
    return answer(t, near_status, far_status, error, &far_error);
}

static void close_tiers(void *user)
{
    tiers *t = user;
    kvt_store_close(&t->near_store);
    kvt_store_close(&t->far_store);
    free(t);
}

kvt_store_get *kvt_store_get_near(const kvt_store *store)
{
    return store->get == get ? get_near : NULL;
}

kvt_status kvt_store_open_tiers(const kvt_store *near_store, const kvt_store *far_store,
                                kvt_store *store)
{
    tiers *t;

    if (!kvt_store_is_whole(near_store) || !kvt_store_is_whole(far_store) || !store)
        return KVT_ERR_ARG;
    if (near_store->close && near_store->close == far_store->close &&
        near_store->get == far_store->get &&
        near_store->user == far_store->user) /* one store: it would be closed twice */
        return KVT_ERR_ARG;
    t = calloc(1, sizeof *t);
    if (!t)
        return KVT_ERR_MEMORY;
    t->near_store = *near_store;
    t->far_store = *far_store;
    memset(store, 0, sizeof *store);
    store->struct_size = sizeof *store;
    store->user = t;
    store->get = get;
    store->put = put;
    store->exists = exists;
    store->remove = remove_values;
    store->n_at_once = t->near_store.n_at_once;
    store->list = t->near_store.list || t->far_store.list ? list : NULL;
    store->stats = stats;
    store->collect = t->near_store.collect || t->far_store.collect ? collect : NULL;
    store->close = close_tiers;
    return KVT_OK;
}
