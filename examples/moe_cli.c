// moe-cli: generates text from a GGUF model on the command line, with llama.cpp's option names.
//
//     cc -O2 examples/moe_cli.c -o moe-cli -lm -lpthread
//     ./moe-cli -m MODEL.gguf -p "Once upon a time" -n 100
//
// The generated text, and nothing else, goes to standard output; see --help for the rest. Models
// that know how to talk do so if there is no prompt: talk.h.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "tool.h"

#include "heatmap.h"
#include "measure.h"
#include "talk.h"
#include "templates.h"
#include "text.h"
#include <float.h>
#include <signal.h>
#include <unistd.h>

static const char program[] = "moe-cli";

static struct settings {
    const char *model, *prompt, *prompt_file, *expert_stats, *prompt_cache;
    const char *system, *system_file, *chat_template, *chat_template_file, *tools;
    int conversation, no_conversation, single_turn, jinja, show_timings;
    int perplexity, tokens;
    int32_t reasoning, chunks, logprobs;
    int32_t n_predict, n_ctx, n_threads, n_threads_batch, n_batch;
    float temp, top_p, min_p, repeat_penalty;
    int32_t top_k, repeat_last_n;
    uint64_t seed;
    int32_t k_type, v_type, schedule, isa, kv_type, numa, pages;
    int mmap, prefault, mlock, pin, escape, ignore_eos, special;
    int prompt_cache_all, prompt_cache_ro;
    int info, help, version;
} set = {.n_predict = -1, .n_ctx = -1, .n_threads = -1, .n_threads_batch = -1, .n_batch = 512,
         .temp = 0.8f, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1.0f, .top_k = 40,
         .repeat_last_n = 64, .seed = UINT64_MAX, .k_type = -1, .v_type = -1, .mmap = 1,
         .escape = 1, .show_timings = 1, .chunks = -1, .logprobs = -1};

