// What a context holds: going to other tokens, copies, what is hidden, files. Whatever way a
// session came to its tokens, it gives the bits that a new one gives behind them.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"
#include "models.h"

// ---- models and references -------------------------------------------------------------------

enum { MAX_VOCAB = 512 };

// Attention of both kinds, and layers that recur of all kinds; widths for every type of cache.
static const char *const configs[] = {"micro",         "micro_mla",           "qwen3moe_quant",
                                      "dsv3_quant",    "qwen35moe_tiny",      "lfm2moe_tiny",
                                      "jamba_tiny",    "nemotron_h_moe_tiny", "kimi-linear_tiny",
                                      "minimax-01_tiny", "kimi-linear_quant"};
enum { N_CONFIGS = sizeof configs / sizeof configs[0], N_CASES = 3 * N_CONFIGS };

static moe_model *open_config(const char *config) {
    synth_options o;
    memset(&o, 0, sizeof o);
    o.no_tokenizer = 1;
    return models_open(models_write(config, &o));
}

// Model and type of cache number i; 0: they do not go together.
static int open_case(int i, moe_model **model, moe_session_options *o) {
    moe_session_info info;
    memset(o, 0, sizeof *o);
    o->n_ctx = 80;
    o->n_threads = 1 + i % 2;
    o->kv_type = (moe_kv_type)(i % 3);
    *model = open_config(configs[i / 3]);
    CHECK(*model != NULL);
    if (*model && moe_session_estimate(*model, o, &info, NULL) == MOE_OK) return 1;
    CHECK(o->kv_type == MOE_KV_Q8_0);
    moe_model_close(*model);
    return 0;
}

static size_t row_size(const moe_session *s) {
    return sizeof(float) * (size_t)moe_model_get_info(moe_session_model(s))->n_vocab;
}

// The logits behind n tokens, from a session that was never anywhere else.
static void reference(const moe_model *model, const moe_session_options *options,
                      const int32_t *tokens, int32_t n, float *logits) {
    moe_session *s = moe_session_open(model, options, NULL);
    memset(logits, 0xFF, sizeof(float) * MAX_VOCAB);
    CHECK(s && moe_session_eval(s, tokens, n, NULL) == MOE_OK);
    if (s) memcpy(logits, moe_session_logits(s, -1), row_size(s));
    moe_session_close(s);
}

// Does a session hold these tokens, with these logits of the last?
static int holds(const moe_session *s, const int32_t *tokens, int32_t n, const float *logits) {
    const float *last = moe_session_logits(s, -1);
    return moe_session_length(s) == n &&
           !memcmp(moe_session_tokens(s), tokens, sizeof *tokens * (size_t)n) &&
           (logits ? last && !memcmp(last, logits, row_size(s)) : !last);
}

static int eval_pieces(moe_session *s, const int32_t *tokens, int32_t n) {
    static const int32_t pieces[] = {1, 3, 17, 2, 9};
    for (int32_t done = 0, i = 0; done < n; i++) {
        const int32_t now = (int32_t)moe__min(pieces[i % 5], n - done);
        if (moe_session_eval(s, tokens + done, now, NULL) != MOE_OK) return 0;
        done += now;
    }
    return 1;
}

// Tokens that agree with `tokens` up to `common` and nowhere else.
static void other_tokens(const int32_t *tokens, int32_t common, int32_t n, int32_t *other) {
    for (int32_t i = 0; i < n; i++) other[i] = i < common ? tokens[i] : (tokens[i] + 1) % 200;
}

static uint64_t counted(const moe_session *s) { // choices of experts: evaluations leave a trace
    const moe_model_info *info = moe_model_get_info(moe_session_model(s));
    uint64_t sum = 0;
    for (int32_t il = 0; il < info->n_layer; il++) {
        const uint64_t *counts = moe_session_expert_counts(s, il);
        for (int32_t i = 0; counts && i < info->n_expert; i++) sum += counts[i];
    }
    return sum;
}

// ---- tokens ----------------------------------------------------------------------------------

