/*
 * kvtile/store.hpp: kvtile/store.h for C++17 and newer, beside kvtile.hpp: stores of prefixes as
 * objects that close themselves, and classes of yours as stores.
 *
 *   kvt::store store = kvt::store::open_directory(
 *       kvt::directory_config("/var/cache/prefixes").with_max_bytes(1ull << 30));
 *   auto got = store.prefix_get(seq, prompt);        // the longest prefix, into an empty sequence
 *   ... compute prompt[got.n_tokens] and on ...
 *   store.prefix_put(seq);                           // what the store has not got yet
 *
 * What a call means, its statuses, and which threads may make it, is said in store.h, at the C
 * function of the same name. Errors, owners and views are as in kvtile.hpp: each call that can fail
 * has a try_ form and, with exceptions, a throwing one. A store that is moved from, or made without
 * arguments, is empty: its calls answer KVT_ERR_ARG.
 *
 * Calls on one store may run at the same time, but for its moves and its end.
 */
#ifndef KVTILE_STORE_HPP
#define KVTILE_STORE_HPP

#include "kvtile.hpp"
#include "store.h"

#include <memory>
#include <new>

namespace kvt
{

/* ---- configuration ---- */

/*
 * kvt_directory_config with its defaults. A view of the path: one of a temporary (folder / "x") has
 * to be used in the same statement.
 */
struct directory_config : kvt_directory_config {
    directory_config(kvt::path folder) noexcept : kvt_directory_config{}
    {
        struct_size = sizeof(kvt_directory_config);
        path = folder.c_str();
    }
    directory_config(const kvt_directory_config &c) noexcept : kvt_directory_config(c) {}
    directory_config &with_max_bytes(std::uint64_t bytes) noexcept
    {
        max_bytes = bytes;
        return *this;
    }
    /* Whether a put waits for the disk. */
    directory_config &with_sync(bool wait) noexcept
    {
        sync = wait ? 1 : 0;
        return *this;
    }
};

/* kvt_redis_config with its defaults. Views of all strings. */
struct redis_config : kvt_redis_config {
    redis_config() noexcept : kvt_redis_config{} { struct_size = sizeof(kvt_redis_config); }
    redis_config(const kvt_redis_config &c) noexcept : kvt_redis_config(c) {}
    redis_config &with_address(const char *host_name, std::uint32_t port_number = 0) noexcept
    {
        host = host_name;
        port = port_number;
        return *this;
    }
    redis_config &with_unix_path(kvt::path socket) noexcept
    {
        unix_path = socket.c_str();
        return *this;
    }
    redis_config &with_database(std::uint32_t number) noexcept
    {
        database = number;
        return *this;
    }
    /* user: NULL for the default one. */
    redis_config &with_login(const char *user, const char *secret) noexcept
    {
        username = user;
        password = secret;
        return *this;
    }
    /* ca_file: certificates that are trusted, in PEM; NULL: the system's. */
    redis_config &with_tls(const char *ca_file = nullptr) noexcept
    {
        tls = 1;
        tls_ca_file = ca_file;
        return *this;
    }
    /* With TLS: what a server that wants to know its clients is shown; both in PEM. */
    redis_config &with_client_certificate(const char *cert_file, const char *key_file) noexcept
    {
        tls_cert_file = cert_file;
        tls_key_file = key_file;
        return *this;
    }
    redis_config &with_ttl(std::uint32_t seconds) noexcept
    {
        ttl_seconds = seconds;
        return *this;
    }
    /* In milliseconds; 0: the default. */
    redis_config &with_timeouts(std::uint32_t connect, std::uint32_t silence = 0,
                                std::uint32_t call = 0) noexcept
    {
        connect_timeout_ms = connect;
        timeout_ms = silence;
        call_timeout_ms = call;
        return *this;
    }
    redis_config &with_retry(std::uint32_t ms) noexcept
    {
        retry_ms = ms;
        return *this;
    }
    redis_config &with_pipeline(std::uint32_t commands) noexcept
    {
        pipeline = commands;
        return *this;
    }
    /* Of the keys on the server. */
    redis_config &with_prefix(const char *text) noexcept
    {
        prefix = text;
        return *this;
    }
};

/* Bytes that a block's numbers depend on besides its tokens. A view. */
struct prefix_extra : kvt_prefix_extra {
    prefix_extra(std::uint64_t block_number, kvt::bytes contents) noexcept : kvt_prefix_extra{}
    {
        block = block_number;
        data = contents.data();
        bytes = contents.size();
    }
    prefix_extra(const kvt_prefix_extra &extra) noexcept : kvt_prefix_extra(extra) {}
};

static_assert(sizeof(prefix_extra) == sizeof(kvt_prefix_extra),
              "extras are an array of the C type");

/*
 * kvt_prefix_options with its defaults; what is given by pointers are views. An empty span is none
 * at all of its elements; C's NULL, which stands for a default, is where with_ is not called.
 */
struct prefix_options : kvt_prefix_options {
    prefix_options() noexcept : kvt_prefix_options{} { struct_size = sizeof(kvt_prefix_options); }
    prefix_options(const kvt_prefix_options &options) noexcept : kvt_prefix_options(options) {}
    prefix_options &with_namespace(kvt::bytes whose) noexcept
    {
        name_space = whose.data();
        name_space_bytes = whose.size();
        return *this;
    }
    prefix_options &with_salt(kvt::bytes secret) noexcept
    {
        salt = secret.data();
        salt_bytes = secret.size();
        return *this;
    }
    /* Ascending by block. */
    prefix_options &with_extras(span<const prefix_extra> all) noexcept
    {
        extras = all.data();
        n_extras = all.size();
        return *this;
    }
    /* get, probe: one for each of the prompt's tokens; KVT_ERR_ARG: not as many. */
    prefix_options &with_positions(span<const std::int32_t> of_prompt) noexcept
    {
        positions = sequence::some(of_prompt);
        counted_ = {positions, of_prompt.size()};
        return *this;
    }
    /* put: no more than the first n; 0: all. */
    prefix_options &with_tokens(std::uint64_t n) noexcept
    {
        n_tokens = n;
        return *this;
    }
    /* put: checkpoints too. get, probe: only up to one. */
    prefix_options &with_checkpoints(bool yes = true) noexcept
    {
        checkpoints = yes ? KVT_PREFIX_CHECKPOINT : KVT_PREFIX_BLOCKS;
        return *this;
    }
    template <class P, std::enable_if_t<std::is_pointer_v<P>, int> = 0>
    prefix_options &with_checkpoints(const P &lengths) = delete; /* which would be a bool */
    template <std::size_t n>
    prefix_options &with_checkpoints(const std::uint64_t (&lengths)[n]) noexcept
    {
        return with_checkpoints(span<const std::uint64_t>(lengths));
    }
    /* get, probe: ascending lengths at which there may be one. */
    prefix_options &with_checkpoints(span<const std::uint64_t> lengths) noexcept
    {
        checkpoints = KVT_PREFIX_CHECKPOINT;
        checkpoint_tokens = sequence::some(lengths);
        n_checkpoint_tokens = lengths.size();
        return *this;
    }

