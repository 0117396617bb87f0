// moe-bench: times prompts and generation, with llama-bench's options and table.
//
//     cc -O2 bench/moe_bench.c -o moe-bench -lm -lpthread
//     ./moe-bench -m MODEL.gguf -p 512 -n 128 -t 1,2
//
// pp512 is the time of 512 tokens at once, tg128 that of 128 tokens one after another, each from an
// empty context or, "@ d8192", behind 8192 tokens. "tg128 x4" is 128 tokens of each of 4 sequences
// that are evaluated together, t/s those of all; "tg128 by 3" one sequence by 3 tokens per call, as
// drafts are checked, all counted as accepted (logits of the last one only). Tokens are random
// (seeded) and nothing is sampled: what is timed is moe_session_eval_many alone. Random tokens
// spread over more experts than real text does.
//
// Beside the speed stands what part it is of the machine's roof, measured between the runs with as
// many threads: of reading memory for generation, of int8 multiply-adds for prompts (see roofs.h).
// What a token needs is counted from the file's table of tensors. Several tokens in one call need
// its weights once, of the experts those that one of them chose, and every sequence's cache once:
// counted call by call.
//
// The other modes have files of their own: rivals.h (--compare), crowded.h, start.h, sweep.h,
// plan.h. In which pages the model's file lay in the system's cache before: page_state.h.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "../examples/tool.h"
#include "machine.h"
#include "page_state.h"
#include "model.h"
#include "roofs.h"
#include "svg.h"
#include "timing.h"
#include "fields.h"

#define SYNTH_NO_MAIN
#include "synth.c"

#include "crowded.h"
#include "plan.h"
#include "rivals.h"
#include "start.h"
#include "sweep.h"

