// moe_generate on small random models: their text is nonsense and full of broken UTF-8, which is
// just what is needed here. What it must be is computed apart, from logits and token texts.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"
#include "models.h"

// ---- what the text must be -------------------------------------------------------------------

enum { MAX_TEXT = 65536 };

typedef struct text {
    char data[MAX_TEXT];
    size_t size;
    int pieces, bad_pieces; // pieces that are empty or not UTF-8
    int stop_after;         // pieces after which the callback returns 0; 0: never
} text;

static void text_add(text *t, const char *data, size_t size) {
    if (t->size + size > MAX_TEXT) size = MAX_TEXT - t->size;
    memcpy(t->data + t->size, data, size);
    t->size += size;
}

// Length of the UTF-8 character at p, 0 if there is none: no overlong forms, no surrogates,
// nothing above U+10FFFF.
static size_t utf8_length(const unsigned char *p, size_t n) {
    if (n == 0) return 0;
    if (p[0] < 0x80) return 1;
    size_t length = p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4 : 0;
    if (length == 0 || length > n) return 0;
    for (size_t i = 1; i < length; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if (p[0] == 0xE0 && p[1] < 0xA0) return 0;
    if (p[0] == 0xED && p[1] > 0x9F) return 0;
    if (p[0] == 0xF0 && p[1] < 0x90) return 0;
    if (p[0] == 0xF4 && p[1] > 0x8F) return 0;
    return length;
}
static int is_utf8(const char *data, size_t size) {
    while (size) {
        size_t n = utf8_length((const unsigned char *)data, size);
        if (!n) return 0;
        data += n;
        size -= n;
    }
    return 1;
}

// Bytes that are not UTF-8 become U+FFFD. How many of them a broken character gives is a matter
// of taste: here, and in what is compared with it, a run of them counts as one.
static void clean(const char *data, size_t size, text *out) {
    static const char replacement[3] = {'\xEF', '\xBF', '\xBD'};
    memset(out, 0, sizeof *out);
    while (size) {
        size_t n = utf8_length((const unsigned char *)data, size);
        int broken = n == 0 || (n == 3 && !memcmp(data, replacement, 3));
        if (!broken) text_add(out, data, n);
        else if (out->size < 3 || memcmp(out->data + out->size - 3, replacement, 3))
            text_add(out, replacement, 3);
        if (n == 0) n = 1;
        data += n;
        size -= n;
    }
}

static int same_text(const text *got, const char *bytes, size_t size) {
    static text a, b;
    clean(got->data, got->size, &a);
    clean(bytes, size, &b);
    return a.size == b.size && !memcmp(a.data, b.data, a.size);
}

static int on_text(void *user, const char *data, size_t size) {
    text *t = (text *)user;
    t->pieces++;
    t->bad_pieces += size == 0 || !is_utf8(data, size);
    text_add(t, data, size);
    return t->pieces != t->stop_after;
}

// ---- what the tokens must be -----------------------------------------------------------------

static moe_model *the_model;
static const moe_vocab *the_vocab;
static int32_t n_vocab;

static int open_model(void) {
    if (!the_model) the_model = models_open(models_simple("micro", "f32"));
    the_vocab = moe_model_vocab(the_model);
    n_vocab = the_model ? moe_model_get_info(the_model)->n_vocab : 0;
    CHECK(the_vocab != NULL);
    return the_vocab != NULL;
}

static moe_session *open_session(int n_ctx) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = n_ctx;
    o.n_threads = 1;
    moe_session *session = moe_session_open(the_model, &o, NULL);
    CHECK(session != NULL);
    return session;
}

static int32_t argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// Evaluates the prompt, then n times the likeliest token; the bytes of these.
static size_t greedy(moe_session *session, const int32_t *prompt, int n_prompt, int n,
                     int32_t *tokens, char *bytes) {
    size_t size = 0;
    CHECK(moe_session_eval(session, prompt, n_prompt, NULL) == MOE_OK);
    for (int i = 0; i < n; i++) {
        tokens[i] = argmax(moe_session_logits(session, -1), n_vocab);
        size += moe_vocab_text(the_vocab, tokens[i], bytes + size, MAX_TEXT - size);
        if (i < n - 1) CHECK(moe_session_eval(session, &tokens[i], 1, NULL) == MOE_OK);
    }
    return size;
}

