// Architectures one by one: logits against llama.cpp's (../shared/golden/archs), the small shapes
// of bench/synth.c against themselves (instruction sets, threads, schedules, cuts), and files that
// lack a tensor, have it under another name, or say something else in a key.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "gguf_edit.h"
#include "models.h"
#include "naive.h"
#include <dirent.h>

#define ARCHS "../shared/golden/archs/"
enum { N_GOLDEN = 80, N_TINY = 40, MAX_NAMES = 128 };

// ---- what there is to test -------------------------------------------------------------------

// Files of golden/archs whose family the library knows, in alphabetical order.
static char golden_names[MAX_NAMES][32];
static int n_golden;

static int compare_names(const void *a, const void *b) { return strcmp(a, b); }

static int is_known(const char *family) {
    for (size_t i = 0; i < sizeof moe__families / sizeof moe__families[0]; i++)
        if (!strcmp(moe__families[i].name, family)) return 1;
    return 0;
}

static int find_golden(void) {
    DIR *folder = n_golden ? NULL : opendir(ARCHS);
    for (struct dirent *entry; folder && (entry = readdir(folder)) != NULL;) {
        char name[32];
        const char *end = strstr(entry->d_name, ".gguf");
        if (!end || end - entry->d_name > 31 || n_golden == MAX_NAMES) continue;
        snprintf(name, sizeof name, "%.*s", (int)(end - entry->d_name), entry->d_name);
        if (is_known(name)) memcpy(golden_names[n_golden++], name, sizeof name);
    }
    if (folder) closedir(folder);
    qsort(golden_names, (size_t)n_golden, sizeof golden_names[0], compare_names);
    return n_golden;
}

static const char *golden_path(int i) {
    static char path[128];
    snprintf(path, sizeof path, ARCHS "%.31s.gguf", golden_names[i]);
    return path;
}

// Number i of the small shapes of attention families, then of those that recur; NULL: no more.
static const char *tiny_name(int i) {
    for (int j = 0; j < SYNTH_N_FAMILIES + SYNTH_N_HYBRIDS; j++) {
        const int n = SYNTH_N_FAMILIES;
        const char *name = j < n ? synth_families[j].name : synth_hybrids[j - n].name;
        if (strstr(name, "_tiny") && i-- == 0) return name;
    }
    return NULL;
}

static moe_session_options exact(moe_isa isa) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.kv_type = MOE_KV_F32;
    o.isa = isa;
    o.n_threads = 1;
    return o;
}

// ---- logits ----------------------------------------------------------------------------------

TEST(logits_of_all_architectures_are_llama_cpps) {
    static const int steps[] = {MODELS_WHOLE, 1, 7};
    int n_tokens;
    int32_t *tokens = models_read_tokens(ARCHS "tokens.txt", &n_tokens);
    if (!tokens || !find_golden()) SKIP("no " ARCHS);
    printf("  %-16s %s\n", "architecture", "NMSE by instruction set: whole, one by one, in sevens");
    for (int i = 0; i < n_golden; i++) {
        char path[128];
        size_t n = 0;
        snprintf(path, sizeof path, ARCHS "%.31s.logits.f32", golden_names[i]);
        float *expected = models_read_floats(path, &n);
        double *wanted = expected ? models_doubles(expected, n) : NULL;
        moe_model *model = models_open(golden_path(i));
        const double most = strcmp(golden_names[i], "gemma4") ? 1e-6 : 1e-5;
        CHECKF(model && wanted, "%s", golden_names[i]);
        printf("  %-16s", golden_names[i]);
        for (int isa = 0; model && wanted && isa < 3; isa++) {
            float *first = NULL;
            if (!models_has_isa(models_isas[isa])) continue;
            for (int s = 0; s < 3; s++) {
                const moe_session_options o = exact(models_isas[isa]);
                float *x = models_run(model, &o, tokens, N_GOLDEN, steps[s]);
                const double off = x ? models_nmse(x, wanted, n) : INFINITY;
                printf(" %.0e", off);
                CHECKF(off <= most, "%s, %s, %d: %g", golden_names[i],
                       moe_isa_name(models_isas[isa]), steps[s], off);
                CHECKF(!first || !x || !memcmp(first, x, n * sizeof *x), "%s, %s, %d",
                       golden_names[i], moe_isa_name(models_isas[isa]), steps[s]);
                if (x) models_keep_first(&first, x);
            }
            free(first);
        }
        puts("");
        moe_model_close(model);
        free(expected);
        free(wanted);
    }
    free(tokens);
}

