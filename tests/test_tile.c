/* Tile kernels: every instruction set and type against double precision. Weights end at a page that
 * may not be touched, so does the last token; out is surrounded by canaries; the scratch starts as
 * garbage. The reference decodes weights by its own code, from the format's description. */
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "test.h"

enum { ROWS = 32, TOKENS = 64, CANARY = 0x7FC0BEEF };

static const struct {
    const char *name;
    int block, bytes, act; /* act: 0 f32, 1 per 32, 2 per 256 */
} types[] = {{"F32", 1, 4, 0},      {"F16", 1, 2, 0},      {"BF16", 1, 2, 0},
             {"Q4_0", 32, 18, 1},   {"Q8_0", 32, 34, 1},   {"Q4_K", 256, 144, 2},
             {"Q5_K", 256, 176, 2}, {"Q6_K", 256, 210, 2}};

static uint64_t random_state = 1;
static uint32_t random_u32(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) ^ (uint32_t)(random_state >> 12);
}
static float random_float(void) { return (float)(int32_t)random_u32() / 2147483648.0f; }

/* ---- memory that ends (and begins) at a wall ------------------------------------------------- */

typedef struct {
    uint8_t *map, *data;
    size_t map_size;
} walled;

static walled walled_new(size_t size) {
    walled w;
    size_t pages = (size + 4095) / 4096 * 4096;
    w.map_size = pages + 8192;
    int fd = open("/dev/zero", O_RDWR);
    w.map = (uint8_t *)mmap(NULL, w.map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    close(fd);
    if (w.map == (uint8_t *)MAP_FAILED) exit(2);
    mprotect(w.map, 4096, PROT_NONE);
    mprotect(w.map + 4096 + pages, 4096, PROT_NONE);
    w.data = w.map + 4096 + pages - size;
    return w;
}
static void walled_free(walled *w) { munmap(w->map, w->map_size); }

/* ---- weights and their meaning --------------------------------------------------------------- */

static void put_u16(uint8_t *p, uint32_t v) { p[0] = (uint8_t)v, p[1] = (uint8_t)(v >> 8); }

/* Puts a scale into every block of a row (d and dmin; floats have none). */
static void set_scales(int type, uint8_t *row, int64_t n, uint32_t d, uint32_t dmin) {
    for (int64_t b = 0; b < n / types[type].block; b++, row += types[type].bytes) {
        if (type == 3 || type == 4) put_u16(row, d);
        if (type == 5 || type == 6) put_u16(row, d), put_u16(row + 2, dmin);
        if (type == 7) put_u16(row + 208, d);
    }
}

static void random_row(int type, uint8_t *row, int64_t n) {
    const int bytes = types[type].bytes;
    for (int64_t b = 0; b < n / types[type].block; b++) {
        uint8_t *block = row + b * bytes;
        if (type < 3) {
            float v = random_float();
            if (random_u32() % 16 == 0) v *= 1e-6f; /* also subnormal halves */
            if (type == 0) memcpy(block, &v, 4);
            if (type == 1) put_u16(block, moe__f32_to_f16(v));
            if (type == 2) put_u16(block, moe__f32_to_bf16(v));
            continue;
        }
        for (int i = 0; i < bytes; i++) block[i] = (uint8_t)random_u32();
        set_scales(type, block, types[type].block, moe__f32_to_f16(random_float() * 0.1f),
                   moe__f32_to_f16(random_float() * 0.1f));
    }
}

/* y = value[e], and what it is a difference of: |value| + |part| bounds the terms. */
static void decode(int type, const uint8_t *row, int64_t n, double *value, double *part) {
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *b = row + i / types[type].block * types[type].bytes;
        int e = (int)(i % types[type].block), j = e / 32, l = e % 32;
        part[i] = 0;
        if (type == 0) value[i] = moe__load_f32(b);
        if (type == 1) value[i] = moe__f16_to_f32(moe__load_u16(b));
        if (type == 2) value[i] = moe__bf16_to_f32(moe__load_u16(b));
        if (type < 3) continue;
        double d = moe__f16_to_f32(moe__load_u16(type == 7 ? b + 208 : b));
        if (type == 3) value[i] = d * ((e < 16 ? b[2 + e] & 15 : b[2 + e - 16] >> 4) - 8);
        if (type == 4) value[i] = d * (int8_t)b[2 + e];
        if (type == 5 || type == 6) {
            const uint8_t *s = b + 4, *qs = b + (type == 5 ? 16 : 48);
            double dmin = moe__f16_to_f32(moe__load_u16(b + 2));
            int sc = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
            int mn = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
            int q = qs[32 * (e / 64) + l] >> 4 * (j % 2) & 15;
            if (type == 6) q |= (b[16 + l] >> j & 1) << 4;
            part[i] = dmin * mn;
            value[i] = d * sc * q - part[i];
        }
        if (type == 7) {
            int h = e / 128, t = e % 128 / 32;
            int q = b[64 * h + 32 * (t & 1) + l] >> (t >= 2 ? 4 : 0) & 15;
            q |= (b[128 + 32 * h + l] >> 2 * t & 3) << 4;
            value[i] = d * (int8_t)b[192 + e / 16] * (q - 32);
        }
    }
}