TEST(a_session_tells_its_tokens) {
    moe_model *model = open_config("micro");
    moe_session *s = model ? moe_session_open(model, NULL, NULL) : NULL;
    const int32_t tokens[5] = {3, 1, 4, 1, 5}, others[2] = {9, 2}, all[4] = {3, 1, 9, 2};
    CHECK(moe_session_tokens(NULL) == NULL);
    CHECK(s && moe_session_tokens(s) != NULL);
    if (!s) return;
    CHECK(moe_session_eval(s, tokens, 5, NULL) == MOE_OK);
    CHECK(!memcmp(moe_session_tokens(s), tokens, sizeof tokens));
    CHECK(moe_session_rewind(s, 2, NULL) == MOE_OK);
    CHECK(moe_session_eval(s, others, 2, NULL) == MOE_OK);
    CHECK(!memcmp(moe_session_tokens(s), all, sizeof all));
    // A context is appended to itself.
    CHECK(moe_session_eval(s, moe_session_tokens(s), 4, NULL) == MOE_OK);
    CHECK(!memcmp(moe_session_tokens(s) + 4, all, sizeof all));
    moe_session_close(s);
    moe_model_close(model);
}

// ---- hidden ----------------------------------------------------------------------------------

// What is hidden, times the output matrix, is the logits: within rounding, for every token, however
// the input was cut, also after going back. Without keep_hidden nothing is kept.
TEST(hidden_rows_times_the_output_matrix_are_the_logits) {
    enum { TOKENS = 45 };
    for (int c = 0; c < N_CONFIGS; c++) {
        moe_model *model = open_config(configs[c]);
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.n_ctx = 50, o.n_batch = 20, o.n_threads = 1 + c % 3;
        o.keep_all_logits = o.keep_hidden = MOE_ON;
        moe_session *s = model ? moe_session_open(model, &o, NULL) : NULL;
        CHECK(s != NULL);
        if (!s) continue;
        const moe_model_info *info = moe_model_get_info(model);
        const int64_t n_embd = info->n_embd, n_vocab = info->n_vocab;
        const moe_gguf *gguf = moe_model_gguf(model);
        const moe_gguf_tensor *t = moe_gguf_find_tensor(gguf, "output.weight");
        if (!t) t = moe_gguf_find_tensor(gguf, "token_embd.weight");
        const float *output = (const float *)t->data;
        float *kept = (float *)malloc(sizeof(float) * (size_t)(TOKENS * n_embd));
        double *rows = (double *)malloc(sizeof(double) * (size_t)n_vocab);
        int32_t tokens[TOKENS];
        models_tokens(tokens, TOKENS, 200, 31);
        CHECK(t->type == MOE_TYPE_F32 && kept && rows);
        CHECK(moe_session_hidden(s, -1) == NULL && moe_session_hidden(s, 0) == NULL);
        CHECK(moe_session_eval(s, tokens, TOKENS, NULL) == MOE_OK);
        double scale = 0; // of logits, of few families
        for (int i = 0; i < TOKENS; i++) {
            const float *x = moe_session_hidden(s, i), *logits = moe_session_logits(s, i);
            CHECK(x && logits);
            if (!x || !logits) break;
            memcpy(kept + i * n_embd, x, sizeof *x * (size_t)n_embd);
            for (int64_t v = 0; v < n_vocab; v++) {
                rows[v] = 0;
                for (int64_t k = 0; k < n_embd; k++)
                    rows[v] += (double)x[k] * (double)output[v * n_embd + k];
            }
            if (i == 0) scale = (double)logits[1] / rows[1];
            for (int64_t v = 0; v < n_vocab; v++) rows[v] *= scale;
            const double off = models_nmse(logits, rows, (size_t)n_vocab);
            CHECKF(off < 1e-9, "%s, token %d: %g", configs[c], i, off);
        }
        CHECK(moe_session_hidden(s, TOKENS - 1) == moe_session_hidden(s, -1));
        CHECK(moe_session_hidden(s, TOKENS) == NULL && moe_session_hidden(s, -2) == NULL);
        // Going back forgets them; the same tokens in other pieces give the same bits.
        CHECK(moe_session_rewind(s, 20, NULL) == MOE_OK && moe_session_hidden(s, -1) == NULL);
        for (int i = 20; i < TOKENS; i += 5) {
            CHECK(moe_session_eval(s, tokens + i, 5, NULL) == MOE_OK);
            for (int k = 0; k < 5; k++)
                CHECKF(!memcmp(moe_session_hidden(s, k), kept + (i + k) * n_embd,
                               sizeof(float) * (size_t)n_embd), "%s, token %d", configs[c], i + k);
        }
        // A wrong eval leaves them.
        const int32_t bad = -1;
        CHECK(moe_session_eval(s, &bad, 1, NULL) == MOE_ERROR_ARGUMENT);
        CHECK(!memcmp(moe_session_hidden(s, -1), kept + (TOKENS - 1) * n_embd,
                      sizeof(float) * (size_t)n_embd));
        moe_session_close(s);
        o.keep_hidden = 0;
        s = moe_session_open(model, &o, NULL);
        CHECK(s && moe_session_eval(s, tokens, 3, NULL) == MOE_OK);
        CHECK(moe_session_hidden(s, -1) == NULL && moe_session_hidden(NULL, -1) == NULL);
        moe_session_close(s);
        free(kept);
        free(rows);
        moe_model_close(model);
    }
}

