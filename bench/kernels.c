/* Speed of the decoding kernels, one thread: GB/s of weights per type and instruction set, from the
 * cache (weights fit into L2) and from memory (a buffer far beyond the caches), each beside a loop
 * that only reads the same bytes, 64 at a time. Medians of short repetitions that alternate
 * between kernel and reading, because a machine's speed drifts.
 * Build: cc -O2 bench/kernels.c -o build/bench-kernels -lm -pthread
 * Usage: bench-kernels [-n row length] [-l KiB in cache] [-m MiB in memory] [-r repetitions]
 *                      [type ...] */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include <sys/mman.h>

enum { MAX_REPETITIONS = 1000, CHUNK = 4 << 20 };

/* ---- a loop that only reads ------------------------------------------------------------------ */

#if MOE__X86
__attribute__((target("avx2"), noinline)) static uint64_t read_all(const uint8_t *p, size_t size) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i + 128 <= size; i += 128) {
        const __m256i *v = (const __m256i *)(const void *)(p + i);
        a = _mm256_or_si256(a, _mm256_loadu_si256(v));
        b = _mm256_or_si256(b, _mm256_loadu_si256(v + 1));
        c = _mm256_or_si256(c, _mm256_loadu_si256(v + 2));
        d = _mm256_or_si256(d, _mm256_loadu_si256(v + 3));
    }
    a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    return (uint64_t)_mm256_extract_epi64(a, 0) | (uint64_t)_mm256_extract_epi64(a, 2);
}
#if MOE__USE_AVX512
__attribute__((target("avx512f"), noinline)) static uint64_t read_all_512(const uint8_t *p,
                                                                          size_t size) {
    __m512i a = _mm512_setzero_si512(), b = a;
    for (size_t i = 0; i + 128 <= size; i += 128) {
        a = _mm512_or_si512(a, _mm512_loadu_si512(p + i));
        b = _mm512_or_si512(b, _mm512_loadu_si512(p + i + 64));
    }
    return (uint64_t)_mm512_reduce_or_epi64(_mm512_or_si512(a, b));
}
#endif
#else
static uint64_t read_all(const uint8_t *p, size_t size) {
    uint64_t sum = 0;
    for (size_t i = 0; i + 8 <= size; i += 8) sum |= moe__load_u64(p + i);
    return sum;
}
#endif

static uint64_t sink;
static void read_bytes(moe_isa isa, const uint8_t *p, size_t size) {
#if MOE__X86 && MOE__USE_AVX512
    if (isa == MOE_ISA_AVX512) {
        sink |= read_all_512(p, size);
        return;
    }
#endif
    (void)isa;
    sink |= read_all(p, size);
}

/* ---- measuring ------------------------------------------------------------------------------- */

typedef struct job {
    const moe__kernels *kernels;
    int type, n;
    size_t row_size;
    const void *act;
    float *out;
    const uint8_t *weights;
    size_t size;  /* bytes of weights, whole rows */
    size_t chunk; /* bytes of one repetition */
    size_t next;  /* where the next repetition begins */
} job;

/* The next chunk's offset; chunks walk through all the weights so that a big buffer stays cold. */
static size_t next_chunk(job *j) {
    if (j->next + j->chunk > j->size) j->next = 0;
    size_t at = j->next;
    j->next += j->chunk;
    return at;
}

/* Processor time of this thread: other programs cost cache and bandwidth, but are not counted. */
static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* GB/s of one repetition of at least half a millisecond. */
static double run(job *j, int reading) {
    double start = seconds(), end;
    size_t bytes = 0;
    do {
        size_t until = bytes + (1 << 20); /* asking for the time takes as long as reading 10 KiB */
        while (bytes < until) {
            const uint8_t *p = j->weights + next_chunk(j);
            if (reading)
                read_bytes(j->kernels->isa, p, j->chunk);
            else
                j->kernels->type[j->type].dot(p, j->row_size, (int64_t)(j->chunk / j->row_size),
                                              j->n, j->act, j->out);
            bytes += j->chunk;
        }
        end = seconds();
    } while (end - start < 5e-4);
    return (double)bytes / (end - start) * 1e-9;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Prints the medians of kernel, reading and their ratio, and the best of the kernel. */
static void measure(job *j, int repetitions) {
    static double k[MAX_REPETITIONS], r[MAX_REPETITIONS], q[MAX_REPETITIONS];
    run(j, 0);
    run(j, 1);
    for (int i = 0; i < repetitions; i++) {
        k[i] = run(j, 0);
        r[i] = run(j, 1);
        q[i] = k[i] / r[i];
    }
    qsort(k, (size_t)repetitions, sizeof *k, compare);
    qsort(r, (size_t)repetitions, sizeof *r, compare);
    qsort(q, (size_t)repetitions, sizeof *q, compare);
    printf(" | %8.1f %6.1f %6.1f %6.2f", k[repetitions / 2], k[repetitions - 1], r[repetitions / 2],
           q[repetitions / 2]);
    fflush(stdout);
}

/* ---- rows of random levels, scales of ordinary size ------------------------------------------ */

typedef struct type_info {
    const char *name;
    int block, size;
    moe__act_kind act;
} type_info;
static const type_info types[] = {
#define TYPE_INFO(NAME, name, block, size, act) {#NAME, block, size, MOE__ACT_##act},
    MOE__TYPES(TYPE_INFO)};

static void fill(uint8_t *p, size_t size, const type_info *t) {
    uint64_t seed = 88172645463325252u;
    size_t unique = size < 4 << 20 ? size : (size_t)(4 << 20) / (size_t)t->size * (size_t)t->size;
    for (size_t i = 0; i < unique; i++) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        p[i] = (uint8_t)(seed >> 32);
    }
    for (size_t i = 0; i + (size_t)t->size <= unique; i += (size_t)t->size) {
        if (t->size == 4) p[i + 3] = 0x3F; /* f32: 0.5 .. 2 */
        if (t->size == 2) p[i + 1] = (uint8_t)(t->name[0] == 'B' ? 0x3F : 0x3C);
        if (t->block > 1) { /* f16 scales: 0.0078 */
            moe__store_u16(p + i + (t->size == 210 ? 208 : 0), 0x2000);
            if (t->size == 144 || t->size == 176) moe__store_u16(p + i + 2, 0x2000);
        }
    }
    for (size_t i = unique; i < size; i++) p[i] = p[i - unique];
}

