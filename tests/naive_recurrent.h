// The part of the naive pass (naive.h) that families with recurrent layers have: qwen35moe,
// qwen3next, lfm2moe, granitehybrid, nemotron_h_moe, jamba, kimi-linear, bailingmoe3, minimax-01.
// Token by token, with the states as matrices; no chunks, nothing merged.
#ifndef NAIVE_RECURRENT_H
#define NAIVE_RECURRENT_H

static double naive_silu(double x) { return x * naive_sigmoid(x); }
static double naive_softplus(double x) { return x > 20 ? x : log1p(exp(x)); }

// NAME.weight {n_in, n_out} and NAME.bias, if the file has it, applied to all rows.
static double *naive_project(naive_model *m, int layer, const char *name, int64_t n_in,
                             int64_t n_out, int n, const double *x) {
    char full[64];
    snprintf(full, sizeof full, "%s.weight", name);
    naive_matrix w = naive_get_matrix(m, layer, full, n_in, n_out);
    snprintf(full, sizeof full, "%s.bias", name);
    const float *bias = naive_optional(m, layer, full, n_out);
    double *y = naive_doubles(m, (size_t)(n * n_out));
    for (int t = 0; t < n; t++) {
        naive_linear(m, w, (int)n_in, (int)n_out, x + t * n_in, y + t * n_out);
        naive_add(bias, (int)n_out, y + t * n_out);
    }
    return y;
}

// out[t][c] = sum over i of w[c][i] * u[t - K + 1 + i][c]: the last tap is the current token's.
static double *naive_conv(naive_model *m, int layer, const char *name, int K, int64_t C, int n,
                          const double *u, int silu) {
    char full[64];
    snprintf(full, sizeof full, "%s.weight", name);
    const float *w = naive_weights(m, layer, full, K * C);
    snprintf(full, sizeof full, "%s.bias", name);
    const float *bias = naive_optional(m, layer, full, C);
    double *y = naive_doubles(m, (size_t)(n * C));
    for (int t = 0; t < n; t++)
        for (int64_t c = 0; c < C; c++) {
            double sum = bias ? (double)bias[c] : 0;
            for (int i = 0; i < K; i++)
                if (t - K + 1 + i >= 0) sum += (double)w[c * K + i] * u[(t - K + 1 + i) * C + c];
            y[t * C + c] = silu ? naive_silu(sum) : sum;
        }
    return y;
}

static void naive_unit_length(double *x, int n, double eps) {
    double sum = eps;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    for (int i = 0; i < n; i++) x[i] /= sqrt(sum);
}

// One token of the delta rule: S {D keys, D values}; decay by key, or one for all.
static void naive_delta(double *S, int D, const double *q, const double *k, const double *v,
                        const double *g, int per_key, double beta, double *o) {
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) S[i * D + j] *= exp(g[per_key ? i : 0]);
    for (int j = 0; j < D; j++) {
        double seen = 0;
        for (int i = 0; i < D; i++) seen += S[i * D + j] * k[i];
        const double delta = beta * (v[j] - seen);
        o[j] = 0;
        for (int i = 0; i < D; i++) {
            S[i * D + j] += k[i] * delta;
            o[j] += S[i * D + j] * q[i] / sqrt(D);
        }
    }
}

