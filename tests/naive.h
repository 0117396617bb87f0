// A deliberately naive forward pass of deepseek2, qwen2moe, qwen3moe, olmoe, gpt-oss, llama with
// experts (Mixtral), and the families of naive_recurrent.h, for tests only: double precision,
// plain loops, no cache, no batching, nothing absorbed or fused. It reads the file with the public
// functions alone and follows the formulas word for word, so that it can serve as their
// documentation and as the judge of the engine.
//
//     x = token_embd[token]
//     for each layer:   x += attention(rms(x, attn_norm));   x += mlp(rms(x, ffn_norm))
//     logits = output * rms(x, output_norm)
//
// All tokens go through a layer together, x is n x n_embd; position = index of the token.
#ifndef NAIVE_H
#define NAIVE_H
#include "../moe_infer.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Roundings that an engine does on purpose, so that wrong results can be told from rounded
// ones. NULL or zeros: none.
typedef struct naive_options {
    int kv_f16;           // what is cached (keys, values, latents): to half precision
    int kv_q8_0;          // the same: to 8 bits per value, blocks of 32 with an f16 scale
    int activations_int8; // inputs of quantized matrices: to 8 bits, in steps of max |x| / 127
                          // within a block of the matrix's type
} naive_options;

typedef struct naive_model {
    const moe_gguf *gguf;
    naive_options options;
    char family[32];
    int mla;       // deepseek2; the others have grouped-query attention
    int rope_norm; // rotated pairs are neighbours: deepseek2, llama
    int oss;       // gpt-oss
    int n_layer, n_embd, n_vocab, n_head, n_head_kv;
    int dk, dv;             // width of a head's query and key, and of its value
    int n_rot;              // values of a head that are rotated
    int nope, kv_lora;      // deepseek2: dk = nope + n_rot; width of the latent
    int n_lead;             // layers at the start with a dense MLP
    int n_exp, n_used;
    int sigmoid, norm_w;    // gating function; weights divided by their sum
    double scale_w;         // weights multiplied by this
    int n_group, n_group_used;
    double eps, softmax_scale;
    double rope_base, rope_factor, rope_mul; // rope_mul: factor of cos and sin
    const float *rope_factors; // NULL, or what the angles are divided by
    double clamp_kqv;       // olmoe: queries, keys and values stay within this; 0: no bound
    int window;             // gpt-oss, some layers: a token sees itself and window - 1 others
    double temperature;     // deepseek2: factor of queries far from the start
    int temperature_length;
    int hybrid;             // some layers recur, see naive_recurrent.h:
    int gate_in_q, head_gates; // attn_q holds gates, too; attn_gate holds one per head
    int no_rope;
    double embd_scale, residual_scale, logit_scale, attn_scale; // 0: 1 / sqrt(dk)
    int yarn;
    double yarn_low, yarn_high; // the ramp, in pairs of values
    void *memory[256];      // what is allocated, freed in reverse order
    int n_memory, failed;
} naive_model;

// ---- reading the file ------------------------------------------------------------------------

static void *naive_alloc(naive_model *m, size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p || m->n_memory == 256) {
        puts("  naive: out of memory");
        exit(1);
    }
    return m->memory[m->n_memory++] = p;
}
typedef struct naive_matrix {
    const float *w; // row by row
    int block;      // of the type that the weights had in the file
    const float *bias; // NULL: none, or added by the caller
} naive_matrix;

static double *naive_doubles(naive_model *m, size_t n) {
    return (double *)naive_alloc(m, n, sizeof(double));
}
static void naive_free_down_to(naive_model *m, int n_memory) {
    while (m->n_memory > n_memory) free(m->memory[--m->n_memory]);
}

// A dense relative counts as its family.
static int naive_is(const naive_model *m, const char *family) {
    const int is_dense = !strcmp(m->family, "qwen35") || !strcmp(m->family, "lfm2");
    const size_t n = strlen(m->family);
    return !strncmp(m->family, family, n) && !strcmp(family + n, is_dense ? "moe" : "");
}
// A key of the model's family.
static const moe_gguf_value *naive_key(const naive_model *m, const char *key) {
    char full[128];
    snprintf(full, sizeof full, "%s.%s", m->family, key);
    return moe_gguf_find_value(m->gguf, full);
}
static int naive_int(const naive_model *m, const char *key, int fallback) {
    int64_t value;
    return moe_gguf_value_int(naive_key(m, key), 0, &value) ? (int)value : fallback;
}
static double naive_real(const naive_model *m, const char *key, double fallback) {
    double value;
    return moe_gguf_value_float(naive_key(m, key), 0, &value) ? value : fallback;
}
static int naive_flag(const naive_model *m, const char *key, int fallback) {
    int value;
    return moe_gguf_value_bool(naive_key(m, key), 0, &value) ? value : fallback;
}
static int naive_text_is(const moe_gguf_value *value, const char *text) {
    const void *cursor = NULL;
    moe_string s;
    return moe_gguf_value_string(value, &cursor, &s) && s.size == strlen(text) &&
           memcmp(s.data, text, s.size) == 0;
}

static const moe_gguf_tensor *naive_find(const naive_model *m, int layer, const char *name) {
    char full[96];
    if (layer < 0) snprintf(full, sizeof full, "%s", name);
    else snprintf(full, sizeof full, "blk.%d.%s", layer, name);
    return moe_gguf_find_tensor(m->gguf, full);
}

