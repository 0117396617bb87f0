// moe-synth: writes GGUF files of real Mixture-of-Experts shapes with seeded random weights, so
// that benchmarks and tests need no downloads. Quantized tensors are random blocks with sensible
// scales, not the result of a quantizer: a file of many GB takes seconds.
//
// As a program:  moe-synth qwen3-30b-a3b q30.gguf --layers 12 --type q4_K
// In a test:     #define SYNTH_NO_MAIN
//                #include "../bench/synth.c"
//                synth_write("micro", "build/micro.gguf", NULL)
// moe-bench --plan takes files without weights, see synth_begin.
//
// Needs libc and libm only, not the library that will read its files.
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../examples/output.h"

// ---- what can be asked for -------------------------------------------------------------------

// A model's shape. Widths are in values, 0 means "has none".
typedef struct synth_config {
    const char *name, *arch;
    int n_layer, n_embd, vocab, n_head;
    int n_kv, head_dim;                     // grouped-query attention
    int q_lora, kv_lora, nope, rope, v_dim; // multi-head latent attention (deepseek2)
    int n_ff, lead;                         // dense layers: width, how many come first
    int n_exp, n_used, n_ff_exp;            // routed experts: how many, chosen per token, width
    int n_shared, n_ff_shexp;               // shared experts: how many, or their width together
    int gating;                             // deepseek2: 1 softmax, 2 sigmoid
    int norm_w, bias;                       // weights divided by their sum; selection bias
    int groups, groups_used;                // group-limited routing
    float scale;                            // of the experts' weights; 0: no key
    float yarn_factor, yarn_log;            // 0: no YaRN; log multiplier 0: no key
    int yarn_ctx;                           // original context of YaRN
    float rope_base;                        // 0: the family's usual one
    int window;                             // sliding window (gpt-oss)
    int tied;                               // no output.weight
} synth_config;

// Which tensors hold deepseek2's two halves of the latent's expansion. Float types hold the same
// weights in all three forms, so models that differ only in this give the same logits.
enum {
    SYNTH_KVB_FUSED, // attn_kv_b, keys as before April 2025
    SYNTH_KVB_SPLIT, // attn_k_b and attn_v_b, keys for MLA
    SYNTH_KVB_BOTH   // all three; Q8_0 of the same values if the file's type is quantized
};

typedef struct synth_options {
    uint64_t seed;    // 0: 1
    const char *type; // NULL: f32; a type or a mix, see synth_types and synth_mixes
    int n_layer;      // 0: the shape's
    int vocab;        // 0: the shape's
    int q_lora;       // 0: the shape's, -1: none
    int tied;         // 1: no output.weight, -1: output.weight even if the shape is tied
    int no_tokenizer; // token ids only, no texts
    int kvb;          // SYNTH_KVB_...
    int mla_keys;     // key_length_mla etc.: 0: with SPLIT only, 1: yes, -1: no
    int flat_kvb;     // attn_k_b and attn_v_b with two dimensions instead of three
    char *error;      // where to put a sentence if something fails; NULL: stderr
    size_t error_size;
} synth_options;

