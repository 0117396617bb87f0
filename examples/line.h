// A line editor for programs that talk with a person: arrows, history, pasted texts of several
// lines, any width of terminal. One file, needs POSIX alone:
//
//     const char *text;
//     size_t size;
//     while (line_read("> ", &text, &size) == LINE_OK) {
//         line_remember(text, size);             what arrow up brings back
//         ...
//     }
//     line_close();
//
// How a line editor works. A terminal normally collects a line by itself and hands it over at
// Enter. In "raw" mode it hands over every key at once and shows nothing: the program has to draw
// what is typed. Keys that are no characters come as sequences, ESC [ A for arrow up; and such
// sequences, written, move the cursor and erase. This editor keeps a text and a place in it, and
// after each key draws all of it anew: up to where the drawing began, erase what is below, prompt
// and text, back to the cursor. Rows are broken by us, not by the terminal, so that we always know
// where the cursor is. If there are more rows than the terminal has, some around the cursor are
// drawn. Sequences are those of the VT100 (and ?2004, which others ignore).
//
// The terminal is raw only while line_read waits, and becomes what it was however that ends: by
// Enter, exit(), Ctrl-Z, or a signal that ends the program (all but SIGKILL, of which no program
// learns). A handler of the program's own runs behind that.
//
//   arrows, Ctrl-B F P N      move; up and down from the first and last line: history
//   Home End, Ctrl-A E        begin and end of the line
//   Alt-B F, Ctrl-arrows      by words
//   Backspace, Delete, Ctrl-H D   erase a character; Ctrl-D without any text: the end
//   Ctrl-K U W, Alt-D, Alt-Backspace   cut to the end, to the begin, a word; Ctrl-Y pastes it
//   Ctrl-T swaps two characters, Ctrl-L clears the screen, Ctrl-Z suspends, Ctrl-C drops the text
//   Enter ends the text, a backslash before it goes on in a new line, as Alt-Enter does
//
// Without a terminal (or where TERM=dumb) lines of any length are read as they come.
#ifndef LINE_H
#define LINE_H
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

typedef enum line_result {
    LINE_OK,
    LINE_END,         // Ctrl-D, end of the file, or the terminal is gone
    LINE_INTERRUPTED, // Ctrl-C: what was typed is dropped, *size tells how much it was
    LINE_FAILED       // errno tells; EINTR: a signal's handler of the program has run
} line_result;

enum { LINE_INPUT = 4096, LINE_HISTORY = 1000, LINE_SIGNALS = 5, LINE_WATCHED = 3 };

typedef struct line_text {
    char *data;
    size_t size, capacity;
} line_text;

// A program has one terminal, and this is its editor.
static struct line_editor {
    char input[LINE_INPUT]; // what was read and not used yet, also from one line to the next
    size_t input_at, input_end;
    int is_over;            // nothing more can be read
    line_text text;         // what is edited; bytes of any kind
    size_t cursor;          // the place in it
    line_text cut;          // by Ctrl-K and the like, for Ctrl-Y
    line_text drawing;      // what is written to the terminal next
    int missing;            // bytes that the character that is coming in lacks
    int is_pasting;
    int failed;             // errno of a failure that ends the line
    const char *prompt;
    int out;                // where it is drawn
    int columns, rows;      // of the terminal
    size_t top, cursor_row; // first row that is drawn; the cursor's, from there
    line_text history[LINE_HISTORY];
    int n_history, place;   // which entry is shown; n_history: none
    line_text typed;        // what was there before an older one was asked for
    struct termios before;
    volatile sig_atomic_t is_raw, resized, suspended, resumed;
    struct sigaction actions[LINE_SIGNALS], watched[LINE_WATCHED];
    int bell[2];            // a pipe: a signal's handler wakes who waits for keys
} line_ed;

// ---- characters ------------------------------------------------------------------------------

