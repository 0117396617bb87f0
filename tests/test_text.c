// The room >>text: character classes, pre-tokenizers, BPE, special tokens, detokenization.
#include "steps.h"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"

// ---- a small GGUF writer ---------------------------------------------------------------------

typedef struct bytes {
    unsigned char *p;
    size_t n, capacity;
} bytes;

static void put(bytes *out, const void *data, size_t n) {
    if (out->n + n > out->capacity) {
        out->capacity = 2 * (out->n + n) + 256;
        out->p = (unsigned char *)realloc(out->p, out->capacity);
    }
    if (n) memcpy(out->p + out->n, data, n);
    out->n += n;
}
static void put_u32(bytes *out, uint32_t v) { put(out, &v, 4); }
static void put_u64(bytes *out, uint64_t v) { put(out, &v, 8); }
static void put_text(bytes *out, const char *text, size_t n) {
    put_u64(out, n);
    put(out, text, n);
}

static bytes file_begin(void) {
    bytes out = {NULL, 0, 0};
    put(&out, "GGUF", 4);
    put_u32(&out, 3);
    put_u64(&out, 0);
    put_u64(&out, 0);
    return out;
}
// Counts the value and writes its key and type.
static void put_key(bytes *out, const char *key, uint32_t type) {
    uint64_t n;
    memcpy(&n, out->p + 16, 8);
    n++;
    memcpy(out->p + 16, &n, 8);
    put_text(out, key, strlen(key));
    put_u32(out, type);
}
static void put_string(bytes *out, const char *key, const char *text) {
    put_key(out, key, MOE_VALUE_STRING);
    put_text(out, text, strlen(text));
}
static void put_number(bytes *out, const char *key, uint32_t type, int64_t value) {
    static const size_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    put_key(out, key, type);
    put(out, &value, sizes[type]);
}
static void put_array(bytes *out, const char *key, uint32_t type, uint64_t count) {
    put_key(out, key, MOE_VALUE_ARRAY);
    put_u32(out, type);
    put_u64(out, count);
}

// ---- vocabularies to write -------------------------------------------------------------------

typedef struct word {
    char text[64];
    size_t size;
} word;

enum { MAX_TOKENS = 600, MAX_MERGES = 300 };

typedef struct spec {
    word tokens[MAX_TOKENS];
    int32_t types[MAX_TOKENS];
    int n_tokens;
    word merges[MAX_MERGES];
    int n_merges;
    const char *model; // NULL: gpt2
    const char *pre; // NULL: no such key
    bytes more;      // further values
    int n_more;
} spec;

static word make_word(const char *text, size_t size) {
    word w;
    memset(&w, 0, sizeof w);
    w.size = size < sizeof w.text ? size : sizeof w.text;
    memcpy(w.text, text, w.size);
    return w;
}
static int same_word(word a, word b) {
    return a.size == b.size && memcmp(a.text, b.text, a.size) == 0;
}
static int add_token(spec *s, const char *text, int32_t type) {
    s->types[s->n_tokens] = type;
    s->tokens[s->n_tokens] = make_word(text, strlen(text));
    return s->n_tokens++;
}
static void add_merge(spec *s, const char *text) {
    s->merges[s->n_merges++] = make_word(text, strlen(text));
}
static void add_number(spec *s, const char *key, uint32_t type, int64_t value) {
    bytes one = file_begin();
    put_number(&one, key, type, value);
    put(&s->more, one.p + 24, one.n - 24);
    free(one.p);
    s->n_more++;
}

static void add_string(spec *s, const char *key, const char *value) {
    bytes one = file_begin();
    put_string(&one, key, value);
    put(&s->more, one.p + 24, one.n - 24);
    free(one.p);
    s->n_more++;
}

static void add_ids(spec *s, const char *key, const int32_t *ids, int n) {
    bytes one = file_begin();
    put_array(&one, key, MOE_VALUE_INT32, (uint64_t)n);
    put(&one, ids, 4 * (size_t)n);
    put(&s->more, one.p + 24, one.n - 24);
    free(one.p);
    s->n_more++;
}

// 256 bytes, token id = byte, and no merges.
static void spec_bytes(spec *s, const char *pre) {
    memset(s, 0, sizeof *s);
    s->pre = pre;
    for (int b = 0; b < 256; b++) {
        char name[3] = {0};
        moe__text_byte_name((unsigned char)b, name);
        add_token(s, name, 1);
    }
}

// The built-in vocabulary: bytes, some merges, some special tokens.
static void spec_small(spec *s, const char *pre) {
    static const char *const merges[] = {
        "h e", "l l", "he ll", "hell o", "\304\240 w", "o r", "l d", "\304\240w or", "a a",
        "aa aa", "aaaa aaaa", "\304\240 \304\240", "\304\240\304\240 \304\240\304\240", "1 2",
        "12 3", "\304\212 \304\212", "\303\203 \302\251", "i n", "in g", "t h", "th e"};
    static const char *const tokens[] = {
        "he", "ll", "hell", "hello", "\304\240w", "or", "ld", "\304\240wor", "aa", "aaaa",
        "aaaaaaaa", "\304\240\304\240", "\304\240\304\240\304\240\304\240", "12", "123",
        "\304\212\304\212", "\303\203\302\251", "in", "ing", "th", "the"};
    spec_bytes(s, pre);
    for (size_t i = 0; i < sizeof merges / sizeof merges[0]; i++) add_merge(s, merges[i]);
    for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; i++) add_token(s, tokens[i], 1);
    add_token(s, "<|begin|>", 3);
    add_token(s, "<|im_start|>", 3);
    add_token(s, "<|im_end|>", 3);
    add_token(s, "<user>", 4);
    add_token(s, "<unk>", 2);
}

static bytes spec_file(const spec *s) {
    bytes out = file_begin();
    put_string(&out, "tokenizer.ggml.model", s->model ? s->model : "gpt2");
    if (s->pre) put_string(&out, "tokenizer.ggml.pre", s->pre);
    put_array(&out, "tokenizer.ggml.tokens", MOE_VALUE_STRING, (uint64_t)s->n_tokens);
    for (int i = 0; i < s->n_tokens; i++) put_text(&out, s->tokens[i].text, s->tokens[i].size);
    put_array(&out, "tokenizer.ggml.token_type", MOE_VALUE_INT32, (uint64_t)s->n_tokens);
    put(&out, s->types, 4 * (size_t)s->n_tokens);
    put_array(&out, "tokenizer.ggml.merges", MOE_VALUE_STRING, (uint64_t)s->n_merges);
    for (int i = 0; i < s->n_merges; i++) put_text(&out, s->merges[i].text, s->merges[i].size);
    put(&out, s->more.p, s->more.n);
    uint64_t n;
    memcpy(&n, out.p + 16, 8);
    n += (uint64_t)s->n_more;
    memcpy(out.p + 16, &n, 8);
    return out;
}

// The vocabulary of a file in memory; the GGUF is closed again and the memory freed.
static moe_vocab *open_bytes(bytes file, moe_error *error) {
    moe_gguf *gguf = moe_gguf_open_memory(file.p, file.n, NULL, error);
    moe_vocab *vocab = gguf ? moe_vocab_open(gguf, error) : NULL;
    moe_gguf_close(gguf);
    memset(file.p, 0xAA, file.n);
    free(file.p);
    return vocab;
}
static moe_vocab *open_spec(spec *s) {
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_vocab *vocab = open_bytes(spec_file(s), &error);
    CHECKF(vocab, "%s: %s: %s", moe_status_name(error.status), error.where, error.text);
    free(s->more.p);
    s->more.p = NULL;
    return vocab;
}
static spec shared_spec; // too large for the stack of a sanitizer build

static moe_vocab *open_small(const char *pre) {
    spec_small(&shared_spec, pre);
    return open_spec(&shared_spec);
}

// ---- helpers ---------------------------------------------------------------------------------

static uint64_t random_state = 1;
static uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % n);
}

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *data = (char *)malloc(*size + 1);
    if (fread(data, 1, *size, file) != *size) *size = 0;
    data[*size] = 0;
    fclose(file);
    return data;
}

static size_t append_text(const moe_vocab *vocab, const int32_t *ids, int64_t n, char *out,
                          size_t capacity) {
    size_t size = 0;
    for (int64_t i = 0; i < n; i++) {
        size_t k = moe_vocab_text(vocab, ids[i], out + size, capacity - size);
        if (k > capacity - size) return SIZE_MAX;
        size += k;
    }
    return size;
}

// decode(encode(text)) == text
static int round_trip(const moe_vocab *vocab, const char *text, size_t size, unsigned flags) {
    int32_t *ids = (int32_t *)malloc(4 * (size + 2));
    char *back = (char *)malloc(size + 1);
    int64_t n = moe_vocab_tokenize(vocab, text, size, flags, ids, size + 2);
    int same = n >= 0 && n <= (int64_t)size + 2 && append_text(vocab, ids, n, back, size) == size &&
               memcmp(back, text, size) == 0;
    free(ids);
    free(back);
    return same;
}

// The same with a SPM vocabulary, which puts a blank in front.
static int spm_round_trip(const moe_vocab *vocab, const char *text, size_t size) {
    size_t most = 3 * size + 6, n_back = 0;
    int32_t *ids = (int32_t *)malloc(4 * most);
    char *back = (char *)malloc(most);
    int64_t n = moe_vocab_tokenize(vocab, text, size, 0, ids, most);
    int same = n >= 0 && n <= (int64_t)most;
    if (same) n_back = append_text(vocab, ids, n, back, most);
    same = same && (size == 0 || (n_back == size + 1 && back[0] == ' ' &&
                                  memcmp(back + 1, text, size) == 0));
    free(ids);
    free(back);
    return same;
}

static size_t put_utf8(char *out, uint32_t code) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 63));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xE0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 63));
        out[2] = (char)(0x80 | (code & 63));
        return 3;
    }
    out[0] = (char)(0xF0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 63));
    out[2] = (char)(0x80 | (code >> 6 & 63));
    out[3] = (char)(0x80 | (code & 63));
    return 4;
}

// Valid UTF-8 with many class changes.
static size_t random_text(char *out, size_t capacity) {
    static const char *const bits[] = {" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "a", "hello",
                                       "B", "7", "123", "!", "..", "\303\251", "\344\270\255",
                                       "\314\201", "\360\237\231\202", "<|im_start|>", "<user>",
                                       "\302\240", "aaaaaaaa"};
    size_t n = 0;
    for (uint32_t left = random_below(24); left && n + 16 < capacity; left--) {
        if (random_below(4)) {
            const char *bit = bits[random_below(sizeof bits / sizeof bits[0])];
            memcpy(out + n, bit, strlen(bit));
            n += strlen(bit);
        } else {
            uint32_t code = random_below(random_below(2) ? 0x3000 : 0x110000);
            if (code < 0xD800 || code > 0xDFFF) n += put_utf8(out + n, code);
        }
    }
    return n;
}

static int32_t one_id(const moe_vocab *vocab, const char *text) {
    return moe_vocab_find(vocab, text, strlen(text));
}

// "12 34 5" of the tokens.
static const char *ids_of(const moe_vocab *vocab, const char *text, unsigned flags) {
    static char line[4096];
    int32_t ids[400];
    int64_t n = moe_vocab_tokenize(vocab, text, strlen(text), flags, ids, 400);
    size_t at = 0;
    line[0] = 0;
    for (int64_t i = 0; i < n && i < 400; i++)
        at += (size_t)snprintf(line + at, sizeof line - at, i ? " %d" : "%d", ids[i]);
    return line;
}

// "he|ll|o": the tokens' texts.
static const char *texts_of(const moe_vocab *vocab, const char *text, unsigned flags) {
    static char line[4096];
    int32_t ids[400];
    int64_t n = moe_vocab_tokenize(vocab, text, strlen(text), flags, ids, 400);
    size_t at = 0;
    for (int64_t i = 0; i < n && i < 400; i++) {
        moe_string token = moe_vocab_token(vocab, ids[i]);
        if (i) line[at++] = '|';
        memcpy(line + at, token.data, token.size);
        at += token.size;
    }
    line[at] = 0;
    return line;
}

// ---- characters ------------------------------------------------------------------------------

TEST(utf8_is_decoded_and_bad_bytes_are_replaced) {
    for (uint32_t code = 0; code < 0x110000; code++) {
        char text[8];
        uint32_t back = 0;
        if (code >= 0xD800 && code <= 0xDFFF) continue;
        size_t n = put_utf8(text, code);
        if (moe__utf8_next(text, n, &back) != n || back != code) CHECKF(0, "U+%04X", code);
        if (n > 1 && (moe__utf8_next(text, n - 1, &back) != 1 || back != 0xFFFD))
            CHECKF(0, "U+%04X cut", code);
    }
    static const char *const bad[] = {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF",
                                      "\xED\xA0\x80", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80",
                                      "\xF5\x80\x80\x80", "\xFF", "\xC3(", "\xE4\xB8(", "\xE4("};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        uint32_t code = 0;
        CHECK(moe__utf8_next(bad[i], strlen(bad[i]), &code) == 1 && code == 0xFFFD);
    }
}

TEST(every_byte_has_one_name_and_back) {
    int seen[256] = {0};
    uint32_t next = 0x100;
    for (int b = 0; b < 256; b++) {
        char name[2];
        uint32_t code;
        size_t n = moe__text_byte_name((unsigned char)b, name);
        CHECK(moe__utf8_next(name, n, &code) == n);
        int printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        CHECKF(code == (printable ? (uint32_t)b : next), "byte %d is U+%04X", b, code);
        next += !printable;
        CHECK(moe__text_named_byte(code) == b);
    }
    for (uint32_t code = 0; code < 0x20000; code++) {
        int b = moe__text_named_byte(code);
        CHECK(b >= -1 && b < 256);
        if (b >= 0) seen[b]++;
    }
    for (int b = 0; b < 256; b++) CHECK(seen[b] == 1);
}

