// Rows of several sequences in one evaluation: each has the bits that it has alone, whoever shares
// its buffers and threads, and a job that is wrong harms no other.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "models.h"

// A token among others has the bits that it has alone, whatever the weights.
TEST(a_token_has_the_same_bits_alone_and_among_others) {
    static const char *const configs[][2] = {
        {"t_mla_groups", "q8_0"},  {"qwen3moe_quant", "q4_K"}, {"qwen3moe_quant", "q2_K"},
        {"qwen3moe_quant", "q6_K"}, {"micro_oss", "f32"},      {"micro_qwen2", "f32"},
        {"micro_mixtral", "f16"},  {"dsv3_quant", "q4_0"},     {"t_qwen_odd", "bf16"}};
    enum { TOKENS = 29 };
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c++) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        int32_t tokens[TOKENS];
        CHECKF(model != NULL, "%s %s", configs[c][0], configs[c][1]);
        if (!model) continue;
        const size_t size = sizeof(float) * TOKENS * (size_t)moe_model_get_info(model)->n_vocab;
        models_tokens(tokens, TOKENS, moe_model_get_info(model)->n_vocab, 5);
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.n_threads = 2;
        float *alone = models_run(model, &o, tokens, TOKENS, 1);
        for (int step = 2; step <= TOKENS; step += step < 8 ? 1 : 7) {
            float *logits = models_run(model, &o, tokens, TOKENS, step);
            CHECKF(alone && logits && !memcmp(alone, logits, size), "%s %s, %d at a time",
                   configs[c][0], configs[c][1], step);
            free(logits);
        }
        free(alone);
        moe_model_close(model);
    }
}

enum { MANY = 8, MANY_CTX = 700 };

// Sessions of one pool; all logits are kept.
static int many_open(const moe_model *model, moe_session_options o, int n, moe_session **sessions) {
    for (int i = 0; i < n; i++) {
        sessions[i] = moe_session_open(model, &o, NULL);
        if (!sessions[i]) return 0;
    }
    return 1;
}
static void many_close(moe_session **sessions, int n) {
    for (int i = 0; i < n; i++) moe_session_close(sessions[i]);
}
static int same_logits(const moe_session *a, const moe_session *b, int n, size_t n_vocab) {
    int same = 1;
    for (int i = 0; i < n; i++) {
        const float *x = moe_session_logits(a, i), *y = moe_session_logits(b, i);
        same &= x && y && !memcmp(x, y, n_vocab * sizeof *x);
    }
    return same;
}

// Up to eight sequences of different depths, prompts beside single tokens: each has the bits
// that it has alone, whatever threads, schedule and instruction set.
TEST(sequences_have_the_same_bits_alone_and_together) {
    static const char *const configs[][2] = {
        {"t_mla_groups", "q8_0"}, {"qwen3moe_quant", "q4_K"}, {"micro_oss", "f32"},
        {"micro_qwen2", "f32"},   {"dsv3_quant", "q4_0"},     {"t_qwen_odd", "bf16"}};
    static const int lengths[][MANY] = {{40, 1, 7, 130, 3, 1, 12, 1}, {1, 1, 1, 1, 1, 1, 1, 1},
                                        {5, 300, 1, 2, 1, 150, 9, 1}, {1, 2, 1, 60, 1, 4, 1, 1}};
    int32_t tokens[MANY_CTX];
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c++) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        CHECK(model != NULL);
        if (!model) continue;
        const size_t n_vocab = (size_t)moe_model_get_info(model)->n_vocab;
        models_tokens(tokens, MANY_CTX, (int32_t)n_vocab, 3);
        for (int variant = 0; variant < (MODELS_SLOW ? 1 : 4); variant++) {
            moe_session *together[MANY] = {NULL}, *alone[MANY] = {NULL};
            moe_pool_options p;
            moe_session_options o;
            memset(&p, 0, sizeof p);
            memset(&o, 0, sizeof o);
            p.n_threads = o.n_threads = variant == 3 ? 7 : variant + 1;
            o.n_ctx = MANY_CTX;
            o.n_batch = variant == 1 ? 33 : 256;
            o.keep_all_logits = MOE_ON;
            o.schedule = (moe_schedule)(variant % 3 + 1);
            o.isa = variant == 2 ? MOE_ISA_AVX2 : MOE_ISA_BEST;
            o.kv_type = variant == 2 && c != 5 ? MOE_KV_Q8_0 : MOE_KV_F16;
            const moe__layer *layer = &model->layers[0];
            const int mla = layer->mixer == MOE__MLA;
            const int32_t first = mla ? layer->kv_lora : layer->head_k;
            const int32_t then = mla ? layer->n_rot : layer->head_v;
            if (first % 32 || then % 32) o.kv_type = MOE_KV_F16;
            moe_pool *pool = o.pool = moe_pool_open(&p, NULL);
            const int n = variant == 0 ? MANY : 5;
            int ok = many_open(model, o, n, together);
            o.pool = NULL;
            o.n_threads = 2;
            ok = many_open(model, o, n, alone) && ok;
            CHECK(ok);
            for (int round = 0; ok && round < 4; round++) {
                moe_job jobs[MANY];
                for (int i = 0; i < n; i++) {
                    const int from = moe_session_length(alone[i]);
                    jobs[i].session = together[i];
                    jobs[i].tokens = tokens + (from + 5 * i) % 200;
                    jobs[i].n_tokens = lengths[round][i];
                    CHECK(!moe_session_eval(alone[i], jobs[i].tokens, jobs[i].n_tokens, NULL));
                }
                CHECK(!moe_session_eval_many(jobs, n, NULL));
                for (int i = 0; i < n; i++)
                    CHECKF(jobs[i].status == MOE_OK &&
                               moe_session_length(together[i]) == moe_session_length(alone[i]) &&
                               same_logits(together[i], alone[i], lengths[round][i], n_vocab),
                           "%s %s, variant %d, round %d, sequence %d", configs[c][0], configs[c][1],
                           variant, round, i);
            }
            many_close(together, n);
            many_close(alone, n);
            moe_pool_close(pool);
        }
        moe_model_close(model);
    }
}

