// Chat templates: JSON, the template language, requests to text and tokens. Hostile templates and
// requests, failing allocations, mutations of real ones (test_chat --fuzz N [SEED]: so many).
#include "steps.h"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "gguf_edit.h"
#include "meter.h"
#include <dirent.h>
#include <sys/mman.h>

#define GOLDEN "../shared/golden/chat/"
#define VOCABS "../shared/vocab/"

// ---- vocabularies ----------------------------------------------------------------------------

static edit_image joined; // the arrays of a file that is put together

// A vocabulary of all bytes and the control tokens named (NULL ends them), from 256 on; then the
// keys and values, two strings each. The first two tokens are BOS and EOS.
static uint8_t add_bos; // what the file says
static moe_vocab *open_vocab(const char *const *controls, const char *const *values,
                             const moe_allocator *allocator, moe_error *error) {
    static edit_file file;
    edit_image tokens = {NULL, 0, 0}, types = {NULL, 0, 0}, strings[8];
    uint32_t n = 256, bos = 256, eos = 257;
    uint64_t none[2] = {8, 0}; // an array of no strings
    memset(&file, 0, sizeof file);
    memset(strings, 0, sizeof strings);
    while (controls[n - 256]) n++;
    edit_put(&tokens, 8, 4);
    edit_put(&tokens, n, 8);
    edit_put(&types, 5, 4);
    edit_put(&types, n, 8);
    for (uint32_t i = 0; i < n; i++) {
        char name[3] = {0};
        if (i < 256) moe__text_byte_name((unsigned char)i, name);
        edit_put_string(&tokens, i < 256 ? name : controls[i - 256]);
        edit_put(&types, i < 256 ? 1 : 3, 4);
    }
    edit_put(&strings[0], 4, 8);
    edit_put_bytes(&strings[0], "gpt2", 4);
    edit_set(&file, "tokenizer.ggml.model", 8, strings[0].data, strings[0].size);
    edit_set(&file, "tokenizer.ggml.tokens", 9, tokens.data, tokens.size);
    edit_set(&file, "tokenizer.ggml.token_type", 9, types.data, types.size);
    memmove((char *)none + 4, (char *)none + 8, 8);
    edit_set(&file, "tokenizer.ggml.merges", 9, none, 12);
    edit_set(&file, "tokenizer.ggml.bos_token_id", 4, &bos, 4);
    edit_set(&file, "tokenizer.ggml.eos_token_id", 4, &eos, 4);
    edit_set(&file, "tokenizer.ggml.add_bos_token", 7, &add_bos, 1);
    for (int i = 1; values && values[0] && i < 8; i++, values += 2) {
        edit_put_string(&strings[i], values[1]);
        edit_set(&file, values[0], 8, strings[i].data, strings[i].size);
    }
    joined = edit_build(&file);
    moe_gguf_options options;
    memset(&options, 0, sizeof options);
    if (allocator) options.allocator = *allocator;
    moe_gguf *gguf = moe_gguf_open_memory(joined.data, joined.size, &options, error);
    moe_vocab *vocab = gguf ? moe_vocab_open(gguf, error) : NULL;
    moe_gguf_close(gguf);
    free(joined.data);
    for (int i = 0; i < 8; i++) free(strings[i].data);
    free(tokens.data);
    free(types.data);
    return vocab;
}

static const char *const usual_controls[] = {"<BOS>", "<EOS>", "<|im_start|>", "<|im_end|>", NULL};

static moe_vocab *open_usual(const char *chat_template) {
    const char *values[] = {"tokenizer.chat_template", chat_template, NULL};
    moe_error error;
    memset(&error, 0, sizeof error);
    moe_vocab *vocab = open_vocab(usual_controls, chat_template ? values : NULL, NULL, &error);
    CHECKF(vocab, "%s: %s", error.where, error.text);
    return vocab;
}

// ---- files and requests ----------------------------------------------------------------------

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *text = (char *)malloc(*size + 1);
    if (text && fread(text, 1, *size, file) != *size) *size = 0;
    fclose(file);
    if (text) text[*size] = 0;
    return text;
}

typedef struct real_template {
    char name[80];
    char *text;
    size_t size;
} real_template;

enum { MAX_TEMPLATES = 100, N_TEMPLATES = 70, N_CASES = 10 };
static real_template real_templates[MAX_TEMPLATES];
static int n_real;

static int compare_templates(const void *a, const void *b) {
    return strcmp(((const real_template *)a)->name, ((const real_template *)b)->name);
}
static void free_real(void) {
    for (int i = 0; i < n_real; i++) free(real_templates[i].text);
}
// The templates of GOLDEN in alphabetical order, how many there are.
static int find_real(void) {
    DIR *folder = n_real ? NULL : opendir(GOLDEN);
    for (struct dirent *entry; folder && (entry = readdir(folder)) != NULL;) {
        real_template *t = &real_templates[n_real];
        const char *end = strstr(entry->d_name, ".jinja");
        char path[512];
        if (!end || end - entry->d_name >= (int)sizeof t->name || n_real == MAX_TEMPLATES) continue;
        snprintf(path, sizeof path, GOLDEN "%s", entry->d_name);
        snprintf(t->name, sizeof t->name, "%.*s", (int)(end - entry->d_name), entry->d_name);
        t->text = read_file(path, &t->size);
        n_real += t->text != NULL;
    }
    if (!folder) return n_real;
    closedir(folder);
    atexit(free_real);
    qsort(real_templates, (size_t)n_real, sizeof real_templates[0], compare_templates);
    return n_real;
}

// Text that grows.
typedef struct text {
    char *p;
    size_t n, max;
} text;

static void add_bytes(text *t, const char *bytes, size_t n) {
    if (t->n + n + 1 > t->max) {
        t->max = 2 * (t->n + n) + 64;
        t->p = (char *)realloc(t->p, t->max);
        if (!t->p) exit(1);
    }
    memcpy(t->p + t->n, bytes, n);
    t->n += n;
    t->p[t->n] = 0;
}
static void add(text *t, const char *words) { add_bytes(t, words, strlen(words)); }
static void add_times(text *t, const char *words, size_t times) {
    while (times--) add(t, words);
}
// As a string of JSON; what is no UTF-8 goes as it is.
static void add_json(text *t, const char *bytes, size_t n) {
    add(t, "\"");
    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)bytes[i];
        char escape[8] = {(char)c, 0};
        if (c == '"' || c == '\\') snprintf(escape, sizeof escape, "\\%c", c);
        else if (c < 0x20) snprintf(escape, sizeof escape, "\\u%04x", c);
        add_bytes(t, escape, c < 0x20 || c == '"' || c == '\\' ? strlen(escape) : 1);
    }
    add(t, "\"");
}

// What a call gave: a text, or an error.
typedef struct result {
    int64_t n;
    char *text; // NULL: an error
    moe_error error;
} result;

static result format(const moe_vocab *vocab, const char *request, size_t size) {
    result r;
    memset(&r, 0, sizeof r);
    clear_error(&r.error);
    r.n = moe_chat_format(vocab, request, size, NULL, 0, &r.error);
    if (r.n < 0) {
        CHECK(r.error.status == (moe_status)-r.n && r.error.text[0]);
        return r;
    }
    CHECK(r.error.status == (moe_status)-1);
    r.text = (char *)malloc((size_t)r.n + 1);
    if (!r.text) exit(1);
    const int64_t again = moe_chat_format(vocab, request, size, r.text, (size_t)r.n, &r.error);
    CHECK(again == r.n);
    r.text[r.n] = 0;
    return r;
}

// A request that begins with '{' and a template as a request.
static text with_template(const char *request, const char *source, size_t size) {
    text t = {NULL, 0, 0};
    add(&t, "{\"now\": \"2026-03-14T15:09:26\", \"chat_template\": ");
    add_json(&t, source, size);
    add(&t, ", ");
    add(&t, request + 1);
    return t;
}
static result format_with(const moe_vocab *vocab, const char *request, const char *source) {
    text t = with_template(request, source, strlen(source));
    const result r = format(vocab, t.p, t.n);
    free(t.p);
    return r;
}

#define EMPTY "{\"messages\": []}"

// ---- real templates --------------------------------------------------------------------------

// Values of a file of JSON, in a store of their own.
typedef struct json_file {
    moe__store store;
    moe_allocator allocator;
    char *text;
    moe__value value;
} json_file;

static int open_json(json_file *f, const char *path) {
    size_t size;
    moe_error error;
    memset(f, 0, sizeof *f);
    f->text = read_file(path, &size);
    if (!f->text) return 0;
    moe__allocator_init(&f->allocator, NULL, NULL);
    moe__store_init(&f->store, &f->allocator, 1 << 28, 1 << 30, 200);
    CHECK(moe__json_read(&f->store, f->text, size, &f->value, &error) == MOE_OK);
    CHECK(f->value.kind == MOE__VALUE_DICT);
    return f->value.kind == MOE__VALUE_DICT;
}
static void close_json(json_file *f) {
    moe__store_free(&f->store);
    free(f->text);
}
static moe__value *member(json_file *f, moe__value dict, const char *key) {
    return moe__dict_get(&f->store, dict, key);
}

// The cases as texts of JSON.
typedef struct written {
    moe__store *store;
    moe__value value;
    text out;
} written;
static void write_work(void *of) {
    written *w = (written *)of;
    moe__json_style style;
    memset(&style, 0, sizeof style);
    moe__builder b = moe__builder_of(w->store);
    moe__json_write(&b, w->value, &style, 0);
    add_bytes(&w->out, b.text, b.size);
}
static text write_json(moe__store *store, moe__value value) {
    written w;
    memset(&w, 0, sizeof w);
    w.store = store;
    w.value = value;
    CHECK(moe__store_try(store, write_work, &w, NULL) == MOE_OK);
    return w.out;
}

static void check_real(const real_template *t, const char *name, const result *r,
                       const moe__value *wanted, int *raised) {
    if (!wanted) {
        CHECKF(0, "%s, %s: nothing is expected", t->name, name);
    } else if (wanted->kind == MOE__VALUE_STRING) {
        CHECKF(r->text && (uint64_t)r->n == wanted->size &&
                   !memcmp(r->text, wanted->as.text, (size_t)r->n),
               "%s, %s: %.300s", t->name, name, r->text ? r->text : r->error.text);
    } else {
        const moe__value *words = &wanted->as.dict->entries[0].value;
        ++*raised;
        CHECKF(!r->text, "%s, %s: no error", t->name, name);
        if (words->kind != MOE__VALUE_STRING || r->text) return;
        text message = {NULL, 0, 0};
        add_bytes(&message, words->as.text, (size_t)words->size);
        if (message.n > 150) message.p[150] = 0; // error texts are cut
        CHECKF(strstr(r->error.text, message.p), "%s, %s: %s", t->name, name, r->error.text);
        free(message.p);
    }
}

TEST(templates_of_real_models_give_the_texts_of_jinja2) {
    json_file cases, expected;
    int raised = 0, checked = 0;
    if (!find_real() || !open_json(&cases, GOLDEN "cases.json")) SKIP("no " GOLDEN);
    if (!open_json(&expected, GOLDEN "expected.json")) SKIP("no " GOLDEN "expected.json");
    CHECK(n_real == N_TEMPLATES && cases.value.as.dict->n == N_CASES);
    moe_vocab *vocab = open_usual(NULL);
    for (int i = 0; i < n_real; i++) {
        const real_template *t = &real_templates[i];
        const moe__value *texts = member(&expected, expected.value, t->name);
        moe_vocab *own = open_usual(t->text);
        CHECK(texts != NULL && own != NULL);
        const moe_string kept = moe_chat_template(own, NULL);
        CHECK(kept.size == t->size && !memcmp(kept.data, t->text, t->size));
        for (uint64_t c = 0; c < cases.value.as.dict->n && texts; c++) {
            char name[64];
            const moe__pair *one = &cases.value.as.dict->entries[c];
            snprintf(name, sizeof name, "%.*s", (int)one->key.size, one->key.as.text);
            text request = write_json(&cases.store, one->value);
            text whole = with_template(request.p, t->text, t->size);
            result r = format(vocab, whole.p, whole.n);
            check_real(t, name, &r, member(&expected, *texts, name), &raised);
            checked++;
            free(r.text);
            free(whole.p);
            // the same template from the file
            memset(&whole, 0, sizeof whole);
            add(&whole, "{\"now\": \"2026-03-14T15:09:26\", ");
            add(&whole, request.p + 1);
            int ignored = 0;
            r = format(own, whole.p, whole.n);
            check_real(t, name, &r, member(&expected, *texts, name), &ignored);
            free(r.text);
            free(whole.p);
            free(request.p);
        }
        moe_vocab_close(own);
    }
    printf("  %d texts, %d of them errors\n", checked, raised);
    CHECK(checked == N_TEMPLATES * N_CASES && raised == 20);
    moe_vocab_close(vocab);
    close_json(&cases);
    close_json(&expected);
}