static const synth_config synth_configs[] = {
    // Published shapes.
    {.name = "qwen3-30b-a3b", .arch = "qwen3moe", .n_layer = 48, .n_embd = 2048, .vocab = 151936,
     .n_head = 32, .n_kv = 4, .head_dim = 128, .n_ff = 6144, .n_exp = 128, .n_used = 8,
     .n_ff_exp = 768},
    {.name = "qwen3-235b-a22b", .arch = "qwen3moe", .n_layer = 94, .n_embd = 4096,
     .vocab = 151936, .n_head = 64, .n_kv = 4, .head_dim = 128, .n_ff = 12288, .n_exp = 128,
     .n_used = 8, .n_ff_exp = 1536},
    {.name = "dsv2lite", .arch = "deepseek2", .n_layer = 27, .n_embd = 2048, .vocab = 102400,
     .n_head = 16, .kv_lora = 512, .nope = 128, .rope = 64, .v_dim = 128, .n_ff = 10944,
     .lead = 1, .n_exp = 64, .n_used = 6, .n_ff_exp = 1408, .n_shared = 2, .gating = 1,
     .scale = 1.0f, .yarn_factor = 40, .yarn_ctx = 4096, .yarn_log = 0.0707f},
    {.name = "dsv2", .arch = "deepseek2", .n_layer = 60, .n_embd = 5120, .vocab = 102400,
     .n_head = 128, .q_lora = 1536, .kv_lora = 512, .nope = 128, .rope = 64, .v_dim = 128,
     .n_ff = 12288, .lead = 1, .n_exp = 160, .n_used = 6, .n_ff_exp = 1536, .n_shared = 2,
     .gating = 1, .scale = 16.0f, .yarn_factor = 40, .yarn_ctx = 4096, .yarn_log = 0.0707f},
    {.name = "dsr1", .arch = "deepseek2", .n_layer = 61, .n_embd = 7168, .vocab = 129280,
     .n_head = 128, .q_lora = 1536, .kv_lora = 512, .nope = 128, .rope = 64, .v_dim = 128,
     .n_ff = 18432, .lead = 3, .n_exp = 256, .n_used = 8, .n_ff_exp = 2048, .n_shared = 1,
     .gating = 2, .norm_w = 1, .bias = 1, .groups = 8, .groups_used = 4, .scale = 2.5f,
     .yarn_factor = 40, .yarn_ctx = 4096, .yarn_log = 0.1f},
    {.name = "kimi-k2", .arch = "deepseek2", .n_layer = 61, .n_embd = 7168, .vocab = 163840,
     .n_head = 64, .q_lora = 1536, .kv_lora = 512, .nope = 128, .rope = 64, .v_dim = 128,
     .n_ff = 18432, .lead = 1, .n_exp = 384, .n_used = 8, .n_ff_exp = 2048, .n_shared = 1,
     .gating = 2, .norm_w = 1, .bias = 1, .groups = 1, .groups_used = 1, .scale = 2.827f,
     .yarn_factor = 32, .yarn_ctx = 4096, .yarn_log = 0.1f, .rope_base = 50000},
    {.name = "moonlight", .arch = "deepseek2", .n_layer = 27, .n_embd = 2048, .vocab = 163840,
     .n_head = 16, .kv_lora = 512, .nope = 128, .rope = 64, .v_dim = 128, .n_ff = 11264,
     .lead = 1, .n_exp = 64, .n_used = 6, .n_ff_exp = 1408, .n_shared = 2, .gating = 2,
     .norm_w = 1, .bias = 1, .scale = 2.446f, .rope_base = 50000},
    {.name = "mixtral", .arch = "llama", .n_layer = 32, .n_embd = 4096, .vocab = 32000,
     .n_head = 32, .n_kv = 8, .head_dim = 128, .n_ff = 14336, .n_exp = 8, .n_used = 2,
     .n_ff_exp = 14336},
    {.name = "olmoe", .arch = "olmoe", .n_layer = 16, .n_embd = 2048, .vocab = 50304, .n_head = 16,
     .n_kv = 16, .head_dim = 128, .n_ff = 1024, .n_exp = 64, .n_used = 8, .n_ff_exp = 1024},
    {.name = "gpt-oss-20b", .arch = "gpt-oss", .n_layer = 24, .n_embd = 2880, .vocab = 201088,
     .n_head = 64, .n_kv = 8, .head_dim = 64, .n_ff = 2880, .n_exp = 32, .n_used = 4,
     .n_ff_exp = 2880, .yarn_factor = 32, .yarn_ctx = 4096, .window = 128},
    {.name = "gpt-oss-120b", .arch = "gpt-oss", .n_layer = 36, .n_embd = 2880, .vocab = 201088,
     .n_head = 64, .n_kv = 8, .head_dim = 64, .n_ff = 2880, .n_exp = 128, .n_used = 4,
     .n_ff_exp = 2880, .yarn_factor = 32, .yarn_ctx = 4096, .window = 128},

    // Small: rows of 64 values, for float types and types with blocks of 32.
    {.name = "qwen3moe_tiny", .arch = "qwen3moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 8, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 32, .n_used = 8,
     .n_ff_exp = 32},
    {.name = "dsv2_tiny", .arch = "deepseek2", .n_layer = 27, .n_embd = 64, .vocab = 512,
     .n_head = 4, .kv_lora = 64, .nope = 32, .rope = 16, .v_dim = 32, .n_ff = 96, .lead = 1,
     .n_exp = 8, .n_used = 3, .n_ff_exp = 32, .n_shared = 2, .gating = 1, .scale = 1.0f,
     .yarn_factor = 40, .yarn_ctx = 4096, .yarn_log = 0.0707f},
    {.name = "dsv3_tiny", .arch = "deepseek2", .n_layer = 5, .n_embd = 64, .vocab = 512,
     .n_head = 4, .q_lora = 96, .kv_lora = 64, .nope = 32, .rope = 16, .v_dim = 32, .n_ff = 96,
     .lead = 2, .n_exp = 32, .n_used = 4, .n_ff_exp = 32, .n_shared = 1, .gating = 2,
     .norm_w = 1, .bias = 1, .groups = 8, .groups_used = 4, .scale = 2.5f, .yarn_factor = 40,
     .yarn_ctx = 4096, .yarn_log = 0.1f},
    {.name = "qwen2moe_tiny", .arch = "qwen2moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .n_exp = 16, .n_used = 4,
     .n_ff_exp = 32, .n_ff_shexp = 96},
    {.name = "mixtral_tiny", .arch = "llama", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .n_exp = 8, .n_used = 2, .n_ff_exp = 96},
    {.name = "olmoe_tiny", .arch = "olmoe", .n_layer = 4, .n_embd = 64, .vocab = 512, .n_head = 4,
     .n_kv = 4, .head_dim = 16, .n_ff = 32, .n_exp = 16, .n_used = 4, .n_ff_exp = 32},
    {.name = "gptoss_tiny", .arch = "gpt-oss", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 8, .n_kv = 2, .head_dim = 16, .n_ff = 64, .n_exp = 8, .n_used = 2, .n_ff_exp = 64,
     .yarn_factor = 32, .yarn_ctx = 4096, .window = 16},

    // Small: rows of 256 values, for every type.
    {.name = "qwen3moe_quant", .arch = "qwen3moe", .n_layer = 2, .n_embd = 256, .vocab = 384,
     .n_head = 4, .n_kv = 2, .head_dim = 64, .n_ff = 512, .n_exp = 4, .n_used = 2,
     .n_ff_exp = 256},
    {.name = "dsv3_quant", .arch = "deepseek2", .n_layer = 3, .n_embd = 256, .vocab = 384,
     .n_head = 2, .q_lora = 256, .kv_lora = 256, .nope = 64, .rope = 32, .v_dim = 128,
     .n_ff = 256, .lead = 1, .n_exp = 4, .n_used = 2, .n_ff_exp = 256, .n_shared = 1, .gating = 2,
     .norm_w = 1, .bias = 1, .scale = 2.5f, .yarn_factor = 40, .yarn_ctx = 4096,
     .yarn_log = 0.1f},
    // Like dsv2lite: 256-wide blocks fit some rows and not others (expert rows of 11 x 32).
    {.name = "dsv2_ragged", .arch = "deepseek2", .n_layer = 2, .n_embd = 256, .vocab = 300,
     .n_head = 3, .kv_lora = 128, .nope = 32, .rope = 16, .v_dim = 32, .n_ff = 672, .lead = 1,
     .n_exp = 6, .n_used = 3, .n_ff_exp = 352, .n_shared = 2, .gating = 1, .scale = 1.0f,
     .yarn_factor = 40, .yarn_ctx = 4096, .yarn_log = 0.0707f},

    // As small as a whole model gets.
    {.name = "micro", .arch = "qwen3moe", .n_layer = 2, .n_embd = 32, .vocab = 264, .n_head = 2,
     .n_kv = 1, .head_dim = 16, .n_ff = 32, .n_exp = 4, .n_used = 2, .n_ff_exp = 32},
    {.name = "micro_mla", .arch = "deepseek2", .n_layer = 2, .n_embd = 32, .vocab = 264,
     .n_head = 2, .q_lora = 32, .kv_lora = 32, .nope = 16, .rope = 8, .v_dim = 16, .n_ff = 32,
     .lead = 1, .n_exp = 4, .n_used = 2, .n_ff_exp = 32, .n_shared = 1, .gating = 2, .norm_w = 1,
     .bias = 1, .groups = 2, .groups_used = 1, .scale = 2.5f, .yarn_factor = 40,
     .yarn_ctx = 4096, .yarn_log = 0.1f},
    {.name = "micro_mixtral", .arch = "llama", .n_layer = 2, .n_embd = 32, .vocab = 264,
     .n_head = 2, .n_kv = 1, .head_dim = 16, .n_ff = 32, .n_exp = 4, .n_used = 2, .n_ff_exp = 32},
    {.name = "micro_qwen2", .arch = "qwen2moe", .n_layer = 2, .n_embd = 32, .vocab = 264,
     .n_head = 2, .n_kv = 1, .head_dim = 16, .n_ff = 64, .n_exp = 4, .n_used = 2, .n_ff_exp = 32,
     .n_ff_shexp = 64},
    {.name = "micro_olmoe", .arch = "olmoe", .n_layer = 2, .n_embd = 32, .vocab = 264,
     .n_head = 2, .n_kv = 2, .head_dim = 16, .n_ff = 32, .n_exp = 4, .n_used = 2, .n_ff_exp = 32},
    {.name = "micro_oss", .arch = "gpt-oss", .n_layer = 3, .n_embd = 32, .vocab = 264,
     .n_head = 4, .n_kv = 1, .head_dim = 16, .n_ff = 32, .n_exp = 4, .n_used = 2, .n_ff_exp = 32,
     .yarn_factor = 32, .yarn_ctx = 4096, .window = 6},

    // Feature by feature; odd widths, so for float types only where not a multiple of 32.
    {.name = "t_qwen_odd", .arch = "qwen3moe", .n_layer = 2, .n_embd = 36, .vocab = 277,
     .n_head = 3, .n_kv = 1, .head_dim = 10, .n_ff = 32, .n_exp = 5, .n_used = 5, .n_ff_exp = 27},
    {.name = "t_qwen_tied", .arch = "qwen3moe", .n_layer = 2, .n_embd = 64, .vocab = 301,
     .n_head = 6, .n_kv = 3, .head_dim = 48, .n_ff = 32, .n_exp = 7, .n_used = 1, .n_ff_exp = 32,
     .tied = 1},
    {.name = "t_qwen_yarn", .arch = "qwen3moe", .n_layer = 2, .n_embd = 64, .vocab = 288,
     .n_head = 4, .n_kv = 4, .head_dim = 32, .n_ff = 32, .n_exp = 16, .n_used = 8, .n_ff_exp = 40,
     .yarn_factor = 4, .yarn_ctx = 512},
    {.name = "t_olmoe_odd", .arch = "olmoe", .n_layer = 2, .n_embd = 36, .vocab = 277, .n_head = 3,
     .n_kv = 3, .head_dim = 10, .n_ff = 27, .n_exp = 5, .n_used = 3, .n_ff_exp = 27},
    {.name = "t_oss_odd", .arch = "gpt-oss", .n_layer = 2, .n_embd = 36, .vocab = 277, .n_head = 3,
     .n_kv = 1, .head_dim = 10, .n_ff = 27, .n_exp = 5, .n_used = 3, .n_ff_exp = 27, .window = 1},
    {.name = "t_oss_wide", .arch = "gpt-oss", .n_layer = 3, .n_embd = 64, .vocab = 264,
     .n_head = 4, .n_kv = 4, .head_dim = 16, .n_ff = 32, .n_exp = 4, .n_used = 4, .n_ff_exp = 32,
     .yarn_factor = 8, .yarn_ctx = 256, .window = 33},
    {.name = "t_mla_plain", .arch = "deepseek2", .n_layer = 3, .n_embd = 64, .vocab = 283,
     .n_head = 3, .kv_lora = 64, .nope = 24, .rope = 12, .v_dim = 40, .n_ff = 72, .lead = 0,
     .n_exp = 6, .n_used = 2, .n_ff_exp = 44, .n_shared = 0, .gating = 1, .norm_w = 1},
    {.name = "t_mla_v2", .arch = "deepseek2", .n_layer = 3, .n_embd = 64, .vocab = 320,
     .n_head = 4, .q_lora = 48, .kv_lora = 32, .nope = 16, .rope = 8, .v_dim = 16, .n_ff = 96,
     .lead = 1, .n_exp = 10, .n_used = 6, .n_ff_exp = 32, .n_shared = 2, .gating = 1,
     .scale = 16.0f, .yarn_factor = 40, .yarn_ctx = 4096, .yarn_log = 0.0707f},
    {.name = "t_mla_groups", .arch = "deepseek2", .n_layer = 3, .n_embd = 64, .vocab = 264,
     .n_head = 4, .q_lora = 64, .kv_lora = 64, .nope = 32, .rope = 16, .v_dim = 32, .n_ff = 64,
     .lead = 1, .n_exp = 16, .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .gating = 2,
     .norm_w = 1, .bias = 1, .groups = 4, .groups_used = 2, .scale = 2.5f, .yarn_factor = 40,
     .yarn_ctx = 4096, .yarn_log = 0.1f},
    {.name = "t_mla_k2", .arch = "deepseek2", .n_layer = 3, .n_embd = 64, .vocab = 264,
     .n_head = 2, .q_lora = 32, .kv_lora = 64, .nope = 16, .rope = 32, .v_dim = 24, .n_ff = 64,
     .lead = 2, .n_exp = 12, .n_used = 7, .n_ff_exp = 32, .n_shared = 1, .gating = 2,
     .norm_w = 1, .bias = 1, .groups = 1, .groups_used = 1, .scale = 2.827f, .yarn_factor = 32,
     .yarn_ctx = 4096, .yarn_log = 0.1f, .rope_base = 50000},
    {.name = "t_mla_moonlight", .arch = "deepseek2", .n_layer = 2, .n_embd = 64, .vocab = 264,
     .n_head = 4, .kv_lora = 64, .nope = 32, .rope = 16, .v_dim = 32, .n_ff = 64, .lead = 1,
     .n_exp = 8, .n_used = 4, .n_ff_exp = 32, .n_shared = 2, .gating = 2, .norm_w = 1, .bias = 1,
     .scale = 2.446f, .rope_base = 50000},
    {.name = "t_mla_nobias", .arch = "deepseek2", .n_layer = 2, .n_embd = 64, .vocab = 264,
     .n_head = 1, .q_lora = 64, .kv_lora = 96, .nope = 40, .rope = 8, .v_dim = 64, .n_ff = 64,
     .lead = 0, .n_exp = 4, .n_used = 4, .n_ff_exp = 64, .n_shared = 1, .gating = 2, .tied = 1},
    {.name = "t_mla_dense", .arch = "deepseek2", .n_layer = 3, .n_embd = 64, .vocab = 264,
     .n_head = 2, .kv_lora = 32, .nope = 16, .rope = 8, .v_dim = 16, .n_ff = 96, .lead = 2,
     .n_exp = 3, .n_used = 1, .n_ff_exp = 32, .n_shared = 1, .gating = 1, .scale = 1.0f,
     .yarn_factor = 8, .yarn_ctx = 1024},
};
enum { SYNTH_N_CONFIGS = sizeof synth_configs / sizeof synth_configs[0] };

