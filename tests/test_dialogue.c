// Dialogues of many turns as moe-cli has them: a turn costs its new tokens, also where layers recur
// and where a template leaves out earlier thoughts. And what --perplexity says, beside the
// definition computed from logits: the library's, and reference results where those are at hand.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "models.h"

#include "../examples/tool.h"

#include "../examples/measure.h"
#include "../examples/talk.h"
#include <fcntl.h>
#include <math.h>
#include <unistd.h>

#define GOLDEN "../shared/golden/logits/"
static const char *const story = "examples/storyteller/storyteller.gguf";
static const char *const marks =
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}";

// A program in the folder of this one, or from there; 0 if it is not built.
static int beside(const char *name, char *path, size_t capacity) {
    const ssize_t n = readlink("/proc/self/exe", path, capacity - strlen(name) - 2);
    if (n <= 0) return 0;
    path[n] = 0;
    char *slash = strrchr(path, '/');
    if (!slash) return 0;
    strcpy(slash + 1, name);
    return access(path, X_OK) == 0;
}

// ---- turns -----------------------------------------------------------------------------------

static volatile sig_atomic_t interrupted;

// Tokens that a session has evaluated since it was opened: each chose its experts once in the last
// layer, which is one with experts.
static uint64_t evaluated(const moe_session *session) {
    const moe_model_info *info = moe_model_get_info(moe_session_model(session));
    const uint64_t *counts = moe_session_expert_counts(session, info->n_layer - 1);
    uint64_t sum = 0;
    for (int32_t i = 0; counts && i < info->n_expert; i++) sum += counts[i];
    return sum / (uint64_t)info->n_expert_used;
}

typedef struct dialogue {
    moe_model *model;
    moe_session *session;
    moe_sampler *sampler;
    talk_options options;
    talk t;
} dialogue;

static int open_dialogue(dialogue *d, const char *path, const char *chat_template,
                         int32_t n_predict) {
    moe_error error;
    moe_session_options so;
    moe_sampler_options sampling;
    memset(d, 0, sizeof *d);
    memset(&so, 0, sizeof so);
    memset(&sampling, 0, sizeof sampling);
    so.n_ctx = 2048;
    so.n_threads = 1;
    d->model = models_open(path);
    d->session = d->model ? moe_session_open(d->model, &so, &error) : NULL;
    if (!d->session) return 0;
    const moe_vocab *vocab = moe_model_vocab(d->model);
    const int32_t n = moe_model_get_info(d->model)->n_vocab;
    d->sampler = moe_sampler_open(&sampling, n, moe_vocab_size(vocab), &error);
    // Random weights would end soon, or say what is no text.
    for (int32_t i = 0; i < moe_vocab_size(vocab) && chat_template; i++) {
        char text[64];
        const size_t size = moe_vocab_text(vocab, i, text, sizeof text);
        int is_plain = size > 0 && size <= sizeof text && !moe_vocab_is_control(vocab, i);
        for (size_t k = 0; k < size && is_plain; k++) is_plain = text[k] >= ' ' && text[k] <= '~';
        if (!is_plain) moe_sampler_bias(d->sampler, i, -INFINITY, &error);
    }
    d->options.program = "test";
    d->options.model = path;
    d->options.template_text = chat_template;
    d->options.n_predict = n_predict;
    d->options.interrupted = &interrupted;
    d->t.o = &d->options;
    d->t.vocab = vocab;
    d->t.session = d->session;
    d->t.sampler = d->sampler;
    d->t.last = '\n';
    return d->sampler != NULL;
}
static void close_dialogue(dialogue *d) {
    talk_close(&d->t);
    moe_sampler_close(d->sampler);
    moe_session_close(d->session);
    moe_model_close(d->model);
}

