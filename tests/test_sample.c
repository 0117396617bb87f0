// The sampler against a double-precision reference of each filter, the text stream against a
// reference that sees the whole text at once, and moe_generate against a loop written by hand.
#include "steps.h"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"
#include "models.h"

static uint64_t random_state = 1;
static uint32_t random_u32(void) { // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 2685821657736338717u >> 32);
}
static double random_unit(void) { return random_u32() / 4294967296.0; }

// ---- sampler: arguments ----------------------------------------------------------------------

static moe_sampler_options defaults(void) {
    moe_sampler_options options;
    memset(&options, 0, sizeof options);
    return options;
}

static moe_sampler *open_sampler(const moe_sampler_options *options, int n) {
    moe_error error;
    moe_sampler *sampler = moe_sampler_open(options, n, n, &error);
    if (!sampler) printf("  %s: %s\n", error.where, error.text), exit(1);
    return sampler;
}

TEST(wrong_arguments_of_samplers_are_refused) {
    static const float bad[] = {NAN, INFINITY, -INFINITY, -1, -1e-30f};
    static const char *names[] = {"temperature", "top_p", "min_p", "repeat_penalty"};
    for (int field = 0; field < 4; field++)
        for (int i = 0; i < 5; i++) {
            moe_sampler_options options = defaults();
            moe_error error;
            float *fields[4] = {&options.temperature, &options.top_p, &options.min_p,
                                &options.repeat_penalty};
            memset(&error, 0, sizeof error);
            *fields[field] = bad[i];
            moe_sampler *sampler = moe_sampler_open(&options, 10, 10, &error);
            int allowed = field == 0 && i >= 3; // a negative temperature means greedy
            CHECKF((sampler != NULL) == allowed, "%s = %g", names[field], (double)bad[i]);
            if (!allowed) CHECK(error.status == MOE_ERROR_ARGUMENT);
            if (!allowed) CHECK(!strcmp(error.where, names[field]));
            moe_sampler_close(sampler);
        }
    static const int sizes[][3] = {{0, 0, 0}, {-1, 0, 0},   {1, 1, 1},      {1, 0, 0},
                                   {1, 2, 0}, {10, -1, 0}, {INT32_MIN, 1, 0}};
    for (int i = 0; i < 7; i++) {
        moe_error error;
        memset(&error, 0, sizeof error);
        moe_sampler *sampler = moe_sampler_open(NULL, sizes[i][0], sizes[i][1], &error);
        CHECK((sampler != NULL) == sizes[i][2]);
        CHECK(sizes[i][2] || error.status == MOE_ERROR_ARGUMENT);
        moe_sampler_close(sampler);
    }
    static const int lasts[] = {-2, INT32_MIN, (1 << 24) + 1, INT32_MAX};
    for (int i = 0; i < 4; i++) {
        moe_sampler_options options = defaults();
        moe_error error;
        memset(&error, 0, sizeof error);
        options.repeat_last_n = lasts[i];
        CHECK(!moe_sampler_open(&options, 10, 10, &error));
        CHECK(error.status == MOE_ERROR_ARGUMENT && !strcmp(error.where, "repeat_last_n"));
        CHECK(!moe_sampler_open(&options, 10, 10, NULL));
    }
    moe_sampler_close(NULL);
    moe_sampler_accept(NULL, 1);
    CHECK(moe_sampler_sample(NULL, NULL) == 0);
    moe_sampler *sampler = open_sampler(NULL, 3);
    CHECK(moe_sampler_sample(sampler, NULL) == 0);
    moe_sampler_close(sampler);
}

TEST(sampling_takes_no_memory_and_opening_may_fail) {
    meter m;
    float logits[100];
    memset(&m, 0, sizeof m);
    for (int i = 0; i < 100; i++) logits[i] = (float)(i % 17);
    moe_sampler_options options = defaults();
    options.allocator = meter_allocator(&m);
    options.temperature = 1, options.top_p = 0.9f, options.min_p = 0.01f, options.top_k = 50;
    options.repeat_penalty = 1.1f;
    moe_sampler *sampler = open_sampler(&options, 100);
    long n = m.calls;
    CHECK(n >= 1);
    for (int i = 0; i < 1000; i++)
        moe_sampler_accept(sampler, moe_sampler_sample(sampler, logits));
    CHECK(m.calls == n); // nothing while sampling
    moe_sampler_close(sampler);
    CHECK(m.live == 0);
    for (long k = 1; k <= n; k++) {
        moe_error error;
        memset(&error, 0, sizeof error);
        memset(&m, 0, sizeof m);
        m.fail_at = k;
        CHECK(!moe_sampler_open(&options, 100, 100, &error));
        CHECK(error.status == MOE_ERROR_MEMORY && m.live == 0);
    }
    options.allocator.free = NULL;
    CHECK(!moe_sampler_open(&options, 100, 100, NULL));
}

// Whoever needs few candidates takes little memory, whatever the vocabulary.
TEST(few_candidates_take_little_memory) {
    enum { N = 151936, BLOCKS = (N + MOE__PEAK - 1) / MOE__PEAK };
    static const struct {
        float temperature, top_p, min_p, penalty;
        int top_k;
        size_t most;
    } cases[] = {{0, 0.9f, 0.1f, 0, 40, 1000},
                 {0, 0, 0, 1.1f, 0, 2000},
                 {1, 0.9f, 0.1f, 1.1f, 40, 2000 + 4 * BLOCKS},
                 {1, 0, 0, 0, 300, 4000 + 4 * BLOCKS},
                 {1, 0, 0.1f, 0, 0, 1000 + 12 * BLOCKS},
                 {1, 0.9f, 0, 0, 0, 8 * N + 40000 + 12 * BLOCKS}};
    for (int i = 0; i < 6; i++) {
        moe_sampler_options o = defaults();
        meter m;
        memset(&m, 0, sizeof m);
        o.allocator = meter_allocator(&m);
        o.temperature = cases[i].temperature, o.top_p = cases[i].top_p, o.min_p = cases[i].min_p;
        o.repeat_penalty = cases[i].penalty, o.top_k = cases[i].top_k;
        moe_sampler *sampler = open_sampler(&o, N);
        CHECKF(m.peak <= cases[i].most, "case %d: %zu bytes", i, m.peak);
        moe_sampler_close(sampler);
        CHECK(m.live == 0);
    }
}

// ---- sampler: choosing -----------------------------------------------------------------------

static int32_t greedy(const float *logits, int n) {
    moe_sampler_options options = defaults();
    moe_sampler *sampler = open_sampler(&options, n);
    int32_t token = moe_sampler_sample(sampler, logits);
    const int32_t best = moe__sample_greedy(sampler->kernels, logits, n); // -1: nothing is finite
    CHECK((best < 0 ? 0 : best) == token);
    moe_sampler_close(sampler);
    return token;
}

TEST(greedy_takes_the_lowest_id_of_the_largest_logits) {
    const float plain[] = {1, 3, 2, 3, 0}, single[] = {-5}, nans[] = {NAN, NAN, NAN};
    const float mixed[] = {NAN, -2, NAN, -1, -INFINITY}, minus[] = {-INFINITY, -INFINITY};
    const float inf[] = {1, 2, INFINITY, INFINITY}, infs[] = {NAN, INFINITY, -INFINITY};
    const float zeros[] = {-0.0f, 0.0f}, large[] = {3e38f, 3.4028235e38f, -3e38f};
    const float last[] = {-INFINITY, NAN, -3.4028235e38f};
    CHECK(greedy(plain, 5) == 1); // the lowest id among equals
    CHECK(greedy(single, 1) == 0);
    CHECK(greedy(nans, 3) == 0);
    CHECK(greedy(mixed, 5) == 3);
    CHECK(greedy(minus, 2) == 0);
    CHECK(greedy(inf, 4) == 2);
    CHECK(greedy(infs, 3) == 0); // nothing finite
    CHECK(greedy(zeros, 2) == 0);
    CHECK(greedy(large, 3) == 1);
    CHECK(greedy(last, 3) == 2);
    // padding rows are never chosen; top_k and others do not matter
    moe_sampler_options options = defaults();
    options.top_k = 3, options.top_p = 0.1f, options.min_p = 1, options.temperature = -1;
    moe_sampler *sampler = moe_sampler_open(&options, 5, 1, NULL);
    CHECK(moe_sampler_sample(sampler, plain) == 0);
    moe_sampler_close(sampler);
    sampler = moe_sampler_open(&options, 5, 3, NULL);
    CHECK(moe_sampler_sample(sampler, plain) == 1);
    moe_sampler_close(sampler);
}

