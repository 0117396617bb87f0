// The whole model: logits of small generated models against the naive pass, and of the reference
// models against llama.cpp's (../shared/golden). The figures are printed.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "gguf_edit.h"
#include "models.h"
#include "naive.h"

// How close is close enough. KV F32 leaves nothing but the rounding of floats. KV F16 rounds what
// is cached to 11 bits; a naive pass that does the same is close again. Inputs of quantized
// matrices are rounded to 8 bits, a relative error of about 0.5 % per product: over a few layers
// an NMSE of 1e-4 to 1e-3, and as logits have a variance of about 1, a KL divergence of half of
// that (llama.cpp has 1.3e-4 on models of the shape qwen3moe_quant and 1.0e-3 on dsv3_quant, whose
// experts count 2.5 times as much).
static const double limit_f32 = 1e-8, limit_f16 = 1e-5, limit_long = 1e-6, limit_family = 1e-6,
                    limit_arch = 1e-9;
static const double limit_rounded = 1e-7, limit_q8_0 = 5e-3;

typedef enum measure { NMSE, MEDIAN_KL, MEDIAN_NMSE } measure;

// One demand on the logits of sessions with one type of cache.
typedef struct demand {
    const char *name;
    moe_kv_type kv_type;
    double *expected; // the last n_expected rows of logits
    measure by;
    double limit;
} demand;

// A model, what it evaluates, and what must come out.
typedef struct subject {
    const char *label;
    const moe_gguf *gguf;
    const moe_model *model;
    int32_t *tokens;
    int n, n_vocab, n_expected, n_threads;
    demand demands[6];
    int n_demands;
} subject;

static void subject_demand(subject *s, const char *name, moe_kv_type kv_type, double *expected,
                           measure by, double limit) {
    demand *d = &s->demands[s->n_demands++];
    d->name = name;
    d->kv_type = kv_type;
    d->expected = expected;
    d->by = by;
    d->limit = limit;
}

static double subject_measure(const subject *s, const float *logits, const demand *d) {
    const float *x = logits + (size_t)(s->n - s->n_expected) * (size_t)s->n_vocab;
    if (d->by == NMSE)
        return models_nmse(x, d->expected, (size_t)s->n_expected * (size_t)s->n_vocab);
    return models_median_row(x, d->expected, s->n_expected, s->n_vocab, d->by == MEDIAN_KL);
}

// Whole, in odd pieces, token by token, and whole in small batches: worst[demand] becomes the
// worst of the four. (Plain C is slow and has one path for all: the first two.)
static void check_pieces(const subject *s, moe_isa isa, moe_kv_type kv_type, double *worst) {
    static const int steps[4] = {MODELS_WHOLE, MODELS_ODD, 1, MODELS_WHOLE};
    static const char *const names[4] = {"whole", "in pieces", "token by token", "n_batch 7"};
    for (int i = 0; i < (isa == MOE_ISA_SCALAR || MODELS_SLOW ? 2 : 4); i++) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.isa = isa;
        o.kv_type = kv_type;
        o.n_threads = s->n_threads;
        if (i == 3) o.n_batch = 7;
        float *logits = models_run(s->model, &o, s->tokens, s->n, steps[i]);
        CHECKF(logits != NULL, "%s %s", s->label, names[i]);
        for (int d = 0; d < s->n_demands; d++) {
            const demand *wanted = &s->demands[d];
            if (wanted->kv_type != kv_type) continue;
            double result = logits ? subject_measure(s, logits, wanted) : INFINITY;
            CHECKF(result <= wanted->limit, "%s, %s, %s %s: %g > %g", s->label, wanted->name,
                   moe_isa_name(isa), names[i], result, wanted->limit);
            worst[d] = fmax(worst[d], result);
        }
        free(logits);
    }
}

static void check_demands(const subject *s) {
    static const char *const measures[3] = {"NMSE", "median KL", "median NMSE"};
    static const char *const kv_names[3] = {"f16", "q8_0", "f32"};
    double worst[6][3] = {{0}};
    for (int i = 0; i < 3; i++) {
        static const moe_kv_type kv_types[3] = {MOE_KV_F32, MOE_KV_F16, MOE_KV_Q8_0};
        for (int k = 0; k < 3 && models_has_isa(models_isas[i]); k++) {
            double one[6] = {0, 0, 0, 0, 0, 0};
            int wanted = 0;
            for (int d = 0; d < s->n_demands; d++) wanted |= s->demands[d].kv_type == kv_types[k];
            if (wanted) check_pieces(s, models_isas[i], kv_types[k], one);
            for (int d = 0; d < s->n_demands; d++) worst[d][i] = fmax(worst[d][i], one[d]);
        }
    }
    for (int d = 0; d < s->n_demands; d++) {
        const demand *wanted = &s->demands[d];
        printf("  %-24s kv %s, %s, %s:", s->label, kv_names[wanted->kv_type], wanted->name,
               measures[wanted->by]);
        for (int i = 0; i < 3; i++)
            if (models_has_isa(models_isas[i]))
                printf(" %s %.1e", moe_isa_name(models_isas[i]), worst[d][i]);
        puts("");
    }
}

// The naive pass with some roundings (kv_f16 2: Q8_0); NULL (a failure) if the file lacks
// something.
static double *subject_naive(const subject *s, int kv_f16, int activations_int8) {
    naive_options options;
    int n_vocab;
    options.kv_f16 = kv_f16 == 1;
    options.kv_q8_0 = kv_f16 == 2;
    options.activations_int8 = activations_int8;
    double *logits = naive_logits(s->gguf, s->tokens, s->n, &options, &n_vocab);
    CHECKF(logits != NULL && n_vocab == s->n_vocab, "%s", s->label);
    return logits;
}

static double doubles_nmse(const double *x, const double *r, size_t n) {
    double off = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        off += (x[i] - r[i]) * (x[i] - r[i]);
        all += r[i] * r[i];
    }
    return off / all;
}

// What a cache in half precision must give: the naive pass with the same rounding to within
// limit_rounded, and the truth to within limit_f16. Where two experts are so nearly tied that
// the rounding swaps them (dsv2 of the reference models), the naive pass itself is further off
// the truth than that, and the engine may be as far.
static void subject_demand_f16(subject *s, double *truth) {
    double *rounded = subject_naive(s, 1, 0), limit = limit_f16;
    if (!rounded) return;
    double off = doubles_nmse(rounded, truth, (size_t)s->n * (size_t)s->n_vocab);
    if (off > limit / 2) {
        printf("  %-24s the naive pass with a rounded cache is %.1e off\n", s->label, off);
        limit = 2 * off;
    }
    subject_demand(s, "truth", MOE_KV_F16, truth, NMSE, limit);
    // Either may swap experts where the other does not, and stay near the truth: then the two
    // are no further apart than their distances from it allow.
    const double apart = pow(sqrt(off) + sqrt(limit), 2);
    subject_demand(s, "naive with f16", MOE_KV_F16, rounded, NMSE,
                   off > limit_f16 / 2 ? apart : limit_rounded);
}

// The same for a Q8_0 cache, where blocks fit. Steps of 1/127 of a block's largest value give an
// NMSE of some 1e-5, and of up to limit_q8_0 where they swap experts (dsv3_quant): what counts is
// to be at most twice as far off the truth as the naive pass with that cache, and near that.
static void subject_demand_q8_0(subject *s, double *truth) {
    const moe_model *m = s->model;
    for (int il = 0; il < m->info.n_layer; il++) {
        const moe__cache_shape shape = moe__layer_cache(&m->layers[il]);
        if (shape.k % 32 || shape.v % 32 || shape.part % 32) return;
    }
    double *rounded = subject_naive(s, 2, 0);
    if (!rounded) return;
    double off = doubles_nmse(rounded, truth, (size_t)s->n * (size_t)s->n_vocab);
    CHECKF(off < limit_q8_0, "%s: the naive pass is %g off", s->label, off);
    subject_demand(s, "truth", MOE_KV_Q8_0, truth, NMSE, 2 * off);
    subject_demand(s, "naive with q8_0", MOE_KV_Q8_0, rounded, NMSE, off / 10);
}

// ---- generated models ------------------------------------------------------------------------

// Shapes that are small enough.
static int is_small(const synth_config *c) { return c->n_embd <= 256; }

// A model from a file and n tokens; 0 (a failure) if it cannot be opened.
static int subject_open(subject *s, const char *path, int n) {
    memset(s, 0, sizeof *s);
    s->label = strrchr(path, '/') + 1;
    s->model = models_open(path);
    s->tokens = (int32_t *)malloc(sizeof(int32_t) * (size_t)n);
    CHECKF(s->model && s->tokens, "%s", path);
    if (!s->model || !s->tokens) return 0;
    s->gguf = moe_model_gguf(s->model);
    s->n_vocab = moe_model_get_info(s->model)->n_vocab;
    models_tokens(s->tokens, n, s->n_vocab, 7);
    s->n = s->n_expected = n;
    s->n_threads = 1;
    return 1;
}
static void subject_close(subject *s) {
    for (int i = 0; i < s->n_demands; i++) {
        double *expected = s->demands[i].expected;
        for (int k = i; k < s->n_demands; k++) // two demands may share it
            if (s->demands[k].expected == expected) s->demands[k].expected = NULL;
        free(expected);
    }
    free(s->tokens);
    moe_model_close((moe_model *)(uintptr_t)s->model);
}

// A model with weights in floats: exact but for rounding. with_f16: such a cache, too, and one
// of Q8_0 (2: that only).
static void check_float(const char *path, int n, int with_f16) {
    subject s;
    if (subject_open(&s, path, n)) {
        double *truth = subject_naive(&s, 0, 0);
        if (truth) {
            subject_demand(&s, "truth", MOE_KV_F32, truth, NMSE, limit_f32);
            if (with_f16 == 1) subject_demand_f16(&s, truth);
            if (with_f16) subject_demand_q8_0(&s, truth);
            check_demands(&s);
        }
    }
    subject_close(&s);
}

// A model with quantized weights: near the truth.
static void check_quantized(const char *config, const char *type, int kvb, int n, double limit_kl) {
    synth_options o;
    subject s;
    memset(&o, 0, sizeof o);
    o.type = type;
    o.kvb = kvb;
    if (subject_open(&s, models_write(config, &o), n)) {
        double *truth = subject_naive(&s, 0, 0);
        if (truth) {
            subject_demand(&s, "truth", MOE_KV_F32, truth, MEDIAN_KL, limit_kl);
            subject_demand(&s, "truth", MOE_KV_F16, truth, MEDIAN_KL, limit_kl);
            check_demands(&s);
        }
    }
    subject_close(&s);
}

// Every feature in F32: routing, shared experts, leading dense layers, YaRN, head sizes, ...
// (MLA has another form for more than about 128 new tokens.)
TEST(small_f32_models_match_the_naive_pass) {
    for (int i = 0; i < SYNTH_N_CONFIGS; i++)
        if (is_small(&synth_configs[i]))
            check_float(models_simple(synth_configs[i].name, "f32"),
                        synth_configs[i].kv_lora ? 140 : 50, 1);
}