// Types by GGUF id. A row of weights that is not a multiple of the block takes `fallback`.
typedef struct synth_type {
    const char *name;
    uint32_t id;
    uint32_t block, bytes;
    const char *fallback;
} synth_type;

static const synth_type synth_types[] = {
    {"f32", 0, 1, 4, NULL},         {"f16", 1, 1, 2, NULL},
    {"bf16", 30, 1, 2, NULL},       {"q4_0", 2, 32, 18, "f16"},
    {"q4_1", 3, 32, 20, "f16"},     {"q5_0", 6, 32, 22, "f16"},
    {"q5_1", 7, 32, 24, "f16"},     {"q8_0", 8, 32, 34, "f16"},
    {"q2_K", 10, 256, 84, "q4_0"},  {"q3_K", 11, 256, 110, "q4_0"},
    {"q4_K", 12, 256, 144, "q5_0"}, {"q5_K", 13, 256, 176, "q5_1"},
    {"q6_K", 14, 256, 210, "q8_0"}, {"iq4_nl", 20, 32, 18, "f16"},
    {"iq4_xs", 23, 256, 136, "iq4_nl"}, {"mxfp4", 39, 32, 17, "q8_0"},
};
enum { SYNTH_N_TYPES = sizeof synth_types / sizeof synth_types[0] };

// A mix: one type for most tensors, another for those that matter most.
typedef struct synth_mix {
    const char *name, *base, *down, *head, *v, *experts;
} synth_mix;

static const synth_mix synth_mixes[] = {
    {"q4_K_M", "q4_K", "q6_K", "q6_K", "q6_K", "q4_K"},
    {"q5_K_M", "q5_K", "q6_K", "q6_K", "q6_K", "q5_K"},
    {"mxfp4", "q8_0", "mxfp4", "q8_0", "q8_0", "mxfp4"}, // only experts are made of it
};
enum { SYNTH_N_MIXES = sizeof synth_mixes / sizeof synth_mixes[0] };

// What a tensor is for: decides its type and its values.
typedef enum synth_role {
    SYNTH_WEIGHT,
    SYNTH_EMBEDDING,
    SYNTH_HEAD,
    SYNTH_V,
    SYNTH_DOWN,
    SYNTH_EXPERT,
    SYNTH_KV_B,
    SYNTH_K_B,
    SYNTH_V_B,
    SYNTH_ROUTER, // from here on F32
    SYNTH_BIAS,
    SYNTH_NORM // around 1
} synth_role;

typedef struct synth_tensor {
    char name[64];
    int n_dims;
    uint64_t ne[4];
    const synth_type *type;
    synth_role role;
    float std;         // standard deviation of its values
    uint64_t seed;     // of its random numbers
    uint64_t bytes;    // without padding
    int64_t nope, lora, v_dim; // SYNTH_K_B and SYNTH_V_B: where the values lie in attn_kv_b
} synth_tensor;

enum { SYNTH_ALIGN = 32, SYNTH_MIN_VOCAB = 259, SYNTH_MAX_VOCAB = 1 << 22 };

static const synth_config *synth_find(const char *name) {
    for (int i = 0; i < SYNTH_N_CONFIGS; i++)
        if (!strcmp(synth_configs[i].name, name)) return &synth_configs[i];
    return NULL;
}

static const synth_type *synth_find_type(const char *name) {
    for (int i = 0; i < SYNTH_N_TYPES; i++)
        if (!strcmp(synth_types[i].name, name)) return &synth_types[i];
    return NULL;
}

static const synth_mix *synth_find_mix(const char *name) {
    for (int i = 0; i < SYNTH_N_MIXES; i++)
        if (!strcmp(synth_mixes[i].name, name)) return &synth_mixes[i];
    return NULL;
}

// ---- random numbers --------------------------------------------------------------------------

// The i-th number of a stream (splitmix64): any part of a tensor can be made by itself.
static uint64_t synth_random(uint64_t seed, uint64_t i) {
    uint64_t x = seed + (i + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// A stream's seed from the file's seed and a tensor's name (FNV-1a).
static uint64_t synth_seed(uint64_t seed, const char *name) {
    uint64_t hash = 0xCBF29CE484222325u ^ synth_random(seed, 0);
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001B3u;
    return synth_random(hash, 0);
}

// Nearly normal with variance 1, never beyond 3.5: the sum of four uniform 16-bit numbers, whose
// mean is 131070 and standard deviation 65536 / sqrt(3).
static float synth_normal(uint64_t seed, uint64_t i) {
    uint64_t x = synth_random(seed, i);
    int32_t sum = (int32_t)(x & 0xFFFF) + (int32_t)(x >> 16 & 0xFFFF) +
                  (int32_t)(x >> 32 & 0xFFFF) + (int32_t)(x >> 48);
    return (float)(sum - 131070) * (1.0f / 37837.2f);
}

// 0.75 .. 1.25
static float synth_jitter(uint64_t seed, uint64_t i) {
    return 0.75f + (float)(synth_random(~seed, i) >> 40) * (0.5f / 16777216.0f);
}

// ---- values into blocks ----------------------------------------------------------------------

static inline void synth_put(unsigned char *p, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) p[i] = (unsigned char)(value >> 8 * i);
}

// Single to half precision, to the nearest even.
static uint16_t synth_half(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (bits >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (bits < 0x38800000) { // subnormal: a multiple of 2^-24
        memcpy(&x, &bits, 4);
        return (uint16_t)(sign | (uint32_t)lrintf(x * 16777216.0f));
    }
    bits += 0x0FFF + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits - 0x38000000) >> 13);
}
static void synth_put_half(unsigned char *p, float x) { synth_put(p, synth_half(x), 2); }

