// moe-quantize: a GGUF file with its matrices in other types.
//
//     cc -O2 examples/quantize.c -o moe-quantize -lm -lpthread
//     ./moe-quantize model-f32.gguf model.gguf Q4_K token_embd=Q8_0 attn_=Q8_0
//
// The first type is for all matrices of weights but the router; PART=TYPE is for those with PART in
// their name, the last one that fits counts. Rows that the type's blocks do not divide become Q8_0,
// or F16, which is said. Metadata, vectors and biases are copied. The output is replaced only when
// the new file is whole.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "tool.h"
#include <ctype.h>

static const char program[] = "moe-quantize";

typedef struct rule {
    const char *part;
    size_t size; // of part; 0: any tensor
    moe_type type;
} rule;

enum { LAST_TYPE = 1023 };

static int same_word(const char *a, const char *b) {
    while (*a && toupper((unsigned char)*a) == toupper((unsigned char)*b)) a++, b++;
    return !*a && !*b;
}

static int find_type(const char *name, moe_type *out) {
    for (int id = 0; id <= LAST_TYPE; id++)
        if (moe_type_supported((moe_type)id) && same_word(name, moe_type_name((moe_type)id))) {
            *out = (moe_type)id;
            return 1;
        }
    fprintf(stderr, "%s: '%s' is no tensor type\n", program, name);
    return 0;
}

// Small and sensitive: norms and biases (those of experts have two dimensions), and the router.
static int is_kept(const moe_gguf_tensor *tensor) {
    static const char weight[] = ".weight";
    const size_t n = strlen(tensor->name), end = sizeof weight - 1;
    return tensor->n_dims < 2 || n < end || strcmp(tensor->name + n - end, weight) ||
           strstr(tensor->name, "ffn_gate_inp.");
}

static moe_type pick_type(const moe_gguf_tensor *tensor, const rule *rules, int n_rules) {
    moe_type type = tensor->type;
    if (is_kept(tensor)) return type;
    for (int i = 0; i < n_rules; i++)
        for (const char *at = tensor->name; *at; at++)
            if (!strncmp(at, rules[i].part, rules[i].size)) type = rules[i].type;
    return type;
}

// The type itself, or one whose blocks the tensor's rows are whole numbers of.
static moe_type fit_type(const moe_gguf_tensor *tensor, moe_type type) {
    const moe_type fits[] = {type, MOE_TYPE_Q8_0, MOE_TYPE_F16};
    int i = 0;
    while (i < 2 && !moe_type_row_size(fits[i], tensor->ne[0])) i++;
    if (i) {
        fprintf(stderr, "%s: ", program);
        tool_print(stderr, tensor->name, strlen(tensor->name), 200);
        fprintf(stderr, ": %s instead of %s, whose blocks do not divide rows of %lld\n",
                moe_type_name(fits[i]), moe_type_name(type), (long long)tensor->ne[0]);
    }
    return fits[i];
}

static int64_t n_rows_of(const moe_gguf_tensor *t) { return t->ne[1] * t->ne[2] * t->ne[3]; }

static int fail_write(const char *path) {
    fprintf(stderr, "%s: cannot write %s: %s\n", program, path, strerror(errno));
    return TOOL_ERROR;
}

static void put(FILE *f, uint64_t value, size_t size) { fwrite(&value, 1, size, f); }
static void pad(FILE *f, uint64_t size, uint64_t alignment) {
    for (; size % alignment; size++) fputc(0, f);
}

// Magic, counts, metadata as it was, and the table of tensors.
static void write_head(FILE *f, const moe_gguf *gguf, const moe_type *types, uint64_t alignment) {
    const int64_t n_values = moe_gguf_n_values(gguf), n_tensors = moe_gguf_n_tensors(gguf);
    uint64_t size = 24, offset = 0;
    fwrite("GGUF", 1, 4, f);
    put(f, 3, 4);
    put(f, (uint64_t)n_tensors, 8);
    put(f, (uint64_t)n_values, 8);
    if (n_values) {
        const moe_gguf_value *first = moe_gguf_value_at(gguf, 0);
        const moe_gguf_value *last = moe_gguf_value_at(gguf, n_values - 1);
        const char *file = (const char *)first->data - first->offset;
        fwrite(file + 24, 1, (size_t)(last->offset + last->size - 24), f);
        size = last->offset + last->size;
    }
    for (int64_t i = 0; i < n_tensors; i++) {
        const moe_gguf_tensor *t = moe_gguf_tensor_at(gguf, i);
        put(f, strlen(t->name), 8);
        fwrite(t->name, 1, strlen(t->name), f);
        put(f, (uint64_t)t->n_dims, 4);
        for (int d = 0; d < t->n_dims; d++) put(f, (uint64_t)t->ne[d], 8);
        put(f, (uint64_t)types[i], 4);
        put(f, offset, 8);
        offset += (uint64_t)n_rows_of(t) * moe_type_row_size(types[i], t->ne[0]);
        offset += (alignment - offset % alignment) % alignment;
        size += 8 + strlen(t->name) + 4 + 8 * (uint64_t)t->n_dims + 4 + 8;
    }
    pad(f, size, alignment);
}