TEST(characters_have_the_classes_of_unicode) {
    moe__text_run *runs = (moe__text_run *)malloc((MOE__TEXT_RUNS + 1) * sizeof *runs);
    moe__text_unpack_classes(runs);
    // Characters per class in Unicode 14; the sets as their definitions say.
    static const struct {
        uint32_t set, count;
    } counts[] = {{MOE__C_LU, 1831},    {MOE__C_LL, 2227},   {MOE__C_LT, 31},
                  {MOE__C_LM, 334},     {MOE__C_LO, 127333}, {MOE__C_L, 131756},
                  {MOE__C_M, 2408},     {MOE__C_N, 1791},    {MOE__C_P, 819},
                  {MOE__C_S, 7741},     {MOE__C_WHITE, 25},  {MOE__C_NEWLINE, 2},
                  {MOE__C_CASED, 2729}, {MOE__C_HAN, 94215}, {MOE__C_DIGIT, 10},
                  {MOE__C_ALPHA, 52},   {MOE__C_MARK, 32},   {MOE__C_MATH, 8},
                  {MOE__C_BLANK, 1},    {MOE__C_SLASH, 1},   {MOE__C_TURNS, 0},
                  {MOE__C_CUT, 0},      {MOE__C_NOT, 0}};
    uint32_t found[sizeof counts / sizeof counts[0]] = {0};
    for (uint32_t code = 0; code < 0x110000; code++) {
        uint32_t classes = moe__text_classify(runs, code);
        uint32_t category = classes & (MOE__C_L | MOE__C_M | MOE__C_N | MOE__C_P | MOE__C_S |
                                       MOE__C_WHITE);
        if (category & (category - 1)) CHECKF(0, "U+%04X has two categories", code);
        for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
            found[i] += (classes & counts[i].set) != 0;
    }
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        CHECKF(found[i] == counts[i].count, "set %x: %u, not %u", counts[i].set, found[i],
               counts[i].count);
    static const struct {
        uint32_t code, classes;
    } some[] = {{'A', MOE__C_LU},    {'z', MOE__C_LL},    {'0', MOE__C_N},     {'_', MOE__C_P},
                {'$', MOE__C_S},     {'\n', MOE__C_WHITE}, {0x85, MOE__C_WHITE}, {0x1C, 0},
                {0x200B, 0},         {0x3000, MOE__C_WHITE}, {0x100, MOE__C_LU}, {0x101, MOE__C_LL},
                {0x17E, MOE__C_LL},  {0x1C5, MOE__C_LT},  {0xAA, MOE__C_LO},   {0x2B0, MOE__C_LM},
                {0x301, MOE__C_M},   {0x903, MOE__C_M},   {0xBD, MOE__C_N},    {0x2160, MOE__C_N},
                {0x4E2D, MOE__C_LO}, {0xAC00, MOE__C_LO}, {0xD7A3, MOE__C_LO}, {0xD800, 0},
                {0xE000, 0},         {0xFFFD, MOE__C_S},  {0x1F642, MOE__C_S}, {0x20000, MOE__C_LO},
                {0x3134A, MOE__C_LO}, {0x3134B, 0},       {0xE0100, MOE__C_M}, {0x10FFFF, 0}};
    for (size_t i = 0; i < sizeof some / sizeof some[0]; i++) {
        uint32_t category = moe__text_classify(runs, some[i].code) & 0x3FF;
        CHECKF(category == some[i].classes, "U+%04X is %x", some[i].code, category);
    }
    free(runs);
}

// ---- pre-tokenizers --------------------------------------------------------------------------

static moe__text_run test_runs[MOE__TEXT_RUNS + 1];

// Classifies the text and runs the pre-tokenizer's passes; scan->classes and ->at to be freed.
static moe__text_scan cut_text(const moe__text_pre *pre, const char *text, size_t size) {
    moe__text_scan scan;
    memset(&scan, 0, sizeof scan);
    if (test_runs[1].start == 0) moe__text_unpack_classes(test_runs);
    scan.text = text;
    scan.classes = (uint32_t *)malloc(4 * (size + 1));
    scan.at = (uint32_t *)malloc(4 * (size + 1));
    for (size_t i = 0; i < size; scan.n++) {
        uint32_t code;
        scan.at[scan.n] = (uint32_t)i;
        i += moe__utf8_next(text + i, size - i, &code);
        scan.classes[scan.n] = moe__text_classify(test_runs, code);
    }
    scan.at[scan.n] = (uint32_t)size;
    for (int i = 0; i < MOE__PRE_PASSES && pre->passes[i]; i++)
        moe__text_pass(&scan, pre->passes[i]);
    return scan;
}

TEST(texts_are_cut_into_words_as_the_models_regexes_do) {
    // Names ("*" = all of them) and the text, cut. Made by Python's re with its classes written
    // out as ranges, from the regular expressions of the models.
    static const char *const names = "llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 "
                                     "deepseek-v3 deepseek-llm deepseek-coder gpt-2 refact "
                                     "seed-coder exaone-moe default";
    static const char *const cases[][2] = {
        {"llama-bpe deepseek-v3", "Hello|,| world|!| It|'s| |202|4|."},
        {"qwen2 bailingmoe qwen35 tekken refact seed-coder exaone-moe",
         "Hello|,| world|!| It|'s| |2|0|2|4|."},
        {"gpt-4o kimi-k2", "Hello|,| world|!| It's| |202|4|."},
        {"deepseek-llm", "Hello|,| world|!| It|'|s| |2024|."},
        {"deepseek-coder", "Hello|,| world|!| It|'|s| |2|0|2|4|."},
        {"gpt-2", "Hello|,| world|!| It|'s| 2024|."},
        {"default", "Hello|,| world|!| It|'|s| |202|4|."},
        {"*", " | a"},
        {"*", "a|  "},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 deepseek-v3 gpt-2 refact "
         "seed-coder exaone-moe default",
         "\r\n\r\n| x"},
        {"deepseek-llm deepseek-coder", "\r|\n|\r|\n| x"},
        {"llama-bpe gpt-4o kimi-k2 deepseek-v3 default", "123|456|7"},
        {"qwen2 bailingmoe qwen35 tekken deepseek-coder refact seed-coder exaone-moe",
         "1|2|3|4|5|6|7"},
        {"deepseek-llm gpt-2", "1234567"},
        {"llama-bpe qwen2 bailingmoe qwen35 tekken deepseek-v3 seed-coder exaone-moe",
         "don|'t| DON|'T| we|'LL"},
        {"gpt-4o kimi-k2", "don't| DON'T| we'LL"},
        {"deepseek-llm deepseek-coder default", "don|'|t| DON|'|T| we|'|LL"},
        {"gpt-2 refact", "don|'t| DON|'|T| we|'|LL"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 seed-coder exaone-moe",
         "foo|…bar"},
        {"deepseek-v3 deepseek-llm deepseek-coder gpt-2 refact default", "foo|…|bar"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken gpt-2 refact seed-coder exaone-moe "
         "default",
         "中文abc"},
        {"kimi-k2 deepseek-v3 deepseek-llm deepseek-coder", "中文|abc"},
        {"llama-bpe qwen2 bailingmoe seed-coder", "e|\314\201te|\314\201"},
        {"qwen35 gpt-4o tekken kimi-k2 deepseek-v3 exaone-moe", "e\314\201te\314\201"},
        {"deepseek-llm deepseek-coder gpt-2 refact default", "e|\314\201|te|\314\201"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 deepseek-v3 seed-coder "
         "exaone-moe",
         "\t\n|  |\tx"},
        {"deepseek-llm deepseek-coder", "\t|\n|  |\tx"},
        {"gpt-2 refact default", "\t\n  |\t|x"},
        {"llama-bpe gpt-4o kimi-k2 deepseek-v3 deepseek-llm default", "12½| |3|/|4"},
        {"qwen2 bailingmoe qwen35 tekken deepseek-coder refact seed-coder exaone-moe",
         "1|2|½| |3|/|4"},
        {"gpt-2", "12½| 3|/|4"},
        {"llama-bpe qwen2 bailingmoe qwen35 deepseek-v3 deepseek-llm deepseek-coder gpt-2 "
         "refact seed-coder exaone-moe default",
         "FooBarBAZ"},
        {"gpt-4o tekken kimi-k2", "Foo|Bar|BAZ"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 deepseek-v3 seed-coder "
         "exaone-moe",
         "a|\343\200\200b"},
        {"deepseek-llm deepseek-coder gpt-2 refact default", "a|\343\200\200|b"},
        {"llama-bpe qwen2 bailingmoe qwen35 kimi-k2 deepseek-v3 exaone-moe", "x|=$|1|+\n|//|y"},
        {"gpt-4o tekken", "x|=$|1|+\n//|y"},
        {"deepseek-llm deepseek-coder gpt-2 refact seed-coder default", "x|=$|1|+|\n|//|y"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 deepseek-v3 deepseek-coder "
         "gpt-2 refact seed-coder default",
         "ǅx| ʰy"},
        {"deepseek-llm", "ǅ|x| ʰ|y"},
        {"exaone-moe", "ǅx ʰy"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 seed-coder exaone-moe",
         "'ſ| '|s"},
        {"deepseek-v3 deepseek-llm deepseek-coder gpt-2 refact", "'|ſ| '|s"},
        {"default", "'|ſ| |'|s"},
        {"llama-bpe gpt-4o gpt-2 default", "々漢字|〇1"},
        {"qwen2 bailingmoe qwen35 tekken deepseek-llm deepseek-coder refact seed-coder "
         "exaone-moe",
         "々漢字|〇|1"},
        {"kimi-k2", "々漢字〇|1"},
        {"deepseek-v3", "々|漢字|〇1"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 deepseek-v3 deepseek-llm "
         "deepseek-coder gpt-2 refact seed-coder default",
         "안녕| wor| ld"},
        {"exaone-moe", "안녕 wor ld"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 deepseek-v3", "a|.\n\n| b"},
        {"deepseek-llm deepseek-coder", "a|.|\n|\n| b"},
        {"gpt-2 refact seed-coder default", "a|.|\n\n| b"},
        {"exaone-moe", "a|.\n|\n| b"},
        {"llama-bpe qwen2 bailingmoe qwen35 seed-coder", "'t|is| I|’m"},
        {"gpt-4o tekken kimi-k2", "'tis| I|’m"},
        {"deepseek-v3", "'tis| I|’|m"},
        {"deepseek-llm deepseek-coder default", "'|tis| I|’|m"},
        {"gpt-2 refact", "'t|is| I|’|m"},
        {"exaone-moe", "'t|is I|’m"},
        {"llama-bpe qwen2 bailingmoe qwen35 seed-coder exaone-moe", "'ſ|x| '|Sx"},
        {"gpt-4o tekken kimi-k2", "'ſx| '|Sx"},
        {"deepseek-v3 deepseek-coder gpt-2 refact", "'|ſx| '|Sx"},
        {"deepseek-llm", "'|ſ|x| '|Sx"},
        {"default", "'|ſx| |'|Sx"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-2 refact seed-coder exaone-moe default", "中AB"},
        {"gpt-4o tekken kimi-k2 deepseek-v3 deepseek-llm deepseek-coder", "中|AB"},
        {"llama-bpe qwen2 bailingmoe deepseek-llm deepseek-coder gpt-2 refact seed-coder "
         "exaone-moe default",
         "\314\201\001"},
        {"qwen35 gpt-4o tekken kimi-k2 deepseek-v3", "\314\201|\001"},
        {"llama-bpe qwen2 bailingmoe qwen35 tekken deepseek-v3 gpt-2 refact seed-coder "
         "exaone-moe",
         "a|'s|'t|'re|'ve|'m|'ll|'d"},
        {"gpt-4o kimi-k2", "a's|'t're|'ve'm|'ll'd"},
        {"deepseek-llm deepseek-coder default", "a|'|s|'|t|'|re|'|ve|'|m|'|ll|'|d"},
        {"llama-bpe qwen2 bailingmoe qwen35 tekken deepseek-v3 seed-coder exaone-moe",
         "A|'S|'T|'RE|'VE|'M|'LL|'D"},
        {"gpt-4o kimi-k2", "A'S|'T'RE|'VE'M|'LL'D"},
        {"deepseek-llm deepseek-coder gpt-2 refact default", "A|'|S|'|T|'|RE|'|VE|'|M|'|LL|'|D"},
        {"llama-bpe qwen2 bailingmoe qwen35 gpt-4o tekken kimi-k2 deepseek-v3 seed-coder "
         "exaone-moe",
         "'l| '|v| '|r| '|x"},
        {"deepseek-llm deepseek-coder gpt-2 refact", "'|l| '|v| '|r| '|x"},
        {"default", "'|l| |'|v| |'|r| |'|x"},
        // afmoe: the first group of numbers takes what is in front of it.
        {"afmoe", "x| | |1|234|567| |89"},
        {"afmoe", "12|345|a"},
        // The names of 2026, by Python's regex module, whose classes are Unicode's own.
        {"laguna", "a|\n\n| | b| |\n| c"},
        {"cohere2moe hy_v4 talkie minicpm5 ufakzeka granite-embed-multi-97m youtu jais-2",
         "a|\n\n| | b| \n| c"},
        {"spark2_5", "a|\n|\n| | b| \n| c"},
        {"falcon bloom viking mellum2", "a|\n\n | b| \n| c"},
        {"superbpe", "a\n\n  b \n c"},
        {"gemma4 sarvam-moe", "a|\n\n|  b |\n| c"},
        {"laguna spark2_5", "It|'s|\r|\n|1|2|3|4|5|6|7| DON|'T"},
        {"cohere2moe", "It's|\r\n|1|234|567| DON'T"},
        {"hy_v4 minicpm5 jais-2", "It|'s|\r\n|123|456|7| DON|'T"},
        {"talkie granite-embed-multi-97m", "It's|\r\n|123|456|7| DON'T"},
        {"ufakzeka", "It|'s|\r\n|1|2|3|4|5|6|7| DON|'T"},
        {"youtu viking", "It's|\r\n|1|2|3|4|5|6|7| DON'T"},
        {"falcon", "It|'|s|\r|\n|123|456|7| DON|'|T"},
        {"superbpe", "It's\r\n|1|234|567| DON'T"},
        {"bloom", "It's|\r\n|1234567| DON'T"},
        {"gemma4 sarvam-moe", "It's\r|\n|1234567 DON'T"},
        {"mellum2", "It|'s|\r\n|1|2|3|4|5|6|7| DON|'|T"},
        {"laguna ufakzeka youtu viking", "x| | |1|2|3|4|5| ab|6|7|8|9"},
        {"cohere2moe", "x| | |12|345| ab|6|789"},
        {"hy_v4 minicpm5", "x|  |123|45| ab|678|9"},
        {"talkie granite-embed-multi-97m falcon jais-2", "x| | |123|45| ab|678|9"},
        {"spark2_5 mellum2", "x|  |1|2|3|4|5| ab|6|7|8|9"},
        {"superbpe", "x  |12|345| ab|6|789"},
        {"bloom", "x| | 12345| ab6789"},
        {"gemma4 sarvam-moe", "x  12345 ab6789"},
        {"laguna minicpm5 ufakzeka jais-2", "fooBar| e|\314\201X"},
        {"cohere2moe talkie granite-embed-multi-97m youtu", "foo|Bar| e\314\201|X"},
        {"hy_v4 spark2_5 bloom viking", "fooBar| e\314\201X"},
        {"falcon mellum2", "fooBar| e|\314\201|X"},
        {"superbpe gemma4 sarvam-moe", "fooBar e\314\201X"},
        {"laguna ufakzeka spark2_5 youtu viking mellum2", "\302\275|1|2|3|4"},
        {"cohere2moe superbpe", "\302\2751|234"},
        {"hy_v4 talkie minicpm5 granite-embed-multi-97m jais-2", "\302\27512|34"},
        {"falcon", "\302\275|123|4"},
        {"bloom gemma4 sarvam-moe", "\302\2751234"},
        {"laguna cohere2moe hy_v4 talkie minicpm5 ufakzeka spark2_5 granite-embed-multi-97m "
         "youtu jais-2",
         "a|`b|$c|.d"},
        {"falcon mellum2", "a|`|b|$|c|.|d"},
        {"superbpe gemma4 sarvam-moe", "a`b$c.d"},
        {"bloom viking", "a`b$c|.|d"},
        {"laguna ufakzeka spark2_5 youtu viking mellum2", "3|0|0|0|1|2|3|,|4|5|6"},
        {"cohere2moe superbpe", "3|000|123|,|456"},
        {"hy_v4 talkie minicpm5 granite-embed-multi-97m falcon jais-2", "300|012|3|,|456"},
        {"bloom", "3000123|,|456"},
        {"gemma4 sarvam-moe", "3000123,456"},
        {"laguna cohere2moe hy_v4 talkie minicpm5 ufakzeka spark2_5 granite-embed-multi-97m "
         "youtu bloom viking jais-2 mellum2",
         "ab|,| cd|...|ef| (|g|)।|h"},
        {"falcon", "ab|,| cd|...|ef| |(|g|)।|h"},
        {"superbpe gemma4 sarvam-moe", "ab, cd...ef (g)।h"},
        {"laguna cohere2moe hy_v4 talkie minicpm5 ufakzeka spark2_5 granite-embed-multi-97m "
         "youtu falcon bloom viking jais-2 mellum2",
         "a|    | b"},
        {"superbpe gemma4 sarvam-moe", "a     b"},
        {"laguna cohere2moe hy_v4 talkie minicpm5 ufakzeka spark2_5 granite-embed-multi-97m "
         "youtu gemma4 sarvam-moe",
         "a|\n|     "},
        {"falcon bloom viking mellum2", "a|\n     "},
        {"superbpe", "a\n     "},
        {"jais-2", "a|\n|    | "},
        {"laguna cohere2moe talkie minicpm5 ufakzeka granite-embed-multi-97m falcon jais-2 "
         "mellum2",
         "中文ㄅㄆ한글|，。「|x|」"},
        {"hy_v4 spark2_5", "中文|ㄅㄆ한글|，。「|x|」"},
        {"youtu", "中文|ㄅㄆ|한글|，。「|x|」"},
        {"superbpe gemma4 sarvam-moe", "中文ㄅㄆ한글，。「x」"},
        {"bloom viking", "中文ㄅㄆ한글|，。|「x」"},
        {"laguna cohere2moe hy_v4 talkie minicpm5 ufakzeka spark2_5 granite-embed-multi-97m "
         "youtu falcon jais-2 mellum2",
         "http|://|x|\n|//|y"},
        {"superbpe", "http://x\n//y"},
        {"bloom viking gemma4 sarvam-moe", "http://x|\n|//y"},
        {"laguna cohere2moe hy_v4 talkie minicpm5 ufakzeka spark2_5 granite-embed-multi-97m "
         "youtu jais-2",
         " '|tis|\343\200\200|\302\240b"},
        {"falcon", " |'|tis|\343\200\200|\302\240|b"},
        {"superbpe gemma4 sarvam-moe", " 'tis\343\200\200\302\240b"},
        {"bloom viking", " 'tis|\343\200\200\302\240|b"},
        {"mellum2", " '|tis|\343\200\200|\302\240|b"},
        {"laguna ufakzeka spark2_5 youtu viking mellum2",
         "\331\243|\331\244|\331\245|\331\246| |7|8|9"},
        {"cohere2moe", "\331\243|\331\244\331\245\331\246| |789"},
        {"hy_v4 talkie minicpm5 granite-embed-multi-97m jais-2",
         "\331\243\331\244\331\245|\331\246| |789"},
        {"falcon superbpe", "\331\243\331\244\331\245\331\246| |789"},
        {"bloom", "\331\243\331\244\331\245\331\246| 789"},
        {"gemma4 sarvam-moe", "\331\243\331\244\331\245\331\246 789"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[128];
        size_t size = 0;
        for (const char *p = cases[i][1]; *p; p++)
            if (*p != '|') text[size++] = *p;
        const char *name = cases[i][0][0] == '*' ? names : cases[i][0];
        for (size_t length; *name; name += length + (name[length] == ' ')) {
            length = strcspn(name, " ");
            const moe__text_pre *pre = moe__text_find_pre(name, length);
            CHECKF(pre, "%.*s", (int)length, name);
            if (!pre) continue;
            moe__text_scan scan = cut_text(pre, text, size);
            char joined[256];
            size_t n = 0;
            for (size_t k = 0; k < scan.n; k++) {
                if (k && scan.classes[k] & MOE__C_CUT) joined[n++] = '|';
                memcpy(joined + n, text + scan.at[k], scan.at[k + 1] - scan.at[k]);
                n += scan.at[k + 1] - scan.at[k];
            }
            joined[n] = 0;
            CHECKF(strcmp(joined, cases[i][1]) == 0, "%.*s: \"%s\", not \"%s\"", (int)length,
                   name, joined, cases[i][1]);
            free(scan.classes);
            free(scan.at);
        }
    }
}

TEST(only_known_names_of_pre_tokenizers_are_found) {
    static const char *const known[] = {
        "llama3", "llama-v3", "llama-bpe", "laguna", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
        "lfm2", "jina-v5-nano", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe", "qwen2",
        "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo",
        "openpangu", "f2llmv2", "bailingmoe", "bailingmoe2", "llada-moe", "qwen35", "gpt-4o",
        "llama4", "kanana2", "minimax-m2", "tekken", "kimi-k2", "deepseek-v3", "hunyuan-dense",
        "joyai-llm", "deepseek-llm", "deepseek-coder", "gpt-2", "olmo", "starcoder", "refact",
        "command-r", "smollm", "seed-coder", "afmoe", "exaone-moe", "default", "cohere2moe",
        "cohere2_moe", "tiny_aya", "hy_v4", "talkie", "minicpm5", "ufakzeka", "spark2_5", "youtu",
        "sarvam-moe", "granite-embed-multi-97m", "granite-embed-multi-311m", "gemma4", "mellum",
        "mellum2", "roberta-bpe", "falcon", "superbpe", "poro-chat", "bloom", "gpt3-finnish",
        "viking", "jais-2", "jais", "trillion", "granite-docling", "exaone", "exaone4", "codeshell",
        "minerva-7b", "phi-2", "mpt", "gigachat", "a.x-4.0", "modern-bert", "jina-v2-code"};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        CHECKF(moe__text_find_pre(known[i], strlen(known[i])), "%s", known[i]);
    static const char *const unknown[] = {"", " ", "llama", "qwen", "llama3 llama-v3", "qwen2 ",
                                          "gpt-4", "Qwen2", "deepseek", "gemma", "cohere2",
                                          "chameleon", "whitespace", "minimax-m4"};
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++)
        CHECKF(!moe__text_find_pre(unknown[i], strlen(unknown[i])), "%s", unknown[i]);
}

// Steps of a pre-tokenizer for n repeated bytes; checks that it makes nothing but cuts.
static uint64_t steps_of_passes(const moe__text_pre *pre, const char *unit, size_t n) {
    static const moe__text_pre none = {"", 0, {NULL}};
    char *text = (char *)malloc(n + 1);
    for (size_t i = 0; i < n; i++) text[i] = unit[i % strlen(unit)];
    text[n] = 'x'; // something else, so that the run does not simply end with the text
    moe__text_scan scan = cut_text(&none, text, n + 1);
    uint32_t *classes = (uint32_t *)malloc(4 * scan.n);
    memcpy(classes, scan.classes, 4 * scan.n);
    uint64_t start = steps_now();
    for (int i = 0; i < MOE__PRE_PASSES && pre->passes[i]; i++)
        moe__text_pass(&scan, pre->passes[i]);
    start = steps_now() - start;
    for (size_t i = 0; i < scan.n; i++)
        if ((scan.classes[i] ^ classes[i]) & ~(uint32_t)MOE__C_CUT) CHECK(0);
    free(scan.classes);
    free(scan.at);
    free(classes);
    free(text);
    return start;
}

// No rule may look at a long run again and again.
TEST(no_rule_looks_at_a_long_run_again_and_again) {
    static const char *const units[] = {"a", "A", " ", "7", "\n", ".", "'", "\314\201",
                                        "\344\270\255", " \n", "a ", "Aa", "\302\240", "\t", "$",
                                        "\344\270\255A", "\177"};
    enum { N = 24000 };
    for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
        for (size_t p = 0; p < sizeof moe__text_pres / sizeof moe__text_pres[0]; p++) {
            const moe__text_pre *pre = &moe__text_pres[p];
            CHECK_GROWTH(steps_of_passes(pre, units[u], N), steps_of_passes(pre, units[u], N / 8),
                         N_LOG_N, pre->names, (int)u);
        }
    }
}