// A prompt whose greedy continuation does not run into an end-of-text token.
static const int32_t prompt[] = {72, 101, 108, 111};
enum { N_PROMPT = 4 };

static moe_generate_options options(text *t, int max_tokens) {
    moe_generate_options o;
    memset(&o, 0, sizeof o);
    memset(t, 0, sizeof *t);
    o.max_tokens = max_tokens;
    o.ignore_end = MOE_ON;
    o.on_text = on_text;
    o.user = t;
    return o;
}

// ---- tests -----------------------------------------------------------------------------------

// Greedy text is that of the largest logits, whatever the number of tokens.
TEST(greedy_text_is_that_of_the_largest_logits) {
    static char bytes[MAX_TEXT];
    static text t;
    static const int counts[] = {1, 2, 3, 10, 100, 400};
    if (!open_model()) return;
    for (int i = 0; i < 6; i++) {
        int32_t tokens[400];
        moe_generate_result result;
        moe_session *a = open_session(500), *b = open_session(500);
        size_t size = greedy(a, prompt, N_PROMPT, counts[i], tokens, bytes);
        moe_generate_options o = options(&t, counts[i]);
        memset(&result, 0xAA, sizeof result);
        CHECK(moe_generate(b, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        CHECK(result.reason == MOE_STOP_LIMIT && result.n_generated == counts[i]);
        CHECK(result.n_prompt == N_PROMPT);
        CHECK(result.prompt_seconds >= 0 && result.generate_seconds >= 0);
        CHECK(t.bad_pieces == 0 && t.pieces <= counts[i] + 1);
        CHECKF(same_text(&t, bytes, size), "%d tokens: %zu bytes for %zu", counts[i], t.size, size);
        // The last token is not evaluated; what follows it does.
        CHECK(moe_session_length(b) == N_PROMPT + counts[i] - 1);
        CHECK(result.next_token == tokens[counts[i] - 1]);
        moe_session_close(a);
        moe_session_close(b);
    }
}

// A second call goes on behind what the session holds.
TEST(a_second_call_goes_on_behind_the_first) {
    static char bytes[MAX_TEXT];
    static text t;
    static const int32_t second[] = {10, 11, 12};
    int32_t tokens[64];
    if (!open_model()) return;
    moe_session *a = open_session(100), *b = open_session(100);
    moe_generate_options o = options(&t, 10);
    CHECK(moe_generate(b, prompt, N_PROMPT, &o, NULL, NULL) == MOE_OK);
    int32_t held = moe_session_length(b);
    greedy(a, prompt, N_PROMPT, 10, tokens, bytes);
    if (moe_session_length(a) < held)
        CHECK(moe_session_eval(a, &tokens[9], 1, NULL) == MOE_OK);
    CHECK(moe_session_length(a) == held);
    o = options(&t, 20);
    CHECK(moe_generate(b, second, 3, &o, NULL, NULL) == MOE_OK);
    size_t size = greedy(a, second, 3, 20, tokens, bytes);
    CHECK(same_text(&t, bytes, size));
    moe_session_close(a);
    moe_session_close(b);
}

// In pieces: the token that was not evaluated begins the next one. Each is reported before it is
// evaluated: a callback sees a session that does not hold it yet.
static int32_t seen_length;
static int on_text_length(void *user, const char *data, size_t size) {
    (void)data, (void)size;
    seen_length = moe_session_length((moe_session *)user);
    return 1;
}
TEST(generating_in_pieces_gives_the_same_text) {
    static char bytes[MAX_TEXT];
    static text t;
    int32_t tokens[64];
    if (!open_model()) return;
    moe_session *a = open_session(100), *b = open_session(100);
    moe_generate_result result;
    moe_generate_options o = options(&t, 7);
    size_t size = greedy(a, prompt, N_PROMPT, 35, tokens, bytes);
    CHECK(moe_generate(b, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    for (int i = 1; i < 5; i++) {
        const int32_t next = result.next_token;
        CHECK(moe_generate(b, &next, 1, &o, &result, NULL) == MOE_OK && result.n_prompt == 1);
    }
    CHECK(same_text(&t, bytes, size));
    moe_session_rewind(b, 0, NULL);
    o.on_text = on_text_length;
    o.user = b;
    o.max_tokens = 1;
    CHECK(moe_generate(b, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    CHECK(seen_length == N_PROMPT && moe_session_length(b) == N_PROMPT);
    moe_session_close(a);
    moe_session_close(b);
}

// An empty prompt: from the logits that are there, without evaluating anything twice.
TEST(an_empty_prompt_goes_on_from_the_logits_there) {
    static text whole, t;
    moe_generate_result result;
    if (!open_model()) return;
    moe_session *session = open_session(100);
    moe_generate_options o = options(&whole, 30);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    moe_session_rewind(session, 0, NULL);
    CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
    o = options(&t, 30);
    CHECK(moe_generate(session, NULL, 0, &o, &result, NULL) == MOE_OK);
    CHECK(result.n_prompt == 0 && result.n_generated == 30);
    CHECK(t.size == whole.size && !memcmp(t.data, whole.data, t.size));
    moe_session_close(session);
    // No logits, nothing to go on with.
    moe_error error;
    memset(&error, 0, sizeof error);
    session = open_session(100);
    memset(&result, 0xAA, sizeof result);
    CHECK(moe_generate(session, NULL, 0, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    CHECK(error.status == MOE_ERROR_ARGUMENT && *error.text);
    CHECK(result.reason == MOE_STOP_CALLER && result.n_generated == 0);
    moe_session_close(session);
}

// Until the context is full: it is used up, and no further.
TEST(the_context_is_used_up_and_no_further) {
    static text t;
    moe_generate_result result;
    if (!open_model()) return;
    for (int n_ctx = N_PROMPT; n_ctx < N_PROMPT + 20; n_ctx++) {
        moe_session *session = open_session(n_ctx);
        moe_generate_options o = options(&t, 0);
        CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        CHECK(result.reason == MOE_STOP_CONTEXT);
        CHECK(moe_session_length(session) == n_ctx);
        CHECK(result.n_generated == n_ctx - N_PROMPT + 1 && result.next_token >= 0);
        // Nothing fits any more.
        moe_error error;
        memset(&error, 0, sizeof error);
        CHECK(moe_generate(session, prompt, 1, &o, &result, &error) == MOE_ERROR_CONTEXT_FULL);
        CHECK(error.status == MOE_ERROR_CONTEXT_FULL && *error.text);
        CHECK(moe_session_length(session) == n_ctx);
        moe_session_close(session);
    }
    moe_session *session = open_session(3);
    moe_generate_options o = options(&t, 5);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_ERROR_CONTEXT_FULL);
    CHECK(moe_session_length(session) == 0 && t.pieces == 0);
    CHECK(result.reason == MOE_STOP_CONTEXT && result.n_generated == 0);
    moe_session_close(session);
}

// The callback ends it at the first, second, ... piece; what came is what would have come.
TEST(the_callback_can_stop_at_any_piece) {
    static text whole, t;
    moe_generate_result result;
    if (!open_model()) return;
    moe_session *session = open_session(100);
    moe_generate_options o = options(&whole, 40);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    CHECK(whole.pieces > 5);
    for (int at = 1; at <= whole.pieces; at++) {
        o = options(&t, 40);
        t.stop_after = at;
        moe_session_rewind(session, 0, NULL);
        CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        CHECKF(result.reason == MOE_STOP_CALLER, "%d of %d", at, whole.pieces);
        CHECK(t.pieces == at && t.size <= whole.size && !memcmp(t.data, whole.data, t.size));
    }
    moe_session_close(session);
}

static int stop_at_once(void *user) { return ++*(int *)user > 30; }

// The session's own way to stop counts as the caller's.
TEST(the_sessions_own_stop_counts_as_the_callers) {
    static text t;
    moe_session_options s;
    moe_generate_result result;
    int calls = 0;
    if (!open_model()) return;
    memset(&s, 0, sizeof s);
    s.should_stop = stop_at_once;
    s.should_stop_user = &calls;
    moe_session *session = moe_session_open(the_model, &s, NULL);
    moe_generate_options o = options(&t, 1000);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    CHECK(result.reason == MOE_STOP_CALLER && result.n_generated < 40);
    // During the prompt it is an error, as with moe_session_eval.
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_ERROR_CANCELLED);
    CHECK(result.reason == MOE_STOP_CALLER && result.n_generated == 0);
    moe_session_close(session);
}

// The prompt anew, with stop strings.
static moe_generate_result until_stop(moe_session *session, text *t, int max_tokens,
                                      const char *const *stops, size_t n_stops) {
    moe_generate_options o = options(t, max_tokens);
    moe_generate_result result;
    o.stop = stops;
    o.n_stop = n_stops;
    CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    return result;
}

// The first occurrence of `stop` in clean text.
static size_t find(const text *t, const char *stop) {
    size_t n = strlen(stop);
    for (size_t i = 0; i + n <= t->size; i++)
        if (!memcmp(t->data + i, stop, n)) return i;
    return t->size;
}

// Stop strings cut out of the text at every place and of several lengths: the text ends where
// the string begins.
TEST(text_ends_where_a_stop_string_begins) {
    static text whole, t;
    moe_generate_result result;
    if (!open_model()) return;
    moe_session *session = open_session(200);
    moe_generate_options o = options(&whole, 60);
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    int tried = 0;
    for (size_t n = 1; n <= 40; n = n * 2 + 1)
        for (size_t at = 0; at + n <= whole.size && at < 60; at += n > 4 ? 3 : 1) {
            char stop[64];
            memcpy(stop, whole.data + at, n);
            stop[n] = 0;
            if (!is_utf8(stop, n) || memchr(stop, 0, n)) continue;
            const char *stops[3] = {"never to be seen", stop, "nor this"};
            result = until_stop(session, &t, 60, stops, 3);
            size_t first = find(&whole, stop);
            CHECKF(result.reason == MOE_STOP_STRING, "\"%s\"", stop);
            CHECKF(t.size == first && !memcmp(t.data, whole.data, first), "\"%s\": %zu, not %zu",
                   stop, t.size, first);
            CHECK(t.bad_pieces == 0);
            tried++;
        }
    printf("  %d stop strings\n", tried);
    CHECK(tried > 20);
    moe_session_close(session);
}

// Text that might have been the beginning of a stop string is not lost at the end.
TEST(text_held_back_is_not_lost_at_the_end) {
    static text whole, t;
    moe_generate_result result;
    if (!open_model()) return;
    moe_session *session = open_session(200);
    for (int n = 5; n < 25; n++) {
        moe_generate_options o = options(&whole, n);
        moe_session_rewind(session, 0, NULL);
        CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        for (size_t length = 1; length < whole.size && length < 30; length++) {
            char stop[64];
            const char *stops[1] = {stop};
            size_t at = whole.size - length;
            if (!is_utf8(whole.data + at, length)) continue;
            memcpy(stop, whole.data + at, length);
            memcpy(stop + length, "\x01zz", 4); // the text's end, and what does not come
            if (find(&whole, stop) < whole.size) continue;
            result = until_stop(session, &t, n, stops, 1);
            CHECK(result.reason == MOE_STOP_LIMIT);
            CHECKF(t.size == whole.size && !memcmp(t.data, whole.data, t.size), "\"%s\"", stop);
        }
    }
    moe_session_close(session);
}

// A character that is not complete at the end becomes U+FFFD: that may complete a stop string.
TEST(the_end_of_a_text_may_complete_a_stop_string) {
    static text whole, t;
    moe_generate_result result;
    int tried = 0;
    if (!open_model()) return;
    moe_session *session = open_session(200);
    for (int n = 1; n < 60; n++) {
        moe_generate_options o = options(&whole, n);
        moe_session_rewind(session, 0, NULL);
        CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        if (whole.size < 3 || memcmp(whole.data + whole.size - 3, "\xEF\xBF\xBD", 3)) continue;
        for (size_t length = 3; length <= whole.size && length < 30; length++) {
            char stop[64];
            const char *stops[1] = {stop};
            const size_t at = whole.size - length;
            memcpy(stop, whole.data + at, length);
            stop[length] = 0;
            if (!is_utf8(stop, length) || memchr(stop, 0, length) || find(&whole, stop) != at)
                continue;
            result = until_stop(session, &t, n, stops, 1);
            CHECKF(result.reason == MOE_STOP_STRING, "%d tokens: reason %d", n,
                   (int)result.reason);
            CHECK(t.size == at && !memcmp(t.data, whole.data, at));
            tried++;
        }
    }
    CHECKF(tried > 3, "%d tried", tried);
    moe_session_close(session);
}

// Nothing can be chosen if no logit is a number: an error, not token 0 until the limit.
TEST(logits_that_are_not_numbers_are_an_error) {
    static text t;
    moe_generate_result result;
    moe_error error;
    if (!open_model()) return;
    moe_session *session = open_session(200);
    moe_sampler_options draw;
    memset(&draw, 0, sizeof draw);
    draw.temperature = 1;
    moe_sampler *sampler = moe_sampler_open(&draw, n_vocab, n_vocab, NULL);
    for (int i = 0; i < 4; i++) {
        moe_generate_options o = options(&t, 20);
        o.sampler = i % 2 ? sampler : NULL;
        CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
        for (int v = 0; v < n_vocab; v++) session->logits[v] = i < 2 ? NAN : -INFINITY;
        CHECK(moe_generate(session, NULL, 0, &o, &result, &error) == MOE_ERROR_FORMAT);
        CHECKF(strstr(error.text, "no logit"), "%s", error.text);
        CHECK(result.n_generated == 0 && result.next_token == -1 && t.size == 0);
    }
    moe_sampler_close(sampler);
    moe_session_close(session);
}

// Generates with a seeded sampler.
static void sample(moe_session *session, uint64_t seed, float temperature, int max_tokens, text *t,
                   int ignore_end, int special, moe_generate_result *result) {
    moe_sampler_options s;
    memset(&s, 0, sizeof s);
    s.temperature = temperature;
    s.seed = seed;
    moe_sampler *sampler = moe_sampler_open(&s, n_vocab, moe_vocab_size(the_vocab), NULL);
    moe_generate_options o = options(t, max_tokens);
    o.sampler = sampler;
    o.ignore_end = ignore_end;
    o.special = special;
    moe_session_rewind(session, 0, NULL);
    CHECK(sampler && moe_generate(session, prompt, N_PROMPT, &o, result, NULL) == MOE_OK);
    CHECK(t->bad_pieces == 0);
    moe_sampler_close(sampler);
}

TEST(the_same_seed_gives_the_same_text) {
    static text a, b;
    moe_generate_result result;
    if (!open_model()) return;
    moe_session *first = open_session(300), *second = open_session(300);
    int differ = 0;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        sample(first, seed, 1, 200, &a, MOE_ON, 0, &result);
        CHECK(result.n_generated == 200);
        sample(second, seed, 1, 200, &b, MOE_ON, 0, &result);
        CHECK(a.size == b.size && a.pieces == b.pieces && !memcmp(a.data, b.data, a.size));
        sample(second, seed + 100, 1, 200, &b, MOE_ON, 0, &result);
        differ += a.size != b.size || memcmp(a.data, b.data, a.size) != 0;
    }
    CHECK(differ == 8);
    moe_session_close(first);
    moe_session_close(second);
}

// Ends at the end-of-text token, or not; shows control tokens, or not. With the same seed all
// give the same text as far as they go.
TEST(text_ends_at_the_end_token_unless_ignored) {
    static text stopped, went_on, shown;
    moe_generate_result result;
    int ended = 0;
    if (!open_model()) return;
    moe_session *session = open_session(1200);
    for (uint64_t seed = 1; seed <= 10; seed++) {
        sample(session, seed, 5, 1000, &stopped, 0, 0, &result);
        int32_t generated = result.n_generated;
        int end = result.reason == MOE_STOP_END;
        CHECK(end || result.reason == MOE_STOP_LIMIT);
        if (!end) continue;
        ended++;
        sample(session, seed, 5, 1000, &went_on, MOE_ON, 0, &result);
        CHECK(result.reason == MOE_STOP_LIMIT && result.n_generated == 1000);
        CHECK(result.n_generated > generated || generated == 1000);
        // Where it ended, half a character may have been cut off and replaced.
        size_t same = stopped.size > 3 ? stopped.size - 3 : 0;
        CHECK(went_on.size >= same && !memcmp(went_on.data, stopped.data, same));
        CHECK(find(&went_on, "<|end|>") == went_on.size);
        sample(session, seed, 5, 1000, &shown, MOE_ON, MOE_ON, &result);
        CHECKF(find(&shown, "<|end|>") < shown.size, "seed %d", (int)seed);
    }
    printf("  %d of 10 ended\n", ended);
    CHECK(ended >= 5);
    moe_session_close(session);
}

TEST(wrong_calls_are_refused) {
    static text t;
    moe_generate_result result;
    moe_error error;
    if (!open_model()) return;
    moe_session *session = open_session(50);
    moe_generate_options o = options(&t, 5);
    int32_t bad[3] = {1, n_vocab, 2};
    const char *none[2] = {"x", NULL}, *empty[1] = {""};
    memset(&error, 0, sizeof error);
    CHECK(moe_generate(NULL, prompt, 1, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_generate(session, NULL, 1, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_generate(session, prompt, 0, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_generate(session, prompt, -1, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_generate(session, bad, 3, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    CHECK(error.status == MOE_ERROR_ARGUMENT && *error.text && *error.where);
    o.stop = NULL;
    o.n_stop = 1;
    CHECK(moe_generate(session, prompt, 1, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    o.stop = none;
    o.n_stop = 2;
    CHECK(moe_generate(session, prompt, 1, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_length(session) == 0 && t.pieces == 0);
    o.stop = empty;
    o.n_stop = 1;
    CHECK(moe_generate(session, prompt, 1, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    char longest[514];
    const char *one[1] = {longest};
    memset(longest, 'x', 513);
    longest[513] = 0;
    o.stop = one;
    CHECK(moe_generate(session, prompt, 1, &o, &result, &error) == MOE_ERROR_ARGUMENT);
    longest[512] = 0;
    CHECK(moe_generate(session, prompt, 1, &o, &result, &error) == MOE_OK);
    // Everything that may be NULL.
    moe_session_rewind(session, 0, NULL);
    o = options(&t, 5);
    o.on_text = NULL;
    CHECK(moe_generate(session, prompt, 1, &o, NULL, NULL) == MOE_OK);
    moe_session_rewind(session, 0, NULL);
    CHECK(moe_generate(session, prompt, 1, NULL, NULL, NULL) == MOE_OK);
    moe_session_close(session);
}

// From a text: what moe_generate makes of its tokens, and BOS in front of the first one only.
TEST(a_text_generates_what_its_tokens_do) {
    static text expected, t;
    static const char *const turns[2] = {"Hello there", ", and again"};
    moe_generate_result result, from_text;
    memset(&result, 0, sizeof result);
    int32_t tokens[64];
    if (!open_model()) return;
    moe_session *a = open_session(100), *b = open_session(100);
    for (int turn = 0; turn < 2; turn++) {
        const int64_t n = moe_vocab_tokenize(the_vocab, turns[turn], strlen(turns[turn]),
                                             turn ? 0 : MOE_TOKENIZE_ADD_SPECIAL, tokens, 64);
        moe_generate_options o = options(&expected, 20);
        CHECK(n > 0 && moe_generate(a, tokens, (int32_t)n, &o, &result, NULL) == MOE_OK);
        o = options(&t, 20);
        memset(&from_text, 0xAA, sizeof from_text);
        CHECK(moe_generate_text(b, turns[turn], &o, &from_text, NULL) == MOE_OK);
        CHECK(t.size == expected.size && !memcmp(t.data, expected.data, t.size) && t.size > 0);
        CHECK(from_text.n_prompt == n && from_text.n_generated == 20);
        CHECK(from_text.reason == result.reason && from_text.next_token == result.next_token);
        CHECK(moe_session_length(a) == moe_session_length(b));
    }
    moe_session_close(a);
    moe_session_close(b);
}

TEST(wrong_calls_with_a_text_are_refused) {
    static text t;
    static char longer[1000];
    moe_generate_result result;
    moe_error error;
    if (!open_model()) return;
    moe_session *session = open_session(50);
    moe_generate_options o = options(&t, 5);
    memset(&error, 0, sizeof error);
    CHECK(moe_generate_text(NULL, "a", &o, &result, &error) == MOE_ERROR_ARGUMENT && *error.text);
    CHECK(result.reason == MOE_STOP_CALLER && result.next_token == -1);
    memset(&error, 0, sizeof error);
    CHECK(moe_generate_text(session, NULL, &o, NULL, &error) == MOE_ERROR_ARGUMENT && *error.text);
    memset(longer, '~', sizeof longer - 1);
    const int64_t n = moe_vocab_tokenize(the_vocab, longer, sizeof longer - 1,
                                         MOE_TOKENIZE_ADD_SPECIAL, NULL, 0);
    char needed[32];
    snprintf(needed, sizeof needed, "%lld tokens", (long long)n);
    memset(&result, 0xAA, sizeof result);
    CHECK(n > 50);
    CHECK(moe_generate_text(session, longer, &o, &result, &error) == MOE_ERROR_CONTEXT_FULL);
    CHECK(strstr(error.text, needed) != NULL && result.reason == MOE_STOP_CONTEXT);
    CHECK(result.n_prompt == 0 && result.n_generated == 0 && moe_session_length(session) == 0);
    CHECK(t.pieces == 0);
    CHECK(moe_generate_text(session, "a", NULL, NULL, &error) == MOE_OK);
    moe_session_close(session);
}

TEST(every_stop_reason_has_words_of_its_own) {
    for (int i = 0; i <= MOE_STOP_CONTEXT; i++)
        for (int k = 0; k <= i; k++)
            CHECK((k == i) == !strcmp(moe_stop_reason_text((moe_stop_reason)i),
                                      moe_stop_reason_text((moe_stop_reason)k)));
    CHECK(!strcmp(moe_stop_reason_text((moe_stop_reason)(MOE_STOP_CONTEXT + 1)), "?"));
}

// ---- memory ----------------------------------------------------------------------------------

TEST(generating_takes_no_memory_and_a_text_gives_it_back) {
    static text t;
    meter m;
    moe_model_options mo;
    moe_session_options so;
    moe_generate_result result;
    memset(&m, 0, sizeof m);
    memset(&mo, 0, sizeof mo);
    memset(&so, 0, sizeof so);
    mo.allocator = meter_allocator(&m);
    so.n_ctx = 300;
    moe_model *model = moe_model_open(models_simple("micro", "f32"), &mo, NULL);
    moe_session *session = moe_session_open(model, &so, NULL);
    CHECK(session != NULL);
    long calls = m.calls;
    const char *stops[1] = {"never to be seen"};
    moe_generate_options o = options(&t, 0);
    o.stop = stops;
    o.n_stop = 1;
    CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
    CHECKF(m.calls == calls, "%ld allocations", m.calls - calls);
    // From a text it takes the tokens and gives them back, but for the vocabulary's own memory.
    moe_error error;
    o.max_tokens = 1;
    moe_session_rewind(session, 0, NULL);
    CHECK(moe_generate_text(session, "Hello", &o, NULL, NULL) == MOE_OK);
    const size_t live = m.live;
    moe_session_rewind(session, 0, NULL);
    CHECK(moe_generate_text(session, "Hello", &o, NULL, NULL) == MOE_OK && m.live == live);
    moe_session_rewind(session, 0, NULL);
    m.fail_at = m.calls + 1;
    CHECK(moe_generate_text(session, "Hello", &o, &result, &error) == MOE_ERROR_MEMORY);
    CHECK(*error.text && result.reason == MOE_STOP_CALLER && m.live == live);
    m.fail_at = 0;
    moe_session_close(session);
    moe_model_close(model);
    CHECK(m.live == 0);
}

// A file may forbid tokens: they are not chosen, however likely they are.
TEST(suppressed_tokens_are_never_chosen) {
    static text out;
    static float before[4096], row[4096];
    const int32_t prompt[] = {1, 2, 3};
    moe_sampler_options draw;
    memset(&draw, 0, sizeof draw);
    draw.temperature = 2;
    if (!open_model() || n_vocab > 4096) return;
    moe_session *session = open_session(300);
    CHECK(moe_session_eval(session, prompt, 3, NULL) == MOE_OK);
    memcpy(before, moe_session_logits(session, -1), sizeof *before * (size_t)n_vocab);
    memcpy(row, before, sizeof row);
    int32_t forbidden[40];
    for (int i = 0; i < 40; i++) { // the likeliest
        forbidden[i] = argmax(row, n_vocab);
        row[forbidden[i]] = -INFINITY;
    }
    moe_vocab *vocab = (moe_vocab *)the_vocab;
    for (int sampled = 0; sampled < 2; sampled++) {
        moe_sampler *sampler = moe_sampler_open(&draw, n_vocab, moe_vocab_size(vocab), NULL);
        moe_generate_options o;
        moe_generate_result result;
        memset(&o, 0, sizeof o);
        memset(&out, 0, sizeof out);
        o.max_tokens = 1;
        o.ignore_end = MOE_ON;
        o.sampler = sampled ? sampler : NULL;
        vocab->suppressed = forbidden;
        vocab->n_suppressed = 40;
        for (int i = 0; i < 200; i++) {
            int32_t length = moe_session_length(session);
            CHECK(moe_generate(session, NULL, 0, &o, &result, NULL) == MOE_OK);
            if (i == 0) { // the row has them as impossible, and nothing else changed
                const float *now = moe_session_logits(session, -1);
                CHECK(!memcmp(now, row, sizeof *row * (size_t)n_vocab));
                if (!sampled) CHECK(result.next_token == argmax(row, n_vocab));
            }
            for (int k = 0; k < 40; k++) CHECK(result.next_token != forbidden[k]);
            CHECK(moe_session_length(session) == length);
            if (!sampled) break;
        }
        // Ids that the model has no logits of, and a list of none.
        int32_t beyond[] = {INT32_MAX, n_vocab};
        vocab->suppressed = beyond;
        vocab->n_suppressed = 2;
        CHECK(moe_generate(session, NULL, 0, &o, &result, NULL) == MOE_OK);
        vocab->suppressed = NULL;
        vocab->n_suppressed = 0;
        CHECK(moe_generate(session, NULL, 0, &o, &result, NULL) == MOE_OK);
        moe_sampler_close(sampler);
    }
    moe_session_rewind(session, 0, NULL);
    CHECK(moe_session_eval(session, prompt, 3, NULL) == MOE_OK);
    CHECK(!memcmp(before, moe_session_logits(session, -1), sizeof *before * (size_t)n_vocab));
    moe_session_close(session);
}

// The last test gives back what the others shared.
TEST(the_last_test_gives_back_the_shared_model) {
    moe_model_close(the_model);
    the_model = NULL;
}

MAIN()
