/*
 * Snapshots of the first version still load, with the same contents.
 *
 * test_snapshot_golden FOLDER: FOLDER/HASHES lists the files and the hashes of their contents.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "golden.h"

static const char *folder;

static void test_golden(void **state)
{
    char path[1024], line[256];
    unsigned found = 0;
    FILE *hashes;
    (void)state;

    (void)snprintf(path, sizeof path, "%s/HASHES", folder);
    hashes = fopen(path, "r");
    assert_non_null(hashes);
    while (fgets(line, sizeof line, hashes)) {
        const golden *g = NULL;
        char *space = strchr(line, ' ');
        unsigned long long want;
        kvt_snapshot_info info;
        kvt_cache *cache;
        kvt_seq *seq = NULL;
        char text[256] = "";

        assert_non_null(space);
        *space = '\0';
        want = strtoull(space + 1, NULL, 16);
        for (unsigned i = 0; i < GOLDEN_COUNT; i++)
            if (strcmp(golden_all[i].name, line) == 0)
                g = &golden_all[i];
        assert_non_null(g);
        (void)snprintf(path, sizeof path, "%s/%s.kvt", folder, line);
        info.struct_size = sizeof info;
        if (kvt_snapshot_inspect(path, 1, &info, text, sizeof text) != KVT_OK)
            fail_msg("%s: %s", path, text);
        assert_int_equal(info.n_tokens, g->n_tokens - g->removed + (g->removed ? 20 : 0));
        assert_int_equal(info.n_groups, g->n_groups);
        assert_int_equal(info.n_pieces, g->codec == KVT_CODEC_RAW);
        assert_int_equal(info.native_blocks,
                         g->codec == KVT_CODEC_RAW ? info.n_blocks - info.inherited_blocks : 0);
        assert_string_equal(info.parent_name, g->parent ? g->parent : "");
        assert_int_equal(info.inherited_blocks > 0, g->parent != NULL);
        cache = golden_cache(g);
        assert_non_null(cache);
        assert_int_equal(kvt_seq_create(cache, &seq), KVT_OK);
        if (g->tag)
            assert_int_equal(kvt_seq_set_tag(seq, g->tag, strlen(g->tag)), KVT_OK);
        if (kvt_seq_load(seq, path, NULL, NULL) != KVT_OK) {
            (void)kvt_cache_error(cache, text, sizeof text);
            fail_msg("%s: %s", path, text);
        }
        if (golden_deep_hash(g, seq) != want)
            fail_msg("%s holds something else than it did", path);
        kvt_seq_destroy(seq);
        kvt_cache_destroy(cache);
        found++;
    }
    (void)fclose(hashes);
    assert_int_equal(found, GOLDEN_COUNT);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_golden)};
    if (argc != 2)
        return 2;
    folder = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
