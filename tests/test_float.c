// The float kernels of every instruction set against double precision: norms, activations, softmax,
// conversion to half, attention, recurrences. Buffers end at a page that must not be touched.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "test.h"

// ---- tools -----------------------------------------------------------------------------------

// Calls body with `k`, the kernels of each instruction set that this machine has.
#define EACH_ISA(k)                                                                    \
    for (int isa_ = MOE_ISA_SCALAR; isa_ <= MOE_ISA_AVX512; isa_++)                    \
        for (const moe__kernels *k = moe__kernels_get((moe_isa)isa_);                  \
             k && moe_isa_resolve((moe_isa)isa_) == (moe_isa)isa_; k = NULL)

static uint64_t random_state = 0x9E3779B97F4A7C15u;
static uint32_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}
static float random_float(float low, float high) {
    return low + (high - low) * ((float)(random_bits() >> 8) * (1.0f / 16777216.0f));
}
static int random_below(int n) { return (int)(random_bits() % (uint32_t)n); }

// size bytes that end exactly where a page without any access begins.
static void *guarded(size_t size) {
    const size_t page = 4096, whole = (size + page - 1) / page * page;
    unsigned char *memory = (unsigned char *)mmap(NULL, whole + page, PROT_READ | PROT_WRITE,
                                                  0x22 /* private, anonymous */, -1, 0);
    if (memory == (unsigned char *)MAP_FAILED || mprotect(memory + whole, page, PROT_NONE)) {
        puts("out of memory");
        exit(2);
    }
    return memory + whole - size;
}
static void guarded_free(void *memory, size_t size) {
    const size_t page = 4096, whole = (size + page - 1) / page * page;
    munmap((unsigned char *)memory + size - whole, whole + page);
}
static float *guarded_floats(int64_t n) { return (float *)guarded((size_t)n * sizeof(float)); }
static void guarded_floats_free(float *p, int64_t n) { guarded_free(p, (size_t)n * sizeof(float)); }

// |x - expected| in units in the last place of expected; NaN equals NaN, infinity infinity.
static double ulps(float x, double expected) {
    if (x != x || expected != expected) return x != x && expected != expected ? 0 : 1e30;
    if (expected == INFINITY || expected == -INFINITY) return (double)x == expected ? 0 : 1e30;
    const int exponent = expected == 0 || ilogb(expected) < -126 ? -126 : ilogb(expected);
    return fabs((double)x - expected) / ldexp(1, exponent - 23);
}

// ---- rows ------------------------------------------------------------------------------------

static int64_t row_length(int i) { // 1..70, then real rows; 0: no more
    return i < 70 ? i + 1 : i == 70 ? 1408 : i == 71 ? 2048 : i == 72 ? 7168 : 0;
}

static void check_rms_norm(const moe__kernels *k, int64_t n, float size, int weighted,
                           int in_place) {
    const float eps = 1e-6f;
    float *x = guarded_floats(n), *w = guarded_floats(n);
    float *out = in_place ? x : guarded_floats(n);
    double *expected = (double *)malloc((size_t)n * sizeof(double)), sum = 0, worst = 0;
    for (int64_t i = 0; i < n; i++) {
        x[i] = random_float(-size, size);
        w[i] = random_float(0.5f, 2);
        sum += (double)x[i] * x[i];
    }
    for (int64_t i = 0; i < n; i++)
        expected[i] = x[i] / sqrt(sum / (double)n + eps) * (weighted ? w[i] : 1);
    k->rms_norm(x, weighted ? w : NULL, n, eps, out);
    for (int64_t i = 0; i < n; i++) worst = fmax(worst, ulps(out[i], expected[i]));
    CHECKF(worst <= 3, "%s n %d: %.2f ulp", moe_isa_name(k->isa), (int)n, worst);
    if (!in_place) guarded_floats_free(out, n);
    guarded_floats_free(x, n);
    guarded_floats_free(w, n);
    free(expected);
}

TEST(rms_norm_matches_double_precision) {
    EACH_ISA(k)
    for (int i = 0; row_length(i); i++)
        for (int weighted = 0; weighted < 2; weighted++)
            for (int in_place = 0; in_place < 2; in_place++)
                check_rms_norm(k, row_length(i), i % 2 ? 3.0f : 0.001f, weighted, in_place);
}

TEST(rms_norm_handles_huge_values_zeros_and_nan) {
    static float x[7168], out[7168];
    EACH_ISA(k) {
        check_rms_norm(k, 300, 1e25f, 1, 0); // squares leave the range of floats
        memset(x, 0, sizeof x);
        k->rms_norm(x, NULL, 37, 1e-6f, out);
        for (int i = 0; i < 37; i++) CHECK(out[i] == 0);
        // equal values: any drift of the sum would show
        for (int i = 0; i < 7168; i++) x[i] = 0.7f;
        k->rms_norm(x, NULL, 7168, 0, out);
        CHECKF(ulps(out[7000], 1.0) <= 2, "%.9g", (double)out[7000]);
        x[3000] = NAN;
        k->rms_norm(x, NULL, 7168, 1e-6f, out);
        int nans = 0;
        for (int i = 0; i < 7168; i++) nans += out[i] != out[i];
        CHECK(nans == 7168);
    }
}

static double silu(double x) { return x / (1 + exp(-x)); }

TEST(swiglu_matches_double_precision) {
    EACH_ISA(k)
    for (int at = 0; row_length(at); at++) {
        const int64_t n = row_length(at);
        float *gate = guarded_floats(n), *up = guarded_floats(n), *out = guarded_floats(n);
        double worst = 0;
        int differ = 0;
        for (int64_t i = 0; i < n; i++) {
            gate[i] = random_float(-20, 20);
            up[i] = random_float(-3, 3);
        }
        k->swiglu(gate, up, n, out);
        for (int64_t i = 0; i < n; i++) worst = fmax(worst, ulps(out[i], silu(gate[i]) * up[i]));
        k->swiglu(gate, up, n, gate);
        for (int64_t i = 0; i < n; i++) differ += gate[i] != out[i];
        CHECKF(worst <= 4 && !differ, "%s n %d: %.2f ulp", moe_isa_name(k->isa), (int)n, worst);
        guarded_floats_free(gate, n);
        guarded_floats_free(up, n);
        guarded_floats_free(out, n);
    }
}

TEST(swiglu_handles_nan_infinity_and_huge_gates) {
    float gate[17], up[17], out[17];
    EACH_ISA(k)
    for (int at = 0; at < 17; at++) { // in every lane and in the ragged end
        for (int i = 0; i < 17; i++) gate[i] = up[i] = 1;
        gate[at] = NAN;
        k->swiglu(gate, up, 17, out);
        for (int i = 0; i < 17; i++) CHECK((out[i] != out[i]) == (i == at));
        gate[at] = INFINITY;
        k->swiglu(gate, up, 17, out);
        CHECK(out[at] == INFINITY);
        gate[at] = 3e38f;
        k->swiglu(gate, up, 17, out);
        CHECK(out[at] == 3e38f);
        gate[at] = -3e38f;
        k->swiglu(gate, up, 17, out);
        CHECK(out[at] == 0);
        gate[at] = -95;
        k->swiglu(gate, up, 17, out);
        CHECK(fabsf(out[at]) < 1e-38f);
        gate[at] = -85;
        k->swiglu(gate, up, 17, out);
        CHECK(ulps(out[at], silu(-85)) <= 4);
    }
}

static double swiglu_oai(double g, double u) {
    g = g > 7 ? 7 : g;
    u = u > 7 ? 7 : u < -7 ? -7 : u;
    return g / (1 + exp(-1.702 * g)) * (u + 1);
}

// The product 1.702 g is rounded before the exponential: |1.702 g| times half an ulp.
TEST(swiglu_oai_matches_double_precision) {
    EACH_ISA(k)
    for (int at = 0; row_length(at); at++) {
        const int64_t n = row_length(at);
        float *gate = guarded_floats(n), *up = guarded_floats(n), *out = guarded_floats(n);
        int differ = 0, wrong = 0;
        for (int64_t i = 0; i < n; i++) {
            gate[i] = random_float(-20, 20);
            up[i] = random_float(-12, 12);
        }
        k->swiglu_oai(gate, up, n, out);
        for (int64_t i = 0; i < n; i++)
            wrong += !(ulps(out[i], swiglu_oai(gate[i], up[i])) <= 6 + 2 * fabs((double)gate[i]));
        k->swiglu_oai(gate, up, n, gate);
        for (int64_t i = 0; i < n; i++) differ += gate[i] != out[i];
        CHECKF(!wrong && !differ, "%s n %d: %d wrong", moe_isa_name(k->isa), (int)n, wrong);
        guarded_floats_free(gate, n);
        guarded_floats_free(up, n);
        guarded_floats_free(out, n);
    }
}

TEST(swiglu_oai_clamps_and_keeps_nan_in_its_lane) {
    const float gates[] = {7, 8, 3e38f, INFINITY, -3e38f, -40, 0, 1, 1, 1, 1, 1};
    const float ups[] = {1, 1, 1, 1, 1, 1, 1, 9, -9, INFINITY, -INFINITY, -1};
    float gate[17], up[17], out[17];
    EACH_ISA(k)
    for (int at = 0; at < 17; at++) { // in every lane and in the ragged end
        for (int i = 0; i < 17; i++) gate[i] = up[i] = 1;
        for (int c = 0; c < 12; c++) {
            gate[at] = gates[c];
            up[at] = ups[c];
            k->swiglu_oai(gate, up, 17, out);
            const double expected = gates[c] < -1e38f ? 0 : swiglu_oai(gates[c], ups[c]);
            CHECKF(fabs(out[at] - expected) <= 1e-5 * fabs(expected), "%g %g: %g",
                   (double)gates[c], (double)ups[c], (double)out[at]);
        }
        for (int c = 0; c < 2; c++) {
            gate[at] = c ? 1 : NAN;
            up[at] = c ? NAN : 1;
            k->swiglu_oai(gate, up, 17, out);
            for (int i = 0; i < 17; i++) CHECK((out[i] != out[i]) == (i == at));
        }
    }
}

TEST(softmax_matches_double_precision_and_sums_to_1) {
    EACH_ISA(k)
    for (int at = 0; at < 76; at++) {
        const int64_t n = at < 70 ? at + 1 : at == 70 ? 128 : at == 71 ? 151936 : 100 + at;
        float *x = guarded_floats(n);
        double *expected = (double *)malloc((size_t)n * sizeof(double)), sum = 0, max = -1e30;
        double worst = 0, total = 0;
        const float range = at % 3 == 0 ? 1.0f : at % 3 == 1 ? 30.0f : 80.0f;
        for (int64_t i = 0; i < n; i++) {
            x[i] = random_float(-range, range);
            if (i && random_below(8) == 0) x[i] = -INFINITY;
            max = fmax(max, x[i]);
        }
        for (int64_t i = 0; i < n; i++) sum += expected[i] = exp(x[i] - max);
        k->softmax(x, n);
        for (int64_t i = 0; i < n; i++) {
            const double y = expected[i] / sum; // x - max is rounded: 2^-24 of up to 160
            const double e = y < 1.2e-38 ? (fabs(x[i] - y) < 1e-38 ? 0 : 1e9) : ulps(x[i], y);
            worst = fmax(worst, e / (range < 2 ? 1 : 40));
            total += x[i];
        }
        CHECKF(worst <= 4, "%s n %d: %.2f ulp", moe_isa_name(k->isa), (int)n, worst);
        CHECKF(fabs(total - 1) < 1e-6, "%s n %d: sum %.9g", moe_isa_name(k->isa), (int)n, total);
        guarded_floats_free(x, n);
        free(expected);
    }
}

