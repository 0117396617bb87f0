// What the machine could do at most, measured in the same process and with as many threads as what
// is compared with it:
//
//     roofs_read    bytes per second of only reading memory, far beyond the caches
//     roofs_int8    8-bit multiply-adds per second of a loop that touches no memory
//     roofs_float   the same of 32-bit floats
//
// Processors, above all virtual ones, change their speed by a factor of two within minutes, so each
// call is short (tens of milliseconds): alternate it with what is measured and take medians.
// Include moe_infer.h first.
#ifndef ROOFS_H
#define ROOFS_H
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

// Works for `seconds` by roofs_now and returns what was done per second.
typedef struct roofs roofs;
typedef double roofs_work(roofs *r, int thread, double seconds, void *user);

typedef struct roofs_thread {
    roofs *team;
    int index;
    pthread_t handle;
    uint8_t *memory; // this thread's part of the memory: each reads its own
    size_t size, at; // bytes of it; where reading goes on
    double rate;
} roofs_thread;

struct roofs {
    int n_threads;
    moe_isa isa;     // as resolved: SCALAR, AVX2, AVX512, AVX_VNNI
    clockid_t clock; // CLOCK_MONOTONIC, or CLOCK_THREAD_CPUTIME_ID: other programs cost caches
                     // and bandwidth, but not time
    uint8_t *memory;
    size_t size;
    roofs_thread *threads; // the caller is number 0
    pthread_mutex_t start;
    pthread_barrier_t begin, end;
    roofs_work *work; // of the round that begins; NULL: the threads leave
    double seconds;
    void *user;
};

