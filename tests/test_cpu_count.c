/*
 * The control group's CPU quota, read from folders laid out as Linux lays them out. A test of
 * src/cpu_count.c alone: what the functions read is a parameter.
 */
#include "support.h"

#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/cpu_count.h"

static char root[] = "/tmp/kvt_cpu_count.XXXXXX";

/* Write a file below the root, its folders made first. */
static void put(const char *name, const char *text)
{
    char path[256];
    FILE *file;
    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *slash = path + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
    file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static int make_root(void **state)
{
    (void)state;
    memcpy(root + strlen(root) - 6, "XXXXXX", 6);
    return mkdtemp(root) ? 0 : -1;
}

static int remove_root(void **state)
{
    char command[64];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", root);
    return system(command);
}

static uint32_t quota(const char *groups)
{
    char path[256], mount[256];
    put("groups", groups);
    snprintf(path, sizeof path, "%s/groups", root);
    snprintf(mount, sizeof mount, "%s/mount", root);
    return kvt_quota_cpus(path, mount);
}

static void none(void **state)
{
    (void)state;
    assert_true(kvt_quota_cpus("/nonexistent/file", "/nonexistent") == UINT32_MAX);
    assert_true(quota("") == UINT32_MAX);
    assert_true(quota("0::/\n") == UINT32_MAX);
    assert_true(quota("no colon\none:colon\n0::/a/b\n") == UINT32_MAX);
    put("mount/a/cpu.max", "max 100000\n");
    assert_true(quota("0::/a\n") == UINT32_MAX);
    put("mount/a/cpu.max", "");
    assert_true(quota("0::/a\n") == UINT32_MAX);
    put("mount/a/cpu.max", "soon 100000\n");
    assert_true(quota("0::/a\n") == UINT32_MAX);
    put("mount/a/cpu.max", "100000 0\n");
    assert_true(quota("0::/a\n") == UINT32_MAX);
}

static void version_2(void **state)
{
    (void)state;
    put("mount/a/b/cpu.max", "300000 100000\n");
    assert_int_equal(quota("0::/a/b\n"), 3);
    assert_int_equal(quota("1:name=systemd:/x\n0::/a/b\n"), 3);
    put("mount/a/b/cpu.max", "299999 100000\n");
    assert_int_equal(quota("0::/a/b\n"), 2);
    put("mount/a/b/cpu.max", "20000 100000\n");
    assert_int_equal(quota("0::/a/b\n"), 1);
    put("mount/a/b/cpu.max", "800000 100000\n");
    put("mount/a/cpu.max", "500000 100000\n"); /* the group above has less */
    assert_int_equal(quota("0::/a/b\n"), 5);
    assert_int_equal(quota("0::/a/b/none\n"), 5);
    /* In a container whose mount begins at its own group. */
    put("mount/cpu.max", "200000 100000\n");
    assert_int_equal(quota("0::/docker/0123\n"), 2);
    assert_int_equal(quota("0::/\n"), 2);
}

static void version_1(void **state)
{
    (void)state;
    put("mount/cpu/a/cpu.cfs_quota_us", "-1\n");
    put("mount/cpu/a/cpu.cfs_period_us", "100000\n");
    assert_true(quota("5:cpu:/a\n") == UINT32_MAX);
    put("mount/cpu/a/cpu.cfs_quota_us", "150000\n");
    assert_int_equal(quota("5:cpu:/a\n"), 1);
    put("mount/cpu/a/cpu.cfs_period_us", "50000\n");
    assert_int_equal(quota("9:cpuset:/\n5:cpu:/a\n"), 3);
    assert_true(quota("9:cpuset:/a\n5:cpuacct:/a\n") == UINT32_MAX);
    put("mount/cpu,cpuacct/b/cpu.cfs_quota_us", "400000\n");
    put("mount/cpu,cpuacct/b/cpu.cfs_period_us", "100000\n");
    assert_int_equal(quota("4:cpuacct,cpu:/b\n"), 4);
    assert_int_equal(quota("4:cpu,cpuacct:/b/c\n"), 4);
}

static void at_least_one(void **state)
{
    (void)state;
    assert_true(kvt_usable_cpus() >= 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(none, make_root, remove_root),
        cmocka_unit_test_setup_teardown(version_2, make_root, remove_root),
        cmocka_unit_test_setup_teardown(version_1, make_root, remove_root),
        cmocka_unit_test(at_least_one),
    };
    return cmocka_run_group_tests_name("cpu_count", tests, NULL, NULL);
}
