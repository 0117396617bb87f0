// moe-bench --plan: how evenly the forward pass is shared, step by step, by more threads and memory
// nodes than the machine has. Nothing of the library's rules is said again here: the library itself
// evaluates a token and a prompt with a team of so many threads, but its kernels are replaced by
// such as note what they would have cost. Models are those of a table of shapes, or -m FILE; their
// weights are never read. A step lies between two barriers; barriers cost nothing.
//
//     useful      what one thread alone has to do
//     efficiency  useful / (threads x the sum, over all steps, of the busiest thread's work)
//     idle        of the threads' time, what they wait in a step for its busiest thread
//     repeated    of the threads' time, what several of them do though once would do (norms)
//
// Layers of a kind are alike: of each kind one is evaluated and counted as often as there are some.
//
// What things cost. Generating is limited by memory: a byte of weights or cache costs 1, a value of
// a vector, which comes from a cache, 1, too (4 bytes, four times as fast), attention at least an
// eighth per multiply-add. In prompts a multiply-add costs 1 (of floats: PLAN_FLOAT), unpacking a
// weight what moe__entry_block_cost says, a value of a vector PLAN_VALUE. What has no kernel costs
// nothing: turning by rotary positions, choosing experts, copies. Keys that several threads read
// cost each of them, though one may find in a shared cache what another has fetched.
//
// What this uses of the library's insides: plan_take_over, plan_step, plan_nodes and the kernels'
// types; below, by name, moe__schedules and what they are given.
//
// Include moe_infer.h with its implementation, synth.c, timing.h first.
#ifndef PLAN_H
#define PLAN_H
#include <sys/mman.h>

enum {
    PLAN_PROMPT = 512,
    PLAN_DEPTH = 4096, // of the token, without -d
    PLAN_MACS = 8,     // multiply-adds of attention in the time that a byte takes
    PLAN_FLOAT = 4,    // int8 multiply-adds in the time that one of floats takes,
    PLAN_VALUE = 16    // or a value of a vector
};

typedef struct plan_shape {
    const char *name, *synth, *type;
} plan_shape;

static const plan_shape plan_shapes[] = {
    {"DeepSeek R1, V3", "dsr1", "q4_K_M"},
    {"DeepSeek V2-Lite", "dsv2lite", "q4_K_M"},
    {"Qwen3-235B-A22B", "qwen3-235b-a22b", "q4_K_M"},
    {"Qwen3-30B-A3B", "qwen3-30b-a3b", "q4_K_M"},
    {"gpt-oss-120b", "gpt-oss-120b", "mxfp4"},
    {"gpt-oss-20b", "gpt-oss-20b", "mxfp4"},
    {"Qwen3.5-35B-A3B", "qwen3.5-35b-a3b", "q4_K_M"},
    {"Qwen3-Next-80B", "qwen3-next-80b-a3b", "q4_K_M"},
    {"Nemotron-3-Nano", "nemotron-3-nano", "q4_K_M"},
    {"LFM2-8B-A1B", "lfm2-8b-a1b", "q4_K_M"},
    {"Kimi-Linear-48B", "kimi-linear-48b-a3b", "q4_K_M"},
    {"Mixtral 8x7B", "mixtral", "q4_K_M"},
    {"OLMoE", "olmoe", "q4_K_M"}};

// ---- what kernels note -----------------------------------------------------------------------

enum { PLAN_VECTORS, PLAN_ATTEND, PLAN_RECUR, PLAN_TENSORS, PLAN_NAMES = 64 }; // names of costs: bits
enum { PLAN_NO_LAYER = -2 };

typedef struct plan_tensor {
    const uint8_t *data, *end;
    moe_type type;
    size_t row_size;
    int32_t name, layer; // < 0: of none
    int is_router, is_float;
} plan_tensor;

// What a thread did in a step.
typedef struct plan_cell {
    double cost;
    uint64_t names;
    int32_t layer; // of its weights
} plan_cell;

static struct plan {
    char names[PLAN_NAMES][32];
    int n_names;
    plan_tensor *tensors; // by address
    int64_t n_tensors;
    double times[BENCH_LAYERS]; // layers that each evaluated one stands for
    plan_cell *cells;           // [thread][step], threads in the order in which they come
    int64_t n_cells;
    int n_steps, n_threads;
    int n_seen;     // atomic: threads that have come in this turn
    unsigned turn;  // evals so far
    int is_prompt;
    moe_session *session;
    uint32_t first; // barriers of the pool before this turn
} plan;

static __thread plan_cell *plan_mine;
static __thread unsigned plan_turn;

// Kernels that note costs; a context of `length` tokens of which nothing was evaluated.
static moe__kernels plan_kernels;
static void plan_take_over(moe_session *session, int32_t length) {
    session->kernels = &plan_kernels;
    session->length = length;
    session->slot.at = moe__slot_at(length);
}
// The number of the step that the calling thread is in: barriers passed. None is passed before
// this thread has come there. A thread alone passes none: it counts them itself.
static int plan_step(void) {
    if (plan.n_threads == 1) return (int)plan.session->stats.n_barriers;
    return (int)(__atomic_load_n(&plan.session->pool->release.value, __ATOMIC_ACQUIRE) -
                 plan.first);
}
// The pool's threads as if they were pinned to so many memory nodes, each to a core of its own.
static void plan_nodes(moe_pool *pool, int32_t n) {
    pool->nodes.n = n;
    for (int32_t k = 0; k <= n; k++)
        pool->nodes.first[k] = (int32_t)((int64_t)pool->n_threads * k / n);
    pool->n_processors = pool->n_threads;
}