// Families with recurrent layers; several chunks of their states, and both forms of latent
// attention between them.
TEST(small_models_with_recurrent_layers_match_the_naive_pass) {
    for (int i = 0; i < SYNTH_N_HYBRIDS; i++) {
        const synth_config *c = &synth_hybrids[i];
        if (!is_small(c)) continue;
        check_float(models_simple(c->name, "f32"), c->kv_lora ? 150 : 75, 1);
        check_float(models_simple(c->name, i % 2 ? "f16" : "bf16"), 40, 0);
    }
}

TEST(small_f16_and_bf16_models_match_the_naive_pass) {
    for (int i = 0; i < SYNTH_N_CONFIGS; i++)
        if (is_small(&synth_configs[i]))
            check_float(models_simple(synth_configs[i].name, i % 2 ? "f16" : "bf16"), 40, 0);
}

// Sizes that no vector fits, few and many taps, one head and more heads than channels of a block.
TEST(recurrent_layers_of_any_size_match_the_naive_pass) {
    static const struct {
        const char *config;
        int conv, inner, state, heads, groups, kda, n_head;
    } cases[] = {
        // gated delta nets: taps, heads * state, state, heads, key heads
        {"qwen35moe_tiny", 1, 60, 20, 3, 3, 0, 4},   {"qwen35moe_tiny", 2, 35, 7, 5, 1, 0, 4},
        {"qwen35moe_tiny", 16, 64, 16, 4, 2, 0, 4},  {"qwen3next_tiny", 3, 54, 9, 6, 3, 0, 4},
        {"qwen3next_tiny", 8, 264, 132, 2, 1, 0, 4}, {"qwen3next_tiny", 4, 12, 1, 12, 4, 0, 4},
        // Mamba-2: values of a head and of its state
        {"granitehybrid_tiny", 1, 60, 10, 4, 2, 0, 4},
        {"granitehybrid_tiny", 16, 36, 35, 3, 1, 0, 4},
        {"nemotron_h_moe_tiny", 2, 130, 1, 10, 5, 0, 4},
        {"nemotron_latent_tiny", 4, 66, 130, 1, 1, 0, 4},
        {"nemotron_latent_tiny", 5, 12, 4, 12, 12, 0, 4},
        // Mamba-1: channels, state, rank of the step
        {"jamba_tiny", 1, 37, 3, 5, 0, 0, 4},        {"jamba_tiny", 16, 144, 1, 1, 0, 0, 4},
        // KDA: width of a head, heads
        {"kimi-linear_tiny", 1, 0, 0, 0, 0, 5, 3},   {"kimi-linear_tiny", 16, 0, 0, 0, 0, 36, 1},
        {"bailingmoe3_tiny", 2, 0, 0, 0, 0, 17, 5},  {"bailingmoe3_tiny", 7, 0, 0, 0, 0, 130, 2},
        {"lfm2moe_tiny", 1, 0, 0, 0, 0, 0, 4},       {"lfm2moe_tiny", 16, 0, 0, 0, 0, 0, 4}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        synth_config c = *synth_find(cases[i].config);
        char name[64];
        c.conv = cases[i].conv;
        if (c.inner) {
            c.inner = cases[i].inner, c.state = cases[i].state;
            c.state_heads = cases[i].heads, c.state_groups = cases[i].groups;
        }
        if (c.kda_dim) c.kda_dim = cases[i].kda, c.n_head = cases[i].n_head;
        snprintf(name, sizeof name, "%s-%d.gguf", cases[i].config, (int)i);
        if (synth_write_config(&c, models_path(name), NULL) != 0) exit(1);
        check_float(models_path(name), 40, 0);
    }
    for (int heads = 1; heads <= 7; heads += 3) { // lightning: heads of 21
        synth_config c = *synth_find("minimax-01_tiny");
        char name[64];
        c.n_head = heads, c.n_kv = 1, c.head_dim = 21, c.rope = 10;
        snprintf(name, sizeof name, "minimax-01-%d.gguf", heads);
        if (synth_write_config(&c, models_path(name), NULL) != 0) exit(1);
        check_float(models_path(name), 40, 0);
    }
}

// Every quantized type and mix. Rows that do not fit a type's blocks are of another one, so that
// types meet in one model.
TEST(quantized_models_are_near_the_naive_pass) {
    static const char *const configs[] = {"qwen3moe_quant", "dsv3_quant", "dsv2_ragged"};
    static const char *const types[] = {"q4_0", "q8_0", "q4_K", "q5_K", "q6_K", "q4_K_M",
                                        "q5_K_M"};
    for (int c = 0; c < 3; c++)
        for (int t = 0; t < 7; t++)
            check_quantized(configs[c], types[t], c == 1 ? SYNTH_KVB_SPLIT : SYNTH_KVB_FUSED, 40,
                            c == 1 ? 1.5e-3 : 2e-4);
    for (int c = 0; c < MODELS_QUANTS; c++)
        for (int t = 0; t < 7; t++)
            check_quantized(models_quants[c], types[t], SYNTH_KVB_FUSED, 40, 1.5e-3);
}

// attn_kv_b alone, its two halves, all three; with either set of keys; in two dimensions or
// three. The weights are the same, so the truth is.
TEST(all_forms_of_latent_attention_match_the_naive_pass) {
    static const char *const configs[] = {"t_mla_groups", "t_mla_plain", "dsv3_tiny"};
    for (int c = 0; c < 3; c++) {
        double *first = NULL;
        for (int form = 0; form < 6; form++) {
            synth_options o;
            subject s;
            memset(&o, 0, sizeof o);
            o.kvb = form < 1 ? SYNTH_KVB_FUSED : form < 3 ? SYNTH_KVB_SPLIT : SYNTH_KVB_BOTH;
            o.flat_kvb = form == 2 || form == 4;
            o.mla_keys = form == 2 ? -1 : form == 5 ? 1 : 0;
            const char *path = models_write(configs[c], &o);
            check_float(path, 130, form == 1);
            if (!subject_open(&s, path, 20)) continue;
            double *truth = subject_naive(&s, 0, 0);
            if (truth && first) {
                double off = doubles_nmse(truth, first, (size_t)s.n * (size_t)s.n_vocab);
                CHECKF(off < 1e-20, "%s: %g", path, off);
                free(truth);
            } else {
                first = truth;
            }
            subject_close(&s);
        }
        free(first);
    }
}

enum { CONTEXTS = 11, CONTEXT = 4 };

// Logits of many short contexts: as the last bit of a float may decide how a value is rounded to
// 8 bits, and one such value changes everything that sees it, results are compared context by
// context; most of them are free of that.
static int run_contexts(const subject *s, moe_isa isa, int step, float *logits) {
    moe_session_options o;
    int good = 1;
    memset(&o, 0, sizeof o);
    o.isa = isa;
    o.kv_type = MOE_KV_F32;
    o.n_threads = 1;
    o.n_ctx = CONTEXT;
    o.keep_all_logits = MOE_ON;
    moe_session *session = moe_session_open(s->model, &o, NULL);
    for (int c = 0; c < CONTEXTS && session && good; c++)
        good = models_eval(session, s->tokens + c * CONTEXT, 0, CONTEXT, step,
                           logits + (size_t)(c * CONTEXT) * (size_t)s->n_vocab) &&
               moe_session_rewind(session, 0, NULL) == MOE_OK;
    moe_session_close(session);
    CHECKF(session && good, "%s", s->label);
    return session && good;
}

// With quantized weights the naive pass that rounds inputs to 8 bits as the engine does gives
// the same logits but for the rounding of floats. (Not so for MLA with quantized attn_k_b and
// attn_v_b: its absorbed form rounds something else. Rows of 16 make them F16 here.)
static void check_int8(const char *path, double limit) {
    subject s;
    if (subject_open(&s, path, CONTEXTS * CONTEXT)) {
        size_t V = (size_t)s.n_vocab;
        size_t count = CONTEXT * V;
        double *expected = (double *)malloc(sizeof(double) * CONTEXTS * count);
        float *logits = (float *)malloc(sizeof(float) * CONTEXTS * count);
        subject context = s;
        context.n = CONTEXT;
        for (int c = 0; c < CONTEXTS; c++) {
            context.tokens = s.tokens + c * CONTEXT;
            double *part = subject_naive(&context, 0, 1);
            if (part) memcpy(expected + (size_t)c * count, part, sizeof(double) * count);
            free(part);
        }
        printf("  %-24s naive with int8, median NMSE:", s.label);
        for (int i = 0; i < 6; i++) {
            moe_isa isa = models_isas[i / 2];
            if (!models_has_isa(isa) || !run_contexts(&s, isa, i % 2, logits)) continue;
            double off = models_median_row(logits, expected, s.n, s.n_vocab, 0);
            if (i % 2) printf(" %s %.1e", moe_isa_name(isa), off);
            CHECKF(off <= limit, "%s %s step %d: %g", s.label, moe_isa_name(isa), i % 2, off);
        }
        puts("");
        free(expected);
        free(logits);
    }
    subject_close(&s);
}

TEST(activations_of_8_bits_match_a_naive_pass_with_them) {
    static const char *const types[] = {"q4_0", "q8_0", "q4_K", "q5_K", "q6_K", "q4_K_M", "q5_K_M"};
    for (int t = 0; t < 7; t++) {
        synth_config c = *synth_find("dsv3_quant");
        synth_options o;
        char name[64];
        memset(&o, 0, sizeof o);
        o.type = types[t];
        c.kv_lora = 80;
        c.nope = 16;
        snprintf(name, sizeof name, "mla_f16_kvb-%s", types[t]);
        if (synth_write_config(&c, models_path(name), &o) != 0) exit(1);
        check_int8(models_path(name), 1e-10);
        check_int8(models_simple("qwen3moe_quant", types[t]), 1e-10);
    }
}

// Any tensor may be of any supported type, norms, biases and routers too: each in turn in each
// type, against the naive pass on the same file. (One that is refused must be so by name.)
static void check_other_type(edit_file *e, edit_tensor *t, uint32_t type, int *n_refused) {
    edit_tensor old = *t;
    moe_error error;
    size_t size = moe_type_row_size((moe_type)type, (int64_t)t->ne[0]);
    int64_t rows = (int64_t)(t->ne[1] * t->ne[2]);
    uint8_t *data = (uint8_t *)malloc(size * (size_t)rows);
    CHECK(moe_type_quantize((moe_type)type, (const float *)(const void *)old.data, data, rows,
                            (int64_t)t->ne[0], NULL, &error) == MOE_OK);
    t->type = type;
    t->data = data;
    t->size = size * (size_t)rows;
    edit_image image = edit_build(e);
    subject s;
    memset(&s, 0, sizeof s);
    int32_t tokens[20];
    moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, &error);
    moe_model *model = gguf ? moe_model_open_gguf(gguf, NULL, &error) : NULL;
    s.label = old.name;
    s.gguf = gguf;
    s.model = model;
    s.tokens = tokens;
    s.n = s.n_expected = 20;
    s.n_vocab = model ? moe_model_get_info(model)->n_vocab : 1;
    models_tokens(tokens, 20, s.n_vocab, 7);
    CHECKF(model || !strcmp(error.where, old.name), "%s: %s", error.where, error.text);
    *n_refused += model == NULL;
    double *truth = model ? subject_naive(&s, 0, 0) : NULL;
    if (truth) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.kv_type = MOE_KV_F32;
        float *logits = models_run(model, &o, tokens, 20, MODELS_ODD);
        double off = logits ? models_median_row(logits, truth, 20, s.n_vocab, 0) : INFINITY;
        double limit = moe_type_block((moe_type)type) > 1 ? 1e-3 : limit_f32;
        if (logits && off > limit && limit == 1e-3) { // inputs of 8 bits may swap experts, and a
            double *rounded = subject_naive(&s, 0, 1); // state remembers it: as the naive pass
            off = rounded ? models_median_row(logits, rounded, 20, s.n_vocab, 0) : INFINITY;
            limit = limit_f32;
            free(rounded);
        }
        CHECKF(off <= limit, "%s as %s: %g", old.name, moe_type_name((moe_type)type), off);
        free(logits);
    }
    free(truth);
    moe_model_close(model);
    moe_gguf_close(gguf);
    free(image.data);
    free(data);
    *t = old;
}

