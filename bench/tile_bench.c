/* Speed of the tile kernels on one thread, beside the peak of a register-only loop of the same
 * multiply instruction, measured directly before and after every sample (noise moves both).
 *
 *     tile_bench [isa avx2|avx512|all] [type|all] [hot|cold] [tokens,...]
 *
 * K = 2048; 768 rows in tiles of 32 that cycle through a buffer of 768 rows (hot) or 160 MB (cold).
 * Figures are the median of the samples; G = 10^9 multiply-adds per second. */
#define _GNU_SOURCE
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

enum { K = 2048, ROWS = 768, TILE = 32, MAX_TOKENS = 512 };

static const struct {
    const char *name;
    int block, bytes, act;
} types[] = {{"F32", 1, 4, 0},      {"F16", 1, 2, 0},      {"BF16", 1, 2, 0},
             {"Q4_0", 32, 18, 1},   {"Q8_0", 32, 34, 1},   {"Q4_K", 256, 144, 2},
             {"Q5_K", 256, 176, 2}, {"Q6_K", 256, 210, 2}};

/* Seconds of processor time of this thread: other processes do not count, their traces in the
 * caches do. */
static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- peaks: about 20 microseconds of 12 independent chains ----------------------------------- */

#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
enum { PEAK_STEPS = 5000 };

#define CLOBBERED                                                                          \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
        "xmm11"
/* All operands start as zero: sums of denormal numbers are slow on some processors. */
static void clear_registers(void) {
#define CLEAR(n) "vpxor %%xmm" #n ",%%xmm" #n ",%%xmm" #n "\n"
    __asm__ volatile(CHAINS(CLEAR) CLEAR(13) CLEAR(14) CLEAR(15)::: CLOBBERED, "xmm13", "xmm14",
                     "xmm15");
}
#define DOT(n) "vpdpbusd %%zmm14,%%zmm15,%%zmm" #n "\n"
__attribute__((target("avx512f,avx512vnni"))) static double peak_int_avx512(void) {
    double start = seconds();
    for (int i = 0; i < PEAK_STEPS; i++) __asm__ volatile(CHAINS(DOT)::: CLOBBERED);
    return PEAK_STEPS * 12 * 64.0 / (seconds() - start);
}
#define FMA_512(n) "vfmadd231ps %%zmm14,%%zmm15,%%zmm" #n "\n"
__attribute__((target("avx512f"))) static double peak_float_avx512(void) {
    double start = seconds();
    for (int i = 0; i < PEAK_STEPS; i++) __asm__ volatile(CHAINS(FMA_512)::: CLOBBERED);
    return PEAK_STEPS * 12 * 16.0 / (seconds() - start);
}
/* A product and the addition that must follow it */
#define MADDUBS(n) "vpmaddubsw %%ymm15,%%ymm14,%%ymm13\n vpaddw %%ymm13,%%ymm" #n ",%%ymm" #n "\n"
__attribute__((target("avx2"))) static double peak_int_avx2(void) {
    double start = seconds();
    for (int i = 0; i < PEAK_STEPS; i++) __asm__ volatile(CHAINS(MADDUBS)::: CLOBBERED, "xmm13");
    return PEAK_STEPS * 12 * 32.0 / (seconds() - start);
}
#define FMA_256(n) "vfmadd231ps %%ymm14,%%ymm15,%%ymm" #n "\n"
__attribute__((target("avx2,fma"))) static double peak_float_avx2(void) {
    double start = seconds();
    for (int i = 0; i < PEAK_STEPS; i++) __asm__ volatile(CHAINS(FMA_256)::: CLOBBERED);
    return PEAK_STEPS * 12 * 8.0 / (seconds() - start);
}

/* ---- one measurement ------------------------------------------------------------------------- */

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare);
    return x[n / 2];
}

static void fill(int type, uint8_t *w, size_t size) {
    uint32_t s = 12345;
    for (size_t i = 0; i < size; i++) w[i] = (uint8_t)((s = s * 1664525 + 1013904223) >> 24);
    /* Scales and floats are finite and normal: slow paths for others are not measured. */
    for (size_t at = 0; at + (size_t)types[type].bytes <= size; at += (size_t)types[type].bytes) {
        if (type == 0) w[at + 3] = (uint8_t)(0x3C | (w[at + 3] & 0x80));
        if (type == 1) w[at + 1] = (uint8_t)(0x2C | (w[at + 1] & 0x83));
        if (type == 2) w[at + 1] = (uint8_t)(0x3C | (w[at + 1] & 0x80));
        if (type == 3 || type == 4) w[at + 1] = 0x24;
        if (type == 5 || type == 6) w[at + 1] = w[at + 3] = 0x24;
        if (type == 7) w[at + 209] = 0x24;
    }
}

typedef struct {
    uint8_t *weights, *pack, *acts;
    const void *x[MAX_TOKENS];
    size_t size, row_size;
    float *out;
} setup;

