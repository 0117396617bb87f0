/* moe-bench: times prompts and generation, with llama-bench's options and table.
 *
 *     cc -O2 bench/moe_bench.c -o moe-bench -lm -lpthread
 *     ./moe-bench -m MODEL.gguf -p 512 -n 128 -t 1,2
 *
 * pp512 is the time of 512 tokens at once, tg128 that of 128 tokens one after another, each from an
 * empty context. Tokens are random (seeded) and nothing is sampled: what is timed is
 * moe_session_eval alone. Random tokens spread over more experts than real text does. */
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "../examples/tool.h"
#include <unistd.h>

static const char program[] = "moe-bench";
enum { MAX_REPETITIONS = 1000 };

static struct settings {
    const char *model;
    tool_list n_prompt, n_gen, n_threads, isa, schedule;
    int32_t repetitions, n_batch, k_type, v_type, kv_type, format;
    int warm_up, help, version;
} set = {NULL, {1, {512}}, {1, {128}}, {1, {-1}}, {1, {0}}, {1, {0}}, 5, 512,
         -1, -1, 0, 0, 1, 0, 0};

static const tool_option options[] = {
    {"A list a,b,c tries each; several lists are multiplied.", NULL, TOOL_HEADING, NULL, 0, 0,
     NULL},
    {"-m, --model", "FILE,...", TOOL_TEXT, &set.model, 0, 0, "GGUF files (needed)"},
    {"-p, --n-prompt", "N,...", TOOL_INTS, &set.n_prompt, 0, INT32_MAX,
     "tokens of the prompt; 0: no such test (default 512)"},
    {"-n, --n-gen", "N,...", TOOL_INTS, &set.n_gen, 0, INT32_MAX,
     "tokens to generate; 0: no such test (default 128)"},
    {"-t, --threads", "N,...", TOOL_INTS, &set.n_threads, -1, MOE_MAX_THREADS,
     "threads (default -1: the physical cores we may use)"},
    {"-r, --repetitions", "N", TOOL_INT, &set.repetitions, 1, MAX_REPETITIONS,
     "timed runs of each test, behind an untimed one (default 5)"},
    {"-b, --batch-size", "N", TOOL_INT, &set.n_batch, 1, INT32_MAX,
     "tokens evaluated at once (default 512)"},
    {"-ctk, --cache-type-k", "f16|q8_0|f32", TOOL_CHOICE, &set.k_type, 0, 0,
     "what keys and values are kept as (default f16)"},
    {"-ctv, --cache-type-v", "f16|q8_0|f32", TOOL_CHOICE, &set.v_type, 0, 0,
     "the same (llama.cpp sets them one by one: here they are\none)"},
    {"--isa", "best|scalar|avx2|avx512|avx-vnni", TOOL_CHOICES, &set.isa, 0, 0,
     "list of instruction sets; one that is missing falls back\nto the next lower one"},
    {"--schedule", "default|sequential|parallel|balanced", TOOL_CHOICES, &set.schedule, 0, 0,
     "list of ways in which threads share the experts\n(only sequential exists so far)"},
    {"--no-warmup", NULL, TOOL_UNFLAG, &set.warm_up, 0, 0, "no untimed run"},
    {"-o, --output", "md|json", TOOL_CHOICE, &set.format, 0, 0,
     "a table in Markdown (default), or one JSON object per test\nand line"},
    {"-h, --help", NULL, TOOL_FLAG, &set.help, 0, 0, "show this"},
    {"--version", NULL, TOOL_FLAG, &set.version, 0, 0, "show the version"},
    {NULL, NULL, TOOL_HEADING, NULL, 0, 0, NULL}};

/* ---- what is measured ------------------------------------------------------------------------ */

typedef struct model {
    const char *path;
    char type[80]; /* "qwen3moe 30B Q4_K" */
    moe_model *handle;
    const moe_model_info *info;
} model;

