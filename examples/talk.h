// moe-cli's dialogue with a person, or with what is on the other side of a pipe: line by line, a
// question and an answer. Include moe_infer.h and tool.h first.
//
// The context keeps the tokens that were really read and generated. The template makes a text of
// the whole dialogue at each turn; as far as it begins with the text that the context stands for,
// the context stays, and only the tokens behind that are evaluated. Templates that leave out
// earlier reasoning make a text that differs from there on.
#ifndef TALK_H
#define TALK_H
#include <signal.h>

#include "line.h"
#include "measure.h"
#include "text.h"

typedef struct talk_options {
    const char *program, *model;
    const text_buffer *system, *first;    // system prompt, first question; NULL: none
    const text_buffer *tools;      // a list in JSON; NULL: none
    const char *template_text;     // NULL: the file's
    int32_t reasoning;             // TALK_...
    int32_t n_predict;
    int ignore_end, is_single, shows_timings;
    volatile sig_atomic_t *interrupted; // what the session's should_stop looks at
} talk_options;

enum { TALK_AUTO, TALK_ON, TALK_OFF };

// A question, or what a tool is said to have returned, and the answer. The marks tell how much of
// the context was there before.
typedef struct talk_turn {
    text_buffer question, answer, reasoning;
    text_buffer calls;            // of tools, elements of a list in JSON
    text_buffer raw;              // the answer with the white space around it; "" if that is none
    int is_raw;                   // the template gets that
    int is_result;
    size_t n_tokens, n_text;
} talk_turn;

typedef struct talk {
    const talk_options *o;
    const moe_vocab *vocab;
    moe_session *session;
    moe_sampler *sampler;
    talk_turn *turns;
    size_t n_turns, max_turns;
    int32_t *tokens;              // what the context holds or shall hold,
    size_t n_tokens, max_tokens;
    text_buffer context;                 // and the text that they are; "" if none is known
    text_buffer request, formatted;      // of the turn that is being answered
    text_buffer call_name, call_id, call_arguments; // of the call that is coming in
    int is_terminal, is_dim, is_begun; // of what is written
    char last;                    // byte that was written
    int failed;                   // errno of a write
    int was_interrupted;          // the next Ctrl-C at an empty prompt ends
} talk;

// ---- what is said besides --------------------------------------------------------------------

