// How likely each generated token was, and which others were nearly chosen: a classifier asks for
// one token and compares the log-probabilities of its answers.
//
//     cc -O2 examples/tokens.c -o tokens -lm -lpthread
//     ./tokens examples/storyteller/storyteller.gguf "Once upon a time there was a" 5
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include <stdio.h>

enum { MAX_PROMPT = 1024, ALTERNATIVES = 4, TOKENS = 10 };

// In quotes; what is no printable ASCII as \xHH. Control tokens have a name instead of a text.
static void print_token(const moe_vocab *vocab, int32_t token) {
    char text[64];
    size_t n = moe_vocab_text(vocab, token, text, sizeof text);
    moe_string shown = {text, n < sizeof text ? n : sizeof text};
    if (moe_vocab_is_control(vocab, token)) shown = moe_vocab_token(vocab, token);
    putchar('"');
    for (size_t i = 0; i < shown.size; i++) {
        const unsigned char c = (unsigned char)shown.data[i];
        printf(c < ' ' || c > '~' || c == '"' || c == '\\' ? "\\x%02X" : "%c", c);
    }
    putchar('"');
}

// A line per token: itself, then the likeliest ones, the likeliest first.
static void print_line(const moe_vocab *vocab, const moe_generated *step) {
    printf("%8.4f ", (double)step->logprob);
    print_token(vocab, step->token);
    for (int32_t i = 0; i < step->n_likeliest; i++) {
        printf("%s%.4f ", i ? ", " : "\t| ", (double)step->likeliest[i].logprob);
        print_token(vocab, step->likeliest[i].token);
    }
    puts(step->end_token < 0 ? "" : "\t(the end)");
}

static void generate(moe_session *session, int32_t max_tokens, moe_error *error) {
    moe_generator_options options = {.max_tokens = max_tokens, .n_logprobs = ALTERNATIVES};
    moe_generator *generator = moe_generator_open(session, &options, error);
    moe_generated step = {.reason = MOE_STOP_NONE};
    double sum = 0;
    if (!generator) return;
    do {
        if (moe_generator_next(generator, &step, error) != MOE_OK) break;
        if (step.token < 0) break; // only a reason
        print_line(moe_model_vocab(moe_session_model(session)), &step);
        sum += (double)step.logprob;
    } while (step.reason == MOE_STOP_NONE);
    moe_generator_close(generator);
    if (error->status) return;
    printf("%8.4f together; %s\n", sum, moe_stop_reason_text(step.reason));
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "examples/storyteller/storyteller.gguf";
    const char *prompt = argc > 2 ? argv[2] : "Once upon a time there was a";
    const int n_tokens = argc > 3 ? atoi(argv[3]) : TOKENS;
    int32_t tokens[MAX_PROMPT];
    moe_error error = {0};
    moe_model *model = moe_model_open(path, NULL, &error);
    moe_session *session = model ? moe_session_open(model, NULL, &error) : NULL;
    if (session) {
        const int64_t n = moe_vocab_tokenize(moe_model_vocab(model), prompt, strlen(prompt),
                                             MOE_TOKENIZE_ADD_SPECIAL, tokens, MAX_PROMPT);
        if (n < 1 || n > MAX_PROMPT) {
            fprintf(stderr, "no vocabulary, or no prompt of 1 to %d tokens\n", MAX_PROMPT);
            error.status = MOE_ERROR_ARGUMENT;
        } else if (moe_session_eval(session, tokens, (int32_t)n, &error) == MOE_OK) {
            generate(session, n_tokens, &error);
        }
    }
    if (*error.text) fprintf(stderr, "%s (%s)\n", error.text, error.where);
    moe_session_close(session);
    moe_model_close(model);
    return error.status != MOE_OK || ferror(stdout);
}