static const tool_option options[] = {
    {"A list a,b,c tries each; several lists are multiplied.", NULL, TOOL_HEADING, NULL, 0, 0,
     NULL},
    {"-m, --model", "FILE,...", TOOL_TEXT, &set.model, 0, 0, "GGUF files (needed)"},
    {"-p, --n-prompt", "N,...", TOOL_INTS, &set.n_prompt, 0, INT32_MAX,
     "tokens of the prompt; 0: no such test (default 512)"},
    {"-n, --n-gen", "N,...", TOOL_INTS, &set.n_gen, 0, INT32_MAX,
     "tokens to generate; 0: no such test (default 128)"},
    {"-pg", "PP,TG", TOOL_PAIR, &set.both, 1, INT32_MAX,
     "a prompt and tokens behind it, timed together; may be\ngiven several times"},
    {"-gp", "PP,TG", TOOL_PAIR, &set.behind, 1, INT32_MAX,
     "tokens behind a prompt that is not timed; the same"},
    {"-d, --n-depth", "N,...", TOOL_INTS, &set.n_depth, 0, INT32_MAX,
     "tokens that the context holds before each run (default 0)"},
    {"-npl, --n-parallel", "N,...", TOOL_INTS, &set.n_parallel, 1, MAX_PARALLEL,
     "sequences that generate at the same time, -n and -d of\neach (default 1; of -n and -gp)"},
    {"-nd, --n-draft", "N,...", TOOL_INTS, &set.n_draft, 1, INT32_MAX,
     "tokens of a sequence that one call evaluates, as drafts\nare (default 1; of -n and -gp)"},
    {"-t, --threads", "N,...", TOOL_INTS, &set.n_threads, -1, MOE_MAX_THREADS,
     "threads (default -1: the physical cores we may use)"},
    {"-r, --repetitions", "N", TOOL_INT, &set.repetitions, 1, MAX_REPETITIONS,
     "timed runs of each test, behind an untimed one (default 5)"},
    {"-b, --batch-size", "N,...", TOOL_INTS, &set.n_batch, 1, INT32_MAX,
     "most tokens evaluated at once, as -ub: the smaller one\ncounts (default 2048)"},
    {"-ub, --ubatch-size", "N,...", TOOL_INTS, &set.n_ubatch, 1, INT32_MAX, "(default 512)"},
    {"-ctk, --cache-type-k", "f16|q8_0|f32", TOOL_CHOICE, &set.k_type, 0, 0,
     "what keys and values are kept as (default f16)"},
    {"-ctv, --cache-type-v", "f16|q8_0|f32", TOOL_CHOICE, &set.v_type, 0, 0,
     "the same (llama.cpp sets them one by one: here they are\none)"},
    {"--isa", "best|scalar|avx2|avx512|avx-vnni", TOOL_CHOICES, &set.isa, 0, 0,
     "list of instruction sets; one that is missing falls back\nto the next lower one"},
    {"--schedule", "default|sequential|parallel|balanced", TOOL_CHOICES, &set.schedule, 0, 0,
     "list of ways in which threads share the experts, timed in\nturns A B C C B A"},
    {"--no-warmup", NULL, TOOL_UNFLAG, &set.warm_up, 0, 0, "no untimed run"},
    {"--no-roofs", NULL, TOOL_UNFLAG, &set.roofs, 0, 0,
     "do not measure what the machine could do at most"},
    {"--check", NULL, TOOL_FLAG, &set.check, 0, 0,
     "first compare the logits of all schedules; if any bit\ndiffers, nothing is timed"},
    {"-o, --output", "md|json|jsonl|csv", TOOL_CHOICE, &set.format, 0, 0,
     "a table in Markdown (default), a JSON array, one JSON\nobject per line, or CSV"},
    {"--detail", NULL, TOOL_FLAG, &set.detail, 0, 0,
     "more columns: GB/s, barriers per eval, % of the threads'\n"
     "time spent waiting, busiest thread's work over the mean"},
    {"Threads and memory", NULL, TOOL_HEADING, NULL, 0, 0, NULL},
    {"--pin", NULL, TOOL_FLAG, &set.pin, 0, 0, "each thread stays on a core of its own"},
    {"--numa", "off|interleave|owner", TOOL_CHOICE, &set.numa, 0, 0,
     "weights in turn on all memory nodes, or on the node of\nthe (pinned) threads that read them"},
    {"--pages", "auto|map|copy", TOOL_CHOICE, &set.pages, 0, 0,
     "map the model, copy it into huge pages, or (default) map\n"
     "it and copy it only if the mapping is read slowly"},
    {"--no-mmap", NULL, TOOL_UNFLAG, &set.mmap, 0, 0, "as --pages copy"},
    {"--mlock", NULL, TOOL_FLAG, &set.mlock, 0, 0, "keep the model in memory"},
    {"--page-state", PAGE_STATES, TOOL_CHOICE, &set.page_state, 0, 0,
     "first drop the file from the system's page cache and read\n"
     "it again in folios of 2 MiB, of 128 KiB, in 4 KiB pages,\n"
     "or not (cold); all but cold need root. Fails if the file\n"
     "does not get there; nobody else may have it mapped"},
    {"Other modes", NULL, TOOL_HEADING, NULL, 0, 0, NULL},
    {"--compare", NULL, TOOL_FLAG, &set.compare, 0, 0,
     "the schedules of --schedule (default: all) with -p and -n,\n"
     "ratios; refused if their logits differ in any bit"},
    {"--crowded", NULL, TOOL_FLAG, &set.crowded, 0, 0,
     "generation beside a busy process that this starts, and\n"
     "with four threads per processor: ratios to quiet runs"},
    {"--sweep", NULL, TOOL_FLAG, &set.sweep, 0, 0,
     "llama-sweep-bench's table: prompts of -ub tokens and a\n"
     "quarter as many generated ones, behind 0, ub, 2 ub ..."},
    {"-c, --ctx-size", "N", TOOL_INT, &set.n_ctx, 1, INT32_MAX,
     "... up to N tokens (default 8192)"},
    {"--svg", "FILE", TOOL_TEXT, &set.svg, 0, 0, "with --sweep: draw speed against depth, too"},
    {"--start", NULL, TOOL_FLAG, &set.start, 0, 0,
     "what a user of moe-cli meets, once: seconds to open the\n"
     "model and to the first token behind a prompt of -p (16)\n"
     "tokens, speed of the next 50 and of 200 more, memory.\n"
     "Only the first start of a process is a fresh one"},
    {"--plan", NULL, TOOL_FLAG, &set.plan, 0, 0,
     "print how evenly a token and a prompt would use up to\n"
     "256 threads and 8 memory nodes (-t, -d, --schedule), for\n"
     "known shapes or -m; --detail: step by step"},
    {"-h, --help", NULL, TOOL_FLAG, &set.help, 0, 0, "show this"},
    {"--version", NULL, TOOL_FLAG, &set.version, 0, 0, "show the version"},
    {NULL, NULL, TOOL_HEADING, NULL, 0, 0, NULL}};