// A tensor's rows, some at a time.
static int write_tensor(FILE *f, const moe_gguf_tensor *t, moe_type type, moe_error *error) {
    enum { ROWS = 32 };
    const size_t from = moe_type_row_size(t->type, t->ne[0]);
    const size_t to = moe_type_row_size(type, t->ne[0]);
    float *floats = (float *)malloc(ROWS * sizeof(float) * (size_t)t->ne[0]);
    uint8_t *rows = (uint8_t *)malloc(ROWS * to);
    moe_status status = floats && rows ? MOE_OK : MOE_ERROR_MEMORY;
    snprintf(error->text, sizeof error->text, "no memory for %d rows", (int)ROWS);
    for (int64_t r = 0; r < n_rows_of(t) && status == MOE_OK; r += ROWS) {
        const int64_t n = n_rows_of(t) - r < ROWS ? n_rows_of(t) - r : ROWS;
        const uint8_t *in = (const uint8_t *)t->data + (size_t)r * from;
        if (type == t->type) {
            fwrite(in, from, (size_t)n, f);
            continue;
        }
        status = moe_type_dequantize(t->type, in, floats, n, t->ne[0], error);
        if (status == MOE_OK)
            status = moe_type_quantize(type, floats, rows, n, t->ne[0], NULL, error);
        if (status == MOE_OK) fwrite(rows, to, (size_t)n, f);
    }
    free(floats);
    free(rows);
    if (status != MOE_OK) return tool_fail(program, t->name, error);
    return TOOL_OK;
}

static int write_file(FILE *f, const moe_gguf *gguf, const moe_type *types, double *sum) {
    moe_error error;
    int64_t alignment = 32;
    memset(&error, 0, sizeof error);
    moe_gguf_value_int(moe_gguf_find_value(gguf, "general.alignment"), 0, &alignment);
    write_head(f, gguf, types, (uint64_t)alignment);
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *t = moe_gguf_tensor_at(gguf, i);
        const uint64_t size = (uint64_t)n_rows_of(t) * moe_type_row_size(types[i], t->ne[0]);
        const int status = write_tensor(f, t, types[i], &error);
        if (status) return status;
        pad(f, size, (uint64_t)alignment);
        *sum += (double)size;
    }
    return TOOL_OK;
}

static int quantize(const char *in, const char *out, const rule *rules, int n_rules) {
    moe_error error;
    char from[32], to[32];
    double sum = 0;
    moe_gguf *gguf = moe_gguf_open(in, NULL, &error);
    if (!gguf) return tool_fail(program, in, &error);
    const int64_t n = moe_gguf_n_tensors(gguf);
    moe_type *types = (moe_type *)calloc((size_t)n + 1, sizeof *types);
    int64_t n_others = 0;
    int status = types ? TOOL_OK : TOOL_ERROR;
    for (int64_t i = 0; i < n && !status; i++) {
        const moe_gguf_tensor *t = moe_gguf_tensor_at(gguf, i);
        if (t->part || !t->data || !moe_type_supported(t->type)) {
            fprintf(stderr, "%s: %s: split files and unknown types are not read\n", program,
                    t->name);
            status = TOOL_ERROR;
        } else {
            const moe_type wanted = pick_type(t, rules, n_rules);
            types[i] = fit_type(t, wanted);
            n_others += types[i] != wanted;
        }
    }
    if (!status) {
        FILE *f = output_begin(out);
        status = f ? write_file(f, gguf, types, &sum) : fail_write(out);
        if (f && output_end(!status) && !status) status = fail_write(out);
    }
    if (!status) {
        FILE *f = output_file.is_direct ? stderr : stdout; // it may be standard output itself
        fprintf(f, "%s: %s of weights, %s before", out, tool_size(to, sum),
                tool_size(from, (double)moe_gguf_file_size(gguf)));
        if (n_others) fprintf(f, "; %lld tensors of another type", (long long)n_others);
        fprintf(f, "\n");
    }
    free(types);
    moe_gguf_close(gguf);
    return status;
}

int main(int argc, char **argv) {
    enum { MAX_RULES = 64 };
    rule rules[MAX_RULES];
    int n_rules = 0;
    if (argc < 4 || argc - 3 > MAX_RULES) {
        fprintf(stderr, "usage: %s IN.gguf OUT.gguf TYPE [PART=TYPE...]\n", program);
        return TOOL_USAGE;
    }
    for (int i = 3; i < argc; i++, n_rules++) {
        const char *equal = strchr(argv[i], '=');
        rules[n_rules].part = argv[i];
        rules[n_rules].size = equal ? (size_t)(equal - argv[i]) : 0;
        if (!find_type(equal ? equal + 1 : argv[i], &rules[n_rules].type)) return TOOL_USAGE;
    }
    if (output_is_input(argv[2], argv[1])) {
        fprintf(stderr, "%s: %s and %s are the same file\n", program, argv[1], argv[2]);
        return TOOL_USAGE;
    }
    return output_finish(program, quantize(argv[1], argv[2], rules, n_rules));
}