// Words for an enumeration stand in the order of its values.
static const tool_option options[] = {
    {"Input:", NULL, TOOL_HEADING, NULL, 0, 0, NULL},
    {"-m, --model", "FILE", TOOL_TEXT, &set.model, 0, 0,
     "GGUF file, or the first one of a split model (needed)"},
    {"-p, --prompt", "TEXT", TOOL_TEXT, &set.prompt, 0, 0,
     "what to go on from; - reads it from standard input.\n"
     "Control tokens such as <|im_end|> are recognised"},
    {"-f, --file", "FILE", TOOL_TEXT, &set.prompt_file, 0, 0,
     "the prompt is in a file; a newline at its end is dropped"},
    {"-e, --escape", NULL, TOOL_FLAG, &set.escape, 0, 0,
     "\\n, \\t, \\\", \\', \\\\, \\r and \\xNN mean one byte in the text\n"
     "after -p (default)"},
    {"--no-escape", NULL, TOOL_UNFLAG, &set.escape, 0, 0, "they mean what they look like"},
    {"--prompt-cache", "FILE", TOOL_TEXT, &set.prompt_cache, 0, 0,
     "go on from what an earlier run left in FILE, as far as the\n"
     "prompt begins with it, and leave the evaluated prompt there"},
    {"--prompt-cache-all", NULL, TOOL_FLAG, &set.prompt_cache_all, 0, 0,
     "leave the generated tokens there, too"},
    {"--prompt-cache-ro", NULL, TOOL_FLAG, &set.prompt_cache_ro, 0, 0, "leave FILE as it is"},

    {"Dialogue:", NULL, TOOL_HEADING, NULL, 0, 0, NULL},
    {"-cnv, --conversation", NULL, TOOL_FLAG, &set.conversation, 0, 0,
     "answer questions, one line each, the first being -p's or\n"
     "-f's text (default: if there is none and the model has a\nchat template)"},
    {"-no-cnv, --no-conversation", NULL, TOOL_FLAG, &set.no_conversation, 0, 0, "do not"},
    {"-st, --single-turn", NULL, TOOL_FLAG, &set.single_turn, 0, 0, "one answer, then the end"},
    {"-sys, --system-prompt", "TEXT", TOOL_TEXT, &set.system, 0, 0,
     "what the model is told before the dialogue"},
    {"-sysf, --system-prompt-file", "FILE", TOOL_TEXT, &set.system_file, 0, 0, "it is in a file"},
    {"--chat-template", "NAME|TEXT", TOOL_TEXT, &set.chat_template, 0, 0,
     "instead of the model's own: one of\n"
     "chatml, chatglm4, command-r, deepseek2, deepseek3, gemma,\n"
     "granite, hunyuan-moe, kimi-k2, llama3, llama4, mistral-v1,\n"
     "mistral-v3, mistral-v3-tekken, mistral-v7, phi3, zephyr,\n"
     "another one of the model by its name, or a template"},
    {"--chat-template-file", "FILE", TOOL_TEXT, &set.chat_template_file, 0, 0,
     "a template in a file"},
    {"--jinja", NULL, TOOL_FLAG, &set.jinja, 0, 0, "templates always run: for llama.cpp's users"},
    {"--tools", "FILE", TOOL_TEXT, &set.tools, 0, 0,
     "what the model may call: a list in JSON, as services take\n"
     "it. Calls are shown; the next line is their result"},
    {"-rea, --reasoning", "auto|on|off", TOOL_CHOICE, &set.reasoning, 0, 0,
     "ask the template to let the model think or not, and with\n"
     "off do not show it if it does (default auto: what the\n"
     "template does by itself). Thoughts are dimmed on a terminal\n"
     "and no part of the output through a pipe"},
    {"--show-timings", NULL, TOOL_FLAG, &set.show_timings, 0, 0,
     "tokens and speed behind each answer, on standard error\n(default)"},
    {"--no-show-timings", NULL, TOOL_UNFLAG, &set.show_timings, 0, 0, "no such line"},

    {"Generation:", NULL, TOOL_HEADING, NULL, 0, 0, NULL},
    {"-n, --predict, --n-predict", "N", TOOL_INT, &set.n_predict, -1, INT32_MAX,
     "most tokens to generate (default -1: until the model ends\n"
     "or the context is full)"},
    {"-s, --seed", "N", TOOL_SEED, &set.seed, 0, 0,
     "of the random choices (default -1: from the clock)"},
    {"--temp", "X", TOOL_FLOAT, &set.temp, 0, FLT_MAX, "temperature; 0: greedy (default 0.8)"},
    {"--top-k", "N", TOOL_INT, &set.top_k, 0, INT32_MAX,
     "keep the N most likely tokens; 0: all (default 40)"},
    {"--top-p", "P", TOOL_FLOAT, &set.top_p, 0, 1,
     "keep the fewest tokens that reach probability P; 1: all\n(default 0.95)"},
    {"--min-p", "P", TOOL_FLOAT, &set.min_p, 0, 1,
     "drop tokens below P times the most likely; 0: none\n(default 0.05)"},
    {"--repeat-penalty", "X", TOOL_FLOAT, &set.repeat_penalty, FLT_MIN, FLT_MAX,
     "make recent tokens less likely; 1: do not (default 1)"},
    {"--repeat-last-n", "N", TOOL_INT, &set.repeat_last_n, -1, INT32_MAX,
     "how many are recent; 0: none, -1: the whole context\n(default 64)"},
    {"--ignore-eos", NULL, TOOL_FLAG, &set.ignore_eos, 0, 0,
     "go on when the model ends the text"},
    {"-sp, --special", NULL, TOOL_FLAG, &set.special, 0, 0, "write control tokens, too"},

    {"Running:", NULL, TOOL_HEADING, NULL, 0, 0, NULL},
    {"-c, --ctx-size", "N", TOOL_INT, &set.n_ctx, 0, INT32_MAX,
     "tokens that prompt and answer may have together; 0: as\n"
     "many as the model was trained for (default: those, but at\nmost 4096)"},
    {"-b, --batch-size", "N", TOOL_INT, &set.n_batch, 1, INT32_MAX,
     "prompt tokens to evaluate at once (default 512)"},
    {"-t, --threads", "N", TOOL_INT, &set.n_threads, -1, MOE_MAX_THREADS,
     "threads (default -1: the physical cores we may use)"},
    {"-tb, --threads-batch", "N", TOOL_INT, &set.n_threads_batch, -1, MOE_MAX_THREADS,
     "threads for the prompt (default -1: as -t)"},
    {"-ctk, --cache-type-k", "f16|q8_0|f32", TOOL_CHOICE, &set.k_type, 0, 0,
     "what keys and values are kept as (default f16)"},
    {"-ctv, --cache-type-v", "f16|q8_0|f32", TOOL_CHOICE, &set.v_type, 0, 0,
     "the same (llama.cpp sets them one by one: here they are\none)"},
    {"--pages", "auto|map|copy", TOOL_CHOICE, &set.pages, 0, 0,
     "map the model, copy it into huge pages, or (default) map\n"
     "it and copy it only if the mapping is read slowly"},
    {"--no-mmap", NULL, TOOL_UNFLAG, &set.mmap, 0, 0, "as --pages copy"},
    {"--prefault", NULL, TOOL_FLAG, &set.prefault, 0, 0,
     "touch all of the mapped model before the first token"},
    {"--mlock", NULL, TOOL_FLAG, &set.mlock, 0, 0, "keep the model in memory"},
    {"--numa", "off|interleave|owner", TOOL_CHOICE, &set.numa, 0, 0,
     "weights in turn on all memory nodes, or on the node of\nthe (pinned) threads that read them"},
    {"--pin", NULL, TOOL_FLAG, &set.pin, 0, 0, "each thread stays on a core of its own"},
    {"--schedule", "default|sequential|parallel|balanced", TOOL_CHOICE, &set.schedule, 0, 0,
     "how threads share the experts"},
    {"--isa", "best|scalar|avx2|avx512|avx-vnni", TOOL_CHOICE, &set.isa, 0, 0,
     "instruction set; falls back to the next lower one\n(default best)"},

    {"--expert-stats", "FILE.svg", TOOL_TEXT, &set.expert_stats, 0, 0,
     "at the end draw which experts were used, layer by layer"},

    {"--logprobs", "N", TOOL_INT, &set.logprobs, 0, MOE_MAX_LOGPROBS,
     "instead of the text a line of JSON for each token, with its\n"
     "log-probability and the N likeliest ones"},

    {"Instead of generating:", NULL, TOOL_HEADING, NULL, 0, 0, NULL},
    {"--perplexity", NULL, TOOL_FLAG, &set.perplexity, 0, 0,
     "how well the model predicts the text after -f or -p, as\n"
     "llama-perplexity tells it: in chunks of -c tokens (default\n"
     "512), of which the second halves count"},
    {"--chunks", "N", TOOL_INT, &set.chunks, -1, INT32_MAX, "at most so many (default -1: all)"},
    {"--tokens", NULL, TOOL_FLAG, &set.tokens, 0, 0,
     "show the tokens of the prompt, with -cnv of the dialogue;\n"
     "control tokens are coloured on a terminal"},
    {"--info", NULL, TOOL_FLAG, &set.info, 0, 0,
     "show the model: metadata, tensors by type, sizes, memory\n"
     "needed with the options above"},
    {"-h, --help", NULL, TOOL_FLAG, &set.help, 0, 0, "show this"},
    {"--version", NULL, TOOL_FLAG, &set.version, 0, 0, "show the version"},
    {NULL, NULL, TOOL_HEADING, NULL, 0, 0, NULL}};

static void show_help(void) {
    printf("usage: %s -m MODEL.gguf [-p PROMPT] [options]\n\n"
           "Generates text with a Mixture-of-Experts model. The text alone goes to standard\n"
           "output, everything else to standard error. Ctrl-C ends the text, twice the program.\n"
           "Without a prompt, models with a chat template answer questions: /help lists what\n"
           "else can be said then.\n"
           "Exit codes: 0 done, 1 something failed, 2 wrong usage, 130 ended by Ctrl-C.\n",
           program);
    tool_help(stdout, options);
}

static int usage_error(const char *text) {
    fprintf(stderr, "%s: %s; see %s --help\n", program, text, program);
    return TOOL_USAGE;
}

// ---- Ctrl-C and the progress bar -------------------------------------------------------------

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

// The first Ctrl-C sets the flag; SA_RESETHAND lets the second one end the program.
static void catch_interrupt(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}

static int should_stop(void *user) {
    (void)user;
    return interrupted;
}

