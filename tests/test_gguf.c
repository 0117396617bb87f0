// The GGUF reader against files that this program writes: good ones, and one hostile file for each
// check of the reader, with the status, offset and name that the error must carry.
#include "steps.h"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

// ---- a small writer --------------------------------------------------------------------------

typedef struct bytes {
    uint8_t *data;
    size_t size, capacity;
} bytes;

static void put(bytes *b, const void *data, size_t size) {
    while (b->size + size > b->capacity) {
        b->capacity = b->capacity ? b->capacity * 2 : 4096;
        b->data = (uint8_t *)realloc(b->data, b->capacity);
        if (!b->data) abort();
    }
    if (size) memcpy(b->data + b->size, data, size);
    b->size += size;
}
static void put_u8(bytes *b, uint8_t v) { put(b, &v, 1); }
static void put_u16(bytes *b, uint16_t v) { put(b, &v, 2); }
static void put_u32(bytes *b, uint32_t v) { put(b, &v, 4); }
static void put_u64(bytes *b, uint64_t v) { put(b, &v, 8); }
static void put_f32(bytes *b, float v) { put(b, &v, 4); }
static void put_f64(bytes *b, double v) { put(b, &v, 8); }
static void put_bytes(bytes *b, const char *text, size_t size) {
    put_u64(b, size);
    put(b, text, size);
}
static void put_string(bytes *b, const char *text) { put_bytes(b, text, strlen(text)); }
static void put_zeros(bytes *b, size_t size) {
    while (size--) put_u8(b, 0);
}
static void put_pad(bytes *b, size_t alignment) {
    while (b->size % alignment) put_u8(b, 0);
}
static void put_header(bytes *b, uint32_t version, uint64_t n_tensors, uint64_t n_values) {
    put(b, "GGUF", 4);
    put_u32(b, version);
    put_u64(b, n_tensors);
    put_u64(b, n_values);
}
static void put_key(bytes *b, const char *key, uint32_t type) {
    put_string(b, key);
    put_u32(b, type);
}
static void put_key_u32(bytes *b, const char *key, uint32_t value) {
    put_key(b, key, MOE_VALUE_UINT32);
    put_u32(b, value);
}
static void put_array(bytes *b, const char *key, uint32_t type, uint64_t count) {
    put_key(b, key, MOE_VALUE_ARRAY);
    put_u32(b, type);
    put_u64(b, count);
}
static void put_tensor(bytes *b, const char *name, uint32_t n_dims, uint64_t ne0, uint64_t ne1,
                       uint64_t ne2, uint64_t ne3, uint32_t type, uint64_t offset) {
    uint64_t ne[4];
    ne[0] = ne0, ne[1] = ne1, ne[2] = ne2, ne[3] = ne3;
    put_string(b, name);
    put_u32(b, n_dims);
    for (uint32_t i = 0; i < n_dims && i < 4; i++) put_u64(b, ne[i]);
    put_u32(b, type);
    put_u64(b, offset);
}
static void clear(bytes *b) { b->size = 0; }
static void release(bytes *b) {
    free(b->data);
    memset(b, 0, sizeof *b);
}

// ---- an allocator that counts and fails ------------------------------------------------------

typedef struct counter {
    long n_allocs, fail_at; // the fail_at-th (from 1) and all later ones fail; 0: none
    long live;
    size_t live_bytes, peak_bytes;
} counter;

static void *counter_alloc(void *user, size_t size) {
    counter *c = (counter *)user;
    c->n_allocs++;
    if (c->fail_at && c->n_allocs >= c->fail_at) return NULL;
    void *memory = malloc(size);
    if (memory) memset(memory, 0xA5, size);
    c->live++;
    c->live_bytes += size;
    if (c->live_bytes > c->peak_bytes) c->peak_bytes = c->live_bytes;
    return memory;
}
static void counter_free(void *user, void *memory, size_t size) {
    counter *c = (counter *)user;
    c->live--;
    c->live_bytes -= size;
    free(memory);
}
static moe_gguf_options counter_options(counter *c) {
    moe_gguf_options options;
    memset(&options, 0, sizeof options);
    memset(c, 0, sizeof *c);
    options.allocator.alloc = counter_alloc;
    options.allocator.free = counter_free;
    options.allocator.user = c;
    return options;
}

// ---- opening and judging ---------------------------------------------------------------------

// Reads everything that a file offers; the sum keeps the compiler from leaving it out.
static uint64_t walk(const moe_gguf *gguf) {
    uint64_t sum = moe_gguf_version(gguf) + moe_gguf_file_size(gguf);
    for (int64_t i = 0; i < moe_gguf_n_values(gguf); i++) {
        const moe_gguf_value *value = moe_gguf_value_at(gguf, i);
        for (size_t k = 0; k < value->key.size; k++) sum += (uint8_t)value->key.data[k];
        for (uint64_t k = 0; k < value->size; k++) sum += ((const uint8_t *)value->data)[k];
        for (uint64_t k = 0; k < value->count && k < 1000; k++) {
            int64_t integer;
            double number;
            int flag;
            if (moe_gguf_value_int(value, k, &integer)) sum += (uint64_t)integer;
            if (moe_gguf_value_float(value, k, &number)) sum += number == number;
            if (moe_gguf_value_bool(value, k, &flag)) sum += (uint64_t)flag;
        }
        const void *cursor = NULL;
        moe_string string;
        uint64_t n_strings = 0;
        while (moe_gguf_value_string(value, &cursor, &string)) {
            for (size_t k = 0; k < string.size; k++) sum += (uint8_t)string.data[k];
            n_strings++;
        }
        if (value->element_type == MOE_VALUE_STRING) CHECK(n_strings == value->count);
    }
    for (int64_t i = 0; i < moe_gguf_n_tensors(gguf); i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        const uint8_t *data = (const uint8_t *)tensor->data;
        CHECK(moe_gguf_find_tensor(gguf, tensor->name) == tensor);
        CHECK(tensor->n_dims >= 1 && tensor->n_dims <= 4);
        for (int k = 0; k < 4; k++) CHECK(tensor->ne[k] >= 1);
        for (uint64_t k = 0; k < tensor->size; k++) sum += data[k];
    }
    return sum;
}

static volatile uint64_t walked;

// Opens a copy of exactly the right size, so that a sanitizer sees every byte read too far. Returns
// the status; *error as the reader left it.
static moe_status open_copy(const uint8_t *data, size_t size, moe_error *error) {
    uint8_t *copy = (uint8_t *)malloc(size ? size : 1);
    counter c;
    moe_gguf_options options = counter_options(&c);
    memset(error, 0, sizeof *error);
    if (size) memcpy(copy, data, size);
    moe_gguf *gguf = moe_gguf_open_memory(copy, size, &options, error);
    CHECK((gguf == NULL) == (error->status != MOE_OK));
    if (gguf) walked += walk(gguf);
    moe_gguf_close(gguf);
    CHECK(c.live == 0 && c.live_bytes == 0);
    free(copy);
    return error->status;
}

// `text`: a part of the sentence that the error must carry.
static void expect_bad(const bytes *b, moe_status status, uint64_t offset, const char *where,
                       const char *text, int line) {
    moe_error error;
    open_copy(b->data, b->size, &error);
    CHECKF(error.status == status && error.offset == offset && strcmp(error.where, where) == 0 &&
               strstr(error.text, text),
           "line %d: %s at %llu in '%s': %s (wanted %s at %llu in '%s': %s)", line,
           moe_status_name(error.status), (unsigned long long)error.offset, error.where,
           error.text, moe_status_name(status), (unsigned long long)offset, where, text);
}
#define EXPECT_BAD(b, status, offset, where, text) \
    expect_bad(b, status, offset, where, text, __LINE__)

static void expect_good(const bytes *b, int line) {
    moe_error error;
    open_copy(b->data, b->size, &error);
    CHECKF(error.status == MOE_OK, "line %d: %s at %llu in '%s': %s", line,
           moe_status_name(error.status), (unsigned long long)error.offset, error.where,
           error.text);
}
#define EXPECT_GOOD(b) expect_good(b, __LINE__)

