/*
 * Argument checks of the API: every public function with invalid arguments and in invalid states.
 * Each returns the status that the header documents, changes neither the sequence nor the memory,
 * writes no out-pointer, and sets an error text that names the cause. Unusual but valid arguments
 * are accepted.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* syscall, sigaltstack */
#endif
#include "support.h"

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

enum { LAYERS = 2, Q_HEADS = 4, KV_HEADS = 2, K_DIM = 16, V_DIM = 24, MAX_TOKENS = 300 };

/* ---- the fixture: a cache with one sequence, and what must not change ---- */

typedef struct fixture {
    ledger memory;
    kvt_group_config group;
    kvt_cache *cache;
    kvt_seq *seq;
    tokens t;
} fixture;

static kvt_config good_config(const kvt_group_config *group)
{
    kvt_config c = kvt_config_init();
    c.groups = group;
    c.n_groups = 1;
    c.max_tokens = MAX_TOKENS;
    return c;
}

static void open_fixture(fixture *f, kvt_type k_type, kvt_type v_type, size_t length)
{
    kvt_config config;
    rng r = {17};
    ledger_init(&f->memory);
    f->group = group_of(LAYERS, Q_HEADS, KV_HEADS, K_DIM, V_DIM, k_type, v_type);
    config = good_config(&f->group);
    config.allocator = ledger_allocator(&f->memory);
    expect_ok(NULL, kvt_cache_create(&config, &f->cache));
    expect_ok(f->cache, kvt_seq_create(f->cache, &f->seq));
    f->t = tokens_make(&r, MAX_TOKENS, &f->group);
    if (length)
        append_all(f->cache, f->seq, &f->group, &f->t, 0, length, 40);
}

static void close_fixture(fixture *f)
{
    tokens_free(&f->t);
    kvt_seq_destroy(f->seq);
    kvt_cache_destroy(f->cache);
    ledger_close(&f->memory);
}

typedef struct mark {
    uint64_t hash, length, pending, memory, seq_memory, capacity;
    size_t live;
    int32_t next;
    kvt_status pending_reads[LAYERS];
} mark;

static mark mark_of(const fixture *f)
{
    static float row[MAX_TOKENS * KV_HEADS * V_DIM];
    kvt_tensor out = kvt_tensor_f32(row);
    mark m;
    memset(&m, 0, sizeof m);
    m.hash = seq_hash(f->seq, &f->group);
    m.length = kvt_seq_length(f->seq);
    m.pending = kvt_seq_pending(f->seq);
    m.memory = kvt_cache_memory_bytes(f->cache);
    m.seq_memory = kvt_seq_memory_bytes(f->seq);
    m.capacity = kvt_seq_capacity(f->seq);
    m.live = f->memory.live_bytes;
    m.next = kvt_seq_next_position(f->seq);
    for (uint32_t i = 0; i < LAYERS; i++) {
        memset(row, 0, sizeof row);
        m.pending_reads[i] = kvt_read(f->seq, i, KVT_SIDE_V, m.length, m.pending, &out);
        for (size_t j = 0; j < m.pending * KV_HEADS * V_DIM; j++) {
            uint32_t bits;
            memcpy(&bits, &row[j], sizeof bits);
            m.hash = (m.hash ^ bits) * 0x100000001b3u;
        }
    }
    return m;
}

static void expect_mark(const fixture *f, mark before, const char *where)
{
    mark now = mark_of(f);
    if (memcmp(&now, &before, sizeof now))
        fail_msg("%s\n  changed the state: length %llu -> %llu, pending %llu -> %llu, memory %llu "
                 "-> %llu, capacity %llu -> %llu, next %d -> %d, contents %s",
                 where, (unsigned long long)before.length, (unsigned long long)now.length,
                 (unsigned long long)before.pending, (unsigned long long)now.pending,
                 (unsigned long long)before.memory, (unsigned long long)now.memory,
                 (unsigned long long)before.capacity, (unsigned long long)now.capacity, before.next,
                 now.next, before.hash == now.hash ? "same" : "other");
}

/* Set an error text on the cache that no call of a test produces. */
static void stale_text(const fixture *f)
{
    expect(f->cache, KVT_ERR_ARG, kvt_seq_token_ids(f->seq, UINT64_MAX, 1, NULL));
}

/* The call fails with a status and a text, and nothing changes. */
#define refused(f, status, text, call)                                                             \
    do {                                                                                           \
        mark before_ = mark_of(f);                                                                 \
        stale_text(f);                                                                             \
        expect((f)->cache, status, call);                                                          \
        expect_error_text((f)->cache, text, __FILE__ ":" TEXT(__LINE__) ": " #call);               \
        expect_mark(f, before_, __FILE__ ":" TEXT(__LINE__) ": " #call);                           \
    } while (0)

/* The same where the arguments lead to no cache that could keep a text. */
#define refused_silently(f, status, call)                                                          \
    do {                                                                                           \
        mark before_ = mark_of(f);                                                                 \
        expect((f)->cache, status, call);                                                          \
        expect_mark(f, before_, __FILE__ ":" TEXT(__LINE__) ": " #call);                           \
    } while (0)

/* ---- the library ---- */

static void status_strings(void **state)
{
    const int unknown[] = {-1, 14, 15, 1000, INT_MAX, INT_MIN};
    const char *no_status = kvt_status_string((kvt_status)14);
    (void)state;
    for (int i = KVT_OK; i <= KVT_ERR_CANCELLED; i++) {
        const char *text = kvt_status_string((kvt_status)i);
        assert_true(strlen(text) > 5);
        assert_string_not_equal(text, no_status);
        for (int j = KVT_OK; j < i; j++)
            assert_string_not_equal(text, kvt_status_string((kvt_status)j));
    }
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        assert_string_equal(kvt_status_string((kvt_status)unknown[i]), no_status);
    assert_non_null(strstr(no_status, "not a"));
    assert_string_equal(kvt_version(), TEXT(KVT_VERSION_MAJOR) "." TEXT(KVT_VERSION_MINOR) "." TEXT(
                                           KVT_VERSION_PATCH));
}

#if defined(__x86_64__) && defined(__linux__)
#define ARCH_GET_XCOMP_PERM 0x1022 /* asm/prctl.h, which older systems lack */

/* Whether this process may use AMX's tile registers. */
static int has_tiles(void)
{
    unsigned long permitted = 0;
    return syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &permitted) == 0 && permitted >> 18 & 1;
}

static int set_signal_stack(void *memory, size_t bytes)
{
    stack_t stack = {.ss_sp = memory, .ss_size = bytes, .ss_flags = memory ? 0 : SS_DISABLE};
    return sigaltstack(&stack, NULL) == 0;
}

/* A cache of the named kernels, or of the widest; whether they are those expected. */
static int kernels_are(const char *isa, const char *expected)
{
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_config config = good_config(&g);
    kvt_cache *cache = NULL;
    kvt_status status;
    int same;
    config.isa = isa;
    status = kvt_cache_create(&config, &cache);
    same = expected ? status == KVT_OK && strcmp(kvt_cache_isa(cache), expected) == 0
                    : status == KVT_ERR_UNSUPPORTED;
    kvt_cache_destroy(cache);
    return same;
}

/* 0, or the step that failed. n: how many names there are, the last of them "amx". */
static int take_tiles(uint32_t n)
{
    static unsigned char memory[8192]; /* too small for a frame with tiles */
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_I8);
    kvt_config config = good_config(&g);
    kvt_cache *cache = NULL;
    uint64_t bytes;
    config.isa = "amx";
    if (kvt_memory_forecast(&config, 1, 1, &bytes) != KVT_OK)
        return 9;
    g.k_dim = 9;
    if (kvt_cache_create(&config, &cache) != KVT_ERR_ARG || has_tiles())
        return 1;
    for (uint32_t i = 0; i + 1 < n; i++)
        if (!kernels_are(kvt_isa_name(i), kvt_isa_name(i)) || has_tiles())
            return 2;
    if (!set_signal_stack(memory, sizeof memory))
        return 3;
    if (!kernels_are("amx", NULL) || has_tiles())
        return 4;
    if (!kernels_are(NULL, kvt_isa_name(n - 2)) || has_tiles())
        return 5;
    if (!set_signal_stack(NULL, 0))
        return 6;
    if (!kernels_are("amx", "amx") || !has_tiles())
        return 7;
    return kernels_are(NULL, "amx") ? 0 : 8;
}
#endif

/*
 * Only a cache that uses AMX makes the process one that does, whose signal stacks have to be larger
 * from then on. In a child, and before any other test: the permission is inherited.
 */
static void tile_registers_are_taken_with_amx_only(void **state)
{
#if defined(__x86_64__) && defined(__linux__)
    uint32_t n = 0;
    int status;
    pid_t child;
    (void)state;
    while (kvt_isa_name(n))
        n++;
    if (strcmp(kvt_isa_name(n - 1), "amx") != 0)
        skip();
    child = fork();
    assert_true(child >= 0);
    if (child == 0)
        _exit(take_tiles(n));
    assert_true(waitpid(child, &status, 0) == child && WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
#else
    (void)state;
    skip();
#endif
}

static void isa_names(void **state)
{
    kvt_group_config g = group_of(1, 2, 1, 8, 8, KVT_TYPE_I8, KVT_TYPE_F16);
    kvt_cache *cache;
    uint32_t n = 0;
    (void)state;
    assert_string_equal(kvt_isa_name(0), "scalar");
    for (; kvt_isa_name(n); n++) {
        for (uint32_t i = 0; i < n; i++)
            assert_string_not_equal(kvt_isa_name(i), kvt_isa_name(n));
        cache = cache_of(&g, 10, 1, kvt_isa_name(n));
        assert_string_equal(kvt_cache_isa(cache), kvt_isa_name(n));
        kvt_cache_destroy(cache);
    }
    for (uint32_t i = n; i < n + 5; i++)
        assert_null(kvt_isa_name(i));
    assert_null(kvt_isa_name(UINT32_MAX));
    cache = cache_of(&g, 10, 1, NULL);
    assert_string_equal(kvt_cache_isa(cache), kvt_isa_name(n - 1));
    kvt_cache_destroy(cache);
}

/* Queries return zero for NULL, and destroy functions accept it. */
static void null_handles(void **state)
{
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    char text[8] = "same";
    (void)state;
    kvt_cache_destroy(NULL);
    kvt_seq_destroy(NULL);
    assert_null(kvt_cache_isa(NULL));
    assert_true(kvt_cache_memory_bytes(NULL) == 0);
    assert_true(kvt_cache_bytes_per_token(NULL) == 0);
    assert_true(kvt_seq_length(NULL) == 0);
    assert_true(kvt_seq_is_empty(NULL) == 1);
    assert_true(kvt_seq_pending(NULL) == 0);
    assert_true(kvt_seq_next_position(NULL) == 0);
    assert_true(kvt_seq_capacity(NULL) == 0);
    assert_true(kvt_seq_max_tokens(NULL) == 0);
    assert_true(kvt_seq_memory_bytes(NULL) == 0);
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(NULL, &cache));
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(NULL, NULL));
    assert_null(cache);
    expect(NULL, KVT_ERR_ARG, kvt_cache_error(NULL, text, sizeof text));
    assert_string_equal(text, "same");
    expect(NULL, KVT_ERR_ARG, kvt_cache_trim(NULL));
    expect(NULL, KVT_ERR_ARG, kvt_seq_create(NULL, &seq));
    expect(NULL, KVT_ERR_ARG, kvt_seq_create(NULL, NULL));
    assert_null(seq);
    expect(NULL, KVT_ERR_ARG, kvt_seq_clear(NULL));
    expect(NULL, KVT_ERR_ARG, kvt_seq_truncate(NULL, 0));
    expect(NULL, KVT_ERR_ARG, kvt_seq_begin(NULL, 1, NULL));
    expect(NULL, KVT_ERR_ARG, kvt_seq_commit(NULL, NULL));
    expect(NULL, KVT_ERR_ARG, kvt_seq_abort(NULL));
}

