// moe_generate on small random models: their text is nonsense and full of broken UTF-8, which is
// just what is needed here. What it must be is computed apart, from logits and token texts.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"
#include "models.h"
#include <float.h>

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

// ---- the generator ---------------------------------------------------------------------------

static uint64_t chance = 88172645463325252u;
static uint32_t random_below(uint32_t n) {
    chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
    return (uint32_t)(chance >> 32) % n;
}

enum { MANY = 200 };

// What must come: tokens drawn by hand, and their bytes.
typedef struct course {
    moe_sampler_options draw;
    moe_sampler *sampler; // as it is before the first draw, with its biases
    int special;
    int32_t tokens[MANY];
    size_t ends[MANY + 1]; // bytes of the first i tokens
    char bytes[MAX_TEXT];
} course;

// The text of the first n tokens. The longest prefix of what is left that begins some character
// becomes one U+FFFD.
typedef struct spelling {
    char text[3 * MAX_TEXT];
    size_t size;
    size_t ends[MAX_TEXT]; // of the character that a byte belongs to
} spelling;

static size_t broken_length(const unsigned char *p, size_t n) {
    for (size_t length = n < 3 ? n : 3; length > 1; length--)
        for (int c = 0x80; c < 0xC0; c++) { // does any character begin so?
            unsigned char whole[4] = {0x80, 0x80, 0x80, 0x80};
            memcpy(whole, p, length);
            for (size_t rest = length; rest < 4; rest++) whole[rest] = (unsigned char)c;
            if (utf8_length(whole, 4) > length) return length;
        }
    return 1;
}

static void spell(const course *c, int n, spelling *s) {
    const size_t n_bytes = c->ends[n];
    s->size = 0;
    for (size_t i = 0, length; i < n_bytes; i += length) {
        const unsigned char *p = (const unsigned char *)c->bytes + i;
        length = utf8_length(p, n_bytes - i);
        if (length) memcpy(s->text + s->size, p, length), s->size += length;
        else memcpy(s->text + s->size, "\xEF\xBF\xBD", 3), s->size += 3;
        if (!length) length = broken_length(p, n_bytes - i);
        for (size_t k = 0; k < length; k++) s->ends[i + k] = s->size;
    }
}

// How many of the first n tokens lie in the text's first `size` bytes to their last byte, up to
// the first that does not.
static int handed_out(const course *c, const spelling *s, int n, size_t size) {
    for (int i = 0; i < n; i++)
        if (c->ends[i + 1] > c->ends[i] && s->ends[c->ends[i + 1] - 1] > size) return i;
    return n;
}

static int count_down(void *user) {
    int *n = (int *)user;
    return *n >= 0 && (*n)-- == 0;
}
static moe_session *open_session_of(const moe_model *model, int n_ctx, int *countdown) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = n_ctx;
    o.n_threads = 1;
    o.should_stop = countdown ? count_down : NULL;
    o.should_stop_user = countdown;
    moe_session *session = moe_session_open(model, &o, NULL);
    CHECK(session != NULL);
    return session;
}

// A sampler that often chooses tokens with parts of characters.
static moe_sampler *course_sampler(const moe_model *model, const moe_sampler_options *draw,
                                   float bias) {
    const moe_vocab *vocab = moe_model_vocab(model);
    const int32_t n = moe_model_get_info(model)->n_vocab;
    moe_sampler *sampler = moe_sampler_open(draw, n, moe_vocab_size(vocab), NULL);
    int n_biases = 0;
    for (int32_t id = 0; id < moe_vocab_size(vocab) && n_biases < MOE_MAX_BIASES; id++) {
        char bytes[64];
        const size_t size = moe_vocab_text(vocab, id, bytes, sizeof bytes);
        if (size == 0 || size > sizeof bytes || is_utf8(bytes, size)) continue;
        CHECK(moe_sampler_bias(sampler, id, bias, NULL) == MOE_OK);
        n_biases++;
    }
    CHECK(n_biases > 100);
    return sampler;
}

static void course_make(course *c, const moe_model *model, uint64_t seed, float bias) {
    const moe_vocab *vocab = moe_model_vocab(model);
    memset(&c->draw, 0, sizeof c->draw);
    c->draw.temperature = 1, c->draw.seed = seed, c->draw.repeat_penalty = 1.3f;
    c->draw.repeat_last_n = 1 + (int)(seed % 40);
    c->draw.top_k = seed % 3 == 1 ? 50 : 0;
    c->draw.top_p = seed % 4 == 2 ? 0.95f : 0;
    c->sampler = course_sampler(model, &c->draw, bias);
    c->special = seed % 2 ? MOE_ON : 0;
    c->ends[0] = 0;
    moe_sampler *sampler = moe_sampler_copy(c->sampler, NULL);
    moe_session *session = open_session_of(model, N_PROMPT + MANY, NULL);
    CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
    for (int i = 0; i < N_PROMPT; i++) moe_sampler_accept(sampler, prompt[i]);
    for (int i = 0; i < MANY; i++) {
        const int32_t token = moe_sampler_sample(sampler, moe_session_logits(session, -1));
        char *at = c->bytes + c->ends[i];
        size_t size = moe_vocab_text(vocab, token, at, MAX_TEXT - c->ends[i]);
        if (c->special && moe_vocab_is_control(vocab, token)) {
            const moe_string name = moe_vocab_token(vocab, token);
            memcpy(at, name.data, size = name.size);
        }
        c->tokens[i] = token;
        c->ends[i + 1] = c->ends[i] + size;
        CHECK(c->ends[i + 1] < MAX_TEXT / 2);
        CHECK(moe_session_eval(session, &token, 1, NULL) == MOE_OK);
        moe_sampler_accept(sampler, token);
    }
    moe_session_close(session);
    moe_sampler_close(sampler);
}

// A generator on its way, and all that belongs to it.
typedef struct way {
    const moe_model *model;
    const course *course;
    moe_session *session;
    moe_sampler *sampler;
    moe_generator *generator;
    moe_generator_options options;
    int n, counted; // tokens chosen, and since the last limit
    int countdown;  // should_stop's; -1: never
    int ended;      // the last one chosen was an end token, which is not counted
    text got;
    int n_cancelled, n_full, n_limits, n_moved;
} way;