static int count_nans(const float *x, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += x[i] != x[i];
    return count;
}

TEST(softmax_of_nan_or_only_minus_infinity_is_nan) {
    float x[50];
    EACH_ISA(k)
    for (int n = 1; n <= 50; n++) {
        for (int i = 0; i < n; i++) x[i] = -INFINITY;
        k->softmax(x, n);
        CHECK(count_nans(x, n) == n);
        for (int at = 0; at < n; at++) {
            for (int i = 0; i < n; i++) x[i] = (float)i;
            x[at] = NAN;
            k->softmax(x, n);
            CHECKF(count_nans(x, n) == n, "%s NaN at %d of %d", moe_isa_name(k->isa), at, n);
            for (int i = 0; i < n; i++) x[i] = -INFINITY;
            x[at] = -7;
            k->softmax(x, n);
            for (int i = 0; i < n; i++) CHECK(x[i] == (i == at ? 1.0f : 0.0f));
        }
    }
}

// ---- weights of logits -----------------------------------------------------------------------

static double slow_weight(float x, float least, double max, double scale) {
    const double t = ((double)x - max) * scale;
    return x >= least && t > -700 ? exp(t) : 0; // the last ones are below 1e-300
}

// n logits with `odd` in some places, against plain C bit for bit, and against exp.
static void check_weigh(const moe__kernels *k, int n, float range, float least, double scale,
                        float odd) {
    const int room = (n + 15) / 16 * 16;
    const size_t size = (size_t)room * sizeof(double);
    float *x = guarded_floats(n), max = -INFINITY;
    double *e = (double *)guarded(size), *plain = (double *)malloc(size), worst = 0, sum = 0;
    for (int i = 0; i < n; i++) {
        x[i] = random_below(6) ? random_float(-range, range) : odd;
        if (x[i] > max) max = x[i];
    }
    if (max == -INFINITY) x[0] = max = 3;
    const double expected = moe__kernels_scalar.weigh(x, n, least, max, scale, plain);
    const double got = k->weigh(x, n, least, max, scale, e);
    const double alone = k->weigh(x, n, least, max, scale, NULL);
    CHECKF(!memcmp(&got, &expected, sizeof got) && !memcmp(&alone, &expected, sizeof got),
           "%s n %d: sum %a, plain C has %a", moe_isa_name(k->isa), n, got, expected);
    CHECKF(!memcmp(e, plain, size), "%s n %d: other weights", moe_isa_name(k->isa), n);
    for (int i = 0; i < room; i++) {
        const double y = i < n ? slow_weight(x[i], least, max, scale) : 0;
        worst = fmax(worst, y < 1e-300 ? (e[i] >= 0 && e[i] < 1e-300 ? 0 : 1) : fabs(e[i] / y - 1));
        sum += y;
        if (i < n && x[i] == max && max >= least) CHECK(e[i] == 1);
    }
    CHECKF(worst < 2e-12 && fabs(got - sum) <= 2e-12 * sum, "%s n %d: error %g",
           moe_isa_name(k->isa), n, worst);
    guarded_floats_free(x, n);
    guarded_free(e, size);
    free(plain);
}

TEST(weights_of_logits_have_the_bits_of_plain_c) {
    static const float ranges[] = {0, 1, 30, 900, 1e-30f, 1.7e38f};
    static const double scales[] = {1, 1.25, 1e-30, 1e30, 1 / 1.4e-45, 0.3};
    EACH_ISA(k)
    for (int at = 0; at < 300; at++) {
        const int n = at < 299 ? at + 1 : 151936;
        const float range = ranges[at % 6], odd = at % 7 < 3 ? NAN : at % 7 < 6 ? -INFINITY : 0;
        const float least = at % 5 < 3 ? -INFINITY : random_float(-range, range);
        check_weigh(k, n, range, least, scales[at / 6 % 6], odd);
        check_weigh(k, n, 1, -3.4028235e38f, 1, odd);
    }
}

TEST(peaks_are_the_largest_numbers_of_their_blocks) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f, 3e38f, -3e38f};
    EACH_ISA(k)
    for (int n = 1; n <= 5 * MOE__PEAK + 3; n++) {
        const int count = (n + MOE__PEAK - 1) / MOE__PEAK, shape = random_below(4);
        float *x = guarded_floats(n), *out = guarded_floats(count);
        float expected[6];
        for (int i = 0; i < n; i++) {
            x[i] = random_float(-9, shape == 3 ? -1 : 9);
            if (shape == 0 || (shape == 1 && random_below(9) == 0)) x[i] = odd[random_below(6)];
            if (shape == 3 && random_below(200)) x[i] = random_below(2) ? NAN : -INFINITY;
        }
        for (int i = 0; i < count; i++) expected[i] = -INFINITY;
        for (int i = 0; i < n; i++)
            if (x[i] > expected[i / MOE__PEAK]) expected[i / MOE__PEAK] = x[i];
        k->peaks(x, n, out);
        for (int i = 0; i < count; i++)
            CHECKF(out[i] == expected[i], "%s n %d, %d: %g, expected %g", moe_isa_name(k->isa), n,
                   i, (double)out[i], (double)expected[i]);
        guarded_floats_free(x, n);
        guarded_floats_free(out, count);
    }
}

TEST(divide_gives_plain_quotients_and_stays_in_its_row) {
    float x[70], y[70];
    EACH_ISA(k)
    for (int n = 0; n <= 67; n++) {
        const float by = n % 5 == 4 ? 0 : random_float(-3, 3);
        for (int i = 0; i < 70; i++) x[i] = y[i] = random_float(-3, 3);
        k->divide(y, n, by);
        for (int i = 0; i < 70; i++) CHECK(y[i] == (i < n ? x[i] / by : x[i]));
    }
}

TEST(axpy_matches_double_precision) {
    EACH_ISA(k)
    for (int at = 0; row_length(at); at++) {
        const int64_t n = row_length(at);
        float *x = guarded_floats(n), *y = guarded_floats(n);
        double *expected = (double *)malloc((size_t)n * sizeof(double)), worst = 0;
        const float a = random_float(-2, 2);
        for (int64_t i = 0; i < n; i++) {
            x[i] = random_float(-3, 3);
            y[i] = random_float(-3, 3);
            expected[i] = y[i] + (double)a * x[i];
        }
        k->axpy(a, x, n, y);
        for (int64_t i = 0; i < n; i++) worst = fmax(worst, fabs(y[i] - expected[i]));
        CHECKF(worst < 1e-6, "%s n %d: %g", moe_isa_name(k->isa), (int)n, worst);
        guarded_floats_free(x, n);
        guarded_floats_free(y, n);
        free(expected);
    }
}

// Compares n conversions with the plain C one, bit for bit.
static void check_halves(const moe__kernels *k, const float *x, int64_t n) {
    uint16_t *out = (uint16_t *)malloc((size_t)n * 2);
    int64_t wrong = -1;
    k->f32_to_f16(x, n, out);
    for (int64_t i = 0; i < n && wrong < 0; i++)
        if (out[i] != moe__f32_to_f16(x[i])) wrong = i;
    CHECKF(wrong < 0, "%s: %a -> %04x", moe_isa_name(k->isa), (double)x[wrong < 0 ? 0 : wrong],
           out[wrong < 0 ? 0 : wrong]);
    free(out);
}

TEST(every_kernel_rounds_f32_to_f16_as_plain_c_does) {
    enum { N = 1 << 16, EACH = 9 };
    float *x = (float *)malloc(sizeof(float) * N * EACH);
    EACH_ISA(k) {
        // every half, the floats around it, the tie with its neighbour and what is around that
        for (uint32_t h = 0; h < N; h++) {
            const uint32_t bits = moe__f32_bits(moe__f16_to_f32((uint16_t)h));
            const float next = moe__f16_to_f32((uint16_t)(h + 1));
            const float tie = (moe__f32_from_bits(bits) + next) * 0.5f;
            float *to = x + EACH * (size_t)h;
            for (uint32_t i = 0; i < 5; i++) to[i] = moe__f32_from_bits(bits + i - 2);
            for (uint32_t i = 0; i < 3; i++)
                to[5 + i] = moe__f32_from_bits(moe__f32_bits(tie) + i - 1);
            to[8] = moe__f32_from_bits(random_bits());
        }
        check_halves(k, x, (int64_t)N * EACH);
        const uint32_t ends[] = {0x477FEFFF, 0x477FF000, 0x477FF001, 0x7F800000, 0xFF800000,
                                 0x7F800001, 0xFFC00001, 0x7FFFFFFF, 0x33000000, 0x33000001,
                                 0x00000001, 0x80000000, 0x387FE000, 0x387FF000, 0x38800000};
        for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) x[i] = moe__f32_from_bits(ends[i]);
        check_halves(k, x, sizeof ends / sizeof *ends);
        for (int n = 1; n <= 70; n++) { // ragged ends
            float *in = guarded_floats(n);
            uint16_t *out = (uint16_t *)guarded((size_t)n * 2);
            int wrong = 0;
            for (int i = 0; i < n; i++) in[i] = random_float(-9, 9);
            k->f32_to_f16(in, n, out);
            for (int i = 0; i < n; i++) wrong += out[i] != moe__f32_to_f16(in[i]);
            CHECKF(wrong == 0, "%s n %d", moe_isa_name(k->isa), n);
            guarded_floats_free(in, n);
            guarded_free(out, (size_t)n * 2);
        }
    }
    free(x);
}

// Nothing before the row or behind it changes.
TEST(row_kernels_write_nothing_outside_their_row) {
    enum { SIZE = 160, AT = 40 };
    float x[SIZE], y[SIZE], kept[SIZE];
    uint16_t halves[SIZE];
    EACH_ISA(k)
    for (int n = 1; n <= 70; n++)
        for (int kernel = 0; kernel < 6; kernel++) {
            float max = 0, sum = 0;
            int wrong = 0;
            for (int i = 0; i < SIZE; i++) {
                x[i] = random_float(-1, 1);
                y[i] = kept[i] = random_float(-1, 1);
                halves[i] = 0xBEEF;
            }
            if (kernel == 0) k->rms_norm(x + AT, x, n, 1e-5f, y + AT);
            if (kernel == 1) k->swiglu(x + AT, x, n, y + AT);
            if (kernel == 2) k->softmax(y + AT, n);
            if (kernel == 3) k->axpy(0.5f, x + AT, n, y + AT);
            if (kernel == 4) k->f32_to_f16(x + AT, n, halves + AT);
            if (kernel == 5) k->attend_add(1, 2, x + AT, n, &max, &sum, y + AT);
            for (int i = 0; i < SIZE; i++)
                if (i < AT || i >= AT + n) wrong += y[i] != kept[i] || halves[i] != 0xBEEF;
            CHECKF(!wrong, "%s kernel %d n %d", moe_isa_name(k->isa), kernel, n);
        }
}

