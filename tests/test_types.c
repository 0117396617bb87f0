// Tensor types: the table, conversions, quantizers, the plain C dot products and the plain C
// kernel table. Reference rows: ../shared/golden/rows; sizes: ../shared/spec/quants.md.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "test.h"
#include <ctype.h>
#include <strings.h>

#include "sheet.h"

// ---- helpers ---------------------------------------------------------------------------------

static double random_unit(void) { return random_u32() / 4294967296.0; }
static float random_normal(void) { // sum of uniforms: good enough, and the same everywhere
    double sum = 0;
    for (int i = 0; i < 12; i++) sum += random_unit();
    return (float)(sum - 6);
}
static void *take(size_t size) { // of exactly this size, so that sanitizers see the end
    void *memory = malloc(size ? size : 1);
    if (!memory) exit(2);
    return memory;
}
static float *take_normal(int64_t n, float scale) {
    float *x = (float *)take((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) x[i] = random_normal() * scale;
    return x;
}
static int is_nan(float x) { return x != x; }
static int is_finite(float x) { return x - x == 0; }

// A file of exactly `size` bytes (0: any size, NUL-terminated); NULL if it is not there.
static void *read_file(const char *name, size_t size) {
    char path[256];
    snprintf(path, sizeof path, "../shared/%s", name);
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    size_t length = (size_t)ftell(file);
    rewind(file);
    char *data = (char *)take(length + 1);
    int good = fread(data, 1, length, file) == length && (size == 0 || length == size);
    fclose(file);
    data[length] = 0;
    if (good) return data;
    free(data);
    return NULL;
}

static size_t group_size(const moe__type *t, int64_t n) {
    return (size_t)t->rows * moe_type_row_size(t->id, n);
}
// A group of rows (a row of most types) of sane scales and any bits.
static uint8_t *random_group(const moe__type *t, int64_t n) {
    uint8_t *group = (uint8_t *)take(group_size(t, n));
    sheet_random(t, group, moe_type_row_size(t->id, n), t->rows, n, 0);
    return group;
}
static int is_float(const moe__type *t) { return t->act == MOE__ACT_F32; }
static const moe__type_kernels *plain_of(const moe__type *t) {
    return &moe__kernels_get(MOE_ISA_SCALAR)->type[t - moe__types];
}

// Activations in the kind that t wants.
static void *take_acts(const moe__type *t, const float *x, int64_t n) {
    void *act = take(moe__act_size(t->act, n));
    moe__kernels_scalar.quantize[t->act](x, n, act);
    return act;
}
// Root of the mean (weighted) squared error.
static double rmse(const float *a, const float *b, const float *w, int64_t n, int64_t n_columns) {
    double sum = 0, weights = 0;
    for (int64_t i = 0; i < n; i++) {
        double e = (double)a[i] - b[i], wi = w ? w[i % n_columns] : 1;
        sum += wi * e * e;
        weights += wi;
    }
    return sqrt(sum / weights);
}

// ---- the table -------------------------------------------------------------------------------

TEST(the_table_of_types_is_complete_and_consistent) {
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        const moe__gguf_type *info = moe__gguf_type_info((int32_t)t->id);
        CHECK(moe__type_find(t->id) == t);
        CHECK(info && info->block == t->block && info->bytes == t->bytes &&
              info->meta == t->meta);
        CHECK(strcmp(moe_type_name(t->id), t->name) == 0);
        CHECK(moe_type_supported(t->id) && moe_type_block(t->id) == t->block);
        CHECK(moe_type_row_size(t->id, t->block) == (size_t)(t->bytes + t->meta));
        const char *tail = strstr(t->name, "_R");
        CHECK(t->rows == (tail ? atoi(tail + 2) : 1) && t->rows <= MOE__GROUP_ROWS);
        for (int isa = MOE_ISA_SCALAR; isa <= LAST_ISA; isa++) {
            if ((int)moe_isa_resolve((moe_isa)isa) != isa) continue;
            const moe__type_kernels *k = &moe__kernels_get((moe_isa)isa)->type[i];
            CHECKF(k->dot && k->tile && k->dequantize, "%s", t->name);
        }
    }
    CHECK(MOE__N_TYPES >= 54);
    CHECK(moe__type_find((moe_type)4) == NULL && moe__type_find(MOE_TYPE_ANY_ID) == NULL);
    CHECK(!moe_type_supported((moe_type)9) && strcmp(moe_type_name((moe_type)9), "Q8_1") == 0);
    CHECK(strcmp(moe_type_name((moe_type)5000), "?") == 0);
    CHECK(moe_type_block((moe_type)5000) == 0 && moe_type_row_size((moe_type)5000, 256) == 0);
}

// ---- the recipe ------------------------------------------------------------------------------

// The head of >>types lists the places that know a type by its name. Here the places are found by
// reading the header: the macro, function, enumeration or macro call (at the beginning of a line)
// in which a type's name stands, comments aside.
typedef struct recipe {
    char name[64][64];
    int n;
} recipe;

static int is_word(int c) { return isalnum(c) || c == '_'; }
// The first place in `line` with the type's name, not followed by _R4 and the like; or NULL.
static const char *find_type(const char *line, const char *type) {
    const size_t n = strlen(type);
    for (const char *p = line; *p; p++)
        if (strncasecmp(p, type, n) == 0 && (p == line || !isalnum((unsigned char)p[-1])) &&
            !isalnum((unsigned char)p[n]) && !(p[n] == '_' && strchr("rR", p[n + 1]) && p[n + 1]))
            return p;
    return NULL;
}
static int has_name(const recipe *r, const char *name) {
    for (int i = 0; i < r->n; i++)
        if (strcmp(r->name[i], name) == 0) return 1;
    return 0;
}
static void add_name(recipe *r, const char *name, size_t size) {
    char text[64];
    snprintf(text, sizeof text, "%.*s", (int)size, name);
    if (size > 0 && !has_name(r, text) && r->n < 64) memcpy(r->name[r->n++], text, sizeof text);
}
// The name of what begins in the first column of `line`.
static void place_of(const char *line, char out[64]) {
    const char *end = strchr(line, '('), *begin;
    if (strncmp(line, "#define ", 8) == 0) end = line + 8 + strcspn(line + 8, "( ");
    else if (!end) end = line + strcspn(line, "{=[");
    else if (end - line >= 5 && strncmp(end - 5, "MOE__(", 6) == 0) end = strchr(end, ')');
    while (end > line && !is_word((unsigned char)end[-1])) end--;
    for (begin = end; begin > line && is_word((unsigned char)begin[-1]);) begin--;
    snprintf(out, 64, "%.*s", (int)(end - begin), begin);
}
// Calls f for each line of text, without its comment.
static void each_line(const char *text, void (*f)(void *to, const char *code, const char *comment),
                      void *to) {
    char line[256];
    while (*text) {
        size_t size = strcspn(text, "\n");
        snprintf(line, sizeof line, "%.*s", (int)size, text);
        char *comment = strstr(line, "//");
        char *comment_text = comment ? comment + 2 : line + strlen(line);
        if (comment) *comment = 0;
        f(to, line, comment_text);
        text += size + (text[size] == '\n');
    }
}
typedef struct reading {
    const char *type;
    char outer[64], macro[64]; // a macro may stand within a function
    int in_macro;              // the line before is of a macro and ends with a backslash
    recipe places;
} reading;
static void read_places(void *to, const char *code, const char *comment) {
    reading *r = (reading *)to;
    (void)comment;
    const int begins = !r->in_macro && strncmp(code, "#define ", 8) == 0;
    if (begins) place_of(code, r->macro);
    else if (!r->in_macro && isalpha((unsigned char)*code)) place_of(code, r->outer);
    const char *place = begins || r->in_macro ? r->macro : r->outer;
    r->in_macro = (begins || r->in_macro) && code[strlen(code) - 1] == '\\';
    if (!find_type(code, r->type)) return;
    char name[128];
    const char *at = find_type(place, r->type);
    if (at)
        snprintf(name, sizeof name, "%.*sNAME%s", (int)(at - place), place, at + strlen(r->type));
    else snprintf(name, sizeof name, "%s", place);
    add_name(&r->places, name, strlen(name));
}
static recipe places_of(const char *header, const char *type) {
    reading r;
    memset(&r, 0, sizeof r);
    r.type = type;
    each_line(header, read_places, &r);
    return r.places;
}
static void read_recipe(void *to, const char *code, const char *comment) {
    recipe *r = (recipe *)to;
    int digits = 0;
    if (*code || sscanf(comment, "   %*d.%n", &digits) != 0 || !digits) return;
    for (const char *p = comment + digits; *p == ' ' && p[1] != ' ' && p[1];) {
        size_t size = strcspn(++p, " ");
        add_name(r, p, size);
        p += size;
    }
}
// The recipe, and how many places are missing in it or do not exist.
static int wrong_places(const char *header, recipe *out) {
    static const char *const types[] = {"iq4_xs", "mxfp4"};
    const char *head = strstr(header, "// TO ADD A TYPE");
    const char *end = head ? strstr(head, "// ====") : NULL;
    recipe found;
    int wrong = 0;
    memset(out, 0, sizeof *out);
    memset(&found, 0, sizeof found);
    if (!end) return 1;
    char *text = (char *)take((size_t)(end - head) + 1);
    memcpy(text, head, (size_t)(end - head));
    text[end - head] = 0;
    each_line(text, read_recipe, out);
    free(text);
    for (int i = 0; i < 2; i++) {
        recipe places = places_of(header, types[i]);
        for (int k = 0; k < places.n; k++)
            add_name(&found, places.name[k], strlen(places.name[k]));
    }
    for (int k = 0; k < found.n; k++) wrong += !has_name(out, found.name[k]);
    for (int k = 0; k < out->n; k++) wrong += !has_name(&found, out->name[k]);
    return wrong;
}
TEST(the_recipe_for_a_type_names_every_place) {
    FILE *file = fopen("moe_infer.h", "rb");
    CHECK(file != NULL);
    if (!file) return;
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *header = (char *)take(size + 256);
    CHECK(fread(header, 1, size, file) == size);
    fclose(file);
    header[size] = 0;
    recipe r, ks;
    int wrong = wrong_places(header, &r);
    CHECKF(wrong == 0, "%d places of the recipe in >>types are wrong", wrong);
    for (int i = 0; wrong && i < 2; i++) {
        recipe places = places_of(header, i ? "mxfp4" : "iq4_xs");
        for (int k = 0; k < places.n; k++) printf("  %s\n", places.name[k]);
    }
    CHECK(r.n >= 3 && has_name(&r, "moe_type") && has_name(&r, "MOE__LAYOUT_NAME"));
    // a type without a quantizer and kernels of its own: three places
    ks = places_of(header, "iq2_ks");
    CHECK(ks.n == 3 && has_name(&ks, "moe_type") && has_name(&ks, "MOE__ALL_TYPES") &&
          has_name(&ks, "MOE__LAYOUT_NAME"));
    // a place more than the recipe knows; and a name in it that is nowhere
    strcpy(header + size, "\nstatic int is_it(int x) {\n    return x == MOE__INDEX_MXFP4;\n}\n");
    CHECK(wrong_places(header, &r) == 1);
    header[size] = 0;
    char *name = strstr(strstr(header, "// TO ADD A TYPE"), "MOE__ALL_TYPES");
    CHECK(name != NULL);
    if (name) memcpy(name, "MOE__ALL_TYPEZ", 14);
    CHECK(wrong_places(header, &r) == 2);
    free(header);
}

