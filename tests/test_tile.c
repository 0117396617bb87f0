// Tile kernels: every instruction set and type against double precision. Weights end at a page that
// may not be touched, so does the last token; out is surrounded by canaries; the scratch starts as
// garbage. The reference decodes weights by its own code, from the format's description.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "test.h"

#include "sheet.h"

enum { ROWS = 32, TOKENS = 64, CANARY = 0x7FC0BEEF };

static const moe__type *const types = moe__types;

// A length for each kind of type; that of 32-wide ones is rounded up to whole blocks.
static int64_t length(int type, int64_t floats, int64_t by_32, int64_t by_256) {
    const int64_t block = types[type].block;
    if (types[type].act == MOE__ACT_F32) return floats;
    return types[type].act == MOE__ACT_Q256 ? by_256 : (by_32 + block - 1) / block * block;
}

// ---- memory that ends (and begins) at a wall -------------------------------------------------

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

// ---- activations -----------------------------------------------------------------------------

enum { Q_RANDOM, Q_MINUS_127, Q_PLUS_127, Q_ONE, Q_FEW, Q_KINDS };

static int8_t make_q(int kind) {
    switch (kind) {
    case Q_MINUS_127: return -127;
    case Q_PLUS_127: return 127;
    case Q_ONE: return 1;
    case Q_FEW: return (int8_t)(random_u32() % 16 ? 0 : random_u32() % 2 ? 127 : -127);
    default: return (int8_t)((int)(random_u32() % 255) - 127);
    }
}

static void fill_sums32(moe__act32 *a) {
    memset(a->nsum, 0, sizeof a->nsum);
    for (int i = 0; i < 256; i++) a->nsum[i / 32] -= a->q[moe__act32_at(i)];
}
static void fill_sums256(moe__act256 *a) {
    memset(a->nsum, 0, sizeof a->nsum);
    memset(a->sum32, 0, sizeof a->sum32);
    for (int i = 0; i < 256; i++) a->nsum[i / 16] -= a->q[moe__act256_at(i)];
    for (int i = 0; i < 256; i++)
        a->sum32[i / 32] = (int16_t)(a->sum32[i / 32] + a->q[moe__act256_at(i)]);
    for (int i = 0; i < 16; i++) a->sum16[i] = (int16_t)-a->nsum[i];
}

// d: the scale of everything, or 0 for random ones
static void make_act(int act, void *out, int64_t n, int kind, float d) {
    uint8_t *p = (uint8_t *)out;
    for (int64_t first = 0; first < n; first += 256) {
        if (act == 0) {
            for (int64_t i = first; i < n && i < first + 256; i++) {
                float v = random_f32();
                memcpy(p + 4 * i, &v, 4);
            }
        } else if (act == 1) {
            moe__act32 a;
            memset(&a, 0, sizeof a);
            for (int i = 0; i < 256 && first + i < n; i++) a.q[moe__act32_at(i)] = make_q(kind);
            for (int i = 0; i < 8 && first + 32 * i < n; i++)
                a.d[i] = d > 0 ? d : 0.01f + 0.01f * random_f32();
            fill_sums32(&a);
            memcpy(p + first / 256 * (int64_t)sizeof a, &a, sizeof a);
        } else {
            moe__act256 a;
            memset(&a, 0, sizeof a);
            for (int i = 0; i < 256; i++) a.q[i] = make_q(kind);
            a.d = d > 0 ? d : 0.01f + 0.01f * random_f32();
            fill_sums256(&a);
            memcpy(p + first / 256 * (int64_t)sizeof a, &a, sizeof a);
        }
    }
}

// ---- a problem: 32 rows, 64 activations, the exact result ------------------------------------

typedef struct {
    int type;
    int64_t n;
    size_t row_size, act_size;
    walled rows, acts, pack;
    double *result, *terms; // [TOKENS][ROWS]; terms: sum of |terms|
    float *seen;            // [TOKENS][ROWS]: the bits that every kernel has to give; or CANARY
} problem;

// d: the scale of all weights, 0: random ones
static void problem_open(problem *p, int type, int64_t n, size_t row_pad, float d) {
    const uint32_t canary = CANARY;
    memset(p, 0, sizeof *p);
    p->type = type, p->n = n;
    p->row_size = moe_type_row_size(types[type].id, n) + row_pad;
    p->act_size = moe__act_size(types[type].act, n);
    p->rows = walled_new(ROWS * p->row_size);
    p->acts = walled_new(TOKENS * p->act_size);
    p->pack = walled_new(MOE__PACK_SIZE);
    p->result = (double *)malloc(TOKENS * ROWS * sizeof(double));
    p->terms = (double *)malloc(TOKENS * ROWS * sizeof(double));
    p->seen = (float *)malloc(TOKENS * ROWS * sizeof(float));
    for (int i = 0; i < TOKENS * ROWS; i++) memcpy(p->seen + i, &canary, 4);
    sheet_random(&types[type], p->rows.data, p->row_size, ROWS, n, d);
    for (int t = 0; t < TOKENS; t++)
        make_act(types[type].act, p->acts.data + (size_t)t * p->act_size, n, Q_RANDOM, 0);
}
// The group of row r.
static uint8_t *group_of(const problem *p, int r) {
    return p->rows.data + (size_t)(r - r % types[p->type].rows) * p->row_size;
}