// NAME.scale, if the file has it, multiplies the products with NAME.weight: one factor for all,
// or one per expert. Here it multiplies the weights. Some families know it for the attention
// only (so say the reference results: other scales in such a file do not count), but for NVFP4
// weights, of which it is a part.
static int naive_recurs(const naive_model *m, int layer);
static int naive_hybrid_scale(const naive_model *m, int layer, const char *name) {
    if (!strncmp(name, "ffn_gate_inp", 12)) return 1;
    if (!strncmp(name, "ffn_", 4)) return m->gate_in_q || naive_is(m, "nemotron_h_moe");
    if (naive_recurs(m, layer))
        return naive_is(m, "qwen35moe") || naive_is(m, "granitehybrid") || naive_is(m, "jamba") ||
               naive_is(m, "nemotron_h_moe");
    if (naive_is(m, "kimi-linear")) return !strncmp(name, "attn_output", 11);
    return strncmp(name, "attn_gate", 9) != 0 && !naive_is(m, "bailingmoe3");
}
static void naive_apply_scale(naive_model *m, int layer, const char *name, float *w,
                              int64_t count) {
    char other[64];
    size_t stem = strlen(name) - strlen("weight");
    if (strlen(name) < 8 || strcmp(name + stem, "weight") != 0) return;
    const moe_gguf_tensor *weight = naive_find(m, layer, name);
    int everywhere = !strcmp(m->family, "qwen3moe") || !strcmp(m->family, "llama") ||
                     (weight && weight->type == MOE_TYPE_NVFP4);
    if (m->hybrid && layer >= 0) everywhere |= naive_hybrid_scale(m, layer, name);
    if (!everywhere && (m->hybrid ? layer >= 0 : strncmp(name, "attn_", 5) != 0)) return;
    snprintf(other, sizeof other, "%.*sscale", (int)stem, name);
    const moe_gguf_tensor *t = naive_find(m, layer, other);
    if (!t || t->type != MOE_TYPE_F32) return;
    for (int64_t i = 0; i < count; i++) {
        float scale;
        memcpy(&scale, (const char *)t->data + i / (count / t->ne[0]) * 4, 4);
        w[i] *= scale;
    }
}

// All values of a tensor as floats, in GGUF's order. `count` is how many there must be.
static const float *naive_weights(naive_model *m, int layer, const char *name, int64_t count) {
    const moe_gguf_tensor *t = naive_find(m, layer, name);
    float *w = (float *)naive_alloc(m, (size_t)count, sizeof(float));
    if (!t || t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3] != count ||
        moe_type_dequantize(t->type, t->data, w, count / t->ne[0], t->ne[0], NULL) != MOE_OK) {
        printf("  naive: tensor %s of layer %d is missing, misshapen or of an unknown type\n",
               name, layer);
        m->failed = 1;
        return w;
    }
    naive_apply_scale(m, layer, name, w, count);
    return w;
}
static const float *naive_optional(naive_model *m, int layer, const char *name, int64_t count) {
    return naive_find(m, layer, name) ? naive_weights(m, layer, name, count) : NULL;
}
static naive_matrix naive_get_matrix(naive_model *m, int layer, const char *name, int64_t n_in,
                                     int64_t n_out) {
    const moe_gguf_tensor *t = naive_find(m, layer, name);
    naive_matrix matrix = {naive_weights(m, layer, name, n_in * n_out),
                           t ? (int)moe_type_block(t->type) : 1, NULL};
    return matrix;
}

// ---- building blocks -------------------------------------------------------------------------

// x rounded to a multiple of max |x| / 127, block by block.
static void naive_round_int8(const double *x, int n, int block, double *rounded) {
    for (int start = 0; start < n; start += block) {
        int end = start + block < n ? start + block : n;
        float largest = 0;
        for (int i = start; i < end; i++) largest = fmaxf(largest, fabsf((float)x[i]));
        for (int i = start; i < end; i++)
            rounded[i] = largest > 0 ? (double)rintf((float)x[i] * (127 / largest)) *
                                           (double)(largest / 127)
                                     : 0;
    }
}

// To half precision: 11 bits, in steps of 2^-24 at least.
static double naive_f16(double x) {
    int exponent;
    frexp(x, &exponent);
    double step = ldexp(1, exponent - 11 > -24 ? exponent - 11 : -24);
    return rint((double)(float)x / step) * step;
}

// n cached values; for Q8_0 whole blocks of 32: scale max |x| / 127 as f16, then levels.
static void naive_round_cached(const naive_model *m, double *x, int n) {
    for (int i = 0; i < n && m->options.kv_f16; i++) x[i] = naive_f16(x[i]);
    for (int start = 0; start < n && m->options.kv_q8_0; start += 32) {
        float largest = 0;
        for (int i = start; i < start + 32; i++) largest = fmaxf(largest, fabsf((float)x[i]));
        double scale = naive_f16((double)largest / 127);
        for (int i = start; i < start + 32; i++) {
            double level = scale > 0 ? rint((double)(float)x[i] / scale) : 0;
            x[i] = scale * fmax(-127, fmin(127, level));
        }
    }
}

// y[o] = sum of w[o][i] * x[i] over i
static void naive_linear(naive_model *m, naive_matrix matrix, int n_in, int n_out, const double *x,
                         double *y) {
    int mark = m->n_memory;
    const float *w = matrix.w;
    if (m->options.activations_int8 && matrix.block > 1) {
        double *rounded = naive_doubles(m, (size_t)n_in);
        naive_round_int8(x, n_in, matrix.block, rounded);
        x = rounded;
    }
    for (int o = 0; o < n_out; o++, w += n_in) {
        double sum = 0;
        for (int i = 0; i < n_in; i++) sum += (double)w[i] * x[i];
        y[o] = sum;
    }
    naive_free_down_to(m, mark);
}

static void naive_add(const float *bias, int n, double *y) {
    for (int i = 0; i < n && bias; i++) y[i] += (double)bias[i];
}

