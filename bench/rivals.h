// moe-bench --compare: the expert schedules side by side on the same mapped pages, in rounds
// A B C C B A: what changes within the minutes of a measurement meets them all. Schedules whose
// logits do not have the same bits are not timed. Prompts are the control: parallel is sequential
// in them.
// Include timing.h first.
#ifndef BENCH_RIVALS_H
#define BENCH_RIVALS_H

typedef struct rival {
    moe_session *session;
    double prompt[2 * MAX_REPETITIONS], generation[2 * MAX_REPETITIONS]; // tokens per second
    double waiting, imbalance; // of the last generation
} rival;
typedef struct comparison {
    const model *m;
    rival *rivals;
    int n_rivals, n_samples, n_prompt, n_gen;
    int32_t *tokens;
} comparison;

// One sample of one schedule; untimed: index < 0.
static inline moe_status compare_sample(const comparison *c, rival *r, int index,
                                        moe_error *error) {
    static usage u;
    moe_status status = timed_run(r->session, 0, c->tokens, c->n_prompt, 0, &u, error);
    if (index >= 0) r->prompt[index] = c->n_prompt / u.seconds;
    if (status == MOE_OK) status = timed_run(r->session, 0, c->tokens, 0, c->n_gen, &u, error);
    if (index >= 0) r->generation[index] = c->n_gen / u.seconds;
    r->waiting = usage_waiting(&u, moe_session_get_info(r->session)->n_threads);
    r->imbalance = usage_imbalance(&u, moe_session_get_info(r->session)->n_threads);
    return status;
}

// "12.3 (12.1 - 12.6) | 1.02 |": median and quartiles of x, and the median of x / first, sample by
// sample.
static inline void compare_print(const double *x, const double *first, int n) {
    static double sorted[2 * MAX_REPETITIONS], ratio[2 * MAX_REPETITIONS];
    for (int i = 0; i < n; i++) sorted[i] = x[i], ratio[i] = x[i] / first[i];
    const double median = roofs_median(sorted, n);
    char text[64];
    snprintf(text, sizeof text, "%.1f (%.1f - %.1f)", median, sorted[n / 4], sorted[n - 1 - n / 4]);
    printf(" %22s | %5.3f |", text, roofs_median(ratio, n));
}

static inline void compare_rows(const comparison *c) {
    for (int i = 0; i < c->n_rivals; i++) {
        const rival *r = &c->rivals[i];
        const moe_session_info *info = moe_session_get_info(r->session);
        const moe_session_stats *stats = moe_session_get_stats(r->session);
        printf("| %7d | %-10s | %6d | %8d | %6.1f | %9.3f |", info->n_threads,
               schedule_names[info->schedule & 3], stats->n_expert_groups, (int)stats->n_barriers,
               100 * r->waiting, r->imbalance);
        compare_print(r->prompt, c->rivals[0].prompt, c->n_samples);
        compare_print(r->generation, c->rivals[0].generation, c->n_samples);
        printf("\n");
    }
    fflush(stdout);
}

// All schedules of the list with one number of threads.
static inline int compare_run(comparison *c, int32_t threads) {
    moe_session *sessions[MAX_RIVALS];
    moe_error error;
    int status = TOOL_ERROR;
    const int32_t n_check = c->n_prompt < CHECK_PROMPT ? c->n_prompt : CHECK_PROMPT;
    const int32_t most = c->n_prompt > c->n_gen ? c->n_prompt : c->n_gen;
    memset(&error, 0, sizeof error);
    for (int i = 0; i < c->n_rivals; i++) {
        rival *r = &c->rivals[i];
        r->session = open_session(c->m, most + CHECK_TOKENS, set.n_ubatch.item[0], threads,
                                  set.isa.item[0], set.schedule.item[i], &error);
        sessions[i] = r->session;
        if (!r->session) goto done;
    }
    if (!sessions_agree(c->m, sessions, c->n_rivals, c->tokens, n_check, &error)) goto done;
    for (int i = 0; i < c->n_rivals && set.warm_up; i++)
        if (compare_sample(c, &c->rivals[i], -1, &error)) goto done;
    for (c->n_samples = 0; c->n_samples < 2 * set.repetitions; c->n_samples++)
        for (int i = 0; i < c->n_rivals; i++) {
            const int turn = c->n_samples % 2 ? c->n_rivals - 1 - i : i;
            if (compare_sample(c, &c->rivals[turn], c->n_samples, &error)) goto done;
        }
    compare_rows(c);
    status = TOOL_OK;
done:
    if (error.status) tool_fail(program, "schedules", &error);
    for (int i = 0; i < c->n_rivals; i++) {
        moe_session_close(c->rivals[i].session);
        c->rivals[i].session = NULL;
    }
    return status;
}

static inline int run_comparison(const model *m) {
    uint64_t random = RANDOM_SEED;
    comparison c;
    int status = TOOL_ERROR;
    memset(&c, 0, sizeof c);
    c.m = m;
    c.n_rivals = set.schedule.n < MAX_RIVALS ? set.schedule.n : MAX_RIVALS;
    c.n_prompt = set.n_prompt.item[0] > 0 ? set.n_prompt.item[0] : 1;
    c.n_gen = set.n_gen.item[0] > 0 ? set.n_gen.item[0] : 1;
    const int most = (c.n_prompt > c.n_gen ? c.n_prompt : c.n_gen) + CHECK_TOKENS;
    c.rivals = (rival *)calloc((size_t)c.n_rivals, sizeof *c.rivals);
    c.tokens = (int32_t *)malloc((size_t)most * sizeof *c.tokens);
    if (c.rivals && c.tokens) {
        random_tokens(m->handle, &random, c.tokens, most);
        printf("%s, prompt of %d tokens, %d generated; tokens per second: median (quartiles) of %d,"
               " ratio to the first\n\n"
               "| threads | schedule   | groups | barriers | %% wait | imbalance "
               "|       pp, prompt tokens/s | ratio | tg, generated tokens/s | ratio |\n"
               "| ------: | ---------- | -----: | -------: | -----: | --------: "
               "| ----------------------: | ----: | ---------------------: | ----: |\n",
               m->type, c.n_prompt, c.n_gen, 2 * set.repetitions);
        status = TOOL_OK;
        for (int32_t i = 0; i < set.n_threads.n && status == TOOL_OK; i++)
            status = compare_run(&c, set.n_threads.item[i]);
    } else {
        fprintf(stderr, "%s: out of memory\n", program);
    }
    free(c.rivals);
    free(c.tokens);
    return status;
}

#endif
