/*
 * kvtile for C++17 and newer: kvtile.h's caches, sequences and steps as objects that release
 * themselves. A header alone: link the C library.
 *
 *   kvt::group_config group;
 *   group.with_layers(32).with_heads(32, 8).with_dims(128).with_types(KVT_TYPE_I8);
 *   kvt::cache cache(kvt::config().with_group(group).with_max_tokens(32768));
 *   kvt::sequence seq = cache.create_sequence();
 *   kvt::step step = seq.begin_step(n);             // aborted unless it is committed
 *   for (uint32_t layer = 0; layer < 32; layer++) {
 *       seq.append(layer, k, v);                    // std::vector<float>, float *, ...
 *       cache.attend(layer, seq, q, out, n);
 *   }
 *   step.commit(token_ids);
 *
 * What a call means, its shapes, units and statuses, and which threads may make it at the same
 * time, is said in kvtile.h, at the C function of the same name; here is what C++ adds.
 *
 *  - Errors, by choice. A call that can fail has two forms. `seq.commit(ids)` throws kvt::error,
 *    with the status and the cache's text. `seq.try_commit(ids)` throws nothing and answers a
 *    kvt::result: the value, or the status. Neither is built on the other's means. Without
 *    exceptions (-fno-exceptions) only the try_ forms exist. As in C a call that fails changes
 *    nothing.
 *  - Owners (cache, sequence, step) can be moved, not copied. One that has been moved from, or
 *    made without arguments, is empty: it can be assigned to and destroyed, its counts are 0, and
 *    calls that can fail answer KVT_ERR_ARG.
 *  - Sequences may outlive their cache's handle, as in C: the memory goes with the last of them.
 *  - Nothing is allocated or copied but by the C calls. kvt::span, kvt::bytes, kvt::input and
 *    kvt::output are views: what they are made of has to live as long as the call, or as the plan
 *    or configuration that they are put in.
 *  - Numbers of elements are taken from spans where kvtile.h has a count beside a pointer, and
 *    checked where the library knows the count (token ids of a commit, positions of a prompt).
 *    Tensors have no sizes: shapes are kvtile.h's.
 *  - Callbacks may throw: the C call ends with an error first, then the exception goes on, from
 *    the try_ forms too. Those of an executor must not: its call cannot end before all tasks have
 *    run.
 *  - get() is the C object, for calls of the C API.
 */
#ifndef KVTILE_KVTILE_HPP
#define KVTILE_KVTILE_HPP

#if __cplusplus < 201703L
#error "kvtile.hpp needs C++17"
#endif

#include "kvtile.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <optional>
#include <type_traits>
#include <utility>

#if defined(__cpp_exceptions) || defined(__EXCEPTIONS)
#define KVT_HPP_EXCEPTIONS 1
#else
#define KVT_HPP_EXCEPTIONS 0
#endif

namespace kvt
{

using status = kvt_status;

/* One sentence for a status; never NULL. */
inline const char *to_string(status s) noexcept
{
    return kvt_status_string(s);
}

/* ---- views ---- */

namespace detail
{

/* Whether C has contiguous elements that a T * can point to. */
template <class C, class T, class = void> struct holds : std::false_type {
};

template <class C, class T>
struct holds<
    C, T,
    std::void_t<decltype(std::data(std::declval<C &>())), decltype(std::size(std::declval<C &>()))>>
    : std::is_convertible<std::remove_pointer_t<decltype(std::data(std::declval<C &>()))> (*)[],
                          T (*)[]> {
};

/* A pointer to what a T * can point to; NULL as nullptr alone: a literal 0 is a number. */
template <class P, class T>
inline constexpr bool points_to =
    (std::is_pointer_v<P> && std::is_convertible_v<P, T *>) || std::is_null_pointer_v<P>;

/* Where C is a view: whose elements can be written though it is a temporary. */
template <class C, class T>
inline constexpr bool is_view =
    !std::is_lvalue_reference_v<C> && holds<const std::remove_reference_t<C>, T>::value;

template <class C> using element = std::remove_pointer_t<decltype(std::data(std::declval<C &>()))>;

/* Whether C has contiguous elements whose bytes can be copied; writable ones where asked for. */
template <class C, bool writable, class = void> struct has_bytes : std::false_type {
};

template <class C>
inline constexpr bool is_text = std::is_array_v<std::remove_reference_t<C>>
    &&std::is_same_v<std::remove_cv_t<element<C>>, char>;

template <class C, bool writable>
struct has_bytes<C, writable, std::void_t<element<C>, decltype(std::size(std::declval<C &>()))>>
    : std::bool_constant<std::is_trivially_copyable_v<element<C>> &&
                         (!writable || !std::is_const_v<element<C>>)&&!is_text<C>> {
};

} // namespace detail

/*
 * Elements in a row: std::span, which C++17 does not have. Made of std::vector, std::array,
 * std::span, arrays, or a pointer and a count; of temporaries only as span<const T>, or where they
 * are views. {0, 3} is neither two elements nor a pointer, and refused.
 */
template <class T> class span
{
  public:
    using element_type = T;
    using value_type = std::remove_cv_t<T>;

    constexpr span() noexcept = default;
    template <class P, class = std::enable_if_t<detail::points_to<P, T>>>
    constexpr span(P data, std::size_t size) noexcept : data_(data), size_(size)
    {
    }
    template <class C,
              class = std::enable_if_t<
                  detail::holds<std::remove_reference_t<C>, T>::value &&
                  !std::is_same_v<std::remove_cv_t<std::remove_reference_t<C>>, span> &&
                  (std::is_lvalue_reference_v<C> || std::is_const_v<T> || detail::is_view<C, T>)>>
    constexpr span(C &&elements) noexcept : data_(std::data(elements)), size_(std::size(elements))
    {
    }

    constexpr T *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr T *begin() const noexcept { return data_; }
    constexpr T *end() const noexcept { return data_ + size_; }
    constexpr T &operator[](std::size_t i) const noexcept { return data_[i]; }

  private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};

template <class T> span(T *, std::size_t) -> span<T>;

/*
 * Bytes to read: of contiguous elements that can be copied as bytes, of a string, or of a pointer's
 * up to the first zero. A literal, or another array of const char, has all of its elements but a
 * zero at its end. One that is not const may hold a shorter text, or none, and is refused: give its
 * size, {array, n}, or make a std::string_view of the text.
 */
class bytes
{
  public:
    constexpr bytes() noexcept = default;
    template <class P, class = std::enable_if_t<detail::points_to<P, const void>>>
    constexpr bytes(P data, std::size_t size) noexcept : data_(data), size_(size)
    {
    }
    constexpr bytes(std::nullptr_t) noexcept {}
    /* A template, so that an array is not taken for a pointer. */
    template <class P, std::enable_if_t<
                           std::is_same_v<P, const char *> || std::is_same_v<P, char *>, int> = 0>
    bytes(const P &text) noexcept : data_(text), size_(text ? std::strlen(text) : 0)
    {
    }
    template <std::size_t n>
    constexpr bytes(const char (&text)[n]) noexcept : data_(text), size_(text[n - 1] ? n : n - 1)
    {
    }
    template <std::size_t n> bytes(char (&text)[n]) = delete;
    template <class C, class = std::enable_if_t<detail::has_bytes<const C, false>::value>>
    constexpr bytes(const C &elements) noexcept
        : data_(std::data(elements)), size_(std::size(elements) * sizeof *std::data(elements))
    {
    }
    constexpr const void *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }

  private:
    const void *data_ = nullptr;
    std::size_t size_ = 0;
};

/* Bytes to write. */
class buffer
{
  public:
    constexpr buffer() noexcept = default;
    template <class P, class = std::enable_if_t<detail::points_to<P, void>>>
    constexpr buffer(P data, std::size_t size) noexcept : data_(data), size_(size)
    {
    }
    template <class C, class = std::enable_if_t<detail::has_bytes<C, true>::value &&
                                                !std::is_same_v<C, buffer>>>
    constexpr buffer(C &elements) noexcept
        : data_(std::data(elements)), size_(std::size(elements) * sizeof *std::data(elements))
    {
    }
    /* Of a temporary that is a view. */
    template <class C, std::enable_if_t<!std::is_lvalue_reference_v<C> &&
                                            detail::has_bytes<const C, true>::value,
                                        int> = 0>
    constexpr buffer(C &&elements) noexcept
        : data_(std::data(elements)), size_(std::size(elements) * sizeof *std::data(elements))
    {
    }
    constexpr void *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }

  private:
    void *data_ = nullptr;
    std::size_t size_ = 0;
};

/* A path: const char *, std::string, std::filesystem::path (where its characters are char). */
class path
{
  public:
    path(const char *text) noexcept : text_(text) {}
    template <class S, class = std::enable_if_t<std::is_convertible_v<
                           decltype(std::declval<const S &>().c_str()), const char *>>>
    path(const S &text) noexcept : text_(text.c_str())
    {
    }
    const char *c_str() const noexcept { return text_; }

  private:
    const char *text_;
};

/*
 * Keys, values or queries: [n_tokens][n_heads][dims], dims contiguous (kvt_tensor). A pointer or
 * container of float is f32; half floats by f16 and bf16. Dense but for with_strides.
 */