TEST(row_sizes_are_right_and_0_if_there_is_none) {
    const moe_type q4 = MOE_TYPE_Q4_K;
    CHECK(moe_type_row_size(q4, 0) == 0 && moe_type_row_size(q4, -256) == 0);
    CHECK(moe_type_row_size(q4, 255) == 0 && moe_type_row_size(q4, 257) == 0);
    CHECK(moe_type_row_size(q4, 2048) == 1152);
    CHECK(moe_type_row_size(MOE_TYPE_Q8_0, 2880) == 3060);
    CHECK(moe_type_row_size(MOE_TYPE_F32, INT64_MAX) == 0);
    CHECK(moe_type_row_size(MOE_TYPE_F16, INT64_MAX) == 0);
    CHECK(moe_type_row_size(MOE_TYPE_Q8_0, INT64_MAX / 32 * 32) == 0);
    CHECK(moe_type_row_size(MOE_TYPE_F16, 1000) == 2000);
}

// The table of sheet section 1.4: per line two entries "id | name | block | type_size |
// row_meta".
static int check_sheet_entry(char **cell) {
    int id, block, bytes, meta = 0;
    char name[32], rest;
    if (sscanf(cell[0], " %d %c", &id, &rest) != 1 || sscanf(cell[1], " %31s", name) != 1) return 0;
    if (sscanf(cell[2], " %d", &block) != 1 || sscanf(cell[3], " %d", &bytes) != 1) return 0;
    if (id == 15) return 0; // two programs, two sizes: not to be had from files
    sscanf(cell[4], " %d", &meta);
    moe_type type = (moe_type)id;
    CHECKF(strcmp(moe_type_name(type), name) == 0, "%d: %s, sheet %s", id, moe_type_name(type),
           name);
    CHECKF(moe_type_block(type) == block, "%s: %d, sheet %d", name, moe_type_block(type), block);
    const moe__type *t = moe__type_find(type);
    CHECKF(!t || (t->bytes == bytes && t->meta == meta), "%s", name);
    for (int64_t k = 1; k <= 8; k += 7) {
        size_t size = moe_type_row_size(type, k * block), want = (size_t)(meta + k * bytes);
        CHECKF(size == want, "%s: %zu bytes, sheet %zu", name, size, want);
    }
    return 1;
}
TEST(row_sizes_agree_with_the_sheet) {
    char *sheet = (char *)read_file("spec/quants.md", 0);
    if (!sheet) SKIP("no spec/quants.md");
    int n = 0;
    char *line = strstr(sheet, "### 1.4"), *end = line ? strstr(line, "\n---") : NULL;
    CHECK(end);
    if (end) *end = 0;
    while (end && line) {
        char *next = strchr(line, '\n'), *cell[16];
        int n_cells = 0;
        if (next) *next++ = 0;
        for (char *p = line; p && n_cells < 16; n_cells++) {
            cell[n_cells] = p;
            if ((p = strchr(p, '|')) != NULL) *p++ = 0;
        }
        for (int first = 1; first + 5 < n_cells; first += 7) n += check_sheet_entry(cell + first);
        line = next;
    }
    CHECKF(n >= 80, "only %d entries found", n);
    free(sheet);
    // "31-33": one line of the sheet for three ids
    for (int id = 31; id <= 33; id++) CHECK(moe_type_row_size((moe_type)id, 64) == 36);
}

// ---- f16, bf16 -------------------------------------------------------------------------------

static double half_value(unsigned h) {
    int exponent = (int)(h >> 10 & 31), fraction = (int)(h & 1023);
    double v = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h & 0x8000 ? -v : v;
}
TEST(every_f16_converts_to_f32_and_back_to_nearest_even) {
    for (unsigned h = 0; h < 65536; h++) {
        float x = moe__f16_to_f32((uint16_t)h);
        if ((h & 0x7C00) == 0x7C00) {
            if (h & 1023) CHECK(is_nan(x) && (moe__f32_to_f16(x) | 0x200) == (h | 0x200));
            else CHECK(x == (h & 0x8000 ? -INFINITY : INFINITY) && moe__f32_to_f16(x) == h);
            continue;
        }
        CHECK((double)x == half_value(h) && !signbit(x) == !(h & 0x8000));
        CHECK(moe__f32_to_f16(x) == h);
        // Between this magnitude and the next: the middle goes to the even one, the rest to the
        // nearer one. Behind 65504 (0x7BFF) comes infinity where 65536 would be.
        double next = half_value(h + 1);
        if ((h & 0x7FFF) == 0x7BFF) next = h & 0x8000 ? -65536.0 : 65536.0;
        float middle = (float)(((double)x + next) / 2); // exact
        uint16_t even = (uint16_t)(h & 1 ? h + 1 : h);
        CHECK(moe__f32_to_f16(middle) == even);
        CHECK(moe__f32_to_f16(moe__f32_from_bits(moe__f32_bits(middle) - 1)) == h);
        CHECK(moe__f32_to_f16(moe__f32_from_bits(moe__f32_bits(middle) + 1)) == h + 1);
    }
    CHECK(moe__f32_to_f16(1e-30f) == 0 && moe__f32_to_f16(-1e-30f) == 0x8000);
    CHECK(moe__f32_to_f16(3e38f) == 0x7C00);
}
TEST(every_bf16_converts_to_f32_and_back_to_nearest_even) {
    for (unsigned b = 0; b < 65536; b++) {
        float x = moe__bf16_to_f32((uint16_t)b);
        CHECK(moe__f32_bits(x) == b << 16);
        if ((b & 0x7FFF) > 0x7F80) {
            CHECK(is_nan(x) && (moe__f32_to_bf16(x) | 0x40) == (b | 0x40));
            continue;
        }
        CHECK(moe__f32_to_bf16(x) == b);
        if ((b & 0x7FFF) == 0x7F80) continue;
        CHECK(moe__f32_to_bf16(moe__f32_from_bits(b << 16 | 0x8000)) == (b & 1 ? b + 1 : b));
        CHECK(moe__f32_to_bf16(moe__f32_from_bits(b << 16 | 0x7FFF)) == b);
        CHECK(moe__f32_to_bf16(moe__f32_from_bits(b << 16 | 0x8001)) == b + 1);
    }
    CHECK(is_nan(moe__bf16_to_f32(moe__f32_to_bf16(moe__f32_from_bits(0x7F800001)))));
}

// ---- dequantize ------------------------------------------------------------------------------

