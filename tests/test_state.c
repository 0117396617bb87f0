// What a context holds: going to other tokens, copies, what is hidden, files. Whatever way a
// session came to its tokens, it gives the bits that a new one gives behind them.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"
#include "models.h"
#include <signal.h>
#include <sys/resource.h>

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
           (n == 0 || !memcmp(moe_session_tokens(s), tokens, sizeof *tokens * (size_t)n)) &&
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
        for (int32_t common = 0; common <= TOKENS && s;
             common += MODELS_SLOW ? 8 : c % 3 ? 5 : 1) {
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

// ---- files -----------------------------------------------------------------------------------

// A file in memory, that fails when told to.
typedef struct store {
    uint8_t *data;
    size_t size, capacity, at; // at: where reading is
    size_t piece;              // the most that one read gives; 0: all
    long calls, fail_at;
    int is_lost;               // a failing read says so, in place of ending
} store;

static int store_write(void *user, const void *data, size_t size) {
    store *f = (store *)user;
    if (++f->calls == f->fail_at) return 0;
    if (size > f->capacity - f->size) {
        f->capacity = 2 * f->capacity + size + 4096;
        f->data = (uint8_t *)realloc(f->data, f->capacity);
        if (!f->data) exit(1);
    }
    memcpy(f->data + f->size, data, size);
    f->size += size;
    return 1;
}
static size_t store_read(void *user, void *data, size_t size) {
    store *f = (store *)user;
    if (++f->calls == f->fail_at) return f->is_lost ? SIZE_MAX : 0;
    size_t n = f->size - f->at < size ? f->size - f->at : size;
    if (f->piece && n > f->piece) n = f->piece;
    if (n) memcpy(data, f->data + f->at, n);
    f->at += n;
    return n;
}
static moe_status store_save(store *f, const moe_session *s, const moe_sampler *sampler) {
    f->size = 0;
    return moe_session_save_to(s, sampler, store_write, f, NULL);
}
static moe_status store_load(store *f, moe_session *s, moe_sampler *sampler, moe_error *error) {
    f->at = 0;
    f->calls = 0;
    return moe_session_load_from(s, sampler, store_read, f, error);
}

// Its head, and checksums that are right again after a change.
static uint64_t word_at(const store *f, int i) { return moe__load_u64(f->data + 8 * i); }
static void put_word(store *f, int i, uint64_t word) {
    moe__state_head head;
    memcpy(f->data + 8 * i, &word, sizeof word);
    memcpy(&head, f->data, sizeof head);
    head.sum = moe__state_head_sum(&head);
    memcpy(f->data, &head, sizeof head);
}
enum { WORD_VERSION = 1, WORD_SIZE, WORD_MODEL, WORD_KV, WORD_LENGTH, WORD_NOW, WORD_BEFORE,
       WORD_CUT_FROM, WORD_SAVED, WORD_LOGITS, WORD_SAMPLER, WORD_RECENT };

// Sections: where they begin, by their tags; the file's end is the 7th.
static int sections_of(const store *f, size_t *at) {
    static const char *const tags[] = {"tokens", "rows", "states", "back", "logits", "sampler"};
    size_t place = sizeof(moe__state_head);
    for (int i = 0; i < 6; i++) {
        char tag[8] = {0};
        memcpy(tag, tags[i], strlen(tags[i]));
        while (place + 8 <= f->size && memcmp(f->data + place, tag, 8)) place++;
        if (place + 8 > f->size) return 0;
        at[i] = place;
    }
    at[6] = f->size;
    return 1;
}
static void seal(store *f, size_t begin, size_t end) {
    moe__checksum sum;
    memset(&sum, 0, sizeof sum);
    moe__checksum_add(&sum, f->data + begin, end - begin - 8);
    const uint64_t word = moe__checksum_end(&sum);
    memcpy(f->data + end - 8, &word, sizeof word);
}

// A session that was in several places before it came to its n tokens.
static moe_session *open_with_past(const moe_model *model, const moe_session_options *o,
                                   const int32_t *tokens, int32_t n, int way) {
    moe_session *s = moe_session_open(model, o, NULL);
    int32_t other[80];
    CHECK(s != NULL);
    if (!s) return NULL;
    other_tokens(tokens, n / 2, n, other);
    if (way == 0) CHECK(n == 0 || moe_session_eval(s, tokens, n, NULL) == MOE_OK);
    if (way == 1) CHECK(eval_pieces(s, tokens, n));
    if (way == 2) CHECK(eval_pieces(s, other, n) && !moe_session_sync(s, tokens, n, NULL, NULL));
    if (way == 3) CHECK(eval_pieces(s, tokens, n + 5) && !moe_session_rewind(s, n, NULL));
    return s;
}

// Another session of a model that was opened anew goes on as if it was the same, and back, too.
TEST(a_loaded_session_goes_on_bit_by_bit) {
    enum { TOKENS = 70 };
    static const int32_t lengths[] = {0, 1, 15, 16, 17, 31, 33, 48, 60};
    for (int c = 0; c < N_CASES; c += MODELS_SLOW ? 4 : 1) {
        moe_model *model, *again;
        moe_session_options o, other;
        int32_t tokens[TOKENS];
        float expected[MAX_VOCAB], behind[MAX_VOCAB];
        store f, g;
        if (!open_case(c, &model, &o)) continue;
        again = open_config(configs[c / 3]);
        memset(&f, 0, sizeof f);
        memset(&g, 0, sizeof g);
        models_tokens(tokens, TOKENS, 200, 23);
        reference(model, &o, tokens, TOKENS, behind);
        for (int k = 0; k < 36; k += MODELS_SLOW ? 5 : 1) {
            const int32_t n = lengths[k / 4];
            other = o;
            if (k % 3 == 1) other.n_ctx = 70, other.n_batch = 9, other.n_threads = 3;
            if (k % 3 == 1) other.schedule = MOE_SCHEDULE_BALANCED;
            if (k % 3 == 2) other.keep_all_logits = MOE_ON, other.n_checkpoints = 1 - 2 * (k % 2);
            o.keep_all_logits = k % 5 == 0 ? MOE_ON : 0;
            moe_session *a = open_with_past(model, &o, tokens, n, k % 4);
            moe_session *b = open_with_past(again, &other, tokens + 3, 20, k % 4);
            if (!a || !b) break;
            if (n) reference(model, &o, tokens, n, expected);
            const float *had = n && moe_session_logits(a, -1) ? expected : NULL;
            CHECK(store_save(&f, a, NULL) == MOE_OK);
            f.piece = k % 4 == 1 ? 13 : 0;
            CHECK(store_load(&f, b, NULL, NULL) == MOE_OK && f.at == f.size);
            CHECKF(holds(b, tokens, n, had), "%s, cache %d, %d tokens, way %d", configs[c / 3],
                   (int)o.kv_type, n, k % 4);
            if (k % 3 == 0) { // what can be saved again is the same
                CHECK(store_save(&g, b, NULL) == MOE_OK);
                CHECK(g.size == f.size && !memcmp(f.data, g.data, f.size));
            }
            moe_session_close(a);
            CHECK(moe_session_eval(b, tokens + n, TOKENS - n, NULL) == MOE_OK);
            CHECKF(holds(b, tokens, TOKENS, behind), "%s, cache %d, %d tokens, way %d",
                   configs[c / 3], (int)o.kv_type, n, k % 4);
            for (int32_t back = n + 1; back > 0; back -= 5 + n / 3) {
                reference(model, &o, tokens, back, expected);
                CHECK(moe_session_sync(b, tokens, back, NULL, NULL) == MOE_OK);
                CHECKF(holds(b, tokens, back, expected), "%s, %d tokens, way %d, back to %d",
                       configs[c / 3], n, k % 4, back);
            }
            moe_session_close(b);
        }
        free(f.data);
        free(g.data);
        moe_model_close(again);
        moe_model_close(model);
    }
}

// In a file is what a session knows, and not what was in memory before.
static void *filling_alloc(void *user, size_t size) {
    void *memory = malloc(size);
    if (memory) memset(memory, *(const int *)user, size);
    return memory;
}
static void filling_free(void *user, void *memory, size_t size) {
    memset(memory, *(const int *)user, size);
    free(memory);
}
TEST(a_file_shows_nothing_but_the_session) {
    for (int c = 0; c < N_CONFIGS; c++) {
        store files[2];
        memset(files, 0, sizeof files);
        for (int i = 0; i < 2; i++) {
            static int fill[2] = {0x11, 0xEE};
            synth_options so;
            moe_model_options mo;
            moe_session_options o;
            int32_t tokens[60];
            memset(&so, 0, sizeof so);
            memset(&mo, 0, sizeof mo);
            memset(&o, 0, sizeof o);
            so.no_tokenizer = 1;
            o.n_ctx = 64;
            mo.allocator.alloc = filling_alloc;
            mo.allocator.free = filling_free;
            mo.allocator.user = &fill[i];
            models_tokens(tokens, 60, 200, 23);
            moe_model *model = moe_model_open(models_write(configs[c], &so), &mo, NULL);
            moe_session *s = model ? open_with_past(model, &o, tokens, 53, 1) : NULL;
            CHECK(s && store_save(&files[i], s, NULL) == MOE_OK);
            moe_session_close(s);
            moe_model_close(model);
        }
        CHECKF(files[0].size == files[1].size &&
                   !memcmp(files[0].data, files[1].data, files[0].size), "%s", configs[c]);
        free(files[0].data);
        free(files[1].data);
    }
}

// Draws with it: random numbers and what is penalized go on.
TEST(a_loaded_sampler_draws_the_same_tokens) {
    enum { PROMPT = 20, DRAWS = 30 };
    static const char *const names[] = {"micro", "jamba_tiny", "dsv3_quant"};
    for (int c = 0; c < 3; c++)
        for (int at = 0; at < DRAWS; at += 7) { // where it is saved
            moe_model *model = open_config(names[c]);
            const char *path = models_path("sampled");
            moe_session_options o;
            moe_sampler_options so;
            int32_t tokens[PROMPT + DRAWS], token;
            memset(&o, 0, sizeof o);
            memset(&so, 0, sizeof so);
            if (!model) return;
            const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
            o.n_ctx = 64;
            so.temperature = 3, so.repeat_penalty = 1.5f, so.repeat_last_n = 16, so.seed = 5;
            models_tokens(tokens, PROMPT, 200, 4);
            moe_session *s = moe_session_open(model, &o, NULL);
            moe_sampler *sampler = moe_sampler_open(&so, n_vocab, n_vocab, NULL);
            CHECK(s && sampler && moe_session_eval(s, tokens, PROMPT, NULL) == MOE_OK);
            for (int i = 0; i < PROMPT; i++) moe_sampler_accept(sampler, tokens[i]);
            for (int i = 0; i < DRAWS; i++) {
                if (i == at) CHECK(moe_session_save_with(s, sampler, path, NULL) == MOE_OK);
                token = tokens[PROMPT + i] = moe_sampler_sample(sampler, moe_session_logits(s, -1));
                moe_sampler_accept(sampler, token);
                CHECK(moe_session_eval(s, &token, 1, NULL) == MOE_OK);
            }
            moe_session_close(s);
            moe_sampler_close(sampler);
            s = moe_session_open(model, &o, NULL);
            so.seed = 99;
            sampler = moe_sampler_open(&so, n_vocab, n_vocab, NULL);
            for (int i = 0; i < 40; i++) moe_sampler_accept(sampler, i);
            CHECK(moe_session_load_with(s, sampler, path, NULL) == MOE_OK);
            for (int i = at; i < DRAWS; i++) {
                token = moe_sampler_sample(sampler, moe_session_logits(s, -1));
                CHECKF(token == tokens[PROMPT + i], "%s, saved at %d, token %d", names[c], at, i);
                moe_sampler_accept(sampler, token);
                CHECK(moe_session_eval(s, &token, 1, NULL) == MOE_OK);
            }
            // Without one there, it stays as it is; a shorter memory takes the last tokens.
            const uint64_t random = sampler->random;
            CHECK(moe_session_save(s, path, NULL) == MOE_OK);
            CHECK(moe_session_load_with(s, sampler, path, NULL) == MOE_OK);
            CHECK(sampler->random == random && sampler->n_recent == 16);
            CHECK(moe_session_save_with(s, sampler, path, NULL) == MOE_OK);
            so.repeat_last_n = 5;
            moe_sampler *brief = moe_sampler_open(&so, n_vocab, n_vocab, NULL);
            CHECK(brief && moe_session_load_with(s, brief, path, NULL) == MOE_OK);
            CHECK(brief->n_recent == 5 && brief->random == random);
            for (int i = 0; i < 5; i++)
                CHECK(brief->recent[(brief->next_recent + i) % 5] ==
                      sampler->recent[(sampler->next_recent + 11 + i) % 16]);
            moe_sampler_close(brief);
            CHECK(moe_session_load(s, path, NULL) == MOE_OK);
            moe_session_close(s);
            moe_sampler_close(sampler);
            moe_model_close(model);
        }
}

TEST(files_of_other_models_and_sessions_are_refused_with_the_reason) {
    synth_options seeded;
    memset(&seeded, 0, sizeof seeded);
    seeded.no_tokenizer = 1;
    moe_model *model = open_config("qwen3moe_quant"), *other = open_config("dsv3_quant");
    seeded.seed = 3;
    moe_model *weights = models_open(models_write("qwen3moe_quant", &seeded));
    seeded.seed = 0;
    seeded.type = "q8_0";
    moe_model *types = models_open(models_write("qwen3moe_quant", &seeded));
    moe_session_options o;
    int32_t tokens[30];
    moe_error error;
    store f;
    memset(&o, 0, sizeof o);
    memset(&f, 0, sizeof f);
    o.n_ctx = 40;
    models_tokens(tokens, 30, 200, 4);
    CHECK(model && other && weights && types);
    moe_session *s = open_with_past(model, &o, tokens, 20, 1);
    CHECK(store_save(&f, s, NULL) == MOE_OK);
    const struct {
        const moe_model *model;
        int n_ctx, kv_type;
        moe_status status;
        const char *where, *text;
    } cases[] = {{other, 40, 0, MOE_ERROR_ARGUMENT, "model", "another model"},
                 {weights, 40, 0, MOE_ERROR_ARGUMENT, "model", "another model"},
                 {types, 40, 0, MOE_ERROR_ARGUMENT, "model", "another model"},
                 {model, 40, MOE_KV_Q8_0, MOE_ERROR_ARGUMENT, "kv_type", "F16, the session has"},
                 {model, 40, MOE_KV_F32, MOE_ERROR_ARGUMENT, "kv_type", "in F32"},
                 {model, 19, 0, MOE_ERROR_CONTEXT_FULL, "n_ctx", "20 tokens do not fit into 19"},
                 {model, 20, 0, MOE_OK, "", ""}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        o.n_ctx = cases[i].n_ctx;
        o.kv_type = (moe_kv_type)cases[i].kv_type;
        float expected[MAX_VOCAB];
        moe_session *t = moe_session_open(cases[i].model, &o, NULL);
        CHECK(t && moe_session_eval(t, tokens, 5, NULL) == MOE_OK);
        reference(cases[i].model, &o, tokens, 5, expected);
        memset(&error, 0, sizeof error);
        CHECKF(store_load(&f, t, NULL, &error) == cases[i].status, "case %zu: %s", i, error.text);
        CHECKF(!strcmp(error.where, cases[i].where) && strstr(error.text, cases[i].text),
               "case %zu: %s: %s", i, error.where, error.text);
        CHECK(!cases[i].status || holds(t, tokens, 5, expected));
        moe_session_close(t);
    }
    // Another version; and what it never was.
    o.n_ctx = 40, o.kv_type = MOE_KV_F16;
    put_word(&f, WORD_VERSION, 2);
    CHECK(store_load(&f, s, NULL, &error) == MOE_ERROR_UNSUPPORTED && strstr(error.text, "2"));
    f.data[0] = 'G';
    CHECK(store_load(&f, s, NULL, &error) == MOE_ERROR_FORMAT && strstr(error.text, "no saved"));
    f.size = 0;
    CHECK(store_load(&f, s, NULL, &error) == MOE_ERROR_FORMAT && strstr(error.text, "too early"));
    // Another instruction set: the last bits of its own.
    if (models_has_isa(MOE_ISA_AVX2)) {
        CHECK(store_save(&f, s, NULL) == MOE_OK);
        float expected[MAX_VOCAB];
        reference(model, &o, tokens, 25, expected);
        o.isa = MOE_ISA_SCALAR;
        moe_session *plain = moe_session_open(model, &o, NULL);
        double r[MAX_VOCAB];
        CHECK(plain && store_load(&f, plain, NULL, NULL) == MOE_OK);
        CHECK(moe_session_eval(plain, tokens + 20, 5, NULL) == MOE_OK);
        const size_t n = row_size(plain) / sizeof(float);
        for (size_t i = 0; i < n; i++) r[i] = (double)expected[i];
        CHECK(models_nmse(moe_session_logits(plain, -1), r, n) < 1e-3);
        moe_session_close(plain);
    }
    moe_session_close(s);
    free(f.data);
    moe_model_close(model);
    moe_model_close(other);
    moe_model_close(weights);
    moe_model_close(types);
}

// ---- damaged files ---------------------------------------------------------------------------

// A session and a file of another one, beside it what follows a token in the session.
typedef struct victim {
    moe_model *model;
    moe_session *session;
    moe_sampler *sampler;
    int32_t tokens[80];
    float next[MAX_VOCAB];
    store whole, damaged;
    int n_refused;
} victim;
enum { VICTIM_HOLDS = 37 };

static int victim_open(victim *v, const char *config, moe_kv_type kv) {
    moe_session_options o;
    moe_sampler_options so;
    memset(v, 0, sizeof *v);
    memset(&o, 0, sizeof o);
    memset(&so, 0, sizeof so);
    o.n_ctx = 80, o.n_threads = 1, o.kv_type = kv;
    so.temperature = 1, so.repeat_penalty = 1.2f;
    v->model = open_config(config);
    if (!v->model) return 0;
    const int32_t n_vocab = moe_model_get_info(v->model)->n_vocab;
    models_tokens(v->tokens, 80, 200, 41);
    moe_session *s = open_with_past(v->model, &o, v->tokens + 20, 50, 1);
    v->sampler = moe_sampler_open(&so, n_vocab, n_vocab, NULL);
    for (int i = 0; i < 9; i++) moe_sampler_accept(v->sampler, v->tokens[i]);
    CHECK(s && store_save(&v->whole, s, v->sampler) == MOE_OK);
    moe_session_close(s);
    v->session = open_with_past(v->model, &o, v->tokens, VICTIM_HOLDS, 1);
    reference(v->model, &o, v->tokens, VICTIM_HOLDS + 1, v->next);
    store_write(&v->damaged, v->whole.data, v->whole.size);
    return v->session != NULL;
}
static void victim_close(victim *v) {
    moe_session_close(v->session);
    moe_sampler_close(v->sampler);
    moe_model_close(v->model);
    free(v->whole.data);
    free(v->damaged.data);
}
static void victim_mend(victim *v) {
    v->damaged.size = 0;
    store_write(&v->damaged, v->whole.data, v->whole.size);
}

// The damaged file is refused, and the session goes on as if it had never seen it.
static void victim_refuses(victim *v, const char *what, size_t at) {
    moe_error error;
    const uint64_t random = v->sampler->random;
    const int32_t n_recent = v->sampler->n_recent;
    clear_error(&error);
    moe_status status = store_load(&v->damaged, v->session, v->sampler, &error);
    CHECKF(status != MOE_OK && error.status == status && *error.text && *error.where,
           "%s at %zu: %s", what, at, moe_status_name(status));
    v->n_refused += status != MOE_OK;
    CHECK(v->sampler->random == random && v->sampler->n_recent == n_recent);
    CHECKF(moe_session_length(v->session) == VICTIM_HOLDS &&
               moe_session_eval(v->session, v->tokens + VICTIM_HOLDS, 1, NULL) == MOE_OK &&
               holds(v->session, v->tokens, VICTIM_HOLDS + 1, v->next),
           "%s at %zu: the session has changed", what, at);
    CHECK(moe_session_rewind(v->session, VICTIM_HOLDS, NULL) == MOE_OK);
    victim_mend(v);
}

static const struct {
    const char *config;
    moe_kv_type kv;
} victims[] = {{"micro", MOE_KV_F16},
               {"qwen3moe_quant", MOE_KV_Q8_0},
               {"qwen35moe_tiny", MOE_KV_F32},
               {"jamba_tiny", MOE_KV_F16},
               {"kimi-linear_tiny", MOE_KV_F32}};
enum { N_VICTIMS = sizeof victims / sizeof victims[0] };

TEST(damaged_files_are_refused_and_change_nothing) {
    int n_refused = 0;
    for (int c = 0; c < N_VICTIMS; c++) {
        victim v;
        size_t at[7];
        CHECK(victim_open(&v, victims[c].config, victims[c].kv));
        if (!v.session) continue;
        store *f = &v.damaged;
        const size_t size = f->size;
        CHECK(sections_of(f, at));
        const int n = 300;
        for (int i = 0; i < n; i++) { // a bit, or a few bytes, anywhere
            const uint64_t random = synth_random(7, (uint64_t)(c * n + i));
            // a third of them in the head and at the edges of sections
            size_t place = i % 3 ? (size_t)(random >> 8) % size : (size_t)(random >> 8) % 104;
            if (i % 9 == 3) place = at[i % 6] + (size_t)(random >> 8) % 16;
            f->data[place] ^= (uint8_t)(1 << random % 8);
            for (size_t k = 1; k < 8 && i % 4 == 3 && place + k < size; k++)
                f->data[place + k] = (uint8_t)(random >> 8 * k);
            victim_refuses(&v, "bits", place);
        }
        for (int i = 0; i < n / 3; i++) { // cut short
            const size_t place = i < 20 ? (size_t)(8 * i)
                                        : (size_t)(synth_random(8, (uint64_t)i) % size);
            f->size = place;
            victim_refuses(&v, "end", place);
        }
        f->size = size - 1;
        victim_refuses(&v, "end", size - 1);
        for (int i = 0; i < n / 3; i++) { // two pieces of it change places
            const uint64_t random = synth_random(9, (uint64_t)i);
            const size_t length = 8 + random % 256, a = (size_t)(random >> 16) % (size - length);
            const size_t b = (size_t)(random >> 32) % (size - length);
            uint8_t piece[264];
            memcpy(piece, f->data + a, length);
            memmove(f->data + a, f->data + b, length);
            memcpy(f->data + b, piece, length);
            if (memcmp(f->data, v.whole.data, size)) victim_refuses(&v, "pieces", a);
            victim_mend(&v);
        }
        for (int i = 0; i < 6; i++) // one section in another's place, or missing
            for (int k = 0; k < 6; k++) {
                const size_t length = at[i + 1] - at[i], other = at[k + 1] - at[k];
                memcpy(f->data + at[k], v.whole.data + at[i], length < other ? length : other);
                if (memcmp(f->data, v.whole.data, size)) victim_refuses(&v, "section", at[k]);
                if (i == k) memmove(f->data + at[k], f->data + at[k + 1], size - at[k + 1]);
                if (i == k) f->size = size - length;
                if (i == k) victim_refuses(&v, "no section", at[k]);
            }
        n_refused += v.n_refused;
        CHECK(store_load(f, v.session, v.sampler, NULL) == MOE_OK);
        CHECK(holds(v.session, v.tokens + 20, 50, moe_session_logits(v.session, -1)));
        victim_close(&v);
    }
    printf("  %d damaged files\n", n_refused);
    CHECK(n_refused > 2500);
}

// Checksums can be made right by whoever makes a file: what they protect is checked all the same.
TEST(lies_with_good_checksums_are_refused) {
    static const uint64_t lies[] = {0, 1, 2, 15, 16, 17, 49, 51, 81, 1000, 0x7FFFFFFF, 0x80000000,
                                    0xFFFFFFFF, 0x100000001, (uint64_t)1 << 62,
                                    (uint64_t)1 << 63, UINT64_MAX};
    for (int c = 0; c < N_VICTIMS; c++) {
        victim v;
        size_t at[7];
        CHECK(victim_open(&v, victims[c].config, victims[c].kv));
        if (!v.session) continue;
        store *f = &v.damaged;
        CHECK(sections_of(f, at));
        for (int word = WORD_VERSION; word <= WORD_RECENT; word++)
            for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
                const uint64_t was = word_at(f, word);
                if (lies[i] == was || (word == WORD_NOW && lies[i] <= 1) ||
                    (word == WORD_BEFORE && was && (lies[i] == 1 || lies[i] == 17)))
                    continue; // as good as the truth
                put_word(f, word, lies[i]);
                victim_refuses(&v, "lie", (size_t)word);
                if (word == WORD_SIZE) continue;
                // The size agrees with it: there is not so much.
                put_word(f, word, lies[i]);
                put_word(f, WORD_SIZE, word_at(f, WORD_SIZE) + 8 * (lies[i] - was));
                victim_refuses(&v, "lie and size", (size_t)word);
            }
        for (int i = 0; i < 4; i++) {
            static const int32_t ids[] = {-1, 512, INT32_MAX, INT32_MIN};
            memcpy(f->data + at[0] + 8 + 4 * 13, &ids[i], 4);
            seal(f, at[0], at[1]);
            victim_refuses(&v, "token", at[0]);
        }
        f->data[at[1] - 9] = 2; // the last token's form
        seal(f, at[0], at[1]);
        victim_refuses(&v, "form", at[0]);
        for (uint64_t i = 0; i < word_at(f, WORD_SAVED); i++)
            for (int32_t k = 0; k < 6; k++) {
                const int32_t places[] = {0, -16, 7, 64, INT32_MAX, INT32_MIN};
                memcpy(f->data + at[0] + 8 + 4 * (50 + i), &places[k], 4);
                seal(f, at[0], at[1]);
                victim_refuses(&v, "checkpoint", (size_t)i);
            }
        // Numbers that are none are only numbers: the session computes with them and goes on.
        for (int round = 0; round < 4; round++) {
            for (int i = 1; i < 6; i++) {
                for (size_t k = at[i] + 8; k < at[i + 1] - 8; k++)
                    f->data[k] = round ? (uint8_t)synth_random((uint64_t)round, k) : 0xFF;
                seal(f, at[i], at[i + 1]);
            }
            CHECK(store_load(f, v.session, v.sampler, NULL) == MOE_OK);
            moe_sampler_sample(v.sampler, moe_session_logits(v.session, -1));
            CHECK(moe_session_eval(v.session, v.tokens, 20, NULL) == MOE_OK);
            CHECK(moe_session_rewind(v.session, 30, NULL) == MOE_OK);
            CHECK(moe_session_eval(v.session, v.tokens, 1, NULL) == MOE_OK);
            victim_mend(&v);
        }
        // And is mended by a good file.
        CHECK(store_load(f, v.session, v.sampler, NULL) == MOE_OK);
        CHECK(moe_session_sync(v.session, v.tokens, VICTIM_HOLDS + 1, NULL, NULL) == MOE_OK);
        CHECK(holds(v.session, v.tokens, VICTIM_HOLDS + 1, v.next));
        victim_close(&v);
    }
}

