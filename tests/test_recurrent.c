// Recurrent layers: going back to any length, sessions evaluated together, cancelling, dialogues
// with edits, what states and checkpoints take. A state cannot be cut off like a cache: what these
// tests compare is bits, with those of a session that never went further.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "gguf_edit.h"
#include "meter.h"
#include "models.h"

enum { CHUNK = MOE__CHUNK };

static size_t row_size(const moe_model *model) {
    return sizeof(float) * (size_t)moe_model_get_info(model)->n_vocab;
}
static int same_row(const moe_session *session, const float *expected) {
    const float *logits = moe_session_logits(session, -1);
    return logits && !memcmp(logits, expected, row_size(moe_session_model(session)));
}
static void keep_row(const moe_session *session, float *row) {
    const float *logits = moe_session_logits(session, -1);
    CHECK(logits != NULL);
    if (logits) memcpy(row, logits, row_size(moe_session_model(session)));
}
static int evaluates(moe_session *session, const int32_t *tokens, int n) {
    moe_error error;
    clear_error(&error);
    const int ok = n == 0 || moe_session_eval(session, tokens, n, &error) == MOE_OK;
    CHECKF(ok, "%s: %s", error.where, error.text);
    return ok;
}
static moe_pool *open_pool(int n_threads) {
    moe_pool_options p;
    memset(&p, 0, sizeof p);
    p.n_threads = n_threads;
    moe_pool *pool = moe_pool_open(&p, NULL);
    CHECK(pool != NULL);
    return pool;
}
static uint64_t replayed(const moe_session *session) {
    return moe_session_get_stats(session)->n_replayed;
}

// ---- going back ------------------------------------------------------------------------------

// What a new session computes behind the first `length` tokens, for all lengths: the logits after
// ten others, one more and ten more.
enum { FILLED = 80, STEPS = 3, BEHIND = 21 };
static const int steps_behind[STEPS] = {10, 1, 10};

typedef struct known {
    const moe_model *model;
    moe_session_options o;
    int32_t tokens[FILLED], other[BEHIND];
    float *rows; // [FILLED + 1][STEPS][n_vocab]
} known;

static float *known_row(const known *k, int length, int step) {
    return k->rows + (size_t)(length * STEPS + step) * row_size(k->model) / sizeof(float);
}

static void known_open(known *k, const moe_model *model, const moe_session_options *o) {
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    k->model = model;
    k->o = *o;
    k->rows = (float *)malloc((FILLED + 1) * STEPS * row_size(model));
    models_tokens(k->tokens, FILLED, n_vocab, 11);
    models_tokens(k->other, BEHIND, n_vocab, 12);
    for (int length = 0; length <= FILLED && k->rows; length++) {
        moe_session *session = moe_session_open(model, o, NULL);
        CHECK(session && evaluates(session, k->tokens, length));
        for (int i = 0, at = 0; session && i < STEPS; at += steps_behind[i++]) {
            evaluates(session, k->other + at, steps_behind[i]);
            keep_row(session, known_row(k, length, i));
        }
        moe_session_close(session);
    }
}

// How the tokens came: whole, one by one, in uneven pieces, in batches that are shorter.
enum { WHOLE, SINGLE, UNEVEN, BATCHES, WAYS };
static const char *const way_names[WAYS] = {"whole", "one by one", "in pieces", "in batches"};

static moe_session *fill(const known *k, int way, int n_checkpoints, int n_threads) {
    static const int pieces[] = {23, 1, 16, 13, 2, 8, 17};
    moe_session_options o = k->o;
    o.n_checkpoints = n_checkpoints;
    o.n_threads = n_threads;
    if (way == BATCHES) o.n_batch = 9;
    moe_session *session = moe_session_open(k->model, &o, NULL);
    CHECK(session != NULL);
    for (int done = 0, i = 0; done < FILLED && session; i++) {
        const int n = way == SINGLE ? 1 : way == UNEVEN ? pieces[i] : FILLED;
        if (!evaluates(session, k->tokens + done, n)) break;
        done += n;
    }
    return session;
}

// Tokens that must be evaluated again to go back to a length: none as long as the chunk lasts;
// else those behind the nearest place before it. The last but one is good for 15 of its tokens.
static int nearest(const moe_session *session, int length) {
    int best = length;
    if (length >= session->slot.at) return 0;
    for (int i = 0; i < session->n_saved; i++)
        if (session->saved_at[i] <= length && length - session->saved_at[i] < best)
            best = length - session->saved_at[i];
    if (session->before >= 0 && session->before <= length) {
        const int left = length - session->before - (CHUNK - 1);
        if (left < best) best = left > 0 ? left : 0;
    }
    return best;
}

static void rewinds(moe_session *session, int length) {
    moe_error error;
    const int distance = nearest(session, length);
    const uint64_t before = session->n_replayed;
    clear_error(&error);
    CHECKF(moe_session_rewind(session, length, &error) == MOE_OK, "%s", error.text);
    CHECKF((int)(session->n_replayed - before) == distance, "to %d: %d tokens instead of %d",
           length, (int)(session->n_replayed - before), distance);
    CHECK(moe_session_length(session) == length);
    if (distance) CHECK(replayed(session) == session->n_replayed);
}

// Back to a length and on; back into what came then and on, back before it and on, and again.
static int goes_back(const known *k, moe_session *session, int length) {
    int good = 1;
    rewinds(session, length);
    if (length < FILLED) CHECK(moe_session_logits(session, -1) == NULL);
    for (int i = 0, at = 0; i < STEPS; at += steps_behind[i++]) {
        evaluates(session, k->other + at, steps_behind[i]);
        good &= same_row(session, known_row(k, length, i));
    }
    rewinds(session, length + 5);
    evaluates(session, k->other + 5, 5);
    good &= same_row(session, known_row(k, length, 0));
    if (length < 7) return good;
    rewinds(session, length - 7);
    evaluates(session, k->other, 10);
    good &= same_row(session, known_row(k, length - 7, 0));
    rewinds(session, length - 4);
    evaluates(session, k->other + 3, 8);
    good &= same_row(session, known_row(k, length - 7, 1));
    return good;
}

static void check_rewinds(const char *label, const known *k, int every) {
    static const int checkpoints[] = {0, MOE_OFF, 2};
    int cases = 0;
    for (int way = 0; way < WAYS; way++)
        for (int c = 0; c < 3; c++)
            for (int length = 0; length <= FILLED; length++) {
                if ((length + way + c) % (c ? 3 * every : every)) continue;
                moe_session *session = fill(k, way, checkpoints[c], length % 16 == 5 ? 2 : 1);
                if (!session) continue;
                CHECKF(goes_back(k, session, length), "%s %s, %d checkpoints, to %d", label,
                       way_names[way], checkpoints[c], length);
                moe_session_close(session);
                cases++;
            }
    printf("  %-20s %d sessions\n", label, cases);
}

static const struct {
    moe_kv_type type;
    const char *name;
} caches[] = {{MOE_KV_F32, "f32"}, {MOE_KV_F16, "f16"}, {MOE_KV_Q8_0, "q8_0"}};

