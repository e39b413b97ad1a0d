/*
 * store.hpp: what it answers is what the C calls answer, and what is put has the same bytes; stores
 * close once, move, and are empty behind that; classes of ours are stores, and what they throw is
 * an error; failures, in both forms, have the status and the text. Compiled as test_cxx.cpp is.
 */
#include <kvtile/store.hpp>

#include <array>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

static int failures;

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);                        \
            failures++;                                                                            \
        }                                                                                          \
    } while (0)

/* try_NAME(arguments) has this status; NAME(arguments) throws it, with the text. */
#if KVT_HPP_EXCEPTIONS
#define FAILS(object, name, arguments, wanted, part)                                               \
    do {                                                                                           \
        CHECK((object).try_##name arguments.status() == (wanted));                                 \
        try {                                                                                      \
            (void)(object).name arguments;                                                         \
            CHECK(false && "not reached");                                                         \
        } catch (const kvt::error &e) {                                                            \
            CHECK(e.status() == (wanted));                                                         \
            if (std::string(e.what()).find(part) == std::string::npos)                             \
                std::fprintf(stderr, "what: %s\n", e.what());                                      \
            CHECK(std::string(e.what()).find(part) != std::string::npos);                          \
        }                                                                                          \
    } while (0)
#else
#define FAILS(object, name, arguments, wanted, part)                                               \
    CHECK((object).try_##name arguments.status() == (wanted))
#endif

constexpr std::uint32_t layers = 2, heads = 2, dims = 32;
constexpr std::size_t most = 330;

static std::vector<float> rows_of(std::size_t tokens)
{
    std::vector<float> rows(tokens * heads * dims);
    std::uint32_t state = 1;
    for (float &x : rows) {
        state = state * 1664525u + 1013904223u;
        x = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
    }
    return rows;
}

static std::vector<std::int32_t> prompt_of(std::size_t n)
{
    std::vector<std::int32_t> ids(n);
    for (std::size_t i = 0; i < n; i++)
        ids[i] = static_cast<std::int32_t>(i * 7 % 1000);
    return ids;
}

static kvt::cache make_cache()
{
    kvt::group_config group;
    group.with_layers(layers).with_heads(heads, heads).with_dims(dims).with_types(KVT_TYPE_I8);
    auto cache = kvt::cache::try_create(
        kvt::config().with_group(group).with_max_tokens(1000).with_fingerprint("weights"));
    CHECK(cache);
    return *std::move(cache);
}

/* Of n tokens; with a checkpoint behind the first `checkpoint` of them. */
static kvt::sequence sequence_of(kvt::cache &cache, std::size_t n, std::size_t checkpoint = 0)
{
    static const std::vector<float> rows = rows_of(most);
    const auto ids = prompt_of(n);
    kvt::sequence seq = *cache.try_create_sequence();
    for (std::size_t first = 0; first < n;) {
        const std::size_t end = first < checkpoint ? checkpoint : n;
        const kvt::span<const float> values(&rows[first * heads * dims],
                                            (end - first) * heads * dims);
        CHECK(seq.try_begin(end - first));
        for (std::uint32_t layer = 0; layer < layers; layer++)
            CHECK(seq.try_append(layer, values, values));
        CHECK(seq.try_commit(kvt::span<const std::int32_t>(&ids[first], end - first)));
        if (end == checkpoint)
            CHECK(seq.try_checkpoint("blob"));
        first = end;
    }
    return seq;
}

static std::vector<unsigned char> contents(const kvt::sequence &seq)
{
    std::vector<unsigned char> memory;
    CHECK(seq.try_save_to(memory));
    return memory;
}

static bool same(const kvt_prefix_result &a, const kvt_prefix_result &b)
{
    return std::memcmp(&a, &b, sizeof a) == 0;
}

/* A store in memory. `fail`: what the next calls throw, or answer where there are no exceptions. */
enum class failing { no, status, text, memory, something };

struct shelf {
    using name = std::array<std::uint8_t, KVT_STORE_KEY_BYTES>;

    std::map<name, std::vector<unsigned char>> values;
    failing fail = failing::no;
    int *gone = nullptr; /* counts destructions */

    shelf() = default;
    explicit shelf(int &count) : gone(&count) {}
    shelf(const shelf &) = delete;
    shelf &operator=(const shelf &) = delete;
    ~shelf()
    {
        if (gone)
            ++*gone;
    }

    static name name_of(const kvt_store_key &key)
    {
        name n;
        std::memcpy(n.data(), key.bytes, n.size());
        return n;
    }
    kvt_status failure(kvt_store_error &error) const
    {
#if KVT_HPP_EXCEPTIONS
        if (fail == failing::status)
            throw kvt::error(KVT_ERR_FULL, kvt::message{{"shelf: full"}});
        if (fail == failing::text)
            throw std::runtime_error("shelf: broken");
        if (fail == failing::memory)
            throw std::bad_alloc();
        if (fail == failing::something)
            throw 5;
#endif
        if (fail == failing::no)
            return KVT_OK;
        std::strcpy(error.text, "shelf: broken");
        return KVT_ERR_IO;
    }

    kvt_status get(kvt::span<const kvt_store_key> keys, const kvt_store_receiver &to,
                   kvt_store_error &error)
    {
        for (std::size_t i = 0; i < keys.size(); i++) {
            auto found = values.find(name_of(keys[i]));
            if (found == values.end())
                continue;
            const auto &value = found->second;
            if (to.part(to.user, i, value.size(), 0, value.data(), value.size()) == KVT_STORE_STOP)
                break;
        }
        return failure(error);
    }
    kvt_status put(kvt::span<const kvt_store_key> keys, kvt::span<const kvt_store_value> put_values,
                   std::size_t &n_put, kvt_store_error &error)
    {
        if (kvt_status s = failure(error))
            return s;
        for (n_put = 0; n_put < keys.size(); n_put++) {
            auto &value = values[name_of(keys[n_put])];
            value.clear();
            for (std::size_t i = 0; i < put_values[n_put].n_parts; i++) {
                const kvt_store_part &part = put_values[n_put].parts[i];
                const auto *from = static_cast<const unsigned char *>(part.data);
                value.insert(value.end(), from, from + part.bytes);
            }
        }
        return KVT_OK;
    }
    kvt_status exists(kvt::span<const kvt_store_key> keys, kvt::span<std::uint8_t> found,
                      kvt_store_error &error)
    {
        for (std::size_t i = 0; i < keys.size(); i++)
            found[i] = values.count(name_of(keys[i])) != 0;
        return failure(error);
    }
    kvt_status remove(kvt::span<const kvt_store_key> keys, kvt_store_error &error)
    {
        for (const kvt_store_key &key : keys)
            values.erase(name_of(key));
        return failure(error);
    }
};

/* The same with what a store may have besides. */
struct full_shelf : shelf {
    kvt_status list(kvt::entry_visitor visitor, kvt_store_error &error)
    {
        for (const auto &value : values) {
            kvt_store_entry entry{};
            std::memcpy(entry.key.bytes, value.first.data(), value.first.size());
            entry.bytes = value.second.size();
            entry.used_seconds = entry.left_seconds = -1;
            if (visitor(entry))
                break;
        }
        return failure(error);
    }
    kvt_status stats(kvt_store_stats &stats, kvt_store_error &error)
    {
        stats.n_values = values.size();
        return failure(error);
    }
    kvt_status collect(kvt_store_error &error)
    {
        values.clear();
        return failure(error);
    }
};

/* Whether the library has keys: libsodium. */
static bool has_keys()
{
    kvt::cache cache = make_cache();
    kvt::sequence seq = sequence_of(cache, 0);
    shelf memory;
    auto r = kvt::store::of(memory).try_prefix_probe(seq, prompt_of(100));
    CHECK(r || r.status() == KVT_ERR_UNSUPPORTED);
    return static_cast<bool>(r);
}

/* ---- the same as C ---- */

static void same_as_c()
{
    kvt::cache cache = make_cache();
    kvt::sequence seq = sequence_of(cache, most, 200);
    const auto prompt = prompt_of(most);
    shelf c_memory, memory;
    kvt::store c_store = kvt::store::of(c_memory), store = kvt::store::of(memory);
    const std::array<std::uint64_t, 2> lengths{130, 190};

    const std::string adapter("adapter");
    const kvt::prefix_extra extras[] = {{1, "image"}, {3, adapter}};
    std::vector<std::int32_t> positions(most);
    for (std::size_t i = 0; i < most; i++)
        positions[i] = static_cast<std::int32_t>(i) + 5;
    const std::vector<char> salt{1, 0, 2};
    kvt::prefix_options all[] = {
        {},
        kvt::prefix_options().with_namespace("tenant"),
        kvt::prefix_options().with_salt(salt),
        kvt::prefix_options().with_extras(extras),
        kvt::prefix_options().with_checkpoints(),
        kvt::prefix_options().with_tokens(130),
    };
    std::size_t n_values = 0;
    for (auto &options : all) {
        kvt_prefix_options c_options{};
        c_options.struct_size = sizeof c_options;
        kvt_prefix_extra c_extras[2] = {{1, "image", 5}, {3, "adapter", 7}};
        if (&options == &all[1]) {
            c_options.name_space = "tenant";
            c_options.name_space_bytes = 6;
        } else if (&options == &all[2]) {
            c_options.salt = "\1\0\2";
            c_options.salt_bytes = 3;
        } else if (&options == &all[3]) {
            c_options.extras = c_extras;
            c_options.n_extras = 2;
        } else if (&options == &all[4]) {
            c_options.checkpoints = KVT_PREFIX_CHECKPOINT;
        } else if (&options == &all[5]) {
            c_options.n_tokens = 130;
            memory.values.clear();
            c_memory.values.clear();
            n_values = 0;
        }
        kvt_prefix_result c_result{};
        CHECK(kvt_prefix_put(c_store.get(), seq.get(), &c_options, &c_result) == KVT_OK);
        auto put = store.try_prefix_put(seq, options);
        CHECK(put && same(*put, c_result) && put->n_values > 0);
        CHECK(put && put->n_tokens == (&options == &all[5] ? 128 : 256));
        CHECK(put && put->n_checkpoints == (&options == &all[4]));
        CHECK(memory.values == c_memory.values && memory.values.size() > n_values);
        n_values = memory.values.size();
        put = store.try_prefix_put(seq, options);
        CHECK(put && put->n_values == 0);

        c_options.n_tokens = 0;
        options.with_tokens(0);
        kvt::sequence c_got = sequence_of(cache, 0), got = sequence_of(cache, 0);
        CHECK(kvt_prefix_probe(store.get(), got.get(), prompt.data(), most, &c_options,
                               &c_result) == KVT_OK);
        auto probed = store.try_prefix_probe(got, prompt, options);
        CHECK(probed && same(*probed, c_result));
        const std::uint64_t found = probed->n_tokens;
        CHECK(kvt_prefix_get(store.get(), c_got.get(), prompt.data(), most, &c_options,
                             &c_result) == KVT_OK);
        auto read = store.try_prefix_get(got, prompt, options);
        CHECK(read && same(*read, c_result) && read->n_tokens == found && got.length() == found);
        CHECK(contents(got) == contents(c_got));
        CHECK(found == (&options == &all[4] ? 200 : &options == &all[5] ? 128 : 256));
        CHECK(store.try_prefix_probe(got, prompt, kvt::prefix_options(options).with_salt("other"))
                  ->n_tokens == 0);
        CHECK(store
                  .try_prefix_probe(got, prompt,
                                    kvt::prefix_options(options).with_positions(positions))
                  ->n_tokens == 0);
    }
    /* Lengths at which there may be a checkpoint. */
    const auto limited = kvt::prefix_options().with_checkpoints(lengths);
    CHECK(limited.checkpoints == KVT_PREFIX_CHECKPOINT && limited.n_checkpoint_tokens == 2 &&
          limited.checkpoint_tokens == lengths.data());
    CHECK(store.try_prefix_put(seq, kvt::prefix_options().with_checkpoints()));
    CHECK(store.try_prefix_probe(seq, prompt, limited)->n_tokens == 0);
    const std::array<std::uint64_t, 2> right{130, 200};
    CHECK(store.try_prefix_probe(seq, prompt, kvt::prefix_options().with_checkpoints(right))
              ->n_tokens == 200);
    /* None of them is none, whatever an empty vector's data() is; not given they are any. */
    std::vector<std::uint64_t> no_lengths, reserved;
    reserved.reserve(4);
    for (const auto *none : {&no_lengths, &reserved}) {
        const auto options = kvt::prefix_options().with_checkpoints(*none);
        CHECK(options.checkpoint_tokens && options.n_checkpoint_tokens == 0);
        CHECK(store.try_prefix_probe(seq, prompt, options)->n_tokens == 0);
    }
    CHECK(store.try_prefix_probe(seq, prompt, kvt::prefix_options().with_checkpoints())->n_tokens ==
          200);

    /* Positions: a C struct's have no count, nor those that are set without the call. */
    for (auto &position : positions)
        position -= 5;
    const std::vector<std::int32_t> few{0, 1};
    kvt_prefix_options c_options{};
    c_options.struct_size = sizeof c_options;
    c_options.positions = positions.data();
    CHECK(store.try_prefix_probe(seq, prompt, c_options)->n_tokens == 256);
    auto counted = kvt::prefix_options().with_positions(positions);
    CHECK(store.try_prefix_probe(seq, prompt, counted)->n_tokens == 256);
    counted.with_positions(few).positions = positions.data();
    CHECK(store.try_prefix_probe(seq, prompt, counted)->n_tokens == 256);

    /* A value as it is there. */
    const auto &first = *memory.values.begin();
    kvt_store_key key;
    std::memcpy(key.bytes, first.first.data(), sizeof key.bytes);
    kvt_value_info c_info{};
    c_info.struct_size = sizeof c_info;
    CHECK(kvt_value_check(&key, first.second.data(), first.second.size(), &c_info, nullptr, 0) ==
          KVT_OK);
    auto info = kvt::try_value_check(&key, first.second);
    CHECK(info && std::memcmp(&*info, &c_info, sizeof c_info) == 0 && info->n_tokens >= 64);
    kvt_store_key other = key;
    other.bytes[3] ^= 1;
    kvt::message text;
    CHECK(kvt::try_value_check(&other, first.second, &text).status() == KVT_ERR_MISMATCH);
    CHECK(text.c_str()[0] != 0);
    auto damaged = first.second;
    damaged.back() ^= 1;
    CHECK(kvt::try_value_check(nullptr, damaged).status() == KVT_ERR_CORRUPT);
#if KVT_HPP_EXCEPTIONS
    CHECK(kvt::value_check(&key, first.second).n_tokens == info->n_tokens);
    try {
        (void)kvt::value_check(&other, first.second);
        CHECK(false && "not reached");
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_MISMATCH && std::string(e.what()) == text.c_str());
    }
    memory.values.clear();
    CHECK(store.prefix_put(seq).n_tokens == 256);
    kvt::sequence got = sequence_of(cache, 0);
    CHECK(store.prefix_probe(got, prompt).n_tokens == 256);
    CHECK(store.prefix_get(got, prompt).n_tokens == 256 && got.length() == 256);
#endif
}

/* ---- errors ---- */

static void errors()
{
    kvt::cache cache = make_cache();
    kvt::sequence seq = sequence_of(cache, most), empty = sequence_of(cache, 0);
    const auto prompt = prompt_of(most);
    full_shelf memory;
    kvt::store store = kvt::store::of(memory), none;
    kvt::sequence no_sequence;

    FAILS(none, prefix_put, (seq), KVT_ERR_ARG, "store");
    FAILS(none, prefix_get, (empty, prompt), KVT_ERR_ARG, "store");
    FAILS(none, prefix_probe, (empty, prompt), KVT_ERR_ARG, "store");
    FAILS(store, prefix_put, (no_sequence), KVT_ERR_ARG, "");
    FAILS(store, prefix_put,
          (seq, kvt::prefix_options().with_extras(
                    std::array<kvt::prefix_extra, 2>{{{2, "b"}, {1, "a"}}})),
          KVT_ERR_ARG, "ascend");
    FAILS(store, prefix_get, (seq, prompt), KVT_ERR_STATE, "kvt_prefix_get");
    CHECK(seq.try_begin(1));
    FAILS(store, prefix_put, (seq), KVT_ERR_STATE, "pending");
    CHECK(seq.try_abort());
    CHECK(memory.values.empty());
    for (std::size_t n : {std::size_t{0}, std::size_t{10}, most + 1}) {
        std::vector<std::int32_t> positions(n);
        auto options = kvt::prefix_options().with_positions(positions);
        FAILS(store, prefix_get, (empty, prompt, options), KVT_ERR_ARG, "prefix_get: not as many");
        FAILS(store, prefix_probe, (empty, prompt, options), KVT_ERR_ARG, "probe: not as many");
    }

    /* What a class throws, or answers. */
    CHECK(store.try_prefix_put(seq));
    for (auto fail : {failing::status, failing::text, failing::memory, failing::something}) {
        memory.fail = fail;
        kvt_status status = KVT_ERR_IO;
        std::string text = "shelf: broken";
#if KVT_HPP_EXCEPTIONS
        if (fail == failing::status) {
            status = KVT_ERR_FULL;
            text = "shelf: full";
        } else if (fail == failing::memory) {
            status = KVT_ERR_MEMORY;
            text = "memory";
        } else if (fail == failing::something) {
            text = "thrown";
        }
#endif
        FAILS(store, prefix_put, (seq, kvt::prefix_options().with_salt("new")), status, text);
        FAILS(store, prefix_get, (empty, prompt), status, text);
        FAILS(store, prefix_probe, (empty, prompt), status, text);
        CHECK(empty.empty());
#if KVT_HPP_EXCEPTIONS
        try {
            (void)store.stats();
            CHECK(false && "not reached");
        } catch (const kvt::error &e) {
            CHECK(e.status() == status && std::string(e.what()).find(text) != std::string::npos);
        }
#endif
        kvt::message told;
        CHECK(store.try_stats(&told).status() == status);
        CHECK(std::string(told.c_str()).find(text) != std::string::npos);
        CHECK(store.try_list([](const kvt_store_entry &) {}, &told).status() == status);
        CHECK(store.try_collect(&told).status() == status);
        memory.fail = failing::no;
        CHECK(store.try_prefix_put(seq));
    }
    CHECK(store.try_prefix_get(empty, prompt)->n_tokens == 256);
}

/* ---- what a store may have, and its life ---- */

static void optional_calls()
{
    kvt::cache cache = make_cache();
    kvt::sequence seq = sequence_of(cache, most);
    full_shelf memory;
    shelf less;
    kvt::store store = kvt::store::of(memory), small = kvt::store::of(less), none;
    auto put = store.try_prefix_put(seq);
    CHECK(put && store.try_stats() && store.try_stats()->n_values == put->n_values);
    std::size_t seen = 0, bytes = 0;
    CHECK(store.try_list([&](const kvt_store_entry &entry) {
        seen++;
        bytes += entry.bytes;
    }));
    CHECK(seen == put->n_values && bytes == put->n_bytes);
    seen = 0;
    CHECK(store.try_list([&seen](const kvt_store_entry &) { return ++seen == 2; }) && seen == 2);
#if KVT_HPP_EXCEPTIONS
    seen = 0;
    try {
        (void)store.try_list([&seen](const kvt_store_entry &) {
            seen++;
            throw 7;
        });
        CHECK(false && "not reached");
    } catch (int number) {
        CHECK(number == 7 && seen == 1);
    }
    store.list([&seen](const kvt_store_entry &) { seen++; });
    CHECK(seen == 1 + put->n_values && store.stats().n_values == put->n_values);
    store.collect();
#else
    CHECK(store.try_collect());
#endif
    CHECK(store.try_stats()->n_values == 0);

    CHECK(!small.get()->list && !small.get()->stats && !small.get()->collect);
    FAILS(small, stats, (), KVT_ERR_UNSUPPORTED, "has none");
    FAILS(small, collect, (), KVT_ERR_UNSUPPORTED, "has none");
    FAILS(small, list, ([](const kvt_store_entry &) {}), KVT_ERR_UNSUPPORTED, "has none");
    FAILS(none, stats, (), KVT_ERR_ARG, "");
    FAILS(none, collect, (), KVT_ERR_ARG, "");
}

static void owners()
{
    int gone = 0;
    {
        kvt::store store = kvt::store::of(std::make_unique<shelf>(gone));
        CHECK(store && gone == 0);
        kvt::store moved(std::move(store));
        CHECK(moved && !store && !store.get()->user && !store.get()->struct_size);
        store = std::move(moved);
        CHECK(store && !moved && gone == 0);
        kvt::store &itself = store;
        store = std::move(itself);
        CHECK(store && gone == 0);
        store = kvt::store::of(std::make_unique<shelf>(gone));
        CHECK(gone == 1 && store.get()->n_at_once == 1);
        kvt_store c_store = store.release();
        CHECK(!store && gone == 1);
        kvt::store again(c_store);
    }
    CHECK(gone == 2);
    CHECK(!kvt::store::of(std::unique_ptr<shelf>()));
    {
        shelf object(gone);
        {
            kvt::store store = kvt::store::of(object);
            CHECK(store && !store.get()->close && store.get()->n_at_once == 1);
            CHECK(kvt::store::of(object, 4).get()->n_at_once == 4);
        }
        CHECK(gone == 2);
    }
    CHECK(gone == 3);
}

/* ---- the library's own ---- */

static void opened(const std::string &folder)
{
    kvt::cache cache = make_cache();
    kvt::sequence seq = sequence_of(cache, most), got = sequence_of(cache, 0);
    const auto prompt = prompt_of(most);
    const std::string where = folder + "/store", nowhere = folder + "/no/store";
    kvt::directory_config config(where);
    config.with_max_bytes(1 << 20).with_sync(true);
    CHECK(config.struct_size == sizeof(kvt_directory_config) && config.max_bytes == 1 << 20 &&
          config.sync == 1 && config.path == where);
    auto directory = kvt::store::try_open_directory(config);
    if (directory.status() == KVT_ERR_UNSUPPORTED) {
        std::puts("store.hpp: the library has no directory store");
    } else {
        CHECK(directory && *directory);
        auto put = directory->try_prefix_put(seq);
        CHECK(put && put->n_tokens == 256 && put->n_values > 0);
        CHECK(directory->try_stats() && directory->try_stats()->n_values == put->n_values);
        kvt::message text;
        CHECK(kvt::store::try_open_directory(kvt::directory_config(nowhere), &text).status() ==
              KVT_ERR_IO);
        CHECK(std::string(text.c_str()).find(nowhere) != std::string::npos);
#if KVT_HPP_EXCEPTIONS
        directory = kvt::store::open_directory(kvt::directory_config(where));
        try {
            (void)kvt::store::open_directory(kvt::directory_config(nowhere));
            CHECK(false && "not reached");
        } catch (const kvt::error &e) {
            CHECK(e.status() == KVT_ERR_IO && std::string(e.what()) == text.c_str());
        }
#endif
        CHECK(directory->try_prefix_get(got, prompt)->n_tokens == 256);
        CHECK(got.try_clear());
    }

    /* Nothing listens at port 1; a server is not needed for the opening. */
    auto redis = kvt::store::try_open_redis(
        kvt::redis_config().with_address("127.0.0.1", 1).with_timeouts(200).with_prefix("test:"));
    if (redis.status() == KVT_ERR_UNSUPPORTED) {
        std::puts("store.hpp: the library has no Redis store");
    } else {
        CHECK(redis);
        FAILS(*redis, prefix_put, (seq), KVT_ERR_IO, "127.0.0.1");
    }
    const auto c = kvt::redis_config()
                       .with_unix_path(folder)
                       .with_database(3)
                       .with_login("user", "secret")
                       .with_tls("ca")
                       .with_client_certificate("cert", "key")
                       .with_ttl(60)
                       .with_timeouts(1, 2, 3)
                       .with_retry(4)
                       .with_pipeline(5)
                       .with_prefix("p");
    CHECK(c.struct_size == sizeof(kvt_redis_config) && c.unix_path == folder && c.database == 3);
    CHECK(std::string(c.username) == "user" && std::string(c.password) == "secret" && c.tls == 1);
    CHECK(std::string(c.tls_cert_file) == "cert" && std::string(c.tls_key_file) == "key");
    CHECK(std::string(c.tls_ca_file) == "ca" && c.ttl_seconds == 60 && c.connect_timeout_ms == 1);
    CHECK(c.timeout_ms == 2 && c.call_timeout_ms == 3 && c.retry_ms == 4 && c.pipeline == 5);

    int gone = 0;
    auto near_shelf = std::make_unique<shelf>(gone), far_shelf = std::make_unique<shelf>(gone);
    shelf &near = *near_shelf, &far = *far_shelf;
    kvt::store near_store = kvt::store::of(std::move(near_shelf));
    kvt::store far_store = kvt::store::of(std::move(far_shelf)), none;
    CHECK(far_store.try_prefix_put(seq) && far.values.size() > 0 && near.values.empty());
    CHECK(!kvt::store::try_open_tiers(std::move(near_store), std::move(none)));
    CHECK(near_store && gone == 0);
    auto tiers = kvt::store::try_open_tiers(std::move(near_store), std::move(far_store));
    if (tiers.status() == KVT_ERR_UNSUPPORTED) {
        std::puts("store.hpp: the library has no tiers");
        return;
    }
    CHECK(tiers && !near_store && !far_store && gone == 0);
    CHECK(tiers->try_prefix_get(got, prompt)->n_tokens == 256);
    CHECK(near.values == far.values);
    *tiers = kvt::store();
    CHECK(gone == 2);
#if KVT_HPP_EXCEPTIONS
    try {
        (void)kvt::store::open_tiers(kvt::store(), kvt::store());
        CHECK(false && "not reached");
    } catch (const kvt::error &e) {
        CHECK(e.status() == KVT_ERR_ARG);
    }
    auto both = kvt::store::open_tiers(kvt::store::of(std::make_unique<shelf>(gone)),
                                       kvt::store::of(std::make_unique<shelf>(gone)));
    CHECK(both.prefix_put(seq).n_tokens == 256);
#endif
}

int main(int argc, char **argv)
{
    owners();
    if (!has_keys()) {
        std::puts("store.hpp: the library has no SHA-256");
        return failures != 0;
    }
    same_as_c();
    errors();
    optional_calls();
    opened(argc > 1 ? argv[1] : ".");
    if (failures == 0)
        std::puts("store.hpp: passed");
    return failures != 0;
}
