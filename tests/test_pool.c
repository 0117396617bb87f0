/* >>pool: wake, barrier, shares, many threads on few processors. */
#include <sys/syscall.h>
#include <unistd.h>

/* Counts the calls of the kernel, which are how a thread of the pool sleeps. */
static int calls_made; /* atomic */
#define syscall(...) (__atomic_fetch_add(&calls_made, 1, __ATOMIC_RELAXED), syscall(__VA_ARGS__))

#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

typedef struct counting {
    moe_pool *pool;
    int rounds;
    uint32_t total;         /* atomic */
    int64_t plain[64];      /* written by one thread, read by the others after a barrier */
    int wrong;              /* atomic */
} counting;

/* Between two barriers all threads add; after the barrier everyone must see the whole sum. */
static void counting_job(void *context, int thread, int n) {
    counting *c = (counting *)context;
    for (int round = 1; round <= c->rounds; round++) {
        __atomic_fetch_add(&c->total, 1, __ATOMIC_RELAXED);
        c->plain[thread] = round;
        moe__pool_barrier(c->pool, thread);
        if (__atomic_load_n(&c->total, __ATOMIC_RELAXED) != (uint32_t)(round * n))
            __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
        for (int i = 0; i < n; i++)
            if (c->plain[i] != round) __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
        moe__pool_barrier(c->pool, thread);
    }
}

static void run_counting(int pool_threads, int active, int rounds, int spin_us) {
    moe_pool_options options;
    moe_error error;
    counting c;
    memset(&options, 0, sizeof options);
    options.n_threads = pool_threads;
    options.spin_us = spin_us;
    memset(&c, 0, sizeof c);
    c.pool = moe_pool_open(&options, &error);
    CHECK(c.pool != NULL);
    if (!c.pool) return;
    CHECK(moe_pool_threads(c.pool) == pool_threads);
    c.rounds = rounds;
    moe__pool_run(c.pool, active, counting_job, &c, NULL);
    CHECKF(c.wrong == 0, "%d threads of %d: %d wrong sums", active, pool_threads, c.wrong);
    CHECK(c.total == (uint32_t)(active * rounds));
    moe_pool_close(c.pool);
}

TEST(barriers_separate_rounds) {
    const int threads[] = {1, 2, 3, 4, 5, 7, 8, 16, 33, 64};
    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        run_counting(threads[i], threads[i], 20, 0);
        run_counting(threads[i], threads[i], 20, MOE_OFF);
    }
}

TEST(fewer_threads_than_the_pool_has) {
    for (int active = 1; active <= 6; active++) run_counting(6, active, 30, 5);
}

TEST(changing_numbers_of_threads_between_jobs) {
    moe_pool_options options;
    memset(&options, 0, sizeof options);
    options.n_threads = 7;
    moe_pool *pool = moe_pool_open(&options, NULL);
    CHECK(pool != NULL);
    if (!pool) return;
    uint32_t random = 1;
    for (int job = 0; job < 400; job++) {
        counting c;
        memset(&c, 0, sizeof c);
        c.pool = pool;
        c.rounds = 2;
        random = random * 1664525u + 1013904223u;
        int active = 1 + (int)((random >> 16) % 7);
        moe__pool_run(pool, active, counting_job, &c, NULL);
        CHECKF(c.wrong == 0 && c.total == (uint32_t)(2 * active), "job %d", job);
    }
    moe_pool_close(pool);
}

static void *hammer(void *argument) {
    moe_pool *pool = (moe_pool *)argument;
    intptr_t wrong = 0;
    for (int i = 0; i < 50; i++) {
        counting c;
        memset(&c, 0, sizeof c);
        c.pool = pool;
        c.rounds = 2;
        moe__pool_run(pool, 1 + i % 3, counting_job, &c, NULL);
        wrong += c.wrong;
    }
    return (void *)wrong;
}