// ---- the language ----------------------------------------------------------------------------

// Variables of the templates below.
static const char language_request[] =
    "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant"
     "\", \"content\": \"Yo\", \"n\": 3}], \"l\": [3, 1, 2, 2], \"d\": {\"b\": 1, \"a\":"
     " [1, {\"x\": null}], \"items\": 7}, \"s\": \"Hello, World\", \"u\": \"\303\204\303"
     "\237\344\270\255\360\237\230\200\", \"f\": 2.5, \"t\": true, \"z\": null, \"deep\""
     ": [{\"v\": 1, \"c\": [{\"v\": 2, \"c\": [{\"v\": 3, \"c\": []}]}]}, {\"v\": 4, \"c"
     "\": []}], \"rows\": [{\"n\": \"b\", \"g\": \"x\", \"v\": 2}, {\"n\": \"A\", \"g\":"
     " \"y\", \"v\": 1}, {\"n\": \"a\", \"g\": \"x\"}], \"ml\": \"one\\ntwo\\n\\n three"
     "\\n\"}";

// A template and what Jinja2 3.1.6 makes of it with transformers' settings; where that is an error:
// what our error says, which holds Jinja2's words but where these tell of Python.
static const struct {
    const char *source, *text;
    int is_error;
} language[] = {
    // white space
    {"a\n{% if t %}\n  b\n{% endif %}\nc",
     "a\n  b\nc", 0},
    {"  {% if t %}  x  {% endif %}  \n y",
     "  x    \n y", 0},
    {"a  {%- if t -%}  b  {%- endif -%}  c",
     "abc", 0},
    {"a\n  {%+ if t %} b{% endif %}",
     "a\n   b", 0},
    {"a\n  {{- 1 -}}  \n b",
     "a1b", 0},
    {"{{ 1 }}\n{{ 2 }}\n\n",
     "1\n2\n", 0},
    {"a {# c #} b\n{# c #}\nd\n  {#- e -#}  f",
     "a  b\ndf", 0},
    {"{% raw %}{{ x }}{% y %}{% endraw %}|{%- raw -%} a {% endraw %}",
     "{{ x }}{% y %}|a ", 0},
    {"{% set x = 1 %}\n  \n{{ x }}\n\n",
     "  \n1\n", 0},
    {"a\r\nb\rc{{ \"\\n\" }}\r\n",
     "a\nb\nc\n", 0},
    {"{% if t %}{# c #}\n  {% endif %}|\t{% if t %}x{% endif +%}\n",
     "|\tx", 0},
    // loops
    {"{% for i in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revind"
     "ex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }};{% endfor %}",
     "1043TrueFalse4;2132FalseFalse4;3221FalseFalse4;4310FalseTrue4;", 0},
    {"{% for i in l %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }} {{ loop.previtem i"
     "s defined }}{% endfor %}",
     "<3>1 False3<1>2 True1<2>2 True2<2> True", 0},
    {"{% for i in l %}{% if i == 2 %}{% continue %}{% endif %}{% if loop.index == 4 %}{%"
     " break %}{% endif %}{{ i }}{% endfor %}",
     "31", 0},
    {"{% for i in l %}{% break %}{% else %}none{% endfor %}",
     "none", 0},
    {"{% for i in [] %}x{% else %}none{% endfor %}",
     "none", 0},
    {"{% for i in l if i > 1 %}{{ loop.index }}/{{ loop.length }}:{{ i }} {% endfor %}",
     "1/3:3 2/3:2 3/3:2 ", 0},
    {"{% for i in l %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i) }}{% endfor %}",
     "aTruebTrueaTruebFalse", 0},
    {"{% for a, b in [[1, 2], [3, 4]] %}{{ a + b }}{% endfor %}{% for k, v in d.items() "
     "%}{{ k }}={{ v }};{% endfor %}",
     "37b=1;a=[1, {'x': None}];items=7;", 0},
    {"{% for n in deep recursive %}{{ n.v }}:{{ loop.depth }}:{{ loop.depth0 }}[{{ loop("
     "n.c) }}]{% endfor %}",
     "1:1:0[2:2:1[3:3:2[]]]4:1:0[]", 0},
    {"{% for c in u %}<{{ c }}>{% endfor %}",
     "<\303\204><\303\237><\344\270\255><\360\237\230\200>", 0},
    {"{% for i in range(3) %}{% for j in range(i) %}{{ loop.index }}{{ i }}{{ j }} {% en"
     "dfor %}{% endfor %}",
     "110 120 221 ", 0},
    {"{% set x = 1 %}{% for i in l %}{{ x }}{% set x = i %}{% endfor %}{{ x }}",
     "11111", 0},
    {"{% set ns = namespace(n=0) %}{% for i in l %}{% set ns.n = ns.n + i %}{% endfor %}"
     "{{ ns.n }}",
     "8", 0},
    {"{% for i in range(1, 10, 3) %}{{ i }}{% endfor %}{{ range(5)[1:3] | list }}{{ rang"
     "e(10, 0, -4) | list }}",
     "147[1, 2][10, 6, 2]", 0},
    {"{% for m in messages %}{{ m.role }}{{ m['content'] }}{{ m.n }}{{ m.n is defined }}"
     "{% endfor %}",
     "userHiFalseassistantYo3True", 0},
    {"{% for x in d %}{{ x }}{% endfor %}{{ loop is defined }}",
     "baitemsFalse", 0},
    // scopes
    {"{% set x = 1 %}{% if t %}{% set x = 2 %}{% endif %}{{ x }}{% with x = 3, y = x %}{"
     "{ x }}{{ y }}{% endwith %}{{ x }}",
     "2322", 0},
    {"{% set x, y = 1, 'a' %}{{ x }}{{ y }}{% set q %}<{{ x }}>{% endset %}{{ q * 2 }}{%"
     " set q | upper | trim %} ab {% endset %}{{ q }}",
     "1a<1><1>AB", 0},
    {"{% filter upper | replace('A', '-') %}abc{{ 'a' }}{% endfilter %}",
     "-BC-", 0},
    {"{% generation %}a{{ 1 }}{% endgeneration %}b",
     "a1b", 0},
    {"{% block x %}a{{ t }}{% endblock x %}",
     "aTrue", 0},
    // macros
    {"{% macro f(a, b=2, c=b) %}{{ a }},{{ b }},{{ c }};{% endmacro %}{{ f(1) }}{{ f(1, "
     "3) }}{{ f(c=9, a=8) }}{{ f() }}",
     "1,2,2;1,3,3;8,2,9;,2,2;", 0},
    {"{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, x=4) }"
     "}",
     "1(2, 3){'x': 4}", 0},
    {"{% macro f(a) %}<{{ a }}{{ caller(a, 2) }}>{% endmacro %}{% call(x, y) f(1) %}{{ x"
     " }}+{{ y }}{% endcall %}",
     "<11+2>", 0},
    {"{% macro f(x) %}{{ x }}{% if x %}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
     "543210", 0},
    {"{% macro f() %}{{ caller is defined }}{{ varargs | length }}{% endmacro %}{{ f() }"
     "}{{ f.name }}",
     "False0f", 0},
    {"{% set x = 1 %}{% macro f() %}{{ x }}{% set x = 2 %}{{ x }}{% endmacro %}{{ f() }}"
     "{{ x }}",
     "121", 0},
    // operators
    {"{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % -3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{"
     " -2 ** 2 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }}",
     "3 -4 -2 3.5 1024 0.5 4 3.0 0.5", 0},
    {"{{ 1 + 2 * 3 - 4 }} {{ (1 + 2) * 3 }} {{ 'a' ~ 1 ~ none }} {{ 'ab' * 3 }} {{ [1] +"
     " [2] }} {{ [0] * 3 }} {{ (1, 2) + (3,) }}",
     "3 9 a1None ababab [1, 2] [0, 0, 0] (1, 2, 3)", 0},
    {"{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }} {{ 1 == 1.0 "
     "}} {{ true == 1 }} {{ 'a' in 'cat' }} {{ 2 not in l }} {{ 'b' in d }}",
     "True False True True True True True False True", 0},
    {"{{ not t or z }} {{ z and 1 }} {{ 0 or 'x' }} {{ 1 if t else 2 }} {{ 1 if z }} {{ "
     "(1 if z) is defined }}",
     "None None x 1  False", 0},
    {"{{ '%s is %d and %.2f, %5s|%-5s|%05d|%x%%' % ('a', 3, 2.5, 'r', 'l', 42, 255) }} {"
     "{ '%s' % none }} {{ '%(a)s' % {'a': 1} }}",
     "a is 3 and 2.50,     r|l    |00042|ff% None 1", 0},
    {"{{ 1e3 }} {{ 1_000 }} {{ 0x1f }} {{ 0b11 }} {{ 0o17 }} {{ 1.5e-7 }} {{ 1e16 }} {{ "
     "1e15 }} {{ 0.1 + 0.2 }} {{ 1e22 }}",
     "1000.0 1000 31 3 15 1.5e-07 1e+16 1000000000000000.0 0.30000000000000004 1e+22", 0},
    {"{{ 9223372036854775807 }} {{ -9223372036854775807 }} {{ 3 * 1.0 }} {{ 10 ** 20 * 1"
     ".0 if false else 1 }}",
     "9223372036854775807 -9223372036854775807 3.0 1", 0},
    {"{{ \"a\" \"b\" 'c' }} {{ 'tab\\tnl\\\\n \\x41\\u00e9\\U0001F600 \\q' }}",
     "abc tab\tnl\\n A\303\251\360\237\230\200 \\q", 0},
    // values
    {"{{ [1, 'a', none, true, 2.0, \"it's\", 'q\"q', 'a\\nb'] }} {{ {'a': 1, 2: [3]} }} "
     "{{ (1,) }} {{ () }} {{ {} }} {{ d }}",
     "[1, 'a', None, True, 2.0, \"it's\", 'q\"q', 'a\\nb'] {'a': 1, 2: [3]} (1,) () {} {"
     "'b': 1, 'a': [1, {'x': None}], 'items': 7}", 0},
    {"{{ nope }}|{{ nope is defined }}|{{ nope | default('x') }}|{{ z | default('x') }}|"
     "{{ z | default('x', true) }}|{{ d.nope }}|",
     "|False|x|None|x||", 0},
    {"{{ s[0] }}{{ s[-1] }}{{ s[1:4] }}{{ s[::-1] }}{{ s[-3:] }}{{ s[:100] }}{{ s[5:2] }"
     "}{{ u[1:3] }}{{ l[::2] }}{{ l[-2:] }}{{ (1, 2, 3)[1:] }}",
     "HdelldlroW ,olleHrldHello, World\303\237\344\270\255[3, 2][2, 2](2, 3)", 0},
    {"{{ d['items'] }} {{ d.a.1.x }} {{ d['a'][0] }} {{ l[9] is defined }} {{ d.get('q',"
     " 5) }} {{ d.get('q') }}",
     "7 None 1 False 5 None", 0},
    // filters
    {"{{ l | join(',') }} {{ l | sort }} {{ l | sort(reverse=true) }} {{ l | unique | li"
     "st }} {{ l | sum }} {{ l | min }} {{ l | max }} {{ l | first }} {{ l | last }} {{ "
     "l | length }} {{ l | reverse | list }}",
     "3,1,2,2 [1, 2, 2, 3] [3, 2, 2, 1] [3, 1, 2] 8 1 3 3 2 4 [2, 2, 1, 3]", 0},
    {"{{ rows | map(attribute='n') | join }} {{ rows | selectattr('v') | map(attribute='"
     "n') | list }} {{ rows | selectattr('g', 'equalto', 'x') | list | length }} {{ rows"
     " | rejectattr('v', 'defined') | map(attribute='n') | first }} {{ rows | map(attrib"
     "ute='v', default=0) | list }}",
     "bAa ['b', 'A'] 2 a [2, 1, 0]", 0},
    {"{% for g, items in rows | groupby('g') %}{{ g }}:{{ items | map(attribute='n') | j"
     "oin('+') }} {% endfor %}{{ rows | sort(attribute='n') | map(attribute='n') | join "
     "}}",
     "x:b+a y:A Aab", 0},
    {"{{ [1, 2, 3, 4] | select('odd') | list }} {{ ['a', 1] | reject('string') | list }}"
     " {{ ['a', 'b'] | map('upper') | list }} {{ l | batch(3, 'x') | list }} {{ l | slic"
     "e(3) | list }}",
     "[1, 3] [1] ['A', 'B'] [[3, 1, 2], [2, 'x', 'x']] [[3, 1], [2], [2]]", 0},
    {"{{ s | upper }} {{ s | lower }} {{ 'hello wORLD-x' | title }} {{ 'hELLO' | capital"
     "ize }} {{ '  a ' | trim }}| {{ 'xxaxx' | trim('x') }} {{ s | replace('l', 'L', 2) "
     "}} {{ s | truncate(9) }} {{ s | center(20) }}| {{ s | wordcount }}",
     "HELLO, WORLD hello, world Hello World-X Hello a| a HeLLo, World Hello, World     H"
     "ello, World    | 2", 0},
    {"{{ ml | indent }}|{{ ml | indent(2, true) }}|{{ ml | indent('> ', blank=true) }}",
     "one\n    two\n\n     three\n|  one\n  two\n\n   three\n|one\n> two\n> \n>  three\n"
     "> ", 0},
    {"{{ '42' | int }} {{ 'x' | int(7) }} {{ '3.7' | int }} {{ 3.7 | int }} {{ '0x1f' | "
     "int(base=16) }} {{ '2.5' | float }} {{ 2.5 | round }} {{ 3.14159 | round(2) }} {{ "
     "2.1 | round(method='ceil') }} {{ -3 | abs }}",
     "42 7 3 3 31 2.5 2.0 3.14 3.0 3", 0},
    {"{{ '<a href=\"x\">' | e }} {{ '<' | safe }} {{ ('<' | safe) + '<' }} {{ 'a b/c?"
     "\303\251' | urlencode }} {{ {'b': 2, 'A': 1} | dictsort }} {{ d | items | list | l"
     "ength }} {{ '%s!' | format('x') }} {{ 1 | string + '1' }}",
     "&lt;a href=&#34;x&#34;&gt; < <&lt; a%20b/c%3F%C3%A9 [('A', 1), ('b', 2)] 3 x! 11", 0},
    // JSON
    {"{{ d | tojson }} {{ u | tojson }} {{ u | tojson(ensure_ascii=true) }} {{ [1.0, 1e1"
     "00, none, true, \"a\\\"b\\\\c\\n\\t/\\x7f\"] | tojson }}",
     "{\"b\": 1, \"a\": [1, {\"x\": null}], \"items\": 7} \"\303\204\303\237\344\270\255"
     "\360\237\230\200\" \"\\u00c4\\u00df\\u4e2d\\ud83d\\ude00\" [1.0, 1e+100, null, tru"
     "e, \"a\\\"b\\\\c\\n\\t/\177\"]", 0},
    {"{{ d | tojson(indent=2) }}",
     "{\n  \"b\": 1,\n  \"a\": [\n    1,\n    {\n      \"x\": null\n    }\n  ],\n  \"ite"
     "ms\": 7\n}", 0},
    {"{{ d | tojson(indent=4, sort_keys=true) }}{{ [] | tojson(indent=2) }}{{ {} | tojso"
     "n(indent=2) }}{{ [[]] | tojson(indent=1) }}",
     "{\n    \"a\": [\n        1,\n        {\n            \"x\": null\n        }\n    ],"
     "\n    \"b\": 1,\n    \"items\": 7\n}[]{}[\n []\n]", 0},
    {"{{ d | tojson(separators=(',', ':')) }} {{ {1: 2, none: 3, true: 4, 1.5: 5} | tojs"
     "on }} {{ '<&>' | tojson }} {{ (1, 2) | tojson }}",
     "{\"b\":1,\"a\":[1,{\"x\":null}],\"items\":7} {\"1\": 4, \"null\": 3, \"1.5\": 5} "
     "\"<&>\" [1, 2]", 0},
    // tests
    {"{{ 1 is number }}{{ 1 is integer }}{{ 1.0 is float }}{{ t is boolean }}{{ t is tru"
     "e }}{{ z is none }}{{ s is string }}{{ l is iterable }}{{ s is iterable }}{{ d is "
     "mapping }}{{ l is sequence }}{{ d is sequence }}{{ 1 is sequence }}",
     "TrueTrueTrueTrueTrueTrueTrueTrueTrueTrueTrueTrueFalse", 0},
    {"{{ 4 is even }}{{ 4 is odd }}{{ 9 is divisibleby(3) }}{{ 9 is divisibleby 2 }}{{ 1"
     " is in [1] }}{{ 1 is not in [1] }}{{ 'a' is lower }}{{ 'A' is upper }}{{ 1 is same"
     "as true }}{{ range is callable }}{{ 'upper' is filter }}{{ 3 is gt 2 }}{{ 2 is eq "
     "2 }}",
     "TrueFalseTrueFalseTrueFalseTrueTrueFalseTrueTrueTrueTrue", 0},
    // methods
    {"{{ ' a '.strip() }}|{{ 'xay'.strip('xy') }}{{ 'aab'.lstrip('a') }}{{ 'abb'.rstrip("
     "'b') }} {{ 'a,b,c'.split(',') }} {{ 'a b  c'.split() }} {{ 'a,b,c'.split(',', 1) }"
     "} {{ 'a,b,c'.rsplit(',', 1) }} {{ 'a\\nb\\r\\nc'.splitlines() }}",
     "a|aba ['a', 'b', 'c'] ['a', 'b', 'c'] ['a', 'b,c'] ['a,b', 'c'] ['a', 'b', 'c']", 0},
    {"{{ '  a b  '.split(none, 1) }}{{ '  a b  '.rsplit(none, 1) }}{{ ' a '.split(none, 0) }}",
     "['a', 'b  ']['  a', 'b']['a ']", 0},
    {"{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abcabc'.find('c') "
     "}}{{ 'abcabc'.rfind('c') }}{{ 'abc'.find('x') }}{{ 'abca'.count('a') }}{{ 'abc'.in"
     "dex('b') }} {{ 'a-b'.replace('-', '+') }} {{ '-'.join(['a', 'b']) }} {{ 'aXb'.part"
     "ition('X') }} {{ '\303\237'.upper() }}{{ '\303\204\303\226'.lower() }}{{ 'they are"
     "'.title() }}{{ 'aB'.swapcase() }}",
     "TrueTrue25-121 a+b a-b ('a', 'X', 'b') SS\303\244\303\266They AreAb", 0},
    {"{{ '{} {1} {}'.format(1, 2) if false else '{} {}'.format(1, 'a') }} {{ '{0}{x!r:>5"
     "}{0:03d}{y.a}'.format(7, x='q', y={'a': 1}) if false else '{0}{x!r:>5}{0:03d}'.for"
     "mat(7, x='q') }} {{ '5'.zfill(3) }}{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}{{ 'a"
     "'.center(4) }}|{{ '12'.isdigit() }}{{ 'ab1'.isalnum() }}{{ ' '.isspace() }}{{ 'ab'"
     ".isalpha() }}",
     "1 a 7  'q'007 005a  |..a a  |TrueTrueTrueTrue", 0},
    {"{{ d.keys() | list }} {{ d.values() | list | length }} {{ d.items() | list | first"
     " }} {{ l.index(2) }} {{ l.count(2) }} {{ 'abc'.removeprefix('a') }}{{ 'abc'.remove"
     "suffix('c') }}",
     "['b', 'a', 'items'] 3 ('b', 1) 2 2 bcab", 0},
    {"{{ strftime_now('%Y-%m-%d %H:%M:%S %d %B %b %A %a %j %I %p %y %-d %%') }}",
     "2026-03-14 15:09:26 14 March Mar Saturday Sat 073 03 PM 26 14 %", 0},
    {"{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.curre"
     "nt }}{% set j = joiner('|') %}{{ j() }}x{{ j() }}y",
     "ababx|y", 0},
    {"{{ dict(a=1, **{'b': 2}) }} {{ namespace(x=1).x }} {{ [*[1]] if false else 1 }}",
     "line 1: unexpected '*'", 1},
    // errors
    {"{{ raise_exception('No, ' ~ s ~ '!') }}",
     "No, Hello, World!", 1},
    {"{{ nope.x }}",
     "line 1: 'nope' is undefined", 1},
    {"a\n\n{{ d.nope.x }}",
     "line 3: 'dict object' has no attribute 'nope'", 1},
    {"{{ nope() }}",
     "line 1: 'nope' is undefined", 1},
    {"{{ s.nope() }}",
     "line 1: 'str object' has no attribute 'nope'", 1},
    {"\n{% if %}{% endif %}",
     "line 2: Expected an expression, got 'end of statement block'", 1},
    {"{% for i in l %}",
     "line 1: Unexpected end of template. Jinja was looking for 'endfor'.", 1},
    {"a\n{% endfor %}",
     "line 2: Encountered unknown tag 'endfor'.", 1},
    {"{{ 1 +",
     "line 1: unexpected 'end of template'", 1},
    {"{{ 'abc }}",
     "line 1: unexpected char \"'\" at 3", 1},
    {"{% nope %}",
     "line 1: Encountered unknown tag 'nope'.", 1},
    {"\n\n{{ 1 | nope }}",
     "line 3: No filter named 'nope'.", 1},
    {"{{ 1 is nope }}",
     "line 1: No test named 'nope'.", 1},
    {"{{ (1, 2 }}",
     "line 1: unexpected '}', expected ')'", 1},
    {"{{ 1 + 'a' }}",
     "line 1: unsupported operand type(s) for +: 'int' and 'str'", 1},
    {"{{ 'a' + 1 }}",
     "line 1: can only concatenate str (not \"int\") to str", 1},
    {"{{ 1 / 0 }}",
     "line 1: division by zero", 1},
    {"{{ none | length }}",
     "line 1: object of type 'NoneType' has no len()", 1},
    {"{% for i in 5 %}{% endfor %}",
     "line 1: 'int' object is not iterable", 1},
    {"{% set d.x = 1 %}",
     "line 1: cannot assign attribute on non-namespace object", 1},
    {"{{ l.append(1) }}",
     "line 1: access to attribute 'append' of 'list' object is unsafe.", 1},
    {"{{ d.update({}) }}",
     "line 1: access to attribute 'update' of 'dict' object is unsafe.", 1},
    {"{{ ''.__class__.__mro__ }}",
     "line 1: access to attribute '__class__' of 'this' object is unsafe.", 1},
    {"{{ range(10 ** 9) }}",
     "line 1: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).", 1},
    {"{{ nope | tojson }}",
     "Object of type Undefined is not JSON serializable", 1},
    {"{% for i in l %}{{ loop(i) }}{% endfor %}",
     "line 1: The loop must have the 'recursive' marker to be called recursively.", 1},
    {"{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}",
     "line 1: macro 'f' takes not more than 1 argument(s)", 1},
    {"{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=1) }}",
     "line 1: macro 'f' takes no keyword argument 'b'", 1},
    {"{% for a, b in [[1, 2, 3]] %}{% endfor %}",
     "line 1: too many values to unpack (expected 2)", 1},
    {"{{ [1, 'a'] | sort }}",
     "line 1: '<' not supported between instances of 'str' and 'int'", 1},
    {"{{ {[]: 1} }}",
     "line 1: unhashable type: 'list'", 1},
    {"{% break %}",
     "line 1: 'break' outside loop", 1},
    {"{{ 'abc'.index('x') }}",
     "line 1: substring not found", 1},
    {"{% endif %}",
     "line 1: Encountered unknown tag 'endif'.", 1},
    {"{{ 1 2 }}",
     "line 1: expected token 'end of print statement', got 'integer'", 1},
};