#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
static inline void talk_say(const talk *t, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", t->o->program);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

static inline void talk_help(const talk *t) {
    fputs("  /regen      another answer to the last question\n"
          "  /undo       forget the last question and its answer\n"
          "  /clear      forget everything but the system prompt\n"
          "  /save FILE  write the dialogue as JSON\n"
          "  /exit       end, as Ctrl-D does\n"
          "  /help       this\n"
          "A backslash at the end of a line, Alt-Enter or a pasted text: several lines.\n"
          "Ctrl-C stops an answer and keeps what came of it. A blank before / sends it.\n"
          "Behind the call of a tool, what is typed goes to the model as its result.\n",
          t->is_terminal ? stdout : stderr);
}

// ---- the dialogue ----------------------------------------------------------------------------

static inline void talk_turn_unanswer(talk_turn *turn) {
    text_free(&turn->answer);
    text_free(&turn->reasoning);
    text_free(&turn->calls);
    text_free(&turn->raw);
    turn->is_raw = 0;
}
static inline void talk_turn_free(talk_turn *turn) {
    talk_turn_unanswer(turn);
    text_free(&turn->question);
}

static inline talk_turn *talk_last(talk *t) {
    return t->n_turns ? &t->turns[t->n_turns - 1] : NULL;
}

// Does the model wait for what a tool returns?
static inline int talk_has_called(const talk *t) {
    return t->n_turns && t->turns[t->n_turns - 1].calls.size;
}

static inline talk_turn *talk_add_turn(talk *t, const char *question, size_t size) {
    if (t->n_turns == t->max_turns) {
        const size_t n = t->max_turns * 2 + 16;
        talk_turn *grown = (talk_turn *)realloc(t->turns, n * sizeof *grown);
        if (!grown) return NULL;
        t->turns = grown;
        t->max_turns = n;
    }
    talk_turn *turn = &t->turns[t->n_turns];
    memset(turn, 0, sizeof *turn);
    turn->is_result = talk_has_called(t);
    if (!text_append(&turn->question, question, size)) return NULL;
    turn->n_tokens = t->n_tokens;
    turn->n_text = t->context.size;
    t->n_turns++;
    return turn;
}

// The context as it was before the last turn.
static inline void talk_rewind(talk *t) {
    const talk_turn *turn = talk_last(t);
    if (t->n_tokens > turn->n_tokens) t->n_tokens = turn->n_tokens;
    text_cut(&t->context, turn->n_text);
}
static inline void talk_drop_last(talk *t) {
    talk_rewind(t);
    talk_turn_free(&t->turns[--t->n_turns]);
}

// Nothing is known of the context: the next turn compares tokens.
static inline void talk_forget_context(talk *t) {
    t->n_tokens = 0;
    text_cut(&t->context, 0);
    for (size_t i = 0; i < t->n_turns; i++) t->turns[i].n_tokens = t->turns[i].n_text = 0;
}
static inline void talk_drop_first(talk *t) {
    talk_turn_free(&t->turns[0]);
    memmove(t->turns, t->turns + 1, --t->n_turns * sizeof *t->turns);
    talk_forget_context(t);
}

// ---- requests --------------------------------------------------------------------------------

static inline void talk_message(text_buffer *out, const char *role, const text_buffer *content) {
    text_put(out, "{\"role\": \"");
    text_put(out, role);
    text_put(out, "\", \"content\": ");
    text_json(out, content->data ? content->data : "", content->size);
}

static inline void talk_answer_message(text_buffer *out, const talk_turn *turn, int is_exact) {
    talk_message(out, "assistant", is_exact && turn->is_raw ? &turn->raw : &turn->answer);
    if (turn->reasoning.size) {
        text_put(out, ", \"reasoning_content\": ");
        text_json(out, turn->reasoning.data, turn->reasoning.size);
    }
    if (turn->calls.size) {
        text_put(out, ", \"tool_calls\": [");
        text_append(out, turn->calls.data, turn->calls.size);
        text_put(out, "]");
    }
    text_put(out, "}");
}

// is_exact: as the template shall get them, not a reader.
static inline void talk_messages(const talk *t, text_buffer *out, const char *between,
                                 int is_exact) {
    text_put(out, "{\"messages\": [");
    if (t->o->system) {
        text_put(out, between);
        talk_message(out, "system", t->o->system);
        text_put(out, "}");
    }
    for (size_t i = 0; i < t->n_turns; i++) {
        const talk_turn *turn = &t->turns[i];
        text_put(out, i || t->o->system ? "," : "");
        text_put(out, between);
        talk_message(out, turn->is_result ? "tool" : "user", &turn->question);
        text_put(out, "}");
        if (!turn->answer.data && !turn->reasoning.data) continue;
        text_put(out, ",");
        text_put(out, between);
        talk_answer_message(out, turn, is_exact);
    }
    text_put(out, between);
    text_put(out, "]");
}

static inline void talk_request(talk *t) {
    text_buffer *r = &t->request;
    text_cut(r, 0);
    talk_messages(t, r, "", 1);
    if (t->o->tools) {
        text_put(r, ", \"tools\": ");
        text_append(r, t->o->tools->data, t->o->tools->size);
    }
    if (t->o->template_text) {
        text_put(r, ", \"chat_template\": ");
        text_json(r, t->o->template_text, strlen(t->o->template_text));
    }
    if (t->o->reasoning != TALK_AUTO)
        text_put(r, t->o->reasoning == TALK_ON ? ", \"enable_thinking\": true"
                                               : ", \"enable_thinking\": false");
    text_put(r, ", \"add_generation_prompt\": true}");
}

static inline moe_status talk_no_memory(moe_error *error) {
    memset(error, 0, sizeof *error);
    error->status = MOE_ERROR_MEMORY;
    strcpy(error->text, "out of memory");
    return error->status;
}

// The text that the template makes of the request.
static inline moe_status talk_format(talk *t, moe_error *error) {
    text_buffer *f = &t->formatted;
    talk_request(t);
    if (t->request.failed) return talk_no_memory(error);
    const char *request = t->request.data;
    int64_t n = moe_chat_format(t->vocab, request, t->request.size, NULL, 0, error);
    text_cut(f, 0);
    if (n >= 0 && (size_t)n >= f->capacity) {
        char *grown = (char *)realloc(f->data, (size_t)n + 1);
        if (!grown) return talk_no_memory(error);
        f->data = grown;
        f->capacity = (size_t)n + 1;
    }
    if (n >= 0) n = moe_chat_format(t->vocab, request, t->request.size, f->data, (size_t)n, error);
    if (n < 0) return (moe_status)-n;
    f->size = (size_t)n;
    f->data[n] = 0;
    return MOE_OK;
}

// Does the dialogue go on as the context does?
static inline int talk_goes_on(const talk *t) {
    const size_t held = t->context.size;
    return held && held <= t->formatted.size && !memcmp(t->context.data, t->formatted.data, held);
}

// White space around an answer is no part of it, but of the context: some templates put it back,
// with others the answer as it came is the one to go on with.
static inline moe_status talk_format_on(talk *t, moe_error *error) {
    talk_turn *before = t->n_turns > 1 ? &t->turns[t->n_turns - 2] : NULL;
    moe_status status = talk_format(t, error);
    if (status || !before || !before->raw.size || before->is_raw || talk_goes_on(t)) return status;
    before->is_raw = 1;
    if (!talk_format(t, error) && talk_goes_on(t)) return MOE_OK;
    before->is_raw = 0;
    return talk_format(t, error);
}

// The request's tokens, for the caller to free.
static inline moe_status talk_tokenize(talk *t, int32_t **tokens, size_t *n, moe_error *error) {
    const char *request = t->request.data;
    const size_t size = t->request.size;
    int64_t count = moe_chat_tokenize(t->vocab, request, size, NULL, 0, error);
    *tokens = count >= 0 ? (int32_t *)malloc(((size_t)count + 1) * sizeof **tokens) : NULL;
    if (count >= 0 && !*tokens) return talk_no_memory(error);
    if (*tokens)
        count = moe_chat_tokenize(t->vocab, request, size, *tokens, (size_t)count, error);
    if (count < 0) return (moe_status)-count;
    *n = (size_t)count;
    return MOE_OK;
}

// ---- the context -----------------------------------------------------------------------------

static inline int talk_room(talk *t, size_t n) {
    if (n <= t->max_tokens - t->n_tokens) return 1;
    const size_t most = (t->n_tokens + n) * 2;
    int32_t *grown = (int32_t *)realloc(t->tokens, most * sizeof *grown);
    if (!grown) return 0;
    t->tokens = grown;
    t->max_tokens = most;
    return 1;
}

// Where in a text a token that begins at `at` ends; SIZE_MAX: it is not there. BOS may be missing
// in the text, and a token of an SPM vocabulary may have a blank more in front.
static inline size_t talk_step(const talk *t, const text_buffer *text, size_t at, int32_t token,
                               int is_first, text_buffer *piece) {
    text_cut(piece, 0);
    token_text(piece, t->vocab, token);
    const size_t left = text->size - at, k = piece->size;
    if (k <= left && (!k || !memcmp(text->data + at, piece->data, k))) return at + k;
    if (*piece->data == ' ' && k - 1 <= left && !memcmp(text->data + at, piece->data + 1, k - 1))
        return at + k - 1;
    return is_first && moe_vocab_is_control(t->vocab, token) ? at : SIZE_MAX;
}

// The last place where the context and the new dialogue have the same text before them, and both
// begin a token: so many tokens of each are there, and so many bytes.
typedef struct talk_joint {
    size_t n_held, n_whole, n_text;
} talk_joint;

static inline talk_joint talk_meet(const talk *t, const int32_t *whole, size_t n) {
    talk_joint joint = {0, 0, 0};
    size_t i = 0, k = 0, at = 0, whole_at = 0; // tokens and bytes of the context, of the other
    text_buffer piece;
    memset(&piece, 0, sizeof piece);
    while (i < t->n_tokens && k < n) {
        const int32_t a = t->tokens[i], b = whole[k];
        const int both = at == whole_at;
        if (both && a != b && // control tokens are no text like others
            (moe_vocab_is_control(t->vocab, a) || moe_vocab_is_control(t->vocab, b)))
            break;
        if (both || at < whole_at) at = talk_step(t, &t->context, at, a, !i++, &piece);
        if (both || whole_at < at)
            whole_at = talk_step(t, &t->formatted, whole_at, b, !k++, &piece);
        if (at == SIZE_MAX || whole_at == SIZE_MAX) break;
        if (at != whole_at) continue;
        if (memcmp(t->context.data + joint.n_text, t->formatted.data + joint.n_text,
                   at - joint.n_text) != 0)
            break;
        joint.n_held = i, joint.n_whole = k, joint.n_text = at;
    }
    text_free(&piece);
    return joint;
}

// t->tokens become what the context shall hold: of what it holds what is part of the dialogue, and
// what is new.
static inline moe_status talk_extend(talk *t, const int32_t *whole, size_t n, moe_error *error) {
    const talk_joint joint = talk_meet(t, whole, n);
    const size_t n_new = n - joint.n_whole;
    t->n_tokens = joint.n_held;
    text_cut(&t->context, joint.n_text);
    for (size_t i = 0; i < t->n_turns; i++)
        if (t->turns[i].n_tokens > joint.n_held)
            t->turns[i].n_tokens = joint.n_held, t->turns[i].n_text = joint.n_text;
    if (!talk_room(t, n_new)) return talk_no_memory(error);
    memcpy(t->tokens + t->n_tokens, whole + joint.n_whole, n_new * sizeof *whole);
    t->n_tokens += n_new;
    return MOE_OK;
}

// Room that an answer should have: without it, old turns go.
static inline size_t talk_reserve(const talk *t) {
    const size_t n_ctx = (size_t)moe_session_get_info(t->session)->n_ctx;
    const size_t wish = t->o->n_predict > 0 ? (size_t)t->o->n_predict : 256;
    return wish < n_ctx / 4 ? wish : n_ctx / 4;
}

// The tokens of the dialogue, without its oldest turns if they do not fit.
static inline moe_status talk_fit(talk *t, moe_error *error) {
    const size_t n_ctx = (size_t)moe_session_get_info(t->session)->n_ctx;
    size_t n_dropped = 0, n = 0;
    for (;;) {
        int32_t *whole = NULL;
        moe_status status = talk_format_on(t, error);
        if (!status) status = talk_tokenize(t, &whole, &n, error);
        if (!status) status = talk_extend(t, whole, n, error);
        free(whole);
        if (status) return status;
        const size_t most = t->n_turns > 1 ? n_ctx - talk_reserve(t) : n_ctx - 1;
        if (t->n_tokens <= most) break;
        if (t->n_turns > 1) {
            talk_drop_first(t);
            n_dropped++;
            continue;
        }
        memset(error, 0, sizeof *error);
        error->status = MOE_ERROR_CONTEXT_FULL;
        snprintf(error->text, sizeof error->text,
                 "it has %lu tokens with what the template adds, the context holds %lu (-c)",
                 (unsigned long)t->n_tokens, (unsigned long)n_ctx);
        return error->status;
    }
    if (n_dropped)
        talk_say(t, "the context is full: the oldest %lu of the dialogue's turns are forgotten",
                 (unsigned long)n_dropped);
    return MOE_OK;
}

// ---- writing ---------------------------------------------------------------------------------

static inline void talk_write(talk *t, const char *data, size_t size) {
    if (!size || t->failed) return;
    if (fwrite(data, 1, size, stdout) != size || fflush(stdout)) t->failed = errno ? errno : EIO;
    t->last = data[size - 1];
}

static inline void talk_dim(talk *t, int is_dim) {
    if (!t->is_terminal || t->is_dim == is_dim) return;
    t->is_dim = is_dim;
    const char last = t->last;
    talk_write(t, is_dim ? "\033[2m" : "\033[0m", 4);
    t->last = last;
}

// Ends what stands in the line.
static inline void talk_end_line(talk *t) {
    talk_dim(t, 0);
    if (t->last != '\n') talk_write(t, "\n", 1);
}

// The call that is coming in: when it is whole it becomes part of the turn.
static inline void talk_note_call(talk *t, const moe_chat_piece *piece) {
    text_buffer *calls = &talk_last(t)->calls;
    if (piece->kind == MOE_CHAT_TOOL_NAME) {
        text_cut(&t->call_id, 0);
        text_cut(&t->call_arguments, 0);
        text_cut(&t->call_name, 0);
        text_append(&t->call_name, piece->text, piece->size);
    }
    if (piece->kind == MOE_CHAT_TOOL_ID) text_append(&t->call_id, piece->text, piece->size);
    if (piece->kind == MOE_CHAT_TOOL_ARGUMENTS)
        text_append(&t->call_arguments, piece->text, piece->size);
    if (piece->kind != MOE_CHAT_TOOL_END || !piece->is_valid) return;
    text_put(calls, calls->size ? ", {" : "{");
    if (t->call_id.size) {
        text_put(calls, "\"id\": ");
        text_json(calls, t->call_id.data, t->call_id.size);
        text_put(calls, ", ");
    }
    text_put(calls, "\"type\": \"function\", \"function\": {\"name\": ");
    text_json(calls, t->call_name.data ? t->call_name.data : "", t->call_name.size);
    text_put(calls, ", \"arguments\": ");
    text_append(calls, t->call_arguments.data, t->call_arguments.size);
    text_put(calls, "}}");
}

// Reasoning is for a person's eyes; through a pipe goes the answer alone.
static inline int talk_on_piece(void *user, const moe_chat_piece *piece) {
    talk *t = (talk *)user;
    talk_turn *turn = talk_last(t);
    const int is_content = piece->kind == MOE_CHAT_CONTENT;
    const int is_reasoning = piece->kind == MOE_CHAT_REASONING;
    if (is_content) text_append(&turn->answer, piece->text, piece->size);
    if (is_reasoning) text_append(&turn->reasoning, piece->text, piece->size);
    if (!is_content && !is_reasoning) talk_note_call(t, piece);
    if (is_reasoning && (!t->is_terminal || t->o->reasoning == TALK_OFF)) return 1;
    const char *from = piece->text;
    size_t size = piece->size;
    while (is_content && !t->is_begun && size && *from == '\n') from++, size--;
    if (is_content && size && !t->is_begun) {
        if (t->is_dim) talk_end_line(t), talk_write(t, "\n", 1);
        t->is_begun = 1;
    }
    if (piece->kind == MOE_CHAT_TOOL_NAME) {
        if (t->last != '\n') talk_end_line(t);
        talk_dim(t, 1);
        talk_write(t, "[calls ", 7);
    }
    if (!is_content) talk_dim(t, 1);
    if (piece->kind != MOE_CHAT_TOOL_ID) talk_write(t, from, size);
    if (piece->kind == MOE_CHAT_TOOL_NAME) talk_write(t, " ", 1);
    if (piece->kind == MOE_CHAT_TOOL_END) {
        talk_write(t, "]\n", 2);
        t->is_begun = 1;
    }
    return !t->failed;
}

// ---- signals while answering -----------------------------------------------------------------

static volatile sig_atomic_t *talk_flag;
static int talk_has_colours;

// The first Ctrl-C stops the answer; the second one, and what else ends programs, does so with the
// colours as they were.
static inline void talk_on_signal(int number) {
    if (number == SIGINT && !*talk_flag) {
        *talk_flag = 1;
        return;
    }
    ssize_t ignored = talk_has_colours ? write(STDOUT_FILENO, "\033[0m\r\n", 6) : 0;
    (void)ignored;
    signal(number, SIG_DFL);
    raise(number);
}

static inline void talk_catch(const talk *t, int is_on) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    talk_flag = t->o->interrupted;
    talk_has_colours = t->is_terminal;
    action.sa_handler = is_on ? talk_on_signal : SIG_DFL;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        sigaction(numbers[i], NULL, &before);
        if (before.sa_handler != SIG_IGN) sigaction(numbers[i], &action, NULL);
    }
}