static void plan_add(int name, int32_t layer, double cost) {
    if (plan_turn != plan.turn) {
        const int i = __atomic_fetch_add(&plan.n_seen, 1, __ATOMIC_RELAXED);
        plan_mine = plan.cells + (int64_t)i * plan.n_steps;
        plan_turn = plan.turn;
    }
    const int step = plan_step();
    plan_cell *cell = &plan_mine[step < plan.n_steps ? step : plan.n_steps - 1];
    cell->cost += cost;
    cell->names |= (uint64_t)1 << name;
    if (layer > cell->layer) cell->layer = layer;
}
static void plan_vector(int64_t n) {
    plan_add(PLAN_VECTORS, PLAN_NO_LAYER, (double)n * (plan.is_prompt ? PLAN_VALUE : 1));
}

// The tensor that holds these weights; NULL: they are no tensor's.
static const plan_tensor *plan_find(const uint8_t *rows) {
    int64_t low = 0, high = plan.n_tensors;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (plan.tensors[middle].end <= rows) low = middle + 1;
        else high = middle;
    }
    return low < plan.n_tensors && plan.tensors[low].data <= rows ? &plan.tensors[low] : NULL;
}

// Some rows of weights, or of something else, times some tokens.
static void plan_rows(const plan_tensor *t, int64_t n_rows, int64_t n, int64_t n_tokens) {
    moe__entry entry;
    const double rows = (double)n_rows, values = rows * (double)n;
    entry.n_tokens = (int32_t)n_tokens;
    if (!t && plan.is_prompt)
        plan_add(PLAN_ATTEND, PLAN_NO_LAYER, values * (double)n_tokens * PLAN_FLOAT);
    else if (!t)
        plan_vector(n_rows * n);
    else if (plan.is_prompt)
        plan_add(t->name, t->layer,
                 values * (double)moe__entry_block_cost(&entry) * (t->is_float ? PLAN_FLOAT : 1));
    else
        plan_add(t->name, t->layer, rows * (double)t->row_size);
}

// ---- the kernels -----------------------------------------------------------------------------

// The first value of every vector is kept: it is the token, from which routers choose experts.

// 0 .. 1 from an expert's row and a token.
static float plan_score(const plan_tensor *t, int64_t row, const void *x) {
    float token;
    uint64_t state;
    memcpy(&token, x, sizeof token);
    state = RANDOM_SEED + (uint64_t)(int64_t)token * 1000003u + (uint64_t)row * 8191u +
            (uint64_t)t->layer * 131071u;
    for (int i = 0; i < 4; i++) random_next(&state);
    return (float)(random_next(&state) >> 40) / 16777216.0f;
}

static void plan_dot(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                     const void *x, float *out) {
    const plan_tensor *t = plan_find(rows);
    plan_rows(t, n_rows, n, 1);
    if (!t) *out = 0;
    for (int64_t r = 0; t && t->is_router && r < n_rows; r++)
        out[r] = plan_score(t, (rows - t->data) / (int64_t)row_size + r, x);
}

static void plan_tile(const uint8_t *rows, size_t row_size, int64_t n_rows, int64_t n,
                      const void *const *x, int64_t n_tokens, float *out, int64_t out_stride,
                      void *pack, const uint8_t *prefetch, size_t prefetch_size) {
    const plan_tensor *t = plan_find(rows);
    (void)pack, (void)prefetch, (void)prefetch_size;
    plan_rows(t, n_rows, n, n_tokens);
    for (int64_t i = 0; t && t->is_router && i < n_tokens; i++)
        for (int64_t r = 0; r < n_rows; r++)
            out[i * out_stride + r] =
                plan_score(t, (rows - t->data) / (int64_t)row_size + r, x[i]);
}

// A row of the embedding is a token; others are unpacked in place of being multiplied.
static void plan_dequantize(const uint8_t *rows, int64_t n, float *out) {
    const plan_tensor *t = plan_find(rows);
    if (t && t->layer < 0) *out = (float)((rows - t->data) / (int64_t)t->row_size);
    if (!t || plan.is_prompt) plan_vector(n);
    else plan_add(t->name, t->layer, (double)moe_type_row_size(t->type, n));
}

