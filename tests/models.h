// What the tests of models share: small models written on the spot, running a list of tokens
// through a session in pieces, reference files, and measures of how far logits are apart.
#ifndef MODELS_H
#define MODELS_H
#include "test.h"
#define SYNTH_NO_MAIN
#include "../bench/synth.c"
#include <math.h>

#define MODELS_FN __attribute__((unused)) static

// With a sanitizer everything takes 5 to 20 times as long: the tests do less then.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MODELS_SLOW 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define MODELS_SLOW 1
#endif
#endif
#ifndef MODELS_SLOW
#define MODELS_SLOW 0
#endif

// ---- files -----------------------------------------------------------------------------------

enum { MODELS_MAX_FILES = 512 };
static char *models_files[MODELS_MAX_FILES]; // written by this process, removed at its end
static int models_n_files;
static char models_folder[64];

MODELS_FN void models_clean(void) {
    for (int i = 0; i < models_n_files; i++) {
        remove(models_files[i]);
        free(models_files[i]);
    }
    models_n_files = 0;
    if (*models_folder) rmdir(models_folder);
}

// A path in this process's own folder below build/. What is written there disappears at exit.
MODELS_FN const char *models_path(const char *name) {
    char path[256];
    if (!*models_folder) {
        mkdir("build", 0777);
        snprintf(models_folder, sizeof models_folder, "build/models.%ld", (long)getpid());
        mkdir(models_folder, 0777);
        atexit(models_clean);
    }
    snprintf(path, sizeof path, "%s/%s", models_folder, name);
    for (int i = 0; i < models_n_files; i++)
        if (!strcmp(models_files[i], path)) return models_files[i];
    if (models_n_files == MODELS_MAX_FILES) {
        puts("too many files");
        exit(1);
    }
    char *copy = (char *)malloc(strlen(path) + 1);
    if (!copy) exit(1);
    return models_files[models_n_files++] = strcpy(copy, path);
}

// A small model of a named shape, made if it is not there yet. (q_lora and vocab are not part of
// its name: use synth_write for such models.)
MODELS_FN const char *models_write(const char *config, const synth_options *options) {
    static const char *const forms[3] = {"", "-split", "-both"};
    static const char *const keys[3] = {"-old", "", "-mla"};
    char name[160];
    struct stat status;
    snprintf(name, sizeof name, "%s-%s%s%s%s%s%s", config, options->type ? options->type : "f32",
             forms[options->kvb], keys[options->mla_keys + 1], options->flat_kvb ? "-flat" : "",
             options->tied > 0 ? "-tied" : "", options->no_tokenizer ? "-ids" : "");
    if (options->n_layer)
        snprintf(name + strlen(name), 24, "-layers%d", options->n_layer);
    if (options->seed) snprintf(name + strlen(name), 24, "-seed%d", (int)options->seed);
    const char *path = models_path(name);
    if (stat(path, &status) != 0 && synth_write(config, path, options) != 0) exit(1);
    return path;
}
MODELS_FN const char *models_simple(const char *config, const char *type) {
    synth_options options;
    memset(&options, 0, sizeof options);
    options.type = type;
    return models_write(config, &options);
}

// Small models of token ids: all families, all forms of attention tensors.
MODELS_FN const char *models_form(int i) {
    synth_options o;
    memset(&o, 0, sizeof o);
    o.no_tokenizer = 1;
    o.kvb = i == 2 ? SYNTH_KVB_SPLIT : i == 3 ? SYNTH_KVB_BOTH : SYNTH_KVB_FUSED;
    static const char *const configs[] = {"micro",         "micro_mla",   "micro_mla",  "micro_mla",
                                          "micro_mixtral", "micro_qwen2", "micro_olmoe",
                                          "micro_oss"};
    return models_write(configs[i], &o);
}
enum { MODELS_FORMS = 8 };

// Small models of token ids with recurrent layers: all kinds of these.
MODELS_FN const char *const models_hybrids[] = {
    "qwen35moe_tiny", "qwen3next_tiny", "lfm2moe_tiny", "granitehybrid_tiny",
    "nemotron_h_moe_tiny", "nemotron_latent_tiny", "jamba_tiny", "kimi-linear_tiny",
    "bailingmoe3_tiny", "minimax-01_tiny"};
enum { MODELS_HYBRIDS = sizeof models_hybrids / sizeof models_hybrids[0] };
// The same with rows of 256 values.
MODELS_FN const char *const models_quants[] = {"qwen35moe_quant", "nemotron_h_moe_quant",
                                               "kimi-linear_quant"};
enum { MODELS_QUANTS = sizeof models_quants / sizeof models_quants[0] };
MODELS_FN const char *models_hybrid(int i) {
    synth_options o;
    memset(&o, 0, sizeof o);
    o.no_tokenizer = 1;
    return models_write(models_hybrids[i], &o);
}

// A whole file of numbers; NULL if it is not there.
MODELS_FN float *models_read_floats(const char *path, size_t *count) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    *count = (size_t)ftell(file) / sizeof(float);
    rewind(file);
    float *data = (float *)malloc(*count * sizeof(float) + 1);
    if (data && fread(data, sizeof(float), *count, file) != *count) {
        free(data);
        data = NULL;
    }
    fclose(file);
    return data;
}
MODELS_FN int32_t *models_read_tokens(const char *path, int *count) {
    FILE *file = fopen(path, "r");
    int32_t *tokens = (int32_t *)malloc(sizeof(int32_t) * 8192);
    *count = 0;
    if (!file || !tokens) {
        if (file) fclose(file);
        free(tokens);
        return NULL;
    }
    while (*count < 8192 && fscanf(file, "%d", &tokens[*count]) == 1) ++*count;
    fclose(file);
    return tokens;
}

