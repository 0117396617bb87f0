// Placement of weights on a machine that has several memory nodes; tests/numa.sh runs it as the
// first process of a virtual one. Every page of every tensor is looked up and compared with the
// node of the thread whose rows it holds.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "models.h"
#include <sys/mount.h>
#include <sys/reboot.h>

// Pages of the weights on the node where they should be, and of all; a page on a border counts as
// right on either side.
static void count_pages(const moe_model *model, const moe__machine *machine, moe_numa numa,
                        int n_threads, int64_t *right, int64_t *all) {
    moe__nodes nodes;
    const size_t page = moe__machine_page();
    *right = *all = 0;
    moe__machine_nodes(machine, n_threads, &nodes);
    for (int64_t i = 0; i < moe_gguf_n_tensors(model->gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(model->gguf, i);
        const int owned = numa == MOE_NUMA_OWNER && moe__place_has_owners(tensor);
        const int64_t rows = tensor->ne[1], n_rows = rows * tensor->ne[2] * tensor->ne[3];
        const uintptr_t first = (uintptr_t)tensor->data, last = first + (uintptr_t)tensor->size;
        const uintptr_t row_size = (uintptr_t)(tensor->size / (uint64_t)n_rows);
        for (uintptr_t p = (first + page - 1) / page * page; p < last; p += page) {
            const void *pages[1] = {(const void *)p};
            int status[1] = {-1}, good = 0;
            syscall(SYS_move_pages, 0L, 1UL, pages, NULL, status, 0L);
            const int64_t from = (int64_t)((p - first) / row_size);
            for (int64_t r = from; r < n_rows && first + (uintptr_t)r * row_size < p + page; r++) {
                int64_t begin, end;
                int t = 0;
                do {
                    moe__pool_range(rows, MOE__ROW_UNIT, t, n_threads, &begin, &end);
                } while (r % rows >= end && ++t < n_threads);
                good |= status[0] == machine->node[moe__nodes_of(&nodes, t)];
            }
            if (!owned && numa == MOE_NUMA_OWNER) good = status[0] >= 0;
            if (numa == MOE_NUMA_INTERLEAVE)
                good = status[0] == machine->node[p / page % (size_t)machine->n_nodes];
            *right += good;
            *all += 1;
        }
    }
}

static moe__machine machine;

TEST(the_machine_has_two_nodes) {
    uint64_t mask[MOE__MAX_PROCESSORS / 64];
    moe__machine_affinity(mask);
    moe__machine_read(&machine, "", mask);
    printf("  %d processors, %d cores, %d nodes\n", machine.n_processors, machine.n_cores,
           machine.n_nodes);
    CHECK(machine.n_nodes == 2 && machine.n_cores == 4);
    CHECK(moe__pool_default_threads() == 4);
}

// Fresh pages, as malloc gives them for real models: what it gives for small ones may have been
// huge pages before, which do not lie in two places.
static void *fresh_alloc(void *user, size_t size) {
    (void)user;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}
static void fresh_free(void *user, void *memory, size_t size) {
    (void)user;
    munmap(memory, size);
}

TEST(weights_are_placed) {
    int32_t tokens[16];
    float *expected = NULL;
    const char *path = models_simple("qwen3moe_quant", "q4_K");
    for (int way = 0; way < 6; way++) {
        moe_model_options o;
        moe_session_options s;
        moe_error error;
        int64_t right, all;
        memset(&o, 0, sizeof o);
        memset(&s, 0, sizeof s);
        o.allocator.alloc = fresh_alloc;
        o.allocator.free = fresh_free;
        o.numa = (moe_numa)(way % 3);
        o.pages = way / 3 ? MOE_PAGES_COPY : MOE_PAGES_MAP;
        moe_model *model = moe_model_open(path, &o, &error);
        CHECK(model != NULL);
        if (!model) continue;
        const moe_model_memory *memory = moe_model_get_memory(model);
        count_pages(model, &machine, o.numa, 4, &right, &all);
        printf("  numa %d, %s: %d of %d pages where they should be, %d bytes placed\n",
               (int)o.numa, o.pages == MOE_PAGES_COPY ? "copied" : "mapped", (int)right, (int)all,
               (int)memory->n_bytes_placed);
        CHECK(memory->numa == o.numa && memory->n_nodes == 2);
        if (o.numa) CHECK(all >= 300 && right == all);
        if (o.numa) CHECK(memory->n_bytes_placed + 100 * 4096 > (uint64_t)all * 4096);
        models_tokens(tokens, 16, moe_model_get_info(model)->n_vocab, 1);
        for (s.schedule = (moe_schedule)1; s.schedule <= 3;
             s.schedule = (moe_schedule)(s.schedule + 1)) {
            moe_session *session = moe_session_open(model, &s, &error);
            CHECK(session && session->pool->nodes.n == (o.numa == MOE_NUMA_OWNER ? 2 : 1));
            moe_session_close(session);
            float *logits = models_run(model, &s, tokens, 16, 1);
            const size_t size = sizeof(float) * 16 * (size_t)moe_model_get_info(model)->n_vocab;
            if (expected) CHECK(logits && !memcmp(expected, logits, size));
            if (expected) free(logits);
            else expected = logits;
        }
        moe_model_close(model);
    }
    free(expected);
}

// Jobs smaller than the pool: both nodes take part, every thread on its node.
static int32_t seen[4];
static void where_job(void *context, int thread, int n) {
    unsigned cpu = 0, node = 0;
    (void)n;
    syscall(SYS_getcpu, &cpu, &node, NULL);
    seen[thread] = (int32_t)node;
    moe__pool_barrier((moe_pool *)context, thread);
}
TEST(threads_stand_on_their_nodes) {
    moe_pool_options p;
    memset(&p, 0, sizeof p);
    p.pin = MOE_ON;
    moe_pool *pool = moe_pool_open(&p, NULL);
    CHECK(pool != NULL);
    if (!pool) return;
    for (int n = 2; n <= 4; n++) {
        moe__nodes nodes;
        moe__pool_nodes(pool, n, &nodes);
        moe__pool_run(pool, n, where_job, pool, NULL);
        for (int t = 0; t < n; t++)
            CHECKF(seen[t] == machine.node[moe__nodes_of(&nodes, t)], "thread %d of %d", t, n);
        CHECK(seen[0] == 0 && seen[n - 1] == 1);
    }
    moe_pool_close(pool);
}

int main(int argc, char **argv) {
    const int first = getpid() == 1;
    if (first) {
        mkdir("/proc", 0755);
        mkdir("/sys", 0755);
        mkdir("/work", 0755);
        if (mount("proc", "/proc", "proc", 0, NULL) || mount("sysfs", "/sys", "sysfs", 0, NULL) ||
            mount("tmpfs", "/work", "tmpfs", 0, NULL) || chdir("/work"))
            perror("mount");
    }
    const int code = test_main(first ? 1 : argc, argv);
    fflush(stdout);
    sync();
    if (first) reboot(RB_POWER_OFF);
    return code;
}
