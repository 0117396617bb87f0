// What the command-line programs share: options read from one table, errors, readable sizes.
// The same table parses the options and prints the help, so a flag cannot be documented without
// working. Include moe_infer.h first.
#ifndef TOOL_H
#define TOOL_H
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "output.h"

enum { TOOL_OK = 0, TOOL_ERROR = 1, TOOL_USAGE = 2, TOOL_INTERRUPTED = 130 }; // exit codes

// ---- text on a terminal ----------------------------------------------------------------------

// Bytes of the UTF-8 character at text, 0 if it is not one that may be shown as it is: malformed,
// or a control character, with which a file could drive the terminal.
static inline size_t tool_character(const char *text, size_t size) {
    const unsigned char *p = (const unsigned char *)text;
    if (p[0] < 0x80) return p[0] >= 0x20 && p[0] != 0x7F;
    size_t n = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    if (p[0] < 0xC2 || p[0] > 0xF4 || n > size) return 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((p[0] == 0xC2 && p[1] < 0xA0) || (p[0] == 0xE0 && p[1] < 0xA0) ||
        (p[0] == 0xED && p[1] > 0x9F) || (p[0] == 0xF0 && p[1] < 0x90) ||
        (p[0] == 0xF4 && p[1] > 0x8F))
        return 0;
    return n;
}

// Writes text from a file or a caller, at most `most` bytes of it, with what cannot be shown as
// \n, \t or \xNN.
static inline void tool_print(FILE *out, const char *text, size_t size, size_t most) {
    size_t i = 0;
    while (i < size && i < most) {
        size_t n = tool_character(text + i, size - i);
        if (n) fwrite(text + i, 1, n, out);
        else if (text[i] == '\n') fputs("\\n", out);
        else if (text[i] == '\t') fputs("\\t", out);
        else fprintf(out, "\\x%02X", (unsigned)(unsigned char)text[i]);
        i += n ? n : 1;
    }
    if (i < size) fputs("...", out);
}

// "1.50 GiB", "12.00 MiB", "900 B"; the buffer holds 32 bytes.
static inline const char *tool_size(char *buffer, double bytes) {
    if (bytes >= 1073741824.0) snprintf(buffer, 32, "%.2f GiB", bytes / 1073741824.0);
    else if (bytes >= 1048576.0) snprintf(buffer, 32, "%.2f MiB", bytes / 1048576.0);
    else if (bytes >= 1024.0) snprintf(buffer, 32, "%.2f KiB", bytes / 1024.0);
    else snprintf(buffer, 32, "%.0f B", bytes);
    return buffer;
}

// "PROGRAM: WHAT: sentence (where, byte offset)" on stderr.
static inline int tool_fail(const char *program, const char *what, const moe_error *error) {
    fprintf(stderr, "%s: ", program);
    tool_print(stderr, what, strlen(what), 4096);
    fputs(": ", stderr);
    tool_print(stderr, error->text, strlen(error->text), sizeof error->text);
    if (error->where[0] && strcmp(error->where, what) != 0) {
        fputs(" (", stderr);
        tool_print(stderr, error->where, strlen(error->where), sizeof error->where);
        fputs(")", stderr);
    }
    if (error->offset) fprintf(stderr, ", at byte %llu", (unsigned long long)error->offset);
    fputs("\n", stderr);
    return TOOL_ERROR;
}

// What became of the options about memory, on stderr.
static inline void tool_memory(const char *program, const moe_model *model) {
    static const char *const numa[] = {"off", "interleave", "owner"};
    const moe_model_memory *memory = moe_model_get_memory(model);
    char placed[32], locked[32];
    fprintf(stderr, "%s: %d memory node%s, placement %s, %s in place, %s locked\n", program,
            memory->n_nodes, memory->n_nodes > 1 ? "s" : "", numa[memory->numa % 3],
            tool_size(placed, (double)memory->n_bytes_placed),
            tool_size(locked, (double)memory->n_bytes_locked));
}

static inline double tool_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// ---- options ---------------------------------------------------------------------------------

