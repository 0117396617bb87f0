/* >>experts: router, plan, schedules. */
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

/* By brute force: an expert is chosen if fewer than n_used of those allowed are better. */
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
    moe__plan plan;
    moe__ffn ffn;
    moe__acts hidden;
    moe__router router = router_of(MOE__GATING_SOFTMAX, EXPERTS, USED, 1, 1, 0, 1);
    memset(&ffn, 0, sizeof ffn);
    memset(&hidden, 0, sizeof hidden);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < USED; i++) {
            experts[t * USED + i] = (t * 2 + i * 2) % 8; /* never expert 1, 3, 5, 7, 8 */
            weights[t * USED + i] = (float)(t * 10 + i);
        }
    plan.entries = entries;
    plan.tokens = tokens;
    plan.weights = planned;
    plan.n_entries = 0;
    moe__plan_routed(&plan, &ffn, &router, experts, weights, TOKENS, &hidden);
    int seen = 0;
    CHECK(plan.n_entries == 4);
    for (int i = 0; i < plan.n_entries; i++) {
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

/* Every row of every entry is given out exactly once, whatever the numbers. */
TEST(schedules_cover_without_overlap) {
    enum { MAX_ROWS = 300 };
    static uint8_t owner[16][MAX_ROWS];
    for (size_t s = 0; s < sizeof moe__schedules / sizeof moe__schedules[0]; s++)
        for (int threads = 1; threads <= 256; threads = threads < 20 ? threads + 1 : threads + 59)
            for (int n_entries = 1; n_entries <= 16; n_entries += 5)
                for (int64_t unit = 1; unit <= 32; unit *= 32) {
                    moe__entry entries[16];
                    moe__ffn ffns[16];
                    moe__share share;
                    memset(entries, 0, sizeof entries);
                    memset(ffns, 0, sizeof ffns);
                    for (int i = 0; i < n_entries; i++) {
                        entries[i].ffn = &ffns[i];
                        entries[i].n_tokens = 1 + i;
                        ffns[i].gate.n_out = 1 + (i * 97 + threads) % MAX_ROWS;
                        ffns[i].down.n_out = MAX_ROWS;
                    }
                    share.entries = entries;
                    share.n_entries = n_entries;
                    share.unit = unit;
                    for (share.down = 0; share.down < 2; share.down++) {
                        memset(owner, 0, sizeof owner);
                        int bad = 0;
                        for (int thread = 0; thread < threads; thread++) {
                            moe__piece piece;
                            for (int32_t i = 0; moe__schedules[s].pieces(&share, thread, threads,
                                                                         i, &piece); i++)
                                for (int64_t r = piece.begin; r < piece.end; r++)
                                    bad += owner[piece.entry][r]++ != 0;
                        }
                        for (int i = 0; i < n_entries; i++)
                            for (int64_t r = 0; r < MAX_ROWS; r++)
                                bad += owner[i][r] != (r < moe__share_rows(&share, i));
                        CHECKF(!bad, "%s, %d threads", moe__schedules[s].name, threads);
                    }
                }
    CHECK(moe__schedule_find(MOE_SCHEDULE_SEQUENTIAL) == &moe__schedules[0]);
    CHECK(moe__schedule_find((moe_schedule)77) == NULL);
}

MAIN()