struct input : kvt_tensor {
    input(const kvt_tensor &tensor) noexcept : kvt_tensor(tensor) {}
    input(const float *values) noexcept : kvt_tensor(kvt_tensor_f32(values)) {}
    template <class C, class = std::enable_if_t<detail::holds<const C, const float>::value>>
    input(const C &elements) noexcept : kvt_tensor(kvt_tensor_f32(std::data(elements)))
    {
    }
    static input f16(const void *values) noexcept { return of(values, KVT_F16); }
    static input bf16(const void *values) noexcept { return of(values, KVT_BF16); }
    /* Bytes from one token, or head, to the next. */
    input with_strides(std::int64_t token, std::int64_t head) const noexcept
    {
        input other = *this;
        other.token_stride = token;
        other.head_stride = head;
        return other;
    }

  private:
    static input of(const void *values, kvt_dtype type) noexcept
    {
        input tensor(static_cast<const float *>(values));
        tensor.dtype = type;
        return tensor;
    }
};

/* The same for results, which are written. */
struct output : kvt_tensor {
    output(const kvt_tensor &tensor) noexcept : kvt_tensor(tensor) {}
    output(const input &) = delete; /* which may be of what is const */
    output(float *values) noexcept : kvt_tensor(kvt_tensor_f32(values)) {}
    template <class C, class = std::enable_if_t<detail::holds<C, float>::value>>
    output(C &elements) noexcept : kvt_tensor(kvt_tensor_f32(std::data(elements)))
    {
    }
    /* Of a temporary that is a view. */
    template <class C, std::enable_if_t<detail::is_view<C, float>, int> = 0>
    output(C &&elements) noexcept : kvt_tensor(kvt_tensor_f32(std::data(elements)))
    {
    }
    static output f16(void *values) noexcept { return of(values, KVT_F16); }
    static output bf16(void *values) noexcept { return of(values, KVT_BF16); }
    output with_strides(std::int64_t token, std::int64_t head) const noexcept
    {
        output other = *this;
        other.token_stride = token;
        other.head_stride = head;
        return other;
    }

  private:
    static output of(void *values, kvt_dtype type) noexcept
    {
        output tensor(static_cast<float *>(values));
        tensor.dtype = type;
        return tensor;
    }
};

namespace detail
{

/* A callable, or a function, as C's user pointer, and back. */
template <class F> void *address_of(F &function) noexcept
{
    if constexpr (std::is_function_v<F>)
        return reinterpret_cast<void *>(&function);
    else
        return const_cast<void *>(static_cast<const void *>(&function));
}

template <class F> F &function_at(void *user) noexcept
{
    if constexpr (std::is_function_v<F>)
        return *reinterpret_cast<F *>(user);
    else
        return *static_cast<F *>(user);
}

} // namespace detail

/* ---- errors ---- */

/* A text, cut to what fits. */
struct message {
    std::array<char, 256> text{};

    const char *c_str() const noexcept { return text.data(); }
};

namespace detail
{

inline message to_message(const char *text) noexcept
{
    message m;
    std::size_t n = std::strlen(text);
    std::memcpy(m.text.data(), text, n < m.text.size() ? n : m.text.size() - 1);
    return m;
}

/* Why a call failed: what this header says, the cache's text, or the status's sentence. */
inline message reason(status s, const char *why, const kvt_cache *cache) noexcept
{
    message m;
    if (why)
        return to_message(why);
    if (kvt_cache_error(cache, m.text.data(), m.text.size()) == KVT_OK && m.text[0])
        return m;
    return to_message(kvt_status_string(s));
}

} // namespace detail

#if KVT_HPP_EXCEPTIONS
/*
 * What the throwing forms throw. what() is the cache's text of the failure (kvt_cache_error: with
 * several threads that of the last failure of any of them).
 */
class error : public std::exception
{
  public:
    error(kvt::status s, const message &text) noexcept : status_(s), text_(text) {}
    kvt::status status() const noexcept { return status_; }
    const char *what() const noexcept override { return text_.c_str(); }

  private:
    kvt::status status_;
    message text_;
};
#endif

/*
 * What the try_ forms answer: a value, or why there is none. Test it before the value is used.
 *
 * status()  KVT_OK where there is a value
 * why()     a sentence for the status; the cache's text, with the details, is cache::last_error
 * *r, r->   the value; take a cache or sequence out with *std::move(r)
 * value()   the value, or throws kvt::error
 */
template <class T> class [[nodiscard]] result
{
  public:
    result(T &&value) noexcept : value_(std::move(value)) {}
    result(kvt::status s, const char *why = nullptr) noexcept : status_(s), why_(why) {}
    explicit operator bool() const noexcept { return status_ == KVT_OK; }
    kvt::status status() const noexcept { return status_; }
    const char *why() const noexcept { return why_ ? why_ : kvt_status_string(status_); }
    T &operator*() &noexcept { return value_; }
    const T &operator*() const &noexcept { return value_; }
    T &&operator*() &&noexcept { return std::move(value_); }
    T *operator->() noexcept { return &value_; }
    const T *operator->() const noexcept { return &value_; }
#if KVT_HPP_EXCEPTIONS
    T &value() &
    {
        check(nullptr);
        return value_;
    }
    T &&value() &&
    {
        check(nullptr);
        return std::move(value_);
    }
    /* Throws unless there is a value, with the cache's text. */
    void check(const kvt_cache *cache) const
    {
        if (status_ != KVT_OK)
            throw error(status_, detail::reason(status_, why_, cache));
    }
#endif

  private:
    kvt::status status_ = KVT_OK;
    const char *why_ = nullptr;
    T value_{};
};

template <> class [[nodiscard]] result<void>
{
  public:
    result(kvt::status s, const char *why = nullptr) noexcept : status_(s), why_(why) {}
    explicit operator bool() const noexcept { return status_ == KVT_OK; }
    kvt::status status() const noexcept { return status_; }
    const char *why() const noexcept { return why_ ? why_ : kvt_status_string(status_); }
#if KVT_HPP_EXCEPTIONS
    void value() const
    {
        check(nullptr);
    }
    void check(const kvt_cache *cache) const
    {
        if (status_ != KVT_OK)
            throw error(status_, detail::reason(status_, why_, cache));
    }
#endif

  private:
    kvt::status status_;
    const char *why_;
};

/* ---- configuration ---- */

/*
 * kvt_group_config with its defaults: one layer group. All its fields are there; the calls set
 * those that belong together, and can be chained.
 */
struct group_config : kvt_group_config {
    group_config() noexcept : kvt_group_config(kvt_group_config_init()) {}
    group_config(const kvt_group_config &group) noexcept : kvt_group_config(group) {}
    group_config &with_layers(std::uint32_t n) noexcept
    {
        n_layers = n;
        return *this;
    }
    /* The model's numbers of these layers, ascending. A view. */
    group_config &with_layer_numbers(span<const std::uint32_t> numbers) noexcept
    {
        layers = numbers.data();
        n_layers = static_cast<std::uint32_t>(numbers.size());
        return *this;
    }
    group_config &with_heads(std::uint32_t n_query_heads, std::uint32_t n_key_value_heads) noexcept
    {
        n_q_heads = n_query_heads;
        n_kv_heads = n_key_value_heads;
        return *this;
    }
    group_config &with_dims(std::uint32_t k, std::uint32_t v) noexcept
    {
        k_dim = k;
        v_dim = v;
        return *this;
    }
    group_config &with_dims(std::uint32_t both) noexcept { return with_dims(both, both); }
    group_config &with_types(kvt_type k, kvt_type v) noexcept
    {
        k_type = k;
        v_type = v;
        return *this;
    }
    group_config &with_types(kvt_type both) noexcept { return with_types(both, both); }
    group_config &with_window(std::uint32_t tokens, std::uint32_t sinks = 0) noexcept
    {
        window_tokens = tokens;
        sink_tokens = sinks;
        return *this;
    }
    /* For sequence::remove. inverse_frequencies: one a pair of dims, from first_dim on. A view. */
    group_config &with_rope(kvt_rope pairing, span<const float> inverse_frequencies = {},
                            std::uint32_t first_dim = 0) noexcept
    {
        rope_pairing = pairing;
        rope_first_dim = first_dim;
        rope_dims = static_cast<std::uint32_t>(2 * inverse_frequencies.size());
        rope_inverse_frequencies = inverse_frequencies.data();
        return *this;
    }
};

static_assert(sizeof(group_config) == sizeof(kvt_group_config),
              "groups are an array of the C type");

/*
 * A parallel-for of the caller's as kvt_executor: parallel_for(n_tasks, body) calls body(i) once
 * for each i < n_tasks, from any threads, and returns when all are done. It is kept by address,
 * for as long as the cache lives, and must not throw.
 */
template <class F> kvt_executor executor_of(F &parallel_for, std::uint32_t n_threads) noexcept
{
    kvt_executor e{};
    e.user = detail::address_of(parallel_for);
    e.run = [](void *user, void (*task)(void *, std::size_t), void *arg,
               std::size_t n_tasks) noexcept {
        detail::function_at<F>(user)(n_tasks, [task, arg](std::size_t i) { task(arg, i); });
    };
    e.n_threads = n_threads;
    return e;
}