// ---- the built-in vocabulary -----------------------------------------------------------------

TEST(a_small_vocabulary_merges_by_rank) {
    moe_vocab *vocab = open_small("qwen2");
    if (!vocab) return;
    CHECK(moe_vocab_size(vocab) == 256 + 21 + 5);
    CHECK(one_id(vocab, "hello") == 259 && one_id(vocab, "nothing") == -1);
    CHECK(strcmp(texts_of(vocab, "hello world", 0), "hello|\304\240wor|ld") == 0);
    CHECK(strcmp(texts_of(vocab, "aaaaaaaaaaaaaaa", 0), "aaaaaaaa|aaaa|aa|a") == 0);
    CHECK(strcmp(texts_of(vocab, "1234", 0), "1|2|3|4") == 0); // words are never joined
    CHECK(strcmp(texts_of(vocab, "th\303\251 ing", 0), "th|\303\203\302\251|\304\240|ing") == 0);
    CHECK(strcmp(texts_of(vocab, "the", 0), "t|he") == 0); // "h e" ranks before "t h"
    CHECK(strcmp(texts_of(vocab, "\n\n\n", 0), "\304\212\304\212|\304\212") == 0);
    CHECK(strcmp(ids_of(vocab, "", 3), "") == 0);
    CHECK(moe_vocab_tokenize(vocab, NULL, 0, 0, NULL, 0) == 0);
    moe_vocab_close(vocab);
    vocab = open_small("gpt-2");
    CHECK(strcmp(texts_of(vocab, "1234", 0), "123|4") == 0);
    moe_vocab_close(vocab);
    moe_vocab_close(NULL);
}

TEST(no_more_is_written_than_there_is_room_for) {
    moe_vocab *vocab = open_small("qwen2");
    if (!vocab) return;
    const char *text = "hello world <|im_start|> hello";
    int32_t all[64], some[64];
    int64_t n = moe_vocab_tokenize(vocab, text, strlen(text), 3, all, 64);
    CHECK(n > 5 && n < 64);
    for (int64_t c = 0; c <= n; c++) {
        for (int i = 0; i < 64; i++) some[i] = -7;
        CHECK(moe_vocab_tokenize(vocab, text, strlen(text), 3, some, (size_t)c) == n);
        CHECK(memcmp(some, all, 4 * (size_t)c) == 0 && some[c] == -7);
    }
    CHECK(moe_vocab_tokenize(vocab, text, strlen(text), 3, NULL, 0) == n);
    char buffer[8];
    memset(buffer, '#', sizeof buffer);
    CHECK(moe_vocab_text(vocab, one_id(vocab, "hello"), buffer, 3) == 5);
    CHECK(memcmp(buffer, "hel#####", 8) == 0);
    CHECK(moe_vocab_text(vocab, one_id(vocab, "hello"), NULL, 0) == 5);
    moe_vocab_close(vocab);
}

TEST(wrong_arguments_are_refused) {
    moe_vocab *vocab = open_small("qwen2");
    int32_t ids[4];
    const int64_t wrong = -(int64_t)MOE_ERROR_ARGUMENT;
    CHECK(moe_vocab_tokenize(NULL, "a", 1, 0, ids, 4) == wrong);
    CHECK(moe_vocab_tokenize(vocab, NULL, 1, 0, ids, 4) == wrong);
    CHECK(moe_vocab_tokenize(vocab, "a", 1, 0, NULL, 4) == wrong);
    CHECK(moe_vocab_tokenize(vocab, "a", 1, 4, ids, 4) == wrong);
    CHECK(moe_vocab_tokenize(vocab, "a", (size_t)INT32_MAX + 1, 0, ids, 4) == wrong);
    CHECK(moe_vocab_find(vocab, NULL, 3) == -1 && moe_vocab_find(vocab, "", 0) == -1);
    CHECK(moe_vocab_size(NULL) == 0 && moe_vocab_bos(NULL) == -1 && moe_vocab_eos(NULL) == -1);
    CHECK(moe_vocab_find(NULL, "a", 1) == -1 && !moe_vocab_token(NULL, 0).data);
    CHECK(!moe_vocab_is_end(NULL, 0) && !moe_vocab_is_control(NULL, 0));
    CHECK(moe_vocab_text(NULL, 0, NULL, 0) == 0 && moe_vocab_text(vocab, 0, NULL, 4) == 0);
    int32_t outside[] = {-1, INT32_MIN, INT32_MAX, moe_vocab_size(vocab)};
    for (int i = 0; i < 4; i++) {
        char buffer[8];
        CHECK(moe_vocab_text(vocab, outside[i], buffer, 8) == 0);
        CHECK(moe_vocab_token(vocab, outside[i]).data == NULL);
        CHECK(!moe_vocab_is_end(vocab, outside[i]) && !moe_vocab_is_control(vocab, outside[i]));
    }
    moe_vocab_close(vocab);
    moe_error error;
    CHECK(moe_vocab_open(NULL, &error) == NULL && error.status == MOE_ERROR_ARGUMENT);
    CHECK(moe_vocab_open(NULL, NULL) == NULL);
}

TEST(special_tokens_are_found_only_if_asked_for) {
    moe_vocab *vocab = open_small("qwen2");
    if (!vocab) return;
    int32_t start = one_id(vocab, "<|im_start|>"), user = one_id(vocab, "<user>");
    const char *text = "a<|im_start|>b<user><unk><|im_end";
    int32_t ids[64];
    int64_t n = moe_vocab_tokenize(vocab, text, strlen(text), MOE_TOKENIZE_PARSE_SPECIAL, ids, 64);
    CHECK(n > 6 && ids[0] == 'a' && ids[1] == start && ids[2] == 'b' && ids[3] == user);
    CHECK(ids[4] == one_id(vocab, "<unk>") && ids[5] == '<' && ids[6] == '|');
    // Without the flag only what is user-defined is recognised.
    n = moe_vocab_tokenize(vocab, text, strlen(text), 0, ids, 64);
    int users = 0;
    for (int64_t i = 0; i < n; i++) {
        CHECK(ids[i] != start && ids[i] != one_id(vocab, "<unk>"));
        users += ids[i] == user;
    }
    CHECK(users == 1);
    // Text around special tokens is cut as if it stood alone: no blank joins the next word.
    CHECK(strcmp(texts_of(vocab, "in <user>in", 0), "in|\304\240|<user>|in") == 0);
    CHECK(moe_vocab_is_control(vocab, start) && !moe_vocab_is_control(vocab, user));
    moe_vocab_close(vocab);
    // A control token that looks like a word is not found as one, even where whole words are.
    spec_bytes(&shared_spec, "llama-bpe");
    int32_t word_id = add_token(&shared_spec, "ab", 1), control = add_token(&shared_spec, "cd", 3);
    vocab = open_spec(&shared_spec);
    CHECK(moe_vocab_tokenize(vocab, "ab", 2, 0, ids, 64) == 1 && ids[0] == word_id);
    CHECK(moe_vocab_tokenize(vocab, "cd", 2, 0, ids, 64) == 2 && ids[0] == 'c');
    CHECK(moe_vocab_tokenize(vocab, "cd", 2, 2, ids, 64) == 1 && ids[0] == control);
    moe_vocab_close(vocab);
}

// The definition: for one size of special tokens after the other, longest first, search every
// raw part from left to right.
static size_t naive_split(const spec *s, const char *text, size_t size, unsigned flags,
                          int32_t *ids) {
    int32_t *owner = (int32_t *)malloc(4 * (size + 1)); // -1 raw, id where it begins, then -2
    for (size_t i = 0; i < size; i++) owner[i] = -1;
    for (size_t length = 8; length; length--) {
        for (size_t i = 0; i + length <= size; i++) {
            for (int id = 256; id < s->n_tokens; id++) {
                const word *w = &s->tokens[id];
                size_t k = 0;
                int later = 0;
                if (w->size != length || s->types[id] < 2 || s->types[id] > 4) continue;
                for (int l = id + 1; l < s->n_tokens; l++) later |= same_word(s->tokens[l], *w);
                if (later || (!(flags & MOE_TOKENIZE_PARSE_SPECIAL) && s->types[id] != 4)) continue;
                while (k < length && owner[i + k] == -1 && text[i + k] == w->text[k]) k++;
                if (k < length) continue;
                for (k = 0; k < length; k++) owner[i + k] = k ? -2 : id;
            }
        }
    }
    size_t n = 0;
    for (size_t i = 0; i < size; i++) {
        if (owner[i] >= 0) ids[n++] = owner[i];
        if (owner[i] != -1) continue;
        ids[n] = (unsigned char)text[i]; // no merges: bytes, unless a later token has that text
        for (int id = 256; id < s->n_tokens; id++)
            if (s->tokens[id].size == 1 && s->tokens[id].text[0] == text[i]) ids[n] = id;
        n++;
    }
    free(owner);
    return n;
}