// y = x / sqrt(mean(x^2) + eps) * gain. y may be x.
static void naive_rms(const double *x, const float *gain, int n, double eps, double *y) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    double scale = 1 / sqrt(sum / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * (double)gain[i];
}

static double naive_sigmoid(double x) { return 1 / (1 + exp(-x)); }

// The angle of pair i at a position: pos * base^(-2i / n_rot), stretched by the factor. YaRN
// stretches slow pairs (ramp 0) and leaves fast ones (ramp 1), blending between the two.
static double naive_angle(const naive_model *m, int position, int i) {
    double angle = position * pow(m->rope_base, -2.0 * i / m->n_rot);
    double ramp = 0;
    if (m->rope_factors) angle /= (double)m->rope_factors[i];
    if (m->yarn) {
        double width = m->yarn_high - m->yarn_low;
        double along = (i - m->yarn_low) / (width > 0.001 ? width : 0.001);
        ramp = 1 - (along < 0 ? 0 : along > 1 ? 1 : along);
    }
    return angle / m->rope_factor * (1 - ramp) + angle * ramp;
}

// Rotates pairs of n_rot values: (2i, 2i + 1) in some families, (i, i + n_rot / 2) in others.
// qwen35moe has sections of pairs for time, height and width, which take turns; what is beyond them
// stays as it is.
static int naive_is_turned(const naive_model *m, int i) {
    int64_t section[3], all = 0, x;
    const moe_gguf_value *value = naive_key(m, "rope.dimension_sections");
    if (!naive_is(m, "qwen35moe")) return 1;
    for (uint64_t k = 0; k < 4; k++) {
        if (!moe_gguf_value_int(value, k, &x)) x = 0;
        if (k < 3) section[k] = x;
        all += x;
    }
    return all == 0 || i % all < 3 * section[i % all % 3];
}
static void naive_rope(const naive_model *m, double *x, int position) {
    for (int i = 0; i < m->n_rot / 2 && !m->no_rope; i++) {
        if (!naive_is_turned(m, i)) continue;
        int first = m->rope_norm ? 2 * i : i, second = m->rope_norm ? 2 * i + 1 : i + m->n_rot / 2;
        double angle = naive_angle(m, position, i), a = x[first], b = x[second];
        x[first] = (a * cos(angle) - b * sin(angle)) * m->rope_mul;
        x[second] = (a * sin(angle) + b * cos(angle)) * m->rope_mul;
    }
}

// One unit between gate * x and up * x: silu(g) * u with silu(z) = z * sigmoid(z). gpt-oss cuts
// off g above 7 and u beyond 7 either way, and has g * sigmoid(1.702 g) * (u + 1).
static double naive_activation(const naive_model *m, double g, double u) {
    if (!m->oss) return g * naive_sigmoid(g) * u;
    g = g > 7 ? 7 : g;
    u = u > 7 ? 7 : u < -7 ? -7 : u;
    return g * naive_sigmoid(1.702 * g) * (u + 1);
}

// out = down * activation(gate * x, up * x), added with weight w; each matrix with its bias.
static void naive_swiglu(naive_model *m, naive_matrix gate, naive_matrix up, naive_matrix down,
                         int width, const double *x, double w, double *out) {
    int mark = m->n_memory;
    double *g = naive_doubles(m, (size_t)width), *u = naive_doubles(m, (size_t)width);
    double *y = naive_doubles(m, (size_t)m->n_embd);
    naive_linear(m, gate, m->n_embd, width, x, g);
    naive_linear(m, up, m->n_embd, width, x, u);
    naive_add(gate.bias, width, g);
    naive_add(up.bias, width, u);
    for (int i = 0; i < width; i++) g[i] = naive_activation(m, g[i], u[i]);
    naive_linear(m, down, width, m->n_embd, g, y);
    naive_add(down.bias, m->n_embd, y);
    for (int i = 0; i < m->n_embd; i++) out[i] += w * y[i];
    naive_free_down_to(m, mark);
}

// ---- attention -------------------------------------------------------------------------------

// Head by head, every token looks back at all up to itself, or at the last `window` of them: q
// n x n_head * dk, k n x n_kv * dk, v n x n_kv * dv, out n x n_head * dv. Query head h uses head
// h / (n_head / n_kv) of k and v. A sink is a score of a head whose exponential joins the sum.
static void naive_attend(naive_model *m, int n, const double *q, const double *k, const double *v,
                         int n_kv, int window, const float *sinks, double *out) {
    int mark = m->n_memory;
    double *p = naive_doubles(m, (size_t)n);
    for (int t = 0; t < n; t++) {
        for (int h = 0; h < m->n_head; h++) {
            int hk = h / (m->n_head / n_kv);
            const double *qt = q + ((size_t)t * (size_t)m->n_head + (size_t)h) * (size_t)m->dk;
            double *o = out + ((size_t)t * (size_t)m->n_head + (size_t)h) * (size_t)m->dv;
            double largest = sinks ? (double)sinks[h] : -INFINITY;
            int first = window && t >= window ? t - window + 1 : 0;
            for (int j = first; j <= t; j++) {
                const double *kj = k + ((size_t)j * (size_t)n_kv + (size_t)hk) * (size_t)m->dk;
                p[j] = 0;
                for (int i = 0; i < m->dk; i++) p[j] += qt[i] * kj[i];
                p[j] *= m->softmax_scale;
                if (p[j] > largest) largest = p[j];
            }
            double sum = sinks ? exp((double)sinks[h] - largest) : 0;
            for (int j = first; j <= t; j++) sum += p[j] = exp(p[j] - largest);
            for (int j = first; j <= t; j++) {
                const double *vj = v + ((size_t)j * (size_t)n_kv + (size_t)hk) * (size_t)m->dv;
                for (int i = 0; i < m->dv; i++) o[i] += p[j] / sum * vj[i];
            }
        }
    }
    naive_free_down_to(m, mark);
}