static void way_begin(way *w, const moe_model *model, const course *c, int n_ctx) {
    memset(w, 0, sizeof *w);
    w->model = model;
    w->course = c;
    w->countdown = -1;
    w->session = open_session_of(model, n_ctx, &w->countdown);
    w->sampler = moe_sampler_copy(c->sampler, NULL);
    w->options.sampler = w->sampler;
    w->options.special = c->special;
    w->options.ignore_end = MOE_ON;
    CHECK(moe_session_eval(w->session, prompt, N_PROMPT, NULL) == MOE_OK);
}
static void way_open(way *w, const moe_generator *from) {
    moe_error error;
    w->options.from = from;
    w->counted = 0;
    w->generator = moe_generator_open(w->session, &w->options, &error);
    CHECKF(w->generator, "%s", error.text);
}
static void way_end(way *w) {
    moe_generator_close(w->generator);
    moe_session_close(w->session);
    moe_sampler_close(w->sampler);
}

// What the session holds in the end: prompt and tokens, the last one too.
static int way_tokens(const way *w, int32_t *ids) {
    memcpy(ids, prompt, sizeof prompt);
    memcpy(ids + N_PROMPT, w->course->tokens, sizeof *ids * (size_t)w->n);
    return N_PROMPT + w->n;
}

// Another session, of so many tokens more, made by copying or by evaluating everything; another
// sampler, another generator.
static void way_move(way *w, int more) {
    int32_t ids[N_PROMPT + MANY];
    const int32_t n_ctx = moe_session_get_info(w->session)->n_ctx + more;
    moe_session *session = open_session_of(w->model, n_ctx, &w->countdown);
    moe_sampler *sampler = moe_sampler_copy(w->sampler, NULL);
    moe_generator *before = w->generator;
    int n = way_tokens(w, ids);
    if (random_below(2) == 0) CHECK(moe_session_copy(session, w->session, NULL) == MOE_OK);
    else CHECK(moe_session_sync(session, ids, n - (w->n > 0 && !w->ended), NULL, NULL) == MOE_OK);
    moe_session_close(w->session);
    moe_sampler_close(w->sampler);
    w->session = session;
    w->options.sampler = w->sampler = sampler;
    w->options.max_tokens = random_below(2) ? 0 : 1 + (int)random_below(30);
    way_open(w, before);
    moe_generator_close(before);
    w->n_moved++;
}

// What a caller may do between two calls without changing what comes.
static void way_meddle(way *w, int how) {
    int32_t ids[N_PROMPT + MANY], last;
    int n = way_tokens(w, ids);
    const int32_t n_ctx = moe_session_get_info(w->session)->n_ctx;
    const int room = n_ctx - moe_session_length(w->session);
    const char *path = models_path("generate.state");
    if (w->n == 0) return;
    last = ids[n - 1];
    switch (how) {
    case 0: w->countdown = (int)random_below(8); break;
    case 1: // evaluates what was chosen himself
        if (room && moe_session_length(w->session) < n)
            CHECK(moe_session_eval(w->session, &last, 1, NULL) == MOE_OK);
        break;
    case 2: // rewinds and comes back, without or with it
        CHECK(moe_session_rewind(w->session, (int32_t)random_below((uint32_t)n), NULL) == MOE_OK);
        CHECK(moe_session_sync(w->session, ids, n - 1, NULL, NULL) == MOE_OK);
        break;
    case 3:
        CHECK(moe_session_rewind(w->session, (int32_t)random_below((uint32_t)n), NULL) == MOE_OK);
        if (n <= n_ctx) CHECK(moe_session_sync(w->session, ids, n, NULL, NULL) == MOE_OK);
        else CHECK(moe_session_sync(w->session, ids, n - 1, NULL, NULL) == MOE_OK);
        break;
    case 4: way_move(w, (int)random_below(3)); break;
    case 5:
        for (int i = 0; i < 3; i++) moe_sampler_accept(w->sampler, (int32_t)random_below(200));
        break;
    case 6: // evaluates more, and forgets it together with the logits
        if (n + 1 > n_ctx) break;
        CHECK(moe_session_sync(w->session, ids, n, NULL, NULL) == MOE_OK);
        CHECK(moe_session_eval(w->session, prompt, 1, NULL) == MOE_OK);
        CHECK(moe_session_rewind(w->session, n, NULL) == MOE_OK);
        CHECK(moe_session_logits(w->session, -1) == NULL);
        break;
    case 7:
        CHECK(moe_session_save_with(w->session, w->sampler, path, NULL) == MOE_OK);
        CHECK(moe_session_rewind(w->session, 0, NULL) == MOE_OK);
        moe_sampler_reset(w->sampler);
        CHECK(moe_session_load_with(w->session, w->sampler, path, NULL) == MOE_OK);
        break;
    case 8: moe_sampler_sync(w->sampler, NULL, 0); break;
    default: break;
    }
}

// One call, and everything that must be true behind it.
static moe_generated way_next(way *w) {
    static spelling s;
    const course *c = w->course;
    moe_generated out;
    moe_error error;
    memset(&out, 0xAA, sizeof out);
    const moe_status status = moe_generator_next(w->generator, &out, &error);
    CHECKF(status == MOE_OK, "%s", error.text);
    if (status) { // nothing goes on from here
        out.reason = MOE_STOP_END;
        return out;
    }
    w->ended = out.end_token >= 0;
    CHECK(out.token >= 0 ? out.pending == out.token : out.size == 0 || w->n_moved > 0);
    if (out.token >= 0 && out.end_token < 0) {
        CHECKF(w->n < MANY && out.token == c->tokens[w->n], "token %d", w->n);
        w->n++, w->counted++;
    }
    text_add(&w->got, out.text, out.size);
    CHECK(is_utf8(out.text, out.size) && is_utf8(out.rest, out.rest_size));
    spell(c, w->n, &s);
    const size_t size = w->got.size;
    CHECKF(size <= s.size && !memcmp(s.text, w->got.data, size), "after %d tokens", w->n);
    CHECKF(out.rest_size == s.size - size && !memcmp(out.rest, s.text + size, out.rest_size),
           "after %d tokens %d bytes, not %d", w->n, (int)out.rest_size, (int)(s.size - size));
    // All that was chosen is in the context, but for the last one.
    int32_t ids[N_PROMPT + MANY];
    const int32_t n = way_tokens(w, ids) - (w->n > 0 && out.end_token < 0);
    CHECKF(moe_session_length(w->session) == n || (out.token < 0 && n == N_PROMPT + w->n - 1),
           "%d in the context, not %d", (int)moe_session_length(w->session), (int)n);
    CHECK(!memcmp(moe_session_tokens(w->session), ids, sizeof *ids * (size_t)n));
    if (w->n > 0 && out.end_token < 0) CHECK(out.pending == c->tokens[w->n - 1]);
    int32_t length = N_PROMPT + handed_out(c, &s, w->n, size);
    if (length > moe_session_length(w->session)) length = moe_session_length(w->session);
    CHECKF(out.length == length, "after %d tokens: length %d, not %d", w->n, (int)out.length,
           (int)length);
    return out;
}