TEST(the_language_is_that_of_jinja2) {
    moe_vocab *vocab = open_usual(NULL);
    for (size_t i = 0; i < sizeof language / sizeof language[0]; i++) {
        result r = format_with(vocab, language_request, language[i].source);
        const char *got = r.text ? r.text : r.error.text;
        CHECKF((r.text == NULL) == language[i].is_error && !strcmp(got, language[i].text),
               "%s\n    gives: %s\n    not:   %s", language[i].source, got, language[i].text);
        free(r.text);
    }
    moe_vocab_close(vocab);
}

// Errors of templates are ARGUMENT with the template's words, or FORMAT for what is no template.
TEST(errors_of_templates_say_whose_they_are_and_where) {
    static const struct {
        const char *source;
        moe_status status;
        const char *text;
    } errors[] = {
        {"{{ raise_exception('No.') }}", MOE_ERROR_ARGUMENT, "No."},
        {"a\n{{ 1 + 'a' }}", MOE_ERROR_ARGUMENT, "line 2: unsupported operand type(s) for +"},
        {"a\n\n{% if %}", MOE_ERROR_FORMAT, "line 3: Expected an expression"},
        {"{% if 1 %}{{ 1 | nope }}{% endif %}", MOE_ERROR_ARGUMENT, "line 1: No filter named"},
        {"{{ strftime_now('%Y', 1) }}", MOE_ERROR_ARGUMENT, "takes at most 1 argument"},
        {"no template", MOE_ERROR_ARGUMENT, "the file has no template of this name"}};
    moe_vocab *vocab = open_usual(NULL);
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++) {
        result r = format_with(vocab, EMPTY, errors[i].source);
        CHECKF(!r.text && r.error.status == errors[i].status &&
                   strstr(r.error.text, errors[i].text) &&
                   !strcmp(r.error.where, "chat_template"),
               "%s: %s: %s", errors[i].source, r.error.where, r.error.text);
        free(r.text);
    }
    moe_vocab_close(vocab);
}

