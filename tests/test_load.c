// Opening models, hostile ones above all: whatever is wrong, a status and a sentence come back and
// nothing leaks; what is opened lies in memory as asked for.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "gguf_edit.h"
#include "meter.h"
#include "models.h"

static int is_bad(const float *x, int n) {
    for (int i = 0; i < n; i++)
        if (!(fabsf(x[i]) < INFINITY)) return 1;
    return 0;
}

// ---- hostile models --------------------------------------------------------------------------

// What became of a changed file: refused (with the error), or run for some tokens.
typedef struct verdict {
    int opened, ran, finite;
    moe_error error; // if it was not opened, or opened and not run
    size_t largest;  // allocation asked for
} verdict;

static void try_session(const moe_model *model, verdict *v) {
    static const int32_t tokens[3] = {0, 1, 2};
    int n_vocab = moe_model_get_info(model)->n_vocab;
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = 4;
    o.n_batch = 2;
    o.n_threads = 1;
    moe_session *session = moe_session_open(model, &o, &v->error);
    if (!session) return;
    v->ran = moe_session_eval(session, tokens, n_vocab < 3 ? 1 : 3, &v->error) == MOE_OK;
    const float *logits = v->ran ? moe_session_logits(session, -1) : NULL;
    v->finite = logits && !is_bad(logits, n_vocab);
    moe_session_close(session);
}

static verdict try_image(const edit_image *image) {
    verdict v;
    meter m;
    moe_model_options o;
    memset(&v, 0, sizeof v);
    memset(&m, 0, sizeof m);
    memset(&o, 0, sizeof o);
    m.limit = (size_t)64 << 20;
    o.allocator = meter_allocator(&m);
    clear_error(&v.error);
    moe_gguf *gguf = moe_gguf_open_memory(image->data, image->size, NULL, &v.error);
    moe_model *model = gguf ? moe_model_open_gguf(gguf, &o, &v.error) : NULL;
    v.opened = model != NULL;
    if (model) try_session(model, &v);
    moe_model_close(model);
    moe_gguf_close(gguf);
    CHECK(m.live == 0);
    v.largest = m.largest;
    return v;
}
static verdict try_edit(const edit_file *e) {
    edit_image image = edit_build(e);
    verdict v = try_image(&image);
    free(image.data);
    return v;
}

// Either it ran, or a status that fits, a name and a sentence say why not.
static void check_verdict(const verdict *v, const char *what) {
    if (v->opened && v->ran) return;
    moe_status s = v->error.status;
    CHECKF(s == MOE_ERROR_FORMAT || s == MOE_ERROR_UNSUPPORTED, "%s: %s: %s", what,
           moe_status_name(s), v->error.text);
    CHECKF(*v->error.text && memchr(v->error.text, 0, sizeof v->error.text), "%s", what);
    CHECKF(*v->error.where && memchr(v->error.where, 0, sizeof v->error.where), "%s", what);
}

static void check_refused(const edit_file *e, const char *what, moe_status status,
                          const char *where) {
    verdict v = try_edit(e);
    check_verdict(&v, what);
    CHECKF(!v.opened, "%s was opened", what);
    if (v.opened) return;
    CHECKF(status == MOE_OK || v.error.status == status, "%s: %s: %s: %s", what,
           moe_status_name(v.error.status), v.error.where, v.error.text);
    CHECKF(!where || !strcmp(v.error.where, where), "%s: %s: %s", what, v.error.where,
           v.error.text);
}

static int ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

// Does the error name this tensor, or one that has to fit to it (of the same layer)?
static int names_tensor(const moe_error *error, const char *tensor) {
    if (!strcmp(error->where, tensor)) return 1;
    if (!strncmp(tensor, "blk.", 4)) return !strncmp(error->where, tensor, 6);
    return ends_with(error->where, ".weight") || strchr(error->where, '.') != NULL;
}

TEST(unchanged_files_of_every_form_run) {
    for (int b = 0; b < MODELS_FORMS; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        verdict v = try_edit(&e);
        CHECKF(v.opened && v.ran && v.finite, "%s", v.error.text);
        edit_close(&e);
    }
}

// Each tensor left out in turn.
TEST(a_missing_tensor_is_named) {
    for (int b = 0; b < MODELS_FORMS; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        for (int i = 0; i < e.n_tensors; i++) {
            const char *name = e.tensors[i].name;
            int optional = !strcmp(name, "output.weight") || ends_with(name, "exp_probs_b.bias") ||
                           (b == 5 && ends_with(name, ".bias")) ||
                           (b == 3 && (ends_with(name, "attn_kv_b.weight") ||
                                       ends_with(name, "attn_k_b.weight") ||
                                       ends_with(name, "attn_v_b.weight")));
            e.tensors[i].removed = 1;
            verdict v = try_edit(&e);
            check_verdict(&v, name);
            if (optional && v.opened) {
                CHECKF(v.ran && v.finite, "%s: %s", name, v.error.text);
            } else {
                CHECKF(!v.opened, "opened without %s", name);
                // Of two forms of the latent's expansion, either may be named.
                int either = ends_with(name, "_b.weight") && strstr(v.error.where, "_b.weight");
                int one_q = strstr(name, "attn_q") && strstr(v.error.where, "attn_q");
                CHECKF(v.opened || either || one_q || !strcmp(v.error.where, name), "%s: %s: %s",
                       name, v.error.where, v.error.text);
            }
            e.tensors[i].removed = 0;
        }
        edit_close(&e);
    }
}

// Do both shapes have the same rows? (attn_k_b and attn_v_b come as matrices, too.)
static int same_rows(const edit_tensor *a, const edit_tensor *b) {
    return a->ne[0] == b->ne[0] && a->ne[1] * a->ne[2] == b->ne[1] * b->ne[2] &&
           a->ne[3] == b->ne[3];
}

static void reshape(edit_tensor *t, int how) {
    switch (how) {
    case 0: t->ne[0] += 1; break;
    case 1: t->ne[0] -= 1; break;
    case 2: t->ne[0] *= 2; break;
    case 3: t->ne[0] = 1; break;
    case 4: t->ne[t->n_dims - 1] += 1; break;
    case 5: t->ne[t->n_dims - 1] = 1; break;
    case 6: t->ne[t->n_dims - 1] *= 2; break;
    case 7: { // the first two swapped
        uint64_t ne = t->ne[0];
        t->ne[0] = t->ne[1];
        t->ne[1] = ne;
        if (t->n_dims == 1) t->n_dims = 2;
        break;
    }
    case 8: // flattened
        t->ne[0] = t->ne[0] * t->ne[1] * t->ne[2];
        t->ne[1] = t->ne[2] = 1;
        t->n_dims = 1;
        break;
    case 9: // one more
        t->ne[t->n_dims++] = 2;
        break;
    case 10: // the last two together
        if (t->n_dims == 3) {
            t->ne[1] *= t->ne[2];
            t->ne[2] = 1;
            t->n_dims = 2;
        }
        break;
    }
}

TEST(a_misshapen_tensor_is_refused_by_name) {
    int exact = 0, all = 0;
    for (int b = 0; b < MODELS_FORMS; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        for (int i = 0; i < e.n_tensors; i++)
            for (int how = 0; how < 11; how++) {
                edit_tensor old = e.tensors[i];
                if (b == 3 && ends_with(old.name, "attn_kv_b.weight")) continue; // not needed
                reshape(&e.tensors[i], how);
                if (memcmp(old.ne, e.tensors[i].ne, sizeof old.ne) && e.tensors[i].ne[0] &&
                    e.tensors[i].ne[old.n_dims - 1]) {
                    verdict v = try_edit(&e);
                    check_verdict(&v, old.name);
                    int half = ends_with(old.name, "attn_k_b.weight") ||
                               ends_with(old.name, "attn_v_b.weight");
                    if (half && same_rows(&old, &e.tensors[i])) {
                        CHECKF(v.ran && v.finite, "%s: %s", old.name, v.error.text);
                    } else {
                        CHECKF(!v.opened, "%s opened with shape %d", old.name, how);
                        CHECKF(v.opened || names_tensor(&v.error, old.name), "%s: %s: %s", old.name,
                               v.error.where, v.error.text);
                        exact += !strcmp(v.error.where, old.name);
                        all++;
                    }
                }
                e.tensors[i] = old;
            }
        edit_close(&e);
    }
    printf("  %d of %d errors name the very tensor, the others one of its layer\n", exact, all);
    CHECK(exact * 4 >= all * 3);
}