// Goes on from whatever a call said; 0 at the end.
static int way_goes_on(way *w, const moe_generated *out) {
    const int32_t n_ctx = moe_session_get_info(w->session)->n_ctx;
    switch (out->reason) {
    case MOE_STOP_CALLER:
        CHECK(out->token < 0);
        w->n_cancelled++;
        return 1;
    case MOE_STOP_LIMIT:
        CHECK(w->counted == w->options.max_tokens);
        w->n_limits++;
        w->counted = 0;
        return 1;
    case MOE_STOP_CONTEXT:
        CHECK(moe_session_length(w->session) == n_ctx);
        w->n_full++;
        if (random_below(2)) { // nothing changes as long as it is full
            w->countdown = -1;
            const moe_generated again = way_next(w);
            CHECK(again.reason == MOE_STOP_CONTEXT && again.token < 0 && again.size == 0);
        }
        way_move(w, 1 + (int)random_below(60));
        return 1;
    case MOE_STOP_NONE: return 1;
    default: return 0;
    }
}

// Up to n tokens, or until it stops; meddling: how often something happens between two calls.
static moe_generated way_run(way *w, int n, int meddling) {
    moe_generated out;
    memset(&out, 0, sizeof out);
    while (w->n < n) {
        if (meddling && random_below((uint32_t)meddling) == 0)
            way_meddle(w, (int)random_below(10));
        out = way_next(w);
        w->countdown = -1;
        if (!way_goes_on(w, &out)) break;
    }
    return out;
}

// Small models with vocabularies of their own, then those of ../shared/vocab, which a model of
// token ids is given.
static moe_model *vocabulary(int i, const char **name) {
    static const char *const own[] = {"micro", "qwen3moe_tiny", "t_qwen_odd"};
    static const char *const files[] = {"deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe",
                                        "llama-spm", "phi-3", "qwen2"};
    char path[256];
    if (i < 3) return models_open(models_simple(*name = own[i], "f32"));
    if (i >= 10) return NULL;
    *name = files[i - 3];
    snprintf(path, sizeof path, "../shared/vocab/ggml-vocab-%s.gguf", *name);
    moe_gguf *gguf = moe_gguf_open(path, NULL, NULL);
    if (!gguf) return NULL;
    moe_vocab *vocab = moe_vocab_open(gguf, NULL);
    synth_options o;
    memset(&o, 0, sizeof o);
    o.type = "f16", o.no_tokenizer = 1, o.vocab = vocab ? moe_vocab_size(vocab) : 300;
    const char *file = models_path("vocabulary.gguf");
    CHECK(vocab && synth_write("micro", file, &o) == 0);
    moe_model *model = models_open(file);
    moe_gguf_close(gguf);
    if (model) model->vocab = vocab; // closed with it
    return model;
}

// The same bytes and draws as by hand, in one go and with everything that may happen between two
// calls; each call tells the truth.
TEST(generators_give_the_same_however_they_are_interrupted) {
    static course c;
    static way w;
    const char *name;
    moe_model *model;
    for (int v = 0; (model = vocabulary(v, &name)) != NULL; v++) {
        static spelling s;
        int done[4] = {0}, parts = 0;
        const int rounds = v >= 3 || MODELS_SLOW ? 1 : 6;
        for (int round = 0; round < rounds; round++) {
            course_make(&c, model, (uint64_t)(round + 7 * v), v < 3 ? 0.5f : 6);
            way_begin(&w, model, &c, N_PROMPT + MANY);
            way_open(&w, NULL);
            way_run(&w, MANY, 0);
            spell(&c, MANY, &s);
            for (int i = 1; i < MANY; i++) // tokens that end within a character
                parts += s.ends[c.ends[i]] == s.ends[c.ends[i] - 1] && c.ends[i] > c.ends[i - 1];
            way_end(&w);
            way_begin(&w, model, &c, N_PROMPT + 3 + (int)random_below(80));
            w.options.max_tokens = round % 2 ? 0 : 1 + (int)random_below(40);
            way_open(&w, NULL);
            way_run(&w, MANY, 1 + round % 3);
            CHECK(w.n == MANY);
            done[0] += w.n_cancelled, done[1] += w.n_full, done[2] += w.n_limits;
            done[3] += w.n_moved;
            way_end(&w);
            moe_sampler_close(c.sampler);
        }
        printf("  %s: %d parts of characters; %d times cancelled, %d full, %d limits, %d moved\n",
               name, parts, done[0], done[1], done[2], done[3]);
        CHECK(parts > 5 * rounds && done[3] > 0 && (v >= 3 || (done[0] > 0 && done[1] > 0)));
        moe_model_close(model);
    }
}

// Where `stop` first stands in a text; its size if it does not.
static size_t find_in(const char *data, size_t size, const char *stop, size_t n) {
    for (size_t i = 0; i + n <= size; i++)
        if (!memcmp(data + i, stop, n)) return i;
    return size;
}

// Cut out of what will come, anywhere. Returns 0 if that is no string of whole characters.
static int random_stop(const spelling *s, char *stop, size_t *n) {
    const size_t at = random_below((uint32_t)s->size);
    *n = 1 + random_below(random_below(2) ? 4 : 60);
    if (at + *n > s->size) return 0;
    memcpy(stop, s->text + at, *n);
    stop[*n] = 0;
    return is_utf8(stop, *n) && strlen(stop) == *n;
}