// A file with every type of value, alone and as an array, and tensors of several types. Its last
// tensor ends with the file.
static void put_good_file(bytes *b, uint32_t version) {
    put_header(b, version, 5, 28);
    put_key(b, "u8", MOE_VALUE_UINT8), put_u8(b, 200);
    put_key(b, "i8", MOE_VALUE_INT8), put_u8(b, (uint8_t)-100);
    put_key(b, "u16", MOE_VALUE_UINT16), put_u16(b, 60000);
    put_key(b, "i16", MOE_VALUE_INT16), put_u16(b, (uint16_t)-30000);
    put_key(b, "u32", MOE_VALUE_UINT32), put_u32(b, 4000000000u);
    put_key(b, "i32", MOE_VALUE_INT32), put_u32(b, (uint32_t)-2000000000);
    put_key(b, "f32", MOE_VALUE_FLOAT32), put_f32(b, 1.5f);
    put_key(b, "bool", MOE_VALUE_BOOL), put_u8(b, 1);
    put_key(b, "string", MOE_VALUE_STRING), put_bytes(b, "h\0llo", 5);
    put_key(b, "empty", MOE_VALUE_STRING), put_string(b, "");
    put_key(b, "u64", MOE_VALUE_UINT64), put_u64(b, UINT64_MAX);
    put_key(b, "i64", MOE_VALUE_INT64), put_u64(b, (uint64_t)INT64_MIN);
    put_key(b, "f64", MOE_VALUE_FLOAT64), put_f64(b, -1e300);
    put_array(b, "u8s", MOE_VALUE_UINT8, 3), put(b, "\1\2\377", 3);
    put_array(b, "i8s", MOE_VALUE_INT8, 2), put(b, "\1\377", 2);
    put_array(b, "u16s", MOE_VALUE_UINT16, 2), put_u16(b, 1), put_u16(b, 65535);
    put_array(b, "i16s", MOE_VALUE_INT16, 2), put_u16(b, 1), put_u16(b, 65535);
    put_array(b, "u32s", MOE_VALUE_UINT32, 2), put_u32(b, 1), put_u32(b, UINT32_MAX);
    put_array(b, "i32s", MOE_VALUE_INT32, 2), put_u32(b, 1), put_u32(b, UINT32_MAX);
    put_array(b, "f32s", MOE_VALUE_FLOAT32, 2), put_f32(b, 0.25f), put_f32(b, -2);
    put_array(b, "bools", MOE_VALUE_BOOL, 3), put(b, "\0\1\0", 3);
    put_array(b, "strings", MOE_VALUE_STRING, 3);
    put_string(b, "one"), put_string(b, ""), put_bytes(b, "t\0o", 3);
    put_array(b, "nothing", MOE_VALUE_STRING, 0);
    put_array(b, "none", MOE_VALUE_UINT32, 0);
    put_array(b, "u64s", MOE_VALUE_UINT64, 2), put_u64(b, 7), put_u64(b, UINT64_MAX);
    put_array(b, "i64s", MOE_VALUE_INT64, 2), put_u64(b, 7), put_u64(b, UINT64_MAX);
    put_array(b, "f64s", MOE_VALUE_FLOAT64, 2), put_f64(b, 0.5), put_f64(b, 3);
    put_key_u32(b, "general.alignment", 64);
    put_tensor(b, "a.weight", 2, 64, 3, 0, 0, MOE_TYPE_Q4_0, 0);      // 108 bytes
    put_tensor(b, "b.weight", 1, 5, 0, 0, 0, MOE_TYPE_F32, 128);      // 20 bytes
    put_tensor(b, "c.weight", 3, 256, 2, 2, 0, MOE_TYPE_Q6_K, 192);   // 840 bytes
    put_tensor(b, "d.weight", 1, 123, 0, 0, 0, 77, 1088);             // unknown type
    put_tensor(b, "e.weight", 4, 3, 1, 1, 2, MOE_TYPE_BF16, 1088);    // 12 bytes
    put_pad(b, 64);
    size_t start = b->size;
    for (size_t i = 0; i < 1100; i++) put_u8(b, (uint8_t)(i * 7));
    CHECK(b->size == start + 1100);
}

TEST(a_good_file_is_read_in_both_versions) {
    bytes b;
    memset(&b, 0, sizeof b);
    for (uint32_t version = 2; version <= 3; version++) {
        clear(&b);
        put_good_file(&b, version);
        moe_error error;
        moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, &error);
        CHECK(gguf != NULL);
        if (!gguf) break;
        CHECK(moe_gguf_version(gguf) == version);
        CHECK(moe_gguf_file_size(gguf) == b.size);
        CHECK(moe_gguf_n_values(gguf) == 28 && moe_gguf_n_tensors(gguf) == 5);
        CHECK(!moe_gguf_value_at(gguf, -1) && !moe_gguf_value_at(gguf, 28));
        CHECK(!moe_gguf_tensor_at(gguf, -1) && !moe_gguf_tensor_at(gguf, 5));
        CHECK(!moe_gguf_value_at(gguf, INT64_MIN) && !moe_gguf_tensor_at(gguf, INT64_MAX));
        CHECK(!moe_gguf_find_value(gguf, "u8ss") && !moe_gguf_find_value(gguf, ""));
        CHECK(!moe_gguf_find_value(gguf, NULL) && !moe_gguf_find_tensor(gguf, NULL));
        CHECK(!moe_gguf_find_tensor(gguf, "c.weigh") && !moe_gguf_find_tensor(gguf, "zzz"));
        for (int64_t i = 0; i < 28; i++) {
            const moe_gguf_value *value = moe_gguf_value_at(gguf, i);
            char key[32];
            memcpy(key, value->key.data, value->key.size);
            key[value->key.size] = 0;
            CHECK(moe_gguf_find_value(gguf, key) == value);
            CHECK((const uint8_t *)value->data == b.data + value->offset);
        }
        const moe_gguf_tensor *t = moe_gguf_find_tensor(gguf, "c.weight");
        CHECK(t == moe_gguf_tensor_at(gguf, 2));
        CHECK(t->type == MOE_TYPE_Q6_K && t->n_dims == 3 && t->size == 840 && t->part == 0);
        CHECK(t->ne[0] == 256 && t->ne[1] == 2 && t->ne[2] == 2 && t->ne[3] == 1);
        CHECK(t->offset == b.size - 1100 + 192 && t->data == b.data + t->offset);
        t = moe_gguf_find_tensor(gguf, "d.weight");
        CHECK((int)t->type == 77 && t->size == 0 && t->data == NULL && t->ne[0] == 123);
        CHECK(moe_gguf_find_tensor(gguf, "a.weight")->size == 108);
        CHECK(moe_gguf_find_tensor(gguf, "e.weight")->size == 12);
        walked += walk(gguf);
        moe_gguf_close(gguf);
    }
    moe_gguf_close(NULL);
    CHECK(moe_gguf_version(NULL) == 0 && moe_gguf_file_size(NULL) == 0);
    CHECK(moe_gguf_n_values(NULL) == 0 && moe_gguf_n_tensors(NULL) == 0);
    CHECK(!moe_gguf_value_at(NULL, 0) && !moe_gguf_tensor_at(NULL, 0));
    CHECK(!moe_gguf_find_value(NULL, "a") && !moe_gguf_find_tensor(NULL, "a"));
    release(&b);
}

// "1.5": the value converts to 1.5; NULL: it must not convert.
static void check_value(const moe_gguf *gguf, const char *key, uint64_t i, const char *integer,
                        const char *number, const char *flag) {
    const moe_gguf_value *value = moe_gguf_find_value(gguf, key);
    int64_t got_int = 0;
    double got_float = 0;
    int got_flag = 0, ok;
    ok = moe_gguf_value_int(value, i, &got_int);
    CHECKF(ok == (integer != NULL), "%s[%d] as int", key, (int)i);
    if (ok && integer) CHECKF(got_int == strtoll(integer, NULL, 10), "%s", key);
    ok = moe_gguf_value_float(value, i, &got_float);
    CHECKF(ok == (number != NULL), "%s[%d] as float", key, (int)i);
    if (ok && number) CHECKF(got_float == strtod(number, NULL), "%s %g", key, got_float);
    ok = moe_gguf_value_bool(value, i, &got_flag);
    CHECKF(ok == (flag != NULL), "%s[%d] as bool", key, (int)i);
    if (ok && flag) CHECKF(got_flag == atoi(flag), "%s", key);
}

TEST(values_are_read_as_types_that_hold_them) {
    bytes b;
    memset(&b, 0, sizeof b);
    put_good_file(&b, 3);
    moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, NULL);
    CHECK(gguf != NULL);
    if (!gguf) return;
    check_value(gguf, "u8", 0, "200", "200", NULL);
    check_value(gguf, "i8", 0, "-100", "-100", NULL);
    check_value(gguf, "u16", 0, "60000", "60000", NULL);
    check_value(gguf, "i16", 0, "-30000", "-30000", NULL);
    check_value(gguf, "u32", 0, "4000000000", "4000000000", NULL);
    check_value(gguf, "i32", 0, "-2000000000", "-2000000000", NULL);
    check_value(gguf, "f32", 0, NULL, "1.5", NULL);
    check_value(gguf, "bool", 0, "1", NULL, "1");
    check_value(gguf, "string", 0, NULL, NULL, NULL);
    check_value(gguf, "u64", 0, NULL, "18446744073709551615", NULL);
    check_value(gguf, "i64", 0, "-9223372036854775808", "-9223372036854775808", NULL);
    check_value(gguf, "f64", 0, NULL, "-1e300", NULL);
    check_value(gguf, "u8s", 2, "255", "255", NULL);
    check_value(gguf, "i8s", 1, "-1", "-1", NULL);
    check_value(gguf, "u16s", 1, "65535", "65535", NULL);
    check_value(gguf, "i16s", 1, "-1", "-1", NULL);
    check_value(gguf, "u32s", 1, "4294967295", "4294967295", NULL);
    check_value(gguf, "i32s", 1, "-1", "-1", NULL);
    check_value(gguf, "i32s", 0, "1", "1", "1");
    check_value(gguf, "f32s", 1, NULL, "-2", NULL);
    check_value(gguf, "bools", 0, "0", NULL, "0");
    check_value(gguf, "bools", 1, "1", NULL, "1");
    check_value(gguf, "u64s", 0, "7", "7", NULL);
    check_value(gguf, "u64s", 1, NULL, "18446744073709551615", NULL);
    check_value(gguf, "i64s", 1, "-1", "-1", NULL);
    check_value(gguf, "f64s", 0, NULL, "0.5", NULL);
    // out of range, missing
    check_value(gguf, "u8", 1, NULL, NULL, NULL);
    check_value(gguf, "u8s", 3, NULL, NULL, NULL);
    check_value(gguf, "f64s", UINT64_MAX, NULL, NULL, NULL);
    check_value(gguf, "none", 0, NULL, NULL, NULL);
    check_value(gguf, "strings", 0, NULL, NULL, NULL);
    check_value(gguf, "no such key", 0, NULL, NULL, NULL);
    CHECK(!moe_gguf_value_int(moe_gguf_find_value(gguf, "u8"), 0, NULL));
    CHECK(!moe_gguf_value_float(moe_gguf_find_value(gguf, "u8"), 0, NULL));
    CHECK(!moe_gguf_value_bool(moe_gguf_find_value(gguf, "u8"), 0, NULL));
    // shape of arrays
    const moe_gguf_value *value = moe_gguf_find_value(gguf, "i16s");
    CHECK(value->type == MOE_VALUE_ARRAY && value->element_type == MOE_VALUE_INT16);
    CHECK(value->count == 2 && value->size == 4 && memcmp(value->data, "\1\0\377\377", 4) == 0);
    value = moe_gguf_find_value(gguf, "u16");
    CHECK(value->type == MOE_VALUE_UINT16 && value->element_type == MOE_VALUE_UINT16);
    CHECK(value->count == 1 && value->size == 2);
    moe_gguf_close(gguf);
    release(&b);
}