// Types that the library knows but cannot compute with, and ids that nobody knows, on each
// tensor.
TEST(unsupported_types_are_refused_by_name) {
    static const uint32_t types[] = {3, 6, 20, 39, 38, 9999, 0x7FFFFFFF};
    for (int b = 0; b < MODELS_FORMS; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        for (int i = 0; i < e.n_tensors; i++)
            for (int t = 0; t < 7; t++) {
                edit_tensor old = e.tensors[i];
                const char *type = moe_type_name((moe_type)types[t]);
                if (old.ne[0] % 32 || moe_type_supported((moe_type)types[t])) continue;
                if (b == 3 && ends_with(old.name, "attn_kv_b.weight")) continue; // not needed
                e.tensors[i].type = types[t];
                verdict v = try_edit(&e);
                check_verdict(&v, old.name);
                CHECKF(!v.opened && v.error.status == MOE_ERROR_UNSUPPORTED, "%s %s: %s", old.name,
                       type, v.error.text);
                CHECKF(v.opened || !strcmp(v.error.where, old.name), "%s: %s", old.name,
                       v.error.where);
                if (types[t] < 40 && types[t] != 38)
                    CHECKF(strstr(v.error.text, type), "%s: %s", type, v.error.text);
                e.tensors[i] = old;
            }
        edit_close(&e);
    }
}

// A tensor of 32 numbers, or of another type.
static edit_tensor *add_tensor(edit_file *e, const char *name, uint32_t type) {
    edit_tensor *t = &e->tensors[e->n_tensors++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->n_dims = 1;
    t->ne[0] = type ? 512 : 32;
    t->ne[1] = t->ne[2] = t->ne[3] = 1;
    t->type = type;
    return t;
}

// Tensors that nothing needs may be of any type and shape: those of layers that are not run,
// what looks at images, scales of activations.
TEST(tensors_that_nothing_needs_may_be_anything) {
    static const char *const names[] = {"v.patch_embd.weight", "mm.0.weight",
                                        "v.blk.0.attn_q.weight", "blk.0.attn_output.input_scale",
                                        "blk.1.ffn_down_exps.input_scale"};
    static const char *const predicts[] = {"blk.2.nextn.eh_proj.weight", "blk.2.attn_q.weight",
                                           "blk.2.whatever"};
    static const char *const archs[] = {"qwen3moe", "deepseek2"};
    static const uint32_t three = 3, one = 1;
    for (int b = 0; b < 2; b++) {
        edit_file e;
        char key[64];
        CHECK(edit_open(&e, models_form(b)));
        for (int i = 0; i < 5; i++) add_tensor(&e, names[i], i % 2 ? 23 : 0);
        verdict v = try_edit(&e);
        CHECKF(v.opened && v.ran && v.finite, "%s: %s", v.error.where, v.error.text);
        for (int i = 0; i < 3; i++) add_tensor(&e, predicts[i], 23);
        snprintf(key, sizeof key, "%s.block_count", archs[b]);
        edit_set(&e, key, 4, &three, 4);
        snprintf(key, sizeof key, "%s.nextn_predict_layers", archs[b]);
        edit_set(&e, key, 4, &one, 4);
        v = try_edit(&e);
        CHECKF(v.opened && v.ran && v.finite, "%s: %s", v.error.where, v.error.text);
        edit_find_value(&e, key)->removed = 1;
        CHECK(!try_edit(&e).opened); // a third layer, and not whole
        edit_close(&e);
    }
}

// Any other tensor that is not used changes what the model should compute: refused by name.
TEST(any_other_unused_tensor_is_refused_by_name) {
    static const char *const names[] = {
        "blk.0.attn_sinks.weight", "blk.1.attn_sinks.weight", "blk.0.exp_probs_b.bias",
        "blk.1.exp_probs_b", "blk.0.post_attention_norm.weight", "blk.1.post_ffw_norm.weight",
        "blk.0.ssm_in.weight", "position_embd.weight", "token_types.weight",
        "blk.7.attn_norm.weight", "blk.2.attn_norm.weight", "blk.0.ffn_gate_shexp.weight",
        "blk.1.ffn_gate_inp_shexp.weight", "blk.0.attn_gate.weight", "blk.1.nextn.eh_proj.weight",
        "token_embd_norm.weight", "token_embd.bias", "output_norm.bias", "blk.0.attn_norm.bias",
        "blk.00.attn_norm.weight", "blk.99999999999.attn_norm.weight", "blk.0.ffn_norm.scale",
        "rope_factors_long.weight", "blk.0.attn_k_b.weight", "blk.0.indexer.proj.weight",
        "blk.0.ffn_gate.weight", "blk.0.attn_rot.input_scale", "output.weight.1", "x", "blk.",
        "blk.0", "blk.-1.x", "attn_norm.weight", "blk.0.attn_q.weights"};
    for (int b = 0; b < MODELS_FORMS; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
            const int n = e.n_tensors;
            if (edit_find_tensor(&e, names[i])) continue;
            if (ends_with(names[i], "exp_probs_b") && b > 0 && b < 4) continue; // a second name
            add_tensor(&e, names[i], 0);
            verdict v = try_edit(&e);
            check_verdict(&v, names[i]);
            CHECKF(!v.opened, "%d: %s", b, names[i]);
            if (!v.opened)
                CHECKF(names_tensor(&v.error, names[i]), "%s: %s", names[i], v.error.text);
            e.n_tensors = n;
        }
        add_tensor(&e, "first.weight", 0); // several
        add_tensor(&e, "blk.0.second.weight", 0);
        check_refused(&e, "two", MOE_ERROR_UNSUPPORTED, "first.weight");
        CHECK(strstr(try_edit(&e).error.text, "2 tensors: first.weight, blk.0.second.weight"));
        edit_close(&e);
    }
}

// Latent attention reads some matrices in two forms, of which one could not add a bias.
TEST(biases_of_matrices_with_two_forms_are_refused) {
    static const char *const names[] = {"blk.1.attn_k_b.bias", "blk.1.attn_v_b.bias",
                                        "blk.1.attn_kv_b.bias"};
    for (int b = 1; b <= 2; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        for (int i = b == 1 ? 2 : 0; i < (b == 1 ? 3 : 2); i++) {
            edit_tensor *t = add_tensor(&e, names[i], 0);
            t->n_dims = 2;
            t->ne[0] = i == 1 ? 16 : 32;
            t->ne[1] = 2;
            check_refused(&e, names[i], MOE_ERROR_UNSUPPORTED, names[i]);
            e.n_tensors--;
        }
        edit_close(&e);
    }
}

// What is kept as floats must not become many times larger than the file.
TEST(vectors_of_very_coarse_types_are_refused) {
    static const char *const names[] = {"blk.0.attn_norm.weight", "output_norm.weight"};
    edit_file e;
    CHECK(edit_open(&e, models_simple("qwen3moe_quant", "q8_0")));
    for (int i = 0; i < 2; i++) {
        edit_tensor *t = edit_find_tensor(&e, names[i]), old = *t;
        t->type = MOE_TYPE_Q2_K;
        t->size = 0;
        check_refused(&e, names[i], MOE_ERROR_UNSUPPORTED, names[i]);
        t->type = MOE_TYPE_IQ4_XS;
        verdict v = try_edit(&e);
        CHECKF(v.opened && v.ran, "%s: %s", v.error.where, v.error.text);
        *t = old;
    }
    edit_close(&e);
}