// The same with a temperature: what is not finite is never drawn unless it must be.
TEST(what_is_not_finite_is_never_drawn_unless_it_must_be) {
    const float mixed[] = {NAN, -2, -INFINITY, -1, NAN}, nans[] = {NAN, -INFINITY, INFINITY};
    const float inf[] = {1, INFINITY, 3, INFINITY};
    const float far[] = {-3.4028235e38f, 3.4028235e38f, -3.4028235e38f};
    for (int k = -1; k < 5; k++)
        for (int p = 0; p < 4; p++) {
            moe_sampler_options options = defaults();
            options.temperature = p == 3 ? 1e-30f : 0.7f, options.top_k = k;
            options.top_p = p == 1 ? 0.99f : 0, options.min_p = p == 2 ? 0.001f : 0;
            moe_sampler *five = open_sampler(&options, 5), *three = open_sampler(&options, 3);
            moe_sampler *four = open_sampler(&options, 4);
            for (int i = 0; i < 200; i++) {
                int32_t token = moe_sampler_sample(five, mixed);
                CHECK(token == 1 || token == 3);
                CHECK(moe_sampler_sample(three, nans) == 0);
                token = moe_sampler_sample(four, inf);
                CHECK(token == 1 || token == 3);
                CHECK(moe_sampler_sample(three, far) == 1);
            }
            moe_sampler_close(five), moe_sampler_close(three), moe_sampler_close(four);
        }
}

// ---- sampler: filters ------------------------------------------------------------------------

typedef struct weighted {
    double logit, weight;
    int id;
} weighted;
static int weighted_compare(const void *a, const void *b) {
    const weighted *x = (const weighted *)a, *y = (const weighted *)b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id - y->id;
}

// All filters by their definitions: sort everything, then cut. probability[id] = 0 for what is
// dropped. Returns how many stay; *margin: how close a comparison of top-p or min-p was.
static int reference(const float *logits, int n, const moe_sampler_options *o,
                     double *probability, double *margin) {
    weighted *w = (weighted *)malloc((size_t)n * sizeof *w);
    int kept = 0;
    double total = 0, sum = 0;
    *margin = 1;
    for (int i = 0; i < n; i++) {
        probability[i] = 0;
        if (!(logits[i] > -INFINITY)) continue;
        w[kept].logit = logits[i];
        w[kept++].id = i;
    }
    qsort(w, (size_t)kept, sizeof *w, weighted_compare);
    if (o->top_k > 0 && o->top_k < kept) kept = o->top_k;
    for (int i = 0; i < kept; i++) total += exp(w[i].logit - w[0].logit);
    if (o->top_p > 0 && o->top_p < 1)
        for (int i = 0; i < kept; i++) {
            sum += exp(w[i].logit - w[0].logit);
            *margin = fmin(*margin, fabs(sum / total - (double)o->top_p));
            if (sum / total >= (double)o->top_p) kept = i + 1;
        }
    if (o->min_p > 0) {
        int all = kept;
        kept = 1;
        for (int i = 1; i < all; i++) {
            double ratio = exp(w[i].logit - w[0].logit);
            double least = fmin(o->min_p, 1); // more cannot be asked for
            if (least < 1) *margin = fmin(*margin, fabs(ratio - least));
            if (ratio >= least) kept = i + 1;
        }
    }
    total = 0;
    for (int i = 0; i < kept; i++)
        total += w[i].weight = exp((w[i].logit - w[0].logit) / (double)o->temperature);
    for (int i = 0; i < kept; i++) probability[w[i].id] = w[i].weight / total;
    free(w);
    return kept;
}

// Runs the sampler's filters and compares the set that stays; the draw that follows is tested by
// its distribution.
static void check_filters(const float *logits, int n, const moe_sampler_options *o) {
    double *probability = (double *)malloc((size_t)n * sizeof *probability), margin;
    int expected = reference(logits, n, o, probability, &margin);
    moe_sampler *sampler = open_sampler(o, n);
    int32_t token = moe_sampler_sample(sampler, logits);
    CHECK(token >= 0 && token < n);
    if (margin > 1e-9) {
        CHECKF(probability[token] > 0, "n %d k %d p %g min %g: token %d", n, o->top_k,
               (double)o->top_p, (double)o->min_p, token);
        // with top-k the kept candidates lie at the front of the sampler's list, else `last` says
        // which is the last one of them
        int same = 0;
        for (int i = 0; o->top_k > 0 && i < expected; i++)
            same += probability[sampler->candidates[i].id] > 0;
        for (int i = 0; o->top_k <= 0 && i < n; i++) {
            const moe__candidate c = {logits[i], i};
            const int kept = !moe__candidate_before(sampler->last, c);
            same += kept && probability[i] > 0;
            if (kept && probability[i] == 0) same = INT32_MIN;
        }
        CHECKF(same == expected, "n %d k %d p %g min %g: %d of %d", n, o->top_k,
               (double)o->top_p, (double)o->min_p, same, expected);
    }
    moe_sampler_close(sampler);
    free(probability);
}

TEST(filters_keep_the_right_candidates) {
    static const int sizes[] = {1, 2, 3, 7, 64, 65, 100, 512, 513, 5000};
    static const int ks[] = {0, 1, 2, 5, 40, 63, 64, 65, 100, 511, 100000};
    static const float ps[] = {0, 1e-6f, 0.1f, 0.5f, 0.9f, 0.95f, 0.999f, 0.9999999f, 1, 2};
    static const float mins[] = {0, 1e-4f, 0.05f, 0.5f, 1, 2};
    float *logits = (float *)malloc(5000 * sizeof *logits);
    for (int s = 0; s < 10; s++)
        for (int shape = 0; shape < 4; shape++) {
            for (int i = 0; i < sizes[s]; i++) {
                double x = random_unit() + random_unit() + random_unit() - 1.5;
                if (shape == 0) x *= 10;               // peaked
                if (shape == 1) x *= 0.1;              // flat
                if (shape == 2) x = floor(x * 4);      // many ties
                if (shape == 3) x = -i * 0.01;         // sorted
                logits[i] = (float)x;
            }
            for (int k = 0; k < 11; k++)
                for (int p = 0; p < 10; p++)
                    for (int m = 0; m < 6; m++) {
                        moe_sampler_options o = defaults();
                        if (sizes[s] > 1000 && (k * 7 + p * 3 + m) % 5) continue;
                        o.temperature = 1, o.top_k = ks[k], o.top_p = ps[p], o.min_p = mins[m];
                        check_filters(logits, sizes[s], &o);
                    }
        }
    free(logits);
}

// Everything by the definitions, one step after the other: penalties, sorting, filters, the draw.
// Without top-k the draw goes by id, else in order of the logits if these were sorted.
typedef struct slow {
    const moe_sampler_options *options;
    int n, n_recent;
    const int32_t *recent; // the last of them count
    uint64_t random;
    int close; // a comparison that rounding may decide otherwise
} slow;