static void error_texts(void **state)
{
    fixture f;
    char text[512], cut[10];
    (void)state;
    open_fixture(&f, KVT_TYPE_F32, KVT_TYPE_F32, 0);
    memset(text, 'x', sizeof text);
    expect_ok(f.cache, kvt_cache_error(f.cache, text, sizeof text));
    assert_string_equal(text, ""); /* nothing has failed */

    expect(f.cache, KVT_ERR_ARG, kvt_seq_truncate(f.seq, 12345));
    expect_ok(f.cache, kvt_cache_error(f.cache, text, sizeof text));
    assert_non_null(strstr(text, "12345"));
    assert_true(strlen(text) > sizeof cut);
    expect(f.cache, KVT_ERR_ARG, kvt_cache_error(f.cache, NULL, 100));
    expect(f.cache, KVT_ERR_ARG, kvt_cache_error(f.cache, NULL, 0));
    memset(cut, 'x', sizeof cut);
    expect(f.cache, KVT_ERR_ARG, kvt_cache_error(f.cache, cut, 0));
    assert_true(cut[0] == 'x');
    expect_ok(f.cache, kvt_cache_error(f.cache, cut, 1));
    assert_true(cut[0] == 0 && cut[1] == 'x');
    expect_ok(f.cache, kvt_cache_error(f.cache, cut, sizeof cut - 1));
    assert_true(strlen(cut) == sizeof cut - 2 && !strncmp(cut, text, sizeof cut - 2));
    assert_true(cut[sizeof cut - 1] == 'x');
    /* A call that succeeds keeps the text of the last failure. */
    expect_ok(f.cache, kvt_seq_clear(f.seq));
    expect_error_text(f.cache, "12345", "a later success");
    close_fixture(&f);
}

/* ---- configurations ---- */

/* Creation and forecast reject it alike, write no result and free all their memory. */
static void expect_refused(kvt_config config, kvt_status expected, const char *fragment, int line)
{
    char text[200];
    kvt_cache *const untouched = (kvt_cache *)(void *)&config;
    kvt_cache *cache = untouched;
    ledger memory;
    uint64_t bytes = 77;
    kvt_status got;
    int own_memory = !config.allocator.alloc && !config.allocator.free;

    ledger_init(&memory);
    if (own_memory)
        config.allocator = ledger_allocator(&memory);
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    for (int forecast = 0; forecast < 2; forecast++) {
        memset(text, 0, sizeof text);
        if (forecast && (expected == KVT_ERR_BUDGET || expected == KVT_ERR_MEMORY))
            continue; /* a forecast takes no memory */
        got = forecast ? kvt_memory_forecast(&config, 1, 1, &bytes)
                       : kvt_cache_create(&config, &cache);
        if (got != expected || !strstr(text, fragment))
            fail_msg("line %d, forecast %d: expected %d \"%s\", got %d \"%s\"", line, forecast,
                     (int)expected, fragment, (int)got, text);
        assert_ptr_equal(cache, untouched);
        assert_true(bytes == 77);
    }
    /* No text, no room for one, room for a part of one. */
    config.error_text = NULL;
    expect(NULL, expected, kvt_cache_create(&config, &cache));
    config.error_text = text;
    config.error_text_bytes = 0;
    text[0] = 'x';
    expect(NULL, expected, kvt_cache_create(&config, &cache));
    assert_true(text[0] == 'x');
    memset(text, 'x', sizeof text);
    config.error_text_bytes = 5;
    expect(NULL, expected, kvt_cache_create(&config, &cache));
    assert_true(strlen(text) <= 4 && text[5] == 'x');
    ledger_close(&memory);
}

/* One change to a valid configuration of two groups invalidates it. c: config, g: its groups. */
#define config_case(expected, fragment, change)                                                    \
    do {                                                                                           \
        kvt_group_config g[2] = {group_of(2, 4, 2, 16, 24, KVT_TYPE_I8, KVT_TYPE_F16),             \
                                 group_of(1, 2, 2, 8, 8, KVT_TYPE_F32, KVT_TYPE_I8)};              \
        kvt_config c = good_config(g);                                                             \
        c.n_groups = 2;                                                                            \
        change;                                                                                    \
        expect_refused(c, expected, fragment, __LINE__);                                           \
    } while (0)

static void run_inline(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    (void)user;
    for (size_t i = 0; i < n; i++)
        task(arg, i);
}

static void bad_configs(void **state)
{
    static const uint32_t twice[] = {0, 0}, far[] = {0, 3}, huge[] = {0, UINT32_MAX},
                          falling[] = {1, 0}, good_first[] = {0, 2}, clash[] = {2};
    (void)state;
    config_case(KVT_ERR_ARG, "groups", c.groups = NULL);
    config_case(KVT_ERR_ARG, "groups", c.n_groups = 0);
    config_case(KVT_ERR_LIMIT, "9 layer groups", c.n_groups = KVT_MAX_GROUPS + 1);
    config_case(KVT_ERR_LIMIT, "layer groups", c.n_groups = UINT32_MAX);
    config_case(KVT_ERR_ARG, "max_tokens", c.max_tokens = 0);
    config_case(KVT_ERR_LIMIT, "max_tokens", c.max_tokens = (uint64_t)KVT_MAX_TOKENS + 1);
    config_case(KVT_ERR_LIMIT, "max_tokens", c.max_tokens = UINT64_MAX);
    config_case(KVT_ERR_ARG, "fingerprint", c.fingerprint_bytes = 4);
    config_case(KVT_ERR_LIMIT, "fingerprint",
                (c.fingerprint = "x", c.fingerprint_bytes = KVT_MAX_FINGERPRINT + 1));
    config_case(KVT_ERR_LIMIT, "fingerprint",
                (c.fingerprint = "x", c.fingerprint_bytes = SIZE_MAX));
    {
        ledger unused;
        kvt_allocator both;
        ledger_init(&unused);
        both = ledger_allocator(&unused);
        config_case(KVT_ERR_ARG, "alloc", (c.allocator = both, c.allocator.free = NULL));
        config_case(KVT_ERR_ARG, "alloc", (c.allocator = both, c.allocator.alloc = NULL));
        ledger_close(&unused);
    }
    config_case(KVT_ERR_LIMIT, "threads", c.n_threads = KVT_MAX_THREADS + 1);
    config_case(KVT_ERR_LIMIT, "threads", c.n_threads = UINT32_MAX);
    config_case(KVT_ERR_LIMIT, "threads",
                (c.executor.run = run_inline, c.n_threads = KVT_MAX_THREADS + 1));
    config_case(KVT_ERR_UNSUPPORTED, "z80", c.isa = "z80");
    config_case(KVT_ERR_UNSUPPORTED, "isa", c.isa = "");
    config_case(KVT_ERR_UNSUPPORTED, "isa", c.isa = "scala");
    config_case(KVT_ERR_UNSUPPORTED, "isa", c.isa = "SCALAR");
    config_case(KVT_ERR_BUDGET, "budget", c.memory_budget_bytes = 1);

    config_case(KVT_ERR_ARG, "group 1", g[1].struct_size = 0);
    config_case(KVT_ERR_ARG, "group 0: struct_size", g[0].struct_size--);
    config_case(KVT_ERR_ARG, "struct_size", g[0].struct_size++);
    config_case(KVT_ERR_ARG, "struct_size", g[0].struct_size = SIZE_MAX);
    config_case(KVT_ERR_ARG, "n_layers", g[1].n_layers = 0);
    config_case(KVT_ERR_LIMIT, "n_layers", g[0].n_layers = KVT_MAX_LAYERS + 1);
    config_case(KVT_ERR_LIMIT, "n_layers", g[0].n_layers = UINT32_MAX);
    config_case(KVT_ERR_LIMIT, "layers", g[0].n_layers = KVT_MAX_LAYERS);
    config_case(KVT_ERR_ARG, "n_q_heads", g[0].n_q_heads = 0);
    config_case(KVT_ERR_ARG, "n_kv_heads", g[0].n_kv_heads = 0);
    config_case(KVT_ERR_ARG, "divide", g[0].n_q_heads = 5);
    config_case(KVT_ERR_ARG, "divide", g[0].n_kv_heads = 8);
    config_case(KVT_ERR_LIMIT, "heads", g[0].n_q_heads = KVT_MAX_HEADS + 2);
    config_case(KVT_ERR_LIMIT, "heads", g[1].n_q_heads = g[1].n_kv_heads = KVT_MAX_HEADS + 1);
    config_case(KVT_ERR_LIMIT, "heads", g[0].n_q_heads = g[0].n_kv_heads = UINT32_MAX);
    config_case(KVT_ERR_ARG, "k_dim", g[0].k_dim = 0);
    config_case(KVT_ERR_ARG, "v_dim", g[0].v_dim = 0);
    config_case(KVT_ERR_ARG, "k_dim 12", g[0].k_dim = 12);
    config_case(KVT_ERR_ARG, "v_dim 7", g[1].v_dim = 7);
    config_case(KVT_ERR_ARG, "k_dim", g[0].k_dim = UINT32_MAX);
    config_case(KVT_ERR_LIMIT, "k_dim 1032", g[0].k_dim = KVT_MAX_DIM + 8);
    config_case(KVT_ERR_LIMIT, "v_dim 1032", g[0].v_dim = KVT_MAX_DIM + 8);
    config_case(KVT_ERR_LIMIT, "k_dim", g[0].k_dim = UINT32_MAX - 7);
    config_case(KVT_ERR_ARG, "k_type", g[0].k_type = (kvt_type)(KVT_TYPE_I5 + 1));
    config_case(KVT_ERR_ARG, "k_type is i5", g[0].k_type = KVT_TYPE_I5);
    config_case(KVT_ERR_ARG, "NO_OFFSET with K of 4 bits",
                (g[0].k_type = KVT_TYPE_I4, g[0].flags = KVT_GROUP_NO_OFFSET));
    config_case(KVT_ERR_ARG, "v_type is not k_type",
                (g[0].k_type = KVT_TYPE_I4, g[0].v_dim = 16, g[0].flags = KVT_GROUP_V_IN_K));
    config_case(
        KVT_ERR_ARG, "K has 4 bits",
        (g[0].k_type = g[0].v_type = KVT_TYPE_I4, g[0].v_dim = 16, g[0].flags = KVT_GROUP_V_IN_K));
    config_case(
        KVT_ERR_ARG, "k_type is i5",
        (g[0].k_type = g[0].v_type = KVT_TYPE_I5, g[0].v_dim = 16, g[0].flags = KVT_GROUP_V_IN_K));
    config_case(KVT_ERR_LIMIT, "fine_tokens", g[0].fine_tokens = KVT_MAX_TOKENS + 1);
    config_case(KVT_ERR_LIMIT, "group 1: fine_tokens", g[1].fine_tokens = KVT_FINE_NONE - 1);
    config_case(KVT_ERR_ARG, "v_type", g[1].v_type = (kvt_type)-1);
    config_case(KVT_ERR_ARG, "k_type", g[0].k_type = (kvt_type)INT_MAX);
    config_case(KVT_ERR_ARG, "flags 0x10", g[0].flags = 16);
    config_case(KVT_ERR_ARG, "reserved", g[1].reserved = 1);
    config_case(KVT_ERR_LIMIT, "residual_tokens", g[0].residual_tokens = KVT_MAX_TOKENS + 1);
    config_case(KVT_ERR_ARG, "flags", g[0].flags = 0x80000000u | KVT_GROUP_NO_OFFSET);
    config_case(KVT_ERR_ARG, "layer 0", g[0].layers = twice);
    config_case(KVT_ERR_ARG, "layer 3", g[0].layers = far);
    config_case(KVT_ERR_ARG, "layer 4294967295", g[0].layers = huge);
    config_case(KVT_ERR_ARG, "ascending", g[0].layers = falling);
    config_case(KVT_ERR_ARG, "layer 2", g[0].layers = good_first);
    config_case(KVT_ERR_ARG, "layer 2", (g[0].layers = good_first, g[1].layers = clash));
    {
        kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_F32, KVT_TYPE_F32);
        kvt_config c = good_config(&g);
        kvt_cache *cache = NULL;
        uint64_t bytes = 5;
        const size_t sizes[] = {0, sizeof c - 1, sizeof c + 1, SIZE_MAX};
        expect(NULL, KVT_ERR_ARG, kvt_cache_create(&c, NULL));
        expect(NULL, KVT_ERR_ARG, kvt_memory_forecast(NULL, 1, 1, &bytes));
        expect(NULL, KVT_ERR_ARG, kvt_memory_forecast(&c, 1, 1, NULL));
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            c.struct_size = sizes[i];
            expect(NULL, KVT_ERR_ARG, kvt_cache_create(&c, &cache));
            expect(NULL, KVT_ERR_ARG, kvt_memory_forecast(&c, 1, 1, &bytes));
        }
        assert_null(cache);
        assert_true(bytes == 5);
    }
}