// ---- answering -------------------------------------------------------------------------------

// What the context holds after an answer, with the token that was chosen last: it is evaluated with
// the next turn. Only tokens whose text has come out to the last byte stay.
static inline void talk_settle(talk *t, const moe_generated *g) {
    const size_t n_prompt = t->n_tokens;
    size_t n = (size_t)moe_session_length(t->session);
    const int32_t *held = moe_session_tokens(t->session);
    if (g->rest_size && (size_t)g->length < n) n = (size_t)g->length;
    text_cut(&t->context, 0);
    t->n_tokens = 0;
    if (n < n_prompt || !talk_room(t, n + 1)) return;
    memcpy(t->tokens, held, n * sizeof *held);
    t->n_tokens = n;
    if (!g->rest_size && g->pending >= 0) t->tokens[t->n_tokens++] = g->pending;
    text_append(&t->context, t->formatted.data, t->formatted.size);
    for (size_t i = n_prompt; i < t->n_tokens; i++) token_text(&t->context, t->vocab, t->tokens[i]);
    if (t->context.failed) talk_forget_context(t), text_free(&t->context);
}

typedef struct talk_count {
    int32_t n_new, n_reused, n_generated;
    double prompt_seconds, seconds;
} talk_count;

static inline moe_status talk_generate(talk *t, moe_chat_parser *parser, moe_generated *g,
                                       talk_count *count, moe_error *error) {
    moe_generator_options o;
    memset(&o, 0, sizeof o);
    o.sampler = t->sampler;
    o.max_tokens = t->o->n_predict;
    o.ignore_end = t->o->ignore_end ? MOE_ON : 0;
    o.special = MOE_ON; // the parser looks for marks among them
    moe_generator *generator = moe_generator_open(t->session, &o, error);
    if (!generator) return error->status;
    moe_status status = MOE_OK;
    const double start = tool_seconds();
    do {
        status = moe_generator_next(generator, g, error);
        if (status) break;
        count->n_generated += g->token >= 0;
        text_append(&talk_last(t)->raw, g->text, g->size);
        if (moe_chat_parser_push(parser, g->text, g->size) && t->failed) break;
    } while (g->reason == MOE_STOP_NONE);
    count->seconds = tool_seconds() - start;
    moe_chat_parser_finish(parser);
    if (!status) talk_settle(t, g);
    moe_generator_close(generator); // after settling: the rest is its own
    return status;
}