TEST(generators_end_at_stop_strings_however_they_are_interrupted) {
    static course c;
    static way w;
    static spelling s, before;
    const char *name;
    moe_model *model;
    for (int v = 0; (model = vocabulary(v, &name)) != NULL; v++) {
        int tried = 0;
        course_make(&c, model, (uint64_t)(3 + v), v < 3 ? 0.5f : 6);
        spell(&c, MANY, &s);
        const int wanted = v >= 3 || MODELS_SLOW ? 2 : 20;
        while (tried < wanted) {
            char stop[64];
            const char *const stops[] = {"never to be seen", stop, "nor this"};
            size_t n;
            if (!random_stop(&s, stop, &n)) continue;
            const size_t first = find_in(s.text, s.size, stop, n);
            way_begin(&w, model, &c, N_PROMPT + 3 + (int)random_below(80));
            w.options.stop = stops, w.options.n_stop = 3;
            way_open(&w, NULL);
            moe_generated out = way_run(&w, MANY, random_below(2) ? 2 : 0);
            if (out.reason != MOE_STOP_STRING) { // half a character at the end is not certain
                CHECK(w.n == MANY && first + n + 3 >= s.size);
                way_end(&w);
                continue;
            }
            tried++;
            CHECKF(w.got.size == first, "%s: \"%s\": %d bytes, not %d", name, stop,
                   (int)w.got.size, (int)first);
            CHECK(out.rest_size >= n && !memcmp(out.rest, stop, n));
            // The last token was needed, and it is not evaluated.
            CHECK(moe_session_length(w.session) == N_PROMPT + w.n - 1);
            spell(&c, w.n - 1, &before);
            const size_t at = find_in(before.text, before.size, stop, n);
            CHECK(at == before.size || at + n + 3 > before.size);
            // It stays so.
            for (int i = 0; i < 2; i++) {
                const moe_generated again = way_next(&w);
                CHECK(again.reason == MOE_STOP_STRING && again.token < 0 && again.size == 0);
                CHECK(again.pending == out.pending && again.length == out.length);
            }
            // Without that stop string it goes on with what was held back.
            w.options.n_stop = 1;
            moe_generator *stopped = w.generator;
            way_open(&w, stopped);
            moe_generator_close(stopped);
            w.n_moved++;
            way_run(&w, MANY, 3);
            CHECK(w.n == MANY);
            way_end(&w);
        }
        moe_sampler_close(c.sampler);
        moe_model_close(model);
    }
}

TEST(generators_end_at_stop_tokens_and_go_on_from_there) {
    static course c;
    static way w;
    static spelling s;
    if (!open_model()) return;
    for (int round = 0; round < 40; round++) {
        course_make(&c, the_model, (uint64_t)round, 0.5f);
        const int at = (int)random_below(MANY);
        int32_t stops[2] = {0, c.tokens[at]}, lost[2] = {0, c.tokens[at]};
        int first = 0;
        while (c.tokens[first] != stops[0] && c.tokens[first] != stops[1]) first++;
        way_begin(&w, the_model, &c, N_PROMPT + 20);
        w.options.stop_tokens = lost, w.options.n_stop_tokens = 2;
        way_open(&w, NULL);
        lost[0] = lost[1] = -1; // they were copied
        w.options.stop_tokens = stops;
        moe_generated out = way_run(&w, MANY, 3);
        CHECK(out.reason == MOE_STOP_END && w.n == first);
        CHECK(out.end_token == c.tokens[first] && out.token == out.end_token);
        CHECK(out.pending == out.end_token && out.rest_size == 0);
        CHECK(out.length == N_PROMPT + first && moe_session_length(w.session) == out.length);
        spell(&c, first, &s);
        CHECK(w.got.size == s.size && !memcmp(w.got.data, s.text, s.size));
        moe_generated again = way_next(&w);
        CHECK(again.reason == MOE_STOP_END && again.token < 0 && again.size == 0);
        CHECK(again.end_token == out.end_token && again.length == out.length);
        // Behind it: the end token is evaluated.
        moe_generator *ended = w.generator;
        w.options.n_stop_tokens = 0;
        if (moe_session_get_info(w.session)->n_ctx < N_PROMPT + first + 2) way_move(&w, 3);
        else way_open(&w, ended), moe_generator_close(ended);
        if (first + 1 < MANY) {
            CHECK(moe_generator_next(w.generator, &out, NULL) == MOE_OK);
            CHECK(out.token == c.tokens[first + 1]);
            CHECK(moe_session_tokens(w.session)[N_PROMPT + first] == c.tokens[first]);
        }
        way_end(&w);
        moe_sampler_close(c.sampler);
    }
}

// Every end-of-generation token of the file ends, unless ignored.
TEST(every_end_token_of_the_file_ends) {
    const char *name;
    moe_model *model;
    for (int v = 0; (model = vocabulary(v, &name)) != NULL; v++) {
        const moe_vocab *vocab = moe_model_vocab(model);
        const int32_t n = moe_model_get_info(model)->n_vocab;
        int ends = 0;
        moe_session *session = open_session_of(model, 20, NULL);
        CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
        for (int32_t id = 0; id < moe_vocab_size(vocab); id++) {
            moe_generator_options o;
            moe_generated out;
            if (!moe_vocab_is_end(vocab, id)) continue;
            moe_sampler *sampler = moe_sampler_open(NULL, n, n, NULL);
            memset(&o, 0, sizeof o);
            o.sampler = sampler;
            CHECK(moe_sampler_bias(sampler, id, 1e6f, NULL) == MOE_OK);
            for (int ignored = 0; ignored < 2; ignored++) {
                o.ignore_end = ignored ? MOE_ON : 0;
                moe_generator *g = moe_generator_open(session, &o, NULL);
                CHECK(moe_generator_next(g, &out, NULL) == MOE_OK && out.token == id);
                CHECK(out.reason == (ignored ? MOE_STOP_NONE : MOE_STOP_END));
                CHECK(out.end_token == (ignored ? -1 : id));
                moe_generator_close(g);
            }
            moe_sampler_close(sampler);
            ends++;
        }
        CHECKF(ends > 0, "%s", name);
        moe_session_close(session);
        moe_model_close(model);
    }
}

