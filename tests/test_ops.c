// >>ops: matrix drivers, rotary positions, merging attention.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

#include "sheet.h"

static uint32_t random_state = 1;
static float uniform(void) { // -1 .. 1
    random_state = random_state * 1664525u + 1013904223u;
    return (float)((int32_t)random_state) / 2147483648.0f;
}

// A matrix of n_expert experts of a quantized type, and its weights as floats.
typedef struct built {
    moe__matrix matrix;
    uint8_t *data;
    float *weights;
} built;

static built build(moe_type type, int64_t n_in, int64_t n_out, int64_t n_expert) {
    built b;
    int64_t rows = n_out * n_expert;
    memset(&b, 0, sizeof b);
    b.matrix.type = moe__type_find(type);
    b.matrix.index = (int)(b.matrix.type - moe__types);
    b.matrix.n_in = n_in;
    b.matrix.n_out = n_out;
    b.matrix.n_expert = n_expert;
    b.matrix.row_size = moe_type_row_size(type, n_in);
    b.matrix.expert_size = b.matrix.row_size * (size_t)n_out;
    b.data = (uint8_t *)malloc(b.matrix.row_size * (size_t)rows);
    b.weights = (float *)malloc((size_t)(rows * n_in) * sizeof(float));
    for (int64_t i = 0; i < rows * n_in; i++) b.weights[i] = uniform();
    if (b.matrix.type->quantize)
        moe_type_quantize(type, b.weights, b.data, rows, n_in, NULL, NULL);
    else
        sheet_random(b.matrix.type, b.data, b.matrix.row_size, (int)rows, n_in, 0);
    moe_type_dequantize(type, b.data, b.weights, rows, n_in, NULL);
    b.matrix.data = b.data;
    return b;
}
static void release(built *b) {
    free(b->data);
    free(b->weights);
}

// All drivers against double precision over the same int8 activations, for every split of rows.
static void check_matmul(moe_type type, moe_isa isa, int64_t n_tokens) {
    enum { N_IN = 256, MAX_OUT = 75, EXPERT = 2, MAX_TOKENS = 40 };
    const int group = moe__type_find(type)->rows, n_out = MAX_OUT / group * group;
    const moe__kernels *kernels = moe__kernels_get(isa);
    built b = build(type, N_IN, n_out, 3);
    float bias[3 * MAX_OUT], scale[3] = {1.0f, 2.0f, -0.5f};
    for (int i = 0; i < 3 * n_out; i++) bias[i] = uniform();
    moe__arena arena;
    moe__acts acts; // the input with number 0, which the matrix reads
    memset(&arena, 0, sizeof arena);
    moe__acts_take(&acts, &arena, n_tokens, N_IN,
                   1u << b.matrix.type->act | MOE__ACTS_FLOATS);
    arena.base = (unsigned char *)aligned_alloc(64, (size_t)(arena.used + 63) / 64 * 64);
    memset(arena.base, 0, (size_t)arena.used);
    arena.used = 0;
    moe__acts_take(&acts, &arena, n_tokens, N_IN,
                   1u << b.matrix.type->act | MOE__ACTS_FLOATS);
    for (int64_t i = 0; i < n_tokens * N_IN; i++) moe__acts_f32(&acts, 0)[i] = uniform();
    moe__acts_quantize(kernels, &acts, 0, n_tokens);
    const void *x[MAX_TOKENS];
    moe__acts_gather(&acts, &b.matrix, NULL, 0, n_tokens, x);
    static float whole[MAX_TOKENS * MAX_OUT], part[MAX_TOKENS * MAX_OUT], tile[MAX_TOKENS * 128];
    void *pack = aligned_alloc(64, MOE__PACK_SIZE);
    moe__matmul(kernels, &b.matrix, EXPERT, 0, n_out, x, n_tokens, whole, n_out, pack);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t r = 0; r < n_out; r++) {
            double sum = 0, size = 0;
            const float *w = b.weights + (EXPERT * n_out + r) * N_IN;
            for (int64_t i = 0; i < N_IN; i++) {
                sum += (double)w[i] * moe__acts_f32(&acts, t)[i];
                size += fabs((double)w[i] * moe__acts_f32(&acts, t)[i]);
            }
            double got = whole[t * n_out + r];
            CHECKF(fabs(got - sum) <= 6e-3 * size, "%s: row %d token %d: %g, expected %g",
                   moe_type_name(type), (int)r, (int)t, got, sum);
        }
    // Any split of the rows, or groups of rows, gives the same bits.
    int64_t cuts[] = {0, 1, 16, 31, 32, 33, 64, n_out};
    memset(part, 0, sizeof part);
    for (int c = 0; c < 8; c++) cuts[c] -= cuts[c] % group;
    for (size_t c = 0; c + 1 < sizeof cuts / sizeof cuts[0]; c++)
        moe__matmul(kernels, &b.matrix, EXPERT, cuts[c], cuts[c + 1], x, n_tokens, part + cuts[c],
                    n_out, pack);
    CHECKF(!memcmp(part, whole, (size_t)(n_tokens * n_out) * sizeof(float)),
           "%s %s, %d tokens: bits depend on the range of rows", moe_type_name(type),
           moe_isa_name(isa), (int)n_tokens);
    // Scale, bias and weighted addition.
    b.matrix.scale = scale;
    b.matrix.bias = bias;
    b.matrix.bias_stride = n_out;
    int32_t rows[MAX_TOKENS] = {0};
    float weights[MAX_TOKENS] = {0};
    static float y[MAX_TOKENS * MAX_OUT];
    for (int64_t t = 0; t < n_tokens; t++) {
        rows[t] = (int32_t)(n_tokens - 1 - t);
        weights[t] = 0.25f * (float)(t + 1);
    }
    for (int64_t i = 0; i < n_tokens * n_out; i++) y[i] = 1;
    moe__matmul_add(kernels, &b.matrix, EXPERT, 0, n_out, x, n_tokens, rows, weights, y, tile,
                    pack);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t r = 0; r < n_out; r++) {
            double product = -0.5 * whole[t * n_out + r] + bias[EXPERT * n_out + r];
            double expected = 1 + weights[t] * product;
            CHECK(fabs(y[rows[t] * n_out + r] - expected) <= 1e-5 * (1 + fabs(expected)));
        }
    free(pack);
    free(arena.base);
    release(&b);
}