/*
 * kvt_config with its defaults. Views of groups and fingerprint: they have to live until the cache
 * has been made, which copies them.
 */
struct config : kvt_config {
    config() noexcept : kvt_config(kvt_config_init()) {}
    config(const kvt_config &c) noexcept : kvt_config(c) {}
    config &with_group(const kvt_group_config &group) noexcept
    {
        groups = &group;
        n_groups = 1;
        return *this;
    }
    config &with_groups(span<const group_config> all) noexcept
    {
        groups = all.data();
        n_groups = static_cast<std::uint32_t>(all.size());
        return *this;
    }
    config &with_max_tokens(std::uint64_t tokens) noexcept
    {
        max_tokens = tokens;
        return *this;
    }
    config &with_threads(std::uint32_t n) noexcept
    {
        n_threads = n;
        return *this;
    }
    config &with_executor(const kvt_executor &e) noexcept
    {
        executor = e;
        return *this;
    }
    config &with_allocator(const kvt_allocator &a) noexcept
    {
        allocator = a;
        return *this;
    }
    config &with_budget(std::uint64_t budget_bytes) noexcept
    {
        memory_budget_bytes = budget_bytes;
        return *this;
    }
    config &with_fingerprint(bytes fingerprint_of_weights) noexcept
    {
        fingerprint = fingerprint_of_weights.data();
        fingerprint_bytes = fingerprint_of_weights.size();
        return *this;
    }
    config &with_isa(const char *name) noexcept
    {
        isa = name;
        return *this;
    }
};

/* kvt_group_split_ends: two groups of one. view() is the one or two that it has. */
struct split_groups {
    std::array<group_config, 2> groups;
    std::uint32_t n = 0;

    span<const group_config> view() const noexcept { return {groups.data(), n}; }
};

/* layers: room for group.n_layers numbers; the groups point into it. */
inline result<split_groups> try_split_ends(const kvt_group_config &group, std::uint32_t n_first,
                                           std::uint32_t n_last, kvt_type k_type, kvt_type v_type,
                                           span<std::uint32_t> layers) noexcept
{
    split_groups split;
    if (layers.size() < group.n_layers)
        return {KVT_ERR_ARG, "kvt::split_ends: no room for the layers' numbers"};
    kvt_status s = kvt_group_split_ends(&group, n_first, n_last, k_type, v_type,
                                        split.groups.data(), &split.n, layers.data());
    return s == KVT_OK ? result<split_groups>(std::move(split)) : result<split_groups>(s);
}

#if KVT_HPP_EXCEPTIONS
inline split_groups split_ends(const kvt_group_config &group, std::uint32_t n_first,
                               std::uint32_t n_last, kvt_type k_type, kvt_type v_type,
                               span<std::uint32_t> layers)
{
    return try_split_ends(group, n_first, n_last, k_type, v_type, layers).value();
}
#endif

/* ---- library ---- */

inline const char *version() noexcept
{
    return kvt_version();
}

/* NULL from the end of the list on. */
inline const char *isa_name(std::uint32_t index) noexcept
{
    return kvt_isa_name(index);
}

namespace detail
{

/* A config that says why it failed: into `text`, unless it has a place of its own. */
inline kvt_config reporting(const kvt_config &config, message &text) noexcept
{
    kvt_config c = config;
    if (c.struct_size == sizeof c && !c.error_text) {
        c.error_text = text.text.data();
        c.error_text_bytes = text.text.size();
    }
    return c;
}

#if KVT_HPP_EXCEPTIONS
[[noreturn]] inline void fail(const kvt_config &config, kvt_status s)
{
    const char *text = config.error_text;
    throw error(s, to_message(text && text[0] ? text : kvt_status_string(s)));
}
#endif

} // namespace detail

inline result<std::uint64_t> try_memory_forecast(const kvt_config &config,
                                                 std::uint64_t n_sequences,
                                                 std::uint64_t n_tokens) noexcept
{
    std::uint64_t n = 0;
    kvt_status s = kvt_memory_forecast(&config, n_sequences, n_tokens, &n);
    return s == KVT_OK ? result<std::uint64_t>(std::move(n)) : result<std::uint64_t>(s);
}

inline result<std::uint64_t> try_working_forecast(const kvt_config &config,
                                                  std::uint64_t n_tokens) noexcept
{
    std::uint64_t n = 0;
    kvt_status s = kvt_working_forecast(&config, n_tokens, &n);
    return s == KVT_OK ? result<std::uint64_t>(std::move(n)) : result<std::uint64_t>(s);
}

#if KVT_HPP_EXCEPTIONS
inline std::uint64_t memory_forecast(const kvt_config &config, std::uint64_t n_sequences,
                                     std::uint64_t n_tokens)
{
    message text;
    kvt_config c = detail::reporting(config, text);
    auto r = try_memory_forecast(c, n_sequences, n_tokens);
    if (!r)
        detail::fail(c, r.status());
    return *r;
}

inline std::uint64_t working_forecast(const kvt_config &config, std::uint64_t n_tokens)
{
    message text;
    kvt_config c = detail::reporting(config, text);
    auto r = try_working_forecast(c, n_tokens);
    if (!r)
        detail::fail(c, r.status());
    return *r;
}
#endif

/* ---- callbacks ---- */

namespace detail
{

/*
 * A callable behind a void *. What it throws is kept, the C call is told that it failed, and
 * rethrow() lets it go on.
 */
template <class F> struct callback {
    F *function;
#if KVT_HPP_EXCEPTIONS
    std::exception_ptr thrown;
#endif

    explicit callback(F &f) noexcept
        : function(&f)
#if KVT_HPP_EXCEPTIONS
          ,
          thrown()
#endif
    {
    }

    template <class R, class G> static R guarded(void *user, R failed, G call) noexcept
    {
        callback *self = static_cast<callback *>(user);
#if KVT_HPP_EXCEPTIONS
        try {
            return call(*self->function);
        } catch (...) {
            self->thrown = std::current_exception();
            return failed;
        }
#else
        (void)failed;
        return call(*self->function);
#endif
    }

    void rethrow() const
    {
#if KVT_HPP_EXCEPTIONS
        if (thrown)
            std::rethrow_exception(thrown);
#endif
    }
};

} // namespace detail

/* ---- snapshots: options, and what needs no sequence ---- */

namespace detail
{

/* What a callback answers to C: 0 goes on. One that answers nothing always does. */
template <class F, class... A> int answer_of(F &function, const A &...arguments)
{
    if constexpr (std::is_void_v<decltype(function(arguments...))>) {
        function(arguments...);
        return 0;
    } else {
        return function(arguments...) ? 1 : 0;
    }
}

/* These may throw: they are called by a `guarded`, which catches it, and never by C. */
template <class F> int call_progress(void *user, std::uint64_t done, std::uint64_t total)
{
    return answer_of(function_at<F>(user), done, total);
}

template <class F> int call_piece(void *user, const kvt_snapshot_piece *piece)
{
    return answer_of(function_at<F>(user), *piece);
}

/*
 * A copy of options whose callbacks are this object's: what they throw is kept, the C call is told
 * to end, and rethrow() lets it go on.
 */
template <class O> class guarded
{
  public:
    explicit guarded(const O &options) noexcept : options_(options), copy_(options)
    {
        if (options.struct_size != sizeof options)
            return; /* what it has is not known; the call says so */
        if (options.progress) {
            copy_.progress = [](void *user, std::uint64_t done, std::uint64_t total) noexcept {
                auto *self = static_cast<guarded *>(user);
                return self->keep([=] {
                    return self->options_.progress(self->options_.progress_user, done, total);
                });
            };
            copy_.progress_user = this;
        }
        if constexpr (!std::is_same_v<O, kvt_save_options>) {
            if (options.on_piece) {
                copy_.on_piece = [](void *user, const kvt_snapshot_piece *piece) noexcept {
                    auto *self = static_cast<guarded *>(user);
                    return self->keep(
                        [=] { return self->options_.on_piece(self->options_.piece_user, piece); });
                };
                copy_.piece_user = this;
            }
        }
    }
    guarded(const guarded &) = delete;
    guarded &operator=(const guarded &) = delete;
    const O *get() const noexcept { return &copy_; }
    void rethrow() const
    {
#if KVT_HPP_EXCEPTIONS
        if (thrown_)
            std::rethrow_exception(thrown_);
#endif
    }

  private:
    template <class G> int keep(G call) noexcept
    {
#if KVT_HPP_EXCEPTIONS
        try {
            return call();
        } catch (...) {
            thrown_ = std::current_exception();
            return 1;
        }
#else
        return call();
#endif
    }

    const O &options_;
    O copy_;
#if KVT_HPP_EXCEPTIONS
    std::exception_ptr thrown_;
#endif
};

/* One of each type, and last one of no type: what the library refuses. */
inline constexpr kvt_type each_type[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8,
                                         KVT_TYPE_I4,  KVT_TYPE_I5,  static_cast<kvt_type>(5)};

inline const kvt_type *uniform_type(kvt_type type) noexcept
{
    const auto at = static_cast<std::size_t>(type);
    return &each_type[at < std::size(each_type) ? at : std::size(each_type) - 1];
}

/* Of no layers, too, a pointer that is not NULL: that stands for all of them. */
inline constexpr std::uint32_t no_layer = 0;

inline const std::uint32_t *chosen_layers(span<const std::uint32_t> layers) noexcept
{
    return layers.empty() ? &no_layer : layers.data();
}

/* What is put behind a container's elements, and taken away again unless it is kept. */
template <class C> struct added {
    explicit added(C &of) noexcept : memory(of), before(of.size()) {}
    added(const added &) = delete;
    added &operator=(const added &) = delete;
    ~added()
    {
        if (!keep)
            memory.erase(
                std::next(memory.begin(), static_cast<typename C::difference_type>(before)),
                memory.end());
    }
    C &memory;
    typename C::size_type before;
    bool keep = false;
};

} // namespace detail