typedef struct test {
    const model *m;
    char name[32];           /* "pp512", "tg128" */
    int32_t n_prompt, n_gen; /* one of them is 0 */
    moe_session_options options;
    moe_session_info info;   /* of the session that ran */
    uint64_t n_barriers;     /* of the last eval */
    int32_t n_threads;       /* those that the test used */
    double seconds[MAX_REPETITIONS];
    double rate[MAX_REPETITIONS]; /* tokens per second */
} test;

/* xorshift64*: any fixed sequence would do, but it must be the same for every build. */
static uint64_t random_next(uint64_t *state) {
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 2685821657736338717u;
}

static void random_tokens(const moe_model *m, uint64_t *state, int32_t *tokens, int32_t n) {
    const moe_vocab *vocab = moe_model_vocab(m);
    uint64_t n_vocab = (uint64_t)moe_model_get_info(m)->n_vocab;
    int32_t bos = vocab ? moe_vocab_bos(vocab) : -1;
    for (int32_t i = 0; i < n; i++) tokens[i] = (int32_t)((random_next(state) >> 33) % n_vocab);
    if (bos >= 0) tokens[0] = bos;
}

/* Evaluates n tokens from an empty context: at once (prompt), or one by one (generation). */
static moe_status run_once(moe_session *session, const int32_t *tokens, int32_t n, int one_by_one,
                           double *seconds, moe_error *error) {
    moe_status status = moe_session_rewind(session, 0, error);
    int32_t step = one_by_one ? 1 : n;
    double start = tool_seconds();
    for (int32_t i = 0; i < n && status == MOE_OK; i += step)
        status = moe_session_eval(session, tokens + i, step, error);
    *seconds = tool_seconds() - start;
    return status;
}

static void show_progress(const test *t, int32_t repetition) {
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r%s: %s, %d threads: %d/%d ", program, t->name, t->info.n_threads,
            repetition, set.repetitions);
    if (repetition == set.repetitions) fprintf(stderr, "\r%60s\r", "");
}

static moe_status run_repetitions(test *t, moe_session *session, int32_t *tokens,
                                  moe_error *error) {
    int32_t n = t->n_prompt + t->n_gen, one_by_one = t->n_gen > 0;
    uint64_t random = 88172645463325252u; /* every test meets the same tokens */
    double seconds;
    random_tokens(t->m->handle, &random, tokens, n);
    if (set.warm_up) {
        int32_t n_warm = one_by_one && n > 8 ? 8 : n;
        moe_status status = run_once(session, tokens, n_warm, one_by_one, &seconds, error);
        if (status != MOE_OK) return status;
    }
    for (int32_t r = 0; r < set.repetitions; r++) {
        show_progress(t, r);
        moe_status status = run_once(session, tokens, n, one_by_one, &seconds, error);
        if (status != MOE_OK) return status;
        t->seconds[r] = seconds;
        t->rate[r] = seconds > 0 ? n / seconds : 0;
        random_tokens(t->m->handle, &random, tokens, n);
    }
    show_progress(t, set.repetitions);
    return MOE_OK;
}

static int run_test(test *t) {
    int32_t n = t->n_prompt + t->n_gen;
    int status = TOOL_ERROR;
    moe_error error;
    t->options.n_ctx = n;
    snprintf(t->name, sizeof t->name, t->n_prompt ? "pp%d" : "tg%d", n);
    moe_session *session = moe_session_open(t->m->handle, &t->options, &error);
    int32_t *tokens = (int32_t *)malloc((size_t)n * sizeof *tokens);
    if (!session) {
        tool_fail(program, t->name, &error);
    } else if (!tokens) {
        fprintf(stderr, "%s: %s: out of memory\n", program, t->name);
    } else {
        t->info = *moe_session_get_info(session);
        t->n_threads = t->n_prompt > 1 ? t->info.n_threads_batch : t->info.n_threads;
        if (run_repetitions(t, session, tokens, &error) == MOE_OK) status = TOOL_OK;
        else tool_fail(program, t->name, &error);
        t->n_barriers = moe_session_get_info(session)->n_barriers;
    }
    free(tokens);
    moe_session_close(session);
    return status;
}