// Several sessions in one pass, some of which keep what is hidden.
TEST(hidden_rows_are_kept_beside_sessions_that_keep_none) {
    moe_model *model = open_config("qwen35moe_tiny");
    moe_pool *pool = moe_pool_open(NULL, NULL);
    moe_session *s[3], *alone;
    moe_session_options o;
    int32_t tokens[20];
    moe_job jobs[3];
    memset(&o, 0, sizeof o);
    memset(jobs, 0, sizeof jobs);
    CHECK(model && pool);
    if (!model || !pool) return;
    models_tokens(tokens, 20, 200, 8);
    o.n_ctx = 40, o.pool = pool, o.keep_hidden = MOE_ON;
    alone = moe_session_open(model, &o, NULL);
    CHECK(alone && moe_session_eval(alone, tokens + 2, 12, NULL) == MOE_OK);
    for (int i = 0; i < 3; i++) {
        o.keep_hidden = i == 1 ? MOE_ON : 0;
        s[i] = moe_session_open(model, &o, NULL);
        jobs[i].session = s[i];
        jobs[i].tokens = tokens + 2 * i;
        jobs[i].n_tokens = 11 + i;
    }
    CHECK(moe_session_eval_many(jobs, 3, NULL) == MOE_OK);
    CHECK(!moe_session_hidden(s[0], -1) && !moe_session_hidden(s[2], -1));
    for (int i = 0; i < 12; i++)
        CHECK(!memcmp(moe_session_hidden(s[1], i), moe_session_hidden(alone, i),
                      sizeof(float) * 64));
    for (int i = 0; i < 3; i++) moe_session_close(s[i]);
    moe_session_close(alone);
    moe_pool_close(pool);
    moe_model_close(model);
}

// ---- sync ------------------------------------------------------------------------------------

// To every list that has a beginning in common with what a session holds, from 0 tokens to all.
TEST(a_session_goes_to_any_other_tokens_bit_by_bit) {
    enum { TOKENS = 40 };
    for (int c = 0; c < N_CASES; c += MODELS_SLOW ? 4 : 1) {
        moe_model *model;
        moe_session_options o;
        int32_t tokens[TOKENS], other[TOKENS];
        float expected[MAX_VOCAB];
        if (!open_case(c, &model, &o)) continue;
        models_tokens(tokens, TOKENS, 200, 77);
        moe_session *s = moe_session_open(model, &o, NULL);
        CHECK(s != NULL);
        const int recurs = moe_model_get_info(model)->n_layer_recurrent > 0;
        for (int32_t common = 0; common <= TOKENS && s; common += MODELS_SLOW ? 7 : 1) {
            for (int shorter = 0; shorter < 2; shorter++) {
                const int32_t n = shorter ? (int32_t)moe__min(common + 2, TOKENS) : TOKENS;
                int32_t reused = -1;
                CHECK(moe_session_rewind(s, 0, NULL) == MOE_OK && eval_pieces(s, tokens, TOKENS));
                const uint64_t replayed = s->n_replayed, before = counted(s);
                other_tokens(tokens, common, n, other);
                reference(model, &o, other, n, expected);
                CHECK(moe_session_sync(s, other, n, &reused, NULL) == MOE_OK);
                CHECKF(holds(s, other, n, expected), "%s, cache %d, %d of %d in common",
                       configs[c / 3], (int)o.kv_type, common, n);
                CHECKF(reused == common - (int32_t)(s->n_replayed - replayed), "%d of %d", reused,
                       common);
                CHECK(recurs || reused == common);
                CHECK(reused >= 0 && (common < TOKENS || counted(s) == before));
            }
        }
        moe_session_close(s);
        moe_model_close(model);
    }
}

