// The vector kernels for decoding against plain C: dot products, activations to int8, dequantize.
// Weights, activations and results end where a page that cannot be read begins, so that a kernel
// which reads or writes past them crashes.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

#include "sheet.h"

#include <sys/mman.h>

// ---- guarded memory, the types ---------------------------------------------------------------

enum { AREA = 1 << 20 };
// `size` bytes, filled with 0xA5, that end at an unreadable page. slot: one of 4 areas.
static void *guarded(int slot, size_t size) {
    static unsigned char *area[4];
    if (size > AREA) abort();
    if (!area[slot]) {
        area[slot] = (unsigned char *)mmap(NULL, AREA + 65536, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (area[slot] == MAP_FAILED || mprotect(area[slot] + AREA, 65536, PROT_NONE)) abort();
    }
    memset(area[slot] + AREA - size, 0xA5, size);
    return area[slot] + AREA - size;
}

// Runs the statement for each vector instruction set that the machine has, as `k`.
#define EACH_ISA                                                                           \
    for (int isa = MOE_ISA_AVX2; isa <= LAST_ISA; isa++)                                   \
        if ((int)moe_isa_resolve((moe_isa)isa) == isa)                                     \
            for (const moe__kernels *k = moe__kernels_get((moe_isa)isa); k; k = NULL)
#define EACH_TYPE for (const moe__type *t = moe__types; t < moe__types + MOE__N_TYPES; t++)

static const moe__type_kernels *of(const moe__kernels *k, const moe__type *t) {
    return &k->type[t - moe__types];
}
static const moe__type_kernels *plain(const moe__type *t) {
    return of(moe__kernels_get(MOE_ISA_SCALAR), t);
}

enum { MAX_ROWS = 40, MAX_N = 4096 };

// Lengths of rows to try, ending with 0.
static const int *lengths(const moe__type *t) {
    static const int floats[] = {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100, 2048, 2880, 0};
    static const int by_32[] = {32, 64, 96, 224, 256, 288, 480, 1408, 2880, 0};
    static const int by_64[] = {64, 128, 192, 256, 320, 448, 512, 1408, 2880, 0};
    static const int by_256[] = {256, 512, 768, 4096, 0};
    return t->block == 1 ? floats : t->block == 32 ? by_32 : t->block == 64 ? by_64 : by_256;
}
// Numbers of rows to try: whole groups.
static const int *row_counts(const moe__type *t) {
    static const int ones[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 31, 32, 33, 0};
    static const int fours[] = {4, 8, 12, 16, 20, 36, 0}, eights[] = {8, 16, 24, 40, 0};
    return t->rows == 1 ? ones : t->rows == 4 ? fours : eights;
}

// Random rows in guarded memory. scale: of all blocks, 0: random.
static uint8_t *random_rows(const moe__type *t, int n_rows, int n, float scale) {
    size_t row_size = moe_type_row_size(t->id, n);
    uint8_t *rows = (uint8_t *)guarded(0, (size_t)n_rows * row_size);
    sheet_random(t, rows, row_size, n_rows, n, scale);
    return rows;
}

// Activations of a kind from floats, by plain C, in guarded memory.
static void *activations(moe__act_kind kind, const float *x, int n) {
    void *act = guarded(1, moe__act_size(kind, n));
    moe__kernels_get(MOE_ISA_SCALAR)->quantize[kind](x, n, act);
    return act;
}

// sum |weight * activation| of a row of plain floats
static double magnitude(const moe__type *t, const uint8_t *row, int n, const void *act) {
    static float w[MAX_N];
    double sum = 0;
    plain(t)->dequantize(row, n, w);
    for (int i = 0; i < n; i++) sum += fabs(sheet_act(t->act, act, i) * (double)w[i]);
    return sum;
}

// Vector kernel against plain C: the same bits, but for plain floats: there sums of integers
// are exact up to 2^24.
static int same(float a, float b) { return !memcmp(&a, &b, sizeof a) || (isnan(a) && isnan(b)); }
static void check_dot(const moe__kernels *k, const moe__type *t, const uint8_t *rows, int n_rows,
                      int n, const void *act, int exact, const char *what) {
    size_t row_size = moe_type_row_size(t->id, n);
    float expected[MAX_ROWS], *out = (float *)guarded(2, (size_t)n_rows * sizeof *out);
    plain(t)->dot(rows, row_size, n_rows, n, act, expected);
    of(k, t)->dot(rows, row_size, n_rows, n, act, out);
    for (int r = 0; r < n_rows; r++) {
        CHECKF(t->block == 1 || same(out[r], expected[r]),
               "%s %s %s n %d row %d of %d: %.9g, plain C says %.9g", moe_isa_name(k->isa), t->name,
               what, n, r, n_rows, (double)out[r], (double)expected[r]);
        if (t->block > 1) continue;
        double terms = magnitude(t, rows + (size_t)r * row_size, n, act);
        double bound = 1e-6 * terms + 1e-30;
        if (exact) bound = terms < 0x1p24 ? 0 : 3e-7 * terms;
        CHECKF(fabs((double)out[r] - expected[r]) <= bound,
               "%s %s %s n %d row %d of %d: %.9g, expected %.9g +- %g", moe_isa_name(k->isa),
               t->name, what, n, r, n_rows, (double)out[r], (double)expected[r], bound);
    }
}

// ---- dot -------------------------------------------------------------------------------------

TEST(dot_kernels_have_the_bits_of_plain_c) {
    static float x[MAX_N];
    EACH_ISA EACH_TYPE for (const int *n = lengths(t); *n; n++) {
        for (int i = 0; i < *n; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, *n);
        for (const int *rows = row_counts(t); *rows; rows++)
            check_dot(k, t, random_rows(t, *rows, *n, 0), *rows, *n, act, 0, "random");
    }
}

// Activations with scale 1 and given levels.
static void *exact_activations(moe__act_kind kind, int n, int (*level)(int)) {
    static float x[MAX_N];
    for (int i = 0; i < n; i++) x[i] = (float)level(i);
    // One level of +-127 per 32 values makes the quantizers choose scale 1.
    if (kind != MOE__ACT_F32)
        for (int i = 0; i < n; i += 32) x[i] = x[i] < 0 ? -127 : 127;
    return activations(kind, x, n);
}
static int level_random(int i) {
    (void)i;
    return (int)(random_u32() % 255) - 127;
}
static int level_high(int i) {
    (void)i;
    return 127;
}
static int level_low(int i) {
    (void)i;
    return -127;
}
static int level_mixed(int i) { return i & 1 ? -127 : 127; }
static int level_half(int i) { return i & 16 ? -127 : 127; }
static int level_eighths(int i) {
    return (i & 8 ? -1 : 1) * (120 + (int)(random_u32() % 8));
}

static int level_small(int i) { return i % 32 ? (int)(random_u32() % 3) - 1 : 0; }

TEST(dot_kernels_add_integers_exactly) {
    EACH_ISA EACH_TYPE for (int pass = 0; pass < 40; pass++) {
        int step = t->block == 1 ? 32 : t->block, n = step * (1 + pass % (step == 256 ? 3 : 19));
        const void *act = exact_activations(t->act, n, pass % 2 ? level_random : level_small);
        int n_rows = 5 / t->rows * t->rows + (t->rows > 4) * t->rows;
        check_dot(k, t, random_rows(t, n_rows, n, 1), n_rows, n, act, 1, "exact");
    }
}

// One block of extreme levels, scales and mins; sums reach their bounds.
TEST(dot_kernels_bear_extreme_levels_and_scales) {
    static int (*const levels[])(int) = {level_high, level_low, level_mixed, level_half};
    static const uint8_t fill[] = {0xFF, 0x00, 0x80, 0x7F, 0xF0, 0x0F, 0x08, 0x88};
    EACH_ISA EACH_TYPE for (int i = 0; i < 8 * 9 * 4 && t->block > 1; i++) {
        int f = i % 8, part = i / 8 % 9, l = i / 72;
        // All bytes the same, or a part of them something else: scales, if it hits them.
        const void *act = exact_activations(t->act, t->block, levels[l]);
        size_t size = (size_t)t->rows * moe_type_row_size(t->id, t->block);
        uint8_t *group = (uint8_t *)guarded(0, size);
        size_t a = random_u32() % size, b = random_u32() % size;
        memset(group, fill[f], size);
        if (part < 8 && a < b) memset(group + a, fill[part], b - a);
        if (part < 8 && a > b) memset(group, fill[part], b);
        sheet_put_all(t, group, size / (size_t)t->rows, t->rows, t->block, 1);
        check_dot(k, t, group, t->rows, t->block, act, 1, "extremes");
    }
}

// One block of random extreme bytes: the parts of a sum cancel each other or reach their bounds.
TEST(dot_kernels_bear_blocks_of_random_extremes) {
    static const uint8_t fill[] = {0xFF, 0x00, 0x80, 0x7F, 0xAA, 0x55};
    EACH_ISA EACH_TYPE for (int pass = 0; pass < 600 && t->block > 1; pass++) {
        int (*level)(int) = pass % 4 == 0 ? level_random : pass & 1 ? level_mixed : level_eighths;
        const void *act = exact_activations(t->act, t->block, level);
        size_t size = (size_t)t->rows * moe_type_row_size(t->id, t->block);
        uint8_t *group = (uint8_t *)guarded(0, size);
        for (size_t i = 0; i < size; i++) group[i] = fill[random_u32() % 6];
        sheet_put_all(t, group, size / (size_t)t->rows, t->rows, t->block, 1);
        check_dot(k, t, group, t->rows, t->block, act, 1, "one block");
    }
}

// A row's result has the same bits whatever rows are computed with it.
TEST(a_rows_dot_does_not_depend_on_other_rows) {
    static float x[MAX_N];
    EACH_ISA EACH_TYPE {
        int n = t->block == 256 ? 768 : t->block == 1 ? 75 : t->block * 15;
        int n_rows = t->rows == 1 ? 9 : 3 * t->rows;
        size_t row_size = moe_type_row_size(t->id, n);
        for (int i = 0; i < n; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, n);
        const uint8_t *rows = random_rows(t, n_rows, n, 0);
        float all[MAX_ROWS], out[MAX_ROWS + 1];
        of(k, t)->dot(rows, row_size, n_rows, n, act, all);
        for (int first = 0; first < n_rows; first += t->rows)
            for (int count = t->rows; first + count <= n_rows; count += t->rows) {
                out[count] = 1234;
                of(k, t)->dot(rows + (size_t)first * row_size, row_size, count, n, act, out);
                CHECKF(!memcmp(out, all + first, (size_t)count * sizeof *out), "%s %s rows %d + %d",
                       moe_isa_name(k->isa), t->name, first, count);
                CHECK(out[count] == 1234);
            }
    }
}

// NaN and infinity in a scale (or a weight) spoil their own row, those in activations every row.
TEST(nan_in_a_weight_spoils_its_row_in_activations_all) {
    static float x[MAX_N];
    static const float values[] = {NAN, INFINITY, -INFINITY};
    EACH_ISA EACH_TYPE for (int v = 0; v < 3; v++) {
        int n = t->block == 256 ? 512 : 320, n_rows = t->rows == 1 ? 6 : 2 * t->rows;
        size_t row_size = moe_type_row_size(t->id, n);
        for (int i = 0; i < n; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, n);
        uint8_t *rows = random_rows(t, n_rows, n, 0);
        float before[MAX_ROWS], after[MAX_ROWS];
        of(k, t)->dot(rows, row_size, n_rows, n, act, before);
        int bad = sheet_may_be_nan(t) ? 3 : -1;
        if (bad >= 0) // the last block of row 3
            sheet_put(t, rows + (size_t)(bad - bad % t->rows) * row_size, bad % t->rows,
                      n / t->block - 1, values[v], values[v]);
        of(k, t)->dot(rows, row_size, n_rows, n, act, after);
        for (int r = 0; r < n_rows; r++)
            CHECKF(r == bad ? !isfinite(after[r]) && (v || isnan(after[r])) : after[r] == before[r],
                   "%s %s row %d: %g", moe_isa_name(k->isa), t->name, r, (double)after[r]);
        x[n - 1] = values[v];
        rows = random_rows(t, n_rows, n, 0);
        act = activations(t->act, x, n);
        of(k, t)->dot(rows, row_size, n_rows, n, act, after);
        for (int r = 0; r < n_rows; r++)
            CHECKF(t->block > 1 || !v ? isnan(after[r]) : !isfinite(after[r]), "%s %s row %d: %g",
                   moe_isa_name(k->isa), t->name, r, (double)after[r]);
    }
}

// Weights of 0 count as 0, however large their scale: the offset of unsigned levels is taken out of
// exact integers. One activation meets a weight of another block, all others the zeros.
TEST(weights_of_0_count_as_0_whatever_their_scale) {
    static const struct {
        moe_type type;
        int size, data, bytes, scale, more; // of a block; its zeros from byte `data` on
        uint8_t zero, more_zero;            // more: bytes behind them, of another value
        float one;                          // the weight that scale 1 gives the first level + 1
    } cases[] = {{MOE_TYPE_Q4_0, 18, 2, 16, 0, 0, 0x88, 0, 1},
                 {MOE_TYPE_Q8_0, 34, 2, 32, 0, 0, 0, 0, 1},
                 {MOE_TYPE_Q5_0, 22, 2, 4, 0, 16, 0xFF, 0, 1},
                 {MOE_TYPE_MXFP4, 17, 1, 16, 0, 0, 0, 0, 0.5f},
                 {MOE_TYPE_Q6_K, 210, 0, 128, 208, 64, 0, 0xAA, 1}};
    EACH_ISA for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const moe__type *t = moe__type_find(cases[i].type);
        const int n = 2 * 256, size = cases[i].size, n_blocks = n / t->block;
        static float x[2 * 256];
        uint8_t *row = (uint8_t *)guarded(0, (size_t)(size * n_blocks));
        for (int b = 0; b < n_blocks; b++) {
            uint8_t *p = row + size * b;
            memset(p + cases[i].data, cases[i].zero, (size_t)cases[i].bytes);
            memset(p + cases[i].data + cases[i].bytes, cases[i].more_zero, (size_t)cases[i].more);
            if (t->id == MOE_TYPE_Q6_K) memset(p + 192, b ? 1 : 127, 16);
            if (t->id == MOE_TYPE_MXFP4) p[0] = b == n_blocks - 1 ? 127 : 254;
            else moe__store_u16(p + cases[i].scale, b == n_blocks - 1 ? 0x3C00 : 0x7BFF);
        }
        // the first weight of the last block is one level more
        uint8_t *last = row + size * (n_blocks - 1);
        if (t->id == MOE_TYPE_Q5_0) last[6] |= 1;
        else last[cases[i].data] = (uint8_t)(last[cases[i].data] + 1);
        for (int e = 0; e < n; e++) x[e] = (float)(e % 7 * 10 + 1);
        x[n - t->block] = 56, x[0] = 127, x[n - 1] = 127;
        for (int e = 0; e < n; e += 32) x[e + 31] = 127; // makes all scales of activations 1
        const void *act = activations(t->act, x, n);
        float out = 0, tile[4] = {0};
        static MOE__ALIGNED(64) uint8_t pack[MOE__PACK_SIZE];
        const void *acts[3] = {act, act, act};
        of(k, t)->dot(row, (size_t)(size * n_blocks), 1, n, act, &out);
        of(k, t)->tile(row, (size_t)(size * n_blocks), 1, n, acts, 3, tile, 1, pack, NULL, 0);
        const float want = 56 * cases[i].one;
        CHECKF(out == want && tile[0] == want && tile[2] == want, "%s %s: %g and %g, not %g",
               moe_isa_name(k->isa), t->name, (double)out, (double)tile[0], (double)want);
    }
}

