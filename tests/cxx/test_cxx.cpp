/*
 * kvtile.hpp: what it answers is what the C calls answer, bit for bit; objects release, move and
 * outlive each other as they should; errors, in both forms, have the status and the text, and leave
 * the sequence as it was; nothing is allocated but by the C library. Compiled with and without
 * exceptions, as C++17 and as C++20: tests/cxx.cmake.
 */
#include <kvtile/kvtile.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <unistd.h>
#if __cplusplus >= 202002L
#include <span>
#endif

static int failures;

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);                        \
            failures++;                                                                            \
        }                                                                                          \
    } while (0)

#define NOT_REACHED() CHECK(false && "not reached")

/* Allocations of C++. */
static std::atomic<std::size_t> news;

void *operator new(std::size_t n)
{
    news++;
    if (void *p = std::malloc(n ? n : 1))
        return p;
    std::abort();
}
void operator delete(void *p) noexcept
{
    std::free(p);
}
void operator delete(void *p, std::size_t) noexcept
{
    std::free(p);
}

/* Bytes of a cache's allocator that are not given back, to see when a cache is gone. */
struct counter {
    std::size_t bytes = 0, calls = 0;

    kvt_allocator allocator()
    {
        kvt_allocator a{};
        a.user = this;
        a.alloc = [](void *user, std::size_t n, std::size_t alignment) -> void * {
            static_cast<counter *>(user)->bytes += n;
            static_cast<counter *>(user)->calls++;
            return std::aligned_alloc(alignment < sizeof(void *) ? sizeof(void *) : alignment,
                                      (n + alignment - 1) / alignment * alignment);
        };
        a.free = [](void *user, void *memory, std::size_t n) {
            static_cast<counter *>(user)->bytes -= n;
            std::free(memory);
        };
        return a;
    }
};

constexpr std::uint32_t layers = 2, q_heads = 4, kv_heads = 2, k_dim = 32, v_dim = 24;
constexpr std::size_t most = 300;

/* Values of tokens, the same for everybody. */
struct model {
    std::vector<float> k, v, q;

    model() : k(most * kv_heads * k_dim), v(most * kv_heads * v_dim), q(most * q_heads * k_dim)
    {
        std::uint32_t state = 1;
        for (auto *values : {&k, &v, &q})
            for (float &x : *values) {
                state = state * 1664525u + 1013904223u;
                x = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
            }
    }
    const float *k_of(std::size_t token) const { return &k[token * kv_heads * k_dim]; }
    const float *v_of(std::size_t token) const { return &v[token * kv_heads * v_dim]; }
    const float *q_of(std::size_t token) const { return &q[token * q_heads * k_dim]; }
};

static const model numbers;

static kvt::group_config group_of(kvt_type k = KVT_TYPE_I8, kvt_type v = KVT_TYPE_I8)
{
    return kvt::group_config()
        .with_layers(layers)
        .with_heads(q_heads, kv_heads)
        .with_dims(k_dim, v_dim)
        .with_types(k, v);
}

static kvt::cache cache_of(const kvt::group_config &group, std::uint64_t max_tokens = 1000,
                           counter *memory = nullptr)
{
    kvt::config config;
    config.with_group(group).with_max_tokens(max_tokens);
    if (memory)
        config.with_allocator(memory->allocator());
    auto cache = kvt::cache::try_create(config);
    CHECK(cache);
    return *std::move(cache);
}

static std::vector<std::int32_t> ids_of(std::size_t first, std::size_t n)
{
    std::vector<std::int32_t> ids(n);
    for (std::size_t i = 0; i < n; i++)
        ids[i] = static_cast<std::int32_t>(first + i);
    return ids;
}

/* Tokens first .. first + n - 1 in a step. */
static void feed(kvt::sequence &seq, std::size_t first, std::size_t n)
{
    CHECK(seq.try_begin(n));
    for (std::uint32_t layer = 0; layer < layers; layer++)
        CHECK(seq.try_append(layer, numbers.k_of(first), numbers.v_of(first)));
    CHECK(seq.try_commit(ids_of(first, n)));
}

static kvt::sequence sequence_of(kvt::cache &cache, std::size_t n)
{
    auto seq = cache.try_create_sequence();
    CHECK(seq);
    if (n)
        feed(*seq, 0, n);
    return *std::move(seq);
}

/* All that a sequence holds, as its snapshot; two are equal if these are. */
static std::vector<unsigned char> contents(const kvt::sequence &seq)
{
    std::vector<unsigned char> memory;
    CHECK(seq.try_save_to(memory, kvt::save_options().with_codec(KVT_CODEC_RAW)));
    return memory;
}

/* ---- the same numbers as C ---- */

static int put(void *user, const void *data, std::size_t n)
{
    auto *memory = static_cast<std::vector<unsigned char> *>(user);
    const auto *from = static_cast<const unsigned char *>(data);
    memory->insert(memory->end(), from, from + n);
    return 0;
}

static void same_as_c(kvt_type k_type, kvt_type v_type)
{
    /* In C. */
    kvt_group_config group = kvt_group_config_init();
    group.n_layers = layers;
    group.n_q_heads = q_heads;
    group.n_kv_heads = kv_heads;
    group.k_dim = k_dim;
    group.v_dim = v_dim;
    group.k_type = k_type;
    group.v_type = v_type;
    group.window_tokens = 150;
    group.sink_tokens = 3;
    kvt_config config = kvt_config_init();
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 1000;
    config.fingerprint = "weights";
    config.fingerprint_bytes = 7;
    kvt_cache *c_cache = nullptr;
    kvt_seq *c_seq = nullptr, *c_fork = nullptr;
    CHECK(kvt_cache_create(&config, &c_cache) == KVT_OK);
    CHECK(kvt_seq_create(c_cache, &c_seq) == KVT_OK);
    CHECK(kvt_seq_set_tag(c_seq, "tag", 3) == KVT_OK);

    /* In C++. */
    kvt::group_config same = group_of(k_type, v_type).with_window(150, 3);
    auto made = kvt::cache::try_create(
        kvt::config().with_group(same).with_max_tokens(1000).with_fingerprint("weights"));
    CHECK(made);
    kvt::cache cache = *std::move(made);
    kvt::sequence seq = sequence_of(cache, 0);
    CHECK(seq.try_set_tag("tag"));
    auto forecast = kvt::try_memory_forecast(kvt::config(config), 1, 300);
    std::uint64_t c_forecast = 0;
    CHECK(kvt_memory_forecast(&config, 1, 300, &c_forecast) == KVT_OK);
    CHECK(forecast && *forecast == c_forecast);
    CHECK(cache.bytes_per_token() == kvt_cache_bytes_per_token(c_cache));
    CHECK(std::string(cache.isa()) == kvt_cache_isa(c_cache));

    std::vector<float> c_out(most * q_heads * v_dim), out(c_out.size());
    std::vector<float> c_lse(most * q_heads), lse(c_lse.size());
    std::size_t first = 0;
    for (std::size_t n : std::initializer_list<std::size_t>{100, 1, 63, 1, 70, 30}) {
        const std::vector<std::int32_t> ids = ids_of(first, n);
        CHECK(kvt_seq_begin(c_seq, n, nullptr) == KVT_OK);
        CHECK(seq.try_begin(n));
        for (std::uint32_t layer = 0; layer < layers; layer++) {
            kvt_tensor k = kvt_tensor_f32(numbers.k_of(first));
            kvt_tensor v = kvt_tensor_f32(numbers.v_of(first));
            CHECK(kvt_append(c_seq, layer, &k, &v) == KVT_OK);
            kvt_attend_item item;
            std::memset(&item, 0, sizeof item);
            item.seq = c_seq;
            item.n_queries = n;
            kvt_attend_args args = kvt_attend_args_init();
            args.layer = layer;
            args.flags = KVT_ATTEND_CAUSAL;
            args.items = &item;
            args.n_items = 1;
            args.q = kvt_tensor_f32(numbers.q_of(first));
            args.out = kvt_tensor_f32(c_out.data());
            args.lse = c_lse.data();
            args.softcap = 20.0f;
            CHECK(kvt_attend(c_cache, &args) == KVT_OK);

            CHECK(
                seq.try_append(layer, kvt::input(numbers.k_of(first)),
                               kvt::span<const float>(numbers.v_of(first), n * kv_heads * v_dim)));
            kvt::attend_item same_item(seq, n);
            CHECK(
                cache.try_attend(kvt::attend_args(layer, {&same_item, 1}, numbers.q_of(first), out)
                                     .with_flags(KVT_ATTEND_CAUSAL)
                                     .with_lse(lse.data())
                                     .with_softcap(20.0f)));
            CHECK(std::memcmp(out.data(), c_out.data(), out.size() * sizeof(float)) == 0);
            CHECK(std::memcmp(lse.data(), c_lse.data(), lse.size() * sizeof(float)) == 0);

            args.lse = nullptr;
            args.softcap = 0.0f;
            CHECK(kvt_attend(c_cache, &args) == KVT_OK);
            CHECK(cache.try_attend(layer, seq, numbers.q_of(first), out, n));
            CHECK(std::memcmp(out.data(), c_out.data(), out.size() * sizeof(float)) == 0);
        }
        CHECK(kvt_seq_commit(c_seq, ids.data()) == KVT_OK);
        CHECK(seq.try_commit(ids));
        first += n;
        CHECK(seq.length() == first && seq.next_position() == static_cast<std::int32_t>(first));
        if (first == 164) {
            CHECK(kvt_seq_checkpoint(c_seq, "blob", 4) == KVT_OK);
            CHECK(seq.try_checkpoint("blob"));
        }
    }
    CHECK(std::any_of(out.begin(), out.end(), [](float x) { return x != 0.0f; }));

    /* K and V, read and visited. */
    const std::size_t n = 100, at = first - n;
    std::vector<float> c_rows(n * kv_heads * k_dim), rows(c_rows.size());
    kvt_tensor to = kvt_tensor_f32(c_rows.data());
    CHECK(kvt_read(c_seq, 1, KVT_SIDE_K, at, n, &to) == KVT_OK);
    CHECK(seq.try_read(1, KVT_SIDE_K, at, n, rows));
    CHECK(rows == c_rows);
    std::size_t seen = 0;
    auto stopped = seq.try_visit(1, at, n, [&](const kvt_token_view &token) {
        CHECK(token.index == at + seen && token.token_id == static_cast<int>(at + seen));
        CHECK(std::memcmp(token.k, &rows[seen * kv_heads * k_dim],
                          kv_heads * k_dim * sizeof(float)) == 0);
        seen++;
    });
    CHECK(stopped && *stopped == first && seen == n);
    stopped =
        seq.try_visit(0, at, n, [&](const kvt_token_view &token) { return token.index > at; });
    CHECK(stopped && *stopped == at + 1);

    /* Ids, positions, the tag, checkpoints, stats. */
    std::vector<std::int32_t> ids(n), positions(n);
    CHECK(seq.try_token_ids(at, ids) && ids == ids_of(at, n));
    CHECK(seq.try_positions(at, positions) && positions == ids);
    CHECK(seq.try_key_positions(at, positions) && positions == ids);
    std::array<char, 8> tag{};
    auto bytes = seq.try_tag(tag);
    CHECK(bytes && *bytes == 3 && std::string(tag.data()) == "tag");
    std::uint64_t lengths[4] = {};
    auto points = seq.try_checkpoints(lengths);
    CHECK(points && *points == 1 && lengths[0] == 164);
    char blob[4] = {};
    bytes = seq.try_checkpoint_read(164, kvt::buffer(blob, sizeof blob));
    CHECK(bytes && *bytes == 4 && std::memcmp(blob, "blob", 4) == 0);
    auto stats = cache.try_stats();
    kvt_cache_stats c_stats;
    c_stats.struct_size = sizeof c_stats;
    CHECK(kvt_cache_get_stats(c_cache, &c_stats) == KVT_OK);
    CHECK(stats && stats->blocks_used == c_stats.blocks_used && stats->blocks_used > 0);
    CHECK(seq.reachable(164) == kvt_seq_reachable(c_seq, 164));
    CHECK(seq.memory_bytes() == kvt_seq_memory_bytes(c_seq));

    /* Forks, truncated; snapshots of all of it. */
    CHECK(kvt_seq_fork(c_seq, 164, &c_fork) == KVT_OK);
    auto fork = seq.try_fork(164);
    CHECK(fork && fork->length() == 164 && (*fork).empty() == false);
    auto forks = seq.try_stats();
    CHECK(forks && forks->shared_bytes > 0);
    for (int of_fork = 0; of_fork < 2; of_fork++) {
        std::vector<unsigned char> c_memory, memory;
        const kvt_writer writer = {&c_memory, put};
        CHECK(kvt_seq_save_stream(of_fork ? c_fork : c_seq, &writer, nullptr) == KVT_OK);
        CHECK((of_fork ? *fork : seq).try_save_to(memory));
        CHECK(memory == c_memory && !memory.empty());
        kvt::sequence other = sequence_of(cache, 0);
        CHECK(other.try_set_tag(std::string("tag")));
        auto loaded = other.try_load_from(memory, ids_of(0, 120));
        CHECK(loaded && loaded->n_tokens == other.length());
        CHECK(loaded->prefix_tokens == 120);
        CHECK(contents(other) == contents(of_fork ? *fork : seq));
    }
    CHECK(seq.try_truncate(164) && seq.length() == 164);
    CHECK(contents(seq) == contents(*fork));
    const std::vector<double> state{1.5, 2.5};
    std::array<double, 2> state_back{};
    CHECK(seq.try_checkpoint(state) && *seq.try_checkpoint_read(164, state_back) == 16);
    CHECK(state_back[0] == 1.5 && state_back[1] == 2.5);
    CHECK(seq.try_checkpoint_drop(164) && *seq.try_checkpoints() == 0);
    CHECK(seq.try_clear() && seq.empty());

    kvt_seq_destroy(c_fork);
    kvt_seq_destroy(c_seq);
    kvt_cache_destroy(c_cache);
}