// A product of an f16 scale, a block's scale and a level is exact in double, rounded once: the
// same number. f32 scales of rows are rounded on the way, so is the polynomial of IQ6_K.
static void check_dequantize(const moe__type *t, const uint8_t *group, int64_t n, const float *y) {
    for (int k = 0; k < t->rows; k++) {
        for (int64_t e = 0; e < n; e++) {
            sheet_pair w = sheet_parts(t->id, group, k, e, 0);
            double want = w.value - w.min, got = y[k * n + e];
            double bound = t->meta == 4 ? 1e-6 * fabs(want) : 0;
            if (t->id == MOE_TYPE_IQ6_K)
                bound = 2e-6 * 127 * 128 * sheet_half(group + e / 256 * t->bytes);
            CHECKF(got == (float)want || fabs(got - want) <= fabs(bound),
                   "%s row %d, %d: %.9g, not %.9g", t->name, k, (int)e, got, want);
        }
    }
}
TEST(every_type_is_dequantized_as_the_sheet_says) {
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (!sheet_knows(t->id)) {
            printf("  without iq_grids.txt: not %s\n", t->name);
            continue;
        }
        for (int trial = 0; trial < 4; trial++) {
            int64_t n = trial % 2 ? 768 : 512, groups = 2;
            size_t size = group_size(t, n);
            uint8_t *rows = (uint8_t *)take((size_t)groups * size);
            float *y = (float *)take((size_t)(groups * t->rows * n) * sizeof(float));
            sheet_random(t, rows, size / (size_t)t->rows, (int)groups * t->rows, n,
                         trial < 2 ? 0 : 1);
            CHECK(moe_type_dequantize(t->id, rows, y, groups * t->rows, n, NULL) == MOE_OK);
            for (int64_t g = 0; g < groups; g++)
                check_dequantize(t, rows + (size_t)g * size, n, y + g * t->rows * n);
            free(rows);
            free(y);
        }
    }
}

// Every scale that a float can hold, as far as the type has such.
TEST(scales_of_any_size_are_dequantized) {
    float y[8 * 256];
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (is_float(t) || !sheet_knows(t->id)) continue;
        for (int d = 0; d < 256; d++) {
            uint8_t *group = random_group(t, 256);
            float scale = ldexpf(d % 2 ? -1.0f : 1.25f, d % 40 - 24);
            sheet_put_all(t, group, moe_type_row_size(t->id, 256), t->rows, 256, scale);
            if (!sheet_may_be_nan(t)) // exponents of 8 bits
                for (int k = 0; k < moe__max(t->rows, 4); k++) group[k] = (uint8_t)d;
            plain_of(t)->dequantize(group, 256, y);
            check_dequantize(t, group, 256, y);
            free(group);
        }
    }
}

TEST(rows_may_lie_at_any_address) {
    enum { N = 512 };
    float y[8 * N], y1[8 * N], x[N], out[8], out1[8];
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        size_t size = group_size(t, N), row_size = size / (size_t)t->rows;
        size_t values = (size_t)t->rows * N * sizeof(float), sums = (size_t)t->rows * sizeof(float);
        uint8_t *group = random_group(t, N);
        double sum = 0;
        plain_of(t)->dequantize(group, N, y);
        for (int e = 0; e < N; e++) sum += fabs(x[e] = random_normal());
        void *act = take_acts(t, x, N);
        plain_of(t)->dot(group, row_size, t->rows, N, act, out);
        for (size_t shift = 1; shift < 4; shift++) {
            uint8_t *moved = (uint8_t *)take(size + shift);
            memcpy(moved + shift, group, size);
            plain_of(t)->dequantize(moved + shift, N, y1);
            CHECK(memcmp(y, y1, values) == 0);
            plain_of(t)->dot(moved + shift, row_size, t->rows, N, act, out1);
            CHECK(memcmp(out, out1, sums) == 0);
            if (t->quantize) {
                memset(moved + shift, 0, size);
                t->quantize(x, moved + shift, N, NULL);
                plain_of(t)->dequantize(moved + shift, N, y1);
                CHECK(rmse(x, y1, NULL, N, N) < 0.02 * sum);
            }
            free(moved);
        }
        free(act);
        free(group);
    }
}

// ---- reference rows --------------------------------------------------------------------------

enum { GOLD_ROWS = 16, GOLD_N = 512, GOLD = GOLD_ROWS * GOLD_N };

static double index_rmse(const char *index, const char *name) {
    char line[64], type[32];
    double value;
    snprintf(line, sizeof line, "\n%s\t", name);
    const char *at = strstr(index, line);
    if (!at || sscanf(at, " %31s %*d %*d %*d %lf", type, &value) != 2) return -1;
    return value;
}
// Types without a file are not in the collection.
TEST(golden_rows_are_dequantized_to_the_reference) {
    char *index = (char *)read_file("golden/rows/index.tsv", 0);
    float *y = (float *)take(GOLD * sizeof(float));
    int n_files = 0;
    if (!index) SKIP("no golden/rows");
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        size_t row_size = moe_type_row_size(t->id, GOLD_N);
        char name[64];
        snprintf(name, sizeof name, "golden/rows/%s.blocks", t->name);
        uint8_t *blocks = (uint8_t *)read_file(name, GOLD_ROWS * row_size);
        snprintf(name, sizeof name, "golden/rows/%s.f32", t->name);
        float *gold = (float *)read_file(name, GOLD * sizeof(float));
        CHECKF(!blocks == (index_rmse(index, t->name) < 0) && !blocks == !gold, "%s", t->name);
        // IQ6_K: a float polynomial with cancellation
        float bound = t->id == MOE_TYPE_IQ6_K ? 1e-4f : 1e-6f;
        for (int isa = MOE_ISA_SCALAR; isa <= LAST_ISA && blocks && gold; isa++) {
            if ((int)moe_isa_resolve((moe_isa)isa) != isa) continue;
            const moe__type_kernels *k = &moe__kernels_get((moe_isa)isa)->type[i];
            for (int r = 0; r < GOLD_ROWS; r += t->rows)
                k->dequantize(blocks + (size_t)r * row_size, GOLD_N, y + r * GOLD_N);
            for (int e = 0; e < GOLD; e++)
                CHECKF(fabsf(y[e] - gold[e]) <= bound * fabsf(gold[e]), "%s %s %d: %g, not %g",
                       moe_isa_name((moe_isa)isa), t->name, e, (double)y[e], (double)gold[e]);
            n_files += isa == MOE_ISA_SCALAR;
        }
        free(blocks);
        free(gold);
    }
    int n_lines = -1;
    for (const char *p = index; *p; p++) n_lines += *p == '\n';
    CHECKF(n_files == n_lines, "%d files, %d in the index", n_files, n_lines);
    free(index);
    free(y);
}

// ---- quantize --------------------------------------------------------------------------------

// Types that can be made, as far as this build knows them, and the largest RMSE of normally
// distributed weights, as a part of their own RMS: a bit above what is reached.
static const struct quantizable {
    int id;
    const char *name;
    double error;
} quantizables[] = {
    {0, "F32", 0},           {1, "F16", 0.00025},     {30, "BF16", 0.002},  {2, "Q4_0", 0.083},
    {3, "Q4_1", 0.072},      {6, "Q5_0", 0.041},      {7, "Q5_1", 0.035},   {8, "Q8_0", 0.0056},
    {10, "Q2_K", 0.27},      {11, "Q3_K", 0.148},     {12, "Q4_K", 0.072},  {13, "Q5_K", 0.0355},
    {14, "Q6_K", 0.0175},    {20, "IQ4_NL", 0.076},   {23, "IQ4_XS", 0.076}, {39, "MXFP4", 0.115},
};
enum { N_QUANTIZABLE = sizeof quantizables / sizeof quantizables[0] };
static double error_bound(moe_type type) {
    for (int i = 0; i < N_QUANTIZABLE; i++)
        if (quantizables[i].id == (int)type) return quantizables[i].error;
    return 0;
}

// Quantizes and dequantizes n weights, in buffers of exactly the right size.
static void round_trip(const moe__type *t, const float *x, int64_t n, const float *importance,
                       float *y) {
    size_t size = moe_type_row_size(t->id, n);
    uint8_t *row = (uint8_t *)take(size), *again = (uint8_t *)take(size);
    memset(row, 0x55, size);
    memset(again, 0xAA, size);
    CHECK(moe_type_quantize(t->id, x, row, 1, n, importance, NULL) == MOE_OK);
    CHECK(moe_type_quantize(t->id, x, again, 1, n, importance, NULL) == MOE_OK);
    CHECK(memcmp(row, again, size) == 0); // deterministic, every byte written
    CHECK(moe_type_dequantize(t->id, row, y, 1, n, NULL) == MOE_OK);
    free(row);
    free(again);
}

TEST(the_list_of_quantizers_is_complete) { // the list above is complete
    int n = 0;
    for (int i = 0; i < MOE__N_TYPES; i++) {
        int listed = 0;
        for (int k = 0; k < N_QUANTIZABLE; k++)
            listed += quantizables[k].id == (int)moe__types[i].id;
        CHECKF(listed == (moe__types[i].quantize != NULL), "%s", moe__types[i].name);
        n += listed;
    }
    CHECK(n == N_QUANTIZABLE);
}