TEST(reading_and_writing_may_fail_at_every_call) {
    victim v;
    moe_error error;
    CHECK(victim_open(&v, "lfm2moe_tiny", MOE_KV_F16));
    if (!v.session) return;
    store *f = &v.damaged;
    float had[MAX_VOCAB];
    memcpy(had, moe_session_logits(v.session, -1), row_size(v.session));
    for (int lost = 0; lost < 2; lost++) {
        f->piece = 1000;
        f->is_lost = lost;
        int going = 1;
        for (f->fail_at = 1; going && f->fail_at < 10000; f->fail_at++) {
            clear_error(&error);
            const moe_status status = store_load(f, v.session, v.sampler, &error);
            going = f->calls >= f->fail_at;
            if (!going) break;
            CHECK(status == (lost ? MOE_ERROR_IO : MOE_ERROR_FORMAT) && *error.text);
            CHECK(holds(v.session, v.tokens, VICTIM_HOLDS, had));
        }
        CHECKF(f->fail_at > 20 && !going, "%ld", f->fail_at);
        f->fail_at = 0;
        CHECK(moe_session_sync(v.session, v.tokens, VICTIM_HOLDS, NULL, NULL) == MOE_OK);
    }
    // A read that gives more than there is room for is a failure, and is not believed.
    f->fail_at = 2, f->is_lost = 1;
    CHECK(store_load(f, v.session, NULL, NULL) == MOE_ERROR_IO);
    f->fail_at = 0;
    CHECK(moe_session_eval(v.session, v.tokens + VICTIM_HOLDS, 1, NULL) == MOE_OK);
    CHECK(holds(v.session, v.tokens, VICTIM_HOLDS + 1, v.next));
    store g;
    memset(&g, 0, sizeof g);
    int going = 1;
    for (g.fail_at = 1; going && g.fail_at < 10000; g.fail_at++) {
        g.size = 0, g.calls = 0;
        clear_error(&error);
        const moe_status status =
            moe_session_save_to(v.session, v.sampler, store_write, &g, &error);
        going = g.calls >= g.fail_at;
        CHECK(status == (going ? MOE_ERROR_IO : MOE_OK));
        CHECK(!going || (g.calls == g.fail_at && *error.text)); // it is not called again
    }
    CHECKF(g.fail_at > 20 && !going, "%ld", g.fail_at);
    CHECK(holds(v.session, v.tokens, VICTIM_HOLDS + 1, v.next));
    free(g.data);
    victim_close(&v);
}