// A sparse file of micro_qwen2 with other widths: every layer has the shapes of the first, weights
// are zeros. shared: all tensors lie at the same bytes, so that the file is as large as its largest
// one, whatever the number of layers. Result: the file's size.
static size_t write_sparse(const char *path, uint32_t n_embd, uint32_t n_layer, int shared) {
    edit_file e;
    edit_image head = {NULL, 0, 0};
    uint64_t n_tensors = 0, offset = 0, end = 0;
    CHECK(edit_open(&e, models_form(5)));
    edit_set(&e, "qwen2moe.block_count", 4, &n_layer, 4);
    edit_set(&e, "qwen2moe.embedding_length", 4, &n_embd, 4);
    edit_put_bytes(&head, "GGUF", 4);
    edit_put(&head, 3, 4);
    for (int i = 0; i < e.n_tensors; i++)
        if (strncmp(e.tensors[i].name, "blk.1.", 6))
            n_tensors += strncmp(e.tensors[i].name, "blk.0.", 6) ? 1 : n_layer;
    edit_put(&head, n_tensors, 8);
    edit_put(&head, (uint64_t)e.n_values, 8);
    for (int i = 0; i < e.n_values; i++) {
        edit_put_string(&head, e.values[i].key);
        edit_put(&head, e.values[i].type, 4);
        edit_put_bytes(&head, e.values[i].data, e.values[i].size);
    }
    for (int i = 0; i < e.n_tensors; i++) {
        edit_tensor t = e.tensors[i];
        const int in_layer = !strncmp(t.name, "blk.0.", 6);
        const int to_embd = strstr(t.name, "ffn_down") || strstr(t.name, "attn_output");
        if (!strncmp(t.name, "blk.1.", 6)) continue;
        if (!ends_with(t.name, ".bias")) t.ne[to_embd] = n_embd;
        t.type = t.n_dims == 1 ? MOE_TYPE_F16 : MOE_TYPE_Q4_0;
        for (uint32_t layer = 0; layer < (in_layer ? n_layer : 1); layer++) {
            char name[160];
            snprintf(name, sizeof name, "blk.%u.%s", layer, t.name + 6);
            edit_put_string(&head, in_layer ? name : t.name);
            edit_put(&head, t.n_dims, 4);
            for (uint32_t d = 0; d < t.n_dims; d++) edit_put(&head, t.ne[d], 8);
            edit_put(&head, t.type, 4);
            edit_put(&head, offset, 8);
            const size_t size = (edit_tensor_size(&t) + 31) / 32 * 32;
            if (offset + size > end) end = offset + size;
            if (!shared) offset += size;
        }
    }
    edit_pad(&head);
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(head.data, 1, head.size, file) == head.size && fflush(file) == 0 &&
          ftruncate(fileno(file), (off_t)(head.size + end)) == 0);
    if (file) fclose(file);
    free(head.data);
    edit_close(&e);
    return head.size + end;
}

// Opening takes no more than a few times the file's size, however many tensors name its bytes.
TEST(a_small_file_cannot_ask_for_gigabytes) {
    const char *path = models_path("sparse.gguf");
    for (int shared = 0; shared <= 1; shared++) {
        const size_t size = shared ? write_sparse(path, 1 << 18, 512, 1) // vectors of 1.6 GB
                                   : write_sparse(path, 1 << 10, 40, 0);
        meter m;
        moe_model_options o;
        moe_error error;
        memset(&m, 0, sizeof m);
        memset(&o, 0, sizeof o);
        m.most = 8 * size;
        o.allocator = meter_allocator(&m);
        clear_error(&error);
        moe_model *model = moe_model_open(path, &o, &error);
        printf("  %.1f MB: %.1f MB asked for, %s\n", (double)size / 1e6, (double)m.peak / 1e6,
               model ? "opened" : error.text);
        CHECKF((model == NULL) == shared, "%s: %s", error.where, error.text);
        CHECK(m.peak < 2 * size);
        if (shared)
            CHECKF(error.status == MOE_ERROR_FORMAT && strstr(error.text, "overlaps"), "%s",
                   error.text);
        moe_model_close(model);
        CHECK(m.live == 0);
    }
}

// A file with more layers than it counts.
TEST(more_layers_than_are_counted_are_refused) {
    static const uint32_t one = 1;
    edit_file e;
    CHECK(edit_open(&e, models_form(0)));
    edit_set(&e, "qwen3moe.block_count", 4, &one, 4);
    verdict v = try_edit(&e);
    CHECK(!v.opened && v.error.status == MOE_ERROR_FORMAT && !strncmp(v.error.where, "blk.1.", 6));
    CHECKF(strstr(v.error.text, "block_count"), "%s", v.error.text);
    edit_close(&e);
}

// Keys that ask for what there is not.
TEST(keys_that_ask_for_what_there_is_not_are_refused) {
    static const struct {
        int broken;
        const char *key;
        uint32_t type, value;
    } cases[] = {{7, "gpt-oss.attention.key_length_swa", 4, 8},
                 {7, "gpt-oss.attention.value_length_swa", 4, 12},
                 {7, "gpt-oss.rope.dimension_count_swa", 4, 8},
                 {0, "qwen3moe.attention.causal", 7, 0}};
    for (int i = 0; i < 4; i++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(cases[i].broken)));
        edit_set(&e, cases[i].key, cases[i].type, &cases[i].value, cases[i].type == 7 ? 1 : 4);
        verdict v = try_edit(&e);
        check_verdict(&v, cases[i].key);
        CHECKF(!v.opened && v.error.status == MOE_ERROR_UNSUPPORTED &&
                   ends_with(cases[i].key, v.error.where),
               "%s: %s: %s", cases[i].key, v.error.where, v.error.text);
        edit_close(&e);
    }
    static const uint8_t floats[20] = {6, 0, 0, 0, 2}; // an array of 2
    edit_file e;
    CHECK(edit_open(&e, models_form(7)));
    edit_set(&e, "gpt-oss.attention.sliding_window_pattern", 9, floats, 20);
    check_refused(&e, "pattern", MOE_ERROR_FORMAT, "gpt-oss.attention.sliding_window_pattern");
    edit_close(&e);
    static const float scale = 0.1f; // without its length
    CHECK(edit_open(&e, models_form(1)));
    edit_set(&e, "deepseek2.attention.temperature_scale", 6, &scale, 4);
    check_refused(&e, "temperature", MOE_ERROR_FORMAT, "deepseek2.attention.temperature_length");
    edit_close(&e);
}

// Odd numbers where each of them counts: sinks may be anything, factors of frequencies not.
TEST(sinks_may_be_any_number_but_factors_may_not) {
    static const float sinks[] = {-INFINITY, -1e30f, 1e30f, INFINITY, NAN};
    static const float factors[] = {1, -2, 1e-20f, 0, 1e-40f, NAN};
    float values[8];
    edit_file e;
    CHECK(edit_open(&e, models_form(7)));
    edit_tensor *t = edit_find_tensor(&e, "blk.1.attn_sinks.weight");
    for (int i = 0; i < 5; i++) {
        for (int h = 0; h < 4; h++) values[h] = sinks[h == 2 ? i : 1];
        t->data = (const uint8_t *)values;
        verdict v = try_edit(&e);
        CHECKF(v.opened && v.ran && v.finite == (i < 3), "sink %g", (double)sinks[i]);
    }
    edit_close(&e);
    CHECK(edit_open(&e, models_form(4)));
    t = &e.tensors[e.n_tensors++];
    snprintf(t->name, sizeof t->name, "rope_freqs.weight");
    t->n_dims = 1;
    t->ne[0] = 8;
    t->ne[1] = t->ne[2] = t->ne[3] = 1;
    t->data = (const uint8_t *)values;
    t->size = sizeof values;
    for (int i = 0; i < 6; i++) {
        for (int k = 0; k < 8; k++) values[k] = factors[k == 7 ? i : 0];
        verdict v = try_edit(&e);
        if (i < 3) CHECKF(v.opened && v.ran && v.finite, "factor %g", (double)factors[i]);
        else check_refused(&e, "factor", MOE_ERROR_FORMAT, "rope_freqs.weight");
    }
    for (int how = 0; how < 3; how++) {
        t->ne[0] = how == 0 ? 7 : how == 1 ? 9 : 16;
        check_refused(&e, "factors", MOE_ERROR_FORMAT, "rope_freqs.weight");
    }
    t->removed = 1;
    edit_find_value(&e, "llama.expert_count")->removed = 1; // a dense model
    check_refused(&e, "no experts", MOE_ERROR_FORMAT, "blk.0.ffn_gate.weight");
    edit_close(&e);
}