// One value of a tensor by its index in GGUF order. The two halves of attn_kv_b take theirs from
// where they lie in the whole: k_b[h][r][i] = kv_b[h * (nope + v_dim) + i][r] and
// v_b[h][j][r] = kv_b[h * (nope + v_dim) + nope + j][r].
static float synth_value(const synth_tensor *t, uint64_t index) {
    uint64_t nope = (uint64_t)t->nope, lora = (uint64_t)t->lora, v_dim = (uint64_t)t->v_dim;
    if (t->role == SYNTH_K_B) {
        uint64_t i = index % nope, r = index / nope % lora, h = index / nope / lora;
        index = (h * (nope + v_dim) + i) * lora + r;
    } else if (t->role == SYNTH_V_B) {
        uint64_t r = index % lora, j = index / lora % v_dim, h = index / lora / v_dim;
        index = (h * (nope + v_dim) + nope + j) * lora + r;
    }
    return synth_normal(t->seed, index) * t->std;
}

// The 6-bit scales and minima of Q4_K and Q5_K, eight each in 12 bytes. The minimum times the
// block's dmin is about what centres the block on 0.
static void synth_put_scales(unsigned char *p, uint64_t random) {
    unsigned char scale[8], least[8];
    for (int j = 0; j < 8; j++) {
        scale[j] = (unsigned char)(24 + (random >> 8 * j & 31));
        least[j] = (unsigned char)(scale[j] - 4 + (random >> (8 * j + 5) & 7));
    }
    for (int j = 0; j < 4; j++) {
        p[j] = (unsigned char)(scale[j] | (scale[j + 4] >> 4) << 6);
        p[j + 4] = (unsigned char)(least[j] | (least[j + 4] >> 4) << 6);
        p[j + 8] = (unsigned char)((scale[j + 4] & 15) | (least[j + 4] & 15) << 4);
    }
}

// Q2_K's 4-bit scales and minima: 8..15, each minimum the same as its scale.
static void synth_put_scales_q2(unsigned char *p) {
    for (int j = 0; j < 16; j++) p[j] = (unsigned char)(((p[j] & 15) | 8) * 17);
}

// MXFP4's scale, a power of two: mostly the one nearest to d, sometimes half or twice that.
static unsigned char synth_exponent(float d, uint64_t random) {
    int e = 127 + (int)lrintf(log2f(d)) + (int)(random % 3) - 1;
    return (unsigned char)(e < 1 ? 1 : e > 250 ? 250 : e);
}

// Blocks of random bytes whose scales give the wanted standard deviation (whose integers have
// a deviation of 1.12 with 2 bits, 2.34 with 3, 4.61 with 4, 9.23 with 5, 18.5 with 6, 73.9 with
// 8, 67.5 as IQ4's table, 2.93 as MXFP4's).
static void synth_fill_random(const synth_tensor *t, uint64_t first, uint64_t n,
                              unsigned char *out) {
    uint32_t bytes = t->type->bytes, words = (bytes + 7) / 8;
    for (uint64_t b = first; b < first + n; b++, out += bytes) {
        for (uint32_t w = 0; w + 1 < words; w++) {
            uint64_t x = synth_random(t->seed, b * words + w);
            memcpy(out + 8 * w, &x, 8);
        }
        uint64_t x = synth_random(t->seed, b * words + words - 1);
        memcpy(out + 8 * (words - 1), &x, bytes - 8 * (words - 1));
        float d = t->std * synth_jitter(t->seed, b);
        switch (t->type->id) {
        case 2: synth_put_half(out, d / 4.61f); break;
        case 3:
            synth_put_half(out, d / 4.61f);
            synth_put_half(out + 2, d / 4.61f * -7.5f);
            break;
        case 6: synth_put_half(out, d / 9.23f); break;
        case 7:
            synth_put_half(out, d / 9.23f);
            synth_put_half(out + 2, d / 9.23f * -15.5f);
            break;
        case 8: synth_put_half(out, d / 73.9f); break;
        case 10:
            d /= 1.12f * 11.7f;
            synth_put_scales_q2(out);
            synth_put_half(out + 80, d);
            synth_put_half(out + 82, d * 1.5f);
            break;
        case 11: synth_put_half(out + 108, d / (2.34f * 18.5f)); break;
        case 12:
        case 13:
            d /= (t->type->id == 12 ? 4.61f : 9.23f) * 39.5f;
            synth_put_half(out, d);
            synth_put_half(out + 2, d * (t->type->id == 12 ? 7.5f : 15.5f));
            synth_put_scales(out + 4, synth_random(~t->seed, ~b));
            break;
        case 14: synth_put_half(out + 208, d / (18.5f * 73.9f)); break;
        case 20: synth_put_half(out, d / 67.5f); break;
        case 23: synth_put_half(out, d / (67.5f * 18.5f)); break;
        case 39: out[0] = synth_exponent(t->std / (2.93f * 1.32f), x >> 8); break;
        }
    }
}

// 32 values rounded to Q8_0.
static void synth_fill_q8_0(const synth_tensor *t, uint64_t block, unsigned char *out) {
    float x[32], largest = 0;
    for (int i = 0; i < 32; i++) {
        x[i] = synth_value(t, block * 32 + (uint64_t)i);
        largest = fmaxf(largest, fabsf(x[i]));
    }
    float d = largest / 127;
    synth_put_half(out, d);
    for (int i = 0; i < 32; i++) out[2 + i] = (unsigned char)lrintf(d > 0 ? x[i] / d : 0);
}

// Values first .. first + n - 1 of a tensor of floats.
static void synth_fill_floats(const synth_tensor *t, uint64_t first, uint64_t n,
                              unsigned char *out) {
    int moved = t->role == SYNTH_K_B || t->role == SYNTH_V_B;
    float mean = t->role == SYNTH_NORM ? 1.0f : 0.0f, std = t->std;
    uint64_t seed = t->seed;
    for (uint64_t i = 0; i < n; i++) {
        float x = moved ? synth_value(t, first + i) : mean + synth_normal(seed, first + i) * std;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (t->type->bytes == 4) {
            synth_put(out + 4 * i, bits, 4);
        } else {
            uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
            synth_put(out + 2 * i, t->type->id == 1 ? synth_half(x) : rounded, 2);
        }
    }
}

// Blocks first .. first + n - 1 of a tensor.
static void synth_fill(const synth_tensor *t, uint64_t first, uint64_t n, unsigned char *out) {
    if (t->type->block == 1) {
        synth_fill_floats(t, first, n, out);
    } else if (t->nope) { // attn_kv_b, k_b and v_b that must agree
        for (uint64_t i = 0; i < n; i++) synth_fill_q8_0(t, first + i, out + i * t->type->bytes);
    } else {
        synth_fill_random(t, first, n, out);
    }
}

// ---- a file in the making --------------------------------------------------------------------

typedef struct synth_file {
    const synth_config *c;
    const synth_options *o;
    const synth_type *base;
    const synth_mix *mix; // NULL: base everywhere
    unsigned char *head;  // metadata
    size_t head_size, head_capacity;
    uint64_t n_values;
    synth_tensor *tensors;
    size_t n_tensors, tensors_capacity;
    int out_of_memory;
} synth_file;

