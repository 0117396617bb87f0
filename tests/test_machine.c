// >>machine: processors, cores, memory nodes, quotas of made-up machines; binding on this one.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"
#include <sys/wait.h>

// ---- made-up machines: files below a folder of their own -------------------------------------

static char root[256];

// An empty machine.
static int begin_machine(void) {
    static int n_machines;
    char command[600];
    snprintf(root, sizeof root, "build/test_machine_%d_%d", (int)getpid(), n_machines++);
    snprintf(command, sizeof command, "mkdir -p %s", root);
    return system(command) == 0;
}
static void end_machine(void) {
    char command[600];
    snprintf(command, sizeof command, "rm -rf %s", root);
    CHECK(system(command) == 0);
}

static void put(const char *path, const char *text) {
    char whole[1024], command[1200];
    snprintf(whole, sizeof whole, "%s%s", root, path);
    snprintf(command, sizeof command, "mkdir -p \"$(dirname '%s')\"", whole);
    CHECK(system(command) == 0);
    FILE *f = fopen(whole, "w");
    CHECK(f != NULL);
    if (!f) return;
    fputs(text, f);
    fclose(f);
}

static void put_node(int node, const char *processors) {
    char path[128];
    snprintf(path, sizeof path, "/sys/devices/system/node/node%d/cpulist", node);
    put(path, processors);
}
static void put_siblings(int processor, const char *siblings) {
    char path[128];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
             processor);
    put(path, siblings);
}

static uint64_t mask[MOE__MAX_PROCESSORS / 64];
static void allow(int first, int last) {
    memset(mask, 0, sizeof mask);
    for (int i = first; i <= last; i++) mask[i / 64] |= (uint64_t)1 << (i % 64);
}

static int order_is(const moe__machine *m, const int *expected, int n) {
    for (int i = 0; i < n; i++)
        if (m->order[i] != expected[i]) return 0;
    return m->first[m->n_nodes] == n;
}

// Two sockets of four cores with two hardware threads each: 0-3 and 8-11, 4-7 and 12-15.
static void two_sockets(void) {
    put("/sys/devices/system/node/online", "0-1\n");
    put_node(0, "0-3,8-11\n");
    put_node(1, "4-7,12-15\n");
    for (int i = 0; i < 16; i++) {
        char siblings[32];
        snprintf(siblings, sizeof siblings, "%d,%d\n", i % 8, i % 8 + 8);
        put_siblings(i, siblings);
    }
}

TEST(threads_take_cores_first_then_hardware_threads) {
    const int order[] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
    moe__machine m;
    moe__nodes nodes;
    if (!begin_machine()) SKIP("cannot write files");
    two_sockets();
    allow(0, 15);
    moe__machine_read(&m, root, mask);
    CHECK(m.n_processors == 16 && m.n_cores == 8 && m.n_nodes == 2);
    CHECK(m.node[0] == 0 && m.node[1] == 1 && m.cores[1] == 4 && m.cores[2] == 8);
    CHECK(order_is(&m, order, 16));
    CHECK(moe__machine_threads(&m, root) == 8);
    // threads in blocks, a core each, then second hardware threads of the same node
    const int processors[] = {0, 1, 2, 3, 4, 5, 6, 7};
    moe__machine_nodes(&m, 8, &nodes);
    CHECK(nodes.n == 2 && nodes.first[1] == 4 && nodes.first[2] == 8);
    for (int t = 0; t < 8; t++) CHECK(moe__machine_processor(&m, &nodes, t) == processors[t]);
    moe__machine_nodes(&m, 16, &nodes);
    for (int t = 0; t < 16; t++) {
        CHECK(moe__nodes_of(&nodes, t) == t / 8);
        CHECK(moe__machine_processor(&m, &nodes, t) == order[t]);
    }
    moe__machine_nodes(&m, 2, &nodes);
    CHECK(moe__machine_processor(&m, &nodes, 0) == 0);
    CHECK(moe__machine_processor(&m, &nodes, 1) == 4);
    moe__machine_nodes(&m, 40, &nodes); // more threads than hardware threads
    for (int t = 0; t < 40; t++) {
        const int p = moe__machine_processor(&m, &nodes, t);
        CHECK((p / 4) % 2 == t / 20);
    }
    end_machine();
}

