// >>experts: router, plan, schedules.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

static uint32_t random_state = 7;
static float uniform(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return (float)((int32_t)random_state) / 2147483648.0f;
}

static moe__router router_of(moe__gating gating, int n, int used, int groups, int groups_used,
                             int normalize, float scale) {
    moe__router router;
    router.gating = gating;
    router.n_expert = n;
    router.n_used = used;
    router.n_group = groups;
    router.n_group_used = groups_used;
    router.normalize = normalize;
    router.scale = scale;
    return router;
}

// By brute force: an expert is chosen if fewer than n_used of those allowed are better.
static void check_select(const moe__router *router, const float *logits, const float *bias) {
    float p[MOE__MAX_EXPERTS], weights[64];
    int32_t experts[64];
    double score[MOE__MAX_EXPERTS], probability[MOE__MAX_EXPERTS], total = 0, sum = 0;
    int n = router->n_expert, size = router->n_group > 1 ? n / router->n_group : n;
    memcpy(p, logits, (size_t)n * sizeof *p);
    moe__router_select(moe__kernels_get(MOE_ISA_BEST), router, p, bias, experts, weights);
    for (int e = 0; e < n; e++) total += exp(logits[e]);
    for (int e = 0; e < n; e++) {
        probability[e] = router->gating == MOE__GATING_SIGMOID ? 1 / (1 + exp(-logits[e]))
                                                               : exp(logits[e]) / total;
        score[e] = router->gating == MOE__GATING_CHOSEN ? logits[e] : probability[e];
        score[e] += bias ? bias[e] : 0;
    }
    if (router->n_group > 1) {
        double group[MOE__MAX_EXPERTS];
        for (int g = 0; g < router->n_group; g++) {
            double a = -1e9, b = -1e9;
            for (int i = 0; i < size; i++) {
                double s = score[g * size + i];
                if (s > a) { b = a; a = s; } else if (s > b) b = s;
            }
            group[g] = size > 1 ? a + b : a;
        }
        for (int g = 0; g < router->n_group; g++) {
            int better = 0;
            for (int h = 0; h < router->n_group; h++) better += group[h] > group[g];
            if (better >= router->n_group_used)
                for (int i = 0; i < size; i++) score[g * size + i] = -1e9;
        }
    }
    for (int i = 0; i < router->n_used; i++) sum += probability[experts[i]];
    for (int i = 0; i < router->n_used; i++) {
        int e = experts[i], better = 0;
        CHECK(e >= 0 && e < n);
        if (i) CHECK(experts[i] > experts[i - 1]);
        for (int f = 0; f < n; f++) better += score[f] > score[e] + 1e-6;
        CHECKF(better < router->n_used, "expert %d is beaten by %d others", e, better);
        int normalize = router->normalize || router->gating == MOE__GATING_CHOSEN;
        double weight = probability[e] * router->scale / (normalize ? sum : 1);
        CHECKF(fabs(weights[i] - weight) < 1e-5 * (1 + weight), "%g, expected %g",
               (double)weights[i], weight);
    }
}

TEST(router_chooses_the_best) {
    const int sizes[][4] = {{8, 2, 1, 1}, {64, 6, 1, 1}, {256, 8, 8, 4}, {32, 4, 8, 4},
                            {512, 10, 1, 1}, {4, 4, 1, 1}, {16, 1, 4, 1}, {8, 3, 8, 3}};
    for (int i = 0; i < 8; i++)
        for (int variant = 0; variant < 12; variant++)
            for (int repeat = 0; repeat < 5; repeat++) {
                float logits[512], bias[512];
                moe__router router = router_of(
                    variant >= 8  ? MOE__GATING_CHOSEN
                    : variant & 1 ? MOE__GATING_SIGMOID
                                  : MOE__GATING_SOFTMAX,
                    sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], variant >> 1 & 1,
                    variant & 1 ? 2.5f : 1.0f);
                for (int e = 0; e < router.n_expert; e++) {
                    logits[e] = 3 * uniform();
                    bias[e] = 0.3f * uniform();
                }
                check_select(&router, logits, variant & 4 ? bias : NULL);
            }
}