// What must not change a bit: cuts, threads; schedules other than the parallel one, which adds up
// experts of one token in another order where it may.
TEST(cuts_and_threads_change_no_bit_of_small_models) {
    static const int steps[] = {MODELS_WHOLE, 1, 7, MODELS_ODD};
    int32_t tokens[N_TINY];
    const char *name;
    models_tokens(tokens, N_TINY, 512, 3);
    for (int i = 0; (name = tiny_name(i)) != NULL; i++) {
        moe_model *model = models_open(models_simple(name, i % 2 ? "f16" : "f32"));
        CHECKF(model, "%s", name);
        for (int isa = 0; model && isa < 3; isa++) {
            float *first = NULL;
            if (!models_has_isa(models_isas[isa])) continue;
            for (int run = 0; run < 8; run++) {
                moe_session_options o = exact(models_isas[isa]);
                if (run >= 4 && MODELS_SLOW) break;
                o.n_threads = run < 4 ? 1 : 3;
                o.schedule = run == 7 ? MOE_SCHEDULE_BALANCED : MOE_SCHEDULE_SEQUENTIAL;
                if (run == 6) o.n_batch = 5;
                float *x = models_run(model, &o, tokens, N_TINY, steps[run % 4]);
                CHECKF(x && (!first || !memcmp(first, x, sizeof(float) * N_TINY * 512)),
                       "%s, %s, run %d", name, moe_isa_name(models_isas[isa]), run);
                if (x) models_keep_first(&first, x);
            }
            free(first);
        }
        moe_model_close(model);
    }
}

TEST(instruction_sets_and_schedules_agree_about_small_models) {
    static const moe_schedule schedules[] = {MOE_SCHEDULE_SEQUENTIAL, MOE_SCHEDULE_PARALLEL,
                                             MOE_SCHEDULE_BALANCED};
    int32_t tokens[N_TINY];
    const char *name;
    double worst = 0;
    models_tokens(tokens, N_TINY, 512, 4);
    for (int i = 0; (name = tiny_name(i)) != NULL; i++) {
        moe_model *model = models_open(models_simple(name, "f32"));
        const moe_session_options plain = exact(MOE_ISA_SCALAR);
        float *first = model ? models_run(model, &plain, tokens, N_TINY, MODELS_WHOLE) : NULL;
        double *wanted = first ? models_doubles(first, N_TINY * 512) : NULL;
        CHECKF(wanted, "%s", name);
        for (int run = 0; wanted && run < 9; run++) {
            moe_session_options o = exact(models_isas[run % 3]);
            if (!models_has_isa(o.isa)) continue;
            o.schedule = schedules[run / 3];
            o.n_threads = 3;
            float *x = models_run(model, &o, tokens, N_TINY, 1);
            const double off = x ? models_nmse(x, wanted, N_TINY * 512) : INFINITY;
            // GELU is a table of halves: a step of its argument shows
            CHECKF(off <= (strncmp(name, "gemma4", 6) ? 1e-9 : 1e-7), "%s, %s, %s: %g", name,
                   moe_isa_name(o.isa), moe__schedules[run / 3].name, off);
            worst = fmax(worst, off);
            free(x);
        }
        moe_model_close(model);
        free(first);
        free(wanted);
    }
    printf("  largest difference: %.1e\n", worst);
}

// A chunk of experts may be chosen twice for one token: more tokens in an entry than in the batch.
TEST(chunk_experts_that_are_chosen_twice_count_twice) {
    moe__router router;
    const float p[8] = {0.05f, 0.1f, 0.3f, 0.2f, 0.05f, 0.1f, 0.15f, 0.05f};
    int32_t chunks[3];
    float weights[3];
    memset(&router, 0, sizeof router);
    router.n_expert = 8;
    router.n_used = 3;
    router.n_chunk = 2;
    router.n_chunk_used = 3;
    router.chunk_scale = 0.5f;
    moe__router_chunks(&router, p, chunks, weights); // experts 2, 3 and 6
    CHECK(chunks[0] == 1 && chunks[1] == -1 && chunks[2] == 3);
    CHECK(fabsf(weights[0] - 0.5f * 0.2f / 0.4f) < 1e-6f);
    CHECK(fabsf(weights[2] - 0.5f * 0.2f / 0.4f) < 1e-6f);
}