TEST(families_that_are_nothing_without_experts_are_refused_without) {
    edit_file e;
    CHECK(edit_open(&e, models_simple("micro", "f32")));
    edit_find_value(&e, "qwen3moe.expert_count")->removed = 1;
    check_refused(&e, "no experts", MOE_ERROR_UNSUPPORTED, "expert_count");
    edit_close(&e);
}

// ---- hyper-parameters ------------------------------------------------------------------------

// Values to put into each key, as GGUF has them: type and little-endian bytes.
typedef struct odd_value {
    const char *name;
    uint32_t type;
    uint64_t bits;
} odd_value;

static const odd_value odd_values[] = {
    {"u32 0", 4, 0},
    {"u32 1", 4, 1},
    {"u32 2", 4, 2},
    {"u32 3", 4, 3},
    {"u32 7", 4, 7},
    {"u32 33", 4, 33},
    {"u32 65536", 4, 65536},
    {"u32 2^31-1", 4, 0x7FFFFFFF},
    {"u32 2^31", 4, 0x80000000},
    {"u32 2^32-1", 4, 0xFFFFFFFF},
    {"u64 2^63", 10, (uint64_t)1 << 63},
    {"u64 2^64-1", 10, UINT64_MAX},
    {"u64 2^32", 10, (uint64_t)1 << 32},
    {"i32 -1", 5, 0xFFFFFFFF},
    {"i64 min", 11, (uint64_t)1 << 63},
    {"i8 -128", 1, 0x80},
    {"f32 0", 6, 0},
    {"f32 -0", 6, 0x80000000},
    {"f32 -1", 6, 0xBF800000},
    {"f32 1e-40", 6, 71362},
    {"f32 1e30", 6, 0x7149F2CA},
    {"f32 NaN", 6, 0x7FC00000},
    {"f32 inf", 6, 0x7F800000},
    {"f32 -inf", 6, 0xFF800000},
    {"f64 NaN", 12, 0x7FF8000000000000},
    {"f64 1e300", 12, 0x7E37E43C8800759C},
    {"bool 0", 7, 0},
    {"bool 1", 7, 1},
    {"bool 2", 7, 2},
};
enum { N_ODD = sizeof odd_values / sizeof odd_values[0] };

// Keys that the library has no reason to read in these models.
static int is_unread(const edit_file *e, const char *key) {
    // In these families experts are as wide as feed_forward_length says.
    int dense = !strncmp(key, "llama.", 6) || !strncmp(key, "olmoe.", 6);
    if (ends_with(key, ".expert_feed_forward_length")) return dense;
    for (int i = 0; i < e->n_tensors; i++) dense |= ends_with(e->tensors[i].name, ".ffn_up.weight");
    return ends_with(key, ".vocab_size") || !strncmp(key, "general.", 8) ||
           (ends_with(key, ".feed_forward_length") && !dense);
}

static void check_value(edit_file *e, int i, uint32_t type, const void *data, size_t size,
                        const char *name) {
    edit_value old = e->values[i];
    char what[192];
    snprintf(what, sizeof what, "%s = %s", old.key, name);
    e->values[i].type = type;
    e->values[i].data = (const uint8_t *)data;
    e->values[i].size = size;
    verdict v = try_edit(e);
    check_verdict(&v, what);
    CHECKF(v.largest <= (size_t)64 << 20, "%s: asked for %zu bytes", what, v.largest);
    // What cannot be a number, and text where a number belongs, must not go unnoticed.
    int absurd = strstr(name, "NaN") || strstr(name, "inf") || type == 8 || type == 9;
    if (absurd && strncmp(old.key, "tokenizer.", 10) && !is_unread(e, old.key) && old.type != 8) {
        CHECKF(!v.opened, "%s was opened", what);
        CHECKF(v.opened || !strcmp(v.error.where, old.key), "%s: %s: %s", what, v.error.where,
               v.error.text);
    }
    e->values[i] = old;
}

TEST(odd_values_of_keys_are_refused_or_run) {
    for (int b = 0; b < MODELS_FORMS; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        for (int i = 0; i < e.n_values; i++) {
            uint8_t text[12], array[12], texts[12];
            memset(text, 0, sizeof text);
            memset(array, 0, sizeof array);
            memset(texts, 0, sizeof texts);
            text[0] = 1; // a text of one byte
            text[8] = 'x';
            array[0] = 4; // no element of u32
            texts[0] = 8; // no text
            for (int k = 0; k < N_ODD; k++) {
                uint8_t bytes[8];
                for (int j = 0; j < 8; j++) bytes[j] = (uint8_t)(odd_values[k].bits >> 8 * j);
                check_value(&e, i, odd_values[k].type, bytes, edit_scalar(odd_values[k].type),
                            odd_values[k].name);
            }
            check_value(&e, i, 8, text, 9, "text");
            check_value(&e, i, 9, array, 12, "empty array");
            check_value(&e, i, 9, texts, 12, "empty array of texts");
            e.values[i].removed = 1;
            verdict v = try_edit(&e);
            check_verdict(&v, e.values[i].key);
            e.values[i].removed = 0;
        }
        edit_close(&e);
    }
}

// Pairs of hyper-parameters that fit each other but no machine.
TEST(odd_pairs_of_values_are_refused_or_run_small) {
    static const uint32_t values[] = {0, 1, 4, 1000000, 0x7FFFFFFF, 0xFFFFFFFF};
    for (int b = 0; b < 2; b++) {
        edit_file e;
        CHECK(edit_open(&e, models_form(b)));
        for (int i = 0; i < e.n_values; i++)
            for (int j = 0; j < i; j++)
                for (int k = 0; k < 6 && e.values[i].type == 4 && e.values[j].type == 4; k++) {
                    edit_value first = e.values[i], second = e.values[j];
                    uint8_t bytes[4];
                    for (int d = 0; d < 4; d++) bytes[d] = (uint8_t)(values[k] >> 8 * d);
                    e.values[i].data = e.values[j].data = bytes;
                    if (strncmp(first.key, "general.", 8) && strncmp(second.key, "general.", 8)) {
                        verdict v = try_edit(&e);
                        check_verdict(&v, first.key);
                        CHECKF(v.largest <= (size_t)64 << 20, "%s, %s = %u: %zu bytes", first.key,
                               second.key, values[k], v.largest);
                    }
                    e.values[i] = first;
                    e.values[j] = second;
                }
        edit_close(&e);
    }
}

// A text value in GGUF's form.
static size_t put_text(uint8_t *out, const char *text) {
    size_t n = strlen(text);
    memset(out, 0, 8);
    out[0] = (uint8_t)n;
    out[1] = (uint8_t)(n >> 8);
    memcpy(out + 8, text, n);
    return n + 8;
}

TEST(unknown_families_and_tokenizers_are_refused) {
    uint8_t text[400];
    char longest[320];
    edit_file e;
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    const char *const families[] = {"", "llama5", "qwen3moe ", "Qwen3moe", "gpt", longest};
    CHECK(edit_open(&e, models_simple("micro", "f32")));
    for (int i = 0; i < 6; i++) {
        edit_set(&e, "general.architecture", 8, text, put_text(text, families[i]));
        check_refused(&e, families[i], MOE_ERROR_UNSUPPORTED, "general.architecture");
    }
    edit_find_value(&e, "general.architecture")->removed = 1;
    check_refused(&e, "no family", MOE_ERROR_FORMAT, "general.architecture");
    edit_set(&e, "general.architecture", 8, text, put_text(text, "qwen3moe"));

    const char *const tokenizers[] = {"xyz", "", "gpt3", longest};
    uint8_t tokenizer[400];
    for (int i = 0; i < 4; i++) {
        edit_set(&e, "tokenizer.ggml.model", 8, tokenizer, put_text(tokenizer, tokenizers[i]));
        check_refused(&e, tokenizers[i], MOE_ERROR_UNSUPPORTED, "tokenizer.ggml.model");
    }
    edit_set(&e, "tokenizer.ggml.model", 8, tokenizer, put_text(tokenizer, "gpt2"));
    uint8_t pre[64];
    edit_set(&e, "tokenizer.ggml.pre", 8, pre, put_text(pre, "nobody-knows"));
    check_refused(&e, "unknown pre-tokenizer", MOE_ERROR_UNSUPPORTED, "tokenizer.ggml.pre");
    edit_set(&e, "tokenizer.ggml.pre", 8, pre, put_text(pre, "qwen2"));
    edit_find_value(&e, "tokenizer.ggml.tokens")->removed = 1;
    check_refused(&e, "no tokens", MOE_ERROR_FORMAT, "tokenizer.ggml.tokens");
    edit_find_value(&e, "tokenizer.ggml.tokens")->removed = 0;

    uint8_t kind[64];
    edit_set(&e, "general.type", 8, kind, put_text(kind, "adapter"));
    check_refused(&e, "adapter", MOE_OK, "general.type");
    edit_close(&e);
}