// ---- the table -------------------------------------------------------------------------------

// Columns that the command line says something about stand in the table, as in llama-bench.
static int show_isa, show_schedule, show_batch, show_ubatch, show_kv_type, show_rows;

static void table_header(void) {
    printf("| %-30s | %10s | %10s | %-10s |", "model", "size", "params", "backend");
    printf(" %7s |", "threads");
    if (show_batch) printf(" %7s |", "n_batch");
    if (show_ubatch) printf(" %8s |", "n_ubatch");
    if (show_kv_type) printf(" %6s |", "type_k");
    if (show_isa) printf(" %-10s |", "isa");
    if (show_schedule) printf(" %-10s |", "schedule");
    if (set.roofs) printf(" %6s |", "% roof");
    if (set.detail)
        printf(" %6s | %8s | %6s | %9s | %6s | %6s | %6s |", "GB/s", "barriers", "% wait",
               "imbalance", "% attn", "% recr", "% ffn");
    if (set.detail && show_rows) printf(" %8s | %8s |", "MB/call", "experts");
    printf(" %*s | %20s |\n", show_rows ? 22 : 15, "test", "t/s");
    printf("| ------------------------------ | ---------: | ---------: | ---------- | ------: |");
    if (show_batch) printf(" ------: |");
    if (show_ubatch) printf(" -------: |");
    if (show_kv_type) printf(" -----: |");
    if (show_isa) printf(" ---------- |");
    if (show_schedule) printf(" ---------- |");
    if (set.roofs) printf(" -----: |");
    if (set.detail)
        printf(" -----: | -------: | -----: | --------: | -----: | -----: | -----: |");
    if (set.detail && show_rows) printf(" -------: | -------: |");
    printf(" %s--------------: | -------------------: |\n", show_rows ? "-------" : "");
    fflush(stdout);
}

// A number, or nothing for NAN.
static void table_number(int width, int digits, double x) {
    if (x == x) printf(" %*.*f |", width, digits, x);
    else printf(" %*s |", width, "");
}

static void table_row(const test *t) {
    const moe_model_info *m = t->m->info;
    const figures f = get_figures(t);
    char size[32], params[32], rate[64];
    double mean, deviation, bytes = (double)m->n_bytes, n = (double)m->n_params;
    statistics(t->rate, set.repetitions, &mean, &deviation);
    double unit = bytes < 1073741824.0 ? 1048576.0 : 1073741824.0;
    snprintf(size, sizeof size, "%.2f %s", bytes / unit, unit > 1e9 ? "GiB" : "MiB");
    snprintf(params, sizeof params, "%.2f %s", n / (n < 1e9 ? 1e6 : 1e9), n < 1e9 ? "M" : "B");
    snprintf(rate, sizeof rate, "%.2f ± %.2f", mean, deviation);
    printf("| %-30s | %10s | %10s | %-10s |", t->m->type, size, params, "CPU");
    printf(" %7d |", t->n_threads);
    if (show_batch) printf(" %7d |", t->n_batch);
    if (show_ubatch) printf(" %8d |", t->n_ubatch);
    if (show_kv_type) printf(" %6s |", kv_names[t->info.kv_type % 3]);
    if (show_isa) printf(" %-10s |", moe_isa_name(t->info.isa));
    if (show_schedule) printf(" %-10s |", schedule_names[t->info.schedule & 3]);
    if (set.roofs) table_number(6, 1, 100 * f.roof_fraction);
    if (set.detail) {
        table_number(6, 1, f.gbps + f.gbps_cache);
        table_number(8, 0, t->barriers);
        table_number(6, 1, 100 * t->waiting);
        table_number(9, 3, t->imbalance);
        for (int i = 0; i < TIMED_OUTPUT; i++) table_number(6, 1, 100 * t->parts[i]);
    }
    if (set.detail && show_rows) {
        table_number(8, 1, f.bytes_eval * 1e-6);
        table_number(8, 1, f.experts_eval);
    }
    // the sign has one column and two bytes
    printf(" %*s | %21s |\n", show_rows ? 22 : 15, t->name, rate);
}