TEST(the_error_of_quantizing_has_a_bound) {
    enum { N = 16384 };
    const float scales[] = {1.0f, 0.02f, 1e-4f, 300.0f};
    float *y = (float *)take(N * sizeof(float));
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (!t->quantize) continue;
        for (int s = 0; s < 4; s++) {
            float *x = take_normal(N, scales[s]);
            round_trip(t, x, N, NULL, y);
            double error = rmse(x, y, NULL, N, N) / scales[s], bound = error_bound(t->id);
            if (s == 2) bound *= 1.1; // some scales are f16 subnormals
            CHECKF(error <= bound, "%s: %g > %g", t->name, error, bound);
            free(x);
        }
    }
    free(y);
}

// Mins cannot be negative: values 1..2 need all levels from 0 to 2, -2..-1 only those between.
TEST(values_of_one_sign_use_all_levels) {
    enum { N = 2048 };
    float x[N], y[N];
    for (int side = -1; side <= 1; side += 2) {
        for (int e = 0; e < N; e++) x[e] = (float)(side * (1 + random_unit()));
        for (int last = 15; last <= 31; last += 16) {
            const moe__type *t = moe__type_find(last == 15 ? MOE_TYPE_Q4_K : MOE_TYPE_Q5_K);
            double step = (side > 0 ? 2.0 : 1.0) / last, error;
            round_trip(t, x, N, NULL, y);
            error = rmse(x, y, NULL, N, N);
            CHECKF(error < 0.3 * step, "%s: %g of a step", t->name, error / step);
        }
    }
}

// What a type can hold exactly comes back exactly (almost, where a search decides).
TEST(what_a_type_can_hold_comes_back_exactly) {
    enum { N = 4096 };
    float *x = (float *)take(N * sizeof(float)), *y = (float *)take(N * sizeof(float));
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (!t->quantize) continue;
        for (int e = 0; e < N; e++) x[e] = (float)((int)(random_u32() % 15) - 7) / 64;
        for (int e = 0; e < N; e += 16) x[e] = -8 / 64.0f;
        round_trip(t, x, N, NULL, y);
        double error = rmse(x, y, NULL, N, N), step = 1 / 64.0, bound = 0;
        switch ((int)t->id) {
        case 3: case 7: case 12: case 13: bound = 0.06; break; // with mins: Q4_1 Q5_1 Q4_K Q5_K
        case 8: case 14: bound = 0.02; break; // Q8_0 Q6_K: other steps than 1/64
        case 10: case 11: case 20: case 23: case 39: bound = 1.1; break; // cannot hold these
        default: break;
        }
        CHECKF(error <= bound * step, "%s: %g of a step", t->name, error / step);
        for (int e = 0; e < N; e++) x[e] = e < N / 2 ? 0.75f : -0.75f; // constant blocks
        round_trip(t, x, N, NULL, y);
        error = rmse(x, y, NULL, N, N);
        CHECKF(error <= 0.75 * 4e-4, "%s %g", t->name, error);
        memset(x, 0, N * sizeof(float));
        round_trip(t, x, N, NULL, y);
        for (int e = 0; e < N; e++) CHECK(y[e] == 0);
    }
    free(x);
    free(y);
}

// Q4_0 has one scale per block: no scale in a fine grid may be much better than ours.
TEST(no_other_q4_0_scale_is_much_better) {
    double ours = 0, best = 0;
    for (int block = 0; block < 40; block++) {
        float *x = take_normal(32, 1), w[32], y[32];
        for (int i = 0; i < 32; i++) w[i] = block % 2 ? (float)random_unit() : 1;
        round_trip(moe__type_find(MOE_TYPE_Q4_0), x, 32, block % 2 ? w : NULL, y);
        double least = 1e30;
        for (int step = -3000; step <= 3000; step++) {
            double d = step * 2e-4, error = 0;
            for (int i = 0; i < 32 && d != 0; i++) {
                double q = fmin(7, fmax(-8, floor(x[i] / d + 0.5))), e = x[i] - d * q;
                error += w[i] * e * e;
            }
            if (d != 0 && error < least) least = error;
        }
        best += least;
        for (int i = 0; i < 32; i++) ours += w[i] * ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        free(x);
    }
    CHECKF(ours <= 1.05 * best, "%g, best %g", ours, best);
}

TEST(importance_lowers_the_weighted_error) {
    enum { N = 4096 };
    float *x = take_normal(N, 1), *w = (float *)take(N * sizeof(float));
    float *plain = (float *)take(N * sizeof(float)), *weighted = (float *)take(N * sizeof(float));
    for (int e = 0; e < N; e++) w[e] = (float)exp(1.5 * random_normal());
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (!t->quantize) continue;
        round_trip(t, x, N, NULL, plain);
        round_trip(t, x, N, w, weighted);
        double a = rmse(plain, x, w, N, N), b = rmse(weighted, x, w, N, N);
        if (is_float(t) || t->id == MOE_TYPE_Q8_0) CHECK(a == b);
        else CHECKF(b < ((int)t->id == 39 ? 1 : 0.93) * a, // MXFP4: only powers of two
                    "%s: %g with importance, %g without", t->name, b, a);
        // Only the ratio counts; all equal is none.
        float *scaled = (float *)take(N * sizeof(float));
        for (int e = 0; e < N; e++) scaled[e] = w[e] * 1048576;
        round_trip(t, x, N, scaled, plain);
        CHECK(memcmp(plain, weighted, N * sizeof(float)) == 0);
        free(scaled);
    }
    free(x);
    free(w);
    free(plain);
    free(weighted);
}

// NaN, infinity, tiny and huge values, senseless importance: well-formed blocks, neighbours
// intact.
TEST(hostile_values_quantize_to_finite_blocks) {
    enum { N = 768 };
    const float bad[] = {NAN,      -NAN,   INFINITY, -INFINITY, 3.4e38f,
                         -3.4e38f, 1e-45f, -1e-38f,  7e4f,      3e-8f};
    const float odd[] = {NAN, INFINITY, -1, 0, 1e38f, 1e-45f};
    float *good = take_normal(N, 1), x[N], y[N], y0[N], w[N];
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (is_float(t) || !t->quantize) continue;
        round_trip(t, good, N, NULL, y0);
        for (int b = 0; b < 10; b++) {
            for (int place = 0; place < 3; place++) { // one value, sub-block or block
                memcpy(x, good, sizeof x);
                int n = place == 0 ? 1 : place == 1 ? 16 : t->block;
                for (int e = 0; e < n; e++) x[256 + e] = bad[b];
                round_trip(t, x, N, place == 1 ? good : NULL, y);
                for (int e = 0; e < N; e++) CHECKF(is_finite(y[e]), "%s %d", t->name, e);
                if (place == 1) continue;
                if (b < 4 && place == 0) { // counts as 0, its block lives on
                    double error = rmse(good + 257, y + 257, NULL, 255, 255);
                    CHECKF(error < 1.5 * error_bound(t->id), "%s: %g", t->name, error);
                }
                if (b == 4 || b == 5) CHECKF(b == 4 ? y[256] > 6e4f : y[256] < -6e4f, "%s %g",
                                             t->name, (double)y[256]);
                CHECK(memcmp(y, y0, 256 * sizeof(float)) == 0);
                CHECK(memcmp(y + 512, y0 + 512, 256 * sizeof(float)) == 0);
            }
        }
        for (int b = 0; b < 6; b++) {
            for (int part = 0; part < 2; part++) {
                for (int e = 0; e < N; e++) w[e] = part && e % 3 ? 1 : odd[b];
                round_trip(t, good, N, w, y);
                for (int e = 0; e < N; e++) CHECK(is_finite(y[e]));
                double error = rmse(good, y, NULL, N, N);
                if (!part) CHECKF(error <= 1.3 * error_bound(t->id), "%s: %g", t->name, error);
            }
        }
        for (float scale = 1e-45f; scale < 1e38f; scale *= 7) { // all magnitudes
            for (int e = 0; e < N; e++) x[e] = good[e] * scale;
            round_trip(t, x, N, NULL, y);
            for (int e = 0; e < N; e++) CHECK(is_finite(y[e]));
        }
    }
    free(good);
}

// ---- quantize: all types, public calls only --------------------------------------------------

// Through blocks and back, in buffers of exactly the right size; 0 if this build lacks the type.
static int there_and_back(const struct quantizable *t, const float *x, int64_t n_rows, int64_t n,
                          const float *importance, float *y) {
    moe_type type = (moe_type)t->id;
    if (!moe_type_supported(type) || moe_type_row_size(type, n) == 0) return 0;
    size_t size = (size_t)n_rows * moe_type_row_size(type, n);
    uint8_t *rows = (uint8_t *)take(size), *again = (uint8_t *)take(size);
    memset(rows, 0x55, size);
    memset(again, 0xAA, size);
    CHECK(moe_type_quantize(type, x, rows, n_rows, n, importance, NULL) == MOE_OK);
    CHECK(moe_type_quantize(type, x, again, n_rows, n, importance, NULL) == MOE_OK);
    CHECK(memcmp(rows, again, size) == 0); // deterministic, every byte written
    CHECK(moe_type_dequantize(type, rows, y, n_rows, n, NULL) == MOE_OK);
    for (int64_t e = 0; e < n_rows * n; e++)
        CHECKF(is_finite(y[e]) || t->error < 0.003, "%s %d", t->name, (int)e);
    free(rows);
    free(again);
    return 1;
}