/* Bytes that travel with a snapshot. Views, of the name too, which ends with a zero. */
struct snapshot_piece : kvt_snapshot_piece {
    snapshot_piece(const char *piece_name, kvt::bytes contents) noexcept : kvt_snapshot_piece{}
    {
        name = piece_name;
        data = contents.data();
        bytes = contents.size();
    }
    snapshot_piece(const kvt_snapshot_piece &piece) noexcept : kvt_snapshot_piece(piece) {}
};

static_assert(sizeof(snapshot_piece) == sizeof(kvt_snapshot_piece),
              "pieces are an array of the C type");

/* A key for encrypted snapshots: std::array of so many bytes, or an array. A view. */
class key
{
  public:
    key(const std::array<unsigned char, KVT_KEY_BYTES> &secret) noexcept : data_(secret.data()) {}
    key(const unsigned char (&secret)[KVT_KEY_BYTES]) noexcept : data_(secret) {}
    const unsigned char *data() const noexcept { return data_; }

  private:
    const unsigned char *data_;
};

/*
 * kvt_save_options with its defaults; what is given by pointers are views.
 *
 * Callables here and in the options below are kept by address. They are called by the calls of this
 * header alone, which let go on what they throw; options whose callables throw are not for C's.
 */
struct save_options : kvt_save_options {
    save_options() noexcept : kvt_save_options{} { struct_size = sizeof(kvt_save_options); }
    save_options(const kvt_save_options &options) noexcept : kvt_save_options(options) {}
    save_options &with_codec(std::uint32_t kvt_codec) noexcept
    {
        codec = kvt_codec;
        return *this;
    }
    save_options &with_level(std::int32_t level) noexcept
    {
        zstd_level = level;
        return *this;
    }
    save_options &with_fsync(bool wait) noexcept
    {
        no_fsync = wait ? 0 : 1;
        return *this;
    }
    save_options &with_in_place(bool yes) noexcept
    {
        in_place = yes ? 1 : 0;
        return *this;
    }
    /* n tokens from `first` on; 0: all to the end. */
    save_options &with_tokens(std::uint64_t first, std::uint64_t n = 0) noexcept
    {
        first_token = first;
        n_tokens = n;
        return *this;
    }
    /* No layer is refused by the call that takes the options: NULL would be all of them. */
    save_options &with_layers(span<const std::uint32_t> ascending) noexcept
    {
        layers = detail::chosen_layers(ascending);
        n_layers = static_cast<std::uint32_t>(ascending.size());
        return *this;
    }
    /*
     * Convert: one type for each group of the cache; one of both may be empty: as they are. Two of
     * different sizes are refused by the call that takes the options.
     */
    save_options &with_types(span<const kvt_type> k, span<const kvt_type> v) noexcept
    {
        const std::size_t n = k.size() ? k.size() : v.size();
        convert = 1;
        n_types = v.size() && v.size() != n ? UINT32_MAX : static_cast<std::uint32_t>(n);
        k_types = k.size() ? k.data() : nullptr;
        v_types = v.size() ? v.data() : nullptr;
        return *this;
    }
    /* Convert: all groups to these; {}: as they are. */
    save_options &with_types(std::optional<kvt_type> k, std::optional<kvt_type> v) noexcept
    {
        convert = 1;
        n_types = 1;
        k_types = k ? detail::uniform_type(*k) : nullptr;
        v_types = v ? detail::uniform_type(*v) : nullptr;
        return *this;
    }
    save_options &with_parent(path snapshot) noexcept
    {
        parent = snapshot.c_str();
        return *this;
    }
    save_options &with_pieces(span<const snapshot_piece> all) noexcept
    {
        pieces = all.data();
        n_pieces = all.size();
        return *this;
    }
    save_options &with_key(kvt::key secret) noexcept
    {
        key = secret.data();
        return *this;
    }
    /* function(done, total) in bytes; if it answers something true, the call is cancelled. */
    template <class F> save_options &with_progress(F &function) noexcept
    {
        progress = detail::call_progress<F>;
        progress_user = detail::address_of(function);
        return *this;
    }
};

/* kvt_load_options with its defaults, likewise. */
struct load_options : kvt_load_options {
    load_options() noexcept : kvt_load_options{} { struct_size = sizeof(kvt_load_options); }
    load_options(const kvt_load_options &options) noexcept : kvt_load_options(options) {}
    /* The whole prompt's token ids, from token 0 on; the result says how to go on with it. */
    load_options &with_prompt(span<const std::int32_t> ids) noexcept
    {
        prompt = ids.data();
        n_prompt = ids.size();
        return *this;
    }
    load_options &with_reuse(std::uint32_t kvt_reuse) noexcept
    {
        reuse = kvt_reuse;
        return *this;
    }
    load_options &with_map(std::uint32_t kvt_map) noexcept
    {
        map = kvt_map;
        return *this;
    }
    load_options &with_convert(bool yes) noexcept
    {
        convert = yes ? 1 : 0;
        return *this;
    }
    /* No layer is refused, likewise. */
    load_options &with_layers(span<const std::uint32_t> ascending) noexcept
    {
        layers = detail::chosen_layers(ascending);
        n_layers = static_cast<std::uint32_t>(ascending.size());
        return *this;
    }
    load_options &with_folder(path of_parents) noexcept
    {
        folder = of_parents.c_str();
        return *this;
    }
    load_options &with_key(kvt::key secret) noexcept
    {
        key = secret.data();
        return *this;
    }
    /* function(const kvt_snapshot_piece &); true cancels, as with_progress. */
    template <class F> load_options &with_pieces(F &function) noexcept
    {
        on_piece = detail::call_piece<F>;
        piece_user = detail::address_of(function);
        return *this;
    }
    template <class F> load_options &with_progress(F &function) noexcept
    {
        progress = detail::call_progress<F>;
        progress_user = detail::address_of(function);
        return *this;
    }
};

/* kvt_inspect_options with its defaults, likewise. */
struct inspect_options : kvt_inspect_options {
    inspect_options() noexcept : kvt_inspect_options{}
    {
        struct_size = sizeof(kvt_inspect_options);
    }
    inspect_options(const kvt_inspect_options &options) noexcept : kvt_inspect_options(options) {}
    inspect_options &with_verify(bool yes) noexcept
    {
        verify = yes ? 1 : 0;
        return *this;
    }
    inspect_options &with_folder(path of_parents) noexcept
    {
        folder = of_parents.c_str();
        return *this;
    }
    inspect_options &with_key(kvt::key secret) noexcept
    {
        key = secret.data();
        return *this;
    }
    /* function(const kvt_snapshot_piece &); true cancels. With verify. */
    template <class F> inspect_options &with_pieces(F &function) noexcept
    {
        on_piece = detail::call_piece<F>;
        piece_user = detail::address_of(function);
        return *this;
    }
    template <class F> inspect_options &with_progress(F &function) noexcept
    {
        progress = detail::call_progress<F>;
        progress_user = detail::address_of(function);
        return *this;
    }
};

/* kvt_snapshot_inspect. text (may be NULL): says why on failure. */
inline result<kvt_snapshot_info> try_inspect(path file, bool verify,
                                             message *text = nullptr) noexcept
{
    kvt_snapshot_info info{};
    info.struct_size = sizeof info;
    kvt_status s =
        kvt_snapshot_inspect(file.c_str(), verify, &info, text ? text->text.data() : nullptr,
                             text ? text->text.size() : 0);
    return s == KVT_OK ? result<kvt_snapshot_info>(std::move(info)) : result<kvt_snapshot_info>(s);
}

/* C's way, a pointer to options, would be a bool. */
template <class T>
result<kvt_snapshot_info> try_inspect(path file, T *options, message *text = nullptr) = delete;

/* kvt_snapshot_inspect_with. */
inline result<kvt_snapshot_info> try_inspect(path file, const inspect_options &options,
                                             message *text = nullptr)
{
    detail::guarded<kvt_inspect_options> with(options);
    kvt_snapshot_info info{};
    info.struct_size = sizeof info;
    kvt_status s =
        kvt_snapshot_inspect_with(file.c_str(), with.get(), &info,
                                  text ? text->text.data() : nullptr, text ? text->text.size() : 0);
    with.rethrow();
    return s == KVT_OK ? result<kvt_snapshot_info>(std::move(info)) : result<kvt_snapshot_info>(s);
}