TEST(affinity_limits_what_is_counted) {
    moe__machine m;
    if (!begin_machine()) SKIP("cannot write files");
    two_sockets();
    allow(12, 13); // second hardware threads alone: then they are the cores
    moe__machine_read(&m, root, mask);
    CHECK(m.n_processors == 2 && m.n_cores == 2 && m.n_nodes == 1 && m.node[0] == 1);
    CHECK(m.order[0] == 12 && m.order[1] == 13);
    allow(3, 4);
    moe__machine_read(&m, root, mask);
    CHECK(m.n_cores == 2 && m.n_nodes == 2 && m.order[0] == 3 && m.order[1] == 4);
    allow(7, 15); // 7 and 15 are one core
    moe__machine_read(&m, root, mask);
    CHECK(m.n_processors == 9 && m.n_cores == 8 && m.n_nodes == 2);
    const int order[] = {8, 9, 10, 11, 7, 12, 13, 14, 15};
    CHECK(order_is(&m, order, 9));
    end_machine();
}

TEST(odd_machines_are_read_without_harm) {
    moe__machine m;
    moe__nodes nodes;
    if (!begin_machine()) SKIP("cannot write files");
    allow(0, 5); // nothing is known: one node, each processor a core
    moe__machine_read(&m, root, mask);
    CHECK(m.n_processors == 6 && m.n_cores == 6 && m.n_nodes == 1 && m.node[0] == 0);
    // numbers with gaps, a node of memory alone, alternating processors, one that no node has
    put("/sys/devices/system/node/online", "0,2,8");
    put_node(0, "1,3");
    put_node(2, "\n");
    put_node(8, "0,2,4");
    moe__machine_read(&m, root, mask);
    const int order[] = {1, 3, 0, 2, 4, 5};
    CHECK(m.n_nodes == 3 && m.node[0] == 0 && m.node[1] == 8 && m.node[2] == 0);
    CHECK(order_is(&m, order, 6) && m.cores[1] == 2 && m.cores[2] == 5);
    // nodes of 2, 3 and 1 cores: threads in proportion
    moe__machine_nodes(&m, 12, &nodes);
    CHECK(nodes.first[1] == 4 && nodes.first[2] == 10 && nodes.first[3] == 12);
    moe__machine_nodes(&m, 1, &nodes);
    CHECK(moe__nodes_of(&nodes, 0) == 2 && moe__machine_processor(&m, &nodes, 0) == 5);
    end_machine();
    if (!begin_machine()) SKIP("cannot write files");
    put("/sys/devices/system/node/online", "junk");
    moe__machine_read(&m, root, mask);
    CHECK(m.n_nodes == 1 && m.n_cores == 6);
    put("/sys/devices/system/node/online", "0-99999999999999999999,-5");
    put_node(0, "0-2-4,x");
    put_node(70, "3-3,3,99999999999");
    put_siblings(4, "");
    put_siblings(5, "7-9");
    moe__machine_read(&m, root, mask);
    CHECK(m.n_processors == 6 && m.first[m.n_nodes] == 6 && m.n_cores <= 6 && m.n_cores >= 1);
    end_machine();
    memset(mask, 0, sizeof mask); // the system says: no processor at all
    moe__machine_read(&m, "/nonexistent", mask);
    CHECK(m.n_nodes == 1 && moe__machine_threads(&m, "/nonexistent") == 1);
    moe__machine_nodes(&m, 3, &nodes);
    CHECK(nodes.n == 1 && nodes.first[1] == 3 && moe__machine_processor(&m, &nodes, 2) == 0);
}

TEST(nodes_beyond_the_limit_keep_their_processors) {
    moe__machine m;
    if (!begin_machine()) SKIP("cannot write files");
    put("/sys/devices/system/node/online", "0-79\n");
    for (int i = 0; i < 80; i++) {
        char processor[16];
        snprintf(processor, sizeof processor, "%d\n", i);
        put_node(i, processor);
    }
    allow(0, 79);
    moe__machine_read(&m, root, mask);
    CHECK(m.n_nodes == MOE__MAX_NODES && m.n_cores == 80 && m.first[m.n_nodes] == 80);
    end_machine();
}