// Against the reference quantizer, which used the importance: plain errors without and with it,
// and weighted ones.
TEST(quantizing_is_as_good_as_the_reference) {
    float *source = (float *)read_file("golden/rows/source.f32", GOLD * sizeof(float));
    float *importance = (float *)read_file("golden/rows/importance.f32", GOLD_N * sizeof(float));
    char *index = (char *)read_file("golden/rows/index.tsv", 0);
    float *y = (float *)take(GOLD * sizeof(float));
    if (!source || !importance || !index) SKIP("no golden/rows");
    for (int i = 0; i < N_QUANTIZABLE; i++) {
        const struct quantizable *t = &quantizables[i];
        char name[64];
        snprintf(name, sizeof name, "golden/rows/%s.f32", t->name);
        float *gold = (float *)read_file(name, GOLD * sizeof(float));
        CHECK(gold);
        if (!gold || !there_and_back(t, source, GOLD_ROWS, GOLD_N, NULL, y)) continue;
        double limit = 1.1 * index_rmse(index, t->name) + 1e-12;
        double weighted_limit = 1.001 * rmse(gold, source, importance, GOLD, GOLD_N);
        double plain = rmse(y, source, NULL, GOLD, GOLD_N);
        there_and_back(t, source, GOLD_ROWS, GOLD_N, importance, y);
        double with = rmse(y, source, NULL, GOLD, GOLD_N);
        double weighted = rmse(y, source, importance, GOLD, GOLD_N);
        CHECKF(plain <= limit / 1.1 * 1.001, "%s: %g > %g", t->name, plain, limit / 1.1);
        CHECKF(with <= limit, "%s with importance: %g > %g", t->name, with, limit);
        CHECKF(weighted <= weighted_limit, "%s: %g > %g", t->name, weighted, weighted_limit);
        free(gold);
    }
    free(source);
    free(importance);
    free(index);
    free(y);
}

TEST(every_quantizer_keeps_zeros_constants_and_signs) {
    enum { N = 1024 };
    float *noise = take_normal(N, 1), x[N], y[N];
    for (int i = 0; i < N_QUANTIZABLE; i++) {
        const struct quantizable *t = &quantizables[i];
        memset(x, 0, sizeof x);
        if (!there_and_back(t, x, 1, N, NULL, y)) continue;
        for (int e = 0; e < N; e++) CHECK(y[e] == 0);
        if (there_and_back(t, noise, 1, 32, NULL, y)) { // rows of one block of 32
            CHECKF(rmse(noise, y, NULL, 32, 32) <= 1.5 * t->error, "%s", t->name);
            CHECK(there_and_back(t, noise, N / 32, 32, NULL, y));
            CHECKF(rmse(noise, y, NULL, N, N) <= 1.1 * t->error, "%s", t->name);
        } else CHECK(moe_type_block((moe_type)t->id) == 256);

        for (int sign = -1; sign <= 1; sign += 2) { // constants
            for (float c = 0.2f; c < 1e3f; c *= 3.7f) {
                for (int e = 0; e < N; e++) x[e] = (float)sign * c;
                there_and_back(t, x, 1, N, NULL, y);
                // f16 scales are good to 2^-11; the levels of MXFP4 lie up to 1/3 apart
                double error = rmse(x, y, NULL, N, N), bound = t->id == 39 ? 0.2 : 0.004;
                CHECKF(error <= bound * (double)c, "%s: %g of %g", t->name, error, (double)c);
            }
        }
        for (int e = 0; e < N; e++) x[e] = noise[e] * 1e-7f; // tiny: no type makes it larger
        there_and_back(t, x, 1, N, NULL, y);
        CHECKF(rmse(x, y, NULL, N, N) <= 1.5e-7, "%s", t->name);
        for (int e = 0; e < N; e++) CHECKF(fabsf(y[e]) <= 2e-6f, "%s %g", t->name, (double)y[e]);

        for (int e = 0; e < N; e++) x[e] = noise[e] * 1e37f; // huge: right sign, large
        there_and_back(t, x, 1, N, NULL, y);
        for (int e = 0; e < N && t->error >= 0.003; e++)
            if (fabsf(noise[e]) > 0.5f && t->id != 10)
                CHECKF(y[e] * x[e] > 0 && fabsf(y[e]) > 6e4f, "%s %d: %g for %g", t->name, e,
                       (double)y[e], (double)x[e]);

        for (int e = 0; e < N; e++) x[e] = noise[e]; // NaN and infinity count as 0
        for (int e = 0; e < N; e += 37) x[e] = e % 3 ? INFINITY : e % 2 ? NAN : -INFINITY;
        if (t->error >= 0.003) {
            float zeroed[N], z[N];
            for (int e = 0; e < N; e++) zeroed[e] = is_finite(x[e]) ? x[e] : 0;
            there_and_back(t, x, 1, N, NULL, y);
            there_and_back(t, zeroed, 1, N, NULL, z);
            CHECKF(memcmp(y, z, sizeof y) == 0, "%s", t->name);
        }

        for (int e = 0; e < N; e++) x[e] = noise[e] * 0.01f; // an outlier in one row of four
        x[256 + 77] = -8;
        there_and_back(t, x, 4, 256, NULL, y);
        CHECKF(fabs(y[256 + 77] + 8.0) <= 0.4, "%s %g", t->name, (double)y[256 + 77]);
        CHECKF(rmse(x, y, NULL, 256, 256) <= 0.0115 * t->error, "%s", t->name);
        CHECKF(rmse(x + 256, y + 256, NULL, 256, 256) <= 0.03, "%s", t->name);
    }
    free(noise);
}

// ---- code books ------------------------------------------------------------------------------

static uint32_t crc32_of(const void *data, size_t size) {
    const uint8_t *p = (const uint8_t *)data;
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 0; i < size; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
    }
    return ~crc;
}
static void *ask_books(void *out) {
    *(const moe__books **)out = moe__books_get();
    return NULL;
}
TEST(code_books_have_the_checksums_of_the_sheet) { // checksums: spec/quants.md, 5.1
    pthread_t threads[4];
    const moe__books *seen[4] = {NULL, NULL, NULL, NULL};
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, ask_books, &seen[i]) == 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    const moe__books *books = moe__books_get();
    for (int i = 0; i < 4; i++) CHECK(seen[i] == books);
    CHECK(crc32_of(books->iq2xxs, sizeof books->iq2xxs) == 0x9924ff02);
    CHECK(crc32_of(books->iq2xs, sizeof books->iq2xs) == 0xfa1e1bfd);
    CHECK(crc32_of(books->iq2s, sizeof books->iq2s) == 0x25ae5bf1);
    CHECK(crc32_of(books->iq3xxs, sizeof books->iq3xxs) == 0x07ba9ed0);
    CHECK(crc32_of(books->iq3s, sizeof books->iq3s) == 0xf576e4f3);
    CHECK(crc32_of(books->signs, sizeof books->signs) == 0xffab7940);
    int8_t ones[2048 * 8]; // the checksum is of -1, 0, 1
    memcpy(ones, books->iq1s, sizeof ones);
    for (int i = 0; i < 2048 * 8; i++) {
        CHECK(ones[i] == -8 || ones[i] == 0 || ones[i] == 8);
        ones[i] = (int8_t)(ones[i] / 8);
    }
    CHECK(crc32_of(ones, sizeof ones) == 0xb85e6ccf);
}

// ---- activations -----------------------------------------------------------------------------