TEST(router_survives_nan_and_ties) {
    float logits[16], weights[16];
    int32_t experts[16];
    for (int variant = 0; variant < 6; variant++)
        for (int groups = 1; groups <= 4; groups *= 4) {
            const moe__gating gatings[] = {MOE__GATING_SOFTMAX, MOE__GATING_SIGMOID,
                                           MOE__GATING_CHOSEN};
            moe__router router = router_of(gatings[variant / 2], 16, 4, groups, 2, 1, 1);
            for (int e = 0; e < 16; e++) logits[e] = variant & 1 ? 1.0f : NAN;
            moe__router_select(moe__kernels_get(MOE_ISA_BEST), &router, logits, NULL, experts,
                               weights);
            for (int i = 0; i < 4; i++) {
                CHECK(experts[i] >= 0 && experts[i] < 16);
                if (i) CHECK(experts[i] > experts[i - 1]);
                if (variant & 1) CHECK(experts[i] == i && fabsf(weights[i] - 0.25f) < 1e-6f);
            }
        }
    for (int e = 0; e < 16; e++) logits[e] = e == 5 ? NAN : (float)e;
    moe__router router = router_of(MOE__GATING_SIGMOID, 16, 3, 1, 1, 0, 1);
    moe__router_select(moe__kernels_get(MOE_ISA_BEST), &router, logits, NULL, experts, weights);
    CHECK(experts[0] == 13 && experts[1] == 14 && experts[2] == 15);
}

TEST(plan_lists_every_slot_once) {
    enum { TOKENS = 50, USED = 3, EXPERTS = 9 };
    int32_t experts[TOKENS * USED], tokens[TOKENS * USED];
    float weights[TOKENS * USED], planned[TOKENS * USED];
    moe__entry entries[EXPERTS + 1];
    moe__dispatch dispatch;
    moe__ffn ffn;
    moe__router router = router_of(MOE__GATING_SOFTMAX, EXPERTS, USED, 1, 1, 0, 1);
    memset(&ffn, 0, sizeof ffn);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < USED; i++) {
            experts[t * USED + i] = (t * 2 + i * 2) % 8; // never expert 1, 3, 5, 7, 8
            weights[t * USED + i] = (float)(t * 10 + i);
        }
    dispatch.entries = entries;
    dispatch.tokens = tokens;
    dispatch.weights = planned;
    dispatch.n_entries = 0;
    moe__dispatch_routed(&dispatch, &ffn, router.n_expert, router.n_used, experts, weights, TOKENS);
    int seen = 0;
    CHECK(dispatch.n_entries == 4);
    for (int i = 0; i < dispatch.n_entries; i++) {
        const moe__entry *entry = &entries[i];
        CHECK(entry->hidden_row == seen && entry->expert == 2 * i);
        for (int j = 0; j < entry->n_tokens; j++) {
            int t = entry->tokens[j], found = 0;
            if (j) CHECK(t >= entry->tokens[j - 1]);
            for (int k = 0; k < USED; k++)
                found |= experts[t * USED + k] == entry->expert &&
                         weights[t * USED + k] == entry->weights[j];
            CHECK(found);
        }
        seen += entry->n_tokens;
    }
    CHECK(seen == TOKENS * USED);
}

// ---- schedules -------------------------------------------------------------------------------

enum { MAX_ROWS = 300, MAX_ENTRIES = 17 };

typedef struct {
    moe__entry entries[MAX_ENTRIES];
    moe__ffn ffns[2]; // of the routed experts, of the shared one
    moe__dispatch dispatch;
    moe__task task;
    moe__nodes nodes;
} problem;

// The threads of the problem stand evenly on some memory nodes.
static void problem_threads(problem *p, int threads, int nodes) {
    p->nodes.n = nodes;
    for (int k = 0; k <= nodes; k++) p->nodes.first[k] = threads * k / nodes;
    p->task.nodes = &p->nodes;
}