// Draws "loading [#####     ] 50 %" over itself; user: the percentage on the screen, or NULL if
// standard error is no terminal.
static int on_progress(void *user, float fraction) {
    int *shown = (int *)user, percent = (int)(fraction * 100);
    if (shown && percent > *shown) {
        static const char bar[] = "########################################";
        fprintf(stderr, "\rloading [%-40.*s] %3d %%", percent * 40 / 100, bar, percent);
        *shown = percent;
    }
    return !interrupted;
}

// ---- reading the prompt ----------------------------------------------------------------------

static int read_all(text_buffer *t, FILE *file, const char *name) {
    char piece[65536];
    size_t n;
    int enough = 1;
    while (enough && (n = fread(piece, 1, sizeof piece, file)) > 0)
        enough = text_append(t, piece, n);
    if (!enough || ferror(file)) {
        fprintf(stderr, "%s: cannot read %s: %s\n", program, name,
                enough ? strerror(errno) : "out of memory");
        return TOOL_ERROR;
    }
    if (t->size && t->data[t->size - 1] == '\n') text_cut(t, t->size - 1);
    return TOOL_OK;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

// Replaces \n and the like; other backslashes stay.
static void unescape(text_buffer *t) {
    static const char names[] = "nrt'\"\\", values[] = "\n\r\t'\"\\";
    size_t from = 0, to = 0;
    while (from < t->size) {
        char c = t->data[from++];
        size_t left = t->size - from;
        const char *name = c == '\\' && left ? (const char *)memchr(names, t->data[from], 6) : NULL;
        if (name) {
            c = values[name - names];
            from++;
        } else if (c == '\\' && left >= 3 && t->data[from] == 'x') {
            int high = hex_digit(t->data[from + 1]), low = hex_digit(t->data[from + 2]);
            if (high >= 0 && low >= 0) {
                c = (char)(high * 16 + low);
                from += 3;
            }
        }
        t->data[to++] = c;
    }
    text_cut(t, to);
}

static int read_file(text_buffer *t, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "%s: cannot open %s: %s\n", program, path, strerror(errno));
        return TOOL_ERROR;
    }
    int status = read_all(t, file, path);
    fclose(file);
    return status;
}

// What is given as an argument, or in a file; "-": standard input.
static int read_text(text_buffer *t, const char *argument, const char *path) {
    if (!argument) return path ? read_file(t, path) : TOOL_OK;
    if (strcmp(argument, "-") == 0) return read_all(t, stdin, "standard input");
    if (!text_put(t, argument)) {
        fprintf(stderr, "%s: out of memory\n", program);
        return TOOL_ERROR;
    }
    if (set.escape) unescape(t);
    return TOOL_OK;
}

// ---- what the library is asked for -----------------------------------------------------------

static moe_session_options session_options(const moe_model *model) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = set.n_ctx > 0 ? set.n_ctx : set.n_ctx ? 0 : moe_model_get_info(model)->n_ctx_train;
    if (set.perplexity && set.n_ctx < 0) o.n_ctx = 512; // llama-perplexity's default
    o.n_batch = set.n_batch;
    o.keep_all_logits = set.perplexity ? MOE_ON : 0;
    o.n_threads = set.n_threads > 0 ? set.n_threads : 0;
    o.n_threads_batch = set.n_threads_batch > 0 ? set.n_threads_batch : 0;
    o.kv_type = (moe_kv_type)set.kv_type;
    o.schedule = (moe_schedule)set.schedule;
    o.isa = (moe_isa)set.isa;
    o.pin = set.pin ? MOE_ON : 0;
    o.should_stop = should_stop;
    return o;
}

static moe_sampler_options sampler_options(int32_t n_ctx) {
    moe_sampler_options o;
    memset(&o, 0, sizeof o);
    o.temperature = set.temp;
    o.top_k = set.top_k;
    o.top_p = set.top_p > 0 ? set.top_p : FLT_MIN; // 0 would mean all, not one
    o.min_p = set.min_p;
    o.repeat_penalty = set.repeat_penalty;
    o.repeat_last_n = set.repeat_last_n == 0 ? MOE_OFF : set.repeat_last_n;
    if (set.repeat_last_n < 0) o.repeat_last_n = n_ctx;
    o.seed = set.seed;
    return o;
}

static moe_model *open_model(const moe_gguf *gguf, moe_error *error) {
    int shown = -1;
    moe_model_options o;
    memset(&o, 0, sizeof o);
    o.pages = set.mmap ? (moe_pages)set.pages : MOE_PAGES_COPY;
    o.prefault = set.prefault ? MOE_ON : 0;
    o.mlock = set.mlock ? MOE_ON : 0;
    o.numa = (moe_numa)set.numa;
    o.progress = on_progress;
    o.progress_user = isatty(STDERR_FILENO) ? &shown : NULL;
    moe_model *model = gguf ? moe_model_open_gguf(gguf, &o, error)
                            : moe_model_open(set.model, &o, error);
    if (shown >= 0) fprintf(stderr, "\r%60s\r", "");
    return model;
}

// ---- --info ----------------------------------------------------------------------------------

static void show_scalar(const moe_gguf_value *v, uint64_t i, const void **cursor) {
    int64_t whole;
    double number;
    int truth;
    uint64_t large;
    moe_string s;
    switch (v->element_type) {
    case MOE_VALUE_STRING:
        if (moe_gguf_value_string(v, cursor, &s)) {
            fputc('"', stdout);
            tool_print(stdout, s.data, s.size, v->type == MOE_VALUE_ARRAY ? 24 : 200);
            fputc('"', stdout);
        }
        break;
    case MOE_VALUE_BOOL:
        if (moe_gguf_value_bool(v, i, &truth)) fputs(truth ? "true" : "false", stdout);
        break;
    case MOE_VALUE_FLOAT32:
    case MOE_VALUE_FLOAT64:
        if (moe_gguf_value_float(v, i, &number)) printf("%.7g", number);
        break;
    default:
        if (moe_gguf_value_int(v, i, &whole)) {
            printf("%lld", (long long)whole);
        } else if (v->element_type == MOE_VALUE_UINT64) {
            memcpy(&large, (const char *)v->data + i * 8, 8);
            printf("%llu", (unsigned long long)large);
        }
    }
}