// Models without a vocabulary: token ids only.
TEST(a_model_without_a_vocabulary_takes_token_ids) {
    static const char *const names[] = {"test", "none", "no_vocab", NULL};
    for (int i = 0; i < 4; i++) {
        uint8_t text[32];
        edit_file e;
        moe_error error;
        CHECK(edit_open(&e, models_simple("micro", "f32")));
        for (int v = 0; v < e.n_values; v++) // nothing but the model's name is left
            if (!strncmp(e.values[v].key, "tokenizer.", 10)) e.values[v].removed = 1;
        if (names[i]) edit_set(&e, "tokenizer.ggml.model", 8, text, put_text(text, names[i]));
        edit_image image = edit_build(&e);
        moe_gguf *gguf = moe_gguf_open_memory(image.data, image.size, NULL, &error);
        moe_model *model = moe_model_open_gguf(gguf, NULL, &error);
        CHECKF(model != NULL, "%s", error.text);
        CHECK(moe_model_vocab(model) == NULL);
        moe_session *session = moe_session_open(model, NULL, &error);
        int32_t token = 5;
        CHECK(moe_session_eval(session, &token, 1, &error) == MOE_OK);
        moe_generate_options g;
        memset(&g, 0, sizeof g);
        clear_error(&error);
        CHECK(moe_generate(session, &token, 1, &g, NULL, &error) == MOE_ERROR_ARGUMENT);
        CHECK(error.status == MOE_ERROR_ARGUMENT && *error.text);
        moe_session_close(session);
        moe_model_close(model);
        moe_gguf_close(gguf);
        free(image.data);
        edit_close(&e);
    }
    moe_model *model = models_open(models_simple("micro", "f32"));
    CHECK(model && moe_vocab_size(moe_model_vocab(model)) == 264);
    moe_model_close(model);
}

// ---- files -----------------------------------------------------------------------------------

static void check_open_fails(const char *path, moe_status status) {
    moe_error error;
    clear_error(&error);
    moe_model *model = moe_model_open(path, NULL, &error);
    CHECKF(model == NULL && error.status == status && *error.text, "%s: %s: %s", path,
           moe_status_name(error.status), error.text);
    CHECKF(*error.where || status == MOE_ERROR_FORMAT, "%s", path);
    moe_model_close(model);
    CHECK(moe_model_open(path, NULL, NULL) == NULL);
}

static void write_file(const char *path, const void *data, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, size, file) != size || fclose(file)) {
        printf("cannot write %s\n", path);
        exit(1);
    }
}

TEST(bad_files_are_refused) {
    moe_error error;
    clear_error(&error);
    CHECK(moe_model_open(NULL, NULL, &error) == NULL && error.status == MOE_ERROR_ARGUMENT);
    CHECK(moe_model_open_gguf(NULL, NULL, &error) == NULL && error.status == MOE_ERROR_ARGUMENT);
    CHECK(moe_model_open("", NULL, &error) == NULL && error.status == MOE_ERROR_ARGUMENT);
    check_open_fails("build/no such file.gguf", MOE_ERROR_IO);
    check_open_fails("tests", MOE_ERROR_IO);
    check_open_fails("tests/test.h", MOE_ERROR_FORMAT);
    write_file(models_path("empty"), "", 0);
    check_open_fails(models_path("empty"), MOE_ERROR_FORMAT);
    write_file(models_path("magic"), "GGUF", 4);
    check_open_fails(models_path("magic"), MOE_ERROR_FORMAT);
}

// A file that ends too early: mapped, read, and from memory.
TEST(a_file_that_ends_too_early_is_refused) {
    edit_file e;
    CHECK(edit_open(&e, models_form(1)));
    size_t data = (size_t)(e.tensors[0].data - e.bytes);
    for (size_t size = 0; size < e.size; size += size < 200 ? 1 : size < data ? 61 : 1009) {
        edit_image image = {e.bytes, size, size};
        verdict v = try_image(&image);
        CHECKF(!v.opened && v.error.status == MOE_ERROR_FORMAT && *v.error.text, "%zu bytes: %s",
               size, v.error.text);
    }
    for (int i = 0; i < e.n_tensors; i++) {
        size_t size = (size_t)(e.tensors[i].data - e.bytes) + e.tensors[i].size - 1;
        for (int off = 0; off < 2; off++) {
            moe_model_options o;
            moe_error error;
            memset(&o, 0, sizeof o);
            o.pages = off ? MOE_PAGES_COPY : MOE_PAGES_AUTO;
            clear_error(&error);
            write_file(models_path("cut.gguf"), e.bytes, size);
            moe_model *model = moe_model_open(models_path("cut.gguf"), &o, &error);
            CHECKF(!model && error.status == MOE_ERROR_FORMAT, "%s: %s", e.tensors[i].name,
                   error.text);
            moe_model_close(model);
        }
    }
    edit_close(&e);
}

static int refuse(void *user, float fraction) {
    ++*(int *)user;
    return fraction < 0;
}
static int accept(void *user, float fraction) {
    int *calls = (int *)user;
    *calls = fraction >= 0 && fraction <= 1 ? *calls + 1 : -1000000;
    return 1;
}

// Every way to get the weights gives the same logits; loading can be cancelled.
TEST(every_way_to_load_gives_the_same_logits) {
    const char *path = models_simple("t_mla_groups", "q8_0");
    float *expected = NULL;
    int32_t tokens[20];
    models_tokens(tokens, 20, 264, 1);
    for (int way = 0; way < 6; way++) {
        moe_model_options o;
        moe_session_options s;
        moe_error error;
        int calls = 0;
        memset(&o, 0, sizeof o);
        memset(&s, 0, sizeof s);
        o.pages = (moe_pages)(way % 3);
        o.prefault = way / 3 ? MOE_ON : 0;
        o.progress = refuse;
        o.progress_user = &calls;
        moe_model *model = moe_model_open(path, &o, &error);
        if (calls) CHECK(!model && error.status == MOE_ERROR_CANCELLED);
        else CHECK(model != NULL);
        CHECK(calls == 1 || way < 2);
        moe_model_close(model);
        o.progress = accept;
        calls = 0;
        model = moe_model_open(path, &o, &error);
        CHECK(model != NULL && calls >= 0);
        if (!model) continue;
        float *logits = models_run(model, &s, tokens, 20, MODELS_WHOLE);
        if (expected && logits) CHECK(!memcmp(expected, logits, sizeof(float) * 20 * 264));
        models_keep_first(&expected, logits);
        moe_model_close(model);
    }
    free(expected);
}

// ---- options and memory ----------------------------------------------------------------------

TEST(wrong_options_are_refused) {
    moe_model_options o;
    moe_error error;
    for (int wrong = 0; wrong < 4; wrong++) {
        memset(&o, 0, sizeof o);
        clear_error(&error);
        if (wrong < 2) o.numa = (moe_numa)(wrong ? -1 : 3);
        else o.mlock = wrong == 2 ? 2 : -7;
        CHECK(!moe_model_open(models_simple("micro", "f32"), &o, &error));
        CHECK(error.status == MOE_ERROR_ARGUMENT && !strcmp(error.where, "options"));
    }
    memset(&o, 0, sizeof o);
    o.allocator.alloc = meter_alloc;
    CHECK(!moe_model_open(models_simple("micro", "f32"), &o, &error));
    CHECK(error.status == MOE_ERROR_ARGUMENT);
}