TEST(strings_are_read_one_after_another) {
    bytes b;
    memset(&b, 0, sizeof b);
    put_good_file(&b, 3);
    moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, NULL);
    CHECK(gguf != NULL);
    if (!gguf) return;
    const moe_gguf_value *value = moe_gguf_find_value(gguf, "strings");
    const void *cursor = NULL;
    moe_string s;
    CHECK(moe_gguf_value_string(value, &cursor, &s) && s.size == 3 && !memcmp(s.data, "one", 3));
    CHECK(moe_gguf_value_string(value, &cursor, &s) && s.size == 0);
    CHECK(moe_gguf_value_string(value, &cursor, &s) && s.size == 3 && !memcmp(s.data, "t\0o", 3));
    CHECK(!moe_gguf_value_string(value, &cursor, &s));
    CHECK(!moe_gguf_value_string(value, &cursor, &s));
    cursor = NULL;
    value = moe_gguf_find_value(gguf, "string");
    CHECK(moe_gguf_value_string(value, &cursor, &s) && s.size == 5 && !memcmp(s.data, "h\0llo", 5));
    CHECK(!moe_gguf_value_string(value, &cursor, &s));
    cursor = NULL;
    CHECK(moe_gguf_value_string(moe_gguf_find_value(gguf, "empty"), &cursor, &s) && s.size == 0);
    cursor = NULL;
    CHECK(!moe_gguf_value_string(moe_gguf_find_value(gguf, "nothing"), &cursor, &s));
    CHECK(!moe_gguf_value_string(moe_gguf_find_value(gguf, "u8s"), &cursor, &s));
    CHECK(!moe_gguf_value_string(moe_gguf_find_value(gguf, "u64"), &cursor, &s));
    CHECK(!moe_gguf_value_string(NULL, &cursor, &s));
    CHECK(!moe_gguf_value_string(value, NULL, &s));
    CHECK(!moe_gguf_value_string(value, &cursor, NULL));
    cursor = &b; // not from this value
    CHECK(!moe_gguf_value_string(value, &cursor, &s));
    // A file that changes while it is mapped: the length of a string grows behind our back.
    size_t at = (size_t)((const uint8_t *)value->data - b.data);
    b.data[at] = 255;
    cursor = NULL;
    CHECK(!moe_gguf_value_string(value, &cursor, &s));
    moe_gguf_close(gguf);
    release(&b);
}

// ---- hostile headers -------------------------------------------------------------------------

TEST(bad_arguments_are_refused) {
    moe_error error;
    moe_gguf_options options;
    memset(&error, 0, sizeof error);
    CHECK(!moe_gguf_open(NULL, NULL, &error) && error.status == MOE_ERROR_ARGUMENT);
    CHECK(!moe_gguf_open("", NULL, &error) && error.status == MOE_ERROR_ARGUMENT);
    CHECK(!moe_gguf_open_memory(NULL, 5, NULL, &error) && error.status == MOE_ERROR_ARGUMENT);
    CHECK(!strcmp(error.where, "data"));
    CHECK(!moe_gguf_open_memory("GGUF", 4, NULL, NULL));
    for (int field = 0; field < 5; field++) {
        memset(&options, 0, sizeof options);
        if (field == 0) options.pages = (moe_pages)3;
        if (field == 1) options.pages = (moe_pages)-1;
        if (field == 2) options.prefault = INT32_MIN;
        if (field == 3) options.allocator.alloc = counter_alloc;
        if (field == 4) options.allocator.free = counter_free;
        memset(&error, 0, sizeof error);
        CHECK(!moe_gguf_open_memory("GGUF", 4, &options, &error));
        CHECK(error.status == MOE_ERROR_ARGUMENT);
    }
}

TEST(bad_headers_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 0, "", "not a GGUF file"); // 0 bytes
    put(&b, "GGU", 3);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 0, "", "not a GGUF file");
    put(&b, "X", 1), put_zeros(&b, 100);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 0, "", "not a GGUF file");
    static const uint32_t versions[] = {0, 1, 4, 5, UINT32_MAX, 0x01000000, 0x02000000,
                                        0x03000000};
    for (size_t i = 0; i < sizeof versions / sizeof versions[0]; i++) {
        clear(&b);
        put_header(&b, versions[i], 0, 0);
        EXPECT_BAD(&b, MOE_ERROR_UNSUPPORTED, 4, "", i < 5 ? "GGUF version" : "big-endian");
    }
    // version 1 with its own, shorter header
    clear(&b);
    put(&b, "GGUF", 4), put_u32(&b, 1), put_u32(&b, 0), put_u32(&b, 0), put_zeros(&b, 32);
    EXPECT_BAD(&b, MOE_ERROR_UNSUPPORTED, 4, "", "version 1");
    clear(&b);
    put_header(&b, 3, 0, 0);
    EXPECT_GOOD(&b); // nothing inside is allowed
    b.size--;
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 23, "", "within its header");
    static const uint64_t counts[] = {UINT64_MAX,
                                      (uint64_t)1 << 63,
                                      ((uint64_t)1 << 63) - 1,
                                      (uint64_t)1 << 60,
                                      (uint64_t)1 << 32,
                                      9,
                                      UINT64_MAX / 14 + 1,
                                      UINT64_MAX / 48 + 1};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        clear(&b);
        put_header(&b, 3, counts[i], 0), put_zeros(&b, 100);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 8, "", "tensors are too many");
        clear(&b);
        put_header(&b, 3, 0, counts[i]), put_zeros(&b, 100);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 16, "", "values are too many");
    }
    // 3 tensors would fit into the bytes behind the header, but not into those behind the values
    clear(&b);
    put_header(&b, 3, 3, 1), put_array(&b, "k", MOE_VALUE_UINT8, 100), put_zeros(&b, 100);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, b.size, "", "needs 8 bytes, 0 are left");
    release(&b);
}

// More entries than the reader's constant, in a file that is large enough to hold them.
TEST(more_entries_than_the_limit_are_refused) {
    size_t size = 24 + (size_t)33 * (MOE__GGUF_MAX_ENTRIES + 2);
    uint8_t *data = (uint8_t *)calloc(1, size);
    moe_error error;
    counter c;
    moe_gguf_options options = counter_options(&c);
    uint64_t n = MOE__GGUF_MAX_ENTRIES + 1, zero = 0;
    memcpy(data, "GGUF\3\0\0\0", 8);
    for (int i = 0; i < 2; i++) {
        memcpy(data + 8, i ? &zero : &n, 8);
        memcpy(data + 16, i ? &n : &zero, 8);
        memset(&error, 0, sizeof error);
        CHECK(!moe_gguf_open_memory(data, size, &options, &error));
        CHECK(error.status == MOE_ERROR_FORMAT && error.offset == (i ? 16u : 8u));
        CHECK(strstr(error.text, "this reader") && c.live == 0);
        CHECK(c.peak_bytes < 65536);
    }
    free(data);
}

// ---- hostile values --------------------------------------------------------------------------

// A header for one value, whose key and type are written; returns where the value begins.
static uint64_t begin_value(bytes *b, const char *key, uint32_t type) {
    clear(b);
    put_header(b, 3, 0, 1);
    put_key(b, key, type);
    return b->size;
}

TEST(bad_keys_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    static const uint64_t lengths[] = {100,
                                       41, // one more than there are
                                       UINT64_MAX,
                                       UINT64_MAX - 31,
                                       (uint64_t)1 << 63,
                                       ((uint64_t)1 << 63) - 1,
                                       (uint64_t)1 << 32};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        clear(&b);
        put_header(&b, 3, 0, 1), put_u64(&b, lengths[i]), put_zeros(&b, 40);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 32, "", "the file ends too early: a key");
    }
    clear(&b);
    put_header(&b, 3, 0, 1), put_key_u32(&b, "", 1), put_zeros(&b, 20);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "", "a key has 0 bytes");
    char *key = (char *)malloc(65537);
    memset(key, 'k', 65536);
    key[65536] = 0;
    clear(&b);
    put_header(&b, 3, 0, 1), put_key_u32(&b, key, 1);
    key[63] = 0;
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, key, "65536 bytes");
    key[63] = 'k', key[65535] = 0;
    clear(&b);
    put_header(&b, 3, 0, 1), put_key_u32(&b, key, 1);
    EXPECT_GOOD(&b);
    free(key);
    clear(&b);
    put_header(&b, 3, 0, 1), put_bytes(&b, "a\0b", 3), put_u32(&b, 4), put_u32(&b, 0);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "a?b", "NUL");
    // what a key may do to a terminal stays in the file
    clear(&b);
    put_header(&b, 3, 0, 1), put_key(&b, "a\33[2J\n\x7f\xc3%s", 99), put_u64(&b, 0);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, b.size - 12, "a?[2J???%s", "type 99");
    clear(&b);
    put_header(&b, 3, 0, 4);
    put_key_u32(&b, "one", 1), put_key_u32(&b, "two", 1), put_key_u32(&b, "on", 1);
    uint64_t second = b.size;
    put_key_u32(&b, "one", 1);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, second, "one", "twice");
    release(&b);
}