static void show_metadata(const moe_gguf *gguf) {
    int64_t n = moe_gguf_n_values(gguf);
    printf("\nmetadata (%lld keys)\n", (long long)n);
    for (int64_t k = 0; k < n; k++) {
        const moe_gguf_value *v = moe_gguf_value_at(gguf, k);
        const void *cursor = NULL;
        fputs("  ", stdout);
        tool_print(stdout, v->key.data, v->key.size, 100);
        printf("%*s", v->key.size < 44 ? 45 - (int)v->key.size : 1, "");
        if (v->type == MOE_VALUE_ARRAY) printf("%llu: ", (unsigned long long)v->count);
        for (uint64_t i = 0; i < v->count && i < 6; i++) {
            if (i) fputs(", ", stdout);
            show_scalar(v, i, &cursor);
        }
        puts(v->count > 6 ? ", ..." : "");
    }
}

// Tensors counted by type; files with more kinds of type ids than there is room for are odd.
static void show_tensors(const moe_gguf *gguf) {
    struct {
        moe_type type;
        long long count;
        double bytes;
    } row[64];
    int n_rows = 0;
    int64_t n = moe_gguf_n_tensors(gguf);
    char size[32];
    for (int64_t t = 0; t < n; t++) {
        const moe_gguf_tensor *tensor = moe_gguf_tensor_at(gguf, t);
        int r = 0;
        while (r < n_rows && row[r].type != tensor->type) r++;
        if (r == 64) continue;
        if (r == n_rows) {
            row[n_rows].type = tensor->type;
            row[n_rows].count = 0;
            row[n_rows++].bytes = 0;
        }
        row[r].count++;
        row[r].bytes += (double)tensor->size;
    }
    printf("\ntensors (%lld)\n  %-10s %8s %20s\n", (long long)n, "type", "count", "bytes");
    for (int r = 0; r < n_rows; r++) {
        char name[32];
        snprintf(name, sizeof name, "%s", moe_type_name(row[r].type));
        if (strcmp(name, "?") == 0) snprintf(name, sizeof name, "id %lld", (long long)row[r].type);
        printf("  %-10s %8lld %20.0f  %s%s\n", name, row[r].count, row[r].bytes,
               tool_size(size, row[r].bytes),
               moe_type_supported(row[r].type) ? "" : "  (not supported)");
    }
}

static int show_memory(const moe_model *model) {
    const moe_model_info *info = moe_model_get_info(model);
    moe_session_options o = session_options(model);
    moe_session_info need;
    moe_error error;
    char size[32], more[32];
    printf("\nmodel\n  family %s, context %d, %d layers, width %d, vocabulary %d\n"
           "  heads %d (%d for keys and values), experts %d (%d used, %d shared)\n",
           info->family, info->n_ctx_train, info->n_layer, info->n_embd, info->n_vocab,
           info->n_head, info->n_head_kv, info->n_expert, info->n_expert_used,
           info->n_expert_shared);
    printf("  parameters        %16lld\n", (long long)info->n_params);
    printf("  weights           %16lld  %s\n", (long long)info->n_bytes,
           tool_size(size, (double)info->n_bytes));
    printf("  read per token    %16lld  %s\n", (long long)info->n_bytes_token,
           tool_size(size, (double)info->n_bytes_token));
    if (moe_session_estimate(model, &o, &need, &error) != MOE_OK)
        return tool_fail(program, "cannot tell the memory needed", &error);
    double sum = (double)info->n_bytes + (double)info->n_bytes_made + (double)need.kv_bytes +
                 (double)need.checkpoint_bytes + (double)need.work_bytes;
    printf("\nmemory needed with %d tokens of context, %d at once\n", need.n_ctx, need.n_batch);
    const moe_model_memory *memory = moe_model_get_memory(model);
    printf("  weights           %16lld  %s (%s)\n", (long long)info->n_bytes,
           tool_size(size, (double)info->n_bytes),
           memory->pages == MOE_PAGES_MAP ? "mapped: shared, and only while in use"
                                          : "copied: of this process alone");
    if (info->n_bytes_made)
        printf("  made of weights   %16lld  %s (attn_kv_b's keys, transposed)\n",
               (long long)info->n_bytes_made, tool_size(size, (double)info->n_bytes_made));
    printf("  keys and values   %16zu  %s\n", need.kv_bytes - need.state_bytes,
           tool_size(size, (double)(need.kv_bytes - need.state_bytes)));
    if (need.state_bytes)
        printf("  states            %16zu  %s\n"
               "  %2d checkpoints    %16zu  %s\n", need.state_bytes,
               tool_size(size, (double)need.state_bytes), need.n_checkpoints,
               need.checkpoint_bytes, tool_size(more, (double)need.checkpoint_bytes));
    printf("  work              %16zu  %s\n", need.work_bytes,
           tool_size(size, (double)need.work_bytes));
    printf("  together          %16.0f  %s\n", sum, tool_size(size, sum));
    printf("  pages             %s\n", memory->text);
    return TOOL_OK;
}

// Shows what the file says even if the library cannot run it; that is an error all the same.
static int show_info(void) {
    moe_error error;
    moe_gguf_options o;
    char size[32];
    memset(&o, 0, sizeof o);
    o.pages = set.mmap ? (moe_pages)set.pages : MOE_PAGES_COPY;
    moe_gguf *gguf = moe_gguf_open(set.model, &o, &error);
    if (!gguf) return tool_fail(program, set.model, &error);
    printf("%s: GGUF version %u, %llu bytes (%s)\n", set.model, (unsigned)moe_gguf_version(gguf),
           (unsigned long long)moe_gguf_file_size(gguf),
           tool_size(size, (double)moe_gguf_file_size(gguf)));
    show_metadata(gguf);
    show_tensors(gguf);
    moe_model *model = open_model(gguf, &error);
    int status = model ? show_memory(model) : TOOL_ERROR;
    if (!model) {
        fflush(stdout);
        tool_fail(program, "this model cannot be run", &error);
    }
    moe_model_close(model);
    moe_gguf_close(gguf);
    return status;
}

// ---- generating ------------------------------------------------------------------------------

typedef struct output {
    int failed; // errno of a write
    char last;  // the last byte written
} output;

static int on_text(void *user, const char *data, size_t size) {
    output *out = (output *)user;
    if (fwrite(data, 1, size, stdout) != size || fflush(stdout) != 0) out->failed = errno;
    else if (size) out->last = data[size - 1];
    return !out->failed && !interrupted;
}

