// moe-bench --crowded: what becomes of generation when threads do not get the processors they count
// on. Two situations, each beside its quiet twin in turns (quiet, crowded, crowded, quiet), so that
// the ratio belongs to one stretch of time:
//
//     neighbour    as many threads as processors, and a process that only computes
//     more threads four threads for each processor
//
// The neighbour lives for one sample; it ends with this program, or after NEIGHBOUR_SECONDS.
// Include timing.h first.
#ifndef BENCH_CROWDED_H
#define BENCH_CROWDED_H
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { NEIGHBOUR_SECONDS = 300 };

static inline pid_t neighbour_start(void) {
    const pid_t parent = getpid(), child = fork();
    if (child != 0) return child;
    signal(SIGALRM, SIG_DFL);
    alarm(NEIGHBOUR_SECONDS);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(0);
    for (volatile unsigned long x = 0;;) x++;
}
// Returns whether it was there to the end.
static inline int neighbour_stop(pid_t child) {
    int state;
    const int there = waitpid(child, &state, WNOHANG) == 0;
    if (there) {
        kill(child, SIGKILL);
        waitpid(child, &state, 0);
    }
    return there;
}

typedef struct crowd {
    const char *name;
    double quiet[2 * MAX_REPETITIONS], crowded[2 * MAX_REPETITIONS];
    int32_t threads_quiet, threads_crowded;
    int neighbour;
} crowd;

// One sample: n tokens, tokens per second.
static inline int crowd_sample(moe_session *session, const int32_t *tokens, int32_t n,
                               int neighbour, double *rate, moe_error *error) {
    static usage u;
    const pid_t child = neighbour ? neighbour_start() : 0;
    if (child < 0) {
        fprintf(stderr, "%s: cannot start a neighbour: %s\n", program, strerror(errno));
        return TOOL_ERROR;
    }
    moe_status status = timed_run(session, 0, tokens, 0, n, &u, error);
    if (child && !neighbour_stop(child)) {
        fprintf(stderr, "%s: the neighbour ended before the sample: fewer tokens, please (-n)\n",
                program);
        return TOOL_ERROR;
    }
    *rate = n / u.seconds;
    return status == MOE_OK ? TOOL_OK : tool_fail(program, "--crowded", error);
}

static inline int crowd_run(crowd *c, const model *m, const int32_t *tokens, int32_t n) {
    moe_session *sessions[2] = {NULL, NULL};
    moe_error error;
    int status = TOOL_OK;
    double warm;
    memset(&error, 0, sizeof error);
    for (int i = 0; i < 2 && !error.status; i++) {
        sessions[i] = open_session(m, n, 1, i ? c->threads_crowded : c->threads_quiet,
                                   set.isa.item[0], set.schedule.item[0], &error);
        if (!sessions[i]) status = tool_fail(program, "--crowded", &error);
        else status = crowd_sample(sessions[i], tokens, n < 8 ? n : 8, 0, &warm, &error);
        if (status) break;
    }
    for (int r = 0; r < 2 * set.repetitions && !status; r++)
        for (int turn = 0; turn < 2 && !status; turn++) {
            const int crowded = turn ^ (r & 1);
            status = crowd_sample(sessions[crowded], tokens, n, crowded && c->neighbour,
                                  crowded ? &c->crowded[r] : &c->quiet[r], &error);
        }
    for (int i = 0; i < 2; i++) moe_session_close(sessions[i]);
    return status;
}

static inline void crowd_print(crowd *c) {
    static double ratio[2 * MAX_REPETITIONS];
    const int n = 2 * set.repetitions;
    char threads[48];
    for (int i = 0; i < n; i++) ratio[i] = c->crowded[i] / c->quiet[i];
    const double quiet = roofs_median(c->quiet, n), crowded = roofs_median(c->crowded, n);
    const double median = roofs_median(ratio, n);
    snprintf(threads, sizeof threads, "%d, %d", c->threads_quiet, c->threads_crowded);
    if (set.format == FORMAT_MD)
        printf("| %-12s | %14s | %9.2f | %11.2f | %5.2f | %4.2f - %4.2f |\n", c->name, threads,
               quiet, crowded, median, ratio[n / 4], ratio[n - 1 - n / 4]);
    else
        printf("{\"situation\": \"%s\", \"threads_quiet\": %d, \"threads_crowded\": %d, "
               "\"quiet_ts\": %.4f, \"crowded_ts\": %.4f, \"ratio\": %.4f, \"ratio_low\": %.4f, "
               "\"ratio_high\": %.4f}\n", c->name, c->threads_quiet, c->threads_crowded, quiet,
               crowded, median, ratio[n / 4], ratio[n - 1 - n / 4]);
    fflush(stdout);
}

static inline int run_crowded(const model *m) {
    static crowd crowds[2];
    uint64_t random = RANDOM_SEED;
    const int32_t n = set.n_gen.item[0] > 0 ? set.n_gen.item[0] : 1;
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    const int32_t processors = online < 1 ? 1 : online > 256 ? 256 : (int32_t)online;
    const int32_t threads = set.n_threads.item[0] > 0 ? set.n_threads.item[0] : processors;
    int32_t *tokens = (int32_t *)malloc((size_t)n * sizeof *tokens);
    int status = TOOL_OK;
    if (!tokens) return TOOL_ERROR;
    random_tokens(m->handle, &random, tokens, n);
    crowds[0].name = "neighbour";
    crowds[0].threads_quiet = crowds[0].threads_crowded = threads;
    crowds[0].neighbour = 1;
    crowds[1].name = "more threads";
    crowds[1].threads_quiet = threads;
    crowds[1].threads_crowded = 4 * processors;
    if (set.format == FORMAT_MD)
        printf("%s, %d processors; generation of %d tokens, medians of %d, quartiles\n\n"
               "| situation    |        threads | quiet t/s | crowded t/s | ratio |   quartiles |\n"
               "| ------------ | -------------: | --------: | ----------: | ----: | "
               "----------: |\n",
               m->type, processors, n, 2 * set.repetitions);
    for (int i = 0; i < 2 && status == TOOL_OK; i++) {
        status = crowd_run(&crowds[i], m, tokens, n);
        if (status == TOOL_OK) crowd_print(&crowds[i]);
    }
    free(tokens);
    return status;
}

#endif