/* Layers of the widest kind: with pointers of 32 bits one, a block of which is half a GiB. */
static const int narrow = SIZE_MAX == UINT32_MAX;
#define WIDE_LAYERS (narrow ? 1 : 128)

static void forecasts_that_overflow(void **state)
{
    kvt_group_config g = group_of(WIDE_LAYERS, 1024, 1024, 1024, 1024, KVT_TYPE_F32, KVT_TYPE_F32);
    kvt_config c = good_config(&g);
    kvt_group_config eight[8] = {g, g, g, g, g, g, g, g};
    uint64_t bytes = 5;
    char text[200] = "";
    (void)state;
    c.error_text = text;
    c.error_text_bytes = sizeof text;
    expect(NULL, KVT_ERR_LIMIT, kvt_memory_forecast(&c, 1, MAX_TOKENS + 1, &bytes));
    assert_non_null(strstr(text, "max_tokens"));
    expect(NULL, KVT_ERR_LIMIT, kvt_memory_forecast(&c, 1, UINT64_MAX, &bytes));
    expect(NULL, KVT_ERR_LIMIT, kvt_memory_forecast(&c, UINT64_MAX, 1, &bytes));
    assert_non_null(strstr(text, "overflow"));
    expect(NULL, KVT_ERR_LIMIT, kvt_memory_forecast(&c, UINT64_MAX / 64, 0, &bytes));
    c.groups = eight;
    c.n_groups = 8;
    c.max_tokens = KVT_MAX_TOKENS;
    expect(NULL, KVT_ERR_LIMIT, kvt_memory_forecast(&c, narrow ? 1024 : 2, KVT_MAX_TOKENS, &bytes));
    expect(NULL, KVT_ERR_LIMIT, kvt_memory_forecast(&c, UINT64_MAX, KVT_MAX_TOKENS, &bytes));
    assert_true(bytes == 5);
    expect_ok(NULL, kvt_memory_forecast(&c, 1, KVT_MAX_TOKENS, &bytes));
    assert_true(bytes > (uint64_t)1 << (narrow ? 55 : 62));
}

/* A block is one allocation: a group whose blocks cannot be addressed is refused at once. */
static void blocks_wider_than_pointers(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4};
    (void)state;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++)
        for (uint32_t layers = 1; layers <= 1024; layers *= 2) {
            kvt_group_config g = group_of(layers, 1024, 1024, 1024, 1024, types[t], types[t]);
            kvt_config c = good_config(&g);
            kvt_cache *cache = NULL;
            char text[200] = "";
            uint64_t bytes = 5, bits = types[t] == KVT_TYPE_F32 ? 32 : 16; /* open blocks are f16 */
            uint64_t block = (uint64_t)layers * 1024 * 1024 * 2 * 64 * bits / 8;
            kvt_status status;
            c.error_text = text;
            c.error_text_bytes = sizeof text;
            status = kvt_memory_forecast(&c, 1, 64, &bytes);
            if (status == KVT_OK) {
                assert_true(bytes > block && block < SIZE_MAX / 2);
                continue;
            }
            assert_int_equal(status, KVT_ERR_LIMIT);
            assert_non_null(strstr(text, "address"));
            assert_true(bytes == 5 && block >= SIZE_MAX / 8);
            expect(NULL, KVT_ERR_LIMIT, kvt_cache_create(&c, &cache));
            assert_null(cache);
        }
}

/* The largest geometry is valid; creation then fails for memory. */
static void largest_config(void **state)
{
    kvt_group_config g = group_of(WIDE_LAYERS, 1024, 1024, 1024, 1024, KVT_TYPE_F32, KVT_TYPE_F32);
    kvt_group_config eight[8] = {g, g, g, g, g, g, g, g};
    kvt_config c = good_config(eight);
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    ledger memory;
    uint64_t bytes;
    (void)state;
    ledger_init(&memory);
    memory.most_bytes = 64u << 20;
    c.allocator = ledger_allocator(&memory);
    c.n_groups = 8;
    c.max_tokens = KVT_MAX_TOKENS;
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    bytes = kvt_cache_memory_bytes(cache);
    expect(cache, KVT_ERR_MEMORY, kvt_seq_create(cache, &seq));
    expect_error_text(cache, "block table", "a table of 2^24 rows");
    assert_null(seq);
    assert_true(kvt_cache_memory_bytes(cache) == bytes);
    kvt_cache_destroy(cache);

    c.max_tokens = 64;
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    bytes = kvt_cache_memory_bytes(cache);
    expect(cache, KVT_ERR_MEMORY, kvt_seq_begin(seq, 1, NULL));
    assert_true(kvt_cache_memory_bytes(cache) == bytes && kvt_seq_pending(seq) == 0);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    ledger_close(&memory);
}

/* Unusual configurations that are valid. */
static void good_configs(void **state)
{
    static const uint32_t even[] = {0, 2, 4}, odd[] = {1, 3};
    kvt_group_config g[2] = {group_of(3, 4, 2, 8, 1024, KVT_TYPE_I8, KVT_TYPE_F16),
                             group_of(2, 7, 1, 1024, 8, KVT_TYPE_F16, KVT_TYPE_I8)};
    kvt_config c = good_config(g);
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    unsigned char fingerprint[KVT_MAX_FINGERPRINT] = {1, 2, 3};
    (void)state;
    g[0].layers = even;
    g[1].layers = odd;
    g[0].flags = KVT_GROUP_NO_OFFSET | KVT_GROUP_NO_ROTATION;
    g[1].flags = KVT_GROUP_NO_ROTATION; /* of no effect on f16 */
    c.n_groups = 2;
    c.fingerprint = fingerprint;
    c.fingerprint_bytes = sizeof fingerprint;
    c.isa = "scalar";
    expect_ok(NULL, kvt_cache_create(&c, &cache));
    memset(g, 0xff, sizeof g); /* all of it is copied */
    memset(&c, 0xff, sizeof c);
    expect_ok(cache, kvt_seq_create(cache, &seq));
    assert_true(kvt_seq_max_tokens(seq) == MAX_TOKENS);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* ---- sequences and steps ---- */

static void bad_ranges(void **state)
{
    fixture f;
    int32_t ids[4] = {7, 7, 7, 7};
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_I8, 70);
    refused(&f, KVT_ERR_ARG, "kvt_seq_create", kvt_seq_create(f.cache, NULL));
    for (int side = 0; side < 2; side++) {
        kvt_status (*call)(const kvt_seq *, uint64_t, uint64_t, int32_t *) =
            side ? kvt_seq_positions : kvt_seq_token_ids;
        const char *name = side ? "kvt_seq_positions" : "kvt_seq_token_ids";
        refused_silently(&f, KVT_ERR_ARG, call(NULL, 0, 1, ids));
        refused(&f, KVT_ERR_ARG, name, call(f.seq, 0, 1, NULL));
        refused(&f, KVT_ERR_ARG, name, call(f.seq, 70, 1, ids));
        refused(&f, KVT_ERR_ARG, "69 + 2 of 70", call(f.seq, 69, 2, ids));
        refused(&f, KVT_ERR_ARG, name, call(f.seq, 71, 0, ids));
        refused(&f, KVT_ERR_ARG, name, call(f.seq, UINT64_MAX, 1, ids));
        refused(&f, KVT_ERR_ARG, name, call(f.seq, 1, UINT64_MAX, ids));
        refused(&f, KVT_ERR_ARG, name, call(f.seq, UINT64_MAX, UINT64_MAX, ids));
        for (int i = 0; i < 4; i++)
            assert_int_equal(ids[i], 7);
        expect_ok(f.cache, call(f.seq, 70, 0, ids));
        expect_ok(f.cache, call(f.seq, 66, 4, ids));
        assert_int_equal(ids[3], side ? 69 : 69 * 3 + 1);
        ids[0] = ids[1] = ids[2] = ids[3] = 7;
        /* Pending tokens have none yet. */
        expect_ok(f.cache, kvt_seq_begin(f.seq, 5, NULL));
        refused(&f, KVT_ERR_ARG, name, call(f.seq, 70, 1, ids));
        expect_ok(f.cache, kvt_seq_abort(f.seq));
    }
    refused(&f, KVT_ERR_ARG, "71 of 70", kvt_seq_truncate(f.seq, 71));
    refused(&f, KVT_ERR_ARG, "kvt_seq_truncate", kvt_seq_truncate(f.seq, UINT64_MAX));
    close_fixture(&f);
}

static void bad_steps(void **state)
{
    fixture f;
    kvt_tensor k, v;
    int32_t positions[4] = {3, 9, -1, 4}, ids[4] = {1, KVT_TOKEN_NONE, -2, 4};
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_F16, 70);
    k = kvt_tensor_f32(f.t.k);
    v = kvt_tensor_f32(f.t.v);
    refused(&f, KVT_ERR_ARG, "0 tokens", kvt_seq_begin(f.seq, 0, NULL));
    refused(&f, KVT_ERR_ARG, "0 tokens", kvt_seq_begin(f.seq, 0, positions));
    refused(&f, KVT_ERR_ARG, "token 2", kvt_seq_begin(f.seq, 4, positions));
    positions[2] = INT32_MIN;
    refused(&f, KVT_ERR_ARG, "negative", kvt_seq_begin(f.seq, 3, positions));
    refused(&f, KVT_ERR_FULL, "300", kvt_seq_begin(f.seq, MAX_TOKENS - 70 + 1, NULL));
    refused(&f, KVT_ERR_FULL, "70 + 18446744073709551615", kvt_seq_begin(f.seq, UINT64_MAX, NULL));
    refused(&f, KVT_ERR_FULL, "kvt_seq_begin", kvt_seq_begin(f.seq, UINT64_MAX - 69, NULL));
    refused(&f, KVT_ERR_FULL, "kvt_seq_begin", kvt_seq_begin(f.seq, UINT64_MAX / 2, NULL));
    refused(&f, KVT_ERR_STATE, "no step", kvt_seq_commit(f.seq, NULL));
    refused(&f, KVT_ERR_STATE, "no step", kvt_append(f.seq, 0, &k, &v));
    expect_ok(f.cache, kvt_seq_abort(f.seq)); /* nothing to drop is fine */

    expect_ok(f.cache, kvt_seq_begin(f.seq, 4, NULL));
    refused(&f, KVT_ERR_STATE, "4 tokens is pending", kvt_seq_begin(f.seq, 1, NULL));
    refused(&f, KVT_ERR_STATE, "pending", kvt_seq_truncate(f.seq, 0));
    refused(&f, KVT_ERR_STATE, "layer 0", kvt_seq_commit(f.seq, NULL));
    expect_ok(f.cache, kvt_append(f.seq, 0, &k, &v));
    refused(&f, KVT_ERR_STATE, "layer 0", kvt_append(f.seq, 0, &k, &v));
    refused(&f, KVT_ERR_STATE, "layer 1", kvt_seq_commit(f.seq, NULL));
    refused(&f, KVT_ERR_STATE, "layer 1", kvt_seq_commit(f.seq, ids));
    expect_ok(f.cache, kvt_append(f.seq, 1, &k, &v));
    refused(&f, KVT_ERR_ARG, "-2", kvt_seq_commit(f.seq, ids));
    ids[2] = INT32_MIN;
    refused(&f, KVT_ERR_ARG, "token 2", kvt_seq_commit(f.seq, ids));
    ids[2] = INT32_MAX;
    expect_ok(f.cache, kvt_seq_commit(f.seq, ids));
    memset(positions, 0, sizeof positions);
    expect_ok(f.cache, kvt_seq_token_ids(f.seq, 70, 4, positions));
    assert_memory_equal(positions, ids, sizeof ids);
    refused(&f, KVT_ERR_STATE, "no step", kvt_seq_commit(f.seq, NULL));
    close_fixture(&f);
}

