/*
 * What somebody else's C++ program does with kvtile: kvtile.hpp beside kvtile.h, store.hpp, both
 * forms of errors. KVTILE_VERSION is what the package says it is.
 */
#include <kvtile/kvtile.hpp>
#include <kvtile/store.hpp>

#include <cstdio>
#include <string>
#include <vector>

static bool use()
{
    const std::vector<float> ones(100 * 2 * 64, 1.0f), q(8 * 64);
    std::vector<float> out(8 * 64);
    std::vector<unsigned char> memory;
    kvt::group_config group;
    group.with_layers(1).with_heads(8, 2).with_dims(64).with_types(KVT_TYPE_I8);
    kvt::cache cache(kvt::config().with_group(group).with_max_tokens(4096));
    kvt::sequence seq = cache.create_sequence();
    kvt::step step = seq.begin_step(100);
    seq.append(0, ones, ones);
    cache.attend(0, seq, q, out);
    step.commit();
    seq.save_to(memory);
    auto store = kvt::store::try_open_directory(kvt::directory_config("use.store"));
    if (store ? !*store || store->try_prefix_put(seq).status() == KVT_ERR_ARG
              : store.status() != KVT_ERR_UNSUPPORTED)
        return false;
    seq.clear();
    if (out[511] < 0.99f || out[511] > 1.01f || seq.load_from(memory).n_tokens != 100)
        return false;
    if (seq.try_begin(4000).status() != KVT_ERR_FULL)
        return false;
    try {
        seq.begin(4000);
    } catch (const kvt::error &e) {
        return e.status() == KVT_ERR_FULL &&
               std::string(e.what()).find("4096") != std::string::npos;
    }
    return false;
}

int main()
{
    if (std::string(kvt::version()) != KVTILE_VERSION || !use()) {
        std::fputs("use.cpp: failed\n", stderr);
        return 1;
    }
    return 0;
}
