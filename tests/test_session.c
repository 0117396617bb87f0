/* Hostile models and calls: whatever is wrong, a status and a sentence come back, nothing leaks,
 * and a session goes on as if the wrong call had not been made. */
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "gguf_edit.h"
#include "models.h"

/* ---- an allocator that counts, and fails when told to ---------------------------------------- */

typedef struct meter {
    size_t live, peak, largest; /* bytes */
    long calls, fail_at;        /* fail_at: the call that fails, from 1; 0: none */
    size_t limit, most;         /* larger requests fail, and those beyond so many; 0: none */
} meter;

static void *meter_alloc(void *user, size_t size) {
    meter *m = (meter *)user;
    if (size > m->largest) m->largest = size;
    if (++m->calls == m->fail_at || (m->limit && size > m->limit) ||
        (m->most && m->live + size > m->most))
        return NULL;
    void *memory = malloc(size);
    if (!memory) return NULL;
    m->live += size;
    if (m->live > m->peak) m->peak = m->live;
    return memory;
}
static void meter_free(void *user, void *memory, size_t size) {
    ((meter *)user)->live -= size;
    free(memory);
}
static moe_allocator meter_allocator(meter *m) {
    moe_allocator a = {meter_alloc, meter_free, m};
    return a;
}

static void clear_error(moe_error *error) {
    memset(error, 0, sizeof *error);
    error->status = (moe_status)-1;
}

static int is_bad(const float *x, int n) {
    for (int i = 0; i < n; i++)
        if (!(fabsf(x[i]) < INFINITY)) return 1;
    return 0;
}

/* ---- hostile models -------------------------------------------------------------------------- */