TEST(the_time_comes_from_the_request_alone) {
    static const char source[] = "{\"messages\": [], \"chat_template\": \"{{ strftime_now('%d %b "
                                 "%Y %H:%M:%S %j %U %W %V %G %a %f') }}\"";
    // what Python's strftime gives
    static const char *const times[][2] = {
        {"2026-03-14T15:09:26", "14 Mar 2026 15:09:26 073 10 10 11 2026 Sat 000000"},
        {"2024-12-31", "31 Dec 2024 00:00:00 366 52 53 01 2025 Tue 000000"},
        {"2021-01-03 23:59:59.25+02:00", "03 Jan 2021 23:59:59 003 01 00 53 2020 Sun 250000"},
        {"2000-02-29T01:02Z", "29 Feb 2000 01:02:00 060 09 09 09 2000 Tue 000000"},
        {"2026-13-01", NULL}, {"2026-02-30", NULL}, {"yesterday", NULL}, {"", NULL},
        {"2026-03-14T15", NULL}, {"2026-03-14T15:09:26 or so", NULL}};
    moe_vocab *vocab = open_usual(NULL);
    for (size_t i = 0; i <= sizeof times / sizeof times[0]; i++) {
        text request = {NULL, 0, 0};
        add(&request, source);
        if (i) add(&request, ", \"now\": \"");
        if (i) add(&request, times[i - 1][0]);
        add(&request, i ? "\"}" : "}");
        result r = format(vocab, request.p, request.n);
        if (i && times[i - 1][1])
            CHECKF(r.text && !strcmp(r.text, times[i - 1][1]), "%s: %s", times[i - 1][0],
                   r.text ? r.text : r.error.text);
        else
            CHECKF(!r.text && r.error.status == MOE_ERROR_ARGUMENT &&
                       !strcmp(r.error.where, "now"),
                   "%s", i ? times[i - 1][0] : "without a time");
        free(r.text);
        free(request.p);
    }
    moe_vocab_close(vocab);
}

// ---- hostile templates -----------------------------------------------------------------------