/* Plans, with threads; selected tokens; positions; removed tokens; half floats; two groups. */
static void parts()
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence whole = sequence_of(cache, 0), seq = sequence_of(cache, 0);
    feed(whole, 0, 200);
    CHECK(seq.try_reserve(200) && seq.capacity() >= 200);
    CHECK(seq.try_begin(200));
    kvt::append_plan append;
    kvt::attend_plan attend;
    std::vector<float> out(3 * q_heads * v_dim), expected(out.size());
    for (std::uint32_t layer = 0; layer < layers; layer++) {
        CHECK(append.try_init(seq, layer, numbers.k, numbers.v));
        CHECK(append.n_tasks() > 1);
        std::atomic<std::size_t> next{0};
        auto work = [&] {
            for (std::size_t i; (i = next++) < append.n_tasks();)
                CHECK(append.try_task(i));
        };
        std::thread other(work);
        work();
        other.join();
        CHECK(append.try_finish());
    }
    CHECK(seq.try_commit(ids_of(0, 200)));
    CHECK(contents(seq) == contents(whole));

    const std::array<kvt::attend_item, 2> items{kvt::attend_item(seq, 2), kvt::attend_item(whole)};
    kvt::attend_args args(1, items, numbers.q, expected);
    args.with_flags(KVT_ATTEND_CAUSAL | KVT_ATTEND_F32).with_threads(2);
    CHECK(cache.try_attend(args));
    args.out = kvt::output(out);
    CHECK(attend.try_init(cache, args));
    std::vector<unsigned char> memory(attend.scratch_bytes() + 64);
    auto *aligned = reinterpret_cast<unsigned char *>(
        (reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
    kvt::buffer scratch(aligned, attend.scratch_bytes());
    CHECK(attend.try_task(kvt::buffer(aligned, attend.scratch_bytes() - 1), 0).status() ==
          KVT_ERR_ARG);
    for (std::size_t i = attend.n_tasks(); i-- > 0;) {
        CHECK(attend.try_finish(scratch).status() == KVT_ERR_STATE);
        CHECK(attend.try_task(scratch, i));
    }
    CHECK(attend.try_finish(scratch));
    CHECK(out == expected);

    /* Of three drafted tokens the first and last, as if these had come alone. */
    kvt::sequence fork = *seq.try_fork();
    const std::array<std::int32_t, 3> drafted{200, 201, 201};
    CHECK(seq.try_begin(drafted));
    const float *k = numbers.k_of(200), *v = numbers.v_of(200);
    for (std::uint32_t layer = 0; layer < layers; layer++)
        CHECK(seq.try_append(layer, k, v));
    const std::uint8_t mask[3] = {1, 3, 5}; /* each sees the first one and itself */
    kvt::attend_item item(seq, 3);
    item.with_mask(mask, 1, 3);
    CHECK(cache.try_attend(kvt::attend_args(0, {&item, 1}, numbers.q, out)));
    const std::uint64_t selected[] = {0, 2};
    const std::vector<std::int32_t> selected_ids{7, 8};
    CHECK(seq.try_commit_selected(selected, kvt::span<const std::int32_t>(selected_ids.data(), 1))
              .status() == KVT_ERR_ARG);
    CHECK(seq.pending() == 3);
    CHECK(seq.try_commit_selected(selected, selected_ids));
    std::vector<float> two_k(k, k + kv_heads * k_dim), two_v(v, v + kv_heads * v_dim);
    two_k.insert(two_k.end(), numbers.k_of(202), numbers.k_of(203));
    two_v.insert(two_v.end(), numbers.v_of(202), numbers.v_of(203));
    CHECK(fork.try_begin(2));
    for (std::uint32_t layer = 0; layer < layers; layer++)
        CHECK(fork.try_append(layer, two_k, two_v));
    CHECK(fork.try_commit(selected_ids));
    CHECK(contents(fork) == contents(seq));

    /* Half floats with strides: 1.0 in bf16, of rows that are twice as long as they need to be. */
    const std::vector<std::uint16_t> ones(2 * kv_heads * k_dim, 0x3f80);
    CHECK(seq.try_begin(1));
    CHECK(seq.try_append(0, kvt::input::bf16(ones.data()).with_strides(0, 2 * k_dim * 2),
                         kvt::input::bf16(ones.data())));
    CHECK(seq.try_read(0, KVT_SIDE_V, 202, 1,
                       kvt::output::f16(out.data()).with_strides(0, v_dim * 2)));
    std::uint16_t half = 0;
    std::memcpy(&half, out.data(), sizeof half);
    CHECK(std::abs(half - 0x3c00) < 8); /* about 1.0 in f16 */
    CHECK(seq.try_abort() && seq.pending() == 0);

    /* Removed, where RoPE is described. */
    const float frequencies[4] = {1.0f, 0.5f, 0.25f, 0.125f};
    kvt::cache turned = cache_of(group_of().with_rope(KVT_ROPE_HALVES, frequencies, 8));
    kvt::sequence chat = sequence_of(turned, 256);
    CHECK(chat.try_remove(64, 64) && chat.length() == 192 && chat.next_position() == 192);
    std::int32_t moved = 0;
    CHECK(chat.try_key_positions(64, {&moved, 1}) && moved == 128);
    CHECK(chat.try_set_next_position(500) && chat.next_position() == 500);

    /* Layers of two groups. */
    std::array<std::uint32_t, 6> room{};
    kvt::group_config six = group_of().with_layers(6);
    auto split = kvt::try_split_ends(six, 1, 1, KVT_TYPE_F16, KVT_TYPE_F16, room);
    CHECK(split && split->view().size() == 2 && split->groups[0].n_layers == 4);
    CHECK(kvt::try_split_ends(six, 1, 1, KVT_TYPE_F16, KVT_TYPE_F16, {room.data(), 5}).status() ==
          KVT_ERR_ARG);
    auto split_cache =
        kvt::cache::try_create(kvt::config().with_groups(split->view()).with_max_tokens(100));
    CHECK(split_cache);

    /* V in K: no v. */
    kvt::group_config latent = group_of().with_dims(48, 16);
    latent.flags |= KVT_GROUP_V_IN_K;
    kvt::cache latents = cache_of(latent);
    kvt::sequence ofk = sequence_of(latents, 0);
    CHECK(ofk.try_begin(2) && ofk.try_append(0, numbers.k));
    CHECK(append.try_init(ofk, 1, numbers.k));
    for (std::size_t i = 0; i < append.n_tasks(); i++)
        CHECK(append.try_task(i));
    CHECK(append.try_finish() && ofk.try_commit());
}

/* A parallel-for of the caller's, which is called. */
static void executors()
{
    std::size_t calls = 0;
    auto parallel_for = [&calls](std::size_t n_tasks, auto body) {
        calls++;
        for (std::size_t i = n_tasks; i-- > 0;)
            body(i);
    };
    kvt::group_config group = group_of();
    auto made = kvt::cache::try_create(
        kvt::config().with_group(group).with_max_tokens(100000).with_threads(2).with_executor(
            kvt::executor_of(parallel_for, 2)));
    CHECK(made);
    kvt::sequence seq = sequence_of(*made, 0), alone;
    for (int i = 0; i < 20; i++)
        feed(seq, 0, 300);
    std::vector<float> out(q_heads * v_dim * 300), expected(out.size());
    CHECK(made->try_attend(0, seq, numbers.q, out, 300));
    CHECK(calls > 0);
    kvt::cache one = cache_of(group, 100000);
    alone = sequence_of(one, 0);
    for (int i = 0; i < 20; i++)
        feed(alone, 0, 300);
    CHECK(one.try_attend(0, alone, numbers.q, expected, 300));
    CHECK(out == expected);
}

/* ---- structs ---- */

/* Each call sets the fields that it should, and no others. */
template <class A, class B> static bool same(const A &ours, const B &c)
{
    static_assert(sizeof(A) == sizeof(B), "of the same fields");
    return std::memcmp(static_cast<const void *>(&ours), &c, sizeof c) == 0;
}

static void structs()
{
    const std::uint32_t of_layers[] = {0, 2, 5};
    const float frequencies[] = {1.0f, 0.5f, 0.25f};
    kvt_group_config g = kvt_group_config_init();
    CHECK(same(kvt::group_config(), g));
    g.n_layers = 3;
    g.layers = of_layers;
    g.n_q_heads = 8;
    g.n_kv_heads = 2;
    g.k_dim = 64;
    g.v_dim = 32;
    g.k_type = KVT_TYPE_I4;
    g.v_type = KVT_TYPE_I5;
    g.window_tokens = 100;
    g.sink_tokens = 4;
    g.rope_pairing = KVT_ROPE_NEIGHBOURS;
    g.rope_first_dim = 16;
    g.rope_dims = 6;
    g.rope_inverse_frequencies = frequencies;
    kvt::group_config group;
    group.with_layers(7).with_heads(8, 2).with_dims(64, 32).with_types(KVT_TYPE_I4, KVT_TYPE_I5);
    group.with_window(100, 4).with_rope(KVT_ROPE_NEIGHBOURS, frequencies, 16);
    CHECK(same(group.with_layer_numbers(of_layers), g));

    kvt_config c = kvt_config_init();
    CHECK(same(kvt::config(), c));
    auto parallel_for = [](std::size_t, auto) {};
    const kvt_executor e = kvt::executor_of(parallel_for, 5);
    CHECK(e.n_threads == 5 && e.user == &parallel_for && e.run);
    counter memory;
    c.groups = &group;
    c.n_groups = 1;
    c.max_tokens = 10;
    c.n_threads = 3;
    c.memory_budget_bytes = 12345;
    c.fingerprint = frequencies;
    c.fingerprint_bytes = sizeof frequencies;
    c.allocator = memory.allocator();
    c.executor = e;
    c.isa = "scalar";
    kvt::config config;
    config.with_group(group).with_max_tokens(10).with_threads(3).with_budget(12345).with_executor(
        e);
    config.with_allocator(c.allocator).with_fingerprint(frequencies).with_isa(c.isa);
    CHECK(same(config, c));

    kvt_save_options o{};
    o.struct_size = sizeof o;
    CHECK(same(kvt::save_options(), o));
    CHECK(same(kvt::save_options().with_fsync(true).with_in_place(false), o));
    o.codec = KVT_CODEC_RAW;
    o.zstd_level = 5;
    o.no_fsync = 1;
    o.in_place = 1;
    kvt::save_options options;
    options.with_codec(KVT_CODEC_RAW).with_level(5).with_fsync(false);
    CHECK(same(options.with_in_place(true), o));

    const std::array<unsigned char, KVT_KEY_BYTES> secret{1, 2, 3};
    const kvt_type k_types[] = {KVT_TYPE_I4, KVT_TYPE_I8}, v_types[] = {KVT_TYPE_I5, KVT_TYPE_F16};
    const kvt::snapshot_piece with[] = {{"sampler", "state"}, {"none", {}}};
    auto progress = [](std::uint64_t, std::uint64_t) {};
    o.first_token = 64;
    o.n_tokens = 100;
    o.layers = of_layers;
    o.n_layers = 3;
    o.convert = 1;
    o.n_types = 2;
    o.k_types = k_types;
    o.v_types = v_types;
    o.parent = "parent.kvt";
    o.pieces = with;
    o.n_pieces = 2;
    o.key = secret.data();
    options.with_tokens(64, 100).with_layers(of_layers).with_types(k_types, v_types);
    options.with_parent(o.parent).with_pieces(with).with_key(secret);
    CHECK(same(options, o));
    CHECK(std::string(with[0].name) == "sampler" && with[0].bytes == 5 && with[1].bytes == 0);
    CHECK(options.with_progress(progress).progress && options.progress_user == &progress);
    options.with_types(KVT_TYPE_I4, KVT_TYPE_I5);
    CHECK(options.n_types == 1 && *options.k_types == KVT_TYPE_I4 &&
          *options.v_types == KVT_TYPE_I5);
    options.with_types({}, KVT_TYPE_I4);
    CHECK(options.n_types == 1 && !options.k_types && *options.v_types == KVT_TYPE_I4);
    options.with_types(KVT_TYPE_F16, {});
    CHECK(options.n_types == 1 && *options.k_types == KVT_TYPE_F16 && !options.v_types);
    const std::vector<kvt_type> no_types;
    options.with_types(no_types, v_types);
    CHECK(options.n_types == 2 && !options.k_types && options.v_types == v_types);
    options.with_types(k_types, no_types);
    CHECK(options.n_types == 2 && options.k_types == k_types && !options.v_types);
    options.with_types(k_types, kvt::span<const kvt_type>(v_types, 1));
    CHECK(options.n_types == UINT32_MAX);

    const std::vector<std::int32_t> prompt = ids_of(0, 7);
    auto piece = [](const kvt_snapshot_piece &) {};
    kvt_load_options l{};
    l.struct_size = sizeof l;
    CHECK(same(kvt::load_options(), l));
    l.prompt = prompt.data();
    l.n_prompt = 7;
    l.reuse = KVT_REUSE_PREFIX;
    l.map = KVT_MAP_LAZY;
    l.convert = 1;
    l.layers = of_layers;
    l.n_layers = 3;
    l.folder = "folder";
    l.key = secret.data();
    kvt::load_options load;
    load.with_prompt(prompt).with_reuse(KVT_REUSE_PREFIX).with_map(KVT_MAP_LAZY).with_convert(true);
    CHECK(same(load.with_layers(of_layers).with_folder(l.folder).with_key(secret), l));
    load.with_pieces(piece).with_progress(progress);
    CHECK(load.on_piece && load.piece_user == &piece && load.progress_user == &progress);

    kvt_inspect_options n{};
    n.struct_size = sizeof n;
    CHECK(same(kvt::inspect_options(), n));
    n.verify = 1;
    n.folder = l.folder;
    n.key = secret.data();
    kvt::inspect_options look;
    CHECK(same(look.with_verify(true).with_folder(l.folder).with_key(secret), n));
    look.with_pieces(piece).with_progress(progress);
    CHECK(look.on_piece && look.piece_user == &piece && look.progress_user == &progress);

    const std::int32_t positions[] = {3, 4};
    const std::uint8_t mask[] = {1, 2, 3, 4};
    kvt_attend_item i{};
    i.n_queries = 2;
    i.query_positions = positions;
    i.mask = mask;
    i.mask_stride = 2;
    i.mask_tokens = 9;
    kvt::attend_item item{kvt::sequence()};
    item.with_positions(positions).with_mask(mask, 2, 9);
    CHECK(same(item, i));

    float q[4], out[4], lse[1];
    kvt_attend_args a = kvt_attend_args_init();
    a.layer = 4;
    a.flags = KVT_ATTEND_CAUSAL | KVT_ATTEND_F32;
    a.items = &item;
    a.n_items = 1;
    a.q = kvt_tensor_f32(q);
    a.out = kvt_tensor_f32(out);
    a.lse = lse;
    a.scale = 0.5f;
    a.softcap = 30.0f;
    a.sink_logits = frequencies;
    a.alibi_slopes = frequencies + 1;
    a.n_threads = 6;
    kvt::attend_args args(4, {&item, 1}, q, out);
    args.with_flags(KVT_ATTEND_CAUSAL).with_flags(KVT_ATTEND_F32).with_lse(lse).with_scale(0.5f);
    args.with_softcap(30.0f).with_sink_logits(frequencies).with_alibi_slopes(frequencies + 1);
    CHECK(same(args.with_threads(6), a));

    kvt_tensor t = kvt_tensor_f32(q);
    CHECK(same(kvt::input(q), t) && same(kvt::output(q), t));
    t.token_stride = 32;
    t.head_stride = 8;
    t.dtype = KVT_F16;
    CHECK(same(kvt::input::f16(q).with_strides(32, 8), t));
    CHECK(same(kvt::output::f16(q).with_strides(32, 8), t));
    t.dtype = KVT_BF16;
    CHECK(same(kvt::input::bf16(q).with_strides(32, 8), t));
    CHECK(same(kvt::output::bf16(q).with_strides(32, 8), t));
}

/* ---- moved, and gone ---- */

static_assert(!std::is_copy_constructible_v<kvt::cache> &&
                  std::is_nothrow_move_constructible_v<kvt::cache> &&
                  !std::is_copy_constructible_v<kvt::sequence> &&
                  std::is_nothrow_move_assignable_v<kvt::sequence> &&
                  !std::is_copy_constructible_v<kvt::step> &&
                  std::is_nothrow_move_constructible_v<kvt::step>,
              "owners are moved");
static_assert(!std::is_constructible_v<kvt::span<int>, std::vector<int>> &&
                  std::is_constructible_v<kvt::span<const int>, std::vector<int>> &&
                  !std::is_constructible_v<kvt::span<int>, const std::vector<int> &> &&
                  !std::is_constructible_v<kvt::span<int>, std::vector<unsigned> &> &&
                  !std::is_constructible_v<kvt::output, const std::vector<float> &> &&
                  !std::is_constructible_v<kvt::input, const std::vector<double> &> &&
                  !std::is_constructible_v<kvt::bytes, const std::vector<std::string> &> &&
                  !std::is_constructible_v<kvt::buffer, const std::vector<char> &>,
              "views are of what they can be of");
static_assert(!std::is_constructible_v<kvt::bytes, char (&)[32]> &&
                  std::is_constructible_v<kvt::bytes, const char (&)[32]> &&
                  std::is_constructible_v<kvt::bytes, unsigned char (&)[32]> &&
                  std::is_constructible_v<kvt::bytes, std::nullptr_t>,
              "an array of char is text or bytes: nobody knows how much of it is meant");

/* {0, n}: whose 0 may be meant for an element. {nullptr, n} is an error of the call. */
template <class V, class = void> struct takes_zero : std::false_type {
};
template <class V> struct takes_zero<V, std::void_t<decltype(V{0, 3})>> : std::true_type {
};
template <class V, class = void> struct takes_nullptr : std::false_type {
};
template <class V>
struct takes_nullptr<V, std::void_t<decltype(V{nullptr, std::size_t{3}})>> : std::true_type {
};
static_assert(!takes_zero<kvt::span<const std::uint64_t>>::value &&
                  !takes_zero<kvt::span<std::int32_t>>::value && !takes_zero<kvt::bytes>::value &&
                  !takes_zero<kvt::buffer>::value &&
                  takes_nullptr<kvt::span<const std::uint64_t>>::value &&
                  takes_nullptr<kvt::bytes>::value && takes_nullptr<kvt::buffer>::value,
              "a literal 0 is no pointer");

static_assert(std::is_same_v<decltype(kvt::span(std::declval<const float *>(), std::size_t{3})),
                             kvt::span<const float>>,
              "the elements' type is deduced");

/* A temporary view, of what can be written and of what cannot. */
template <class T> struct view_of {
    T *at;
    T *data() const noexcept { return at; }
    std::size_t size() const noexcept { return 1; }
};
static_assert(std::is_constructible_v<kvt::output, view_of<float>> &&
                  !std::is_constructible_v<kvt::output, view_of<const float>> &&
                  !std::is_constructible_v<kvt::output, std::vector<float>> &&
                  !std::is_constructible_v<kvt::output, kvt::input> &&
                  !std::is_constructible_v<kvt::output, const kvt::input &> &&
                  std::is_constructible_v<kvt::buffer, view_of<float>> &&
                  !std::is_constructible_v<kvt::buffer, view_of<const float>> &&
                  !std::is_constructible_v<kvt::buffer, std::vector<float>> &&
                  std::is_constructible_v<kvt::span<float>, view_of<float>> &&
                  !std::is_constructible_v<kvt::span<float>, view_of<const float>>,
              "temporaries that are views");

/* C's pointer to options. */
template <class T, class = void> struct inspects : std::false_type {
};
template <class T>
struct inspects<T, std::void_t<decltype(kvt::try_inspect("", std::declval<T>()))>>
    : std::true_type {
};
static_assert(inspects<bool>::value && inspects<kvt::inspect_options>::value &&
                  !inspects<const kvt_inspect_options *>::value,
              "a pointer is no bool");

static bool are(kvt::bytes view, const std::string &expected)
{
    return std::string(static_cast<const char *>(view.data()), view.size()) == expected;
}

static void texts()
{
    static const char binary[] = {'\0', 'a', '\0', 'b'}, ended[] = {'\0', 'a', '\0'}, one[] = {'a'};
    char array[] = "abc\0d", *text = array;
    const char *pointer = array, *nothing = nullptr;
    CHECK(are("abc", "abc") && are("", "") && are("\0a\0b", std::string("\0a\0b", 4)));
    CHECK(are(binary, std::string("\0a\0b", 4)) && are(ended, std::string("\0a", 2)));
    CHECK(are(one, "a") && are(text, "abc") && are(pointer, "abc"));
    CHECK(are({array, 5}, std::string("abc\0d", 5)) && are(std::string("abc\0", 4), {"abc\0", 4}));
    CHECK(kvt::bytes(nothing).size() == 0 && kvt::bytes(nullptr).size() == 0);
    CHECK(are(std::string_view(array), "abc"));
}

/* NULL with a size is refused, as C does, and not read behind. */
static void null_with_a_size()
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 100);
    const auto before = contents(seq);
    CHECK(seq.try_token_ids(0, {nullptr, 100}).status() == KVT_ERR_ARG);
    CHECK(seq.try_positions(0, {nullptr, 100}).status() == KVT_ERR_ARG);
    CHECK(seq.try_set_tag({nullptr, 3}).status() == KVT_ERR_ARG);
    CHECK(seq.try_checkpoint({nullptr, 3}).status() == KVT_ERR_ARG);
    CHECK(seq.try_save_memory({nullptr, 1 << 20}).status() == KVT_ERR_ARG);
    CHECK(seq.try_load_from({nullptr, 1 << 20}).status() == KVT_ERR_ARG);
    CHECK(seq.try_begin(kvt::span<const std::int32_t>(nullptr, 2)).status() == KVT_ERR_ARG);
    CHECK(seq.try_begin(2));
    for (std::uint32_t layer = 0; layer < layers; layer++)
        CHECK(seq.try_append(layer, numbers.k, numbers.v));
    CHECK(seq.try_commit({nullptr, 2}).status() == KVT_ERR_ARG);
    CHECK(seq.try_commit_selected({nullptr, 2}).status() == KVT_ERR_ARG);
    const std::uint64_t both[] = {0, 1};
    CHECK(seq.try_commit_selected(both, {nullptr, 2}).status() == KVT_ERR_ARG);
    CHECK(seq.pending() == 2 && seq.try_abort() && contents(seq) == before);
    /* Of nothing it is no error. */
    CHECK(seq.try_token_ids(0, {nullptr, 0}) && seq.try_checkpoint({nullptr, 0}));
}

