// cc -O2 examples/minimal.c -o minimal -lm -lpthread && ./minimal MODEL.gguf "Once upon a time"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include <stdio.h>

static int print(void *user, const char *text, size_t size) {
    (void)user;
    return fwrite(text, 1, size, stdout) == size && fflush(stdout) == 0; // 0 would stop
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "model.gguf";
    const char *prompt = argc > 2 ? argv[2] : "Once upon a time";

    moe_error error = {0};
    moe_model *model = moe_model_open(path, NULL, &error);
    moe_session *session = model ? moe_session_open(model, NULL, &error) : NULL;
    if (session) {
        moe_generate_options options = {.max_tokens = 100, .on_text = print};
        moe_generate_text(session, prompt, &options, NULL, &error);
    }
    if (error.status) fprintf(stderr, "%s (%s)\n", error.text, error.where);
    moe_session_close(session);
    moe_model_close(model);
    return error.status != MOE_OK || ferror(stdout);
}