static void synth_bytes(synth_file *f, const void *data, size_t size) {
    if (f->out_of_memory) return;
    if (f->head_size + size > f->head_capacity) {
        size_t capacity = (f->head_size + size) * 2;
        unsigned char *grown = realloc(f->head, capacity);
        if (!grown) {
            f->out_of_memory = 1;
            return;
        }
        f->head = grown;
        f->head_capacity = capacity;
    }
    if (size) memcpy(f->head + f->head_size, data, size);
    f->head_size += size;
}
static void synth_number(synth_file *f, uint64_t value, int bytes) {
    unsigned char b[8];
    synth_put(b, value, bytes);
    synth_bytes(f, b, (size_t)bytes);
}
static void synth_string(synth_file *f, const char *text) {
    synth_number(f, strlen(text), 8);
    synth_bytes(f, text, strlen(text));
}

// Keys that begin with a dot are the family's own. The numbers are GGUF's value types.
static void synth_key(synth_file *f, const char *key, uint32_t type) {
    char full[96];
    snprintf(full, sizeof full, "%s%s", *key == '.' ? f->c->arch : "", key);
    synth_string(f, full);
    synth_number(f, type, 4);
    f->n_values++;
}
static void synth_u32(synth_file *f, const char *key, int value) {
    synth_key(f, key, 4);
    synth_number(f, (uint32_t)value, 4);
}
static void synth_f32(synth_file *f, const char *key, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    synth_key(f, key, 6);
    synth_number(f, bits, 4);
}
static void synth_bool(synth_file *f, const char *key, int value) {
    synth_key(f, key, 7);
    synth_number(f, value != 0, 1);
}
static void synth_text(synth_file *f, const char *key, const char *value) {
    synth_key(f, key, 8);
    synth_string(f, value);
}
static void synth_array(synth_file *f, const char *key, uint32_t element, uint64_t count) {
    synth_key(f, key, 9);
    synth_number(f, element, 4);
    synth_number(f, count, 8);
}

// ---- vocabulary ------------------------------------------------------------------------------

// A byte-level BPE vocabulary: 256 bytes, then merges of letters (each of them an earlier token
// and one more letter), then three control tokens.
static const char synth_letters[] = "etaoinshrdlucmfwypvbgkqjxz";
static const char *const synth_specials[3] = {"<|begin|>", "<|end|>", "<|pad|>"};

typedef struct synth_token {
    char text[24];
    int left; // the merge that makes it: token `left` and a letter; -1 for bytes
    char letter;
} synth_token;

// The character by which byte-level BPE writes a byte, in UTF-8.
static void synth_byte_text(int byte, char *text) {
    int seen = 0;
    for (int b = 0; b < byte; b++)
        seen += !((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255));
    int shown = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) ||
                (byte >= 174 && byte <= 255);
    int code = shown ? byte : 256 + seen;
    if (code < 128) {
        text[0] = (char)code;
        text[1] = 0;
    } else {
        text[0] = (char)(0xC0 | code >> 6);
        text[1] = (char)(0x80 | (code & 63));
        text[2] = 0;
    }
}

static void synth_token_add(synth_token *tokens, int *n, int limit, int left, char letter) {
    if (*n >= limit) return;
    synth_token *t = &tokens[(*n)++];
    size_t size = strlen(tokens[left].text);
    if (size > sizeof t->text - 2) size = sizeof t->text - 2;
    memcpy(t->text, tokens[left].text, size);
    t->text[size] = letter; // calloc has put the NUL
    t->left = left;
    t->letter = letter;
}

// n tokens, or NULL if there is no memory.
static synth_token *synth_vocabulary(int n_tokens) {
    synth_token *tokens = calloc((size_t)n_tokens, sizeof *tokens);
    if (!tokens) return NULL;
    int n = 0, limit = n_tokens - 3;
    for (; n < 256; n++) {
        synth_byte_text(n, tokens[n].text);
        tokens[n].left = -1;
    }
    for (int c = 0; c < 26; c++) synth_token_add(tokens, &n, limit, ' ', synth_letters[c]);
    for (int c = 0; c < 26; c++)
        for (int d = 0; d < 26; d++)
            synth_token_add(tokens, &n, limit, synth_letters[c], synth_letters[d]);
    // Everything later: a token and each letter, in order, which makes every text once.
    for (int left = 256; left < n && n < limit; left++)
        for (int d = 0; d < 26; d++) synth_token_add(tokens, &n, limit, left, synth_letters[d]);
    for (int i = 0; i < 3; i++, n++) {
        snprintf(tokens[n].text, sizeof tokens[n].text, "%s", synth_specials[i]);
        tokens[n].left = -1;
    }
    return tokens;
}

static void synth_tokenizer(synth_file *f) {
    static const char *const pre[][2] = {{"deepseek2", "deepseek-llm"}, {"llama", "llama-bpe"},
                                         {"olmoe", "olmo"},             {"gpt-oss", "gpt-4o"}};
    int n = f->c->vocab, n_merges = 0;
    if (f->o->no_tokenizer) {
        synth_text(f, "tokenizer.ggml.model", "none");
        return;
    }
    synth_token *tokens = synth_vocabulary(n);
    if (!tokens) {
        f->out_of_memory = 1;
        return;
    }
    const char *name = "qwen2";
    for (int i = 0; i < 4; i++)
        if (!strcmp(f->c->arch, pre[i][0])) name = pre[i][1];
    synth_text(f, "tokenizer.ggml.model", "gpt2");
    synth_text(f, "tokenizer.ggml.pre", name);
    synth_array(f, "tokenizer.ggml.tokens", 8, (uint64_t)n);
    for (int i = 0; i < n; i++) {
        synth_string(f, tokens[i].text);
        n_merges += tokens[i].left >= 0;
    }
    synth_array(f, "tokenizer.ggml.token_type", 5, (uint64_t)n);
    for (int i = 0; i < n; i++) synth_number(f, i < n - 3 ? 1 : 3, 4);
    synth_array(f, "tokenizer.ggml.merges", 8, (uint64_t)n_merges);
    for (int i = 0; i < n; i++) {
        char merge[32];
        if (tokens[i].left < 0) continue;
        snprintf(merge, sizeof merge, "%s %c", tokens[tokens[i].left].text, tokens[i].letter);
        synth_string(f, merge);
    }
    free(tokens);
    synth_u32(f, "tokenizer.ggml.bos_token_id", n - 3);
    synth_u32(f, "tokenizer.ggml.eos_token_id", n - 2);
    synth_u32(f, "tokenizer.ggml.padding_token_id", n - 1);
    synth_bool(f, "tokenizer.ggml.add_bos_token", !strcmp(f->c->arch, "deepseek2"));
}

// ---- metadata --------------------------------------------------------------------------------

static int synth_is(const synth_file *f, const char *arch) { return !strcmp(f->c->arch, arch); }

static void synth_keys_mla(synth_file *f) {
    const synth_config *c = f->c;
    int mla_keys = f->o->mla_keys ? f->o->mla_keys > 0 : f->o->kvb == SYNTH_KVB_SPLIT;
    synth_u32(f, ".leading_dense_block_count", c->lead);
    if (c->q_lora) synth_u32(f, ".attention.q_lora_rank", c->q_lora);
    synth_u32(f, ".attention.kv_lora_rank", c->kv_lora);
    if (mla_keys) {
        synth_u32(f, ".attention.head_count_kv", 1);
        synth_u32(f, ".attention.key_length", c->kv_lora + c->rope);
        synth_u32(f, ".attention.value_length", c->kv_lora);
        synth_u32(f, ".attention.key_length_mla", c->nope + c->rope);
        synth_u32(f, ".attention.value_length_mla", c->v_dim);
    } else {
        synth_u32(f, ".attention.head_count_kv", c->n_head);
        synth_u32(f, ".attention.key_length", c->nope + c->rope);
        synth_u32(f, ".attention.value_length", c->v_dim);
    }
    synth_u32(f, ".rope.dimension_count", c->rope);
    synth_u32(f, ".expert_shared_count", c->n_shared);
    if (c->scale > 0) synth_f32(f, ".expert_weights_scale", c->scale);
    synth_bool(f, ".expert_weights_norm", c->norm_w);
    synth_u32(f, ".expert_gating_func", c->gating);
    if (c->groups) {
        synth_u32(f, ".expert_group_count", c->groups);
        synth_u32(f, ".expert_group_used_count", c->groups_used);
    }
}

