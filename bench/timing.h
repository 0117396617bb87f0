// What every mode of moe-bench does: settings, sessions, timed runs, figures made of them.
// Include moe_infer.h, tool.h, model.h and roofs.h first.
#ifndef BENCH_TIMING_H
#define BENCH_TIMING_H

enum { MAX_REPETITIONS = 1000, MAX_RIVALS = 16, MAX_PARALLEL = 256 };

static const char program[] = "moe-bench";

static struct settings {
    const char *model, *svg;
    tool_list n_prompt, n_gen, both, behind, n_depth, n_threads, n_batch, n_ubatch, isa, schedule;
    tool_list n_parallel, n_draft;
    int32_t repetitions, k_type, v_type, kv_type, format, n_ctx, numa;
    int32_t page_state; // < 0: as it is
    int32_t pages;      // moe_pages
    int warm_up, roofs, detail, check, compare, sweep, crowded, start, plan;
    int pin, mmap, mlock, help, version;
} set = {.n_prompt = {1, {512}}, .n_gen = {1, {128}}, .n_depth = {1, {0}}, .n_threads = {1, {-1}},
         .n_batch = {1, {2048}}, .n_ubatch = {1, {512}}, .isa = {1, {0}}, .schedule = {1, {0}},
         .n_parallel = {1, {1}}, .n_draft = {1, {1}},
         .repetitions = 5, .k_type = -1, .v_type = -1, .n_ctx = 8192, .page_state = -1,
         .warm_up = 1, .roofs = 1, .mmap = 1};

enum { FORMAT_MD, FORMAT_JSON, FORMAT_JSONL, FORMAT_CSV };

static const char *const kv_names[] = {"f16", "q8_0", "f32"};
static const char *const schedule_names[] = {"default", "sequential", "parallel", "balanced"};

// ---- one timed run ---------------------------------------------------------------------------

// Kinds of parts of a forward pass that are timed: mixers of layers that attend and of those that
// recur, feed-forward parts, logits.
enum { TIMED_ATTENTION, TIMED_RECURRENT, TIMED_FFN, TIMED_OUTPUT, TIMED_PARTS };

// What a run took, and how its threads spent the time.
typedef struct usage {
    double seconds;               // of its calls, without what lies between them
    double eval_seconds;          // as the library tells,
    double wait[MOE_MAX_THREADS]; // and what each thread waited for others in it
    double parts[TIMED_PARTS];    // seconds of eval_seconds
    uint64_t n_barriers, n_evals;
} usage;

// One call: of each sequence (sessions of one pool) the next n tokens, which lie `stride` apart.
static inline moe_status timed_eval(moe_session *const *sessions, int32_t n_sessions,
                                    const int32_t *tokens, int64_t stride, int32_t n, usage *u,
                                    moe_error *error) {
    static moe_job jobs[MAX_PARALLEL];
    const moe_session_stats *stats = moe_session_get_stats(sessions[0]);
    for (int32_t i = 0; i < n_sessions; i++) {
        jobs[i].session = sessions[i];
        jobs[i].tokens = tokens + i * stride;
        jobs[i].n_tokens = n;
    }
    const double start = tool_seconds();
    const moe_status status = moe_session_eval_many(jobs, n_sessions, error);
    u->seconds += tool_seconds() - start;
    u->eval_seconds += stats->eval_seconds;
    u->parts[TIMED_ATTENTION] += stats->attention_seconds;
    u->parts[TIMED_RECURRENT] += stats->recurrent_seconds;
    u->parts[TIMED_FFN] += stats->ffn_seconds;
    u->parts[TIMED_OUTPUT] += stats->output_seconds;
    u->n_barriers += stats->n_barriers;
    u->n_evals++;
    for (int32_t i = 0; i < stats->n_threads; i++) u->wait[i] += stats->thread_wait_seconds[i];
    return status;
}

