// How well a model knows a text, and how it sees it: perplexity, log-probabilities, tokens.
// Include moe_infer.h and tool.h first.
#ifndef MEASURE_H
#define MEASURE_H
#include "text.h"

// ---- perplexity ------------------------------------------------------------------------------

// llama-perplexity's definition. The text's tokens are cut into chunks of n_ctx; each is read from
// an empty context, with BOS in place of its first token if the file wants BOS in front of texts.
// Tokens of the second half count, which have half a chunk before them: from n_ctx / 2 + 1 on.
typedef struct perplexity {
    double sum, sum_squares; // of -ln p
    int64_t count;
} perplexity;

static inline double perplexity_value(const perplexity *p) {
    return exp(p->sum / (double)p->count);
}
// Standard error of the value; -1: too few tokens, or all alike.
static inline double perplexity_error(const perplexity *p) {
    const double mean = p->sum / (double)p->count;
    const double variance = p->sum_squares / (double)p->count - mean * mean;
    if (!(variance > 0) || p->count < 2) return -1;
    return sqrt(variance / (double)(p->count - 1)) * perplexity_value(p);
}

static inline void perplexity_add(perplexity *p, const float *logits, int32_t n, int32_t token) {
    float most = logits[0];
    double sum = 0;
    for (int32_t i = 1; i < n; i++)
        if (logits[i] > most) most = logits[i];
    for (int32_t i = 0; i < n; i++) sum += exp((double)(logits[i] - most));
    const double loss = log(sum) + (double)most - (double)logits[token];
    p->sum += loss;
    p->sum_squares += loss * loss;
    p->count++;
}

// One chunk through a session that keeps all logits; its first token is not there meanwhile. bos:
// -1 for none. n_words: tokens that have a text, of which rows of logits may have more.
static inline moe_status perplexity_chunk(perplexity *p, moe_session *session, int32_t *tokens,
                                          int32_t n_ctx, int32_t bos, int32_t n_words,
                                          moe_error *error) {
    const int32_t n_batch = moe_session_get_info(session)->n_batch, first = tokens[0];
    moe_status status = moe_session_rewind(session, 0, error);
    if (bos >= 0) tokens[0] = bos;
    for (int32_t at = 0; at < n_ctx && !status; at += n_batch) {
        const int32_t n = n_ctx - at < n_batch ? n_ctx - at : n_batch;
        status = moe_session_eval(session, tokens + at, n, error);
        for (int32_t i = 0; i < n && !status; i++)
            if (at + i >= n_ctx / 2 && at + i < n_ctx - 1)
                perplexity_add(p, moe_session_logits(session, i), n_words, tokens[at + i + 1]);
    }
    tokens[0] = first;
    return status;
}

// ---- tokens ----------------------------------------------------------------------------------

// A token's bytes, or the name of a control token.
static inline void token_text(text_buffer *out, const moe_vocab *vocab, int32_t token) {
    char bytes[512];
    const size_t n = moe_vocab_text(vocab, token, bytes, sizeof bytes);
    if (n && n <= sizeof bytes) {
        text_append(out, bytes, n);
    } else if (n) { // longer than any sensible one
        char *more = (char *)malloc(n);
        if (more) text_append(out, more, moe_vocab_text(vocab, token, more, n));
        else out->failed = 1;
        free(more);
    } else {
        const moe_string name = moe_vocab_token(vocab, token);
        text_append(out, name.data, name.size);
    }
}

// A line a token: its id and its text; control tokens are coloured for a person.
static inline int tokens_show(const moe_vocab *vocab, const int32_t *tokens, size_t n,
                              int is_coloured) {
    text_buffer piece;
    memset(&piece, 0, sizeof piece);
    for (size_t i = 0; i < n; i++) {
        const int stands_out = is_coloured && moe_vocab_is_control(vocab, tokens[i]);
        text_cut(&piece, 0);
        token_text(&piece, vocab, tokens[i]);
        printf("%6d -> %s'", (int)tokens[i], stands_out ? "\033[35m" : "");
        tool_print(stdout, piece.data ? piece.data : "", piece.size, 4096);
        printf("'%s\n", stands_out ? "\033[0m" : "");
    }
    text_free(&piece);
    return !piece.failed;
}

// ---- log-probabilities -----------------------------------------------------------------------

// "token": ..., as OpenAI's service names it; its id besides.
static inline void logprob_members(text_buffer *out, const moe_vocab *vocab, int32_t token,
                                   float logprob) {
    text_buffer piece;
    memset(&piece, 0, sizeof piece);
    token_text(&piece, vocab, token);
    text_format(out, "\"id\": %d, \"token\": ", (int)token);
    text_json(out, piece.data ? piece.data : "", piece.size);
    // -9999 stands for what is as good as impossible, there too
    text_format(out, ", \"logprob\": %.6g, \"bytes\": [",
                logprob > -9999 ? (double)logprob : -9999.0);
    for (size_t i = 0; i < piece.size; i++)
        text_format(out, "%s%u", i ? ", " : "", (unsigned)(unsigned char)piece.data[i]);
    text_put(out, "]");
    out->failed |= piece.failed;
    text_free(&piece);
}

// A line of JSON about a generated token.
static inline void logprob_line(text_buffer *out, const moe_vocab *vocab, const moe_generated *g) {
    text_put(out, "{");
    logprob_members(out, vocab, g->token, g->logprob);
    text_put(out, ", \"top_logprobs\": [");
    for (int32_t i = 0; i < g->n_likeliest; i++) {
        text_put(out, i ? ", {" : "{");
        logprob_members(out, vocab, g->likeliest[i].token, g->likeliest[i].logprob);
        text_put(out, "}");
    }
    text_put(out, "]}\n");
}

#endif