// ---- how far indexers are exact --------------------------------------------------------------

TEST(contexts_beyond_what_an_indexer_chooses_are_refused) {
    static const char *const names[] = {"minimax-m3_tiny", "glm-dsa_tiny", "deepseek32_tiny"};
    int32_t tokens[80];
    models_tokens(tokens, 80, 512, 5);
    for (int i = 0; i < 3; i++) {
        moe_model *model = models_open(models_simple(names[i], "f32"));
        moe_session_options o = exact(MOE_ISA_SCALAR);
        moe_error error;
        o.n_ctx = 80;
        o.keep_all_logits = MOE_ON;
        moe_session *s = model ? moe_session_open(model, &o, &error) : NULL;
        CHECKF(s, "%s", names[i]);
        float kept[512];
        if (!s) continue;
        CHECKF(moe_session_eval(s, tokens, 65, &error) == MOE_ERROR_UNSUPPORTED, "%s", names[i]);
        CHECK(moe_session_length(s) == 0);
        CHECKF(moe_session_eval(s, tokens, 60, &error) == MOE_OK, "%s", names[i]);
        memcpy(kept, moe_session_logits(s, 59), sizeof kept);
        CHECKF(moe_session_eval(s, tokens + 60, 5, &error) == MOE_ERROR_UNSUPPORTED, "%s",
               names[i]);
        CHECKF(moe_session_length(s) == 60, "%s", names[i]);
        CHECKF(moe_session_logits(s, 59) && !memcmp(kept, moe_session_logits(s, 59), sizeof kept),
               "%s: other logits", names[i]);
        CHECKF(moe_session_eval(s, tokens + 60, 4, &error) == MOE_OK, "%s: the last that fit",
               names[i]);
        CHECK(moe_session_length(s) == 64);
        CHECK(moe_session_eval(s, tokens, 1, &error) == MOE_ERROR_UNSUPPORTED);
        moe_session_close(s);
        moe_model_close(model);
    }
}

// ---- dense relatives -------------------------------------------------------------------------

// Of each shape what llama.cpp gives behind these tokens: logits 5, 69, 133 ... of the last one.
enum { N_DENSE_LOGITS = 8 };
static const int32_t dense_tokens[N_TINY] = {
    261, 367, 29, 476, 255, 53, 160, 115, 380, 160, 252, 389, 104, 255, 13, 221, 255, 286, 186,
    398, 163, 73, 142, 163, 129, 135, 1, 5, 214, 220, 5, 170, 296, 321, 203, 209, 186, 203, 392,
    305};
static const struct {
    const char *name;
    double logits[N_DENSE_LOGITS];
} dense_shapes[] = {
    {"gemma4_dense_tiny",
     {1.516841, -1.947381, -0.5156638, 0.0965589,
      0.5041189, 2.069757, -0.05692177, 0.8104351}},
    {"granite_dense_tiny",
     {0.116994, -0.1585627, -0.08230192, -0.08132258,
      -0.0434243, 0.06677569, 0.1298592, 0.1105846}},
    {"granitehybrid_dense_tiny",
     {-0.0854537, -0.03818265, -0.04124947, -0.2000249,
      -0.2604891, -0.07771653, 0.1212784, -0.09547657}},
    {"lfm2_tiny",
     {-1.312863, 0.766534, 0.1378132, 1.263363,
      -0.6063862, 1.060434, -0.2981862, 0.2530421}},
    {"llama_dense_tiny",
     {-0.6256503, 1.208831, 0.9694213, -0.9796427,
      -0.6576719, 0.5692521, -0.06050932, -0.1489482}},
    {"mistral3_dense_tiny",
     {-0.5063589, 0.7902431, 0.8546017, -1.003966,
      -1.501272, 0.7236757, -0.3259598, 0.04361868}},
    {"qwen2_tiny",
     {-0.007777378, 0.9445401, 0.7926097, -0.9416435,
      -1.13009, 0.1100396, -0.3494974, 0.3815615}},
    {"qwen35_tiny",
     {0.590537, 0.36937, 0.8129728, -0.8568094,
      0.6892252, -0.2213245, -1.290922, 0.2664626}},
    {"qwen3_tiny",
     {9.035311, -6.41551, -0.1441355, -8.669065,
      5.691335, -2.335008, -0.675338, 20.20221}},
};