// The prompt's tokens, for the caller to free; NULL after a message.
static int32_t *tokenize(const moe_vocab *vocab, const text_buffer *prompt, int32_t *n) {
    unsigned flags = MOE_TOKENIZE_ADD_SPECIAL | MOE_TOKENIZE_PARSE_SPECIAL;
    const char *data = prompt->data ? prompt->data : "";
    int64_t count = moe_vocab_tokenize(vocab, data, prompt->size, flags, NULL, 0);
    if (count == 0) {
        // nothing was given: the model may begin by itself where it knows how to
        int32_t *begin = (int32_t *)malloc(sizeof *begin);
        if (begin && (*begin = moe_vocab_bos(vocab)) >= 0) {
            *n = 1;
            return begin;
        }
        free(begin);
        fprintf(stderr, "%s: the prompt is empty, and the model has no token to begin with\n",
                program);
        return NULL;
    }
    int32_t *tokens = count > 0 && count <= INT32_MAX
                          ? (int32_t *)malloc((size_t)count * sizeof *tokens)
                          : NULL;
    if (tokens) count = moe_vocab_tokenize(vocab, data, prompt->size, flags, tokens, (size_t)count);
    if (tokens && count > 0) {
        *n = (int32_t)count;
        return tokens;
    }
    free(tokens);
    fprintf(stderr, "%s: cannot turn the prompt into tokens: %s\n", program,
            count < 0 ? moe_status_name((moe_status)-count) : "out of memory");
    return NULL;
}

// reused: tokens of the prompt that were in the prompt cache; -1: there was none.
static void show_timing(const moe_model *model, const moe_generate_result *r, int32_t reused,
                        double load) {
    double prompt = r->prompt_seconds > 0 ? r->n_prompt / r->prompt_seconds : 0;
    double generation = r->generate_seconds > 0 ? r->n_generated / r->generate_seconds : 0;
    fprintf(stderr, "load       %9.3f s\n", load);
    fprintf(stderr, "prompt     %9.3f s, %6d tokens, %9.2f t/s", r->prompt_seconds, r->n_prompt,
            prompt);
    if (reused >= 0) fprintf(stderr, ", %d more reused", (int)reused);
    fputs("\n", stderr);
    fprintf(stderr, "generation %9.3f s, %6d tokens, %9.2f t/s, %.2f GB/s of weights read; %s\n",
            r->generate_seconds, r->n_generated, generation,
            generation * (double)moe_model_get_info(model)->n_bytes_token * 1e-9,
            r->reason == MOE_STOP_CALLER ? "interrupted" : moe_stop_reason_text(r->reason));
}

// -n 0: the prompt is evaluated, nothing is generated.
static moe_status evaluate(moe_session *session, const int32_t *tokens, int32_t n,
                           moe_generate_result *result, moe_error *error) {
    double start = tool_seconds();
    moe_status status = moe_session_eval(session, tokens, n, error);
    result->reason = MOE_STOP_LIMIT;
    result->n_prompt = n;
    result->prompt_seconds = tool_seconds() - start;
    return status;
}

// What an earlier run has left. Whatever is wrong with it, the prompt can be evaluated without.
// Returns how many tokens the prompt begins with are there.
static int32_t cache_load(moe_session *session, const int32_t *tokens, int32_t n) {
    struct stat file;
    moe_error error;
    int32_t common = 0;
    if (stat(set.prompt_cache, &file) != 0 && errno == ENOENT) return 0;
    if (moe_session_load(session, set.prompt_cache, &error))
        fprintf(stderr, "%s: warning: %s is not used: %s\n", program, set.prompt_cache, error.text);
    const int32_t *there = moe_session_tokens(session), length = moe_session_length(session);
    while (common < n && common < length && there[common] == tokens[common]) common++;
    return common;
}

static int cache_save(const moe_session *session) {
    moe_error error;
    if (moe_session_save(session, set.prompt_cache, &error) == MOE_OK) return TOOL_OK;
    return tool_fail(program, set.prompt_cache, &error);
}

// The prompt through the prompt cache: its tokens that are not there are evaluated. *failed: the
// cache could not be written.
static moe_status evaluate_cached(moe_session *session, moe_sampler *sampler,
                                  const int32_t *tokens, int32_t n, int32_t *reused,
                                  moe_generate_result *result, int *failed, moe_error *error) {
    const int32_t common = cache_load(session, tokens, n);
    double start = tool_seconds();
    moe_status status = moe_session_sync(session, tokens, n, reused, error);
    result->reason = MOE_STOP_LIMIT;
    result->prompt_seconds = tool_seconds() - start;
    if (status) return status;
    result->n_prompt = n - *reused;
    for (int32_t i = 0; i < n; i++) moe_sampler_accept(sampler, tokens[i]);
    if (common < n && !set.prompt_cache_all && !set.prompt_cache_ro) *failed = cache_save(session);
    return MOE_OK;
}

// Runs the prompt's tokens through session and sampler; the timing goes to stderr.
static int generate(moe_session *session, moe_sampler *sampler, const int32_t *tokens, int32_t n,
                    double load_seconds) {
    output out = {0, '\n'};
    const moe_model_memory *memory = moe_model_get_memory(moe_session_model(session));
    moe_error error;
    moe_generate_options o;
    moe_generate_result result;
    memset(&o, 0, sizeof o);
    memset(&result, 0, sizeof result);
    o.max_tokens = set.n_predict;
    o.sampler = sampler;
    o.ignore_end = set.ignore_eos ? MOE_ON : 0;
    o.special = set.special ? MOE_ON : 0;
    o.on_text = on_text;
    o.user = &out;
    int32_t reused = -1;
    int cache_failed = 0;
    moe_status status = MOE_OK;
    if (set.prompt_cache)
        status = evaluate_cached(session, sampler, tokens, n, &reused, &result, &cache_failed,
                                 &error);
    const moe_generate_result prompt = result;
    if (!status && set.n_predict)
        status = moe_generate(session, tokens, set.prompt_cache ? 0 : n, &o, &result, &error);
    else if (!status && !set.prompt_cache)
        status = evaluate(session, tokens, n, &result, &error);
    if (set.prompt_cache)
        result.n_prompt = prompt.n_prompt, result.prompt_seconds = prompt.prompt_seconds;
    if (!status && set.prompt_cache && set.prompt_cache_all) cache_failed = cache_save(session);
    if (isatty(STDOUT_FILENO) && out.last != '\n') fputs("\n", stdout);
    if (out.failed) {
        fprintf(stderr, "%s: cannot write the text: %s\n", program, strerror(out.failed));
        return TOOL_ERROR;
    }
    if (status != MOE_OK && !(interrupted && status == MOE_ERROR_CANCELLED)) {
        if (status == MOE_ERROR_CONTEXT_FULL)
            fprintf(stderr, "%s: the prompt has %d tokens, the context holds %d (-c)\n", program, n,
                    moe_session_get_info(session)->n_ctx);
        return tool_fail(program, "cannot generate", &error);
    }
    if (set.expert_stats && heatmap_write(set.expert_stats, session)) {
        fprintf(stderr, "%s: cannot write %s: %s\n", program, set.expert_stats, strerror(errno));
        return TOOL_ERROR;
    }
    const moe_model *model = moe_session_model(session);
    if (moe_model_get_memory(model) != memory)
        fprintf(stderr, "%s: %s\n", program, moe_model_get_memory(model)->text);
    if (status == MOE_ERROR_CANCELLED) fprintf(stderr, "%s: interrupted\n", program);
    else show_timing(model, &result, reused, load_seconds);
    return interrupted ? TOOL_INTERRUPTED : cache_failed ? TOOL_ERROR : TOOL_OK;
}

