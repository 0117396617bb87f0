/* What every mode of moe-bench does: settings, sessions, timed runs, figures made of them.
 * Include moe_infer.h, tool.h, model.h and roofs.h first. */
#ifndef BENCH_TIMING_H
#define BENCH_TIMING_H

enum { MAX_REPETITIONS = 1000, MAX_RIVALS = 16 };

static const char program[] = "moe-bench";

static struct settings {
    const char *model, *svg;
    tool_list n_prompt, n_gen, both, behind, n_depth, n_threads, n_batch, n_ubatch, isa, schedule;
    int32_t repetitions, k_type, v_type, kv_type, format, n_ctx, numa;
    int32_t page_state; /* < 0: as it is */
    int32_t pages;      /* moe_pages */
    int warm_up, roofs, detail, check, compare, sweep, crowded, start, plan;
    int pin, mmap, mlock, help, version;
} set = {.n_prompt = {1, {512}}, .n_gen = {1, {128}}, .n_depth = {1, {0}}, .n_threads = {1, {-1}},
         .n_batch = {1, {2048}}, .n_ubatch = {1, {512}}, .isa = {1, {0}}, .schedule = {1, {0}},
         .repetitions = 5, .k_type = -1, .v_type = -1, .n_ctx = 8192, .page_state = -1,
         .warm_up = 1, .roofs = 1, .mmap = 1};

enum { FORMAT_MD, FORMAT_JSON, FORMAT_JSONL, FORMAT_CSV };

static const char *const kv_names[] = {"f16", "q8_0", "f32"};
static const char *const schedule_names[] = {"default", "sequential", "parallel", "balanced"};

/* ---- one timed run --------------------------------------------------------------------------- */

/* What a run took, and how its threads spent the time. */
typedef struct usage {
    double seconds;
    double eval_seconds;          /* of it in evals, */
    double wait[MOE_MAX_THREADS]; /* and what each thread waited for others in them */
    uint64_t n_barriers, n_evals;
} usage;

static inline moe_status timed_eval(moe_session *session, const int32_t *tokens, int32_t n,
                                    usage *u, moe_error *error) {
    const moe_session_info *info = moe_session_get_info(session);
    const int32_t most = info->n_threads > info->n_threads_batch ? info->n_threads
                                                                 : info->n_threads_batch;
    const moe_status status = moe_session_eval(session, tokens, n, error);
    u->eval_seconds += info->eval_seconds;
    u->n_barriers += info->n_barriers;
    u->n_evals++;
    for (int32_t i = 0; i < most; i++) u->wait[i] += moe_session_wait_seconds(session, i);
    return status;
}

/* Behind `depth` tokens a prompt at once, then tokens one by one; tokens: n_prompt + n_gen. */
static inline moe_status timed_run(moe_session *session, int32_t depth, const int32_t *tokens,
                                   int32_t n_prompt, int32_t n_gen, usage *u, moe_error *error) {
    memset(u, 0, sizeof *u);
    moe_status status = moe_session_rewind(session, depth, error);
    const double start = tool_seconds();
    if (status == MOE_OK && n_prompt) status = timed_eval(session, tokens, n_prompt, u, error);
    for (int32_t i = 0; i < n_gen && status == MOE_OK; i++)
        status = timed_eval(session, tokens + n_prompt + i, 1, u, error);
    u->seconds = tool_seconds() - start;
    return status;
}

/* Of the time of n threads, the part spent waiting. */
static inline double usage_waiting(const usage *u, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += u->wait[i];
    return u->eval_seconds > 0 ? sum / (n * u->eval_seconds) : 0;
}
/* The busiest thread's work over the mean: 1 is even. */
static inline double usage_imbalance(const usage *u, int n) {
    double least = u->wait[0];
    for (int i = 1; i < n; i++) least = u->wait[i] < least ? u->wait[i] : least;
    const double mean = u->eval_seconds * (1 - usage_waiting(u, n));
    return mean > 0 ? (u->eval_seconds - least) / mean : 1;
}

/* ---- sessions -------------------------------------------------------------------------------- */

