// compare: several builds of moe-bench on the same model, in turns A B C C B A for each number of
// threads; medians and ratios to the first as a Markdown table, speed against threads as a picture.
// `make compare MODEL=...` runs it with a build for each expert schedule, made as a user would make
// it: with -DMOE_PARALLEL_EXPERTS, with -DMOE_BALANCED_EXPERTS and without.
//
//     compare -m MODEL.gguf -t 1,2,4 [options] NAME=PROGRAM...
//
// Every sample is a process of its own that runs PROGRAM -o json; the file's pages stay in the
// system's cache between them. Prompts are the control: what the builds differ in is the generation
// of tokens.
#define _GNU_SOURCE
#include "../moe_infer.h"

#include "../examples/tool.h"
#include "svg.h"
#include "turns.h"

static const char program[] = "compare";

static struct settings {
    const char *model, *svg;
    tool_list n_threads;
    int32_t n_prompt, n_gen, rounds;
    int help;
} set = {.n_threads = {1, {1}}, .n_prompt = 256, .n_gen = 64, .rounds = 3};

static const tool_option options[] = {
    {"-m, --model", "FILE", TOOL_TEXT, &set.model, 0, 0, "GGUF file (needed)"},
    {"-t, --threads", "N,...", TOOL_INTS, &set.n_threads, 1, MOE_MAX_THREADS, "(default 1)"},
    {"-p, --n-prompt", "N", TOOL_INT, &set.n_prompt, 1, INT32_MAX,
     "tokens of the prompt (default 256)"},
    {"-n, --n-gen", "N", TOOL_INT, &set.n_gen, 1, INT32_MAX, "tokens generated (default 64)"},
    {"-r, --rounds", "N", TOOL_INT, &set.rounds, 1, 100, "each of two samples (default 3)"},
    {"--svg", "FILE", TOOL_TEXT, &set.svg, 0, 0, "draw speed against threads"},
    {"-h, --help", NULL, TOOL_FLAG, &set.help, 0, 0, "show this"},
    {NULL, NULL, TOOL_HEADING, NULL, 0, 0, NULL}};

enum { MAX_BUILDS = SVG_LINES };
static const char *const kind_names[KINDS] = {"Generation", "Prompts (control)"};

typedef struct samples {
    double rate[KINDS][MAX_SAMPLES]; // tokens per second
} samples;

typedef struct build {
    char name[64];
    const char *path;
    samples *of; // one per number of threads
} build;
static build builds[MAX_BUILDS];
static int n_builds;
static speeds last; // of the last run

// ---- running a build -------------------------------------------------------------------------

static int run_build(const build *b, int32_t threads) {
    const command c = {b->path, {"--no-roofs"}};
    const workload w = {set.model, threads, set.n_prompt, set.n_gen};
    char why[128];
    if (run_sample(&c, &w, &last, why)) return 1;
    fprintf(stderr, "%s: %s (%s) with %d threads failed: %s\n", program, b->name, b->path,
            threads, why);
    return 0;
}

// ---- results ---------------------------------------------------------------------------------

static void print_table(int n_samples) {
    printf("%s, prompts of %d tokens, %d generated; tokens per second: medians of %d samples in\n"
           "turns, quartiles, and the median of the ratios to %s of the same turn.\n\n"
           "| threads | build      | tg t/s | quartiles       | ratio | pp t/s | quartiles       |"
           " ratio |\n"
           "| ------: | ---------- | -----: | --------------: | ----: | -----: | --------------: |"
           " ----: |\n", last.model_type, set.n_prompt, set.n_gen, n_samples, builds[0].name);
    for (int i = 0; i < set.n_threads.n; i++)
        for (int b = 0; b < n_builds; b++) {
            printf("| %7d | %-10s |", set.n_threads.item[i], builds[b].name);
            for (int k = 0; k < KINDS; k++) {
                const double *x = builds[b].of[i].rate[k], *first = builds[0].of[i].rate[k];
                printf(" %6.1f | %6.1f - %6.1f | %5.3f |", quantile(x, NULL, n_samples, 0.5),
                       quantile(x, NULL, n_samples, 0.25), quantile(x, NULL, n_samples, 0.75),
                       quantile(x, first, n_samples, 0.5));
            }
            printf("\n");
        }
}