// Behind `depth` tokens a prompt at once, then tokens one by one; tokens: n_prompt + n_gen.
static inline moe_status timed_run(moe_session *session, int32_t depth, const int32_t *tokens,
                                   int32_t n_prompt, int32_t n_gen, usage *u, moe_error *error) {
    memset(u, 0, sizeof *u);
    moe_status status = moe_session_rewind(session, depth, error);
    if (status == MOE_OK && n_prompt)
        status = timed_eval(&session, 1, tokens, 0, n_prompt, u, error);
    for (int32_t i = 0; i < n_gen && status == MOE_OK; i++)
        status = timed_eval(&session, 1, tokens + n_prompt + i, 0, 1, u, error);
    return status;
}

// Of the time of n threads, the part spent waiting.
static inline double usage_waiting(const usage *u, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += u->wait[i];
    return u->eval_seconds > 0 ? sum / (n * u->eval_seconds) : 0;
}
// The busiest thread's work over the mean: 1 is even.
static inline double usage_imbalance(const usage *u, int n) {
    double least = u->wait[0];
    for (int i = 1; i < n; i++) least = u->wait[i] < least ? u->wait[i] : least;
    const double mean = u->eval_seconds * (1 - usage_waiting(u, n));
    return mean > 0 ? (u->eval_seconds - least) / mean : 1;
}

// ---- sessions --------------------------------------------------------------------------------

// threads <= 0: the default. pool NULL: threads of its own.
static inline moe_session *open_session_on(moe_pool *pool, const model *m, int32_t n_ctx,
                                           int32_t n_batch, int32_t threads, int32_t isa,
                                           int32_t schedule, moe_error *error) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.pool = pool;
    o.n_threads = threads > 0 ? threads : 0;
    o.pin = set.pin ? MOE_ON : 0;
    o.n_ctx = n_ctx;
    o.n_batch = n_batch;
    o.kv_type = (moe_kv_type)set.kv_type;
    o.isa = (moe_isa)isa;
    o.schedule = (moe_schedule)schedule;
    return moe_session_open(m->handle, &o, error);
}
static inline moe_session *open_session(const model *m, int32_t n_ctx, int32_t n_batch,
                                        int32_t threads, int32_t isa, int32_t schedule,
                                        moe_error *error) {
    return open_session_on(NULL, m, n_ctx, n_batch, threads, isa, schedule, error);
}
// Threads for several sessions, such as each would have alone.
static inline moe_pool *open_pool(const model *m, int32_t threads, moe_error *error) {
    moe_pool_options o;
    memset(&o, 0, sizeof o);
    o.n_threads = threads > 0 ? threads : 0;
    o.pin = set.pin || moe_model_get_memory(m->handle)->numa == MOE_NUMA_OWNER ? MOE_ON : 0;
    return moe_pool_open(&o, error);
}

// Whether sessions agree: the logits of a prompt and of some tokens behind it must have the same
// bits. Says so if they do not. tokens: at least 40.
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

enum { CHECK_PROMPT = 32, CHECK_TOKENS = 40 }; // what sessions_agree is given

// All schedules with these threads, before any is timed (--check).
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

// ---- tests -----------------------------------------------------------------------------------

typedef struct test {
    const model *m;
    char name[64]; // "pp512", "tg128 x4 @ d8192", "tg128 by 3", "pp512+tg128", "tg64@pp8192"
    int32_t n_prompt, n_gen; // of each sequence
    int32_t n_depth;         // tokens in its context before
    int32_t n_parallel;      // sequences that generate at the same time; else 1
    int32_t n_draft;         // tokens of each that a call generates
    int32_t n_batch, n_ubatch, threads, isa, schedule; // as asked for
    moe_session *session[MAX_PARALLEL];
    moe_pool *pool;          // of several; NULL: the only one has its own
    uint64_t *chosen;        // [layer][expert]: how often all sequences together chose it
    moe_session_info info;
    int32_t n_threads;       // those that the test used,
    int32_t n_groups;        // in so many groups with experts of their own
    double seconds[MAX_REPETITIONS];
    double rate[MAX_REPETITIONS]; // tokens per second
    double waiting, imbalance, barriers; // of the last repetition; barriers per eval
    double wait[MOE_MAX_THREADS];        // part of the time that each thread waited
    double parts[TIMED_PARTS];           // and of it what went into each kind of part
    // What generating had to read: weights of each repetition, keys and values of any.
    double bytes[MAX_REPETITIONS], bytes_cache;
    double touched;          // experts per call, over all layers and repetitions
    int32_t n_evals;         // calls of a repetition
    // Per second and repetition, each beside the roofs before and after it; 0: not measured.
    double roof_bytes[MAX_REPETITIONS + 1], roof_macs[MAX_REPETITIONS + 1];
    roofs *roof; // open while a test runs with the same threads and instruction set
} test;