TEST(matmul_matches_double_precision_and_ignores_splits) {
    const int64_t tokens[] = {1, 2, 3, 7, 33};
    for (int type = 0; type < MOE__N_TYPES; type++)
        for (int isa = MOE_ISA_SCALAR; isa <= LAST_ISA; isa++)
            for (int i = 0; i < 5; i++)
                check_matmul(moe__types[type].id, (moe_isa)isa, tokens[i]);
}

// A token's result does not depend on its neighbours in the batch.
TEST(tokens_do_not_influence_each_other) {
    for (int type = 0; type < MOE__N_TYPES; type++)
        for (int isa = MOE_ISA_SCALAR; isa <= LAST_ISA; isa++) {
            const moe__kernels *kernels = moe__kernels_get((moe_isa)isa);
            built b = build(moe__types[type].id, 256, 32, 1);
            static MOE__ALIGNED(64) uint8_t acts[16][sizeof(moe__act256) + 1024];
            static float out[16][32], few[16][32];
            float x[256];
            const void *pointers[16];
            void *pack = aligned_alloc(64, MOE__PACK_SIZE);
            for (int t = 0; t < 16; t++) {
                for (int i = 0; i < 256; i++) x[i] = uniform();
                kernels->quantize[moe__types[type].act](x, 256, acts[t]);
                pointers[t] = acts[t];
            }
            for (int t = 0; t < 16; t++)
                moe__matmul(kernels, &b.matrix, 0, 0, 32, pointers + t, 1, out[t], 32, pack);
            for (int n = 2; n <= 16; n++) {
                for (int first = 0; first + n <= 16; first += 5) {
                    moe__matmul(kernels, &b.matrix, 0, 0, 32, pointers + first, n, few[0], 32,
                                pack);
                    CHECKF(!memcmp(few, out[first], (size_t)n * sizeof out[0]),
                           "%s %s: tokens %d..%d", moe__types[type].name,
                           moe_isa_name((moe_isa)isa), first, first + n - 1);
                }
            }
            free(pack);
            release(&b);
        }
}