// Ranges of characters that take no column or two, by Unicode 14.
static const uint32_t line_narrow[][2] = {
    {0x300, 0x36F}, {0x483, 0x489}, {0x591, 0x5BD}, {0x5BF, 0x5BF}, {0x5C1, 0x5C2}, {0x5C4, 0x5C5},
    {0x5C7, 0x5C7}, {0x600, 0x605}, {0x610, 0x61A}, {0x61C, 0x61C}, {0x64B, 0x65F}, {0x670, 0x670},
    {0x6D6, 0x6DD}, {0x6DF, 0x6E4}, {0x6E7, 0x6E8}, {0x6EA, 0x6ED}, {0x70F, 0x70F}, {0x711, 0x711},
    {0x730, 0x74A}, {0x7A6, 0x7B0}, {0x7EB, 0x7F3}, {0x7FD, 0x7FD}, {0x816, 0x819}, {0x81B, 0x823},
    {0x825, 0x827}, {0x829, 0x82D}, {0x859, 0x85B}, {0x890, 0x89F}, {0x8CA, 0x902}, {0x93A, 0x93A},
    {0x93C, 0x93C}, {0x941, 0x948}, {0x94D, 0x94D}, {0x951, 0x957}, {0x962, 0x963}, {0x981, 0x981},
    {0x9BC, 0x9BC}, {0x9C1, 0x9C4}, {0x9CD, 0x9CD}, {0x9E2, 0x9E3}, {0x9FE, 0xA02}, {0xA3C, 0xA3C},
    {0xA41, 0xA51}, {0xA70, 0xA71}, {0xA75, 0xA75}, {0xA81, 0xA82}, {0xABC, 0xABC}, {0xAC1, 0xAC8},
    {0xACD, 0xACD}, {0xAE2, 0xAE3}, {0xAFA, 0xB01}, {0xB3C, 0xB3C}, {0xB3F, 0xB3F}, {0xB41, 0xB44},
    {0xB4D, 0xB56}, {0xB62, 0xB63}, {0xB82, 0xB82}, {0xBC0, 0xBC0}, {0xBCD, 0xBCD}, {0xC00, 0xC00},
    {0xC04, 0xC04}, {0xC3C, 0xC3C}, {0xC3E, 0xC40}, {0xC46, 0xC56}, {0xC62, 0xC63}, {0xC81, 0xC81},
    {0xCBC, 0xCBC}, {0xCBF, 0xCBF}, {0xCC6, 0xCC6}, {0xCCC, 0xCCD}, {0xCE2, 0xCE3}, {0xD00, 0xD01},
    {0xD3B, 0xD3C}, {0xD41, 0xD44}, {0xD4D, 0xD4D}, {0xD62, 0xD63}, {0xD81, 0xD81}, {0xDCA, 0xDCA},
    {0xDD2, 0xDD6}, {0xE31, 0xE31}, {0xE34, 0xE3A}, {0xE47, 0xE4E}, {0xEB1, 0xEB1}, {0xEB4, 0xEBC},
    {0xEC8, 0xECD}, {0xF18, 0xF19}, {0xF35, 0xF35}, {0xF37, 0xF37}, {0xF39, 0xF39}, {0xF71, 0xF7E},
    {0xF80, 0xF84}, {0xF86, 0xF87}, {0xF8D, 0xFBC}, {0xFC6, 0xFC6}, {0x102D, 0x1030},
    {0x1032, 0x1037}, {0x1039, 0x103A}, {0x103D, 0x103E}, {0x1058, 0x1059}, {0x105E, 0x1060},
    {0x1071, 0x1074}, {0x1082, 0x1082}, {0x1085, 0x1086}, {0x108D, 0x108D}, {0x109D, 0x109D},
    {0x1160, 0x11FF}, {0x135D, 0x135F}, {0x1712, 0x1714}, {0x1732, 0x1733}, {0x1752, 0x1753},
    {0x1772, 0x1773}, {0x17B4, 0x17B5}, {0x17B7, 0x17BD}, {0x17C6, 0x17C6}, {0x17C9, 0x17D3},
    {0x17DD, 0x17DD}, {0x180B, 0x180F}, {0x1885, 0x1886}, {0x18A9, 0x18A9}, {0x1920, 0x1922},
    {0x1927, 0x1928}, {0x1932, 0x1932}, {0x1939, 0x193B}, {0x1A17, 0x1A18}, {0x1A1B, 0x1A1B},
    {0x1A56, 0x1A56}, {0x1A58, 0x1A60}, {0x1A62, 0x1A62}, {0x1A65, 0x1A6C}, {0x1A73, 0x1A7F},
    {0x1AB0, 0x1B03}, {0x1B34, 0x1B34}, {0x1B36, 0x1B3A}, {0x1B3C, 0x1B3C}, {0x1B42, 0x1B42},
    {0x1B6B, 0x1B73}, {0x1B80, 0x1B81}, {0x1BA2, 0x1BA5}, {0x1BA8, 0x1BA9}, {0x1BAB, 0x1BAD},
    {0x1BE6, 0x1BE6}, {0x1BE8, 0x1BE9}, {0x1BED, 0x1BED}, {0x1BEF, 0x1BF1}, {0x1C2C, 0x1C33},
    {0x1C36, 0x1C37}, {0x1CD0, 0x1CD2}, {0x1CD4, 0x1CE0}, {0x1CE2, 0x1CE8}, {0x1CED, 0x1CED},
    {0x1CF4, 0x1CF4}, {0x1CF8, 0x1CF9}, {0x1DC0, 0x1DFF}, {0x200B, 0x200F}, {0x202A, 0x202E},
    {0x2060, 0x206F}, {0x20D0, 0x20F0}, {0x2CEF, 0x2CF1}, {0x2D7F, 0x2D7F}, {0x2DE0, 0x2DFF},
    {0x302A, 0x302D}, {0x3099, 0x309A}, {0xA66F, 0xA672}, {0xA674, 0xA67D}, {0xA69E, 0xA69F},
    {0xA6F0, 0xA6F1}, {0xA802, 0xA802}, {0xA806, 0xA806}, {0xA80B, 0xA80B}, {0xA825, 0xA826},
    {0xA82C, 0xA82C}, {0xA8C4, 0xA8C5}, {0xA8E0, 0xA8F1}, {0xA8FF, 0xA8FF}, {0xA926, 0xA92D},
    {0xA947, 0xA951}, {0xA980, 0xA982}, {0xA9B3, 0xA9B3}, {0xA9B6, 0xA9B9}, {0xA9BC, 0xA9BD},
    {0xA9E5, 0xA9E5}, {0xAA29, 0xAA2E}, {0xAA31, 0xAA32}, {0xAA35, 0xAA36}, {0xAA43, 0xAA43},
    {0xAA4C, 0xAA4C}, {0xAA7C, 0xAA7C}, {0xAAB0, 0xAAB0}, {0xAAB2, 0xAAB4}, {0xAAB7, 0xAAB8},
    {0xAABE, 0xAABF}, {0xAAC1, 0xAAC1}, {0xAAEC, 0xAAED}, {0xAAF6, 0xAAF6}, {0xABE5, 0xABE5},
    {0xABE8, 0xABE8}, {0xABED, 0xABED}, {0xFB1E, 0xFB1E}, {0xFE00, 0xFE0F}, {0xFE20, 0xFE2F},
    {0xFEFF, 0xFEFF}, {0xFFF9, 0xFFFB}, {0x1D167, 0x1D182}, {0xE0001, 0xE01EF}};