// The same without memory; saving takes none.
TEST(loading_may_run_out_of_memory_and_saving_takes_none) {
    meter m;
    synth_options so;
    moe_model_options mo;
    moe_session_options o;
    moe_error error;
    int32_t tokens[40];
    float expected[MAX_VOCAB];
    store f;
    memset(&m, 0, sizeof m);
    memset(&so, 0, sizeof so);
    memset(&mo, 0, sizeof mo);
    memset(&o, 0, sizeof o);
    memset(&f, 0, sizeof f);
    so.no_tokenizer = 1;
    mo.allocator = meter_allocator(&m);
    o.n_ctx = 60;
    models_tokens(tokens, 40, 200, 2);
    moe_model *model = moe_model_open(models_write("jamba_tiny", &so), &mo, NULL);
    CHECK(model != NULL);
    if (!model) return;
    reference(model, &o, tokens, 40, expected);
    moe_session *s = open_with_past(model, &o, tokens, 40, 1);
    moe_session *t = open_with_past(model, &o, tokens + 4, 30, 0);
    CHECK(s && t);
    const size_t live = m.live;
    long calls = m.calls;
    CHECK(store_save(&f, t, NULL) == MOE_OK);
    CHECK(moe_session_save(t, models_path("metered"), NULL) == MOE_OK);
    CHECK(m.calls == calls);
    int failed = 1;
    for (long at = 1; failed && at < 100; at++) {
        m.calls = 0;
        m.fail_at = at;
        clear_error(&error);
        const moe_status status = at % 2 ? store_load(&f, s, NULL, &error)
                                         : moe_session_load(s, models_path("metered"), &error);
        failed = m.calls >= at;
        CHECK(status == (failed ? MOE_ERROR_MEMORY : MOE_OK));
        CHECK(!failed || (*error.text && holds(s, tokens, 40, expected)));
        CHECKF(m.live == live, "%zu bytes left", m.live - live);
    }
    CHECK(!failed && m.calls == 1);
    // No more than the file says, however much that may be.
    m.fail_at = 0;
    m.largest = 0;
    CHECK(store_load(&f, s, NULL, NULL) == MOE_OK && m.largest < f.size + 128);
    put_word(&f, WORD_LENGTH, 61);
    m.largest = 0;
    CHECK(store_load(&f, s, NULL, NULL) == MOE_ERROR_CONTEXT_FULL && m.largest == 0);
    moe_session_close(s);
    moe_session_close(t);
    moe_model_close(model);
    CHECK(m.live == 0);
    free(f.data);
}