static void plan_quantize(const float *x, int64_t n, void *act) {
    plan_vector(n);
    memcpy(act, x, sizeof *x);
}
static void plan_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
    (void)weight, (void)eps;
    plan_vector(n);
    *out = *x;
}
static void plan_glu(const float *gate, const float *up, int64_t n, float *out) {
    (void)gate, (void)up, (void)out;
    plan_vector(n);
}
static void plan_softmax(float *x, int64_t n) {
    (void)x;
    plan_vector(n);
}
static void plan_axpy(float a, const float *x, int64_t n, float *y) {
    (void)a, (void)x, (void)y;
    plan_vector(n);
}
static void plan_attend_add(float max, float sum, const float *x, int64_t dv, float *all_max,
                            float *all_sum, float *all) {
    (void)max, (void)sum, (void)x, (void)all_max, (void)all_sum, (void)all;
    plan_vector(dv);
}
static void plan_divide(float *x, int64_t n, float by) {
    (void)x, (void)by;
    plan_vector(n);
}
static void plan_f16(const float *x, int64_t n, uint16_t *out) {
    (void)x, (void)out;
    plan_vector(n);
}
static void plan_q8_0(const float *x, int64_t n, uint8_t *out) {
    (void)x, (void)out;
    plan_vector(n);
}

// Keys and values that one of the queries sees are read once.
static void plan_attend(const moe__attend_args *a) {
    int32_t low = a->n_keys, high = 0;
    double pairs = 0, macs, bytes;
    for (int32_t i = 0; i < a->n_queries; i++) {
        const int32_t first = a->first ? a->first[i] : 0;
        const int32_t last = a->n_visible ? a->n_visible[i] : a->n_keys;
        if (first >= last) continue;
        low = first < low ? first : low;
        high = last > high ? last : high;
        pairs += last - first;
    }
    macs = pairs * (a->dk + a->dv);
    bytes = (double)moe__kv_bytes(a->type, a->dk);
    if (a->v != a->k) bytes += (double)moe__kv_bytes(a->type, a->dv);
    bytes *= high > low ? high - low : 0;
    if (plan.is_prompt) macs *= PLAN_FLOAT;
    else macs = macs > PLAN_MACS * bytes ? macs / PLAN_MACS : bytes;
    plan_add(PLAN_ATTEND, PLAN_NO_LAYER, macs);
}

// A state is read once for a token, or 4 multiply-adds per value of it and token (two products with
// it, its update, and what the tokens of a chunk do to each other).
static void plan_recur(const moe__recur_args *a) {
    const double values = (double)a->n_k * a->n_v;
    plan_add(PLAN_RECUR, PLAN_NO_LAYER,
             plan.is_prompt ? 4 * values * a->n * PLAN_FLOAT : values * sizeof(float));
}
static void plan_fold(const moe__recur_args *a, float *to) {
    (void)a, (void)to; // counted with the tokens, or once for 16
}
static void plan_scan(const float *state, float *to, int64_t stride, int64_t n_state, int64_t n,
                      const float *dt, const float *x, const float *a, const float *b,
                      const float *c, float *out) {
    (void)state, (void)to, (void)stride, (void)dt, (void)x, (void)a, (void)b, (void)c, (void)out;
    plan_add(PLAN_RECUR, PLAN_NO_LAYER,
             (double)(n_state * n) * (plan.is_prompt ? PLAN_VALUE : sizeof(float)));
}
static void plan_conv(const float *const *x, const float *w, int64_t stride, int32_t n_taps,
                      const float *bias, int64_t n, int silu, float *out) {
    (void)x, (void)w, (void)stride, (void)bias, (void)silu, (void)out;
    plan_vector(n * n_taps);
}
static void plan_gate(float *x, const float *gate, int64_t n) {
    (void)x, (void)gate;
    plan_vector(n);
}
static void plan_softplus(const float *x, const float *bias, int64_t n, float *out) {
    (void)x, (void)bias, (void)out;
    plan_vector(n);
}
static void plan_decay(const float *x, const float *bias, int64_t n, float a, float low,
                       float *out) {
    (void)a, (void)low;
    plan_softplus(x, bias, n, out);
}
static void plan_relu(const float *up, int64_t n, float *out) {
    (void)up, (void)out;
    plan_vector(n);
}
static void plan_limited(const float *gate, const float *up, int64_t n, float limit, int first,
                         float *out) {
    (void)limit, (void)first;
    plan_glu(gate, up, n, out);
}

static void plan_make_kernels(void) {
    plan_kernels = *moe__kernels_get(MOE_ISA_SCALAR);
    for (int i = 0; i < MOE__N_TYPES; i++) {
        plan_kernels.type[i].dot = plan_dot;
        plan_kernels.type[i].tile = plan_tile;
        plan_kernels.type[i].dequantize = plan_dequantize;
    }
    for (int kind = 0; kind < MOE__ACT_KINDS; kind++) plan_kernels.quantize[kind] = plan_quantize;
    plan_kernels.rms_norm = plan_norm;
    plan_kernels.swiglu = plan_kernels.swiglu_oai = plan_glu;
    plan_kernels.reglu = plan_kernels.geglu = plan_glu;
    plan_kernels.softmax = plan_softmax;
    plan_kernels.axpy = plan_axpy;
    plan_kernels.divide = plan_divide;
    plan_kernels.f32_to_f16 = plan_f16;
    plan_kernels.f32_to_q8_0 = plan_q8_0;
    plan_kernels.attend = plan_attend;
    plan_kernels.attend_add = plan_attend_add;
    plan_kernels.recur = plan_recur;
    plan_kernels.fold = plan_fold;
    plan_kernels.scan = plan_scan;
    plan_kernels.conv = plan_conv;
    plan_kernels.gate = plan_gate;
    plan_kernels.softplus = plan_softplus;
    plan_kernels.decay = plan_decay;
    plan_kernels.relu_squared = plan_relu;
    plan_kernels.swiglu_limited = plan_limited;
}