  private:
    friend class store;

    /* Whether positions, where their number is known, are those of n tokens. */
    bool has_positions_of(std::size_t n) const noexcept
    {
        return !positions || positions != counted_.data() || n == counted_.size();
    }

    span<const std::int32_t> counted_; /* what with_positions was given */
};

/* ---- a class of yours as a store ---- */

/* Takes the entries of a list: answers whether that was the last one wanted. */
class entry_visitor
{
  public:
    entry_visitor(int (*on_entry)(void *, const kvt_store_entry *), void *user) noexcept
        : on_entry_(on_entry), user_(user)
    {
    }
    bool operator()(const kvt_store_entry &entry) const { return on_entry_(user_, &entry) != 0; }

  private:
    int (*on_entry_)(void *, const kvt_store_entry *);
    void *user_;
};

namespace detail
{

inline void set_text(kvt_store_error &error, const char *text) noexcept
{
    const std::size_t n = std::strlen(text);
    const std::size_t fits = n < sizeof error.text ? n : sizeof error.text - 1;
    std::memcpy(error.text, text, fits);
    error.text[fits] = 0;
}

/* A call of a store's class. What it throws is a failure, with its text. */
template <class G> kvt_status store_call(kvt_store_error *error, G call) noexcept
{
#if KVT_HPP_EXCEPTIONS
    try {
        return call();
    } catch (const kvt::error &e) {
        set_text(*error, e.what());
        return e.status() == KVT_OK ? KVT_ERR_IO : e.status();
    } catch (const std::bad_alloc &) {
        set_text(*error, "no memory");
        return KVT_ERR_MEMORY;
    } catch (const std::exception &e) {
        set_text(*error, e.what());
        return KVT_ERR_IO;
    } catch (...) {
        set_text(*error, "the store has thrown something");
        return KVT_ERR_IO;
    }
#else
    (void)error;
    return call();
#endif
}

template <class T, class = void> struct has_list : std::false_type {
};
template <class T>
struct has_list<T, std::void_t<decltype(std::declval<T &>().list(
                       std::declval<entry_visitor>(), std::declval<kvt_store_error &>()))>>
    : std::true_type {
};
template <class T, class = void> struct has_stats : std::false_type {
};
template <class T>
struct has_stats<T, std::void_t<decltype(std::declval<T &>().stats(
                        std::declval<kvt_store_stats &>(), std::declval<kvt_store_error &>()))>>
    : std::true_type {
};
template <class T, class = void> struct has_collect : std::false_type {
};
template <class T>
struct has_collect<
    T, std::void_t<decltype(std::declval<T &>().collect(std::declval<kvt_store_error &>()))>>
    : std::true_type {
};

/* The kvt_store of an object, without its close. */
template <class T> kvt_store store_of(T &object) noexcept
{
    kvt_store s{};
    s.struct_size = sizeof s;
    s.user = address_of(object);
    s.get = [](void *user, const kvt_store_key *keys, std::size_t n,
               const kvt_store_receiver *receiver, kvt_store_error *error) noexcept {
        return store_call(error, [=] {
            return static_cast<T *>(user)->get(span<const kvt_store_key>(keys, n), *receiver,
                                               *error);
        });
    };
    s.put = [](void *user, const kvt_store_key *keys, const kvt_store_value *values, std::size_t n,
               std::size_t *n_put, kvt_store_error *error) noexcept {
        *n_put = 0;
        return store_call(error, [=] {
            return static_cast<T *>(user)->put(span<const kvt_store_key>(keys, n),
                                               span<const kvt_store_value>(values, n), *n_put,
                                               *error);
        });
    };
    s.exists = [](void *user, const kvt_store_key *keys, std::size_t n, std::uint8_t *found,
                  kvt_store_error *error) noexcept {
        return store_call(error, [=] {
            return static_cast<T *>(user)->exists(span<const kvt_store_key>(keys, n),
                                                  span<std::uint8_t>(found, n), *error);
        });
    };
    s.remove = [](void *user, const kvt_store_key *keys, std::size_t n,
                  kvt_store_error *error) noexcept {
        return store_call(error, [=] {
            return static_cast<T *>(user)->remove(span<const kvt_store_key>(keys, n), *error);
        });
    };
    if constexpr (has_list<T>::value)
        s.list = [](void *user, int (*on_entry)(void *, const kvt_store_entry *), void *entry_user,
                    kvt_store_error *error) noexcept {
            return store_call(error, [=] {
                return static_cast<T *>(user)->list(entry_visitor(on_entry, entry_user), *error);
            });
        };
    if constexpr (has_stats<T>::value)
        s.stats = [](void *user, kvt_store_stats *stats, kvt_store_error *error) noexcept {
            return store_call(error, [=] { return static_cast<T *>(user)->stats(*stats, *error); });
        };
    if constexpr (has_collect<T>::value)
        s.collect = [](void *user, kvt_store_error *error) noexcept {
            return store_call(error, [=] { return static_cast<T *>(user)->collect(*error); });
        };
    return s;
}

} // namespace detail

/* ---- stores ---- */

/* A store. kvt_store_close at its end. */
class store
{
  public:
    store() noexcept = default;
    /* Take over a C store. */
    explicit store(const kvt_store &s) noexcept : store_(s) {}
    store(store &&other) noexcept : store_(other.release()) {}
    store &operator=(store &&other) noexcept
    {
        store taken(std::move(other));
        taken.swap(*this);
        return *this;
    }
    store(const store &) = delete;
    store &operator=(const store &) = delete;
    ~store() { kvt_store_close(&store_); }
    void swap(store &other) noexcept { std::swap(store_, other.store_); }