// ---- paths -----------------------------------------------------------------------------------

static size_t file_bytes(const char *path, uint8_t *bytes, size_t capacity) {
    FILE *file = fopen(path, "rb");
    const size_t n = file ? fread(bytes, 1, capacity, file) : 0;
    if (file) fclose(file);
    return n;
}
static void file_put(const char *path, const char *text) {
    FILE *file = fopen(path, "wb");
    CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
}
static int drafts(void) { // files of ours that were left
    char command[160];
    snprintf(command, sizeof command, "test -z \"$(ls -a %s | grep '[.]tmp$')\"", models_folder);
    return system(command) != 0;
}

TEST(a_file_is_replaced_when_the_new_one_is_whole) {
    enum { CAPACITY = 1 << 20 };
    moe_model *model = open_config("micro");
    moe_session_options o;
    moe_error error;
    struct stat status;
    int32_t tokens[30];
    uint8_t *bytes = (uint8_t *)malloc(CAPACITY);
    store f;
    memset(&o, 0, sizeof o);
    memset(&f, 0, sizeof f);
    o.n_ctx = 30;
    models_tokens(tokens, 30, 200, 2);
    CHECK(model && bytes);
    if (!model || !bytes) return;
    moe_session *s = open_with_past(model, &o, tokens, 20, 1);
    moe_session *t = moe_session_open(model, &o, NULL);
    CHECK(s && t && store_save(&f, s, NULL) == MOE_OK);
    const char *path = models_path("saved"), *link = models_path("link"), *link2 =
        models_path("link2"), *fifo = models_path("fifo");
    CHECK(moe_session_save(s, path, NULL) == MOE_OK);
    CHECK(file_bytes(path, bytes, CAPACITY) == f.size && !memcmp(bytes, f.data, f.size));
    CHECK(moe_session_load(t, path, NULL) == MOE_OK);
    CHECK(holds(t, tokens, 20, moe_session_logits(s, -1)));
    // What was there goes; its permissions stay.
    file_put(path, "old");
    CHECK(chmod(path, 0640) == 0);
    CHECK(moe_session_save(s, path, NULL) == MOE_OK && stat(path, &status) == 0);
    CHECK((status.st_mode & 0777) == 0640 && (size_t)status.st_size == f.size);
    // A link stays one, also one to another link, and one to a file that is not there yet.
    CHECK(symlink("saved", link) == 0 && symlink("link", link2) == 0);
    file_put(path, "old");
    CHECK(moe_session_save(s, link2, NULL) == MOE_OK);
    CHECK(file_bytes(path, bytes, CAPACITY) == f.size && lstat(link2, &status) == 0);
    CHECK(S_ISLNK(status.st_mode) && lstat(link, &status) == 0 && S_ISLNK(status.st_mode));
    remove(path);
    CHECK(moe_session_save(s, link, NULL) == MOE_OK);
    CHECK(file_bytes(path, bytes, CAPACITY) == f.size);
    CHECK(moe_session_load(t, link2, NULL) == MOE_OK);
    // A pipe is written as it comes, and read.
    CHECK(mkfifo(fifo, 0600) == 0);
    const int both = open(fifo, O_RDWR | O_NONBLOCK);
    CHECK(both >= 0 && moe_session_rewind(t, 0, NULL) == MOE_OK);
    CHECK(moe_session_save(t, fifo, NULL) == MOE_OK && lstat(fifo, &status) == 0);
    CHECK(S_ISFIFO(status.st_mode));
    close(both);
    // Errors: with the reason, and nothing is left behind.
    static const struct {
        const char *path, *text;
    } wrong[] = {{"build/no/such/folder", "there is no such file"}, {"", "no such file"},
                 {"build/", "it is a directory"}, {"build", "it is a directory"},
                 {"Makefile/x", "a folder in the path is none"},
                 {"/dev/full", "no space is left"}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        clear_error(&error);
        CHECKF(moe_session_save(s, wrong[i].path, &error) == MOE_ERROR_IO, "%s", wrong[i].path);
        CHECKF(error.status == MOE_ERROR_IO && strstr(error.text, wrong[i].text), "%s: %s",
               wrong[i].path, error.text);
        if (i == 5) continue; // can be read, and never ends
        clear_error(&error);
        CHECK(moe_session_load(t, wrong[i].path, &error) == MOE_ERROR_IO && *error.text);
    }
    CHECK(moe_session_save(s, "/dev/null", NULL) == MOE_OK);
    CHECK(moe_session_load(t, "/dev/null", &error) == MOE_ERROR_FORMAT);
    CHECK(moe_session_load(t, "/dev/zero", &error) == MOE_ERROR_FORMAT);
    CHECK(moe_session_load(t, "Makefile", &error) == MOE_ERROR_FORMAT);
    CHECK(!strcmp(error.where, "Makefile") && strstr(error.text, "no saved session"));
    // No room for all of it: what was there stays.
    struct rlimit limit, small;
    CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0);
    small = limit;
    small.rlim_cur = f.size / 2;
    file_put(path, "old");
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    CHECK(moe_session_save(s, path, &error) == MOE_ERROR_IO && strstr(error.text, "too large"));
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(file_bytes(path, bytes, CAPACITY) == 3 && !memcmp(bytes, "old", 3));
    CHECK(!drafts());
    // A byte behind the end is one too many.
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(f.data, 1, f.size, file) == f.size && fputc(0, file) == 0);
    CHECK(file && fclose(file) == 0);
    CHECK(moe_session_load(t, path, &error) == MOE_ERROR_FORMAT && strstr(error.text, "behind"));
    CHECK(moe_session_length(t) == 0);
    moe_session_close(s);
    moe_session_close(t);
    free(f.data);
    free(bytes);
    moe_model_close(model);
}