// ---- JSON and CSV ----------------------------------------------------------------------------

static void write_fields(const void *row) {
    const test *t = (const test *)row;
    const figures f = get_figures(t);
    double mean, deviation, mean_s, deviation_s;
    statistics(t->rate, set.repetitions, &mean, &deviation);
    statistics(t->seconds, set.repetitions, &mean_s, &deviation_s);
    field_model(t->m);
    field_number("n_batch", 0, t->n_batch);
    field_number("n_ubatch", 0, t->n_ubatch);
    field_number("n_threads", 0, t->n_threads);
    field_text("type_k", kv_names[t->info.kv_type % 3]);
    field_text("type_v", kv_names[t->info.kv_type % 3]);
    field_number("n_prompt", 0, t->n_prompt);
    field_number("n_gen", 0, t->n_gen);
    field_number("n_depth", 0, t->n_depth);
    field_number("n_parallel", 0, t->n_parallel);
    field_number("n_draft", 0, t->n_draft);
    field_text("test", t->name);
    field_number("avg_ns", 0, mean_s * 1e9);
    field_number("stddev_ns", 0, deviation_s * 1e9);
    field_number("avg_ts", 6, mean);
    field_number("stddev_ts", 6, deviation);
    field_text("isa", moe_isa_name(t->info.isa));
    field_text("schedule", schedule_names[t->info.schedule & 3]);
    field_number("n_expert_groups", 0, t->n_groups);
    field_number("bytes_token", 0, t->m->work.bytes);
    field_number("macs_token", 0, t->m->work.macs + t->m->work.output_macs);
    field_number("bytes_eval", 0, f.bytes_eval);
    field_number("experts_eval", 4, f.experts_eval);
    field_number("gbps", 4, f.gbps);
    field_number("gbps_cache", 4, f.gbps_cache);
    field_number("gmacs", 4, f.gmacs);
    field_number("roof_gbps", 4, f.roof_gbps);
    field_number("roof_gmacs", 4, f.roof_gmacs);
    field_number("roof_fraction", 4, f.roof_fraction);
    field_number("n_barriers", 1, t->barriers);
    field_number("wait_fraction", 4, t->waiting);
    field_number("imbalance", 4, t->imbalance);
    field_number("attention_fraction", 4, t->parts[TIMED_ATTENTION]);
    field_number("recurrent_fraction", 4, t->parts[TIMED_RECURRENT]);
    field_number("ffn_fraction", 4, t->parts[TIMED_FFN]);
    field_number("output_fraction", 4, t->parts[TIMED_OUTPUT]);
    if (writing != WRITE_JSON) return;
    static double ns[MAX_REPETITIONS];
    for (int r = 0; r < set.repetitions; r++) ns[r] = t->seconds[r] * 1e9;
    field_list("wait_fractions", 4, t->wait, t->n_threads);
    field_list("samples_ns", 0, ns, set.repetitions);
    field_list("samples_ts", 4, t->rate, set.repetitions);
}