// ---- the exponential -------------------------------------------------------------------------

#if MOE__X86
#define EXP_OF(isa, target_string, vector, lanes, op)                                        \
    static __attribute__((target(target_string))) void exp_##isa(const float *x, float *out) { \
        for (int i = 0; i < 16; i += lanes)                                                  \
            op(storeu)(out + i, moe__f_exp_##isa(op(loadu)(x + i)));                         \
    }
#define OP256(name) _mm256_##name##_ps
EXP_OF(avx2, "avx2,fma,f16c", __m256, 8, OP256)
#if MOE__USE_AVX512
#define OP512(name) _mm512_##name##_ps
EXP_OF(avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", __m512, 16, OP512)
#endif

static void exp16(moe_isa isa, const float *x, float *out) {
#if MOE__USE_AVX512
    if (isa == MOE_ISA_AVX512) {
        exp_avx512(x, out);
        return;
    }
#endif
    (void)isa;
    exp_avx2(x, out);
}

TEST(the_exponential_is_exact_to_one_ulp) {
    EACH_ISA(k) {
        if (k->isa == MOE_ISA_SCALAR) continue;
        double worst = 0, where = 0;
        float x[16], out[16];
        for (uint32_t bits = 0; bits < 0x42D00000; bits += 1601) { // 0 .. 104, both signs
            for (uint32_t i = 0; i < 16; i++)
                x[i] = moe__f32_from_bits((bits + i / 2 * 200) | (i & 1) << 31);
            exp16(k->isa, x, out);
            for (int i = 0; i < 16; i++) {
                double expected = exp(x[i]);
                if (expected >= 3.4028235677973366e38) expected = INFINITY; // rounds to 2^128
                const double e = ulps(out[i], expected);
                if (e > worst) worst = e, where = x[i];
            }
        }
        CHECKF(worst <= 1.0, "%s: %.3f ulp at %.9g", moe_isa_name(k->isa), worst, where);
        const float special[16] = {-INFINITY, INFINITY, NAN,       0,     -0.0f,    88.7228394f,
                                   88.72284f, 89,       -103.972f, -104,  -103.28f, -87.3365448f,
                                   3e38f,     -3e38f,   1e-45f,    -1e-45f};
        exp16(k->isa, special, out);
        CHECK(out[0] == 0 && out[1] == INFINITY && out[2] != out[2] && out[3] == 1 && out[4] == 1);
        CHECK(out[7] == INFINITY && out[9] == 0 && out[12] == INFINITY && out[13] == 0);
        CHECK(out[14] == 1 && out[15] == 1);
        for (int i = 5; i < 12; i++)
            if (i != 7) CHECKF(ulps(out[i], (float)exp(special[i])) <= 1, "%.9g", (double)out[i]);
    }
}
#endif

// ---- attention -------------------------------------------------------------------------------

static const moe_kv_type kinds[3] = {MOE_KV_F16, MOE_KV_F32, MOE_KV_Q8_0};

typedef struct shape {
    int n_queries, n_keys, dk, dv, kind; // kind: see kinds
    int same;       // values are the front of the keys
    int visibility; // 0 all, 1 causal, 2 random, 3 random with zeros; 4, 5 causal with a short
                    // or long window, 6 random at both ends
    int gap;        // bytes between rows
} shape;

enum { KEYS = 512 }; // most keys of a call here: four chunks

typedef struct attention {
    shape s;
    float *q, *max, *sum, *out, *scores, *rows[MOE__ATTEND_QUERIES];
    uint8_t *k, *v;
    size_t q_size, k_size, v_size, out_size;
    int out_stride;
    int32_t *visible, *first;
    moe__attend_args args;
} attention;

static void store_value(uint8_t *p, int f32, float x) {
    const uint16_t half = moe__f32_to_f16(x);
    if (f32)
        memcpy(p, &x, 4);
    else
        memcpy(p, &half, 2);
}
static float load_value(const uint8_t *p, int f32) {
    return f32 ? moe__load_f32(p) : moe__f16_to_f32(moe__load_u16(p));
}
// Value c of a row.
static float row_value(const uint8_t *row, int kind, int c) {
    if (kind < 2) return load_value(row + c * (kind ? 4 : 2), kind);
    row += c / 32 * 34;
    return moe__f16_to_f32(moe__load_u16(row)) * (float)(int8_t)row[2 + c % 32];
}

// Blocks of 32: every kernel gives the plain C bits, values within half a step and the rounding of
// the scale; zeros, tiny and huge values, and what is not finite.
TEST(every_kernel_rounds_f32_to_q8_0_as_plain_c_does) {
    for (int i = 0; i < 400; i++) {
        float *x = guarded_floats(96);
        uint8_t *expected = (uint8_t *)guarded(102), *out = (uint8_t *)guarded(102);
        const int bad = i % 8 == 0 ? random_below(96) : -1;
        for (int b = 0; b < 3; b++) {
            const float size = powf(2, random_float(-34, 28)); // 127 * 65504 is 2^23
            for (int c = 0; c < 32; c++) x[32 * b + c] = random_float(-size, size);
            if (i % 16 == 5) memset(x + 32 * b, 0, 32 * sizeof(float));
            for (int c = 0; c < 32 && i % 3 == 0; c++) // ties
                x[32 * b + c] = c ? (float)random_below(255) * 0.5f - 64 : 127;
        }
        if (bad >= 0) x[bad] = i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -INFINITY;
        moe__f32_to_q8_0_scalar(x, 96, expected);
        for (int c = 0; c < 96; c++) {
            const float y = row_value(expected, 2, c);
            float peak = 0;
            for (int j = c / 32 * 32; j < c / 32 * 32 + 32; j++) peak = fmaxf(peak, fabsf(x[j]));
            if (bad / 32 == c / 32 && bad >= 0)
                CHECKF(y != y, "%d: %g", c, (double)y);
            else if (peak / 127 >= 65520)
                CHECKF(y != y, "%g: %g", (double)peak, (double)y);
            else // half a step; the largest may lose the rounding of the scale
                CHECKF(fabsf(y - x[c]) <= 0.5001f * peak / 127 + peak * 0x1p-11f + 4e-6f,
                       "%g: %g", (double)x[c], (double)y);
        }
        EACH_ISA(k) {
            memset(out, 0xAA, 102);
            k->f32_to_q8_0(x, 96, out);
            CHECKF(memcmp(out, expected, 102) == 0, "%s, case %d", moe_isa_name(k->isa), i);
        }
        guarded_floats_free(x, 96);
        guarded_free(expected, 102);
        guarded_free(out, 102);
    }
}

static void attention_reset(attention *a) {
    const shape *s = &a->s;
    for (int i = 0; i < s->n_queries; i++) {
        a->max[i] = -INFINITY;
        a->sum[i] = 0;
        for (int c = 0; c < s->dv + 3; c++) {
            if (i == s->n_queries - 1 && c >= s->dv) break; // the last row has nothing behind it
            a->out[i * (s->dv + 3) + c] = c < s->dv ? 0 : 12345.0f;
        }
    }
}

// Rows of width values at a guard page, NaN between them.
static uint8_t *make_rows(int n, int width, int kind, size_t stride, size_t *size) {
    const size_t row = moe__kv_bytes(kinds[kind], width);
    *size = (size_t)(n - 1) * stride + row;
    uint8_t *memory = (uint8_t *)guarded(*size);
    memset(memory, 0xFF, *size);
    for (int j = 0; j < n; j++)
        for (int c = 0; c < width; c++) {
            uint8_t *p = memory + (size_t)j * stride;
            if (kind < 2) {
                store_value(p + (size_t)c * (kind ? 4 : 2), kind, random_float(-1, 1));
                continue;
            }
            p += c / 32 * 34;
            if (c % 32 == 0) store_value(p, 0, random_float(0, 1.0f / 64));
            p[2 + c % 32] = (uint8_t)random_below(256); // -128 is nothing that we store
        }
    return memory;
}

static void attention_open(attention *a, const shape *s) {
    memset(a, 0, sizeof *a);
    a->s = *s;
    const int n = s->n_queries;
    moe__attend_args *args = &a->args;
    args->q_stride = s->dk + 5;
    a->out_stride = s->dv + 3;
    args->k_bytes = moe__kv_bytes(kinds[s->kind], s->dk) + (size_t)s->gap;
    args->v_bytes =
        s->same ? args->k_bytes : moe__kv_bytes(kinds[s->kind], s->dv) + (size_t)s->gap * 2;
    a->q_size = (size_t)((n - 1) * (s->dk + 5) + s->dk);
    a->out_size = (size_t)((n - 1) * (s->dv + 3) + s->dv);
    a->q = guarded_floats((int64_t)a->q_size);
    a->out = guarded_floats((int64_t)a->out_size);
    a->max = guarded_floats(n);
    a->sum = guarded_floats(n);
    a->scores = guarded_floats((int64_t)n * MOE__ATTEND_KEYS);
    a->k = make_rows(s->n_keys, s->dk, s->kind, args->k_bytes, &a->k_size);
    a->v = s->same ? a->k : make_rows(s->n_keys, s->dv, s->kind, args->v_bytes, &a->v_size);
    a->visible = (int32_t *)guarded((size_t)n * 4);
    a->first = (int32_t *)guarded((size_t)n * 4);
    const float scale = 2.0f / sqrtf((float)s->dk);
    for (size_t i = 0; i < a->q_size; i++) a->q[i] = random_float(-1, 1) * scale;
    for (int i = 0; i < n; i++) {
        int seen = s->n_keys;
        const int window = s->visibility == 4 ? 1 + s->n_keys / 9 : 1 + s->n_keys / 2;
        const int v = s->visibility;
        if (v == 1 || v == 4 || v == 5) seen = s->n_keys - n + 1 + i;
        if (s->visibility == 2) seen = 1 + random_below(s->n_keys);
        if (v == 3 || v == 6) seen = random_below(3) ? random_below(s->n_keys + 1) : 0;
        a->visible[i] = seen < 0 ? 0 : seen;
        a->first[i] = v < 4 ? 0 : v == 6 ? random_below(s->n_keys + 1) : seen - window;
        if (a->first[i] < 0) a->first[i] = 0;
    }
    args->q = a->q;
    args->k = a->k;
    args->v = a->v;
    args->type = kinds[s->kind];
    args->dk = s->dk;
    args->dv = s->dv;
    args->n_queries = n;
    args->n_keys = s->n_keys;
    args->n_visible = s->visibility ? a->visible : NULL;
    args->first = s->visibility > 3 ? a->first : NULL;
    args->max = a->max;
    args->sum = a->sum;
    args->out = a->rows;
    for (int i = 0; i < n; i++) a->rows[i] = a->out + i * a->out_stride;
    args->scores = a->scores;
    attention_reset(a);
}

static void attention_close(attention *a) {
    const int n = a->s.n_queries;
    guarded_floats_free(a->q, (int64_t)a->q_size);
    guarded_floats_free(a->out, (int64_t)a->out_size);
    guarded_floats_free(a->max, n);
    guarded_floats_free(a->sum, n);
    guarded_floats_free(a->scores, (int64_t)n * MOE__ATTEND_KEYS);
    guarded_free(a->k, a->k_size);
    if (!a->s.same) guarded_free(a->v, a->v_size);
    guarded_free(a->visible, (size_t)n * 4);
    guarded_free(a->first, (size_t)n * 4);
}

// Largest error of query i's output, in units of the weighted mean of |value|, and of the logarithm
// of the whole sum. *budget is what rounding of scores may cost.
static double attention_error(const attention *a, int i, double *budget) {
    const shape *s = &a->s;
    static double p[KEYS], out[1024], size[1024];
    double max = -1e300, sum = 0, products = 0, worst = 0;
    for (int j = a->first[i]; j < a->visible[i]; j++) {
        double score = 0, absolute = 0;
        for (int c = 0; c < s->dk; c++) {
            const double x = (double)a->q[i * a->args.q_stride + c] *
                             row_value(a->k + (size_t)j * a->args.k_bytes, s->kind, c);
            score += x;
            absolute += fabs(x);
        }
        p[j] = score;
        max = fmax(max, score);
        products = fmax(products, absolute);
    }
    for (int c = 0; c < s->dv; c++) out[c] = size[c] = 0;
    for (int j = a->first[i]; j < a->visible[i]; j++) {
        p[j] = exp(p[j] - max);
        sum += p[j];
        for (int c = 0; c < s->dv; c++) {
            const double x = p[j] * row_value(a->v + (size_t)j * a->args.v_bytes, s->kind, c);
            out[c] += x;
            size[c] += fabs(x);
        }
    }
    for (int c = 0; c < s->dv; c++) {
        const double x = (double)a->out[i * a->out_stride + c] / a->sum[i];
        const double e = fabs(x - out[c] / sum) / (size[c] / sum + 1e-30);
        worst = e > worst || e != e ? e : worst;
    }
    *budget = 5e-7 + 1.5e-7 * products;
    return fmax(worst, fabs(a->max[i] + log(a->sum[i]) - max - log(sum)));
}

static const char *shape_text(const shape *s) {
    static char text[128];
    static const char *const names[3] = {"f16", "f32", "q8_0"};
    snprintf(text, sizeof text, "queries %d keys %d dk %d dv %d %s visibility %d gap %d%s",
             s->n_queries, s->n_keys, s->dk, s->dv, names[s->kind], s->visibility, s->gap,
             s->same ? " same memory" : "");
    return text;
}

static int bits_differ(const float *a, const float *b, int n) {
    return memcmp(a, b, (size_t)n * sizeof(float)) != 0;
}

// One call against double precision; then the same queries in groups of 1, 3 and 5: equal bits.
static void check_shape(const moe__kernels *k, const shape *s) {
    attention a;
    attention_open(&a, s);
    const int n = s->n_queries, stride = s->dv + 3;
    k->attend(&a.args);
    for (int i = 0; i < n; i++) {
        if (a.visible[i] <= a.first[i]) {
            CHECK(a.max[i] == -INFINITY && a.sum[i] == 0 && a.out[i * stride] == 0);
            continue;
        }
        double budget, error = attention_error(&a, i, &budget);
        CHECKF(error <= budget, "%s %s query %d (sees %d): %.3g > %.3g", moe_isa_name(k->isa),
               shape_text(s), i, a.visible[i], error, budget);
    }
    int spoilt = 0;
    for (int i = 0; i < n - 1; i++)
        for (int c = s->dv; c < stride; c++) spoilt += a.out[i * stride + c] != 12345.0f;
    CHECKF(!spoilt, "%s %s: gaps of out", moe_isa_name(k->isa), shape_text(s));

    float *out = (float *)malloc(a.out_size * sizeof(float)), max[32], sum[32];
    memcpy(out, a.out, a.out_size * sizeof(float));
    memcpy(max, a.max, (size_t)n * sizeof(float));
    memcpy(sum, a.sum, (size_t)n * sizeof(float));
    for (int group = 1; group <= 5 && n > 1; group += 2) {
        attention_reset(&a);
        for (int i = 0; i < n; i += group) {
            moe__attend_args part = a.args;
            part.n_queries = n - i < group ? n - i : group;
            part.q += i * part.q_stride;
            part.out += i;
            part.max += i;
            part.sum += i;
            if (part.n_visible) part.n_visible += i;
            if (part.first) part.first += i;
            k->attend(&part);
        }
        CHECKF(!bits_differ(out, a.out, (int)a.out_size) && !bits_differ(max, a.max, n) &&
                   !bits_differ(sum, a.sum, n),
               "%s %s: groups of %d give other bits", moe_isa_name(k->isa), shape_text(s), group);
    }
    free(out);
    attention_close(&a);
}

TEST(attention_is_exact_for_the_shapes_of_models) {
    enum { MOST = KEYS };
    const shape shapes[] = {
        {8, MOST, 128, 128, 0, 0, 0, 0},    {8, MOST, 128, 128, 0, 0, 0, 1792}, // GQA decode
        {1, MOST, 128, 128, 0, 0, 0, 0},    {4, 77, 64, 64, 0, 0, 0, 0},
        {16, MOST, 576, 512, 0, 1, 0, 0},   {32, 126, 576, 512, 0, 1, 1, 0}, // MLA
        {16, 70, 576, 512, 1, 1, 0, 64},   {3, 33, 576, 512, 0, 1, 2, 0},
        {32, MOST, 128, 128, 0, 0, 1, 0},   {32, MOST, 128, 128, 1, 0, 1, 0}, // prefill
        {32, 120, 192, 128, 0, 0, 1, 0},   {32, 100, 192, 192, 0, 0, 2, 6},
        {31, 65, 96, 96, 0, 0, 3, 0},      {32, 12, 128, 128, 0, 0, 1, 0},
        {32, MOST, 64, 64, 0, 0, 4, 0},     {32, MOST, 64, 64, 1, 0, 5, 0}, // sliding windows
        {32, 124, 128, 128, 0, 0, 6, 0},   {7, MOST, 64, 64, 0, 0, 6, 0},
        {32, 64, 1056, 20, 0, 0, 2, 0},    {20, 9, 1030, 1000, 0, 0, 0, 2}, // very long rows
        {1, MOST, 128, 128, 2, 0, 0, 0},    {8, MOST, 128, 128, 2, 0, 0, 952}, // Q8_0
        {16, MOST, 576, 512, 2, 1, 0, 0},   {32, 126, 576, 512, 2, 1, 1, 0},
        {5, 70, 32, 96, 2, 0, 2, 1},       {32, 100, 192, 160, 2, 0, 2, 6},
        {20, 9, 1056, 992, 2, 0, 0, 2},    {8, 33, 576, 512, 2, 1, 2, 0},
        {32, 512, 128, 128, 2, 0, 1, 0},   {32, 300, 128, 128, 2, 0, 6, 0},
        {9, 79, 96, 96, 2, 0, 3, 0},       {7, 512, 64, 64, 2, 0, 4, 36},
        {13, 512, 192, 128, 2, 0, 5, 0},   {4, 511, 128, 224, 2, 0, 1, 2},
    };
    EACH_ISA(k)
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_shape(k, &shapes[i]);
}

TEST(attention_is_exact_for_odd_widths_and_lengths) {
    const int widths[] = {1,  2,  3,  5,  7,  8,  9,  15, 16, 17, 20,
                          24, 31, 33, 48, 63, 64, 65, 80, 96, 112};
    const int keys[] = {1,  2,  3,  4,  5,  6,  7,  8,   9,   15,  16,
                        17, 31, 33, 63, 64, 65, 66, 127, 128, 129, 200, 255, 256, 257, 384, KEYS};
    const int n_widths = sizeof widths / sizeof *widths, n_all_keys = sizeof keys / sizeof *keys;
    EACH_ISA(k)
    for (int i = 0; i < 500; i++) {
        shape s;
        memset(&s, 0, sizeof s);
        s.n_queries = i < 32 ? i + 1 : 1 + random_below(32);
        s.n_keys = keys[i < 32 ? i % n_all_keys : random_below(n_all_keys)];
        s.dk = widths[i < n_widths ? i : random_below(n_widths)];
        s.dv = widths[i < n_widths ? n_widths - 1 - i : random_below(n_widths)];
        s.kind = random_below(3);
        if (s.kind == 2) s.dk = (s.dk + 31) & ~31, s.dv = (s.dv + 31) & ~31;
        s.visibility = random_below(7);
        if (random_below(3) == 0) s.gap = random_below(40) * 2 + (i % 4 == 0); // odd: misaligned
        check_shape(k, &s);
    }
}

// Blocks one after the other equal one softmax over all keys.
TEST(attention_block_by_block_equals_one_softmax) {
    EACH_ISA(k)
    for (int i = 0; i < 24; i++) {
        const int n = 1 + random_below(32), dv = i % 3 > 1 ? 96 : 48;
        const shape s = {n, KEYS, 64, dv, i % 3, 0, i % 7, 0};
        attention a;
        attention_open(&a, &s);
        int32_t visible[32], hidden[32];
        for (int first = 0, size; first < s.n_keys; first += size) {
            const int largest = i < 6 ? 16 : 200;
            size = 1 + random_below(largest);
            if (size > s.n_keys - first) size = s.n_keys - first;
            for (int r = 0; r < s.n_queries; r++) {
                visible[r] = (int32_t)moe__max(0, moe__min(size, a.visible[r] - first));
                hidden[r] = (int32_t)moe__max(0, moe__min(size, a.first[r] - first));
            }
            moe__attend_args part = a.args;
            part.k = a.k + (size_t)first * part.k_bytes;
            part.v = a.v + (size_t)first * part.v_bytes;
            part.n_keys = size;
            part.n_visible = visible;
            part.first = hidden;
            k->attend(&part);
        }
        for (int r = 0; r < s.n_queries; r++) {
            if (a.visible[r] <= a.first[r]) continue;
            double budget, error = attention_error(&a, r, &budget);
            CHECKF(error <= 1e-6, "%s %s: %.3g", moe_isa_name(k->isa), shape_text(&s), error);
        }
        attention_close(&a);
    }
}

// What the queries see of keys begin .. end - 1, in this order of calls: at once; each chunk by
// itself with the state of those before; each from nothing, and added up.
enum { AT_ONCE, ONE_BY_ONE, ADDED_UP };
static void attend_chunks(const moe__kernels *k, const attention *a, int begin, int end, int how) {
    int32_t visible[32], first[32];
    float max[32], sum[32], *rows[32], *out = (float *)calloc(32 * 1024, sizeof(float));
    const shape *s = &a->s;
    moe__attend_args part = a->args;
    part.k = a->k + (size_t)begin * part.k_bytes;
    part.v = a->v + (size_t)begin * part.v_bytes;
    part.n_keys = end - begin;
    part.n_visible = visible, part.first = first;
    for (int r = 0; r < s->n_queries; r++) {
        visible[r] = (int32_t)moe__max(0, moe__min(end, a->visible[r]) - begin);
        first[r] = (int32_t)moe__max(0, moe__min(end, a->first[r]) - begin);
        max[r] = -INFINITY, sum[r] = 0;
        rows[r] = out + 1024 * r;
    }
    if (how == ADDED_UP) part.max = max, part.sum = sum, part.out = rows;
    k->attend(&part);
    for (int r = 0; r < s->n_queries && how == ADDED_UP; r++)
        if (first[r] < visible[r])
            k->attend_add(max[r], sum[r], rows[r], s->dv, a->max + r, a->sum + r, a->rows[r]);
    free(out);
}

// However the chunks come: the same bits. With and without a sink, from windows, NaN included.
TEST(attention_has_the_same_bits_however_chunks_come) {
    EACH_ISA(k)
    for (int i = 0; i < 60; i++) {
        const int n = 1 + random_below(32), n_keys = 1 + random_below(KEYS);
        const int dv = i % 3 > 1 ? 96 : 33 + random_below(100);
        const shape s = {n, n_keys, 64, dv, i % 3, 0, i % 7, 0};
        attention a;
        attention_open(&a, &s);
        if (i % 10 == 9) memset(a.k + (size_t)(n_keys / 2) * a.args.k_bytes, 0xFF, 34);
        float *expected = (float *)malloc(a.out_size * sizeof(float)), max[32], sum[32];
        const float sink = i % 4 == 3 ? random_float(-2, 2) : -INFINITY;
        for (int how = AT_ONCE; how <= ADDED_UP; how++) {
            attention_reset(&a);
            for (int r = 0; r < n; r++) a.max[r] = sink, a.sum[r] = sink > -INFINITY;
            for (int begin = 0, end; begin < n_keys; begin = end) {
                end = how == AT_ONCE ? n_keys : begin + MOE__ATTEND_KEYS;
                if (how == ONE_BY_ONE && i % 2) end += MOE__ATTEND_KEYS;
                if (end > n_keys) end = n_keys;
                attend_chunks(k, &a, begin, end, how);
            }
            if (how == AT_ONCE) {
                memcpy(expected, a.out, a.out_size * sizeof(float));
                memcpy(max, a.max, sizeof(float) * (size_t)n);
                memcpy(sum, a.sum, sizeof(float) * (size_t)n);
            }
            CHECKF(!bits_differ(expected, a.out, (int)a.out_size) && !bits_differ(max, a.max, n) &&
                       !bits_differ(sum, a.sum, n),
                   "%s %s, case %d: %s", moe_isa_name(k->isa), shape_text(&s), i,
                   how == ADDED_UP ? "added up" : "one by one");
        }
        free(expected);
        attention_close(&a);
    }
}

// NaN in keys or values changes no bit for those who do not see them, and reaches those who do.
TEST(nan_reaches_only_queries_that_see_it) {
    EACH_ISA(k)
    for (int i = 0; i < 120; i++) {
        const int kind = i % 3, width = kind < 2 && i % 4 == 0 ? 20 : 64;
        const int n_queries = 2 + random_below(31), n_keys = 3 + random_below(KEYS - 2);
        const shape s = {n_queries, n_keys, width, width, kind, 0, 1 + i / 3 % 6, 0};
        attention a;
        attention_open(&a, &s);
        const int n = s.n_queries, stride = s.dv + 3, poison = random_below(s.n_keys);
        float *out = (float *)malloc(a.out_size * sizeof(float)), max[32], sum[32];
        k->attend(&a.args);
        memcpy(out, a.out, a.out_size * sizeof(float));
        memcpy(max, a.max, (size_t)n * sizeof(float));
        memcpy(sum, a.sum, (size_t)n * sizeof(float));
        const int values = i % 5 < 2;
        uint8_t *rows = values ? a.v : a.k;
        const size_t bytes = values ? a.args.v_bytes : a.args.k_bytes;
        memset(rows + (size_t)poison * bytes, 0xFF, moe__kv_bytes(kinds[kind], width)); // NaN
        int seen = 0;
        for (int r = 0; r < n; r++) seen |= a.visible[r] > poison && s.visibility < 4;
        seen |= s.visibility > 3;
        if (!seen) memset(rows + (size_t)poison * bytes, 0xFF, (size_t)(s.n_keys - poison) * bytes);
        attention_reset(&a);
        k->attend(&a.args);
        for (int r = 0; r < n; r++) {
            const float *now = a.out + r * stride;
            if (a.visible[r] > poison && a.first[r] <= poison) {
                float quotient[128];
                for (int c = 0; c < s.dv; c++) quotient[c] = now[c] / a.sum[r];
                CHECKF(count_nans(quotient, s.dv) == s.dv, "%s %s: NaN at %d is lost",
                       moe_isa_name(k->isa), shape_text(&s), poison);
            } else {
                const int same = !bits_differ(now, out + r * stride, s.dv) &&
                                 !bits_differ(a.max + r, max + r, 1) &&
                                 !bits_differ(a.sum + r, sum + r, 1);
                CHECKF(same, "%s %s: query %d sees %d, NaN at %d", moe_isa_name(k->isa),
                       shape_text(&s), r, a.visible[r], poison);
            }
        }
        free(out);
        attention_close(&a);
    }
}

// A NaN query spoils itself only.
TEST(a_nan_query_spoils_only_itself) {
    EACH_ISA(k)
    for (int bad = 0; bad < 9; bad++) {
        const shape s = {9, 40, 32, 32, 0, 0, 0, 0};
        attention a;
        attention_open(&a, &s);
        a.q[bad * a.args.q_stride + 7] = NAN;
        k->attend(&a.args);
        k->attend(&a.args); // and stays so
        for (int r = 0; r < 9; r++) {
            float quotient[32];
            for (int c = 0; c < 32; c++) quotient[c] = a.out[r * 35 + c] / a.sum[r];
            CHECK(count_nans(quotient, 32) == (r == bad ? 32 : 0));
        }
        attention_close(&a);
    }
}

// Scores of -inf count for nothing, whether alone, first, last or mixed with others.
TEST(scores_of_minus_infinity_count_for_nothing) {
    EACH_ISA(k)
    for (int f32 = 0; f32 < 2; f32++) {
        const shape s = {5, 70, 1, 20, f32, 0, 0, 0};
        attention a;
        attention_open(&a, &s);
        for (int i = 0; i < 5; i++) a.q[i * 6] = 1.0f + (float)i; // dk 1, stride 6
        uint8_t *keys = (uint8_t *)malloc(a.k_size);
        memcpy(keys, a.k, a.k_size);
        for (int j = 0; j < 70; j++) store_value(a.k + (size_t)j * a.args.k_bytes, f32, -INFINITY);
        k->attend(&a.args);
        for (int i = 0; i < 5; i++)
            CHECK(a.max[i] == -INFINITY && a.sum[i] == 0 && a.out[i * 23] == 0);
        memcpy(a.k, keys, a.k_size); // then finite scores
        k->attend(&a.args);
        for (int i = 0; i < 5; i++) {
            double budget, error = attention_error(&a, i, &budget);
            CHECKF(error <= 1e-6, "%s: %.3g", moe_isa_name(k->isa), error);
        }
        for (int j = 0; j < 70; j += 1 + (j > 20)) // then a mixture
            store_value(a.k + (size_t)j * a.args.k_bytes, f32, -INFINITY);
        attention_reset(&a);
        k->attend(&a.args);
        for (int i = 0; i < 5; i++) {
            double sum = 0, out = 0;
            for (int j = 0; j < 70; j++) {
                const float score = a.q[i * 6] * load_value(a.k + (size_t)j * a.args.k_bytes, f32);
                const double p = exp((double)score - a.max[i]);
                sum += p;
                out += p * load_value(a.v + (size_t)j * a.args.v_bytes, f32);
            }
            CHECK(fabs(sum - a.sum[i]) < 1e-5 && fabs(out - a.out[i * 23]) < 1e-5);
        }
        free(keys);
        attention_close(&a);
    }
}

// A query that sees nothing keeps the bits of its state.
TEST(a_query_that_sees_nothing_keeps_its_state) {
    EACH_ISA(k)
    for (int i = 0; i < 20; i++) {
        const shape s = {6, 90, 64, i % 3 > 1 ? 64 : 68, i % 3, 0, 3, 0};
        attention a;
        attention_open(&a, &s);
        const int hidden = random_below(6), stride = s.dv + 3;
        float before[68];
        a.visible[hidden] = 0;
        a.visible[(hidden + 1) % 6] = 1 + i % 90;
        a.max[hidden] = 0.5f;
        a.sum[hidden] = 2.5f;
        for (int c = 0; c < 68; c++) before[c] = c % 3 == 0 ? -0.0f : random_float(-1, 1);
        before[5] = NAN;
        memcpy(a.out + hidden * stride, before, sizeof(float) * (size_t)s.dv);
        k->attend(&a.args);
        CHECK(!bits_differ(a.out + hidden * stride, before, s.dv));
        CHECK(a.max[hidden] == 0.5f && a.sum[hidden] == 2.5f);
        attention_close(&a);
    }
}

// A state that begins with a sink (max = its score, sum = 1, nothing in out) gives a softmax
// with one more score, whose value is 0.
TEST(a_sink_is_one_more_score_with_value_0) {
    EACH_ISA(k)
    for (int i = 0; i < 30; i++) {
        const shape s = {6, 90, 64, 68, i % 2, 0, i % 7, 0};
        attention a;
        attention_open(&a, &s);
        k->attend(&a.args);
        float max[6], sum[6], out[6];
        for (int r = 0; r < 6; r++) {
            max[r] = a.max[r];
            sum[r] = a.sum[r];
            out[r] = a.out[r * 71 + 5];
        }
        attention_reset(&a);
        for (int r = 0; r < 6; r++) {
            a.max[r] = random_float(-4, 4);
            a.sum[r] = 1;
        }
        float sinks[6];
        memcpy(sinks, a.max, sizeof sinks);
        k->attend(&a.args);
        for (int r = 0; r < 6; r++) {
            const double weight = exp((double)sinks[r] - max[r]);
            const double expected = sum[r] > 0 ? out[r] / (sum[r] + weight) : 0;
            const double x = a.out[r * 71 + 5] / a.sum[r];
            CHECKF(fabs(x - expected) <= 1e-6, "%s: %g, expected %g", moe_isa_name(k->isa), x,
                   expected);
        }
        attention_close(&a);
    }
}

// Large scores: no overflow, whether the largest comes in the first block or in the last.
TEST(large_scores_do_not_overflow) {
    EACH_ISA(k)
    for (int step = 0; step < 2; step++) {
        const shape s = {4, 100, 16, 16, 1, 0, 0, 0};
        attention a;
        attention_open(&a, &s);
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < 16; c++) a.q[i * 21 + c] = c == 0 ? 1.0f : 0.0f;
        for (int j = 0; j < 100; j++)
            store_value(a.k + (size_t)j * a.args.k_bytes, 1, (step ? -1e30f : 300.0f) * (float)j);
        a.args.n_keys = 50;
        k->attend(&a.args);
        a.args.k = a.k + 50 * a.args.k_bytes;
        a.args.v = a.v + 50 * a.args.v_bytes;
        k->attend(&a.args);
        const int winner = step ? 0 : 99;
        for (int i = 0; i < 4; i++) {
            CHECK(a.sum[i] == 1);
            for (int c = 0; c < 16; c++)
                CHECK(a.out[i * 19 + c] ==
                      load_value(a.v + (size_t)winner * a.args.v_bytes + c * 4, 1));
        }
        attention_close(&a);
    }
}