// Groups of rows that do not lie one right after another, at odd addresses.
TEST(rows_may_lie_apart_and_at_odd_addresses) {
    static float x[MAX_N];
    EACH_ISA EACH_TYPE {
        enum { N = 512, GROUPS = 5 };
        size_t R = (size_t)t->rows, row_size = moe_type_row_size(t->id, N), apart = row_size + 5;
        int n_rows = GROUPS * t->rows;
        for (int i = 0; i < N; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, N);
        const uint8_t *rows = random_rows(t, n_rows, N, 0);
        uint8_t *spread = (uint8_t *)guarded(3, R * ((GROUPS - 1) * apart + row_size));
        float expected[MAX_ROWS], out[MAX_ROWS];
        for (size_t g = 0; g < GROUPS; g++)
            memcpy(spread + g * R * apart, rows + g * R * row_size, R * row_size);
        of(k, t)->dot(rows, row_size, n_rows, N, act, expected);
        of(k, t)->dot(spread, apart, n_rows, N, act, out);
        CHECKF(!memcmp(out, expected, (size_t)n_rows * sizeof *out), "%s %s", moe_isa_name(k->isa),
               t->name);
    }
}

// ---- activations -----------------------------------------------------------------------------

static void check_quantize(const moe__kernels *k, int kind, const float *values, int n,
                           const char *what) {
    size_t size = moe__act_size((moe__act_kind)kind, n);
    float *x = (float *)guarded(0, (size_t)n * sizeof *x);
    void *expected = guarded(1, size), *out = guarded(2, size);
    memcpy(x, values, (size_t)n * sizeof *x);
    moe__kernels_get(MOE_ISA_SCALAR)->quantize[kind](x, n, expected);
    k->quantize[kind](x, n, out);
    CHECKF(!memcmp(out, expected, size), "%s kind %d, n %d, %s", moe_isa_name(k->isa), kind, n,
           what);
}