// What the answer says is not wanted here, nor what is said about it.
static moe_status quiet_answer(talk *t, moe_error *error) {
    fflush(stdout);
    const int out = dup(STDOUT_FILENO), err = dup(STDERR_FILENO);
    const int null = open("/dev/null", O_WRONLY);
    dup2(null, STDOUT_FILENO);
    dup2(null, STDERR_FILENO);
    const moe_status status = talk_answer(t, error);
    fflush(stdout);
    dup2(out, STDOUT_FILENO);
    dup2(err, STDERR_FILENO);
    close(out);
    close(err);
    close(null);
    return status;
}

// Asks one question more, or the last one again. *evaluations: what that cost; *common: with how
// many tokens of before the context begins; returns how many it holds, -1 after a failure.
static int32_t ask(dialogue *d, const char *question, uint64_t *evaluations, int32_t *common) {
    moe_error error;
    const int32_t before = moe_session_length(d->session);
    int32_t *held = (int32_t *)malloc(((size_t)before + 1) * sizeof *held);
    if (!held) exit(1);
    memcpy(held, moe_session_tokens(d->session), (size_t)before * sizeof *held);
    const uint64_t start = evaluated(d->session);
    if (question && !talk_add_turn(&d->t, question, strlen(question))) exit(1);
    memset(&error, 0, sizeof error);
    const moe_status status = quiet_answer(&d->t, &error);
    CHECKF(!status, "%s: %s", error.where, error.text);
    *evaluations = evaluated(d->session) - start;
    const int32_t *tokens = moe_session_tokens(d->session), n = moe_session_length(d->session);
    for (*common = 0; *common < before && *common < n && tokens[*common] == held[*common];)
        ++*common;
    free(held);
    return status ? -1 : n;
}

static void ten_turns(const char *path, const char *chat_template, const char *question) {
    dialogue d;
    int32_t before = 0, common;
    if (!open_dialogue(&d, path, chat_template, 12)) {
        CHECKF(0, "cannot open %s", path);
        return;
    }
    for (int i = 0; i < 10; i++) {
        uint64_t n;
        char text[64];
        snprintf(text, sizeof text, "%s %d", question, i);
        const int32_t after = ask(&d, text, &n, &common);
        if (after < 0) break;
        CHECKF(common == before, "%s, turn %d: %d of %d tokens stay", path, i, common, before);
        CHECKF(n == (uint64_t)(after - before), "%s, turn %d: %d tokens evaluated, %d are new",
               path, i, (int)n, after - before);
        CHECK(after > before + 12); // the question, the marks, the answer
        before = after;
    }
    CHECK(before > 150);
    // Another last answer: of the question one token is evaluated again, for its logits.
    uint64_t n;
    talk_rewind(&d.t);
    talk_turn_unanswer(talk_last(&d.t));
    ask(&d, NULL, &n, &common);
    CHECKF(n <= 12 || d.session->n_replayed, "%d tokens for an answer again", (int)n);
    close_dialogue(&d);
}

TEST(ten_turns) {
    static const char *const families[] = {"qwen3moe_tiny", "dsv2_tiny", "gptoss_tiny",
                                           "qwen35moe_tiny", "lfm2moe_tiny", "jamba_tiny"};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        ten_turns(models_simple(families[i], "f32"), marks, "question");
}
TEST(ten_turns_of_a_storyteller) {
    // Its answers begin with a blank, and it is an SPM vocabulary or not: the text is what counts.
    ten_turns(story, "{% for m in messages %}{{ m.content }}{% endfor %}", "Once upon a time");
    ten_turns(story, marks, "Once upon a time there was");
}

