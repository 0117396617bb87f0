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
    int q_lora, kv_lora, nope, rope, v_dim; // multi-head latent attention; rope also elsewhere
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
    const char *layers;                     // kinds, repeated: M recurrent, * attention, E experts
                                            // only; NULL: attention in all
    int moe_step;                           // experts in the last of so many layers; 0: 1
    int conv;                               // taps of the convolution
    int inner, state;                       // recurrent layers: width, values per channel or head
    int state_heads, state_groups;          // heads (jamba: rank of the step's projection), groups
    int kda_dim;                            // width of a head of KDA (kimi-linear, bailingmoe3)
    float lower_bound;                      // of its gate (bailingmoe3)
    int latent;                             // width of the experts' inputs; 0: n_embd
    float clamp, clamp_shexp;               // limits of the SwiGLU; 0: no keys
    float embd_scale, residual_scale, attn_scale, logit_scale; // 0: no keys
    // Of attention families that are not in synth_configs:
    const char *like;                       // a family whose dense relative it is
    unsigned has;                           // SYNTH_HAS and what else
    const char *windows;                    // W a layer with a window, * one without, repeated
    int head_swa, kv_swa, dim_swa, rope_swa; // layers with a window, if they differ: heads,
                                            // key-value heads, their width, how much is turned
    float base_swa;                         // their rope base; 0: no key
    float value_scale, clamp_kqv;           // 0: no keys
    float temperature;                      // of queries far from the start; 0: no keys
    int temperature_length;
    int chunk, n_ff_chunk;                  // experts that share a chunk expert, its width
    float chunk_scale;
    int index_heads, index_dim, index_top, index_block; // indexer; top 0: there is none
    float attn_cap, final_cap;              // soft caps; 0: no keys
} synth_config;

// What an attention family has; HAS stands for none of it, but the config is written by these.
enum {
    SYNTH_HAS = 1,
    SYNTH_QK_NORM = 1 << 1,      // norms of queries and keys, by head
    SYNTH_QK_NORM_WIDE = 1 << 2, // over all heads
    SYNTH_FUSED_QKV = 1 << 3,    // attn_qkv
    SYNTH_QKV_BIAS = 1 << 4,
    SYNTH_OUT_BIAS = 1 << 5,     // of attn_output
    SYNTH_SINKS = 1 << 6,        // in layers with a window
    SYNTH_GATE = 1 << 7,         // attn_gate: of each value
    SYNTH_GATE_HEAD = 1 << 8,    // of each head
    SYNTH_POST_NORMS = 1 << 9,   // post_attention_norm, post_ffw_norm
    SYNTH_LAYER_NORM = 1 << 10,  // attention.layer_norm_epsilon, for norms of that kind
    SYNTH_NORM_BIAS = 1 << 11,
    SYNTH_GATE_UP = 1 << 12,     // ffn_gate_up_exps
    SYNTH_KEYS_ARE_VALUES = 1 << 13, // no attn_v in layers without a window
    SYNTH_BESIDE = 1 << 14,      // a dense network beside the experts
    SYNTH_ROPE_FREQS = 1 << 15,
    SYNTH_LONG_ROPE = 1 << 16,
    SYNTH_PERIOD = 1 << 17,      // the windows' pattern as a number
    SYNTH_NO_PATTERN = 1 << 18,  // or left to the family
    SYNTH_EXPERT_SCALES = 1 << 19 // ffn_down_exps.scale
};

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

// Families with recurrent layers, in a table of their own: some tests go through all of one only.
static const synth_config synth_hybrids[] = {
    // Published shapes.
    {.name = "qwen3.5-35b-a3b", .arch = "qwen35moe", .n_layer = 40, .n_embd = 2048,
     .vocab = 248320, .n_head = 16, .n_kv = 2, .head_dim = 256, .rope = 64, .n_exp = 256,
     .n_used = 8, .n_ff_exp = 512, .n_ff_shexp = 512, .rope_base = 1e7f, .layers = "MMM*",
     .conv = 4, .inner = 4096, .state = 128, .state_heads = 32, .state_groups = 16},
    {.name = "qwen3-next-80b-a3b", .arch = "qwen3next", .n_layer = 48, .n_embd = 2048,
     .vocab = 151936, .n_head = 16, .n_kv = 2, .head_dim = 256, .rope = 64, .n_ff = 5120,
     .n_exp = 512, .n_used = 10, .n_ff_exp = 512, .n_ff_shexp = 512, .rope_base = 1e7f,
     .layers = "MMM*", .conv = 4, .inner = 4096, .state = 128, .state_heads = 32,
     .state_groups = 16},
    {.name = "lfm2-8b-a1b", .arch = "lfm2moe", .n_layer = 24, .n_embd = 2048, .vocab = 65536,
     .n_head = 32, .n_kv = 8, .head_dim = 64, .n_ff = 7168, .lead = 2, .n_exp = 32, .n_used = 4,
     .n_ff_exp = 1792, .gating = 2, .bias = 1, .rope_base = 1e6f, .tied = 1,
     .layers = "MM*MMM*MMM*MMM*MMM*MM*MM", .conv = 3},
    {.name = "granite-4-h-tiny", .arch = "granitehybrid", .n_layer = 40, .n_embd = 1536,
     .vocab = 100352, .n_head = 12, .n_kv = 4, .head_dim = 128, .n_ff = 512, .n_exp = 64,
     .n_used = 6, .n_ff_exp = 512, .n_ff_shexp = 1024, .layers = "MMMMM*MMMM", .conv = 4,
     .inner = 3072, .state = 128, .state_heads = 48, .state_groups = 1, .embd_scale = 12,
     .residual_scale = 0.22f, .attn_scale = 0.0078125f, .logit_scale = 6},
    {.name = "nemotron-3-nano", .arch = "nemotron_h_moe", .n_layer = 52, .n_embd = 2688,
     .vocab = 131072, .n_head = 32, .n_kv = 2, .head_dim = 128, .n_exp = 128, .n_used = 6,
     .n_ff_exp = 1856, .n_shared = 1, .n_ff_shexp = 3712, .norm_w = 1, .bias = 1, .groups = 1,
     .groups_used = 1, .scale = 2.5f,
     .layers = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", .conv = 4, .inner = 4096,
     .state = 128, .state_heads = 64, .state_groups = 8},
    {.name = "jamba-52b", .arch = "jamba", .n_layer = 32, .n_embd = 4096, .vocab = 65536,
     .n_head = 32, .n_kv = 8, .head_dim = 128, .n_ff = 14336, .n_exp = 16, .n_used = 2,
     .n_ff_exp = 14336, .layers = "MMMM*MMM", .moe_step = 2, .conv = 4, .inner = 8192,
     .state = 16, .state_heads = 256},
    {.name = "kimi-linear-48b-a3b", .arch = "kimi-linear", .n_layer = 27, .n_embd = 2304,
     .vocab = 163840, .n_head = 32, .kv_lora = 512, .nope = 128, .rope = 64, .v_dim = 128,
     .n_ff = 9216, .lead = 1, .n_exp = 256, .n_used = 8, .n_ff_exp = 1024, .n_shared = 1,
     .gating = 2, .bias = 1, .scale = 2.446f, .layers = "MMM*MMM*MMM*MMM*MMM*MMM*MM*",
     .conv = 4, .kda_dim = 128},
    // Not verified: the layers, the width and the number of experts are what llama.cpp takes for
    // this model of 124 billion weights, 5.1 of them active; the rest is guessed to come near.
    {.name = "ling-3-flash", .arch = "bailingmoe3", .n_layer = 42, .n_embd = 2560,
     .vocab = 157184, .n_head = 32, .kv_lora = 512, .nope = 128, .rope = 64, .v_dim = 128,
     .n_ff = 9216, .lead = 2, .n_exp = 512, .n_used = 8, .n_ff_exp = 768, .n_shared = 1,
     .n_ff_shexp = 768, .gating = 2, .norm_w = 1, .bias = 1, .groups = 8, .groups_used = 4,
     .scale = 2.5f, .rope_base = 6e6f, .layers = "MMMMM*", .conv = 4, .kda_dim = 128,
     .lower_bound = -5},
    {.name = "minimax-text-01", .arch = "minimax-01", .n_layer = 80, .n_embd = 6144,
     .vocab = 200064, .n_head = 64, .n_kv = 8, .head_dim = 128, .rope = 64, .n_ff = 9216,
     .n_exp = 32, .n_used = 2, .n_ff_exp = 9216, .rope_base = 1e7f, .layers = "MMMMMMM*",
     .residual_scale = 3.5566f},

    // Small: rows of 32 or more values, for float types and types with blocks of 32.
    {.name = "qwen35moe_tiny", .arch = "qwen35moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 16, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .n_ff_shexp = 64, .rope_base = 1e7f, .layers = "MMM*", .conv = 4, .inner = 128, .state = 32,
     .state_heads = 4, .state_groups = 2},
    {.name = "qwen3next_tiny", .arch = "qwen3next", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 8, .n_ff = 96, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_ff_shexp = 64, .rope_base = 1e7f, .layers = "MMM*", .conv = 4,
     .inner = 192, .state = 32, .state_heads = 6, .state_groups = 2},
    {.name = "lfm2moe_tiny", .arch = "lfm2moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .lead = 1, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .gating = 2, .bias = 1, .rope_base = 1e6f, .tied = 1, .layers = "MM*M",
     .conv = 3},
    {.name = "qwen35_tiny", .arch = "qwen35", .like = "qwen35moe", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 96, .lead = 4,
     .rope_base = 1e7f, .layers = "MMM*", .conv = 4, .inner = 128, .state = 32,
     .state_heads = 4, .state_groups = 2},
    {.name = "lfm2_tiny", .arch = "lfm2", .like = "lfm2moe", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .lead = 4,
     .rope_base = 1e6f, .tied = 1, .layers = "MM*M", .conv = 3},
    {.name = "granitehybrid_dense_tiny", .arch = "granitehybrid", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .lead = 4,
     .layers = "M*MM", .conv = 4, .inner = 128, .state = 32, .state_heads = 4,
     .state_groups = 1, .embd_scale = 12, .residual_scale = 0.22f, .attn_scale = 0.0625f,
     .logit_scale = 6},
    {.name = "granitehybrid_tiny", .arch = "granitehybrid", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 32, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_ff_shexp = 64, .layers = "M*MM", .conv = 4, .inner = 128, .state = 32,
     .state_heads = 4, .state_groups = 1, .embd_scale = 12, .residual_scale = 0.22f,
     .attn_scale = 0.125f, .logit_scale = 6},
    {.name = "nemotron_h_moe_tiny", .arch = "nemotron_h_moe", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 32, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 1, .n_ff_shexp = 64, .norm_w = 1, .bias = 1, .groups = 1,
     .groups_used = 1, .scale = 2.5f, .layers = "ME*E", .conv = 4, .inner = 128, .state = 32,
     .state_heads = 4, .state_groups = 2},
    {.name = "nemotron_latent_tiny", .arch = "nemotron_h_moe", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 32, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 64, .n_shared = 1, .n_ff_shexp = 96, .norm_w = 1, .bias = 1, .scale = 5,
     .layers = "M*EM", .conv = 4, .inner = 192, .state = 32, .state_heads = 6, .state_groups = 3,
     .latent = 32},
    {.name = "jamba_tiny", .arch = "jamba", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .n_exp = 8, .n_used = 3, .n_ff_exp = 96,
     .layers = "MM*M", .moe_step = 2, .conv = 4, .inner = 128, .state = 16, .state_heads = 32},
    {.name = "kimi-linear_tiny", .arch = "kimi-linear", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .kv_lora = 64, .nope = 32, .rope = 16, .v_dim = 32, .n_ff = 96, .lead = 1,
     .n_exp = 8, .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .gating = 2, .bias = 1,
     .scale = 2.446f, .layers = "MM*M", .conv = 4, .kda_dim = 32},
    {.name = "bailingmoe3_tiny", .arch = "bailingmoe3", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .q_lora = 96, .kv_lora = 64, .nope = 32, .rope = 16, .v_dim = 32, .n_ff = 96,
     .lead = 1, .n_exp = 8, .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .n_ff_shexp = 64,
     .gating = 2, .norm_w = 1, .bias = 1, .groups = 4, .groups_used = 2, .scale = 2.5f,
     .layers = "MM*M", .conv = 4, .kda_dim = 32, .lower_bound = -5, .clamp = 1.5f,
     .clamp_shexp = 2},
    {.name = "minimax-01_tiny", .arch = "minimax-01", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 32, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .rope_base = 1e7f, .layers = "MMM*", .residual_scale = 3.5566f},

    // Small: rows of 256 values, for every type.
    {.name = "qwen35moe_quant", .arch = "qwen35moe", .n_layer = 2, .n_embd = 256, .vocab = 384,
     .n_head = 4, .n_kv = 2, .head_dim = 64, .rope = 32, .n_exp = 4, .n_used = 2,
     .n_ff_exp = 256, .n_ff_shexp = 256, .rope_base = 1e7f, .layers = "M*", .conv = 4,
     .inner = 256, .state = 64, .state_heads = 4, .state_groups = 2},
    {.name = "nemotron_h_moe_quant", .arch = "nemotron_h_moe", .n_layer = 3, .n_embd = 256,
     .vocab = 384, .n_head = 4, .n_kv = 2, .head_dim = 64, .n_exp = 4, .n_used = 2,
     .n_ff_exp = 256, .n_shared = 1, .n_ff_shexp = 512, .norm_w = 1, .bias = 1, .groups = 1,
     .groups_used = 1, .scale = 2.5f, .layers = "M*E", .conv = 4, .inner = 256, .state = 64,
     .state_heads = 4, .state_groups = 2},
    {.name = "kimi-linear_quant", .arch = "kimi-linear", .n_layer = 3, .n_embd = 256,
     .vocab = 384, .n_head = 2, .kv_lora = 256, .nope = 256, .rope = 32, .v_dim = 128,
     .n_ff = 256, .lead = 1, .n_exp = 4, .n_used = 2, .n_ff_exp = 256, .n_shared = 1,
     .gating = 2, .bias = 1, .scale = 2.446f, .layers = "MM*", .conv = 4, .kda_dim = 256},
};
enum { SYNTH_N_HYBRIDS = sizeof synth_hybrids / sizeof synth_hybrids[0] };