static float slow_logit(const slow *s, const float *logits, int id) {
    const moe_sampler_options *o = s->options;
    const int window = o->repeat_last_n == MOE_OFF ? 0 : o->repeat_last_n ? o->repeat_last_n : 64;
    float x = logits[id];
    int recent = 0;
    for (int i = s->n_recent - 1; i >= 0 && i >= s->n_recent - window; i--)
        recent |= s->recent[i] == id;
    if (recent && o->repeat_penalty > 0)
        x = x > 0 ? x / o->repeat_penalty : x * o->repeat_penalty;
    if (x < -3.4028235e38f && logits[id] > -INFINITY) x = -3.4028235e38f;
    return x > 3.4028235e38f ? 3.4028235e38f : x;
}
static int weighted_by_id(const void *a, const void *b) {
    return ((const weighted *)a)->id - ((const weighted *)b)->id;
}
static int32_t slow_draw(slow *s, const weighted *w, int n, double max) {
    uint64_t z = s->random += 0x9E3779B97F4A7C15u;
    double total = 0, sum = 0;
    int i = 0;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    const double unit = (double)((z ^ z >> 31) >> 11) / 9007199254740992.0;
    const double temperature = (double)s->options->temperature;
    for (int j = 0; j < n; j++) total += exp((w[j].logit - max) / temperature);
    for (; i < n; i++) {
        sum += exp((w[i].logit - max) / temperature);
        s->close |= fabs(sum - unit * total) < total * 1e-9;
        if (sum > unit * total) break;
    }
    return w[i < n ? i : n - 1].id;
}
static int32_t slow_sample(slow *s, const float *logits, weighted *w) {
    const moe_sampler_options *o = s->options;
    int n = 0, n_finite = 0, sorted = 0;
    double total = 0, sum = 0;
    s->close = 0;
    for (int i = 0; i < s->n; i++) {
        n_finite += logits[i] > -INFINITY && logits[i] < INFINITY;
        w[n].logit = (double)slow_logit(s, logits, i);
        w[n].id = i;
        n += logits[i] > -INFINITY;
    }
    if (!n_finite) return 0;
    qsort(w, (size_t)n, sizeof *w, weighted_compare);
    const double max = w[0].logit;
    if (o->temperature <= 0) return w[0].id;
    if (o->top_k > 0 && o->top_k < n) n = o->top_k, sorted = 1;
    for (int i = 0; i < n; i++) total += exp(w[i].logit - max);
    if (o->top_p > 0 && o->top_p < 1) {
        int kept = 0;
        while (kept < n && (kept == 0 || sum < (double)o->top_p * total)) {
            sum += exp(w[kept++].logit - max);
            s->close |= fabs(sum - (double)o->top_p * total) < total * 1e-9;
        }
        n = kept, sorted = o->top_k > 0;
    }
    if (o->min_p > 0) {
        const double least = o->min_p < 1 ? max + log((double)o->min_p) : max;
        while (w[n - 1].logit < least) n--;
    }
    if (!sorted) qsort(w, (size_t)n, sizeof *w, weighted_by_id);
    return slow_draw(s, w, n, max);
}

static float odd_logit(int shape) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f, 0, 3.4028235e38f, -3.4028235e38f,
                                1e-45f, -NAN};
    double x = random_unit() + random_unit() + random_unit() - 1.5;
    switch (shape) {
    case 0: return (float)(x * 12);
    case 1: return (float)x;
    case 2: return (float)floor(x * 4);                                  // many ties
    case 3: return 1.5f;                                                 // nothing else
    case 4: return random_u32() % 4 ? (float)(x * 9) : odd[random_u32() % 9];
    case 5: return random_u32() % 50 ? -INFINITY : (float)(x * 3);       // few candidates
    case 6: return odd[random_u32() % 9];
    default: return random_u32() % 50 ? (float)x : (float)(x * 3e-3) + 9; // a few far above
    }
}

// One setting: five choices in a row, each accepted, with tokens that were there before.
static void check_against_slow(const moe_sampler_options *o, const float *logits, int n_vocab,
                               int n_valid, weighted *w) {
    enum { BEFORE = 200, TURNS = 5 };
    int32_t recent[BEFORE + TURNS];
    slow s = {o, n_valid, (int)(random_u32() % BEFORE), recent, o->seed, 0};
    moe_sampler *sampler = moe_sampler_open(o, n_vocab, n_valid, NULL);
    const int spread = random_u32() % 2 ? 20 : n_vocab + 10; // often the same ones, or not
    CHECK(sampler != NULL);
    if (!sampler) return;
    for (int i = 0; i < s.n_recent; i++) {
        recent[i] = (int32_t)(random_u32() % (uint32_t)spread) - 5;
        moe_sampler_accept(sampler, recent[i]);
    }
    for (int turn = 0; turn < TURNS; turn++) {
        const int32_t expected = slow_sample(&s, logits, w);
        const int32_t token = moe_sampler_sample(sampler, logits);
        CHECKF(token == expected || s.close, "n %d of %d k %d p %g min %g T %g penalty %g last %d: "
               "%d, expected %d", n_valid, n_vocab, (int)o->top_k, (double)o->top_p,
               (double)o->min_p, (double)o->temperature, (double)o->repeat_penalty,
               (int)o->repeat_last_n, (int)token, (int)expected);
        moe_sampler_accept(sampler, token);
        recent[s.n_recent++] = token;
    }
    moe_sampler_close(sampler);
}

TEST(all_settings_agree_with_a_slow_sampler) {
    enum { MOST = 40000, P = MOE__PEAK };
    static const int sizes[] = {1, 2, 3, 15, 16, 17, P - 1, P, P + 1, 2 * P, 777, 5 * P + 1, 4000,
                                64 * P - 1, 64 * P, 64 * P + 1, MOST};
    static const int ks[] = {0, 0, 0, 1, 2, 3, 5, 6, 7, 31, 40, 63, 64, 65, 300, 1000, 1 << 30};
    static const float ps[] = {0, 0, 0.1f, 0.5f, 0.9f, 0.95f, 0.9999f, 1};
    static const float mins[] = {0, 0, 0.05f, 0.9f, 1e-30f, 1};
    static const float temperatures[] = {0, 0.8f, 1, 0.01f, 30};
    static const float penalties[] = {0, 1, 1.1f, 0.8f, 5, 0.01f, 1e-38f, 3e38f};
    static const int lasts[] = {0, MOE_OFF, 1, 7, 100, 1000};
    float *logits = (float *)malloc(MOST * sizeof *logits);
    weighted *w = (weighted *)malloc((MOST + 1) * sizeof *w);
    for (int round = 0; round < 6000; round++) {
        const int large = round % 40 == 0;
        const int n = sizes[large ? 12 + random_u32() % 5 : random_u32() % 12];
        const int shape = (int)(random_u32() % 8);
        const int n_valid = random_u32() % 4 ? n : 1 + (int)(random_u32() % (uint32_t)n);
        moe_sampler_options o = defaults();
        for (int i = 0; i < n; i++) logits[i] = odd_logit(shape);
        o.temperature = temperatures[random_u32() % 5], o.top_k = ks[random_u32() % 17];
        o.top_p = ps[random_u32() % 8], o.min_p = mins[random_u32() % 6], o.seed = random_u32();
        o.repeat_penalty = penalties[random_u32() % 8];
        o.repeat_last_n = lasts[random_u32() % 6];
        check_against_slow(&o, logits, n, n_valid, w);
    }
    free(w);
    free(logits);
}

// Tokens do not depend on the instruction set: the sums have the same bits.
TEST(instruction_sets_choose_alike) {
    enum { N = 5000 + 77 };
    float *logits = (float *)malloc(N * sizeof *logits);
    for (int setting = 0; setting < 16; setting++) {
        moe_sampler_options o = defaults();
        o.temperature = setting & 1 ? 0.7f : 1.3f, o.top_p = setting & 2 ? 0.9f : 0;
        o.min_p = setting & 4 ? 0.01f : 0, o.top_k = setting & 8 ? 50 : 0;
        moe_sampler *best = open_sampler(&o, N);
        for (int isa = MOE_ISA_SCALAR; isa <= MOE_ISA_AVX_VNNI; isa++) {
            moe_sampler *other = open_sampler(&o, N);
            other->kernels = moe__kernels_get((moe_isa)isa);
            best->random = o.seed;
            for (int turn = 0; turn < 20; turn++) {
                for (int i = 0; i < N; i++) logits[i] = odd_logit(setting & 1);
                int32_t token = moe_sampler_sample(best, logits);
                CHECK(moe_sampler_sample(other, logits) == token);
                if (o.top_k) continue;
                CHECK(!memcmp(best->sums, other->sums, moe__logits_blocks(N) * sizeof(double)));
                CHECK(best->last.logit == other->last.logit && best->last.id == other->last.id);
            }
            moe_sampler_close(other);
        }
        moe_sampler_close(best);
    }
    free(logits);
}

// The limit of min-p is a float: the lowest one that is likely enough.
TEST(the_limit_of_min_p_is_the_lowest_float_allowed) {
    for (int i = 0; i < 20000; i++) {
        const float max = (float)((random_unit() - 0.5) * (i % 3 ? 50 : 1e-3));
        const float p = (float)pow(random_unit(), i % 7 + 1), limit = moe__candidates_limit(max, p);
        if (p <= 0) continue;
        CHECK((double)limit >= (double)max + log((double)p));
        CHECK((double)nextafterf(limit, -INFINITY) < (double)max + log((double)p));
    }
    CHECK(moe__candidates_limit(5, 1) == 5 && moe__candidates_limit(-5, 7) == -5);
    CHECK(moe__candidates_limit(-3.4028235e38f, 1e-45f) == -3.4028235e38f);
}