    explicit operator bool() const noexcept { return store_.get != nullptr; }
    const kvt_store *get() const noexcept { return &store_; }
    /* Give it up: who calls closes it. */
    kvt_store release() noexcept { return std::exchange(store_, kvt_store{}); }

    /* -- opening. text (may be NULL): says why on failure -- */

    static result<store> try_open_directory(const kvt_directory_config &config,
                                            message *text = nullptr) noexcept
    {
        return opened(config, text, kvt_store_open_directory);
    }
    static result<store> try_open_redis(const kvt_redis_config &config = redis_config(),
                                        message *text = nullptr) noexcept
    {
        return opened(config, text, kvt_store_open_redis);
    }
    /* Takes over both on success, and neither on failure. */
    static result<store> try_open_tiers(store &&near_store, store &&far_store) noexcept
    {
        store both;
        kvt_status s = kvt_store_open_tiers(&near_store.store_, &far_store.store_, &both.store_);
        if (s != KVT_OK)
            return s;
        (void)near_store.release();
        (void)far_store.release();
        return result<store>(std::move(both));
    }
    /*
     * An object of a class of yours, kept by address, or owned and deleted at the store's end. The
     * class has kvt_store's functions as members, with references and spans in place of pointers:
     *
     *   kvt_status get(span<const kvt_store_key>, const kvt_store_receiver &, kvt_store_error &);
     *   kvt_status put(span<const kvt_store_key>, span<const kvt_store_value>, size_t &n_put,
     *                  kvt_store_error &);
     *   kvt_status exists(span<const kvt_store_key>, span<uint8_t> found, kvt_store_error &);
     *   kvt_status remove(span<const kvt_store_key>, kvt_store_error &);
     *
     * and, if it likes, list(entry_visitor, kvt_store_error &), stats(kvt_store_stats &,
     * kvt_store_error &), collect(kvt_store_error &). What they throw is KVT_ERR_IO with its
     * what(), the status of a kvt::error, or KVT_ERR_MEMORY for std::bad_alloc. n_at_once: gets
     * that gain by running at once.
     */
    template <class T> static store of(T &object, std::size_t n_at_once = 1) noexcept
    {
        kvt_store s = detail::store_of(object);
        s.n_at_once = n_at_once;
        return store(s);
    }
    template <class T>
    static store of(std::unique_ptr<T> object, std::size_t n_at_once = 1) noexcept
    {
        if (!object)
            return store();
        kvt_store s = detail::store_of(*object);
        s.n_at_once = n_at_once;
        s.close = [](void *user) noexcept { delete static_cast<T *>(user); };
        (void)object.release();
        return store(s);
    }

