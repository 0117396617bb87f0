/* >>pool: wake, barrier, shares, many threads on few processors. */
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
        moe__pool_barrier(c->pool);
        if (__atomic_load_n(&c->total, __ATOMIC_RELAXED) != (uint32_t)(round * n))
            __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
        for (int i = 0; i < n; i++)
            if (c->plain[i] != round) __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
        moe__pool_barrier(c->pool);
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
    moe__pool_run(c.pool, active, counting_job, &c);
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
        moe__pool_run(pool, active, counting_job, &c);
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
        moe__pool_run(pool, 1 + i % 3, counting_job, &c);
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

/* Idle workers use no processor time: they sleep. */
static double process_seconds(void) {
    struct timespec used;
    syscall(SYS_clock_gettime, 2 /* CLOCK_PROCESS_CPUTIME_ID */, &used);
    return (double)used.tv_sec + 1e-9 * (double)used.tv_nsec;
}

TEST(idle_workers_sleep) {
    moe_pool_options options;
    counting c;
    memset(&options, 0, sizeof options);
    memset(&c, 0, sizeof c);
    options.n_threads = 4;
    c.pool = moe_pool_open(&options, NULL);
    c.rounds = 3;
    if (!c.pool) return;
    moe__pool_run(c.pool, 4, counting_job, &c);
    struct timespec pause;
    pause.tv_sec = 0;
    pause.tv_nsec = 20 * 1000000;
    syscall(SYS_nanosleep, &pause, NULL); /* spinning is over by then */
    double before = process_seconds();
    pause.tv_nsec = 200 * 1000000;
    syscall(SYS_nanosleep, &pause, NULL);
    double used = process_seconds() - before;
    CHECKF(used < 0.05, "three idle workers used %.3f s of 0.2 s", used);
    moe_pool_close(c.pool);
}

TEST(quota_files) {
    char path[64];
    const char *texts[] = {"max 100000\n", "150000 100000\n", "50000 100000", "", "junk", "100 0"};
    const int counts[] = {8, 2, 1, 8, 8, 8};
    snprintf(path, sizeof path, "build/test_quota_%d", (int)getpid());
    for (int i = 0; i < 6; i++) {
        FILE *f = fopen(path, "w");
        if (!f) SKIP("cannot write %s", path);
        fputs(texts[i], f);
        fclose(f);
        CHECKF(moe__pool_quota(path, 8) == counts[i], "\"%s\"", texts[i]);
    }
    remove(path);
    CHECK(moe__pool_quota("/nonexistent", 5) == 5);
}

MAIN()