/* Mean and standard deviation of a sample. */
static void statistics(const double *x, int32_t n, double *mean, double *deviation) {
    double sum = 0, squares = 0;
    for (int32_t i = 0; i < n; i++) sum += x[i];
    *mean = sum / n;
    for (int32_t i = 0; i < n; i++) squares += (x[i] - *mean) * (x[i] - *mean);
    *deviation = n > 1 ? sqrt(squares / (n - 1)) : 0;
}

/* ---- the table ------------------------------------------------------------------------------- */

static const char *const schedule_names[] = {"default", "sequential", "parallel", "balanced"};

/* Columns that the command line says something about stand in the table, as in llama-bench. */
static int show_isa, show_schedule, show_batch, show_kv_type;

static void table_header(void) {
    printf("| %-30s | %10s | %10s | %-10s |", "model", "size", "params", "backend");
    printf(" %7s |", "threads");
    if (show_batch) printf(" %7s |", "n_batch");
    if (show_kv_type) printf(" %6s |", "type_k");
    if (show_isa) printf(" %-10s |", "isa");
    if (show_schedule) printf(" %-10s |", "schedule");
    printf(" %15s | %20s |\n", "test", "t/s");
    printf("| ------------------------------ | ---------: | ---------: | ---------- | ------: |");
    if (show_batch) printf(" ------: |");
    if (show_kv_type) printf(" -----: |");
    if (show_isa) printf(" ---------- |");
    if (show_schedule) printf(" ---------- |");
    printf(" --------------: | -------------------: |\n");
    fflush(stdout);
}

static void table_row(const test *t) {
    static const char *const kv_names[] = {"f16", "q8_0", "f32"};
    const moe_model_info *m = t->m->info;
    char size[32], params[32], rate[64];
    double mean, deviation, bytes = (double)m->n_bytes, n = (double)m->n_params;
    statistics(t->rate, set.repetitions, &mean, &deviation);
    double unit = bytes < 1073741824.0 ? 1048576.0 : 1073741824.0;
    snprintf(size, sizeof size, "%.2f %s", bytes / unit, unit > 1e9 ? "GiB" : "MiB");
    snprintf(params, sizeof params, "%.2f %s", n / (n < 1e9 ? 1e6 : 1e9), n < 1e9 ? "M" : "B");
    snprintf(rate, sizeof rate, "%.2f ± %.2f", mean, deviation);
    printf("| %-30s | %10s | %10s | %-10s |", t->m->type, size, params, "CPU");
    printf(" %7d |", t->n_threads);
    if (show_batch) printf(" %7d |", t->info.n_batch);
    if (show_kv_type) printf(" %6s |", kv_names[t->info.kv_type % 3]);
    if (show_isa) printf(" %-10s |", moe_isa_name(t->info.isa));
    if (show_schedule) printf(" %-10s |", schedule_names[t->info.schedule & 3]);
    printf(" %15s | %21s |\n", t->name, rate); /* the sign has one column and two bytes */
}

/* ---- JSON ------------------------------------------------------------------------------------ */

/* A string literal; bytes that are not UTF-8 become U+FFFD. */
static void json_string(const char *key, const char *text) {
    printf("\"%s\": \"", key);
    for (size_t i = 0, size = strlen(text); i < size;) {
        size_t n = tool_character(text + i, size - i);
        if (n && text[i] != '"' && text[i] != '\\') fwrite(text + i, 1, n, stdout);
        else if (n) printf("\\%c", text[i]);
        else if ((unsigned char)text[i] < 0x80) printf("\\u%04X", (unsigned)text[i]);
        else fputs("\\uFFFD", stdout);
        i += n ? n : 1;
    }
    fputs("\", ", stdout);
}

