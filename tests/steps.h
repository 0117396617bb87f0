// Counts the steps of a program, so that a test can limit what something costs on any machine,
// however busy. A program whose rule in the Makefile is in COUNTED is compiled so that each basic
// block calls tests/steps.c; what libc does with memory counts by its bytes. Include this before
// moe_infer.h.
#ifndef STEPS_H
#define STEPS_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern _Thread_local uint64_t steps_taken; // by this thread
uint64_t steps_now(void); // the same to read: a compiler does not know that blocks change it

static inline size_t steps_for(size_t bytes) {
    steps_taken += bytes / 16;
    return bytes;
}
static inline size_t steps_strlen(const char *text) { return steps_for(strlen(text)); }
static inline void *steps_memchr(const void *text, int byte, size_t bytes) {
    const void *at = memchr(text, byte, bytes);
    steps_for(at ? (size_t)((const char *)at - (const char *)text) : bytes);
    return (void *)at;
}
static inline int steps_strcmp(const char *a, const char *b) {
    steps_for(strlen(a));
    return strcmp(a, b);
}

#define memset(to, byte, bytes) memset(to, byte, steps_for(bytes))
#define memcpy(to, from, bytes) memcpy(to, from, steps_for(bytes))
#define memmove(to, from, bytes) memmove(to, from, steps_for(bytes))
#define memcmp(a, b, bytes) memcmp(a, b, steps_for(bytes))
#define memchr(text, byte, bytes) steps_memchr(text, byte, bytes)
#define strlen(text) steps_strlen(text)
#define strcmp(a, b) steps_strcmp(a, b)

// Fails if eight times of what took `small` steps takes more than `factor` times as many, or if
// nothing is counted. Quadratic is 64; n log n is 8 * log(8 n) / log(n) < N_LOG_N for n >= 4096.
#define N_LOG_N 10.5
#define CHECK_GROWTH(large, small, factor, what, number)                                           \
    do {                                                                                           \
        const double growth_large = (double)(large), growth_small = (double)(small);               \
        CHECKF(growth_small > 1000 && growth_large < (factor) * growth_small,                      \
               "%s %d: %.0f steps, and %.0f for an eighth", what, number, growth_large,            \
               growth_small);                                                                      \
    } while (0)
#endif