// --logprobs: a line for each token instead of the text.
static int generate_lines(moe_generator *generator, const moe_vocab *vocab, moe_error *error) {
    moe_generated g;
    text_buffer line;
    moe_status status;
    int failed = 0;
    memset(&line, 0, sizeof line);
    memset(&g, 0, sizeof g);
    do {
        status = moe_generator_next(generator, &g, error);
        if (status || g.token < 0) continue;
        text_cut(&line, 0);
        logprob_line(&line, vocab, &g);
        failed = line.failed || fwrite(line.data, 1, line.size, stdout) != line.size ||
                 fflush(stdout);
    } while (!status && !failed && g.reason == MOE_STOP_NONE);
    if (failed)
        fprintf(stderr, "%s: cannot write the tokens: %s\n", program,
                line.failed ? "out of memory" : strerror(errno));
    text_free(&line);
    if (status) return tool_fail(program, "cannot generate", error);
    return failed ? TOOL_ERROR : interrupted ? TOOL_INTERRUPTED : TOOL_OK;
}

static int generate_logprobs(moe_session *session, moe_sampler *sampler, const int32_t *tokens,
                             int32_t n) {
    moe_error error;
    moe_generator_options o;
    memset(&o, 0, sizeof o);
    o.sampler = sampler;
    o.max_tokens = set.n_predict;
    o.ignore_end = set.ignore_eos ? MOE_ON : 0;
    o.n_logprobs = set.logprobs ? set.logprobs : -1;
    const moe_status status = moe_session_eval(session, tokens, n, &error);
    if (status == MOE_ERROR_CANCELLED) return TOOL_INTERRUPTED;
    if (status) return tool_fail(program, "cannot evaluate the prompt", &error);
    if (!set.n_predict) return TOOL_OK;
    moe_generator *generator = moe_generator_open(session, &o, &error);
    if (!generator) return tool_fail(program, "cannot generate", &error);
    const moe_vocab *vocab = moe_model_vocab(moe_session_model(session));
    const int result = generate_lines(generator, vocab, &error);
    moe_generator_close(generator);
    return result;
}

// ---- --perplexity ----------------------------------------------------------------------------

// What the file puts in front of texts; -1: nothing. *adds_end: it puts something behind them, too.
static int32_t first_token(const moe_vocab *vocab, int *adds_end) {
    int32_t around[2] = {-1, -1};
    const int64_t n = moe_vocab_tokenize(vocab, "", 0, MOE_TOKENIZE_ADD_SPECIAL, around, 2);
    const int32_t bos = moe_vocab_bos(vocab);
    *adds_end = n > 1 || (n == 1 && around[0] != bos);
    return n > 0 && around[0] == bos ? bos : -1;
}

// Behind each chunk the value so far, at the end its standard error.
static int show_chunks(moe_session *session, int32_t *tokens, int32_t n_chunks, int32_t bos) {
    const moe_model *model = moe_session_model(session);
    const int32_t n_ctx = moe_session_get_info(session)->n_ctx;
    const int32_t n_rows = moe_model_get_info(model)->n_vocab;
    const int32_t n_known = moe_vocab_size(moe_model_vocab(model));
    const int32_t n_words = n_known < n_rows ? n_known : n_rows;
    perplexity p = {0, 0, 0};
    moe_error error;
    for (int32_t i = 0; i < n_chunks; i++) {
        int32_t *chunk = tokens + (size_t)i * (size_t)n_ctx;
        const moe_status status = perplexity_chunk(&p, session, chunk, n_ctx, bos, n_words, &error);
        if (status && interrupted) return TOOL_INTERRUPTED;
        if (status) return tool_fail(program, "cannot evaluate the text", &error);
        printf("[%d]%.4f,", (int)i + 1, perplexity_value(&p));
        if (fflush(stdout)) break;
    }
    const double spread = perplexity_error(&p);
    if (spread < 0) puts("\nUnexpected negative standard deviation of log(prob)");
    else printf("\nFinal estimate: PPL = %.4f +/- %.5f\n", perplexity_value(&p), spread);
    return TOOL_OK; // output_finish looks whether it was written
}

// The text's tokens; what looks like control tokens is text here.
static int32_t *perplexity_tokens(const moe_vocab *vocab, const text_buffer *prompt, int64_t *n) {
    const char *data = prompt->data ? prompt->data : "";
    const unsigned flags = MOE_TOKENIZE_ADD_SPECIAL;
    *n = moe_vocab_tokenize(vocab, data, prompt->size, flags, NULL, 0);
    int32_t *tokens = (int32_t *)malloc((size_t)(*n > 0 ? *n : 1) * sizeof *tokens);
    if (tokens && *n > 0)
        *n = moe_vocab_tokenize(vocab, data, prompt->size, flags, tokens, (size_t)*n);
    if (!tokens || *n < 0) fprintf(stderr, "%s: cannot turn the text into tokens\n", program);
    return tokens;
}