TEST(bad_types_of_values_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    static const uint32_t types[] = {13, 14, 255, 1u << 31, UINT32_MAX};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        uint64_t at = begin_value(&b, "key", types[i]);
        put_zeros(&b, 64);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, at - 4, "key", "does not exist");
        at = begin_value(&b, "key", MOE_VALUE_ARRAY);
        put_u32(&b, types[i]), put_zeros(&b, 64);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "key", "does not exist");
    }
    // arrays of arrays, 20,000 deep
    uint64_t at = begin_value(&b, "key", MOE_VALUE_ARRAY);
    for (int i = 0; i < 20000; i++) put_u32(&b, MOE_VALUE_ARRAY), put_u64(&b, 1);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "key", "arrays of arrays");
    at = begin_value(&b, "key", MOE_VALUE_BOOL);
    put_u8(&b, 2);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "key", "bool");
    at = begin_value(&b, "key", MOE_VALUE_ARRAY);
    put_u32(&b, MOE_VALUE_BOOL), put_u64(&b, 4), put(&b, "\1\0\377\1", 4);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at + 12 + 2, "key", "bool");
    release(&b);
}

TEST(values_larger_than_the_file_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    static const uint64_t huge[] = {UINT64_MAX,
                                    UINT64_MAX - 7,
                                    (uint64_t)1 << 63,
                                    ((uint64_t)1 << 63) - 1,
                                    ((uint64_t)1 << 61) + 1, // times 8: wraps to 8
                                    ((uint64_t)1 << 62) + 1, // times 4: wraps to 4
                                    (uint64_t)1 << 32,
                                    65};
    for (size_t i = 0; i < sizeof huge / sizeof huge[0]; i++) {
        uint64_t at = begin_value(&b, "key", MOE_VALUE_STRING);
        put_u64(&b, huge[i]), put_zeros(&b, 64);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, at + 8, "key", "a string needs");
        for (uint32_t type = 0; type <= 12; type++) {
            if (type == MOE_VALUE_ARRAY) continue;
            at = begin_value(&b, "key", MOE_VALUE_ARRAY);
            put_u32(&b, type), put_u64(&b, huge[i]), put_zeros(&b, 64);
            EXPECT_BAD(&b, MOE_ERROR_FORMAT, at + 12, "key", "do not fit");
        }
        // the second string of an array
        at = begin_value(&b, "key", MOE_VALUE_ARRAY);
        put_u32(&b, MOE_VALUE_STRING), put_u64(&b, 2), put_string(&b, "abc");
        put_u64(&b, huge[i]), put_zeros(&b, 64);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, at + 12 + 11 + 8, "key", "a string needs");
    }
    // exactly what fits, and one more
    for (uint32_t type = 0; type <= 12; type++) {
        static const size_t sizes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};
        if (type == MOE_VALUE_ARRAY) continue;
        for (uint64_t extra = 0; extra <= 1; extra++) {
            uint64_t at = begin_value(&b, "key", MOE_VALUE_ARRAY);
            put_u32(&b, type), put_u64(&b, 8 + extra), put_zeros(&b, 8 * sizes[type]);
            if (extra) EXPECT_BAD(&b, MOE_ERROR_FORMAT, at + 12, "key", "do not fit");
            else EXPECT_GOOD(&b);
        }
    }
    release(&b);
}

TEST(data_starts_at_an_alignment_that_is_a_power_of_two) {
    bytes b;
    memset(&b, 0, sizeof b);
    static const uint32_t bad[] = {0, 3, 33, 96, 1u << 21, 1u << 31, UINT32_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        uint64_t at = begin_value(&b, "general.alignment", MOE_VALUE_UINT32);
        put_u32(&b, bad[i]);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "general.alignment", "power of two");
    }
    uint64_t at = begin_value(&b, "general.alignment", MOE_VALUE_INT32);
    put_u32(&b, (uint32_t)-32);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "general.alignment", "power of two");
    at = begin_value(&b, "general.alignment", MOE_VALUE_INT64);
    put_u64(&b, (uint64_t)INT64_MIN);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "general.alignment", "power of two");
    at = begin_value(&b, "general.alignment", MOE_VALUE_UINT64);
    put_u64(&b, (uint64_t)1 << 63);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "general.alignment", "integer");
    at = begin_value(&b, "general.alignment", MOE_VALUE_FLOAT32);
    put_f32(&b, 32);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "general.alignment", "integer");
    at = begin_value(&b, "general.alignment", MOE_VALUE_STRING);
    put_string(&b, "32");
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, at, "general.alignment", "integer");
    begin_value(&b, "general.alignment", MOE_VALUE_ARRAY);
    put_u32(&b, MOE_VALUE_UINT32), put_u64(&b, 1), put_u32(&b, 32);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, b.size - 4, "general.alignment", "integer");
    // other widths, the smallest and the largest; the data starts where it says
    for (uint32_t power = 0; power <= 20; power++) {
        begin_value(&b, "general.alignment", MOE_VALUE_UINT64);
        put_u64(&b, (uint64_t)1 << power);
        b.data[8] = 1; // one tensor
        put_tensor(&b, "t", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0);
        put_pad(&b, (size_t)1 << power);
        size_t start = b.size;
        put(&b, "0123456789abcdef", 16);
        moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, NULL);
        CHECK(gguf != NULL);
        if (gguf) CHECK(moe_gguf_tensor_at(gguf, 0)->offset == start);
        moe_gguf_close(gguf);
        b.size--;
        moe_error error;
        CHECK(open_copy(b.data, b.size, &error) == MOE_ERROR_FORMAT);
    }
    release(&b);
}

// ---- hostile tensors -------------------------------------------------------------------------

// A file of one tensor with `data` bytes of data. The description begins at byte 24.
static void one_tensor(bytes *b, const char *name, uint32_t n_dims, uint64_t ne0, uint64_t ne1,
                       uint64_t ne2, uint64_t ne3, uint32_t type, uint64_t offset, size_t data) {
    clear(b);
    put_header(b, 3, 1, 0);
    put_tensor(b, name, n_dims, ne0, ne1, ne2, ne3, type, offset);
    put_pad(b, 32);
    put_zeros(b, data);
}

TEST(bad_names_of_tensors_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    char name[66];
    memset(name, 'n', sizeof name);
    name[63] = 0;
    one_tensor(&b, name, 1, 4, 0, 0, 0, MOE_TYPE_F32, 0, 16);
    EXPECT_GOOD(&b);
    name[63] = 'n', name[64] = 0;
    one_tensor(&b, name, 1, 4, 0, 0, 0, MOE_TYPE_F32, 0, 16);
    name[63] = 0;
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, name, "a tensor's name has 64 bytes");
    one_tensor(&b, "", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0, 64);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "", "a tensor's name has 0 bytes");
    static const uint64_t lengths[] = {1000, UINT64_MAX, (uint64_t)1 << 63, UINT64_MAX - 31};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        one_tensor(&b, "name", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0, 64);
        memcpy(b.data + 24, &lengths[i], 8);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 32, "", "the file ends too early");
    }
    one_tensor(&b, "name", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0, 64);
    b.data[24 + 8 + 2] = 0;
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "na?e", "NUL");
    clear(&b);
    put_header(&b, 3, 4, 0);
    put_tensor(&b, "a", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0);
    put_tensor(&b, "b", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0);
    put_tensor(&b, "aa", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0);
    uint64_t second = b.size;
    put_tensor(&b, "b", 1, 4, 0, 0, 0, MOE_TYPE_F32, 32);
    put_pad(&b, 32), put_zeros(&b, 64);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, second, "b", "twice");
    release(&b);
}

TEST(bad_shapes_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    static const uint32_t dims[] = {0, 5, 6, 1u << 31, UINT32_MAX};
    uint64_t shape = 24 + 8 + 4; // where n_dims lies
    for (size_t i = 0; i < sizeof dims / sizeof dims[0]; i++) {
        one_tensor(&b, "name", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0, 64);
        memcpy(b.data + shape, &dims[i], 4);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, shape, "name", "dimensions");
    }
    // one bad length at each place
    static const uint64_t bad[] = {0, UINT64_MAX, (uint64_t)1 << 63, UINT64_MAX - 3};
    for (uint32_t d = 0; d < 4; d++)
        for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
            uint64_t ne[4] = {1, 1, 1, 1};
            ne[d] = bad[i];
            one_tensor(&b, "name", 4, ne[0], ne[1], ne[2], ne[3], MOE_TYPE_F32, 0, 64);
            EXPECT_BAD(&b, MOE_ERROR_FORMAT, shape + 4 + 8 * d, "name", "out of bounds");
        }
    // products beyond int64_t, in every order
    static const uint64_t products[][4] = {{INT64_MAX, 2, 1, 1},
                                           {(uint64_t)1 << 32, (uint64_t)1 << 31, 1, 1},
                                           {(uint64_t)1 << 32, (uint64_t)1 << 32, 1, 1},
                                           {(uint64_t)1 << 62, 4, 2, 1},
                                           {(uint64_t)1 << 21, (uint64_t)1 << 21, 1 << 11, 1 << 11},
                                           {(uint64_t)1 << 16, 1 << 16, 1 << 16, 1 << 16}};
    for (size_t i = 0; i < sizeof products / sizeof products[0]; i++)
        for (int order = 0; order < 256; order++) {
            int p[4] = {order & 3, order >> 2 & 3, order >> 4 & 3, order >> 6};
            if ((1 << p[0] | 1 << p[1] | 1 << p[2] | 1 << p[3]) != 15) continue;
            const uint64_t *ne = products[i];
            moe_error error;
            one_tensor(&b, "name", 4, ne[p[0]], ne[p[1]], ne[p[2]], ne[p[3]], MOE_TYPE_F32, 0, 64);
            open_copy(b.data, b.size, &error);
            CHECK(error.status == MOE_ERROR_FORMAT && strstr(error.text, "dimension"));
            CHECK(error.offset > shape && error.offset < shape + 36);
        }
    // the number of weights fits, the number of bytes does not
    one_tensor(&b, "name", 1, (uint64_t)1 << 61, 0, 0, 0, 28 /* F64 */, 0, 64);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "size is out of bounds");
    one_tensor(&b, "name", 2, 1 << 20, (uint64_t)1 << 42, 0, 0, MOE_TYPE_F32, 0, 64);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "size is out of bounds");
    one_tensor(&b, "name", 4, 4, 1 << 20, 1 << 20, 1 << 20, 28, 0, 64);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "size is out of bounds");
    one_tensor(&b, "name", 1, (uint64_t)1 << 60, 0, 0, 0, 28, 0, 64); // 2^63 bytes
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "size is out of bounds");
    one_tensor(&b, "name", 2, INT64_MAX, 1, 0, 0, 24 /* I8 */, 0, 64);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end");
    one_tensor(&b, "name", 2, 64, INT64_MAX / 64, 0, 0, 134 /* IQ1_BN: 15 bytes a row */, 0, 64);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end");
    release(&b);
}

