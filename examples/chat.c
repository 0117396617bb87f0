// A dialogue, line by line, with a tool that is really called: the model asks, C computes.
//     cc -O2 examples/chat.c -o chat -lm -lpthread && ./chat MODEL.gguf
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "text.h" // strings that grow
#define ADD "{\"type\": \"function\", \"function\": {\"name\": \"add\", "
static const char *const tools = "], \"tools\": [" ADD "\"parameters\": {\"type\": \"object\", "
    "\"properties\": {\"a\": {\"type\": \"number\"}, \"b\": {\"type\": \"number\"}}, "
    "\"required\": [\"a\", \"b\"]}}}]}";
typedef struct chat {
    text_buffer messages, calls, results; // the dialogue, and tools in its last answer: JSON
    text_buffer said[MOE_CHAT_TOOL_END + 1]; // in that answer: one for each kind of piece
} chat;
static void put_message(text_buffer *to, const char *role, const char *text, size_t size) {
    text_put(to, to->size ? ", {\"role\": \"" : "{\"role\": \"");
    text_put(to, role), text_put(to, "\", \"content\": "), text_json(to, text, size);
}
static double number(const char *json, const char *key) {
    const char *at = strstr(json, key);
    return at && (at = strchr(at, ':')) ? strtod(at + 1, NULL) : 0;
}
static void call(chat *c, const char *name, const char *json) {
    const double sum = number(json, "\"a\"") + number(json, "\"b\"");
    if (strcmp(name, "add") != 0) return; // there is no such tool
    printf("[add %s = %.10g]\n", json, sum);
    text_put(&c->calls, c->calls.size ? ", " ADD : ", \"tool_calls\": [" ADD);
    text_put(&c->calls, "\"arguments\": "), text_put(&c->calls, json), text_put(&c->calls, "}}");
    text_format(&c->results, ", {\"role\": \"tool\", \"content\": \"%.10g\"}", sum);
}
static int on_piece(void *user, const moe_chat_piece *p) {
    chat *c = (chat *)user;
    text_buffer *said = c->said, *json = &said[MOE_CHAT_TOOL_ARGUMENTS];
    if (p->kind == MOE_CHAT_TOOL_NAME) text_cut(&said[p->kind], 0), text_cut(json, 0);
    text_append(&said[p->kind], p->text, p->size);
    if (p->kind == MOE_CHAT_CONTENT) fwrite(p->text, 1, p->size, stdout), fflush(stdout);
    if (p->kind == MOE_CHAT_TOOL_END && p->is_valid)
        call(c, said[MOE_CHAT_TOOL_NAME].data, json->data);
    return 1;
}
static int on_text(void *parser, const char *text, size_t size) {
    return moe_chat_parser_push((moe_chat_parser *)parser, text, size) == MOE_OK;
}
// Adds an answer to the messages. Returns whether tools were called: then there is more to be said.
static int answer(chat *c, moe_session *session, moe_error *error) {
    static int32_t tokens[1 << 16]; // more than the session holds
    const moe_vocab *vocab = moe_model_vocab(moe_session_model(session));
    text_buffer r = {0}, *content = &c->said[MOE_CHAT_CONTENT];
    text_cut(content, 0), text_cut(&c->calls, 0), text_cut(&c->results, 0);
    text_put(&r, "{\"messages\": ["), text_put(&r, c->messages.data), text_put(&r, tools);
    const int64_t n = moe_chat_tokenize(vocab, r.data, r.size, tokens, 1 << 16, error);
    moe_chat_parser *parser = moe_chat_parser_open(vocab, r.data, r.size, on_piece, c, error);
    // special: the marks that the parser looks for may be control tokens
    moe_generate_options o = {.special = MOE_ON, .on_text = on_text, .user = parser};
    if (parser && !moe_session_sync(session, tokens, (int32_t)n, NULL, error) &&
        !moe_generate(session, NULL, 0, &o, NULL, error)) {
        moe_chat_parser_finish(parser);
        put_message(&c->messages, "assistant", content->data ? content->data : "", content->size);
        if (c->calls.size) text_put(&c->messages, c->calls.data), text_put(&c->messages, "]");
        text_put(&c->messages, "}"), text_append(&c->messages, c->results.data, c->results.size);
    }
    moe_chat_parser_close(parser), text_free(&r);
    return !error->status && c->results.size;
}

int main(int argc, char **argv) {
    static chat c;
    char line[4096];
    moe_error error = {0};
    moe_model *model = moe_model_open(argc > 1 ? argv[1] : "model.gguf", NULL, &error);
    moe_session *session = model ? moe_session_open(model, NULL, &error) : NULL;
    while (session && !error.status && fgets(line, sizeof line, stdin)) {
        put_message(&c.messages, "user", line, strcspn(line, "\n")), text_put(&c.messages, "}");
        while (answer(&c, session, &error)) {}
        puts("");
    }
    if (error.status) fprintf(stderr, "%s (%s)\n", error.text, error.where);
    moe_session_close(session), moe_model_close(model);
    return error.status != MOE_OK || ferror(stdout);
}