// Mean and standard deviation of a sample.
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

// The roofs stay open from test to test until one needs other threads. Without memory or threads
// for them there are none.
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

// Both roofs, in turns of 10 ms: a quarter of a second before the first run and after the last,
// less in between.
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

// A session's batch is no longer than its context: all rows of a call are to fit.
static inline moe_status test_open(test *t, moe_error *error) {
    const int32_t n_batch = t->n_ubatch < t->n_batch ? t->n_ubatch : t->n_batch;
    const int32_t n_tokens = t->n_prompt + t->n_gen + t->n_depth;
    const int64_t n_rows = (int64_t)t->n_parallel * t->n_draft;
    const int32_t n_fit = n_rows < n_batch ? (int32_t)n_rows : n_batch;
    const int32_t n_ctx = n_fit > n_tokens ? n_fit : n_tokens;
    const moe_model_info *info = t->m->info;
    t->chosen = (uint64_t *)calloc((size_t)info->n_layer * (size_t)info->n_expert + 1,
                                   sizeof *t->chosen);
    if (!t->chosen) {
        error->status = MOE_ERROR_MEMORY;
        snprintf(error->text, sizeof error->text, "out of memory");
        return error->status;
    }
    if (t->n_parallel > 1) {
        t->pool = open_pool(t->m, t->threads, error);
        if (!t->pool) return error->status;
    }
    for (int32_t i = 0; i < t->n_parallel; i++) {
        t->session[i] = open_session_on(t->pool, t->m, n_ctx, n_batch, t->threads, t->isa,
                                        t->schedule, error);
        if (!t->session[i]) return error->status;
    }
    t->info = *moe_session_get_info(t->session[0]);
    t->n_threads = t->info.n_threads;
    return MOE_OK;
}

static inline void test_close(test *t) {
    for (int32_t i = 0; i < MAX_PARALLEL; i++) {
        moe_session_close(t->session[i]);
        t->session[i] = NULL;
    }
    moe_pool_close(t->pool);
    t->pool = NULL;
    free(t->chosen);
    t->chosen = NULL;
}

// Bytes of the experts that anyone chose since this was asked before; *touched: how many.
static inline double test_touched(test *t, double *touched) {
    const moe_model_info *info = t->m->info;
    double bytes = 0;
    *touched = 0;
    for (int32_t il = 0; il < info->n_layer; il++) {
        uint64_t *before = t->chosen + (int64_t)il * info->n_expert;
        int32_t n = 0;
        if (!moe_session_expert_counts(t->session[0], il)) continue;
        for (int32_t e = 0; e < info->n_expert; e++) {
            uint64_t sum = 0;
            for (int32_t i = 0; i < t->n_parallel; i++)
                sum += moe_session_expert_counts(t->session[i], il)[e];
            n += sum != before[e];
            before[e] = sum;
        }
        *touched += n;
        bytes += n * t->m->work.expert[il];
    }
    return bytes;
}

// Keys, values and states of a sequence that n tokens behind `past` others read: each row once.
static inline double cache_bytes(const test *t, int32_t past, int32_t n) {
    static const double value_bytes[] = {2, 34.0 / 32, 4};
    const token_work *work = &t->m->work;
    const double rows = (double)past + n, seen = (double)work->window + n - 1;
    return work->state + work->kv_row * value_bytes[t->info.kv_type % 3] *
                             (work->n_full * rows + work->n_window * (seen < rows ? seen : rows));
}