/* kvt_snapshot_convert. text (may be NULL): says why on failure. */
inline result<void> try_convert(path from, path to, const save_options &to_options = save_options(),
                                const load_options &from_options = load_options(),
                                message *text = nullptr)
{
    detail::guarded<kvt_load_options> reads(from_options);
    detail::guarded<kvt_save_options> writes(to_options);
    kvt_status s =
        kvt_snapshot_convert(from.c_str(), reads.get(), to.c_str(), writes.get(),
                             text ? text->text.data() : nullptr, text ? text->text.size() : 0);
    reads.rethrow();
    writes.rethrow();
    return s;
}

#if KVT_HPP_EXCEPTIONS
namespace detail
{

template <class R> void check_with(const R &r, const message &text)
{
    if (!r)
        throw error(r.status(), text.text[0] ? text : to_message(r.why()));
}

} // namespace detail

inline kvt_snapshot_info inspect(path file, bool verify)
{
    message text;
    auto r = try_inspect(file, verify, &text);
    detail::check_with(r, text);
    return *r;
}

template <class T> kvt_snapshot_info inspect(path file, T *options) = delete;

inline kvt_snapshot_info inspect(path file, const inspect_options &options)
{
    message text;
    auto r = try_inspect(file, options, &text);
    detail::check_with(r, text);
    return *r;
}

inline void convert(path from, path to, const save_options &to_options = save_options(),
                    const load_options &from_options = load_options())
{
    message text;
    detail::check_with(try_convert(from, to, to_options, from_options, &text), text);
}
#endif

/* ---- sequences ---- */

class cache;
class step;
class store; /* of store.hpp, as the next one */
struct prefix_options;

/*
 * A sequence of a cache; made by cache::create_sequence and fork. kvt_seq_destroy at its end, a
 * pending step included. Calls on one sequence that are not const do not run at the same time.
 */
class sequence
{
  public:
    sequence() noexcept = default;
    /* Take over a C sequence of this cache, whose text errors have. */
    sequence(kvt_seq *seq, const kvt_cache *cache) noexcept : seq_(seq), cache_(cache) {}
    sequence(sequence &&other) noexcept
        : seq_(std::exchange(other.seq_, nullptr)), cache_(std::exchange(other.cache_, nullptr))
    {
    }
    sequence &operator=(sequence &&other) noexcept
    {
        sequence taken(std::move(other));
        taken.swap(*this);
        return *this;
    }
    sequence(const sequence &) = delete;
    sequence &operator=(const sequence &) = delete;
    ~sequence() { kvt_seq_destroy(seq_); }
    void swap(sequence &other) noexcept
    {
        std::swap(seq_, other.seq_);
        std::swap(cache_, other.cache_);
    }

    /* Whether it is not an empty handle. */
    explicit operator bool() const noexcept { return seq_ != nullptr; }
    kvt_seq *get() const noexcept { return seq_; }
    /* Give it up: who calls destroys it. */
    kvt_seq *release() noexcept
    {
        cache_ = nullptr;
        return std::exchange(seq_, nullptr);
    }

    /* -- counts; all const -- */

    std::uint64_t length() const noexcept { return kvt_seq_length(seq_); }
    bool empty() const noexcept { return kvt_seq_is_empty(seq_) != 0; }
    std::uint64_t pending() const noexcept { return kvt_seq_pending(seq_); }
    std::int32_t next_position() const noexcept { return kvt_seq_next_position(seq_); }
    std::uint64_t capacity() const noexcept { return kvt_seq_capacity(seq_); }
    std::uint64_t max_tokens() const noexcept { return kvt_seq_max_tokens(seq_); }
    std::uint64_t memory_bytes() const noexcept { return kvt_seq_memory_bytes(seq_); }
    std::uint64_t reachable(std::uint64_t n_tokens) const noexcept
    {
        return kvt_seq_reachable(seq_, n_tokens);
    }
    result<kvt_seq_stats> try_stats() const noexcept
    {
        kvt_seq_stats stats{};
        stats.struct_size = sizeof stats;
        return answer(kvt_seq_get_stats(seq_, &stats), stats);
    }

    /* -- what it holds; all const -- */

    /* ids.size() tokens from `first` on. */
    result<void> try_token_ids(std::uint64_t first, span<std::int32_t> ids) const noexcept
    {
        return kvt_seq_token_ids(seq_, first, ids.size(), some(ids));
    }
    result<void> try_positions(std::uint64_t first, span<std::int32_t> positions) const noexcept
    {
        return kvt_seq_positions(seq_, first, positions.size(), some(positions));
    }
    result<void> try_key_positions(std::uint64_t first, span<std::int32_t> positions) const noexcept
    {
        return kvt_seq_key_positions(seq_, first, positions.size(), some(positions));
    }
    /* The tag's size; as much of it as fits is in `room`. */
    result<std::size_t> try_tag(buffer room = {}) const noexcept
    {
        std::size_t n = 0;
        return answer(kvt_seq_tag(seq_, room.data(), room.size(), &n), n);
    }
    /* K or V of n tokens: [n][n_kv_heads][k_dim or v_dim]. */
    result<void> try_read(std::uint32_t layer, kvt_side side, std::uint64_t first, std::uint64_t n,
                          const output &out) const noexcept
    {
        return kvt_read(seq_, layer, side, first, n, &out);
    }
    /*
     * visitor(const kvt_token_view &) for n tokens, until it answers something true, if it answers
     * at all. The index at which it did, or first + n.
     */
    template <class F>
    result<std::uint64_t> try_visit(std::uint32_t layer, std::uint64_t first, std::uint64_t n,
                                    F &&visitor) const
    {
        using function = std::remove_reference_t<F>;
        detail::callback<function> c(visitor);
        std::uint64_t stopped = 0;
        kvt_status s = kvt_visit(
            seq_, layer, first, n,
            [](void *user, const kvt_token_view *token) noexcept {
                return detail::callback<function>::guarded(user, 1, [token](function &f) {
                    if constexpr (std::is_void_v<decltype(f(*token))>) {
                        f(*token);
                        return 0;
                    } else {
                        return f(*token) ? 1 : 0;
                    }
                });
            },
            &c, &stopped);
        c.rethrow();
        return answer(s, stopped);
    }

    /* -- its tokens -- */

    /* A sequence of the first n_tokens tokens, whose blocks both share. */
    result<sequence> try_fork(std::uint64_t n_tokens) noexcept
    {
        kvt_seq *copy = nullptr;
        kvt_status s = kvt_seq_fork(seq_, n_tokens, &copy);
        return s == KVT_OK ? result<sequence>(sequence(copy, cache_)) : result<sequence>(s);
    }
    result<sequence> try_fork() noexcept { return try_fork(length()); }
    result<void> try_reserve(std::uint64_t n_tokens) noexcept
    {
        return kvt_seq_reserve(seq_, n_tokens);
    }
    result<void> try_set_next_position(std::int32_t position) noexcept
    {
        return kvt_seq_set_next_position(seq_, position);
    }
    result<void> try_set_tag(bytes tag) noexcept
    {
        return kvt_seq_set_tag(seq_, some(tag), tag.size());
    }
    result<void> try_clear() noexcept { return kvt_seq_clear(seq_); }
    result<void> try_truncate(std::uint64_t n_tokens) noexcept
    {
        return kvt_seq_truncate(seq_, n_tokens);
    }
    result<void> try_remove(std::uint64_t first, std::uint64_t n) noexcept
    {
        return kvt_seq_remove(seq_, first, n);
    }

    /* -- checkpoints -- */

    result<void> try_checkpoint(bytes blob = {}) noexcept
    {
        return kvt_seq_checkpoint(seq_, some(blob), blob.size());
    }
    /* How many there are; as many lengths as fit are in `lengths`. */
    result<std::size_t> try_checkpoints(span<std::uint64_t> lengths = {}) const noexcept
    {
        std::size_t n = 0;
        return answer(kvt_seq_checkpoints(seq_, lengths.data(), lengths.size(), &n), n);
    }
    /* The blob's size; as much of it as fits is in `room`. */
    result<std::size_t> try_checkpoint_read(std::uint64_t n_tokens, buffer room = {}) const noexcept
    {
        std::size_t n = 0;
        return answer(kvt_seq_checkpoint_read(seq_, n_tokens, room.data(), room.size(), &n), n);
    }
    result<void> try_checkpoint_drop(std::uint64_t n_tokens) noexcept
    {
        return kvt_seq_checkpoint_drop(seq_, n_tokens);
    }

    /* -- steps -- */

    result<void> try_begin(std::uint64_t n_tokens) noexcept
    {
        return kvt_seq_begin(seq_, n_tokens, nullptr);
    }
    /* A step of positions.size() tokens. */
    result<void> try_begin(span<const std::int32_t> positions) noexcept
    {
        if (seq_ && !positions.data() && positions.size())
            return {KVT_ERR_ARG, "kvt::sequence::begin: positions are NULL"};
        return kvt_seq_begin(seq_, positions.size(), positions.data());
    }
    /* begin, as an object that aborts the step unless it has been committed through it. */
    result<step> try_begin_step(std::uint64_t n_tokens) noexcept;
    result<step> try_begin_step(span<const std::int32_t> positions) noexcept;