static int show_row(const test *t) {
    if (set.format != FORMAT_MD) return write_row(write_fields, t);
    table_row(t);
    return flush_rows();
}

// ---- all tests -------------------------------------------------------------------------------

// "pp512", "tg128", "pp512+tg128", " x4" sequences, " by 3" tokens per call; behind a depth
// " @ d8192" or, with -gp, "tg64@pp8192".
static void name_test(test *t, int behind) {
    char *out = t->name, *end = t->name + sizeof t->name;
    if (t->n_prompt) out += snprintf(out, (size_t)(end - out), "pp%d", t->n_prompt);
    if (t->n_gen)
        out += snprintf(out, (size_t)(end - out), "%stg%d", t->n_prompt ? "+" : "", t->n_gen);
    if (t->n_parallel > 1) out += snprintf(out, (size_t)(end - out), " x%d", t->n_parallel);
    if (t->n_draft > 1) out += snprintf(out, (size_t)(end - out), " by %d", t->n_draft);
    if (t->n_depth)
        snprintf(out, (size_t)(end - out), behind ? "@pp%d" : " @ d%d", t->n_depth);
}

// What all tests of a model with the same threads, batches and instruction set have in common.
typedef struct setup {
    const model *m;
    int32_t threads, n_batch, n_ubatch, isa;
} setup;

// What one test does.
typedef struct task {
    int32_t n_prompt, n_gen, n_depth, n_parallel, n_draft;
    int behind; // its depth is what -gp says
} task;

// One test with every schedule of the list.
static int run_test(const setup *s, const task *k) {
    static test tests[MAX_RIVALS];
    const int n = set.schedule.n < MAX_RIVALS ? set.schedule.n : MAX_RIVALS;
    for (int i = 0; i < n; i++) {
        test *t = &tests[i];
        memset(t, 0, sizeof *t);
        t->m = s->m;
        t->threads = s->threads;
        t->n_batch = s->n_batch;
        t->n_ubatch = s->n_ubatch;
        t->isa = s->isa;
        t->schedule = set.schedule.item[i];
        t->n_prompt = k->n_prompt;
        t->n_gen = k->n_gen;
        t->n_depth = k->n_depth;
        t->n_parallel = k->n_parallel;
        t->n_draft = k->n_draft < k->n_gen ? k->n_draft : k->n_gen > 0 ? k->n_gen : 1;
        name_test(t, k->behind);
    }
    if ((int64_t)k->n_prompt + k->n_gen + k->n_depth > INT32_MAX) {
        fprintf(stderr, "%s: %s: too many tokens\n", program, tests[0].name);
        return TOOL_ERROR;
    }
    int status = run_rivals(tests, n);
    for (int i = 0; i < n && status == TOOL_OK; i++) status = show_row(&tests[i]);
    return status;
}

// Generation with every number of sequences and of tokens per call.
static int run_generation(const setup *s, int32_t n_gen, int32_t n_depth, int behind) {
    int status = TOOL_OK;
    for (int32_t i = 0; i < set.n_parallel.n * set.n_draft.n && status == TOOL_OK; i++) {
        task k = {0, n_gen, n_depth, 1, 1, behind};
        k.n_parallel = set.n_parallel.item[i / set.n_draft.n];
        k.n_draft = set.n_draft.item[i % set.n_draft.n];
        status = run_test(s, &k);
    }
    return status;
}

static int run_tests_of(const setup *s, const tool_list *sizes, int prompt) {
    int status = TOOL_OK;
    for (int32_t i = 0; i < sizes->n * set.n_depth.n && status == TOOL_OK; i++) {
        const int32_t n = sizes->item[i / set.n_depth.n];
        const int32_t n_depth = set.n_depth.item[i % set.n_depth.n];
        const task k = {n, 0, n_depth, 1, 1, 0};
        if (n == 0) continue;
        status = prompt ? run_test(s, &k) : run_generation(s, n, n_depth, 0);
    }
    return status;
}