TEST(overlapping_special_tokens_follow_the_definition) {
    for (int round = 0; round < 400; round++) {
        random_state = (uint64_t)round + 1;
        spec *s = &shared_spec;
        spec_bytes(s, "qwen2");
        int count = 1 + (int)random_below(12);
        for (int i = 0; i < count; i++) {
            char text[8] = {0};
            size_t size = 1 + random_below(6);
            for (size_t k = 0; k < size; k++) text[k] = (char)('a' + random_below(2));
            add_token(s, text, 2 + (int32_t)random_below(3));
        }
        moe_vocab *vocab = open_spec(s);
        if (!vocab) return;
        for (int t = 0; t < 30; t++) {
            char text[40];
            int32_t want[64], got[64];
            size_t size = random_below(40);
            for (size_t k = 0; k < size; k++)
                text[k] = random_below(12) ? (char)('a' + random_below(2)) : '.';
            unsigned flags = random_below(2) ? MOE_TOKENIZE_PARSE_SPECIAL : 0;
            size_t n = naive_split(s, text, size, flags, want);
            int64_t m = moe_vocab_tokenize(vocab, text, size, flags, got, 64);
            CHECKF(m == (int64_t)n && memcmp(want, got, 4 * n) == 0, "round %d, \"%.*s\"", round,
                   (int)size, text);
        }
        moe_vocab_close(vocab);
    }
}

// Steps of tokenizing n repeated bytes; checks the number of tokens unless it is < 0.
static uint64_t steps_of_text(const moe_vocab *vocab, const char *unit, size_t n, unsigned flags,
                              int64_t count) {
    char *text = (char *)malloc(n);
    for (size_t i = 0; i < n; i++) text[i] = unit[i % strlen(unit)];
    uint64_t start = steps_now();
    int64_t found = moe_vocab_tokenize(vocab, text, n, flags, NULL, 0);
    start = steps_now() - start;
    CHECK(found == count || (count < 0 && found > 0));
    free(text);
    return start;
}

// Special tokens that are suffixes of each other, in a text that is made of nothing else.
TEST(many_special_tokens_take_n_log_n) {
    spec *s = &shared_spec;
    spec_bytes(s, "qwen2");
    for (int i = 1; i <= 60; i++) {
        char text[64];
        memset(text, 'a', sizeof text);
        text[i] = 0;
        add_token(s, text, i == 7 ? 4 : 3);
    }
    moe_vocab *vocab = open_spec(s);
    if (!vocab) return;
    enum { N = 240000 };
    const unsigned special = MOE_TOKENIZE_PARSE_SPECIAL;
    CHECK_GROWTH(steps_of_text(vocab, "a", N, special, N / 60),
                 steps_of_text(vocab, "a", N / 8, special, N / 480), N_LOG_N, "special", 0);
    CHECK_GROWTH(steps_of_text(vocab, "a", N, 0, N / 7 + N % 7),
                 steps_of_text(vocab, "a", N / 8, 0, N / 8 / 7 + N / 8 % 7), N_LOG_N, "user", 0);
    moe_vocab_close(vocab);
}

// ---- merging ---------------------------------------------------------------------------------

static int find_last(const spec *s, word w) {
    for (int id = s->n_tokens - 1; id >= 0; id--)
        if (w.size && same_word(s->tokens[id], w)) return id;
    return -1;
}
static word join_words(word a, word b) {
    word c = a;
    memcpy(c.text + c.size, b.text, b.size);
    c.size += b.size;
    return c;
}
static int naive_rank(const spec *s, word a, word b) {
    word pair = join_words(join_words(a, make_word(" ", 1)), b);
    for (int r = 0; r < s->n_merges; r++)
        if (same_word(s->merges[r], pair)) return r;
    return INT32_MAX;
}

// The definition, on texts. The word is at most 20 bytes.
static int64_t naive_merge(const spec *s, const char *text, size_t size, int whole, int32_t *ids) {
    word symbols[24], all = make_word("", 0);
    size_t n = size;
    int64_t count = 0;
    for (size_t i = 0; i < size; i++) {
        char name[2];
        symbols[i] = make_word(name, moe__text_byte_name((unsigned char)text[i], name));
        all = join_words(all, symbols[i]);
    }
    if (whole && find_last(s, all) >= 0) {
        ids[0] = find_last(s, all);
        return 1;
    }
    for (;;) {
        int best = INT32_MAX;
        size_t where = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            int rank = naive_rank(s, symbols[i], symbols[i + 1]);
            if (rank < best) {
                best = rank;
                where = i;
            }
        }
        if (best == INT32_MAX) break;
        symbols[where] = join_words(symbols[where], symbols[where + 1]);
        memmove(symbols + where + 1, symbols + where + 2, (n - where - 2) * sizeof symbols[0]);
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        int id = find_last(s, symbols[i]);
        if (id >= 0) {
            ids[count++] = id;
            continue;
        }
        for (size_t k = 0; k < symbols[i].size; k++) {
            id = find_last(s, make_word(symbols[i].text + k, 1));
            if (id >= 0) ids[count++] = id;
        }
    }
    return count;
}

// Random merges over few letters; many results, and some letters, are no tokens.
static void random_merges(spec *s) {
    static const char *const letters[] = {"a", "b", "\303\203", "\302\251"}; // a, b, e acute
    word pool[64];
    int n_pool = 4;
    memset(s, 0, sizeof *s);
    for (int i = 0; i < 4; i++) {
        pool[i] = make_word(letters[i], strlen(letters[i]));
        if (random_below(5)) add_token(s, letters[i], 1);
    }
    if (random_below(2)) add_token(s, "\303", 1); // a byte, not UTF-8
    if (random_below(2)) add_token(s, "\203", 1);
    for (int i = 0; i < 24; i++) {
        word a = pool[random_below((uint32_t)n_pool)], b = pool[random_below((uint32_t)n_pool)];
        if (a.size + b.size > 12) continue;
        word blank = make_word(" ", 1), both = join_words(a, b);
        s->merges[s->n_merges++] = join_words(join_words(a, blank), b);
        pool[n_pool++] = both;
        if (random_below(3)) {
            s->types[s->n_tokens] = 1;
            s->tokens[s->n_tokens++] = both;
        }
    }
    add_token(s, "zz", 1);
}

TEST(merging_follows_the_definition) {
    for (int round = 0; round < 600; round++) {
        random_state = (uint64_t)round + 77;
        spec *s = &shared_spec;
        random_merges(s);
        int whole = (int)random_below(2);
        s->pre = whole ? "llama-bpe" : "qwen2";
        moe_vocab *vocab = open_spec(s);
        if (!vocab) return;
        for (int t = 0; t < 20; t++) {
            char text[24];
            int32_t want[64], got[64];
            size_t size = 0;
            for (uint32_t left = random_below(10); left; left--) {
                const char *bit = random_below(3) == 0 ? "\303\251" : random_below(2) ? "a" : "b";
                memcpy(text + size, bit, strlen(bit));
                size += strlen(bit);
            }
            int64_t n = size ? naive_merge(s, text, size, whole, want) : 0;
            int64_t m = moe_vocab_tokenize(vocab, text, size, 0, got, 64);
            CHECKF(m == n && memcmp(want, got, 4 * (size_t)n) == 0, "round %d, \"%.*s\"", round,
                   (int)size, text);
        }
        moe_vocab_close(vocab);
    }
}

// Long words: merging takes n log n. Longer and longer ones, so that a fault shows early.
TEST(long_words_take_n_log_n) {
    static const char *const units[] = {"a", " ", "1", "\n", "th", "\303\251", "a\314\201", "<",
                                        "\377", "hello", " \n", "<|im_start|>", "<|im_start|"};
    static const char *const pres[] = {"gpt-2", "deepseek-llm", "llama-bpe", "qwen2"};
    enum { SMALL = 1 << 13, MIDDLE = 1 << 16, LARGE = 1 << 20 };
    char *text = (char *)malloc(MIDDLE);
    for (size_t p = 0; p < 4; p++) {
        moe_vocab *vocab = open_small(pres[p]);
        for (size_t u = 0; vocab && u < sizeof units / sizeof units[0]; u++) {
            CHECK_GROWTH(steps_of_text(vocab, units[u], MIDDLE, 0, -1),
                         steps_of_text(vocab, units[u], SMALL, 0, -1), N_LOG_N, pres[p], (int)u);
            if (test_failures) break;
            for (size_t i = 0; i < MIDDLE; i++) text[i] = units[u][i % strlen(units[u])];
            CHECKF(round_trip(vocab, text, MIDDLE, 0), "%s, unit %d", pres[p], (int)u);
            if (p || u > 3) continue; // a megabyte of letters, blanks, digits, newlines
            CHECK_GROWTH(steps_of_text(vocab, units[u], LARGE, 0, -1),
                         steps_of_text(vocab, units[u], LARGE / 8, 0, -1), N_LOG_N, "unit", (int)u);
        }
        moe_vocab_close(vocab);
    }
    free(text);
}

TEST(tokens_give_back_the_text_they_came_from) {
    static const char *const pres[] = {"qwen2", "llama-bpe", "deepseek-v3", "deepseek-llm",
                                       "deepseek-coder", "gpt-4o", "default", "afmoe"};
    for (size_t p = 0; p < sizeof pres / sizeof pres[0]; p++) {
        moe_vocab *vocab = open_small(pres[p]);
        if (!vocab) return;
        random_state = p;
        for (int i = 0; i < 500; i++) {
            char text[600];
            size_t size = random_text(text, sizeof text);
            CHECK(round_trip(vocab, text, size, 0));
            size = random_below(40);
            for (size_t k = 0; k < size; k++) text[k] = (char)random_below(256);
            CHECK(round_trip(vocab, text, size, 0));
        }
        char every[256];
        for (int b = 0; b < 256; b++) every[b] = (char)b;
        CHECK(round_trip(vocab, every, 256, 0));
        moe_vocab_close(vocab);
    }
}

static void check_refused(bytes file, moe_status status, const char *where, const char *text);

// ---- SPM -------------------------------------------------------------------------------------

// The spec's tokens with these scores (NULL: none) as a SPM file.
static bytes spm_file(const spec *s, const float *scores) {
    bytes out = file_begin();
    put_string(&out, "tokenizer.ggml.model", "llama");
    put_array(&out, "tokenizer.ggml.tokens", MOE_VALUE_STRING, (uint64_t)s->n_tokens);
    for (int i = 0; i < s->n_tokens; i++) put_text(&out, s->tokens[i].text, s->tokens[i].size);
    put_array(&out, "tokenizer.ggml.token_type", MOE_VALUE_INT32, (uint64_t)s->n_tokens);
    put(&out, s->types, 4 * (size_t)s->n_tokens);
    if (!scores) return out;
    put_array(&out, "tokenizer.ggml.scores", MOE_VALUE_FLOAT32, (uint64_t)s->n_tokens);
    put(&out, scores, 4 * (size_t)s->n_tokens);
    return out;
}
// <unk> <s> </s>, bytes 3 to 258 if wanted, then U+2581 and letters.
static void spm_spec(spec *s, int with_bytes) {
    static const char *const letters[] = {"\342\226\201", "a", "b", "c"};
    memset(s, 0, sizeof *s);
    add_token(s, "<unk>", 2);
    add_token(s, "<s>", 3);
    add_token(s, "</s>", 3);
    for (int b = 0; with_bytes && b < 256; b++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", b);
        add_token(s, name, 6);
    }
    for (int i = 0; i < 4; i++) add_token(s, letters[i], 1);
}

// The definition, on texts of at most 30 characters.
static int64_t naive_spm(const spec *s, const float *scores, const char *text, int32_t *ids) {
    word symbols[40];
    size_t n = 1;
    int64_t count = 0;
    symbols[0] = make_word("\342\226\201", 3);
    for (const char *p = text; *p; p++)
        symbols[n++] = *p == ' ' ? symbols[0] : make_word(p, (unsigned char)*p >= 0xC0 ? 2 : 1);
    for (size_t i = 1; i < n; i++) // no second byte of a character
        if ((symbols[i].text[0] & 0xC0) == 0x80)
            memmove(symbols + i, symbols + i + 1, (--n - i) * sizeof symbols[0]);
    for (;;) {
        size_t where = SIZE_MAX;
        float best = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            int id = find_last(s, join_words(symbols[i], symbols[i + 1]));
            if (id < 0 || s->types[id] != 1) continue;
            float score = !scores ? 0 : scores[id] == scores[id] ? scores[id] : -INFINITY;
            if (where != SIZE_MAX && score <= best) continue;
            where = i;
            best = score;
        }
        if (where == SIZE_MAX) break;
        symbols[where] = join_words(symbols[where], symbols[where + 1]);
        memmove(symbols + where + 1, symbols + where + 2, (n - where - 2) * sizeof symbols[0]);
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        int id = find_last(s, symbols[i]);
        if (id >= 0 && s->types[id] == 1) ids[count++] = id;
        else for (size_t k = 0; k < symbols[i].size; k++) {
            char name[8];
            snprintf(name, sizeof name, "<0x%02X>", (unsigned char)symbols[i].text[k]);
            id = find_last(s, make_word(name, 6));
            if (id < 0) id = find_last(s, make_word(symbols[i].text + k, 1));
            ids[count++] = id < 0 ? 0 : id;
        }
    }
    return count;
}

TEST(spm_follows_the_definition) {
    static const char *const bits[] = {" ", "a", "a", "b", "b", "c", "\303\251", "?"};
    static float scores[MAX_TOKENS];
    for (int round = 0; round < 400; round++) {
        random_state = (uint64_t)round + 5;
        spec *s = &shared_spec;
        spm_spec(s, round & 1);
        int first = s->n_tokens - 4;
        for (int i = 0; i < 30; i++) { // also duplicates, control tokens, words of words
            word a = s->tokens[first + (int)random_below((uint32_t)(s->n_tokens - first))];
            word b = s->tokens[first + (int)random_below((uint32_t)(s->n_tokens - first))];
            if (a.size + b.size > 20) continue;
            s->types[s->n_tokens] = random_below(12) ? 1 : 6;
            s->tokens[s->n_tokens++] = join_words(a, b);
        }
        for (int i = 0; i < s->n_tokens; i++)
            scores[i] = random_below(20) == 0   ? (random_below(2) ? NAN : -INFINITY)
                        : random_below(20) == 0 ? (random_below(2) ? -0.0f : INFINITY)
                                                : (float)random_below(12) - 6.0f;
        const float *some = round % 7 ? scores : NULL;
        moe_vocab *vocab = open_bytes(spm_file(s, some), NULL);
        CHECK(vocab);
        if (!vocab) return;
        for (int t = 0; t < 20; t++) {
            char text[64] = {0};
            int32_t want[80], got[80];
            for (uint32_t left = 1 + random_below(20); left; left--)
                strcat(text, bits[random_below(sizeof bits / sizeof bits[0])]);
            int64_t n = naive_spm(s, some, text, want);
            int64_t m = moe_vocab_tokenize(vocab, text, strlen(text), 0, got, 80);
            CHECKF(m == n && memcmp(want, got, 4 * (size_t)n) == 0, "round %d, \"%s\"", round,
                   text);
        }
        moe_vocab_close(vocab);
    }
}