static void check_rewinds_of(int hybrid, int cache, int every) {
    moe_session_options o;
    moe_session_info info;
    known k;
    char label[64];
    moe_model *model = models_open(models_hybrid(hybrid));
    moe_pool *pool = open_pool(2);
    memset(&o, 0, sizeof o);
    o.pool = pool;
    o.n_ctx = FILLED + BEHIND + 1;
    o.n_threads = 1;
    o.kv_type = caches[cache].type;
    snprintf(label, sizeof label, "%s %s", models_hybrids[hybrid], caches[cache].name);
    CHECK(model != NULL);
    if (model && pool && moe_session_estimate(model, &o, &info, NULL) == MOE_OK) {
        known_open(&k, model, &o);
        check_rewinds(label, &k, every);
        free(k.rows);
    }
    moe_pool_close(pool);
    moe_model_close(model);
}

TEST(a_session_goes_back_to_any_length_and_on_with_the_same_bits) {
    for (int i = 0; i < MODELS_HYBRIDS; i++) check_rewinds_of(i, 0, MODELS_SLOW ? 9 : 2);
}
TEST(a_session_with_a_coarser_cache_goes_back_likewise) {
    for (int i = 0; i < MODELS_HYBRIDS; i++)
        for (int cache = 1; cache < 3; cache++) check_rewinds_of(i, cache, MODELS_SLOW ? 27 : 11);
}

// What is evaluated again, number by number: the places are known from how the tokens came.
TEST(tokens_are_evaluated_again_from_the_nearest_place_only) {
    static const struct {
        int way, n_checkpoints, length, again;
    } cases[] = {
        // whole: states at 0 (with 15 tokens) and at 80
        {WHOLE, MOE_OFF, 80, 0}, {WHOLE, MOE_OFF, 79, 64}, {WHOLE, MOE_OFF, 16, 1},
        {WHOLE, MOE_OFF, 15, 0}, {WHOLE, MOE_OFF, 0, 0},
        // one by one: at 64 and 80, else nowhere
        {SINGLE, MOE_OFF, 80, 0}, {SINGLE, MOE_OFF, 79, 0}, {SINGLE, MOE_OFF, 64, 0},
        {SINGLE, MOE_OFF, 63, 63}, {SINGLE, 0, 63, 63}, {SINGLE, 0, 1, 1}, {SINGLE, 0, 0, 0},
        // in pieces that end at 23, 24, 40, 53, 55, 63, 80: checkpoints before and behind those
        // of more than 16
        {UNEVEN, 0, 80, 0}, {UNEVEN, 0, 79, 16}, {UNEVEN, 0, 64, 1}, {UNEVEN, 0, 63, 0},
        {UNEVEN, 0, 48, 0}, {UNEVEN, 0, 47, 31}, {UNEVEN, 0, 16, 0}, {UNEVEN, 0, 15, 15},
        // in batches of 9: behind each but the last
        {BATCHES, 0, 80, 0}, {BATCHES, 0, 79, 15}, {BATCHES, 0, 64, 0}, {BATCHES, 0, 63, 15},
        {BATCHES, 0, 33, 1}, {BATCHES, 0, 31, 15}, {BATCHES, 0, 15, 0}};
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        moe_session_options o;
        known k;
        moe_model *model = models_open(models_hybrid(i));
        memset(&k, 0, sizeof k);
        memset(&o, 0, sizeof o);
        CHECK(model != NULL);
        if (!model) continue;
        o.n_ctx = FILLED + BEHIND;
        k.model = model;
        k.o = o;
        models_tokens(k.tokens, FILLED, moe_model_get_info(model)->n_vocab, 11);
        for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
            moe_session *session = fill(&k, cases[c].way, cases[c].n_checkpoints, 1);
            if (!session) continue;
            CHECK(moe_session_rewind(session, cases[c].length, NULL) == MOE_OK);
            CHECKF((int)replayed(session) == cases[c].again, "%s %s to %d: %d", models_hybrids[i],
                   way_names[cases[c].way], cases[c].length, (int)replayed(session));
            CHECK(moe_session_rewind(session, cases[c].length, NULL) == MOE_OK);
            CHECK((int)replayed(session) == cases[c].again); // it is there already
            moe_session_close(session);
        }
        moe_model_close(model);
    }
}

// ---- sessions evaluated together -------------------------------------------------------------

enum { TOGETHER = 8, ROUNDS = 6, DEEP = 1100 };

// Eight sessions, each also alone: prompts beside single tokens, cut by n_batch; some go back
// between the rounds.
static void check_together(const moe_model *model, const char *label, int n_threads,
                           moe_schedule schedule, int n_batch, int forms) {
    static const int lengths[ROUNDS][TOGETHER] = {
        {40, 1, 7, 5, 16, 17, 1, 33}, {1, 1, 1, 1, 1, 1, 1, 1},    {1, 12, 1, 40, 1, 15, 32, 1},
        {5, 1, 1, 20, 1, 1, 9, 16},   {1, 38, 1, 1, 31, 6, 1, 11}, {1, 1, 1, 1, 1, 1, 1, 1}};
    moe_session *together[TOGETHER] = {NULL}, *alone[TOGETHER] = {NULL};
    int32_t tokens[DEEP];
    moe_session_options o;
    moe_pool *pool = open_pool(n_threads), *other = open_pool(1);
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    models_tokens(tokens, DEEP, n_vocab, 5);
    memset(&o, 0, sizeof o);
    o.n_ctx = DEEP;
    o.keep_all_logits = MOE_ON;
    for (int i = 0; i < TOGETHER; i++) {
        o.pool = pool, o.n_batch = n_batch, o.schedule = schedule;
        together[i] = moe_session_open(model, &o, NULL);
        o.pool = other, o.n_batch = forms ? 512 : 11 + i, o.schedule = MOE_SCHEDULE_DEFAULT;
        alone[i] = moe_session_open(model, &o, NULL);
        CHECK(together[i] && alone[i]);
    }
    for (int round = 0; round < ROUNDS; round++) {
        moe_job jobs[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) {
            const int from = moe_session_length(alone[i]);
            if (round % 2 && i % 3 == 1) {
                const int to = from - from % (7 + i);
                CHECK(moe_session_rewind(together[i], to, NULL) == MOE_OK);
                CHECK(moe_session_rewind(alone[i], to, NULL) == MOE_OK);
            }
            jobs[i].session = together[i];
            jobs[i].tokens = tokens + (from + 13 * i) % 200;
            jobs[i].n_tokens = lengths[round][i] + (forms && i % 4 == 3 ? 128 : 0);
            evaluates(alone[i], jobs[i].tokens, jobs[i].n_tokens);
        }
        CHECK(moe_session_eval_many(jobs, TOGETHER, NULL) == MOE_OK);
        for (int i = 0; i < TOGETHER; i++) {
            int same = moe_session_length(together[i]) == moe_session_length(alone[i]);
            for (int t = 0; t < jobs[i].n_tokens; t++) {
                const float *x = moe_session_logits(together[i], t);
                const float *y = moe_session_logits(alone[i], t);
                same &= x && y && !memcmp(x, y, row_size(model));
            }
            CHECKF(same, "%s, %d threads, schedule %d, n_batch %d, round %d, sequence %d", label,
                   n_threads, (int)schedule, n_batch, round, i);
        }
    }
    for (int i = 0; i < TOGETHER; i++) {
        moe_session_close(together[i]);
        moe_session_close(alone[i]);
    }
    moe_pool_close(pool);
    moe_pool_close(other);
}