TEST(any_tensor_may_be_of_any_type_or_is_refused) {
    static const uint32_t types[] = {MOE_TYPE_F16, MOE_TYPE_BF16, MOE_TYPE_Q8_0, MOE_TYPE_Q4_0};
    static const int forms[] = {SYNTH_KVB_FUSED, SYNTH_KVB_FUSED, SYNTH_KVB_SPLIT, SYNTH_KVB_FUSED,
                                SYNTH_KVB_FUSED};
    static const char *const configs[] = {"micro", "micro_mla", "micro_mla", "micro_qwen2",
                                          "micro_oss"};
    int n_refused = 0;
    for (int b = 0; b < 5; b++) {
        synth_options o;
        edit_file e;
        memset(&o, 0, sizeof o);
        o.kvb = forms[b];
        CHECK(edit_open(&e, models_write(configs[b], &o)));
        for (int i = 0; i < e.n_tensors; i++)
            for (int t = 0; t < 4; t++)
                if (moe_type_row_size((moe_type)types[t], (int64_t)e.tensors[i].ne[0]))
                    check_other_type(&e, &e.tensors[i], types[t], &n_refused);
        edit_close(&e);
    }
    for (int b = 0; b < MODELS_HYBRIDS + MODELS_QUANTS; b++) { // what their recurrent layers hold
        edit_file e;
        const char *path = b < MODELS_HYBRIDS
                               ? models_hybrid(b)
                               : models_simple(models_quants[b - MODELS_HYBRIDS], "f32");
        CHECK(edit_open(&e, path));
        for (int i = 0; i < e.n_tensors; i++)
            for (int t = 0; t < 4; t++)
                if ((b >= MODELS_HYBRIDS ? t == i % 4
                                         : strstr(e.tensors[i].name, "blk.0.") ||
                                               strstr(e.tensors[i].name, "attn_gate")) &&
                    (!MODELS_SLOW || t == 2) &&
                    moe_type_row_size((moe_type)types[t], (int64_t)e.tensors[i].ne[0]))
                    check_other_type(&e, &e.tensors[i], types[t], &n_refused);
        edit_close(&e);
    }
    printf("  %d refused\n", n_refused);
}

// All forms at once in a quantized file: Q8_0 of the same values.
TEST(quantized_latent_attention_is_near_the_naive_pass) {
    check_quantized("dsv3_quant", "q4_K", SYNTH_KVB_BOTH, 40, 1.5e-3);
    check_quantized("dsv3_quant", "q8_0", SYNTH_KVB_FUSED, 150, 1.5e-3);
    check_quantized("dsv2_ragged", "q6_K", SYNTH_KVB_SPLIT, 150, 2e-4);
}

// More keys than one block of the attention holds, and prompts that begin behind others.
TEST(more_keys_than_a_block_match_the_naive_pass) {
    check_float(models_simple("micro", "f32"), MODELS_SLOW ? 600 : 1300, !MODELS_SLOW);
    check_float(models_simple("micro_mla", "f32"), MODELS_SLOW ? 600 : 1300, !MODELS_SLOW);
}

// Windows of every kind: shorter and longer than a block of keys, all there is, one key.
TEST(windows_of_any_size_match_the_naive_pass) {
    static const int windows[] = {1, 2, 100, 511, 512, 513, 700, 0x7FFFFFFF};
    for (int i = 0; i < (MODELS_SLOW ? 3 : 8); i++) {
        synth_config c = *synth_find(i % 2 ? "t_oss_wide" : "micro_oss");
        char name[64];
        c.window = windows[i];
        snprintf(name, sizeof name, "window%d.gguf", c.window);
        if (synth_write_config(&c, models_path(name), NULL) != 0) exit(1);
        check_float(models_path(name), i < 2 ? 200 : 1100, i < 2);
    }
}

// ---- the same model in other forms -----------------------------------------------------------

enum { FORM_TOKENS = 40 };

// A changed file, opened from memory.
typedef struct form {
    edit_image image;
    moe_gguf *gguf;
    moe_model *model;
} form;
static int form_open(form *f, const edit_file *e, const char *label) {
    moe_error error;
    f->image = edit_build(e);
    f->gguf = moe_gguf_open_memory(f->image.data, f->image.size, NULL, &error);
    f->model = f->gguf ? moe_model_open_gguf(f->gguf, NULL, &error) : NULL;
    CHECKF(f->model != NULL, "%s: %s: %s", label, error.where, error.text);
    return f->model != NULL;
}
static void form_close(form *f) {
    moe_model_close(f->model);
    moe_gguf_close(f->gguf);
    free(f->image.data);
}

// Logits of a changed file, if `naive` compared with the naive pass; the caller frees them.
static float *form_logits(const edit_file *e, const char *label, int naive) {
    form f;
    int32_t tokens[FORM_TOKENS];
    float *logits = NULL;
    subject s;
    memset(&s, 0, sizeof s);
    if (form_open(&f, e, label)) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.kv_type = MOE_KV_F32;
        o.n_threads = 2;
        s.label = label;
        s.gguf = f.gguf;
        s.model = f.model;
        s.tokens = tokens;
        s.n = s.n_expected = FORM_TOKENS;
        s.n_vocab = moe_model_get_info(f.model)->n_vocab;
        s.n_threads = 1;
        models_tokens(tokens, s.n, s.n_vocab, 7);
        double *truth = naive ? subject_naive(&s, 0, 0) : NULL;
        if (truth) {
            subject_demand(&s, "truth", MOE_KV_F32, truth, NMSE, limit_f32);
            check_demands(&s);
        }
        free(truth);
        logits = models_run(f.model, &o, tokens, FORM_TOKENS, MODELS_ODD);
        CHECKF(logits != NULL, "%s", label);
    }
    form_close(&f);
    return logits;
}

static edit_tensor *form_add(edit_file *e, int layer, const char *name, const edit_tensor *like) {
    edit_tensor *t = &e->tensors[e->n_tensors++];
    *t = *like;
    t->removed = 0;
    snprintf(t->name, sizeof t->name, "blk.%d.%s", layer, name);
    return t;
}
static edit_tensor *form_find(edit_file *e, int layer, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s", layer, name);
    return edit_find_tensor(e, full);
}

// blk.N.ffn_gate.E.weight and so on in place of blk.N.ffn_gate_exps.weight.
static void form_split_experts(edit_file *e, int layer) {
    static const char *const names[] = {"gate", "down", "up"};
    for (int expert = 0; expert < 4; expert++)
        for (int i = 0; i < 3; i++) {
            char name[32];
            snprintf(name, sizeof name, "ffn_%s_exps.weight", names[i]);
            edit_tensor *all = form_find(e, layer, name);
            snprintf(name, sizeof name, "ffn_%s.%d.weight", names[i], expert);
            edit_tensor *t = form_add(e, layer, name, all);
            all->removed = 1;
            t->n_dims = 2;
            t->ne[2] = 1;
            t->size = all->size / 4;
            t->data = all->data + (size_t)expert * t->size;
        }
}

static uint8_t *form_memory[16];
static int form_n_memory;

// Three or two tensors as one whose rows follow one another, part by part of each.
static void form_fuse(edit_file *e, int layer, const char *fused, const char *const *names, int n,
                      int n_parts) {
    edit_tensor *parts[3] = {NULL, NULL, NULL};
    size_t size = 0;
    for (int i = 0; i < n; i++) size += (parts[i] = form_find(e, layer, names[i]))->size;
    edit_tensor *t = form_add(e, layer, fused, parts[0]);
    uint8_t *data = (uint8_t *)malloc(size), *to = data;
    for (int p = 0; p < n_parts; p++)
        for (int i = 0; i < n; i++) {
            size_t part = parts[i]->size / (size_t)n_parts;
            memcpy(to, parts[i]->data + part * (size_t)p, part);
            to += part;
        }
    int rows = strstr(fused, ".bias") ? 0 : 1; // the dimension that grows
    for (int i = 0; i < n; i++) parts[i]->removed = 1;
    for (int i = 1; i < n; i++) t->ne[rows] += parts[i]->ne[rows];
    t->size = size;
    t->data = form_memory[form_n_memory++] = data;
}

// Old Mixtral files hold one tensor per expert; new files may hold gate and up, or query, key
// and value in one: the same bits.
TEST(fused_and_split_tensors_give_the_same_bits) {
    static const char *const qkv[] = {"attn_q.weight", "attn_k.weight", "attn_v.weight"};
    static const char *const qkv_bias[] = {"attn_q.bias", "attn_k.bias", "attn_v.bias"};
    static const char *const gate_up[] = {"ffn_gate_exps.weight", "ffn_up_exps.weight"};
    static const char *const gate_up_bias[] = {"ffn_gate_exps.bias", "ffn_up_exps.bias"};
    const size_t bytes = FORM_TOKENS * 264 * sizeof(float);
    for (int b = 0; b < 2; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_simple(b ? "micro_oss" : "micro_mixtral", "q8_0")));
        float *expected = form_logits(&e, "plain", 0);
        for (int layer = 0; layer < 2; layer++) {
            if (b == 0) form_split_experts(&e, layer);
            if (b == 1) form_fuse(&e, layer, "ffn_gate_up_exps.weight", gate_up, 2, 4);
            if (b == 1) form_fuse(&e, layer, "ffn_gate_up_exps.bias", gate_up_bias, 2, 4);
            form_fuse(&e, layer, "attn_qkv.weight", qkv, 3, 1);
            if (b == 1) form_fuse(&e, layer, "attn_qkv.bias", qkv_bias, 3, 1);
        }
        float *x = form_logits(&e, b ? "fused" : "split", 0);
        if (x && expected) CHECKF(!memcmp(x, expected, bytes), "%d", b);
        if (b == 1) { // one weight and three biases
            for (int layer = 0; layer < 2; layer++) {
                form_find(&e, layer, "attn_qkv.bias")->removed = 1;
                for (int i = 0; i < 3; i++) form_find(&e, layer, qkv_bias[i])->removed = 0;
            }
            free(x);
            x = form_logits(&e, "fused weights, biases apart", 0);
            if (x && expected) CHECK(!memcmp(x, expected, bytes));
        }
        if (b == 0) { // an expert of another type
            moe_error error;
            edit_tensor *t = form_find(&e, 1, "ffn_up.2.weight");
            t->type = MOE_TYPE_F32;
            edit_image image = edit_build(&e);
            moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, NULL);
            CHECK(gguf && !moe_model_open_gguf(gguf, NULL, &error));
            CHECKF(error.status == MOE_ERROR_UNSUPPORTED && !strcmp(error.where, t->name), "%s: %s",
                   error.where, error.text);
            t->removed = 1;
            moe_gguf_close(gguf);
            free(image.data);
        }
        free(x);
        free(expected);
        edit_close(&e);
    }
    while (form_n_memory) free(form_memory[--form_n_memory]);
}