static int draw(int n_samples) {
    svg_panel *panels = (svg_panel *)calloc(KINDS, sizeof *panels);
    char title[192];
    if (!panels) return TOOL_ERROR;
    snprintf(title, sizeof title, "Expert schedules: %s", last.model_type);
    for (int k = 0; k < KINDS; k++) {
        panels[k].title = kind_names[k];
        panels[k].x_label = "threads";
        panels[k].y_label = "tokens per second";
        panels[k].log2_x = 1;
        panels[k].n_lines = n_builds;
        for (int b = 0; b < n_builds; b++) {
            svg_line *line = &panels[k].line[b];
            line->name = builds[b].name;
            for (; line->n < set.n_threads.n; line->n++) {
                const double *x = builds[b].of[line->n].rate[k];
                line->x[line->n] = set.n_threads.item[line->n];
                line->y[line->n] = quantile(x, NULL, n_samples, 0.5);
                line->low[line->n] = quantile(x, NULL, n_samples, 0.25);
                line->high[line->n] = quantile(x, NULL, n_samples, 0.75);
            }
        }
    }
    const int failed = svg_write(set.svg, title, panels, KINDS);
    if (failed) fprintf(stderr, "%s: %s: %s\n", program, set.svg, strerror(errno));
    free(panels);
    return failed ? TOOL_ERROR : TOOL_OK;
}

static int run_all(void) {
    const int n_samples = 2 * set.rounds;
    for (int i = 0; i < set.n_threads.n; i++)
        for (int s = 0; s < n_samples; s++)
            for (int turn = 0; turn < n_builds; turn++) {
                build *b = &builds[s % 2 ? n_builds - 1 - turn : turn];
                if (isatty(STDERR_FILENO))
                    fprintf(stderr, "\r%d threads: %d/%d %-12s", set.n_threads.item[i], s + 1,
                            n_samples, b->name);
                if (!run_build(b, set.n_threads.item[i])) return TOOL_ERROR;
                for (int k = 0; k < KINDS; k++) b->of[i].rate[k][s] = last.rate[k];
            }
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\r%40s\r", "");
    print_table(n_samples);
    return set.svg ? draw(n_samples) : TOOL_OK;
}

// NAME=PROGRAM
static int add_build(char *text) {
    char *path = strchr(text, '=');
    if (!path || path == text || !path[1] || (size_t)(path - text) >= sizeof builds[0].name ||
        n_builds == MAX_BUILDS) {
        fprintf(stderr, "%s: '%s': up to %d of NAME=PROGRAM, please\n", program, text,
                (int)MAX_BUILDS);
        return TOOL_USAGE;
    }
    build *b = &builds[n_builds++];
    snprintf(b->name, sizeof b->name, "%.*s", (int)(path - text), text);
    b->path = path + 1;
    b->of = (samples *)calloc((size_t)set.n_threads.n, sizeof *b->of);
    return b->of ? TOOL_OK : TOOL_ERROR;
}

int main(int argc, char **argv) {
    int n_options = argc;
    while (n_options > 1 && strchr(argv[n_options - 1], '=')) n_options--;
    int status = tool_parse(program, options, n_options, argv);
    if (status) return status;
    if (set.help) {
        printf("usage: %s -m MODEL.gguf [options] NAME=MOE_BENCH...\n\n"
               "Times several builds of moe-bench in turns.\n", program);
        tool_help(stdout, options);
        return output_finish(program, TOOL_OK);
    }
    for (int i = n_options; i < argc && status == TOOL_OK; i++) status = add_build(argv[i]);
    if (status == TOOL_OK && (!set.model || !n_builds)) {
        fprintf(stderr, "%s: -m FILE and NAME=PROGRAM are needed; see %s --help\n", program,
                program);
        status = TOOL_USAGE;
    }
    if (status == TOOL_OK && set.svg && output_is_input(set.svg, set.model)) {
        fprintf(stderr, "%s: --svg would replace the model\n", program);
        status = TOOL_USAGE;
    }
    if (status == TOOL_OK) status = run_all();
    for (int b = 0; b < n_builds; b++) free(builds[b].of);
    return output_finish(program, status);
}