static inline void talk_timings(const talk *t, const talk_count *c, const moe_generated *g) {
    if (!t->o->shows_timings) return;
    if (t->is_terminal && isatty(STDERR_FILENO)) fputs("\033[2m", stderr);
    fprintf(stderr, "[ prompt %d new tokens, %d reused, %.1f t/s; generation %d, %.1f t/s; "
            "context %d of %d; %s ]",
            (int)c->n_new, (int)c->n_reused,
            c->prompt_seconds > 0 ? c->n_new / c->prompt_seconds : 0, (int)c->n_generated,
            c->seconds > 0 ? c->n_generated / c->seconds : 0,
            (int)moe_session_length(t->session), (int)moe_session_get_info(t->session)->n_ctx,
            g->reason == MOE_STOP_CALLER ? "interrupted" : moe_stop_reason_text(g->reason));
    if (t->is_terminal && isatty(STDERR_FILENO)) fputs("\033[0m", stderr);
    fputc('\n', stderr);
}

// The answer as it came is only needed if it is the answer with white space around it.
static inline void talk_trim_raw(talk_turn *turn) {
    const char *raw = turn->raw.data ? turn->raw.data : "";
    size_t from = 0, end = turn->raw.size;
    while (from < end && strchr(" \t\r\n", raw[from])) from++;
    while (from < end && strchr(" \t\r\n", raw[end - 1])) end--;
    if (turn->reasoning.size || turn->calls.size || turn->answer.size == turn->raw.size ||
        end - from != turn->answer.size || !turn->answer.size ||
        memcmp(raw + from, turn->answer.data, end - from) != 0)
        text_free(&turn->raw);
}