TEST(eight_sessions_have_the_same_bits_alone_and_together) {
    static const int threads[] = {1, 2, 3, 7}, batches[] = {512, 19, 48};
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        moe_model *model = models_open(models_hybrid(i));
        CHECK(model != NULL);
        if (!model) continue;
        for (int variant = 0; variant < (MODELS_SLOW ? 2 : 4); variant++)
            for (int schedule = 1; schedule <= (variant == 1 || variant == 2 ? 3 : 1); schedule++)
                check_together(model, models_hybrids[i], threads[variant],
                               (moe_schedule)(variant == 3 ? 3 : schedule),
                               batches[(variant + schedule) % 3], 0);
        moe_model_close(model);
    }
}

// With latent attention, inputs of 128 tokens go another way than those beside them.
TEST(sessions_with_both_forms_of_latent_attention_have_the_same_bits_together) {
    for (int i = 7; i <= 8; i++) {
        moe_model *model = models_open(models_hybrid(i));
        CHECK(model && model->widest[MOE__IN_LATENT] > 0);
        if (!model) continue;
        check_together(model, models_hybrids[i], 2, MOE_SCHEDULE_DEFAULT, 512, 1);
        check_together(model, models_hybrids[i], 3, MOE_SCHEDULE_DEFAULT, 130, 1);
        moe_model_close(model);
    }
}

// ---- cancelling ------------------------------------------------------------------------------

// Says stop at question number `at`, counted from 1; 0: never.
typedef struct patience {
    int at, asked;
} patience;
static int asks(void *user) {
    patience *p = (patience *)user;
    return ++p->asked == p->at;
}

// How a session comes to be where it is cancelled: 37 tokens in a way of its own.
static void come_along(moe_session *s, const int32_t *tokens, int way) {
    if (way == 0) { // whole
        evaluates(s, tokens, 37);
    } else if (way == 1) { // a piece, and one by one across the end of a chunk
        evaluates(s, tokens, 30);
        for (int i = 30; i < 37; i++) evaluates(s, tokens + i, 1);
    } else { // back within a chunk, then behind its end
        evaluates(s, tokens, 45);
        CHECK(moe_session_rewind(s, 33, NULL) == MOE_OK);
        evaluates(s, tokens + 33, 7);
        CHECK(moe_session_rewind(s, 34, NULL) == MOE_OK);
        evaluates(s, tokens + 34, 3);
    }
}

typedef struct cancelling {
    moe_session *session, *plain; // plain: nobody stops it
    const int32_t *tokens;
    patience p;
    const char *label;
} cancelling;

static void cancelling_open(cancelling *c, const moe_model *model, moe_pool *pool, int way,
                            int n_checkpoints) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = 120;
    o.n_batch = 13;
    o.pool = pool;
    o.n_checkpoints = n_checkpoints;
    c->plain = moe_session_open(model, &o, NULL);
    o.should_stop = asks;
    o.should_stop_user = &c->p;
    c->p.at = c->p.asked = 0;
    c->session = moe_session_open(model, &o, NULL);
    CHECK(c->session && c->plain);
    come_along(c->session, c->tokens, way);
    come_along(c->plain, c->tokens, way);
    c->p.asked = 0;
}
static void cancelling_close(cancelling *c) {
    moe_session_close(c->session);
    moe_session_close(c->plain);
}

// Both go on: the same bits as if nothing had been tried; back, too.
static void check_goes_on(cancelling *c, int back, int k) {
    float *row = (float *)malloc(row_size(moe_session_model(c->plain)));
    c->p.at = 0;
    for (int i = 0; i < 3 && k / 2 % 2; i++) { // or at once back
        evaluates(c->plain, c->tokens + 60 + i, i == 1 ? 9 : 1);
        evaluates(c->session, c->tokens + 60 + i, i == 1 ? 9 : 1);
        keep_row(c->plain, row);
        CHECKF(same_row(c->session, row), "%s: question %d, piece %d", c->label, k, i);
    }
    CHECK(moe_session_rewind(c->session, back, NULL) == MOE_OK);
    CHECK(moe_session_rewind(c->plain, back, NULL) == MOE_OK);
    evaluates(c->plain, c->tokens + 20, 20);
    evaluates(c->session, c->tokens + 20, 20);
    keep_row(c->plain, row);
    CHECKF(same_row(c->session, row), "%s: question %d, back to %d", c->label, k, back);
    free(row);
}

// An eval of n tokens stopped at question k: length and logits are as they were. Returns whether
// there was a question k.
static int check_cancelled_eval(cancelling *c, int n, int k) {
    moe_error error;
    float *row = (float *)malloc(row_size(moe_session_model(c->plain)));
    keep_row(c->session, row);
    c->p.at = k, c->p.asked = 0;
    clear_error(&error);
    const moe_status status = moe_session_eval(c->session, c->tokens + 40, n, &error);
    const int stopped = c->p.asked >= k;
    CHECK(status == (stopped ? MOE_ERROR_CANCELLED : MOE_OK));
    if (stopped) {
        CHECK(error.status == MOE_ERROR_CANCELLED && moe_session_length(c->session) == 37);
        CHECKF(same_row(c->session, row), "%s: logits after question %d", c->label, k);
    }
    free(row);
    return stopped;
}

static int32_t cancel_tokens[DEEP];

TEST(a_cancelled_eval_leaves_states_as_they_were) {
    int cases = 0;
    moe_pool *pool = open_pool(2);
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        cancelling c;
        moe_model *model = models_open(models_hybrid(i));
        CHECK(model != NULL);
        if (!model) continue;
        models_tokens(cancel_tokens, DEEP, moe_model_get_info(model)->n_vocab, 21);
        c.tokens = cancel_tokens;
        c.label = models_hybrids[i];
        for (int way = 0; way < 3; way++)
            for (int n = 1; n <= 50; n += MODELS_SLOW ? 49 : n == 1 ? 11 : 38)
                for (int k = 1, stopped = 1; stopped && k < 100; k += MODELS_SLOW ? 3 : 1) {
                    cancelling_open(&c, model, pool, way, (k + way) % 3 == 0 ? MOE_OFF : 0);
                    stopped = check_cancelled_eval(&c, n, k);
                    if (stopped && k % 2) check_cancelled_eval(&c, 2 * n % 50 + 1, 2); // and again
                    if (stopped) check_goes_on(&c, k * 5 % 38, k);
                    cancelling_close(&c);
                    cases++;
                }
        moe_model_close(model);
    }
    moe_pool_close(pool);
    printf("  %d evals\n", cases);
}

