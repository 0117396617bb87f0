// Texts that grow, and JSON written into them. Needs libc alone.
#ifndef TEXT_H
#define TEXT_H
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Bytes of any kind; zeroed: none. Without memory nothing more is appended and `failed` is set, so
// that one look at the end is enough.
typedef struct text_buffer {
    char *data;
    size_t size, capacity;
    int failed;
} text_buffer;

static inline int text_append(text_buffer *t, const char *data, size_t size) {
    if (size >= t->capacity - t->size) { // a NUL stands behind it
        const size_t capacity = (t->size + size) * 2 + 64;
        char *grown = t->failed ? NULL : (char *)realloc(t->data, capacity);
        if (!grown) {
            t->failed = 1;
            return 0;
        }
        t->data = grown;
        t->capacity = capacity;
    }
    if (size) memcpy(t->data + t->size, data, size);
    t->size += size;
    t->data[t->size] = 0;
    return 1;
}
static inline int text_put(text_buffer *t, const char *s) { return text_append(t, s, strlen(s)); }

// For numbers: at most 200 bytes.
#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
static inline void text_format(text_buffer *t, const char *format, ...) {
    char piece[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(piece, sizeof piece, format, arguments);
    va_end(arguments);
    text_put(t, piece);
}

static inline void text_cut(text_buffer *t, size_t size) {
    if (size < t->size) t->data[t->size = size] = 0;
}
static inline void text_free(text_buffer *t) {
    free(t->data);
    memset(t, 0, sizeof *t);
}

// Bytes of the well-formed UTF-8 character at s; 0: there is none.
static inline size_t text_character(const char *s, size_t size) {
    const unsigned char *p = (const unsigned char *)s;
    if (p[0] < 0x80) return 1;
    const size_t n = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    if (p[0] < 0xC2 || p[0] > 0xF4 || n > size) return 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
        (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F))
        return 0;
    return n;
}

// A JSON string. What is not UTF-8 becomes U+FFFD, which JSON has no other way to say.
static inline void text_json(text_buffer *t, const char *data, size_t size) {
    text_put(t, "\"");
    for (size_t i = 0; i < size;) {
        const size_t n = text_character(data + i, size - i);
        const unsigned char c = (unsigned char)data[i];
        if (!n) text_put(t, "\xEF\xBF\xBD");
        else if (c == '"' || c == '\\') text_format(t, "\\%c", c);
        else if (c == '\n') text_put(t, "\\n");
        else if (c < 0x20 || c == 0x7F) text_format(t, "\\u%04x", (unsigned)c);
        else text_append(t, data + i, n);
        i += n ? n : 1;
    }
    text_put(t, "\"");
}

#endif