// Not in the middle of an eval of the session; of another one it may be.
typedef struct saver {
    moe_session *session, *other;
    store *file;
    int wrong;
} saver;
static int saver_ask(void *user) {
    saver *v = (saver *)user;
    v->wrong += store_save(v->file, v->session, NULL) != MOE_ERROR_ARGUMENT;
    v->wrong += moe_session_save(v->session, "build/never", NULL) != MOE_ERROR_ARGUMENT;
    v->wrong += store_save(v->file, v->other, NULL) != MOE_OK;
    v->wrong += store_load(v->file, v->session, NULL, NULL) != MOE_ERROR_ARGUMENT;
    v->wrong += store_load(v->file, v->other, NULL, NULL) != MOE_OK;
    return 0;
}
TEST(a_callback_saves_and_loads_only_other_sessions) {
    moe_model *model = open_config("micro");
    moe_session_options o;
    int32_t tokens[10];
    float expected[MAX_VOCAB];
    struct stat status;
    store f;
    saver v;
    memset(&o, 0, sizeof o);
    memset(&f, 0, sizeof f);
    memset(&v, 0, sizeof v);
    o.n_ctx = 30;
    models_tokens(tokens, 10, 200, 2);
    CHECK(model != NULL);
    if (!model) return;
    reference(model, &o, tokens, 10, expected);
    v.file = &f;
    v.other = open_with_past(model, &o, tokens, 10, 0);
    o.should_stop = saver_ask;
    o.should_stop_user = &v;
    v.session = moe_session_open(model, &o, NULL);
    CHECK(v.session && moe_session_eval(v.session, tokens, 10, NULL) == MOE_OK && !v.wrong);
    CHECK(holds(v.session, tokens, 10, expected) && holds(v.other, tokens, 10, expected));
    CHECK(stat("build/never", &status) != 0);
    moe_session_close(v.session);
    moe_session_close(v.other);
    free(f.data);
    moe_model_close(model);
}