MODELS_FN moe_model *models_open(const char *path) {
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_model *model = moe_model_open(path, NULL, &error);
    if (!model)
        printf("  %s: %s: %s: %s\n", path, moe_status_name(error.status), error.where, error.text);
    return model;
}

// ---- running ---------------------------------------------------------------------------------

// n tokens spread over the vocabulary, with repetitions.
MODELS_FN void models_tokens(int32_t *tokens, int n, int n_vocab, uint64_t seed) {
    for (int i = 0; i < n; i++)
        tokens[i] = (int32_t)(synth_random(seed, (uint64_t)(i % 7 == 6 ? i - 3 : i)) %
                              (uint64_t)n_vocab);
}

enum { MODELS_WHOLE = 0, MODELS_ODD = -1 }; // or the number of tokens per eval

MODELS_FN int models_step(int step, int call) {
    static const int odd[] = {1, 2, 3, 5, 7, 31, 1, 64, 4, 33, 129, 6, 17};
    return step == MODELS_ODD ? odd[call % (int)(sizeof odd / sizeof odd[0])] : step;
}

// Evaluates tokens first .. n - 1 and keeps their logits, n x n_vocab from row `first` on.
MODELS_FN int models_eval(moe_session *session, const int32_t *tokens, int first, int n, int step,
                       float *logits) {
    size_t V = (size_t)moe_model_get_info(moe_session_model(session))->n_vocab;
    int call = 0;
    for (int done = first; done < n; call++) {
        moe_error error;
        int now = models_step(step, call);
        if (now <= 0 || now > n - done) now = n - done;
        if (moe_session_eval(session, tokens + done, now, &error) != MOE_OK) {
            printf("  eval: %s: %s\n", error.where, error.text);
            return 0;
        }
        for (int i = 0; i < now; i++) {
            const float *row = moe_session_logits(session, i);
            if (!row) return 0;
            memcpy(logits + (size_t)(done + i) * V, row, V * sizeof(float));
        }
        done += now;
    }
    return moe_session_length(session) == n;
}

// Logits of every token in a new session, evaluated in pieces; NULL (with a message) on failure.
MODELS_FN float *models_run(const moe_model *model, const moe_session_options *options,
                         const int32_t *tokens, int n, int step) {
    moe_error error;
    moe_session_options o = *options;
    o.keep_all_logits = MOE_ON;
    if (!o.n_ctx) o.n_ctx = n;
    moe_session *session = moe_session_open(model, &o, &error);
    if (!session) {
        printf("  session: %s: %s\n", error.where, error.text);
        return NULL;
    }
    size_t V = (size_t)moe_model_get_info(model)->n_vocab;
    float *logits = (float *)malloc((size_t)n * V * sizeof(float));
    if (logits && !models_eval(session, tokens, 0, n, step, logits)) {
        free(logits);
        logits = NULL;
    }
    moe_session_close(session);
    return logits;
}

// The first logits are what later ones are compared with; those are freed.
MODELS_FN void models_keep_first(float **first, float *logits) {
    if (*first) free(logits);
    else *first = logits;
}

// ---- measures --------------------------------------------------------------------------------

// sum((x - r)^2) / sum(r^2); infinite if anything is not a finite number.
MODELS_FN double models_nmse(const float *x, const double *r, size_t n) {
    double off = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        off += ((double)x[i] - r[i]) * ((double)x[i] - r[i]);
        all += r[i] * r[i];
    }
    return off / all < INFINITY ? off / all : INFINITY;
}

MODELS_FN int models_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
MODELS_FN double models_median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, models_compare);
    return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

// sum(p * (log p - log q)) with p = softmax(r), q = softmax(x).
MODELS_FN double models_kl(const float *x, const double *r, int n) {
    double max_x = -INFINITY, max_r = -INFINITY, sum_x = 0, sum_r = 0, kl = 0;
    for (int i = 0; i < n; i++) {
        max_x = fmax(max_x, (double)x[i]);
        max_r = fmax(max_r, r[i]);
    }
    for (int i = 0; i < n; i++) {
        sum_x += exp((double)x[i] - max_x);
        sum_r += exp(r[i] - max_r);
    }
    for (int i = 0; i < n; i++) {
        double log_p = r[i] - max_r - log(sum_r), log_q = (double)x[i] - max_x - log(sum_x);
        kl += exp(log_p) * (log_p - log_q);
    }
    return kl == kl ? kl : INFINITY;
}

// The median over rows, of the KL divergence or of the row's NMSE.
MODELS_FN double models_median_row(const float *x, const double *r, int rows, int width, int kl) {
    double *row = (double *)malloc(sizeof(double) * (size_t)rows), median;
    if (!row) return INFINITY;
    for (int i = 0; i < rows; i++) {
        const float *xi = x + (size_t)i * (size_t)width;
        const double *ri = r + (size_t)i * (size_t)width;
        row[i] = kl ? models_kl(xi, ri, width) : models_nmse(xi, ri, (size_t)width);
    }
    median = models_median(row, rows);
    free(row);
    return median;
}

MODELS_FN double *models_doubles(const float *x, size_t n) {
    double *r = (double *)malloc(sizeof(double) * n);
    for (size_t i = 0; i < n && r; i++) r[i] = (double)x[i];
    return r;
}

// Instruction sets to test: those that this machine has.
MODELS_FN const moe_isa models_isas[] = {MOE_ISA_SCALAR, MOE_ISA_AVX2, MOE_ISA_AVX512};
MODELS_FN int models_has_isa(moe_isa isa) { return moe_isa_resolve(isa) == isa; }

#endif