// A context of several chunks of keys, cut in any way, with any number of threads
TEST(how_a_long_input_is_cut_changes_no_bit) {
    static const char *const configs[][2] = {{"qwen3moe_quant", "q4_K"}, {"micro_oss", "f32"},
                                             {"t_mla_groups", "q8_0"},   {"t_oss_wide", "f32"}};
    static const int cuts[][6] = {{1100}, {128, 972}, {600, 500}, {512, 200, 388}, {1099, 1}};
    enum { TOKENS = 1100 };
    int32_t tokens[TOKENS];
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c++) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        CHECK(model != NULL);
        if (!model) continue;
        const size_t n_vocab = (size_t)moe_model_get_info(model)->n_vocab;
        float *expected = NULL;
        models_tokens(tokens, TOKENS, (int32_t)n_vocab, 4);
        for (int k = 0; k < (MODELS_SLOW ? 2 : 5); k++) {
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.n_ctx = TOKENS + 8;
            o.n_threads = 1 + 2 * k;
            moe_session *session = moe_session_open(model, &o, NULL);
            CHECK(session != NULL);
            for (int i = 0, at = 0; session && at < TOKENS; at += cuts[k][i++])
                CHECK(!moe_session_eval(session, tokens + at, cuts[k][i], NULL));
            // latent attention absorbs a single token, which is another arithmetic
            if (session && !(model->layers[0].mixer == MOE__MLA && k == 4)) {
                const float *logits = moe_session_logits(session, -1);
                if (!expected) {
                    expected = (float *)malloc(n_vocab * sizeof *expected);
                    memcpy(expected, logits, n_vocab * sizeof *expected);
                }
                CHECKF(!memcmp(expected, logits, n_vocab * sizeof *expected), "%s, cut %d",
                       configs[c][0], k);
            }
            // and what is generated behind it, in one call and token by token
            float *after = (float *)malloc(n_vocab * sizeof *after);
            CHECK(!moe_session_eval(session, tokens, 5, NULL));
            memcpy(after, moe_session_logits(session, -1), n_vocab * sizeof *after);
            CHECK(!moe_session_rewind(session, TOKENS, NULL));
            for (int i = 0; i < 5; i++) CHECK(!moe_session_eval(session, tokens + i, 1, NULL));
            CHECK(!memcmp(after, moe_session_logits(session, -1), n_vocab * sizeof *after));
            free(after);
            moe_session_close(session);
        }
        free(expected);
        moe_model_close(model);
    }
}

static int many_stop(void *user) { return *(int *)user; }