TEST(dense_relatives_have_llama_cpps_logits) {
    for (size_t i = 0; i < sizeof dense_shapes / sizeof dense_shapes[0]; i++) {
        const char *name = dense_shapes[i].name;
        moe_model *model = models_open(models_simple(name, "f32"));
        CHECKF(model != NULL, "%s", name);
        if (!model) continue;
        CHECK(moe_model_get_info(model)->n_expert == 0);
        CHECK(moe_session_expert_counts(NULL, 0) == NULL);
        moe_session_options o = exact(MOE_ISA_BEST);
        for (int cut = 0; cut < 2; cut++) {
            float *x = models_run(model, &o, dense_tokens, N_TINY, cut ? 1 : MODELS_WHOLE);
            float got[N_DENSE_LOGITS];
            for (int k = 0; k < N_DENSE_LOGITS; k++)
                got[k] = x ? x[(N_TINY - 1) * 512 + 5 + 64 * k] : NAN;
            const double off = models_nmse(got, dense_shapes[i].logits, N_DENSE_LOGITS);
            // GELU is a table of halves
            CHECKF(off <= (strncmp(name, "gemma4", 6) ? 1e-10 : 1e-6), "%s: %g", name, off);
            free(x);
        }
        moe_model_close(model);
    }
}

// ---- files that say something else -----------------------------------------------------------

// Tensors that llama.cpp can do without, in the families that are named: "*" all of them, "!x" not
// x. Others must not be missing. Checked against llama.cpp by hand: what opens without them has its
// logits.
typedef struct optional_tensor {
    const char *name, *families;
} optional_tensor;
static const optional_tensor optionals[] = {
    {"output.weight", "qwen2 qwen35 afmoe arctic bailingmoe3 cohere2moe deepseek deepseek2 "
                      "deepseek32 "
                      "ernie4_5-moe gemma4 glm-dsa glm4moe gpt-oss granite granitehybrid "
                      "granitemoe grok grovemoe hunyuan-moe hy_v3 jamba laguna lfm2moe llama "
                      "llama4 minimax-01 mistral3 mistral4 nemotron_h_moe olmoe qwen2moe "
                      "qwen35moe qwen3moe qwen3next qwen3vlmoe smallthinker"},
    {"rope_freqs.weight", "exaone-moe granite granitehybrid granitemoe llama llama4 mistral3 "
                          "step35"},
    {"rope_factors_long.weight", "phimoe"},
    {"rope_factors_short.weight", "phimoe"},
    {"attn_q.bias", "*"},
    {"attn_k.bias", "*"},
    {"attn_v.bias", "*"},
    {"attn_output.bias", "ernie4_5-moe granite granitehybrid granitemoe jamba llama llama4 "
                         "mistral3 lfm2moe nemotron_h_moe"},
    {"attn_qkv.bias", "*"},
    {"attn_q_norm.weight", "glm4moe step35"},
    {"attn_k_norm.weight", "glm4moe step35"},
    {"attn_v.weight", "gemma4"},
    {"attn_gate.weight", "step35"},
    {"attn_sinks.weight", "mimo2"},
    {"indexer.attn_q_b.weight", "glm-dsa"},
    {"indexer.attn_k.weight", "glm-dsa"},
    {"indexer.proj.weight", "glm-dsa"},
    {"indexer.k_norm.weight", "glm-dsa"},
    {"indexer.k_norm.bias", "glm-dsa"},
    {"exp_probs_b.bias", "bailingmoe2 deepseek2 deepseek32 dots1 ernie4_5-moe exaone-moe glm-dsa "
                         "mimo2 mistral4 step35"},
    {"exp_probs_b", "hy_v3"},
    {"layer_output_scale.weight", "gemma4"},
    {"ffn_up.weight", "grok"}, // the dense network, by this tensor
    // of dense networks beside experts that are not run
    {"ffn_gate.bias", "*"},
    {"ffn_up.bias", "*"},
    {"ffn_down.bias", "*"},
    {"ssm_in.weight", "qwen3next"}, // the same as attn_qkv
    {"ffn_latent_down.weight", "nemotron_h_moe"}, // if it does not make inputs narrower
    {"ssm_conv1d.bias", "*"},
    {"ssm_in.bias", "*"},
    {"ssm_out.bias", "*"},
};