// By the definition, in double: logarithm of the sum of exp(logit).
static double plain_sum(const float *logits, int n) {
    double max = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        if ((double)logits[i] > max) max = (double)logits[i];
    for (int i = 0; i < n; i++)
        if (logits[i] > -INFINITY) sum += exp((double)logits[i] - max);
    return max + log(sum);
}
static int same_logprob(float got, double wanted) {
    const double off = fabs((double)got - wanted);
    return off <= 1e-7 * fabs(wanted) + 1e-9 || (double)got == wanted;
}

static void check_logprobs(const moe_generated *out, const float *logits, int n, int wanted) {
    static char seen[300000];
    int finite = 0;
    for (int i = 0; i < n; i++) finite += logits[i] > -INFINITY;
    memset(seen, 0, sizeof seen);
    const double sum = plain_sum(logits, n), chosen = (double)logits[out->token] - sum;
    CHECKF(same_logprob(out->logprob, chosen), "%.9g, not %.9g", (double)out->logprob, chosen);
    CHECK(out->n_likeliest == (wanted < finite ? wanted : finite));
    for (int i = 0; i < out->n_likeliest; i++) {
        int32_t best = -1; // the likeliest that was not there yet, of equals the lowest
        for (int32_t id = 0; id < n; id++)
            if (!seen[id] && logits[id] > -INFINITY && (best < 0 || logits[id] > logits[best]))
                best = id;
        if (best < 0) break;
        CHECKF(out->likeliest[i].token == best, "%d: %d, not %d", i,
               (int)out->likeliest[i].token, (int)best);
        CHECK(same_logprob(out->likeliest[i].logprob, (double)logits[best] - sum));
        seen[best] = 1;
    }
}

TEST(log_probabilities_are_those_of_a_plain_softmax) {
    static float row[300000];
    static const int counts[] = {-1, 0, 1, 2, 20, MOE_MAX_LOGPROBS};
    const char *name;
    moe_model *model;
    for (int v = 0; (model = vocabulary(v, &name)) != NULL; v++) {
        const int n = moe_model_get_info(model)->n_vocab;
        moe_session *session = open_session_of(model, 64, NULL);
        moe_sampler_options draw;
        memset(&draw, 0, sizeof draw);
        draw.temperature = 3, draw.top_k = 100, draw.repeat_penalty = 2;
        moe_sampler *sampler = moe_sampler_open(&draw, n, n, NULL);
        CHECK(moe_sampler_bias(sampler, 7, 2, NULL) == MOE_OK); // neither of it has a part in them
        for (int i = 0; i < 6; i++) {
            moe_generator_options o;
            moe_generated out;
            memset(&o, 0, sizeof o);
            o.sampler = i % 2 ? sampler : NULL, o.n_logprobs = counts[i], o.ignore_end = MOE_ON;
            moe_generator *g = moe_generator_open(session, &o, NULL);
            CHECK(moe_session_sync(session, prompt, N_PROMPT, NULL, NULL) == MOE_OK);
            for (int k = 0; k < (v < 3 ? 10 : 3); k++) {
                if (k > 0) { // so that the row is there before the choice
                    CHECK(moe_session_eval(session, &out.pending, 1, NULL) == MOE_OK);
                    for (int z = 0; z < n && k > 1; z += 1 + (int)random_below(9)) {
                        const float odd[] = {NAN, -INFINITY, 1.5f, 3, -1e30f, -87, 0.5f, 4};
                        session->logits[z] = odd[random_below(k == 2 ? 3 : 8)];
                    }
                }
                memcpy(row, moe_session_logits(session, -1), sizeof *row * (size_t)n);
                CHECK(moe_generator_next(g, &out, NULL) == MOE_OK && out.token >= 0);
                if (counts[i]) check_logprobs(&out, row, n, counts[i] < 0 ? 0 : counts[i]);
                else CHECK(out.logprob != out.logprob && out.n_likeliest == 0);
            }
            moe_generator_close(g);
        }
        moe_sampler_close(sampler);
        moe_session_close(session);
        moe_model_close(model);
    }
}

// Infinity counts as the largest float; what is far below has a finite log-probability.
TEST(log_probabilities_of_odd_rows) {
    moe_generated out;
    moe_generator_options o;
    if (!open_model()) return;
    memset(&o, 0, sizeof o);
    o.n_logprobs = 5, o.ignore_end = MOE_ON;
    moe_session *session = open_session(50);
    for (int turn = 0; turn < 4; turn++) {
        moe_generator *g = moe_generator_open(session, &o, NULL);
        CHECK(moe_session_sync(session, prompt, N_PROMPT, NULL, NULL) == MOE_OK);
        for (int i = 0; i < n_vocab; i++) session->logits[i] = turn == 2 ? 0 : -INFINITY;
        if (turn == 0) session->logits[9] = INFINITY, session->logits[11] = 1;
        if (turn == 1) session->logits[9] = 3e38f, session->logits[11] = 2e38f;
        if (turn == 3) session->logits[9] = -3e38f;
        CHECK(moe_generator_next(g, &out, NULL) == MOE_OK);
        if (turn == 2) {
            CHECK(out.token == 0 && same_logprob(out.logprob, -log(n_vocab)));
            for (int i = 0; i < 5; i++) CHECK(out.likeliest[i].token == i);
        } else {
            CHECK(out.token == 9 && out.logprob == 0);
            CHECK(out.n_likeliest == (turn == 3 ? 1 : 2) && out.likeliest[0].token == 9);
            if (turn < 3) CHECK(out.likeliest[1].token == 11 && out.likeliest[1].logprob < -9e37f);
            if (turn < 3) CHECK(out.likeliest[1].logprob >= -FLT_MAX);
        }
        moe_generator_close(g);
    }
    moe_session_close(session);
}