// ---- rows of recurrences ---------------------------------------------------------------------

enum { N_ROW_KERNELS = 8 };

static void row_kernel(const moe__kernels *k, int kernel, const float *x, const float *y, int64_t n,
                       float *out) {
    if (kernel == 0) {
        if (out != x) memcpy(out, x, (size_t)n * sizeof *out);
        k->gate(out, y, n);
    }
    if (kernel == 1) k->softplus(x, y, n, out);
    if (kernel == 2) k->decay(x, y, n, -2.5f, 0, out);
    if (kernel == 3) k->decay(x, y, n, 3.5f, -5, out);
    if (kernel == 4) k->relu_squared(x, n, out);
    if (kernel == 5) k->swiglu_limited(x, y, n, 7, 0, out);
    if (kernel == 6) k->swiglu_limited(x, y, n, 7, 1, out);
    if (kernel == 7) k->reglu(x, y, n, out);
}
static double softplus(double x) { return x > 20 ? x : log1p(exp(x)); }
// What it gives, and how many units in the last place it may be wrong: an error of what goes into
// an exponential counts as often as that is large.
static double row_expected(int kernel, float x, float y, double *most) {
    const float sum = x + y;
    double e;
    *most = 5;
    if (kernel == 0) return x / (1 + exp(-(double)y));
    if (kernel == 1) return softplus(sum);
    if (kernel == 2) {
        e = -2.5 * softplus(sum);
        *most += 4 * fabs(e);
        return exp(e);
    }
    if (kernel == 3) {
        e = -5 / (1 + exp(-3.5 * sum));
        *most += 4 * fabs(e) * (1 + fabs(sum) * 3.5 / 4);
        return exp(e);
    }
    if (kernel == 4) return x > 0 ? (double)x * x : 0;
    if (kernel == 7) return x > 0 ? (double)x * y : 0;
    const double limited = y > 7 ? 7 : y < -7 ? -7 : y;
    if (kernel == 6) return silu(fmin(x, 7)) * limited;
    return fmin(silu(x), 7) * limited;
}