static void empty_handles(kvt::cache &cache, kvt::sequence &seq)
{
    std::int32_t id = 0;
    float out[v_dim * q_heads];
    CHECK(!cache && !cache.get() && cache.memory_bytes() == 0 && !cache.isa());
    CHECK(cache.last_error().c_str()[0] == '\0');
    CHECK(cache.try_stats().status() == KVT_ERR_ARG && cache.try_trim().status() == KVT_ERR_ARG);
    CHECK(cache.try_create_sequence().status() == KVT_ERR_ARG);
    CHECK(cache.try_attend(0, seq, numbers.q, out).status() == KVT_ERR_ARG);
    CHECK(!seq && !seq.get() && seq.length() == 0 && seq.empty() && seq.pending() == 0);
    CHECK(seq.max_tokens() == 0 && seq.capacity() == 0 && seq.memory_bytes() == 0);
    CHECK(seq.try_begin(1).status() == KVT_ERR_ARG &&
          seq.try_begin_step(1).status() == KVT_ERR_ARG);
    CHECK(seq.try_append(0, numbers.k, numbers.v).status() == KVT_ERR_ARG);
    CHECK(seq.try_commit().status() == KVT_ERR_ARG && seq.try_abort().status() == KVT_ERR_ARG);
    CHECK(seq.try_commit({&id, 1}).status() == KVT_ERR_ARG);
    CHECK(seq.try_token_ids(0, {&id, 1}).status() == KVT_ERR_ARG);
    CHECK(seq.try_fork().status() == KVT_ERR_ARG && seq.try_tag().status() == KVT_ERR_ARG);
    CHECK(seq.try_save("nowhere").status() == KVT_ERR_ARG);
    CHECK(seq.try_load("nowhere").status() == KVT_ERR_ARG);
    CHECK(seq.try_checkpoint().status() == KVT_ERR_ARG && seq.try_clear().status() == KVT_ERR_ARG);
#if KVT_HPP_EXCEPTIONS
    try {
        seq.truncate(0);
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_ARG);
        CHECK(std::string(e.what()) == kvt::to_string(KVT_ERR_ARG));
    }
