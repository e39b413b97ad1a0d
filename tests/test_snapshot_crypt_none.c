/* Encrypted files in a library that was built without libsodium: they are known, and refused. */
#include "support.h"

#include "src/snapshot/crypt.h"

static void test_not_built(void **state)
{
    unsigned char key[32] = {0};
    char text[200] = "";
    kvt_snap_context context = {NULL, text, sizeof text};
    kvt_snap_source source = {NULL, NULL, 0};
    kvt_writer to = {NULL, NULL}, in;
    kvt_reader from = {NULL, NULL}, out;
    kvt_snap_crypt c;
    uint64_t bytes;
    (void)state;

    assert_int_equal(kvt_snap_crypt_built(), 0);
    assert_int_equal(kvt_snap_encrypt_begin(&context, key, &to, &c, &in), KVT_ERR_UNSUPPORTED);
    assert_non_null(strstr(text, "built without libsodium"));
    assert_int_equal(kvt_snap_encrypt_end(&c), KVT_ERR_UNSUPPORTED);
    assert_int_equal(kvt_snap_decrypt_begin(&context, key, &from, &c, &out), KVT_ERR_UNSUPPORTED);
    assert_int_equal(kvt_snap_decrypt_open(&context, key, &source, &c, &bytes),
                     KVT_ERR_UNSUPPORTED);
    assert_int_equal(kvt_snap_decrypt_at(&c, 0, text, 1), KVT_ERR_UNSUPPORTED);
    assert_int_equal(kvt_snap_crypt_failure(&c), KVT_OK);
    kvt_snap_crypt_release(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_not_built)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
