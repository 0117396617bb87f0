// Fuzzer of the GGUF reader. With libFuzzer:
//   clang -g -O1 -fsanitize=fuzzer,address,undefined -DMOE_FUZZ tests/fuzz_gguf.c -o fuzz_gguf
// Without MOE_FUZZ it is a plain program: it replays the files given as arguments, or, with none,
// a fixed number of random mutations of a small file of its own.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint64_t sink;

static void walk_value(const moe_gguf *gguf, const moe_gguf_value *value) {
    uint64_t sum = 0;
    for (size_t i = 0; i < value->key.size; i++) sum += (uint8_t)value->key.data[i];
    for (uint64_t i = 0; i < value->size; i++) sum += ((const uint8_t *)value->data)[i];
    for (uint64_t i = 0; i <= value->count && i < 100; i++) {
        int64_t integer = 0;
        double number = 0;
        int flag = 0;
        moe_gguf_value_int(value, i, &integer);
        moe_gguf_value_float(value, i, &number);
        moe_gguf_value_bool(value, i, &flag);
        sum += (uint64_t)integer + (number > 0) + (uint64_t)flag;
    }
    const void *cursor = NULL;
    moe_string string;
    while (moe_gguf_value_string(value, &cursor, &string))
        for (size_t i = 0; i < string.size; i++) sum += (uint8_t)string.data[i];
    (void)gguf;
    sink += sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_gguf *gguf = moe_gguf_open_memory(data, size, NULL, &error);
    if ((gguf == NULL) != (error.status != MOE_OK)) __builtin_trap();
    if (!gguf) {
        if (error.offset > size || !error.text[0]) __builtin_trap();
        return 0;
    }
    for (int64_t i = 0; i < moe_gguf_n_values(gguf); i++)
        walk_value(gguf, moe_gguf_value_at(gguf, i));
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        const uint8_t *bytes = (const uint8_t *)tensor->data;
        if (moe_gguf_find_tensor(gguf, tensor->name) != tensor) __builtin_trap();
        for (uint64_t k = 0; k < tensor->size; k++) sink += bytes[k];
    }
    moe_gguf_close(gguf);
    return 0;
}

#ifndef MOE_FUZZ

enum { SEED_SIZE = 384, RUNS = 200000 };

static uint64_t state = 1;
static uint32_t random_u32(void) { // xorshift64*
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)(state * 2685821657736338717u >> 32);
}

static uint8_t *put(uint8_t *at, const void *data, size_t size) {
    memcpy(at, data, size);
    return at + size;
}
static uint8_t *put_u32(uint8_t *at, uint32_t value) { return put(at, &value, 4); }
static uint8_t *put_u64(uint8_t *at, uint64_t value) { return put(at, &value, 8); }
static uint8_t *put_string(uint8_t *at, const char *text) {
    return put(put_u64(at, strlen(text)), text, strlen(text));
}

// 5 values, 2 tensors, SEED_SIZE bytes.
static void make_seed(uint8_t *seed) {
    memset(seed, 0, SEED_SIZE);
    uint8_t *at = put_u64(put_u64(put_u32(put(seed, "GGUF", 4), 3), 2), 5);
    at = put_u32(put_u32(put_string(at, "general.alignment"), MOE_VALUE_UINT32), 32);
    at = put_string(put_u32(put_string(at, "name"), MOE_VALUE_STRING), "x");
    at = put_u32(put_u32(put_string(at, "list"), MOE_VALUE_ARRAY), MOE_VALUE_STRING);
    at = put_string(put_string(put_u64(at, 2), "ab"), "");
    at = put_u32(put_u32(put_string(at, "ints"), MOE_VALUE_ARRAY), MOE_VALUE_UINT16);
    at = put(put_u64(at, 2), "\1\0\2\0", 4);
    at = put(put_u32(put_string(at, "flag"), MOE_VALUE_BOOL), "\1", 1);
    at = put_u64(put_u64(put_u32(put_string(at, "a"), 2), 32), 1);
    at = put_u64(put_u32(at, MOE_TYPE_Q8_0), 0);
    at = put_u64(put_u32(put_string(at, "b"), 1), 4);
    put_u64(put_u32(at, MOE_TYPE_F32), 64);
}

// Flips, overwrites, boundary values, copies, cuts.
static size_t mutate(uint8_t *data, size_t size) {
    static const uint64_t edges[] = {0,           1,          2,           (uint64_t)1 << 31,
                                     UINT32_MAX,  UINT64_MAX, INT64_MAX,   (uint64_t)1 << 63,
                                     UINT64_MAX / 8 + 1, 4,   13,          UINT64_MAX - 31};
    for (uint32_t n = random_u32() % 4 + 1; n; n--) {
        size_t i = random_u32() % size;
        uint64_t edge = edges[random_u32() % (sizeof edges / sizeof edges[0])];
        size_t width = (size_t)1 << random_u32() % 4;
        if (width > size - i) width = size - i;
        switch (random_u32() % 6) {
        case 0: data[i] ^= (uint8_t)(1 << random_u32() % 8); break;
        case 1: data[i] = (uint8_t)random_u32(); break;
        case 2: memcpy(data + i, &edge, width); break;
        case 3: memmove(data + i, data + random_u32() % (size - width + 1), width); break;
        case 4: data[i] = (uint8_t)(data[i] + 1 - random_u32() % 3); break;
        default: if (random_u32() % 8 == 0) size = i + 1; break;
        }
    }
    return size;
}

static int replay(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "%s: cannot open\n", path);
        return 1;
    }
    size_t size = 0, capacity = 1 << 16, got;
    uint8_t *data = (uint8_t *)malloc(capacity);
    while (data && (got = fread(data + size, 1, capacity - size, file)) > 0) {
        size += got;
        if (size == capacity) data = (uint8_t *)realloc(data, capacity *= 2);
    }
    fclose(file);
    if (!data) return 1;
    LLVMFuzzerTestOneInput(data, size);
    free(data);
    return 0;
}

int main(int argc, char **argv) {
    int failed = 0;
    for (int i = 1; i < argc; i++) failed |= replay(argv[i]);
    if (argc > 1) return failed;
    uint8_t seed[SEED_SIZE];
    int opened = 0;
    make_seed(seed);
    for (int run = 0; run < RUNS; run++) {
        uint8_t *data = (uint8_t *)malloc(SEED_SIZE);
        if (!data) return 1;
        memcpy(data, seed, SEED_SIZE);
        size_t size = SEED_SIZE;
        if (run) size = mutate(data, size);
        uint8_t *copy = (uint8_t *)malloc(size); // of exactly this size, for the sanitizers
        if (!copy) return 1;
        memcpy(copy, data, size);
        moe_gguf *gguf = moe_gguf_open_memory(copy, size, NULL, NULL);
        if (run == 0 && !gguf) {
            fprintf(stderr, "the seed file is refused\n");
            return 1;
        }
        opened += gguf != NULL;
        moe_gguf_close(gguf);
        LLVMFuzzerTestOneInput(copy, size);
        free(copy);
        free(data);
    }
    printf("%d mutated files, %d of them opened\n", RUNS, opened);
    return 0;
}

#endif // MOE_FUZZ
