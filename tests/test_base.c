// >>base: numbers, checked sizes, memory, errors.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

TEST(every_f16_survives_a_round_trip_through_f32) {
    for (uint32_t i = 0; i < 65536; i++) {
        float x = moe__f16_to_f32((uint16_t)i);
        uint16_t back = moe__f32_to_f16(x);
        if (x != x)
            CHECKF((back & 0x7C00) == 0x7C00 && (back & 0x3FF), "NaN %04x became %04x", i, back);
        else
            CHECKF(back == i, "%04x became %04x", i, back);
    }
}

// Rounds through double: exact, then to the nearest half by comparing neighbours.
static uint16_t f16_by_search(float x) {
    uint16_t sign = (uint16_t)(moe__f32_bits(x) >> 16 & 0x8000), low = 0, high = 0x7C00;
    double a = fabs((double)x);
    if (a >= 65520) return (uint16_t)(sign | 0x7C00);
    while (high - low > 1) { // largest half that is not above a
        uint16_t middle = (uint16_t)((low + high) / 2);
        if ((double)moe__f16_to_f32(middle) <= a) low = middle; else high = middle;
    }
    double below = moe__f16_to_f32(low);
    double above = high == 0x7C00 ? 65536.0 : (double)moe__f16_to_f32(high);
    int up = a - below > above - a || (a - below == above - a && (low & 1));
    return (uint16_t)(sign | (up ? high : low));
}

TEST(f32_to_f16_rounds_to_nearest_even) {
    uint32_t state = 12345;
    for (int i = 0; i < 400000; i++) {
        state = state * 1664525u + 1013904223u;
        uint32_t exponent = 95 + state % 50; // 2^-32 .. 2^17
        uint32_t bits = (state & 0x80000000u) | exponent << 23 | (state >> 3 & 0x7FFFFF);
        if (i % 4 == 0) bits &= 0xFFFFE000u; // representable
        if (i % 4 == 1) bits = (bits & 0xFFFFE000u) | 0x1000; // ties
        float x = moe__f32_from_bits(bits);
        CHECKF(moe__f32_to_f16(x) == f16_by_search(x), "%.9g", (double)x);
    }
    CHECK(moe__f32_to_f16(INFINITY) == 0x7C00 && moe__f32_to_f16(-INFINITY) == 0xFC00);
}

TEST(bf16_rounds_to_nearest_even) {
    CHECK(moe__f32_to_bf16(1.0f) == 0x3F80);
    CHECK(moe__f32_to_bf16(moe__f32_from_bits(0x3F808000)) == 0x3F80); // tie to even
    CHECK(moe__f32_to_bf16(moe__f32_from_bits(0x3F818000)) == 0x3F82);
    CHECK(moe__f32_to_bf16(moe__f32_from_bits(0x3F808001)) == 0x3F81);
    CHECK(moe__f32_to_bf16(moe__f32_from_bits(0x7F7FFFFF)) == 0x7F80); // overflows
    uint16_t nan = moe__f32_to_bf16(moe__f32_from_bits(0x7F800001));
    CHECK((nan & 0x7F80) == 0x7F80 && (nan & 0x7F));
    for (uint32_t i = 0; i < 65536; i++)
        if ((i & 0x7F80) != 0x7F80)
            CHECK(moe__f32_to_bf16(moe__bf16_to_f32((uint16_t)i)) == i);
}

TEST(sizes_that_overflow_are_noticed) {
    uint64_t out;
    CHECK(moe__size_mul(1u << 31, 1u << 31, &out) && out == (uint64_t)1 << 62);
    CHECK(!moe__size_mul((uint64_t)1 << 33, (uint64_t)1 << 31, &out));
    CHECK(moe__size_add(UINT64_MAX - 1, 1, &out) && out == UINT64_MAX);
    CHECK(!moe__size_add(UINT64_MAX, 1, &out));
    moe__arena arena;
    memset(&arena, 0, sizeof arena);
    moe__arena_take(&arena, 3, 5);
    CHECK(arena.used == 64 && !arena.overflow);
    moe__arena_take(&arena, 65, 1);
    CHECK(arena.used == 192);
    moe__arena_take(&arena, (uint64_t)1 << 40, (uint64_t)1 << 40);
    CHECK(arena.overflow && arena.used == 192);
}

static size_t live_bytes;
static void *counting_alloc(void *user, size_t size) {
    (void)user;
    live_bytes += size;
    return (char *)malloc(size + 16) + 16; // aligned to 16 only
}
static void counting_free(void *user, void *memory, size_t size) {
    (void)user;
    live_bytes -= size;
    free((char *)memory - 16);
}

TEST(allocations_are_aligned_zeroed_and_returned_whole) {
    moe_allocator a;
    a.alloc = counting_alloc;
    a.free = counting_free;
    a.user = NULL;
    void *memory[50];
    for (size_t i = 0; i < 50; i++) {
        memory[i] = moe__alloc(&a, i * 7 + 1);
        CHECK(((uintptr_t)memory[i] & 63) == 0);
        for (size_t j = 0; j < i * 7 + 1; j++) CHECK(((char *)memory[i])[j] == 0);
        memset(memory[i], 0xAA, i * 7 + 1);
    }
    for (size_t i = 0; i < 50; i++) moe__free(&a, memory[i]);
    CHECK(live_bytes == 0);
    CHECK(moe__alloc(&a, 0) == NULL && moe__alloc(&a, SIZE_MAX) == NULL);
    moe_error error;
    moe_allocator half = a, out;
    half.free = NULL;
    CHECK(moe__allocator_init(&out, &half, &error) == MOE_ERROR_ARGUMENT);
}