static void bad_append_arguments(void **state)
{
    fixture f;
    kvt_tensor k, v, bad;
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_F32, 70);
    k = kvt_tensor_f32(f.t.k);
    v = kvt_tensor_f32(f.t.v);
    expect_ok(f.cache, kvt_seq_begin(f.seq, 5, NULL));
    refused_silently(&f, KVT_ERR_ARG, kvt_append(NULL, 0, &k, &v));
    refused(&f, KVT_ERR_ARG, "layer 2 of 2", kvt_append(f.seq, 2, &k, &v));
    refused(&f, KVT_ERR_ARG, "layer 4294967295", kvt_append(f.seq, UINT32_MAX, &k, &v));
    refused(&f, KVT_ERR_ARG, "k is NULL", kvt_append(f.seq, 0, NULL, &v));
    refused(&f, KVT_ERR_ARG, "v is NULL", kvt_append(f.seq, 0, &k, NULL));
    refused(&f, KVT_ERR_ARG, "NULL", kvt_append(f.seq, 0, NULL, NULL));
    for (int side = 0; side < 2; side++) {
        const char *name = side ? "v: " : "k: ";
        const int64_t row = (side ? V_DIM : K_DIM) * 4, dense = row * KV_HEADS;
        const struct {
            int64_t token_stride, head_stride;
        } strides[] = {
            {-4, 0},
            {0, -4},
            {INT64_MIN, 0},
            {0, INT64_MIN},
            {2, 0},
            {0, row + 2},
            {dense + 1, 0}, /* not of whole elements */
            {0, row - 4},
            {0, 4},
            {row, 0}, /* overlap */
            {dense - 4, 0},
            {dense, row + 4},
            {4, row},
            {row, row},
            {4, row * 5},
            {row - 4, row * 5},
            {row, row * 5 - 4}, /* head-major, run too short */
            {INT64_MAX - 3, 0},
            {0, INT64_MAX - 3}, /* overflow */
            {INT64_MAX / 4 / 4 * 4 + 4, 0},
            {INT64_MAX - 3, INT64_MAX - 3},
            {0, INT64_MAX / 2 / 4 * 4 + 4},
        };
        bad = side ? v : k;
        for (size_t i = 0; i < sizeof strides / sizeof *strides; i++) {
            bad.token_stride = strides[i].token_stride;
            bad.head_stride = strides[i].head_stride;
            refused(&f, KVT_ERR_ARG, "stride",
                    kvt_append(f.seq, 0, side ? &k : &bad, side ? &bad : &v));
            expect(f.cache, KVT_ERR_ARG, kvt_append(f.seq, 0, side ? &k : &bad, side ? &bad : &v));
            expect_error_text(f.cache, name, "a bad stride");
        }
        bad = side ? v : k;
        bad.data = NULL;
        refused(&f, KVT_ERR_ARG, "NULL", kvt_append(f.seq, 0, side ? &k : &bad, side ? &bad : &v));
        bad = side ? v : k;
        bad.data = (char *)bad.data + 2;
        refused(&f, KVT_ERR_ARG, "multiple",
                kvt_append(f.seq, 0, side ? &k : &bad, side ? &bad : &v));
        bad.dtype = KVT_F16;
        bad.data = (char *)bad.data + 1;
        refused(&f, KVT_ERR_ARG, "multiple",
                kvt_append(f.seq, 0, side ? &k : &bad, side ? &bad : &v));
        bad = side ? v : k;
        for (int dtype = -1; dtype < 5; dtype += 4) {
            bad.dtype = (kvt_dtype)dtype;
            refused(&f, KVT_ERR_ARG, "dtype",
                    kvt_append(f.seq, 0, side ? &k : &bad, side ? &bad : &v));
        }
    }
    /* After all these the step goes on. */
    expect_ok(f.cache, kvt_append(f.seq, 1, &k, &v));
    expect_ok(f.cache, kvt_append(f.seq, 0, &k, &v));
    expect_ok(f.cache, kvt_seq_commit(f.seq, NULL));
    close_fixture(&f);
}

/* Layouts of K that are not dense give the same bytes as the dense one. */
static void exotic_strides(void **state)
{
    enum { N = 5, WIDE = 7 };
    const struct {
        size_t n, kv_heads;
        int64_t token_stride, head_stride; /* floats; 0: default */
    } cases[] = {
        {N, 2, 0, 0},
        {N, 2, 2 * K_DIM, 0},
        {N, 2, 0, K_DIM},
        {N, 2, 0, 40},
        {N, 2, 300, 0},
        {N, 2, 80, 40},
        {N, 2, K_DIM, N * K_DIM}, /* head-major */
        {N, 2, 17, 5 * 17},
        {N, 2, K_DIM, 1000},
        {1, 2, 1, 0},
        {1, 2, 1, 100},
        {1, 1, 1, 1},
        {N, 1, 0, 0},
        {N, 1, K_DIM, 1},
        {N, 1, 31, 2},
        {N, 1, 0, 20},
        {1, 2, 8, 17},
    };
    static float buffer[20000];
    rng r = {4};
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const size_t n = cases[c].n, heads = cases[c].kv_heads;
        kvt_group_config g = group_of(1, 2, (uint32_t)heads, K_DIM, 8, KVT_TYPE_I8, KVT_TYPE_F32);
        kvt_cache *cache = cache_of(&g, 10, 1, NULL);
        kvt_seq *dense = NULL, *strided = NULL;
        tokens t = tokens_make(&r, n, &g);
        kvt_tensor k = kvt_tensor_f32(buffer), v = kvt_tensor_f32(t.v), out = k;
        size_t head = cases[c].head_stride ? (size_t)cases[c].head_stride : K_DIM;
        size_t token = cases[c].token_stride ? (size_t)cases[c].token_stride : heads * head;
        float back[N * 2 * K_DIM];
        kvt_tensor plain = kvt_tensor_f32(back);

        expect_ok(cache, kvt_seq_create(cache, &dense));
        expect_ok(cache, kvt_seq_create(cache, &strided));
        append_step(cache, dense, &g, &t, 0, n);
        for (size_t i = 0; i < sizeof buffer / sizeof *buffer; i++)
            buffer[i] = NAN; /* gaps between the rows are not read */
        for (size_t i = 0; i < n; i++)
            for (size_t h = 0; h < heads; h++)
                memcpy(buffer + i * token + h * head, t.k + (i * heads + h) * K_DIM,
                       K_DIM * sizeof(float));
        k.token_stride = cases[c].token_stride * 4;
        k.head_stride = cases[c].head_stride * 4;
        expect_ok(cache, kvt_seq_begin(strided, n, NULL));
        expect_ok(cache, kvt_append(strided, 0, &k, &v));
        expect_ok(cache, kvt_seq_commit(strided, NULL));
        expect_ok(cache, kvt_read(dense, 0, KVT_SIDE_K, 0, n, &plain));

        /* And read back into the same layout: the gaps stay. */
        for (size_t i = 0; i < sizeof buffer / sizeof *buffer; i++)
            buffer[i] = 12345.0f;
        out.token_stride = k.token_stride;
        out.head_stride = k.head_stride;
        expect_ok(cache, kvt_read(strided, 0, KVT_SIDE_K, 0, n, &out));
        for (size_t i = 0; i < n; i++)
            for (size_t h = 0; h < heads; h++) {
                assert_memory_equal(buffer + i * token + h * head, back + (i * heads + h) * K_DIM,
                                    K_DIM * sizeof(float));
                for (size_t d = 0; d < K_DIM; d++)
                    buffer[i * token + h * head + d] = 12345.0f;
            }
        for (size_t i = 0; i < sizeof buffer / sizeof *buffer; i++)
            assert_true(buffer[i] == 12345.0f);
        tokens_free(&t);
        kvt_seq_destroy(dense);
        kvt_seq_destroy(strided);
        kvt_cache_destroy(cache);
    }
}

static void bad_append_plans(void **state)
{
    fixture f;
    kvt_tensor k, v;
    kvt_append_plan plan, other, zero;
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_F16, 70);
    k = kvt_tensor_f32(f.t.k);
    v = kvt_tensor_f32(f.t.v);
    memset(&zero, 0, sizeof zero);
    memset(&plan, 0x5a, sizeof plan);
    memset(&other, 0x5a, sizeof other);
    refused_silently(&f, KVT_ERR_ARG, kvt_append_plan_init(&plan, NULL, 0, &k, &v));
    refused_silently(&f, KVT_ERR_ARG, kvt_append_task(NULL, 0));
    refused_silently(&f, KVT_ERR_ARG, kvt_append_finish(NULL));
    refused_silently(&f, KVT_ERR_ARG, kvt_append_task(&zero, 0));
    refused_silently(&f, KVT_ERR_ARG, kvt_append_finish(&zero));
    refused(&f, KVT_ERR_STATE, "no step", kvt_append_plan_init(&plan, f.seq, 0, &k, &v));
    expect_ok(f.cache, kvt_seq_begin(f.seq, 5, NULL));
    refused(&f, KVT_ERR_ARG, "plan", kvt_append_plan_init(NULL, f.seq, 0, &k, &v));
    refused(&f, KVT_ERR_ARG, "layer 2", kvt_append_plan_init(&plan, f.seq, 2, &k, &v));
    refused(&f, KVT_ERR_ARG, "k is NULL", kvt_append_plan_init(&plan, f.seq, 0, NULL, &v));
    refused(&f, KVT_ERR_ARG, "v is NULL", kvt_append_plan_init(&plan, f.seq, 0, &k, NULL));
    assert_memory_equal(&plan, &other, sizeof plan); /* never written */

    /* Finish before the tasks; a task out of range; a plan whose layer was appended meanwhile. */
    expect_ok(f.cache, kvt_append_plan_init(&plan, f.seq, 0, &k, &v));
    assert_true(plan.n_tasks > 0);
    refused(&f, KVT_ERR_STATE, "0 of", kvt_append_finish(&plan));
    refused(&f, KVT_ERR_ARG, "kvt_append_task", kvt_append_task(&plan, plan.n_tasks));
    refused(&f, KVT_ERR_ARG, "kvt_append_task", kvt_append_task(&plan, SIZE_MAX));
    for (size_t i = 0; i + 1 < plan.n_tasks; i++)
        expect_ok(f.cache, kvt_append_task(&plan, i));
    refused(&f, KVT_ERR_STATE, "has not run", kvt_append_finish(&plan));
    expect_ok(f.cache, kvt_append_task(&plan, plan.n_tasks - 1));
    expect_ok(f.cache, kvt_append_plan_init(&other, f.seq, 0, &k, &v));
    expect_ok(f.cache, kvt_append_finish(&plan));
    refused(&f, KVT_ERR_STATE, "kvt_append_task", kvt_append_task(&other, 0));
    refused(&f, KVT_ERR_STATE, "kvt_append_finish", kvt_append_finish(&other));
    refused(&f, KVT_ERR_STATE, "kvt_append_finish", kvt_append_finish(&plan));
    refused(&f, KVT_ERR_STATE, "layer 0", kvt_append_plan_init(&plan, f.seq, 0, &k, &v));

    { /* a task fails, and the caller leaves out the others */
        const float was = f.t.k[1];
        f.t.k[1] = NAN;
        expect_ok(f.cache, kvt_append_plan_init(&plan, f.seq, 1, &k, &v));
        expect(f.cache, KVT_ERR_VALUE, kvt_append_task(&plan, 0));
        expect(f.cache, KVT_ERR_VALUE, kvt_append_finish(&plan));
        f.t.k[1] = was;
    }

    /* A plan does not outlive its step: aborted, cleared, or followed by another. */
    expect_ok(f.cache, kvt_append_plan_init(&plan, f.seq, 1, &k, &v));
    for (size_t i = 0; i < plan.n_tasks; i++)
        expect_ok(f.cache, kvt_append_task(&plan, i));
    expect_ok(f.cache, kvt_seq_abort(f.seq));
    refused(&f, KVT_ERR_STATE, "earlier step", kvt_append_task(&plan, 0));
    refused(&f, KVT_ERR_STATE, "earlier step", kvt_append_finish(&plan));
    expect_ok(f.cache, kvt_seq_begin(f.seq, 5, NULL));
    refused(&f, KVT_ERR_STATE, "earlier step", kvt_append_task(&plan, 0));
    refused(&f, KVT_ERR_STATE, "earlier step", kvt_append_finish(&plan));
    expect_ok(f.cache, kvt_append_plan_init(&plan, f.seq, 1, &k, &v));
    expect_ok(f.cache, kvt_append(f.seq, 0, &k, &v));
    expect_ok(f.cache, kvt_append(f.seq, 1, &k, &v));
    expect_ok(f.cache, kvt_seq_commit(f.seq, NULL));
    refused(&f, KVT_ERR_STATE, "earlier step", kvt_append_finish(&plan));
    expect_ok(f.cache, kvt_seq_begin(f.seq, 5, NULL));
    expect_ok(f.cache, kvt_append_plan_init(&plan, f.seq, 1, &k, &v));
    expect_ok(f.cache, kvt_seq_clear(f.seq));
    refused(&f, KVT_ERR_STATE, "earlier step", kvt_append_task(&plan, 0));
    close_fixture(&f);
}