// Tokens that are all there: the last one is evaluated again if its logits are not.
TEST(a_beginning_of_what_is_there_costs_its_last_token) {
    for (int c = 0; c < N_CASES; c += 3) {
        moe_model *model;
        moe_session_options o;
        int32_t tokens[40], reused;
        float expected[MAX_VOCAB];
        if (!open_case(c, &model, &o)) continue;
        models_tokens(tokens, 40, 200, 5);
        moe_session *s = moe_session_open(model, &o, NULL);
        for (int32_t n = 1; n <= 40; n += MODELS_SLOW ? 13 : 3) {
            for (int cut = 0; cut < 2; cut++) {
                CHECK(moe_session_sync(s, tokens, 40, NULL, NULL) == MOE_OK);
                if (cut) CHECK(moe_session_rewind(s, n, NULL) == MOE_OK);
                const uint64_t replayed = s->n_replayed;
                reference(model, &o, tokens, n, expected);
                CHECK(moe_session_sync(s, tokens, n, &reused, NULL) == MOE_OK);
                CHECKF(holds(s, tokens, n, expected), "%s, %d tokens", configs[c / 3], n);
                const int32_t again = (int32_t)(s->n_replayed - replayed);
                CHECKF(n == 40 ? reused == 40 : reused == n - 1 - again, "%d of %d", reused, n);
                // Its own tokens are an argument like any other.
                CHECK(moe_session_sync(s, moe_session_tokens(s), n, &reused, NULL) == MOE_OK);
                CHECK(reused == n && holds(s, tokens, n, expected));
            }
        }
        CHECK(moe_session_sync(s, NULL, 0, &reused, NULL) == MOE_OK && reused == 0);
        CHECK(holds(s, NULL, 0, NULL));
        moe_session_close(s);
        moe_model_close(model);
    }
}

// A token of a long prompt was evaluated with expanded keys; so it is when it is evaluated again.
TEST(latent_attention_keeps_its_form_when_a_last_token_is_evaluated_again) {
    static const char *const names[] = {"micro_mla", "kimi-linear_tiny"};
    enum { TOKENS = 200 };
    for (int c = 0; c < 2; c++) {
        moe_model *model = open_config(names[c]);
        moe_session_options o;
        int32_t tokens[TOKENS], reused;
        float expected[MAX_VOCAB];
        memset(&o, 0, sizeof o);
        o.n_ctx = TOKENS + 1;
        models_tokens(tokens, TOKENS, 200, 6);
        CHECK(model != NULL);
        if (!model) continue;
        reference(model, &o, tokens, TOKENS, expected);
        moe_session *s = moe_session_open(model, &o, NULL);
        CHECK(s && moe_session_eval(s, tokens, TOKENS, NULL) == MOE_OK);
        CHECK(moe_session_eval(s, tokens, 1, NULL) == MOE_OK);
        CHECK(moe_session_sync(s, tokens, TOKENS, &reused, NULL) == MOE_OK);
        CHECK(reused > 0 && reused < TOKENS && holds(s, tokens, TOKENS, expected));
        moe_session_close(s);
        moe_model_close(model);
    }
}