// Probabilities that reach p exactly; of equals the lower ids stay.
TEST(top_p_keeps_the_lower_ids_of_equals) {
    const float logits[] = {0, 0, 0, 0};
    for (int k = 1; k <= 4; k++) {
        moe_sampler_options o = defaults();
        int seen = 0;
        o.temperature = 1, o.top_p = 0.25f * (float)k;
        moe_sampler *sampler = open_sampler(&o, 4);
        for (int i = 0; i < 200; i++) seen |= 1 << moe_sampler_sample(sampler, logits);
        CHECK(seen == (1 << k) - 1);
        moe_sampler_close(sampler);
    }
}

// The same where many are equal, some slots wide apart, over several blocks: the set that stays is
// exactly the one that was asked for.
TEST(top_p_keeps_exactly_as_many_equals_as_it_needs) {
    enum { N = 1000 };
    float logits[N];
    for (int i = 0; i < N; i++) logits[i] = i % 10 ? 0 : -200; // 900 equal ones
    for (int kept = 1; kept <= 900; kept += kept < 4 ? 1 : 37) {
        moe_sampler_options o = defaults();
        int largest = 0;
        o.temperature = 1, o.top_p = ((float)kept - 0.5f) / 900;
        moe_sampler *sampler = open_sampler(&o, N);
        for (int i = 0; i < 300; i++)
            largest = (int)moe__max(largest, moe_sampler_sample(sampler, logits));
        const int last = (kept - 1) / 9 * 10 + (kept - 1) % 9 + 1; // the kept-th equal one
        CHECKF(sampler->last.id == last && sampler->last.logit == 0, "%d: %d, expected %d", kept,
               (int)sampler->last.id, last);
        CHECK(largest <= last);
        moe_sampler_close(sampler);
    }
}

// Chi-squared over 200,000 draws: 23 tokens of any probability, so at most 22 degrees of freedom;
// 60 is passed by chance once in 100,000 tests, and the seeds are fixed.
TEST(draws_have_the_distribution_asked_for) {
    enum { N = 23, DRAWS = 200000 };
    static const float settings[][4] = {// temperature, top_k, top_p, min_p
                                        {1, 0, 0, 0},        {0.5f, 0, 0, 0},   {3, 0, 0, 0},
                                        {1, 5, 0, 0},        {1, 0, 0.7f, 0},   {1, 0, 0, 0.2f},
                                        {0.8f, 12, 0.9f, 0}, {2, 10, 0.8f, 0.3f}, {1, 22, 0.99f, 0},
                                        {1e30f, 8, 0, 0}};
    float logits[N];
    for (int i = 0; i < N; i++) logits[i] = (float)((i * 7 % N) * 0.2 - 1);
    logits[4] = logits[5];
    for (int s = 0; s < 10; s++) {
        moe_sampler_options o = defaults();
        double probability[N], margin, chi = 0;
        int counts[N];
        memset(counts, 0, sizeof counts);
        o.temperature = settings[s][0], o.top_k = (int)settings[s][1];
        o.top_p = settings[s][2], o.min_p = settings[s][3], o.seed = (uint64_t)s;
        reference(logits, N, &o, probability, &margin);
        moe_sampler *sampler = open_sampler(&o, N);
        for (int i = 0; i < DRAWS; i++) counts[moe_sampler_sample(sampler, logits)]++;
        for (int i = 0; i < N; i++) {
            double expected = probability[i] * DRAWS;
            if (probability[i] == 0) CHECKF(counts[i] == 0, "setting %d token %d", s, i);
            else chi += (counts[i] - expected) * (counts[i] - expected) / expected;
        }
        CHECKF(chi < 60, "setting %d: chi squared %g", s, chi);
        moe_sampler_close(sampler);
    }
}

TEST(the_same_seed_draws_the_same_tokens) {
    enum { N = 1000, DRAWS = 200 };
    float logits[N], copy[N];
    int32_t first[DRAWS];
    int differences = 0;
    for (int i = 0; i < N; i++) logits[i] = (float)random_unit();
    memcpy(copy, logits, sizeof copy);
    for (int run = 0; run < 3; run++) {
        moe_sampler_options o = defaults();
        o.temperature = 1, o.top_p = 0.95f, o.seed = run < 2 ? 42 : 43;
        moe_sampler *sampler = open_sampler(&o, N);
        for (int i = 0; i < DRAWS; i++) {
            int32_t token = moe_sampler_sample(sampler, logits);
            if (run == 0) first[i] = token;
            if (run == 1) CHECK(token == first[i]);
            if (run == 2) differences += token != first[i];
        }
        moe_sampler_close(sampler);
    }
    CHECK(differences > DRAWS / 2);
    CHECK(memcmp(copy, logits, sizeof copy) == 0);
    // the generator's published values for the seed 1234567
    static const uint64_t published[] = {6457827717110365317u, 3203168211198807973u,
                                         9817491932198370423u, 4593380528125082431u,
                                         16408922859458223821u};
    moe_sampler_options o = defaults();
    o.seed = 1234567;
    moe_sampler *sampler = open_sampler(&o, 1);
    for (int i = 0; i < 5; i++)
        CHECK(moe__sampler_random(sampler) == (double)(published[i] >> 11) / 9007199254740992.0);
    moe_sampler_close(sampler);
}

// Steps of ten draws from n tokens, in the worst case for partial sorting.
static uint64_t steps_of_draws(int n, int setting) {
    float *logits = (float *)malloc((size_t)n * sizeof *logits);
    for (int i = 0; i < n; i++) logits[i] = (float)i * 1e-6f; // flat, ascending
    moe_sampler_options o = defaults();
    o.temperature = 1, o.top_k = setting == 0 ? 40 : setting == 1 ? n / 2 : 0;
    o.top_p = setting == 2 ? 0.5f : setting == 3 ? 0.9999f : 0;
    moe_sampler *sampler = open_sampler(&o, n);
    uint64_t start = steps_now();
    for (int i = 0; i < 10; i++) {
        int32_t token = moe_sampler_sample(sampler, logits);
        CHECK(token >= 0 && token < n);
        if (setting == 0) CHECK(token >= n - 40);
        if (setting == 1) CHECK(token >= n / 2);
    }
    start = steps_now() - start;
    moe_sampler_close(sampler);
    free(logits);
    return start;
}

// Vocabularies of real size.
TEST(draws_from_large_vocabularies_take_n_log_n) {
    for (int setting = 0; setting < 4; setting++)
        CHECK_GROWTH(steps_of_draws(160000, setting), steps_of_draws(20000, setting),
                     1.2 * N_LOG_N /* a log more */, "setting", setting);
}

