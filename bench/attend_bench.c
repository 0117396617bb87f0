/* Attention kernels: multiply-adds per second beside a register-only FMA loop, and bytes of cache
 * per second beside plain reading. Every sample lies between two runs of its roof, so the ratios
 * hold even when the clock changes; figures are medians of short samples.
 *     cc -O2 bench/attend_bench.c -lm -lpthread
 *     ./a.out [seconds per case, 0.5 [part of a name [anything: ask for huge pages]]] */
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

enum { MAX_SAMPLES = 4096 };
static double bench_seconds = 0.5;
static volatile float sink;

typedef struct use {
    const char *name;
    int n_queries, dk, dv;
    moe_kv_type type;
    int causal;
    int heads;       /* cache rows of this many heads lie side by side: the stride of a key */
    int same_memory; /* values are the front of the keys (MLA) */
    size_t bytes;    /* of cache that is walked through: more than the caches = from memory */
} use;

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare_doubles);
    return x[n / 2];
}

#if MOE__X86
#define FMA_LOOP(name, isa, type, op, lanes)                                                    \
    static __attribute__((target(isa), noinline)) double name(int rounds) {                     \
        type a = op(set1)(0.0f), b = op(set1)(0.1f), c = op(set1)(0.2f), d = op(set1)(0.3f);    \
        type e = op(set1)(0.4f), f = op(set1)(0.5f), g = op(set1)(0.6f), h = op(set1)(0.7f);    \
        type i = op(set1)(0.8f), j = op(set1)(0.9f), x = op(set1)(0.99f), y = op(set1)(0.1f);   \
        for (int r = 0; r < rounds; r++) {                                                      \
            a = op(fmadd)(a, x, y), b = op(fmadd)(b, x, y), c = op(fmadd)(c, x, y);             \
            d = op(fmadd)(d, x, y), e = op(fmadd)(e, x, y), f = op(fmadd)(f, x, y);             \
            g = op(fmadd)(g, x, y), h = op(fmadd)(h, x, y), i = op(fmadd)(i, x, y);             \
            j = op(fmadd)(j, x, y);                                                             \
        }                                                                                       \
        float out[lanes];                                                                       \
        a = op(add)(op(add)(op(add)(a, b), op(add)(c, d)), op(add)(op(add)(e, f), op(add)(g, h))); \
        op(storeu)(out, op(add)(a, op(add)(i, j)));                                             \
        sink = out[0];                                                                          \
        return 10.0 * lanes * rounds;                                                           \
    }
#define OP256(name) _mm256_##name##_ps
#define OP512(name) _mm512_##name##_ps
FMA_LOOP(fma_avx2, "avx2,fma", __m256, OP256, 8)
FMA_LOOP(fma_avx512, "avx512f", __m512, OP512, 16)
#endif

/* Multiply-adds per second of a loop that touches no memory. */
static double fma_roof(moe_isa isa) {
    double start = moe__seconds(), work = 0;
#if MOE__X86
    work = isa == MOE_ISA_AVX512 ? fma_avx512(8000) : fma_avx2(8000);
#else
    (void)isa;
#endif
    return work / (moe__seconds() - start);
}

/* Bytes per second of reading. */
static double read_roof(const uint8_t *memory, size_t size) {
    double start = moe__seconds();
    uint64_t sum = 0;
    for (size_t i = 0; i + 64 <= size; i += 64)
        sum += moe__load_u64(memory + i) + moe__load_u64(memory + i + 32);
    sink = (float)sum;
    return (double)size / (moe__seconds() - start);
}

static void run(const moe__kernels *kernels, const use *u, uint8_t *memory) {
    enum { KEYS = MOE__ATTEND_KEYS, QUERIES = MOE__ATTEND_QUERIES };
    static float q[QUERIES * 576], out[QUERIES * 512], max[QUERIES], sum[QUERIES];
    static MOE__ALIGNED(64) float scores[QUERIES * KEYS];
    static double rate[MAX_SAMPLES], part[MAX_SAMPLES];
    static double bandwidth[MAX_SAMPLES], of_read[MAX_SAMPLES];
    int32_t visible[QUERIES];
    const size_t row = moe__kv_bytes(u->type, u->dk);
    const size_t block = row * (size_t)u->heads * KEYS, halves = u->same_memory ? 1 : 2;
    const size_t n_blocks = (u->bytes / halves) / block ? (u->bytes / halves) / block : 1;
    double fma = 0, bytes = 0;
    for (int i = 0; i < QUERIES * 576; i++) q[i] = (float)((i * 37 % 101) - 50) * 0.002f;
    for (int i = 0; i < QUERIES; i++) {
        visible[i] = u->causal ? KEYS - u->n_queries + 1 + i : KEYS;
        max[i] = -INFINITY;
    }
    moe__attend_args a;
    memset(&a, 0, sizeof a);
    a.q = q, a.q_stride = u->dk, a.k_bytes = a.v_bytes = row * (size_t)u->heads;
    a.type = u->type, a.dk = u->dk, a.dv = u->dv, a.n_queries = u->n_queries, a.n_keys = KEYS;
    a.n_visible = visible, a.max = max, a.sum = sum, a.out = out, a.out_stride = u->dv;
    a.scores = scores;
    for (int i = 0; i < u->n_queries; i++) fma += (double)visible[i] * (u->dk + u->dv);
    /* About 0.2 ms: a sample should end before the scheduler gives the processor to another. */
    const int calls = fma > 8e6 ? 1 : fma < 5e5 ? 16 : (int)(8e6 / fma);
    bytes = (double)KEYS * (double)row * (double)halves;
    const double start = moe__seconds();
    int n = 0;
    size_t at = 0;
    while (n < MAX_SAMPLES && (n < 5 || moe__seconds() - start < bench_seconds)) {
        double roof = fma_roof(kernels->isa);
        double read = read_roof(memory + at * block / 2 % (64 << 20), 1 << 20);
        double t = moe__seconds();
        for (int call = 0; call < calls; call++) { /* one head through the cache, then the next */
            const size_t head = at / n_blocks % (size_t)u->heads * row, b = at % n_blocks;
            a.k = memory + b * block + head;
            a.v = u->same_memory ? memory + b * block + head
                                 : memory + (n_blocks + b) * block + head;
            kernels->attend(&a);
            at++;
        }
        t = (moe__seconds() - t) / calls;
        roof = (roof + fma_roof(kernels->isa)) / 2;
        rate[n] = fma / t, part[n] = fma / t / roof;
        bandwidth[n] = bytes / t, of_read[n] = bytes / t / read;
        n++;
    }
    printf("%-44s %-8s %6.1f G FMA/s %4.0f %% of peak", u->name, moe_isa_name(kernels->isa),
           1e-9 * median(rate, n), 100 * median(part, n));
    if (u->bytes > 64u << 20)
        printf("  %5.1f GB/s %4.0f %% of reading", 1e-9 * median(bandwidth, n),
               100 * median(of_read, n));
    puts("");
}

