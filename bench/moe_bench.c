/* moe-bench: times prompts and generation, with llama-bench's options and table.
 *
 *     cc -O2 bench/moe_bench.c -o moe-bench -lm -lpthread
 *     ./moe-bench -m MODEL.gguf -p 512 -n 128 -t 1,2
 *
 * pp512 is the time of 512 tokens at once, tg128 that of 128 tokens one after another, each from an
 * empty context or, "@ d8192", behind 8192 tokens. Tokens are random (seeded) and nothing is
 * sampled: what is timed is moe_session_eval alone. Random tokens spread over more experts than
 * real text does.
 *
 * Beside the speed stands what part it is of the machine's roof, measured between the runs with as
 * many threads: of reading memory for generation, of int8 multiply-adds for prompts (see roofs.h).
 * What a token needs is counted from the file's table of tensors. */
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "../examples/tool.h"
#include "plan.h"
#include "roofs.h"
#include <unistd.h>

static const char program[] = "moe-bench";
enum { MAX_REPETITIONS = 1000 };

static struct settings {
    const char *model;
    tool_list n_prompt, n_gen, n_depth, n_threads, isa, schedule;
    int32_t repetitions, n_batch, k_type, v_type, kv_type, format;
    int warm_up, roofs, compare, plan, help, version;
} set = {NULL,     {1, {512}}, {1, {128}}, {1, {0}}, {1, {-1}}, {1, {0}},
         {1, {0}}, 5,          512,        -1,       -1,        0,
         0,        1,          1,          0,        0,        0,
         0};

static const tool_option options[] = {
    {"A list a,b,c tries each; several lists are multiplied.", NULL, TOOL_HEADING, NULL, 0, 0,
     NULL},
    {"-m, --model", "FILE,...", TOOL_TEXT, &set.model, 0, 0, "GGUF files (needed)"},
    {"-p, --n-prompt", "N,...", TOOL_INTS, &set.n_prompt, 0, INT32_MAX,
     "tokens of the prompt; 0: no such test (default 512)"},
    {"-n, --n-gen", "N,...", TOOL_INTS, &set.n_gen, 0, INT32_MAX,
     "tokens to generate; 0: no such test (default 128)"},
    {"-d, --n-depth", "N,...", TOOL_INTS, &set.n_depth, 0, INT32_MAX,
     "tokens that the context holds before each run (default 0)"},
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
     "list of ways in which threads share the experts"},
    {"--no-warmup", NULL, TOOL_UNFLAG, &set.warm_up, 0, 0, "no untimed run"},
    {"--no-roofs", NULL, TOOL_UNFLAG, &set.roofs, 0, 0,
     "do not measure what the machine could do at most"},
    {"-o, --output", "md|json|csv", TOOL_CHOICE, &set.format, 0, 0,
     "a table in Markdown (default), one JSON object per test and\nline, or CSV"},
    {"--compare", NULL, TOOL_FLAG, &set.compare, 0, 0,
     "the schedules of --schedule (default: all) in turns,\n"
     "A B C C B A; refused if their logits differ in any bit"},
    {"--plan", NULL, TOOL_FLAG, &set.plan, 0, 0,
     "print how evenly each schedule would use up to 256\n"
     "threads and 8 memory nodes; needs no model"},
    {"-h, --help", NULL, TOOL_FLAG, &set.help, 0, 0, "show this"},
    {"--version", NULL, TOOL_FLAG, &set.version, 0, 0, "show the version"},
    {NULL, NULL, TOOL_HEADING, NULL, 0, 0, NULL}};

/* ---- what is measured ------------------------------------------------------------------------ */

/* What the file's tensors say about one token. */
typedef struct token_work {
    double bytes;       /* of weights that generating it reads; of experts only the chosen ones */
    double macs;        /* multiply-adds with them, but for the output matrix */
    double output_macs; /* of the output matrix: prompts need it for their last token only */
    double kv_row;      /* values that one position of one layer holds in the cache */
    int32_t n_full, n_window, window; /* layers that read all positions, or the last `window` */
} token_work;

typedef struct model {
    const char *path;
    char type[80]; /* "qwen3moe 30B Q4_K" */
    moe_model *handle;
    const moe_model_info *info;
    token_work work;
} model;

