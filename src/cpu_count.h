/*
 * How many CPUs this process may keep busy.
 */
#ifndef KVT_CPU_COUNT_H
#define KVT_CPU_COUNT_H

#include <stdint.h>

/* As many cpu_set_t hold the masks of systems with up to 8192 CPUs. */
#define KVT_CPU_SETS 8

/*
 * CPUs in the calling thread's affinity mask, and no more than the control group's CPU quota
 * rounded down: threads that pass a quota together are all stopped until its period ends. At
 * least 1.
 */
uint32_t kvt_usable_cpus(void);

/*
 * The quota in whole CPUs, at least 1; UINT32_MAX: none. groups: a file as /proc/self/cgroup;
 * mount: where the control groups are, as /sys/fs/cgroup. Apart for the tests.
 */
uint32_t kvt_quota_cpus(const char *groups, const char *mount);

#endif /* KVT_CPU_COUNT_H */
