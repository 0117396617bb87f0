// Programs in turns, each sample a process of its own: running one, reading the JSON that it wrote,
// medians and ratios. For compare.c and engines.c.
// Include tool.h first.
#ifndef BENCH_TURNS_H
#define BENCH_TURNS_H
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_SAMPLES = 200, MAX_ARGUMENTS = 64 };
enum { GENERATION, PROMPTS, KINDS };

// What one run of a benchmark says.
typedef struct speeds {
    double rate[KINDS]; // tokens per second
    char model_type[128], version[64];
} speeds;

// ---- JSON ------------------------------------------------------------------------------------

// The next object of a program's output, with a NUL in place of its end; *text moves behind it.
// Objects of benchmarks hold no others; they may stand on one line or on many.
static inline char *json_object(char **text) {
    char *begin = strchr(*text, '{');
    char *at = begin ? begin + 1 : NULL;
    for (int quoted = 0; at && *at && (quoted || *at != '}'); at++) {
        if (*at == '"') quoted = !quoted;
        else if (quoted && *at == '\\' && at[1]) at++;
    }
    if (!at || !*at) return NULL;
    *at = 0;
    *text = at + 1;
    return begin;
}

// A value of an object, without its quotes.
static inline int json_value(const char *object, const char *key, char *out, size_t size) {
    char name[64];
    snprintf(name, sizeof name, "\"%s\": ", key);
    const char *value = strstr(object, name);
    if (!value) return 0;
    value += strlen(name);
    if (*value == '"') snprintf(out, size, "%.*s", (int)strcspn(value + 1, "\""), value + 1);
    else snprintf(out, size, "%.*s", (int)strcspn(value, ",}\n"), value);
    return 1;
}

static inline double json_number(const char *object, const char *key) {
    char text[64];
    return json_value(object, key, text, sizeof text) ? strtod(text, NULL) : 0;
}

// A test of prompts and one of generation, by the names that llama-bench has for them; 0 if there
// is not just one of each.
static inline int read_speeds(char *text, speeds *out) {
    int n[KINDS] = {0, 0};
    memset(out, 0, sizeof *out);
    for (char *object; (object = json_object(&text)) != NULL;) {
        const int prompts = json_number(object, "n_prompt") > 0;
        const double rate = json_number(object, "avg_ts");
        if (prompts == (json_number(object, "n_gen") > 0) || !(rate > 0)) continue;
        out->rate[prompts ? PROMPTS : GENERATION] = rate;
        n[prompts ? PROMPTS : GENERATION]++;
        json_value(object, "model_type", out->model_type, sizeof out->model_type);
        if (!json_value(object, "build_commit", out->version, sizeof out->version))
            json_value(object, "version", out->version, sizeof out->version);
    }
    return n[PROMPTS] == 1 && n[GENERATION] == 1;
}

// ---- running a program -----------------------------------------------------------------------

// All that comes through a pipe, to be freed; NULL: no memory.
static inline char *read_all(int from) {
    size_t size = 0, capacity = 1 << 16;
    char *text = (char *)malloc(capacity);
    for (ssize_t n = 1; text && n != 0;) {
        if (size + 1 == capacity) {
            char *more = (char *)realloc(text, capacity *= 2);
            if (!more) free(text);
            text = more;
            continue;
        }
        n = read(from, text + size, capacity - 1 - size);
        if (n > 0) size += (size_t)n;
        else if (n < 0 && errno != EINTR) n = 0;
    }
    if (text) text[size] = 0;
    return text;
}

// What all programs do in a sample.
typedef struct workload {
    const char *model;
    int32_t n_threads, n_prompt, n_gen;
} workload;

// A program and its own arguments behind those of the workload; a NULL at the end.
typedef struct command {
    const char *path;
    const char *arguments[MAX_ARGUMENTS];
} command;

// Becomes the program. All of them have llama-bench's options; not all know -o jsonl.
static inline void run_command(const command *c, const workload *w) {
    char threads[16], prompt[16], gen[16];
    const char *all[MAX_ARGUMENTS + 16] = {c->path, "-m", w->model, "-t", threads, "-p", prompt,
                                           "-n", gen, "-r", "1", "-o", "json"};
    snprintf(threads, sizeof threads, "%d", w->n_threads);
    snprintf(prompt, sizeof prompt, "%d", w->n_prompt);
    snprintf(gen, sizeof gen, "%d", w->n_gen);
    for (int i = 0; c->arguments[i]; i++) all[13 + i] = c->arguments[i];
    execv(c->path, (char *const *)(uintptr_t)all);
    fprintf(stderr, "cannot run %s: %s\n", c->path, strerror(errno));
    _exit(127);
}

// One sample: runs a program and reads the speeds that it prints. 0: it failed, and `why` (of 128
// bytes) says how.
static inline int run_sample(const command *c, const workload *w, speeds *out, char *why) {
    int ends[2], state = 0;
    strcpy(why, "cannot start a process");
    if (pipe(ends)) return 0;
    fflush(NULL); // or the child might write it again
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        run_command(c, w);
    }
    close(ends[1]);
    char *text = child > 0 ? read_all(ends[0]) : NULL;
    close(ends[0]);
    if (child < 0) return 0;
    while (waitpid(child, &state, 0) < 0 && errno == EINTR) continue;
    const int found = text && read_speeds(text, out);
    free(text);
    if (WIFSIGNALED(state)) snprintf(why, 128, "signal %d", WTERMSIG(state));
    else if (WEXITSTATUS(state)) snprintf(why, 128, "exit code %d", WEXITSTATUS(state));
    else if (!found) strcpy(why, "its output has not one speed of prompts and one of generation");
    return found && WIFEXITED(state) && WEXITSTATUS(state) == 0;
}

// ---- results ---------------------------------------------------------------------------------

static inline int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The quantile 0 <= q <= 1 of n samples, or of their ratios to `base`.
static inline double quantile(const double *x, const double *base, int n, double q) {
    double sorted[MAX_SAMPLES];
    for (int i = 0; i < n; i++) sorted[i] = base ? x[i] / base[i] : x[i];
    qsort(sorted, (size_t)n, sizeof *sorted, by_size);
    const double at = q * (n - 1);
    const int i = (int)at;
    return i + 1 < n ? sorted[i] + (at - i) * (sorted[i + 1] - sorted[i]) : sorted[i];
}

#endif