/* threads <= 0: the default. */
static inline moe_session *open_session(const model *m, int32_t n_ctx, int32_t n_batch,
                                        int32_t threads, int32_t isa, int32_t schedule,
                                        moe_error *error) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_threads = threads > 0 ? threads : 0;
    o.pin = set.pin ? MOE_ON : 0;
    o.n_ctx = n_ctx;
    o.n_batch = n_batch;
    o.kv_type = (moe_kv_type)set.kv_type;
    o.isa = (moe_isa)isa;
    o.schedule = (moe_schedule)schedule;
    return moe_session_open(m->handle, &o, error);
}

/* Whether sessions agree: the logits of a prompt and of some tokens behind it must have the same
 * bits. Says so if they do not. tokens: at least 40. */
static inline int sessions_agree(const model *m, moe_session *const *sessions, int n,
                                 const int32_t *tokens, int32_t n_prompt, moe_error *error) {
    const size_t size = (size_t)m->info->n_vocab * sizeof(float);
    for (int32_t step = 0; step < 5; step++) {
        const float *expected = NULL;
        for (int i = 0; i < n; i++) {
            if (!step && moe_session_rewind(sessions[i], 0, error)) return 0;
            if (moe_session_eval(sessions[i], tokens + (step ? n_prompt + step - 1 : 0),
                                 step ? 1 : n_prompt, error))
                return 0;
            const float *logits = moe_session_logits(sessions[i], -1);
            if (!i) expected = logits;
            if (memcmp(expected, logits, size) == 0) continue;
            fprintf(stderr, "%s: %s and %s do not agree: not timed\n", program,
                    schedule_names[moe_session_get_info(sessions[0])->schedule & 3],
                    schedule_names[moe_session_get_info(sessions[i])->schedule & 3]);
            error->status = MOE_OK;
            return 0;
        }
    }
    return 1;
}

enum { CHECK_PROMPT = 32, CHECK_TOKENS = 40 }; /* what sessions_agree is given */

/* All schedules with these threads, before any is timed (--check). */
static inline int check_schedules(const model *m, int32_t threads, int32_t isa) {
    moe_session *sessions[3] = {NULL, NULL, NULL};
    int32_t tokens[CHECK_TOKENS];
    uint64_t random = RANDOM_SEED;
    moe_error error;
    int opened = 1, agree = 0;
    memset(&error, 0, sizeof error);
    random_tokens(m->handle, &random, tokens, CHECK_TOKENS);
    for (int i = 0; i < 3 && opened; i++) {
        sessions[i] = open_session(m, CHECK_TOKENS, CHECK_PROMPT, threads, isa, i + 1, &error);
        opened = sessions[i] != NULL;
    }
    if (opened) agree = sessions_agree(m, sessions, 3, tokens, CHECK_PROMPT, &error);
    if (!agree && error.status) tool_fail(program, "--check", &error);
    for (int i = 0; i < 3; i++) moe_session_close(sessions[i]);
    return agree;
}

/* ---- tests ----------------------------------------------------------------------------------- */

typedef struct test {
    const model *m;
    char name[64];           /* "pp512", "tg128 @ d8192", "pp512+tg128", "tg64@pp8192" */
    int32_t n_prompt, n_gen;
    int32_t n_depth;         /* tokens in the context before */
    int32_t n_batch, n_ubatch, threads, isa, schedule; /* as asked for */
    moe_session *session;
    moe_session_info info;
    int32_t n_threads;       /* those that the test used */
    double seconds[MAX_REPETITIONS];
    double rate[MAX_REPETITIONS]; /* tokens per second */
    double waiting, imbalance, barriers; /* of the last repetition; barriers per eval */
    double wait[MOE_MAX_THREADS];        /* part of the time that each thread waited */
    /* Per second and repetition, each beside the roofs before and after it; 0: not measured. */
    double roof_bytes[MAX_REPETITIONS + 1], roof_macs[MAX_REPETITIONS + 1];
    roofs *roof; /* open while a test runs with the same threads and instruction set */
} test;