    /* -- prefixes -- */

    result<kvt_prefix_result>
    try_prefix_put(const sequence &seq,
                   const kvt_prefix_options &options = prefix_options()) const noexcept
    {
        kvt_prefix_result r{};
        return answer(kvt_prefix_put(&store_, seq.get(), &options, &r), r);
    }
    result<kvt_prefix_result>
    try_prefix_get(sequence &seq, span<const std::int32_t> prompt,
                   const prefix_options &options = prefix_options()) const noexcept
    {
        if (!options.has_positions_of(prompt.size()))
            return {KVT_ERR_ARG, "kvt::store::prefix_get: not as many positions as tokens"};
        kvt_prefix_result r{};
        return answer(
            kvt_prefix_get(&store_, seq.get(), sequence::some(prompt), prompt.size(), &options, &r),
            r);
    }
    result<kvt_prefix_result>
    try_prefix_probe(const sequence &seq, span<const std::int32_t> prompt,
                     const prefix_options &options = prefix_options()) const noexcept
    {
        if (!options.has_positions_of(prompt.size()))
            return {KVT_ERR_ARG, "kvt::store::prefix_probe: not as many positions as tokens"};
        kvt_prefix_result r{};
        return answer(kvt_prefix_probe(&store_, seq.get(), sequence::some(prompt), prompt.size(),
                                       &options, &r),
                      r);
    }

    /* -- the store itself. KVT_ERR_UNSUPPORTED: it has no such function. text: as above -- */