/* What became of a changed file: refused (with the error), or run for some tokens. */
typedef struct verdict {
    int opened, ran, finite;
    moe_error error; /* if it was not opened, or opened and not run */
    size_t largest;  /* allocation asked for */
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

/* Either it ran, or a status that fits, a name and a sentence say why not. */
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

/* The models to break: all families, all forms of attention tensors. */
static const char *broken_path(int i) {
    synth_options o;
    memset(&o, 0, sizeof o);
    o.no_tokenizer = 1;
    o.kvb = i == 2 ? SYNTH_KVB_SPLIT : i == 3 ? SYNTH_KVB_BOTH : SYNTH_KVB_FUSED;
    static const char *const configs[] = {"micro",         "micro_mla",   "micro_mla",  "micro_mla",
                                          "micro_mixtral", "micro_qwen2", "micro_olmoe",
                                          "micro_oss"};
    return models_write(configs[i], &o);
}
enum { N_BROKEN = 8 };

static int ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

/* Does the error name this tensor, or one that has to fit to it (of the same layer)? */
static int names_tensor(const moe_error *error, const char *tensor) {
    if (!strcmp(error->where, tensor)) return 1;
    if (!strncmp(tensor, "blk.", 4)) return !strncmp(error->where, tensor, 6);
    return ends_with(error->where, ".weight") || strchr(error->where, '.') != NULL;
}

TEST(untouched) {
    for (int b = 0; b < N_BROKEN; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
        verdict v = try_edit(&e);
        CHECKF(v.opened && v.ran && v.finite, "%s", v.error.text);
        edit_close(&e);
    }
}

/* Each tensor left out in turn. */
TEST(missing_tensors) {
    for (int b = 0; b < N_BROKEN; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
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
            if (optional) {
                CHECKF(v.opened && v.ran && v.finite, "%s: %s", name, v.error.text);
            } else {
                CHECKF(!v.opened, "opened without %s", name);
                /* Of two forms of the latent's expansion, either may be named. */
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

/* Do both shapes have the same rows? (attn_k_b and attn_v_b come as matrices, too.) */
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
    case 7: { /* the first two swapped */
        uint64_t ne = t->ne[0];
        t->ne[0] = t->ne[1];
        t->ne[1] = ne;
        if (t->n_dims == 1) t->n_dims = 2;
        break;
    }
    case 8: /* flattened */
        t->ne[0] = t->ne[0] * t->ne[1] * t->ne[2];
        t->ne[1] = t->ne[2] = 1;
        t->n_dims = 1;
        break;
    case 9: /* one more */
        t->ne[t->n_dims++] = 2;
        break;
    case 10: /* the last two together */
        if (t->n_dims == 3) {
            t->ne[1] *= t->ne[2];
            t->ne[2] = 1;
            t->n_dims = 2;
        }
        break;
    }
}

TEST(misshapen_tensors) {
    int exact = 0, all = 0;
    for (int b = 0; b < N_BROKEN; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
        for (int i = 0; i < e.n_tensors; i++)
            for (int how = 0; how < 11; how++) {
                edit_tensor old = e.tensors[i];
                if (b == 3 && ends_with(old.name, "attn_kv_b.weight")) continue; /* not needed */
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

/* Types that the library knows but cannot compute with, and ids that nobody knows, on each */
/* tensor. */
TEST(unsupported_types) {
    static const uint32_t types[] = {3, 6, 20, 39, 38, 9999, 0x7FFFFFFF};
    for (int b = 0; b < N_BROKEN; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
        for (int i = 0; i < e.n_tensors; i++)
            for (int t = 0; t < 7; t++) {
                edit_tensor old = e.tensors[i];
                const char *type = moe_type_name((moe_type)types[t]);
                if (old.ne[0] % 32 || moe_type_supported((moe_type)types[t])) continue;
                if (b == 3 && ends_with(old.name, "attn_kv_b.weight")) continue; /* not needed */
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

/* A tensor of 32 numbers, or of another type. */
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

/* Tensors that nothing needs may be of any type and shape: those of layers that are not run, */
/* what looks at images, scales of activations. */
TEST(spare_tensors) {
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
        CHECK(edit_open(&e, broken_path(b)));
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
        CHECK(!try_edit(&e).opened); /* a third layer, and not whole */
        edit_close(&e);
    }
}

/* Any other tensor that is not used changes what the model should compute: refused by name. */
TEST(unused_tensors) {
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
    for (int b = 0; b < N_BROKEN; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
        for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
            const int n = e.n_tensors;
            if (edit_find_tensor(&e, names[i])) continue;
            if (ends_with(names[i], "exp_probs_b") && b > 0 && b < 4) continue; /* a second name */
            add_tensor(&e, names[i], 0);
            verdict v = try_edit(&e);
            check_verdict(&v, names[i]);
            CHECKF(!v.opened, "%d: %s", b, names[i]);
            if (!v.opened)
                CHECKF(names_tensor(&v.error, names[i]), "%s: %s", names[i], v.error.text);
            e.n_tensors = n;
        }
        add_tensor(&e, "first.weight", 0); /* several */
        add_tensor(&e, "blk.0.second.weight", 0);
        check_refused(&e, "two", MOE_ERROR_UNSUPPORTED, "first.weight");
        CHECK(strstr(try_edit(&e).error.text, "2 tensors: first.weight, blk.0.second.weight"));
        edit_close(&e);
    }
}

/* Latent attention reads some matrices in two forms, of which one could not add a bias. */
TEST(biases_of_latent_attention) {
    static const char *const names[] = {"blk.1.attn_k_b.bias", "blk.1.attn_v_b.bias",
                                        "blk.1.attn_kv_b.bias"};
    for (int b = 1; b <= 2; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
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

/* What is kept as floats must not become many times larger than the file. */
TEST(coarse_vectors) {
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
    CHECK(edit_open(&e, broken_path(5)));
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
            char name[96];
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

/* A file with more layers than it counts. */
TEST(uncounted_layers) {
    static const uint32_t one = 1;
    edit_file e;
    CHECK(edit_open(&e, broken_path(0)));
    edit_set(&e, "qwen3moe.block_count", 4, &one, 4);
    verdict v = try_edit(&e);
    CHECK(!v.opened && v.error.status == MOE_ERROR_FORMAT && !strncmp(v.error.where, "blk.1.", 6));
    CHECKF(strstr(v.error.text, "block_count"), "%s", v.error.text);
    edit_close(&e);
}

/* Keys that ask for what there is not. */
TEST(refused_keys) {
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
        CHECK(edit_open(&e, broken_path(cases[i].broken)));
        edit_set(&e, cases[i].key, cases[i].type, &cases[i].value, cases[i].type == 7 ? 1 : 4);
        verdict v = try_edit(&e);
        check_verdict(&v, cases[i].key);
        CHECKF(!v.opened && v.error.status == MOE_ERROR_UNSUPPORTED &&
                   ends_with(cases[i].key, v.error.where),
               "%s: %s: %s", cases[i].key, v.error.where, v.error.text);
        edit_close(&e);
    }
    static const uint8_t floats[20] = {6, 0, 0, 0, 2}; /* an array of 2 */
    edit_file e;
    CHECK(edit_open(&e, broken_path(7)));
    edit_set(&e, "gpt-oss.attention.sliding_window_pattern", 9, floats, 20);
    check_refused(&e, "pattern", MOE_ERROR_FORMAT, "gpt-oss.attention.sliding_window_pattern");
    edit_close(&e);
    static const float scale = 0.1f; /* without its length */
    CHECK(edit_open(&e, broken_path(1)));
    edit_set(&e, "deepseek2.attention.temperature_scale", 6, &scale, 4);
    check_refused(&e, "temperature", MOE_ERROR_FORMAT, "deepseek2.attention.temperature_length");
    edit_close(&e);
}

/* Odd numbers where each of them counts: sinks may be anything, factors of frequencies not. */
TEST(odd_weights) {
    static const float sinks[] = {-INFINITY, -1e30f, 1e30f, INFINITY, NAN};
    static const float factors[] = {1, -2, 1e-20f, 0, 1e-40f, NAN};
    float values[8];
    edit_file e;
    CHECK(edit_open(&e, broken_path(7)));
    edit_tensor *t = edit_find_tensor(&e, "blk.1.attn_sinks.weight");
    for (int i = 0; i < 5; i++) {
        for (int h = 0; h < 4; h++) values[h] = sinks[h == 2 ? i : 1];
        t->data = (const uint8_t *)values;
        verdict v = try_edit(&e);
        CHECKF(v.opened && v.ran && v.finite == (i < 3), "sink %g", (double)sinks[i]);
    }
    edit_close(&e);
    CHECK(edit_open(&e, broken_path(4)));
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
    edit_find_value(&e, "llama.expert_count")->removed = 1; /* a dense model */
    check_refused(&e, "no experts", MOE_ERROR_UNSUPPORTED, "expert_count");
    edit_close(&e);
}

/* ---- hyper-parameters ------------------------------------------------------------------------ */

/* Values to put into each key, as GGUF has them: type and little-endian bytes. */
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

/* Keys that the library has no reason to read in these models. */
static int is_unread(const edit_file *e, const char *key) {
    /* In these families experts are as wide as feed_forward_length says. */
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
    /* What cannot be a number, and text where a number belongs, must not go unnoticed. */
    int absurd = strstr(name, "NaN") || strstr(name, "inf") || type == 8 || type == 9;
    if (absurd && strncmp(old.key, "tokenizer.", 10) && !is_unread(e, old.key) && old.type != 8) {
        CHECKF(!v.opened, "%s was opened", what);
        CHECKF(v.opened || !strcmp(v.error.where, old.key), "%s: %s: %s", what, v.error.where,
               v.error.text);
    }
    e->values[i] = old;
}

TEST(odd_values) {
    for (int b = 0; b < N_BROKEN; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
        for (int i = 0; i < e.n_values; i++) {
            uint8_t text[12], array[12], texts[12];
            memset(text, 0, sizeof text);
            memset(array, 0, sizeof array);
            memset(texts, 0, sizeof texts);
            text[0] = 1; /* a text of one byte */
            text[8] = 'x';
            array[0] = 4; /* no element of u32 */
            texts[0] = 8; /* no text */
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

/* Pairs of hyper-parameters that fit each other but no machine. */
TEST(odd_pairs) {
    static const uint32_t values[] = {0, 1, 4, 1000000, 0x7FFFFFFF, 0xFFFFFFFF};
    for (int b = 0; b < 2; b++) {
        edit_file e;
        CHECK(edit_open(&e, broken_path(b)));
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

/* A text value in GGUF's form. */
static size_t put_text(uint8_t *out, const char *text) {
    size_t n = strlen(text);
    memset(out, 0, 8);
    out[0] = (uint8_t)n;
    out[1] = (uint8_t)(n >> 8);
    memcpy(out + 8, text, n);
    return n + 8;
}

TEST(families_and_tokenizers) {
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

/* Models without a vocabulary: token ids only. */
TEST(no_vocabulary) {
    static const char *const names[] = {"test", "none", "no_vocab", NULL};
    for (int i = 0; i < 4; i++) {
        uint8_t text[32];
        edit_file e;
        moe_error error;
        CHECK(edit_open(&e, models_simple("micro", "f32")));
        for (int v = 0; v < e.n_values; v++) /* nothing but the model's name is left */
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

/* ---- files ----------------------------------------------------------------------------------- */

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

TEST(bad_files) {
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

/* A file that ends too early: mapped, read, and from memory. */
TEST(truncated_files) {
    edit_file e;
    CHECK(edit_open(&e, broken_path(1)));
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

/* The first logits are what later ones are compared with; those are freed. */
static void keep_first(float **first, float *logits) {
    if (*first) free(logits);
    else *first = logits;
}

/* Every way to get the weights gives the same logits; loading can be cancelled. */
TEST(ways_to_load) {
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
        keep_first(&expected, logits);
        moe_model_close(model);
    }
    free(expected);
}

/* ---- calls ----------------------------------------------------------------------------------- */

TEST(closing_nothing) {
    moe_session_close(NULL);
    moe_model_close(NULL);
    moe_gguf_close(NULL);
    moe_vocab_close(NULL);
    moe_pool_close(NULL);
    moe_sampler_close(NULL);
}

TEST(null_arguments) {
    moe_error error;
    int32_t token = 0;
    moe_session_info info;
    clear_error(&error);
    CHECK(moe_session_open(NULL, NULL, &error) == NULL && error.status == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_open(NULL, NULL, NULL) == NULL);
    CHECK(moe_session_estimate(NULL, NULL, &info, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_eval(NULL, &token, 1, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_rewind(NULL, 0, NULL) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_logits(NULL, 0) == NULL);
    CHECK(moe_session_length(NULL) == 0);
    CHECK(moe_session_model(NULL) == NULL && moe_session_get_info(NULL) == NULL);
    CHECK(moe_model_vocab(NULL) == NULL && moe_model_gguf(NULL) == NULL);
    CHECK(moe_model_get_info(NULL) == NULL);
    CHECK(moe_pool_threads(NULL) == 0);
    CHECK(moe_generate(NULL, &token, 1, NULL, NULL, NULL) == MOE_ERROR_ARGUMENT);
}

/* Opens a session with some options on the micro model. */
static moe_session *open_micro(moe_model **model, const moe_session_options *o) {
    *model = models_open(models_simple("micro", "f32"));
    moe_session *session = *model ? moe_session_open(*model, o, NULL) : NULL;
    CHECK(session != NULL);
    return session;
}

/* Evaluates wrongly: an error, and everything is as it was. */
static void check_eval_fails(moe_session *s, const int32_t *tokens, int32_t n, moe_status status) {
    moe_error error;
    float before[264];
    int32_t length = moe_session_length(s);
    const float *logits = moe_session_logits(s, -1);
    CHECK(logits != NULL);
    if (logits) memcpy(before, logits, sizeof before);
    clear_error(&error);
    CHECKF(moe_session_eval(s, tokens, n, &error) == status, "%s", moe_status_name(error.status));
    CHECKF(error.status == status && *error.text && *error.where, "%s: %s", error.where,
           error.text);
    CHECK(moe_session_eval(s, tokens, n, NULL) == status);
    CHECK(moe_session_length(s) == length);
    logits = moe_session_logits(s, -1);
    CHECK(logits && !memcmp(before, logits, sizeof before));
}

TEST(wrong_tokens) {
    moe_model *model;
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = 16;
    o.n_threads = 2;
    moe_session *session = open_micro(&model, &o), *other = moe_session_open(model, &o, NULL);
    int32_t good[6] = {1, 2, 3, 4, 263, 0}, bad[6];
    static const int32_t ids[] = {-1, 264, 265, INT32_MAX, INT32_MIN};
    CHECK(moe_session_eval(session, good, 2, NULL) == MOE_OK);
    for (int i = 0; i < 5; i++)
        for (int at = 0; at < 6; at++) {
            memcpy(bad, good, sizeof bad);
            bad[at] = ids[i];
            check_eval_fails(session, bad, 6, MOE_ERROR_ARGUMENT);
        }
    check_eval_fails(session, good, 0, MOE_ERROR_ARGUMENT);
    check_eval_fails(session, good, -1, MOE_ERROR_ARGUMENT);
    check_eval_fails(session, good, INT32_MIN, MOE_ERROR_ARGUMENT);
    check_eval_fails(session, NULL, 3, MOE_ERROR_ARGUMENT);
    /* Goes on as a session that made no mistake. */
    CHECK(moe_session_eval(session, good + 2, 4, NULL) == MOE_OK);
    CHECK(moe_session_eval(other, good, 2, NULL) == MOE_OK);
    CHECK(moe_session_eval(other, good + 2, 4, NULL) == MOE_OK);
    CHECK(!memcmp(moe_session_logits(session, -1), moe_session_logits(other, -1),
                  sizeof(float) * 264));
    moe_session_close(other);
    moe_session_close(session);
    moe_model_close(model);
}

TEST(context_full) {
    for (int keep = 0; keep < 2; keep++) {
        moe_model *model;
        moe_session_options o;
        int32_t tokens[20];
        memset(&o, 0, sizeof o);
        o.n_ctx = 8;
        o.n_batch = 3;
        o.keep_all_logits = keep ? MOE_ON : 0;
        moe_session *session = open_micro(&model, &o);
        models_tokens(tokens, 20, 264, 4);
        CHECK(moe_session_eval(session, tokens, 9, NULL) == MOE_ERROR_CONTEXT_FULL);
        CHECK(moe_session_length(session) == 0 && moe_session_logits(session, -1) == NULL);
        CHECK(moe_session_eval(session, tokens, 5, NULL) == MOE_OK);
        check_eval_fails(session, tokens, 4, MOE_ERROR_CONTEXT_FULL);
        check_eval_fails(session, tokens, 20, MOE_ERROR_CONTEXT_FULL);
        CHECK(moe_session_eval(session, tokens, 3, NULL) == MOE_OK);
        CHECK(moe_session_length(session) == 8);
        check_eval_fails(session, tokens, 1, MOE_ERROR_CONTEXT_FULL);
        CHECK(moe_session_rewind(session, 7, NULL) == MOE_OK);
        CHECK(moe_session_eval(session, tokens, 1, NULL) == MOE_OK);
        moe_session_close(session);
        moe_model_close(model);
    }
}

TEST(rewind_ranges) {
    moe_model *model;
    moe_session *session = open_micro(&model, NULL);
    int32_t tokens[4] = {1, 2, 3, 4};
    static const int32_t bad[] = {-1, 5, INT32_MAX, INT32_MIN};
    CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
    CHECK(moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
    for (int i = 0; i < 4; i++) {
        moe_error error;
        clear_error(&error);
        CHECK(moe_session_rewind(session, bad[i], &error) == MOE_ERROR_ARGUMENT);
        CHECK(error.status == MOE_ERROR_ARGUMENT && *error.text);
        CHECK(moe_session_length(session) == 4);
    }
    CHECK(moe_session_rewind(session, 4, NULL) == MOE_OK && moe_session_length(session) == 4);
    CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK && moe_session_length(session) == 0);
    moe_session_close(session);
    moe_model_close(model);
}

/* Options that make no sense, or that this version cannot do. */
TEST(session_options) {
    moe_model *model = models_open(models_simple("micro", "f32"));
    CHECK(model != NULL);
    if (!model) return;
    static const struct {
        int32_t n_ctx, n_batch, n_threads, n_threads_batch;
        int kv_type, schedule, isa;
        moe_status status;
    } cases[] = {
        {1, 1, 1, 1, 0, 0, 0, MOE_OK},
        {5, 100, 64, 3, 0, 0, 0, MOE_OK},
        {5, 1, 3, 64, 2, 1, 1, MOE_OK},
        {-1, 0, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {INT32_MIN, 0, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, -1, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, INT32_MIN, 0, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, -1, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, INT32_MAX, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, MOE_MAX_THREADS + 1, 0, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, 0, -1, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, 0, MOE_MAX_THREADS + 1, 0, 0, 0, MOE_ERROR_ARGUMENT},
        {0, 0, 0, 0, MOE_KV_Q8_0, 0, 0, MOE_ERROR_UNSUPPORTED}, /* heads of 16 */
        {0, 0, 0, 0, 77, 0, 0, MOE_ERROR_UNSUPPORTED},
        {0, 0, 0, 0, -1, 0, 0, MOE_ERROR_UNSUPPORTED},
        {0, 0, 0, 0, 0, 77, 0, MOE_ERROR_UNSUPPORTED},
        {0, 0, 0, 0, 0, -1, 0, MOE_ERROR_UNSUPPORTED},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe_session_options o;
        moe_session_info info;
        moe_error error;
        memset(&o, 0, sizeof o);
        o.n_ctx = cases[i].n_ctx;
        o.n_batch = cases[i].n_batch;
        o.n_threads = cases[i].n_threads;
        o.n_threads_batch = cases[i].n_threads_batch;
        o.kv_type = (moe_kv_type)cases[i].kv_type;
        o.schedule = (moe_schedule)cases[i].schedule;
        o.isa = (moe_isa)cases[i].isa;
        clear_error(&error);
        moe_session *session = moe_session_open(model, &o, &error);
        CHECKF((session != NULL) == (cases[i].status == MOE_OK), "case %zu: %s", i, error.text);
        if (cases[i].status != MOE_OK)
            CHECKF(error.status == cases[i].status && *error.text && *error.where,
                   "case %zu: %s: %s", i, moe_status_name(error.status), error.text);
        CHECKF(moe_session_estimate(model, &o, &info, NULL) == cases[i].status, "case %zu", i);
        if (session) {
            int32_t token = 3;
            CHECK(moe_session_eval(session, &token, 1, &error) == MOE_OK);
            CHECK(moe_session_get_info(session)->n_ctx == cases[i].n_ctx);
            CHECK(moe_session_get_info(session)->n_threads == cases[i].n_threads);
            CHECK(moe_session_model(session) == model);
        }
        moe_session_close(session);
    }
    moe_model_close(model);
}

/* Every schedule gives the same bits with every number of threads, for generated tokens and for */
/* prompts. Down projections read a hidden vector per expert, so that a schedule that mixed them */
/* up would show. */
TEST(schedules) {
    static const char *const configs[][2] = {{"t_mla_groups", "q8_0"},  {"qwen3moe_quant", "q4_K"},
                                             {"micro_oss", "f32"},      {"micro_qwen2", "f32"},
                                             {"t_oss_wide", "f32"},     {"micro_mixtral", "f32"},
                                             {"dsv3_quant", "q4_0"},    {"t_qwen_odd", "f32"}};
    enum { TOKENS = 40 };
    const int steps[] = {1, MODELS_WHOLE, MODELS_ODD};
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c += MODELS_SLOW ? 3 : 1) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        int32_t tokens[TOKENS];
        CHECK(model != NULL);
        if (!model) return;
        const size_t size = sizeof(float) * TOKENS * (size_t)moe_model_get_info(model)->n_vocab;
        models_tokens(tokens, TOKENS, moe_model_get_info(model)->n_vocab, 8);
        for (int k = 0; k < 3; k++) {
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.n_threads = 1;
            o.schedule = MOE_SCHEDULE_SEQUENTIAL;
            float *expected = models_run(model, &o, tokens, TOKENS, steps[k]);
            CHECK(expected != NULL);
            for (int schedule = 1; schedule <= 3 && expected; schedule++)
                for (o.n_threads = 1; o.n_threads <= 9; o.n_threads += MODELS_SLOW ? 4 : 1) {
                    o.schedule = (moe_schedule)schedule;
                    float *logits = models_run(model, &o, tokens, TOKENS, steps[k]);
                    CHECKF(logits && !memcmp(expected, logits, size),
                           "%s, schedule %d, %d threads, step %d", configs[c][0], schedule,
                           (int)o.n_threads, steps[k]);
                    free(logits);
                }
            free(expected);
        }
        moe_model_close(model);
    }
}

/* A token among others has the bits that it has alone, whatever the weights. */
TEST(tokens_alone_and_among_others) {
    static const char *const configs[][2] = {
        {"t_mla_groups", "q8_0"},  {"qwen3moe_quant", "q4_K"}, {"qwen3moe_quant", "q2_K"},
        {"qwen3moe_quant", "q6_K"}, {"micro_oss", "f32"},      {"micro_qwen2", "f32"},
        {"micro_mixtral", "f16"},  {"dsv3_quant", "q4_0"},     {"t_qwen_odd", "bf16"}};
    enum { TOKENS = 29 };
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c++) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        int32_t tokens[TOKENS];
        CHECKF(model != NULL, "%s %s", configs[c][0], configs[c][1]);
        if (!model) continue;
        const size_t size = sizeof(float) * TOKENS * (size_t)moe_model_get_info(model)->n_vocab;
        models_tokens(tokens, TOKENS, moe_model_get_info(model)->n_vocab, 5);
        moe_session_options o;
        memset(&o, 0, sizeof o);
        o.n_threads = 2;
        float *alone = models_run(model, &o, tokens, TOKENS, 1);
        for (int step = 2; step <= TOKENS; step += step < 8 ? 1 : 7) {
            float *logits = models_run(model, &o, tokens, TOKENS, step);
            CHECKF(alone && logits && !memcmp(alone, logits, size), "%s %s, %d at a time",
                   configs[c][0], configs[c][1], step);
            free(logits);
        }
        free(alone);
        moe_model_close(model);
    }
}

/* The caller's rounding mode, and whether it flushes small numbers to zero */
static void unusual_floats(void) {
    fesetround(FE_UPWARD);
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}
static int floats_are_unusual(void) {
#if defined(__x86_64__)
    if ((_mm_getcsr() & 0x8040) != 0x8040) return 0;
#endif
    return fegetround() == FE_UPWARD;
}

/* Neither reaches results, whichever thread computes them, and the caller has it back. */
TEST(the_callers_rounding_mode_stays_outside) {
    enum { TOKENS = 13 };
    const char *path = models_simple("qwen3moe_quant", "q4_K");
    fenv_t usual;
    fegetenv(&usual);
    moe_model *model = models_open(path);
    if (!model) return;
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    const size_t size = sizeof(float) * TOKENS * (size_t)n_vocab;
    int32_t tokens[TOKENS];
    models_tokens(tokens, TOKENS, n_vocab, 5);
    moe_session_options o;
    moe_sampler_options draw;
    memset(&o, 0, sizeof o);
    memset(&draw, 0, sizeof draw);
    draw.temperature = 0.7f, draw.top_p = 0.9f;
    o.n_threads = 1;
    float *expected = models_run(model, &o, tokens, TOKENS, 3), back[32];
    uint8_t row[34], rounded[34];
    moe_sampler *sampler = moe_sampler_open(&draw, n_vocab, n_vocab, NULL);
    const int32_t token = expected && sampler ? moe_sampler_sample(sampler, expected) : -1;
    moe_sampler_close(sampler);
    CHECK(moe_type_quantize(MOE_TYPE_Q8_0, expected, row, 1, 32, NULL, NULL) == MOE_OK);
    unusual_floats();
    moe_model *other = models_open(path);
    for (int threads = 1; threads <= 4 && expected && other; threads++) {
        o.n_threads = threads;
        float *logits = models_run(threads % 2 ? model : other, &o, tokens, TOKENS, 3);
        CHECKF(logits && !memcmp(logits, expected, size), "%d threads", threads);
        free(logits);
    }
    sampler = moe_sampler_open(&draw, n_vocab, n_vocab, NULL);
    CHECK(sampler && moe_sampler_sample(sampler, expected) == token);
    moe_sampler_close(sampler);
    CHECK(moe_type_quantize(MOE_TYPE_Q8_0, expected, rounded, 1, 32, NULL, NULL) == MOE_OK);
    CHECK(moe_type_dequantize(MOE_TYPE_Q8_0, rounded, back, 1, 32, NULL) == MOE_OK);
    CHECK(!memcmp(row, rounded, sizeof row));
    CHECK(floats_are_unusual());
    fesetenv(&usual);
    moe_model_close(other);
    moe_model_close(model);
    free(expected);
}

/* ---- several sequences ----------------------------------------------------------------------- */

enum { MANY = 8, MANY_CTX = 700 };

/* Sessions of one pool; all logits are kept. */
static int many_open(const moe_model *model, moe_session_options o, int n, moe_session **sessions) {
    for (int i = 0; i < n; i++) {
        sessions[i] = moe_session_open(model, &o, NULL);
        if (!sessions[i]) return 0;
    }
    return 1;
}
static void many_close(moe_session **sessions, int n) {
    for (int i = 0; i < n; i++) moe_session_close(sessions[i]);
}
static int same_logits(const moe_session *a, const moe_session *b, int n, size_t n_vocab) {
    int same = 1;
    for (int i = 0; i < n; i++) {
        const float *x = moe_session_logits(a, i), *y = moe_session_logits(b, i);
        same &= x && y && !memcmp(x, y, n_vocab * sizeof *x);
    }
    return same;
}

/* Up to eight sequences of different depths, prompts beside single tokens: each has the bits */
/* that it has alone, whatever threads, schedule and instruction set. */
TEST(many_sequences) {
    static const char *const configs[][2] = {
        {"t_mla_groups", "q8_0"}, {"qwen3moe_quant", "q4_K"}, {"micro_oss", "f32"},
        {"micro_qwen2", "f32"},   {"dsv3_quant", "q4_0"},     {"t_qwen_odd", "bf16"}};
    static const int lengths[][MANY] = {{40, 1, 7, 130, 3, 1, 12, 1}, {1, 1, 1, 1, 1, 1, 1, 1},
                                        {5, 300, 1, 2, 1, 150, 9, 1}, {1, 2, 1, 60, 1, 4, 1, 1}};
    int32_t tokens[MANY_CTX];
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c++) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        CHECK(model != NULL);
        if (!model) continue;
        const size_t n_vocab = (size_t)moe_model_get_info(model)->n_vocab;
        models_tokens(tokens, MANY_CTX, (int32_t)n_vocab, 3);
        for (int variant = 0; variant < (MODELS_SLOW ? 1 : 4); variant++) {
            moe_session *together[MANY] = {NULL}, *alone[MANY] = {NULL};
            moe_pool_options p;
            moe_session_options o;
            memset(&p, 0, sizeof p);
            memset(&o, 0, sizeof o);
            p.n_threads = o.n_threads = variant == 3 ? 7 : variant + 1;
            o.n_ctx = MANY_CTX;
            o.n_batch = variant == 1 ? 33 : 256;
            o.keep_all_logits = MOE_ON;
            o.schedule = (moe_schedule)(variant % 3 + 1);
            o.isa = variant == 2 ? MOE_ISA_AVX2 : MOE_ISA_BEST;
            o.kv_type = variant == 2 && c != 5 ? MOE_KV_Q8_0 : MOE_KV_F16;
            const moe__layer *layer = &model->layers[0];
            const int mla = layer->mixer == MOE__MLA;
            const int32_t first = mla ? layer->kv_lora : layer->head_k;
            const int32_t then = mla ? layer->n_rot : layer->head_v;
            if (first % 32 || then % 32) o.kv_type = MOE_KV_F16;
            moe_pool *pool = o.pool = moe_pool_open(&p, NULL);
            const int n = variant == 0 ? MANY : 5;
            int ok = many_open(model, o, n, together);
            o.pool = NULL;
            o.n_threads = 2;
            ok = many_open(model, o, n, alone) && ok;
            CHECK(ok);
            for (int round = 0; ok && round < 4; round++) {
                moe_job jobs[MANY];
                for (int i = 0; i < n; i++) {
                    const int from = moe_session_length(alone[i]);
                    jobs[i].session = together[i];
                    jobs[i].tokens = tokens + (from + 5 * i) % 200;
                    jobs[i].n_tokens = lengths[round][i];
                    CHECK(!moe_session_eval(alone[i], jobs[i].tokens, jobs[i].n_tokens, NULL));
                }
                CHECK(!moe_session_eval_many(jobs, n, NULL));
                for (int i = 0; i < n; i++)
                    CHECKF(jobs[i].status == MOE_OK &&
                               moe_session_length(together[i]) == moe_session_length(alone[i]) &&
                               same_logits(together[i], alone[i], lengths[round][i], n_vocab),
                           "%s %s, variant %d, round %d, sequence %d", configs[c][0], configs[c][1],
                           variant, round, i);
            }
            many_close(together, n);
            many_close(alone, n);
            moe_pool_close(pool);
        }
        moe_model_close(model);
    }
}

/* A context of several chunks of keys, cut in any way, with any number of threads */
TEST(cuts_of_long_inputs) {
    static const char *const configs[][2] = {{"qwen3moe_quant", "q4_K"}, {"micro_oss", "f32"},
                                             {"t_mla_groups", "q8_0"},   {"t_oss_wide", "f32"}};
    static const int cuts[][6] = {{1100}, {128, 972}, {600, 500}, {512, 200, 388}, {1099, 1}};
    enum { TOKENS = 1100 };
    int32_t tokens[TOKENS];
    for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c++) {
        moe_model *model = models_open(models_simple(configs[c][0], configs[c][1]));
        CHECK(model != NULL);
        if (!model) continue;
        const size_t n_vocab = (size_t)moe_model_get_info(model)->n_vocab;
        float *expected = NULL;
        models_tokens(tokens, TOKENS, (int32_t)n_vocab, 4);
        for (int k = 0; k < (MODELS_SLOW ? 2 : 5); k++) {
            moe_session_options o;
            memset(&o, 0, sizeof o);
            o.n_ctx = TOKENS + 8;
            o.n_threads = 1 + 2 * k;
            moe_session *session = moe_session_open(model, &o, NULL);
            CHECK(session != NULL);
            for (int i = 0, at = 0; session && at < TOKENS; at += cuts[k][i++])
                CHECK(!moe_session_eval(session, tokens + at, cuts[k][i], NULL));
            /* latent attention absorbs a single token, which is another arithmetic */
            if (session && !(model->layers[0].mixer == MOE__MLA && k == 4)) {
                const float *logits = moe_session_logits(session, -1);
                if (!expected) {
                    expected = (float *)malloc(n_vocab * sizeof *expected);
                    memcpy(expected, logits, n_vocab * sizeof *expected);
                }
                CHECKF(!memcmp(expected, logits, n_vocab * sizeof *expected), "%s, cut %d",
                       configs[c][0], k);
            }
            /* and what is generated behind it, in one call and token by token */
            float *after = (float *)malloc(n_vocab * sizeof *after);
            CHECK(!moe_session_eval(session, tokens, 5, NULL));
            memcpy(after, moe_session_logits(session, -1), n_vocab * sizeof *after);
            CHECK(!moe_session_rewind(session, TOKENS, NULL));
            for (int i = 0; i < 5; i++) CHECK(!moe_session_eval(session, tokens + i, 1, NULL));
            CHECK(!memcmp(after, moe_session_logits(session, -1), n_vocab * sizeof *after));
            free(after);
            moe_session_close(session);
        }
        free(expected);
        moe_model_close(model);
    }
}

static int many_stop(void *user) { return *(int *)user; }

/* Wrong jobs are left out, and say why; cancelling leaves all sessions as they were. */
TEST(jobs_that_are_wrong) {
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_model *other = models_open(models_simple("qwen3moe_tiny", "f32"));
    const int32_t good[3] = {1, 2, 3}, bad[2] = {1, -1};
    moe_session *s[4] = {NULL}, *stranger = NULL, *far = NULL;
    moe_session_options o;
    moe_error error;
    int stop = 0;
    CHECK(model && other);
    if (!model || !other) return;
    memset(&o, 0, sizeof o);
    moe_pool_options p;
    memset(&p, 0, sizeof p);
    p.n_threads = 2;
    moe_pool *pool = moe_pool_open(&p, NULL);
    o.pool = pool;
    o.n_ctx = 8;
    o.should_stop = many_stop;
    o.should_stop_user = &stop;
    CHECK(many_open(model, o, 4, s));
    far = moe_session_open(other, &o, NULL);
    o.pool = NULL;
    stranger = moe_session_open(model, &o, NULL);
    CHECK(far && stranger);
    moe_job jobs[] = {{s[0], good, 3, MOE_OK},  {s[1], bad, 2, MOE_OK},    {s[0], good, 1, MOE_OK},
                      {NULL, good, 1, MOE_OK},  {s[2], good, 9, MOE_OK},   {s[3], good, 2, MOE_OK},
                      {far, good, 1, MOE_OK},   {stranger, good, 1, MOE_OK},
                      {s[2], NULL, 1, MOE_OK},  {s[2], good, 0, MOE_OK}};
    enum { JOBS = sizeof jobs / sizeof jobs[0] };
    int32_t nine[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    jobs[4].tokens = nine;
    CHECK(moe_session_eval_many(jobs, JOBS, &error) == MOE_ERROR_ARGUMENT);
    CHECK(strstr(error.text, "-1"));
    for (int i = 0; i < JOBS; i++) {
        const moe_status want = i == 0 || i == 5 ? MOE_OK
                                : i == 4         ? MOE_ERROR_CONTEXT_FULL
                                                 : MOE_ERROR_ARGUMENT;
        CHECKF(jobs[i].status == want, "job %d: %d", i, (int)jobs[i].status);
    }
    CHECK(moe_session_length(s[0]) == 3 && moe_session_length(s[3]) == 2);
    CHECK(moe_session_length(s[1]) == 0 && moe_session_length(s[2]) == 0);
    CHECK(moe_session_logits(s[0], -1) && !moe_session_logits(s[1], -1));
    CHECK(moe_session_eval_many(NULL, 1, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_eval_many(jobs, 0, &error) == MOE_ERROR_ARGUMENT);
    CHECK(moe_session_eval_many(&jobs[1], 1, NULL) == MOE_ERROR_ARGUMENT);

    /* Cancelled: lengths and logits stay. */
    const float before = moe_session_logits(s[0], -1)[0];
    stop = 1;
    moe_job two[] = {{s[0], good, 1, MOE_OK}, {s[2], good, 2, MOE_OK}};
    CHECK(moe_session_eval_many(two, 2, &error) == MOE_ERROR_CANCELLED);
    CHECK(two[0].status == MOE_ERROR_CANCELLED && two[1].status == MOE_ERROR_CANCELLED);
    CHECK(moe_session_length(s[0]) == 3 && moe_session_length(s[2]) == 0);
    CHECK(moe_session_logits(s[0], -1) && moe_session_logits(s[0], -1)[0] == before);
    stop = 0;
    CHECK(moe_session_eval_many(two, 2, &error) == MOE_OK);
    CHECK(moe_session_length(s[0]) == 4 && moe_session_length(s[2]) == 2);

    /* Rewinding drops them, unless it forgets nothing. */
    CHECK(!moe_session_rewind(s[0], 4, NULL) && moe_session_logits(s[0], -1));
    CHECK(!moe_session_rewind(s[0], 3, NULL) && !moe_session_logits(s[0], -1));
    many_close(s, 4);
    moe_session_close(far);
    moe_session_close(stranger);
    moe_pool_close(pool);
    moe_model_close(model);
    moe_model_close(other);
}

/* A callback that evaluates, or opens a session, with the pool that calls it gets an error. */
static struct {
    moe_session *session;
    moe_session_options options;
    moe_status status;
    int calls, opened;
    moe_error error;
} recursion;
static int recursion_call(void *user) {
    const int32_t token = 1;
    (void)user;
    if (recursion.calls++) return 0;
    recursion.status = moe_session_eval(recursion.session, &token, 1, &recursion.error);
    moe_session *another =
        moe_session_open(moe_session_model(recursion.session), &recursion.options, NULL);
    recursion.opened = another != NULL;
    moe_session_close(another);
    return 0;
}
TEST(callbacks_cannot_evaluate) {
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_pool_options p;
    const int32_t token = 2;
    CHECK(model != NULL);
    if (!model) return;
    memset(&recursion, 0, sizeof recursion);
    memset(&p, 0, sizeof p);
    p.n_threads = 2;
    moe_pool *pool = moe_pool_open(&p, NULL);
    recursion.options.pool = pool;
    recursion.options.n_ctx = 8;
    recursion.session = moe_session_open(model, &recursion.options, NULL);
    moe_session_options o = recursion.options;
    o.should_stop = recursion_call;
    moe_session *session = moe_session_open(model, &o, NULL);
    CHECK(moe_session_eval(session, &token, 1, NULL) == MOE_OK);
    CHECK(recursion.calls > 0 && recursion.status == MOE_ERROR_ARGUMENT && !recursion.opened);
    CHECK(strstr(recursion.error.text, "callback"));
    CHECK(moe_session_length(recursion.session) == 0);
    CHECK(moe_session_eval(recursion.session, &token, 1, NULL) == MOE_OK);
    moe_session_close(session);
    moe_session_close(recursion.session);
    moe_pool_close(pool);
    moe_model_close(model);
}

/* The memory of a further session of a pool is its cache; a context costs what is stored in it. */
TEST(sessions_share_buffers) {
    moe_model *model = models_open(models_simple("qwen3moe_tiny", "f32"));
    moe_pool_options p;
    moe_session_options o;
    const int32_t token = 2;
    CHECK(model != NULL);
    if (!model) return;
    memset(&p, 0, sizeof p);
    memset(&o, 0, sizeof o);
    p.n_threads = 2;
    o.pool = moe_pool_open(&p, NULL);
    o.n_ctx = 16;
    moe_session *small = moe_session_open(model, &o, NULL);
    const size_t size = o.pool->work_size;
    const uint8_t *place = o.pool->work;
    CHECK(small && size > 0);
    moe_session *same = moe_session_open(model, &o, NULL);
    CHECK(same && o.pool->work_size == size && o.pool->work == place);
    CHECK(!moe_session_eval(small, &token, 1, NULL) && !moe_session_eval(same, &token, 1, NULL));
    o.n_ctx = 4000;
    o.n_batch = 600;
    moe_session *large = moe_session_open(model, &o, NULL); /* needs more: all move */
    CHECK(large && o.pool->work_size > size);
    CHECK(!moe_session_eval(large, &token, 1, NULL) && !moe_session_eval(small, &token, 1, NULL));
    const size_t n = sizeof(float) * (size_t)moe_model_get_info(model)->n_vocab;
    CHECK(!memcmp(moe_session_logits(large, -1), moe_session_logits(same, -1), n));
    /* in turns: each finds its own buffers where another one's were */
    for (int i = 0; i < 3; i++) {
        CHECK(!moe_session_eval(large, &token, 1, NULL) && !moe_session_eval(same, &token, 1, NULL));
        CHECK(!memcmp(moe_session_logits(large, -1), moe_session_logits(same, -1), n));
    }
    moe_session_close(small);
    moe_session_close(same);
    moe_session_close(large);
    moe_pool_close(o.pool);
    moe_model_close(model);
}

/* Which way a session went, and how often its threads met. */
TEST(schedules_report) {
    static const char *const configs[] = {"qwen3moe_tiny", "t_mla_groups"}; /* 8 and 3 experts */
    for (int c = 0; c < 2; c++) {
        moe_model *model = models_open(models_simple(configs[c], "f32"));
        CHECK(model != NULL);
        if (!model) return;
        const int used = moe_model_get_info(model)->n_expert_used;
        const uint64_t layers = (uint64_t)moe_model_get_info(model)->n_layer;
        for (int schedule = 0; schedule <= 3; schedule++)
            for (int threads = 1; threads <= 4; threads++) {
                const int32_t tokens[3] = {1, 2, 3};
                moe_session_options o;
                memset(&o, 0, sizeof o);
                o.schedule = (moe_schedule)schedule;
                o.n_threads = threads;
                moe_session *session = moe_session_open(model, &o, NULL);
                const moe_session_info *info = moe_session_get_info(session);
                const moe_session_stats *stats = moe_session_get_stats(session);
                CHECK(session != NULL && info->schedule != MOE_SCHEDULE_DEFAULT);
                if (!session) continue;
                CHECK(stats->n_threads == 0 && stats->n_barriers == 0);
                int groups = 1;
                for (int g = 2; g <= threads && info->schedule == MOE_SCHEDULE_PARALLEL; g++)
                    if (threads % g == 0 && used % g == 0) groups = g;
                CHECK(moe_session_eval(session, tokens, 3, NULL) == MOE_OK);
                CHECK(stats->n_expert_groups == 1 && stats->n_threads == threads);
                CHECK(moe_session_eval(session, tokens, 1, NULL) == MOE_OK);
                CHECKF(stats->n_expert_groups == groups, "%s, schedule %d, %d threads: %d",
                       configs[c], schedule, threads, (int)stats->n_expert_groups);
                /* balanced: where units of rows divide badly by threads */
                const int64_t units = moe_model_get_info(model)->n_embd / MOE__ROW_UNIT;
                const int64_t even = (units + threads - 1) / threads * threads;
                const int apart = groups > 1 || (schedule == 3 && 16 * units < 15 * even);
                /* the barriers on the first page of >>session, with one chunk of keys */
                uint64_t barriers = 2;
                for (uint64_t il = 0; il < layers; il++)
                    barriers += model->layers[il].is_moe ? (uint64_t)((c ? 8 : 6) + apart)
                                                         : (uint64_t)(c ? 7 : 5);
                CHECKF(stats->n_barriers == barriers, "%s, schedule %d, %d threads: %d not %d",
                       configs[c], schedule, threads, (int)stats->n_barriers, (int)barriers);
                double waited = 0;
                for (int t = 0; t < threads; t++) {
                    const double wait = stats->thread_wait_seconds[t];
                    CHECK(wait >= 0 && wait <= stats->eval_seconds);
                    if (threads == 1) CHECK(wait == 0);
                    waited += wait;
                }
                CHECK(waited == stats->wait_seconds && (threads == 1 || waited > 0));
                moe_session_close(session);
            }
        moe_model_close(model);
    }
}

/* Every token chooses n_used experts in each layer that has some, in prompts and one by one. */
TEST(expert_counts) {
    moe_model *model = models_open(models_simple("t_mla_groups", "q8_0"));
    moe_session *session = moe_session_open(model, NULL, NULL);
    int32_t tokens[30];
    CHECK(session != NULL);
    if (!session) return;
    const moe_model_info *info = moe_model_get_info(model);
    models_tokens(tokens, 30, info->n_vocab, 1);
    uint64_t evaluated = 0;
    for (int part = 0; part < 3; part++) {
        const int32_t n = part == 1 ? 1 : 12;
        CHECK(moe_session_eval(session, tokens + evaluated, n, NULL) == MOE_OK);
        evaluated += (uint64_t)n;
        for (int32_t il = -1; il <= info->n_layer; il++) {
            const uint64_t *counts = moe_session_expert_counts(session, il);
            uint64_t sum = 0;
            CHECK((counts != NULL) == (il >= 0 && il < info->n_layer && model->layers[il].is_moe));
            for (int32_t e = 0; counts && e < info->n_expert; e++) {
                CHECK(counts[e] <= evaluated);
                sum += counts[e];
            }
            if (counts) CHECK(sum == evaluated * (uint64_t)info->n_expert_used);
        }
    }
    CHECK(moe_session_expert_counts(NULL, 0) == NULL);
    moe_session_close(session);
    moe_model_close(model);
}

TEST(model_options) {
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

/* ---- memory nodes ---------------------------------------------------------------------------- */

/* On any machine every way works; on one with one node numa is OFF and costs nothing. */
TEST(numa_options) {
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
        keep_first(&expected, logits);
        moe_model_close(model);
    }
    free(expected);
    CHECK(moe_model_get_memory(NULL) == NULL);
}

/* What mlock got shows in the process's status. */
static uint64_t locked_kib(void) {
    char text[4096];
    moe__machine_file("", "/proc/self/status", text, sizeof text);
    const char *line = strstr(text, "VmLck:");
    return line ? strtoull(line + 6, NULL, 10) : 0;
}
TEST(locked_in_memory) {
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

/* Two nodes that are both this machine's: every page is touched, moved "there" and counted. One */
/* that does not exist: the system refuses, and that is all. */
TEST(placing_on_made_up_nodes) {
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

/* Threads in two groups of a node each: the same bits. */
TEST(schedules_on_two_nodes) {
    int32_t tokens[12];
    moe_session_options s;
    float *expected[2] = {NULL, NULL};
    moe_model *model = models_open(models_simple("qwen3moe_quant", "q4_K"));
    if (!model) return;
    const int32_t n_vocab = moe_model_get_info(model)->n_vocab;
    models_tokens(tokens, 12, n_vocab, 1);
    for (int schedule = 1; schedule <= 3; schedule++)
        for (int threads = 1; threads <= 9; threads += 2)
            for (int step = 0; step < 2; step++) {
                moe_pool_options p;
                memset(&p, 0, sizeof p);
                memset(&s, 0, sizeof s);
                p.n_threads = threads;
                s.pool = moe_pool_open(&p, NULL);
                if (!s.pool) continue;
                s.pool->nodes.n = 2;
                s.pool->nodes.first[1] = threads / 2;
                s.pool->nodes.first[2] = threads;
                s.schedule = (moe_schedule)schedule;
                float *logits = models_run(model, &s, tokens, 12, step ? MODELS_WHOLE : 1);
                CHECK(logits != NULL);
                if (expected[step] && logits)
                    CHECKF(!memcmp(expected[step], logits, sizeof(float) * 12 * (size_t)n_vocab),
                           "schedule %d, %d threads", schedule, threads);
                keep_first(&expected[step], logits);
                moe_pool_close(s.pool);
            }
    for (int step = 0; step < 2; step++) free(expected[step]);
    moe_model_close(model);
}

/* ---- stopping -------------------------------------------------------------------------------- */

typedef struct stopper {
    long calls, stop_at; /* the call that stops, from 1; 0: none */
} stopper;

static int should_stop(void *user) {
    stopper *s = (stopper *)user;
    return ++s->calls == s->stop_at;
}

/* Stopped at the first, second, ... question; then it goes on and gives the same bits. */
static void check_stopping(const char *path, int n_threads, int n_batch) {
    moe_model *model = models_open(path);
    CHECK(model != NULL);
    if (!model) return;
    moe_session_options o;
    stopper s = {0, 0};
    int32_t tokens[24];
    int V = moe_model_get_info(model)->n_vocab, n_layer = moe_model_get_info(model)->n_layer;
    models_tokens(tokens, 24, V, 9);
    memset(&o, 0, sizeof o);
    o.n_ctx = 24;
    o.n_batch = n_batch;
    o.n_threads = n_threads;
    o.should_stop = should_stop;
    o.should_stop_user = &s;
    moe_session *session = moe_session_open(model, &o, NULL);
    float *expected = (float *)malloc(sizeof(float) * (size_t)V);
    CHECK(session && moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
    s.calls = 0;
    CHECK(moe_session_eval(session, tokens + 4, 20, NULL) == MOE_OK);
    long asked = s.calls, batches = (20 + n_batch - 1) / n_batch;
    CHECKF(asked >= batches * n_layer, "asked %ld times in %ld batches of %d layers", asked,
           batches, n_layer);
    memcpy(expected, moe_session_logits(session, -1), sizeof(float) * (size_t)V);
    for (long at = 1; at <= asked; at++) {
        moe_error error;
        CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
        s.stop_at = 0;
        CHECK(moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
        s.calls = 0;
        s.stop_at = at;
        clear_error(&error);
        CHECK(moe_session_eval(session, tokens + 4, 20, &error) == MOE_ERROR_CANCELLED);
        CHECK(error.status == MOE_ERROR_CANCELLED && *error.text);
        CHECK(moe_session_length(session) == 4);
        s.stop_at = 0;
        CHECK(moe_session_eval(session, tokens + 4, 20, &error) == MOE_OK);
        const float *logits = moe_session_logits(session, -1);
        CHECKF(logits && !memcmp(expected, logits, sizeof(float) * (size_t)V),
               "stopped at %ld of %ld", at, asked);
    }
    free(expected);
    moe_session_close(session);
    moe_model_close(model);
}

TEST(stopping) {
    check_stopping(models_simple("micro", "f32"), 1, 20);
    check_stopping(models_simple("micro", "q8_0"), 3, 6);
    check_stopping(models_simple("t_mla_groups", "f32"), 2, 7);
    check_stopping(models_simple("t_mla_v2", "q4_0"), 1, 1);
}

/* After a cancelled eval there are either no logits or those from before, never something else. */
TEST(stopping_and_logits) {
    moe_model *model;
    moe_session_options o;
    stopper s = {0, 0};
    int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    memset(&o, 0, sizeof o);
    o.should_stop = should_stop;
    o.should_stop_user = &s;
    o.keep_all_logits = MOE_ON;
    o.n_batch = 2;
    moe_session *session = open_micro(&model, &o);
    for (long at = 1; at < 100; at++) {
        float before[264];
        CHECK(moe_session_rewind(session, 0, NULL) == MOE_OK);
        s.stop_at = 0;
        CHECK(moe_session_eval(session, tokens, 4, NULL) == MOE_OK);
        memcpy(before, moe_session_logits(session, 1), sizeof before);
        s.calls = 0;
        s.stop_at = at;
        moe_status status = moe_session_eval(session, tokens + 4, 4, NULL);
        if (status == MOE_OK) break;
        CHECK(status == MOE_ERROR_CANCELLED);
        const float *after = moe_session_logits(session, 1);
        CHECKF(!after || !memcmp(before, after, sizeof before), "stopped at %ld", at);
    }
    moe_session_close(session);
    moe_model_close(model);
}

/* ---- threads --------------------------------------------------------------------------------- */

TEST(shared_pool) {
    moe_pool_options p;
    moe_session_options o;
    moe_model *model = models_open(models_simple("t_mla_groups", "f32"));
    CHECK(model != NULL);
    if (!model) return;
    int32_t tokens[30];
    float *expected, *a = (float *)malloc(sizeof(float) * 30 * 264);
    float *b = (float *)malloc(sizeof(float) * 30 * 264);
    models_tokens(tokens, 30, 264, 12);
    memset(&p, 0, sizeof p);
    memset(&o, 0, sizeof o);
    o.n_threads = 1;
    expected = models_run(model, &o, tokens, 30, 5);
    for (int n = 1; n <= 5; n += 2) {
        p.n_threads = n;
        o.n_threads = n > 2 ? n - 1 : 0;
        moe_pool *pool = moe_pool_open(&p, NULL);
        CHECK(moe_pool_threads(pool) == n);
        o.pool = pool;
        o.keep_all_logits = MOE_ON;
        moe_session *x = moe_session_open(model, &o, NULL), *y = moe_session_open(model, &o, NULL);
        CHECK(x && y);
        for (int i = 0; i < 30; i += 5) {
            CHECK(models_eval(x, tokens, i, i + 5, 5, a));
            CHECK(models_eval(y, tokens, i, i + 5, 5, b));
        }
        CHECK(expected && !memcmp(a, expected, sizeof(float) * 30 * 264));
        CHECK(expected && !memcmp(b, expected, sizeof(float) * 30 * 264));
        /* More threads than the pool has: refused, or no more than there are. */
        o.n_threads = o.n_threads_batch = 64;
        moe_error error;
        clear_error(&error);
        moe_session *z = moe_session_open(model, &o, &error);
        if (z) CHECK(moe_session_get_info(z)->n_threads == n);
        if (z) CHECK(models_eval(z, tokens, 0, 30, 5, a));
        CHECK(z || (error.status == MOE_ERROR_ARGUMENT && *error.text));
        moe_session_close(z);
        moe_session_close(x);
        moe_session_close(y);
        moe_pool_close(pool);
    }
    free(expected);
    free(a);
    free(b);
    moe_model_close(model);
}

typedef struct runner {
    const moe_model *model;
    moe_session_options options;
    const int32_t *tokens;
    const float *expected;
    int rounds, wrong;
} runner;

static void *runner_run(void *user) {
    runner *r = (runner *)user;
    for (int i = 0; i < r->rounds; i++) {
        float *logits = models_run(r->model, &r->options, r->tokens, 30, i % 2 ? 5 : MODELS_WHOLE);
        size_t from = i % 2 ? 0 : 30 * 264;
        r->wrong += !logits || memcmp(logits, r->expected + from, sizeof(float) * 30 * 264);
        free(logits);
    }
    return NULL;
}

/* Several threads, each with its sessions, on one model; then all on one pool. */
TEST(concurrent_sessions) {
    moe_model *model = models_open(models_simple("t_mla_groups", "f32"));
    int32_t tokens[30];
    moe_pool_options p;
    moe_session_options o;
    memset(&p, 0, sizeof p);
    memset(&o, 0, sizeof o);
    models_tokens(tokens, 30, 264, 13);
    CHECK(model != NULL);
    if (!model) return;
    float *expected = (float *)malloc(sizeof(float) * 60 * 264);
    for (int i = 0; i < 2; i++) {
        float *part = models_run(model, &o, tokens, 30, i ? MODELS_WHOLE : 5);
        if (part) memcpy(expected + i * 30 * 264, part, sizeof(float) * 30 * 264);
        free(part);
    }
    p.n_threads = 2;
    moe_pool *pool = moe_pool_open(&p, NULL);
    for (int shared = 0; shared < 2; shared++) {
        pthread_t threads[4];
        runner runners[4];
        for (int i = 0; i < 4; i++) {
            memset(&runners[i], 0, sizeof runners[i]);
            runners[i].model = model;
            runners[i].options.n_threads = shared ? 0 : 1 + i % 3;
            runners[i].options.pool = shared ? pool : NULL;
            runners[i].tokens = tokens;
            runners[i].expected = expected;
            runners[i].rounds = 6;
            CHECK(pthread_create(&threads[i], NULL, runner_run, &runners[i]) == 0);
        }
        for (int i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            CHECKF(runners[i].wrong == 0, "thread %d: %d wrong", i, runners[i].wrong);
        }
    }
    moe_pool_close(pool);
    free(expected);
    moe_model_close(model);
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Every allocation of opening a model fails once: no crash, no leak, MEMORY. */
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

TEST(model_out_of_memory) {
    check_model_memory(models_simple("micro", "f32"), 0);
    check_model_memory(models_simple("micro", "f32"), 1);
    check_model_memory(broken_path(1), 0);
    check_model_memory(broken_path(2), 1);
}

/* The same for sessions, which take their memory from the model's allocator; and evaluating */
/* takes none. */
TEST(session_out_of_memory) {
    for (int b = 0; b < 2; b++) {
        meter m;
        moe_model_options mo;
        moe_session_options o;
        int32_t tokens[20];
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        memset(&o, 0, sizeof o);
        mo.allocator = meter_allocator(&m);
        o.n_threads = 2;
        o.n_batch = 8;
        o.n_ctx = 30;
        models_tokens(tokens, 20, 264, 2);
        moe_model *model = moe_model_open(broken_path(b), &mo, NULL);
        CHECK(model != NULL);
        size_t model_bytes = m.live;
        long fail_at = 0;
        for (int failed = 1; failed && fail_at < 1000;) {
            moe_error error;
            m.calls = 0;
            m.fail_at = ++fail_at;
            clear_error(&error);
            moe_session *session = moe_session_open(model, &o, &error);
            failed = m.calls >= fail_at;
            CHECKF((session == NULL) == failed, "%s", error.text);
            if (failed) CHECK(error.status == MOE_ERROR_MEMORY && *error.text);
            m.fail_at = 0;
            if (session) {
                long calls = m.calls;
                CHECK(moe_session_eval(session, tokens, 20, NULL) == MOE_OK);
                CHECK(moe_session_eval(session, tokens, 1, NULL) == MOE_OK);
                CHECK(moe_session_rewind(session, 3, NULL) == MOE_OK);
                CHECK(moe_session_eval(session, tokens, 9, NULL) == MOE_OK);
                CHECKF(m.calls == calls, "evaluating took memory %ld times", m.calls - calls);
            }
            moe_session_close(session);
            CHECKF(m.live == model_bytes, "%zu bytes left", m.live - model_bytes);
        }
        CHECK(fail_at > 1);
        moe_model_close(model);
        CHECK(m.live == 0);
    }
}

/* A context that no machine can hold is refused and not tried. */
TEST(huge_context) {
    for (int b = 0; b < 2; b++) {
        meter m;
        moe_model_options mo;
        moe_session_options o;
        moe_error error;
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        memset(&o, 0, sizeof o);
        mo.allocator = meter_allocator(&m);
        m.limit = (size_t)256 << 20;
        o.n_ctx = INT32_MAX;
        moe_model *model = moe_model_open(broken_path(b), &mo, NULL);
        clear_error(&error);
        moe_session *session = moe_session_open(model, &o, &error);
        CHECK(session == NULL);
        CHECKF(error.status == MOE_ERROR_MEMORY || error.status == MOE_ERROR_ARGUMENT, "%s",
               moe_status_name(error.status));
        o.keep_all_logits = MOE_ON;
        o.n_batch = INT32_MAX;
        CHECK(moe_session_open(model, &o, NULL) == NULL);
        moe_model_close(model);
    }
}

/* The estimate is what a session then takes, to within the allocator's own overhead. */
TEST(estimate) {
    static const int32_t contexts[] = {1, 33, 2000, 0}, batches[] = {1, 7, 512, 0};
    for (int b = 0; b < 2; b++) {
        meter m;
        moe_model_options mo;
        memset(&m, 0, sizeof m);
        memset(&mo, 0, sizeof mo);
        mo.allocator = meter_allocator(&m);
        moe_model *model = moe_model_open(broken_path(b), &mo, NULL);
        CHECK(model != NULL);
        if (!model) return;
        size_t before = m.live;
        for (int i = 0; i < 64; i++) {
            moe_session_options o;
            moe_session_info info;
            memset(&o, 0, sizeof o);
            memset(&info, 0xAA, sizeof info);
            o.n_ctx = contexts[i % 4];
            o.n_batch = batches[i / 4 % 4];
            o.n_threads = i & 16 ? 5 : 1;
            o.kv_type = i & 32 ? MOE_KV_F32 : MOE_KV_F16;
            o.keep_all_logits = i & 8 ? MOE_ON : 0;
            CHECK(moe_session_estimate(model, &o, &info, NULL) == MOE_OK);
            CHECK(m.live == before);
            moe_session *session = moe_session_open(model, &o, NULL);
            CHECK(session != NULL);
            if (!session) continue;
            const moe_session_info *real = moe_session_get_info(session);
            CHECK(info.kv_bytes == real->kv_bytes && info.work_bytes == real->work_bytes);
            CHECK(info.n_ctx == real->n_ctx && info.n_batch == real->n_batch);
            CHECK(info.n_threads == real->n_threads && info.isa == real->isa);
            size_t taken = m.live - before, told = info.kv_bytes + info.work_bytes;
            CHECKF(taken >= told && taken - told < 65536, "told %zu, taken %zu", told, taken);
            moe_session_close(session);
        }
        /* The cache grows with the context by known amounts: 2 x 16 values per token and layer, */
        /* or a latent of 32 and 8 rotated. */
        moe_session_options o;
        moe_session_info small, large;
        memset(&o, 0, sizeof o);
        o.n_ctx = 1024;
        CHECK(moe_session_estimate(model, &o, &small, NULL) == MOE_OK);
        o.n_ctx = 2048;
        CHECK(moe_session_estimate(model, &o, &large, NULL) == MOE_OK);
        size_t per_token = (large.kv_bytes - small.kv_bytes) / 1024;
        size_t expected = (size_t)(2 * (b ? 40 : 32) * 2);
        CHECKF(per_token >= expected && per_token <= 2 * expected, "%zu per token", per_token);
        moe_model_close(model);
    }
}

/* A Q8_0 cache takes 34 bytes where F16 takes 64, as estimated; widths that blocks do not fit
 * are refused with the numbers. */
TEST(q8_0_cache) {
    static const struct {
        const char *config, *widths; /* NULL: fits */
    } cases[] = {{"qwen3moe_quant", NULL}, {"dsv3_quant", NULL}, {"micro", "16 and 16"},
                 {"micro_mla", "32 and 8"}, {"t_qwen_odd", "10 and 10"}};
    for (int i = 0; i < 5; i++) {
        moe_model *model = models_open(models_simple(cases[i].config, "f32"));
        moe_session_options o;
        moe_session_info f16, q8_0;
        moe_error error;
        memset(&o, 0, sizeof o);
        o.n_ctx = 640;
        CHECK(model && moe_session_estimate(model, &o, &f16, NULL) == MOE_OK);
        if (!model) continue;
        o.kv_type = MOE_KV_Q8_0;
        clear_error(&error);
        moe_status status = moe_session_estimate(model, &o, &q8_0, &error);
        moe_session *session = moe_session_open(model, &o, NULL);
        CHECK((session != NULL) == (cases[i].widths == NULL));
        if (cases[i].widths) {
            CHECKF(status == MOE_ERROR_UNSUPPORTED && !strcmp(error.where, "kv_type") &&
                       strstr(error.text, cases[i].widths),
                   "%s: %s", cases[i].config, error.text);
        } else if (session) {
            const moe_session_info *real = moe_session_get_info(session);
            CHECK(status == MOE_OK && q8_0.kv_bytes * 64 == f16.kv_bytes * 34);
            CHECK(real->kv_type == MOE_KV_Q8_0 && real->kv_bytes == q8_0.kv_bytes);
            CHECK(real->work_bytes == q8_0.work_bytes && q8_0.work_bytes == f16.work_bytes);
        }
        moe_session_close(session);
        moe_model_close(model);
    }
}

MAIN()