/* ---- activations ----------------------------------------------------------------------------- */

enum { Q_RANDOM, Q_MINUS_128, Q_MINUS_127, Q_PLUS_127, Q_ONE, Q_KINDS };

static int8_t make_q(int kind) {
    switch (kind) {
    case Q_MINUS_128: return -128;
    case Q_MINUS_127: return -127;
    case Q_PLUS_127: return 127;
    case Q_ONE: return 1;
    default: return (int8_t)((int)(random_u32() % 255) - 127);
    }
}

static void fill_sums32(moe__act32 *a) {
    memset(a->nsum, 0, sizeof a->nsum);
    for (int i = 0; i < 256; i++) a->nsum[i / 32] -= a->q[i];
}
static void fill_sums256(moe__act256 *a) {
    memset(a->nsum, 0, sizeof a->nsum);
    memset(a->sum32, 0, sizeof a->sum32);
    for (int i = 0; i < 256; i++) a->nsum[i / 16] -= a->q[i];
    for (int i = 0; i < 256; i++) a->sum32[i / 32] = (int16_t)(a->sum32[i / 32] + a->q[i]);
    for (int i = 0; i < 16; i++) a->sum16[i] = (int16_t)-a->nsum[i];
}

/* d: the scale of everything, or 0 for random ones */
static void make_act(int act, void *out, int64_t n, int kind, float d) {
    uint8_t *p = (uint8_t *)out;
    for (int64_t first = 0; first < n; first += 256) {
        if (act == 0) {
            for (int64_t i = first; i < n && i < first + 256; i++) {
                float v = random_float();
                memcpy(p + 4 * i, &v, 4);
            }
        } else if (act == 1) {
            moe__act32 a;
            memset(&a, 0, sizeof a);
            for (int i = 0; i < 256 && first + i < n; i++) a.q[i] = make_q(kind);
            for (int i = 0; i < 8 && first + 32 * i < n; i++)
                a.d[i] = d > 0 ? d : 0.01f + 0.01f * random_float();
            fill_sums32(&a);
            memcpy(p + first / 256 * (int64_t)sizeof a, &a, sizeof a);
        } else {
            moe__act256 a;
            memset(&a, 0, sizeof a);
            for (int i = 0; i < 256; i++) a.q[i] = make_q(kind);
            a.d = d > 0 ? d : 0.01f + 0.01f * random_float();
            fill_sums256(&a);
            memcpy(p + first / 256 * (int64_t)sizeof a, &a, sizeof a);
        }
    }
}

static void decode_act(int act, const uint8_t *p, int64_t n, double *value) {
    for (int64_t i = 0; i < n; i++) {
        moe__act32 a;
        moe__act256 b;
        if (act == 0) value[i] = moe__load_f32(p + 4 * i);
        if (act == 1) {
            memcpy(&a, p + i / 256 * (int64_t)sizeof a, sizeof a);
            value[i] = (double)a.d[i % 256 / 32] * a.q[i % 256];
        }
        if (act == 2) {
            memcpy(&b, p + i / 256 * (int64_t)sizeof b, sizeof b);
            value[i] = (double)b.d * b.q[i % 256];
        }
    }
}