// On any machine every way works; on one with one node numa is OFF and costs nothing.
TEST(every_numa_option_works_on_any_machine) {
    float *expected = NULL;
    int32_t tokens[20];
    moe_session_options s;
    models_tokens(tokens, 20, 264, 1);
    memset(&s, 0, sizeof s);
    for (int way = 0; way < 12; way++) {
        moe_model_options o;
        memset(&o, 0, sizeof o);
        o.numa = (moe_numa)(way % 3);
        o.pages = way / 3 % 2 ? MOE_PAGES_COPY : MOE_PAGES_AUTO;
        o.mlock = way / 6 ? MOE_ON : 0;
        moe_model *model = moe_model_open(models_simple("t_mla_groups", "q8_0"), &o, NULL);
        CHECK(model != NULL);
        if (!model) continue;
        const moe_model_memory *memory = moe_model_get_memory(model);
        const uint64_t bytes = moe_gguf_file_size(moe_model_gguf(model));
        CHECK(memory->n_nodes >= 1 && memory->n_bytes_placed <= bytes &&
              memory->n_bytes_locked <= bytes && moe_model_huge_bytes(model) <= bytes);
        if (memory->n_nodes == 1) CHECK(memory->numa == MOE_NUMA_OFF && !memory->n_bytes_placed);
        if (!o.mlock) CHECK(memory->n_bytes_locked == 0);
        float *logits = models_run(model, &s, tokens, 20, MODELS_WHOLE);
        if (expected && logits) CHECK(!memcmp(expected, logits, sizeof(float) * 20 * 264));
        models_keep_first(&expected, logits);
        moe_model_close(model);
    }
    free(expected);
    CHECK(moe_model_get_memory(NULL) == NULL);
}

// What mlock got shows in the process's status.
static uint64_t locked_kib(void) {
    char text[4096];
    moe__machine_file("", "/proc/self/status", text, sizeof text);
    const char *line = strstr(text, "VmLck:");
    return line ? strtoull(line + 6, NULL, 10) : 0;
}
TEST(mlock_locks_a_model_until_it_is_closed) {
    moe_model_options o;
    if (MODELS_SLOW) SKIP("sanitizers lock nothing");
    for (int copy = 0; copy < 2; copy++) {
        memset(&o, 0, sizeof o);
        o.mlock = MOE_ON;
        o.pages = copy ? MOE_PAGES_COPY : MOE_PAGES_MAP;
        moe_model *model = moe_model_open(models_simple("micro", "f32"), &o, NULL);
        CHECK(model != NULL);
        if (!model) return;
        const uint64_t bytes = moe_model_get_memory(model)->n_bytes_locked;
        if (bytes) CHECK(locked_kib() * 1024 >= bytes);
        moe_model_close(model);
        CHECK(locked_kib() == 0);
        if (!bytes) SKIP("the system locks nothing");
    }
}

// Two nodes that are both this machine's: every page is touched, moved "there" and counted. One
// that does not exist: the system refuses, and that is all.
TEST(pages_are_placed_on_nodes_that_exist) {
    moe__machine machine;
    moe_model_options o;
    moe_error error;
    uint64_t mask[MOE__MAX_PROCESSORS / 64];
    int calls = 0;
    moe__machine_affinity(mask);
    moe__machine_read(&machine, "", mask);
    const int real = machine.node[0];
    memset(&machine, 0, sizeof machine);
    machine.n_nodes = 2;
    machine.n_cores = 2;
    machine.cores[1] = 1;
    machine.cores[2] = 2;
    memset(&o, 0, sizeof o);
    for (int way = 0; way < 8; way++) {
        o.pages = way & 1 ? MOE_PAGES_COPY : MOE_PAGES_AUTO;
        o.numa = MOE_NUMA_OFF;
        o.progress = NULL;
        moe_model *model = moe_model_open(models_simple("qwen3moe_quant", "q4_K"), &o, &error);
        CHECK(model != NULL);
        if (!model) return;
        o.numa = way & 2 ? MOE_NUMA_OWNER : MOE_NUMA_INTERLEAVE;
        o.progress = accept;
        o.progress_user = &calls;
        calls = 0;
        machine.node[0] = real;
        machine.node[1] = way & 4 ? MOE__POLICY_BITS - 1 : real;
        CHECK(moe__place_weights(model, &machine, &o, &error) == MOE_OK && calls > 0);
        const moe_model_memory *memory = moe_model_get_memory(model);
        uint64_t bytes = 0;
        for (int64_t i = 0; i < moe_gguf_n_tensors(model->gguf); i++)
            bytes += moe_gguf_tensor_at(model->gguf, i)->size;
        if (way & 4) {
            CHECK(memory->numa == MOE_NUMA_OFF && memory->n_bytes_placed < bytes);
        } else if (memory->numa == MOE_NUMA_OFF) {
            moe_model_close(model);
            SKIP("the system does not place pages");
        } else {
            CHECK(memory->numa == o.numa);
            CHECKF(memory->n_bytes_placed + 8192 > bytes, "way %d: %d of %d", way,
                   (int)memory->n_bytes_placed, (int)bytes);
        }
        o.progress = refuse;
        CHECK(moe__place_weights(model, &machine, &o, &error) == MOE_ERROR_CANCELLED);
        moe_model_close(model);
    }
}

// Every allocation of opening a model fails once: no crash, no leak, MEMORY.
static void check_model_memory(const char *path, int read) {
    for (long fail_at = 1;; fail_at++) {
        meter m;
        moe_model_options o;
        moe_error error;
        memset(&m, 0, sizeof m);
        memset(&o, 0, sizeof o);
        o.allocator = meter_allocator(&m);
        o.pages = read ? MOE_PAGES_COPY : MOE_PAGES_AUTO;
        m.fail_at = fail_at;
        clear_error(&error);
        moe_model *model = moe_model_open(path, &o, &error);
        int failed = m.calls >= fail_at;
        if (failed) {
            CHECK(model == NULL && error.status == MOE_ERROR_MEMORY && *error.text);
        } else {
            CHECKF(model != NULL, "%s", error.text);
        }
        moe_model_close(model);
        CHECKF(m.live == 0, "%zu bytes left after failure %ld", m.live, fail_at);
        if (!failed) {
            printf("  %ld allocations to open %s%s\n", fail_at - 1, path, read ? ", read" : "");
            CHECK(fail_at > 1);
            return;
        }
    }
}

TEST(any_allocation_of_opening_may_fail) {
    check_model_memory(models_simple("micro", "f32"), 0);
    check_model_memory(models_simple("micro", "f32"), 1);
    check_model_memory(models_form(1), 0);
    check_model_memory(models_form(2), 1);
}

// ---- recurrent layers ------------------------------------------------------------------------

// A file of a hybrid shape, as small as it gets.
static int open_hybrid(edit_file *e, int i) {
    synth_config c = *synth_find(models_hybrids[i]);
    synth_options o;
    char name[64];
    memset(&o, 0, sizeof o);
    o.no_tokenizer = 1;
    c.vocab = 40, c.n_exp = 4, c.n_used = 2;
    if (c.groups > 1) c.groups = 2, c.groups_used = 1;
    snprintf(name, sizeof name, "%s-small", models_hybrids[i]);
    if (synth_write_config(&c, models_path(name), &o) != 0) exit(1);
    const int ok = edit_open(e, models_path(name));
    CHECK(ok);
    return ok;
}
// The full name of a key of the file's family.
static const char *family_key(const edit_file *e, const char *key) {
    static char full[128];
    const edit_value *v = edit_find_value((edit_file *)(uintptr_t)e, "general.architecture");
    snprintf(full, sizeof full, "%.*s.%s", (int)v->size - 8, (const char *)v->data + 8, key);
    return full;
}