// Wrong jobs are left out, and say why; cancelling leaves all sessions as they were.
TEST(wrong_jobs_are_left_out_and_say_why) {
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_model *other = models_open(models_simple("qwen3moe_tiny", "f32"));
    const int32_t good[3] = {1, 2, 3}, bad[2] = {1, -1};
    moe_session *s[4] = {NULL}, *stranger = NULL, *far = NULL;
    moe_session_options o;
    moe_error error;
    int stop = 0;
    CHECK(model && other);
    if (!model || !other) return;
    memset(&o, 0, sizeof o);
    moe_pool_options p;
    memset(&p, 0, sizeof p);
    p.n_threads = 2;
    moe_pool *pool = moe_pool_open(&p, NULL);
    o.pool = pool;
    o.n_ctx = 8;
    o.should_stop = many_stop;
    o.should_stop_user = &stop;
    CHECK(many_open(model, o, 4, s));
    far = moe_session_open(other, &o, NULL);
    o.pool = NULL;
    stranger = moe_session_open(model, &o, NULL);
    CHECK(far && stranger);
    moe_job jobs[] = {{s[0], good, 3, MOE_OK},  {s[1], bad, 2, MOE_OK},    {s[0], good, 1, MOE_OK},
                      {NULL, good, 1, MOE_OK},  {s[2], good, 9, MOE_OK},   {s[3], good, 2, MOE_OK},
                      {far, good, 1, MOE_OK},   {stranger, good, 1, MOE_OK},
                      {s[2], NULL, 1, MOE_OK},  {s[2], good, 0, MOE_OK}};
    enum { JOBS = sizeof jobs / sizeof jobs[0] };
    int32_t nine[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    jobs[4].tokens = nine;
    CHECK(moe_session_eval_many(jobs, JOBS, &error) == MOE_ERROR_ARGUMENT);
    CHECK(strstr(error.text, "-1"));
    for (int i = 0; i < JOBS; i++) {
        const moe_status want = i == 0 || i == 5 ? MOE_OK
                                : i == 4         ? MOE_ERROR_CONTEXT_FULL
                                                 : MOE_ERROR_ARGUMENT;
        CHECKF(jobs[i].status == want, "job %d: %d", i, (int)jobs[i].status);
    }
    CHECK(moe_session_length(s[0]) == 3 && moe_session_length(s[3]) == 2);
    CHECK(moe_session_length(s[1]) == 0 && moe_session_length(s[2]) == 0);
    CHECK(moe_session_logits(s[0], -1) && !moe_session_logits(s[1], -1));
    CHECK(moe_session_eval_many(NULL, 1, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_eval_many(jobs, 0, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_eval_many(&jobs[1], 1, NULL) == MOE_ERROR_ARGUMENT);

    // Cancelled: lengths and logits stay.
    const float before = moe_session_logits(s[0], -1)[0];
    stop = 1;
    moe_job two[] = {{s[0], good, 1, MOE_OK}, {s[2], good, 2, MOE_OK}};
    CHECK(moe_session_eval_many(two, 2, &error) == MOE_ERROR_CANCELLED);
    CHECK(two[0].status == MOE_ERROR_CANCELLED && two[1].status == MOE_ERROR_CANCELLED);
    CHECK(moe_session_length(s[0]) == 3 && moe_session_length(s[2]) == 0);
    CHECK(moe_session_logits(s[0], -1) && moe_session_logits(s[0], -1)[0] == before);
    stop = 0;
    CHECK(moe_session_eval_many(two, 2, &error) == MOE_OK);
    CHECK(moe_session_length(s[0]) == 4 && moe_session_length(s[2]) == 2);

    // Rewinding drops them, unless it forgets nothing.
    CHECK(!moe_session_rewind(s[0], 4, NULL) && moe_session_logits(s[0], -1));
    CHECK(!moe_session_rewind(s[0], 3, NULL) && !moe_session_logits(s[0], -1));
    many_close(s, 4);
    moe_session_close(far);
    moe_session_close(stranger);
    moe_pool_close(pool);
    moe_model_close(model);
    moe_model_close(other);
}

// A callback that evaluates, or opens a session, with the pool that calls it gets an error.
static struct {
    moe_session *session;
    moe_session_options options;
    moe_status status;
    int calls, opened;
    moe_error error;
} recursion;
static int recursion_call(void *user) {
    const int32_t token = 1;
    (void)user;
    if (recursion.calls++) return 0;
    recursion.status = moe_session_eval(recursion.session, &token, 1, &recursion.error);
    moe_session *another =
        moe_session_open(moe_session_model(recursion.session), &recursion.options, NULL);
    recursion.opened = another != NULL;
    moe_session_close(another);
    return 0;
}
TEST(callbacks_cannot_evaluate) {
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_pool_options p;
    const int32_t token = 2;
    CHECK(model != NULL);
    if (!model) return;
    memset(&recursion, 0, sizeof recursion);
    memset(&p, 0, sizeof p);
    p.n_threads = 2;
    moe_pool *pool = moe_pool_open(&p, NULL);
    recursion.options.pool = pool;
    recursion.options.n_ctx = 8;
    recursion.session = moe_session_open(model, &recursion.options, NULL);
    moe_session_options o = recursion.options;
    o.should_stop = recursion_call;
    moe_session *session = moe_session_open(model, &o, NULL);
    CHECK(moe_session_eval(session, &token, 1, NULL) == MOE_OK);
    CHECK(recursion.calls > 0 && recursion.status == MOE_ERROR_ARGUMENT && !recursion.opened);
    CHECK(strstr(recursion.error.text, "callback"));
    CHECK(moe_session_length(recursion.session) == 0);
    CHECK(moe_session_eval(recursion.session, &token, 1, NULL) == MOE_OK);
    moe_session_close(session);
    moe_session_close(recursion.session);
    moe_pool_close(pool);
    moe_model_close(model);
}

static struct {
    moe_session *session;
    moe_status status;
    int calls;
} rewinding;
static int rewinding_call(void *user) {
    (void)user;
    rewinding.calls++;
    rewinding.status = moe_session_rewind(rewinding.session, 0, NULL);
    return 0;
}

// Rewinding would move the rows that are being stored: the session goes on as if nobody had tried.
TEST(a_callback_cannot_rewind_a_session_that_is_evaluated) {
    const int32_t tokens[4] = {2, 5, 7, 11};
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_session_options o;
    CHECK(model != NULL);
    if (!model) return;
    memset(&o, 0, sizeof o);
    memset(&rewinding, 0, sizeof rewinding);
    o.n_ctx = 16;
    moe_session *plain = moe_session_open(model, &o, NULL);
    o.should_stop = rewinding_call;
    rewinding.session = moe_session_open(model, &o, NULL);
    for (int i = 0; i < 2; i++) {
        CHECK(moe_session_eval(plain, tokens + 2 * i, 2, NULL) == MOE_OK);
        CHECK(moe_session_eval(rewinding.session, tokens + 2 * i, 2, NULL) == MOE_OK);
    }
    CHECK(rewinding.calls > 0 && rewinding.status == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_length(rewinding.session) == 4);
    CHECK(!memcmp(moe_session_logits(plain, -1), moe_session_logits(rewinding.session, -1),
                  (size_t)moe_model_get_info(model)->n_vocab * sizeof(float)));
    CHECK(moe_session_rewind(rewinding.session, 0, NULL) == MOE_OK);
    moe_session_close(plain);
    moe_session_close(rewinding.session);
    moe_model_close(model);
}

// The memory of a further session of a pool is its cache; a context costs what is stored in it.
TEST(sessions_share_buffers) {
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_pool_options p;
    moe_session_options o;
    const int32_t token = 2;
    CHECK(model != NULL);
    if (!model) return;
    memset(&p, 0, sizeof p);
    memset(&o, 0, sizeof o);
    p.n_threads = 2;
    o.pool = moe_pool_open(&p, NULL);
    o.n_ctx = 16;
    moe_session *small = moe_session_open(model, &o, NULL);
    const size_t size = o.pool->work_size;
    const uint8_t *place = o.pool->work;
    CHECK(small && size > 0);
    moe_session *same = moe_session_open(model, &o, NULL);
    CHECK(same && o.pool->work_size == size && o.pool->work == place);
    CHECK(!moe_session_eval(small, &token, 1, NULL) && !moe_session_eval(same, &token, 1, NULL));
    o.n_ctx = 4000;
    o.n_batch = 600;
    moe_session *large = moe_session_open(model, &o, NULL); // needs more: all move
    CHECK(large && o.pool->work_size > size);
    CHECK(!moe_session_eval(large, &token, 1, NULL) && !moe_session_eval(small, &token, 1, NULL));
    const size_t n = sizeof(float) * (size_t)moe_model_get_info(model)->n_vocab;
    CHECK(!memcmp(moe_session_logits(large, -1), moe_session_logits(same, -1), n));
    // in turns: each finds its own buffers where another one's were
    for (int i = 0; i < 3; i++) {
        CHECK(!moe_session_eval(large, &token, 1, NULL));
        CHECK(!moe_session_eval(same, &token, 1, NULL));
        CHECK(!memcmp(moe_session_logits(large, -1), moe_session_logits(same, -1), n));
    }
    moe_session_close(small);
    moe_session_close(same);
    moe_session_close(large);
    moe_pool_close(o.pool);
    moe_model_close(model);
}

MAIN()