// The definition once more: f32 operations one by one, rounding by the C library.
static void check_act_group(const float *x, int n, const int8_t *q, float d) {
    volatile float peak = 0, inverse, product, scale;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > peak) peak = fabsf(x[i]);
    inverse = 127.0f / peak;
    scale = peak / 127.0f;
    CHECK(d == scale);
    for (int i = 0; i < n; i++) {
        product = x[i] * inverse;
        CHECKF(q[i] == (int)rint((double)product), "%d, not %g", q[i], rint((double)product));
        CHECK(fabs((double)d * q[i] - x[i]) <= 0.5001 * d);
    }
}
static void check_act32(const float *x, int64_t n, int same) {
    moe__act32 *a = (moe__act32 *)take(moe__act_size(MOE__ACT_Q32, n));
    memset(a, 0x77, moe__act_size(MOE__ACT_Q32, n));
    moe__quantize_act_q32(x, n, a);
    for (int64_t g = 0; g < (n + 255) / 256 * 8; g++) {
        const moe__act32 *r = a + g / 8;
        int8_t q[32];
        int sum = 0, any = 0;
        for (int i = 0; i < 32; i++) {
            q[i] = r->q[moe__act32_at((int)(g % 8 * 32 + i))];
            sum += q[i], any |= q[i];
        }
        CHECK(r->nsum[g % 8] == -sum);
        if (g * 32 >= n) CHECK(any == 0 && r->d[g % 8] == 0);
        else if (same) check_act_group(x + 32 * g, 32, q, r->d[g % 8]);
    }
    free(a);
}
static void check_act256(const float *x, int64_t n) {
    moe__act256 *a = (moe__act256 *)take(moe__act_size(MOE__ACT_Q256, n));
    memset(a, 0x77, moe__act_size(MOE__ACT_Q256, n));
    moe__quantize_act_q256(x, n, a);
    for (int64_t b = 0; b < n / 256; b++) {
        int8_t q[256];
        for (int i = 0; i < 256; i++) q[i] = a[b].q[moe__act256_at(i)];
        check_act_group(x + 256 * b, 256, q, a[b].d);
        for (int j = 0; j < 16; j++) {
            int sum = 0;
            for (int i = 0; i < 16; i++) sum += q[16 * j + i];
            CHECK(a[b].nsum[j] == -sum && a[b].sum16[j] == sum);
            CHECK(a[b].sum32[j / 2] == a[b].sum16[j & ~1] + a[b].sum16[j | 1]);
        }
        CHECK(a[b].pad[0] == 0 && a[b].pad[1] == 0 && a[b].pad[2] == 0);
    }
    free(a);
}
TEST(random_activations_are_rounded_as_defined) {
    const int64_t sizes[] = {32, 64, 224, 256, 288, 1408, 2880};
    for (int i = 0; i < 7; i++) {
        for (int s = -30; s <= 30; s += 6) {
            float *x = take_normal(sizes[i], (float)pow(10, s));
            check_act32(x, sizes[i], 1);
            if (sizes[i] % 256 == 0) check_act256(x, sizes[i]);
            free(x);
        }
    }
    float *x = take_normal(5120, 3);
    check_act256(x, 5120);
    free(x);
    float f[3] = {1, NAN, -0.0f}, copy[3];
    moe__quantize_act_f32(f, 3, copy);
    CHECK(memcmp(f, copy, sizeof f) == 0);
}
TEST(special_activations_are_rounded_as_defined) {
    float x[256];
    moe__act32 a;
    moe__act256 b;
    for (int i = 0; i < 256; i++) x[i] = (float)(i % 127 - 63) + 0.5f; // ties at scale 1
    for (int j = 0; j < 8; j++) x[32 * j] = j % 2 ? 127.0f : -127.0f;
    check_act32(x, 256, 1);
    check_act256(x, 256);
    moe__quantize_act_q256(x, 256, &b);
    CHECK(b.d == 1 && b.q[0] == -127 && b.q[1] == -62 && b.q[2] == -60 && b.q[3] == -60);

    memset(x, 0, sizeof x); // zeros, a single value, NaN, infinity, denormals, both limits
    x[32 + 5] = -3.0f;
    x[64 + 31] = NAN;
    x[96] = -INFINITY;
    for (int i = 128; i < 160; i++) x[i] = 1e-42f;
    x[160] = 7.52316384e-37f; // 2^-120
    x[192] = moe__f32_from_bits(0x03800000 - 1);
    x[224] = 3.4028235e38f;
    moe__quantize_act_q32(x, 256, &a);
    const int q_first[8] = {0, 0, 0, 0, 0, 127, 0, 127};
    for (int j = 0; j < 8; j++) {
        int any = 0;
        CHECKF(a.q[moe__act32_at(32 * j)] == q_first[j], "group %d", j);
        CHECKF(is_nan(a.d[j]) == (j == 2 || j == 3), "group %d: %g", j, (double)a.d[j]);
        for (int i = 0; i < 32; i++) any |= a.q[moe__act32_at(32 * j + i)];
        if (j == 0 || j == 2 || j == 3 || j == 4 || j == 6) CHECK(any == 0 && a.nsum[j] == 0);
    }
    CHECK(a.d[0] == 0 && a.d[4] == 0 && a.d[6] == 0 && a.d[5] > 0);
    CHECK(a.d[1] == 3.0f / 127.0f && a.q[moe__act32_at(37)] == -127 && a.nsum[1] == 127);
    CHECK(a.d[7] == 3.4028235e38f / 127.0f && a.nsum[7] == -127);
    CHECK(moe__f32_bits(a.d[2]) == 0x7FC00000 && moe__f32_bits(a.d[3]) == 0x7FC00000);
    moe__quantize_act_q256(x, 256, &b);
    CHECK(moe__f32_bits(b.d) == 0x7FC00000);
    for (int i = 0; i < 256; i++) CHECK(b.q[i] == 0 && b.sum16[i / 16] == 0 && b.nsum[i / 16] == 0);
    memset(x, 0, sizeof x);
    moe__quantize_act_q256(x, 256, &b);
    CHECK(b.d == 0 && b.q[0] == 0);
}

// x * inverse rounded to f32 is a tie, the exact product is not: a compiler that fuses the
// product with what rounds it to an integer would get half of these wrong.
TEST(products_of_activations_round_to_f32_first) {
    int found = 0;
    for (int i = 0; i < 300; i++) {
        float x[256], peak = (float)(1 + random_unit());
        volatile float inverse = 127.0f / peak;
        memset(x, 0, sizeof x);
        x[0] = peak;
        for (int k = 1; k < 256; k++) {
            double tie = (double)(k % 126) + 0.5;
            volatile float value = (float)(tie / (double)inverse), product = value * inverse;
            if (product == (float)tie && (double)value * (double)inverse != tie)
                x[k] = value, found++;
        }
        check_act32(x, 256, 1);
        check_act256(x, 256);
    }
    CHECKF(found > 5000, "%d", found);
}

// ---- dot -------------------------------------------------------------------------------------

static void check_dot(const moe__type *t, int64_t n) {
    enum { GROUPS = 2 };
    int n_rows = GROUPS * t->rows;
    size_t size = moe_type_row_size(t->id, n);
    uint8_t *rows = (uint8_t *)take((size_t)n_rows * size);
    float *x = take_normal(n, 2), *out = (float *)take((size_t)n_rows * sizeof(float));
    void *act = take_acts(t, x, n);
    sheet_random(t, rows, size, n_rows, n, 0);
    plain_of(t)->dot(rows, size, n_rows, n, act, out);
    for (int r = 0; r < n_rows; r++) {
        const uint8_t *group = rows + (size_t)(r - r % t->rows) * size;
        double terms, sum = sheet_dot(t, group, r % t->rows, n, act, &terms);
        double bound = t->meta == 4 ? 2.4e-7 : 1.2e-7; // a rounding; of f32 scales two
        CHECKF(fabs(out[r] - sum) <= bound * terms, "%s %d: %g, not %g", t->name, (int)n,
               (double)out[r], sum);
        CHECK(terms > 0);
    }
    free(rows);
    free(x);
    free(act);
    free(out);
}
TEST(dot_products_agree_with_the_sheet) {
    const int64_t n32[] = {32, 64, 96, 256, 288, 1408, 2880}, n256[] = {256, 512, 2048, 7168};
    const int64_t n1[] = {1, 2, 3, 5, 31, 63, 1408};
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (!sheet_knows(t->id)) continue;
        for (int k = 0; k < 7; k++) {
            if (t->block == 1) check_dot(t, n1[k]);
            if (t->block <= 64 && n32[k] % t->block == 0) check_dot(t, n32[k]);
            if (k < 4) check_dot(t, n256[k]);
        }
    }
}

// All scales 1: sums are eighths of integers, exact in floats up to 2^24 eighths.
TEST(dot_products_of_integers_are_exact) {
    enum { N = 512 };
    const uint8_t fill[] = {0x00, 0xFF, 0x80, 0x7F};
    float x[N], out[8];
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        if (is_float(t) || !sheet_knows(t->id)) continue;
        size_t size = moe_type_row_size(t->id, N);
        uint8_t *group = (uint8_t *)take(group_size(t, N));
        for (int trial = 0; trial < 24; trial++) {
            for (int e = 0; e < N; e++)
                x[e] = trial % 3 == 0 ? 127 : trial % 3 == 1 ? -127
                                                             : (float)(random_u32() % 255) - 127;
            for (int e = 0; e < N; e += 32) x[e] = x[e] < 0 ? -127 : 127; // makes the scale 1
            void *act = take_acts(t, x, N);
            if (trial < 12) memset(group, fill[trial / 3], group_size(t, N));
            else sheet_random(t, group, size, t->rows, N, 1);
            sheet_put_all(t, group, size, t->rows, N, 1);
            plain_of(t)->dot(group, size, t->rows, N, act, out);
            for (int k = 0; k < t->rows; k++) {
                double terms, want = sheet_dot(t, group, k, N, act, &terms);
                double bound = terms < 0x1p21 ? 0 : 1.2e-7 * terms;
                CHECKF(fabs(out[k] - want) <= bound, "%s row %d: %.2f, not %.2f", t->name, k,
                       (double)out[k], want);
            }
            free(act);
        }
        free(group);
    }
}