// Answers the last turn's question. Errors leave the turn without an answer.
static inline moe_status talk_answer(talk *t, moe_error *error) {
    talk_count count;
    moe_generated g;
    memset(&count, 0, sizeof count);
    memset(&g, 0, sizeof g);
    moe_status status = talk_fit(t, error);
    if (status) return status;
    talk_turn *turn = talk_last(t);
    const double start = tool_seconds();
    status = moe_session_sync(t->session, t->tokens, (int32_t)t->n_tokens, &count.n_reused, error);
    if (status) return status;
    count.prompt_seconds = tool_seconds() - start;
    moe_chat_parser *parser = moe_chat_parser_open(t->vocab, t->request.data, t->request.size,
                                                   talk_on_piece, t, error);
    if (!parser) return error->status;
    count.n_new = (int32_t)t->n_tokens - count.n_reused;
    text_put(&turn->answer, ""); // there is one now, if an empty one
    t->is_begun = 0;
    t->last = '\n';
    status = talk_generate(t, parser, &g, &count, error);
    moe_chat_parser_close(parser);
    if (turn->answer.failed || turn->reasoning.failed || turn->raw.failed || turn->calls.failed)
        status = talk_no_memory(error);
    talk_trim_raw(turn);
    talk_end_line(t);
    if (!t->is_begun && !t->is_terminal) talk_write(t, "\n", 1); // one line, one answer
    if (!status) talk_timings(t, &count, &g);
    return status;
}