TEST(rope_turns_pairs) {
    moe__rope rope;
    moe__rope_scaling s;
    double frequency[32];
    memset(&s, 0, sizeof s);
    s.base = 10000;
    s.factor = 1;
    for (int kind = 0; kind < 2; kind++)
        for (int n_rot = 2; n_rot <= 64; n_rot *= 2) {
            rope.kind = (moe__rope_kind)kind;
            rope.n_rot = n_rot;
            rope.magnitude = 1;
            rope.frequency = frequency;
            moe__rope_init(&rope, &s);
            float table[64], x[64], y[64];
            for (int i = 0; i < n_rot; i++) x[i] = y[i] = uniform();
            moe__rope_table(&rope, 4321, 0, table);
            moe__rope_apply(&rope, table, y);
            for (int i = 0; i < n_rot / 2; i++) {
                int a = kind == MOE__ROPE_NORM ? 2 * i : i;
                int b = kind == MOE__ROPE_NORM ? 2 * i + 1 : i + n_rot / 2;
                double angle = 4321 * pow(10000, -2.0 * i / n_rot);
                CHECK(fabs(y[a] - (x[a] * cos(angle) - x[b] * sin(angle))) < 1e-6);
                CHECK(fabs(y[b] - (x[a] * sin(angle) + x[b] * cos(angle))) < 1e-6);
            }
        }
}

// YaRN: the fastest dimension keeps its frequency, the slowest is divided by the factor.
TEST(yarn_scales_slow_dimensions_and_keeps_fast_ones) {
    moe__rope rope;
    moe__rope_scaling s;
    double frequency[32];
    memset(&s, 0, sizeof s);
    rope.n_rot = 64;
    rope.frequency = frequency;
    s.base = 10000;
    s.factor = 40;
    moe__rope_init(&rope, &s);
    CHECK(fabs(frequency[0] - 1.0 / 40) < 1e-12);
    s.yarn = 1;
    s.original_ctx = 4096;
    s.beta_fast = 32;
    s.beta_slow = 1;
    s.ext_factor = 1;
    moe__rope_init(&rope, &s);
    CHECK(fabs(frequency[0] - 1) < 1e-12);
    CHECK(fabs(frequency[31] * 40 - pow(10000, -62.0 / 64)) < 1e-12);
    // low = floor(10.47) = 10, high = ceil(22.51) = 23: a third of the ramp at 10 + 13/3
    double ramp = 1 - (14.0 - 10) / 13, fast = pow(10000, -28.0 / 64);
    CHECK(fabs(frequency[14] - (fast / 40 * (1 - ramp) + fast * ramp)) < 1e-12);
    for (int i = 1; i < 32; i++) CHECK(frequency[i] < frequency[i - 1]);
}

// Chunks added up in order equal one softmax over all keys; a sink is a key whose value is 0.
TEST(chunks_added_in_order_equal_one_softmax) {
    enum { CHUNKS = 5, PER = 7, DV = 20 };
    const moe__kernels *kernels = moe__kernels_get(MOE_ISA_BEST);
    float score[CHUNKS][PER], value[CHUNKS][PER][DV];
    float max[CHUNKS], sum[CHUNKS], partial[CHUNKS][DV], out[DV];
    double expected[DV], total = 0;
    memset(expected, 0, sizeof expected);
    memset(partial, 0, sizeof partial);
    for (int c = 0; c < CHUNKS; c++) {
        max[c] = -INFINITY;
        sum[c] = 0;
        for (int j = 0; j < PER; j++) {
            score[c][j] = 20 * uniform();
            max[c] = fmaxf(max[c], score[c][j]);
            for (int i = 0; i < DV; i++) value[c][j][i] = uniform();
        }
        for (int j = 0; j < PER; j++) {
            sum[c] += expf(score[c][j] - max[c]);
            total += exp(score[c][j]);
            for (int i = 0; i < DV; i++) {
                partial[c][i] += expf(score[c][j] - max[c]) * value[c][j][i];
                expected[i] += exp(score[c][j]) * value[c][j][i];
            }
        }
    }
    for (int sink = 0; sink < 2; sink++) {
        float all_max = sink ? 3.0f : -INFINITY, all_sum = sink ? 1.0f : 0.0f;
        memset(out, 0, sizeof out);
        for (int c = 0; c < CHUNKS; c++)
            kernels->attend_add(max[c], sum[c], partial[c], DV, &all_max, &all_sum, out);
        const double all = total + (sink ? exp(3) : 0);
        for (int i = 0; i < DV; i++) CHECK(fabs(out[i] / all_sum - expected[i] / all) < 1e-6);
    }
    // nothing but -inf, then something
    float all_max = -INFINITY, all_sum = 0;
    memset(out, 0, sizeof out);
    kernels->attend_add(-INFINITY, 0, partial[0], DV, &all_max, &all_sum, out);
    kernels->attend_add(max[1], sum[1], partial[1], DV, &all_max, &all_sum, out);
    CHECK(all_max == max[1] && all_sum == sum[1] && !memcmp(out, partial[1], sizeof out));
}

MAIN()