// n_routed experts with tokens_of(i) tokens each, then perhaps a shared one.
static void problem_init(problem *p, int n_routed, int shared, int64_t rows, int64_t down_rows,
                         int64_t shared_rows, int one_token, int64_t unit) {
    memset(p, 0, sizeof *p);
    p->dispatch.entries = p->entries;
    p->ffns[0].up.n_out = rows;
    p->ffns[1].up.n_out = shared_rows;
    p->ffns[0].down.n_out = p->ffns[1].down.n_out = down_rows;
    for (int i = 0; i < n_routed; i++)
        moe__dispatch_add(&p->dispatch, &p->ffns[0], one_token ? 1 : 1 + i * i % 50);
    if (shared) moe__dispatch_add(&p->dispatch, &p->ffns[1], one_token ? 1 : 64);
    p->task.entries = p->entries;
    p->task.n_entries = p->dispatch.n_entries;
    p->task.n_routed = n_routed;
    p->task.one_token = one_token;
    p->task.unit = unit;
}

// owner[entry][row] = thread + 1 of each row; returns how many rows are given out twice or are not
// there.
static int give_out(const moe__schedule_info *schedule, const moe__task *task, int threads,
                    int16_t owner[MAX_ENTRIES][MAX_ROWS]) {
    int bad = 0;
    memset(owner, 0, sizeof(int16_t) * MAX_ENTRIES * MAX_ROWS);
    for (int thread = 0; thread < threads; thread++) {
        moe__range range;
        for (int32_t i = 0; schedule->range(task, thread, threads, i, &range); i++) {
            if (range.begin >= range.end) continue;
            if (range.entry < 0 || range.entry >= task->n_entries || range.begin < 0 ||
                range.end > moe__task_rows(task, range.entry) || range.begin % task->unit)
                return 1;
            for (int64_t r = range.begin; r < range.end; r++) {
                bad += owner[range.entry][r] != 0;
                owner[range.entry][r] = (int16_t)(thread + 1);
            }
        }
    }
    for (int i = 0; i < task->n_entries; i++)
        for (int64_t r = 0; r < moe__task_rows(task, i); r++) bad += owner[i][r] == 0;
    return bad;
}

static int same_owners(const moe__task *task, int16_t owner[MAX_ENTRIES][MAX_ROWS]) {
    for (int i = 1; i < task->n_entries; i++)
        for (int64_t r = 0; r < moe__task_rows(task, i); r++)
            if (owner[i][r] != owner[0][r]) return 0;
    return 1;
}

// Who gets how many tokens, in batches of many.
enum { TOKENS_MIXED, TOKENS_ONE_HAS_ALL, TOKENS_SOME_HAVE_NONE, N_TOKENS };
static void problem_tokens(problem *p, int how) {
    p->dispatch.n_entries = 0;
    for (int i = 0; i < p->task.n_entries; i++) {
        const moe__ffn *ffn = p->entries[i].ffn;
        const int many = p->task.one_token || i >= p->task.n_routed;
        moe__dispatch_add(&p->dispatch, ffn, many                          ? p->entries[i].n_tokens
                                     : how == TOKENS_ONE_HAS_ALL    ? (i == 1 ? 512 : 0)
                                     : how == TOKENS_SOME_HAVE_NONE ? i % 3 * 7
                                                                    : 1 + i * i % 50);
    }
}