// Gated delta net: out n x nv * D. qkv, z, beta and decay are n rows of what they are named after.
static void naive_gated_delta(naive_model *m, int layer, int n, const double *xn, double *out) {
    const int K = naive_int(m, "ssm.conv_kernel", 0), D = naive_int(m, "ssm.state_size", 0);
    const int nk = naive_int(m, "ssm.group_count", 1), nv = naive_int(m, "ssm.time_step_rank", 0);
    const int r = nv / nk, next = naive_is(m, "qwen3next");
    const int64_t E = m->n_embd, C = (int64_t)(2 * nk + nv) * D, Z = (int64_t)nv * D;
    double *qkv, *z, *b, *a;
    if (naive_find(m, layer, "attn_qkv.weight")) {
        qkv = naive_project(m, layer, "attn_qkv", E, C, n, xn);
        z = naive_project(m, layer, "attn_gate", E, Z, n, xn);
    } else { // of each key head q, k, and v and z of its value heads
        double *all = naive_project(m, layer, "ssm_in", E, C + Z, n, xn);
        qkv = naive_doubles(m, (size_t)(n * C));
        z = naive_doubles(m, (size_t)(n * Z));
        for (int t = 0; t < n; t++)
            for (int k = 0; k < nk; k++) {
                const double *from = all + t * (C + Z) + (int64_t)k * (2 + 2 * r) * D;
                for (int i = 0; i < D; i++) qkv[t * C + k * D + i] = from[i];
                for (int i = 0; i < D; i++) qkv[t * C + (nk + k) * D + i] = from[D + i];
                for (int i = 0; i < r * D; i++) {
                    qkv[t * C + (2 * nk + k * r) * D + i] = from[2 * D + i];
                    z[t * Z + k * r * D + i] = from[(2 + r) * D + i];
                }
            }
    }
    if (next) { // of each key head the betas of its value heads, then their decays
        double *ba = naive_project(m, layer, "ssm_ba", E, 2 * nv, n, xn);
        b = naive_doubles(m, (size_t)(n * nv));
        a = naive_doubles(m, (size_t)(n * nv));
        for (int t = 0; t < n; t++)
            for (int h = 0; h < nv; h++) {
                b[t * nv + h] = ba[t * 2 * nv + h / r * 2 * r + h % r];
                a[t * nv + h] = ba[t * 2 * nv + h / r * 2 * r + r + h % r];
            }
    } else {
        b = naive_project(m, layer, "ssm_beta", E, nv, n, xn);
        a = naive_project(m, layer, "ssm_alpha", E, nv, n, xn);
    }
    double *u = naive_conv(m, layer, "ssm_conv1d", K, C, n, qkv, 1);
    const float *dt = naive_weights(m, layer, "ssm_dt.bias", nv);
    const float *A = naive_weights(m, layer, "ssm_a", nv);
    const float *gain = naive_weights(m, layer, "ssm_norm.weight", D);
    double *S = naive_doubles(m, (size_t)nv * (size_t)(D * D));
    for (int t = 0; t < n; t++) {
        double *row = u + t * C;
        for (int h = 0; h < 2 * nk; h++) naive_unit_length(row + h * D, D, m->eps);
        for (int h = 0; h < nv; h++) {
            const int key = next ? h / r : h % nk;
            const double g = (double)A[h] * naive_softplus(a[t * nv + h] + (double)dt[h]);
            double *o = out + t * Z + h * D;
            naive_delta(S + (int64_t)h * D * D, D, row + key * D, row + (nk + key) * D,
                        row + (2 * nk + h) * D, &g, 0, naive_sigmoid(b[t * nv + h]), o);
            naive_rms(o, gain, D, m->eps, o);
            for (int j = 0; j < D; j++) o[j] *= naive_silu(z[t * Z + h * D + j]);
        }
    }
}