TEST(types_that_do_not_fit_a_tensor_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    // rows that no whole number of blocks fills, though the tensor would
    static const struct {
        uint32_t type;
        uint64_t ne0;
    } ragged[] = {{MOE_TYPE_Q4_0, 33}, {MOE_TYPE_Q4_0, 16}, {MOE_TYPE_Q8_0, 31},
                  {MOE_TYPE_Q4_K, 32}, {MOE_TYPE_Q6_K, 128}, {MOE_TYPE_Q5_K, 384},
                  {41, 64},            {134, 32},            {40, 32}};
    for (size_t i = 0; i < sizeof ragged / sizeof ragged[0]; i++) {
        one_tensor(&b, "name", 2, ragged[i].ne0, 256, 0, 0, ragged[i].type, 0, 65536);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "cannot be cut into");
    }
    one_tensor(&b, "name", 2, 256, 6, 0, 0, 210 /* Q2_K_R4 */, 0, 65536);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "groups of 4");
    one_tensor(&b, "name", 2, 256, 8, 0, 0, 210, 0, 65536);
    EXPECT_GOOD(&b);
    one_tensor(&b, "name", 2, 32, 4, 0, 0, 202 /* Q4_0_R8 */, 0, 65536);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "groups of 8");
    one_tensor(&b, "token_embd.weight", 2, 32, 8, 0, 0, 202, 0, 65536);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "token_embd.weight", "interleaves");
    one_tensor(&b, "token_embd.weight", 2, 32, 8, 0, 0, MOE_TYPE_Q4_0, 0, 65536);
    EXPECT_GOOD(&b);
    // ids that cannot be one, and ids that some later program may know
    static const uint32_t impossible[] = {1u << 31, UINT32_MAX, UINT32_MAX - 1};
    for (size_t i = 0; i < 3; i++) {
        one_tensor(&b, "name", 1, 32, 0, 0, 0, impossible[i], 0, 64);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24 + 8 + 4 + 4 + 8, "name", "tensor type");
    }
    static const uint32_t unknown[] = {4, 5, 36, 43, 77, 142, 400, 1 << 20, INT32_MAX};
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        one_tensor(&b, "name", 1, 32, 0, 0, 0, unknown[i], 0, 0);
        moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, NULL);
        CHECK(gguf != NULL);
        if (gguf) {
            const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, 0);
            CHECK((uint32_t)tensor->type == unknown[i] && !tensor->data && tensor->size == 0);
        }
        moe_gguf_close(gguf);
    }
    release(&b);
}

TEST(unaligned_offsets_and_those_beyond_the_end_are_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    uint64_t field = 24 + 8 + 4 + 4 + 8 + 4; // where the offset lies
    static const uint64_t unaligned[] = {1, 31, 33, UINT64_MAX, 16};
    for (size_t i = 0; i < sizeof unaligned / sizeof unaligned[0]; i++) {
        one_tensor(&b, "name", 1, 4, 0, 0, 0, MOE_TYPE_F32, unaligned[i], 256);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, field, "name", "multiple of the alignment");
    }
    static const uint64_t beyond[] = {64,
                                      96,
                                      (uint64_t)1 << 32,
                                      (uint64_t)1 << 63,
                                      UINT64_MAX - 31,
                                      UINT64_MAX - 63, // + data start: wraps to 0
                                      UINT64_MAX - 127};
    for (size_t i = 0; i < sizeof beyond / sizeof beyond[0]; i++) {
        one_tensor(&b, "name", 1, 4, 0, 0, 0, MOE_TYPE_F32, beyond[i], 64);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end of the file");
        // the size of an unknown type is unknown, but it must begin in the file
        one_tensor(&b, "name", 1, 4, 0, 0, 0, 77, beyond[i] + (beyond[i] == 64 ? 32 : 0), 64);
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end of the file");
    }
    // the start does not wrap, the end does
    one_tensor(&b, "name", 1, 64, 0, 0, 0, MOE_TYPE_F32, UINT64_MAX - 159, 1024);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end of the file");
    // the last byte
    one_tensor(&b, "name", 1, 5, 0, 0, 0, MOE_TYPE_F32, 32, 52);
    EXPECT_GOOD(&b);
    b.size--;
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end of the file");
    // no data at all: the data would start behind the end
    clear(&b);
    put_header(&b, 3, 1, 0), put_tensor(&b, "name", 1, 4, 0, 0, 0, MOE_TYPE_F32, 0);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end of the file");
    release(&b);
}

// Of tensors that share bytes a small file could hold any number: refused, whatever their order.
TEST(tensors_that_overlap_are_refused) {
    static const struct {
        uint64_t at[4], n[4]; // offsets and numbers of floats; 0: of an unknown type
        int blamed;           // -1: nobody
        const char *with;
    } cases[] = {
        {{0, 64, 128, 192}, {16, 16, 16, 16}, -1, ""},
        {{192, 64, 128, 0}, {16, 9, 1, 16}, -1, ""},
        {{0, 0, 128, 192}, {16, 16, 16, 16}, 1, "overlaps that of a"},
        {{64, 128, 32, 192}, {16, 16, 9, 16}, 0, "overlaps that of c"},
        {{0, 64, 128, 192}, {17, 16, 16, 16}, 1, "overlaps that of a"},
        {{96, 0, 128, 192}, {1, 64, 16, 16}, 0, "overlaps that of b"},
        {{192, 192, 192, 192}, {0, 1, 0, 0}, -1, ""},
        {{192, 192, 192, 192}, {0, 1, 0, 16}, 3, "overlaps that of b"},
    };
    bytes b;
    memset(&b, 0, sizeof b);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t described[4];
        clear(&b);
        put_header(&b, 3, 4, 0);
        for (int t = 0; t < 4; t++) {
            const char name[2] = {(char)('a' + t), 0};
            described[t] = b.size;
            put_tensor(&b, name, 1, cases[i].n[t] ? cases[i].n[t] : 16, 0, 0, 0,
                       cases[i].n[t] ? MOE_TYPE_F32 : 77, cases[i].at[t]);
        }
        put_pad(&b, 32), put_zeros(&b, 256);
        if (cases[i].blamed < 0) {
            EXPECT_GOOD(&b);
        } else {
            const char name[2] = {(char)('a' + cases[i].blamed), 0};
            EXPECT_BAD(&b, MOE_ERROR_FORMAT, described[cases[i].blamed], name, cases[i].with);
        }
    }
    release(&b);
}

// What files say is quoted as text: valid UTF-8, nothing that a terminal would obey, no character
// cut in two.
static int is_shown(const char *text) {
    const unsigned char *c = (const unsigned char *)text;
    while (*c) {
        int n = *c < 0x80 ? 1 : *c < 0xE0 ? 2 : *c < 0xF0 ? 3 : 4;
        if (*c < 0x20 || *c == 0x7F || (*c >= 0x80 && *c < 0xC2) || *c > 0xF4) return 0;
        if (n == 2 && *c == 0xC2 && c[1] < 0xA0) return 0; // U+0080 to U+009F
        if (n == 3 && ((*c == 0xE0 && c[1] < 0xA0) || (*c == 0xED && c[1] > 0x9F))) return 0;
        if (n == 4 && ((*c == 0xF0 && c[1] < 0x90) || (*c == 0xF4 && c[1] > 0x8F))) return 0;
        for (c++; n > 1; n--)
            if ((*c++ & 0xC0) != 0x80) return 0;
    }
    return 1;
}