// A template that drops earlier thoughts: from the first dropped one on all is evaluated again, and
// nothing before it.
TEST(dropped_thoughts) {
    char command[512];
    const char *path = models_path("actor.gguf");
    dialogue d;
    int32_t common, before = 0;
    uint64_t n;
    if (!beside("actor", command, sizeof command - 300)) SKIP("tests/actor is not built");
    snprintf(command + strlen(command), 300, " %s", path);
    if (system(command)) SKIP("tests/actor does not run");
    if (!open_dialogue(&d, path, NULL, 40)) SKIP("no memory");
    for (int i = 0; i < 10; i++) {
        const int thinks = i % 3 == 0, thought = i && (i - 1) % 3 == 0;
        const int32_t after = ask(&d, thinks ? "well!" : "well", &n, &common);
        if (after < 0) break;
        CHECKF(n == (uint64_t)(after - common), "turn %d: %d evaluated, %d differ", i, (int)n,
               after - common);
        // <think>Let me see.</think> and the rest of that answer, 5 tokens
        CHECKF(common == before - (thought ? 5 : 0), "turn %d: %d of %d stay", i, common, before);
        CHECK(talk_last(&d.t)->reasoning.size == (thinks ? strlen("Let me see.") : 0));
        before = after;
    }
    close_dialogue(&d);
}

// The context is full: old turns go, and the dialogue goes on.
TEST(forgotten_turns) {
    dialogue d;
    int32_t common, n = 0;
    uint64_t cost;
    if (!open_dialogue(&d, models_simple("qwen3moe_tiny", "f32"), marks, 100)) SKIP("no memory");
    for (int i = 0; i < 40 && n >= 0; i++) {
        n = ask(&d, "a question that takes some room in the context", &cost, &common);
        CHECK(n <= 2048);
    }
    CHECK(d.t.n_turns < 40 && d.t.n_turns > 4);
    close_dialogue(&d);
}

// ---- perplexity ------------------------------------------------------------------------------

typedef struct estimate {
    long double sum, squares;
    int count;
} estimate;

// -ln softmax(row)[token].
static long double loss_of(const float *row, int32_t n, int32_t token) {
    long double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += expl((long double)row[i] - (long double)row[token]);
    return logl(sum);
}
static void count_chunk(estimate *e, const float *logits, size_t width, int32_t n_words,
                        const int32_t *tokens, int n_ctx) {
    for (int i = n_ctx / 2; i + 1 < n_ctx; i++) {
        const long double loss = loss_of(logits + (size_t)i * width, n_words, tokens[i + 1]);
        e->sum += loss, e->squares += loss * loss, e->count++;
    }
}

TEST(reference_logits) {
    static const char *const names[] = {"qwen3moe", "qwen2moe", "mixtral", "olmoe",
                                        "gptoss",   "dsv2",     "dsv3"};
    int n_tokens;
    int32_t *tokens = models_read_tokens(GOLDEN "tokens512.txt", &n_tokens);
    if (!tokens) SKIP("no reference results in " GOLDEN);
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        char path[160];
        size_t n_floats = 0;
        moe_error error;
        snprintf(path, sizeof path, GOLDEN "%s.logits.f32", names[k]);
        float *logits = models_read_floats(path, &n_floats);
        snprintf(path, sizeof path, GOLDEN "%s.gguf", names[k]);
        moe_model *model = logits ? models_open(path) : NULL;
        CHECKF(model && n_floats == (size_t)n_tokens * 512, "%s", path);
        for (int n_ctx = 96; n_ctx >= 24 && model; n_ctx /= 2) {
            moe_session_options o;
            estimate e = {0, 0, 0};
            perplexity p = {0, 0, 0};
            memset(&o, 0, sizeof o);
            o.n_ctx = n_ctx, o.n_batch = 40, o.keep_all_logits = MOE_ON;
            o.kv_type = MOE_KV_F32; // rounding may choose other experts: weights are random
            moe_session *session = moe_session_open(model, &o, &error);
            if (!session) continue;
            count_chunk(&e, logits, 512, 512, tokens, n_ctx);
            CHECK(!perplexity_chunk(&p, session, tokens, n_ctx, -1, 512, &error));
            const double wanted = (double)expl(e.sum / e.count), is = perplexity_value(&p);
            CHECK(p.count == e.count);
            CHECKF(fabs(is / wanted - 1) < 1e-3, "%s, chunks of %d: %.6f instead of %.6f",
                   names[k], n_ctx, is, wanted);
            moe_session_close(session);
        }
        moe_model_close(model);
        free(logits);
    }
    free(tokens);
}