// Kimi delta attention: a decay per key channel, of two kinds.
static void naive_kda(naive_model *m, int layer, int n, const double *xn, double *out) {
    static const char *const names[3][2] = {
        {"attn_q", "ssm_conv1d_q"}, {"attn_k", "ssm_conv1d_k"}, {"attn_v", "ssm_conv1d_v"}};
    const int K = naive_int(m, "ssm.conv_kernel", 0), D = naive_int(m, "kda.head_dim", 0);
    const int H = naive_int(m, "attention.head_count", 0), safe = naive_is(m, "bailingmoe3");
    const int64_t E = m->n_embd, Z = (int64_t)H * D;
    const double bound = naive_real(m, "kda.gate_lower_bound", 0);
    double *u[3];
    for (int i = 0; i < 3; i++) {
        char full[64];
        snprintf(full, sizeof full, "%s.weight", names[i][0]);
        naive_matrix w = naive_get_matrix(m, layer, full, E, Z); // no bias counts
        double *x = naive_doubles(m, (size_t)(n * Z));
        for (int t = 0; t < n; t++) naive_linear(m, w, (int)E, (int)Z, xn + t * E, x + t * Z);
        u[i] = naive_conv(m, layer, names[i][1], K, Z, n, x, 1);
    }
    double *f = naive_project(m, layer, "ssm_f_a", E, safe ? Z : D, n, xn);
    double *gate = naive_project(m, layer, "ssm_g_a", E, safe ? Z : D, n, xn);
    if (!safe) {
        f = naive_project(m, layer, "ssm_f_b", D, Z, n, f);
        gate = naive_project(m, layer, "ssm_g_b", D, Z, n, gate);
    }
    double *b = naive_project(m, layer, "ssm_beta", E, H, n, xn);
    const float *dt = naive_weights(m, layer, "ssm_dt.bias", Z);
    const float *A = naive_weights(m, layer, "ssm_a", H);
    const float *gain = naive_weights(m, layer, "ssm_norm.weight", D);
    double *S = naive_doubles(m, (size_t)H * (size_t)(D * D)), *g = naive_doubles(m, (size_t)D);
    for (int t = 0; t < n; t++)
        for (int h = 0; h < H; h++) {
            const int64_t at = t * Z + h * D;
            double *o = out + at;
            naive_unit_length(u[0] + at, D, m->eps);
            naive_unit_length(u[1] + at, D, m->eps);
            for (int i = 0; i < D; i++) {
                const double x = f[at + i] + (double)dt[h * D + i];
                g[i] = safe ? bound * naive_sigmoid((double)A[h] * x)
                            : (double)A[h] * naive_softplus(x);
            }
            naive_delta(S + (int64_t)h * D * D, D, u[0] + at, u[1] + at, u[2] + at, g, 1,
                        naive_sigmoid(b[t * H + h]), o);
            naive_rms(o, gain, D, m->eps, o);
            for (int j = 0; j < D; j++) o[j] *= naive_sigmoid(gate[at + j]);
        }
}

// Mamba-2: [z | x B C | dt]; the gate comes before the norm, which is per group.
static void naive_mamba2(naive_model *m, int layer, int n, const double *xn, double *out) {
    const int K = naive_int(m, "ssm.conv_kernel", 0), N = naive_int(m, "ssm.state_size", 0);
    const int G = naive_int(m, "ssm.group_count", 1), H = naive_int(m, "ssm.time_step_rank", 1);
    const int64_t I = naive_int(m, "ssm.inner_size", 0), C = I + 2 * G * N, W = I + C + H;
    const int64_t P = I / H;
    double *in = naive_project(m, layer, "ssm_in", m->n_embd, W, n, xn);
    double *xbc = naive_doubles(m, (size_t)(n * C));
    for (int t = 0; t < n; t++)
        for (int64_t c = 0; c < C; c++) xbc[t * C + c] = in[t * W + I + c];
    double *u = naive_conv(m, layer, "ssm_conv1d", K, C, n, xbc, 1);
    const float *dt = naive_weights(m, layer, "ssm_dt.bias", H);
    const float *A = naive_weights(m, layer, "ssm_a", H), *D = naive_weights(m, layer, "ssm_d", H);
    const float *gain = naive_weights(m, layer, "ssm_norm.weight", I);
    double *S = naive_doubles(m, (size_t)(I * N));
    for (int t = 0; t < n; t++) {
        const double *x = u + t * C, *z = in + t * W;
        for (int h = 0; h < H; h++) {
            const double *B = x + I + h / (H / G) * N, *Cg = B + G * N;
            const double step = naive_softplus(z[I + C + h] + (double)dt[h]);
            for (int64_t p = h * P; p < (h + 1) * P; p++) {
                double y = (double)D[h] * x[p];
                for (int i = 0; i < N; i++) {
                    S[p * N + i] = exp(step * (double)A[h]) * S[p * N + i] + step * x[p] * B[i];
                    y += S[p * N + i] * Cg[i];
                }
                out[t * I + p] = naive_silu(z[p]) * y;
            }
        }
        for (int g = 0; g < G; g++) {
            double *y = out + t * I + g * (I / G);
            naive_rms(y, gain + g * (I / G), (int)(I / G), m->eps, y);
        }
    }
}