// A rewind in between: the token that was chosen goes behind what is left, and the penalty counts
// what is there.
TEST(after_a_rewind_a_sampler_counts_what_is_still_there) {
    moe_sampler_options draw;
    moe_generator_options o;
    moe_generated out;
    if (!open_model()) return;
    memset(&draw, 0, sizeof draw);
    memset(&o, 0, sizeof o);
    draw.temperature = 0.7f, draw.repeat_penalty = 3, draw.repeat_last_n = 30;
    o.ignore_end = MOE_ON;
    for (int round = 0; round < 20; round++) {
        draw.seed = (uint64_t)round;
        moe_sampler *sampler = moe_sampler_open(&draw, n_vocab, n_vocab, NULL);
        moe_session *session = open_session(100), *other = open_session(100);
        o.sampler = sampler;
        moe_generator *g = moe_generator_open(session, &o, NULL);
        CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
        for (int i = 0; i < 20; i++) CHECK(moe_generator_next(g, &out, NULL) == MOE_OK);
        const int32_t kept = (int32_t)random_below(20), pending = out.pending;
        CHECK(moe_session_rewind(session, kept, NULL) == MOE_OK);
        // by hand, with random numbers where they are
        moe_sampler *by_hand = moe_sampler_copy(sampler, NULL);
        int32_t ids[100];
        memcpy(ids, moe_session_tokens(session), sizeof *ids * (size_t)kept);
        ids[kept] = pending;
        moe_sampler_sync(by_hand, ids, kept + 1);
        CHECK(moe_session_sync(other, ids, kept + 1, NULL, NULL) == MOE_OK);
        for (int i = 0; i < 10; i++) {
            const int32_t token = moe_sampler_sample(by_hand, moe_session_logits(other, -1));
            CHECK(moe_generator_next(g, &out, NULL) == MOE_OK);
            CHECKF(out.token == token, "%d: %d, not %d", i, (int)out.token, (int)token);
            CHECK(moe_session_eval(other, &token, 1, NULL) == MOE_OK);
            moe_sampler_accept(by_hand, token);
        }
        CHECK(sampler->n_recent == (kept + 10 < 30 ? kept + 10 : 30));
        // moe_generate, which shares the code, too
        moe_generate_options go;
        moe_generate_result result;
        memset(&go, 0, sizeof go);
        go.max_tokens = 1, go.sampler = sampler, go.ignore_end = MOE_ON;
        CHECK(moe_session_sync(session, prompt, 2, NULL, NULL) == MOE_OK);
        CHECK(moe_generate(session, NULL, 0, &go, &result, NULL) == MOE_OK);
        CHECK(sampler->n_recent == 2 && sampler->n_altered == 2);
        moe_sampler_close(by_hand);
        moe_generator_close(g);
        moe_session_close(session);
        moe_session_close(other);
        moe_sampler_close(sampler);
    }
}

// moe_generate tells how it ended as the generator does, also after a callback has stopped it.
TEST(generate_tells_the_end_token_the_length_and_the_rest) {
    static course c;
    static spelling s;
    static text t;
    moe_generate_result result;
    int strings = 0, ends = 0, stopped = 0;
    if (!open_model()) return;
    for (int round = 0; round < 300; round++) {
        char stop[64];
        const char *const stops[1] = {stop};
        size_t n = 0;
        if (round % 50 == 0) {
            if (round) moe_sampler_close(c.sampler);
            course_make(&c, the_model, (uint64_t)(round + 1), 0.5f);
        }
        spell(&c, MANY, &s);
        moe_generate_options o = options(&t, MANY);
        moe_session *session = open_session(N_PROMPT + MANY);
        moe_sampler *sampler = moe_sampler_copy(c.sampler, NULL);
        const int32_t end = c.tokens[random_below(MANY)];
        o.sampler = sampler, o.special = c.special;
        if (round % 3 == 0 && random_stop(&s, stop, &n)) o.stop = stops, o.n_stop = 1;
        if (round % 3 == 1) o.stop_tokens = &end, o.n_stop_tokens = 1;
        if (round % 3 == 2) t.stop_after = 1 + (int)random_below(40);
        CHECK(moe_generate(session, prompt, N_PROMPT, &o, &result, NULL) == MOE_OK);
        const int chosen = result.n_generated;
        spell(&c, chosen, &s);
        CHECK(t.size <= s.size && !memcmp(t.data, s.text, t.size));
        const int out = handed_out(&c, &s, chosen, t.size);
        size_t left = 0;
        for (size_t i = 0; i < c.ends[chosen]; i++) left += s.ends[i] > t.size;
        CHECKF(result.rest_size == left, "%d bytes, not %d", (int)result.rest_size, (int)left);
        const int32_t held = moe_session_length(session);
        CHECK(result.length == (N_PROMPT + out < held ? N_PROMPT + out : held));
        CHECK(moe_session_rewind(session, result.length, NULL) == MOE_OK);
        strings += result.reason == MOE_STOP_STRING;
        ends += result.reason == MOE_STOP_END;
        stopped += result.reason == MOE_STOP_CALLER;
        CHECK(result.end_token == (result.reason == MOE_STOP_END ? end : -1));
        if (result.reason == MOE_STOP_END) CHECK(result.next_token == end && left == 0);
        moe_session_close(session);
        moe_sampler_close(sampler);
    }
    moe_sampler_close(c.sampler);
    CHECKF(strings > 20 && ends == 100 && stopped == 100, "%d %d %d", strings, ends, stopped);
}

