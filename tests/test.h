// A tiny test harness: TEST(name) { ... CHECK(condition) ... }, then MAIN().
// A program takes name filters as arguments and ends with the line "N passed, N failed"
// (", N skipped"); exit code 1 if anything failed.
#ifndef TEST_H
#define TEST_H
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct test_case {
    const char *name;
    void (*run)(void);
    struct test_case *next;
} test_case;
static test_case *test_first, **test_last = &test_first;
static int test_failures, test_skips; // within the running test

#define TEST(name)                                                                   \
    static void test_##name(void);                                                   \
    static test_case test_case_##name = {#name, test_##name, NULL};                  \
    __attribute__((constructor)) static void test_register_##name(void) {            \
        *test_last = &test_case_##name;                                              \
        test_last = &test_case_##name.next;                                          \
    }                                                                                \
    static void test_##name(void)

// Counts a failure and goes on. The second form prints the values that explain it.
#define CHECK(condition) \
    ((condition) ? (void)0 : (test_failures++, test_report(__FILE__, __LINE__, #condition)))
#define CHECKF(condition, ...)                                                                 \
    ((condition) ? (void)0                                                                     \
                 : (test_failures++, test_report(__FILE__, __LINE__, #condition),              \
                    (void)(test_failures <= 100 && printf("    " __VA_ARGS__)), (void)puts("")))
// Ends the test without judging it: reference data is missing.
#define SKIP(...)                                                       \
    do {                                                                \
        test_skips++;                                                   \
        printf("  skipped: ");                                          \
        printf(__VA_ARGS__);                                            \
        puts("");                                                       \
        return;                                                         \
    } while (0)

__attribute__((unused)) static void test_report(const char *file, int line, const char *what) {
    if (test_failures <= 100) printf("  %s:%d: failed: %s\n", file, line, what);
}

static int test_main(int argc, char **argv) {
    int passed = 0, failed = 0, skipped = 0;
    for (test_case *t = test_first; t; t = t->next) {
        int wanted = argc < 2;
        for (int i = 1; i < argc; i++) wanted |= strstr(t->name, argv[i]) != NULL;
        if (!wanted) continue;
        test_failures = test_skips = 0;
        printf("%s\n", t->name);
        fflush(stdout);
        t->run();
        if (test_failures) {
            failed++;
            printf("  FAILED (%d checks)\n", test_failures);
        } else if (test_skips) {
            skipped++;
        } else {
            passed++;
        }
    }
    printf("%d passed, %d failed", passed, failed);
    if (skipped) printf(", %d skipped", skipped);
    puts("");
    return failed != 0;
}
#define MAIN() \
    int main(int argc, char **argv) { return test_main(argc, argv); }

#endif