// Mamba-1 as Jamba has it: [x | z]; step, B and C are normed.
static void naive_mamba1(naive_model *m, int layer, int n, const double *xn, double *out) {
    const int K = naive_int(m, "ssm.conv_kernel", 0), N = naive_int(m, "ssm.state_size", 0);
    const int R = naive_int(m, "ssm.time_step_rank", 0);
    const int64_t I = naive_int(m, "ssm.inner_size", 0), W = R + 2 * N;
    double *in = naive_project(m, layer, "ssm_in", m->n_embd, 2 * I, n, xn);
    double *raw = naive_doubles(m, (size_t)(n * I)), *dt = naive_doubles(m, (size_t)(n * R));
    for (int t = 0; t < n; t++)
        for (int64_t c = 0; c < I; c++) raw[t * I + c] = in[t * 2 * I + c];
    double *x = naive_conv(m, layer, "ssm_conv1d", K, I, n, raw, 1);
    double *xbc = naive_project(m, layer, "ssm_x", I, W, n, x);
    const float *dt_gain = naive_weights(m, layer, "ssm_dt_norm.weight", R);
    const float *b_gain = naive_weights(m, layer, "ssm_b_norm.weight", N);
    const float *c_gain = naive_weights(m, layer, "ssm_c_norm.weight", N);
    for (int t = 0; t < n; t++) {
        naive_rms(xbc + t * W, dt_gain, R, m->eps, dt + t * R);
        naive_rms(xbc + t * W + R, b_gain, N, m->eps, xbc + t * W + R);
        naive_rms(xbc + t * W + R + N, c_gain, N, m->eps, xbc + t * W + R + N);
    }
    double *step = naive_project(m, layer, "ssm_dt", R, I, n, dt); // with its bias
    const float *A = naive_weights(m, layer, "ssm_a", I * N);
    const float *D = naive_weights(m, layer, "ssm_d", I);
    double *S = naive_doubles(m, (size_t)(I * N));
    for (int t = 0; t < n; t++)
        for (int64_t c = 0; c < I; c++) {
            const double *B = xbc + t * W + R, *Ct = B + N;
            const double d = naive_softplus(step[t * I + c]);
            double y = (double)D[c] * x[t * I + c];
            for (int i = 0; i < N; i++) {
                S[c * N + i] = exp(d * (double)A[c * N + i]) * S[c * N + i] +
                               d * x[t * I + c] * B[i];
                y += S[c * N + i] * Ct[i];
            }
            out[t * I + c] = naive_silu(in[t * 2 * I + I + c]) * y;
        }
}

// Lightning attention: a decay by the number of the head and of the layer; one norm over all heads.
static void naive_lightning(naive_model *m, int layer, int n, const double *xn, double *out) {
    const int H = naive_int(m, "attention.head_count", 0), d = m->dk;
    const int64_t Z = (int64_t)H * d;
    double *qkv = naive_project(m, layer, "attn_qkv", m->n_embd, 3 * Z, n, xn);
    double *gate = naive_project(m, layer, "attn_gate", m->n_embd, Z, n, xn);
    const float *gain = naive_weights(m, layer, "attn_norm_2.weight", Z);
    double *S = naive_doubles(m, (size_t)(Z * d));
    for (int64_t i = 0; i < n * 3 * Z; i++) qkv[i] = naive_silu(qkv[i]);
    for (int t = 0; t < n; t++) {
        for (int h = 0; h < H; h++) {
            const double depth = m->n_layer > 1 ? (double)layer / (m->n_layer - 1) : 0;
            const double slope = pow(2, -8.0 * (h + 1) / H) * (1 - depth + 1e-5);
            const double *q = qkv + t * 3 * Z + h * 3 * d, *k = q + d, *v = k + d;
            double *Sh = S + (int64_t)h * d * d, *o = out + t * Z + h * d;
            for (int j = 0; j < d; j++) o[j] = 0;
            for (int i = 0; i < d; i++)
                for (int j = 0; j < d; j++) {
                    Sh[i * d + j] = exp(-slope) * Sh[i * d + j] + k[i] * v[j];
                    o[j] += Sh[i * d + j] * q[i];
                }
        }
        naive_rms(out + t * Z, gain, (int)Z, m->eps, out + t * Z);
        for (int64_t i = 0; i < Z; i++) out[t * Z + i] *= naive_sigmoid(gate[t * Z + i]);
    }
}

