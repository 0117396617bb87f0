/* moe-bench --plan: what each expert schedule does to threads and memory nodes, without a machine
 * that has them. For one generated token of named model shapes the library's own schedules hand out
 * the rows of the active experts; printed are
 *
 *     up, down    useful rows / (threads x rows of the busiest thread), in percent
 *     node        of what all nodes together could read while the busiest one is read from, the
 *                 part that is read; each row lies where MOE_NUMA_OWNER puts it
 *     local       the part of the rows that lie on the node of the thread that reads them
 *
 * Threads stand in blocks, the first node's first, as pinned threads do.
 *
 * Include moe_infer.h with its implementation first. */
#ifndef PLAN_H
#define PLAN_H

typedef struct plan_shape {
    const char *name;
    int32_t experts, up_rows, down_rows, shared_rows; /* active experts; rows of gate and up */
} plan_shape;

static const plan_shape plan_shapes[] = {
    {"DeepSeek R1, V3", 8, 2048, 7168, 2048}, {"DeepSeek V2-Lite", 6, 1408, 2048, 2816},
    {"Qwen3-235B-A22B", 8, 1536, 4096, 0},    {"Qwen3-30B-A3B", 8, 768, 2048, 0},
    {"gpt-oss", 4, 2880, 2880, 0},            {"Mixtral 8x7B", 2, 14336, 4096, 0}};

enum { PLAN_ENTRIES = 16, PLAN_NODES = 8 };
typedef struct plan_result {
    double even, node, local; /* 0..1 */
} plan_result;

/* Rows of all pieces, by the thread that reads them and by the node that they lie on. */
static plan_result plan_measure(const moe__schedule_info *schedule, const moe__share *share,
                                int threads) {
    const moe__nodes *nodes = share->nodes;
    int64_t node_rows[PLAN_NODES] = {0}, total = 0, busiest = 0, busiest_node = 0, local = 0;
    plan_result result;
    for (int t = 0; t < threads; t++) {
        int64_t rows = 0;
        moe__piece piece;
        for (int32_t i = 0; schedule->pieces(share, t, threads, i, &piece); i++)
            for (int32_t k = 0; k < nodes->n; k++) {
                int64_t begin = moe__schedule_node(share, piece.entry, k) * share->unit;
                int64_t end = moe__schedule_node(share, piece.entry, k + 1) * share->unit;
                begin = begin > piece.begin ? begin : piece.begin;
                end = end < piece.end ? end : piece.end;
                if (begin >= end) continue;
                rows += end - begin;
                node_rows[k] += end - begin;
                local += k == moe__nodes_of(nodes, t) ? end - begin : 0;
            }
        total += rows;
        busiest = rows > busiest ? rows : busiest;
    }
    for (int n = 0; n < nodes->n; n++)
        busiest_node = node_rows[n] > busiest_node ? node_rows[n] : busiest_node;
    result.even = (double)total / ((double)threads * (double)busiest);
    result.node = (double)total / ((double)nodes->n * (double)busiest_node);
    result.local = (double)local / (double)total;
    return result;
}

static double plan_least(double a, double b) { return a < b ? a : b; }

static void plan_print_row(const plan_shape *shape, int threads, int nodes) {
    moe__entry entries[PLAN_ENTRIES];
    moe__ffn routed, shared;
    moe__plan plan;
    moe__share share;
    moe__nodes map;
    map.n = nodes;
    for (int k = 0; k <= nodes; k++) map.first[k] = threads * k / nodes;
    memset(entries, 0, sizeof entries);
    memset(&routed, 0, sizeof routed);
    memset(&shared, 0, sizeof shared);
    memset(&plan, 0, sizeof plan);
    memset(&share, 0, sizeof share);
    plan.entries = entries;
    routed.gate.n_out = shape->up_rows;
    shared.gate.n_out = shape->shared_rows;
    routed.down.n_out = shared.down.n_out = shape->down_rows;
    for (int32_t i = 0; i < shape->experts; i++) moe__plan_add(&plan, &routed, 1);
    if (shape->shared_rows) moe__plan_add(&plan, &shared, 1);
    share.entries = entries;
    share.n_entries = plan.n_entries;
    share.n_routed = shape->experts;
    share.one_token = 1;
    share.unit = moe__eval_row_unit(1);
    share.nodes = &map;
    printf("| %-16s | %7d | %5d |", shape->name, threads, nodes);
    for (size_t s = 0; s < sizeof moe__schedules / sizeof moe__schedules[0]; s++) {
        plan_result result[2];
        for (share.down = 0; share.down < 2; share.down++)
            result[share.down] = plan_measure(&moe__schedules[s], &share, threads);
        printf(" %*.0f %4.0f %4.0f %5.0f |", (int)strlen(moe__schedules[s].name) + 4,
               100 * result[0].even, 100 * result[1].even,
               100 * plan_least(result[0].node, result[1].node),
               100 * plan_least(result[0].local, result[1].local));
    }
    printf("\n");
}

static void plan_print(void) {
    static const int threads[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 88, 96, 128, 192, 256};
    printf("One token: %% used of the threads' time (up, down) and of the nodes' bandwidth\n"
           "(node), %% of rows that threads of their own node read (local).\n\n"
           "| model            | threads | nodes |");
    for (size_t s = 0; s < sizeof moe__schedules / sizeof moe__schedules[0]; s++)
        printf(" %s: up down node local |", moe__schedules[s].name);
    printf("\n| ---------------- | ------: | ----: |");
    for (size_t s = 0; s < sizeof moe__schedules / sizeof moe__schedules[0]; s++)
        printf(" %.*s: |", (int)strlen(moe__schedules[s].name) + 19,
               "----------------------------------------");
    printf("\n");
    for (size_t i = 0; i < sizeof plan_shapes / sizeof plan_shapes[0]; i++)
        for (size_t t = 0; t < sizeof threads / sizeof threads[0]; t++)
            for (int nodes = 1; nodes <= PLAN_NODES; nodes *= 2)
                if (threads[t] >= 16 * nodes || nodes == 1)
                    plan_print_row(&plan_shapes[i], threads[t], nodes);
}

#endif