// What a template repeats, to be put together: `before`, then `part` so often, then `behind`.
static const struct {
    const char *before, *part;
    size_t times;
    const char *behind;
} hostile[] = {
    // loops
    {"{% for i in range(100000) %}", "{% for j in range(100000) %}", 1, "{% endfor %}{% endfor %}"},
    {"{% for i in range(1000000000) %}", "x", 100000, "{% endfor %}"},
    {"", "{% for i in range(99999) %}", 60, "x"},
    {"{% for a in range(9999) %}{% for b in range(9999) %}{% set x = a %}", "{{ a }}", 10000,
     "{% endfor %}{% endfor %}"},
    {"{% for i in range(99999) if ", "i in range(99999) and ", 4000, "i %}x{% endfor %}"},
    {"{% for i in 'a' * 10000000 %}{% endfor %}", "x", 1, ""},
    {"{{ range(99999) | list | map('string') | list | ", "sort | unique | list | ", 4000,
     "sort }}"},
    // recursion
    {"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "x", 100000, ""},
    {"{% macro f(a) %}{{ f(a ~ a) }}{% endmacro %}{{ f('x') }}", "", 1, ""},
    {"{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
     "", 1, ""},
    {"{% macro f(n) %}{{ caller() }}{% call f(n) %}{{ caller() }}{% endcall %}{% endmacro %}"
     "{% call f(1) %}x{% endcall %}", "", 1, ""},
    {"{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "", 1, ""},
    {"{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}", "", 1, ""},
    {"{% set ns = namespace() %}{% macro f() %}{{ ns.g() }}{% endmacro %}{% set ns.g = f %}"
     "{{ f() }}", "", 1, ""},
    // nesting
    {"{{ ", "(", 100000, "1"}, {"{{ ", "[", 100000, ""}, {"{{ ", "{1:", 100000, ""},
    {"{{ ", "f(", 100000, ""}, {"{{ x", "[0", 100000, ""}, {"{{ ", "not ", 100000, "1 }}"},
    {"{{ ", "-", 100000, "1 }}"}, {"{{ ", "1 if 1 else ", 50000, "1 }}"},
    {"{{ ", "1 if ", 50000, "1 }}"}, {"{{ 1 ", "+ (1 ", 50000, ""},
    {"", "{% if 1 %}", 100000, ""}, {"", "{% for i in [1] %}", 100000, ""},
    {"", "{% macro f() %}", 100000, ""}, {"", "{% filter upper %}", 100000, ""},
    {"", "{% set x %}", 100000, ""}, {"", "{% call f() %}", 100000, ""},
    {"", "{% with %}", 100000, ""}, {"", "{% generation %}", 10000, ""},
    {"{% if 0 %}", "{% elif 0 %}", 50000, "{% endif %}"},
    {"{% for ", "(", 100000, "x"}, {"{% set ", "(", 100000, "x"},
    {"{% set x = [] %}", "{% set x = [x] %}", 5000, "{{ x }}"},
    {"{% set x = [] %}", "{% set x = [x, x] %}", 5000, "{{ x | tojson }}"},
    {"{% set x = [] %}{% set y = [] %}", "{% set x = [x, x] %}{% set y = [y, y] %}", 1000,
     "{{ x == y }}"},
    {"{% set x = () %}{% set y = () %}", "{% set x = (x, x) %}{% set y = (y, y) %}", 1000,
     "{{ x < y }}"},
    {"{% set x = () %}", "{% set x = (x, x) %}", 100, "{{ {x: 1} }}"},
    {"{% set x = () %}{% set y = () %}", "{% set x = (x, x) %}{% set y = (y, y) %}", 80,
     "{{ x == y }}"},
    {"{% set x = [1] * 99999 %}{% set y = x + [] %}{% for i in range(99999) %}",
     "{{ x == y }}{{ 2 in x }}{{ x.count(2) }}{{ x | sum }}{{ x | first }}{{ x | max }}", 30,
     "{% endfor %}"},
    {"{% set x = '0' * 3000000 %}{% for i in range(99999) %}", "{{ x | int }}{{ x.isascii() }}", 9,
     "{% endfor %}"},
    {"{% set x = 'a' * 3000000 %}{% set y = 'a' * 3000000 %}{% for i in range(99999) %}",
     "{{ x is sameas y }}{{ x.removeprefix(y) | first }}{{ y.startswith(x) }}", 9, "{% endfor %}"},
    {"{% set x = '%' ~ '0' * 3000000 ~ 'd' %}{% for i in range(99999) %}", "{{ x % 1 }}", 9,
     "{% endfor %}"},
    {"{% set x = '{:' ~ '0' * 3000000 ~ '}' %}{% for i in range(99999) %}", "{{ x.format(1) }}", 9,
     "{% endfor %}"},
    {"{% set ns = namespace() %}{% set ns.a = ns %}", "{{ ns }}{{ ns == ns }}{{ ns | string }}", 9,
     "{{ {ns: ns} }}"},
    {"{% set ns = namespace() %}{% set ns.a = [ns] %}", "{{ ns.a == ns.a }}", 9,
     "{{ ns.a | tojson }}"},
    {"{{ '", "{0:", 10000, "'.format(1) }}"}, {"{{ '{0", "[0]", 30000, "}'.format([]) }}"},
    // growth
    {"{% set x = 'xxxxxxxx' %}", "{% set x = x ~ x %}", 200, "{{ x }}"},
    {"{% set ns = namespace(x='ab') %}{% for i in range(99999) %}", "{% set ns.x = ns.x + ns.x %}",
     9, "{% endfor %}"},
    {"{% set x = [1] %}", "{% set x = x + x %}", 200, "{{ x }}"},
    {"{% set x %}xxxxxxxx{% endset %}", "{% set x %}{{ x }}{{ x }}{% endset %}", 200, "{{ x }}"},
    {"{{ 'a' * 1000000000 }}", "", 1, ""}, {"{{ [1] * 1000000000 }}", "", 1, ""},
    {"{{ 'a' * 9223372036854775807 }}", "", 1, ""}, {"{{ [''] * 9223372036854775807 }}", "", 1, ""},
    {"{{ ('a' * 99999)", ".replace('a', 'aaaaaaaaa')", 50, " }}"},
    {"{{ ('a' * 99999)", ".replace('', 'aaaaaaaaa')", 50, " }}"},
    {"{{ 'a'", " | indent(1000000, true)", 50, " }}"},
    {"{{ ('a\\n' * 99999)", " | indent('xxxxxxxxxxxx')", 50, " }}"},
    {"{{ 'a'", " | center(1000000000)", 1, " }}"},
    {"{{ 'a'.ljust(9223372036854775807) }}", "", 1, ""},
    {"{{ 'a'.zfill(9223372036854775807) }}", "", 1, ""},
    {"{{ '\\t'.expandtabs(9223372036854775807) }}", "", 1, ""},
    {"{{ '%1000000d' % 1 }}{{ '{:>1000000}'.format(1) }}", "{{ '%999999s' % 'x' }}", 1000, ""},
    {"{{ '%.100f' % 1e308 }}{{ '{:,.100f}'.format(1e308) }}{{ '%.999999f' % 1 }}", "", 1, ""},
    {"{{ '%*d' % (9223372036854775807, 1) }}", "", 1, ""},
    {"{{ ('a' * 99999) | map('replace', 'a', 'b' * 9999) | join('c' * 9999) }}", "", 1, ""},
    {"{{ range(99999) | join('x' * 99999) }}", "", 1, ""},
    {"{{ range(99999) | batch(1000000000, 1) | list }}", "", 1, ""},
    {"{{ [1] | slice(9223372036854775807) | list }}", "", 1, ""},
    {"{{ range(99999) | slice(99999) | list | tojson(indent=99999) }}", "", 1, ""},
    {"{{ [[1]] | tojson(indent='x' * 1000000) }}", "", 1, ""},
    {"{{ (('x' * 1000000) ~ '<>&') ", " | forceescape", 100, " }}"},
    {"{{ ('\\x01' * 1000000) ", " | string | tojson", 100, " }}"},
    {"{{ ('\303\251' * 1000000) | urlencode ", " | urlencode", 100, " }}"},
    {"{{ ('x ' * 1000000)", " | title | upper | lower", 500, " }}"},
    {"{{ ('x' * 1000000)", ".split('x') | join('y')", 500, " }}"},
    {"{{ ('x' * 9000000)", "[::-1]", 500, " }}"},
    {"{% set x = 'a' * 3000000 %}", "{{ x.find(x[1:] ~ 'b') }}", 500, ""},
    {"{% set x = 'a' * 300000 %}", "{{ (x ~ 'b') in (x ~ x) }}{{ x.rfind('b' ~ x[2:]) }}", 500, ""},
    {"{% set x = 'a' * 3000000 %}", "{{ x | length }}{{ x[-1] }}{{ x[2999999] }}", 3000, ""},
    {"{% set x = ' ' * 3000000 %}", "{{ x.strip() }}{{ x.rstrip() }}{{ x | trim }}", 3000, ""},
    {"{% set x = ' ' * 3000000 %}", "{{ x.strip(x) }}{{ x.split() }}{{ x | wordcount }}", 3000, ""},
    {"{% set x = 'a' * 3000000 %}", "{{ x == x[1:] }}{{ x < x ~ 'a' }}{{ {x: 1}[x] }}", 3000, ""},
    {"{% set x = 'a' * 3000000 %}", "{{ x is upper }}{{ x.isalpha() }}{{ x | int }}{{ x | float }}",
     1000, ""},
    {"{% set x = '9' * 3000000 %}", "{{ x | int }}{{ x | float }}{{ x | round }}", 1000, ""},
    {"{% set x = 'a' * 3000000 %}", "{{ x.isascii() }}{{ x.isprintable() }}{{ x.istitle() }}",
     1000, ""},
    {"{% set x = 'a' * 3000000 %}", "{{ x.startswith(x) }}{{ x.removeprefix(x) }}{{ x.count(x) }}",
     3000, ""},
    {"{% set x = ('a.' * 100000) %}", "{{ [1] | map(attribute=x) | list }}", 500, ""},
    {"{% set x = (',' * 100000) %}", "{{ range(99) | sort(attribute=x) | list | length }}", 500,
     ""},
    {"{% set x = range(99999) | list %}", "{{ x == x[1:] }}{{ 'a' in x }}{{ x | length }}", 3000,
     ""},
    {"{% set x = range(99999) | list %}", "{{ x[1:] | first }}{{ x.count(1) }}{{ x.index(9999) }}",
     3000, ""},
    {"{% set x = range(99999) | list %}", "{% set q = x | reverse | list %}{% set x = x + [1] %}",
     3000, "{{ x | length }}"},
    {"{% set x = dict(a=1) %}", "{% set x = dict(x, **{x | string: x}) %}", 3000, "{{ x }}"},
    {"{{ 'x' * 99999 }}{{ strftime_now('%c' * 99999) }}", "{{ strftime_now('%A' * 99999) }}", 300,
     ""},
    {"{% macro f() %}{% endmacro %}", "{{ f(a=1, b=2, **{'c': 3}) }}", 3000, ""},
    {"", "{% set a", 1, "{% endset %}"},
    // many names in one scope, long chains, long lists
    {"{{ x", ".x", 100000, " }}"}, {"{{ 1", " + 1", 100000, " }}"}, {"{{ 1", " < 2", 100000, " }}"},
    {"{{ ''", " ~ ''", 100000, " }}"}, {"{{ 1", " and 1", 100000, " }}"},
    {"{{ [1", ", 1", 100000, "] }}"}, {"{{ {1: 1", ", 1: 1", 50000, "} }}"},
    {"{{ dict(a=1", ", a=1", 50000, ") }}"}, {"{{ 1", " | abs", 100000, " }}"},
    {"{{ 1", " is odd is odd", 1000, " }}"}, {"{% set x", ", x", 100000, " = 1 %}"},
    {"{% macro f(a", ", a", 100000, ") %}{% endmacro %}{{ f(1) }}"},
    {"{% print 1", ", 1", 100000, " %}"}, {"{{ '", "\\n", 100000, "' }}"},
    {"{{ 1", "1", 100000, " }}"},
    {"{{ 1.", "1", 100000, " }}"}, {"{{ 1e", "1", 100000, " }}"}, {"{{ 0x", "f", 100000, " }}"},
    {"{{ '%", "0", 100000, "d' % 1 }}"}, {"{{ ''.format(", "1, ", 50000, "1) }}"},
    {"", "{", 100000, ""}, {"", "{{", 100000, ""}, {"", "{%", 100000, ""}, {"", "{#", 100000, ""},
    {"", "{% raw %}", 100000, ""}, {"{% raw %}", "{% endraw", 100000, ""},
    {"", "{#-#}", 100000, ""},
    {"", "{{ ' }}", 100000, ""}, {"", " ", 100000, "{%- if 1 %}"},
    {"", "\r", 100000, "{%- if 1 %}"},
    {"", "{% if 1 -%}     ", 20000, ""}, {"", "\n    {%- set x = 1 -%}\n", 20000, ""},
    {"{% raw %}", "{%                ", 20000, ""}, {"", "{%                  ", 20000, ""}};
enum { N_HOSTILE = sizeof hostile / sizeof hostile[0] };

static text hostile_request(int i) {
    text source = {NULL, 0, 0};
    add(&source, hostile[i].before);
    add_times(&source, hostile[i].part, hostile[i].times);
    add(&source, hostile[i].behind);
    text t = with_template(EMPTY, source.p, source.n);
    free(source.p);
    return t;
}

// What a template and a request of n bytes may take, and basic blocks that all its steps take.
static size_t most_bytes(size_t n) { return ((size_t)66 << 20) + 260 * n; }
static double most_steps(size_t n) { return 4e9 + 5e4 * (double)n; }

TEST(templates_that_loop_recurse_nest_and_grow_end_within_bounds) {
    moe_error error;
    meter m;
    memset(&m, 0, sizeof m);
    const moe_allocator allocator = meter_allocator(&m);
    moe_vocab *vocab = open_vocab(usual_controls, NULL, &allocator, &error);
    const size_t before = m.live;
    double most = 0, most_memory = 0;
    int errors = 0;
    for (int i = 0; i < N_HOSTILE && vocab; i++) {
        text t = hostile_request(i);
        clear_error(&error);
        m.peak = before;
        const uint64_t begin = steps_now();
        const int64_t n = moe_chat_format(vocab, t.p, t.n, NULL, 0, &error);
        const double steps = (double)(steps_now() - begin);
        const double memory = (double)(m.peak - before);
        CHECKF(n >= 0 || (error.status == (moe_status)-n && error.text[0]), "%s%s",
               hostile[i].before, hostile[i].part);
        CHECKF(n < 0 || (uint64_t)n < most_bytes(t.n), "%s%s", hostile[i].before, hostile[i].part);
        CHECKF(memory <= (double)most_bytes(t.n), "%s%s: %.0f bytes", hostile[i].before,
               hostile[i].part, memory);
        CHECKF(steps < most_steps(t.n), "%s%s: %.0f steps", hostile[i].before, hostile[i].part,
               steps);
        CHECKF(m.live == before, "%s%s: memory is lost", hostile[i].before, hostile[i].part);
        if (steps > most) most = steps;
        if (memory > most_memory) most_memory = memory;
        errors += n < 0;
        free(t.p);
    }
    printf("  %d templates, %d errors, at most %.2g steps and %.3g bytes\n", N_HOSTILE, errors,
           most, most_memory);
    CHECK(steps_now() > 1000); // they are counted
    moe_vocab_close(vocab);
    CHECK(m.live == 0);
}

// ---- tokens ----------------------------------------------------------------------------------

typedef struct ids {
    int32_t *p;
    int64_t n;
} ids;

static ids tokenize(const moe_vocab *vocab, const text *request) {
    ids t = {NULL, 0};
    moe_error error;
    clear_error(&error);
    t.n = moe_chat_tokenize(vocab, request->p, request->n, NULL, 0, &error);
    CHECKF(t.n >= 0, "%s: %s", error.where, error.text);
    if (t.n < 0) return t;
    t.p = (int32_t *)malloc((size_t)(t.n + 1) * sizeof *t.p);
    if (!t.p) exit(1);
    t.p[0] = -1;
    CHECK(moe_chat_tokenize(vocab, request->p, request->n, t.p, (size_t)t.n, &error) == t.n);
    int32_t first[2] = {-2, -2}; // what there is no room for is not written
    CHECK(moe_chat_tokenize(vocab, request->p, request->n, first, 1, &error) == t.n);
    CHECK(first[0] == (t.n ? t.p[0] : -2) && first[1] == -2);
    return t;
}

// Is this what the tokens say, control tokens with their names? SPM puts a blank in front of what
// does not follow a token that is text, and a file may add BOS.
static int says(const moe_vocab *vocab, const ids *t, const char *wanted, size_t size) {
    text all = {NULL, 0, 0};
    char piece[512];
    int32_t one[8] = {0};
    int64_t i = t->n > 0 && t->p[0] == moe_vocab_bos(vocab) ? 1 : 0;
    const moe_string bos = moe_vocab_token(vocab, moe_vocab_bos(vocab));
    if (i && size >= bos.size && !memcmp(wanted, bos.data, bos.size)) i = 0;
    moe_vocab_tokenize(vocab, "a", 1, 0, one, 8);
    moe_vocab_text(vocab, one[0], piece, sizeof piece);
    const int blanks = piece[0] == ' ';
    int fresh = 1;
    add(&all, "");
    for (; i < t->n; i++) {
        if (moe_vocab_is_control(vocab, t->p[i])) {
            const moe_string name = moe_vocab_token(vocab, t->p[i]);
            add_bytes(&all, name.data, name.size);
            fresh = 1;
        } else {
            const size_t n = moe_vocab_text(vocab, t->p[i], piece, sizeof piece);
            const size_t drop = blanks && fresh && n && piece[0] == ' ';
            add_bytes(&all, piece + drop, (n < sizeof piece ? n : sizeof piece) - drop);
            fresh = 0;
        }
    }
    const int same = all.n == size && !memcmp(all.p, wanted, size);
    if (!same && test_failures < 3) printf("    %.200s\n    %.200s\n", all.p, wanted);
    free(all.p);
    return same;
}

static moe_vocab *open_file(const char *path) {
    moe_error error;
    moe_gguf *gguf = moe_gguf_open(path, NULL, &error);
    moe_vocab *vocab = gguf ? moe_vocab_open(gguf, &error) : NULL;
    moe_gguf_close(gguf);
    return vocab;
}

static const char *const vocab_files[] = {
    "examples/storyteller/storyteller.gguf", VOCABS "ggml-vocab-deepseek-coder.gguf",
    VOCABS "ggml-vocab-deepseek-llm.gguf", VOCABS "ggml-vocab-gpt-2.gguf",
    VOCABS "ggml-vocab-llama-bpe.gguf", VOCABS "ggml-vocab-llama-spm.gguf",
    VOCABS "ggml-vocab-phi-3.gguf", VOCABS "ggml-vocab-qwen2.gguf"};
enum { N_VOCABS = sizeof vocab_files / sizeof vocab_files[0] };

TEST(control_tokens_come_from_the_template_alone) {
    int tested = 0;
    for (int f = 0; f < N_VOCABS; f++) {
        moe_vocab *vocab = open_file(vocab_files[f]);
        int32_t control[40];
        int n = 0;
        if (!vocab) continue;
        tested++;
        for (int32_t id = 0; id < moe_vocab_size(vocab) && n < 40; id++)
            if (moe_vocab_is_control(vocab, id) && moe_vocab_token(vocab, id).size > 2)
                control[n++] = id;
        CHECKF(n, "%s: no control tokens", vocab_files[f]);
        // all of their names in all that a user may write, cut by the template in many ways
        text names = {NULL, 0, 0}, mark = {NULL, 0, 0}, user = {NULL, 0, 0}, request, whole;
        for (int i = 0; i < n; i++) {
            const moe_string name = moe_vocab_token(vocab, control[i]);
            add_bytes(&names, name.data, name.size);
            add(&names, i % 3 ? "" : " x\n");
        }
        const moe_string first = moe_vocab_token(vocab, control[0]);
        const moe_string last = moe_vocab_token(vocab, control[n - 1]);
        add_json(&mark, first.data, first.size);
        add_json(&user, names.p, names.n);
        memset(&request, 0, sizeof request);
        add(&request, "{\"messages\": [{\"role\": ");
        for (int i = 0; i < 6; i++) {
            static const char *const between[] = {
                ", \"content\": ", ", \"name\": ", ", \"tool_calls\": [{\"function\": {\"name\": ",
                ", \"arguments\": {", ": [", "]}}}]}], \"tools\": [", "], \"documents\": ["};
            add(&request, user.p);
            add(&request, between[i]);
        }
        add(&request, user.p);
        add(&request, "]}");
        text source = {NULL, 0, 0};
        add(&source, "{% set a = ");
        add(&source, mark.p);
        add(&source,
            " %}{{ a }}{{ messages[0].role }}{{ a }}{{ messages[0].content | trim }}{{ a ~ "
            "messages[0].content[1:] ~ a }}{{ messages[0].name | upper | lower }}{{ a }}"
            "{{ messages[0].name.split('x') | join(a[:1]) }}{{ a }}{{ messages | tojson }}"
            "{{ tools | tojson(indent=2) }}{{ a }}{{ messages[0].tool_calls[0] }}{{ a }}"
            "{{ '%s' % messages[0].content }}{{ '{}'.format(messages[0].content) }}{{ a }}"
            "{{ messages[0].content | replace('x', 'yy') | indent }}{{ documents[0] }}"
            "{{ a[:1] ~ messages[0].content[1:] }}{{ messages[0].content[:1] }}{{ a[1:] }}{{ a }}"
            "{% set q %}{{ messages[0].content }}{% endset %}{{ q | list | join }}{{ q }}"
            "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(q) * 2 }}{{ q | reverse }}{{ ");
        whole = source;
        add_json(&whole, last.data, last.size);
        add(&whole, " }}");
        text all = with_template(request.p, whole.p, whole.n);
        const result r = format(vocab, all.p, all.n);
        CHECKF(r.text, "%s: %s", vocab_files[f], r.error.text);
        const ids t = tokenize(vocab, &all);
        int marks = 0, lasts = 0, others = 0;
        const int has_bos = t.n && t.p[0] == moe_vocab_bos(vocab) && control[0] != t.p[0];
        for (int64_t i = has_bos; i < t.n; i++) {
            marks += t.p[i] == control[0];
            lasts += t.p[i] == control[n - 1];
            others += moe_vocab_is_control(vocab, t.p[i]);
        }
        // a file that begins texts with the first control token does so once: it stands there
        CHECKF(n == 1 ? marks == 11 : marks == 10 && lasts == 1 && others == 11,
               "%s: %d %d %d", vocab_files[f], marks, lasts, others);
        if (r.text) CHECKF(says(vocab, &t, r.text, (size_t)r.n), "%s", vocab_files[f]);
        free(r.text);
        free(t.p);
        free(all.p);
        free(whole.p);
        free(request.p);
        free(names.p);
        free(mark.p);
        free(user.p);
        moe_vocab_close(vocab);
    }
    printf("  %d vocabularies\n", tested);
    if (tested < 2) SKIP("no " VOCABS);
}

static text dialogue(int turns, int prompt) {
    static const char *const said[] = {"Hi, who are you?", "I am a model.\n", "What is 2 + 2?",
                                       "It is 4.", "And  3 + 3?\n\n", "6", "Thanks"};
    text t = {NULL, 0, 0};
    add(&t, "{\"messages\": [");
    for (int i = 0; i < turns; i++) {
        add(&t, i ? ", " : "");
        add(&t, i % 2 ? "{\"role\": \"assistant\", \"content\": "
                      : "{\"role\": \"user\", \"content\": ");
        add_json(&t, said[i], strlen(said[i]));
        add(&t, "}");
    }
    add(&t, prompt ? "], \"functions\": \"\", \"datetime\": \"\"}"
                   : "], \"functions\": \"\", \"datetime\": \"\", "
                     "\"add_generation_prompt\": false}");
    return t;
}

// The marks of a template that are control tokens where it is at home: <...> and [...].
static size_t mark_at(const char *p) {
    const char close = *p == '<' ? '>' : *p == '[' ? ']' : 0;
    size_t n = 1;
    if (!close) return 0;
    while (p[n] && p[n] != close && n < 40 && !strchr(" \n\t\\'\"{}<[(%", p[n])) n++;
    for (size_t i = 1; i < n && close == ']'; i++)
        if (p[i] != '_' && p[i] != '/' && (p[i] < 'A' || p[i] > 'Z')) return 0;
    return p[n] == close && n > 2 ? n + 1 : 0;
}

// Qwen2's vocabulary with the marks of all templates as further control tokens.
static moe_vocab *open_marks(void) {
    static edit_file file;
    static char known[2000][48];
    int n_known = 0;
    moe_vocab *vocab = NULL;
    moe_error error;
    if (!edit_open(&file, VOCABS "ggml-vocab-qwen2.gguf")) return NULL;
    edit_value *tokens = edit_find_value(&file, "tokenizer.ggml.tokens");
    edit_value *types = edit_find_value(&file, "tokenizer.ggml.token_type");
    edit_image names = {NULL, 0, 0}, kinds = {NULL, 0, 0};
    edit_put_bytes(&names, tokens->data, tokens->size);
    edit_put_bytes(&kinds, types->data, types->size);
    uint64_t n;
    memcpy(&n, names.data + 4, 8);
    for (int i = 0; i < n_real; i++) {
        for (const char *p = real_templates[i].text; *p; p++) {
            char mark[48] = {0};
            const size_t size = mark_at(p);
            int is_known = !size || n_known == 2000;
            memcpy(mark, p, size);
            for (int k = 0; k < n_known && !is_known; k++) is_known = !strcmp(known[k], mark);
            if (is_known) continue;
            memcpy(known[n_known++], mark, sizeof mark);
            edit_put_string(&names, mark);
            edit_put(&kinds, 3, 4);
            n++;
        }
    }
    memcpy(names.data + 4, &n, 8);
    memcpy(kinds.data + 4, &n, 8);
    edit_set(&file, "tokenizer.ggml.tokens", 9, names.data, names.size);
    edit_set(&file, "tokenizer.ggml.token_type", 9, kinds.data, kinds.size);
    joined = edit_build(&file);
    moe_gguf *gguf = moe_gguf_open_memory(joined.data, joined.size, NULL, &error);
    vocab = gguf ? moe_vocab_open(gguf, &error) : NULL;
    CHECKF(vocab, "%s: %s", error.where, error.text);
    moe_gguf_close(gguf);
    free(joined.data);
    free(names.data);
    free(kinds.data);
    edit_close(&file);
    return vocab;
}

// What is prompted with a dialogue's first turns is what the whole begins with, as text for so many
// of the 70 templates and as tokens for almost all of these: they are reused. (Apriel has line
// feeds on both sides of a seam, which are one token. Hy3 puts its marks together when it runs:
// here they are no control tokens.)
TEST(a_prefix_of_a_dialogue_is_a_prefix_in_tokens) {
    moe_vocab *vocab = find_real() ? open_marks() : NULL;
    int texts[2] = {0, 0}, tokens[2] = {0, 0};
    if (!vocab) SKIP("no " VOCABS " or no " GOLDEN);
    for (int i = 0; i < n_real; i++) {
        for (int prompt = 0; prompt < 2; prompt++) {
            result before = {0, NULL, {0}};
            ids known = {NULL, 0};
            int text_holds = 1, tokens_hold = 1;
            for (int turns = 1; turns <= 7; turns += 2) {
                text request = dialogue(turns, prompt);
                text all = with_template(request.p, real_templates[i].text,
                                         real_templates[i].size);
                const result now = format(vocab, all.p, all.n);
                CHECKF(now.text, "%s: %s", real_templates[i].name, now.error.text);
                ids t = {NULL, 0};
                if (now.text) t = tokenize(vocab, &all);
                text_holds &= now.text && before.n <= now.n &&
                              (!before.n || !memcmp(before.text, now.text, (size_t)before.n));
                tokens_hold &= now.text && known.n <= t.n &&
                               (!known.n || !memcmp(known.p, t.p, (size_t)known.n * 4));
                if (now.text)
                    CHECKF(says(vocab, &t, now.text, (size_t)now.n), "%s", real_templates[i].name);
                free(before.text);
                free(known.p);
                before = now;
                known = t;
                free(request.p);
                free(all.p);
            }
            CHECKF(text_holds || !tokens_hold, "%s", real_templates[i].name);
            texts[prompt] += text_holds;
            tokens[prompt] += tokens_hold;
            free(before.text);
            free(known.p);
        }
    }
    printf("  of %d templates: %d without and %d with the prompt as text, %d and %d as tokens\n",
           n_real, texts[0], texts[1], tokens[0], tokens[1]);
    CHECK(texts[0] == 67 && tokens[0] == 65 && texts[1] == 52 && tokens[1] == 51);
    moe_vocab_close(vocab);
}

TEST(bos_stands_in_front_once) {
    static const struct {
        uint8_t add;
        const char *source, *content;
        int n; // how many BOS
    } rows[] = {
        {0, "{{ messages[0].content }}", "x", 0},
        {1, "{{ messages[0].content }}", "x", 1},
        {0, "{{ bos_token }}{{ messages[0].content }}", "x", 1},
        {1, "{{ bos_token }}{{ messages[0].content }}", "x", 1},
        {1, "{{ bos_token ~ bos_token }}{{ messages[0].content }}", "x", 2},
        {0, "{{ messages[0].content }}{{ bos_token }}", "<BOS>", 1},
        {1, "{{ messages[0].content }}", "<BOS>", 1}, // that is the user's
        {1, "{{ '<B' ~ messages[0].content }}", "OS>", 1},
        {1, "", "x", 1}, // nothing comes out
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        moe_error error;
        add_bos = rows[i].add;
        const char *values[] = {"tokenizer.chat_template", rows[i].source, NULL};
        moe_vocab *vocab = open_vocab(usual_controls, values, NULL, &error);
        add_bos = 0;
        text request = {NULL, 0, 0};
        add(&request, "{\"messages\": [{\"role\": \"user\", \"content\": ");
        add_json(&request, rows[i].content, strlen(rows[i].content));
        add(&request, "}]}");
        const ids t = tokenize(vocab, &request);
        int n = 0;
        for (int64_t k = 0; k < t.n; k++) n += t.p[k] == 256;
        CHECKF(n == rows[i].n && (!rows[i].add || (t.n && t.p[0] == 256)), "row %d: %d", (int)i, n);
        free(t.p);
        free(request.p);
        moe_vocab_close(vocab);
    }
}

TEST(a_file_without_a_template_has_chatml_if_it_has_its_tokens) {
    static const char *const without[] = {"<BOS>", "<EOS>", "<|im_start|>", NULL};
    static const char request[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}";
    static const char chatml[] =
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    moe_error error;
    moe_vocab *vocab = open_usual(NULL);
    const moe_string none = moe_chat_template(vocab, NULL);
    CHECK(!none.data && !none.size);
    result r = format(vocab, request, strlen(request));
    CHECKF(r.text && !strcmp(r.text, chatml), "%s", r.text ? r.text : r.error.text);
    free(r.text);
    moe_vocab_close(vocab);
    vocab = open_vocab(without, NULL, NULL, &error);
    r = format(vocab, request, strlen(request));
    CHECK(!r.text && r.error.status == MOE_ERROR_UNSUPPORTED);
    CHECK(moe_chat_tokenize(vocab, request, strlen(request), NULL, 0, &error) ==
          -MOE_ERROR_UNSUPPORTED);
    free(r.text);
    moe_vocab_close(vocab);
}

TEST(a_request_chooses_among_the_templates_of_a_file) {
    static const char *const values[] = {
        "tokenizer.chat_template", "plain", "tokenizer.chat_template.tool_use", "tools",
        "tokenizer.chat_template.rag", "rag", NULL};
    static const char *const rows[][2] = {
        {EMPTY, "plain"},
        {"{\"messages\": [], \"tools\": null}", "plain"},
        {"{\"messages\": [], \"tools\": []}", "plain"},
        {"{\"messages\": [], \"tools\": [{}]}", "tools"},
        {"{\"messages\": [], \"chat_template\": \"rag\", \"tools\": [{}]}", "rag"},
        {"{\"messages\": [], \"chat_template\": \"{{ 1 }}\"}", "1"},
        {"{\"messages\": [], \"chat_template\": null}", "plain"},
        {"{\"messages\": [], \"chat_template\": \"{{ x }}{{ y }}\", \"y\": 1, "
         "\"chat_template_kwargs\": {\"x\": 2, \"y\": 3}}", "23"},
        {"{\"messages\": [], \"chat_template\": \"{{ add_generation_prompt }}{{ tools }}{{ now is "
         "defined }}{{ chat_template is defined }}\"}", "TrueNoneFalseFalse"},
        {"{\"messages\": [], \"chat_template\": \"{{ bos_token }}{{ eos_token }}{{ pad_token is "
         "defined }}\"}", "<BOS><EOS>False"}};
    moe_error error;
    moe_vocab *vocab = open_vocab(usual_controls, values, NULL, &error);
    CHECK(vocab != NULL);
    for (int i = 0; i < 3; i++) {
        const char *name = i ? values[2 * i] + 24 : NULL;
        const moe_string t = moe_chat_template(vocab, name);
        CHECK(t.size == strlen(values[2 * i + 1]) && !memcmp(t.data, values[2 * i + 1], t.size));
    }
    CHECK(!moe_chat_template(vocab, "other").data && !moe_chat_template(NULL, NULL).data);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        result r = format(vocab, rows[i][0], strlen(rows[i][0]));
        CHECKF(r.text && !strcmp(r.text, rows[i][1]), "%s: %s", rows[i][0],
               r.text ? r.text : r.error.text);
        free(r.text);
    }
    moe_vocab_close(vocab);
}


// ---- mutations -------------------------------------------------------------------------------

static long n_mutations = 20000;
static uint64_t fuzz_seed = 1;

static uint64_t fuzz_next(uint64_t *state, uint64_t below) {
    return moe__splitmix64(state) % below;
}

// What the language is made of, put into templates at any place.
static const char *const fragments[] = {
    "{%", "%}", "{{", "}}", "{#", "#}", "-", "{%- ", " -%}", "for i in range(9)", "endfor", "if ",
    "endif", "else", "elif x", "set x = ", "endset", "macro m(a, b=1)", "endmacro", "call m(x)",
    "endcall", "filter upper", "endfilter", "{% generation %}", "with a = ", "break", "continue",
    "raw", "endraw", "loop", "loop(", "namespace(a=1)", "recursive", "|tojson", "|tojson(indent=2)",
    "|map(", "|join(", "|sort", "|groupby('role')", "|batch(3)", "|slice(3)", "|indent(4)",
    "|replace('a', 'bb')", "|default(x, true)", "|trim", "|length", "|int", "|float", "|round(2)",
    "|selectattr('role', 'equalto', ", "|dictsort", "|unique|list", "|reverse", "|center(99)",
    "|truncate(5)", "|wordcount", "|urlencode", "|escape", "|safe", "|string", "|list", "|first",
    ".split(", ".format(", ".strip(", ".replace(", ".items()", ".get(", "[::-1]", "[1:", "[-1]",
    " is defined", " is not ", " in ", " not in ", " and ", " or ", " ~ ", " ** ", " // ", " % ",
    "9223372036854775807", "-9223372036854775808", "1e308", "0x7f", "'", "\"", "\\", "\\u00e9",
    "\303\251", "\360\237\230\200", "\377", "(", ")", "[", "]", "{", "}", ",", ":", "*", "messages",
    "messages[0]", "tools", "caller()", "varargs", "kwargs", "strftime_now('%Y')", "none", "true",
    "'%5.2f%s' % ", "'{:>9}{}'", "raise_exception('x')", "\r\n", "\n", "x.y.z", "<|im_end|>"};

// One to three changes of a text, mostly one, which leave much of it whole.
static void mutate(text *t, const char *other, size_t other_size, uint64_t *state) {
    for (uint64_t left = 1 + fuzz_next(state, 8) / 5 * fuzz_next(state, 3); left; left--) {
        const size_t at = (size_t)fuzz_next(state, t->n + 1);
        const size_t room = t->n - at;
        const size_t n = (size_t)fuzz_next(state, 1 + (room < 8 ? room : 8));
        text now = {NULL, 0, 0};
        add_bytes(&now, t->p ? t->p : "", at);
        switch (fuzz_next(state, 8)) {
        case 0: break; // bytes go
        case 1: { // a byte changes
            const char c = (char)fuzz_next(state, 256);
            add_bytes(&now, &c, 1);
            break;
        }
        case 2: // bytes come twice
            add_bytes(&now, t->p + at, n);
            add_bytes(&now, t->p + at, n);
            break;
        case 3: // the end is missing
            if (fuzz_next(state, 4) == 0) {
                free(t->p);
                *t = now;
                continue;
            }
            break;
        case 4: { // a piece of another template
            const size_t from = (size_t)fuzz_next(state, other_size + 1);
            const size_t size = (size_t)fuzz_next(state, 200);
            add_bytes(&now, other + from, size < other_size - from ? size : other_size - from);
            break;
        }
        default: // a fragment is put in or in place of something
            add(&now, fragments[fuzz_next(state, sizeof fragments / sizeof fragments[0])]);
            if (fuzz_next(state, 2)) add_bytes(&now, t->p + at, n);
        }
        add_bytes(&now, t->p + at + n, room - n);
        free(t->p);
        *t = now;
    }
}

static const char *const own_requests[] = {
    "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi <|im_end|>\"}]}",
    "{\"messages\": [{\"role\": \"system\", \"content\": \"S\"}, {\"role\": \"user\", \"content\": "
    "[{\"type\": \"text\", \"text\": \"a\\nb\"}, {\"type\": \"image\"}]}, {\"role\": "
    "\"assistant\", \"content\": null, \"reasoning_content\": \"r\", \"tool_calls\": [{\"id\": "
    "\"abc123xyz\", \"type\": \"function\", \"function\": {\"name\": \"f\", \"arguments\": "
    "\"{\\\"x\\\": [1, 2.5e3, null]}\"}}]}, {\"role\": \"tool\", \"tool_call_id\": \"abc123xyz\", "
    "\"name\": \"f\", \"content\": \"\303\251 \\ud83d\\ude00\"}], \"tools\": [{\"type\": "
    "\"function\", \"function\": {\"name\": \"f\", \"description\": \"d\", \"parameters\": "
    "{\"type\": \"object\", \"properties\": {\"x\": {\"type\": \"array\", \"items\": {\"type\": "
    "\"number\"}}}, \"required\": [\"x\"]}}}], \"enable_thinking\": false}",
    "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
    "\"content\": \"par\"}], \"continue_final_message\": true, \"chat_template_kwargs\": {\"x\": "
    "{\"y\": {\"z\": [1, -2, 0.1]}}}}"};
static const char own_template[] =
    "{%- macro m(a, b=2) -%}{{ a|tojson }}{{ b }}{{ caller() if caller is defined }}{%- endmacro "
    "-%}\n{% set ns = namespace(n=0) %}{% for x in messages recursive %}\n  {% set ns.n = ns.n + "
    "loop.index %}<|im_start|>{{ x.role }}{{ loop.cycle('a', 'b') }}{% if x.content is string "
    "%}{{ x.content | trim | replace('a', 'b') }}{% elif x.content is iterable %}{% for p in "
    "x.content if p.type == 'text' %}{{ p['text'][::-1].split('\\n')|join('+') }}{% else "
    "%}none{% endfor %}{% endif %}{{ m(x, b=ns.n) }}{% call m(1) %}c{% endcall %}{% generation "
    "%}{{ '%s-%5d' % (x.role, 7) }}{% endgeneration %}<|im_end|>\n{% endfor %}{{ "
    "tools|default([])|map(attribute='function.name')|join(', ') }}{{ strftime_now('%d %B %Y') "
    "}}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}";

// One mutated request with a mutated template; everything is given back, what comes out is a text
// within the bounds or an error with words, and the same twice.
static int run_mutation(uint64_t seed, const moe_vocab *vocab, const text *requests, int n_requests,
                        meter *m) {
    uint64_t state = seed;
    const int first = n_real ? (int)fuzz_next(&state, (uint64_t)n_real + 4) : n_real;
    const int second = n_real ? (int)fuzz_next(&state, (uint64_t)n_real) : n_real;
    const char *source = first < n_real ? real_templates[first].text : own_template;
    const char *other = second < n_real ? real_templates[second].text : own_template;
    const size_t live = m->live;
    text t = {NULL, 0, 0}, request = {NULL, 0, 0}, whole = {NULL, 0, 0};
    const text *base = &requests[fuzz_next(&state, (uint64_t)n_requests)];
    add_bytes(&request, base->p, base->n);
    add(&t, source);
    const uint64_t what = fuzz_next(&state, 8);
    if (what < 6) mutate(&t, other, strlen(other), &state);
    if (what > 4) mutate(&request, base->p, base->n, &state);
    whole = with_template(request.n ? request.p : "{", t.p, t.n);
    if (what == 7) mutate(&whole, other, strlen(other), &state);
    moe_error error;
    char small[64];
    int32_t tokens[64];
    clear_error(&error);
    m->peak = m->live;
    const int64_t n = moe_chat_format(vocab, whole.p, whole.n, small, sizeof small, &error);
    CHECKF(n >= 0 || (error.status == (moe_status)-n && error.text[0]), "seed %llu: error",
           (unsigned long long)seed);
    CHECKF(m->live == live, "seed %llu: memory is lost", (unsigned long long)seed);
    CHECKF(m->peak < ((size_t)160 << 20), "seed %llu: memory", (unsigned long long)seed);
    if (what % 4 == 0 && n >= 0) {
        const int64_t ids = // the vocabulary keeps memory for further calls
            moe_chat_tokenize(vocab, whole.p, whole.n, tokens, 64, &error);
        CHECKF(ids >= 0 || ids == -MOE_ERROR_MEMORY, "seed %llu: tokens",
               (unsigned long long)seed);
        for (int64_t i = 0; i < ids && i < 64; i++)
            CHECK(tokens[i] >= 0 && tokens[i] < moe_vocab_size(vocab));
    }
    free(t.p);
    free(request.p);
    free(whole.p);
    return n >= 0;
}

TEST(mutated_templates_and_requests_give_a_text_or_an_error) {
    json_file cases;
    text requests[N_CASES + 3];
    int n_requests = 0;
    long texts = 0;
    meter m;
    memset(&m, 0, sizeof m);
    const moe_allocator allocator = meter_allocator(&m);
    moe_error error;
    memset(requests, 0, sizeof requests);
    for (int i = 0; i < 3; i++) add(&requests[n_requests++], own_requests[i]);
    if (find_real() && open_json(&cases, GOLDEN "cases.json")) {
        for (uint64_t c = 0; c < cases.value.as.dict->n && c < N_CASES; c++)
            requests[n_requests++] =
                write_json(&cases.store, cases.value.as.dict->entries[c].value);
        close_json(&cases);
    }
    moe_vocab *vocab = open_vocab(usual_controls, NULL, &allocator, &error);
    CHECK(vocab != NULL);
    for (long i = 0; vocab && i < n_mutations && !test_failures; i++) {
        texts += run_mutation(fuzz_seed * 1000000007 + (uint64_t)i, vocab, requests, n_requests,
                              &m);
        if (i % 10000 == 9999 && n_mutations > 20000) {
            printf("  %ld\n", i + 1);
            fflush(stdout);
        }
    }
    printf("  %ld mutations, %ld texts\n", n_mutations, texts);
    CHECK(texts > n_mutations / 10);
    moe_vocab_close(vocab);
    CHECK(m.live == 0);
    for (int i = 0; i < n_requests; i++) free(requests[i].p);
}

// ---- JSON ------------------------------------------------------------------------------------

TEST(requests_are_json_and_errors_tell_where) {
    static const struct {
        const char *request, *words;
        uint64_t offset;
    } rows[] = {
        {"", "JSON at byte 0: it ends too early", 0},
        {"[]", "the request has no list of messages", 0},
        {"7", "the request has no list of messages", 0},
        {"\"x\"", "the request has no list of messages", 0},
        {"{}", "the request has no list of messages", 0},
        {"{\"messages\": {}}", "the request has no list of messages", 0},
        {"{\"messages\": [}", "not a value", 14},
        {"{\"messages\": []", "',' or '}' is missing", 15},
        {"{\"messages\": []} x", "something follows behind the value", 17},
        {"{\"messages\": [01]}", "a number begins with 0", 16},
        {"{\"messages\": [1.]}", "a digit is missing", 16},
        {"{\"messages\": [-]}", "a digit is missing", 15},
        {"{\"messages\": [nul]}", "not a value", 14},
        {"{\"messages\": [\"\\x\"]}", "not an escape", 16},
        {"{\"messages\": [\"\\u12g4\"]}", "not an escape", 16},
        {"{\"messages\": [\"a\nb\"]}", "a control character in a string", 16},
        {"{\"messages\": [\"a", "a string does not end", 16},
        {"{messages: []}", "a name is missing", 1},
        {"{\"messages\" []}", "':' is missing", 12}};
    moe_vocab *vocab = open_usual("x");
    moe_error error;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        result r = format(vocab, rows[i].request, strlen(rows[i].request));
        CHECKF(!r.text && r.error.status == MOE_ERROR_ARGUMENT &&
                   strstr(r.error.text, rows[i].words) && r.error.offset == rows[i].offset,
               "%s: %s, byte %d", rows[i].request, r.error.text, (int)r.error.offset);
        free(r.text);
    }
    // no argument is needed but the vocabulary and the request
    CHECK(moe_chat_format(NULL, EMPTY, strlen(EMPTY), NULL, 0, &error) == -MOE_ERROR_ARGUMENT);
    CHECK(moe_chat_format(vocab, NULL, 0, NULL, 0, NULL) == -MOE_ERROR_ARGUMENT);
    CHECK(moe_chat_format(vocab, EMPTY, strlen(EMPTY), NULL, 1, &error) == -MOE_ERROR_ARGUMENT);
    CHECK(moe_chat_tokenize(vocab, EMPTY, strlen(EMPTY), NULL, 1, NULL) == -MOE_ERROR_ARGUMENT);
    CHECK(moe_chat_tokenize(NULL, EMPTY, strlen(EMPTY), NULL, 0, NULL) == -MOE_ERROR_ARGUMENT);
    CHECK(moe_chat_format(vocab, EMPTY, strlen(EMPTY), NULL, 0, NULL) == 1);
    moe_vocab_close(vocab);
}