// LFM2: C * conv(B * u)
static void naive_short_conv(naive_model *m, int layer, int n, const double *xn, double *out) {
    const int K = naive_int(m, "shortconv.l_cache", 0);
    const int64_t E = m->n_embd;
    double *bcu = naive_project(m, layer, "shortconv.in_proj", E, 3 * E, n, xn);
    double *x = naive_doubles(m, (size_t)(n * E));
    for (int t = 0; t < n; t++)
        for (int64_t i = 0; i < E; i++)
            x[t * E + i] = bcu[t * 3 * E + i] * bcu[t * 3 * E + 2 * E + i];
    double *y = naive_conv(m, layer, "shortconv.conv", K, E, n, x, 0);
    for (int t = 0; t < n; t++)
        for (int64_t i = 0; i < E; i++) out[t * E + i] = bcu[t * 3 * E + E + i] * y[t * E + i];
}

// ---- layers ----------------------------------------------------------------------------------

// An integer of a layer: of an array or for all.
static int naive_int_at(const naive_model *m, const char *key, int layer, int fallback) {
    const moe_gguf_value *value = naive_key(m, key);
    int64_t x;
    if (!value) return fallback;
    const int at = value->type == MOE_VALUE_ARRAY ? layer : 0;
    return moe_gguf_value_int(value, (uint64_t)at, &x) ? (int)x : fallback;
}

static int naive_has_interval(const naive_model *m) {
    return naive_is(m, "qwen3next") || naive_is(m, "qwen35moe") || naive_is(m, "minimax-01");
}
static int naive_recurs(const naive_model *m, int layer) {
    int64_t x = 0;
    int yes = 0;
    if (!naive_has_interval(m)) return naive_int_at(m, "attention.head_count_kv", layer, 1) == 0;
    const moe_gguf_value *value = naive_key(m, "attention.recurrent_layers");
    if (!value)
        return (layer + 1) % naive_int(m, "full_attention_interval",
                                       naive_is(m, "minimax-01") ? 8 : 4) != 0;
    if (moe_gguf_value_bool(value, (uint64_t)layer, &yes)) return yes;
    return moe_gguf_value_int(value, (uint64_t)layer, &x) && x;
}

// What a layer's mixer makes of n normed rows, before its output matrix; *width values each.
static double *naive_recurrence(naive_model *m, int layer, int n, const double *xn,
                                const char **output, int64_t *width) {
    static const struct {
        const char *family, *output;
        void (*mix)(naive_model *, int, int, const double *, double *);
        const char *width, *heads; // the keys whose product it is
    } kinds[] = {
        {"qwen35moe", "ssm_out", naive_gated_delta, "ssm.inner_size", NULL},
        {"qwen3next", "ssm_out", naive_gated_delta, "ssm.inner_size", NULL},
        {"kimi-linear", "attn_output", naive_kda, "kda.head_dim", "attention.head_count"},
        {"bailingmoe3", "attn_output", naive_kda, "kda.head_dim", "attention.head_count"},
        {"granitehybrid", "ssm_out", naive_mamba2, "ssm.inner_size", NULL},
        {"nemotron_h_moe", "ssm_out", naive_mamba2, "ssm.inner_size", NULL},
        {"jamba", "ssm_out", naive_mamba1, "ssm.inner_size", NULL},
        {"minimax-01", "attn_output", naive_lightning, "attention.key_length",
         "attention.head_count"},
        {"lfm2moe", "shortconv.out_proj", naive_short_conv, "embedding_length", NULL}};
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (!naive_is(m, kinds[i].family)) continue;
        *output = kinds[i].output;
        *width = (int64_t)naive_int(m, kinds[i].width, 0) *
                 (kinds[i].heads ? naive_int(m, kinds[i].heads, 0) : 1);
        double *out = naive_doubles(m, (size_t)(n * *width));
        kinds[i].mix(m, layer, n, xn, out);
        return out;
    }
    m->failed = 1;
    return NULL;
}