#endif
}

static void moved()
{
    counter memory;
    {
        kvt::cache cache = cache_of(group_of(), 1000, &memory), other;
        kvt::sequence seq = sequence_of(cache, 10), empty;
        kvt_seq *c_seq = seq.get();
        kvt_cache *c_cache = cache.get();
        empty_handles(other, empty);
        other = std::move(cache);
        empty = std::move(seq);
        CHECK(other.get() == c_cache && empty.get() == c_seq && empty.length() == 10);
        empty_handles(cache, seq); // NOLINT: they are specified
        cache = cache_of(group_of(), 50);
        seq = sequence_of(cache, 5);
        CHECK(seq.max_tokens() == 50);
        seq = std::move(empty); /* over another one, of another cache */
        CHECK(seq.length() == 10 && seq.max_tokens() == 1000);
        kvt::sequence &itself = seq;
        seq = std::move(itself);
        CHECK(seq.length() == 10);
        kvt::cache &also = other;
        other = std::move(also);
        CHECK(other.get() == c_cache);
        cache.swap(other);
        CHECK(cache.get() == c_cache);
        feed(seq, 10, 5);

        /* Given up, and taken over. */
        kvt_seq *given = seq.release();
        CHECK(given == c_seq && !seq);
        kvt::sequence again(given, cache.get());
        CHECK(again.length() == 15);
        kvt::cache taken(cache.release());
        CHECK(!cache && taken.get() == c_cache);

        /* In a container. */
        std::vector<kvt::sequence> beams;
        for (int i = 0; i < 20; i++)
            beams.push_back(*again.try_fork());
        beams.erase(beams.begin() + 3, beams.begin() + 10);
        CHECK(beams.size() == 13 && beams[3].length() == 15);
    }
    CHECK(memory.bytes == 0 && memory.calls > 0);
}

