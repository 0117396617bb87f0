// Chat templates: JSON, the template language, requests to text and tokens. Hostile templates and
// requests, failing allocations, mutations of real ones (test_chat --fuzz N [SEED]: so many).
#include "steps.h"
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "gguf_edit.h"
#include "meter.h"
#include <dirent.h>
#include <locale.h>
#include <sys/mman.h>

#define GOLDEN "../shared/golden/chat/"
#define VOCABS "../shared/vocab/"

// ---- vocabularies ----------------------------------------------------------------------------

static edit_image joined; // the arrays of a file that is put together

// A vocabulary of all bytes and the control tokens named (NULL ends them), from 256 on; then the
// keys and values, two strings each. The first two tokens are BOS and EOS.
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

//@TABLE

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
            requests[n_requests++] = write_json(&cases.store, cases.value.as.dict->entries[c].value);
        close_json(&cases);
    }
    moe_vocab *vocab = open_vocab(usual_controls, NULL, &allocator, &error);
    CHECK(vocab != NULL);
    for (long i = 0; vocab && i < n_mutations && !test_failures; i++) {
        texts += run_mutation(fuzz_seed * 1000000007 + (uint64_t)i, vocab, requests, n_requests, &m);
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