TEST(callers_take_turns) {
    moe_pool_options options;
    memset(&options, 0, sizeof options);
    options.n_threads = 3;
    moe_pool *pool = moe_pool_open(&options, NULL);
    CHECK(pool != NULL);
    if (!pool) return;
    pthread_t callers[4];
    for (int i = 0; i < 4; i++) CHECK(!pthread_create(&callers[i], NULL, hammer, pool));
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(callers[i], &wrong);
        CHECK(wrong == NULL);
    }
    moe_pool_close(pool);
}

TEST(shares_cover_everything_evenly) {
    for (int64_t total = 0; total <= 200; total += total < 40 ? 1 : 7)
        for (int64_t unit = 1; unit <= 32; unit *= 2)
            for (int n = 1; n <= 70; n++) {
                int64_t next = 0, least = INT64_MAX, most = 0;
                for (int i = 0; i < n; i++) {
                    int64_t begin, end;
                    moe__pool_share(total, unit, i, n, &begin, &end);
                    CHECK(begin == next && end >= begin && begin % unit == 0 * unit);
                    int64_t units = (end - begin + unit - 1) / unit;
                    least = moe__min(least, units);
                    most = moe__max(most, units);
                    next = end;
                }
                CHECK(next == total && most - least <= 1);
            }
}

TEST(options_are_checked) {
    moe_pool_options options;
    moe_error error;
    memset(&options, 0, sizeof options);
    options.n_threads = -1;
    CHECK(!moe_pool_open(&options, &error) && error.status == MOE_ERROR_ARGUMENT);
    options.n_threads = MOE_MAX_THREADS + 1;
    CHECK(!moe_pool_open(&options, &error) && error.status == MOE_ERROR_ARGUMENT);
    moe_pool *pool = moe_pool_open(NULL, NULL);
    CHECK(pool && moe_pool_threads(pool) == moe__pool_default_threads());
    CHECK(moe_pool_threads(pool) >= 1 && moe_pool_threads(pool) <= sysconf(_SC_NPROCESSORS_ONLN));
    moe_pool_close(pool);
    moe_pool_close(NULL);
}

/* Idle workers use no processor time: they go to sleep and stay there. */
TEST(idle_workers_sleep) {
    moe_pool_options options;
    counting c;
    memset(&options, 0, sizeof options);
    memset(&c, 0, sizeof c);
    options.n_threads = 4;
    c.pool = moe_pool_open(&options, NULL);
    c.rounds = 3;
    if (!c.pool) return;
    moe__pool_run(c.pool, 4, counting_job, &c, NULL);
    const uint32_t *sleepers = &c.pool->command.sleepers;
    struct timespec pause;
    pause.tv_sec = 0;
    pause.tv_nsec = 1000000;
    for (int i = 0; i < 30000 && __atomic_load_n(sleepers, __ATOMIC_SEQ_CST) < 3; i++)
        syscall(SYS_nanosleep, &pause, NULL);
    int before = __atomic_load_n(&calls_made, __ATOMIC_RELAXED);
    pause.tv_nsec = 200 * 1000000;
    syscall(SYS_nanosleep, &pause, NULL);
    int calls = __atomic_load_n(&calls_made, __ATOMIC_RELAXED) - before;
    CHECK(__atomic_load_n(sleepers, __ATOMIC_SEQ_CST) == 3);
    CHECKF(calls < 20, "%d calls of the kernel while three workers were idle", calls);
    moe_pool_close(c.pool);
}

/* ---- who takes part, who stands where -------------------------------------------------------- */

TEST(workers_are_spread_over_the_pool) {
    moe_pool pool;
    memset(&pool, 0, sizeof pool);
    for (pool.n_threads = 1; pool.n_threads <= 70; pool.n_threads++)
        for (int n = 1; n <= pool.n_threads; n++) {
            int next = 0;
            for (int w = 0; w < pool.n_threads; w++) {
                const int rank = moe__pool_rank(&pool, w, n);
                CHECK(rank == next);
                if (moe__pool_rank(&pool, w + 1, n) == rank) continue;
                CHECK(moe__pool_worker_of(&pool, rank, n) == w);
                next++;
            }
            CHECK(next == n && moe__pool_worker_of(&pool, 0, n) == 0);
        }
}