/* Sequences outlive the handle of their cache, and each other. */
static void order()
{
    counter memory;
    {
        kvt::sequence seq, fork;
        {
            kvt::cache cache = cache_of(group_of(), 400, &memory);
            seq = sequence_of(cache, 100);
            fork = *seq.try_fork(90);
        }
        CHECK(memory.bytes > 0);
        feed(seq, 100, 10);
        const auto before = contents(fork);
        seq = kvt::sequence();
        CHECK(contents(fork) == before && fork.length() == 90);
#if KVT_HPP_EXCEPTIONS
        try { /* the text is the cache's */
            fork.begin(1000);
            NOT_REACHED();
        } catch (const kvt::error &e) {
            CHECK(e.status() == KVT_ERR_FULL &&
                  std::string(e.what()).find("400") != std::string::npos);
        }
#endif
        {
            auto step = fork.try_begin_step(3);
            CHECK(step && fork.pending() == 3);
        }
        CHECK(fork.pending() == 0 && fork.length() == 90 && memory.bytes > 0);
    }
    CHECK(memory.bytes == 0);
}

static void steps()
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 70);
    const auto before = contents(seq);
    const std::vector<std::int32_t> ids = ids_of(70, 2);
    {
        auto step = seq.try_begin_step(2);
        CHECK(step && *step && seq.pending() == 2);
        CHECK(seq.try_append(0, numbers.k, numbers.v));
        CHECK(step->try_commit(ids).status() == KVT_ERR_STATE); /* a layer lacks */
        CHECK(*step && seq.pending() == 2);
        CHECK(seq.try_begin_step(1).status() == KVT_ERR_STATE);
        CHECK(seq.pending() == 2); /* not aborted by the step that was not begun */
    }
    CHECK(seq.pending() == 0 && contents(seq) == before);
    {
        auto made = seq.try_begin_step(2);
        kvt::step first = *std::move(made), step;
        CHECK(!*made && first && !step);
        step = std::move(first);
        kvt::sequence moved = std::move(seq);
        for (std::uint32_t layer = 0; layer < layers; layer++)
            CHECK(moved.try_append(layer, numbers.k_of(70), numbers.v_of(70)));
        CHECK(step.try_commit(ids));
        CHECK(!step && moved.length() == 72);
        CHECK(step.try_commit(ids).status() == KVT_ERR_ARG);
        seq = std::move(moved);
    }
    CHECK(seq.length() == 72);
    {
        kvt::step step = *seq.try_begin_step(kvt::span<const std::int32_t>(ids));
        for (std::uint32_t layer = 0; layer < layers; layer++)
            CHECK(seq.try_append(layer, numbers.k, numbers.v));
        const std::uint64_t second[] = {1};
        CHECK(step.try_commit_selected(second));
    }
    CHECK(seq.length() == 73);
    {
        kvt::step step = *seq.try_begin_step(2), &itself = step;
        step = std::move(itself);
        CHECK(step && seq.pending() == 2);
        kvt::sequence fork = *seq.try_fork();
        kvt::step other = *fork.try_begin_step(3);
        step = std::move(other); /* what it was is aborted */
        CHECK(step && !other && seq.pending() == 0 && fork.pending() == 3);
        step = kvt::step();
        CHECK(!step && fork.pending() == 0);
    }
    {
        kvt::step step = *seq.try_begin_step(1);
        step.abort();
        CHECK(!step && seq.pending() == 0);
    }
    {
        /* Ended through the sequence; the next one takes its place. */
        kvt::step step = *seq.try_begin_step(1);
        CHECK(seq.try_abort());
        step = *seq.try_begin_step(2);
        CHECK(step && seq.pending() == 2);
    }
    CHECK(seq.pending() == 0);
#if KVT_HPP_EXCEPTIONS
    try {
        kvt::step step = seq.begin_step(5);
        seq.append(0, numbers.k, numbers.v);
        step.commit();
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_STATE);
    }
    CHECK(seq.pending() == 0 && seq.length() == 73);
#endif
}

/* ---- errors ---- */

/* A failing call, in both forms: status and text as C has them, and nothing changed. */
template <class T, class U>
static void fails(kvt::cache &cache, kvt::sequence &seq, kvt_status expected, T try_form,
                  U throwing_form)
{
    const auto before = contents(seq);
    const std::uint64_t bytes = cache.memory_bytes();
    auto r = try_form();
    CHECK(!r && r.status() == expected);
    CHECK(std::string(r.why()) != "");
    CHECK(contents(seq) == before && cache.memory_bytes() == bytes);
#if KVT_HPP_EXCEPTIONS
    const std::string text = cache.last_error().c_str();
    bool thrown = false;
    try {
        throwing_form();
    } catch (const std::exception &e) {
        thrown = true;
        const auto *error = dynamic_cast<const kvt::error *>(&e);
        CHECK(error && error->status() == expected);
        CHECK(e.what() == text || std::string(e.what()) == r.why());
        CHECK(std::string(e.what()) != "");
    }
    CHECK(thrown);
    thrown = false;
    try {
        (void)r.value();
    } catch (const kvt::error &e) {
        thrown = e.status() == expected;
    }
    CHECK(thrown);
    CHECK(contents(seq) == before && cache.memory_bytes() == bytes);
#else
    (void)throwing_form;
#endif
}