// What the program prints, from a program of its own.
static int run_cli(char *out, size_t capacity, const char *arguments) {
    char command[1024];
    if (!beside("../moe-cli", command, sizeof command - 600)) return 0;
    snprintf(command + strlen(command), 600, " %s 2>/dev/null", arguments);
    FILE *f = popen(command, "r");
    if (!f) return 0;
    out[fread(out, 1, capacity - 1, f)] = 0;
    return pclose(f) == 0;
}

TEST(program) {
    enum { N_CTX = 64, CHUNKS = 4, MOST = 5000 };
    const char *path = models_path("text.txt");
    static char text[6000], out[4096], wanted[4096];
    static int32_t tokens[MOST];
    char arguments[512];
    estimate e = {0, 0, 0};
    FILE *in = fopen("examples/storyteller/held_out.txt", "rb"), *f = fopen(path, "wb");
    moe_model *model = models_open(story);
    const size_t size = in ? fread(text, 1, 5000, in) : 0;
    if (!model || !f || !size) SKIP("no storyteller");
    fclose(in);
    fwrite(text, 1, size, f);
    fclose(f);
    snprintf(arguments, sizeof arguments, "-m %s --perplexity -f %s -c %d --chunks %d -t 1", story,
             path, N_CTX, CHUNKS);
    if (!run_cli(out, sizeof out, arguments)) SKIP("build/moe-cli is not built, or fails");
    const moe_vocab *vocab = moe_model_vocab(model);
    const size_t end = text[size - 1] == '\n' ? size - 1 : size;
    const int64_t n = moe_vocab_tokenize(vocab, text, end, MOE_TOKENIZE_ADD_SPECIAL, tokens, MOST);
    CHECK(n >= N_CTX * CHUNKS && n <= MOST);
    const int has_bos = n > 0 && tokens[0] == moe_vocab_bos(vocab);
    const size_t width = (size_t)moe_model_get_info(model)->n_vocab;
    *wanted = 0;
    for (int k = 0; k < CHUNKS; k++) {
        int32_t chunk[N_CTX];
        moe_session_options o;
        memset(&o, 0, sizeof o);
        memcpy(chunk, tokens + k * N_CTX, sizeof chunk);
        if (has_bos) chunk[0] = moe_vocab_bos(vocab);
        float *logits = models_run(model, &o, chunk, N_CTX, 1); // token by token
        if (!logits) break;
        count_chunk(&e, logits, width, moe_vocab_size(vocab), chunk, N_CTX);
        free(logits);
        snprintf(wanted + strlen(wanted), 64, "[%d]%.4f,", k + 1, (double)expl(e.sum / e.count));
    }
    const long double mean = e.sum / e.count;
    const double value = (double)expl(mean);
    const double spread =
        (double)sqrtl((e.squares / e.count - mean * mean) / (e.count - 1)) * value;
    snprintf(wanted + strlen(wanted), 100, "\nFinal estimate: PPL = %.4f +/- %.5f\n", value,
             spread);
    double is = 0, is_spread = 0;
    const char *final = strstr(out, "Final estimate: PPL = ");
    CHECKF(final && sscanf(final, "Final estimate: PPL = %lf +/- %lf\n", &is, &is_spread) == 2,
           "%s", out);
    CHECKF(fabs(is / value - 1) < 1e-3 && fabs(is_spread / spread - 1) < 1e-2, "is %s, wanted %s",
           out, wanted);
    // The same characters but for the digits.
    for (size_t i = 0; i < strlen(out) || i < strlen(wanted); i++) {
        const int digits = out[i] >= '0' && out[i] <= '9' && wanted[i] >= '0' && wanted[i] <= '9';
        CHECK(digits || out[i] == wanted[i]);
        if (!digits && out[i] != wanted[i]) break;
    }
    moe_model_close(model);
}

MAIN()