TEST(errors_are_cut_between_characters) {
    moe_error error;
    char where[200];
    memset(where, 'x', sizeof where);
    memcpy(where + 62, "\xE4\xB8\xAD", 3); // would be cut in the middle of U+4E2D
    CHECK(moe__fail_at(&error, MOE_ERROR_FORMAT, 7, where, sizeof where, "%s", "text") ==
          MOE_ERROR_FORMAT);
    CHECK(error.status == MOE_ERROR_FORMAT && error.offset == 7 && strlen(error.where) == 62);
    CHECK(strcmp(error.text, "text") == 0);
    memset(where, 'x', sizeof where);
    where[199] = 0;
    CHECK(moe__fail_at(&error, MOE_ERROR_FORMAT, 7, where, 3, "%s\xE4\xB8\xAD", where + 9) != 0);
    CHECK(!strcmp(error.where, "xxx"));
    CHECK(strlen(error.text) == 190); // and a character that does not fit
    CHECK(moe__fail(NULL, MOE_ERROR_IO, "file", "ignored") == MOE_ERROR_IO);
    for (int i = 0; i <= MOE_ERROR_THREAD; i++)
        CHECK(strchr(moe_status_name((moe_status)i), '?') == NULL);
}

// A code in the 1 to 4 bytes of UTF-8.
static size_t utf8_of(uint32_t code, char *out) {
    const size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; code >>= 6) out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)(n == 1 ? code : (0xF00u >> n & 0xFF) | code);
    return n;
}

TEST(utf8_tells_whole_characters_from_cut_and_bad_ones) {
    char text[8];
    uint32_t code;
    for (uint32_t wanted = 0; wanted < 0x110100; wanted++) {
        const size_t n = utf8_of(wanted, text);
        const int surrogate = wanted >= 0xD800 && wanted <= 0xDFFF;
        text[n] = (char)0x80; // what lies behind does not matter
        if (surrogate || wanted > 0x10FFFF) {
            CHECK(moe__utf8_decode(text, n, &code) == MOE__UTF8_BAD);
            CHECK(moe__utf8_next(text, n, &code) == 1 && code == 0xFFFD);
            continue;
        }
        if (moe__utf8_decode(text, n + 1, &code) != (int)n || code != wanted)
            CHECKF(0, "U+%04X", wanted);
        for (size_t k = 1; k < n; k++)
            if (moe__utf8_decode(text, k, &code) != MOE__UTF8_CUT) CHECKF(0, "U+%04X", wanted);
        for (size_t k = 1; k < n; k++) {
            const char kept = text[k];
            text[k] = 'x';
            if (moe__utf8_decode(text, n, &code) != MOE__UTF8_BAD) CHECKF(0, "U+%04X", wanted);
            text[k] = kept;
        }
    }
    static const char *const bad[] = {"\x80", "\xC1\xBF", "\xE0\x9F", "\xED\xA0", "\xF0\x8F",
                                      "\xF4\x90", "\xF5\x80", "\xFF"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        CHECK(moe__utf8_decode(bad[i], strlen(bad[i]), &code) == MOE__UTF8_BAD);
    CHECK(moe__utf8_limit("a\xE4\xB8\xAD", 4, 4) == 4);
    CHECK(moe__utf8_limit("a\xE4\xB8\xAD", 4, 3) == 1);
}

#define HIGHER(a, b) ((a) > (b))
MOE__HEAP(test_heap, uint64_t, HIGHER)

TEST(heaps_pop_the_highest_value_and_sort) {
    enum { MAX = 200, VALUES = 50 };
    uint64_t seed = 1, heap[MAX];
    for (int round = 0; round < 300; round++) {
        int count[VALUES] = {0}, seen = 0;
        size_t n = 0;
        for (int i = 0; i < MAX; i++) { // pushes, and a pop now and then: always the highest
            const uint64_t value = moe__splitmix64(&seed) % VALUES;
            count[value]++;
            test_heap_push(heap, &n, value);
            if (i % 3) continue;
            const uint64_t root = test_heap_pop(heap, &n);
            for (uint64_t v = root + 1; v < VALUES; v++) CHECK(count[v] == 0);
            CHECK(--count[root] >= 0);
            seen++;
        }
        CHECK(n + (size_t)seen == MAX);
        test_heap_sort(heap, n);
        for (size_t i = 0; i < n; i++) {
            CHECK(i == 0 || heap[i - 1] <= heap[i]);
            count[heap[i]]--;
        }
        for (int v = 0; v < VALUES; v++) CHECK(count[v] == 0);
        for (size_t i = 0; i < n; i++) heap[i] = moe__splitmix64(&seed) % VALUES;
        test_heap_build(heap, n);
        for (size_t i = 1; i < n; i++) CHECK(heap[i] <= heap[(i - 1) / 2]);
    }
}

TEST(splitmix64_gives_the_reference_implementations_numbers) {
    uint64_t seed = 1234567; // the reference implementation's numbers for this seed
    CHECK(moe__splitmix64(&seed) == 6457827717110365317u);
    CHECK(moe__splitmix64(&seed) == 3203168211198807973u);
    CHECK(moe__splitmix64(&seed) == 9817491932198370423u);
}

MAIN()