TEST(going_back_that_is_cancelled_leaves_the_session_where_it_was) {
    static const int lengths[] = {0, 3, 14, 15, 16, 21, 31};
    int cases = 0, stops = 0;
    moe_pool *pool = open_pool(2);
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        cancelling c;
        moe_model *model = models_open(models_hybrid(i));
        CHECK(model != NULL);
        if (!model) continue;
        models_tokens(cancel_tokens, DEEP, moe_model_get_info(model)->n_vocab, 22);
        c.tokens = cancel_tokens;
        c.label = models_hybrids[i];
        for (int way = 0; way < 3; way++)
            for (int l = 0; l < 7; l += MODELS_SLOW ? 3 : 1)
                for (int k = 1, stopped = 1; stopped && k < 100; k += 2) {
                    float *row = (float *)malloc(row_size(model));
                    cancelling_open(&c, model, pool, way, k % 4 == 1 ? MOE_OFF : 0);
                    keep_row(c.session, row);
                    c.p.at = k, c.p.asked = 0;
                    const moe_status status = moe_session_rewind(c.session, lengths[l], NULL);
                    stopped = c.p.asked >= k;
                    CHECK(status == (stopped ? MOE_ERROR_CANCELLED : MOE_OK));
                    CHECK(moe_session_length(c.session) == (stopped ? 37 : lengths[l]));
                    if (stopped) {
                        CHECK(same_row(c.session, row));
                        check_goes_on(&c, lengths[(l + k) % 7], k);
                    }
                    stops += stopped;
                    cases++;
                    cancelling_close(&c);
                    free(row);
                }
        moe_model_close(model);
    }
    moe_pool_close(pool);
    printf("  %d of %d were stopped\n", stops, cases);
    CHECK(stops > cases / 3);
}

// One of several asks for it: all stay as they were.
TEST(a_cancelled_eval_of_several_sessions_leaves_all_of_them) {
    moe_pool *pool = open_pool(2);
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        moe_model *model = models_open(models_hybrid(i));
        CHECK(model != NULL);
        if (!model) continue;
        models_tokens(cancel_tokens, DEEP, moe_model_get_info(model)->n_vocab, 23);
        for (int k = 1, stopped = 1; stopped && k < 100; k += MODELS_SLOW ? 5 : 1) {
            cancelling c[3];
            moe_job jobs[3];
            for (int s = 0; s < 3; s++) {
                c[s].tokens = cancel_tokens;
                c[s].label = models_hybrids[i];
                cancelling_open(&c[s], model, pool, s, 0);
                jobs[s].session = c[s].session;
                jobs[s].tokens = cancel_tokens + 40;
                jobs[s].n_tokens = s ? 1 : 26;
            }
            c[1].p.at = k;
            stopped = moe_session_eval_many(jobs, 3, NULL) == MOE_ERROR_CANCELLED;
            CHECK(stopped == (c[1].p.asked >= k));
            for (int s = 0; s < 3 && stopped; s++) {
                CHECK(jobs[s].status == MOE_ERROR_CANCELLED);
                CHECK(moe_session_length(c[s].session) == 37);
                check_goes_on(&c[s], k % 37, k);
            }
            for (int s = 0; s < 3; s++) cancelling_close(&c[s]);
        }
        moe_model_close(model);
    }
    moe_pool_close(pool);
}

// ---- a dialogue ------------------------------------------------------------------------------

enum { TALK = 2000, EDIT = 1000, EDITED = 10, PROMPT = 190, ANSWER = 26 };

// Turns of a prompt and an answer that is generated token by token, up to `end`. The edit is 136
// tokens behind the begin of a prompt: latent attention takes so many as it takes all of it.
static void talk(moe_session *session, const int32_t *tokens, int end) {
    for (int done = moe_session_length(session); done < end;) {
        const int at = done % (PROMPT + ANSWER), left = end - done;
        const int n = at >= PROMPT ? 1 : PROMPT - at < left ? PROMPT - at : left;
        if (!evaluates(session, tokens + done, n)) return;
        done += n;
    }
}

// How far apart the places to go back to may be, `age` tokens from the end, if there is room for n:
// as they come if all have room (before and behind each prompt, rounded down to chunks), else in
// proportion to their age, so that n of them reach back to the begin.
static double widest_gap(int n, int length, int age) {
    const double turn = PROMPT + ANSWER + CHUNK;
    if (n >= 2 * length / (PROMPT + ANSWER) + 2) return PROMPT + CHUNK;
    return turn + (age + CHUNK) * log((double)length / CHUNK) / n;
}

TEST(a_dialogue_edited_in_its_middle_evaluates_little_again) {
    static const int checkpoints[] = {0, 64, 8};
    int32_t *old = (int32_t *)malloc(sizeof *old * TALK), *edited = old;
    edited = (int32_t *)malloc(sizeof *edited * TALK);
    for (int i = 0; i < MODELS_HYBRIDS; i += 1) {
        moe_model *model = models_open(models_hybrid(i));
        moe_pool *pool = open_pool(2);
        CHECK(model != NULL);
        if (!model) continue;
        models_tokens(old, TALK, moe_model_get_info(model)->n_vocab, 31);
        memcpy(edited, old, sizeof *old * TALK);
        models_tokens(edited + EDIT, EDITED, moe_model_get_info(model)->n_vocab, 32);
        const int mla = model->widest[MOE__IN_LATENT] > 0;
        float *row = (float *)malloc(row_size(model));
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.n_ctx = 2048;
        o.pool = pool;
        o.n_threads = 1;
        // the truth: nothing but the edited tokens; latent attention tells forms of input apart
        o.n_checkpoints = MOE_OFF;
        moe_session *fresh = moe_session_open(model, &o, NULL);
        CHECK(fresh != NULL);
        if (mla) talk(fresh, edited, EDIT);
        evaluates(fresh, edited + (mla ? EDIT : 0), TALK - (mla ? EDIT : 0));
        keep_row(fresh, row);
        moe_session_close(fresh);
        for (int c = 0; c < (MODELS_SLOW ? 1 : 3); c++) {
            o.n_checkpoints = checkpoints[c];
            moe_session *session = moe_session_open(model, &o, NULL);
            CHECK(session != NULL);
            if (!session) continue;
            const int n = moe_session_get_info(session)->n_checkpoints;
            talk(session, old, TALK);
            for (int s = -1; s < session->n_saved; s++) {
                const int at = s < 0 ? 0 : session->saved_at[s], age = TALK - at;
                const int next = s + 1 < session->n_saved ? session->saved_at[s + 1] : TALK;
                CHECKF(next - at <= widest_gap(n, TALK, age), "%s, %d checkpoints: %d to %d",
                       models_hybrids[i], n, at, next);
            }
            CHECK(moe_session_rewind(session, EDIT, NULL) == MOE_OK);
            const int again = (int)replayed(session);
            CHECKF(again <= widest_gap(n, TALK, TALK - EDIT), "%s, %d checkpoints: %d again",
                   models_hybrids[i], n, again);
            CHECKF(again <= PROMPT + CHUNK || n < 16, "%d again", again);
            if (i == 0) printf("  %d checkpoints: %d tokens again\n", n, again);
            evaluates(session, edited + EDIT, TALK - EDIT);
            CHECKF(same_row(session, row), "%s, %d checkpoints", models_hybrids[i], n);
            CHECK((int)replayed(session) == again); // nothing more
            // and back from the end of an answer to its question, as if to ask for another one
            CHECK(moe_session_rewind(session, TALK - ANSWER, NULL) == MOE_OK);
            evaluates(session, edited + TALK - ANSWER, ANSWER);
            if (!mla) CHECKF(same_row(session, row), "%s", models_hybrids[i]);
            moe_session_close(session);
        }
        free(row);
        moe_pool_close(pool);
        moe_model_close(model);
    }
    free(old);
    free(edited);
}

