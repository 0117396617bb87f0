// Two continuations of one beginning, which is evaluated once.
//
//     cc -O2 examples/branch.c -o branch -lm -lpthread
//     ./branch examples/storyteller/storyteller.gguf "Once upon a time there was"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include <stdio.h>

enum { MAX_PROMPT = 1024, BRANCHES = 2, TOKENS = 60 };

static int print(void *user, const char *text, size_t size) {
    (void)user;
    return fwrite(text, 1, size, stdout) == size && fflush(stdout) == 0; // 0 would stop
}

// Goes on from what the session holds. Returns how many tokens were evaluated, or -1.
static int go_on(moe_session *session, uint64_t seed, moe_error *error) {
    const moe_model *model = moe_session_model(session);
    moe_sampler_options draw = {.temperature = 0.7f, .seed = seed};
    moe_sampler *sampler = moe_sampler_open(&draw, moe_model_get_info(model)->n_vocab,
                                            moe_vocab_size(moe_model_vocab(model)), error);
    if (!sampler) return -1;
    moe_generate_options options = {.max_tokens = TOKENS, .sampler = sampler, .on_text = print};
    const int32_t before = moe_session_length(session);
    moe_status status = moe_generate(session, NULL, 0, &options, NULL, error);
    moe_sampler_close(sampler);
    return status == MOE_OK ? moe_session_length(session) - before : -1;
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "examples/storyteller/storyteller.gguf";
    const char *prompt = argc > 2 ? argv[2] : "Once upon a time there was";
    moe_session *trunk = NULL, *branch = NULL;
    int32_t tokens[MAX_PROMPT];
    int64_t n = 0;

    moe_error error = {0};
    moe_model *model = moe_model_open(path, NULL, &error);
    moe_pool *pool = model ? moe_pool_open(NULL, &error) : NULL;
    moe_session_options options = {.pool = pool}; // the sessions take turns: one set of threads
    if (pool) trunk = moe_session_open(model, &options, &error);
    if (trunk) branch = moe_session_open(model, &options, &error);
    if (branch) {
        n = moe_vocab_tokenize(moe_model_vocab(model), prompt, strlen(prompt),
                               MOE_TOKENIZE_ADD_SPECIAL, tokens, MAX_PROMPT);
        if (n < 1 || n > MAX_PROMPT) {
            fprintf(stderr, "no vocabulary, or no prompt of 1 to %d tokens\n", MAX_PROMPT);
            error.status = MOE_ERROR_ARGUMENT;
        } else {
            moe_session_eval(trunk, tokens, (int32_t)n, &error);
        }
    }
    int evaluated = (int)n;
    for (int i = 0; i < BRANCHES && branch && !error.status; i++) {
        if (moe_session_copy(branch, trunk, &error)) break; // what it held is forgotten
        printf("%s%d. %s", i ? "\n\n" : "", i + 1, prompt);
        const int more = go_on(branch, (uint64_t)i, &error);
        if (more > 0) evaluated += more;
    }
    if (branch && !error.status)
        fprintf(stderr, "\n\n%d tokens evaluated, the %d of the beginning once\n", evaluated,
                (int)n);
    if (*error.text) fprintf(stderr, "%s (%s)\n", error.text, error.where);
    moe_session_close(branch);
    moe_session_close(trunk);
    moe_pool_close(pool);
    moe_model_close(model);
    return error.status != MOE_OK || ferror(stdout);
}