/* Mean and standard deviation of a sample. */
static inline void statistics(const double *x, int32_t n, double *mean, double *deviation) {
    double sum = 0, squares = 0;
    for (int32_t i = 0; i < n; i++) sum += x[i];
    *mean = sum / n;
    for (int32_t i = 0; i < n; i++) squares += (x[i] - *mean) * (x[i] - *mean);
    *deviation = n > 1 ? sqrt(squares / (n - 1)) : 0;
}

static inline void show_progress(const test *t, int32_t repetition) {
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r%s: %s, %d threads: %d/%d ", program, t->name, t->n_threads, repetition,
            set.repetitions);
    if (repetition == set.repetitions) fprintf(stderr, "\r%60s\r", "");
}

/* The roofs stay open from test to test until one needs other threads. Without memory or threads */
/* for them there are none. */
static roofs shared_roofs;
static inline void open_roofs(test *t) {
    if (shared_roofs.n_threads != t->n_threads) {
        roofs_close(&shared_roofs);
        if (roofs_open(&shared_roofs, t->n_threads, t->info.isa, CLOCK_MONOTONIC)) {
            fprintf(stderr, "%s: no memory or threads to measure the roofs with\n", program);
            return;
        }
    }
    shared_roofs.isa = t->info.isa;
    t->roof = &shared_roofs;
}

/* Both roofs, in turns of 10 ms: a quarter of a second before the first run and after the last, */
/* less in between. */
static inline void measure_roofs(test *t, int32_t at) {
    enum { MOST = 12 };
    double bytes[MOST], macs[MOST];
    const int n = at == 0 || at == set.repetitions ? MOST : 4;
    if (!t->roof) return;
    for (int i = 0; i < n; i++) {
        bytes[i] = roofs_read(t->roof, 0.01);
        macs[i] = roofs_int8(t->roof, 0.01);
    }
    t->roof_bytes[at] = roofs_median(bytes, n);
    t->roof_macs[at] = roofs_median(macs, n);
}

static inline moe_status test_open(test *t, moe_error *error) {
    const int32_t n_batch = t->n_ubatch < t->n_batch ? t->n_ubatch : t->n_batch;
    t->session = open_session(t->m, t->n_prompt + t->n_gen + t->n_depth, n_batch, t->threads,
                              t->isa, t->schedule, error);
    if (!t->session) return error->status;
    t->info = *moe_session_get_info(t->session);
    t->n_threads = t->info.n_threads;
    return MOE_OK;
}

static inline void test_close(test *t) {
    moe_session_close(t->session);
    t->session = NULL;
}

/* The context before, and an untimed run. */
static inline moe_status test_warm_up(test *t, int32_t *tokens, moe_error *error) {
    static usage u;
    uint64_t random = RANDOM_SEED;
    moe_status status = MOE_OK;
    if (t->n_depth) {
        random_tokens(t->m->handle, &random, tokens, t->n_depth);
        status = moe_session_eval(t->session, tokens, t->n_depth, error);
    }
    random_tokens(t->m->handle, &random, tokens, t->n_prompt + t->n_gen);
    if (set.warm_up && status == MOE_OK)
        status = timed_run(t->session, t->n_depth, tokens, t->n_prompt,
                           t->n_gen > 8 ? 8 : t->n_gen, &u, error);
    return status;
}

static inline moe_status test_repeat(test *t, int32_t r, const int32_t *tokens,
                                     moe_error *error) {
    static usage u;
    const int32_t n = t->n_prompt + t->n_gen;
    measure_roofs(t, r);
    show_progress(t, r);
    const moe_status status = timed_run(t->session, t->n_depth, tokens, t->n_prompt, t->n_gen, &u,
                                        error);
    t->seconds[r] = u.seconds;
    t->rate[r] = u.seconds > 0 ? n / u.seconds : 0;
    t->waiting = usage_waiting(&u, t->n_threads);
    t->imbalance = usage_imbalance(&u, t->n_threads);
    t->barriers = (double)u.n_barriers / (double)u.n_evals;
    for (int i = 0; i < t->n_threads; i++)
        t->wait[i] = u.eval_seconds > 0 ? u.wait[i] / u.eval_seconds : 0;
    if (r + 1 == set.repetitions) {
        measure_roofs(t, r + 1);
        show_progress(t, r + 1);
    }
    return status;
}

