// Prints README's table of architectures, a line each in the order of the header's table: how
// positions enter, which mixers its layers have, and how far its logits are from llama.cpp's in
// ../shared/golden/archs (NMSE of 80 x 128 logits with an F32 cache, the worst of all instruction
// sets, the prompt whole, token by token and in sevens). See tests/readme.sh.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "models.h"

#define GOLDEN "../shared/golden/archs/"

// The worst NMSE; -1: there is no reference; infinite: something failed.
static double worst_of(const char *name) {
    char path[160];
    int n_tokens;
    size_t n = 0;
    double worst = -1;
    snprintf(path, sizeof path, GOLDEN "%s.logits.f32", name);
    float *expected = models_read_floats(path, &n);
    int32_t *tokens = models_read_tokens(GOLDEN "tokens.txt", &n_tokens);
    snprintf(path, sizeof path, GOLDEN "%s.gguf", name);
    moe_model *model = expected && tokens ? models_open(path) : NULL;
    double *reference = model ? models_doubles(expected, n) : NULL;
    if (expected && tokens) worst = reference ? 0 : (double)INFINITY;
    for (int isa = MOE_ISA_SCALAR; isa <= MOE_ISA_AVX_VNNI && reference; isa++)
        for (int cut = 0; cut < 3; cut++) {
            static const int steps[] = {MODELS_WHOLE, 1, 7};
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.isa = (moe_isa)isa;
            o.kv_type = MOE_KV_F32;
            o.n_threads = 1 + cut;
            if (!models_has_isa(o.isa)) continue;
            float *logits = models_run(model, &o, tokens, n_tokens, steps[cut]);
            const double off = logits ? models_nmse(logits, reference, n) : (double)INFINITY;
            worst = off > worst ? off : worst;
            free(logits);
        }
    moe_model_close(model);
    free(reference);
    free(expected);
    free(tokens);
    return worst;
}

int main(void) {
    (void)test_main, (void)test_last; // of the harness only measures are wanted
    printf("| architecture | attends by | recurs by | NMSE to llama.cpp |\n|---|---|---|---:|\n");
    for (size_t i = 0; i < sizeof moe__families / sizeof moe__families[0]; i++) {
        const moe__family *family = &moe__families[i];
        const double worst = worst_of(family->name);
        printf("| `%s` | %s | %s |", family->name, moe__mixers[family->mixer].name,
               family->recurs ? moe__mixers[family->recurs].name : "");
        if (worst < 0) printf(" dense, see below |\n");
        else printf(" < 1e%d |\n", (int)ceil(log10(fmax(worst, 5e-13)))); // below: rounding
    }
    return 0;
}