TEST(values_of_a_request_come_out_as_python_writes_them) {
    static const char *const rows[][2] = {
        {"[1, -0, 0.0, -0.0, 1e5, 1E-7, 1.5e300, 123456789012345678, 9223372036854775807]",
         "[1, 0, 0.0, -0.0, 100000.0, 1e-07, 1.5e+300, 123456789012345678, 9223372036854775807]"},
        {"[-9223372036854775808, 0.1, 1e16, 123456789.123456789, 5e-324, 1.7976931348623157e308]",
         "[-9223372036854775808, 0.1, 1e+16, 123456789.12345679, 5e-324, 1.7976931348623157e+308]"},
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u4e2d\\ud83d\\ude00\\u0000\\u001f\\u007f\"",
         "\"\\\"\\\\/\\b\\f\\n\\r\\tA\303\251\344\270\255\360\237\230\200\\u0000\\u001f\177\""},
        {"\"\\ud83d x \\ude00\"", "\"\357\277\275 x \357\277\275\""},
        {"\"\377\303\"", "\"\357\277\275\357\277\275\""},
        {"{\"b\": 1, \"a\": {}, \"b\": 2, \"\": []}", "{\"b\": 2, \"a\": {}, \"\": []}"},
        {" [ true , false , null , [ ] , { } ] ", "[true, false, null, [], {}]"}};
    moe_vocab *vocab = open_usual("{{ v | tojson }}");
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        text request = {NULL, 0, 0};
        add(&request, "{\"messages\": [], \"v\": ");
        add(&request, rows[i][0]);
        add(&request, "}");
        result r = format(vocab, request.p, request.n);
        CHECKF(r.text && !strcmp(r.text, rows[i][1]), "%s: %s", rows[i][0],
               r.text ? r.text : r.error.text);
        free(r.text);
        free(request.p);
    }
    moe_vocab_close(vocab);
}