static void problem_solve(problem *p) {
    const moe__type *type = &types[p->type];
    const int64_t n = p->n;
    double *a = (double *)malloc((size_t)n * TOKENS * sizeof(double));
    double *w = (double *)malloc((size_t)n * 2 * sizeof(double)), *part = w + n;
    uint8_t *act = (uint8_t *)malloc(p->act_size); // aligned
    for (int t = 0; t < TOKENS; t++) {
        memcpy(act, p->acts.data + (size_t)t * p->act_size, p->act_size);
        for (int64_t i = 0; i < n; i++) a[t * n + i] = sheet_act(type->act, act, i);
    }
    for (int r = 0; r < ROWS; r++) {
        for (int64_t i = 0; i < n; i++) {
            sheet_pair x = sheet_parts(type->id, group_of(p, r), r % type->rows, i, 1);
            w[i] = x.value - x.min, part[i] = fabs(x.value) + fabs(x.min);
        }
        for (int t = 0; t < TOKENS; t++) {
            double sum = 0, terms = 0;
            for (int64_t i = 0; i < n; i++) {
                sum += w[i] * a[t * n + i];
                terms += part[i] * fabs(a[t * n + i]);
            }
            p->result[t * ROWS + r] = sum, p->terms[t * ROWS + r] = terms;
        }
    }
    free(a), free(w), free(act);
}

static void problem_close(problem *p) {
    walled_free(&p->rows), walled_free(&p->acts), walled_free(&p->pack);
    free(p->result), free(p->terms), free(p->seen);
}

// Runs the last n_rows rows (they end at the wall) with tokens order[0 .. n_tokens - 1]. The result
// lies at out[t * stride + r]; returns 0 if anything else was written.
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

enum { EXACT = 1 }; // instead of a tolerance, where all scales are 1, see below

// tolerance: of the sum of |terms|; what is not finite in the reference must not be finite. EXACT:
// sums are integers (eighths in types with code books), exact in floats below 2^24. A result has
// the same bits whatever rows and tokens it is computed with, and by whom.
static void check(const problem *p, moe_isa isa, int n_rows, int64_t n_tokens, const int *order,
                  int64_t stride, double tolerance) {
    const moe__type *type = &types[p->type];
    const size_t n_out = (size_t)(n_tokens * stride) + 128;
    const double integers = sheet_uses_book(type->id) ? 0x1p21 : 0x1p24;
    const uint32_t canary = CANARY;
    if (n_rows % type->rows) return;
    float *out = (float *)malloc(n_out * sizeof *out);
    int intact = run(p, isa, n_rows, n_tokens, order, stride, out, n_out), same = 1;
    CHECKF(intact, "%s %s n %d: wrote outside", moe_isa_name(isa), type->name, (int)p->n);
    double worst = 0;
    int worst_r = 0, worst_t = 0;
    for (int64_t t = 0; t < n_tokens; t++)
        for (int r = 0; r < n_rows; r++) {
            const int at = order[t] * ROWS + ROWS - n_rows + r;
            const float *got = &out[64 + t * stride + r];
            const double want = p->result[at], terms = p->terms[at];
            double error = fabs(*got - want) / (terms > 0 ? terms : 1), bound = tolerance;
            if (tolerance == EXACT) bound = terms < integers ? 0 : 3e-7;
            if (!(terms < 3e38)) error = isfinite(*got) && !(fabs(want) < 3e38) ? 1e9 : 0;
            if (!(error <= bound) && !(error <= worst))
                worst = error, worst_r = r, worst_t = (int)t;
            float *seen = p->seen + at;
            if (!memcmp(seen, &canary, 4)) *seen = *got;
            same &= !memcmp(seen, got, 4) || (isnan(*seen) && isnan(*got));
        }
    CHECKF(worst == 0, "%s %s n %d, %d rows, %d tokens: error %g at row %d token %d",
           moe_isa_name(isa), type->name, (int)p->n, n_rows, (int)n_tokens, worst, worst_r,
           worst_t);
    CHECKF(same, "%s %s n %d, %d rows, %d tokens: other bits than with others", moe_isa_name(isa),
           type->name, (int)p->n, n_rows, (int)n_tokens);
    free(out);
}