// down * activation(gate * x, up * x) of one expert, added with weight w. No gate: relu(up x)^2.
// limit > 0: min(silu(g), limit) * clamp(u, limit).
typedef struct naive_ffn {
    naive_matrix gate, up, down;
    int has_gate, width, n_io;
    double limit;
} naive_ffn;
static void naive_ffn_add(naive_model *m, const naive_ffn *f, int64_t expert, const double *x,
                          double w, double *out) {
    int mark = m->n_memory;
    const int64_t at = expert * f->n_io * f->width;
    naive_matrix gate = f->gate, up = f->up, down = f->down;
    double *g = naive_doubles(m, (size_t)f->width), *u = naive_doubles(m, (size_t)f->width);
    double *y = naive_doubles(m, (size_t)f->n_io);
    gate.w += f->has_gate ? at : 0, up.w += at, down.w += at;
    if (f->has_gate) naive_linear(m, gate, f->n_io, f->width, x, g);
    naive_linear(m, up, f->n_io, f->width, x, u);
    for (int i = 0; i < f->width; i++) {
        double a = naive_silu(g[i]), b = u[i];
        if (f->limit > 0) a = fmin(a, f->limit), b = fmax(-f->limit, fmin(f->limit, b));
        g[i] = f->has_gate ? a * b : pow(fmax(b, 0), 2);
    }
    naive_linear(m, down, f->width, f->n_io, g, y);
    for (int i = 0; i < f->n_io; i++) out[i] += w * y[i];
    naive_free_down_to(m, mark);
}

static naive_ffn naive_get_ffn(naive_model *m, int layer, const char *suffix, int64_t n_io,
                               int64_t n_expert, const char *limit) {
    char name[64];
    naive_ffn f;
    memset(&f, 0, sizeof f);
    snprintf(name, sizeof name, "ffn_down%s.weight", suffix);
    const moe_gguf_tensor *down = naive_find(m, layer, name);
    f.n_io = (int)n_io;
    f.width = down ? (int)down->ne[0] : 1;
    f.down = naive_get_matrix(m, layer, name, f.width, n_io * n_expert);
    snprintf(name, sizeof name, "ffn_gate_up%s.weight", suffix);
    if (naive_find(m, layer, name)) { // of routed experts
        int64_t width;
        naive_gate_up(m, layer, &width, &f.gate, &f.up);
        f.has_gate = 1;
    } else {
        snprintf(name, sizeof name, "ffn_up%s.weight", suffix);
        f.up = naive_get_matrix(m, layer, name, n_io, f.width * n_expert);
        snprintf(name, sizeof name, "ffn_gate%s.weight", suffix);
        f.has_gate = naive_find(m, layer, name) != NULL;
        if (f.has_gate) f.gate = naive_get_matrix(m, layer, name, n_io, f.width * n_expert);
    }
    if (naive_is(m, "bailingmoe3") &&
        moe_gguf_value_float(naive_key(m, limit), (uint64_t)layer, &f.limit) && f.limit <= 1e-6)
        f.limit = 0;
    return f;
}