// Every row of every entry is given out exactly once, in whole units, whatever the numbers;
// where rows are said to be owned, down has one thread per row.
TEST(schedules_cover_without_overlap) {
    static int16_t owner[MAX_ENTRIES][MAX_ROWS];
    static problem p;
    int apart = 0;
    for (size_t s = 0; s < sizeof moe__schedules / sizeof moe__schedules[0]; s++)
        for (int i = 0; i < 2 * 256 * 17; i++) {
            const int one_token = i % 2, threads = 1 + i / 2 % 256, n_routed = i / 512;
            const int variant = (threads * 5 + n_routed) % 8;
            const int shared = variant & 2 || !n_routed;
            const int64_t rows = variant & 4 ? MAX_ROWS : 1 + threads * 37 % MAX_ROWS;
            problem_init(&p, n_routed, shared, rows, MAX_ROWS - threads % 7, 96, one_token,
                         one_token ? 16 : MOE__TILE_ROWS);
            problem_threads(&p, threads, 1 + (threads + variant) % 4);
            for (int how = 0; how < (one_token ? 1 : N_TOKENS); how++) {
                problem_tokens(&p, how);
                for (p.task.down = 0; p.task.down < 2; p.task.down++) {
                    const int bad = give_out(&moe__schedules[s], &p.task, threads, owner);
                    CHECKF(!bad, "%s, %d threads, %d experts, tokens %d",
                           moe__schedules[s].name, threads, n_routed, how);
                }
            }
            p.task.down = 1;
            const int owns = moe__schedules[s].owns_rows(&p.task, threads);
            give_out(&moe__schedules[s], &p.task, threads, owner);
            if (owns)
                CHECKF(same_owners(&p.task, owner), "%s, %d threads, %d experts",
                       moe__schedules[s].name, threads, n_routed);
            apart += !owns;
            if (!one_token) CHECK(owns);
        }
    CHECK(apart > 50);
    CHECK(moe__schedule_find(MOE_SCHEDULE_SEQUENTIAL) == &moe__schedules[0]);
    CHECK(moe__schedule_find((moe_schedule)77) == NULL);
    for (int i = 1; i <= 3; i++)
        CHECK(moe__schedule_find((moe_schedule)i)->schedule == (moe_schedule)i);
}

// Work of a thread: rows with one token, blocks times their cost with many.
static int64_t work_of(const moe__schedule_info *schedule, const moe__task *task, int thread,
                       int threads) {
    int64_t work = 0;
    moe__range range;
    for (int32_t i = 0; schedule->range(task, thread, threads, i, &range); i++) {
        const int64_t units = (range.end - range.begin + task->unit - 1) / task->unit;
        const moe__entry *entry = &task->entries[range.entry];
        const int64_t cost = task->one_token ? 1 : moe__entry_block_cost(entry);
        work += units * cost;
    }
    return work;
}

// Balanced: no thread has more than a unit over the mean with one token, nor more than the most
// expensive block with many; where rows of down are owned, 15/16 of the time are used.
TEST(the_balanced_schedule_shares_work_evenly) {
    static problem p;
    const moe__schedule_info *balanced = moe__schedule_find(MOE_SCHEDULE_BALANCED);
    for (int threads = 1; threads <= 256; threads++)
        for (int n_routed = 1; n_routed <= 16; n_routed++)
            for (int one_token = 0; one_token < 2; one_token++) {
                const int64_t unit = one_token ? 16 : MOE__TILE_ROWS;
                problem_init(&p, n_routed, n_routed % 2, 48 * unit, 224 * unit, 96 * unit,
                             one_token, unit);
                problem_threads(&p, threads, 1);
                problem_tokens(&p, (threads + n_routed) % N_TOKENS);
                for (p.task.down = 0; p.task.down <= one_token; p.task.down++) {
                    int64_t total = 0, most = 0, block = 1;
                    for (int t = 0; t < threads; t++) {
                        const int64_t work = work_of(balanced, &p.task, t, threads);
                        total += work;
                        most = moe__max(most, work);
                    }
                    for (int i = 0; i < p.task.n_entries && !one_token; i++)
                        block = moe__max(block, moe__entry_block_cost(&p.entries[i]));
                    if (p.task.down && balanced->owns_rows(&p.task, threads))
                        CHECKF(16 * total >= 15 * most * threads, "%d threads, %d experts: %d",
                               threads, n_routed, (int)most);
                    else
                        CHECKF(most * threads < total + block * threads,
                               "%d threads, %d experts: %d", threads, n_routed, (int)most);
                }
            }
}