TEST(wrong_tokens_for_a_session_change_nothing) {
    moe_model *model = open_config("jamba_tiny");
    moe_session_options o;
    int32_t tokens[30], bad[30];
    float expected[MAX_VOCAB];
    moe_error error;
    memset(&o, 0, sizeof o);
    o.n_ctx = 25;
    moe_session *s = model ? moe_session_open(model, &o, NULL) : NULL;
    CHECK(s != NULL);
    if (!s) return;
    models_tokens(tokens, 30, 200, 9);
    reference(model, &o, tokens, 20, expected);
    CHECK(moe_session_eval(s, tokens, 20, NULL) == MOE_OK);
    static const int32_t ids[] = {-1, 512, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 4; i++)
        for (int at = 0; at < 22; at += 7) {
            int32_t reused = -1;
            memcpy(bad, tokens, sizeof bad);
            bad[at] = ids[i];
            clear_error(&error);
            CHECK(moe_session_sync(s, bad, 22, &reused, &error) == MOE_ERROR_ARGUMENT);
            CHECK(error.status == MOE_ERROR_ARGUMENT && *error.text && reused == 0);
        }
    CHECK(moe_session_sync(s, tokens, 26, NULL, &error) == MOE_ERROR_CONTEXT_FULL);
    CHECK(error.status == MOE_ERROR_CONTEXT_FULL && !strcmp(error.where, "n_ctx"));
    CHECK(moe_session_sync(s, NULL, 3, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_sync(s, tokens, -1, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_sync(s, tokens, INT32_MIN, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_sync(NULL, tokens, 3, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(holds(s, tokens, 20, expected));
    moe_session_close(s);
    moe_model_close(model);
}

typedef struct stopper {
    long calls, stop_at;
    moe_session *tried; // a session that it tries to change
    const int32_t *tokens;
    int changed;
} stopper;

static int stopper_ask(void *user) {
    stopper *s = (stopper *)user;
    if (s->tried)
        s->changed += moe_session_sync(s->tried, s->tokens, 2, NULL, NULL) == MOE_OK ||
                      moe_session_sync(s->tried, NULL, 0, NULL, NULL) == MOE_OK;
    return ++s->calls == s->stop_at;
}

// Stopped at any place it holds what it held, or what both have in common; and goes on from there.
TEST(stopped_on_the_way_a_session_holds_a_beginning) {
    static const char *const names[] = {"micro", "qwen35moe_tiny", "jamba_tiny"};
    for (int c = 0; c < 3; c++) {
        moe_model *model = open_config(names[c]);
        moe_session_options o;
        stopper stop;
        int32_t tokens[40], other[40];
        float first[MAX_VOCAB], expected[MAX_VOCAB];
        int held = 0, common = 0, going = 1;
        memset(&o, 0, sizeof o);
        memset(&stop, 0, sizeof stop);
        CHECK(model != NULL);
        if (!model) continue;
        o.n_ctx = 60, o.n_batch = 6, o.n_threads = 2;
        o.n_checkpoints = MOE_OFF; // much to evaluate again
        models_tokens(tokens, 40, 200, 3);
        other_tokens(tokens, 12, 40, other);
        reference(model, &o, tokens, 40, first);
        reference(model, &o, other, 40, expected);
        o.should_stop = stopper_ask;
        o.should_stop_user = &stop;
        moe_session *s = moe_session_open(model, &o, NULL);
        for (long at = 1; going && s; at++) {
            int32_t reused = -1;
            stop.stop_at = 0;
            CHECK(moe_session_rewind(s, 0, NULL) == MOE_OK && eval_pieces(s, tokens, 40));
            CHECK(holds(s, tokens, 40, first));
            stop.calls = 0;
            stop.stop_at = at;
            stop.tried = s;
            stop.tokens = other;
            moe_status status = moe_session_sync(s, other, 40, &reused, NULL);
            stop.tried = NULL;
            if (status == MOE_OK) going = 0;
            else CHECK(status == MOE_ERROR_CANCELLED && reused == 0);
            if (going && moe_session_length(s) == 40) {
                CHECKF(holds(s, tokens, 40, first), "%s, stopped at %ld", names[c], at);
                held++;
            } else if (going) {
                CHECKF(holds(s, other, 12, NULL), "%s, stopped at %ld", names[c], at);
                common++;
            }
            stop.stop_at = 0;
            CHECK(moe_session_sync(s, other, 40, NULL, NULL) == MOE_OK);
            CHECKF(holds(s, other, 40, expected), "%s, stopped at %ld", names[c], at);
        }
        CHECKF(common > 2 && (c == 0 || held > 3) && !stop.changed, "%s: %d, %d", names[c], common,
               held);
        moe_session_close(s);
        moe_model_close(model);
    }
}

// ---- copies ----------------------------------------------------------------------------------

// Two branches of a dialogue go different ways, and back, without disturbing each other.
TEST(a_copy_goes_on_by_itself_bit_by_bit) {
    enum { TOKENS = 70 };
    for (int c = 0; c < N_CASES; c += MODELS_SLOW ? 4 : 1) {
        moe_model *model;
        moe_session_options o, po;
        int32_t tokens[TOKENS], other[TOKENS];
        float expected[MAX_VOCAB];
        if (!open_case(c, &model, &o)) continue;
        models_tokens(tokens, TOKENS, 200, 19);
        for (int way = 0; way < 6; way++) {
            const int32_t n = 15 + 9 * way; // tokens in common
            po = o;
            po.n_ctx = way % 2 ? 70 : 97;
            po.n_batch = way % 3 ? 7 : 0;
            po.n_checkpoints = way == 1 ? MOE_OFF : way == 2 ? 1 : 0;
            po.keep_all_logits = way == 3 || way == 5 ? MOE_ON : 0;
            o.keep_all_logits = way == 4 || way == 5 ? MOE_ON : 0;
            moe_session *a = moe_session_open(model, &o, NULL);
            moe_session *b = moe_session_open(model, &po, NULL);
            CHECK(a && b);
            if (!a || !b) break;
            other_tokens(tokens, n, TOKENS, other);
            CHECK(eval_pieces(a, tokens, n));
            CHECK(eval_pieces(b, other + 10, 5 * way)); // is forgotten
            reference(model, &o, tokens, n, expected);
            CHECK(moe_session_copy(b, a, NULL) == MOE_OK);
            CHECKF(holds(b, tokens, n, expected) && holds(a, tokens, n, expected), "%s, cache %d",
                   configs[c / 3], (int)o.kv_type);
            for (int32_t i = n; i < TOKENS; i += 5) { // in turns
                const int32_t now = (int32_t)moe__min(5, TOKENS - i);
                CHECK(moe_session_eval(a, tokens + i, now, NULL) == MOE_OK);
                CHECK(moe_session_eval(b, other + i, now, NULL) == MOE_OK);
            }
            reference(model, &o, tokens, TOKENS, expected);
            CHECK(holds(a, tokens, TOKENS, expected));
            reference(model, &o, other, TOKENS, expected);
            CHECKF(holds(b, other, TOKENS, expected), "%s, cache %d, way %d", configs[c / 3],
                   (int)o.kv_type, way);
            // Back behind where they parted, and before.
            for (int32_t back = n + 3; back > 0; back -= 1 + n / 3) {
                reference(model, &o, other, back, expected);
                CHECK(moe_session_rewind(b, back - 1, NULL) == MOE_OK);
                CHECK(moe_session_eval(b, other + back - 1, 1, NULL) == MOE_OK);
                CHECKF(holds(b, other, back, expected), "%s, cache %d, way %d, back to %d",
                       configs[c / 3], (int)o.kv_type, way, back);
            }
            moe_session_close(a);
            reference(model, &o, tokens, TOKENS, expected);
            CHECK(moe_session_sync(b, tokens, TOKENS, NULL, NULL) == MOE_OK);
            CHECK(holds(b, tokens, TOKENS, expected));
            moe_session_close(b);
        }
        moe_model_close(model);
    }
}

// An empty session, one without logits, hidden rows.
TEST(a_copy_has_what_the_original_has) {
    moe_model *model = open_config("lfm2moe_tiny");
    moe_session_options o;
    int32_t tokens[20];
    memset(&o, 0, sizeof o);
    o.n_ctx = 30;
    models_tokens(tokens, 20, 200, 2);
    CHECK(model != NULL);
    if (!model) return;
    for (int i = 0; i < 4; i++) {
        o.keep_hidden = i & 1 ? MOE_ON : 0;
        moe_session *a = moe_session_open(model, &o, NULL);
        o.keep_hidden = i & 2 ? MOE_ON : 0;
        moe_session *b = moe_session_open(model, &o, NULL), *empty = moe_session_open(model, &o,
                                                                                      NULL);
        CHECK(a && b && empty);
        CHECK(moe_session_eval(a, tokens, 20, NULL) == MOE_OK);
        CHECK(moe_session_copy(b, a, NULL) == MOE_OK);
        CHECK((moe_session_hidden(b, -1) != NULL) == (i == 3));
        if (i == 3)
            CHECK(!memcmp(moe_session_hidden(a, -1), moe_session_hidden(b, -1),
                          sizeof(float) * 64));
        CHECK(moe_session_rewind(a, 18, NULL) == MOE_OK && moe_session_copy(b, a, NULL) == MOE_OK);
        CHECK(holds(b, tokens, 18, NULL) && !moe_session_hidden(b, -1));
        CHECK(moe_session_copy(b, b, NULL) == MOE_OK && holds(b, tokens, 18, NULL));
        CHECK(moe_session_copy(b, empty, NULL) == MOE_OK && holds(b, NULL, 0, NULL));
        CHECK(moe_session_eval(b, tokens, 20, NULL) == MOE_OK);
        CHECK(moe_session_sync(a, tokens, 20, NULL, NULL) == MOE_OK);
        CHECK(!memcmp(moe_session_logits(a, -1), moe_session_logits(b, -1), row_size(a)));
        moe_session_close(a);
        moe_session_close(b);
        moe_session_close(empty);
    }
    moe_model_close(model);
}

typedef struct copier {
    moe_session *to, *from;
    int copied;
} copier;

static int copier_ask(void *user) {
    copier *c = (copier *)user;
    c->copied += moe_session_copy(c->to, c->from, NULL) == MOE_OK ||
                 moe_session_copy(c->from, c->to, NULL) == MOE_OK;
    return 0;
}

TEST(sessions_that_do_not_fit_are_not_copied) {
    moe_model *model = open_config("qwen3moe_quant"), *again = open_config("qwen3moe_quant");
    moe_session_options o;
    copier c;
    int32_t tokens[20];
    float expected[MAX_VOCAB];
    moe_error error;
    memset(&o, 0, sizeof o);
    models_tokens(tokens, 20, 200, 2);
    CHECK(model && again);
    if (!model || !again) return;
    o.n_ctx = 20;
    reference(model, &o, tokens, 11, expected);
    moe_session *a = moe_session_open(model, &o, NULL);
    moe_session *other_model = moe_session_open(again, &o, NULL);
    o.kv_type = MOE_KV_Q8_0;
    moe_session *other_kv = moe_session_open(model, &o, NULL);
    o.kv_type = MOE_KV_F16;
    o.n_ctx = 10;
    moe_session *small = moe_session_open(model, &o, NULL);
    o.n_ctx = 20;
    o.should_stop = copier_ask;
    o.should_stop_user = &c;
    moe_session *asks = moe_session_open(model, &o, NULL);
    CHECK(a && other_model && other_kv && small && asks);
    CHECK(moe_session_eval(a, tokens, 11, NULL) == MOE_OK);
    moe_session *const wrong[] = {other_model, other_kv, small, NULL};
    for (int i = 0; i < 4; i++) {
        const moe_status status = i == 2 ? MOE_ERROR_CONTEXT_FULL : MOE_ERROR_ARGUMENT;
        clear_error(&error);
        CHECK(moe_session_copy(wrong[i], a, &error) == status);
        CHECK(error.status == status && *error.text && *error.where);
        CHECK(!wrong[i] || holds(wrong[i], NULL, 0, NULL));
    }
    CHECK(moe_session_copy(a, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_copy(NULL, NULL, NULL) == MOE_ERROR_ARGUMENT);
    c.from = a, c.to = asks, c.copied = 0; // a session that is being evaluated
    CHECK(moe_session_eval(asks, tokens, 3, NULL) == MOE_OK && !c.copied);
    CHECK(holds(a, tokens, 11, expected));
    CHECK(moe_session_rewind(a, 10, NULL) == MOE_OK && moe_session_copy(small, a, NULL) == MOE_OK);
    CHECK(holds(small, tokens, 10, NULL));
    CHECK(moe_session_eval(small, tokens, 1, NULL) == MOE_ERROR_CONTEXT_FULL);
    moe_session_close(a);
    moe_session_close(other_model);
    moe_session_close(other_kv);
    moe_session_close(small);
    moe_session_close(asks);
    moe_model_close(model);
    moe_model_close(again);
}

MAIN()