static void naive_hybrid_ffn(naive_model *m, int layer, int n, const double *xn, double *y) {
    const int64_t E = m->n_embd, X = m->n_exp;
    if (!naive_find(m, layer, "ffn_gate_inp.weight")) {
        naive_ffn dense = naive_get_ffn(m, layer, "", E, 1, "swiglu_clamp_shexp");
        for (int t = 0; t < n; t++) naive_ffn_add(m, &dense, 0, xn + t * E, 1, y + t * E);
        return;
    }
    const moe_gguf_tensor *latent = naive_find(m, layer, "ffn_latent_down.weight");
    const int64_t L = latent ? latent->ne[1] : E;
    const int has_shared = naive_find(m, layer, "ffn_up_shexp.weight") != NULL;
    naive_matrix router = naive_get_matrix(m, layer, "ffn_gate_inp.weight", E, X);
    const float *bias = naive_optional(m, layer, "exp_probs_b.bias", X);
    const float *s_weight = naive_optional(m, layer, "ffn_gate_inp_shexp.weight", E);
    naive_ffn routed = naive_get_ffn(m, layer, "_exps", L, X, "swiglu_clamp_exp"), shared;
    if (has_shared) shared = naive_get_ffn(m, layer, "_shexp", E, 1, "swiglu_clamp_shexp");
    double *in = latent ? naive_project(m, layer, "ffn_latent_down", E, L, n, xn) : NULL;
    double *sum = naive_doubles(m, (size_t)(n * L));
    int *chosen = (int *)naive_alloc(m, (size_t)m->n_used, sizeof(int));
    double *weight = naive_doubles(m, (size_t)m->n_used);
    for (int t = 0; t < n && !m->failed; t++) {
        const double *x = xn + t * E;
        double w = 0;
        naive_route(m, router, bias, x, chosen, weight);
        for (int i = 0; i < m->n_used; i++)
            naive_ffn_add(m, &routed, chosen[i], in ? in + t * L : x, weight[i], sum + t * L);
        for (int64_t i = 0; i < E && s_weight; i++) w += (double)s_weight[i] * x[i];
        if (has_shared)
            naive_ffn_add(m, &shared, 0, x, s_weight ? naive_sigmoid(w) : 1, y + t * E);
    }
    if (latent) sum = naive_project(m, layer, "ffn_latent_up", L, E, n, sum);
    for (int64_t i = 0; i < n * E; i++) y[i] += sum[i];
}

// Mixer and feed-forward part: x = x + scale * part(norm(x)); minimax-01: scale * norm(x) + part.
static void naive_hybrid_add(const naive_model *m, int64_t n, const double *xn, const double *y,
                             double *x) {
    for (int64_t i = 0; i < n; i++)
        x[i] = naive_is(m, "minimax-01") ? m->residual_scale * xn[i] + y[i]
                                         : x[i] + m->residual_scale * y[i];
}
static void naive_hybrid_layer(naive_model *m, int layer, int n, double *x) {
    const int64_t E = m->n_embd;
    const int one = naive_is(m, "nemotron_h_moe");
    const int only_ffn = one && naive_int_at(m, "feed_forward_length", layer, 0) > 0;
    const char *ffn_norm = one ? "attn_norm.weight"
                           : naive_has_interval(m) && !naive_is(m, "minimax-01")
                               ? "post_attention_norm.weight"
                               : "ffn_norm.weight";
    int mark = m->n_memory;
    double *xn = naive_doubles(m, (size_t)(n * E));
    if (!only_ffn) {
        const float *gain = naive_weights(m, layer, "attn_norm.weight", E);
        const char *output = "attn_output";
        int64_t width;
        double *mixed;
        for (int t = 0; t < n; t++) naive_rms(x + t * E, gain, m->n_embd, m->eps, xn + t * E);
        if (naive_recurs(m, layer)) {
            mixed = naive_recurrence(m, layer, n, xn, &output, &width);
        } else {
            m->n_head = naive_int_at(m, "attention.head_count", layer, 1);
            m->n_head_kv = naive_int_at(m, "attention.head_count_kv", layer, m->n_head);
            width = (int64_t)m->n_head * m->dv;
            mixed = naive_doubles(m, (size_t)(n * width));
            if (m->mla) naive_attention_mla(m, layer, n, xn, mixed);
            else naive_attention_gqa(m, layer, n, xn, mixed);
        }
        if (!m->failed)
            naive_hybrid_add(m, n * E, xn, naive_project(m, layer, output, width, E, n, mixed), x);
    }
    naive_free_down_to(m, mark);
    if (m->failed || (one && !only_ffn)) return;
    xn = naive_doubles(m, (size_t)(n * E));
    double *y = naive_doubles(m, (size_t)(n * E));
    const float *gain = naive_weights(m, layer, ffn_norm, E);
    for (int t = 0; t < n; t++) naive_rms(x + t * E, gain, m->n_embd, m->eps, xn + t * E);
    naive_hybrid_ffn(m, layer, n, xn, y);
    naive_hybrid_add(m, n * E, xn, y, x);
    naive_free_down_to(m, mark);
}

