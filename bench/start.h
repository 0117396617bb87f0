// moe-bench --start: what a user of moe-cli meets. The model is opened as moe-cli opens it, without
// its pages being touched first; a session with the default options evaluates a short prompt, then
// tokens one by one, chosen as moe-cli does (but seeded: every build meets the same dice). The
// first tokens have a figure of their own: page tables are filled while they run.
//
// A process is started once. Of several models in one process only the first meets fresh memory.
// Include timing.h and fields.h first.
#ifndef BENCH_START_H
#define BENCH_START_H

enum { START_PROMPT = 16, START_FIRST = 50, START_NEXT = 200 };

// Bytes, NAN: the system does not tell.
typedef struct start_memory {
    double peak, anonymous, file, shared_out; // VmHWM, RssAnon, RssFile, Pss
} start_memory;

typedef struct start_run {
    const model *m;
    moe_session_info info;
    double session_seconds, first_token_seconds; // the latter from before opening the model
    double rate_first, rate_next;                // tokens per second
    start_memory memory;
} start_run;

// The value of "NAME:   123 kB" in a file of /proc/self, in bytes.
static inline double process_bytes(const char *path, const char *name) {
    char line[256];
    double kb = NAN;
    FILE *f = fopen(path, "r");
    const size_t n = strlen(name);
    while (f && kb != kb && fgets(line, sizeof line, f))
        if (strncmp(line, name, n) == 0 && line[n] == ':') kb = strtod(line + n + 1, NULL);
    if (f) fclose(f);
    return kb * 1024;
}

static inline start_memory start_get_memory(void) {
    start_memory memory;
    memory.peak = process_bytes("/proc/self/status", "VmHWM");
    memory.anonymous = process_bytes("/proc/self/status", "RssAnon");
    memory.file = process_bytes("/proc/self/status", "RssFile");
    memory.shared_out = process_bytes("/proc/self/smaps_rollup", "Pss");
    return memory;
}

static inline moe_sampler *start_sampler(const moe_model *m, moe_error *error) {
    const int32_t n_vocab = moe_model_get_info(m)->n_vocab;
    const moe_vocab *vocab = moe_model_vocab(m);
    moe_sampler_options o;
    memset(&o, 0, sizeof o);
    o.temperature = 0.8f;
    o.top_k = 40;
    o.top_p = 0.95f;
    o.min_p = 0.05f;
    o.seed = RANDOM_SEED;
    return moe_sampler_open(&o, n_vocab, vocab ? moe_vocab_size(vocab) : n_vocab, error);
}

static inline int32_t start_choose(moe_session *session, moe_sampler *sampler) {
    const int32_t token = moe_sampler_sample(sampler, moe_session_logits(session, -1));
    moe_sampler_accept(sampler, token);
    return token;
}

// n tokens behind *token, which becomes the last of them; *rate: tokens per second.
static inline moe_status start_generate(moe_session *session, moe_sampler *sampler, int32_t n,
                                        int32_t *token, double *rate, moe_error *error) {
    const double begin = tool_seconds();
    moe_status status = MOE_OK;
    for (int32_t i = 0; i < n && status == MOE_OK; i++) {
        status = moe_session_eval(session, token, 1, error);
        if (status == MOE_OK) *token = start_choose(session, sampler);
    }
    *rate = n / (tool_seconds() - begin);
    return status;
}

// The library's default context, as long as it holds all tokens.
static inline int32_t start_context(const moe_model_info *info, int32_t n_tokens) {
    return n_tokens <= info->n_ctx_train && n_tokens <= 4096 ? 0 : n_tokens;
}

static inline moe_status start_session(start_run *run, const int32_t *prompt, int32_t n_prompt,
                                       moe_session *session, moe_sampler *sampler,
                                       moe_error *error) {
    int32_t token;
    for (int32_t i = 0; i < n_prompt; i++) moe_sampler_accept(sampler, prompt[i]);
    moe_status status = moe_session_eval(session, prompt, n_prompt, error);
    if (status != MOE_OK) return status;
    token = start_choose(session, sampler);
    run->first_token_seconds = tool_seconds() - run->m->began;
    status = start_generate(session, sampler, START_FIRST, &token, &run->rate_first, error);
    if (status == MOE_OK)
        status = start_generate(session, sampler, START_NEXT, &token, &run->rate_next, error);
    run->memory = start_get_memory();
    run->info = *moe_session_get_info(session);
    return status;
}