// Whatever the nodes are: every thread has one, none is empty that has enough cores.
TEST(threads_are_spread_in_blocks) {
    uint32_t random = 3;
    for (int repeat = 0; repeat < 200; repeat++) {
        moe__machine m;
        moe__nodes nodes;
        memset(&m, 0, sizeof m);
        random = random * 1664525u + 1013904223u;
        m.n_nodes = 1 + (int)((random >> 20) % 8);
        for (int k = 0; k < m.n_nodes; k++) {
            random = random * 1664525u + 1013904223u;
            m.cores[k + 1] = m.cores[k] + 1 + (int)((random >> 16) % 9);
        }
        m.n_cores = m.cores[m.n_nodes];
        for (int n = 1; n <= 2 * m.n_cores; n++) {
            moe__machine_nodes(&m, n, &nodes);
            CHECK(nodes.first[0] == 0 && nodes.first[nodes.n] == n);
            for (int k = 0; k < nodes.n; k++) {
                const int each = nodes.first[k + 1] - nodes.first[k];
                const int cores = m.cores[k + 1] - m.cores[k];
                CHECK(each * m.n_cores < (cores + 0) * n + m.n_cores && each >= 0);
                if (n >= m.n_cores) CHECK(each > 0);
                for (int t = nodes.first[k]; t < nodes.first[k + 1]; t++)
                    CHECK(moe__nodes_of(&nodes, t) == k);
            }
        }
    }
}

// ---- quotas ----------------------------------------------------------------------------------

TEST(quotas_are_rounded_up_and_junk_is_ignored) {
    const char *texts[] = {"max 100000\n", "150000 100000\n", "50000 100000", "", "junk", "100 0",
                           "-1 100000", "99999999999999 1", "nan 5", "900000 100000"};
    const int counts[] = {8, 2, 1, 8, 8, 8, 8, 8, 8, 8};
    if (!begin_machine()) SKIP("cannot write files");
    for (int i = 0; i < 10; i++) {
        put("/sys/fs/cgroup/cpu.max", texts[i]);
        CHECKF(moe__machine_quota(root, 8) == counts[i], "\"%s\"", texts[i]);
    }
    end_machine();
    CHECK(moe__machine_quota("/nonexistent", 5) == 5);
}

TEST(the_least_quota_of_nested_groups_counts) {
    if (!begin_machine()) SKIP("cannot write files");
    put("/proc/self/cgroup", "0::/a/b/c\n");
    put("/sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n");
    CHECK(moe__machine_quota(root, 8) == 8);
    put("/sys/fs/cgroup/a/cpu.max", "600000 100000\n");
    CHECK(moe__machine_quota(root, 8) == 6);
    put("/sys/fs/cgroup/a/b/cpu.max", "300000 100000\n");
    CHECK(moe__machine_quota(root, 8) == 3);
    put("/sys/fs/cgroup/a/b/c/cpu.max", "400000 100000\n");
    CHECK(moe__machine_quota(root, 8) == 3);
    put("/sys/fs/cgroup/cpu.max", "200000 100000\n");
    CHECK(moe__machine_quota(root, 8) == 2);
    end_machine();
}

TEST(quotas_of_version_1_groups_count) {
    if (!begin_machine()) SKIP("cannot write files");
    put("/proc/self/cgroup", "12:memory:/x\n5:cpuacct,cpu:/docker/abc\n3:cpuset:/y\n0::/\n");
    put("/sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us", "-1\n");
    put("/sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n");
    CHECK(moe__machine_quota(root, 8) == 8);
    put("/sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us", "250000\n");
    CHECK(moe__machine_quota(root, 8) == 3);
    put("/sys/fs/cgroup/cpu/docker/cpu.cfs_quota_us", "100000\n");
    CHECK(moe__machine_quota(root, 8) == 3); // without a period it says nothing
    put("/sys/fs/cgroup/cpu/docker/cpu.cfs_period_us", "100000\n");
    CHECK(moe__machine_quota(root, 8) == 1);
    put("/proc/self/cgroup", "5:cpuset:/docker\n"); // no controller of processors
    CHECK(moe__machine_quota(root, 8) == 8);
    put("/proc/self/cgroup", "::::\n\n0::/../..\n7:cpu\n:\nx");
    CHECK(moe__machine_quota(root, 8) == 8);
    end_machine();
}