/* A task that ran twice does not count for one that did not run. */
static void a_task_twice_is_not_two_tasks(void **state)
{
    fixture f;
    kvt_tensor k, v;
    kvt_append_plan plan;
    (void)state;
    open_fixture(&f, KVT_TYPE_F32, KVT_TYPE_F32, 0);
    k = kvt_tensor_f32(f.t.k);
    v = kvt_tensor_f32(f.t.v);
    expect_ok(f.cache, kvt_seq_begin(f.seq, 5, NULL));
    expect_ok(f.cache, kvt_append_plan_init(&plan, f.seq, 0, &k, &v));
    for (size_t i = 0; i < plan.n_tasks; i++)
        kvt_append_task(&plan, 0);
    expect(f.cache, KVT_ERR_STATE, kvt_append_finish(&plan));
    close_fixture(&f);
}

/* ---- values that cannot be stored ---- */

/* Element i of a buffer of a dtype. The value must be one that the dtype has. */
static void put_element(void *buffer, kvt_dtype dtype, size_t i, uint32_t f32_bits, uint16_t bits)
{
    if (dtype == KVT_F32)
        memcpy((unsigned char *)buffer + i * 4, &f32_bits, 4);
    else
        memcpy((unsigned char *)buffer + i * 2, &bits, 2);
}

/* Integers of small magnitude, which all three dtypes hold exactly. */
static void fill_small(void *buffer, kvt_dtype dtype, size_t n, rng *r)
{
    for (size_t i = 0; i < n; i++) {
        float x = (float)rng_below(r, 16) + 1; /* 1 .. 16: four bits of mantissa */
        uint32_t bits;
        uint16_t half;
        memcpy(&bits, &x, 4);
        half = dtype == KVT_BF16 ? (uint16_t)(bits >> 16) : (uint16_t)((bits >> 13) - (112u << 10));
        put_element(buffer, dtype, i, bits, half);
    }
}

enum { STEP = 20, BEFORE = 50 }; /* crosses tiles and a block, whose offset is made in the step */

static void one_bad_value(fixture *f, kvt_dtype dtype, kvt_side side, size_t token, size_t head,
                          size_t dim, uint32_t f32_bits, uint16_t bits, int by_plan)
{
    static uint32_t k_data[STEP * KV_HEADS * K_DIM], v_data[STEP * KV_HEADS * V_DIM];
    void *data = side == KVT_SIDE_K ? (void *)k_data : (void *)v_data;
    size_t dims = side == KVT_SIDE_K ? K_DIM : V_DIM;
    size_t at = (token * KV_HEADS + head) * dims + dim, size = dtype == KVT_F32 ? 4 : 2;
    kvt_tensor k = {k_data, dtype, 0, 0}, v = {v_data, dtype, 0, 0};
    uint32_t saved = 0;
    uint64_t clean;
    char names[40];
    rng r = {12};

    /* The clean run first, then the same with the value in between. */
    fill_small(k_data, dtype, STEP * KV_HEADS * K_DIM, &r);
    fill_small(v_data, dtype, STEP * KV_HEADS * V_DIM, &r);
    expect_ok(f->cache, kvt_seq_begin(f->seq, STEP, NULL));
    expect_ok(f->cache, kvt_append(f->seq, 0, &k, &v));
    expect_ok(f->cache, kvt_append(f->seq, 1, &k, &v));
    expect_ok(f->cache, kvt_seq_commit(f->seq, NULL));
    clean = seq_hash(f->seq, &f->group);
    expect_ok(f->cache, kvt_seq_truncate(f->seq, BEFORE));

    snprintf(names, sizeof names, "kv head %u: a value of %s", (unsigned)head,
             side == KVT_SIDE_K ? "K" : "V");
    expect_ok(f->cache, kvt_seq_begin(f->seq, STEP, NULL));
    expect_ok(f->cache, kvt_append(f->seq, 0, &k, &v));
    memcpy(&saved, (unsigned char *)data + at * size, size);
    put_element(data, dtype, at, f32_bits, bits);
    if (by_plan) {
        kvt_append_plan plan;
        size_t failed = 0;
        mark before;
        expect_ok(f->cache, kvt_append_plan_init(&plan, f->seq, 1, &k, &v));
        before = mark_of(f);
        for (size_t i = plan.n_tasks; i-- > 0;) {
            kvt_status status = kvt_append_task(&plan, i);
            assert_true(status == KVT_OK || status == KVT_ERR_VALUE);
            failed += status != KVT_OK;
        }
        assert_int_equal(failed, 1);
        expect(f->cache, KVT_ERR_VALUE, kvt_append_finish(&plan));
        expect_error_text(f->cache, names, "by plan");
        expect_mark(f, before, "by plan");
    } else {
        refused(f, KVT_ERR_VALUE, names, kvt_append(f->seq, 1, &k, &v));
        expect(f->cache, KVT_ERR_VALUE, kvt_append(f->seq, 1, &k, &v));
        expect_error_text(f->cache, "layer 1", "the layer");
    }
    expect(f->cache, KVT_ERR_STATE, kvt_seq_commit(f->seq, NULL));
    memcpy((unsigned char *)data + at * size, &saved, size);
    expect_ok(f->cache, kvt_append(f->seq, 1, &k, &v));
    expect_ok(f->cache, kvt_seq_commit(f->seq, NULL));
    if (seq_hash(f->seq, &f->group) != clean)
        fail_msg("types %d/%d dtype %d side %d token %zu head %zu dim %zu: a refused append left "
                 "a trace",
                 (int)f->group.k_type, (int)f->group.v_type, (int)dtype, (int)side, token, head,
                 dim);
    expect_ok(f->cache, kvt_seq_truncate(f->seq, BEFORE));
}

static void values_that_cannot_be_stored(void **state)
{
    static const size_t at_tokens[] = {0, 13, 14, STEP - 1}; /* 14 begins the block */
    static const uint32_t f32_bad[] = {0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u};
    static const uint16_t f16_bad[] = {0x7c00u, 0xfc00u, 0x7e00u, 0xfc01u};
    static const uint16_t bf16_bad[] = {0x7f80u, 0xff80u, 0x7fc0u, 0xff81u};
    int by_plan = 0;
    (void)state;
    for (int type = 0; type < 3; type++) {
        fixture f;
        open_fixture(&f, (kvt_type)type, (kvt_type)((type + is_quick()) % 3), BEFORE);
        for (int dtype = KVT_F32; dtype <= KVT_BF16; dtype++)
            for (int side = 0; side < 2; side++)
                for (size_t token = 0; token < 4; token++)
                    for (size_t head = 0; head < KV_HEADS; head++)
                        for (size_t last = 0; last < 2; last++)
                            for (size_t bad = is_quick() ? 3 : 0; bad < 4; bad++)
                                one_bad_value(
                                    &f, (kvt_dtype)dtype, (kvt_side)side, at_tokens[token], head,
                                    last ? (side ? V_DIM : K_DIM) - 1 : 0, f32_bad[bad],
                                    dtype == KVT_F16 ? f16_bad[bad] : bf16_bad[bad], by_plan ^= 1);
        /* Finite, but not for the type: f16 from 65520 on, i8 beyond 8e6. */
        if (type == KVT_TYPE_F16 && !is_quick())
            for (size_t token = 0; token < 4; token++)
                for (int side = 0; side < 2; side++) {
                    one_bad_value(&f, KVT_F32, (kvt_side)side, at_tokens[token], 1, 7, 0x477ff000u,
                                  0, by_plan ^= 1); /* 65520 */
                    one_bad_value(&f, KVT_F32, (kvt_side)side, at_tokens[token], 1, 7, 0xff7fffffu,
                                  0, by_plan); /* -FLT_MAX */
                    one_bad_value(&f, KVT_BF16, (kvt_side)side, at_tokens[token], 0, 0, 0, 0x4780u,
                                  by_plan); /* 65536 */
                }
        if (type == KVT_TYPE_I8 && !is_quick())
            for (size_t token = 0; token < 4; token++)
                for (int side = 0; side < 2; side++) {
                    one_bad_value(&f, KVT_F32, (kvt_side)side, at_tokens[token], 1, 7, 0x7f7fffffu,
                                  0, by_plan ^= 1); /* FLT_MAX */
                    one_bad_value(&f, KVT_F32, (kvt_side)side, at_tokens[token], 1, 7, 0xce800000u,
                                  0, by_plan); /* -2^30 */
                    one_bad_value(&f, KVT_BF16, (kvt_side)side, at_tokens[token], 0, 0, 0, 0x7f7fu,
                                  by_plan); /* the largest bf16 */
                }
        close_fixture(&f);
    }
}

