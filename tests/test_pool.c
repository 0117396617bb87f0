// >>pool: wake, barrier, shares, many threads on few processors.
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// Counts the calls of the kernel, which are how a thread of the pool sleeps.
static int calls_made;          // atomic
static __thread int calls_mine; // by this thread
#define syscall(...)                                                     \
    (calls_mine++, __atomic_fetch_add(&calls_made, 1, __ATOMIC_RELAXED), \
     syscall(__VA_ARGS__))

// The signals that the calling thread blocks: bit s - 1.
static uint64_t blocked_signals(void) {
    uint64_t mask = 0;
    (syscall)(SYS_rt_sigprocmask, 0, NULL, &mask, sizeof mask);
    return mask;
}
static int blocks(uint64_t mask, int number) { return mask >> (number - 1) & 1; }

// Looks at what a thread that is created now will block from its first instruction on.
static int n_created, n_open_to_signals;
static size_t smallest_stack; // that was asked for
static int create_thread(pthread_t *thread, const pthread_attr_t *options, void *(*run)(void *),
                         void *argument) {
    size_t stack = 0;
    if (options) pthread_attr_getstacksize(options, &stack);
    if (stack < smallest_stack) smallest_stack = stack;
    n_created++;
    n_open_to_signals += !blocks(blocked_signals(), SIGINT);
    return pthread_create(thread, options, run, argument);
}
#define pthread_create create_thread

#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

typedef struct counting {
    moe_pool *pool;
    int rounds;
    uint32_t total;         // atomic
    int64_t plain[64];      // written by one thread, read by the others after a barrier
    int wrong;              // atomic
} counting;

// Between two barriers all threads add; after the barrier everyone must see the whole sum.
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

TEST(jobs_may_use_fewer_threads_than_the_pool_has) {
    for (int active = 1; active <= 6; active++) run_counting(6, active, 30, 5);
}

TEST(jobs_may_use_changing_numbers_of_threads) {
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
                    moe__pool_range(total, unit, i, n, &begin, &end);
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

static moe_pool *open_pool(int n_threads, int spin_us) {
    moe_pool_options options;
    memset(&options, 0, sizeof options);
    options.n_threads = n_threads;
    options.spin_us = spin_us;
    moe_pool *pool = moe_pool_open(&options, NULL);
    CHECK(pool != NULL);
    return pool;
}

static void pause_us(int us) {
    struct timespec pause;
    pause.tv_sec = 0;
    pause.tv_nsec = 1000L * us;
    nanosleep(&pause, NULL);
}

// Workers that sleep until they get a command.
static int count_sleepers(const moe_pool *pool) {
    int n = 0;
    for (int g = 0; g < moe__pool_groups(pool); g++)
        n += __builtin_popcount(__atomic_load_n(&pool->command[g].sleepers, __ATOMIC_SEQ_CST));
    return n;
}
// However long that takes.
static void let_workers_sleep(const moe_pool *pool) {
    while (count_sleepers(pool) < pool->n_threads - 1) pause_us(1000);
}

// Idle workers use no processor time: they go to sleep and stay there.
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
    let_workers_sleep(c.pool);
    int before = __atomic_load_n(&calls_made, __ATOMIC_RELAXED);
    pause_us(200 * 1000);
    int calls = __atomic_load_n(&calls_made, __ATOMIC_RELAXED) - before;
    CHECK(count_sleepers(c.pool) == 3);
    CHECKF(calls < 20, "%d calls of the kernel while three workers were idle", calls);
    moe_pool_close(c.pool);
}

// ---- who is woken ----------------------------------------------------------------------------

typedef struct roll {
    moe_pool *pool;
    int n;                 // threads of the job
    int runs[64];          // atomic: by worker, in all jobs
    long slept[64];        // by worker: how often it gave up its processor to wait, ever
    uint64_t blocked[64];  // by worker: signals
    int wrong;             // atomic
} roll;

// Notes who runs.
static void roll_job(void *context, int thread, int n) {
    roll *r = (roll *)context;
    const int w = moe__pool_worker_of(r->pool, thread, n);
    struct rusage usage;
    if (n != r->n || (w && !pthread_equal(pthread_self(), r->pool->workers[w].handle)))
        __atomic_fetch_add(&r->wrong, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&r->runs[w], 1, __ATOMIC_RELAXED);
    (syscall)(SYS_getrusage, 1 /* RUSAGE_THREAD */, &usage);
    r->slept[w] = usage.ru_nvcsw;
    r->blocked[w] = blocked_signals();
}