static const uint32_t line_wide[][2] = {
    {0x1100, 0x115F}, {0x231A, 0x231B}, {0x2329, 0x232A}, {0x23E9, 0x23EC}, {0x23F0, 0x23F0},
    {0x23F3, 0x23F3}, {0x25FD, 0x25FE}, {0x2614, 0x2615}, {0x2648, 0x2653}, {0x267F, 0x267F},
    {0x2693, 0x2693}, {0x26A1, 0x26A1}, {0x26AA, 0x26AB}, {0x26BD, 0x26BE}, {0x26C4, 0x26C5},
    {0x26CE, 0x26CE}, {0x26D4, 0x26D4}, {0x26EA, 0x26EA}, {0x26F2, 0x26F3}, {0x26F5, 0x26F5},
    {0x26FA, 0x26FA}, {0x26FD, 0x26FD}, {0x2705, 0x2705}, {0x270A, 0x270B}, {0x2728, 0x2728},
    {0x274C, 0x274C}, {0x274E, 0x274E}, {0x2753, 0x2755}, {0x2757, 0x2757}, {0x2795, 0x2797},
    {0x27B0, 0x27B0}, {0x27BF, 0x27BF}, {0x2B1B, 0x2B1C}, {0x2B50, 0x2B50}, {0x2B55, 0x2B55},
    {0x2E80, 0x3029}, {0x302E, 0x303E}, {0x3041, 0x3096}, {0x309B, 0x3247}, {0x3250, 0x4DBF},
    {0x4E00, 0xA4C6}, {0xA960, 0xA97C}, {0xAC00, 0xD7A3}, {0xF900, 0xFAD9}, {0xFE10, 0xFE19},
    {0xFE30, 0xFE6B}, {0xFF01, 0xFF60}, {0xFFE0, 0xFFE6}, {0x16FE0, 0x16FE3}, {0x16FF0, 0x1B2FB},
    {0x1F004, 0x1F004}, {0x1F0CF, 0x1F0CF}, {0x1F18E, 0x1F18E}, {0x1F191, 0x1F19A},
    {0x1F200, 0x1F320}, {0x1F32D, 0x1F335}, {0x1F337, 0x1F37C}, {0x1F37E, 0x1F393},
    {0x1F3A0, 0x1F3CA}, {0x1F3CF, 0x1F3D3}, {0x1F3E0, 0x1F3F0}, {0x1F3F4, 0x1F3F4},
    {0x1F3F8, 0x1F43E}, {0x1F440, 0x1F440}, {0x1F442, 0x1F4FC}, {0x1F4FF, 0x1F53D},
    {0x1F54B, 0x1F54E}, {0x1F550, 0x1F567}, {0x1F57A, 0x1F57A}, {0x1F595, 0x1F596},
    {0x1F5A4, 0x1F5A4}, {0x1F5FB, 0x1F64F}, {0x1F680, 0x1F6C5}, {0x1F6CC, 0x1F6CC},
    {0x1F6D0, 0x1F6D2}, {0x1F6D5, 0x1F6DF}, {0x1F6EB, 0x1F6EC}, {0x1F6F4, 0x1F6FC},
    {0x1F7E0, 0x1F7F0}, {0x1F90C, 0x1F93A}, {0x1F93C, 0x1F945}, {0x1F947, 0x1F9FF},
    {0x1FA70, 0x1FAF6}, {0x20000, 0x3134A}};

static inline int line_is_among(uint32_t code, const uint32_t (*ranges)[2], size_t n) {
    size_t low = 0;
    while (n) { // the first range that ends at or behind code is from low on
        const size_t half = n / 2;
        if (ranges[low + half][1] < code) low += half + 1, n -= half + 1;
        else n = half;
    }
    return ranges[low][0] <= code && code <= ranges[low][1];
}

// Columns of a character: 0 if it is drawn over the one before.
static inline int line_width(uint32_t code) {
    if (code < 0x300) return 1;
    if (line_is_among(code, line_narrow, sizeof line_narrow / sizeof *line_narrow - 1)) return 0;
    return 1 + line_is_among(code, line_wide, sizeof line_wide / sizeof *line_wide - 1);
}

// Bytes of the character at text, which is not empty. What is not UTF-8 counts byte by byte, as
// U+FFFD.
static inline size_t line_decode(const char *text, size_t size, uint32_t *code) {
    const unsigned char *p = (const unsigned char *)text;
    const size_t n = p[0] < 0x80 ? 1 : p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    *code = n == 1 ? p[0] : p[0] & (0xFFu >> (n + 1));
    size_t i = 1;
    while (i < n && i < size && (p[i] & 0xC0) == 0x80) *code = *code << 6 | (p[i++] & 0x3F);
    if (n == 1) return 1;
    if (i == n && p[0] >= 0xC2 && p[0] < 0xF8 && *code >= least[n] && *code <= 0x10FFFF &&
        (*code < 0xD800 || *code > 0xDFFF))
        return n;
    *code = 0xFFFD;
    return 1;
}

// The place behind the character at `at`, with all that is drawn over it; and before it.
static inline size_t line_after(const char *text, size_t size, size_t at) {
    uint32_t code;
    if (at < size) at += line_decode(text + at, size - at, &code);
    while (at < size) {
        const size_t n = line_decode(text + at, size - at, &code);
        if (line_width(code)) break;
        at += n;
    }
    return at;
}
static inline size_t line_before(const char *text, size_t at) {
    uint32_t code = 0;
    const size_t end = at;
    for (int width = 0; at && !width; width = line_width(code)) {
        size_t n = 1; // back over bytes that continue a character, if they do
        while (n < 4 && n < at && ((unsigned char)text[at - n] & 0xC0) == 0x80) n++;
        if (line_decode(text + at - n, n, &code) != n) n = 1, code = 0xFFFD;
        at -= n;
    }
    return end ? at : 0;
}

// ---- memory ----------------------------------------------------------------------------------