TEST(spm_special_tokens_and_prefixes_are_right) {
    spec *s = &shared_spec;
    spm_spec(s, 1);
    int32_t user = add_token(s, "<u>", 4), joined = add_token(s, "\342\226\201a", 1);
    for (int space = 0; space < 2; space++) {
        bytes file = spm_file(s, NULL);
        put_number(&file, "tokenizer.ggml.add_space_prefix", MOE_VALUE_BOOL, space);
        put_number(&file, "tokenizer.ggml.unknown_token_id", MOE_VALUE_UINT32, 0);
        moe_vocab *vocab = open_bytes(file, NULL);
        CHECK(vocab);
        if (!vocab) return;
        int32_t letter = one_id(vocab, "a"), ids[16];
        CHECK(moe_vocab_bos(vocab) == 1 && moe_vocab_eos(vocab) == 2 && moe_vocab_is_end(vocab, 2));
        CHECK(moe_vocab_tokenize(vocab, "a<u>a</s>", 9, 3, ids, 16) == 5);
        CHECK(ids[0] == 1 && ids[1] == (space ? joined : letter) && ids[2] == user &&
              ids[3] == ids[1] && ids[4] == 2);
        CHECK(moe_vocab_tokenize(vocab, "", 0, 3, ids, 16) == 1 && ids[0] == 1);
        CHECK(moe_vocab_tokenize(vocab, "</s>", 4, 0, ids, 16) == 4 + space); // bytes
        char text[4];
        CHECK(moe_vocab_text(vocab, joined, text, 4) == 2 && memcmp(text, " a", 2) == 0);
        CHECK(moe_vocab_text(vocab, 3 + 0xE4, text, 4) == 1 && text[0] == '\xE4');
        CHECK(moe_vocab_text(vocab, 1, text, 4) == 0 && moe_vocab_text(vocab, user, text, 4) == 3);
        moe_vocab_close(vocab);
    }
}

// Token types that may be spelled, scores that are whole numbers, and bytes that are not there.
TEST(spm_scores_may_be_integers_and_bytes_missing) {
    static const int32_t types[] = {1, 4, 3, 2, 6, 5, 0, 99};
    spec *s = &shared_spec;
    for (int i = 0; i < 8; i++) {
        spm_spec(s, 0);
        int32_t ab = add_token(s, "ab", 1), bc = add_token(s, "bc", types[i]), ids[16];
        bytes file = spm_file(s, NULL);
        put_array(&file, "tokenizer.ggml.scores", MOE_VALUE_INT32, (uint64_t)s->n_tokens);
        for (int32_t id = 0; id < s->n_tokens; id++) put_u32(&file, id == ab ? (uint32_t)-3 : 0);
        put_number(&file, "tokenizer.ggml.unknown_token_id", MOE_VALUE_UINT32, 0);
        moe_vocab *vocab = open_bytes(file, NULL);
        if (!vocab) {
            CHECK(vocab);
            return;
        }
        int64_t n = moe_vocab_tokenize(vocab, "abc", 3, 0, ids, 16);
        const int spelled = types[i] != 2 && types[i] != 3 && types[i] != 6;
        int32_t want = spelled ? one_id(vocab, "a") : ab;
        CHECKF(n == 3 && ids[1] == want && ids[2] == (want == ab ? one_id(vocab, "c") : bc),
               "type %d: %d tokens", (int)types[i], (int)n);
        CHECK(moe_vocab_tokenize(vocab, "a\303\251", 3, 0, ids, 16) == 4 && ids[2] == 0 &&
              ids[3] == 0); // a token for each byte: unknown
        moe_vocab_close(vocab);
    }
}

TEST(bad_spm_vocabularies_are_refused) {
    static const char *const where = "tokenizer.ggml.scores";
    spec *s = &shared_spec;
    spm_spec(s, 0);
    bytes file = spm_file(s, NULL);
    put_array(&file, where, MOE_VALUE_FLOAT32, 2);
    put_u64(&file, 0);
    check_refused(file, MOE_ERROR_FORMAT, where, "2 values for 7");
    file = spm_file(s, NULL);
    put_array(&file, where, MOE_VALUE_FLOAT64, 7);
    for (int i = 0; i < 7; i++) put_u64(&file, 0);
    check_refused(file, MOE_ERROR_FORMAT, where, "float32");
    file = spm_file(s, NULL);
    put_number(&file, where, MOE_VALUE_FLOAT32, 1);
    check_refused(file, MOE_ERROR_FORMAT, where, "array");
    file = spm_file(s, NULL);
    put_string(&file, "tokenizer.ggml.add_space_prefix", "no");
    check_refused(file, MOE_ERROR_FORMAT, "add_space_prefix", "bool");
    file = file_begin();
    put_string(&file, "tokenizer.ggml.model", "llama");
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.tokens", "missing");
}

// A token of each power of two, and all lengths to 60.
TEST(long_spm_texts_take_n_log_n) {
    static const char *const units[] = {"a", " ", "ab", "\303\251", "\377", "a ", "?"};
    spec *s = &shared_spec;
    spm_spec(s, 1);
    char text[64] = {0};
    for (int i = 1; i < 60; i++) {
        text[i - 1] = 'a';
        if (i > 1) add_token(s, text, 1);
    }
    add_token(s, "\342\226\201\342\226\201", 1);
    moe_vocab *vocab = open_bytes(spm_file(s, NULL), NULL);
    for (size_t u = 0; vocab && u < sizeof units / sizeof units[0]; u++)
        CHECK_GROWTH(steps_of_text(vocab, units[u], 1 << 18, 0, -1),
                     steps_of_text(vocab, units[u], 1 << 15, 0, -1), N_LOG_N, "unit", (int)u);
    moe_vocab_close(vocab);
}

// ---- gemma4 ----------------------------------------------------------------------------------

#define LOW "\342\226\201" // U+2581

// <pad> <eos> <bos> <unk> \n \n\n, bytes 6 to 261 (that of B misspelled), words, special tokens.
static void gemma_spec(spec *s) {
    static const char *const words[] = {LOW, "a", "b", "ab", LOW "ab", LOW LOW, "\303\251"};
    static const char *const merges[] = {"a b", LOW " ab", LOW " " LOW, "\303\251 a"};
    memset(s, 0, sizeof *s);
    s->model = "gemma4";
    s->pre = "no-such-pre"; // does not count
    add_token(s, "<pad>", 3);
    add_token(s, "<eos>", 3);
    add_token(s, "<bos>", 3);
    add_token(s, "<unk>", 2);
    add_token(s, "\n", 1);
    add_token(s, "\n\n", 1);
    for (int b = 0; b < 256; b++) {
        char name[8];
        snprintf(name, sizeof name, b == 'B' ? "<0xB>" : "<0x%02X>", b);
        add_token(s, name, 6);
    }
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) add_token(s, words[i], 1);
    for (size_t i = 0; i < sizeof merges / sizeof merges[0]; i++) add_merge(s, merges[i]);
    add_token(s, "<|channel>", 4);
    add_token(s, "<turn|>", 3);
}

TEST(gemma4_merges_characters_by_rank) {
    static const char *const cases[][2] = {
        {"ab", "ab"}, {" ab", LOW "ab"}, {"a b", "a|" LOW "|b"}, {"  ab", LOW "|" LOW "ab"},
        {"   ", LOW LOW "|" LOW}, {"\n", "\n"}, {"\n\n", "\n\n"}, {"\n\n\n", "\n|\n|\n"},
        {"ab\n\nab \n", "ab|\n\n|ab|" LOW "|\n"}, {"\303\251", "\303\251"},
        {"\303\251a", "<0xC3>|<0xA9>|<0x61>"}, // merges to what is no token
        {"C", "<0x43>"}, {"aBb", "a|b"}, // the byte of B is missing
        {"\351ab", "<0xE9>|ab"}, {"ab\303", "ab|<0xC3>"}, // no UTF-8
        {"\344\270\255", "<0xE4>|<0xB8>|<0xAD>"}, {"\t", "<0x09>"}, {"\r\n", "<0x0D>|\n"},
        {LOW "ab", LOW "ab"}, {"a<|channel>b", "a|<|channel>|b"}, {"", ""}};
    gemma_spec(&shared_spec);
    add_number(&shared_spec, "tokenizer.ggml.bos_token_id", MOE_VALUE_UINT32, 2);
    add_number(&shared_spec, "tokenizer.ggml.add_bos_token", MOE_VALUE_BOOL, 0);
    add_number(&shared_spec, "tokenizer.ggml.add_space_prefix", MOE_VALUE_BOOL, 1);
    moe_vocab *vocab = open_spec(&shared_spec);
    if (!vocab) return;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *texts = texts_of(vocab, cases[i][0], 0);
        CHECKF(strcmp(texts, cases[i][1]) == 0, "\"%s\": %s, not %s", cases[i][0], texts,
               cases[i][1]);
    }
    // BOS whatever the file says about adding it; special tokens if asked for.
    CHECK(strcmp(texts_of(vocab, "a<turn|>ab", 3), "<bos>|a|<turn|>|ab") == 0);
    CHECK(strcmp(texts_of(vocab, "", 1), "<bos>") == 0);
    CHECK(strstr(texts_of(vocab, "<turn|>", 0), "<0x3C>|<0x74>") != NULL);
    moe_vocab_close(vocab);
}

TEST(gemma4_gives_back_text_and_knows_its_ends) {
    for (int tools = 0; tools < 2; tools++) {
        gemma_spec(&shared_spec);
        shared_spec.tokens[6 + 'B'] = make_word("<0x42>", 6);
        int32_t s = add_token(&shared_spec, "</s>", 3);
        int32_t tool = add_token(&shared_spec, "<|tool_response>", tools ? 4 : 1);
        if (!tools) shared_spec.tokens[tool] = make_word("<|tool_respons>", 15);
        moe_vocab *vocab = open_spec(&shared_spec);
        if (!vocab) return;
        // No default ids, though token 11 may be a control token elsewhere.
        CHECK(moe_vocab_bos(vocab) == -1 && moe_vocab_eos(vocab) == -1);
        CHECK(moe_vocab_is_end(vocab, 1) && moe_vocab_is_end(vocab, one_id(vocab, "<turn|>")));
        CHECK(!moe_vocab_is_end(vocab, 0) && !moe_vocab_is_end(vocab, 2));
        CHECK((moe_vocab_is_end(vocab, s) != 0) == !tools);
        CHECK((moe_vocab_is_end(vocab, tool) != 0) == tools);
        char text[32];
        CHECK(moe_vocab_text(vocab, s, text, 32) == (tools ? 4u : 0u));
        CHECK(moe_vocab_text(vocab, one_id(vocab, LOW "ab"), text, 32) == 3 &&
              memcmp(text, " ab", 3) == 0);
        CHECK(moe_vocab_text(vocab, 6 + 0xE4, text, 32) == 1 && text[0] == '\344');
        CHECK(moe_vocab_text(vocab, one_id(vocab, "<|channel>"), text, 32) == 10);
        CHECK(moe_vocab_text(vocab, 2, text, 32) == 0 && moe_vocab_text(vocab, 5, text, 32) == 2);
        random_state = 9;
        for (int i = 0; i < 500; i++) {
            char more[600];
            size_t size = random_text(more, sizeof more);
            for (size_t k = 0; k + 3 <= size; k++)
                if (memcmp(more + k, LOW, 3) == 0) more[k] = 'x'; // means a blank, so it is lost
            CHECK(round_trip(vocab, more, size, 0));
            size = random_below(40);
            for (size_t k = 0; k < size; k++) more[k] = (char)random_below(0xE2);
            CHECK(round_trip(vocab, more, size, 0));
        }
        moe_vocab_close(vocab);
    }
    spec_small(&shared_spec, "qwen2"); // the same with such a token 11: only gemma4 has no default
    shared_spec.types[11] = 3;
    shared_spec.model = "gemma4";
    moe_vocab *vocab = open_spec(&shared_spec);
    CHECK(moe_vocab_bos(vocab) == -1 && moe_vocab_eos(vocab) == -1);
    CHECK(!moe_vocab_is_end(vocab, 11));
    moe_vocab_close(vocab);
}

// The definition, on a line of at most 20 characters.
static int64_t naive_gemma(const spec *s, const char *text, int newlines, int32_t *ids) {
    word symbols[24], all = make_word(text, strlen(text));
    size_t n = 0;
    int64_t count = 0;
    if (newlines && text[0] == '\n' && find_last(s, all) >= 0) {
        ids[0] = find_last(s, all);
        return 1;
    }
    for (size_t i = 0, k; text[i]; i += k) {
        k = (unsigned char)text[i] >= 0xE0 ? 3 : (unsigned char)text[i] >= 0xC0 ? 2 : 1;
        symbols[n++] = text[i] == ' ' ? make_word(LOW, 3) : make_word(text + i, k);
    }
    for (;;) {
        int best = INT32_MAX;
        size_t where = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            int rank = naive_rank(s, symbols[i], symbols[i + 1]);
            if (rank >= best) continue;
            best = rank;
            where = i;
        }
        if (best == INT32_MAX) break;
        symbols[where] = join_words(symbols[where], symbols[where + 1]);
        memmove(symbols + where + 1, symbols + where + 2, (n - where - 2) * sizeof symbols[0]);
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        int id = find_last(s, symbols[i]);
        if (id >= 0) ids[count++] = id;
        for (size_t k = 0; id < 0 && k < symbols[i].size; k++) {
            char name[8];
            snprintf(name, sizeof name, "<0x%02X>", (unsigned char)symbols[i].text[k]);
            int byte = find_last(s, make_word(name, 6));
            if (byte >= 0) ids[count++] = byte;
        }
    }
    return count;
}

TEST(gemma4_follows_the_definition) {
    static const char *const bits[] = {LOW, "a", "b", "\303\251", "\344\270\255", "\n"};
    for (int round = 0; round < 400; round++) {
        random_state = (uint64_t)round + 3;
        spec *s = &shared_spec;
        word pool[64];
        int n_pool = 6;
        const int sarvam = (int)random_below(3) == 0;
        memset(s, 0, sizeof *s);
        s->model = sarvam ? "gpt2" : "gemma4";
        s->pre = sarvam ? "sarvam-moe" : NULL;
        for (int i = 0; i < 6; i++) {
            pool[i] = make_word(bits[i], strlen(bits[i]));
            if (random_below(4)) add_token(s, bits[i], 1);
        }
        for (int b = 0; b < 256; b++) {
            char name[8];
            snprintf(name, sizeof name, "<0x%02X>", b);
            if (random_below(8)) add_token(s, name, 6);
        }
        for (int i = 0; i < 30; i++) {
            word a = pool[random_below((uint32_t)n_pool)], b = pool[random_below((uint32_t)n_pool)];
            if (a.size + b.size > 16) continue;
            s->merges[s->n_merges++] = join_words(join_words(a, make_word(" ", 1)), b);
            pool[n_pool] = join_words(a, b);
            if (random_below(3)) {
                s->types[s->n_tokens] = 1;
                s->tokens[s->n_tokens++] = pool[n_pool];
            }
            n_pool++;
        }
        moe_vocab *vocab = open_spec(s);
        if (!vocab) return;
        for (int t = 0; t < 20; t++) {
            char text[80] = {0};
            int32_t want[96], got[96];
            const int newline = (int)random_below(4) == 0; // a line has nothing else, or none
            for (uint32_t left = 1 + random_below(18); left; left--)
                strcat(text, newline ? "\n" : random_below(6) == 0 ? " " : bits[random_below(5)]);
            int64_t n = naive_gemma(s, text, !sarvam, want);
            int64_t m = moe_vocab_tokenize(vocab, text, strlen(text), 0, got, 96);
            CHECKF(m == n && memcmp(want, got, 4 * (size_t)n) == 0, "round %d, \"%s\"", round,
                   text);
        }
        moe_vocab_close(vocab);
    }
}