    result<kvt_store_stats> try_stats(message *text = nullptr) const noexcept
    {
        kvt_store_stats stats{};
        kvt_store_error error{};
        if (!store_.stats)
            return lacks<kvt_store_stats>("kvt::store::stats: the store has none");
        return answer(told(store_.stats(store_.user, &stats, &error), error, text), stats);
    }
    result<void> try_collect(message *text = nullptr) const noexcept
    {
        kvt_store_error error{};
        if (!store_.collect)
            return lacks<void>("kvt::store::collect: the store has none");
        return told(store_.collect(store_.user, &error), error, text);
    }
    /* visitor(const kvt_store_entry &), until it answers something true, if it answers at all. */
    template <class F> result<void> try_list(F &&visitor, message *text = nullptr) const
    {
        using function = std::remove_reference_t<F>;
        detail::callback<function> c(visitor);
        kvt_store_error error{};
        if (!store_.list)
            return lacks<void>("kvt::store::list: the store has none");
        kvt_status s = store_.list(
            store_.user,
            [](void *user, const kvt_store_entry *entry) noexcept {
                return detail::callback<function>::guarded(
                    user, 1, [entry](function &f) { return detail::answer_of(f, *entry); });
            },
            &c, &error);
        c.rethrow();
        return told(s, error, text);
    }

#if KVT_HPP_EXCEPTIONS
    /* -- the same, throwing kvt::error -- */

    static store open_directory(const kvt_directory_config &config)
    {
        message text;
        return checked(try_open_directory(config, &text), text);
    }
    static store open_redis(const kvt_redis_config &config = redis_config())
    {
        message text;
        return checked(try_open_redis(config, &text), text);
    }
    static store open_tiers(store &&near_store, store &&far_store)
    {
        return try_open_tiers(std::move(near_store), std::move(far_store)).value();
    }
    kvt_prefix_result prefix_put(const sequence &seq,
                                 const kvt_prefix_options &options = prefix_options()) const
    {
        auto r = try_prefix_put(seq, options);
        r.check(seq.cache_);
        return *r;
    }
    kvt_prefix_result prefix_get(sequence &seq, span<const std::int32_t> prompt,
                                 const prefix_options &options = prefix_options()) const
    {
        auto r = try_prefix_get(seq, prompt, options);
        r.check(seq.cache_);
        return *r;
    }
    kvt_prefix_result prefix_probe(const sequence &seq, span<const std::int32_t> prompt,
                                   const prefix_options &options = prefix_options()) const
    {
        auto r = try_prefix_probe(seq, prompt, options);
        r.check(seq.cache_);
        return *r;
    }
    kvt_store_stats stats() const
    {
        message text;
        return checked(try_stats(&text), text);
    }
    void collect() const
    {
        message text;
        detail::check_with(try_collect(&text), text);
    }
    template <class F> void list(F &&visitor) const
    {
        message text;
        detail::check_with(try_list(visitor, &text), text);
    }
#endif

  private:
    template <class C>
    static result<store> opened(const C &config, message *text,
                                kvt_status (*open)(const C *, kvt_store *)) noexcept
    {
        C c = config;
        store made;
        if (text && c.struct_size == sizeof c && !c.error_text) {
            c.error_text = text->text.data();
            c.error_text_bytes = text->text.size();
        }
        kvt_status s = open(&c, &made.store_);
        return s == KVT_OK ? result<store>(std::move(made)) : result<store>(s);
    }
    template <class T> static result<T> answer(kvt_status s, T &value) noexcept
    {
        return s == KVT_OK ? result<T>(std::move(value)) : result<T>(s);
    }
    static kvt_status told(kvt_status s, const kvt_store_error &error, message *text) noexcept
    {
        if (s != KVT_OK && text)
            *text = detail::to_message(error.text);
        return s;
    }
    template <class T> result<T> lacks(const char *why) const noexcept
    {
        return {*this ? KVT_ERR_UNSUPPORTED : KVT_ERR_ARG, *this ? why : nullptr};
    }
#if KVT_HPP_EXCEPTIONS
    template <class T> static T checked(result<T> r, const message &text)
    {
        detail::check_with(r, text);
        return *std::move(r);
    }
#endif

    kvt_store store_{};
};

/* kvt_value_check. key, text (may be NULL): as there. */
inline result<kvt_value_info> try_value_check(const kvt_store_key *key, bytes value,
                                              message *text = nullptr) noexcept
{
    kvt_value_info info{};
    info.struct_size = sizeof info;
    kvt_status s =
        kvt_value_check(key, value.data(), value.size(), &info, text ? text->text.data() : nullptr,
                        text ? text->text.size() : 0);
    return s == KVT_OK ? result<kvt_value_info>(std::move(info)) : result<kvt_value_info>(s);
}

#if KVT_HPP_EXCEPTIONS
inline kvt_value_info value_check(const kvt_store_key *key, bytes value)
{
    message text;
    auto r = try_value_check(key, value, &text);
    detail::check_with(r, text);
    return *r;
}
#endif

} // namespace kvt

#endif /* KVTILE_STORE_HPP */