// Which families these are; keys and their own ways.
static int naive_is_hybrid(const naive_model *m) {
    static const char *const families[] = {"qwen35moe",     "qwen3next",      "lfm2moe",
                                           "granitehybrid", "nemotron_h_moe", "jamba",
                                           "kimi-linear",   "bailingmoe3",    "minimax-01"};
    for (int i = 0; i < 9; i++)
        if (naive_is(m, families[i])) return 1;
    return 0;
}
// A factor: 0 is none.
static double naive_factor(const naive_model *m, const char *key) {
    const double x = naive_real(m, key, 1);
    return x > 0 ? x : 1;
}
static void naive_read_hybrid(naive_model *m) {
    const int gating = naive_int(m, "expert_gating_func", 0);
    const int nemotron = naive_is(m, "nemotron_h_moe");
    const double scale = naive_real(m, "expert_weights_scale", 0);
    const int scaled = nemotron || naive_is(m, "kimi-linear") || naive_is(m, "bailingmoe3");
    int first = 0; // layer that attends
    while (first + 1 < m->n_layer && naive_recurs(m, first)) first++;
    m->n_head = naive_int_at(m, "attention.head_count", first, 1);
    m->mla = naive_is(m, "kimi-linear") || naive_is(m, "bailingmoe3");
    m->gate_in_q = naive_is(m, "qwen35moe") || naive_is(m, "qwen3next");
    m->head_gates = naive_is(m, "bailingmoe3");
    m->no_rope = nemotron || naive_is(m, "jamba") || naive_is(m, "kimi-linear") ||
                 (naive_is(m, "granitehybrid") && !naive_flag(m, "rope.scaling.finetuned", 1));
    m->rope_norm = m->mla || naive_is(m, "granitehybrid");
    m->eps = naive_real(m, "attention.layer_norm_rms_epsilon",
                        naive_real(m, "attention.layer_norm_epsilon", 0));
    m->norm_w = naive_is(m, "bailingmoe3") || nemotron ? naive_flag(m, "expert_weights_norm", 0)
                                                       : !naive_is(m, "jamba");
    m->sigmoid = nemotron || ((m->mla || naive_is(m, "lfm2moe")) && gating == 2);
    m->scale_w = scaled && scale > 0 ? scale : 1;
    m->dk = naive_int(m, m->mla ? "attention.key_length_mla" : "attention.key_length",
                      m->n_embd / m->n_head);
    m->dv = naive_int(m, m->mla ? "attention.value_length_mla" : "attention.value_length",
                      m->n_embd / m->n_head);
    m->n_rot = naive_int(m, "rope.dimension_count", m->dk);
    m->nope = m->dk - m->n_rot;
    m->kv_lora = naive_int(m, "attention.kv_lora_rank", 0);
    m->residual_scale = m->embd_scale = m->logit_scale = 1;
    if (naive_is(m, "minimax-01")) m->residual_scale = naive_factor(m, "residual_scale");
    if (!naive_is(m, "granitehybrid")) return;
    m->residual_scale = naive_factor(m, "residual_scale");
    m->embd_scale = naive_factor(m, "embedding_scale");
    m->logit_scale = naive_factor(m, "logit_scale");
    m->attn_scale = naive_real(m, "attention.scale", 0);
}

#endif