// The same with its signals and its messages. Returns whether the dialogue goes on.
static inline int talk_turn_once(talk *t, int *status) {
    moe_error error;
    talk_catch(t, 1);
    const moe_status answered = talk_answer(t, &error);
    talk_catch(t, 0);
    t->was_interrupted = *t->o->interrupted != 0;
    *t->o->interrupted = 0;
    if (t->failed) {
        talk_say(t, "cannot write the answer: %s", strerror(t->failed));
        *status = TOOL_ERROR;
        return 0;
    }
    if (answered) {
        talk_drop_last(t);
        if (answered == MOE_ERROR_CANCELLED) talk_say(t, "interrupted; the question is forgotten");
        else *status = tool_fail(t->o->program, "cannot answer", &error);
    }
    if (!t->was_interrupted || t->is_terminal) return 1;
    *status = TOOL_INTERRUPTED; // nobody is there to ask on
    return 0;
}

// ---- commands --------------------------------------------------------------------------------

static inline void talk_save(const talk *t, const char *path) {
    text_buffer all;
    memset(&all, 0, sizeof all);
    talk_messages(t, &all, "\n  ", 0);
    text_put(&all, "}\n");
    if (!*path) {
        talk_say(t, "/save needs the name of a file");
    } else if (output_is_input(path, t->o->model)) {
        talk_say(t, "/save would replace the model");
    } else {
        FILE *file = all.failed ? NULL : output_begin(path);
        int failed = !file;
        if (file) failed = output_end(fwrite(all.data, 1, all.size, file) == all.size);
        if (failed) talk_say(t, "cannot write %s: %s", path, strerror(errno));
        else talk_say(t, "%lu turns are in %s", (unsigned long)t->n_turns, path);
    }
    text_free(&all);
}