/* The largest values that still fit, and the next ones. */
static void values_at_the_limit(void **state)
{
    const float f16_most = nextafterf(65520.0f, 0), i8_most = 8.0e6f;
    (void)state;
    for (int type = 0; type < 3; type++)
        for (int over = 0; over < 2; over++)
            for (int sign = -1; sign < 2; sign += 2)
                for (int side = 0; side < 2; side++) {
                    kvt_group_config g = group_of(1, 1, 1, 8, 8, (kvt_type)type, (kvt_type)type);
                    kvt_cache *cache;
                    kvt_seq *seq = NULL;
                    float k[8] = {0}, v[8] = {0}, back[8], *x = side ? v : k;
                    kvt_tensor kt = kvt_tensor_f32(k), vt = kvt_tensor_f32(v);
                    kvt_tensor out = kvt_tensor_f32(back);
                    float most = type == KVT_TYPE_F32   ? FLT_MAX
                                 : type == KVT_TYPE_F16 ? f16_most
                                                        : i8_most;
                    if (over && type == KVT_TYPE_F32)
                        continue;
                    g.flags = KVT_GROUP_NO_OFFSET | KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_V_ROTATION;
                    cache = cache_of(&g, 4, 1, NULL);
                    x[5] = (float)sign * (over ? nextafterf(most, INFINITY) : most);
                    expect_ok(cache, kvt_seq_create(cache, &seq));
                    expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
                    expect(cache, over ? KVT_ERR_VALUE : KVT_OK, kvt_append(seq, 0, &kt, &vt));
                    if (!over) {
                        expect_ok(cache, kvt_seq_commit(seq, NULL));
                        expect_ok(cache, kvt_read(seq, 0, (kvt_side)side, 0, 1, &out));
                        for (int d = 0; d < 8; d++)
                            assert_true(fabsf(back[d] - x[d]) <= fabsf(x[d]) / 253 &&
                                        (type != KVT_TYPE_F32 || back[d] == x[d]));
                        if (type == KVT_TYPE_F16)
                            assert_true(back[5] == (float)sign * 65504.0f);
                    }
                    kvt_seq_destroy(seq);
                    kvt_cache_destroy(cache);
                }
}

/* ---- attention ---- */

static int all_unwritten(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (x[i] != 4321.0f)
            return 0;
    return 1;
}

/* One change to valid arguments: both forms reject it, out and lse are not written. */
#define attend_case(status, text, change)                                                          \
    do {                                                                                           \
        kvt_attend_args a = good;                                                                  \
        kvt_attend_item item[2] = {items[0], items[1]};                                            \
        kvt_attend_plan plan_, plan_before_;                                                       \
        a.items = item;                                                                            \
        memset(&plan_, 0x33, sizeof plan_);                                                        \
        plan_before_ = plan_;                                                                      \
        change;                                                                                    \
        refused(&f, status, text, kvt_attend(f.cache, &a));                                        \
        refused(&f, status, text, kvt_attend_plan_init(&plan_, f.cache, &a));                      \
        assert_memory_equal(&plan_, &plan_before_, sizeof plan_);                                  \
        assert_true(all_unwritten(out, N_OUT) && all_unwritten(lse, N_LSE));                       \
    } while (0)

static void bad_attend_arguments(void **state)
{
    enum { N_QUERIES = 3, N_OUT = N_QUERIES * Q_HEADS * V_DIM, N_LSE = N_QUERIES * Q_HEADS };
    static float q[N_QUERIES * Q_HEADS * K_DIM], out[N_OUT], lse[N_LSE + 1];
    float sinks[Q_HEADS] = {0}, slopes[Q_HEADS] = {0};
    int32_t positions[2] = {0, -1};
    uint8_t mask[64] = {0};
    fixture f;
    kvt_seq *empty = NULL, *foreign = NULL;
    kvt_cache *other;
    kvt_attend_item items[2];
    kvt_attend_args good = kvt_attend_args_init();
    kvt_attend_plan plan;
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_F16, 70);
    other = cache_of(&f.group, 10, 1, NULL);
    expect_ok(other, kvt_seq_create(other, &foreign));
    expect_ok(f.cache, kvt_seq_create(f.cache, &empty));
    memset(items, 0, sizeof items);
    items[0].seq = f.seq;
    items[0].n_queries = 2;
    items[1].seq = f.seq;
    items[1].n_queries = 1;
    for (size_t i = 0; i < sizeof q / sizeof *q; i++)
        q[i] = 0.1f;
    for (size_t i = 0; i < N_OUT; i++)
        out[i] = 4321.0f;
    for (size_t i = 0; i <= N_LSE; i++)
        lse[i] = 4321.0f;
    good.items = items;
    good.n_items = 2;
    good.q = kvt_tensor_f32(q);
    good.out = kvt_tensor_f32(out);
    good.lse = lse;

    refused_silently(&f, KVT_ERR_ARG, kvt_attend(NULL, &good));
    refused(&f, KVT_ERR_ARG, "args", kvt_attend(f.cache, NULL));
    refused_silently(&f, KVT_ERR_ARG, kvt_attend_plan_init(&plan, NULL, &good));
    refused(&f, KVT_ERR_ARG, "NULL", kvt_attend_plan_init(&plan, f.cache, NULL));
    refused(&f, KVT_ERR_ARG, "NULL", kvt_attend_plan_init(NULL, f.cache, &good));
    attend_case(KVT_ERR_ARG, "struct_size", a.struct_size = 0);
    attend_case(KVT_ERR_ARG, "struct_size", a.struct_size++);
    attend_case(KVT_ERR_ARG, "struct_size", a.struct_size = SIZE_MAX);
    attend_case(KVT_ERR_ARG, "layer 2 of 2", a.layer = 2);
    attend_case(KVT_ERR_ARG, "layer", a.layer = UINT32_MAX);
    attend_case(KVT_ERR_ARG, "flags 0x8", a.flags = 8);
    attend_case(KVT_ERR_ARG, "exclude", a.flags = KVT_ATTEND_F32 | KVT_ATTEND_FAST);
    attend_case(KVT_ERR_ARG, "flags", a.flags = 0x80000001u);
    attend_case(KVT_ERR_ARG, "items", a.items = NULL);
    attend_case(KVT_ERR_ARG, "items", a.n_items = 0);
    attend_case(KVT_ERR_ARG, "item 1: seq", item[1].seq = NULL);
    attend_case(KVT_ERR_ARG, "another cache", item[1].seq = foreign);
    attend_case(KVT_ERR_ARG, "another cache", item[0].seq = foreign);
    attend_case(KVT_ERR_ARG, "item 1: 0 queries", item[1].n_queries = 0);
    attend_case(KVT_ERR_ARG, "queries", item[0].n_queries = UINT64_MAX);
    attend_case(KVT_ERR_ARG, "queries", item[0].n_queries = UINT64_MAX / 2 + 1);
    attend_case(KVT_ERR_ARG, "queries", item[0].n_queries = (uint64_t)KVT_MAX_TOKENS + 1);
    attend_case(KVT_ERR_ARG, "reserved", item[1].reserved[0] = 1);
    attend_case(KVT_ERR_ARG, "reserved", item[1].reserved[1] = 1);
    attend_case(KVT_ERR_ARG, "causal with 71 queries over 70",
                (a.flags = KVT_ATTEND_CAUSAL, item[0].n_queries = 71));
    attend_case(KVT_ERR_ARG, "causal", (a.flags = KVT_ATTEND_CAUSAL, item[1].seq = empty));
    attend_case(KVT_ERR_ARG, "item 0: a mask of 71",
                (item[0].mask = mask, item[0].mask_stride = 9, item[0].mask_tokens = 71));
    attend_case(
        KVT_ERR_ARG, "mask",
        (item[0].mask = mask, item[0].mask_stride = SIZE_MAX, item[0].mask_tokens = UINT64_MAX));
    attend_case(KVT_ERR_ARG, "stride 1",
                (item[1].mask = mask, item[1].mask_stride = 1, item[1].mask_tokens = 9));
    attend_case(KVT_ERR_ARG, "mask is NULL", item[1].mask_tokens = 8);
    attend_case(KVT_ERR_ARG, "mask is NULL", item[1].mask_stride = 8);
    attend_case(KVT_ERR_ARG, "negative", item[0].query_positions = positions);
    attend_case(KVT_ERR_ARG, "ALiBi", (a.alibi_slopes = slopes, item[1].seq = empty));
    attend_case(KVT_ERR_VALUE, "scale", a.scale = NAN);
    attend_case(KVT_ERR_VALUE, "scale", a.scale = INFINITY);
    attend_case(KVT_ERR_VALUE, "scale", a.scale = -1);
    attend_case(KVT_ERR_VALUE, "scale", a.scale = -1e-42f);
    attend_case(KVT_ERR_VALUE, "below 2^-96", a.scale = 1e-42f);
    attend_case(KVT_ERR_VALUE, "below 2^-96", a.scale = 0x1.fffffep-97f);
    attend_case(KVT_ERR_VALUE, "softcap", a.softcap = NAN);
    attend_case(KVT_ERR_VALUE, "softcap", a.softcap = INFINITY);
    attend_case(KVT_ERR_VALUE, "softcap", a.softcap = -0.5f);
    for (size_t h = 0; h < Q_HEADS; h += Q_HEADS - 1) {
        const float bad[] = {NAN, INFINITY, -INFINITY};
        for (int i = 0; i < 3; i++) {
            sinks[h] = slopes[h] = bad[i];
            attend_case(KVT_ERR_VALUE, "sink", a.sink_logits = sinks);
            attend_case(KVT_ERR_VALUE, "slope", a.alibi_slopes = slopes);
            sinks[h] = slopes[h] = 0;
        }
        slopes[h] = -0.5f;
        attend_case(KVT_ERR_VALUE, "negative", a.alibi_slopes = slopes);
        slopes[h] = -1e-42f;
        attend_case(KVT_ERR_VALUE, "negative", a.alibi_slopes = slopes);
        slopes[h] = 0;
    }
    attend_case(KVT_ERR_ARG, "q is NULL", a.q.data = NULL);
    attend_case(KVT_ERR_ARG, "out is NULL", a.out.data = NULL);
    attend_case(KVT_ERR_ARG, "q: unknown dtype", a.q.dtype = (kvt_dtype)3);
    attend_case(KVT_ERR_ARG, "out: unknown dtype", a.out.dtype = (kvt_dtype)-1);
    attend_case(KVT_ERR_ARG, "q: a stride", a.q.token_stride = -64);
    attend_case(KVT_ERR_ARG, "q: ", a.q.head_stride = K_DIM * 4 - 4);
    attend_case(KVT_ERR_ARG, "q: ", a.q.token_stride = INT64_MAX - 3);
    attend_case(KVT_ERR_ARG, "q: ", a.q.data = (char *)q + 1);
    attend_case(KVT_ERR_ARG, "out: ", a.out.token_stride = Q_HEADS * V_DIM * 4 - 4);
    attend_case(KVT_ERR_ARG, "out: ", a.out.head_stride = 2);
    attend_case(KVT_ERR_ARG, "out: ", a.out.head_stride = INT64_MIN);
    attend_case(KVT_ERR_ARG, "out: ", a.out.data = (char *)out + 2);
    attend_case(KVT_ERR_ARG, "lse", a.lse = (float *)(void *)((char *)lse + 1));
    /* A sum of queries that the strides cannot span. */
    attend_case(KVT_ERR_ARG, "q: ",
                (item[0].n_queries = KVT_MAX_TOKENS, a.q.token_stride = INT64_MAX / 1024 / 4 * 4));

    /* Valid arguments; and an item without any tokens. */
    items[1].seq = empty;
    expect_ok(f.cache, kvt_attend(f.cache, &good));
    assert_true(lse[N_LSE - 1] == -INFINITY && out[N_OUT - 1] == 0 && lse[N_LSE] == 4321.0f);
    for (size_t i = 0; i < N_LSE - Q_HEADS; i++)
        assert_true(isfinite(lse[i]));
    kvt_seq_destroy(foreign);
    kvt_seq_destroy(empty);
    kvt_cache_destroy(other);
    close_fixture(&f);
}