TEST(quantizing_activations_has_the_bits_of_plain_c) {
    static float x[MAX_N];
    EACH_ISA for (int kind = 0; kind < MOE__ACT_KINDS; kind++) {
        int step = kind == MOE__ACT_Q32 ? 32 : kind == MOE__ACT_Q256 ? 256 : 1;
        for (int pass = 0; pass < 300; pass++) {
            int n = step * (1 + (int)(random_u32() % 16));
            float scale = ldexpf(1, (int)(random_u32() % 280) - 150);
            for (int i = 0; i < n; i++) x[i] = random_f32() * scale;
            check_quantize(k, kind, x, n, "random");
            // Halves: x * (127 / peak) = i + 0.5 exactly.
            for (int i = 0; i < n; i++) x[i] = (float)((int)(random_u32() % 254) - 127) + 0.5f;
            for (int i = 0; i < n; i += 32) x[i] = pass & 1 ? 127 : -127;
            check_quantize(k, kind, x, n, "halves");
            for (int i = 0; i < n; i++) x[i] = 0;
            if (pass & 1) x[random_u32() % (uint32_t)n] = random_f32();
            check_quantize(k, kind, x, n, "zeros");
            for (int i = 0; i < n; i++) x[i] = moe__f32_from_bits(random_u32());
            check_quantize(k, kind, x, n, "random bits");
            for (int i = 0; i < n; i++) x[i] = random_f32();
            uint32_t sign = random_u32() & 0x80000000;
            static const uint32_t special[] = {0x7F800000, 0x7FC00000, 0x7F800001, 0x7F7FFFFF,
                                               0x00000001, 0x007FFFFF, 0x037FFFFF, 0x03800000};
            uint32_t bits = special[pass % 8];
            if (bits < 0x7F000000)
                for (int i = 0; i < n; i++) x[i] = 0;
            x[random_u32() % (uint32_t)n] = moe__f32_from_bits(bits | sign);
            check_quantize(k, kind, x, n, "special");
        }
    }
}

