// A model that is timed, and what one of its tokens needs, counted from the file's tensors.
// Include moe_infer.h, tool.h and page_state.h first.
#ifndef BENCH_MODEL_H
#define BENCH_MODEL_H
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { BENCH_LAYERS = 512 };

// What the file's tensors say about one token.
typedef struct token_work {
    double bytes;       // of weights that generating it reads; of experts only the chosen ones
    double once;        // of them what any number of tokens reads once: all but the next two
    double row;         // of the embedding; 0 if that is the output matrix, too
    double expert[BENCH_LAYERS]; // one expert of each layer
    int32_t n_moe;      // layers that have some
    double macs;        // multiply-adds with them, but for the output matrix
    double output_macs; // of the output matrix: prompts need it for their last token only
    double kv_row;      // values that one position of one layer holds in the cache
    double state;       // bytes of states that a token of a sequence moves: read once, and every
                        // 16th time read again and written
    int32_t n_full, n_window, window; // layers that read all positions, or the last `window`
} token_work;

typedef struct model {
    const char *path;
    char type[80]; // "qwen3moe 30B Q4_K"
    moe_model *handle;
    const moe_model_info *info;
    token_work work;
    page_state pages;    // where the file lay before it was opened
    double began, open_seconds;
} model;

// xorshift64*: any fixed sequence would do, but it must be the same for every build.
static inline uint64_t random_next(uint64_t *state) {
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 2685821657736338717u;
}
#define RANDOM_SEED 88172645463325252u // every test meets the same tokens

static inline void random_tokens(const moe_model *m, uint64_t *state, int32_t *tokens, int32_t n) {
    const moe_vocab *vocab = moe_model_vocab(m);
    uint64_t n_vocab = (uint64_t)moe_model_get_info(m)->n_vocab;
    int32_t bos = vocab ? moe_vocab_bos(vocab) : -1;
    for (int32_t i = 0; i < n; i++) tokens[i] = (int32_t)((random_next(state) >> 33) % n_vocab);
    if (bos >= 0 && n > 0) tokens[0] = bos;
}

// "qwen3moe 30B Q4_K": family, parameters, the type that most bytes have.
static inline void model_describe(model *m) {
    const moe_gguf *gguf = moe_model_gguf(m->handle);
    enum { TYPES = 512 };
    double n = (double)m->info->n_params, bytes[TYPES] = {0};
    int best = 0;
    char params[32];
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        const int type = (int)tensor->type;
        if (type < 0 || type >= TYPES) continue;
        bytes[type] += (double)tensor->size;
        if (bytes[type] > bytes[best]) best = type;
    }
    if (n >= 1e10) snprintf(params, sizeof params, "%.0fB", n / 1e9);
    else if (n >= 1e9) snprintf(params, sizeof params, "%.1fB", n / 1e9);
    else snprintf(params, sizeof params, "%.1fM", n / 1e6);
    snprintf(m->type, sizeof m->type, "%s %s %s", m->info->family, params,
             moe_type_name((moe_type)best));
}

// Is `part` a part of a tensor's name?
static inline int has_part(const moe_gguf_tensor *tensor, const char *part) {
    return strstr(tensor->name, part) != NULL;
}

// Experts' matrices of a layer are one tensor, or (ffn_up.3.weight) one tensor each.
static inline int is_expert(const moe_gguf_tensor *tensor) {
    int layer, expert, end = 0;
    char part[8];
    return has_part(tensor, "_exps.") ||
           (sscanf(tensor->name, "blk.%d.ffn_%7[a-z].%d.%n", &layer, part, &expert, &end) == 3 &&
            end > 0);
}

static inline int64_t key_int(const moe_gguf *gguf, const char *family, const char *key,
                              int64_t otherwise) {
    char name[96];
    int64_t value;
    snprintf(name, sizeof name, "%s.%s", family, key);
    return moe_gguf_value_int(moe_gguf_find_value(gguf, name), 0, &value) ? value : otherwise;
}