/* Queries times tokens beyond what is counted: only asked for, nothing is read. */
static void work_beyond_all_bounds(void **state)
{
    enum { ITEMS = 400, TOKENS = 10000 };
    kvt_group_config g = group_of(1, 1024, 1, 8, 8, KVT_TYPE_F32, KVT_TYPE_F32);
    kvt_cache *cache = cache_of(&g, TOKENS, 1, NULL);
    rng r = {4};
    tokens t = tokens_make(&r, TOKENS, &g);
    kvt_attend_item items[ITEMS];
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_plan plan;
    kvt_seq *seq = NULL;
    float q[8] = {0}, out[8];
    (void)state;
    if (narrow) { /* where so many queries have no addresses */
        kvt_cache_destroy(cache);
        tokens_free(&t);
        skip();
    }
    expect_ok(cache, kvt_seq_create(cache, &seq));
    append_step(cache, seq, &g, &t, 0, TOKENS);
    for (size_t i = 0; i < ITEMS; i++)
        items[i] = (kvt_attend_item){.seq = seq, .n_queries = KVT_MAX_TOKENS};
    args.items = items;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.n_items = ITEMS / 2;
    expect_ok(cache, kvt_attend_plan_init(&plan, cache, &args));
    args.n_items = ITEMS;
    expect(cache, KVT_ERR_LIMIT, kvt_attend_plan_init(&plan, cache, &args));
    expect_error_text(cache, "the work overflows", "plan");
    expect(cache, KVT_ERR_LIMIT, kvt_attend(cache, &args));
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    tokens_free(&t);
}

static void bad_queries_and_plans(void **state)
{
    enum { N_QUERIES = 9 };
    static float q[N_QUERIES * Q_HEADS * K_DIM], out[N_QUERIES * Q_HEADS * V_DIM];
    static float clean[N_QUERIES * Q_HEADS * V_DIM];
    const size_t row = Q_HEADS * K_DIM;
    const size_t places[] = {0, K_DIM - 1, row - 1, 4 * row, N_QUERIES * row - 1};
    const float bad[] = {NAN, INFINITY, -INFINITY};
    fixture f;
    kvt_attend_item item = {.n_queries = N_QUERIES};
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_plan plan, zero;
    unsigned char *scratch;
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_I8, 100);
    for (size_t i = 0; i < N_QUERIES * row; i++)
        q[i] = (float)(i % 7) - 3;
    item.seq = f.seq;
    args.items = &item;
    args.n_items = 1;
    args.flags = KVT_ATTEND_CAUSAL;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(clean);
    expect_ok(f.cache, kvt_attend(f.cache, &args));
    args.out = kvt_tensor_f32(out);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        for (int j = 0; j < 3; j++) {
            float saved = q[places[i]];
            q[places[i]] = bad[j];
            refused(&f, KVT_ERR_VALUE, "q is not finite", kvt_attend(f.cache, &args));
            q[places[i]] = saved;
        }

    /* The same by plan: tasks and finish return it; the scratch's alignment and range are checked.
     */
    memset(&zero, 0, sizeof zero);
    args.n_threads = 4;
    expect_ok(f.cache, kvt_attend_plan_init(&plan, f.cache, &args));
    assert_true(plan.n_tasks > 1 && plan.scratch_bytes > 0);
    scratch = aligned_alloc(64, (plan.scratch_bytes + 127) / 64 * 64);
    assert_non_null(scratch);
    refused_silently(&f, KVT_ERR_ARG, kvt_attend_task(NULL, scratch, 0));
    refused_silently(&f, KVT_ERR_ARG, kvt_attend_finish(NULL, scratch));
    refused_silently(&f, KVT_ERR_ARG, kvt_attend_task(&zero, scratch, 0));
    refused_silently(&f, KVT_ERR_ARG, kvt_attend_finish(&zero, scratch));
    refused(&f, KVT_ERR_ARG, "scratch", kvt_attend_task(&plan, NULL, 0));
    refused(&f, KVT_ERR_ARG, "scratch", kvt_attend_finish(&plan, NULL));
    for (size_t shift = 1; shift < 64; shift *= 2) {
        refused(&f, KVT_ERR_ARG, "64", kvt_attend_task(&plan, scratch + shift, 0));
        refused(&f, KVT_ERR_ARG, "64", kvt_attend_finish(&plan, scratch + shift));
    }
    refused(&f, KVT_ERR_ARG, "task", kvt_attend_task(&plan, scratch, plan.n_tasks));
    refused(&f, KVT_ERR_ARG, "task", kvt_attend_task(&plan, scratch, SIZE_MAX));
    q[N_QUERIES * row - 1] = NAN;
    {
        size_t failed = 0;
        for (size_t i = plan.n_tasks; i-- > 0;) {
            int fails = kvt_attend_task(&plan, scratch, i) == KVT_ERR_VALUE;
            failed += (size_t)fails;
            if (fails && failed == 1) /* the caller may leave out the others */
                expect(f.cache, KVT_ERR_VALUE, kvt_attend_finish(&plan, scratch));
        }
        assert_true(failed > 0);
        expect(f.cache, KVT_ERR_VALUE, kvt_attend_finish(&plan, scratch));
        expect(f.cache, KVT_ERR_VALUE, kvt_attend_finish(&plan, scratch));
    }
    q[N_QUERIES * row - 1] = (float)((N_QUERIES * row - 1) % 7) - 3;
    expect_ok(f.cache, kvt_attend_plan_init(&plan, f.cache, &args));
    for (size_t i = plan.n_tasks; i-- > 0;)
        expect_ok(f.cache, kvt_attend_task(&plan, scratch, i));
    expect_ok(f.cache, kvt_attend_finish(&plan, scratch));
    assert_memory_equal(out, clean, sizeof out);
    memset(out, 0, sizeof out);
    expect(f.cache, KVT_ERR_STATE, kvt_attend_finish(&plan, scratch));
    expect_error_text(f.cache, "finished", "finished twice");
    assert_true(out[0] == 0);
    { /* what is in the scratch is another cache's, whichever of its plans that was */
        fixture other;
        open_fixture(&other, KVT_TYPE_I8, KVT_TYPE_I8, 100);
        item.seq = other.seq;
        for (int i = 0; i < 100; i++) {
            expect_ok(other.cache, kvt_attend_plan_init(&plan, other.cache, &args));
            expect(other.cache, KVT_ERR_STATE, kvt_attend_finish(&plan, scratch));
        }
        close_fixture(&other);
    }
    free(scratch);
    close_fixture(&f);
}

/* ---- reading ---- */

static int visit_none(void *user, const kvt_token_view *token)
{
    (void)token;
    *(int *)user += 1;
    return 0;
}

static void bad_reads(void **state)
{
    static float out[MAX_TOKENS * KV_HEADS * V_DIM];
    fixture f;
    kvt_tensor to = kvt_tensor_f32(out), bad;
    kvt_tensor k, v;
    uint64_t stopped = 99;
    int visits = 0;
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_F16, 70);
    k = kvt_tensor_f32(f.t.k);
    v = kvt_tensor_f32(f.t.v);
    for (size_t i = 0; i < sizeof out / sizeof *out; i++)
        out[i] = 4321.0f;
    refused_silently(&f, KVT_ERR_ARG, kvt_read(NULL, 0, KVT_SIDE_K, 0, 1, &to));
    refused(&f, KVT_ERR_ARG, "out is NULL", kvt_read(f.seq, 0, KVT_SIDE_K, 0, 1, NULL));
    refused(&f, KVT_ERR_ARG, "layer 2", kvt_read(f.seq, 2, KVT_SIDE_K, 0, 1, &to));
    refused(&f, KVT_ERR_ARG, "layer", kvt_read(f.seq, UINT32_MAX, KVT_SIDE_K, 0, 1, &to));
    refused(&f, KVT_ERR_ARG, "side 2", kvt_read(f.seq, 0, (kvt_side)2, 0, 1, &to));
    refused(&f, KVT_ERR_ARG, "side", kvt_read(f.seq, 0, (kvt_side)-1, 0, 1, &to));
    refused(&f, KVT_ERR_ARG, "70 + 1 of 70", kvt_read(f.seq, 0, KVT_SIDE_V, 70, 1, &to));
    refused(&f, KVT_ERR_ARG, "kvt_read", kvt_read(f.seq, 0, KVT_SIDE_V, 0, 71, &to));
    refused(&f, KVT_ERR_ARG, "kvt_read", kvt_read(f.seq, 0, KVT_SIDE_V, 71, 0, &to));
    refused(&f, KVT_ERR_ARG, "kvt_read", kvt_read(f.seq, 0, KVT_SIDE_V, UINT64_MAX, 2, &to));
    refused(&f, KVT_ERR_ARG, "kvt_read", kvt_read(f.seq, 0, KVT_SIDE_V, 2, UINT64_MAX, &to));
    refused(&f, KVT_ERR_ARG, "kvt_read",
            kvt_read(f.seq, 0, KVT_SIDE_V, UINT64_MAX, UINT64_MAX, &to));
#define read_case(text, change)                                                                    \
    do {                                                                                           \
        bad = to;                                                                                  \
        change;                                                                                    \
        refused(&f, KVT_ERR_ARG, text, kvt_read(f.seq, 0, KVT_SIDE_V, 0, 3, &bad));                \
    } while (0)
    read_case("NULL", bad.data = NULL);
    read_case("dtype", bad.dtype = (kvt_dtype)3);
    read_case("stride", bad.token_stride = -4);
    read_case("stride", bad.head_stride = -4);
    read_case("stride", bad.head_stride = V_DIM * 4 - 4);
    read_case("stride", bad.token_stride = V_DIM * 4);
    read_case("stride", bad.token_stride = V_DIM * KV_HEADS * 4 + 2);
    read_case("stride", bad.token_stride = INT64_MAX - 3);
    read_case("multiple", bad.data = (char *)out + 2);
    read_case("multiple", (bad.dtype = KVT_BF16, bad.data = (char *)out + 1));
    assert_true(all_unwritten(out, sizeof out / sizeof *out));

    refused_silently(&f, KVT_ERR_ARG, kvt_visit(NULL, 0, 0, 1, visit_none, &visits, &stopped));
    refused(&f, KVT_ERR_ARG, "visitor", kvt_visit(f.seq, 0, 0, 1, NULL, &visits, &stopped));
    refused(&f, KVT_ERR_ARG, "layer 2", kvt_visit(f.seq, 2, 0, 1, visit_none, &visits, &stopped));
    refused(&f, KVT_ERR_ARG, "69 + 2", kvt_visit(f.seq, 0, 69, 2, visit_none, &visits, &stopped));
    refused(&f, KVT_ERR_ARG, "kvt_visit",
            kvt_visit(f.seq, 0, UINT64_MAX, UINT64_MAX, visit_none, &visits, &stopped));
    assert_true(visits == 0 && stopped == 99);
    expect_ok(f.cache, kvt_visit(f.seq, 0, 70, 0, visit_none, &visits, &stopped));
    assert_true(visits == 0 && stopped == 70);
    expect_ok(f.cache, kvt_visit(f.seq, 0, 1, 3, visit_none, &visits, NULL));
    assert_true(visits == 3);

    /* Pending tokens: only where the layer has them. */
    expect_ok(f.cache, kvt_seq_begin(f.seq, 3, NULL));
    expect_ok(f.cache, kvt_append(f.seq, 1, &k, &v));
    refused(&f, KVT_ERR_ARG, "70", kvt_read(f.seq, 0, KVT_SIDE_V, 70, 1, &to));
    refused(&f, KVT_ERR_ARG, "70", kvt_visit(f.seq, 0, 70, 1, visit_none, &visits, &stopped));
    expect_ok(f.cache, kvt_read(f.seq, 1, KVT_SIDE_V, 70, 3, &to));
    refused(&f, KVT_ERR_ARG, "73", kvt_read(f.seq, 1, KVT_SIDE_V, 70, 4, &to));
    close_fixture(&f);
}