// Makes room for n more bytes; without memory the line fails, and 0 is returned.
static inline int line_room(line_text *t, size_t n) {
    if (n <= t->capacity - t->size) return 1;
    const size_t capacity = (t->size + n) * 2 + 64;
    char *grown = (char *)realloc(t->data, capacity);
    if (!grown) line_ed.failed = ENOMEM;
    else t->data = grown, t->capacity = capacity;
    return grown != NULL;
}

static inline void line_append(line_text *t, const char *data, size_t size) {
    if (!size || !line_room(t, size)) return;
    memcpy(t->data + t->size, data, size);
    t->size += size;
}
static inline void line_assign(line_text *t, const char *data, size_t size) {
    t->size = 0;
    line_append(t, data, size);
}
static inline void line_drop(line_text *t) {
    free(t->data);
    memset(t, 0, sizeof *t);
}

// ---- the terminal ----------------------------------------------------------------------------

static const int line_signals[LINE_SIGNALS] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGABRT};
static const int line_watched[LINE_WATCHED] = {SIGWINCH, SIGTSTP, SIGCONT};

// Writes all of it; what cannot be written is lost, and the line fails.
static inline void line_put(const char *data, size_t size) {
    while (size) {
        const ssize_t n = write(line_ed.out, data, size);
        if (n > 0) {
            data += n, size -= (size_t)n;
        } else if (n < 0 && errno == EAGAIN) {
            struct pollfd wait = {line_ed.out, POLLOUT, 0};
            poll(&wait, 1, -1);
        } else if (n >= 0 || errno != EINTR) {
            line_ed.failed = n < 0 ? errno : EIO;
            return;
        }
    }
}

// The terminal as it was. Only calls that a handler of a signal may make.
static inline void line_restore(void) {
    if (!line_ed.is_raw) return;
    ssize_t ignored = write(line_ed.out, "\033[?2004l", 8);
    (void)ignored;
    tcsetattr(STDIN_FILENO, TCSADRAIN, &line_ed.before);
    line_ed.is_raw = 0; // not before: a signal in between does it again
}

static inline void line_ring(void) {
    ssize_t ignored = write(line_ed.bell[1], "", 1);
    (void)ignored;
}

// A signal that may end the program: first the terminal, then what the signal did before.
static inline void line_on_end(int number) {
    const int saved = errno;
    const int was_raw = line_ed.is_raw;
    line_restore();
    ssize_t ignored = was_raw ? write(line_ed.out, "\r\n", 2) : 0;
    (void)ignored;
    for (int i = 0; i < LINE_SIGNALS; i++)
        if (line_signals[i] == number) sigaction(number, &line_ed.actions[i], NULL);
    raise(number);
    line_ring();
    errno = saved;
}

static inline void line_on_watched(int number) {
    const int saved = errno;
    if (number == SIGWINCH) line_ed.resized = 1;
    else if (number == SIGTSTP) line_ed.suspended = 1;
    else line_ed.resumed = 1;
    line_ring();
    errno = saved;
}

static inline void line_set_handlers(const int *numbers, int n, void (*handler)(int),
                                     struct sigaction *before) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    sigfillset(&action.sa_mask);
    for (int i = 0; i < n; i++) {
        sigaction(numbers[i], NULL, &before[i]);
        if (before[i].sa_handler != SIG_IGN) sigaction(numbers[i], &action, NULL);
    }
}
static inline void line_reset_handlers(const int *numbers, int n, const struct sigaction *before) {
    for (int i = 0; i < n; i++)
        if (before[i].sa_handler != SIG_IGN) sigaction(numbers[i], &before[i], NULL);
}

static inline void line_measure(void) {
    struct winsize size;
    line_ed.columns = 80, line_ed.rows = 24;
    if (ioctl(line_ed.out, TIOCGWINSZ, &size)) return;
    if (size.ws_col) line_ed.columns = size.ws_col;
    if (size.ws_row) line_ed.rows = size.ws_row;
}

static inline int line_set_raw(void) {
    if (tcgetattr(STDIN_FILENO, &line_ed.before)) return 0;
    struct termios raw = line_ed.before;
    raw.c_iflag &= (tcflag_t) ~(BRKINT | ICRNL | INPCK | ISTRIP | IXON);
    raw.c_lflag &= (tcflag_t) ~(ECHO | ICANON | IEXTEN | ISIG);
    raw.c_cflag |= CS8;
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    // DRAIN, not FLUSH: what was typed already is not lost
    line_ed.is_raw = 1;
    if (tcsetattr(STDIN_FILENO, TCSADRAIN, &raw)) line_ed.is_raw = 0;
    else line_put("\033[?2004h", 8); // pasted texts come marked
    line_measure();
    return line_ed.is_raw;
}

static inline int line_make_bell(void) {
    if (line_ed.bell[1]) return 1;
    if (pipe(line_ed.bell)) return 0;
    for (int i = 0; i < 2; i++) {
        fcntl(line_ed.bell[i], F_SETFD, FD_CLOEXEC);
        fcntl(line_ed.bell[i], F_SETFL, O_NONBLOCK);
    }
    return atexit(line_restore) == 0;
}

// Raw from here to line_leave.
static inline int line_enter(void) {
    if (!line_make_bell()) return 0;
    line_set_handlers(line_signals, LINE_SIGNALS, line_on_end, line_ed.actions);
    line_set_handlers(line_watched, LINE_WATCHED, line_on_watched, line_ed.watched);
    line_ed.resized = line_ed.suspended = line_ed.resumed = 0;
    if (line_set_raw()) return 1;
    line_reset_handlers(line_watched, LINE_WATCHED, line_ed.watched);
    line_reset_handlers(line_signals, LINE_SIGNALS, line_ed.actions);
    return 0;
}
static inline void line_leave(void) {
    line_restore();
    line_reset_handlers(line_watched, LINE_WATCHED, line_ed.watched);
    line_reset_handlers(line_signals, LINE_SIGNALS, line_ed.actions);
}