TEST(small_jobs_use_all_nodes) {
    moe_pool pool;
    moe__nodes nodes;
    memset(&pool, 0, sizeof pool);
    pool.n_threads = 64;
    pool.nodes.n = 2;
    pool.nodes.first[1] = 32;
    pool.nodes.first[2] = 64;
    for (int n = 2; n <= 64; n++) {
        moe__pool_nodes(&pool, n, &nodes);
        CHECK(nodes.n == 2 && nodes.first[0] == 0 && nodes.first[2] == n);
        CHECK(nodes.first[1] == (n + 1) / 2);
        for (int t = 0; t < n; t++)
            CHECK(moe__nodes_of(&nodes, t) == moe__pool_worker_of(&pool, t, n) / 32);
    }
}

TEST(groups_at_a_barrier) {
    for (int nodes = 1; nodes <= 8; nodes++)
        for (int n = 1; n <= MOE_MAX_THREADS; n++) {
            const int leaf = moe__pool_leaf(n, nodes);
            CHECK(leaf >= 1 && leaf <= 16 && (n + leaf - 1) / leaf <= (n + 3) / 4);
            if (n >= 4 * nodes && n % nodes == 0) CHECK((n / nodes + leaf - 1) / leaf * leaf <
                                                        n / nodes + leaf);
        }
    CHECK(moe__pool_leaf(16, 1) == 16 && moe__pool_leaf(17, 1) == 9);
    CHECK(moe__pool_leaf(16, 2) == 8 && moe__pool_leaf(128, 2) == 16);
    CHECK(moe__pool_leaf(96, 2) == 16 && moe__pool_leaf(88, 2) == 15 && moe__pool_leaf(2, 2) == 2);
}

/* A pool whose threads count as those of two nodes. */
TEST(barriers_over_two_nodes) {
    moe_pool_options options;
    memset(&options, 0, sizeof options);
    for (options.n_threads = 8; options.n_threads <= 40; options.n_threads += 8) {
        counting c;
        memset(&c, 0, sizeof c);
        c.pool = moe_pool_open(&options, NULL);
        if (!c.pool) return;
        c.pool->nodes.n = 2;
        c.pool->nodes.first[1] = options.n_threads / 2;
        c.pool->nodes.first[2] = options.n_threads;
        for (int n = 1; n <= options.n_threads; n += 3) {
            c.rounds = 5;
            c.total = 0;
            moe__pool_run(c.pool, n, counting_job, &c, NULL);
            CHECKF(c.wrong == 0 && c.total == (uint32_t)(5 * n), "%d of %d", n, options.n_threads);
        }
        moe_pool_close(c.pool);
    }
}

typedef struct binding {
    moe_pool *pool;
    int32_t n_processors[64];
    int processor[64];
} binding;
static void binding_job(void *context, int thread, int n) {
    binding *b = (binding *)context;
    uint64_t mask[MOE__MAX_PROCESSORS / 64];
    (void)n;
    b->n_processors[thread] = moe__machine_affinity(mask);
    for (b->processor[thread] = 0; !moe__machine_bit(mask, b->processor[thread]);)
        b->processor[thread]++;
    moe__pool_barrier(b->pool, thread);
}

TEST(pinned_threads_stay_where_they_are) {
    uint64_t before[MOE__MAX_PROCESSORS / 64], after[MOE__MAX_PROCESSORS / 64];
    moe_pool_options options;
    moe__machine machine;
    binding b;
    memset(&options, 0, sizeof options);
    memset(&b, 0, sizeof b);
    moe__machine_affinity(before);
    moe__machine_read(&machine, "", before);
    for (options.pin = 0; options.pin <= 1; options.pin++) {
        options.n_threads = machine.n_processors < 60 ? machine.n_processors + 1 : 60;
        b.pool = moe_pool_open(&options, NULL);
        if (!b.pool) return;
        CHECK(moe_pool_nodes(b.pool) == (options.pin ? machine.n_nodes : 1));
        moe__pool_run(b.pool, options.n_threads, binding_job, &b, NULL);
        for (int t = 0; t < options.n_threads; t++) {
            if (!options.pin) {
                CHECK(b.n_processors[t] == machine.n_processors);
                continue;
            }
            CHECK(b.n_processors[t] == 1);
            CHECK(b.processor[t] == moe__machine_processor(&machine, &b.pool->nodes, t));
            for (int other = 0; other < t && t < machine.n_processors; other++)
                CHECK(b.processor[other] != b.processor[t]);
        }
        moe_pool_close(b.pool);
        moe__machine_affinity(after);
        CHECK(!memcmp(before, after, sizeof before)); /* the caller is as free as before */
    }
    CHECK(moe_pool_nodes(NULL) == 0);
}