static inline double roofs_now(const roofs *r) {
    struct timespec now;
    clock_gettime(r->clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline int roofs_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
// Sorts x. 0 of nothing.
static inline double roofs_median(double *x, int n) {
    if (n < 1) return 0;
    qsort(x, (size_t)n, sizeof *x, roofs_compare);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

// ---- the team --------------------------------------------------------------------------------

static inline void *roofs_main(void *arg) {
    roofs_thread *t = (roofs_thread *)arg;
    roofs *r = t->team;
    pthread_mutex_lock(&r->start);
    pthread_mutex_unlock(&r->start);
    for (;;) {
        pthread_barrier_wait(&r->begin);
        if (!r->work) return NULL;
        t->rate = r->work(r, t->index, r->seconds, r->user);
        pthread_barrier_wait(&r->end);
    }
}

// All threads work at the same time. Returns the sum of their rates.
static inline double roofs_run(roofs *r, roofs_work *work, void *user, double seconds) {
    double sum = 0;
    r->work = work, r->user = user, r->seconds = seconds;
    pthread_barrier_wait(&r->begin);
    r->threads[0].rate = work(r, 0, seconds, user);
    pthread_barrier_wait(&r->end);
    for (int i = 0; i < r->n_threads; i++) sum += r->threads[i].rate;
    return sum;
}

// ---- reading ---------------------------------------------------------------------------------

// Nothing is prefetched: on a Zen 4 its own prefetching gave 26 GB/s on one thread, prefetch
// instructions at any distance 17 to 22, and two or four streams instead of one 24.
enum { ROOFS_CHUNK = 1 << 19 }; // bytes between two looks at the clock

static inline uint64_t roofs_read_plain(const uint8_t *p, size_t size) {
    uint64_t x[8] = {0};
    for (size_t i = 0; i + 64 <= size; i += 64) {
        uint64_t v[8];
        memcpy(v, p + i, 64);
        for (int j = 0; j < 8; j++) x[j] ^= v[j];
    }
    return x[0] ^ x[1] ^ x[2] ^ x[3] ^ x[4] ^ x[5] ^ x[6] ^ x[7];
}
#if defined(__x86_64__)
__attribute__((target("avx2"))) static inline uint64_t roofs_read_256(const uint8_t *p,
                                                                      size_t size) {
    __m256i x[4];
    for (int j = 0; j < 4; j++) x[j] = _mm256_setzero_si256();
    for (size_t i = 0; i + 128 <= size; i += 128) {
        const __m256i *v = (const __m256i *)(const void *)(p + i);
        x[0] = _mm256_xor_si256(x[0], _mm256_loadu_si256(v));
        x[1] = _mm256_xor_si256(x[1], _mm256_loadu_si256(v + 1));
        x[2] = _mm256_xor_si256(x[2], _mm256_loadu_si256(v + 2));
        x[3] = _mm256_xor_si256(x[3], _mm256_loadu_si256(v + 3));
    }
    x[0] = _mm256_xor_si256(_mm256_xor_si256(x[0], x[1]), _mm256_xor_si256(x[2], x[3]));
    return (uint64_t)_mm256_extract_epi64(x[0], 0) ^ (uint64_t)_mm256_extract_epi64(x[0], 2);
}
__attribute__((target("avx512f"))) static inline uint64_t roofs_read_512(const uint8_t *p,
                                                                         size_t size) {
    __m512i x = _mm512_setzero_si512(), y = x;
    for (size_t i = 0; i + 128 <= size; i += 128) {
        x = _mm512_xor_si512(x, _mm512_loadu_si512(p + i));
        y = _mm512_xor_si512(y, _mm512_loadu_si512(p + i + 64));
    }
    return (uint64_t)_mm512_reduce_or_epi64(_mm512_xor_si512(x, y));
}
#endif

static volatile uint64_t roofs_sink;

// Reads with the widest loads that the machine has, whatever the kernels use.
static inline void roofs_read_bytes(const uint8_t *p, size_t size) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) roofs_sink = roofs_read_512(p, size);
    else if (__builtin_cpu_supports("avx2")) roofs_sink = roofs_read_256(p, size);
    else
#endif
        roofs_sink = roofs_read_plain(p, size);
}

static inline double roofs_read_work(roofs *r, int thread, double seconds, void *user) {
    roofs_thread *t = &r->threads[thread];
    const double start = roofs_now(r);
    double now = start, bytes = 0;
    (void)user;
    while (now - start < seconds) {
        if (t->at + ROOFS_CHUNK > t->size) t->at = 0;
        roofs_read_bytes(t->memory + t->at, ROOFS_CHUNK);
        t->at += ROOFS_CHUNK;
        bytes += ROOFS_CHUNK;
        now = roofs_now(r);
    }
    return bytes / (now - start);
}
// Bytes per second of all threads.
static inline double roofs_read(roofs *r, double seconds) {
    return roofs_run(r, roofs_read_work, NULL, seconds);
}

// ---- calculating -----------------------------------------------------------------------------

// Loops over 12 independent chains, which hide the latency of every processor so far. The numbers
// are ordinary ones, no zeros or denormals. Each returns its multiply-adds.

#if defined(__x86_64__)
#define ROOFS_12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define ROOFS_ZERO(n) "vpxor %%xmm" #n ", %%xmm" #n ", %%xmm" #n "\n"
#define ROOFS_LOOP(name, broadcast, vectors, chain, per_step)                                   \
    static inline double name(uint64_t steps, const uint32_t *x) {                              \
        const double work = 12.0 * per_step * (double)steps;                                    \
        __asm__ volatile(broadcast " %1, %%" vectors "14\n" broadcast " %2, %%" vectors "15\n"  \
                         ROOFS_12(ROOFS_ZERO)                                                   \
                         ".p2align 5\n1:\n" ROOFS_12(chain) "decq %0\njnz 1b\nvzeroupper\n"     \
                         : "+r"(steps)                                                          \
                         : "m"(x[0]), "m"(x[1])                                                 \
                         : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",        \
                           "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm13", "xmm14", "xmm15"); \
        return work;                                                                            \
    }
#define ROOFS_DOT_512(n) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #n "\n"
#define ROOFS_DOT_256(n) "vpdpbusd %%ymm14, %%ymm15, %%ymm" #n "\n"
#define ROOFS_DOT_VEX(n) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #n "\n"
#define ROOFS_MADD(n) "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\nvpaddw %%ymm13, %%ymm" #n \
                      ", %%ymm" #n "\n"
#define ROOFS_FMA_512(n) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #n "\n"
#define ROOFS_FMA_256(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n"
ROOFS_LOOP(roofs_int8_avx512, "vpbroadcastd", "zmm", ROOFS_DOT_512, 64)
ROOFS_LOOP(roofs_int8_vl, "vpbroadcastd", "ymm", ROOFS_DOT_256, 32)
ROOFS_LOOP(roofs_int8_vnni, "vpbroadcastd", "ymm", ROOFS_DOT_VEX, 32)
// Without VNNI: 32 products, each two added up as int16, and the least that can follow, adding
// them to an int16 sum. Kernels must widen to int32 now and then, too.
ROOFS_LOOP(roofs_int8_avx2, "vpbroadcastd", "ymm", ROOFS_MADD, 32)
ROOFS_LOOP(roofs_float_avx512, "vbroadcastss", "zmm", ROOFS_FMA_512, 16)
ROOFS_LOOP(roofs_float_avx2, "vbroadcastss", "ymm", ROOFS_FMA_256, 8)

// The 256-bit vpdpbusd: 2 as VEX (AVX-VNNI), 1 as EVEX (AVX-512 VL and VNNI), 0 not at all.
static inline int roofs_vnni(void) {
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4)) return 2;
    if (!__builtin_cpu_supports("avx512vl") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (c & 1u << 11) != 0;
}
#endif

#define ROOFS_PLAIN(name, type)                                                        \
    static inline double name(uint64_t steps, const uint32_t *x) {                     \
        volatile type seed = (type)x[0] / 2;                                           \
        const type y = seed, one = seed;                                               \
        type a = y, b = y + 1, c = y + 2, d = y + 3, e = y + 4, f = y + 5, g = y + 6,  \
             h = y + 7;                                                                \
        for (uint64_t r = 0; r < steps; r++) {                                         \
            a = a * y + one, b = b * y + one, c = c * y + one, d = d * y + one;        \
            e = e * y + one, f = f * y + one, g = g * y + one, h = h * y + one;        \
        }                                                                              \
        seed = a + b + c + d + e + f + g + h;                                          \
        return 8.0 * (double)steps;                                                    \
    }
// Plain C, 32-bit multiply-adds in 8 chains. Not a bound: where the compiler finds vectors in the
// plain C kernels, they are faster.
ROOFS_PLAIN(roofs_int8_plain, uint32_t)
ROOFS_PLAIN(roofs_float_plain, float)

static inline double roofs_math_work(roofs *r, int thread, double seconds, void *user) {
    static const uint32_t bytes[2] = {0x03010201, 0x7F050B02}; // int8
    static const uint32_t floats[2] = {0x3F000000, 0x3E800000}; // 1/2, 1/4
    static const uint32_t ones[2] = {2, 2};
    const int is_float = *(const int *)user;
    double (*loop)(uint64_t, const uint32_t *) = is_float ? roofs_float_plain : roofs_int8_plain;
    const uint32_t *x = ones;
    (void)thread;
#if defined(__x86_64__)
    if (r->isa == MOE_ISA_AVX512) loop = is_float ? roofs_float_avx512 : roofs_int8_avx512;
    else if (r->isa != MOE_ISA_SCALAR) loop = is_float ? roofs_float_avx2 : roofs_int8_avx2;
    if (r->isa == MOE_ISA_AVX_VNNI && !is_float && roofs_vnni())
        loop = roofs_vnni() > 1 ? roofs_int8_vnni : roofs_int8_vl;
    if (r->isa != MOE_ISA_SCALAR) x = is_float ? floats : bytes;
#else
    (void)bytes, (void)floats;
#endif
    const double start = roofs_now(r);
    double now = start, work = 0;
    while (now - start < seconds) {
        work += loop(4000, x);
        now = roofs_now(r);
    }
    return work / (now - start);
}
// Multiply-adds per second of all threads, with the best instruction of r->isa.
static inline double roofs_int8(roofs *r, double seconds) {
    int is_float = 0;
    return roofs_run(r, roofs_math_work, &is_float, seconds);
}
static inline double roofs_float(roofs *r, double seconds) {
    int is_float = 1;
    return roofs_run(r, roofs_math_work, &is_float, seconds);
}

// ---- opening ---------------------------------------------------------------------------------

// Bytes of the last cache, 0 if the system does not tell. (sysconf counts it once per core.)
static inline size_t roofs_cache_size(void) {
    unsigned long kib = 0;
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
    if (file) {
        if (fscanf(file, "%luK", &kib) != 1) kib = 0;
        fclose(file);
    }
    return (size_t)kib << 10;
}

// 1 GiB, 8 times the last cache or 64 MiB per thread, whatever is most; but at most half of what
// nobody uses, so that no model's pages have to go, and not less than 128 MiB.
static inline size_t roofs_memory_size(int n_threads) {
    const size_t least = (size_t)128 << 20;
    size_t size = (size_t)1 << 30, free_bytes = 0;
    const long page = sysconf(_SC_PAGESIZE), pages = sysconf(_SC_AVPHYS_PAGES);
    if (roofs_cache_size() * 8 > size) size = roofs_cache_size() * 8;
    if ((size_t)n_threads << 26 > size) size = (size_t)n_threads << 26;
    if (pages > 0 && page > 0) free_bytes = (size_t)pages * (size_t)page;
    if (free_bytes && size > free_bytes / 2) size = free_bytes / 2;
    return size > least ? size : least;
}

// Random bytes of 0x20 .. 0x3F: as numbers of any float type, they are neither 0 nor denormal nor
// large. Each thread writes its own part, so that the pages lie near its processor.
static inline double roofs_fill_work(roofs *r, int thread, double seconds, void *user) {
    roofs_thread *t = &r->threads[thread];
    uint64_t x = 88172645463325252u + (uint64_t)thread * 0x9E3779B97F4A7C15u;
    (void)seconds, (void)user;
    for (size_t i = 0; i + 8 <= t->size; i += 8) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint64_t v = (x & 0x1F1F1F1F1F1F1F1Fu) | 0x2020202020202020u;
        memcpy(t->memory + i, &v, 8);
    }
    return 0;
}

static inline void roofs_close(roofs *r) {
    if (r->n_threads) {
        r->work = NULL;
        pthread_barrier_wait(&r->begin);
        for (int i = 1; i < r->n_threads; i++) pthread_join(r->threads[i].handle, NULL);
        pthread_mutex_destroy(&r->start);
        pthread_barrier_destroy(&r->begin);
        pthread_barrier_destroy(&r->end);
    }
    if (r->memory) munmap(r->memory, r->size);
    free(r->threads);
    memset(r, 0, sizeof *r);
}

// Returns 0, or -1 if memory or threads are not to be had; then *r is as if closed.
static inline int roofs_open(roofs *r, int n_threads, moe_isa isa, clockid_t clock) {
    const size_t huge = (size_t)2 << 20;
    memset(r, 0, sizeof *r);
    r->isa = isa, r->clock = clock;
    r->size = roofs_memory_size(n_threads) & ~(huge - 1);
    void *memory = mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return -1;
    r->memory = (uint8_t *)memory;
#ifdef MADV_HUGEPAGE
    madvise(r->memory, r->size, MADV_HUGEPAGE);
#endif
    r->threads = (roofs_thread *)calloc((size_t)n_threads, sizeof *r->threads);
    if (!r->threads) {
        roofs_close(r);
        return -1;
    }
    const size_t part = r->size / (size_t)n_threads & ~(size_t)4095;
    for (int i = 0; i < n_threads; i++) {
        r->threads[i].team = r, r->threads[i].index = i;
        r->threads[i].memory = r->memory + (size_t)i * part, r->threads[i].size = part;
    }
    // New threads wait for `start` until the barriers are made for as many as there are.
    pthread_mutex_init(&r->start, NULL);
    pthread_mutex_lock(&r->start);
    for (r->n_threads = 1; r->n_threads < n_threads; r->n_threads++) {
        roofs_thread *t = &r->threads[r->n_threads];
        if (pthread_create(&t->handle, NULL, roofs_main, t)) break;
    }
    pthread_barrier_init(&r->begin, NULL, (unsigned)r->n_threads);
    pthread_barrier_init(&r->end, NULL, (unsigned)r->n_threads);
    pthread_mutex_unlock(&r->start);
    if (r->n_threads < n_threads) {
        roofs_close(r);
        return -1;
    }
    roofs_run(r, roofs_fill_work, NULL, 0);
    return 0;
}

#endif