static inline int talk_regenerate(talk *t, int *status) {
    talk_turn *turn = talk_last(t);
    if (!turn) {
        talk_say(t, "there is no answer yet");
        return 1;
    }
    talk_rewind(t);
    talk_turn_unanswer(turn);
    return talk_turn_once(t, status);
}

static inline void talk_undo(talk *t) {
    if (t->n_turns) talk_drop_last(t);
    else talk_say(t, "there is nothing to undo");
    if (t->is_terminal) talk_say(t, "%lu turns are left", (unsigned long)t->n_turns);
}

static inline void talk_clear(talk *t) {
    while (t->n_turns) talk_turn_free(&t->turns[--t->n_turns]);
    talk_forget_context(t);
    if (t->is_terminal) talk_say(t, "the dialogue begins anew");
}

// A line that begins with /. Returns whether the dialogue goes on.
static inline int talk_command(talk *t, const char *line, int *status) {
    const size_t n = strcspn(line, " \t");
    const char *rest = line + n + strspn(line + n, " \t");
    static const char *const names[] = {"/help", "/regen", "/undo", "/clear", "/save", "/exit"};
    size_t i = 0;
    while (i < 6 && (strlen(names[i]) != n || memcmp(names[i], line, n) != 0)) i++;
    switch (i) {
    case 0: talk_help(t); break;
    case 1: return talk_regenerate(t, status);
    case 2: talk_undo(t); break;
    case 3: talk_clear(t); break;
    case 4: talk_save(t, rest); break;
    case 5: return 0;
    default:
        fprintf(stderr, "%s: unknown command ", t->o->program);
        tool_print(stderr, line, n, 40);
        fputs("; /help lists them\n", stderr);
    }
    return 1;
}