// Keys that few files have.
TEST(rare_keys_match_the_naive_pass) {
    const size_t bytes = FORM_TOKENS * 264 * sizeof(float);
    float bound = 0.5f, factors[8];
    edit_file e;
    CHECK(edit_open(&e, models_simple("micro_olmoe", "f32")));
    edit_set(&e, "olmoe.attention.clamp_kqv", 6, &bound, 4);
    free(form_logits(&e, "clamp_kqv", 1));
    edit_close(&e);

    CHECK(edit_open(&e, models_simple("micro_mixtral", "f32")));
    edit_tensor *t = &e.tensors[e.n_tensors++];
    *t = e.tensors[1]; // a norm
    snprintf(t->name, sizeof t->name, "rope_freqs.weight");
    for (int i = 0; i < 8; i++) factors[i] = 1 + 0.5f * (float)i;
    t->ne[0] = 8;
    t->data = (const uint8_t *)factors;
    t->size = sizeof factors;
    free(form_logits(&e, "rope_freqs", 1));
    edit_close(&e);

    CHECK(edit_open(&e, models_simple("micro_qwen2", "f32")));
    float *expected = form_logits(&e, "with widths", 0);
    edit_find_value(&e, "qwen2moe.expert_feed_forward_length")->removed = 1;
    edit_find_value(&e, "qwen2moe.expert_shared_feed_forward_length")->removed = 1;
    float *x = form_logits(&e, "without widths", 0);
    if (x && expected) CHECK(!memcmp(x, expected, bytes));
    free(x);
    free(expected);
    edit_close(&e);
}

// The file with a key of 4 bytes set.
static void form_set(edit_file *e, const char *key, uint32_t type, const void *value) {
    edit_set(e, key, type, value, 4);
}

// Keys of many families: groups of experts, layers that predict, a bias under its other name.
TEST(keys_of_many_families_work_in_each) {
    const size_t bytes = FORM_TOKENS * 264 * sizeof(float);
    static const uint32_t one = 1, two = 2;
    static const char *const configs[] = {"micro", "micro_mixtral", "micro_qwen2", "micro_oss"};
    static const char *const archs[] = {"qwen3moe", "llama", "qwen2moe", "gpt-oss"};
    edit_file e;
    for (int i = 0; i < 4; i++) {
        char key[64];
        CHECK(edit_open(&e, models_simple(configs[i], "f32")));
        float *plain = form_logits(&e, configs[i], 0);
        snprintf(key, sizeof key, "%s.expert_group_count", archs[i]);
        edit_set(&e, key, 4, &two, 4);
        snprintf(key, sizeof key, "%s.expert_group_used_count", archs[i]);
        edit_set(&e, key, 4, &one, 4);
        float *x = form_logits(&e, "groups", i < 3); // gpt-oss: groups by scores, not by their
        if (x && plain) CHECKF(memcmp(x, plain, bytes), "%s", configs[i]); // exponentials
        free(x);
        snprintf(key, sizeof key, "%s.expert_group_count", archs[i]);
        edit_find_value(&e, key)->removed = 1;
        snprintf(key, sizeof key, "%s.nextn_predict_layers", archs[i]);
        edit_set(&e, key, 4, &one, 4);
        x = form_logits(&e, "the last layer predicts", 1);
        if (x && plain) CHECKF(memcmp(x, plain, bytes), "%s", configs[i]);
        free(x);
        free(plain);
        edit_close(&e);
    }
    CHECK(edit_open(&e, models_simple("micro_mla", "f32")));
    float *expected = form_logits(&e, "exp_probs_b.bias", 0);
    edit_tensor *bias = edit_find_tensor(&e, "blk.1.exp_probs_b.bias");
    CHECK(bias != NULL);
    if (bias) strcpy(bias->name, "blk.1.exp_probs_b");
    float *x = form_logits(&e, "exp_probs_b", 0);
    if (x && expected) CHECK(!memcmp(x, expected, bytes));
    free(x);
    free(expected);
    edit_close(&e);
}

// Which layers of gpt-oss have a window: an array, a period, none of both.
TEST(a_pattern_says_which_layers_have_a_window) {
    static const struct {
        uint32_t n, values[3]; // n 0: a period
    } patterns[] = {{3, {0, 1, 0}}, {3, {0, 0, 1}}, {2, {0, 1, 0}}, {0, {3, 0, 0}}, {0, {1, 0, 0}},
                    {0, {0, 0, 0}}, {3, {1, 1, 1}}};
    const size_t bytes = FORM_TOKENS * 264 * sizeof(float);
    for (int i = 0; i < 7; i++) {
        uint8_t array[24];
        const uint32_t type = 5;
        const uint64_t n = patterns[i].n;
        edit_file e;
        CHECK(edit_open(&e, models_simple("micro_oss", "f32")));
        float *plain = form_logits(&e, "window by default", 1);
        memcpy(array, &type, 4);
        memcpy(array + 4, &n, 8);
        memcpy(array + 12, patterns[i].values, 12);
        if (n)
            edit_set(&e, "gpt-oss.attention.sliding_window_pattern", 9, array, 12 + 4 * n);
        else
            form_set(&e, "gpt-oss.attention.sliding_window_pattern", 4, patterns[i].values);
        float *x = form_logits(&e, "window by pattern", 1);
        if (x && plain) CHECKF(memcmp(x, plain, bytes), "%d", i);
        free(x);
        free(plain);
        edit_close(&e);
    }
}

// Layers with a window may have a rope base of their own.
TEST(layers_with_a_window_may_have_their_own_rope_base) {
    static const float base = 777;
    double turned[2][8];
    for (int own = 0; own < 2; own++) {
        edit_file e;
        CHECK(edit_open(&e, models_simple("micro_oss", "f32")));
        form_set(&e, own ? "gpt-oss.rope.freq_base_swa" : "gpt-oss.rope.freq_base", 6, &base);
        edit_image image = edit_build(&e);
        moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, NULL);
        moe_model *model = gguf ? moe_model_open_gguf(gguf, NULL, NULL) : NULL;
        CHECK(model != NULL);
        if (model) {
            CHECK((model->layers[0].rope != model->layers[1].rope) == own);
            memcpy(turned[own], model->layers[0].rope->frequency, sizeof turned[0]);
        }
        moe_model_close(model);
        moe_gguf_close(gguf);
        free(image.data);
        edit_close(&e);
    }
    CHECK(!memcmp(turned[0], turned[1], sizeof turned[0]));
}

enum { HALVES = 200 };

// 200 tokens of a changed file, at once and in halves, against the naive pass. Latent attention
// has two forms, of which each must know all that the file says.
static void check_halves(const edit_file *e, const char *label, double *different) {
    form f;
    int32_t tokens[HALVES];
    subject s;
    memset(&s, 0, sizeof s);
    if (form_open(&f, e, label)) {
        const int V = moe_model_get_info(f.model)->n_vocab;
        const size_t count = (size_t)HALVES * (size_t)V;
        models_tokens(tokens, HALVES, V, 7);
        s.label = label, s.gguf = f.gguf, s.model = f.model;
        s.tokens = tokens, s.n = HALVES, s.n_vocab = V;
        double *truth = subject_naive(&s, 0, 0);
        for (int halves = 0; halves < 2 && truth; halves++) {
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.kv_type = MOE_KV_F32;
            float *x = models_run(f.model, &o, tokens, HALVES, halves ? HALVES / 2 : MODELS_WHOLE);
            const double off = x ? models_nmse(x, truth, count) : INFINITY;
            CHECKF(off <= limit_f32, "%s, %d: %g", label, halves, off);
            free(x);
        }
        if (truth && *different) CHECKF(fabs(truth[count - 1] - *different) > 1e-6, "%s", label);
        if (truth && !*different) *different = truth[count - 1];
        free(truth);
    }
    form_close(&f);
}

// NAME.scale of every matrix of latent attention, for all heads or each; {1} in real files.
TEST(scales_of_latent_attention_count) {
    static const float scales[2] = {2, 0.75f};
    static const char *const names[] = {"attn_kv_b.scale", "attn_k_b.scale", "attn_v_b.scale",
                                        "attn_q_a.scale", "attn_q_b.scale", "attn_kv_a_mqa.scale",
                                        "attn_output.scale"};
    static const edit_tensor scale = {"", 1, {1, 1, 1, 1}, 0, (const uint8_t *)scales, 4, 0};
    for (int split = 0; split < 2; split++) {
        synth_options o;
        edit_file e;
        double plain = 0;
        memset(&o, 0, sizeof o);
        o.kvb = split ? SYNTH_KVB_SPLIT : SYNTH_KVB_FUSED;
        CHECK(edit_open(&e, models_write("micro_mla", &o)));
        check_halves(&e, "no scale", &plain);
        for (int i = split ? 1 : 0; i < 7; i++) {
            if (!split && (i == 1 || i == 2)) continue;
            for (int heads = 1; heads <= (i < 3 ? 2 : 1); heads++) {
                edit_tensor *t = form_add(&e, 1, names[i], &scale);
                t->ne[0] = (uint64_t)heads;
                t->size = 4 * (size_t)heads;
                double none = 0; // q_a is normed: its scale changes nothing
                check_halves(&e, names[i], i == 3 ? &none : &plain);
                e.n_tensors--;
            }
        }
        edit_close(&e);
    }
}

// token_embd is read by rows, and as output if there is no other; an output has its own scale.
TEST(scales_of_embeddings_and_outputs_count) {
    static const float scales[1] = {1.7f};
    const size_t bytes = FORM_TOKENS * 264 * sizeof(float);
    for (int tied = 0; tied < 2; tied++) {
        synth_options o;
        edit_file e;
        memset(&o, 0, sizeof o);
        o.tied = tied;
        CHECK(edit_open(&e, models_write("micro", &o)));
        float *plain = form_logits(&e, "plain", 1);
        for (int i = 0; i < 2 - tied; i++) {
            edit_tensor *t = form_add(&e, 0, "", &e.tensors[0]);
            snprintf(t->name, sizeof t->name, i ? "output.scale" : "token_embd.scale");
            t->n_dims = 1;
            t->ne[0] = t->ne[1] = t->ne[2] = 1;
            t->type = 0;
            t->data = (const uint8_t *)scales;
            t->size = sizeof scales;
            float *x = form_logits(&e, t->name, 1);
            if (x && plain) CHECKF(memcmp(x, plain, bytes), "%s", t->name);
            free(x);
            e.n_tensors--;
        }
        free(plain);
        edit_close(&e);
    }
}

// deepseek2: queries far from the start times 1 + scale ln(floor(position / length) + 1).
TEST(temperature_scales_queries_far_from_the_start) {
    static const float scale = 0.7f;
    static const uint32_t length = 30;
    double plain = 0;
    edit_file e;
    CHECK(edit_open(&e, models_simple("micro_mla", "f32")));
    check_halves(&e, "no temperature", &plain);
    form_set(&e, "deepseek2.attention.temperature_length", 4, &length);
    form_set(&e, "deepseek2.attention.temperature_scale", 6, &scale);
    check_halves(&e, "temperature", &plain);
    edit_close(&e);
}

