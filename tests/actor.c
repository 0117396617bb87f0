// Writes a model with a part in a play, for tests of dialogues: what it says next depends on the
// last token alone, and so its answer on how the question ends.
//
//     ?   calls the tool add         !   thinks, then says yes
//     .   sings and never ends       a digit, such as the tool's result: tells which one it read
//     anything else, and where its template has left out the thinking: "I see."
//
//     build/tests/actor FILE
//
// All layers add nothing to a token's embedding, which is a unit vector, one for each thing to be
// said; the row of the output matrix for that thing is the same vector, times 8. The template drops
// earlier thoughts, as Qwen's does.
#define SYNTH_NO_MAIN
#include "../bench/synth.c"
#include "gguf_edit.h"

static const char chat_template[] =
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- if m.reasoning_content and loop.index0 > ns.last %}"
    "{{- '<think>' + m.reasoning_content + '</think>\\n\\n' }}{%- endif %}"
    "{{- m.content }}"
    "{%- for call in m.tool_calls %}"
    "{{- '<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}"
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}"
    "{%- endfor %}{{- '<|end|>\\n' }}"
    "{%- else %}{{- '<|' + m.role + '|>' + m.content }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}";

// What can be said. Things from SEE on are tokens of their own behind the vocabulary that there is,
// in this order; text: as byte-level BPE writes it, a blank is U+0120, a newline U+010A.
enum { END, SEE, CALL, THINK, THOUGHT, THOUGHT_END, YES, INDEED, LA, DIGIT, N_THINGS = DIGIT + 10 };
enum { N_MORE = N_THINGS - SEE + 3, N_EMBD = 32 };
#define SP "\xC4\xA0"
#define NL "\xC4\x8A"

typedef struct thing {
    const char *text;
    int type;      // 1: text, 3: control, 4: defined by a user
    int next;      // what follows it
} thing;
static const thing things[] = {
    {"I" SP "see.", 1, END},
    {"<tool_call>" NL "{\"name\":" SP "\"add\"," SP "\"arguments\":" SP "{\"a\":" SP "17," SP
     "\"b\":" SP "25}}" NL "</tool_call>", 1, END},
    {"<think>", 4, THOUGHT}, {"Let" SP "me" SP "see.", 1, THOUGHT_END}, {"</think>", 4, YES},
    {NL NL "Yes", 1, INDEED}, {"," SP "indeed.", 1, END}, {SP "la", 1, LA},
    {"It" SP "ends" SP "with" SP "0.", 1, END}, {"It" SP "ends" SP "with" SP "1.", 1, END},
    {"It" SP "ends" SP "with" SP "2.", 1, END}, {"It" SP "ends" SP "with" SP "3.", 1, END},
    {"It" SP "ends" SP "with" SP "4.", 1, END}, {"It" SP "ends" SP "with" SP "5.", 1, END},
    {"It" SP "ends" SP "with" SP "6.", 1, END}, {"It" SP "ends" SP "with" SP "7.", 1, END},
    {"It" SP "ends" SP "with" SP "8.", 1, END}, {"It" SP "ends" SP "with" SP "9.", 1, END},
    {"<|user|>", 3, SEE}, {"<|system|>", 3, SEE}, {"<|tool|>", 3, SEE}};

// What follows a token of the vocabulary without ours: its first 256 are bytes.
static int next_of(int token, int n_old) {
    if (token >= n_old) return things[token - n_old].next;
    if (token == '?') return CALL;
    if (token == '!') return THINK;
    if (token == '.') return LA;
    return token >= '0' && token <= '9' ? DIGIT + token - '0' : SEE;
}

static void set_float(edit_image *m, size_t i, float x) { memcpy(m->data + i * 4, &x, 4); }

// An array with N_MORE elements behind those that there are.
static edit_image longer(const edit_value *v) {
    edit_image m = {NULL, 0, 0};
    const uint8_t *p = v->data;
    const uint64_t type = edit_get(&p, 4), n = edit_get(&p, 8);
    edit_put(&m, type, 4);
    edit_put(&m, n + N_MORE, 8);
    edit_put_bytes(&m, p, v->size - 12);
    return m;
}

static void change(edit_file *e, edit_image *keep) {
    edit_tensor *embd = edit_find_tensor(e, "token_embd.weight");
    edit_tensor *output = edit_find_tensor(e, "output.weight");
    edit_image *tokens = &keep[0], *types = &keep[1], *from = &keep[2], *to = &keep[3];
    const int n_old = (int)embd->ne[1], n = n_old + N_MORE, end = n_old - 2; // synth's <|end|>
    *tokens = longer(edit_find_value(e, "tokenizer.ggml.tokens"));
    *types = longer(edit_find_value(e, "tokenizer.ggml.token_type"));
    for (int i = 0; i < N_MORE; i++) {
        edit_put_string(tokens, things[i].text);
        edit_put(types, (uint64_t)things[i].type, 4);
    }
    edit_set(e, "tokenizer.ggml.tokens", 9, tokens->data, tokens->size);
    edit_set(e, "tokenizer.ggml.token_type", 9, types->data, types->size);
    edit_put_bytes(from, NULL, (size_t)n * N_EMBD * 4);
    edit_put_bytes(to, NULL, (size_t)n * N_EMBD * 4);
    for (int i = 0; i < n; i++) set_float(from, (size_t)(i * N_EMBD + next_of(i, n_old)), 1);
    for (int i = END; i < N_THINGS; i++)
        set_float(to, (size_t)((i == END ? end : n_old + i - SEE) * N_EMBD + i), 8);
    embd->data = from->data, embd->size = from->size, embd->ne[1] = (uint64_t)n;
    output->data = to->data, output->size = to->size, output->ne[1] = (uint64_t)n;
    for (int i = 0; i < e->n_tensors; i++) // zeros: what layers add
        if (strstr(e->tensors[i].name, "attn_output") || strstr(e->tensors[i].name, "down_exps"))
            e->tensors[i].size = 0;
    edit_put_string(&keep[4], chat_template);
    edit_set(e, "tokenizer.chat_template", 8, keep[4].data, keep[4].size);
}

int main(int argc, char **argv) {
    static edit_file e;
    edit_image keep[5] = {{NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}};
    if (argc != 2 || synth_write("micro", argv[1], NULL) || !edit_open(&e, argv[1])) {
        fprintf(stderr, "usage: actor FILE, which must be writable\n");
        return 2;
    }
    change(&e, keep);
    edit_image whole = edit_build(&e);
    FILE *f = fopen(argv[1], "wb");
    int failed = !f || fwrite(whole.data, 1, whole.size, f) != whole.size;
    if (f && fclose(f)) failed = 1;
    free(whole.data);
    for (int i = 0; i < 5; i++) free(keep[i].data);
    edit_close(&e);
    return failed;
}