// ---- latent attention between recurrent layers -----------------------------------------------

// All rows of latent caches up to a length: what attention will see of them.
static uint8_t *cached_rows(const moe_session *session, int length, size_t *size) {
    uint8_t *all = NULL;
    *size = 0;
    for (int il = 0; il < session->model->info.n_layer; il++) {
        const moe__kv *kv = &session->caches[il].k;
        if (!kv->width) continue;
        all = (uint8_t *)realloc(all, *size + (size_t)length * kv->row_size + 1);
        if (!all) exit(1);
        memcpy(all + *size, kv->data, (size_t)length * kv->row_size);
        *size += (size_t)length * kv->row_size;
    }
    return all;
}

// Inputs of 128 tokens and more expand latent vectors: a token that is evaluated again must go the
// way it went, also where only the last few of such an input are.
TEST(tokens_of_long_inputs_are_evaluated_again_in_their_own_form) {
    static const int pieces[] = {150, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                 1,   1, 1, 1, 130, 40};
    enum { PIECES = sizeof pieces / sizeof pieces[0], ALL = 340 };
    int32_t tokens[ALL];
    for (int i = 7; i <= 8; i++) {
        moe_model *model = models_open(models_hybrid(i));
        moe_pool *pool = open_pool(2);
        CHECK(model != NULL);
        if (!model) continue;
        models_tokens(tokens, ALL, moe_model_get_info(model)->n_vocab, 41);
        int exact = 0;
        for (int length = 0; length <= ALL; length += MODELS_SLOW ? 37 : 5) {
            static const int checkpoints[] = {MOE_OFF, 64, 0};
            float *row = (float *)malloc(row_size(model));
            int known = 0;
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.n_ctx = 400;
            o.pool = pool;
            o.n_threads = 1 + length % 2;
            // A new session that evaluates the same pieces, where it can: the last one, cut, is
            // still long, or was not.
            int done = 0, at = 0;
            while (at < PIECES && done + pieces[at] <= length) done += pieces[at++];
            if (length == done || pieces[at] < 128 || length - done >= 128) {
                moe_session *fresh = moe_session_open(model, &o, NULL);
                for (int p = 0, sum = 0; p < at; sum += pieces[p++])
                    evaluates(fresh, tokens + sum, pieces[p]);
                evaluates(fresh, tokens + done, length - done);
                evaluates(fresh, tokens, 9);
                keep_row(fresh, row);
                moe_session_close(fresh);
                known = 1;
                exact++;
            }
            for (int c = 0; c < 3; c++) {
                size_t size, size_then;
                o.n_checkpoints = checkpoints[c];
                o.n_batch = c == 2 ? 140 : 0;
                moe_session *session = moe_session_open(model, &o, NULL);
                CHECK(session != NULL);
                if (!session) continue;
                for (int p = 0, sum = 0; p < PIECES; sum += pieces[p++])
                    evaluates(session, tokens + sum, pieces[p]);
                uint8_t *before = cached_rows(session, length, &size);
                rewinds(session, length);
                uint8_t *then = cached_rows(session, length, &size_then);
                CHECKF(size == size_then && !memcmp(before, then, size),
                       "%s: rows of the cache after a rewind to %d", models_hybrids[i], length);
                free(before);
                free(then);
                evaluates(session, tokens, 9);
                if (!known) keep_row(session, row); // the others must agree
                known = 1;
                CHECKF(same_row(session, row), "%s to %d, %d checkpoints", models_hybrids[i],
                       length, checkpoints[c]);
                moe_session_close(session);
            }
            free(row);
        }
        printf("  %-20s %d lengths against a new session\n", models_hybrids[i], exact);
        CHECK(exact > (MODELS_SLOW ? 1 : 15));
        moe_pool_close(pool);
        moe_model_close(model);
    }
}

// ---- the same model in other forms -----------------------------------------------------------

enum { FORM = 40, MOST_DATA = 256 };
static void *form_data[MOST_DATA]; // what changed tensors hold, until the next model
static int form_n;

static uint8_t *form_alloc(size_t size) {
    uint8_t *data = (uint8_t *)calloc(size + 1, 1);
    if (!data || form_n == MOST_DATA) exit(1);
    form_data[form_n++] = data;
    return data;
}
static void form_free(void) {
    while (form_n) free(form_data[--form_n]);
}

// Logits of some tokens; NULL (a failure) if the file is refused.
static float *form_logits(const edit_file *e, const char *label) {
    moe_error error;
    edit_image image = edit_build(e);
    clear_error(&error);
    moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, &error);
    moe_model *model = gguf ? moe_model_open_gguf(gguf, NULL, &error) : NULL;
    float *logits = NULL;
    CHECKF(model != NULL, "%s: %s: %s", label, error.where, error.text);
    if (model) {
        moe_session_options o;
        int32_t tokens[FORM];
        memset(&o, 0, sizeof o);
        o.n_threads = 1;
        o.kv_type = MOE_KV_F32;
        models_tokens(tokens, FORM, moe_model_get_info(model)->n_vocab, 9);
        logits = models_run(model, &o, tokens, FORM, MODELS_ODD);
    }
    moe_model_close(model);
    moe_gguf_close(gguf);
    free(image.data);
    return logits;
}
static void check_form(const edit_file *e, const float *expected, const char *label) {
    float *logits = form_logits(e, label);
    if (logits && expected)
        CHECKF(!memcmp(logits, expected, sizeof(float) * FORM * 512), "%s: other bits", label);
    free(logits);
}

static edit_tensor *form_find(edit_file *e, int layer, const char *name) {
    char full[96];
    snprintf(full, sizeof full, "blk.%d.%s", layer, name);
    edit_tensor *t = edit_find_tensor(e, full);
    CHECKF(t != NULL, "%s", full);
    return t ? t : &e->tensors[0];
}
static edit_tensor *form_add(edit_file *e, int layer, const char *name, uint32_t n_dims,
                             uint64_t n0, uint64_t n1, const uint8_t *data) {
    edit_tensor *t = &e->tensors[e->n_tensors++];
    if (e->n_tensors > EDIT_MAX_TENSORS) exit(1);
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "blk.%d.%s", layer, name);
    t->n_dims = n_dims;
    t->ne[0] = n0;
    t->ne[1] = n1;
    t->ne[2] = t->ne[3] = 1;
    t->type = MOE_TYPE_F32;
    t->data = data;
    t->size = (size_t)(n0 * n1) * sizeof(float);
    return t;
}