// One token of many bytes, all of them broken, with a stop string in the middle: nothing is lost of
// it, neither when it stops nor when it goes on.
TEST(long_tokens_are_kept_whole) {
    static char longest[30000], wanted[3 * 8192];
    static const char *const stops[] = {"STOP"};
    static uint32_t ends[4096];
    static text t;
    moe_generated out;
    moe_generate_result result;
    if (!open_model()) return;
    moe_vocab *vocab = (moe_vocab *)the_vocab;
    const moe_vocab kept = *vocab;
    const int32_t id = 70;
    moe_sampler *sampler = moe_sampler_open(NULL, n_vocab, n_vocab, NULL);
    CHECK(moe_sampler_bias(sampler, id, 1e6f, NULL) == MOE_OK); // nothing else is chosen
    for (uint32_t size = 1000; size < 30000; size = size * 2 + 77) {
        const size_t at = size < 8192 ? size / 2 : 8000, cut = size < 8192 ? size : 8192;
        memset(longest, 0xFF, sizeof longest);
        memcpy(longest + at, "STOP", 4);
        for (int32_t i = 0; i <= n_vocab; i++) ends[i] = i > id ? size : 0;
        vocab->symbols.bytes = longest, vocab->symbols.end = ends;
        vocab->longest = size, vocab->raw = 1;
        for (size_t i = 0; i < at; i++) memcpy(wanted + 3 * i, "\xEF\xBF\xBD", 3);
        memcpy(wanted + 3 * at, "STOP", 4);
        for (size_t i = at + 4; i < cut; i++)
            memcpy(wanted + 3 * at + 4 + 3 * (i - at - 4), "\xEF\xBF\xBD", 3);
        const size_t whole = 3 * (cut - 4) + 4;
        moe_session *session = open_session(40);
        CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
        moe_generator_options o;
        memset(&o, 0, sizeof o);
        o.sampler = sampler, o.ignore_end = MOE_ON;
        moe_generator *g = NULL;
        for (int i = 0; i < 6; i++) { // with and without the stop string
            moe_generator *before = g;
            o.from = before, o.stop = stops, o.n_stop = i % 2 == 0;
            g = moe_generator_open(session, &o, NULL);
            moe_generator_close(before);
            CHECK(moe_generator_next(g, &out, NULL) == MOE_OK);
            if (o.n_stop) {
                CHECK(out.reason == MOE_STOP_STRING && out.size == 3 * at);
                CHECK(!memcmp(out.text, wanted, 3 * at) && out.rest_size == whole - 3 * at);
                CHECK(!memcmp(out.rest, wanted + 3 * at, out.rest_size));
            } else { // the rest, and the token once more
                CHECK(out.reason == MOE_STOP_NONE && out.size == 2 * whole - 3 * at);
                CHECK(!memcmp(out.text, wanted + 3 * at, whole - 3 * at));
                CHECK(!memcmp(out.text + whole - 3 * at, wanted, whole) && out.rest_size == 0);
            }
        }
        moe_generator_close(g);
        // In one go, stopped by the string and by the callback in the middle of the token.
        moe_generate_options go = options(&t, 3);
        go.sampler = sampler, go.stop = stops, go.n_stop = 1;
        CHECK(moe_generate(session, NULL, 0, &go, &result, NULL) == MOE_OK);
        CHECK(result.reason == MOE_STOP_STRING && t.size == 3 * at);
        CHECK(result.rest_size == cut - at && result.n_generated == 1);
        go = options(&t, 3);
        go.sampler = sampler, t.stop_after = 1;
        CHECK(moe_generate(session, NULL, 0, &go, &result, NULL) == MOE_OK);
        CHECK(result.reason == MOE_STOP_CALLER && t.pieces == 1 && t.size < whole);
        size_t left = 0;
        for (size_t i = 0; i < cut; i++)
            left += i >= at && i < at + 4 ? 3 * at + i - at >= t.size
                    : (i < at ? 3 * i : 3 * i - 8) >= t.size;
        CHECKF(result.rest_size == left, "%d, not %d", (int)result.rest_size, (int)left);
        moe_session_close(session);
    }
    *vocab = kept;
    moe_sampler_close(sampler);
}

static moe_generator *refused(moe_session *session, const moe_generator_options *o,
                              const char *where) {
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_generator *g = moe_generator_open(session, o, &error);
    CHECKF(!g && error.status == MOE_ERROR_ARGUMENT && !strcmp(error.where, where) && *error.text,
           "%s in %s: %s", moe_status_name(error.status), error.where, error.text);
    CHECK(!moe_generator_open(session, o, NULL));
    return g;
}

TEST(wrong_generators_are_refused) {
    static const char *const none[] = {"x", NULL}, *const broken[] = {"\xC3"};
    moe_generator_options o;
    moe_generated out;
    moe_error error;
    if (!open_model()) return;
    const int32_t beyond[] = {1, n_vocab}, negative[] = {-1};
    memset(&o, 0, sizeof o);
    moe_session *session = open_session(20);
    refused(NULL, &o, "session");
    o.n_stop = 1;
    refused(session, &o, "stop");
    o.stop = none, o.n_stop = 2;
    refused(session, &o, "stop");
    o.stop = broken, o.n_stop = 1;
    refused(session, &o, "stop");
    o.n_stop = 0, o.n_stop_tokens = 1;
    refused(session, &o, "stop_tokens");
    o.stop_tokens = beyond, o.n_stop_tokens = 2;
    refused(session, &o, "stop_tokens");
    o.stop_tokens = negative, o.n_stop_tokens = 1;
    refused(session, &o, "stop_tokens");
    o.n_stop_tokens = 0, o.n_logprobs = MOE_MAX_LOGPROBS + 1;
    refused(session, &o, "n_logprobs");
    o.n_logprobs = -2;
    refused(session, &o, "n_logprobs");
    o.n_logprobs = 0;
    moe_sampler *sampler = moe_sampler_open(NULL, n_vocab + 1, n_vocab, NULL);
    o.sampler = sampler;
    refused(session, &o, "sampler");
    moe_sampler_close(sampler);
    o.sampler = NULL;
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_session *other = open_session_of(model, 20, NULL);
    o.from = moe_generator_open(other, NULL, NULL);
    CHECK(o.from != NULL);
    refused(session, &o, "from");
    moe_generator_close((moe_generator *)o.from);
    moe_session_close(other);
    moe_model_close(model);
    // what next refuses
    moe_generator *g = moe_generator_open(session, NULL, &error);
    CHECK(g != NULL);
    memset(&out, 0xAA, sizeof out);
    CHECK(moe_generator_next(NULL, &out, &error) == MOE_ERROR_ARGUMENT && *error.text);
    CHECK(out.token == -1 && out.reason == MOE_STOP_CALLER && out.size == 0);
    CHECK(moe_generator_next(g, NULL, &error) == MOE_ERROR_ARGUMENT && *error.text);
    CHECK(moe_generator_next(g, &out, &error) == MOE_ERROR_ARGUMENT); // the session is empty
    CHECK(!strcmp(error.where, "session") && moe_generator_next(g, &out, NULL));
    CHECK(out.token == -1 && out.reason == MOE_STOP_CALLER && out.pending == -1);
    // and goes on when that was put right
    CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
    const int32_t best = argmax(moe_session_logits(session, -1), n_vocab);
    CHECK(moe_generator_next(g, &out, &error) == MOE_OK && out.token == best);
    moe_generator_close(g);
    moe_generator_close(NULL);
    moe_session_close(session);
}