#if KVT_HPP_EXCEPTIONS
#define FAILS(expected, call, ...)                                                                 \
    fails(                                                                                         \
        cache, seq, expected, [&] { return seq.try_##call(__VA_ARGS__); },                         \
        [&] { (void)seq.call(__VA_ARGS__); })
#else
#define FAILS(expected, call, ...)                                                                 \
    fails(                                                                                         \
        cache, seq, expected, [&] { return seq.try_##call(__VA_ARGS__); }, 0)
#endif

static void errors(const std::string &folder)
{
    kvt::cache cache = cache_of(group_of(), 200);
    kvt::sequence seq = sequence_of(cache, 100);
    std::vector<std::int32_t> ids(200);
    std::vector<float> rows(most * kv_heads * k_dim);

    FAILS(KVT_ERR_FULL, begin, 101);
    FAILS(KVT_ERR_ARG, begin, 0);
    FAILS(KVT_ERR_FULL, reserve, 201);
    FAILS(KVT_ERR_ARG, truncate, 101);
    FAILS(KVT_ERR_ARG, fork, 101);
    FAILS(KVT_ERR_STATE, append, 0, numbers.k, numbers.v);
    FAILS(KVT_ERR_STATE, commit, ids);
    FAILS(KVT_ERR_STATE, set_tag, "late");
    FAILS(KVT_ERR_ARG, remove, 64, 64);
    FAILS(KVT_ERR_ARG, set_next_position, -1);
    FAILS(KVT_ERR_ARG, token_ids, 0, ids);
    FAILS(KVT_ERR_ARG, positions, 0, ids);
    FAILS(KVT_ERR_ARG, read, 0, KVT_SIDE_K, 1, 100, rows);
    FAILS(KVT_ERR_ARG, visit, 2, 0, 1, [](const kvt_token_view &) {});
    FAILS(KVT_ERR_ARG, checkpoint_read, 5);
    FAILS(KVT_ERR_ARG, checkpoint_drop, 5);
    FAILS(KVT_ERR_IO, load, folder + "/no-such-file.kvt");
    FAILS(KVT_ERR_IO, save, folder + "/no-such-folder/file.kvt");

    std::vector<unsigned char> memory = contents(seq);
    auto damaged = memory;
    damaged[damaged.size() / 2] ^= 1;
    FAILS(KVT_ERR_CORRUPT, load_from, damaged);
    FAILS(KVT_ERR_CORRUPT, load_from, kvt::bytes(memory.data(), memory.size() - 1));
    FAILS(KVT_ERR_FORMAT, load_from,
          "not a snapshot, but long enough to be read as if it were one");
    kvt::cache others = cache_of(group_of(KVT_TYPE_F16));
    memory = contents(sequence_of(others, 7));
    FAILS(KVT_ERR_MISMATCH, load_from, memory);
    std::array<unsigned char, 100> small{};
    FAILS(KVT_ERR_FULL, save_memory, small);
    FAILS(KVT_ERR_FULL, save_memory, kvt::buffer());
    FAILS(KVT_ERR_CORRUPT, load_from, kvt::bytes());
    FAILS(KVT_ERR_ARG, save_fd, -1);
    FAILS(KVT_ERR_ARG, load_fd, -1);
    FAILS(KVT_ERR_ARG, save_bound, kvt::save_options().with_tokens(1));
    const auto no_type = static_cast<kvt_type>(7);
    FAILS(KVT_ERR_ARG, save_bound, kvt::save_options().with_types(no_type, KVT_TYPE_I4));
    FAILS(KVT_ERR_ARG, save_bound, kvt::save_options().with_types(KVT_TYPE_I4, no_type));
    const kvt_type two[] = {KVT_TYPE_I4, KVT_TYPE_I4};
    FAILS(KVT_ERR_ARG, save_bound,
          kvt::save_options().with_types(two, kvt::span<const kvt_type>(two, 1)));
    std::vector<unsigned char> held{1, 2, 3};
    auto cancel = [](std::uint64_t, std::uint64_t) { return true; };
    const std::vector<unsigned char> large(1 << 20); /* written before it is cancelled */
    const kvt::snapshot_piece pieces[] = {{"large", large}};
    FAILS(KVT_ERR_CANCELLED, save_to, held,
          kvt::save_options().with_pieces(pieces).with_progress(cancel));
    CHECK(held == std::vector<unsigned char>({1, 2, 3}));
    FAILS(KVT_ERR_ARG, load, folder + "/none.kvt", kvt::load_options().with_reuse(3));
    FAILS(KVT_ERR_ARG, load_from, memory, kvt::load_options().with_map(KVT_MAP_LAZY));

    /* A step that is pending: it stays. */
    const auto before = contents(seq);
    CHECK(seq.try_begin(3));
    std::vector<float> bad(3 * kv_heads * k_dim, NAN);
    CHECK(seq.try_append(0, bad, numbers.v).status() == KVT_ERR_VALUE);
    CHECK(seq.try_append(2, numbers.k, numbers.v).status() == KVT_ERR_ARG);
    for (std::uint32_t layer = 0; layer < layers; layer++)
        CHECK(seq.try_append(layer, numbers.k, numbers.v));
    auto r = seq.try_commit(ids_of(0, 2)); /* of three: this header's own check */
    CHECK(r.status() == KVT_ERR_ARG && std::string(r.why()).find("token ids") != std::string::npos);
    CHECK(seq.try_commit(kvt::span<const std::int32_t>()).status() == KVT_ERR_ARG);
#if KVT_HPP_EXCEPTIONS
    try {
        seq.commit(ids_of(0, 2));
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(std::string(e.what()) == r.why());
    }
#endif
    CHECK(seq.pending() == 3);
    CHECK(seq.try_save(folder + "/pending.kvt").status() == KVT_ERR_STATE);
    CHECK(seq.try_abort());
    CHECK(contents(seq) == before);

    /* The cache's own calls. */
    std::vector<float> out(q_heads * v_dim);
    CHECK(cache.try_attend(5, seq, numbers.q, out).status() == KVT_ERR_ARG);
    const std::string text = cache.last_error().c_str();
    CHECK(text.find("layer") != std::string::npos);
    kvt::attend_plan plan;
    kvt::attend_item item(seq);
    CHECK(plan.try_init(cache, kvt::attend_args(5, {&item, 1}, numbers.q, out)).status() ==
          KVT_ERR_ARG);
    kvt::config wrong;
    kvt::group_config group = group_of().with_dims(7);
    wrong.with_group(group).with_max_tokens(10);
    CHECK(kvt::cache::try_create(wrong).status() == KVT_ERR_ARG);
    CHECK(kvt::try_memory_forecast(wrong, 1, 1).status() == KVT_ERR_ARG);
    CHECK(kvt::try_working_forecast(wrong, 1).status() == KVT_ERR_ARG);
    kvt::message why;
    CHECK(kvt::try_inspect(folder + "/no-such-file.kvt", true, &why).status() == KVT_ERR_IO);
    CHECK(std::string(why.c_str()).find("no-such-file") != std::string::npos);
    kvt::message same_why;
    const auto look = kvt::inspect_options().with_verify(true);
    CHECK(kvt::try_inspect(folder + "/no-such-file.kvt", look, &same_why).status() == KVT_ERR_IO);
    CHECK(std::string(why.c_str()) == same_why.c_str());
    CHECK(kvt::try_convert(folder + "/no-such-file.kvt", folder + "/to.kvt", {}, {}, &same_why)
              .status() == KVT_ERR_IO);
    CHECK(std::string(same_why.c_str()).find("no-such-file") != std::string::npos);
#if KVT_HPP_EXCEPTIONS
    for (int form = 0; form < 2; form++)
        try {
            if (form)
                kvt::convert(folder + "/no-such-file.kvt", folder + "/to.kvt");
            else
                (void)kvt::inspect(folder + "/no-such-file.kvt", look);
            NOT_REACHED();
        } catch (const kvt::error &e) {
            CHECK(e.status() == KVT_ERR_IO && std::string(e.what()) == why.c_str());
        }
    try {
        cache.attend(5, seq, numbers.q, out);
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_ARG && e.what() == text);
    }
    try {
        kvt::cache none(wrong);
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_ARG &&
              std::string(e.what()).find("k_dim") != std::string::npos);
    }
    char own[200] = "";
    wrong.error_text = own;
    wrong.error_text_bytes = sizeof own;
    for (auto call : {+[](const kvt::config &c) { kvt::cache none(c); },
                      +[](const kvt::config &c) { (void)kvt::memory_forecast(c, 1, 1); },
                      +[](const kvt::config &c) { (void)kvt::working_forecast(c, 1); }}) {
        own[0] = '\0';
        try {
            call(wrong);
            NOT_REACHED();
        } catch (const kvt::error &e) {
            CHECK(own[0] && std::string(e.what()) == own);
        }
    }
    try {
        (void)kvt::inspect(folder + "/no-such-file.kvt", false);
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_IO && std::string(e.what()) == why.c_str());
    }
    /* An allocator that has nothing. */
    kvt_allocator nothing = counter().allocator();
    nothing.alloc = [](void *, std::size_t, std::size_t) -> void * { return nullptr; };
    try {
        kvt::group_config sound = group_of();
        kvt::cache none(
            kvt::config().with_group(sound).with_max_tokens(10).with_allocator(nothing));
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_MEMORY && e.what()[0]);
    }
#endif
}

/* What callbacks throw goes on, once the C call has ended. */
static void callbacks(const std::string &folder)
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 100);
    const auto before = contents(seq);

    /* Streams. */
    std::vector<unsigned char> pieces;
    CHECK(seq.try_save(
        [&pieces](const void *data, std::size_t n) { return put(&pieces, data, n) == 0; },
        kvt::save_options().with_codec(KVT_CODEC_RAW)));
    CHECK(pieces == before);
    std::size_t at = 0;
    auto read_one = [&](void *data, std::size_t n) {
        n = n && at < pieces.size() ? 1 : 0;
        std::memcpy(data, &pieces[at], n);
        at += n;
        return n;
    };
    kvt::sequence other = sequence_of(cache, 3);
    auto loaded = other.try_load(read_one);
    CHECK(loaded && loaded->n_tokens == 100 && contents(other) == before);
    CHECK(seq.try_save([](const void *, std::size_t) { return false; }).status() == KVT_ERR_IO);
    CHECK(other.try_load([](void *, std::size_t) { return -1; }).status() == KVT_ERR_IO);
    CHECK(contents(other) == before);

    /* Files. */
    const std::string file = folder + "/callbacks.kvt";
    CHECK(seq.try_save(file, kvt::save_options().with_level(3).with_fsync(false)));
    auto info = kvt::try_inspect(file, true);
    CHECK(info && info->n_tokens == 100);
    CHECK(other.try_clear() && other.try_load(file.c_str()) && contents(other) == before);
    CHECK(seq.try_save(file, kvt::save_options().with_in_place(true).with_fsync(false)));
    CHECK(other.try_load(file) && contents(other) == before);

#if KVT_HPP_EXCEPTIONS
    struct thrown {
    };
    int caught = 0;
    for (int form = 0; form < 2; form++) {
        try {
            std::size_t seen = 0;
            auto visitor = [&seen](const kvt_token_view &) {
                if (++seen == 5)
                    throw thrown();
            };
            form ? (void)seq.visit(0, 0, 100, visitor) : (void)seq.try_visit(0, 0, 100, visitor);
        } catch (const thrown &) {
            caught++;
        }
        try {
            auto writer = [](const void *, std::size_t) -> bool { throw thrown(); };
            form ? seq.save(writer) : (void)seq.try_save(writer);
        } catch (const thrown &) {
            caught++;
        }
        try {
            auto reader = [](void *, std::size_t) -> int { throw thrown(); };
            form ? (void)other.load(reader) : (void)other.try_load(reader);
        } catch (const thrown &) {
            caught++;
        }
    }
    CHECK(caught == 6);
    CHECK(contents(seq) == before && contents(other) == before);
#endif
}

/* Where bytes go to and come from, and what options do; the throwing forms where there are. */
#if KVT_HPP_EXCEPTIONS
#define DO(object, call, ...) (object.call(__VA_ARGS__))
#define VALUE(object, call, ...) (object.call(__VA_ARGS__))
#else
#define DO(object, call, ...) (void)!object.try_##call(__VA_ARGS__)
#define VALUE(object, call, ...) (*object.try_##call(__VA_ARGS__))
#endif

static void places(const std::string &folder)
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 200), other = sequence_of(cache, 3);
    const auto before = contents(seq);
    const auto raw = kvt::save_options().with_codec(KVT_CODEC_RAW);

    /* Memory that is there: the bound is exact, and one byte less is too little. */
    std::vector<unsigned char> memory(before.size());
    CHECK(VALUE(seq, save_bound, raw) == before.size());
    CHECK(VALUE(seq, save_memory, memory, raw) == before.size() && memory == before);
    CHECK(seq.try_save_memory({memory.data(), memory.size() - 1}, raw).status() == KVT_ERR_FULL);
    auto n = seq.try_save_bound();
    CHECK(n);
    memory.resize(*n);
    CHECK(seq.try_save_memory(memory));
    DO(other, load_from, memory.empty() ? kvt::bytes() : kvt::bytes(before));
    CHECK(contents(other) == before);

    /* A descriptor, from where it stands. */
    const std::string file = folder + "/places.kvt";
    int fd = open(file.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, "head", 4) == 4);
    DO(seq, save_fd, fd, raw);
    CHECK(lseek(fd, 0, SEEK_CUR) == static_cast<off_t>(before.size()) + 4);
    CHECK(other.try_clear() && lseek(fd, 4, SEEK_SET) == 4);
    CHECK(VALUE(other, load_fd, fd, ids_of(0, 50)).reuse_tokens == 49);
    CHECK(contents(other) == before);
    CHECK(lseek(fd, 4, SEEK_SET) == 4);
    const auto prompt = ids_of(0, 100);
    const auto partly = kvt::load_options().with_prompt(prompt).with_reuse(KVT_REUSE_PREFIX);
    CHECK(VALUE(other, load_fd, fd, partly).n_tokens == 99 && other.length() == 99);
    close(fd);

    /* The same of memory, a stream and a file. */
    CHECK(VALUE(other, load_from, before, partly).n_tokens == 99);
    std::size_t at = 0;
    CHECK(VALUE(
              other, load,
              [&](void *data, std::size_t bytes) {
                  bytes = bytes < before.size() - at ? bytes : before.size() - at;
                  std::memcpy(data, &before[at], bytes);
                  at += bytes;
                  return bytes;
              },
              partly)
              .n_tokens == 99);
    DO(seq, save, file, raw);
    CHECK(VALUE(other, load, file, partly).n_tokens == 99);

    /* Where it lies in the file. */
    const auto mapped = kvt::load_options().with_map(KVT_MAP_LAZY);
    CHECK(VALUE(other, load, file, mapped).mapped_bytes > 0 && contents(other) == before);
}