// ---- rows ------------------------------------------------------------------------------------

static inline void start_header(void) {
    printf("| %-30s | %7s | %8s | %8s | %9s | %9s | %9s | %9s | %9s | %9s "
           "| pages before | what was done about them |\n",
           "model", "threads", "open s", "token s", "t/s of 50", "next 200", "peak MiB", "anon MiB",
           "file MiB", "Pss MiB");
    printf("| ------------------------------ | ------: | -------: | -------: | --------: "
           "| --------: | --------: | --------: | --------: | --------: "
           "| --- | --- |\n");
    fflush(stdout);
}

static inline void start_print(const start_run *run) {
    const double mib = 1048576;
    char found[PAGE_SENTENCE];
    printf("| %-30s | %7d | %8.3f | %8.3f | %9.2f | %9.2f | %9.1f | %9.1f | %9.1f | %9.1f "
           "| %s | %s |\n",
           run->m->type, run->info.n_threads, run->m->open_seconds, run->first_token_seconds,
           run->rate_first, run->rate_next, run->memory.peak / mib, run->memory.anonymous / mib,
           run->memory.file / mib, run->memory.shared_out / mib,
           page_state_sentence(&run->m->pages, found), moe_model_get_memory(run->m->handle)->text);
}

static inline void start_fields(const void *row) {
    const start_run *run = (const start_run *)row;
    field_model(run->m);
    field_text("test", "start");
    field_number("n_prompt", 0, set.n_prompt.item[0]);
    field_number("n_gen", 0, 1 + START_FIRST + START_NEXT);
    field_number("n_ctx", 0, run->info.n_ctx);
    field_number("n_threads", 0, run->info.n_threads);
    field_text("type_k", kv_names[run->info.kv_type % 3]);
    field_text("isa", moe_isa_name(run->info.isa));
    field_text("schedule", schedule_names[run->info.schedule & 3]);
    field_number("open_seconds", 6, run->m->open_seconds);
    field_number("session_seconds", 6, run->session_seconds);
    field_number("first_token_seconds", 6, run->first_token_seconds);
    field_number("first_50_ts", 4, run->rate_first);
    field_number("next_200_ts", 4, run->rate_next);
    field_number("peak_bytes", 0, run->memory.peak);
    field_number("rss_anon_bytes", 0, run->memory.anonymous);
    field_number("rss_file_bytes", 0, run->memory.file);
    field_number("pss_bytes", 0, run->memory.shared_out);
}

static inline int run_start(const model *m) {
    static start_run run;
    const int32_t n_prompt = set.n_prompt.item[0];
    const int32_t n_batch = set.n_ubatch.item[0] < set.n_batch.item[0] ? set.n_ubatch.item[0]
                                                                       : set.n_batch.item[0];
    const int64_t n_tokens = (int64_t)n_prompt + START_FIRST + START_NEXT;
    uint64_t random = RANDOM_SEED;
    moe_session *session = NULL;
    moe_sampler *sampler = NULL;
    moe_error error;
    memset(&error, 0, sizeof error);
    run.m = m;
    int32_t *prompt = (int32_t *)malloc((size_t)n_prompt * sizeof *prompt);
    if (!prompt || n_tokens > INT32_MAX) {
        fprintf(stderr, "%s: --start: a prompt of %d tokens is too long\n", program, n_prompt);
        free(prompt);
        return TOOL_ERROR;
    }
    random_tokens(m->handle, &random, prompt, n_prompt);
    const double begin = tool_seconds();
    session = open_session(m, start_context(m->info, (int32_t)n_tokens), n_batch,
                           set.n_threads.item[0], set.isa.item[0], set.schedule.item[0], &error);
    run.session_seconds = tool_seconds() - begin;
    if (session) sampler = start_sampler(m->handle, &error);
    if (sampler) start_session(&run, prompt, n_prompt, session, sampler, &error);
    int status = error.status ? tool_fail(program, "--start", &error) : TOOL_OK;
    if (status == TOOL_OK && set.format == FORMAT_MD) {
        start_print(&run);
        status = flush_rows();
    } else if (status == TOOL_OK) {
        status = write_row(start_fields, &run);
    }
    moe_sampler_close(sampler);
    moe_session_close(session);
    free(prompt);
    return status;
}

#endif