// ---- the loop --------------------------------------------------------------------------------

static inline int talk_ask(talk *t, const char *question, size_t size, int *status) {
    if (talk_add_turn(t, question, size)) return talk_turn_once(t, status);
    talk_say(t, "out of memory");
    *status = TOOL_ERROR;
    return 0;
}

// Ctrl-C at the prompt: with something typed, that is gone; else the second one ends.
static inline int talk_interrupted(talk *t, size_t typed, int *status) {
    if (!typed && t->was_interrupted) {
        *status = TOOL_INTERRUPTED;
        return 0;
    }
    if (!typed) talk_say(t, "Ctrl-C again or Ctrl-D ends");
    t->was_interrupted = 1;
    return 1;
}

static inline int talk_loop(talk *t, int *status) {
    const char *line;
    size_t size;
    fflush(stdout);
    const line_result result = line_read(talk_has_called(t) ? "result> " : "> ", &line, &size);
    if (result == LINE_INTERRUPTED) return talk_interrupted(t, size, status);
    if (result == LINE_END) return 0;
    if (result == LINE_FAILED) {
        talk_say(t, "cannot read: %s", strerror(errno));
        *status = TOOL_ERROR;
        return 0;
    }
    t->was_interrupted = 0;
    if (!size) return 1;
    line_remember(line, size);
    if (*line == '/') return talk_command(t, line, status);
    return talk_ask(t, line, size, status) && !t->o->is_single;
}

static inline void talk_close(talk *t) {
    while (t->n_turns) talk_turn_free(&t->turns[--t->n_turns]);
    free(t->turns);
    free(t->tokens);
    text_free(&t->context);
    text_free(&t->request);
    text_free(&t->formatted);
    text_free(&t->call_name);
    text_free(&t->call_id);
    text_free(&t->call_arguments);
    line_close();
}

// The tokens of a dialogue that has the first question only.
static inline moe_status talk_first_tokens(const talk_options *o, const moe_vocab *vocab,
                                           int32_t **tokens, size_t *n, moe_error *error) {
    talk t;
    memset(&t, 0, sizeof t);
    t.o = o;
    t.vocab = vocab;
    moe_status status = MOE_OK;
    if (o->first && !talk_add_turn(&t, o->first->data, o->first->size))
        status = talk_no_memory(error);
    if (!status) status = talk_format(&t, error); // its message is the better one
    if (!status) status = talk_tokenize(&t, tokens, n, error);
    talk_close(&t);
    return status;
}

static inline int talk_run(const talk_options *o, moe_session *session, moe_sampler *sampler) {
    talk t;
    int status = TOOL_OK, goes_on = 1;
    memset(&t, 0, sizeof t);
    t.o = o;
    t.session = session;
    t.sampler = sampler;
    t.vocab = moe_model_vocab(moe_session_model(session));
    t.is_terminal = line_is_terminal() && isatty(STDOUT_FILENO);
    t.last = '\n';
    talk_catch(&t, 0);
    if (t.is_terminal) fputs("Ctrl-C stops an answer, Ctrl-D ends; /help for more.\n", stderr);
    if (o->first)
        goes_on = talk_ask(&t, o->first->data, o->first->size, &status) && !o->is_single;
    while (goes_on) goes_on = talk_loop(&t, &status);
    talk_close(&t);
    return status;
}

#endif