TEST(the_repetition_penalty_counts_recent_tokens_once) {
    moe_sampler_options o = defaults();
    o.repeat_penalty = 2, o.repeat_last_n = 3;
    const float positive[] = {4, 3, 2.5f, 0}, negative[] = {-1, -1.5f, -1.9f, -2.1f};
    moe_sampler *sampler = open_sampler(&o, 4);
    CHECK(moe_sampler_sample(sampler, positive) == 0);
    moe_sampler_accept(sampler, 0); // 4 -> 2
    CHECK(moe_sampler_sample(sampler, positive) == 1);
    CHECK(moe_sampler_sample(sampler, negative) == 1); // -1 -> -2
    moe_sampler_accept(sampler, 0);
    moe_sampler_accept(sampler, 0); // still 2, not 1: once per token
    const float twice[] = {4, 1.9f, 0, 0};
    CHECK(moe_sampler_sample(sampler, twice) == 0);
    moe_sampler_accept(sampler, 1);
    CHECK(moe_sampler_sample(sampler, positive) == 2); // 2, 1.5, 2.5
    moe_sampler_accept(sampler, 3);
    moe_sampler_accept(sampler, 3);
    moe_sampler_accept(sampler, 3); // 0 and 1 are forgotten
    CHECK(moe_sampler_sample(sampler, positive) == 0);
    moe_sampler_accept(sampler, -1); // ids that do not exist do no harm
    moe_sampler_accept(sampler, 4);
    moe_sampler_accept(sampler, INT32_MAX);
    moe_sampler_accept(sampler, INT32_MIN);
    CHECK(moe_sampler_sample(sampler, positive) == 0);
    moe_sampler_close(sampler);
    // the whole window counts, whichever place of the ring a token is in
    o.repeat_last_n = 2;
    for (int turn = 0; turn < 4; turn++) {
        sampler = open_sampler(&o, 4);
        for (int i = 0; i < turn; i++) moe_sampler_accept(sampler, 3);
        moe_sampler_accept(sampler, 0);
        moe_sampler_accept(sampler, 1);
        CHECK(moe_sampler_sample(sampler, positive) == 2);
        moe_sampler_close(sampler);
    }
    // off: 0, 1, MOE_OFF; the default window is 64
    for (int off = 0; off < 4; off++) {
        o = defaults();
        o.repeat_penalty = off == 0 ? 0 : off == 1 ? 1 : 2;
        o.repeat_last_n = off == 2 ? MOE_OFF : 0;
        sampler = open_sampler(&o, 4);
        moe_sampler_accept(sampler, 0);
        CHECK(moe_sampler_sample(sampler, positive) == (off < 3 ? 0 : 1));
        for (int i = 0; i < 63; i++) moe_sampler_accept(sampler, 3);
        CHECK(moe_sampler_sample(sampler, positive) == (off < 3 ? 0 : 1));
        moe_sampler_accept(sampler, 3);
        CHECK(moe_sampler_sample(sampler, positive) == 0);
        moe_sampler_close(sampler);
    }
    // below 1 it favours; tiny ones overflow to the largest float, not to NaN
    o = defaults();
    o.repeat_penalty = 1e-38f;
    sampler = open_sampler(&o, 4);
    moe_sampler_accept(sampler, 2);
    CHECK(moe_sampler_sample(sampler, positive) == 2);
    moe_sampler_close(sampler);
    // a huge one makes finite values no less than finite
    o.repeat_penalty = 3e38f;
    sampler = open_sampler(&o, 4);
    const float lows[] = {-INFINITY, NAN, -100, -INFINITY};
    moe_sampler_accept(sampler, 2), moe_sampler_accept(sampler, 1);
    CHECK(moe_sampler_sample(sampler, lows) == 2);
    moe_sampler_close(sampler);
}

// ---- text stream -----------------------------------------------------------------------------

typedef struct sink {
    char text[8192];
    size_t size;
    int n_calls, stop_at; // the stop_at-th call returns 0
} sink;

// Whole text to valid UTF-8, by the definition of maximal subparts: the longest prefix of what
// is left that begins some character becomes one U+FFFD.
static size_t sanitize(const char *in, size_t size, char *out) {
    size_t n = 0;
    for (size_t i = 0; i < size;) {
        const unsigned char *p = (const unsigned char *)in + i;
        size_t left = size - i, got = 1;
        int need = p[0] < 0x80 ? 1 : p[0] >= 0xC2 && p[0] <= 0xDF ? 2 : (p[0] & 0xF0) == 0xE0 ? 3
                   : p[0] >= 0xF0 && p[0] <= 0xF4 ? 4 : 0;
        if (need > 1 && left > 1 && (p[1] & 0xC0) == 0x80) {
            unsigned code = (unsigned)p[0] << 8 | p[1]; // with the second byte: overlong etc.
            int bad = (p[0] == 0xE0 && code < 0xE0A0) || (p[0] == 0xED && code > 0xED9F) ||
                      (p[0] == 0xF0 && code < 0xF090) || (p[0] == 0xF4 && code > 0xF48F);
            if (!bad)
                for (got = 2; got < left && (int)got < need && (p[got] & 0xC0) == 0x80;) got++;
        }
        if (need && (int)got == need) {
            memcpy(out + n, p, got);
            n += got;
        } else {
            memcpy(out + n, "\xEF\xBF\xBD", 3);
            n += 3;
        }
        i += got;
    }
    return n;
}

static int is_valid(const char *text, size_t size) {
    static char copy[65536];
    return size < sizeof copy / 3 && sanitize(text, size, copy) == size &&
           memcmp(copy, text, size) == 0;
}

static int on_text(void *user, const char *text, size_t size) {
    sink *s = (sink *)user;
    CHECK(size > 0 && is_valid(text, size));
    CHECK(s->size + size <= sizeof s->text);
    if (s->size + size <= sizeof s->text) memcpy(s->text + s->size, text, size);
    s->size += size;
    return ++s->n_calls != s->stop_at;
}

typedef struct stream_test {
    sink out;
    moe_generate_options options;
    moe__stream stream;
    moe__stream_buffer buffer;
} stream_test;

static void stream_begin(stream_test *t, const char *const *stops, size_t n_stops) {
    memset(&t->out, 0, sizeof t->out);
    memset(&t->options, 0, sizeof t->options);
    t->options.on_text = on_text;
    t->options.user = &t->out;
    t->options.stop = stops;
    t->options.n_stop = n_stops;
    CHECK(moe__generate_check_stops(&t->options, NULL) == MOE_OK);
    moe__stream_init(&t->stream, &t->options, &t->buffer);
}

static void expect_text(const stream_test *t, const char *text, size_t size, int line) {
    CHECKF(t->out.size == size && memcmp(t->out.text, text, size) == 0,
           "line %d: \"%.*s\" instead of \"%.*s\"", line, (int)t->out.size, t->out.text,
           (int)size, text);
}
#define EXPECT_TEXT(t, text, size) expect_text(t, text, size, __LINE__)

static const char *const samples[] = {
    "", "a", "hello, world", "gr\xC3\xBC\xC3\x9F", "\xE4\xBD\xA0\xE5\xA5\xBD", "\xF0\x9F\x98\x80!",
    "\xF4\x8F\xBF\xBF\xEF\xBF\xBD\xED\x9F\xBF\xEE\x80\x80\xE0\xA0\x80\xF0\x90\x80\x80\xC2\x80",
    "\x80", "\xFF\xFE", "\xC3", "\xC3(", "\xE4\xBD", "\xE4\xBDx", "\xE4\xBD\xE4\xBD\xA0",
    "\xF0\x9F\x98", "\xF0\x9F\x98\xF0\x9F\x98\x80", "\xC0\xAF", "\xC1\xBF", "\xE0\x80\x80",
    "\xE0\x9F\xBF", "\xED\xA0\x80", "\xED\xBF\xBF", "\xF0\x80\x80\x80", "\xF0\x8F\xBF\xBF",
    "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xC3\xC3\xC3\xBC", "a\xCC\x88\xF0", "\xF1\x80\x80"};
enum { N_SAMPLES = sizeof samples / sizeof samples[0] };

// Every way of cutting a text into three pieces, and byte by byte.
TEST(streams_give_whole_characters_however_text_is_cut) {
    static stream_test t;
    char expected[256];
    for (int s = 0; s < N_SAMPLES; s++) {
        size_t size = strlen(samples[s]), n = sanitize(samples[s], size, expected);
        for (size_t a = 0; a <= size; a++)
            for (size_t b = a; b <= size; b++) {
                stream_begin(&t, NULL, 0);
                moe__stream_push(&t.stream, samples[s], a);
                moe__stream_push(&t.stream, samples[s] + a, b - a);
                moe__stream_push(&t.stream, samples[s] + b, size - b);
                moe__stream_finish(&t.stream);
                EXPECT_TEXT(&t, expected, n);
            }
        stream_begin(&t, NULL, 0);
        for (size_t i = 0; i < size; i++) {
            moe__stream_push(&t.stream, samples[s] + i, 1);
            // What is out is what is sure: the text up to here without an unfinished character.
            size_t whole = sanitize(samples[s], i + 1, expected);
            CHECK(t.out.size == whole || t.out.size == whole - 3);
        }
        moe__stream_finish(&t.stream);
        n = sanitize(samples[s], size, expected);
        EXPECT_TEXT(&t, expected, n);
    }
    // a character comes out with its last byte, not later
    stream_begin(&t, NULL, 0);
    moe__stream_push(&t.stream, "\xF0\x9F\x98", 3);
    CHECK(t.out.n_calls == 0);
    moe__stream_push(&t.stream, "\x80", 1);
    CHECK(t.out.n_calls == 1 && t.out.size == 4);
    moe__stream_push(&t.stream, "a\0b", 3); // NUL is a character
    CHECK(t.out.n_calls == 2 && t.out.size == 7 && t.out.text[5] == 0);
    moe__stream_push(&t.stream, "", 0);
    moe__stream_finish(&t.stream);
    CHECK(t.out.n_calls == 2);
}