static void json_row(const test *t) {
    static const char *const kv_names[] = {"f16", "q8_0", "f32"};
    const moe_model_info *m = t->m->info;
    double mean, deviation, mean_s, deviation_s;
    char version[32], when[32] = "";
    time_t now = time(NULL);
    struct tm utc;
    statistics(t->rate, set.repetitions, &mean, &deviation);
    statistics(t->seconds, set.repetitions, &mean_s, &deviation_s);
    snprintf(version, sizeof version, "%d.%d.%d", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
             MOE_VERSION_PATCH);
    if (gmtime_r(&now, &utc)) strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    fputs("{", stdout);
    json_string("engine", "moe_infer.h");
    json_string("version", version);
    json_string("test_time", when);
    json_string("model_filename", t->m->path);
    json_string("model_type", t->m->type);
    printf("\"model_size\": %lld, \"n_params\": %lld, \"bytes_token\": %lld, ",
           (long long)m->n_bytes, (long long)m->n_params, (long long)m->n_bytes_token);
    json_string("backend", "CPU");
    json_string("isa", moe_isa_name(t->info.isa));
    json_string("schedule", schedule_names[t->info.schedule & 3]);
    json_string("type_k", kv_names[t->info.kv_type % 3]);
    json_string("type_v", kv_names[t->info.kv_type % 3]);
    json_string("test", t->name);
    printf("\"n_threads\": %d, \"n_batch\": %d, \"n_prompt\": %d, \"n_gen\": %d, ", t->n_threads,
           t->info.n_batch, t->n_prompt, t->n_gen);
    printf("\"avg_ns\": %.0f, \"stddev_ns\": %.0f, \"avg_ts\": %.4f, \"stddev_ts\": %.4f, ",
           mean_s * 1e9, deviation_s * 1e9, mean, deviation);
    if (t->n_gen) printf("\"gbps\": %.4f, ", mean * (double)m->n_bytes_token * 1e-9);
    else printf("\"gbps\": null, ");
    printf("\"n_barriers\": %llu, \"samples_ts\": [", (unsigned long long)t->n_barriers);
    for (int32_t r = 0; r < set.repetitions; r++) printf(r ? ", %.4f" : "%.4f", t->rate[r]);
    puts("]}");
}

/* ---- all tests ------------------------------------------------------------------------------- */

/* "qwen3moe 30B Q4_K": family, parameters, the type that most bytes have. */
static void describe(model *m) {
    const moe_gguf *gguf = moe_model_gguf(m->handle);
    double n = (double)m->info->n_params, bytes[64] = {0};
    int best = 0;
    char params[32];
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        int type = (int)tensor->type;
        if (type < 0 || type >= 64) continue;
        bytes[type] += (double)tensor->size;
        if (bytes[type] > bytes[best]) best = type;
    }
    if (n >= 1e10) snprintf(params, sizeof params, "%.0fB", n / 1e9);
    else if (n >= 1e9) snprintf(params, sizeof params, "%.1fB", n / 1e9);
    else snprintf(params, sizeof params, "%.1fM", n / 1e6);
    snprintf(m->type, sizeof m->type, "%s %s %s", m->info->family, params,
             moe_type_name((moe_type)best));
}

static int run_tests_of(test *t, const tool_list *sizes, int prompt) {
    for (int32_t i = 0; i < sizes->n; i++) {
        if (sizes->item[i] == 0) continue;
        t->n_prompt = prompt ? sizes->item[i] : 0;
        t->n_gen = prompt ? 0 : sizes->item[i];
        int status = run_test(t);
        if (status) return status;
        if (set.format == 1) json_row(t);
        else table_row(t);
        if (fflush(stdout) != 0) {
            fprintf(stderr, "%s: cannot write: %s\n", program, strerror(errno));
            return TOOL_ERROR;
        }
    }
    return TOOL_OK;
}