TEST(nan_in_a_scale_spoils_its_row_in_activations_all) {
    enum { N = 512 };
    const float values[] = {NAN, INFINITY, -INFINITY};
    float *x = take_normal(N, 1), y[8 * N], out[8];
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        size_t size = moe_type_row_size(t->id, N);
        uint8_t *group = random_group(t, N);
        x[3] = NAN; // in the activations
        void *act = take_acts(t, x, N);
        plain_of(t)->dot(group, size, t->rows, N, act, out);
        for (int k = 0; k < t->rows; k++) CHECKF(is_nan(out[k]), "%s: %g", t->name, (double)out[k]);
        free(act);
        x[3] = 1;
        act = take_acts(t, x, N);
        plain_of(t)->dot(group, size, t->rows, N, act, out);
        for (int k = 0; k < t->rows; k++) CHECK(is_finite(out[k]));
        for (int v = 0; v < 3 && sheet_may_be_nan(t); v++) { // in the scales of one row
            int bad = v % t->rows;
            sheet_random(t, group, size, t->rows, N, 0);
            sheet_put(t, group, bad, N / t->block - 1, values[v], values[v]);
            plain_of(t)->dot(group, size, t->rows, N, act, out);
            plain_of(t)->dequantize(group, N, y);
            for (int k = 0; k < t->rows; k++)
                CHECKF(is_finite(out[k]) == (k != bad) && (v || k != bad || is_nan(out[k])),
                       "%s row %d: %g", t->name, k, (double)out[k]);
            for (int e = 0; e < t->rows * N; e++)
                CHECKF(is_finite(y[e]) || e / N == bad, "%s %d", t->name, e);
        }
        memset(group, 0xFF, group_size(t, N)); // NaN for most types
        plain_of(t)->dot(group, size, t->rows, N, act, out);
        plain_of(t)->dequantize(group, N, y);
        double terms;
        sheet_dot(t, group, 0, N, act, &terms);
        if (sheet_may_be_nan(t)) CHECK(is_nan(out[0]) && is_nan(y[0]));
        else CHECK((!is_nan(out[0]) || terms > 3e38) && !is_nan(y[0]));
        free(act);
        free(group);
    }
    free(x);
}

// ---- public calls ----------------------------------------------------------------------------

static int refused(moe_status status, moe_status want, const moe_error *error, const char *where) {
    int good = status == want && error->status == want && error->text[0] &&
               strcmp(error->where, where) == 0;
    if (!good) printf("    %s, where %s: %s\n", moe_status_name(status), error->where, error->text);
    return good;
}
TEST(wrong_arguments_are_refused) {
    const moe_type q4 = MOE_TYPE_Q4_K;
    const moe_status bad = MOE_ERROR_ARGUMENT;
    float *x = take_normal(512, 1), *y = (float *)take(512 * sizeof(float));
    uint8_t rows[2 * 288];
    moe_error e;
#define QUANTIZE(type, in, out, n_rows, n) (memset(&e, 0, sizeof e), \
    moe_type_quantize(type, in, out, n_rows, n, NULL, &e))
#define DEQUANTIZE(type, in, out, n_rows, n) (memset(&e, 0, sizeof e), \
    moe_type_dequantize(type, in, out, n_rows, n, &e))
    CHECK(refused(QUANTIZE(q4, NULL, rows, 1, 256), bad, &e, "in"));
    CHECK(refused(QUANTIZE(q4, x, NULL, 1, 256), bad, &e, "rows"));
    CHECK(refused(QUANTIZE(q4, x, rows, -1, 256), bad, &e, "n_rows"));
    CHECK(refused(QUANTIZE(q4, x, rows, INT64_MIN, 256), bad, &e, "n_rows"));
    CHECK(refused(QUANTIZE(q4, x, rows, 1, 0), bad, &e, "n"));
    CHECK(refused(QUANTIZE(q4, x, rows, 1, -256), bad, &e, "n"));
    CHECK(refused(QUANTIZE(q4, x, rows, 1, 128), bad, &e, "n"));
    CHECK(refused(QUANTIZE(q4, x, rows, INT64_MAX, 256), bad, &e, "n_rows"));
    CHECK(refused(QUANTIZE(MOE_TYPE_F16, x, rows, 1, INT64_MAX), bad, &e, "n"));
    CHECK(refused(QUANTIZE(q4, x, rows, (int64_t)1 << 54, 256), bad, &e, "n_rows"));
    CHECK(refused(QUANTIZE((moe_type)9, x, rows, 1, 256), MOE_ERROR_UNSUPPORTED, &e, "type"));
    CHECK(strstr(e.text, "Q8_1"));
    CHECK(refused(QUANTIZE((moe_type)77, x, rows, 1, 256), MOE_ERROR_UNSUPPORTED, &e, "type"));
    CHECK(refused(DEQUANTIZE(q4, NULL, y, 1, 256), bad, &e, "rows"));
    CHECK(refused(DEQUANTIZE(q4, rows, NULL, 1, 256), bad, &e, "out"));
    CHECK(refused(DEQUANTIZE(q4, rows, y, -1, 256), bad, &e, "n_rows"));
    CHECK(refused(DEQUANTIZE(q4, rows, y, 1, 300), bad, &e, "n"));
    CHECK(refused(DEQUANTIZE(MOE_TYPE_Q8_0, rows, y, 1, INT64_MIN), bad, &e, "n"));
    CHECK(refused(DEQUANTIZE(MOE_TYPE_ANY_ID, rows, y, 1, 256), MOE_ERROR_UNSUPPORTED, &e, "type"));
    CHECK(moe_type_quantize(q4, NULL, rows, 1, 256, NULL, NULL) == bad);
    CHECK(moe_type_dequantize((moe_type)4, rows, y, 1, 256, NULL) == MOE_ERROR_UNSUPPORTED);

    for (int i = 0; i < MOE__N_TYPES; i++) { // no quantizer; rows of a group
        const moe__type *t = &moe__types[i];
        uint8_t *group = random_group(t, 256);
        float values[8 * 256];
        if (!t->quantize) {
            CHECK(refused(QUANTIZE(t->id, x, group, t->rows, 256), MOE_ERROR_UNSUPPORTED, &e,
                          "type"));
            CHECK(strstr(e.text, t->name));
        }
        for (int n = 1; n < t->rows; n++) {
            CHECK(refused(DEQUANTIZE(t->id, group, values, n, 256), bad, &e, "n_rows"));
            CHECK(strstr(e.text, t->name));
        }
        CHECK(DEQUANTIZE(t->id, group, values, t->rows, 256) == MOE_OK);
        CHECK(DEQUANTIZE(t->id, group, values, 0, 256) == MOE_OK);
        if (t->block > 1)
            CHECK(refused(DEQUANTIZE(t->id, group, values, t->rows, t->block + 1), bad, &e, "n"));
        free(group);
    }

    memset(&e, 0x5A, sizeof e); // success leaves it alone
    moe_error untouched = e;
    CHECK(moe_type_quantize(q4, x, rows, 2, 256, NULL, &e) == MOE_OK);
    CHECK(moe_type_dequantize(q4, rows, y, 2, 256, &e) == MOE_OK);
    CHECK(moe_type_dequantize(q4, rows, y, 0, 256, &e) == MOE_OK);
    CHECK(memcmp(&e, &untouched, sizeof e) == 0);
    uint8_t second[144]; // rows do not depend on each other
    CHECK(moe_type_quantize(q4, x + 256, second, 1, 256, NULL, NULL) == MOE_OK);
    CHECK(memcmp(second, rows + 144, 144) == 0);
    free(x);
    free(y);
}

// ---- the plain C kernel table ----------------------------------------------------------------

TEST(a_scalar_tile_has_the_bits_of_the_dot) {
    enum { TOKENS = 4, N = 256, STRIDE = 19 };
    uint8_t *pack = (uint8_t *)take(MOE__PACK_SIZE);
    for (int i = 0; i < MOE__N_TYPES; i++) {
        const moe__type *t = &moe__types[i];
        int n_rows = t->rows * (t->rows == 1 ? 5 : 2);
        size_t size = moe_type_row_size(t->id, N);
        uint8_t *rows = (uint8_t *)take((size_t)n_rows * size);
        const void *x[TOKENS];
        float out[TOKENS * STRIDE], want[STRIDE];
        sheet_random(t, rows, size, n_rows, N, 0);
        for (int k = 0; k < TOKENS; k++) {
            float *f = take_normal(N, 1);
            x[k] = take_acts(t, f, N);
            free(f);
        }
        for (int k = 0; k < TOKENS * STRIDE; k++) out[k] = 77;
        plain_of(t)->tile(rows, size, n_rows, N, x, TOKENS, out, STRIDE, pack, NULL, 0);
        for (int k = 0; k < TOKENS; k++) {
            for (int r = 0; r < STRIDE; r++) want[r] = 77;
            plain_of(t)->dot(rows, size, n_rows, N, x[k], want);
            CHECKF(memcmp(out + k * STRIDE, want, sizeof want) == 0, "%s", t->name);
            free((void *)(uintptr_t)x[k]);
        }
        free(rows);
    }
    free(pack);
}