// What must be out after `size` bytes of valid text that did not contain a stop string yet: all
// but the longest end that begins one.
static size_t safe_size(const char *text, size_t size, const char *const *stops, size_t n_stops) {
    size_t held = 0;
    for (size_t s = 0; s < n_stops; s++)
        for (size_t n = strlen(stops[s]) - 1; n > held; n--)
            if (n <= size && memcmp(text + size - n, stops[s], n) == 0) held = n;
    return size - held;
}

// Where the text ends: before the stop string that is complete first, and of those that are
// complete there the longest. Returns 1 and *at and *end, or 0.
static int find_stop(const char *text, size_t size, const char *const *stops, size_t n_stops,
                     size_t *at, size_t *end) {
    for (size_t e = 1; e <= size; e++) {
        size_t longest = 0;
        for (size_t s = 0; s < n_stops; s++) {
            size_t n = strlen(stops[s]);
            if (n <= e && n > longest && memcmp(text + e - n, stops[s], n) == 0) longest = n;
        }
        if (longest) {
            *at = e - longest, *end = e;
            return 1;
        }
    }
    return 0;
}

TEST(streams_end_where_a_stop_string_begins) {
    static stream_test t;
    static const char *const sets[][4] = {
        {"stop", NULL},           {"b", "ab", NULL},     {"abc", "b", NULL}, {"aab", NULL},
        {"\xE4\xBD\xA0", NULL},   {"\n\n", NULL},        {"aaaa", "aab", "ba", NULL},
        {"ab\xC3\xBC", "b", NULL}, {"<|end|>", "<|", NULL}, {"\xEF\xBF\xBD", NULL}};
    static const char *const texts[] = {
        "", "a", "ab", "abab", "aab", "aaab", "aaaaaaaab", "ababababc", "xstop", "sstop", "ststop",
        "stostop", "stopstop", "no s", "no st", "sto", "a\xE4\xBD\xA0z", "\xE4\xBD\xA1\xE4\xBD",
        "one\ntwo\n\nthree", "ba", "cba", "ab\xC3\xBC", "ab\xC3\xBD", "a<|en<|end|>", "x\xFFy",
        "<<|end|>", "aabaab", "stop"};
    for (size_t set = 0; set < sizeof sets / sizeof sets[0]; set++) {
        size_t n_stops = 0;
        while (sets[set][n_stops]) n_stops++;
        for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
            char whole[256];
            size_t size = strlen(texts[i]), n = sanitize(texts[i], size, whole), at = 0, end;
            int stops = find_stop(whole, n, sets[set], n_stops, &at, &end);
            for (size_t a = 0; a <= size; a++)
                for (size_t b = a; b <= size; b++) {
                    stream_begin(&t, sets[set], n_stops);
                    moe__stream_push(&t.stream, texts[i], a);
                    moe__stream_push(&t.stream, texts[i] + a, b - a);
                    moe__stream_push(&t.stream, texts[i] + b, size - b);
                    moe__stream_finish(&t.stream);
                    EXPECT_TEXT(&t, whole, stops ? at : n);
                    CHECK(!t.stream.stopped == !stops);
                    if (stops) CHECK(t.stream.reason == MOE_STOP_STRING);
                }
        }
    }
}

// Random texts over few letters against random stop strings: what is out is always exactly what is
// sure, never more, never less.
TEST(streams_hold_back_as_little_as_possible) {
    static stream_test t;
    static const char *const letters[] = {"a", "b", "\xC3\xBC", "\xE4\xBD\xA0"};
    for (int run = 0; run < 20000; run++) {
        char text[256], stops[3][32];
        const char *pointers[3];
        size_t size = 0, at = 0, end = 0, n_stops = random_u32() % 4;
        for (size_t s = 0; s < n_stops; s++) {
            stops[s][0] = 0;
            for (uint32_t n = random_u32() % 5 + 1; n; n--)
                strcat(stops[s], letters[random_u32() % (run % 4 + 1)]);
            pointers[s] = stops[s];
        }
        stream_begin(&t, pointers, n_stops);
        for (int piece = 0; piece < 20; piece++) {
            size_t before = size;
            for (uint32_t n = random_u32() % 3 + 1; n; n--) {
                const char *letter = letters[random_u32() % (run % 4 + 1)];
                memcpy(text + size, letter, strlen(letter));
                size += strlen(letter);
            }
            moe__stream_push(&t.stream, text + before, size - before);
            if (find_stop(text, size, pointers, n_stops, &at, &end)) break;
            EXPECT_TEXT(&t, text, safe_size(text, size, pointers, n_stops));
        }
        int stopped = find_stop(text, size, pointers, n_stops, &at, &end);
        CHECK(!t.stream.stopped == !stopped);
        moe__stream_finish(&t.stream);
        EXPECT_TEXT(&t, text, stopped ? at : size);
    }
}

// Random bytes, mostly such as characters begin and go on with.
TEST(streams_make_random_bytes_valid_text) {
    static stream_test t;
    static const unsigned char likely[] = {0xC3, 0xE4, 0xED, 0xF0, 0xF4, 0x80, 0x8F, 0x90, 0x9F,
                                           0xA0, 0xBF, 'a',  0,    0xC0, 0xFF, 0xE0};
    for (int run = 0; run < 20000; run++) {
        char bytes[64], expected[256];
        size_t size = random_u32() % sizeof bytes;
        for (size_t i = 0; i < size; i++)
            bytes[i] = (char)(random_u32() % 8 ? likely[random_u32() % 16] : random_u32());
        stream_begin(&t, NULL, 0);
        for (size_t i = 0; i < size;) {
            size_t n = random_u32() % 5 + 1;
            if (n > size - i) n = size - i;
            moe__stream_push(&t.stream, bytes + i, n);
            i += n;
        }
        moe__stream_finish(&t.stream);
        EXPECT_TEXT(&t, expected, sanitize(bytes, size, expected));
    }
}

TEST(streams_bear_the_longest_stops_and_end_when_told) {
    static stream_test t;
    static char stop[MOE__MAX_STOP + 2], text[6000];
    const char *pointer = stop;
    memset(stop, 'a', MOE__MAX_STOP);
    memset(text, 'a', sizeof text);
    // the longest stop string, one byte short of it, then something else, then it itself
    for (size_t chunk = 1; chunk <= 6000; chunk = chunk * 7 + 3) {
        stream_begin(&t, &pointer, 1);
        for (size_t i = 0; i < MOE__MAX_STOP - 1; i++) moe__stream_push(&t.stream, "a", 1);
        CHECK(t.out.size == 0);
        moe__stream_push(&t.stream, "b", 1);
        CHECK(t.out.size == MOE__MAX_STOP);
        for (size_t i = 0; i < sizeof text; i += chunk)
            moe__stream_push(&t.stream, text, chunk < sizeof text - i ? chunk : sizeof text - i);
        CHECK(t.stream.stopped && t.stream.reason == MOE_STOP_STRING);
        CHECK(t.out.size == MOE__MAX_STOP);
        moe__stream_push(&t.stream, "more", 4);
        moe__stream_finish(&t.stream);
        CHECK(t.out.size == MOE__MAX_STOP);
    }
    // pieces larger than the buffer
    stream_begin(&t, NULL, 0);
    moe__stream_push(&t.stream, text, sizeof text);
    EXPECT_TEXT(&t, text, sizeof text);
    CHECK(t.out.n_calls >= 3);
    // no callback
    stream_begin(&t, NULL, 0);
    t.options.on_text = NULL;
    moe__stream_push(&t.stream, text, sizeof text);
    moe__stream_finish(&t.stream);
    CHECK(!t.stream.stopped);
    // the callback ends it
    for (int k = 1; k < 4; k++) {
        stream_begin(&t, NULL, 0);
        t.out.stop_at = k;
        for (int i = 0; i < 5; i++) moe__stream_push(&t.stream, "abc", 3);
        moe__stream_finish(&t.stream);
        CHECK(t.out.n_calls == k && t.out.size == 3 * (size_t)k);
        CHECK(t.stream.stopped && t.stream.reason == MOE_STOP_CALLER);
    }
    // then neither text that was held back nor half a character comes after it
    stop[0] = 'x', stop[1] = 'y', stop[2] = 0;
    stream_begin(&t, &pointer, 1);
    t.out.stop_at = 1;
    moe__stream_push(&t.stream, "abx", 3);
    moe__stream_push(&t.stream, "\xC3", 1);
    moe__stream_finish(&t.stream);
    CHECK(t.out.n_calls == 1 && t.out.size == 2);
}