static int show_perplexity(moe_session *session, const text_buffer *prompt) {
    const moe_vocab *vocab = moe_model_vocab(moe_session_model(session));
    const int32_t n_ctx = moe_session_get_info(session)->n_ctx, least = n_ctx < 4 ? 4 : n_ctx;
    int adds_end;
    int64_t n;
    const int32_t bos = first_token(vocab, &adds_end);
    int32_t *tokens = perplexity_tokens(vocab, prompt, &n);
    int status = TOOL_ERROR;
    if (!tokens || n < 0) {
    } else if (adds_end) {
        fprintf(stderr, "%s: the model's texts end with a token of their own: there is no "
                "definition of perplexity for it\n", program);
    } else if (n < 2 * (int64_t)n_ctx || n_ctx < least) {
        fprintf(stderr, "%s: perplexity with a context of %d needs at least %d tokens, the text "
                "has %lld (-c)\n", program, (int)least, 2 * (int)least, (long long)n);
    } else {
        const int64_t most = n / n_ctx;
        const int32_t n_chunks = (int32_t)(set.chunks < 0 || set.chunks > most ? most : set.chunks);
        fprintf(stderr, "%s: perplexity over %d chunks of %d tokens\n", program, (int)n_chunks,
                (int)n_ctx);
        status = show_chunks(session, tokens, n_chunks, bos);
    }
    free(tokens);
    return status;
}

// ---- dialogues -------------------------------------------------------------------------------

// The texts that talk_options point to; without memory for them: a message, and 0.
typedef struct dialogue {
    text_buffer system, prompt, template_text, tools;
} dialogue;

// --chat-template: one of ours, of the file, or a template.
static int choose_template(dialogue *d, const moe_vocab *vocab) {
    const char *chosen = set.chat_template;
    if (!chosen || template_write(&d->template_text, chosen)) return TOOL_OK;
    if (strstr(chosen, "{{") || strstr(chosen, "{%") || moe_chat_template(vocab, chosen).data) {
        text_put(&d->template_text, chosen);
        return TOOL_OK;
    }
    fprintf(stderr, "%s: --chat-template: '", program);
    tool_print(stderr, chosen, strlen(chosen), 60);
    fputs("' is no template, nor the name of one: ", stderr);
    template_names(stderr);
    fputs("\n", stderr);
    return TOOL_USAGE;
}

static talk_options dialogue_options(const dialogue *d) {
    talk_options o;
    memset(&o, 0, sizeof o);
    o.program = program;
    o.model = set.model;
    o.system = d->system.data ? &d->system : NULL;
    o.tools = d->tools.size ? &d->tools : NULL;
    o.first = d->prompt.size ? &d->prompt : NULL;
    o.template_text = d->template_text.data;
    o.reasoning = set.reasoning;
    o.n_predict = set.n_predict;
    o.ignore_end = set.ignore_eos;
    o.is_single = set.single_turn;
    o.shows_timings = set.show_timings;
    o.interrupted = &interrupted;
    return o;
}

// Is there to be a dialogue? With neither prompt nor template there is nothing to be done.
static int wants_dialogue(const dialogue *d, const moe_vocab *vocab) {
    if (set.conversation) return 1;
    if (set.no_conversation || set.prompt || set.prompt_file) return 0;
    return d->template_text.data || moe_chat_template(vocab, NULL).data;
}

static int talk_with(const dialogue *d, moe_session *session, moe_sampler *sampler) {
    const talk_options o = dialogue_options(d);
    const int status = talk_run(&o, session, sampler);
    if (!set.expert_stats || !heatmap_write(set.expert_stats, session)) return status;
    fprintf(stderr, "%s: cannot write %s: %s\n", program, set.expert_stats, strerror(errno));
    return TOOL_ERROR;
}

// --tokens; a file with a vocabulary alone is enough.
static int show_tokens(dialogue *d) {
    moe_error error;
    moe_gguf *gguf = moe_gguf_open(set.model, NULL, &error);
    moe_vocab *vocab = gguf ? moe_vocab_open(gguf, &error) : NULL;
    moe_gguf_close(gguf);
    if (!vocab) return tool_fail(program, set.model, &error);
    int status = choose_template(d, vocab);
    int32_t *tokens = NULL, n_prompt;
    size_t n = 0;
    if (!status && set.conversation) {
        const talk_options o = dialogue_options(d);
        if (talk_first_tokens(&o, vocab, &tokens, &n, &error))
            status = tool_fail(program, "cannot format the dialogue", &error);
    } else if (!status) {
        tokens = tokenize(vocab, &d->prompt, &n_prompt);
        if (tokens) n = (size_t)n_prompt;
        else status = TOOL_ERROR;
    }
    if (!status && !tokens_show(vocab, tokens, n, isatty(STDOUT_FILENO))) status = TOOL_ERROR;
    if (!status) fprintf(stderr, "%s: %lu tokens\n", program, (unsigned long)n);
    free(tokens);
    moe_vocab_close(vocab);
    return status;
}

// ---- putting it together ---------------------------------------------------------------------

static void show_setup(const moe_model *model, const moe_session *session) {
    const moe_model_info *m = moe_model_get_info(model);
    const moe_session_info *s = moe_session_get_info(session);
    static const char *const schedules[] = {"default", "sequential", "parallel", "balanced"};
    char size[32];
    fprintf(stderr, "%s: ", program);
    tool_print(stderr, m->name, strlen(m->name), sizeof m->name);
    fprintf(stderr, "%s%s, %s, context %d, %d threads", m->name[0] ? ", " : "", m->family,
            tool_size(size, (double)m->n_bytes), s->n_ctx, s->n_threads);
    if (s->n_threads_batch != s->n_threads) fprintf(stderr, " (prompt %d)", s->n_threads_batch);
    fprintf(stderr, ", %s, %s, seed %llu\n", moe_isa_name(s->isa), schedules[s->schedule & 3],
            (unsigned long long)set.seed);
    fprintf(stderr, "%s: %s\n", program, moe_model_get_memory(model)->text);
    if (set.numa || set.mlock) tool_memory(program, model);
    if (s->n_ctx > m->n_ctx_train)
        fprintf(stderr, "%s: warning: the model was trained with contexts of %d tokens only\n",
                program, m->n_ctx_train);
}

// From the model on: what is opened here is closed by run().
typedef struct state {
    moe_model *model;
    moe_session *session;
    moe_sampler *sampler;
    int32_t *tokens;
    dialogue texts;
} state;