// ---- drawing ---------------------------------------------------------------------------------

// Goes over prompt and text as they are drawn.
typedef struct line_pen {
    size_t row;
    int column;
    size_t top, bottom; // rows of the drawing that are drawn, bottom not among them
    int indent;         // where lines behind the first begin
    int narrow;         // 0, or the new number of columns:
    size_t folds;       // so many rows more are taken by the rows that are too long for it
} line_pen;

static inline int line_is_seen(const line_pen *p) { return p->row >= p->top && p->row < p->bottom; }

static inline void line_break(line_pen *p, int column) {
    const int was_seen = line_is_seen(p);
    if (p->narrow && p->row >= p->top && p->column > 1)
        p->folds += (size_t)((p->column - 1) / p->narrow);
    p->row++;
    p->column = column;
    if (was_seen && line_is_seen(p)) line_append(&line_ed.drawing, "\r\n", 2);
    for (int i = 0; line_is_seen(p) && i < column; i++) line_append(&line_ed.drawing, " ", 1);
}

// Makes room for a character of so many columns: what does not fit goes to the next row.
static inline void line_fit(line_pen *p, int width) {
    if (p->column + width > line_ed.columns && p->column) line_break(p, 0);
}

// What is drawn for a character; a blank of several columns for a tab.
static inline size_t line_glyph(const char *text, size_t size, int column, char glyph[8],
                                int *width) {
    uint32_t code;
    size_t n = line_decode(text, size, &code);
    *width = line_width(code);
    if (code == '\t') {
        *width = 8 - column % 8;
        if (column + *width > line_ed.columns && column < line_ed.columns)
            *width = line_ed.columns - column;
        memset(glyph, ' ', (size_t)*width);
        return (size_t)*width;
    }
    if (code < 0x20 || code == 0x7F) { // ^A; a terminal would obey it
        glyph[0] = '^', glyph[1] = (char)(code ^ 0x40);
        *width = 2;
        return 2;
    }
    if (code == 0xFFFD || (code >= 0x80 && code < 0xA0)) {
        memcpy(glyph, "\xEF\xBF\xBD", 3);
        return 3;
    }
    memcpy(glyph, text, n);
    return n;
}

static inline void line_ink(line_pen *p, const char *text, size_t size, size_t mark,
                            line_pen *at_mark) {
    char glyph[8];
    for (size_t i = 0; i < size;) {
        uint32_t code;
        int width = 0;
        const int is_break = text[i] == '\n';
        size_t n = is_break ? 0 : line_glyph(text + i, size - i, p->column, glyph, &width);
        line_fit(p, is_break ? i == mark : width); // the cursor on a line's end needs a column
        if (i == mark) *at_mark = *p;
        if (is_break) line_break(p, p->indent);
        else if (line_is_seen(p)) line_append(&line_ed.drawing, glyph, n);
        p->column += width;
        i += line_decode(text + i, size - i, &code);
    }
    if (mark != size) return;
    line_fit(p, 1);
    *at_mark = *p;
}

// Where the cursor is; *p: where all ends. Rows from top to bottom go to the drawing.
static inline line_pen line_layout(line_pen *p) {
    line_pen cursor = *p;
    line_ink(p, line_ed.prompt, strlen(line_ed.prompt), SIZE_MAX, &cursor);
    if (p->row == 0 && p->column <= line_ed.columns / 3) p->indent = p->column;
    line_ink(p, line_ed.text.data, line_ed.text.size, line_ed.cursor, &cursor);
    return cursor;
}

static inline void line_move(size_t n, char direction) {
    char sequence[32];
    if (!n) return;
    snprintf(sequence, sizeof sequence, "\033[%lu%c", (unsigned long)n, direction);
    line_append(&line_ed.drawing, sequence, strlen(sequence));
}

static inline void line_draw(void) {
    line_pen all = {0, 0, 0, 0, 0, 0, 0};
    const line_pen cursor = line_layout(&all);
    const size_t total = all.row + 1, screen = (size_t)line_ed.rows;
    const size_t n = total < screen ? total : screen;
    if (cursor.row < line_ed.top) line_ed.top = cursor.row;
    if (cursor.row >= line_ed.top + n) line_ed.top = cursor.row - n + 1;
    if (line_ed.top + n > total) line_ed.top = total - n;

    line_ed.drawing.size = 0;
    line_move(line_ed.cursor_row, 'A');
    line_append(&line_ed.drawing, "\r\033[J", 4);
    line_pen drawn = {0, 0, line_ed.top, line_ed.top + n, 0, 0, 0};
    line_layout(&drawn);
    line_move(line_ed.top + n - 1 - cursor.row, 'A');
    line_append(&line_ed.drawing, "\r", 1);
    line_move((size_t)cursor.column, 'C');
    line_ed.cursor_row = cursor.row - line_ed.top;
    line_put(line_ed.drawing.data, line_ed.drawing.size);
}

// Most terminals fold rows that have become too long: then the cursor's row is further down.
static inline void line_resize(void) {
    line_pen p = {0, 0, line_ed.top, 0, 0, 0, 0};
    const int columns = line_ed.columns;
    line_measure();
    const int now = line_ed.columns;
    line_ed.columns = columns;
    p.narrow = now < columns ? now : 0;
    const line_pen cursor = line_layout(&p);
    line_ed.cursor_row += cursor.folds;
    if (p.narrow) line_ed.cursor_row += (size_t)(cursor.column / now);
    line_ed.columns = now;
    if (line_ed.cursor_row >= (size_t)line_ed.rows) line_ed.cursor_row = (size_t)line_ed.rows - 1;
}