TEST(bad_stop_strings_are_refused) {
    static char longest[MOE__MAX_STOP + 2];
    const char *bad[] = {NULL, "", "\xFF", "a\x80", "\xC3", "ab\xE4\xBD", "\xED\xA0\x80", longest};
    moe_generate_options options;
    moe_error error;
    memset(longest, 'a', MOE__MAX_STOP + 1);
    for (int i = 0; i < 8; i++) {
        const char *stops[] = {"good", bad[i]};
        memset(&options, 0, sizeof options);
        memset(&error, 0, sizeof error);
        options.stop = stops;
        options.n_stop = 2;
        CHECKF(moe__generate_check_stops(&options, &error) == MOE_ERROR_ARGUMENT, "%d", i);
        CHECK(error.status == MOE_ERROR_ARGUMENT && !strcmp(error.where, "stop"));
        options.n_stop = 1;
        CHECK(moe__generate_check_stops(&options, &error) == MOE_OK);
    }
    longest[MOE__MAX_STOP] = 0;
    const char *stops[] = {longest};
    options.stop = stops;
    CHECK(moe__generate_check_stops(&options, &error) == MOE_OK);
    options.stop = NULL;
    CHECK(moe__generate_check_stops(&options, &error) == MOE_ERROR_ARGUMENT);
}

// ---- generating ------------------------------------------------------------------------------

static const int32_t prompt[] = {5, 77, 130, 9, 300, 41};
enum { N_PROMPT = 6 };

static moe_session *open_session(const moe_model *model, int n_ctx) {
    moe_session_options options;
    moe_error error;
    memset(&options, 0, sizeof options);
    options.n_ctx = n_ctx;
    options.n_threads = 1;
    moe_session *session = moe_session_open(model, &options, &error);
    if (!session) printf("  session: %s: %s\n", error.where, error.text), exit(1);
    return session;
}

// By hand: n tokens, or fewer if the model ends or the context is full.
static int by_hand(const moe_model *model, const moe_sampler_options *options, int n_ctx, int n,
                   int ignore_end, int special, int32_t *tokens, char *text, size_t *size) {
    const moe_vocab *vocab = moe_model_vocab(model);
    int n_vocab = moe_model_get_info(model)->n_vocab, done = 0;
    moe_session *session = open_session(model, n_ctx);
    moe_sampler *sampler = moe_sampler_open(options, n_vocab, moe_vocab_size(vocab), NULL);
    static char raw[65536];
    size_t n_raw = 0;
    CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
    for (int i = 0; i < N_PROMPT; i++) moe_sampler_accept(sampler, prompt[i]);
    while (done < n) {
        int32_t token = moe_sampler_sample(sampler, moe_session_logits(session, -1));
        if (!ignore_end && moe_vocab_is_end(vocab, token)) break;
        tokens[done++] = token;
        if (special && moe_vocab_is_control(vocab, token)) {
            moe_string name = moe_vocab_token(vocab, token);
            memcpy(raw + n_raw, name.data, name.size);
            n_raw += name.size;
        } else {
            n_raw += moe_vocab_text(vocab, token, raw + n_raw, sizeof raw - n_raw);
        }
        if (moe_session_eval(session, &token, 1, NULL) != MOE_OK) break;
        moe_sampler_accept(sampler, token);
    }
    *size = sanitize(raw, n_raw, text);
    moe_sampler_close(sampler);
    moe_session_close(session);
    return done;
}

static moe_model *tiny_model(void) {
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    if (!model || !moe_model_vocab(model)) puts("  no model"), exit(1);
    return model;
}

TEST(generate_does_what_a_loop_by_hand_does) {
    static char text[65536];
    static sink s;
    int32_t tokens[256];
    int n_ends = 0, n_ignored = 0;
    moe_model *model = tiny_model();
    int n_vocab = moe_model_get_info(model)->n_vocab;
    int n_valid = moe_vocab_size(moe_model_vocab(model));
    for (int run = 0; run < 40; run++) {
        moe_sampler_options so = defaults();
        moe_generate_options o;
        moe_generate_result result;
        moe_error error;
        size_t size;
        memset(&o, 0, sizeof o);
        memset(&s, 0, sizeof s);
        memset(&result, 0xAA, sizeof result);
        so.temperature = run < 4 ? 0 : 3, so.seed = (uint64_t)run, so.repeat_penalty = 1.1f;
        o.ignore_end = run % 3 == 0 ? MOE_ON : 0, o.special = run % 2 ? MOE_ON : 0;
        o.max_tokens = run % 5 == 4 ? 0 : 50, o.on_text = on_text, o.user = &s;
        int n_ctx = 100;
        int n = by_hand(model, &so, n_ctx, o.max_tokens ? 50 : 256, o.ignore_end == MOE_ON,
                        o.special == MOE_ON, tokens, text, &size);
        moe_session *session = open_session(model, n_ctx);
        moe_sampler *sampler = moe_sampler_open(&so, n_vocab, n_valid, NULL);
        o.sampler = sampler;
        if (run == 3) { // without a sampler: greedy, no penalty
            so.repeat_penalty = 0;
            n = by_hand(model, &so, n_ctx, 50, 1, 1, tokens, text, &size);
            o.sampler = NULL;
        }
        moe_status status = moe_generate(session, prompt, N_PROMPT, &o, &result, &error);
        CHECK(status == MOE_OK);
        CHECK(result.n_prompt == N_PROMPT && result.n_generated == n);
        const int held = result.next_token < 0 || result.reason == MOE_STOP_END ? n : n - 1;
        CHECK(moe_session_length(session) == N_PROMPT + held);
        CHECKF(s.size == size && memcmp(s.text, text, size) == 0, "run %d: %d and %d bytes", run,
               (int)s.size, (int)size);
        CHECK(result.prompt_seconds > 0 && result.generate_seconds > 0);
        moe_stop_reason reason = n == 50 ? MOE_STOP_LIMIT
                                 : n == n_ctx - N_PROMPT + 1 ? MOE_STOP_CONTEXT : MOE_STOP_END;
        CHECKF(result.reason == reason, "run %d: %d instead of %d", run, (int)result.reason,
               (int)reason);
        n_ends += reason == MOE_STOP_END;
        for (int i = 0; i < n; i++)
            n_ignored += moe_vocab_is_end(moe_model_vocab(model), tokens[i]) != 0;
        moe_sampler_close(sampler);
        moe_session_close(session);
    }
    printf("  %d runs ended by the model, %d ends ignored\n", n_ends, n_ignored);
    CHECK(n_ends > 0 && n_ignored > 0);
    moe_model_close(model);
}

TEST(generating_in_two_calls_gives_the_same_text) {
    static sink whole, parts;
    moe_model *model = tiny_model();
    moe_generate_options o;
    moe_generate_result result;
    memset(&o, 0, sizeof o);
    memset(&whole, 0, sizeof whole);
    memset(&parts, 0, sizeof parts);
    o.ignore_end = MOE_ON, o.on_text = on_text, o.user = &whole, o.max_tokens = 20;
    moe_session *session = open_session(model, 64);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    CHECK(result.n_generated == 20 && result.reason == MOE_STOP_LIMIT);
    moe_session_close(session);
    session = open_session(model, 64);
    o.user = &parts, o.max_tokens = 8;
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    CHECK(parts.size < whole.size);
    o.max_tokens = 12;
    const int32_t next = result.next_token;
    CHECK(moe_generate(session, &next, 1, &o, &result, NULL) == MOE_OK);
    CHECK(result.n_prompt == 1 && result.n_generated == 12);
    CHECK(moe_session_length(session) == N_PROMPT + 19);
    CHECK(parts.size == whole.size && memcmp(parts.text, whole.text, whole.size) == 0);
    // nothing to report to, no result wanted, no options: until the end or a full context
    CHECK(moe_generate(session, NULL, 0, NULL, NULL, NULL) == MOE_OK);
    moe_session_close(session);
    moe_model_close(model);
}