// GELU of half precision numbers, rounded to half precision below 10, see moe__kernels.geglu.
TEST(geglu_rounds_to_half_precision_like_a_table) {
    EACH_ISA(k) {
        int wrong = 0, differ = 0;
        for (int i = 0; i < 4000; i++) {
            const float range = i % 4 == 0 ? 1e-3f : i % 4 == 1 ? 4.0f : i % 4 == 2 ? 12.0f : 1e5f;
            float x = random_float(-range, range), one = 1, out, plain;
            k->geglu(&x, &one, 1, &out);
            moe__geglu_scalar(&x, &one, 1, &plain);
            const double h = (double)moe__f16_to_f32(moe__f32_to_f16(x)), y = 1.5957691216057308;
            const double gelu = x >= 10    ? (double)x
                                : x <= -10 ? 0
                                           : h / (1 + exp(-y * (h + 0.044715 * h * h * h)));
            wrong += !(fabs((double)out - gelu) <= fabs(gelu) / 1024 + 6e-8);
            differ += !(fabsf(out - plain) <= fabsf(plain) / 1024 + 6e-8f);
        }
        CHECKF(!wrong && !differ, "%s: %d wrong, %d differ", moe_isa_name(k->isa), wrong, differ);
        float odd[4] = {NAN, INFINITY, -INFINITY, 70000}, ones[4] = {1, 1, 1, 1};
        k->geglu(odd, ones, 4, odd);
        CHECK(odd[0] != odd[0]);
        CHECK(odd[1] == INFINITY);
        CHECK(odd[2] == 0);
        CHECK(odd[3] == 70000);
    }
}

