// engines: programs with llama-bench's options and JSON, and moe-bench, on the same model in turns
// A B B A A B ...; medians and ratios as a Markdown table, every sample behind it. `make rivals
// MODEL=... LLAMA_BENCH=...` runs it with this library's benchmark as the first.
//
//     engines -m MODEL.gguf -t 2 --page-state huge --engines "moe_infer=build/moe-bench --no-roofs;
//         llama.cpp=/opt/llama.cpp/llama-bench; ik -rtr=/opt/ik/llama-bench -rtr 1 -fa 1 -fmoe 1"
//
// Every sample is a process of its own. How fast engines are depends on the pages in which the file
// lies in the system's cache: --page-state puts it into the same state before each of them, and the
// state found is part of every sample.
#define _GNU_SOURCE
#include "../moe_infer.h"

#include "../examples/tool.h"
#include "machine.h"
#include "page_state.h"
#include "turns.h"
#include <sched.h>
#include <sys/utsname.h>

static const char program[] = "engines";

static struct settings {
    const char *model, *engines;
    int32_t n_threads, n_prompt, n_gen, rounds, page_state;
    int help;
} set = {.n_threads = -1, .n_prompt = 512, .n_gen = 128, .rounds = 5, .page_state = -1};

static const tool_option options[] = {
    {"-m, --model", "FILE", TOOL_TEXT, &set.model, 0, 0, "GGUF file (needed)"},
    {"--engines", "LIST", TOOL_TEXT, &set.engines, 0, 0,
     "NAME=PROGRAM ARGUMENT...; NAME=PROGRAM ...  (needed)\n"
     "Entries end at a semicolon, arguments at blanks; a \\\n"
     "before a blank, ; or \\ makes it part of the word. Each\n"
     "program gets -m -t -p -n -r 1 -o json before its own\n"
     "arguments. Ratios are those of the first one's speed to\n"
     "the others'"},
    {"-t, --threads", "N", TOOL_INT, &set.n_threads, -1, MOE_MAX_THREADS,
     "threads (default -1: the physical cores we may use)"},
    {"-p, --n-prompt", "N", TOOL_INT, &set.n_prompt, 1, INT32_MAX,
     "tokens of the prompt (default 512)"},
    {"-n, --n-gen", "N", TOOL_INT, &set.n_gen, 1, INT32_MAX, "tokens generated (default 128)"},
    {"-r, --rounds", "N", TOOL_INT, &set.rounds, 1, MAX_SAMPLES,
     "samples of each engine (default 5)"},
    {"--page-state", PAGE_STATES, TOOL_CHOICE, &set.page_state, 0, 0,
     "before each sample drop the file from the page cache and\n"
     "read it again so; see moe-bench --help (default: leave it)"},
    {"-h, --help", NULL, TOOL_FLAG, &set.help, 0, 0, "show this"},
    {NULL, NULL, TOOL_HEADING, NULL, 0, 0, NULL}};

enum { MAX_ENGINES = 12 };

typedef struct engine {
    const char *name;
    command run;
    speeds last; // of its last sample
    double rate[KINDS][MAX_SAMPLES];
    page_state found[MAX_SAMPLES]; // before the sample
} engine;
static engine engines[MAX_ENGINES];
static int n_engines;

// ---- the machine -----------------------------------------------------------------------------

// The first processor of the core that a processor belongs to.
static int first_sibling(int processor) {
    char path[96];
    int first = processor;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
             processor);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%d", &first) != 1) first = processor;
    if (f) fclose(f);
    return first;
}

// Cores that this process may use, counted once however many of their processors it has.
static int count_cores(void) {
    static char seen[CPU_SETSIZE];
    cpu_set_t mine;
    int n = 0;
    memset(seen, 0, sizeof seen);
    if (sched_getaffinity(0, sizeof mine, &mine)) return 1;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (!CPU_ISSET(i, &mine)) continue;
        const int first = first_sibling(i);
        if (first < 0 || first >= CPU_SETSIZE || seen[first]) continue;
        seen[first] = 1;
        n++;
    }
    return n;
}

// ---- the list of engines ---------------------------------------------------------------------

static int list_fails(const char *text, const char *what) {
    fprintf(stderr, "%s: --engines: %s: '%.60s'\n", program, what, text);
    return TOOL_USAGE;
}

// Cuts off what stands before the first of `ends` that has no \ before it; *text moves on.
static char *cut(char **text, const char *ends) {
    char *begin = *text + strspn(*text, " \t\n"), *at = begin;
    while (*at && !strchr(ends, *at)) at += *at == '\\' && at[1] ? 2 : 1;
    *text = *at ? at + 1 : at;
    *at = 0;
    return begin;
}

// Takes each \ away that stands before another character.
static const char *unescape(char *word) {
    char *out = word;
    for (const char *at = word; *at; *out++ = *at++)
        if (*at == '\\' && at[1]) at++;
    *out = 0;
    return word;
}

// NAME=PROGRAM ARGUMENT...
static int add_engine(char *entry) {
    char *value = strchr(entry, '=');
    int n = 0;
    if (!value || value == entry) return list_fails(entry, "no NAME=PROGRAM");
    if (n_engines == MAX_ENGINES) return list_fails(entry, "too many engines");
    engine *e = &engines[n_engines++];
    *value++ = 0;
    e->name = entry;
    e->run.path = unescape(cut(&value, " \t\n"));
    if (!*e->run.path) return list_fails(entry, "no program");
    while (*(value += strspn(value, " \t\n"))) {
        if (n == MAX_ARGUMENTS - 1) return list_fails(entry, "too many arguments");
        e->run.arguments[n++] = unescape(cut(&value, " \t\n"));
    }
    return TOOL_OK;
}