static void open_setup(setup *s, int type, int cold) {
    const moe_allocator *a = NULL;
    moe_allocator allocator;
    moe__allocator_init(&allocator, NULL, NULL);
    a = &allocator;
    s->row_size = (size_t)(K / types[type].block * types[type].bytes);
    size_t matrix = ROWS * s->row_size;
    s->size = cold ? (160000000 / matrix + 1) * matrix : matrix;
    s->weights = (uint8_t *)moe__alloc(a, s->size);
    s->pack = (uint8_t *)moe__alloc(a, MOE__PACK_SIZE);
    size_t act_size = moe__act_size((moe__act_kind)types[type].act, K);
    s->acts = (uint8_t *)moe__alloc(a, act_size * MAX_TOKENS);
    s->out = (float *)moe__alloc(a, (size_t)MAX_TOKENS * (ROWS + 16) * sizeof(float));
    fill(type, s->weights, s->size);
    for (size_t i = 0; i < act_size * MAX_TOKENS / 4; i++) {
        float v = (float)(i % 17) - 8.0f;
        memcpy(s->acts + 4 * i, &v, 4);
    }
    for (int t = 0; t < MAX_TOKENS; t++) s->x[t] = s->acts + (size_t)t * act_size;
}
static void close_setup(setup *s) {
    moe_allocator allocator;
    moe__allocator_init(&allocator, NULL, NULL);
    moe__free(&allocator, s->weights), moe__free(&allocator, s->pack);
    moe__free(&allocator, s->acts), moe__free(&allocator, s->out);
}

static void measure(moe_isa isa, int type, const setup *s, int tokens) {
    enum { SAMPLES = 15 };
    double speed[SAMPLES], fraction[SAMPLES], best = 0;
    const int is_int = types[type].act != 0, wide = isa == MOE_ISA_AVX512;
    double (*peak)(void) = wide ? (is_int ? peak_int_avx512 : peak_float_avx512)
                                : (is_int ? peak_int_avx2 : peak_float_avx2);
    moe__tile_fn *tile = moe__kernels_get(isa)->type[type].tile;
    const size_t tile_size = TILE * s->row_size;
    size_t at = 0;
    for (int i = -1; i < SAMPLES; i++) {
        clear_registers();
        double before = peak(), start = seconds();
        for (int r = 0; r < ROWS; r += TILE) {
            const uint8_t *rows = s->weights + at;
            at = at + tile_size == s->size ? 0 : at + tile_size;
            tile(rows, s->row_size, TILE, K, s->x, tokens, s->out + r, ROWS + 16, s->pack,
                 s->weights + at, tile_size);
        }
        double done = (double)ROWS * K * tokens / (seconds() - start);
        clear_registers();
        double after = peak();
        if (i < 0) continue;
        speed[i] = done, fraction[i] = done * 2 / (before + after);
        if (fraction[i] > best) best = fraction[i];
    }
    printf(" %4.0f %2.0f%%(%2.0f)", median(speed, SAMPLES) * 1e-9, 100 * median(fraction, SAMPLES),
           100 * best);
    fflush(stdout);
}

int main(int argc, char **argv) {
    const char *isa_name = argc > 1 ? argv[1] : "all", *type_name = argc > 2 ? argv[2] : "all";
    const int cold = argc > 3 && !strcmp(argv[3], "cold");
    int tokens[16] = {1, 2, 3, 4, 8, 16, 32, 64, 128}, n_tokens = 9;
    if (argc > 4) {
        n_tokens = 0;
        for (char *p = argv[4]; *p && n_tokens < 16; p += *p == ',') {
            long t = strtol(p, &p, 10);
            if (t < 1 || t > MAX_TOKENS || (*p && *p != ',')) return 2;
            tokens[n_tokens++] = (int)t;
        }
    }
    for (int i = 0; i < 2; i++) {
        const moe_isa isa = i ? MOE_ISA_AVX512 : MOE_ISA_AVX2;
        if (moe_isa_resolve(isa) != isa) continue;
        if (strcmp(isa_name, "all") && strcmp(isa_name, i ? "avx512" : "avx2")) continue;
        printf("%s, %s weights: G/s, %% of peak, (best)\n%-5s", moe_isa_name(isa),
               cold ? "cold" : "hot", "T");
        for (int t = 0; t < n_tokens; t++) printf(" %12d", tokens[t]);
        puts("");
        for (int type = 0; type < 8; type++) {
            if (strcmp(type_name, "all") && strcmp(type_name, types[type].name)) continue;
            setup *s = (setup *)malloc(sizeof *s);
            open_setup(s, type, cold);
            printf("%-5s", types[type].name);
            for (int t = 0; t < n_tokens; t++) measure(isa, type, s, tokens[t]);
            puts("");
            close_setup(s);
            free(s);
        }
    }
    return 0;
}