static int has_word(const char *words, const char *word) {
    const size_t n = strlen(word);
    for (const char *p = words; (p = strstr(p, word)) != NULL; p += n)
        if ((p == words || p[-1] == ' ') && (p[n] == ' ' || !p[n])) return 1;
    return 0;
}

// The name without "blk.N.".
static const char *stem(const char *name) {
    const char *dot = strncmp(name, "blk.", 4) ? NULL : strchr(name + 4, '.');
    return dot ? dot + 1 : name;
}

static int is_optional(const edit_file *file, const char *family, const char *name) {
    const char *end = strrchr(name, '.');
    char other[80];
    if (end && (!strcmp(end, ".scale") || !strcmp(end, ".input_scale")))
        return strcmp(family, "gemma4") || strcmp(stem(name), "ffn_gate_inp.scale");
    for (size_t i = 0; i < sizeof optionals / sizeof optionals[0]; i++)
        if (!strcmp(optionals[i].name, stem(name)) &&
            (*optionals[i].families == '*' || has_word(optionals[i].families, family)))
            return 1;
    // A dense network of a layer that has experts is not run (but see gemma4, grok, arctic).
    if (has_word("gemma4 grok arctic", family) || strncmp(name, "blk.", 4)) return 0;
    snprintf(other, sizeof other, "%.*sffn_gate_inp.weight", (int)(stem(name) - name), name);
    for (int i = 0; i < file->n_tensors; i++)
        if (!strcmp(file->tensors[i].name, other))
            return !strcmp(stem(name), "ffn_gate.weight") ||
                   !strcmp(stem(name), "ffn_up.weight") || !strcmp(stem(name), "ffn_down.weight");
    return 0;
}

typedef struct tally {
    int refused, opened, keys_refused, keys_opened;
} tally;

static int32_t vary_tokens[12];

// The reference pass about a changed file, where it knows the family.
static void check_naive(const moe_gguf *gguf, const float *logits, const char *what,
                        const char *name) {
    int n;
    if (!has_word("deepseek2 gpt-oss llama olmoe qwen2moe qwen3moe", what)) return;
    double *expected = naive_logits(gguf, vary_tokens, 3, NULL, &n);
    CHECKF(expected, "%s %s: no reference", what, name);
    if (!expected) return;
    const double off = models_nmse(logits, expected + 2 * n, (size_t)n);
    CHECKF(off <= 1e-6, "%s %s: %g", what, name, off);
    free(expected);
}

// Opens the changed file; 1: it was refused. Models that open must run and give numbers, and if
// `right` those of the reference pass.
static int is_refused(const edit_file *file, const char *what, const char *name, int right,
                      moe_error *error) {
    edit_image image = edit_build(file);
    memset(error, 0, sizeof *error);
    moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, error);
    moe_model *model = gguf ? moe_model_open_gguf(gguf, NULL, error) : NULL;
    moe_session_options o = exact(MOE_ISA_SCALAR);
    o.n_ctx = 12;
    moe_session *session = model ? moe_session_open(model, &o, error) : NULL;
    if (model) {
        const int n = moe_model_get_info(model)->n_vocab;
        for (int i = 0; i < 12; i++) vary_tokens[i] = (i * 37 + 5) % n;
        CHECKF(session, "%s %s: %s", what, name, error->text);
        const moe_status status = session ? moe_session_eval(session, vary_tokens, 3, error) : 0;
        CHECKF(!status || status == MOE_ERROR_UNSUPPORTED, "%s %s: %s", what, name, error->text);
        const float *logits = session && !status ? moe_session_logits(session, 2) : NULL;
        double sum = 0;
        for (int i = 0; i < n && logits; i++) sum += (double)fabsf(logits[i]);
        CHECKF(!logits || !right || sum < INFINITY, "%s %s: not numbers", what, name);
        if (logits && right && moe_model_get_info(model)->n_expert)
            check_naive(gguf, logits, what, name);
    }
    moe_session_close(session);
    const int refused = !model;
    moe_model_close(model);
    moe_gguf_close(gguf);
    free(image.data);
    if (refused) CHECKF(*error->where && *error->text, "%s %s", what, name);
    return refused;
}