// Keys and values per position and layer: latent rows (MLA), or those of all heads.
static inline void count_cache(model *m, const moe_gguf *gguf) {
    const moe_model_info *info = m->info;
    token_work *work = &m->work;
    const char *family = info->family;
    int64_t lora = key_int(gguf, family, "attention.kv_lora_rank", 0), window;
    int64_t key = key_int(gguf, family, "attention.key_length", info->n_embd / info->n_head);
    int64_t value = key_int(gguf, family, "attention.value_length", key);
    work->kv_row = (double)(key + value) * info->n_head_kv;
    if (lora > 0) work->kv_row = (double)(lora + key_int(gguf, family, "rope.dimension_count", 0));
    window = key_int(gguf, family, "attention.sliding_window", 0);
    if (window > 0 && window <= INT32_MAX && !strcmp(family, "gpt-oss")) {
        work->window = (int32_t)window;
        work->n_window = (info->n_layer + 1) / 2; // every other layer, from the first
    }
    work->n_full = info->n_layer_attention - work->n_window;
    work->state = (double)info->n_bytes_state * (1 + 2.0 / 16);
}

// What one token needs of the weights, by the names of the tensors: a row of the embedding, the
// output matrix (which may be the embedding), all of the layers that are run, and of their
// experts the chosen share. Of attn_kv_b and its halves only one is used.
static inline void count_work(model *m) {
    const moe_gguf *gguf = moe_model_gguf(m->handle);
    const moe_model_info *info = m->info;
    token_work *work = &m->work;
    const int tied = !moe_gguf_find_tensor(gguf, "output.weight");
    const double share = info->n_expert ? (double)info->n_expert_used / info->n_expert : 1;
    double chosen = 0;
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        const double n = (double)tensor->ne[0] * (double)tensor->ne[1] * (double)tensor->ne[2] *
                         (double)tensor->ne[3];
        const int embedding = !strcmp(tensor->name, "token_embd.weight");
        const int output = !strcmp(tensor->name, "output.weight") || (embedding && tied);
        const int expert = is_expert(tensor);
        const double used = expert ? share : 1;
        int layer = -1, is_matrix;
        if (embedding && !tied) work->row = (double)tensor->size / (double)tensor->ne[1];
        if (embedding && !tied) continue;
        if (sscanf(tensor->name, "blk.%d.", &layer) == 1 && layer >= info->n_layer) continue;
        if (has_part(tensor, ".attn_kv_b.")) {
            char half[64];
            snprintf(half, sizeof half, "blk.%d.attn_k_b.weight", layer);
            if (moe_gguf_find_tensor(gguf, half)) continue;
        }
        is_matrix = tensor->n_dims > 1 && has_part(tensor, ".weight");
        if (!expert) work->once += (double)tensor->size;
        else if (layer >= 0 && layer < BENCH_LAYERS)
            work->expert[layer] += (double)tensor->size / info->n_expert;
        if (output) work->output_macs += n;
        else if (is_matrix) work->macs += used * n;
    }
    for (int il = 0; il < BENCH_LAYERS; il++) {
        chosen += work->expert[il] * info->n_expert_used;
        work->n_moe += work->expert[il] > 0;
    }
    work->bytes = work->once + work->row + chosen;
    count_cache(m, gguf);
}

static inline int on_loading(void *user, float fraction) {
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\rloading %s: %3.0f %% ", (const char *)user, (double)fraction * 100);
    return 1;
}

static inline int model_open(model *m, const char *program, const char *path,
                             const moe_model_options *options) {
    moe_model_options o = *options;
    moe_error error;
    memset(m, 0, sizeof *m);
    o.progress = on_loading;
    o.progress_user = (void *)(uintptr_t)path;
    m->path = path;
    m->began = tool_seconds();
    m->handle = moe_model_open(path, &o, &error);
    m->open_seconds = tool_seconds() - m->began;
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\r%79s\r", "");
    if (!m->handle) return tool_fail(program, path, &error);
    m->info = moe_model_get_info(m->handle);
    model_describe(m);
    count_work(m);
    return TOOL_OK;
}

#endif