TEST(generation_ends_at_stop_strings_and_by_the_callback) {
    static sink s, full;
    moe_model *model = tiny_model();
    moe_generate_options o;
    moe_generate_result result;
    memset(&o, 0, sizeof o);
    memset(&full, 0, sizeof full);
    o.ignore_end = MOE_ON, o.on_text = on_text, o.user = &full, o.max_tokens = 40;
    moe_session *session = open_session(model, 64);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    CHECK(full.size > 40 && full.size < sizeof full.text);
    o.user = &s;
    // every piece of the text as a stop string: the text ends where it first appears
    for (size_t from = 0; from + 4 < full.size; from += 1 + full.size / 20)
        for (size_t n = 1; n <= 12; n += 11) {
            char stop[16];
            const char *stops[1] = {stop};
            size_t at = 0, end = 0;
            if (from + n > full.size || !is_valid(full.text + from, n)) continue;
            if (memchr(full.text + from, 0, n)) continue;
            memcpy(stop, full.text + from, n);
            stop[n] = 0;
            memset(&s, 0, sizeof s);
            o.stop = stops, o.n_stop = 1;
            CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
            CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
            CHECK(find_stop(full.text, full.size, stops, 1, &at, &end));
            CHECK(result.reason == MOE_STOP_STRING);
            CHECK(s.size == at && memcmp(s.text, full.text, at) == 0);
            CHECK(moe_session_length(session) == N_PROMPT + result.n_generated - 1);
        }
    o.stop = NULL, o.n_stop = 0;
    // the callback stops it
    for (int k = 1; k < 6; k++) {
        memset(&s, 0, sizeof s);
        s.stop_at = k;
        CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
        CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        CHECK(result.reason == MOE_STOP_CALLER && s.n_calls == k);
    }
    moe_session_close(session);
    moe_model_close(model);
}

// A callback that uses the session itself: rewinds it, evaluates, has an evaluation cancelled.
typedef struct meddler {
    moe_session *session;
    int how, cancel;
} meddler;
static int meddler_stop(void *user) { return ((meddler *)user)->cancel; }
static int on_text_meddle(void *user, const char *text, size_t size) {
    meddler *m = (meddler *)user;
    (void)text, (void)size;
    if (m->how == 0) CHECK(moe_session_rewind(m->session, 0, NULL) == MOE_OK);
    m->cancel = m->how == 2;
    if (m->how > 0)
        CHECK(moe_session_eval(m->session, prompt, 2, NULL) ==
              (m->cancel ? MOE_ERROR_CANCELLED : MOE_OK));
    m->cancel = 0;
    return 1;
}

TEST(a_meddling_callback_does_not_end_generation) {
    moe_model *model = tiny_model();
    for (int run = 0; run < 6; run++) {
        moe_generate_options o;
        moe_session_options so;
        moe_generate_result result;
        meddler m;
        memset(&o, 0, sizeof o);
        memset(&so, 0, sizeof so);
        memset(&m, 0, sizeof m);
        m.how = run / 2;
        so.n_ctx = 200, so.n_threads = 1, so.should_stop = meddler_stop, so.should_stop_user = &m;
        o.on_text = on_text_meddle, o.user = &m, o.max_tokens = 20, o.ignore_end = MOE_ON;
        o.sampler = run % 2 ? open_sampler(NULL, moe_model_get_info(model)->n_vocab) : NULL;
        m.session = moe_session_open(model, &so, NULL);
        CHECK(moe_generate(m.session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        CHECK(result.reason == MOE_STOP_LIMIT); // the token is evaluated behind the callback
        moe_session_close(m.session);
        moe_sampler_close(o.sampler);
    }
    moe_model_close(model);
}

static int stop_countdown(void *user) { return --*(int *)user < 0; }

TEST(cancelling_in_the_prompt_is_an_error_later_a_result) {
    moe_model *model = tiny_model();
    int countdown, n_errors = 0, n_results = 0;
    moe_session_options so;
    memset(&so, 0, sizeof so);
    so.n_ctx = 64, so.n_threads = 1;
    so.should_stop = stop_countdown, so.should_stop_user = &countdown;
    moe_session *session = moe_session_open(model, &so, NULL);
    CHECK(session != NULL);
    for (int k = 0; session && k < 60; k += 3) {
        moe_generate_options o;
        moe_generate_result result;
        moe_error error;
        memset(&o, 0, sizeof o);
        memset(&error, 0, sizeof error);
        memset(&result, 0xAA, sizeof result);
        o.max_tokens = 20, o.ignore_end = MOE_ON;
        countdown = 1000000;
        CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
        countdown = k;
        moe_status status = moe_generate(session, prompt, N_PROMPT, &o, &result, &error);
        CHECK(result.reason == MOE_STOP_CALLER);
        if (status == MOE_OK) {
            n_results++;
            CHECK(result.n_prompt == N_PROMPT && error.status == MOE_OK);
            CHECK(moe_session_length(session) == N_PROMPT + result.n_generated - 1);
        } else {
            n_errors++;
            CHECK(status == MOE_ERROR_CANCELLED && error.status == MOE_ERROR_CANCELLED);
            CHECK(result.n_prompt == 0 && result.n_generated == 0);
            CHECK(moe_session_length(session) == 0);
        }
    }
    CHECK(n_errors > 0 && n_results > 0);
    moe_session_close(session);
    moe_model_close(model);
}

static void expect_error(moe_session *session, const int32_t *tokens, int n,
                         const moe_generate_options *o, moe_status wanted, const char *where,
                         int line) {
    moe_error error;
    moe_generate_result result;
    memset(&error, 0, sizeof error);
    memset(&result, 0xAA, sizeof result);
    moe_status status = moe_generate(session, tokens, n, o, &result, &error);
    CHECKF(status == wanted && error.status == wanted && strstr(error.where, where),
           "line %d: %s in %s: %s", line, moe_status_name(status), error.where, error.text);
    CHECK(result.n_prompt == 0 && result.n_generated == 0 && result.generate_seconds == 0);
    CHECK(moe_generate(session, tokens, n, o, NULL, NULL) == wanted);
    CHECK(moe_session_length(session) == 0);
}
#define EXPECT_ERROR(...) expect_error(__VA_ARGS__, __LINE__)

TEST(wrong_calls_of_generate_are_refused_by_name) {
    static const char *const bad_stop[] = {""};
    moe_model *model = tiny_model();
    int n_vocab = moe_model_get_info(model)->n_vocab;
    moe_session *session = open_session(model, 8);
    moe_generate_options o;
    int32_t unknown[2] = {0, n_vocab}, many[9] = {0};
    memset(&o, 0, sizeof o);
    EXPECT_ERROR(NULL, prompt, N_PROMPT, &o, MOE_ERROR_ARGUMENT, "session");
    EXPECT_ERROR(session, NULL, 3, &o, MOE_ERROR_ARGUMENT, "prompt");
    EXPECT_ERROR(session, prompt, -1, &o, MOE_ERROR_ARGUMENT, "prompt");
    EXPECT_ERROR(session, prompt, 0, &o, MOE_ERROR_ARGUMENT, "prompt");
    EXPECT_ERROR(session, unknown, 2, &o, MOE_ERROR_ARGUMENT, "");
    EXPECT_ERROR(session, many, 9, &o, MOE_ERROR_CONTEXT_FULL, "");
    o.stop = bad_stop, o.n_stop = 1;
    EXPECT_ERROR(session, prompt, N_PROMPT, &o, MOE_ERROR_ARGUMENT, "stop");
    o.n_stop = 0;
    o.sampler = open_sampler(NULL, n_vocab + 1);
    EXPECT_ERROR(session, prompt, N_PROMPT, &o, MOE_ERROR_ARGUMENT, "sampler");
    moe_sampler_close(o.sampler);
    o.sampler = NULL;
    // a prompt that fills the context leaves room for one token, which is not evaluated
    moe_generate_result result;
    o.ignore_end = MOE_ON;
    CHECK(moe_generate(session, many, 8, &o, &result, NULL) == MOE_OK);
    CHECK(result.reason == MOE_STOP_CONTEXT && result.n_generated == 1 && result.n_prompt == 8);
    moe_session_close(session);
    moe_model_close(model);
    // a model without a vocabulary
    synth_options so;
    memset(&so, 0, sizeof so);
    so.type = "f32", so.no_tokenizer = 1;
    model = models_open(models_write("qwen3moe_tiny", &so));
    CHECK(model && !moe_model_vocab(model));
    if (!model) return;
    session = open_session(model, 64);
    EXPECT_ERROR(session, prompt, N_PROMPT, &o, MOE_ERROR_ARGUMENT, "session");
    moe_session_close(session);
    moe_model_close(model);
}

MAIN()