// A scale belongs to NVFP4 weights, whatever the family.
TEST(scales_of_nvfp4_weights_count_in_every_family) {
    static const char *const configs[] = {"micro", "micro_mixtral", "micro_qwen2", "micro_olmoe",
                                          "micro_oss", "micro_mla"};
    static const float scales[8] = {3, 0.4f, 2, 1.5f, 3, 0.4f, 2, 1.5f};
    for (int i = 0; i < 6; i++) {
        synth_config c = *synth_find(configs[i]);
        edit_file e;
        char name[64];
        uint8_t *data[32];
        int n_data = 0;
        c.n_embd = c.n_ff_exp = c.n_ff = 64;
        if (c.n_ff_shexp) c.n_ff_shexp = 64;
        snprintf(name, sizeof name, "nvfp4-%s", configs[i]);
        if (synth_write_config(&c, models_path(name), NULL) != 0) exit(1);
        CHECK(edit_open(&e, models_path(name)));
        for (int k = 0, n = e.n_tensors; k < n; k++) {
            edit_tensor *t = &e.tensors[k], *scale;
            char *dot = strstr(t->name, ".weight");
            if (!strstr(t->name, ".ffn_") || t->n_dims < 2 || !dot) continue;
            if (strstr(t->name, "gate_inp") || n_data == 32) continue;
            const int64_t rows = (int64_t)(t->ne[1] * t->ne[2]), n_in = (int64_t)t->ne[0];
            const size_t size = moe_type_row_size(MOE_TYPE_NVFP4, n_in) * (size_t)rows;
            data[n_data] = (uint8_t *)malloc(size);
            for (size_t b = 0; b < size; b++) // 4 scales of about 2^-5, 64 values
                data[n_data][b] = b % 36 < 4 ? (uint8_t)(0x10 + synth_random(9, b) % 8)
                                             : (uint8_t)synth_random((uint64_t)k, b);
            t->type = MOE_TYPE_NVFP4;
            t->data = data[n_data++];
            t->size = size;
            scale = &e.tensors[e.n_tensors++];
            memset(scale, 0, sizeof *scale);
            memcpy(scale->name, t->name, (size_t)(dot - t->name));
            memcpy(scale->name + (dot - t->name), ".scale", 7); // shorter than ".weight"
            scale->n_dims = 1;
            scale->ne[0] = t->n_dims == 3 ? t->ne[2] : 1;
            scale->ne[1] = scale->ne[2] = scale->ne[3] = 1;
            scale->data = (const uint8_t *)scales;
            scale->size = 4 * scale->ne[0];
        }
        CHECK(n_data > 5);
        subject s;
        int32_t tokens[FORM_TOKENS];
        moe_error error;
        edit_image image = edit_build(&e);
        memset(&s, 0, sizeof s);
        moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, &error);
        moe_model *model = gguf ? moe_model_open_gguf(gguf, NULL, &error) : NULL;
        CHECKF(model != NULL, "%s: %s: %s", configs[i], error.where, error.text);
        if (model) {
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.kv_type = MOE_KV_F32;
            s.label = configs[i], s.gguf = gguf, s.model = model, s.tokens = tokens;
            s.n = FORM_TOKENS, s.n_vocab = c.vocab;
            models_tokens(tokens, FORM_TOKENS, c.vocab, 7);
            double *truth = subject_naive(&s, 0, 0);
            float *x = models_run(model, &o, tokens, FORM_TOKENS, MODELS_ODD);
            double off = truth && x ? models_median_row(x, truth, FORM_TOKENS, c.vocab, 0) : 1;
            printf("  %-24s median NMSE %.1e\n", configs[i], off);
            CHECKF(off <= 1e-3, "%s: %g", configs[i], off);
            free(truth);
            free(x);
        }
        moe_model_close(model);
        moe_gguf_close(gguf);
        free(image.data);
        while (n_data) free(data[--n_data]);
        edit_close(&e);
    }
}

// Small files of ../shared/cases: what became of public reports.
TEST(files_of_public_reports_run_or_are_refused_by_name) {
    static const char *const run[] = {"01_plain", "01_temperature", "07_plain", "07_pattern",
                                      "08_yarn_nolog"};
    char path[128];
    double last[5] = {0, 0, 0, 0, 0};
    moe_error error;
    for (int i = 0; i < 5; i++) {
        edit_file e;
        snprintf(path, sizeof path, "../shared/cases/%s.gguf", run[i]);
        if (!edit_open(&e, path)) SKIP("%s", path);
        check_halves(&e, run[i], &last[i]);
        edit_close(&e);
    }
    CHECK(fabs(last[0] - last[1]) > 1e-6 && fabs(last[2] - last[3]) > 1e-6);
    CHECK(fabs(last[0] - last[4]) > 1e-6);
    moe_model *model =
        moe_model_open("../shared/cases/06_shared_expert_ignored.gguf", NULL, &error);
    CHECK(!model);
    if (!model) CHECKF(strstr(error.where, "_shexp"), "%s: %s", error.where, error.text);
    moe_model_close(model);
}

// A tensor made longer in one dimension: `columns` zeros behind each row, or more rows, which
// are copies of the first ones.
static void form_grow(edit_file *e, int layer, const char *name, int columns, int rows) {
    edit_tensor *t = form_find(e, layer, name);
    const size_t n_in = (size_t)t->ne[0], n_out = (size_t)t->ne[1];
    const size_t wide = n_in + (size_t)columns, high = n_out + (size_t)rows;
    float *out = (float *)calloc(wide * high, sizeof(float));
    for (size_t r = 0; r < high; r++)
        memcpy(out + r * wide, t->data + r % n_out * n_in * sizeof(float), n_in * sizeof(float));
    t->ne[0] = wide;
    t->ne[1] = high;
    t->size = wide * high * sizeof(float);
    t->data = form_memory[form_n_memory++] = (uint8_t *)out;
}

// Head counts of each layer: one with twice as many heads, of which the new ones do not count
// (attn_output multiplies them with 0) gives the same bits. An array that is too short is
// refused, and so are counts that do not go together.
TEST(layers_may_have_different_numbers_of_heads) {
    const size_t bytes = FORM_TOKENS * 264 * sizeof(float);
    uint8_t heads[28], heads_kv[28];
    edit_file e;
    CHECK(edit_open(&e, models_simple("micro", "f32")));
    float *expected = form_logits(&e, "two layers alike", 1);
    form_grow(&e, 1, "attn_q.weight", 0, 32);
    form_grow(&e, 1, "attn_k.weight", 0, 16);
    form_grow(&e, 1, "attn_v.weight", 0, 16);
    form_grow(&e, 1, "attn_output.weight", 32, 0);
    for (int i = 0; i < 2; i++) {
        uint8_t *to = i ? heads_kv : heads;
        const uint32_t type = 5, counts[2] = {i ? 1u : 2u, i ? 2u : 4u};
        const uint64_t n = 2;
        memcpy(to, &type, 4);
        memcpy(to + 4, &n, 8);
        memcpy(to + 12, counts, 8);
    }
    edit_set(&e, "qwen3moe.attention.head_count", 9, heads, 20);
    edit_set(&e, "qwen3moe.attention.head_count_kv", 9, heads_kv, 20);
    float *x = form_logits(&e, "heads by layer", 0);
    if (x && expected) CHECK(!memcmp(x, expected, bytes));
    free(x);
    free(expected);
    for (int way = 0; way < 3; way++) {
        const uint32_t three = 3, one = 1;
        moe_error error;
        memset(&error, 0, sizeof error);
        if (way == 0) memcpy(heads_kv + 16, &three, 4); // 4 heads cannot share 3
        if (way == 1) memcpy(heads + 16, &one, 4);      // the tensors are for 4
        if (way == 2) {                                 // an array of one
            const uint64_t n = 1;
            memcpy(heads_kv + 4, &n, 8);
            edit_set(&e, "qwen3moe.attention.head_count_kv", 9, heads_kv, 16);
        }
        edit_image image = edit_build(&e);
        moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, NULL);
        CHECK(gguf && !moe_model_open_gguf(gguf, NULL, &error));
        CHECKF(error.status == MOE_ERROR_FORMAT, "way %d: %s", way, error.text);
        CHECKF(strstr(error.where, way == 1 ? "attn" : "head_count_kv") != NULL ||
                   (way == 1 && strstr(error.where, "head_count")),
               "way %d: %s: %s", way, error.where, error.text);
        moe_gguf_close(gguf);
        free(image.data);
    }
    edit_close(&e);
    while (form_n_memory) free(form_memory[--form_n_memory]);
}

// attn_kv_b alone: its keys' half is transposed at opening, in the type of its floats: the bits
// of a file with attn_k_b and attn_v_b. Of quantized ones a Q8_0 is made; its bytes are counted.
TEST(keys_transposed_at_opening_have_the_same_bits) {
    static const char *const types[] = {"f32", "f16", "bf16", "q8_0"};
    for (int i = 0; i < 4; i++) {
        float *x[2] = {NULL, NULL};
        int64_t made = 0;
        for (int split = 0; split < 2; split++) {
            moe_session_options o;
            synth_options form;
            char name[64];
            int32_t tokens[30];
            memset(&o, 0, sizeof o);
            memset(&form, 0, sizeof form);
            form.type = types[i];
            form.kvb = split ? SYNTH_KVB_SPLIT : SYNTH_KVB_FUSED;
            form.mla_keys = 1;
            synth_config c = *synth_find("micro_mla");
            if (i == 3) c.nope = 32; // a block of Q8_0
            snprintf(name, sizeof name, "transposed-%s-%d.gguf", types[i], split);
            const char *path = models_path(name);
            if (synth_write_config(&c, path, &form) != 0) exit(1);
            moe_model *model = models_open(path);
            if (!model) continue;
            const moe_model_info *info = moe_model_get_info(model);
            const moe__layer *layer = &model->layers[0];
            const int64_t n = (int64_t)layer->n_head * layer->kv_lora *
                              (layer->head_k - layer->n_rot) * info->n_layer;
            if (!split) made = info->n_bytes_made;
            if (i < 3) CHECK(info->n_bytes_made == (split ? 0 : n * (i ? 2 : 4)));
            if (i == 3) CHECK(info->n_bytes_made == (split ? 0 : n / 32 * 34));
            models_tokens(tokens, 30, info->n_vocab, 3);
            o.kv_type = MOE_KV_F32;
            x[split] = models_run(model, &o, tokens, 30, 1);
            moe_model_close(model);
        }
        CHECK(made > 0);
        if (i < 3 && x[0] && x[1]) CHECK(!memcmp(x[0], x[1], 30 * 264 * sizeof(float)));
        free(x[0]);
        free(x[1]);
    }
}