/* ---- a problem: 32 rows, 64 activations, the exact result ------------------------------------ */

typedef struct {
    int type;
    int64_t n;
    size_t row_size, act_size;
    walled rows, acts, pack;
    double *result, *terms; /* [TOKENS][ROWS]; terms: sum of |terms| */
} problem;

static void problem_open(problem *p, int type, int64_t n, size_t row_pad) {
    memset(p, 0, sizeof *p);
    p->type = type, p->n = n;
    p->row_size = (size_t)(n / types[type].block * types[type].bytes) + row_pad;
    p->act_size = moe__act_size((moe__act_kind)types[type].act, n);
    p->rows = walled_new(ROWS * p->row_size);
    p->acts = walled_new(TOKENS * p->act_size);
    p->pack = walled_new(MOE__PACK_SIZE);
    p->result = (double *)malloc(TOKENS * ROWS * sizeof(double));
    p->terms = (double *)malloc(TOKENS * ROWS * sizeof(double));
    for (int r = 0; r < ROWS; r++) random_row(type, p->rows.data + (size_t)r * p->row_size, n);
    for (int t = 0; t < TOKENS; t++)
        make_act(types[type].act, p->acts.data + (size_t)t * p->act_size, n, Q_RANDOM, 0);
}

static void problem_solve(problem *p) {
    const int64_t n = p->n;
    double *a = (double *)malloc((size_t)n * TOKENS * sizeof(double));
    double *w = (double *)malloc((size_t)n * 2 * sizeof(double)), *part = w + n;
    for (int t = 0; t < TOKENS; t++)
        decode_act(types[p->type].act, p->acts.data + (size_t)t * p->act_size, n, a + t * n);
    for (int r = 0; r < ROWS; r++) {
        decode(p->type, p->rows.data + (size_t)r * p->row_size, n, w, part);
        for (int t = 0; t < TOKENS; t++) {
            double sum = 0, terms = 0;
            for (int64_t i = 0; i < n; i++) {
                sum += w[i] * a[t * n + i];
                terms += (fabs(w[i]) + fabs(part[i])) * fabs(a[t * n + i]);
            }
            p->result[t * ROWS + r] = sum, p->terms[t * ROWS + r] = terms;
        }
    }
    free(a), free(w);
}

static void problem_close(problem *p) {
    walled_free(&p->rows), walled_free(&p->acts), walled_free(&p->pack);
    free(p->result), free(p->terms);
}

/* Runs the last n_rows rows (they end at the wall) with tokens order[0 .. n_tokens - 1]. The result
 * lies at out[t * stride + r]; returns 0 if anything else was written. */
static int run(const problem *p, moe_isa isa, int n_rows, int64_t n_tokens, const int *order,
               int64_t stride, float *out, size_t n_out) {
    const moe__kernels *kernels = moe__kernels_get(isa);
    const void **x = (const void **)malloc((size_t)n_tokens * sizeof *x);
    const uint8_t *rows = p->rows.data + (size_t)(ROWS - n_rows) * p->row_size;
    const uint32_t canary = CANARY;
    for (int64_t t = 0; t < n_tokens; t++) x[t] = p->acts.data + (size_t)order[t] * p->act_size;
    for (size_t i = 0; i < n_out; i++) memcpy(out + i, &canary, 4);
    memset(p->pack.data, 0xFF, MOE__PACK_SIZE);
    const size_t margin = 64;
    size_t ahead = random_u32() % 3 * p->row_size * 7;
    kernels->type[p->type].tile(rows, p->row_size, n_rows, p->n, x, n_tokens, out + margin, stride,
                                p->pack.data, ahead ? rows : NULL, ahead);
    free(x);
    int intact = 1;
    for (size_t i = 0; i < n_out; i++) {
        uint32_t bits;
        memcpy(&bits, out + i, 4);
        int64_t at = (int64_t)i - (int64_t)margin;
        int inside = at >= 0 && at / stride < n_tokens && at % stride < n_rows;
        intact &= inside || bits == CANARY;
    }
    return intact;
}