TEST(long_gemma4_texts_take_n_log_n) {
    static const char *const units[] = {"a", " ", "ab", "\n", "\303\251", "\377", "a ", "?", "a\n",
                                        " ab", "\344\270\255", "<|channel>"};
    gemma_spec(&shared_spec);
    add_merge(&shared_spec, "a a");
    add_merge(&shared_spec, "aa aa");
    add_merge(&shared_spec, LOW LOW " " LOW LOW);
    moe_vocab *vocab = open_spec(&shared_spec);
    for (size_t u = 0; vocab && u < sizeof units / sizeof units[0]; u++)
        CHECK_GROWTH(steps_of_text(vocab, units[u], 1 << 18, 0, -1),
                     steps_of_text(vocab, units[u], 1 << 15, 0, -1), N_LOG_N, "unit", (int)u);
    moe_vocab_close(vocab);
}

// ---- metadata --------------------------------------------------------------------------------

TEST(files_and_defaults_say_what_begins_and_ends_a_text) {
    spec *s = &shared_spec;
    // Keys.
    spec_small(s, "qwen2");
    add_number(s, "tokenizer.ggml.bos_token_id", MOE_VALUE_UINT32, 277);
    add_number(s, "tokenizer.ggml.eos_token_id", MOE_VALUE_UINT32, 97);
    add_number(s, "tokenizer.ggml.eot_token_id", MOE_VALUE_UINT64, 98);
    add_number(s, "tokenizer.ggml.eom_token_id", MOE_VALUE_INT32, 99);
    add_number(s, "tokenizer.ggml.fim_pad_token_id", MOE_VALUE_UINT32, 100);
    add_number(s, "tokenizer.ggml.fim_rep_token_id", MOE_VALUE_UINT32, 101);
    add_number(s, "tokenizer.ggml.fim_sep_token_id", MOE_VALUE_UINT8, 102);
    add_number(s, "tokenizer.ggml.fim_pre_token_id", MOE_VALUE_UINT32, 103);
    add_number(s, "tokenizer.ggml.add_bos_token", MOE_VALUE_BOOL, 1);
    add_number(s, "tokenizer.ggml.add_eos_token", MOE_VALUE_BOOL, 1);
    moe_vocab *vocab = open_spec(s);
    if (!vocab) return;
    CHECK(moe_vocab_bos(vocab) == 277 && moe_vocab_eos(vocab) == 97);
    for (int32_t id = 90; id < 110; id++)
        CHECKF(moe_vocab_is_end(vocab, id) == (id >= 97 && id <= 102), "%d", id);
    CHECK(!moe_vocab_is_control(vocab, 97)); // named by a key only
    CHECK(moe_vocab_is_end(vocab, one_id(vocab, "<|im_end|>")));
    CHECK(!moe_vocab_is_end(vocab, one_id(vocab, "<|im_start|>")));
    CHECK(strcmp(ids_of(vocab, "x", MOE_TOKENIZE_ADD_SPECIAL), "277 120 97") == 0);
    CHECK(strcmp(ids_of(vocab, "", MOE_TOKENIZE_ADD_SPECIAL), "277 97") == 0);
    CHECK(strcmp(ids_of(vocab, "x", 0), "120") == 0);
    moe_vocab_close(vocab);
    // Neither keys nor a control token 11: nothing.
    vocab = open_small("llama-bpe");
    CHECK(moe_vocab_bos(vocab) == -1 && moe_vocab_eos(vocab) == -1);
    CHECK(strcmp(ids_of(vocab, "x", MOE_TOKENIZE_ADD_SPECIAL), "120") == 0);
    moe_vocab_close(vocab);
    // Token 11 is the default, and the pre-tokenizer decides about BOS.
    static const struct {
        const char *pre, *ids;
        int32_t bos;
    } defaults[] = {{"llama-bpe", "11 120", 11}, {"tekken", "11 120", 11}, {"qwen2", "120", 11},
                    {"glm4", "120", -1}};
    for (int i = 0; i < 4; i++) {
        spec_small(s, defaults[i].pre);
        s->types[11] = 3;
        vocab = open_spec(s);
        CHECK(moe_vocab_bos(vocab) == defaults[i].bos && moe_vocab_eos(vocab) == 11);
        CHECK(moe_vocab_is_end(vocab, 11));
        CHECK(strcmp(ids_of(vocab, "x", MOE_TOKENIZE_ADD_SPECIAL), defaults[i].ids) == 0);
        moe_vocab_close(vocab);
    }
    // Ids that are no tokens do not count.
    spec_small(s, "qwen2");
    s->types[11] = 3;
    add_number(s, "tokenizer.ggml.bos_token_id", MOE_VALUE_UINT32, 4000000000u);
    add_number(s, "tokenizer.ggml.eos_token_id", MOE_VALUE_INT32, -1);
    add_number(s, "tokenizer.ggml.eot_token_id", MOE_VALUE_UINT64, -1);
    add_number(s, "tokenizer.ggml.eom_token_id", MOE_VALUE_UINT32, s->n_tokens);
    vocab = open_spec(s);
    CHECK(moe_vocab_bos(vocab) == 11 && moe_vocab_eos(vocab) == 11);
    moe_vocab_close(vocab);
}

// Phi-3's special tokens take the white space behind them, but <s>, <unk> and <|endoftext|>.
TEST(phi_3_strips_behind_most_special_tokens) {
    spec *s = &shared_spec;
    spec_small(s, "qwen2");
    add_token(s, "<|endoftext|>", 3);
    add_token(s, "<s>", 3);
    add_string(s, "general.name", "Phi-3.5 MoE");
    moe_vocab *vocab = open_spec(s);
    if (!vocab) return;
    CHECK(!strcmp(texts_of(vocab, "<|im_start|> \n hello", MOE_TOKENIZE_PARSE_SPECIAL),
                  "<|im_start|>|hello"));
    CHECK(!strcmp(texts_of(vocab, "<user> hello", 0), "<user>|hello"));
    for (int i = 0; i < 3; i++) {
        static const char *const keep[] = {"<s>", "<unk>", "<|endoftext|>"};
        char text[32];
        snprintf(text, sizeof text, "%s hello", keep[i]);
        const char *texts = texts_of(vocab, text, MOE_TOKENIZE_PARSE_SPECIAL);
        CHECKF(!strstr(texts, ">|hello"), "%s", texts);
    }
    moe_vocab_close(vocab);
}

// What separates files where code is completed ends a text, whatever its type in the file.
TEST(tokens_between_files_end_a_text) {
    static const char *const words[] = {"<|file_sep|>", "<|fim_pad|>", "<|repo_name|>", "<PAD>",
                                        "[PAD]",        "<fim_pad>",   "<fim-pad>",     "<REPO>",
                                        "<reponame>",   "<fim-repo>",  "<|fim_repo|>"};
    for (int type = 1; type <= 4; type += 3) {
        spec *s = &shared_spec;
        spec_small(s, "qwen2");
        for (int i = 0; i < 11; i++) add_token(s, words[i], type);
        moe_vocab *vocab = open_spec(s);
        for (int i = 0; i < 11 && vocab; i++) {
            const int32_t id = one_id(vocab, words[i]);
            int32_t tokens[32];
            CHECKF(moe_vocab_is_end(vocab, id) && moe_vocab_is_control(vocab, id), "%s", words[i]);
            // what a user types is not the token
            const int64_t n =
                moe_vocab_tokenize(vocab, words[i], strlen(words[i]), 0, tokens, 32);
            CHECKF(n > 1, "%s: %d tokens", words[i], (int)n);
        }
        moe_vocab_close(vocab);
    }
}

TEST(what_ends_a_text_depends_on_the_other_tokens) {
    spec *s = &shared_spec;
    // Which of these make <|end|> and <|channel|> text.
    static const struct {
        const char *words[3];
        int corrected;
    } sets[] = {{{"<|return|>", "<|call|>", ""}, 1}, {{"<|return|>", "", ""}, 0},
                {{"<|call|>", "", ""}, 0},           {{"<|calls|>", "<|flush|>", ""}, 1},
                {{"<|call|>", "<|flush|>", ""}, 1},  {{"<|calls|>", "<|return|>", ""}, 0},
                {{"<|flush|>", "<|return|>", ""}, 0}, {{"", "", ""}, 0}};
    for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++) {
        spec_small(s, "gpt-4o");
        add_token(s, "<|end|>", 3);
        add_token(s, "<|channel|>", 3);
        for (int k = 0; k < 3; k++)
            if (sets[i].words[k][0]) add_token(s, sets[i].words[k], k ? 3 : 4);
        moe_vocab *vocab = open_spec(s);
        if (!vocab) return;
        char buffer[16];
        int yes = sets[i].corrected;
        int32_t end = one_id(vocab, "<|end|>"), channel = one_id(vocab, "<|channel|>");
        CHECKF(moe_vocab_is_end(vocab, end) == !yes, "set %d", (int)i);
        CHECK(moe_vocab_is_control(vocab, end) == !yes);
        CHECK(moe_vocab_text(vocab, end, buffer, 16) == (yes ? 7u : 0u));
        CHECK(moe_vocab_text(vocab, channel, buffer, 16) == (yes ? 11u : 0u));
        for (int k = 0; k < 3; k++) {
            int32_t id = one_id(vocab, sets[i].words[k]);
            CHECK(id < 0 || (moe_vocab_is_end(vocab, id) && moe_vocab_is_control(vocab, id)));
        }
        moe_vocab_close(vocab);
    }
    for (int with_tools = 0; with_tools < 2; with_tools++) {
        spec_small(s, "qwen2");
        add_token(s, "</s>", 4);
        if (with_tools) add_token(s, "<|tool_response>", 4);
        moe_vocab *vocab = open_spec(s);
        CHECK(moe_vocab_is_end(vocab, one_id(vocab, "</s>")) == !with_tools);
        CHECK(moe_vocab_is_control(vocab, one_id(vocab, "</s>")) == !with_tools);
        char buffer[8]; // with tools it is a word
        CHECK(moe_vocab_text(vocab, one_id(vocab, "</s>"), buffer, 8) == (with_tools ? 4u : 0u));
        moe_vocab_close(vocab);
    }
    spec_small(s, "deepseek-v3");
    int32_t id = add_token(s, "<\357\275\234end\342\226\201of\342\226\201sentence\357\275\234>", 4);
    moe_vocab *vocab = open_spec(s);
    CHECK(moe_vocab_is_end(vocab, id) && moe_vocab_is_control(vocab, id));
    moe_vocab_close(vocab);
}

TEST(the_end_of_a_turn_is_found_by_its_text_or_key) {
    spec *s = &shared_spec;
    spec_small(s, "minimax-m2");
    int32_t end = add_token(s, "[e~[", 3), start = add_token(s, "]~b]", 3);
    moe_vocab *vocab = open_spec(s);
    CHECK(moe_vocab_is_end(vocab, end) && !moe_vocab_is_end(vocab, start));
    moe_vocab_close(vocab);
    // GLM: keys, or without them the tokens with which others speak; elsewhere only keys.
    for (int keys = 0; keys < 4; keys++) {
        for (int glm = 0; glm < 2; glm++) {
            spec_small(s, glm ? "glm4" : "qwen2");
            int32_t user = add_token(s, "<|user|>", 3), seen = add_token(s, "<|observation|>", 3);
            if (keys & 1) add_number(s, "tokenizer.ggml.eot_token_id", MOE_VALUE_UINT32, 65);
            if (keys & 2) add_number(s, "tokenizer.ggml.eom_token_id", MOE_VALUE_UINT32, 66);
            vocab = open_spec(s);
            CHECK(moe_vocab_is_end(vocab, user) == (glm && !(keys & 1)));
            CHECK(moe_vocab_is_end(vocab, seen) == (glm && !(keys & 2)));
            CHECK(moe_vocab_is_end(vocab, 65) == (keys & 1));
            CHECK(moe_vocab_is_end(vocab, 66) == (keys >> 1));
            moe_vocab_close(vocab);
        }
    }
}

// Users cannot write them, and they are not part of a reply's text; they end none, unless the file
// says so.
TEST(tokens_around_a_gap_in_code_are_control_tokens) {
    static const char *const words[] = {
        "<|fim_prefix|>", "<fim_suffix>", "<MID>", "\342\226\201<PRE>", "<|code_middle|>",
        "<\357\275\234fim\342\226\201hole\357\275\234>"};
    enum { N = sizeof words / sizeof words[0] };
    spec *s = &shared_spec;
    int32_t ids[N], out[64];
    spec_small(s, "qwen2");
    for (int i = 0; i < N; i++) ids[i] = add_token(s, words[i], 4);
    add_number(s, "tokenizer.ggml.eos_token_id", MOE_VALUE_UINT32, ids[2]);
    moe_vocab *vocab = open_spec(s);
    for (int i = 0; i < N; i++) {
        CHECKF(moe_vocab_is_control(vocab, ids[i]), "%s", words[i]);
        CHECK(moe_vocab_is_end(vocab, ids[i]) == (i == 2));
        CHECK(moe_vocab_tokenize(vocab, words[i], strlen(words[i]), 0, out, 64) > 1);
        CHECK(moe_vocab_tokenize(vocab, words[i], strlen(words[i]), 2, out, 64) == 1);
    }
    moe_vocab_close(vocab);
}

TEST(tokens_may_be_suppressed) {
    static const int32_t list[] = {97, -1, 300, 97, INT32_MIN, INT32_MAX, 281, 282, 98, 97};
    spec *s = &shared_spec;
    spec_small(s, "qwen2");
    CHECK(s->n_tokens == 282);
    add_ids(s, "tokenizer.ggml.suppress_tokens", list, 10);
    add_number(s, "tokenizer.ggml.eos_token_id", MOE_VALUE_UINT32, 97);
    moe_vocab *vocab = open_spec(s);
    if (!vocab) return;
    for (int32_t id = -2; id < 400; id++)
        CHECKF(!moe_vocab_is_suppressed(vocab, id) == !(id == 97 || id == 98 || id == 281), "%d",
               id);
    CHECK(vocab->n_suppressed == 3); // each once, and no more memory than there are tokens
    CHECK(moe_vocab_is_end(vocab, 97) && !moe_vocab_is_control(vocab, 97));
    CHECK(strcmp(ids_of(vocab, "xa", 0), "120 97") == 0); // texts may hold them
    CHECK(!moe_vocab_is_suppressed(NULL, 0) && !moe_vocab_is_suppressed(vocab, INT32_MIN));
    moe_vocab_close(vocab);
    spec_small(s, "qwen2");
    add_ids(s, "tokenizer.ggml.suppress_tokens", list, 0);
    vocab = open_spec(s);
    CHECK(vocab && vocab->n_suppressed == 0 && !moe_vocab_is_suppressed(vocab, 97));
    moe_vocab_close(vocab);
    spec_small(s, "qwen2");
    add_number(s, "tokenizer.ggml.suppress_tokens", MOE_VALUE_INT32, 97);
    bytes file = spec_file(s);
    free(s->more.p);
    s->more.p = NULL;
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.suppress_tokens", "array of integers");
}