// 1 to 8 experts per token, of few and of many.
TEST(any_number_of_experts_matches_the_naive_pass) {
    for (int used = 1; used <= 8; used++) {
        for (int many = 0; many < 2; many++) {
            synth_config c = *synth_find(used % 2 ? "t_mla_nobias" : "micro");
            char name[64];
            c.n_used = used;
            c.n_exp = many ? 61 : used;
            snprintf(name, sizeof name, "used%d-of-%d.gguf", used, c.n_exp);
            const char *path = models_path(name);
            if (synth_write_config(&c, path, NULL) != 0) exit(1);
            check_float(path, 50, 0);
        }
    }
}

// ---- the same bits ---------------------------------------------------------------------------

// Logits with 1 thread, then with others: no bit differs.
static void check_bits(const char *path, moe_isa isa, moe_kv_type kv_type, int n, int step,
                       const int *threads, int n_threads) {
    moe_model *model = models_open(path);
    CHECK(model != NULL);
    if (!model) return;
    int32_t *tokens = (int32_t *)malloc(sizeof(int32_t) * (size_t)n);
    size_t bytes = (size_t)n * (size_t)moe_model_get_info(model)->n_vocab * sizeof(float);
    float *expected = NULL;
    models_tokens(tokens, n, moe_model_get_info(model)->n_vocab, 3);
    for (int i = 0; i < n_threads; i++) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.isa = isa;
        o.kv_type = kv_type;
        o.n_threads = threads[i];
        o.n_threads_batch = i == 2 ? threads[i] + 2 : 0;
        o.n_batch = 40;
        float *logits = models_run(model, &o, tokens, n, step);
        CHECK(logits != NULL);
        if (logits && expected)
            CHECKF(memcmp(logits, expected, bytes) == 0, "%s: %d threads", path, o.n_threads);
        if (expected) free(logits);
        else expected = logits;
    }
    free(expected);
    free(tokens);
    moe_model_close(model);
}

// Batches that the caller cuts and those that the session cuts give the same bits.
static void check_cuts(const char *path) {
    moe_model *model = models_open(path);
    int32_t tokens[60];
    CHECK(model != NULL);
    if (!model) return;
    models_tokens(tokens, 60, moe_model_get_info(model)->n_vocab, 5);
    for (int32_t batch = 1; batch <= 20; batch += batch == 1 ? 5 : 14) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.kv_type = MOE_KV_Q8_0;
        o.n_threads = 2;
        o.n_batch = batch;
        float *whole = models_run(model, &o, tokens, 60, MODELS_WHOLE);
        float *cut = models_run(model, &o, tokens, 60, batch);
        CHECKF(whole && cut &&
                   !memcmp(whole, cut, 240 * (size_t)moe_model_get_info(model)->n_vocab),
               "%s: batches of %d", path, (int)batch);
        free(whole);
        free(cut);
    }
    moe_model_close(model);
}

// Thread counts up to more than any matrix has rows; the first one twice, for a second run.
TEST(the_number_of_threads_changes_no_bit) {
    static const int all[] = {1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 40}, few[] = {1, 2, 5};
    static const struct {
        const char *config, *type;
    } cases[] = {{"qwen3moe_tiny", "f32"}, {"qwen3moe_quant", "q4_K_M"}, {"dsv3_quant", "q5_K_M"},
                 {"dsv2_ragged", "q4_0"},  {"t_mla_groups", "bf16"},     {"t_qwen_odd", "f16"},
                 {"micro", "q8_0"},        {"micro_qwen2", "q8_0"},      {"t_olmoe_odd", "f32"},
                 {"t_oss_wide", "f16"},    {"micro_mixtral", "q4_0"}};
    for (int c = 0; c < 11; c++) {
        const char *path = models_simple(cases[c].config, cases[c].type);
        check_bits(path, MOE_ISA_BEST, MOE_KV_F16, 50, MODELS_ODD, all, 11);
        for (int i = 0; i < 3; i++)
            if (models_has_isa(models_isas[i]))
                check_bits(path, models_isas[i], MOE_KV_F32, 33, MODELS_WHOLE, few, 3);
    }
}

// Heads of a state, parts of their columns and channels are shared among threads.
TEST(the_number_of_threads_changes_no_bit_of_recurrent_layers) {
    static const int threads[] = {1, 2, 3, 5, 8, 40};
    for (int i = 0; i < MODELS_HYBRIDS; i++) {
        check_bits(models_hybrid(i), MOE_ISA_BEST, MOE_KV_F16, 70, MODELS_ODD, threads,
                   MODELS_SLOW ? 4 : 6);
        for (int k = 0; k < 3; k++)
            if (models_has_isa(models_isas[k]))
                check_bits(models_hybrid(i), models_isas[k], MOE_KV_F32, 50, MODELS_WHOLE, threads,
                           4);
    }
    for (int i = 0; i < MODELS_QUANTS; i++)
        check_bits(models_simple(models_quants[i], i % 2 ? "q4_K_M" : "q8_0"), MOE_ISA_BEST,
                   MOE_KV_F16, 50, MODELS_ODD, threads, 4);
}

// With many keys, several threads may share one head.
TEST(the_number_of_threads_changes_no_bit_of_deep_caches) {
    static const int threads[] = {1, 2, 3, 7};
    check_bits(models_simple("micro", "f32"), MOE_ISA_BEST, MOE_KV_F16, 1300, 433, threads, 4);
    check_bits(models_simple("micro_mla", "f32"), MOE_ISA_BEST, MOE_KV_F16, 1300, 433, threads, 4);
    check_bits(models_simple("t_oss_wide", "f32"), MOE_ISA_BEST, MOE_KV_F16, 1300, 433, threads, 4);
    check_bits(models_simple("micro_oss", "f32"), MOE_ISA_BEST, MOE_KV_F32, 600, 1, threads, 3);
    check_bits(models_simple("micro", "f32"), MOE_ISA_BEST, MOE_KV_F32, 600, 1, threads, 3);
    check_bits(models_simple("micro_mla", "f32"), MOE_ISA_BEST, MOE_KV_F32, 600, 1, threads, 3);
}

// Rows of one to three blocks, few queries per key and many, MLA absorbed and expanded, several
// blocks of keys; any number of threads gives the same bits.
TEST(q8_0_caches_match_and_ignore_threads_and_cuts) {
    static const int threads[] = {1, 2, 3, 4, 5};
    for (int i = 0; i < 6; i++) {
        synth_config c = *synth_find(i < 4 ? "micro" : "micro_mla");
        char name[64];
        c.head_dim = i == 3 ? 96 : 32 + 32 * (i % 2);
        c.n_head = i < 4 ? 1 + i * 3 : 5;
        c.n_kv = i == 1 ? 2 : 1;
        c.kv_lora = i < 4 ? 0 : 32 * i - 64;
        c.rope = i < 4 ? 0 : 32;
        snprintf(name, sizeof name, "q8_0-cache-%d.gguf", i);
        const char *path = models_path(name);
        if (synth_write_config(&c, path, NULL) != 0) exit(1);
        check_float(path, i == 2 || i == 4 ? 600 : 140, 2);
        check_bits(path, MOE_ISA_BEST, MOE_KV_Q8_0, 60, MODELS_ODD, threads, 5);
        check_bits(path, MOE_ISA_AVX2, MOE_KV_Q8_0, 60, MODELS_WHOLE, threads, 5);
        check_bits(path, MOE_ISA_BEST, MOE_KV_Q8_0, 520, 1, threads, 3);
        check_cuts(path);
    }
}

// ---- sessions and logits ---------------------------------------------------------------------

// What comes after a rewind is what a session gives that never saw the forgotten tokens.
static void check_rewind(const char *path, moe_isa isa) {
    moe_model *model = models_open(path);
    moe_session_options o;
    CHECK(model != NULL);
    if (!model) return;
    int32_t a[60], b[60];
    size_t V = (size_t)moe_model_get_info(model)->n_vocab;
    size_t bytes = 60 * V * sizeof(float);
    float *x = (float *)malloc(bytes), *y = (float *)malloc(bytes);
    models_tokens(a, 60, (int)V, 1);
    models_tokens(b, 60, (int)V, 2);
    memcpy(b, a, 20 * sizeof a[0]);
    memset(&o, 0, sizeof o);
    o.isa = isa;
    o.n_ctx = 60;
    o.keep_all_logits = MOE_ON;
    moe_session *first = moe_session_open(model, &o, NULL);
    moe_session *second = moe_session_open(model, &o, NULL);
    CHECK(first && second);
    CHECK(models_eval(first, a, 0, 20, 0, x) && models_eval(first, a, 20, 60, 0, x));
    CHECK(moe_session_rewind(first, 40, NULL) == MOE_OK && moe_session_length(first) == 40);
    CHECK(moe_session_rewind(first, 20, NULL) == MOE_OK && moe_session_length(first) == 20);
    CHECK(models_eval(first, b, 20, 45, 0, x) && models_eval(first, b, 45, 60, 1, x));
    CHECK(models_eval(second, b, 0, 20, 0, y) && models_eval(second, b, 20, 45, 0, y) &&
          models_eval(second, b, 45, 60, 1, y));
    CHECKF(memcmp(x, y, bytes) == 0, "%s", path);
    CHECK(moe_session_rewind(first, 0, NULL) == MOE_OK && moe_session_length(first) == 0);
    CHECK(models_eval(first, b, 0, 20, 0, x));
    CHECK(memcmp(x, y, bytes / 3) == 0);
    moe_session_close(second);
    moe_session_close(first);
    free(x);
    free(y);
    moe_model_close(model);
}

TEST(a_rewound_session_is_as_one_that_never_saw_more) {
    for (int i = 0; i < 3; i++) {
        check_rewind(models_simple("qwen3moe_quant", "q4_K_M"), models_isas[i]);
        check_rewind(models_simple("dsv3_quant", "q4_0"), models_isas[i]);
        check_rewind(models_simple("t_mla_groups", "f32"), models_isas[i]);
        check_rewind(models_simple("t_oss_wide", "f32"), models_isas[i]);
        for (int k = 0; k < MODELS_HYBRIDS; k++) check_rewind(models_hybrid(k), models_isas[i]);
        for (int k = 0; k < MODELS_QUANTS; k++)
            check_rewind(models_simple(models_quants[k], "q4_K_M"), models_isas[i]);
    }
}

// Which rows of logits there are, with and without keep_all_logits; that the last one does not
// depend on it.
TEST(logits_are_kept_of_all_tokens_or_the_last) {
    moe_model *model = models_open(models_simple("qwen3moe_quant", "q8_0"));
    moe_session_options o;
    int32_t tokens[30];
    CHECK(model != NULL);
    if (!model) return;
    size_t V = (size_t)moe_model_get_info(model)->n_vocab;
    models_tokens(tokens, 30, (int)V, 5);
    memset(&o, 0, sizeof o);
    o.n_batch = 8; // the 30 tokens are four batches
    o.keep_all_logits = MOE_ON;
    moe_session *all = moe_session_open(model, &o, NULL);
    o.keep_all_logits = MOE_OFF;
    moe_session *last = moe_session_open(model, &o, NULL);
    CHECK(all && last);
    CHECK(moe_session_logits(all, -1) == NULL && moe_session_logits(all, 0) == NULL);
    CHECK(moe_session_logits(last, -1) == NULL && moe_session_logits(last, 0) == NULL);
    CHECK(moe_session_eval(all, tokens, 30, NULL) == MOE_OK);
    CHECK(moe_session_eval(last, tokens, 30, NULL) == MOE_OK);
    for (int i = 0; i < 30; i++) {
        CHECK(moe_session_logits(all, i) != NULL);
        CHECK((moe_session_logits(last, i) != NULL) == (i == 29));
    }
    static const int none[] = {30, 31, -2, -30, INT_MAX, INT_MIN};
    for (int i = 0; i < 6; i++) {
        CHECK(moe_session_logits(all, none[i]) == NULL);
        CHECK(moe_session_logits(last, none[i]) == NULL);
    }
    const float *x = moe_session_logits(all, -1), *y = moe_session_logits(last, -1);
    CHECK(x == moe_session_logits(all, 29) && y == moe_session_logits(last, 29));
    CHECK(x && y);
    if (x && y) {
        double *r = models_doubles(x, V);
        double nmse = models_nmse(y, r, V);
        CHECKF(nmse < 1e-10, "%g", nmse);
        free(r);
    }
    CHECK(moe_session_eval(all, tokens, 1, NULL) == MOE_OK);
    CHECK(moe_session_logits(all, 0) && !moe_session_logits(all, 1)); // of the last eval only
    moe_session_close(all);
    moe_session_close(last);
    moe_model_close(model);
}