// Grouped-query attention: biases if the file has them, then norms of queries and keys, if the
// file has them, each head's by itself or (olmoe) of all heads together, then the rotation.
static void naive_norm_heads(const naive_model *m, const float *gain, int n_head, double *x) {
    int wide = !strcmp(m->family, "olmoe"), width = wide ? n_head * m->dk : m->dk;
    for (int h = 0; h < (wide ? 1 : n_head) && gain; h++)
        naive_rms(x + h * m->dk, gain, width, m->eps, x + h * m->dk);
}
static void naive_clamp(const naive_model *m, double *x, int64_t n) {
    for (int64_t i = 0; i < n && m->clamp_kqv > 0; i++)
        x[i] = fmax(-m->clamp_kqv, fmin(m->clamp_kqv, x[i]));
}
// gpt-oss: by an array, or by a period, whose last layer sees all; 0: all have a window.
static int naive_window(const naive_model *m, int layer) {
    const moe_gguf_value *value = naive_key(m, "attention.sliding_window_pattern");
    int64_t sliding = 0;
    if (value && value->type == MOE_VALUE_ARRAY)
        return moe_gguf_value_int(value, (uint64_t)layer, &sliding) && sliding ? m->window : 0;
    int period = naive_int(m, "attention.sliding_window_pattern", 2);
    return period == 0 || layer % period < period - 1 ? m->window : 0;
}
static void naive_attention_gqa(naive_model *m, int layer, int n, const double *xn, double *out) {
    int64_t E = m->n_embd, nq = (int64_t)m->n_head * m->dk, nk = (int64_t)m->n_head_kv * m->dk;
    int64_t nv = (int64_t)m->n_head_kv * m->dv, n_in = m->gate_in_q ? 2 * nq : nq;
    naive_matrix wq = naive_get_matrix(m, layer, "attn_q.weight", E, n_in);
    naive_matrix wk = naive_get_matrix(m, layer, "attn_k.weight", E, nk);
    naive_matrix wv = naive_get_matrix(m, layer, "attn_v.weight", E, nv);
    const float *bq = naive_optional(m, layer, "attn_q.bias", n_in);
    const float *bk = naive_optional(m, layer, "attn_k.bias", nk);
    const float *bv = naive_optional(m, layer, "attn_v.bias", nv);
    int wide = !strcmp(m->family, "olmoe");
    const float *q_norm = naive_optional(m, layer, "attn_q_norm.weight", wide ? nq : m->dk);
    const float *k_norm = naive_optional(m, layer, "attn_k_norm.weight", wide ? nk : m->dk);
    const float *sinks = m->oss ? naive_weights(m, layer, "attn_sinks.weight", m->n_head) : NULL;
    double *q = naive_doubles(m, (size_t)(n * nq)), *k = naive_doubles(m, (size_t)(n * nk));
    double *v = naive_doubles(m, (size_t)(n * nv)), *in = naive_doubles(m, (size_t)(n * n_in));
    for (int t = 0; t < n; t++) {
        naive_linear(m, wq, m->n_embd, (int)n_in, xn + t * E, in + t * n_in);
        naive_add(bq, (int)n_in, in + t * n_in);
        for (int64_t i = 0; i < nq; i++) // of each head its query, then perhaps its gate
            q[t * nq + i] = in[t * n_in + i / m->dk * (n_in / m->n_head) + i % m->dk];
        naive_linear(m, wk, m->n_embd, (int)nk, xn + t * E, k + t * nk);
        naive_linear(m, wv, m->n_embd, (int)nv, xn + t * E, v + t * nv);
        naive_add(bk, (int)nk, k + t * nk);
        naive_add(bv, (int)nv, v + t * nv);
        naive_norm_heads(m, q_norm, m->n_head, q + t * nq);
        naive_norm_heads(m, k_norm, m->n_head_kv, k + t * nk);
        naive_clamp(m, q + t * nq, nq);
        naive_clamp(m, k + t * nk, nk);
        naive_clamp(m, v + t * nv, nv);
        for (int h = 0; h < m->n_head; h++) naive_rope(m, q + t * nq + h * m->dk, t);
        for (int h = 0; h < m->n_head_kv; h++) naive_rope(m, k + t * nk + h * m->dk, t);
        naive_round_cached(m, k + t * nk, (int)nk);
        naive_round_cached(m, v + t * nv, (int)nv);
    }
    naive_attend(m, n, q, k, v, m->n_head_kv, m->oss ? naive_window(m, layer) : 0, sinks,
                 out);
    for (int64_t i = 0; i < n * nq && m->gate_in_q; i++) // dv is dk
        out[i] *= naive_sigmoid(in[i / m->dk * 2 * m->dk + m->dk + i % m->dk]);
}

// The latent's expansion as one matrix kv_b[h * (nope + dv) + row][r], whatever form the file
// has: rows 0..nope-1 of a head make its key, the other dv its value. Files with attn_k_b hold
// the key rows transposed, k_b[h][r][i], and the value rows in attn_v_b, v_b[h][j][r].
static naive_matrix naive_kv_b(naive_model *m, int layer) {
    int64_t H = m->n_head, N = m->nope, L = m->kv_lora, V = m->dv;
    if (naive_find(m, layer, "attn_kv_b.weight"))
        return naive_get_matrix(m, layer, "attn_kv_b.weight", L, H * (N + V));
    const float *k_b = naive_weights(m, layer, "attn_k_b.weight", N * L * H);
    const float *v_b = naive_weights(m, layer, "attn_v_b.weight", L * V * H);
    float *kv_b = (float *)naive_alloc(m, (size_t)(L * H * (N + V)), sizeof(float));
    for (int64_t h = 0; h < H; h++)
        for (int64_t r = 0; r < L; r++) {
            for (int64_t i = 0; i < N; i++)
                kv_b[(h * (N + V) + i) * L + r] = k_b[(h * L + r) * N + i];
            for (int64_t j = 0; j < V; j++)
                kv_b[(h * (N + V) + N + j) * L + r] = v_b[(h * V + j) * L + r];
        }
    naive_matrix matrix = {kv_b, 1, NULL};
    return matrix;
}

