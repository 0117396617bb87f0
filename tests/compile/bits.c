// Prints a checksum of what each kernel of plain C makes of the same numbers, of the logits of
// small models and of the model in the box: builds that give the same bits print the same lines.
//
//     bits FOLDER    the small models lie there, made by the first program that looks for them
#define MOE_INFER_IMPLEMENTATION
#include "../../moe_infer.h"

#include "../sheet.h"

#define SYNTH_NO_MAIN
#include "../../bench/synth.c"

// What follows the header is compiled as the command line says.
float of_the_user(float a, float b, float c);
float of_the_user(float a, float b, float c) { return a * b + c; }

enum { ROWS = 8, N = 512, TOKENS = 12 };

static void show(const char *what, const char *name, const void *data, size_t size) {
    uint64_t hash = 0xCBF29CE484222325u; // FNV-1a
    for (size_t i = 0; i < size; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001B3u;
    printf("%-12s %-24s %016llx\n", what, name, (unsigned long long)hash);
}
static void fill(float *x, int n) {
    for (int i = 0; i < n; i++) x[i] = random_f32();
}
static void stop(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void of_type(const moe__kernels *k, const moe__type *t) {
    static float x[ROWS * N], out[ROWS * N];
    const size_t row_size = moe_type_row_size(t->id, N);
    uint8_t *rows = (uint8_t *)malloc(ROWS * row_size);
    void *act = malloc(moe__act_size(t->act, N));
    if (!rows || !act) stop("out of memory");
    const moe__type_kernels *of = &k->type[t - moe__types];
    fill(x, ROWS * N);
    sheet_random(t, rows, row_size, ROWS, N, 0);
    k->quantize[t->act](x, N, act);
    of->dot(rows, row_size, ROWS, N, act, out);
    show("dot", t->name, out, ROWS * sizeof(float));
    for (int r = 0; r < ROWS; r += t->rows)
        of->dequantize(rows + (size_t)r * row_size, N, out + r * N);
    show("dequantize", t->name, out, sizeof out);
    if (t->quantize && moe_type_quantize(t->id, x, rows, ROWS, N, NULL, NULL) == MOE_OK)
        show("quantize", t->name, rows, ROWS * row_size);
    free(rows);
    free(act);
}

static void of_floats(const moe__kernels *k) {
    static float x[N], y[N], out[N];
    static double e[N];
    static uint16_t half[N];
    static uint8_t blocks[N / 32 * 34];
    fill(x, N), fill(y, N);
    k->rms_norm(x, y, N, 1e-6f, out), show("floats", "rms_norm", out, sizeof out);
    k->swiglu(x, y, N, out), show("floats", "swiglu", out, sizeof out);
    k->swiglu_oai(x, y, N, out), show("floats", "swiglu_oai", out, sizeof out);
    double sum = k->weigh(x, N, -0.5f, 1, 7.3, e);
    show("floats", "weigh", e, sizeof e), show("floats", "weigh: sum", &sum, sizeof sum);
    k->axpy(0.3f, x, N, out), show("floats", "axpy", out, sizeof out);
    k->divide(out, N, 0.7f), show("floats", "divide", out, sizeof out);
    k->softmax(out, N), show("floats", "softmax", out, sizeof out);
    k->f32_to_f16(x, N, half), show("floats", "f32_to_f16", half, sizeof half);
    k->f32_to_q8_0(x, N, blocks), show("floats", "f32_to_q8_0", blocks, sizeof blocks);
}

// Logits behind n tokens.
static void of_model(const char *name, const char *path, moe_kv_type kv, int n, int n_batch) {
    moe_error error;
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.isa = MOE_ISA_SCALAR;
    o.n_threads = 2;
    o.n_batch = n_batch;
    o.kv_type = kv;
    o.n_ctx = n;
    moe_model *model = moe_model_open(path, NULL, &error);
    moe_session *session = model ? moe_session_open(model, &o, &error) : NULL;
    if (!session) stop(error.text);
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    int32_t *tokens = (int32_t *)malloc((size_t)n * sizeof *tokens);
    if (!tokens) stop("out of memory");
    for (int32_t i = 0; i < n; i++) tokens[i] = (int32_t)((unsigned)i * 40503u % (unsigned)n_vocab);
    // some alone, the others together
    for (int32_t i = 0; i < n; i += i < 4 ? 1 : n - 4)
        if (moe_session_eval(session, tokens + i, i < 4 ? 1 : n - 4, &error) != MOE_OK)
            stop(error.text);
    show("logits", name, moe_session_logits(session, -1), (size_t)n_vocab * sizeof(float));
    free(tokens);
    moe_session_close(session);
    moe_model_close(model);
}

int main(int argc, char **argv) {
    static const char *const names[][2] = {
        {"qwen3moe_tiny", "f32"},  {"dsv2_tiny", "f16"},     {"dsv3_tiny", "bf16"},
        {"qwen2moe_tiny", "f32"},  {"gptoss_tiny", "mxfp4"}, {"t_qwen_yarn", "f32"},
        {"t_mla_groups", "q8_0"},  {"micro_mixtral", "f16"}, {"qwen3moe_quant", "q4_K"},
        {"dsv3_quant", "q6_K"},
    };
    const moe__kernels *k = moe__kernels_get(MOE_ISA_SCALAR);
    if (argc < 2) stop("usage: bits FOLDER");
    for (const moe__type *t = moe__types; t < moe__types + MOE__N_TYPES; t++) of_type(k, t);
    of_floats(k);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[512];
        struct stat status;
        synth_options options;
        memset(&options, 0, sizeof options);
        options.type = names[i][1];
        snprintf(path, sizeof path, "%s/%s.gguf", argv[1], names[i][0]);
        if (stat(path, &status) != 0 && synth_write(names[i][0], path, &options) != 0) return 1;
        of_model(names[i][0], path, i % 2 ? MOE_KV_F32 : MOE_KV_F16, TOKENS, 512);
    }
    of_model("storyteller", "examples/storyteller/storyteller.gguf", MOE_KV_F16, 300, 64);
    of_model("storyteller, q8_0", "examples/storyteller/storyteller.gguf", MOE_KV_Q8_0, 40, 64);
    return 0;
}