// ---- models without weights ------------------------------------------------------------------

typedef struct plan_model {
    const char *name;
    moe_model *handle;
    moe_gguf *gguf; // of a shape: where its weights would be is memory that nobody touches,
    void *memory;   // this
    size_t size;
} plan_model;

static void plan_model_close(plan_model *m) {
    moe_model_close(m->handle);
    moe_gguf_close(m->gguf);
    if (m->memory) munmap(m->memory, m->size);
    memset(m, 0, sizeof *m);
}

// One layer of each letter of .layers, and before them one for those without experts.
static synth_config plan_letters(synth_config c) {
    static char kinds[8];
    int n = 0;
    memset(kinds, 0, sizeof kinds);
    for (int il = 0; il < c.n_layer; il++) {
        const char letter = c.layers[(size_t)il % strlen(c.layers)];
        const char *at = il < c.lead ? kinds : strchr(kinds + (c.lead > 0), letter);
        if (il == 0 || !at || !*at) {
            at = kinds + n;
            plan.times[n] = 0;
            kinds[n++] = letter;
        }
        plan.times[at - kinds]++;
    }
    c.layers = kinds;
    c.lead = c.lead > 0;
    c.n_layer = n;
    return c;
}

// One layer of each kind: without experts, with a window, the others.
static synth_config plan_kinds(const plan_shape *shape) {
    synth_config c = *synth_find(shape->synth);
    if (c.layers) return plan_letters(c);
    const int n = c.n_layer, windows = c.window ? (n + 1) / 2 : 0;
    for (int i = 0; i < BENCH_LAYERS; i++) plan.times[i] = 1;
    if (c.lead) plan.times[0] = c.lead;
    plan.times[c.lead > 0] = windows ? windows : n - c.lead;
    if (windows) plan.times[1] = n - windows;
    c.lead = c.lead > 0;
    c.n_layer = 1 + (c.lead || windows);
    return c;
}