// Queries of multi-head latent attention: from x directly, or through a normed bottleneck. Each
// head has nope values, then n_rot that are rotated.
static void naive_mla_queries(naive_model *m, int layer, int n, const double *xn, double *q) {
    int64_t E = m->n_embd, nq = (int64_t)m->n_head * m->dk;
    if (naive_find(m, layer, "attn_q.weight")) {
        naive_matrix w = naive_get_matrix(m, layer, "attn_q.weight", E, nq);
        for (int t = 0; t < n; t++) naive_linear(m, w, m->n_embd, (int)nq, xn + t * E, q + t * nq);
    } else {
        const moe_gguf_tensor *norm = naive_find(m, layer, "attn_q_a_norm.weight");
        int64_t Q = norm ? norm->ne[0] : 1;
        naive_matrix q_a = naive_get_matrix(m, layer, "attn_q_a.weight", E, Q);
        const float *gain = naive_weights(m, layer, "attn_q_a_norm.weight", Q);
        naive_matrix q_b = naive_get_matrix(m, layer, "attn_q_b.weight", Q, nq);
        double *c = naive_doubles(m, (size_t)Q);
        for (int t = 0; t < n; t++) {
            naive_linear(m, q_a, m->n_embd, (int)Q, xn + t * E, c);
            naive_rms(c, gain, (int)Q, m->eps, c);
            naive_linear(m, q_b, (int)Q, (int)nq, c, q + t * nq);
        }
    }
    for (int t = 0; t < n; t++) {
        for (int h = 0; h < m->n_head; h++) naive_rope(m, q + t * nq + h * m->dk + m->nope, t);
        if (!(m->temperature > 0)) continue;
        double far = 1 + m->temperature * log(floor((double)t / m->temperature_length) + 1);
        for (int64_t i = 0; i < nq; i++) q[t * nq + i] *= far;
    }
}

// Multi-head latent attention, not absorbed: each token's latent is normed and expanded into one
// key and one value per head; the rotated part of the key is the same for all heads.
static void naive_attention_mla(naive_model *m, int layer, int n, const double *xn, double *out) {
    int64_t E = m->n_embd, L = m->kv_lora, R = m->n_rot, N = m->nope, V = m->dv, H = m->n_head;
    naive_matrix kv_a = naive_get_matrix(m, layer, "attn_kv_a_mqa.weight", E, L + R);
    const float *gain = naive_weights(m, layer, "attn_kv_a_norm.weight", L);
    naive_matrix kv_b = naive_kv_b(m, layer);
    double *q = naive_doubles(m, (size_t)(n * H * m->dk)), *c = naive_doubles(m, (size_t)(L + R));
    double *k = naive_doubles(m, (size_t)(n * H * m->dk));
    double *v = naive_doubles(m, (size_t)(n * H * V));
    double *expanded = naive_doubles(m, (size_t)(H * (N + V)));
    naive_mla_queries(m, layer, n, xn, q);
    for (int t = 0; t < n; t++) {
        naive_linear(m, kv_a, m->n_embd, (int)(L + R), xn + t * E, c);
        naive_rms(c, gain, (int)L, m->eps, c);
        naive_rope(m, c + L, t);
        naive_round_cached(m, c, (int)(L + R));
        naive_linear(m, kv_b, (int)L, (int)(H * (N + V)), c, expanded);
        for (int64_t h = 0; h < H; h++) {
            double *kh = k + (t * H + h) * m->dk, *vh = v + (t * H + h) * V;
            for (int64_t i = 0; i < N; i++) kh[i] = expanded[h * (N + V) + i];
            for (int64_t i = 0; i < R; i++) kh[N + i] = c[L + i];
            for (int64_t j = 0; j < V; j++) vh[j] = expanded[h * (N + V) + N + j];
        }
    }
    naive_attend(m, n, q, k, v, m->n_head, 0, NULL, out);
    if (!m->head_gates) return;
    naive_matrix w = naive_get_matrix(m, layer, "attn_gate.weight", E, H);
    const float *bias = naive_optional(m, layer, "attn_gate.bias", H);
    double *gate = naive_doubles(m, (size_t)H);
    for (int t = 0; t < n; t++) {
        naive_linear(m, w, m->n_embd, (int)H, xn + t * E, gate);
        naive_add(bias, (int)H, gate);
        for (int64_t i = 0; i < H * V; i++) out[t * H * V + i] *= naive_sigmoid(gate[i / V]);
    }
}

// x += attn_output * attention(rms(x))
static void naive_attention(naive_model *m, int layer, int n, double *x) {
    int mark = m->n_memory;
    int64_t E = m->n_embd, no = (int64_t)m->n_head * m->dv;
    const float *gain = naive_weights(m, layer, "attn_norm.weight", E);
    naive_matrix w = naive_get_matrix(m, layer, "attn_output.weight", no, E);
    const float *bias = naive_optional(m, layer, "attn_output.bias", E);
    double *xn = naive_doubles(m, (size_t)(n * E)), *out = naive_doubles(m, (size_t)(n * no));
    double *y = naive_doubles(m, (size_t)E);
    for (int t = 0; t < n; t++) naive_rms(x + t * E, gain, m->n_embd, m->eps, xn + t * E);
    if (m->mla) naive_attention_mla(m, layer, n, xn, out);
    else naive_attention_gqa(m, layer, n, xn, out);
    for (int t = 0; t < n; t++) {
        naive_linear(m, w, (int)no, m->n_embd, out + t * no, y);
        naive_add(bias, m->n_embd, y);
        for (int64_t i = 0; i < E; i++) x[t * E + i] += y[i];
    }
    naive_free_down_to(m, mark);
}