TEST(deep_huge_and_broken_requests_end_within_bounds) {
    static const char *const parts[] = {"[", "{\"a\":", "[[],", "9", "-9", "0.", "1e", "\"",
                                        "\\u", "\"\\ud83d", "{\"a\":1,", "[1,", "null", " ",
                                        "\"a\",", "\377", "\303"};
    meter m;
    moe_error error;
    memset(&m, 0, sizeof m);
    const moe_allocator allocator = meter_allocator(&m);
    moe_vocab *vocab = open_vocab(usual_controls, NULL, &allocator, &error);
    const size_t before = m.live;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        for (int inside = 0; inside < 3; inside++) {
            text t = {NULL, 0, 0};
            if (inside) add(&t, "{\"messages\": [");
            if (inside == 2) add(&t, "], \"x\": ");
            add_times(&t, parts[i], 200000 / strlen(parts[i]));
            m.peak = before;
            const uint64_t begin = steps_now();
            clear_error(&error);
            const int64_t n = moe_chat_format(vocab, t.p, t.n, NULL, 0, &error);
            CHECKF(n < 0 && error.status == (moe_status)-n, "%s", parts[i]);
            CHECKF(steps_now() - begin < 300 * t.n + 100000, "%s: %llu steps", parts[i],
                   (unsigned long long)(steps_now() - begin));
            CHECKF(m.peak - before < most_bytes(t.n) && m.live == before, "%s", parts[i]);
            free(t.p);
        }
    }
    // all beginnings of a request and of a template, also as files have them
    for (int r = 0; r < 3; r++) {
        const size_t size = strlen(own_requests[r]);
        for (size_t n = 0; n < size; n++) {
            char *cut = (char *)malloc(n + 1); // of just that size, for the address sanitizer
            if (!cut) exit(1);
            memcpy(cut, own_requests[r], n);
            CHECK(moe_chat_format(vocab, cut, n, NULL, 0, NULL) == -MOE_ERROR_ARGUMENT);
            free(cut);
        }
    }
    for (size_t n = 0; n <= strlen(own_template); n++) {
        text t = with_template(own_requests[1], own_template, n);
        const int64_t got = moe_chat_format(vocab, t.p, t.n, NULL, 0, &error);
        CHECK(got >= 0 || got == -MOE_ERROR_FORMAT || got == -MOE_ERROR_ARGUMENT);
        free(t.p);
    }
    // a byte of 0 in a template is a character like others
    text t = with_template(EMPTY, "a\0{{ 'b\0' }}{{ 1 }}", 19);
    char out[16];
    CHECK(moe_chat_format(vocab, t.p, t.n, out, sizeof out, &error) == 5 &&
          !memcmp(out, "a\0b\0001", 5));
    free(t.p);
    CHECK(m.live == before);
    moe_vocab_close(vocab);
}