// From here on tiles have to give the bits of the dot product.
static void see_dots(problem *p, moe_isa isa) {
    moe__dot_fn *dot = moe__kernels_get(isa)->type[p->type].dot;
    for (int t = 0; t < TOKENS; t++)
        dot(p->rows.data, p->row_size, ROWS, p->n, p->acts.data + (size_t)t * p->act_size,
            p->seen + t * ROWS);
}

static const moe_isa isas[] = {MOE_ISA_AVX2, MOE_ISA_AVX_VNNI, MOE_ISA_AVX512};
static int available(moe_isa isa) { return moe_isa_resolve(isa) == isa; }
#define FOR_EACH_ISA(isa)                                                            \
    for (int isa##_i = 0; isa##_i < 3; isa##_i++)                                    \
        for (moe_isa isa = isas[isa##_i], isa##_once = isa;                          \
             isa##_once != MOE_ISA_BEST && available(isa); isa##_once = MOE_ISA_BEST)
// Types whose code books are not there are left out.
#define EACH_TYPE(type)                                 \
    for (int type = 0; type < MOE__N_TYPES; type++)      \
        if (sheet_knows(types[type].id))

static double tolerance_of(int type) { return types[type].act ? 5e-7 : 2e-6; }

static void identity(int *order, int n) {
    for (int i = 0; i < n; i++) order[i] = i % TOKENS;
}

// ---- tests -----------------------------------------------------------------------------------

TEST(any_number_of_rows_and_tokens_makes_a_tile) {
    static const int rows[] = {32, 1, 2, 4, 7, 8, 9, 12, 15, 16, 17, 20, 24, 25, 28, 31};
    static const int tokens[] = {64, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 31, 32, 33, 65};
    int order[65];
    identity(order, 65);
    EACH_TYPE(type) {
        problem p;
        problem_open(&p, type, length(type, 140, 288, 512), 0, 0);
        problem_solve(&p);
        FOR_EACH_ISA(isa)
            for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
                for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
                    check(&p, isa, rows[r], tokens[t], order, rows[r] + (int)t % 3,
                          tolerance_of(type));
        problem_close(&p);
    }
}

// Rows of 2048, 4096, ... bytes are copied before they are unpacked.
TEST(rows_of_powers_of_two_bytes_give_right_tiles) {
    int order[TOKENS];
    identity(order, TOKENS);
    EACH_TYPE(type)
        for (size_t size = 2048; size <= 8192; size *= 2) {
            const int64_t n = length(type, 512, 992, 1024);
            problem p;
            problem_open(&p, type, n, size - moe_type_row_size(types[type].id, n) % size, 0);
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

TEST(rows_of_any_length_give_the_bits_of_the_dot) {
    static const int64_t floats[] = {1, 2, 3, 7, 8, 9, 31, 100, 128, 129, 260, 1001, 2048};
    static const int64_t by_32[] = {32, 64, 96, 224, 256, 288, 320, 480, 1408, 2880};
    static const int64_t by_256[] = {256, 512, 768, 2048};
    int order[TOKENS];
    identity(order, TOKENS);
    EACH_TYPE(type)
        for (int i = 0; i < 13; i++) {
            if (i >= (types[type].act == MOE__ACT_Q256 ? 4 : types[type].act ? 10 : 13)) break;
            problem p; // padded rows at odd addresses too
            problem_open(&p, type, length(type, floats[i], by_32[i % 10], by_256[i % 4]),
                         i % 2 ? 5 : 0, 0);
            problem_solve(&p);
            FOR_EACH_ISA(isa) {
                see_dots(&p, isa);
                check(&p, isa, 32, 13, order, 37, tolerance_of(type));
                check(&p, isa, 32, 1, order + 63, 32, tolerance_of(type));
                check(&p, isa, 16, 3, order + 61, 32, tolerance_of(type));
                check(&p, isa, 5, 6, order + 58, 5, tolerance_of(type));
            }
            problem_close(&p);
        }
}

// More tokens than the scratch has sums for, gathered in any order, some of them twice
TEST(many_tokens_may_be_gathered_in_any_order) {
    enum { MANY = 1100 };
    static const int counts[] = {5, 255, 256, 257, 511, 513, MANY};
    int order[MANY];
    for (int i = 0; i < MANY; i++) order[i] = (int)(random_u32() % TOKENS);
    EACH_TYPE(type) {
        problem p;
        problem_open(&p, type, length(type, 150, 352, 512), 0, 0);
        problem_solve(&p);
        FOR_EACH_ISA(isa)
            for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
                check(&p, isa, i % 2 ? 32 : 19, counts[i], order, i % 2 ? 32 : 40,
                      tolerance_of(type));
        problem_close(&p);
    }
}

// Largest and smallest bytes with scales of 1, the fields of block scales among them or alone.
TEST(extreme_values_are_added_exactly) {
    static const uint8_t fill[] = {0x00, 0xFF, 0x80, 0x7F, 0x88, 0x55};
    int order[TOKENS];
    identity(order, TOKENS);
    EACH_TYPE(type)
        for (int trial = 0; trial < 12 && types[type].block > 1; trial++) {
            problem p;
            problem_open(&p, type, 256, 0, 1);
            const size_t size = ROWS * p.row_size;
            if (trial < 6) memset(p.rows.data, fill[trial], size);
            for (size_t i = 0; i < size && trial >= 8; i++)
                p.rows.data[i] = fill[random_u32() % 6];
            sheet_put_all(&types[type], p.rows.data, p.row_size, ROWS, p.n, 1);
            for (int t = 0; t < TOKENS; t++)
                make_act(types[type].act, p.acts.data + (size_t)t * p.act_size, p.n, t % Q_KINDS,
                         1.0f);
            problem_solve(&p);
            FOR_EACH_ISA(isa) check(&p, isa, 32, 11, order, 32, EXACT);
            problem_close(&p);
        }
}

// Blocks of nothing but 0xFF: scales are NaN, no kernel may mind.
TEST(scales_that_are_nan_do_no_harm) {
    int order[TOKENS];
    identity(order, TOKENS);
    EACH_TYPE(type) {
        problem p;
        problem_open(&p, type, 256, 0, 0);
        memset(p.rows.data, 0xFF, ROWS * p.row_size);
        problem_solve(&p);
        FOR_EACH_ISA(isa) check(&p, isa, types[type].rows == 1 ? 31 : 24, 7, order, 31, 3e-7);
        problem_close(&p);
    }
}

// A NaN or infinity in one row or token leaves the others alone.
TEST(nan_in_one_row_or_token_spares_the_others) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    int order[TOKENS];
    identity(order, TOKENS);
    EACH_TYPE(type)
        for (int i = 0; i < 3; i++)
            for (int minus = 0; minus < 2; minus++) { // in the scale, or in that of the mins
                const moe__type *t = &types[type];
                problem p;
                problem_open(&p, type, 512, 0, 0);
                for (int r = 3; r < ROWS && sheet_may_be_nan(t); r += 9) {
                    int alone = sheet_min_offset(t, 0) >= 0 && minus;
                    sheet_put(t, group_of(&p, r), r % t->rows, 256 / t->block,
                              alone ? 0.1f : bad[i], alone ? bad[i] : 0.1f);
                }
                for (int token = 2; token < TOKENS; token += 5) {
                    uint8_t *act = p.acts.data + (size_t)token * p.act_size;
                    size_t at = 77 * 4;
                    if (t->act == MOE__ACT_Q32) at = offsetof(moe__act32, d) + 4;
                    if (t->act == MOE__ACT_Q256) at = offsetof(moe__act256, d);
                    float nan = minus ? -NAN : NAN;
                    memcpy(act + at, &nan, 4);
                }
                problem_solve(&p);
                FOR_EACH_ISA(isa) check(&p, isa, 32, 33, order, 32, tolerance_of(type));
                problem_close(&p);
            }
}

// The plain C dot product reads the same records; of quantized types every tile has its bits.
TEST(tiles_of_quantized_types_have_the_bits_of_plain_dot) {
    int order[TOKENS];
    identity(order, TOKENS);
    EACH_TYPE(type) {
        problem p;
        problem_open(&p, type, 768, 0, 0);
        problem_solve(&p);
        see_dots(&p, MOE_ISA_SCALAR);
        for (int t = 0; t < TOKENS; t++)
            for (int r = 0; r < ROWS; r++) {
                const int at = t * ROWS + r;
                CHECKF(fabs(p.seen[at] - p.result[at]) <= tolerance_of(type) * p.terms[at],
                       "%s: %g, expected %g", types[type].name, (double)p.seen[at], p.result[at]);
            }
        FOR_EACH_ISA(isa) {
            if (types[type].act == MOE__ACT_F32) see_dots(&p, isa);
            check(&p, isa, 32, TOKENS, order, 32, tolerance_of(type));
        }
        problem_close(&p);
    }
}

TEST(the_vector_instruction_sets_tried_are_listed) {
    int any = 0;
    FOR_EACH_ISA(isa) {
        printf("  %s\n", moe_isa_name(isa));
        any = 1;
    }
    if (!any) SKIP("no vector instructions");
}

MAIN()