// ---- experts ---------------------------------------------------------------------------------

// Group-limited routing: of n_group groups of neighbouring experts only the n_group_used stay
// whose two best experts together score most; the others' scores become minus infinity.
static void naive_limit_groups(naive_model *m, double *score) {
    int mark = m->n_memory, size = m->n_exp / m->n_group;
    double *group = naive_doubles(m, (size_t)m->n_group);
    for (int g = 0; g < m->n_group; g++) {
        double first = -INFINITY, second = -INFINITY;
        for (int e = g * size; e < (g + 1) * size; e++) {
            if (score[e] > first) {
                second = first;
                first = score[e];
            } else if (score[e] > second) {
                second = score[e];
            }
        }
        group[g] = first + (size > 1 ? second : 0);
    }
    for (int dropped = 0; dropped < m->n_group - m->n_group_used; dropped++) {
        int worst = -1; // of several, the last
        for (int g = 0; g < m->n_group; g++)
            if (group[g] != INFINITY && (worst < 0 || group[g] <= group[worst])) worst = g;
        group[worst] = INFINITY;
        for (int e = worst * size; e < (worst + 1) * size; e++) score[e] = -INFINITY;
    }
    naive_free_down_to(m, mark);
}

// Which experts a token goes to, and with what weight.
static void naive_route(naive_model *m, naive_matrix router, const float *bias, const double *x,
                        int *chosen, double *weight) {
    int mark = m->n_memory;
    double *p = naive_doubles(m, (size_t)m->n_exp), *score = naive_doubles(m, (size_t)m->n_exp);
    double largest = -INFINITY, sum = 0;
    naive_linear(m, router, m->n_embd, m->n_exp, x, p);
    naive_add(router.bias, m->n_exp, p);
    for (int e = 0; e < m->n_exp; e++)
        if (p[e] > largest) largest = p[e];
    for (int e = 0; e < m->n_exp; e++) {
        p[e] = m->sigmoid ? naive_sigmoid(p[e]) : exp(p[e] - largest);
        sum += p[e];
    }
    for (int e = 0; e < m->n_exp; e++) {
        if (!m->sigmoid) p[e] /= sum;
        score[e] = p[e] + (bias ? (double)bias[e] : 0); // for choosing only
    }
    if (m->n_group > 1) naive_limit_groups(m, score);
    sum = 0;
    for (int i = 0; i < m->n_used; i++) {
        int best = -1; // of several, the first
        for (int e = 0; e < m->n_exp; e++)
            if (!isnan(score[e]) && (best < 0 || score[e] > score[best])) best = e;
        score[best] = NAN;
        chosen[i] = best;
        weight[i] = p[best];
        sum += p[best];
    }
    for (int i = 0; i < m->n_used; i++) {
        if (m->norm_w) weight[i] /= sum > 6.103515625e-5 ? sum : 6.103515625e-5;
        weight[i] *= m->scale_w;
    }
    naive_free_down_to(m, mark);
}

// The experts' gate and up matrices, {n_embd, width, n_exp} each; a file may have them as one
// tensor, per expert the rows of gate and then those of up. Biases stay with the caller.
static void naive_gate_up(naive_model *m, int layer, int64_t *width, naive_matrix *gate,
                          naive_matrix *up) {
    const moe_gguf_tensor *fused = naive_find(m, layer, "ffn_gate_up_exps.weight");
    const moe_gguf_tensor *single = naive_find(m, layer, "ffn_gate_exps.weight");
    int64_t E = m->n_embd, X = m->n_exp;
    if (!fused) {
        *width = single ? single->ne[1] : 1;
        *gate = naive_get_matrix(m, layer, "ffn_gate_exps.weight", E, *width * X);
        *up = naive_get_matrix(m, layer, "ffn_up_exps.weight", E, *width * X);
        return;
    }
    int64_t F = *width = fused->ne[1] / 2;
    naive_matrix both = naive_get_matrix(m, layer, "ffn_gate_up_exps.weight", E, 2 * F * X);
    float *g = (float *)naive_alloc(m, (size_t)(E * F * X), sizeof(float));
    float *u = (float *)naive_alloc(m, (size_t)(E * F * X), sizeof(float));
    for (int64_t e = 0; e < X; e++) {
        memcpy(g + e * E * F, both.w + e * 2 * E * F, sizeof(float) * (size_t)(E * F));
        memcpy(u + e * E * F, both.w + (e * 2 + 1) * E * F, sizeof(float) * (size_t)(E * F));
    }
    gate->w = g;
    up->w = u;
    gate->block = up->block = both.block;
    gate->bias = up->bias = NULL;
}

// One expert's bias: row `expert` of NAME.bias {width, n_exp}, if the file has it.
static const float *naive_expert_bias(naive_model *m, int layer, const char *name, int64_t width,
                                      int expert) {
    const float *bias = naive_optional(m, layer, name, width * m->n_exp);
    return bias ? bias + expert * width : NULL;
}

