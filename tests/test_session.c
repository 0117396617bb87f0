// Sessions: calls in any order and with wrong arguments, after which a session goes on as if the
// wrong call had not been made; schedules, stopping, threads and memory.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"
#include "models.h"

// ---- calls -----------------------------------------------------------------------------------

TEST(closing_nothing_does_no_harm) {
    moe_session_close(NULL);
    moe_model_close(NULL);
    moe_gguf_close(NULL);
    moe_vocab_close(NULL);
    moe_pool_close(NULL);
    moe_sampler_close(NULL);
}

TEST(null_arguments_are_refused) {
    moe_error error;
    int32_t token = 0;
    moe_session_info info;
    clear_error(&error);
    CHECK(moe_session_open(NULL, NULL, &error) == NULL && error.status == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_open(NULL, NULL, NULL) == NULL);
    CHECK(moe_session_estimate(NULL, NULL, &info, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_eval(NULL, &token, 1, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_rewind(NULL, 0, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_logits(NULL, 0) == NULL);
    CHECK(moe_session_length(NULL) == 0);
    CHECK(moe_session_model(NULL) == NULL && moe_session_get_info(NULL) == NULL);
    CHECK(moe_model_vocab(NULL) == NULL && moe_model_gguf(NULL) == NULL);
    CHECK(moe_model_get_info(NULL) == NULL);
    CHECK(moe_pool_threads(NULL) == 0);
    CHECK(moe_generate(NULL, &token, 1, NULL, NULL, NULL) == MOE_ERROR_ARGUMENT);
}

// Opens a session with some options on the micro model.
static moe_session *open_micro(moe_model **model, const moe_session_options *o) {
    *model = models_open(models_simple("micro", "f32"));
    moe_session *session = *model ? moe_session_open(*model, o, NULL) : NULL;
    CHECK(session != NULL);
    return session;
}

// Evaluates wrongly: an error, and everything is as it was.
static void check_eval_fails(moe_session *s, const int32_t *tokens, int32_t n, moe_status status) {
    moe_error error;
    float before[264];
    int32_t length = moe_session_length(s);
    const float *logits = moe_session_logits(s, -1);
    CHECK(logits != NULL);
    if (logits) memcpy(before, logits, sizeof before);
    clear_error(&error);
    CHECKF(moe_session_eval(s, tokens, n, &error) == status, "%s", moe_status_name(error.status));
    CHECKF(error.status == status && *error.text && *error.where, "%s: %s", error.where,
           error.text);
    CHECK(moe_session_eval(s, tokens, n, NULL) == status);
    CHECK(moe_session_length(s) == length);
    logits = moe_session_logits(s, -1);
    CHECK(logits && !memcmp(before, logits, sizeof before));
}

TEST(wrong_tokens_are_refused_and_change_nothing) {
    moe_model *model;
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = 16;
    o.n_threads = 2;
    moe_session *session = open_micro(&model, &o), *other = moe_session_open(model, &o, NULL);
    int32_t good[6] = {1, 2, 3, 4, 263, 0}, bad[6];
    static const int32_t ids[] = {-1, 264, 265, INT32_MAX, INT32_MIN};
    CHECK(moe_session_eval(session, good, 2, NULL) == MOE_OK);
    for (int i = 0; i < 5; i++)
        for (int at = 0; at < 6; at++) {
            memcpy(bad, good, sizeof bad);
            bad[at] = ids[i];
            check_eval_fails(session, bad, 6, MOE_ERROR_ARGUMENT);
        }
    check_eval_fails(session, good, 0, MOE_ERROR_ARGUMENT);
    check_eval_fails(session, good, -1, MOE_ERROR_ARGUMENT);
    check_eval_fails(session, good, INT32_MIN, MOE_ERROR_ARGUMENT);
    check_eval_fails(session, NULL, 3, MOE_ERROR_ARGUMENT);
    // Goes on as a session that made no mistake.
    CHECK(moe_session_eval(session, good + 2, 4, NULL) == MOE_OK);
    CHECK(moe_session_eval(other, good, 2, NULL) == MOE_OK);
    CHECK(moe_session_eval(other, good + 2, 4, NULL) == MOE_OK);
    CHECK(!memcmp(moe_session_logits(session, -1), moe_session_logits(other, -1),
                  sizeof(float) * 264));
    moe_session_close(other);
    moe_session_close(session);
    moe_model_close(model);
}

TEST(tokens_beyond_the_context_are_refused_without_a_trace) {
    for (int keep = 0; keep < 2; keep++) {
        moe_model *model;
        moe_session_options o;
        int32_t tokens[20];
        memset(&o, 0, sizeof o);
        o.n_ctx = 8;
        o.n_batch = 3;
        o.keep_all_logits = keep ? MOE_ON : 0;
        moe_session *session = open_micro(&model, &o);
        models_tokens(tokens, 20, 264, 4);
        CHECK(moe_session_eval(session, tokens, 9, NULL) == MOE_ERROR_CONTEXT_FULL);
        CHECK(moe_session_length(session) == 0 && moe_session_logits(session, -1) == NULL);
        CHECK(moe_session_eval(session, tokens, 5, NULL) == MOE_OK);
        check_eval_fails(session, tokens, 4, MOE_ERROR_CONTEXT_FULL);
        check_eval_fails(session, tokens, 20, MOE_ERROR_CONTEXT_FULL);
        CHECK(moe_session_eval(session, tokens, 3, NULL) == MOE_OK);
        CHECK(moe_session_length(session) == 8);
        check_eval_fails(session, tokens, 1, MOE_ERROR_CONTEXT_FULL);
        CHECK(moe_session_rewind(session, 7, NULL) == MOE_OK);
        CHECK(moe_session_eval(session, tokens, 1, NULL) == MOE_OK);
        moe_session_close(session);
        moe_model_close(model);
    }
}

TEST(rewinding_forgets_logits_and_knows_its_range) {
    moe_model *model;
    moe_session *session = open_micro(&model, NULL);
    int32_t tokens[4] = {1, 2, 3, 4};
    static const int32_t bad[] = {-1, 5, INT32_MAX, INT32_MIN};
    CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
    CHECK(moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
    for (int i = 0; i < 4; i++) {
        moe_error error;
        clear_error(&error);
        CHECK(moe_session_rewind(session, bad[i], &error) == MOE_ERROR_ARGUMENT);
        CHECK(error.status == MOE_ERROR_ARGUMENT && *error.text);
        CHECK(moe_session_length(session) == 4);
    }
    CHECK(moe_session_rewind(session, 4, NULL) == MOE_OK && moe_session_length(session) == 4);
    CHECK(moe_session_logits(session, -1) != NULL);
    CHECK(moe_session_rewind(session, 3, NULL) == MOE_OK && moe_session_length(session) == 3);
    CHECK(moe_session_logits(session, -1) == NULL);
    CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK && moe_session_length(session) == 0);
    moe_session_close(session);
    moe_model_close(model);
}

// Options that make no sense, or that this version cannot do.
TEST(wrong_options_are_refused) {
    moe_model *model = models_open(models_simple("micro", "f32"));
    CHECK(model != NULL);
    if (!model) return;
    static const struct {
        int32_t n_ctx, n_batch, n_threads, n_threads_batch;
        int kv_type, schedule, isa;
        moe_status status;
    } cases[] = {
        {1, 1, 1, 1, 0, 0, 0, MOE_OK},
        {5, 100, 64, 3, 0, 0, 0, MOE_OK},
        {5, 1, 3, 64, 2, 1, 1, MOE_OK},
        {-1, 0, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {INT32_MIN, 0, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, -1, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, INT32_MIN, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, -1, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, INT32_MAX, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, MOE_MAX_THREADS + 1, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, 0, -1, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, 0, MOE_MAX_THREADS + 1, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, 0, 0, MOE_KV_Q8_0, 0, 0, MOE_ERROR_UNSUPPORTED}, // heads of 16
        {0, 0, 0, 0, 77, 0, 0, MOE_ERROR_UNSUPPORTED},
        {0, 0, 0, 0, -1, 0, 0, MOE_ERROR_UNSUPPORTED},
        {0, 0, 0, 0, 0, 77, 0, MOE_ERROR_UNSUPPORTED},
        {0, 0, 0, 0, 0, -1, 0, MOE_ERROR_UNSUPPORTED},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe_session_options o;
        moe_session_info info;
        moe_error error;
        memset(&o, 0, sizeof o);
        o.n_ctx = cases[i].n_ctx;
        o.n_batch = cases[i].n_batch;
        o.n_threads = cases[i].n_threads;
        o.n_threads_batch = cases[i].n_threads_batch;
        o.kv_type = (moe_kv_type)cases[i].kv_type;
        o.schedule = (moe_schedule)cases[i].schedule;
        o.isa = (moe_isa)cases[i].isa;
        clear_error(&error);
        moe_session *session = moe_session_open(model, &o, &error);
        CHECKF((session != NULL) == (cases[i].status == MOE_OK), "case %zu: %s", i, error.text);
        if (cases[i].status != MOE_OK)
            CHECKF(error.status == cases[i].status && *error.text && *error.where,
                   "case %zu: %s: %s", i, moe_status_name(error.status), error.text);
        CHECKF(moe_session_estimate(model, &o, &info, NULL) == cases[i].status, "case %zu", i);
        if (session) {
            int32_t token = 3;
            CHECK(moe_session_eval(session, &token, 1, &error) == MOE_OK);
            CHECK(moe_session_get_info(session)->n_ctx == cases[i].n_ctx);
            CHECK(moe_session_get_info(session)->n_threads == cases[i].n_threads);
            CHECK(moe_session_model(session) == model);
        }
        moe_session_close(session);
    }
    moe_model_close(model);
}

// Every schedule gives the same bits with every number of threads, for generated tokens and for
// prompts. Down projections read a hidden vector per expert, so that a schedule that mixed them
// up would show.
TEST(schedules_give_the_same_bits_with_any_number_of_threads) {
    static const char *const configs[][2] = {{"t_mla_groups", "q8_0"},  {"qwen3moe_quant", "q4_K"},
                                             {"micro_oss", "f32"},      {"micro_qwen2", "f32"},
                                             {"t_oss_wide", "f32"},     {"micro_mixtral", "f32"},
                                             {"dsv3_quant", "q4_0"},    {"t_qwen_odd", "f32"},
                                             {"qwen35moe_tiny", "q8_0"}, {"lfm2moe_tiny", "f32"},
                                             {"nemotron_latent_tiny", "f32"},
                                             {"jamba_tiny", "q8_0"},
                                             {"bailingmoe3_tiny", "f32"},
                                             {"minimax-01_tiny", "q8_0"}};
    enum { TOKENS = 40 };
    const int steps[] = {1, MODELS_WHOLE, MODELS_ODD};
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c += MODELS_SLOW ? 3 : 1) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        int32_t tokens[TOKENS];
        CHECK(model != NULL);
        if (!model) return;
        const size_t size = sizeof(float) * TOKENS * (size_t)moe_model_get_info(model)->n_vocab;
        models_tokens(tokens, TOKENS, moe_model_get_info(model)->n_vocab, 8);
        for (int k = 0; k < 3; k++) {
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.n_threads = 1;
            o.schedule = MOE_SCHEDULE_SEQUENTIAL;
            float *expected = models_run(model, &o, tokens, TOKENS, steps[k]);
            CHECK(expected != NULL);
            for (int schedule = 1; schedule <= 3 && expected; schedule++)
                for (o.n_threads = 1; o.n_threads <= 9; o.n_threads += MODELS_SLOW ? 4 : 1) {
                    o.schedule = (moe_schedule)schedule;
                    float *logits = models_run(model, &o, tokens, TOKENS, steps[k]);
                    CHECKF(logits && !memcmp(expected, logits, size),
                           "%s, schedule %d, %d threads, step %d", configs[c][0], schedule,
                           (int)o.n_threads, steps[k]);
                    free(logits);
                }
            free(expected);
        }
        moe_model_close(model);
    }
}

// The caller's rounding mode, and whether it flushes small numbers to zero
static void unusual_floats(void) {
    fesetround(FE_UPWARD);
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}
static int floats_are_unusual(void) {
#if defined(__x86_64__)
    if ((_mm_getcsr() & 0x8040) != 0x8040) return 0;
#endif
    return fegetround() == FE_UPWARD;
}

// Neither reaches results, whichever thread computes them, and the caller has it back.
TEST(the_callers_rounding_mode_stays_outside) {
    enum { TOKENS = 13 };
    const char *path = models_simple("qwen3moe_quant", "q4_K");
    fenv_t usual;
    fegetenv(&usual);
    moe_model *model = models_open(path);
    if (!model) return;
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    const size_t size = sizeof(float) * TOKENS * (size_t)n_vocab;
    int32_t tokens[TOKENS];
    models_tokens(tokens, TOKENS, n_vocab, 5);
    moe_session_options o;
    moe_sampler_options draw;
    memset(&o, 0, sizeof o);
    memset(&draw, 0, sizeof draw);
    draw.temperature = 0.7f, draw.top_p = 0.9f;
    o.n_threads = 1;
    float *expected = models_run(model, &o, tokens, TOKENS, 3), back[32];
    uint8_t row[34], rounded[34];
    moe_sampler *sampler = moe_sampler_open(&draw, n_vocab, n_vocab, NULL);
    const int32_t token = expected && sampler ? moe_sampler_sample(sampler, expected) : -1;
    moe_sampler_close(sampler);
    CHECK(moe_type_quantize(MOE_TYPE_Q8_0, expected, row, 1, 32, NULL, NULL) == MOE_OK);
    unusual_floats();
    moe_model *other = models_open(path);
    for (int threads = 1; threads <= 4 && expected && other; threads++) {
        o.n_threads = threads;
        float *logits = models_run(threads % 2 ? model : other, &o, tokens, TOKENS, 3);
        CHECKF(logits && !memcmp(logits, expected, size), "%d threads", threads);
        free(logits);
    }
    sampler = moe_sampler_open(&draw, n_vocab, n_vocab, NULL);
    CHECK(sampler && moe_sampler_sample(sampler, expected) == token);
    moe_sampler_close(sampler);
    CHECK(moe_type_quantize(MOE_TYPE_Q8_0, expected, rounded, 1, 32, NULL, NULL) == MOE_OK);
    CHECK(moe_type_dequantize(MOE_TYPE_Q8_0, rounded, back, 1, 32, NULL) == MOE_OK);
    CHECK(!memcmp(row, rounded, sizeof row));
    CHECK(floats_are_unusual());
    fesetenv(&usual);
    moe_model_close(other);
    moe_model_close(model);
    free(expected);
}

// Which way a session went, and how often its threads met.
TEST(a_session_tells_its_schedule_and_barriers) {
    static const char *const configs[] = {"qwen3moe_tiny", "t_mla_groups"}; // 8 and 3 experts
    for (int c = 0; c < 2; c++) {
        moe_model *model = models_open(models_simple(configs[c], "f32"));
        CHECK(model != NULL);
        if (!model) return;
        const int used = moe_model_get_info(model)->n_expert_used;
        const uint64_t layers = (uint64_t)moe_model_get_info(model)->n_layer;
        for (int schedule = 0; schedule <= 3; schedule++)
            for (int threads = 1; threads <= 4; threads++) {
                const int32_t tokens[3] = {1, 2, 3};
                moe_session_options o;
                memset(&o, 0, sizeof o);
                o.schedule = (moe_schedule)schedule;
                o.n_threads = threads;
                moe_session *session = moe_session_open(model, &o, NULL);
                const moe_session_info *info = moe_session_get_info(session);
                const moe_session_stats *stats = moe_session_get_stats(session);
                CHECK(session != NULL && info->schedule != MOE_SCHEDULE_DEFAULT);
                if (!session) continue;
                CHECK(stats->n_threads == 0 && stats->n_barriers == 0);
                int groups = 1;
                for (int g = 2; g <= threads && info->schedule == MOE_SCHEDULE_PARALLEL; g++)
                    if (threads % g == 0 && used % g == 0) groups = g;
                CHECK(moe_session_eval(session, tokens, 3, NULL) == MOE_OK);
                CHECK(stats->n_expert_groups == 1 && stats->n_threads == threads);
                CHECK(moe_session_eval(session, tokens, 1, NULL) == MOE_OK);
                CHECKF(stats->n_expert_groups == groups, "%s, schedule %d, %d threads: %d",
                       configs[c], schedule, threads, (int)stats->n_expert_groups);
                // balanced: where units of rows divide badly by threads
                const int64_t units = moe_model_get_info(model)->n_embd / MOE__ROW_UNIT;
                const int64_t even = (units + threads - 1) / threads * threads;
                const int apart = groups > 1 || (schedule == 3 && 16 * units < 15 * even);
                // the barriers on the first page of >>session, with one chunk of keys
                uint64_t barriers = 2;
                for (uint64_t il = 0; il < layers; il++)
                    barriers += model->layers[il].is_moe ? (uint64_t)((c ? 8 : 6) + apart)
                                                         : (uint64_t)(c ? 7 : 5);
                CHECKF(stats->n_barriers == barriers, "%s, schedule %d, %d threads: %d not %d",
                       configs[c], schedule, threads, (int)stats->n_barriers, (int)barriers);
                double waited = 0;
                for (int t = 0; t < threads; t++) {
                    const double wait = stats->thread_wait_seconds[t];
                    CHECK(wait >= 0 && wait <= stats->eval_seconds);
                    if (threads == 1) CHECK(wait == 0);
                    waited += wait;
                }
                CHECK(waited == stats->wait_seconds && (threads == 1 || waited > 0));
                moe_session_close(session);
            }
        moe_model_close(model);
    }
}

// Every token chooses n_used experts in each layer that has some, in prompts and one by one.
TEST(every_token_counts_its_experts_in_each_layer) {
    moe_model *model = models_open(models_simple("t_mla_groups", "q8_0"));
    moe_session *session = moe_session_open(model, NULL, NULL);
    int32_t tokens[30];
    CHECK(session != NULL);
    if (!session) return;
    const moe_model_info *info = moe_model_get_info(model);
    models_tokens(tokens, 30, info->n_vocab, 1);
    uint64_t evaluated = 0;
    for (int part = 0; part < 3; part++) {
        const int32_t n = part == 1 ? 1 : 12;
        CHECK(moe_session_eval(session, tokens + evaluated, n, NULL) == MOE_OK);
        evaluated += (uint64_t)n;
        for (int32_t il = -1; il <= info->n_layer; il++) {
            const uint64_t *counts = moe_session_expert_counts(session, il);
            uint64_t sum = 0;
            CHECK((counts != NULL) == (il >= 0 && il < info->n_layer && model->layers[il].is_moe));
            for (int32_t e = 0; counts && e < info->n_expert; e++) {
                CHECK(counts[e] <= evaluated);
                sum += counts[e];
            }
            if (counts) CHECK(sum == evaluated * (uint64_t)info->n_expert_used);
        }
    }
    CHECK(moe_session_expert_counts(NULL, 0) == NULL);
    moe_session_close(session);
    moe_model_close(model);
}

// Threads in two groups of a node each: the same bits.
TEST(schedules_give_the_same_bits_on_two_nodes) {
    int32_t tokens[12];
    moe_session_options s;
    float *expected[2] = {NULL, NULL};
    moe_model *model = models_open(models_simple("qwen3moe_quant", "q4_K"));
    if (!model) return;
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    models_tokens(tokens, 12, n_vocab, 1);
    for (int schedule = 1; schedule <= 3; schedule++)
        for (int threads = 1; threads <= 9; threads += 2)
            for (int step = 0; step < 2; step++) {
                moe_pool_options p;
                memset(&p, 0, sizeof p);
                memset(&s, 0, sizeof s);
                p.n_threads = threads;
                s.pool = moe_pool_open(&p, NULL);
                if (!s.pool) continue;
                s.pool->nodes.n = 2;
                s.pool->nodes.first[1] = threads / 2;
                s.pool->nodes.first[2] = threads;
                s.schedule = (moe_schedule)schedule;
                float *logits = models_run(model, &s, tokens, 12, step ? MODELS_WHOLE : 1);
                CHECK(logits != NULL);
                if (expected[step] && logits)
                    CHECKF(!memcmp(expected[step], logits, sizeof(float) * 12 * (size_t)n_vocab),
                           "schedule %d, %d threads", schedule, threads);
                models_keep_first(&expected[step], logits);
                moe_pool_close(s.pool);
            }
    for (int step = 0; step < 2; step++) free(expected[step]);
    moe_model_close(model);
}

// ---- stopping --------------------------------------------------------------------------------

typedef struct stopper {
    long calls, stop_at; // the call that stops, from 1; 0: none
} stopper;

static int should_stop(void *user) {
    stopper *s = (stopper *)user;
    return ++s->calls == s->stop_at;
}

// Stopped at the first, second, ... question; then it goes on and gives the same bits.
static void check_stopping(const char *path, int n_threads, int n_batch) {
    moe_model *model = models_open(path);
    CHECK(model != NULL);
    if (!model) return;
    moe_session_options o;
    stopper s = {0, 0};
    int32_t tokens[24];
    int V = moe_model_get_info(model)->n_vocab, n_layer = moe_model_get_info(model)->n_layer;
    models_tokens(tokens, 24, V, 9);
    memset(&o, 0, sizeof o);
    o.n_ctx = 24;
    o.n_batch = n_batch;
    o.n_threads = n_threads;
    o.should_stop = should_stop;
    o.should_stop_user = &s;
    moe_session *session = moe_session_open(model, &o, NULL);
    float *expected = (float *)malloc(sizeof(float) * (size_t)V);
    CHECK(session && moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
    s.calls = 0;
    CHECK(moe_session_eval(session, tokens + 4, 20, NULL) == MOE_OK);
    long asked = s.calls, batches = (20 + n_batch - 1) / n_batch;
    CHECKF(asked >= batches * n_layer, "asked %ld times in %ld batches of %d layers", asked,
           batches, n_layer);
    memcpy(expected, moe_session_logits(session, -1), sizeof(float) * (size_t)V);
    for (long at = 1; at <= asked; at++) {
        moe_error error;
        CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
        s.stop_at = 0;
        CHECK(moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
        s.calls = 0;
        s.stop_at = at;
        clear_error(&error);
        CHECK(moe_session_eval(session, tokens + 4, 20, &error) == MOE_ERROR_CANCELLED);
        CHECK(error.status == MOE_ERROR_CANCELLED && *error.text);
        CHECK(moe_session_length(session) == 4);
        s.stop_at = 0;
        CHECK(moe_session_eval(session, tokens + 4, 20, &error) == MOE_OK);
        const float *logits = moe_session_logits(session, -1);
        CHECKF(logits && !memcmp(expected, logits, sizeof(float) * (size_t)V),
               "stopped at %ld of %ld", at, asked);
    }
    free(expected);
    moe_session_close(session);
    moe_model_close(model);
}

TEST(a_stopped_session_goes_on_with_the_same_bits) {
    check_stopping(models_simple("micro", "f32"), 1, 20);
    check_stopping(models_simple("micro", "q8_0"), 3, 6);
    check_stopping(models_simple("t_mla_groups", "f32"), 2, 7);
    check_stopping(models_simple("t_mla_v2", "q4_0"), 1, 1);
}

// After a cancelled eval there are either no logits or those from before, never something else.
TEST(stopping_leaves_earlier_logits_or_none) {
    moe_model *model;
    moe_session_options o;
    stopper s = {0, 0};
    int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    memset(&o, 0, sizeof o);
    o.should_stop = should_stop;
    o.should_stop_user = &s;
    o.keep_all_logits = MOE_ON;
    o.n_batch = 2;
    moe_session *session = open_micro(&model, &o);
    for (long at = 1; at < 100; at++) {
        float before[264];
        CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
        s.stop_at = 0;
        CHECK(moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
        memcpy(before, moe_session_logits(session, 1), sizeof before);
        s.calls = 0;
        s.stop_at = at;
        moe_status status = moe_session_eval(session, tokens + 4, 4, NULL);
        if (status == MOE_OK) break;
        CHECK(status == MOE_ERROR_CANCELLED);
        const float *after = moe_session_logits(session, 1);
        CHECKF(!after || !memcmp(before, after, sizeof before), "stopped at %ld", at);
    }
    moe_session_close(session);
    moe_model_close(model);
}

// ---- threads ---------------------------------------------------------------------------------

TEST(sessions_may_share_a_pool) {
    moe_pool_options p;
    moe_session_options o;
    moe_model *model = models_open(models_simple("t_mla_groups", "f32"));
    CHECK(model != NULL);
    if (!model) return;
    int32_t tokens[30];
    float *expected, *a = (float *)malloc(sizeof(float) * 30 * 264);
    float *b = (float *)malloc(sizeof(float) * 30 * 264);
    models_tokens(tokens, 30, 264, 12);
    memset(&p, 0, sizeof p);
    memset(&o, 0, sizeof o);
    o.n_threads = 1;
    expected = models_run(model, &o, tokens, 30, 5);
    for (int n = 1; n <= 5; n += 2) {
        p.n_threads = n;
        o.n_threads = n > 2 ? n - 1 : 0;
        moe_pool *pool = moe_pool_open(&p, NULL);
        CHECK(moe_pool_threads(pool) == n);
        o.pool = pool;
        o.keep_all_logits = MOE_ON;
        moe_session *x = moe_session_open(model, &o, NULL), *y = moe_session_open(model, &o, NULL);
        CHECK(x && y);
        for (int i = 0; i < 30; i += 5) {
            CHECK(models_eval(x, tokens, i, i + 5, 5, a));
            CHECK(models_eval(y, tokens, i, i + 5, 5, b));
        }
        CHECK(expected && !memcmp(a, expected, sizeof(float) * 30 * 264));
        CHECK(expected && !memcmp(b, expected, sizeof(float) * 30 * 264));
        // More threads than the pool has: refused, or no more than there are.
        o.n_threads = o.n_threads_batch = 64;
        moe_error error;
        clear_error(&error);
        moe_session *z = moe_session_open(model, &o, &error);
        if (z) CHECK(moe_session_get_info(z)->n_threads == n);
        if (z) CHECK(models_eval(z, tokens, 0, 30, 5, a));
        CHECK(z || (error.status == MOE_ERROR_ARGUMENT && *error.text));
        moe_session_close(z);
        moe_session_close(x);
        moe_session_close(y);
        moe_pool_close(pool);
    }
    free(expected);
    free(a);
    free(b);
    moe_model_close(model);
}

typedef struct runner {
    const moe_model *model;
    moe_session_options options;
    const int32_t *tokens;
    const float *expected;
    int rounds, wrong;
} runner;

static void *runner_run(void *user) {
    runner *r = (runner *)user;
    for (int i = 0; i < r->rounds; i++) {
        float *logits = models_run(r->model, &r->options, r->tokens, 30, i % 2 ? 5 : MODELS_WHOLE);
        size_t from = i % 2 ? 0 : 30 * 264;
        r->wrong += !logits || memcmp(logits, r->expected + from, sizeof(float) * 30 * 264);
        free(logits);
    }
    return NULL;
}

// Several threads, each with its sessions, on one model; then all on one pool.
TEST(sessions_run_concurrently_with_the_same_bits) {
    moe_model *model = models_open(models_simple("t_mla_groups", "f32"));
    int32_t tokens[30];
    moe_pool_options p;
    moe_session_options o;
    memset(&p, 0, sizeof p);
    memset(&o, 0, sizeof o);
    models_tokens(tokens, 30, 264, 13);
    CHECK(model != NULL);
    if (!model) return;
    float *expected = (float *)malloc(sizeof(float) * 60 * 264);
    for (int i = 0; i < 2; i++) {
        float *part = models_run(model, &o, tokens, 30, i ? MODELS_WHOLE : 5);
        if (part) memcpy(expected + i * 30 * 264, part, sizeof(float) * 30 * 264);
        free(part);
    }
    p.n_threads = 2;
    moe_pool *pool = moe_pool_open(&p, NULL);
    for (int shared = 0; shared < 2; shared++) {
        pthread_t threads[4];
        runner runners[4];
        for (int i = 0; i < 4; i++) {
            memset(&runners[i], 0, sizeof runners[i]);
            runners[i].model = model;
            runners[i].options.n_threads = shared ? 0 : 1 + i % 3;
            runners[i].options.pool = shared ? pool : NULL;
            runners[i].tokens = tokens;
            runners[i].expected = expected;
            runners[i].rounds = 6;
            CHECK(pthread_create(&threads[i], NULL, runner_run, &runners[i]) == 0);
        }
        for (int i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            CHECKF(runners[i].wrong == 0, "thread %d: %d wrong", i, runners[i].wrong);
        }
    }
    moe_pool_close(pool);
    free(expected);
    moe_model_close(model);
}

// ---- memory ----------------------------------------------------------------------------------

// The same for sessions, which take their memory from the model's allocator; and evaluating
// takes none.
TEST(opening_may_run_out_of_memory_and_evaluating_takes_none) {
    for (int b = 0; b < 2; b++) {
        meter m;
        moe_model_options mo;
        moe_session_options o;
        int32_t tokens[20];
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        memset(&o, 0, sizeof o);
        mo.allocator = meter_allocator(&m);
        o.n_threads = 2;
        o.n_batch = 8;
        o.n_ctx = 30;
        models_tokens(tokens, 20, 264, 2);
        moe_model *model = moe_model_open(models_form(b), &mo, NULL);
        CHECK(model != NULL);
        size_t model_bytes = m.live;
        long fail_at = 0;
        for (int failed = 1; failed && fail_at < 1000;) {
            moe_error error;
            m.calls = 0;
            m.fail_at = ++fail_at;
            clear_error(&error);
            moe_session *session = moe_session_open(model, &o, &error);
            failed = m.calls >= fail_at;
            CHECKF((session == NULL) == failed, "%s", error.text);
            if (failed) CHECK(error.status == MOE_ERROR_MEMORY && *error.text);
            m.fail_at = 0;
            if (session) {
                long calls = m.calls;
                CHECK(moe_session_eval(session, tokens, 20, NULL) == MOE_OK);
                CHECK(moe_session_eval(session, tokens, 1, NULL) == MOE_OK);
                CHECK(moe_session_rewind(session, 3, NULL) == MOE_OK);
                CHECK(moe_session_eval(session, tokens, 9, NULL) == MOE_OK);
                CHECKF(m.calls == calls, "evaluating took memory %ld times", m.calls - calls);
            }
            moe_session_close(session);
            CHECKF(m.live == model_bytes, "%zu bytes left", m.live - model_bytes);
        }
        CHECK(fail_at > 1);
        moe_model_close(model);
        CHECK(m.live == 0);
    }
}

// A context that no machine can hold is refused and not tried.
TEST(a_context_that_no_machine_holds_is_refused) {
    for (int b = 0; b < 2; b++) {
        meter m;
        moe_model_options mo;
        moe_session_options o;
        moe_error error;
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        memset(&o, 0, sizeof o);
        mo.allocator = meter_allocator(&m);
        m.limit = (size_t)256 << 20;
        o.n_ctx = INT32_MAX;
        moe_model *model = moe_model_open(models_form(b), &mo, NULL);
        clear_error(&error);
        moe_session *session = moe_session_open(model, &o, &error);
        CHECK(session == NULL);
        CHECKF(error.status == MOE_ERROR_MEMORY || error.status == MOE_ERROR_ARGUMENT, "%s",
               moe_status_name(error.status));
        o.keep_all_logits = MOE_ON;
        o.n_batch = INT32_MAX;
        CHECK(moe_session_open(model, &o, NULL) == NULL);
        moe_model_close(model);
    }
}

// The estimate is what a session then takes, to within the allocator's own overhead.
TEST(an_estimate_is_what_opening_takes) {
    static const int32_t contexts[] = {1, 33, 2000, 0}, batches[] = {1, 7, 512, 0};
    for (int b = 0; b < 2; b++) {
        meter m;
        moe_model_options mo;
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        mo.allocator = meter_allocator(&m);
        moe_model *model = moe_model_open(models_form(b), &mo, NULL);
        CHECK(model != NULL);
        if (!model) return;
        size_t before = m.live;
        for (int i = 0; i < 64; i++) {
            moe_session_options o;
            moe_session_info info;
            memset(&o, 0, sizeof o);
            memset(&info, 0xAA, sizeof info);
            o.n_ctx = contexts[i % 4];
            o.n_batch = batches[i / 4 % 4];
            o.n_threads = i & 16 ? 5 : 1;
            o.kv_type = i & 32 ? MOE_KV_F32 : MOE_KV_F16;
            o.keep_all_logits = i & 8 ? MOE_ON : 0;
            CHECK(moe_session_estimate(model, &o, &info, NULL) == MOE_OK);
            CHECK(m.live == before);
            moe_session *session = moe_session_open(model, &o, NULL);
            CHECK(session != NULL);
            if (!session) continue;
            const moe_session_info *real = moe_session_get_info(session);
            CHECK(info.kv_bytes == real->kv_bytes && info.work_bytes == real->work_bytes);
            CHECK(info.n_ctx == real->n_ctx && info.n_batch == real->n_batch);
            CHECK(info.n_threads == real->n_threads && info.isa == real->isa);
            size_t taken = m.live - before, told = info.kv_bytes + info.work_bytes;
            CHECKF(taken >= told && taken - told < 65536, "told %zu, taken %zu", told, taken);
            moe_session_close(session);
        }
        // The cache grows with the context by known amounts: 2 x 16 values per token and layer,
        // or a latent of 32 and 8 rotated.
        moe_session_options o;
        moe_session_info small, large;
        memset(&o, 0, sizeof o);
        o.n_ctx = 1024;
        CHECK(moe_session_estimate(model, &o, &small, NULL) == MOE_OK);
        o.n_ctx = 2048;
        CHECK(moe_session_estimate(model, &o, &large, NULL) == MOE_OK);
        size_t per_token = (large.kv_bytes - small.kv_bytes) / 1024;
        size_t expected = (size_t)(2 * (b ? 40 : 32) * 2);
        CHECKF(per_token >= expected && per_token <= 2 * expected, "%zu per token", per_token);
        moe_model_close(model);
    }
}

// A Q8_0 cache takes 34 bytes where F16 takes 64, as estimated; widths that blocks do not fit
// are refused with the numbers.
TEST(a_q8_0_cache_takes_34_bytes_where_f16_takes_64) {
    static const struct {
        const char *config, *widths; // NULL: fits
    } cases[] = {{"qwen3moe_quant", NULL}, {"dsv3_quant", NULL}, {"micro", "16 and 16"},
                 {"micro_mla", "32 and 8"}, {"t_qwen_odd", "10 and 10"}};
    for (int i = 0; i < 5; i++) {
        moe_model *model = models_open(models_simple(cases[i].config, "f32"));
        moe_session_options o;
        moe_session_info f16, q8_0;
        moe_error error;
        memset(&o, 0, sizeof o);
        o.n_ctx = 640;
        CHECK(model && moe_session_estimate(model, &o, &f16, NULL) == MOE_OK);
        if (!model) continue;
        o.kv_type = MOE_KV_Q8_0;
        clear_error(&error);
        moe_status status = moe_session_estimate(model, &o, &q8_0, &error);
        moe_session *session = moe_session_open(model, &o, NULL);
        CHECK((session != NULL) == (cases[i].widths == NULL));
        if (cases[i].widths) {
            CHECKF(status == MOE_ERROR_UNSUPPORTED && !strcmp(error.where, "kv_type") &&
                       strstr(error.text, cases[i].widths),
                   "%s: %s", cases[i].config, error.text);
        } else if (session) {
            const moe_session_info *real = moe_session_get_info(session);
            CHECK(status == MOE_OK && q8_0.kv_bytes * 64 == f16.kv_bytes * 34);
            CHECK(real->kv_type == MOE_KV_Q8_0 && real->kv_bytes == q8_0.kv_bytes);
            CHECK(real->work_bytes == q8_0.work_bytes && q8_0.work_bytes == f16.work_bytes);
        }
        moe_session_close(session);
        moe_model_close(model);
    }
}

MAIN()