TEST(every_type_of_token_has_its_text) {
    static const struct {
        const char *text, *bytes;
        int32_t type;
    } cases[] = {
        {"\304\240a", " a", 1},    {"\304\240a", "\304\240a", 4}, {"\304\240a", "", 3},
        {"\304\240a", "", 2},      {"\304\240a", "", 5},          {"\304\240a", "", 0},
        {"\304\240a", "", -1},     {"\304\240a", "", 99},         {"<0xE4>", "\344", 6},
        {"<0xe4>", "\344", 6},     {"<0xE4", "<0xE4", 6},         {"<0xG4>", "<0xG4>", 6},
        {"<0xE4>", "<0xE4>", 1},   {"<0x0A>", "\n", 6},           {"a b", "a b", 1},
        {"\344\270\255", "\344\270\255", 1}, {"\303\203\302\251", "\303\251", 1},
        {"\377\304", "\377\304", 1}, {"\305\203", "\255", 1},     {"\305\204", "\305\204", 1},
        {"<|x|>", "", 3},          {"<|y|>", "<|y|>", 4}};
    enum { N = sizeof cases / sizeof cases[0] };
    spec *s = &shared_spec;
    spec_bytes(s, "qwen2");
    for (int i = 0; i < N; i++) add_token(s, cases[i].text, cases[i].type);
    moe_vocab *vocab = open_spec(s);
    if (!vocab) return;
    for (int i = 0; i < N; i++) {
        char buffer[32];
        size_t n = moe_vocab_text(vocab, 256 + i, buffer, sizeof buffer);
        CHECKF(n == strlen(cases[i].bytes) && memcmp(buffer, cases[i].bytes, n) == 0, "case %d", i);
        moe_string token = moe_vocab_token(vocab, 256 + i);
        CHECK(token.size == strlen(cases[i].text) &&
              memcmp(token.data, cases[i].text, token.size) == 0);
    }
    moe_vocab_close(vocab);
}

// ---- files that are wrong, or hostile --------------------------------------------------------

static void check_refused(bytes file, moe_status status, const char *where, const char *text) {
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_vocab *vocab = open_bytes(file, &error);
    CHECKF(!vocab && error.status == status && strstr(error.where, where) &&
               strstr(error.text, text),
           "%s, %s: %s", moe_status_name(error.status), error.where, error.text);
    moe_vocab_close(vocab);
}

TEST(bad_vocabularies_are_refused) {
    bytes file = file_begin();
    check_refused(file, MOE_ERROR_UNSUPPORTED, "tokenizer.ggml.model", "not supported");
    static const char *const models[] = {"llamas", "none",  "no_vocab", "test",   "bert", "gpt2x",
                                         "",       "gemma", "gemma44",  "plamo2", "t5"};
    for (int i = 0; i < 11; i++) {
        file = file_begin();
        put_string(&file, "tokenizer.ggml.model", models[i]);
        put_array(&file, "tokenizer.ggml.tokens", MOE_VALUE_STRING, 0);
        check_refused(file, MOE_ERROR_UNSUPPORTED, "tokenizer.ggml.model", models[i]);
    }
    static const char *const pres[] = {"no-such-pre", "", "llama3 llama-v3"};
    for (int i = 0; i < 3; i++) {
        spec_small(&shared_spec, pres[i]);
        check_refused(spec_file(&shared_spec), MOE_ERROR_UNSUPPORTED, "tokenizer.ggml.pre",
                      pres[i]);
    }
    file = file_begin();
    put_number(&file, "tokenizer.ggml.model", MOE_VALUE_UINT32, 1);
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.model", "text");
    file = file_begin();
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_number(&file, "tokenizer.ggml.pre", MOE_VALUE_BOOL, 1);
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.pre", "text");
    file = file_begin();
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.tokens", "missing");
    file = file_begin();
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_array(&file, "tokenizer.ggml.tokens", MOE_VALUE_STRING, 0);
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.tokens", "empty");
    file = file_begin();
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_array(&file, "tokenizer.ggml.tokens", MOE_VALUE_INT32, 1);
    put_u32(&file, 7);
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.tokens", "array of text");
    file = file_begin();
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_string(&file, "tokenizer.ggml.tokens", "abc");
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.tokens", "array of text");
    file = file_begin(); // no merges
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_array(&file, "tokenizer.ggml.tokens", MOE_VALUE_STRING, 1);
    put_text(&file, "a", 1);
    check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.merges", "missing");
    for (int n = 0; n < 3; n++) { // 1 is right
        file = file_begin();
        put_string(&file, "tokenizer.ggml.model", "gpt2");
        put_array(&file, "tokenizer.ggml.tokens", MOE_VALUE_STRING, 1);
        put_text(&file, "a", 1);
        put_array(&file, "tokenizer.ggml.token_type", MOE_VALUE_INT32, (uint64_t)n);
        for (int i = 0; i < n; i++) put_u32(&file, 1);
        put_array(&file, "tokenizer.ggml.merges", MOE_VALUE_STRING, 0);
        if (n == 1) moe_vocab_close(open_bytes(file, NULL));
        else check_refused(file, MOE_ERROR_FORMAT, "tokenizer.ggml.token_type", "values for 1");
    }
    static const char *const numbers[] = {"tokenizer.ggml.bos_token_id",
                                          "tokenizer.ggml.add_bos_token",
                                          "tokenizer.ggml.fim_sep_token_id"};
    for (int i = 0; i < 3; i++) {
        spec_small(&shared_spec, "qwen2");
        file = spec_file(&shared_spec);
        put_string(&file, numbers[i], "1");
        check_refused(file, MOE_ERROR_FORMAT, numbers[i], "integer");
    }
}

TEST(a_vocabulary_needs_neither_pre_nor_types) { // no pre, no types
    bytes file = file_begin();
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_array(&file, "tokenizer.ggml.tokens", MOE_VALUE_STRING, 3);
    put_text(&file, "a", 1);
    put_text(&file, "b", 1);
    put_text(&file, "ab", 2);
    put_array(&file, "tokenizer.ggml.merges", MOE_VALUE_STRING, 1);
    put_text(&file, "a b", 3);
    moe_vocab *vocab = open_bytes(file, NULL);
    CHECK(vocab && vocab->pre == moe__text_find_pre("default", 7));
    if (vocab) CHECK(strcmp(ids_of(vocab, "abba?", 3), "2 1 0") == 0); // '?' is no token
    moe_vocab_close(vocab);
}

TEST(odd_tokens_and_merges_do_no_harm) {
    bytes file = file_begin();
    char *huge = (char *)malloc(1 << 20);
    memset(huge, 'a', 1 << 20);
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_string(&file, "tokenizer.ggml.pre", "llama-bpe");
    put_array(&file, "tokenizer.ggml.tokens", MOE_VALUE_STRING, 10);
    put_text(&file, "", 0);              // 0
    put_text(&file, huge, 1 << 20);      // 1: a special token of a megabyte
    put_text(&file, "a", 1);             // 2: the second "a" wins
    put_text(&file, "a", 1);             // 3
    put_text(&file, "", 0);              // 4: empty and special
    put_text(&file, "\xFF\xC3", 2);      // 5: no UTF-8
    put_text(&file, "b\0c", 3);          // 6: special, with NUL
    put_text(&file, "b\0c", 3);          // 7: the same again
    put_text(&file, "bb", 2);            // 8
    put_text(&file, huge, (1 << 20) - 1); // 9
    put_array(&file, "tokenizer.ggml.token_type", MOE_VALUE_INT32, 10);
    static const int32_t types[] = {1, 4, 1, 1, 4, 1, 3, 4, 1, 1};
    put(&file, types, sizeof types);
    put_array(&file, "tokenizer.ggml.merges", MOE_VALUE_STRING, 12);
    put_text(&file, "", 0);
    put_text(&file, " ", 1);
    put_text(&file, "  ", 2);
    put_text(&file, "   ", 3);
    put_text(&file, "a", 1);
    put_text(&file, "a ", 2);
    put_text(&file, " a", 2);
    put_text(&file, "b b", 3); // b is no token
    put_text(&file, "\xFF \xC3", 3);
    put_text(&file, huge, 1 << 19);
    put_text(&file, "bb bb", 5); // bbbb is no token, so the text is lost
    put_text(&file, "b b", 3);
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_vocab *vocab = open_bytes(file, &error);
    CHECKF(vocab, "%s", error.text);
    if (vocab) {
        CHECK(moe_vocab_size(vocab) == 10);
        CHECK(one_id(vocab, "a") == 3 && moe_vocab_find(vocab, "b\0c", 3) == 7);
        CHECK(moe_vocab_find(vocab, "\xFF\xC3", 2) == 5 && one_id(vocab, "b") == -1);
        CHECK(moe_vocab_token(vocab, 0).data && moe_vocab_token(vocab, 0).size == 0);
        CHECK(moe_vocab_text(vocab, 0, NULL, 0) == 0);
        CHECK(moe_vocab_text(vocab, 5, NULL, 0) == 2);
        CHECK(strcmp(ids_of(vocab, "aab", 0), "3 3") == 0);
        CHECK(strcmp(ids_of(vocab, "bb", 0), "8") == 0);
        CHECK(strcmp(ids_of(vocab, "bbbb", 0), "") == 0);
        CHECK(strcmp(ids_of(vocab, "bbbbbb", 0), "8") == 0);
        int32_t ids[4];
        CHECK(moe_vocab_tokenize(vocab, "b\0c", 3, 0, ids, 4) == 1 && ids[0] == 7);
        CHECK(moe_vocab_tokenize(vocab, huge, 1 << 20, 0, ids, 4) == 1 && ids[0] == 1);
        CHECK(moe_vocab_tokenize(vocab, huge, (1 << 20) - 1, 0, ids, 4) == 1 && ids[0] == 9);
    }
    moe_vocab_close(vocab);
    free(huge);
}

// The same vocabulary with bytes changed at random: opened or refused, used if opened.
static void check_changed_files(int gemma) {
    static const int32_t suppressed[] = {0, 5, 100};
    if (gemma) gemma_spec(&shared_spec);
    else spec_small(&shared_spec, "llama-bpe");
    add_ids(&shared_spec, "tokenizer.ggml.suppress_tokens", suppressed, 3);
    add_number(&shared_spec, "tokenizer.ggml.bos_token_id", MOE_VALUE_UINT32, 277);
    add_number(&shared_spec, "tokenizer.ggml.add_bos_token", MOE_VALUE_BOOL, 1);
    bytes file = spec_file(&shared_spec);
    int opened = 0, refused = 0;
    for (int round = 0; round < 3000; round++) {
        random_state = (uint64_t)round;
        bytes copy = {NULL, 0, 0};
        put(&copy, file.p, file.n);
        for (uint32_t left = 1 + random_below(8); left; left--) {
            size_t at = random_below((uint32_t)copy.n);
            copy.p[at] = (unsigned char)(random_below(3) ? random_below(256) : copy.p[at] ^ 1);
        }
        if (random_below(8) == 0) copy.n = random_below((uint32_t)copy.n + 1);
        moe_error error;
        memset(&error, 0, sizeof error);
        moe_vocab *vocab = open_bytes(copy, &error);
        opened += vocab != NULL;
        refused += vocab == NULL;
        CHECK(vocab || (error.status && error.text[0]));
        if (!vocab) continue;
        char text[600];
        int32_t ids[2000];
        size_t size = random_text(text, sizeof text);
        int64_t n = moe_vocab_tokenize(vocab, text, size, random_below(4), ids, 2000);
        CHECK(n >= 0 && n <= (int64_t)((gemma ? 3u : 2u) * size) + 2);
        for (int64_t i = 0; i < n; i++) {
            char buffer[16];
            CHECK(ids[i] >= 0 && ids[i] < moe_vocab_size(vocab));
            moe_vocab_text(vocab, ids[i], buffer, sizeof buffer);
        }
        moe_vocab_close(vocab);
    }
    CHECK(opened > 100 && refused > 100);
    free(shared_spec.more.p);
    shared_spec.more.p = NULL;
    free(file.p);
}

TEST(changed_files_are_refused_or_usable) {
    check_changed_files(0);
    check_changed_files(1);
}

// Steps of opening a vocabulary of n long tokens and as many merges of `size` bytes whose texts are
// no tokens, so that the table of texts grows; the tokens' texts differ in one byte.
static uint64_t steps_of_opening(int n, int size) {
    bytes file = file_begin();
    char text[256];
    memset(text, 'a', sizeof text);
    put_string(&file, "tokenizer.ggml.model", "gpt2");
    put_string(&file, "tokenizer.ggml.pre", "qwen2");
    for (int merges = 0; merges < 2; merges++) {
        put_array(&file, merges ? "tokenizer.ggml.merges" : "tokenizer.ggml.tokens",
                  MOE_VALUE_STRING, (uint64_t)n);
        for (int i = 0; i < n; i++) {
            char digits[16];
            snprintf(digits, sizeof digits, "%08d", i);
            for (int k = 0; k < 8; k++) text[(k + 1) * size / 9] = digits[k]; // spread
            if (merges) text[size / 2] = ' ';
            put_text(&file, text, (size_t)size);
        }
    }
    uint64_t start = steps_now();
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_vocab *vocab = open_bytes(file, &error);
    start = steps_now() - start;
    CHECKF(vocab, "%s", error.text);
    int lost = 0;
    for (int32_t id = 0; vocab && id < n; id++) {
        moe_string token = moe_vocab_token(vocab, id);
        lost += moe_vocab_find(vocab, token.data, token.size) != id;
    }
    CHECK(lost == 0);
    moe_vocab_close(vocab);
    return start;
}

TEST(opening_a_vocabulary_takes_n_log_n) {
    static const int sizes[] = {12, 17, 30, 33, 100};
    for (int i = 0; i < 5; i++)
        CHECK_GROWTH(steps_of_opening(16000, sizes[i]), steps_of_opening(2000, sizes[i]), N_LOG_N,
                     "bytes", sizes[i]);
}

// ---- memory and threads ----------------------------------------------------------------------

static int64_t allocations_left, bytes_held;
static void *limited_alloc(void *user, size_t size) {
    (void)user;
    if (allocations_left-- <= 0) return NULL;
    bytes_held += (int64_t)size;
    return malloc(size);
}
static void limited_free(void *user, void *memory, size_t size) {
    (void)user;
    bytes_held -= (int64_t)size;
    free(memory);
}

// A file in memory whose tables, and those of its vocabulary, are counted.
static moe_gguf *open_limited_gguf(const bytes *file) {
    moe_gguf_options options;
    memset(&options, 0, sizeof options);
    options.allocator.alloc = limited_alloc;
    options.allocator.free = limited_free;
    allocations_left = INT32_MAX;
    return moe_gguf_open_memory(file->p, file->n, &options, NULL);
}

TEST(any_allocation_of_an_spm_vocabulary_may_fail) {
    spm_spec(&shared_spec, 1);
    bytes file = spm_file(&shared_spec, NULL);
    moe_gguf *gguf = open_limited_gguf(&file);
    int64_t before = bytes_held, n = -1;
    moe_vocab *vocab = NULL;
    for (int64_t k = 0; !vocab && k < 100; k++) {
        moe_error error;
        allocations_left = k;
        vocab = moe_vocab_open(gguf, &error);
        CHECK(vocab || (error.status == MOE_ERROR_MEMORY && bytes_held == before));
    }
    before = bytes_held;
    for (int64_t k = 0; vocab && n < 0 && k < 100; k++) {
        allocations_left = k;
        n = moe_vocab_tokenize(vocab, "ab <s> c", 8, MOE_TOKENIZE_PARSE_SPECIAL, NULL, 0);
        CHECK(n > 0 || (n == -(int64_t)MOE_ERROR_MEMORY && bytes_held == before));
    }
    CHECK(n > 0);
    moe_vocab_close(vocab);
    moe_gguf_close(gguf);
    CHECK(bytes_held == 0);
    free(file.p);
}