static void chains(const std::string &folder)
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 200), other = sequence_of(cache, 0);
    const std::string first = folder + "/first.kvt", second = folder + "/second.kvt";
    const std::string whole = folder + "/whole.kvt";
    DO(seq, save, first);
    feed(seq, 200, 100);
    const kvt::snapshot_piece pieces[] = {{"sampler", "state"}, {"nothing", kvt::bytes()}};
    DO(seq, save, second, kvt::save_options().with_parent(first).with_pieces(pieces));
    std::vector<std::string> seen;
    auto take = [&seen](const kvt_snapshot_piece &piece) {
        seen.push_back(piece.name + std::string("=") +
                       std::string(static_cast<const char *>(piece.data), piece.bytes));
    };
    const auto look =
        kvt::inspect_options().with_verify(true).with_folder(folder).with_pieces(take);
    auto info = kvt::try_inspect(second, look);
    CHECK(info && info->depth == 1 && info->inherited_blocks > 0 && info->n_pieces == 2);
    CHECK(std::string(info->parent_name) == "first.kvt");
    CHECK(seen == std::vector<std::string>({"sampler=state", "nothing="}));
    seen.clear();
    const auto load = kvt::load_options().with_folder(folder).with_pieces(take);
    DO(other, load, second, load);
    CHECK(contents(other) == contents(seq) && seen.size() == 2);

    /* As one file, of other types. */
    const auto to_i4 = kvt::save_options().with_types(KVT_TYPE_I4, KVT_TYPE_I5);
    CHECK(kvt::try_convert(second, whole));
    info = kvt::try_inspect(whole, true);
    CHECK(info && info->depth == 0 && info->n_pieces == 2 && info->inherited_blocks == 0);
    CHECK(other.try_clear() && other.try_load(whole) && contents(other) == contents(seq));
    CHECK(kvt::try_convert(second, whole, to_i4));
    info = kvt::try_inspect(whole, false);
    CHECK(info && info->groups[0].k_type == KVT_TYPE_I4 && info->groups[0].v_type == KVT_TYPE_I5);
    CHECK(other.try_load(whole).status() == KVT_ERR_MISMATCH);
    DO(other, load, whole, kvt::load_options().with_convert(true));
    kvt::cache coarse = cache_of(group_of(KVT_TYPE_I4, KVT_TYPE_I5));
    kvt::sequence i4 = sequence_of(coarse, 0);
    CHECK(i4.try_load(whole) && i4.length() == 300);
#if KVT_HPP_EXCEPTIONS
    kvt::convert(second, whole, to_i4, load);
    CHECK(kvt::inspect(whole, look).n_pieces == 2);
#endif

    /* A part of the tokens, and of the layers. */
    const std::uint32_t one[] = {1};
    std::vector<unsigned char> memory;
    CHECK(seq.try_save_to(memory, kvt::save_options().with_tokens(64, 100).with_layers(one)));
    kvt::cache small = cache_of(group_of().with_layers(1));
    kvt::sequence part = sequence_of(small, 0);
    CHECK(part.try_load_from(memory) && part.length() == 100);
    std::vector<float> rows(100 * kv_heads * k_dim), expected(rows.size());
    CHECK(part.try_read(0, KVT_SIDE_K, 0, 100, rows));
    CHECK(seq.try_read(1, KVT_SIDE_K, 64, 100, expected) && rows == expected);
    memory.clear();
    CHECK(seq.try_save_to(memory));
    CHECK(part.try_load_from(memory, kvt::load_options().with_layers(one)) && part.length() == 300);
    CHECK(part.try_read(0, KVT_SIDE_K, 64, 100, rows) && rows == expected);

    /* None of the layers is not all of them. */
    const std::vector<std::uint32_t> none;
    kvt::load_options of_none;
    of_none.with_layers(none);
    CHECK(seq.try_save_to(memory, kvt::save_options().with_layers(none)).status() == KVT_ERR_ARG);
    CHECK(other.try_load_from(memory, of_none).status() == KVT_ERR_ARG);
    CHECK(kvt::try_convert(whole, first, {}, of_none).status() == KVT_ERR_ARG);
    CHECK(other.try_load_from(memory));
}

/* Encrypted, where the library can. */
static void keys(const std::string &folder)
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 100), other = sequence_of(cache, 5);
    const std::string file = folder + "/secret.kvt";
    std::array<unsigned char, KVT_KEY_BYTES> secret{};
    unsigned char wrong[KVT_KEY_BYTES] = {1};
    secret[5] = 7;
    auto saved = seq.try_save(file, kvt::save_options().with_key(secret));
    if (saved.status() == KVT_ERR_UNSUPPORTED) {
        std::puts("kvtile.hpp: the library has no encryption");
        return;
    }
    CHECK(saved);
    const auto before = contents(other);
    CHECK(other.try_load(file).status() == KVT_ERR_MISMATCH);
    CHECK(other.try_load(file, kvt::load_options().with_key(wrong)).status() == KVT_ERR_MISMATCH);
    CHECK(contents(other) == before);
    DO(other, load, file, kvt::load_options().with_key(secret));
    CHECK(contents(other) == contents(seq));
    auto info = kvt::try_inspect(file, kvt::inspect_options().with_verify(true).with_key(secret));
    CHECK(info && info->encrypted == 1 && info->n_tokens == 100);
    const std::string plain = folder + "/plain.kvt";
    CHECK(kvt::try_convert(file, plain, {}, kvt::load_options().with_key(secret)));
    CHECK(other.try_clear() && other.try_load(plain) && contents(other) == contents(seq));
}

/* Functions, which are no objects. */
static std::uint64_t last_told;
static void tell(std::uint64_t done, std::uint64_t)
{
    last_told = done;
}
static bool refuse_all(const kvt_snapshot_piece &)
{
    return true;
}
static void one_by_one(std::size_t n, const std::function<void(std::size_t)> &task)
{
    for (std::size_t i = 0; i < n; i++)
        task(i);
}

static void functions(const std::string &folder)
{
    kvt::cache cache = *kvt::cache::try_create(kvt::config()
                                                   .with_group(group_of())
                                                   .with_max_tokens(1000)
                                                   .with_executor(kvt::executor_of(one_by_one, 1)));
    kvt::sequence seq = sequence_of(cache, 200);
    const std::string file = folder + "/functions.kvt";
    const kvt::snapshot_piece pieces[] = {{"a", "1"}};
    CHECK(seq.try_save(file, kvt::save_options().with_pieces(pieces).with_progress(tell)) &&
          last_told);
    last_told = 0;
    CHECK(seq.try_load(file, kvt::load_options().with_progress(tell)) && last_told);
    CHECK(seq.try_load(file, kvt::load_options().with_pieces(refuse_all)).status() ==
          KVT_ERR_CANCELLED);
    CHECK(seq.length() == 200);
}

/* Callbacks of options: what they answer, and what they throw. */
static void cancelled(const std::string &folder)
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 200), other = sequence_of(cache, 5);
    const std::string file = folder + "/cancelled.kvt", to = folder + "/never.kvt";
    const kvt::snapshot_piece pieces[] = {{"a", "1"}, {"b", "2"}};
    const auto with_pieces = kvt::save_options().with_pieces(pieces);
    CHECK(seq.try_save(file, with_pieces));
    const auto before = contents(other);
    std::vector<unsigned char> memory(*seq.try_save_bound(with_pieces)), room(memory.size());
    auto memory_bytes = seq.try_save_memory(memory, with_pieces);
    CHECK(memory_bytes);
    const kvt::bytes saved(memory.data(), *memory_bytes);

    std::uint64_t last = 0, all = 0;
    int pieces_seen = 0;
    auto count = [&](std::uint64_t done, std::uint64_t total) {
        CHECK(done > last && done <= total);
        last = done;
        all = total;
        return false;
    };
    auto take = [&pieces_seen](const kvt_snapshot_piece &) { return ++pieces_seen == 3; };
    const auto look = kvt::inspect_options().with_verify(true).with_pieces(take);
    CHECK(kvt::try_inspect(file, kvt::inspect_options(look).with_progress(count)));
    CHECK(last == all && all > 0 && pieces_seen == 2);
    CHECK(kvt::try_inspect(file, look).status() == KVT_ERR_CANCELLED && pieces_seen == 3);
    last = 0;
    CHECK(seq.try_save_memory(room, kvt::save_options().with_progress(count)) && last == all);

    auto stop = [](std::uint64_t, std::uint64_t) { return true; };
    CHECK(seq.try_save(to, kvt::save_options().with_progress(stop)).status() == KVT_ERR_CANCELLED);
    CHECK(other.try_load(file, kvt::load_options().with_progress(stop)).status() ==
          KVT_ERR_CANCELLED);
    CHECK(access(to.c_str(), F_OK) != 0 && contents(other) == before);