static void call_roll(roll *r, int n) {
    r->n = n;
    moe__pool_run(r->pool, n, roll_job, r, NULL);
}

// Jobs of 2 of 8 threads while the others sleep: those sleep on. Each wake would be seen as one
// more sleep afterwards; a few are those before, after and in the jobs of all threads.
static void small_jobs(int n_threads, int n, int spin_us) {
    roll r;
    long before[64];
    memset(&r, 0, sizeof r);
    r.pool = open_pool(n_threads, spin_us);
    if (!r.pool) return;
    call_roll(&r, n_threads);
    memcpy(before, r.slept, sizeof before);
    let_workers_sleep(r.pool);
    for (int job = 0; job < 500; job++) {
        call_roll(&r, n);
        pause_us(200); // four times as long as who is woken in vain spins
    }
    call_roll(&r, n_threads);
    CHECK(r.wrong == 0);
    for (int w = 1, active = 0; w < n_threads; w++) {
        active = moe__pool_rank(r.pool, w, n) < moe__pool_rank(r.pool, w + 1, n);
        CHECK(r.runs[w] == (active ? 502 : 2));
        CHECKF(active || r.slept[w] - before[w] < 100, "worker %d of %d slept %ld times during 500 "
               "jobs of %d threads", w, n_threads, r.slept[w] - before[w], n);
    }
    moe_pool_close(r.pool);
}

TEST(who_takes_no_part_is_not_woken) {
    small_jobs(8, 2, 0);
    small_jobs(8, 2, MOE_OFF);
    small_jobs(40, 2, 0); // three groups: the caller's, one with the other thread, one without
    small_jobs(40, 5, 0);
}

// Commands for others do not prolong the spinning of who has nothing to do.
TEST(who_spins_goes_to_sleep_while_others_work) {
    uint32_t sleepers = 0;
    roll r;
    memset(&r, 0, sizeof r);
    r.pool = open_pool(3, 100 * 1000);
    if (!r.pool) return;
    call_roll(&r, 3);
    for (int job = 0; job < 1000000 && !(sleepers >> 2 & 1); job++) {
        call_roll(&r, 2);
        sleepers = __atomic_load_n(&r.pool->command[0].sleepers, __ATOMIC_SEQ_CST);
    }
    CHECK(sleepers >> 2 & 1); // worker 2, who takes no part
    moe_pool_close(r.pool);
}

// All that take part come, also those that are about to sleep, and nobody else.
static void random_jobs(int n_threads, int n_jobs, int spin_us) {
    static uint32_t random = 1;
    int expected[64];
    roll r;
    memset(&r, 0, sizeof r);
    memset(expected, 0, sizeof expected);
    r.pool = open_pool(n_threads, spin_us);
    if (!r.pool) return;
    for (int job = 0; job < n_jobs; job++) {
        random = random * 1664525u + 1013904223u;
        const int n = 1 + (int)((random >> 16) % (uint32_t)n_threads);
        if (random >> 8 & 1) pause_us((int)(random >> 24) / 2);
        call_roll(&r, n);
        for (int t = 0; t < n; t++) expected[moe__pool_worker_of(r.pool, t, n)]++;
        for (int w = 0; w < n_threads; w++)
            CHECK(__atomic_load_n(&r.runs[w], __ATOMIC_RELAXED) == expected[w]);
    }
    moe_pool_close(r.pool); // nobody runs late
    CHECK(r.wrong == 0 && !memcmp(expected, r.runs, sizeof expected));
}

TEST(each_that_takes_part_runs_once) {
    const int spin_us[] = {0, 200, MOE_OFF};
    for (int i = 0; i < 3; i++) {
        random_jobs(8, 1000, spin_us[i]);
        random_jobs(3, 300, spin_us[i]);
        random_jobs(40, 60, spin_us[i]);
    }
}

TEST(a_pool_closes_while_all_sleep_or_none) {
    const int threads[] = {1, 2, 8, 16, 17, 40, 64};
    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        moe_pool *pool = open_pool(threads[i], 0);
        if (!pool) return;
        let_workers_sleep(pool);
        moe_pool_close(pool);
        moe_pool_close(open_pool(threads[i], 0)); // some have not begun to run
        moe_pool_close(open_pool(threads[i], 1000));
    }
}