typedef enum tool_kind {
    TOOL_HEADING, // a line of the help
    TOOL_FLAG,    // int: set to 1
    TOOL_UNFLAG,  // int: set to 0
    TOOL_TEXT,    // const char *
    TOOL_INT,     // int32_t
    TOOL_FLOAT,   // float
    TOOL_SEED,    // uint64_t; -1 stands for UINT64_MAX
    TOOL_CHOICE,  // int32_t: place in the list of words a|b|c, from 0
    TOOL_INTS,    // tool_list: 1,2,3
    TOOL_PAIR,    // tool_list: 1,2; given again, it adds another pair
    TOOL_CHOICES  // tool_list: a,c
} tool_kind;

typedef struct tool_option {
    const char *names; // as the help shows them: "-m, --model"
    const char *value; // what follows the name, for the help; for choices the words
    tool_kind kind;
    void *out;
    double min, max; // of numbers
    const char *help;
} tool_option;

enum { TOOL_LIST_MAX = 64 };
typedef struct tool_list {
    int32_t n, item[TOOL_LIST_MAX];
} tool_list;

// The value that starts at `text` and has `size` bytes, as a number that uses all of it: no blanks,
// no hexadecimals, no "inf", no "nan". Returns 0 if it is none or does not fit.
static inline int tool_number(const char *text, size_t size, double min, double max, int whole,
                              double *out) {
    char copy[64], *end;
    if (size == 0 || size >= sizeof copy) return 0;
    memcpy(copy, text, size);
    copy[size] = 0;
    if (strspn(copy, whole ? "+-0123456789" : "+-.0123456789eE") != size) return 0;
    errno = 0;
    *out = whole ? (double)strtoll(copy, &end, 10) : strtod(copy, &end);
    // strtod calls denormal numbers a range error, too: they count as good
    if (end == copy || *end || (errno && (whole || fabs(*out) > 1))) return 0;
    return *out >= min && *out <= max;
}

// The place of a word in "a|b|c", -1 if it is not there.
static inline int32_t tool_word(const char *words, const char *text, size_t size) {
    for (int32_t i = 0;; i++) {
        size_t n = strcspn(words, "|");
        if (n == size && memcmp(words, text, n) == 0) return i;
        if (!words[n]) return -1;
        words += n + 1;
    }
}

// Is name one of "-m, --model"?
static inline int tool_named(const char *names, const char *name) {
    size_t size = strlen(name);
    while (*names) {
        size_t n = strcspn(names, ",");
        if (n == size && memcmp(names, name, n) == 0) return 1;
        names += n;
        names += strspn(names, ", ");
    }
    return 0;
}

// One item of `size` bytes of an option's value.
static inline int tool_item(const char *program, const tool_option *o, const char *name,
                            const char *text, size_t size, int32_t *out) {
    double number;
    if (o->kind == TOOL_CHOICE || o->kind == TOOL_CHOICES) {
        *out = tool_word(o->value, text, size);
        if (*out >= 0) return TOOL_OK;
        fprintf(stderr, "%s: %s: '%.*s' is not one of %s\n", program, name, (int)size, text,
                o->value);
        return TOOL_USAGE;
    }
    if (tool_number(text, size, o->min, o->max, 1, &number)) {
        *out = (int32_t)number;
        return TOOL_OK;
    }
    fprintf(stderr, "%s: %s: '%.*s' is not a whole number from %.0f to %.0f\n", program, name,
            (int)size, text, o->min, o->max);
    return TOOL_USAGE;
}

static inline int tool_items(const char *program, const tool_option *o, const char *name,
                             const char *text) {
    tool_list *list = (tool_list *)o->out;
    const int32_t before = o->kind == TOOL_PAIR ? list->n : 0;
    for (list->n = before; list->n < TOOL_LIST_MAX;) {
        size_t size = strcspn(text, ",");
        int status = tool_item(program, o, name, text, size, &list->item[list->n]);
        if (status) return status;
        list->n++;
        if (!text[size] && (o->kind != TOOL_PAIR || list->n == before + 2)) return TOOL_OK;
        if (o->kind == TOOL_PAIR && (!text[size] || list->n == before + 2)) {
            fprintf(stderr, "%s: %s: two numbers, please: %s\n", program, name, o->value);
            return TOOL_USAGE;
        }
        text += size + 1;
    }
    fprintf(stderr, "%s: %s: more than %d values\n", program, name, (int)TOOL_LIST_MAX);
    return TOOL_USAGE;
}