static int add_engines(char *list) {
    int status = TOOL_OK;
    while (*list && status == TOOL_OK) {
        char *entry = cut(&list, ";");
        if (*entry) status = add_engine(entry);
    }
    return status;
}

// ---- the turns -------------------------------------------------------------------------------

static int sample(engine *e, int index) {
    const workload w = {set.model, set.n_threads, set.n_prompt, set.n_gen};
    char why[PAGE_REASON];
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%d/%d %-30.30s", index + 1, set.rounds, e->name);
    if (set.page_state >= 0 && page_state_set(set.model, set.page_state, why)) {
        fprintf(stderr, "%s: %s: %s\n", program, set.model, why);
        return TOOL_ERROR;
    }
    page_state_find(set.model, &e->found[index]);
    if (!run_sample(&e->run, &w, &e->last, why)) {
        fprintf(stderr, "%s: %s (%s) failed: %s\n", program, e->name, e->run.path, why);
        return TOOL_ERROR;
    }
    for (int k = 0; k < KINDS; k++) e->rate[k][index] = e->last.rate[k];
    return TOOL_OK;
}

// The engine that runs as the n-th of a turn: every other turn goes backwards, so that what changes
// within the minutes of a measurement meets them all.
static engine *engine_of(int turn, int n) {
    return &engines[turn % 2 ? n_engines - 1 - n : n];
}

// ---- the table -------------------------------------------------------------------------------

static void print_machine(void) {
    struct utsname system;
    char cpu[128];
    cpu_name(cpu, sizeof cpu);
    if (uname(&system)) strcpy(system.release, "unknown");
    printf("%s: prompts of %d tokens, %d generated, %d threads; medians of %d samples in turns,\n"
           "quartiles, and the median of the ratios of the speed of %s to the engine's in the same\n"
           "turn.\n", engines[0].last.model_type, set.n_prompt, set.n_gen, set.n_threads,
           set.rounds, engines[0].name);
    printf("%s, %d cores that we may use, Linux %s.\n\n", cpu[0] ? cpu : "Unknown processor",
           count_cores(), system.release);
}

static void print_speeds(const engine *e, int kind) {
    const double *x = e->rate[kind];
    const int n = set.rounds;
    printf(" %8.1f | %7.1f - %7.1f | %5.2f |", quantile(x, NULL, n, 0.5),
           quantile(x, NULL, n, 0.25), quantile(x, NULL, n, 0.75),
           quantile(engines[0].rate[kind], x, n, 0.5));
}

static void print_table(void) {
    printf("| %-20s | %-12s | %8s | %-17s | ratio | %8s | %-17s | ratio |\n"
           "| -------------------- | ------------ | -------: | ----------------: | ----: "
           "| -------: | ----------------: | ----: |\n", "engine", "version", "pp t/s", "quartiles",
           "tg t/s", "quartiles");
    for (int i = 0; i < n_engines; i++) {
        printf("| %-20s | %-12s |", engines[i].name, engines[i].last.version);
        print_speeds(&engines[i], PROMPTS);
        print_speeds(&engines[i], GENERATION);
        printf("\n");
    }
}

static void print_samples(void) {
    char found[PAGE_SENTENCE];
    printf("\nEvery sample, in this order:\n\n"
           "| turn | %-20s | %8s | %8s | pages of the file before |\n"
           "| ---: | -------------------- | -------: | -------: | ------------------------ |\n",
           "engine", "pp t/s", "tg t/s");
    for (int turn = 0; turn < set.rounds; turn++)
        for (int i = 0; i < n_engines; i++) {
            const engine *e = engine_of(turn, i);
            printf("| %4d | %-20s | %8.1f | %8.1f | %s |\n", turn + 1, e->name,
                   e->rate[PROMPTS][turn], e->rate[GENERATION][turn],
                   page_state_sentence(&e->found[turn], found));
        }
}

static int run_all(void) {
    int status = TOOL_OK;
    for (int turn = 0; turn < set.rounds; turn++)
        for (int i = 0; i < n_engines && status == TOOL_OK; i++)
            status = sample(engine_of(turn, i), turn);
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\r%40s\r", "");
    if (status != TOOL_OK) return status;
    print_machine();
    print_table();
    print_samples();
    return output_finish(program, TOOL_OK);
}

static void show_help(void) {
    printf("usage: %s -m MODEL.gguf --engines LIST [options]\n\n"
           "Times moe-bench, llama-bench and others like them in turns on the same file. Each\n"
           "sample is a process; the table is printed when all of them have succeeded.\n"
           "Exit codes: 0 done, 1 something failed, 2 wrong usage.\n\n"
           "    %s -m model.gguf -t 2 --page-state huge --engines \\\n"
           "        'ours=build/moe-bench --no-roofs; ik=/opt/ik/llama-bench -rtr 1 -fa 1'\n",
           program, program);
    tool_help(stdout, options);
}

int main(int argc, char **argv) {
    int status = tool_parse(program, options, argc, argv);
    if (status) return status;
    if (set.help) {
        show_help();
        return output_finish(program, TOOL_OK);
    }
    if (!set.model || !set.engines) {
        fprintf(stderr, "%s: -m FILE and --engines LIST are needed; see %s --help\n", program,
                program);
        return TOOL_USAGE;
    }
    if (set.n_threads <= 0) set.n_threads = count_cores();
    char *list = (char *)malloc(strlen(set.engines) + 1);
    if (!list) return TOOL_ERROR;
    strcpy(list, set.engines);
    status = add_engines(list);
    if (status == TOOL_OK && !n_engines) status = list_fails(set.engines, "no engine in it");
    if (status == TOOL_OK) status = run_all();
    free(list);
    return status;
}