TEST(rows_of_recurrences_match_double_precision) {
    EACH_ISA(k)
    for (int at = 0; row_length(at); at++)
        for (int kernel = 0; kernel < N_ROW_KERNELS; kernel++) {
            const int64_t n = row_length(at);
            const float range = at % 3 == 0 ? 2.0f : at % 3 == 1 ? 20.0f : 60.0f;
            float *x = guarded_floats(n), *y = guarded_floats(n), *out = guarded_floats(n);
            double worst = 0;
            int wrong = 0, differ = 0;
            for (int64_t i = 0; i < n; i++) {
                x[i] = random_float(-range, range);
                y[i] = random_float(-12, 12);
            }
            row_kernel(k, kernel, x, y, n, out);
            for (int64_t i = 0; i < n; i++) {
                double most;
                const double e = ulps(out[i], row_expected(kernel, x[i], y[i], &most));
                worst = fmax(worst, e / most);
                wrong += !(e <= most);
            }
            CHECKF(!wrong, "%s kernel %d n %d: %.2f of what is allowed", moe_isa_name(k->isa),
                   kernel, (int)n, worst);
            for (int64_t i = 0; i < n && n < 100; i++) { // the same bits wherever they stand
                float alone;
                row_kernel(k, kernel, x + i, y + i, 1, &alone);
                differ += memcmp(&alone, out + i, sizeof alone) != 0;
            }
            row_kernel(k, kernel, x, y, n, x);
            differ += memcmp(x, out, (size_t)n * sizeof *x) != 0;
            CHECKF(!differ, "%s kernel %d n %d: other bits", moe_isa_name(k->isa), kernel, (int)n);
            guarded_floats_free(x, n);
            guarded_floats_free(y, n);
            guarded_floats_free(out, n);
        }
}

TEST(softplus_keeps_its_relative_accuracy_down_to_nothing) {
    const float none[16] = {0};
    EACH_ISA(k) {
        double worst = 0, where = 0;
        float x[16], out[16];
        for (uint32_t bits = 0; bits < 0x42D00000; bits += 16001) { // 0 .. 104, both signs
            for (uint32_t i = 0; i < 16; i++)
                x[i] = moe__f32_from_bits((bits + i / 2 * 2000) | (i & 1) << 31);
            k->softplus(x, none, 16, out);
            for (int i = 0; i < 16; i++) {
                const double e = ulps(out[i], softplus(x[i]));
                if (e > worst) worst = e, where = x[i];
            }
        }
        CHECKF(worst <= 3.5, "%s: %.3f ulp at %.9g", moe_isa_name(k->isa), worst, where);
    }
}

// In every lane and in the ragged end, as plain C has it; others beside it stay what they are.
TEST(rows_of_recurrences_handle_nan_infinity_and_huge_values) {
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, -104, 20, 20.5f, 0, -0.0f};
    enum { N = 17, N_ODD = sizeof odd / sizeof *odd };
    float x[N], y[N], out[N], expected[N];
    EACH_ISA(k)
    for (int at = 0; at < N; at++)
        for (int c = 0; c < 2 * N_ODD; c++)
            for (int kernel = 0; kernel < N_ROW_KERNELS; kernel++) {
                int wrong = 0;
                for (int i = 0; i < N; i++) x[i] = y[i] = 0.5f;
                (c < N_ODD ? x : y)[at] = odd[c % N_ODD];
                row_kernel(k, kernel, x, y, N, out);
                row_kernel(&moe__kernels_scalar, kernel, x, y, N, expected);
                for (int i = 0; i < N; i++) {
                    const float e = expected[i];
                    wrong += e != e ? out[i] == out[i]
                                    : out[i] != e && !(fabsf(out[i] - e) <= 1e-5f * fabsf(e));
                }
                CHECKF(!wrong, "%s kernel %d, %g at %d: %g, plain C has %g", moe_isa_name(k->isa),
                       kernel, (double)odd[c % N_ODD], at, (double)out[at], (double)expected[at]);
            }
}

static void check_conv(const moe__kernels *k, int n, int n_taps, int biased, int with_silu) {
    const int stride = n + 3;
    float *w = guarded_floats((int64_t)(n_taps - 1) * stride + n), *x[MOE__CONV_TAPS];
    float *bias = guarded_floats(n), *out = guarded_floats(n);
    double worst = 0;
    int differ = 0;
    for (int i = 0; i < n_taps; i++) {
        x[i] = guarded_floats(n);
        for (int c = 0; c < n; c++) {
            x[i][c] = random_float(-2, 2);
            w[i * stride + c] = random_float(-1, 1);
        }
    }
    for (int c = 0; c < n; c++) bias[c] = random_float(-1, 1);
    const float *const *from = (const float *const *)x;
    k->conv(from, w, stride, n_taps, biased ? bias : NULL, n, with_silu, out);
    for (int c = 0; c < n; c++) {
        double sum = biased ? bias[c] : 0;
        for (int i = 0; i < n_taps; i++) sum += (double)w[i * stride + c] * x[i][c];
        worst = fmax(worst, fabs(out[c] - (with_silu ? silu(sum) : sum)));
    }
    CHECKF(worst <= 4e-6, "%s n %d, %d taps: %g", moe_isa_name(k->isa), n, n_taps, worst);
    for (int c = 0; c < n && n < 100; c++) {
        const float *one[MOE__CONV_TAPS];
        float alone;
        for (int i = 0; i < n_taps; i++) one[i] = x[i] + c;
        k->conv(one, w + c, stride, n_taps, biased ? bias + c : NULL, 1, with_silu, &alone);
        differ += memcmp(&alone, out + c, sizeof alone) != 0;
    }
    CHECKF(!differ, "%s n %d: other bits", moe_isa_name(k->isa), n);
    for (int i = 0; i < n_taps; i++) guarded_floats_free(x[i], n);
    guarded_floats_free(w, (int64_t)(n_taps - 1) * stride + n);
    guarded_floats_free(bias, n);
    guarded_floats_free(out, n);
}
TEST(convolutions_match_double_precision) {
    EACH_ISA(k)
    for (int at = 0; row_length(at); at++)
        check_conv(k, (int)row_length(at), 1 + (at + 3) % MOE__CONV_TAPS, at % 2, at / 2 % 2);
}