static int names_it(const moe_error *error, const char *name) {
    return strstr(error->where, name) != NULL || strstr(error->text, name) != NULL;
}

static void vary_tensors(edit_file *file, const char *family, tally *t) {
    moe_error error;
    for (int i = 0; i < file->n_tensors; i++) {
        edit_tensor *tensor = &file->tensors[i];
        char name[sizeof tensor->name];
        memcpy(name, tensor->name, sizeof name);
        const int may = is_optional(file, family, name);
        tensor->removed = 1;
        if (is_refused(file, family, name, 1, &error)) {
            t->refused++;
            // what stands in for it may be missed in its place
            const int other = strstr(name, "attn_qkv") || strstr(name, "gate_up_exps") ||
                              strstr(name, "attn_k_b") || strstr(name, "attn_v_b") ||
                              strstr(name, "ffn_gate_inp") || strstr(name, "attn_q.weight") ||
                              strstr(name, "layer_output_norm") ||
                              !strcmp(family, "ernie4_5-moe") || // layers that are not run
                              may; // or it decides what others are for
            CHECKF(names_it(&error, name) || other, "%s without %s: %s", family, name, error.text);
        } else {
            t->opened++;
            CHECKF(may, "%s opens without %s", family, name);
        }
        tensor->removed = 0;
        if (strlen(name) + 2 > sizeof name) continue;
        snprintf(tensor->name, sizeof tensor->name, "%.*sz%s", (int)strcspn(name, "."), name,
                 name + strcspn(name, "."));
        CHECKF(is_refused(file, family, tensor->name, 1, &error), "%s opens with %s", family,
               tensor->name);
        memcpy(tensor->name, name, sizeof name);
    }
}

static void vary_key(edit_file *file, const char *family, edit_value *value, const void *data,
                     tally *t) {
    const edit_value old = *value;
    moe_error error;
    value->data = (const uint8_t *)data;
    value->removed = data == NULL;
    if (is_refused(file, family, old.key, 0, &error)) t->keys_refused++;
    else t->keys_opened++;
    *value = old;
}

// Keys that must be there for a family (of all: block_count and the like).
static const char *const must_keys[][2] = {
    {"*", "block_count"},
    {"*", "context_length"},
    {"*", "embedding_length"},
    {"*", "attention.head_count"},
    {"*", "expert_used_count"},
    {"cohere2moe", "logit_scale"},
    {"dbrx", "attention.clamp_kqv"},
    {"dbrx", "attention.layer_norm_epsilon"},
    {"granite", "logit_scale"},
    {"granitemoe", "logit_scale"},
    {"maple", "attention.sliding_window"},
    {"maple", "attention.sliding_window_pattern"},
    {"maple", "swiglu_clamp_exp"},
    {"step35", "attention.sliding_window"},
    {"step35", "attention.sliding_window_pattern"},
    {"mimo2", "attention.sliding_window"},
    {"mimo2", "attention.sliding_window_pattern"},
    {"gemma4", "attention.sliding_window"},
    {"gemma4", "attention.sliding_window_pattern"},
    {"exaone-moe", "attention.sliding_window"},
    {"exaone-moe", "expert_gating_func"},
    {"cohere2moe", "attention.sliding_window"},
    {"bailingmoe2", "expert_gating_func"},
    {"deepseek32", "expert_gating_func"},
    {"minimax-m3", "expert_gating_func"},
    {"minimax-m3", "attention.indexer.block_size"},
    {"minimax-m3", "attention.indexer.top_k"},
    {"glm-dsa", "attention.indexer.top_k"},
    {"deepseek32", "attention.indexer.top_k"},
    {"deepseek32", "attention.indexer.head_count"},
    {"grovemoe", "expert_group_scale"},
    {"grovemoe", "experts_per_group"},
    {"qwen3vlmoe", "rope.dimension_sections"},
};

