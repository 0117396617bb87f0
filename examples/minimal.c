// cc -O2 examples/minimal.c -o minimal -lm -lpthread && ./minimal MODEL.gguf "Once upon a time"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include <stdio.h>
#include <string.h>

static int print(void *user, const char *text, size_t size) {
    (void)user;
    return fwrite(text, 1, size, stdout) == size && fflush(stdout) == 0; // 0 would stop
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "model.gguf";
    const char *prompt = argc > 2 ? argv[2] : "Once upon a time";
    static int32_t tokens[4097]; // one more than the context holds: too long a prompt is refused
    moe_generate_result result;

    moe_error error = {0};
    moe_model *model = moe_model_open(path, NULL, &error);
    moe_session *session = model ? moe_session_open(model, NULL, &error) : NULL;
    if (session) {
        int64_t n = moe_vocab_tokenize(moe_model_vocab(model), prompt, strlen(prompt),
                                       MOE_TOKENIZE_ADD_SPECIAL, tokens, 4097);
        moe_generate_options options = {.max_tokens = 100, .on_text = print};
        moe_generate(session, tokens, n < 4097 ? (int32_t)n : 4097, &options, &result, &error);
    }
    if (error.status) fprintf(stderr, "%s (%s)\n", error.text, error.where);
    moe_session_close(session);
    moe_model_close(model);
    return error.status != MOE_OK || ferror(stdout);
}