// x += sum of the chosen experts, weighted, + the shared experts (one MLP, with weight 1, or in
// qwen2moe the sigmoid of its gate's product with the input)
static void naive_experts(naive_model *m, int layer, int n, const double *xn, double *x) {
    const moe_gguf_tensor *shared = naive_find(m, layer, "ffn_gate_shexp.weight");
    int64_t E = m->n_embd, X = m->n_exp, F, S = shared ? shared->ne[1] : 0;
    naive_matrix gate, up, s_gate, s_up, s_down;
    naive_matrix router = naive_get_matrix(m, layer, "ffn_gate_inp.weight", E, X);
    router.bias = naive_optional(m, layer, "ffn_gate_inp.bias", X);
    const float *bias = naive_optional(m, layer, "exp_probs_b.bias", X);
    const float *s_weight = naive_optional(m, layer, "ffn_gate_inp_shexp.weight", E);
    naive_gate_up(m, layer, &F, &gate, &up);
    naive_matrix down = naive_get_matrix(m, layer, "ffn_down_exps.weight", F, E * X);
    if (S) {
        s_gate = naive_get_matrix(m, layer, "ffn_gate_shexp.weight", E, S);
        s_up = naive_get_matrix(m, layer, "ffn_up_shexp.weight", E, S);
        s_down = naive_get_matrix(m, layer, "ffn_down_shexp.weight", S, E);
    }
    int *chosen = (int *)naive_alloc(m, (size_t)m->n_used, sizeof(int));
    double *weight = naive_doubles(m, (size_t)m->n_used);
    for (int t = 0; t < n && !m->failed; t++) {
        naive_route(m, router, bias, xn + t * E, chosen, weight);
        for (int i = 0; i < m->n_used; i++) {
            int mark = m->n_memory;
            naive_matrix g = gate, u = up, d = down;
            g.bias = naive_expert_bias(m, layer, "ffn_gate_exps.bias", F, chosen[i]);
            u.bias = naive_expert_bias(m, layer, "ffn_up_exps.bias", F, chosen[i]);
            d.bias = naive_expert_bias(m, layer, "ffn_down_exps.bias", E, chosen[i]);
            if (naive_find(m, layer, "ffn_gate_up_exps.bias")) {
                g.bias = naive_expert_bias(m, layer, "ffn_gate_up_exps.bias", 2 * F, chosen[i]);
                u.bias = g.bias + F;
            }
            g.w += chosen[i] * E * F;
            u.w += chosen[i] * E * F;
            d.w += chosen[i] * E * F;
            naive_swiglu(m, g, u, d, (int)F, xn + t * E, weight[i], x + t * E);
            naive_free_down_to(m, mark);
        }
        double w = 0;
        for (int64_t i = 0; i < E && s_weight; i++) w += (double)s_weight[i] * xn[t * E + i];
        w = s_weight ? naive_sigmoid(w) : 1;
        if (S) naive_swiglu(m, s_gate, s_up, s_down, (int)S, xn + t * E, w, x + t * E);
    }
}

static void naive_mlp(naive_model *m, int layer, int n, double *x) {
    int mark = m->n_memory;
    int64_t E = m->n_embd;
    const char *norm = m->oss ? "post_attention_norm.weight" : "ffn_norm.weight";
    const float *gain = naive_weights(m, layer, norm, E);
    double *xn = naive_doubles(m, (size_t)(n * E));
    for (int t = 0; t < n; t++) naive_rms(x + t * E, gain, m->n_embd, m->eps, xn + t * E);
    if (layer < m->n_lead) {
        int64_t F = naive_int(m, "feed_forward_length", 0);
        naive_matrix gate = naive_get_matrix(m, layer, "ffn_gate.weight", E, F);
        naive_matrix up = naive_get_matrix(m, layer, "ffn_up.weight", E, F);
        naive_matrix down = naive_get_matrix(m, layer, "ffn_down.weight", F, E);
        for (int t = 0; t < n && !m->failed; t++)
            naive_swiglu(m, gate, up, down, (int)F, xn + t * E, 1, x + t * E);
    } else {
        naive_experts(m, layer, n, xn, x);
    }
    naive_free_down_to(m, mark);
}

#include "naive_recurrent.h"

// ---- hyper-parameters ------------------------------------------------------------------------

// YaRN: a pair that turns beta times within the original context has this index.
static double naive_yarn_pair(const naive_model *m, double context, double beta) {
    const double pi = 3.14159265358979323846;
    return m->n_rot * log(context / (2 * pi * beta)) / (2 * log(m->rope_base));
}

static void naive_read_rope(naive_model *m) {
    double factor = naive_real(m, "rope.scaling.factor", 0);
    double context = naive_int(m, "rope.scaling.original_context_length",
                               naive_int(m, "context_length", 0));
    m->rope_factors = naive_optional(m, -1, "rope_freqs.weight", m->n_rot / 2);
    m->rope_base = naive_real(m, "rope.freq_base", 10000);
    m->rope_factor = factor > 0 ? factor : 1;
    m->rope_mul = 1;
    m->yarn = naive_text_is(naive_key(m, "rope.scaling.type"), "yarn");
    m->softmax_scale = m->attn_scale > 0 ? m->attn_scale : 1 / sqrt(m->dk);
    if (m->yarn) {
        double low = floor(naive_yarn_pair(m, context, 32));
        double high = ceil(naive_yarn_pair(m, context, 1));
        m->yarn_low = low > 0 ? low : 0;
        m->yarn_high = high < m->n_rot - 1 ? high : m->n_rot - 1;
    }
    if (m->yarn) m->rope_mul = 1 + 0.1 * log(m->rope_factor);
    if (m->mla) { // the stretched context's correction is in the scores, not in cos and sin;
                  // without the key, in both
        double log_mul = naive_real(m, "rope.scaling.yarn_log_multiplier", 0);
        if (log_mul > 0 || !m->yarn) m->rope_mul = 1;
        else log_mul = 0.1;
        double mscale = 1 + log_mul * log(m->rope_factor);
        m->softmax_scale *= mscale * mscale;
    }
}