TEST(scalar_float_kernels_match_double_precision) {
    enum { N = 1000 };
    const moe__kernels *k = &moe__kernels_scalar;
    float *x = take_normal(N, 3), *w = take_normal(N, 1), y[N];
    uint16_t h[N];
    double sum = 0, max = -1e30;
    for (int i = 0; i < N; i++) sum += (double)x[i] * x[i];
    double scale = 1 / sqrt(sum / N + 1e-5);
    k->rms_norm(x, w, N, 1e-5f, y);
    for (int i = 0; i < N; i++) CHECK(fabs(y[i] - x[i] * scale * w[i]) <= 3e-7 * fabs(y[i]));
    k->rms_norm(x, NULL, N, 1e-5f, y);
    for (int i = 0; i < N; i++) CHECK(fabs(y[i] - x[i] * scale) <= 3e-7 * fabs(y[i]));
    memcpy(y, x, sizeof y);
    k->rms_norm(y, NULL, N, 1e-5f, y);
    CHECK(fabs(y[5] - x[5] * scale) <= 3e-7 * fabs(y[5]));

    k->swiglu(x, w, N, y);
    for (int i = 0; i < N; i++) {
        double want = x[i] / (1 + exp(-(double)x[i])) * w[i];
        CHECK(fabs(y[i] - want) <= 1e-6 * fabs(want));
    }
    float ends[2] = {-1000, 1000}, ones[2] = {1, 1};
    k->swiglu(ends, ones, 2, ends);
    CHECK(ends[0] == 0 && ends[1] == 1000);

    memcpy(y, x, sizeof y);
    k->softmax(y, N);
    for (int i = 0; i < N; i++) max = x[i] > max ? x[i] : max;
    sum = 0;
    for (int i = 0; i < N; i++) sum += exp(x[i] - max);
    for (int i = 0; i < N; i++) CHECK(fabs(y[i] - exp(x[i] - max) / sum) <= 3e-6 * y[i]);
    float some[3] = {-INFINITY, 1e4f, -INFINITY}, none[3] = {-INFINITY, -INFINITY, -INFINITY};
    float dirty[3] = {1, NAN, 2};
    k->softmax(some, 3);
    CHECK(some[0] == 0 && some[1] == 1 && some[2] == 0);
    k->softmax(none, 3);
    k->softmax(dirty, 3);
    for (int i = 0; i < 3; i++) CHECK(is_nan(none[i]) && is_nan(dirty[i]));

    memcpy(y, w, sizeof y);
    k->axpy(0.5f, x, N, y);
    for (int i = 0; i < N; i++) CHECK(fabs(y[i] - (w[i] + 0.5 * x[i])) <= 1e-6);
    k->f32_to_f16(x, N, h);
    for (int i = 0; i < N; i++) CHECK(h[i] == moe__f32_to_f16(x[i]));
    free(x);
    free(w);
}

// Attention over blocks of keys against the formula in double.
enum { AT_Q = 3, AT_K = 37, AT_DK = 24, AT_DV = 10, AT_STRIDE = 11 };
typedef struct attend_case {
    float q[AT_Q * 30], k[AT_K * AT_DK], v[AT_K * AT_DV];
    uint16_t k16[AT_K * AT_DK], v16[AT_K * AT_DV];
    float scores[AT_Q * MOE__ATTEND_KEYS], max[AT_Q], sum[AT_Q], out[AT_Q * AT_STRIDE];
    float *rows[AT_Q];
    moe__attend_args args;
} attend_case;
static attend_case *attend_new(int f32) {
    attend_case *c = (attend_case *)take(sizeof *c);
    memset(c, 0, sizeof *c);
    for (int i = 0; i < AT_Q * 30; i++) c->q[i] = random_normal() * 0.4f;
    for (int i = 0; i < AT_K * AT_DK; i++)
        c->k[i] = moe__f16_to_f32(c->k16[i] = moe__f32_to_f16(random_normal()));
    for (int i = 0; i < AT_K * AT_DV; i++)
        c->v[i] = moe__f16_to_f32(c->v16[i] = moe__f32_to_f16(random_normal()));
    for (int i = 0; i < AT_Q; i++) c->max[i] = -INFINITY, c->rows[i] = c->out + i * AT_STRIDE;
    moe__attend_args *a = &c->args;
    a->q = c->q;
    a->q_stride = 30;
    a->type = f32 ? MOE_KV_F32 : MOE_KV_F16;
    a->k_bytes = (f32 ? 4 : 2) * AT_DK;
    a->v_bytes = (f32 ? 4 : 2) * AT_DV;
    a->dk = AT_DK;
    a->dv = AT_DV;
    a->n_queries = AT_Q;
    a->max = c->max;
    a->sum = c->sum;
    a->out = c->rows;
    a->scores = c->scores;
    return c;
}
// Keys begin .. begin + n - 1; visible[i] counts from 0.
static void attend_block(attend_case *c, int begin, int n, const int *visible) {
    int32_t here[AT_Q];
    for (int i = 0; i < AT_Q; i++)
        here[i] = (int32_t)moe__min(n, moe__max(0, visible ? visible[i] - begin : n));
    const int f32 = c->args.type == MOE_KV_F32;
    c->args.k = f32 ? (void *)(c->k + begin * AT_DK) : (void *)(c->k16 + begin * AT_DK);
    c->args.v = f32 ? (void *)(c->v + begin * AT_DV) : (void *)(c->v16 + begin * AT_DV);
    c->args.n_keys = n;
    c->args.n_visible = visible ? here : NULL;
    moe__kernels_scalar.attend(&c->args);
}
static void attend_check(const attend_case *c, const int *visible) {
    for (int i = 0; i < AT_Q; i++) {
        double score[AT_K], max = -INFINITY, sum = 0;
        int n = visible ? visible[i] : AT_K;
        for (int j = 0; j < n; j++) {
            score[j] = 0;
            for (int d = 0; d < AT_DK; d++)
                score[j] += (double)c->q[30 * i + d] * c->k[j * AT_DK + d];
            if (score[j] > max) max = score[j];
        }
        for (int j = 0; j < n; j++) sum += exp(score[j] - max);
        CHECK(n == 0 ? c->max[i] == -INFINITY : fabs(c->max[i] - max) < 1e-6);
        CHECKF(fabs(c->sum[i] - sum) <= 2e-6 * sum, "%g, not %g", (double)c->sum[i], sum);
        for (int d = 0; d < AT_STRIDE; d++) {
            double want = 0;
            for (int j = 0; j < n && d < AT_DV; j++)
                want += exp(score[j] - max) * c->v[j * AT_DV + d];
            CHECKF(fabs(c->out[i * AT_STRIDE + d] - want) <= 3e-6 * (1 + sum), "%d %d", i, d);
        }
    }
}
TEST(scalar_attention_matches_double_precision) {
    const int visible[AT_Q] = {37, 20, 0}, blocks[] = {0, 1, 9, 20, 21, 37};
    for (int f32 = 0; f32 < 2; f32++) {
        attend_case *c = attend_new(f32);
        attend_block(c, 0, AT_K, NULL);
        attend_check(c, NULL);
        free(c);
        for (int masked = 0; masked < 2; masked++) {
            c = attend_new(f32);
            for (int b = 0; b < 5; b++)
                attend_block(c, blocks[b], blocks[b + 1] - blocks[b], masked ? visible : NULL);
            attend_check(c, masked ? visible : NULL);
            free(c);
        }
    }
}
TEST(scalar_attention_ignores_minus_infinity_but_not_nan) {
    attend_case *c = attend_new(1);
    for (int d = 0; d < AT_DK; d++) c->q[d] = 1, c->q[30 + d] = 1, c->k[AT_DK + d] = 0;
    c->k[AT_DK] = -INFINITY; // key 1 has the score -inf
    for (int d = 0; d < AT_DV; d++) c->v[AT_DV + d] = 1e30f;
    attend_block(c, 1, 1, NULL); // nothing but it: as if nothing had been seen
    CHECK(c->max[0] == -INFINITY && c->sum[0] == 0 && c->out[0] == 0);
    attend_block(c, 0, 3, NULL); // among others: weight 0
    CHECK(is_finite(c->out[0]) && fabsf(c->out[0]) < 100 && c->sum[0] >= 1);
    c->k[3 * AT_DK] = NAN; // a NaN is never lost
    attend_block(c, 3, 1, NULL);
    attend_block(c, 4, 10, NULL);
    for (int i = 0; i < AT_Q; i++) CHECK(is_nan(c->sum[i]) && is_nan(c->out[i * AT_STRIDE]));
    free(c);
    c = attend_new(1);
    c->k[0] = NAN; // also if nothing else is in its block
    attend_block(c, 0, 1, NULL);
    attend_block(c, 1, 10, NULL);
    for (int i = 0; i < AT_Q; i++) CHECK(is_nan(c->sum[i]) && is_nan(c->out[i * AT_STRIDE]));
    free(c);
}

MAIN()