/* tolerance: of the sum of |terms|; what is not finite in the reference must not be finite. */
static void check(const problem *p, moe_isa isa, int n_rows, int64_t n_tokens, const int *order,
                  int64_t stride, double tolerance) {
    const size_t n_out = (size_t)(n_tokens * stride) + 128;
    float *out = (float *)malloc(n_out * sizeof *out);
    int intact = run(p, isa, n_rows, n_tokens, order, stride, out, n_out);
    CHECKF(intact, "%s %s n %d: wrote outside", moe_isa_name(isa), types[p->type].name, (int)p->n);
    double worst = 0;
    int worst_r = 0, worst_t = 0;
    for (int64_t t = 0; t < n_tokens; t++)
        for (int r = 0; r < n_rows; r++) {
            const int at = order[t] * ROWS + ROWS - n_rows + r;
            const double got = out[64 + t * stride + r];
            double error = fabs(got - p->result[at]) / (p->terms[at] > 0 ? p->terms[at] : 1);
            if (!isfinite(p->result[at])) error = isfinite(got) ? 1e9 : 0;
            if (!(error <= worst)) worst = error, worst_r = r, worst_t = (int)t;
        }
    CHECKF(worst <= tolerance, "%s %s n %d, %d rows, %d tokens: error %g at row %d token %d",
           moe_isa_name(isa), types[p->type].name, (int)p->n, n_rows, (int)n_tokens, worst, worst_r,
           worst_t);
    free(out);
}