// ---- free memory -----------------------------------------------------------------------------

TEST(the_group_with_the_least_memory_left_counts) {
    const uint64_t mib = 1 << 20;
    if (!begin_machine()) SKIP("cannot write files");
    CHECK(moe__machine_memory("/nonexistent") == UINT64_MAX);
    put("/proc/meminfo", "MemTotal:       24684076 kB\nMemFree:         102400 kB\n");
    CHECK(moe__machine_memory(root) == 100 * mib); // systems before 3.14
    put("/proc/meminfo", "MemTotal: 24684076 kB\nMemFree: 102400 kB\nMemAvailable:   8192000 kB\n"
                         "SwapFree: 99999999 kB\n");
    CHECK(moe__machine_memory(root) == 8000 * mib); // without swap
    // version 2: the least of all groups; what is cached of files gives way
    put("/proc/self/cgroup", "0::/a/b\n");
    put("/sys/fs/cgroup/a/b/memory.max", "max\n");
    put("/sys/fs/cgroup/a/b/memory.current", "1048576\n");
    CHECK(moe__machine_memory(root) == 8000 * mib);
    put("/sys/fs/cgroup/a/memory.max", "1073741824\n");
    put("/sys/fs/cgroup/a/memory.current", "524288000\n");
    CHECK(moe__machine_memory(root) == 524 * mib);
    put("/sys/fs/cgroup/a/memory.stat", "anon 5\nfile 999999999\ninactive_file 209715200\n"
                                        "active_file 104857600\n");
    CHECK(moe__machine_memory(root) == 824 * mib);
    put("/sys/fs/cgroup/a/memory.high", "536870912\n");
    CHECK(moe__machine_memory(root) == 312 * mib);
    put("/sys/fs/cgroup/memory.max", "4096\n");
    CHECK(moe__machine_memory(root) == 4096);
    put("/sys/fs/cgroup/memory.current", "8192\n");
    CHECK(moe__machine_memory(root) == 0);
    end_machine();
}

TEST(memory_limits_of_version_1_groups_count) {
    const uint64_t mib = 1 << 20;
    if (!begin_machine()) SKIP("cannot write files");
    put("/proc/meminfo", "MemAvailable:   8192000 kB\n");
    put("/proc/self/cgroup", "4:memory:/x/y\n5:cpu:/z\n0::/\n");
    put("/sys/fs/cgroup/memory/x/y/memory.limit_in_bytes", "9223372036854771712\n");
    put("/sys/fs/cgroup/memory/x/y/memory.usage_in_bytes", "104857600\n");
    CHECK(moe__machine_memory(root) == 8000 * mib);
    put("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "209715200\n");
    put("/sys/fs/cgroup/memory/x/memory.usage_in_bytes", "104857600\n");
    CHECK(moe__machine_memory(root) == 100 * mib);
    put("/sys/fs/cgroup/memory/x/memory.stat", "cache 1\ninactive_file 4096\n"
        "total_inactive_file 52428800\ntotal_active_file 0\n");
    CHECK(moe__machine_memory(root) == 150 * mib);
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "junk");
    CHECK(moe__machine_memory(root) == 150 * mib);
    put("/sys/fs/cgroup/memory/x/memory.stat", "total_inactive_file 99999999999999\n");
    CHECK(moe__machine_memory(root) == 200 * mib); // not more than is used
    end_machine();
}