// Instruction sets differ by the rounding of floats only.
static void check_isas(const char *path) {
    subject s;
    if (subject_open(&s, path, CONTEXTS * CONTEXT)) {
        size_t n = (size_t)s.n * (size_t)s.n_vocab;
        float *x = (float *)malloc(sizeof(float) * n);
        double *expected = NULL;
        for (int i = 0; i < 6; i++) {
            if (!models_has_isa(models_isas[i / 2])) continue;
            if (!run_contexts(&s, models_isas[i / 2], i % 2, x)) continue;
            if (!expected) {
                expected = models_doubles(x, n);
            } else {
                double off = models_median_row(x, expected, s.n, s.n_vocab, 0);
                CHECKF(off < 1e-10, "%s %s: %g", s.label, moe_isa_name(models_isas[i / 2]), off);
            }
        }
        free(expected);
        free(x);
    }
    subject_close(&s);
}

TEST(instruction_sets_agree_but_for_rounding) {
    for (int t = 0; t < SYNTH_N_TYPES; t++) {
        if (!moe_type_supported((moe_type)synth_types[t].id)) continue;
        check_isas(models_simple("qwen3moe_quant", synth_types[t].name));
        check_isas(models_simple("dsv3_quant", synth_types[t].name));
        check_isas(models_simple("dsv2_ragged", synth_types[t].name));
        check_isas(models_simple(models_quants[t % MODELS_QUANTS], synth_types[t].name));
    }
    for (int i = 0; i < MODELS_HYBRIDS; i++) check_isas(models_hybrid(i));
}

// Facts about a model that do not need a run.
TEST(a_models_info_agrees_with_its_file) {
    moe_model *model = models_open(models_simple("dsv3_quant", "q4_K"));
    CHECK(model != NULL);
    if (!model) return;
    const moe_model_info *info = moe_model_get_info(model);
    const moe_gguf *gguf = moe_model_gguf(model);
    int64_t n_params = 0, n_bytes = 0;
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *t = moe_gguf_tensor_at(gguf, i);
        n_params += t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
        n_bytes += (int64_t)t->size;
    }
    CHECK(!strcmp(info->family, "deepseek2") && !strncmp(info->name, "synthetic dsv3_quant", 20));
    CHECK(info->n_vocab == 384 && info->n_layer == 3 && info->n_embd == 256 && info->n_head == 2);
    CHECK(info->n_ctx_train == 163840 && info->n_expert == 4 && info->n_expert_used == 2);
    CHECK(info->n_expert_shared == 1 && info->n_ff == 256 && info->n_ff_exp == 256);
    CHECKF(info->n_params == n_params, "%lld %lld", (long long)info->n_params, (long long)n_params);
    CHECKF(info->n_bytes == n_bytes, "%lld %lld", (long long)info->n_bytes, (long long)n_bytes);
    CHECK(info->n_bytes_token > 0 && info->n_bytes_token < info->n_bytes);
    moe_model_close(model);
}

// ---- the generator and the naive pass themselves ---------------------------------------------

// Tensors of every type have the spread that was asked for, and no mean to speak of.
TEST(synthetic_tensors_have_the_spread_asked_for) {
    for (int i = 0; i < SYNTH_N_TYPES; i++) {
        if (!moe_type_supported((moe_type)synth_types[i].id)) continue;
        moe_error error;
        moe_gguf *gguf = moe_gguf_open(models_simple("qwen3moe_quant", synth_types[i].name), NULL,
                                       &error);
        CHECK(gguf != NULL);
        if (!gguf) continue;
        const moe_gguf_tensor *t = moe_gguf_find_tensor(gguf, "blk.1.ffn_up_exps.weight");
        CHECK(t && t->type == (moe_type)synth_types[i].id);
        if (t) {
            int64_t n = t->ne[0] * t->ne[1] * t->ne[2];
            float *w = (float *)malloc((size_t)n * sizeof(float));
            double sum = 0, squares = 0;
            CHECK(moe_type_dequantize(t->type, t->data, w, n / t->ne[0], t->ne[0], NULL) == MOE_OK);
            for (int64_t j = 0; j < n; j++) {
                sum += (double)w[j];
                squares += (double)w[j] * (double)w[j];
            }
            double mean = sum / (double)n * 16, std = sqrt(squares / (double)n) * 16;
            CHECKF(fabs(mean) < 0.15 && fabs(std - 1) < 0.1, "%s: mean %g, deviation %g",
                   synth_types[i].name, mean, std);
            free(w);
        }
        moe_gguf_close(gguf);
    }
}

// ---- reference results -----------------------------------------------------------------------

#define GOLDEN "../shared/golden/"

typedef struct golden {
    moe_gguf *gguf;
    subject s;
    double *expected;
} golden;

// Model file, tokens and expected logits. 0 if one of them is missing.
static int golden_open(golden *g, const char *model, const char *tokens, const char *expected) {
    size_t count = 0;
    float *floats = models_read_floats(expected, &count);
    moe_error error;
    memset(g, 0, sizeof *g);
    g->gguf = moe_gguf_open(model, NULL, &error);
    g->s.tokens = models_read_tokens(tokens, &g->s.n);
    if (floats) g->expected = models_doubles(floats, count);
    free(floats);
    if (!g->gguf || !g->s.tokens || !g->expected) return 0;
    const moe_gguf_tensor *embd = moe_gguf_find_tensor(g->gguf, "token_embd.weight");
    g->s.gguf = g->gguf;
    g->s.n_vocab = embd ? (int)embd->ne[1] : 1;
    g->s.n_expected = (int)(count / (size_t)g->s.n_vocab);
    g->s.label = strrchr(model, '/') + 1;
    g->s.n_threads = 1;
    return 1;
}
// The engine's model; 0 (a failure) if it is refused.
static int golden_open_model(golden *g) {
    moe_error error;
    g->s.model = moe_model_open_gguf(g->gguf, NULL, &error);
    CHECKF(g->s.model != NULL, "%s: %s: %s", g->s.label, error.where, error.text);
    return g->s.model != NULL;
}
static void golden_close(golden *g) {
    int demanded = 0;
    for (int i = 0; i < g->s.n_demands; i++) demanded |= g->s.demands[i].expected == g->expected;
    if (!demanded) free(g->expected);
    subject_close(&g->s);
    moe_gguf_close(g->gguf);
}

static void check_naive(const char *model, const char *tokens, const char *expected) {
    golden g;
    if (!golden_open(&g, model, tokens, expected)) {
        golden_close(&g);
        SKIP("%s", model);
    }
    double *x = subject_naive(&g.s, 0, 0);
    if (x) {
        double nmse = doubles_nmse(x, g.expected, (size_t)g.s.n * (size_t)g.s.n_vocab);
        printf("  %-24s NMSE %.1e\n", g.s.label, nmse);
        CHECKF(nmse < 1e-10 && g.s.n == g.s.n_expected, "%s: %g", g.s.label, nmse);
    }
    free(x);
    golden_close(&g);
}

static const char *const families[] = {"deepseek2", "gpt-oss",  "llama",
                                       "olmoe",     "qwen2moe", "qwen3moe"};

static const char *const recurrent[] = {"bailingmoe3",    "granitehybrid", "jamba",
                                        "kimi-linear",    "lfm2moe",       "minimax-01",
                                        "nemotron_h_moe", "qwen35moe",     "qwen3next"};
enum { RECURRENT = sizeof recurrent / sizeof recurrent[0] };

// The naive pass gives llama.cpp's logits: it may judge the engine.
TEST(the_naive_pass_gives_llama_cpps_logits) {
    check_naive(GOLDEN "logits/dsv2.gguf", GOLDEN "logits/tokens512.txt",
                GOLDEN "logits/dsv2.logits.f32");
    check_naive(GOLDEN "logits/dsv3.gguf", GOLDEN "logits/tokens512.txt",
                GOLDEN "logits/dsv3.logits.f32");
    check_naive(GOLDEN "logits/qwen3moe.gguf", GOLDEN "logits/tokens512.txt",
                GOLDEN "logits/qwen3moe.logits.f32");
    static const char *const logits[] = {"mixtral", "qwen2moe", "olmoe", "gptoss"};
    for (int i = 0; i < 4; i++) {
        char model[128], expected[128];
        snprintf(model, sizeof model, GOLDEN "logits/%s.gguf", logits[i]);
        snprintf(expected, sizeof expected, GOLDEN "logits/%s.logits.f32", logits[i]);
        check_naive(model, GOLDEN "logits/tokens512.txt", expected);
    }
    for (int i = 0; i < 6; i++) {
        char model[128], expected[128];
        snprintf(model, sizeof model, GOLDEN "families/%s.gguf", families[i]);
        snprintf(expected, sizeof expected, GOLDEN "families/%s.logits.f32", families[i]);
        check_naive(model, GOLDEN "families/tokens128.txt", expected);
    }
    for (int i = 0; i < RECURRENT; i++) {
        char model[128], expected[128];
        snprintf(model, sizeof model, GOLDEN "archs/%s.gguf", recurrent[i]);
        snprintf(expected, sizeof expected, GOLDEN "archs/%s.logits.f32", recurrent[i]);
        check_naive(model, GOLDEN "archs/tokens.txt", expected);
    }
}

static void check_golden(const char *model, const char *tokens, const char *expected,
                         double limit) {
    golden g;
    int there = golden_open(&g, model, tokens, expected);
    if (there && golden_open_model(&g)) {
        subject_demand(&g.s, "llama.cpp", MOE_KV_F32, g.expected, NMSE, limit);
        subject_demand_f16(&g.s, g.expected);
        subject_demand_q8_0(&g.s, g.expected);
        check_demands(&g.s);
    }
    golden_close(&g);
    if (!there) SKIP("%s", model);
}