// ---- dequantize ------------------------------------------------------------------------------

TEST(dequantizing_has_the_bits_of_plain_c) {
    static float expected[MOE__GROUP_ROWS * MAX_N];
    EACH_ISA EACH_TYPE for (const int *n = lengths(t); *n; n++)
        for (int pass = 0; pass < 6; pass++) {
            static const float scales[] = {0, -5.9604645e-8f, 65504, 0, 0, 0};
            size_t size = (size_t)t->rows * moe_type_row_size(t->id, *n), odd = (size_t)(pass == 4);
            uint8_t *group = random_rows(t, t->rows, *n, scales[pass]);
            float *out = (float *)guarded(2, (size_t)(t->rows * *n) * sizeof *out);
            if (pass == 3) // any bits, NaN and infinity among them
                for (size_t i = 0; i < size; i++) group[i] = (uint8_t)random_u32();
            if (pass == 5) memset(group, 0xFF, size);
            plain(t)->dequantize(group, *n, expected);
            memmove(group - odd, group, size);
            of(k, t)->dequantize(group - odd, *n, out);
            for (int i = 0; i < t->rows * *n; i++)
                CHECKF(moe__f32_bits(out[i]) == moe__f32_bits(expected[i]) ||
                           (isnan(out[i]) && isnan(expected[i])),
                       "%s %s n %d [%d]: %.9g, expected %.9g", moe_isa_name(k->isa), t->name, *n, i,
                       (double)out[i], (double)expected[i]);
        }
}

// Every f16 and every bf16 number.
TEST(every_f16_and_bf16_number_is_dequantized) {
    EACH_ISA EACH_TYPE {
        const int type = (int)(t - moe__types);
        if (t->id != MOE_TYPE_F16 && t->id != MOE_TYPE_BF16) continue;
        static uint16_t row[65536];
        static float out[65536], expected[65536];
        int wrong = 0;
        for (int i = 0; i < 65536; i++) row[i] = (uint16_t)i;
        moe__kernels_get(MOE_ISA_SCALAR)->type[type].dequantize((uint8_t *)row, 65536, expected);
        k->type[type].dequantize((uint8_t *)row, 65536, out);
        for (int i = 0; i < 65536; i++)
            wrong += isnan(expected[i]) ? !isnan(out[i])
                                        : moe__f32_bits(out[i]) != moe__f32_bits(expected[i]);
        CHECK(wrong == 0);
    }
}

MAIN()