    result<void> try_append(std::uint32_t layer, const input &k, const input &v) noexcept
    {
        return kvt_append(seq_, layer, &k, &v);
    }
    /* Of a group with KVT_GROUP_V_IN_K. */
    result<void> try_append(std::uint32_t layer, const input &k) noexcept
    {
        return kvt_append(seq_, layer, &k, nullptr);
    }
    /* Without token ids. */
    result<void> try_commit() noexcept { return kvt_seq_commit(seq_, nullptr); }
    /* KVT_ERR_ARG: not an id for each pending token; the step stays pending. */
    result<void> try_commit(span<const std::int32_t> token_ids) noexcept
    {
        if (seq_ && pending() && token_ids.size() != pending())
            return {KVT_ERR_ARG, "kvt::sequence::commit: not as many token ids as pending tokens"};
        if (seq_ && !token_ids.data() && token_ids.size())
            return {KVT_ERR_ARG, "kvt::sequence::commit: token ids are NULL"};
        return kvt_seq_commit(seq_, some(token_ids));
    }
    result<void> try_commit_selected(span<const std::uint64_t> indices) noexcept
    {
        return kvt_seq_commit_selected(seq_, some(indices), indices.size(), nullptr);
    }
    /* KVT_ERR_ARG: not an id for each index; the step stays pending. */
    result<void> try_commit_selected(span<const std::uint64_t> indices,
                                     span<const std::int32_t> token_ids) noexcept
    {
        if (seq_ && token_ids.size() != indices.size())
            return {KVT_ERR_ARG,
                    "kvt::sequence::commit_selected: not as many token ids as indices"};
        if (seq_ && !token_ids.data() && token_ids.size())
            return {KVT_ERR_ARG, "kvt::sequence::commit_selected: token ids are NULL"};
        return kvt_seq_commit_selected(seq_, some(indices), indices.size(), token_ids.data());
    }
    result<void> try_abort() noexcept { return kvt_seq_abort(seq_); }

    /* -- snapshots -- */

    result<void> try_save(path file, const save_options &options = save_options()) const
    {
        detail::guarded<kvt_save_options> with(options);
        kvt_status s = kvt_seq_save(seq_, file.c_str(), with.get());
        with.rethrow();
        return s;
    }
    /* writer(const void *data, size_t bytes) answers whether all bytes were taken. */
    template <class F,
              class = std::enable_if_t<std::is_invocable_v<F &, const void *, std::size_t>>>
    result<void> try_save(F &&writer, const save_options &options = save_options()) const
    {
        using function = std::remove_reference_t<F>;
        detail::guarded<kvt_save_options> with(options);
        detail::callback<function> c(writer);
        kvt_writer w{};
        w.user = &c;
        w.write = [](void *user, const void *data, std::size_t n) noexcept {
            return detail::callback<function>::guarded(
                user, -1, [=](function &f) { return f(data, n) ? 0 : -1; });
        };
        kvt_status s = kvt_seq_save_stream(seq_, &w, with.get());
        c.rethrow();
        with.rethrow();
        return s;
    }
    /* To a file descriptor, from where it stands; it is not closed. */
    result<void> try_save_fd(int fd, const save_options &options = save_options()) const
    {
        detail::guarded<kvt_save_options> with(options);
        kvt_status s = kvt_seq_save_fd(seq_, fd, with.get());
        with.rethrow();
        return s;
    }
    /* Into memory that is there: how many bytes. KVT_ERR_FULL: no room; see save_bound. */
    result<std::size_t> try_save_memory(buffer memory,
                                        const save_options &options = save_options()) const
    {
        detail::guarded<kvt_save_options> with(options);
        std::size_t n = 0;
        kvt_status s = kvt_seq_save_memory(seq_, some(memory), memory.size(), &n, with.get());
        with.rethrow();
        return answer(s, n);
    }
    /* The most bytes that a save with these options writes now. */
    result<std::uint64_t>
    try_save_bound(const save_options &options = save_options()) const noexcept
    {
        std::uint64_t n = 0;
        return answer(kvt_seq_save_bound(seq_, &n, &options), n);
    }
    /*
     * Into memory: behind what a container of bytes, as std::vector<uint8_t>, holds. It holds that
     * alone after a failure.
     */
    template <class C>
    result<void> try_save_to(C &memory, const save_options &options = save_options()) const
    {
        static_assert(sizeof(typename C::value_type) == 1, "a container of bytes");
        detail::added<C> added(memory);
        result<void> saved = try_save(
            [&memory](const void *data, std::size_t n) {
                const auto *from = static_cast<const typename C::value_type *>(data);
                memory.insert(memory.end(), from, from + n);
                return true;
            },
            options);
        added.keep = saved.status() == KVT_OK;
        return saved;
    }
    result<kvt_load_result> try_load(path file, const load_options &options)
    {
        detail::guarded<kvt_load_options> with(options);
        kvt_load_result loaded{};
        kvt_status s = kvt_seq_load(seq_, file.c_str(), with.get(), &loaded);
        with.rethrow();
        return answer(s, loaded);
    }
    /*
     * prompt: the whole prompt's token ids, from token 0 on; the result says how to go on with it.
     */
    result<kvt_load_result> try_load(path file, span<const std::int32_t> prompt = {}) noexcept
    {
        return try_load(file, load_options().with_prompt(prompt));
    }
    /*
     * reader(void *data, size_t bytes) as kvt_reader: how many bytes, 0 at the end, < 0: an error.
     */
    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, void *, std::size_t>>>
    result<kvt_load_result> try_load(F &&reader, const load_options &options)
    {
        using function = std::remove_reference_t<F>;
        detail::guarded<kvt_load_options> with(options);
        detail::callback<function> c(reader);
        kvt_load_result loaded{};
        kvt_reader r{};
        r.user = &c;
        r.read = [](void *user, void *data, std::size_t n) noexcept {
            return detail::callback<function>::guarded(user, std::int64_t{-1}, [=](function &f) {
                return static_cast<std::int64_t>(f(data, n));
            });
        };
        kvt_status s = kvt_seq_load_stream(seq_, &r, with.get(), &loaded);
        c.rethrow();
        with.rethrow();
        return answer(s, loaded);
    }
    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, void *, std::size_t>>>
    result<kvt_load_result> try_load(F &&reader, span<const std::int32_t> prompt = {})
    {
        return try_load(reader, load_options().with_prompt(prompt));
    }
    /* From a file descriptor, from where it stands; it is not closed. */
    result<kvt_load_result> try_load_fd(int fd, const load_options &options)
    {
        detail::guarded<kvt_load_options> with(options);
        kvt_load_result loaded{};
        kvt_status s = kvt_seq_load_fd(seq_, fd, with.get(), &loaded);
        with.rethrow();
        return answer(s, loaded);
    }
    result<kvt_load_result> try_load_fd(int fd, span<const std::int32_t> prompt = {}) noexcept
    {
        return try_load_fd(fd, load_options().with_prompt(prompt));
    }
    /* From memory (kvt_seq_load_memory), which the snapshot fills. */
    result<kvt_load_result> try_load_from(bytes memory, const load_options &options)
    {
        detail::guarded<kvt_load_options> with(options);
        kvt_load_result loaded{};
        kvt_status s = kvt_seq_load_memory(seq_, some(memory), memory.size(), with.get(), &loaded);
        with.rethrow();
        return answer(s, loaded);
    }
    result<kvt_load_result> try_load_from(bytes memory,
                                          span<const std::int32_t> prompt = {}) noexcept
    {
        return try_load_from(memory, load_options().with_prompt(prompt));
    }

#if KVT_HPP_EXCEPTIONS
    /* -- the same, throwing kvt::error -- */