TEST(errors_show_no_control_characters_of_a_file) {
    static const char *const texts[] = {
        "\33[2J\33]0;title\7", "a\r\nb\tc", "\x7f\x7f", "\xC2\x9B" "31m", "\xC2\x80",
        "\x9B" "31m", "\xFF\xFE", "\xC0\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE4\xB8",
        "\xF0\x9F\x98\x80 fine", "gr\xC3\xBC\xC3\x9F" "e",
        // cut at any byte
        "x\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD"
        "\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD"
        "\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD"
        "\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD"};
    static const char *const keys[] = {"general.architecture", "general.type",
                                       "tokenizer.ggml.model", "tokenizer.ggml.pre",
                                       "llama.rope.scaling.type"};
    bytes b;
    memset(&b, 0, sizeof b);
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        moe_error error;
        const int kept = i == 11 || i == 12;
        clear(&b); // as the name of a key, of a tensor
        put_header(&b, 3, 0, 1), put_key(&b, texts[i], 99), put_u64(&b, 0);
        CHECK(open_copy(b.data, b.size, &error) == MOE_ERROR_FORMAT);
        CHECKF(is_shown(error.where) && is_shown(error.text), "%d", (int)i);
        if (kept) CHECK(!strcmp(error.where, texts[i]));
        one_tensor(&b, texts[i], 9, 4, 0, 0, 0, MOE_TYPE_F32, 0, 64);
        CHECK(open_copy(b.data, b.size, &error) == MOE_ERROR_FORMAT);
        CHECKF(is_shown(error.where) && is_shown(error.text), "%d", (int)i);
        for (size_t k = 0; k < sizeof keys / sizeof keys[0]; k++) { // as a value
            clear(&b);
            put_header(&b, 3, 0, k ? 4 : 1);
            if (k) put_key(&b, "general.architecture", 8), put_string(&b, "llama");
            if (k) put_key_u32(&b, "llama.context_length", 64);
            put_key(&b, keys[k], 8), put_string(&b, texts[i]);
            if (k == 3) put_key(&b, "tokenizer.ggml.model", 8), put_string(&b, "gpt2");
            else if (k) put_key_u32(&b, "llama.embedding_length", 64);
            moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, &error);
            CHECK(gguf != NULL);
            for (int vocab = 0; vocab < 2; vocab++) {
                moe_model *model = NULL;
                moe_vocab *only = NULL;
                memset(&error, 0, sizeof error);
                if (vocab) only = moe_vocab_open(gguf, &error);
                else model = moe_model_open_gguf(gguf, NULL, &error);
                CHECK(!model && !only && error.status != MOE_OK);
                CHECKF(is_shown(error.where) && is_shown(error.text), "%d %s: %s", (int)i,
                       keys[k], error.text);
                if (kept && (vocab ? k == 2 || k == 3 : k < 2))
                    CHECKF(strstr(error.text, texts[i]) != NULL, "%s: %s", keys[k], error.text);
                moe_vocab_close(only);
                moe_model_close(model);
            }
            moe_gguf_close(gguf);
        }
    }
    release(&b);
}

// ---- exhaustive damage -----------------------------------------------------------------------

TEST(a_file_cut_at_any_byte_is_refused) {
    bytes b;
    memset(&b, 0, sizeof b);
    put_good_file(&b, 3);
    EXPECT_GOOD(&b);
    for (size_t size = 0; size < b.size; size++) {
        moe_error error;
        open_copy(b.data, size, &error);
        CHECKF(error.status == MOE_ERROR_FORMAT, "cut at %d: %s", (int)size,
               moe_status_name(error.status));
        CHECK(error.offset <= size && error.text[0]);
    }
    release(&b);
}

TEST(a_flip_of_any_byte_does_no_harm) {
    bytes b;
    memset(&b, 0, sizeof b);
    put_good_file(&b, 3);
    int opened = 0, refused = 0;
    for (size_t i = 0; i < b.size; i++)
        for (int bit = 0; bit <= 8; bit++) {
            uint8_t mask = bit < 8 ? (uint8_t)(1 << bit) : 0xFF;
            moe_error error;
            b.data[i] ^= mask;
            if (open_copy(b.data, b.size, &error) == MOE_OK) opened++;
            else refused++;
            CHECK(error.status == MOE_OK || error.status == MOE_ERROR_FORMAT ||
                  error.status == MOE_ERROR_UNSUPPORTED);
            CHECK(error.offset <= b.size);
            b.data[i] ^= mask;
        }
    CHECKF(opened > 1000 && refused > 1000, "%d %d", opened, refused);
    release(&b);
}

TEST(any_allocation_of_opening_may_fail) {
    bytes b;
    memset(&b, 0, sizeof b);
    put_good_file(&b, 3);
    counter c;
    moe_gguf_options options = counter_options(&c);
    moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, &options, NULL);
    CHECK(gguf != NULL);
    long n = c.n_allocs;
    moe_gguf_close(gguf);
    CHECK(c.live == 0 && n >= 5);
    for (long k = 1; k <= n; k++) {
        moe_error error;
        memset(&error, 0, sizeof error);
        options = counter_options(&c);
        c.fail_at = k;
        CHECK(!moe_gguf_open_memory(b.data, b.size, &options, &error));
        CHECK(error.status == MOE_ERROR_MEMORY && error.text[0]);
        CHECK(c.live == 0 && c.live_bytes == 0);
    }
    release(&b);
}

// Steps of reading n keys and n tensors and of finding the tensors.
static uint64_t steps_of_names(int n) {
    bytes b;
    memset(&b, 0, sizeof b);
    char name[64];
    put_header(&b, 3, (uint64_t)n, (uint64_t)n);
    for (int i = 0; i < n; i++) {
        snprintf(name, sizeof name, "kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk%d", i);
        put_key(&b, name, MOE_VALUE_UINT8), put_u8(&b, 1);
    }
    for (int i = n; i-- > 0;) {
        snprintf(name, sizeof name, "ttttttttttttttttttttttttttttttttttttttttttttttttttt%d", i);
        put_tensor(&b, name, 1, 1, 0, 0, 0, MOE_TYPE_F32, 32 * (uint64_t)i);
    }
    put_pad(&b, 32), put_zeros(&b, 32 * (size_t)n);
    uint64_t start = steps_now();
    moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, NULL);
    CHECK(gguf != NULL);
    for (int i = 0; gguf && i < n; i++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, i);
        if (moe_gguf_find_tensor(gguf, tensor->name) != tensor) CHECK(0);
    }
    start = steps_now() - start;
    moe_gguf_close(gguf);
    release(&b);
    return start;
}

// Many names with a long common prefix.
TEST(many_names_take_n_log_n) {
    CHECK_GROWTH(steps_of_names(80000), steps_of_names(10000), N_LOG_N, "names", 80000);
}

// ---- files -----------------------------------------------------------------------------------

static char folder[64];