TEST(files_with_recurrent_layers_lack_no_tensor) {
    int named = 0;
    for (int b = 0; b < MODELS_HYBRIDS; b++) {
        edit_file e;
        if (!open_hybrid(&e, b)) continue;
        verdict whole = try_edit(&e);
        CHECKF(whole.opened && whole.ran && whole.finite, "%s: %s: %s", models_hybrids[b],
               whole.error.where, whole.error.text);
        for (int i = 0; i < e.n_tensors; i++) {
            const char *name = e.tensors[i].name;
            // which families do without these: see test_families
            const int either = !strcmp(name, "output.weight") ||
                               ends_with(name, "exp_probs_b.bias");
            e.tensors[i].removed = 1;
            verdict v = try_edit(&e);
            check_verdict(&v, name);
            if (either && v.opened) {
                CHECKF(v.ran && v.finite, "%s: %s", name, v.error.text);
            } else {
                CHECKF(!v.opened, "%s opened without %s", models_hybrids[b], name);
                // another form of the same: ssm_in for attn_qkv and attn_gate, attn_q_a for
                // attn_q, attn_kv_b; a dense layer instead of a router's (jamba)
                const int same = !strcmp(v.error.where, name);
                const int other = ends_with(name, ".attn_qkv.weight") ||
                                  ends_with(name, ".attn_q.weight") ||
                                  ends_with(name, "attn_q_a.weight") ||
                                  ends_with(name, "_b.weight") ||
                                  ends_with(name, "ffn_gate_inp.weight");
                CHECKF(v.opened || same || (other && !strncmp(v.error.where, name, 6)) ||
                           strstr(v.error.where, "q_lora"),
                       "%s %s: %s: %s", models_hybrids[b], name, v.error.where, v.error.text);
                named += same;
            }
            e.tensors[i].removed = 0;
        }
        edit_close(&e);
    }
    printf("  %d are named\n", named);
    CHECK(named > 400);
}

// Columns come as {n} and {1, n}, taps with a dimension of 1 between, halves of the latent's
// expansion as matrices: shapes that hold the same.
static int may_be_flat(const char *name) {
    return ends_with(name, ".ssm_a") || ends_with(name, ".ssm_d") || strstr(name, "conv") ||
           ends_with(name, "attn_k_b.weight") || ends_with(name, "attn_v_b.weight");
}

TEST(misshapen_tensors_of_recurrent_layers_are_refused_by_name) {
    int exact = 0, all = 0, flat = 0;
    for (int b = 0; b < MODELS_HYBRIDS; b++) {
        edit_file e;
        if (!open_hybrid(&e, b)) continue;
        for (int i = 0; i < e.n_tensors; i++)
            for (int how = 0; how < 11; how += MODELS_SLOW ? 4 : 1) {
                edit_tensor old = e.tensors[i], *t = &e.tensors[i];
                reshape(t, how);
                if (memcmp(old.ne, t->ne, sizeof old.ne) && t->ne[0] && t->ne[old.n_dims - 1]) {
                    verdict v = try_edit(&e);
                    check_verdict(&v, old.name);
                    const int same = old.ne[0] * old.ne[1] * old.ne[2] * old.ne[3] ==
                                     t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
                    if (v.opened && same && may_be_flat(old.name)) {
                        CHECK(v.ran && v.finite);
                        flat++;
                    } else if (v.opened && ends_with(old.name, "token_embd.weight") &&
                               !edit_find_tensor(&e, "output.weight")) {
                        CHECK(v.ran); // another number of tokens
                    } else {
                        CHECKF(!v.opened, "%s %s opened with shape %d", models_hybrids[b],
                               old.name, how);
                        CHECKF(v.opened || names_tensor(&v.error, old.name), "%s: %s: %s", old.name,
                               v.error.where, v.error.text);
                        exact += !strcmp(v.error.where, old.name);
                        all++;
                    }
                }
                *t = old;
            }
        edit_close(&e);
    }
    printf("  %d of %d errors name the very tensor; %d other shapes hold the same\n", exact, all,
           flat);
    CHECK(exact * 10 >= all * 9);
}

TEST(unsupported_types_in_recurrent_layers_are_refused_by_name) {
    static const uint32_t types[] = {38, 9999};
    for (int b = 0; b < MODELS_HYBRIDS; b++) {
        edit_file e;
        if (!open_hybrid(&e, b)) continue;
        for (int i = 0; i < e.n_tensors; i++)
            for (int t = 0; t < 2; t++) {
                edit_tensor old = e.tensors[i];
                if (old.ne[0] % 32 || moe_type_supported((moe_type)types[t])) continue;
                e.tensors[i].type = types[t];
                verdict v = try_edit(&e);
                check_verdict(&v, old.name);
                CHECKF(!v.opened && v.error.status == MOE_ERROR_UNSUPPORTED &&
                           !strcmp(v.error.where, old.name),
                       "%s: %s", old.name, v.error.text);
                e.tensors[i] = old;
            }
        edit_close(&e);
    }
}

// Keys that these files have for others only, or that another one stands for.
static int is_read_here(const char *key) {
    static const char *const others[] = {
        ".vocab_size", ".full_attention_interval", ".attention.layer_norm_epsilon",
        "nemotron_h_moe.expert_shared_count", "nemotron_h_moe.expert_group_used_count"};
    for (int i = 0; i < 5; i++)
        if (ends_with(key, others[i])) return 0;
    return 1;
}
// Each key with each odd value, and left out. What cannot be a number must not go unnoticed.
TEST(odd_values_of_keys_of_recurrent_layers_are_refused_or_run) {
    int n_opened = 0, n = 0;
    for (int b = 0; b < MODELS_HYBRIDS; b++) {
        edit_file e;
        if (!open_hybrid(&e, b)) continue;
        for (int i = 0; i < e.n_values; i++) {
            const edit_value old = e.values[i];
            if (!strncmp(old.key, "general.", 8) || !strncmp(old.key, "tokenizer.", 10)) continue;
            for (int k = 0; k <= N_ODD + 3; k += MODELS_SLOW ? 3 : 1) {
                uint8_t bytes[64];
                edit_value *v = &e.values[i];
                memset(bytes, 0, sizeof bytes);
                v->data = bytes;
                if (k < N_ODD) {
                    for (int j = 0; j < 8; j++) bytes[j] = (uint8_t)(odd_values[k].bits >> 8 * j);
                    v->type = odd_values[k].type;
                    v->size = edit_scalar(v->type);
                } else if (k == N_ODD) { // a text
                    bytes[0] = 1;
                    v->type = 8, v->size = 9;
                } else if (k == N_ODD + 1) { // no element
                    bytes[0] = 4;
                    v->type = 9, v->size = 12;
                } else if (k == N_ODD + 2) { // one too many for the layers
                    bytes[0] = 4, bytes[4] = 5;
                    for (int j = 0; j < 5; j++) bytes[12 + 4 * j] = 2;
                    v->type = 9, v->size = 32;
                } else {
                    v->removed = 1;
                }
                verdict result = try_edit(&e);
                check_verdict(&result, old.key);
                CHECKF(result.largest <= (size_t)64 << 20, "%s: asked for %zu bytes", old.key,
                       result.largest);
                const char *name = k < N_ODD ? odd_values[k].name : "";
                if (strstr(name, "NaN") || strstr(name, "inf") || k == N_ODD || k == N_ODD + 1)
                    CHECKF(!result.opened || !is_read_here(old.key), "%s = %s", old.key, name);
                n_opened += result.opened;
                n++;
                *v = old;
            }
        }
        edit_close(&e);
    }
    printf("  %d of %d were opened\n", n_opened, n);
    CHECK(n_opened * 3 < n);
}

// A key of four numbers, one per layer.
static void set_layers(edit_file *e, const char *key, uint8_t *bytes, const int *values, int n) {
    memset(bytes, 0, 12);
    bytes[0] = 5;
    bytes[4] = (uint8_t)n;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 4; j++) bytes[12 + 4 * i + j] = (uint8_t)((uint32_t)values[i] >> 8 * j);
    edit_set(e, family_key(e, key), 9, bytes, (size_t)(12 + 4 * n));
}