// Behind its depth, a prompt at once, then n_gen tokens of each sequence in calls of n_draft.
// *bytes: weights that these must read, per call the experts that it touched and all others.
static inline moe_status test_run(test *t, const int32_t *tokens, int32_t n_gen, usage *u,
                                  double *bytes, double *touched, moe_error *error) {
    const int64_t stride = (int64_t)t->n_prompt + t->n_gen;
    const token_work *work = &t->m->work;
    moe_status status = MOE_OK;
    double n_experts;
    memset(u, 0, sizeof *u);
    *bytes = *touched = t->bytes_cache = t->n_evals = 0;
    for (int32_t i = 0; i < t->n_parallel && status == MOE_OK; i++)
        status = moe_session_rewind(t->session[i], t->n_depth, error);
    if (status == MOE_OK && t->n_prompt)
        status = timed_eval(t->session, 1, tokens, 0, t->n_prompt, u, error);
    test_touched(t, &n_experts); // by what came before
    for (int32_t i = 0, n; i < n_gen && status == MOE_OK; i += n) {
        n = n_gen - i < t->n_draft ? n_gen - i : t->n_draft;
        status = timed_eval(t->session, t->n_parallel, tokens + t->n_prompt + i, stride, n, u,
                            error);
        if (n * t->n_parallel == 1) { // no need to look
            *bytes += work->bytes;
            *touched += (double)t->m->info->n_expert_used * work->n_moe;
        } else {
            *bytes += work->once + (double)n * t->n_parallel * work->row;
            *bytes += test_touched(t, &n_experts);
            *touched += n_experts;
        }
        t->bytes_cache += t->n_parallel * cache_bytes(t, t->n_depth + t->n_prompt + i, n);
        t->n_evals++;
    }
    return status;
}

// New tokens for all sequences. Only the first begins with BOS: all are to differ.
static inline void test_tokens(const test *t, uint64_t *random, int32_t *tokens, int32_t n) {
    const uint64_t n_vocab = (uint64_t)t->m->info->n_vocab;
    for (int32_t i = 0; i < t->n_parallel; i++) {
        int32_t *own = tokens + (int64_t)i * n;
        random_tokens(t->m->handle, random, own, n);
        if (i) own[0] = (int32_t)((random_next(random) >> 33) % n_vocab);
    }
}

// The contexts before, and an untimed run.
static inline moe_status test_warm_up(test *t, int32_t *tokens, moe_error *error) {
    static usage u;
    uint64_t random = RANDOM_SEED;
    moe_status status = MOE_OK;
    const int32_t few = t->n_draft > 8 ? t->n_draft : 8;
    double bytes, touched;
    for (int32_t i = 0; i < t->n_parallel && t->n_depth && status == MOE_OK; i++) {
        random_tokens(t->m->handle, &random, tokens, t->n_depth);
        status = moe_session_eval(t->session[i], tokens, t->n_depth, error);
    }
    test_tokens(t, &random, tokens, t->n_prompt + t->n_gen);
    if (set.warm_up && status == MOE_OK)
        status = test_run(t, tokens, t->n_gen < few ? t->n_gen : few, &u, &bytes, &touched, error);
    return status;
}

static inline moe_status test_repeat(test *t, int32_t r, const int32_t *tokens,
                                     moe_error *error) {
    static usage u;
    const double n = (double)t->n_parallel * ((double)t->n_prompt + t->n_gen);
    double touched;
    measure_roofs(t, r);
    show_progress(t, r);
    const moe_status status = test_run(t, tokens, t->n_gen, &u, &t->bytes[r], &touched, error);
    t->touched += touched / set.repetitions / (t->n_evals ? t->n_evals : 1);
    t->seconds[r] = u.seconds;
    t->rate[r] = u.seconds > 0 ? n / u.seconds : 0;
    t->waiting = usage_waiting(&u, t->n_threads);
    t->imbalance = usage_imbalance(&u, t->n_threads);
    t->barriers = (double)u.n_barriers / (double)u.n_evals;
    t->n_groups = moe_session_get_stats(t->session[0])->n_expert_groups;
    for (int i = 0; i < TIMED_PARTS; i++)
        t->parts[i] = u.eval_seconds > 0 ? u.parts[i] / u.eval_seconds : 0;
    for (int i = 0; i < t->n_threads; i++)
        t->wait[i] = u.eval_seconds > 0 ? u.wait[i] / u.eval_seconds : 0;
    if (r + 1 == set.repetitions) {
        measure_roofs(t, r + 1);
        show_progress(t, r + 1);
    }
    return status;
}

