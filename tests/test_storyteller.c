// The model in the box: its logits against stored double-precision values on every instruction set,
// its perplexity on stories it has not seen, and what quantizing costs.
//
//     build/tests/test_storyteller --write                 writes the stored values anew
//     build/tests/test_storyteller --perplexity FILE...    of other files on the same stories
#define main quantize_main
#include "../examples/quantize.c"
#undef main
#include "naive.h"

#include "models.h"
#include "storyteller_logits.h"

static const char storyteller[] = "examples/storyteller/storyteller.gguf";
static const char stories[] = "examples/storyteller/held_out.txt";

// ---- logits ----------------------------------------------------------------------------------

static const char prompt[] = "Once upon a time there was a brave girl named Anna. She liked to";
enum { MAX_PROMPT = 64 };

static int32_t tokenize_prompt(const moe_model *model, int32_t *tokens) {
    return (int32_t)moe_vocab_tokenize(moe_model_vocab(model), prompt, strlen(prompt),
                                       MOE_TOKENIZE_ADD_SPECIAL, tokens, MAX_PROMPT);
}

// Logits behind the prompt.
static double *true_logits(const moe_model *model, const int32_t *tokens, int32_t n) {
    int n_vocab = 0;
    double *all = naive_logits(moe_model_gguf(model), tokens, n, NULL, &n_vocab);
    const size_t width = (size_t)n_vocab;
    if (all) memmove(all, all + (size_t)(n - 1) * width, sizeof(double) * width);
    return all;
}

TEST(stored_logits_are_the_truth) {
    int32_t tokens[MAX_PROMPT];
    moe_model *model = models_open(storyteller);
    CHECK(model != NULL);
    if (!model) return;
    const int32_t n = tokenize_prompt(model, tokens);
    CHECK(n > 10 && n <= MAX_PROMPT && moe_model_get_info(model)->n_vocab == STORED_LOGITS);
    double *logits = true_logits(model, tokens, n), worst = 0;
    for (int i = 0; logits && i < STORED_LOGITS; i++)
        worst = fmax(worst, fabs(logits[i] - stored_logits[i]));
    CHECKF(logits && worst < 1e-6, "%g", worst);
    free(logits);
    moe_model_close(model);
}

// Within what rounding activations to 8 bits costs. Instruction sets add in different orders, so
// an activation half way between two steps may go to the other one: mostly none does and they
// agree to 1e-14, but never may they differ by more than two independent roundings would.
TEST(every_instruction_set_gives_nearly_the_true_logits) {
    int32_t tokens[MAX_PROMPT];
    double first[STORED_LOGITS];
    const moe_isa isas[] = {MOE_ISA_SCALAR, MOE_ISA_AVX2, MOE_ISA_AVX_VNNI, MOE_ISA_AVX512};
    moe_model *model = models_open(storyteller);
    CHECK(model != NULL);
    if (!model) return;
    const int32_t n = tokenize_prompt(model, tokens);
    for (size_t i = 0; i < sizeof isas / sizeof isas[0]; i++)
        for (int step = 0; step < 2; step++) {
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.isa = isas[i];
            o.kv_type = MOE_KV_F32;
            if (!models_has_isa(isas[i])) continue;
            float *logits = models_run(model, &o, tokens, n, step ? 1 : MODELS_WHOLE);
            CHECK(logits != NULL);
            if (!logits) continue;
            const float *last = logits + (size_t)(n - 1) * STORED_LOGITS;
            const double error = models_nmse(last, stored_logits, STORED_LOGITS);
            for (int j = 0; j < STORED_LOGITS && !i && !step; j++) first[j] = (double)last[j];
            const double apart = models_nmse(last, first, STORED_LOGITS);
            printf("  %s: %.2g from the truth, %.2g from plain C\n", moe_isa_name(isas[i]), error,
                   apart);
            CHECKF(error < 1e-4 && apart < 4e-5, "%s, step %d: %g, %g", moe_isa_name(isas[i]),
                   step, error, apart);
            free(logits);
        }
    moe_model_close(model);
}

// ---- perplexity ------------------------------------------------------------------------------

// The held-out stories, an empty line between two; "" if they cannot be read.
static char *read_stories(void) {
    static char text[1 << 16];
    FILE *f = fopen(stories, "rb");
    text[f ? fread(text, 1, sizeof text - 1, f) : 0] = 0;
    if (f) fclose(f);
    return text;
}

enum { MAX_STORY = 512 };

// The tokens of the next story of *text, from begin to end token; 0: there is none.
static int32_t next_story(const moe_vocab *vocab, char **text, int32_t tokens[MAX_STORY]) {
    char *story = *text;
    const char *gap = strstr(story, "\n\n");
    const size_t size = gap ? (size_t)(gap - story) : strcspn(story, "\n");
    *text += size + strspn(story + size, "\n");
    const int64_t n = moe_vocab_tokenize(vocab, story, size, MOE_TOKENIZE_ADD_SPECIAL, tokens,
                                         MAX_STORY - 1);
    CHECK(size == 0 || (n > 1 && n < MAX_STORY));
    if (size == 0 || n < 2 || n >= MAX_STORY) return 0;
    tokens[n] = moe_vocab_eos(vocab);
    return (int32_t)n + 1;
}

