/* The vector kernels for decoding against plain C: dot products, activations to int8, dequantize.
 * Weights, activations and results end where a page that cannot be read begins, so that a kernel
 * which reads or writes past them crashes. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

#include <sys/mman.h>

/* ---- random numbers, guarded memory, the types ----------------------------------------------- */

static uint64_t seed = 1;
static uint32_t random_u32(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed * 0x2545F4914F6CDD1D >> 32);
}
static float random_f32(void) { return (float)((double)random_u32() / 2147483648.0 - 1); }

enum { AREA = 1 << 20 };
/* `size` bytes, filled with 0xA5, that end at an unreadable page. slot: one of 4 areas. */
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

typedef struct type_info {
    const char *name;
    int index, block, size;
    moe__act_kind act;
} type_info;
static const type_info types[] = {
#define TYPE_INFO(NAME, name, block, size, act) \
    {#NAME, MOE__INDEX_##NAME, block, size, MOE__ACT_##act},
    MOE__TYPES(TYPE_INFO)};

/* Runs the statement for each vector instruction set that the machine has, as `k`. */
#define EACH_ISA                                                                           \
    for (int isa = MOE_ISA_AVX2; isa <= MOE_ISA_AVX512; isa++)                             \
        if ((int)moe_isa_resolve((moe_isa)isa) == isa)                                     \
            for (const moe__kernels *k = moe__kernels_get((moe_isa)isa); k; k = NULL)
#define EACH_TYPE for (const type_info *t = types; t < types + MOE__N_TYPES; t++)

static const moe__type_kernels *plain(const type_info *t) {
    return &moe__kernels_get(MOE_ISA_SCALAR)->type[t->index];
}

/* Lengths of rows to try, ending with 0. */
static const int *lengths(const type_info *t) {
    static const int floats[] = {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100, 2048, 2880, 0};
    static const int by_32[] = {32, 64, 96, 224, 256, 288, 480, 512, 768, 1408, 2048, 2880, 0};
    static const int by_256[] = {256, 512, 768, 2048, 4096, 0};
    return t->block == 1 ? floats : t->block == 32 ? by_32 : by_256;
}

/* Where the f16 scales of a block lie; second: -1 if there is only one. */
static void scale_offsets(const type_info *t, int *first, int *second) {
    *first = t->index == MOE__INDEX_Q6_K ? 208 : 0;
    *second = t->index == MOE__INDEX_Q4_K || t->index == MOE__INDEX_Q5_K ? 2 : -1;
}

/* Writes the f16 scales of every block: `bits`, or if it is 0, random ones below 1. */
static void set_scales(const type_info *t, uint8_t *rows, size_t size, uint16_t bits) {
    int first, second;
    scale_offsets(t, &first, &second);
    for (uint8_t *b = rows; b + t->size <= rows + size; b += t->size) {
        moe__store_u16(b + first, bits ? bits : moe__f32_to_f16(random_f32()));
        if (second >= 0) moe__store_u16(b + second, bits ? bits : moe__f32_to_f16(random_f32()));
    }
}

/* Random rows in guarded memory. scale as above. */
static uint8_t *random_rows(const type_info *t, int n_rows, int n, uint16_t scale) {
    size_t size = (size_t)n_rows * (size_t)(n / t->block * t->size);
    uint8_t *rows = (uint8_t *)guarded(0, size);
    for (size_t i = 0; i < size; i++) rows[i] = (uint8_t)random_u32();
    if (t->block > 1) {
        set_scales(t, rows, size, scale);
        return rows;
    }
    for (size_t i = 0; i < size / (size_t)t->size; i++) {
        float x = scale ? (float)((int)(random_u32() % 201) - 100) : random_f32();
        if (t->index == MOE__INDEX_F32) memcpy(rows + 4 * i, &x, 4);
        if (t->index == MOE__INDEX_F16) moe__store_u16(rows + 2 * i, moe__f32_to_f16(x));
        if (t->index == MOE__INDEX_BF16) moe__store_u16(rows + 2 * i, moe__f32_to_bf16(x));
    }
    return rows;
}

/* Activations of a kind from floats, by plain C, in guarded memory. */
static void *activations(moe__act_kind kind, const float *x, int n) {
    void *act = guarded(1, moe__act_size(kind, n));
    moe__kernels_get(MOE_ISA_SCALAR)->quantize[kind](x, n, act);
    return act;
}

/* Value i of activations. */
static double act_value(moe__act_kind kind, const void *act, int i) {
    if (kind == MOE__ACT_Q32) {
        const moe__act32 *a = (const moe__act32 *)act + i / 256;
        return (double)a->d[i % 256 / 32] * a->q[i % 256];
    }
    if (kind == MOE__ACT_Q256) {
        const moe__act256 *a = (const moe__act256 *)act + i / 256;
        return (double)a->d * a->q[i % 256];
    }
    return ((const float *)act)[i];
}

/* sum |terms| of a row: |weight * activation|, plus |min * activation| where mins exist. */
static double magnitude(const type_info *t, const uint8_t *row, int n, const void *act) {
    static float w[4096];
    double sum = 0;
    plain(t)->dequantize(row, n, w);
    for (int i = 0; i < n; i++) {
        double a = fabs(act_value(t->act, act, i)), min = 0;
        int first, second;
        scale_offsets(t, &first, &second);
        if (second >= 0) {
            const uint8_t *block = row + i / 256 * t->size;
            uint8_t scales[8], mins[8];
            moe__types_scales(block + 4, scales, mins);
            min = (double)moe__f16_to_f32(moe__load_u16(block + 2)) * mins[i % 256 / 32];
        }
        sum += (fabs(w[i] + min) + fabs(min)) * a;
    }
    return sum;
}

/* ---- dot ------------------------------------------------------------------------------------- */

enum { MAX_ROWS = 9, MAX_N = 4096 };

TEST(dot_general) {
    static float x[MAX_N];
    EACH_ISA EACH_TYPE for (const int *n = lengths(t); *n; n++) {
        for (int i = 0; i < *n; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, *n);
        size_t row_size = (size_t)(*n / t->block * t->size);
        for (int n_rows = 1; n_rows <= MAX_ROWS; n_rows++) {
            const uint8_t *rows = random_rows(t, n_rows, *n, 0);
            float expected[MAX_ROWS], *out = (float *)guarded(2, (size_t)n_rows * sizeof *out);
            plain(t)->dot(rows, row_size, n_rows, *n, act, expected);
            k->type[t->index].dot(rows, row_size, n_rows, *n, act, out);
            for (int r = 0; r < n_rows; r++) {
                double bound = 1e-6 * magnitude(t, rows + (size_t)r * row_size, *n, act) + 1e-30;
                CHECKF(fabs((double)out[r] - expected[r]) <= bound,
                       "%s %s n %d row %d of %d: %.9g, expected %.9g +- %g", moe_isa_name(k->isa),
                       t->name, *n, r, n_rows, (double)out[r], (double)expected[r], bound);
            }
        }
    }
}

/* Activations with scale 1 and given levels. */
static void *exact_activations(moe__act_kind kind, int n, int (*level)(int)) {
    static float x[MAX_N];
    for (int i = 0; i < n; i++) x[i] = (float)level(i);
    /* One level of +-127 per 32 values makes the quantizers choose scale 1. */
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

/* With all scales 1 every sum is an integer below 2^24, so results have no rounding at all. */
TEST(dot_exact) {
    EACH_ISA EACH_TYPE for (int pass = 0; pass < 40; pass++) {
        int n = t->block == 256 ? 256 * (1 + pass % 3) : 32 * (1 + pass % 19);
        size_t row_size = (size_t)(n / t->block * t->size);
        const void *act = exact_activations(t->act, n, level_random);
        const uint8_t *rows = random_rows(t, 5, n, 0x3C00);
        float expected[5], *out = (float *)guarded(2, sizeof expected);
        plain(t)->dot(rows, row_size, 5, n, act, expected);
        k->type[t->index].dot(rows, row_size, 5, n, act, out);
        for (int r = 0; r < 5; r++)
            CHECKF(out[r] == expected[r], "%s %s n %d row %d: %.9g, expected %.9g",
                   moe_isa_name(k->isa), t->name, n, r, (double)out[r], (double)expected[r]);
    }
}

/* One block of extreme levels, scales and mins; sums reach their bounds. */
TEST(dot_extremes) {
    static int (*const levels[])(int) = {level_high, level_low, level_mixed, level_half};
    static const uint8_t fill[] = {0xFF, 0x00, 0x80, 0x7F, 0xF0, 0x0F, 0x08, 0x88};
    EACH_ISA EACH_TYPE for (int f = 0; f < 8 && t->block > 1; f++) for (int s = 0; s < 9; s++)
        for (int l = 0; l < 4; l++) {
            /* Scales of K-quants: as filled, or all bytes something else. */
            const void *act = exact_activations(t->act, t->block, levels[l]);
            uint8_t *row = (uint8_t *)guarded(0, (size_t)t->size);
            float expected, *out = (float *)guarded(2, sizeof *out);
            memset(row, fill[f], (size_t)t->size);
            if (s < 8 && t->block == 256) {
                if (t->index == MOE__INDEX_Q6_K)
                    memset(row + 192, fill[s], 16);
                else
                    memset(row + 4, fill[s], 12);
            }
            set_scales(t, row, (size_t)t->size, 0x3C00);
            plain(t)->dot(row, (size_t)t->size, 1, t->block, act, &expected);
            k->type[t->index].dot(row, (size_t)t->size, 1, t->block, act, out);
            double error = fabs((double)*out - expected);
            CHECKF(fabsf(expected) < 16777216 ? error == 0 : error <= 2e-7 * fabs(expected),
                   "%s %s fill %02X scales %02X: %.9g, expected %.9g", moe_isa_name(k->isa),
                   t->name, fill[f], fill[s % 8], (double)*out, (double)expected);
        }
}

/* One block of random extreme bytes: the parts of a sum cancel each other or reach their bounds. */
TEST(dot_one_block) {
    static const uint8_t fill[] = {0xFF, 0x00, 0x80, 0x7F, 0xAA, 0x55};
    EACH_ISA EACH_TYPE for (int pass = 0; pass < 1000 && t->block > 1; pass++) {
        int (*level)(int) = pass % 4 == 0 ? level_random : pass & 1 ? level_mixed : level_eighths;
        const void *act = exact_activations(t->act, t->block, level);
        uint8_t *row = (uint8_t *)guarded(0, (size_t)t->size);
        float expected, *out = (float *)guarded(2, sizeof *out);
        for (int i = 0; i < t->size; i++) row[i] = fill[random_u32() % 6];
        if (t->index == MOE__INDEX_Q6_K && pass & 4) { /* levels 33 - 32, scales 127 */
            memset(row, 0x11, 128);
            memset(row + 128, 0xAA, 64);
            memset(row + 192, 127, 16);
        }
        set_scales(t, row, (size_t)t->size, 0x3C00);
        plain(t)->dot(row, (size_t)t->size, 1, t->block, act, &expected);
        k->type[t->index].dot(row, (size_t)t->size, 1, t->block, act, out);
        double error = fabs((double)*out - expected);
        CHECKF(fabsf(expected) < 16777216 ? error == 0 : error <= 2e-7 * fabs(expected),
               "%s %s: %.9g, expected %.9g", moe_isa_name(k->isa), t->name, (double)*out,
               (double)expected);
    }
}

/* A row's result has the same bits whatever rows are computed with it. */
TEST(dot_groups) {
    static float x[MAX_N];
    EACH_ISA EACH_TYPE {
        int n = t->block == 256 ? 768 : t->block == 32 ? 480 : 75;
        size_t row_size = (size_t)(n / t->block * t->size);
        for (int i = 0; i < n; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, n);
        const uint8_t *rows = random_rows(t, MAX_ROWS, n, 0);
        float all[MAX_ROWS], out[MAX_ROWS + 1];
        k->type[t->index].dot(rows, row_size, MAX_ROWS, n, act, all);
        for (int first = 0; first < MAX_ROWS; first++)
            for (int count = 1; first + count <= MAX_ROWS; count++) {
                out[count] = 1234;
                k->type[t->index].dot(rows + (size_t)first * row_size, row_size, count, n, act,
                                      out);
                CHECKF(!memcmp(out, all + first, (size_t)count * sizeof *out), "%s %s rows %d + %d",
                       moe_isa_name(k->isa), t->name, first, count);
                CHECK(out[count] == 1234);
            }
    }
}

/* NaN and infinity in a scale (or a weight) spoil their own row, those in activations every row. */
TEST(dot_not_finite) {
    static float x[MAX_N];
    EACH_ISA EACH_TYPE for (int infinite = 0; infinite < 2; infinite++) {
        int n = t->block == 256 ? 512 : 320, first, second;
        size_t row_size = (size_t)(n / t->block * t->size);
        for (int i = 0; i < n; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, n);
        uint8_t *rows = random_rows(t, 6, n, 0), *block = rows + 3 * row_size;
        float before[6], after[6];
        scale_offsets(t, &first, &second);
        k->type[t->index].dot(rows, row_size, 6, n, act, before);
        block += (size_t)(n / t->block - 1) * (size_t)t->size; /* the last of row 3 */
        if (t->index == MOE__INDEX_F32)
            memcpy(block, infinite ? "\0\0\x80\x7f" : "\0\0\xc0\x7f", 4);
        else if (t->index == MOE__INDEX_BF16)
            moe__store_u16(block, infinite ? 0x7F80 : 0x7FC0);
        else
            moe__store_u16(block + first, infinite ? 0x7C00 : 0x7E00);
        k->type[t->index].dot(rows, row_size, 6, n, act, after);
        for (int r = 0; r < 6; r++)
            CHECKF(r == 3 ? !isfinite(after[r]) && (infinite || isnan(after[r]))
                          : after[r] == before[r],
                   "%s %s row %d: %g", moe_isa_name(k->isa), t->name, r, (double)after[r]);
        x[n - 1] = infinite ? INFINITY : NAN;
        rows = random_rows(t, 6, n, 0);
        act = activations(t->act, x, n);
        k->type[t->index].dot(rows, row_size, 6, n, act, after);
        for (int r = 0; r < 6; r++)
            CHECKF(t->block > 1 || !infinite ? isnan(after[r]) : !isfinite(after[r]),
                   "%s %s row %d: %g", moe_isa_name(k->isa), t->name, r, (double)after[r]);
    }
}

/* Rows that do not lie one right after another, at odd addresses. */
TEST(dot_row_size) {
    static float x[MAX_N];
    EACH_ISA EACH_TYPE {
        int n = 512;
        size_t row_size = (size_t)(n / t->block * t->size), apart = row_size + 5;
        for (int i = 0; i < n; i++) x[i] = random_f32();
        const void *act = activations(t->act, x, n);
        const uint8_t *rows = random_rows(t, 7, n, 0);
        uint8_t *spread = (uint8_t *)guarded(3, 6 * apart + row_size);
        float expected[7], out[7];
        for (size_t r = 0; r < 7; r++) memcpy(spread + r * apart, rows + r * row_size, row_size);
        k->type[t->index].dot(rows, row_size, 7, n, act, expected);
        k->type[t->index].dot(spread, apart, 7, n, act, out);
        CHECKF(!memcmp(out, expected, sizeof out), "%s %s", moe_isa_name(k->isa), t->name);
    }
}

/* ---- activations ----------------------------------------------------------------------------- */

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

TEST(quantize_bitwise) {
    static float x[MAX_N];
    EACH_ISA for (int kind = 0; kind < MOE__ACT_KINDS; kind++) {
        int step = kind == MOE__ACT_Q32 ? 32 : kind == MOE__ACT_Q256 ? 256 : 1;
        for (int pass = 0; pass < 300; pass++) {
            int n = step * (1 + (int)(random_u32() % 16));
            float scale = ldexpf(1, (int)(random_u32() % 280) - 150);
            for (int i = 0; i < n; i++) x[i] = random_f32() * scale;
            check_quantize(k, kind, x, n, "random");
            /* Halves: x * (127 / peak) = i + 0.5 exactly. */
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

/* ---- dequantize ------------------------------------------------------------------------------ */

TEST(dequantize_bitwise) {
    static float expected[MAX_N];
    EACH_ISA EACH_TYPE for (const int *n = lengths(t); *n; n++)
        for (int pass = 0; pass < 4; pass++) {
            size_t size = (size_t)(*n / t->block * t->size);
            uint8_t *row = random_rows(t, 1, *n, pass == 1 ? 0x8001 : pass == 2 ? 0x7BFF : 0);
            float *out = (float *)guarded(2, (size_t)*n * sizeof *out);
            if (pass == 3) /* any bits, NaN and infinity among them */
                for (size_t i = 0; i < size; i++) row[i] = (uint8_t)random_u32();
            plain(t)->dequantize(row, *n, expected);
            k->type[t->index].dequantize(row, *n, out);
            for (int i = 0; i < *n; i++)
                CHECKF(moe__f32_bits(out[i]) == moe__f32_bits(expected[i]) ||
                           (isnan(out[i]) && isnan(expected[i])),
                       "%s %s n %d [%d]: %.9g, expected %.9g", moe_isa_name(k->isa), t->name, *n, i,
                       (double)out[i], (double)expected[i]);
        }
}

/* Every f16 and every bf16 number. */
TEST(dequantize_all_halves) {
    EACH_ISA for (int type = MOE__INDEX_F16; type <= MOE__INDEX_BF16; type++) {
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