// What is to be done with model, session and sampler.
static int run_opened(state *s, int talks, double load_seconds) {
    int32_t n = 0;
    if (!set.perplexity && !talks) {
        s->tokens = tokenize(moe_model_vocab(s->model), &s->texts.prompt, &n);
        if (!s->tokens) return TOOL_ERROR;
    }
    show_setup(s->model, s->session);
    if (set.perplexity) return show_perplexity(s->session, &s->texts.prompt);
    if (talks) return talk_with(&s->texts, s->session, s->sampler);
    if (set.logprobs >= 0) return generate_logprobs(s->session, s->sampler, s->tokens, n);
    return generate(s->session, s->sampler, s->tokens, n, load_seconds);
}

static int open_all(state *s) {
    moe_error error;
    double start = tool_seconds();
    s->model = open_model(NULL, &error);
    if (!s->model && interrupted) return TOOL_INTERRUPTED;
    if (!s->model) return tool_fail(program, set.model, &error);
    const moe_vocab *vocab = moe_model_vocab(s->model);
    if (!vocab) {
        fprintf(stderr, "%s: %s: the model has no vocabulary, so it can neither read nor write "
                "text; --info and moe-bench work\n", program, set.model);
        return TOOL_ERROR;
    }
    const int status = choose_template(&s->texts, vocab);
    const int talks = !status && wants_dialogue(&s->texts, vocab);
    if (status) return status;
    if (!talks && !set.prompt && !set.prompt_file)
        return usage_error("no prompt, and the model has no chat template: give -p TEXT, -p - or "
                           "-f FILE, or --chat-template");
    moe_session_options o = session_options(s->model);
    s->session = moe_session_open(s->model, &o, &error);
    if (!s->session) return tool_fail(program, "cannot open a session", &error);
    double load_seconds = tool_seconds() - start;

    moe_sampler_options so = sampler_options(moe_session_get_info(s->session)->n_ctx);
    s->sampler = moe_sampler_open(&so, moe_model_get_info(s->model)->n_vocab,
                                  moe_vocab_size(vocab), &error);
    if (!s->sampler) return tool_fail(program, "cannot open a sampler", &error);
    return run_opened(s, talks, load_seconds);
}

static int run(void) {
    state s;
    memset(&s, 0, sizeof s);
    int status = read_text(&s.texts.prompt, set.prompt, set.prompt_file);
    if (!status) status = read_text(&s.texts.system, set.system, set.system_file);
    if (!status) status = read_text(&s.texts.template_text, NULL, set.chat_template_file);
    if (!status) status = read_text(&s.texts.tools, NULL, set.tools);
    if (status == TOOL_OK && set.tokens) {
        status = show_tokens(&s.texts);
    } else if (status == TOOL_OK) {
        catch_interrupt(); // not before: Ctrl-C shall end the waiting for input
        status = open_all(&s);
    }
    free(s.tokens);
    text_free(&s.texts.prompt);
    text_free(&s.texts.system);
    text_free(&s.texts.template_text);
    text_free(&s.texts.tools);
    moe_sampler_close(s.sampler);
    moe_session_close(s.session);
    moe_model_close(s.model);
    return status;
}

static uint64_t clock_seed(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) % 4294967296u;
}

static int is_read(const char *path) {
    const char *const inputs[] = {set.model, set.prompt_file, set.system_file,
                                  set.chat_template_file, set.tools};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (inputs[i] && output_is_input(path, inputs[i])) return 1;
    return 0;
}

// Options that contradict each other.
static const char *wrong_mode(void) {
    const int n_modes = set.info + set.perplexity + set.tokens + (set.logprobs >= 0);
    const int has_prompt = set.prompt || set.prompt_file;
    if (set.conversation && set.no_conversation) return "give -cnv or -no-cnv, not both";
    if (n_modes > 1) return "give one of --info, --perplexity, --tokens and --logprobs";
    if (set.conversation && n_modes && !set.tokens)
        return "--info, --perplexity and --logprobs are not for dialogues (-cnv)";
    if (!has_prompt && !set.info && !set.conversation && (n_modes || set.no_conversation))
        return "no prompt: give -p TEXT, -p - or -f FILE";
    if ((set.system || set.system_file || set.tools) && !set.conversation &&
        (has_prompt || set.no_conversation))
        return "-sys and --tools are for dialogues: give -cnv, too, or no prompt";
    if (set.prompt_cache && (set.conversation || !has_prompt) && !set.info)
        return "--prompt-cache is not for dialogues";
    if (set.prompt_cache && n_modes && !set.info)
        return "--prompt-cache is for generating a text";
    return NULL;
}

static const char *wrong_usage(void) {
    if (!set.model) return "no model: give -m FILE";
    if (set.prompt && set.prompt_file) return "give -p or -f, not both";
    if (set.system && set.system_file) return "give -sys or -sysf, not both";
    if (set.chat_template && set.chat_template_file)
        return "give --chat-template or --chat-template-file, not both";
    if (set.expert_stats && is_read(set.expert_stats))
        return "--expert-stats would replace what is read";
    if ((set.prompt_cache_all || set.prompt_cache_ro) && !set.prompt_cache)
        return "--prompt-cache-all and -ro need --prompt-cache FILE";
    if (set.prompt_cache_all && set.prompt_cache_ro)
        return "give --prompt-cache-all or --prompt-cache-ro, not both";
    if (set.prompt_cache && is_read(set.prompt_cache))
        return "--prompt-cache would replace what is read";
    return wrong_mode();
}

int main(int argc, char **argv) {
    int status = tool_parse(program, options, argc, argv);
    if (status) return status;
    if (!tool_kv_type(program, set.k_type, set.v_type, &set.kv_type)) return TOOL_USAGE;
    if (set.help) {
        show_help();
    } else if (set.version) {
        printf("%s (moe_infer %d.%d.%d), %s\n", program, MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
               MOE_VERSION_PATCH, moe_isa_name(moe_isa_resolve(MOE_ISA_BEST)));
    } else {
        const char *wrong = wrong_usage();
        if (wrong) return usage_error(wrong);
        if (set.seed == UINT64_MAX) set.seed = clock_seed();
        status = set.info ? show_info() : run();
    }
    return output_finish(program, status);
}