static int run_setup(const setup *s) {
    if (set.check && !check_schedules(s->m, s->threads, s->isa)) return TOOL_ERROR;
    int status = run_tests_of(s, &set.n_prompt, 1);
    if (status == TOOL_OK) status = run_tests_of(s, &set.n_gen, 0);
    for (int i = 0; i < set.both.n && status == TOOL_OK; i += 2) {
        const task k = {set.both.item[i], set.both.item[i + 1], 0, 1, 1, 0};
        status = run_test(s, &k);
    }
    for (int i = 0; i < set.behind.n && status == TOOL_OK; i += 2)
        status = run_generation(s, set.behind.item[i + 1], set.behind.item[i], 1);
    return status;
}

static int run_model(const model *m) {
    int status = TOOL_OK;
    const int n = set.n_threads.n * set.n_batch.n * set.n_ubatch.n * set.isa.n;
    for (int i = 0; i < n && status == TOOL_OK; i++) {
        int rest = i;
        setup s = {m, 0, 0, 0, 0};
        s.isa = set.isa.item[rest % set.isa.n], rest /= set.isa.n;
        s.n_ubatch = set.n_ubatch.item[rest % set.n_ubatch.n], rest /= set.n_ubatch.n;
        s.n_batch = set.n_batch.item[rest % set.n_batch.n], rest /= set.n_batch.n;
        s.threads = set.n_threads.item[rest];
        status = run_setup(&s);
    }
    return status;
}

// Puts the file into the wanted state, if there is one, and looks at the state it is in.
static int prepare_pages(const char *path, page_state *found) {
    char text[PAGE_SENTENCE], why[PAGE_REASON];
    if (set.page_state >= 0 && page_state_set(path, set.page_state, why)) {
        fprintf(stderr, "%s: %s: %s\n", program, path, why);
        return TOOL_ERROR;
    }
    page_state_find(path, found);
    if (set.page_state >= 0 || set.detail)
        fprintf(stderr, "%s: %s: %s\n", program, path, page_state_sentence(found, text));
    return TOOL_OK;
}

static int run_file(const char *path) {
    model m;
    page_state pages;
    moe_model_options o;
    memset(&o, 0, sizeof o);
    o.pages = set.mmap ? (moe_pages)set.pages : MOE_PAGES_COPY;
    o.mlock = set.mlock ? MOE_ON : 0;
    o.numa = (moe_numa)set.numa;
    // Pages are touched: the first timed run must not wait for the disk.
    o.prefault = set.start ? 0 : MOE_ON;
    int status = prepare_pages(path, &pages);
    if (status == TOOL_OK) status = model_open(&m, program, path, &o);
    if (status != TOOL_OK) return status;
    m.pages = pages;
    if (set.numa || set.mlock) tool_memory(program, m.handle);
    if (set.page_state >= 0 || set.detail)
        fprintf(stderr, "%s: %s\n", program, moe_model_get_memory(m.handle)->text);
    status = set.compare   ? run_comparison(&m)
             : set.crowded ? run_crowded(&m)
             : set.start   ? run_start(&m)
             : set.sweep   ? run_sweep(&m)
                           : run_model(&m);
    moe_model_close(m.handle);
    return status;
}

static int run_files(char *paths) {
    const int rows = !set.compare && !set.crowded && !set.sweep; // those that write_row writes
    int status = TOOL_OK;
    if (set.format == FORMAT_MD && set.start) start_header();
    else if (set.format == FORMAT_MD && rows) table_header();
    for (char *path = paths; path && status == TOOL_OK;) {
        char *comma = strchr(path, ',');
        if (comma) *comma = 0;
        status = run_file(path);
        path = comma ? comma + 1 : NULL;
    }
    if (set.format == FORMAT_JSON && rows) fputs(rows_written ? "\n]\n" : "[]\n", stdout);
    if (set.format == FORMAT_MD && !set.sweep && status == TOOL_OK)
        printf("\nbuild: moe_infer %d.%d.%d (%s)\n", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
               MOE_VERSION_PATCH, moe_isa_name(moe_isa_resolve(MOE_ISA_BEST)));
    return status;
}