    kvt_seq_stats stats() const
    {
        return checked(try_stats());
    }
    void token_ids(std::uint64_t first, span<std::int32_t> ids) const
    {
        checked(try_token_ids(first, ids));
    }
    void positions(std::uint64_t first, span<std::int32_t> numbers) const
    {
        checked(try_positions(first, numbers));
    }
    void key_positions(std::uint64_t first, span<std::int32_t> numbers) const
    {
        checked(try_key_positions(first, numbers));
    }
    std::size_t tag(buffer room = {}) const
    {
        return checked(try_tag(room));
    }
    void read(std::uint32_t layer, kvt_side side, std::uint64_t first, std::uint64_t n,
              const output &out) const
    {
        checked(try_read(layer, side, first, n, out));
    }
    template <class F>
    std::uint64_t visit(std::uint32_t layer, std::uint64_t first, std::uint64_t n,
                        F &&visitor) const
    {
        return checked(try_visit(layer, first, n, visitor));
    }
    sequence fork(std::uint64_t n_tokens)
    {
        return checked(try_fork(n_tokens));
    }
    sequence fork()
    {
        return checked(try_fork());
    }
    void reserve(std::uint64_t n_tokens)
    {
        checked(try_reserve(n_tokens));
    }
    void set_next_position(std::int32_t position)
    {
        checked(try_set_next_position(position));
    }
    void set_tag(bytes tag)
    {
        checked(try_set_tag(tag));
    }
    void clear()
    {
        checked(try_clear());
    }
    void truncate(std::uint64_t n_tokens)
    {
        checked(try_truncate(n_tokens));
    }
    void remove(std::uint64_t first, std::uint64_t n)
    {
        checked(try_remove(first, n));
    }
    void checkpoint(bytes blob = {})
    {
        checked(try_checkpoint(blob));
    }
    std::size_t checkpoints(span<std::uint64_t> lengths = {}) const
    {
        return checked(try_checkpoints(lengths));
    }
    std::size_t checkpoint_read(std::uint64_t n_tokens, buffer room = {}) const
    {
        return checked(try_checkpoint_read(n_tokens, room));
    }
    void checkpoint_drop(std::uint64_t n_tokens)
    {
        checked(try_checkpoint_drop(n_tokens));
    }
    void begin(std::uint64_t n_tokens)
    {
        checked(try_begin(n_tokens));
    }
    void begin(span<const std::int32_t> positions)
    {
        checked(try_begin(positions));
    }
    step begin_step(std::uint64_t n_tokens);
    step begin_step(span<const std::int32_t> positions);
    void append(std::uint32_t layer, const input &k, const input &v)
    {
        checked(try_append(layer, k, v));
    }
    void append(std::uint32_t layer, const input &k)
    {
        checked(try_append(layer, k));
    }
    void commit()
    {
        checked(try_commit());
    }
    void commit(span<const std::int32_t> token_ids)
    {
        checked(try_commit(token_ids));
    }
    void commit_selected(span<const std::uint64_t> indices)
    {
        checked(try_commit_selected(indices));
    }
    void commit_selected(span<const std::uint64_t> indices, span<const std::int32_t> token_ids)
    {
        checked(try_commit_selected(indices, token_ids));
    }
    void abort()
    {
        checked(try_abort());
    }
    void save(path file, const save_options &options = save_options()) const
    {
        checked(try_save(file, options));
    }
    template <class F,
              class = std::enable_if_t<std::is_invocable_v<F &, const void *, std::size_t>>>
    void save(F &&writer, const save_options &options = save_options()) const
    {
        checked(try_save(writer, options));
    }
    template <class C> void save_to(C &memory, const save_options &options = save_options()) const
    {
        checked(try_save_to(memory, options));
    }
    void save_fd(int fd, const save_options &options = save_options()) const
    {
        checked(try_save_fd(fd, options));
    }
    std::size_t save_memory(buffer memory, const save_options &options = save_options()) const
    {
        return checked(try_save_memory(memory, options));
    }
    std::uint64_t save_bound(const save_options &options = save_options()) const
    {
        return checked(try_save_bound(options));
    }
    kvt_load_result load(path file, const load_options &options)
    {
        return checked(try_load(file, options));
    }
    kvt_load_result load(path file, span<const std::int32_t> prompt = {})
    {
        return checked(try_load(file, prompt));
    }
    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, void *, std::size_t>>>
    kvt_load_result load(F &&reader, const load_options &options)
    {
        return checked(try_load(reader, options));
    }
    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, void *, std::size_t>>>
    kvt_load_result load(F &&reader, span<const std::int32_t> prompt = {})
    {
        return checked(try_load(reader, prompt));
    }
    kvt_load_result load_fd(int fd, const load_options &options)
    {
        return checked(try_load_fd(fd, options));
    }
    kvt_load_result load_fd(int fd, span<const std::int32_t> prompt = {})
    {
        return checked(try_load_fd(fd, prompt));
    }
    kvt_load_result load_from(bytes memory, const load_options &options)
    {
        return checked(try_load_from(memory, options));
    }
    kvt_load_result load_from(bytes memory, span<const std::int32_t> prompt = {})
    {
        return checked(try_load_from(memory, prompt));
    }
#endif

  private:
    friend class step;
    friend class append_plan;
    friend class store;
    friend struct prefix_options;

    /* No elements are not NULL, which means something else; NULL with a size stays an error. */
    template <class S> static auto some(const S &elements) noexcept -> decltype(elements.data())
    {
        using pointer = decltype(elements.data());
        static const std::uint64_t nothing = 0;
        return elements.data() || elements.size()
                   ? elements.data()
                   : static_cast<pointer>(const_cast<void *>(static_cast<const void *>(&nothing)));
    }
    /* By reference: the call that sets the value is evaluated in the same list of arguments. */
    template <class T> static result<T> answer(kvt_status s, T &value) noexcept
    {
        return s == KVT_OK ? result<T>(std::move(value)) : result<T>(s);
    }
#if KVT_HPP_EXCEPTIONS
    void checked(result<void> r) const
    {
        r.check(cache_);
    }
    template <class T> T checked(result<T> r) const
    {
        r.check(cache_);
        return *std::move(r);
    }
#endif

    kvt_seq *seq_ = nullptr;
    const kvt_cache *cache_ = nullptr; /* lives as long as the sequence */
};

/*
 * A pending step, made by sequence::begin_step. It is aborted when this ends, unless it was
 * committed through it; the sequence has to be there until then, but may be moved. A failed commit
 * leaves it pending. Who ends it through the sequence instead, and begins one there, has that one
 * aborted; another step of the same sequence may take this one's place.
 */
class [[nodiscard]] step
{
  public:
    step() noexcept = default;
    step(step &&other) noexcept
        : seq_(std::exchange(other.seq_, nullptr)), cache_(std::exchange(other.cache_, nullptr))
    {
    }
    step &operator=(step &&other) noexcept
    {
        step taken(std::move(other));
        std::swap(seq_, taken.seq_);
        std::swap(cache_, taken.cache_);
        if (taken.seq_ == seq_) /* which has one step at a time: the new one */
            taken.seq_ = nullptr;
        return *this;
    }
    step(const step &) = delete;
    step &operator=(const step &) = delete;
    ~step()
    {
        if (seq_)
            (void)kvt_seq_abort(seq_);
    }
    /* Whether it is pending. */
    explicit operator bool() const noexcept { return seq_ != nullptr; }
    result<void> try_commit() noexcept
    {
        return through([](sequence &s) { return s.try_commit(); });
    }
    result<void> try_commit(span<const std::int32_t> token_ids) noexcept
    {
        return through([=](sequence &s) { return s.try_commit(token_ids); });
    }
    result<void> try_commit_selected(span<const std::uint64_t> indices) noexcept
    {
        return through([=](sequence &s) { return s.try_commit_selected(indices); });
    }
    result<void> try_commit_selected(span<const std::uint64_t> indices,
                                     span<const std::int32_t> token_ids) noexcept
    {
        return through([=](sequence &s) { return s.try_commit_selected(indices, token_ids); });
    }
    void abort() noexcept { step ends(std::move(*this)); }
#if KVT_HPP_EXCEPTIONS
    void commit()
    {
        const kvt_cache *cache = cache_;
        try_commit().check(cache);
    }
    void commit(span<const std::int32_t> token_ids)
    {
        const kvt_cache *cache = cache_;
        try_commit(token_ids).check(cache);
    }
    void commit_selected(span<const std::uint64_t> indices)
    {
        const kvt_cache *cache = cache_;
        try_commit_selected(indices).check(cache);
    }
    void commit_selected(span<const std::uint64_t> indices, span<const std::int32_t> token_ids)
    {
        const kvt_cache *cache = cache_;
        try_commit_selected(indices, token_ids).check(cache);
    }
#endif

  private:
    friend class sequence;
    step(kvt_seq *seq, const kvt_cache *cache) noexcept : seq_(seq), cache_(cache)
    {
    }
    template <class F> result<void> through(F call) noexcept
    {
        sequence s(seq_, cache_);
        result<void> r = call(s);
        (void)s.release();
        if (r)
            seq_ = nullptr;
        return r;
    }

    kvt_seq *seq_ = nullptr; /* NULL: none is pending */
    const kvt_cache *cache_ = nullptr;
};

inline result<step> sequence::try_begin_step(std::uint64_t n_tokens) noexcept
{
    result<void> r = try_begin(n_tokens);
    return r ? result<step>(step(seq_, cache_)) : result<step>(r.status());
}

inline result<step> sequence::try_begin_step(span<const std::int32_t> positions) noexcept
{
    result<void> r = try_begin(positions);
    return r ? result<step>(step(seq_, cache_)) : result<step>(r.status());
}

#if KVT_HPP_EXCEPTIONS
inline step sequence::begin_step(std::uint64_t n_tokens)
{
    return checked(try_begin_step(n_tokens));
}

inline step sequence::begin_step(span<const std::int32_t> positions)
{
    return checked(try_begin_step(positions));
}
#endif

/*
 * append in parts, for threads of the caller's: init, task(i) for every i < n_tasks() from any
 * threads in any order, finish. k's and v's memory has to stay until then. It owns nothing, and
 * can be used again by another init.
 */
class append_plan
{
  public:
    result<void> try_init(sequence &seq, std::uint32_t layer, const input &k,
                          const input &v) noexcept
    {
        cache_ = seq.cache_;
        return kvt_append_plan_init(&plan_, seq.seq_, layer, &k, &v);
    }
    /* Of a group with KVT_GROUP_V_IN_K. */
    result<void> try_init(sequence &seq, std::uint32_t layer, const input &k) noexcept
    {
        cache_ = seq.cache_;
        return kvt_append_plan_init(&plan_, seq.seq_, layer, &k, nullptr);
    }
    std::size_t n_tasks() const noexcept { return plan_.n_tasks; }
    result<void> try_task(std::size_t i) noexcept { return kvt_append_task(&plan_, i); }
    result<void> try_finish() noexcept { return kvt_append_finish(&plan_); }
    kvt_append_plan *get() noexcept { return &plan_; }
#if KVT_HPP_EXCEPTIONS
    void init(sequence &seq, std::uint32_t layer, const input &k, const input &v)
    {
        try_init(seq, layer, k, v).check(seq.cache_);
    }
    void init(sequence &seq, std::uint32_t layer, const input &k)
    {
        try_init(seq, layer, k).check(seq.cache_);
    }
    void task(std::size_t i)
    {
        try_task(i).check(cache_);
    }
    void finish()
    {
        try_finish().check(cache_);
    }
#endif