int main(int argc, char **argv) {
    const size_t large = (size_t)384 << 20, hot = 1 << 18;
    const moe_kv_type F16 = MOE_KV_F16, Q8 = MOE_KV_Q8_0, F32 = MOE_KV_F32;
    const use uses[] = {
        {"prefill 32 queries, d 128, f16", 32, 128, 128, F16, 0, 1, 0, hot},
        {"prefill 32 queries, d 128, f16, causal", 32, 128, 128, F16, 1, 1, 0, hot},
        {"prefill 32 queries, d 128, f32", 32, 128, 128, F32, 0, 1, 0, hot},
        {"prefill 32 queries, d 64, f16", 32, 64, 64, F16, 0, 1, 0, hot},
        {"prefill 32 queries, MLA expanded 192/192", 32, 192, 192, F16, 1, 1, 0, hot},
        {"prefill 32 queries, MLA absorbed 576/512", 32, 576, 512, F16, 0, 1, 1, hot},
        {"decode 1 query, d 128, rows of one head", 1, 128, 128, F16, 0, 1, 0, large},
        {"decode 4 queries, d 128, rows of one head", 4, 128, 128, F16, 0, 1, 0, large},
        {"decode 8 queries, d 128, rows of one head", 8, 128, 128, F16, 0, 1, 0, large},
        {"decode 8 queries, d 128, rows of 4 heads", 8, 128, 128, F16, 0, 4, 0, large},
        {"decode 8 queries, d 128, rows of 8 heads", 8, 128, 128, F16, 0, 8, 0, large},
        {"decode 1 query, d 128, in cache", 1, 128, 128, F16, 0, 1, 0, hot},
        {"decode 8 queries, d 128, in cache", 8, 128, 128, F16, 0, 1, 0, hot},
        {"decode MLA 16 queries, 576/512", 16, 576, 512, F16, 0, 1, 1, large},
        {"decode MLA 16 queries, 576/512, in cache", 16, 576, 512, F16, 0, 1, 1, hot},
        {"prefill 32 queries, d 128, q8_0", 32, 128, 128, Q8, 0, 1, 0, hot},
        {"prefill 32 queries, MLA absorbed, q8_0", 32, 576, 512, Q8, 0, 1, 1, hot},
        {"decode 1 query, d 128, q8_0", 1, 128, 128, Q8, 0, 1, 0, large},
        {"decode 2 queries, d 128, q8_0", 2, 128, 128, Q8, 0, 1, 0, large},
        {"decode 3 queries, d 128, q8_0", 3, 128, 128, Q8, 0, 1, 0, large},
        {"decode 4 queries, d 128, q8_0", 4, 128, 128, Q8, 0, 1, 0, large},
        {"decode 8 queries, d 128, q8_0", 8, 128, 128, Q8, 0, 1, 0, large},
        {"decode 16 queries, d 128, q8_0", 16, 128, 128, Q8, 0, 1, 0, large},
        {"decode 1 query, d 128, q8_0, in cache", 1, 128, 128, Q8, 0, 1, 0, hot},
        {"decode 8 queries, d 128, q8_0, in cache", 8, 128, 128, Q8, 0, 1, 0, hot},
        {"decode MLA 8 queries, q8_0", 8, 576, 512, Q8, 0, 1, 1, large},
        {"decode MLA 16 queries, q8_0", 16, 576, 512, Q8, 0, 1, 1, large},
    };
    if (argc > 1) bench_seconds = atof(argv[1]);
    const char *only = argc > 2 ? argv[2] : "";
    uint8_t *memory = (uint8_t *)aligned_alloc(2 << 20, large + (64 << 20));
    if (!memory) return 1;
    if (argc > 3) madvise(memory, large + (64 << 20), MADV_HUGEPAGE);
    uint16_t *halves = (uint16_t *)(void *)memory;
    for (size_t i = 0; i < (large + (64 << 20)) / 2; i++)
        halves[i] = (uint16_t)(0x2C00 + (i * 2654435761u >> 20 & 0x83FF)); /* +-0.06 .. 0.12 */
    for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_AVX2; isa--) {
        if (moe_isa_resolve((moe_isa)isa) != (moe_isa)isa) continue;
        for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
            if (strstr(uses[i].name, only)) run(moe__kernels_get((moe_isa)isa), &uses[i], memory);
    }
    free(memory);
    return 0;
}