/* Output as f16 saturates, and rounds to nearest even; bf16 rounds likewise. */
static void reads_of_every_dtype(void **state)
{
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_F32, KVT_TYPE_F32);
    kvt_cache *cache = cache_of(&g, 4, 1, NULL);
    kvt_seq *seq = NULL;
    float k[8] = {1, -65504, 65519, 65520, 1e30f, -1e30f, 1.00048828125f, 0};
    const uint16_t f16[8] = {0x3c00, 0xfbff, 0x7bff, 0x7bff, 0x7bff, 0xfbff, 0x3c00, 0};
    uint16_t out[8], bf16[8];
    kvt_tensor kt = kvt_tensor_f32(k), to = {out, KVT_F16, 0, 0};
    (void)state;
    for (int i = 0; i < 8; i++) {
        uint32_t bits;
        memcpy(&bits, &k[i], 4);
        bf16[i] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
    expect_ok(cache, kvt_append(seq, 0, &kt, &kt));
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_K, 0, 1, &to));
    assert_memory_equal(out, f16, sizeof out);
    to.dtype = KVT_BF16;
    expect_ok(cache, kvt_read(seq, 0, KVT_SIDE_V, 0, 1, &to));
    assert_memory_equal(out, bf16, sizeof out);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* ---- snapshots: arguments only; the rest is test_snapshot's ---- */

static int write_never(void *user, const void *data, size_t bytes)
{
    (void)data;
    (void)bytes;
    *(int *)user += 1;
    return 0;
}

static int64_t read_never(void *user, void *data, size_t bytes)
{
    (void)data;
    (void)bytes;
    *(int *)user += 1;
    return 0;
}

static void bad_snapshot_arguments(void **state)
{
    fixture f;
    int calls = 0;
    kvt_writer writer = {&calls, write_never}, no_write = {&calls, NULL};
    kvt_reader reader = {&calls, read_never}, no_read = {&calls, NULL};
    const kvt_save_options save = {.struct_size = sizeof save};
    const kvt_load_options load = {.struct_size = sizeof load};
    kvt_load_result result = {77, 77, 77, 77, 77, {0}};
    kvt_snapshot_info info;
    char text[100] = "";
    (void)state;
    open_fixture(&f, KVT_TYPE_I8, KVT_TYPE_F16, 70);
    refused_silently(&f, KVT_ERR_ARG, kvt_seq_save(NULL, "x", NULL));
    refused(&f, KVT_ERR_ARG, "", kvt_seq_save(f.seq, NULL, NULL));
    refused_silently(&f, KVT_ERR_ARG, kvt_seq_save_stream(NULL, &writer, NULL));
    refused(&f, KVT_ERR_ARG, "", kvt_seq_save_stream(f.seq, NULL, NULL));
    refused(&f, KVT_ERR_ARG, "", kvt_seq_save_stream(f.seq, &no_write, NULL));
#define save_case(says, change)                                                                    \
    do {                                                                                           \
        kvt_save_options o = save;                                                                 \
        change;                                                                                    \
        refused(&f, KVT_ERR_ARG, says, kvt_seq_save_stream(f.seq, &writer, &o));                   \
    } while (0)
    save_case("struct_size", o.struct_size = 0);
    save_case("struct_size", o.struct_size++);
    save_case("codec 3", o.codec = 3);
    save_case("no_fsync 2", o.no_fsync = 2);
    save_case("zstd_level", o.zstd_level = 20);
    save_case("zstd_level", o.zstd_level = -8);
    save_case("zstd_level", o.zstd_level = INT32_MIN);
    save_case("in_place 2", o.in_place = 2);
    save_case("reserved", o.reserved = 1);

    refused_silently(&f, KVT_ERR_ARG, kvt_seq_load(NULL, "x", NULL, &result));
    refused(&f, KVT_ERR_ARG, "", kvt_seq_load(f.seq, NULL, NULL, &result));
    refused_silently(&f, KVT_ERR_ARG, kvt_seq_load_stream(NULL, &reader, NULL, &result));
    refused(&f, KVT_ERR_ARG, "", kvt_seq_load_stream(f.seq, NULL, NULL, &result));
    refused(&f, KVT_ERR_ARG, "", kvt_seq_load_stream(f.seq, &no_read, NULL, &result));
#define load_case(change)                                                                          \
    do {                                                                                           \
        kvt_load_options o = load;                                                                 \
        change;                                                                                    \
        refused(&f, KVT_ERR_ARG, "", kvt_seq_load_stream(f.seq, &reader, &o, &result));            \
    } while (0)
    load_case(o.struct_size = 0);
    load_case(o.struct_size--);
    load_case(o.n_prompt = 3);
    assert_int_equal(calls, 0);
    assert_true(result.n_tokens == 77 && result.prefix_tokens == 77 && result.reuse_tokens == 77);
    expect_ok(f.cache, kvt_seq_begin(f.seq, 1, NULL));
    refused(&f, KVT_ERR_STATE, "", kvt_seq_save_stream(f.seq, &writer, NULL));
    refused(&f, KVT_ERR_STATE, "", kvt_seq_load_stream(f.seq, &reader, NULL, &result));
    assert_int_equal(calls, 0);

    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    expect(NULL, KVT_ERR_ARG, kvt_snapshot_inspect(NULL, 0, &info, text, sizeof text));
    expect(NULL, KVT_ERR_ARG, kvt_snapshot_inspect("x", 0, NULL, text, sizeof text));
    expect(NULL, KVT_ERR_ARG, kvt_snapshot_inspect(NULL, 0, NULL, NULL, 0));
    info.struct_size--;
    expect(NULL, KVT_ERR_ARG, kvt_snapshot_inspect("x", 1, &info, text, sizeof text));
    close_fixture(&f);
}

/* Every pair of types that there is, and the bounds of fine_tokens. */
static void types_of_few_bits(void **state)
{
    static const uint32_t fine[] = {0, 1, 64, 65, KVT_MAX_TOKENS, KVT_FINE_NONE};
    (void)state;
    for (int k = KVT_TYPE_F32; k <= KVT_TYPE_I4; k++)
        for (int v = KVT_TYPE_F32; v <= KVT_TYPE_I5; v++)
            for (size_t i = 0; i < sizeof fine / sizeof *fine; i++)
                for (uint32_t flags = 0; flags < 16; flags++) {
                    kvt_group_config g = group_of(1, 2, 1, 16, 8, (kvt_type)k, (kvt_type)v);
                    kvt_config c = good_config(&g);
                    rng r = {(uint64_t)i};
                    kvt_cache *cache = NULL;
                    kvt_seq *seq = NULL;
                    tokens t;
                    g.fine_tokens = fine[i];
                    g.flags = flags;
                    if (flags & KVT_GROUP_V_IN_K && (k != v || k >= KVT_TYPE_I4 || flags == 4))
                        continue;
                    if (k == KVT_TYPE_I4 && flags & KVT_GROUP_NO_OFFSET) {
                        expect_refused(c, KVT_ERR_ARG, "NO_OFFSET", __LINE__);
                        continue;
                    }
                    if (flags & KVT_GROUP_V_IN_K && !(flags & KVT_GROUP_NO_ROTATION))
                        g.v_dim = 16;
                    expect_ok(NULL, kvt_cache_create(&c, &cache));
                    expect_ok(cache, kvt_seq_create(cache, &seq));
                    t = tokens_make(&r, 200, &g);
                    append_all(cache, seq, &g, &t, 0, 200, 90);
                    expect_ok(cache, kvt_seq_truncate(seq, 70));
                    append_all(cache, seq, &g, &t, 70, 3, 1);
                    kvt_seq_destroy(seq);
                    kvt_cache_destroy(cache);
                    tokens_free(&t);
                }
}

/* A value that 4 or 5 bits do not take, into each state of a sequence, changes nothing. */
static void values_beyond_few_bits(void **state)
{
    static const struct {
        kvt_type k, v;
        float most[2]; /* of K without an offset, of V without rotation */
    } types[] = {{KVT_TYPE_I4, KVT_TYPE_I4, {2.4e5f, 2e6f}},
                 {KVT_TYPE_I4, KVT_TYPE_I5, {2.4e5f, 2e6f}},
                 {KVT_TYPE_I8, KVT_TYPE_I4, {8e6f, 2e6f}},
                 {KVT_TYPE_I4, KVT_TYPE_I8, {2.4e5f, 8e6f}}};
    static const size_t lengths[] = {1, 63, 64, 100, 150};
    enum { N = 200, DIM = 16 };
    (void)state;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        for (size_t l = 0; l < 2 * sizeof lengths / sizeof *lengths; l++)
            for (int side = 0; side < 2; side++) {
                kvt_group_config g = group_of(1, 1, 1, DIM, DIM, types[i].k, types[i].v);
                kvt_cache *cache;
                kvt_seq *seq = NULL;
                rng r = {1};
                tokens t = tokens_make(&r, N, &g);
                float *row = (side ? t.v : t.k) + (N - 1) * DIM;
                kvt_tensor k = kvt_tensor_f32(t.k + (N - 1) * DIM);
                kvt_tensor v = kvt_tensor_f32(t.v + (N - 1) * DIM);
                uint64_t hash;
                g.flags = KVT_GROUP_NO_ROTATION | KVT_GROUP_NO_V_ROTATION;
                g.fine_tokens = KVT_FINE_NONE;
                g.residual_tokens = KVT_RESIDUAL_NONE;
                memset(t.k, 0, DIM * sizeof *t.k); /* the offset, as long as block 0 is open */
                for (size_t at = DIM; at < (N - 1) * DIM; at++)
                    t.k[at] = at / DIM % 2 ? 1.0f : -1.0f; /* and once it is sealed */
                cache = cache_of(&g, N, 1, NULL);
                expect_ok(cache, kvt_seq_create(cache, &seq));
                append_all(cache, seq, &g, &t, 0, l % 2 ? lengths[l / 2] : N - 1, 50);
                expect_ok(cache, kvt_seq_truncate(seq, lengths[l / 2]));
                expect_ok(cache, kvt_seq_begin(seq, 1, NULL));
                hash = seq_hash(seq, &g);
                row[3] = -types[i].most[side] * 1.001f;
                expect(cache, KVT_ERR_VALUE, kvt_append(seq, 0, &k, &v));
                expect_error_text(cache, side ? "value of V" : "value of K", "which side");
                assert_true(seq_hash(seq, &g) == hash);
                row[3] = -types[i].most[side] * 0.999f;
                expect_ok(cache, kvt_append(seq, 0, &k, &v));
                expect_ok(cache, kvt_seq_commit(seq, NULL));
                kvt_seq_destroy(seq);
                kvt_cache_destroy(cache);
                tokens_free(&t);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tile_registers_are_taken_with_amx_only),
        cmocka_unit_test(status_strings),
        cmocka_unit_test(isa_names),
        cmocka_unit_test(null_handles),
        cmocka_unit_test(error_texts),
        cmocka_unit_test(bad_configs),
        cmocka_unit_test(forecasts_that_overflow),
        cmocka_unit_test(blocks_wider_than_pointers),
        cmocka_unit_test(largest_config),
        cmocka_unit_test(good_configs),
        cmocka_unit_test(bad_ranges),
        cmocka_unit_test(bad_steps),
        cmocka_unit_test(bad_append_arguments),
        cmocka_unit_test(exotic_strides),
        cmocka_unit_test(bad_append_plans),
        cmocka_unit_test(a_task_twice_is_not_two_tasks),
        cmocka_unit_test(values_that_cannot_be_stored),
        cmocka_unit_test(values_at_the_limit),
        cmocka_unit_test(types_of_few_bits),
        cmocka_unit_test(values_beyond_few_bits),
        cmocka_unit_test(bad_attend_arguments),
        cmocka_unit_test(work_beyond_all_bounds),
        cmocka_unit_test(bad_queries_and_plans),
        cmocka_unit_test(bad_reads),
        cmocka_unit_test(reads_of_every_dtype),
        cmocka_unit_test(bad_snapshot_arguments),
    };
    return cmocka_run_group_tests_name("api", tests, NULL, NULL);
}