// Behind the text, in a new line.
static inline void line_close_drawing(const char *mark) {
    line_ed.cursor = line_ed.text.size;
    line_draw();
    line_put(mark, strlen(mark));
    line_put("\r\n", 2);
}

// ---- waiting for keys ------------------------------------------------------------------------

enum { LINE_NONE = -1 }; // instead of a byte: no more will come

static inline void line_begin_drawing(void) {
    line_ed.top = line_ed.cursor_row = 0;
    line_draw();
}

// Stops the program as Ctrl-Z does where nobody edits; goes on when it is continued.
static inline void line_suspend(void) {
    line_ed.suspended = line_ed.resumed = 0;
    const size_t cursor = line_ed.cursor;
    line_close_drawing("");
    line_ed.cursor = cursor;
    line_leave();
    kill(0, SIGTSTP); // all of the job, such as the make that runs us
    if (!line_enter()) line_ed.failed = errno;
    line_begin_drawing();
}

// Signals that came while waiting.
static inline void line_attend(void) {
    if (line_ed.suspended) line_suspend();
    if (line_ed.resumed) { // stopped and continued without our doing: the shell has the terminal
        line_ed.resumed = 0;
        const struct termios before = line_ed.before;
        if (line_set_raw()) line_ed.before = before;
        line_begin_drawing();
    }
    if (line_ed.resized) {
        line_ed.resized = 0;
        line_resize();
        line_draw();
    }
}

// Reads more. 0: there is none, or a signal ended the line.
static inline int line_fill(void) {
    char rings[64];
    while (!line_ed.is_over && !line_ed.failed) {
        struct pollfd wait[2] = {{STDIN_FILENO, POLLIN, 0}, {line_ed.bell[0], POLLIN, 0}};
        line_attend();
        if (poll(wait, 2, -1) < 0) continue;
        while (wait[1].revents && read(line_ed.bell[0], rings, sizeof rings) > 0) {}
        if (!line_ed.is_raw) line_ed.failed = EINTR; // a signal's handler has been there
        if (!line_ed.failed) line_attend(); // what came with a key came before it
        if (line_ed.failed || !wait[0].revents) continue;
        const ssize_t n = read(STDIN_FILENO, line_ed.input, LINE_INPUT);
        if (n > 0) {
            line_ed.input_at = 0, line_ed.input_end = (size_t)n;
            return 1;
        }
        if (n == 0 || (errno != EINTR && errno != EAGAIN)) line_ed.is_over = 1;
    }
    return 0;
}

static inline int line_has_more(void) {
    struct pollfd wait = {STDIN_FILENO, POLLIN, 0};
    return line_ed.input_at < line_ed.input_end ||
           (!line_ed.is_over && poll(&wait, 1, 0) == 1 && (wait.revents & POLLIN));
}

static inline int line_next(void) {
    if (line_ed.input_at == line_ed.input_end && !line_fill()) return LINE_NONE;
    return (unsigned char)line_ed.input[line_ed.input_at++];
}

// ---- editing ---------------------------------------------------------------------------------

static inline void line_insert(const char *data, size_t size) {
    line_text *t = &line_ed.text;
    if (!size || !line_room(t, size)) return;
    memmove(t->data + line_ed.cursor + size, t->data + line_ed.cursor, t->size - line_ed.cursor);
    memcpy(t->data + line_ed.cursor, data, size);
    t->size += size;
    line_ed.cursor += size;
}

static inline void line_erase(size_t from, size_t to) {
    line_text *t = &line_ed.text;
    if (from >= to) return;
    memmove(t->data + from, t->data + to, t->size - to);
    t->size -= to - from;
    line_ed.cursor = from;
}
static inline void line_cut(size_t from, size_t to) {
    if (from < to) line_assign(&line_ed.cut, line_ed.text.data + from, to - from);
    line_erase(from, to);
}

static inline size_t line_left(size_t at) { return line_before(line_ed.text.data, at); }
static inline size_t line_right(size_t at) {
    return line_after(line_ed.text.data, line_ed.text.size, at);
}

// Begin and end of the line that a place is in.
static inline size_t line_home(size_t at) {
    while (at && line_ed.text.data[at - 1] != '\n') at--;
    return at;
}
static inline size_t line_end(size_t at) {
    while (at < line_ed.text.size && line_ed.text.data[at] != '\n') at++;
    return at;
}

// Words are letters, digits and what is not ASCII; for Ctrl-W all that is not blank.
static inline int line_is_word(size_t at, int any) {
    const unsigned char c = (unsigned char)line_ed.text.data[at];
    if (any) return c > ' ';
    return c >= 0x80 || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z');
}
static inline size_t line_word_left(size_t at, int any) {
    while (at && !line_is_word(at - 1, any)) at--;
    while (at && line_is_word(at - 1, any)) at--;
    return at;
}
static inline size_t line_word_right(size_t at) {
    while (at < line_ed.text.size && !line_is_word(at, 0)) at++;
    while (at < line_ed.text.size && line_is_word(at, 0)) at++;
    return at;
}

static inline void line_reverse(size_t from, size_t to) {
    while (from + 1 < to) {
        const char c = line_ed.text.data[from];
        line_ed.text.data[from++] = line_ed.text.data[--to];
        line_ed.text.data[to] = c;
    }
}
// The characters on both sides of the cursor, or the last two, change places. Turning all bytes
// around and then each character puts one behind the other.
static inline void line_swap(void) {
    size_t middle = line_ed.cursor < line_ed.text.size ? line_ed.cursor : line_left(line_ed.cursor);
    const size_t from = line_left(middle), to = line_right(middle);
    if (from == middle || middle == to) return;
    line_reverse(from, to);
    line_reverse(from, from + (to - middle));
    line_reverse(from + (to - middle), to);
    line_ed.cursor = to;
}