// Tensors of a layer become one whose rows are theirs, one after the other.
static void form_join(edit_file *e, int layer, const char *name, const char *const *parts, int n) {
    uint64_t rows = 0, n0 = 0;
    uint8_t *data = NULL;
    for (int pass = 0; pass < 2; pass++, rows = pass == 1 ? 0 : rows)
        for (int i = 0; i < n; i++) {
            edit_tensor *t = form_find(e, layer, parts[i]);
            n0 = t->ne[0];
            if (pass) memcpy(data + rows * n0 * 4, t->data, t->size);
            if (pass) t->removed = 1;
            rows += t->ne[1];
            if (i + 1 == n && !pass) data = form_alloc((size_t)(rows * n0 * 4));
        }
    form_add(e, layer, name, 2, n0, rows, data);
}

static edit_file *form_open(int hybrid) {
    static edit_file e;
    CHECKF(edit_open(&e, models_hybrid(hybrid)), "%s", models_hybrids[hybrid]);
    return &e;
}

// qwen3next's first files: q, k, v and z in ssm_in, of each key head together. If both forms are
// there, ssm_in is not needed.
TEST(older_files_of_qwen3next_give_the_same_bits) {
    enum { D = 32, NK = 2, NV = 6, R = NV / NK, E = 64, ROW = E * 4 };
    edit_file *e = form_open(1);
    float *expected = form_logits(e, "plain");
    for (int layer = 0; layer < 3; layer++) {
        const uint8_t *qkv = form_find(e, layer, "attn_qkv.weight")->data;
        const uint8_t *z = form_find(e, layer, "attn_gate.weight")->data;
        uint8_t *in = form_alloc((size_t)(2 * NK + 2 * NV) * D * ROW), *p = in;
        for (int k = 0; k < NK; k++) {
            memcpy(p, qkv + k * D * ROW, D * ROW);
            memcpy(p + D * ROW, qkv + (NK + k) * D * ROW, D * ROW);
            memcpy(p + 2 * D * ROW, qkv + (2 * NK + k * R) * D * ROW, R * D * ROW);
            memcpy(p + (2 + R) * D * ROW, z + k * R * D * ROW, R * D * ROW);
            p += (2 + 2 * R) * D * ROW;
        }
        form_add(e, layer, "ssm_in.weight", 2, E, (2 * NK + 2 * NV) * D, in);
    }
    check_form(e, expected, "both");
    for (int layer = 0; layer < 3; layer++) {
        form_find(e, layer, "attn_qkv.weight")->removed = 1;
        form_find(e, layer, "attn_gate.weight")->removed = 1;
        check_form(e, expected, "ssm_in"); // of the first layers only, then of all
    }
    // In another order of the heads it is another model.
    float *logits = NULL;
    edit_tensor *t = form_find(e, 0, "ssm_in.weight");
    uint8_t *swapped = form_alloc(t->size);
    memcpy(swapped, t->data + t->size / 2, t->size / 2);
    memcpy(swapped + t->size / 2, t->data, t->size / 2);
    t->data = swapped;
    logits = form_logits(e, "swapped");
    if (logits && expected) CHECK(memcmp(logits, expected, sizeof(float) * FORM * 512) != 0);
    free(logits);
    free(expected);
    form_free();
    edit_close(e);
}

// qwen35moe keeps betas and decays in two matrices, and value heads in another order than
// qwen3next: the same model in both families has the same bits. (Rotary sections that cover all
// pairs, the same widths.)
TEST(both_families_of_gated_delta_nets_agree) {
    enum { D = 32, NK = 2, NV = 6, R = NV / NK, E = 64, ROW = E * 4 };
    static const uint8_t sections[28] = {5, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, // an array of 4:
                                         2, 0, 0, 0, 1, 0, 0, 0, 1};         // 8 values, 4 pairs
    edit_file *e = form_open(1);
    float *expected = form_logits(e, "qwen3next");
    // the family's name, in the value and in every key
    uint8_t *arch = form_alloc(24);
    arch[0] = 9;
    memcpy(arch + 8, "qwen35moe", 9);
    edit_set(e, "general.architecture", 8, arch, 17);
    for (int i = 0; i < e->n_values; i++)
        if (!strncmp(e->values[i].key, "qwen3next.", 10)) memcpy(e->values[i].key, "qwen35moe", 9);
    edit_set(e, "qwen35moe.rope.dimension_sections", 9, sections, sizeof sections);
    for (int layer = 0; layer < 3; layer++) {
        // value head h of key head h / R becomes number h % R * NK + h / R
        static const char *const rows[] = {"attn_gate.weight", "ssm_dt.bias", "ssm_a"};
        edit_tensor *qkv = form_find(e, layer, "attn_qkv.weight");
        edit_tensor *conv = form_find(e, layer, "ssm_conv1d.weight");
        edit_tensor *out = form_find(e, layer, "ssm_out.weight");
        edit_tensor *ba = form_find(e, layer, "ssm_ba.weight");
        uint8_t *new_qkv = form_alloc(qkv->size), *new_conv = form_alloc(conv->size);
        uint8_t *new_out = form_alloc(out->size);
        uint8_t *b = form_alloc(NV * ROW), *a = form_alloc(NV * ROW);
        const size_t keys_size = 2 * NK * D * ROW, taps = 4 * 4;
        memcpy(new_qkv, qkv->data, keys_size);
        memcpy(new_conv, conv->data, 2 * NK * D * taps);
        for (int h = 0; h < NV; h++) {
            const int to = h % R * NK + h / R;
            memcpy(new_qkv + keys_size + to * D * ROW, qkv->data + keys_size + h * D * ROW,
                   D * ROW);
            memcpy(new_conv + (2 * NK + to) * D * taps, conv->data + (2 * NK + h) * D * taps,
                   D * taps);
            for (int i = 0; i < E; i++)
                memcpy(new_out + (i * NV + to) * D * 4, out->data + (i * NV + h) * D * 4, D * 4);
            memcpy(b + to * ROW, ba->data + (h / R * 2 * R + h % R) * ROW, ROW);
            memcpy(a + to * ROW, ba->data + (h / R * 2 * R + R + h % R) * ROW, ROW);
        }
        for (int k = 0; k < 3; k++) {
            edit_tensor *t = form_find(e, layer, rows[k]);
            const size_t each = t->size / NV;
            uint8_t *data = form_alloc(t->size);
            for (int h = 0; h < NV; h++)
                memcpy(data + (size_t)(h % R * NK + h / R) * each, t->data + (size_t)h * each,
                       each);
            t->data = data;
        }
        qkv->data = new_qkv, conv->data = new_conv, out->data = new_out;
        ba->removed = 1;
        form_add(e, layer, "ssm_beta.weight", 2, E, NV, b);
        form_add(e, layer, "ssm_alpha.weight", 2, E, NV, a);
    }
    float *logits = form_logits(e, "qwen35moe");
    if (logits && expected) { // columns of ssm_out are summed in another order
        double *r = models_doubles(expected, FORM * 512);
        const double off = models_nmse(logits, r, FORM * 512);
        CHECKF(off < 1e-10, "%g", off);
        free(r);
    }
    free(logits);
    free(expected);
    form_free();
    edit_close(e);
}