#define GOLDEN_LOGITS(name)                                                               \
    TEST(logits_of_##name##_match_llama_cpp) {                                            \
        check_golden(GOLDEN "logits/" #name ".gguf", GOLDEN "logits/tokens512.txt",       \
                     GOLDEN "logits/" #name ".logits.f32", limit_f32);                    \
    }
GOLDEN_LOGITS(dsv2)
GOLDEN_LOGITS(dsv3)
GOLDEN_LOGITS(qwen3moe)
GOLDEN_LOGITS(mixtral)
GOLDEN_LOGITS(qwen2moe)
GOLDEN_LOGITS(olmoe)
GOLDEN_LOGITS(gptoss)
TEST(logits_of_other_families_match_llama_cpp) {
    for (int i = 0; i < 6; i++) {
        char model[128], expected[128];
        snprintf(model, sizeof model, GOLDEN "families/%s.gguf", families[i]);
        snprintf(expected, sizeof expected, GOLDEN "families/%s.logits.f32", families[i]);
        check_golden(model, GOLDEN "families/tokens128.txt", expected, limit_family);
    }
}

// What the architectures of today make of layers: windows by array, layers without rope, with
// another one, scales, norms behind, gates. Whole, one by one and in pieces.
TEST(logits_of_todays_architectures_match_llama_cpp) {
    static const char *const archs[] = {"afmoe",  "deepseek2",  "dots1", "exaone-moe",
                                        "gpt-oss", "granitemoe", "llama", "mellum",
                                        "olmoe",  "qwen2moe",   "qwen3moe"};
    for (size_t i = 0; i < sizeof archs / sizeof archs[0]; i++) {
        char model[128], expected[128];
        golden g;
        snprintf(model, sizeof model, GOLDEN "archs/%s.gguf", archs[i]);
        snprintf(expected, sizeof expected, GOLDEN "archs/%s.logits.f32", archs[i]);
        const int there = golden_open(&g, model, GOLDEN "archs/tokens.txt", expected);
        if (there && golden_open_model(&g)) {
            subject_demand(&g.s, "llama.cpp", MOE_KV_F32, g.expected, NMSE, limit_arch);
            check_demands(&g.s);
        }
        golden_close(&g);
        if (!there) SKIP("%s", model);
    }
}

// Recurrent layers: whole, one by one and in sevens, on every instruction set, with one thread and
// with three.
static void check_golden_recurrent(const char *arch) {
    static const moe_isa isas[] = {MOE_ISA_SCALAR, MOE_ISA_AVX2, MOE_ISA_AVX_VNNI, MOE_ISA_AVX512};
    static const int steps[] = {MODELS_WHOLE, 1, 7};
    char model[128], expected[128];
    golden g;
    snprintf(model, sizeof model, GOLDEN "archs/%s.gguf", arch);
    snprintf(expected, sizeof expected, GOLDEN "archs/%s.logits.f32", arch);
    const int there = golden_open(&g, model, GOLDEN "archs/tokens.txt", expected);
    if (there && golden_open_model(&g)) {
        const size_t count = (size_t)g.s.n * (size_t)g.s.n_vocab;
        CHECK(g.s.n == g.s.n_expected);
        printf("  %-24s kv f32, llama.cpp, NMSE:", g.s.label);
        for (int i = 0; i < 4; i++) {
            double worst = 0;
            float *first = NULL;
            if (!models_has_isa(isas[i])) continue;
            for (int k = 0; k < 3; k++)
                for (int threads = 1; threads <= 3; threads += 2) {
                    moe_session_options o;
                    memset(&o, 0, sizeof o);
                    o.isa = isas[i];
                    o.kv_type = MOE_KV_F32;
                    o.n_threads = threads;
                    o.n_batch = threads == 3 ? 33 : 0;
                    float *x = models_run(g.s.model, &o, g.s.tokens, g.s.n, steps[k]);
                    const double off = x ? models_nmse(x, g.expected, count) : INFINITY;
                    CHECKF(off <= limit_arch, "%s %s, %d threads, step %d: %g", arch,
                           moe_isa_name(isas[i]), threads, steps[k], off);
                    worst = fmax(worst, off);
                    CHECKF(!first || (x && !memcmp(x, first, count * sizeof *x)),
                           "%s %s, %d threads, step %d: other bits", arch, moe_isa_name(isas[i]),
                           threads, steps[k]);
                    models_keep_first(&first, x);
                }
            free(first);
            printf(" %s %.1e", moe_isa_name(isas[i]), worst);
        }
        puts("");
    }
    free(g.expected);
    g.expected = NULL;
    golden_close(&g);
    if (!there) SKIP("%s", model);
}
TEST(logits_of_recurrent_architectures_match_llama_cpp) {
    for (int i = 0; i < RECURRENT; i++) check_golden_recurrent(recurrent[i]);
}

// Random weights make experts nearly tied (dsv3: two scores at position 250, by one rounding). An
// instruction set may choose the other one, which shows at the end; then another must not.
static int is_near_with_another_isa(const golden *g, const moe_session_options *options) {
    const size_t V = (size_t)g->s.n_vocab, at = (size_t)(g->s.n - g->s.n_expected) * V;
    int near = 0;
    for (int isa = MOE_ISA_SCALAR; isa <= MOE_ISA_AVX_VNNI && !near; isa++) {
        moe_session_options o = *options;
        o.isa = (moe_isa)isa;
        if (moe_isa_resolve(o.isa) != o.isa) continue;
        float *x = models_run(g->s.model, &o, g->s.tokens, g->s.n, 512);
        near = x && models_nmse(x + at, g->expected, (size_t)g->s.n_expected * V) <= limit_long;
        free(x);
    }
    return near;
}

// 5000 tokens in batches of 512, cut by the caller and by the session: the same bits, and close
// to the reference at the end.
static void check_long(const char *name) {
    char model[128], expected[128];
    golden g;
    snprintf(model, sizeof model, GOLDEN "logits/%s.gguf", name);
    snprintf(expected, sizeof expected, GOLDEN "logits/%s.long_last16.f32", name);
    if (!golden_open(&g, model, GOLDEN "logits/long_tokens512.txt", expected)) {
        golden_close(&g);
        SKIP("%s", model);
    }
    for (int kv = MODELS_SLOW; kv < 2 && (g.s.model || golden_open_model(&g)); kv++) {
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.n_threads = 2;
        o.kv_type = kv ? MOE_KV_F16 : MOE_KV_F32;
        o.n_batch = 512;
        float *x = models_run(g.s.model, &o, g.s.tokens, g.s.n, 512), *y = NULL;
        int twice = kv && !MODELS_SLOW && moe_model_get_info(g.s.model)->n_layer < 10;
        if (twice) y = models_run(g.s.model, &o, g.s.tokens, g.s.n, MODELS_WHOLE);
        CHECK(x && (y || !twice));
        if (x) {
            size_t V = (size_t)g.s.n_vocab;
            double nmse = models_nmse(x + (size_t)(g.s.n - g.s.n_expected) * V, g.expected,
                                      (size_t)g.s.n_expected * V);
            printf("  %-24s %-6s kv %s last %d of %d, NMSE %.1e\n", g.s.label,
                   moe_isa_name(moe_isa_resolve(MOE_ISA_BEST)), kv ? "f16" : "f32",
                   g.s.n_expected, g.s.n, nmse);
            const int tied = !kv && nmse > limit_long && nmse < 1e-4 &&
                             is_near_with_another_isa(&g, &o);
            CHECKF(nmse <= (kv ? limit_f16 : limit_long) || tied, "%s: %g", g.s.label, nmse);
            if (y) CHECK(memcmp(x, y, (size_t)g.s.n * V * sizeof(float)) == 0);
        }
        free(x);
        free(y);
    }
    golden_close(&g);
}

TEST(dsv2_matches_llama_cpp_behind_5000_tokens) {
    if (MODELS_SLOW) SKIP("too slow with a sanitizer");
    check_long("dsv2");
}
TEST(dsv3_matches_llama_cpp_behind_5000_tokens) { check_long("dsv3"); }
TEST(qwen3moe_matches_llama_cpp_behind_5000_tokens) { check_long("qwen3moe"); }
TEST(gptoss_matches_llama_cpp_behind_5000_tokens) { check_long("gptoss"); }

// A quantized model against its weights in F32: as close as 1.5 times llama.cpp's own distance,
// by the median row. A type that cannot be run yet is refused with its name and the tensor's.
static void check_golden_quantized(const char *name) {
    char model[128], truth[128], theirs[128];
    golden g;
    snprintf(model, sizeof model, GOLDEN "quantized/%s.gguf", name);
    snprintf(truth, sizeof truth, GOLDEN "quantized/%s.truth.f32", name);
    snprintf(theirs, sizeof theirs, GOLDEN "quantized/%s.llamacpp.f32", name);
    if (!golden_open(&g, model, GOLDEN "quantized/tokens384.txt", truth)) {
        golden_close(&g);
        SKIP("%s", model);
    }
    const char *unsupported = NULL;
    for (int64_t i = 0; i < moe_gguf_n_tensors(g.gguf) && !unsupported; i++) {
        const moe_gguf_tensor *t = moe_gguf_tensor_at(g.gguf, i);
        if (!moe_type_supported(t->type)) unsupported = moe_type_name(t->type);
    }
    if (unsupported) {
        moe_error error;
        memset(&error, 0, sizeof error);
        g.s.model = moe_model_open_gguf(g.gguf, NULL, &error);
        printf("  %-24s refused (%s): %s: %s\n", g.s.label, unsupported, error.where, error.text);
        CHECK(g.s.model == NULL && error.status == MOE_ERROR_UNSUPPORTED);
        const moe_gguf_tensor *t = moe_gguf_find_tensor(g.gguf, error.where);
        CHECK(t && !moe_type_supported(t->type));
        CHECK(t && strstr(error.text, moe_type_name(t->type)));
    } else if (golden_open_model(&g)) {
        size_t count;
        float *x = models_read_floats(theirs, &count);
        double kl = 0, limit = 2e-4;
        if (x) kl = models_median_row(x, g.expected, g.s.n_expected, g.s.n_vocab, 1);
        if (x) limit = fmax(1.5 * kl, 1e-12);
        printf("  %-24s llama.cpp's median KL %.1e\n", g.s.label, kl);
        free(x);
        subject_demand(&g.s, "truth", MOE_KV_F32, g.expected, MEDIAN_KL, limit);
        check_demands(&g.s);
    }
    golden_close(&g);
}

TEST(quantized_models_are_about_as_near_as_llama_cpps) {
    static const char *const names[] = {
        "dsv3.IQ4_XS",      "dsv3.Q2_K",          "dsv3.Q4_K_M",     "qwen3moe.BF16",
        "qwen3moe.IQ2_K",   "qwen3moe.IQ2_K_R4",  "qwen3moe.IQ3_S",  "qwen3moe.IQ4_K",
        "qwen3moe.IQ4_K_R4", "qwen3moe.IQ4_NL",   "qwen3moe.IQ4_XS", "qwen3moe.MXFP4_MOE",
        "qwen3moe.Q2_K",    "qwen3moe.Q3_K_M",    "qwen3moe.Q4_0",   "qwen3moe.Q4_1",
        "qwen3moe.Q4_K_M",  "qwen3moe.Q4_K_R4",   "qwen3moe.Q5_0",   "qwen3moe.Q5_1",
        "qwen3moe.Q5_K_M",  "qwen3moe.Q5_K_R4",   "qwen3moe.Q6_K",   "qwen3moe.Q6_K_R4",
        "qwen3moe.Q8_0",    "qwen3moe.Q8_0_R8"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) check_golden_quantized(names[i]);
}

MAIN()