// In a process of its own: limits cannot be raised again.
TEST(limits_of_the_process_bound_its_memory) {
    if (!begin_machine()) SKIP("cannot write files");
    put("/proc/meminfo", "MemAvailable:   8192000 kB\n");
    put("/proc/self/statm", "25600 9 9 9 0 12800 0\n"); // 100 MiB, of it 50 MiB data
    for (int kind = 0; kind < 2; kind++) {
        const pid_t child = fork();
        int state = 1;
        if (child == 0) {
            struct rlimit limit;
            limit.rlim_cur = limit.rlim_max = (rlim_t)1 << 38;
            if (setrlimit(kind ? RLIMIT_DATA : RLIMIT_AS, &limit)) _exit(2);
            if (moe__machine_memory(root) != (uint64_t)8000 << 20) _exit(3);
            limit.rlim_cur = limit.rlim_max = (rlim_t)1 << 31;
            if (setrlimit(kind ? RLIMIT_DATA : RLIMIT_AS, &limit)) _exit(2);
            const uint64_t used = (uint64_t)(kind ? 12800 : 25600) * moe__machine_page();
            _exit(moe__machine_memory(root) == ((uint64_t)1 << 31) - used ? 0 : 4);
        }
        CHECK(child > 0 && waitpid(child, &state, 0) == child);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
        CHECKF(WIFEXITED(state) && WEXITSTATUS(state) == 0, "state %d", state);
#endif
    }
    end_machine();
}

// ---- this machine ----------------------------------------------------------------------------

TEST(this_machine_is_read_consistently) {
    moe__machine m;
    const int n = moe__machine_affinity(mask);
    CHECK(n >= 1 && n <= sysconf(_SC_NPROCESSORS_ONLN));
    moe__machine_read(&m, "", mask);
    CHECK(m.n_processors == n && m.n_cores >= 1 && m.n_cores <= n && m.first[m.n_nodes] == n);
    CHECK(moe__machine_threads(&m, "") >= 1 && moe__machine_threads(&m, "") <= m.n_cores);
    for (int i = 0; i < n; i++) CHECK(moe__machine_bit(mask, m.order[i]));
}

TEST(policies_can_be_set_and_set_back) {
    moe__machine m;
    moe__policy before, policy, now;
    moe__machine_affinity(mask);
    moe__machine_read(&m, "", mask);
    if (!moe__policy_get(&before)) SKIP("the system does not tell its memory policy");
    for (int mode = 0; mode < 2; mode++) {
        moe__policy_init(&policy, &m, mode ? MOE__POLICY_INTERLEAVE : MOE__POLICY_PREFERRED, 0);
        CHECK(policy.nodes[m.node[0] / 64] >> (m.node[0] % 64) & 1);
        if (!moe__policy_set(&policy)) SKIP("the system does not let us set its memory policy");
        CHECK(moe__policy_get(&now) && now.mode == policy.mode);
        CHECK(!memcmp(now.nodes, policy.nodes, sizeof now.nodes));
    }
    CHECK(moe__policy_set(&before) && moe__policy_get(&now) && now.mode == before.mode);
}

TEST(pages_move_to_a_node_and_tell_where_they_lie) {
    moe__machine m;
    const size_t page = moe__machine_page();
    moe__machine_affinity(mask);
    moe__machine_read(&m, "", mask);
    uint8_t *memory = (uint8_t *)mmap(NULL, 4 * page, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | 0x20 /* MAP_ANONYMOUS */, -1, 0);
    if (memory == MAP_FAILED) SKIP("no memory");
    const void *pages[4];
    int to[4], status[4];
    for (int i = 0; i < 4; i++) {
        pages[i] = memory + (size_t)i * page;
        to[i] = m.node[0];
        if (i < 3) memory[(size_t)i * page] = 1;
    }
    if (!moe__machine_move(pages, to, 4, status)) SKIP("the system does not move pages");
    for (int i = 0; i < 3; i++) CHECK(status[i] == m.node[0]);
    CHECK(status[3] < 0); // was never touched
    to[0] = MOE__POLICY_BITS - 1; // no such node
    CHECK(!moe__machine_move(pages, to, 1, status));
    munmap(memory, 4 * page);
}

MAIN()
