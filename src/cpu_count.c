/*
 * How many CPUs this process may keep busy: the affinity mask, and the control groups' quotas
 * (Linux: version 2 "cpu.max", version 1 "cpu.cfs_quota_us" of "cpu.cfs_period_us").
 *
 * A quota counts in every group from the process's own up to the root. In a container the path that
 * /proc/self/cgroup names may be the host's while the mount begins at the container's own group:
 * then that path does not exist below the mount, and its root is the group. So every prefix of
 * the path is tried, the empty one too, and what cannot be read is no quota.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include "src/cpu_count.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PATH_BYTES = 4096, LINE_BYTES = 512 };

/* The first line of a file; 0: there is none. */
static int read_line(const char *mount, const char *group, const char *name, char *line)
{
    char path[PATH_BYTES];
    FILE *file;
    int length = snprintf(path, sizeof path, "%s%s/%s", mount, group, name), got;
    if (length < 0 || (size_t)length >= sizeof path)
        return 0;
    file = fopen(path, "re");
    if (!file)
        return 0;
    got = fgets(line, LINE_BYTES, file) != NULL;
    fclose(file);
    return got;
}

static uint32_t whole_cpus(long long quota, long long period)
{
    if (quota <= 0 || period <= 0) /* version 1: -1 is none */
        return UINT32_MAX;
    if (quota / period >= UINT32_MAX)
        return UINT32_MAX;
    return quota < period ? 1 : (uint32_t)(quota / period);
}

static uint32_t group_cpus(const char *mount, const char *group)
{
    char line[LINE_BYTES], *end;
    long long quota;
    if (read_line(mount, group, "cpu.max", line)) { /* "max 100000", "150000 100000" */
        quota = strtoll(line, &end, 10);
        return end == line ? UINT32_MAX : whole_cpus(quota, strtoll(end, NULL, 10));
    }
    if (!read_line(mount, group, "cpu.cfs_quota_us", line))
        return UINT32_MAX;
    quota = strtoll(line, NULL, 10);
    return read_line(mount, group, "cpu.cfs_period_us", line)
               ? whole_cpus(quota, strtoll(line, NULL, 10))
               : UINT32_MAX;
}

/* The least of a group and all above it. Shortens the path. */
static uint32_t path_cpus(const char *mount, char *path)
{
    uint32_t least = UINT32_MAX;
    for (;;) {
        char *slash = strrchr(path, '/');
        uint32_t cpus;
        if (slash && slash[1] == '\0') /* "/" */
            *slash = '\0';
        cpus = group_cpus(mount, path);
        least = cpus < least ? cpus : least;
        slash = strrchr(path, '/');
        if (!slash)
            return least;
        *slash = '\0';
    }
}

/* Whether a list of controllers, as "cpu,cpuacct", has "cpu". */
static int has_cpu(const char *list)
{
    for (; *list; list += strcspn(list, ","), list += *list == ',')
        if (strncmp(list, "cpu", 3) == 0 && (list[3] == ',' || list[3] == '\0'))
            return 1;
    return 0;
}

uint32_t kvt_quota_cpus(const char *groups, const char *mount)
{
    /* Where version 1 mounts the controller, by the names that distributions give it. */
    static const char *const folders[] = {"", "/cpu", "/cpu,cpuacct", "/cpuacct,cpu", "/unified"};
    char line[PATH_BYTES], where[PATH_BYTES], path[PATH_BYTES];
    uint32_t least = UINT32_MAX;
    FILE *file = fopen(groups, "re");

    if (!file)
        return least;
    while (fgets(line, sizeof line, file)) { /* "0::/path", "4:cpu,cpuacct:/path" */
        char *list = strchr(line, ':'), *group = list ? strchr(list + 1, ':') : NULL;
        if (!group)
            continue;
        *group++ = '\0';
        group[strcspn(group, "\n")] = '\0';
        if (list[1] != '\0' && !has_cpu(list + 1))
            continue;
        for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
            uint32_t cpus;
            int length = snprintf(where, sizeof where, "%s%s", mount, folders[i]);
            if (length < 0 || (size_t)length >= sizeof where)
                continue;
            strcpy(path, group);
            cpus = path_cpus(where, path);
            least = cpus < least ? cpus : least;
        }
    }
    fclose(file);
    return least;
}

static uint32_t mask_cpus(void)
{
    long online;
#if defined(__linux__)
    cpu_set_t set[KVT_CPU_SETS];
    if (sched_getaffinity(0, sizeof set, set) == 0)
        return (uint32_t)CPU_COUNT_S(sizeof set, set);
#endif
    online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 1 ? (uint32_t)online : 1;
}

uint32_t kvt_usable_cpus(void)
{
    uint32_t cpus = mask_cpus(), quota = kvt_quota_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
    cpus = cpus < quota ? cpus : quota;
    return cpus > 0 ? cpus : 1;
}