static void check_must(const edit_file *file, const char *family, const char *key) {
    moe_error error;
    edit_file *copy = (edit_file *)malloc(sizeof *copy);
    if (!copy) exit(1);
    memcpy(copy, file, sizeof *copy);
    for (size_t i = 0; i < sizeof must_keys / sizeof must_keys[0]; i++) {
        if (strcmp(must_keys[i][1], key) ||
            (*must_keys[i][0] != '*' && strcmp(must_keys[i][0], family)))
            continue;
        char full[128];
        snprintf(full, sizeof full, "%s.%s", family, key);
        edit_value *value = edit_find_value(copy, full);
        if (value) value->removed = 1;
        CHECKF(is_refused(copy, family, key, 1, &error), "%s opens without %s", family, key);
        CHECKF(names_it(&error, key), "%s without %s: %s", family, key, error.text);
    }
    free(copy);
}

static void vary_keys(edit_file *file, const char *family, tally *t) {
    const size_t n = strlen(family);
    uint8_t other[4096];
    for (int i = 0; i < file->n_values; i++) {
        edit_value *value = &file->values[i];
        if (strncmp(value->key, family, n) || value->key[n] != '.') continue;
        check_must(file, family, value->key + n + 1);
        uint8_t some = 0; // dumps of all keys have 0 for "not set"
        for (size_t k = 0; k < value->size; k++) some |= value->data[k];
        if (!some && value->type < 8) continue;
        vary_key(file, family, value, NULL, t);
        if (value->type == 4 || value->type == 5) {
            const uint8_t *p = value->data;
            const uint32_t x = (uint32_t)edit_get(&p, 4);
            const uint32_t near[] = {x + 1, x - 1, 2 * x, 0};
            for (int k = 0; k < 4; k++) vary_key(file, family, value, &near[k], t);
        } else if (value->type == 6) {
            float x;
            memcpy(&x, value->data, 4);
            const float near[] = {x * 1.5f, 0, 1, -1, NAN, INFINITY};
            for (int k = 0; k < 6; k++) vary_key(file, family, value, &near[k], t);
        } else if (value->type == 7) {
            other[0] = !value->data[0];
            vary_key(file, family, value, other, t);
        } else if (value->type == 9 && value->size <= sizeof other && value->size > 16) {
            memcpy(other, value->data, value->size);
            other[value->size - 4] ^= 1; // the last element, or one of the last four truth values
            vary_key(file, family, value, other, t);
        }
    }
}

static void vary(const char *path, const char *family, const char *name, tally *sum) {
    edit_file *file = (edit_file *)malloc(sizeof *file);
    tally t;
    memset(&t, 0, sizeof t);
    if (!file) exit(1);
    if (!edit_open(file, path)) {
        CHECKF(0, "%s cannot be taken apart", name);
    } else {
        vary_tensors(file, family, &t);
        vary_keys(file, family, &t);
        edit_close(file);
    }
    free(file);
    printf("  %-24s %4d %4d  %4d %4d\n", name, t.refused, t.opened, t.keys_refused,
           t.keys_opened);
    sum->refused += t.refused;
    sum->opened += t.opened;
    sum->keys_refused += t.keys_refused;
    sum->keys_opened += t.keys_opened;
}

TEST(tensors_and_keys_that_a_family_needs_are_missed_by_name) {
    tally sum;
    const char *name;
#ifdef __SANITIZE_THREAD__ // opening a file starts no threads
    const int step = 12;
#else
    const int step = 1;
#endif
    memset(&sum, 0, sizeof sum);
    printf("  %-24s %s\n", "", "removed tensors: refused, opened; changed keys: the same");
    for (int i = 0; i < find_golden(); i += step)
        vary(golden_path(i), golden_names[i], golden_names[i], &sum);
    for (int i = 0; (name = tiny_name(i)) != NULL; i += step) {
        synth_options o;
        memset(&o, 0, sizeof o);
        o.no_tokenizer = 1;
        o.type = "f16";
        vary(models_write(name, &o), synth_find(name)->arch, name, &sum);
    }
    printf("  %-24s %4d %4d  %4d %4d\n", "all", sum.refused, sum.opened, sum.keys_refused,
           sum.keys_opened);
}

MAIN()