TEST(any_allocation_of_a_vocabulary_may_fail) {
    static const int32_t suppressed[] = {7, 8};
    const char *text = "hello <user> world <|im_start|> and more";
    spec_small(&shared_spec, "qwen2");
    add_ids(&shared_spec, "tokenizer.ggml.suppress_tokens", suppressed, 2);
    add_merge(&shared_spec, "x yz"); // texts that are no tokens, so that the table grows
    for (int i = 0; i < 200; i++) {
        char merge[16];
        snprintf(merge, sizeof merge, "q%d q%d", i, i + 1);
        add_merge(&shared_spec, merge);
    }
    bytes file = spec_file(&shared_spec);
    free(shared_spec.more.p);
    shared_spec.more.p = NULL;
    moe_gguf *gguf = open_limited_gguf(&file);
    CHECK(gguf);
    int64_t before = bytes_held, failures = 0;
    moe_vocab *vocab = NULL;
    for (int64_t k = 0; !vocab && k < 100; k++) {
        moe_error error;
        memset(&error, 0, sizeof error);
        allocations_left = k;
        vocab = moe_vocab_open(gguf, &error);
        failures += vocab == NULL;
        CHECKF(vocab || (error.status == MOE_ERROR_MEMORY && bytes_held == before), "%s %d",
               error.text, (int)k);
    }
    CHECK(vocab && failures > 10);
    if (!vocab) return;
    before = bytes_held;
    failures = 0;
    int64_t n = -1;
    for (int64_t k = 0; n < 0 && k < 100; k++) {
        allocations_left = k;
        n = moe_vocab_tokenize(vocab, text, strlen(text), MOE_TOKENIZE_PARSE_SPECIAL, NULL, 0);
        failures += n < 0;
        CHECK(n > 0 || (n == -(int64_t)MOE_ERROR_MEMORY && bytes_held == before));
    }
    CHECK(n > 0 && failures == 4);
    moe_vocab_close(vocab);
    moe_gguf_close(gguf);
    CHECK(bytes_held == 0);
    free(file.p);
}

// The small vocabulary with memory that is counted.
static moe_vocab *open_limited(const char *pre) {
    spec_small(&shared_spec, pre);
    bytes file = spec_file(&shared_spec);
    moe_gguf *gguf = open_limited_gguf(&file);
    moe_vocab *vocab = gguf ? moe_vocab_open(gguf, NULL) : NULL;
    moe_gguf_close(gguf);
    free(file.p);
    CHECK(vocab);
    return vocab;
}

TEST(memory_is_used_again) {
    const char *text = "hello <user> world <|im_start|> and more", *ids;
    moe_vocab *vocab = open_limited("qwen2");
    if (!vocab) return;
    char *want = strdup(ids_of(vocab, text, 3));
    allocations_left = 0;
    for (size_t size = strlen(text); size; size--) { // no longer ones, whatever is in them
        int64_t n = moe_vocab_tokenize(vocab, text, size, 3, NULL, 0);
        CHECKF(n > 0, "%d bytes: %d", (int)size, (int)n);
    }
    CHECK(strcmp(ids_of(vocab, text, 3), want) == 0);
    // A longer text fails, and then nothing is kept until there is memory again.
    char longer[5000];
    memset(longer, '<', sizeof longer);
    CHECK(moe_vocab_tokenize(vocab, longer, 5000, 0, NULL, 0) == -(int64_t)MOE_ERROR_MEMORY);
    CHECK(vocab->kept == NULL);
    CHECK(moe_vocab_tokenize(vocab, text, 5, 0, NULL, 0) == -(int64_t)MOE_ERROR_MEMORY);
    allocations_left = INT32_MAX;
    ids = ids_of(vocab, text, 3);
    CHECKF(strcmp(ids, want) == 0, "%s, not %s", ids, want);
    // Every n-th allocation fails, while texts grow.
    for (int every = 2; every < 6; every++) {
        int failed = 0;
        for (size_t size = 100; size < sizeof longer; size += 100) {
            allocations_left = every - 1;
            int64_t n = moe_vocab_tokenize(vocab, longer, size, 0, NULL, 0);
            CHECK(n > 0 || n == -(int64_t)MOE_ERROR_MEMORY);
            failed += n < 0;
        }
        CHECK(failed == 0 || every < 4);
        allocations_left = INT32_MAX;
        CHECK(strcmp(ids_of(vocab, text, 3), want) == 0);
    }
    free(want);
    moe_vocab_close(vocab);
    CHECK(bytes_held == 0);
}

// What is kept is bounded, and does not grow from call to call.
TEST(memory_that_is_kept_is_bounded) {
    enum { LARGE = 1 << 20 };
    char *text = (char *)malloc(LARGE);
    moe_vocab *vocab = open_limited("gpt-2");
    int64_t before = bytes_held, most = 0;
    if (!vocab) return;
    for (size_t size = 1; size <= LARGE; size += size / 2 + 1) {
        for (int pieces = 1; pieces >= 0; pieces--) {
            for (size_t i = 0; i < size; i++) text[i] = pieces && i % 4 == 3 ? '<' : 'a';
            CHECK(moe_vocab_tokenize(vocab, text, size, 0, NULL, 0) > 0);
            int64_t kept = bytes_held - before;
            CHECKF(kept >= 0 && kept <= MOE__TEXT_KEPT + 1024, "%d bytes are kept", (int)kept);
            if (kept > most) most = kept;
        }
    }
    CHECK(most > MOE__TEXT_KEPT / 4 && bytes_held == before && vocab->kept == NULL);
    moe_vocab_close(vocab);
    CHECK(bytes_held == 0);
    free(text);
}

typedef struct thread_work {
    const moe_vocab *vocab;
    uint64_t sum;
} thread_work;

// Texts of growing size, so that memory is taken, left, and made larger.
static void *thread_run(void *argument) {
    thread_work *work = (thread_work *)argument;
    char text[1600];
    int32_t ids[1600];
    for (int i = 0; i < 300; i++) {
        int size = snprintf(text, sizeof text, "hello world %d <|im_end|> aaaa%d", i, i * i);
        while (size < 5 * i) text[size] = "hello th1 "[size % 10], size++;
        int64_t n = moe_vocab_tokenize(work->vocab, text, (size_t)size, i % 4u, ids, 1600);
        for (int64_t k = 0; k < n; k++) work->sum = work->sum * 31 + (uint64_t)ids[k];
    }
    return NULL;
}

static int64_t shared_bytes; // atomic
static void *shared_alloc(void *user, size_t size) {
    (void)user;
    __atomic_fetch_add(&shared_bytes, (int64_t)size, __ATOMIC_RELAXED);
    return malloc(size);
}
static void shared_free(void *user, void *memory, size_t size) {
    (void)user;
    __atomic_fetch_sub(&shared_bytes, (int64_t)size, __ATOMIC_RELAXED);
    free(memory);
}

TEST(threads_may_share_a_vocabulary) {
    enum { N = 4 };
    spec_small(&shared_spec, "llama-bpe");
    bytes file = spec_file(&shared_spec);
    moe_gguf_options options;
    memset(&options, 0, sizeof options);
    options.allocator.alloc = shared_alloc;
    options.allocator.free = shared_free;
    moe_gguf *gguf = moe_gguf_open_memory(file.p, file.n, &options, NULL);
    for (int round = 0; round < 5; round++) {
        moe_vocab *vocab = moe_vocab_open(gguf, NULL);
        thread_work work[N + 1]; // the last one's alone, for comparison
        pthread_t threads[N];
        for (int i = 0; i <= N; i++) work[i].vocab = vocab, work[i].sum = 0;
        for (int i = 0; i < N; i++)
            CHECK(pthread_create(&threads[i], NULL, thread_run, &work[i]) == 0);
        for (int i = 0; i < N; i++) pthread_join(threads[i], NULL);
        thread_run(&work[N]);
        for (int i = 0; i < N; i++) CHECK(work[i].sum == work[N].sum && work[i].sum);
        moe_vocab_close(vocab);
    }
    moe_gguf_close(gguf);
    CHECK(shared_bytes == 0);
    free(file.p);
}

// ---- reference results -----------------------------------------------------------------------

// A vocabulary file; with another pre-tokenizer's name in it unless pre is NULL.
static moe_vocab *open_shared(const char *name, const char *pre) {
    char path[256];
    size_t size;
    moe_error error;
    memset(&error, 0, sizeof error);
    snprintf(path, sizeof path, "../shared/vocab/ggml-vocab-%s.gguf", name);
    char *data = read_file(path, &size);
    if (!data) return NULL;
    bytes file = {NULL, 0, 0};
    moe_gguf *gguf = moe_gguf_open_memory(data, size, NULL, &error);
    const moe_gguf_value *value =
        pre && gguf ? moe_gguf_find_value(gguf, "tokenizer.ggml.pre") : NULL;
    if (value) {
        uint64_t old;
        memcpy(&old, data + value->offset, 8);
        put(&file, data, (size_t)value->offset);
        put_text(&file, pre, strlen(pre));
        put(&file, data + value->offset + 8 + old, size - (size_t)value->offset - 8 - (size_t)old);
    } else {
        put(&file, data, size);
    }
    moe_gguf_close(gguf);
    free(data);
    moe_vocab *vocab = open_bytes(file, &error);
    CHECKF(vocab, "%s %s: %s: %s", name, pre ? pre : "", error.where, error.text);
    return vocab;
}

// Tokenizes a text and compares with the next line of ids; moves *line on.
static void check_line(const moe_vocab *vocab, const char *text, size_t size, unsigned flags,
                       const char **line, const char *name, int number) {
    int32_t *ids = (int32_t *)malloc(4 * (size + 2));
    int64_t n = moe_vocab_tokenize(vocab, text, size, flags, ids, size + 2);
    int64_t matched = 0, expected = 0;
    const char *p = *line;
    while (*p && *p != '\n') {
        char *end;
        long id = strtol(p, &end, 10);
        if (end == p) break;
        if (expected < n && ids[expected] == (int32_t)id) matched++;
        expected++;
        for (p = end; *p == ' ';) p++;
    }
    CHECKF(n == expected && matched == expected, "%s, text %d: %d tokens, %d expected, %d equal",
           name, number, (int)n, (int)expected, (int)matched);
    *line = p + (*p == '\n');
    free(ids);
}

// Compares all of texts.bin; returns 0 if the file of ids is missing.
static int check_texts(const moe_vocab *vocab, const char *ids_name, unsigned flags) {
    char path[256];
    size_t size, n_ids;
    char *texts = read_file("../shared/golden/tokens/texts.bin", &size);
    snprintf(path, sizeof path, "../shared/golden/tokens/%s.ids", ids_name);
    char *ids = texts ? read_file(path, &n_ids) : NULL;
    const char *line = ids;
    int number = 0;
    for (size_t at = 0; ids && at + 4 <= size; number++) {
        uint32_t length;
        memcpy(&length, texts + at, 4);
        at += 4;
        check_line(vocab, texts + at, length, flags, &line, ids_name, number);
        at += length;
    }
    CHECK(!ids || number == 156);
    free(ids);
    free(texts);
    return ids != NULL;
}

static void check_vocabulary(const char *name) {
    char path[256], *texts, *ids;
    size_t size, n_ids;
    moe_vocab *vocab = open_shared(name, NULL);
    if (!vocab) SKIP("../shared/vocab/ggml-vocab-%s.gguf is missing", name);
    snprintf(path, sizeof path, "%s.plain", name);
    if (!check_texts(vocab, path, 0)) test_skips++;
    snprintf(path, sizeof path, "%s.special", name);
    if (!check_texts(vocab, path, 3)) test_skips++;
    snprintf(path, sizeof path, "../shared/vocab/ggml-vocab-%s.gguf.inp", name);
    texts = read_file(path, &size);
    snprintf(path, sizeof path, "../shared/vocab/ggml-vocab-%s.gguf.out", name);
    ids = read_file(path, &n_ids);
    const char *line = ids, *mark = "\n__ggml_vocab_test__\n", *at = texts;
    for (int number = 0; ids && texts && at; number++) {
        const char *next = strstr(at, mark);
        size_t length = next ? (size_t)(next - at) : strlen(at);
        if (next || length) check_line(vocab, at, length, 0, &line, path, number);
        at = next ? next + strlen(mark) : NULL;
    }
    CHECK(!line || *line == 0);
    free(texts);
    free(ids);
    int lost = 0;
    for (int32_t id = 0; id < moe_vocab_size(vocab); id++) { // each is found, or an equal one
        moe_string text = moe_vocab_token(vocab, id);
        moe_string found = moe_vocab_token(vocab, moe_vocab_find(vocab, text.data, text.size));
        lost += found.size != text.size || memcmp(found.data, text.data, text.size) != 0;
    }
    CHECKF(lost == 0, "%d tokens are not found", lost);
    random_state = 5;
    for (int i = 0; i < 2000; i++) {
        char text[600];
        size_t n = random_text(text, sizeof text);
        CHECK(vocab->orders ? spm_round_trip(vocab, text, n) : round_trip(vocab, text, n, 0));
    }
    moe_vocab_close(vocab);
}

TEST(deepseek_llm_gives_the_reference_tokens) { check_vocabulary("deepseek-llm"); }
TEST(deepseek_coder_gives_the_reference_tokens) { check_vocabulary("deepseek-coder"); }
TEST(qwen2_gives_the_reference_tokens) { check_vocabulary("qwen2"); }
TEST(llama_bpe_gives_the_reference_tokens) { check_vocabulary("llama-bpe"); }
TEST(gpt_2_gives_the_reference_tokens) { check_vocabulary("gpt-2"); }
TEST(llama_spm_gives_the_reference_tokens) { check_vocabulary("llama-spm"); }
TEST(phi_3_gives_the_reference_tokens) { check_vocabulary("phi-3"); }

TEST(every_pre_tokenizer_gives_the_reference_tokens) {
    static const char *const names[] = {
        "afmoe",       "bailingmoe", "bailingmoe2", "chatglm-bpe", "command-r", "dbrx",
        "deepseek-v3", "default",    "exaone-moe",  "glm4",        "gpt-2",     "gpt-4o",
        "grok-2",      "hunyuan",    "kimi-k2",     "lfm2",        "llada-moe", "llama4",
        "minimax-m2",  "olmo",       "qwen35",      "refact",      "smollm",    "seed-coder",
        "tekken",      "deepseek-r1-qwen"};
    moe_vocab *vocab = open_shared("llama-bpe", "deepseek-v3"); // through the file, ...
    if (!vocab) SKIP("../shared/vocab/ggml-vocab-llama-bpe.gguf is missing");
    CHECK(vocab->pre == moe__text_find_pre("deepseek-v3", 11));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[64];
        vocab->pre = moe__text_find_pre(names[i], strlen(names[i])); // the others directly
        CHECKF(vocab->pre, "%s", names[i]);
        snprintf(path, sizeof path, "pre.%s", names[i]);
        if (vocab->pre && !check_texts(vocab, path, 0)) test_skips++;
    }
    moe_vocab_close(vocab);
}

MAIN()