static const char *in_folder(const char *name) {
    static char path[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}
static int make_folder(void) {
    if (mkdir("build", 0777) != 0 && errno != EEXIST) return 0;
    snprintf(folder, sizeof folder, "build/test_gguf_%ld", (long)getpid());
    return mkdir(folder, 0777) == 0 || errno == EEXIST;
}
static void write_file(const char *name, const bytes *b) {
    FILE *file = fopen(in_folder(name), "wb");
    if (!file) return;
    if (b->size) CHECK(fwrite(b->data, 1, b->size, file) == b->size);
    fclose(file);
}

// Files that this process holds open, and mappings of files in our folder.
static int n_open_files(void) {
    int n = 0;
    for (int i = 0; i < 256; i++) n += fcntl(i, F_GETFD) >= 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    while (maps && fgets(line, sizeof line, maps)) n += strstr(line, folder) != NULL;
    if (maps) fclose(maps);
    return n;
}

static void expect_file(const char *path, moe_status status, const char *where, const char *text,
                        int line) {
    int n_open = n_open_files();
    for (int mode = 0; mode < 3; mode++) {
        counter c;
        moe_gguf_options options = counter_options(&c);
        moe_error error;
        memset(&error, 0, sizeof error);
        options.pages = (moe_pages)mode;
        moe_gguf *gguf = moe_gguf_open(path, &options, &error);
        if (gguf) walked += walk(gguf);
        moe_gguf_close(gguf);
        CHECKF(error.status == status && strstr(error.where, where) && strstr(error.text, text),
               "line %d: %s in '%s': %s", line, moe_status_name(error.status), error.where,
               error.text);
        CHECK(c.live == 0 && n_open_files() == n_open);
    }
}
#define EXPECT_FILE(path, status, where, text) expect_file(path, status, where, text, __LINE__)

TEST(files_that_cannot_be_read_are_refused_with_a_reason) {
    bytes b;
    memset(&b, 0, sizeof b);
    CHECK(make_folder());
    EXPECT_FILE(in_folder("missing.gguf"), MOE_ERROR_IO, "missing.gguf", "no such file");
    EXPECT_FILE(folder, MOE_ERROR_IO, "test_gguf", "directory");
    write_file("empty.gguf", &b);
    EXPECT_FILE(in_folder("empty.gguf"), MOE_ERROR_FORMAT, "empty.gguf", "empty");
    EXPECT_FILE(in_folder("empty.gguf/x.gguf"), MOE_ERROR_IO, "x.gguf", "folder");
    EXPECT_FILE("/dev/null", MOE_ERROR_IO, "/dev/null", "not a regular file");
    CHECK(symlink("loop.gguf", in_folder("loop.gguf")) == 0);
    EXPECT_FILE(in_folder("loop.gguf"), MOE_ERROR_IO, "loop.gguf", "loop of them");
    unlink(in_folder("loop.gguf"));
    CHECK(mkfifo(in_folder("fifo.gguf"), 0600) == 0);
    EXPECT_FILE(in_folder("fifo.gguf"), MOE_ERROR_IO, "fifo.gguf", "not a regular file");
    put(&b, "hello, world", 12);
    write_file("text.gguf", &b);
    EXPECT_FILE(in_folder("text.gguf"), MOE_ERROR_FORMAT, "", "not a GGUF file");
    char path[256];
    snprintf(path, sizeof path, "%s//////////////////////////////////////////////////%s", folder,
             "missing.gguf");
    EXPECT_FILE(path, MOE_ERROR_IO, "missing.gguf", "no such file");
    if (getuid() != 0) {
        CHECK(chmod(in_folder("text.gguf"), 0) == 0);
        EXPECT_FILE(in_folder("text.gguf"), MOE_ERROR_IO, "text.gguf", "permission");
    }
    unlink(in_folder("empty.gguf"));
    unlink(in_folder("fifo.gguf"));
    unlink(in_folder("text.gguf"));
    CHECK(rmdir(folder) == 0);
    release(&b);
}

typedef struct progress {
    int n_calls, cancel_at;
    float last;
} progress;

static int on_progress(void *user, float fraction) {
    progress *p = (progress *)user;
    p->n_calls++;
    CHECK(fraction >= p->last && fraction <= 1);
    p->last = fraction;
    return p->n_calls != p->cancel_at;
}

TEST(every_way_to_read_a_file_gives_the_same) {
    bytes b;
    memset(&b, 0, sizeof b);
    CHECK(make_folder());
    put_good_file(&b, 3);
    uint64_t sum = 0;
    for (int large = 0; large < 2; large++) {
        if (large) put_zeros(&b, (size_t)40 << 20); // several chunks; data that nothing uses
        write_file("good.gguf", &b);
        for (int mode = 0; mode < 6; mode++) {
            counter c;
            progress p;
            moe_error error;
            moe_gguf_options options = counter_options(&c);
            memset(&p, 0, sizeof p);
            options.pages = (moe_pages)(mode % 3);
            options.prefault = mode / 3 ? MOE_ON : MOE_OFF;
            options.progress = on_progress;
            options.progress_user = &p;
            moe_gguf *gguf = moe_gguf_open(in_folder("good.gguf"), &options, &error);
            CHECK(gguf != NULL);
            if (!gguf) continue;
            CHECK(moe_gguf_file_size(gguf) == b.size);
            uint64_t got = walk(gguf) - b.size;
            if (!sum) sum = got;
            CHECK(got == sum);
            int reads = options.pages == MOE_PAGES_COPY || mode / 3;
            CHECK(reads ? p.n_calls >= 1 && p.last == 1 : p.n_calls == 0);
            CHECK(c.peak_bytes < 65536); // tables only: files lie in pages of the system
            CHECK((uintptr_t)gguf->parts[0].data % MOE__PAGES_HUGE == 0);
            moe_gguf_close(gguf);
            CHECK(c.live == 0 && c.live_bytes == 0);
            for (int k = 1; k <= p.n_calls; k++) { // cancel at every call
                progress q;
                memset(&q, 0, sizeof q);
                q.cancel_at = k;
                options.progress_user = &q;
                memset(&error, 0, sizeof error);
                gguf = moe_gguf_open(in_folder("good.gguf"), &options, &error);
                // how often a team reports depends on who took which piece; the end is reported
                if (gguf) CHECK(k > 1 && q.n_calls < k && q.last == 1);
                else CHECK(error.status == MOE_ERROR_CANCELLED && q.n_calls == k);
                moe_gguf_close(gguf);
                CHECK(c.live == 0 && c.live_bytes == 0);
            }
        }
    }
    unlink(in_folder("good.gguf"));
    CHECK(rmdir(folder) == 0);
    release(&b);
}

// ---- split models ----------------------------------------------------------------------------

typedef struct split_part {
    int no, count, total; // split.no etc.; -1: the key is left out
    int n_tensors, first; // names t<first>, t<first + 1>, ...
    uint32_t alignment;
} split_part;

static void write_part(const char *name, const split_part *part) {
    bytes b;
    char text[32];
    memset(&b, 0, sizeof b);
    uint64_t n_values = 1 + (part->no >= 0) + (part->count >= 0) + (part->total >= 0);
    put_header(&b, 3, (uint64_t)part->n_tensors, n_values);
    put_key_u32(&b, "general.alignment", part->alignment);
    if (part->no >= 0) put_key(&b, "split.no", MOE_VALUE_UINT16), put_u16(&b, (uint16_t)part->no);
    if (part->count >= 0)
        put_key(&b, "split.count", MOE_VALUE_INT64), put_u64(&b, (uint64_t)part->count);
    if (part->total >= 0)
        put_key(&b, "split.tensors.count", MOE_VALUE_INT32), put_u32(&b, (uint32_t)part->total);
    for (int i = 0; i < part->n_tensors; i++) {
        snprintf(text, sizeof text, "t%d", part->first + i);
        put_tensor(&b, text, 1, 1, 0, 0, 0, MOE_TYPE_F32,
                   (uint64_t)i * (part->alignment < 4 ? 4 : part->alignment));
    }
    if (part->n_tensors) put_pad(&b, part->alignment);
    for (int i = 0; i < part->n_tensors; i++) {
        put_pad(&b, part->alignment);
        put_f32(&b, (float)(part->first + i));
    }
    write_file(name, &b);
    release(&b);
}

// Three parts with 2, 1 and 3 tensors.
static void good_split(split_part *parts) {
    static const split_part good[3] = {
        {0, 3, 6, 2, 0, 32}, {1, 3, 6, 1, 2, 64}, {2, 3, 6, 3, 3, 1}};
    memcpy(parts, good, sizeof good);
}
static void write_split(const split_part *parts) {
    write_part("m-00001-of-00003.gguf", &parts[0]);
    write_part("m-00002-of-00003.gguf", &parts[1]);
    write_part("m-00003-of-00003.gguf", &parts[2]);
}
static void remove_split(void) {
    unlink(in_folder("m-00001-of-00003.gguf"));
    unlink(in_folder("m-00002-of-00003.gguf"));
    unlink(in_folder("m-00003-of-00003.gguf"));
}

TEST(a_split_model_is_read_as_one) {
    split_part parts[3];
    CHECK(make_folder());
    for (int without = 0; without < 2; without++) { // a first part without tensors
        good_split(parts);
        if (without) {
            parts[0].n_tensors = 0;
            for (int i = 0; i < 3; i++) parts[i].total = i ? -1 : 4;
        }
        write_split(parts);
        EXPECT_FILE(in_folder("m-00001-of-00003.gguf"), MOE_OK, "", "");
        progress p;
        moe_gguf_options options;
        moe_error error;
        memset(&options, 0, sizeof options);
        memset(&p, 0, sizeof p);
        options.prefault = MOE_ON;
        options.progress = on_progress;
        options.progress_user = &p;
        moe_gguf *gguf = moe_gguf_open(in_folder("m-00001-of-00003.gguf"), &options, &error);
        CHECK(gguf != NULL);
        if (!gguf) continue;
        CHECK(p.n_calls == 3 && p.last == 1);
        CHECK(moe_gguf_n_tensors(gguf) == (without ? 4 : 6));
        CHECK(moe_gguf_n_values(gguf) == 4);
        for (int i = without ? 2 : 0; i < 6; i++) {
            char name[8];
            snprintf(name, sizeof name, "t%d", i);
            const moe_gguf_tensor *tensor = moe_gguf_find_tensor(gguf, name);
            CHECK(tensor && moe__load_f32(tensor->data) == (float)i);
            CHECK(tensor && tensor->part == (i < 2 ? 0 : i < 3 ? 1 : 2));
        }
        moe_gguf_close(gguf);
    }
    // split.count 0 or 1, or no key: one file, whatever it is called
    for (int count = -1; count <= 1; count++) {
        good_split(parts);
        parts[0].count = count;
        write_part("m.gguf", &parts[0]);
        EXPECT_FILE(in_folder("m.gguf"), MOE_OK, "", "");
        write_part("m-00001-of-00003.gguf", &parts[0]);
        EXPECT_FILE(in_folder("m-00001-of-00003.gguf"), MOE_OK, "", "");
    }
    unlink(in_folder("m.gguf"));
    remove_split();
    CHECK(rmdir(folder) == 0);
}

TEST(parts_that_do_not_belong_together_are_refused) {
    split_part parts[3];
    CHECK(make_folder());
    const char *first = "m-00001-of-00003.gguf";
    good_split(parts);
    write_split(parts);
    unlink(in_folder("m-00002-of-00003.gguf"));
    EXPECT_FILE(in_folder(first), MOE_ERROR_IO, "m-00002-of-00003.gguf", "no such file");
    write_split(parts);
    EXPECT_FILE(in_folder("m-00002-of-00003.gguf"), MOE_ERROR_FORMAT, "m-00002", "open the first");
    write_part("m.gguf", &parts[0]);
    EXPECT_FILE(in_folder("m.gguf"), MOE_ERROR_FORMAT, "m.gguf", "must be named");
    write_part("m-00001-of-00004.gguf", &parts[0]);
    EXPECT_FILE(in_folder("m-00001-of-00004.gguf"), MOE_ERROR_FORMAT, "m-00001", "must be named");
    unlink(in_folder("m-00001-of-00004.gguf"));
    // swapped
    write_part("m-00002-of-00003.gguf", &parts[2]);
    write_part("m-00003-of-00003.gguf", &parts[1]);
    EXPECT_FILE(in_folder(first), MOE_ERROR_FORMAT, "m-00002-of-00003.gguf", "another part");
    for (int what = 0; what < 6; what++) {
        good_split(parts);
        const char *where = "m-00003-of-00003.gguf", *text = "split.count";
        if (what == 0) parts[2].count = 4;
        if (what == 1) parts[2].count = -1;
        if (what == 2) parts[2].no = -1, text = "split.no";
        if (what == 3) parts[0].total = 7, where = "split.tensors.count", text = "6 tensors";
        if (what == 4) parts[2].n_tensors = 2, where = "split.tensors.count", text = "5 tensors";
        if (what == 5) parts[2].first = 0, where = "t0", text = "twice (in part 3 of 3)";
        write_split(parts);
        EXPECT_FILE(in_folder(first), MOE_ERROR_FORMAT, where, text);
    }
    good_split(parts);
    static const int counts[] = {65536, INT32_MAX};
    for (int i = 0; i < 2; i++) {
        parts[0].count = counts[i];
        write_split(parts);
        EXPECT_FILE(in_folder(first), MOE_ERROR_FORMAT, "split.count", "cannot be split");
    }
    // a damaged part is named
    good_split(parts);
    parts[1].alignment = 32;
    write_split(parts);
    bytes b;
    memset(&b, 0, sizeof b);
    put(&b, "GGUF\3\0\0\0", 8);
    write_file("m-00002-of-00003.gguf", &b);
    EXPECT_FILE(in_folder(first), MOE_ERROR_FORMAT, "", "header (in part 2 of 3)");
    release(&b);
    // one part in memory cannot find the others
    begin_value(&b, "split.count", MOE_VALUE_UINT16);
    put_u16(&b, 2), put_zeros(&b, 32);
    EXPECT_BAD(&b, MOE_ERROR_UNSUPPORTED, 0, "split.count", "from memory");
    begin_value(&b, "split.count", MOE_VALUE_STRING);
    put_string(&b, "2");
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24 + 8 + 11 + 4, "split.count", "integer");
    begin_value(&b, "split.count", MOE_VALUE_INT32);
    put_u32(&b, (uint32_t)-2);
    EXPECT_BAD(&b, MOE_ERROR_FORMAT, 0, "split.count", "cannot be split");
    release(&b);
    unlink(in_folder("m.gguf"));
    remove_split();
    CHECK(rmdir(folder) == 0);
}