static void synth_keys(synth_file *f) {
    const synth_config *c = f->c;
    char name[128];
    float base = synth_is(f, "deepseek2") ? 10000.0f : synth_is(f, "gpt-oss") ? 150000.0f : 1e6f;
    snprintf(name, sizeof name, "synthetic %s %s seed %llu", c->name,
             f->mix ? f->mix->name : f->base->name, (unsigned long long)f->o->seed);
    synth_text(f, "general.architecture", c->arch);
    synth_text(f, "general.name", name);
    synth_text(f, "general.type", "model");
    synth_u32(f, "general.alignment", SYNTH_ALIGN);
    synth_u32(f, "general.quantization_version", 2);
    synth_u32(f, ".block_count", c->n_layer);
    synth_u32(f, ".context_length", synth_is(f, "deepseek2") ? 163840 : 32768);
    synth_u32(f, ".embedding_length", c->n_embd);
    synth_u32(f, ".feed_forward_length", c->n_ff);
    synth_u32(f, ".attention.head_count", c->n_head);
    synth_f32(f, ".attention.layer_norm_rms_epsilon", 1e-6f);
    synth_f32(f, ".rope.freq_base", c->rope_base > 0 ? c->rope_base : base);
    synth_u32(f, ".expert_count", c->n_exp);
    synth_u32(f, ".expert_used_count", c->n_used);
    synth_u32(f, ".expert_feed_forward_length", c->n_ff_exp);
    synth_u32(f, ".vocab_size", c->vocab);
    if (synth_is(f, "deepseek2")) {
        synth_keys_mla(f);
    } else {
        synth_u32(f, ".attention.head_count_kv", c->n_kv);
        synth_u32(f, ".attention.key_length", c->head_dim);
        synth_u32(f, ".attention.value_length", c->head_dim);
        synth_u32(f, ".rope.dimension_count", c->head_dim);
    }
    if (c->n_ff_shexp) synth_u32(f, ".expert_shared_feed_forward_length", c->n_ff_shexp);
    if (c->window) synth_u32(f, ".attention.sliding_window", c->window);
    if (c->yarn_factor > 0) {
        synth_text(f, ".rope.scaling.type", "yarn");
        synth_f32(f, ".rope.scaling.factor", c->yarn_factor);
        synth_u32(f, ".rope.scaling.original_context_length", c->yarn_ctx);
        if (c->yarn_log > 0) synth_f32(f, ".rope.scaling.yarn_log_multiplier", c->yarn_log);
    }
    synth_tokenizer(f);
}

// ---- tensors ---------------------------------------------------------------------------------

static const synth_type *synth_pick(const synth_file *f, synth_role role, uint64_t row) {
    const synth_type *type = f->base;
    if (role >= SYNTH_ROUTER) return synth_find_type("f32");
    if (f->mix && role == SYNTH_DOWN) type = synth_find_type(f->mix->down);
    if (f->mix && role == SYNTH_EXPERT) type = synth_find_type(f->mix->experts);
    if (f->mix && role == SYNTH_HEAD) type = synth_find_type(f->mix->head);
    if (f->mix && (role == SYNTH_V || role == SYNTH_V_B)) type = synth_find_type(f->mix->v);
    if (f->o->kvb == SYNTH_KVB_BOTH && role >= SYNTH_KV_B && type->block > 1)
        type = synth_find_type("q8_0");
    while (row % type->block) type = synth_find_type(type->fallback);
    return type;
}

// layer < 0: a tensor of the whole model. n1 and n2 are 0 for vectors and matrices. std 0: such
// that inputs of variance 1 give outputs of variance 1.
static void synth_tensor_add(synth_file *f, int layer, const char *name, synth_role role,
                             uint64_t n0, uint64_t n1, uint64_t n2, double std) {
    if (f->n_tensors == f->tensors_capacity) {
        size_t capacity = f->tensors_capacity * 2 + 64;
        synth_tensor *grown = realloc(f->tensors, capacity * sizeof *grown);
        if (!grown) {
            f->out_of_memory = 1;
            return;
        }
        f->tensors = grown;
        f->tensors_capacity = capacity;
    }
    synth_tensor *t = &f->tensors[f->n_tensors++];
    memset(t, 0, sizeof *t);
    if (layer < 0) snprintf(t->name, sizeof t->name, "%s", name);
    else snprintf(t->name, sizeof t->name, "blk.%d.%s", layer, name);
    t->n_dims = n2 ? 3 : n1 ? 2 : 1;
    t->ne[0] = n0;
    t->ne[1] = n1 ? n1 : 1;
    t->ne[2] = n2 ? n2 : 1;
    t->ne[3] = 1;
    t->role = role;
    t->type = synth_pick(f, role, n0);
    t->std = (float)(std > 0 ? std : 1 / sqrt((double)n0));
    t->bytes = n0 / t->type->block * t->type->bytes * t->ne[1] * t->ne[2];
    t->seed = synth_seed(f->o->seed, t->name);
}

// attn_kv_b {lora, heads * (nope + v)} or its halves. Those of float types, and all of them if a
// file has both forms, take their values from one random matrix.
static void synth_tensors_kv_b(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t lora = (uint64_t)c->kv_lora, nope = (uint64_t)c->nope, v_dim = (uint64_t)c->v_dim;
    uint64_t heads = (uint64_t)c->n_head;
    double std = 1 / sqrt((double)lora);
    size_t first = f->n_tensors;
    if (f->o->kvb != SYNTH_KVB_SPLIT)
        synth_tensor_add(f, layer, "attn_kv_b.weight", SYNTH_KV_B, lora, heads * (nope + v_dim), 0,
                         std);
    if (f->o->kvb != SYNTH_KVB_FUSED && f->o->flat_kvb) {
        synth_tensor_add(f, layer, "attn_k_b.weight", SYNTH_K_B, nope, heads * lora, 0, std);
        synth_tensor_add(f, layer, "attn_v_b.weight", SYNTH_V_B, lora, heads * v_dim, 0, std);
    } else if (f->o->kvb != SYNTH_KVB_FUSED) {
        synth_tensor_add(f, layer, "attn_k_b.weight", SYNTH_K_B, nope, lora, heads, std);
        synth_tensor_add(f, layer, "attn_v_b.weight", SYNTH_V_B, lora, v_dim, heads, std);
    }
    if (f->out_of_memory) return;
    char name[64];
    snprintf(name, sizeof name, "blk.%d.attn_kv_b.weight", layer);
    for (size_t i = first; i < f->n_tensors; i++) {
        synth_tensor *t = &f->tensors[i];
        if (t->type->block > 1 && f->o->kvb != SYNTH_KVB_BOTH) continue;
        t->seed = synth_seed(f->o->seed, name);
        t->nope = c->nope;
        t->lora = c->kv_lora;
        t->v_dim = c->v_dim;
    }
}

