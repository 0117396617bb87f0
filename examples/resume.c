// Goes on in the next run where this one stopped, token by token as if it had not stopped.
//
//     cc -O2 examples/resume.c -o resume -lm -lpthread
//     ./resume story.state 40 examples/storyteller/storyteller.gguf "Once upon a time there was"
//     ./resume story.state 40          the next 40 tokens; and so on until the story ends
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include <stdio.h>

static int print(void *user, const char *text, size_t size) {
    (void)user;
    return fwrite(text, 1, size, stdout) == size && fflush(stdout) == 0; // 0 would stop
}

// The session and the sampler are what they were, or begin with the prompt.
static moe_status begin(moe_session *session, moe_sampler *sampler, const char *saved,
                        const char *prompt, const moe_generate_options *options,
                        moe_generate_result *result, moe_error *error) {
    moe_status status = moe_session_load_with(session, sampler, saved, error);
    if (status == MOE_OK) return moe_generate(session, NULL, 0, options, result, error);
    if (status != MOE_ERROR_IO) return status; // of another model, or damaged
    memset(error, 0, sizeof *error);
    printf("%s", prompt);
    return moe_generate_text(session, prompt, options, result, error);
}

// A token that was chosen last is shown, but not evaluated yet.
static moe_status end(moe_session *session, moe_sampler *sampler, const char *saved,
                      const moe_generate_result *result, moe_error *error) {
    if (result->reason != MOE_STOP_LIMIT) {
        fprintf(stderr, "\n%s: the next run begins anew\n", moe_stop_reason_text(result->reason));
        remove(saved);
        return MOE_OK;
    }
    moe_status status = moe_session_eval(session, &result->next_token, 1, error);
    if (status) return status;
    moe_sampler_accept(sampler, result->next_token);
    status = moe_session_save_with(session, sampler, saved, error);
    if (!status)
        fprintf(stderr, "\n%d tokens are in %s\n", (int)moe_session_length(session), saved);
    return status;
}

int main(int argc, char **argv) {
    const char *saved = argc > 1 ? argv[1] : "story.state";
    const int n = argc > 2 ? atoi(argv[2]) : 40;
    const char *path = argc > 3 ? argv[3] : "examples/storyteller/storyteller.gguf";
    const char *prompt = argc > 4 ? argv[4] : "Once upon a time there was";
    moe_sampler *sampler = NULL;

    moe_error error = {0};
    moe_model *model = moe_model_open(path, NULL, &error);
    moe_session *session = model ? moe_session_open(model, NULL, &error) : NULL;
    if (session) {
        const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
        const int32_t n_words = moe_vocab_size(moe_model_vocab(model));
        moe_sampler_options draw = {.temperature = 0.5f, .repeat_penalty = 1.05f, .seed = 14};
        sampler = moe_sampler_open(&draw, n_vocab, n_words ? n_words : n_vocab, &error);
    }
    if (sampler) {
        moe_generate_options options = {
            .max_tokens = n > 0 ? n : 1, .sampler = sampler, .on_text = print};
        moe_generate_result result;
        if (!begin(session, sampler, saved, prompt, &options, &result, &error))
            end(session, sampler, saved, &result, &error);
    }
    if (error.status) fprintf(stderr, "%s (%s)\n", error.text, error.where);
    moe_sampler_close(sampler);
    moe_session_close(session);
    moe_model_close(model);
    return error.status != MOE_OK || ferror(stdout);
}