  private:
    kvt_append_plan plan_{};
    const kvt_cache *cache_ = nullptr;
};

/* ---- attention ---- */

/* kvt_attend_item: a sequence's share of an attend call. */
struct attend_item : kvt_attend_item {
    explicit attend_item(const sequence &s, std::uint64_t n = 1) noexcept : kvt_attend_item{}
    {
        seq = s.get();
        n_queries = n;
    }
    attend_item(const kvt_attend_item &item) noexcept : kvt_attend_item(item) {}
    /* One a query. A view, as the mask. */
    attend_item &with_positions(span<const std::int32_t> positions) noexcept
    {
        query_positions = positions.data();
        n_queries = positions.size();
        return *this;
    }
    /* [n_queries][stride] bytes: bit j of a row, whether it sees the j-th of the last `tokens`. */
    attend_item &with_mask(const std::uint8_t *rows, std::size_t stride,
                           std::uint64_t tokens) noexcept
    {
        mask = rows;
        mask_stride = stride;
        mask_tokens = tokens;
        return *this;
    }
};

static_assert(sizeof(attend_item) == sizeof(kvt_attend_item), "items are an array of the C type");

/* kvt_attend_args with its defaults. items, q and out are views. */
struct attend_args : kvt_attend_args {
    attend_args(std::uint32_t layer_number, span<const attend_item> all, const input &queries,
                const output &result) noexcept
        : kvt_attend_args(kvt_attend_args_init())
    {
        layer = layer_number;
        items = all.data();
        n_items = all.size();
        q = queries;
        out = result;
    }
    attend_args &with_flags(std::uint32_t kvt_attend) noexcept
    {
        flags |= kvt_attend;
        return *this;
    }
    /* [n][n_q_heads] */
    attend_args &with_lse(float *log_sum_exp) noexcept
    {
        lse = log_sum_exp;
        return *this;
    }
    attend_args &with_scale(float factor) noexcept
    {
        scale = factor;
        return *this;
    }
    attend_args &with_softcap(float cap) noexcept
    {
        softcap = cap;
        return *this;
    }
    /* [n_q_heads] */
    attend_args &with_sink_logits(const float *logits) noexcept
    {
        sink_logits = logits;
        return *this;
    }
    /* [n_q_heads] */
    attend_args &with_alibi_slopes(const float *slopes) noexcept
    {
        alibi_slopes = slopes;
        return *this;
    }
    /* For attend_plan: how many threads will run tasks. */
    attend_args &with_threads(std::uint32_t n) noexcept
    {
        n_threads = n;
        return *this;
    }
};

/* ---- cache ---- */

/*
 * A cache. kvt_cache_destroy at its end; sequences that are still there stay usable, and keep the
 * memory. Calls on it may run at the same time as those on its sequences.
 */
class cache
{
  public:
    cache() noexcept = default;
    /* Take over a C cache. */
    explicit cache(kvt_cache *c) noexcept : cache_(c) {}
    cache(cache &&other) noexcept : cache_(std::exchange(other.cache_, nullptr)) {}
    cache &operator=(cache &&other) noexcept
    {
        cache taken(std::move(other));
        taken.swap(*this);
        return *this;
    }
    cache(const cache &) = delete;
    cache &operator=(const cache &) = delete;
    ~cache() { kvt_cache_destroy(cache_); }
    void swap(cache &other) noexcept { std::swap(cache_, other.cache_); }

    /* On failure config.error_text, if it is set, says why. */
    static result<cache> try_create(const kvt_config &config) noexcept
    {
        kvt_cache *c = nullptr;
        kvt_status s = kvt_cache_create(&config, &c);
        return s == KVT_OK ? result<cache>(cache(c)) : result<cache>(s);
    }
#if KVT_HPP_EXCEPTIONS
    explicit cache(const kvt_config &config)
    {
        message text;
        kvt_config c = detail::reporting(config, text);
        kvt_status s = kvt_cache_create(&c, &cache_);
        if (s != KVT_OK)
            detail::fail(c, s);
    }
#endif

    explicit operator bool() const noexcept
    {
        return cache_ != nullptr;
    }
    kvt_cache *get() const noexcept
    {
        return cache_;
    }
    /* Give it up: who calls destroys it. */
    kvt_cache *release() noexcept
    {
        return std::exchange(cache_, nullptr);
    }

    /*
     * The text of the last failure of the cache or of one of its sequences; "" where there is none.
     */
    message last_error() const noexcept
    {
        message m;
        (void)kvt_cache_error(cache_, m.text.data(), m.text.size());
        return m;
    }
    /* The name of the kernels in use; NULL for an empty handle. */
    const char *isa() const noexcept
    {
        return kvt_cache_isa(cache_);
    }
    std::uint64_t memory_bytes() const noexcept
    {
        return kvt_cache_memory_bytes(cache_);
    }
    double bytes_per_token() const noexcept
    {
        return kvt_cache_bytes_per_token(cache_);
    }
    result<kvt_cache_stats> try_stats() const noexcept
    {
        kvt_cache_stats stats{};
        stats.struct_size = sizeof stats;
        kvt_status s = kvt_cache_get_stats(cache_, &stats);
        return s == KVT_OK ? result<kvt_cache_stats>(std::move(stats)) : result<kvt_cache_stats>(s);
    }
    result<void> try_trim() noexcept
    {
        return kvt_cache_trim(cache_);
    }
    result<sequence> try_create_sequence() noexcept
    {
        kvt_seq *seq = nullptr;
        kvt_status s = kvt_seq_create(cache_, &seq);
        return s == KVT_OK ? result<sequence>(sequence(seq, cache_)) : result<sequence>(s);
    }
    result<void> try_attend(const kvt_attend_args &args) noexcept
    {
        return kvt_attend(cache_, &args);
    }
    /* n_queries of one sequence, those of its last tokens, each of which sees what is before it. */
    result<void> try_attend(std::uint32_t layer, const sequence &seq, const input &q,
                            const output &out, std::uint64_t n_queries = 1) noexcept
    {
        attend_item item(seq, n_queries);
        return try_attend(attend_args(layer, {&item, 1}, q, out).with_flags(KVT_ATTEND_CAUSAL));
    }

#if KVT_HPP_EXCEPTIONS
    kvt_cache_stats stats() const
    {
        auto r = try_stats();
        r.check(cache_);
        return *r;
    }
    void trim()
    {
        try_trim().check(cache_);
    }
    sequence create_sequence()
    {
        auto r = try_create_sequence();
        r.check(cache_);
        return *std::move(r);
    }
    void attend(const kvt_attend_args &args)
    {
        try_attend(args).check(cache_);
    }
    void attend(std::uint32_t layer, const sequence &seq, const input &q, const output &out,
                std::uint64_t n_queries = 1)
    {
        try_attend(layer, seq, q, out, n_queries).check(cache_);
    }
#endif

  private:
    kvt_cache *cache_ = nullptr;
};

/*
 * attend in parts, for threads of the caller's: init, task(scratch, i) for every i < n_tasks()
 * from any threads in any order, finish(scratch). scratch: scratch_bytes() bytes at a multiple of
 * 64. What the arguments point to stays, and the sequences do not change, until then. It owns
 * nothing, and can be used again by another init.
 */
class attend_plan
{
  public:
    result<void> try_init(cache &c, const kvt_attend_args &args) noexcept
    {
        cache_ = c.get();
        return kvt_attend_plan_init(&plan_, cache_, &args);
    }
    std::size_t n_tasks() const noexcept { return plan_.n_tasks; }
    std::size_t scratch_bytes() const noexcept { return plan_.scratch_bytes; }
    result<void> try_task(buffer scratch, std::size_t i) noexcept
    {
        if (scratch.size() < plan_.scratch_bytes)
            return {KVT_ERR_ARG, "kvt::attend_plan::task: scratch is too small"};
        return kvt_attend_task(&plan_, scratch.data(), i);
    }
    result<void> try_finish(buffer scratch) noexcept
    {
        if (scratch.size() < plan_.scratch_bytes)
            return {KVT_ERR_ARG, "kvt::attend_plan::finish: scratch is too small"};
        return kvt_attend_finish(&plan_, scratch.data());
    }
    kvt_attend_plan *get() noexcept { return &plan_; }
#if KVT_HPP_EXCEPTIONS
    void init(cache &c, const kvt_attend_args &args)
    {
        try_init(c, args).check(c.get());
    }
    void task(buffer scratch, std::size_t i)
    {
        try_task(scratch, i).check(cache_);
    }
    void finish(buffer scratch)
    {
        try_finish(scratch).check(cache_);
    }
#endif

  private:
    kvt_attend_plan plan_{};
    kvt_cache *cache_ = nullptr;
};

} // namespace kvt

#endif /* KVTILE_KVTILE_HPP */