// Perplexity per token over the held-out stories. 0: something failed.
static double perplexity(const char *path) {
    moe_model *model = models_open(path);
    double sum = 0, count = 0;
    if (!model) return 0;
    const moe_vocab *vocab = moe_model_vocab(model);
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    int32_t tokens[MAX_STORY], n;
    for (char *text = read_stories(); (n = next_story(vocab, &text, tokens)) > 0;) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.n_ctx = n;
        float *logits = models_run(model, &o, tokens, n, MODELS_WHOLE);
        for (int32_t t = 0; logits && t + 1 < n; t++) {
            const float *row = logits + (size_t)t * (size_t)n_vocab;
            double total = 0;
            for (int32_t i = 0; i < n_vocab; i++) total += exp((double)row[i]);
            sum += log(total) - (double)row[tokens[t + 1]];
            count++;
        }
        free(logits);
    }
    moe_model_close(model);
    return count > 0 ? exp(sum / count) : 0;
}

TEST(held_out_stories_have_the_stored_perplexity) {
    const double p = perplexity(storyteller);
    printf("  perplexity %.4f\n", p);
    CHECKF(p > 1 && p < STORED_PERPLEXITY * 1.01, "%.4f", p);
}

// Each K-quant for all matrices: perplexity over that of the file in the box.
TEST(quantizing_raises_perplexity_by_the_stored_ratio) {
    static const struct {
        const char *type;
        double least, most; // of the ratio
    } rows[] = {STORED_COSTS};
    const double before = perplexity(storyteller);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0] && !(MODELS_SLOW && i); i++) {
        char name[64];
        rule r;
        memset(&r, 0, sizeof r);
        r.part = "";
        CHECK(find_type(rows[i].type, &r.type));
        snprintf(name, sizeof name, "storyteller-%s.gguf", rows[i].type);
        const char *path = models_path(name);
        CHECK(quantize(storyteller, path, &r, 1) == TOOL_OK);
        const double ratio = perplexity(path) / before;
        printf("  %s: %.4f\n", rows[i].type, ratio);
        CHECKF(ratio > rows[i].least && ratio < rows[i].most, "%s: %.4f", rows[i].type, ratio);
    }
}

// ---- experts ---------------------------------------------------------------------------------

// All experts of all layers are used by a few stories: no dead one, none that does all the work.
TEST(experts_are_balanced) {
    moe_model *model = models_open(storyteller);
    char *text = read_stories();
    int32_t tokens[MAX_STORY], n;
    CHECK(model && *text);
    if (!model || !*text) return;
    const moe_model_info *info = moe_model_get_info(model);
    moe_session *session = moe_session_open(model, NULL, NULL);
    CHECK(session != NULL);
    if (!session) return;
    while ((n = next_story(moe_model_vocab(model), &text, tokens)) > 0) {
        CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
        CHECK(moe_session_eval(session, tokens, n, NULL) == MOE_OK);
    }
    for (int32_t il = 1; il < info->n_layer; il++) {
        const uint64_t *counts = moe_session_expert_counts(session, il);
        double sum = 0, least = 1e9, most = 0;
        for (int32_t e = 0; e < info->n_expert; e++) sum += (double)counts[e];
        for (int32_t e = 0; e < info->n_expert; e++) {
            const double share = (double)counts[e] * info->n_expert / sum;
            least = fmin(least, share);
            most = fmax(most, share);
            CHECKF(share > 0.6 && share < 1.6, "layer %d, expert %d: %.2f", il, e, share);
        }
        printf("  layer %d: %.2f to %.2f of an even share\n", il, least, most);
    }
    moe_session_close(session);
    moe_model_close(model);
}

// ---- writing the stored values ---------------------------------------------------------------

static int write_stored(void) {
    int32_t tokens[MAX_PROMPT];
    moe_model *model = models_open(storyteller);
    if (!model) return 1;
    const int32_t n = tokenize_prompt(model, tokens), n_vocab = moe_model_get_info(model)->n_vocab;
    double *logits = true_logits(model, tokens, n);
    FILE *f = fopen("tests/storyteller_logits.h", "w");
    if (!logits || !f) return 1;
    const double before = perplexity(storyteller);
    fprintf(f, "// Written by test_storyteller --write from the double-precision pass of "
               "naive.h.\n#define STORED_PERPLEXITY %.4f\n#define STORED_COSTS", before);
    static const char *const types[] = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"};
    for (int i = 0; i < 5; i++) {
        rule r;
        char name[64];
        memset(&r, 0, sizeof r);
        r.part = "";
        snprintf(name, sizeof name, "storyteller-%s.gguf", types[i]);
        const char *path = models_path(name);
        if (!find_type(types[i], &r.type) || quantize(storyteller, path, &r, 1)) return 1;
        const double cost = perplexity(path) / before - 1;
        fprintf(f, " \\\n    {\"%s\", %.4f, %.4f},", types[i], 1 + 0.7 * cost - 0.002,
                1 + 1.3 * cost + 0.002);
    }
    fprintf(f, "\nenum { STORED_LOGITS = %d };\n"
               "static const double stored_logits[STORED_LOGITS] = {", n_vocab);
    for (int i = 0; i < n_vocab; i++) fprintf(f, "%s%.8f,", i % 7 ? " " : "\n    ", logits[i]);
    fprintf(f, "\n};\n");
    free(logits);
    moe_model_close(model);
    return fclose(f) != 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--write")) return write_stored();
    if (argc > 2 && !strcmp(argv[1], "--perplexity")) {
        for (int i = 2; i < argc; i++) printf("%s: %.4f\n", argv[i], perplexity(argv[i]));
        return 0;
    }
    return test_main(argc, argv);
}
