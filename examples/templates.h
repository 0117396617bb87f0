// Chat templates by llama.cpp's names, for files that have none or a broken one. Include text.h
// first.
#ifndef TEMPLATES_H
#define TEMPLATES_H

// What stands around a message of each role, and where an answer begins. joined: a system message
// and the user's behind it are one.
typedef struct template_marks {
    const char *name, *begin, *system[2], *user[2], *assistant[2], *answer;
    int joined;
} template_marks;

static const template_marks template_table[] = {
    {"chatml", "", {"<|im_start|>system\n", "<|im_end|>\n"},
     {"<|im_start|>user\n", "<|im_end|>\n"}, {"<|im_start|>assistant\n", "<|im_end|>\n"},
     "<|im_start|>assistant\n", 0},
    {"llama3", "", {"<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"},
     {"<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"},
     {"<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"},
     "<|start_header_id|>assistant<|end_header_id|>\n\n", 0},
    {"llama4", "", {"<|header_start|>system<|header_end|>\n\n", "<|eot|>"},
     {"<|header_start|>user<|header_end|>\n\n", "<|eot|>"},
     {"<|header_start|>assistant<|header_end|>\n\n", "<|eot|>"},
     "<|header_start|>assistant<|header_end|>\n\n", 0},
    {"gemma", "", {"<start_of_turn>user\n", "\n\n"}, {"<start_of_turn>user\n", "<end_of_turn>\n"},
     {"<start_of_turn>model\n", "<end_of_turn>\n"}, "<start_of_turn>model\n", 1},
    {"mistral-v1", "", {" [INST] ", "\n\n"}, {" [INST] ", " [/INST]"}, {" ", "</s>"}, "", 1},
    {"mistral-v3", "", {"[INST] ", "\n\n"}, {"[INST] ", "[/INST]"}, {" ", "</s>"}, "", 1},
    {"mistral-v3-tekken", "", {"[INST]", "\n\n"}, {"[INST]", "[/INST]"}, {"", "</s>"}, "", 1},
    {"mistral-v7", "", {"[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"}, {"[INST] ", "[/INST]"},
     {" ", "</s>"}, "", 0},
    {"phi3", "", {"<|system|>\n", "<|end|>\n"}, {"<|user|>\n", "<|end|>\n"},
     {"<|assistant|>\n", "<|end|>\n"}, "<|assistant|>\n", 0},
    {"zephyr", "", {"<|system|>\n", "<|endoftext|>\n"}, {"<|user|>\n", "<|endoftext|>\n"},
     {"<|assistant|>\n", "<|endoftext|>\n"}, "<|assistant|>\n", 0},
    {"deepseek2", "", {"", "\n\n"}, {"User: ", "\n\n"},
     {"Assistant: ", "<｜end▁of▁sentence｜>"}, "Assistant:", 0},
    {"deepseek3", "", {"", "\n\n"}, {"<｜User｜>", ""},
     {"<｜Assistant｜>", "<｜end▁of▁sentence｜>"}, "<｜Assistant｜>", 0},
    {"granite", "", {"<|start_of_role|>system<|end_of_role|>", "<|end_of_text|>\n"},
     {"<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n"},
     {"<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>\n"},
     "<|start_of_role|>assistant<|end_of_role|>", 0},
    {"command-r", "", {"<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"},
     {"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"},
     {"<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"},
     "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", 0},
    {"chatglm4", "[gMASK]<sop>", {"<|system|>\n", ""}, {"<|user|>\n", ""},
     {"<|assistant|>\n", ""}, "<|assistant|>\n", 0},
    {"kimi-k2", "", {"<|im_system|>system<|im_middle|>", "<|im_end|>"},
     {"<|im_user|>user<|im_middle|>", "<|im_end|>"},
     {"<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"},
     "<|im_assistant|>assistant<|im_middle|>", 0},
    {"hunyuan-moe", "", {"<|startoftext|>", "<|extra_4|>"}, {"<|startoftext|>", "<|extra_0|>"},
     {"", "<|eos|>"}, "", 0},
};
enum { TEMPLATE_COUNT = sizeof template_table / sizeof *template_table };

// A string of the template language: what it prints is not touched by the rules about blanks.
static inline void template_print(text_buffer *t, const char *s) {
    if (!*s) return;
    text_put(t, "{{ ");
    text_json(t, s, strlen(s));
    text_put(t, " }}");
}

static inline void template_role(text_buffer *t, const char *condition, const char *const marks[2],
                                 int joined) {
    text_put(t, condition);
    if (joined) text_put(t, "{% if not (loop.index0 == 1 and messages[0].role == 'system') %}");
    template_print(t, marks[0]);
    if (joined) text_put(t, "{% endif %}");
    text_put(t, "{{ m.content }}");
    template_print(t, marks[1]);
}

// Writes the template of that name; 0: there is none.
static inline int template_write(text_buffer *t, const char *name) {
    const template_marks *m = template_table;
    while (m < template_table + TEMPLATE_COUNT && strcmp(m->name, name) != 0) m++;
    if (m == template_table + TEMPLATE_COUNT) return 0;
    template_print(t, m->begin);
    text_put(t, "{% for m in messages %}");
    template_role(t, "{% if m.role == 'system' %}", m->system, 0);
    template_role(t, "{% elif m.role == 'assistant' %}", m->assistant, 0);
    template_role(t, "{% else %}", m->user, m->joined);
    text_put(t, "{% endif %}{% endfor %}{% if add_generation_prompt %}");
    template_print(t, m->answer);
    text_put(t, "{% endif %}");
    return 1;
}

static inline void template_names(FILE *out) {
    for (int i = 0; i < TEMPLATE_COUNT; i++)
        fprintf(out, "%s%s", i ? ", " : "", template_table[i].name);
}

#endif