static inline int tool_set(const char *program, const tool_option *o, const char *name,
                           const char *text) {
    double number;
    switch (o->kind) {
    case TOOL_HEADING: break;
    case TOOL_FLAG: *(int *)o->out = 1; break;
    case TOOL_UNFLAG: *(int *)o->out = 0; break;
    case TOOL_TEXT: *(const char **)o->out = text; break;
    case TOOL_INT:
    case TOOL_CHOICE: return tool_item(program, o, name, text, strlen(text), (int32_t *)o->out);
    case TOOL_INTS:
    case TOOL_PAIR:
    case TOOL_CHOICES: return tool_items(program, o, name, text);
    case TOOL_FLOAT:
        if (!tool_number(text, strlen(text), o->min, o->max, 0, &number)) {
            fprintf(stderr, "%s: %s: '%s' is not a number from %g to %g\n", program, name, text,
                    o->min, o->max);
            return TOOL_USAGE;
        }
        *(float *)o->out = (float)number;
        break;
    case TOOL_SEED: {
        size_t digits = strspn(text, "0123456789");
        errno = 0;
        unsigned long long seed = strtoull(text, NULL, 10);
        if (strcmp(text, "-1") != 0 && (errno || !digits || text[digits])) {
            fprintf(stderr, "%s: %s: '%s' is not a whole number from -1 to %llu\n", program, name,
                    text, (unsigned long long)UINT64_MAX);
            return TOOL_USAGE;
        }
        *(uint64_t *)o->out = seed;
        break;
    }
    }
    return TOOL_OK;
}

// Reads the command line into the table's variables. Ends on the first mistake, with a sentence
// about it on stderr and TOOL_USAGE. The table ends with a row of zeros.
static inline int tool_parse(const char *program, const tool_option *table, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const tool_option *o = table;
        while (o->names && (o->kind == TOOL_HEADING || !tool_named(o->names, argv[i]))) o++;
        if (!o->names) {
            fprintf(stderr, argv[i][0] == '-' ? "%s: unknown option '%s'; see %s --help\n"
                                              : "%s: unexpected argument '%s'; see %s --help\n",
                    program, argv[i], program);
            return TOOL_USAGE;
        }
        if (o->value && i + 1 >= argc) {
            fprintf(stderr, "%s: %s needs a value: %s\n", program, argv[i], o->value);
            return TOOL_USAGE;
        }
        const char *name = argv[i];
        int status = tool_set(program, o, name, o->value ? argv[++i] : NULL);
        if (status) return status;
    }
    return TOOL_OK;
}

// One type for keys and values from what -ctk and -ctv say, -1: nothing. 0 (said so) if they are
// different: a cache has one type.
static inline int tool_kv_type(const char *program, int32_t k, int32_t v, int32_t *out) {
    *out = k >= 0 ? k : v >= 0 ? v : 0;
    if (k < 0 || v < 0 || k == v) return 1;
    fprintf(stderr, "%s: -ctk and -ctv: keys and values are kept as the same type\n", program);
    return 0;
}

// The table as text: names and value on the left, the sentence on the right.
static inline void tool_help(FILE *out, const tool_option *table) {
    for (const tool_option *o = table; o->names; o++) {
        if (o->kind == TOOL_HEADING) {
            fprintf(out, "\n%s\n", o->names);
            continue;
        }
        int width = fprintf(out, "  %s%s%s", o->names, o->value ? " " : "",
                            o->value ? o->value : "");
        if (width > 31) width = fprintf(out, "\n") - 1;
        fprintf(out, "%*s", 32 - width, "");
        for (const char *c = o->help; *c; c++) {
            fputc(*c, out);
            if (*c == '\n') fprintf(out, "%32s", "");
        }
        fputc('\n', out);
    }
}

#endif