static void check_scan(const moe__kernels *k, int n, int n_state, int in_place) {
    const int stride = n + 2;
    const int64_t size = (int64_t)(n_state - 1) * stride + n;
    float *state = guarded_floats(size), *to = guarded_floats(size), *a = guarded_floats(size);
    float *dt = guarded_floats(n), *x = guarded_floats(n), *out = guarded_floats(n);
    float *b = guarded_floats(n_state), *c = guarded_floats(n_state);
    double worst = 0;
    int differ = 0;
    for (int64_t i = 0; i < size; i++) {
        state[i] = i % stride < n ? random_float(-2, 2) : NAN;
        a[i] = i % stride < n ? random_float(-3, 0) : NAN;
        to[i] = 12345;
    }
    for (int i = 0; i < n_state; i++) b[i] = random_float(-1, 1), c[i] = random_float(-1, 1);
    for (int i = 0; i < n; i++) dt[i] = random_float(0, 1), x[i] = random_float(-2, 2);
    k->scan(state, to, stride, n_state, n, dt, x, a, b, c, out);
    for (int j = 0; j < n; j++) {
        double sum = 0;
        float alone, column[40], rates[40], states[40];
        for (int i = 0; i < n_state; i++) {
            const double decay = exp((double)dt[j] * a[i * stride + j]);
            const double s = decay * state[i * stride + j] + (double)dt[j] * x[j] * b[i];
            worst = fmax(worst, fabs(s - to[i * stride + j]));
            sum += s * c[i];
        }
        worst = fmax(worst, fabs(sum - out[j]) / (1 + n_state / 4.0));
        for (int i = 0; i < n_state; i++) {
            column[i] = state[i * stride + j];
            rates[i] = a[i * stride + j];
        }
        k->scan(column, states, 1, n_state, 1, dt + j, x + j, rates, b, c, &alone);
        differ += memcmp(&alone, out + j, sizeof alone) != 0;
    }
    for (int64_t i = 0; i < size; i++) differ += i % stride >= n && to[i] != 12345;
    CHECKF(worst <= 2e-6 && !differ, "%s n %d of %d: %g, %d differ", moe_isa_name(k->isa), n,
           n_state, worst, differ);
    if (in_place) {
        float *again = guarded_floats(n);
        k->scan(state, state, stride, n_state, n, dt, x, a, b, c, again);
        for (int64_t i = 0; i < size; i++) differ += i % stride < n && state[i] != to[i];
        CHECK(!differ && !memcmp(out, again, (size_t)n * sizeof *out));
        guarded_floats_free(again, n);
    }
    guarded_floats_free(state, size);
    guarded_floats_free(to, size);
    guarded_floats_free(a, size);
    guarded_floats_free(dt, n);
    guarded_floats_free(x, n);
    guarded_floats_free(out, n);
    guarded_floats_free(b, n_state);
    guarded_floats_free(c, n_state);
}
TEST(scans_match_double_precision) {
    EACH_ISA(k)
    for (int n = 1; n <= 70; n++) check_scan(k, n, 1 + (n * 7 + 15) % 40, n % 2);
}

// ---- linear recurrences ----------------------------------------------------------------------

enum { CHUNK = MOE__CHUNK, TOKENS = 3 * CHUNK + 5 };

typedef struct head {
    int n_k, n_v, rows, beta; // rows: a decay per row
} head;
static const head heads[] = {{128, 128, 0, 1}, {128, 128, 1, 1}, {128, 64, 0, 0}, {64, 128, 1, 0},
                             {64, 64, 0, 1},   {32, 32, 1, 1},   {16, 16, 0, 1},  {24, 20, 1, 1},
                             {24, 20, 0, 0},   {5, 3, 0, 1},     {1, 1, 0, 1},    {3, 1, 1, 1},
                             {33, 70, 1, 0},   {130, 147, 0, 1}, {7, 200, 1, 1},  {2, 40, 0, 0}};
enum { N_HEADS = sizeof heads / sizeof *heads };

static const char *head_text(const head *h) {
    static char text[80];
    snprintf(text, sizeof text, "%d x %d, %s%s", h->n_k, h->n_v, h->rows ? "decays" : "decay",
             h->beta ? ", beta" : "");
    return text;
}

// Tokens of a head and its state; what is read and written ends at guard pages, and what the
// chunk has not come to is NaN.
typedef struct recurrence {
    head h;
    int n_decay;
    int64_t n_state, n_q, n_vs, n_decays, n_deltas, n_scratch, n_out;
    float *state, *q, *k, *v, *decay, *beta, *keys, *weights, *total, *deltas, *out, *scratch;
    moe__recur_args args;
} recurrence;

static float *filled(int64_t n, float low, float high) {
    float *p = guarded_floats(n);
    for (int64_t i = 0; i < n; i++) p[i] = low == high ? low : random_float(low, high);
    return p;
}
static void recurrence_begin(recurrence *r) { // a chunk
    for (int i = 0; i < r->n_decay; i++) r->total[i] = 1;
    for (int i = 0; i < CHUNK; i++) r->weights[i] = NAN;
    for (int i = 0; i < r->h.n_k * CHUNK; i++) r->keys[i] = NAN;
    for (int64_t i = 0; i < r->n_deltas; i++) r->deltas[i] = NAN;
    r->args.done = 0;
}
static void recurrence_open(recurrence *r, const head *h) {
    memset(r, 0, sizeof *r);
    r->h = *h;
    moe__recur_args *a = &r->args;
    a->n_k = h->n_k;
    a->n_v = h->n_v;
    a->n_decay = r->n_decay = h->rows ? h->n_k : 1;
    a->state_stride = h->n_v + 3;
    a->q_stride = a->k_stride = h->n_k + 1;
    a->v_stride = h->n_v + 5;
    a->decay_stride = r->n_decay + 2;
    a->beta_stride = 3;
    a->delta_stride = h->n_v + 1;
    a->out_stride = h->n_v + 2;
    r->n_state = (h->n_k - 1) * a->state_stride + h->n_v;
    r->n_q = (TOKENS - 1) * a->q_stride + h->n_k;
    r->n_vs = (TOKENS - 1) * a->v_stride + h->n_v;
    r->n_decays = (TOKENS - 1) * a->decay_stride + r->n_decay;
    r->n_deltas = (CHUNK - 1) * a->delta_stride + h->n_v;
    r->n_out = (TOKENS - 1) * a->out_stride + h->n_v;
    r->n_scratch = 2 * CHUNK * (h->n_k + h->n_v);
    r->state = filled(r->n_state, -1, 1);
    for (int64_t i = 0; i < r->n_state; i++)
        if (i % a->state_stride >= h->n_v) r->state[i] = 12345;
    r->q = filled(r->n_q, -1, 1);
    r->k = filled(r->n_q, -1, 1);
    r->v = filled(r->n_vs, -1, 1);
    r->decay = filled(r->n_decays, 0.6f, 1);
    r->beta = filled((TOKENS - 1) * 3 + 1, 0, 1);
    r->keys = filled(h->n_k * CHUNK, 0, 0);
    r->weights = filled(CHUNK, 0, 0);
    r->total = filled(r->n_decay, 0, 0);
    r->deltas = filled(r->n_deltas, 0, 0);
    r->out = filled(r->n_out, 12345, 12345);
    r->scratch = filled(r->n_scratch, NAN, NAN);
    for (int i = 0; i < TOKENS; i++) { // |k| = 1, |q| = 1, as layers make them
        double qq = 0, kk = 0;
        float *q = r->q + i * a->q_stride, *k = r->k + i * a->k_stride;
        for (int c = 0; c < h->n_k; c++) qq += (double)q[c] * q[c], kk += (double)k[c] * k[c];
        for (int c = 0; c < h->n_k; c++) {
            q[c] = (float)(q[c] / sqrt(qq));
            k[c] = (float)(k[c] / sqrt(kk));
        }
    }
    recurrence_begin(r);
}
static void recurrence_close(recurrence *r) {
    guarded_floats_free(r->state, r->n_state);
    guarded_floats_free(r->q, r->n_q);
    guarded_floats_free(r->k, r->n_q);
    guarded_floats_free(r->v, r->n_vs);
    guarded_floats_free(r->decay, r->n_decays);
    guarded_floats_free(r->beta, (TOKENS - 1) * 3 + 1);
    guarded_floats_free(r->keys, r->h.n_k * CHUNK);
    guarded_floats_free(r->weights, CHUNK);
    guarded_floats_free(r->total, r->n_decay);
    guarded_floats_free(r->deltas, r->n_deltas);
    guarded_floats_free(r->out, r->n_out);
    guarded_floats_free(r->scratch, r->n_scratch);
}
static void copy_floats(float *to, const float *from, int64_t n) {
    memcpy(to, from, (size_t)n * sizeof *to);
}
// The same tokens and state.
static void recurrence_copy(recurrence *to, const recurrence *from) {
    recurrence_open(to, &from->h);
    copy_floats(to->state, from->state, from->n_state);
    copy_floats(to->q, from->q, from->n_q);
    copy_floats(to->k, from->k, from->n_q);
    copy_floats(to->v, from->v, from->n_vs);
    copy_floats(to->decay, from->decay, from->n_decays);
    copy_floats(to->beta, from->beta, (TOKENS - 1) * 3 + 1);
}

// n tokens from `token` on through the chunk: columns from `at` on, so many.
static void recurrence_run(const moe__kernels *k, recurrence *r, int token, int n, int at,
                           int columns) {
    moe__recur_args *a = &r->args;
    a->n = n;
    a->n_v = columns;
    a->state = r->state + at;
    a->q = r->q + token * a->q_stride;
    a->k = r->k + token * a->k_stride;
    a->v = r->v + token * a->v_stride + at;
    a->decay = r->decay + token * a->decay_stride;
    a->beta = r->h.beta ? r->beta + token * a->beta_stride : NULL;
    a->keys = r->keys;
    a->weights = r->weights;
    a->total = r->total;
    a->deltas = r->deltas + at;
    a->out = r->out + token * a->out_stride + at;
    a->scratch = r->scratch + 2 * CHUNK * (r->h.n_v - columns);
    k->recur(a);
    a->done += n;
}
// A whole chunk, cut at random or into calls of `step` tokens; then the state behind it.
static void recurrence_chunk(const moe__kernels *k, recurrence *r, int token, int n, int step,
                             int at, int columns) {
    recurrence_begin(r);
    for (int i = 0, count; i < n; i += count) {
        count = step ? step : 1 + random_below(CHUNK);
        if (count > n - i) count = n - i;
        recurrence_run(k, r, token + i, count, at, columns);
    }
    if (n == CHUNK) k->fold(&r->args, r->state + at);
}

// The recurrence itself, in double precision: out of every token, and S behind them.
static void slow_recurrence(const recurrence *r, double *state, double *out) {
    const moe__recur_args *a = &r->args;
    const int n_k = r->h.n_k, n_v = r->h.n_v;
    for (int i = 0; i < n_k; i++)
        for (int c = 0; c < n_v; c++) state[i * n_v + c] = r->state[i * a->state_stride + c];
    for (int t = 0; t < TOKENS; t++) {
        const float *q = r->q + t * a->q_stride, *k = r->k + t * a->k_stride;
        const float *decay = r->decay + t * a->decay_stride;
        for (int c = 0; c < n_v; c++) {
            double seen = 0, sum = 0, delta = r->v[t * a->v_stride + c];
            for (int i = 0; i < n_k; i++) {
                state[i * n_v + c] *= decay[r->h.rows ? i : 0];
                seen += state[i * n_v + c] * k[i];
            }
            if (r->h.beta) delta = r->beta[t * a->beta_stride] * (delta - seen);
            for (int i = 0; i < n_k; i++) {
                state[i * n_v + c] += k[i] * delta;
                sum += state[i * n_v + c] * q[i];
            }
            out[t * n_v + c] = sum;
        }
    }
}