/* Tests that differ in their schedule alone, in turns A B C C B A on the same pages: what changes
 * within the minutes of a measurement meets them all. */
static inline int run_rivals(test *tests, int n) {
    int32_t longest = CHECK_TOKENS, status = TOOL_OK;
    uint64_t random = RANDOM_SEED;
    moe_error error;
    memset(&error, 0, sizeof error);
    for (int i = 0; i < n; i++) {
        const int32_t size = tests[i].n_prompt + tests[i].n_gen;
        if (size > longest) longest = size;
        if (tests[i].n_depth > longest) longest = tests[i].n_depth;
    }
    int32_t *tokens = (int32_t *)malloc((size_t)longest * sizeof *tokens);
    if (!tokens) {
        fprintf(stderr, "%s: out of memory\n", program);
        return TOOL_ERROR;
    }
    for (int i = 0; i < n && !error.status; i++) test_open(&tests[i], &error);
    for (int i = 0; i < n && !error.status && set.roofs; i++) open_roofs(&tests[i]);
    for (int i = 0; i < n && !error.status; i++) test_warm_up(&tests[i], tokens, &error);
    for (int32_t r = 0; r < set.repetitions; r++) {
        random_tokens(tests[0].m->handle, &random, tokens, tests[0].n_prompt + tests[0].n_gen);
        for (int i = 0; i < n && !error.status; i++)
            test_repeat(&tests[r % 2 ? n - 1 - i : i], r, tokens, &error);
    }
    if (error.status) status = tool_fail(program, tests[0].name, &error);
    for (int i = 0; i < n; i++) test_close(&tests[i]);
    free(tokens);
    return status;
}

/* ---- figures --------------------------------------------------------------------------------- */

/* What a test did per second, and how much of the roof that is. NAN: does not apply. */
typedef struct figures {
    double gbps, gbps_cache, gmacs, roof_gbps, roof_gmacs, roof_fraction;
} figures;

/* Bytes of keys and values that generating reads per token: those of position p are p + 1 rows. */
static inline double cache_bytes(const test *t) {
    static const double value_bytes[] = {2, 34.0 / 32, 4};
    const token_work *work = &t->m->work;
    const double middle = t->n_depth + (t->n_gen + 1) / 2.0;
    double window = work->window < middle ? work->window : middle;
    return work->kv_row * value_bytes[t->info.kv_type % 3] *
           (work->n_full * middle + work->n_window * window);
}

static inline figures get_figures(const test *t) {
    static double x[MAX_REPETITIONS], y[MAX_REPETITIONS], z[MAX_REPETITIONS];
    const token_work *work = &t->m->work;
    const int n = set.repetitions, generates = t->n_gen > 0;
    const double macs = work->macs + work->output_macs / (generates ? 1 : t->n_prompt);
    const double cache = cache_bytes(t), bytes = work->bytes + cache;
    double mean, deviation;
    figures f = {NAN, NAN, NAN, NAN, NAN, NAN};
    if (t->n_prompt && t->n_gen) return f; /* two kinds of work in one figure */
    statistics(t->rate, n, &mean, &deviation);
    if (generates) f.gbps = mean * work->bytes * 1e-9;
    if (generates) f.gbps_cache = mean * cache * 1e-9;
    f.gmacs = mean * macs * 1e-9;
    if (!t->roof) return f;
    for (int r = 0; r < n; r++) {
        x[r] = (t->roof_bytes[r] + t->roof_bytes[r + 1]) / 2;
        y[r] = (t->roof_macs[r] + t->roof_macs[r + 1]) / 2;
        z[r] = generates ? t->rate[r] * bytes / x[r] : t->rate[r] * macs / y[r];
    }
    f.roof_gbps = roofs_median(x, n) * 1e-9;
    f.roof_gmacs = roofs_median(y, n) * 1e-9;
    f.roof_fraction = roofs_median(z, n);
    return f;
}

#endif