static const moe_isa isas[] = {MOE_ISA_AVX2, MOE_ISA_AVX512};
static int available(moe_isa isa) { return moe_isa_resolve(isa) == isa; }
#define FOR_EACH_ISA(isa)                                                            \
    for (int isa##_i = 0; isa##_i < 2; isa##_i++)                                    \
        for (moe_isa isa = isas[isa##_i], isa##_once = isa;                          \
             isa##_once != MOE_ISA_BEST && available(isa); isa##_once = MOE_ISA_BEST)
#define N_TYPES ((int)(sizeof types / sizeof *types))

static double tolerance_of(int type) { return types[type].act ? 5e-7 : 2e-6; }

static void identity(int *order, int n) {
    for (int i = 0; i < n; i++) order[i] = i % TOKENS;
}

/* ---- tests ----------------------------------------------------------------------------------- */

TEST(tile_rows_and_tokens) {
    static const int rows[] = {1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32};
    static const int tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 31, 32, 33, 64};
    int order[TOKENS];
    identity(order, TOKENS);
    for (int type = 0; type < N_TYPES; type++) {
        problem p;
        problem_open(&p, type, types[type].act == 2 ? 512 : types[type].act ? 288 : 140, 0);
        problem_solve(&p);
        FOR_EACH_ISA(isa)
            for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
                for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
                    check(&p, isa, rows[r], tokens[t], order, rows[r] + (int)t % 3,
                          tolerance_of(type));
        problem_close(&p);
    }
}

/* Rows of 2048, 4096, ... bytes are copied before they are unpacked. */
TEST(tile_rows_of_powers_of_two) {
    int order[TOKENS];
    identity(order, TOKENS);
    for (int type = 0; type < N_TYPES; type++)
        for (size_t size = 2048; size <= 8192; size *= 2) {
            const int64_t n = types[type].act == 2 ? 1024 : types[type].act ? 992 : 512;
            problem p;
            problem_open(&p, type, n, size - (size_t)(n / types[type].block * types[type].bytes) %
                                                 size);
            CHECK(p.row_size % 2048 == 0);
            problem_solve(&p);
            FOR_EACH_ISA(isa) {
                check(&p, isa, 32, 9, order, 33, tolerance_of(type));
                check(&p, isa, 16, 5, order, 33, tolerance_of(type));
                check(&p, isa, 31, 2, order, 33, tolerance_of(type));
            }
            problem_close(&p);
        }
}

TEST(tile_lengths) {
    static const int64_t lengths[3][14] = {
        {1, 2, 3, 7, 8, 9, 31, 100, 127, 128, 129, 260, 1001, 2048},
        {32, 64, 96, 224, 256, 288, 480, 1408, 2880},
        {256, 512, 768, 2048}};
    int order[TOKENS];
    identity(order, TOKENS);
    for (int type = 0; type < N_TYPES; type++)
        for (int i = 0; i < 14; i++) {
            const int64_t n = lengths[types[type].act][i];
            if (!n) break;
            problem p;
            problem_open(&p, type, n, i % 2 ? 6 : 0); /* padded rows too */
            problem_solve(&p);
            FOR_EACH_ISA(isa) {
                check(&p, isa, 32, 13, order, 37, tolerance_of(type));
                check(&p, isa, 32, 1, order + 63, 32, tolerance_of(type));
                check(&p, isa, 16, 3, order + 61, 32, tolerance_of(type));
                check(&p, isa, 5, 6, order + 58, 5, tolerance_of(type));
            }
            problem_close(&p);
        }
}

/* More tokens than the scratch has sums for, gathered in any order, some of them twice */
TEST(tile_gathered) {
    enum { MANY = 1100 };
    static const int counts[] = {5, 255, 256, 257, 511, 513, MANY};
    int order[MANY];
    for (int i = 0; i < MANY; i++) order[i] = (int)(random_u32() % TOKENS);
    for (int type = 0; type < N_TYPES; type++) {
        problem p;
        problem_open(&p, type, types[type].act == 2 ? 512 : types[type].act ? 352 : 150, 0);
        problem_solve(&p);
        FOR_EACH_ISA(isa)
            for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
                check(&p, isa, i % 2 ? 32 : 19, counts[i], order, i % 2 ? 32 : 40,
                      tolerance_of(type));
        problem_close(&p);
    }
}

/* Largest and smallest bytes with scales of 1: float sums are exact integers, so is the result.
 * Of the Q*_K types only some sub-blocks count (the others' scales are 0): sums stay below 2^24. */
static void extreme_weights(problem *p, int fill, int sub_block) {
    const int bytes = types[p->type].bytes;
    for (int r = 0; r < ROWS; r++) {
        uint8_t *row = p->rows.data + (size_t)r * p->row_size;
        for (int64_t i = 0; i < p->n / types[p->type].block * bytes; i++)
            row[i] = fill < 0 ? (uint8_t)random_u32() : (uint8_t)fill;
        set_scales(p->type, row, p->n, 0x3C00, 0x3C00);
        for (int64_t b = 0; b < p->n / 256; b++) {
            uint8_t *s = row + b * bytes + (p->type == 7 ? 192 : 4);
            if (p->type == 7) {
                memset(s, 0, 16);
                s[sub_block] = 0x80, s[sub_block + 8] = 0x7F;
            } else if (p->type >= 5) {
                memset(s, 0, 12); /* scale 63 and min 63 of one sub-block */
                if (sub_block < 4)
                    s[sub_block] = s[sub_block + 4] = 63;
                else
                    s[sub_block + 4] = 0xFF, s[sub_block - 4] = 0xC0, s[sub_block] = 0xC0;
            }
        }
    }
}

TEST(tile_extreme_values_exact) {
    int order[TOKENS];
    identity(order, TOKENS);
    for (int type = 3; type < N_TYPES; type++)
        for (int fill = -1; fill < 256; fill += fill < 0 ? 1 : 0x33)
            for (int sub_block = 0; sub_block < (type >= 5 ? 8 : 1); sub_block++) {
                problem p;
                problem_open(&p, type, 256, 0);
                extreme_weights(&p, fill, sub_block);
                for (int t = 0; t < TOKENS; t++)
                    make_act(types[type].act, p.acts.data + (size_t)t * p.act_size, p.n,
                             t % Q_KINDS, 1.0f);
                problem_solve(&p);
                for (int i = 0; i < TOKENS * ROWS; i++) CHECK(p.terms[i] < 16777216.0);
                FOR_EACH_ISA(isa) check(&p, isa, 32, 11, order, 32, 0.0);
                problem_close(&p);
            }
}

/* Blocks of nothing but 0xFF: scales are NaN, no kernel may mind. */
TEST(tile_all_ones) {
    int order[TOKENS];
    identity(order, TOKENS);
    for (int type = 0; type < N_TYPES; type++) {
        problem p;
        problem_open(&p, type, 256, 0);
        memset(p.rows.data, 0xFF, ROWS * p.row_size);
        problem_solve(&p);
        FOR_EACH_ISA(isa) check(&p, isa, 31, 7, order, 31, 0.0);
        problem_close(&p);
    }
}

/* A NaN or infinity in one row or token leaves the others alone. */
TEST(tile_not_finite) {
    static const uint32_t bad[] = {0x7E00, 0x7C00, 0xFC00}; /* NaN and infinities as f16 */
    int order[TOKENS];
    identity(order, TOKENS);
    for (int type = 0; type < N_TYPES; type++)
        for (int i = 0; i < 3; i++)
            for (int minus = 0; minus < 2; minus++) {
                problem p;
                problem_open(&p, type, 512, 0);
                for (int r = 3; r < ROWS; r += 9) {
                    uint8_t *at = p.rows.data + (size_t)r * p.row_size + 256 / types[type].block *
                                      types[type].bytes;
                    uint32_t f32 = moe__f32_bits(moe__f16_to_f32((uint16_t)bad[i]));
                    if (type == 0) memcpy(at, &f32, 4);
                    if (type == 1) put_u16(at, bad[i]);
                    if (type == 2) put_u16(at, f32 >> 16);
                    if (type == 3 || type == 4) put_u16(at, bad[i]);
                    if (type == 5 || type == 6) put_u16(at + 2 * minus, bad[i]);
                    if (type == 7) put_u16(at + 208, bad[i]);
                }
                for (int t = 2; t < TOKENS; t += 5) {
                    uint8_t *act = p.acts.data + (size_t)t * p.act_size;
                    size_t at = 77 * 4;
                    if (types[type].act == 1) at = offsetof(moe__act32, d) + 4;
                    if (types[type].act == 2) at = offsetof(moe__act256, d);
                    float nan = minus ? -NAN : NAN;
                    memcpy(act + at, &nan, 4);
                }
                problem_solve(&p);
                FOR_EACH_ISA(isa) check(&p, isa, 32, 33, order, 32, tolerance_of(type));
                problem_close(&p);
            }
}

/* The plain C dot product reads the same records. */
TEST(tile_against_plain_dot) {
    int order[TOKENS];
    identity(order, TOKENS);
    for (int type = 0; type < N_TYPES; type++) {
        moe__dot_fn *dot = moe__kernels_get(MOE_ISA_SCALAR)->type[type].dot;
        problem p;
        if (!dot) SKIP("no plain C kernels");
        problem_open(&p, type, 768, 0);
        problem_solve(&p);
        for (int t = 0; t < TOKENS; t++) {
            float out[ROWS];
            dot(p.rows.data, p.row_size, ROWS, p.n, p.acts.data + (size_t)t * p.act_size, out);
            for (int r = 0; r < ROWS; r++)
                CHECKF(fabs(out[r] - p.result[t * ROWS + r]) <=
                           tolerance_of(type) * p.terms[t * ROWS + r],
                       "%s: %g, expected %g", types[type].name, out[r], p.result[t * ROWS + r]);
        }
        FOR_EACH_ISA(isa) check(&p, isa, 32, TOKENS, order, 32, tolerance_of(type));
        problem_close(&p);
    }
}

TEST(tile_isas) {
    int any = 0;
    FOR_EACH_ISA(isa) {
        printf("  %s\n", moe_isa_name(isa));
        any = 1;
    }
    if (!any) SKIP("no vector instructions");
}

MAIN()