static int is_given(int argc, char **argv, const char *names) {
    for (int i = 1; i < argc; i++)
        if (tool_named(names, argv[i])) return 1;
    return 0;
}

// Is there a number other than 0?
static int any(const tool_list *list) {
    for (int32_t i = 0; i < list->n; i++)
        if (list->item[i]) return 1;
    return 0;
}

// What of the command line does not go together; NULL: nothing.
static const char *contradiction(void) {
    if (!set.model && !set.plan) return "no model: give -m FILE; see moe-bench --help";
    if (set.compare + set.crowded + set.plan + set.start + set.sweep > 1)
        return "--compare, --crowded, --plan, --start, --sweep: one at a time, please";
    if (set.compare && set.format != FORMAT_MD) return "--compare prints a table only";
    if ((set.sweep || set.crowded) && set.format == FORMAT_CSV) return "-o md or jsonl, please";
    if (set.svg && !set.sweep) return "--svg goes with --sweep";
    if (show_rows && (set.compare || set.crowded || set.plan || set.start || set.sweep))
        return "-npl and -nd go with -n and -gp, not with other modes";
    if (set.start && (set.n_prompt.n > 1 || !set.n_prompt.item[0]))
        return "--start takes one prompt: -p N, at least 1";
    if (!any(&set.n_prompt) && !any(&set.n_gen) && !set.both.n && !set.behind.n && !set.sweep)
        return "nothing to time: -p and -n are both 0";
    return NULL;
}

int main(int argc, char **argv) {
    int status = tool_parse(program, options, argc, argv);
    if (status) return status;
    if (set.start && !is_given(argc, argv, "-p, --n-prompt")) set.n_prompt.item[0] = START_PROMPT;
    show_rows = is_given(argc, argv, "-npl, --n-parallel") ||
                is_given(argc, argv, "-nd, --n-draft");
    if (!tool_kv_type(program, set.k_type, set.v_type, &set.kv_type)) return TOOL_USAGE;
    if (set.help) {
        printf("usage: %s -m MODEL.gguf [options]\n\n"
               "Times prompts (ppN) and generation (tgN) on the CPU.\n"
               "Exit codes: 0 done, 1 something failed, 2 wrong usage.\n", program);
        tool_help(stdout, options);
    } else if (set.version) {
        printf("%s (moe_infer %d.%d.%d), %s\n", program, MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
               MOE_VERSION_PATCH, moe_isa_name(moe_isa_resolve(MOE_ISA_BEST)));
    } else if (contradiction()) {
        fprintf(stderr, "%s: %s\n", program, contradiction());
        return TOOL_USAGE;
    } else {
        show_isa = is_given(argc, argv, "--isa");
        show_schedule = is_given(argc, argv, "--schedule");
        show_batch = is_given(argc, argv, "-b, --batch-size");
        show_ubatch = is_given(argc, argv, "-ub, --ubatch-size");
        show_kv_type = set.k_type >= 0 || set.v_type >= 0;
        if ((set.compare || set.plan) && !show_schedule)
            for (set.schedule.n = 0; set.schedule.n < 3; set.schedule.n++)
                set.schedule.item[set.schedule.n] = MOE_SCHEDULE_SEQUENTIAL + set.schedule.n;
        if (set.plan && !is_given(argc, argv, "-d, --n-depth")) set.n_depth.item[0] = PLAN_DEPTH;
        char *paths = (char *)malloc((set.model ? strlen(set.model) : 0) + 1);
        if (!paths) return TOOL_ERROR;
        strcpy(paths, set.model ? set.model : "");
        status = set.plan ? plan_run(set.model ? paths : NULL) : run_files(paths);
        free(paths);
        roofs_close(&shared_roofs);
    }
    return output_finish(program, status);
}