int main(int argc, char **argv) {
    int n = 2048, cache = 512, memory = 256, repetitions = 41, n_names = 0;
    const char *names[64];
    for (int i = 1; i < argc; i++) {
        int *option = !strcmp(argv[i], "-n")   ? &n
                      : !strcmp(argv[i], "-l") ? &cache
                      : !strcmp(argv[i], "-m") ? &memory
                      : !strcmp(argv[i], "-r") ? &repetitions
                                               : NULL;
        if (option && i + 1 < argc)
            *option = atoi(argv[++i]);
        else if (!option && argv[i][0] != '-' && n_names < 64)
            names[n_names++] = argv[i];
        else {
            fprintf(stderr, "usage: %s [-n row length] [-l KiB in cache] [-m MiB in memory] "
                            "[-r repetitions] [type ...]\n", argv[0]);
            return 2;
        }
    }
    if (n < 256 || n % 32 || n > 1 << 20 || cache < 1 || memory < 0 || repetitions < 1 ||
        repetitions > MAX_REPETITIONS) {
        fprintf(stderr, "%s: bad size\n", argv[0]);
        return 2;
    }
    size_t memory_size = (size_t)memory << 20, cache_size = (size_t)cache << 10;
    size_t capacity = (memory_size > cache_size ? memory_size : cache_size) + 4096;
    uint8_t *weights = (uint8_t *)mmap(NULL, capacity, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    float *x = (float *)malloc((size_t)n * sizeof *x), *out = (float *)malloc(capacity / 64 + 4096);
    void *act = aligned_alloc(64, (moe__act_size(MOE__ACT_F32, n) + 1024 + 63) / 64 * 64);
    if (weights == MAP_FAILED || !x || !out || !act) {
        fprintf(stderr, "%s: out of memory\n", argv[0]);
        return 1;
    }
    for (int i = 0; i < n; i++) x[i] = (float)(i * 37 % 101 - 50) / 50;
    printf("rows of %d weights, one thread, GB/s of weights; read: a loop that only reads\n", n);
    printf("%-19s | %-29s | %d MiB in memory\n", "", "in cache", memory);
    printf("%-6s %-12s |   median   best   read  ratio |   median   best   read  ratio\n", "type",
           "instructions");
    for (int type = 0; type < MOE__N_TYPES; type++) {
        const type_info *t = &types[type];
        int wanted = n_names == 0;
        for (int i = 0; i < n_names; i++) wanted |= !strcmp(names[i], t->name);
        if (!wanted || n % t->block) continue;
        fill(weights, capacity - 4096, t);
        for (int isa = MOE_ISA_SCALAR; isa <= MOE_ISA_AVX512; isa++) {
            if ((int)moe_isa_resolve((moe_isa)isa) != isa) continue;
            job j;
            memset(&j, 0, sizeof j);
            j.kernels = moe__kernels_get((moe_isa)isa);
            j.type = type;
            j.n = n;
            j.row_size = (size_t)(n / t->block) * (size_t)t->size;
            j.kernels->quantize[t->act](x, n, act);
            j.act = act;
            j.out = out;
            j.weights = weights;
            j.size = j.chunk = cache_size / j.row_size * j.row_size;
            if (!j.size) continue;
            printf("%-6s %-12s", t->name, moe_isa_name(j.kernels->isa));
            measure(&j, repetitions);
            size_t chunk = memory_size < CHUNK ? memory_size : CHUNK;
            j.chunk = chunk / j.row_size * j.row_size;
            j.size = memory_size / j.row_size * j.row_size;
            j.next = 0;
            if (j.chunk) measure(&j, repetitions);
            printf("\n");
        }
    }
    return sink == 1;
}