// Queries, keys and values of attention layers and of KDA in one tensor; gate and up of experts;
// both halves of the latent's expansion; taps and columns with and without a dimension of 1.
TEST(fused_and_flat_tensors_of_recurrent_models_give_the_same_bits) {
    static const char *const qkv[] = {"attn_q.weight", "attn_k.weight", "attn_v.weight"};
    int forms = 0;
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        edit_file *e = form_open(i);
        float *expected = form_logits(e, models_hybrids[i]);
        for (int layer = 0; layer < 4; layer++) {
            char name[96];
            snprintf(name, sizeof name, "blk.%d.attn_k.weight", layer);
            if (!edit_find_tensor(e, name)) continue;
            form_join(e, layer, "attn_qkv.weight", qkv, 3);
            check_form(e, expected, "attn_qkv");
            forms++;
        }
        for (int t = 0; t < e->n_tensors; t++) {
            edit_tensor *x = &e->tensors[t];
            const int taps = (strstr(x->name, "conv1d") || strstr(x->name, "conv.conv")) &&
                             x->n_dims > 1;
            const size_t size = strlen(x->name);
            const int column = size > 6 && (!strcmp(x->name + size - 6, ".ssm_a") ||
                                            !strcmp(x->name + size - 6, ".ssm_d"));
            if (taps) { // {K, C}, {K, 1, C}, {K, 1, C, 1}, {K, C, 1, 1}
                const uint64_t n = x->ne[1] * x->ne[2];
                for (uint32_t d = 2; d <= 4; d++)
                    for (int between = 0; between < (d > 2 ? 2 : 1); between++) {
                        x->n_dims = d;
                        x->ne[1] = between ? 1 : n;
                        x->ne[2] = between ? n : 1;
                        x->ne[3] = 1;
                        check_form(e, expected, x->name);
                        forms++;
                    }
            } else if (column && (x->ne[0] == 1 || (x->n_dims == 2 && x->ne[1] == 1))) {
                x->ne[0] *= x->ne[1];
                x->ne[1] = 1;
                x->n_dims = 1;
                check_form(e, expected, x->name);
                forms++;
            }
        }
        for (int layer = 0; layer < 4; layer++) { // of all experts
            char name[96];
            snprintf(name, sizeof name, "blk.%d.ffn_gate_exps.weight", layer);
            edit_tensor *gate = edit_find_tensor(e, name);
            if (!gate) continue;
            edit_tensor *up = form_find(e, layer, "ffn_up_exps.weight");
            const size_t each = gate->size / (size_t)gate->ne[2];
            uint8_t *data = form_alloc(2 * gate->size);
            for (size_t k = 0; k < (size_t)gate->ne[2]; k++) {
                memcpy(data + 2 * k * each, gate->data + k * each, each);
                memcpy(data + (2 * k + 1) * each, up->data + k * each, each);
            }
            edit_tensor *t = form_add(e, layer, "ffn_gate_up_exps.weight", 3, gate->ne[0],
                                      2 * gate->ne[1], data);
            t->ne[2] = gate->ne[2];
            t->size = 2 * gate->size;
            gate->removed = up->removed = 1;
            check_form(e, expected, "ffn_gate_up_exps");
            forms++;
        }
        free(expected);
        form_free();
        edit_close(e);
    }
    printf("  %d forms\n", forms);
    CHECK(forms > 100);
}

// attn_kv_b in place of attn_k_b and attn_v_b: the same numbers, added in another order.
TEST(the_whole_expansion_of_latent_vectors_serves_recurrent_models_too) {
    for (int i = 7; i <= 8; i++) {
        enum { N = 32, L = 64, V = 32, H = 4 };
        edit_file *e = form_open(i);
        float *expected = form_logits(e, models_hybrids[i]);
        const float *k_b = (const float *)(const void *)form_find(e, 2, "attn_k_b.weight")->data;
        const float *v_b = (const float *)(const void *)form_find(e, 2, "attn_v_b.weight")->data;
        float *kv_b = (float *)(void *)form_alloc(sizeof *kv_b * L * H * (N + V));
        for (int h = 0; h < H; h++)
            for (int r = 0; r < L; r++) {
                for (int k = 0; k < N; k++)
                    kv_b[(h * (N + V) + k) * L + r] = k_b[(h * L + r) * N + k];
                for (int k = 0; k < V; k++)
                    kv_b[(h * (N + V) + N + k) * L + r] = v_b[(h * V + k) * L + r];
            }
        form_add(e, 2, "attn_kv_b.weight", 2, L, H * (N + V), (const uint8_t *)(void *)kv_b);
        check_form(e, expected, "all three");
        form_find(e, 2, "attn_k_b.weight")->removed = 1;
        form_find(e, 2, "attn_v_b.weight")->removed = 1;
        float *logits = form_logits(e, "attn_kv_b");
        if (logits && expected) {
            double *r = models_doubles(expected, FORM * 512);
            const double off = models_nmse(logits, r, FORM * 512);
            CHECKF(off < 1e-10, "%s: %g", models_hybrids[i], off);
            free(r);
        }
        free(logits);
        free(expected);
        form_free();
        edit_close(e);
    }
}

// Some files hold layers at their end that predict tokens further ahead: they are not run, and
// may hold anything; what counts layers (decays of minimax-01, intervals) leaves them out.
TEST(layers_that_predict_further_ahead_are_left_out) {
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        static const uint32_t five = 5, one = 1;
        edit_file *e = form_open(i);
        float *expected = form_logits(e, models_hybrids[i]);
        const edit_value *v = edit_find_value(e, "general.architecture");
        char key[128];
        uint8_t more[64];
        const int size = (int)v->size - 8;
        memset(more, 0, sizeof more);
        snprintf(key, sizeof key, "%.*s.block_count", size, (const char *)v->data + 8);
        edit_set(e, key, 4, &five, 4);
        snprintf(key, sizeof key, "%.*s.nextn_predict_layers", size, (const char *)v->data + 8);
        edit_set(e, key, 4, &one, 4);
        for (int k = 0; k < e->n_values; k++) { // arrays have an entry for it
            edit_value *a = &e->values[k];
            if (a->type != 9 || strncmp(a->key, "tokenizer.", 10) == 0) continue;
            if (strstr(a->key, "sections")) continue;
            const size_t each = (a->size - 12) / 4;
            uint8_t *data = form_alloc(a->size + each);
            memcpy(data, a->data, a->size);
            memcpy(data + a->size, a->data + 12, each);
            data[4] = 5;
            a->data = data;
            a->size += each;
        }
        form_add(e, 4, "nextn.eh_proj.weight", 2, 128, 64, form_alloc(128 * 64 * 4));
        form_add(e, 4, "attn_norm.weight", 1, 64, 1, form_alloc(64 * 4));
        form_add(e, 4, "whatever", 1, 3, 1, form_alloc(12));
        check_form(e, expected, models_hybrids[i]);
        free(expected);
        form_free();
        edit_close(e);
    }
}