// Attention families that synth_configs has none of: what they consist of is in .has. Of their own
// table because the reference pass in tests/naive.h does not know them.
static const synth_config synth_families[] = {
    // Published shapes.
    {.name = "glm-4.5-air", .arch = "glm4moe", .n_layer = 46, .n_embd = 4096, .vocab = 151552,
     .n_head = 96, .n_kv = 8, .head_dim = 128, .rope = 64, .n_ff = 10944, .lead = 1, .n_exp = 128,
     .n_used = 8, .n_ff_exp = 1408, .n_shared = 1, .gating = 2, .norm_w = 1, .bias = 1,
     .scale = 1.0f, .rope_base = 1e6f, .has = SYNTH_HAS | SYNTH_QKV_BIAS},
    // Not verified: the width, heads of 512 values and key-value heads of the layers that see all
    // keys, rope bases.
    {.name = "gemma4-26b-a4b", .arch = "gemma4", .n_layer = 30, .n_embd = 2816, .vocab = 262144,
     .n_head = 16, .n_kv = 2, .head_dim = 512, .rope = 512, .n_ff = 2112, .n_exp = 128,
     .n_used = 8, .n_ff_exp = 704, .rope_base = 1e6f, .window = 1024, .tied = 1,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_POST_NORMS | SYNTH_GATE_UP | SYNTH_BESIDE |
            SYNTH_KEYS_ARE_VALUES | SYNTH_ROPE_FREQS | SYNTH_EXPERT_SCALES,
     .windows = "WWWWW*", .kv_swa = 8, .dim_swa = 256, .rope_swa = 256, .base_swa = 10000,
     .final_cap = 30},
    {.name = "minimax-m2", .arch = "minimax-m2", .n_layer = 62, .n_embd = 3072, .vocab = 200064,
     .n_head = 48, .n_kv = 8, .head_dim = 128, .rope = 64, .n_ff = 1536, .n_exp = 256,
     .n_used = 8, .n_ff_exp = 1536, .gating = 2, .bias = 1, .rope_base = 5e6f,
     .has = SYNTH_HAS | SYNTH_QK_NORM_WIDE},
    // Not verified: 96 heads in layers with a window, three dense layers, the shared expert's
    // width, how many values are turned.
    {.name = "step35", .arch = "step35", .n_layer = 45, .n_embd = 4096, .vocab = 128896,
     .n_head = 64, .n_kv = 8, .head_dim = 128, .rope = 128, .n_ff = 11264, .lead = 3,
     .n_exp = 288, .n_used = 8, .n_ff_exp = 1280, .n_shared = 1, .n_ff_shexp = 1280, .gating = 2,
     .norm_w = 1, .bias = 1, .scale = 3.0f, .rope_base = 5e6f, .window = 512,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_GATE_HEAD, .windows = "*WWW", .head_swa = 96,
     .rope_swa = 128, .base_swa = 10000},

    // Small: rows of 32 or more values, for float types and types with blocks of 32.
    {.name = "glm4moe_tiny", .arch = "glm4moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 6, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_shared = 2, .gating = 2, .norm_w = 1, .bias = 1,
     .scale = 1.5f, .rope_base = 1e6f, .has = SYNTH_HAS | SYNTH_QKV_BIAS},
    {.name = "minimax-m2_tiny", .arch = "minimax-m2", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 6, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 32, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .gating = 2, .bias = 1, .rope_base = 5e6f,
     .has = SYNTH_HAS | SYNTH_QK_NORM_WIDE},
    {.name = "hy_v3_tiny", .arch = "hy_v3", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 1, .head_dim = 32, .n_ff = 96, .lead = 1, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 1, .n_ff_shexp = 96, .gating = 2, .norm_w = 1, .bias = 1,
     .scale = 2.5f, .tied = 1, .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_GATE_UP},
    {.name = "dots1_tiny", .arch = "dots1", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 4, .head_dim = 32, .n_ff = 96, .lead = 2, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 2, .gating = 1, .norm_w = 1, .bias = 1, .scale = 2.5f,
     .has = SYNTH_HAS | SYNTH_QK_NORM},
    {.name = "bailingmoe_tiny", .arch = "bailingmoe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 32, .n_ff = 96, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 2, .norm_w = 1, .scale = 1.25f,
     .has = SYNTH_HAS | SYNTH_QKV_BIAS},
    {.name = "bailingmoe2_tiny", .arch = "bailingmoe2", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 2, .n_kv = 1, .head_dim = 32, .rope = 16, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_shared = 2, .n_ff_shexp = 64, .gating = 2, .norm_w = 1,
     .bias = 1, .groups = 2, .groups_used = 1, .scale = 2.5f, .rope_base = 6e5f,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_FUSED_QKV},
    {.name = "ernie4_5-moe_tiny", .arch = "ernie4_5-moe", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_ff_shexp = 64, .bias = 1, .rope_base = 5e5f, .tied = 1,
     .has = SYNTH_HAS | SYNTH_QKV_BIAS | SYNTH_OUT_BIAS},
    {.name = "hunyuan-moe_tiny", .arch = "hunyuan-moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 32, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 1, .n_ff_shexp = 64, .has = SYNTH_HAS | SYNTH_QK_NORM},
    {.name = "qwen3vlmoe_tiny", .arch = "qwen3vlmoe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .rope_base = 5e6f, .has = SYNTH_HAS | SYNTH_QK_NORM},
    {.name = "mistral4_tiny", .arch = "mistral4", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .q_lora = 48, .kv_lora = 64, .nope = 24, .rope = 16, .v_dim = 32, .n_ff = 96,
     .lead = 1, .n_exp = 8, .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .gating = 1, .norm_w = 1,
     .bias = 1, .scale = 1.5f, .yarn_factor = 8, .yarn_ctx = 16, .yarn_log = 0.05f,
     .has = SYNTH_HAS | SYNTH_GATE_UP, .temperature = 0.2f, .temperature_length = 16},
    {.name = "mistral3_tiny", .arch = "mistral3", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 32, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .yarn_factor = 16, .yarn_ctx = 16, .yarn_log = 0.7f, .rope_base = 1e6f, .tied = 1,
     .has = SYNTH_HAS | SYNTH_ROPE_FREQS | SYNTH_OUT_BIAS, .temperature = 0.1f,
     .temperature_length = 16},
    {.name = "deepseek_tiny", .arch = "deepseek", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 4, .head_dim = 16, .n_ff = 96, .lead = 1, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 2, .scale = 1.5f, .has = SYNTH_HAS},
    {.name = "granite_tiny", .arch = "granite", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 32, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .embd_scale = 12, .residual_scale = 0.22f, .attn_scale = 0.125f, .logit_scale = 6,
     .has = SYNTH_HAS},
    {.name = "granitemoe_tiny", .arch = "granitemoe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 32, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .n_ff_shexp = 64, .embd_scale = 12, .residual_scale = 0.22f, .attn_scale = 0.125f,
     .logit_scale = 6, .tied = 1, .has = SYNTH_HAS | SYNTH_ROPE_FREQS},
    {.name = "mellum_tiny", .arch = "mellum", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .yarn_factor = 8, .yarn_ctx = 16, .window = 8,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_NO_PATTERN, .windows = "WWW*"},
    {.name = "maple_tiny", .arch = "maple", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 96, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .window = 8, .clamp = 0.5f, .has = SYNTH_HAS | SYNTH_QK_NORM,
     .windows = "W*WW", .base_swa = 5000},
    {.name = "step35_tiny", .arch = "step35", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 2, .n_kv = 1, .head_dim = 32, .rope = 32, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .n_ff_shexp = 64, .gating = 2, .norm_w = 1,
     .bias = 1, .scale = 3, .rope_base = 5e6f, .window = 8, .clamp = 0.5f, .clamp_shexp = 0.75f,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_GATE_HEAD | SYNTH_ROPE_FREQS, .windows = "*WWW",
     .head_swa = 4, .kv_swa = 2, .rope_swa = 24, .base_swa = 20000},
    {.name = "laguna_tiny", .arch = "laguna", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .n_ff_shexp = 64, .gating = 2, .norm_w = 1,
     .bias = 1, .scale = 2.5f, .yarn_factor = 4, .yarn_ctx = 16, .rope_base = 5e5f, .window = 8,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_GATE_HEAD | SYNTH_NO_PATTERN, .windows = "*WWW",
     .head_swa = 6, .rope_swa = 32},
    {.name = "laguna_wide_tiny", .arch = "laguna", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 32, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_shared = 2, .gating = 2, .norm_w = 1,
     .bias = 1, .scale = 2.5f, .window = 8, .tied = 1,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_GATE | SYNTH_PERIOD, .windows = "*W",
     .head_swa = 2, .rope_swa = 16, .base_swa = 5000},
    {.name = "mimo2_tiny", .arch = "mimo2", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 1, .head_dim = 48, .rope = 16, .v_dim = 32, .n_ff = 96, .lead = 1,
     .n_exp = 8, .n_used = 3, .n_ff_exp = 32, .bias = 1, .rope_base = 5e6f, .window = 8,
     .has = SYNTH_HAS | SYNTH_SINKS, .windows = "*WW*", .kv_swa = 2, .value_scale = 0.707f},
    {.name = "afmoe_tiny", .arch = "afmoe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .gating = 2, .norm_w = 1, .bias = 1,
     .scale = 2.5f, .window = 8,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_GATE | SYNTH_POST_NORMS | SYNTH_PERIOD,
     .windows = "W*"},
    {.name = "exaone-moe_tiny", .arch = "exaone-moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .lead = 1, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 1, .gating = 2, .norm_w = 1, .bias = 1, .groups = 2,
     .groups_used = 1, .scale = 2.5f, .rope_base = 1e6f, .window = 8,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_NO_PATTERN | SYNTH_ROPE_FREQS, .windows = "WWW*"},
    {.name = "cohere2moe_tiny", .arch = "cohere2moe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .lead = 1, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .n_shared = 2, .gating = 2, .norm_w = 1, .scale = 1.5f, .window = 8,
     .logit_scale = 0.25f, .tied = 1, .has = SYNTH_HAS | SYNTH_LAYER_NORM | SYNTH_NO_PATTERN,
     .windows = "*WWW"},
    {.name = "cohere2moe_bare_tiny", .arch = "cohere2moe", .n_layer = 4, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .gating = 1, .norm_w = 1, .window = 8, .logit_scale = 2,
     .has = SYNTH_HAS | SYNTH_GATE_UP, .windows = "WW*W"},
    {.name = "smallthinker_tiny", .arch = "smallthinker", .n_layer = 6, .n_embd = 64,
     .vocab = 512, .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .gating = 1, .rope_base = 1.5e6f, .window = 4096,
     .has = SYNTH_HAS | SYNTH_NO_PATTERN, .windows = "*WWW"},
    {.name = "llama4_tiny", .arch = "llama4", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .rope_base = 5e5f, .n_shared = 1, .moe_step = 2, .has = SYNTH_HAS | SYNTH_ROPE_FREQS},
    {.name = "llama4_128_tiny", .arch = "llama4", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 128, .n_used = 1,
     .n_ff_exp = 32, .rope_base = 5e5f, .n_shared = 1, .moe_step = 2, .has = SYNTH_HAS},
    {.name = "gemma4_tiny", .arch = "gemma4", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 1, .head_dim = 64, .rope = 64, .n_ff = 96, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .rope_base = 1e6f, .window = 8, .tied = 1,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_POST_NORMS | SYNTH_GATE_UP | SYNTH_BESIDE |
            SYNTH_ROPE_FREQS | SYNTH_EXPERT_SCALES | SYNTH_KEYS_ARE_VALUES,
     .windows = "WW*", .kv_swa = 2, .dim_swa = 32, .rope_swa = 32, .base_swa = 5000,
     .final_cap = 20},
    {.name = "gemma4_v_tiny", .arch = "gemma4", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 64, .rope = 64, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .rope_base = 1e6f, .window = 8,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_POST_NORMS | SYNTH_BESIDE | SYNTH_ROPE_FREQS,
     .windows = "W*W*", .dim_swa = 32, .rope_swa = 32},
    {.name = "gemma4_dense_tiny", .arch = "gemma4", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 64, .rope = 64, .n_ff = 96, .lead = 4,
     .rope_base = 1e6f, .window = 8, .tied = 1,
     .has = SYNTH_HAS | SYNTH_QK_NORM | SYNTH_POST_NORMS | SYNTH_ROPE_FREQS |
            SYNTH_KEYS_ARE_VALUES,
     .windows = "WWW*", .dim_swa = 32, .rope_swa = 32, .final_cap = 30},
    {.name = "llama_dense_tiny", .arch = "llama", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .lead = 4, .rope_base = 5e5f,
     .has = SYNTH_HAS | SYNTH_ROPE_FREQS},
    {.name = "mistral3_dense_tiny", .arch = "mistral3", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .lead = 4, .rope_base = 1e6f,
     .has = SYNTH_HAS},
    {.name = "granite_dense_tiny", .arch = "granite", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .lead = 4, .embd_scale = 12,
     .residual_scale = 0.22f, .attn_scale = 0.0625f, .logit_scale = 6, .tied = 1,
     .has = SYNTH_HAS},
    {.name = "qwen2_tiny", .arch = "qwen2", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 96, .lead = 4, .rope_base = 1e6f,
     .has = SYNTH_HAS | SYNTH_QKV_BIAS},
    {.name = "qwen3_tiny", .arch = "qwen3", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .lead = 4, .rope_base = 1e6f, .tied = 1,
     .has = SYNTH_HAS | SYNTH_QK_NORM},
    {.name = "grok_tiny", .arch = "grok", .n_layer = 4, .n_embd = 64, .vocab = 512, .n_head = 4,
     .n_kv = 2, .head_dim = 16, .n_ff = 96, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .embd_scale = 50, .attn_scale = 0.17f, .logit_scale = 0.7f,
     .has = SYNTH_HAS | SYNTH_POST_NORMS | SYNTH_BESIDE, .attn_cap = 5, .final_cap = 10},
    {.name = "grok_bare_tiny", .arch = "grok", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 32, .n_exp = 8, .n_used = 3,
     .n_ff_exp = 32, .embd_scale = 78.38367f, .attn_scale = 0.125f, .logit_scale = 0.5f,
     .tied = 1, .has = SYNTH_HAS | SYNTH_POST_NORMS, .attn_cap = 30},
    {.name = "dbrx_tiny", .arch = "dbrx", .n_layer = 4, .n_embd = 64, .vocab = 512, .n_head = 4,
     .n_kv = 2, .head_dim = 16, .n_ff = 32, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .rope_base = 5e5f, .has = SYNTH_HAS | SYNTH_LAYER_NORM | SYNTH_FUSED_QKV, .clamp_kqv = 1},
    {.name = "arctic_tiny", .arch = "arctic", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 32, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .has = SYNTH_HAS | SYNTH_BESIDE},
    {.name = "phimoe_tiny", .arch = "phimoe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 16, .n_ff = 32, .n_exp = 8, .n_used = 3, .n_ff_exp = 32,
     .has = SYNTH_HAS | SYNTH_QKV_BIAS | SYNTH_OUT_BIAS | SYNTH_NORM_BIAS | SYNTH_LONG_ROPE},
    {.name = "grovemoe_tiny", .arch = "grovemoe", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .n_ff = 96, .n_exp = 8, .n_used = 3, .n_ff_exp = 64,
     .has = SYNTH_HAS | SYNTH_QK_NORM, .chunk = 2, .n_ff_chunk = 32, .chunk_scale = 0.5f},
    {.name = "minimax-m3_tiny", .arch = "minimax-m3", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .n_kv = 2, .head_dim = 32, .rope = 16, .n_ff = 96, .lead = 1, .n_exp = 8,
     .n_used = 3, .n_ff_exp = 32, .n_shared = 2, .gating = 2, .norm_w = 1, .bias = 1, .scale = 2,
     .has = SYNTH_HAS | SYNTH_QK_NORM, .index_heads = 2, .index_dim = 32, .index_top = 8,
     .index_block = 8},
    {.name = "glm-dsa_tiny", .arch = "glm-dsa", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .q_lora = 48, .kv_lora = 64, .nope = 24, .rope = 16, .v_dim = 32, .n_ff = 96,
     .lead = 1, .n_exp = 8, .n_used = 3, .n_ff_exp = 32, .n_shared = 2, .gating = 2, .norm_w = 1,
     .bias = 1, .scale = 2.5f, .rope_base = 1e6f, .tied = 1, .yarn_factor = 4, .yarn_ctx = 16,
     .yarn_log = 0.07f, .has = SYNTH_HAS, .index_heads = 4,
     .index_dim = 64, .index_top = 64},
    {.name = "deepseek32_tiny", .arch = "deepseek32", .n_layer = 4, .n_embd = 64, .vocab = 512,
     .n_head = 4, .q_lora = 48, .kv_lora = 64, .nope = 24, .rope = 16, .v_dim = 32, .n_ff = 96,
     .lead = 1, .n_exp = 8, .n_used = 3, .n_ff_exp = 32, .n_shared = 1, .gating = 2, .norm_w = 1,
     .bias = 1, .groups = 2, .groups_used = 1, .scale = 2.5f, .yarn_factor = 8, .yarn_ctx = 16,
     .yarn_log = 0.0707f, .has = SYNTH_HAS, .index_heads = 4, .index_dim = 64, .index_top = 64},
};
enum { SYNTH_N_FAMILIES = sizeof synth_families / sizeof synth_families[0] };

// Which kind a layer is of: 'M', '*' or 'E'.
static char synth_kind(const synth_config *c, int layer) {
    return c->layers ? c->layers[(size_t)layer % strlen(c->layers)] : '*';
}

// Whether a layer has a window, and what its heads are like.
static int synth_has_window(const synth_config *c, int layer) {
    return c->windows && c->windows[(size_t)layer % strlen(c->windows)] == 'W';
}
static int synth_of_layer(const synth_config *c, int layer, int all, int with_window) {
    return with_window && synth_has_window(c, layer) ? with_window : all;
}
static int synth_n_head(const synth_config *c, int layer) {
    return synth_of_layer(c, layer, c->n_head, c->head_swa);
}
static int synth_n_kv(const synth_config *c, int layer) {
    return synth_of_layer(c, layer, c->n_kv, c->kv_swa);
}
static int synth_head_dim(const synth_config *c, int layer) {
    return synth_of_layer(c, layer, c->head_dim, c->dim_swa);
}
// Widths of values and keys differ where c->v_dim says so.
static int synth_value_dim(const synth_config *c, int layer) {
    return c->v_dim ? c->v_dim : synth_head_dim(c, layer);
}
static int synth_has(const synth_config *c, unsigned features) { return (c->has & features) != 0; }

// Whether a layer has one dense network in place of experts.
static int synth_is_dense(const synth_config *c, int layer) {
    return layer < c->lead || (c->moe_step && layer % c->moe_step != c->moe_step - 1);
}

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
    const char *name, *base, *down, *head, *v, *experts, *qkv;
} synth_mix;

static const synth_mix synth_mixes[] = {
    {"q4_K_M", "q4_K", "q6_K", "q6_K", "q6_K", "q4_K", "q5_K"},
    {"q5_K_M", "q5_K", "q6_K", "q6_K", "q6_K", "q5_K", "q6_K"},
    {"mxfp4", "q8_0", "mxfp4", "q8_0", "q8_0", "mxfp4", "q8_0"}, // only experts are made of it
};
enum { SYNTH_N_MIXES = sizeof synth_mixes / sizeof synth_mixes[0] };

// What a tensor is for: decides its type and its values.
typedef enum synth_role {
    SYNTH_WEIGHT,
    SYNTH_EMBEDDING,
    SYNTH_HEAD,
    SYNTH_V,
    SYNTH_QKV,
    SYNTH_DOWN,
    SYNTH_EXPERT,
    SYNTH_KV_B,
    SYNTH_K_B,
    SYNTH_V_B,
    SYNTH_ROUTER, // from here on F32
    SYNTH_BIAS,
    SYNTH_NORM,  // around 1
    SYNTH_CONV,
    SYNTH_DECAY,  // -std .. -25 std, evenly in the logarithm
    SYNTH_SLOPE,  // std .. 4 std, likewise
    SYNTH_LADDER, // along a row -1, -2, -3 ..., each times 0.75 .. 1.25
    SYNTH_STEP    // softplus of it: 0.001 .. 0.1, likewise
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
    for (int i = 0; i < SYNTH_N_HYBRIDS; i++)
        if (!strcmp(synth_hybrids[i].name, name)) return &synth_hybrids[i];
    for (int i = 0; i < SYNTH_N_FAMILIES; i++)
        if (!strcmp(synth_families[i].name, name)) return &synth_families[i];
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

// One value of what recurrent layers decay by.
static float synth_rate(const synth_tensor *t, uint64_t index) {
    float u = (float)(synth_random(t->seed, index) >> 40) * (1 / 16777216.0f);
    switch (t->role) {
    case SYNTH_DECAY: return -t->std * powf(25, u);
    case SYNTH_SLOPE: return t->std * powf(4, u);
    case SYNTH_LADDER: return -(float)(1 + index % t->ne[0]) * (0.75f + 0.5f * u);
    default: return logf(expm1f(0.001f * powf(100, u)));
    }
}

// Values first .. first + n - 1 of a tensor of floats.
static void synth_fill_floats(const synth_tensor *t, uint64_t first, uint64_t n,
                              unsigned char *out) {
    int moved = t->role == SYNTH_K_B || t->role == SYNTH_V_B;
    float mean = t->role == SYNTH_NORM ? 1.0f : 0.0f, std = t->std;
    uint64_t seed = t->seed;
    for (uint64_t i = 0; i < n; i++) {
        float x = moved ? synth_value(t, first + i) : mean + synth_normal(seed, first + i) * std;
        if (t->role >= SYNTH_DECAY) x = synth_rate(t, first + i);
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

static void synth_i32_array(synth_file *f, const char *key, const int *values, int n) {
    synth_array(f, key, 5, (uint64_t)n);
    for (int i = 0; i < n; i++) synth_number(f, (uint32_t)values[i], 4);
}
// A number for each layer: `value` in those of a kind, 0 in the others.
static void synth_layers(synth_file *f, const char *key, char kind, int value) {
    synth_array(f, key, 5, (uint64_t)f->c->n_layer);
    for (int i = 0; i < f->c->n_layer; i++)
        synth_number(f, synth_kind(f->c, i) == kind ? (uint32_t)value : 0, 4);
}
static void synth_f32_layers(synth_file *f, const char *key, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    synth_array(f, key, 6, (uint64_t)f->c->n_layer);
    for (int i = 0; i < f->c->n_layer; i++) synth_number(f, bits, 4);
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
    static const char *const pre[][2] = {
        {"deepseek2", "deepseek-llm"}, {"llama", "llama-bpe"},      {"olmoe", "olmo"},
        {"gpt-oss", "gpt-4o"},         {"qwen35moe", "qwen35"},     {"lfm2moe", "lfm2"},
        {"granitehybrid", "dbrx"},     {"jamba", "llama-bpe"},      {"nemotron_h_moe", "pixtral"},
        {"kimi-linear", "kimi-k2"},    {"minimax-01", "minimax-m2"},
        {"bailingmoe3", "bailingmoe2"}, {"glm4moe", "glm4"},        {"minimax-m2", "minimax-m2"},
    };
    static const char *const begins[] = {"deepseek2", "lfm2moe", "jamba"};
    const int n_pre = sizeof pre / sizeof pre[0], n_begins = sizeof begins / sizeof begins[0];
    int n = f->c->vocab, n_merges = 0, add_bos = 0;
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
    for (int i = 0; i < n_pre; i++)
        if (!strcmp(f->c->arch, pre[i][0])) name = pre[i][1];
    for (int i = 0; i < n_begins; i++) add_bos |= !strcmp(f->c->arch, begins[i]);
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
    synth_bool(f, "tokenizer.ggml.add_bos_token", add_bos);
}

// ---- metadata --------------------------------------------------------------------------------

// Whether the shape is of a family, or a dense relative of it.
static int synth_is(const synth_file *f, const char *arch) {
    return !strcmp(f->c->like ? f->c->like : f->c->arch, arch);
}

// qwen3next and qwen35moe.
static int synth_is_gdn(const synth_file *f) {
    return synth_is(f, "qwen3next") || synth_is(f, "qwen35moe");
}
static int synth_is_kda(const synth_file *f) { return f->c->kda_dim > 0; }
static int synth_is_mamba2(const synth_file *f) {
    return synth_is(f, "granitehybrid") || synth_is(f, "nemotron_h_moe");
}

static void synth_keys_mla(synth_file *f) {
    const synth_config *c = f->c;
    int mla_keys = f->o->mla_keys ? f->o->mla_keys > 0
                                  : f->o->kvb == SYNTH_KVB_SPLIT || c->has;
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

// Which layers are recurrent, and how wide attention is.
static void synth_keys_hybrid_mixers(synth_file *f) {
    const synth_config *c = f->c;
    const int by_interval = synth_is_gdn(f) || synth_is(f, "minimax-01");
    const int n_rot = c->rope ? c->rope : c->head_dim, pairs = n_rot / 2;
    synth_u32(f, ".attention.head_count", c->n_head);
    if (by_interval) {
        synth_u32(f, ".attention.head_count_kv", c->n_kv);
        synth_array(f, ".attention.recurrent_layers", 7, (uint64_t)c->n_layer);
        for (int i = 0; i < c->n_layer; i++) synth_number(f, synth_kind(c, i) == 'M', 1);
        synth_u32(f, ".full_attention_interval", (int)strlen(c->layers));
    } else {
        synth_layers(f, ".attention.head_count_kv", '*', c->kv_lora ? 1 : c->n_kv);
    }
    if (c->kv_lora) {
        if (c->q_lora) synth_u32(f, ".attention.q_lora_rank", c->q_lora);
        synth_u32(f, ".attention.kv_lora_rank", c->kv_lora);
        synth_u32(f, ".attention.key_length", c->kv_lora + c->rope);
        synth_u32(f, ".attention.key_length_mla", c->nope + c->rope);
        synth_u32(f, ".attention.value_length_mla", c->v_dim);
    } else if (!synth_is(f, "jamba") && !synth_is(f, "lfm2moe")) { // those: n_embd / n_head
        synth_u32(f, ".attention.key_length", c->head_dim);
        synth_u32(f, ".attention.value_length", c->head_dim);
    }
    if (!synth_is(f, "jamba"))
        synth_f32(f, ".rope.freq_base", c->rope_base > 0 ? c->rope_base : 10000.0f);
    if (!synth_is(f, "jamba") && !synth_is(f, "lfm2moe"))
        synth_u32(f, ".rope.dimension_count", n_rot);
    if (synth_is(f, "qwen35moe")) {
        const int sections[4] = {(pairs + 2) / 3, (pairs + 1) / 3, pairs / 3, 0};
        synth_i32_array(f, ".rope.dimension_sections", sections, 4);
    }
    if (synth_is(f, "granitehybrid")) synth_bool(f, ".rope.scaling.finetuned", 0); // no rope
    if (synth_is(f, "lfm2moe")) synth_u32(f, ".shortconv.l_cache", c->conv);
    else if (c->conv) synth_u32(f, ".ssm.conv_kernel", c->conv);
    if (c->inner) {
        synth_u32(f, ".ssm.inner_size", c->inner);
        synth_u32(f, ".ssm.state_size", c->state);
        synth_u32(f, ".ssm.time_step_rank", c->state_heads);
        if (c->state_groups) synth_u32(f, ".ssm.group_count", c->state_groups);
    }
    if (c->kda_dim) synth_u32(f, ".kda.head_dim", c->kda_dim);
    if (c->lower_bound < 0) {
        synth_bool(f, ".kda.safe_gate", 1);
        synth_f32(f, ".kda.gate_lower_bound", c->lower_bound);
    }
}

// The keys of a family with recurrent layers: only those that it reads.
static void synth_keys_hybrid(synth_file *f) {
    const synth_config *c = f->c;
    const int nemotron = synth_is(f, "nemotron_h_moe"), bailing = synth_is(f, "bailingmoe3");
    const int fine = synth_is_gdn(f) || bailing || synth_is(f, "jamba");
    const int one_width = synth_is(f, "granitehybrid") || synth_is(f, "jamba") ||
                          synth_is(f, "minimax-01"); // feed_forward_length is the experts'
    synth_u32(f, ".block_count", c->n_layer);
    synth_u32(f, ".context_length", 32768);
    synth_u32(f, ".embedding_length", c->n_embd);
    synth_u32(f, ".vocab_size", c->vocab);
    synth_f32(f, ".attention.layer_norm_rms_epsilon", fine ? 1e-6f : 1e-5f);
    if (nemotron) synth_f32(f, ".attention.layer_norm_epsilon", 1e-5f);
    if (nemotron) synth_layers(f, ".feed_forward_length", 'E', c->n_ff_exp);
    else if (c->n_ff) synth_u32(f, ".feed_forward_length", c->n_ff);
    synth_keys_hybrid_mixers(f);
    if (c->n_exp) synth_u32(f, ".expert_count", c->n_exp);
    if (c->n_exp) synth_u32(f, ".expert_used_count", c->n_used);
    if (c->n_exp && !one_width) synth_u32(f, ".expert_feed_forward_length", c->n_ff_exp);
    if (c->gating) synth_u32(f, ".expert_gating_func", c->gating);
    if (c->gating) synth_u32(f, ".leading_dense_block_count", c->lead);
    if (c->n_shared) synth_u32(f, ".expert_shared_count", c->n_shared);
    if (nemotron || bailing) synth_bool(f, ".expert_weights_norm", c->norm_w);
    if (c->scale > 0) synth_f32(f, ".expert_weights_scale", c->scale);
    if (c->groups) {
        synth_u32(f, ".expert_group_count", c->groups);
        synth_u32(f, ".expert_group_used_count", c->groups_used);
    }
    if (c->latent) synth_u32(f, ".moe_latent_size", c->latent);
    if (c->clamp > 0) synth_f32_layers(f, ".swiglu_clamp_exp", c->clamp);
    if (c->clamp_shexp > 0) synth_f32_layers(f, ".swiglu_clamp_shexp", c->clamp_shexp);
    if (c->embd_scale > 0) synth_f32(f, ".embedding_scale", c->embd_scale);
    if (c->residual_scale > 0) synth_f32(f, ".residual_scale", c->residual_scale);
    if (c->attn_scale > 0) synth_f32(f, ".attention.scale", c->attn_scale);
    if (c->logit_scale > 0) synth_f32(f, ".logit_scale", c->logit_scale);
}

static void synth_keys_attention(synth_file *f) {
    const synth_config *c = f->c;
    float base = synth_is(f, "deepseek2") ? 10000.0f : synth_is(f, "gpt-oss") ? 150000.0f : 1e6f;
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
}

// A number for each layer if layers with a window have their own, else one for all.
static void synth_u32_layers(synth_file *f, const char *key,
                             int (*of_layer)(const synth_config *, int), int own) {
    if (!own) {
        synth_u32(f, key, of_layer(f->c, 0));
        return;
    }
    synth_array(f, key, 5, (uint64_t)f->c->n_layer);
    for (int i = 0; i < f->c->n_layer; i++)
        synth_number(f, (uint32_t)of_layer(f->c, i), 4);
}

static void synth_keys_heads(synth_file *f) {
    const synth_config *c = f->c;
    const int n_rot = c->rope ? c->rope : c->head_dim;
    synth_u32_layers(f, ".attention.head_count", synth_n_head, c->head_swa);
    synth_u32_layers(f, ".attention.head_count_kv", synth_n_kv, c->kv_swa);
    synth_u32(f, ".attention.key_length", c->head_dim);
    synth_u32(f, ".attention.value_length", c->v_dim ? c->v_dim : c->head_dim);
    synth_u32(f, ".rope.dimension_count", n_rot);
    if (c->dim_swa) synth_u32(f, ".attention.key_length_swa", c->dim_swa);
    if (c->dim_swa) synth_u32(f, ".attention.value_length_swa", c->dim_swa);
    if (c->rope_swa) synth_u32(f, ".rope.dimension_count_swa", c->rope_swa);
    if (synth_is(f, "qwen3vlmoe")) {
        const int sections[4] = {(n_rot / 2 + 2) / 3, (n_rot / 2 + 1) / 3, n_rot / 6, 0};
        synth_i32_array(f, ".rope.dimension_sections", sections, 4);
    }
    if (c->windows && synth_has(c, SYNTH_PERIOD)) {
        synth_u32(f, ".attention.sliding_window_pattern", (int)strlen(c->windows));
    } else if (c->windows && !synth_has(c, SYNTH_NO_PATTERN)) {
        synth_array(f, ".attention.sliding_window_pattern", 7, (uint64_t)c->n_layer);
        for (int i = 0; i < c->n_layer; i++)
            synth_number(f, (uint64_t)synth_has_window(c, i), 1);
    }
    if (c->base_swa > 0) synth_f32(f, ".rope.freq_base_swa", c->base_swa);
    if (c->value_scale > 0) synth_f32(f, ".attention.value_scale", c->value_scale);
    if (c->clamp_kqv > 0) synth_f32(f, ".attention.clamp_kqv", c->clamp_kqv);
    if (c->attn_cap > 0) synth_f32(f, ".attn_logit_softcapping", c->attn_cap);
    if (synth_is(f, "grok")) synth_f32(f, ".attention.output_scale", c->attn_scale);
    else if (c->attn_scale > 0) synth_f32(f, ".attention.scale", c->attn_scale);
}

// The keys of an attention family that is described by c->has.
static void synth_keys_family(synth_file *f) {
    const synth_config *c = f->c;
    synth_u32(f, ".block_count", c->n_layer);
    synth_u32(f, ".context_length", 32768);
    synth_u32(f, ".embedding_length", c->n_embd);
    synth_u32(f, ".vocab_size", c->vocab);
    if (synth_has(c, SYNTH_LAYER_NORM)) synth_f32(f, ".attention.layer_norm_epsilon", 1e-5f);
    else synth_f32(f, ".attention.layer_norm_rms_epsilon", 1e-6f);
    synth_f32(f, ".rope.freq_base", c->rope_base > 0 ? c->rope_base : 10000.0f);
    if (c->n_ff) synth_u32(f, ".feed_forward_length", c->n_ff);
    if (c->n_exp) {
        synth_u32(f, ".expert_count", c->n_exp);
        synth_u32(f, ".expert_used_count", c->n_used);
        synth_u32(f, ".expert_feed_forward_length", c->n_ff_exp);
    }
    if (c->kv_lora) {
        synth_u32(f, ".attention.head_count", c->n_head);
        synth_keys_mla(f);
    } else {
        synth_keys_heads(f);
        if ((c->lead && c->n_exp) || synth_is(f, "laguna") || synth_is(f, "cohere2moe"))
            synth_u32(f, ".leading_dense_block_count", c->lead);
        if (c->gating) synth_u32(f, ".expert_gating_func", c->gating);
        if (c->norm_w) synth_bool(f, ".expert_weights_norm", 1);
        if (c->scale > 0) synth_f32(f, ".expert_weights_scale", c->scale);
        if (c->n_exp) synth_u32(f, ".expert_shared_count", c->n_shared);
        if (c->groups) synth_u32(f, ".expert_group_count", c->groups);
        if (c->groups) synth_u32(f, ".expert_group_used_count", c->groups_used);
    }
    if (synth_is(f, "llama4") || synth_is(f, "ernie4_5-moe"))
        synth_u32(f, ".interleave_moe_layer_step", c->moe_step ? c->moe_step : 1);
    if (synth_is(f, "gemma4")) synth_u32(f, ".embedding_length_per_layer_input", 0);
    if (c->temperature > 0) {
        synth_f32(f, ".attention.temperature_scale", c->temperature);
        synth_u32(f, ".attention.temperature_length", c->temperature_length);
    }
    if (c->chunk) {
        synth_u32(f, ".experts_per_group", c->chunk);
        synth_u32(f, ".expert_chunk_feed_forward_length", c->n_ff_chunk);
        synth_f32(f, ".expert_group_scale", c->chunk_scale);
    }
    if (c->index_top) {
        synth_u32(f, ".attention.indexer.head_count", c->index_heads);
        synth_u32(f, ".attention.indexer.key_length", c->index_dim);
        synth_u32(f, ".attention.indexer.top_k", c->index_top);
        if (c->index_block) synth_u32(f, ".attention.indexer.block_size", c->index_block);
        if (c->index_block) synth_u32(f, ".attention.indexer.local_blocks", 1);
    }
    if (c->clamp > 0) synth_f32_layers(f, ".swiglu_clamp_exp", c->clamp);
    if (c->clamp_shexp > 0) synth_f32_layers(f, ".swiglu_clamp_shexp", c->clamp_shexp);
    if (c->embd_scale > 0) synth_f32(f, ".embedding_scale", c->embd_scale);
    if (c->residual_scale > 0) synth_f32(f, ".residual_scale", c->residual_scale);
    if (c->logit_scale > 0) synth_f32(f, ".logit_scale", c->logit_scale);
    if (c->final_cap > 0) synth_f32(f, ".final_logit_softcapping", c->final_cap);
}

static void synth_keys(synth_file *f) {
    const synth_config *c = f->c;
    char name[128];
    snprintf(name, sizeof name, "synthetic %s %s seed %llu", c->name,
             f->mix ? f->mix->name : f->base->name, (unsigned long long)f->o->seed);
    synth_text(f, "general.architecture", c->arch);
    synth_text(f, "general.name", name);
    synth_text(f, "general.type", "model");
    synth_u32(f, "general.alignment", SYNTH_ALIGN);
    synth_u32(f, "general.quantization_version", 2);
    if (c->layers) synth_keys_hybrid(f);
    else if (c->has) synth_keys_family(f);
    else synth_keys_attention(f);
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
    if (f->mix && role == SYNTH_QKV) type = synth_find_type(f->mix->qkv);
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

// Which form: only deepseek2 has a choice.
static int synth_kvb(const synth_file *f) {
    return synth_is(f, "deepseek2") ? f->o->kvb : SYNTH_KVB_SPLIT;
}

// attn_kv_b {lora, heads * (nope + v)} or its halves. Those of float types, and all of them if a
// file has both forms, take their values from one random matrix.
static void synth_tensors_kv_b(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t lora = (uint64_t)c->kv_lora, nope = (uint64_t)c->nope, v_dim = (uint64_t)c->v_dim;
    uint64_t heads = (uint64_t)c->n_head;
    double std = 1 / sqrt((double)lora);
    size_t first = f->n_tensors;
    const int kvb = synth_kvb(f);
    if (kvb != SYNTH_KVB_SPLIT)
        synth_tensor_add(f, layer, "attn_kv_b.weight", SYNTH_KV_B, lora, heads * (nope + v_dim), 0,
                         std);
    if (kvb != SYNTH_KVB_FUSED && f->o->flat_kvb) {
        synth_tensor_add(f, layer, "attn_k_b.weight", SYNTH_K_B, nope, heads * lora, 0, std);
        synth_tensor_add(f, layer, "attn_v_b.weight", SYNTH_V_B, lora, heads * v_dim, 0, std);
    } else if (kvb != SYNTH_KVB_FUSED) {
        synth_tensor_add(f, layer, "attn_k_b.weight", SYNTH_K_B, nope, lora, heads, std);
        synth_tensor_add(f, layer, "attn_v_b.weight", SYNTH_V_B, lora, v_dim, heads, std);
    }
    if (f->out_of_memory) return;
    char name[64];
    snprintf(name, sizeof name, "blk.%d.attn_kv_b.weight", layer);
    for (size_t i = first; i < f->n_tensors; i++) {
        synth_tensor *t = &f->tensors[i];
        if (t->type->block > 1 && kvb != SYNTH_KVB_BOTH) continue;
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
    if (synth_is(f, "bailingmoe3")) // one number per head
        synth_tensor_add(f, layer, "attn_gate.weight", SYNTH_WEIGHT, embd, heads, 0, 0);
    synth_tensor_add(f, layer, "attn_output.weight", SYNTH_WEIGHT, heads * (uint64_t)c->v_dim,
                     embd, 0, 0);
}

static void synth_tensors_gqa(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, dim = (uint64_t)c->head_dim;
    uint64_t q = (uint64_t)c->n_head * dim, kv = (uint64_t)c->n_kv * dim;
    int gated = synth_is_gdn(f), whole = synth_is(f, "olmoe");
    int per_head = synth_is(f, "qwen3moe") || synth_is(f, "lfm2moe") || gated;
    synth_tensor_add(f, layer, "attn_q.weight", SYNTH_WEIGHT, embd, gated ? 2 * q : q, 0, 0);
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

// The gated delta rule of qwen3next and qwen35moe.
static void synth_tensors_gdn(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, heads = (uint64_t)c->state_heads;
    uint64_t inner = (uint64_t)c->inner, state = (uint64_t)c->state;
    uint64_t qkv = 2 * (uint64_t)c->state_groups * state + inner;
    synth_tensor_add(f, layer, "attn_qkv.weight", SYNTH_QKV, embd, qkv, 0, 0);
    synth_tensor_add(f, layer, "attn_gate.weight", SYNTH_WEIGHT, embd, inner, 0, 0);
    if (synth_is(f, "qwen3next")) {
        synth_tensor_add(f, layer, "ssm_ba.weight", SYNTH_WEIGHT, embd, 2 * heads, 0, 0);
    } else {
        synth_tensor_add(f, layer, "ssm_alpha.weight", SYNTH_WEIGHT, embd, heads, 0, 0);
        synth_tensor_add(f, layer, "ssm_beta.weight", SYNTH_WEIGHT, embd, heads, 0, 0);
    }
    synth_tensor_add(f, layer, "ssm_conv1d.weight", SYNTH_CONV, (uint64_t)c->conv, qkv, 0, 0);
    synth_tensor_add(f, layer, "ssm_dt.bias", SYNTH_STEP, heads, 0, 0, 0);
    synth_tensor_add(f, layer, "ssm_a", SYNTH_DECAY, heads, 0, 0, 0.08);
    synth_tensor_add(f, layer, "ssm_norm.weight", SYNTH_NORM, state, 0, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_out.weight", SYNTH_WEIGHT, inner, embd, 0, 0);
}

// The gated delta rule with a gate per channel: kimi-linear's gates are of low rank, bailingmoe3's
// not.
static void synth_tensors_kda(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, dim = (uint64_t)c->kda_dim, heads = (uint64_t)c->n_head;
    uint64_t inner = heads * dim, taps = (uint64_t)c->conv;
    int full = synth_is(f, "bailingmoe3");
    synth_tensor_add(f, layer, "attn_q.weight", SYNTH_WEIGHT, embd, inner, 0, 0);
    synth_tensor_add(f, layer, "attn_k.weight", SYNTH_WEIGHT, embd, inner, 0, 0);
    synth_tensor_add(f, layer, "attn_v.weight", SYNTH_V, embd, inner, 0, 0);
    synth_tensor_add(f, layer, "ssm_conv1d_q.weight", SYNTH_CONV, taps, 1, inner, 0);
    synth_tensor_add(f, layer, "ssm_conv1d_k.weight", SYNTH_CONV, taps, 1, inner, 0);
    synth_tensor_add(f, layer, "ssm_conv1d_v.weight", SYNTH_CONV, taps, 1, inner, 0);
    synth_tensor_add(f, layer, "ssm_f_a.weight", SYNTH_WEIGHT, embd, full ? inner : dim, 0, 0);
    if (!full) synth_tensor_add(f, layer, "ssm_f_b.weight", SYNTH_WEIGHT, dim, inner, 0, 0);
    synth_tensor_add(f, layer, "ssm_beta.weight", SYNTH_WEIGHT, embd, heads, 0, 0);
    if (full) synth_tensor_add(f, layer, "ssm_a", SYNTH_SLOPE, 1, heads, 0, 0.5);
    else synth_tensor_add(f, layer, "ssm_a", SYNTH_DECAY, 1, heads, 0, 0.08);
    synth_tensor_add(f, layer, "ssm_dt.bias", SYNTH_STEP, inner, 0, 0, 0);
    synth_tensor_add(f, layer, "ssm_g_a.weight", SYNTH_WEIGHT, embd, full ? inner : dim, 0, 0);
    if (!full) synth_tensor_add(f, layer, "ssm_g_b.weight", SYNTH_WEIGHT, dim, inner, 0, 0);
    synth_tensor_add(f, layer, "ssm_norm.weight", SYNTH_NORM, dim, 0, 0, 0.1);
    synth_tensor_add(f, layer, "attn_output.weight", SYNTH_WEIGHT, inner, embd, 0, 0);
}

static void synth_tensors_mamba2(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, heads = (uint64_t)c->state_heads;
    uint64_t inner = (uint64_t)c->inner, groups = (uint64_t)c->state_groups;
    uint64_t channels = inner + 2 * groups * (uint64_t)c->state;
    synth_tensor_add(f, layer, "ssm_in.weight", SYNTH_WEIGHT, embd, inner + channels + heads, 0, 0);
    synth_tensor_add(f, layer, "ssm_conv1d.weight", SYNTH_CONV, (uint64_t)c->conv, channels, 0, 0);
    synth_tensor_add(f, layer, "ssm_conv1d.bias", SYNTH_BIAS, channels, 0, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_dt.bias", SYNTH_STEP, heads, 0, 0, 0);
    synth_tensor_add(f, layer, "ssm_a", SYNTH_DECAY, 1, heads, 0, 0.64);
    synth_tensor_add(f, layer, "ssm_d", SYNTH_NORM, 1, heads, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_norm.weight", SYNTH_NORM, inner / groups, groups, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_out.weight", SYNTH_WEIGHT, inner, embd, 0, 0);
}

// Mamba-1 with three norms (jamba).
static void synth_tensors_mamba1(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, inner = (uint64_t)c->inner, state = (uint64_t)c->state;
    uint64_t rank = (uint64_t)c->state_heads;
    synth_tensor_add(f, layer, "ssm_in.weight", SYNTH_WEIGHT, embd, 2 * inner, 0, 0);
    synth_tensor_add(f, layer, "ssm_conv1d.weight", SYNTH_CONV, (uint64_t)c->conv, inner, 0, 0);
    synth_tensor_add(f, layer, "ssm_conv1d.bias", SYNTH_BIAS, inner, 0, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_x.weight", SYNTH_WEIGHT, inner, rank + 2 * state, 0, 0);
    synth_tensor_add(f, layer, "ssm_dt_norm.weight", SYNTH_NORM, rank, 0, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_b_norm.weight", SYNTH_NORM, state, 0, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_c_norm.weight", SYNTH_NORM, state, 0, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_dt.weight", SYNTH_WEIGHT, rank, inner, 0, 0);
    synth_tensor_add(f, layer, "ssm_dt.bias", SYNTH_STEP, inner, 0, 0, 0);
    synth_tensor_add(f, layer, "ssm_a", SYNTH_LADDER, state, inner, 0, 0);
    synth_tensor_add(f, layer, "ssm_d", SYNTH_NORM, inner, 0, 0, 0.1);
    synth_tensor_add(f, layer, "ssm_out.weight", SYNTH_WEIGHT, inner, embd, 0, 0);
}

static void synth_tensors_shortconv(synth_file *f, int layer) {
    uint64_t embd = (uint64_t)f->c->n_embd, taps = (uint64_t)f->c->conv;
    synth_tensor_add(f, layer, "shortconv.in_proj.weight", SYNTH_WEIGHT, embd, 3 * embd, 0, 0);
    synth_tensor_add(f, layer, "shortconv.conv.weight", SYNTH_CONV, taps, embd, 0, 0);
    synth_tensor_add(f, layer, "shortconv.out_proj.weight", SYNTH_WEIGHT, embd, embd, 0, 0);
}

// Attention without softmax, with a fixed decay (minimax-01).
static void synth_tensors_lightning(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, inner = (uint64_t)c->n_head * (uint64_t)c->head_dim;
    synth_tensor_add(f, layer, "attn_qkv.weight", SYNTH_QKV, embd, 3 * inner, 0, 0);
    synth_tensor_add(f, layer, "attn_gate.weight", SYNTH_WEIGHT, embd, inner, 0, 0);
    synth_tensor_add(f, layer, "attn_norm_2.weight", SYNTH_NORM, inner, 0, 0, 0.1);
    synth_tensor_add(f, layer, "attn_output.weight", SYNTH_WEIGHT, inner, embd, 0, 0);
}

static void synth_tensors_recurrent(synth_file *f, int layer) {
    if (synth_is_gdn(f)) synth_tensors_gdn(f, layer);
    else if (synth_is_kda(f)) synth_tensors_kda(f, layer);
    else if (synth_is_mamba2(f)) synth_tensors_mamba2(f, layer);
    else if (synth_is(f, "jamba")) synth_tensors_mamba1(f, layer);
    else if (synth_is(f, "lfm2moe")) synth_tensors_shortconv(f, layer);
    else synth_tensors_lightning(f, layer);
}

// Grouped-query attention of a family that is described by c->has.
static void synth_tensors_heads(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, dim = (uint64_t)synth_head_dim(c, layer);
    uint64_t heads = (uint64_t)synth_n_head(c, layer), v_dim = (uint64_t)synth_value_dim(c, layer);
    uint64_t q = heads * dim, k = (uint64_t)synth_n_kv(c, layer) * dim, out = heads * v_dim;
    uint64_t v = (uint64_t)synth_n_kv(c, layer) * v_dim, qk = 0;
    int window = synth_has_window(c, layer), wide = synth_has(c, SYNTH_QK_NORM_WIDE);
    if (synth_has(c, SYNTH_FUSED_QKV)) {
        synth_tensor_add(f, layer, "attn_qkv.weight", SYNTH_QKV, embd, q + k + v, 0, 0);
    } else {
        synth_tensor_add(f, layer, "attn_q.weight", SYNTH_WEIGHT, embd, q, 0, 0);
        synth_tensor_add(f, layer, "attn_k.weight", SYNTH_WEIGHT, embd, k, 0, 0);
        if (window || !synth_has(c, SYNTH_KEYS_ARE_VALUES))
            synth_tensor_add(f, layer, "attn_v.weight", SYNTH_V, embd, v, 0, 0);
    }
    synth_tensor_add(f, layer, "attn_output.weight", SYNTH_WEIGHT, out, embd, 0, 0);
    if (synth_has(c, SYNTH_QKV_BIAS)) {
        synth_tensor_add(f, layer, "attn_q.bias", SYNTH_BIAS, q, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_k.bias", SYNTH_BIAS, k, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_v.bias", SYNTH_BIAS, v, 0, 0, 0.1);
    }
    if (synth_has(c, SYNTH_OUT_BIAS))
        synth_tensor_add(f, layer, "attn_output.bias", SYNTH_BIAS, embd, 0, 0, 0.1);
    if (wide || synth_has(c, SYNTH_QK_NORM)) {
        qk = wide ? q : dim;
        synth_tensor_add(f, layer, "attn_q_norm.weight", SYNTH_NORM, qk, 0, 0, 0.1);
        synth_tensor_add(f, layer, "attn_k_norm.weight", SYNTH_NORM, wide ? k : dim, 0, 0, 0.1);
    }
    if (synth_has(c, SYNTH_GATE | SYNTH_GATE_HEAD))
        synth_tensor_add(f, layer, "attn_gate.weight", SYNTH_WEIGHT, embd,
                         synth_has(c, SYNTH_GATE) ? out : heads, 0, 0);
    if (window && synth_has(c, SYNTH_SINKS))
        synth_tensor_add(f, layer, "attn_sinks.weight", SYNTH_BIAS, heads, 0, 0, 1);
}

// What chooses keys, and of minimax-m3 blocks of keys.
static void synth_tensors_indexer(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, dim = (uint64_t)c->index_dim;
    uint64_t heads = (uint64_t)c->index_heads;
    if (!c->index_top || (c->index_block && layer < c->lead)) return;
    if (c->index_block) {
        synth_tensor_add(f, layer, "indexer.q_proj.weight", SYNTH_WEIGHT, embd, heads * dim, 0, 0);
        synth_tensor_add(f, layer, "indexer.k_proj.weight", SYNTH_WEIGHT, embd, dim, 0, 0);
        synth_tensor_add(f, layer, "indexer.q_norm.weight", SYNTH_NORM, dim, 0, 0, 0.1);
        synth_tensor_add(f, layer, "indexer.k_norm.weight", SYNTH_NORM, dim, 0, 0, 0.1);
        return;
    }
    synth_tensor_add(f, layer, "indexer.attn_q_b.weight", SYNTH_WEIGHT, (uint64_t)c->q_lora,
                     heads * dim, 0, 0);
    synth_tensor_add(f, layer, "indexer.attn_k.weight", SYNTH_WEIGHT, embd, dim, 0, 0);
    synth_tensor_add(f, layer, "indexer.k_norm.weight", SYNTH_NORM, dim, 0, 0, 0.1);
    synth_tensor_add(f, layer, "indexer.k_norm.bias", SYNTH_BIAS, dim, 0, 0, 0.1);
    synth_tensor_add(f, layer, "indexer.proj.weight", SYNTH_WEIGHT, embd, heads, 0, 0);
}

static void synth_tensors_experts(synth_file *f, int layer) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, n = (uint64_t)c->n_exp, wide = (uint64_t)c->n_ff_exp;
    uint64_t shared = c->n_ff_shexp ? (uint64_t)c->n_ff_shexp : wide * (uint64_t)c->n_shared;
    uint64_t input = c->latent ? (uint64_t)c->latent : embd;
    int gates = !synth_is(f, "nemotron_h_moe"), fused = synth_has(c, SYNTH_GATE_UP);
    double router = 3 / sqrt((double)embd); // wide enough that experts differ in weight
    synth_tensor_add(f, layer, "ffn_gate_inp.weight", SYNTH_ROUTER, embd, n, 0, router);
    if (synth_is(f, "gpt-oss"))
        synth_tensor_add(f, layer, "ffn_gate_inp.bias", SYNTH_BIAS, n, 0, 0, 0.1);
    if (c->bias) // hy_v3 has it without the suffix
        synth_tensor_add(f, layer, synth_is(f, "hy_v3") ? "exp_probs_b" : "exp_probs_b.bias",
                         SYNTH_BIAS, n, 0, 0, 0.05);
    if (c->latent) {
        synth_tensor_add(f, layer, "ffn_latent_down.weight", SYNTH_WEIGHT, embd, input, 0, 0);
        synth_tensor_add(f, layer, "ffn_latent_up.weight", SYNTH_WEIGHT, input, embd, 0, 0);
    }
    if (fused)
        synth_tensor_add(f, layer, "ffn_gate_up_exps.weight", SYNTH_EXPERT, input, 2 * wide, n, 0);
    if (gates && !fused)
        synth_tensor_add(f, layer, "ffn_gate_exps.weight", SYNTH_EXPERT, input, wide, n, 0);
    if (!fused) synth_tensor_add(f, layer, "ffn_up_exps.weight", SYNTH_EXPERT, input, wide, n, 0);
    synth_tensor_add(f, layer, "ffn_down_exps.weight", SYNTH_DOWN, wide, input, n, 0);
    if (synth_is(f, "gpt-oss")) {
        synth_tensor_add(f, layer, "ffn_gate_exps.bias", SYNTH_BIAS, wide, n, 0, 0.1);
        synth_tensor_add(f, layer, "ffn_up_exps.bias", SYNTH_BIAS, wide, n, 0, 0.1);
        synth_tensor_add(f, layer, "ffn_down_exps.bias", SYNTH_BIAS, embd, n, 0, 0.1);
    }
    if (synth_is(f, "bailingmoe2")) shared *= (uint64_t)c->n_shared;
    if (c->chunk) {
        uint64_t chunk = (uint64_t)c->n_ff_chunk, some = n / (uint64_t)c->chunk;
        synth_tensor_add(f, layer, "ffn_gate_chexps.weight", SYNTH_EXPERT, embd, chunk, some, 0);
        synth_tensor_add(f, layer, "ffn_up_chexps.weight", SYNTH_EXPERT, embd, chunk, some, 0);
        synth_tensor_add(f, layer, "ffn_down_chexps.weight", SYNTH_DOWN, chunk, embd, some, 0);
    }
    if (shared) {
        if (gates)
            synth_tensor_add(f, layer, "ffn_gate_shexp.weight", SYNTH_WEIGHT, embd, shared, 0, 0);
        synth_tensor_add(f, layer, "ffn_up_shexp.weight", SYNTH_WEIGHT, embd, shared, 0, 0);
        synth_tensor_add(f, layer, "ffn_down_shexp.weight", SYNTH_DOWN, shared, embd, 0, 0);
    }
    if (synth_is(f, "qwen2moe") || synth_is_gdn(f))
        synth_tensor_add(f, layer, "ffn_gate_inp_shexp.weight", SYNTH_ROUTER, embd, 0, 0, router);
}

static void synth_tensors_dense(synth_file *f, int layer, uint64_t wide) {
    uint64_t embd = (uint64_t)f->c->n_embd;
    synth_tensor_add(f, layer, "ffn_gate.weight", SYNTH_WEIGHT, embd, wide, 0, 0);
    synth_tensor_add(f, layer, "ffn_up.weight", SYNTH_WEIGHT, embd, wide, 0, 0);
    synth_tensor_add(f, layer, "ffn_down.weight", SYNTH_DOWN, wide, embd, 0, 0);
}

// A norm of the residual, with its bias if the family's have one.
static void synth_norm_add(synth_file *f, int layer, const char *name) {
    char full[64];
    uint64_t embd = (uint64_t)f->c->n_embd;
    snprintf(full, sizeof full, "%s.weight", name);
    synth_tensor_add(f, layer, full, SYNTH_NORM, embd, 0, 0, 0.1);
    snprintf(full, sizeof full, "%s.bias", name);
    if (synth_has(f->c, SYNTH_NORM_BIAS))
        synth_tensor_add(f, layer, full, SYNTH_BIAS, embd, 0, 0, 0.1);
}

// gemma4's layers: five norms more, and factors of the layer, the router's input and the experts.
static void synth_tensors_gemma4(synth_file *f, int layer) {
    uint64_t embd = (uint64_t)f->c->n_embd, n = (uint64_t)f->c->n_exp;
    synth_tensor_add(f, layer, "ffn_gate_inp.scale", SYNTH_NORM, embd, 0, 0, 0.1);
    synth_norm_add(f, layer, "pre_ffw_norm_2");
    synth_norm_add(f, layer, "post_ffw_norm_1");
    synth_norm_add(f, layer, "post_ffw_norm_2");
    synth_tensor_add(f, layer, "layer_output_scale.weight", SYNTH_NORM, 1, 0, 0, 0.1);
    if (synth_has(f->c, SYNTH_EXPERT_SCALES))
        synth_tensor_add(f, layer, "ffn_down_exps.scale", SYNTH_NORM, n, 0, 0, 0.1);
}

// A layer of a family that is described by c->has.
static void synth_tensors_layer(synth_file *f, int layer) {
    const synth_config *c = f->c;
    const int dense = synth_is_dense(c, layer), beside = synth_has(c, SYNTH_BESIDE) && !dense;
    const char *norm = synth_is(f, "glm4moe") ? "post_attention_norm"
                       : synth_is(f, "dbrx")  ? "attn_output_norm"
                                              : "ffn_norm";
    synth_norm_add(f, layer, "attn_norm");
    if (c->kv_lora) synth_tensors_mla(f, layer);
    else synth_tensors_heads(f, layer);
    synth_tensors_indexer(f, layer);
    if (!synth_is(f, "cohere2moe")) synth_norm_add(f, layer, norm);
    if (synth_has(c, SYNTH_POST_NORMS)) {
        const int grok = synth_is(f, "grok");
        synth_norm_add(f, layer, grok ? "attn_output_norm" : "post_attention_norm");
        synth_norm_add(f, layer, grok && beside ? "layer_output_norm" : "post_ffw_norm");
    }
    if (synth_is(f, "arctic")) synth_norm_add(f, layer, "ffn_norm_exps");
    if (synth_is(f, "gemma4") && !dense) synth_tensors_gemma4(f, layer);
    if (dense || beside)
        synth_tensors_dense(f, layer,
                            (uint64_t)(synth_is(f, "arctic") ? c->n_embd : c->n_ff));
    if (!dense) synth_tensors_experts(f, layer);
}

// What no layer of such a family has.
static void synth_tensors_globals(synth_file *f) {
    const synth_config *c = f->c;
    const uint64_t embd = (uint64_t)c->n_embd, vocab = (uint64_t)c->vocab;
    const int full = synth_is(f, "step35") ? c->rope / 2 : c->rope;
    const uint64_t most = (uint64_t)(full > c->rope_swa ? full : c->rope_swa);
    const uint64_t pairs = (most ? most : (uint64_t)c->head_dim) / 2;
    double std = c->embd_scale > 0 ? 1 / c->embd_scale : 1;
    if (synth_is(f, "gemma4") || synth_is(f, "afmoe")) std = 1 / sqrt((double)embd);
    synth_tensor_add(f, -1, "token_embd.weight", SYNTH_EMBEDDING, embd, vocab, 0, std);
    synth_norm_add(f, -1, "output_norm");
    if (!c->tied) synth_tensor_add(f, -1, "output.weight", SYNTH_HEAD, embd, vocab, 0, 0);
    if (synth_is(f, "phimoe"))
        synth_tensor_add(f, -1, "output.bias", SYNTH_BIAS, vocab, 0, 0, 0.1);
    if (synth_has(c, SYNTH_ROPE_FREQS))
        synth_tensor_add(f, -1, "rope_freqs.weight", SYNTH_SLOPE, pairs, 0, 0, 1);
    if (synth_has(c, SYNTH_LONG_ROPE)) {
        synth_tensor_add(f, -1, "rope_factors_long.weight", SYNTH_SLOPE, pairs, 0, 0, 2);
        synth_tensor_add(f, -1, "rope_factors_short.weight", SYNTH_SLOPE, pairs, 0, 0, 1);
    }
}

static void synth_tensors(synth_file *f) {
    const synth_config *c = f->c;
    uint64_t embd = (uint64_t)c->n_embd, vocab = (uint64_t)c->vocab, wide = (uint64_t)c->n_ff;
    if (c->has) {
        synth_tensors_globals(f);
        for (int i = 0; i < c->n_layer && !f->out_of_memory; i++) synth_tensors_layer(f, i);
        return;
    }
    int post = synth_is(f, "gpt-oss") || synth_is_gdn(f), one = synth_is(f, "nemotron_h_moe");
    const char *norm = post ? "post_attention_norm.weight" : "ffn_norm.weight";
    const char *last = synth_is(f, "lfm2moe") ? "token_embd_norm.weight" : "output_norm.weight";
    double std = c->embd_scale > 0 ? 1 / c->embd_scale : 1;
    if (c->layers && c->tied) std = 0; // so that logits have a variance of 1
    synth_tensor_add(f, -1, "token_embd.weight", SYNTH_EMBEDDING, embd, vocab, 0, std);
    synth_tensor_add(f, -1, last, SYNTH_NORM, embd, 0, 0, 0.1);
    if (!c->tied) synth_tensor_add(f, -1, "output.weight", SYNTH_HEAD, embd, vocab, 0, 0);
    for (int i = 0; i < c->n_layer && !f->out_of_memory; i++) {
        char kind = synth_kind(c, i);
        int dense = synth_is_dense(c, i);
        synth_tensor_add(f, i, "attn_norm.weight", SYNTH_NORM, embd, 0, 0, 0.1);
        if (kind == 'M') synth_tensors_recurrent(f, i);
        else if (kind == '*' && c->kv_lora) synth_tensors_mla(f, i);
        else if (kind == '*') synth_tensors_gqa(f, i);
        if (one && kind != 'E') continue; // a layer is one thing only
        if (!one) synth_tensor_add(f, i, norm, SYNTH_NORM, embd, 0, 0, 0.1);
        if (dense) synth_tensors_dense(f, i, wide);
        else synth_tensors_experts(f, i);
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
    if (strcmp(c->arch, "deepseek2") && (o->kvb == SYNTH_KVB_BOTH || (o->kvb && !c->kv_lora)))
        return synth_fail(o, 2, "shape", c->name, "only deepseek2 has attn_kv_b");
    if (strcmp(c->arch, "deepseek2") && strcmp(c->arch, "bailingmoe3") && o->q_lora)
        return synth_fail(o, 2, "shape", c->name, "only deepseek2 and bailingmoe3 have q_lora");
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
          "  --layers N     instead of the shape's own number; of a family with layers of several\n"
          "                 kinds the first N\n"
          "  --vocab N      tokens, at least 259\n"
          "  --seed N       of the random numbers (default 1)\n"
          "  --kvb-split    deepseek2: attn_k_b and attn_v_b instead of attn_kv_b\n"
          "  --kvb-both     deepseek2: all three (q8_0 if the type is quantized)\n"
          "  --q-lora N     deepseek2, bailingmoe3: rank of the query projection, 0 for none\n"
          "  --tied         no output.weight: the embedding serves as output matrix\n"
          "  --no-tokenizer token ids only\n"
          "  --list         shapes and types\n"
          "  --help\n"
          "\n"
          "Rows that are not a multiple of a type's block take another: q2_K and q3_K take q4_0,\n"
          "q4_K q5_0, q5_K q5_1, q6_K q8_0, iq4_xs iq4_nl, blocks of 32 take f16. Norms, biases,\n"
          "routers, convolutions and the rates of recurrent layers are f32.\n"
          "Exit codes: 0 done, 1 the file could not be written, 2 wrong arguments.\n",
          out);
}

static void synth_list(void) {
    printf("%-20s %-14s %6s %6s %7s %8s %5s %7s\n", "shape", "family", "layers", "width", "vocab",
           "experts", "used", "exp.width");
    for (int i = 0; i < SYNTH_N_CONFIGS + SYNTH_N_HYBRIDS + SYNTH_N_FAMILIES; i++) {
        const int n = SYNTH_N_CONFIGS, m = n + SYNTH_N_HYBRIDS;
        const synth_config *c = i < n   ? &synth_configs[i]
                                : i < m ? &synth_hybrids[i - n]
                                        : &synth_families[i - m];
        printf("%-20s %-14s %6d %6d %7d %8d %5d %7d\n", c->name, c->arch, c->n_layer, c->n_embd,
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