static int plan_open_shape(plan_model *m, const plan_shape *shape) {
    const synth_config c = plan_kinds(shape);
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    synth_options o;
    synth_file f;
    moe_model_options options;
    moe_error error;
    memset(&o, 0, sizeof o);
    memset(&options, 0, sizeof options);
    memset(m, 0, sizeof *m);
    m->name = shape->name;
    o.type = shape->type;
    o.no_tokenizer = 1;
    o.kvb = c.kv_lora ? SYNTH_KVB_SPLIT : SYNTH_KVB_FUSED;
    const int made = synth_begin(&f, &c, &o) == 0;
    m->size = f.head_size;
    for (size_t i = 0; i < f.n_tensors; i++)
        m->size += f.tensors[i].bytes + synth_padding(f.tensors[i].bytes);
    // read-only memory does not count as used where that is limited
    void *memory = made ? mmap(NULL, m->size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                        : MAP_FAILED;
    const size_t head = f.head_size < m->size ? (f.head_size + page - 1) & ~(page - 1) : m->size;
    if (memory != MAP_FAILED) m->memory = memory;
    if (m->memory && mprotect(memory, head, PROT_READ | PROT_WRITE) == 0) {
        memcpy(memory, f.head, f.head_size);
        options.pages = MOE_PAGES_MAP;
        m->gguf = moe_gguf_open_memory(memory, m->size, NULL, &error);
        if (m->gguf) m->handle = moe_model_open_gguf(m->gguf, &options, &error);
        if (!m->handle) tool_fail(program, shape->name, &error);
    } else if (made) {
        fprintf(stderr, "%s: %s: no room for its addresses\n", program, shape->name);
    }
    free(f.head);
    free(f.tensors);
    if (m->handle) return TOOL_OK;
    plan_model_close(m);
    return TOOL_ERROR;
}

static int plan_open_file(plan_model *m, const char *path) {
    moe_model_options options;
    moe_error error;
    memset(&options, 0, sizeof options);
    memset(m, 0, sizeof *m);
    options.pages = MOE_PAGES_MAP;
    m->name = path;
    m->handle = moe_model_open(path, &options, &error);
    for (int i = 0; i < BENCH_LAYERS; i++) plan.times[i] = 1;
    return m->handle ? TOOL_OK : tool_fail(program, path, &error);
}

// "attn_q" of "blk.7.attn_q.weight" as "q": its number.
static int plan_name(const char *tensor) {
    char name[sizeof plan.names[0]];
    const char *dot = strncmp(tensor, "blk.", 4) ? NULL : strchr(tensor + 4, '.');
    const char *text = dot ? dot + 1 : tensor;
    if (strncmp(text, "attn_output", 11) && !strncmp(text, "attn_", 5)) text += 5;
    if (!strncmp(text, "ffn_", 4)) text += 4;
    snprintf(name, sizeof name, "%.*s", (int)strcspn(text, "."), text);
    for (int i = 0; i < plan.n_names; i++)
        if (!strcmp(plan.names[i], name)) return i;
    if (plan.n_names == PLAN_NAMES) return PLAN_NAMES - 1;
    strcpy(plan.names[plan.n_names], name);
    return plan.n_names++;
}

static int plan_compare(const void *a, const void *b) {
    const uint8_t *x = ((const plan_tensor *)a)->data, *y = ((const plan_tensor *)b)->data;
    return (x > y) - (x < y);
}

// The table of the model's tensors; -1: no memory.
static int plan_list_tensors(const moe_model *handle) {
    const moe_gguf *gguf = moe_model_gguf(handle);
    plan.n_tensors = moe_gguf_n_tensors(gguf);
    free(plan.tensors);
    plan.tensors = (plan_tensor *)calloc((size_t)plan.n_tensors, sizeof *plan.tensors);
    plan.n_names = PLAN_TENSORS;
    strcpy(plan.names[PLAN_VECTORS], "vectors");
    strcpy(plan.names[PLAN_ATTEND], "attend");
    strcpy(plan.names[PLAN_RECUR], "recur");
    for (int64_t i = 0; i < plan.n_tensors && plan.tensors; i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        plan_tensor *t = &plan.tensors[i];
        t->data = (const uint8_t *)tensor->data;
        t->end = t->data + tensor->size;
        t->type = tensor->type;
        t->row_size = moe_type_row_size(tensor->type, tensor->ne[0]);
        t->layer = -1;
        sscanf(tensor->name, "blk.%d.", &t->layer);
        t->name = plan_name(tensor->name);
        t->is_router = strstr(tensor->name, ".ffn_gate_inp.weight") != NULL;
        t->is_float = tensor->type == MOE_TYPE_F32 || tensor->type == MOE_TYPE_F16 ||
                      tensor->type == MOE_TYPE_BF16;
    }
    if (!plan.tensors) return -1;
    qsort(plan.tensors, (size_t)plan.n_tensors, sizeof *plan.tensors, plan_compare);
    return 0;
}

// ---- one eval --------------------------------------------------------------------------------

// Steps that work with the same tensors, of all layers.
typedef struct plan_kind {
    uint64_t names;
    double time;  // of the busiest threads
    double work;  // of all threads
    double count; // how many there are
} plan_kind;

typedef struct plan_result {
    double time, work, efficiency;
    plan_kind kinds[PLAN_NAMES];
    int n_kinds;
} plan_result;

static plan_kind *plan_find_kind(plan_result *result, uint64_t names) {
    const uint64_t vectors = (uint64_t)1 << PLAN_VECTORS;
    if (names & ~vectors) names &= ~vectors;
    for (int i = 0; i < result->n_kinds; i++)
        if (result->kinds[i].names == names) return &result->kinds[i];
    plan_kind *kind = &result->kinds[result->n_kinds < PLAN_NAMES ? result->n_kinds++ : 0];
    kind->names = names;
    return kind;
}

// A step without tensors belongs to the layer of the next one that has some.
static void plan_collect(plan_result *result, int n_steps) {
    int32_t next = -1;
    memset(result, 0, sizeof *result);
    for (int s = n_steps - 1; s >= 0; s--) {
        double most = 0, sum = 0;
        uint64_t names = 0;
        int32_t layer = PLAN_NO_LAYER;
        for (int i = 0; i < plan.n_seen; i++) {
            const plan_cell *cell = &plan.cells[(int64_t)i * plan.n_steps + s];
            most = cell->cost > most ? cell->cost : most;
            sum += cell->cost;
            names |= cell->names;
            layer = cell->layer > layer ? cell->layer : layer;
        }
        if (layer == PLAN_NO_LAYER) layer = next;
        next = layer;
        const double times = layer < 0 ? 1 : plan.times[layer % BENCH_LAYERS];
        plan_kind *kind = plan_find_kind(result, names);
        kind->time += times * most;
        kind->work += times * sum;
        kind->count += times;
        result->time += times * most;
        result->work += times * sum;
    }
}

// Evaluates n tokens behind `depth` others.
static int plan_eval(moe_session *session, int n_threads, int32_t depth, int32_t n,
                     plan_result *result) {
    static int32_t tokens[PLAN_PROMPT];
    const moe_model *handle = moe_session_model(session);
    uint64_t random = RANDOM_SEED;
    moe_error error;
    random_tokens(handle, &random, tokens, n);
    plan.session = session;
    plan.is_prompt = n > 1;
    plan.n_threads = n_threads;
    plan.n_steps = moe_model_get_info(handle)->n_layer * 20 + 20;
    if ((int64_t)plan.n_steps * n_threads > plan.n_cells) {
        free(plan.cells);
        plan.n_cells = (int64_t)plan.n_steps * n_threads;
        plan.cells = (plan_cell *)malloc((size_t)plan.n_cells * sizeof *plan.cells);
        if (!plan.cells) {
            plan.n_cells = 0;
            fprintf(stderr, "%s: --plan: out of memory\n", program);
            return TOOL_ERROR;
        }
    }
    for (int64_t i = 0; i < (int64_t)plan.n_steps * n_threads; i++) {
        memset(&plan.cells[i], 0, sizeof plan.cells[i]);
        plan.cells[i].layer = PLAN_NO_LAYER;
    }
    plan.n_seen = 0;
    plan.turn++;
    plan_take_over(session, depth);
    plan.first = 0;
    plan.first = (uint32_t)(n_threads > 1 ? plan_step() : 0);
    if (moe_session_eval(session, tokens, n, &error))
        return tool_fail(program, "--plan", &error);
    const int n_steps = (int)moe_session_get_stats(session)->n_barriers + 1;
    plan_collect(result, n_steps < plan.n_steps ? n_steps : plan.n_steps);
    return TOOL_OK;
}

// ---- tables ----------------------------------------------------------------------------------

// A token and a prompt, with every schedule.
typedef struct plan_case {
    const plan_model *m;
    int32_t n_threads, n_nodes, depth;
    double useful[2];
    plan_result results[2][MAX_RIVALS];
    int n_schedules;
} plan_case;

static const char *const plan_whats[2] = {"token", "prompt"};

// Of the threads' time, what they wait in steps of this kind.
static double plan_idle(const plan_case *c, const plan_result *r, const plan_kind *k) {
    return (c->n_threads * k->time - k->work) / (c->n_threads * r->time);
}
static double plan_repeated(const plan_case *c, const plan_result *r, int what) {
    return (r->work - c->useful[what]) / (c->n_threads * r->time);
}

static int plan_compare_kinds(const void *a, const void *b) {
    const double x = ((const plan_kind *)a)->time, y = ((const plan_kind *)b)->time;
    return (x < y) - (x > y);
}

static const char *plan_names(uint64_t names, char *text, size_t size) {
    size_t at = 0;
    *text = 0;
    for (int i = 0; i < plan.n_names && at < size; i++)
        if (names >> i & 1)
            at += (size_t)snprintf(text + at, size - at, "%s%s", at ? " " : "", plan.names[i]);
    return *text ? text : "nothing";
}

// What costs most: "q k v 3.1".
static const char *plan_blame(const plan_case *c, const plan_result *r, int what, char *text,
                              size_t size) {
    const double repeated = plan_repeated(c, r, what);
    const plan_kind *worst = &r->kinds[0];
    char names[80];
    for (int i = 1; i < r->n_kinds; i++)
        if (plan_idle(c, r, &r->kinds[i]) > plan_idle(c, r, worst)) worst = &r->kinds[i];
    if (plan_idle(c, r, worst) < 0.0005 && repeated < 0.0005) return "";
    if (plan_idle(c, r, worst) < repeated) snprintf(text, size, "repeated %.1f", 100 * repeated);
    else
        snprintf(text, size, "%s %.1f", plan_names(worst->names, names, sizeof names),
                 100 * plan_idle(c, r, worst));
    return text;
}

static void plan_print_steps(const plan_case *c, int what, int schedule) {
    const plan_result *r = &c->results[what][schedule];
    plan_kind kinds[PLAN_NAMES];
    char names[128];
    memcpy(kinds, r->kinds, sizeof kinds);
    qsort(kinds, (size_t)r->n_kinds, sizeof *kinds, plan_compare_kinds);
    printf("%s, %d threads, %d node%s, %s, %s: %.1f %%\n\n"
           "| step                                             | steps |  time | even | idle |\n"
           "| ------------------------------------------------ | ----: | ----: | ---: | ---: |\n",
           c->m->name, c->n_threads, c->n_nodes, c->n_nodes > 1 ? "s" : "", plan_whats[what],
           schedule_names[set.schedule.item[schedule] & 3], 100 * r->efficiency);
    for (int i = 0; i < r->n_kinds; i++) {
        const plan_kind *k = &kinds[i];
        if (k->time <= 0) continue;
        printf("| %-48s | %5.0f | %5.1f | %4.0f | %4.1f |\n",
               plan_names(k->names, names, sizeof names), k->count, 100 * k->time / r->time,
               100 * k->work / (c->n_threads * k->time), 100 * plan_idle(c, r, k));
    }
    printf("| %-48s | %5s | %5s | %4s | %4.1f |\n\n", "repeated", "", "", "",
           100 * plan_repeated(c, r, what));
}

static void plan_print_header(FILE *out) {
    fprintf(out, "| %-16s | threads | nodes |", "model");
    for (int i = 0; i < 2 * set.schedule.n; i++)
        fprintf(out, " %s%s |", i % set.schedule.n ? "" : i ? "prompt: " : "token: ",
                schedule_names[set.schedule.item[i % set.schedule.n] & 3]);
    fprintf(out, " %-42s | %-42s |\n| ---------------- | ------: | ----: |",
            "the best token's loss", "the best prompt's loss");
    for (int i = 0; i < 2 * set.schedule.n; i++)
        fprintf(out, " %.*s: |",
                (int)strlen(schedule_names[set.schedule.item[i % set.schedule.n] & 3]) - 1 +
                    (i % set.schedule.n ? 0 : i ? 8 : 7),
                "------------------------------");
    fprintf(out, " %.42s | %.42s |\n",
            "--------------------------------------------",
            "--------------------------------------------");
}

static void plan_print_case(const plan_case *c, FILE *out) {
    char text[96];
    int best[2] = {0, 0};
    fprintf(out, "| %-16s | %7d | %5d |", c->m->name, c->n_threads, c->n_nodes);
    for (int what = 0; what < 2; what++)
        for (int i = 0; i < c->n_schedules; i++) {
            const double x = c->results[what][i].efficiency;
            if (x > c->results[what][best[what]].efficiency + 1e-6) best[what] = i;
            fprintf(out, " %*.1f |",
                    (int)strlen(schedule_names[set.schedule.item[i] & 3]) +
                        (i ? 0 : what ? 8 : 7),
                    100 * x);
        }
    for (int what = 0; what < 2; what++)
        fprintf(out, " %-42s |", plan_blame(c, &c->results[what][best[what]], what, text,
                                            sizeof text));
    fprintf(out, "\n");
    for (int what = 0; what < 2 && set.detail; what++) plan_print_steps(c, what, best[what]);
}

// ---- experts of one token, by memory nodes ---------------------------------------------------

// Each row lies where MOE_NUMA_OWNER puts it. Printed are, for every schedule,
//
//     node     of what all nodes together could read while the busiest one is read from, the part
//              that is read
//     local    the part of the rows that lie on the node of the thread that reads them
typedef struct plan_experts {
    double node, local; // 0..1
} plan_experts;

static plan_experts plan_measure_nodes(const moe__schedule_info *schedule, const moe__task *task,
                                       int threads) {
    const moe__nodes *nodes = task->nodes;
    int64_t *rows = (int64_t *)calloc((size_t)nodes->n, sizeof *rows), total = 0, busiest = 0;
    int64_t local = 0;
    plan_experts result = {0, 0};
    for (int t = 0; t < threads && rows; t++) {
        moe__range range;
        for (int32_t i = 0; schedule->range(task, t, threads, i, &range); i++)
            for (int32_t k = 0; k < nodes->n; k++) {
                int64_t begin = moe__schedule_node(task, range.entry, k) * task->unit;
                int64_t end = moe__schedule_node(task, range.entry, k + 1) * task->unit;
                begin = begin > range.begin ? begin : range.begin;
                end = end < range.end ? end : range.end;
                if (begin >= end) continue;
                rows[k] += end - begin;
                total += end - begin;
                local += k == moe__nodes_of(nodes, t) ? end - begin : 0;
            }
    }
    for (int n = 0; n < nodes->n && rows; n++) busiest = rows[n] > busiest ? rows[n] : busiest;
    if (busiest) result.node = (double)total / ((double)nodes->n * (double)busiest);
    if (total) result.local = (double)local / (double)total;
    free(rows);
    return result;
}

static void plan_print_nodes(const plan_case *c, const moe_model_info *info) {
    enum { MOST = 64 };
    static moe__entry entries[MOST + 1];
    moe__ffn routed, shared;
    moe__dispatch experts;
    moe__task task;
    moe__nodes map;
    const int32_t used = info->n_expert_used < MOST ? info->n_expert_used : MOST;
    moe__nodes_single(&map, c->n_threads);
    map.n = c->n_nodes;
    for (int k = 0; k <= map.n; k++) map.first[k] = (int32_t)((int64_t)c->n_threads * k / map.n);
    memset(entries, 0, sizeof entries);
    memset(&routed, 0, sizeof routed);
    memset(&shared, 0, sizeof shared);
    memset(&experts, 0, sizeof experts);
    memset(&task, 0, sizeof task);
    experts.entries = entries;
    routed.up.n_out = info->n_ff_exp;
    shared.up.n_out = (int64_t)info->n_ff_exp * info->n_expert_shared;
    routed.down.n_out = shared.down.n_out = info->n_embd;
    for (int32_t i = 0; i < used; i++) moe__dispatch_add(&experts, &routed, 1);
    if (info->n_expert_shared) moe__dispatch_add(&experts, &shared, 1);
    task.entries = entries;
    task.n_entries = experts.n_entries;
    task.n_routed = used;
    task.one_token = 1;
    task.unit = MOE__ROW_UNIT;
    task.nodes = &map;
    printf("Its experts, %% of the nodes' bandwidth that is used and of rows read by threads of "
           "their own node:\n");
    for (size_t s = 0; s < sizeof moe__schedules / sizeof moe__schedules[0]; s++) {
        plan_experts part[2];
        for (task.down = 0; task.down < 2; task.down++)
            part[task.down] = plan_measure_nodes(&moe__schedules[s], &task, c->n_threads);
        printf("%s%s: gate and up %.0f, %.0f, down %.0f, %.0f", s ? "; " : "",
               moe__schedules[s].name, 100 * part[0].node, 100 * part[0].local,
               100 * part[1].node, 100 * part[1].local);
    }
    printf("\n\n");
}

// ---- all cases -------------------------------------------------------------------------------

// What one thread alone has to do.
static int plan_alone(plan_case *c) {
    moe_error error;
    plan_result result;
    moe_pool_options o;
    memset(&o, 0, sizeof o);
    o.n_threads = 1;
    int status = TOOL_OK;
    model m;
    memset(&m, 0, sizeof m);
    m.handle = c->m->handle;
    moe_pool *pool = moe_pool_open(&o, &error);
    moe_session *session =
        pool ? open_session_on(pool, &m, c->depth + PLAN_PROMPT, PLAN_PROMPT, 1, 0, 0, &error)
             : NULL;
    if (!session) status = tool_fail(program, c->m->name, &error);
    for (int what = 0; what < 2 && status == TOOL_OK; what++) {
        status = plan_eval(session, 1, what ? 0 : c->depth, what ? PLAN_PROMPT : 1, &result);
        c->useful[what] = result.work;
    }
    moe_session_close(session);
    moe_pool_close(pool);
    return status;
}

static int plan_run_case(plan_case *c, moe_pool *pool, FILE *out) {
    int status = TOOL_OK;
    moe_error error;
    model m;
    memset(&m, 0, sizeof m);
    m.handle = c->m->handle;
    plan_nodes(pool, c->n_nodes);
    for (int i = 0; i < c->n_schedules && status == TOOL_OK; i++) {
        moe_session *session = open_session_on(pool, &m, c->depth + PLAN_PROMPT, PLAN_PROMPT,
                                               c->n_threads, 0, set.schedule.item[i], &error);
        if (!session) status = tool_fail(program, c->m->name, &error);
        for (int what = 0; what < 2 && status == TOOL_OK; what++) {
            plan_result *r = &c->results[what][i];
            status = plan_eval(session, c->n_threads, what ? 0 : c->depth, what ? PLAN_PROMPT : 1,
                               r);
            r->efficiency = c->useful[what] / (c->n_threads * r->time);
        }
        moe_session_close(session);
    }
    if (status == TOOL_OK) plan_print_case(c, out);
    if (status == TOOL_OK && set.detail) plan_print_nodes(c, moe_model_get_info(m.handle));
    fflush(stdout);
    return status;
}

static int plan_run_model(const plan_model *m, FILE *out) {
    static const int32_t usual[] = {1, 8, 16, 32, 48, 64, 96, 128, 192, 256};
    static plan_case c;
    const int given = set.n_threads.item[0] > 0;
    const int n = given ? set.n_threads.n : (int)(sizeof usual / sizeof usual[0]);
    int status = TOOL_ERROR;
    moe_error error;
    moe_pool_options o;
    memset(&o, 0, sizeof o);
    c.m = m;
    c.depth = set.n_depth.item[0];
    c.n_schedules = set.schedule.n < MAX_RIVALS ? set.schedule.n : MAX_RIVALS;
    if (plan_list_tensors(m->handle)) fprintf(stderr, "%s: --plan: out of memory\n", program);
    else status = plan_alone(&c);
    for (int i = 0; i < n && status == TOOL_OK; i++) {
        o.n_threads = c.n_threads = given ? set.n_threads.item[i] : usual[i];
        o.spin_us = MOE_OFF;
        moe_pool *pool = c.n_threads > 0 ? moe_pool_open(&o, &error) : NULL;
        if (!pool) status = tool_fail(program, "--plan", &error);
        for (int k = 0; k < 3 && status == TOOL_OK; k++) {
            static const int32_t nodes[] = {1, 2, 8};
            c.n_nodes = nodes[k];
            if (k == 0 || c.n_threads >= 16 * c.n_nodes) status = plan_run_case(&c, pool, out);
        }
        moe_pool_close(pool);
    }
    return status;
}

// The files of -m, or all shapes.
static int plan_run(char *paths) {
    char *text = NULL;
    size_t size = 0;
    int status = TOOL_OK;
    plan_model m;
    FILE *out = set.detail ? open_memstream(&text, &size) : stdout; // the table comes last
    if (!out) return TOOL_ERROR;
    plan_make_kernels();
    printf("%% of the threads' time that is useful work: one token behind %d others, a prompt of %d"
           "\ntokens; and the step that costs the best schedule most (idle threads, or repeated "
           "work).\n\n", set.n_depth.item[0], PLAN_PROMPT);
    plan_print_header(out);
    for (char *path = paths; path && status == TOOL_OK;) {
        char *comma = strchr(path, ',');
        if (comma) *comma = 0;
        status = plan_open_file(&m, path);
        if (status == TOOL_OK) status = plan_run_model(&m, out);
        plan_model_close(&m);
        path = comma ? comma + 1 : NULL;
    }
    for (size_t i = 0; i < sizeof plan_shapes / sizeof plan_shapes[0] && !paths; i++) {
        if (status == TOOL_OK) status = plan_open_shape(&m, &plan_shapes[i]);
        if (status != TOOL_OK) break;
        status = plan_run_model(&m, out);
        plan_model_close(&m);
    }
    if (set.detail) {
        fclose(out);
        if (text) fputs(text, stdout);
        free(text);
    }
    free(plan.cells);
    free(plan.tensors);
    return status == TOOL_OK ? flush_rows() : status;
}

#endif