/* ---- waiting --------------------------------------------------------------------------------- */

static int n_early; /* atomic: threads that came to the barriers of late_job, but the late one */

/* The last thread comes 30 ms after the others, however late they are. */
static void late_job(void *context, int thread, int n) {
    moe_pool *pool = (moe_pool *)context;
    struct timespec pause;
    pause.tv_sec = 0;
    for (int i = 1; i <= 2; i++) {
        pause.tv_nsec = 1000000;
        if (thread < n - 1) __atomic_fetch_add(&n_early, 1, __ATOMIC_RELAXED);
        else while (__atomic_load_n(&n_early, __ATOMIC_RELAXED) < i * (n - 1))
            syscall(SYS_nanosleep, &pause, NULL);
        pause.tv_nsec = 30 * 1000000;
        if (thread == n - 1) syscall(SYS_nanosleep, &pause, NULL);
        moe__pool_barrier(pool, thread);
    }
}

TEST(waiting_is_counted_for_those_who_wait) {
    moe_pool_options options;
    double waited[4];
    memset(&options, 0, sizeof options);
    options.n_threads = 5;
    moe_pool *pool = moe_pool_open(&options, NULL);
    if (!pool) return;
    for (int repeat = 0; repeat < 3; repeat++) { /* the counts of one job alone */
        n_early = 0;
        const double seconds = moe__pool_run(pool, 4, late_job, pool, waited);
        CHECKF(seconds >= 0.06, "%.3f s", seconds);
        for (int i = 0; i < 3; i++)
            CHECKF(waited[i] > waited[3] + 0.03 && waited[i] <= seconds, "thread %d: %.3f of %.3f, "
                   "the late one %.3f", i, waited[i], seconds, waited[3]);
    }
    CHECK(moe__pool_run(pool, 1, late_job, pool, waited) >= 0.06 && waited[0] == 0);
    moe_pool_close(pool);
}

/* Who spins in vain soon does not spin, tries again now and then, and comes back. */
TEST(spinning_adapts) {
    moe__worker w;
    const double most = 50e-6;
    memset(&w, 0, sizeof w);
    w.spin = most;
    double spun = 0;
    for (int i = 0; i < 320; i++) { /* nobody ever comes in time */
        const double budget = moe__pool_budget(&w, most);
        spun += budget;
        moe__pool_learn(&w, most, budget, 1);
    }
    CHECKF(w.spin == 0 && spun < 13 * most && spun > 8 * most, "%.1f times", spun / most);
    int naps = 0;
    for (int i = 0; i < 40; i++) { /* from now on everybody does */
        const double budget = moe__pool_budget(&w, most);
        naps += budget == 0;
        moe__pool_learn(&w, most, budget, budget == 0);
    }
    CHECK(w.spin == most && naps <= 31);
    moe__pool_learn(&w, most, most, 1); /* a single bad time costs half */
    CHECK(w.spin == most / 2);
    w.spin = 0;
    for (int i = 0; i < 100; i++) { /* no spinning at all */
        CHECK(moe__pool_budget(&w, 0) == 0);
        moe__pool_learn(&w, 0, 0, i % 2);
    }
    CHECK(w.spin == 0);
    w.spin = most; /* a job of too many threads between others */
    CHECK(moe__pool_budget(&w, 0) == 0);
    moe__pool_learn(&w, 0, 0, 1);
    CHECK(moe__pool_budget(&w, most) == most);
}

MAIN()