// Parallel: experts of one token go to groups of threads by their rank; else it is sequential.
TEST(the_parallel_schedule_gives_experts_to_thread_groups) {
    static problem p;
    static int16_t owner[MAX_ENTRIES][MAX_ROWS], expected[MAX_ENTRIES][MAX_ROWS];
    const moe__schedule_info *parallel = moe__schedule_find(MOE_SCHEDULE_PARALLEL);
    problem_init(&p, 6, 1, 256, 256, 64, 1, 16);
    for (int threads = 1; threads <= 24; threads++) {
        int groups = 1;
        for (int g = 1; g <= 6; g++)
            if (6 % g == 0 && threads % g == 0) groups = g;
        problem_threads(&p, threads, 1);
        CHECKF(moe__schedule_groups(&p.task, threads) == groups, "%d threads", threads);
        CHECK(give_out(parallel, &p.task, threads, owner) == 0);
        for (int e = 0; e < 6; e++)
            for (int r = 0; r < 256; r++)
                CHECKF((owner[e][r] - 1) % groups == e % groups, "%d threads", threads);
        if (groups > 1) continue;
        give_out(&moe__schedules[0], &p.task, threads, expected);
        CHECK(memcmp(owner, expected, sizeof owner) == 0);
    }
    problem_init(&p, 6, 1, 256, 256, 64, 0, MOE__TILE_ROWS);
    problem_threads(&p, 6, 2);
    CHECK(moe__schedule_groups(&p.task, 6) == 1);
    give_out(parallel, &p.task, 6, owner);
    give_out(&moe__schedules[0], &p.task, 6, expected);
    CHECK(memcmp(owner, expected, sizeof owner) == 0);
}

// One token: which node reads a row does not depend on the expert, and is what the nodes say; on
// each node the rows are evenly shared.
TEST(rows_stay_on_their_node) {
    static problem p;
    static int16_t owner[MAX_ENTRIES][MAX_ROWS];
    for (size_t s = 0; s < sizeof moe__schedules / sizeof moe__schedules[0]; s++)
        for (int threads = 2; threads <= 64; threads += threads < 20 ? 1 : 11)
            for (int nodes = 1; nodes <= 4 && nodes <= threads; nodes++)
                for (int uneven = 0; uneven < 2; uneven++) {
                    if (moe__schedules[s].schedule == MOE_SCHEDULE_PARALLEL) continue;
                    problem_init(&p, 7, 1, 250, MAX_ROWS, 96, 1, 16);
                    problem_threads(&p, threads, nodes);
                    if (uneven && nodes > 1) p.nodes.first[1] = 1;
                    for (p.task.down = 0; p.task.down < 2; p.task.down++) {
                        CHECK(give_out(&moe__schedules[s], &p.task, threads, owner) == 0);
                        for (int e = 0; e < p.task.n_entries; e++)
                            for (int64_t r = 0; r < moe__task_rows(&p.task, e); r++) {
                                const int64_t k = moe__nodes_of(&p.nodes, owner[e][r] - 1);
                                CHECK(r / 16 >= moe__schedule_node(&p.task, e, (int32_t)k) &&
                                      r / 16 < moe__schedule_node(&p.task, e, (int32_t)k + 1));
                            }
                        if (moe__schedules[s].schedule != MOE_SCHEDULE_BALANCED ||
                            (p.task.down && moe__schedules[s].owns_rows(&p.task, threads)))
                            continue;
                        for (int k = 0; k < nodes; k++) {
                            int64_t least = INT64_MAX, most = 0;
                            for (int t = p.nodes.first[k]; t < p.nodes.first[k + 1]; t++) {
                                const int64_t w = work_of(&moe__schedules[s], &p.task, t, threads);
                                least = moe__min(least, w);
                                most = moe__max(most, w);
                            }
                            CHECKF(most - least <= 1, "%d threads, %d nodes: %d .. %d", threads,
                                   nodes, (int)least, (int)most);
                        }
                    }
                }
}

MAIN()