static inline void line_show_place(int place) {
    if (place < 0 || place > line_ed.n_history) return;
    if (line_ed.place == line_ed.n_history)
        line_assign(&line_ed.typed, line_ed.text.data, line_ed.text.size);
    const line_text *t = place < line_ed.n_history ? &line_ed.history[place] : &line_ed.typed;
    line_assign(&line_ed.text, t->data, t->size);
    line_ed.cursor = line_ed.text.size;
    line_ed.place = place;
}

// To the line above or below, as many characters from its begin; or through the history.
static inline void line_vertical(int down) {
    const size_t home = line_home(line_ed.cursor), end = line_end(line_ed.cursor);
    if (down ? end == line_ed.text.size : !home) {
        line_show_place(line_ed.place + (down ? 1 : -1));
        return;
    }
    size_t n = 0;
    for (size_t at = home; at < line_ed.cursor; at = line_right(at)) n++;
    const size_t begin = down ? end + 1 : line_home(home - 1), last = line_end(begin);
    for (line_ed.cursor = begin; n && line_ed.cursor < last; n--)
        line_ed.cursor = line_right(line_ed.cursor);
}

// ---- keys ------------------------------------------------------------------------------------

// A key as a letter of its ESC [ sequence: A B C D up, down, right, left, H F home, end.
static inline void line_key_named(int name, int by_word) {
    size_t *at = &line_ed.cursor;
    if (name == 'A' || name == 'B') line_vertical(name == 'B');
    else if (name == 'C') *at = by_word ? line_word_right(*at) : line_right(*at);
    else if (name == 'D') *at = by_word ? line_word_left(*at, 0) : line_left(*at);
    else if (name == 'H') *at = line_home(*at);
    else if (name == 'F') *at = line_end(*at);
}

// Behind ESC [: numbers with ; between them, then a letter or ~.
static inline void line_key_sequence(void) {
    int number[3] = {0, 0, 0}, n = 0, c;
    while ((c = line_next()) != LINE_NONE && c < 0x40 && c >= 0x20)
        if (c == ';') n += n < 2;
        else if (c >= '0' && c <= '9' && number[n] < 1000) number[n] = number[n] * 10 + c - '0';
    const int is_enter = (c == 'u' && number[0] == 13) || (c == '~' && number[2] == 13);
    if (is_enter) line_insert("\n", 1); // Shift-Enter where terminals tell it from Enter
    else if (c != '~') line_key_named(c, number[1] > 2);
    else if (number[0] == 1 || number[0] == 7) line_key_named('H', 0);
    else if (number[0] == 4 || number[0] == 8) line_key_named('F', 0);
    else if (number[0] == 3) line_erase(line_ed.cursor, line_right(line_ed.cursor));
    else if (number[0] == 200) line_ed.is_pasting = 1;
    else if (number[0] == 201) line_ed.is_pasting = 0;
}

// ESC, or Alt and a key, which is the same.
static inline void line_key_escape(void) {
    size_t *at = &line_ed.cursor;
    const int c = line_next();
    if (c == '[') line_key_sequence();
    else if (line_ed.is_pasting) return;
    else if (c == 'O') line_key_named(line_next(), 0);
    else if (c == '\r' || c == '\n') line_insert("\n", 1);
    else if (c == 'b' || c == 'B') *at = line_word_left(*at, 0);
    else if (c == 'f' || c == 'F') *at = line_word_right(*at);
    else if (c == 'd' || c == 'D') line_cut(*at, line_word_right(*at));
    else if (c == 0x7F || c == 8) line_cut(line_word_left(*at, 0), *at);
}

// The bytes of a character come one by one: it is drawn when it is whole.
static inline void line_key_byte(int c) {
    const char byte = (char)c;
    line_insert(&byte, 1);
    if (c >= 0xC0) line_ed.missing = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
    else if (c >= 0x80 && line_ed.missing) line_ed.missing--;
    else line_ed.missing = 0;
}

// What is pasted is text, but for what would drive a terminal.
static inline void line_key_pasted(int c) {
    static int last;
    if (c == '\r' || (c == '\n' && last != '\r')) line_insert("\n", 1);
    else if (c == '\t' || (c >= ' ' && c != 0x7F)) line_key_byte(c);
    last = c;
}

static inline void line_key_control(int c) {
    size_t *at = &line_ed.cursor;
    const size_t home = line_home(*at), end = line_end(*at);
    switch (c) {
    case 1: *at = home; break;                                   // Ctrl-A
    case 2: *at = line_left(*at); break;                         // Ctrl-B
    case 4: line_erase(*at, line_right(*at)); break;             // Ctrl-D
    case 5: *at = end; break;                                    // Ctrl-E
    case 6: *at = line_right(*at); break;                        // Ctrl-F
    case 8: case 0x7F: line_erase(line_left(*at), *at); break;   // Ctrl-H, Backspace
    case 11: line_cut(*at, *at < end ? end : line_right(*at)); break; // Ctrl-K
    case 12:                                                     // Ctrl-L
        line_put("\033[H\033[2J", 7);
        line_begin_drawing();
        break;
    case 14: line_vertical(1); break;                            // Ctrl-N
    case 16: line_vertical(0); break;                            // Ctrl-P
    case 20: line_swap(); break;                                 // Ctrl-T
    case 21: line_cut(home < *at ? home : line_left(*at), *at); break; // Ctrl-U
    case 23: line_cut(line_word_left(*at, 1), *at); break;       // Ctrl-W
    case 25: line_insert(line_ed.cut.data, line_ed.cut.size); break; // Ctrl-Y
    case 26: line_suspend(); break;                              // Ctrl-Z
    case 28: raise(SIGQUIT); break;                              // Ctrl-backslash
    default: break;
    }
}