static void synth_tensors_mla(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, q_lora = (uint64_t)c->q_lora, lora = (uint64_t)c->kv_lora;
    uint64_t heads = (uint64_t)c->n_head, qk = heads * (uint64_t)(c->nope + c->rope);
    if (q_lora) {
        synth_tensor_add(f, layer, "attn_q_a.weight", SYNTH_WEIGHT, embd, q_lora, 0, 0);
        synth_tensor_add(f, layer, "attn_q_a_norm.weight", SYNTH_NORM, q_lora, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_q_b.weight", SYNTH_WEIGHT, q_lora, qk, 0, 0);
    } else {
        synth_tensor_add(f, layer, "attn_q.weight", SYNTH_WEIGHT, embd, qk, 0, 0);
    }
    synth_tensor_add(f, layer, "attn_kv_a_mqa.weight", SYNTH_WEIGHT, embd,
                     lora + (uint64_t)c->rope, 0, 0);
    synth_tensor_add(f, layer, "attn_kv_a_norm.weight", SYNTH_NORM, lora, 0, 0, 0.1);
    synth_tensors_kv_b(f, layer);
    synth_tensor_add(f, layer, "attn_output.weight", SYNTH_WEIGHT, heads * (uint64_t)c->v_dim,
                     embd, 0, 0);
}

static void synth_tensors_gqa(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, dim = (uint64_t)c->head_dim;
    uint64_t q = (uint64_t)c->n_head * dim, kv = (uint64_t)c->n_kv * dim;
    int per_head = synth_is(f, "qwen3moe"), whole = synth_is(f, "olmoe");
    synth_tensor_add(f, layer, "attn_q.weight", SYNTH_WEIGHT, embd, q, 0, 0);
    synth_tensor_add(f, layer, "attn_k.weight", SYNTH_WEIGHT, embd, kv, 0, 0);
    synth_tensor_add(f, layer, "attn_v.weight", SYNTH_V, embd, kv, 0, 0);
    synth_tensor_add(f, layer, "attn_output.weight", SYNTH_WEIGHT, q, embd, 0, 0);
    if (per_head || whole) {
        synth_tensor_add(f, layer, "attn_q_norm.weight", SYNTH_NORM, whole ? q : dim, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_k_norm.weight", SYNTH_NORM, whole ? kv : dim, 0, 0, 0.1);
    }
    if (synth_is(f, "qwen2moe") || synth_is(f, "gpt-oss")) {
        synth_tensor_add(f, layer, "attn_q.bias", SYNTH_BIAS, q, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_k.bias", SYNTH_BIAS, kv, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_v.bias", SYNTH_BIAS, kv, 0, 0, 0.1);
    }
    if (synth_is(f, "gpt-oss")) {
        synth_tensor_add(f, layer, "attn_output.bias", SYNTH_BIAS, embd, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_sinks.weight", SYNTH_BIAS, (uint64_t)c->n_head, 0, 0, 1);
    }
}

static void synth_tensors_experts(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, n = (uint64_t)c->n_exp, wide = (uint64_t)c->n_ff_exp;
    uint64_t shared = c->n_ff_shexp ? (uint64_t)c->n_ff_shexp : wide * (uint64_t)c->n_shared;
    double router = 3 / sqrt((double)embd); // wide enough that experts differ in weight
    synth_tensor_add(f, layer, "ffn_gate_inp.weight", SYNTH_ROUTER, embd, n, 0, router);
    if (synth_is(f, "gpt-oss"))
        synth_tensor_add(f, layer, "ffn_gate_inp.bias", SYNTH_BIAS, n, 0, 0, 0.1);
    if (c->bias) synth_tensor_add(f, layer, "exp_probs_b.bias", SYNTH_BIAS, n, 0, 0, 0.05);
    synth_tensor_add(f, layer, "ffn_gate_exps.weight", SYNTH_EXPERT, embd, wide, n, 0);
    synth_tensor_add(f, layer, "ffn_up_exps.weight", SYNTH_EXPERT, embd, wide, n, 0);
    synth_tensor_add(f, layer, "ffn_down_exps.weight", SYNTH_DOWN, wide, embd, n, 0);
    if (synth_is(f, "gpt-oss")) {
        synth_tensor_add(f, layer, "ffn_gate_exps.bias", SYNTH_BIAS, wide, n, 0, 0.1);
        synth_tensor_add(f, layer, "ffn_up_exps.bias", SYNTH_BIAS, wide, n, 0, 0.1);
        synth_tensor_add(f, layer, "ffn_down_exps.bias", SYNTH_BIAS, embd, n, 0, 0.1);
    }
    if (shared) {
        synth_tensor_add(f, layer, "ffn_gate_shexp.weight", SYNTH_WEIGHT, embd, shared, 0, 0);
        synth_tensor_add(f, layer, "ffn_up_shexp.weight", SYNTH_WEIGHT, embd, shared, 0, 0);
        synth_tensor_add(f, layer, "ffn_down_shexp.weight", SYNTH_DOWN, shared, embd, 0, 0);
    }
    if (synth_is(f, "qwen2moe"))
        synth_tensor_add(f, layer, "ffn_gate_inp_shexp.weight", SYNTH_ROUTER, embd, 0, 0, router);
}

static void synth_tensors(synth_file *f) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, vocab = (uint64_t)c->vocab, wide = (uint64_t)c->n_ff;
    const char *norm = synth_is(f, "gpt-oss") ? "post_attention_norm.weight" : "ffn_norm.weight";
    synth_tensor_add(f, -1, "token_embd.weight", SYNTH_EMBEDDING, embd, vocab, 0, 1);
    synth_tensor_add(f, -1, "output_norm.weight", SYNTH_NORM, embd, 0, 0, 0.1);
    if (!c->tied) synth_tensor_add(f, -1, "output.weight", SYNTH_HEAD, embd, vocab, 0, 0);
    for (int i = 0; i < c->n_layer && !f->out_of_memory; i++) {
        synth_tensor_add(f, i, "attn_norm.weight", SYNTH_NORM, embd, 0, 0, 0.1);
        if (synth_is(f, "deepseek2")) synth_tensors_mla(f, i);
        else synth_tensors_gqa(f, i);
        synth_tensor_add(f, i, norm, SYNTH_NORM, embd, 0, 0, 0.1);
        if (i < c->lead) {
            synth_tensor_add(f, i, "ffn_gate.weight", SYNTH_WEIGHT, embd, wide, 0, 0);
            synth_tensor_add(f, i, "ffn_up.weight", SYNTH_WEIGHT, embd, wide, 0, 0);
            synth_tensor_add(f, i, "ffn_down.weight", SYNTH_DOWN, wide, embd, 0, 0);
        } else {
            synth_tensors_experts(f, i);
        }
    }
}

// ---- writing ---------------------------------------------------------------------------------

static int synth_fail(const synth_options *o, int code, const char *what, const char *name,
                      const char *why) {
    char text[512];
    snprintf(text, sizeof text, "%s %s%s%s", what, name, *why ? ": " : "", why);
    if (o && o->error) snprintf(o->error, o->error_size, "%s", text);
    else fprintf(stderr, "moe-synth: %s\n", text);
    return code;
}

static uint64_t synth_padding(uint64_t n) { return (SYNTH_ALIGN - n % SYNTH_ALIGN) % SYNTH_ALIGN; }

// Header, metadata, tensor table and padding up to the data, all into f->head.
static void synth_make_head(synth_file *f) {
    static const unsigned char zeros[SYNTH_ALIGN];
    uint64_t offset = 0;
    synth_bytes(f, zeros, 24); // filled in below, when the counts are known
    synth_keys(f);
    synth_tensors(f);
    for (size_t i = 0; i < f->n_tensors && !f->out_of_memory; i++) {
        const synth_tensor *t = &f->tensors[i];
        synth_string(f, t->name);
        synth_number(f, (uint64_t)t->n_dims, 4);
        for (int d = 0; d < t->n_dims; d++) synth_number(f, t->ne[d], 8);
        synth_number(f, t->type->id, 4);
        synth_number(f, offset, 8);
        offset += t->bytes + synth_padding(t->bytes);
    }
    synth_bytes(f, zeros, synth_padding(f->head_size));
    if (f->out_of_memory) return;
    memcpy(f->head, "GGUF", 4);
    synth_put(f->head + 4, 3, 4);
    synth_put(f->head + 8, f->n_tensors, 8);
    synth_put(f->head + 16, f->n_values, 8);
}

// Everything to `out`: 0, or 1 with errno.
static int synth_write_data(const synth_file *f, FILE *out, unsigned char *buffer, size_t size) {
    if (fwrite(f->head, 1, f->head_size, out) != f->head_size) return 1;
    for (size_t i = 0; i < f->n_tensors; i++) {
        const synth_tensor *t = &f->tensors[i];
        uint64_t blocks = t->bytes / t->type->bytes, step = size / t->type->bytes;
        for (uint64_t b = 0; b < blocks; b += step) {
            uint64_t n = blocks - b < step ? blocks - b : step;
            synth_fill(t, b, n, buffer);
            if (fwrite(buffer, t->type->bytes, n, out) != n) return 1;
        }
        memset(buffer, 0, SYNTH_ALIGN);
        uint64_t pad = synth_padding(t->bytes);
        if (fwrite(buffer, 1, pad, out) != pad) return 1;
    }
    return 0;
}

static int synth_write_file(const synth_file *f, const char *path) {
    const size_t size = (size_t)4 << 20;
    unsigned char *buffer = malloc(size);
    FILE *out = buffer ? output_begin(path) : NULL;
    int failed = 1;
    if (out) {
        setvbuf(out, NULL, _IONBF, 0); // the writes are large already
        failed = output_end(!synth_write_data(f, out, buffer, size));
    }
    const int reason = buffer ? errno : ENOMEM;
    free(buffer);
    return failed ? synth_fail(f->o, 1, "cannot write", path, strerror(reason)) : 0;
}

// Everything but the weights: f->head and f->tensors, which the caller frees, whatever comes
// back. *c and *o stay in use. 0: done; 1: out of memory; 2: the options are wrong.
static int synth_begin(synth_file *f, const synth_config *c, const synth_options *o) {
    const char *type = o->type ? o->type : "f32";
    memset(f, 0, sizeof *f);
    f->c = c;
    f->o = o;
    f->mix = synth_find_mix(type);
    f->base = synth_find_type(f->mix ? f->mix->base : type);
    if (!f->base) return synth_fail(o, 2, "unknown type", type, "see --list");
    if (strcmp(c->arch, "deepseek2") && (o->kvb || o->q_lora))
        return synth_fail(o, 2, "shape", c->name, "only deepseek2 has attn_kv_b and q_lora");
    if (c->n_layer < 1 || c->n_layer > 4096)
        return synth_fail(o, 2, "shape", c->name, "1 to 4096 layers, please");
    if (c->vocab < (o->no_tokenizer ? 1 : SYNTH_MIN_VOCAB) || c->vocab > SYNTH_MAX_VOCAB)
        return synth_fail(o, 2, "shape", c->name, "the vocabulary has 259 to 4194304 tokens");
    if (c->q_lora > 1 << 20) return synth_fail(o, 2, "shape", c->name, "q_lora is too large");
    synth_make_head(f);
    return f->out_of_memory ? synth_fail(o, 1, "cannot make", c->name, "out of memory") : 0;
}

// Writes the model of a shape. 0: done; 1: the file cannot be written; 2: the options are wrong.
static int synth_write_config(const synth_config *config, const char *path,
                              const synth_options *options) {
    synth_options o;
    synth_config c = *config;
    synth_file f;
    memset(&o, 0, sizeof o);
    if (options) o = *options;
    if (!o.seed) o.seed = 1;
    if (o.n_layer) c.n_layer = o.n_layer;
    if (o.vocab) c.vocab = o.vocab;
    if (o.q_lora) c.q_lora = o.q_lora < 0 ? 0 : o.q_lora;
    if (o.tied) c.tied = o.tied > 0;
    int result = synth_begin(&f, &c, &o);
    if (result == 0) result = synth_write_file(&f, path);
    free(f.head);
    free(f.tensors);
    return result;
}

static inline int synth_write(const char *config, const char *path, const synth_options *options) {
    const synth_config *c = synth_find(config);
    if (!c) return synth_fail(options, 2, "unknown shape", config, "see --list");
    return synth_write_config(c, path, options);
}

// ---- the program -----------------------------------------------------------------------------

#ifndef SYNTH_NO_MAIN

static void synth_help(FILE *out) {
    fputs("usage: moe-synth SHAPE OUT.gguf [options]\n"
          "Writes a GGUF file of a Mixture-of-Experts model with seeded random weights.\n"
          "\n"
          "  --type T       f32 (default), f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_K, q3_K,\n"
          "                 q4_K, q5_K, q6_K, iq4_nl, iq4_xs, or a mix: q4_K_M, q5_K_M (down\n"
          "                 projections, values and output in q6_K), mxfp4 (experts; rest q8_0)\n"
          "  --layers N     instead of the shape's own number\n"
          "  --vocab N      tokens, at least 259\n"
          "  --seed N       of the random numbers (default 1)\n"
          "  --kvb-split    deepseek2: attn_k_b and attn_v_b instead of attn_kv_b\n"
          "  --kvb-both     deepseek2: all three (q8_0 if the type is quantized)\n"
          "  --q-lora N     deepseek2: rank of the query projection, 0 for none\n"
          "  --tied         no output.weight: the embedding serves as output matrix\n"
          "  --no-tokenizer token ids only\n"
          "  --list         shapes and types\n"
          "  --help\n"
          "\n"
          "Rows that are not a multiple of a type's block take another: q2_K and q3_K take q4_0,\n"
          "q4_K q5_0, q5_K q5_1, q6_K q8_0, iq4_xs iq4_nl, blocks of 32 take f16. Norms, biases\n"
          "and routers are f32.\n"
          "Exit codes: 0 done, 1 the file could not be written, 2 wrong arguments.\n",
          out);
}

static void synth_list(void) {
    printf("%-18s %-10s %6s %6s %7s %8s %5s %7s\n", "shape", "family", "layers", "width", "vocab",
           "experts", "used", "exp.width");
    for (int i = 0; i < SYNTH_N_CONFIGS; i++) {
        const synth_config *c = &synth_configs[i];
        printf("%-18s %-10s %6d %6d %7d %8d %5d %7d\n", c->name, c->arch, c->n_layer, c->n_embd,
               c->vocab, c->n_exp, c->n_used, c->n_ff_exp);
    }
    printf("\ntypes:");
    for (int i = 0; i < SYNTH_N_TYPES; i++) printf(" %s", synth_types[i].name);
    for (int i = 0; i < SYNTH_N_MIXES; i++) printf(" %s", synth_mixes[i].name);
    puts("");
}

// A whole decimal number within bounds, or exit 2.
static uint64_t synth_argument(const char *flag, const char *text, uint64_t least, uint64_t most) {
    char *end = NULL;
    errno = 0;
    unsigned long long value = text ? strtoull(text, &end, 10) : 0;
    if (!text || !*text || *end || errno || strchr(text, '-') || value < least || value > most) {
        fprintf(stderr, "moe-synth: %s needs a number from %llu to %llu\n", flag,
                (unsigned long long)least, (unsigned long long)most);
        exit(2);
    }
    return value;
}

static void synth_report(const char *path) {
    struct stat status;
    if (!output_file.is_direct && stat(path, &status) == 0) // else it may be standard output
        printf("%s: %.1f MB\n", path, (double)status.st_size / 1e6);
}

int main(int argc, char **argv) {
    const char *words[2] = {NULL, NULL};
    int n_words = 0;
    synth_options o;
    memset(&o, 0, sizeof o);
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *value = argv[i + 1]; // argv[argc] is NULL
        int takes_value = 1;
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) {
            synth_help(stdout);
            return output_finish("moe-synth", 0);
        } else if (!strcmp(a, "--list")) {
            synth_list();
            return output_finish("moe-synth", 0);
        } else if (!strcmp(a, "--type")) {
            if (!value) return synth_fail(NULL, 2, a, "needs a type", "see --list");
            o.type = value;
        } else if (!strcmp(a, "--layers")) {
            o.n_layer = (int)synth_argument(a, value, 1, 4096);
        } else if (!strcmp(a, "--vocab")) {
            o.vocab = (int)synth_argument(a, value, SYNTH_MIN_VOCAB, SYNTH_MAX_VOCAB);
        } else if (!strcmp(a, "--seed")) {
            o.seed = synth_argument(a, value, 0, UINT64_MAX);
        } else if (!strcmp(a, "--q-lora")) {
            o.q_lora = (int)synth_argument(a, value, 0, 1 << 20);
            if (!o.q_lora) o.q_lora = -1;
        } else {
            takes_value = 0;
            if (!strcmp(a, "--kvb-split")) o.kvb = SYNTH_KVB_SPLIT;
            else if (!strcmp(a, "--kvb-both")) o.kvb = SYNTH_KVB_BOTH;
            else if (!strcmp(a, "--tied")) o.tied = 1;
            else if (!strcmp(a, "--no-tokenizer")) o.no_tokenizer = 1;
            else if (*a != '-' && n_words < 2) words[n_words++] = a;
            else return synth_fail(NULL, 2, "unknown argument", a, "see --help");
        }
        i += takes_value;
    }
    if (n_words < 2) {
        synth_help(stderr);
        return 2;
    }
    int result = synth_write(words[0], words[1], &o);
    if (result == 0) synth_report(words[1]);
    return output_finish("moe-synth", result);
}

#endif