// The caller wakes those of its group by one call of the kernel, and the first of each other one.
TEST(waking_many_is_shared) {
    const int threads[] = {64, 2, 33, 16, 64};
    roll r;
    memset(&r, 0, sizeof r);
    r.pool = open_pool(64, MOE_OFF);
    if (!r.pool) return;
    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        let_workers_sleep(r.pool);
        const int before = calls_mine;
        call_roll(&r, threads[i]);
        // four groups, and waiting for the end, perhaps not at once
        CHECKF(calls_mine - before <= 4 + 8, "%d calls for %d threads", calls_mine - before,
               threads[i]);
    }
    CHECK(r.wrong == 0);
    moe_pool_close(r.pool);
}

// A program's signals are for its own threads; the caller's are as before.
TEST(workers_never_take_signals) {
    roll r;
    const uint64_t before = blocked_signals();
    memset(&r, 0, sizeof r);
    n_created = n_open_to_signals = 0;
    r.pool = open_pool(5, 0);
    if (!r.pool) return;
    CHECK(n_created == 4 && n_open_to_signals == 0);
    CHECK(blocked_signals() == before);
    call_roll(&r, 5);
    CHECK(blocked_signals() == before && r.blocked[0] == before);
    for (int w = 1; w < 5; w++) {
        CHECK(blocks(r.blocked[w], SIGINT) && blocks(r.blocked[w], SIGTERM));
        CHECK(blocks(r.blocked[w], SIGALRM) && blocks(r.blocked[w], SIGUSR1));
        CHECK(blocks(r.blocked[w], SIGSEGV) == blocks(before, SIGSEGV));
        CHECK(blocks(r.blocked[w], SIGFPE) == blocks(before, SIGFPE));
    }
    moe_pool_close(r.pool);
}

// Some systems give a thread 128 KiB unless one asks for more.
TEST(workers_have_stacks_for_kernels) {
    smallest_stack = SIZE_MAX;
    moe_pool *pool = open_pool(3, 0);
    CHECKF(pool && smallest_stack == MOE__POOL_STACK, "%zu bytes", smallest_stack);
    CHECK(MOE__POOL_STACK >= 1 << 20);
    moe_pool_close(pool);
}

// ---- who takes part, who stands where --------------------------------------------------------

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

TEST(groups_at_a_barrier_are_even_and_at_most_16) {
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

// A pool whose threads count as those of two nodes.
TEST(barriers_over_two_nodes_separate_rounds) {
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
        CHECK(b.pool->nodes.n == (options.pin ? machine.n_nodes : 1));
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
        CHECK(!memcmp(before, after, sizeof before)); // the caller is as free as before
    }
}

// ---- waiting ---------------------------------------------------------------------------------

static int n_early; // atomic: threads that came to the barriers of late_job, but the late one

// The last thread comes 30 ms after the others, however late they are.
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
    for (int repeat = 0; repeat < 3; repeat++) { // the counts of one job alone
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

// Who spins in vain soon does not spin, tries again now and then, and comes back.
TEST(spinning_adapts_to_how_often_it_pays) {
    moe__worker w;
    const double most = 50e-6;
    memset(&w, 0, sizeof w);
    w.spin = most;
    double spun = 0;
    for (int i = 0; i < 320; i++) { // nobody ever comes in time
        const double budget = moe__pool_budget(&w, most);
        spun += budget;
        moe__pool_learn(&w, most, budget, 1);
    }
    CHECKF(w.spin == 0 && spun < 13 * most && spun > 8 * most, "%.1f times", spun / most);
    int naps = 0;
    for (int i = 0; i < 40; i++) { // from now on everybody does
        const double budget = moe__pool_budget(&w, most);
        naps += budget == 0;
        moe__pool_learn(&w, most, budget, budget == 0);
    }
    CHECK(w.spin == most && naps <= 31);
    moe__pool_learn(&w, most, most, 1); // a single bad time costs half
    CHECK(w.spin == most / 2);
    w.spin = 0;
    for (int i = 0; i < 100; i++) { // no spinning at all
        CHECK(moe__pool_budget(&w, 0) == 0);
        moe__pool_learn(&w, 0, 0, i % 2);
    }
    CHECK(w.spin == 0);
    w.spin = most; // a job of too many threads between others
    CHECK(moe__pool_budget(&w, 0) == 0);
    moe__pool_learn(&w, 0, 0, 1);
    CHECK(moe__pool_budget(&w, most) == most);
}

MAIN()
