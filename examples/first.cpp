#include <kvtile/kvtile.hpp>
#include <cstdio>
#include <vector>

int main()
try {
    const std::vector<float> k(100 * 2 * 64), v(100 * 2 * 64), q(8 * 64); // your model fills these
    std::vector<float> out(8 * 64);
    kvt::group_config group;
    group.with_layers(1).with_heads(8, 2).with_dims(64).with_types(KVT_TYPE_I8);
    kvt::cache cache(kvt::config().with_group(group).with_max_tokens(4096));
    kvt::sequence seq = cache.create_sequence();
    kvt::step step = seq.begin_step(100); // aborted unless it is committed
    seq.append(0, k, v);                  // for each layer,
    cache.attend(0, seq, q, out);         // with the last token's query
    step.commit();
    seq.save("first_cpp.kvt");
    std::printf("saved: %d tokens\n", static_cast<int>(seq.length()));
} catch (const kvt::error &e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
}