TEST(recurrences_match_double_precision_token_by_token) {
    EACH_ISA(k)
    for (int i = 0; i < N_HEADS; i++)
        for (int step = 0; step <= CHUNK; step += step < 2 ? 1 : 14) {
            const head *h = heads + i;
            recurrence r;
            recurrence_open(&r, h);
            double *state = (double *)malloc((size_t)(h->n_k * h->n_v) * sizeof *state);
            double *out = (double *)malloc((size_t)(TOKENS * h->n_v) * sizeof *out);
            double size = 0, worst = 0, worst_state = 0;
            int outside = 0;
            slow_recurrence(&r, state, out);
            for (int t = 0; t < TOKENS; t += CHUNK) {
                const int n = TOKENS - t < CHUNK ? TOKENS - t : CHUNK;
                recurrence_chunk(k, &r, t, n, step, 0, h->n_v);
            }
            for (int c = 0; c < TOKENS * h->n_v; c++) size = fmax(size, fabs(out[c]));
            for (int t = 0; t < TOKENS; t++)
                for (int c = 0; c < r.args.out_stride && (t + 1 < TOKENS || c < h->n_v); c++) {
                    const float x = r.out[t * r.args.out_stride + c];
                    if (c >= h->n_v)
                        outside += x != 12345;
                    else
                        worst = fmax(worst, x == x ? fabs(x - out[t * h->n_v + c]) : 1e9);
                }
            CHECKF(worst <= 1e-5 * size && !outside, "%s %s: %g of %g, %d outside",
                   moe_isa_name(k->isa), head_text(h), worst, size, outside);
            // the last, unfinished chunk, folded as if the tokens that lack had been nothing
            for (int j = TOKENS % CHUNK; j < CHUNK; j++) {
                r.weights[j] = 0;
                for (int row = 0; row < h->n_k; row++) r.keys[row * CHUNK + j] = 0;
                for (int c = 0; c < h->n_v; c++) r.deltas[j * r.args.delta_stride + c] = 0;
            }
            k->fold(&r.args, r.state);
            for (int64_t c = 0; c < r.n_state; c++) {
                const int64_t row = c / r.args.state_stride, column = c % r.args.state_stride;
                if (column >= h->n_v)
                    outside += r.state[c] != 12345;
                else
                    worst_state =
                        fmax(worst_state, fabs(r.state[c] - state[row * h->n_v + column]));
            }
            CHECKF(worst_state <= 1e-5 && !outside, "%s %s: state %g, %d outside",
                   moe_isa_name(k->isa), head_text(h), worst_state, outside);
            free(state);
            free(out);
            recurrence_close(&r);
        }
}

// Of all that a chunk leaves: 1 if columns at .. at + n - 1 or what belongs to all differ.
static int chunks_differ(const recurrence *a, const recurrence *b, int at, int n) {
    int differ = bits_differ(a->weights, b->weights, CHUNK) ||
                 bits_differ(a->total, b->total, a->n_decay) ||
                 bits_differ(a->keys, b->keys, a->h.n_k * CHUNK);
    for (int i = 0; i < CHUNK; i++) {
        const int64_t delta = i * a->args.delta_stride + at, out = i * a->args.out_stride + at;
        differ |= bits_differ(a->deltas + delta, b->deltas + delta, n) ||
                  bits_differ(a->out + out, b->out + out, n);
    }
    for (int i = 0; i < a->h.n_k; i++) {
        const int64_t row = i * a->args.state_stride + at;
        differ |= bits_differ(a->state + row, b->state + row, n);
    }
    return differ;
}

TEST(a_chunk_has_the_same_bits_however_it_is_cut) {
    static const int cuts[][4] = {{1, 15}, {15, 1}, {5, 3, 8}, {8, 8}, {2, 3, 4, 7}};
    EACH_ISA(k)
    for (int i = 0; i < N_HEADS; i++) {
        recurrence tokens, whole, r;
        recurrence_open(&tokens, heads + i);
        recurrence_copy(&whole, &tokens);
        recurrence_chunk(k, &whole, 0, CHUNK, CHUNK, 0, heads[i].n_v);
        for (int how = 0; how < 9; how++) { // by the table, one by one, at random
            recurrence_copy(&r, &tokens);
            if (how < 5) {
                for (int t = 0, j = 0; t < CHUNK; t += cuts[how][j++])
                    recurrence_run(k, &r, t, cuts[how][j], 0, heads[i].n_v);
                k->fold(&r.args, r.state);
            } else {
                recurrence_chunk(k, &r, 0, CHUNK, how == 5, 0, heads[i].n_v);
            }
            CHECKF(!chunks_differ(&r, &whole, 0, heads[i].n_v), "%s %s, cut %d",
                   moe_isa_name(k->isa), head_text(heads + i), how);
            recurrence_close(&r);
        }
        recurrence_close(&whole);
        recurrence_close(&tokens);
    }
}

TEST(columns_of_a_recurrence_have_the_same_bits_in_any_range) {
    EACH_ISA(k)
    for (int i = 0; i < N_HEADS; i++) {
        const int n_v = heads[i].n_v;
        recurrence tokens, whole, r;
        recurrence_open(&tokens, heads + i);
        recurrence_copy(&whole, &tokens);
        recurrence_chunk(k, &whole, 0, CHUNK, CHUNK, 0, n_v);
        for (int how = 0; how < 12; how++) {
            const int at = how < 2 ? how * (n_v / 2) : random_below(n_v);
            const int n = how < 2 ? n_v / 2 + how * (n_v % 2) : 1 + random_below(n_v - at);
            if (n == 0) continue;
            recurrence_copy(&r, &tokens);
            recurrence_chunk(k, &r, 0, CHUNK, how % 3, at, n);
            CHECKF(!chunks_differ(&r, &whole, at, n), "%s %s, columns %d .. %d",
                   moe_isa_name(k->isa), head_text(heads + i), at, at + n - 1);
            int outside = 0; // nothing else was written
            for (int c = 0; c < n_v; c++)
                outside += (c < at || c >= at + n) &&
                           (r.out[c] != 12345 || r.state[c] != tokens.state[c]);
            CHECK(!outside);
            recurrence_close(&r);
        }
        recurrence_close(&whole);
        recurrence_close(&tokens);
    }
}

static double largest_difference(const float *a, const float *b, int64_t n) {
    double most = 0;
    for (int64_t i = 0; i < n; i++) {
        const double e = fabs((double)a[i] - b[i]);
        if (a[i] == a[i] || b[i] == b[i]) most = fmax(most, e == e ? e : 1e9);
    }
    return most;
}

TEST(a_chunk_is_left_as_plain_c_leaves_it) {
    EACH_ISA(k)
    for (int i = 0; i < N_HEADS; i++)
        for (int n = 1; n <= CHUNK; n += 5) { // the last time with fold
            recurrence plain, r;
            recurrence_open(&plain, heads + i);
            recurrence_copy(&r, &plain);
            recurrence_chunk(&moe__kernels_scalar, &plain, 0, n, n, 0, heads[i].n_v);
            recurrence_chunk(k, &r, 0, n, n, 0, heads[i].n_v);
            double keys = 0;
            for (int row = 0; row < heads[i].n_k; row++)
                keys = fmax(keys, largest_difference(r.keys + row * CHUNK,
                                                     plain.keys + row * CHUNK, n));
            const double weights = largest_difference(r.weights, plain.weights, n);
            const double total = largest_difference(r.total, plain.total, r.n_decay);
            const double deltas = largest_difference(r.deltas, plain.deltas, r.n_deltas);
            const double out = largest_difference(r.out, plain.out, r.n_out);
            const double state = largest_difference(r.state, plain.state, r.n_state);
            CHECKF(keys < 1e-6 && weights < 1e-6 && total < 1e-6 && deltas < 1e-5 && out < 1e-5 &&
                       state < 1e-5 && r.weights[n - 1] == 1,
                   "%s %s: keys %g, weights %g, total %g, deltas %g, out %g, state %g",
                   moe_isa_name(k->isa), head_text(heads + i), keys, weights, total, deltas, out,
                   state);
            recurrence_close(&plain);
            recurrence_close(&r);
        }
}

TEST(a_state_is_folded_in_place_as_elsewhere) {
    EACH_ISA(k)
    for (int i = 0; i < N_HEADS; i++) {
        recurrence r;
        recurrence_open(&r, heads + i);
        float *to = filled(r.n_state, 12345, 12345);
        recurrence_begin(&r);
        recurrence_run(k, &r, 0, CHUNK, 0, heads[i].n_v);
        k->fold(&r.args, to);
        k->fold(&r.args, r.state);
        CHECKF(!bits_differ(to, r.state, (int)r.n_state), "%s %s", moe_isa_name(k->isa),
               head_text(heads + i));
        guarded_floats_free(to, r.n_state);
        recurrence_close(&r);
    }
}

// A NaN in a column of S or of a value; one in a key spoils all columns, from its token on.
TEST(a_nan_stays_in_its_column_and_comes_from_no_later_token) {
    EACH_ISA(k)
    for (int i = 0; i < N_HEADS; i++)
        for (int where = 0; where < 3; where++) {
            const int n_v = heads[i].n_v, bad = random_below(n_v), from = random_below(CHUNK);
            recurrence r;
            recurrence_open(&r, heads + i);
            if (where == 0) r.state[random_below(heads[i].n_k) * r.args.state_stride + bad] = NAN;
            if (where == 1) r.v[from * r.args.v_stride + bad] = NAN;
            if (where == 2) r.k[from * r.args.k_stride + random_below(heads[i].n_k)] = NAN;
            recurrence_chunk(k, &r, 0, CHUNK, 0, 0, n_v);
            int wrong = 0;
            for (int t = 0; t < CHUNK; t++)
                for (int c = 0; c < n_v; c++) {
                    const float x = r.out[t * r.args.out_stride + c];
                    const int spoilt = (where == 2 || c == bad) && (where == 0 || t >= from);
                    wrong += (x != x) != spoilt;
                }
            CHECKF(!wrong, "%s %s, NaN in %s: %d of %d wrong", moe_isa_name(k->isa),
                   head_text(heads + i), where == 0 ? "S" : where == 1 ? "a value" : "a key", wrong,
                   CHUNK * n_v);
            for (int c = 0; c < n_v && where < 2; c++) {
                int nans = 0;
                for (int row = 0; row < heads[i].n_k; row++)
                    nans += r.state[row * r.args.state_stride + c] !=
                            r.state[row * r.args.state_stride + c];
                CHECK(c == bad ? nans > 0 : nans == 0);
            }
            recurrence_close(&r);
        }
}

MAIN()