TEST(kinds_of_layers_are_counted_and_bounded) {
    static const int none[5] = {0, 0, 0, 0, 0}, all[4] = {2, 2, 2, 2}, huge[4] = {0, 99999, 0, 2},
                     negative[4] = {0, -1, 0, 0}, more[4] = {0, 64, 0, 64};
    for (int b = 0; b < MODELS_HYBRIDS; b++) {
        edit_file e;
        uint8_t bytes[64], heads[64];
        if (!open_hybrid(&e, b)) continue;
        if (edit_find_value(&e, family_key(&e, "attention.recurrent_layers"))) {
            // a truth value per layer
            static const int ones[4] = {1, 1, 1, 1};
            set_layers(&e, "attention.recurrent_layers", bytes, ones, 4); // no attention at all
            check_refused(&e, "recurrent only", MOE_ERROR_UNSUPPORTED, NULL);
            set_layers(&e, "attention.recurrent_layers", bytes, none, 4); // tensors do not fit
            check_refused(&e, "attention only", MOE_OK, NULL);
            set_layers(&e, "attention.recurrent_layers", bytes, none, 5);
            check_refused(&e, "5 of 4 layers", MOE_ERROR_FORMAT,
                          family_key(&e, "attention.recurrent_layers"));
            set_layers(&e, "attention.recurrent_layers", bytes, none, 3);
            check_refused(&e, "3 of 4 layers", MOE_ERROR_FORMAT,
                          family_key(&e, "attention.recurrent_layers"));
            // without it the interval says the same
            edit_find_value(&e, family_key(&e, "attention.recurrent_layers"))->removed = 1;
            verdict v = try_edit(&e);
            CHECKF(v.opened && v.ran && v.finite, "%s: %s", models_hybrids[b], v.error.text);
        } else { // those without key-value heads recur
            const char *key = "attention.head_count_kv";
            set_layers(&e, key, bytes, none, 4);
            check_refused(&e, "no heads anywhere", MOE_OK, NULL);
            set_layers(&e, key, bytes, all, 4);
            check_refused(&e, "heads everywhere", MOE_OK, NULL);
            set_layers(&e, key, bytes, none, 5);
            check_refused(&e, "5 of 4 layers", MOE_ERROR_FORMAT, family_key(&e, key));
            set_layers(&e, key, bytes, huge, 4);
            check_refused(&e, "99999 heads", MOE_ERROR_FORMAT, NULL);
            set_layers(&e, key, bytes, negative, 4);
            check_refused(&e, "-1 heads", MOE_ERROR_FORMAT, family_key(&e, key));
            set_layers(&e, key, bytes, more, 4);
            check_refused(&e, "64 heads of 4", MOE_OK, NULL);
            // heads everywhere 0, too
            set_layers(&e, key, bytes, none, 4);
            set_layers(&e, "attention.head_count", heads, none, 4);
            check_refused(&e, "no heads at all", MOE_OK, NULL);
        }
        edit_close(&e);
    }
}

TEST(sizes_of_states_divide_and_have_bounds) {
    static const struct {
        const char *key;
        int family; // 0: gated delta net, 1: Mamba-2, 2: Mamba-1, 3: KDA, 4: short convolution
        uint32_t value;
        const char *where; // NULL: a tensor
    } cases[] = {
        {"ssm.inner_size", 0, 127, "ssm.inner_size"}, {"ssm.inner_size", 0, 0, ""},
        {"ssm.group_count", 0, 5, "ssm.inner_size"},  {"ssm.group_count", 0, 1, NULL},
        {"ssm.time_step_rank", 0, 5, "ssm.inner_size"}, {"ssm.state_size", 0, 5000, ""},
        {"ssm.state_size", 0, 16, "ssm.inner_size"},  {"ssm.time_step_rank", 0, 5000, ""},
        {"ssm.inner_size", 1, 129, "ssm.inner_size"}, {"ssm.group_count", 1, 7, "ssm.inner_size"},
        {"ssm.inner_size", 1, 96, NULL},
        {"ssm.time_step_rank", 1, 7, "ssm.inner_size"},
        {"ssm.state_size", 1, 31, NULL},              {"ssm.state_size", 1, 4097, ""},
        {"ssm.inner_size", 1, 1u << 25, ""},
        {"ssm.inner_size", 1, 1u << 24, "ssm.inner_size"},
        {"ssm.inner_size", 2, 127, NULL},             {"ssm.state_size", 2, 17, NULL},
        {"ssm.time_step_rank", 2, 31, NULL},          {"ssm.time_step_rank", 2, 1u << 17, ""},
        {"ssm.inner_size", 2, 1u << 21, ""},          {"kda.head_dim", 3, 31, NULL},
        {"kda.head_dim", 3, 0, ""},                   {"kda.head_dim", 3, 4097, ""},
        {"ssm.conv_kernel", 0, 17, ""},               {"ssm.conv_kernel", 0, 3, NULL},
        {"ssm.conv_kernel", 1, 17, ""},               {"ssm.conv_kernel", 2, 0, ""},
        {"ssm.conv_kernel", 3, 17, ""},               {"ssm.conv_kernel", 3, 16, NULL},
        {"shortconv.l_cache", 4, 17, ""},             {"shortconv.l_cache", 4, 0, ""},
        {"shortconv.l_cache", 4, 1, NULL}};
    static const int files[5][3] = {{0, 1, -1}, {3, 4, 5}, {6, -1, -1}, {7, 8, -1}, {2, -1, -1}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int f = 0; f < 3 && files[cases[i].family][f] >= 0; f++) {
            edit_file e;
            char what[96];
            if (!open_hybrid(&e, files[cases[i].family][f])) continue;
            const char *key = family_key(&e, cases[i].key);
            snprintf(what, sizeof what, "%s = %u", key, cases[i].value);
            edit_set(&e, key, 4, &cases[i].value, 4);
            const char *where = cases[i].where;
            check_refused(&e, what, MOE_ERROR_FORMAT, where && !*where ? key : where);
            if (!where) { // the name of a tensor of a recurrent layer
                verdict v = try_edit(&e);
                CHECKF(!strncmp(v.error.where, "blk.", 4), "%s: %s", what, v.error.where);
            }
            edit_close(&e);
        }
}

// A bound of decays that is none, decays without one, and limits of activations.
TEST(bounds_of_decays_and_activations_are_numbers) {
    static const float bounds[] = {0, 1, -0.0f, NAN, INFINITY, -INFINITY, -1e31f};
    static const uint8_t no = 0;
    edit_file e;
    uint8_t limits[28] = {6, 0, 0, 0, 4};
    if (!open_hybrid(&e, 8)) return;
    for (int i = 0; i < 7; i++) {
        const char *key = family_key(&e, "kda.gate_lower_bound");
        edit_set(&e, key, 6, &bounds[i], 4);
        check_refused(&e, "gate_lower_bound", MOE_ERROR_FORMAT, key);
    }
    edit_close(&e);
    if (!open_hybrid(&e, 8)) return;
    edit_set(&e, family_key(&e, "kda.safe_gate"), 7, &no, 1);
    check_refused(&e, "safe_gate", MOE_ERROR_UNSUPPORTED, NULL);
    edit_close(&e);
    for (int i = 0; i < 4; i++) {
        static const float values[] = {-1, NAN, INFINITY, 1e31f};
        if (!open_hybrid(&e, 8)) return;
        for (int k = 0; k < 4; k++) memcpy(limits + 12 + 4 * k, &values[i], 4);
        const char *key = family_key(&e, i % 2 ? "swiglu_clamp_shexp" : "swiglu_clamp_exp");
        edit_set(&e, key, 9, limits, sizeof limits);
        check_refused(&e, "limits", MOE_ERROR_FORMAT, key);
        limits[4] = 2; // too few
        memset(limits + 12, 0, 16);
        edit_set(&e, key, 9, limits, 20);
        check_refused(&e, "two limits", MOE_ERROR_FORMAT, key);
        limits[4] = 4;
        edit_close(&e);
    }
}

MAIN()