// ---- memory ----------------------------------------------------------------------------------

// The state of a layer by the sizes of its shape: what is kept in a checkpoint.
static size_t state_floats(const moe__layer *layer) {
    const moe__recurrent *r = &layer->recurrent;
    const size_t heads = (size_t)r->n_head, conv = (size_t)r->n_conv, taps = (size_t)r->n_taps;
    switch (layer->mixer) {
    case MOE__DELTA:
    case MOE__KDA:
    case MOE__MAMBA2:
        return heads * (size_t)r->d_k * (size_t)r->d_v + (taps - 1) * conv;
    case MOE__LIGHTNING: return heads * (size_t)r->d_k * (size_t)r->d_v;
    case MOE__MAMBA1: return (size_t)r->d_k * conv + (taps - 1) * conv;
    case MOE__SHORT_CONV: return (taps - 1) * conv;
    default: return 0;
    }
}

TEST(an_estimate_counts_states_and_checkpoints) {
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        static const int32_t contexts[] = {1, 31, 100, 3000}, numbers[] = {0, MOE_OFF, 1, 1000};
        meter m;
        moe_model_options mo;
        size_t each = 0;
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        mo.allocator = meter_allocator(&m);
        moe_model *model = moe_model_open(models_hybrid(i), &mo, NULL);
        CHECK(model != NULL);
        if (!model) continue;
        const size_t before = m.live;
        for (int il = 0; il < model->info.n_layer; il++)
            each += state_floats(&model->layers[il]) * sizeof(float);
        CHECK(each > 0);
        for (int v = 0; v < 64; v++) {
            moe_session_options o;
            moe_session_info info;
            memset(&o, 0, sizeof o);
            memset(&info, 0xAA, sizeof info);
            o.n_ctx = contexts[v % 4];
            o.n_checkpoints = numbers[v / 4 % 4];
            o.checkpoint_bytes = v & 16 ? 5 * each / 2 : 0;
            o.n_threads = v & 32 ? 3 : 1;
            CHECK(moe_session_estimate(model, &o, &info, NULL) == MOE_OK && m.live == before);
            moe_session *session = moe_session_open(model, &o, NULL);
            CHECK(session != NULL);
            if (!session) continue;
            const moe_session_info *real = moe_session_get_info(session);
            CHECK(info.kv_bytes == real->kv_bytes && info.work_bytes == real->work_bytes);
            CHECK(info.state_bytes == real->state_bytes);
            CHECK(info.n_checkpoints == real->n_checkpoints);
            CHECK(info.checkpoint_bytes == real->checkpoint_bytes);
            const size_t told = info.kv_bytes + info.work_bytes + info.checkpoint_bytes;
            const size_t taken = m.live - before;
            CHECKF(taken >= told && taken - told < 65536, "told %zu, taken %zu", told, taken);
            // two slots of a state and of 16 tokens; not more than the cache
            CHECK(info.state_bytes >= 2 * each && info.state_bytes <= info.kv_bytes);
            // as many as asked for, as the context has chunks, and as have room
            const int32_t wanted = o.n_checkpoints == MOE_OFF ? 0
                                   : o.n_checkpoints          ? o.n_checkpoints
                                                              : 16;
            int32_t n = wanted < o.n_ctx / CHUNK ? wanted : o.n_ctx / CHUNK;
            if (o.checkpoint_bytes && n > 2) n = 2;
            CHECKF(info.n_checkpoints == n, "%s: %d, not %d", models_hybrids[i],
                   (int)info.n_checkpoints, (int)n);
            CHECKF(info.checkpoint_bytes >= (size_t)n * each &&
                       info.checkpoint_bytes <= (size_t)n * (each + 64 * 4) + 64,
                   "%s: %zu for %d of %zu", models_hybrids[i], info.checkpoint_bytes, (int)n,
                   each);
            if (o.checkpoint_bytes) CHECK(info.checkpoint_bytes <= o.checkpoint_bytes);
            moe_session_close(session);
            CHECK(m.live == before);
        }
        // states do not grow with the context
        moe_session_options o;
        moe_session_info small, large;
        memset(&o, 0, sizeof o);
        o.n_ctx = 64;
        CHECK(moe_session_estimate(model, &o, &small, NULL) == MOE_OK);
        o.n_ctx = 4096;
        CHECK(moe_session_estimate(model, &o, &large, NULL) == MOE_OK);
        CHECK(small.state_bytes == large.state_bytes && small.kv_bytes < large.kv_bytes);
        o.n_checkpoints = -2;
        CHECK(moe_session_estimate(model, &o, &large, NULL) == MOE_ERROR_ARGUMENT);
        moe_model_close(model);
        CHECK(m.live == 0);
    }
}

// A model without recurrent layers takes nothing for them.
TEST(models_without_recurrent_layers_have_no_states) {
    for (int i = 0; i < MODELS_FORMS; i++) {
        moe_session_info info;
        moe_model *model = models_open(models_form(i));
        CHECK(model && moe_session_estimate(model, NULL, &info, NULL) == MOE_OK);
        CHECK(!info.state_bytes && !info.n_checkpoints && !info.checkpoint_bytes);
        moe_model_close(model);
    }
}

TEST(opening_a_session_with_states_survives_every_failing_allocation) {
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        meter m;
        moe_model_options mo;
        moe_session_options o;
        int32_t tokens[60];
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        memset(&o, 0, sizeof o);
        mo.allocator = meter_allocator(&m);
        o.n_threads = 2;
        o.n_batch = 24;
        o.n_ctx = 100;
        // opening the model, first
        long fail_at = 0;
        moe_model *model = NULL;
        for (int failed = 1; failed && fail_at < 2000;) {
            moe_error error;
            m.calls = 0;
            m.fail_at = fail_at += MODELS_SLOW || fail_at > 40 ? 7 : 1;
            clear_error(&error);
            model = moe_model_open(models_hybrid(i), &mo, &error);
            failed = m.calls >= m.fail_at;
            CHECKF((model == NULL) == failed, "%s", error.text);
            if (failed) CHECK(error.status == MOE_ERROR_MEMORY && m.live == 0);
        }
        m.fail_at = 0;
        CHECK(model != NULL);
        if (!model) continue;
        const size_t model_bytes = m.live;
        models_tokens(tokens, 60, moe_model_get_info(model)->n_vocab, 2);
        fail_at = 0;
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
                const long calls = m.calls;
                evaluates(session, tokens, 60);
                evaluates(session, tokens, 1);
                CHECK(moe_session_rewind(session, 39, NULL) == MOE_OK);
                evaluates(session, tokens, 30);
                CHECK(moe_session_rewind(session, 3, NULL) == MOE_OK);
                evaluates(session, tokens, 9);
                CHECKF(m.calls == calls, "evaluating took memory %ld times", m.calls - calls);
            }
            moe_session_close(session);
            CHECKF(m.live == model_bytes, "%zu bytes left", m.live - model_bytes);
        }
        CHECK(fail_at > 3);
        moe_model_close(model);
        CHECK(m.live == 0);
    }
}

MAIN()