#if KVT_HPP_EXCEPTIONS
    struct thrown {
        int number;
    };
    int calls = 0, caught = 0;
    auto fail = [&calls](std::uint64_t, std::uint64_t) { throw thrown{++calls}; };
    auto refuse = [&calls](const kvt_snapshot_piece &) { throw thrown{++calls}; };
    const auto save = kvt::save_options().with_progress(fail);
    const auto load = kvt::load_options().with_progress(fail);
    const auto piece = kvt::load_options().with_pieces(refuse);
    const auto discard = [](const void *, std::size_t) { return true; };
    int fd = open(file.c_str(), O_RDONLY), null = open("/dev/null", O_WRONLY);
    auto read_fd = [fd](void *data, std::size_t n) { return read(fd, data, n); };
    auto try_all = [&](auto call) {
        lseek(fd, 0, SEEK_SET);
        try {
            call();
            NOT_REACHED();
        } catch (const thrown &t) {
            CHECK(t.number == calls); /* of this call */
            caught++;
        }
    };
    try_all([&] { (void)seq.try_save(to, save); });
    try_all([&] { seq.save(to, save); });
    try_all([&] { (void)seq.try_save(discard, save); });
    try_all([&] { (void)seq.try_save_memory(room, save); });
    try_all([&] { (void)seq.try_save_fd(null, save); });
    try_all([&] { (void)other.try_load(file, load); });
    try_all([&] { (void)other.load(file, piece); });
    try_all([&] { (void)other.try_load(read_fd, load); });
    try_all([&] { (void)other.try_load(read_fd, piece); });
    try_all([&] { (void)other.try_load_fd(fd, piece); });
    try_all([&] { (void)other.load_from(saved, load); });
    try_all([&] { (void)other.load_from(saved, piece); });
    const auto verify = kvt::inspect_options().with_verify(true);
    try_all([&] { (void)kvt::inspect(file, kvt::inspect_options(verify).with_progress(fail)); });
    try_all([&] { (void)kvt::inspect(file, kvt::inspect_options(verify).with_pieces(refuse)); });
    try_all([&] { (void)kvt::try_convert(file, to, save); });
    try_all([&] { kvt::convert(file, to, {}, load); });
    try_all([&] { kvt::convert(file, to, {}, piece); });
    close(fd);
    close(null);
    CHECK(caught == 17 && calls == 17);
    CHECK(access(to.c_str(), F_OK) != 0 && contents(other) == before);
    try {
        seq.save(to, kvt::save_options().with_progress(stop));
        NOT_REACHED();
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_CANCELLED);
        CHECK(std::string(e.what()).find("progress") != std::string::npos);
    }
#endif
}

/* Between the C calls nothing is allocated. */
static void allocations()
{
    kvt::cache cache = cache_of(group_of());
    kvt::sequence seq = sequence_of(cache, 100);
    std::vector<float> out(q_heads * v_dim);
    std::vector<std::int32_t> ids(1);
    std::size_t sum = 0;
    std::vector<unsigned char> memory(1 << 20);
    auto told = [&sum](std::uint64_t done, std::uint64_t) { sum += done; };
    const std::size_t before = news;
    for (int i = 0; i < 3; i++) {
        kvt::step step = *seq.try_begin_step(1);
        for (std::uint32_t layer = 0; layer < layers; layer++) {
            CHECK(seq.try_append(layer, numbers.k, numbers.v));
            CHECK(cache.try_attend(layer, seq, numbers.q, out));
        }
        CHECK(step.try_commit(ids));
        kvt::sequence fork = *seq.try_fork();
        CHECK(fork.try_truncate(50) && fork.try_checkpoint("blob"));
        CHECK(fork.try_token_ids(0, ids));
        CHECK(seq.try_visit(0, 0, 10, [&](const kvt_token_view &t) { sum += t.index; }));
        CHECK(seq.try_save([&](const void *, std::size_t n) {
            sum += n;
            return true;
        }));
        const auto options = kvt::save_options().with_codec(KVT_CODEC_RAW).with_progress(told);
        CHECK(seq.try_save_memory(memory, options));
        CHECK(fork.try_load_from(memory).status() == KVT_ERR_CORRUPT); /* bytes behind it */
        CHECK(seq.try_begin(10000).status() == KVT_ERR_FULL);
    }
    CHECK(news == before && sum > 0);
}

#if KVT_HPP_EXCEPTIONS
/* The throwing forms of what the other tests do without. */
static void throwing(const std::string &folder)
{
    kvt::group_config group = group_of();
    kvt::config config = kvt::config().with_group(group).with_max_tokens(1000);
    CHECK(kvt::memory_forecast(config, 1, 100) == *kvt::try_memory_forecast(config, 1, 100));
    CHECK(kvt::working_forecast(config, 100) == *kvt::try_working_forecast(config, 100));
    std::array<std::uint32_t, layers> room{};
    CHECK(kvt::split_ends(group, 1, 0, KVT_TYPE_F16, KVT_TYPE_F16, room).n == 2);
    kvt::cache cache(config);
    kvt::sequence seq = cache.create_sequence();
    std::vector<float> out(100 * q_heads * v_dim), expected(out.size());
    std::vector<std::int32_t> ids(100);
    seq.set_tag("throwing");
    seq.reserve(200);
    seq.set_next_position(0);
    seq.begin(100);
    seq.append(0, numbers.k, numbers.v);
    kvt::append_plan append;
    append.init(seq, 1, numbers.k, numbers.v);
    for (std::size_t i = 0; i < append.n_tasks(); i++)
        append.task(i);
    append.finish();
    cache.attend(1, seq, numbers.q, expected, 100);
    kvt::attend_item item(seq, 100);
    kvt::attend_args args(1, {&item, 1}, numbers.q, out);
    args.with_flags(KVT_ATTEND_CAUSAL);
    cache.attend(args);
    CHECK(out == expected);
    kvt::attend_plan attend;
    attend.init(cache, args);
    struct alignas(64) line {
        unsigned char bytes[64];
    };
    line *lines =
        static_cast<line *>(std::aligned_alloc(64, (attend.scratch_bytes() + 63) / 64 * 64));
    kvt::buffer scratch(lines, attend.scratch_bytes());
    std::fill(out.begin(), out.end(), 0.0f);
    for (std::size_t i = 0; i < attend.n_tasks(); i++)
        attend.task(scratch, i);
    attend.finish(scratch);
    std::free(lines);
    CHECK(out == expected);
    seq.commit(ids_of(0, 100));
    seq.token_ids(0, ids);
    CHECK(ids == ids_of(0, 100));
    seq.positions(0, ids);
    seq.key_positions(0, ids);
    seq.checkpoint();
    seq.checkpoint("again");
    CHECK(seq.checkpoints() == 1 && seq.checkpoint_read(100) == 5 && seq.tag() == 8);
    kvt::sequence fork = seq.fork(), shorter = seq.fork(64);
    fork.checkpoint_drop(100);
    CHECK(shorter.length() == 64 && seq.stats().shared_bytes > 0);
    CHECK(cache.stats().blocks_shared > 0);
    seq.save(folder + "/throwing.kvt", kvt::save_options().with_fsync(false));
    CHECK(kvt::inspect(folder + "/throwing.kvt", false).tag_bytes == 8);
    std::vector<char> memory;
    seq.save_to(memory);
    fork.clear();
    CHECK(fork.load_from(memory).n_tokens == 100 && contents(fork) == contents(seq));
    fork.clear();
    CHECK(fork.load(folder + "/throwing.kvt", ids_of(0, 50)).reuse_tokens == 49);
    std::vector<float> rows(kv_heads * k_dim);
    fork.read(0, KVT_SIDE_K, 5, 1, rows);
    CHECK(std::fabs(rows[3] - numbers.k_of(5)[3]) < 0.05f);
    CHECK(fork.visit(0, 0, 100, [](const kvt_token_view &t) { return t.index == 20; }) == 20);
    std::size_t written = 0;
    seq.save([&written](const void *, std::size_t n) {
        written += n;
        return true;
    });
    CHECK(written == memory.size());
    fork.truncate(80);
    fork.begin(kvt::span<const std::int32_t>(ids.data(), 2));
    fork.abort();
    fork.begin(2);
    for (std::uint32_t layer = 0; layer < layers; layer++)
        fork.append(layer, numbers.k, numbers.v);
    const std::array<std::uint64_t, 1> selected{1};
    fork.commit_selected(selected);
    kvt::step step = fork.begin_step(kvt::span<const std::int32_t>(ids.data(), 1));
    for (std::uint32_t layer = 0; layer < layers; layer++)
        fork.append(layer, numbers.k, numbers.v);
    step.commit(kvt::span<const std::int32_t>(ids.data(), 1));
    CHECK(fork.length() == 82);
    step = fork.begin_step(2);
    for (std::uint32_t layer = 0; layer < layers; layer++)
        fork.append(layer, numbers.k, numbers.v);
    step.commit_selected(selected, kvt::span<const std::int32_t>(ids.data(), 1));
    CHECK(fork.length() == 83);
    fork.remove(82, 1);
    CHECK(fork.length() == 82);
    shorter = kvt::sequence();
    cache.trim();
    CHECK(cache.stats().blocks_free == 0);
}
#endif

int main(int argc, char **argv)
{
    const std::string folder = argc > 1 ? argv[1] : ".";
    CHECK(std::string(kvt::version()) == kvt_version());
    CHECK(std::string(kvt::isa_name(0)) == "scalar" && !kvt::isa_name(100));
    same_as_c(KVT_TYPE_I8, KVT_TYPE_I8);
    same_as_c(KVT_TYPE_I4, KVT_TYPE_I5);
    same_as_c(KVT_TYPE_F32, KVT_TYPE_F16);
    parts();
    executors();
    structs();
    texts();
    null_with_a_size();
    moved();
    order();
    steps();
    errors(folder);
    callbacks(folder);
    places(folder);
    chains(folder);
    keys(folder);
    functions(folder);
    cancelled(folder);
    allocations();
#if KVT_HPP_EXCEPTIONS
    throwing(folder);
#endif
#if __cplusplus >= 202002L
    std::vector<int> numbers_of{1, 2, 3};
    std::span<int> standard(numbers_of);
    kvt::span<int> ours(standard);
    std::span<const int> back(ours);
    CHECK(ours.size() == 3 && &back[2] == &numbers_of[2]);
#endif
    if (failures == 0)
        std::puts("kvtile.hpp: passed");
    return failures != 0;
}