static int run_model(const model *m) {
    static test t;
    for (int32_t i = 0; i < set.n_threads.n; i++)
        for (int32_t j = 0; j < set.isa.n; j++)
            for (int32_t k = 0; k < set.schedule.n; k++) {
                int32_t threads = set.n_threads.item[i];
                memset(&t, 0, sizeof t);
                t.m = m;
                t.options.n_batch = set.n_batch;
                t.options.n_threads = threads > 0 ? threads : 0;
                t.options.kv_type = (moe_kv_type)set.kv_type;
                t.options.isa = (moe_isa)set.isa.item[j];
                t.options.schedule = (moe_schedule)set.schedule.item[k];
                int status = run_tests_of(&t, &set.n_prompt, 1);
                if (status == TOOL_OK) status = run_tests_of(&t, &set.n_gen, 0);
                if (status != TOOL_OK) return status;
            }
    return TOOL_OK;
}

static int on_loading(void *user, float fraction) {
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%s: loading %s: %3.0f %% ", program, (const char *)user,
                (double)fraction * 100);
    return 1;
}

static int run_file(const char *path) {
    model m;
    moe_model_options o;
    moe_error error;
    memset(&m, 0, sizeof m);
    memset(&o, 0, sizeof o);
    o.prefault = MOE_ON; /* the first timed run must not wait for the disk */
    o.progress = on_loading;
    o.progress_user = (void *)(uintptr_t)path;
    m.path = path;
    m.handle = moe_model_open(path, &o, &error);
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\r%79s\r", "");
    if (!m.handle) return tool_fail(program, path, &error);
    m.info = moe_model_get_info(m.handle);
    describe(&m);
    int status = run_model(&m);
    moe_model_close(m.handle);
    return status;
}

static int run_files(char *paths) {
    int status = TOOL_OK;
    if (set.format == 0) table_header();
    for (char *path = paths; path && status == TOOL_OK;) {
        char *comma = strchr(path, ',');
        if (comma) *comma = 0;
        status = run_file(path);
        path = comma ? comma + 1 : NULL;
    }
    if (set.format == 0 && status == TOOL_OK)
        printf("\nbuild: moe_infer %d.%d.%d (%s)\n", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
               MOE_VERSION_PATCH, moe_isa_name(moe_isa_resolve(MOE_ISA_BEST)));
    return status;
}

static int is_given(int argc, char **argv, const char *names) {
    for (int i = 1; i < argc; i++)
        if (tool_named(names, argv[i])) return 1;
    return 0;
}

/* Is there a number other than 0? */
static int any(const tool_list *list) {
    for (int32_t i = 0; i < list->n; i++)
        if (list->item[i]) return 1;
    return 0;
}

int main(int argc, char **argv) {
    int status = tool_parse(program, options, argc, argv);
    if (status) return status;
    if (!tool_kv_type(program, set.k_type, set.v_type, &set.kv_type)) return TOOL_USAGE;
    if (set.help) {
        printf("usage: %s -m MODEL.gguf [options]\n\n"
               "Times prompts (ppN) and generation (tgN) on the CPU.\n"
               "Exit codes: 0 done, 1 something failed, 2 wrong usage.\n", program);
        tool_help(stdout, options);
    } else if (set.version) {
        printf("%s (moe_infer %d.%d.%d), %s\n", program, MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
               MOE_VERSION_PATCH, moe_isa_name(moe_isa_resolve(MOE_ISA_BEST)));
    } else if (!set.model) {
        fprintf(stderr, "%s: no model: give -m FILE; see %s --help\n", program, program);
        return TOOL_USAGE;
    } else if (!any(&set.n_prompt) && !any(&set.n_gen)) {
        fprintf(stderr, "%s: nothing to time: -p and -n are both 0\n", program);
        return TOOL_USAGE;
    } else {
        show_isa = is_given(argc, argv, "--isa");
        show_schedule = is_given(argc, argv, "--schedule");
        show_batch = is_given(argc, argv, "-b, --batch-size");
        show_kv_type = set.k_type >= 0 || set.v_type >= 0;
        char *paths = (char *)malloc(strlen(set.model) + 1);
        if (!paths) return TOOL_ERROR;
        strcpy(paths, set.model);
        status = run_files(paths);
        free(paths);
    }
    return status;
}