// Errors in the middle lose nothing.
TEST(generators_go_on_after_an_error) {
    moe_sampler_options draw;
    moe_generator_options o;
    moe_generated out;
    moe_error error;
    if (!open_model()) return;
    memset(&draw, 0, sizeof draw);
    memset(&o, 0, sizeof o);
    draw.temperature = 1, draw.seed = 5;
    moe_session *session = open_session(60);
    moe_sampler *sampler = moe_sampler_open(&draw, n_vocab, n_vocab, NULL);
    o.sampler = sampler, o.ignore_end = MOE_ON;
    CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
    moe_generator *g = moe_generator_open(session, &o, NULL);
    for (int i = 0; i < 30; i++) {
        CHECK(moe_generator_next(g, &out, NULL) == MOE_OK && out.token >= 0);
        CHECK(moe_session_eval(session, &out.pending, 1, NULL) == MOE_OK);
        moe_sampler *twin = moe_sampler_copy(sampler, NULL);
        float row[4096];
        memcpy(row, moe_session_logits(session, -1), sizeof *row * (size_t)n_vocab);
        if (i % 2) { // nothing is a number
            for (int v = 0; v < n_vocab; v++) session->logits[v] = v % 2 ? NAN : -INFINITY;
            CHECK(moe_generator_next(g, &out, &error) == MOE_ERROR_FORMAT);
            CHECK(strstr(error.text, "no logit") != NULL);
            memcpy(session->logits, row, sizeof *row * (size_t)n_vocab);
        } else { // everything is forbidden
            for (int v = 0; v < n_vocab; v++)
                CHECK(moe_sampler_bias(sampler, v, -INFINITY, NULL) == MOE_OK);
            CHECK(moe_generator_next(g, &out, &error) == MOE_ERROR_ARGUMENT);
            CHECK(strstr(error.text, "forbid") && !strcmp(error.where, "sampler"));
            for (int v = 0; v < n_vocab; v++)
                CHECK(moe_sampler_bias(sampler, v, 0, NULL) == MOE_OK);
        }
        CHECK(out.token == -1 && out.pending == -1 && out.reason == MOE_STOP_CALLER);
        const int32_t token = moe_sampler_sample(twin, row);
        CHECK(moe_generator_next(g, &out, NULL) == MOE_OK && out.token == token);
        moe_sampler_close(twin);
        if (moe_session_length(session) > 50) // a shorter context, which it goes on behind
            CHECK(moe_session_sync(session, prompt, 3, NULL, NULL) == MOE_OK);
    }
    moe_generator_close(g);
    moe_sampler_close(sampler);
    moe_session_close(session);
}

// A full context goes on when there is room: the window slides, the text does not notice.
TEST(a_full_context_goes_on_with_a_shorter_one) {
    static text t;
    static char bytes[MAX_TEXT];
    moe_generator_options o;
    moe_generated out;
    size_t n_bytes = 0;
    int full = 0;
    if (!open_model()) return;
    memset(&o, 0, sizeof o);
    memset(&t, 0, sizeof t);
    o.ignore_end = MOE_ON;
    moe_session *session = open_session(16);
    CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
    moe_generator *g = moe_generator_open(session, &o, NULL);
    for (int i = 0; i < 100; i++) {
        CHECK(moe_generator_next(g, &out, NULL) == MOE_OK);
        CHECK(out.token >= 0);
        n_bytes += moe_vocab_text(the_vocab, out.token, bytes + n_bytes, MAX_TEXT - n_bytes);
        text_add(&t, out.text, out.size);
        if (out.reason != MOE_STOP_CONTEXT) continue;
        full++;
        int32_t ids[16];
        memcpy(ids, moe_session_tokens(session), sizeof ids);
        memmove(ids + 2, ids + 9, 7 * sizeof *ids); // the first two and the last seven
        CHECK(moe_session_sync(session, ids, 9, NULL, NULL) == MOE_OK);
    }
    text_add(&t, out.rest, out.rest_size);
    CHECK(full > 10 && same_text(&t, bytes, n_bytes));
    moe_generator_close(g);
    moe_session_close(session);
}

TEST(generators_take_their_memory_when_they_are_opened) {
    static const char *const stops[] = {"one", "another", "a third"};
    static const int32_t ends[] = {1, 2, 3};
    meter m;
    moe_generator_options o;
    moe_generated out;
    moe_error error;
    if (!open_model()) return;
    memset(&m, 0, sizeof m);
    memset(&o, 0, sizeof o);
    o.allocator = meter_allocator(&m);
    o.stop = stops, o.n_stop = 3, o.stop_tokens = ends, o.n_stop_tokens = 3, o.n_logprobs = 10;
    o.ignore_end = MOE_ON;
    moe_session *session = open_session(60);
    CHECK(moe_session_eval(session, prompt, N_PROMPT, NULL) == MOE_OK);
    int failed = 0;
    for (long fail = 1;; fail++) {
        m.calls = 0, m.fail_at = fail;
        clear_error(&error);
        moe_generator *g = moe_generator_open(session, &o, &error);
        if (!g) {
            CHECK(error.status == MOE_ERROR_MEMORY && *error.text && m.live == 0);
            failed++;
            continue;
        }
        m.fail_at = m.calls + 1;
        for (int i = 0; i < 20; i++) CHECK(moe_generator_next(g, &out, NULL) == MOE_OK);
        CHECK(m.calls < m.fail_at);
        m.fail_at = 0;
        moe_generator_options next = o;
        next.from = g;
        moe_generator *second = moe_generator_open(session, &next, NULL);
        moe_generator_close(g);
        CHECK(moe_generator_next(second, &out, NULL) == MOE_OK);
        moe_generator_close(second);
        break;
    }
    CHECK(failed > 0 && m.live == 0);
    moe_session_close(session);
}

// The last test gives back what the others shared.
TEST(the_last_test_gives_back_the_shared_model) {
    moe_model_close(the_model);
    the_model = NULL;
}

MAIN()