TEST(the_last_message_is_continued_where_it_ends) {
    static const char chatml[] =
        "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content | trim }}<|im_end|>\\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}";
    static const struct {
        const char *more, *text;
    } rows[] = { // what apply_chat_template of transformers gives
        {"{\"role\": \"assistant\", \"content\": \"par\"}], \"continue_final_message\": true}",
         "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\npar"},
        {"{\"role\": \"assistant\", \"content\": \"par \"}], \"continue_final_message\": true}",
         "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\npar"},
        {"{\"role\": \"assistant\", \"content\": \"par\"}], \"continue_final_message\": false}",
         "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\npar<|im_end|>\n"
         "<|im_start|>assistant\n"},
        {"{\"role\": \"assistant\", \"content\": [{\"type\": \"text\", \"text\": \"p\"}]}], "
         "\"continue_final_message\": true, \"adapt_messages\": true}", NULL},
        {"{\"role\": \"assistant\", \"content\": null}], \"continue_final_message\": true}", NULL},
        {"{\"role\": \"assistant\", \"content\": \"par\"}], \"continue_final_message\": true, "
         "\"add_generation_prompt\": true}", NULL}};
    moe_vocab *vocab = open_usual(NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        text request = {NULL, 0, 0}, source = {NULL, 0, 0};
        add(&request, "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, ");
        add(&request, rows[i].more);
        for (const char *p = chatml; *p; p++) { // a line feed is written as "\n" above
            const int feed = p[0] == '\\' && p[1] == 'n';
            add_bytes(&source, feed ? "\n" : p, 1);
            p += feed;
        }
        result r = format_with(vocab, request.p, source.p);
        if (rows[i].text)
            CHECKF(r.text && !strcmp(r.text, rows[i].text), "row %d: %s", (int)i,
                   r.text ? r.text : r.error.text);
        else if (i == 3) CHECK(r.text && strstr(r.text, "assistant\np") != NULL);
        else CHECKF(!r.text && r.error.status == MOE_ERROR_ARGUMENT, "row %d", (int)i);
        free(r.text);
        free(request.p);
        free(source.p);
    }
    moe_vocab_close(vocab);
}

TEST(messages_are_adapted_only_if_the_request_allows_it) {
    static const struct {
        const char *source, *message, *plain, *adapted; // NULL: an error
    } rows[] = {
        {"{{ messages[0].content }}",
         "\"content\": [{\"type\": \"text\", \"text\": \"a\"}, "
         "{\"type\": \"text\", \"text\": \"b\"}]",
         "[{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]", "a\nb"},
        {"{{ 'x' + messages[0].content }}", "\"content\": [{\"type\": \"text\", \"text\": \"a\"}]",
         NULL, "xa"},
        {"{% for p in messages[0].content %}{{ p.text }};{% endfor %}",
         "\"content\": [{\"type\": \"text\", \"text\": \"a\"}]", "a;", "a;"},
        {"{{ messages[0].tool_calls[0].function.arguments | tojson }}",
         "\"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": \"{\\\"k\\\": 1}\"}}]",
         "\"{\\\"k\\\": 1}\"", "{\"k\": 1}"},
        {"{% for k, v in messages[0].tool_calls[0].function.arguments.items() %}{{ k }}{{ v }}"
         "{% endfor %}",
         "\"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": \"{\\\"k\\\": 1}\"}}]",
         NULL, "k1"},
        {"{{ raise_exception('no') }}", "\"content\": [{\"type\": \"text\", \"text\": \"a\"}]",
         NULL, NULL}};
    moe_vocab *vocab = open_usual(NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        for (int adapts = 0; adapts < 2; adapts++) {
            text request = {NULL, 0, 0};
            const char *wanted = adapts ? rows[i].adapted : rows[i].plain;
            add(&request, "{\"messages\": [{\"role\": \"user\", ");
            add(&request, rows[i].message);
            add(&request, "}], \"adapt_messages\": ");
            add(&request, adapts ? "true}" : "false}");
            result r = format_with(vocab, request.p, rows[i].source);
            if (wanted)
                CHECKF(r.text && !strcmp(r.text, wanted), "row %d: %s", (int)i,
                       r.text ? r.text : r.error.text);
            else CHECKF(!r.text && r.error.status == MOE_ERROR_ARGUMENT, "row %d", (int)i);
            free(r.text);
            free(request.p);
        }
    }
    moe_vocab_close(vocab);
}

// ---- memory and stack ------------------------------------------------------------------------

TEST(a_call_without_memory_says_so_and_keeps_none) {
    meter m;
    moe_error error;
    memset(&m, 0, sizeof m);
    const moe_allocator allocator = meter_allocator(&m);
    const char *values[] = {"tokenizer.chat_template", own_template, NULL};
    long failed = 0;
    // opening a vocabulary with templates
    for (long at = 1, done = 0; !done; at++) {
        m.calls = 0;
        m.fail_at = at;
        moe_vocab *vocab = open_vocab(usual_controls, values, &allocator, &error);
        done = vocab != NULL;
        CHECK(vocab || error.status == MOE_ERROR_MEMORY);
        moe_vocab_close(vocab);
        CHECK(m.live == 0);
    }
    m.fail_at = 0;
    moe_vocab *vocab = open_vocab(usual_controls, values, &allocator, &error);
    const size_t before = m.live;
    const int real = find_real() ? 6 : 0;
    for (int r = 0; r < 3 + 3 * real; r++) {
        text request = {NULL, 0, 0};
        add(&request, own_requests[r % 3]);
        if (r < 3) {
            text with = with_template(request.p, own_template, strlen(own_template));
            free(request.p);
            request = with;
        } else { // templates that a request must be changed for are among them
            const real_template *t = &real_templates[(r / 3 - 1) * n_real / real];
            text with = with_template(request.p, t->text, t->size);
            free(request.p);
            request = with;
        }
        const result wanted = format(vocab, request.p, request.n);
        char *out = (char *)malloc((size_t)(wanted.text ? wanted.n : 0) + 1);
        for (long at = 1, done = 0; !done && out; at++) {
            m.calls = 0;
            m.fail_at = at;
            const int64_t n = moe_chat_format(vocab, request.p, request.n, out,
                                              wanted.text ? (size_t)wanted.n : 0, &error);
            done = m.calls < at;
            failed += !done;
            CHECKF(n == -MOE_ERROR_MEMORY
                       ? !done && error.status == MOE_ERROR_MEMORY
                       : n == wanted.n && (n < 0 || !memcmp(out, wanted.text, (size_t)n)),
                   "request %d, allocation %ld: %lld", r, at, (long long)n);
            CHECK(m.live == before);
        }
        m.fail_at = 0;
        free(out);
        free(wanted.text);
        free(request.p);
    }
    // and the tokenizer's own
    text request = with_template(own_requests[0], own_template, strlen(own_template));
    int64_t count = -1;
    for (long at = 1, done = 0; !done; at++) {
        m.calls = 0;
        m.fail_at = at;
        const int64_t n = moe_chat_tokenize(vocab, request.p, request.n, NULL, 0, &error);
        done = n >= 0;
        CHECK(done || (n == -MOE_ERROR_MEMORY && error.status == MOE_ERROR_MEMORY));
        count = n;
    }
    CHECK(count > 0 && failed > 10);
    free(request.p);
    moe_vocab_close(vocab);
    CHECK(m.live == 0);
}

// A thread whose stack is looked at afterwards: what is not as it was has been used.
enum { STACK = 4 << 20 };
typedef struct visit {
    const moe_vocab *vocab;
    text request;
} visit;
static void *visit_run(void *of) {
    visit *v = (visit *)of;
    moe_chat_format(v->vocab, v->request.p, v->request.n, NULL, 0, NULL);
    return NULL;
}
static size_t stack_of(visit *v) {
    pthread_t thread;
    pthread_attr_t attributes;
    unsigned char *stack = (unsigned char *)mmap(NULL, STACK, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    size_t unused = 0;
    if (stack == MAP_FAILED) return 0;
    for (size_t i = 0; i < STACK; i++) stack[i] = 0x5A;
    pthread_attr_init(&attributes);
    if (!pthread_attr_setstack(&attributes, stack, STACK) &&
        !pthread_create(&thread, &attributes, visit_run, v)) {
        pthread_join(thread, NULL);
        while (unused < STACK && stack[unused] == 0x5A) unused++;
    }
    pthread_attr_destroy(&attributes);
    munmap(stack, STACK);
    return STACK - unused;
}

// The manual promises a size of the stack. A sanitizer's frames are larger.
TEST(the_deepest_templates_and_requests_need_little_stack) {
    size_t most = 0;
    int deepest = 0;
    visit v;
    memset(&v, 0, sizeof v);
    moe_vocab *vocab = open_usual(NULL);
    v.vocab = vocab;
    for (int i = 0; i < N_HOSTILE; i++) {
        if (hostile[i].times < 200 && !strstr(hostile[i].before, "macro") &&
            !strstr(hostile[i].before, "recursive"))
            continue;
        v.request = hostile_request(i);
        const size_t used = stack_of(&v);
        if (used > most) {
            most = used;
            deepest = i;
        }
        free(v.request.p);
    }
    text deep = {NULL, 0, 0}; // JSON as deep as it may be, printed in all ways
    add(&deep, "{\"chat_template\": \"{{ x }}{{ x | tojson }}{{ x == x }}\", \"messages\": [], "
               "\"x\": ");
    add_times(&deep, "[", 95);
    add_times(&deep, "]", 95);
    add(&deep, "}");
    v.request = deep;
    const size_t json = stack_of(&v);
    free(deep.p);
    printf("  %zu bytes: %.50s%.30s; %zu for deep JSON\n", most, hostile[deepest].before,
           hostile[deepest].part, json);
    CHECK(most > 1000);
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    CHECK(most < 112 * 1024 && json < 112 * 1024);
#endif
    moe_vocab_close(vocab);
}

int main(int argc, char **argv) {
    if (argc > 2 && !strcmp(argv[1], "--fuzz")) {
        static char name[] = "mutated", program[] = "test_chat";
        char *arguments[2];
        arguments[0] = program;
        arguments[1] = name;
        n_mutations = atol(argv[2]);
        if (argc > 3) fuzz_seed = strtoull(argv[3], NULL, 10);
        return test_main(2, arguments);
    }
    return test_main(argc, argv);
}