TEST(any_allocation_of_opening_parts_may_fail) {
    split_part parts[3];
    counter c;
    CHECK(make_folder());
    good_split(parts);
    write_split(parts);
    for (int mode = 0; mode < 3; mode++) {
        moe_gguf_options options = counter_options(&c);
        options.pages = (moe_pages)mode;
        moe_gguf *gguf = moe_gguf_open(in_folder("m-00001-of-00003.gguf"), &options, NULL);
        CHECK(gguf != NULL);
        long n = c.n_allocs;
        moe_gguf_close(gguf);
        CHECK(c.live == 0 && n > 10);
        for (long k = 1; k <= n; k++) {
            moe_error error;
            memset(&error, 0, sizeof error);
            options = counter_options(&c);
            options.pages = (moe_pages)mode;
            c.fail_at = k;
            CHECK(!moe_gguf_open(in_folder("m-00001-of-00003.gguf"), &options, &error));
            CHECK(error.status == MOE_ERROR_MEMORY);
            CHECK(c.live == 0 && c.live_bytes == 0);
        }
    }
    remove_split();
    CHECK(rmdir(folder) == 0);
}

// Cutting any part of a split model at any byte.
TEST(a_split_model_cut_at_any_byte_is_refused) {
    split_part parts[3];
    CHECK(make_folder());
    good_split(parts);
    write_split(parts);
    for (int p = 1; p <= 3; p++) {
        char name[32];
        bytes b;
        uint8_t buffer[1024];
        memset(&b, 0, sizeof b);
        snprintf(name, sizeof name, "m-0000%d-of-00003.gguf", p);
        FILE *file = fopen(in_folder(name), "rb");
        if (!file) continue;
        put(&b, buffer, fread(buffer, 1, sizeof buffer, file));
        memcpy(b.data, buffer, b.size);
        fclose(file);
        size_t size = b.size;
        for (b.size = 0; b.size < size; b.size++) {
            moe_error error;
            memset(&error, 0, sizeof error);
            write_file(name, &b);
            CHECK(!moe_gguf_open(in_folder("m-00001-of-00003.gguf"), NULL, &error));
            CHECK(error.status == MOE_ERROR_FORMAT);
        }
        write_file(name, &b);
        EXPECT_FILE(in_folder("m-00001-of-00003.gguf"), MOE_OK, "", "");
        release(&b);
    }
    remove_split();
    CHECK(rmdir(folder) == 0);
}

// ---- the table of types ----------------------------------------------------------------------

TEST(the_table_of_types_is_sorted_and_consistent) {
    int n = (int)(sizeof moe__gguf_types / sizeof moe__gguf_types[0]);
    for (int i = 0; i < n; i++) {
        const moe__gguf_type *type = &moe__gguf_types[i];
        CHECK(i == 0 || type[-1].id < type->id);
        CHECK(moe__gguf_type_info(type->id) == type);
        CHECK(memchr(type->name, 0, sizeof type->name) && type->rows >= 1);
        CHECK(type->bytes == 0 || type->block >= 1);
        for (int k = 0; k < i; k++) CHECK(strcmp(type->name, moe__gguf_types[k].name) != 0);
    }
    CHECK(!moe__gguf_type_info(-1) && !moe__gguf_type_info(43) && !moe__gguf_type_info(400));
    CHECK(!moe__gguf_type_info(INT32_MAX) && !moe__gguf_type_info(INT32_MIN));
}

// The bytes of tensors {2 blocks, 16, 3} of every type; a byte less is too few.
TEST(tensors_of_every_type_have_their_size) {
    bytes b;
    memset(&b, 0, sizeof b);
    int n = (int)(sizeof moe__gguf_types / sizeof moe__gguf_types[0]);
    for (int i = 0; i < n; i++) {
        const moe__gguf_type *type = &moe__gguf_types[i];
        if (type->bytes == 0) continue;
        size_t size = (size_t)(type->meta + 2 * type->bytes) * 48;
        one_tensor(&b, "name", 3, (uint64_t)type->block * 2, 16, 3, 0, (uint32_t)type->id, 0, size);
        moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, NULL);
        CHECKF(gguf && moe_gguf_tensor_at(gguf, 0)->size == size, "%s", type->name);
        moe_gguf_close(gguf);
        b.size--;
        EXPECT_BAD(&b, MOE_ERROR_FORMAT, 24, "name", "ends behind the end of the file");
    }
    release(&b);
}

// Against the fact sheet: | id | name | block | bytes | row_meta | bits or R=n | | id | ...
TEST(the_table_of_types_agrees_with_the_sheet) {
    FILE *file = fopen("../shared/spec/quants.md", "rb");
    if (!file) SKIP("../shared/spec/quants.md is missing");
    char line[1024];
    int n = 0;
    while (fgets(line, sizeof line, file)) {
        char *cell[32];
        int n_cells = 0;
        for (char *p = line; (p = strchr(p, '|')) != NULL && n_cells < 32;) {
            *p++ = 0;
            cell[n_cells++] = p;
        }
        for (int first = 0; first + 6 < n_cells; first += 7) {
            int id, block, bytes_, meta, group = 1;
            char name[32], **c = cell + first;
            if (n_cells < 14 || sscanf(c[0], "%d %31s", &id, name) != 1) continue;
            if (sscanf(c[1], "%31s", name) != 1 || sscanf(c[2], "%d", &block) != 1) continue;
            if (sscanf(c[3], "%d", &bytes_) != 1 || sscanf(c[4], "%d", &meta) != 1) continue;
            sscanf(c[5], " R=%d", &group);
            const moe__gguf_type *type = moe__gguf_type_info(id);
            CHECKF(type != NULL, "%d %s", id, name);
            if (!type || id == 15 || id == 31) continue; // two sizes; three types in one row
            CHECKF(strcmp(type->name, name) == 0 && type->block == block &&
                       type->bytes == bytes_ && type->meta == meta &&
                       type->rows == group,
                   "%d %s", id, name);
            n++;
        }
    }
    fclose(file);
    CHECKF(n >= 75, "%d types compared", n);
}

// ---- files made by others --------------------------------------------------------------------

// A value of the wrong kind: what it should be and what it is.
TEST(wrong_kinds_are_named) {
    static const struct {
        const char *key;
        uint32_t type, element; // element: of an array
        const char *text;
    } cases[] = {
        {"tokenizer.ggml.eos_token_id", 9, 5, "or a bool, and is an array of type int32"},
        {"tokenizer.ggml.eos_token_id", 6, 0, "an integer or a bool, and is of type float32"},
        {"tokenizer.ggml.model", 4, 0, "text, and is of type uint32"},
    };
    bytes b;
    memset(&b, 0, sizeof b);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe_error error;
        const int model = strcmp(cases[i].key, "tokenizer.ggml.model") == 0;
        memset(&error, 0, sizeof error);
        clear(&b);
        put_header(&b, 3, 0, model ? 1 : 5);
        if (!model) {
            put_key(&b, "tokenizer.ggml.model", 8), put_string(&b, "gpt2");
            put_key(&b, "tokenizer.ggml.pre", 8), put_string(&b, "gpt-2");
            put_array(&b, "tokenizer.ggml.tokens", 8, 1), put_string(&b, "a");
            put_array(&b, "tokenizer.ggml.merges", 8, 0);
        }
        if (cases[i].type == 9) put_array(&b, cases[i].key, cases[i].element, 1);
        else put_key(&b, cases[i].key, cases[i].type);
        put_u32(&b, 0);
        moe_gguf *gguf = moe_gguf_open_memory(b.data, b.size, NULL, &error);
        CHECK(gguf && !moe_vocab_open(gguf, &error));
        CHECKF(error.status == MOE_ERROR_FORMAT && !strcmp(error.where, cases[i].key) &&
                   strstr(error.text, cases[i].text),
               "%s: %s", error.where, error.text);
        moe_gguf_close(gguf);
    }
    release(&b);
}

TEST(vocabulary_files_open_with_all_their_tokens) {
    static const char *names[] = {"deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe",
                                  "llama-spm",      "phi-3",        "qwen2"};
    static const uint64_t n_tokens[] = {32256, 102400, 50257, 128256, 32000, 32064, 151936};
    for (int i = 0; i < 7; i++) {
        char path[128];
        snprintf(path, sizeof path, "../shared/vocab/ggml-vocab-%s.gguf", names[i]);
        moe_error error;
        FILE *file = fopen(path, "rb");
        if (!file) SKIP("%s is missing", path);
        fclose(file);
        moe_gguf *gguf = moe_gguf_open(path, NULL, &error);
        CHECK(gguf != NULL);
        if (!gguf) continue;
        const moe_gguf_value *tokens = moe_gguf_find_value(gguf, "tokenizer.ggml.tokens");
        CHECK(tokens && tokens->count == n_tokens[i] && moe_gguf_n_tensors(gguf) == 0);
        walked += walk(gguf);
        moe_gguf_close(gguf);
    }
}

MAIN()