// Tests that differ in their schedule alone, in turns A B C C B A on the same pages: what changes
// within the minutes of a measurement meets them all.
static inline int run_rivals(test *tests, int n) {
    int64_t longest = CHECK_TOKENS;
    int32_t status = TOOL_OK;
    uint64_t random = RANDOM_SEED;
    moe_error error;
    memset(&error, 0, sizeof error);
    for (int i = 0; i < n; i++) {
        const int64_t size = ((int64_t)tests[i].n_prompt + tests[i].n_gen) * tests[i].n_parallel;
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
        test_tokens(&tests[0], &random, tokens, tests[0].n_prompt + tests[0].n_gen);
        for (int i = 0; i < n && !error.status; i++)
            test_repeat(&tests[r % 2 ? n - 1 - i : i], r, tokens, &error);
    }
    if (error.status) status = tool_fail(program, tests[0].name, &error);
    for (int i = 0; i < n; i++) test_close(&tests[i]);
    free(tokens);
    return status;
}

// ---- figures ---------------------------------------------------------------------------------

// What a test did per second, and how much of the roof that is. NAN: does not apply.
typedef struct figures {
    double gbps, gbps_cache, gmacs, roof_gbps, roof_gmacs, roof_fraction;
    double bytes_eval;   // weights, keys and values that a call reads,
    double experts_eval; // and experts, in a layer that has them; both: mean
} figures;

static inline figures get_figures(const test *t) {
    static double x[MAX_REPETITIONS], y[MAX_REPETITIONS], z[MAX_REPETITIONS];
    const token_work *work = &t->m->work;
    const int n = set.repetitions, generates = t->n_gen > 0;
    // the last token of a call has logits
    const double logits = generates ? (double)t->n_evals / t->n_gen : 1.0 / t->n_prompt;
    const double macs = work->macs + work->output_macs * logits;
    double mean, deviation, mean_cache, mean_bytes;
    figures f = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN};
    if (t->n_prompt && t->n_gen) return f; // two kinds of work in one figure
    statistics(t->rate, n, &mean, &deviation);
    f.gmacs = mean * macs * 1e-9;
    if (generates) {
        for (int r = 0; r < n; r++) x[r] = t->bytes[r] / t->seconds[r];
        for (int r = 0; r < n; r++) y[r] = t->bytes_cache / t->seconds[r];
        statistics(x, n, &mean, &deviation);
        statistics(y, n, &mean_cache, &deviation);
        statistics(t->bytes, n, &mean_bytes, &deviation);
        f.gbps = mean * 1e-9;
        f.gbps_cache = mean_cache * 1e-9;
        f.bytes_eval = (mean_bytes + t->bytes_cache) / t->n_evals;
        if (work->n_moe) f.experts_eval = t->touched / work->n_moe;
    }
    if (!t->roof) return f;
    for (int r = 0; r < n; r++) {
        const double bytes = (t->bytes[r] + t->bytes_cache) / t->seconds[r];
        x[r] = (t->roof_bytes[r] + t->roof_bytes[r + 1]) / 2;
        y[r] = (t->roof_macs[r] + t->roof_macs[r + 1]) / 2;
        z[r] = generates ? bytes / x[r] : t->rate[r] * macs / y[r];
    }
    f.roof_gbps = roofs_median(x, n) * 1e-9;
    f.roof_gmacs = roofs_median(y, n) * 1e-9;
    f.roof_fraction = roofs_median(z, n);
    return f;
}

#endif