TEST(saving_and_loading_need_their_arguments) {
    moe_model *model = open_config("micro");
    moe_session *s = model ? moe_session_open(model, NULL, NULL) : NULL;
    moe_error error;
    store f;
    memset(&f, 0, sizeof f);
    CHECK(s != NULL);
    clear_error(&error);
    CHECK(moe_session_save(NULL, "build/never", &error) == MOE_ERROR_ARGUMENT && *error.text);
    CHECK(moe_session_save(s, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_load(NULL, "build/never", NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_load(s, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_save_with(NULL, NULL, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_load_with(NULL, NULL, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_save_to(NULL, NULL, store_write, &f, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_save_to(s, NULL, NULL, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_load_from(NULL, NULL, store_read, &f, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_load_from(s, NULL, NULL, NULL, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_load(s, "build/never", &error) == MOE_ERROR_IO);
    CHECK(strstr(error.text, "there is no such file") && !strcmp(error.where, "build/never"));
    free(f.data);
    moe_session_close(s);
    moe_model_close(model);
}

// Pieces of any size have one checksum, and any change shows.
TEST(a_checksum_does_not_depend_on_the_pieces) {
    uint8_t bytes[200];
    for (int i = 0; i < 200; i++) bytes[i] = (uint8_t)synth_random(1, (uint64_t)i);
    uint64_t sums[200];
    for (size_t n = 0; n < 200; n++) {
        for (size_t cut = 0; cut <= n; cut++) {
            moe__checksum sum;
            memset(&sum, 0, sizeof sum);
            moe__checksum_add(&sum, bytes, cut / 2);
            moe__checksum_add(&sum, bytes + cut / 2, cut - cut / 2);
            moe__checksum_add(&sum, bytes + cut, n - cut);
            const uint64_t value = moe__checksum_end(&sum);
            if (cut == 0) sums[n] = value;
            CHECK(value == sums[n]);
        }
        for (size_t k = 0; k < n; k++) CHECK(sums[k] != sums[n]);
    }
}

MAIN()