static void naive_read(naive_model *m, const moe_gguf *gguf, const naive_options *options) {
    memset(m, 0, sizeof *m);
    if (options) m->options = *options;
    m->gguf = gguf;
    const void *cursor = NULL;
    moe_string family;
    if (moe_gguf_value_string(moe_gguf_find_value(gguf, "general.architecture"), &cursor, &family))
        snprintf(m->family, sizeof m->family, "%.*s", (int)family.size, family.data);
    m->mla = !strcmp(m->family, "deepseek2");
    m->oss = !strcmp(m->family, "gpt-oss");
    m->rope_norm = m->mla || !strcmp(m->family, "llama");
    const moe_gguf_tensor *embd = moe_gguf_find_tensor(gguf, "token_embd.weight");
    m->n_embd = naive_int(m, "embedding_length", 0);
    m->n_vocab = embd ? (int)embd->ne[1] : 0;
    m->n_layer = naive_int(m, "block_count", 0) - naive_int(m, "nextn_predict_layers", 0);
    m->n_head = naive_int(m, "attention.head_count", 1);
    m->n_head_kv = naive_int(m, "attention.head_count_kv", m->n_head);
    m->eps = naive_real(m, "attention.layer_norm_rms_epsilon", 0);
    m->n_exp = naive_int(m, "expert_count", 0);
    m->n_used = naive_int(m, "expert_used_count", 0);
    // gpt-oss takes the softmax of the chosen experts' scores: the softmax of all, divided by
    // the sum of the chosen, as in qwen3moe and llama.
    m->norm_w = strcmp(m->family, "qwen2moe") != 0 && strcmp(m->family, "olmoe") != 0;
    m->scale_w = 1;
    if (!strcmp(m->family, "olmoe")) m->clamp_kqv = naive_real(m, "attention.clamp_kqv", 0);
    if (m->oss) m->window = naive_int(m, "attention.sliding_window", 0);
    m->dk = naive_int(m, "attention.key_length", m->n_embd / m->n_head);
    m->dv = naive_int(m, "attention.value_length", m->n_embd / m->n_head);
    m->n_rot = naive_int(m, "rope.dimension_count", m->dk);
    if (m->mla) {
        double scale = naive_real(m, "expert_weights_scale", 0);
        int gating = naive_int(m, "expert_gating_func", 0);
        m->dk = naive_int(m, "attention.key_length_mla", m->dk);
        m->dv = naive_int(m, "attention.value_length_mla", m->dv);
        m->nope = m->dk - m->n_rot;
        m->kv_lora = naive_int(m, "attention.kv_lora_rank", 0);
        m->n_lead = naive_int(m, "leading_dense_block_count", 0);
        m->norm_w = naive_flag(m, "expert_weights_norm", 0);
        if (scale > 0) m->scale_w = scale;
        // Without the key: softmax, but GLM-4.7-Flash (47 layers, 48 with its extra one).
        m->sigmoid = gating ? gating == 2 : m->n_layer == 47 || m->n_layer == 48;
        m->temperature = naive_real(m, "attention.temperature_scale", 0);
        m->temperature_length = naive_int(m, "attention.temperature_length", 1);
    }
    m->hybrid = naive_is_hybrid(m);
    if (m->hybrid) naive_read_hybrid(m);
    m->n_group = naive_int(m, "expert_group_count", 0);
    m->n_group_used = naive_int(m, "expert_group_used_count", m->n_group);
    naive_read_rope(m);
}

// Logits of every position, n_tokens x *n_vocab; the caller frees them. NULL if the file lacks
// something.
static double *naive_logits(const moe_gguf *gguf, const int32_t *tokens, int n_tokens,
                            const naive_options *options, int *n_vocab) {
    naive_model model, *m = &model;
    naive_read(m, gguf, options);
    int64_t E = m->n_embd, V = m->n_vocab;
    naive_matrix embd = naive_get_matrix(m, -1, "token_embd.weight", E, V);
    const float *gain = naive_weights(
        m, -1, naive_is(m, "lfm2moe") ? "token_embd_norm.weight" : "output_norm.weight", E);
    naive_matrix head = naive_find(m, -1, "output.weight")
                            ? naive_get_matrix(m, -1, "output.weight", E, V)
                            : embd; // tied
    double *x = naive_doubles(m, (size_t)(n_tokens * E)), *xn = naive_doubles(m, (size_t)E);
    for (int t = 0; t < n_tokens && !m->failed; t++)
        for (int64_t i = 0; i < E; i++)
            x[t * E + i] = (m->hybrid ? m->embd_scale : 1) * (double)embd.w[tokens[t] * E + i];
    for (int layer = 0; layer < m->n_layer && !m->failed; layer++) {
        if (m->hybrid) {
            naive_hybrid_layer(m, layer, n_tokens, x);
            continue;
        }
        naive_attention(m, layer, n_tokens, x);
        if (!m->failed) naive_mlp(m, layer, n_tokens, x);
    }
    double *logits = NULL;
    if (!m->failed) logits = (double *)malloc(sizeof(double) * (size_t)(n_tokens * V));
    for (int t = 0; t < n_tokens && logits; t++) {
        naive_rms(x + t * E, gain, m->n_embd, m->eps, xn);
        naive_linear(m, head, m->n_embd, m->n_vocab, xn, logits + t * V);
        for (int64_t i = 0; i < V && m->hybrid; i++) logits[t * V + i] /= m->logit_scale;
    }
    naive_free_down_to(m, 0);
    *n_vocab = m->n_vocab;
    return logits;
}

#endif