// A backslash at the end of what is read stands for a newline. Returns whether it did.
static inline int line_goes_on(void) {
    line_text *t = &line_ed.text;
    if (!t->size || t->data[t->size - 1] != '\\') return 0;
    t->data[t->size - 1] = '\n';
    line_ed.cursor = t->size;
    return 1;
}

// One key after another until one ends the line.
static inline line_result line_edit(void) {
    line_begin_drawing();
    for (;;) {
        const int c = line_next();
        if (line_ed.failed) return LINE_FAILED;
        if (c == LINE_NONE) return LINE_END;
        if (c == 27) line_key_escape();
        else if (line_ed.is_pasting) line_key_pasted(c);
        else if (c == '\r' || c == '\n') {
            if (!line_goes_on()) break;
        } else if (c == 3 || (c == 4 && !line_ed.text.size)) {
            line_close_drawing(c == 3 ? "^C" : "");
            return c == 3 ? LINE_INTERRUPTED : LINE_END;
        } else if (c == '\t' || (c >= ' ' && c != 0x7F)) line_key_byte(c);
        else line_key_control(c);
        if (!line_ed.missing && !line_has_more()) line_draw();
    }
    line_close_drawing("");
    return LINE_OK;
}

// ---- without a terminal ----------------------------------------------------------------------

static inline int line_fill_plain(void) {
    while (!line_ed.is_over) {
        const ssize_t n = read(STDIN_FILENO, line_ed.input, LINE_INPUT);
        line_ed.input_at = 0, line_ed.input_end = n > 0 ? (size_t)n : 0;
        if (n > 0) return 1;
        if (n < 0 && errno == EAGAIN) {
            struct pollfd wait = {STDIN_FILENO, POLLIN, 0};
            poll(&wait, 1, -1);
        } else if (n == 0) {
            line_ed.is_over = !isatty(STDIN_FILENO); // Ctrl-D on a terminal is no end forever
            return 0;
        } else {
            line_ed.failed = errno;
            return 0;
        }
    }
    return 0;
}

// Appends up to a newline, which is dropped. 0: there is nothing more.
static inline int line_plain_piece(void) {
    const size_t begin = line_ed.text.size;
    int is_some = 0;
    for (;;) {
        if (line_ed.input_at == line_ed.input_end && !line_fill_plain()) return is_some;
        is_some = 1;
        const char *from = line_ed.input + line_ed.input_at;
        const size_t left = line_ed.input_end - line_ed.input_at;
        const char *newline = (const char *)memchr(from, '\n', left);
        const size_t n = newline ? (size_t)(newline - from) : left;
        line_append(&line_ed.text, from, n);
        line_ed.input_at += newline ? n + 1 : n;
        if (!newline) continue;
        if (line_ed.text.size > begin && line_ed.text.data[line_ed.text.size - 1] == '\r')
            line_ed.text.size--;
        return 1;
    }
}

static inline line_result line_plain(void) {
    if (isatty(STDIN_FILENO)) line_put(line_ed.prompt, strlen(line_ed.prompt));
    int is_some = line_plain_piece();
    while (is_some && line_goes_on() && line_plain_piece()) {}
    if (line_ed.failed) return LINE_FAILED;
    return is_some ? LINE_OK : LINE_END;
}

// ---- what programs call ----------------------------------------------------------------------

// Is a person there, whose keys are edited? Drawn is on standard output or, if that is no terminal,
// on standard error.
static inline int line_is_terminal(void) {
    const char *term = getenv("TERM");
    if (!isatty(STDIN_FILENO) || !term || !*term || !strcmp(term, "dumb")) return 0;
    return isatty(STDOUT_FILENO) || isatty(STDERR_FILENO);
}

// Reads a text; *text, with a NUL behind its *size bytes, is valid until the next call. Flush what
// was written to stdout before.
static inline line_result line_read(const char *prompt, const char **text, size_t *size) {
    line_ed.prompt = prompt;
    line_ed.out = isatty(STDOUT_FILENO) ? STDOUT_FILENO : STDERR_FILENO;
    line_ed.text.size = line_ed.cursor = 0;
    line_ed.failed = line_ed.missing = line_ed.is_pasting = 0;
    line_ed.place = line_ed.n_history;
    line_result result = LINE_FAILED;
    if (!line_is_terminal()) {
        result = line_plain();
    } else if (line_enter()) {
        result = line_edit();
        line_leave();
    } else {
        line_ed.failed = errno;
    }
    if (line_room(&line_ed.text, 1)) line_ed.text.data[line_ed.text.size] = 0;
    *text = line_ed.text.data;
    *size = line_ed.text.size;
    errno = line_ed.failed;
    return line_ed.failed ? LINE_FAILED : result;
}

// Puts a text into the history; the one before it is not repeated.
static inline void line_remember(const char *text, size_t size) {
    const int n = line_ed.n_history;
    const line_text *last = n ? &line_ed.history[n - 1] : NULL;
    if (!size || (last && last->size == size && !memcmp(last->data, text, size))) return;
    if (n == LINE_HISTORY) {
        line_drop(&line_ed.history[0]);
        memmove(line_ed.history, line_ed.history + 1, (LINE_HISTORY - 1) * sizeof(line_text));
        memset(&line_ed.history[n - 1], 0, sizeof(line_text));
        line_ed.n_history--;
    }
    line_append(&line_ed.history[line_ed.n_history++], text, size);
}

static inline void line_close(void) {
    for (int i = 0; i < line_ed.n_history; i++) line_drop(&line_ed.history[i]);
    line_drop(&line_ed.text);
    line_drop(&line_ed.cut);
    line_drop(&line_ed.typed);
    line_drop(&line_ed.drawing);
    line_ed.n_history = 0;
}

#endif