typedef struct test {
    const model *m;
    char name[48];           /* "pp512", "tg128", "tg128 @ d8192" */
    int32_t n_prompt, n_gen; /* one of them is 0 */
    int32_t n_depth;         /* tokens in the context before */
    moe_session_options options;
    moe_session_info info;   /* of the session that ran */
    uint64_t n_barriers;     /* of the last eval */
    int32_t n_threads;       /* those that the test used */
    double seconds[MAX_REPETITIONS];
    double rate[MAX_REPETITIONS]; /* tokens per second */
    /* Per second and repetition, each beside the roofs before and after it; 0: not measured. */
    double roof_bytes[MAX_REPETITIONS + 1], roof_macs[MAX_REPETITIONS + 1];
    roofs *roof; /* open while a test runs with the same threads and instruction set */
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

/* Evaluates n tokens behind `depth` others: at once (prompt), or one by one (generation). */
static moe_status run_once(moe_session *session, int32_t depth, const int32_t *tokens, int32_t n,
                           int one_by_one, double *seconds, moe_error *error) {
    moe_status status = moe_session_rewind(session, depth, error);
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

/* Both roofs, in turns of 10 ms: a quarter of a second before the first run and after the last, */
/* less in between. */
static void measure_roofs(test *t, int32_t at) {
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

static moe_status run_repetitions(test *t, moe_session *session, int32_t *tokens,
                                  moe_error *error) {
    int32_t n = t->n_prompt + t->n_gen, one_by_one = t->n_gen > 0;
    uint64_t random = 88172645463325252u; /* every test meets the same tokens */
    double seconds;
    moe_status status = MOE_OK;
    if (t->n_depth) {
        random_tokens(t->m->handle, &random, tokens, t->n_depth);
        status = moe_session_eval(session, tokens, t->n_depth, error);
    }
    random_tokens(t->m->handle, &random, tokens, n);
    if (set.warm_up && status == MOE_OK) {
        int32_t n_warm = one_by_one && n > 8 ? 8 : n;
        status = run_once(session, t->n_depth, tokens, n_warm, one_by_one, &seconds, error);
    }
    measure_roofs(t, 0);
    for (int32_t r = 0; r < set.repetitions && status == MOE_OK; r++) {
        show_progress(t, r);
        status = run_once(session, t->n_depth, tokens, n, one_by_one, &seconds, error);
        t->seconds[r] = seconds;
        t->rate[r] = seconds > 0 ? n / seconds : 0;
        measure_roofs(t, r + 1);
        random_tokens(t->m->handle, &random, tokens, n);
    }
    if (status != MOE_OK) return status;
    show_progress(t, set.repetitions);
    return MOE_OK;
}

/* The roofs stay open from test to test until one needs other threads. Without memory or threads */
/* for them there are none. */
static roofs shared_roofs;
static void open_roofs(test *t) {
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

static int run_test(test *t) {
    int32_t n = t->n_prompt + t->n_gen;
    int status = TOOL_ERROR;
    moe_error error;
    int length = snprintf(t->name, sizeof t->name, t->n_prompt ? "pp%d" : "tg%d", n);
    if (t->n_depth) snprintf(t->name + length, sizeof t->name - (size_t)length, " @ d%d",
                             t->n_depth);
    if (t->n_depth > INT32_MAX - n) {
        fprintf(stderr, "%s: %s: too many tokens\n", program, t->name);
        return TOOL_ERROR;
    }
    t->options.n_ctx = n + t->n_depth;
    moe_session *session = moe_session_open(t->m->handle, &t->options, &error);
    int32_t most = t->n_depth > n ? t->n_depth : n;
    int32_t *tokens = (int32_t *)malloc((size_t)most * sizeof *tokens);
    if (!session) {
        tool_fail(program, t->name, &error);
    } else if (!tokens) {
        fprintf(stderr, "%s: %s: out of memory\n", program, t->name);
    } else {
        t->info = *moe_session_get_info(session);
        t->n_threads = t->n_prompt > 1 ? t->info.n_threads_batch : t->info.n_threads;
        if (set.roofs) open_roofs(t);
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

static const char *const kv_names[] = {"f16", "q8_0", "f32"};

/* What a test did per second, and how much of the roof that is. NAN: does not apply. */
typedef struct figures {
    double gbps, gbps_cache, gmacs, roof_gbps, roof_gmacs, roof_fraction;
} figures;

/* Bytes of keys and values that generating reads per token: those of position p are p + 1 rows. */
static double cache_bytes(const test *t) {
    static const double value_bytes[] = {2, 34.0 / 32, 4};
    const token_work *work = &t->m->work;
    const double middle = t->n_depth + (t->n_gen + 1) / 2.0;
    double window = work->window < middle ? work->window : middle;
    return work->kv_row * value_bytes[t->info.kv_type % 3] *
           (work->n_full * middle + work->n_window * window);
}

static figures get_figures(const test *t) {
    static double x[MAX_REPETITIONS], y[MAX_REPETITIONS], z[MAX_REPETITIONS];
    const token_work *work = &t->m->work;
    const int n = set.repetitions, generates = t->n_gen > 0;
    const double macs = work->macs + work->output_macs / (generates ? 1 : t->n_prompt);
    const double cache = cache_bytes(t), bytes = work->bytes + cache;
    double mean, deviation;
    figures f = {NAN, NAN, NAN, NAN, NAN, NAN};
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
    if (set.roofs) printf(" %6s |", "% roof");
    printf(" %15s | %20s |\n", "test", "t/s");
    printf("| ------------------------------ | ---------: | ---------: | ---------- | ------: |");
    if (show_batch) printf(" ------: |");
    if (show_kv_type) printf(" -----: |");
    if (show_isa) printf(" ---------- |");
    if (show_schedule) printf(" ---------- |");
    if (set.roofs) printf(" -----: |");
    printf(" --------------: | -------------------: |\n");
    fflush(stdout);
}

static void table_row(const test *t) {
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
    if (set.roofs && t->roof) printf(" %6.1f |", 100 * get_figures(t).roof_fraction);
    else if (set.roofs) printf(" %6s |", "");
    printf(" %15s | %21s |\n", t->name, rate); /* the sign has one column and two bytes */
}

/* ---- JSON and CSV ---------------------------------------------------------------------------- */

/* One row is written three ways: a JSON object, the names of the CSV columns, a line of CSV. */
static enum { WRITE_JSON, WRITE_NAMES, WRITE_CSV } writing;
static int n_fields;

/* What stands before a field's value; 0 if only names are wanted. */
static int begin_field(const char *key) {
    if (n_fields++) fputs(writing == WRITE_JSON ? ", " : ",", stdout);
    if (writing == WRITE_JSON) printf("\"%s\": ", key);
    else if (writing == WRITE_NAMES) fputs(key, stdout);
    return writing != WRITE_NAMES;
}

/* Bytes that are not UTF-8 become U+FFFD. */
static void field_text(const char *key, const char *text) {
    if (!begin_field(key)) return;
    putchar('"');
    for (size_t i = 0, size = strlen(text); i < size;) {
        size_t n = tool_character(text + i, size - i);
        if (n && text[i] != '"' && (text[i] != '\\' || writing == WRITE_CSV))
            fwrite(text + i, 1, n, stdout);
        else if (n) printf(writing == WRITE_CSV ? "\"%c" : "\\%c", text[i]);
        else if ((unsigned char)text[i] < 0x80 && writing == WRITE_JSON)
            printf("\\u%04X", (unsigned)text[i]);
        else fputs("\xEF\xBF\xBD", stdout);
        i += n ? n : 1;
    }
    putchar('"');
}
static void field_number(const char *key, int digits, double value) {
    if (!begin_field(key)) return;
    if (value == value) printf("%.*f", digits, value);
    else if (writing == WRITE_JSON) fputs("null", stdout);
}

static void write_fields(const test *t) {
    const moe_model_info *m = t->m->info;
    const figures f = get_figures(t);
    double mean, deviation, mean_s, deviation_s;
    char version[32], when[32] = "";
    time_t now = time(NULL);
    struct tm utc;
    statistics(t->rate, set.repetitions, &mean, &deviation);
    statistics(t->seconds, set.repetitions, &mean_s, &deviation_s);
    snprintf(version, sizeof version, "%d.%d.%d", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
             MOE_VERSION_PATCH);
    if (gmtime_r(&now, &utc)) strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    n_fields = 0;
    field_text("engine", "moe_infer.h");
    field_text("version", version);
    field_text("test_time", when);
    field_text("model_filename", t->m->path);
    field_text("model_type", t->m->type);
    field_number("model_size", 0, (double)m->n_bytes);
    field_number("n_params", 0, (double)m->n_params);
    field_number("bytes_token", 0, t->m->work.bytes);
    field_number("macs_token", 0, t->m->work.macs + t->m->work.output_macs);
    field_text("backend", "CPU");
    field_text("isa", moe_isa_name(t->info.isa));
    field_text("schedule", schedule_names[t->info.schedule & 3]);
    field_text("type_k", kv_names[t->info.kv_type % 3]);
    field_text("type_v", kv_names[t->info.kv_type % 3]);
    field_text("test", t->name);
    field_number("n_threads", 0, t->n_threads);
    field_number("n_batch", 0, t->info.n_batch);
    field_number("n_prompt", 0, t->n_prompt);
    field_number("n_gen", 0, t->n_gen);
    field_number("n_depth", 0, t->n_depth);
    field_number("avg_ns", 0, mean_s * 1e9);
    field_number("stddev_ns", 0, deviation_s * 1e9);
    field_number("avg_ts", 4, mean);
    field_number("stddev_ts", 4, deviation);
    field_number("gbps", 4, f.gbps);
    field_number("gbps_cache", 4, f.gbps_cache);
    field_number("gmacs", 4, f.gmacs);
    field_number("roof_gbps", 4, f.roof_gbps);
    field_number("roof_gmacs", 4, f.roof_gmacs);
    field_number("roof_fraction", 4, f.roof_fraction);
    field_number("n_barriers", 0, (double)t->n_barriers);
}

static void json_row(const test *t) {
    writing = WRITE_JSON;
    putchar('{');
    write_fields(t);
    fputs(", \"samples_ts\": [", stdout);
    for (int32_t r = 0; r < set.repetitions; r++) printf(r ? ", %.4f" : "%.4f", t->rate[r]);
    puts("]}");
}

static void csv_row(const test *t) {
    static int has_names;
    for (writing = has_names ? WRITE_CSV : WRITE_NAMES;; writing = WRITE_CSV) {
        write_fields(t);
        putchar('\n');
        if (writing == WRITE_CSV) break;
    }
    has_names = 1;
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

/* Is `part` a part of a tensor's name? */
static int has_part(const moe_gguf_tensor *tensor, const char *part) {
    return strstr(tensor->name, part) != NULL;
}

static int64_t key_int(const moe_gguf *gguf, const char *family, const char *key,
                       int64_t otherwise) {
    char name[96];
    int64_t value;
    snprintf(name, sizeof name, "%s.%s", family, key);
    return moe_gguf_value_int(moe_gguf_find_value(gguf, name), 0, &value) ? value : otherwise;
}

/* Keys and values per position and layer: latent rows (MLA), or those of all heads. */
static void count_cache(model *m, const moe_gguf *gguf) {
    const moe_model_info *info = m->info;
    token_work *work = &m->work;
    const char *family = info->family;
    int64_t lora = key_int(gguf, family, "attention.kv_lora_rank", 0), window;
    int64_t key = key_int(gguf, family, "attention.key_length", info->n_embd / info->n_head);
    int64_t value = key_int(gguf, family, "attention.value_length", key);
    work->kv_row = (double)(key + value) * info->n_head_kv;
    if (lora > 0) work->kv_row = (double)(lora + key_int(gguf, family, "rope.dimension_count", 0));
    window = key_int(gguf, family, "attention.sliding_window", 0);
    if (window > 0 && window <= INT32_MAX && !strcmp(family, "gpt-oss")) {
        work->window = (int32_t)window;
        work->n_window = (info->n_layer + 1) / 2; /* every other layer, from the first */
    }
    work->n_full = info->n_layer - work->n_window;
}

/* What one token needs of the weights, by the names of the tensors: the output matrix (which may */
/* be the embedding), all of the layers that are run, and of their experts the chosen share. Of */
/* attn_kv_b and its halves only one is used. */
static void count_work(model *m) {
    const moe_gguf *gguf = moe_model_gguf(m->handle);
    const moe_model_info *info = m->info;
    token_work *work = &m->work;
    const int tied = !moe_gguf_find_tensor(gguf, "output.weight");
    const double share = info->n_expert ? (double)info->n_expert_used / info->n_expert : 1;
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        const double n = (double)tensor->ne[0] * (double)tensor->ne[1] * (double)tensor->ne[2] *
                         (double)tensor->ne[3];
        const int embedding = !strcmp(tensor->name, "token_embd.weight");
        const int output = !strcmp(tensor->name, "output.weight") || (embedding && tied);
        const double used = has_part(tensor, "_exps.") ? share : 1;
        int layer = -1, is_matrix;
        if (embedding && !tied) continue;
        if (sscanf(tensor->name, "blk.%d.", &layer) == 1 && layer >= info->n_layer) continue;
        if (has_part(tensor, ".attn_kv_b.")) {
            char half[64];
            snprintf(half, sizeof half, "blk.%d.attn_k_b.weight", layer);
            if (moe_gguf_find_tensor(gguf, half)) continue;
        }
        is_matrix = tensor->n_dims > 1 && has_part(tensor, ".weight");
        work->bytes += used * (double)tensor->size;
        if (output) work->output_macs += n;
        else if (is_matrix) work->macs += used * n;
    }
    count_cache(m, gguf);
}

static int run_tests_of(test *t, const tool_list *sizes, int prompt) {
    for (int32_t i = 0; i < sizes->n * set.n_depth.n; i++) {
        int32_t n = sizes->item[i / set.n_depth.n];
        if (n == 0) continue;
        t->n_prompt = prompt ? n : 0;
        t->n_gen = prompt ? 0 : n;
        t->n_depth = set.n_depth.item[i % set.n_depth.n];
        t->roof = NULL;
        int status = run_test(t);
        if (status) return status;
        if (set.format == 1) json_row(t);
        else if (set.format == 2) csv_row(t);
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

/* ---- comparing schedules --------------------------------------------------------------------- */

/* Schedules side by side on the same mapped pages, in rounds A B C C B A: what changes within the
 * minutes of a measurement meets them all. Prompts are the control: parallel is sequential in
 * them. */
enum { MAX_RIVALS = 16 };
typedef struct rival {
    moe_session *session;
    double prompt[2 * MAX_REPETITIONS], generation[2 * MAX_REPETITIONS]; /* tokens per second */
} rival;
typedef struct comparison {
    const model *m;
    rival *rivals;
    int n_rivals, n_samples, n_prompt, n_gen;
    int32_t *tokens;
} comparison;

/* Refuses to time schedules that do not agree: the logits of a prompt and of some tokens behind it
 * must have the same bits. */
static int compare_check(const comparison *c, moe_error *error) {
    const size_t size = (size_t)c->m->info->n_vocab * sizeof(float);
    const int32_t n = c->n_prompt < 32 ? c->n_prompt : 32;
    for (int32_t step = 0; step < 5; step++) {
        const float *expected = NULL;
        for (int i = 0; i < c->n_rivals; i++) {
            moe_session *s = c->rivals[i].session;
            const int32_t *tokens = step ? c->tokens + (n + step) % c->n_prompt : c->tokens;
            if (moe_session_eval(s, tokens, step ? 1 : n, error)) return TOOL_ERROR;
            const float *logits = moe_session_logits(s, -1);
            if (!i) expected = logits;
            if (memcmp(expected, logits, size) == 0) continue;
            fprintf(stderr, "%s: %s and %s do not agree: not timed\n", program,
                    schedule_names[moe_session_get_info(c->rivals[0].session)->schedule & 3],
                    schedule_names[moe_session_get_info(s)->schedule & 3]);
            error->status = MOE_OK;
            return TOOL_ERROR;
        }
    }
    return TOOL_OK;
}

/* One sample of one schedule; untimed: index < 0. */
static moe_status compare_sample(const comparison *c, rival *r, int index, moe_error *error) {
    double seconds = 0;
    moe_status status = run_once(r->session, 0, c->tokens, c->n_prompt, 0, &seconds, error);
    if (index >= 0) r->prompt[index] = c->n_prompt / seconds;
    if (status == MOE_OK)
        status = run_once(r->session, 0, c->tokens, c->n_gen, 1, &seconds, error);
    if (index >= 0) r->generation[index] = c->n_gen / seconds;
    return status;
}

/* "12.3 (12.1 - 12.6) | 1.02 |": median and quartiles of x, and the median of x / first, sample by
 * sample. */
static void compare_print(const double *x, const double *first, int n) {
    static double sorted[2 * MAX_REPETITIONS], ratio[2 * MAX_REPETITIONS];
    for (int i = 0; i < n; i++) sorted[i] = x[i], ratio[i] = x[i] / first[i];
    const double median = roofs_median(sorted, n);
    char text[64];
    snprintf(text, sizeof text, "%.1f (%.1f - %.1f)", median, sorted[n / 4], sorted[n - 1 - n / 4]);
    printf(" %22s | %5.3f |", text, roofs_median(ratio, n));
}

static void compare_rows(const comparison *c) {
    for (int i = 0; i < c->n_rivals; i++) {
        const rival *r = &c->rivals[i];
        const moe_session_info *info = moe_session_get_info(r->session);
        printf("| %7d | %-10s | %6d | %8d |", info->n_threads, schedule_names[info->schedule & 3],
               info->n_expert_groups, (int)info->n_barriers);
        compare_print(r->prompt, c->rivals[0].prompt, c->n_samples);
        compare_print(r->generation, c->rivals[0].generation, c->n_samples);
        printf("\n");
    }
    fflush(stdout);
}

/* All schedules of the list with one number of threads. */
static int compare_run(comparison *c, int32_t threads) {
    moe_error error;
    int status = TOOL_ERROR;
    memset(&error, 0, sizeof error);
    for (int i = 0; i < c->n_rivals; i++) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.n_ctx = (c->n_prompt > c->n_gen ? c->n_prompt : c->n_gen) + 8;
        o.n_batch = set.n_batch;
        o.n_threads = threads > 0 ? threads : 0;
        o.kv_type = (moe_kv_type)set.kv_type;
        o.isa = (moe_isa)set.isa.item[0];
        o.schedule = (moe_schedule)set.schedule.item[i];
        c->rivals[i].session = moe_session_open(c->m->handle, &o, &error);
        if (!c->rivals[i].session) goto done;
    }
    if (compare_check(c, &error)) goto done;
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

static int run_comparison(const model *m) {
    uint64_t random = 88172645463325252u;
    comparison c;
    int status = TOOL_ERROR;
    memset(&c, 0, sizeof c);
    c.m = m;
    c.n_rivals = set.schedule.n < MAX_RIVALS ? set.schedule.n : MAX_RIVALS;
    c.n_prompt = set.n_prompt.item[0] > 0 ? set.n_prompt.item[0] : 1;
    c.n_gen = set.n_gen.item[0] > 0 ? set.n_gen.item[0] : 1;
    const int most = c.n_prompt > c.n_gen ? c.n_prompt : c.n_gen;
    c.rivals = (rival *)calloc((size_t)c.n_rivals, sizeof *c.rivals);
    c.tokens = (int32_t *)malloc((size_t)most * sizeof *c.tokens);
    if (c.rivals && c.tokens) {
        random_tokens(m->handle, &random, c.tokens, most);
        printf("%s, prompt of %d tokens, %d generated; tokens per second: median (quartiles) of %d,"
               " ratio to the first\n\n"
               "| threads | schedule   | groups | barriers |       pp, prompt tokens/s | ratio |"
               " tg, generated tokens/s | ratio |\n"
               "| ------: | ---------- | -----: | -------: | ----------------------: | ----: |"
               " ---------------------: | ----: |\n",
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
    count_work(&m);
    int status = set.compare ? run_comparison(&m) : run_model(&m);
    moe_model_close(m.handle);
    return status;
}

static int run_files(char *paths) {
    int status = TOOL_OK;
    if (set.format == 0 && !set.compare) table_header();
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
    } else if (set.plan) {
        plan_print();
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
        if (set.compare && !show_schedule)
            for (set.schedule.n = 0; set.schedule.n < 3; set.schedule.n++)
                set.schedule.item[set.schedule.n] = MOE_SCHEDULE_SEQUENTIAL + set.schedule.n;
        show_batch = is_given(argc, argv, "-b, --batch-size");
        show_kv_type = set.k_type >= 0 || set.v_type >= 0;
        char *paths = (char *)malloc(strlen(set.model) + 1);
        if (!paths) return TOOL_ERROR;
        strcpy(paths, set.model);
        status = run_files(paths);
        free(paths);
        roofs_close(&shared_roofs);
    }
    return status;
}
